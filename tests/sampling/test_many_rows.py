"""Two hundred prompts through eight rows: the tokens of each are those it has alone."""

import torch

import dllm_kernels as dk
from dllm_kernels.sampling import plain_loop
from tests.sampling.tiny_models import EOS, prompts_of, tiny_model


def test_two_hundred_prompts_through_eight_rows(record_property):
    model = tiny_model()
    lengths = torch.randint(1, 41, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = prompts_of(*lengths)
    options = dict(max_new_tokens=13, block_size=8, threshold=0.25, max_batch=8)
    config = dk.SampleConfig(eos_ids=(EOS, 5, 17), **options)
    together = dk.sample(model, prompts, config=config)
    differing = []
    for row, prompt in enumerate(prompts):
        alone = dk.sample(model, [prompt], config=config)
        kept = slice(0, len(prompt) + 13)
        same = torch.equal(together.sequences[row, kept], alone.sequences[0, kept])
        same &= int(together.row_forwards[row]) == int(alone.row_forwards[0])
        if not same:
            differing.append(row)
    record_property("rows decided by rounding", differing)
    assert all(plain_loop.sample_row(model, prompts[row], config).near_ties for row in differing)
    assert together.lengths.min() < 13, "some rows end early and make room"
