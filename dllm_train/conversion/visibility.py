"""Check by a model's outputs that its mask is the one in its config's "diffusion" entry."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from dllm_kernels.models.attention import see_as_trained


def check_visibility(model) -> None:
    """Raise ValueError if `model` would compute other attention than the conversion promises.

    A bidirectional model must look ahead by transformers' `config.is_causal = False` alone, without this
    library. A block-causal one must see the tokens of its block and not those of the next.
    """
    config = model.config
    entry = config.diffusion
    blocks = entry["attention"][0] == "block_causal"
    try:
        if blocks:
            config.diffusion = {**entry, "block_size": 2}
            see_as_trained(model)
        else:
            del config.diffusion  # in this process it would ask for masks of ours
            config.is_causal = False
        same_block, next_block = _effects_on_the_first(model)
    finally:
        config.diffusion = entry
        vars(config).pop("is_causal", None)  # dk.save writes it where it belongs
    kind = type(model).__name__
    if same_block < 1e-5:  # not 0: rounding of experts depends on their number of tokens
        raise ValueError(
            f"{kind} computes causal attention whatever mask transformers gives it, so it cannot become a "
            f"{entry['attention'][0]} model"
        )
    if blocks and next_block > 0.1 * same_block:
        raise ValueError(f"{kind} does not take the block-causal mask: its tokens see blocks after theirs")


@torch.no_grad()
def _effects_on_the_first(model) -> tuple[float, float]:
    """Return how far the first token's logits move, as a share, with the second token and with the third."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def first(*ids: int) -> Tensor:
        logits = model(input_ids=torch.tensor([ids], device=model.device), **options).logits
        return logits[0, 0].float()

    padding = getattr(model.config, "pad_token_id", None)  # which some models give a position of its own
    a, b = [token for token in range(3) if token != padding][:2]
    try:
        given, second, third = first(a, a, a, a), first(a, b, a, a), first(a, a, b, a)
    except Exception as error:  # any error of a forward that needs more than ids
        raise ValueError(
            f"the forward of {type(model).__name__} fails for four ids ({type(error).__name__}: {error})"
        ) from error
    scale = given.abs().max()
    return float((second - given).abs().max() / scale), float((third - given).abs().max() / scale)
