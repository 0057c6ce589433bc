"""Every operator refuses wrong devices, sizes that overflow, wrong types and empty tensors.

Shapes and dtypes have their tests beside each operator.
"""

import pytest
import torch

import dllm_kernels as dk

# The modules that register fake kernels load with their functions.
LOADED = dk.block_attention, dk.kv_write_, dk.attend_and_write_, dk.token_stats, dk.commit_
LOADED += dk.rms_norm, dk.silu_mul, dk.rotate_half, dk.skinny_linear
OPS = torch.ops.dllm_kernels
HUGE = 2**31


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def calls() -> dict[str, dict]:
    """A good call of every operator, by argument name, with every optional tensor."""
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)
    cache, per_row = torch.randn(2, 3, 4, 1, 8), int32(1)
    rule = {"strict": False, "confidence": 0, "alg_temp": 0.0, "mask_id": 9}
    keyed = {"step": per_row, "sequence_ids": per_row, "progress": int32(1, 2)}
    masks, statistics = torch.full((1, 6), 9), torch.rand(4, 1, 4)
    return {
        "token_stats": {"logits": torch.randn(2, 5), "noise_ids": int32(2, 3), "temperature": 1.0},
        "token_divergence": {"logits": torch.randn(2, 5), "previous": torch.randn(2, 5)},
        "linear_token_stats": {
            "hidden": torch.randn(2, 3), "weight": torch.randn(5, 3), "bias": torch.randn(5),
            "noise_ids": int32(2, 3),
        },
        "skinny_linear": {
            "x": torch.randn(2, 3), "weight": torch.ones(5, 3, dtype=torch.int8), "bias": torch.randn(5),
            "scales": torch.rand(5, 1),
        },
        "rms_norm": {"x": torch.randn(2, 3), "weight": torch.randn(3), "eps": 1e-5},
        "add_rms_norm": {
            "x": torch.randn(2, 3), "residual": torch.randn(2, 3), "weight": torch.randn(3), "eps": 1e-5,
        },
        "silu_mul": {"gate": torch.randn(2, 3), "up": torch.randn(2, 3)},
        "rotate_half": {
            "query": q, "key": k, "cos": torch.randn(1, 4, 8), "sin": torch.randn(1, 4, 8),
        },
        "block_attention": {"q": q, "k": k, "v": k, "spans": int32(1, 4, 1, 2), "scale": 1.0},
        "cached_block_attention": {
            "q": q, "k": k, "v": k, "cache_k": cache[0], "cache_v": cache[1], "page_table": int32(1, 2),
            "cache_spans": int32(1, 1, 1, 2), "fresh_spans": int32(1, 4, 1, 2), "q_lengths": per_row,
            "scale": 1.0, "plan": int32(0),
        },
        "cached_attention_plan": {
            "q": q, "k": k, "cache_k": cache[0], "page_table": int32(1, 2), "cache_spans": int32(1, 1, 1, 2),
            "q_lengths": per_row,
        },
        "attend_and_write_": {
            "q": q, "k": k, "v": k, "cache_k": cache[0].clone(), "cache_v": cache[1].clone(),
            "page_table": int32(1, 2), "cache_spans": int32(1, 1, 1, 2), "cos": torch.randn(1, 4, 8),
            "sin": torch.randn(1, 4, 8), "positions": torch.arange(4, dtype=torch.int32)[None],
            "fresh_spans": int32(1, 4, 1, 2), "q_lengths": per_row, "scale": 1.0,
        },
        "kv_write_": {
            "cache_k": cache[0], "cache_v": cache[1], "k": k, "v": k, "page_table": int32(1, 2),
            "positions": torch.arange(4, dtype=torch.int32)[None],
        },
        "commit_": {
            "canvas": masks, "positions": torch.arange(4, dtype=torch.int32)[None],
            "token": torch.zeros(1, 4, dtype=torch.int64), "prob": statistics[0], "margin": statistics[1],
            "entropy": statistics[2], "rule": 6, "parameters": [0.5, 0.1, 2.0], **rule,
            **keyed, "divergence": statistics[3], "state": int32(1, 6),
        },
        "unmask_": {
            "canvas": masks, "logits": torch.randn(1, 4, 12), "block_start": per_row, "rule": 0,
            "parameters": [], **rule, **keyed, "quota": per_row,
        },
    }  # fmt: skip


