"""--annotations: what is annotated is learned from, the rest counts as unlabelled, and no other label is looked at."""

import csv
import shutil

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PHASES,
    TINY,
    TINY_2D,
    killed_after_saving,
    make_data,
    make_images,
    make_stacks,
    only_on_the_cpu,
    write_case,
)

import train_mean_teacher
import train_sup
from mtseg.distributed import Ranks
from mtseg.networks.vnet import VNet
from mtseg.samplers import IterationSampler
from mtseg.script import data as data_module
from mtseg.script import flags
from mtseg.seeding import seed_iteration
from mtseg.transforms import RandomCrop

MAKE = {"volumes": make_data, "stacks": make_stacks, "images": make_images}
SCRIPTS = {"supervised": train_sup, "MT": train_mean_teacher}
pytestmark = only_on_the_cpu


@pytest.fixture(autouse=True)
def on_the_cpu(device):
    """No script finds a GPU."""


def settings(kind):
    """Flags of a tiny training on such data; the patch lies inside of a slice, so that there is a choice of crops."""
    return TINY if kind == "volumes" else {**TINY_2D, "normalization": "groupnorm"}


def words_of(given):
    return [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]


def run(root, out, script="supervised", kind="volumes", *more, **changes):
    given = {**settings(kind), "root_path": root, "output_dir": out, "max_iterations": 3, "base_lr": 0.05}
    given |= {"annotations": root / "annotated"} | changes
    return SCRIPTS[script].main([*words_of(given), *more])


