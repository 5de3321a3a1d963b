"""A run can neither be lost nor mixed up with another, and every mistake about one is a sentence."""

import argparse
import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_bcp
import train_ua_mt
from conftest import ball, make_data, start_python, write_case

import inference
import train_mean_teacher
import train_sup
from mtseg import losses, optim, ramps
from mtseg.networks import unet
from mtseg.script import build, endings, flags, monitor, networks, run, runfolder
from mtseg.script.runlog import RunLog, read_metrics
from mtseg.transforms import RandomCrop

ROOT = Path(__file__).resolve().parents[1]


def words(data, out, **changes):
    given = {"root_path": data, "dataset_name": "Tiny", "output_dir": out, "labelnum": 3, "max_iterations": 4}
    given |= {"n_filters": 2, "save_freq": 2, "num_workers": 0, "patch_size": "16 16 16", "stride_xy": 8, "stride_z": 8}
    given |= {"progress": 0, **changes}
    return [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]


def sentence(capsys, main, arguments):
    """Run `main`, which must end with exit code 2 and one sentence; returns it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (stopped.value.code, len(lines)) == (2, 1)
    return lines[0]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def log_of(folder):
    return (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A data set, and the folder of a supervised run of 4 iterations on it; copy before you change anything."""
    home = tmp_path_factory.mktemp("finished")
    data = make_data(home / "data")
    return data, train_sup.main(words(data, home / "out"))


@pytest.fixture
def copied(finished, tmp_path):
    """The data set, a copy of the run's output folder, and the run's folder in it."""
    data, folder = finished
    out = tmp_path / "copied"
    shutil.copytree(folder.parents[2], out)
    return data, out, out / folder.relative_to(folder.parents[2])


# ------------------------------------------------------------------------------------------- no run replaces another


def test_resuming_a_file_of_another_run_does_not_replace_the_run_in_the_folder(finished, copied, tmp_path, capsys):
    data, out, folder = copied
    before = contents(folder)
    elsewhere = finished[1] / "latest.pth"
    resume = ["--resume", str(elsewhere)]
    said = sentence(capsys, train_sup.main, [*words(data, out, max_iterations=6), *resume])
    assert f"another run lies in {folder}" in said
    assert contents(folder) == before
    # Asked for, it is done; and in a new place the run goes on with its log.
    assert train_sup.main([*words(data, out, max_iterations=6), *resume, "--overwrite"]) == folder
    there = train_sup.main([*words(data, tmp_path / "new", max_iterations=6), *resume])
    for place in (folder, there):
        with open(place / "metrics.csv", newline="") as file:
            assert [int(row["iteration"]) for row in csv.DictReader(file)] == [1, 2, 3, 4, 5, 6]
        assert (place / "iter_6.pth").exists()
    assert elsewhere.exists()


