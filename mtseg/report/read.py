"""The metrics.json files that inference.py writes, with what the config.json of the checkpoint's run adds."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from mtseg.checkpoint import file_sha256
from mtseg.results import case_means
from mtseg.script.config import LEARNED, read_config
from mtseg.splits import patients_of

# What inference.py records of its protocol only where it is not so.
DEFAULTS = {"weighting": "uniform", "tta": "none", "postprocessing": "none", "ignore_index": "none"}
DEFAULTS |= {"case_statistics": 0, "slices_first": False}


class ReportError(ValueError):
    """Results that cannot be read, or do not fit into one table; the message is one sentence with the files and the
    remedy."""


@dataclass
class Result:
    """What one metrics.json says; None is what it does not say.

    `inference_seconds`: of a case. `training_seconds`, `iteration_seconds`, `peak_memory_mb`: see
    runlog.training_cost. `input`: the scans that were segmented, None for the cases of a list. `preprocessing`: how the
    scans or the training data were prepared.
    `trained_on`: measured cases that the network saw in training, labelled or not. `sha256`: of each checkpoint.
    `patients`: {case: patient} of the cases, as the data set says or their names tell.
    `replaced`: a checkpoint in whose place other weights lie now; what is beside them says nothing of this result.
    `fold`, `folds`: which of how many folds was tested; of several together `fold` is a list, and `parts` are theirs.
    `images`: whether the cases are images, which have a pixel accuracy. `looks`: Results of earlier iterations of the
    run on the same cases, tested in the same way.
    """

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
    patients: dict = field(default_factory=dict)
    sha256: tuple = ()
    replaced: Path | None = None
    parameters: float | None = None
    inference_seconds: float | None = None
    training_seconds: float | None = None
    iteration_seconds: float | None = None
    peak_memory_mb: float | None = None
    run: Path | None = None
    config: dict = field(default_factory=dict)
    network: dict = field(default_factory=dict)
    input: str | None = None
    preprocessing: dict | None = None
    trained_on: tuple = ()
    fold: int | list | None = None
    folds: int | None = None
    parts: list = field(default_factory=list)
    images: bool = False
    looks: list = field(default_factory=list)

    def case_names(self):
        return tuple(sorted({row["case"] for row in self.cases}))

    def classes(self):
        return tuple(dict.fromkeys(row["class"] for row in self.cases))

    def values(self, metric, label="mean"):
        """{case: value} of class `label`, or of the mean over the classes; NaN where (one of) it is not defined."""
        return case_means([row for row in self.cases if label in ("mean", row["class"])], metric)


def listed(value):
    """`value`, which stands alone in the file where all checkpoints share it, as a list."""
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def plain(value):
    """`value` as text on one line without control characters: names in a file from elsewhere are not trusted."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(value).split()))


