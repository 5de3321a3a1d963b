"""The table of results: cells, keys to sort by, and the sentences that explain them."""

import math
from dataclasses import dataclass

import numpy as np

from mtseg.report.compare import baseline_of, find_baseline, mark_rows
from mtseg.report.read import ReportError, find_results
from mtseg.report.rows import group_results, published_beside
from mtseg.report.summary import RESAMPLES, holm, paired_test, pooled_statistics, statistics
from mtseg.results import METRICS, POOLED, heading, in_neither, is_distance, scale

DEFAULT_METRICS = ("dice", "jaccard", "hd95", "asd")
OF_IMAGES = ("dice", "dice_pooled", "jaccard", "jaccard_pooled", "pixel_accuracy_pooled", "hd95")
# The lines of a cell.
STATISTICS = ("mean ± SD over seeds", "SD over cases", "95 % interval")
TESTS = ("difference, 95 % interval", "p (pairs)", "p, Holm")
OF_TEST = ("difference", "difference_low", "difference_high", "p", "p_holm")
UNKNOWN = "-"


@dataclass
class Table:
    """`columns`: headings; `rows`: for each a list of cells, a cell a list of lines; `keys`: for each the numbers or
    strings to sort by; `notes`: sentences beneath; `records`: the same as flat dicts, for CSV."""

    columns: list
    rows: list
    keys: list
    notes: list
    records: list


def default_metrics(rows):
    """The metrics of a table of these rows, unless others are asked for."""
    results = [result for row in rows for result in row.results]
    metrics = OF_IMAGES if any(result.images for result in results) else DEFAULT_METRICS
    largest = ("dice_largest", "hd95_largest")
    return metrics + largest if results and all(largest[0] in result.cases[0] for result in results) else metrics


def report(paths, baseline=None, metrics=None, published=None, per_class=False):
    """(Table, rows) of all results at or under `paths`. With `per_class`, a line for each class and one for the mean
    over them, else the latter alone. Raises ReportError, and FlagError for a file that is no JSON."""
    results, notes = find_results(paths)
    rows, more = group_results(results)
    metrics = metrics or default_metrics(rows)
    held = {key for result in results for case in result.cases for key in case} - {"case", "class", "set"}
    held |= {f"{metric}_pooled" for metric in POOLED if {metric, "tp"} <= held}
    absent = [metric for metric in metrics if metric not in held]
    if absent:
        names = sorted(held)
        raise ReportError(f"{results[0].path}: has no metric {absent[0]!r}; there are {', '.join(names)}")
    baselines = find_baseline(rows, baseline) if baseline else []
    beside, others = published_beside(published, rows) if published else ({}, [])
    if published and not (beside or others):
        more.append(f"{published} has no figures for these data and numbers of labels.")
    for data, labels in dict.fromkeys((figure["data"], figure["labels"]) for figure in others):
        of_them = [f"{f['method']} {_published(f)}" for f in others if (f["data"], f["labels"]) == (data, labels)]
        what = f"Published Dice % of other methods on {data} with {labels} labels, not comparable with the rows here"
        more.append(f"{what}: {', '.join(of_them)}.")
    footnotes = mark_rows(rows, baselines[0] if baselines else rows[0])
    return _table(rows, metrics, baselines, footnotes, dict.fromkeys([*more, *notes]), per_class, beside), rows


def _describe(row, metric, label, baselines):
    """What the table says of one metric of a row: its statistics, and where there are `baselines` the test, or `why`
    there is none."""
    entry = dict.fromkeys(("mean", "sd_seeds", "sd_cases", "low", "high", *OF_TEST), math.nan)
    entry |= {"undefined": 0, "pairs": 0, "why": ""}
    if metric in METRICS and metric.endswith("_pooled"):
        parts = row.parts(metric.removesuffix("_pooled"), label)
        return entry if parts is None else entry | pooled_statistics(parts, row.patients())
    baseline = baseline_of(row, baselines)
    for one in (row, baseline) if baseline else (row,):
        lacking = sum(all(metric not in case for case in result.cases) for result in one.results)
        if lacking and metric in METRICS:
            of_it = "" if one is row else f" of {one.title}"
            return entry | {"why": f"{lacking} of {len(one.results)} results{of_it} do not hold it; test them again"}
    entry |= statistics(row.values(metric, label), row.patients())
    if not baselines or baseline is row:
        return entry
    if baseline is None:
        draw = f" of draw {row.draw}" if any(one.draw for one in (row, *baselines)) else ""
        return entry | {"why": f"no baseline with {row.labelnum} labels{draw}"}
    if (is_distance(metric) or metric == "nsd") and baseline.unit != row.unit:
        return entry | {"why": f"distances in {row.unit} and in {baseline.unit}"}
    test, why = paired_test(row.per_case(metric, label), baseline.per_case(metric, label), row.results[0].patients)
    return entry | test | {"why": why}


