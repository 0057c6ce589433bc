"""Labels of tiny-python's two objectives: which tokens may be masked, and which are given."""

import numpy as np
import torch

from dllm_train.noise import IGNORED_LABEL
from dllm_train.recipes.tiny_python.settings import BLOCK_SIZE


def mdlm_labels(ids, ends_line, line_share, prompt_share, rng) -> torch.Tensor:
    """Return labels for MDLM: of `line_share` of the rows only some lines may be masked (infilling), of
    `prompt_share` only what follows a random prefix (completion), of the others everything."""
    labels = ids.clone()
    for row in labels:
        kind = rng.random()
        if kind < line_share:
            line = np.cumsum(np.concatenate([[0], ends_line[row[:-1].cpu().numpy()]]))
            given = (rng.random(line[-1] + 1) >= rng.uniform(0.03, 0.3))[line]
            row[torch.from_numpy(given).to(row.device)] = IGNORED_LABEL
        elif kind < line_share + prompt_share:
            row[: rng.integers(0, len(row))] = IGNORED_LABEL
    return labels


def bd3lm_labels(ids, prompt_share, rng) -> torch.Tensor:
    """Return BD3LM labels: in `prompt_share` of the rows a random prefix of every block is given, as in the
    block where a prompt ends."""
    labels = ids.clone()
    offset = torch.arange(ids.shape[1], device=ids.device)
    for row in labels:
        if rng.random() < prompt_share:
            given = torch.from_numpy(rng.integers(0, BLOCK_SIZE, -(-len(row) // BLOCK_SIZE))).to(ids.device)
            row[offset % BLOCK_SIZE < given[offset // BLOCK_SIZE]] = IGNORED_LABEL
    return labels
