import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from index_images import main
from make_splits import main as make_splits

from mtseg.image_index import read_index

Image = pytest.importorskip("PIL.Image")

CLASSES = {
    "classes": [
        {"name": "matrix", "value": 0, "color": [0, 0, 0]},
        {"name": "pore", "value": 1, "color": [255, 0, 0]},
        {"name": "crack", "value": 2, "color": [0, 0, 255]},
    ],
    "background": None,
}


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_set(root, names, classes=None, seed=0):
    """A data set with an image and a mask of all three classes for each name; `classes`: {name: those it has}."""
    rng = np.random.default_rng(seed)
    for name in names:
        save(root / "images" / f"{name}.png", rng.integers(0, 256, (12, 16), dtype=np.uint8))
        save(
            root / "masks" / f"{name}.png", rng.choice((classes or {}).get(name, [0, 1, 2]), (12, 16)).astype(np.uint8)
        )
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root


def run(*words):
    main([str(word) for word in words])


def stopped(capsys, *words):
    """What the script says on stderr when it ends with exit code 2, line by line, without the progress bar."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert end.value.code == 2
    return [
        line
        for line in capsys.readouterr().err.splitlines()
        if not re.search(r"image/s|s/image\]", line) and line.strip()
    ]


def lists_of(folder):
    return {path.stem: path.read_text().splitlines() for path in folder.glob("*.list")}


def test_an_index_of_a_set_that_was_split_knows_its_groups(tmp_path):
    root = make_set(tmp_path / "steel", [f"s{spot}{place}" for spot in range(1, 6) for place in "abc"])
    make_splits([str(root), "--test", "1", "--patient_id", r"^(s\d)"])
    groups = {spot: [f"{spot}{place}" for place in "abc"] for spot in ("s1", "s2", "s3", "s4", "s5")}
    run(root, "--out", root / "index.json")
    assert json.loads((root / "splits.json").read_text())["patients"] == groups
    make_splits([str(root), "--folds", "2"])
    for fold in json.loads((root / "splits_final.json").read_text()):
        assert not {case[:2] for case in fold["train"]} & {case[:2] for case in fold["val"]}
    other = make_set(tmp_path / "other", [f"o{number}" for number in range(4)], seed=1)
    (other / "train.list").write_text("o0\no1\n")
    run(root, other, "--out", tmp_path / "both" / "index.json")
    patients = json.loads((tmp_path / "both" / "splits.json").read_text())["patients"]
    assert patients["steel__s2"] == ["steel__s2a", "steel__s2b", "steel__s2c"] and patients["other__o3"] == [
        "other__o3"
    ]


def test_what_is_in_a_set(tmp_path, capsys):
    root = make_set(tmp_path / "steel", "abc", {"a": [0], "b": [0, 1]})
    save(root / "unlabeled" / "u.png", np.zeros((8, 8, 3), np.uint8))
    run(root, "--out", tmp_path / "out" / "index.json")
    index = read_index(tmp_path / "out" / "index.json")
    masks = {name: np.array(Image.open(root / "masks" / f"{name}.png")) for name in "abc"}
    for sample in index.samples[:3]:
        values, counts = np.unique(masks[sample.id], return_counts=True)
        assert sample.pixels == dict(zip(values.tolist(), counts.tolist(), strict=True))
        assert (sample.height, sample.width, sample.group, sample.dataset) == (12, 16, sample.id, "steel")
        assert sample.images[0].resolve() == root / "images" / f"{sample.id}.png"
    assert (index.samples[3].mask, index.samples[3].pixels, index.samples[3].height) == (None, None, 8)
    assert len({sample.sha256 for sample in index.samples}) == 4
    lists = lists_of(tmp_path / "out")
    assert lists.keys() == {"train", "unlabeled"} and lists["unlabeled"] == ["u"] and sorted(lists["train"]) == [*"abc"]
    out = capsys.readouterr().out
    assert "steel: 4 images, 3 of them with a mask" in out
    assert "12 x 16 (3), 8 x 8 (1)" in out and "8 bit, 1 channel (3), 8 bit, 3 channels (1)" in out
    for number, name in enumerate(("matrix", "pore", "crack")):
        share = 100 * np.mean([mask == number for mask in masks.values()])
        images = sum((mask == number).any() for mask in masks.values())
        assert re.search(rf"^  {name} +{share:.3f} % of pixels, in {images} images$", out, re.MULTILINE)
    assert "note: unlabelled, for want of a mask: u (1)" in out


def test_16_bit_and_ignored_pixels(tmp_path, capsys):
    root = make_set(tmp_path / "steel", "a")
    (root / "classes.json").write_text(json.dumps({**CLASSES, "ignore": 9}))
    save(root / "images" / "a.png", np.full((12, 16), 3000, np.uint16))
    mask = np.zeros((12, 16), np.uint8)
    mask[:6], mask[6:9] = 9, 1
    save(root / "masks" / "a.png", mask)
    run(root, "--out", tmp_path / "index.json")
    out = capsys.readouterr().out
    assert "16 bit, 1 channel (1)" in out and out.count("50.000 % of pixels") == 2
    assert read_index(tmp_path / "index.json").samples[0].pixels == {0: 48, 1: 48}


def test_every_mistake_is_said_at_once_and_nothing_is_written(tmp_path, capsys):
    root = make_set(tmp_path / "steel", "abcdef")
    mask = np.zeros((12, 16), np.uint8)
    mask[:2, :5] = 7
    save(root / "masks" / "a.png", mask)
    save(root / "masks" / "b.png", np.full((12, 16, 3), (250, 3, 2), np.uint8))
    save(root / "masks" / "c.png", np.zeros((10, 16), np.uint8))
    (root / "images" / "d.png").write_bytes(b"no image")
    (root / "images" / "e.png").unlink()
    lines = stopped(capsys, root, "--out", tmp_path / "out" / "index.json")
    assert len(lines) == 6
    for name, words in [
        ("masks/e.png", "a mask without an image; add one or remove it"),
        ("masks/a.png", "10 pixels have the value 7, which is no class's, the nearest is 'crack'"),
        ("masks/b.png", "192 pixels have the color (250, 3, 2), which is no class's, the nearest is 'pore'"),
        ("masks/c.png", "is 10 x 16 pixels, its image 12 x 16 pixels; cut them alike"),
        ("images/d.png", ""),
    ]:
        assert any(line.startswith(f"{root / name}: ") and words in line for line in lines[:-1])
    assert lines[-1] == "error: these 5 files cannot be used; nothing was written"
    assert not (tmp_path / "out").exists()


def test_one_mistake_is_one_sentence(tmp_path, capsys):
    root = make_set(tmp_path / "steel", "ab")
    (root / "images" / "a.png").unlink()
    (line,) = stopped(capsys, root, "--out", tmp_path / "index.json")
    assert line.startswith(f"error: {root}/masks/a.png: a mask without an image; ") and "nothing was written" in line
    (root / "masks" / "a.png").unlink()
    (root / "classes.json").unlink()
    (line,) = stopped(capsys, root, "--out", tmp_path / "index.json")
    assert line == f"error: {root}/masks/b.png: nothing says what its classes are; name a file with --classes"
    (line,) = stopped(capsys, tmp_path / "gold", "--out", tmp_path / "index.json")
    assert "gold: no such file or folder" in line
    make_set(root, "ab")
    run(root, "--out", tmp_path / "index.json")
    (line,) = stopped(capsys, root, "--out", tmp_path / "index.json")
    assert line == f"error: {tmp_path}/index.json: exists already; name another, or replace it with --overwrite"
    (line,) = stopped(capsys, root, shutil.copytree(root, tmp_path / "x" / "steel"), "--out", tmp_path / "2.json")
    assert line == f"error: {tmp_path}/x/steel: another data set is called steel, too; rename a folder"
    (line,) = stopped(capsys, root / "images" / "b.png", "--out", tmp_path / "2.json")
    assert line == f"error: {root}/images/b.png: is a file; name the folder of a data set"


def test_snapped_colours_are_counted_and_the_index_says_so(tmp_path, capsys):
    root = make_set(tmp_path / "steel", "ab")
    mask = np.zeros((12, 16, 3), np.uint8)
    mask[:3] = (255, 0, 0)
    mask[3] = (250, 3, 2)
    save(root / "masks" / "a.png", mask)
    run(root, "--snap", "--out", tmp_path / "index.json")
    assert "note: 16 pixels in 1 masks are taken for the nearest class's" in capsys.readouterr().out
    index = read_index(tmp_path / "index.json")
    assert index.datasets["steel"].snap and index.samples[0].pixels == {0: 8 * 16, 1: 4 * 16}


def test_several_sets_in_one_index(tmp_path, capsys):
    """Each with its own classes; ids have the set's name in front; every set is on every side."""
    roots = [make_set(tmp_path / name, "abcdef", seed=seed) for seed, name in enumerate(("steel", "gold"))]
    other = {"classes": [{"name": "gold", "value": 0}, {"name": "dust", "value": 1}, {"name": "air", "value": 2}]}
    (roots[1] / "classes.json").write_text(json.dumps(other))
    run(*roots, "--out", tmp_path / "index.json", "--test", 2, "--val", 2, "--labelnum", 2)
    index, lists = read_index(tmp_path / "index.json"), lists_of(tmp_path)
    assert {sample.id for sample in index.samples} == {f"{name}__{x}" for name in ("steel", "gold") for x in "abcdef"}
    assert sorted(name for names in lists.values() for name in names) == sorted(sample.id for sample in index.samples)
    for names in lists["test"], lists["val"], lists["train"][:2]:
        assert {sample.dataset for sample in index.samples if sample.id in names} == {"steel", "gold"}
    assert [entry["name"] for entry in index.datasets["gold"].classes["classes"]] == ["gold", "dust", "air"]
    out = capsys.readouterr().out
    assert "note: the sets have different classes, so one network cannot learn them all" in out
    assert "train with --labelnum 2" in out
    (tmp_path / "all.json").write_text(json.dumps(CLASSES))
    run(*roots, "--out", tmp_path / "out" / "index.json", "--classes", tmp_path / "all.json")
    assert "different classes" not in capsys.readouterr().out


