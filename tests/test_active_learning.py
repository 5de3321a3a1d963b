"""The recipe as a user calls it: rounds with masks that Pillow draws, mistakes, simulations that are killed."""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import active_learning
import h5py
import numpy as np
import pytest
import torch
from conftest import PHASES, TINY_2D, finish_after_kills, make_images, make_stacks

from mtseg.active import simulation
from mtseg.phantom import make_phantom
from mtseg.script import methods, processes
from mtseg.script.sources import read_annotation

Image = pytest.importorskip("PIL.Image", reason="masks are drawn by Pillow")
QUICK = {**TINY_2D, "normalization": "groupnorm", "max_iterations": 3, "base_lr": 0.1}
VALUES = np.array([entry["value"] for entry in PHASES["classes"]], np.uint8)


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Trainings run in this process, which has PyTorch loaded already, and on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for module in (active_learning, simulation):
            patch.setattr(module, "run_script", run_here)
        yield


def run_here(words, log, **environment):
    """As processes.run_script, and says in `log` what was run."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(" ".join(map(str, words)))
    methods.load_script(Path(words[0])).main([str(word) for word in words[1:]])


def words_of(given):
    return [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]


def call(out, action, *more):
    place = [more[0]] if more and isinstance(more[0], Path) else []  # of a round
    active_learning.main([str(word) for word in (action, *place, "--output_dir", out, *more[len(place) :])])


def train(out, *more, **changes):
    call(out, "train", *more, "--flags", *words_of({**QUICK, **changes}))


def said(capsys, out, action, *more):
    capsys.readouterr()
    call(out, action, *more)
    return capsys.readouterr().out


def refused(capsys, out, action, *more):
    """The one sentence with which an action ends; it has changed no file."""
    before = listing(out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(out, action, *more)
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
    assert listing(out) == before
    return sentence


def listing(folder):
    """{file or folder: the checksum of what it holds}"""
    return {
        str(path.relative_to(folder)): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


def asked(folder):
    return json.loads((folder / "selection.json").read_text())


def truth(root, case):
    return np.array(Image.open(root / f"masks/{case}.png"))


def draw(root, folder):
    """Save the mask of every case of a round, the truth inside of its regions and nonsense of a class elsewhere."""
    for record in asked(folder)["cases"]:
        mask, inside = truth(root, record["case"]), np.zeros(record["shape"], bool)
        for start, stop in record["boxes"]:
            inside[tuple(map(slice, start, stop))] = True
        Image.fromarray(np.where(inside, mask, 200).astype(np.uint8)).save(folder / f"masks/{record['case']}.png")


def weights_below(folder):
    return {path.relative_to(folder): torch.load(path, weights_only=True) for path in folder.rglob("*iter_*.pth")}


# ------------------------------------------------------------------------------------------------------------- by hand


def test_rounds_by_hand(tmp_path, capsys):
    root, out = make_images(tmp_path / "data"), tmp_path / "active"
    (root / "val.list").write_text("image_5\n")
    untouched = listing(root)
    more = ["--root_path", root, "--unit", "patch", "--region", 12, 12, "--val_list", root / "val.list"]
    text = said(capsys, out, "next", *more, "--budget", 4)
    assert text.startswith("typiclust, by the images alone: there is no network yet\n")
    first = out / "round_01"
    assert f"{first}/TODO.txt says what to annotate: 4 regions in" in text
    assert f"take {first}" in (first / "TODO.txt").read_text() and not list((first / "masks").iterdir())
    assert "waits for its masks: take it first" in refused(capsys, out, "next")
    assert "no such file, nor one with another ending; save the mask of the case there" in refused(capsys, out, "take")
    assert "masks are not taken yet; `take` it first" in refused(capsys, out, "train", first)
    draw(root, first)
    assert "annotated anew" in said(capsys, out, "take", "--allow_empty")
    assert "its masks are taken already; go on with `train`, or `next`" in refused(capsys, out, "take")
    for region in asked(first)["regions"]:
        box = tuple(map(slice, region["start"], region["stop"]))
        assert (
            VALUES[read_annotation(first / "annotations", region["case"])[box]] == truth(root, region["case"])[box]
        ).all()

    train(out)
    assert "--val_list" in (first / "train.log").read_text()
    text = said(capsys, out, "next", "--budget", 3, "--members", "flips")
    assert text.startswith(f"clasp_pe, by {first}/run/model/") and text.count("\n") >= 2
    second = out / "round_02"
    cases = {record["case"]: record for record in asked(second)["cases"]}
    assert all((second / record["prediction"]).is_file() for record in cases.values()) and "image_5" not in cases
    overlap = [np.zeros((26, 23), int) for _ in range(8)]
    for region in asked(first)["regions"] + asked(second)["regions"]:
        overlap[int(region["case"][-1])][tuple(map(slice, region["start"], region["stop"]))] += 1
    assert max(map(np.max, overlap)) == 1
    draw(root, second)
    shown = said(capsys, out, "take", second, "--allow_empty")
    for case, record in cases.items():
        box = tuple(map(slice, *record["boxes"][0]))
        predicted = np.array(Image.open(second / record["prediction"]))
        if len(record["boxes"]) == 1:
            assert f"{case}: {(predicted != truth(root, case))[box].mean():.1%} of the prediction was changed" in shown
    train(out, "--script", "MT", batch_size=4)
    rows = said(capsys, out, "status").splitlines()
    assert [row.split()[:3] for row in rows if row.startswith("round_")] == [
        ["round_01", "typiclust", "4"],
        ["round_02", "clasp_pe", "3"],
    ]
    assert f"{7 * 144:,}" in " ".join(rows)
    (first / "taken.json").rename(first / "away.json")
    assert "round_02 went on from its labels" in refused(capsys, out, "take", first)
    (first / "away.json").rename(first / "taken.json")
    assert listing(root) == untouched
    # The same again, in other folders, gives the same bits.
    again = tmp_path / "again"
    call(again, "next", *more, "--budget", 4)
    draw(root, again / "round_01")
    call(again, "take", "--allow_empty")
    train(again)
    call(again, "next", "--budget", 3, "--members", "flips")
    assert asked(again / "round_02")["regions"] == asked(second)["regions"]
    one, other = weights_below(first), weights_below(again / "round_01")
    assert one.keys() == other.keys() and len(one) == 1
    for name, state in one.items():
        assert all(torch.equal(tensor, other[name][key]) for key, tensor in state.items())


def test_slices_of_stacks_in_pages_and_cases_with_labels_to_begin_with(tmp_path, capsys):
    root, out = make_stacks(tmp_path / "data"), tmp_path / "active"
    said(capsys, out, "next", "--root_path", root, "--unit", "slice", "--budget", 3, "--labelnum", 2)
    names = (root / "train.list").read_text().split()
    begun, folder = out / "round_00", out / "round_01"
    assert sorted(path.stem for path in (begun / "annotations").iterdir()) == names[:2]
    assert {region["case"] for region in asked(folder)["regions"]} <= {*names[2:]}
    for record in asked(folder)["cases"]:
        with h5py.File(root / f"data/{record['case']}.h5") as file:
            pages = [Image.fromarray(page) for page in VALUES[file["label"][...]]]
        pages[0].save(folder / f"masks/{record['case']}.tif", save_all=True, append_images=pages[1:])
    call(out, "take", "--allow_empty")
    for region in asked(folder)["regions"]:
        found = read_annotation(folder / "annotations", region["case"])
        with h5py.File(root / f"data/{region['case']}.h5") as file:
            box = tuple(map(slice, region["start"], region["stop"]))
            assert (found[box] == file["label"][box]).all()
        slices = {r["start"][0] for r in asked(folder)["regions"] if r["case"] == region["case"]}
        assert {*np.flatnonzero((found != 255).all(axis=(1, 2)))} == slices
    train(out)
    text = said(capsys, out, "status")
    assert "labelled before" in text and "round_00" in text
    assert "began with 2 labelled cases; leave it out" in refused(capsys, out, "next", "--labelnum", 3)
    call(out, "next", "--labelnum", 2, "--budget", 2, "--strategy", "core_set")
    assert (out / "round_02").is_dir()


def test_a_budget_above_what_is_left(tmp_path, capsys):
    root, out = make_images(tmp_path / "data", train=4), tmp_path / "active"
    out.mkdir()
    more = ("next", "--root_path", root, "--budget")
    assert "--budget 5: only 4 regions are left to choose; ask for so many" in refused(capsys, out, *more, 5)
    assert "--budget 4: only 3 regions" in refused(capsys, out, *more, 4, "--labelnum", 1)
    call(out, *more, 3, "--labelnum", 1)
    assert sorted(path.name for path in out.iterdir()) == ["round_00", "round_01", "settings.json"]


def test_a_first_call_that_was_wrong_is_forgotten(tmp_path, capsys):
    """What it asked for is not what the loop then begins with."""
    root, out = make_images(tmp_path / "data"), tmp_path / "active"
    out.mkdir()
    for more, sentence in (
        (["--unit", "slice"], "--unit slice: the cases are images, which have no slices"),
        (["--unit", "patch"], "--unit patch with cases of 2 axes: give --region"),
        (["--region", 4, 4], "--unit case with --region, which is about patches"),
        (["--stride", 8], "--unit case with --stride, which is about patches"),
        (["--strategy", "best"], "there is no strategy best; there are"),
        (["--strategy", "entropy"], "there is no network yet to be unsure: take random or typiclust"),
        (["--run", "nowhere"], "nowhere: no weights of a student there; give a run that has ended"),
        (["--labelnum", 7], "--labelnum 7, but train.list has 6 cases; lower it"),
        (["--val_list", "no.list"], "no.list: no such list"),
        (["--snap"], "--snap is a flag of take, not of next: leave it out"),
        (["--seeds", 1], "--seeds is a flag of simulate, not of next"),
        (["round_01"], "unrecognized arguments: round_01; what belongs to no flag stands before all flags"),
    ):
        assert sentence in refused(capsys, out, "next", "--root_path", root, *more)
    assert "no loop of active learning has begun there" in refused(capsys, out, "next")
    assert "next is not about one round: leave" in refused(capsys, out, "next", out / "round_01")
    assert "no such folder" in refused(capsys, out, "next", "--root_path", tmp_path / "none")
    call(out, "next", "--root_path", root, "--budget", 2)
    assert "unit is case, not patch; leave it out" in refused(capsys, out, "next", "--unit", "patch")
    assert "seed is 1337, not 5; leave it out" in refused(capsys, out, "next", "--seed", 5)


@pytest.fixture(scope="module")
def waiting(tmp_path_factory):
    """(data, loop) that waits for two masks, which are drawn."""
    folder = tmp_path_factory.mktemp("waiting")
    root = make_images(folder / "data")
    call(folder / "active", "next", "--root_path", root, "--budget", 2)
    draw(root, folder / "active/round_01")
    return root, folder / "active"


SPOILT = {
    "another size": (lambda mask: mask[:-1], "is 25 x 23 pixels, its image 26 x 23 pixels; save a mask as large"),
    "unknown values": (lambda mask: mask + 1, "value"),
    "empty": (lambda mask: mask * 0, "draw what is there, or say that it is so with --allow_empty"),
    "all left out": (lambda mask: mask * 0 + 255, "all is left out in the whole image; annotate some of it"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_one_mask_that_is_wrong_and_nothing_is_added(waiting, tmp_path, capsys, name):
    root, out = waiting[0], shutil.copytree(waiting[1], tmp_path / "active")
    spoil, sentence = SPOILT[name]
    path = out / f"round_01/masks/{asked(out / 'round_01')['cases'][1]['case']}.png"
    Image.fromarray(spoil(truth(root, path.stem))).save(path)
    shown = refused(capsys, out, "take")
    assert str(path) in shown and sentence in shown
    if name == "empty":
        call(out, "take", "--allow_empty")
    else:
        Image.fromarray(truth(root, path.stem)).save(path)
        call(out, "take")
    assert len(list((out / "round_01/annotations").iterdir())) == 2


def test_weights_of_a_teacher_that_there_is_not(waiting, tmp_path, capsys):
    out = shutil.copytree(waiting[1], tmp_path / "active")
    call(out, "take")
    train(out)
    sentence = refused(capsys, out, "next", "--weights", "teacher")
    assert "no weights of a teacher there; give a run that has ended, or --weights student" in sentence
    assert "beside" in refused(capsys, out, "next", "--members", "teacher")


def test_what_the_recipe_says_to_a_script_is_not_said_behind_flags(waiting, tmp_path, capsys):
    out = shutil.copytree(waiting[1], tmp_path / "active")
    call(out, "take")
    for name in ("root_path", "seed", "gpu", "output_dir", "annotations", "labelnum"):
        with pytest.raises(SystemExit):
            train(out, **{name: 1})
        assert f"--{name} behind --flags, where the recipe says it itself: leave it out" in capsys.readouterr().err
    assert not (out / "round_01/run").exists()


def test_a_network_of_other_classes(waiting, tmp_path, capsys):
    """Fewer or other ones would be written into predictions as classes of these data."""
    out = shutil.copytree(waiting[1], tmp_path / "active")
    call(out, "take")
    train(out)
    other, run = tmp_path / "other", out / "round_01/run"
    root = make_images(tmp_path / "data", train=3)
    (root / "classes.json").write_text(json.dumps({**PHASES, "classes": PHASES["classes"][:2]}))
    other.mkdir()
    sentence = refused(capsys, other, "next", "--root_path", root, "--run", run)
    assert "has 3 classes, the data 2 (matrix, pore); give a --run of its own" in sentence
    (root / "classes.json").write_text(json.dumps(PHASES).replace("pore", "crack"))
    sentence = refused(capsys, other, "next", "--root_path", root, "--run", run)
    assert "its classes are matrix, pore, grain, those of the data matrix, crack, grain; give" in sentence
    (root / "classes.json").unlink()
    call(other, "next", "--root_path", root, "--num_classes", 3, "--run", run, "--budget", 1)


def test_two_runs_of_a_round(waiting, tmp_path, capsys):
    """Which one the next round goes by has to be said."""
    out = shutil.copytree(waiting[1], tmp_path / "active")
    call(out, "take")
    train(out)
    with pytest.raises(SystemExit):
        train(out, "--script", "MT", batch_size=4)
    assert "round_01/run: holds 2 runs; give one, such as --run " in capsys.readouterr().err
    assert "holds 2 runs" in refused(capsys, out, "next", "--budget", 2)
    (chosen,) = out.glob("round_01/run/model/*/MT")
    text = said(capsys, out, "next", "--budget", 2, "--run", chosen, "--members", "teacher", "--strategy", "bald")
    assert text.startswith(f"bald, by {chosen}/iter_3.pth\n")


def test_masks_that_were_taken_anew_are_not_learned_by_the_old_run(waiting, tmp_path, capsys):
    """Somebody mends a mask after training: the run would be of other labels."""
    root, out = waiting[0], shutil.copytree(waiting[1], tmp_path / "active")
    call(out, "take")
    train(out)
    case = asked(out / "round_01")["cases"][1]["case"]
    Image.fromarray(np.roll(truth(root, case), 3, axis=0)).save(out / f"round_01/masks/{case}.png")
    (out / "round_01/taken.json").unlink()
    assert "round_01/run: learned from other labels; delete it, then take the masks" in refused(capsys, out, "take")
    shutil.rmtree(out / "round_01/run")
    call(out, "take")
    train(out)


def test_a_round_is_taken_after_those_before_it(waiting, tmp_path, capsys):
    """Its labels are theirs and its own: of masks that were corrected later it would hold the old ones."""
    root, out = waiting[0], shutil.copytree(waiting[1], tmp_path / "active")
    call(out, "take")
    call(out, "next", "--budget", 1)
    draw(root, out / "round_02")
    (out / "round_01/taken.json").unlink()
    sentence = "round_01: waits for its masks, from which round_02 goes on; take it first"
    assert sentence in refused(capsys, out, "take")
    call(out, "take", out / "round_01")
    call(out, "take")


def test_a_case_whose_name_has_dots(tmp_path):
    root, out = make_images(tmp_path / "data", train=3), tmp_path / "active"
    for folder in ("images", "masks"):
        (root / f"{folder}/image_1.png").rename(root / f"{folder}/image.1.v2.png")
    (root / "train.list").write_text("image_0\nimage.1.v2\nimage_2\n")
    call(out, "next", "--root_path", root, "--budget", 3)
    draw(root, out / "round_01")
    call(out, "take")
    train(out)
    assert (VALUES[read_annotation(out / "round_01/annotations", "image.1.v2")] == truth(root, "image.1.v2")).all()


def test_train_is_a_process_of_its_own(waiting, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(waiting[1], tmp_path / "active")
    call(out, "take")
    monkeypatch.setattr(active_learning, "run_script", processes.run_script)
    train(out)
    assert "trained: " in capsys.readouterr().out and len(weights_below(out)) == 1


# --------------------------------------------------------------------------------------------------------- simulations


def test_after_an_error_no_thread_begins_another_script(tmp_path):
    """One that is choosing meanwhile goes on to its next training."""
    script = tmp_path / "script.py"
    script.write_text(f"import pathlib, time\ntime.sleep(60)\npathlib.Path({str(tmp_path / 'ended')!r}).touch()\n")

    def choose_and_train():
        processes.ending.wait()
        processes.run_script([script], tmp_path / "log.txt")

    with pytest.raises(ZeroDivisionError), processes.threads(1) as pool:
        future = pool.submit(choose_and_train)
        while not future.running():
            time.sleep(0.01)
        raise ZeroDivisionError
    with pytest.raises(processes.ScriptError, match="was not run, since another script failed or a signal came"):
        future.result()
    assert not (tmp_path / "ended").exists() and not processes.ending.is_set() and not processes.running


def simulated(root, out, *more, **changes):
    given = {"root_path": root, "budget": 2, "rounds": 2, "jobs": 1, "seeds": "1 2", "strategies": "random margin"}
    words = words_of({**given, **changes})
    return "simulate", "--output_dir", out, *words, *more, "--flags", *words_of(QUICK)


def in_order(text):
    """The tables at the end of what a simulation prints."""
    return text[text.index("strategy") :]


def test_a_simulation_and_the_same_command_again(tmp_path, capsys, monkeypatch):
    root, out = make_images(tmp_path / "data"), tmp_path / "out"
    untouched, words = listing(root), [str(word) for word in simulated(root, out)]
    active_learning.main(words)
    first = capsys.readouterr().out
    records = json.loads((out / "records.json").read_text())
    assert [(r["strategy"], r["seed"], r["round"], r["regions"]) for r in records["records"]] == [
        (strategy, seed, number, 2 * number + 2)
        for seed in (1, 2)
        for strategy in ("random", "margin")
        for number in range(3)
    ]
    assert len(records["ceiling"]) == 2 and listing(root) == untouched
    for seed in (1, 2):  # both begin with the same regions, labels and weights
        starts = [out / f"seed{seed}/{name}/round_01" for name in ("start", "random", "margin")]
        assert len({json.dumps(asked(start)["regions"]) for start in starts}) == 1
        assert len({json.dumps(listing(start / "annotations")) for start in starts}) == 1
        for case in asked(starts[0])["regions"]:
            known = read_annotation(starts[0] / "annotations", case["case"])
            assert (VALUES[known] == truth(root, case["case"])).all()
        for name in ("random", "margin"):
            every = [r["case"] for n in (1, 2, 3) for r in asked(out / f"seed{seed}/{name}/round_0{n}")["regions"]]
            assert sorted(every) == [f"image_{n}" for n in range(6)]
    before = listing(out)
    monkeypatch.setattr(simulation, "run_script", None)
    monkeypatch.setattr(simulation, "Network", None)
    active_learning.main(words)
    assert in_order(capsys.readouterr().out) == in_order(first)
    assert {k: v for k, v in listing(out).items() if k != "curves.png"} == {
        k: v for k, v in before.items() if k != "curves.png"
    }
    text = refused(capsys, out, *simulated(root, out, budget=3)[:1], *simulated(root, out, budget=1)[3:])
    assert "another simulation (budget was 2 and is 1)" in text
    settings = json.loads((out / "simulation.json").read_text())
    (out / "simulation.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "per_case"}))
    for flag, limit in ({}, "even"), ({"per_case": 1}, 1):
        text = refused(capsys, out, "simulate", *simulated(root, out, **flag)[3:])
        assert f"another simulation (per_case was None and is {limit})" in text  # of a time before the flag
    own = tmp_path / "own.py"  # which was another one when this simulation began
    own.write_text("def margin(pool, n, rng):\n    return range(len(pool.windows.case))\n")
    (out / "simulation.json").write_text(json.dumps(settings | {"own.margin": "0123abcd"}))
    text = refused(capsys, out, "simulate", *simulated(root, out, strategies=f"margin {own}:margin")[3:])
    assert "another simulation (own.margin was 0123abcd and is " in text


def test_simulations_that_cannot_be(tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("def random(pool, n, rng):\n    return range(n)\n")
    same = Path(shutil.copytree(tmp_path, tmp_path / "more")) / "own.py"
    root, out = make_images(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    for changes, sentence in (
        ({"budget": 3}, "2 rounds after the first of --budget 3 need 9 regions, but there are 6; lower one"),
        (
            {"unit": "patch", "region": "4 4", "budget": 7, "per_case": 1},
            "--budget 7 is more than --per_case 1 of 6 cases",
        ),
        ({"strategies": "random best"}, "there is no strategy best"),
        ({"unit": "patch"}, "give --region and 2 sides in voxels"),
        ({"strategies": "random random"}, "--strategies: random is there twice, for the same folder; leave one out"),
        ({"strategies": f"random {own}:random {same}:random"}, "--strategies: own.random is there twice"),
        ({"seeds": "1 2 1"}, "--seeds: 1 is there twice"),
        ({"labelnum": 2}, "--labelnum is a flag of next, not of simulate: leave it out"),
        ({"seed": 2}, "--seed is a flag of next, not of simulate"),
        ({"script": "none"}, "none: no such training script"),
    ):
        assert sentence in refused(capsys, out, "simulate", *simulated(root, out, **changes)[3:])
    assert "simulate needs --root_path" in refused(capsys, out, "simulate")
    (root / "masks/image_4.png").unlink()
    assert "case image_4 has no mask" in refused(capsys, out, *simulated(root, out)[:1], *simulated(root, out)[3:])


DRIVER = """
import sys
import time
sys.path[:0] = PATHS
import active_learning, torch
from pathlib import Path
from mtseg.active import simulation
from mtseg.script import methods, processes

