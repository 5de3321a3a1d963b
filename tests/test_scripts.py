"""The scripts as people use them, end to end on tiny volumes: results, resuming, mistakes."""

import csv
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, make_data, start_python

import inference
import train_mean_teacher
import train_sup
from mtseg.datasets import LAHeart
from mtseg.losses import softmax_mse_loss
from mtseg.metrics import calculate_metric_percase
from mtseg.script import flags as script_flags
from mtseg.script import sources

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"MT": train_mean_teacher, "supervised": train_sup}


def flags(data, out, **changes):
    given = {**TINY, "root_path": data, "output_dir": out, "labelnum": 3, "max_iterations": 6, "save_freq": 2}
    given |= changes
    return [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]


def folder_of(out, model, labelnum=3):
    return out / "model" / f"LA_vnet_{labelnum}_labeled" / model


def assert_same_weights(a, b, name):
    first, second = (torch.load(folder / name, weights_only=True) for folder in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def rows(folder, name="metrics.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def timeless(folder):
    times = {"iterations_per_second", "data_seconds", "step_seconds", "peak_memory_mb"}
    return [{k: v for k, v in row.items() if k not in times} for row in rows(folder)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both scripts run once without interruption."""
    out = tmp_path_factory.mktemp("runs")
    data = make_data(out / "data")
    for script in SCRIPTS.values():
        script.main(flags(data, out))
    return data, out


# ----------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("model", SCRIPTS)
def test_a_run_writes_what_it_says(runs, model):
    _, out = runs
    folder = folder_of(out, model)
    names = {".lock", "config.json", "log.txt", "metrics.csv", "latest.pth", "iter_6.pth"} | (
        {"ema_iter_6.pth"} if model == "MT" else set()
    )
    assert {p.name for p in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["labelnum"] == 3
    assert config["torch"] == torch.__version__
    assert config["selection"] == "last iteration"
    assert [int(row["iteration"]) for row in rows(folder)] == list(range(1, 7))
    first = rows(folder)[0]
    assert float(first["lr"]) == 0.01
    supervised = 0.5 * (float(first["loss_ce"]) + float(first["loss_dice"]))
    if model == "MT":
        assert float(first["consistency_weight"]) == pytest.approx(0.1 * math.exp(-5))
        supervised += float(first["consistency_weight"]) * float(first["consistency_dist"])
    assert float(first["loss"]) == pytest.approx(supervised, rel=1e-5)
    assert "no GPU" in (folder / "log.txt").read_text() or torch.cuda.is_available()


def test_the_teacher_is_the_average_of_students(tmp_path, data):
    """Recomputed from the students of each iteration, in double precision."""
    average = None
    for n in range(1, 5):
        train_mean_teacher.main(flags(data, tmp_path / str(n), max_iterations=n))
        student = torch.load(folder_of(tmp_path / str(n), "MT") / f"iter_{n}.pth", weights_only=True)
        alpha = min(1 - 1 / n, 0.99)
        now = {k: v.double() for k, v in student.items()}
        average = now if average is None else {k: alpha * average[k] + (1 - alpha) * now[k] for k in now}
    teacher = torch.load(folder_of(tmp_path / "4", "MT") / "ema_iter_4.pth", weights_only=True)
    for name in ("block_one.conv.0.weight", "block_five_up.conv.1.bias", "out_conv.weight"):
        torch.testing.assert_close(teacher[name].double(), average[name], rtol=1e-5, atol=1e-6)


def test_learning_rate_falls_to_a_tenth_every_lr_step(tmp_path, data):
    train_sup.main(flags(data, tmp_path, lr_step=2))
    lrs = [float(row["lr"]) for row in rows(folder_of(tmp_path, "supervised"))]
    assert lrs == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_the_consistency_weight_changes_every_150_iterations(tmp_path, data):
    train_mean_teacher.main(flags(data, tmp_path, max_iterations=2, consistency_rampup=3, consistency=2))
    folder = folder_of(tmp_path, "MT")
    state = torch.load(folder / "latest.pth", weights_only=True)
    torch.save({**state, "iteration": 149}, folder / "latest.pth")
    resumed = flags(data, tmp_path, max_iterations=151, consistency_rampup=3, consistency=2)
    train_mean_teacher.main([*resumed, "--resume"])
    weights = [float(row["consistency_weight"]) for row in rows(folder)]
    first, second = 2 * math.exp(-5), 2 * math.exp(-5 * (2 / 3) ** 2)
    assert weights == pytest.approx([first, first, first, second])


@pytest.mark.parametrize("channels", [1, 2])
def test_unet_kl_and_several_channels_and_classes(tmp_path, channels):
    data = make_data(tmp_path / "data", channels=channels)
    extra = {"network": "unet", "consistency_type": "kl", "num_classes": 3}
    folder = train_mean_teacher.main(flags(data, tmp_path, max_iterations=1, **extra))
    result = inference.main(["--model_path", str(folder / "iter_1.pth")])
    assert {row["class"] for row in result["cases"]} == {1, 2}
    assert result["network"]["n_channels"] == channels


def test_it_learns(tmp_path):
    """Sixty iterations find a bright ball; the untrained network does not."""
    data = make_data(tmp_path / "data", train=4)
    extra = {"n_filters": 4, "base_lr": 0.05, "save_freq": 100}
    scores = {}
    for n in (1, 60):
        folder = train_sup.main([*flags(data, tmp_path / str(n), max_iterations=n, **extra)])
        scores[n] = inference.main(["--model_path", str(folder / f"iter_{n}.pth")])["summary"][0]["dice"]["mean"]
    assert scores[60] > 0.7 > 0.4 > scores[1]


# ------------------------------------------------------------------------------------------- same seed, same numbers


@pytest.mark.parametrize("model", SCRIPTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_weights_with_any_workers(runs, tmp_path, model, workers):
    data, out = runs
    SCRIPTS[model].main(flags(data, tmp_path, num_workers=workers))
    a, b = folder_of(out, model), folder_of(tmp_path, model)
    assert_same_weights(a, b, "iter_6.pth")
    assert timeless(a) == timeless(b)


def test_another_seed_gives_others(runs, tmp_path):
    data, out = runs
    train_sup.main(flags(data, tmp_path, seed=1))
    with pytest.raises(AssertionError):
        assert_same_weights(folder_of(out, "supervised"), folder_of(tmp_path, "supervised"), "iter_6.pth")


def start(script, arguments, until):
    """Start a script in a process of its own, wait until metrics.csv has `until` rows, return the process."""
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    folder.mkdir(exist_ok=True)
    process = start_python(ROOT / f"{script.__name__}.py", *arguments, out=folder / "out", err=folder / "err")
    deadline = time.time() + 600
    while time.time() < deadline and process.poll() is None:
        for path in folder.glob("model/*/*/metrics.csv"):
            if len(path.read_text().splitlines()) > until:
                return process
        time.sleep(0.002)
    raise AssertionError((folder / "err").read_text())


@pytest.fixture(scope="module")
def whole_run(runs, tmp_path_factory):
    return train_mean_teacher.main(flags(runs[0], tmp_path_factory.mktemp("whole"), max_iterations=40))


# Before latest.pth is there and after. That other methods resume to the bit is tested where nothing is killed.
@pytest.mark.parametrize("until", [1, 5])
def test_a_killed_run_resumes_to_the_same_weights(runs, whole_run, tmp_path, until):
    arguments = flags(runs[0], tmp_path, max_iterations=40, save_freq=3, num_workers=1)
    process = start(train_mean_teacher, arguments, until)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    a, b = whole_run, folder_of(tmp_path, "MT")
    assert not (b / "iter_40.pth").exists()
    with open(b / "metrics.csv", "a") as file:
        file.write("41,0.0")  # as a crash in the middle of a line would leave it
    train_mean_teacher.main([*arguments, "--resume"])
    assert_same_weights(a, b, "iter_40.pth")
    assert_same_weights(a, b, "ema_iter_40.pth")
    assert timeless(a) == timeless(b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(runs, tmp_path, number):
    data, _ = runs
    arguments = flags(data, tmp_path, max_iterations=1000, save_freq=1000, num_workers=2)
    process = start(train_mean_teacher, arguments, 3)
    os.killpg(process.pid, number)  # to the workers as well, as a terminal and a batch system do
    err = (tmp_path / "err").read_text
    assert process.wait() == 128 + number, err()
    assert "Traceback" not in err()
    command = shlex.split(next(line for line in (tmp_path / "out").open() if line.endswith("--resume\n")))
    state = torch.load(folder_of(tmp_path, "MT") / "latest.pth", weights_only=True)
    assert state["iteration"] == len(rows(folder_of(tmp_path, "MT")))
    stop = state["iteration"] + 1
    command[command.index("--max_iterations") + 1] = str(stop)
    assert start_python(*command[1:], out=os.devnull, err=tmp_path / "err").wait() == 0, err()
    assert (folder_of(tmp_path, "MT") / f"iter_{stop}.pth").exists()


# ---------------------------------------------------------------------------------------------------------- mistakes


def sentence(capsys, main, arguments):
    """Run `main`, which must end with exit code 2 and one sentence, and return that sentence."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labelnum": 6}, ["--labelnum 6", "6 training cases", "train_sup.py"]),
        ({"labelnum": 60}, ["--labelnum 60", "train.list"]),
        ({"labeled_bs": 4}, ["--labeled_bs 4", "--batch_size 4"]),
        ({"labeled_bs": 0}, ["--labeled_bs 0"]),
        ({"labelnum": 1}, ["--labelnum 1", "--labeled_bs 2"]),
        ({"patch_size": "16 16 20"}, ["--patch_size", "20", "multiple of 16"]),
        ({"max_iterations": 0}, ["--max_iterations"]),
        ({"num_classes": 1}, ["--num_classes"]),
        ({"batch_size": 3}, ["--patch_size 16 16 16", "batchnorm"]),
        ({"normalization": "instancenorm"}, ["--patch_size 16 16 16", "instancenorm"]),
        ({"ema_decay": 1.5}, ["--ema_decay", "between 0 and 1"]),
        ({"root_path": "/nowhere"}, ["/nowhere", "no such folder"]),
        ({"val_list": "/nowhere/val.list"}, ["/nowhere/val.list"]),
        ({"exp": "../a"}, ["--exp", "path"]),
        ({"num_clases": 3}, ["--num_clases"]),
    ],
)
def test_impossible_flags(capsys, data, tmp_path, changes, words):
    said = sentence(capsys, train_mean_teacher.main, flags(data, tmp_path / "out", **changes))
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_too_many_labels_for_supervised_training(capsys, data, tmp_path):
    said = sentence(capsys, train_sup.main, flags(data, tmp_path, labelnum=7))
    assert "--labelnum 7" in said
    assert "6 training cases" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_volume_met_in_training(capsys, data, tmp_path, workers):
    with h5py.File(data / "data/case_1/mri_norm2.h5", "a") as file:
        file["label"][0, 0, 0] = 2
    said = sentence(capsys, train_mean_teacher.main, flags(data, tmp_path, num_workers=workers))
    assert "case_1" in said
    assert "--num_classes" in said


