"""Give a model and its tokenizer a mask token without another role."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_kernels.models.families import token_ids
from dllm_kernels.models.stored_weights import KINDS, StoredLinear, store_tied_head
from dllm_kernels.ops.skinny_linear import dequantize_weight, quantize_weight

DEFAULT = "<|mask|>"
_ROLES = ("eos_token", "pad_token", "bos_token", "unk_token", "cls_token", "sep_token")


def add_mask_token(model, tokenizer, mask_token: str | None, trained: bool) -> int:
    """Name a mask token in the model's config and the tokenizer, make room for it, and return its id.

    mask_token: None is the checkpoint's own, else "<|mask|>". trained: whether the model knows its own, as
    diffusion models and masked LMs do; otherwise the token gets the mean of the rows in use, in the embedding
    and in the head. ValueError: the token begins, ends or pads texts, is the unknown token, a word of the
    vocabulary or part of the chat template, or is not the one that the model was trained with.
    """
    if mask_token is not None and (not isinstance(mask_token, str) or not mask_token):
        raise TypeError(f"mask_token is {mask_token!r:.80}; it must be a text or None")
    if tokenizer is None:
        return _add_without_tokenizer(model, mask_token, trained)
    own = _own_mask_token(model, tokenizer)
    if trained and own is None:
        if mask_token not in tokenizer.get_vocab():
            raise ValueError(
                f"mask_token is {mask_token!r}; neither the config nor the tokenizer names the one that "
                "this model was trained with, so name one of the vocabulary"
            )
        own = mask_token
    token = mask_token or own or DEFAULT
    if trained and token != own:
        raise ValueError(f"mask_token is {token!r}; this model was trained with {own!r}, so leave it out")
    _refuse_other_roles(model, tokenizer, token, is_own=token == own)
    in_use = len(tokenizer)
    if tokenizer.mask_token != token:
        tokenizer.add_special_tokens({"mask_token": token})
    mask_id = tokenizer.convert_tokens_to_ids(token)
    if not trained:
        _make_room(model, mask_id, in_use)
    _check_room(model, mask_id)
    model.config.mask_token_id = mask_id
    return mask_id


def _add_without_tokenizer(model, mask_token: str | None, trained: bool) -> int:
    """Return the config's mask token, else that of a new row at the end."""
    if mask_token is not None:
        raise ValueError(f"mask_token is {mask_token!r}, but the source has no tokenizer; give tokenizer=")
    mask_id = getattr(model.config, "mask_token_id", None)
    if mask_id is None and trained:
        raise ValueError(
            "no mask_token_id in config.json and no tokenizer to name the mask token; give tokenizer="
        )
    if mask_id is None:
        mask_id = _rows(model)
        _make_room(model, mask_id, in_use=mask_id)
    elif role := _roles_of_configs(model).get(mask_id):
        raise ValueError(
            f"mask_token_id is {mask_id}, which is the {role}; a mask token must mean nothing else"
        )
    _check_room(model, mask_id)
    model.config.mask_token_id = mask_id
    return mask_id


def _own_mask_token(model, tokenizer) -> str | None:
    """Return the tokenizer's mask token, or the text of the config's."""
    if tokenizer.mask_token is not None:
        return tokenizer.mask_token
    mask_id = getattr(model.config, "mask_token_id", None)
    return None if mask_id is None else tokenizer.convert_ids_to_tokens(mask_id)


# ---- which tokens are free ---------------------------------------------------------------------------------
def _refuse_other_roles(model, tokenizer, token: str, is_own: bool) -> None:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        return
    mask_id = vocabulary[token]
    roles = {getattr(tokenizer, f"{name}_id"): name.replace("_", " ") for name in reversed(_ROLES)}
    role = {**_roles_of_configs(model), **roles}.get(mask_id)
    if role is not None:
        raise ValueError(
            f"mask_token is {token!r}, token {mask_id}, which is the {role}; a mask token must mean nothing "
            f"else. Give another one, such as mask_token={DEFAULT!r}"
        )
    if token in str(tokenizer.chat_template or ""):
        raise ValueError(f"mask_token is {token!r}, which the chat template writes; give another one")
    added = tokenizer.added_tokens_decoder.get(mask_id)
    if not is_own and (added is None or not added.special):
        raise ValueError(
            f"mask_token is {token!r}, which is a word of the vocabulary (token {mask_id}); give a new one, "
            "or a special token that is not in use"
        )


