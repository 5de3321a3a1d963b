"""Exported networks against PyTorch, run by ONNX Runtime, TorchScript and torch.export."""

import io
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from conftest import make_data
from torch import nn

from mtseg.export import convert as export
from mtseg.export.__main__ import main
from mtseg.images import png_bytes
from mtseg.networks.unet import NORMALIZATIONS, UNet, UNetSSL4MIS
from mtseg.networks.vnet import VNet
from mtseg.script.networks import NETWORKS

pytest.importorskip("onnx", reason="ONNX needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs ONNX Runtime")


def trained(cls=VNet, normalization="batchnorm", n_channels=1, n_classes=2, dims=3, **more):
    """A small network with batch-norm statistics that are not those of its initialisation."""
    torch.manual_seed(0)
    net = cls(n_channels, n_classes, n_filters=2, normalization=normalization, has_dropout=True, dims=dims, **more)
    for _ in range(3):
        net(1 + 2 * torch.randn(2, n_channels, *[32] * dims))
    return net.eval()


def runs_alike(net, shapes):
    """In ONNX Runtime, TorchScript and torch.export `net` gives what it gives in PyTorch, on images of these shapes."""
    session = onnxruntime.InferenceSession(export.to_onnx(net, 1), providers=["CPUExecutionProvider"])
    script = torch.jit.load(io.BytesIO(export.to_torchscript(net, 1)))
    program = torch.export.load(io.BytesIO(export.to_torch_export(net, 1))).module()
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            expected = net(x)
            np.testing.assert_allclose(session.run(["logits"], {"image": x.numpy()})[0], expected, atol=1e-4)
            torch.testing.assert_close(script(x), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(program(x), expected, atol=1e-5, rtol=0)


ALL = [(cls, dims, norm) for cls in (VNet, UNet) for dims in (2, 3) for norm in NORMALIZATIONS]


@pytest.mark.parametrize(("cls", "dims", "normalization"), [*ALL, (UNetSSL4MIS, 2, "batchnorm")])
def test_onnx_runtime_gives_pytorchs_logits_for_any_batch_and_size(cls, dims, normalization):
    net = trained(cls, normalization, n_channels=2, n_classes=3, dims=dims)
    session = onnxruntime.InferenceSession(export.to_onnx(net, 2), providers=["CPUExecutionProvider"])
    for shape in [(1, 2, 32, 32, 32), (3, 2, 16, 48, 32)] if dims == 3 else [(1, 2, 64, 64), (3, 2, 48, 96)]:
        x = torch.randn(shape)
        (found,) = session.run(["logits"], {"image": x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, net(x).numpy(), atol=1e-4)
    if (cls, dims, normalization) == (VNet, 3, "batchnorm"):
        with pytest.raises(Exception, match=r"(?i)dimension|shape|broadcast"):
            session.run(None, {"image": np.zeros((1, 2, 24, 32, 32), np.float32)})  # 16 does not divide 24


@pytest.mark.parametrize(("cls", "dims"), [(VNet, 3), (VNet, 2), (UNetSSL4MIS, 2)])
def test_torchscript_and_torch_export(cls, dims):
    net = trained(cls, dims=dims)
    script = torch.jit.load(io.BytesIO(export.to_torchscript(net, 1)))
    program = torch.export.load(io.BytesIO(export.to_torch_export(net, 1))).module()
    for shape in [(1, 1, 48, 32, 32), (3, 1, 32, 64, 48)]:
        x = torch.randn(shape[: dims + 2])
        with torch.no_grad():
            torch.testing.assert_close(script(x), net(x), atol=1e-5, rtol=0)
            torch.testing.assert_close(program(x), net(x), atol=1e-5, rtol=0)


def test_an_encoder_of_images_is_exported_with_its_decoder():
    runs_alike(trained(NETWORKS["resnet18_unet"], dims=2), [(1, 1, 64, 96), (2, 1, 128, 64)])


def test_a_network_whose_sides_are_written_into_the_file_is_refused(tmp_path, capsys):
    code = """
import torch
from torch import nn


class Baked(nn.Module):
    def __init__(self, n_channels, n_classes, dims):
        super().__init__()
        self.out_conv = nn.Conv3d(n_channels, n_classes, 1)

    def forward(self, x):
        return self.out_conv(x) + torch.zeros([int(side) for side in x.shape[2:]])
"""
    (tmp_path / "own.py").write_text(code)
    torch.save(nn.ModuleDict({"out_conv": nn.Conv3d(1, 2, 1)}).state_dict(), tmp_path / "iter_1.pth")
    words = ["--model_path", tmp_path / "iter_1.pth", "--network", f"{tmp_path / 'own.py'}:Baked"]
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, [*words, "--torchscript", tmp_path / "net.ts"])])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "does not run on other sides" in error
    assert not (tmp_path / "net.ts").exists()


