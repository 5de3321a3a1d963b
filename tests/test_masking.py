"""Hidden blocks, sparse convolutions and the corruptions of Models Genesis against plain transcriptions and PyTorch."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtseg import masking
from mtseg.masking import (
    Reconstructor,
    corrupted,
    genesis,
    hidden_blocks,
    normalized,
    resized,
    squared_errors,
    visible_only,
)
from mtseg.networks.decoders import EncoderDecoder, UNetDecoder
from mtseg.networks.resnet import ResNet
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet

# ------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("size", "block", "ratio", "hidden"),
    [((32, 48, 16), 8, 0.75, 36), ((64, 96), 16, 0.6, 14), ((32, 32), 16, 0.3, 1), ((20, 30), 10, 0.5, 3)],
)
def test_exactly_the_asked_share_of_whole_blocks_is_hidden(size, block, ratio, hidden):
    mask = hidden_blocks(5, size, block, ratio)
    assert mask.dtype == torch.bool and mask.shape == (5, 1, *size)
    for one in mask[:, 0].numpy():
        blocks = [
            one[tuple(slice(i * block, (i + 1) * block) for i in at)] for at in np.ndindex(*np.array(size) // block)
        ]
        assert {part.min() == part.max() for part in blocks} == {True}
        assert sum(part.all() for part in blocks) == hidden == int(ratio * len(blocks) + 1e-9)


def test_hidden_blocks_come_from_the_seed_and_differ_between_samples():
    torch.manual_seed(3)
    first = hidden_blocks(4, (64, 64), 8, 0.5)
    torch.manual_seed(3)
    assert torch.equal(hidden_blocks(4, (64, 64), 8, 0.5), first)
    assert not torch.equal(first[0], first[1])


def test_every_block_and_every_pair_of_blocks_is_hidden_equally_often():
    """Of 6 blocks 3: each in half of the masks, each pair in a fifth, to within five standard deviations."""
    torch.manual_seed(0)
    masks = hidden_blocks(20000, (2, 3), 1, 0.5).flatten(1).double()
    together = masks.T @ masks / len(masks)
    expected = torch.full((6, 6), 0.2, dtype=torch.double).fill_diagonal_(0.5)
    deviation = (expected * (1 - expected) / len(masks)).sqrt()
    assert ((together - expected).abs() < 5 * deviation).all()


@pytest.mark.parametrize(
    ("size", "block", "ratio"), [((32, 24), 16, 0.5), ((16, 16), 32, 0.5), ((32, 32), 16, 0.2), ((32, 32), 16, 1.0)]
)
def test_blocks_that_do_not_fit_and_ratios_that_hide_none_or_all_are_refused(size, block, ratio):
    with pytest.raises(ValueError, match=f"of {block} voxels a side"):
        hidden_blocks(1, size, block, ratio)


def test_a_mask_is_repeated_where_finer_and_true_where_coarser():
    mask = torch.rand(2, 1, 2, 3) < 0.5
    assert np.array_equal(resized(mask, (6, 12))[:, 0], np.kron(mask[:, 0], np.ones((1, 3, 4))))
    assert torch.equal(resized(mask, (2, 3)), mask)
    assert resized(mask, (2, 1)).all() and resized(mask, (1, 3)).shape == (2, 1, 1, 3)


def test_squared_errors_are_pytorchs_on_the_hidden_voxels():
    output, image = torch.randn(2, 3, 2, 8, 8, 8)
    hidden = hidden_blocks(3, (8, 8, 8), 4, 0.5)
    for errors, counted in (
        (squared_errors(output, image), torch.ones_like(hidden)),
        (squared_errors(output, image, hidden), hidden),
    ):
        chosen = counted.expand_as(output)
        expected = [F.mse_loss(output[n][chosen[n]], image[n][chosen[n]]) for n in range(3)]
        torch.testing.assert_close(errors, torch.stack(expected))


def test_what_a_network_sees_has_marks_in_its_last_channel():
    images = torch.randn(3, 2, 16, 16)
    torch.manual_seed(1)
    seen, hidden = corrupted(images, "masked", 8, 0.5)
    torch.manual_seed(1)
    assert torch.equal(hidden, hidden_blocks(3, (16, 16), 8, 0.5)) and torch.equal(seen[:, 2:] == 1, hidden)
    assert torch.equal(seen[:, :2], images * ~hidden)
    for pretext in ("autoencoder", "genesis"):
        torch.manual_seed(1)
        seen, hidden = corrupted(images, pretext, 8, 0.5)
        torch.manual_seed(1)
        assert hidden is None and not seen[:, 2:].any()
        assert torch.equal(seen[:, :2], genesis(images) if pretext == "genesis" else images)


# ----------------------------------------------------------------------------------------------------- sparse features

NETWORKS = {
    "vnet": lambda how, dims: VNet(1, 1, 4, how, True, dims=dims),
    "unet": lambda how, dims: UNet(1, 1, 4, how, True, dims=dims, residual=True),
    "resnet": lambda how, dims: EncoderDecoder(ResNet(18, 1), UNetDecoder, n_classes=1, n_filters=4),
}
SPARSE = [
    (name, how, dims)
    for name in ("vnet", "unet")
    for how in ("batchnorm", "instancenorm", "groupnorm", "none")
    for dims in (2, 3)
]


def randomised(net):
    """`net` with weights of its norms that are not 1 and biases that are not 0."""
    for parameter in net.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.3)
    return net.train()


def case(name, how, dims, block=16):
    """(network, two images, their hidden voxels, the visible blocks)."""
    torch.manual_seed(1)
    net, side = randomised(NETWORKS[name](how, dims)), 64 if dims == 2 else 32
    image = torch.randn(2, 1, *[side] * dims)
    torch.manual_seed(2)
    hidden = hidden_blocks(2, [side] * dims, block, 0.5)
    return net, image, hidden, ~hidden[(..., *[slice(None, None, block)] * dims)]


@pytest.mark.parametrize(("name", "how", "dims"), [*SPARSE, ("resnet", "batchnorm", 2)])
def test_no_feature_in_a_visible_place_depends_on_a_hidden_voxel(name, how, dims):
    """Seen from both ends: another image where it is hidden changes nothing, and no gradient flows there."""
    net, image, hidden, visible = case(name, how, dims)
    model, other, outputs = Reconstructor(net, sparse=True), torch.where(hidden, 9.0, image), []
    for x in (image.requires_grad_(), other):
        torch.manual_seed(2)
        seen, same = corrupted(x, "masked", 16, 0.5)
        assert torch.equal(same, hidden)
        outputs.append(model(seen))
    assert torch.equal(*outputs) and outputs[0].shape == image.shape
    outputs[0].square().sum().backward()
    assert not image.grad[hidden].any() and image.grad[~hidden].any()
    with visible_only(net, visible), torch.no_grad():
        features = net.encode(image * ~hidden, turnoff_drop=True)
    for level in features:
        if level.shape[-1] >= visible.shape[-1]:  # what lies in hidden places is 0
            assert not level[~resized(visible, level.shape[2:]).expand_as(level)].any()


@pytest.mark.parametrize("dims", [2, 3])
def test_pooling_leaves_hidden_places_0(dims):
    convolution, pooling = (nn.Conv2d, nn.MaxPool2d) if dims == 2 else (nn.Conv3d, nn.MaxPool3d)
    net = nn.Sequential(convolution(1, 2, 1), pooling(3, 2, 1))
    hidden = hidden_blocks(1, [16] * dims, 8, 0.5)
    visible = ~hidden[(..., *[slice(None, None, 8)] * dims)]
    with visible_only(net, visible), torch.no_grad():
        features = net(torch.randn(hidden.shape))
    assert not features[~resized(visible, features.shape[2:]).expand_as(features)].any() and features.any()


def sparse_convolution(layer, x, seen):
    """A convolution that is computed at the places `seen` (N, *places) alone, one by one, from what is in `x`."""
    (stride, *_), (padding, *_), dims = layer.stride, layer.padding, x.dim() - 2
    padded, out = F.pad(x, [padding] * 2 * dims), torch.zeros(len(x), layer.out_channels, *seen.shape[1:])
    for n, *place in seen.nonzero().tolist():
        window = tuple(slice(p * stride, p * stride + side) for p, side in zip(place, layer.kernel_size, strict=True))
        out[(n, slice(None), *place)] = (layer.weight * padded[(n, slice(None), *window)]).flatten(1).sum(
            1
        ) + layer.bias
    return out


def normalized_places(layer, x, seen):
    """PyTorch's norm of a list of the places `seen`, a batch of them for batch norm, a sample after the other else."""
    out, samples = torch.zeros_like(x), [slice(None)] if isinstance(layer, nn.BatchNorm2d) else range(len(x))
    for n in samples:
        values, here = x.movedim(1, -1)[n], seen[n]
        listed = values[here].T.unsqueeze(0)  # (1, C, places)
        if isinstance(layer, nn.BatchNorm2d):
            y = F.batch_norm(listed, None, None, layer.weight, layer.bias, True)
        elif isinstance(layer, nn.GroupNorm):
            y = F.group_norm(listed, layer.num_groups, layer.weight, layer.bias)
        else:
            y = F.instance_norm(listed)
        out.movedim(1, -1)[n][here] = y[0].T
    return out


