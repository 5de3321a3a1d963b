import itertools
from collections import Counter

import numpy as np
import pytest

from mtseg.samplers import IterationSampler, ShardedSampler, ShuffledBatchSampler, Strata, TwoStreamBatchSampler


def test_an_epoch_is_one_pass_through_the_primary_indices():
    sampler = TwoStreamBatchSampler(range(10), range(10, 13), batch_size=4, secondary_batch_size=2)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 5
    assert sorted(i for batch in batches for i in batch[:2]) == list(range(10))
    assert all(i >= 10 for batch in batches for i in batch[2:])
    # Ten secondary indices drawn from three: passed through evenly, again and again.
    assert set(Counter(i for batch in batches for i in batch[2:]).values()) <= {3, 4}


def test_what_does_not_fill_a_batch_is_left_for_another_epoch():
    sampler = TwoStreamBatchSampler(range(5), range(5, 40), 4, 2)
    seen = set()
    for _ in range(50):
        batches = list(sampler)
        assert len(batches) == 2
        seen |= {i for batch in batches for i in batch[:2]}
    assert seen == set(range(5))


def test_numpys_global_seed_governs_without_a_seed():
    def draw():
        np.random.seed(3)
        return list(TwoStreamBatchSampler(range(9), range(9, 30), 4, 1))

    assert draw() == draw()


def test_a_seed_makes_each_epoch_a_function_of_its_number():
    sampler = TwoStreamBatchSampler(range(20), range(20, 40), 4, 2, seed=5)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.parametrize("arguments", [([], [1], 2, 1), ([1], [], 2, 1), ([1, 2], [3], 2, 2), ([1], [2, 3], 4, 2)])
def test_impossible_batches_are_refused(arguments):
    with pytest.raises(ValueError, match="indices a batch"):
        TwoStreamBatchSampler(*arguments)


def test_shuffled_batches():
    sampler = ShuffledBatchSampler(range(7), 2, seed=0)
    assert len(list(sampler)) == len(sampler) == 3
    assert all(len(batch) == 2 for batch in sampler)
    with pytest.raises(ValueError, match="cannot be drawn"):
        ShuffledBatchSampler(range(2), 3)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 11])
def test_iterations_do_not_depend_on_where_training_was_resumed(start):
    def batches(first):
        return list(IterationSampler(TwoStreamBatchSampler(range(7), range(7, 12), 4, 2, seed=1), 1, first, 12))

    assert batches(start) == batches(0)[start:]
    assert len(batches(0)) == len(IterationSampler([0], 1, 0, 12)) == 12


def test_a_sampler_whose_epochs_cannot_be_drawn_again_is_refused():
    with pytest.raises(ValueError, match="has no seed"):
        IterationSampler(TwoStreamBatchSampler(range(4), range(4, 12), 4, 2), 1, 0, 8)


def test_every_sample_of_a_run_has_a_seed_of_its_own():
    sampler = IterationSampler(ShuffledBatchSampler(range(8), 2, seed=1), 1, 0, 50)
    seeds = [seed for batch in sampler for _, seed in batch]
    first_numbers = {np.random.default_rng(seed).integers(2**62) for seed in seeds}
    assert len(first_numbers) == len(seeds) == 100


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_are_the_joint_batch_without_overlap(world_size):
    def joint():
        return IterationSampler(TwoStreamBatchSampler(range(7), range(7, 40), 18, 12, seed=1), 1, 3, 20)

    shares = [list(ShardedSampler(joint(), rank, world_size, 6)) for rank in range(world_size)]
    primary, secondary = 6 // world_size, 12 // world_size
    for number, batch in enumerate(joint()):
        parts = [share[number] for share in shares]
        assert [entry for part in parts for entry in part[:primary]] == batch[:6]
        assert [entry for part in parts for entry in part[primary:]] == batch[6:]
        assert all(len(part) == primary + secondary for part in parts)
    assert all(len(share) == len(joint()) == 17 for share in shares)


def test_unequal_shares_are_refused():
    with pytest.raises(ValueError, match="3 samples cannot be shared equally by 2"):
        next(iter(ShardedSampler([[1, 2, 3, 4, 5]], 0, 2, 2)))


def two_streams(strata, balance, labeled, **keywords):
    """A sampler of the first `labeled` indices, three a batch, and of all others, five a batch."""
    return TwoStreamBatchSampler(
        range(labeled), range(labeled, len(strata)), 8, 5, strata=strata, balance=balance, **keywords
    )


