"""Layers of a stock transformers model whose norms, rotations and gated MLPs are single operators.

`fuse_layers` gives the modules it recognises another class, a subclass of their own by the same name whose
forward calls `rms_norm`, `rotate_half` and `silu_mul`. Modules keep their place, Parameters, adapters and
hooks. A class is recognised by the bytecode of its forward, which must be that of Llama's in the installed
transformers (as for Qwen, Mistral and most others), and by a trial: both forwards must compute the same on a
small input.

A fused module computes as its stock class does whenever the operators do not fit: for other dtypes and
devices, for tensor subclasses (DTensor), and for mixed dtypes as under autocast.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable
from types import CellType, FunctionType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama

from dllm_kernels.models.late_rotation import leave_rotation
from dllm_kernels.models.merged_projections import is_plain_linear
from dllm_kernels.ops import rms_norm, rotate_half, silu_mul  # noqa: F401  (fake kernels and gradients)

# The operators, without what their functions check in Python: a small model calls these a hundred times in a
# step of a millisecond.
_rms_norm = torch.ops.dllm_kernels.rms_norm.default
_add_rms_norm = torch.ops.dllm_kernels.add_rms_norm.default
_silu_mul = torch.ops.dllm_kernels.silu_mul.default
_silu_mul_backward = torch.ops.dllm_kernels.silu_mul_backward.default
_rotate_half = torch.ops.dllm_kernels.rotate_half.default

_DTYPES = torch.float32, torch.bfloat16, torch.float16
_OPERATORS = _rms_norm, _add_rms_norm, _silu_mul, _rotate_half
# Types of devices whose kernels are registered.
FUSING_DEVICES = frozenset(
    key.lower()
    for key in ("CPU", "CUDA")
    if all(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for op in _OPERATORS)
)


def fuse_layers(model: nn.Module) -> int:
    """Make the layers of `model` use fused operators from now on; return how many modules do.

    Recognised are RMS norms, decoder layers (the residual sum and the norm after attention), MLPs gated by
    SiLU, and the rotation of queries and keys in attention, in Llama, Qwen2, Qwen3, Mistral and other models
    whose classes compute the same. Other modules are left alone, and so is a model on a device without these
    operators. A module whose forward was replaced on the instance is left alone too. Calling this again
    changes nothing. Works with gradients, which keep less in memory than the stock layers', with merged
    projections, stored weights, adapters, copies and pickles, and under torch.compile.
    Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    devices = {parameter.device.type for parameter in model.parameters()}
    if not devices <= FUSING_DEVICES | {"meta"}:
        return 0
    fused = 0
    for module in reversed([*model.modules()]):  # a layer after its norms
        if not isinstance(module, _Fused) and "forward" not in vars(module):
            kind = _fused_class(type(module))
            if kind is not None and kind._fits_instance(module):
                module.__class__ = kind
        fused += isinstance(module, _Fused)
    return fused


# ---- the classes -------------------------------------------------------------------------------------------
class _Fused:
    """First base of the classes that `fuse_layers` makes; copies and pickles name the stock class."""

    _stock: type[nn.Module]

    @classmethod
    def _fits_instance(cls, module: nn.Module) -> bool:
        return True

    def __reduce_ex__(self, protocol: int):
        _, (_, *arguments), *state = super().__reduce_ex__(max(protocol, 2))
        return _new_fused, (self._stock, *arguments), *state


def _new_fused(stock: type[nn.Module], *arguments) -> nn.Module:
    kind = _fused_class(stock) or stock
    return kind.__new__(kind, *arguments)


@functools.cache
def _fused_class(stock: type[nn.Module]) -> type[nn.Module] | None:
    """Return the fused subclass of a module's class, or None if it is not recognised."""
    for base, build in (
        (_FusedNorm, _norm_forward),
        (_FusedMLP, _mlp_forward),
        (_FusedLayer, _layer_forward),
        (_Fused, _attention_forward),
    ):
        forward = build(stock.forward)
        if forward is not None:
            names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "_stock": stock}
            return type(stock.__name__, (base, stock), {**names, "forward": forward})
    return None