def test_a_rare_class_comes_into_every_list_where_that_is_possible(tmp_path, capsys):
    names = [f"p{patient}_{scan}" for patient in range(8) for scan in range(2)]
    common = {name: [0, 1] for name in names}
    root = make_set(tmp_path / "steel", names, {**common, "p1_0": [2], "p3_1": [0, 2], "p6_0": [0, 1, 2]})
    asked = ["--test", 2, "--val", 2, "--labelnum", 2]
    for seed in range(5):
        run(root, "--out", tmp_path / str(seed) / "index.json", *asked, "--seed", seed)
        assert "has no" not in capsys.readouterr().out
        index, lists = read_index(tmp_path / str(seed) / "index.json"), lists_of(tmp_path / str(seed))
        for listed in lists["test"], lists["val"], lists["train"][:4]:
            assert len({name[:2] for name in listed}) == 2 and len(listed) == 4
            assert {number for sample in index.samples if sample.id in listed for number in sample.pixels} == {0, 1, 2}
    root = make_set(tmp_path / "less", names, {**common, "p1_0": [2], "p3_1": [0, 2]})
    run(root, "--out", tmp_path / "less.json", *asked)
    assert "note: val.list has no crack" in capsys.readouterr().out
    (line,) = stopped(capsys, root, "--out", tmp_path / "out" / "index.json", "--test", 9)
    assert "are 9 patients, but 8 have a label" in line and not (tmp_path / "out").exists()


