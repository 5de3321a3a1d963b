"""Encoders against transformers' and MONAI's with the same random weights, decoders, and files of any origin."""

import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_images
from torch import nn

import inference
import train_mean_teacher
import train_sup
from mtseg.checkpoint import load_fitting, save_checkpoint
from mtseg.networks.convnext import ConvNeXtT
from mtseg.networks.decoders import DeepLabV3Plus, EncoderDecoder, Pyramid, UNetDecoder, fold_stem
from mtseg.networks.dinov2 import DINOv2
from mtseg.networks.efficientnet import EfficientNetB0
from mtseg.networks.resnet import ResNet
from mtseg.safetensors_file import SafetensorsError, load_safetensors
from mtseg.script import flags, networks
from mtseg.sliding_window import optimize_for_inference

DEPTHS = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}


def randomised(net):
    """`net` in eval mode with weights, biases and statistics that differ everywhere."""
    torch.manual_seed(0)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.add_(torch.randn_like(value), alpha=0.05 if value.dim() < 2 or value.shape[0] == 1 else 0.002)
    return net.eval()


def take(net, state, left=()):
    """Load `state` into `net` by its map of names: all it needs is there, and more only in the layers `left`."""
    missing, more = net.load_state_dict(net.translate(state), strict=False)
    assert not missing and {name.rpartition(".")[0] for name in more} == {*left}
    return net.eval()


