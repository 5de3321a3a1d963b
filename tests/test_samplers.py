from collections import Counter

import numpy as np
import pytest

from mtseg.samplers import IterationSampler, ShardedSampler, ShuffledBatchSampler, TwoStreamBatchSampler


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
