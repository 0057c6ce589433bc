"""The plan of one call of `sample` or `infill`: model, checked options, special tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllm_kernels.kv_cache import BlockKVCache
from dllm_kernels.models.families import Diffusion, diffusion_of
from dllm_kernels.models.probe import Traits, traits_of
from dllm_kernels.models.text import check_tokenizer
from dllm_kernels.models.wrappers import is_transformers_model, unwrapped
from dllm_kernels.sampling.config import APPROXIMATE, SampleConfig
from dllm_kernels.sampling.parity import NONE, PARITY, Parity
from dllm_kernels.sampling.prompts import Canvases
from dllm_kernels.sampling.runner import CallableRunner, ModelRunner
from dllm_kernels.sampling.views import SCHEMES, Scheme

PAGE_SIZE = 32


@dataclass(frozen=True)
class Plan:
    """A model with the options it is sampled with, all of them checked."""

    model: Any
    runner: ModelRunner | CallableRunner
    diffusion: Diffusion
    config: SampleConfig
    mask_id: int
    eos_ids: tuple[int, ...]

    @property
    def block_causal(self) -> bool:
        return self.diffusion.attention == "block_causal"

    @property
    def shift(self) -> bool:
        """Whether the output before a position predicts it."""
        return self.diffusion.shift if self.config.shift is None else self.config.shift

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        return self.eos_ids if self.config.stop_on_eos else ()

    @property
    def parity(self) -> Parity:
        return PARITY.get(self.config.parity, NONE)

    @property
    def scheme(self) -> Scheme:
        """The cache scheme; "auto" is the exact one that keeps most."""
        hooked = isinstance(self.runner, ModelRunner)
        best = "block" if self.block_causal and hooked and self.runner.traits.local else "none"
        return SCHEMES[best if self.config.cache == "auto" else self.config.cache]

    @property
    def streams(self) -> int:
        """Forwards that a step's logits are made of: guidance needs those without the prompt too."""
        return 2 if self.config.cfg_scale else 1

    @property
    def fill(self) -> int:
        """The token to fill up with after a row's end: the end token; else the padding token, else 0 or 1."""
        candidates = (*self.eos_ids, self.diffusion.pad_id, 0, 1)
        return next(token for token in candidates if token not in (None, self.mask_id))

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def check_length(self, canvases: Canvases) -> None:
        """Refuse canvases beyond the model's positions."""
        self.check_positions(canvases.given, canvases.end)

    def check_positions(self, given: Tensor, end: Tensor) -> None:
        """`check_length` before there are canvases, whose bounds these are."""
        longest, row = end.max(0)
        limit = self.diffusion.max_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"row {int(row)} needs {int(longest)} positions ({int(given[row])} of prompt, "
                f"blocks of {self.config.block_size}); the model has {limit}, by max_position_embeddings, "
                "the scaling in rope_parameters and attention_chunk_size of its config"
            )

    def shareable(self, canvases: Canvases) -> Tensor:
        """Return int64 [B], the leading tokens of each prompt whose keys and values may be shared."""
        if not self.block_causal:
            return torch.zeros_like(canvases.given)
        return self.parity.shareable(canvases.given, self.config.block_size, self.shift)

    def pages_for(self, lengths: Tensor) -> int:
        """Pages for the longest rows that can be live at once; lengths: int64 [B], of all rows."""
        pages = (lengths + PAGE_SIZE - 1) // PAGE_SIZE
        live = min(self.config.max_batch or len(pages), len(pages))
        return int(pages.topk(live).values.sum()) * self.streams

    def cache_of(self, pages: int) -> BlockKVCache:
        """Return a cache of so many pages in the dtype of the model's keys and values, under autocast too."""
        traits, kind = self.runner.traits, self.device.type
        autocast = torch.is_autocast_enabled(kind)
        return BlockKVCache(
            traits.calls,
            traits.kv_heads,
            traits.head_dims,
            pages=pages,
            page_size=PAGE_SIZE,
            dtype=torch.get_autocast_dtype(kind) if autocast else self.model.dtype,
            device=self.device,
        )


def device_of(model) -> torch.device:
    """The device of the first weight; the CPU for a function."""
    weight = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if weight is None else weight.device


