from collections import Counter

import numpy as np
import pytest
import torch

from mtseg.transforms import (
    Compose,
    RandomCrop,
    RandomFlip,
    RandomGenerator,
    RandomRot90Flip,
    RandomRotFlip,
    Resize,
    ToTensor,
)


def sample(shape=(5, 4, 3), channels=None, **extra):
    """An image whose voxels are all different, with its own copy as the label."""
    label = np.arange(np.prod(shape)).reshape(shape)
    image = label.astype(np.float32)
    return {"image": image if channels is None else np.stack([image] * channels), "label": label, **extra}


def test_every_position_of_a_crop_is_reached_equally_often():
    crop = RandomCrop((3, 3, 2))
    rng = np.random.default_rng(0)
    corners = Counter(int(crop(sample(rng=rng))["label"][0, 0, 0]) for _ in range(3000))
    possible = {x * 12 + y * 3 + z for x in range(3) for y in range(2) for z in range(2)}
    assert set(corners) == possible
    assert min(corners.values()) > 3000 / 12 / 1.5


@pytest.mark.parametrize("channels", [None, 2])
def test_small_volumes_are_padded_with_zero_in_the_middle(channels):
    out = RandomCrop((8, 4, 2))(sample(channels=channels))
    assert out["label"].shape == (8, 4, 2)
    assert out["image"].shape[-3:] == (8, 4, 2)
    assert not out["label"][0].any()
    assert not out["label"][6:].any()
    assert out["label"][2].all()
    image = out["image"] if channels is None else out["image"][1]
    np.testing.assert_array_equal(image, out["label"])


