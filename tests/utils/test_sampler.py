"""The order of images: a pure function of (seed, iteration), however a run is split."""

from itertools import islice

import pytest

from utils.sampler import IterationSampler, spread_evenly


def stream(n, batch_size, stop, **options):
    return list(IterationSampler(n, batch_size, stop_iteration=stop, **options))


@pytest.mark.parametrize("n, batch_size", [(20, 4), (7, 4), (3, 8), (1, 1)])
def test_every_pass_is_a_permutation(n, batch_size):
    order = [index for _, indices in stream(n, batch_size, 4 * n, seed=1) for index in indices]
    assert len(order) == 4 * n * batch_size
    passes = [order[start : start + n] for start in range(0, len(order), n)]
    assert all(sorted(one) == list(range(n)) for one in passes)
    if n > 5:
        assert passes[0] != passes[1] and passes[0] != sorted(passes[0])


def test_resuming_continues_the_sequence():
    whole = stream(23, 5, 40, seed=3)
    for start in (0, 1, 17, 39, 40):
        assert stream(23, 5, 40, seed=3, start_iteration=start) == whole[start:]
    assert [iteration for iteration, _ in whole] == list(range(40))
    endless = IterationSampler(23, 5, seed=3, start_iteration=38)
    assert list(islice(endless, 2)) == whole[38:]


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_global_batch_in_order(world_size):
    whole = stream(17, 6, 20, seed=5)
    ranks = [stream(17, 6, 20, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for iteration, indices in whole:
        assert sum((ranks[rank][iteration][1] for rank in range(world_size)), []) == indices


def test_seeds_differ():
    assert stream(50, 10, 5, seed=0) != stream(50, 10, 5, seed=1)
    assert stream(50, 10, 5, seed=0) == stream(50, 10, 5, seed=0)


def test_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="4 ranks for 3 images"):
        IterationSampler(3, 8, world_size=4)
    with pytest.raises(ValueError, match="train.batch_size=6"):
        IterationSampler(30, 6, world_size=4)


def test_samples_are_spread_evenly():
    assert spread_evenly(10, 64).tolist() == list(range(10))
    assert spread_evenly(1001, 3).tolist() == [0, 500, 1000]
    assert spread_evenly(0, 3).tolist() == [] and spread_evenly(5, 1).tolist() == [0]