def _table(rows, metrics, baselines, footnotes, notes, per_class, beside):
    """The Table of `rows`; what explains it stands between the `footnotes` and the `notes`. `beside`: {id of a row: its
    published figures}, or empty."""
    several_classes = any(len(row.classes()) > 1 for row in rows)
    per_class = per_class and several_classes
    units = {row.unit for row in rows}
    unit = next(iter(units)) if len(units) == 1 else ""
    images = all(result.images for row in rows for result in row.results)
    inflated = any(row.inflation() is not None for row in rows)

    cells, records, untested, undefined = [], [], {}, []  # cells: of each row {column: (lines, what to sort by)}
    lines = [(row, label) for row in rows for label in [*(row.classes() if per_class else ()), "mean"]]
    described = [{metric: _describe(row, metric, label, baselines) for metric in metrics} for row, label in lines]
    several_tests = _correct(lines, described)
    statistics_shown = STATISTICS + TESTS[: 2 * bool(baselines) + several_tests]
    for (row, label), entries in zip(lines, described, strict=True):
        of_class = f", {'mean over the classes' if label == 'mean' else f'class {label}'}" if per_class else ""
        for metric, entry in entries.items():
            if entry["why"]:
                why = f"{row.title}{row.mark}{of_class}: {entry['why']}"
                untested.setdefault(why, []).append(heading(metric, images=images))
        if left_out := [f"{entry['undefined']} of {heading(m)}" for m, entry in entries.items() if entry["undefined"]]:
            which = ", ".join(left_out)
            undefined.append(f"{row.title}{of_class}: not defined for an empty mask, and left out: {which}.")
        cost = {name: row.mean_of(name) for name, _ in COSTS.values()}
        inflation = row.inflation() if label == "mean" else None
        figures = beside.get(id(row), []) if label == "mean" else []
        head = {"dataset": row.dataset, "method": row.name + row.mark, "labels": row.labelnum, "class": label}
        head["seeds"] = len(row.results)
        line = {name: ([UNKNOWN if value is None else str(value)], value) for name, value in head.items()}
        line["statistic"] = list(statistics_shown), ""
        for metric, entry in entries.items():
            line[heading(metric, unit, images)] = _lines(entry, metric, row, statistics_shown, not unit), entry["mean"]
        if inflated:
            line["inflation Dice %"] = [_inflation(inflation)], None if inflation is None else inflation.mean()
        if beside:
            texts = [_published(figure) for figure in figures]
            line["published"] = texts or [UNKNOWN], figures[0]["dice"] if figures else None
        line |= {column: ([show(cost[name])], cost[name]) for column, (name, show) in COSTS.items()}
        line["selection"] = [row.selection], row.selection
        cells.append(line)
        records.append(_record(row, label, entries, cost, inflation, figures))

    explained = [*_fold(cells), *_explanations(rows, baselines, several_tests)]
    if beside:
        explained.append(
            "published: Dice as printed, on the whole data by the papers' own budgets, with how the checkpoint was "
            "selected and whose table it is; not comparable with the rows here."
        )
    if any(metric.endswith("_pooled") for metric in metrics):
        explained.append(
            "pooled: of the pixels of all test images together, one number a seed: without SD over cases and p; its "
            "interval is of resampled images. All others are means over the images."
        )
    if several_classes and not per_class:
        explained.append("All metrics are means over the classes of a case.")
    for row in rows:
        cases = [case for result in row.results for case in result.cases]
        of_class = [[in_neither(case) for case in cases if case["class"] == label] for label in row.classes()]
        shares = zip(row.classes(), map(np.mean, of_class), strict=True)
        if named := [f"{100 * share:.3g} %" + f" of class {c}" * several_classes for c, share in shares if share]:
            undefined.append(f"{row.title}: Dice is 100 where label and prediction are empty: in {', '.join(named)}.")
    for why, which in untested.items():
        of_metrics = f" ({', '.join(which)})" if len(which) < len(metrics) else ""
        explained.append(f"No test of {why}{of_metrics}.")
    notes = [*footnotes, *explained, *undefined, *notes]
    texts, keys = ([[cell[i] for cell in line.values()] for line in cells] for i in (0, 1))
    return Table([*cells[0]], texts, keys, notes, records)


def _correct(lines, described):
    """Fill in 'p_holm': of each metric, and of each class apart, over all rows. Whether there are several tests."""
    several = False
    for metric, label in {(metric, label) for _, label in lines for metric in described[0]}:
        every = [entries[metric] for (_, of), entries in zip(lines, described, strict=True) if of == label]
        tested = [entry for entry in every if not math.isnan(entry["p"])]
        for entry, p in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
            entry["p_holm"] = float(p)
        several |= len(tested) > 1
    return several


