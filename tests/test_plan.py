"""A plan from a data set, against nnU-Net's published plans and constants and closed forms."""

import numpy as np
import pytest

from mtseg.plan import PlanError, feature_map_elements, fingerprint, nonzero_size, plan, target_spacing, topology

# Median size and spacing as nnU-Net orders them (slices first), cases and classes; then what its plans have: patch and
# batch in 3-D and in 2-D.
PUBLISHED = {
    "Hippocampus": ((36, 50, 35), (1, 1, 1), 260, 3, (40, 56, 40), 9, (56, 40), 366),
    "Prostate": ((20, 320, 320), (3.6, 0.62, 0.62), 32, 3, (20, 320, 256), 2, None, None),
    "Heart": ((115, 320, 232), (1.37, 1.25, 1.25), 20, 2, (80, 192, 160), 2, (320, 256), 39),
    "ACDC": ((18, 237, 208), (5, 1.5625, 1.5625), 200, 4, (20, 256, 224), 4, (256, 224), 56),
}


def found(shape, spacing, cases=10, kept=1.0, **more):
    """The fingerprint of equal cases, whose axes are given in nnU-Net's order."""
    alike = {"shapes": [shape[::-1]] * cases, "spacings": [spacing[::-1]] * cases}
    return {**alike, "channels": 1, "kept": kept, "intensities": [], **more}


@pytest.mark.parametrize("name", PUBLISHED)
def test_nnunets_published_plans(name):
    shape, spacing, cases, classes, *wanted = PUBLISHED[name]
    for dims, patch, batch in ((3, *wanted[:2]), (2, *wanted[2:])):
        made = plan(found(shape, spacing, cases), dims, classes)
        if patch:
            assert (made["patch_size"], made["batch_size"]) == ([*patch[::-1]], batch)
            assert made["labeled_bs"] == batch // 2
    three = plan(found(shape, spacing, cases), 3, classes)
    halvings = {"Hippocampus": [3, 3, 3], "Prostate": [6, 6, 2], "Heart": [5, 5, 4], "ACDC": [5, 5, 2]}[name]
    assert [sum(along) - len(along) for along in zip(*three["strides"], strict=True)] == halvings
    assert three["in_plane"] == (name in ("Prostate", "ACDC"))


def test_strides_of_a_patch_of_one_slice_are_at_least_1():
    made = plan(found((1, 128, 128), (5, 1, 1), 20), 3, 2)
    assert made["patch_size"][2] == made["stride_z"] == 1


def test_strides_and_kernels_of_acdc():
    made = plan(found(*PUBLISHED["ACDC"][:2], 200), 3, 4)
    assert made["strides"] == [[2, 2, 1], [2, 2, 2], [2, 2, 2], [2, 2, 1], [2, 2, 1]]
    assert made["kernel_sizes"] == [[3, 3, 1], *[[3, 3, 3]] * 5]
    assert (made["n_filters"], made["max_filters"]) == (32, 320)
    assert made["stride_xy"] == 112 and made["stride_z"] == 10 and made["ignore_padding"]


def test_nnunets_own_counts_of_its_reference_networks():
    blocks = [1, 3, 4, 6, 6, 6]
    three = [(2, 2, 2)] * 5, [32, 64, 128, 256, 320, 320], blocks, [1] * 5
    assert feature_map_elements((128, 128, 128), *three, 3, residual=True) == 558_319_104
    two = [(2, 2)] * 6, [32, 64, 128, 256, 512, 512, 512], [*blocks, 6], [1] * 6
    assert feature_map_elements((512, 512), *two, 3, residual=True) == 129_793_792


def test_feature_maps_of_a_network_of_two_levels_by_hand():
    # Encoder: two convolutions of 4 channels at 8 x 6, two of 8 at 4 x 6. Decoder: a transposed convolution and one
    # convolution of 4 channels, and a head of 3 classes, at 8 x 6.
    by_hand = 2 * 4 * 48 + 2 * 8 * 24 + 2 * 4 * 48 + 3 * 48
    assert feature_map_elements((8, 6), [(2, 1)], [4, 8], [2, 2], [1], 3) == by_hand