def test_curves_of_a_run_that_goes_on_elsewhere_are_its_own_from_the_start(finished, copied, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data, out, folder = copied
    lines = (folder / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("loss")
    others = [",".join("99" if n == place else cell for n, cell in enumerate(line.split(","))) for line in lines[1:]]
    (folder / "metrics.csv").write_text("\n".join([lines[0], *others]) + "\n")  # of the run that is replaced
    resume = ["--tensorboard", "--resume", str(finished[1] / "latest.pth")]
    train_sup.main([*words(data, out, max_iterations=6), *resume, "--overwrite"])
    there = train_sup.main([*words(data, tmp_path / "new", max_iterations=6), *resume])
    for place in (folder, there):
        with open(place / "metrics.csv", newline="") as file:
            expected = [float(row["loss"]) for row in csv.DictReader(file)]
        events = EventAccumulator(str(place / "tensorboard")).Reload().Scalars("loss")
        assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in events] == pytest.approx(expected)


def test_a_run_that_is_cut_off_before_its_first_row_keeps_those_of_before(finished, tmp_path):
    _, folder = finished
    before = (folder / "metrics.csv").read_text()
    there = RunLog(tmp_path / "new", start=4, source=folder).folder  # and no row follows
    assert (there / "metrics.csv").read_text() == before
    log = RunLog(there, start=4)
    log.row({"iteration": 5, "loss": 0.25})
    log.row({"iteration": 6, "loss": 0.25, "late": 'warm, "slow"'})  # a script's own words may be any
    with open(there / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["late"] for row in table] == [""] * 5 + ['warm, "slow"']
    assert [row["late"] for row in read_metrics(there / "metrics.csv")] == [""] * 5 + ['warm, "slow"']
    assert [row["iteration"] for row in table] == list("123456")
    assert [row["lr"] for row in table] == [*(row["lr"] for row in csv.DictReader(before.splitlines())), "", ""]


def test_a_run_that_is_killed_between_its_first_validation_and_its_first_state_is_started_again(finished, tmp_path):
    data, _ = finished
    (data / "val.list").write_text("case_5\n")
    more = {"val_list": data / "val.list", "val_freq": 2}
    whole = train_sup.main(words(data, tmp_path / "whole", **more))
    cut = tmp_path / "cut" / whole.relative_to(tmp_path / "whole")
    cut.mkdir(parents=True)
    for name in ("config.json", "metrics.csv", "supervised_best_model.pth"):
        shutil.copy(whole / name, cut / name)
    train_sup.main([*words(data, tmp_path / "cut", **more), "--resume"])
    a, b = (torch.load(place / "iter_4.pth", weights_only=True) for place in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_goes_on_elsewhere_takes_its_best_weights_along(finished, tmp_path):
    """No later validation may be better; and the folder says that its weights were validated."""
    data, _ = finished
    (data / "val.list").write_text("case_5\n")
    more = {"val_list": data / "val.list", "val_freq": 2}
    first = train_sup.main(words(data, tmp_path / "first", max_iterations=2, **more))
    state = torch.load(first / "latest.pth", weights_only=True)
    torch.save({**state, "progress": {**state["progress"], "student": 2.0}}, first / "latest.pth")  # nothing is better
    there = train_sup.main([*words(data, tmp_path / "there", **more), "--resume", str(first / "latest.pth")])
    assert (there / "supervised_best_model.pth").read_bytes() == (first / "supervised_best_model.pth").read_bytes()


def test_a_run_that_goes_to_nan_leaves_its_views_closed(finished, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(monitor.Monitor, "close", lambda self: closed.append(self))
    with pytest.raises(SystemExit):
        train_sup.main(words(finished[0], tmp_path, base_lr=1e30))
    assert len(closed) == 1


def test_what_was_validated_is_written_down_whenever_rows_are(finished, tmp_path):
    data, _ = finished
    (data / "val.list").write_text("case_5\n")
    folder = train_sup.main(words(data, tmp_path, val_list=data / "val.list", val_freq=2, log_freq=3, max_iterations=5))
    rows = [*read_metrics(folder / "metrics.csv")]
    assert [row["iteration"] for row in rows] == ["2", "3", "4", "5"]
    assert [bool(row["val_dice"]) for row in rows] == [True, False, True, True]


def test_a_teacher_that_began_with_weights_does_not_go_on_as_one_without(finished, tmp_path, capsys):
    data, folder = finished
    more = {"teacher_checkpoint": folder / "iter_4.pth"}
    train_mean_teacher.main(words(data, tmp_path / "a", max_iterations=2, **more))
    said = sentence(capsys, train_mean_teacher.main, [*words(data, tmp_path / "a"), "--resume"])
    assert "the run began with --teacher_checkpoint" in said
    train_mean_teacher.main(words(data, tmp_path / "b", max_iterations=2))
    said = sentence(capsys, train_mean_teacher.main, [*words(data, tmp_path / "b", **more), "--resume"])
    assert "the run began without --teacher_checkpoint" in said


@pytest.mark.parametrize("left", ["latest.pth", "iter_4.pth", "metrics.csv"])
def test_a_start_replaces_no_run_whose_config_json_is_missing(copied, capsys, left):
    data, out, folder = copied
    for path in folder.iterdir():
        if path.name != left:
            path.unlink()
    before = contents(folder)
    assert "a run lies there" in sentence(capsys, train_sup.main, words(data, out))
    assert contents(folder) == before


def test_a_run_that_was_begun_while_the_data_was_read_is_not_replaced(data, tmp_path, capsys, monkeypatch):
    lock_folder = runfolder.lock_folder

    def another_was_faster(folder):
        folder.mkdir(parents=True)
        (folder / "latest.pth").write_bytes(b"of the other")
        return lock_folder(folder)

    monkeypatch.setattr(runfolder, "lock_folder", another_was_faster)
    assert "a run lies there" in sentence(capsys, train_sup.main, words(data, tmp_path))
    (latest,) = tmp_path.rglob("latest.pth")
    assert latest.read_bytes() == b"of the other"


def test_overwrite_removes_the_old_runs_results_and_nothing_else(copied):
    data, out, folder = copied
    inference.main(["--model_path", str(folder / "iter_4.pth")])
    results = folder / "iter_4_test"
    assert (results / "metrics.json").exists()
    (results / "predictions").mkdir()
    (results / "predictions/case_6.h5").write_bytes(b"")
    shutil.copytree(results, folder / "supervised_best_model_test")
    shutil.copy(folder / "iter_4.pth", folder / "supervised_best_model.pth")
    (results / "notes.txt").write_text("mine")
    mine = ["of_a_friend.pth", "iter_best.pth", "iter_9_thoughts/draft.txt", "figure.png"]
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    train_sup.main([*words(data, out, max_iterations=2, seed=5), "--overwrite"])
    left = {str(path) for path in contents(folder)}
    assert left == {*mine, "iter_4_test/notes.txt", "iter_2.pth", "latest.pth", "config.json", "metrics.csv"} | {
        "log.txt",
        ".lock",
    }
    assert all((folder / name).read_text() == "mine" for name in mine)


def test_inference_does_not_write_into_a_runs_folder(copied, capsys):
    _, _, folder = copied
    for missing in ("", "config.json"):
        if missing:
            shutil.copy(folder / missing, folder.parent)
            (folder / missing).unlink()
        before = contents(folder)
        arguments = ["--model_path", str(folder / "iter_4.pth"), "--output_dir", str(folder)]
        settings = ["--root_path", str(copied[0]), "--n_filters", "2", "--patch_size", "16", "16", "16"]
        said = sentence(capsys, inference.main, [*arguments, *settings, "--stride_xy", "8", "--stride_z", "8"])
        assert "a run lies there" in said
        assert contents(folder) == before


# ----------------------------------------------------------------------------------------- what is resumed is the run


def test_rows_missing_from_metrics_csv_are_said_at_a_resume(copied):
    data, out, folder = copied
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join([*lines[:2], lines[4]]))  # without iterations 2 and 3
    train_sup.main([*words(data, out, max_iterations=5), "--resume"])
    assert "metrics.csv: the rows of iterations 2 to 3 are missing" in log_of(folder)
    (folder / "metrics.csv").unlink()
    train_sup.main([*words(data, out, max_iterations=6), "--resume"])
    assert "metrics.csv: the rows of iterations 1 to 5 are missing" in log_of(folder)


def test_rows_that_were_never_logged_are_not_missed(data, tmp_path):
    for freq, iterations in ((3, 4), (2, 6), (3, 9)):
        arguments = words(data, tmp_path, log_freq=freq, max_iterations=iterations)
        folder = train_sup.main([*arguments, *(["--resume"] if iterations > 4 else [])])
    assert "missing" not in log_of(folder)


def test_a_column_that_this_version_does_not_know_stays_in_metrics_csv(copied):
    data, out, folder = copied
    lines = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("".join(f"{line},{n or 'of_before'}\n" for n, line in enumerate(lines)))
    train_sup.main([*words(data, out, max_iterations=6), "--resume"])
    with open(folder / "metrics.csv", newline="") as file:
        assert [row["of_before"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "", ""]


@pytest.mark.parametrize(
    "content",
    [
        b"case,class,dice\na,1,0.5\n",
        b"iteration,loss\n1,0.5\n\x00\x00\x00\x00\n",
        b"iteration,loss\n1,0.5\n2\n3,0.5\n",
        b"iteration,loss\n1,0.5\nnan,0.5\n",
        b"iteration,loss\n1,0.5\n1,0.5\n",
        b"\xff\xfe\x00\x01\n" * 9,
    ],
)
def test_a_damaged_or_foreign_metrics_csv_is_one_sentence_at_a_resume(copied, capsys, content):
    data, out, folder = copied
    (folder / "metrics.csv").write_bytes(content)
    before = contents(folder)
    said = sentence(capsys, train_sup.main, [*words(data, out, max_iterations=6), "--resume"])
    assert re.search(r"metrics\.csv: line \d+ is not of a run's metrics\.csv \(.+\); restore it or move it away", said)
    assert contents(folder) == before


@pytest.mark.parametrize("changes", [{"val_freq": 3}, {"stride_xy": 16}, {"stride_z": 4}])
def test_plateau_is_resumed_with_the_same_validations_only(tmp_path, data, capsys, changes):
    (tmp_path / "val.list").write_text("case_5\n")
    settings = {"lr_schedule": "plateau", "val_list": tmp_path / "val.list", "val_freq": 2, "max_iterations": 2}
    train_sup.main(words(data, tmp_path, **settings))
    resumed = words(data, tmp_path, **{**settings, "max_iterations": 4, **changes})
    ((name, value),) = changes.items()
    assert f"--{name} is {value} and was" in sentence(capsys, train_sup.main, [*resumed, "--resume"])
    # With another schedule they change nothing that is computed.
    settings |= {"lr_schedule": "constant", "exp": "constant"}
    train_sup.main(words(data, tmp_path, **settings))
    train_sup.main([*words(data, tmp_path, **{**settings, "max_iterations": 4, **changes}), "--resume"])


def test_a_run_is_not_resumed_under_a_flag_it_did_not_know(copied, capsys):
    data, out, folder = copied
    state = torch.load(folder / "latest.pth", weights_only=True)
    del state["config"]["channels_last"]  # as a run of before there was this flag
    state["config"]["code"] = "some"  # of other hands: where a dictionary belongs
    torch.save(state, folder / "latest.pth")
    arguments = [*words(data, out, max_iterations=5), "--resume"]
    said = sentence(capsys, train_sup.main, [*arguments, "--channels_last"])
    assert "--channels_last is True and was False" in said
    train_sup.main(arguments)
    assert (folder / "iter_5.pth").exists()


def test_a_script_that_was_changed_since_is_said_at_a_resume(data, tmp_path):
    script = tmp_path / "train_mine.py"
    for change, iterations in (("", 2), ("", 3), ("# changed\n", 4)):
        script.write_text((ROOT / "train_sup.py").read_text() + change)
        main = run.script_main(train_sup.train, train_sup.PARSER, str(script))
        folder = main([*words(data, tmp_path / "out", max_iterations=iterations), "--resume"])
    assert log_of(folder).count("was changed since this run began") == 1
    assert "the script was changed since this run began: its numbers may be those of neither" in log_of(folder)
    code = json.loads((folder / "config.json").read_text())["code"]
    assert code["script"] == hashlib.sha256(script.read_bytes()).hexdigest() and len(code["mtseg"]) == 64


def test_a_loss_may_be_a_number(data, tmp_path):
    def train(args, run):
        read = build.read_data(args, run)
        net = build.make_network(args, run, read.n_channels)
        updater = build.make_updater(args, run, net.parameters())
        with run.started(read, {"student": net}, updater):
            for _, volume, label in run.batches():
                updater.step(torch.nn.functional.cross_entropy(net(volume), label))
                run.end_iteration(loss=0.25)

    folder = run.script_main(train, train_sup.PARSER, train_sup.__file__)(words(data, tmp_path, max_iterations=2))
    assert [row["loss"] for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())] == [
        "0.25",
        "0.25",
    ]


def test_weights_that_would_not_be_saved_are_refused(data, tmp_path, capsys):
    """A head of one's own that the optimizer moves, of which run.started was not told."""

    def train(args, run):
        read = build.read_data(args, run)
        net, head = build.make_network(args, run, read.n_channels), torch.nn.Conv3d(1, 1, 1)
        updater = build.make_updater(args, run, [*net.parameters(), *head.parameters()])
        with run.started(read, {"student": net}, updater, **({"head": head} if args.max_iterations == 1 else {})):
            for _, volume, label in run.batches():
                loss = torch.nn.functional.cross_entropy(net(head(volume)), label)
                updater.step(loss)
                run.end_iteration(loss=loss)

    main = run.script_main(train, train_sup.PARSER, train_sup.__file__)
    said = sentence(capsys, main, words(data, tmp_path))
    assert "the optimizer moves weights of no network that is saved" in said and "head=head" in said
    assert not list(tmp_path.rglob("config.json"))
    assert "head" in torch.load(main(words(data, tmp_path, max_iterations=1)) / "latest.pth", weights_only=True)


def test_a_run_on_data_that_was_prepared_anew_is_not_resumed(data, tmp_path, capsys):
    settings = {"spacing": [1.0, 1.0, 1.0]}
    (data / "preprocessing.json").write_text(json.dumps(settings))
    train_sup.main(words(data, tmp_path))
    (data / "preprocessing.json").write_text(json.dumps({"spacing": [2.0, 1.0, 1.0]}))
    said = sentence(capsys, train_sup.main, [*words(data, tmp_path, max_iterations=5), "--resume"])
    assert "prepared in another way" in said


def test_a_run_is_not_resumed_on_other_data_of_the_same_names(copied, tmp_path, capsys):
    _, out, folder = copied
    other = make_data(tmp_path / "other")
    label = ball((24, 20, 14), (9, 9, 9), 4).astype(np.uint8)
    write_case(other, "case_0", label.astype(np.float32), label)
    arguments = [*words(other, out, max_iterations=5), "--resume"]
    assert "other data of the same names" in sentence(capsys, train_sup.main, arguments)
    state = torch.load(folder / "latest.pth", weights_only=True)
    del state["config"]["data_crc32"]  # a run of before this was recorded
    torch.save(state, folder / "latest.pth")
    train_sup.main(arguments)


def test_a_method_that_depends_on_its_length_is_not_resumed_under_another(data, tmp_path, capsys):
    train_ua_mt.main(words(data, tmp_path, max_iterations=2))
    said = sentence(capsys, train_ua_mt.main, [*words(data, tmp_path, max_iterations=4), "--resume"])
    assert "--max_iterations is 4 and was 2" in said


def wrong_states(state):
    yield {**state, "iteration": "4"}
    yield {**state, "iteration": -1}
    yield {**state, "progress": {"waited": 0}}
    yield {**state, "progress": {**state["progress"], "waited": None}}
    yield {**state, "config": ["seed", 1337]}
    yield {**state, "model": {}}
    yield {**state, "model": 3}
    yield {**state, "model": {name: value * torch.nan for name, value in state["model"].items()}}
    yield {**state, "optimizer": {}}
    yield {**state, "optimizer": {**state["optimizer"], "param_groups": [{"lr": "fast"}]}}
    moments = {n: {"momentum_buffer": torch.zeros(7)} for n in state["optimizer"]["state"]}
    yield {**state, "optimizer": {**state["optimizer"], "state": moments}}
    yield {**state, "schedule": {}}
    yield {**state, "schedule": {"scheduler": {**state["schedule"]["scheduler"], "last_epoch": "4"}}}
    yield {**state, "scaler": [1]}
    yield [state]


@pytest.mark.parametrize("number", range(15))
def test_wrong_fields_in_latest_pth_are_one_sentence(copied, capsys, number):
    data, out, folder = copied
    states = list(wrong_states(torch.load(folder / "latest.pth", weights_only=True)))
    assert len(states) == 15
    torch.save(states[number], folder / "latest.pth")
    before = contents(folder)
    said = sentence(capsys, train_sup.main, [*words(data, out, max_iterations=6), "--resume"])
    assert "latest.pth: " in said
    assert contents(folder) == before


@pytest.mark.parametrize("flag", ["--resume", "--pretrained", "--teacher_checkpoint", "--model_path"])
def test_a_damaged_checkpoint_is_noticed_by_every_flag_that_takes_one(finished, tmp_path, capsys, flag):
    data, folder = finished
    damaged = tmp_path / "latest.pth"
    content = bytearray((folder / "latest.pth").read_bytes())
    weights = torch.load(folder / "latest.pth", weights_only=True)["model"]["out_conv.weight"]
    content[content.index(weights.numpy().tobytes())] ^= 64
    damaged.write_bytes(content)
    script = train_mean_teacher if flag == "--teacher_checkpoint" else train_sup
    arguments = words(data, tmp_path / "out", max_iterations=6)
    if flag == "--model_path":
        script, arguments = inference, ["--root_path", str(data)]
    said = sentence(capsys, script.main, [*arguments, flag, str(damaged)])
    assert f"{damaged}: is damaged (the checksum of" in said
    assert not list(tmp_path.rglob("config.json"))


def test_the_command_that_goes_on_is_one_that_can_be_run():
    for before in ([], ["--overwrite"], ["--resume"], ["--resume", "a.pth"], ["--resume=a.pth"]):
        command = ["python", "train_sup.py", "--seed", "3", *before, "--labelnum", "4"]
        expected = ["python", "train_sup.py", "--seed", "3", "--labelnum", "4", "--resume"]
        assert runfolder.command_to_resume(command) == expected


# ----------------------------------------------------------------------------------------------- locks, disks, signals


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_used(data, tmp_path, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    folder = train_sup.main(words(data, tmp_path, max_iterations=1))
    assert f"has no locks ({os.strerror(number)})" in log_of(folder)
    assert (folder / "iter_1.pth").exists()


def test_a_stray_file_beside_numbered_weights_is_no_obstacle(copied):
    data, out, folder = copied
    for name in ("iter_best.pth", "iter_.pth", "iter_²_.pth"):
        (folder / name).write_bytes(b"mine")
    train_sup.main([*words(data, out, max_iterations=8, keep_last=2), "--resume"])
    assert {path.name for path in folder.glob("iter_[0-9]*.pth")} == {"iter_6.pth", "iter_8.pth"}
    assert (folder / "iter_best.pth").read_bytes() == b"mine"
    assert runfolder.newest_weights(folder).name == "iter_8.pth"


UNTIL_STOPPED = """
import os, sys, time
from pathlib import Path
from mtseg import checkpoint, phantom
from mtseg.script.endings import one_sentence

def wait(*_):
    print("ready", flush=True)
    while True:
        time.sleep(0.05)  # not signal.pause(), which a signal just before it would not end

folder = Path(sys.argv[2])
with one_sentence():
    if sys.argv[1] == "write_whole":
        os.fsync = wait
        checkpoint.write_whole(folder / "latest.pth", b"half")
    else:
        phantom.make_case = wait
        phantom.make_phantom(folder / "Phantom")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("what", ["write_whole", "make_phantom"])
def test_temporary_files_are_gone_after_a_signal(tmp_path, monkeypatch, what, number):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder, out, err = (tmp_path / name for name in ("folder", "out", "err"))
    folder.mkdir()
    process = start_python("-u", "-c", UNTIL_STOPPED, what, folder, out=out, err=err)
    while out.read_text() != "ready\n":
        assert process.poll() is None, err.read_text()
    assert list(folder.iterdir())
    os.kill(process.pid, number)
    assert process.wait() == 128 + number
    assert err.read_text() == ("interrupted\n" if number == signal.SIGINT else f"stopped by {number.name}\n")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_stopped_is_saved_and_leaves_no_temporary_file(
    data, tmp_path, tmp_path_factory, monkeypatch, number
):
    scratch = tmp_path_factory.mktemp("scratch")  # a short path: that of a Unix socket in it has at most 108 bytes
    arguments = words(data, tmp_path / "out", max_iterations=100000, save_freq=100000, num_workers=1)
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # PyTorch's own, which it keeps
    out, err = tmp_path / "said", tmp_path / "err"
    process = start_python(ROOT / "train_sup.py", *arguments, out=out, err=err)
    try:
        while not any("\n2," in path.read_text() for path in (tmp_path / "out").glob("model/*/*/metrics.csv")):
            assert process.poll() is None, err.read_text()
            time.sleep(0.01)
        os.kill(process.pid, number)
        assert process.wait() == 128 + number, err.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    assert "all is saved" in out.read_text()
    (folder,) = (tmp_path / "out").glob("model/*/*")
    assert (folder / "latest.pth").exists()
    assert not list(scratch.rglob("*"))
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("script", [train_sup, train_mean_teacher, inference])
def test_ctrl_c_while_importing_is_one_line(tmp_path, script):
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True:\n    signal.pause()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    arguments = ["--model_path", "a.pth"] if script is inference else []
    command = [sys.executable, script.__file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# ------------------------------------------------------------------------------------------------ what runs out or dies


def test_a_data_worker_that_is_killed_is_one_sentence(data, tmp_path, capsys, monkeypatch):
    def killed(self, sample):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(RandomCrop, "__call__", killed)
    said = sentence(capsys, train_sup.main, words(data, tmp_path, num_workers=1))
    assert "a process that loads data was killed" in said
    assert "--num_workers" in said


def test_memory_that_runs_out_is_one_sentence(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "make_updater", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    said = sentence(capsys, train_sup.main, words(data, tmp_path))
    assert "there is not enough memory (1152921504606846976 bytes were asked for); take smaller patches" in said
    monkeypatch.setattr(build, "make_updater", lambda *_: np.empty(2**60, dtype=np.uint8))
    said = sentence(capsys, train_sup.main, words(data, tmp_path))
    assert "there is not enough memory (1.00 EiB were asked for)" in said
    oom = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")
    assert "there is not enough memory (2.00 GiB were asked for)" in endings.sentence(oom)


def test_a_mistake_of_the_program_keeps_its_traceback(data, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_updater", lambda *_: {}["nothing"])
    with pytest.raises(KeyError):
        train_sup.main(words(data, tmp_path))


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--loss dice:0", "--loss: all weights"),
        ("--loss dice:nan", "--loss: the weight 'nan' of dice"),
        ("--loss jaccard", "the terms are ce, dice, focal, tversky"),
        ("--class_weights 0 0", "--class_weights: all weights are 0"),
        ("--network unet --deep_supervision --deep_supervision_weights 0 0 0 0", "--deep_supervision_weights: all"),
        ("--nesterov --momentum 0", "--nesterov with --momentum 0"),
        ("--optimizer adam --betas 1 1", "--betas: 1 is not below 1"),
        ("--lr_schedule plateau --lr_gamma 1 --val_list {val}", "--lr_gamma 1: the rate would never fall"),
        ("--val_list {data}/missing.list", "--val_list"),
        ("--resume {data}/missing.pth", "missing.pth: no such file"),
        ("--optimizer adam --nesterov", "--nesterov without --optimizer sgd changes nothing"),
        ("--optimizer adam --momentum 0.5", "--momentum without"),
        ("--betas 0.8 0.9", "--betas without"),
        ("--lr_schedule poly --lr_step 5", "--lr_step without"),
        ("--lr_power 2", "--lr_power without"),
        ("--lr_patience 2", "--lr_patience without"),
        ("--loss dice --class_weights 1 2", "--class_weights without ce or focal in --loss"),
        ("--strong_noise 0.5 --in_plane", "--in_plane without --strong_rotation, --strong_scaling or --strong_elastic"),
        ("--num_classes 256", "256 is not between 2 and 255"),
        ("--val_freq 5", "--val_freq without --val_list changes nothing"),
        ("--patience 5", "--patience without --val_list changes nothing"),
        ("--ignore_index 1", "--ignore_index 1 is a foreground class"),
        ("--ignore_index 0", "--ignore_index 0 with --num_classes 2: one class would be left"),
    ],
)
def test_flags_that_cannot_be_or_change_nothing_are_one_sentence(data, tmp_path, capsys, arguments, said):
    (tmp_path / "val.list").write_text("case_5\n")
    arguments = arguments.format(data=data, val=tmp_path / "val.list").split()
    given = sentence(capsys, train_sup.main, [*words(data, tmp_path / "out"), *arguments])
    assert said in given
    assert "test.list" not in given
    assert not (tmp_path / "out").exists()


def test_the_length_of_a_ramp_that_is_none_is_refused(data, tmp_path, capsys):
    """BCP's is constant by default."""
    said = sentence(
        capsys, train_bcp.main, [*words(data, tmp_path), "--consistency_warmup", "1", "--consistency_rampup", "5"]
    )
    assert "--consistency_rampup without another --consistency_ramp changes nothing" in said


def test_a_flag_that_is_given_twice_is_said_or_refused(capsys, data, tmp_path):
    parser = flags.Parser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--names", nargs="+")
    assert parser.parse_args(["--seed", "1", "--seed", "2"]).seed == 2
    assert "--seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--names", "a", "--names", "b"])
    assert "--names is given twice" in capsys.readouterr().err
    parser.add_argument("--flags", nargs=argparse.REMAINDER)
    assert parser.parse_args("--seed 1 --names a --flags --seed 2 --names b".split()).names == ["a"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": {"w": 16}},
        {"patch_size": [[16], 16, 16]},
        {"max_iterations": "many"},
        {"max_iterations": 2.5},
        {"nesterov": "yes"},
        {"seed": True},
        {"exp": ["a", "--overwrite"]},
        ["seed"],
    ],
)
def test_a_config_with_wrong_types_is_one_sentence(copied, tmp_path, capsys, settings):
    data, out, folder = copied
    before = contents(folder)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    arguments = [*words(data, out), "--config", str(tmp_path / "config.json")]
    assert "config.json" in sentence(capsys, train_sup.main, arguments)
    assert contents(folder) == before


