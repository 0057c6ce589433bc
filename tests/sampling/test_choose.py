"""`dk.choose` beside plain forwards of the model over a canvas of prompt and masks."""

import pytest
import torch

import dllm_kernels as dk
from tests.sampling.test_output import Letters, writer
from tests.sampling.tiny_models import MASK, VOCABULARY, prompts_of, tiny_model


def log_softmax(logits: torch.Tensor, barred=(MASK,)) -> torch.Tensor:
    logits = logits.detach().double()
    logits[..., list(barred)] = -torch.inf
    return logits.log_softmax(-1)


def plain(model, prompt, target, block_size=None, shift=False, barred=(MASK,)) -> float:
    """Σ log p of `target` behind `prompt`; block_size: its blocks one after another, None: all at once."""
    total, done = 0.0, 0
    while done < len(target):
        before = [*prompt, *target[:done]]
        masks = len(target) if block_size is None else block_size - len(before) % block_size
        logits = model(torch.tensor([[*before, *[MASK] * masks]])).logits[0]
        for offset, token in enumerate(target[done : done + masks]):
            total += float(log_softmax(logits[len(before) + offset - shift], barred)[token])
        done += masks
    return total


CHOICES = [[3], [5], [3, 9], [7, 7, 8, 2, 1, 0, 11, 40, 3, 60], [3]]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
@pytest.mark.parametrize("length", [1, 5, 8, 16])
def test_choices_have_the_probabilities_of_plain_forwards(attention, shift, length):
    model = tiny_model(attention=attention)
    (prompt,) = prompts_of(length)
    found = dk.choose(model, prompt, CHOICES, shift=shift)
    size = 8 if attention == "block_causal" else None
    expected = torch.tensor([plain(model, prompt, choice, size, shift) for choice in CHOICES])
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.probabilities, expected.softmax(0), rtol=0, atol=1e-4)
    assert (found.forwards, found.tokens, found.best) == (1, CHOICES, int(expected.argmax()))


def test_means_compare_choices_of_unequal_length_by_token():
    model = tiny_model()
    (prompt,) = prompts_of(6)
    found = dk.choose(model, prompt, [[3], [3, 9]], normalize="mean")
    means = torch.stack([found.logprobs[0], found.logprobs[1] / 2])
    torch.testing.assert_close(found.probabilities, means.softmax(0))
    assert found.logprobs.equal(dk.choose(model, prompt, [[3], [3, 9]]).logprobs)


def test_a_choice_of_one_token_has_the_probability_that_sampling_gives_it():
    model = tiny_model()
    (prompt,) = prompts_of(6)
    output = dk.sample(model, [prompt], max_new_tokens=2, logprobs=5, confidence="random", threshold=0.0)
    tokens, logprobs = (field[0, 6] for field in output.top_logprobs)
    found = dk.choose(model, prompt, [[int(token)] for token in tokens])
    torch.testing.assert_close(found.logprobs, logprobs, rtol=0, atol=1e-5)


def test_guidance_and_suppressed_tokens_count():
    model = tiny_model(attention="bidirectional")
    (prompt,) = prompts_of(5)
    canvas = torch.tensor([[*prompt, MASK]])
    conditional, blind = (model(ids).logits[0, 5] for ids in (canvas, torch.full_like(canvas, MASK)))
    guided = log_softmax(blind + 2.5 * (conditional - blind), (MASK, 4))
    found = dk.choose(model, prompt, [[3], [9]], cfg_scale=1.5, suppress_tokens=(4,))
    torch.testing.assert_close(found.logprobs.double(), guided[[3, 9]], rtol=0, atol=1e-3)


def test_texts_are_tokenized_behind_the_prompt():
    found = dk.choose(writer("abcd"), "ab", ["c", "d", "cd"], tokenizer=Letters())
    assert found.tokens == [[2], [3], [2, 3]]
    assert found.best == 0 and float(found.probabilities.sum()) == pytest.approx(1)


class Pairs(Letters):
    """Letters, but "xy" is one token, 30."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [30 if t == "#" else ord(t) - 97 for t in text.replace("xy", "#")]}


def test_a_token_over_the_border_of_prompt_and_choice_belongs_to_the_choice():
    seen = []

    def model(ids):
        seen.append(ids.tolist())
        return torch.zeros(*ids.shape, VOCABULARY)

    found = dk.choose(model, "ax", ["y", "b"], tokenizer=Pairs(), mask_id=MASK)
    assert found.tokens == [[30], [1]]
    assert sorted(row for batch in seen for row in batch) == [[0, 23, MASK], [0, MASK]]


def test_rows_whose_positions_depend_on_their_length_are_predicted_as_alone():
    model = tiny_model.__wrapped__(
        "llama", "bidirectional", max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
    )  # fmt: skip
    (prompt,) = prompts_of(6)
    choices = [[3], [5, 6, 7, 8, 9], [3] * 9]
    together = dk.choose(model, prompt, choices)
    alone = [dk.choose(model, prompt, [choice]).logprobs[0] for choice in choices]
    torch.testing.assert_close(together.logprobs, torch.stack(alone), rtol=0, atol=1e-5)
    assert together.forwards > 1


def test_a_chat_template_comes_before_the_choices():
    _, tokenizer = dk.load("tiny-python")
    tokenizer.chat_template = "{% for m in messages %}# {{ m.content }}\n{% endfor %}"
    model, _ = dk.load("tiny-python")
    chat = dk.choose(model, "add", ["def", "class"], tokenizer=tokenizer, chat=True)
    text = dk.choose(model, "# add\n", ["def", "class"], tokenizer=tokenizer)
    torch.testing.assert_close(chat.logprobs, text.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "prompt, choices, options, error, says",
    [
        ([1, 2], [], {}, ValueError, "choices is empty"),
        ([1, 2], "ab", {}, TypeError, "choices is a str"),
        ([1, 2], [[]], {}, ValueError, r"choices\[0\] has no tokens"),
        ([1, 2], [[VOCABULARY]], {}, ValueError, r"choices\[0\] holds id 120"),
        ([1, 2], [[MASK]], {}, ValueError, r"choices\[0\] holds 119, which is never proposed"),
        ([1, 2], [[4]], dict(suppress_tokens=(4,)), ValueError, "never proposed"),
        ([1, 2], [3], {}, TypeError, r"choices\[0\] is a int"),
        ([1, 2], ["a"], {}, ValueError, "needs tokenizer="),
        ("ab", [[1]], {}, ValueError, "prompt is text"),
        ([], [[1]], {}, ValueError, r"prompt\[0\] is empty"),
        ([MASK], [[1]], {}, ValueError, "prompt holds the mask token"),
        ([1.5], [[1]], {}, TypeError, "an id in prompt must be an integer"),
        ([1] * 300, [[1]], {}, ValueError, "the model has 256"),
        ([1], [[1]], dict(normalize="max"), ValueError, "normalize is 'max'; allowed: sum, mean"),
    ],
)
def test_prompts_and_choices_that_make_no_sense_are_refused(prompt, choices, options, error, says):
    with pytest.raises(error, match=says):
        dk.choose(tiny_model(), prompt, choices, **options)