@pytest.mark.parametrize("seed", range(30))
def test_after_any_number_of_batches_each_set_has_its_share_to_within_one(seed):
    """The shares n^(1 - balance), and at least their whole part in every single batch."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(1, 60, rng.integers(1, 9))
    strata = rng.permutation(np.repeat(np.arange(len(numbers)), numbers))
    size, balance = int(rng.integers(1, 25)), float(rng.choice([0, 1, 0.5, rng.random()]))
    shares = numbers ** (1.0 - balance) / (numbers ** (1.0 - balance)).sum()
    given = np.zeros(len(numbers))
    batches = Strata(range(len(strata)), size, strata.tolist(), balance, seed, 1).batches(0)
    for number, batch in enumerate(itertools.islice(batches, 200), start=1):
        counts = np.bincount(strata[batch], minlength=len(numbers))
        assert len(batch) == size and (counts >= np.floor(size * shares - 1e-6)).all()
        given += counts
        assert np.abs(given - number * size * shares).max() < 1


def test_shares_by_hand():
    strata = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    for balance, shares in ((0, "aaaaaabbbc"), (1, "aaaabbbccc"), (0.5, "aaaaabbbcc")):
        (batch,) = itertools.islice(Strata(range(100), 10, strata, balance, 0, 1).batches(0), 1)
        assert "".join(sorted(strata[index] for index in batch)) == shares


@pytest.mark.parametrize("balance", [0, 0.4, 1])
def test_each_set_is_passed_through_evenly_and_none_ends_an_epoch(balance):
    """One set has a single member, fewer than its share of a batch; its epochs are those of all the others."""
    strata = {0: "one", **dict.fromkeys(range(1, 8), "two"), **dict.fromkeys(range(8, 41), "three")}
    sampler = ShuffledBatchSampler(range(41), 6, seed=2, strata=strata, balance=balance)
    seen = Counter()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 41 // 6
        seen.update(index for batch in batches for index in batch)
    for name in ("one", "two", "three"):
        counts = [seen[index] for index in range(41) if strata[index] == name]
        assert max(counts) - min(counts) <= 1
    if balance == 1:
        assert seen[0] == 30 * 6 * 6 // 3
    assert len({tuple(batch) for batch in batches}) == len(batches)


def test_both_streams_are_stratified():
    strata = ["a", "a", "b", "b", "b", "b", *"a" * 50, *"b" * 20, *"c" * 30]
    for batch in two_streams(strata, 1, labeled=6, seed=1):
        assert all(index < 6 for index in batch[:3]) and all(index >= 6 for index in batch[3:])
        assert {strata[index] for index in batch[:3]} == {"a", "b"}
        assert {strata[index] for index in batch[3:]} == {"a", "b", "c"}


@pytest.mark.parametrize("start", [1, 2, 3, 7, 40])
def test_strata_do_not_depend_on_where_training_was_resumed(start):
    strata = ["a", "b", "b", "b", "c", "c", "c", *"abbcc" * 3, "d"]

    def batches(first, sampler=None):
        return list(IterationSampler(sampler or two_streams(strata, 0.3, labeled=7, seed=9), 9, first, 41))

    one = two_streams(strata, 0.3, labeled=7, seed=9)
    assert batches(start) == batches(0, one)[start:]
    assert batches(start, one) == batches(0)[start:]  # an older iteration once more, as a look back at a crash does
    assert batches(0, two_streams(strata, 0.3, labeled=7, seed=8)) != batches(0)


def test_a_pass_has_an_order_of_its_own():
    sampler = ShuffledBatchSampler(range(12), 12, seed=0, strata=["a"] * 12)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders += list(sampler)
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("wrong", [{"seed": None}, {"balance": -0.1}, {"balance": 1.5}])
def test_strata_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="strata take a seed and a balance from 0 to 1"):
        ShuffledBatchSampler(range(4), 2, strata="abab", **{"seed": 1, **wrong})


def test_without_strata_the_batches_are_those_of_numpys_permutations():
    rng = np.random.default_rng([5, 3])
    primary, secondary = rng.permutation(range(6)).tolist(), rng.permutation(range(6, 16)).tolist()
    sampler = TwoStreamBatchSampler(range(6), range(6, 16), 5, 3, seed=5)
    sampler.set_epoch(3)
    assert list(sampler) == [[*primary[n * 2 : n * 2 + 2], *secondary[n * 3 : n * 3 + 3]] for n in range(3)]
