"""A table of rows and what was computed of them: cells, keys to sort by, and the sentences that explain them.

A row is an object with name, method, weights, dataset, labelnum, test_cases, unit, selection, source, mark,
incomparable, published (None but for published figures), results (one for each seed), classes() and
mean_of(attribute).
"""

import math
from dataclasses import dataclass

# Heading, and whether it is a share (printed in %), a distance (in the result's unit), or neither.
METRICS = {
    "dice": ("Dice", "share"),
    "jaccard": ("Jaccard", "share"),
    "precision": ("Precision", "share"),
    "recall": ("Recall", "share"),
    "specificity": ("Specificity", "share"),
    "accuracy": ("Accuracy", "share"),
    "f1": ("F1", "share"),
    "nsd": ("NSD", "share"),
    "volume_similarity": ("Volume similarity", "share"),
    "hd": ("HD", "distance"),
    "hd95": ("HD95", "distance"),
    "asd": ("ASD", "distance"),
    "assd": ("ASSD", "distance"),
}
# The lines of a cell.
STATISTICS = ("mean ± SD over seeds", "SD over cases", "95 % interval", "p (pairs)")
UNKNOWN = "-"
NOTHING = {**dict.fromkeys(("mean", "sd_seeds", "sd_cases", "low", "high", "p"), math.nan), "undefined": 0, "pairs": 0}
NOTHING |= {"why": ""}


@dataclass
class Table:
    """`columns`: headings; `rows`: for each a list of cells, a cell a list of lines; `keys`: for each the numbers or
    strings to sort by; `notes`: sentences beneath; `records`: the same as flat dicts, for CSV."""

    columns: list
    rows: list
    keys: list
    notes: list
    records: list


def build_table(lines, metrics, baselines=(), footnotes=(), notes=(), resamples=None):
    """The Table of `lines`: (row, class or 'mean', {metric: entry}), in the order in which they are to stand.

    An entry has 'mean' and, of a row with results, what STATISTICS names: 'sd_seeds', 'sd_cases', 'low', 'high', and
    with `baselines` 'p' and 'pairs', or 'why' there is no p; 'undefined' counts values that were left out. What an
    entry lacks is unknown. `footnotes`: (mark, sentence); `notes`: further sentences; `resamples`: of the bootstrap.
    """
    rows = list({id(row): row for row, _, _ in lines}.values())
    own = [row for row in rows if row.results]
    units = {row.unit for row in rows}
    several_classes = len({label for row in own for label in row.classes()}) > 1
    columns = ["dataset", "method", "labels", "class", "seeds", "statistic"]
    columns += [_heading(metric, units) for metric in metrics]
    columns += ["parameters", "training", "inference a case", "selection", "source"]

    cells, keys, records, untested = [], [], [], {}
    for row, label, found in lines:
        entries = {metric: NOTHING | found[metric] for metric in metrics}
        for metric, entry in entries.items():
            if entry["why"]:
                untested.setdefault(f"{row.name}{row.mark}: {entry['why']}", []).append(_heading(metric, set()))
        cost = _cost(row)
        head = [row.dataset, row.name + row.mark, row.labelnum, label, len(row.results) or None, ""]
        keys.append([*head, *(entry["mean"] for entry in entries.values()), *cost, row.selection, row.source])
        texts = [[UNKNOWN if value is None else str(value)] for value in head]
        texts[5] = list(STATISTICS[: 4 if baselines else 3]) if row.results else ["mean"]
        texts += [_lines(entries[m], m, row, bool(baselines), len(units) > 1) for m in metrics]
        shown = [_count(cost[0]), _duration(cost[1]), _duration(cost[2]), row.selection, row.source]
        cells.append([*texts, *([text] for text in shown)])
        records.append(_record(row, label, entries, cost))

    per_class = any(label != "mean" for _, label, _ in lines)
    kept, constant = _columns_that_vary(columns, cells, per_class)
    remarks = [*(f"{mark} {why}" for mark, why in footnotes), *constant, *_explanations(own, baselines, resamples)]
    if several_classes and not per_class:
        remarks.append("All metrics are means over the classes of a case.")
    for why, which in untested.items():
        remarks.append(f"No test of {why}" + f" ({', '.join(which)})" * (len(set(which)) < len(metrics)) + ".")
    for record in records:
        counts = [f"{record[f'{m}_undefined']} of {_heading(m, set())}" for m in metrics if record[f"{m}_undefined"]]
        if counts:
            remarks.append(
                f"{record['method']}, {record['labelnum']} labels: not defined for an empty mask, and left out: "
                f"{', '.join(counts)}."
            )
    columns, *rest = ([row[i] for i in kept] for row in [columns, *cells, *keys])
    return Table(columns, rest[: len(cells)], rest[len(cells) :], [*remarks, *notes], records)


