"""The benchmarks run and compare what they say; nothing here looks at a time."""

import contextlib
import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import family  # noqa: E402
import measure  # noqa: E402
import run  # noqa: E402
import same_bits  # noqa: E402
import table  # noqa: E402
import tables  # noqa: E402
from rows import steps, windows  # noqa: E402

from mtseg import report  # noqa: E402
from mtseg.datasets import LAHeart  # noqa: E402
from mtseg.script import flags, methods  # noqa: E402
from mtseg.transforms import Compose, RandomCrop, RandomRotFlip, ToTensor  # noqa: E402


@pytest.mark.parametrize("patch_size", [(16, 16, 8), (16, 32, 16)])
def test_the_familys_sample_is_the_same_sample(data, patch_size):
    dataset = LAHeart(data, transform=Compose([RandomRotFlip(), RandomCrop(patch_size), ToTensor()]))
    for seed in range(20):
        theirs = family.sample(dataset.path("case_1"), patch_size, np.random.default_rng(seed))
        ours = dataset[(1, seed)]
        assert all(torch.equal(ours[key], theirs[key]) for key in ("image", "label"))


@pytest.mark.parametrize("images", [False, True])
def test_the_familys_iteration_computes_the_same(images):
    losses, networks = [], []
    theirs = functools.partial(family.mean_teacher_step, classes=range(steps.CLASSES) if images else (1,))
    for name, way in (("mtseg", steps.step), ("family", theirs)):
        networks.append(steps.mean_teacher(2, measure.CPU, image=name if images else None))
        for layer in (layer for net in networks[-1][:2] for layer in net.modules()):
            if isinstance(layer, torch.nn.Dropout):  # its masks are not the family's
                layer.p = 0.0
        torch.manual_seed(3)
        batch = steps.batch_of((64, 48) if images else (16, 16, 16), measure.CPU)
        losses.append([float(way(*networks[-1], *batch, 0.1, turn)) for turn in range(3)])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for ours, theirs in zip(*networks, strict=True):
        if isinstance(ours, torch.nn.Module):
            state = ours.translate(theirs.state_dict())
            for name, value in ours.state_dict().items():
                torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)


# Without those whose processes load PyTorch again.
QUICK = [name for name in run.CPU_ROWS if name not in ("start_up", "growth", "method_steps")]


def test_every_row_is_measured_and_written(tmp_path, capsys):
    run.main(["--quick", "--out", str(tmp_path / "all.json"), *(word for name in QUICK for word in ("--only", name))])
    report = json.loads((tmp_path / "all.json").read_text())
    assert [*dict.fromkeys(entry["name"] for entry in report["rows"])] == QUICK
    assert report["machine"]["torch"] == torch.__version__
    for entry in report["rows"]:
        assert all(second > 0 for times in entry.get("seconds", {}).values() for second in times)
        assert {len(times) for times in entry.get("seconds", {"": [0]}).values()} != {0}
    printed = capsys.readouterr().out
    assert all(entry["what"] in printed for entry in report["rows"])


