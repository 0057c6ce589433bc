"""Prompts, masks, callables and weights that cannot be meant: an error that names the argument."""

import functools

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import dllm_kernels as dk
from dllm_kernels.edit import propose
from dllm_kernels.models.text import encode
from tests.sampling.tiny_models import MASK, tiny_model

ONES = torch.ones(2, 3, dtype=torch.int64)
PROMPTS = {
    "nothing": (None, "prompts is a NoneType"),
    "an encoding": ({"input_ids": [1]}, "prompts is a dict; give a str"),
    "bytes": (b"ab", "prompts is a bytes"),
    "bytes in a list": ([b"ab"], "prompts is a list of bytes"),
    "one flat list": ([1, 2, 3], "prompts is a list of int"),
    "bytes of ids": (ONES.byte(), "int64 or int32 Tensor .* got torch.uint8 Tensor"),
    "a matrix in a list": ([ONES], r"prompts\[0\] must be a list of ids or a Tensor \[S\]"),
    "an id in a list": ([torch.tensor(1)], r"prompts\[0\] must be a list of ids or a Tensor \[S\]"),
    "no data": (ONES.to("meta"), "dense Tensor with data, got one on meta"),
    "sparse ids": (ONES.to_sparse(), "dense Tensor with data, .*sparse_coo"),
}


@pytest.mark.parametrize(("prompts", "reason"), PROMPTS.values(), ids=PROMPTS)
def test_prompts(prompts, reason):
    with pytest.raises(TypeError, match=reason):
        dk.sample(tiny_model(), prompts, max_new_tokens=4)


@pytest.mark.parametrize(
    ("mask", "error", "reason"),
    [
        ([[1, 1, 1], [1, 1, 0]], TypeError, r"attention_mask must be a Tensor \[B, S\], got list"),
        (torch.ones(2, 4), ValueError, r"attention_mask is \[2, 4\], prompts is \[2, 3\]"),
        (torch.tensor([[0.0, 0, -1e9], [0, 0, 0]]), ValueError, "1 for tokens and 0 for padding"),
        (torch.full((2, 3), torch.nan), ValueError, "1 for tokens and 0 for padding"),
        (torch.tensor([[1, 1, 1], [1, 0, 1]]), ValueError, r"attention_mask\[1\] has zeros between ones"),
        (torch.tensor([[1, 1, 1], [0, 0, 0]]), ValueError, r"prompts\[1\] is empty"),
    ],
)
def test_attention_masks(mask, error, reason):
    with pytest.raises(error, match=reason):
        dk.sample(tiny_model(), ONES, attention_mask=mask, max_new_tokens=4)


def test_padding_on_both_sides():
    padded, mask = torch.tensor([[9, 1, 2, 9]]), torch.tensor([[0, 1, 1, 0]])
    expected = dk.sample(tiny_model(), [[1, 2]], max_new_tokens=4).sequences
    assert torch.equal(
        dk.sample(tiny_model(), padded, attention_mask=mask, max_new_tokens=4).sequences, expected
    )


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (dict(on_round=5), "on_round is a int"),
        (dict(tokenizer="gpt2"), "tokenizer is a str"),
    ],
)
def test_callbacks_and_tokenizers(option, reason):
    with pytest.raises(TypeError, match=reason):
        dk.sample(tiny_model(), [[1]], max_new_tokens=4, **option)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (dict(steps_per_block=2**31 - 1, schedule="dllm"), "steps_per_block must lie in 1..1000000"),
        (dict(temperature=1e300), "temperature is 1e[+]300"),
        (dict(temperature=1e-300), "temperature is 1e-300; it must be 0, or at least 1e-37"),
        (dict(alg_temp=1e-300), "alg_temp is 1e-300; it must be 0, or at least 1e-37"),
        (dict(threshold=0.5, edit_threshold=0.0, max_post_steps=2**31 - 1), "max_post_steps must lie in 0"),
        (dict(cfg_scale=1e300), "cfg_scale is 1e[+]300"),
    ],
)
def test_numbers_beyond_what_can_be_computed(option, reason):
    with pytest.raises(ValueError, match=reason):
        dk.SampleConfig(**option)


