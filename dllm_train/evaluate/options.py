"""Options of the lm-eval model `dllm`: the names that `--model_args` and `--gen_kwargs` may hold."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from dllm_kernels import SampleConfig
from dllm_train.evaluate.likelihood import log_likelihoods

# Options that DiffusionLM takes itself.
MODEL = (
    "pretrained", "tokenizer", "device", "batch_size", "max_batch_size", "max_length", "add_bos_token",
    "prefix_token_id", "instruct", "truncate",
)  # fmt: skip
LOADING = ("dtype", "attention", "base", "merge_projections")
# Options of sampling that lm-eval or the requests decide, with what to give in their place.
ELSEWHERE = {
    "chat": "--apply_chat_template",
    "max_batch": "batch_size",
    "history": "dk.sample, since answers are text",
}
SAMPLING = tuple(field.name for field in fields(SampleConfig) if field.name not in ELSEWHERE)
# `parity` and `seed` are options of sampling too; the seed is the same for both.
_LIKELIHOOD = inspect.signature(log_likelihoods).parameters
ESTIMATION = {
    "likelihood_parity" if name == "parity" else name: name
    for name in ("estimator", "samples", "batch_tokens", "check_greedy", "parity")
    if name in _LIKELIHOOD
}
# Options that tasks of lm-eval set for other libraries, with the neutral value.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "n": 1, "repetition_penalty": 1.0}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_LENGTH = 256  # lm-eval's


@dataclass(frozen=True)
class Options:
    """model_args by the function that takes them: `dk.load`, `dk.SampleConfig` and `log_likelihoods`."""

    loading: dict
    sampling: dict
    estimation: dict


@dataclass(frozen=True)
class GenerationOptions:
    """The generation_kwargs of a request.

    until: stop strings. new_tokens: the most tokens. infill: whether the context has a gap to fill.
    sampling: options of `dk.SampleConfig`, sorted pairs.
    """

    until: tuple[str, ...]
    new_tokens: int
    infill: bool
    sampling: tuple[tuple[str, object], ...]


def model_options(given: Mapping[str, object]) -> Options:
    """Return `given` by the function that takes each, without the options of DiffusionLM itself.

    Raise ValueError for an unknown name.
    """
    given = {name: _read(name, value) for name, value in given.items() if name not in MODEL}
    for name in given:
        if name in ELSEWHERE:
            raise ValueError(f"{name} is not an option of the model dllm; give {ELSEWHERE[name]}")
    refuse_unknown("model_args", given, (*MODEL, *LOADING, *SAMPLING, *ESTIMATION))
    estimation = {ESTIMATION[name]: given[name] for name in ESTIMATION if name in given}
    if "seed" in given:
        estimation["seed"] = given["seed"]
    return Options(
        {name: given[name] for name in LOADING if name in given and given[name] != "auto"},
        {name: given[name] for name in SAMPLING if name in given},
        estimation,
    )


def generation_options(given: Mapping[str, object], sampling: Mapping[str, object]) -> GenerationOptions:
    """Return a request's generation_kwargs; `sampling` of the model is the default.

    do_sample=false means temperature 0, as everywhere in lm-eval; true means the temperature given, or 1.
    """
    given = dict(given)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(text, str) for text in until):
        raise ValueError(f"until is {until!r}; it must be a text or a list of texts")
    lengths = [given.pop(name, None) for name in LENGTHS]
    default = sampling.get("max_new_tokens", DEFAULT_LENGTH)
    new_tokens = next((length for length in lengths if length is not None), default)
    if isinstance(new_tokens, bool) or int(new_tokens) != new_tokens or new_tokens < 1:
        raise ValueError(f"max_gen_toks is {new_tokens!r}; it must be an integer >= 1")
    infill = given.pop("infill", False)
    if not isinstance(infill, bool):
        raise ValueError(f"infill is {infill!r}; it must be true or false")
    for name, neutral in NEUTRAL.items():
        if given.pop(name, neutral) != neutral:
            raise ValueError(f"{name} has no meaning for the model dllm; leave it at {neutral}")
    do_sample = given.pop("do_sample", None)
    if do_sample is False:
        given["temperature"] = 0.0
    elif do_sample is True and "temperature" not in given and "temperature" not in sampling:
        given["temperature"] = 1.0
    for name in ELSEWHERE:
        if name in given:
            raise ValueError(f"{name} is not an option of generation; give {ELSEWHERE[name]}")
    refuse_unknown("gen_kwargs", given, (*SAMPLING, "until", "do_sample", "infill", *LENGTHS))
    hashable = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return GenerationOptions(
        tuple(filter(None, until)), int(new_tokens), infill, tuple(sorted(hashable.items()))
    )


def refuse_unknown(where: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ValueError for the first name of `given` that is not `allowed`."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{name} is not an option of {where}; {meant}allowed: {', '.join(allowed)}")


def _read(name: str, value):
    """Return a value of the command line, where `none` is None; of cache="none" it is a value."""
    return None if isinstance(value, str) and value.lower() == "none" and name != "cache" else value
