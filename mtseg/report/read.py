"""The metrics.json files that inference.py writes, with what the config.json of the checkpoint's run adds."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

# What inference.py records of its protocol only where it is not so.
DEFAULTS = {"weighting": "uniform", "tta": "none", "postprocessing": "none"}


class ResultError(ValueError):
    """A result that cannot be read; the message is one sentence with the file and the remedy."""


@dataclass
class Result:
    """What one metrics.json says; None is what it does not say.

    `inference_seconds`: of a case. `input`: the scans that were segmented, None for the cases of a list.
    `preprocessing`: how the scans or the training data were prepared. `trained_on`: measured cases of the training.
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
    sha256: str | None = None
    parameters: int | None = None
    inference_seconds: float | None = None
    training_seconds: float | None = None
    run: Path | None = None
    config: dict = field(default_factory=dict)
    network: dict = field(default_factory=dict)
    input: str | None = None
    preprocessing: dict | None = None
    trained_on: tuple = ()

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


def read_json(path):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: not a JSON file ({error}); make it again or move it away") from error
    if not isinstance(content, dict):
        raise ResultError(f"{path}: not a JSON object; make it again or move it away")
    return content


def read_result(path):
    """The Result of a metrics.json. What it does not record is taken from the config.json of the checkpoint's run."""
    path = Path(path)
    content = read_json(path)
    rows = content.get("cases")
    if rows == []:
        raise ResultError(f"{path}: nothing was measured, the scans had no labels; give inference.py --labels")
    if not (isinstance(rows, list) and all(isinstance(r, dict) and {"case", "class"} <= r.keys() for r in rows)):
        raise ResultError(f"{path}: holds no cases of inference.py; test the checkpoint again or move the file away")
    for row in rows:
        for key, value in row.items():
            if key not in ("case", "class") and not (value is None or isinstance(value, (int, float))):
                raise ResultError(f"{path}: {key} of case {row['case']} is {value!r}, no number; test again")
        if not isinstance(row["class"], (int, str)):
            raise ResultError(f"{path}: class {row['class']!r} of case {row['case']} is no class; test again")
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
    method = known("method", network.get("network", "unknown"), also="model")
    method = " and ".join(map(str, method)) if isinstance(method, list) else str(method)
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

    protocol = content.get("protocol")
    protocol = DEFAULTS | protocol if isinstance(protocol, dict) else {}
    if number("tolerance") is not None:
        protocol["tolerance"] = number("tolerance")
    segmented, seconds = number("segmented") or len({row["case"] for row in rows}), number("inference_seconds")
    trained_on = content.get("trained_on")
    return Result(
        path=path,
        method=method,
        weights=weights,
        dataset=str(known("dataset", "unknown", also="dataset_name")),
        labelnum=labelnum if isinstance(labelnum, int) else None,
        seed=seed if isinstance(seed, int) else None,
        selection=str(content.get("selection") or "unknown"),
        unit=str(content.get("unit") or "unknown"),
        protocol=protocol,
        cases=rows,
        sha256=str(content.get("checkpoint_sha256") or "") or None,
        parameters=number("parameters"),
        inference_seconds=None if seconds is None else seconds / segmented,
        training_seconds=number("training_seconds"),
        run=run if config else None,
        config=config,
        network=network,
        input=content.get("input"),
        preprocessing=content.get("preprocessing") or config.get("preprocessing"),
        trained_on=tuple(map(str, trained_on)) if isinstance(trained_on, list) else (),
    )


def find_results(paths):
    """(results, untested runs): all metrics.json at or under `paths`, each once, and the runs without any.

    `paths`: run folders, result folders, metrics.json files, or folders above them. Found in a folder, a file of scans
    that had no labels is passed over. Raises ResultError.
    """
    files, runs = {}, {}
    for path in map(Path, paths):
        if not path.exists():
            raise ResultError(f"{path}: no such file or folder; give runs, folders above them, or metrics.json files")
        for file in [path] if path.is_file() else sorted(path.rglob("metrics.json")):
            files[file.resolve()] = file
        for config in sorted(path.rglob("config.json")) if path.is_dir() else []:
            runs[config.parent.resolve()] = config.parent
    named = {Path(path).resolve() for path in paths}
    files = {place: file for place, file in files.items() if place in named or read_json(file).get("cases") != []}
    results = [read_result(file) for file in files.values()]
    if not results:
        raise ResultError(
            f"{', '.join(map(str, paths))}: no metrics.json there; test a checkpoint first: python inference.py "
            f"--model_path <run>/iter_<N>.pth"
        )
    tested = {parent for file in files for parent in file.parents}
    return results, [shown for run, shown in runs.items() if run not in tested]
