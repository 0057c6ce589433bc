"""The vocabulary head of a model: the functions from hidden states to logits, seen to give its own logits.

Sampling calls the base model and these functions, not the forward of the model around them. A row of the
families names the functions for the forwards of transformers. Any other forward (of a subclass, put on the
instance, or with hooks) is run on two ids, and refused if its logits are not what the functions give.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dllm_kernels.models.shadow import is_part_of_model, shadow

if TYPE_CHECKING:
    from dllm_kernels.models.families import Family


def head_of(model, family: Family) -> tuple[Callable, ...]:
    """Return the functions from hidden states to the logits of `model`, in turn.

    ValueError, with what to do, for a model without a head, or whose logits are more than these give.
    """
    functions = head_modules(model, family)
    if not (family.head and all(map(_runs_as_published, _around_head(model, family)))):
        _once_per_state(model, functions, _refuse_more_than_head, family)
    return functions


def head_modules(model, family: Family) -> tuple[Callable, ...]:
    """Return the modules and functions of `model` that family.head names; without, its output embeddings."""
    from transformers.activations import ACT2FN

    if not family.head:
        return (model.get_output_embeddings(),)
    try:
        return tuple(ACT2FN[name] if name in ACT2FN else model.get_submodule(name) for name in family.head)
    except AttributeError:
        kind = "AutoModelForMaskedLM" if family.masked_lm else "AutoModelForCausalLM"
        raise ValueError(f"model is a {type(model).__name__}, without a head; load it with {kind}") from None


def refuse_changed_logits(model) -> None:
    """Raise ValueError if hooks on `model`, or a forward on the instance, change the logits of its class."""
    if not _runs_as_published(model, of_any_class=True):
        _once_per_state(model, (), _refuse_other_than_class)


# ---- which forwards are as published -----------------------------------------------------------------------
# Packages whose code leaves logits as they are: the forwards themselves, autocast, accelerate's upcasts.
_PUBLISHED = ("transformers.", "torch.", "accelerate.utils.")


def _around_head(model, family: Family) -> list[nn.Module]:
    """Return the model and those of its modules that call the functions of the head."""
    names = {""}
    for name in family.head:
        names.update(accumulate(name.split(".")[:-1], "{}.{}".format))
    return [model.get_submodule(name) for name in names]


def _runs_as_published(module: nn.Module, of_any_class: bool = False) -> bool:
    """Return whether a call of `module` runs forwards of `_PUBLISHED` and no user's hook.

    of_any_class: whatever the forward of its class is.
    """
    forwards = (vars(module).get("forward"), None if of_any_class else type(module).forward)
    return all(map(is_part_of_model, hooks_of(module).values())) and all(map(_is_published, forwards))


def _is_published(forward) -> bool:
    """Return whether `forward` and all that it wraps are of `_PUBLISHED`; None is."""
    while forward is not None:
        inner = next((found for name in _INNER if (found := getattr(forward, name, None)) is not None), None)
        code = getattr(forward, "func", forward)  # of a partial
        home = getattr(code, "__globals__", {}).get("__name__") or type(code).__module__
        if inspect.ismethod(forward):
            inner = forward.__func__
        elif not f"{home}.".startswith(_PUBLISHED):
            return False
        forward = inner
    return True


_INNER = ("_torchdynamo_orig_callable", "__wrapped__")


def hooks_of(module: nn.Module) -> dict[tuple[str, int], Callable]:
    """Return the hooks on the forward of `module`, of its own and of all modules, by torch's numbers, which
    it never uses again."""
    every = vars(nn.modules.module)
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    own = {(kind, number): hook for kind in kinds for number, hook in vars(module)[kind].items()}
    shared = {
        (f"_global{kind}", number): hook for kind in kinds for number, hook in every[f"_global{kind}"].items()
    }
    return own | shared


# ---- the forward on two ids --------------------------------------------------------------------------------
# By model: what was checked, with the state it had then.
_CHECKED: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple]] = weakref.WeakKeyDictionary()
_CHECKING = threading.Lock()


def _once_per_state(model, functions: tuple, check: Callable, *arguments) -> None:
    """Call `check(model, *arguments)` unless it passed in the present state of the head."""
    with _CHECKING:  # another thread's forward would come through the same hooks
        outside = [model, *(part for module in outside_base(model) for part in module.modules())]
        forwards = [_identity(vars(module).get("forward")) for module in outside]
        state, passed = (head_state(model, functions), forwards), _CHECKED.setdefault(model, {})
        if passed.get(check.__name__) != state:
            check(model, *arguments)
            passed[check.__name__] = state


def head_state(model, functions: tuple) -> tuple:
    """Return what determines the logits of `model`, besides the values of its weights.

    That is its code, its modules, hooks and parameters outside the base model, and the numbers on them and in
    the config, such as caps and scales.
    """
    own = [model, *(part for module in outside_base(model) for part in module.modules())]
    return (
        id(model.base_model),
        tuple(map(id, functions)),
        _numbers(model.config),
        _numbers(model.config.get_text_config()),
        tuple(map(_module_state, own)),
    )


def outside_base(model) -> list[nn.Module]:
    """Return the modules of `model` besides its base model."""
    return [child for name, child in model.named_children() if name != model.base_model_prefix]


def _module_state(module: nn.Module) -> tuple:
    parameters = tuple((id(p), type(p)) for p in module._parameters.values())
    code = (id(module), type(module), type(module).forward, "forward" in vars(module))
    return *code, tuple(hooks_of(module)), parameters, _numbers(module)


def _identity(function) -> object:
    """Return a value that no other function has later, and that does not keep this one alive."""
    try:
        return None if function is None else weakref.ref(function)
    except TypeError:
        return function


def _numbers(holder) -> tuple:
    plain = (bool, int, float, str, type(None))
    return tuple((name, value) for name, value in vars(holder).items() if isinstance(value, plain))


def _refuse_more_than_head(model, family: Family) -> None:
    reason = _more_than_head(shadow(model, hooked=_around_head(model, family)), family)
    if reason is not None:
        raise ValueError(
            f"the logits of {type(model).__name__} are more than hidden states times output embeddings: "
            f"{reason}. Sample it as a function of its ids, with the attention that it was trained for: "
            'dk.sample(lambda ids: model(ids).logits, ..., cache="none")'
        )


def _refuse_other_than_class(model) -> None:
    whole = shadow(model, hooked=[model])
    ids = torch.arange(2, device=model.device)[None]
    with _probing(whole):
        found, own = whole(input_ids=ids).logits, type(whole).forward(whole, input_ids=ids).logits
    if not _equal(found, own):
        raise ValueError(
            f"hooks on this {type(model).__name__}, or a forward on the instance, change the logits of its "
            "class, of which the likelihoods would be; put the change into a forward of a subclass"
        )


def _more_than_head(model, family: Family) -> str | None:
    """Return what else the forward of `model` does to logits; None: nothing."""
    functions = head_modules(model, family)
    if functions[-1] is None:
        return "it names no output embeddings"
    ids = torch.arange(2, device=model.device)[None]
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    calls: dict[nn.Module, tuple] = {}
    own = {*model.modules()}
    seen = [module for module in (model.base_model, *functions) if module in own]
    note = partial(_note, calls, threading.get_ident())
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in seen]
    try:
        with _probing(model):
            logits = model(input_ids=ids, **options).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"its forward fails for two ids ({type(error).__name__}: {error})"
    finally:
        for hook in hooks:
            hook.remove()
    if model.base_model not in calls:
        return f"its forward does not call its base model, a {type(model.base_model).__name__}"
    given, states = calls[model.base_model]
    if given is not None and not given.is_floating_point() and not _equal(given, ids):
        return "its base model is given other ids"
    for function in functions:
        if function not in own:
            states = function(states)
        elif function not in calls:
            return "its forward does not call its output embeddings"
        elif not _equal(calls[function][0], states):
            return "its hidden states are transformed before"
        else:
            states = calls[function][1]
    return None if _equal(states.to(logits.dtype), logits) else "they are scaled or capped"


def _note(calls: dict, thread: int, module: nn.Module, given: tuple, keywords: dict, output) -> None:
    """Keep the first input and the first output of a call in `thread`, copied: what follows may write on
    them."""
    if threading.get_ident() != thread:
        return
    first = given[0] if given else keywords.get("input_ids")
    output = output if isinstance(output, Tensor) else output[0]
    calls[module] = None if first is None else first.clone(), output.clone()


@contextmanager
def _probing(model) -> Iterator[None]:
    from dllm_kernels.models.inference import evaluating, naming_outputs

    with torch.no_grad(), evaluating(model), naming_outputs(model):
        yield


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.device), other)
