"""Fine-tuning examples: labels are the replies and their end tokens, whatever the template."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dllm_train.batches import NumberedStream
from dllm_train.data import load_sft_dataset
from dllm_train.data.chat import encode_conversation
from dllm_train.data.sft import EncodeExamples
from tests.sampling.tokenizer_zoo import tokenizer_of
from tests.train.data.conftest import make_tokenizer

CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN = (
    """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}"""
    + CHATML
)
LLAMA_3 = """{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""  # noqa: E501
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}</s>{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"""  # noqa: E501
WITHOUT_PROMPT = CHATML[: CHATML.index("{% if add")]
MARKED = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}
{% endfor %}"""  # noqa: E501
FORGETFUL = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' and not loop.last %}(left out){% else %}{{ message['content'] }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501
GEMMA = """{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}<start_of_turn>{{ role }}
{{ message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""  # noqa: E501
ZEPHYR = """{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}<|assistant|>
{% endif %}{% endfor %}"""
PHI_3 = """{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""
TEMPLATES = {  # template, what ends a reply, what stands before its text
    "ChatML": (CHATML, "<|im_end|>", ""),
    "Qwen": (QWEN, "<|im_end|>", ""),
    "Llama 3": (LLAMA_3, "<|eot_id|>", ""),
    "Mistral": (MISTRAL, "</s>", " "),
    "Gemma": (GEMMA, "<end_of_turn>", ""),
    "Zephyr": (ZEPHYR, "<|endoftext|>", ""),
    "without a generation prompt": (WITHOUT_PROMPT, "<|im_end|>", ""),
    "with generation blocks": (MARKED, "<|im_end|>", ""),
}

words = st.text("abc é日.,?\n ", min_size=1, max_size=12).map(str.strip).filter(bool)


def conversation(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def trained(tokenizer, ids, labels):
    """The runs of trained tokens, decoded."""
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    runs, run = [], []
    for label in [*labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=3), train_on=st.sampled_from(["all", "last"])
)
def test_labels_decode_to_the_replies(kind, turns, train_on):
    template, end, before = TEMPLATES[kind]
    tokenizer = make_tokenizer(template)
    messages = conversation(*(text for turn in turns for text in turn))
    ids, labels = encode_conversation(tokenizer, messages, train_on=train_on)
    replies = [before + reply + end for _, reply in turns]
    assert trained(tokenizer, ids, labels) == (replies if train_on == "all" else replies[-1:])
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == text.rstrip()


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_prompt_has_the_tokens_that_sampling_gives(kind):
    tokenizer = make_tokenizer(TEMPLATES[kind][0])
    messages = conversation("the cat?", "the dog sat", "x?", "\n\ny")
    ids, labels = encode_conversation(tokenizer, messages, train_on="last")
    first = next(i for i, label in enumerate(labels) if label != -100)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if kind in ("without a generation prompt", "with generation blocks"):
        prompt += "<|im_start|>assistant\n"
    assert ids[:first] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["ChatML", "Llama 3", "Mistral"])
@pytest.mark.parametrize(
    "zoo", ["Llama with a first token", "Metaspace first", "Llama", "Qwen2", "BERT", "slow", "XLM-R"]
)
def test_replies_are_found_with_every_kind_of_tokenizer(kind, zoo):
    """These know no special token of the templates, which are then plain text."""
    template, end, before = TEMPLATES[kind]
    tokenizer = tokenizer_of(zoo)
    tokenizer.chat_template = template.replace("{{ bos_token }}", "")
    ids, labels = encode_conversation(tokenizer, conversation("the cat", "the dog", "sat", "too."))
    runs = trained(tokenizer, ids, labels)
    assert len(runs) == 2
    for run, reply in zip(runs, ("the dog", "too."), strict=True):
        expected = tokenizer.decode(tokenizer(before + reply + end, add_special_tokens=False)["input_ids"])
        assert run.strip() == expected.strip()


def test_bos_comes_once_from_template_tokenizer_and_option():
    for insert_bos in (False, True):
        tokenizer = make_tokenizer(LLAMA_3)
        encode = EncodeExamples(tokenizer, max_length=99, insert_bos=insert_bos)
        ids = encode({"messages": conversation("a", "b")}, 0, "test")["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        tokenizer = make_tokenizer(CHATML)
        encode = EncodeExamples(tokenizer, max_length=99, insert_bos=insert_bos)
        ids = encode({"messages": conversation("a", "b")}, 0, "test")["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == insert_bos


def test_the_token_that_ends_a_reply_is_trained_also_outside_of_generation_blocks():
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert template != MARKED
    for train_on in ("all", "last"):
        messages = conversation("a", "b", "c", "d")
        example = encode_conversation(make_tokenizer(template), messages, train_on=train_on)
        assert example == encode_conversation(make_tokenizer(MARKED), messages, train_on=train_on)


def test_messages_after_the_last_reply_are_left_out():
    tokenizer = make_tokenizer(CHATML)
    whole = encode_conversation(tokenizer, conversation("a", "b", "c"))
    assert whole == encode_conversation(tokenizer, conversation("a", "b"))


def test_a_template_that_forgets_replies_is_refused_unless_the_last_is_trained():
    tokenizer = make_tokenizer(FORGETFUL)
    messages = conversation("a", "b", "c", "d")
    with pytest.raises(ValueError, match="not prefix-stable: the text up to message 1, a reply, changes"):
        encode_conversation(tokenizer, messages)
    ids, labels = encode_conversation(tokenizer, messages, train_on="last")
    assert trained(tokenizer, ids, labels) == ["d<|im_end|>"]


def test_a_template_that_ends_conversations_with_the_end_token_trains_all_replies():
    tokenizer = make_tokenizer(PHI_3)
    messages = conversation("a", "b", "c", "d")
    ids, labels = encode_conversation(tokenizer, messages)
    assert trained(tokenizer, ids, labels) == ["b<|end|>", "d<|end|>\n<|endoftext|>"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_template_with_thoughts_in_the_last_reply_alone_trains_the_last():
    """As Qwen 3 renders conversations."""
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message['content'] }}",
    )
    tokenizer = make_tokenizer(template)
    with pytest.raises(ValueError, match="not prefix-stable"):
        encode_conversation(tokenizer, conversation("a", "b", "c", "d"))
    ids, labels = encode_conversation(tokenizer, conversation("a", "b", "c", "d"), train_on="last")
    assert trained(tokenizer, ids, labels) == ["<think>\n\n</think>\n\nd<|im_end|>"]


def test_a_template_that_changes_the_prompt_is_refused():
    thinking = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
    with pytest.raises(ValueError, match="not prefix-stable: the prompt before message 1"):
        encode_conversation(make_tokenizer(thinking), conversation("a", "b"))


def test_an_error_of_the_template_names_the_row(write):
    strict = "{{ raise_exception('roles must alternate') }}"
    name = write("a.jsonl", [{"messages": conversation("a", "b")}])
    with pytest.raises(ValueError, match=r"row 0 of .*: the chat template refuses .*: roles must alternate"):
        load_sft_dataset(name, make_tokenizer(strict), max_length=8)


FORMATS = [
    {"messages": conversation("why?", "because")},
    {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]},
    {"prompt": "why?", "response": "because"},
    {"prompt": "why?", "completion": "because"},
    {"prompt": conversation("why?"), "completion": [{"role": "assistant", "content": "because"}]},
    {"instruction": "why?", "output": "because"},
    {"instruction": "why?", "input": "", "response": "because"},
    {"question": "why?", "answer": "because"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "why?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "because"}]}]},
]  # fmt: skip


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: "+".join(row))
def test_rows_of_every_format_make_the_same_example(write, row):
    tokenizer = make_tokenizer(CHATML)
    examples = load_sft_dataset(write("a.jsonl", [row]), tokenizer, max_length=64)["train"]
    assert tokenizer.decode(examples[0]["input_ids"]) == (
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>"
    )
    assert trained(tokenizer, examples[0]["input_ids"], examples[0]["labels"]) == ["because<|im_end|>"]
    assert examples[0]["length"] == len(examples[0]["input_ids"])
    assert examples.column_names == ["input_ids", "labels", "length"]


