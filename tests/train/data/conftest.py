"""Datasets cached in the folder of the test, and a byte-level tokenizer with the tokens of chat templates."""

import functools
import json

import datasets
import pytest
import transformers

from tests.sampling.tokenizer_zoo import byte_level

SPECIAL = {
    "end": "<|endoftext|>",
    "start": "<s>",
    "begin": "<|begin_of_text|>",
    "header": "<|start_header_id|>",
    "header_end": "<|end_header_id|>",
    "eot": "<|eot_id|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "inst": "[INST]",
    "inst_end": "[/INST]",
    "stop": "</s>",
    "mask": "<|mask|>",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@functools.cache
def backend() -> str:
    return byte_level(**SPECIAL).to_str()


def make_tokenizer(chat_template: str | None = None, **options) -> transformers.PreTrainedTokenizerFast:
    import tokenizers

    options = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "mask_token": "<|mask|>", **options}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(backend()),
        additional_special_tokens=[*SPECIAL.values()],
        **options,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON lines; return the path as a name that a specification can hold."""

    def write_rows(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f'"{path}"'

    return write_rows