def test_the_spacing_of_thin_stacks_is_the_tenth_percentile_of_the_coarse_axis():
    spacings = np.array([[0.5, 0.6, z] for z in range(1, 12)], float)
    np.testing.assert_allclose(target_spacing(spacings, [[300, 300, 20]] * 11), (0.5, 0.6, 2))
    np.testing.assert_allclose(target_spacing(spacings, [[300, 300, 100]] * 11), (0.5, 0.6, 6))  # not thin
    np.testing.assert_allclose(target_spacing(spacings / [1, 1, 4], [[300, 300, 20]] * 11), (0.5, 0.6, 1.5))
    wide = np.array([[1, 1, 0.2], [1, 1, 4], [1, 1, 4]])
    np.testing.assert_allclose(target_spacing(wide, [[90, 90, 9]] * 3), (1, 1, 1 + 1e-5), rtol=1e-9)


def test_the_network_of_isotropic_and_of_tiny_patches():
    strides, kernels, patch = topology((1, 1, 1), (30, 17, 9))
    assert strides == [(2, 2, 2), (2, 2, 1)] and kernels == [(3, 3, 3)] * 3 and patch.tolist() == [32, 20, 10]
    strides, kernels, patch = topology((1, 1), (5, 7))
    assert strides == [] and kernels == [(3, 3)] and patch.tolist() == [5, 7]
    strides, _, patch = topology((1, 1), (11, 7))  # a single axis needs 12
    assert strides == []
    strides, kernels, _ = topology((1, 1, 1), (30, 17, 9), depth=4)
    assert strides[2:] == [(1, 1, 1)] * 2 and len(kernels) == 5
    assert len(topology((1, 1), (512, 512), depth=4)[0]) == 4


def test_memory_batch_and_patch_follow_what_is_asked_for():
    data = found((200, 200, 200), (1, 1, 1), 50)
    by_memory = [plan(data, memory_gb=gb) for gb in (1, 8, 24)]
    elements = [made["made_from"]["feature_map_elements"] for made in by_memory]
    assert all(number <= gb * 70e6 for number, gb in zip(elements, (1, 8, 24), strict=True))
    voxels = [np.prod(made["patch_size"]) for made in by_memory]
    assert voxels[0] < voxels[1] < voxels[2]
    small = plan(data, max_patch=64)
    assert small["patch_size"] == [64, 64, 64] and small["batch_size"] > by_memory[1]["batch_size"]
    capped = plan(data, max_patch=64, batch_cap=0.05 / 50)
    assert capped["batch_size"] == max(round(0.001 * 200**3 * 50 / 64**3), 2) and "0.001" in capped["why"]["batch"]
    assert plan(data, max_patch=64, batch_cap=None)["batch_size"] >= small["batch_size"]
    for network, depth in (("vnet", 4), ("unet", 5)):
        assert len(plan(data, network=network)["strides"]) == depth
    assert plan(data, n_filters=8)["n_filters"] == 8
    with pytest.raises(PlanError, match="cannot be smaller"):
        plan(data, memory_gb=1e-5)
    with pytest.raises(PlanError, match="cannot be halved"):
        plan(found((5, 5, 5), (1, 1, 1)))
    with pytest.raises(PlanError, match="no 3-D plan"):
        plan({**data, "shapes": [[512, 700]], "spacings": [[1, 1]]})


def test_images_of_two_dimensions():
    sizes = {"shapes": [[484, 645]] * 24, "spacings": [[1, 1]] * 24}
    made = plan({**found((1, 1), (1, 1)), **sizes}, 2, 4)
    assert made["patch_size"] == [512, 768] and len(made["kernel_sizes"]) == 8 and made["batch_size"] == 2
    made = plan({**found((1, 1), (1, 1)), **sizes}, 2, 4, max_patch=256)
    assert max(made["patch_size"]) <= 256 and "stride_z" not in made and "in_plane" not in made


