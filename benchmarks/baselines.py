"""Alternatives that a user would otherwise run, for benchmarks to compare with."""

import functools
import importlib.util
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

FLEX_BLOCK_SIZES = {"cpu": (32, 64, 128), "cuda": (128, 256)}  # multiples of its GPU kernels' tiles
SDPA_BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def sdpa(q: Tensor, k: Tensor, v: Tensor, dense_mask: Tensor | None = None) -> Tensor:
    """torch's attention; dense_mask bool [Sq, Sk] or [B, 1, Sq, Sk]."""
    return F.scaled_dot_product_attention(q, k, v, dense_mask, enable_gqa=q.shape[1] != k.shape[1])


def full_attention(device: str) -> dict[str, Callable]:
    """Attention without a mask by every library that is here."""
    if device == "cpu":
        return {"sdpa": sdpa}
    libraries = {f"sdpa, {name}": _with_backend(kind) for name, kind in SDPA_BACKENDS.items()}
    if installed("flash_attn_interface"):
        libraries["FlashAttention 3"] = _flash_attention_3
    return libraries


def _with_backend(kind: SDPBackend) -> Callable:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return sdpa(q, k, v)

    return attention


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def gathered_attention() -> dict[str, Callable]:
    """Attention of a step (see workloads.cached_step) over keys and values that were gathered before."""
    libraries = {"sdpa, gathered": lambda *step: sdpa(step[0], *step[7:])}
    if installed("flashinfer"):
        libraries["FlashInfer, gathered"] = lambda *step: _flashinfer(step[0], *step[7:])
    return libraries


def _flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flashinfer import single_prefill_with_kv_cache

    out = single_prefill_with_kv_cache(q[0].transpose(0, 1), k[0], v[0], causal=False, kv_layout="HND")
    return out.transpose(0, 1)[None]


def best_flex(mask, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable:
    """Compiled flex_attention under `mask` (a SpanMask), with the block size that is fastest on `inputs`."""
    torch.compiler.reset()  # past a few variants of one function torch gives up on compiling it
    compiled = torch.compile(flex_attention, dynamic=False)
    sizes = FLEX_BLOCK_SIZES[inputs[0].device.type]
    candidates = [functools.partial(_flex, compiled, mask.to_block_mask(size)) for size in sizes]
    return min(candidates, key=lambda flex: _seconds(flex, inputs))


def _flex(compiled: Callable, block_mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


def _seconds(function: Callable, inputs: tuple[Tensor, ...]) -> float:
    """The best of three calls, after one that compiles."""
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        function(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def softmax_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Token and its probability as the reference samplers take them: float32 softmax, argmax, gather."""
    probabilities = F.softmax(logits.float(), dim=-1)
    token = probabilities.argmax(dim=-1)
    return token, probabilities.gather(-1, token[:, None])[:, 0]


def gumbel_statistics(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the statistics with the float64 Gumbel-max noise of LLaDA's generate()."""
    noisy = logits.to(torch.float64)
    noise = (-torch.log(torch.rand_like(noisy))) ** temperature
    token = (noisy.exp() / noise).argmax(dim=-1)
    probabilities = F.softmax(logits.to(torch.float64), dim=-1)
    return token, probabilities.gather(-1, token[:, None])[:, 0]


def filtered_statistics(logits: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Token and its probability after top-p and top-k by sorting, as Dream's sampler takes them."""
    ordered, ids = logits.sort(dim=-1, descending=True)
    cumulated = F.softmax(ordered, dim=-1).cumsum(dim=-1)
    removed = F.pad(cumulated[:, :-1] > top_p, (1, 0))
    logits = logits.masked_fill(removed.scatter(-1, ids, removed), -math.inf)
    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probability, token = F.softmax(logits, dim=-1).max(dim=-1)
    return token, probability


def threshold_step(canvas: Tensor, logits: Tensor, threshold: float, mask_id: int) -> Tensor:
    """Fast-dLLM's threshold rule over a canvas [B, T] and logits [B·T, V], as its loop writes it."""
    token, confidence = (x.view(canvas.shape) for x in softmax_statistics(logits))
    masked = canvas == mask_id
    confidence = torch.where(masked, confidence, -math.inf)
    accepted = confidence >= threshold
    accepted.scatter_(1, confidence.argmax(dim=1, keepdim=True), True)
    accepted &= masked
    canvas[accepted] = token[accepted]
    return accepted


def write_pages(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor
) -> None:
    """Write keys and values [B, H, T, D] to their places in pages [pages, page_size, H, D] by indexing."""
    page = page_table.gather(1, (positions // cache_k.shape[1]).long()).long()
    offset = (positions % cache_k.shape[1]).long()
    cache_k[page, offset], cache_v[page, offset] = k.transpose(1, 2), v.transpose(1, 2)


def projected_statistics(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """softmax_statistics of a vocabulary projection."""
    return softmax_statistics(F.linear(hidden, weight))


def cross_entropy_gradients(
    logits: Tensor, targets: Tensor, weights: Tensor, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Σ weights · CE over all rows, and its gradients by `inputs` (default: logits)."""
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    return loss, *torch.autograd.grad(loss, inputs or logits)


def projected_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """Return loss and gradients of hidden and weight, by logits = hidden · weightᵀ."""
    return cross_entropy_gradients(F.linear(hidden, weight), targets, weights, hidden, weight)


def compacted_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """Return loss and gradients by rows of weight other than 0 only."""
    kept = weights.nonzero()[:, 0]
    logits = F.linear(hidden[kept], weight)
    return cross_entropy_gradients(logits, targets[kept], weights[kept], hidden, weight)


def liger_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """Liger's fused loss, which takes weights of 0 and 1 only."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    targets = targets.masked_fill(weights == 0, -100)
    loss = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return loss, *torch.autograd.grad(loss, (hidden, weight))
