"""Batches of indices: labelled and unlabelled cases side by side, and every batch a function of seed and iteration."""

import itertools

import numpy as np


class TwoStreamBatchSampler:
    """Batches with a fixed number of primary (labelled) indices first, then secondary (unlabelled) ones.

    One epoch is one pass through the primary indices, in random order, without those left over when the primary share
    of the batch, `batch_size - secondary_batch_size`, does not divide them. The secondary indices are passed through
    again and again, each time in a new order. From Tarvainen and Valpola's code, as UA-MT uses it.

    Without `seed` the orders come from NumPy's global random state. With it they are a function of the seed and the
    epoch given to `set_epoch`.
    """

    def __init__(self, primary_indices, secondary_indices, batch_size, secondary_batch_size, seed=None):
        self.primary_indices = list(primary_indices)
        self.secondary_indices = list(secondary_indices)
        self.secondary_batch_size = secondary_batch_size
        self.primary_batch_size = batch_size - secondary_batch_size
        self.seed = seed
        self.epoch = 0
        if not 0 < self.primary_batch_size <= len(self.primary_indices):
            raise ValueError(
                f"{self.primary_batch_size} primary indices a batch, drawn from {len(self.primary_indices)}: "
                f"it must be at least one and no more than there are"
            )
        if not 0 < self.secondary_batch_size <= len(self.secondary_indices):
            raise ValueError(
                f"{self.secondary_batch_size} secondary indices a batch, drawn from {len(self.secondary_indices)}: "
                f"it must be at least one and no more than there are"
            )

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.primary_indices) // self.primary_batch_size

    def __iter__(self):
        rng = np.random if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        primary = iter(rng.permutation(self.primary_indices).tolist())
        passes = (rng.permutation(self.secondary_indices).tolist() for _ in itertools.count())
        secondary = itertools.chain.from_iterable(passes)
        for _ in range(len(self)):
            yield [*_take(primary, self.primary_batch_size), *_take(secondary, self.secondary_batch_size)]


class ShuffledBatchSampler:
    """Full batches of `indices` in random order; one epoch is one pass, without the rest that fills no batch.

    `seed` and `set_epoch` as in TwoStreamBatchSampler.
    """

    def __init__(self, indices, batch_size, seed=None):
        self.indices = list(indices)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        if not 0 < batch_size <= len(self.indices):
            raise ValueError(f"a batch of {batch_size} cannot be drawn from {len(self.indices)} indices")

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.indices) // self.batch_size

    def __iter__(self):
        rng = np.random if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        order = iter(rng.permutation(self.indices).tolist())
        for _ in range(len(self)):
            yield _take(order, self.batch_size)


class IterationSampler:
    """The batches of iterations `start` .. `stop` - 1, epoch after epoch, as one DataLoader `batch_sampler`.

    Yields lists of `(index, (seed, iteration, position))`. A data set that draws a sample's augmentation from that
    triple gives the same batch for the same seed and iteration, whichever worker makes it and wherever training was
    resumed. `batch_sampler` must have `set_epoch` and depend on its epoch alone (that is, have a seed).
    """

    def __init__(self, batch_sampler, seed, start, stop):
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self):
        return max(self.stop - self.start, 0)

    def __iter__(self):
        first_epoch, skipped = divmod(self.start, len(self.batch_sampler))
        iteration = self.start
        for epoch in itertools.count(first_epoch):
            self.batch_sampler.set_epoch(epoch)
            for batch in itertools.islice(self.batch_sampler, skipped, None):
                if iteration >= self.stop:
                    return
                # Positions count from 1: to NumPy the seeds (s, i, 0) and (s, i) are one, and the latter an epoch's.
                yield [(index, (self.seed, iteration, position)) for position, index in enumerate(batch, start=1)]
                iteration += 1
            skipped = 0


class ShardedSampler:
    """Process number `rank`'s share of every batch of `sampler`: equally many primary and equally many secondary.

    The first `primary_batch_size` entries of a batch are primary (labelled); of these, and of the others, the process
    gets as many as each other one, in a row, so that the shares together are the batch. Entries stay as they are: an
    (index, seed) of IterationSampler keeps the seed of its place in the joint batch. With `world_size` 1 that is
    `sampler` itself. Raises ValueError for a batch that cannot be shared out equally.
    """

    def __init__(self, sampler, rank, world_size, primary_batch_size=0):
        self.sampler = sampler
        self.rank = rank
        self.world_size = world_size
        self.primary_batch_size = primary_batch_size

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        for batch in self.sampler:
            primary, secondary = batch[: self.primary_batch_size], batch[self.primary_batch_size :]
            yield [*self._share(primary), *self._share(secondary)]

    def _share(self, entries):
        size, rest = divmod(len(entries), self.world_size)
        if rest:
            raise ValueError(f"{len(entries)} samples cannot be shared equally by {self.world_size} processes")
        return entries[self.rank * size : (self.rank + 1) * size]


def _take(iterator, n):
    return list(itertools.islice(iterator, n))
