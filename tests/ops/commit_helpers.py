"""Rules to try, statistics made up, and one commit of a row of masks."""

import torch

import dllm_kernels as dk

MASK = 99
RULES = [
    dk.Rule.quota(),
    dk.Rule.quota(confidence="margin"),
    dk.Rule.quota(confidence="entropy"),
    dk.Rule.quota(confidence="random"),
    dk.Rule.quota(alg_temp=0.5),
    dk.Rule.threshold(0.5),
    dk.Rule.threshold(0.5, strict=True),
    dk.Rule.threshold(-1.0, confidence="entropy"),
    dk.Rule.factor(1.0),
    dk.Rule.factor(1.5, strict=True),
    dk.Rule.quota_or_threshold(0.75),
    dk.Rule.entropy_bound(1.25),
    dk.Rule.bernoulli(4),
    dk.Rule.bernoulli(1, eps=0.5),
]
STEPWISE = [  # they need more than a block's masked logits of one step
    dk.Rule.confident_stable(0.5, 0.25, 2),
    dk.Rule.confident_stable(0.25, 0.5, 1, strict=False, confidence="margin"),
    dk.Rule.edit(0.5, 0.75),
    dk.Rule.edit(0.75, 0.25, strict=False),
]


def stats_of(prob, token=None, margin=None, entropy=None, dtype=torch.float32) -> dk.TokenStats:
    prob = torch.as_tensor(prob, dtype=dtype)
    token = torch.zeros(prob.shape, dtype=torch.int64) if token is None else torch.as_tensor(token)
    margin = prob if margin is None else torch.as_tensor(margin, dtype=dtype)
    entropy = 1 - prob if entropy is None else torch.as_tensor(entropy, dtype=dtype)
    return dk.TokenStats(token, prob, margin, entropy, prob)


def accepted_of(prob, rule, quota=None, divergence=None, **options) -> list[int]:
    """Indices that a row of masked candidates with these confidences commits."""
    canvas = torch.full((1, len(prob)), MASK)
    positions = torch.arange(len(prob), dtype=torch.int32)[None]
    stats = stats_of([prob])
    if divergence is not None:
        stats = stats._replace(divergence=torch.tensor([divergence]))
    accepted = dk.commit_(canvas, positions, stats, rule, mask_id=MASK, quota=quota, **options)
    assert torch.equal(accepted, canvas != MASK)
    return accepted[0].nonzero().flatten().tolist()
