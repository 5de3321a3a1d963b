"""Two processes over gloo, against one process that has the joint batch. This file is also what they run."""

import contextlib
import copy
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtseg.distributed import RankError, Ranks, joined_ranks
from mtseg.losses import multiclass_dice_loss, softmax_mse_loss
from mtseg.networks.vnet import VNet
from mtseg.samplers import IterationSampler, ShardedSampler, TwoStreamBatchSampler
from mtseg.script.runlog import StopSignals

ROOT = Path(__file__).resolve().parents[1]
LABELED_BS, UNLABELED_BS = 2, 2


def loss_of(outputs, ema_outputs, labels):
    """What no mean over processes gives: Dice, class weights, ignored voxels and a confidence mask."""
    supervised = outputs[:LABELED_BS]
    weight = torch.tensor([0.2, 1.0, 3.0])
    loss_ce = F.cross_entropy(supervised, labels, weight=weight, ignore_index=255)
    loss_dice = multiclass_dice_loss(supervised, labels)
    confident = ema_outputs.softmax(1).amax(1, keepdim=True) > 0.4
    distance = softmax_mse_loss(outputs[LABELED_BS:], ema_outputs, reduction="none") * confident
    return loss_ce + loss_dice + distance.sum() / confident.sum()


def step(ranks):
    """The loss and the gradients of one iteration of Mean Teacher, as the training script has it."""
    torch.manual_seed(0)
    model = VNet(1, 3, n_filters=2, normalization="groupnorm")
    ema_model = copy.deepcopy(model).requires_grad_(False)
    for parameter in ema_model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    joint = IterationSampler(TwoStreamBatchSampler(range(6), range(6, 20), 4, UNLABELED_BS, seed=1), 1, 5, 6)
    (entries,) = ShardedSampler(joint, ranks.rank, ranks.world_size, LABELED_BS)
    volumes, labels = [], []
    for _, seed in entries:
        rng = np.random.default_rng(seed)
        volumes.append(rng.standard_normal((1, 16, 16, 16)).astype(np.float32))
        # The samples' classes are of very different sizes: a mean of Dice losses is far from the joint one.
        labels.append(np.digitize(volumes[-1][0], [2 * rng.random(), 2.2]))
        labels[-1][: rng.integers(8)] = 255
    volumes, labels = torch.from_numpy(np.stack(volumes)), torch.from_numpy(np.stack(labels))

    net = ranks.wrap(model)
    labeled_bs = LABELED_BS // ranks.world_size
    outputs = net(volumes)
    with torch.no_grad():
        # The same noise for every patch: what a process draws is not what is compared here.
        noise = torch.randn(volumes.shape[1:], generator=torch.Generator().manual_seed(1))
        ema_outputs = ranks.gather(ema_model(volumes[labeled_bs:] + 0.1 * noise))
    outputs = torch.cat([ranks.gather(outputs[:labeled_bs]), ranks.gather(outputs[labeled_bs:])])
    loss = loss_of(outputs, ema_outputs, ranks.gather(labels[:labeled_bs]))
    loss.backward()
    return {
        "loss": loss.detach(),
        "outputs": outputs.detach(),
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


def leave(ranks):
    """The iterations this process makes when the other, number 1, is told to stop before its third batch."""
    stop = SimpleNamespace(received=None)
    made = []
    for batch in ranks.in_step(range(100), stop):
        made.append(batch)
        if batch == 1 and ranks.rank == 1:
            stop.received = 15
    return made, stop.received


def buffers(ranks):
    net = nn.BatchNorm1d(2)
    net.running_mean.fill_(float(ranks.rank))
    ranks.average_buffers(net, nn.Linear(1, 1))
    return net.running_mean


def worker(task, folder):
    if task == "hang":  # the timeout is short: both have imported everything before it runs
        (folder / os.environ["RANK"]).touch()
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.05)
    try:
        # As in the training loop: torchrun's SIGTERM, when another process has died, does not cut off the message.
        with StopSignals(), joined_ranks(timeout=timedelta(seconds=10 if task == "hang" else 600)) as ranks:
            if task == "hang":
                (folder / "joined").touch()
                time.sleep(600 * ranks.rank)
                ranks.wait()
            with ranks.main_first():
                made_first = (folder / "made").exists()
                (folder / "made").touch()
            result = {**step(ranks), "left": leave(ranks), "buffers": buffers(ranks), "made_first": made_first}
            result["joined"] = ranks.join([10 * item for item in ranks.share(range(5))])
            half = torch.full((1,), 1.0 + ranks.rank)
            result["half"] = [ranks.gather(half.to(kind)) for kind in (torch.bfloat16, torch.float16, torch.int64)]
            ranks.reseed()
            result["drawn"] = torch.rand(3)
            torch.save(result, folder / f"{ranks.rank}.pth")
            ranks.wait()
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.wait()
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of two processes, of which one then died; what torchrun ended with."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, __file__, "step", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (folder / "1.pth").exists(), done.stderr
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in (0, 1)], done


