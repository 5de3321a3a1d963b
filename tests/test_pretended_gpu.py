"""What only a GPU refuses, on a CPU that passes for one: see pretended_gpu.py."""

import copy
import csv

import pretrain_masked
import pytest
import torch
from conftest import TINY, TINY_OF
from pretended_gpu import pretended_gpu
from torch import nn

import inference
from mtseg.optim import Updater
from mtseg.script import methods

SCRIPTS = {methods.method_of(path): methods.load_script(path) for path in methods.training_scripts()}
# An iteration ends in the numbers of the one before, and the last one in a checkpoint.
ENDINGS = {"clock.py _read: synchronize", "run.py read: synchronize"}
# The labels go to SciPy on the CPU; the voxels of a class are as many as there are.
OF_THE_METHOD = {
    "BCP": ("postprocess.py largest_components",),
    "SSNet": ("prototypes.py choose", "prototypes.py forward", "optim.py step: aten.index"),
}


@pytest.fixture
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch) as waits:
        yield waits


def train(script, data, out, **changes):
    given = {**TINY, "root_path": data, "output_dir": out, "labelnum": 2, "max_iterations": 4, **changes}
    given = {name: value for name, value in given.items() if value is not None}
    return script.main([word for name, value in given.items() for word in (f"--{name}", *str(value).split())])


def test_what_a_gpu_refuses_is_refused(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert (here.device.type, there.device.type, (2 * there).is_cuda) == ("cpu", "cuda", True)
    for mixed in (lambda: here + there, lambda: torch.stack([here, there]), lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="same device"):
        here + there.sum()
    assert (there + here.sum()).is_cuda  # a single number of the CPU's is no tensor of another device
    with pytest.raises(TypeError):
        there.numpy()
    assert there.cpu().numpy().sum() == 3 and here.to(there).is_cuda and not there.to("cpu", torch.int8).is_cuda


def test_a_network_there_learns_and_copies_there(gpu):
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)).to("cuda")
    other = copy.deepcopy(net)
    volume = torch.rand(2, 1, 2, 2, 2)
    for each in (net, other):
        with pytest.raises(RuntimeError):
            each(volume)
        each(volume.cuda()).square().sum().backward()
        tensors = [*each.state_dict().values(), *(parameter.grad for parameter in each.parameters())]
        assert all(tensor.is_cuda for tensor in tensors)


def test_waiting_is_noted(gpu):
    there = torch.ones(3, device="cuda")
    assert gpu == []
    there.cpu(), there.sum().item(), there[there > 0], there.to("cpu", non_blocking=True), torch.ones(3).cuda()
    whats = ["cpu", "aten._local_scalar_dense.default", "aten.index.Tensor", "cuda"]
    assert [line.partition(": ")[2] for line in gpu] == whats
    assert {line.split(":")[0] for line in gpu} == {"test_pretended_gpu.py test_waiting_is_noted"}


def waits_within_iterations(gpu, monkeypatch, script, data, out, **changes):
    """What waits from the first step of a training to its last."""
    within = []

    def step(updater, loss, plain=Updater.step):
        plain(updater, loss)
        if updater.steps == 1:
            gpu.clear()
        within[:] = gpu

    monkeypatch.setattr(Updater, "step", step)
    folder = train(script, data, out, **changes)
    assert set(within) >= ENDINGS
    with open(folder / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    return [line for line in within if line not in ENDINGS]


@pytest.mark.parametrize("model", SCRIPTS)
def test_an_iteration_mixes_no_devices_and_waits_for_nothing(data, tmp_path, gpu, monkeypatch, model):
    waits = waits_within_iterations(gpu, monkeypatch, SCRIPTS[model], data, tmp_path, **TINY_OF.get(model, {}))
    assert [line for line in waits if not line.startswith(OF_THE_METHOD.get(model, ()))] == []


@pytest.mark.parametrize(
    "model, flags",
    [
        ("MT", {f"strong_{name}": 0.2 for name in ("scaling", "noise", "blur", "gamma", "cutout", "mixin", "elastic")}),
        ("MT", {"strong_rotation": 10, "class_weights": "1 2", "optimizer": "adamw", "gradient_clipping": 1}),
        ("MT", {"network": "unet", "consistency_on": "all", "consistency_threshold": 0.6, "accumulation_steps": 2}),
        ("MTplus", {"consistency_warmup": 1, "batch_size": 6, "labeled_bs": 2, "paste": "", "second_teacher": ""}),
    ],
)
def test_nor_do_what_flags_add(data, tmp_path, gpu, monkeypatch, model, flags):
    assert waits_within_iterations(gpu, monkeypatch, SCRIPTS[model], data, tmp_path, **flags) == []


BLOCKS = {"mask_block": 4}


@pytest.mark.parametrize("flags", [BLOCKS, BLOCKS | {"sparse": ""}, {"pretext": "genesis"}, {"pretext": "autoencoder"}])
def test_nor_does_pretraining(data, tmp_path, gpu, monkeypatch, flags):
    assert waits_within_iterations(gpu, monkeypatch, pretrain_masked, data, tmp_path, labelnum=None, **flags) == []


@pytest.mark.parametrize(
    "flags",
    ["", "--tta --case_statistics 0.5", "--weighting gaussian --save_probabilities", "--uncertainty teacher --fast"],
)
def test_a_test_there_gives_the_numbers_of_a_test_here(data, tmp_path, monkeypatch, flags):
    folder = train(SCRIPTS["MT"], data, tmp_path)
    words = ["--model_path", str(folder / "iter_4.pth"), *flags.split()]
    here = inference.main(words)["summary"]
    with pretended_gpu(monkeypatch):
        assert inference.main(words)["summary"] == here
