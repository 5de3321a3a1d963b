"""--fast: what it switches on where, that it is written down, and that a run goes on with it; and what bf16 may do."""

import argparse
import csv
import json

import pytest
import torch
from conftest import needs_compiler

import inference
import train_mean_teacher
from mtseg.script import fast
from mtseg.winograd import convolutions as winograd

SMALL = {"labelnum": 2, "n_filters": 16, "max_iterations": 2, "save_freq": 1, "patch_size": "16 16 16"}
SMALL |= {"num_workers": 0, "stride_xy": 8, "stride_z": 8, "progress": 0}


def run(data, out, *more, **changes):
    given = {"root_path": data, "output_dir": out, **SMALL, **changes}
    words = [word for name, value in given.items() for word in (f"--{name}", *str(value).split())]
    return train_mean_teacher.main([*words, *more])


def losses(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    winograd._library.cache_clear()
    yield
    winograd._library.cache_clear()


@needs_compiler
def test_fast_on_a_cpu_changes_the_last_digits_is_written_down_and_resumes_to_the_bit(no_gpu, data, tmp_path, capsys):
    plain, whole = run(data, tmp_path / "plain"), run(data, tmp_path / "whole", "--fast")
    assert losses(whole)[0] != losses(plain)[0] and losses(whole)[0] == pytest.approx(losses(plain)[0], rel=1e-4)
    config, log = config_of(whole), (whole / "log.txt").read_text()
    assert config["fast"] and config["channels_last"] and config["winograd"]
    assert not config["compile"] and not config["tf32"]
    assert "--fast: channels_last, Winograd's convolutions\n" in log
    assert "block_one.conv.0 (1 to 16 channels, not multiples of 16)" in log

    run(data, tmp_path / "cut", "--fast", max_iterations=1)
    with pytest.raises(SystemExit) as stopped:
        run(data, tmp_path / "cut", "--resume")
    assert stopped.value.code == 2 and "--fast is False and was True" in capsys.readouterr().err
    resumed = run(data, tmp_path / "cut", "--fast", "--resume")
    first, second = (torch.load(folder / "iter_2.pth", weights_only=True) for folder in (whole, resumed))
    assert all(map(torch.equal, first.values(), second.values()))


def test_fast_without_a_compiler_leaves_winograd_out_and_says_so(no_gpu, no_compiler, data, tmp_path):
    folder = run(data, tmp_path / "fast", "--fast", max_iterations=1)
    assert config_of(folder)["channels_last"] and not config_of(folder)["winograd"]
    log = (folder / "log.txt").read_text()
    assert "--fast: channels_last; without Winograd's convolutions: convolutions.c could not be compiled" in log
    assert losses(folder) == losses(run(data, tmp_path / "slow", "--channels_last", max_iterations=1))


@needs_compiler
def test_fast_takes_a_network_in_which_no_layer_suits_winograd(no_gpu, data, tmp_path, capsys):
    small = ["--network", "unet", "--strides", "2", "--n_filters", "2"]
    folder = run(data, tmp_path / "fast", "--fast", *small, max_iterations=1)
    assert "encoder.0.conv1 (1 to 2 channels, not multiples of 16)" in (folder / "log.txt").read_text()
    assert losses(folder) == losses(run(data, tmp_path / "slow", "--channels_last", *small, max_iterations=1))
    with pytest.raises(SystemExit):
        run(data, tmp_path / "asked", "--winograd", *small)
    assert "no 3 x 3 (x 3) convolution here has channels in multiples of 16" in capsys.readouterr().err


@needs_compiler
def test_a_fast_run_goes_on_without_its_compiler_and_says_so(no_gpu, data, tmp_path, monkeypatch):
    """The flags are the same; what they choose on another machine changes the last digits alone."""
    folder = run(data, tmp_path, "--fast", max_iterations=1)
    monkeypatch.setattr(fast, "_why_not_winograd", lambda args: "; none")
    run(data, tmp_path, "--fast", "--resume")
    assert "the last bits of the numbers may change: winograd is False and was True" in (folder / "log.txt").read_text()
    assert len(losses(folder)) == 2


def test_the_config_of_a_fast_run_lets_this_machine_decide(no_gpu, no_compiler, data, tmp_path):
    folder = run(data, tmp_path / "first", "--fast", max_iterations=1)
    there = {**config_of(folder), "winograd": True, "compile": True, "tf32": True}
    (tmp_path / "there.json").write_text(json.dumps(there))
    words = ["--config", str(tmp_path / "there.json"), "--output_dir", str(tmp_path / "second")]
    config = config_of(train_mean_teacher.main(words))
    assert config["fast"] and config["channels_last"]
    assert not config["winograd"] and not config["compile"] and not config["tf32"]


@pytest.mark.parametrize("more", [{"compile": True}, {"amp": "fp16"}])
def test_fast_beside_flags_that_winograd_does_not_go_with(more):
    args = argparse.Namespace(**{"fast": True, "amp": "off", "gradient_checkpointing": False, **more})
    (note,) = fast.switch_on(args, torch.device("cpu"))
    assert args.channels_last and not args.winograd and "float32 in eager mode" in note
    assert args.compile == more.get("compile", False)


@needs_compiler
@pytest.mark.parametrize("name", ["channels_last", "winograd"])
def test_what_is_switched_off_stays_off_beside_fast(no_gpu, data, tmp_path, name):
    """On the command line, and in a file of settings."""
    (tmp_path / "settings.json").write_text(json.dumps({"fast": True, name: False}))
    for number, words in enumerate((["--fast", f"--no-{name}"], ["--config", str(tmp_path / "settings.json")])):
        config = config_of(run(data, tmp_path / str(number), *words))
        assert config["fast"] and not config[name] and config["channels_last"] != config["winograd"]


def test_compile_can_be_left_out_of_fast(monkeypatch, tf32):
    monkeypatch.setattr(fast, "_can_compile", lambda args: True)
    args = argparse.Namespace(fast=True, compile=False)
    assert fast.switch_on(args, torch.device("cuda")) == ["--fast: channels_last, TF32"] and args.compile is False


@pytest.fixture
def tf32():
    """PyTorch's own settings, which a test may change."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    yield lambda: [backend.allow_tf32 for backend in backends]
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def test_tf32_on_a_gpu_only_with_fast(tf32, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(fast.shutil, "which", lambda name: name)
    args = argparse.Namespace(fast=True, amp="bf16", gradient_checkpointing=False)
    assert fast.switch_on(args, torch.device("cuda")) == ["--fast: channels_last, TF32, torch.compile"]
    assert tf32() == [True, True] and args.compile and args.channels_last and args.tf32 and not args.winograd
    for checkpointing, compilers in ((True, True), (False, False)):
        monkeypatch.setattr(fast.shutil, "which", lambda name, compilers=compilers: name if compilers else None)
        args = argparse.Namespace(fast=True, gradient_checkpointing=checkpointing)
        assert fast.switch_on(args, torch.device("cuda")) == ["--fast: channels_last, TF32"] and not args.compile
    args = argparse.Namespace(fast=False, gradient_checkpointing=False)
    assert fast.switch_on(args, torch.device("cuda")) == [] and tf32() == [False, False] and not args.tf32


@needs_compiler
def test_inference_is_fast_too(no_gpu, data, tmp_path, capsys):
    weights = run(data, tmp_path / "run", max_iterations=1) / "iter_1.pth"
    found = {}
    for name, more in (("plain", []), ("fast", ["--fast"])):
        result = inference.main(["--model_path", str(weights), "--output_dir", str(tmp_path / name), *more])
        found[name] = [row["dice"] for row in result["cases"]]
    assert "--fast: channels_last, Winograd's convolutions" in capsys.readouterr().out
    assert found["fast"] == pytest.approx(found["plain"], abs=1e-2)


def test_bf16_on_a_cpu_is_refused_whatever_the_processor(no_gpu, data, tmp_path, capsys, monkeypatch):
    for instructions in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda instructions=instructions: instructions)
        with pytest.raises(SystemExit) as stopped:
            run(data, tmp_path, "--amp", "bf16")
        assert stopped.value.code == 2 and "gradients of bf16 convolutions are wrong" in capsys.readouterr().err
    assert not list(tmp_path.glob("model"))


def test_a_run_that_goes_on_with_other_instructions_says_so(no_gpu, data, tmp_path, monkeypatch):
    """Which layers Winograd's algorithm takes depends on them, and so do the last digits of PyTorch itself."""
    folder = run(data, tmp_path, max_iterations=1)
    then = config_of(folder)["instructions"]
    assert then == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    run(data, tmp_path, "--resume")
    said = f"the last bits of the numbers may change: instructions is OTHER and was {then}"
    assert said in (folder / "log.txt").read_text()
