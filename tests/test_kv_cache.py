"""BlockKVCache: room, sharing, and what is refused."""

import copy
import pickle

import pytest
import torch

from dllm_kernels.kv_cache import BlockKVCache, PagesExhausted


@pytest.fixture
def cache():
    """Two layers, 8 pages of 4 tokens; every stored number is different."""
    cache = BlockKVCache(2, 3, 5, pages=8, page_size=4, dtype=torch.float32, device="cpu")
    for layer in range(2):
        for tensor in (cache.keys(layer), cache.values(layer)):
            tensor.copy_(torch.randn(tensor.shape))
    return cache


def contents(cache, sequence, tokens):
    """K and V of a sequence's first tokens, page by page: [2, layers, tokens, kv_heads, head_dim]."""
    pages = cache.page_table([sequence])[0].tolist()
    gathered = [
        [
            torch.stack([tensor[pages[p // cache.page_size], p % cache.page_size] for p in range(tokens)])
            for tensor in (cache.keys(layer), cache.values(layer))
        ]
        for layer in range(cache.layers)
    ]
    return torch.stack([torch.stack(layer) for layer in gathered], dim=1)


def test_a_new_cache_is_zero_and_free():
    cache = BlockKVCache(2, 3, 5, pages=8, dtype=torch.bfloat16, device="cpu")
    assert (cache.pages_free, cache.pages_used, cache.page_size) == (8, 0, 32)
    for tensor in (cache.keys(0), cache.keys(1), cache.values(0), cache.values(1)):
        assert tensor.shape == (8, 32, 3, 5)
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
        assert not tensor.any()


def test_layers_keys_and_values_do_not_overlap():
    cache = BlockKVCache(2, 1, 1, pages=1, page_size=1, dtype=torch.float32, device="cpu")
    for number, tensor in enumerate((cache.keys(0), cache.keys(1), cache.values(0), cache.values(1))):
        tensor.fill_(number)
    stored = [cache.keys(0), cache.keys(1), cache.values(0), cache.values(1)]
    assert [float(tensor) for tensor in stored] == [0, 1, 2, 3]


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (4, 1), (5, 2), (32, 8)])
def test_admission_reserves_whole_pages(cache, tokens, pages):
    sequence = cache.admit(tokens)
    assert cache.pages_used == pages
    assert cache.room(sequence) == 4 * pages
    assert cache.shared_tokens(sequence) == 0


def test_page_tables_are_padded_with_zero_to_the_longest(cache):
    short, long = cache.admit(3), cache.admit(9)
    table = cache.page_table([long, short])
    assert table.dtype == torch.int32
    assert table.tolist() == [[1, 2, 3], [0, 0, 0]]
    assert cache.page_table([short]).tolist() == [[0]]
    assert cache.page_table([]).shape == (0, 0)


def test_exhaustion_leaves_everything_as_it_was(cache):
    sequence = cache.admit(20)
    for refused in (
        lambda: cache.admit(13),
        lambda: cache.extend(sequence, 33),
        lambda: cache.fork(sequence, 3, 13),
    ):
        with pytest.raises(PagesExhausted, match="pages wanted: 4, free: 3 of 8"):
            refused()
        assert (cache.pages_free, cache.room(sequence)) == (3, 20)
    cache.admit(12)


def test_extend_makes_room_and_never_takes_it(cache):
    sequence = cache.admit(5)
    cache.extend(sequence, 9)
    assert cache.room(sequence) == 12
    cache.extend(sequence, 2)
    assert cache.room(sequence) == 12


@pytest.mark.parametrize("prefix", [0, 1, 4, 6, 8, 10, 12])
def test_a_fork_has_the_prefix_and_shares_its_whole_pages(cache, prefix):
    parent = cache.admit(10)
    before = contents(cache, parent, 12)
    child = cache.fork(parent, prefix, prefix + 6)
    assert torch.equal(contents(cache, parent, 12), before)
    if prefix:
        assert torch.equal(contents(cache, child, prefix), before[:, :, :prefix])
    assert cache.shared_tokens(parent) == cache.shared_tokens(child) == prefix // 4 * 4
    assert cache.pages_used == 3 + -(-(prefix + 6) // 4) - prefix // 4


def test_what_a_fork_writes_after_the_prefix_is_its_own(cache):
    parent = cache.admit(12)
    before = contents(cache, parent, 12)
    child = cache.fork(parent, 6, 12)
    for page in cache.page_table([child])[0, 1:]:
        cache.keys(0)[page] = 7.0
    assert torch.equal(contents(cache, parent, 12), before)


def test_a_shared_prefix_outlives_the_sequence_that_wrote_it(cache):
    parent = cache.admit(8)
    before = contents(cache, parent, 8)
    child = cache.fork(parent, 8, 12)
    cache.free(parent)
    assert (cache.pages_used, cache.shared_tokens(child)) == (3, 0)
    assert torch.equal(contents(cache, child, 8), before)
    cache.free(child)
    assert cache.pages_used == 0


def test_an_ended_sequence_is_refused_everywhere(cache):
    sequence = cache.admit(4)
    cache.free(sequence)
    for call in (
        lambda: cache.free(sequence),
        lambda: cache.extend(sequence, 8),
        lambda: cache.fork(sequence, 0, 4),
        lambda: cache.room(sequence),
        lambda: cache.shared_tokens(sequence),
        lambda: cache.page_table([sequence]),
    ):
        with pytest.raises(ValueError, match=f"sequence {sequence} is unknown or was freed"):
            call()


def test_leaving_the_cache_by_an_error_ends_every_sequence(cache):
    with pytest.raises(ZeroDivisionError), cache:
        parent = cache.admit(4)
        cache.fork(parent, 4, 8)
        raise ZeroDivisionError
    assert cache.pages_used == 0


# ---- writing -----------------------------------------------------------------------------------
def test_write_stores_at_positions_and_skips_minus_one(cache):
    first, second = cache.admit(8), cache.admit(8)
    before = cache.values(0).clone()
    expected = torch.stack([contents(cache, first, 8), contents(cache, second, 8)])
    k, v = torch.randn(2, 2, 3, 3, 5)
    positions = torch.tensor([[5, -1, 0], [7, 6, -1]], dtype=torch.int32)
    cache.write_(1, k, v, [first, second], positions)
    for row in range(2):
        for t, position in enumerate(positions[row].tolist()):
            if position >= 0:
                expected[row, 0, 1, position] = k[row, :, t]
                expected[row, 1, 1, position] = v[row, :, t]
    assert torch.equal(torch.stack([contents(cache, first, 8), contents(cache, second, 8)]), expected)
    assert torch.equal(cache.values(0), before)


@pytest.mark.parametrize(
    ("position", "says"),
    [(3, "lie in 4..11"), (12, "there is room for 12"), (-2, "must be -1 or lie in")],
)
def test_writes_on_shared_pages_or_outside_are_refused(cache, position, says):
    parent = cache.admit(12)
    child = cache.fork(parent, 4, 12)
    before = cache.keys(0).clone()
    k = torch.randn(1, 3, 2, 5)
    for sequence in (parent, child):
        with pytest.raises(ValueError, match=says):
            cache.write_(0, k, k, [sequence], torch.tensor([[5, position]], dtype=torch.int32))
    assert torch.equal(cache.keys(0), before)


def test_a_page_is_writable_again_when_nobody_shares_it(cache):
    parent = cache.admit(4)
    cache.free(cache.fork(parent, 4, 8))
    k = torch.randn(1, 3, 1, 5)
    cache.write_(0, k, k, [parent], torch.zeros(1, 1, dtype=torch.int32))
    assert torch.equal(contents(cache, parent, 1)[0, 0, 0], k[0, :, 0])


# ---- what is refused ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"layers": 0}, ValueError, r"layers must lie in 1\.\."),
        ({"kv_heads": 0}, ValueError, "kv_heads"),
        ({"head_dim": 2.0}, TypeError, "head_dim must be an integer, got float"),
        ({"pages": 0}, ValueError, "pages"),
        ({"page_size": -4}, ValueError, "page_size"),
        ({"dtype": torch.int8}, TypeError, "dtype must be torch.float32"),
        ({"dtype": None}, TypeError, "dtype must be torch.float32"),
    ],
)
def test_bad_sizes_are_named(changed, error, says):
    sizes = {"layers": 1, "kv_heads": 1, "head_dim": 1, "pages": 1, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(error, match=says):
        BlockKVCache(**{**sizes, **changed})


K = torch.zeros(1, 3, 1, 5)
AT_0 = torch.zeros(1, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda cache: cache.admit(0), ValueError, r"tokens must lie in 1\.\."),
        (lambda cache: cache.admit("4"), TypeError, "tokens must be an integer, got str"),
        (lambda cache: cache.extend(0, -1), ValueError, "tokens"),
        (lambda cache: cache.fork(0, 9, 12), ValueError, r"prefix_tokens must lie in 0\.\.8, got 9"),
        (lambda cache: cache.fork(0, -1, 12), ValueError, "prefix_tokens"),
        (lambda cache: cache.fork(0, 6, 5), ValueError, r"tokens must lie in 6\.\."),
        (lambda cache: cache.fork(5, 0, 5), ValueError, "sequence 5 is unknown"),
        (lambda cache: cache.free(None), TypeError, "sequence must be an integer, got NoneType"),
        (lambda cache: cache.page_table([0.5]), TypeError, "each of sequences must be an integer"),
        (lambda cache: cache.keys(2), ValueError, r"layer must lie in 0\.\.1, got 2"),
        (lambda cache: cache.values(-1), ValueError, "layer"),
        (lambda cache: cache.write_(2, K, K, [0], AT_0), ValueError, "layer"),
        (lambda cache: cache.write_(0, K, K, [0, 0], AT_0), ValueError, "sequences must be distinct"),
        (lambda cache: cache.write_(0, K, K, [0], AT_0.long()), TypeError, "positions must be an int32"),
        (lambda cache: cache.write_(0, K, K, [0], AT_0[0]), ValueError, r"positions must be \[1, T\]"),
        (lambda cache: cache.write_(0, K, K, [9], AT_0), ValueError, "sequence 9 is unknown"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(cache, call, error, says):
    cache.admit(8)
    stored = cache.keys(0).clone()
    with pytest.raises(error, match=says):
        call(cache)
    assert (cache.pages_used, cache.room(0)) == (2, 8)
    assert torch.equal(cache.keys(0), stored)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_cache_is_not_copied(copied):
    with pytest.raises(TypeError, match="a BlockKVCache is not copied or pickled"):
        copied(BlockKVCache(1, 1, 8, pages=2, dtype=torch.float32, device="cpu"))


def test_layers_of_several_shapes():
    """Each layer has its own heads and width; forks copy what is in all of them."""
    cache = BlockKVCache(3, (2, 1, 2), (8, 16, 8), pages=4, page_size=4, dtype=torch.float32, device="cpu")
    assert [tuple(cache.keys(layer).shape) for layer in range(3)] == [
        (4, 4, 2, 8),
        (4, 4, 1, 16),
        (4, 4, 2, 8),
    ]
    parent, position = cache.admit(6), torch.arange(6, dtype=torch.int32)[None]
    written = {}
    for layer, (heads, width) in enumerate([(2, 8), (1, 16), (2, 8)]):
        written[layer] = torch.randn(2, 1, heads, 6, width)
        cache.write_(layer, *written[layer], [parent], position)
    child = cache.fork(parent, 6, 8)
    pages = cache.page_table([child])[0]
    for layer, (keys, values) in written.items():
        for stored, given in ((cache.keys(layer), keys), (cache.values(layer), values)):
            tokens = stored[pages].flatten(0, 1)[:6]
            assert torch.equal(tokens.transpose(0, 1), given[0])


def test_shapes_that_do_not_fit_the_layers():
    options = dict(pages=4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="kv_heads must be an integer or one for each of 3 layers, got 2"):
        BlockKVCache(3, (2, 1), 8, **options)
    with pytest.raises(ValueError, match="each of head_dim must lie in 1"):
        BlockKVCache(2, 2, (8, 0), **options)
    assert BlockKVCache(2, (2, 2), 8, **options).kv_heads == 2
