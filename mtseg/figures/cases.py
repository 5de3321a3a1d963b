"""The predictions of `inference.py --save_result`, and which of them to show."""

from pathlib import Path

import h5py
import numpy as np


class CaseError(ValueError):
    """Predictions that cannot be shown; the message is one sentence with the file and the remedy."""


def read_case(path):
    """{'image' (W, H, D), 'label', 'prediction'} of a <case>.h5 of inference.py; of several channels the first."""
    try:
        with h5py.File(path, "r") as file:
            case = {name: file[name][...] for name in ("image", "label", "prediction")}
    except FileNotFoundError as error:
        raise CaseError(f"{path}: no such file; write it with inference.py --save_result") from error
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CaseError(
            f"{path}: holds no image, label and prediction ({reason}); write it again with inference.py --save_result"
        ) from error
    case["image"] = case["image"][0] if case["image"].ndim == 4 else case["image"]
    if case["label"].ndim != 3 or not case["image"].shape == case["label"].shape == case["prediction"].shape:
        raise CaseError(f"{path}: image, label and prediction have different shapes; write it again")
    if min(case["image"].shape) < 2:
        raise CaseError(
            f"{path}: its shape {case['image'].shape} is no volume: there is no contour to draw; leave it out"
        )
    return case


def case_files(folder):
    """{case: path} of the predictions in `folder`. Raises CaseError where there is none."""
    files = {path.stem: path for path in sorted(Path(folder).glob("*.h5"))}
    if not files:
        raise CaseError(f"{folder}: holds no <case>.h5; write them with inference.py --save_result {folder}")
    return files


def named_folders(words):
    """{name: folder} of words like MT=predictions/MT, or predictions/MT, whose name is that of the folder."""
    folders = {}
    for word in words:
        name, _, folder = str(word).rpartition("=")
        name = name or Path(folder).name
        if name in folders:
            raise CaseError(f"{word}: two folders are called {name!r}; name them, as in supervised=FOLDER MT=FOLDER")
        folders[name] = Path(folder)
    return folders


def read_everywhere(folders, case):
    """{name: case} of one case from several folders, whose labels must be the same."""
    cases = {name: read_case(folder / f"{case}.h5") for name, folder in folders.items()}
    first = next(iter(cases.values()))
    for name, other in cases.items():
        if not np.array_equal(first["label"], other["label"]):
            raise CaseError(f"{folders[name] / f'{case}.h5'}: its label is not that of {next(iter(folders.values()))}")
    return cases


def order_cases(scores):
    """Case names by falling score {case: Dice}; ties by name."""
    return sorted(scores, key=lambda case: (-scores[case], case))


def pick_for_gallery(scores, worst=5):
    """[(place, case)]: the best, the median and the `worst` worst cases by {case: Dice}, each case once."""
    ordered = order_cases(scores)
    picked = [("best", ordered[0]), ("median", ordered[(len(ordered) - 1) // 2])]
    last = ordered[-worst:][::-1]
    picked += [("worst" if n == 0 else f"{n + 1}. worst", case) for n, case in enumerate(last)]
    seen = set()
    return [(place, case) for place, case in picked if not (case in seen or seen.add(case))]


def best_median_worst(folder, score):
    """[(place, name, case)] of the predictions in `folder`: `pick_for_gallery` by score(case); and how many there are.

    One case at a time is in memory, and those that are picked.
    """
    files = case_files(folder)
    scores = {name: score(read_case(path)) for name, path in files.items()}
    return [(place, name, read_case(files[name])) for place, name in pick_for_gallery(scores)], len(files)