def weights(folder, name="iter_3.pth"):
    return torch.load(folder / name, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def annotate(root, case, label):
    (root / "annotated").mkdir(exist_ok=True)
    with h5py.File(root / f"annotated/{case}.h5", "w") as file:
        file["label"] = label.astype(np.uint8)


def read(root, case, name="label"):
    nested = root / f"data/{case}/mri_norm2.h5"
    with h5py.File(nested if nested.is_file() else root / f"data/{case}.h5") as file:
        return file[name][...]


def truth(root, case):
    """The labels of a case, class numbers."""
    if not (root / "masks").is_dir():
        return read(root, case)
    from PIL import Image

    mask = np.array(Image.open(root / f"masks/{case}.png"))
    return np.searchsorted([entry["value"] for entry in PHASES["classes"]], mask)


def cases_of(root):
    return (root / "train.list").read_text().split()


def prepared(tmp_path, kind):
    """Data of a kind: the second and the fourth case annotated, the latter in part: a slice or a corner."""
    root = MAKE[kind](tmp_path / kind)
    whole, part = cases_of(root)[1], cases_of(root)[3]
    annotate(root, whole, truth(root, whole))
    label = np.full(truth(root, part).shape, 255)
    box = {"volumes": np.s_[:, :, 5:7], "stacks": np.s_[1], "images": np.s_[:12, :14]}[kind]
    label[box] = truth(root, part)[box]
    annotate(root, part, label)
    return root


def data_of(root, script="MT", kind="volumes", **changes):
    """The Data of a training script, as it would begin with it."""
    given = {**settings(kind), "root_path": root, "annotations": root / "annotated"} | changes
    args = flags.parse(SCRIPTS[script].PARSER, words_of(given))
    args.has_dropout = True
    read = data_module.read_data(args, type("Run", (), {"ranks": Ranks()})())
    return read, args


# --------------------------------------------------------------------------------------------------- which samples are


@pytest.mark.parametrize("kind", MAKE)
def test_labelled_samples_are_the_annotated_ones_and_the_rest_has_no_label(tmp_path, kind):
    root = prepared(tmp_path, kind)
    found, args = data_of(root, kind=kind)
    whole, part = cases_of(root)[1], cases_of(root)[3]
    labeled, unlabeled = dict.fromkeys(dataset for dataset, _ in found.train.places)
    names = [labeled.case_of(index) for index in range(len(labeled))]
    slices = truth(root, whole).shape[0] if kind == "stacks" else 1
    assert names == [whole] * slices + [part]
    if kind == "stacks":
        assert labeled.places == [(whole, k) for k in range(slices)] + [(part, 1)]
    assert set(unlabeled.image_list) == {*cases_of(root)} - {whole}
    assert (found.record["train_cases"], args.labelnum, args.ignore_index) == ([whole, part], 2, 255)


def test_supervised_training_takes_no_other_slice(tmp_path):
    root = prepared(tmp_path, "stacks")
    found, _ = data_of(root, "supervised", "stacks")
    assert len(found.train) == len(truth(root, cases_of(root)[1])) + 1
    every = {index for batch in IterationSampler(found.sampler, 1, 0, 20) for index, _ in batch}
    assert every == set(range(len(found.train)))


def test_where_all_is_annotated_all_of_it_is_the_unlabelled_part_too(tmp_path):
    root = MAKE["images"](tmp_path / "images")
    for case in cases_of(root):
        annotate(root, case, truth(root, case))
    found, args = data_of(root, kind="images")
    assert args.labelnum == len(cases_of(root)) == len(found.record["unlabeled_cases"]) == 6
    (root / "unlabeled.list").write_text("\n".join([cases_of(root)[0], "image_6"]) + "\n")
    found, _ = data_of(root, kind="images")
    assert found.record["unlabeled_cases"] == [*cases_of(root), "image_6"]


def test_images_without_a_train_list_are_annotated_bit_by_bit(tmp_path):
    root = MAKE["images"](tmp_path / "images")
    case, tested = cases_of(root)[2], (root / "test.list").read_text().split()
    label = truth(root, case)
    for name in cases_of(root):
        (root / f"masks/{name}.png").unlink()
    every = cases_of(root)
    (root / "train.list").unlink()
    annotate(root, case, label)
    found, _ = data_of(root, kind="images")
    assert found.record["train_cases"] == [case] and not {*tested} & {*found.record["unlabeled_cases"]}
    assert sorted(found.record["unlabeled_cases"]) == sorted({*every} - {case})


# --------------------------------------------------------------------------------------------------------------- crops


def crops(sample, size, **settings):
    """Where 3000 crops of a sample begin; its image holds the voxels' places."""
    places, starts = np.indices(sample["label"].shape), []
    crop = RandomCrop(size, unknown=255, **settings)
    for seed in range(3000):
        made = crop({**sample, "image": places, "rng": np.random.default_rng(seed)})
        starts.append(made["image"][(..., *[0] * len(size))])
    return np.array(starts)


def test_crops_of_a_part_are_centred_on_what_is_annotated():
    """Where each annotated voxel is a patch's middle, as near as the border allows, equally often."""
    rng = np.random.default_rng(0)
    label = np.full((13, 17), 255)
    label[2:4, 10:15] = rng.integers(0, 2, (2, 5))
    label[12, 0] = 1
    size = (6, 8)
    expected = {}
    for voxel in np.argwhere(label != 255):
        start = tuple(np.clip(voxel - [3, 4], 0, [7, 9]).tolist())
        expected[start] = expected.get(start, 0) + 1 / 11
    starts, counts = np.unique(crops({"label": label}, size), axis=0, return_counts=True)
    assert {tuple(s) for s in starts.tolist()} == set(expected)
    for start, count in zip(starts.tolist(), counts, strict=True):
        share = expected[tuple(start)]
        assert abs(count - 3000 * share) < 5 * np.sqrt(3000 * share * (1 - share))


@pytest.mark.parametrize("labeled", [True, False])
def test_crops_of_a_whole_and_of_no_label_lie_anywhere(labeled):
    label = np.zeros((9, 10), int) if labeled else np.full((9, 10), 255)
    if not labeled:
        label[3, 3] = 0  # a label that nobody may look at
    starts, counts = np.unique(crops({"label": label, "labeled": labeled}, (7, 8)), axis=0, return_counts=True)
    assert starts.tolist() == [[i, j] for i in range(3) for j in range(3)]
    assert abs(counts - 3000 / 9).max() < 5 * np.sqrt(3000 * 8 / 81)


@pytest.mark.parametrize("outside", [0, 254, 255])
def test_what_pads_a_case_is_no_annotation(outside):
    """Along one axis the case is smaller than the patch, and few voxels of the other are annotated."""
    label = np.full((40, 3), 255)
    label[30:33] = 1
    crop = RandomCrop((8, 8), outside, unknown=255)
    for seed in range(200):
        made = crop({"image": np.zeros(label.shape), "label": label, "rng": np.random.default_rng(seed)})
        assert (made["label"] == 1).sum() == 9 and set(np.unique(made["label"])) == {1, 255, outside or 255}
    rows = []
    for seed in range(300):  # all of it annotated: anywhere
        sample = {"image": np.indices((40, 3))[0] + 1.0, "label": label * 0, "rng": np.random.default_rng(seed)}
        rows.append(crop(sample)["image"][0].max() - 1)
    assert set(rows) == set(range(33))


def test_foreground_patches_come_first(tmp_path):
    label = np.full((20, 20), 255)
    label[3:9, 3:9], label[15, 15] = 0, 1
    starts = crops({"label": label}, (4, 4), foreground=1.0, classes=[1])
    assert (starts == [13, 13]).all()


@pytest.mark.parametrize("rotflip", ["mirror", "ssl4mis"])
def test_every_labelled_patch_of_a_run_shows_an_annotation(tmp_path, rotflip):
    root = MAKE["images"](tmp_path / "images", shape=(60, 60))
    label = np.full((60, 60), 255)
    label[40:44, 40:44] = 1
    annotate(root, cases_of(root)[0], label)
    found, _ = data_of(root, kind="images", rotflip=rotflip)
    for seed in range(60):
        known = found.train[0, seed]["label"] != 255
        assert known.any() and known.sum() <= 25 and known[8, 8]


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("script", SCRIPTS)
def test_labels_of_the_data_set_change_nothing(tmp_path, kind, script):
    """The trap: every label that the data set has is another class."""
    root = prepared(tmp_path, kind)
    first = weights(run(root, tmp_path / "first", script, kind))
    for case in cases_of(root):
        if kind == "images":
            from PIL import Image

            Image.fromarray(np.full((26, 23), 200, np.uint8)).save(root / f"masks/{case}.png")
            continue
        other = 1 - truth(root, case).clip(0, 1)
        image = read(root, case, "image")
        if kind == "volumes":
            write_case(root, case, image, other)
        else:
            with h5py.File(root / f"data/{case}.h5", "w") as file:
                file["image"], file["label"] = image, other
    assert same(first, weights(run(root, tmp_path / "second", script, kind)))
    changed = truth(root, cases_of(root)[1])
    annotate(root, cases_of(root)[1], changed)
    assert not same(first, weights(run(root, tmp_path / "third", script, kind)))  # and these are looked at


def test_whole_cases_give_what_labelnum_gives(tmp_path):
    root = make_data(tmp_path / "volumes")
    for case in cases_of(root)[:3]:
        annotate(root, case, truth(root, case))
    given = {**TINY, "root_path": root, "max_iterations": 3, "base_lr": 0.05, "ignore_index": 255}
    for script, more in (("supervised", {}), ("MT", {"batch_size": 4, "labeled_bs": 2})):
        plain = SCRIPTS[script].main(words_of(given | more | {"labelnum": 3, "output_dir": tmp_path / "plain"}))
        assert same(weights(plain), weights(run(root, tmp_path / "annotated", script, **more)))


def test_the_loss_is_that_of_the_annotated_voxels_alone(tmp_path):
    """The first loss against PyTorch's cross entropy and a Dice by hand, of these voxels."""
    root = prepared(tmp_path, "volumes")
    shutil.move(root / f"annotated/{cases_of(root)[1]}.h5", tmp_path / "kept.h5")
    folder = run(root, tmp_path / "runs", max_iterations=1)
    found, _ = data_of(root, "supervised")
    ((first, second),) = IterationSampler(found.sampler, 1337, 0, 1)
    samples = [found.train[index, seed] for index, seed in (first, second)]
    images, labels = (torch.stack([sample[name] for sample in samples]) for name in ("image", "label"))
    seed_iteration(1337, -1)
    net = VNet(1, 2, 2, "batchnorm", has_dropout=True)
    seed_iteration(1337, 1)
    scores = net(images).detach().movedim(1, -1)
    known = labels != 255
    assert (known.sum(dim=(1, 2, 3)) == 16 * 16 * 2).all()  # what pads the volumes is not among it
    scores, labels = scores[known], labels[known].long()
    p, q = F.softmax(scores, dim=1)[:, 1], (labels == 1).float()
    dice = 1 - (2 * (p * q).sum() + 1e-5) / ((p**2).sum() + (q**2).sum() + 1e-5)
    with open(folder / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["loss"]) == pytest.approx(0.5 * (F.cross_entropy(scores, labels) + dice).item(), rel=1e-5)


def test_slices_first(tmp_path):
    """Files (S, H, W), annotated as they are: what the same volumes give whose files have the slices last."""
    roots = [make_data(tmp_path / name) for name in ("last", "first")]
    for case in cases_of(roots[0]):
        image, label = (read(roots[0], case, name) for name in ("image", "label"))
        write_case(roots[1], case, np.moveaxis(image, -1, 0), np.moveaxis(label, -1, 0))
        if case == "case_2":
            known = np.where(np.arange(14) % 5 == 2, label, 255)
            annotate(roots[0], case, known)
            annotate(roots[1], case, np.moveaxis(known, -1, 0))
    plain = run(roots[0], tmp_path / "runs", "MT", batch_size=4)
    first = run(roots[1], tmp_path / "runs_first", "MT", "volumes", "--slices_first", batch_size=4)
    assert same(weights(plain), weights(first))


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    root = prepared(tmp_path, "stacks")
    whole = run(root, tmp_path / "whole", "MT", "stacks")
    with killed_after_saving(monkeypatch):
        run(root, tmp_path / "cut", "MT", "stacks", save_freq=1)
    cut = run(root, tmp_path / "cut", "MT", "stacks", "--resume", save_freq=1)
    for name in ("iter_3.pth", "ema_iter_3.pth"):
        assert same(weights(whole, name), weights(cut, name))


def test_a_run_does_not_go_on_with_annotations_that_were_changed(tmp_path, capsys):
    root = prepared(tmp_path, "images")
    run(root, tmp_path / "runs", "supervised", "images")
    part = cases_of(root)[3]
    with h5py.File(root / f"annotated/{part}.h5") as file:
        label = file["label"][...]
    label[0, 0] = 1 - label[0, 0].clip(0, 1)
    annotate(root, part, label)
    said = refused(capsys, root, tmp_path / "runs", "images", resume="latest")
    assert "the run was started on other data of the same names" in said


# ------------------------------------------------------------------------------------------------------------ mistakes


def refused(capsys, root, out, kind="volumes", script="supervised", **changes):
    """The one sentence with which a training ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(root, out, script, kind, **changes)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Data with good annotations, which every mistake copies."""
    return prepared(tmp_path_factory.mktemp("wrong"), "volumes")


MISTAKES = {
    "no such folder": ({"annotations": "nothing"}, "nothing: no folder with a label <case>.h5 in it"),
    "labeled_draw": ({"labeled_draw": 1}, "--labeled_draw with --annotations, which says which cases have labels"),
    "labelnum": ({"labelnum": 2}, "--labelnum with --annotations, which says which cases have labels: leave one out"),
    "ignore_index": ({"ignore_index": 4}, "--ignore_index 4 with --annotations, whose labels have 255: leave it out"),
    "unlabeled_root": ({"unlabeled_root": "."}, "--unlabeled_root with --annotations"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_flags_that_do_not_go_with_it(wrong, tmp_path, capsys, name):
    changes, expected = MISTAKES[name]
    assert expected in refused(capsys, wrong, tmp_path / "out", script="MT", **changes)
    assert not (tmp_path / "out").exists()


def test_pretraining_looks_at_no_annotation(wrong, tmp_path, capsys):
    import pretrain_masked

    words = words_of({**TINY, "root_path": wrong, "annotations": wrong / "annotated", "output_dir": tmp_path / "out"})
    with pytest.raises(SystemExit) as stopped:
        pretrain_masked.main(words)
    said = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and said == "error: --annotations in pretraining, which looks at no label: leave it out\n"
    )


WRONG_LABELS = {
    "empty folder": (
        lambda root: shutil.rmtree(root / "annotated"),
        "annotated: no folder with a label <case>.h5 in it",
    ),
    "a case of test.list": (
        lambda root: annotate(root, "case_7", truth(root, "case_7")),
        "case_7, which is no training",
    ),
    "all left out": (
        lambda root: annotate(root, "case_0", np.full((24, 20, 14), 255)),
        "case_0 has no voxel with a label",
    ),
    "another shape": (
        lambda root: annotate(root, "case_0", np.zeros((24, 20, 13))),
        "has shape (24, 20, 13) and the case",
    ),
    "a class too high": (
        lambda root: annotate(root, "case_0", np.full((24, 20, 14), 2)),
        "has a label 2, but --num_classes",
    ),
    "no HDF5": (lambda root: (root / "annotated/case_0.h5").write_bytes(b"no"), "case_0.h5: not a whole HDF5 file"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels(wrong, tmp_path, capsys, name):
    root = shutil.copytree(wrong, tmp_path / "data")
    spoil, expected = WRONG_LABELS[name]
    spoil(root)
    assert expected in refused(capsys, root, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.pth"))


def test_a_case_that_is_validated_on(wrong, tmp_path, capsys):
    (tmp_path / "val.list").write_text("case_1\n")
    said = refused(capsys, wrong, tmp_path / "out", val_list=tmp_path / "val.list")
    assert "holds a label of case_1, which is no training case; remove it" in said


def test_a_label_of_another_kind_of_number(wrong, tmp_path, capsys):
    root = shutil.copytree(wrong, tmp_path / "data")
    with h5py.File(root / "annotated/case_1.h5", "w") as file:
        file["label"] = np.zeros((24, 20, 14), np.int16)
    assert "case_1.h5: has no 'label' of whole numbers in 8 bits" in refused(capsys, root, tmp_path / "out")
