import family
import pytest
import torch
import torch.nn.functional as F
from reference import FAMILY, assert_digest, fill, wave_input
from torch import nn

from mtseg.checkpoint import CheckpointError, load_fitting, load_weights
from mtseg.losses import SupervisedLoss
from mtseg.networks import NETWORKS
from mtseg.networks.unet import Dropout, UNet, UNetSSL4MIS
from mtseg.networks.vnet import VNet


def test_vnet_has_the_familys_names_and_shapes():
    net = VNet(n_channels=1, n_classes=2, n_filters=16, normalization="batchnorm", has_dropout=True)
    entries = [[name, list(tensor.shape)] for name, tensor in net.state_dict().items()]
    assert entries == FAMILY["vnet_state_dict"]["entries"]


@pytest.mark.parametrize("key", FAMILY["vnet"]["values"])
def test_vnet_gives_the_familys_values(key):
    normalization, has_dropout = key.split("/")
    net = VNet(1, 2, 16, normalization, has_dropout == "True").eval()
    assert_digest(fill(net)(wave_input((1, 1, 32, 48, 16))), FAMILY["vnet"]["values"][key])


def test_weights_of_lasegs_own_strides_load_and_a_side_need_be_a_multiple_of_8_there():
    shapes = dict(FAMILY["vnet_state_dict"]["entries"])
    for name in ("block_four_dw.conv.0.weight", "block_five_up.conv.0.weight"):
        assert shapes[name] == [256, 128, 2, 2, 2]
        shapes[name] = [256, 128, 2, 2, 1]  # as in LASeg's published weights
    state = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    settings = VNet.settings_of(state)
    assert settings == {"strides": [(2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 1)]}
    net = load_weights(VNet(1, 2, 16, "batchnorm", True, **settings), state, "laseg.pth")
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in net.state_dict().items())
    assert net.eval()(torch.zeros(1, 1, 16, 32, 8)).shape == (1, 2, 16, 32, 8)
    with pytest.raises(ValueError, match=r"\(16, 16, 8\) must divide .* \(16, 16, 12\)"):
        net(torch.zeros(1, 1, 16, 16, 12))
    assert VNet.settings_of(VNet().state_dict()) == VNet.settings_of(UNet().state_dict()) == {}


@pytest.mark.parametrize("strides", [(2, 2, 2, 2), (2, 2, (2, 1), 1)])
def test_a_2d_vnet_is_the_3d_one_on_a_single_slice(strides):
    """With the weights in the middle of kernels that, along D, see nothing but padding there."""
    along = [(2, 2) if stride == 2 else (stride, stride) if isinstance(stride, int) else stride for stride in strides]
    flat = fill(VNet(2, 3, 2, "batchnorm", dims=2, strides=strides)).eval()
    deep = VNet(2, 3, 2, "batchnorm", strides=[(*stride, 1) for stride in along]).eval()
    state = flat.state_dict()
    assert [*state] == [*VNet(2, 3, 2, "batchnorm").state_dict()]
    for name, value in deep.state_dict().items():
        state[name] = state[name].unsqueeze(-1) if value.dim() == 5 else state[name]
        if value.dim() == 5 and value.shape[-1] == 3:
            state[name] = F.pad(state[name], (1, 1))
    deep.load_state_dict(state)
    x = wave_input((2, 2, 32, 48), 0.031)
    torch.testing.assert_close(flat(x), deep(x.unsqueeze(-1)).squeeze(-1), rtol=1e-5, atol=1e-6)
    told = VNet.settings_of(flat.state_dict())
    assert told == {"dims": 2} | ({} if along == [(2, 2)] * 4 else {"strides": along})
    load_weights(VNet(2, 3, 2, "batchnorm", **told), flat.state_dict(), "a.pth")


