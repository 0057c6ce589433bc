"""Settings of tiny-python's training."""

from dataclasses import dataclass

BLOCK_SIZE = 32


@dataclass
class Settings:
    """Settings of a run. `minutes` None: the schedule runs over `steps` instead of time. `sources`: a
    folder of Python files in place of the standard library. `init`: an exported checkpoint whose tokenizer
    and weights the run starts from; it then has no autoregressive phase and no focus on additions, and
    `layers` may be a multiple of its layers."""

    minutes: float | None = 60.0
    steps: int | None = None
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 640
    vocab_size: int = 4096
    rows: int = 16
    length: int = 256
    long_share: float = 0.35
    ar_share: float = 0.2
    decay_from: float = 0.5
    arithmetic_share: float = 0.15
    prompt_share: float = 0.35
    line_share: float = 0.6
    addition_length: int = 16
    long_additions_from: float = 0.5
    focus_until: float = 0.35
    eps: float = 0.1
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.03
    seed: int = 0
    sources: str | None = None
    init: str | None = None
    compile: bool = True
    monitor_minutes: float = 3.0
    checkpoint_minutes: float = 3.0
