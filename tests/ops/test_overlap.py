"""Operators that write in place refuse memory that they would write and read, or write twice."""

import numpy as np
import pytest
import torch

import dllm_kernels as dk
from tests.ops.test_bad_input import OPS, calls

STORE = 4096  # bytes of memory that arguments are laid out in


def laid_out(value: torch.Tensor, store: torch.Tensor, offset: int) -> torch.Tensor:
    """`value` in `store` from byte `offset` on."""
    memory = store[offset : offset + value.numel() * value.element_size()]
    return memory.view(value.dtype).view(value.shape).copy_(value)


def loss_call() -> dict:
    return {
        "logits": torch.randn(4, 8), "targets": torch.zeros(4, dtype=torch.int64),
        "weights": torch.ones(4), "suppress_tokens": [],
    }  # fmt: skip


def advance_call() -> dict:
    rows = dk.BlockRows.empty(2, 4, 8, "cpu")
    for row in range(2):
        rows.admit_(row, given=0, stop=8, canvas_end=8)
    sizes = {"block_size": rows.block_size, "queries": rows.queries}
    return {"canvas": torch.full((2, 8), 9), "rows": rows.buffer, **sizes, "mask_id": 9}


CALLS = {
    name: call
    for name, call in calls().items()
    if name in ("commit_", "unmask_", "kv_write_", "attend_and_write_")
}
CALLS |= {"diffusion_cross_entropy_gradient_": loss_call(), "advance_": advance_call()}
SHOWN = {name: f"stats.{name}" for name in ("token", "prob", "margin", "entropy", "divergence")}


def tensors_of(operator: str) -> list[str]:
    return [name for name, value in CALLS[operator].items() if isinstance(value, torch.Tensor)]


def written(operator: str) -> list[str]:
    schema = getattr(OPS, operator).default._schema
    names = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return [name for name in names if name in CALLS[operator]]


PAIRS = [
    (operator, name, other)
    for operator in CALLS
    for name in written(operator)
    for other in tensors_of(operator)
    if name != other
]


@pytest.mark.parametrize("operator, name, other", PAIRS)
def test_what_is_written_shares_no_memory_with_another_argument(operator, name, other):
    call, store = dict(CALLS[operator]), torch.zeros(STORE, dtype=torch.uint8)
    place = call[name].numel() * call[name].element_size()
    place -= 8 if call[name].element_size() == 8 or call[other].element_size() == 8 else 4
    call[name] = laid_out(call[name], store, 0)
    call[other] = laid_out(call[other], store, place)  # they have one element in common
    before = store.clone()
    shown = [SHOWN.get(n, n) for n in (name, other)]
    first, second = shown if other not in written(operator) else sorted(shown, key=order(operator))
    text = f"{operator}: {first} is written and must not share memory with {second}"
    with pytest.raises(ValueError, match=text):
        getattr(OPS, operator)(**call)
    assert torch.equal(store, before)


def order(operator: str):
    names = written(operator)
    names = sorted(names, key=["canvas", "progress", "state"].index) if "canvas" in names else names
    return names.index