@pytest.mark.parametrize("how", ["batchnorm", "instancenorm", "groupnorm"])
def test_sparse_features_are_those_of_convolutions_at_visible_places_alone(how):
    torch.manual_seed(1)
    net = randomised(VNet(1, 1, 2, how, dims=2))
    image, hidden = torch.randn(2, 1, 32, 32), hidden_blocks(2, (32, 32), 16, 0.5)
    visible, x, features = ~hidden[..., ::16, ::16], image * ~hidden, []
    with torch.no_grad():
        for blocks in net.stages:
            for layer in (layer for name in blocks for layer in net.get_submodule(name[:-1]).conv):
                if isinstance(layer, nn.Conv2d):
                    side = x.shape[-1] // layer.stride[0]
                    seen = torch.from_numpy(np.kron(visible[:, 0], np.ones((1, side // 2, side // 2)))).bool()
                    x = sparse_convolution(layer, x, seen)
                else:
                    x = x.relu() if isinstance(layer, nn.ReLU) else normalized_places(layer, x, seen)
            features.append(x)
        with visible_only(net, visible):
            ours = net.encode(image * ~hidden)
    for one, other in zip(ours[:4], features[:4], strict=True):  # the norm of the few places below amplifies rounding
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


LAYERS = [nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.InstanceNorm2d(6), nn.InstanceNorm2d(6, affine=True)]
LAYERS += [nn.GroupNorm(3, 6), nn.GroupNorm(6, 6, affine=False), nn.BatchNorm3d(6), nn.InstanceNorm3d(6)]


@pytest.mark.parametrize("layer", LAYERS, ids=map(str, LAYERS))
@pytest.mark.parametrize("blocks", [2, 8])
def test_with_everything_visible_normalized_is_pytorchs(layer, blocks):
    """Also at levels that are coarser than the blocks, here by axes of 4 voxels."""
    dims = 3 if "3d" in type(layer).__name__ else 2
    x, visible = 3 + 2 * torch.randn(2, 6, *[4] * dims), torch.ones(2, 1, *[blocks] * dims, dtype=torch.bool)
    visible = torch.rand_like(visible.float()) < 0.5 if blocks == 8 else visible
    randomised(layer)
    torch.testing.assert_close(normalized(layer, visible, x), layer(x), rtol=1e-4, atol=1e-5)


def test_normalized_counts_more_voxels_than_half_precision_can():
    layer, x = nn.InstanceNorm2d(1), torch.randn(1, 1, 320, 320)
    y = normalized(layer, torch.ones(1, 1, 1, 1, dtype=torch.bool), x.half())
    assert y.dtype == torch.half
    torch.testing.assert_close(y.float(), layer(x.half().float()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "how", "dims"), [("vnet", "batchnorm", 3), ("resnet", "batchnorm", 2)])
def test_after_sparse_passes_the_network_is_as_it_was(name, how, dims):
    net, image, _, visible = case(name, how, dims)
    before, names = {key: value.clone() for key, value in net.state_dict().items()}, [*net.state_dict()]
    for raises in (False, True):
        with contextlib.suppress(ZeroDivisionError), visible_only(net, visible):
            net.encode(image)
            assert not raises or 1 / 0
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [*net.state_dict()] == names == [*NETWORKS[name](how, dims).state_dict()]
    fresh = NETWORKS[name](how, dims)
    fresh.load_state_dict(before)
    assert torch.equal(net.eval()(image), fresh.eval()(image))


def test_tokens_stand_in_hidden_places_and_the_rest_is_the_plain_network():
    net, image, hidden, visible = case("unet", "groupnorm", 2)
    model = Reconstructor(net, sparse=True)
    x = torch.cat([image * ~hidden, hidden.float()], 1)
    assert [tuple(token.shape) for token in model.tokens] == [(c, 1) for c in net.channels]
    for level, token in zip(model.sparse_features(image * ~hidden, visible), model.tokens, strict=True):
        places = resized(visible, level.shape[2:])[:, 0]
        assert (level.movedim(1, -1)[~places] == token[:, 0]).all()
    model(x).sum().backward()
    assert all(token.grad is not None for token in model.tokens)
    plain, shown = Reconstructor(net), torch.cat([image, torch.zeros_like(image)], 1)
    assert plain.tokens is None and {*plain.state_dict()} == {f"net.{name}" for name in net.state_dict()}
    net.eval()
    torch.testing.assert_close(plain(shown), net(image))
    torch.testing.assert_close(plain(x), net(image * ~hidden))


@pytest.mark.parametrize("name", NETWORKS)
def test_without_skips_the_decoder_sees_the_bottom_alone(name):
    net, image, _, _ = case(name, "batchnorm", 2)
    features = net.eval().encode(image)
    expected = net.classify(net.decode([*(0 * level for level in features[:-1]), features[-1]]))
    torch.testing.assert_close(Reconstructor(net, skips=False)(torch.cat([image, 0 * image], 1)), expected)


# ------------------------------------------------------------------------------------------------------------- genesis


@pytest.mark.parametrize("size", [(1, 24, 20, 16), (2, 32, 40)])
def test_corrupted_images_keep_their_shape_and_range_and_come_from_the_seed(size):
    torch.manual_seed(0)
    images = 5 * torch.randn(20, *size) - 3
    state = torch.get_rng_state()
    corrupted = genesis(images)
    torch.set_rng_state(state)
    assert torch.equal(genesis(images), corrupted) and corrupted.shape == images.shape
    for one, image in zip(corrupted, images, strict=True):
        assert image.min() - 1e-4 <= one.min() and one.max() <= image.max() + 1e-4
    assert sum(not torch.allclose(*pair, atol=0.1) for pair in zip(corrupted, images, strict=True)) >= 18
    assert genesis(torch.full((1, *size), 7.0)).isfinite().all()


@pytest.mark.parametrize("size", [(2, 40, 33), (1, 24, 30, 21), (1, 1, 30, 40)])
def test_shuffling_moves_voxels_within_small_boxes_and_keeps_them_all(monkeypatch, size):
    for name in ("CURVED", "PAINTED"):
        monkeypatch.setattr(masking, name, 0)
    monkeypatch.setattr(masking, "SHUFFLED", 1)
    torch.manual_seed(0)
    # Each voxel tells where it was.
    places = torch.stack(torch.meshgrid(*map(torch.arange, size[1:]), indexing="ij"))
    number = torch.arange(math.prod(size[1:])).view(size[1:])
    image = torch.stack([number.float() / number.max()] * size[0])
    for _ in range(5):
        shuffled = genesis(image[None])[0]
        back = (shuffled[0] * number.max()).round().long()
        assert torch.equal(back.flatten().sort().values, number.flatten())
        assert torch.equal(shuffled, shuffled[:1].expand_as(shuffled))  # all channels alike
        moved = (places.flatten(1)[:, back.flatten()] - places.flatten(1)).abs().amax(1)
        assert (moved < torch.tensor([max(side // 10, 2) for side in size[1:]])).all()
        assert 0.1 < (back != number).float().mean() < 0.7


def test_curves_are_monotone_and_both_rise_and_fall(monkeypatch):
    for name in ("SHUFFLED", "PAINTED"):
        monkeypatch.setattr(masking, name, 0)
    monkeypatch.setattr(masking, "CURVED", 1)
    torch.manual_seed(0)
    ramp, signs = torch.linspace(-2, 4, 64 * 64).view(1, 1, 64, 64), []
    for _ in range(30):
        steps = genesis(ramp).flatten().diff()
        assert (steps >= -1e-5).all() or (steps <= 1e-5).all()
        signs.append(bool(steps.sum() > 0))
    assert 5 < sum(signs) < 25


def test_painting_leaves_boxes_or_all_around_boxes(monkeypatch):
    for name in ("SHUFFLED", "CURVED"):
        monkeypatch.setattr(masking, name, 0)
    monkeypatch.setattr(masking, "PAINTED", 1)
    torch.manual_seed(0)
    image = torch.randn(1, 1, 42, 42)
    for around, low, high in ((0, 49 / 42**2, 5 / 9), (1, 1 - 5 * (4 / 7) ** 2, 1 - (3 / 7) ** 2 + 0.01)):
        monkeypatch.setattr(masking, "AROUND", around)
        shares = [(~torch.isclose(genesis(image), image, atol=1e-5)).float().mean().item() for _ in range(20)]
        assert max(low, 0) <= min(shares) + 1e-3 and max(shares) <= high
