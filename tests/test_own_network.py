"""A network of one's own, --network FILE.py:CLASS: it trains like any other, and its file runs only where named."""

import json
import re

import pytest
import torch
from test_recipe import SCRIPTS, run, same, weights
from torch import nn

import inference

CODE = """
from torch import nn


class Small(nn.Module):
    stages, head = (("encoder.",),), "out_conv."

    def __init__(self, n_channels, n_classes, dims):
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.encoder = nn.Sequential(conv(n_channels, 4, 3, padding=1), nn.ReLU())
        self.out_conv = conv(4, n_classes, 1)

    def forward(self, x):
        return self.out_conv(self.encoder(x))


class Strict(Small):
    def __init__(self, n_channels, n_classes, side):
        super().__init__(n_channels, n_classes, 3)


class Halves(Small):
    def forward(self, x):
        return super().forward(x)[..., ::2]


class Even(Small):
    divisors = (32, 32, 32)


not_a_class = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return path


def test_it_trains_resumes_and_is_tested(data, tmp_path, file, capsys):
    word = f"{file}:Small"
    whole = run("MT", data, tmp_path / "whole", network=word)
    assert whole.parent.name == "LA_small_3_labeled"
    run("MT", data, tmp_path / "cut", network=word, max_iterations=2)
    cut = run("MT", data, tmp_path / "cut", "--resume", network=word)
    assert same(weights(whole, "iter_4.pth"), weights(cut, "iter_4.pth"))
    conv, head = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1)
    names = {f"encoder.0.{kind}" for kind in conv.state_dict()} | {f"out_conv.{kind}" for kind in head.state_dict()}
    assert weights(whole, "iter_4.pth").keys() == names
    path = ["--model_path", str(whole / "iter_4.pth")]
    with pytest.raises(SystemExit) as ended:
        inference.main(path)
    assert ended.value.code == 2 and f"give --network {word}" in capsys.readouterr().err
    result = inference.main([*path, "--network", word])
    assert result["parameters"] == sum(p.numel() for p in (*conv.parameters(), *head.parameters()))
    assert json.loads((whole / "iter_4_test/metrics.json").read_text())["network"]["network"] == word


def test_a_file_that_changed_and_flags_that_it_does_not_take_are_said(data, tmp_path, file):
    settings = {"network": f"{file}:Small", "n_filters": 64}
    folder = run("supervised", data, tmp_path / "runs", max_iterations=1, **settings)
    assert f"--n_filters 64 changes nothing: {file}:Small does not take it" in (folder / "log.txt").read_text()
    file.write_text(CODE.replace("self.out_conv(self", "3 * self.out_conv(self"))
    run("supervised", data, tmp_path / "runs", "--resume", **settings)
    assert "the network's file was changed since this run began" in (folder / "log.txt").read_text()


def test_a_settings_file_does_not_make_its_code_run(data, tmp_path, file, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"network": f"{file}:Small"}))
    file.write_text("raise RuntimeError('it ran')")
    with pytest.raises(SystemExit) as ended:
        run("supervised", data, tmp_path, config=tmp_path / "settings.json")
    assert ended.value.code == 2
    assert f"settings.json: its network is code: give --network {file}:Small" in capsys.readouterr().err


def test_its_parts_are_fine_tuned(data, tmp_path, file):
    word = f"{file}:Small"
    before = run("supervised", data, tmp_path / "before", network=word)
    settings = {"network": word, "pretrained": before / "iter_4.pth", "pretrained_parts": "encoder"}
    after = run("supervised", data, tmp_path / "after", freeze="encoder", **settings)
    trained, tuned = weights(before, "iter_4.pth"), weights(after, "iter_4.pth")
    assert torch.equal(trained["encoder.0.weight"], tuned["encoder.0.weight"])
    assert not torch.equal(trained["out_conv.weight"], tuned["out_conv.weight"])


def test_without_parts_it_is_loaded_whole_and_flags_about_parts_are_refused(data, tmp_path, file, capsys):
    file.write_text(re.sub("    stages, head = .*\n", "", CODE))
    settings = {"network": f"{file}:Small"}
    before = run("supervised", data, tmp_path / "before", **settings)
    settings |= {"pretrained": before / "iter_4.pth"}
    after = run("supervised", data, tmp_path / "after", base_lr=0, **settings)
    assert same(weights(before, "iter_4.pth"), weights(after, "iter_4.pth"))
    assert "4 weights of the whole network, which names no head" in (after / "log.txt").read_text()
    for name, value in {"encoder_lr_factor": 0.1, "pretrained_parts": "encoder", "freeze": "stem"}.items():
        with pytest.raises(SystemExit) as ended:
            run("supervised", data, tmp_path / "refused", **{name: value}, **settings)
        assert ended.value.code == 2 and f"--{name} {value}: --network {file}:Small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "word", "said"),
    [
        ("supervised", "{folder}/nowhere.py:Small", "there is no file"),
        ("supervised", "{file}:Nothing", "has no class Nothing that is a torch.nn.Module"),
        ("supervised", "{file}:not_a_class", "has no class not_a_class"),
        ("supervised", "{file}:Strict", "missing 1 required positional argument: 'side'; it must take n_channels"),
        ("supervised", "{file}:Halves", "(1, 2, 16, 16, 8) in eval mode and must give logits (1, 2, 16, 16, 16)"),
        ("supervised", "{file}:Even", "16 is no positive multiple of 32"),
        ("supervised", "{folder}/broken.py:Small", "broken.py cannot be loaded (NameError: name 'nn' is not defined)"),
        ("UniMatch", "{file}:Small", "has no encode, which this method needs"),
        ("URPC", "{file}:Small", "has no channels, which this method needs"),
        ("supervised", "resnet", "is none of vnet"),
    ],
)
def test_what_it_lacks_is_one_sentence(data, tmp_path, capsys, file, model, word, said):
    (tmp_path / "broken.py").write_text("class Small(nn.Module):\n    pass\n")
    more = {} if model == "supervised" else {"consistency_rampup": 1}
    with pytest.raises(SystemExit) as ended:
        run(model, data, tmp_path / "runs", network=word.format(file=file, folder=tmp_path), **more)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and "Traceback" not in error
    assert not list(tmp_path.rglob("*.pth"))


def test_every_script_takes_one_or_says_what_is_missing(data, tmp_path, file, capsys):
    for model in SCRIPTS:
        try:
            run(model, data, tmp_path, network=f"{file}:Small", max_iterations=3)
        except SystemExit as ended:
            error = capsys.readouterr().err
            assert ended.code == 2 and "which this method needs" in error and "Traceback" not in error
