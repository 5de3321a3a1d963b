"""One table of results with their uncertainty, from the metrics.json files that inference.py writes.

    python -m mtseg.report model                                       # everything tested under model/
    python -m mtseg.report runs/half_sup_8 runs/half_MT_8 --baseline supervised
    python -m mtseg.report runs --baseline supervised --published --out table.tex

A row is a method, its weights (student or teacher) and its number of labelled cases; runs that differ in the seed alone
share it. Each metric is given as

    mean ± SD over seeds        mean over seeds of the mean over cases; deviation of the seeds' means (n - 1)
    SD over cases               deviation over the test cases (n), averaged over the seeds
    95 % interval               percentile bootstrap over the test cases, each averaged over the seeds first: what
                                another draw of patients might give, not what another seed might
    p (pairs)                   two-sided Wilcoxon signed-rank test against --baseline on the same cases, each
                                averaged over the seeds first

Rows that are not comparable with the baseline (without one: the first row), because of other test cases, units,
windows or selection, carry a mark and a footnote that says why.
"""

import csv
import io
import json
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

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
DEFAULT_METRICS = ("dice", "jaccard", "hd95", "asd")
STATISTICS = ("mean ± SD over seeds", "SD over cases", "95 % interval", "p (pairs)")
MARKS = "†‡§¶‖"
FORMATS = {"text": ".txt", "markdown": ".md", "latex": ".tex", "csv": ".csv"}
RESAMPLES = 10000
UNKNOWN = "-"

# Settings that say where, how far and how often, and never what is computed: runs that differ in these, in the seed or
# in versions share a row.
FREE_SETTINGS = {
    *("root_path", "dataset_name", "model", "labelnum", "output_dir", "resume", "overwrite", "gpu", "num_workers"),
    *("save_freq", "log_freq", "val_list", "val_freq", "stride_xy", "stride_z", "selection", "seed"),
    *("python", "torch", "device", "threads"),
}


class ReportError(ValueError):
    """Results that cannot be read or put into one table; the message is one sentence with the file and the remedy."""


@dataclass
class Result:
    """What one metrics.json says; None is what it does not say."""

    path: Path
    method: str
    weights: str
    dataset: str
    labelnum: int | None
    seed: int | None
    selection: str
    unit: str
    protocol: dict
    cases: list
    sha256: str | None = None
    parameters: int | None = None
    inference_seconds: float | None = None
    training_seconds: float | None = None
    run: Path | None = None
    config: dict = field(default_factory=dict)
    network: dict = field(default_factory=dict)

    def case_names(self):
        return tuple(sorted({row["case"] for row in self.cases}))

    def classes(self):
        return tuple(sorted({row["class"] for row in self.cases}, key=lambda label: (isinstance(label, str), label)))

    def values(self, metric, label="mean"):
        """{case: value} of class `label`, or of the mean over the classes; NaN where (one of) it is not defined."""
        found = {}
        for row in self.cases:
            if label in ("mean", row["class"]):
                value = row.get(metric)
                found.setdefault(row["case"], []).append(math.nan if value is None else float(value))
        return {case: sum(values) / len(values) for case, values in found.items()}


@dataclass
class Row:
    """Runs that differ in the seed alone, or one published figure (`published`: metric to mean)."""

    method: str
    weights: str
    dataset: str
    labelnum: int | None
    results: list
    published: dict | None = None
    source: str = "here"
    split: str = ""
    test_cases: int | None = None
    unit: str = ""
    protocol: dict = field(default_factory=dict)
    selection: str = ""
    mark: str = ""
    incomparable: str = ""

    @property
    def name(self):
        return self.method + f", {self.weights}" * bool(self.weights)

    def values(self, metric, label="mean"):
        """(seeds, cases) array, cases in the order of their names."""
        tables = [result.values(metric, label) for result in self.results]
        return np.array([[table.get(case, math.nan) for case in self.results[0].case_names()] for table in tables])

    def mean_of(self, attribute):
        """The mean over the runs of a number each of them records, None where one does not."""
        numbers = [getattr(result, attribute) for result in self.results]
        return sum(numbers) / len(numbers) if numbers and None not in numbers else None


