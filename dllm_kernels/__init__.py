"""Fast kernels and samplers for diffusion language models.

Public names are imported on first use, so that `import dllm_kernels` costs next to nothing.
"""

import importlib

__version__ = "0.2.0"

_MODULE_OF = {
    "SpanMask": "span_mask",
    "block_attention": "ops.attention",
    "cached_attention_plan": "ops.attention",
    "cached_block_attention": "ops.attention",
    "kv_write_": "ops.kv_write",
    "attend_and_write_": "ops.attend_and_write",
    "advance_": "ops.advance",
    "BlockRows": "ops.advance",
    "token_stats": "ops.token_stats",
    "linear_token_stats": "ops.token_stats",
    "TokenStats": "ops.token_stats",
    "commit_": "ops.unmask",
    "unmask_": "ops.unmask",
    "rms_norm": "ops.rms_norm",
    "silu_mul": "ops.silu_mul",
    "rotate_half": "ops.rotate_half",
    "skinny_linear": "ops.skinny_linear",
    "quantize_weight": "ops.skinny_linear",
    "pack_weight": "ops.skinny_linear",
    "PackedWeight": "ops.skinny_linear",
    "diffusion_cross_entropy": "ops.cross_entropy",
    "linear_diffusion_cross_entropy": "ops.linear_cross_entropy",
    "BlockKVCache": "kv_cache",
    "load": "models.checkpoint",
    "save": "models.checkpoint",
    "enable_attention": "models.attention",
    "fuse_layers": "models.fused_layers",
    "sample": "sampling.api",
    "infill": "sampling.api",
    "PrefixCache": "sampling.prefix_cache",
    "choose": "sampling.choose",
    "Choices": "sampling.choose",
    "SampleConfig": "sampling.config",
    "SampleOutput": "sampling.output",
    "Rule": "rule",
    "StepView": "sampling.views",
}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