def test_operations_of_a_method_are_those_of_its_passes(monkeypatch):
    """A forward pass of a patch counts 1, a backward pass 2: CPS has 8 of each, Mean Teacher 4 and 2 of its teacher."""
    from mtseg.script import methods

    scripts = [path for path in methods.training_scripts() if path.stem in ("train_mean_teacher", "train_cps")]
    monkeypatch.setattr(methods, "training_scripts", lambda: scripts)
    report = run.main(["--quick", "--only", "method_steps"])
    (name, one), (other_name, other) = ((entry["what"], entry["operations"]) for entry in report["rows"])
    assert (name, other_name) == ("a step of MT", "a step of CPS")
    assert other / one == pytest.approx(8 * 3 / (4 * 3 + 2), rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_its_rows_say_so(capsys):
    report = run.main(["--quick", *(word for name in run.GPU_ROWS for word in ("--only", name))])
    assert [entry["note"] for entry in report["rows"]] == ["not measured: there is no GPU"] * len(run.GPU_ROWS)


def test_the_table_says_what_is_reached_and_goes_between_the_marks(tmp_path):
    times = {"mtseg": [0.001, 0.002, 0.004], "family": [0.003, 0.008, 0.004]}
    entry = measure.row("a row", times, "a note", {"family": 3, "MONAI": 1}, **{"2 ms": True})
    assert entry["goals"] == {"3 x family": True, "1 x MONAI": None, "2 ms": True}
    assert not measure.row("a row", times, "", {"family": 3.5})["goals"]["3.5 x family"]
    report = {"command": ["--only", "x"], "minutes": 1, "machine": {}, "rows": [entry, measure.fact("flat", "1 2")]}
    text = tables.table(report)
    assert text.splitlines()[-2:] == [
        "| a row (a note) | 2 ms (1 ms .. 4 ms) | family 4 ms (3 ms .. 8 ms): 3.00 x "
        "| 3 x family: reached; 1 x MONAI: not judged; 2 ms: reached |",
        "| flat | 1 2 |  |  |",
    ]
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    for _ in range(2):
        tables.put_figures(path, text)
        assert path.read_text() == f"before\n<!-- figures -->\n{text}<!-- end of figures -->\nafter\n"
    path.write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md: no lines"):
        tables.put_figures(path, text)
    assert path.read_text() == "no marks"
    with pytest.raises(SystemExit) as stopped:
        run.main(["--figures", str(path)])
    assert stopped.value.code == 2


@contextlib.contextmanager
def here(makes):
    """As measure.apart, in this process."""
    yield {name: make(*words) for name, (make, *words) in makes.items()}


def test_a_comparison_or_a_row_that_fails_is_a_row_that_says_so(tmp_path, monkeypatch, capsys):
    def broken(quick, scratch):
        yield measure.fact("before", "1 2")
        raise RuntimeError("no room\nat all")

    def other_scores(net, image, *given, scores=windows.family.test_single_case):
        labels, found = scores(net, image, *given)
        return labels, found + 1e-3

    monkeypatch.setitem(run.CPU_ROWS, "growth", broken)
    monkeypatch.setattr(windows, "apart", here)
    monkeypatch.setattr(windows, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(windows.family, "test_single_case", other_scores)
    words = ["--quick", "--out", str(tmp_path / "all.json")]
    run.main([*words, *(word for name in ("growth", "sliding_window", "ema") for word in ("--only", name))])
    before, failed, window, ema = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert before["note"] == "1 2" and failed["failed"] and failed["note"] == "failed: RuntimeError: no room at all"
    (sentence,) = window["differs"]
    assert sentence.startswith("scores of mtseg and family differ by 0.001") and "1e-05 is allowed" in sentence
    assert window["seconds"]["family"] and not ema["differs"]
    printed = capsys.readouterr().out
    assert f"NOT THE SAME: {sentence}" in printed and "EMA update" in printed


def test_differences_are_those_that_are_not_allowed():
    assert measure.differences("x", [1, np.nan], [1.0009, np.nan], rtol=1e-3) == []
    assert measure.differences("x", torch.ones(2), [1, 1]) == []
    (sentence,) = measure.differences("losses", [1, 2], [1, 2.1], rtol=1e-3)
    assert sentence == "losses differ by 0.1 where 0.001 is allowed"


def test_the_same_bits_are_those_of_files_that_are_there(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
    with pytest.raises(SystemExit, match="nothing to compare"):
        same_bits.differences(a, b)
    for folder, more in ((a, 0), (b, 1)):
        torch.save({"w": torch.ones(3), "v": torch.ones(2) + more}, folder / "iter_20.pth")
    assert same_bits.differences(a, a) == [] and same_bits.differences(a, b) == ["iter_20.pth: v"]
    torch.save({"w": torch.ones(3)}, b / "ema_iter_20.pth")
    with pytest.raises(SystemExit, match="ema_iter_20"):
        same_bits.differences(a, b)


def test_a_row_has_the_name_of_its_script_unless_it_is_given_another():
    rows = table.chosen(["CPS --loss=ce:1", "b=CPS --loss=ce:1", "MT", "x/mine.py"], {"MT": "train_mean_teacher"})
    assert rows == {
        "CPS": "CPS --loss=ce:1",
        "b": "CPS --loss=ce:1",
        "MT": "train_mean_teacher",
        "mine": "x/mine.py",
    }
    with pytest.raises(table.BenchmarkError, match="there are 2 of this name; give others, as NAME=WORDS"):
        table.chosen(["CPS", "CPS --seed 1"], {})


FLAGS = "--max_iterations 3 --n_filters 2 --patch_size 16 16 16 --num_workers 0 --stride_xy 8 --stride_z 8".split()


def test_the_table_goes_on_until_it_is_full(data, tmp_path, capsys):
    """Of a recipe as of the two scripts; --root_path may name the folder of the cases, as LASeg's does."""
    words = ["--data", str(data / "data"), "--out", str(tmp_path / "out"), "--methods", "train_sup", "CPS"]
    words += ["--labels", "3", "--seeds", "1337"]
    assert table.main([*words, "--minutes", "0", "--flags", *FLAGS]) == table.MORE_TO_DO
    with pytest.raises(SystemExit):  # a loop in a shell would never end
        table.main([*words, "--minutes", "0.5", "--flags", *FLAGS])
    assert "2 of 2 runs are left" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/**/*.pth"))
    assert table.main([*words, "--flags", *FLAGS]) == 0
    printed = (tmp_path / "out/table.md").read_text()
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:4]] == ["| supervised", "| CPS"]
    # It is the report's table of what lies there, of all test cases.
    results = list(tmp_path.glob("out/data/*/seed1337/model/*/*/iter_3_test/metrics.json"))
    assert len(results) == 2
    assert report.to_markdown(report.report([tmp_path / "out"], per_class=True)[0]) == printed
    tested = [json.loads(path.read_text()) for path in results]
    assert [{row["case"] for row in one["cases"]} for one in tested] == [{"case_6", "case_7"}] * 2
    assert all(one["iteration_seconds"] > 0 and one["peak_memory_mb"] > 50 for one in tested)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/data/*/seed*/model/**/*.*")}
    assert table.main([*words, "--minutes", "0", "--flags", *FLAGS]) == 0
    assert (tmp_path / "out/table.md").read_text() == printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(SystemExit) as stopped:
        table.main([*words, "--flags", "--max_iterations", "4"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert (
        "holds a run with test --stride_xy" not in said and "with train --max_iterations 3, train --n_filters" in said
    )
    assert " and without train --max_iterations 4; give its flags" in said
    turned = [*FLAGS[-2:], *FLAGS[:-2]]
    assert table.main([*words, "--flags", *turned]) == 0 and (tmp_path / "out/table.md").read_text() == printed
    with pytest.raises(SystemExit):
        table.main([*words, "--test_flags=--tta", "--flags", *FLAGS])
    assert "holds a run without test --tta; give its flags" in capsys.readouterr().err
    # A test that was cut off between two cases goes on with the second.
    (folder,) = tmp_path.glob("out/data/train_sup_3/seed1337/model/*/*/iter_3_test")
    whole, log = json.loads((folder / "metrics.json").read_text()), folder / "cases.jsonl"
    (folder / "metrics.json").unlink()
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:2]).replace('"seconds": ', '"seconds": 1000'))
    assert table.main([*words, "--flags", *FLAGS]) == 0
    again = json.loads((folder / "metrics.json").read_text())
    assert again["cases"] == whole["cases"] and again["inference_seconds"] > 1000