def make_plan(
    model, tokenizer, config: SampleConfig | None, overrides: dict, *, attention: str | None = None
) -> Plan:
    """Check a model against its options; what can be refused is refused here.

    attention: the kind to sample a transformers model with, in place of its config's.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    if config is not None and not isinstance(config, SampleConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a dk.SampleConfig")
    if unknown := overrides.keys() - {field.name for field in fields(SampleConfig)}:
        raise TypeError(f"{min(unknown)!r} is not an option; dk.SampleConfig lists them")
    model, diffusion = model_with_diffusion(model, attention)
    hooked = is_transformers_model(model)
    traits = traits_of(model, diffusion) if hooked else None
    if config is not None:
        config = replace(config, **overrides)
    else:
        own = {"block_size": diffusion.block_size} if diffusion.block_size else {}
        config = SampleConfig(**{**own, **overrides})
    _check_model_options(config, diffusion, hooked)
    if traits is not None and not traits.local:
        _check_options_of_rows_alone(type(model).__name__, config, diffusion, traits)
    mask_id = _first(config.mask_id, diffusion.mask_id, getattr(tokenizer, "mask_token_id", None))
    if mask_id is None:
        raise ValueError(
            "mask_id is not known: give it; neither the model's config nor a tokenizer names one"
        )
    eos_ids = config.eos_ids
    if eos_ids is None:
        eos = getattr(tokenizer, "eos_token_id", None)
        eos_ids = diffusion.eos_ids or (() if eos is None else (eos,))
    barred = dict(
        mask_id=(mask_id,), suppress_tokens=config.suppress_tokens,
        begin_suppress_tokens=config.begin_suppress_tokens,
    )  # fmt: skip
    _check_vocabulary(diffusion.vocab_size, eos_ids=eos_ids, cfg_keep_tokens=config.cfg_keep_tokens, **barred)
    if mask_id in eos_ids:
        raise ValueError(f"mask_id {mask_id} is an end token too")
    if hooked:
        runner = ModelRunner(model, diffusion.head, traits, diffusion.first_position, config.compile)
    else:
        runner = CallableRunner(model, partial(_check_vocabulary, **barred))
    return Plan(model, runner, diffusion, config, mask_id, eos_ids)


def model_with_diffusion(model, attention: str | None = None) -> tuple[object, Diffusion]:
    """Return the transformers model in `model`, or the callable that it is, and how that samples.

    attention: as of `make_plan`.
    TypeError if it is neither; ValueError as of `unwrapped` and `diffusion_of`, and for weights that our
    attention cannot run in.
    """
    model = unwrapped(model)
    if is_transformers_model(model):
        _check_weights(model)
        return model, diffusion_of(model, attention=attention)
    if not callable(model):
        raise TypeError(f"model is a {type(model).__name__}; give a transformers model or a callable")
    return model, _ANY_CALLABLE


# A callable says nothing of itself: it sees whole canvases, and options name its special tokens.
_ANY_CALLABLE = Diffusion(
    attention="bidirectional", block_size=None, shift=False, mask_id=None, eos_ids=(), pad_id=None,
    vocab_size=None, max_positions=None, head=(),
)  # fmt: skip


def _check_weights(model) -> None:
    """Attention runs in the model's dtype, on the device of its first weight."""
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"model is {model.dtype}; convert it: model.float(), .bfloat16() or .half()")
    if next(model.parameters()).is_meta:
        raise ValueError("model has weights on the meta device: offloaded or never loaded; load them first")


def _check_model_options(config: SampleConfig, diffusion: Diffusion, hooked: bool) -> None:
    if config.compile and not hooked:
        raise ValueError("compile=True compiles a transformers model; give a callable compiled already")
    cache, bidirectional = config.cache, diffusion.attention == "bidirectional"
    if cache not in ("auto", "none") and not hooked:
        raise ValueError(
            f'cache="{cache}" needs a transformers model; a callable is sampled with cache="none"'
        )
    if cache == "block" and bidirectional:
        raise ValueError(
            'cache="block" keeps keys and values of finished blocks, which holds only where no block sees a '
            'later one, and this model is bidirectional; use cache="none", or "prefix" or "dual", which '
            "approximate"
        )
    if cache in APPROXIMATE and not bidirectional:
        raise ValueError(
            f'cache="{cache}" approximates what bidirectional models see; this model is block-causal, for '
            'which cache="block" is exact'
        )
    if config.suffix_window is not None and not bidirectional:
        raise ValueError("suffix_window has no meaning for a block-causal model: no block sees a later one")


def _check_options_of_rows_alone(
    name: str, config: SampleConfig, diffusion: Diffusion, traits: Traits
) -> None:
    """Refuse what is wrong where tokens depend on each other in other ways than through attention."""
    if config.cache not in ("auto", "none"):
        raise ValueError(
            f'cache="{config.cache}" keeps keys and values, and in {name} tokens depend on each other '
            'through more than those (a state, a convolution); use cache="none"'
        )
    if not traits.causal and diffusion.attention == "block_causal":
        raise ValueError(
            f"{name} is marked block_causal, but its tokens depend on later ones besides attention; mark it "
            '{"attention": ["bidirectional"]}'
        )


def _check_vocabulary(vocab_size: int | None, **options: tuple[int, ...]) -> None:
    for name, tokens in options.items():
        for token in tokens:
            if vocab_size is not None and token >= vocab_size:
                raise ValueError(f"{name} holds {token}; the vocabulary is 0..{vocab_size - 1}")


def _first(*values):
    return next((value for value in values if value is not None), None)
