"""Pictures: what they show is computed right, nothing in them overlaps, and the commands write them."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import ball, write_case
from PIL import Image
from test_report import write_images, write_run

import inference
from mtseg import figures, html_report, metrics, report
from mtseg.classes import ClassTable
from mtseg.figures import cases as of_cases
from mtseg.figures.__main__ import main as draw
from mtseg.figures.slices import WRONG, slice_legend
from mtseg.html_report.__main__ import main as write_page
from mtseg.images import png_bytes, tiff_bytes
from mtseg.networks import VNet
from mtseg.script.progress import moving_average

plt = pytest.importorskip("matplotlib.pyplot", reason="pictures need Matplotlib")
SHAPE = (30, 26, 20)


def make_case(shift, seed=0, radius=7):
    rng = np.random.default_rng(seed)
    label = ball(SHAPE, (14, 12, 9), radius).astype(np.uint8)
    prediction = ball(SHAPE, (14 + shift, 12, 9), radius).astype(np.uint8)
    image = (label + 0.3 * rng.standard_normal(SHAPE)).astype(np.float32)
    return {"image": image, "label": label, "prediction": prediction}


def write_predictions(folder, shifts):
    folder.mkdir(parents=True)
    for number, shift in enumerate(shifts):
        with h5py.File(folder / f"case_{number}.h5", "w") as file:
            for name, volume in make_case(shift, number).items():
                file.create_dataset(name, data=volume)
    return folder


def texts_that_overlap(figure):
    """Pairs of drawn texts whose boxes share more than a pixel, and texts that leave the figure's width."""
    drawn, draw = {}, plt.Text.draw
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plt.Text, "draw", lambda text, *a, **k: [drawn.update({text: None}), draw(text, *a, **k)])
        figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    drawn = [text for text in drawn if text.get_visible() and text.get_text().strip()]
    assert len(drawn) > 3
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in drawn]
    wide = [name for name, box in boxes if box.x0 < -1 or box.x1 > figure.bbox.width + 1]
    pairs = [
        (a, b)
        for (a, one), (b, two) in itertools.combinations(boxes, 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]
    plt.close(figure)
    return pairs + wide


def test_the_slices_that_are_shown():
    case = make_case(0)
    assert figures.largest_section(case["label"]) == (14, 12, 9)
    assert figures.worst_error(case["label"], case["prediction"]) is None
    far = case["label"].copy()
    far[29, 12, 9] = 1  # eight voxels from the ball's surface, whose last voxel is 21
    assert figures.worst_error(case["label"], far) == (29, 12, 9)
    far[14, 12, 16], far[14, 12, 15] = 0, 0
    assert figures.worst_error(case["label"], far) == (29, 12, 9)
    assert figures.worst_error(case["label"], far, spacing=(0.1, 1, 1)) == (14, 12, 16)
    assert figures.worst_error(case["label"], np.zeros(SHAPE)) == (14, 12, 9)
    assert figures.largest_section(np.zeros(SHAPE)) == (15, 13, 10)


def test_the_surface_of_a_ball_is_that_of_a_sphere():
    measure = pytest.importorskip("skimage.measure", reason="surfaces need scikit-image")
    vertices, faces = figures.surface(ball((40, 40, 40), (20, 20, 20), 12), spacing=(1, 1, 1))
    assert np.linalg.norm(vertices - 20, axis=1) == pytest.approx(12, abs=0.6)
    assert measure.mesh_surface_area(vertices, faces) == pytest.approx(4 * math.pi * 12**2, rel=0.04)
    vertices, _ = figures.surface(ball((40, 40, 40), (20, 20, 20), 12), spacing=(1, 2, 3))
    assert vertices.mean(axis=0) == pytest.approx([20, 40, 60], abs=0.5)
    with pytest.raises(figures.FigureError, match="empty mask"):
        figures.surface(np.zeros((8, 8, 8)))


@pytest.mark.parametrize("height", [1, 5])
def test_distances_between_surfaces_are_those_of_the_bodies(height):
    """A box whose top is moved by so many slices, thick or thin: the distance of the tops, and 0 where they agree."""
    pytest.importorskip("skimage", reason="surfaces need scikit-image")
    for slices in (0, 1, 2):
        label, higher = np.zeros((24, 24, 16)), np.zeros((24, 24, 16))
        label[4:20, 4:20, 4:10] = higher[4:20, 4:20, 4 : 10 + slices] = 1
        reference, found = (figures.surface(mask, (1, 1, height)) for mask in (label, higher))
        distances, centres = figures.distances_to(reference, found), found[0][found[1]].mean(axis=1)
        inner = (np.abs(centres[:, :2] - 11.5) < 5).all(axis=1)
        top = inner & (centres[:, 2] > 7 * height)
        assert distances[top] == pytest.approx(slices * height, abs=0.05) and top.sum() > 20
        assert distances[inner & ~top] == pytest.approx(0, abs=0.05)


def test_the_gallery_holds_the_best_the_median_and_the_worst_once():
    scores = {f"case_{n}": n / 10 for n in range(10)}
    picked = figures.pick_for_gallery(scores)
    assert [case for _, case in picked] == ["case_9", "case_5", "case_0", "case_1", "case_2", "case_3", "case_4"]
    assert picked[2][0] == "worst"
    assert figures.pick_for_gallery({"a": 0.5}) == [("best", "a")]


def test_moving_average():
    values = np.random.default_rng(0).random(50)
    np.testing.assert_allclose(moving_average(values, 7)[6:], np.convolve(values, np.ones(7) / 7, "valid"))
    np.testing.assert_allclose(moving_average(values, 7)[:3], [values[0], values[:2].mean(), values[:3].mean()])


@pytest.fixture
def styled():
    with figures.style():
        yield


def test_nothing_overlaps(styled):
    pytest.importorskip("skimage", reason="surfaces need scikit-image")
    cases = {name: make_case(shift) for shift, name in enumerate(("supervised", "Mean Teacher", "UA-MT"))}
    caption = "Dice 100.0 %\nHD95 100.0 voxel"
    captions = dict.fromkeys(cases, caption)
    names = ("loss", "supervised_loss", "consistency_dist", "consistency_weight", "lr", "val_dice_student")
    columns = {name: (np.arange(60), np.linspace(1e-3, 1, 60)) for name in (*names, "val_dice_teacher")}
    assert texts_that_overlap(figures.overlay(make_case(5), "0RZDK210BSMWAA6467LU: Dice 53.6 %, HD95 16.9 voxel")) == []
    assert texts_that_overlap(figures.compare(cases, captions)) == []
    entries = [(f"{n}. worst: {caption}", "0RZDK210BSMWAA6467LU", make_case(n)) for n in range(7)]
    assert texts_that_overlap(figures.gallery(entries)) == []
    masks = {name: case["prediction"] for name, case in cases.items()}
    assert texts_that_overlap(figures.surfaces(cases["UA-MT"]["label"], masks, captions)) == []
    runs = [(f"method {n}, 16 labels", seed, columns) for n in range(5) for seed in (1, 2)]
    assert texts_that_overlap(figures.curves(runs)) == []
    values = {"dice": np.linspace(0, 1, 20), "hd95": np.append(np.linspace(1, 99, 18), [np.nan, np.nan])}
    assert texts_that_overlap(figures.boxes({f"Mean Teacher, student, {n} labels": values for n in range(5)})) == []


def test_predictions_called_label_do_not_take_the_labels_place(styled):
    pytest.importorskip("skimage", reason="surfaces need scikit-image")
    case = make_case(2)
    figure = figures.surfaces(case["label"], {"label": case["prediction"]}, {"label": "Dice 70.00 %"})
    assert [text.get_text() for text in figure.texts] == ["label", "label\nDice 70.00 %"]
    assert len(figure.axes) == 2 * 2 + 1  # two views of each, and the colours
    plt.close(figure)


def test_an_empty_prediction_is_an_empty_place_beside_the_others(styled):
    pytest.importorskip("skimage", reason="surfaces need scikit-image")
    case = make_case(2)
    nothing = np.zeros_like(case["label"])
    figure = figures.surfaces(
        case["label"], {"a": nothing, "b": case["prediction"]}, {"a": "Dice 0 %", "b": "Dice 70 %"}
    )
    assert [text.get_text() for text in figure.texts] == ["label", "a\nDice 0 %\nempty", "b\nDice 70 %"]
    assert len(figure.axes) == 2 * 2 + 1  # two views of the label and of b, and the colours
    alone = figures.surfaces(case["label"], {"a": nothing}, {"a": "Dice 0 %"})
    assert len(alone.axes) == 2 + 1
    plt.close("all")


def test_errors_are_drawn_where_they_are(styled):
    """A missed and a superfluous voxel block, found again in the picture by the colours of the legend."""
    case = make_case(0)
    case["image"] = np.zeros(SHAPE, np.float32)
    case["label"][:] = case["prediction"][:] = 0
    case["label"][4:12, 4:22, :] = 1
    case["prediction"][18:26, 4:22, :] = 1
    figure, axes = plt.subplots(figsize=(3, 2.6), dpi=100)
    axes.set_position((0, 0, 1, 1))
    figures.draw_slice(axes, case, axis=2, index=9)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)
    plt.close(figure)
    yellow = (pixels[..., 0] > 80) & (pixels[..., 1] > 80) & (pixels[..., 2] < 60)
    blue = (pixels[..., 2] > 60) & (pixels[..., 0] < 30)
    columns = pixels.shape[1] / SHAPE[0]
    assert 18 < np.median(np.nonzero(yellow)[1]) / columns < 26
    assert 4 < np.median(np.nonzero(blue)[1]) / columns < 12


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    out = tmp_path_factory.mktemp("predictions")
    return {name: write_predictions(out / name, shifts) for name, shifts in {"A": (0, 1, 4), "B": (1, 2, 3)}.items()}