# ------------------------------------------------------------------------------------------------------- fingerprint
def cases(number, seed=0, channels=2):
    rng = np.random.default_rng(seed)
    for case in range(number):
        image = np.zeros((channels, 12, 10, 8), np.float32)
        image[:, 1:9, 2:8, 1 : 6 + case % 2] = rng.normal(100, 20, (channels, 8, 6, 5 + case % 2))
        label = np.zeros(image.shape[1:], np.uint8)
        label[3:7, 3:6, 2:4] = 1 + case % 2
        yield image, label, (1, 1, 2 + case)


def test_a_fingerprint_in_closed_form():
    shown = fingerprint(cases(4), 4)
    assert shown["shapes"] == [[8, 6, 5], [8, 6, 6]] * 2 and shown["spacings"] == [[1, 1, 2.0 + n] for n in range(4)]
    np.testing.assert_allclose(shown["kept"], (240 + 288) / 2 / 960)
    inside = np.concatenate([image[:, label > 0] for image, label, _ in cases(4)], axis=1)
    for channel, values in zip(shown["intensities"], inside, strict=True):
        # With replacement, so often that the draw has the distribution of the voxels.
        np.testing.assert_allclose((channel["mean"], channel["std"]), (values.mean(), values.std()), rtol=1e-3)
        assert (channel["min"], channel["max"]) == (values.min(), values.max())
        np.testing.assert_allclose(channel["median"], np.median(values), atol=0.5)


def test_every_labelled_case_has_an_equal_share_whatever_its_size_and_place():
    large, small = np.full((20, 20, 20), 5.0), np.full((4, 4, 4), 1.0)
    pair = [(large, large, (1, 1, 1)), (small, small, (1, 1, 1))]
    for triples in (pair, pair[::-1], [*pair, (small * 9, None, (1, 1, 1))]):  # a hidden label tells nothing
        (shown,) = fingerprint(triples, 2, voxels=1000)["intensities"]
        assert (shown["mean"], shown["median"], shown["std"]) == (3, 3, 2)
    assert fingerprint([(large, None, (1, 1, 1))], 0)["intensities"] == []


def test_what_a_fingerprint_refuses():
    image = np.ones((4, 4, 4))
    for spacing in ((1, 1, 0), (1, np.nan, 1), (1, -1, 1)):
        with pytest.raises(PlanError, match="spacing of case 1"):
            fingerprint([(image, None, spacing)], 0)
    with pytest.raises(PlanError, match=r"\[1, 2\] channels"):
        fingerprint([(image, None, (1, 1, 1)), (np.stack([image] * 2), None, (1, 1, 1))], 0)
    assert nonzero_size(np.zeros((1, 3, 4))).tolist() == [3, 4]


def test_normalisation_by_the_channels_names_and_the_crop():
    statistics = {"mean": 50.0, "std": 9.0, "low": -20.0, "high": 130.0}
    data = found((40, 40, 40), (1, 1, 1), channels=4, intensities=[statistics] * 4, kept=0.5)
    made = plan(data, names=["CT", "T1", "noNorm", "rescale_to_0_1"])
    assert made["by_channel"] == [[-20, 130, 50, 9], "zscore", [-1e30, 1e30, 0, 1], "minmax"]
    assert made["over"] == "nonzero" and plan({**data, "kept": 0.8})["over"] == "all"
    assert plan(data)["by_channel"] == ["zscore"] * 4
    with pytest.raises(PlanError, match="have names"):
        plan(data, names=["CT"])
    with pytest.raises(PlanError, match="foreground"):
        plan(found((40, 40, 40), (1, 1, 1)), names=["CT"])
