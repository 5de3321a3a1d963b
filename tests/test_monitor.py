"""The views of metrics.csv, read back with TensorBoard's, W&B's and Pillow's own readers."""

import builtins
import contextlib
import csv
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mtseg.classes import OKABE_ITO
from mtseg.script.clock import StepClock, peak_memory
from mtseg.script.monitor import Monitor, MonitorError, check_extras
from mtseg.script.progress import draw_progress, panels_of
from mtseg.script.runlog import MetricsError, read_metrics, training_cost
from mtseg.script.snapshot import case_picture, visible

FIELDS = ["iteration", "phase", "lr", "loss", "consistency_weight", "val_dice_student", "val_dice_teacher"]


def rows(first, last, shift=0.0):
    for i in range(first, last + 1):
        row = {"iteration": i, "phase": "ramp" if i < 4 else "stable", "lr": 0.01, "loss": 1 / i + shift}
        row["consistency_weight"] = min(i, 4) / 40
        if i % 2 == 0:
            row |= {"val_dice_student": 0.5, "val_dice_teacher": 0.6}
        yield row


def write(folder, upto, shift=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows(1, upto, shift))
        file.write("7,ram")  # what a crash leaves


def run_and_resume(folder, **flags):
    """Seven iterations, of which a checkpoint kept five; then the run goes on from there to the ninth."""
    said = []
    flags["say"] = said.append
    first = Monitor(folder, **flags)
    for row in rows(1, 7, shift=100.0):
        first.row({**row, "loss": 1 / row["iteration"]} if row["iteration"] <= 5 else row)
    first.close()
    write(folder, 7)
    second = Monitor(folder, start=5, **flags)
    for row in rows(6, 9):
        second.row(row)
    second.close()
    assert said == []