@pytest.mark.parametrize(
    ("row", "text", "reply"),
    [
        ({"prompt": "2+2=", "response": "4"}, "2+2=4", "4"),
        ({"instruction": "Add", "input": "2 2", "output": "4"}, "Add\n\n2 2\n\n4", "4"),
        ({"question": "2+2?", "answer": "4"}, "2+2?\n\n4", "4"),
    ],
)
def test_plain_rows_end_with_the_end_token(write, tokenizer, row, text, reply):
    examples = load_sft_dataset(write("a.jsonl", [row]), tokenizer, max_length=64)["train"]
    assert tokenizer.decode(examples[0]["input_ids"]) == text + "<|endoftext|>"
    assert trained(tokenizer, examples[0]["input_ids"], examples[0]["labels"]) == [reply + "<|endoftext|>"]
    with_template = make_tokenizer(CHATML)
    plain = load_sft_dataset(write("a.jsonl", [row]), with_template, max_length=64, chat="plain")["train"]
    assert plain[0] == examples[0]


def test_a_reply_without_a_special_token_at_its_end_gets_the_end_token():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    encode = EncodeExamples(tokenizer, max_length=99)
    example = encode({"messages": conversation("a", "b")}, 0, "test")
    assert trained(tokenizer, example["input_ids"], example["labels"]) == ["b<|endoftext|>"]


