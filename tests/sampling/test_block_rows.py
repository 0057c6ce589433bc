"""A round of fixed shape over `BlockRows`, as a CUDA graph would hold it, gives the tokens of `dk.sample`."""

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels import BlockRows, advance_, cached_block_attention, commit_, kv_write_, linear_token_stats
from dllm_kernels.models.attention import VIEW_ONLY, enable_attention
from tests.sampling.tiny_models import EOS, MASK, prompts_of, tiny_model


class FixedView:
    """Q tokens of every row, live or not; shapes never change from round to round."""

    def __init__(self, rows, cache, table):
        self.rows, self.cache, self.table, self.layers = rows, cache, table, set()

    def attend(self, layer, query, key, value, scale, window):
        q, k, v = (
            t[0].unflatten(1, self.rows.query_positions.shape).transpose(0, 1) for t in (query, key, value)
        )
        pages = self.cache.keys(layer), self.cache.values(layer)
        output = cached_block_attention(
            q, k, v, *pages, self.table, self.rows.cache_spans,
            fresh_spans=self.rows.fresh_spans, q_lengths=self.rows.q_lengths, scale=scale,
        )  # fmt: skip
        kv_write_(*pages, k, v, self.table, self.rows.write_positions)
        return output.transpose(0, 1).flatten(1, 2)[None]


def decode(model, canvas, rows, *, rule, stop_ids, temperature=0.0, quota_total=None):
    """Rounds until every row is finished; returns how many."""
    batch, queries = rows.query_positions.shape
    cache = dk.BlockKVCache(2, 2, 16, pages=64, page_size=8, dtype=torch.float32, device="cpu")
    table = cache.page_table([cache.admit(canvas.shape[1]) for _ in range(batch)])
    view = FixedView(rows, cache, table)
    first = torch.arange(batch)[:, None]
    rounds = 0
    advance_(canvas, rows, mask_id=MASK, stop_ids=stop_ids, quota_total=quota_total)
    while not rows.finished.all():
        tokens = canvas.gather(1, rows.query_positions.long())
        hidden = model.base_model(
            input_ids=tokens.view(1, -1), position_ids=rows.query_positions.view(1, -1), use_cache=False,
            attention_mask=VIEW_ONLY, dllm_view=view,
        )[0][0]  # fmt: skip
        place = (rows.candidates - rows.cached[:, None]).clamp(0, queries - 1) + first * queries
        noise_ids = torch.stack(
            torch.broadcast_tensors(first.int(), rows.candidates, rows.step[:, None]), dim=-1
        ).flatten(0, 1)
        stats = linear_token_stats(
            hidden[place.flatten()], model.lm_head.weight, temperature=temperature, suppress_tokens=[MASK],
            noise_ids=noise_ids if temperature else None,
        )  # fmt: skip
        quota = rows.quota if rule.needs_quota else None
        commit_(canvas, rows.candidates, stats, rule, mask_id=MASK, quota=quota, step=rows.step)
        advance_(canvas, rows, mask_id=MASK, stop_ids=stop_ids, quota_total=quota_total)
        rounds += 1
    return rounds


RULES = {
    "one token per step": (dk.Rule.quota(), {}),
    "quota": (dk.Rule.quota(), dict(steps_per_block=3)),
    "threshold": (dk.Rule.threshold(0.3), dict(threshold=0.3)),
    "random confidence": (dk.Rule.quota(confidence="random"), dict(confidence="random", temperature=1.0)),
    "quota or threshold": (
        dk.Rule.quota_or_threshold(0.5),
        dict(rule="quota_or_threshold", threshold=0.5, steps_per_block=4),
    ),
}


@pytest.mark.parametrize("queries", [8, 16, 40])
@pytest.mark.parametrize("rule", RULES)
def test_rounds_of_fixed_shape_give_the_tokens_of_sample(rule, queries):
    model, prompts, new_tokens = tiny_model(), prompts_of(5, 30, 8, 1), 20
    rule, options = RULES[rule]
    expected = dk.sample(model, prompts, max_new_tokens=new_tokens, **options)

    ends = [-(-(len(prompt) + new_tokens) // 8) * 8 for prompt in prompts]
    canvas = torch.full((len(prompts), max(ends)), MASK)
    rows = BlockRows.empty(len(prompts), 8, queries, "cpu")
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        canvas[row, : len(prompt)] = torch.tensor(prompt)
        steps = options.get("steps_per_block", 0)
        rows.admit_(row, given=len(prompt), stop=len(prompt) + new_tokens, canvas_end=end, steps=steps)
    with enable_attention(model), torch.no_grad():
        rounds = decode(
            model, canvas, rows, rule=rule, stop_ids=[EOS], temperature=options.get("temperature", 0.0),
            quota_total=8 if rule.name == "quota_or_threshold" else None,
        )  # fmt: skip

    for row, prompt in enumerate(prompts):
        length = len(prompt) + int(expected.lengths[row])
        assert canvas[row, :length].tolist() == expected.sequences[row, :length].tolist()
    if queries == 40:  # every prompt fits a forward
        assert rounds == expected.forwards