def changed(operator: str, **arguments):
    return getattr(OPS, operator)(**{**calls()[operator], **arguments})


@pytest.mark.parametrize("operator", calls())
def test_the_good_calls_are_good(operator):
    """The calls below are refused for the one argument that was changed."""
    call = calls()[operator]
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    results = getattr(OPS, operator)(**call)
    if operator.endswith("_"):  # it writes in place
        assert any(not torch.equal(call[name], value) for name, value in before.items())
    if results is not None:
        results = results if isinstance(results, tuple | list) else [results]
        planned = operator == "cached_attention_plan"  # on a CPU there is nothing to plan
        assert all(bool(result.numel()) != planned and not result.isnan().any() for result in results)


@pytest.mark.parametrize(
    "operator, name",
    [
        (operator, name)
        for operator, call in calls().items()
        for name in [name for name, value in call.items() if isinstance(value, torch.Tensor)][1:]
    ],
)
def test_a_tensor_on_another_device_is_named(operator, name):
    meta = calls()[operator][name].to("meta")
    with pytest.raises(
        ValueError, match=rf"{operator}: {name} must be on the device of .* \(cpu\), got meta"
    ):
        changed(operator, **{name: meta})


def expanded(*shape, dtype=torch.float32):
    """A tensor of any size in a few bytes."""
    return torch.zeros((*[1] * (len(shape) - 1), shape[-1] if shape[-1] < 100 else 1), dtype=dtype).expand(
        shape
    )


def huge_heads(batch=1, heads=1, length=4):
    return expanded(batch, heads, length, 8)


HUGE_CALLS = [
    ("token_stats", {"logits": expanded(HUGE, 5)}, "the rows of logits must be between 0"),
    ("token_stats", {"logits": expanded(2, HUGE)}, "logits must have a vocabulary of 1 to 2"),
    ("block_attention", {"q": huge_heads(heads=2, length=HUGE)}, "every size of q must be between 0"),
    ("block_attention", {"q": huge_heads(heads=HUGE)}, "every size of q must be between 0"),
    (
        "block_attention",
        {"q": huge_heads(heads=2**16, length=2**15)},
        "queries times heads of q must be between",
    ),
    (
        "block_attention",
        {"k": huge_heads(length=HUGE), "v": huge_heads(length=HUGE)},
        "every size of k must be between 0 and 2147483647, got 2147483648",
    ),
    (
        "block_attention",
        {"spans": expanded(1, 4, HUGE, 2, dtype=torch.int32)},
        r"spans.shape\[2\] must be between 0 and 2147483647, got 2147483648",
    ),
    (
        "cached_block_attention",
        {"cache_k": huge_heads(HUGE, 4, 1), "cache_v": huge_heads(HUGE, 4, 1)},
        r"cache_k.shape\[0\] must be between 0",
    ),
    (
        "cached_block_attention",
        {"page_table": expanded(1, 2**62, dtype=torch.int32)},
        r"page_table.shape\[1\] must be between 0",
    ),
    (
        "cached_block_attention",
        {"page_table": expanded(1, 2**29, dtype=torch.int32)},
        r"page_table.shape\[1\] times page_size must be between 0",
    ),
    (
        "kv_write_",
        {
            "k": huge_heads(length=HUGE),
            "v": huge_heads(length=HUGE),
            "positions": expanded(1, HUGE, dtype=torch.int32),
        },
        "every size of k must be between 0",
    ),
    ("commit_", {"canvas": expanded(1, HUGE, dtype=torch.int64)}, "the length of canvas must be between 0"),
    ("commit_", {"canvas": expanded(HUGE, 6, dtype=torch.int64)}, "the rows of canvas must be between 0"),
    (
        "commit_",
        {"positions": expanded(1, HUGE, dtype=torch.int32)},
        "the positions of a row must be between 0",
    ),
    ("commit_", {"mask_id": HUGE}, "mask_id must be between 0 and 2147483647, got 2147483648"),
    ("unmask_", {"logits": expanded(1, 4, HUGE)}, r"logits must have a vocabulary of 1 to 2\^30 ids"),
    ("unmask_", {"logits": expanded(1, HUGE, 12)}, r"the block of logits \(2147483648\) must not be longer"),
]