def _explanations(rows, baselines, several_tests):
    """Sentences that say what the statistics of `rows`, tested against `baselines`, are of."""
    seeds = sorted({result.seed for row in rows for result in row.results} - {None})
    named = f" ({'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))})" if seeds else ""
    cases = f"the {' or '.join(map(str, sorted({row.test_cases for row in rows})))} test cases"
    numbers = sorted({len({*row.patients()}) for row in rows if len({*row.patients()}) < row.test_cases})
    whole = f", drawn by patient (there are {' or '.join(map(str, numbers))})" if numbers else ""
    sentences = [
        f"mean ± SD over seeds{named}: of the seeds' means over {cases}, n - 1; SD over cases: n, averaged over the "
        f"seeds.",
        f"95 % interval: percentile bootstrap over {cases}{whole}, each averaged over the seeds first ({RESAMPLES} "
        f"resamples, seed 0).",
    ]
    if any(row.mean_of("training_seconds") is not None for row in rows):
        sentences.append(
            "training: all iterations, each from waiting for its batch to the updated weights; without validation, "
            "saving and starting. iteration: their mean. memory: the most of the process, on a GPU of its tensors."
        )
    if baselines:
        against = "; ".join(dict.fromkeys(row.title for row in baselines))
        drawn, pairs = "patients" if numbers else "cases", ", of a patient's cases the mean" if numbers else ""
        sentences.append(
            f"difference: from {against}, on the same cases, each averaged over the seeds first; its interval is of "
            f"resampled {drawn}. p: Wilcoxon signed-rank test, two-sided, not corrected for several tests; in brackets "
            f"the pairs{pairs}."
        )
    if several_tests:
        sentences.append("p, Holm: corrected for the tests of all rows in that metric, of each class apart.")
    return sentences


def _lines(entry, metric, row, shown, name_unit):
    """The lines of one cell: those of STATISTICS and TESTS that are `shown`."""

    def number(name, sign=""):
        return UNKNOWN if math.isnan(entry[name]) else f"{scale(metric) * entry[name]:{sign}.2f}"

    first = number("mean")
    if first == UNKNOWN:
        return [UNKNOWN]
    if len(row.results) > 1:
        first += f" ± {number('sd_seeds')}"
    if name_unit and is_distance(metric):
        first += f" {row.unit}"
    p, corrected = ("<0.001" if entry[name] < 0.001 else f"{entry[name]:.3f}" for name in ("p", "p_holm"))
    tests = [UNKNOWN] * 2 if math.isnan(entry["p"]) else [f"{p} ({entry['pairs']})", corrected]
    difference, low, high = (number(name, "+") for name in OF_TEST[:3])
    tests.insert(0, UNKNOWN if difference == UNKNOWN else f"{difference} [{low}, {high}]")
    return [first, number("sd_cases"), f"[{number('low')}, {number('high')}]", *tests][: len(shown)]


def _published(figure):
    return f"{100 * figure['dice']:.2f} ({figure['said']})"


def _inflation(values):
    if values is None:
        return UNKNOWN
    return f"{100 * values.mean():.2f}" + (f" ± {100 * values.std(ddof=1):.2f}" if len(values) > 1 else "")


def _count(number):
    if number is None:
        return UNKNOWN
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number:.0f}"


def _duration(seconds):
    if seconds is None:
        return UNKNOWN
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory(megabytes):
    return UNKNOWN if megabytes is None else f"{megabytes / 1e3:.2f} GB"


COSTS = {  # columns: what it is of a Row's results, and how it is shown
    "parameters": ("parameters", _count),
    "training": ("training_seconds", _duration),
    "iteration": ("iteration_seconds", _duration),
    "memory": ("peak_memory_mb", _memory),
    "inference a case": ("inference_seconds", _duration),
}


def _fold(cells):
    """Take what is the same in all rows out of the `cells`; the sentences that say it once instead."""
    sentences = []
    for name in ("dataset", "class", *COSTS, "selection"):
        texts = {line[name][0][0] for line in cells}
        if len(texts) > 1:
            continue
        for line in cells:
            del line[name]
        if name != "class":
            sentences += [f"{name}: not recorded" if texts == {UNKNOWN} else f"{name} of all: {texts.pop()}"]
    return [f"{'; '.join(sentences)}."] if sentences else []


def _record(row, label, entries, cost, inflation, figures):
    record = {"dataset": row.dataset, "method": row.method, "weights": row.weights, "labelnum": row.labelnum}
    record |= {"class": label, "seeds": " ".join(str(r.seed) for r in row.results), "cases": row.test_cases}
    for metric, entry in entries.items():
        record |= {f"{metric}_{name}": value for name, value in entry.items() if name != "why"}
    record |= {"unit": row.unit, "selection": row.selection}
    parameters = cost["parameters"] and round(cost["parameters"])
    record |= {**cost, "parameters": parameters, "inference_seconds_a_case": cost["inference_seconds"]}
    del record["inference_seconds"]
    record["dice_inflation"] = None if inflation is None else float(inflation.mean())
    record["dice_published"] = "; ".join(f"{figure['dice']:.4f} ({figure['said']})" for figure in figures)
    return record | {"not_comparable": row.incomparable}
