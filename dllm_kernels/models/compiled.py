"""A model's own forward under torch.compile, with attention left to the view of each step.

A layer of a stock model is some twenty small kernels around its matrix products; compiled they are a few.
What a step sees changes from step to step and must not be compiled in: in the graph attention is one opaque
operator, which queries the current view when it runs. So one graph serves every cache and every number
of tokens.

On the CPU the whole body is compiled, since calling a compiled function costs as much as several kernels. On
CUDA its layers are compiled: they are alike, so one compilation serves all, and a step that is recorded as a
CUDA graph calls nothing.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch._dynamo import exc as dynamo
from transformers import PreTrainedModel

from dllm_kernels.models.nested_patch import nested_patch
from dllm_kernels.models.probe import structure_of

_FUNCTIONS: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple, Callable]] = weakref.WeakKeyDictionary()


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """Compile the body of `model` within this context, on its first call inside `current`; calls outside
    `current`, also of other threads, use the body as it is. Afterwards it is as before.

    The body is called with what `current` yields as `dllm_view`. Compiled code serves later contexts too, as
    long as the model lives and until a hook is added or removed, or a module or its forward is replaced. If
    torch compiles nothing, or fails to, the body runs as it is, with a warning. ValueError if `model` has no
    separate layers, or if one of them has its own forward (hooks of accelerate, for example), which would be
    bypassed.
    """
    with nested_patch(("compiled", id(model)), partial(_replaced_forwards, model)):
        yield


@contextmanager
def _replaced_forwards(model: PreTrainedModel) -> Iterator[None]:
    regions = _regions(model)
    own = next((type(region).__name__ for region in regions if "forward" in vars(region)), None)
    if own is not None:
        raise ValueError(f"compile=True: the forward of {own} was replaced on the instance")
    with _LOOKING_UP:
        reason = _why_not()
        structure, known = (structure_of(model), _hooks_of(model), reason), _FUNCTIONS.get(model)
        if known is None or known[0] != structure:
            known = _FUNCTIONS[model] = structure, _compiled_forward(type(model).__name__, reason)
    function = known[1]
    with ExitStack() as restored:
        for region in regions:
            restored.callback(vars(region).pop, "forward", None)
            region.forward = partial(_forward, region, function)
        yield


def _forward(region: nn.Module, function: Callable, *args, **kwargs):
    if _step.view is None:
        return type(region).forward(region, *args, **kwargs)
    return function(region, *args, **kwargs)


@contextmanager
def current(view) -> Iterator[_CurrentView]:
    """Make compiled layers attend by `view` within this context; yield the `dllm_view` to pass to a model."""
    _step.view, _step.layer = view, 0
    try:
        yield _CURRENT_VIEW
    finally:
        _step.view = None


_LOOKING_UP = threading.Lock()


def _hooks_of(model: nn.Module) -> tuple:
    """Return the hooks of a model's modules and of all modules; torch numbers them and reuses no number.
    Compiled code does not notice when they change."""
    every = vars(torch.nn.modules.module)
    return (
        *(tuple(every[f"_global{name}"]) for name in _HOOKS),
        *(tuple(vars(module)[name]) for module in model.modules() for name in _HOOKS),
        *(type(module).forward for module in model.modules()),
    )


_HOOKS = "_forward_hooks", "_forward_pre_hooks"


def _compiled_forward(name: str, reason: str | None) -> Callable:
    """Return the forward of a module, compiled if possible. name: of the model; reason: why it is not."""

    def forward(module: nn.Module, *args, **kwargs):
        return type(module).forward(module, *args, **kwargs)

    if reason is not None:
        _warn_uncompiled(name, reason)
        return forward
    # torch limits compilations per code object, so every model gets its own.
    forward.__code__ = forward.__code__.replace()
    whole, failed = torch.compile(forward, fullgraph=True, dynamic=True), False

    def compiled_or_not(module: nn.Module, *args, **kwargs):
        nonlocal failed
        if not failed:
            try:
                return whole(module, *args, **kwargs)
            except (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit) as error:
                # Nothing of the forward has run when its compilation fails.
                failed = True
                reason = str(error).strip().partition("\n\n")[0]  # advice for developers of torch follows
                _warn_uncompiled(name, " ".join(reason.split()))
        return forward(module, *args, **kwargs)

    return compiled_or_not


def _why_not() -> str | None:
    """Return why torch.compile compiles nothing in this process; None if it does."""
    if torch._dynamo.config.disable:
        return "torch.compile is turned off (TORCH_COMPILE_DISABLE or torch._dynamo.config.disable)"
    return None


def _warn_uncompiled(name: str, reason: str) -> None:
    warnings.warn(f"compile=True: {name} is sampled uncompiled: {reason}", stacklevel=2)


def _regions(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules to compile: the body, or its layers in order."""
    if model.device.type == "cpu":
        return [model.base_model]
    count = model.config.num_hidden_layers
    for layers in model.base_model.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            return [*layers]
    raise ValueError(f"compile=True: {type(model).__name__} has no list of {count} layers")


# ---- the operator that stands for attention ----------------------------------------------------------------
class _Step(threading.local):
    """The forward that runs in this thread: what it sees, and how many of its layers have attended."""

    view: object = None
    layer: int = 0


class _CurrentView:
    """Takes the place of a view in a compiled model. It has no state: nothing of a view is compiled in, nor
    the layer's number, in which layers would differ."""

    def attend(self, layer, query, key, value, scale, window) -> Tensor:
        """Attend as StepView.attend does."""
        output = torch.ops.dllm_kernels.attend_current_view(query, key, value, scale, window)
        return output.transpose(1, 2)


_step, _CURRENT_VIEW = _Step(), _CurrentView()

_library = torch.library.Library("dllm_kernels", "FRAGMENT")
_library.define(
    "attend_current_view(Tensor query, Tensor key, Tensor value, float? scale, int? window) -> Tensor"
)


@torch.library.impl(_library, "attend_current_view", "CompositeExplicitAutograd")
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Attend: query [B, Hq, N, D], key and value [B, Hkv, N, D] -> [B, N, Hq, D]. Each layer needs the
    output of the previous one, so they attend in order."""
    layer, _step.layer = _step.layer, _step.layer + 1
    return _step.view.attend(layer, query, key, value, scale, window).transpose(1, 2).contiguous()


@torch.library.register_fake("dllm_kernels::attend_current_view", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3])
