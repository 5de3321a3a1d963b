"""Batches of indices: labelled and unlabelled cases in one batch, and each batch a function of seed and iteration."""

import itertools

import numpy as np


class TwoStreamBatchSampler:
    """Batches of `batch_size - secondary_batch_size` primary (labelled) indices, then the secondary (unlabelled) ones.

    One epoch is one pass through the primary indices in random order; those that do not fill a batch are left out. The
    secondary indices are in a new random order in every epoch, too, and again where an epoch needs more of them than
    there are; with few primary indices it ends long before, and the next begins with any of them. From Tarvainen and
    Valpola's code, as UA-MT uses it.

    Without `seed` the orders come from NumPy's global random state, with it they are a function of seed and epoch
    (`set_epoch`). Raises ValueError where a share of the batch is below one or above what there is. `strata[index]`:
    the data set of an index; both streams then draw from all their sets as Strata says.
    """

    def __init__(
        self, primary_indices, secondary_indices, batch_size, secondary_batch_size, seed=None, strata=None, balance=0.0
    ):
        self.primary_indices = list(primary_indices)
        self.secondary_indices = list(secondary_indices)
        self.secondary_batch_size = secondary_batch_size
        self.primary_batch_size = batch_size - secondary_batch_size
        self.seed = seed
        self.epoch = 0
        self.strata = []
        for stream, (name, size, indices) in enumerate(self._streams(), start=1):
            if not 0 < size <= len(indices):
                raise ValueError(f"{size} {name} indices a batch cannot be drawn from {len(indices)}; give one or more")
            if strata is not None:
                self.strata.append(Strata(indices, size, strata, balance, seed, stream))

    def _streams(self):
        yield "primary", self.primary_batch_size, self.primary_indices
        yield "secondary", self.secondary_batch_size, self.secondary_indices

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.primary_indices) // self.primary_batch_size

    def __iter__(self):
        if self.strata:
            streams = (strata.batches(self.epoch * len(self)) for strata in self.strata)
            for parts in itertools.islice(zip(*streams, strict=True), len(self)):
                yield [*itertools.chain.from_iterable(parts)]
            return
        rng = np.random if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        primary = iter(rng.permutation(self.primary_indices).tolist())
        passes = (rng.permutation(self.secondary_indices).tolist() for _ in itertools.count())
        secondary = itertools.chain.from_iterable(passes)
        for _ in range(len(self)):
            yield [*_take(primary, self.primary_batch_size), *_take(secondary, self.secondary_batch_size)]


class ShuffledBatchSampler(TwoStreamBatchSampler):
    """Full batches of `indices` in random order: TwoStreamBatchSampler with primary indices alone."""

    def __init__(self, indices, batch_size, seed=None, strata=None, balance=0.0):
        super().__init__(indices, (), batch_size, 0, seed, strata, balance)

    def _streams(self):
        yield "shuffled", self.primary_batch_size, self.primary_indices


class Strata:
    """Batches of `size` out of several data sets at once, each with its share of every batch.

    `strata[index]` is the set of an index. The share w_d of a set with n_d of the `indices` is proportional to
    n_d^(1 - balance): to its size for `balance` 0, equal for 1, and between these between. A batch holds
    floor(size w_d) of each set, and the sets take turns at what is left, so that after any number t of batches each set
    has given t size w_d indices to within one. Each set is passed through again and again, each time in a new order,
    however small it is. All of it is a function of `seed`, `stream` and the batch's number alone.

    Raises ValueError for a balance outside 0 .. 1, and without a seed.
    """

    def __init__(self, indices, size, strata, balance, seed, stream):
        if seed is None or not 0 <= balance <= 1:
            raise ValueError(f"strata take a seed and a balance from 0 to 1, not seed {seed} and balance {balance}")
        sets = {}
        for index in indices:
            sets.setdefault(strata[index], []).append(index)
        self.sets, self.seed, self.stream = list(sets.values()), seed, stream
        # Whole numbers: in a long run the rounding errors of fractions would decide whose turn it is.
        weights = [round(2**20 * len(members) ** (1 - balance)) for members in self.sets]
        self.floors, self.rests = zip(*(divmod(size * weight, sum(weights)) for weight in weights), strict=True)
        self.left = size - sum(self.floors)
        self.orders = [(None, None)] * len(self.sets)
        self.known = (0, (0,) * len(self.sets))

    def batches(self, start):
        """The batches from number `start` on, without an end."""
        number, turns = self.known if self.known[0] <= start else (0, (0,) * len(self.sets))
        while True:
            if number == start:
                self.known = (number, turns)  # the next epoch need not count the turns from the first batch on
            after = self._turns(turns)
            if number >= start:
                batch = [
                    self._member(which, count)
                    for which, floor in enumerate(self.floors)
                    for count in range(number * floor + turns[which], (number + 1) * floor + after[which])
                ]
                # Mixed, since processes and accumulation steps take a batch apart by position.
                yield self._rng(number, len(self.sets)).permutation(batch).tolist()
            number, turns = number + 1, after

    def _turns(self, turns):
        """How often each set has had a turn after one more batch; `turns` before it.

        Of the sets whose next turn is due, that one is next whose turn must be over first: "earliest deadline first"
        keeps every count within one of its share (Steiner and Yeomans, Management Science 39, 1993).
        """
        turns, whole = list(turns), sum(self.rests)
        for turn in range(sum(turns), sum(turns) + self.left):
            due = [which for which, rest in enumerate(self.rests) if turns[which] * whole < (turn + 1) * rest]
            turns[min(due, key=lambda which: -(-(turns[which] + 1) * whole // self.rests[which]))] += 1
        return tuple(turns)

    def _member(self, which, count):
        """What set number `which` gives when it has given `count` indices before."""
        passes, position = divmod(count, len(self.sets[which]))
        if self.orders[which][0] != passes:
            self.orders[which] = (passes, self._rng(passes, which).permutation(self.sets[which]).tolist())
        return self.orders[which][1][position]

    def _rng(self, number, which):
        # Four numbers: those of an epoch are two, those of a sample three.
        return np.random.default_rng([self.seed, number, which, self.stream])


class IterationSampler:
    """The batches of the iterations `start` .. `stop` - 1, epoch after epoch, as `batch_sampler` of a DataLoader.

    Yields lists of `(index, (seed, iteration, position))`. A data set that draws the augmentation of a sample from that
    triple gives the same batch for the same seed and iteration, whichever worker makes it and wherever training was
    resumed. The `batch_sampler` given here must have `set_epoch` and depend on its epoch alone, so it needs a seed;
    ValueError for one whose `seed` is None.
    """

    def __init__(self, batch_sampler, seed, start, stop):
        if getattr(batch_sampler, "seed", seed) is None:
            raise ValueError("the batch sampler has no seed, so its epochs could not be drawn again: give it one")
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
