"""Decoding metrics, counted by hand."""

import pytest
import torch

import dllm_kernels as dk
from dllm_train.evaluate.metrics import area_under, decoding_metrics, tokens_per_second

VOCABULARY, END, MASK = 20, 18, 19


def writes(*tokens):
    """A model that is sure of `tokens` behind a prompt of two, and of the end token after them."""

    def logits(ids):
        wanted = torch.full(ids.shape, END)
        wanted[:, 2 : 2 + len(tokens)] = torch.tensor(tokens)
        return 50.0 * torch.nn.functional.one_hot(wanted, VOCABULARY)

    return logits


def sampled(model, prompts=1, **options):
    return dk.sample(
        model, [[1, 2]] * prompts, mask_id=MASK, eos_ids=(END,), max_new_tokens=8, block_size=4, **options
    )


def test_neither_the_prompt_nor_the_tail_of_end_tokens_counts():
    output = sampled(writes(3, 4, 5, 6, 7))
    found = decoding_metrics([output])
    # A token per step: five tokens, then blocks of four until the end token.
    assert (found.tokens, found.forwards) == (5, output.forwards)
    assert found.tokens_per_forward == 5 / output.forwards and found.tokens_per_second is None


def test_all_requests_count_together():
    outputs = [sampled(writes(3, 4, 5), threshold=0.9), sampled(writes(3, 4, 5, 6, 7, 8), threshold=0.9)]
    found = decoding_metrics(outputs)
    # One forward fills the first block of four, another one the second.
    assert (found.tokens, found.forwards, found.tokens_per_forward) == (9, 3, 3.0)


def test_rows_of_a_batch_have_forwards_of_their_own():
    together = decoding_metrics([sampled(writes(3, 4, 5), prompts=3, threshold=0.9)])
    assert (together.tokens, together.forwards) == (9, 3)


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_an_output_counts_its_tokens_per_forward_alike(threshold):
    output = sampled(writes(3, 4, 5, 6, 7), prompts=2, threshold=threshold)
    assert output.tokens_per_forward == decoding_metrics([output]).tokens_per_forward


def test_speed_is_the_median_of_whole_requests():
    outputs = [sampled(writes(3, 4, 5), threshold=0.9)] * 3
    assert decoding_metrics(outputs, [0.5, 1.0, 60.0]).tokens_per_second == 3.0


def test_speed_is_of_one_request_at_a_time():
    with pytest.raises(ValueError, match=r"outputs\[0\] has 2 rows, which share their time"):
        tokens_per_second([sampled(writes(3), prompts=2)], [1.0])
    with pytest.raises(ValueError, match="latencies has 2 entries for 1 outputs"):
        tokens_per_second([sampled(writes(3))], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"latencies\[0\] is 0.0; expected seconds above 0"):
        tokens_per_second([sampled(writes(3))], [0.0])
    with pytest.raises(ValueError, match="outputs is empty"):
        decoding_metrics([])


def test_the_area_is_under_the_accuracy_at_a_speed_or_a_higher_one():
    assert area_under([(2.0, 0.5)]) == 1.0
    assert area_under([(1.0, 1.0), (3.0, 0.5)]) == 1.0 + 2 * 0.5
    assert area_under([(3.0, 0.5), (1.0, 1.0), (2.0, 0.4)]) == 2.0  # the last is beaten in both
    assert area_under([(1.0, 0.2), (3.0, 0.5)]) == 1.5
