"""The rows of a table of results: runs that differ in the seed alone share one.

Results are read.Result.
"""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mtseg.report.read import ReportError, plain
from mtseg.report.summary import average_seeds
from mtseg.results import pooled_parts, scale
from mtseg.script.runfolder import ALIKE, BEGINNINGS, OF_FOLD

NOT_COMPARED = (ALIKE | {"labelnum"}) - {"exp"}  # a row has one number of labels, and a name to be told apart by


@dataclass
class Row:
    """Runs that differ in the seed alone. `draw`: the --labeled_draw by which their labelled cases were chosen."""

    method: str
    weights: str
    dataset: str
    labelnum: int | None
    results: list
    test_cases: int
    unit: str
    protocol: dict
    selection: str
    draw: int
    mark: str = ""
    faults: list = field(default_factory=list)
    differences: list = field(default_factory=list)

    @property
    def name(self):
        return f"{self.method}, {self.weights}" if self.weights else self.method

    @property
    def title(self):
        return self.name if self.labelnum is None else f"{self.name}, {self.labelnum} labels"

    @property
    def incomparable(self):
        return "; ".join([*self.faults, *self.differences])

    @property
    def trained_on(self):
        return set().union(*(result.trained_on for result in self.results))

    def case_names(self):
        return self.results[0].case_names()

    def classes(self):
        return self.results[0].classes()

    def values(self, metric, label="mean"):
        """(seeds, cases) array, cases in the order of their names."""
        tables = [result.values(metric, label) for result in self.results]
        return np.array([[table.get(case, math.nan) for case in self.case_names()] for table in tables])

    def per_case(self, metric, label="mean"):
        """{case: mean over the seeds} of a metric; NaN where no seed defines it."""
        return dict(zip(self.case_names(), average_seeds(self.values(metric, label)).tolist(), strict=True))

    def patients(self):
        """The patient of each case, in the order of the cases' names."""
        return [self.results[0].patients.get(case, case) for case in self.case_names()]

    def parts(self, metric, label="mean"):
        """(seeds, cases, classes, 3) of results.pooled_parts of class `label`, or of all; None without the counts."""
        classes = self.classes() if label == "mean" else (label,)
        found = [{(r["case"], r["class"]): pooled_parts(r, metric) for r in result.cases} for result in self.results]
        parts = [[[seed.get((case, c)) for c in classes] for case in self.case_names()] for seed in found]
        return None if any(entry is None for seed in parts for case in seed for entry in case) else np.array(parts)

    def inflation(self):
        """(seeds,): the best mean Dice of all the iterations that were tested less that of the last, where a seed has
        several; None where none has. It is what a checkpoint gains that is selected on the test cases."""
        looked_at = [result for result in self.results if result.looks]
        if not looked_at:
            return None
        dices = [[np.nanmean([*r.values("dice").values()]) for r in (one, *one.looks)] for one in looked_at]
        return np.array([max(seed) - seed[0] for seed in dices])

    def mean_of(self, attribute):
        """The mean over the runs of a number each of them records, None where one does not."""
        numbers = [getattr(result, attribute) for result in self.results]
        return None if None in numbers else sum(numbers) / len(numbers)


def published_beside(path, rows=()):
    """Figures of a JSON file like benchmarks/published.json with as many labels as a row has, on its data; those on LA
    are for LA_half, too: ({id of a row: those of its method}, those of methods without a row). Raises ReportError."""

    def plain_name(name):
        return re.sub("[^a-z0-9+]", "", name.lower())

    figures = {}
    try:
        for entry in json.loads(Path(path).read_text(encoding="utf-8")):
            key = str(entry["data"]).lower(), int(entry["labels"]), plain_name(entry["method"])
            entry |= {"dice": entry["dice"] / scale("dice"), "said": f"{entry['selection']}; {entry['source']}"}
            figures.setdefault(key, []).append(entry)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{path}: holds no published figures ({error}); see benchmarks/published.json") from error
    wanted = {
        id(row): (row.dataset.split("_")[0].lower(), row.labelnum, plain_name(row.method.split(" (")[0]))
        for row in rows
    }
    data = {key[:2] for key in wanted.values()}
    beside = {row: figures[key] for row, key in wanted.items() if key in figures}
    others = [of_one for key, of_one in figures.items() if key[:2] in data and key not in wanted.values()]
    return beside, [entry for of_one in others for entry in of_one]


