"""Conversations become the ids that the chat template gives; end tokens come with the tokenizer."""

import json

import pytest
import tokenizers
import transformers

import dllm_kernels as dk
from dllm_kernels.models.chat import chat_ids
from dllm_kernels.models.families import FAMILIES, diffusion_of
from tests.models.published_checkpoints import EOS, PUBLISHED, VOCABULARY

WORDS = [
    "<unk>",
    "user",
    "assistant",
    "hello",
    "there",
    "why",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<think>",
]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|> ' + message.role + ' ' + message.content + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant' }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ ' <think>' }}{% endif %}"
    "{% if messages[0].role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
)
START, END, THINK = (WORDS.index(word) for word in ("<|im_start|>", "<|im_end|>", "<think>"))
USER, ASSISTANT, HELLO, THERE, WHY = (WORDS.index(word) for word in WORDS[1:6])


@pytest.fixture
def tokenizer():
    words = {**{word: index for index, word in enumerate(WORDS)}, "<eos>": EOS}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def message(role, content):
    return {"role": role, "content": content}


ASKED = [START, USER, HELLO, THERE, END, START, ASSISTANT]
PROMPTS = {
    "text": ("hello there", [ASKED]),
    "texts": (["hello there", "why"], [ASKED, [START, USER, WHY, END, START, ASSISTANT]]),
    "a conversation": ([message("user", "hello there")], [ASKED]),
    "conversations": ([[message("user", "hello there")]] * 2, [ASKED, ASKED]),
    "several turns": (
        [message("user", "hello"), message("assistant", "there"), message("user", "why")],
        [[START, USER, HELLO, END, START, ASSISTANT, THERE, END, START, USER, WHY, END, START, ASSISTANT]],
    ),
    "a reply begun": (
        [message("user", "hello"), message("assistant", "there")],
        [[START, USER, HELLO, END, START, ASSISTANT, THERE]],
    ),
}


@pytest.mark.parametrize(("prompts", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_become_ids_up_to_the_reply(tokenizer, prompts, expected):
    assert chat_ids(prompts, tokenizer) == expected


def test_options_reach_the_template(tokenizer):
    assert chat_ids("hello there", tokenizer, {"enable_thinking": False}) == [[*ASKED, THINK]]


@pytest.mark.parametrize("prompts", [3, [], [[1, 2]], [[]], [["why"]], [{"role": "user"}], None], ids=repr)
def test_what_is_no_conversation(tokenizer, prompts):
    with pytest.raises(TypeError, match="prompts"):
        chat_ids(prompts, tokenizer)


def test_templates_that_are_missing_or_refuse(tokenizer):
    with pytest.raises(ValueError, match=r"prompts\[0\] does not fit the chat template: no robots"):
        chat_ids([message("robot", "why")], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_ids("why", tokenizer)
    with pytest.raises(ValueError, match="needs tokenizer="):
        chat_ids("why", None)


# ---- tokenizers of checkpoints ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("llada", "<|eot_id|>"),
        ("a2d-llama", "<|eot_id|>"),
        ("a2d-qwen3", "<|im_end|>"),
        ("sdar", "<|im_end|>"),
    ],
)
def test_a_checkpoints_tokenizer_brings_its_end_tokens(tokenizer, tmp_path, name, end):
    """No code of the checkpoint is run, whatever its files ask for."""
    folder = PUBLISHED[name].write(tmp_path)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text("raise SystemExit('ran')")
    model, loaded = dk.load(folder, device="cpu")
    diffusion = diffusion_of(model)
    assert diffusion.eos_ids == (EOS, WORDS.index(end))
    assert diffusion.chat == FAMILIES[name].chat
    assert loaded.get_vocab() == tokenizer.get_vocab()
    thinking = [THINK] if name.startswith("a2d-qwen") else []
    assert chat_ids("hello there", loaded, diffusion.chat) == [[*ASKED, *thinking]]
    dk.save(model, loaded, folder / "stock")
    again, loaded = dk.load(folder / "stock", device="cpu")
    assert diffusion_of(again).chat == diffusion.chat and diffusion_of(again).eos_ids == diffusion.eos_ids
    assert chat_ids("hello there", loaded) == [ASKED]


def test_dreams_tokenizer_is_read_as_qwens(tmp_path):
    """Its folder holds vocab.json and merges.txt, and asks for a class that only its own code has."""
    folder = PUBLISHED["Dream"].write(tmp_path, mask_token_id=112)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 10]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {110: "<|endoftext|>", 111: "<|im_end|>", 112: "<|mask|>"}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in added.items()},
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('ran')")
    model, tokenizer = dk.load(folder, device="cpu")
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert tokenizer("!")["input_ids"] == [alphabet.index("!")]
    assert tokenizer("<|mask|>")["input_ids"] == [112] == [tokenizer.mask_token_id]
    assert diffusion_of(model).eos_ids == (EOS, 111)
    dk.save(model, tokenizer, tmp_path / "own", layout="Dream")
    _, again = dk.load(tmp_path / "own", device="cpu")
    assert again("!<|mask|>")["input_ids"] == tokenizer("!<|mask|>")["input_ids"]

    PUBLISHED["Dream"].write(folder)
    with pytest.raises(ValueError, match=r"mask_token_id is 119 in config.json and 112 in the tokenizer"):
        dk.load(folder, device="cpu")


def test_a_tokenizer_class_that_only_the_checkpoint_has_is_not_asked_for(tokenizer, tmp_path):
    folder = PUBLISHED["sdar"].write(tmp_path)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "Strange"
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_own.Strange", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_own.py").write_text("raise SystemExit('ran')")
    _, loaded = dk.load(folder, device="cpu")
    assert loaded.get_vocab() == tokenizer.get_vocab()