def test_a_run_is_not_overwritten_by_accident(capsys, runs):
    data, out = runs
    before = (folder_of(out, "MT") / "latest.pth").read_bytes()
    said = sentence(capsys, train_mean_teacher.main, flags(data, out))
    assert "--resume" in said
    assert "--overwrite" in said
    said = sentence(capsys, train_mean_teacher.main, [*flags(data, out), "--resume", "--overwrite"])
    assert "--resume with --overwrite: one goes on, the other starts anew; leave one out" in said
    assert (folder_of(out, "MT") / "latest.pth").read_bytes() == before


def test_only_the_same_run_is_resumed(capsys, runs):
    data, out = runs
    for changes, words in [
        ({"seed": 3}, ["--seed is 3 and was 1337"]),
        ({"n_filters": 4}, ["--n_filters is 4 and was 2"]),
        ({"max_iterations": 5}, ["iteration 6", "--max_iterations 5"]),
    ]:
        said = sentence(capsys, train_mean_teacher.main, [*flags(data, out, **changes), "--resume"])
        assert all(word in said for word in words), said
    weights = str(folder_of(out, "MT") / "iter_6.pth")
    said = sentence(capsys, train_mean_teacher.main, [*flags(data, out), "--resume", weights])
    assert "latest.pth" in said


