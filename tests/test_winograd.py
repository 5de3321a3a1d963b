"""Winograd's convolutions beside PyTorch's own, in double precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from torch import nn

from mtseg.networks import UNet, VNet
from mtseg.sliding_window import optimize_for_inference
from mtseg.winograd import WinogradError, left_to_pytorch, winograd_convolutions
from mtseg.winograd import convolutions as winograd

pytestmark = needs_compiler

# Sides that tiles of four divide and sides that they do not, one slice, one voxel; enough columns for several chunks.
# Channels before and after, batch, and the sides of volumes and of images.
SHAPES = [(16, 16, 2, 8, 8, 8), (16, 32, 1, 5, 7, 9), (48, 16, 3, 4, 3, 2), (32, 32, 2, 1, 6, 5), (16, 16, 1, 1, 1, 1)]
SHAPES += [(16, 16, 4, 48, 24, 20), (64, 64, 1, 12, 12, 8), (256, 256, 1, 12, 12, 12)]
SHAPES += [(16, 16, 2, 8, 8), (16, 32, 1, 7, 9), (48, 16, 3, 3, 2), (32, 32, 2, 6, 5), (16, 16, 1, 1, 1)]
SHAPES += [(16, 16, 4, 100, 60), (64, 80, 1, 24, 20), (256, 128, 6, 32, 32)]


def close(ours, exact):
    """Equal to float32 rounding, as Winograd's transforms amplify it."""
    return ours.shape == exact.shape and (ours - exact).abs().max() <= 3e-5 * exact.abs().max()


def net_of(ci, co, dims=3, **how):
    torch.manual_seed(0)
    return (nn.Conv2d, nn.Conv3d)[dims - 2](ci, co, **{"kernel_size": 3, "padding": 1, **how})


@pytest.fixture
def calls(monkeypatch):
    """The names of convolutions.c's functions that are called, in their order."""
    names = []
    call = winograd._call

    def watched(name, *given, **more):
        names.append(name)
        return call(name, *given, **more)

    monkeypatch.setattr(winograd, "_call", watched)
    return names


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_pytorchs(shape, channels_last, bias):
    ci, co, *size = shape
    layer, layout = net_of(ci, co, len(size) - 1, bias=bias), winograd.LAYOUTS[len(size) + 1]
    memory_format = layout if channels_last else torch.contiguous_format
    exact = copy.deepcopy(layer).double()
    x = torch.randn(size[0], ci, *size[1:]).to(memory_format=memory_format).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, exact_y = winograd_convolutions(layer)(x), exact(exact_x)
    assert close(y, exact_y) and y.is_contiguous(memory_format=layout)
    gradient = torch.randn(y.shape)
    y.backward(gradient)
    exact_y.backward(gradient.double())
    assert close(x.grad, exact_x.grad)
    for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert close(ours.grad, theirs.grad), name


@pytest.mark.parametrize("size", [(4, 6, 6, 4), (1, 3, 3, 2), (4, 12, 12), (1, 3, 2)], ids=str)
def test_the_functions_themselves(size):
    """Also where a layer would leave the work to PyTorch."""
    n, *sides = size
    x, gradient = (torch.randn(n, channels, *sides) for channels in (128, 64))
    weight = torch.randn(64, 128, *[3] * len(sides))
    x, gradient = (tensor.contiguous(memory_format=winograd.LAYOUTS[tensor.dim()]) for tensor in (x, gradient))
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = (F.conv2d, F.conv3d)[len(sides) - 2](exact_x, exact_weight, padding=1)
    by_x, by_weight = torch.autograd.grad(exact, (exact_x, exact_weight), gradient.double())
    assert close(winograd.convolve(x, weight), exact)
    assert close(winograd.weight_gradient(x, gradient), by_weight)
    assert close(winograd.input_gradient(gradient, weight), by_x)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.zeros(1, 16, 4, 4, 4).double(), torch.zeros(16, 16, 3, 3, 3), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3).double(), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3), torch.zeros(16).double()),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3), torch.zeros(8)),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 32, 3, 3, 3), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 1), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(24, 16, 3, 3, 3), None),
        (torch.zeros(1, 8, 4, 4, 4), torch.zeros(16, 8, 3, 3, 3), None),
        (torch.zeros(0, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3, 3), None),
        (torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 3, 3, 3), None),
        (torch.zeros(1, 16, 4, 4, 4), torch.zeros(16, 16, 3, 3), None),
    ],
)
def test_what_does_not_fit_never_reaches_the_loops(monkeypatch, x, weight, bias):
    monkeypatch.setattr(winograd, "_library", None)
    with pytest.raises(ValueError, match=r"wanted|does not fit"):
        winograd.convolve(x, weight, bias)