def test_a_script_of_ones_own_with_several_seeds_gives_the_reports_table(data, tmp_path, capsys):
    """A file that the repository does not hold; with --keep_last, of which files of iterations stay."""
    script = tmp_path / "train_mine.py"
    script.write_text((ROOT / "train_sup.py").read_text().replace('model="supervised"', 'model="mine"'))
    out = tmp_path / "out"
    words = ["--seeds", "1", "2", "--out", str(out), "--methods", str(script), "--labels", "3"]
    words += ["--flags", "--root_path", str(data), *FLAGS, "--keep_last", "3", "--save_freq", "1"]
    assert table.main(words) == 0
    printed = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert sorted(printed[:2]) == [f"done: {out}/train_mine_3/seed{seed}" for seed in (1, 2)]
    assert "\n".join(printed[2:]) == report.to_text(report.report([out], per_class=True)[0]).partition("\n\n")[0]
    # What was cut off between two of the kept files goes on.
    (weights,) = out.glob("train_mine_3/seed1/model/*/*/iter_3.pth")
    weights.unlink()
    assert methods.trained_weights(out / "train_mine_3/seed1") is None
    with pytest.raises(SystemExit) as stopped:
        table.main(["--out", str(tmp_path / "other"), "--methods", "train_nothing.py"])
    assert stopped.value.code == 2
    assert "train_nothing.py: no such training script; there are train_mean_teacher, " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_grid_with_looks_at_the_test_cases(data, tmp_path, capsys):
    """Student and teacher, with and without the largest piece, and what selecting on the test cases would gain."""
    grid = {"data": {"LA_half": f"{data} --num_workers 0"}, "labels": [3], "seeds": [1]}
    grid |= {"methods": {"steep": "MT --consistency 5"}, "weights": ["student", "teacher"]}
    grid |= {"select_on_test": 2, "test_flags": "--measure_largest", "baseline": "MT student"}
    grid |= {"flags": f"{' '.join(FLAGS)} --dataset_name LA_half"}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    assert table.main(["--grid", str(tmp_path / "grid.json"), "--out", str(tmp_path / "out")]) == 0
    found, rows = report.report([tmp_path / "out"], baseline="MT student", per_class=True)
    assert report.to_markdown(found) == (tmp_path / "out/table.md").read_text()
    assert {"inflation Dice %", "Dice largest piece %", "HD95 largest piece voxel"} <= set(found.columns)
    assert [row.name for row in rows] == ["MT, student", "MT, teacher"]
    for row in rows:
        prefix = "ema_" if row.weights == "teacher" else ""
        folders = (row.results[0].run / f"{prefix}iter_{number}_test" for number in (2, 3))
        tested = [json.loads((folder / "metrics.json").read_text())["cases"] for folder in folders]
        first, last = (np.mean([case["dice"] for case in cases]) for cases in tested)
        np.testing.assert_allclose(row.inflation(), [max(first - last, 0)])
        assert row.mark and "tested at 2 iterations" in row.incomparable
    for key, wrong in (("sedes", [1]), ("methods", {"train_nothing": ""})):
        (tmp_path / "wrong.json").write_text(json.dumps(grid | {key: wrong}))
        with pytest.raises(SystemExit) as stopped:
            table.main(["--grid", str(tmp_path / "wrong.json"), "--out", str(tmp_path / "other")])
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1) and ("sedes" in error or "train_nothing" in error)
    assert not (tmp_path / "other").exists()


