"""Workloads of the suites on a CPU and on a GPU: inputs, and the work in them."""

import torch

PAGE_SIZE = 32


def attention_inputs(length, *, batch=1, heads=8, kv_heads=8, head_dim=64, dtype=torch.float32, device="cpu"):
    """A function that makes q, k and v."""

    def tensor(count):
        return torch.randn(batch, count, length, head_dim, dtype=dtype, device=device)

    return lambda: (tensor(heads), tensor(kv_heads), tensor(kv_heads))


def attention_flops(length, density, *, heads=8, head_dim=64, **_):
    """Return FLOPs of the two products, of which `density` of the square of scores is computed."""
    return 4 * heads * head_dim * length**2 * density


def with_gradients(attention):
    """`attention` and the gradients of q, k and v under its output as the output's gradient."""

    def forward_and_backward(*qkv):
        qkv = [t.detach().requires_grad_() for t in qkv]
        out = attention(*qkv)
        return torch.autograd.grad(out, qkv, out.detach())

    return forward_and_backward


GRADIENT_FLOPS = 3.5  # as many as the forward has: two products forward, five backward


def cached_step(cached, *, block=32, heads=8, kv_heads=2, head_dim=64, dtype=torch.float32, device="cpu"):
    """q, fresh k and v, the cache's pages in random order, their spans; the same keys and values gathered."""

    def random(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    q, k, v = (random(1, count, block, head_dim) for count in (heads, kv_heads, kv_heads))
    pages = -(-cached // PAGE_SIZE)
    page_table = torch.randperm(pages, device=device).int()[None]
    caches = [random(pages, PAGE_SIZE, kv_heads, head_dim) for _ in "kv"]
    gathered = [
        torch.cat(
            [cache[page_table[0].long()].flatten(0, 1)[:cached].transpose(0, 1)[None], fresh], 2
        ).contiguous()
        for cache, fresh in zip(caches, (k, v), strict=True)
    ]
    spans = torch.tensor([[[[0, cached]]]], dtype=torch.int32, device=device)
    return q, k, v, *caches, page_table, spans, *gathered


def cached_flops(cached, *, block=32, heads=8, head_dim=64, **_):
    return 4 * heads * block * (cached + block) * head_dim


def random_logits(rows, vocabulary, *, dtype=torch.float32, device="cpu"):
    return lambda: (4 * torch.randn(rows, vocabulary, device=device, dtype=dtype),)


def half_masked(rows, vocabulary, device="cpu"):
    """Targets, and weights of which every second is 0."""
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    weights = (torch.rand(rows, device=device) + 0.5) / rows
    weights[::2] = 0
    return targets, weights


def head_inputs(rows, size, vocabulary, *, device="cpu", dtype=torch.float32, uniform=False):
    """A function that makes hidden states, the head's weight, targets and weights (uniform: 0 or 1)."""

    def make():
        hidden = torch.randn(rows, size, device=device, dtype=dtype)
        weight = torch.randn(vocabulary, size, device=device, dtype=dtype) * size**-0.5
        targets, weights = half_masked(rows, vocabulary, device)
        return (
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            weights.sign() if uniform else weights,
        )

    return make


def head_flops(rows, size, vocabulary):
    """Return FLOPs of the three products, over the rows of weight other than 0."""
    return 3 * 2 * (rows // 2) * size * vocabulary