@pytest.mark.parametrize(
    ("attention", "options"),
    [("bidirectional", dict(threshold=0.3, kl_threshold=0.1)), ("bidirectional", dict(cache="dual"))],
)
def test_blocks_larger_than_every_canvas(attention, options):
    """They take no more memory than the canvas."""
    model, prompts = tiny_model(attention=attention), [[1, 2, 3], [4]]
    found, expected = (
        dk.sample(model, prompts, max_new_tokens=10, block_size=size, **options) for size in (2**31 - 1, 10)
    )
    assert torch.equal(found.sequences, expected.sequences)
    with pytest.raises(ValueError, match="row 0 needs 2147483647 positions"):
        dk.sample(tiny_model(), prompts, max_new_tokens=10, block_size=2**31 - 1, cache="none")


def test_gaps_too_long_for_any_model():
    _, tokenizer = dk.load("tiny-python")
    for digits in ("9" * 8, "9" * 30):
        with pytest.raises(ValueError, match=r"N of <mask:N> must lie in 0\.\.1048576"):
            dk.infill(tiny_model(), f"a = <mask:{digits}>", tokenizer=tokenizer)


def test_gaps_beyond_the_models_positions():
    _, tokenizer = dk.load("tiny-python")
    with pytest.raises(ValueError, match=r"canvases\[1\] has gaps of 600 tokens; the model has 256"):
        dk.infill(tiny_model(), ["a", "<mask:300>b<mask:300>"], tokenizer=tokenizer)


def test_masks_follow_a_text_without_the_end_token_of_its_tokenizer():
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 1, "</s>": 2, "the": 3, "cat": 4}))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )
    output = dk.sample(
        tiny_model(), "the cat", tokenizer=tokenizer, max_new_tokens=2, mask_id=MASK, history=True
    )
    assert output.history[0][0].tolist() == [1, 3, 4, MASK, MASK]


HALF = "x = '\ud83d'"


def test_half_characters_are_told_by_their_place():
    """A str of Python may hold half of a surrogate pair, which no tokenizer reads."""
    model, tokenizer = dk.load("tiny-python")
    tokenizer.chat_template = "{{ messages[0].content }}"
    for call in (
        lambda: dk.sample(model, ["a", HALF], tokenizer=tokenizer),
        lambda: dk.sample(model, ["a", HALF], tokenizer=tokenizer, chat=True),
    ):
        with pytest.raises(ValueError, match=r"prompts\[1\] holds the lone surrogate U\+D83D at character 5"):
            call()
    with pytest.raises(ValueError, match=r"canvases\[0\] holds the lone surrogate U\+D83D at character 5"):
        dk.infill(model, HALF, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"allowed\[\d+\] holds the lone surrogate U\+D83D at character 0"):
        dk.infill(model, "x = <mask:1>", tokenizer=tokenizer, allowed=["\ud83d"])
    with pytest.raises(ValueError, match=r"m.py holds the lone surrogate U\+D83D at character 7"):
        propose(model, f"1\n{HALF}\n", 1, tokenizer=tokenizer, name="m.py")
    with pytest.raises(TypeError, match="tokenizer is a NoneType; give a tokenizer"):
        propose(model, "a\nb\n", 1, tokenizer=None)
    with pytest.raises(ValueError, match=r"the request holds the lone surrogate U\+D83D at character 5"):
        encode("the request", HALF, tokenizer, special_tokens=False)


