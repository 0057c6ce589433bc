"""generate_until: batched answers are those that each prompt has alone, cut at the first stop string."""

import pytest
from lm_eval.api.instance import Instance

import dllm_kernels as dk
from dllm_train.evaluate import DiffusionLM
from dllm_train.evaluate.generation import Prompt, StopTokens, cut_at, generate
from tests.evaluate.known_models import UNPRINTABLE, write_random, write_unigram

CONTEXTS = ["1 + 1 =", "def f(x):\n", "a", "the quick brown fox " * 3, "x" * 40, "p q", "[0, 1"]
KINDS = ("bidirectional", "block_causal")


def requests_of(contexts, task="texts", repeats=1, **kwargs) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, dict(kwargs)), 0, (task, index, repeats))
        for index, context in enumerate(contexts)
    ]


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return write_random(folder, attention=request.param)


def model_of(checkpoint, **options) -> DiffusionLM:
    """Its answers are printable, so that their bytes and characters are one."""
    options = dict(instruct=False, threshold=0.3, suppress_tokens=UNPRINTABLE) | options
    return DiffusionLM(str(checkpoint), **options)


def whole_answers(lm: DiffusionLM, contexts, new_tokens: int, **options) -> list[str]:
    """Return dk.sample's completion of each context alone, without stop strings."""
    return [
        dk.sample(
            lm.model, [lm.tok_encode(context)], tokenizer=lm.tokenizer, config=lm.config,
            max_new_tokens=new_tokens, **options,
        ).texts[0]
        for context in contexts
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3, 8, "auto"])
def test_answers_are_those_of_each_prompt_alone_whatever_the_batch(checkpoint, batch_size):
    lm = model_of(checkpoint, batch_size=batch_size)
    mixed = [
        *requests_of(CONTEXTS, max_gen_toks=11, until=[]),
        *requests_of(CONTEXTS, max_gen_toks=24, until=[]),
    ]
    expected = [*whole_answers(lm, CONTEXTS, 11), *whole_answers(lm, CONTEXTS, 24)]
    assert lm.generate_until(mixed) == expected
    assert len({*expected}) > 7


def test_texts_end_before_the_first_stop_string(checkpoint):
    lm = model_of(checkpoint)
    whole = whole_answers(lm, CONTEXTS, 24)
    one, two = whole[0][5], whole[1][7:9]  # of one token, and of two
    until = ["never said", two, one]
    stopped = lm.generate_until(requests_of(CONTEXTS, max_gen_toks=24, until=until))
    assert stopped == [cut_at(text, until) for text in whole]
    assert len(stopped[0]) <= 5 and len(stopped[1]) <= 7
    alone = lm.generate_until(requests_of(CONTEXTS, max_gen_toks=24, until=two))
    assert alone == [cut_at(text, [two]) for text in whole]


def test_rows_end_early_at_tokens_that_hold_a_stop_string(checkpoint):
    lm = model_of(checkpoint)
    prompts = [Prompt(tuple(lm.tok_encode(context)), 64) for context in CONTEXTS]
    (whole, *_) = whole_answers(lm, CONTEXTS[:1], 64)
    options = dict(until=(whole[3],), config=lm.config)
    early = generate(lm.model, lm.tokenizer, prompts, stop_tokens=lm.stop_tokens, **options)
    late = generate(lm.model, lm.tokenizer, prompts, **options)
    assert [answer.text for answer in early] == [answer.text for answer in late]
    assert sum(answer.forwards for answer in early) < sum(answer.forwards for answer in late)


def test_a_token_that_holds_a_stop_string_only_alone_ends_no_row(checkpoint):
    """Such as one that loses a space behind others; answers are then made again without early ends."""
    lm = model_of(checkpoint)
    prompts = [Prompt(tuple(lm.tok_encode(context)), 16) for context in CONTEXTS]
    (whole, *_) = whole_answers(lm, CONTEXTS[:1], 16)
    (token,) = lm.tok_encode(whole[2])
    misleading = StopTokens(lm.tokenizer)
    misleading.of = lambda until: (token,)
    answers = generate(
        lm.model, lm.tokenizer, prompts, until=("never said",), stop_tokens=misleading, config=lm.config
    )
    assert [answer.text for answer in answers] == whole_answers(lm, CONTEXTS, 16)


def test_noise_belongs_to_the_request_and_its_repeat(checkpoint):
    options = dict(max_gen_toks=12, until=[], do_sample=True, temperature=0.9)
    drawn = {}
    for batch_size in (1, 3, 8):
        lm = model_of(checkpoint, batch_size=batch_size, seed=4)
        drawn[batch_size] = lm.generate_until(requests_of([*CONTEXTS, *CONTEXTS], **options))
    assert drawn[1] == drawn[3] == drawn[8]
    first, second = drawn[1][: len(CONTEXTS)], drawn[1][len(CONTEXTS) :]
    assert all(a != b for a, b in zip(first, second, strict=True)), "repeats are drawn anew"
    lm = model_of(checkpoint, seed=4)
    assert lm.generate_until(requests_of(CONTEXTS[3:5], **options)) == first[3:5]


def test_do_sample_false_is_greedy(checkpoint):
    warm = model_of(checkpoint, temperature=0.9)
    cold = model_of(checkpoint)
    asked = requests_of(CONTEXTS, max_gen_toks=8, until=[], do_sample=False)
    assert warm.generate_until(asked) == cold.generate_until(asked)


