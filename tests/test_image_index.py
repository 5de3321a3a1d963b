import json
import os

import pytest

from mtseg.image_index import DataSet, ImageIndexError, Index, Sample, name_of, read_index

CLASSES = {"classes": [{"name": "matrix", "value": 0}, {"name": "pore", "value": 1}]}


@pytest.fixture
def root(tmp_path):
    """A set 'steel' of three images, two of them with a mask; the files are empty, since no index opens them."""
    for name in ("images/a.png", "images/b.png", "images/c.png", "masks/a.png", "masks/b.png"):
        path = tmp_path / "steel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "steel"


def written(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def own(**changes):
    """The content of an index of one sample, with `changes` to that sample."""
    sample = {"id": "a", "dataset": "steel", "image": "images/a.png", "mask": "masks/a.png"}
    return {
        "format": 1,
        "datasets": {"steel": {"root": "steel", "classes": CLASSES}},
        "samples": [{**sample, **changes}],
    }


def test_an_index_is_read_as_it_was_written(root, tmp_path):
    a, b, c = (root / f"images/{name}.png" for name in "abc")
    samples = [
        Sample("a", "steel", (a,), root / "masks/a.png", "g", 484, 645, "f00", {0: 312179, 1: 1}),
        Sample("b", "steel", (a, b, c), root / "masks/b.png"),
        Sample("Größe c", "steel", (c,)),
    ]
    index = Index(tmp_path / "index.json", {"steel": DataSet(root, CLASSES, snap=True)}, samples)
    index.path.write_text(index.to_json(), encoding="utf-8")
    again = read_index(index.path)
    assert again == index
    content = json.loads(index.path.read_text(encoding="utf-8"))
    assert content["datasets"]["steel"]["root"] == "steel"
    assert content["samples"][0] == {
        "id": "a", "dataset": "steel", "image": "images/a.png", "mask": "masks/a.png", "group": "g",
        "height": 484, "width": 645, "sha256": "f00", "pixels": {"0": 312179, "1": 1},
    }  # fmt: skip
    assert content["samples"][1]["frames"] == ["images/a.png", "images/b.png", "images/c.png"]


def test_an_index_moves_with_its_images(root, tmp_path):
    (tmp_path / "indices").mkdir()
    path = tmp_path / "indices" / "steel.json"
    path.write_text(Index(path, {"steel": DataSet(root)}, [Sample("a", "steel", (root / "images/a.png",))]).to_json())
    assert json.loads(path.read_text())["datasets"]["steel"]["root"] == "../steel"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(tmp_path / "indices", moved / "indices")
    os.rename(root, moved / "steel")
    (sample,) = read_index(moved / "indices" / "steel.json").samples
    assert sample.images[0].resolve() == moved / "steel" / "images" / "a.png"


def test_classes_come_from_the_index_then_a_file_beside_it(root, tmp_path):
    other, content = {"classes": ["other"]}, own()
    del content["datasets"]["steel"]["classes"]
    path = written(tmp_path / "index.json", content)
    assert read_index(path).datasets["steel"].classes is None
    written(tmp_path / "classes.json", other)
    assert read_index(path).datasets["steel"].classes == other
    written(path, own())
    assert read_index(path).datasets["steel"].classes == CLASSES
    written(tmp_path / "classes.json", "{")
    with pytest.raises(ImageIndexError, match=r"classes.json: not a JSON file that can be read \(.+\); name another"):
        read_index(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "../secret.png"}, r"file '\.\./secret\.png' is not in its data set's folder .*steel; move it there"),
        ({"image": "images/../../secret.png"}, "is not in its data set's folder"),
        ({"image": "/etc/passwd"}, "file '/etc/passwd' is not in its data set's folder"),
        ({"mask": "..\\secret.png"}, "is not in its data set's folder"),
        ({"image": "C:\\secret.png"}, "is not in its data set's folder"),
        ({"frames": ["images/a.png", "/etc/passwd", "images/a.png"]}, "is not in its data set's folder"),
        ({"image": "images/z.png"}, r"steel/images/z\.png, of sample a, is missing; add it or index again"),
        ({"mask": "masks/z.png"}, r"steel/masks/z\.png, of sample a, is missing"),
        ({"image": "images"}, "steel/images, of sample a, is missing"),
        ({"id": "../a"}, r"the id of sample '\.\./a' is not a name but a path; rename it"),
        ({"id": "a\nb"}, "is not a name"),
        ({"id": " a"}, "is not a name"),
        ({"id": 3}, "not an index"),
        ({"dataset": "gold"}, r"not an index \(KeyError: 'gold'\); make it again"),
        ({"image": 3}, "not an index"),
        ({"image": ""}, "not an index"),
        ({"frames": "abc"}, "is missing"),
        ({"pixels": {"a": 1}}, "not an index"),
        ({"pixels": [1]}, "not an index"),
    ],
)
def test_samples_that_cannot_be(root, tmp_path, changes, words):
    (tmp_path / "secret.png").touch()
    path = written(tmp_path / "index.json", own(**changes))
    with pytest.raises(ImageIndexError, match=words) as raised:
        read_index(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": 2, "datasets": {}, "samples": []}, "has format 2, only 1 is known; take a newer mtseg"),
        ({"format": 1}, r"not an index \(KeyError: 'datasets'\); make it again"),
        ({"format": 1, "datasets": [], "samples": []}, "not an index"),
        ({"images": []}, "not an index"),
        ([1], r"not a JSON file that can be read \(it does not hold \{...\}\); name another"),
        ("{", r"not a JSON file that can be read \(.+\); name another"),
        ("[" * 10**5, "not a JSON file that can be read"),
    ],
)
def test_files_that_are_no_index(tmp_path, content, words):
    path = written(tmp_path / "index.json", content)
    with pytest.raises(ImageIndexError, match=words) as raised:
        read_index(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_a_sample_twice_a_missing_file_and_one_that_is_too_large(root, tmp_path, monkeypatch):
    content = own()
    content["samples"] *= 2
    path = written(tmp_path / "index.json", content)
    with pytest.raises(ImageIndexError, match=r"index.json: sample a is there 2 times; rename all but one"):
        read_index(path)
    with pytest.raises(ImageIndexError, match=r"none.json: not a JSON file that can be read \(No such file"):
        read_index(tmp_path / "none.json")
    monkeypatch.setattr("mtseg.image_index.LARGEST", 10)
    with pytest.raises(ImageIndexError, match="it has more than 10 bytes"):
        read_index(path)


@pytest.fixture
def srpu(tmp_path):
    """A project like SRPU-Model's: images of two sets in data/, JSON files in json/."""
    for name in ("LInCl/raw/s-001.png", "LInCl/raw/s-002.png", "LInCl/masks/s-001.png", "LPSCl/raw/s-001.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def test_srpus_index_of_several_sets(srpu):
    """Its neighbouring frames become channels; its paths begin in the folder of its project."""
    content = {
        "datasets_info": {
            "LInCl": {"raw_image_root": "data/LInCl/raw", "mask_root": "data/LInCl/masks"},
            "LPSCl": {"raw_image_root": str(srpu / "data/LPSCl/raw"), "mask_root": str(srpu / "data/LPSCl/raw")},
        },
        "samples": [
            {"sample_id": "LInCl_s_1", "dataset": "LInCl", "frames": ["s-001.png", "s-001.png", "s-002.png"],
             "mask_file": "s-001.png"},
            {"sample_id": "LPSCl_s_1", "dataset": "LPSCl", "frames": ["s-001.png"] * 3, "mask_file": None},
        ],
    }  # fmt: skip
    path = written(srpu / "json" / "master.json", content)
    written(srpu / "json" / "classes.json", CLASSES)
    index = read_index(path)
    data = srpu / "data"
    first, second = (data / "LInCl/raw/s-001.png", data / "LInCl/raw/s-002.png")
    assert index.samples == [
        Sample("LInCl_s_1", "LInCl", (first, first, second), data / "LInCl/masks/s-001.png"),
        Sample("LPSCl_s_1", "LPSCl", (data / "LPSCl/raw/s-001.png",) * 3),
    ]
    assert {name: entry.root for name, entry in index.datasets.items()} == {
        "LInCl": data / "LInCl",
        "LPSCl": data / "LPSCl/raw",
    }
    assert all(entry.classes == CLASSES for entry in index.datasets.values())
    for key, file in (
        ("frames", ["../masks/s-001.png"]),
        ("frames", ["/etc/x.png"]),
        ("mask_file", "../raw/s-001.png"),
    ):
        wrong = {**content, "samples": [{**content["samples"][0], key: file}]}
        with pytest.raises(ImageIndexError, match="is not in its data set's folder"):
            read_index(written(srpu / "json" / "wrong.json", wrong))


def test_ids():
    assert name_of("a", "steel", several=False) == "a"
    assert name_of("a", "steel", several=True) == "steel__a"
