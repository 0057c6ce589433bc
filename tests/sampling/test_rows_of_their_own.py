"""Each row may have a length and a noise of its own: its tokens are those it has alone."""

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling import api
from tests.sampling.tiny_models import MASK, prompts_of, tiny_model

LENGTHS, IDS = [5, 19, 1, 8], [70, 3, 2**31 - 1, 0]
NOISY = dict(block_size=8, threshold=0.3, temperature=0.8, seed=5)
KINDS = {"block": "block_causal", "none": "bidirectional", "dual": "bidirectional"}


@pytest.fixture(params=["host", "device"])
def rounds(request, monkeypatch):
    """The loop that the host steers, and those whose steps are graphs."""
    if request.param == "device":
        monkeypatch.setattr(api, "_may_record", lambda plan, _: True)


@pytest.mark.parametrize("cache", KINDS)
def test_completions(cache, rounds):
    model, prompts = tiny_model(attention=KINDS[cache]), prompts_of(3, 9, 14, 30)
    options = NOISY | dict(cache=cache, max_batch=2)
    together = dk.sample(model, prompts, new_tokens=LENGTHS, row_ids=IDS, **options)
    for row, (prompt, length, number) in enumerate(zip(prompts, LENGTHS, IDS, strict=True)):
        alone = dk.sample(model, [prompt], max_new_tokens=length, row_ids=[number], **options)
        assert torch.equal(together.sequences[row, : len(prompt) + length], alone.sequences[0])
        assert together.lengths[row] == alone.lengths[0] <= length


@pytest.mark.parametrize("cache", KINDS)
def test_drawn_quotas(cache, rounds):
    model, prompts = tiny_model(attention=KINDS[cache]), prompts_of(9, 9)
    options = dict(
        cache=cache,
        block_size=8,
        max_new_tokens=16,
        steps_per_block=5,
        schedule="dllm",
        stochastic=True,
        seed=3,
    )
    together = dk.sample(model, prompts, row_ids=[8, 5], **options)
    alone = dk.sample(model, prompts[1:], row_ids=[5], **options)
    assert torch.equal(together.unmask_step[1], alone.unmask_step[0])


def test_infilling():
    model = tiny_model(attention="bidirectional")
    canvases = [[*prompt, *[MASK] * 5, 1, 2] for prompt in prompts_of(3, 9)]
    together = dk.infill(model, canvases, row_ids=[8, 5], **NOISY)
    alone = dk.infill(model, canvases[1:], row_ids=[5], **NOISY)
    assert torch.equal(together.sequences[1], alone.sequences[0])
    other = dk.infill(model, canvases[1:], row_ids=[6], **NOISY)
    assert not torch.equal(other.sequences, alone.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(new_tokens=[4]), "new_tokens has 1 entries for 2 rows"),
        (dict(new_tokens=[4, 0]), r"new_tokens\[1\] must lie in 1"),
        (dict(row_ids=[0, 2**31]), r"row_ids\[1\] must lie in 0"),
        (dict(row_ids="12"), "row_ids is a str"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        dk.sample(tiny_model(), prompts_of(3, 9), **options)
