"""The folder of a loop: what counts, in which order, and that nothing half-made does, wherever it was cut off."""

import json
import os
import shutil

import numpy as np
import pytest

from mtseg.active import rounds
from mtseg.active.rounds import RoundError
from mtseg.script.sources import annotated_cases, read_annotation


class Cut(BaseException):
    """The process is killed: no `except Exception` sees it."""


def selection(*cases, side=4):
    regions = [{"case": case, "start": [0, 0], "stop": [side, side]} for case in cases]
    return {"strategy": "random", "regions": regions}


def label(**rows):
    """4 x 4 labels, 255 but for some rows: r0=1 makes all of row 0 class 1."""
    made = np.full((4, 4), 255, np.uint8)
    for row, number in rows.items():
        made[int(row[1:])] = number
    return made


def begin(folder, *cases):
    made = rounds.next_round(folder)
    rounds.begin_round(made, selection(*cases), lambda _: None)
    return made


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut_at(patch, module, name, number):
    """From now on the call `number`, from 0, of module.name kills the process before it does anything."""
    calls, real = [], getattr(module, name)

    def called(*arguments, **keywords):
        calls.append(name)
        if len(calls) == number + 1:
            raise Cut
        return real(*arguments, **keywords)

    patch.setattr(module, name, called)
    return calls


def test_rounds_follow_each_other(tmp_path):
    with pytest.raises(RoundError, match="holds no round yet; begin with `next`"):
        rounds.last_round(tmp_path)
    with pytest.raises(RoundError, match="holds no round whose masks are taken yet"):
        rounds.last_round(tmp_path, taken=True)
    first = begin(tmp_path, "a", "b")
    assert first.name == "round_01" and rounds.last_round(tmp_path) == first
    with pytest.raises(RoundError, match=f"{first}: waits for its masks: take it first, or delete this folder"):
        rounds.next_round(tmp_path)
    rounds.end_round(first, [("a", label(r0=1))])
    second = begin(tmp_path, "c")
    assert second.name == "round_02" and rounds.last_round(tmp_path, taken=True) == first
    assert [case for case, *_ in rounds.regions_asked(rounds.rounds_of(tmp_path))] == ["a", "b", "c"]
    (tmp_path / "round_notes").mkdir()
    (tmp_path / ".round_03.tmp").mkdir()
    assert rounds.rounds_of(tmp_path) == [first, second]
    with pytest.raises(RoundError, match=r"round_notes: no round, it has no selection.json"):
        rounds.asked_in(tmp_path / "round_notes")


def test_a_round_that_is_gone(tmp_path):
    """Its regions would be asked for again; the last one may be deleted, and all that began with labels has 0."""
    for number in range(3):
        rounds.end_round(begin(tmp_path, "abc"[number]), [("abc"[number], label(r0=1))])
    shutil.rmtree(tmp_path / "round_01")
    with pytest.raises(RoundError, match=f"{tmp_path}: round 1 is gone, and later ones are there; restore it, or"):
        rounds.next_round(tmp_path)
    shutil.rmtree(tmp_path / "round_02")
    with pytest.raises(RoundError, match="round 1 is gone"):
        rounds.next_round(tmp_path)
    shutil.rmtree(tmp_path / "round_03")
    assert rounds.next_round(tmp_path).name == "round_01"


def test_more_than_a_hundred_rounds(tmp_path):
    for number in (2, 99, 100, 101):
        rounds.begin_round(tmp_path / f"round_{number:02}", selection("a"), lambda _: None)
    assert [path.name for path in rounds.rounds_of(tmp_path)] == ["round_02", "round_99", "round_100", "round_101"]
    rounds.end_round(tmp_path / "round_02", [("a", label(r0=2))])
    rounds.end_round(tmp_path / "round_99", [("a", label(r0=1))])
    rounds.end_round(tmp_path / "round_100", [("a", label(r1=1))])
    assert (read_annotation(tmp_path / "round_100/annotations", "a") == label(r0=1, r1=1)).all()
    rounds.end_round(tmp_path / "round_101", [])
    for number in {*range(1, 99)} - {2}:
        rounds.begin_round(tmp_path / f"round_{number:02}", selection("a"), lambda _: None)
    assert rounds.next_round(tmp_path).name == "round_102"


def test_settings_are_those_that_a_loop_began_with(tmp_path):
    given = {"unit": "patch", "region": (4, 4), "seed": None}
    assert rounds.settings_of(tmp_path, given) is given  # a new loop: nothing is written yet
    assert not list(tmp_path.iterdir())
    (tmp_path / "settings.json").write_text(json.dumps({"unit": "patch", "region": [4, 4], "seed": 7}))
    assert rounds.settings_of(tmp_path, given) == {"unit": "patch", "region": [4, 4], "seed": 7}
    for name, value in (("unit", "case"), ("region", [4, 5]), ("seed", 0)):
        with pytest.raises(RoundError, match=f"settings.json: {name} is .*, not .*; leave it out, or begin another"):
            rounds.settings_of(tmp_path, {name: value})


