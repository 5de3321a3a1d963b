"""Stages: one command whatever kills it, the matrix against inference.py by hand, and a sentence for every mistake."""

import copy
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import stages
import torch
from conftest import TINY_2D, finish_after_kills, make_data, make_images, start_python
from PIL import Image

import inference
from mtseg.checkpoint import file_sha256
from mtseg.script import flags, methods, processes

ROOT = flags.HOME
SCRIPT = ROOT / "recipes/stages.py"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two image sets of the same classes, and one of others."""
    root = tmp_path_factory.mktemp("sets")
    make_images(root / "first", train=4)
    make_images(root / "second", train=5, test=1, shape=(23, 30))
    others = [{"name": name, "value": value, "color": [value] * 3} for value, name in enumerate("abc")]
    make_images(root / "third", train=4, classes={"classes": others, "background": 0})
    return root


def plan(sets, **changes):
    """Masked reconstruction and supervised training on one set, then Mean Teacher on another."""
    defaults = {**TINY_2D, "patch_size": [16, 16], "normalization": "groupnorm", "save_freq": 1, "max_iterations": 2}
    defaults |= {"consistency": 0.3, "base_lr": 0.1, "log_freq": 3, "labelnum": 2, "foreground_patches": 0.5}
    steps = [
        {"name": "pretrain", "script": "recipes/pretrain_masked.py", "flags": {"mask_block": 8}},
        {"name": "coarse", "script": "train_sup.py", "from": "pretrain", "parts": "encoder"},
        {"name": "target", "script": "train_mean_teacher.py", "from": "coarse"},
    ]
    steps[0]["flags"]["root_path"] = str(sets / "first")
    steps[1]["flags"] = {"root_path": str(sets / "first"), "labelnum": 3, "max_iterations": 16, "log_freq": None}
    steps[2]["flags"] = {"root_path": str(sets / "second"), "max_iterations": 10}
    return {"defaults": defaults, "stages": steps} | changes


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def weights_below(out):
    return {path.relative_to(out): torch.load(path, weights_only=True) for path in out.glob("*/model/*/*/*iter_*.pth")}


def run_here(words, log):
    """As processes.run_script, in this process, which has PyTorch loaded already."""
    log.parent.mkdir(parents=True, exist_ok=True)
    methods.load_script(Path(words[0])).main([str(word) for word in words[1:]])


def rows_of(path):
    """The cells of a Markdown table in a file."""
    return [line.strip("| ").split(" | ") for line in path.read_text().split("\n\n")[0].splitlines()]


def refused(capsys, path, *more):
    """The one sentence with which the stages in `path` end before anything is done."""
    with pytest.raises(SystemExit) as stopped:
        stages.main([str(path), "--output_dir", str(path.parent / "out"), *map(str, more)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def finished(sets, tmp_path_factory):
    """(folder, file) of stages that nobody has interrupted."""
    path = write(tmp_path_factory.mktemp("finished") / "phases.json", plan(sets))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_script", run_here)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        stages.main([str(path), "--output_dir", str(path.parent / "out")])
    return path.parent / "out", path


# --------------------------------------------------------------------------------------------------- what they compute


def test_stages_that_are_killed_twice_give_the_same_bits(sets, finished, tmp_path):
    """By events: in a stage that has saved, and in the next one before it has."""
    path = write(tmp_path / "phases.json", plan(sets, test=False))
    words = [SCRIPT, path, "--output_dir", tmp_path / "out"]
    finish_after_kills(words, tmp_path, ("out/coarse/model/*/*/latest.pth", "out/target/model/*/*/config.json"))
    there, here = weights_below(finished[0]), weights_below(tmp_path / "out")
    assert len(there) == 4 and there.keys() == here.keys()  # of Mean Teacher two
    for file, weights in there.items():
        assert weights.keys() == here[file].keys()
        assert all(torch.equal(tensor, here[file][name]) for name, tensor in weights.items()), file


def test_a_signal_to_all_lets_the_training_save(sets, tmp_path):
    """As a terminal or a batch system sends it: to this process and to the training, which gets it twice."""
    content = plan(sets, test=False)
    del content["stages"][0], content["stages"][1], content["stages"][0]["from"], content["stages"][0]["parts"]
    content["stages"][0]["flags"] |= {"max_iterations": 10**6, "save_freq": 10**6}
    words = [SCRIPT, write(tmp_path / "phases.json", content), "--output_dir", tmp_path / "out"]
    process = start_python(*words, out=tmp_path / "said", err=tmp_path / "bad")
    while not any(path.read_text().count("\n") > 2 for path in tmp_path.glob("out/coarse/model/*/*/metrics.csv")):
        assert process.poll() is None, (tmp_path / "bad").read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert (tmp_path / "bad").read_text() == "stopped by SIGTERM\n"
    (state,) = tmp_path.glob("out/coarse/model/*/*/latest.pth")
    assert torch.load(state, weights_only=True)["iteration"] >= 2


def test_the_matrix_is_what_inference_gives_by_hand(sets, finished, tmp_path, capsys):
    out, _ = finished
    header, _, *rows = rows_of(out / "stages.md")
    assert header == ["stage", "first", "second"] and [row[0] for row in rows] == ["coarse", "target"]
    assert len({cell for row in rows for cell in row[1:]} - {"0.00"}) == 4, rows
    assert [row[2].endswith("*") for row in rows] == [False, False] and rows[1][1].endswith("*")
    for stage, *cells in rows:
        (weights,) = out.glob(f"{stage}/model/*/*/iter_*.pth")
        for name, cell in zip(header[1:], cells, strict=True):
            words = ["--model_path", weights, "--root_path", sets / name, "--output_dir", tmp_path / stage / name]
            result, by_case = inference.main(words), {}
            for row in result["cases"]:
                by_case.setdefault(row["case"], []).append(row["dice"])
            mark = "*" if result["trained_on"] else ""  # the sets of this test have cases of the same names
            assert cell == f"{100 * np.mean([np.mean(dices) for dices in by_case.values()]):.2f}{mark}"


def test_what_is_finished_is_not_done_again(finished, monkeypatch, capsys):
    out, path = finished
    monkeypatch.setattr(stages, "run_script", None)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("model/**/*")}
    stages.main([str(path), "--output_dir", str(out)])
    printed = capsys.readouterr().out
    assert printed.count("done: ") == 3 and "its output" not in printed
    assert {file: file.stat().st_mtime_ns for file in out.rglob("model/**/*")} == before


def test_every_config_names_all_ancestors(finished):
    out, _ = finished
    (pretrained,), (coarse,) = out.glob("pretrain/model/*/*/iter_2.pth"), out.glob("coarse/model/*/*/iter_16.pth")
    (config,) = out.glob("target/model/*/*/config.json")
    chain = json.loads(config.read_text())["pretrained_from"]
    assert [one["file"] for one in chain] == [str(coarse), str(pretrained)]
    assert [one["sha256"] for one in chain] == [file_sha256(coarse), file_sha256(pretrained)]
    assert [one["parts"] for one in chain] == ["all", "encoder"]
    assert chain[0]["loaded"] > chain[1]["loaded"] > 10 and all("left_out" in one for one in chain)


def test_a_stage_takes_of_the_defaults_what_its_script_has_and_its_own_flags_first(finished):
    configs = {path.parts[-5]: json.loads(path.read_text()) for path in finished[0].glob("*/model/*/*/config.json")}
    assert [name for name, config in configs.items() if "consistency" in config] == ["target"]
    assert configs["target"]["consistency"] == 0.3 and configs["pretrain"]["max_iterations"] == 2
    assert configs["coarse"]["max_iterations"] == 16
    assert [configs[name]["log_freq"] for name in ("coarse", "target")] == [1, 3]
    assert [configs[name]["labelnum"] for name in ("pretrain", "coarse", "target")] == [0, 3, 2]
    assert [configs[name]["foreground_patches"] for name in ("pretrain", "coarse", "target")] == [0, 0.5, 0.5]


def test_the_best_weights_of_a_script_of_ones_own_and_data_of_other_classes(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "run_script", run_here)
    own = tmp_path / "train_mine.py"
    own.write_text((ROOT / "train_sup.py").read_text().replace('model="supervised"', 'model="mine"'))
    (tmp_path / "val.list").write_text("image_3\n")
    content = plan(sets)
    content["defaults"] |= {"max_iterations": 3}
    mine = {"root_path": str(sets / "first"), "labelnum": 2, "val_list": str(tmp_path / "val.list"), "val_freq": 1}
    content["stages"] = [{"name": "mine", "script": str(own), "flags": mine}]
    third = {"name": "third", "script": "train_sup.py", "from": "mine", "weights": "best", "parts": "network"}
    third["flags"] = {"root_path": str(sets / "third"), "labelnum": 2, "max_iterations": 1, "base_lr": 0}
    content["stages"].append(third)
    stages.main([str(write(tmp_path / "p.json", content)), "--output_dir", str(tmp_path / "out")])
    names = ("out/mine/model/*/*/mine_best_model.pth", "out/third/model/*/*/iter_1.pth")
    taken, left = (torch.load(next(tmp_path.glob(name)), weights_only=True) for name in names)
    assert all(torch.equal(taken[name], left[name]) for name in taken)
    _, _, mine, third = rows_of(tmp_path / "out/stages.md")
    assert (mine[0], third[0]) == ("mine", "third") and mine[2] == third[1] == "-"
    assert not list(tmp_path.glob("out/*/model/*/*/iter_*_*_test"))


def test_slices_and_volumes_of_the_same_data_are_each_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "run_script", run_here)
    root = make_data(tmp_path / "volumes")
    how = {"n_filters": 2, "num_workers": 0, "stride_xy": 16, "stride_z": 16, "progress": 0, "max_iterations": 1}
    how |= {"root_path": str(root), "labelnum": 2, "normalization": "groupnorm"}
    steps = [
        {"name": "flat", "script": "train_sup.py", "flags": {"dims": 2, "network": "unet", "patch_size": [16, 16]}},
        {"name": "solid", "script": "train_sup.py", "flags": {"patch_size": [16, 16, 16]}},
    ]
    path = write(tmp_path / "p.json", {"defaults": how, "stages": steps})
    stages.main([str(path), "--output_dir", str(tmp_path / "out")])
    _, _, *rows = rows_of(tmp_path / "out/stages.md")
    assert [row[0] for row in rows] == ["flat", "solid"] and all(re.fullmatch(r"[\d.]+", row[1]) for row in rows)


def test_data_of_another_stage_are_read_as_that_one_reads_them(sets, tmp_path, monkeypatch):
    """Here with --snap, on the GPU of the stage that is tested."""
    shutil.copytree(sets / "second", tmp_path / "second")
    case = (tmp_path / "second/test.list").read_text().strip()
    (mask,) = tmp_path.glob(f"second/masks/{case}.*")
    pixels = np.array(Image.open(mask))
    assert not (pixels == 11).any()
    pixels[0, 0] = 11  # near a class, and none
    Image.fromarray(pixels).save(mask)
    commands = []
    monkeypatch.setattr(stages, "run_script", lambda words, log: (commands.append(words), run_here(words, log)))
    steps = plan(sets)["stages"][1:]
    del steps[0]["from"], steps[0]["parts"]
    steps[0]["flags"] |= {"max_iterations": 1, "gpu": "3"}
    steps[1]["flags"] |= {"max_iterations": 1, "root_path": str(tmp_path / "second"), "snap": True}
    stages.main([str(write(tmp_path / "p.json", plan(sets, stages=steps))), "--output_dir", str(tmp_path / "out")])
    _, _, *rows = rows_of(tmp_path / "out/stages.md")
    assert len(rows) == 2 and all(re.fullmatch(r"[\d.]+\*?", cell) for row in rows for cell in row[1:])
    tests = [words for words in commands if "--model_path" in words]
    assert [words[words.index("--gpu") + 1] for words in tests] == ["3", "3", "0", "0"]


def test_a_stage_that_stopped_early_is_done_once(sets, tmp_path, monkeypatch):
    """Also with --keep_last, which leaves weights of the last iteration in a run that was cut off, too."""
    monkeypatch.setattr(stages, "run_script", run_here)
    (tmp_path / "val.list").write_text("image_3\n")
    stage = plan(sets)["stages"][1]
    del stage["from"], stage["parts"]
    stage["flags"] |= {"val_list": str(tmp_path / "val.list"), "val_freq": 1, "base_lr": 0, "patience": 2}
    content = plan(sets, stages=[stage], test=False)
    content["defaults"] |= {"keep_last": 2}
    words = [str(write(tmp_path / "p.json", content)), "--output_dir", str(tmp_path / "out")]
    stages.main(words)
    (last,) = tmp_path.glob("out/coarse/model/*/*/iter_3.pth")
    assert methods.trained_weights(tmp_path / "out/coarse") == last
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    stages.main(words)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    last.unlink()
    assert methods.trained_weights(tmp_path / "out/coarse") is None  # killed before it was written
    stages.main(words)
    assert methods.trained_weights(tmp_path / "out/coarse") == last
    state = torch.load(last.with_name("latest.pth"), weights_only=True)
    torch.save(state | {"progress": state["progress"] | {"waited": 1}}, last.with_name("latest.pth"))
    assert methods.trained_weights(tmp_path / "out/coarse") is None


# ------------------------------------------------------------------------------------------------------------ the plan


def test_a_dry_run_says_what_the_trainings_then_load_and_writes_nothing(sets, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages.main([str(write(tmp_path / "phases.json", plan(sets))), "--dry_run"])
    table, said = capsys.readouterr().out.split("\n\n", 1)
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["pretrain", "pretrain_masked.py", "first", "2", "scratch", "-"],
        ["coarse", "train_sup.py", "first", "16", "pretrain,", "last", "encoder"],
        ["target", "train_mean_teacher.py", "second", "10", "coarse,", "last", "all"],
    ]
    (config,) = finished[0].glob("target/model/*/*/config.json")
    target, coarse = (one["loaded"] for one in json.loads(config.read_text())["pretrained_from"])
    last = "phases/coarse/model/first_unet_3_labeled/supervised/iter_16.pth"
    assert said.splitlines()[0].startswith(f"coarse begins with {coarse} weights of its encoder")
    assert f"target begins with {target} weights of all but its last layer" in said
    assert f"{last} (once it is there)" in said
    assert [*tmp_path.iterdir()] == [tmp_path / "phases.json"]


def test_the_example_is_a_plan_that_can_be_run(sets, tmp_path, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    for name, source in (("superalloy", "first"), ("uhcs", "second")):
        (tmp_path / "data" / name).symlink_to(sets / source)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for path in sorted((ROOT / "configs").glob("stages_*.json")):
        stages.main([str(path), "--dry_run"])
        assert "train_mean_teacher.py  second" in capsys.readouterr().out


CIRCLE = [{"name": "a", "script": "train_sup.py", "from": "b"}, {"name": "b", "script": "train_sup.py", "from": "a"}]
STAGE = {"name": "coarse"}  # changes to a stage: the one of this name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": CIRCLE}, ["a, b, a form a circle"]),
        ({"stages": [CIRCLE[0], {"name": "b", "script": "train_sup.py"}]}, ["stage a is from b", "comes after it"]),
        ({"stages": [{"name": "a", "script": "train_sup.py"}] * 2}, ["two stages a"]),
        ({"stages": [{"name": "a", "script": "train_sup.py", "from": "a"}] * 2}, ["two stages a"]),
        ({"stages": [{"name": "../a", "script": "train_sup.py"}]}, ["'../a'", "folder"]),
        ({"stages": [{"name": "a"}]}, ["stage 1 has no script"]),
        ({"stages": []}, ["has no stages"]),
        ({"stages": ["a"]}, ['stage 1 is "a"', "an object"]),
        ({"stges": []}, ["'stges'", "did you mean stages?"]),
        ({"test": 1}, ["test cannot be 1", "true or false"]),
        (STAGE | {"form": "pretrain"}, ["stage 2", "'form'", "did you mean from?"]),
        (STAGE | {"parts": "decoder"}, ['parts cannot be "decoder"', "encoder, all, network"]),
        (STAGE | {"script": "train_nothing.py"}, ["stage coarse: train_nothing.py: no such training script"]),
        (STAGE | {"script": "benchmarks/table.py"}, ["stage coarse", "table.py: cannot be loaded"]),
        (STAGE | {"from": "nothing.pth"}, ["stage coarse: nothing.pth: there is neither such a file nor such a stage"]),
        (STAGE | {"from": str(SCRIPT)}, ["stage coarse", "stages.py: not a whole checkpoint"]),
        (STAGE | {"from": None}, ["from cannot be null"]),
        (STAGE | {"weights": "best"}, ["pretrain is pretraining, which knows no best weights"]),
        ({"name": "target", "weights": "best"}, ["stage target: coarse has no --val_list"]),
        (STAGE | {"flags": {"base_rl": 1}}, ["coarse: train_sup.py has no flag --base_rl; did you mean --base_lr?"]),
        (STAGE | {"flags": {"consistency": 1}}, ["has no flag --consistency; --consistency is a flag of"]),
        (STAGE | {"flags": {"base_lr": "high"}}, ["stage coarse", "--base_lr", "high"]),
        (STAGE | {"flags": {"base_lr": {}}}, ["stage coarse", "base_lr cannot be {}"]),
        (STAGE | {"flags": {"pretrained": "x"}}, ["stage coarse: --pretrained is given by the stages themselves"]),
        (STAGE | {"flags": {"root_path": "nowhere"}}, ["stage coarse: nowhere: no such folder"]),
        (STAGE | {"flags": {"labelnum": 40}}, ["stage coarse: --labelnum 40 is more than"]),
        (STAGE | {"flags": {"val_list": "no.list"}}, ["stage coarse: --val_list no.list: no such file"]),
        (STAGE | {"flags": {"patch_size": [20, 20]}}, ["stage coarse: --patch_size 20 20"]),
        (STAGE | {"flags": {"network": "own.py:Net"}}, ["stage coarse", "own.py"]),
        ({"name": "pretrain", "flags": {"mask_block": 7}}, ["stage pretrain: --mask_block 7"]),
        ({"defaults": {"base_rl": 1}}, ["defaults: no script has a flag --base_rl; did you mean --base_lr?"]),
        ({"defaults": {"output_dir": "x"}}, ["--output_dir is given by the stages themselves"]),
    ],
)
def test_a_mistake_ends_in_a_sentence_before_the_first_stage(sets, tmp_path, capsys, changes, words):
    content = plan(sets)
    if name := changes.get("name"):
        stage = next(stage for stage in content["stages"] if stage["name"] == name)
        changes = copy.deepcopy(changes)
        stage["flags"] |= changes.pop("flags", {})
        stage |= changes
    else:
        content |= changes | ({"defaults": content["defaults"] | changes["defaults"]} if "defaults" in changes else {})
    said = refused(capsys, write(tmp_path / "wrong.json", content))
    assert "wrong.json" in said and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()
    assert refused(capsys, tmp_path / "wrong.json", "--dry_run") == said


def test_a_file_that_is_not_there_or_no_json_and_test_cases_that_are_not_there(sets, tmp_path, capsys):
    assert "none.json: no such file" in refused(capsys, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json: not a JSON file" in refused(capsys, tmp_path / "bad.json")
    content = plan(sets)
    shutil.copytree(sets / "second", tmp_path / "second")
    with open(tmp_path / "second/test.list", "a") as file:
        file.write("nobody\n")
    content["stages"][2]["flags"]["root_path"] = str(tmp_path / "second")
    said = refused(capsys, write(tmp_path / "p.json", content))
    assert "stage target" in said and "nobody" in said
    content["test"] = False
    stages.main([str(write(tmp_path / "p.json", content)), "--dry_run"])


def test_from_scratch_or_from_a_file_there_is_no_choice_of_weights(sets, finished, tmp_path, capsys):
    content = plan(sets)
    del content["stages"][1]["from"]
    assert '"parts" or "weights" without "from"' in refused(capsys, write(tmp_path / "p.json", content))
    (file,) = finished[0].glob("pretrain/model/*/*/iter_2.pth")
    content["stages"][1] |= {"from": str(file), "weights": "last"}
    assert '"weights" with a file in "from"' in refused(capsys, write(tmp_path / "p.json", content))
    del content["stages"][1]["weights"]
    stages.main([str(write(tmp_path / "p.json", content)), "--dry_run"])
    assert file_sha256(file)[:12] in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- stages that have begun


def test_a_stage_that_has_begun_must_stay_what_it_is(sets, finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "out")
    path = tmp_path / "p.json"
    for changes, words in (
        ({"flags": {"base_lr": 0.5}}, ["coarse has begun as another (base_lr is 0.5 and was 0.1)"]),
        ({"parts": "all"}, ['pretrained_parts is "all" and was "encoder"']),
        ({"script": "train_mean_teacher.py"}, ['script is "train_mean_teacher.py" and was "train_sup.py"']),
    ):
        content = plan(sets)
        content["stages"][1]["flags"] |= changes.pop("flags", {})
        content["stages"][1] |= changes
        said = refused(capsys, write(path, content))
        assert all(word in said for word in words) and "another --output_dir" in said, said
    content = plan(sets)
    content["defaults"] |= {"num_workers": 1, "save_freq": 7}  # how, not what
    stages.main([str(write(path, content)), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    # Other weights in the place of those that the last stage began with.
    (file,) = tmp_path.glob("out/coarse/model/*/*/iter_16.pth")
    changed = torch.load(file, weights_only=True)
    changed[next(iter(changed))] += 1
    torch.save(changed, file)
    assert "target: began with other weights than those in" in refused(capsys, write(path, plan(sets)))
    (tmp_path / "out/pretrain/stage.json").unlink()
    assert "pretrain holds runs that are of no stage" in refused(capsys, path)


def test_pretraining_on_a_folder_without_lists_is_checked(sets, tmp_path, capsys):
    content = plan(sets)
    shutil.copytree(sets / "first", tmp_path / "first")
    (tmp_path / "first/train.list").unlink()
    content["stages"][0]["flags"]["root_path"] = str(tmp_path / "first")
    stages.main([str(write(tmp_path / "p.json", content)), "--dry_run"])
    assert re.search(r"coarse begins with \d+ weights of its encoder", capsys.readouterr().out)


def test_a_stage_whose_teacher_has_learned_before_is_done_once(sets, finished, tmp_path, monkeypatch):
    (teacher,) = finished[0].glob("coarse/model/*/*/iter_16.pth")
    given = {"root_path": str(sets / "first"), "teacher_checkpoint": str(teacher)}
    stage = {"name": "only", "script": "train_mean_teacher.py", "flags": given}
    words = [str(write(tmp_path / "p.json", plan(sets, stages=[stage]))), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(stages, "run_script", run_here)
    stages.main(words)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}
    stages.main(words)
    assert before and before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pth")}


def test_a_stage_that_fails_is_named_with_its_sentence(sets, finished, tmp_path, capsys):
    content = plan(sets, test=False)
    (file,) = finished[0].glob("pretrain/model/*/*/iter_2.pth")
    content["stages"] = [content["stages"][1] | {"script": "recipes/train_cps.py", "from": str(file), "parts": "all"}]
    said = refused(capsys, write(tmp_path / "p.json", content))
    assert "train_cps.py ended with exit code 2 (error: --pretrained: both networks" in said
    assert "out/coarse/train.log" in said
    stages.main([str(tmp_path / "p.json"), "--output_dir", str(tmp_path / "out"), "--dry_run"])  # may be mended


def test_a_scripts_sentence_is_found_among_the_progress_of_another(tmp_path):
    """Of a training whose stages.py was killed alone, and that is still at work in the folder and in the log."""
    (tmp_path / "own.py").write_text(r"raise SystemExit(print('1%| [00:01]error: busy\n\r2%| [00:02]', end='') or 2)")
    (tmp_path / "log").write_text("error: of before\n")
    with pytest.raises(processes.ScriptError, match=r"own.py ended with exit code 2 \(error: busy\); all"):
        processes.run_script([tmp_path / "own.py"], tmp_path / "log")


def test_weights_of_another_family_are_refused_before_the_first_stage(sets, tmp_path, capsys):
    """From a file, and from a stage that there is not yet. A script of one's own may make any network."""
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "other.pth")
    content = plan(sets)
    content["stages"][1]["from"] = str(tmp_path / "other.pth")
    assert "stage coarse" in (said := refused(capsys, write(tmp_path / "p.json", content)))
    assert "other.pth: only 0 of the encoder's" in said
    content = plan(sets)
    content["stages"][1]["flags"] |= {"n_filters": 4}
    said = refused(capsys, write(tmp_path / "p.json", content))
    assert "stage coarse" in said and "masked/iter_2.pth: only 0 of the encoder's" in said
    shutil.copy(ROOT / "train_sup.py", tmp_path / "train_own.py")
    content["stages"] = content["stages"][:2]
    content["stages"][1]["script"] = str(tmp_path / "train_own.py")
    stages.main([str(write(tmp_path / "p.json", content)), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    assert "coarse begins with the weights of its encoder" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