def test_without_methods_a_table_has_a_row_for_every_training_script(tmp_path, monkeypatch):
    """A recipe that a reader adds is one of them; a name of the grid that needs a script goes before it."""
    scripts = [*methods.training_scripts(), tmp_path / "train_new.py"]
    scripts[-1].write_text("")
    monkeypatch.setattr(table, "training_scripts", lambda: scripts)
    args, grid = table.parse(["--out", str(tmp_path), "--seeds", "1"])
    assert [folder.parent.name for folder, _ in table.jobs_of(args, grid)] == [f"{s.stem}_8" for s in scripts]
    (tmp_path / "grid.json").write_text(
        '{"methods": {"*": "", "slow": "MT --ema_decay 0.999"}, "flags": "--n_filters 2"}'
    )
    args, grid = table.parse(["--out", str(tmp_path), "--grid", str(tmp_path / "grid.json"), "--seeds", "1"])
    jobs = table.jobs_of(args, grid)
    assert {folder.parent.name for folder, _ in jobs} == {"slow_8"} | {
        f"{s.stem}_8" for s in scripts if s.stem != "train_mean_teacher"
    }
    assert jobs[0][1][1:5] == ["--n_filters", "2", "--ema_decay", "0.999"]
    row = "mine=MT --pretrained {data}_{seed}/iter_2.pth"
    words = ["--out", str(tmp_path), "--data", "data/a", "data/b", "--methods", row, "--seeds", "7", "8"]
    begun_with = [words[4] for _, words in table.jobs_of(*table.parse(words))]
    assert begun_with == [f"{data}_{seed}/iter_2.pth" for seed in (7, 8) for data in "ab"]