def test_a_folder_for_an_index_is_refused_before_anything_is_written(tmp_path, capsys):
    root = make_set(tmp_path / "steel", ["a", "b", "c"])
    (tmp_path / "out").mkdir()
    (line,) = stopped(capsys, root, "--out", tmp_path / "out", "--test", 1, "--overwrite")
    assert f"out: is a folder; name a file in it, such as {tmp_path / 'out' / 'index.json'}" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "steel"]


def test_groups_are_asked_for_where_names_do_not_tell(tmp_path, capsys):
    root = make_set(tmp_path / "steel", ["spot1_0d_0", "spot1_0d_1", "spot1_9d_2", "spot2_0d_3", "spot3_0d_4"])
    (line,) = stopped(capsys, root, "--out", tmp_path / "out" / "index.json", "--test", 1)
    assert "do not tell whether spot1_0d_0 and spot1_0d_1 are of one patient; " in line
    assert "say it by --patient_id '^[^_-]+' (both are of spot1) or" in line and "(both are of spot1_0d) or" in line
    for seed in range(4):
        words = ["--test", 1, "--group", r"^(spot\d)", "--seed", seed, "--overwrite"]
        run(root, "--out", tmp_path / "out" / "index.json", *words)
        groups = {sample.id: sample.group for sample in read_index(tmp_path / "out" / "index.json").samples}
        assert set(groups.values()) == {"spot1", "spot2", "spot3"}
        lists = lists_of(tmp_path / "out")
        assert len({groups[name] for name in lists["test"]}) == 1
        assert not {groups[name] for name in lists["test"]} & {groups[name] for name in lists["train"]}