@torch.no_grad()
def agree(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 * other.abs().max().item())


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_is_transformers(depth):
    transformers = pytest.importorskip("transformers")
    kind = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]} if depth == 18 else {}
    model = randomised(transformers.ResNetModel(transformers.ResNetConfig(depths=DEPTHS[depth], **kind)))
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = take(ResNet(depth), model.state_dict())(x)
        agree(features[1:], model(x, output_hidden_states=True).hidden_states[1:])
    assert [tuple(f.shape[1:]) for f in features] == [
        (c, 64 // s, 96 // s) for c, s in zip(ResNet(depth).channels, (2, 4, 8, 16, 32), strict=True)
    ]


def test_convnext_is_transformers():
    transformers = pytest.importorskip("transformers")
    model = randomised(transformers.ConvNextModel(transformers.ConvNextConfig()))
    net, x = take(ConvNeXtT(), model.state_dict(), ["layernorm"]), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        states = model(x, output_hidden_states=True).hidden_states
        agree(net(x), states[-4:])


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_is_transformers(registers):
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    side = 518 if registers else 84  # transformers has no 0.1 of a patch: positions as they are
    stages = [f"stage{number}" for number in (3, 6, 9, 12)]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=384, num_attention_heads=6, image_size=side, patch_size=14, out_features=stages
    )
    model = randomised(getattr(transformers, f"{kind}Backbone")(config))
    net = take(DINOv2(registers=registers, grid=side // 14), model.state_dict())
    x = torch.randn(2, 3, 84, *((126,) if registers else (84,)))
    with torch.no_grad():
        agree(net(x), model(x).feature_maps)


def cubic(places, known):
    """The weights (places, known) of cubic convolution (Keys 1981) with a = -0.75, the ends repeated."""
    d = (places[:, None] - torch.arange(-3, known + 3)).abs()
    weights = torch.where(d < 1, 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4))
    weights = torch.where(d < 2, weights, torch.zeros(()))
    weights[:, 3] += weights[:, :3].sum(1)
    weights[:, -4] += weights[:, -3:].sum(1)
    return weights[:, 3:-3]


def test_positions_without_registers_are_enlarged_by_a_tenth_of_a_patch_more():
    net = randomised(DINOv2(width=6, grid=8))
    down, across = (cubic((torch.arange(size) + 0.5) * 8 / (size + 0.1) - 0.5, 8) for size in (12, 20))
    with torch.no_grad():
        known = net.pos_embed[0, 1:].reshape(8, 8, 6)
        agree([net.positions(12, 20)[0]], [torch.einsum("hi,wj,ijc->chw", down, across, known)])


def test_efficientnet_is_monais():
    nets = pytest.importorskip("monai.networks.nets")
    model = randomised(nets.EfficientNetBN("efficientnet-b0", pretrained=False))
    net = take(EfficientNetB0(tensorflow=True), model.state_dict(), ["_conv_head", "_bn1", "_fc"])
    x, features = torch.randn(2, 3, 64, 96), []
    with torch.no_grad():
        y = model._swish(model._bn0(model._conv_stem(model._conv_stem_padding(x))))
        features = [y := stage(y) for stage in model._blocks]
        agree(net(x), [features[number] for number in (0, 1, 2, 4, 6)])


def counted(net):
    """The number of weights, DINOv2's mask token with them; not the statistics of batch norms."""
    buffers = [value for name, value in net.named_buffers() if name == "mask_token"]
    return sum(value.numel() for value in [*net.parameters(), *buffers])


def test_the_numbers_of_parameters_are_the_published():
    """With those of the classifiers, which the encoders leave out, added."""
    assert counted(ResNet(18)) + counted(nn.Linear(512, 1000)) == 11_689_512
    assert counted(ResNet(34)) + counted(nn.Linear(512, 1000)) == 21_797_672
    assert counted(ResNet(50)) + counted(nn.Linear(2048, 1000)) == 25_557_032
    head = [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.Linear(1280, 1000)]
    assert counted(EfficientNetB0()) + counted(nn.Sequential(*head)) == 5_288_548
    assert counted(ConvNeXtT()) + counted(nn.LayerNorm(768)) + counted(nn.Linear(768, 1000)) == 28_589_128
    with pytest.raises(ValueError, match="6 blocks: take a multiple of 4"):
        DINOv2(depth=6)
    assert counted(DINOv2()) == 22_056_576
    assert counted(DINOv2(registers=4)) == 22_056_576 + 4 * 384


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize(
    "make", [lambda s: ResNet(18, 3, s), lambda s: ResNet(50, 3, s), lambda s: EfficientNetB0(3, s)]
)
def test_a_dilated_encoder_computes_the_strided_one_between_its_voxels_too(make, output_stride):
    strided, dilated = randomised(make(32)), make(output_stride).eval()
    state = strided.state_dict()
    for name in state:  # its means over the image would be of other voxels
        if ".fc2." in name:
            state[name].zero_()
    dilated.load_state_dict(state)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        coarse, fine = strided(x), dilated(x)
    assert dilated.strides == tuple(96 // feature.shape[2] for feature in fine)
    agree([f[..., :: f.shape[2] // c.shape[2], :: f.shape[3] // c.shape[3]] for f, c in zip(fine, coarse)], coarse)  # noqa: B905


def timm_efficientnet(net):
    """`net`'s weights under timm's names."""
    named = {}
    for name, value in net.state_dict().items():
        _, stage, *rest, kind = name.split(".")
        if stage == "0":
            named[f"{('conv_stem', 'bn1')[int(rest[0])]}.{kind}"] = value
            continue
        block, _, place, *within = rest
        place, layer = int(place) + (stage == "1"), within[-1]
        if place == 2:
            layer = {"fc1": "se.conv_reduce", "fc2": "se.conv_expand"}[layer]
        else:
            convs, norms = (["", "conv_dw", "", "conv_pw"], ["", "bn1", "", "bn2"])
            if stage != "1":
                convs, norms = ["conv_pw", "conv_dw", "", "conv_pwl"], ["bn1", "bn2", "", "bn3"]
            layer = (convs, norms)[int(layer)][place]
        named[f"blocks.{int(stage) - 1}.{block}.{layer}.{kind}"] = value
    return named


def convnext_names(net, authors):
    """`net`'s weights under the authors' names, or timm's."""
    named, layers = (
        {},
        ("dwconv", "norm", "pwconv1", "pwconv2") if authors else ("conv_dw", "norm", "mlp.fc1", "mlp.fc2"),
    )
    layers = dict(zip("0235", layers, strict=True))
    for name, value in net.state_dict().items():
        _, number, place, *rest = name.split(".")
        stage = int(number) // 2
        if int(number) % 2:
            begin = f"stages.{stage}.{'' if authors else 'blocks.'}{place}."
            named[begin + ("gamma" if rest == ["layer_scale"] else f"{layers[rest[1]]}.{rest[2]}")] = value.squeeze()
            if rest != ["layer_scale"]:
                named[f"{begin}{layers[rest[1]]}.{rest[2]}"] = value
        elif authors:
            named[f"downsample_layers.{stage}.{place}.{rest[0]}"] = value
        else:
            named[f"stages.{stage}.downsample.{place}.{rest[0]}" if stage else f"stem.{place}.{rest[0]}"] = value
    return named


def same(net, state):
    """`net`'s weights are in `state`, under other names."""
    taken = take(type(net)(), state).state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in net.state_dict().items() if value.is_floating_point())


def test_files_with_timms_and_the_authors_names_load():
    net = randomised(EfficientNetB0())
    assert {"blocks.0.0.conv_pw.weight", "blocks.1.1.se.conv_reduce.bias"} < timm_efficientnet(net).keys()
    same(net, timm_efficientnet(net))
    net = randomised(ConvNeXtT())
    for authors, name in ((True, "stages.2.8.pwconv1.bias"), (False, "stages.2.blocks.8.mlp.fc1.bias")):
        named = convnext_names(net, authors)
        assert name in named and named[name.rpartition(".")[0] + ".bias"].dim() == 1
        same(net, named)


def test_a_file_with_timms_names_of_dinov2_with_registers_computes_the_same():
    net = randomised(DINOv2(width=24, registers=4, grid=5, depth=4))
    state = net.state_dict()
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    del state["mask_token"]
    timm = take(DINOv2(width=24, registers=4, grid=5, depth=4), state)
    x = torch.randn(1, 3, 70, 56)
    with torch.no_grad():
        agree(timm(x), net(x))


@pytest.mark.parametrize("heads", [6])
def test_a_transformers_file_of_dinov2_loads(heads, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=24, num_attention_heads=heads, num_hidden_layers=4, image_size=70)
    model = randomised(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path)
    state = load_safetensors(tmp_path / "model.safetensors")
    assert any(".attention.attention.query." in name for name in state)  # other names than in memory
    net = take(DINOv2(width=24, depth=4, heads=heads, grid=5), state)
    x = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        patches = net(x)[-1].flatten(2).transpose(1, 2)
        agree([patches], [model(x).last_hidden_state[:, 1:]])


ENCODERS = {
    "resnet": lambda n: ResNet(18, n),
    "resnet_16": lambda n: ResNet(18, n, 16),
    "efficientnet": lambda n: EfficientNetB0(n, 16),
    "convnext": ConvNeXtT,
    "dinov2": lambda n: Pyramid(DINOv2(n, width=24, depth=4, grid=5), 16),
}
DECODERS = {"unet": UNetDecoder, "deeplab": DeepLabV3Plus}


PAIRS = [
    (encoder, decoder) for encoder in ENCODERS for decoder in DECODERS if (encoder, decoder) != ("dinov2", "deeplab")
]


@pytest.mark.parametrize("encoder, decoder", PAIRS)
def test_a_network_has_the_methods_of_unet(encoder, decoder):
    torch.manual_seed(0)
    net = EncoderDecoder(ENCODERS[encoder](1), DECODERS[decoder], n_classes=3, has_dropout=True)
    sides = [divisor * factor for divisor, factor in zip(net.divisors, (2, 3), strict=True)]
    x = torch.randn(2, 1, *sides)
    features = net.encode(x)
    decoded = net.decode(features)
    assert net(x).shape == net.classify(decoded).shape == (2, 3, *sides)
    assert [level.shape[1] for level in decoded] + [features[-1].shape[1]] == net.channels
    assert decoded[0].shape[2:] == x.shape[2:]
    other = net.another_decoder("deconv")
    assert other.classify(other.decode(features)).shape == (2, 3, *sides)
    net.classify(decoded).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.train()
    assert not torch.equal(net(x), net(x)) and torch.equal(net(x, turnoff_drop=True), net(x, turnoff_drop=True))
    assert EncoderDecoder.settings_of(net.state_dict()) == {"dims": 2}
    assert net.translate(net.state_dict()).keys() == net.state_dict().keys()
    net.eval()
    with torch.no_grad():
        agree([optimize_for_inference(net)(x)], [net(x)])
    with pytest.raises(ValueError, match=f"{net.divisors[0]}.* must divide the sides"):
        net(x[..., :-1])


@pytest.mark.parametrize("normalization", ["none", "groupnorm", "instancenorm"])
def test_other_normalizations_take_single_images(normalization):
    for decoder in DECODERS.values():
        encoder = SimpleNamespace(channels=[8, 16], strides=[4, 8])
        net = decoder(encoder, 2, 2, normalization)
        assert net([torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)]).shape == (1, 2, 32, 32)
        with pytest.raises(ValueError, match="layernorm"):
            decoder(encoder, 2, 1, "layernorm")


def test_atrous_convolutions_see_at_their_rates():
    net = DeepLabV3Plus(SimpleNamespace(channels=[4, 8], strides=[4, 16]), 2, 1, "none")
    for branch, rate in zip(net.branches, (0, 6, 12, 18), strict=True):
        x = torch.randn(1, 8, 41, 41, requires_grad=True)
        branch[:-1](x)[0, :, 20, 20].sum().backward()
        seen = {tuple(place) for place in (x.grad.abs().sum((0, 1)).nonzero() - 20).tolist()}
        assert seen == {(a * rate, b * rate) for a in (-1, 0, 1) for b in (-1, 0, 1)}


def test_a_folded_stem_computes_what_repeated_channels_give():
    weight, x = torch.randn(8, 3, 7, 7), torch.randn(2, 1, 20, 20)
    whole = torch.conv2d(x.expand(-1, 3, -1, -1), weight)
    agree([torch.conv2d(x, fold_stem(weight, 1))], [whole])
    for n in (2, 3, 4, 6):
        folded = fold_stem(weight, n)
        assert folded.shape == (8, n, 7, 7)
        assert torch.equal(folded[:, :3], (weight * (3 / n))[:, :n])
    agree([torch.conv2d(x.expand(-1, 6, -1, -1), fold_stem(weight, 6))], [whole])
    agree([torch.conv2d(x.expand(-1, 3, -1, -1), fold_stem(weight.sum(1, keepdim=True), 3))], [whole])


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone."])
def test_an_encoders_file_loads_into_a_network_of_other_channels(prefix):
    resnet = randomised(ResNet(18))
    state = {f"{prefix}{name}": value for name, value in resnet.state_dict().items()}
    state[f"{prefix}fc.weight"] = torch.zeros(1000, 512)
    net = EncoderDecoder(ResNet(18, 1), UNetDecoder, n_classes=2)
    loaded, left = load_fitting(net, {"state_dict": state}, "resnet18.pth")
    assert loaded == len(resnet.state_dict())
    assert {line.partition(":")[0].partition(".")[0] for line in left} == {"decoder", "encoder"}
    assert [line for line in left if line.startswith("encoder")] == ["encoder.fc.weight: not in the network, left out"]
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        agree(net.eval().encode(x), resnet(x.expand(-1, 3, -1, -1)))


TENSORS = {
    "a": torch.randn(3, 4),
    "b.weight": torch.randn(2, 1, 5).half(),
    "c": torch.randn(7).bfloat16(),
    "d": torch.tensor([True, False, True]),
    "e": torch.tensor(5),
    "empty": torch.zeros(0, 3),
    "f": torch.tensor([-3, 4], dtype=torch.int8),
    "g": torch.randn(3).double(),
}


def test_a_file_of_the_safetensors_package_is_read_as_the_package_reads_it(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    package.save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt"})
    expected, found = package.load_file(tmp_path / "a.safetensors"), load_safetensors(tmp_path / "a.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype and value.shape == found[name].shape and torch.equal(value, found[name])
    before = (tmp_path / "a.safetensors").read_bytes()
    found["a"].zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before
    save_checkpoint(found, tmp_path / "a.pth")
    assert package.load_file(tmp_path / "a.safetensors")["a"].abs().sum() > 0


def file_of(header, values=b"\0" * 16):
    header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(header).to_bytes(8, "little") + header + values


def entry(begin=0, end=16, dtype="F32", shape=(2, 2)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = file_of({"a": entry()})
BROKEN = {
    "empty": b"",
    "short": b"\0\0\0",
    "long header": (2**63).to_bytes(8, "little") + b"{}",
    "cut header": GOOD[:20],
    "cut values": GOOD[:-1],
    "more values": GOOD + b"\0",
    "no JSON": file_of("{nonsense"),
    "deep JSON": file_of("[" * 100_000),
    "a list": file_of("[]"),
    "twice": file_of(json.dumps({"a": entry(0, 8, shape=(2,)), "b": entry(8, shape=(2,))}).replace("b", "a")),
    "no dtype": file_of({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "another dtype": file_of({"a": entry(dtype="F4")}),
    "a shape of another size": file_of({"a": entry(shape=(2, 3))}),
    "a negative shape": file_of({"a": entry(shape=(-2, -2))}),
    "a vast shape": file_of({"a": entry(0, 0, shape=(2**70, 0))}, b""),
    "beyond the end": file_of({"a": entry(0, 32, shape=(2, 4))}),
    "backwards": file_of({"a": entry(16, 0)}),
    "overlapping": file_of({"a": entry(), "b": entry(8, 16, shape=(2,))}),
    "a hole": file_of({"a": entry(8, 16, shape=(2,))}),
    "words": file_of({"a": entry("0", "16")}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_ends_in_one_sentence(case, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[case])
    with pytest.raises(SafetensorsError) as caught:
        load_safetensors(path)
    message = str(caught.value)
    assert (
        message.startswith(f"{path}: ")
        and "\n" not in message
        and message.rpartition("; ")[2].startswith(("copy", "give"))
    )


def test_a_missing_file_ends_in_one_sentence_and_a_good_one_at_odd_places_loads(tmp_path):
    with pytest.raises(SafetensorsError, match="No such file"):
        load_safetensors(tmp_path / "none.safetensors")
    (tmp_path / "odd.safetensors").write_bytes(
        file_of(json.dumps({"a": entry()}) + " " * 3, torch.arange(4.0).numpy().tobytes())
    )
    assert math.isclose(load_safetensors(tmp_path / "odd.safetensors")["a"].sum().item(), 6)


# --------------------------------------------------------------------------------------------------------- --network
def test_every_name_of_network_is_a_network():
    assert flags.NETWORKS == tuple(networks.NETWORKS)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def train(script, images, out, network, *more, side=64, dims=2):
    words = ["--dims", dims, "--root_path", images, "--output_dir", out, "--labelnum", 3, "--max_iterations", 2]
    words += [
        "--patch_size",
        *[side] * dims,
        "--num_workers",
        0,
        "--progress",
        0,
        "--n_filters",
        2,
        "--network",
        network,
    ]
    return script.main([*map(str, words), *map(str, more)])


def test_a_run_starts_from_an_encoders_file_and_is_tested(images, tmp_path):
    """Of three channels, in the safetensors format; the images have one."""
    package = pytest.importorskip("safetensors.torch")
    state = randomised(ResNet(18)).state_dict()
    package.save_file(state, tmp_path / "resnet18.safetensors")
    more = ("--pretrained", tmp_path / "resnet18.safetensors", "--base_lr", 0)
    folder = train(train_mean_teacher, images, tmp_path / "runs", "resnet18_deeplab", *more, side=32)
    trained = torch.load(folder / "iter_2.pth", weights_only=True)
    torch.testing.assert_close(trained["encoder.conv1.weight"], state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(trained["encoder.layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    log = (folder / "log.txt").read_text()
    assert "decoder.blocks" not in log and "decoder.fuse.0.weight: not in" in log
    assert "its last layer, which starts anew" in log and "encoder." not in log  # all of the encoder's were
    result = inference.main(["--model_path", str(folder / "iter_2.pth"), "--stride_xy", "16"])
    assert result["network"]["network"] == "resnet18_deeplab"


@pytest.mark.parametrize("recipe", ["mc_net", "urpc", "unimatch", "crossmatch", "ss_net", "dtc"])
def test_methods_with_heads_of_their_own_take_encoders(images, tmp_path, recipe):
    script = importlib.import_module(f"train_{recipe}")
    for network in ("resnet18_unet", "resnet18_deeplab"):
        folder = train(script, images, tmp_path / network, network, side=32)
        assert (folder / "iter_2.pth").is_file()


@pytest.mark.parametrize(
    "network, more, said",
    [
        ("resnet51_unet", [], ["resnet51_unet is none of", "resnet50_unet"]),
        ("dinov2_vits14_unet", [], ["--patch_size 64 64", "14"]),
        ("resnet50_unet", ["--strides", 2, 2], ["--strides", "resnet50_unet"]),
        ("convnext_t_unet", [], ["convnext_t_unet takes images", "--dims 2"]),
        ("resnet50_unet", ["--deep_supervision"], ["--deep_supervision", "resnet50_unet"]),
        ("resnet18_deeplab", ["--batch_size", 1], ["--normalization batchnorm", "groupnorm"]),
        ("resnet18_unet", ["--pretrained", "cut.safetensors"], ["cut.safetensors", "copy it again"]),
    ],
)
def test_wrong_flags_end_in_one_sentence(images, tmp_path, network, more, said, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(GOOD[:-1])
    with pytest.raises(SystemExit) as stopped:
        train(train_sup, images, tmp_path / "runs", network, *more, dims=3 if network == "convnext_t_unet" else 2)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert stopped.value.code == 2 and all(word in line for word in said), line
