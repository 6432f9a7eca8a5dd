"""The laws of reading: every sequence once an epoch, whoever reads; equally many steps; any step resumed exactly."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ltm_pyro.data.batch_sampler import DistributedBatchSampler
from ltm_pyro.errors import UsageError

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def shards(sizes):
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@given(sizes, st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_every_sequence_comes_once_an_epoch_on_one_rank(sizes, ranks, batch_size, epoch, shuffle):
    assume(sum(sizes) >= ranks * batch_size)
    orders = [
        DistributedBatchSampler(shards(sizes), batch_size, rank, ranks, seed=5, shuffle=shuffle)
        for rank in range(ranks)
    ]
    for order in orders:
        order.set_epoch(epoch)
    steps = [list(order) for order in orders]
    assert sorted(i for rank in steps for batch in rank for i in batch) == list(range(sum(sizes)))
    assert {len(rank) for rank in steps} == {len(orders[0])}
    assert all(1 <= len(batch) <= batch_size + 1 for rank in steps for batch in rank)
    assert all(len(batch) == batch_size for rank in steps for batch in rank[:-1])


@given(sizes, st.integers(1, 3), st.integers(1, 5), st.data())
def test_an_epoch_goes_on_at_any_step(sizes, ranks, batch_size, data):
    assume(sum(sizes) >= ranks * batch_size)
    order = DistributedBatchSampler(shards(sizes), batch_size, ranks - 1, ranks)
    order.set_epoch(2)
    whole, step = list(order), data.draw(st.integers(0, len(order)))
    resumed = DistributedBatchSampler(shards(sizes), batch_size, ranks - 1, ranks)
    resumed.resume(2, step)
    assert len(resumed) == len(order)
    assert list(resumed) == whole[step:] or resumed.epoch == 3
    order.set_epoch(3)
    resumed.set_epoch(3)
    assert list(resumed) == list(order)


def test_ranks_take_the_same_sequences_in_a_step_as_one_process_does():
    one = list(DistributedBatchSampler(shards([50, 60]), 8))
    two = [list(DistributedBatchSampler(shards([50, 60]), 4, rank, 2)) for rank in (0, 1)]
    assert [set(batch) for batch in one] == [{*a, *b} for a, b in zip(*two, strict=True)]


def test_seed_and_epoch_decide_the_order():
    def read(seed, epoch):
        order = DistributedBatchSampler(shards([100] * 40), 10, seed=seed)
        order.set_epoch(epoch)
        return list(order)

    assert read(0, 1) == read(0, 1)
    assert read(0, 0) != read(0, 1) != read(1, 1)
    touched = {i // 100 for batch in read(0, 0)[:100] for i in batch}
    assert len(touched) <= 16 + 1  # so many shards are held in memory at most


def test_too_few_sequences_are_refused():
    with pytest.raises(UsageError, match=r"There are 7 sequences, fewer than 2 ranks x batch_size 4: lower batch_size"):
        DistributedBatchSampler(shards([7]), 4, 0, 2)