def test_equal_images_are_one_group_within_a_set_and_across(tmp_path, capsys):
    first, second = make_set(tmp_path / "steel", "abcd"), make_set(tmp_path / "gold", "efgh", seed=1)
    shutil.copy(first / "images" / "a.png", second / "images" / "e.png")
    pixels = np.array(Image.open(first / "images" / "a.png"))
    Image.fromarray(pixels).save(first / "images" / "d.png", compress_level=0)  # other bytes, equal pixels
    for seed in range(6):
        run(first, second, "--out", tmp_path / str(seed) / "index.json", "--test", 3, "--seed", seed)
        lists = lists_of(tmp_path / str(seed))
        place = {name: listed for listed, names in lists.items() for name in names}
        side = place["steel__a"]
        assert place["steel__d"] == place["gold__e"] == side
        note = f"note: the same image: steel__a ({side}), steel__d ({side}), gold__e ({side})"
        assert note in capsys.readouterr().out
    groups = Counter(sample.group for sample in read_index(tmp_path / "0" / "index.json").samples)
    assert sorted(groups.values()) == [1, 1, 1, 1, 1, 3]


def test_the_sets_own_lists_are_joined(tmp_path, capsys):
    roots = [make_set(tmp_path / name, "abcde", seed=seed) for seed, name in enumerate(("steel", "gold"))]
    save(roots[0] / "unlabeled" / "u.png", np.zeros((8, 8), np.uint8))
    for root, (train, test) in zip(roots, [("dab", "c"), ("b", "ea")], strict=True):
        (root / "train.list").write_text("\n".join(train))
        (root / "test.list").write_text("\n".join(test))
    run(*roots, "--out", tmp_path / "index.json")
    assert lists_of(tmp_path) == {
        "train": ["steel__d", "steel__a", "steel__b", "gold__b"],
        "test": ["steel__c", "gold__e", "gold__a"],
        "unlabeled": ["steel__u"],
    }
    assert "4 in train.list, 3 in test.list, 1 in unlabeled.list, 3 left out" in capsys.readouterr().out
    (roots[0] / "val.list").write_text("u\n")  # without a mask
    run(*roots, "--out", tmp_path / "u" / "index.json")
    assert lists_of(tmp_path / "u")["val"] == ["steel__u"]
    (roots[0] / "val.list").unlink()
    run(roots[1], "--out", roots[1] / "index.json")  # beside its own lists, which stay as they are
    assert lists_of(roots[1]) == {"train": ["b"], "test": ["e", "a"]}
    (line,) = stopped(capsys, roots[1], "--out", roots[1] / "2.json", "--test", 1)
    assert "has another train.list, test.list already; replace with --overwrite" in line
    assert not (roots[1] / "2.json").exists()
    (roots[1] / "test.list").write_text("z\n")
    (line,) = stopped(capsys, *roots, "--out", tmp_path / "2.json")
    assert line == f"error: {roots[1]}/test.list: there is no image of z; add it, or remove the line"
    (roots[1] / "train.list").unlink()
    (line,) = stopped(capsys, *roots, "--out", tmp_path / "2.json")
    assert line == f"error: {roots[1]}: has no train.list as the others; ask for a split of all, as --test 4"


