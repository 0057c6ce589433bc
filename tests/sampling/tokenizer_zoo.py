"""Small tokenizers of every kind, made on the spot from one corpus; each has a mask token."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def f(x): return y",
    "the cat sat on the mat, and the dog sat too.",
    "x = [1, 2, 3]\n    y = 'a b'\tz",
    "Öl für é 日本語 naïve",
] * 8
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(add_prefix_space: bool = False, **special) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=340,
            show_progress=False,
            special_tokens=list(special.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return inner


def vocabulary_and_merges(inner: tokenizers.Tokenizer) -> dict:
    model = json.loads(inner.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


@functools.cache
def sentencepiece_bpe() -> dict:
    """Vocabulary and merges with bytes to fall back to, as of Llama."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.train_from_iterator(
        CORPUS[:3],
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=["<unk>", "<s>", "</s>", "<pad>", "<mask>", *BYTES],
        ),
    )
    return vocabulary_and_merges(inner)


@functools.cache
def unigram_scores() -> list[tuple[str, float]]:
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>")
    )
    learned = json.loads(inner.to_str())["model"]["vocab"]
    return [("▁sat", -2.0), *(tuple(entry) for entry in learned if entry[0] not in ("<unk>", "▁sat"))]


def wrapped(inner: tokenizers.Tokenizer, **special) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def framed(inner: tokenizers.Tokenizer, single: str, *special: str) -> None:
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, inner.token_to_id(token)) for token in special]
    )


def gpt2():
    return transformers.GPT2Tokenizer(
        **vocabulary_and_merges(byte_level(end="<|endoftext|>", mask="<mask>")), mask_token="<mask>"
    )


def gpt2_with_prefix_space():
    return transformers.GPT2Tokenizer(
        **vocabulary_and_merges(byte_level(end="<|endoftext|>", mask="<mask>")),
        mask_token="<mask>",
        add_prefix_space=True,
    )


def qwen2():
    return transformers.Qwen2Tokenizer(
        **vocabulary_and_merges(byte_level(end="<|endoftext|>", mask="<|mask|>")), mask_token="<|mask|>"
    )


def roberta():
    """Its mask token takes the space before it, as the published one does."""
    special = dict(bos="<s>", pad="<pad>", eos="</s>", unk="<unk>", mask="<mask>")
    return transformers.RobertaTokenizer(
        **vocabulary_and_merges(byte_level(**special)),
        mask_token=tokenizers.AddedToken("<mask>", lstrip=True, special=True),
    )


def llama(**options):
    return transformers.LlamaTokenizer(**sentencepiece_bpe(), mask_token="<mask>", **options)


def llama_with_bos():
    tokenizer = llama(legacy=True)
    framed(tokenizer.backend_tokenizer, "<s> $A", "<s>")
    return tokenizer


def metaspace(scheme: str, end: bool = False):
    inner = tokenizers.Tokenizer(models.BPE(**sentencepiece_bpe(), byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([] if scheme == "never" else [decoders.Strip(" ", 1, 0)]),
        ]
    )
    framed(inner, "<s> $A </s>" if end else "<s> $A", "<s>", *["</s>"] * end)
    return wrapped(inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", mask_token="<mask>")


def llama_normalized():
    """The way of the first Llama files: a normalizer puts the space before every piece."""
    tokenizer = metaspace("never")
    inner = tokenizer.backend_tokenizer
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = None
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def gemma():
    return transformers.GemmaTokenizer(
        **sentencepiece_bpe(), bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


def t5():
    return transformers.T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigram_scores()], mask_token="<mask>"
    )


def xlm_roberta():
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return transformers.XLMRobertaTokenizer(
        vocab=[*special, *unigram_scores(), ("<mask>", 0.0)],
        mask_token=tokenizers.AddedToken("<mask>", lstrip=True, special=True),
    )


def albert():
    """Unigram with a normalizer that lower-cases, strips accents and joins spaces."""
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    inner = tokenizers.Tokenizer(
        models.Unigram([*((token, 0.0) for token in special), *unigram_scores()], unk_id=1)
    )
    inner.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Strip(),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    framed(inner, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return wrapped(
        inner,
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token=tokenizers.AddedToken("[MASK]", lstrip=True, special=True),
    )


def bert(**options):
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, show_progress=False, special_tokens=special)
    )
    return transformers.BertTokenizer(vocab=inner.get_vocab(), **options)


class Slow(transformers.PythonBackend):
    """A tokenizer in Python, of single characters, with [CLS] and [SEP] around a text."""

    def __init__(self, **options):
        special = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
        letters = sorted({*"".join(CORPUS)})
        self.letters = {token: index for index, token in enumerate([*special.values(), *letters])}
        super().__init__(
            **special,
            **options,
            special_tokens_pattern="cls_sep",
            token_type_ids_pattern="all_zeros",
        )

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text, **_):
        return [*text]

    def _convert_token_to_id(self, token):
        return self.letters.get(token, self.letters["[UNK]"])

    def _convert_id_to_token(self, index):
        return [*self.letters][index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


class Own:
    """A user's own object: bytes behind a first token 256; mask token 257; end token 258."""

    mask_token_id, eos_token_id = 257, 258

    def __len__(self):
        return 259

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [256] * add_special_tokens + [*text.encode()]}

    def decode(self, ids, skip_special_tokens=False):
        return bytes(token for token in ids if token < 256).decode(errors="replace")


TOKENIZERS: dict[str, Callable] = {
    "GPT-2": gpt2,
    "GPT-2 with a prefix space": gpt2_with_prefix_space,
    "Qwen2": qwen2,
    "RoBERTa": roberta,
    "Llama, legacy": functools.partial(llama, legacy=True),
    "Llama": functools.partial(llama, legacy=False),
    "Llama without a prefix space": functools.partial(llama, legacy=False, add_prefix_space=False),
    "Llama with a first token": llama_with_bos,
    "Llama by a normalizer": llama_normalized,
    "Metaspace first": functools.partial(metaspace, "first"),
    "Metaspace always": functools.partial(metaspace, "always"),
    "Metaspace never, end token": functools.partial(metaspace, "never", end=True),
    "Gemma": gemma,
    "T5": t5,
    "XLM-R": xlm_roberta,
    "ALBERT": albert,
    "BERT": bert,
    "BERT, cased": functools.partial(bert, do_lower_case=False),
    "ByT5": functools.partial(transformers.ByT5Tokenizer, mask_token="<extra_id_0>"),
    "slow": Slow,
    "a user's own": Own,
}
LOSSLESS = (
    "GPT-2", "GPT-2 with a prefix space", "Qwen2", "RoBERTa", "Llama, legacy", "Llama",
    "Llama without a prefix space", "Llama with a first token", "Llama by a normalizer", "Metaspace first",
    "Metaspace always", "Metaspace never, end token", "Gemma", "ByT5", "a user's own",
)  # fmt: skip


@functools.cache
def tokenizer_of(kind: str):
    return TOKENIZERS[kind]()
