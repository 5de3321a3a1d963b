"""The benchmarks run and compare what they say; nothing here looks at a time."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import family  # noqa: E402
import la_full  # noqa: E402
import run  # noqa: E402

from mtseg.datasets import LAHeart  # noqa: E402
from mtseg.transforms import Compose, RandomCrop, RandomRotFlip, ToTensor  # noqa: E402


@pytest.mark.parametrize("patch_size", [(16, 16, 8), (16, 32, 16)])
def test_the_familys_sample_is_the_same_sample(data, patch_size):
    dataset = LAHeart(data, transform=Compose([RandomRotFlip(), RandomCrop(patch_size), ToTensor()]))
    for seed in range(20):
        theirs = family.sample(dataset.path("case_1"), patch_size, np.random.default_rng(seed))
        ours = dataset[(1, seed)]
        assert all(torch.equal(ours[key], theirs[key]) for key in ("image", "label"))


def test_the_familys_iteration_computes_the_same():
    losses, networks = [], []
    for way in (run.step, family.mean_teacher_step):
        networks.append(run.mean_teacher(2, run.CPU))
        torch.manual_seed(3)
        batch = run.batch_of((16, 16, 16), run.CPU)
        losses.append([float(way(*networks[-1], *batch, 0.1, turn)) for turn in range(3)])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for ours, theirs in zip(*networks, strict=True):
        if isinstance(ours, torch.nn.Module):
            for name, value in ours.state_dict().items():
                torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-4, atol=1e-5)


QUICK = [name for name in run.CPU_ROWS if name not in ("start_up", "growth")]  # processes that load PyTorch again


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_its_rows_say_so(capsys):
    report = run.main(["--quick", *(word for name in run.GPU_ROWS for word in ("--only", name))])
    assert [entry["note"] for entry in report["rows"]] == ["not measured: there is no GPU"] * len(run.GPU_ROWS)


def test_the_table_says_what_is_reached_and_goes_between_the_marks(tmp_path):
    times = {"mtseg": [0.001, 0.002, 0.004], "family": [0.003, 0.008, 0.004]}
    entry = run.row("a row", times, "a note", {"family": 3, "MONAI": 1}, **{"2 ms": True})
    assert entry["goals"] == {"3 x family": True, "1 x MONAI": None, "2 ms": True}
    assert not run.row("a row", times, "", {"family": 3.5})["goals"]["3.5 x family"]
    report = {"command": ["--only", "x"], "minutes": 1, "machine": {}, "rows": [entry, run.fact("flat", "1 2")]}
    text = run.table(report)
    assert text.splitlines()[-2:] == [
        "| a row (a note) | 2 ms (1 ms .. 4 ms) | family 4 ms (3 ms .. 8 ms): 3.00 x "
        "| 3 x family: reached; 1 x MONAI: not judged; 2 ms: reached |",
        "| flat | 1 2 |  |  |",
    ]
    assert run.table(report, short=True).splitlines()[-2:] == [
        "| a row | 2 ms | family 4 ms: 3.00 x | 3 x family: reached; 1 x MONAI: not judged; 2 ms: reached |",
        "| flat | 1 2 |  |  |",
    ]
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    for _ in range(2):
        run.put_figures(path, text)
        assert path.read_text() == f"before\n<!-- figures -->\n{text}<!-- end of figures -->\nafter\n"
    path.write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md: no lines"):
        run.put_figures(path, text)
    assert path.read_text() == "no marks"
    with pytest.raises(SystemExit) as stopped:
        run.main(["--figures", str(path)])
    assert stopped.value.code == 2


FLAGS = "--max_iterations 3 --n_filters 2 --patch_size 16 16 16 --num_workers 0 --stride_xy 8 --stride_z 8".split()


def test_the_protocol_goes_on_until_its_table_is_full(data, tmp_path, capsys):
    words = ["--root_path", str(data), "--out", str(tmp_path / "out"), "--methods", "train_sup", "--labels", "2", "3"]
    assert la_full.main([*words, "--minutes", "0", "--flags", *FLAGS]) == la_full.MORE_TO_DO
    assert "2 of 2 runs are left" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/**/*.pth"))
    assert la_full.main([*words, "--flags", *FLAGS]) == 0
    table = (tmp_path / "out/table.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[:4] for line in table.splitlines()[2:]] == [
        ["| train_sup", "2", "1", "1337"],
        ["| train_sup", "3", "1", "1337"],
    ]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/train_*/**/*.*")}
    assert la_full.main([*words, "--minutes", "0", "--flags", *FLAGS]) == 0
    assert (tmp_path / "out/table.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/train_*/**/*.*")} == before
    with pytest.raises(SystemExit) as stopped:
        la_full.main([*words, "--flags", "--max_iterations", "4"])
    assert stopped.value.code == 2
    assert "give the same" in capsys.readouterr().err


def test_a_training_that_outlasts_the_call_is_stopped_and_goes_on(data, tmp_path, monkeypatch):
    """Its time is over as soon as it has logged two iterations: it saves its state before it ends."""
    monkeypatch.setattr(la_full, "TO_STOP", 60)
    run_folder = tmp_path / "run"
    flags = ["--root_path", str(data), "--labelnum", "2", *FLAGS, "--max_iterations", "100000"]

    waited = la_full.subprocess.Popen.wait

    def wait(process, timeout=None):
        if timeout != la_full.TO_STOP and timeout is not None:
            while not any(path.read_text().count("\n") > 2 for path in run_folder.glob("model/*/*/metrics.csv")):
                assert process.poll() is None
                la_full.time.sleep(0.05)
            raise la_full.subprocess.TimeoutExpired("train", timeout)
        return waited(process, timeout)

    monkeypatch.setattr(la_full.subprocess.Popen, "wait", wait)
    with pytest.raises(la_full.OutOfTime):
        la_full.train("train_sup", run_folder, flags, la_full.time.monotonic() + 600)
    state = torch.load(next(run_folder.glob("model/*/*/latest.pth")), weights_only=True)
    assert state["iteration"] >= 2


def test_the_table_leaves_out_empty_masks_and_counts_them():
    def rows(*dices):
        return {
            str(n): [{"class": 1, "dice": d, "jaccard": d, "hd95": None if d == 0 else 4.0, "asd": 1.0}]
            for n, d in enumerate(dices)
        }

    text = la_full.table({("MT", 8, 1): rows(0.5, 0.7), ("MT", 8, 2): rows(0.0, 1.0)})
    assert text.splitlines()[-1] == (
        "| MT | 8 | 1 | 1, 2 | 55.00 ± 7.07 | 55.00 ± 7.07 | 4.00 ± 0.00 | 1.00 ± 0.00 | 42.4 | 1 |"
    )
