"""Which options make which acceptance rule: a table, and the contradictions that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dllm_kernels.sampling.rules import Rule


@dataclass(frozen=True)
class RuleOptions:
    """make: the rule of a SampleConfig for rows of so many steps a block. needs: options it cannot do
    without; takes: those it has a use for."""

    make: Callable[[object, int | None], Rule]
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
    """What the options of a SampleConfig name: its rule, or the rule of a number that is given."""
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
