"""Ids that reach the model: chat templates, few-shot examples as turns, system instructions, BOS, borders."""

import lm_eval
import pytest
from lm_eval.api.instance import Instance

from dllm_train.evaluate import DiffusionLM
from tests.evaluate.known_models import write_unigram
from tests.evaluate.local_tasks import CHANCES, manager, write_tasks

NO_SYSTEM = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}"


@pytest.fixture
def lm(tmp_path):
    return DiffusionLM(str(write_unigram(tmp_path / "model", CHANCES, chat=True)), estimator="ar_ftb")


def contexts(lm, tmp_path, **options) -> list[str]:
    """Return the contexts of the task `numbers`."""
    (tmp_path / "tasks").mkdir()
    tasks = manager(write_tasks(tmp_path / "tasks"))
    found = lm_eval.simple_evaluate(
        model=lm, tasks=["numbers"], task_manager=tasks, bootstrap_iters=0, **options
    )
    return [sample["arguments"][0][0] for sample in found["samples"]["numbers"]]


def test_examples_are_turns_behind_the_system_instruction(lm, tmp_path):
    asked = contexts(
        lm, tmp_path, num_fewshot=1, apply_chat_template=True, fewshot_as_multiturn=True,
        system_instruction="Be brief.",
    )  # fmt: skip
    example = asked[0].split("user: ")[1]
    assert asked[0] == f"system: Be brief.\nuser: {example}user: 0 is\nassistant: "
    assert example.endswith("<end>\n") and "\nassistant: " in example


def test_without_a_template_the_instruction_comes_first(lm, tmp_path):
    assert contexts(lm, tmp_path, system_instruction="Be brief.")[0].startswith("Be brief.")


def test_a_template_without_a_system_role_gets_the_instruction_in_the_first_message(lm):
    lm.tokenizer.chat_template = NO_SYSTEM + lm.tokenizer.chat_template
    messages = [dict(role="system", content="Be brief."), dict(role="user", content="1 is")]
    assert lm.apply_chat_template(messages) == "user: Be brief.\n\n1 is\nassistant: "


def test_a_prefix_of_the_reply_is_continued(lm):
    messages = [dict(role="user", content="1 is"), dict(role="assistant", content="It is")]
    assert lm.apply_chat_template(messages, add_generation_prompt=False) == "user: 1 is\nassistant: It is"


def test_a_template_is_applied_by_its_name(lm):
    default = lm.tokenizer.chat_template
    lm.tokenizer.chat_template = {"default": default, "loud": "{{ messages[0]['content'] | upper }}"}
    assert lm.chat_template("loud") == "{{ messages[0]['content'] | upper }}"
    assert lm.apply_chat_template([dict(role="user", content="hello")]) == "HELLO"
    with pytest.raises(ValueError, match="quiet"):
        lm.chat_template("quiet")


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    lm = DiffusionLM(str(write_unigram(tmp_path, CHANCES)))
    with pytest.raises(ValueError, match="has no chat template; leave out --apply_chat_template"):
        lm.apply_chat_template([dict(role="user", content="hello")])


def test_texts_begin_with_one_bos_where_it_is_asked_for(tmp_path):
    folder = str(write_unigram(tmp_path, CHANCES))
    plain, with_bos = DiffusionLM(folder), DiffusionLM(folder, add_bos_token=True)
    bos, text = plain.tokenizer.bos_token_id, plain.tokenizer("ab")["input_ids"]
    assert plain.tok_encode("ab") == text
    assert with_bos.tok_encode("ab") == [bos, *text] == with_bos.tok_encode("<bos>ab")
    assert with_bos.tok_encode("ab", add_special_tokens=False) == text


def test_the_tokenizers_own_leading_tokens_stay_and_no_end_is_added(tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = write_unigram(tmp_path, CHANCES)
    tokenizer = DiffusionLM(str(folder)).tokenizer
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<end>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A <end>", special_tokens=special)
    tokenizer.save_pretrained(folder)
    lm, bos = DiffusionLM(str(folder)), tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    assert lm.tok_encode("a") == [bos, *tokenizer("a", add_special_tokens=False)["input_ids"]]
    assert DiffusionLM(str(folder), add_bos_token=False).tok_encode("a") == lm.tok_encode("a")[1:]


@pytest.mark.parametrize(
    ("context", "continuation", "given", "target"),
    [
        ("q:", " a", "q:", " a"),
        ("q: ", "a", "q:", " a"),
        ("", "ab", "<bos>", "ab"),
        ("  ", "a", "  ", "a"),
    ],
)
def test_borders_of_contexts_and_continuations(lm, context, continuation, given, target):
    request = Instance("loglikelihood", {}, (context, continuation), 0, ("task", 0, 1))
    pair = lm._pair(request)
    assert tuple(map(lm.tokenizer.decode, pair)) == (given, target)


def test_a_token_across_the_border_belongs_to_the_continuation():
    lm = DiffusionLM("tiny-python")
    given, target = lm.texts.pair("import o", "s")
    assert lm.tokenizer.decode([*given, *target]) == "import os" and lm.tokenizer.decode(target) == " os"


def test_an_empty_continuation_is_named(lm):
    request = Instance("loglikelihood", {}, ("q:", ""), 0, ("task", 7, 1))
    with pytest.raises(ValueError, match="task task, document 7: the continuation is empty"):
        lm.loglikelihood([request])
    with pytest.raises(ValueError, match="task task, document 7: the text is empty"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0, ("task", 7, 1))])


def test_a_context_that_is_too_long_is_named(lm):
    request = Instance("loglikelihood", {}, ("q" * 300, "a"), 0, ("task", 7, 1))
    with pytest.raises(ValueError, match="document 7: the context has 300 tokens and the continuation 1"):
        lm.loglikelihood([request])