def _explanations(rows, baselines, resamples):
    """Sentences that say what the statistics of `rows`, tested against `baselines`, are of."""
    seeds = sorted({result.seed for row in rows for result in row.results} - {None})
    seeds = f" (seeds {', '.join(map(str, seeds))})" if seeds else ""
    said = [
        f"mean ± SD over seeds{seeds}: of the seeds' means over the test cases, n - 1; SD over cases: n, averaged over "
        f"the seeds.",
        "95 % interval: percentile bootstrap over the test cases, each averaged over the seeds first"
        + f" ({resamples} resamples, seed 0)" * bool(resamples)
        + ".",
    ]
    if baselines:
        named = "; ".join(f"{row.name}, {row.labelnum} labels" for row in baselines)
        said.append(
            f"p: Wilcoxon signed-rank test, two-sided, not corrected for several tests, against {named}, on the same "
            f"cases, each averaged over the seeds first; in brackets the pairs."
        )
    return said


def _heading(metric, units):
    name, kind = METRICS.get(metric, (metric, ""))
    if kind == "share":
        return f"{name} %"
    return f"{name} {next(iter(units))}" if kind == "distance" and len(units) == 1 else name


def _lines(entry, metric, row, tested, name_unit):
    """The lines of one cell: mean and deviation over seeds, deviation over cases, interval, p."""
    kind = METRICS.get(metric, ("", ""))[1]
    scale = 100 if kind == "share" else 1

    def number(name):
        return UNKNOWN if math.isnan(entry[name]) else f"{scale * entry[name]:.2f}"

    unit = f" {row.unit}" if name_unit and kind == "distance" else ""
    first = number("mean") + f" ± {number('sd_seeds')}" * (len(row.results) > 1) + unit
    if row.published is not None:
        return [first]
    lines = [first, number("sd_cases"), f"[{number('low')}, {number('high')}]"]
    p = UNKNOWN if math.isnan(entry["p"]) else f"{entry['p']:.3f} ({entry['pairs']})"
    p = f"<0.001 ({entry['pairs']})" if entry["p"] < 0.001 else p
    return lines + [p] * tested


def _cost(row):
    """(parameters, seconds of training, seconds of inference a case), means over the runs; None is unknown."""
    parameters = row.mean_of("parameters")
    parameters = None if parameters is None else round(parameters)
    return parameters, row.mean_of("training_seconds"), row.mean_of("inference_seconds")


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


def _columns_that_vary(columns, cells, per_class):
    """(indices of the columns to print, sentences for the others): what is the same in all rows is said once."""
    foldable = {"dataset", "parameters", "training", "inference a case", "selection", "source"}
    foldable |= set() if per_class else {"class"}
    kept, sentences = [], []
    for i, name in enumerate(columns):
        values = {tuple(row[i]) for row in cells}
        if name not in foldable or len(values) > 1:
            kept.append(i)
        elif name not in ("class", "source"):
            (value,) = next(iter(values))
            sentences.append(f"{name} of all: {value}" if value != UNKNOWN else f"{name}: not recorded")
    return kept, [f"{'; '.join(sentences)}."] if sentences else []


def _record(row, label, entries, cost):
    record = {"dataset": row.dataset, "method": row.method, "weights": row.weights, "labelnum": row.labelnum}
    record |= {"class": label, "seeds": " ".join(str(r.seed) for r in row.results), "cases": row.test_cases}
    for metric, entry in entries.items():
        record |= {f"{metric}_{name}": value for name, value in entry.items() if name != "why"}
    record |= {"unit": row.unit, "selection": row.selection}
    record |= dict(zip(("parameters", "training_seconds", "inference_seconds_a_case"), cost, strict=True))
    return record | {"not_comparable": row.incomparable, "source": row.source}