@pytest.mark.parametrize("network", [VNet, UNet])
def test_a_network_refuses_the_wrong_number_of_axes(network):
    with pytest.raises(ValueError, match=r"a 2-D .Net takes 4 axes"):
        network(dims=2)(torch.zeros(1, 1, 16, 16, 16))
    with pytest.raises(ValueError, match=r"a 3-D .Net takes 5 axes"):
        network()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"dims is 4; .* 2 or 3"):
        network(dims=4)


@pytest.mark.parametrize("decoder", ["decoder1", "decoder"])
def test_mc_nets_names_are_understood(decoder):
    """Its encoder ends with block_five; a further decoder, which it has in training alone, is left out."""
    whole = fill(VNet(1, 2, 4, "batchnorm"))
    below = ("block_one", "block_two", "block_three", "block_four", "block_five.")
    state = {}
    for name, value in whole.state_dict().items():
        if name.startswith(below):
            state[f"module.encoder.{name}"] = value
        else:
            state[f"module.{decoder}.{name}"] = value
            state[f"module.decoder2.{name}"] = 7 * torch.ones_like(value)
    x = wave_input((1, 1, 16, 16, 16))
    for load in (load_weights, load_fitting):
        net = VNet(1, 2, 4, "batchnorm")
        load(net, {"state_dict": state}, "mcnet.pth")
        assert torch.equal(net.eval()(x), whole.eval()(x))


