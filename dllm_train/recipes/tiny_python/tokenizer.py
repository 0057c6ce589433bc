"""Byte-level BPE tokenizer for Python source, whose tokens never join digits, lines or indentations.

Pieces, between which nothing is merged: a run of newlines; the leading blanks of a line; one digit; a word
or a run of punctuation, each with one space before it if there is one; other blanks. Any text survives
encoding and decoding.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, MASK, PAD = "<|endoftext|>", "<|mask|>", "<|pad|>"
PIECES = "|".join(
    [
        r"\n+",
        r"(?<![^\n])[ \t]+",
        r"\p{N}",
        r" ?[\p{L}_]+",
        r" ?[^\s\p{L}\p{N}_]+",
        r"[^\S\n]+(?!\S)",
        r"[^\S\n]+",
    ]
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train on `texts`; the special tokens are the last three ids."""
    if vocab_size < 256 + 3:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least 259 (256 bytes, 3 special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END, MASK, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        mask_token=MASK,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def newline_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return ids of the tokens that begin with a newline: end tokens for one line."""
    return [
        i
        for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if token.startswith("Ċ")
    ]