def test_commands_write_pictures(predictions, tmp_path, capsys):
    for method, base in (("MT", 0.6), ("supervised", 0.5)):
        write_run(tmp_path, method, dice=[base, base + 0.1, base + 0.2])
    folders = [f"first={predictions['A']}", f"second={predictions['B']}"]
    for kind, paths in [
        ("overlay", folders[:1]),
        ("compare", folders),
        ("gallery", folders[:1]),
        ("boxes", [tmp_path]),
    ]:
        draw([kind, *map(str, paths), "--out", str(tmp_path / f"{kind}.png"), "--dpi", "60"])
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "case case_1: first Dice" in said  # the one of median Dice
    draw(["compare", *folders, "--case", "case_2", "--out", str(tmp_path / "compare.svg")])
    assert "case case_2: first Dice" in capsys.readouterr().out


def test_mistakes_end_in_a_sentence(predictions, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/case_0.h5").write_bytes(b"no HDF5")
    other = write_predictions(tmp_path / "other", [0])
    with h5py.File(other / "case_0.h5", "a") as file:
        file["label"][0, 0, 0] = 1
    write_run(tmp_path / "runs", "MT", dice=[0.1])
    write_run(tmp_path / "runs", "supervised", dice=[0.1, 0.2])
    (tmp_path / "flat").mkdir()
    with h5py.File(tmp_path / "flat/case_0.h5", "w") as file:
        for name in ("image", "label", "prediction"):
            file[name] = np.ones((30, 26, 1), np.float32)
    a = str(predictions["A"])
    for words, said in [
        (["overlay", tmp_path / "flat"], "is no volume"),
        (["overlay", a, "--spacing", 0, 1, 1], "--spacing 0.0 1.0 1.0"),
        (["overlay", a, "--spacing", 1, "nan", 1], "--spacing 1.0 nan 1.0"),
        (["overlay", a, "--dpi", 0], "--dpi"),
        (["overlay", tmp_path / "empty"], "--save_result"),
        (["overlay", tmp_path / "broken"], "case_0.h5"),
        (["overlay", a, "--case", "nobody"], "no case nobody"),
        (["overlay", a, "--out", tmp_path / "a.doc"], "a.doc"),
        (["compare", f"A={a}", f"A={a}"], "two folders"),
        (["compare", f"A={a}", f"B={other}", "--case", "case_0"], "the label of case_0 is not that of"),
        (["boxes", tmp_path / "runs"], "other test cases"),
        (["curves", a], "config.json"),
        (["curves", tmp_path / "runs", tmp_path / "nowhere"], "nowhere: no run"),
        (["overlay", f"{a}/case_0.h5"], "--case case_0"),
        (["curves", tmp_path / "runs"], "not a run with config.json and metrics.csv"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            draw([*map(str, [*([] if "--out" in words else ["--out", tmp_path / "picture.png"]), *words])])
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1), error
        assert said in error, error
    assert not list(tmp_path.glob("*.png")) + list(tmp_path.glob(".*")) + list(tmp_path.glob("a.doc"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        draw(["overlay", a])
    assert "pip install" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the page


def chromium():
    import shutil

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if not found:
        pytest.skip("no Chromium was found to open the page with (Debian: apt-get install chromium)")
    return found


def open_in_chromium(path, tmp_path):
    """(the page's HTML after its scripts have run, what it wrote to the console)."""
    words = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    words += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    done = subprocess.run([*words, path.as_uri()], capture_output=True, text=True, timeout=600)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


CLICK = """
<script>
const sorted = document.querySelector("table.sortable"), button = n => sorted.tHead.rows[0].cells[n].firstChild;
const column = n => [...sorted.tBodies[0].rows].map(row => row.cells[n].dataset.key).join(" ");
const seen = [];
for (const n of [0, 1, 1]) { button(n).click(); seen.push(column(n)); }
document.title = seen.join(" | ") + " | " + sorted.tHead.rows[0].cells[1].getAttribute("aria-sort");
CONTROL
</script></body>
"""


def test_the_page_sorts_in_a_browser_without_errors(tmp_path):
    rows = [["b<script>alert(1)</script>", 10.0], ["a", 9.5], ["c", float("nan")]]
    table = html_report.html_table(["name", "value"], [[[str(cell)] for cell in row] for row in rows], rows)
    text = html_report.page("<Title> & more", {"Table": table, "Settings": html_report.html_settings({"a": {"x": 1}})})
    clicked = {"page": "", "control": "console.error('wrong'); new Image().src = 'http://localhost/picture.png';"}
    found = {}
    for name, extra in clicked.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text.replace("</body>", CLICK.replace("</body>\n", "").replace("CONTROL", extra) + "</body>"))
        found[name] = open_in_chromium(path, tmp_path)
    dom, console = found["page"]
    assert console == []
    title = dom.split("<title>")[1].split("</title>")[0]
    assert title == "a b&lt;script&gt;alert(1)&lt;/script&gt; c | 9.5 10.0  | 10.0 9.5  | descending"
    console = "\n".join(found["control"][1])
    assert "wrong" in console  # an error would have been seen,
    assert "Content Security Policy" in console  # and the network is closed to the page


def test_the_page_holds_everything_itself(predictions, tmp_path, capsys):
    for method, base in (("MT", 0.6), ("supervised", 0.5)):
        write_run(tmp_path, method, dice=[base, base + 0.1, base + 0.2], config={"base_lr": base})
    for run in tmp_path.glob("seed*/model/*/*"):
        (run / "metrics.csv").write_text("iteration,loss,iterations_per_second\n1,0.5,2\n2,0.4,2\n")
    out = tmp_path / "report.html"
    words = [tmp_path, "--baseline", "supervised", "--predictions", f"MT={predictions['A']}", "--out", out]
    write_page([str(word) for word in words])
    text = out.read_text()
    assert text.count("<img ") == text.count('src="data:image/png;base64,') == 3  # cases, curves, gallery
    assert "http" not in text.replace("http-equiv", "")
    for words in ("MT, student", "70.00", "case_2", "Wilcoxon", "base_lr", "viewport", "Gallery: MT"):
        assert words in text
    assert "HD95 voxel" in text.split("<summary>Every case")[1]
    rows = text.split("setting</button>")[1].split("<tr")[1:]
    assert "base_lr" in "".join(rows[:4])  # what differs comes first
    config = json.loads(next(tmp_path.rglob("config.json")).read_text())
    assert all(f">{name}</td>" in text for name in config)


# ------------------------------------------------------------------------------------------- the numbers of the tables


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Scans with the label values 0, 1 and 4, and a run whose network has three classes; its weights are random."""
    nibabel = pytest.importorskip("nibabel", reason="scans are NIfTI files")
    root = tmp_path_factory.mktemp("two_classes")
    for part in ("imagesTs", "labelsTs", "run", "data"):
        (root / part).mkdir()
    names = [f"case_{n}" for n in range(4)]
    for n, name in enumerate(names):
        label = ball(SHAPE, (14, 12, 9 + n % 2), 7).astype(np.uint8)
        label[ball(SHAPE, (14, 17, 9), 3)] = 4
        image = (label + np.random.default_rng(n).standard_normal(SHAPE)).astype(np.float32)
        affine = np.diag([1.5, 1, 2, 1])
        nibabel.save(nibabel.Nifti1Image(image, affine), root / f"imagesTs/{name}.nii.gz")
        if n:
            nibabel.save(nibabel.Nifti1Image(label, affine), root / f"labelsTs/{name}.nii.gz")
        write_case(root, name, (image - image.mean()) / image.std(), np.where(label == 4, 2, label).astype(np.uint8))
    (root / "test.list").write_text("\n".join(names) + "\n")
    settings = {"orientation": "RAS", "crop": "none", "normalization": "zscore", "window": None, "spacing": None}
    settings |= {"labels": [0, 1, 4], "channels": None}
    config = {"model": "MT", "labelnum": 2, "seed": 1, "num_classes": 3, "n_filters": 2, "patch_size": [16, 16, 16]}
    config |= {"stride_xy": 8, "stride_z": 8, "root_path": str(root), "preprocessing": settings, "dataset_name": "two"}
    (root / "run/config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    net = VNet(n_channels=1, n_classes=3, n_filters=2, normalization="batchnorm", has_dropout=True)
    torch.save(net.state_dict(), root / "run/iter_1.pth")
    inference.main(["--model_path", f"{root}/run/iter_1.pth", "--save_result", f"{root}/saved"])
    words = ["--model_path", f"{root}/run/iter_1.pth", "--input", f"{root}/imagesTs", "--output_dir", f"{root}/scans"]
    inference.main(words)
    return root


def test_figures_print_the_numbers_of_the_tables(two_classes, tmp_path, capsys):
    """The mean over the classes, in the table's unit, for --save_result as for --input; not a foreground Dice."""
    for folder, result in (("saved", "run/iter_1_test"), ("scans", "scans"), ("scans/predictions", "scans")):
        _, (row,) = report.report([two_classes / result])
        unit = {"saved": "voxel"}.get(folder, "mm")
        assert row.unit == unit
        for case, dice in row.per_case("dice").items():
            distance = row.per_case("hd95")[case]
            shown = "-" if math.isnan(distance) else f"{distance:.2f} {unit}"
            draw(["overlay", f"{two_classes}/{folder}", "--case", case, "--out", str(tmp_path / "picture.svg")])
            line = f"mean Dice {100 * dice:.2f} %, mean HD95 {shown}"
            assert f"case {case}: {Path(folder).name} {line}" in capsys.readouterr().out
        scores = {name: figures.score(read()) for name, read in figures.case_readers(two_classes / folder).items()}
        assert [name for name, dice in scores.items() if dice is None] == ([] if folder == "saved" else ["case_0"])
        scores = {name: dice for name, dice in scores.items() if dice is not None}
        assert scores == pytest.approx(row.per_case("dice"))


def test_predictions_of_scans_without_labels_are_drawn(two_classes, tmp_path, capsys):
    words = ["--out", str(tmp_path / "picture.png"), "--dpi", "50"]
    draw(["overlay", str(two_classes / "scans"), "--case", "case_0", *words])
    draw(["compare", f"A={two_classes}/scans", f"B={two_classes}/scans", "--case", "case_0", *words])
    assert "case case_0: A no label; B no label" in capsys.readouterr().out
    draw(["gallery", str(two_classes / "scans"), *words])  # of the cases that have labels
    picked, count = figures.best_median_worst(two_classes / "scans")
    assert count == 3 and "case_0" not in {name for _, name, _ in picked}
    assert figures.caption(picked[0][2]).startswith("mean Dice ")
    with pytest.raises(SystemExit) as stopped:
        draw(["surfaces", str(two_classes / "scans"), "--case", "case_0", *words])
    assert stopped.value.code == 2
    assert "case_0 has no label" in capsys.readouterr().err


def test_predictions_of_a_list_are_drawn_where_its_record_lies_beside_them(two_classes, tmp_path):
    """inference.py --continue keeps a record of a list, too; its cases are those of --save_result."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results/cases.jsonl").write_text(json.dumps({"settings": {"input": "/data/test.list"}}) + "\n")
    write_predictions(tmp_path / "results/predictions", [0, 1, 2])
    picked, count = figures.best_median_worst(tmp_path / "results/predictions")
    assert count == 3 and len(picked) == 3


def test_scans_of_two_sizes_are_not_compared_as_one_case(tmp_path, two_classes, capsys):
    """Two data sets without labels may call their cases alike; slices of one need not exist in the other."""
    nibabel = pytest.importorskip("nibabel", reason="scans are NIfTI files")
    (tmp_path / "other").mkdir()
    image = np.random.default_rng(0).standard_normal((16, 16, 16)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([1.5, 1, 2, 1])), tmp_path / "other/case_0.nii.gz")
    words = ["--model_path", f"{two_classes}/run/iter_1.pth", "--input", f"{tmp_path}/other"]
    inference.main([*words, "--output_dir", f"{tmp_path}/results"])
    folders = [f"A={two_classes}/scans", f"B={tmp_path}/results"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        draw(["compare", *folders, "--case", "case_0", "--out", str(tmp_path / "picture.png")])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert "the scan of case_0 is not that of" in error


def test_scans_that_cannot_be_drawn_end_in_a_sentence(two_classes, tmp_path, capsys):
    results = tmp_path / "results"

    def error():
        with pytest.raises(SystemExit) as stopped:
            draw(["gallery", str(results), "--out", str(tmp_path / "picture.png")])
        text = capsys.readouterr().err
        assert (stopped.value.code, text.count("\n")) == (2, 1)
        return text

    shutil.copytree(two_classes / "scans", results)
    shutil.rmtree(results / "predictions")
    assert "holds no predictions" in error()
    (results / "metrics.json").write_text("{}")
    assert "not a whole record of inference.py --input" in error()
    shutil.rmtree(results)
    shutil.copytree(two_classes / "scans", results)
    record = (results / "cases.jsonl").read_text()
    (results / "cases.jsonl").write_text(record.replace(f"{two_classes}/imagesTs", "/gone/imagesTs"))
    assert "the scans were in /gone/imagesTs" in error()


def test_a_class_has_one_colour_in_all_that_is_drawn(styled):
    """Label and prediction of two classes side by side: what is drawn about a class has the legend's colour for it."""
    case = {name: np.zeros(SHAPE, np.uint8) for name in ("label", "prediction")}
    case["image"] = np.zeros(SHAPE, np.float32)
    case["label"][3:9, 3:12], case["prediction"][3:9, 14:24] = 1, 1
    case["label"][18:26, 3:12], case["prediction"][18:26, 14:24] = 2, 2
    figure, axes = plt.subplots(figsize=(3, 2.6), dpi=100)
    axes.set_position((0, 0, 1, 1))
    figures.draw_slice(axes, case, axis=2, index=9)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)[::-1]
    plt.close(figure)
    # Without the image, the dark edges and the hatches.
    left, right = (pixels[:, side][pixels[:, side].max(axis=-1) > 60] for side in (slice(0, 140), slice(160, 300)))
    legend = {handle.get_label(): handle for handle in slice_legend([case])}
    assert [*legend][:4] == ["class 1", "class 2", "label", "prediction"]
    for half, number in ((left, 1), (right, 2)):
        colour = np.array(legend[f"class {number}"].get_facecolor()[:3])
        unit = half / np.linalg.norm(half, axis=1, keepdims=True)
        assert (unit @ (colour / np.linalg.norm(colour)) > 0.99).mean() > 0.95
        assert set(legend["label"].get_color()) == set(legend["prediction"].get_color()) == set("#555555")


def test_the_worst_error_may_be_one_class_in_the_place_of_another():
    label = np.zeros(SHAPE, np.uint8)
    label[5:25, 5:20, 4:16] = 1
    label[12:18, 10:15, 8:12] = 2
    prediction = np.where(label == 2, 1, label)
    prediction[4, 10, 10] = 1  # one voxel beyond the foreground
    worst = figures.worst_error(label, prediction)
    assert label[worst] == 2


def write_metrics(run, seed, rows, header=None, **config):
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model": "MT", "labelnum": 8, "seed": seed, **config}))
    (run / "metrics.csv").write_text("\n".join([header or HEADER, *rows]) + "\n")
    return run


HEADER = "iteration,lr,loss,loss_ce,val_dice_student,val_dice_teacher"
ROWS = ["1,0.01,0.9,0.5,,", "2,0.01,0.8,0.4,0.5,0.6", "3,0.01,0.7,0.3,,", "4,0.01,0.6,0.3,0.7,0.8"]


def test_curves_show_the_validation_dice_of_every_network(tmp_path, styled):
    runs = [write_metrics(tmp_path / str(seed), seed, ROWS) for seed in (1, 2)]
    figure = figures.curves(figures.read_runs(runs))
    titles = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(titles) == ["loss", "loss: ce", "validation Dice", "learning rate"]
    drawn = {tuple(line.get_ydata()) for line in titles["validation Dice"].lines}
    assert drawn == {(0.5, 0.7), (0.6, 0.8)}
    assert {tuple(line.get_xdata()) for line in titles["validation Dice"].lines} == {(2, 4)}
    legend = titles["validation Dice"].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["student", "teacher"]
    plt.close(figure)


def legend_of(figure):
    (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend() and not axes.get_title())
    texts = [text.get_text() for text in legend.get_texts()]
    plt.close(figure)
    return texts


def test_curves_do_not_call_two_runs_of_one_seed_two_seeds(tmp_path, styled):
    def runs(*seeds, **config):
        folders = [write_metrics(tmp_path / str(next(count)), seed, ROWS, **config) for seed in seeds]
        return figures.read_runs(folders)

    count = itertools.count()
    assert legend_of(figures.curves(runs(1, 2))) == ["MT, 8 labels (2 seeds)"]
    assert legend_of(figures.curves(runs(1, 1))) == ["MT, 8 labels (2 runs)"]
    assert legend_of(figures.curves(runs(1))) == ["MT, 8 labels"]
    # As in the report, a setting that an older run does not record is no difference.
    older = [write_metrics(tmp_path / "older", 1, ROWS), write_metrics(tmp_path / "newer", 2, ROWS, init="none")]
    assert legend_of(figures.curves(figures.read_runs(older))) == ["MT, 8 labels (2 seeds)"]
    first = [write_metrics(tmp_path / f"{lr}", 1, ROWS, base_lr=lr) for lr in (0.01, 0.1)]
    assert legend_of(figures.curves(figures.read_runs(first))) == [
        "MT, 8 labels (base_lr 0.01)",
        "MT, 8 labels (base_lr 0.1)",
    ]


def test_damaged_and_foreign_metrics_csv_end_in_a_sentence(tmp_path, capsys):
    write_run(tmp_path, dice=[0.5, 0.6])
    run = next(tmp_path.glob("seed1337/model/*/MT"))
    for content, sentence in (
        (b"case,class,dice\na,1,0.5\n", "is not of a run's metrics.csv"),
        (b"iteration,loss\n1,0.5\n\xff\xff,0.5\n", "is not of a run's metrics.csv"),
        (b"iteration,loss\n", "not a run with config.json and metrics.csv"),
    ):
        (run / "metrics.csv").write_bytes(content)
        for command in (
            lambda: draw(["curves", str(run), "--out", str(tmp_path / "picture.png")]),
            lambda: write_page([str(run), "--out", str(tmp_path / "report.html")]),
        ):
            with pytest.raises(SystemExit) as stopped:
                command()
            error = capsys.readouterr().err
            assert (stopped.value.code, error.count("\n")) == (2, 1) and sentence in error, error
    assert not list(tmp_path.glob("*.png")) + list(tmp_path.glob("*.html"))


def test_box_plots_mark_what_was_trained_on_its_test_cases(tmp_path, styled):
    write_run(tmp_path, "supervised", dice=[0.5, 0.6])
    write_run(tmp_path, dice=[0.5, 0.6], trained_on=["case_1"])
    _, rows = report.report([tmp_path])
    figure = figures.boxes_of(rows)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "MT, student, 8 labels†",
        "supervised, 8 labels",
    ]
    assert figure.get_supxlabel() == "† tested on 1 case that it was trained on"
    assert texts_that_overlap(figure) == []
    draw(["boxes", str(tmp_path), "--out", str(tmp_path / "boxes.svg")])


# ------------------------------------------------------------------------------------------------ images and stacks

COATING = {
    "classes": [
        {"name": "coating", "value": 0, "color": [0, 0, 0]},
        {"name": "oxide of $x$ and a long name_", "value": 7, "color": [230, 159, 0]},
        {"name": "crack", "value": 9, "color": [0, 114, 178]},
    ]
}


def flat_case(number, shape=(40, 60), **more):
    """An image, or a stack, of three classes in stripes, and a prediction with a wrong square."""
    label = np.broadcast_to(np.arange(shape[-1]) // 20, shape).astype(np.uint8)
    prediction = label.copy()
    prediction[..., 5 : 10 + number, 5:15] = 2
    image = (label + np.random.default_rng(number).random(shape)).astype(np.float32)
    return {"image": image, "label": label, "prediction": prediction} | more


def write_flat(folder, cases, background=0, **record):
    """Cases as inference.py --save_result writes them."""
    folder.mkdir(parents=True)
    measured = {"num_classes": 3, "ignore_index": 255, "spacing": None, "unit": "pixel"}
    measured |= {"classes": COATING | {"background": background}} | record
    for number, case in enumerate(cases):
        with h5py.File(folder / f"image_{number}.h5", "w") as file:
            for name, array in case.items():
                file[name] = array
            file.attrs["case"] = json.dumps(measured)
    return folder


def pictures(figure):
    """[(title, pixels)] of the panels of a figure that hold any."""
    return [(axes.get_title(), axes.images[0].get_array()) for axes in figure.axes if axes.images]


@pytest.mark.parametrize("background", [0, None])
def test_an_image_its_label_its_prediction_and_its_errors_stand_side_by_side(tmp_path, styled, background):
    classes = json.loads(json.dumps(COATING | {"background": background}))
    if background is None:
        classes["classes"][1]["color"] = [128, 128, 128]  # nothing of the image shows through, so a grey is no worse
    folder = write_flat(tmp_path / "MT", [flat_case(3)], classes=classes)
    case = figures.case_readers(folder)["image_0"]()
    case["label"][0, :5] = case["prediction"][0, :5] = 255  # ignored
    figure = figures.overlay(case, "image_0")
    shown = dict(pictures(figure))
    assert list(shown) == ["image", "label", "prediction", "errors"]
    assert all(panel.shape == (40, 60, 3) for panel in shown.values())
    # One grey throughout: what is not the background has its class's colour, over the image where there is one.
    image, opacity = shown["image"].astype(float), 1 if background is None else 0.7
    assert (np.ptp(image, axis=-1) == 0).all()
    colors = np.array([entry["color"] for entry in classes["classes"]])
    for name in ("label", "prediction"):
        drawn = case[name] < 3 if background is None else (case[name] > 0) & (case[name] < 3)
        mixed = (1 - opacity) * image + opacity * colors[case[name] % 253]
        np.testing.assert_allclose(shown[name], np.where(drawn[..., None], mixed, image), atol=0.5)
    wrong = (shown["errors"] == WRONG).all(axis=-1)
    assert (wrong == (case["label"] != case["prediction"])).all() and wrong.sum() == 80
    assert (np.ptp(shown["errors"][~wrong], axis=-1) == 0).all()
    handles = {h.get_label(): np.rint(255 * np.array(h.get_facecolor())) for h in figure.legends[0].legend_handles}
    names = ["coating", r"oxide of \$x\$ and a long name_", "crack"][0 if background is None else 1 :]
    assert list(handles) == [*names, "wrong"]
    assert handles["crack"].tolist() == [0, 114, 178, 255]
    assert texts_that_overlap(figure) == []


def test_pictures_of_images_have_nothing_that_overlaps(tmp_path, styled):
    folders = {name: tmp_path / name for name in ("supervised", "Mean Teacher")}
    shapes = ((40, 60), (70, 60), (40, 60), (30, 60))
    for folder in folders.values():
        write_flat(folder, [flat_case(n, shape) for n, shape in enumerate(shapes)])
    figure, count = figures.gallery_of(folders["supervised"])
    assert count == 4 and len(pictures(figure)) == 16
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [text.split(",")[0] for text in texts] == ["best", "median", "worst", "2nd worst"]
    assert re.fullmatch(r"best, mean Dice [\d.]+ %, mean HD95 [\d.]+ pixel: image_\d", texts[0])
    assert texts_that_overlap(figure) == []
    cases = {name: figures.case_readers(folder)["image_1"]() for name, folder in folders.items()}
    captions = {name: figures.caption(case) for name, case in cases.items()}
    figure = figures.compare(cases, captions)
    titles = [title for title, _ in pictures(figure)]
    assert titles[:2] == ["image", "label"] and titles[-2:] == ["errors", "errors"]
    assert titles[3] == f"Mean Teacher\n{captions['Mean Teacher']}"
    assert texts_that_overlap(figure) == []


def test_a_stack_is_drawn_slice_by_slice(tmp_path, styled):
    """Of three channels the colours, of others the first; as saved, along the first axis of the stack."""
    case = flat_case(0, (4, 40, 60))
    case["prediction"][:] = case["label"]
    case["label"][2] = np.maximum(case["label"][2], 1)
    case["prediction"][2] = case["label"][2]
    case["prediction"][1, 30:35] = 0
    colours = np.stack([case["image"], case["image"] + 1, case["image"] + 2])
    folder = write_flat(tmp_path / "A", [case | {"image": colours}, case | {"image": colours[:2]}], axis=0)
    for number, read in enumerate(figures.case_readers(folder).values()):
        figure = figures.overlay(read())
        shown = pictures(figure)
        assert [title for title, _ in shown] == ["image", "label", "prediction", "errors"] * 2
        assert (np.ptp(shown[0][1].astype(int), axis=-1).max() > 0) == (number == 0)
        beneath = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert beneath == ["largest section, slice 2", "most errors, slice 1"]
        assert (shown[7][1] == WRONG).all(axis=-1).sum() == 5 * 40
        assert texts_that_overlap(figure) == []
    draw(["compare", f"A={folder}", f"B={folder}", "--out", str(tmp_path / "stack.png")])
    draw(["gallery", str(folder), "--out", str(tmp_path / "stack.png")])


def test_what_images_cannot_have_is_one_sentence(tmp_path, capsys):
    folder = write_flat(tmp_path / "MT", [flat_case(0)])
    broken = write_flat(tmp_path / "broken", [flat_case(0)], classes={"classes": "three"})
    for words, sentence in (
        (["surfaces", folder], "case image_0 is an image, which has no surfaces; draw its overlay"),
        (["overlay", folder, "--spacing", 1, 1, 1], "the size of pixels stands in classes.json as pixel_size"),
        (["gallery", folder, "--spacing", 1, 1, 1], "the size of pixels stands in classes.json as pixel_size"),
        (["overlay", broken], "image_0.h5: has no list of classes"),
    ):
        with pytest.raises(SystemExit) as stopped:
            draw([*map(str, words), "--out", str(tmp_path / "picture.png")])
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1) and sentence in error, error
    assert not (tmp_path / "picture.png").exists()


def write_image_results(root, classes, unit="um"):
    """Images with masks, and what inference.py --input leaves of them: two images and a stack, the last unlabelled."""
    table = ClassTable.from_dict(classes or {"classes": [{"name": str(n)} for n in range(3)]})
    for part in ("images", "masks", "results/predictions"):
        (root / part).mkdir(parents=True)
    cases = [flat_case(1), flat_case(2), flat_case(1, (3, 40, 60))]
    for number, case in enumerate(cases):
        pixels = np.uint8(100 * case["image"])
        stack = pixels.ndim == 3
        name = f"s_{number}.{'tif' if stack else 'png'}"
        label, prediction = table.to_values(case["label"]), table.to_values(case["prediction"])
        write = tiff_bytes if stack else lambda mask: png_bytes(mask, table.palette(by_value=True))
        (root / "images" / name).write_bytes(tiff_bytes(pixels) if stack else png_bytes(pixels))
        if not stack:
            (root / "masks" / name).write_bytes(write(label))
        (root / "results/predictions" / name).write_bytes(write(prediction))
    settings = {"input": str(root / "images"), "labels": str(root / "masks"), "unit": unit, "preprocessing": None}
    (root / "results/cases.jsonl").write_text(json.dumps({"settings": settings}) + "\n")
    result = {"network": {"num_classes": 3}, "protocol": {"ignore_index": 255}, "classes": classes}
    (root / "results/metrics.json").write_text(json.dumps(result))
    return cases


def test_a_folder_may_have_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert of_cases.named_folders([str(folder), f"MT={folder}"]) == {"lr=0.1": folder, "MT": folder}


@pytest.mark.parametrize("named", [True, False])
def test_predictions_that_were_written_as_images_are_drawn(tmp_path, styled, capsys, named):
    classes = COATING | {"background": 0, "pixel_size": [0.5, 0.25, "um"]} if named else None
    cases = write_image_results(tmp_path, classes, "um" if named else "pixel")
    readers = figures.case_readers(tmp_path / "results")
    assert list(readers) == ["s_0", "s_1", "s_2"]
    for read, case in zip(readers.values(), cases, strict=True):
        found = read()
        assert (found["prediction"] == case["prediction"]).all()
        assert found["prediction"].ndim == 3 or (found["label"] == case["label"]).all()
        assert (found["image"] == np.uint8(100 * case["image"])).all()
    one = readers["s_0"]()
    expected = [
        metrics.all_metrics(cases[0]["prediction"] == n, cases[0]["label"] == n, one["spacing"]) for n in (1, 2)
    ]
    assert one["spacing"] == ((0.5, 0.25) if named else (1, 1))
    unit = "um" if named else "pixel"
    dice, distance = (np.mean([found[metric] for found in expected]) for metric in ("dice", "hd95"))
    assert figures.caption(one) == f"mean Dice {100 * dice:.2f} %\nmean HD95 {distance:.2f} {unit}"
    figure = figures.overlay(one)
    assert figure.axes[0].get_images()[0].axes.get_aspect() == (2 if named else 1)
    for kind in ("overlay", "gallery"):
        draw([kind, str(tmp_path / "results"), "--out", str(tmp_path / "picture.png"), "--dpi", "60"])
    draw(["overlay", str(tmp_path / "results"), "--case", "s_2", "--out", str(tmp_path / "picture.png"), "--dpi", "60"])
    (tmp_path / "results/predictions/s_0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        draw(["overlay", str(tmp_path / "results"), "--case", "s_0", "--out", str(tmp_path / "picture.png")])
    assert "s_0.png" in capsys.readouterr().err


def test_real_micrographs_are_drawn_in_the_colours_of_their_classes(images_root, tmp_path, styled):
    """The picture's file, after its colours were made 256, still has each class's colour as classes.json gives it."""
    from mtseg.classes import read_classes, to_index
    from mtseg.images import read_image, read_mask

    for name in ("uhcs", "superalloy"):
        table = read_classes(images_root / name / "classes.json")
        file = min((images_root / name / "images").iterdir())
        label, _ = to_index(read_mask(images_root / name / "masks" / file.name), table)
        case = {"image": read_image(file), "label": label, "prediction": np.roll(label, 20, axis=1)}
        folder = tmp_path / name
        write_flat(folder, [case], num_classes=len(table.names), classes=table.to_dict())
        draw(["overlay", str(folder), "--out", str(tmp_path / "picture.png")])
        picture = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
        for color in (*table.palette()[: len(table.names)], WRONG):
            assert (np.abs(picture - color).max(axis=-1) <= 8).sum() > 100, color


def test_volumes_have_the_names_and_colours_of_their_classes(styled, tmp_path):
    classes = [
        {"name": n, "value": v, "color": c}
        for n, v, c in (("none", 0, [0, 0, 0]), ("wall", 5, [9, 90, 200]), ("pool", 2, [250, 9, 9]))
    ]
    case = {name: np.zeros(SHAPE, np.uint8) for name in ("image", "label", "prediction")}
    case["label"][3:20], case["prediction"][5:22], case["prediction"][25:] = 1, 1, 2
    folder = write_flat(tmp_path / "MT", [case], unit="voxel", classes={"classes": classes})
    read = figures.case_readers(folder)["image_0"]()
    legend = {handle.get_label(): handle for handle in slice_legend([read])}
    assert [*legend][:4] == ["wall", "pool", "label", "prediction"]
    assert legend["wall"].get_facecolor()[:3] == pytest.approx((9 / 255, 90 / 255, 200 / 255))
    figure, axes = plt.subplots()
    figures.draw_slice(axes, read, axis=2, index=9)
    drawn = {tuple(np.rint(255 * color[:3])) for part in axes.collections for color in part.get_edgecolor()}
    assert {(9, 90, 200), (250, 9, 9)} <= drawn
    plt.close(figure)


def test_box_plots_of_several_sets_name_them(tmp_path, styled):
    for method in ("MT", "supervised"):
        write_images(tmp_path, method, 1, ("steel", "coating"))
    figure = figures.boxes_of(report.report([tmp_path])[1])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        *("steel: MT, student, 8 labels", "steel: supervised, 8 labels"),
        *("coating: MT, student, 8 labels", "coating: supervised, 8 labels"),
    ]
    draw(["boxes", str(tmp_path), "--out", str(tmp_path / "boxes.png")])


def test_the_page_of_images(tmp_path):
    for method in ("MT", "supervised"):
        write_images(tmp_path / "runs", method, 1, ("steel", "coating"), trained_on=[])
    folder = write_flat(tmp_path / "MT", [flat_case(n) for n in range(3)])
    out = tmp_path / "report.html"
    write_page([str(tmp_path / "runs"), "--per_class", "--predictions", str(folder), "--out", str(out)])
    text = out.read_text()
    assert text.count("<img ") == 2  # box plots and gallery
    table, cases = (part.split("</table>")[0] for part in text.split("<table")[1:3])
    for words in ("IoU pooled %", "Pixel accuracy pooled %", "a_b &amp; $c$ &lt;i&gt;", "steel", "coating"):
        assert words in table
    assert "IoU %" in cases and "pooled" not in cases and "HD95 pixel" in cases
    assert "<i>" not in text


def test_curves_pass_over_the_validation_dice_of_classes(tmp_path, styled):
    header = "iteration,loss,val_dice_student,val_dice_teacher,val_dice_student/$a$_loss,val_dice_teacher/crack"
    run = write_metrics(tmp_path / "run", 1, ["1,0.9,0.5,0.6,0.4,0.3", "2,0.8,0.7,0.8,0.1,0.2"], header=header)
    figure = figures.curves(figures.read_runs([run]))
    titles = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(titles) == ["loss", "validation Dice"]
    legend = titles["validation Dice"].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["student", "teacher"]
    plt.close(figure)