@pytest.mark.parametrize("upsampling", ["linear", "nearest"])
def test_mc_nets_further_decoders_have_its_names_and_shapes(upsampling):
    """For the transposed convolution of kernel 2 stand the interpolation, number 0, and a convolution of kernel 3."""
    expected, encoder = {}, ("block_one", "block_two", "block_three", "block_four", "block_five.")
    for name, shape in FAMILY["vnet_state_dict"]["entries"]:
        if "_up.conv.0." in name and len(shape) == 5:
            into, out = shape[:2]
            shape = [out, into, 3, 3, 3]
        if not name.startswith(encoder):
            name = name.replace("_up.conv.1.", "_up.conv.2.").replace("_up.conv.0.", "_up.conv.1.")
            expected[name] = torch.full(shape, 0.5)
    decoder = VNet(1, 2, 16, "batchnorm", True).another_decoder(upsampling)
    decoder.load_state_dict(expected)
    assert {name: value.shape for name, value in decoder.state_dict().items()} == {
        n: v.shape for n, v in expected.items()
    }


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", NETWORKS.values())
def test_a_network_is_its_encoder_decoder_and_head(kind, dims):
    net = fill(kind(1, 3, n_filters=2, normalization="batchnorm", has_dropout=True, dims=dims))
    x = wave_input((2, 1, *[32, 16, 48][:dims]))
    features = net.encode(x)
    sizes = [[c, *[side // 2**level for side in x.shape[2:]]] for level, c in enumerate(net.channels)]
    assert [[*level.shape[1:]] for level in features] == sizes
    assert [[*level.shape[1:]] for level in net.decode(features)] == sizes[:-1]
    torch.manual_seed(0)
    whole = net(x)
    torch.manual_seed(0)
    assert torch.equal(net.classify(net.decode(net.encode(x))), whole)
    assert whole.shape == (2, 3, *x.shape[2:])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("upsampling", ["deconv", "linear", "nearest"])
@pytest.mark.parametrize("kind", NETWORKS.values())
def test_another_decoder_upsamples_as_it_says(kind, upsampling, dims):
    """VNet interpolates before its convolution of kernel 3, UNet after one of kernel 1."""
    net = kind(1, 3, n_filters=2, normalization="none", has_dropout=True, dims=dims)
    other = fill(net.another_decoder(upsampling)).eval()
    features = fill(net).eval().encode(wave_input((2, 1, *[32, 16, 16][:dims])))
    conv, deconv = (F.conv2d, F.conv3d)[dims - 2], (F.conv_transpose2d, F.conv_transpose3d)[dims - 2]
    linear = {"mode": ("bilinear", "trilinear")[dims - 2], "align_corners": True}
    how = linear if upsampling == "linear" else {"mode": "nearest"}
    x, decoded = features[4], []
    for level, skip in zip((3, 2, 1, 0), features[3::-1], strict=True):
        if kind is VNet:
            up = getattr(other, f"block_{('eight', 'seven', 'six', 'five')[level]}_up").conv
            block = getattr(other, f"block_{('nine', 'eight', 'seven', 'six')[level]}")
            if upsampling == "deconv":
                x = deconv(x, up[0].weight, up[0].bias, stride=2)
            else:
                x = conv(F.interpolate(x, scale_factor=2, **how), up[1].weight, up[1].bias, padding=1)
            x = block(x.relu() + skip)
        else:
            up = other.up[level]
            if upsampling == "deconv":
                x = deconv(x, up.weight, up.bias, stride=2)
            else:
                x = F.interpolate(conv(x, up.weight, up.bias), scale_factor=2, **how)
            x = other.decoder[level](torch.cat([skip, x], 1))
        decoded.insert(0, x)
    found = other.decode(features)
    assert all(torch.equal(a, b) for a, b in zip(found, decoded, strict=True))
    assert torch.equal(other(features), other.classify(found)) and len(found) == 4
    if upsampling == ("linear" if kind is UNetSSL4MIS else "deconv"):
        state = net.state_dict()
        other.load_state_dict({name: state[name] for name in other.state_dict()})
        assert torch.equal(other(features), net.classify(net.decode(features)))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_unets_weights_tell_its_settings(residual, deep_supervision, dims):
    settings = {"residual": residual, "deep_supervision": deep_supervision}
    net = UNet(1, 2, n_filters=1, dims=dims, **settings)
    told = {name: True for name, value in settings.items() if value} | ({"dims": 2} if dims == 2 else {})
    assert UNet.settings_of(net.state_dict()) == told


@pytest.mark.parametrize("training", [True, False])
def test_ssl4mis_weights_load_and_give_exactly_its_outputs(training):
    torch.manual_seed(0)
    theirs = fill(family.UNet(1, 4)).train(training)
    for layer in theirs.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    state = theirs.state_dict()
    assert len(state) == 136 and state["decoder.up2.conv.conv_conv.0.weight"].shape == (64, 128, 3, 3)
    ours = load_weights(UNetSSL4MIS(1, 4), state, "unet_best_model.pth").train(training)
    x = torch.randn(2, 1, 64, 48)
    assert torch.equal(ours(x, turnoff_drop=training), theirs(x))
    assert torch.equal(ours.encoder[4].norm2.running_var, state["encoder.down4.maxpool_conv.1.conv_conv.5.running_var"])


def test_of_ssl4mis_networks_with_more_decoders_the_main_one_is_taken():
    """UNet_CCT has auxiliary decoders, UNet_URPC outputs of coarser levels; a weight that is missing is named."""
    state = fill(family.UNet(1, 2)).state_dict()
    wanted = load_weights(UNetSSL4MIS(1, 2), state, "unet.pth").state_dict()
    more = {"decoder.out_conv_dp1.weight": torch.zeros(2, 32, 3, 3)}
    for name, value in state.items():
        more[name.replace("decoder.", "main_decoder.")] = value
        if name.startswith("decoder."):
            more[f"aux_{name}"] = torch.zeros_like(value)
    found = load_weights(UNetSSL4MIS(1, 2), more, "cct.pth").state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    del state["decoder.up4.conv1x1.bias"]
    with pytest.raises(CheckpointError, match=r"a\.pth: .*up\.0\.bias is missing"):
        load_weights(UNetSSL4MIS(1, 2), state, "a.pth")


def test_ssl4mis_unet_in_3d_and_without_dropout():
    torch.manual_seed(0)
    net = UNetSSL4MIS(2, 3, n_filters=2, normalization="instancenorm", has_dropout=False, dims=3)
    assert UNetSSL4MIS.settings_of(net.state_dict()) == {"dims": 3}
    assert UNetSSL4MIS.settings_of(UNetSSL4MIS(n_filters=2).state_dict()) == {"dims": 2}
    x = torch.randn(1, 2, 16, 32, 16)
    assert torch.equal(net(x), net(x)) and net(x).shape == (1, 3, 16, 32, 16)
    assert not torch.equal(net(x), net(x + 1e-3 * torch.randn_like(x)))


def test_dropout_of_single_values_drops_its_share_in_any_memory_format():
    drop, x = Dropout(0.3), torch.full((2, 16, 32, 48), 2.0, requires_grad=True)
    torch.manual_seed(0)
    y = drop(x)
    torch.manual_seed(0)
    other = drop(x.to(memory_format=torch.channels_last))
    assert torch.equal(y, other) and other.is_contiguous(memory_format=torch.channels_last)
    assert y.unique().tolist() == pytest.approx([0, 2 / 0.7])
    # Nearly as often in every channel, at every place and beside each other: deviations of five sigma would be seen.
    dropped = (y == 0).double()
    for axes in ((0, 2, 3), (0, 1), (1, 2, 3)):
        shares = dropped.mean(axes)
        sigma = (0.3 * 0.7 * shares.numel() / y.numel()) ** 0.5
        assert (shares - 0.3).abs().max() < 5 * sigma
    pairs = (dropped[:, 1:] * dropped[:, :-1]).mean()
    assert pairs == pytest.approx(0.09, abs=5 * (0.09 * 0.91 / y.numel()) ** 0.5)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y.detach() != 0)
    assert torch.equal(drop.eval()(x), x)
    rates = [block.dropout.p for block in UNetSSL4MIS(n_filters=2).encoder]
    assert rates == [0.05, 0.1, 0.2, 0.3, 0.5]


@pytest.mark.parametrize("kind", NETWORKS.values())
def test_in_eval_mode_every_network_gives_one_tensor(kind):
    more = {"deep_supervision": True} if kind is UNet else {}
    out = kind(n_channels=1, n_filters=2, dims=3, **more).eval()(torch.zeros(1, 1, 16, 16, 16))
    assert isinstance(out, torch.Tensor) and out.shape == (1, 2, 16, 16, 16)


@pytest.mark.parametrize("load", [load_weights, load_fitting])
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -1e31])
def test_weights_that_are_no_numbers_or_absurd_are_refused(load, damage):
    net = UNet(1, 2, n_filters=2)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["up.2.weight"].view(-1)[3] = damage
    before = net.up[2].weight.clone()
    with pytest.raises(CheckpointError, match=r"a\.pth: .*up\.2\.weight holds .*take an older"):
        load(net, state, "a.pth")
    assert torch.equal(net.up[2].weight, before)