# ------------------------------------------------------------------------------------------------------------- reading


def read_json(path):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not a JSON file ({error}); make it again or move it away") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path}: not a JSON object; make it again or move it away")
    return content


def read_training_seconds(path):
    """The time a run has trained, from the iterations and their rate in its metrics.csv; None without such a file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        done = [0, *(int(row["iteration"]) for row in rows)]
        rates = [float(row["iterations_per_second"]) for row in rows]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    pairs = zip(done, done[1:], rates, strict=False)
    return sum((now - before) / rate for before, now, rate in pairs if rate > 0) or None


def read_result(path):
    """The Result of a metrics.json. What it does not record is taken from the config.json of the checkpoint's run."""
    path = Path(path)
    content = read_json(path)
    rows = content.get("cases")
    if not (
        isinstance(rows, list) and rows and all(isinstance(r, dict) and {"case", "class"} <= r.keys() for r in rows)
    ):
        raise ReportError(f"{path}: holds no cases of inference.py; test the checkpoint again or move the file away")
    for row in rows:
        for key, value in row.items():
            if key in METRICS and not (value is None or isinstance(value, (int, float))):
                raise ReportError(f"{path}: {key} of case {row['case']} is {value!r}, no number; test again")
    rows = [{**row, "case": str(row["case"])} for row in rows if row["class"] != "mean"]
    checkpoints = content.get("checkpoint") or ""
    checkpoints = [Path(str(c)) for c in (checkpoints if isinstance(checkpoints, list) else [checkpoints])]
    first = checkpoints[0]
    # inference.py writes to <run>/<checkpoint>_<split>/ unless told otherwise, and the run may have been moved since.
    run = path.parent.parent if first.stem and path.parent.name.startswith(first.stem) else first.parent
    config = read_json(run / "config.json") if first.stem and (run / "config.json").is_file() else {}

    def known(name, default=None, also=None):
        value = content.get(name)
        return config.get(also or name, default) if value is None else value

    network = content.get("network")
    network = network if isinstance(network, dict) else {}
    method = str(known("method", network.get("network", "unknown"), also="model"))
    weights = ""
    if len(checkpoints) > 1:
        weights = f"ensemble of {len(checkpoints)}"
    elif first.name.startswith("ema_"):
        weights = "teacher"
    elif "ema_decay" in config:
        weights = "student"
    seed, labelnum = known("seed"), known("labelnum")

    def number(name):
        value = content.get(name)
        return value if isinstance(value, (int, float)) else None

    seconds = number("training_seconds")
    return Result(
        path=path,
        method=method,
        weights=weights,
        dataset=str(known("dataset", "unknown", also="dataset_name")),
        labelnum=labelnum if isinstance(labelnum, int) else None,
        seed=seed if isinstance(seed, int) else None,
        selection=str(content.get("selection") or "unknown"),
        unit=str(content.get("unit") or "unknown"),
        protocol=content.get("protocol") if isinstance(content.get("protocol"), dict) else {},
        cases=rows,
        sha256=str(content.get("checkpoint_sha256") or "") or None,
        parameters=number("parameters"),
        inference_seconds=number("inference_seconds"),
        training_seconds=read_training_seconds(run / "metrics.csv") if seconds is None and config else seconds,
        run=run if config else None,
        config=config,
        network=network,
    )


def find_results(paths):
    """(results, untested runs): all metrics.json at or under `paths`, each once, and the runs without any.

    `paths`: run folders, result folders, metrics.json files, or folders above them. Raises ReportError.
    """
    files, runs = {}, {}
    for path in map(Path, paths):
        if not path.exists():
            raise ReportError(f"{path}: no such file or folder; give runs, folders above them, or metrics.json files")
        for file in [path] if path.is_file() else sorted(path.rglob("metrics.json")):
            files[file.resolve()] = file
        for config in sorted(path.rglob("config.json")) if path.is_dir() else []:
            runs[config.parent.resolve()] = config.parent
    results = [read_result(file) for file in files.values()]
    if not results:
        raise ReportError(
            f"{', '.join(map(str, paths))}: no metrics.json there; test a checkpoint first: python inference.py "
            f"--model_path <run>/iter_<N>.pth"
        )
    tested = {parent for file in files for parent in file.parents}
    return results, [shown for run, shown in runs.items() if run not in tested]