def test_lists_that_part_a_group_are_refused(tmp_path, capsys):
    root = make_set(tmp_path / "em", ["em10", "em11", "em20", "em21"])
    (root / "train.list").write_text("em10\nem20\n")
    (root / "test.list").write_text("em11\nem21\n")
    (line,) = stopped(capsys, root, "--out", tmp_path / "a/index.json", "--group", "^(em.)")
    assert "patient em1 is on two sides" in line and not (tmp_path / "a").exists()
    run(root, "--out", tmp_path / "b/index.json")


def test_a_file_a_channel(tmp_path, capsys):
    for name, size in (("a_0000", 8), ("a_0001", 8), ("b_0000", 8), ("b_0001", 9)):
        image = np.random.default_rng(size).integers(0, 256, (size, 8), np.uint8)
        save(tmp_path / "cells" / "imagesTr" / f"{name}.png", image)
    (line,) = stopped(capsys, tmp_path / "cells", "--out", tmp_path / "index.json")
    assert (
        "b_0001.png: is 9 x 8 pixels, and b_0000.png of its case 8 x 8 pixels; resize it; nothing was written" in line
    )
    save(tmp_path / "cells" / "imagesTr" / "b_0001.png", np.zeros((8, 8), np.uint8))
    run(tmp_path / "cells", "--out", tmp_path / "index.json")
    assert "8 bit, 2 channels (2)" in capsys.readouterr().out
    index = read_index(tmp_path / "index.json")
    assert [path.name for path in index.samples[1].images] == ["b_0000.png", "b_0001.png"]


def test_test_cases_that_a_set_brings_along_stay_so(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part, names in (("Tr", ["p1", "p2", "p3"]), ("Ts", ["p8", "p9"])):
        for name in names:
            save(tmp_path / "Dataset1" / f"images{part}" / f"{name}_0000.png", rng.integers(0, 256, (8, 8), np.uint8))
            save(tmp_path / "Dataset1" / f"labels{part}" / f"{name}.png", rng.integers(0, 2, (8, 8), np.uint8))
    labels = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "cell": 1}, "file_ending": ".png"}
    (tmp_path / "Dataset1" / "dataset.json").write_text(json.dumps(labels))
    run(tmp_path / "Dataset1", "--out", tmp_path / "index.json")
    lists = lists_of(tmp_path)
    assert lists["test"] == ["p8", "p9"] and sorted(lists["train"]) == ["p1", "p2", "p3"]
    assert "cell" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["uhcs", "ebc", "superalloy", "em"])
def test_real_sets(images_root, tmp_path, capsys, name):
    """Their lists are taken over; all pixels are counted; the index says what is in the files."""
    run(images_root / name, "--out", tmp_path / "index.json")
    index, lists = read_index(tmp_path / "index.json"), lists_of(tmp_path)
    for listed in ("train", "val", "test"):
        assert lists[listed] == (images_root / name / f"{listed}.list").read_text().split("\n")[: len(lists[listed])]
    assert len(index.samples) == len(list((images_root / name / "images").iterdir()))
    for sample in index.samples:
        width, height = Image.open(sample.images[0]).size
        assert (sample.height, sample.width) == (height, width)
        assert sum(sample.pixels.values()) == height * width
    assert "note" not in capsys.readouterr().out