@pytest.mark.parametrize("generate", [dk.sample, dk.infill])
def test_tokenizers_of_other_libraries(generate):
    _, tokenizer = dk.load("tiny-python")
    for text in ("x = ", [[1, 2]]):
        with pytest.raises(TypeError, match=r"tokenizer is a tokenizers\.Tokenizer; give a tokenizer of"):
            generate(tiny_model(), text, tokenizer=tokenizer.backend_tokenizer)


class Answers:
    """A tokenizer that answers every text alike."""

    mask_token_id, eos_token_id = MASK, None

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, text):
        return self.answer

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


@pytest.mark.parametrize(
    "answer",
    [
        {"input_ids": [1, 2]},
        {"input_ids": [[1, 2]]},
        {"input_ids": torch.tensor([[1, 2]])},
        {"input_ids": np.array([1, 2], dtype=np.int32)},
        {"input_ids": (np.int64(1), np.int64(2))},
        transformers.BatchEncoding({"input_ids": [1, 2]}),
        [1, 2],
    ],
    ids=lambda answer: f"{type(answer).__name__} {answer}",
)
def test_what_a_tokenizer_may_answer(answer):
    output = dk.sample(tiny_model(), "any", tokenizer=Answers(answer), max_new_tokens=1)
    assert output.sequences[0, :2].tolist() == [1, 2] and len(output.texts[0].split()) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, r"the tokenizer gave a NoneType for prompts\[0\]; it must give input_ids"),
        ({"input_ids": [1, None]}, r"an id that the tokenizer gave for prompts\[0\] must be an integer"),
        (
            {"input_ids": [1.5]},
            r"an id that the tokenizer gave for prompts\[0\] must be an integer, got f",
        ),
        ({"input_ids": [[1], [2]]}, r"an id that the tokenizer gave for prompts\[0\] must be an integer"),
        ({"input_ids": "12"}, r"the tokenizer gave a str for prompts\[0\]"),
    ],
)
def test_what_a_tokenizer_may_not_answer(answer, reason):
    with pytest.raises(TypeError, match=reason):
        dk.sample(tiny_model(), "any", tokenizer=Answers(answer), max_new_tokens=1)


class Counting:
    """A tokenizer of one token a character that counts the characters that it was given."""

    mask_token_id, eos_token_id, chat_template, read = MASK, None, "given", 0

    def __call__(self, text, add_special_tokens=True):
        self.read += len(text)
        return {"input_ids": [1] * len(text)}

    def decode(self, ids, skip_special_tokens=False):
        return "a" * len(ids)


@pytest.mark.parametrize(
    ("generate", "options"),
    [(dk.sample, {}), (dk.sample, dict(chat=True)), (dk.infill, {})],
    ids=["sample", "chat", "infill"],
)
@pytest.mark.parametrize("text", ["word " * 2**20, "a" * 2**20], ids=["words", "one word"])
def test_a_text_too_long_for_the_model_is_refused_before_all_of_it_is_read(generate, options, text):
    tokenizer = Counting()
    with pytest.raises(ValueError, match=r"\[0\] is too long: its first \d+ of \d+ characters .* 256"):
        generate(tiny_model(), text, tokenizer=tokenizer, **options)
    assert tokenizer.read <= 2**16


def test_a_long_text_of_few_tokens_is_read():
    class Words(Counting):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * len(text.split())}

    text = ("a" * 1000 + " ") * 200
    output = dk.infill(tiny_model(), text + "<mask:3>", tokenizer=Words())
    assert output.filled == [[(200, 203)]] and output.texts[0].startswith(text)


def constant(ids, vocabulary=20, **options):
    return torch.zeros(*ids.shape, vocabulary, **options)


def shorter_each_time(ids, sizes=iter(range(30, 20, -1))):  # noqa: B008
    return constant(ids, next(sizes))