def _fits(first: Tensor, *others: Tensor) -> bool:
    """Return whether the operators take these tensors: plain, of one dtype, on one device with kernels."""
    device, dtype = first.device, first.dtype
    if type(first) not in _PLAIN or dtype not in _DTYPES or device.type not in FUSING_DEVICES:
        return False
    for other in others:
        if type(other) not in _PLAIN or other.dtype != dtype or other.device != device:
            return False
    return True


_PLAIN = Tensor, nn.Parameter


def _has_hooks(module: nn.Module) -> bool:
    every = vars(torch.nn.modules.module)
    return "forward" in vars(module) or any(vars(module)[name] or every[f"_global{name}"] for name in _HOOKS)


_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


# ---- norms -------------------------------------------------------------------------------------------------
class _FusedNorm(_Fused):
    @classmethod
    def _fits_instance(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and weight.dim() == 1 and isinstance(module.variance_epsilon, float)


def _norm_forward(stock: Callable) -> Callable | None:
    if not _reads_like(stock, llama.LlamaRMSNorm.forward):
        return None

    @functools.wraps(stock)
    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if _fits(hidden_states, weight):
            return _rms_norm(hidden_states, weight, self.variance_epsilon)
        return stock(self, hidden_states)

    return _tried(forward, stock, SimpleNamespace(weight=_ramp(8), variance_epsilon=0.1), _ramp(3, 8))


def _add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return norm(residual + x) and residual + x."""
    if isinstance(norm, _FusedNorm) and not _has_hooks(norm) and x.shape == residual.shape:
        weight = norm.weight
        if _fits(x, residual, weight):
            return _add_rms_norm(x, residual, weight, norm.variance_epsilon)
    total = residual + x
    return norm(total), total


# ---- decoder layers ----------------------------------------------------------------------------------------
class _FusedLayer(_Fused):
    @classmethod
    def _fits_instance(cls, module: nn.Module) -> bool:
        return isinstance(module.post_attention_layernorm, _FusedNorm)


def _layer_forward(stock: Callable) -> Callable | None:
    innermost = inspect.unwrap(stock)
    if not _reads_like(innermost, llama.LlamaDecoderLayer.forward):
        return None
    code, defaults = innermost.__code__, innermost.__defaults__ or ()
    names = code.co_varnames[2 : code.co_argcount]  # after self and hidden_states
    if len(defaults) != len(names):
        return None
    unset = dict(zip(names, defaults, strict=True))

    @functools.wraps(innermost)
    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        given = {**unset, **dict(zip(names, args, strict=False)), **kwargs}
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        normed, total = _add_and_norm(self.post_attention_layernorm, attended, hidden_states)
        return total + self.mlp(normed)

    seen = []
    parts = SimpleNamespace(
        input_layernorm=lambda x: 2 * x,
        self_attn=lambda hidden_states, **given: (seen.append(given) or hidden_states + 1, None),
        post_attention_layernorm=lambda x: x - 3,
        mlp=lambda x: x * x,
    )
    given = {name: object() for name in (*names, "another")}
    if _tried(forward, innermost, parts, _ramp(3, 8), **given) is None or seen != [given, given]:
        return None
    return _rewrapped(stock, innermost, forward)


# ---- gated MLPs --------------------------------------------------------------------------------------------
class _FusedMLP(_Fused):
    gated_pair = None  # what gate_layers puts here

    @classmethod
    def _fits_instance(cls, module: nn.Module) -> bool:
        return _is_silu(module.act_fn)


def is_gated_mlp(module: nn.Module) -> bool:
    """Return whether `module` is an MLP of `fuse_layers`: down(silu(gate(x)) · up(x))."""
    return isinstance(module, _FusedMLP) and _is_silu(module.act_fn)


_SILU = frozenset({nn.SiLU, type(ACT2FN["silu"])})


def _is_silu(activation: object) -> bool:
    return type(activation) in _SILU and not _has_hooks(activation)


def _mlp_forward(stock: Callable) -> Callable | None:
    if not _reads_like(stock, llama.LlamaMLP.forward):
        return None

    @functools.wraps(stock)
    def forward(self, x: Tensor) -> Tensor:
        pair, activation = getattr(self, "gated_pair", None), self.act_fn
        if pair is not None and _is_silu(activation):
            joined = pair.product(self.gate_proj, self.up_proj, x)
            if joined is not None:
                return self.down_proj(joined)
        gate = self.gate_proj(x)
        if not _is_silu(activation):
            return self.down_proj(activation(gate) * self.up_proj(x))
        up = self.up_proj(x)
        if not _fits(gate, up) or gate.shape != up.shape:
            return self.down_proj(activation(gate) * up)
        return _project_down(self.down_proj, gate, up)

    parts = SimpleNamespace(
        gate_proj=lambda x: x, up_proj=lambda x: x + 1, down_proj=lambda x: 2 * x, act_fn=ACT2FN["silu"]
    )
    return _tried(forward, stock, parts, _ramp(3, 8))


def _project_down(projection: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Return projection(silu(gate) · up)."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        plain = is_plain_linear(projection) and not _has_hooks(projection)
        if plain and not torch.is_autocast_enabled(gate.device.type) and not torch.compiler.is_compiling():
            weight, bias = projection.weight, projection.bias
            if _fits(gate, weight, *(() if bias is None else (bias,))):
                return _Down.apply(gate, up, weight, bias)
    return projection(_silu_mul(gate, up))


class _Down(torch.autograd.Function):
    """F.linear(silu(gate) · up, weight, bias), whose backward pass recomputes the product: it would be kept
    for the gradient of weight alone."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(_silu_mul(gate, up), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        gate, up, weight, _ = inputs
        ctx.save_for_backward(gate, up, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        gate, up, weight = ctx.saved_tensors
        needs_gate, needs_up, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_weight = rows.T @ _silu_mul(gate, up).flatten(0, -2) if needs_weight else None
        grad_bias = rows.sum(0) if needs_bias else None
        grads = _silu_mul_backward(grad @ weight, gate, up)
        grad_gate, grad_up = (
            g if need else None for g, need in zip(grads, (needs_gate, needs_up), strict=True)
        )
        return grad_gate, grad_up, grad_weight, grad_bias


# ---- rotation of queries and keys --------------------------------------------------------------------------
_STOCK_ROTATION = "apply_rotary_pos_emb"


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Compute what transformers' apply_rotary_pos_emb does."""
    if _can_rotate(q, k, cos, sin, unsqueeze_dim):
        return _rotate_half(q, k, cos, sin)
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def _rotate_late(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Do as _rotate, or leave it to the attention that follows and return q and k as they are."""
    if _can_rotate(q, k, cos, sin, unsqueeze_dim) and leave_rotation(q, k, cos, sin):
        return q, k
    return _rotate(q, k, cos, sin, unsqueeze_dim)


def _can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> bool:
    if unsqueeze_dim != 1 or not q.dim() == k.dim() == 4 or cos.dim() != 3 or not _fits(q, k, cos, sin):
        return False
    batch, _, length, dim = q.shape
    fits = k.shape[0] == batch and k.shape[2] == length and k.shape[3] == dim and dim % 2 == 0
    return fits and cos.shape == sin.shape == (cos.shape[0], length, dim) and cos.shape[0] in (1, batch)


# The rotations by the names under which forwards find them.
_ROTATIONS = {"dllm_apply_rotary_pos_emb": _rotate, "dllm_late_rotary_pos_emb": _rotate_late}
# Attention classes whose forward hands what it has rotated to the attention function as it is.
_HAND_ON = {name: f"{name.title()}Attention" for name in ("llama", "mistral", "qwen2", "qwen3")}


def _hands_on(forward: Callable) -> bool:
    """Return whether a forward reads like that of a class of _HAND_ON, in a module that is loaded."""
    modules = ((sys.modules.get(f"transformers.models.{n}.modeling_{n}"), c) for n, c in _HAND_ON.items())
    return any(module and _reads_like(forward, getattr(module, name).forward) for module, name in modules)


def _attention_forward(stock: Callable) -> Callable | None:
    """Return `stock`, with another function called by the name of transformers' rotation.

    The name is changed in the bytecode, and the function put beside the other in the module of the class, so
    that the forward goes on using the module's other functions.
    """
    innermost = inspect.unwrap(stock)
    code = getattr(innermost, "__code__", None)
    if code is None or _STOCK_ROTATION not in code.co_names:
        return None
    rotation = innermost.__globals__.get(_STOCK_ROTATION)
    if not _is_stock_rotation(rotation) or not _only_global(code, _STOCK_ROTATION):
        return None
    ours = "dllm_late_rotary_pos_emb" if _hands_on(stock) else "dllm_apply_rotary_pos_emb"
    names = tuple(ours if name == _STOCK_ROTATION else name for name in code.co_names)
    forward = FunctionType(
        code.replace(co_names=names), innermost.__globals__, innermost.__name__,
        innermost.__defaults__, innermost.__closure__,
    )  # fmt: skip
    functools.update_wrapper(forward, innermost)
    forward.__kwdefaults__ = innermost.__kwdefaults__
    innermost.__globals__[ours] = _ROTATIONS[ours]
    return _rewrapped(stock, innermost, forward)


@functools.cache
def _is_stock_rotation(rotation: object) -> bool:
    if not _reads_like(rotation, llama.apply_rotary_pos_emb):
        return False
    half = inspect.unwrap(rotation).__globals__.get("rotate_half")
    if not _reads_like(half, llama.rotate_half):
        return False
    heads, angles = _ramp(1, 2, 3, 4), _ramp(1, 3, 4)
    return _agree(_rotate(heads, -heads, angles, 2 * angles), rotation(heads, -heads, angles, 2 * angles))


def _only_global(code, name: str) -> bool:
    """Return whether `code` uses `name` for a global variable only."""
    uses = {instruction.opname for instruction in dis.get_instructions(code) if instruction.argval == name}
    return uses == {"LOAD_GLOBAL"}


# ---- recognition -------------------------------------------------------------------------------------------
def _reads_like(function: object, other: Callable) -> bool:
    """Return whether two functions have the same bytecode, arguments, names and constants."""
    if not callable(function):
        return False
    first, second = inspect.unwrap(function), inspect.unwrap(other)
    return isinstance(first, FunctionType) and _code(first) == _code(second)


def _code(function: FunctionType) -> tuple:
    code = function.__code__
    constants = code.co_consts[1:]  # after the docstring
    arguments = code.co_argcount, code.co_kwonlyargcount, function.__defaults__, function.__kwdefaults__
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants, *arguments


def _tried(forward: Callable, stock: Callable, module: object, x: Tensor, **kwargs) -> Callable | None:
    """Return `forward` if it computes what `stock` does with the parts of `module`."""
    return forward if _agree(forward(module, x, **kwargs), stock(module, x, **kwargs)) else None


@torch.no_grad()
def _agree(outputs: Tensor | tuple, others: Tensor | tuple) -> bool:
    pairs = zip(outputs, others, strict=True) if isinstance(outputs, tuple) else ((outputs, others),)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def _ramp(*shape: int) -> Tensor:
    """Return numbers from -1.7 to 2.3."""
    size = torch.Size(shape).numel()
    return torch.linspace(-1.7, 2.3, size, dtype=torch.float32, device="cpu").view(shape)


def _rewrapped(function: Callable, innermost: Callable, other: Callable) -> Callable | None:
    """Return `function` with `other` in place of the `innermost` function that its decorators wrap; None if
    they do not keep it where it is found."""
    if function is innermost:
        return other
    inner = _rewrapped(function.__wrapped__, innermost, other)
    cells = [
        inner if cell.cell_contents is function.__wrapped__ else None for cell in function.__closure__ or ()
    ]
    if inner is None or not any(cells):
        return None
    closure = tuple(
        cell if new is None else CellType(new) for cell, new in zip(function.__closure__, cells, strict=True)
    )
    wrapper = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    functools.update_wrapper(wrapper, function)
    wrapper.__kwdefaults__, wrapper.__wrapped__ = function.__kwdefaults__, inner
    return wrapper
