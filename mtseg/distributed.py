"""Several processes that train one network together, on one machine or several, as PyTorch's torchrun starts them.

    torchrun --standalone --nproc_per_node=2 train_mean_teacher.py ...

Without torchrun, or with one process, nothing here does anything, and no bit of the result changes. With it, the batch
of an iteration is what it is without: every process takes an equal share of its labelled and of its unlabelled samples
(samplers.ShardedSampler), and nothing overlaps. Every process then computes the loss on the joint batch: the outputs,
not the losses, are exchanged (`Ranks.gather`), and each process carries the gradient back through its own share. So the
gradients are those of one process with the joint batch for every loss, also for those that no mean over processes
gives: Dice, class weights, ignored voxels, confidence masks. The memory and the loss of the joint batch's outputs in
every process is little for tens of processes; for hundreds it would be too much.

What differs from one process: batch norm normalises each share by itself (group and instance norm and none do not
depend on the batch); dropout and noise draw other numbers. Machines share the file system of data and runs.
"""

import atexit
import contextlib
import os
import re
import signal
import sys
import threading
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# A process that has died is noticed at once, since its connections close; one that hangs, after this time. It must be
# longer than what processes may wait for one another: a case of validation, data being made.
TIMEOUT = timedelta(minutes=30)
# How PyTorch words, in plain RuntimeErrors, that another process does not answer.
LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


class RankError(RuntimeError):
    """Processes that cannot train together, or no longer; the message is one sentence with the remedy."""


@contextlib.contextmanager
def joined_ranks(timeout=TIMEOUT):
    """A context with the `Ranks` that torchrun's environment variables describe; Ranks() without them.

    Over gloo between CPUs, over NCCL between GPUs, of which each process takes the one of its local number. Raises
    RankError, in every process that is left, when another one has ended or has not answered for `timeout`; it is then
    to end soon, and does so with exit code 2. At the end, of an orderly stop too, the processes wait for one another.
    """
    rank, world_size, local_rank = rank_numbers(os.environ)
    if world_size == 1:
        yield Ranks()
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        if local_rank >= gpus:
            raise RankError(f"torchrun --nproc_per_node asks for more processes than there are GPUs, {gpus}: lower it")
        torch.cuda.set_device(local_rank)
    try:
        with default_signals():
            # Gloo beside NCCL: what processes agree on lies in CPU memory, and no GPU is waited for.
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timeout)
        ranks = Ranks(rank, world_size, local_rank)
        try:
            yield ranks
        except SystemExit as stop:
            # Whoever leaves first is taken for dead by torchrun, which ends the others, main amid its saving.
            ranks.wait()
            atexit.register(end_now, stop.code)
            raise
        ranks.wait()
        dist.destroy_process_group()
        atexit.register(end_now, 0)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        atexit.register(end_now, 2)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RankError(
            f"process {rank} of {world_size} has lost the others ({reason}): the one that failed first says why, or "
            f"torchrun does, below; mend that and go on with --resume"
        ) from error


def rank_numbers(environment):
    """(rank, world_size, local_rank) as torchrun sets them in `environment`, (0, 1, 0) without them.

    RankError where they are no such numbers, or nobody says where the processes meet: they were left over from
    something else. Without torchrun a line says that other processes are waited for.
    """
    if "RANK" not in environment:
        return 0, 1, 0
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    remedy = "unset RANK and WORLD_SIZE to train in one process, or start with torchrun"
    try:
        rank, world_size, local_rank, port = (
            int(environment.get(name, 1 if name == "WORLD_SIZE" else 0)) for name in names
        )
    except ValueError as error:
        values = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
        raise RankError(f"the environment says {values}, which are not all numbers; {remedy}") from error
    if world_size > 1:
        if not (0 <= rank < world_size and local_rank >= 0 and 0 < port < 2**16 and environment.get("MASTER_ADDR")):
            raise RankError(
                f"the environment says RANK={rank} and WORLD_SIZE={world_size}, but not where processes meet; {remedy}"
            )
        if "TORCHELASTIC_RUN_ID" not in environment:
            print(f"process {rank} of {world_size} waits for the others; to train in one, {remedy}", file=sys.stderr)
    return rank, world_size, local_rank


@contextlib.contextmanager
def default_signals():
    """A context in which Ctrl-C and SIGTERM end the process at once, also while it waits in PyTorch's own code."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_now(code):
    """End the process with this exit code, 1 after an exception that nobody caught, and without taking down what it
    shared with others.

    Taking it down, gloo now and then aborts the process ("terminate called without an active exception"), at the end of
    a good run, too, and NCCL may wait for ever for others that no longer answer.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if hasattr(sys, "last_value") else code if isinstance(code, int) else int(code is not None))


