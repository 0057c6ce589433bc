"""BlockPool against a plain model: a dict from sequence to its list of pages."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from dllm_kernels._library import host

BlockPool, PagesExhausted = host().BlockPool, host().PagesExhausted

COUNTS = st.integers(0, 5)


class PoolMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")
    ended = Bundle("ended")

    @initialize(pages=st.integers(1, 12))
    def start(self, pages):
        self.pool = BlockPool(pages)
        self.model = {}

    def in_use(self):
        return {page for pages in self.model.values() for page in pages}

    def refused_for_lack_of(self, pages, call):
        """True, and an exact error, if the model says that `pages` are not there."""
        free = self.pool.pages - len(self.in_use())
        if pages <= free:
            return False
        with pytest.raises(PagesExhausted, match=f"wanted: {pages}, free: {free} of {self.pool.pages}"):
            call()
        return True

    def accept(self, sequence, kept, pages):
        """`sequence` now holds `kept` and `pages` pages that were free."""
        got = self.pool.pages_of(sequence)
        fresh = got[len(kept) :]
        assert got[: len(kept)] == kept
        assert len(fresh) == len(set(fresh)) == pages
        assert not set(fresh) & self.in_use()
        self.model[sequence] = got

    @rule(target=sequences, pages=COUNTS)
    def allocate(self, pages):
        if self.refused_for_lack_of(pages, lambda: self.pool.allocate(pages)):
            return -1
        sequence = self.pool.allocate(pages)
        assert sequence not in self.model
        self.accept(sequence, [], pages)
        return sequence

    @rule(sequence=sequences, pages=COUNTS)
    def append(self, sequence, pages):
        if sequence not in self.model:
            return
        if not self.refused_for_lack_of(pages, lambda: self.pool.append(sequence, pages)):
            self.pool.append(sequence, pages)
            self.accept(sequence, self.model[sequence], pages)

    @rule(target=sequences, parent=sequences, pages=COUNTS, data=st.data())
    def fork(self, parent, pages, data):
        if parent not in self.model:
            return -1
        shared = data.draw(st.integers(0, len(self.model[parent])))
        if self.refused_for_lack_of(pages, lambda: self.pool.fork(parent, shared, pages)):
            return -1
        child = self.pool.fork(parent, shared, pages)
        assert child not in self.model
        self.accept(child, self.model[parent][:shared], pages)
        return child

    @rule(parent=sequences)
    def fork_more_than_there_is(self, parent):
        if parent in self.model:
            with pytest.raises(ValueError, match="shared must lie in"):
                self.pool.fork(parent, len(self.model[parent]) + 1, 0)

    @rule(target=ended, sequence=consumes(sequences))
    def free(self, sequence):
        if sequence in self.model:
            self.pool.free(sequence)
            del self.model[sequence]
        return sequence

    @rule(sequence=ended)
    def use_what_has_ended(self, sequence):
        for call in (
            lambda: self.pool.free(sequence),
            lambda: self.pool.append(sequence, 0),
            lambda: self.pool.fork(sequence, 0, 0),
            lambda: self.pool.pages_of(sequence),
            lambda: self.pool.shared_pages(sequence),
            lambda: self.pool.page_table([sequence]),
        ):
            with pytest.raises(ValueError, match=f"sequence {sequence} is unknown or was freed"):
                call()

    @rule()
    def reset(self):
        self.pool.reset()
        self.model.clear()

    @invariant()
    def pool_equals_model(self):
        if not hasattr(self, "pool"):
            return
        holders = [page for pages in self.model.values() for page in pages]
        assert self.pool.sequences == len(self.model)
        assert self.pool.pages_free == self.pool.pages - len(set(holders))
        for page in range(self.pool.pages):
            assert self.pool.reference_count(page) == holders.count(page)
        for sequence, pages in self.model.items():
            assert self.pool.pages_of(sequence) == pages
            shared = [holders.count(page) > 1 for page in pages]
            assert self.pool.shared_pages(sequence) == sum(shared)
            assert shared == sorted(shared, reverse=True)
        width = max(map(len, self.model.values()), default=0)
        table = self.pool.page_table(list(self.model))
        assert table.shape == (len(self.model), width)
        assert table.dtype == "int32"
        assert table.tolist() == [pages + [0] * (width - len(pages)) for pages in self.model.values()]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=30, stateful_step_count=30)


def test_an_exhausted_pool_says_so_and_stays_as_it_was():
    pool = BlockPool(4)
    first = pool.allocate(3)
    with pytest.raises(
        PagesExhausted, match=r"pages wanted: 2, free: 1 of 4; free a sequence first"
    ) as refused:
        pool.allocate(2)
    assert isinstance(refused.value, RuntimeError)
    assert (pool.pages_free, pool.sequences, pool.pages_of(first)) == (1, 1, [0, 1, 2])


def test_a_shared_page_is_free_only_when_nobody_holds_it():
    pool = BlockPool(4)
    parent = pool.allocate(3)
    child = pool.fork(parent, 2, 1)
    assert pool.pages_of(child) == [0, 1, 3]
    pool.free(parent)
    assert pool.pages_free == 1
    assert pool.shared_pages(child) == 0
    pool.free(child)
    assert pool.pages_free == 4


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda pool: BlockPool(0), ValueError, "pages must lie in 1..2147483647, got 0"),
        (lambda pool: BlockPool(2**31), ValueError, "pages must lie in"),
        (lambda pool: BlockPool(1.5), TypeError, "pages"),
        (lambda pool: pool.allocate(-1), ValueError, "pages must not be negative, got -1"),
        (lambda pool: pool.allocate(2**40), PagesExhausted, "pages wanted: 1099511627776"),
        (lambda pool: pool.append(0, -1), ValueError, "pages must not be negative"),
        (lambda pool: pool.fork(0, -1, 0), ValueError, r"shared must lie in 0\.\.1"),
        (lambda pool: pool.fork(0, 1, -1), ValueError, "pages must not be negative"),
        (lambda pool: pool.free(7), ValueError, "sequence 7 is unknown"),
        (lambda pool: pool.free(-1), ValueError, "sequence -1 is unknown"),
        (lambda pool: pool.reference_count(4), ValueError, r"page must lie in 0\.\.3, got 4"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(call, error, says):
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(error, match=says):
        call(pool)
    assert (pool.pages_free, pool.sequences, pool.pages_of(0)) == (3, 1, [0])