def test_a_byte_order_mark_is_no_part_of_a_list_or_of_settings(data, tmp_path):
    for name in ("train.list", "test.list"):
        (data / name).write_bytes(b"\xef\xbb\xbf" + (data / name).read_bytes())
    (tmp_path / "val.list").write_bytes(b"\xef\xbb\xbfcase_5\n")
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"seed": 7}).encode())
    more = {"config": tmp_path / "config.json", "val_list": tmp_path / "val.list", "max_iterations": 1}
    folder = train_sup.main(words(data, tmp_path, **more))
    config = json.loads((folder / "config.json").read_text())
    assert (config["seed"], config["train_cases"][0], config["val_cases"]) == (7, "case_0", ["case_5"])


@pytest.mark.parametrize(("largest", "said"), [(3e37, "case case_1, which reaches"), (1, "lower --base_lr")])
def test_images_are_blamed_for_a_loss_that_is_no_number_where_they_are_the_reason(tmp_path, capsys, largest, said):
    data = make_data(tmp_path / "data")
    label = ball((24, 20, 14), (12, 10, 7), 4).astype(np.uint8)
    write_case(data, "case_1", (label * largest).astype(np.float32), label)
    rate = 1e30 if largest == 1 else 0.01
    given = sentence(capsys, train_sup.main, words(data, tmp_path, batch_size=3, base_lr=rate, max_iterations=9))
    assert said in given
    assert ("--base_lr" in given) == (largest == 1)


