"""The rows of a table of results: runs that differ in the seed alone share one, published figures have their own.

A result is an object with method, weights, dataset, labelnum, seed, selection, unit, protocol (dict), network (dict),
config (dict, the run's settings), input, preprocessing, trained_on, sha256, path, and the methods case_names(),
classes() and values(metric, label).
"""

import csv
import json
import math
import re
from dataclasses import dataclass, field

import numpy as np

MARKS = "†‡§¶‖"

# Settings that say where, how far and how often, and never what is computed: runs that differ in these, in the seed or
# in versions share a row.
FREE_SETTINGS = {
    *("root_path", "dataset_name", "model", "labelnum", "output_dir", "resume", "overwrite", "gpu", "num_workers"),
    *("save_freq", "log_freq", "val_list", "val_freq", "stride_xy", "stride_z", "selection", "seed"),
    *("config", "cache", "keep_last", "keep_memory", "test_only", "tensorboard", "wandb", "progress"),
    *("python", "torch", "device", "threads"),
}


class RowError(ValueError):
    """Results that do not fit into one table; the message is one sentence with the files and the remedy."""


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

    def case_names(self):
        return self.results[0].case_names()

    def classes(self):
        return self.results[0].classes() if self.results else ()

    def values(self, metric, label="mean"):
        """(seeds, cases) array, cases in the order of their names."""
        tables = [result.values(metric, label) for result in self.results]
        return np.array([[table.get(case, math.nan) for case in self.case_names()] for table in tables])

    def mean_of(self, attribute):
        """The mean over the runs of a number each of them records, None where one does not."""
        numbers = [getattr(result, attribute) for result in self.results]
        return sum(numbers) / len(numbers) if numbers and None not in numbers else None


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
        raise RowError(f"{path}: cannot be read ({error.strerror}); give the file behind --published") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RowError(
            f"{path}: line {len(rows) + 2} is not a published figure ({error}); see data/published/la.csv"
        ) from error
    return rows


def frozen(value):
    return json.dumps(value, sort_keys=True, default=str)