def read_published(path):
    """Published figures as Rows, from a CSV file like data/published/la.csv (Dice and Jaccard in %)."""
    rows = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for entry in csv.DictReader(file):
                shares = {m: float(entry[m]) / 100 for m in ("dice", "jaccard")}
                distances = {m: float(entry[m]) for m in ("hd95", "asd")}
                protocol = {name: int(entry[name]) for name in ("stride_xy", "stride_z")}
                rows.append(
                    Row(
                        method=entry["method"],
                        weights="",
                        dataset=entry["dataset"],
                        labelnum=int(entry["labelled"]),
                        results=[],
                        published=shares | distances,
                        source=entry["source"],
                        split=entry["split"],
                        test_cases=int(entry["test_cases"]),
                        unit=entry["unit"],
                        protocol=protocol | {"patch_size": [int(side) for side in entry["patch_size"].split("x")]},
                        selection=entry["selection"],
                    )
                )
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}); give the file behind --published") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"{path}: line {len(rows) + 2} is not a published figure ({error}); see data/published/la.csv"
        ) from error
    return rows


# ------------------------------------------------------------------------------------------------------------ grouping


def frozen(value):
    return json.dumps(value, sort_keys=True, default=str)


def group_results(results):
    """(rows, notes): results that differ in the seed alone become one Row. Raises ReportError on two of one seed.

    The same checkpoint tested twice in the same way counts once. Rows that would have the same name are told apart by
    the settings in which they differ.
    """
    groups, notes = {}, []
    for result in results:
        settings = {name: value for name, value in result.config.items() if name not in FREE_SETTINGS | {"exp"}}
        how = [result.network, result.selection, result.unit, result.protocol, result.case_names(), result.classes()]
        key = (result.dataset, result.labelnum, result.method, result.weights, frozen(settings), frozen(how))
        own = groups.setdefault(key, [])
        twin = next((other for other in own if result.sha256 and other.sha256 == result.sha256), None)
        if twin:
            notes.append(f"{result.path} tests the same checkpoint as {twin.path}; it counts once.")
            continue
        twin = next((other for other in own if result.seed is not None and other.seed == result.seed), None)
        if twin:
            raise ReportError(
                f"{result.path} and {twin.path}: two results of {result.method} with {result.labelnum} labels and seed "
                f"{result.seed}, of different weights; give one of them"
            )
        own.append(result)

    rows = []
    for own in groups.values():
        own.sort(key=lambda result: (result.seed is None, result.seed))
        one = own[0]
        rows.append(
            Row(
                method=one.method,
                weights=one.weights,
                dataset=one.dataset,
                labelnum=one.labelnum,
                results=own,
                test_cases=len(one.case_names()),
                unit=one.unit,
                protocol=one.protocol,
                selection=one.selection,
            )
        )
    rows.sort(key=lambda row: (row.dataset, row.labelnum is None, row.labelnum, row.method != "supervised", row.name))
    for row in rows:
        same = [r for r in rows if (r.dataset, r.labelnum, r.name) == (row.dataset, row.labelnum, row.name)]
        if len(same) > 1:
            _tell_apart(same)
    return rows, notes


def _tell_apart(rows):
    """Append to each row's method the settings in which the rows differ, where it is not only how they were tested."""
    configs = [{k: v for k, v in r.results[0].config.items() if k not in FREE_SETTINGS} for r in rows]
    names = sorted({name for config in configs for name in config})
    differing = [n for n in names if len({frozen(config.get(n)) for config in configs}) > 1]
    # The name of an experiment is what its author tells it apart by; lists of cases are too long to print.
    differing = ["exp"] if "exp" in differing else differing
    for row, config in zip(rows, configs, strict=True):
        shown = [f"{n} {config.get(n)}" if not isinstance(config.get(n), list) else f"other {n}" for n in differing]
        row.method += f" ({'; '.join(shown)})" * bool(shown)