def test_the_gradients_are_those_of_the_joint_batch(two):
    joint = step(Ranks())
    scale = max(gradient.abs().max() for gradient in joint["gradients"])
    assert scale > 1e-2
    for result in two[0]:
        torch.testing.assert_close(result["outputs"], joint["outputs"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["loss"], joint["loss"], rtol=1e-6, atol=1e-6)
        for gradient, expected in zip(result["gradients"], joint["gradients"], strict=True):
            assert (gradient - expected).abs().max() <= 1e-5 * scale
    # Both processes take the same step, to the last bit, or teachers and students would drift apart.
    assert all(map(torch.equal, two[0][0]["gradients"], two[0][1]["gradients"]))
    assert torch.equal(two[0][0]["loss"], two[0][1]["loss"])


def test_a_process_that_dies_ends_the_run_with_a_message(two):
    _, done = two
    assert done.returncode != 0
    assert "error: process 0 of 2 has lost the others" in done.stderr
    assert "--resume" in done.stderr
    assert "SIGKILL" in done.stderr  # torchrun's own word on the other one


def test_what_processes_agree_on(two):
    first, second = two[0]
    assert first["left"] == second["left"] == ([0, 1], 15)
    assert first["buffers"].tolist() == second["buffers"].tolist() == [0.5, 0.5]
    assert first["joined"] == second["joined"] == [0, 10, 20, 30, 40]
    assert (first["made_first"], second["made_first"]) == (False, True)
    assert all(joint.tolist() == [1, 2] for joint in first["half"] + second["half"])
    assert not torch.equal(first["drawn"], second["drawn"])


def test_a_process_that_hangs_ends_the_others_after_the_timeout(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "hang", str(tmp_path)],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, said = processes[0].communicate(timeout=600)
        assert processes[0].returncode == 2
        assert "error: process 0 of 2 has lost the others" in said
        assert (tmp_path / "joined").exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("inside", "after", "code"),
    [("pass", "pass", 0), ("raise SystemExit(7)", "pass", 7), ("pass", "1 / 0", 1), ("raise SystemExit", "pass", 0)],
)
def test_the_end_is_an_end(inside, after, code):
    """Nothing is taken down after it, where gloo would now and then abort a run that is done."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    lines = ["import atexit, torch", "from mtseg.distributed import joined_ranks"]
    lines += ["atexit.register(print, 'taken down')", "with joined_ranks() as ranks:", f"    {inside}", after]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", "\n".join(lines)]
    processes = [subprocess.Popen(command, env={**environment, "RANK": rank}, **pipes) for rank in "01"]
    try:
        said = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * 2, said
    assert all(out == "" and ("ZeroDivisionError" in err) == (code == 1) for out, err in said)


def test_alone_it_does_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some batch systems set it
    model, batch = nn.Linear(2, 2), torch.rand(3, 2)
    with joined_ranks() as ranks:
        assert ranks.is_main and not torch.distributed.is_initialized()
        assert ranks.wrap(model) is model
        assert ranks.gather(batch) is batch
        assert ranks.gpu("3") == "3"
        assert ranks.launcher() == ["python"]
        assert ranks.join(ranks.share([1, 2, 3])) == [1, 2, 3]
        torch.manual_seed(0)
        ranks.reseed()
        ranks.wait()
        with ranks.main_first():
            drawn = torch.randn_like(batch)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.randn_like(batch))
        assert list(ranks.in_step(range(3), SimpleNamespace(received=2))) == [0, 1, 2]
        ranks.check_shares(1, 3, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"WORLD_SIZE": "2"},  # no MASTER_ADDR: at 371cded a traceback
        {"WORLD_SIZE": "two"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
    ],
)
def test_a_rank_left_in_the_environment_is_one_sentence(monkeypatch, changes):
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match="unset RANK and WORLD_SIZE"), joined_ranks():
        pytest.fail("no other process is there")


def test_ctrl_c_ends_the_waiting_for_processes_that_never_come():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-u", str(ROOT / "train_sup.py"), "--max_iterations", "1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert "process 0 of 2 waits for the others" in process.stderr.readline()
        while True:  # until the waiting has begun, and its port is taken
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) in (-signal.SIGINT, 130)
    finally:
        process.kill()
        process.communicate()


def test_an_error_of_ones_own_stays_what_it_is():
    with pytest.raises(RuntimeError, match="mat1"), joined_ranks():
        torch.rand(2, 3) @ torch.rand(2, 3)


@pytest.mark.parametrize(
    ("numbers", "named"),
    [((1, 2, 2), "--labelnum 1 "), ((9, 3, 2), "3 labelled"), ((9, 2, 5), "5 unlabelled")],
)
def test_shares_that_cannot_be_equal_are_refused(numbers, named):
    with pytest.raises(RankError, match=rf"{named}.*--nproc_per_node"):
        Ranks(0, 2).check_shares(*numbers)


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