def test_gradients_that_do_not_fit_never_reach_the_loops(monkeypatch):
    monkeypatch.setattr(winograd, "_library", None)
    x = torch.zeros(1, 16, 4, 4, 4)
    others = torch.zeros(1, 24, 4, 4, 4), torch.zeros(2, 16, 4, 4, 4), torch.zeros(1, 16, 4, 4)
    for gradient in (torch.zeros(1, 16, 4, 4, 5), x.double(), *others):
        with pytest.raises(ValueError, match="wanted"):
            winograd.weight_gradient(x, gradient)
    for weight in (torch.zeros(32, 16, 3, 3, 3), torch.zeros(16, 16, 3, 3, 1)):
        with pytest.raises(ValueError, match="does not fit"):
            winograd.input_gradient(x, weight)


@pytest.mark.parametrize("sides", [(9, 10, 11), (4, 8, 8), (50, 61), (20, 20)])
def test_the_bits_do_not_depend_on_the_number_of_threads(sides):
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            torch.manual_seed(1)
            layer, x = winograd_convolutions(net_of(16, 32, len(sides))), torch.randn(2, 16, *sides).requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            found.append([y, x.grad, layer.weight.grad])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_a_network_keeps_its_names_and_its_copies_compute_with_their_own_weights():
    torch.manual_seed(0)
    net = VNet(1, 2, 16, "batchnorm").eval()
    plain = copy.deepcopy(net).to(memory_format=torch.channels_last_3d)
    assert winograd_convolutions(net) is net
    teacher = copy.deepcopy(net)
    assert list(teacher.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for parameter in (*teacher.parameters(), *plain.parameters()):
            parameter.mul_(1.1)
    volume = torch.randn(2, 1, 32, 32, 32)
    assert close(teacher(volume), plain(volume)) and not close(net(volume), plain(volume))
    folded = optimize_for_inference(teacher)
    assert sum(isinstance(layer, nn.BatchNorm3d) for layer in folded.modules()) == 0
    with torch.no_grad():
        assert close(folded(volume), plain(volume))


UNETS = [{}, {"residual": True, "normalization": "instancenorm"}, {"deep_supervision": True, "strides": (2, 2, 2)}]
UNETS += [{"dims": 2, "residual": True}]


@pytest.mark.parametrize("how", UNETS, ids=str)
def test_a_unet_gives_the_same_outputs_and_gradients_by_winograd(calls, how):
    torch.manual_seed(0)
    net = UNet(1, 3, 16, **{"normalization": "groupnorm", **how})
    exact = copy.deepcopy(net).double()
    winograd_convolutions(net)
    volume = torch.randn(1, 1, *(32, 16, 16) if net.dims == 3 else (64, 48))
    for network, x in ((net, volume), (exact, volume.double())):
        outputs = network(x)
        sum(output.square().mean() for output in (outputs if isinstance(outputs, list) else [outputs])).backward()
    assert {"winograd_convolve", "winograd_weight_gradient"} == set(calls)
    for (name, ours), theirs in zip(net.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-3, atol=1e-4, msg=name)


def test_what_winograd_leaves_to_pytorch_is_named():
    left = left_to_pytorch(UNet(1, 2, 16))
    assert left["encoder.0.conv1"] == "1 to 16 channels, not multiples of 16"
    assert left["up.0"] == "transposed, kernel 2 x 2 x 2, stride 2 x 2 x 2"
    assert left.keys() == {"encoder.0.conv1", *(f"up.{level}" for level in range(4))}
    strided = {"block_one_dw.conv.0", "block_two_dw.conv.0", "block_three_dw.conv.0", "block_four_dw.conv.0"}
    up = {"block_five_up.conv.0", "block_six_up.conv.0", "block_seven_up.conv.0", "block_eight_up.conv.0"}
    assert left_to_pytorch(VNet(1, 2, 16)).keys() == {"block_one.conv.0", *strided, *up}
    left = left_to_pytorch(VNet(1, 2, 16, dims=2))
    assert left.keys() == {"block_one.conv.0", *strided, *up}
    assert left["block_five_up.conv.0"] == "transposed, kernel 2 x 2, stride 2 x 2"
    thin = UNet(1, 2, 16, strides=[(2, 2, 1), 2], kernel_sizes=[(3, 3, 1), 3, 3])
    left = left_to_pytorch(winograd_convolutions(thin))
    assert left["encoder.0.conv2"] == "kernel 3 x 3 x 1, stride 1 x 1 x 1"
    assert left["up.0"] == "transposed, kernel 2 x 2 x 1, stride 2 x 2 x 1"
    assert left.keys() == {"encoder.0.conv1", "encoder.0.conv2", "decoder.0.conv1", "decoder.0.conv2", "up.0", "up.1"}


@pytest.mark.parametrize("padding", [0, "same", "valid"])
@pytest.mark.parametrize("sides", [(6, 5, 4), (12, 9)])
def test_a_convolution_of_one_voxel_is_a_matrix_product_with_gradients_in_channels_last(padding, sides):
    dims = len(sides)
    net = nn.Sequential(net_of(16, 16, dims), net_of(16, 3, dims, kernel_size=1, padding=padding))
    exact = copy.deepcopy(net).double()
    x = torch.randn(2, 16, *sides)
    gradients = []
    hidden = winograd_convolutions(net)[0](x)
    hidden.register_hook(gradients.append)
    y, exact_y = net[1](hidden), exact(x.double())
    assert close(y, exact_y)
    y.square().sum().backward()
    exact_y.square().sum().backward()
    assert gradients[0].is_contiguous(memory_format=winograd.LAYOUTS[dims + 2])
    for ours, theirs in zip(net.parameters(), exact.parameters(), strict=True):
        assert close(ours.grad, theirs.grad)
    assert net[1](x[0]).shape == (3, *sides)  # without a batch, as PyTorch has it
    with pytest.raises(RuntimeError, match="16"):
        net[1](torch.zeros(1, 8, *sides))


OTHERS = [
    {"stride": 2},
    {"groups": 2},
    {"padding_mode": "reflect"},
    {"dilation": 2},
    {"padding": 0},
    {"co": 24},
]
OTHERS += [{"kernel_size": 1, "padding": 0}, {"kernel_size": 5}, {"ci": 8}]


@pytest.mark.parametrize("how", OTHERS, ids=str)
@pytest.mark.parametrize("dims", [2, 3])
def test_other_layers_are_left_to_pytorch(calls, how, dims):
    settings = {"ci": 16, "co": 16, **how}
    net = nn.Sequential(net_of(dims=dims, **settings), net_of(settings["co"], 16, dims), net_of(16, 16, dims))
    x = torch.randn(1, settings["ci"], *(24, 24) if dims == 2 else (12, 12, 12))
    expected = net(x)
    assert close(winograd_convolutions(net)(x), expected.double())
    assert len(calls) == (1 if settings["co"] == 24 else 2)
    assert net[0].weight.is_contiguous(memory_format=winograd.LAYOUTS[dims + 2])


def test_padding_same_is_padding_of_one(calls):
    layer, x = net_of(16, 16, padding="same"), torch.randn(1, 16, 8, 8, 8)
    expected = layer(x)
    assert close(winograd_convolutions(layer)(x), expected.double()) and calls == ["winograd_convolve"]


def test_other_inputs_are_left_to_pytorch(calls):
    layer = winograd_convolutions(net_of(16, 16))
    assert layer(torch.zeros(0, 16, 8, 8, 8)).shape == (0, 16, 8, 8, 8)
    assert layer(torch.zeros(16, 8, 8, 8)).shape == (16, 8, 8, 8)
    for wrong, words in (
        (torch.zeros(1, 32, 8, 8, 8), "32 channels"),
        (torch.zeros(1, 16, 8, 8, 8).double(), "double"),
    ):
        with pytest.raises(RuntimeError, match=words):
            layer(wrong)
    assert not calls
    assert (
        winograd_convolutions(copy.deepcopy(layer).double())(torch.zeros(1, 16, 8, 8, 8).double()).dtype
        == torch.float64
    )
    assert not calls


# What is computed by Winograd's algorithm on (4, C, sides) patches: forward, the input's gradient, the weight's.
@pytest.mark.parametrize(
    ("channels", "sides", "avx512", "others"),
    [
        (64, (8, 8, 4), "ccw", "ccw"),
        (128, (4, 4, 4), "w", "w"),
        (256, (3, 3, 2), "", "w"),
        (256, (16, 16), "ccw", "ccw"),
        (256, (8, 8), "w", "w"),
        (256, (4, 4), "", "w"),
    ],
)
def test_each_layer_takes_what_is_faster_with_the_processors_instructions(
    monkeypatch, calls, channels, sides, avx512, others
):
    letters = {"c": "winograd_convolve", "w": "winograd_weight_gradient"}
    for capability, expected in (("AVX512", avx512), ("AVX2", others)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        calls.clear()
        layer = winograd_convolutions(net_of(channels, channels, len(sides)))
        x = torch.randn(4, channels, *sides).requires_grad_()
        exact, exact_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
        layer(x).square().sum().backward()
        exact(exact_x).square().sum().backward()
        assert calls == [letters[letter] for letter in expected]
        assert close(x.grad, exact_x.grad) and close(layer.weight.grad, exact.weight.grad)


@pytest.mark.parametrize("side", [2, 8])  # the smaller one is left to PyTorch
def test_under_autocast_it_computes_in_float32(side):
    layer, x = winograd_convolutions(net_of(64, 64)), torch.randn(1, 64, side, side, side).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32


def test_defaults_of_the_process_do_not_matter():
    layer, x = winograd_convolutions(net_of(16, 16)), torch.randn(1, 16, 8, 8, 8)
    torch.set_default_dtype(torch.float64)
    try:
        layer(x).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.grad.dtype == torch.float32


def test_gradients_are_not_differentiated_again():
    layer, x = winograd_convolutions(net_of(16, 16)), torch.randn(1, 16, 8, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.fixture
def no_library():
    winograd._library.cache_clear()
    yield
    winograd._library.cache_clear()


def test_what_the_machine_lacks_is_one_sentence(monkeypatch, tmp_path, no_library):
    broken = tmp_path / "broken"
    broken.write_text(
        "#!/bin/sh\necho In file included from x: >&2\necho error: no stdint.h >&2\necho 1 note >&2\nexit 1\n"
    )
    idle = tmp_path / "idle"
    idle.write_text("#!/bin/sh\n")
    for script in (broken, idle):
        script.chmod(0o755)
    cases = [
        ("no-such-compiler", "no-such-compiler"),
        (str(broken), "no stdint.h"),
        (str(idle), "winograd.so"),
        ("gcc '", "quot"),
    ]
    for compiler, words in cases:
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(WinogradError, match=words) as raised:
            winograd_convolutions(net_of(16, 16))
        assert "leave --winograd out" in str(raised.value)
    monkeypatch.setenv("CC", "")
    winograd_convolutions(net_of(16, 16))


def test_a_copy_without_its_loops_says_so(monkeypatch, tmp_path, no_library):
    monkeypatch.setattr(winograd, "SOURCE", tmp_path / "convolutions.c")
    with pytest.raises(WinogradError, match="copy it to where"):
        winograd_convolutions(net_of(16, 16))


def test_networks_it_is_not_for_are_refused():
    with pytest.raises(WinogradError, match="--n_filters 16"):
        winograd_convolutions(net_of(8, 8))
    with pytest.raises(WinogradError, match="on a GPU"):
        winograd_convolutions(net_of(16, 16).to("meta"))
