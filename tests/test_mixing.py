import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from mtseg.mixing import centred_boxes, cutmix_boxes, inner_box, mixup

SIZES = [(40, 30), (30, 40, 20)]


def edges_and_corner(mask):
    """Of the one full box in a mask (1, *size); None for an empty mask."""
    found = ndimage.find_objects(mask[0].numpy().astype(int))
    if not found:
        return None
    assert mask[0][found[0]].all()
    return [part.stop - part.start for part in found[0]], [part.start for part in found[0]]


def test_mixup_weighs_each_sample():
    a, b = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    mixed = mixup(a, b, torch.tensor([0, 0.25, 1]))
    assert torch.equal(mixed[0], b[0]) and torch.equal(mixed[2], a[2])
    torch.testing.assert_close(mixed[1], 0.25 * a[1] + 0.75 * b[1])
    torch.testing.assert_close(mixup(a, b, 0.25)[1], mixed[1])
    labels = torch.eye(2, dtype=torch.long)  # one-hot: integers
    torch.testing.assert_close(
        mixup(labels, labels.flip(0), torch.tensor([0.7, 0.7])), mixup(labels, labels.flip(0), 0.7)
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_inner_boxes_have_one_size_and_lie_anywhere(size, device):
    torch.manual_seed(0)
    seen = []
    for _ in range(400):
        box = inner_box(size, 2 / 3, device)
        assert box.dtype == torch.bool and box.shape == (1, 1, *size) and box.device.type == device.type
        edges, corner = edges_and_corner(box[0].cpu())
        assert edges == [side * 2 // 3 for side in size]
        seen.append(corner)
    for axis, side in enumerate(size):
        places = side - side * 2 // 3 + 1
        counts = np.bincount(np.array(seen)[:, axis], minlength=places)
        assert len(counts) == places and stats.chisquare(counts).pvalue > 1e-3
    assert [int(inner_box((side,), 2 / 3).sum()) for side in range(2, 300)] == [2 * side // 3 for side in range(2, 300)]
    assert not inner_box(size, 0).any() and inner_box(size, 1).all()
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        inner_box(size, 1.5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cutmix_boxes_have_the_volume_and_the_aspect_that_were_asked_for(size, device):
    torch.manual_seed(0)
    masks = cutmix_boxes(1000, size, device).cpu()
    assert masks.dtype == torch.bool and masks.shape == (1000, 1, *size)
    boxes = [box for mask in masks if (box := edges_and_corner(mask))]
    assert stats.binomtest(len(boxes), 1000, 0.5).pvalue > 1e-3
    edges = np.array([edges for edges, _ in boxes])
    assert ((edges + 1) / size).prod(1).min() > 0.02 and (edges / size).prod(1).max() < 0.4
    least, most = edges[:, 1] / (edges[:, 0] + 1) * size[0] / size[1], (edges[:, 1] + 1) / edges[:, 0]
    aspects = least ** (len(size) / 2), (most * size[0] / size[1]) ** (len(size) / 2)  # relative to the sides
    assert aspects[0].max() < 1 / 0.3 and aspects[1].min() > 0.3
    assert aspects[1].max() > 2 and aspects[0].min() < 0.5 and (edges / size).prod(1).max() > 0.35
    # At a given size, all places are equally likely.
    one = cutmix_boxes(400, size, p=1, shares=(0.1, 0.1), aspects=(1, 1))
    corners = np.array([edges_and_corner(mask)[1] for mask in one])
    for axis, side in enumerate(size):
        places = side - int(0.1 ** (1 / len(size)) * side) + 1
        counts = np.bincount(corners[:, axis], minlength=places)
        assert len(counts) == places and stats.chisquare(counts).pvalue > 1e-3


def test_shares_in_percent_are_refused():
    with pytest.raises(ValueError, match="boxes of 2 to 40 of the volume: take shares from 0 to 1"):
        cutmix_boxes(2, (8, 8), shares=(2, 40))
    with pytest.raises(ValueError, match=r"boxes of 1 of the volume with aspects \(3, 3\) do not fit"):
        cutmix_boxes(2, (32, 32), shares=(0.5, 1), aspects=(3, 3))


def test_a_patch_of_one_slice_has_boxes_of_one_slice():
    torch.manual_seed(0)
    for masks in (cutmix_boxes(99, (64, 64, 1), p=1), centred_boxes(99, (64, 64, 1)), inner_box((64, 64, 1), 2 / 3)):
        assert masks.flatten(1).any(1).all() and not masks.flatten(1).all(1).any()


def test_cutmix_boxes_are_drawn_each_for_itself():
    torch.manual_seed(0)
    assert not cutmix_boxes(50, (8, 8), p=0).any()
    masks = cutmix_boxes(50, (32, 32), p=1)
    assert masks.flatten(1).any(1).all() and len({tuple(mask.flatten().tolist()) for mask in masks}) > 45


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_centred_boxes_have_the_edges_and_the_centres_of_ad_mt(size, device):
    torch.manual_seed(0)
    masks = centred_boxes(2000, size, device).cpu()
    assert masks.dtype == torch.bool and masks.shape == (2000, 1, *size) and masks.flatten(1).any(1).all()
    boxes = [edges_and_corner(mask) for mask in masks]
    whole = [(e, c) for e, c in boxes if all(0 < a and a + b < side for a, b, side in zip(c, e, size, strict=True))]
    relative = np.array([edges for edges, _ in whole]) / size
    assert np.ptp(relative, axis=1).max() < 2 / min(size)  # the same share of each side
    centres = np.array([np.add(c, np.array(e) // 2) for e, c in whole])
    assert (centres >= np.array(size) // 8).all()
    # Without the volume's borders, the edges are those of the distribution: here a side so long that few are cut.
    lengths = centred_boxes(2000, (10000,), alpha=200.0).flatten(1).sum(1) / 10000
    assert lengths.max() == pytest.approx(0.5**0.5, abs=0.08) and lengths.min() > 0.3
