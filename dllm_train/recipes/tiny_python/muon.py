"""Muon (Jordan et al. 2024) in float32: momentum orthogonalised by Newton-Schulz, matrices of one shape
batched, the work divided among processes.

torch.optim.Muon iterates in bfloat16, which CPUs without bfloat16 instructions emulate slowly.
"""

import torch
from torch import distributed

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """params: matrices [rows, columns] of hidden layers, whose gradients are equal in all processes.

    Step: W <- W (1 - lr decay) - lr sqrt(max(1, rows / columns)) NS(m), with m the Nesterov momentum and
    NS(U S V^T) ~ U V^T.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, iterations=5):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations)
        super().__init__(params, defaults)
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("params of Muon must be matrices")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            momenta = [self._nesterov(p, group["momentum"]) for p in params]
            updates = orthogonalised(momenta, group["iterations"])
            for p, update in zip(params, updates, strict=True):
                rows, columns = p.shape
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _nesterov(self, p, momentum):
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)


def orthogonalised(matrices: list[torch.Tensor], iterations: int = 5) -> list[torch.Tensor]:
    """Return the nearest semi-orthogonal matrices, singular values in about 0.7..1.2. Process r of n computes
    matrices r, r + n, ... of every shape and gets the others' results."""
    rank, world = (
        (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    )
    by_shape: dict = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    results = [torch.zeros_like(m) for m in matrices]
    for members in by_shape.values():
        own = members[rank::world]
        if own:
            for i, result in zip(
                own, newton_schulz(torch.stack([matrices[i] for i in own]), iterations), strict=True
            ):
                results[i] = result
    if world > 1:
        flat = torch.cat([r.flatten() for r in results])
        distributed.all_reduce(flat)
        results = [
            f.view_as(r) for f, r in zip(flat.split([r.numel() for r in results]), results, strict=True)
        ]
    return results


def newton_schulz(matrices: torch.Tensor, iterations: int) -> torch.Tensor:
    """Return [N, rows, columns] float32, by X <- aX + b(XX^T)X + c(XX^T)^2 X."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