@pytest.mark.parametrize("normalization", ["none", "batchnorm", "groupnorm", "instancenorm"])
@pytest.mark.parametrize("network", [VNet, UNet])
def test_channels_classes_and_normalization(network, normalization):
    net = network(n_channels=3, n_classes=4, n_filters=2, normalization=normalization)
    out = net(torch.randn(2, 3, 32, 16, 32))
    assert out.shape == (2, 4, 32, 16, 32)
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("network", [VNet, UNet])
def test_unknown_normalization_and_odd_sizes_say_so(network):
    with pytest.raises(ValueError, match="use one of none, batchnorm"):
        network(normalization="layernorm")
    with pytest.raises(ValueError, match=r"16.* must divide .* \(32, 32, 24\)"):
        network(n_channels=1, n_filters=2)(torch.zeros(1, 1, 32, 32, 24))


@pytest.mark.parametrize("network", NETWORKS.values())
def test_dropout_acts_in_training_only_and_can_be_turned_off(network):
    torch.manual_seed(0)
    net = network(n_channels=1, n_filters=2, normalization="none", has_dropout=True, dims=3)
    x = torch.randn(1, 1, 16, 16, 16)
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net(x, turnoff_drop=True), net(x, turnoff_drop=True))
    net.eval()
    assert torch.equal(net(x), net(x, turnoff_drop=True))