def find_baseline(rows, words):
    """The rows that `words` names, each word a row's method, weights or number of labels; ReportError if none."""
    wanted = set(words.replace(",", " ").split())
    found = [row for row in rows if row.results and wanted <= {*row.name.replace(",", " ").split(), str(row.labelnum)}]
    if not found:
        names = "; ".join(f"{row.name} {row.labelnum}" for row in rows if row.results)
        raise ReportError(f"--baseline {words!r} names no row; there are: {names}")
    for row in found:
        twins = [r.name for r in found if (r.dataset, r.labelnum) == (row.dataset, row.labelnum)]
        if len(twins) > 1:
            raise ReportError(
                f"--baseline {words!r} names several rows ({'; '.join(twins)}); add words until it is one"
            )
    return found


def baseline_of(row, baselines):
    """The baseline for `row`: that with as many labels on the same data, or the only one there is; None without."""
    alike = [b for b in baselines if b.dataset == row.dataset]
    return next((b for b in alike if b.labelnum == row.labelnum), alike[0] if len(alike) == 1 else None)


def mark_incomparable(rows, reference):
    """Give a mark to each row that cannot stand beside `reference`; returns the footnotes, [(mark, why)].

    What one of the two does not record counts as no difference.
    """
    footnotes = {}
    for row in rows:
        reasons = []
        if row.dataset != reference.dataset:
            reasons.append(f"dataset {row.dataset}, not {reference.dataset}")
        elif row.published is not None and row.test_cases != reference.test_cases:
            reasons.append(f"{row.test_cases} test cases, not {reference.test_cases}")
        elif row.published is None and row.results[0].case_names() != reference.results[0].case_names():
            own, other = set(row.results[0].case_names()), set(reference.results[0].case_names())
            reasons.append(f"other test cases ({len(own)}, of which {len(own & other)} are among the {len(other)})")
        if row.results and row.results[0].classes() != reference.results[0].classes():
            reasons.append("other classes")
        if row.unit != reference.unit:
            reasons.append(f"distances in {row.unit}, not {reference.unit}")
        for name in sorted(row.protocol.keys() & reference.protocol.keys()):
            ours, theirs = row.protocol[name], reference.protocol[name]
            if frozen(ours) != frozen(theirs):
                reasons.append(f"{name} {_plain(ours)}, not {_plain(theirs)}")
        if row.selection != reference.selection:
            reasons.append(f"checkpoint selected by {row.selection}, not {reference.selection}")
        if row.published is not None:
            reasons = ["published", *reasons, "cases and voxel size not checked"]
        if reasons:
            row.incomparable = "; ".join(reasons)
            repeats, which = divmod(len(footnotes), len(MARKS))
            row.mark = footnotes.setdefault(row.incomparable, MARKS[which] * (repeats + 1))
    return [(mark, f"not comparable with {reference.name}: {why}.") for why, mark in footnotes.items()]


def _plain(value):
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---------------------------------------------------------------------------------------------------------- statistics