def frozen(value):
    return json.dumps(value, sort_keys=True, default=str)


def settings_to_compare(configs):
    """The names of the settings that runs of one method, with these `configs`, must share to stand in one row.

    A setting that some run does not record, since its version had no such flag, is no difference where all others have
    it alike. A config without any setting (its file is gone) does not count.
    """
    known = [config for config in configs if config]
    values = {name: [frozen(c[name]) for c in known if name in c] for name in set().union(*known) - NOT_COMPARED}
    return {name for name, found in values.items() if len(found) == len(known) or len(set(found)) > 1}


def group_results(results):
    """(rows, notes): results that differ in the seed alone become one Row. Raises ReportError on two of one seed.

    Those of the folds of one cross-validation are pooled first: each case is tested by the run that had not seen it.
    The weights that runs of a row began with may be of several seeds, too, each of which trained its own.
    The same weights tested twice in the same way count once, in whatever file they lie. Results of earlier iterations
    go to the `looks` of their run's last. Rows that would have the same name are told apart by the settings in which
    they differ.
    """
    results = _with_looks(results)
    groups, notes = {}, []
    methods = {result.method for result in results}
    compared = {m: settings_to_compare([r.config for r in results if r.method == m]) - {"exp"} for m in methods}
    for result in results:
        names = compared[result.method] - (set() if result.fold is None else OF_FOLD)
        names = names - {"data_crc32"} if result.config.get("annotations") else names  # each seed has its own
        settings = {name: value for name, value in result.config.items() if name in names}
        began = {name: settings.pop(name, None) for name in BEGINNINGS}
        how = [result.network, result.selection, result.unit, result.protocol]
        how += [result.case_names() if result.fold is None else result.folds]
        how += [sorted(map(str, result.classes())), result.input, result.preprocessing, bool(result.config)]
        how.append(result.config.get("labeled_draw") or 0)
        if result.seed is None:  # of strangers' weights, and of ensembles: nothing says that they differ in seeds
            how.append([*result.sha256] or str(result.path))
        key = (result.dataset, result.labelnum, result.method, result.weights, frozen(settings), frozen(how))
        members = groups.setdefault(key, {}).setdefault(frozen(began), [])
        twin = next((other for other in members if _same_weights(result, other)), None)
        if twin:
            notes.append(f"{result.path} tests the same checkpoint as {twin.path}; it counts once.")
            continue
        alike = (other for other in members if (other.seed, other.fold) == (result.seed, result.fold))
        twin = None if result.seed is None else next(alike, None)
        if twin:
            labels = "" if result.labelnum is None else f" with {result.labelnum} labels"
            same = f"{result.method}{labels} and seed {result.seed}, of different weights"
            raise ReportError(f"{result.path} and {twin.path}: two results of {same}; give one of them")
        members.append(result)

    rows = []
    groups = [members for group in groups.values() for members in _of_one_descent(group)]
    for members in [members for group in groups for members in _of_all_folds(group)]:
        members.sort(key=lambda result: (result.seed is None, result.seed))
        one = members[0]
        alike = ("method", "weights", "dataset", "labelnum", "unit", "protocol", "selection")
        shared = {name: getattr(one, name) for name in alike}
        draw = one.config.get("labeled_draw")
        draw = draw if isinstance(draw, int) else 0
        rows.append(Row(results=members, test_cases=len(one.case_names()), draw=draw, **shared))
    rows.sort(key=lambda r: (r.dataset, r.labelnum is None, r.labelnum, r.draw, r.method != "supervised", r.name))
    for row in (row for row in rows if row.draw):
        row.method += f" (labeled_draw {row.draw})"
    for row in rows:
        one = row.results[0]
        if one.fold is not None:
            missing = [f"fold {number}" for number in range(one.folds) if number not in one.fold]
            row.method += f" ({f'{len(one.fold)} of ' * bool(missing)}{one.folds} folds)"
            notes += [f"{row.title}: still to be tested: {', '.join(missing)}."] * bool(missing)
        if not one.config and len(row.results) > 1:
            notes.append(f"{row.title}: whether its runs had one setting is not known; their config.json is gone.")
        codes = {frozen(result.config["code"]) for result in row.results if "code" in result.config}
        if len(codes) > 1:
            notes.append(f"{row.title}: its runs are of {len(codes)} versions of the code.")
    for row in rows:
        same = [r for r in rows if (r.dataset, r.labelnum, r.name) == (row.dataset, row.labelnum, row.name)]
        if len(same) > 1:
            tests = [_how_tested(r) for r in same]
            for other, words in zip(same, tell_apart([r.results[0].config for r in same], tests), strict=True):
                other.method += words
    return rows, notes


