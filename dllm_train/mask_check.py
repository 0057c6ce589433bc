"""Detect models that do not follow a mask: recurrent, hybrid, or causal under any mask."""

from __future__ import annotations

import inspect
import weakref

import torch

from dllm_kernels import SpanMask
from dllm_kernels.models.families import FAMILIES
from dllm_train.attention_masks import accepts, first_position, mask_arguments
from dllm_train.sharding import is_sharded

# Query 0 sees ahead, query 3 back, query 2 neither of the tokens before it.
_VISIBLE = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], device="cpu").bool()
_RUNS_UNDER_DROPOUT = 3

_OBEDIENT: weakref.WeakSet = weakref.WeakSet()


@torch.compiler.disable
def refuse_models_without_masks(model) -> None:
    """Raise ValueError if tokens that a mask hides from a query change its output, or visible ones do not.

    Runs once per model, on four tokens, for models of no known family. Gradients of the outputs show their
    dependences. Sharded models and recomputed layers, which gradients inside a forward would disturb, are not
    checked.
    """
    base = model.base_model
    if model.config.model_type in FAMILIES or model in _OBEDIENT:
        return
    recomputes = base.training and any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    takes_embeddings = "inputs_embeds" in inspect.signature(type(base).forward).parameters
    if recomputes or not takes_embeddings or is_sharded([base]):
        return
    try:
        runs = _RUNS_UNDER_DROPOUT if base.training else 1
        seen = torch.stack([_dependencies(model) for _ in range(runs)]).any(0)
    except Exception as error:
        raise ValueError(_refusal(model, f"{type(error).__name__}: {error}")) from error
    if (seen & ~_VISIBLE).any():
        raise ValueError(_refusal(model, "outputs depend on tokens that the mask hides"))
    if seen[3, 2] and not seen[0, 1]:
        raise ValueError(_refusal(model, "outputs do not depend on later tokens that the mask shows"))
    if seen[0, 1]:
        _OBEDIENT.add(model)


def _dependencies(model) -> torch.Tensor:
    """Return bool [4, 4] on the CPU: whether the output at q changes with the embedding at k."""
    base, device = model.base_model, model.device
    with torch.inference_mode(False), torch.enable_grad():
        positions = torch.arange(4, device=device)[None]
        arguments = mask_arguments(model, SpanMask.from_dense(_VISIBLE[None]).to(device), positions)
        if accepts(type(base), "position_ids"):
            arguments["position_ids"] = first_position(base) + positions
        embeddings = base.get_input_embeddings()(positions).detach().clone().requires_grad_()
        states = base(inputs_embeds=embeddings, **arguments).last_hidden_state[0]
        direction = torch.arange(states.shape[1], device=device, dtype=states.dtype).cos()
        rows = [torch.autograd.grad(state @ direction, embeddings, retain_graph=True)[0] for state in states]
    return torch.cat(rows).ne(0).any(-1).cpu()


def _refusal(model, reason: str) -> str:
    return (
        f"{type(model).__name__} cannot be trained with this attention: {reason}. Use a model whose layers "
        "attend under any mask, in both directions"
    )