def test_options_of_a_request_win(checkpoint):
    lm = model_of(checkpoint)
    (found,) = lm.generate_until(
        requests_of(CONTEXTS[:1], max_gen_toks=16, until=[], threshold=None, steps=3)
    )
    assert found == whole_answers(lm, CONTEXTS[:1], 16, threshold=None, steps=3)[0]
    assert lm.measures.of("texts")["tokens_per_forward"] > 3


def test_end_tokens_and_limits_are_counted(tmp_path):
    """Half of the answers are empty: their model ends at once; the others run into the limit."""
    ending = DiffusionLM(str(write_unigram(tmp_path / "ending", {"<end>": 0.9})))
    talking = DiffusionLM(str(write_unigram(tmp_path / "talking", {"7": 0.9})))
    asked = requests_of(["a", "b", "c"], max_gen_toks=5, until=[])
    assert ending.generate_until(asked) == ["", "", ""]
    measures = ending.measures.of("texts")
    assert (measures["empty_answers"], measures["at_length_limit"]) == (1.0, 0.0)
    assert talking.generate_until(asked) == ["77777"] * 3
    assert talking.generate_until(requests_of(["d"], max_gen_toks=5, until=["7"])) == [""]
    measures = talking.measures.of("texts")
    assert (measures["empty_answers"], measures["at_length_limit"]) == (1 / 4, 3 / 4)


def test_a_special_token_is_a_stop_string(tmp_path):
    lm = DiffusionLM(str(write_unigram(tmp_path, {"<pad>": 0.9})), threshold=0.5)
    assert lm.generate_until(requests_of(["a"], max_gen_toks=5, until=["<pad>"])) == [""]
    assert lm.measures.of("texts")["at_length_limit"] == 0.0


@pytest.mark.parametrize(
    ("contexts", "kwargs", "message"),
    [
        (["a"], dict(num_beams=4), "num_beams has no meaning"),
        (["a"], dict(treshold=0.9), "treshold is not an option of gen_kwargs; did you mean threshold"),
        (["a"], dict(max_gen_toks=0), "max_gen_toks is 0"),
        (["a"], dict(until=3), "until"),
        (["a"], dict(infill=True), "document 0: infill takes a text with one gap"),
        (["ok", "x" * 120], dict(max_gen_toks=16), "document 1: the context has 120 tokens"),
        (["x" * 120 + "<mask:9>"], dict(infill=True), "the context has 120 tokens and its gap 9, more than"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(checkpoint, contexts, kwargs, message, monkeypatch):
    lm = model_of(checkpoint)
    monkeypatch.setattr(dk, "sample", lambda *arguments, **options: pytest.fail("something ran"))
    with pytest.raises((ValueError, TypeError), match=message):
        lm.generate_until(requests_of(contexts, **kwargs))


def test_contexts_are_cut_on_the_left_where_asked_for(checkpoint):
    lm = model_of(checkpoint, truncate=True)
    long = "abcdefgh" * 20
    found = lm.generate_until(requests_of([long], max_gen_toks=16, until=[]))
    assert found == whole_answers(lm, [long[-112:]], 16)
    assert lm.measures.of("texts")["truncated_contexts"] == 1
    with_bos = model_of(checkpoint, truncate=True, add_bos_token=True)
    (prompt, _) = with_bos._wanted(*requests_of([long], max_gen_toks=16))
    assert prompt == [with_bos.tokenizer.bos_token_id, *lm.tok_encode(long)[-111:]]


def test_a_gap_is_filled_from_both_sides(tmp_path):
    lm = model_of(write_random(tmp_path, attention="bidirectional"))
    texts = ["ab<mask:3>cd", "<mask:6>, and so on", "x = <mask:5>\n" + "y" * 20]
    found = lm.generate_until(requests_of(texts, infill=True, until=[]))
    for text, filling in zip(texts, found, strict=True):
        before, after = text[: text.index("<")], text[text.index(">") + 1 :]
        (whole,) = dk.infill(lm.model, text, tokenizer=lm.tokenizer, config=lm.config).texts
        assert before + filling + after == whole


def test_a_model_trained_for_both_kinds_of_attention_sees_behind_a_gap(tmp_path):
    folder = write_random(tmp_path, attention="block_causal")
    models = {kind: DiffusionLM(str(folder), instruct=False) for kind in ("block_causal", "bidirectional")}
    for kind, lm in models.items():
        lm.model.config.diffusion["attention"] = [kind]
    both = DiffusionLM(str(folder), instruct=False)
    both.model.config.diffusion["attention"] = ["block_causal", "bidirectional"]
    asked = requests_of(["a" * 9 + "<mask:5>" + text for text in ("b" * 30, "c" * 30)], infill=True, until=[])
    found = both.generate_until(asked)
    assert found == models["bidirectional"].generate_until(asked)
    assert found != models["block_causal"].generate_until(asked)
    assert both.model.config.diffusion["attention"][0] == "block_causal"


def test_cut_at_the_first_of_several():
    assert cut_at("one two three", ["three", "two"]) == "one "
    assert cut_at("one", ["two"]) == "one"


def test_options_that_a_task_overrules_are_told_once(checkpoint, caplog):
    lm = model_of(checkpoint, temperature=0.5, max_new_tokens=9)
    with caplog.at_level("WARNING", logger="lm_eval.dllm"):
        lm.generate_until(requests_of(CONTEXTS[:2], until=[], max_gen_toks=4, do_sample=False))
    assert sorted(record.getMessage().split(",")[0] for record in caplog.records) == [
        "task texts sets max_new_tokens=4", "task texts sets temperature=0.0",
    ]  # fmt: skip