def bootstrap_interval(values, resamples=RESAMPLES, seed=0):
    """95 % percentile bootstrap interval of the mean of `values` (1-D, no NaN); (NaN, NaN) of fewer than two."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_test(values, baseline):
    """(p, pairs, why not) of the two-sided Wilcoxon signed-rank test of {case: value} against {case: value}.

    Pairs are the cases in both with no NaN. p is NaN, and `why not` says why, where there are fewer than six pairs that
    differ: p cannot be below 0.05 then, whatever they show.
    """
    shared = [c for c in values if c in baseline and not math.isnan(values[c]) and not math.isnan(baseline[c])]
    differences = np.array([values[case] - baseline[case] for case in shared])
    if not shared:
        return math.nan, 0, "no case was tested by both"
    if np.count_nonzero(differences) < 6:
        return math.nan, len(shared), f"of {len(shared)} pairs fewer than 6 differ"
    return float(stats.wilcoxon(differences).pvalue), len(shared), ""


def average_seeds(row, metric, label="mean"):
    """{case: mean over the seeds}, over those for which it is defined; NaN where it is for none."""
    values = row.values(metric, label)
    counts = np.maximum((~np.isnan(values)).sum(axis=0), 1)
    means = np.where(np.isnan(values).all(axis=0), np.nan, np.nansum(values, axis=0) / counts)
    return dict(zip(row.results[0].case_names(), means.tolist(), strict=True))


def statistics(row, metric, baseline=None, label="mean"):
    """What the table says of one metric of one row, as a dict; NaN is what cannot be said.

    'mean', 'sd_seeds', 'sd_cases', 'low', 'high' as in the module's docstring; 'undefined': values that are NaN (the
    distance to an empty mask), left out of all of them; 'p', 'pairs' and 'why' of `paired_test` against `baseline`.
    """
    nothing = dict.fromkeys(("mean", "sd_seeds", "sd_cases", "low", "high", "p"), math.nan)
    nothing |= {"undefined": 0, "pairs": 0, "why": ""}
    if row.published is not None:
        return nothing | {"mean": row.published.get(metric, math.nan)}
    values = row.values(metric, label)
    seeds = [seed[~np.isnan(seed)] for seed in values]
    seeds = [seed for seed in seeds if len(seed)]
    entry = nothing | {"undefined": int(np.isnan(values).sum())}
    if not seeds:
        return entry
    means = [seed.mean() for seed in seeds]
    averaged = average_seeds(row, metric, label)
    low, high = bootstrap_interval([value for value in averaged.values() if not math.isnan(value)])
    entry |= {"mean": float(np.mean(means)), "sd_cases": float(np.mean([seed.std() for seed in seeds]))}
    entry |= {"low": low, "high": high, "sd_seeds": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan}
    if baseline is not None and baseline is not row:
        if METRICS.get(metric, ("", ""))[1] == "distance" and baseline.unit != row.unit:
            return entry | {"why": f"distances in {row.unit} and in {baseline.unit}"}
        p, pairs, why = paired_test(averaged, average_seeds(baseline, metric, label))
        entry |= {"p": p, "pairs": pairs, "why": why}
    return entry


# --------------------------------------------------------------------------------------------------------------- table


@dataclass
class Table:
    """`columns`: headings; `rows`: for each a list of cells, a cell a list of lines; `keys`: for each the numbers or
    strings to sort by; `notes`: sentences beneath; `records`: the same as flat dicts, for CSV."""

    columns: list
    rows: list
    keys: list
    notes: list
    records: list


def build_table(rows, metrics=DEFAULT_METRICS, baselines=(), footnotes=(), notes=(), per_class=False):
    """The Table of `rows` (of `group_results`, and published ones). With `per_class`, a line for each class and one for
    the mean over them; otherwise the mean over classes alone."""
    units = {row.unit for row in rows}
    own = [row for row in rows if row.results]
    several_classes = len({label for row in own for label in row.results[0].classes()}) > 1
    columns = ["dataset", "method", "labels", "class", "seeds", "statistic"]
    columns += [_heading(metric, units) for metric in metrics]
    columns += ["parameters", "training", "inference a case", "selection", "source"]

    cells, keys, records, untested = [], [], [], {}
    for row in rows:
        classes = [*row.results[0].classes(), "mean"] if per_class and several_classes and row.results else ["mean"]
        for label in classes:
            baseline = baseline_of(row, baselines) if row.results else None
            entries = {metric: statistics(row, metric, baseline, label) for metric in metrics}
            lines = [_lines(entries[m], m, row, bool(baselines), len(units) > 1) for m in metrics]
            for metric, entry in entries.items():
                if entry["why"]:
                    untested.setdefault(f"{row.name}{row.mark}: {entry['why']}", []).append(_heading(metric, set()))
            if baselines and row.results and baseline is None:
                untested.setdefault(f"{row.name}{row.mark}: no baseline with {row.labelnum} labels", [])
            cost = _cost(row)
            seeds = len(row.results) or None
            head = [row.dataset, row.name + row.mark, row.labelnum, label, seeds, ""]
            keys.append([*head, *(entry["mean"] for entry in entries.values()), *cost, row.selection, row.source])
            statistic = list(STATISTICS[: 4 if baselines else 3]) if row.results else ["mean"]
            texts = [[UNKNOWN if value is None else str(value)] for value in head]
            texts[5] = statistic
            shown = [_count(cost[0]), _duration(cost[1]), _duration(cost[2]), row.selection, row.source]
            cells.append([*texts, *lines, *([text] for text in shown)])
            records.append(_record(row, label, entries, cost))

    kept, constant = _columns_that_vary(columns, cells, several_classes and per_class)
    remarks = [*(f"{mark} {why}" for mark, why in footnotes), *constant, *_explanations(own, baselines)]
    if several_classes and not per_class:
        remarks.append("All metrics are means over the classes of a case.")
    for why, which in untested.items():
        remarks.append(f"No test of {why}" + f" ({', '.join(which)})" * bool(which) + ".")
    for record in records:
        counts = [f"{record[f'{m}_undefined']} of {_heading(m, set())}" for m in metrics if record[f"{m}_undefined"]]
        if counts:
            remarks.append(
                f"{record['method']}, {record['labelnum']} labels: not defined for an empty mask, and left out: "
                f"{', '.join(counts)}."
            )
    remarks += notes
    rows = [[row[i] for i in kept] for row in cells]
    return Table([columns[i] for i in kept], rows, [[key[i] for i in kept] for key in keys], remarks, records)


def _explanations(rows, baselines):
    """Sentences that say what the statistics of `rows`, tested against `baselines`, are of."""
    seeds = sorted({result.seed for row in rows for result in row.results} - {None})
    seeds = f" (seeds {', '.join(map(str, seeds))})" if seeds else ""
    said = [
        f"mean ± SD over seeds{seeds}: of the seeds' means over the test cases, n - 1; SD over cases: n, averaged over "
        f"the seeds.",
        f"95 % interval: percentile bootstrap over the test cases, each averaged over the seeds first ({RESAMPLES} "
        f"resamples, seed 0).",
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
    inference = row.mean_of("inference_seconds")
    inference = inference / row.test_cases if inference is not None and row.test_cases else None
    parameters = row.mean_of("parameters")
    return None if parameters is None else round(parameters), row.mean_of("training_seconds"), inference


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


# ------------------------------------------------------------------------------------------------------------- formats


def to_text(table):
    """The table as aligned text, and its notes beneath."""
    numeric = [name not in ("dataset", "method", "statistic", "selection", "source") for name in table.columns]
    blocks = [[[name] for name in table.columns], *table.rows]
    widths = [max(len(line) for block in blocks for line in block[i]) for i in range(len(table.columns))]
    lines = []
    for block in blocks:
        for n in range(max(map(len, block))):
            texts = [cell[n] if n < len(cell) else "" for cell in block]
            padded = (t.rjust(w) if right else t.ljust(w) for t, w, right in zip(texts, widths, numeric, strict=True))
            lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    notes = (textwrap.fill(note, max(80, min(120, len(lines[1]))), subsequent_indent="  ") for note in table.notes)
    return "\n".join([*lines, "", *notes]) + "\n"


def to_markdown(table):
    """The table in GitHub's Markdown, lines of a cell parted by <br>."""

    def cell(lines):
        return "<br>".join(line.replace("|", "\\|").replace("<0", "&lt;0") for line in lines)

    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows]
    return "\n".join([*lines, "", *(f"{note}  " for note in table.notes)]) + "\n"


LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    **{"†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$", "§": r"\S{}", "¶": r"\P{}", "‖": r"$^{\|}$"},
    **{"<": "$<$", ">": "$>$"},
}


def to_latex(table):
    """The table as a LaTeX tabular in the style of booktabs, the notes beneath it."""

    def escape(text):
        return "--" if text == UNKNOWN else "".join(LATEX.get(character, character) for character in text)

    numeric = [name not in ("dataset", "method", "statistic", "selection", "source") for name in table.columns]
    blocks = []
    for row in table.rows:
        texts = ([escape(cell[n]) if n < len(cell) else "" for cell in row] for n in range(max(map(len, row))))
        blocks.append("\n".join(" & ".join(line) + r" \\" for line in texts))
    return (
        "\n".join(
            [
                r"% needs \usepackage{booktabs}",
                r"\begin{tabular}{@{}" + "".join("r" if right else "l" for right in numeric) + "@{}}",
                r"\toprule",
                " & ".join(map(escape, table.columns)) + r" \\",
                r"\midrule",
                "\n\\addlinespace\n".join(blocks),
                r"\bottomrule",
                r"\end{tabular}",
                "",
                r"{\footnotesize",
                *(escape(note) + r"\par" for note in table.notes),
                "}",
            ]
        )
        + "\n"
    )


