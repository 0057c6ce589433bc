"""The options of `dk.SampleConfig` on the command line, made from its fields when a command needs them.

A field that is added to SampleConfig is an option of every command that generates. Its values are checked
where they always are: by SampleConfig.
"""

from __future__ import annotations

import inspect
import types
import typing
from typing import Annotated

import typer

from dllm_kernels.cli.narrow_help import Command

LENGTH, RULE, NOISE, CACHE, TOKENS, RUN = (
    "Length and blocks", "Acceptance rule", "Noise and filters", "Cache", "Tokens", "The run",
)  # fmt: skip

# Panel and help of each field; one that is missing here is an option with its name alone.
HELP = {
    "max_new_tokens": (LENGTH, "Length of the completion."),
    "block_size": (LENGTH, "Tokens that are denoised together; the checkpoint's own unless given."),
    "steps": (LENGTH, "Denoising steps in all, in place of a threshold."),
    "steps_per_block": (LENGTH, "Denoising steps of each block."),
    "stop_on_eos": (LENGTH, "End a text at its first end token."),
    "rule": (RULE, "The rule that selects the tokens to commit; named by its numbers unless given."),
    "threshold": (RULE, "Commit every token at least this sure. 0.9 where no rule is named."),
    "factor": (RULE, "Commit the r-th surest token while its confidence is at least 1 - factor/(r+1)."),
    "entropy_bound": (
        RULE,
        "Commit tokens in order of entropy while those before them sum to at most this, in nats.",
    ),
    "kl_threshold": (RULE, "Commit tokens whose prediction has changed less than this."),
    "stable_steps": (RULE, "Steps that a prediction must be stable for, with --kl-threshold."),
    "edit_threshold": (RULE, "Replace a token of the active block when another is at least this sure."),
    "max_post_steps": (RULE, "Most steps that only edit, with --edit-threshold."),
    "strict": (RULE, "Commit what is surer than the threshold, not what equals it."),
    "confidence": (RULE, "What sure means: prob, margin, entropy or random."),
    "alg_temp": (RULE, "Draw the positions of a quota at this temperature."),
    "schedule": (RULE, "How a quota is spread over the steps: llada, dllm, dllm_cosine or dream."),
    "stochastic": (RULE, "Draw the quotas of --schedule dllm."),
    "eps": (RULE, "Last noise level of --schedule dream and --rule bernoulli."),
    "temperature": (NOISE, "Temperature of the tokens; 0 takes the likeliest."),
    "seed": (NOISE, "Seed of the noise, at a temperature above 0."),
    "top_p": (NOISE, "Draw from the likeliest tokens that make up this probability."),
    "top_k": (NOISE, "Draw from this many likeliest tokens."),
    "cfg_scale": (NOISE, "Classifier-free guidance away from the model without the prompt."),
    "cfg_keep_tokens": (NOISE, "Ids of prompt tokens that guidance keeps."),
    "cache": (CACHE, "auto, none, block, prefix or dual; auto is exact."),
    "refresh_every": (CACHE, "Steps after which --cache prefix or dual is renewed inside a block."),
    "suffix_window": (CACHE, "Leave out positions further than this behind the block."),
    "shift": (TOKENS, "Predict token i from the output at i-1; as the checkpoint says unless given."),
    "suppress_tokens": (TOKENS, "Ids that are never proposed."),
    "begin_suppress_tokens": (TOKENS, "Ids that are proposed with confidence 0."),
    "mask_id": (TOKENS, "The mask token, in place of the checkpoint's."),
    "eos_ids": (TOKENS, "The end tokens, in place of the checkpoint's."),
    "chat": (TOKENS, "The prompt is a message: put it through the chat template and print the reply."),
    "max_batch": (RUN, "Rows in flight; the others wait."),
    "compile": (RUN, "Run the model under torch.compile: seconds once, saved in every step."),
    "history": (RUN, "Keep the canvas after every step; --replay does."),
    "logprobs": (RUN, "Record log-probabilities: 0 of the tokens, k of the k likeliest as well."),
    "parity": (RUN, "Do as a reference implementation does, see docs/sampling.md."),
}

# Where one of these is given, the rule is not the threshold that it is by default.
_NAMES_A_RULE = {
    *("rule", "threshold", "factor", "entropy_bound", "steps", "steps_per_block", "schedule"),
    *("stochastic", "alg_temp", "parity"),
}
DEFAULT_THRESHOLD = 0.9


class Sampling(Command):
    """A command with every option of SampleConfig. `given(context)` returns those that are given."""

    left_out: frozenset[str] = frozenset()
    _own: list | None = None

    def get_params(self, context):
        """Return the command's parameters, those of SampleConfig among them."""
        if self._own is None:
            self._own = list(self.params)
            self.params = [*self._own, *_parameters(self.left_out)]
        return super().get_params(context)

    def invoke(self, context):
        known = {parameter.name for parameter in self._own or self.params}
        context.meta[__name__] = {
            name: context.params.pop(name) for name in [*context.params] if name not in known
        }
        return super().invoke(context)


class Infilling(Sampling):
    """`Sampling`, without the options that have no meaning for a canvas."""

    left_out = frozenset({"max_new_tokens", "chat", "stop_on_eos"})


