"""torch.compile over a block that uses the operators together: one graph, whatever the lengths and masks."""

import pytest
import torch
import torch.nn.functional as F

import dllm_kernels as dk

HEADS, HEAD_DIM, VOCABULARY, MASK_ID = 4, 16, 50, 49
WIDTH = HEADS * HEAD_DIM


class Block(torch.nn.Module):
    """Attention, projection and head of a diffusion model."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)

    def hidden(self, ids, spans):
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        attended = dk.block_attention(q, k, v, dk.SpanMask(spans, ids.shape[1]))
        return x + F.gelu(self.out(attended.transpose(1, 2).flatten(2)))

    def loss(self, ids, spans, targets, weights):
        return dk.linear_diffusion_cross_entropy(self.hidden(ids, spans), self.embed.weight, targets, weights)

    def step(self, ids, spans, positions):
        """Denoises `positions` [B, C] once, in place; returns what was accepted."""
        hidden = self.hidden(ids, spans)
        candidates = hidden.gather(1, positions.long()[..., None].expand(-1, -1, WIDTH))
        stats = dk.linear_token_stats(
            candidates.flatten(0, 1), self.embed.weight, suppress_tokens=[MASK_ID], temperature=0.5, seed=1
        )
        return dk.commit_(ids, positions, stats, dk.Rule.threshold(0.1), mask_id=MASK_ID)


def cases():
    """(ids, spans) of several lengths, under masks of other contents and the same shape."""
    torch.manual_seed(0)
    for length in (24, 40, 56):
        ids = torch.randint(0, MASK_ID, (2, length))
        ids[:, ::3] = MASK_ID
        for block in (8, 4):
            yield ids, dk.SpanMask.block_causal(length, block).spans


@pytest.fixture
def block():
    torch.compiler.reset()
    yield Block()
    torch.compiler.reset()


def assert_compiled_once(function, *more):
    """`function` compiled gives what it gives eagerly, on all cases and without a second compilation."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, (ids, spans) in enumerate(cases()):
        arguments = [make(ids) for make in more]
        mine, plain = ids.clone(), ids.clone()
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = compiled(mine, spans, *arguments)
        torch.testing.assert_close(got, function(plain, spans, *arguments))
        assert torch.equal(mine, plain)
        yield ids, mine


def test_a_training_step_is_one_graph(block):
    runs = assert_compiled_once(
        block.loss, lambda ids: ids.clamp(max=MASK_ID - 1), lambda ids: (ids == MASK_ID).float()
    )
    assert len(list(runs)) == 6


def test_a_denoising_step_is_one_graph(block):
    def positions(ids):
        return torch.arange(0, ids.shape[1], 3, dtype=torch.int32).repeat(2, 1)

    with torch.no_grad():
        for before, after in assert_compiled_once(block.step, positions):
            assert (after == MASK_ID).sum() < (before == MASK_ID).sum()
