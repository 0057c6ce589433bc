"""Counts of generated tokens, as the field defines them."""

from torch import Tensor


def tokens_to_end(ids: Tensor, prompt_length: int, end_id: int) -> int:
    """Return how many completion tokens `ids` [B, prompt_length + T] have up to and without the end token."""
    ended = (ids[:, prompt_length:] == end_id).cumsum(dim=1) > 0
    return int((~ended).sum())