def test_truncation_keeps_the_start_of_the_reply_and_counts_what_is_left_out(write, caplog):
    tokenizer = make_tokenizer(CHATML)
    rows = [
        {"messages": conversation("a", "b")},
        {"messages": conversation("a", "b" + " b" * 40)},
        {"messages": conversation("a" + " a" * 40, "b")},
        {"messages": conversation("only a question")},
    ]
    name = write("a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        examples = load_sft_dataset(name, tokenizer, max_length=32)["train"]
    assert [example["length"] for example in examples] == [len(examples[0]["input_ids"]), 32]
    (run,) = trained(tokenizer, examples[1]["input_ids"], examples[1]["labels"])
    assert run.startswith("b b b")
    assert "left out 2 of 4 rows: no reply within max_length, 32, in" in caplog.text
    with caplog.at_level(logging.WARNING):
        filtered = load_sft_dataset(name, tokenizer, max_length=32, truncation="filter")["train"]
    assert filtered[:] == examples.select([0])[:]
    assert "left out 2 of 4 rows: longer than max_length, 32, in" in caplog.text
    with pytest.raises(ValueError, match=r"row 1 of .* tokens, more than max_length, 32"):
        load_sft_dataset(name, tokenizer, max_length=32, truncation="error")
    with pytest.raises(ValueError, match="train, without the rows left out, is empty"):
        load_sft_dataset(name, tokenizer, max_length=2)


def test_processes_and_streaming_change_no_example(write):
    tokenizer = make_tokenizer(CHATML)
    rows = [{"messages": conversation("a " * i, "b " * i)} for i in range(1, 30)]
    name = write("a.jsonl", rows) + "[train:20,test:5]"
    one = load_sft_dataset(name, tokenizer, max_length=48)
    for options in ({"num_proc": 3}, {"streaming": True}):
        other = load_sft_dataset(name, tokenizer, max_length=48, **options)
        assert all(list(other[split]) == list(one[split]) for split in ("train", "test"))


def test_workers_of_the_trainer_read_every_example_of_a_stream_once(write):
    tokenizer = make_tokenizer(CHATML)
    rows = [{"messages": conversation("a", "b " * i)} for i in range(1, 12)]
    names = [write(f"rows/{i:02}.jsonl", [row]) for i, row in enumerate(rows)]
    folder = names[0].replace("00.jsonl", "")
    for spec in (folder, f"0.5*{folder}+0.5*{names[3]}"):
        examples = load_sft_dataset(spec, tokenizer, max_length=64)["train"]
        stream = load_sft_dataset(spec, tokenizer, max_length=64, streaming=True)["train"]
        numbered = NumberedStream(stream, "train_dataset", batch_size=2)
        loader = DataLoader(numbered, batch_size=2, num_workers=2, collate_fn=list)
        read = [example for batch in loader for example in batch]
        assert [example["labels"] for example in read] == list(examples["labels"])


def test_wrong_rows_are_refused_by_number_and_field(write, tokenizer):
    with_template = make_tokenizer(CHATML)

    def load(rows, tokenizer=with_template, **options):
        return load_sft_dataset(write("a.jsonl", rows), tokenizer, **{"max_length": 64, **options})

    good = {"prompt": "a", "response": "b"}
    with pytest.raises(
        ValueError, match=r"a.jsonl', train has the fields \['text'\]; expected one of: messages"
    ):
        load([{"text": "a"}])
    with pytest.raises(ValueError, match=r"row 1 of .*: 'response' is missing; expected text"):
        load([good, {"prompt": "a", "response": None}])
    with pytest.raises(ValueError, match=r"row 2 of .*: 'response' is missing; expected text"):
        load([good, good, {"prompt": "a", "response": None}], num_proc=2)
    with pytest.raises(
        ValueError, match=r"message 0 of 'messages' has the role 'robot'; expected one of system"
    ):
        load([{"messages": [{"role": "robot", "content": "a"}]}])
    with pytest.raises(ValueError, match=r"'messages\[0\].content' holds a part of type 'image'; only text"):
        load([{"messages": [{"role": "user", "content": [{"type": "image", "text": None}]}]}])
    with pytest.raises(ValueError, match="'messages' is not a list of messages"):
        load([{"messages": "a"}])
    with pytest.raises(ValueError, match=r"row 0 of .* is a conversation, which needs a chat template"):
        load([{"messages": conversation("a", "b")}], tokenizer)
    with pytest.raises(ValueError, match=r"row 0 of .*: the text contains the mask token"):
        load([{"prompt": "a", "response": "<|mask|>"}])
    with pytest.raises(ValueError, match="chat is 'template', but the tokenizer has no chat template"):
        load([good], tokenizer, chat="template")
    with pytest.raises(ValueError, match="truncation is 'left'; expected one of 'right', 'filter', 'error'"):
        load([good], truncation="left")
    with pytest.raises(ValueError, match="train_on is 'first'; expected one of 'all', 'last'"):
        load([good], train_on="first")
    with pytest.raises(ValueError, match="max_length is 63; expected a multiple of block_size, 8"):
        load([good], max_length=63, block_size=8)
