import h5py
import numpy as np
import prepare_la
import pytest
from conftest import ball
from prepare_la import SPLITS, main

nrrd = pytest.importorskip("nrrd", reason='to write the files it reads: pip install -e ".[test]"')

CASES = [(SPLITS / "train.list").read_text().split()[0], (SPLITS / "test.list").read_text().split()[0]]
SHAPE, CENTRE, RADIUS = (200, 180, 20), (110, 80, 10), 8


@pytest.fixture
def challenge(tmp_path):
    for number, case in enumerate(CASES):
        image = np.random.default_rng(number).normal(50, 20, SHAPE).astype(np.float32)
        header = {"space directions": np.diag([0.625, 0.625, 1.25]), "space": "left-posterior-superior"}
        (tmp_path / "Training Set" / case).mkdir(parents=True)
        nrrd.write(str(tmp_path / "Training Set" / case / "lgemri.nrrd"), image, header)
        label = 255 * ball(SHAPE, CENTRE, RADIUS).astype(np.uint8)
        nrrd.write(str(tmp_path / "Training Set" / case / "laendo.nrrd"), label)
    return tmp_path / "Training Set"


def test_the_split_is_ua_mts():
    train, test = ((SPLITS / f"{name}.list").read_text().split() for name in ("train", "test"))
    assert (len(train), len(test), len(set(train) | set(test))) == (80, 20, 100)


def test_crop_around_the_label(challenge, tmp_path):
    main([str(challenge), str(tmp_path / "LA")])
    assert (tmp_path / "LA/train.list").read_text().split() == CASES[:1]
    assert (tmp_path / "LA/test.list").read_text().split() == CASES[1:]
    whole, _ = nrrd.read(str(challenge / CASES[0] / "lgemri.nrrd"))
    whole = (whole - whole.mean()) / whole.std()
    with h5py.File(tmp_path / "LA/data" / CASES[0] / "mri_norm2.h5") as file:
        image, label = file["image"][...], file["label"][...]
        np.testing.assert_allclose(file.attrs["spacing"], (0.625, 0.625, 1.25))
    assert image.dtype == np.float32
    assert image.shape == label.shape
    assert image.shape[2] == SHAPE[2]
    assert all(112 + 20 - 2 <= side <= 112 + 38 for side in image.shape[:2])
    assert label.max() == 1
    assert label.sum() == ball(SHAPE, CENTRE, RADIUS).sum()
    # The crop is a piece of the scan, normalised as a whole, where the label says.
    x, y, z = (np.flatnonzero(label.any(axis=axes))[0] for axes in ((1, 2), (0, 2), (0, 1)))
    corner = [c - RADIUS - v for c, v in zip(CENTRE, (x, y, z), strict=True)]
    piece = whole[tuple(slice(c, c + n) for c, n in zip(corner, image.shape, strict=True))]
    np.testing.assert_allclose(image, piece, atol=1e-4)


def test_crop_that_looks_at_no_label(challenge, tmp_path):
    nrrd.write(str(challenge / CASES[0] / "laendo.nrrd"), np.zeros(SHAPE, np.uint8))
    main([str(challenge), str(tmp_path / "LA"), "--crop", "margins", "--share", "0.1"])
    with h5py.File(tmp_path / "LA/data" / CASES[0] / "mri_norm2.h5") as file:
        assert file["image"].shape == (160, 144, 20)


@pytest.mark.parametrize(
    "mistake", ["no cases", "there already", "no label", "empty label", "truncated", "another file", "other cases"]
)
def test_mistakes_leave_nothing_behind(challenge, tmp_path, mistake, capsys):
    out = tmp_path / "LA"
    if mistake == "no cases":
        challenge = tmp_path
    elif mistake == "there already":
        out.mkdir()
    elif mistake == "no label":
        (challenge / CASES[1] / "laendo.nrrd").unlink()
    elif mistake == "empty label":
        nrrd.write(str(challenge / CASES[1] / "laendo.nrrd"), np.zeros(SHAPE, np.uint8))
    elif mistake == "truncated":
        path = challenge / CASES[1] / "lgemri.nrrd"
        path.write_bytes(path.read_bytes()[:5000])
    elif mistake == "another file":
        path = challenge / CASES[1] / "lgemri.nrrd"
        header, _ = path.read_bytes().split(b"\n\n", 1)
        path.write_bytes(header + f"\ndata file: {challenge / CASES[0] / 'lgemri.nrrd'}\n\n".encode())
    else:
        for number, case in enumerate(CASES):
            (challenge / case).rename(challenge / f"unknown_{number}")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main([str(challenge), str(out)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_share_that_leaves_nothing_is_refused(challenge, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(challenge), str(tmp_path / "LA"), "--crop", "margins", "--share", "0.5"])
    assert stopped.value.code == 2 and "nothing would be left" in capsys.readouterr().err


def test_help_warns_that_the_crop_looks_at_labels(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "looks at the labels of unlabelled and of test cases" in " ".join(capsys.readouterr().out.split())


def test_without_pynrrd_it_says_what_to_install(challenge, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(prepare_la.sys.modules, "nrrd", None)
    with pytest.raises(SystemExit) as stopped:
        main([str(challenge), str(tmp_path / "LA")])
    assert stopped.value.code == 2
    assert "pip install pynrrd" in capsys.readouterr().err
