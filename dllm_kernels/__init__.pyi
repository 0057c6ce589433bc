"""Public names, for editors and type checkers; `__init__.py` imports the same names on first use."""

from dllm_kernels.kv_cache import BlockKVCache as BlockKVCache
from dllm_kernels.models.attention import enable_attention as enable_attention
from dllm_kernels.models.checkpoint import load as load
from dllm_kernels.models.checkpoint import save as save
from dllm_kernels.models.fused_layers import fuse_layers as fuse_layers
from dllm_kernels.ops.advance import BlockRows as BlockRows
from dllm_kernels.ops.advance import advance_ as advance_
from dllm_kernels.ops.attend_and_write import attend_and_write_ as attend_and_write_
from dllm_kernels.ops.attention import block_attention as block_attention
from dllm_kernels.ops.attention import cached_attention_plan as cached_attention_plan
from dllm_kernels.ops.attention import cached_block_attention as cached_block_attention
from dllm_kernels.ops.cross_entropy import diffusion_cross_entropy as diffusion_cross_entropy
from dllm_kernels.ops.kv_write import kv_write_ as kv_write_
from dllm_kernels.ops.linear_cross_entropy import (
    linear_diffusion_cross_entropy as linear_diffusion_cross_entropy,
)
from dllm_kernels.ops.rms_norm import rms_norm as rms_norm
from dllm_kernels.ops.rotate_half import rotate_half as rotate_half
from dllm_kernels.ops.silu_mul import silu_mul as silu_mul
from dllm_kernels.ops.skinny_linear import PackedWeight as PackedWeight
from dllm_kernels.ops.skinny_linear import pack_weight as pack_weight
from dllm_kernels.ops.skinny_linear import quantize_weight as quantize_weight
from dllm_kernels.ops.skinny_linear import skinny_linear as skinny_linear
from dllm_kernels.ops.token_stats import TokenStats as TokenStats
from dllm_kernels.ops.token_stats import linear_token_stats as linear_token_stats
from dllm_kernels.ops.token_stats import token_stats as token_stats
from dllm_kernels.ops.unmask import commit_ as commit_
from dllm_kernels.ops.unmask import unmask_ as unmask_
from dllm_kernels.rule import Rule as Rule
from dllm_kernels.sampling.api import infill as infill
from dllm_kernels.sampling.api import sample as sample
from dllm_kernels.sampling.choose import Choices as Choices
from dllm_kernels.sampling.choose import choose as choose
from dllm_kernels.sampling.config import SampleConfig as SampleConfig
from dllm_kernels.sampling.output import SampleOutput as SampleOutput
from dllm_kernels.sampling.prefix_cache import PrefixCache as PrefixCache
from dllm_kernels.sampling.views import StepView as StepView
from dllm_kernels.span_mask import SpanMask as SpanMask

__version__: str