def _of_one_descent(group):
    """The lists of results in `group`, {files that they began with: results}. Those whose files differ in their own
    seeds alone, or are left out, are one list, if no seed is there twice."""
    lists = {}
    for files, members in group.items():
        known = next(filter(None, (descent(result.config) for result in members)), files)
        lists.setdefault(frozen(known), []).append(members)
    for alike in lists.values():
        together = [result for members in alike for result in members]
        once = len({(result.seed, result.fold) for result in together}) == len(together)
        yield from [together] if once else alike


def descent(config):
    """Of the weights that a run with this config began with, and of those that these began with, and so on, [name of
    the file, what runs of its method share]; 'none' with --from_scratch, None where it is not recorded."""
    chain = config.get("pretrained_from")
    if not chain:
        return "none" if config.get("from_scratch") else None
    if not isinstance(chain, list) or not all(isinstance(one, dict) and one.get("settings") for one in chain):
        return None
    return [[Path(str(one.get("file"))).name, one["settings"]] for one in chain]


def _of_all_folds(results):
    """`results`, which differ in seed and fold alone, as lists of those on the same cases, a seed's folds pooled."""
    seeds, lists = {}, {}
    for result in results:
        seeds.setdefault(result.seed, []).append(result)
    for folds in seeds.values() if results[0].fold is not None else [[result] for result in results]:
        pooled = folds[0] if folds[0].fold is None else _pooled(sorted(folds, key=lambda result: result.fold))
        lists.setdefault(pooled.case_names(), []).append(pooled)
    return lists.values()


def _pooled(folds):
    """The Result of several folds' results together; ReportError where two of them test one case."""
    tested = {}
    for result in folds:
        for case in result.case_names():
            other = tested.setdefault(case, result)
            if other is not result:
                raise ReportError(
                    f"{other.path} and {result.path}: folds {other.fold} and {result.fold} both test case {case}, so "
                    f"they are not of one cross-validation; give one, or train both by one splits_final.json"
                )

    def mean(name, of=lambda numbers: sum(numbers) / len(numbers)):
        numbers = [getattr(result, name) for result in folds]
        return None if None in numbers else of(numbers)

    looks = [{look.selection: look for look in result.looks} for result in folds]
    shared = [name for name in looks[0] if all(name in others for others in looks)]
    return replace(
        folds[0],
        fold=[result.fold for result in folds],
        parts=folds,
        cases=[row for result in folds for row in result.cases],
        patients={case: patient for result in folds for case, patient in result.patients.items()},
        sha256=sum((result.sha256 for result in folds), ()),
        replaced=next((result.replaced for result in folds if result.replaced), None),
        **{name: mean(name) for name in ("inference_seconds", "training_seconds", "iteration_seconds")},
        peak_memory_mb=mean("peak_memory_mb", max),
        trained_on=sum((result.trained_on for result in folds), ()),
        looks=[_pooled([of_fold[name] for of_fold in looks]) for name in shared],
    )


def _same_weights(one, other):
    """Whether two results are of one file, or of the last iteration in two files of a run: latest.pth and iter_N.pth
    give the same figures."""
    if one.fold != other.fold:  # whose labelled cases, and so their weights, may be the same
        return False
    if one.sha256 and one.sha256 == other.sha256:
        return True
    return None is not one.run == other.run and frozen(one.cases) == frozen(other.cases)


