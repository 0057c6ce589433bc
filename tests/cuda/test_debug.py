"""With DLLM_DEBUG=1 CUDA operators refuse what index tensors hold in the words of the CPU operators."""

import pytest
import torch

import dllm_kernels as dk

ops = torch.ops.dllm_kernels


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def spans_beyond_the_keys():
    q, spans = torch.zeros(1, 2, 3, 8), ints([[0, 3]], [[0, 4]], [[2, 1]])[None]
    return ops.block_attention, q, q, q, spans, 1.0


def cached(page_table, cache_spans, q_lengths):
    def call(q, cache, page_table, cache_spans, q_lengths):
        return dk.cached_block_attention(q, q, q, cache, cache, page_table, cache_spans, q_lengths=q_lengths)

    return call, torch.zeros(1, 1, 2, 8), torch.zeros(3, 4, 1, 8), page_table, cache_spans, q_lengths


def a_page_that_is_not_there():
    return cached(ints([0, 3]), ints([[0, 5]])[None], ints(2))


def overlapping_cache_spans():
    return cached(ints([0, 1]), ints([[0, 5], [4, 6]])[None], ints(2))


def too_many_queries():
    return cached(ints([0, 1]), ints([[0, 5]])[None], ints(3))


def a_position_without_a_slot():
    cache, k = torch.zeros(3, 4, 1, 8), torch.zeros(1, 1, 2, 8)
    return dk.kv_write_, cache, cache.clone(), k, k, ints([0, 1]), ints([0, 8])


def a_position_that_is_seen():
    def call(q, cache_k, cache_v, table, spans, positions):
        return dk.attend_and_write_(q, q, q, cache_k, cache_v, table, spans, positions=positions)

    caches = torch.zeros(2, 3, 4, 1, 8).unbind()
    return call, torch.zeros(1, 1, 2, 8), *caches, ints([0, 1]), ints([[0, 5]])[None], ints([5, 4])


def candidate_listed_twice():
    return commit(positions=ints([1, 1]), quota=ints(1))


def negative_quota():
    return commit(positions=ints([1, 2]), quota=ints(-1))


def commit(positions, quota):
    stats = dk.TokenStats(torch.zeros(1, 2, dtype=torch.int64), *torch.zeros(4, 1, 2))
    canvas = torch.full((1, 4), 5)

    def call(canvas, positions, quota, *fields):
        return dk.commit_(canvas, positions, dk.TokenStats(*fields), dk.Rule.quota(), mask_id=5, quota=quota)

    return call, canvas, positions, quota, *stats[:5]


def a_block_beyond_the_canvas():
    def call(canvas, logits, start):
        rule = dk.Rule.threshold(0.5)
        return dk.unmask_(canvas, logits, rule, mask_id=5, block_start=start, block_size=3)

    return call, torch.full((1, 4), 5), torch.zeros(1, 3, 10), ints(2)


def a_target_beyond_the_vocabulary():
    return dk.diffusion_cross_entropy, torch.zeros(2, 10), torch.tensor([99, 10]), torch.tensor([0.0, 1.0])


def a_row_beyond_its_canvas():
    def call(canvas, given):
        rows = dk.BlockRows.empty(1, 2, 2, canvas.device)
        rows.given.copy_(given)
        return dk.advance_(canvas, rows, mask_id=5)

    return call, torch.full((1, 4), 5), ints(5)


WRONG = [
    spans_beyond_the_keys,
    a_page_that_is_not_there,
    overlapping_cache_spans,
    too_many_queries,
    a_position_without_a_slot,
    a_position_that_is_seen,
    candidate_listed_twice,
    negative_quota,
    a_block_beyond_the_canvas,
    a_target_beyond_the_vocabulary,
    a_row_beyond_its_canvas,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_contents_are_refused_as_on_the_cpu(gpu, monkeypatch, wrong):
    function, *arguments = wrong()
    with pytest.raises(ValueError) as on_cpu:
        function(*arguments)
    monkeypatch.setenv("DLLM_DEBUG", "1")
    with pytest.raises(ValueError) as on_gpu:
        gpu(function, *arguments)
    assert str(on_gpu.value) == str(on_cpu.value)


@pytest.mark.parametrize("wrong", WRONG)
def test_contents_are_cut_otherwise(gpu, wrong):
    """Everything is computed from what there is; only a loss without its target is not a number."""
    function, *arguments = wrong()
    result = gpu(function, *arguments)
    output = result[0] if isinstance(result, tuple) else result
    if output is not None:
        assert bool(output.isfinite().all()) == (wrong is not a_target_beyond_the_vocabulary)
    assert all(argument.isfinite().all() for argument in arguments if isinstance(argument, torch.Tensor))