@pytest.mark.parametrize("cls", [VNet, UNet])
def test_a_thin_network_is_exported_for_the_sides_that_its_strides_divide(cls):
    kernels = [(3, 3, 1), (3, 3, 3), (3, 3, 3), (1, 3, 3), (3, 3, 1)]
    net = cls(1, 3, 2, strides=[(2, 2, 1), 2, (2, 1, 1), 1], kernel_sizes=kernels, max_filters=8).eval()
    runs_alike(net, [(1, 1, 24, 16, 10), (3, 1, 16, 20, 6)])


def test_onnx_runtime_is_told_to_report_nothing(monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    export.extra("onnxruntime")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_difference_that_decides_is_seen():
    for dims in (2, 3):
        net, other = trained(dims=dims), trained(dims=dims)
        assert export.largest_difference(net, other, 1) == 0
        with torch.no_grad():
            other.out_conv.bias[1] += 0.25
        assert export.largest_difference(net, other, 1) == pytest.approx(0.25, rel=1e-5)
        with torch.no_grad():
            other.out_conv.bias[1] = math.nan
        assert math.isnan(export.largest_difference(net, other, 1))


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_quantized_networks_are_small_and_near(how):
    import onnx

    torch.manual_seed(0)
    net = VNet(1, 2, n_filters=8, normalization="batchnorm")
    windows = [torch.randn(1, 1, 32, 32, 32) for _ in range(3)]
    for window in windows:
        net(window.expand(2, -1, -1, -1, -1))
    net.eval()
    content = export.to_onnx(net, 1)
    smaller = export.quantize(content, how, [window.numpy() for window in windows])
    assert len(smaller) < 0.5 * len(content)
    kinds = [node.op_type for node in onnx.load_from_string(smaller).graph.node]
    assert kinds.count("ConvTranspose") == 4  # as float32, as the module says
    assert kinds.count({"dynamic": "ConvInteger", "static": "QuantizeLinear"}[how]) >= 5
    with torch.no_grad():
        expected = net(windows[0])
        found = export.OnnxNet(smaller)(windows[0])
    assert (expected - found).abs().mean() < 0.05 * expected.std()


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(trained(UNet, "none").state_dict(), tmp_path / "iter_6.pth")
    return tmp_path / "iter_6.pth"


def flags(checkpoint, data, *more, n_filters=2):
    words = ["--model_path", checkpoint, "--network", "unet", "--n_filters", n_filters, "--normalization", "none"]
    words += ["--root_path", data, "--patch_size", 16, 16, 16, "--stride_xy", 16, "--stride_z", 16]
    return [str(word) for word in [*words, *more]]


def test_the_command_writes_every_format_and_says_what_it_costs(checkpoint, tmp_path, capsys):
    data = make_data(tmp_path / "tiny")
    names = {"--onnx": "net.onnx", "--torchscript": "net.ts", "--torch_export": "net.pt2"}
    words = [word for flag, name in names.items() for word in (flag, tmp_path / name)]
    main(flags(checkpoint, data, *words, "--quantize", "static", "--num_calibration", 2))
    said = capsys.readouterr().out
    assert all((tmp_path / name).stat().st_size > 10000 for name in [*names.values(), "net.static.onnx"])
    assert said.count("differs from PyTorch by at most") == 3
    assert "of case_0, case_1" in said  # calibrated on training cases,
    assert "on case_6, case_7" in said  # and measured on others
    assert "change in Dice" in said
    assert "transposed convolutions stay float32" in said
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_network_of_images_is_exported_and_quantized_on_images(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    names = [f"a{number}" for number in range(4)]
    for name in names:
        mask = (rng.random((40, 36)) < 0.5).astype(np.uint8)
        for folder, pixels in (("images", 100 * mask), ("masks", mask)):
            (tmp_path / "set" / folder / f"{name}.png").write_bytes(png_bytes(pixels))
    for part, cases in (("train", names[:2]), ("test", names[2:])):
        (tmp_path / f"set/{part}.list").write_text("\n".join(cases))
    torch.save(trained(UNetSSL4MIS, dims=2).state_dict(), tmp_path / "iter_6.pth")
    words = ["--model_path", tmp_path / "iter_6.pth", "--network", "unet_ssl4mis", "--n_filters", 2, "--dims", 2]
    words += ["--root_path", tmp_path / "set", "--patch_size", 32, 32, "--stride_xy", 16]
    main([*map(str, [*words, "--onnx", tmp_path / "net.onnx", "--quantize", "static"])])
    said = capsys.readouterr().out
    assert "(on 1x1x32x48 and 2x1x48x32)" in said
    assert "calibrated on 8 windows of a0, a1" in said and "on a2, a3" in said and "change in Dice" in said
    with torch.no_grad():
        x = torch.randn(1, 1, 64, 48)
        found = export.OnnxNet((tmp_path / "net.onnx").read_bytes())(x)
        torch.testing.assert_close(found, trained(UNetSSL4MIS, dims=2)(x), atol=1e-4, rtol=0)


def test_runs_with_deep_supervision_and_residual_blocks_are_exported(tmp_path, capsys):
    """The settings are the run's, as config.json and the weights tell them; one of a wrong type is a sentence."""
    net = trained(UNet, "none", deep_supervision=True, residual=True)
    torch.save(net.state_dict(), tmp_path / "iter_6.pth")
    config = {"network": "unet", "n_filters": 2, "normalization": "none", "deep_supervision": True, "residual": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(["--model_path", str(tmp_path / "iter_6.pth"), "--torchscript", str(tmp_path / "net.ts")])
    x = torch.randn(2, 1, 16, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(tmp_path / "net.ts")(x), net(x), rtol=0, atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({**config, "patch_size": "large"}))
    with pytest.raises(SystemExit) as stopped:
        main(["--model_path", str(tmp_path / "iter_6.pth"), "--torchscript", str(tmp_path / "net.ts")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "config.json: patch_size cannot be" in error


def test_mistakes_end_in_a_sentence(checkpoint, tmp_path, capsys, monkeypatch):
    data = make_data(tmp_path / "tiny", channels=2)
    out = ["--onnx", tmp_path / "net.onnx"]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnx", None)
        with pytest.raises(SystemExit):
            main(flags(checkpoint, data, *out))
        assert 'pip install "mtseg[export]"' in capsys.readouterr().err
    assert not (tmp_path / "net.onnx").exists()
    for words, said in [
        (flags(checkpoint, data), "nothing to write"),
        (flags(checkpoint, data, "--torchscript", tmp_path / "a.ts", "--quantize", "static"), "--onnx"),
        (flags(checkpoint, data, *out, n_filters=4), "another network"),
        (flags(checkpoint, tmp_path / "none", *out, "--quantize", "dynamic"), "no such folder"),
        (flags(checkpoint, data, *out, "--quantize", "dynamic"), "2"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(words)
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n")) == (2, 1), error
        assert said in error, error
    assert not list(tmp_path.glob("*.dynamic.onnx"))