def _with_looks(results):
    """The `results` without those of earlier iterations of a run whose last one is there: these are its `looks`."""

    def key(result):
        how = frozen([result.protocol, result.unit, result.input, result.case_names(), result.dataset])
        return result.run, result.weights, how

    last = {key(result): result for result in reversed(results) if result.run and result.selection == "last iteration"}
    kept = []
    for result in results:
        end = last.get(key(result)) if re.fullmatch(r"iteration \d+ of \d+", result.selection) else None
        (kept if end is None else end.looks).append(result)
    return kept


def _how_tested(row):
    """What the names of rows that were tested in other ways, or on other scans, say of it."""
    first = row.results[0]
    prepared = {f"prepared with {name}": value for name, value in (first.preprocessing or {}).items()}
    how = {**row.protocol, "selection": row.selection, "unit": row.unit, "cases": row.test_cases, **prepared}
    how |= {name: value for name, value in first.network.items() if name not in first.config}
    how |= {} if first.config else {"settings": "not recorded"}
    how |= {"tested in": str(first.path.parent)} if first.seed is None else {}
    return how | {"tested on": "a list" if first.input is None else first.input}


def tell_apart(configs, tests=None):
    """For each of several runs of one name the words, such as ' (base_lr 0.1)', that tell it from the others.

    `configs`: their settings; `tests`: how each was tested, of which a setting that some lack is named, too. The name
    of an experiment, or of its --config, says enough where it differs. Of files and folders the words hold the last
    parts, from where on they differ; lists too long to print are numbered.
    """
    known = [config for config in configs if config]
    by_training = differing(known, settings_to_compare(configs))
    if len({frozen(config.get("config")) for config in configs}) == len(configs):
        by_training = ["config"]
    if "fold" in by_training:  # it says which cases
        by_training = [name for name in by_training if name == "fold" or name not in OF_FOLD]
    if "exp" in by_training:
        by_training = ["exp"]
    tests = tests or [{}] * len(configs)
    words = [[] for _ in configs]
    for settings, names in ((configs, by_training), (tests, differing(tests, set().union(*tests)))):
        for name in names:
            values = without_common_folders([one.get(name) for one in settings])
            for parts, one, value in zip(words, settings, values, strict=True):
                if name == "pretrained_parts" and not one.get("pretrained"):
                    continue  # of nothing
                if name == "from_scratch":
                    parts += ["from scratch"] if value else ["pretrained"] * bool(one.get("pretrained"))
                elif isinstance(value, list) and len(value) > 3:
                    parts.append(f"{name} {values.index(value) + 1}")
                elif value is not None:
                    parts.append(f"{name} {plain_setting(value)}")
                elif name in one and name not in PATHS:
                    parts.append(f"{name} off")
    if len(set(map(tuple, words))) < len(words):
        words = [[*parts, str(number)] for number, parts in enumerate(words, start=1)]
    return [f" ({'; '.join(parts)})" if parts else "" for parts in words]


def differing(settings, names):
    """Those of `names` that have several values in `settings`, a list of dicts."""
    return sorted(name for name in names if len({frozen(one.get(name)) for one in settings}) > 1)


# Settings that are files: a run without one is not told apart by that.
PATHS = ("config", "plan", "teacher_checkpoint", "pretrained")


def without_common_folders(values):
    """`values`, with those that are paths cut to the last parts in which all of them differ."""
    paths = {value: Path(value).parts for value in values if isinstance(value, str) and "/" in value.rstrip("/")}
    for length in range(1, max(map(len, paths.values()), default=0) + 1):
        short = {value: "/".join(parts[-length:]) for value, parts in paths.items()}
        if len(set(short.values())) == len(paths):
            return [short.get(value, value) if isinstance(value, str) else value for value in values]
    return values


def plain_setting(value):
    if not isinstance(value, list):
        return plain(value)
    return (" and " if any(isinstance(part, str) for part in value) else " x ").join(map(plain, value))
