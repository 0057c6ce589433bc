"""Check that a tokenizer is read back from its files as it was written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dllm_kernels.models.tokenizer_files import read_tokenizer

_TEXT = "Hello, world! It's 12345 (x == 0.5)\n\n    naïve café: 你好 🙂\tEND"


def check_reads_back(tokenizer, config) -> None:
    """Raise ValueError if `tokenizer`, read from its files by transformers, makes other tokens.

    transformers picks some tokenizer classes by model type, whatever the files say.
    """
    words = list(tokenizer.get_vocab())
    step = max(len(words) // 64, 1)
    texts = (_TEXT, tokenizer.mask_token, " ".join(map(str, words[::step])))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = read_tokenizer(Path(folder), config, None)
    for text in texts:
        expected, found = (list(each(text)["input_ids"]) for each in (tokenizer, again))
        if expected != found:
            raise ValueError(
                f"the tokenizer, a {type(tokenizer).__name__}, would come back from its files as a "
                f"{type(again).__name__} that reads {text[:20]!r} as {found[:8]}, not {expected[:8]}: "
                f"transformers picks that class for {config.model_type}. Give a tokenizer of that class"
            )
