"""Parts of networks, their learning rates, and weights that are held fixed while others learn."""

import copy

import pytest
import torch
from torch import nn

from mtseg.checkpoint import CheckpointError, load_fitting
from mtseg.finetuning import FinetuningError, freeze, learning_rates, names_of, stage_of, take_norms, unfreeze
from mtseg.networks.unet import UNet
from mtseg.networks.vnet import VNet
from mtseg.script.checks import ENCODED
from mtseg.script.networks import NETWORKS

STAGES = {"vnet": 5, "unet": 5, "unet_ssl4mis": 5} | {
    name: 5 if name.startswith(("resnet", "convnext")) else 8 if name.startswith("efficient") else 13
    for name in ENCODED
}
# The first and the last weight of the encoder that a forward pass meets.
ENDS = {"vnet": ("block_one.conv.0.weight", "block_five.conv.7.bias")}
ENDS |= dict.fromkeys(("unet", "unet_ssl4mis"), ("encoder.0.conv1.weight", "encoder.4.norm2.bias"))


def made(name):
    return NETWORKS[name](n_channels=1, n_classes=3, n_filters=2, normalization="batchnorm", has_dropout=True, dims=2)


def gradients_of(net, tensor):
    """The names of the parameters that `tensor` depends on."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(tensor, [p for _, p in named], retain_graph=True, allow_unused=True)
    return {name for (name, _), gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_the_encoders_the_decoders_or_the_heads(name):
    """What the encoder is, autograd says: the weights that features depend on, and of the others the head's those whose
    number is the classes'."""
    net = made(name)
    side = 56 if "dinov2" in name else 64
    features = net.eval().encode(torch.randn(1, 1, side, side))
    used = gradients_of(net, sum(level.sum() for level in features))
    parameters = {name for name, _ in net.named_parameters()}
    encoder = {*names_of(net, "encoder")} & parameters
    # A pyramid of a ViT is made here: it is no part of files with an encoder's weights.
    assert encoder == {n for n in used if not n.startswith(("encoder.project", "encoder.resize"))}
    everything, stem = names_of(net, "network"), names_of(net, "stem")
    assert everything == [*net.state_dict()] == names_of(net, "")
    head = {*everything} - {*names_of(net, "all")}
    assert head and all(len(net.state_dict()[n]) == 3 for n in head) and not head & {*names_of(net, "encoder")}
    prefixes = [prefix for stage in net.stages for prefix in stage]
    for weight in everything:
        assert sum(weight.startswith(prefix) for prefix in prefixes) + weight.startswith(net.head) <= 1
    stages = [stage_of(net, weight) for weight in names_of(net, "encoder")]
    assert {*stages} == {*range(STAGES[name])} and {stage_of(net, weight) for weight in stem} == {0}
    first = next(p for n, p in net.named_parameters() if n in encoder and p.dim() == 4)
    assert any(net.state_dict()[n] is first or torch.equal(net.state_dict()[n], first) for n in stem)


@pytest.mark.parametrize("name", ["vnet", "unet", "resnet18_unet", "resnet50_deeplab"])
def test_stages_are_in_the_order_in_which_features_need_them(name):
    """A stage's features depend on it and on the stages before it, on no other."""
    net = made(name)
    for number, level in enumerate(net.eval().encode(torch.randn(1, 1, 64, 64))):
        assert {stage_of(net, weight) for weight in gradients_of(net, level.sum())} == {*range(number + 1)}


def test_a_regular_expression_fits_names_from_their_beginning_on():
    net = VNet(1, 2, 2, "batchnorm")
    assert names_of(net, r"block_(one|two)\.conv\.0") == [
        f"block_{level}.conv.0.{kind}" for level in ("one", "two") for kind in ("weight", "bias")
    ]
    assert names_of(net, "conv") == [] and len(names_of(net, ".*running_mean")) == 16 + 13
    with pytest.raises(FinetuningError, match=r"^'block\(' is no regular expression"):
        names_of(net, "block(")


def test_learning_rates_fall_by_layer_decay_with_the_distance_to_the_decoder():
    net = UNet(1, 2, 2, "batchnorm", dims=2, strides=(2, 2, 2))
    rates = learning_rates(net, 0.5, 0.8)
    for name, parameter in net.named_parameters():
        level = int(name.split(".")[1]) if name.startswith("encoder") else None
        assert rates.get(parameter, 1.0) == pytest.approx(1.0 if level is None else 0.5 * 0.8 ** (4 - level))
    assert learning_rates(net) == {} and {*learning_rates(net, 0.0).values()} == {0.0}


# ------------------------------------------------------------------------------------------------------------- freezing


def step(net, optimizer, x):
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def moved(net, before):
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("parts", ["encoder", "stem", "all", r"block_(two|seven)"])
def test_frozen_weights_and_statistics_stay_while_others_move(parts):
    torch.manual_seed(0)
    net = VNet(1, 2, 2, "batchnorm", dims=2)
    net(torch.randn(4, 1, 32, 32))  # statistics that are not those of the start
    freeze(net, parts)
    teacher, names = copy.deepcopy(net), {*names_of(net, parts)}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for _ in range(3):
        net.train()
        teacher.train()
        step(net, optimizer, torch.randn(4, 1, 32, 32))
        with torch.no_grad():
            teacher(torch.randn(4, 1, 32, 32))
        net.eval()(torch.randn(1, 1, 32, 32))
    assert moved(net, before) == before.keys() - names
    statistics = {name for name in before if "running" in name or "tracked" in name}
    assert moved(teacher, before) == statistics - names

    unfreeze(net)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    net.train()
    step(net, optimizer, torch.randn(4, 1, 32, 32))
    assert moved(net, before) == {*before}
    teacher(torch.randn(4, 1, 32, 32))
    assert moved(teacher, before) == statistics - names  # a copy is unfrozen by itself
    unfreeze(teacher)
    teacher(torch.randn(4, 1, 32, 32))
    assert moved(teacher, before) == statistics