def test_event_files_hold_every_iteration_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0)
    run_and_resume(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(FIELDS) - {"iteration", "phase"}
    loss = events.Scalars("loss")
    assert [event.step for event in loss] == list(range(1, 10))
    assert [event.value for event in loss] == pytest.approx([1 / i for i in range(1, 10)])
    assert [event.step for event in events.Scalars("val_dice_teacher")] == [2, 4, 6, 8]
    # TensorBoard itself hides duplicates behind a purge step; the files themselves must not hold any.
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def logged(file):
    """{column: value} of each row in a .wandb file, '_step' among them."""
    from wandb.proto.wandb_internal_pb2 import Record

    # LevelDB's log format behind a header of 7 bytes: checksum, length and kind before each record.
    data, place, rows = file.read_bytes(), 7, []
    assert len(data) < 32768  # one block
    while place + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1  # a whole record
        record = Record.FromString(data[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = (
                ("".join([item.key, *item.nested_key]), json.loads(item.value_json)) for item in record.history.item
            )
            rows.append(dict(items))
    return rows


def test_wandb_offline_needs_no_network_and_holds_every_iteration_once(tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "model" / "LA_vnet_8_labeled" / "MT"
    write(folder, 0)
    code = "import sys, test_monitor as t\nt.run_and_resume(t.Path(sys.argv[1]), wandb='offline', config={})"
    with socket.create_server(("127.0.0.1", 0)) as server:
        # A process and settings of its own: what another test has loaded here may call, as ONNX Runtime does.
        names = ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        where = dict.fromkeys(names, f"http://127.0.0.1:{server.getsockname()[1]}") | {"HOME": str(tmp_path)}
        words = [sys.executable, "-c", code, str(folder)]
        subprocess.run(words, cwd=Path(__file__).parent, env=os.environ | where, check=True)
        server.setblocking(False)
        said = b""
        with contextlib.suppress(BlockingIOError):
            caller, _ = server.accept()
            caller.settimeout(60)
            said = caller.recv(1000)
        assert said == b""  # nobody has called

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert file.name == f"run-{(folder / 'wandb_id').read_text().strip()}.wandb"
    # The process of Weights & Biases that writes the file may be behind the run's end by a moment.
    deadline = time.monotonic() + 600
    while len(rows := logged(file)) < 9 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["_step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows] == pytest.approx([1 / i for i in range(1, 10)])


PICTURES = {
    "best: image_7, Dice 0.91": np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8),
    "worst: a: b, Dice 0.12": np.full((5, 7, 3), 9, np.uint8),
}


def show_pictures(folder, **flags):
    said = []
    monitor = Monitor(folder, say=said.append, seconds=None, **flags)
    for iteration in (4, 8):
        monitor.pictures(iteration, PICTURES)
        monitor.row({"iteration": iteration, "loss": 1.0})
    monitor.close()
    assert said == []


def test_tensorboard_shows_the_pictures_of_a_validation(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    show_pictures(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["validation/best", "validation/worst"]
    for name, picture in zip(("best", "worst"), PICTURES.values(), strict=True):
        shown = events.Images(f"validation/{name}")
        assert [image.step for image in shown] == [4, 8]
        for image in shown:
            assert (np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) == picture).all()
    captions = [event.tensor_proto.string_val for event in events.Tensors("validation/worst/text_summary")]
    assert captions == [[b"a: b, Dice 0.12"]] * 2


def test_wandb_holds_the_pictures_of_a_validation(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    from PIL import Image

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    show_pictures(tmp_path / "run", wandb="offline")
    (folder,) = tmp_path.glob("run/wandb/offline-run-*")
    deadline = time.monotonic() + 600
    while len(rows := logged(next(folder.glob("*.wandb")))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["_step"] for row in rows] == [4, 8] and {row["loss"] for row in rows} == {1.0}
    for row in rows:
        for title, picture in PICTURES.items():
            name, caption = title.split(": ", 1)
            assert row[f"validation/{name}caption"] == caption
            path = folder / "files" / row[f"validation/{name}path"]
            assert (np.asarray(Image.open(path)) == picture).all()


def test_a_view_that_fails_at_a_picture_is_given_up_in_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    said = []
    monitor = Monitor(tmp_path, say=said.append, tensorboard=True, seconds=None)
    monitor.pictures(1, {title: picture[..., 0] for title, picture in PICTURES.items()})  # without colours
    monitor.close()
    assert len(said) == 1 and said[0].startswith("TensorBoard failed")


def rgb(*panels):
    """Panels side by side, with a gap between them."""
    gap = np.full((len(panels[0]), 4, 3), 255)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def test_the_picture_of_a_case_is_its_image_with_classes_in_colour_beside():
    image = np.arange(12, dtype=np.uint16).reshape(3, 4) * 1000
    label, prediction = np.zeros((2, 3, 4), int)
    label[0, 1], label[2, 3], prediction[0, 1] = 1, 255, 2
    low, high = np.percentile(image, [1, 99.5])
    grey = np.floor(np.clip((image - low) * 255 / (high - low) + 1e-3, 0, 255)).repeat(3).reshape(3, 4, 3)
    palette = np.zeros((256, 3), np.uint8)
    palette[[0, 1, 2]] = (0, 0, 255), (255, 0, 0), (0, 255, 0)

    def colored(mask, background):
        mixed = np.rint(0.4 * grey + 0.6 * palette[mask])
        return np.where(((mask == 255) | (mask == background))[..., None], grey, mixed)

    for background in (0, None):
        expected = rgb(grey, colored(label, background), colored(prediction, background))
        found = case_picture(image, label, prediction, palette, background=background)
        assert found.dtype == np.uint8 and (found == expected).all()
        channels = np.stack([image, image[::-1]])  # of two channels the first is drawn
        assert (case_picture(channels, label, prediction, palette, background=background) == expected).all()
    colours = np.random.default_rng(0).integers(0, 256, (3, 50, 60), dtype=np.uint8)
    picture = case_picture(colours, *np.zeros((2, 50, 60), int))[:, :60]
    assert np.corrcoef(picture.ravel(), np.moveaxis(colours, 0, -1).ravel())[0, 1] > 0.999
    assert case_picture(np.zeros((8, 1300)), *np.zeros((2, 8, 1300), int)).shape == (4, 3 * 650 + 8, 3)


def test_a_grey_class_has_another_colour_than_the_image_and_the_other_classes():
    palette = np.full((256, 3), 255, np.uint8)
    palette[[0, 2]] = (0, 0, 0), OKABE_ITO[0]
    colors = visible(palette)
    assert colors[0].tolist() == [0, 0, 0] and tuple(colors[2]) == OKABE_ITO[0]
    assert tuple(colors[1]) in OKABE_ITO[1:] and tuple(colors[3]) in set(OKABE_ITO) - {tuple(colors[1]), OKABE_ITO[0]}


def test_the_picture_of_a_volume_and_of_a_stack_is_the_slice_with_most_labelled_voxels():
    rng = np.random.default_rng(0)
    stack, label = rng.random((3, 4, 6)), np.zeros((3, 4, 6), np.uint8)
    label[1, :2], label[0, 0], label[2] = 1, 2, 255
    expected = case_picture(stack[1], label[1], label[1])
    assert (case_picture(stack, label, label, axis=0) == expected).all()
    # A volume (W, H, D) has its first axis from left to right and its second from below, as in the figures.
    volume, of_volume = (array.transpose(2, 1, 0)[:, ::-1] for array in (stack, label))
    assert (case_picture(volume, of_volume, of_volume) == expected).all()
    assert (case_picture(np.stack([volume] * 2), of_volume, of_volume) == expected).all()


CLASS_COLUMNS = ("val_dice_student", "val_dice_teacher", "val_dice_student/a_loss", "val_dice_teacher/5 $x$ $")


def test_the_validation_dice_of_classes_have_a_panel_of_their_own_where_colours_suffice(tmp_path):
    pytest.importorskip("matplotlib")
    columns = ["loss", "time_seconds", *CLASS_COLUMNS]
    panels = {title: names for title, names, _ in panels_of(columns)}
    assert panels == {
        "loss": ["loss"],
        "validation Dice": list(CLASS_COLUMNS[:2]),
        "validation Dice of each class": list(CLASS_COLUMNS[2:]),
        "seconds per iteration": ["time_seconds"],
    }
    assert "validation Dice of each class" not in {
        title for title, *_ in panels_of([f"val_dice/{n}" for n in range(9)])
    }
    lines = [",".join(["iteration", *columns]), *(f"{n},1,2,0.5,0.6,0.7,0.8" for n in (1, 2))]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    draw_progress(tmp_path)  # a name with $ is no formula
    assert (tmp_path / "progress.png").exists()


@pytest.mark.parametrize(
    ("flags", "package"),
    [({"tensorboard": True}, "tensorboard"), ({"wandb": "offline"}, "wandb"), ({"wandb": "online"}, "wandb")],
)
def test_a_missing_extra_is_named_before_anything_is_written(monkeypatch, tmp_path, flags, package):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "torch.utils.tensorboard" or name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MonitorError, match=f"^--{package} .*: pip install {package}$"):
        check_extras(**flags)
    with pytest.raises(MonitorError, match=f"pip install {package}$"):
        Monitor(tmp_path, **flags)
    assert list(tmp_path.iterdir()) == []
    check_extras()


def test_without_matplotlib_one_line_says_so_and_the_run_goes_on(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    said = []
    write(tmp_path, 3)
    monitor = Monitor(tmp_path, say=said.append, seconds=0)
    for row in rows(1, 3):
        monitor.row(row)
    monitor.close()
    assert len(said) == 1 and "pip install matplotlib" in said[0]
    assert not (tmp_path / "progress.png").exists()


def test_a_view_that_fails_is_given_up_in_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    said = []
    monitor = Monitor(tmp_path, say=said.append, tensorboard=True, seconds=0)
    monitor.views["TensorBoard"].writer.close()
    monitor.views["TensorBoard"].writer = None
    for row in rows(1, 3):
        monitor.row(row)
    monitor.close()
    assert len(said) == 1 and said[0].startswith("TensorBoard failed")

    (tmp_path / "metrics.csv").write_text("iteration,loss\nx,1\n")
    monitor = Monitor(tmp_path, say=said.append, seconds=0)
    monitor.row({"iteration": 1, "loss": 1.0})
    monitor.close()
    assert len(said) == 2 and said[1].startswith("progress.png failed")


def test_the_picture_follows_metrics_csv_and_is_not_drawn_too_often(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    from PIL import Image

    write(tmp_path, 6)
    monitor = Monitor(tmp_path, seconds=1000)
    monitor.row({"iteration": 6, "loss": 1.0})
    assert not (tmp_path / "progress.png").exists()
    monitor.views["progress.png"].draw_next = time.monotonic()
    monitor.row({"iteration": 6, "loss": 1.0})
    assert monitor.views["progress.png"].draw_next > time.monotonic() + 900
    picture = Image.open(tmp_path / "progress.png").convert("RGB")
    assert picture.size[0] == 1200
    colors = {color for _, color in picture.getcolors(picture.size[0] * picture.size[1])}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors  # student and teacher
    for phase in ((0xF0, 0xE4, 0x42), (0x56, 0xB4, 0xE9)):  # ramp and stable, at 22 % on white
        pale = [255 - 0.22 * (255 - value) for value in phase]
        assert any(np.allclose(color, pale, atol=1) for color in colors)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.csv", "progress.png"}
    Monitor(tmp_path)  # a run that begins anew
    assert not (tmp_path / "progress.png").exists()


def test_the_curves_of_a_long_run_are_thinned_to_what_a_panel_can_show(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, plot=Axes.plot, **style: drawn.append((x, y)) or plot(self, x, y, **style)
    )
    values = np.random.default_rng(0).random(20000) + 1
    values[[7777, -1]] = 5, 3  # one high row among many, and where the curve ends
    lines = (f"{number},{value},{value}" for number, value in enumerate(values, start=1))
    (tmp_path / "metrics.csv").write_text("\n".join(["iteration,loss,peak_memory_mb", *lines]) + "\n")
    draw_progress(tmp_path)
    assert len(drawn) == 3  # the loss and its running mean, the memory
    assert all(900 < len(x) <= 1002 and (np.diff(x) > 0).all() for x, _ in drawn)
    for x, y in (drawn[0], drawn[2]):
        assert (values[np.asarray(x, int) - 1] == y).all()
        assert {7778, 20000} <= set(x) and min(y) == values.min()
    assert drawn[1][0][-1] == 20000 and drawn[1][1][-1] == pytest.approx(values[-400:].mean())


def test_no_picture_of_no_rows(tmp_path):
    pytest.importorskip("matplotlib")
    draw_progress(tmp_path)
    write(tmp_path, 0)
    draw_progress(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.csv"}


def test_the_clock_counts_waiting_and_computing_and_nothing_else(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def loader():
        for _ in range(4):
            now[0] += 2
            yield "batch"

    clock = StepClock(torch.device("cpu"))
    assert clock.row() == {}
    means = []
    for number, batch in enumerate(clock.batches(loader()), start=1):
        assert batch == "batch"
        now[0] += number
        clock.stepped()
        if number % 2 == 0:
            means.append(clock.row())
            now[0] += 100  # a validation
    assert [(row["data_seconds"], row["step_seconds"]) for row in means] == [(2, 1.5), (2, 3.5)]


def test_peak_memory_is_in_bytes():
    """Against the kernel's own figure, VmHWM, which counts in units of 1024 bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")
    block = torch.ones(2**23)
    kernel = int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    assert peak_memory(torch.device("cpu")) == pytest.approx(kernel, rel=0.02)
    assert kernel > block.nbytes


class Queue:
    """A GPU that works off a queue: recording an event costs nothing, and is reached when all before it is done."""

    def __init__(self, monkeypatch):
        self.now, self.free_at, self.waits = 0.0, 0.0, []
        queue = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.reached = queue.free_at = max(queue.free_at, queue.now)

            def synchronize(self):
                queue.waits.append(max(0.0, self.reached - queue.now))
                queue.now = max(queue.now, self.reached)

            def elapsed_time(self, other):
                return 1e3 * (other.reached - self.reached)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_000_000)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def launch(self, seconds):
        self.free_at = max(self.free_at, self.now) + seconds


@pytest.mark.parametrize(("load", "work"), [(0.5, 2.0), (3.0, 2.0)])
def test_step_seconds_on_a_gpu_hold_the_queued_backward_pass(monkeypatch, load, work):
    """Queueing takes 0.1 s, the GPU `work`: the clock says the latter, and of the wait for batches what it costs."""
    queue = Queue(monkeypatch)

    def loader():
        for _ in range(6):
            queue.now += load
            yield "batch"

    clock = StepClock(torch.device("cuda"))
    rows = []
    for _ in clock.batches(loader()):
        queue.launch(work)
        queue.now += 0.1
        clock.stepped()
        rows.append(clock.row())
    assert [row["step_seconds"] for row in rows] == pytest.approx([work] * 6)
    # Rows are one iteration late; the first, which waited for the GPU, holds the same iteration as the second.
    waits = [row["data_seconds"] for row in rows]
    assert waits == pytest.approx([load, load, load] + [max(0.0, load + 0.1 - work)] * 3)
    assert rows[-1]["peak_memory_mb"] == 5
    # But for the first row, the GPU had the next iteration in its queue whenever the clock waited for it.
    assert queue.waits[0] == pytest.approx(work - 0.1)
    assert all(wait <= work - 0.1 for wait in queue.waits[1:])
    assert clock.row() == {} or clock.row()["step_seconds"] == pytest.approx(work)


def test_a_damaged_or_foreign_metrics_csv_is_one_sentence(tmp_path):
    file = tmp_path / "metrics.csv"
    for content, line in (
        (b"case,class,dice\na,1,0.5\n", 2),
        (b"iteration,loss\n1,0.5\n\x00\x00\x00,1\n", 3),
        (b"iteration,loss\n1,0.5\n2,\xff\xfe\n", 1),
    ):
        file.write_bytes(content)
        with pytest.raises(MetricsError, match=rf"^{file}: line {line} is not of a run's metrics.csv \(.*\); restore"):
            list(read_metrics(file))
        with pytest.raises(MetricsError):
            training_cost(file)
    file.write_text("iteration,loss,iterations_per_second\n1,0.5,0\n")
    with pytest.raises(MetricsError, match="of iteration 1"):
        training_cost(file)
    file.write_text("\ufeffiteration,loss,iterations_per_second\n4,0.5,2\n6,0.5,4\n8,0.4")
    assert training_cost(file)[0] == 2.5
    assert training_cost(file, last=5)[0] == 2.0  # what weights of that iteration took
