import h5py
import numpy as np
import pytest
from conftest import make_data
from halve import halve, halve_label, main
from scipy import ndimage

from mtseg.datasets import LAHeart


def test_means_and_majorities():
    volume = np.random.default_rng(0).standard_normal((2, 7, 6, 9)).astype(np.float32)
    centres = ndimage.uniform_filter(volume.astype(float), size=(1, 2, 2, 2))[:, 1:7:2, 1:6:2, 1:8:2]
    np.testing.assert_allclose(halve(volume), centres, atol=1e-6)
    label = np.zeros((4, 2, 2), int)
    label[:2].flat[:4] = 2  # half of the first block
    label[2:].flat[:3] = 1  # less than half of the second
    assert halve_label(label).tolist() == [[[2]], [[0]]]


def test_a_data_set_is_halved_whole(tmp_path, capsys):
    root = make_data(tmp_path / "whole", channels=2)
    with h5py.File(root / "data/case_0/mri_norm2.h5", "a") as file:
        file.attrs["spacing"] = [1.0, 1.0, 2.0]
    (root / "splits.json").write_text('{"patients": {"a": ["case_0", "case_1"]}}')
    (root / "classes.json").write_text('{"classes": [{"name": "a"}, {"name": "b"}], "background": null}')
    main([str(root), str(tmp_path / "half")])
    assert (tmp_path / "half/classes.json").read_text() == (root / "classes.json").read_text()
    assert (tmp_path / "half/splits.json").read_text() == (root / "splits.json").read_text()
    sample, whole = LAHeart(tmp_path / "half")[0], LAHeart(root)[0]
    assert sample["image"].shape == (2, 12, 10, 7)
    np.testing.assert_allclose(sample["image"].mean(), whole["image"].mean(), atol=1e-5)
    with h5py.File(tmp_path / "half/data/case_0/mri_norm2.h5") as file:
        assert file.attrs["spacing"].tolist() == [2, 2, 4]
    for arguments in ([str(root), str(tmp_path / "half")], [str(tmp_path), str(tmp_path / "new")]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "whole"]


def test_cases_without_a_label_stay_so_and_voxels_of_other_files_are_refused(tmp_path, capsys):
    root = make_data(tmp_path / "whole")
    with h5py.File(root / "data/case_1/mri_norm2.h5", "a") as file:
        del file["label"]
        file.attrs["grid_shape"] = [24, 20, 14]
    main([str(root), str(tmp_path / "half")])
    with h5py.File(tmp_path / "half/data/case_1/mri_norm2.h5") as file:
        assert list(file) == ["image"] and not file.attrs
    (tmp_path / "secret").write_bytes(bytes(24 * 20 * 14))
    with h5py.File(root / "data/case_2/mri_norm2.h5", "a") as file:
        del file["image"]
        file.create_dataset("image", (24, 20, 14), np.uint8, external=[(str(tmp_path / "secret"), 0, 24 * 20 * 14)])
    with pytest.raises(SystemExit) as stopped:
        main([str(root), str(tmp_path / "new")])
    assert stopped.value.code == 2 and "case_2/mri_norm2.h5: the voxels of 'image' lie" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "secret", "whole"]