def run_here(words, log, **environment):
    methods.load_script(Path(words[0])).main([str(word) for word in words[1:]])

torch.set_num_threads(1)
simulation.run_script = run_here
active_learning.main(sys.argv[1:])
"""


def test_a_simulation_that_is_killed_gives_the_same_bits(tmp_path):
    """By events: before the first labels, in a training that has saved, in the next round, while all labels train."""
    root = make_images(tmp_path / "data")
    given = {"seeds": 3, "strategies": "margin", "rounds": 1}
    (tmp_path / "driver.py").write_text(DRIVER.replace("PATHS", repr(sys.path)))
    active_learning.main([str(word) for word in simulated(root, tmp_path / "whole", **given)])
    words = [tmp_path / "driver.py", *simulated(root, tmp_path / "out", **given)]
    events = (
        "start/round_01/selection.json",
        "start/round_01/run/model/*/*/latest.pth",
        "margin/round_02/taken.json",
        "all_labels/model/*/*/config.json",
    )
    finish_after_kills(words, tmp_path, [f"out/seed3/{event}" for event in events])
    there, here = weights_below(tmp_path / "whole"), weights_below(tmp_path / "out")
    assert len(there) == 3 and there.keys() == here.keys()
    for name, state in there.items():
        assert all(torch.equal(tensor, here[name][key]) for key, tensor in state.items()), name
    for name in (
        "records.json",
        "table.md",
        *(f"seed3/margin/round_0{n}/{f}" for n in (1, 2) for f in ("selection.json", "taken.json")),
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    for n in (1, 2):
        folder = f"seed3/margin/round_0{n}/annotations"
        assert listing(tmp_path / "whole" / folder) == listing(tmp_path / "out" / folder)


def test_images_in_hdf5_files(tmp_path, capsys):
    """As the built-in images lie: they know no spacing, and no file of the user's to copy."""
    root = make_phantom(tmp_path / "data", train=3, test=1, dims=2)
    out = tmp_path / "out"
    said(capsys, out, "next", "--root_path", root, "--unit", "patch", "--region", 64, 64, "--budget", 2)
    record = asked(out / "round_01")["cases"][0]
    assert record["axis"] is None and record["spacing"] is None
    assert Image.open(out / "round_01" / record["images"][0]).size == tuple(record["shape"][::-1])