THIN = {"strides": [(2, 2, 1), 2, (1, 2, 2), (2, 1, 1)], "kernel_sizes": [(3, 3, 1), (1, 3, 3), 3, (5, 1, 3), 3]}


@pytest.mark.parametrize("upsampling", ["deconv", "linear", "nearest"])
@pytest.mark.parametrize(("kind", "residual"), [(VNet, False), (UNet, False), (UNet, True)])
def test_strides_and_kernels_of_each_axis_are_those_of_plain_compositions(kind, residual, upsampling):
    """With instance norm, which has no weights; batch norm's and all names are those of the equal case."""
    more = {"residual": True} if residual else {}
    net = fill(kind(1, 3, 2, "instancenorm", max_filters=10, **THIN, **more)).eval()
    assert net.channels == [2, 4, 8, 10, 10]
    assert net.divisors == (8, 8, 4)
    assert [*net.state_dict()] == [*kind(1, 3, 2, "instancenorm", max_filters=10, **more).state_dict()]
    told = {"strides": [(2, 2, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)], "max_filters": 10}
    told["kernel_sizes"] = [(3, 3, 1), (1, 3, 3), (3, 3, 3), (5, 1, 3), (3, 3, 3)]
    assert kind.settings_of(net.state_dict()) == told | more
    strides, kernels, end = told["strides"], told["kernel_sizes"], net
    if upsampling != "deconv":
        end = fill(net.another_decoder(upsampling)).eval()

    def conv(layer, x, kernel):
        assert layer.weight.shape[2:] == kernel
        return F.conv3d(x, layer.weight, layer.bias, padding=[side // 2 for side in kernel])

    def interpolated(x, stride):
        size = [side * by for side, by in zip(x.shape[2:], stride, strict=True)]
        how = {"mode": "trilinear", "align_corners": True} if upsampling == "linear" else {"mode": "nearest"}
        return F.interpolate(x, size, **how)

    def vnet_block(block, x, kernel):
        for layer in block.conv:
            x = F.instance_norm(conv(layer, x, kernel)).relu() if isinstance(layer, nn.Conv3d) else x
        return x

    def unet_block(block, x, kernel):
        y = F.instance_norm(conv(block.conv1, x, kernel)).relu()
        y = F.instance_norm(conv(block.conv2, y, kernel))
        shortcut = getattr(block.shortcut, "weight", None)
        kept = x if shortcut is None else F.conv3d(x, shortcut, block.shortcut.bias)
        return (y + kept if residual else y).relu()

    x = image = wave_input((2, 1, 16, 24, 8))
    skips = []
    for level, name in enumerate(("one", "two", "three", "four", "five")):
        if kind is VNet:
            if level:
                down = getattr(net, f"block_{('one', 'two', 'three', 'four')[level - 1]}_dw").conv[0]
                x = F.instance_norm(F.conv3d(x, down.weight, down.bias, strides[level - 1])).relu()
            x = vnet_block(getattr(net, f"block_{name}"), x, kernels[level])
        else:
            x = x if level == 0 else F.max_pool3d(x, strides[level - 1], strides[level - 1])
            x = unet_block(net.encoder[level], x, kernels[level])
        skips.append(x)
    for level in (3, 2, 1, 0):
        if kind is VNet:
            up = getattr(end, f"block_{('eight', 'seven', 'six', 'five')[level]}_up").conv
            if upsampling == "deconv":
                x = F.conv_transpose3d(x, up[0].weight, up[0].bias, strides[level])
            else:
                x = conv(up[1], interpolated(x, strides[level]), kernels[level])
            block = getattr(end, f"block_{('nine', 'eight', 'seven', 'six')[level]}")
            x = vnet_block(block, F.instance_norm(x).relu() + skips[level], kernels[level])
        else:
            up = end.up[level]
            if upsampling == "deconv":
                x = F.conv_transpose3d(x, up.weight, up.bias, strides[level])
            else:
                x = interpolated(F.conv3d(x, up.weight, up.bias), strides[level])
            x = unet_block(end.decoder[level], torch.cat([skips[level], x], 1), kernels[level])
    head = end.out_conv if kind is VNet else end.out_conv[0]
    torch.testing.assert_close(end(net.encode(image)) if end is not net else net(image), conv(head, x, (1, 1, 1)))


def test_a_unet_has_as_many_levels_as_strides_and_its_weights_tell_them():
    thin = [(2, 2, 1), (3, 2, 1)]
    net = UNet(1, 3, 4, "batchnorm", strides=thin, kernel_sizes=[(3, 3, 1), 3, 3], deep_supervision=True, residual=True)
    told = {"strides": thin, "kernel_sizes": [(3, 3, 1), (3, 3, 3), (3, 3, 3)]}
    assert UNet.settings_of(net.state_dict()) == told | {"deep_supervision": True, "residual": True}
    # Where no level has more channels than the first, no block of the encoder but that has a shortcut with weights.
    flat = UNet(1, 2, 4, "batchnorm", max_filters=4, residual=True)
    assert UNet.settings_of(flat.state_dict()) == {"residual": True, "max_filters": 4}
    outputs = net(torch.zeros(1, 1, 12, 8, 5))
    assert [tuple(level.shape) for level in outputs] == [(1, 3, 12, 8, 5), (1, 3, 6, 4, 5)]
    target = torch.randint(3, (1, 12, 8, 5))
    loss, _ = SupervisedLoss("ce", deep_supervision_weights=[1, 1])(outputs, target)
    coarse = target[:, 1::2, 1::2]  # the voxels nearest to the centres, of two alike the latter
    exact = F.interpolate(target[:, None].float(), (6, 4, 5), mode="nearest-exact")[:, 0].long()
    assert torch.equal(coarse, exact)
    expected = (F.cross_entropy(outputs[0], target) + F.cross_entropy(outputs[1], coarse)) / 2
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match=r"\(6, 4, 1\) must divide .* \(8, 8, 5\)"):
        net(torch.zeros(1, 1, 8, 8, 5))


@pytest.mark.parametrize("kind", [VNet, UNet])
@pytest.mark.parametrize(
    "sizes",
    [
        {"strides": []},
        {"kernel_sizes": [3]},
        {"kernel_sizes": [3, 3, 2, 3, 3]},
        {"kernel_sizes": [(3, 1)] * 5},
        {"strides": [0] * 4},
    ],
)
def test_sizes_that_make_no_network(kind, sizes):
    with pytest.raises(ValueError):
        kind(1, 2, 2, **sizes)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_unet_deep_supervision(dims, residual):
    net = UNet(2, 3, n_filters=2, dims=dims, residual=residual, deep_supervision=True, strides=(2, 2, 2))
    x = torch.randn(1, 2, *[24, 16, 8][:dims])
    outputs = net(x)
    assert [tuple(o.shape[2:]) for o in outputs] == [tuple(s // 2**level for s in x.shape[2:]) for level in range(3)]
    assert all(o.shape[1] == 3 for o in outputs)
    net.eval()
    assert torch.equal(net(x), net.train()(x)[0])


def test_unet_is_a_function_of_its_whole_input():
    """The bottom sees everything at depth 2 on 16 x 16: a change in one corner reaches the opposite one."""
    torch.manual_seed(0)
    net = UNet(1, 2, n_filters=4, dims=2, strides=(2, 2)).eval()
    x = torch.randn(1, 1, 16, 16)
    y = x.clone()
    y[..., 0, 0] += 10
    assert not torch.equal(net(x)[..., 15, 15], net(y)[..., 15, 15])


def test_residual_block_adds_its_input():
    net = UNet(1, 2, n_filters=2, residual=True)
    block = net.encoder[0]
    with torch.no_grad():
        for p in (*block.conv1.parameters(), *block.conv2.parameters()):
            p.zero_()
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(block(x), torch.relu(block.shortcut(x)))