class Silent:
    """Takes any call and does nothing: the log of a process that is not the main one."""

    def __getattr__(self, name):
        return lambda *arguments, **keywords: None


class Ranks:
    """This process, number `rank` of `world_size` (number `local_rank` on its machine); by default it is alone.

    Number 0 is the main one: it alone writes. What is called here, all processes must call, in the same order.
    """

    def __init__(self, rank=0, world_size=1, local_rank=0):
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.is_main = rank == 0
        self.alone = world_size == 1

    def check_shares(self, labelnum, labeled_bs, unlabeled_bs=0):
        """RankError where the joint batch's labelled or unlabelled samples cannot be shared out equally."""
        if self.world_size > labelnum:
            raise RankError(
                f"--labelnum {labelnum} is less than the {self.world_size} processes (--nproc_per_node): start fewer"
            )
        for name, number in (("labelled", labeled_bs), ("unlabelled", unlabeled_bs)):
            if number % self.world_size:
                raise RankError(
                    f"--batch_size has {number} {name} patches, which the {self.world_size} processes of torchrun "
                    f"(--nproc_per_node) cannot share equally: it counts those of all processes together, so make "
                    f"them a multiple of {self.world_size}"
                )

    def gpu(self, gpu):
        """The number of the GPU to use, a string: `gpu` when alone, else this process's own."""
        return gpu if self.alone else str(self.local_rank)

    def launcher(self):
        """The words in front of the script that start it again as it was started."""
        here = os.environ.get("LOCAL_WORLD_SIZE", self.world_size)
        return ["python"] if self.alone else ["torchrun", "--standalone", f"--nproc_per_node={here}"]

    def wait(self):
        """Go on when all processes have come here."""
        if not self.alone:
            dist.all_reduce(torch.zeros(1))

    @contextlib.contextmanager
    def main_first(self):
        """A context through which the main process goes first, and then the others, who find what it has made."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def wrap(self, model):
        """`model` in DistributedDataParallel, which gives all processes the main one's weights and equal gradients.

        It shares parameters and buffers with `model`, which stays what is saved, validated and averaged.
        """
        return model if self.alone else DistributedDataParallel(model)

    def gather(self, batch):
        """The joint batch: the `batch`es (N, ...) of all processes, of the same shape, one after the other.

        A list or tuple of tensors gives one of joint batches.

        Gradients: those that the joint batch gets flow to this process's own share alone, times `world_size`, which
        the mean over processes in DistributedDataParallel takes back.
        """
        if self.alone:
            return batch
        if isinstance(batch, (list, tuple)):
            return type(batch)(map(self.gather, batch))
        share = batch.contiguous()
        shares = [torch.empty_like(share) for _ in range(self.world_size)]
        dist.all_gather(shares, share.detach())
        if share.requires_grad:
            shares[self.rank] = share = share.view_as(share)
            share.register_hook(lambda gradient: gradient * self.world_size)
        return torch.cat(shares)

    def reseed(self):
        """From here on PyTorch draws other numbers in each process (dropout), a function of rank and last seed."""
        if not self.alone:
            seed = np.random.SeedSequence([torch.initial_seed(), self.rank + 1]).generate_state(1)[0]
            torch.manual_seed(int(seed))

    @torch.no_grad()
    def average_buffers(self, *networks):
        """Give the networks' floating-point buffers the mean over processes: batch norm's running statistics.

        The mean of running means is that of the joint batch; that of running variances lacks the differences between
        the shares' means.
        """
        buffers = [buffer for net in networks for buffer in net.buffers() if buffer.is_floating_point()]
        if self.alone or not buffers:
            return
        joint = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(joint)
        for buffer, mean in zip(buffers, joint.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer) / self.world_size)

    def share(self, items):
        """This process's part of a list (the cases of a validation), every `world_size`-th item."""
        return items[self.rank :: self.world_size]

    def join(self, results):
        """The results of all processes, one for each item of its `share`, as a list in the order of the items."""
        if self.alone:
            return results
        parts = [None] * self.world_size
        dist.all_gather_object(parts, results)
        return [parts[n % self.world_size][n // self.world_size] for n in range(sum(map(len, parts)))]

    def in_step(self, batches, stop):
        """Yield from `batches` as long as every process has one and none was told to stop.

        `stop.received`: the number of a signal, or None. Whoever has one, or has no more batches, tells the others, and
        all leave after the same iteration with the same `stop.received`.
        """
        if self.alone:
            yield from batches
            return
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)
            news = torch.tensor([stop.received or 0, batch is None])
            dist.all_reduce(news, dist.ReduceOp.MAX)
            if news.any():
                stop.received = int(news[0]) or None
                return
            yield batch
