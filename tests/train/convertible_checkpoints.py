"""Tiny checkpoints to convert: random models with tokenizers made on the spot."""

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.train.tiny_models import ENCODERS, VOCABULARY, tiny

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<spare>")
CHAT = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + '<eos>' }}{% endfor %}"


def tokenizer(size=VOCABULARY, **named):
    """Words w5, w6, ... after special tokens, `size` tokens in all; id = the number of the word."""
    words = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), size))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"} | named
    special = {"additional_special_tokens": ["<spare>"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names, **special)


def encoder_tokenizer(size=VOCABULARY):
    """[CLS] ... [SEP] around words, and a [MASK]; the last words of the vocabulary."""
    special = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    words = [*special, *(f"w{index}" for index in range(len(special), size - 2)), "User:", "Assistant:"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **dict(zip(names, special, strict=True))
    )


def write(folder, name, own_tokenizer=None, **entries):
    """Save a tiny model and its tokenizer as transformers does, and return (folder, model)."""
    model = tiny(name, **entries)
    model.save_pretrained(folder)
    made = encoder_tokenizer if name in ENCODERS else tokenizer
    (own_tokenizer or made()).save_pretrained(folder)
    return folder, model
