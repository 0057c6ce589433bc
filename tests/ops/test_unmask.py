"""unmask_: the step of a block, token_stats and commit_ in one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_kernels as dk
from tests.ops.commit_helpers import MASK, RULES

FLAT = (*dk.Rule.threshold(0.5).code, MASK)
ROW = torch.ones(2, dtype=torch.int32)


@given(
    batch=st.integers(1, 3),
    block=st.integers(1, 9),
    vocabulary=st.integers(3, 200),
    rule=st.sampled_from(RULES),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 2**32),
)
def test_unmask_is_token_stats_then_commit(batch, block, vocabulary, rule, temperature, seed):
    g = torch.Generator().manual_seed(seed)
    mask = vocabulary - 1
    logits = torch.randn(batch, block, vocabulary, generator=g)
    canvas = torch.randint(0, mask, (batch, block + 6), generator=g)
    canvas[torch.rand(canvas.shape, generator=g) < 0.6] = mask
    start = torch.randint(0, 7, (batch,), generator=g, dtype=torch.int32)
    step, sequence = torch.randint(0, 50, (2, batch), generator=g, dtype=torch.int32)
    positions = start[:, None] + torch.arange(block, dtype=torch.int32)
    noise_ids = torch.stack(
        [sequence[:, None].expand(-1, block), positions, step[:, None].expand(-1, block)], -1
    ).contiguous()
    quota = 2 if rule.needs_quota else None
    keyed = {"quota": quota, "step": step, "sequence_ids": sequence, "seed": seed, "mask_id": mask}

    expected = canvas.clone()
    stats = dk.token_stats(
        logits, temperature=temperature, seed=seed, noise_ids=noise_ids, suppress_tokens=[mask]
    )
    expected_accepted = dk.commit_(expected, positions, stats, rule, **keyed)
    accepted = dk.unmask_(
        canvas, logits, rule, block_start=start, block_size=block, temperature=temperature, **keyed
    )
    assert torch.equal(canvas, expected) and torch.equal(accepted, expected_accepted)


def test_a_model_that_predicts_only_the_mask_still_finishes():
    logits = torch.zeros(1, 4, 10)
    logits[..., 9] = 50.0
    canvas = torch.full((1, 4), 9)
    for _ in range(4):
        dk.unmask_(canvas, logits, dk.Rule.threshold(0.9), mask_id=9, block_start=0, block_size=4)
    assert canvas.tolist() == [[0, 0, 0, 0]]


def test_the_mask_may_stay_in_the_softmax():
    logits = torch.tensor([[[0.0, 3.0, 1.0]]])
    options = {"mask_id": 1, "block_start": 0, "block_size": 1}
    rule = dk.Rule.quota_or_threshold(0.5)
    for exclude, accepted in (([], True), ([1], False)):
        canvas = torch.tensor([[1]])
        got = dk.unmask_(canvas, logits, rule, quota=0, proposal_exclude=exclude, **options)
        assert got.item() is accepted


@pytest.mark.parametrize(
    "kwargs", [{}, {"progress": torch.zeros(2, 2, dtype=torch.int32), "temperature": 1.0}]
)
def test_opcheck_of_unmask(kwargs):
    args = (torch.full((2, 6), MASK), torch.randn(2, 4, 100), ROW, *FLAT)
    torch.library.opcheck(torch.ops.dllm_kernels.unmask_, args, kwargs)


def test_compiles_without_graph_breaks():
    def step(canvas, logits):
        accepted = dk.unmask_(
            canvas, logits * 2, dk.Rule.threshold(0.2), mask_id=9, block_start=1, block_size=3
        )
        return accepted.sum() + canvas.sum()

    for batch in (2, 3):
        canvas, logits = torch.full((batch, 5), 9), torch.randn(batch, 3, 10)
        eager = canvas.clone()
        expected = step(eager, logits)
        assert torch.equal(
            torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")(canvas, logits), expected
        )
        assert torch.equal(canvas, eager)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_start": 4}, r"block_start\[0\] must lie between 0 and 3, got 4"),
        ({"block_start": -1}, r"block_start\[0\] must lie between 0 and 3, got -1"),
        ({"block_size": 4}, "logits have 3 rows a block, block_size is 4"),
        ({"mask_id": 10}, "mask_id must lie between 0 and 9, got 10"),
        ({"suppress_tokens": range(10)}, "leave no token to propose"),
        ({"logits": torch.zeros(3, 10)}, r"logits must be \[batch, block_size, vocabulary\]"),
        ({"logits": torch.zeros(1, 3, 10)}, r"logits.shape\[0\] must be 2"),
        ({"rule": dk.Rule.edit(0.5, 0.9)}, "rule 'edit' must not list the prompt"),
        ({"rule": dk.Rule.confident_stable()}, r"use token_stats\(previous=...\) and commit_"),
        ({"precision": "float16"}, "precision is 'float16'"),
    ],
)
def test_bad_input_of_unmask_is_named(change, message):
    arguments = {
        "canvas": torch.full((2, 6), 9),
        "logits": torch.zeros(2, 3, 10),
        "rule": dk.Rule.threshold(0.5),
        "mask_id": 9,
        "block_start": 0,
        "block_size": 3,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        dk.unmask_(**arguments)
