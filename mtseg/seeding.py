"""Randomness as a function of the seed and the iteration, so that a resumed run repeats an uninterrupted one."""

import os

import numpy as np
import torch


def set_deterministic(deterministic):
    """Make PyTorch choose algorithms whose result does not change from run to run, or (False) the fastest ones.

    The promise holds for one machine, its versions and its number of threads or GPUs. Where PyTorch has no such
    algorithm it warns and names the operation; a UNet's max pooling on a GPU is named although its backward pass is
    deterministic, since its windows do not overlap. Call this before the first CUDA operation: cuBLAS reads its
    workspace setting only once.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=True)
    # Else PyTorch writes NaN into every new tensor in case somebody reads it before it is filled; nothing here does.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = bool(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def seed_iteration(seed, iteration):
    """Seed PyTorch's generators, on all devices, for this iteration: dropout and noise then depend on the pair alone.

    Both are hashed into one 32-bit seed (the CPU generator ignores higher bits), so that neighbouring seeds and
    iterations share nothing. `seed` is at least 0 and below 2^32; use iteration -1 for the initial weights.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, iteration + 1]).generate_state(1)[0]))