def group_results(results):
    """(rows, notes): results that differ in the seed alone become one Row. Raises RowError on two of one seed.

    The same checkpoint tested twice in the same way counts once. Rows that would have the same name are told apart by
    the settings in which they differ. A setting that one run of a method does not record, since its version had no such
    flag, counts as no difference between its runs.
    """
    groups, notes, recorded = {}, [], {}
    for result in results:
        own = recorded.setdefault(result.method, set(result.config))
        own &= set(result.config)
    for result in results:
        compared = recorded[result.method] - FREE_SETTINGS - {"exp"}
        settings = {name: value for name, value in result.config.items() if name in compared}
        how = [result.network, result.selection, result.unit, result.protocol, result.case_names(), result.classes()]
        how += [result.input, result.preprocessing]
        key = (result.dataset, result.labelnum, result.method, result.weights, frozen(settings), frozen(how))
        own = groups.setdefault(key, [])
        twin = next((other for other in own if result.sha256 and other.sha256 == result.sha256), None)
        if twin:
            notes.append(f"{result.path} tests the same checkpoint as {twin.path}; it counts once.")
            continue
        twin = next((other for other in own if result.seed is not None and other.seed == result.seed), None)
        if twin:
            raise RowError(
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
    """Append to each row's method the settings of its run, and of its test, in which the rows differ."""
    trained = [{k: v for k, v in row.results[0].config.items() if k not in FREE_SETTINGS - {"config"}} for row in rows]
    files = {frozen(settings.setdefault("config", None)) for settings in trained}
    if len(files) < len(rows):
        for settings in trained:
            del settings["config"]
    tested = [row.protocol | {"selection": row.selection, "unit": row.unit, "cases": row.test_cases} for row in rows]
    for row, settings in zip(rows, tested, strict=True):
        prepared = row.results[0].preprocessing or {}
        settings |= {"input": row.results[0].input, **{f"prepared with {name}": prepared[name] for name in prepared}}
    shown = [{} for _ in rows]
    for settings in (trained, tested):
        names = sorted(set.intersection(*map(set, settings)) if settings is trained else set().union(*settings))
        names = [name for name in names if len({frozen(one.get(name)) for one in settings}) > 1]
        # The name of an experiment, or of its --config, is what its author tells it apart by; lists of cases are too
        # long to print.
        for name in [name for name in ("exp", "config") if name in names][:1] or names:
            for words, one in zip(shown, settings, strict=True):
                value = one.get(name)
                if name == "config" and value is None:
                    continue
                too_long = isinstance(value, list) and len(value) > 3
                words[name] = f"other {name}" if too_long else f"{name} {_plain(value)}"
    for row, words in zip(rows, shown, strict=True):
        row.method += f" ({'; '.join(words.values())})" * bool(words)


def _words(text):
    return re.sub("[(),;]", " ", text).split()


def find_baseline(rows, words):
    """The rows that `words` names, one for each data set and number of labels; RowError if none or several.

    Each word is one of a row's name (method, settings, weights) or its number of labels. A row whose name has no
    further word goes before those that have.
    """
    wanted = set(_words(words))
    own = {id(row): set(_words(row.name)) | {str(row.labelnum)} for row in rows if row.results}
    found = [row for row in rows if row.results and wanted <= own[id(row)]]
    found = [row for row in found if own[id(row)] <= wanted | {str(row.labelnum)}] or found
    if not found:
        names = "; ".join(f"{row.name} {row.labelnum}" for row in rows if row.results)
        raise RowError(f"--baseline {words!r} names no row; there are: {names}")
    for row in found:
        twin = next((r for r in found if (r.dataset, r.labelnum) == (row.dataset, row.labelnum) and r is not row), None)
        if twin:
            places = " and ".join(f"{r.name} ({r.results[0].path.parent})" for r in (row, twin))
            # What only one of them is called; a row that lacks such a word is meant by all of its own.
            more = [sorted(own[id(a)] - own[id(b)]) for a, b in ((row, twin), (twin, row))]
            calls = [[*_words(words), *m] if m else _words(r.name) for m, r in zip(more, (row, twin), strict=True)]
            how = " or ".join(f"--baseline {' '.join(call)!r}" for call in calls)
            how = how if any(more) else "leave one of them out"
            raise RowError(f"--baseline {words!r} names two rows with {row.labelnum} labels, {places}; {how}")
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
        elif row.published is None and row.case_names() != reference.case_names():
            own, other = set(row.case_names()), set(reference.case_names())
            reasons.append(f"other test cases ({len(own)}, of which {len(own & other)} are among the {len(other)})")
        if row.results and row.classes() != reference.classes():
            reasons.append("other classes")
        if row.unit != reference.unit:
            reasons.append(f"distances in {row.unit}, not {reference.unit}")
        for name in sorted(row.protocol.keys() & reference.protocol.keys()):
            ours, theirs = row.protocol[name], reference.protocol[name]
            if frozen(ours) != frozen(theirs):
                reasons.append(f"{name} {_plain(ours)}, not {_plain(theirs)}")
        if row.results and reference.results:
            own, other = row.results[0], reference.results[0]
            if own.input != other.input:
                names = [f"the scans in {r.input}" if r.input else "the cases of a list" for r in (own, other)]
                reasons.append(f"tested on {names[0]}, not on {names[1]}")
            elif (
                not own.input and own.preprocessing != other.preprocessing and own.preprocessing and other.preprocessing
            ):
                # Scans are measured on their own grid, however they were prepared; volumes of a list are not.
                reasons.append("volumes were prepared in another way")
            trained_on = set().union(*(result.trained_on for result in row.results))
            if trained_on:
                reasons.append(f"tested on {len(trained_on)} cases that it was trained on")
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
    if not isinstance(value, list):
        return str(value)
    return (" and " if any(isinstance(part, str) for part in value) else " x ").join(map(str, value))
