"""Batches of indices: labelled and unlabelled cases in one batch, and each batch a function of seed and iteration."""

import itertools

import numpy as np


class TwoStreamBatchSampler:
    """Batches of `batch_size - secondary_batch_size` primary (labelled) indices, then the secondary (unlabelled) ones.

    One epoch is one pass through the primary indices in random order; those that do not fill a batch are left out. The
    secondary indices are passed through again and again, each time in a new order. From Tarvainen and Valpola's code,
    as UA-MT uses it.

    Without `seed` the orders come from NumPy's global random state. With it they are a function of the seed and of the
    epoch given to `set_epoch`. Raises ValueError where a share of the batch is below one or above what there is.
    """

    def __init__(self, primary_indices, secondary_indices, batch_size, secondary_batch_size, seed=None):
        self.primary_indices = list(primary_indices)
        self.secondary_indices = list(secondary_indices)
        self.secondary_batch_size = secondary_batch_size
        self.primary_batch_size = batch_size - secondary_batch_size
        self.seed = seed
        self.epoch = 0
        for name, wanted, indices in (
            ("primary", self.primary_batch_size, self.primary_indices),
            ("secondary", self.secondary_batch_size, self.secondary_indices),
        ):
            if not 0 < wanted <= len(indices):
                raise ValueError(
                    f"{wanted} {name} indices a batch, drawn from {len(indices)}: give at least one, and no more than "
                    f"there are"
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
    """Full batches of `indices` in random order; one epoch is one pass, and indices that fill no batch are left out.

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
    """The batches of the iterations `start` .. `stop` - 1, epoch after epoch, as `batch_sampler` of a DataLoader.

    Yields lists of `(index, (seed, iteration, position))`. A data set that draws the augmentation of a sample from that
    triple gives the same batch for the same seed and iteration, whichever worker makes it and wherever training was
    resumed. The `batch_sampler` given here must have `set_epoch` and depend on its epoch alone, so it needs a seed.
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
                # Positions count from 1: to NumPy (s, i, 0) is the same seed as (s, i), which is that of an epoch.
                yield [(index, (self.seed, iteration, position)) for position, index in enumerate(batch, start=1)]
                iteration += 1
            skipped = 0


class ShardedSampler:
    """The share of process number `rank` in every batch of `sampler`: of its primary and of its secondary entries.

    The first `primary_batch_size` entries of a batch are primary (labelled). Each of the `world_size` processes gets
    equally many of these and equally many of the others, in a row, so that the shares together are the batch. Entries
    stay as they are: an (index, seed) of IterationSampler keeps the seed of its position in the joint batch. Raises
    ValueError for a batch that cannot be shared equally.
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