def to_csv(table):
    """A line per row and class with every number, shares in 0 .. 1; what is unknown or not defined is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table.records[0]), lineterminator="\n")
    writer.writeheader()
    for record in table.records:
        unknown = {k for k, v in record.items() if v is None or (isinstance(v, float) and math.isnan(v))}
        writer.writerow({k: "" if k in unknown else v for k, v in record.items()})
    return text.getvalue()


def report(paths, baseline=None, metrics=DEFAULT_METRICS, published=None, per_class=False):
    """(Table, rows) of all results at or under `paths`; see the module's docstring. Raises ReportError."""
    results, untested = find_results(paths)
    rows, notes = group_results(results)
    absent = [m for m in metrics if not any(m in case for result in results for case in result.cases)]
    if absent:
        there = sorted({key for case in results[0].cases for key in case} - {"case", "class"})
        raise ReportError(f"{results[0].path}: has no metric {absent[0]!r}; there are {', '.join(there)}")
    baselines = find_baseline(rows, baseline) if baseline else []
    if published:
        wanted = {(row.dataset, row.labelnum) for row in rows}
        beside = [row for row in read_published(published) if (row.dataset, row.labelnum) in wanted]
        notes += [] if beside else [f"{published} has no figures for these data and numbers of labels."]
        rows += beside
    notes += [f"{run} has not been tested." for run in untested]
    footnotes = mark_incomparable(rows, baselines[0] if baselines else rows[0])
    return build_table(rows, metrics, baselines, footnotes, notes, per_class), rows


def parse_flags(argv):
    from mtseg.flags import Parser

    parser = Parser(description=__doc__, prog="python -m mtseg.report")
    add_flags(parser)
    flag = parser.add_argument
    flag("--format", choices=FORMATS, help="default: by the name of --out (.txt, .md, .tex, .csv), else text")
    flag("--out", type=Path, help="file to write to (default: print)")
    args = parser.parse_args(argv)
    if args.format is None:
        suffixes = {suffix: name for name, suffix in FORMATS.items()}
        args.format = suffixes.get(args.out.suffix, "text") if args.out else "text"
    return args


def add_flags(parser):
    """What a command that shows this table lets people choose."""
    flag = parser.add_argument
    flag("paths", nargs="+", type=Path, metavar="RUN", help="runs, results, metrics.json files, or folders above them")
    flag("--baseline", metavar="WORDS", help="row to test against, by words of it: supervised, 'MT teacher', 'MT 8'")
    flag("--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="NAME", help="columns of metrics.json")
    flag("--per_class", action="store_true", help="a line for each class, and one for their mean")
    flag(
        "--published",
        nargs="?",
        type=Path,
        const=Path(__file__).resolve().parents[1] / "data/published/la.csv",
        metavar="FILE",
        help="published figures for the same data and number of labels beside (without FILE: data/published/la.csv)",
    )


def main(argv=None):
    from mtseg.checkpoint import CheckpointError, write_whole
    from mtseg.flags import one_sentence

    with one_sentence(ReportError, CheckpointError):
        args = parse_flags(argv)
        table, _ = report(args.paths, args.baseline, args.metrics, args.published, args.per_class)
        render = {"text": to_text, "markdown": to_markdown, "latex": to_latex, "csv": to_csv}[args.format]
        if args.out is None:
            print(render(table), end="")
        else:
            write_whole(args.out, render(table).encode())
            print(f"written to {args.out}")


if __name__ == "__main__":
    main()