def test_later_labels_win_where_there_are_any(tmp_path):
    """Against a dictionary of all labels so far, voxel by voxel."""
    rng, expected, kept = np.random.default_rng(0), {}, {}
    for number in range(4):
        folder = begin(tmp_path, "a")
        given = [
            (case, rng.choice([0, 1, 2, 255], (4, 4), p=[0.2, 0.2, 0.2, 0.4])) for case in "abc"[: number + 1][-2:]
        ]
        for case, labels in given:
            for place in np.ndindex(4, 4):
                if labels[place] != 255 or (case, *place) not in expected:
                    expected[(case, *place)] = labels[place]
        rounds.end_round(folder, given, 0, changed={"a": 0.25})
        there = {
            case: read_annotation(folder / "annotations", case) for case in annotated_cases(folder / "annotations")
        }
        assert {
            (case, *place): labels[place] for case, labels in there.items() for place in np.ndindex(4, 4)
        } == expected
        known = [value for value in expected.values() if value != 255]
        counts = {"cases": len(there), "voxels": len(known), "foreground": sum(value != 0 for value in known)}
        assert json.loads((folder / "taken.json").read_text()) == counts | {"changed": {"a": 0.25}}
        for earlier, files in kept.items():
            assert files_below(earlier) == files
        kept[folder] = files_below(folder)
    assert rounds.count_labels(folder / "annotations", None)["foreground"] == len(known)


def test_what_is_labelled_before_is_a_round_of_its_own(tmp_path):
    rounds.begin_with(tmp_path, [("a", label(r0=1)), ("b", label(r1=0))])
    assert rounds.is_taken(tmp_path / "round_00") and rounds.next_round(tmp_path).name == "round_01"
    assert rounds.regions_asked(rounds.rounds_of(tmp_path)) == [("a", [0, 0], [4, 4]), ("b", [0, 0], [4, 4])]
    first = begin(tmp_path, "a")
    rounds.end_round(first, [("a", label(r0=0, r3=1))])
    assert (read_annotation(first / "annotations", "a") == label(r0=0, r3=1)).all()
    assert (read_annotation(first / "annotations", "b") == label(r1=0)).all()


def steps_of(module, name, work):
    """How often `work` calls module.name."""
    with pytest.MonkeyPatch.context() as patch:
        calls = cut_at(patch, module, name, -2)
        work()
    return len(calls)


@pytest.mark.parametrize("what", ["begin_round", "begin_with", "end_round"])
def test_cut_off_at_every_renaming_and_done_again(tmp_path, what):
    """Every file and folder gets its name by os.replace: before each of them the process is killed once."""

    def prepared(folder):
        folder.mkdir()
        if what == "end_round":
            rounds.end_round(begin(folder, "a"), [("a", label(r0=1)), ("b", label(r1=1))])
            begin(folder, "a")
        return folder

    def work(folder):
        if what == "begin_with":
            rounds.begin_with(folder, [("a", label(r0=1)), ("b", label(r2=2))])
        elif what == "end_round":
            rounds.end_round(folder / "round_02", [("a", label(r3=2)), ("c", label(r0=0))], changed={"a": 0.5})
        else:
            files = ("images/a.png", "TODO.txt")
            write = rounds.write_whole
            rounds.begin_round(
                folder / "round_01", selection("a"), lambda unfinished: [write(unfinished / f, b"x") for f in files]
            )

    whole = prepared(tmp_path / "whole")
    steps = steps_of(os, "replace", lambda: work(whole))
    assert steps == {"begin_round": 4, "begin_with": 6, "end_round": 4}[what]
    for step in range(steps):
        folder = prepared(tmp_path / f"cut_{step}")
        before = [path.name for path in rounds.rounds_of(folder)]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
            cut_at(patch, os, "replace", step)
            work(folder)
        assert [path.name for path in rounds.rounds_of(folder)] == before
        if what == "end_round":
            assert not rounds.is_taken(folder / "round_02")
            assert (read_annotation(folder / "round_01/annotations", "a") == label(r0=1)).all()
        work(folder)
        assert files_below(folder) == files_below(whole)


def test_the_row_of_a_round(tmp_path):
    folder = begin(tmp_path, "a", "b")
    assert rounds.row_of(folder) == [["round_01"], ["random"], ["2"], ["-"], ["-"], ["-"], ["-"], ["waits for masks"]]
    rounds.end_round(folder, [("a", label(r0=1, r1=0)), ("b", label(r0=1))], changed={"a": 0.5, "b": 0.25})
    assert rounds.row_of(folder)[3:] == [["2"], ["12"], ["8"], ["37.5%"], ["-"]]
    run = folder / "run/model/x/y"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "iter_20.pth").write_bytes(b"")
    assert rounds.row_of(folder)[7] == [str(run / "iter_20.pth")]
