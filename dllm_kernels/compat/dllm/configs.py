"""The configs and the output of dLLM's samplers: names, order and defaults as there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class BaseSamplerConfig:
    return_dict: bool = False


@dataclass
class BaseSamplerOutput:
    """sequences: int64 [B, T]; histories: the canvas at the start and after every round, or None."""

    sequences: Tensor
    histories: list[Tensor] | None = None


@dataclass
class MDLMSamplerConfig(BaseSamplerConfig):
    max_new_tokens: int | None = 128
    max_length: int | None = None
    block_size: int | None = 128
    steps: int = 128
    temperature: float = 0.0
    remasking: str = "low_confidence"
    stochastic_transfer: bool = False
    cfg_scale: float = 0.0
    cfg_keep_tokens: list[int] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    right_shift_logits: bool = False


@dataclass
class BD3LMSamplerConfig(BaseSamplerConfig):
    max_new_tokens: int | None = 128
    max_length: int | None = None
    block_size: int = 32
    steps: int = 128
    steps_per_block: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"
    stochastic_transfer: bool = False
    cfg_scale: float = 0.0
    cfg_keep_tokens: list[int] | None = None
    right_shift_logits: bool = False


@dataclass
class DreamSamplerConfig(BaseSamplerConfig):
    max_new_tokens: int | None = 20
    max_length: int | None = None
    steps: int = 512
    eps: float = 1e-3
    alg: str = "origin"
    alg_temp: float = 0.0
    temperature: float = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 50
    stochastic_transfer: bool = False
    right_shift_logits: bool = True
    cfg_scale: float = 0.0


@dataclass
class FastdLLMLLaDASamplerConfig(MDLMSamplerConfig):
    use_cache: str | None = None
    threshold: float | None = None
    factor: float | None = None


@dataclass
class FastdLLMDreamSamplerConfig(BaseSamplerConfig):
    max_new_tokens: int | None = 20
    max_length: int | None = None
    steps: int = 512
    eps: float = 1e-3
    alg: str = "origin"
    alg_temp: float = 0.0
    temperature: float = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 50
    stochastic_transfer: bool = False
    right_shift_logits: bool = True
    threshold: float | None = None
    use_cache: str | None = None
    block_size: int | None = 32
