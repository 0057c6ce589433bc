"""SampleConfig: every option of a call, its check, the rule that it names, and the published presets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from dllm_kernels._arguments import integer
from dllm_kernels.rule import CONFIDENCES, Rule
from dllm_kernels.sampling.parity import NONE, PARITY, Parity
from dllm_kernels.sampling.schedules import binomial_schedule, dllm_schedule, dream_schedule, llada_schedule


@dataclass(frozen=True)
class RuleOptions:
    """make: the rule of a SampleConfig for rows of so many steps a block. needs: options it cannot do
    without; takes: those it has a use for."""

    make: Callable[[Any, int | None], Rule]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


RULES = {
    "quota": RuleOptions(
        lambda c, _: Rule.quota(confidence=c.confidence, alg_temp=c.alg_temp),
        takes=("confidence", "alg_temp"),
    ),
    "threshold": RuleOptions(
        lambda c, _: Rule.threshold(c.threshold, strict=c.strict, confidence=c.confidence),
        needs=("threshold",),
        takes=("strict", "confidence"),
    ),
    "factor": RuleOptions(
        lambda c, _: Rule.factor(c.factor, strict=c.strict, confidence=c.confidence),
        needs=("factor",),
        takes=("strict", "confidence"),
    ),
    "quota_or_threshold": RuleOptions(
        lambda c, _: Rule.quota_or_threshold(c.threshold, confidence=c.confidence),
        needs=("threshold",),
        takes=("confidence",),
    ),
    "entropy_bound": RuleOptions(lambda c, _: Rule.entropy_bound(c.entropy_bound), needs=("entropy_bound",)),
    "bernoulli": RuleOptions(lambda c, steps: Rule.bernoulli(steps or 1, eps=c.eps), takes=("eps",)),
    "confident_stable": RuleOptions(
        lambda c, _: Rule.confident_stable(
            c.threshold, c.kl_threshold, c.stable_steps or 2, confidence=c.confidence
        ),
        needs=("threshold", "kl_threshold"),
        takes=("stable_steps", "confidence"),
    ),
    "edit": RuleOptions(
        lambda c, _: Rule.edit(c.threshold, c.edit_threshold, confidence=c.confidence),
        needs=("threshold", "edit_threshold"),
        takes=("max_post_steps", "confidence"),
    ),
}

# The rule that an option names where no rule is given; the first one that is given decides.
_NAMED_BY = {
    "kl_threshold": "confident_stable",
    "edit_threshold": "edit",
    "threshold": "threshold",
    "factor": "factor",
    "entropy_bound": "entropy_bound",
}
_NUMBERS = tuple(_NAMED_BY)
_OTHERS = ("strict", "confidence", "alg_temp", "stable_steps", "max_post_steps")


def rule_name(config) -> str:
    """Return the rule that the options name, or that of the number that is given."""
    if isinstance(config.rule, Rule):
        return config.rule.name
    return config.rule or next((_NAMED_BY[name] for name in _NUMBERS if _given(config, name)), "quota")


def refuse_contradictions(config) -> None:
    """Every option of a rule belongs to the rule that is used."""
    name = rule_name(config)
    needs, takes = RULES[name].needs, RULES[name].takes
    if isinstance(config.rule, Rule):
        needs, takes, name = (), tuple({"max_post_steps"} & {*takes}), f"rule={config.rule}"
    for number in needs:
        if not _given(config, number):
            raise ValueError(f"rule {name!r} needs {number}")
    for number in _NUMBERS:
        if _given(config, number) and number not in needs:
            value = getattr(config, number)
            raise ValueError(f"{number}={value} contradicts {name}: one rule at a time")
    for option in _OTHERS:
        if _given(config, option) and option not in takes:
            raise ValueError(f"{option}={getattr(config, option)!r} has no meaning with {name}")


def _given(config, name: str) -> bool:
    return getattr(config, name) != type(config).__dataclass_fields__[name].default


# ---- checks of options ------------------------------------------------------------------------------------
# One check per option of SampleConfig, see `_option`.

CACHES = ("auto", "none", "prefix", "dual", "block")
_MOST_STEPS = 10**6  # a schedule goes through every one
_LARGEST, _SMALLEST = 1e38, 1e-37  # of numbers that enter products in float32, and divide there
SCHEDULES = ("llada", "dllm", "dllm_cosine", "dream")


def _integer(low: int, high: int = 2**31 - 1):
    return lambda name, value: integer(name, value, low, high)


def _number(low: float, high: float = math.inf):
    def check(name, value):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}; it must be a number")
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f" >= {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
            bounds = "" if low == -math.inf else bounds
            raise ValueError(f"{name} is {value}; it must be a finite number{bounds}")
        return float(value)

    return check


def _temperature(name, value):
    value = _number(0.0, _LARGEST)(name, value)
    if 0 < value < _SMALLEST:
        raise ValueError(f"{name} is {value}; it must be 0, or at least {_SMALLEST:g}")
    return value


def _flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return value


def _one_of(*allowed):
    def check(name, value):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        return value

    return check


def _ids(name, value):
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be a sequence of token ids")
    return tuple(integer(name, token, 0) for token in value)


def _rule(name, value):
    if isinstance(value, str):
        return _one_of(*RULES)(name, value)
    if not isinstance(value, Rule):
        raise TypeError(f"{name} is {value!r}; it must be a dk.Rule, or one of {', '.join(RULES)}")
    return value


def _optional(check):
    return lambda name, value: None if value is None else check(name, value)


def _option(default, check, *, host_only: bool = False) -> Any:
    """An option of SampleConfig. check: (name, value) -> the value to keep, or TypeError, or ValueError.
    host_only: launches do not depend on it: what follows from it is in tensors, or is compared itself."""
    return field(default=default, metadata=dict(check=check, host_only=host_only))


# ---- presets ----------------------------------------------------------------------------------------------
# The settings that systems publish, one row each.

PRESETS: dict[str, dict[str, Any]] = {
    # generate.py's defaults
    "llada": dict(max_new_tokens=128, block_size=128, steps=128, cache="none"),
    # the evaluation that its speeds are quoted from: GSM8K, 256 tokens
    "fast_dllm": dict(max_new_tokens=256, block_size=32, threshold=0.9, cache="dual"),
    # the instruct model's example
    "dream": dict(
        max_new_tokens=512, block_size=512, steps=512, schedule="dream", temperature=0.2, top_p=0.95,
        confidence="entropy", cache="none",
    ),
    # dLLM's BD3LM sampler, its defaults
    "bd3lm": dict(max_new_tokens=128, block_size=32, steps=128, cache="block", schedule="dllm"),
    # the model card's example
    "llada2": dict(
        max_new_tokens=512, block_size=32, steps_per_block=32, rule="quota_or_threshold", threshold=0.95,
        cache="block",
    ),
}  # fmt: skip


# ---- the options ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig:
    """The options of sampling. Contradictions raise ValueError with the reason.

    max_new_tokens: completion tokens of each row (`sample` only). block_size: tokens denoised together.
    steps: denoising steps in all, ceil(steps / blocks) for each block; steps_per_block: that, said directly;
    neither: one token per step. Rules without a quota ignore both and take as many steps as they need.

    rule: a `dk.Rule` or its name. Without it the numbers that are given name the rule: threshold, factor,
    entropy_bound, kl_threshold (confident_stable), edit_threshold (edit); without any it is "quota".
    A threshold is at least 0, and above 1 it leaves one token per step; of confidence "entropy", which is
    negated, it is at most 0.
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
    logprobs: record the log-probability of every committed token, and of so many likeliest ones in its place.
    compile: run the model's body under torch.compile, which takes seconds once and saves time in every step.
    parity: do as a reference implementation does, see docs/sampling.md.
    """

    max_new_tokens: int = _option(128, _integer(1), host_only=True)
    block_size: int = _option(32, _integer(1))
    steps: int | None = _option(None, _optional(_integer(1, _MOST_STEPS)), host_only=True)
    steps_per_block: int | None = _option(None, _optional(_integer(1, _MOST_STEPS)), host_only=True)
    temperature: float = _option(0.0, _temperature)
    seed: int = _option(0, _integer(0, 2**63 - 1), host_only=True)
    rule: Rule | str | None = _option(None, _optional(_rule), host_only=True)
    threshold: float | None = _option(None, _optional(_number(-math.inf)), host_only=True)
    factor: float | None = _option(None, _optional(_number(0.0)), host_only=True)
    entropy_bound: float | None = _option(None, _optional(_number(0.0)), host_only=True)
    strict: bool = _option(False, _flag, host_only=True)
    confidence: str = _option("prob", _one_of(*CONFIDENCES), host_only=True)
    schedule: str = _option("llada", _one_of(*SCHEDULES), host_only=True)
    stochastic: bool = _option(False, _flag, host_only=True)
    alg_temp: float = _option(0.0, _temperature, host_only=True)
    eps: float = _option(1e-3, _number(0.0), host_only=True)
    top_p: float | None = _option(None, _optional(_number(0.0, 1.0)))
    top_k: int | None = _option(None, _optional(_integer(1)))
    edit_threshold: float | None = _option(None, _optional(_number(0.0)))
    max_post_steps: int = _option(16, _integer(0, _MOST_STEPS))
    kl_threshold: float | None = _option(None, _optional(_number(0.0)))
    stable_steps: int | None = _option(None, _optional(_integer(1)))
    cache: str = _option("auto", _one_of(*CACHES), host_only=True)
    refresh_every: int | None = _option(None, _optional(_integer(1)), host_only=True)
    suffix_window: int | None = _option(None, _optional(_integer(0)), host_only=True)
    cfg_scale: float = _option(0.0, _number(0.0, _LARGEST))
    cfg_keep_tokens: tuple[int, ...] = _option((), _ids, host_only=True)
    shift: bool | None = _option(None, _optional(_flag), host_only=True)
    suppress_tokens: tuple[int, ...] = _option((), _ids)
    begin_suppress_tokens: tuple[int, ...] = _option((), _ids)
    mask_id: int | None = _option(None, _optional(_integer(0)), host_only=True)
    eos_ids: tuple[int, ...] | None = _option(None, _optional(_ids), host_only=True)
    stop_on_eos: bool = _option(True, _flag, host_only=True)
    chat: bool = _option(False, _flag, host_only=True)
    max_batch: int | None = _option(None, _optional(_integer(1)), host_only=True)
    compile: bool = _option(False, _flag)
    history: bool = _option(False, _flag)
    logprobs: int | None = _option(None, _optional(_integer(0, 1000)))
    parity: str | None = _option(None, _optional(_one_of(*PARITY)))

    def __post_init__(self) -> None:
        for option in fields(self):
            value = option.metadata["check"](option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, value)
        if self.parity is not None:
            self._settle(PARITY[self.parity])
        refuse_contradictions(self)
        _refuse_contradictions(self)
        self.acceptance()  # which checks the numbers of its rule

    @classmethod
    def preset(cls, name: str) -> SampleConfig:
        """The settings a system publishes: "llada", "fast_dllm", "dream", "bd3lm" or "llada2"."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @property
    def approximate(self) -> bool:
        """Return whether a step may see other than what a forward over everything would show it."""
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
        parity = PARITY.get(self.parity or "", NONE)
        even = self.schedule == "dream" and rule_name(self) == "threshold" and not self.approximate
        if self.schedule == "llada" or even:
            quotas = llada_schedule(masks, steps)
        elif self.schedule == "dream":
            alone = parity.tokens_before_schedule(self.approximate)
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
    """Refuse contradictions that do not concern the rule."""
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