CALLABLES = {
    "a tuple": (lambda ids: (constant(ids),), "model gave a tuple for ids"),
    "double precision": (functools.partial(constant, dtype=torch.float64), "float64 .* it must give logits"),
    "integers": (functools.partial(constant, dtype=torch.int64), "int64 .* it must give logits"),
    "one position less": (lambda ids: constant(ids[:, 1:]), "it must give logits"),
    "its input cut short": (lambda ids: constant(ids.resize_(1, 1)), r"\[1, 1, 20\] for ids \[1, 9\]"),
    "no mask token": (functools.partial(constant, vocabulary=19), "mask_id holds 19; .* 0..18"),
    "fewer ids every time": (shorter_each_time, "model gave logits of 29 ids after 30"),
    "no data": (functools.partial(constant, device="meta"), "logits without data: torch.strided on meta"),
}


@pytest.mark.parametrize(("model", "reason"), CALLABLES.values(), ids=CALLABLES)
def test_callables(model, reason):
    with pytest.raises(ValueError, match=reason):
        dk.sample(model, [[1]], mask_id=19, max_new_tokens=8)


@pytest.mark.parametrize("option", ["suppress_tokens", "begin_suppress_tokens"])
def test_tokens_beyond_the_vocabulary_of_a_callable(option):
    with pytest.raises(ValueError, match=f"^{option} holds 50; the vocabulary is 0..19"):
        dk.sample(constant, [[1]], mask_id=19, max_new_tokens=8, **{option: (50,)})


def test_a_callable_may_write_into_what_it_is_given():
    def model(ids):
        return constant(ids.fill_(0))

    assert dk.sample(model, [[1, 2]], mask_id=19, max_new_tokens=3).sequences.tolist() == [[1, 2, 0, 0, 0]]


def fresh_model():
    tiny_model.cache_clear()
    return tiny_model()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.double(), "model is torch.float64; convert it"),
        (lambda model: model.to("meta"), "model has weights on the meta device"),
        (torch.nn.Sequential, "model is a Sequential around a Qwen3ForCausalLM: give the inner model"),
    ],
    ids=["double precision", "no weights", "a module around it"],
)
def test_models(change, reason):
    with pytest.raises(ValueError, match=reason):
        dk.sample(change(fresh_model()), [[1]], max_new_tokens=4)
    tiny_model.cache_clear()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("yes", "config.diffusion is 'yes'; it must hold entries"),
        ({"attention": ["block_causal"], "block_size": 0}, "block_size 0; it must be an integer >= 1"),
        ({"attention": ["block_causal"], "block_size": "8"}, "block_size '8'"),
        ({"attention": ["block_causal"], "shift": "no"}, "shift 'no'; it must be true or false"),
    ],
)
def test_what_a_checkpoint_says(entry, reason, monkeypatch):
    monkeypatch.setattr(tiny_model().config, "diffusion", entry)
    with pytest.raises(ValueError, match=reason):
        dk.sample(tiny_model(), [[1]], max_new_tokens=4)


@pytest.mark.parametrize(
    "options",
    [
        dict(threshold=0.3, temperature=0.5, top_p=0.9),
        dict(steps_per_block=5, schedule="dream"),
        dict(steps_per_block=5, schedule="dllm_cosine"),
        dict(steps_per_block=5, rule="bernoulli"),
        dict(threshold=0.3, cfg_scale=0.5, shift=True, cache="none"),
    ],
    ids=str,
)
def test_defaults_of_torch_change_nothing(options):
    """A default dtype or device is for a user's own tensors."""
    model, prompts = tiny_model(), [[1, 2, 3], [4]]
    expected = dk.sample(model, prompts, max_new_tokens=20, **options).sequences
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.bfloat16)
        found = dk.sample(model, prompts, max_new_tokens=20, **options).sequences
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_infilling_takes_the_same_inputs():
    canvas = torch.tensor([[1, MASK, MASK, 9]], dtype=torch.int32)
    mask = torch.tensor([[True, True, True, False]])
    output = dk.infill(tiny_model(), canvas, attention_mask=mask)
    assert output.filled == [[(1, 3)]] and output.sequences.shape == (1, 3)