def read_result(path):
    """The Result of a metrics.json. What it does not record is taken from the config.json of the checkpoint's run."""
    path = Path(path)
    content = read_config(path)
    rows = content.get("cases")
    if rows == []:
        raise ReportError(f"{path}: nothing was measured, the scans had no labels; give inference.py --labels")
    if not (isinstance(rows, list) and all(isinstance(r, dict) and {"case", "class"} <= r.keys() for r in rows)):
        raise ReportError(f"{path}: holds no cases of inference.py; test the checkpoint again or move the file away")
    for row in rows:
        for key, value in row.items():
            if key not in ("case", "class", "set") and not (value is None or isinstance(value, (int, float))):
                raise ReportError(f"{path}: {key} of case {row['case']} is {value!r}, no number; test again")
        if not isinstance(row["class"], (int, str)):
            raise ReportError(f"{path}: class {row['class']!r} of case {row['case']} is no class; test again")
    rows = [
        {plain(key): plain(v) if key in ("case", "set") or isinstance(v, str) else v for key, v in row.items()}
        for row in rows
        if row["class"] != "mean"
    ]
    if not rows:
        raise ReportError(f"{path}: holds means alone, no class of a case; test the checkpoint again")
    recorded = [Path(str(checkpoint)) for checkpoint in listed(content.get("checkpoint"))]
    first = recorded[0] if recorded else Path()
    # inference.py writes to <run>/<checkpoint>_<split>/ unless told otherwise, and the run may have been moved since.
    beside = path.parent.parent if first.stem and path.parent.name.startswith(first.stem) else first.parent
    run = beside if (beside / "config.json").is_file() else first.parent
    sha256 = tuple(map(str, listed(content.get("checkpoint_sha256"))))
    places = [run / checkpoint.name if checkpoint.parent == first.parent else checkpoint for checkpoint in recorded]
    pairs = zip(places, sha256, strict=False)
    replaced = next((file for file, tested in pairs if file.is_file() and file_sha256(file) != tested), None)
    config = read_config(run / "config.json") if first.stem and not replaced else {}

    def known(name, default=None, also=None):
        value = content.get(name)
        return config.get(also or name, default) if value is None else value

    def number(name):
        value = content.get(name)
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None

    def settings(value):
        return value if isinstance(value, dict) else {}

    network = settings(content.get("network"))
    method = " and ".join(map(plain, listed(known("method", network.get("network", "unknown"), also="model"))))
    # As run.PREFIXES has it: ema_iter_<N> is the teacher's, <name>_iter_<N> another network's.
    named = [re.fullmatch(rf"(?:(.+)_)?(?:iter_\d+|{re.escape(method)}_best_model)", file.stem) for file in recorded]
    named = {{"ema": "teacher"}.get(match[1], match[1]) if match else None for match in named}
    weights = named.pop() if len(named) == 1 else None
    weights = plain(weights or ("student" if "ema_decay" in config else ""))
    if len(recorded) > 1:
        weights = f"ensemble of {len(recorded)}" + f", {weights}" * (weights not in ("", "student"))
    seed, labelnum, scans = known("seed"), known("labelnum"), content.get("input")
    protocol = settings(content.get("protocol"))
    protocol = DEFAULTS | protocol if protocol else {}
    if number("tolerance") is not None:
        protocol["tolerance"] = number("tolerance")
    fold, folds = (value if isinstance(value, int) else None for value in map(content.get, ("fold", "folds")))
    cases = {row["case"] for row in rows}
    patients = {plain(case): plain(patient) for case, patient in settings(content.get("patients")).items()}
    patients = patients or patients_of(sorted(cases), needed=False)[0]  # results of before they were recorded
    segmented, seconds = number("segmented") or len(cases), number("inference_seconds")
    learned = [case for name in LEARNED for case in listed(config.get(name))]
    return Result(
        path=path,
        method=method,
        weights=weights,
        dataset=plain(known("dataset", "unknown", also="dataset_name")),
        labelnum=labelnum if isinstance(labelnum, int) else None,
        seed=seed if isinstance(seed, int) else None,
        selection=" and ".join(map(plain, listed(content.get("selection")))) or "unknown",
        unit=plain(content.get("unit") or "unknown"),
        protocol=protocol,
        cases=rows,
        patients=patients,
        sha256=sha256,
        replaced=replaced,
        inference_seconds=None if seconds is None else seconds / segmented,
        **{cost: number(cost) for cost in ("parameters", "training_seconds", "iteration_seconds", "peak_memory_mb")},
        run=run if config else None,
        config=config,
        network=network,
        input=None if scans is None else plain(scans),
        preprocessing=settings(content.get("preprocessing") or config.get("preprocessing")) or None,
        trained_on=tuple(sorted(cases & {plain(case) for case in [*listed(content.get("trained_on")), *learned]})),
        fold=None if folds is None else fold,
        folds=folds,
        images=all({"pixel_accuracy", "tp"} <= row.keys() for row in rows),
    )


def each_set(result):
    """A Result for each data set that the rows of `result` name, or itself where they name none."""
    names = dict.fromkeys(row["set"] for row in result.cases if "set" in row)
    for name in names:
        cases = [row for row in result.cases if row.get("set") == name]
        trained_on = tuple(case for case in result.trained_on if case in {row["case"] for row in cases})
        yield replace(result, dataset=name, cases=cases, trained_on=trained_on)
    if not names:
        yield result


def find_results(paths):
    """(results, notes): all metrics.json at or under `paths`, each once; sentences on runs and results that are not
    among them.

    `paths`: run folders, result folders, metrics.json files, or folders above them. In a folder, files of scans that
    had no labels are passed over, and results that lie in a run whose weights were replaced since they were tested.
    Raises ReportError, and FlagError for a file that is no JSON.
    """
    files, runs = {}, {}
    for path in map(Path, paths):
        if not path.exists():
            raise ReportError(f"{path}: no such file or folder; give runs, folders above them, or metrics.json files")
        for file in [path] if path.is_file() else sorted(path.rglob("metrics.json")):
            files[file.resolve()] = file
        for config in sorted(path.rglob("config.json")) if path.is_dir() else []:
            runs[config.parent.resolve()] = config.parent
    named = {Path(path).resolve() for path in paths}
    files = {place: file for place, file in files.items() if place in named or read_config(file).get("cases") != []}
    every = [result for file in files.values() for result in each_set(read_result(file))]
    old = [result for result in every if result.replaced and result.replaced.parent in result.path.parents]
    results = [result for result in every if result not in old]
    notes = [f"{o.path} is left out: {o.replaced} holds other weights than those it tested; test them." for o in old]
    if old and not results:
        raise ReportError(f"{old[0].path}: {old[0].replaced} holds other weights than those it tested; test them")
    if not results:
        remedy = "test a checkpoint first: python inference.py --model_path <run>/iter_<N>.pth"
        raise ReportError(f"{', '.join(map(str, paths))}: no metrics.json there; {remedy}")
    tested = {parent for file in files for parent in file.parents}
    notes += [f"{shown} has not been tested." for run, shown in runs.items() if run not in tested]
    return results, notes