@pytest.mark.parametrize("operator", CALLS)
def test_arguments_side_by_side_in_one_buffer_are_taken(operator):
    """Every tensor of the call is a slice of one buffer; the results are those of tensors of their own."""
    call = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in CALLS[operator].items()}
    store, place, packed = torch.zeros(STORE, dtype=torch.uint8), 0, dict(call)
    for name in tensors_of(operator):
        packed[name] = laid_out(call[name], store, place)
        place += -(-call[name].numel() * call[name].element_size() // 8) * 8
    result, expected = getattr(OPS, operator)(**packed), getattr(OPS, operator)(**call)
    torch.testing.assert_close(result, expected)
    for name in tensors_of(operator):
        torch.testing.assert_close(packed[name], call[name], msg=name)


def test_caches_interleaved_in_one_buffer_are_taken():
    both = torch.zeros(3, 4, 2, 2, 8)  # [pages, page_size, K or V, heads, head_dim]
    k, v = torch.randn(2, 1, 2, 4, 8)
    table, positions = torch.tensor([[2, 0]]).int(), torch.arange(4)[None].int()
    dk.kv_write_(both[:, :, 0], both[:, :, 1], k, v, table, positions)
    assert torch.equal(both[2].permute(1, 2, 0, 3), torch.stack([k[0], v[0]]))


@pytest.mark.parametrize(
    "operator, change",
    [
        ("kv_write_", {"cache_v": torch.zeros(1, 4, 1, 8).expand(3, 4, 1, 8)}),
        ("kv_write_", {"cache_k": torch.zeros(3, 1, 1, 8).expand(3, 4, 1, 8)}),
        ("kv_write_", {"cache_k": torch.zeros(100).as_strided((3, 4, 1, 8), (16, 8, 8, 1))}),
        ("kv_write_", {"cache_k": torch.zeros(100).as_strided((3, 4, 1, 8), (9, 12, 8, 1))}),
        ("commit_", {"canvas": torch.full((6,), 9).expand(2, 6)}),
        ("commit_", {"canvas": torch.full((9,), 9).as_strided((2, 6), (3, 1))}),
        ("unmask_", {"canvas": torch.full((1, 6), 9).expand(2, 6)}),
        ("diffusion_cross_entropy_gradient_", {"logits": torch.randn(1, 8).expand(4, 8)}),
        ("diffusion_cross_entropy_gradient_", {"logits": torch.randn(32).as_strided((4, 8), (7, 1))}),
    ],
)
def test_what_is_written_does_not_overlap_itself(operator, change):
    call = CALLS[operator] | change
    if "canvas" in change:
        two = {"positions", "token", "prob", "margin", "entropy", "divergence", "logits", "progress", "step"}
        two |= {"sequence_ids", "block_start", "quota", "state"}
        call |= {n: v.repeat(2, *[1] * (v.dim() - 1)) for n, v in call.items() if n in two}
    (name,) = change
    with pytest.raises(ValueError, match=f"{operator}: {name} is written and must not overlap itself"):
        getattr(OPS, operator)(**call)


def test_overlap_is_found_exactly():
    """kv_write_ of two small caches of any strides, against numpy's exact solver."""
    draw, store = np.random.default_rng(0), torch.zeros(400)
    zero = torch.zeros(1, 1, dtype=torch.int32)
    verdicts = []
    for _ in range(300):
        caches = [
            store.as_strided(
                (3, 2, 1, 8),
                (8 * int(draw.integers(1, 9)) + int(draw.integers(4)), int(draw.integers(6, 40)), 8, 1),
                int(draw.integers(0, 200)),
            )
            for _ in range(2)
        ]
        overlaps = [len(np.unique(_addresses(cache))) < cache.numel() for cache in caches]
        verdicts.append(any(overlaps) or np.shares_memory(*(cache.numpy() for cache in caches)))
        call = (*caches, *torch.zeros(2, 1, 1, 1, 8), zero, zero)
        if verdicts[-1]:
            with pytest.raises(ValueError, match="is written and must not"):
                dk.kv_write_(*call)
        else:
            dk.kv_write_(*call)
    assert 30 < sum(verdicts) < 270


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    places = np.indices(tuple(tensor.shape)).reshape(tensor.dim(), -1)
    return tensor.storage_offset() + np.array(tensor.stride()) @ places


def test_the_public_functions_refuse_it_too():
    canvas = torch.full((1, 4), 9, dtype=torch.int32)
    stats = dk.TokenStats(torch.zeros(1, 4, dtype=torch.int64), *torch.rand(4, 1, 4))
    with pytest.raises(ValueError, match="canvas is written and must not share memory with positions"):
        dk.commit_(canvas, canvas, stats, dk.Rule.threshold(0.5), mask_id=9)
    rows = dk.BlockRows.empty(1, 4, 8, "cpu")
    rows.admit_(0, given=0, stop=4, canvas_end=4)
    with pytest.raises(ValueError, match="rows is written and must not share memory with canvas"):
        dk.advance_(rows.candidates, rows, mask_id=9)