def _roles_of_configs(model) -> dict[int, str]:
    """Return token ids with a role in config.json or generation_config.json."""
    found: dict[int, str] = {}
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
            for token in token_ids(getattr(config, name, None)):
                found[token] = name.removesuffix("_id").replace("_", " ")
    return found


# ---- rows --------------------------------------------------------------------------------------------------
def _rows(model) -> int:
    return model.get_input_embeddings().weight.shape[0]


@torch.no_grad()
def _make_room(model, mask_id: int, in_use: int) -> None:
    """Grow the embedding and the head to include the mask token.

    New rows and that of the mask token are set to the mean of the first `in_use` rows, themselves left out.
    An int8 head keeps the bytes of its other rows; one that is a copy of the embedding is copied again.
    """
    rows = _rows(model)
    stored = model.get_output_embeddings()
    if getattr(stored, "copies_embedding", False):
        _tie(model, stored)
        _make_room(model, mask_id, in_use)
        store_tied_head(model, next(kind for kind, dtype in KINDS.items() if dtype == stored.stored_dtype))
        return
    if isinstance(stored, StoredLinear):
        model.set_output_embeddings(_dequantized(stored))
    if mask_id >= rows:
        model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    new = torch.tensor(sorted({mask_id, *range(rows, mask_id)}))
    head = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight]
    if head is not None:
        weights += [weight for weight in (head.weight, getattr(head, "bias", None)) if weight is not None]
    for weight in {id(weight): weight for weight in weights}.values():
        used = torch.arange(min(in_use, rows, len(weight)))
        weight[new] = weight[used[used != mask_id]].double().mean(dim=0).to(weight.dtype)
    if isinstance(stored, StoredLinear):
        model.set_output_embeddings(_with_rows_of(head, new, stored))


def _tie(model, copy: StoredLinear) -> None:
    """Put a head with the embedding's own weight in the place of one that copies it."""
    head = nn.Linear(copy.in_features, copy.out_features, copy.bias is not None, device="meta")
    head.weight, head.bias = model.get_input_embeddings().weight, copy.bias
    model.set_output_embeddings(head)


def _dequantized(stored: StoredLinear) -> nn.Linear:
    linear = nn.Linear(stored.in_features, stored.out_features, stored.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(dequantize_weight(*stored.parts())), stored.bias
    return linear


def _with_rows_of(head: nn.Linear, new: Tensor, stored: StoredLinear) -> StoredLinear:
    """Return `stored` with rows `new` of `head`, rounded, and as many rows as it."""
    weight, scales = stored.parts()
    more = len(head.weight) - len(weight)
    weight, scales = F.pad(weight, (0, 0, 0, more)), F.pad(scales, (0, 0, 0, more))
    size = None if scales.shape[1] == 1 else stored.in_features // scales.shape[1]
    weight[new], scales[new] = quantize_weight(head.weight[new], size)
    return StoredLinear.of(weight, scales, head.bias)


def _check_room(model, mask_id: int) -> None:
    """Raise ValueError unless embedding, head and config all have the mask token."""
    head = model.get_output_embeddings()
    sizes = {
        "the embedding": _rows(model),
        "the head": _rows(model) if head is None else head.weight.shape[0],
        "vocab_size": model.config.get_text_config().vocab_size,
    }
    for name, size in sizes.items():
        if mask_id >= size:
            raise ValueError(
                f"{name} of this {type(model).__name__} has {size} rows, none for token {mask_id}"
            )