def given(context: typer.Context, preset: str | None = None) -> dict:
    """Return the options for `dk.sample` that a command was given, as keywords, `config` of a preset among
    them. A threshold is the rule where nothing names another."""
    return with_rule(given_options(context), preset)


def given_options(context: typer.Context) -> dict:
    """Return the options that a command was given, and no others."""
    return {name: parsed(name, value) for name, value in context.meta[__name__].items() if value is not None}


def with_rule(options: dict, preset: str | None = None) -> dict:
    """Return options with the config of a preset, or the default threshold where nothing names a rule."""
    from dllm_kernels.sampling.config import SampleConfig

    if preset is not None:
        return {"config": SampleConfig.preset(preset), **options}
    options = {**options}
    if "config" in options:
        return options
    steps = not options.keys().isdisjoint({"steps", "steps_per_block"})
    if steps and options.get("threshold") is not None and options.get("rule") is None:
        raise ValueError("give --threshold or --steps, not both")
    if options.keys().isdisjoint(_NAMES_A_RULE):
        options["threshold"] = DEFAULT_THRESHOLD
    return options


def parsed(name: str, value: object) -> object:
    """Return the value of an option that is written as text, in the type of its field."""
    kind = field_type(name)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() == "none" and kind.optional and name != "cache":
        return None
    if kind.name == "ids":
        return tuple(_number(name, part, int, "token ids, such as 1,2,3") for part in text.split(",") if part)
    if kind.name == "bool":
        flags = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False}
        flags["0"] = False
        if text.lower() not in flags:
            raise ValueError(f"{name} is {text!r}; it must be true or false")
        return flags[text.lower()]
    if kind.name in ("int", "float"):
        cast = int if kind.name == "int" else float
        return _number(name, text, cast, "an integer" if cast is int else "a number")
    return text


def assignments(text: str) -> dict:
    """Return the options in a text such as "threshold=0.6,cache=none"."""
    options: dict = {}
    last = None
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals and last and field_type(last).name == "ids":
            options[last] += f",{part}"
            continue
        if not equals or not name:
            raise ValueError(f"{text!r}: {part!r} is not NAME=VALUE; such as threshold=0.6,cache=none")
        options[name] = value
        last = name
    return {name: parsed(name, value) for name, value in options.items()}


class Kind(typing.NamedTuple):
    """name: int, float, bool, str or ids (integers). optional: whether None is a value."""

    name: str
    optional: bool


def field_type(name: str) -> Kind:
    """Return the type of a field of SampleConfig; ValueError if there is no such field."""
    fields = _fields()
    if name not in fields:
        raise ValueError(f"{name!r} is not an option; there are: {', '.join(fields)}")
    annotation, _ = fields[name]
    parts = [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        parts = list(typing.get_args(annotation))
    optional = type(None) in parts
    if any(typing.get_origin(part) is tuple for part in parts):
        return Kind("ids", optional)
    found = next((kind for kind in (str, bool, int, float) if kind in parts), str)
    return Kind(found.__name__, optional)


def _fields() -> dict[str, tuple]:
    """Return annotation and default of every field of SampleConfig."""
    from dataclasses import fields

    from dllm_kernels.sampling.config import SampleConfig

    hints = typing.get_type_hints(SampleConfig)
    return {field.name: (hints[field.name], field.default) for field in fields(SampleConfig)}


def _number(name: str, text: str, cast, wanted: str):
    try:
        return cast(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}; it must be {wanted}") from None


def _parameters(left_out: frozenset[str]) -> list:
    """Return the parameters that typer makes of the fields."""
    fields = {name: field for name, field in _fields().items() if name not in left_out}
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_annotation(name), _option(name, default)],
        )
        for name, (_, default) in fields.items()
    ]

    def options() -> None: ...

    options.__signature__ = inspect.Signature(parameters)
    only_options = typer.Typer(add_completion=False)
    only_options.command()(options)
    return typer.main.get_command(only_options).params


def _annotation(name: str):
    kind = field_type(name).name
    return {"bool": bool | None, "int": int | None, "float": float | None}.get(kind, str | None)


def _option(name: str, default: object):
    panel, text = HELP.get(name, (RUN, f"{name} of dk.SampleConfig."))
    kind, flag = field_type(name).name, f"--{name.replace('_', '-')}"
    if kind == "ids":
        text += " Such as 1,2,3."
    if default not in (None, ()) and name != "block_size":
        text += f" [default: {str(default).lower() if kind == 'bool' else default}]"
    declared = f"{flag}/--no-{flag[2:]}" if kind == "bool" else flag
    choices = _choices(name)
    return typer.Option(
        declared,
        help=text.replace("[default", "\\[default"),
        show_default=False,
        rich_help_panel=panel,
        metavar={"ids": "IDS", "str": "NAME"}.get(kind),
        autocompletion=(lambda incomplete: [one for one in choices if one.startswith(incomplete)])
        if choices
        else None,
    )


def _choices(name: str) -> list[str]:
    """Return the values of an option that takes names, for completion."""
    from dllm_kernels.rule import CONFIDENCES
    from dllm_kernels.sampling.config import CACHES, RULES, SCHEDULES
    from dllm_kernels.sampling.parity import PARITY

    named = {
        "rule": RULES, "confidence": CONFIDENCES, "schedule": SCHEDULES, "cache": CACHES, "parity": PARITY,
    }  # fmt: skip
    return list(named.get(name, ()))