@pytest.mark.parametrize("grid", sorted((ROOT / "benchmarks/grids").glob("*.json")), ids=lambda path: path.stem)
def test_every_grid_names_scripts_and_flags_that_there_are(grid, data, tmp_path, monkeypatch):
    for name in json.loads(grid.read_text())["data"]:
        (tmp_path / "data").mkdir(exist_ok=True)
        if name in ("uhcs", "ebc"):
            make_images(tmp_path / "data" / name)
        else:
            (tmp_path / "data" / name).symlink_to(data)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for _, (script, *words) in table.jobs_of(*table.parse(["--grid", str(grid), "--out", str(tmp_path)])):
        flags.parse(methods.parser_of(Path(script)), words)


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": {"MT": 3}},
        {"methods": {"MT": None}},
        {"methods": {"MT": 'MT "'}},
        {"methods": ["MT"]},
        {"labels": ["four"]},
        {"labels": []},
        {"seeds": "first"},
        {"flags": ["--n_filters", "2"]},
        {"jobs": 0},
        {"select_on_test": 0},
        {"published": "nothing.json"},
    ],
    ids=json.dumps,
)
def test_a_grid_of_wrong_values_is_refused_before_anything_is_written(wrong, tmp_path, capsys):
    (tmp_path / "grid.json").write_text(json.dumps(wrong))
    for grid in ("grid.json", "none.json"):
        with pytest.raises(SystemExit) as stopped:
            table.main(["--grid", str(tmp_path / grid), "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1) and not (tmp_path / "out").exists(), error


def test_what_stands_there_twice_is_one_run_or_refused(tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--labels", "4", "4", "--seeds", "1", "1", "--methods"]
    assert len(table.jobs_of(*table.parse([*words, "MT"]))) == 1
    with pytest.raises(SystemExit):
        table.main([*words, "train_sup", "mine/train_sup.py"])
    assert "train_sup: there are 2 of this name; give others" in capsys.readouterr().err


def test_a_failure_is_told_by_its_sentence_whatever_else_writes_into_the_log(tmp_path):
    (tmp_path / "script.py").write_text("print('error: new'); print('other words'); raise SystemExit(2)")
    (tmp_path / "log").write_text("error: old\n")
    with pytest.raises(table.BenchmarkError, match=r"exit code 2 \(error: new\)"):
        table.call([tmp_path / "script.py"], tmp_path / "log", float("inf"))


def test_numbers_of_a_grid_need_no_list(tmp_path):
    (tmp_path / "grid.json").write_text('{"labels": 4, "seeds": "7", "test_flags": "--measure_largest"}')
    args, _ = table.parse(["--grid", str(tmp_path / "grid.json"), "--out", str(tmp_path)])
    assert (args.labels, args.seeds, args.test_flags) == ([4], [7], "--measure_largest")


def test_a_training_that_fails_ends_a_benchmark_in_a_sentence(data, tmp_path, capsys):
    """And leaves the others alone."""
    words = ["--out", str(tmp_path), "--methods", "train_sup", "broken=MT --no_such_flag 1", "--labels", "3"]
    with pytest.raises(SystemExit) as stopped:
        table.main([*words, "--seeds", "1", "--data", str(data), "--flags", *FLAGS])
    out, error = capsys.readouterr()
    assert (stopped.value.code, error.count("\n")) == (2, 1), error
    assert "ended with exit code 2" in error and "no_such_flag" in error and "train.log" in error
    assert "supervised" in out and (tmp_path / "table.md").is_file()
    # Its flags may be mended: nothing was trained with them.
    words[4] = "broken=MT"
    assert table.main([*words, "--seeds", "1", "--data", str(data), "--flags", *FLAGS]) == 0


def test_scripts_are_found_by_file_name_and_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "recipes/train_cps.py"
    for word in ("recipes/train_cps.py", "train_cps.py", "train_cps", "CPS", str(recipe)):
        assert methods.find_script(word) == recipe
    (tmp_path / "train_own.py").write_text("")
    assert methods.find_script("train_own.py") == tmp_path / "train_own.py"
    scripts = [ROOT / "train_sup.py", shutil.copy(ROOT / "train_sup.py", tmp_path / "train_own.py")]
    monkeypatch.setattr(methods, "training_scripts", lambda: scripts)
    monkeypatch.setattr(methods.flags, "HOME", tmp_path.parents[-1])
    with pytest.raises(methods.MethodError, match=r"supervised: is the method of .*train_sup.py and .*train_own.py;"):
        methods.find_script("supervised")
    assert methods.find_script("train_own") == tmp_path / "train_own.py"


def test_the_table_stands_there_though_its_baseline_is_not(data, tmp_path, capsys):
    words = ["--out", str(tmp_path), "--methods", "train_sup", "--labels", "3", "--seeds", "1", "--baseline", "MTT"]
    with pytest.raises(SystemExit) as stopped:
        table.main([*words, "--flags", "--root_path", str(data), *FLAGS])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "--baseline 'MTT' names no row" in said.err and "mean ± SD" not in said.err
    assert "mean ± SD over seeds" in said.out and "| supervised |" in (tmp_path / "table.md").read_text()


def test_a_training_that_outlasts_the_call_is_stopped_and_goes_on(data, tmp_path, monkeypatch):
    """Its time is over as soon as it has logged two iterations: it saves its state before it ends."""
    monkeypatch.setattr(table.processes, "TO_STOP", 60)
    run_folder = tmp_path / "run"
    words = [ROOT / "train_sup.py", "--root_path", data, "--labelnum", "2", *FLAGS, "--max_iterations", "100000"]
    words += ["--output_dir", run_folder, "--resume"]

    waited = table.subprocess.Popen.wait

    def wait(process, timeout=None):
        if timeout != table.processes.TO_STOP and timeout is not None:
            while not any(path.read_text().count("\n") > 2 for path in run_folder.glob("model/*/*/metrics.csv")):
                assert process.poll() is None
                table.time.sleep(0.05)
            raise table.subprocess.TimeoutExpired("train", timeout)
        return waited(process, timeout)

    monkeypatch.setattr(table.subprocess.Popen, "wait", wait)
    with pytest.raises(table.OutOfTime):
        table.call(words, tmp_path / "train.log", table.time.monotonic() + 600)
    state = torch.load(next(run_folder.glob("model/*/*/latest.pth")), weights_only=True)
    assert state["iteration"] >= 2
