"""The folder of an active-learning loop: what was asked in each round, and what came back.

<folder>/settings.json               the data and the unit, the same in all rounds
<folder>/round_01/selection.json     the regions that are to be annotated, and what an annotator needs beside it
<folder>/round_01/annotations/       the labels of this round and of all before it, <case>.h5, once they are taken
<folder>/round_01/taken.json         how many voxels they are, and what of the predictions was changed
<folder>/round_01/run/               the run that learned from them

Everything is written whole or not at all, nothing is changed afterwards, and all of it is read again at any moment: a
round is asked as soon as it has its folder, and taken once taken.json is there.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from mtseg.checkpoint import write_whole
from mtseg.datasets import UNKNOWN
from mtseg.script.flags import read_config
from mtseg.script.methods import trained_weights
from mtseg.script.sources import annotated_cases, annotation_file, read_annotation
from mtseg.volumes import hdf5_bytes


class RoundError(ValueError):
    """A round that is not there, not yet or already; the message is one sentence with its folder and the remedy."""


def settings_of(folder, given):
    """The settings of the loop in `folder`: those it began with, which those `given`, {name: value or None}, may not
    contradict, else these, and a new loop. RoundError."""
    path = Path(folder) / "settings.json"
    before = read_config(path)
    if not before:
        return given
    for name, value in given.items():
        if value is not None and name in before and json.loads(json.dumps(value)) != before[name]:
            raise RoundError(f"{path}: {name} is {before[name]}, not {value}; leave it out, or begin another folder")
    return before


def rounds_of(folder):
    """The folders of all rounds, in order."""
    return sorted((path for path in Path(folder).glob("round_*") if path.name[6:].isdecimal()), key=order)


def order(folder):
    """The key by which the folders of rounds follow each other, round_100 after round_99."""
    return len(folder.name), folder.name


def is_taken(folder):
    return (folder / "taken.json").is_file()


def next_round(folder):
    """The folder that the next round gets; RoundError where the last one has not come back, or one between is gone."""
    rounds = rounds_of(folder)
    there = {int(path.name[6:]) for path in rounds}
    if gone := set(range(1, max(there, default=0))) - there:  # whose regions would be asked for again
        raise RoundError(f"{folder}: round {min(gone)} is gone, and later ones are there; restore it, or delete these")
    if rounds and not is_taken(rounds[-1]):
        raise RoundError(f"{rounds[-1]}: waits for its masks: take it first, or delete this folder to ask for others")
    return Path(folder) / f"round_{max(there, default=0) + 1:02}"


def last_round(folder, taken=False):
    """The folder of the last round, with `taken` of those whose masks are; RoundError where there is none."""
    rounds = [path for path in rounds_of(folder) if is_taken(path) or not taken]
    if not rounds:
        raise RoundError(f"{folder}: holds no round{' whose masks are taken' * taken} yet; begin with `next`")
    return rounds[-1]


def annotations_before(folder):
    """The annotations of the round before that in `folder`, None where it is the first."""
    before = [other for other in rounds_of(folder.parent) if order(other) < order(folder)]
    return before[-1] / "annotations" if before else None


def asked_in(folder):
    """What selection.json of a round says; RoundError where there is none."""
    selection = read_config(Path(folder) / "selection.json")
    if not selection:
        raise RoundError(f"{folder}: no round, it has no selection.json; give one, such as active/round_01")
    return selection


def regions_asked(rounds):
    """[(case, start, stop)] of all regions that the folders `rounds` ask for."""
    return [(r["case"], r["start"], r["stop"]) for folder in rounds for r in asked_in(folder)["regions"]]


def begin_round(folder, selection, write):
    """Make the round in `folder`: its selection.json, and what `write(folder)` writes beside it. All at once."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    write_whole(unfinished / "selection.json", json.dumps(selection, indent=1).encode())
    os.replace(unfinished, folder)


def end_round(folder, labels, background=0, **told):
    """Write the annotations of the round in `folder`: those of the rounds before, and over them `labels`, pairs of a
    case and its labels, uint8, UNKNOWN where nobody annotated. Then taken.json: how much there is, and what is `told`.
    """
    unfinished, before = folder / ".annotations.tmp", annotations_before(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(before, unfinished) if before else unfinished.mkdir()
    for case, label in labels:
        if annotation_file(unfinished, case).is_file():
            label = np.where(label == UNKNOWN, read_annotation(unfinished, case), label)
        write_whole(annotation_file(unfinished, case), hdf5_bytes({"label": label.astype(np.uint8)}))
    counts = count_labels(unfinished, background)
    shutil.rmtree(folder / "annotations", ignore_errors=True)
    os.replace(unfinished, folder / "annotations")
    write_whole(folder / "taken.json", json.dumps(counts | told, indent=1).encode())


def begin_with(folder, labels, background=0):
    """Make round_00 of the cases that have labels already: `labels`, pairs of a case and its label. All at once."""
    regions = [{"case": case, "start": [0] * label.ndim, "stop": [*label.shape]} for case, label in labels]
    selection = {"strategy": "labelled before", "regions": regions}
    begin_round(Path(folder) / "round_00", selection, lambda unfinished: end_round(unfinished, labels, background))


def row_of(folder):
    """The cells of a round in a table of all."""
    asked, taken = asked_in(folder), read_config(folder / "taken.json")
    changed, weights = [*taken.get("changed", {}).values()], trained_weights(folder / "run")
    counts = [f"{taken[name]:,}" if taken else "-" for name in ("cases", "voxels", "foreground")]
    share = f"{np.mean(changed):.1%}" if changed else "-"
    trained = str(weights) if weights else "-" if taken else "waits for masks"
    return [[str(cell)] for cell in (folder.name, asked["strategy"], len(asked["regions"]), *counts, share, trained)]


def count_labels(annotations, background=0):
    """{'cases': with labels, 'voxels': with a label, 'foreground': of these not of the `background`, or None}."""
    counts = {"cases": 0, "voxels": 0, "foreground": 0}
    for case in annotated_cases(annotations):
        label = read_annotation(annotations, case)
        known = label != UNKNOWN
        counts["cases"] += 1
        counts["voxels"] += int(known.sum())
        counts["foreground"] += int((known if background is None else known & (label != background)).sum())
    return counts
