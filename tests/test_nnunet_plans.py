"""nnU-Net's plans, written and read: what one wrote the other reads as it was."""

import json

import numpy as np
import pytest

from mtseg.nnunet_plans import NnUnetPlanError, from_nnunet, to_nnunet
from mtseg.plan import plan

CT = {"mean": 50.0, "std": 9.0, "median": 49.0, "min": -100.0, "max": 300.0, "low": -20.0, "high": 130.0}
LOST = {"num_classes", "ignore_padding", "in_plane", "why", "made_from"}


def made(dims=3, names=("CT", "MR"), shape=(208, 237, 18), spacing=(1.5, 1.6, 5.0)):
    found = {"shapes": [shape] * 20, "spacings": [spacing] * 20, "channels": 2, "kept": 0.5, "intensities": [CT] * 2}
    return plan(found, dims, 4, names=names)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spacing", [(1.5, 1.6, 5.0), (5.0, 1.6, 1.5), (1.0, 1.0, 1.0)])
def test_a_plan_comes_back_as_it_was(dims, spacing):
    ours = made(dims, spacing=spacing)
    back = from_nnunet(json.loads(json.dumps(to_nnunet(ours))), dims)
    ours["spacing"] = ours["spacing"][:dims]
    assert back == {name: value for name, value in ours.items() if name not in LOST} | {"made_from": back["made_from"]}
    assert back["made_from"] == {"channels": 2, "intensities": [CT] * 2}


def test_what_nnunet_reads():
    """ACDC's plan in nnU-Net's order: the slices first, the first stage of stride 1."""
    content = to_nnunet(made())
    configuration = content["configurations"]["3d_fullres"]
    network = configuration["architecture"]["arch_kwargs"]
    assert content["transpose_forward"] == content["transpose_backward"] == [0, 1, 2]
    assert configuration["patch_size"][0] < configuration["patch_size"][2] < configuration["patch_size"][1]
    assert configuration["spacing"] == [5.0, 1.6, 1.5]
    assert network["strides"][:3] == [[1, 1, 1], [1, 2, 2], [2, 2, 2]] and network["kernel_sizes"][0] == [1, 3, 3]
    assert network["n_stages"] == len(network["features_per_stage"]) == len(network["strides"])
    assert configuration["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    assert configuration["use_mask_for_norm"] == [False, True]
    assert content["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"] == -20
    # Slices along W, nnU-Net's last axis: it comes first, the others keep their order.
    turned = to_nnunet(made(shape=(18, 237, 208), spacing=(5.0, 1.6, 1.5)))
    assert turned["transpose_forward"] == [2, 0, 1] and turned["transpose_backward"] == np.argsort([2, 0, 1]).tolist()
    assert turned["configurations"]["3d_fullres"]["spacing"] == [5.0, 1.5, 1.6]


def test_images_keep_their_order():
    found = {"shapes": [(300, 200)] * 9, "spacings": [(1, 1)] * 9, "channels": 1, "kept": 1, "intensities": []}
    ours = plan(found, 2)
    content = to_nnunet(ours, (1, 2))
    assert content["configurations"]["2d"]["patch_size"] == ours["patch_size"]
    assert from_nnunet(content, 2, (1, 2))["strides"] == ours["strides"]


@pytest.mark.parametrize("content", [[], {}, {"configurations": {"2d": {}}}, {"configurations": {"3d_fullres": 3}}])
def test_what_is_no_plan_of_nnunet(content):
    with pytest.raises(NnUnetPlanError, match="3d_fullres"):
        from_nnunet(content)


def test_a_two_dimensional_plan_of_slices_along_another_axis():
    content = to_nnunet(made(2))
    content["transpose_forward"] = [2, 0, 1]
    with pytest.raises(NnUnetPlanError, match="not along D"):
        from_nnunet(content, 2)