@pytest.mark.parametrize("operator, arguments, message", HUGE_CALLS)
def test_sizes_beyond_32_bits_are_named_before_anything_is_read(operator, arguments, message):
    with pytest.raises(ValueError, match=f"{operator}: {message}"):
        changed(operator, **arguments)


@pytest.mark.parametrize("operator", ["block_attention", "cached_block_attention"])
def test_queries_need_a_head(operator):
    with pytest.raises(ValueError, match=r"q must have at least one head, got shape \[1, 0, 4, 8\]"):
        changed(operator, q=torch.zeros(1, 0, 4, 8))


def test_empty_calls_do_nothing():
    none = int32(0)
    out, lse = OPS.block_attention(torch.zeros(2, 2, 0, 8), *torch.zeros(2, 2, 1, 3, 8), None, 1.0)
    assert out.shape == (2, 2, 0, 8) and lse.shape == (2, 2, 0)
    out, lse = OPS.block_attention(torch.ones(2, 2, 3, 8), *torch.zeros(2, 2, 1, 0, 8), None, 1.0)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
    kv = torch.zeros(1, 1, 0, 8)
    changed("kv_write_", k=kv, v=kv, positions=int32(1, 0), page_table=int32(1, 0))
    fields = {name: torch.zeros(1, 0) for name in ("prob", "margin", "entropy", "divergence")}
    empty = {"positions": int32(1, 0), "token": torch.zeros(1, 0, dtype=torch.int64), **fields}
    progress = torch.full((1, 2), 7, dtype=torch.int32)
    assert changed("commit_", **empty, progress=progress).shape == (1, 0) and progress.tolist() == [[0, 0]]
    assert changed("unmask_", logits=torch.zeros(1, 0, 12)).shape == (1, 0)
    rows = {"block_start": none, "step": none, "sequence_ids": none, "quota": none, "progress": int32(0, 2)}
    canvas = torch.zeros(0, 6, dtype=torch.int64)
    assert changed("unmask_", canvas=canvas, logits=torch.zeros(0, 4, 12), **rows).shape == (0, 4)


LOGITS = torch.randn(2, 5)
Q, K = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)
CACHED = (Q, K, K, torch.zeros(3, 4, 1, 8), torch.zeros(3, 4, 1, 8), int32(1, 2), int32(1, 1, 1, 2))
STATS = dk.TokenStats(torch.zeros(1, 4, dtype=torch.int64), *torch.rand(4, 1, 4))


def commit(**arguments):
    given = {
        "rule": dk.Rule.quota(),
        "canvas": torch.full((1, 6), 9),
        "positions": int32(1, 4),
        "stats": STATS,
        "mask_id": 9,
        "quota": 1,
    }
    return dk.commit_(**{**given, **arguments})


