"""The laws of reading: every sequence once an epoch, whoever reads; equally many steps; any step resumed exactly."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ltm_pyro.data.batch_sampler import DistributedBatchSampler, TokenBudgetSampler, bounds
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


def check_resumption(make, data):
    """An epoch that is resumed at any step goes on as the undisturbed one, and so does the next."""
    order = make()
    order.set_epoch(2)
    whole, step = list(order), data.draw(st.integers(0, len(order)))
    resumed = make()
    resumed.resume(2, step)
    assert len(resumed) == len(order)
    assert list(resumed) == whole[step:] or resumed.epoch == 3
    order.set_epoch(3)
    resumed.set_epoch(3)
    assert list(resumed) == list(order)


@given(sizes, st.integers(1, 3), st.integers(1, 5), st.data())
def test_an_epoch_goes_on_at_any_step(sizes, ranks, batch_size, data):
    assume(sum(sizes) >= ranks * batch_size)
    check_resumption(lambda: DistributedBatchSampler(shards(sizes), batch_size, ranks - 1, ranks), data)


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


LONGEST = 40


@st.composite
def documents(draw):
    """Shards, and the tokens of every row."""
    found = shards(draw(sizes))
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=found[-1].stop, max_size=found[-1].stop))
    return found, np.array(lengths)


@given(documents(), st.integers(1, 4), st.integers(LONGEST, 200), st.integers(0, 3), st.booleans())
def test_every_document_comes_once_an_epoch_within_the_budget(corpus, ranks, tokens, epoch, shuffle):
    found, lengths_N = corpus
    assume(len(lengths_N) >= ranks)
    orders = [
        TokenBudgetSampler(found, lengths_N, tokens, LONGEST, rank, ranks, seed=5, shuffle=shuffle)
        for rank in range(ranks)
    ]
    for order in orders:
        order.set_epoch(epoch)
    steps = [list(order) for order in orders]
    assert sorted(i for rank in steps for batch in rank for i in batch.ids) == list(range(len(lengths_N)))
    assert {len(rank) for rank in steps} == {len(orders[0])}
    for batches in zip(*steps, strict=True):  # one step of all ranks
        assert len({batch.length for batch in batches}) == 1
        for ids, length in batches:
            assert ids
            assert lengths_N[ids].max() <= length
        assert (sum(len(ids) for ids, _ in batches) - (ranks - 1)) * batches[0].length <= ranks * tokens


@given(documents(), st.integers(1, 3), st.integers(LONGEST, 120), st.data())
def test_an_epoch_of_documents_goes_on_at_any_step(corpus, ranks, tokens, data):
    assume(len(corpus[1]) >= ranks)
    check_resumption(lambda: TokenBudgetSampler(*corpus, tokens, LONGEST, ranks - 1, ranks), data)


def test_documents_of_like_length_are_batched_with_little_padding():
    lengths_N = np.random.default_rng(0).geometric(1 / 60, 20_000).clip(1, 256)
    order = TokenBudgetSampler([range(i, i + 1000) for i in range(0, 20_000, 1000)], lengths_N, 8192, 256)
    batches = [*order]
    padded = sum(len(ids) * length for ids, length in batches)
    assert 1 - lengths_N.sum() / padded < 0.08
    order.set_epoch(1)
    other = [*order]
    assert len(other) == len(batches)
    assert {frozenset(ids) for ids, _ in batches}.isdisjoint({frozenset(ids) for ids, _ in other})
    assert [length for _, length in batches[:50]] != sorted(length for _, length in batches[:50])


def test_bounds_are_a_tenth_apart():
    found = bounds(256)
    assert found[0] == 1
    assert found[-1] == 256
    assert (found[1:] > found[:-1]).all()
    assert (found[1:][found[1:] > 20] / found[:-1][found[1:] > 20] < 1.16).all()


def test_a_budget_without_room_for_the_longest_is_refused():
    with pytest.raises(UsageError, match=r"A budget of 39 tokens has no room for a sequence of 40: raise data.tokens"):
        TokenBudgetSampler([range(1)], np.array([3]), 39, 40)
    with pytest.raises(UsageError, match="There are 1 sequences, fewer than 2 ranks"):
        TokenBudgetSampler([range(1)], np.array([3]), 40, 40, 0, 2)