def test_a_loss_that_is_not_a_number_stops_the_run(capsys, monkeypatch, data, tmp_path):
    calls = []

    def diverging(a, b):
        calls.append(1)
        return softmax_mse_loss(a, b) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setitem(train_mean_teacher.DISTANCES, "mse", diverging)
    said = sentence(capsys, train_mean_teacher.main, flags(data, tmp_path))
    assert "nan at iteration 4" in said
    assert "latest.pth" in said
    state = torch.load(folder_of(tmp_path, "MT") / "latest.pth", weights_only=True)
    assert state["iteration"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_are_not_numbers_are_not_saved(capsys, data, tmp_path):
    train_sup.main(flags(data, tmp_path, max_iterations=1))
    arguments = flags(data, tmp_path, max_iterations=9, save_freq=1)
    latest = folder_of(tmp_path, "supervised") / "latest.pth"
    state = torch.load(latest, weights_only=True)
    for momentum in state["optimizer"]["state"].values():
        momentum["momentum_buffer"].fill_(1e38)  # the next step overflows, after a loss that is a number
    torch.save({**state, "iteration": 1}, latest)
    said = sentence(capsys, train_sup.main, [*arguments, "--resume"])
    assert "iteration" in said
    assert all(v.isfinite().all() for v in torch.load(latest, weights_only=True)["model"].values())


def test_a_run_whose_weights_grow_beyond_all_bounds_does_not_end_as_a_success(capsys, data, tmp_path):
    message = sentence(capsys, train_sup.main, flags(data, tmp_path, base_lr=1e14, max_iterations=1))
    assert "the weights reach" in message and "--base_lr" in message
    assert not list(folder_of(tmp_path, "supervised").glob("*.pth"))


def test_a_full_disk_in_a_run_leaves_the_last_checkpoint(capsys, data, tmp_path):
    train_sup.main(flags(data, tmp_path, max_iterations=2))
    folder = folder_of(tmp_path, "supervised")
    before = (folder / "latest.pth").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        said = sentence(capsys, train_sup.main, [*flags(data, tmp_path, max_iterations=4), "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "latest.pth: could not be saved" in said
    assert (folder / "latest.pth").read_bytes() == before


def test_overwrite_leaves_nothing_of_the_old_run_to_resume_from(capsys, data, tmp_path):
    folder = train_sup.main(flags(data, tmp_path))
    (data / "data/case_0/mri_norm2.h5").rename(data / "moved")
    sentence(capsys, train_sup.main, [*flags(data, tmp_path, seed=1), "--overwrite"])
    assert (folder / "iter_6.pth").exists()  # a mistake costs nothing
    (data / "moved").rename(data / "data/case_0/mri_norm2.h5")
    train_sup.main([*flags(data, tmp_path, seed=1, max_iterations=1), "--overwrite"])
    assert not (folder / "iter_6.pth").exists()
    assert len(rows(folder)) == 1
    (folder / "latest.pth").unlink()
    said = sentence(capsys, train_sup.main, [*flags(data, tmp_path, seed=1), "--resume"])
    assert "no latest.pth" in said


def test_a_run_goes_on_with_its_own_cases_only(capsys, data, tmp_path):
    train_mean_teacher.main(flags(data, tmp_path))
    cases = (data / "train.list").read_text().split()
    (data / "train.list").write_text("\n".join(reversed(cases)))
    said = sentence(capsys, train_mean_teacher.main, [*flags(data, tmp_path, max_iterations=7), "--resume"])
    assert "other cases" in said
    (data / "train.list").write_text("\n".join(cases))
    shutil.move(data, tmp_path / "elsewhere")
    train_mean_teacher.main([*flags(tmp_path / "elsewhere", tmp_path, max_iterations=7), "--resume"])


def test_a_folder_that_cannot_be_made(capsys, data, tmp_path):
    (tmp_path / "file").write_text("")
    said = sentence(capsys, train_sup.main, flags(data, tmp_path / "file"))
    assert "--output_dir" in said


def test_one_process_a_run(capsys, data, tmp_path):
    arguments = flags(data, tmp_path, max_iterations=1000)
    process = start(train_sup, arguments, 1)
    try:
        said = sentence(capsys, train_sup.main, [*arguments, "--overwrite"])
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert "another process is training there" in said


# --------------------------------------------------------------------------------------------------------- validation


def test_validation_keeps_the_best_and_confesses_the_test_set(tmp_path, data):
    for name, cases, selection in [("val", ["case_4", "case_5"], "validation list"), ("test", ["case_6"], "test set")]:
        (tmp_path / f"{name}.list").write_text("\n".join(cases))
        out = tmp_path / name
        folder = train_mean_teacher.main(flags(data, out, labelnum=2, val_list=tmp_path / f"{name}.list", val_freq=2))
        log = (folder / "log.txt").read_text()
        assert log.count("validation Dice of the teacher") == 3
        # The first validation is a new best of both networks; the log says so, with its iteration.
        assert re.search(r"iteration 2: validation Dice of the student 0\.\d+, the best so far", log)
        assert ("selected on the test set" in log) == (name == "test")
        assert (folder / "ema_MT_best_model.pth").exists()
        result = inference.main(["--model_path", str(folder / "MT_best_model.pth")])
        assert result["selection"] == selection
        written = json.loads((folder / "MT_best_model_test/metrics.json").read_text())
        assert written["selection"] == selection
        last = inference.main(["--model_path", str(folder / "iter_6.pth")])
        assert last["selection"] == ("last iteration" if name == "val" else "test set")
        # On the cases of --val_list: what was chosen by them, and the last weights, which nobody chose.
        (data / "val.list").write_text("\n".join(cases))
        for weights, chosen in (("MT_best_model", "test set"), ("iter_6", last["selection"]), ("iter_3", "test set")):
            if weights == "iter_3":
                shutil.copy(folder / "iter_6.pth", folder / "iter_3.pth")
            tested = inference.main(["--model_path", str(folder / f"{weights}.pth"), "--split", "val"])
            assert tested["selection"] == chosen


@pytest.mark.parametrize(("patience", "ends"), [(50, 6), (2, 3)])
def test_weights_from_before_the_end_are_not_called_the_last_iteration(tmp_path, data, patience, ends):
    (tmp_path / "val.list").write_text("case_5\n")
    # At a rate of 0 nothing moves: the first validation is the best, the second and the third wait.
    settings = {"base_lr": 0, "normalization": "groupnorm", "val_list": tmp_path / "val.list", "val_freq": 1}
    settings |= {"labelnum": 2, "save_freq": 2, "keep_last": 3, "patience": patience}
    folder = train_sup.main(flags(data, tmp_path, **settings))
    told = {path.name: inference.main(["--model_path", str(path)])["selection"] for path in folder.glob("iter_*.pth")}
    expected = {f"iter_{n}.pth": f"iteration {n} of 6" for n in range(2, ends, 2)}
    assert told == {**expected, f"iter_{ends}.pth": "last iteration"}
    (folder / f"iter_{ends}.pth").unlink()  # as if it had been cut off
    assert inference.main(["--model_path", str(folder / "iter_2.pth")])["selection"] == "iteration 2 of 6"


def test_validation_changes_no_weights(runs, tmp_path):
    data, out = runs
    (tmp_path / "val.list").write_text("case_6\n")
    train_mean_teacher.main(flags(data, tmp_path, val_list=tmp_path / "val.list", val_freq=1))
    assert_same_weights(folder_of(out, "MT"), folder_of(tmp_path, "MT"), "iter_6.pth")


# ---------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("format", ["hdf5", "nifti"])
def test_inference_measures_and_saves(runs, tmp_path, format, capsys):
    data, out = runs
    weights = folder_of(out, "MT") / "ema_iter_6.pth"
    arguments = ["--model_path", weights, "--save_result", tmp_path / "saved", "--save_format", format]
    if format == "nifti":
        nibabel = pytest.importorskip("nibabel")
    inference.main([*map(str, arguments), "--output_dir", str(tmp_path / "results")])
    result = json.loads((tmp_path / "results/metrics.json").read_text())
    assert result["selection"] == "last iteration"
    assert len(result["checkpoint_sha256"]) == 64
    assert result["protocol"] == {"patch_size": [16, 16, 16], "stride_xy": 8, "stride_z": 8}
    assert [row["case"] for row in rows(tmp_path / "results")] == ["case_6", "case_7"]
    assert "case_7" in capsys.readouterr().out
    for row in result["cases"]:
        if format == "hdf5":
            with h5py.File(tmp_path / "saved" / f"{row['case']}.h5") as file:
                saved = {name: file[name][...] for name in ("image", "label", "prediction")}
        else:
            paths = {
                name: tmp_path / "saved" / f"{row['case']}_{name}.nii.gz" for name in ("image", "label", "prediction")
            }
            saved = {name: np.asarray(nibabel.load(path).dataobj) for name, path in paths.items()}
        true = LAHeart(data).read(row["case"])
        assert all(np.array_equal(saved[name], true[name]) for name in true)
        expected = calculate_metric_percase(saved["prediction"], true["label"])
        measured = [math.nan if row[name] is None else row[name] for name in ("dice", "jaccard", "hd95", "asd")]
        np.testing.assert_allclose(measured, expected)


def test_an_empty_prediction_is_counted_not_fatal(runs, tmp_path, capsys):
    data, out = runs
    weights = torch.load(folder_of(out, "MT") / "iter_6.pth", weights_only=True)
    weights["out_conv.weight"].zero_()
    weights["out_conv.bias"].copy_(torch.tensor([1.0, 0.0]))
    torch.save(weights, tmp_path / "empty.pth")
    arguments = ["--model_path", tmp_path / "empty.pth", "--root_path", data, "--n_filters", 2]
    arguments += ["--patch_size", 16, 16, 16, "--stride_xy", 8, "--stride_z", 8]
    result = inference.main(list(map(str, arguments)))
    assert "2 of 2 cases have an empty mask" in capsys.readouterr().out
    assert result["selection"] == "unknown"
    written = json.loads((tmp_path / "empty_test/metrics.json").read_text())
    assert written["summary"][0]["empty"] == 2
    assert written["summary"][0]["dice"]["mean"] == 0
    assert written["cases"][0]["hd95"] is None


def test_inference_mistakes(capsys, runs, tmp_path):
    data, out = runs
    weights = str(folder_of(out, "MT") / "iter_6.pth")
    two_channels = str(make_data(tmp_path / "two", channels=2))
    for arguments, words in [
        (["--model_path", str(tmp_path / "no.pth"), "--root_path", str(data)], ["no.pth", "no such checkpoint"]),
        # A wrong checkpoint is named even where the data are not there either: it is what people type each time.
        (["--model_path", str(tmp_path / "no.pth"), "--root_path", "/nowhere"], ["no.pth", "no such checkpoint"]),
        (["--model_path", weights, "--n_filters", "4"], ["iter_6.pth", "another network", "--n_filters"]),
        (["--model_path", weights, "--split", "val"], ["val.list", "no such list"]),
        (["--model_path", weights, "--n_channels", "2"], ["iter_6.pth", "another network", "--n_channels"]),
        (
            ["--model_path", weights, "--root_path", two_channels],
            ["has 2 channels, the network takes 1"],
        ),
    ]:
        said = sentence(capsys, inference.main, arguments)
        assert all(word in said for word in words), said


def test_nifti_without_nibabel_says_what_to_install(capsys, monkeypatch, runs, tmp_path):
    _, out = runs
    monkeypatch.setitem(sys.modules, "nibabel", None)
    arguments = ["--model_path", str(folder_of(out, "MT") / "iter_6.pth"), "--save_format", "nifti"]
    assert "pip install nibabel" in sentence(capsys, inference.main, [*arguments, "--save_result", str(tmp_path)])


@pytest.mark.parametrize("script", [train_mean_teacher, train_sup, inference])
def test_help_is_a_page_and_help_all_says_what_every_flag_is_and_its_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = {}
    for words in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit) as stopped:
            script.main(words)
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "(default: None)" not in text
        shown[words[-1]] = set(re.findall(r"^  (--\w+)", text, re.MULTILINE))
        assert words[-1] == "all" or len(text.splitlines()) <= 75
    assert 20 < len(shown["--help"]) <= 40
    every = {word for action in script.PARSER._actions for word in action.option_strings[:1]} - {"-h"}
    assert shown["all"] == every and shown["--help"] < every


# ------------------------------------------------------------------------------------------------- the built-in data


def test_without_data_the_phantom_is_built_and_named(monkeypatch, tmp_path, capsys):
    built = []
    monkeypatch.setattr(script_flags, "HOME", tmp_path)
    monkeypatch.setattr(sources, "make_phantom", lambda root, dims: built.append(make_data(root)))
    arguments = ["--labelnum", "4", "--max_iterations", "1", "--num_workers", "0", "--n_filters", "2"]
    folder = train_sup.main([*arguments, "--output_dir", str(tmp_path)])
    assert built == [tmp_path / "data/Phantom"]
    assert folder == tmp_path / "model/Phantom_vnet_4_labeled/supervised"
    assert json.loads((folder / "config.json").read_text())["patch_size"] == [32, 32, 32]
    assert "PHANTOM" in capsys.readouterr().out

    # Its slices, with a patch of two sides.
    slices = train_sup.main([*arguments, "--output_dir", str(tmp_path), "--dataset_name", "Phantom", "--dims", "2"])
    assert slices == tmp_path / "model/Phantom_unet_4_labeled/supervised"
    assert json.loads((slices / "config.json").read_text())["patch_size"] == [32, 32]
    with pytest.raises(SystemExit):
        train_sup.main([*arguments, "--dataset_name", "Electrode", "--dims", "3"])
    assert "--dims 3 with --dataset_name Electrode, whose cases are images: take" in capsys.readouterr().err

    (tmp_path / "data/LA").mkdir(parents=True)
    make_data(tmp_path / "data/LA")
    patch = ["--patch_size", "16", "16", "16"]
    assert train_sup.main([*arguments, *patch, "--output_dir", str(tmp_path)]).parent.name == "LA_vnet_4_labeled"


# --------------------------------------------------------------------------------------------------------- real data


def test_real_volumes_through_the_whole_path(la_root, tmp_path):
    names = {"root_path": la_root, "output_dir": tmp_path, "labelnum": 8, "max_iterations": 2, "n_filters": 4}
    names |= {"patch_size": "48 48 32", "num_workers": 0}
    for script in SCRIPTS.values():
        folder = script.main([word for name, value in names.items() for word in (f"--{name}", *str(value).split())])
        result = inference.main(["--model_path", str(folder / "iter_2.pth"), "--num", "1", "--stride_xy", "24"])
        assert [row["case"] for row in result["cases"]] == (la_root / "test.list").read_text().split()[:1]
    assert len(LAHeart(la_root / "data", num_classes=2)) == 80


@pytest.mark.parametrize(
    ("main", "words", "remedy"),
    [
        (
            train_sup.main,
            ["--ema_decay", "0.9"],
            "--ema_decay is a flag of train_mean_teacher.py, train_admt.py, train_bcp.py, train_ict.py, ",
        ),
        (train_sup.main, ["--save_result", "x"], "--save_result is a flag of inference.py"),
        (train_sup.main, ["-labelnum", "4"], "did you mean --labelnum?"),
        (inference.main, ["--model_path", "x", "--labelnum=4"], "--labelnum is a flag of every training script"),
    ],
)
def test_a_flag_of_another_script_is_called_that(main, words, remedy, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and remedy in capsys.readouterr().err
