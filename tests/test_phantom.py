import json

import h5py
import numpy as np
import pytest
from make_phantom import main
from scipy import ndimage

from mtseg.phantom import IMAGE_SHAPE, SHAPE, PhantomError, make_phantom


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return make_phantom(tmp_path_factory.mktemp("phantom") / "Phantom", train=4, test=2)


def read(root, case):
    with h5py.File(root / "data" / case / "mri_norm2.h5") as file:
        return file["image"][...], file["label"][...]


def test_layout_and_volumes(phantom):
    train, test = ((phantom / f"{name}.list").read_text().split() for name in ("train", "test"))
    assert len(train) == 4
    assert len(test) == 2
    assert not set(train) & set(test)
    for case in train + test:
        image, label = read(phantom, case)
        assert image.dtype == np.float32
        assert image.shape == label.shape == SHAPE
        assert abs(image.mean()) < 1e-4
        assert abs(image.std() - 1) < 1e-3
        assert ndimage.label(label)[1] == 1  # one piece: the chamber with its veins
        assert 0.01 < label.mean() < 0.2


def test_the_same_seed_gives_the_same_volumes_and_another_others(phantom, tmp_path):
    again, other = make_phantom(tmp_path / "a", 1, 1), make_phantom(tmp_path / "b", 1, 1, seed=1)
    for key in (0, 1):
        np.testing.assert_array_equal(read(phantom, "phantom_000")[key], read(again, "phantom_000")[key])
        assert (read(again, "phantom_000")[key] != read(other, "phantom_000")[key]).any()


def test_electrodes_have_three_phases_and_no_background(tmp_path, capsys):
    main([str(tmp_path / "Electrode"), "--dims", "2", "--train", "5", "--test", "2"])
    shares = []
    for path in sorted((tmp_path / "Electrode").glob("data/*/mri_norm2.h5")):
        with h5py.File(path) as file:
            image, label = file["image"][...], file["label"][...]
        assert image.shape == label.shape == IMAGE_SHAPE
        assert abs(image.mean()) < 1e-4 and abs(image.std() - 1) < 1e-3
        shares.append(np.bincount(label.ravel(), minlength=3) / label.size)
        # Grains are brighter than what lies between them, and carbon than electrolyte, but not in every pixel.
        means = [image[label == number].mean() for number in range(3)]
        assert means[1] < means[0] < means[2]
        assert np.quantile(image[label == 1], 0.95) > np.quantile(image[label == 0], 0.05)
    assert len(shares) == 7 and np.min(shares) > 0.1
    table = json.loads((tmp_path / "Electrode/classes.json").read_text())
    assert [entry["name"] for entry in table["classes"]] == ["carbon", "electrolyte", "active material"]
    assert table["background"] is None


def test_the_chamber_cannot_be_had_by_a_threshold(phantom):
    """Else it would say nothing about a method: the best threshold of all is far from the label."""
    for case in ("phantom_000", "phantom_001"):
        image, label = read(phantom, case)
        smooth = ndimage.gaussian_filter(image, 1)
        masks = [smooth > t for t in np.quantile(smooth, np.linspace(0.5, 0.99, 50))]
        best = max(2 * (mask & (label > 0)).sum() / (mask.sum() + label.sum()) for mask in masks)
        assert best < 0.8


def test_two_at_once_and_a_folder_in_the_way(tmp_path, monkeypatch):
    def other_process_wins(temporary, root):
        monkeypatch.undo()
        make_phantom(root, 1, 1)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr("mtseg.phantom.os.replace", other_process_wins)
    assert (make_phantom(tmp_path / "a", 1, 1) / "train.list").is_file()
    (tmp_path / "b").write_text("a file")
    with pytest.raises(PhantomError, match="cannot be made there"):
        make_phantom(tmp_path / "b", 1, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_is_there_is_left_alone(phantom, tmp_path, capsys):
    before = (phantom / "train.list").stat().st_mtime_ns
    make_phantom(phantom)
    assert (phantom / "train.list").stat().st_mtime_ns == before
    main([str(phantom), "--seed", "5"])
    assert capsys.readouterr().out.strip().endswith("was there already, and is left as it is")
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "mine")])
    assert stopped.value.code == 2
    assert "exists" in capsys.readouterr().err
