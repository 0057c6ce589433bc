"""Copies of a model, and what it computes."""

import io

import torch

from tests.sampling.tiny_models import MASK


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def logits(model) -> torch.Tensor:
    ids = torch.randint(0, MASK, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits
