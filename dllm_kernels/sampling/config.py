"""SampleConfig: every option of `dk.sample` and `dk.infill`, checked once, before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dllm_kernels.sampling.option_checks import CHECKS
from dllm_kernels.sampling.parity import NONE, PARITY, Parity
from dllm_kernels.sampling.presets import PRESETS
from dllm_kernels.sampling.rule_options import RULES, refuse_contradictions, rule_name
from dllm_kernels.sampling.rules import Rule
from dllm_kernels.sampling.schedules import binomial_schedule, dllm_schedule, dream_schedule, llada_schedule


@dataclass(frozen=True)
class SampleConfig:
    """How to sample. Contradictions raise ValueError with the reason.

    max_new_tokens: completion tokens of each row (`sample` only). block_size: tokens denoised together.
    steps: denoising steps in all, ceil(steps / blocks) for each block; steps_per_block: that, said directly;
    neither: one token per step. Rules without a quota ignore both and take as many steps as they need.

    rule: a `dk.Rule` or its name. Without it the numbers that are given name the rule: threshold, factor,
    entropy_bound, kl_threshold (confident_stable), edit_threshold (edit); without any it is "quota".
    confidence: "prob" | "margin" | "entropy" | "random". strict: > in place of ≥. alg_temp: draw the
    positions of a quota. stable_steps: of confident_stable, by default 2. max_post_steps: most steps that
    only edit.
    schedule: how a quota is spread over the steps, "llada" | "dllm" | "dllm_cosine" | "dream"; stochastic:
    those of dllm draw each step's number; eps: the last noise level of "dream" and of bernoulli.
    temperature, seed: Gumbel noise on the logits, a function of seed, row, position and step alone.
    top_p, top_k: filters on softmax(logits / temperature), whose renormalised probabilities are then the
    confidences [Dream].

    cache: "none" | "block" (block-causal models) | "prefix" | "dual" (bidirectional models; approximate) |
    "auto" (block or none: never approximate). refresh_every: steps after which an approximate cache is
    renewed inside a block. suffix_window: positions further than this behind the block are left out.
    cfg_scale: classifier-free guidance away from the model without the prompt, of which cfg_keep_tokens stay.
    shift: whether the prediction for i comes from the output at i − 1; None: as the checkpoint says.
    suppress_tokens: ids that are never proposed. begin_suppress_tokens: ids that may be proposed, with
    confidence 0. mask_id, eos_ids: in place of the checkpoint's.
    stop_on_eos: end a row at its first end token. chat: prompts are messages, put through the chat template.
    max_batch: rows in flight; the others wait. history: keep the canvas after every round.
    compile: run the model's body under torch.compile, which takes seconds once and saves time in every step.
    parity: do as a reference implementation does, see docs/sampling.md.
    """

    max_new_tokens: int = 128
    block_size: int = 32
    steps: int | None = None
    steps_per_block: int | None = None
    temperature: float = 0.0
    seed: int = 0
    rule: Rule | str | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    strict: bool = False
    confidence: str = "prob"
    schedule: str = "llada"
    stochastic: bool = False
    alg_temp: float = 0.0
    eps: float = 1e-3
    top_p: float | None = None
    top_k: int | None = None
    edit_threshold: float | None = None
    max_post_steps: int = 16
    kl_threshold: float | None = None
    stable_steps: int | None = None
    cache: str = "auto"
    refresh_every: int | None = None
    suffix_window: int | None = None
    cfg_scale: float = 0.0
    cfg_keep_tokens: tuple[int, ...] = ()
    shift: bool | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    mask_id: int | None = None
    eos_ids: tuple[int, ...] | None = None
    stop_on_eos: bool = True
    chat: bool = False
    max_batch: int | None = None
    compile: bool = False
    history: bool = False
    parity: str | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.parity is not None:
            self._settle(PARITY[self.parity])
        refuse_contradictions(self)
        _refuse_contradictions(self)

    @classmethod
    def preset(cls, name: str) -> SampleConfig:
        """The settings a system publishes: "llada", "fast_dllm", "dream", "bd3lm" or "llada2"."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @property
    def approximate(self) -> bool:
        """Whether these options let a step see other than what a forward over everything would show it."""
        return self.suffix_window is not None or (self.cache in APPROXIMATE and self.refresh_every != 1)

    def acceptance(self, steps: int | None = None) -> Rule:
        """The rule that these options name; `steps` of a block, for the rule that needs them."""
        return self.rule if isinstance(self.rule, Rule) else RULES[rule_name(self)].make(self, steps)

    def steps_of_block(self, blocks: int) -> int | None:
        """Steps of each block of a row with `blocks` blocks; None: as many as it has masks."""
        return self.steps_per_block or (None if self.steps is None else math.ceil(self.steps / blocks))

    def quotas(self, masks: int, blocks: int, draw: tuple[int, int] = (0, 0)) -> list[int]:
        """Tokens to commit in each step of a block with `masks` masks, for a row of `blocks` blocks.

        draw: what a stochastic schedule is keyed by beside the seed, the row's number and the block's start.
        """
        if rule_name(self) == "quota_or_threshold":
            masks = self.block_size
        steps = self.steps_of_block(blocks) or masks
        alpha = "cosine" if self.schedule == "dllm_cosine" else "linear"
        parity = PARITY.get(self.parity, NONE)
        even = self.schedule == "dream" and rule_name(self) == "threshold" and not self.approximate
        if self.schedule == "llada" or even:
            quotas = llada_schedule(masks, steps)
        elif self.schedule == "dream":
            alone = int(self.approximate and parity.refresh_commits_start)
            quotas = [alone, *dream_schedule(masks - alone, steps, self.eps, alone)]
        elif self.stochastic:
            quotas = binomial_schedule(masks, steps, alpha, self.seed, draw)
        else:
            quotas = dllm_schedule(masks, steps, alpha)
        return [quota for quota in quotas if quota]

    def _settle(self, parity: Parity) -> None:
        """Take the options that a parity mode fixes, and those it has where nothing else is said."""
        default = {field.name: field.default for field in fields(self)}
        for name, value in {**parity.usual, **parity.fixed}.items():
            given = getattr(self, name)
            if name in parity.fixed and given not in (default[name], value):
                raise ValueError(f"{name}={given!r} contradicts parity={self.parity!r}, which has {value!r}")
            if given == default[name]:
                object.__setattr__(self, name, value)


APPROXIMATE = ("prefix", "dual")


def _refuse_contradictions(config: SampleConfig) -> None:
    """Those that are not about the rule."""
    if config.steps is not None and config.steps_per_block is not None:
        raise ValueError("steps and steps_per_block both say how many steps a block gets; give one")
    name = rule_name(config)
    if config.rule == "bernoulli" and config.steps is None and config.steps_per_block is None:
        raise ValueError('rule "bernoulli" draws by time; give steps or steps_per_block')
    if config.eps != SampleConfig.eps and config.schedule != "dream" and name != "bernoulli":
        raise ValueError(f'eps={config.eps} has no meaning without schedule="dream" or rule="bernoulli"')
    if not 0 < config.eps < 1:
        raise ValueError(f"eps is {config.eps}; it must lie between 0 and 1")
    if config.stochastic and (not config.schedule.startswith("dllm") or not config.acceptance(1).needs_quota):
        raise ValueError('stochastic draws the quotas of schedule="dllm"; it has no meaning without them')
    if config.refresh_every is not None and config.cache not in APPROXIMATE:
        raise ValueError(
            f'refresh_every renews cache="prefix" or "dual"; it has no meaning with {config.cache!r}'
        )
    if config.suffix_window is not None and config.cache == "block":
        raise ValueError('suffix_window has no meaning with cache="block", where no block sees a later one')
    if config.cfg_keep_tokens and not config.cfg_scale:
        raise ValueError("cfg_keep_tokens has no meaning without cfg_scale")
    if config.parity is not None and config.temperature > 0:
        raise ValueError(
            f"temperature={config.temperature} with parity={config.parity!r}: the noise of a reference "
            "cannot be repeated; parity holds at temperature 0"
        )
