"""Turn a language model of transformers into a diffusion language model that is ready to train.

The package imports this module, so that `dllm_train.convert` is the function; it does heavy imports itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def convert(
    source: str | Path,
    target: str | Path,
    *,
    objective: str | None = None,
    block_size: int | None = None,
    shift: bool | None = None,
    mask_token: str | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype | str | None = None,
    weights: str | None = None,
    tokenizer=None,
    base: str | Path | None = None,
    layout: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `source` to the folder `target` as a diffusion checkpoint, and return the folder.

    source: a folder or hub name of a causal LM, a masked LM or a diffusion model, or of a peft adapter, which
        is merged in; or a .gguf file.
    objective: "mdlm" (bidirectional attention) or "bd3lm" (block-causal attention); None keeps that of a
        diffusion model, and is "mdlm" for others.
    block_size: of "bd3lm", >= 1; 32 where neither it nor the source says one. For "mdlm" it is the length of
        blocks in sampling.
    shift: whether the output at position i-1 predicts the token at i. None keeps it: True for causal LMs
        [Dream, DiffuLLaMA, Fast-dLLM v2], False for masked LMs, as it was for diffusion models. False on a
        causal LM [A2D, SDAR] makes the model learn to predict in place.
    mask_token: None is the tokenizer's own, or else "<|mask|>", which is added. The embedding and the head
        grow when they have no row for it; its rows start as the mean of the rows in use.
    chat_template: a Jinja template; None keeps the tokenizer's own, and gives masked LMs a default one.
    dtype: of the weights; None keeps the source's (float32 for GGUF files).
    weights: "bfloat16" or "int8" for a model whose linear layers store their weights so, to sample and not to
        train; q8_0 layers of a GGUF file keep its bytes as int8. None keeps the source's.
    tokenizer: one of transformers, or a folder that has one; None reads the source's.
    base: the base model of a source that is a peft adapter, in place of the one that it names.
    layout: a family's own config.json and weight names, such as "llada"; None is the stock layout.
    overwrite: whether a target that exists may be replaced.

    The target is written beside its place and renamed when it is complete. ValueError: a mask token with
    another role, an architecture that stays causal under any mask, missing or unexpected weights or wrong
    shapes, and conflicting options. FileExistsError: the target exists.
    """
    import dllm_kernels as dk
    from dllm_train.conversion import marks
    from dllm_train.conversion.chat_template import chat_template_of
    from dllm_train.conversion.mask_token import add_mask_token
    from dllm_train.conversion.sources import read_source
    from dllm_train.conversion.target import free_target
    from dllm_train.conversion.tokenizer_check import check_reads_back
    from dllm_train.conversion.visibility import check_visibility

    marks.check_training(objective, block_size, shift)
    if weights not in (None, "bfloat16", "int8"):
        raise ValueError(f"weights is {weights!r:.80}; allowed: 'bfloat16', 'int8', None")
    target = free_target(source, target, overwrite)
    model, tokenizer = read_source(source, dtype, tokenizer, base, weights)
    trained = bool(model.config.diffusion["attention"])
    marks.mark(model, objective, block_size, shift)
    if tokenizer is not None:
        marks.name_end_tokens(model, tokenizer)
    add_mask_token(model, tokenizer, mask_token, trained)
    check_visibility(model)
    if tokenizer is not None:
        tokenizer.chat_template = chat_template_of(model, tokenizer, chat_template)
        marks.choose_chat_options(model, tokenizer)
        check_reads_back(tokenizer, model.config)
    elif chat_template is not None:
        raise ValueError(f"chat_template is given, but {source} has no tokenizer; give tokenizer=")
    dk.save(model, tokenizer, target, layout=layout)
    return target
