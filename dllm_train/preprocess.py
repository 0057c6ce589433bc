"""Tokenize a dataset into a folder, from the command line; an interrupted run can continue.

    python -m dllm_train.preprocess --dataset "chats.jsonl[train:5000,test:100]" --tokenizer Qwen/Qwen3-0.6B
    \\
        --max_length 1024 --output data/chats

Recipes read the folder with `--preprocessed data/chats`.
"""

import os
import sys
from dataclasses import MISSING, dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, HfArgumentParser

from dllm_kernels._arguments import integer
from dllm_train.arguments import ModelArguments, get_tokenizer
from dllm_train.data.preprocessed import write_preprocessed_dataset
from dllm_train.data.pretraining import EncodeDocuments
from dllm_train.data.sft import EncodeExamples
from dllm_train.data.text import check_length


def _field(help: str, default=MISSING, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class PreprocessArguments:
    """Arguments of `load_sft_dataset` or `load_pretraining_dataset`, and the folder to write."""

    dataset: str = _field("dataset specification, such as a.jsonl[train:5000,test:100]+b")
    tokenizer: str = _field("path or hub name of a tokenizer or checkpoint")
    output: str = _field("folder to write, or to go on with")
    kind: str = _field("'sft' or 'pretraining'", "sft", choices=["sft", "pretraining"])
    max_length: int = _field("tokens of a row at most", 1024)
    block_size: int | None = _field("max_length must be a multiple of it", None)
    truncation: str = _field("sft: 'right', 'filter' or 'error'", "right")
    chat: str = _field("sft: 'auto', 'template' or 'plain'", "auto")
    train_on: str = _field("sft: 'all' replies or the 'last' one", "all")
    text_field: str = _field("pretraining: the field of a document", "text")
    packing: bool = _field("pretraining: documents of a row do not see each other", True)
    drop_tail: bool = _field("pretraining: leave out the last, shorter row", False)
    insert_bos: bool = _field("begin with the BOS token", False)
    insert_eos: bool = _field("end with the end token", True)
    seed: int = _field("order in which weighted sources take turns", 0)
    rows_per_shard: int = _field("rows of the dataset that make one shard", 20_000)
    num_proc: int | None = _field("processes that tokenize", None)


SFT_OPTIONS = ("max_length", "truncation", "chat", "train_on", "insert_bos", "insert_eos")
PRETRAINING_OPTIONS = ("max_length", "text_field", "packing", "drop_tail", "insert_bos", "insert_eos")


def preprocess(arguments: PreprocessArguments) -> dict:
    """Write the folder; return {split: {"shards", "rows", "tokens"}}."""
    check_length(arguments.max_length, arguments.block_size)
    tokenizer = _tokenizer(arguments.tokenizer)
    if arguments.kind == "sft":
        options = {name: getattr(arguments, name) for name in SFT_OPTIONS}
        encode = EncodeExamples(tokenizer, **options)
    else:
        options = {name: getattr(arguments, name) for name in PRETRAINING_OPTIONS}
        bos_eos = {name: options[name] for name in ("insert_bos", "insert_eos")}
        encode = EncodeDocuments(tokenizer, arguments.text_field, **bos_eos)
    return write_preprocessed_dataset(
        arguments.output,
        encode,
        dataset=arguments.dataset,
        seed=arguments.seed,
        rows_per_shard=integer("rows_per_shard", arguments.rows_per_shard, 1),
        options={"kind": arguments.kind, "tokenizer": arguments.tokenizer, **options},
        num_proc=arguments.num_proc,
    )


def _tokenizer(name: str):
    """Return the tokenizer that training with a checkpoint uses, or that of a folder without a model."""
    if (Path(name) / "tokenizer_config.json").exists() and not (Path(name) / "config.json").exists():
        return AutoTokenizer.from_pretrained(name)
    return get_tokenizer(ModelArguments(model_name_or_path=name))


def main() -> None:
    """Run the command; bad input ends it with a message and code 2, or a traceback under DLLM_DEBUG=1."""
    (arguments,) = HfArgumentParser(PreprocessArguments).parse_args_into_dataclasses()
    try:
        splits = preprocess(arguments)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("DLLM_DEBUG") == "1":
            raise
        print(f"preprocess: {error}", file=sys.stderr)
        sys.exit(2)
    for split, counts in splits.items():
        print(f"{split}: {counts['rows']} rows, {counts['tokens']} tokens, {counts['shards']} shards")


if __name__ == "__main__":
    main()