def unmask(**arguments):
    given = {"canvas": torch.full((1, 6), 9), "logits": torch.randn(1, 4, 12), "rule": dk.Rule.quota()}
    given |= {"mask_id": 9, "block_start": 0, "block_size": 4, "quota": 1}
    return dk.unmask_(**{**given, **arguments})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dk.block_attention(Q.tolist(), K, K), "q must be a Tensor, got list"),
        (lambda: dk.block_attention(Q, K, K, scale="1"), "scale must be a number, got str"),
        (
            lambda: dk.cached_block_attention(*CACHED, fresh_spans=3),
            "fresh_spans must be a Tensor or None, got int",
        ),
        (
            lambda: dk.cached_block_attention(*CACHED, q_lengths=[4]),
            "q_lengths must be a Tensor or None, got list",
        ),
        (lambda: dk.kv_write_(*CACHED[3:5], K, None, *CACHED[5:]), "v must be a Tensor, got NoneType"),
        (lambda: commit(canvas=[[9]]), "canvas must be a Tensor, got list"),
        (lambda: commit(positions=[[0]]), "positions must be a Tensor, got list"),
        (lambda: commit(stats=tuple(STATS)), "stats must be the TokenStats of token_stats, got tuple"),
        (lambda: commit(rule="quota"), "rule must be a dk.Rule, got str"),
        (lambda: commit(quota=1.5), "quota must be an integer, got float"),
        (lambda: commit(quota=True), "quota must be an integer, got bool"),
        (lambda: commit(mask_id=9.0), "mask_id must be an integer, got float"),
        (lambda: commit(step="1"), "step must be an integer, got str"),
        (lambda: commit(seed=0.5), "seed must be an integer, got float"),
        (lambda: commit(sequence_ids=3), "sequence_ids must be a Tensor or None, got int"),
        (lambda: commit(state=[0]), "state must be a Tensor or None, got list"),
        (lambda: commit(progress=[0, 0]), "progress must be a Tensor or None, got list"),
        (lambda: unmask(logits=[1.0]), "logits must be a Tensor, got list"),
        (lambda: unmask(block_start=0.5), "block_start must be an integer, got float"),
        (lambda: unmask(rule=None), "rule must be a dk.Rule, got NoneType"),
        (lambda: unmask(temperature="hot"), "temperature must be a number, got str"),
        (lambda: dk.token_stats([1.0]), "logits must be a Tensor, got list"),
        (
            lambda: dk.token_stats(LOGITS, noise_ids=[[0, 0, 0]]),
            "noise_ids must be a Tensor or None, got list",
        ),
        (lambda: dk.token_stats(LOGITS, seed=1.5), "seed must be an integer, got float"),
        (
            lambda: dk.token_stats(LOGITS, suppress_tokens=3),
            "suppress_tokens must be a sequence of integers, got int",
        ),
        (
            lambda: dk.token_stats(LOGITS, proposal_exclude=[0.5]),
            "proposal_exclude must be an integer, got float",
        ),
        (
            lambda: dk.token_stats(LOGITS, confidence_exclude="12"),
            "confidence_exclude must be a sequence of integers",
        ),
        (lambda: dk.token_stats(LOGITS, top_k=2.5), "top_k must be an integer, got float"),
        (lambda: dk.token_stats(LOGITS, top_p="0.9"), "top_p must be a number, got str"),
    ],
)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: commit(quota=HUGE), "quota must lie in -2147483647..2147483647, got 2147483648"),
        (lambda: dk.token_stats(LOGITS, seed=2**63), "seed must lie in .*, got 9223372036854775808"),
        (
            lambda: dk.token_stats(LOGITS, temperature=1e300),
            r"temperature must be a finite number >= 0, got 1e\+300",
        ),
        (
            lambda: dk.token_stats(LOGITS, confidence_temperature=1e-300),
            "inverse must lie within the range of float32",
        ),
        (
            lambda: dk.token_stats(LOGITS, confidence_temperature=1e300),
            "inverse must lie within the range of float32",
        ),
        (lambda: commit(seed=2**64), "seed must lie in .*, got 18446744073709551616"),
        (lambda: unmask(block_start=HUGE), "block_start must lie in .*, got 2147483648"),
    ],
)
def test_numbers_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