def test_a_frozen_encoder_computes_as_one_whose_batch_norms_are_in_eval_mode():
    torch.manual_seed(0)
    net = VNet(1, 2, 2, "batchnorm", dims=2)
    net(3 + torch.randn(4, 1, 32, 32))
    plain, x = copy.deepcopy(net), torch.randn(4, 1, 32, 32)
    freeze(net, "encoder")
    for name, module in plain.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.running_mean" in names_of(net, "encoder"):
            module.eval()
    assert torch.equal(net.train()(x), plain(x))
    unfreeze(net)
    assert torch.equal(net(x), plain.train()(x))
    freeze(net, "encoder")
    net.eval()
    unfreeze(net)
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("nothing", "fits no weight"),
        (".*running", "fits no weight"),
        ("network", "every weight"),
        ("(block|out)", "every"),
    ],
)
def test_nothing_or_everything_frozen_is_a_sentence(parts, words):
    net = VNet(1, 2, 2, "batchnorm")
    with pytest.raises(FinetuningError, match=words):
        freeze(net, parts)
    assert all(parameter.requires_grad for parameter in net.parameters())


# -------------------------------------------------------------------------------------------------------------- loading


def test_parts_are_loaded_alone_and_what_stays_is_listed():
    theirs, net = VNet(1, 2, 2, "batchnorm", dims=2), VNet(1, 2, 2, "batchnorm", dims=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for value in theirs.state_dict().values():
        value.copy_(torch.rand(value.shape) + 2)
    names, state = names_of(net, "encoder"), theirs.state_dict()
    del state["block_two.conv.0.bias"]
    loaded, lines = load_fitting(net, {"state_dict": state}, "theirs.pth", names, names)
    assert loaded == len(names) - 1 and lines == ["block_two.conv.0.bias: not in theirs.pth, left as it was"]
    assert moved(net, before) == {*names} - {"block_two.conv.0.bias"}
    assert all(torch.equal(net.state_dict()[name], state[name]) for name in moved(net, before))


@pytest.mark.parametrize("taken", [0.08, 0.12])
def test_nine_in_ten_of_the_encoders_weights_must_fit(taken):
    net = VNet(1, 2, 2, "batchnorm", dims=2)
    names = [name for name in names_of(net, "encoder") if "tracked" not in name]
    missing = names[:: len(names) // round(taken * len(names))][: round(taken * len(names))]
    state = {name: value + 1 for name, value in net.state_dict().items() if name not in missing}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if taken < 0.1:
        loaded, _ = load_fitting(net, state, "a.pth", names_of(net, "all"), names_of(net, "encoder"))
        assert loaded == len(names_of(net, "all")) - len(missing)
        return
    with pytest.raises(CheckpointError) as refused:
        load_fitting(net, state, "a.pth", names_of(net, "all"), names_of(net, "encoder"))
    said = str(refused.value)
    assert f"a.pth: only {len(names) - len(missing)} of the encoder's {len(names)} weights fit" in said
    assert all(f"{name}: not there" in said for name in missing[:3]) and missing[3] not in said
    assert not moved(net, before)


@pytest.mark.parametrize("name", ["vnet", "unet", "resnet18_unet"])
def test_weights_before_batch_norm_get_new_norms_and_compute_the_same(name):
    """Also where batch norm uses its statistics; of other weights nothing changes."""
    torch.manual_seed(0)
    dims = 2 if name in ENCODED else 3
    settings = {"n_channels": 1, "n_classes": 2, "n_filters": 4, "normalization": "batchnorm", "has_dropout": False}
    net, fresh = (NETWORKS[name](**settings, dims=dims).double() for _ in range(2))
    x = torch.randn(2, 1, *[32] * dims).double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d)):
                module.weight *= torch.empty(()).uniform_(1, 5)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 1e-20  # which does not grow with the weights
        net(x)  # statistics that are no new ones
        before, alone = {mode: net.train(mode)(x) for mode in (True, False)}, net.state_dict()
        alone = {name: value.clone() for name, value in alone.items()}
        take_norms(net, fresh)
        for mode, output in reversed(before.items()):  # training mode last, as it moves the statistics
            torch.testing.assert_close(net.train(mode)(x), output, rtol=1e-6, atol=1e-9)
    new, changed = fresh.state_dict(), 0
    for weight, value in net.state_dict().items():
        if weight.endswith("weight") and value.dim() > 2 and not torch.equal(value, alone[weight]):
            torch.testing.assert_close(value.norm(), new[weight].norm())
            changed += 1
    assert changed == sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    head = net.head + ("0.weight" if name == "unet" else "weight")
    assert torch.equal(net.state_dict()[head], alone[head])


def test_a_batch_norm_that_keeps_no_statistics_is_no_obstacle():
    torch.manual_seed(0)
    net, fresh = (nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2, track_running_stats=False)) for _ in range(2))
    with torch.no_grad():
        net[0].weight *= 7
        take_norms(net, fresh)
    torch.testing.assert_close(net[0].weight.norm(), fresh[0].weight.norm())