def of_uamt(label, size, first):
    """The crop of UA-MT's dataloaders/la_heart.py; `first(room)` gives an axis's first voxel, as its classes do."""
    if any(side <= wanted for side, wanted in zip(label.shape, size, strict=True)):
        widths = [max((wanted - side) // 2 + 3, 0) for side, wanted in zip(label.shape, size, strict=True)]
        label = np.pad(label, [(width, width) for width in widths])
    starts = [first(side - wanted) for side, wanted in zip(label.shape, size, strict=True)]
    return label[tuple(slice(start, start + wanted) for start, wanted in zip(starts, size, strict=True))]


def test_every_position_is_reached_where_the_familys_random_crop_never_reaches_the_last():
    rng, crop = np.random.default_rng(0), RandomCrop((3, 3, 2))
    label = sample()["label"]
    ours = {crop(sample(rng=rng))["label"].tobytes() for _ in range(500)}
    theirs = {of_uamt(label, (3, 3, 2), lambda room: rng.integers(0, room)).tobytes() for _ in range(500)}
    last = {label[w : w + 3, h : h + 3, d : d + 2].tobytes() for w in range(3) for h in range(2) for d in range(2)}
    last -= {label[w : w + 3, :3, :2].tobytes() for w in range(2)}
    assert ours - theirs == last
    assert theirs < ours


def test_flips_show_the_volume_as_it_was_where_the_familys_never_do():
    rng = np.random.default_rng(0)
    original = sample((3, 3, 2))["label"]
    for transform, images in (
        (RandomFlip(), {original[::w, ::h].tobytes() for w in (1, -1) for h in (1, -1)}),
        (RandomFlip((-1,)), {original[..., ::d].tobytes() for d in (1, -1)}),
    ):
        seen = Counter()
        for _ in range(800):
            out = transform(sample((3, 3, 2), channels=2, rng=rng))
            np.testing.assert_array_equal(out["image"][1], out["label"])
            seen[out["label"].tobytes()] += 1
        assert set(seen) == images
        assert min(seen.values()) > 0.75 * 800 / len(images)
    theirs = {RandomRotFlip()(sample((3, 3, 2), rng=rng))["label"].tobytes() for _ in range(800)}
    assert original.tobytes() not in theirs


def test_rotations_and_flips_are_equally_often_each_of_the_four_mirror_images():
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(800):
        out = RandomRotFlip()(sample((3, 3, 2), channels=2, rng=rng))
        np.testing.assert_array_equal(out["image"][0], out["label"])
        assert (np.diff(out["label"], axis=2) == 1).all()  # the third axis stays
        seen[out["label"].tobytes()] += 1
    original = sample((3, 3, 2))["label"]
    transposed = original.transpose(1, 0, 2)
    mirrors = (original[::-1], original[:, ::-1], transposed, transposed[::-1, ::-1])
    assert set(seen) == {mirror.tobytes() for mirror in mirrors}
    assert min(seen.values()) > 150


def test_all_symmetries_of_the_plane_are_equally_often():
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(1600):
        out = RandomRot90Flip()(sample((3, 3, 2), channels=2, rng=rng))
        np.testing.assert_array_equal(out["image"][1], out["label"])
        seen[out["label"].tobytes()] += 1
    original = sample((3, 3, 2))["label"]
    planes = [original, original.transpose(1, 0, 2)]
    symmetries = [plane[::w, ::h] for plane in planes for w in (1, -1) for h in (1, -1)]
    assert set(seen) == {symmetry.tobytes() for symmetry in symmetries}
    assert min(seen.values()) > 0.6 * 1600 / len(symmetries)


def test_a_quarter_turn_swaps_the_sides_of_volumes_that_are_not_square():
    rng = np.random.default_rng(0)
    shapes = Counter(RandomRot90Flip()(sample((5, 4, 3), rng=rng))["label"].shape for _ in range(100))
    assert set(shapes) == {(5, 4, 3), (4, 5, 3)}


def test_to_tensor():
    out = ToTensor()(RandomRotFlip()(sample()))
    assert out["image"].dtype == torch.float32
    assert out["image"].shape[0] == 1
    assert out["label"].dtype == torch.int64
    assert ToTensor()(sample(channels=3))["image"].shape == (3, 5, 4, 3)
    small = ToTensor(np.uint8)(sample())["label"]
    assert small.dtype == torch.uint8
    assert torch.equal(small.long(), ToTensor()(sample())["label"])


def test_rng_or_numpys_global_state_decides():
    transform = Compose([RandomRotFlip(), RandomCrop((2, 2, 2)), ToTensor()])

    def draw(seed=None):
        return transform(sample() if seed is None else sample(rng=np.random.default_rng(seed)))["image"]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    np.random.seed(4)
    first = draw()
    np.random.seed(4)
    assert torch.equal(draw(), first)
    assert not torch.equal(draw(), first)


def test_an_image_that_does_not_fit_its_label_is_refused():
    """Channels last, as most libraries of images have them, and a volume cut in another way than its label."""
    for image, label in (((16, 12, 3), (16, 12)), ((20, 20, 8), (16, 16, 8)), ((2, 1, 16, 12), (16, 12))):
        size = (8, 8, 8)[: len(label)]
        for transform in (RandomCrop(size), RandomRot90Flip(), RandomFlip(), RandomGenerator(), Resize(size)):
            for seed in range(6):
                wrong = {"image": np.zeros(image, "f"), "label": np.zeros(label, int)}
                wrong["rng"] = np.random.default_rng(seed)
                try:
                    assert transform(wrong) is wrong and isinstance(transform, RandomGenerator)  # which may do nothing
                except ValueError as error:
                    assert f"an image of shape {image} for a label of shape {label}" in str(error)


@pytest.mark.parametrize(("channels", "shape", "axis"), [(3, (4, 4), 2), (None, (4, 4), 2), (2, (4, 4, 4), 3)])
def test_an_axis_that_the_label_does_not_have_is_not_mirrored(channels, shape, axis):
    """Of an image with channels it mirrored these, and of the label another axis."""
    with pytest.raises(ValueError, match=f"a label of {len(shape)} axes cannot be mirrored along others"):
        for seed in range(9):
            RandomFlip((axis,))(sample(shape, channels, rng=np.random.default_rng(seed)))


@pytest.mark.parametrize("labelled", [0, 1, 16])
def test_what_pads_a_label_that_is_known_in_part_or_not_at_all_is_unknown(labelled):
    label = np.full(16, 255)
    label[:labelled] = 1
    out = RandomCrop((8, 8), unknown=255)({"image": np.zeros((4, 4), "f"), "label": label.reshape(4, 4)})["label"]
    assert Counter(out.flat) == Counter({1: labelled, 255: 16 - labelled}) + Counter({0 if labelled == 16 else 255: 48})


@pytest.mark.parametrize(("kind", "value"), [(bool, 255), (np.uint8, -1), (np.int8, 255), (np.uint8, 0.5)])
def test_padding_that_a_label_cannot_hold_is_refused(kind, value):
    with pytest.raises(ValueError, match=f"cannot hold {value}"):
        RandomCrop((6, 6), outside=value)({"image": np.zeros((4, 4)), "label": np.zeros((4, 4), kind)})


def test_transforms_leave_their_input_alone():
    before = sample()
    Compose([RandomRotFlip(), RandomCrop((3, 3, 2))])(before)
    np.testing.assert_array_equal(before["image"], sample()["image"])