def test_flags_offer_what_the_modules_have():
    """The flags' names are written down a second time, since --help answers before PyTorch is loaded."""
    parser = train_mean_teacher.PARSER
    choices = {action.dest: action.choices for action in parser._actions}
    assert set(flags.NETWORKS) == set(networks.NETWORKS)
    assert tuple(choices["normalization"]) == unet.NORMALIZATIONS
    assert tuple(choices["lr_schedule"]) == optim.SCHEDULES
    for name in choices["optimizer"]:
        assert optim.make_optimizer(name, [torch.nn.Parameter(torch.zeros(1))], 0.1)
    for ramp in choices["consistency_ramp"]:
        assert ramps.consistency_weight(10**6, 0.5, ramp, 40.0, 0)[0] == 0.5
    (loss,) = (action for action in parser._actions if action.dest == "loss")
    assert all(term in loss.help for term in losses.TERMS)
    assert losses.parse_loss(loss.default) == {"ce": 0.5, "dice": 0.5}
    assert run.PREFIXES == {"student": "", "teacher": "ema_"}  # of the files that runs have always had


@pytest.mark.parametrize("network", ["vnet", "unet", "unet_ssl4mis"])
def test_dropout_of_channels_can_be_left_out(network, data, tmp_path, monkeypatch, capsys):
    """Then a network in training mode gives the same twice, and inference refuses to drop what was never dropped. The
    default of the field's networks is to drop, that of unet is not."""
    seen = []
    made = build.new_network

    def kept(*arguments, **settings):
        seen.append(made(*arguments, **settings))
        return seen[-1]

    monkeypatch.setattr(build, "new_network", kept)
    changes = {"max_iterations": 1, "n_filters": 8, "network": network, "normalization": "none"}
    for switch, alike in (("--has_dropout", False), ("--no-has_dropout", True), ("--cache", network == "unet")):
        seen.clear()
        out = tmp_path / switch
        train_sup.main([*words(data, out, **changes), switch])
        with torch.no_grad():
            x = torch.ones(1, 1, 16, 16, 16)
            first, second = seen[0].train()(x), seen[0](x)
        assert torch.equal(first, second) == alike
        folder = next(out.glob("model/*/supervised"))
        assert json.loads((folder / "config.json").read_text())["has_dropout"] is not alike
        arguments = ["--model_path", str(folder / "iter_1.pth"), "--uncertainty", "mc_dropout", "--mc_samples", "2"]
        if alike:
            assert "the network has no dropout" in sentence(capsys, inference.main, arguments)
        else:
            inference.main(arguments)
