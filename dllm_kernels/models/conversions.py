"""The renames and conversions by which transformers reads the weights that it writes.

Files and models of transformers >= 5 may differ: a file holds one weight per expert where the model holds one
tensor per layer, or the head under its first name. The rules are data of transformers, a list per model type,
without a public name; no other module uses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fill:
    """A conversion of tensors of a checkpoint to weights of a model.

    sources: names in the checkpoint. weights: turns their tensors, in that order, into weights by name; it
    works on the meta device too.
    """

    sources: tuple[str, ...]
    weights: Callable[[list[Tensor]], dict[str, Tensor]]


def stock_fills(model, names: Iterable[str]) -> tuple[list[Fill], list[str]]:
    """Return the fills of a transformers model's weights from the tensors `names`, and unused names."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        import transformers

        raise ImportError(
            f"transformers {transformers.__version__} has no weight conversions where 5.17 to 5.24 "
            f"have them ({error}); install one of those"
        ) from error

    rules = get_model_conversion_mapping(model)
    renames = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix

    plain: list[Fill] = []
    grouped: dict[str, list[tuple[str, str]]] = {}  # first weight -> patterns and names of what it is made of
    unused: list[str] = []
    for name in sorted(names, key=dot_natural_key):  # experts in order; some renames wait for an earlier name
        target, pattern = rename_source_key(name, renames, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            unused.append(name)
        elif pattern is None:
            plain.append(Fill((name,), lambda tensors, target=target: {target: tensors[0]}))
        else:
            grouped.setdefault(target, []).append((pattern, name))
    for sources in grouped.values():
        _refuse_gaps(sources)
    converted = [
        Fill(
            tuple(name for _, name in sources), _Conversion(model, target, sources, of_pattern[sources[0][0]])
        )
        for target, sources in grouped.items()
    ]
    return plain + converted, unused


def _refuse_gaps(sources: list[tuple[str, str]]) -> None:
    """Refuse lists (of experts) whose numbers are not 0, 1, 2 ...; they become one tensor in that order."""
    lists: dict[tuple[str, str], list[int]] = {}
    for pattern, name in sources:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            of_list = f"{name[: number.start()]}*{name[number.end() :]}"
            lists.setdefault((pattern, of_list), []).append(int(number[0]))
    for (_, name), numbers in lists.items():
        count = len(numbers)
        if count > 1 and numbers != [*range(count)]:
            raise ValueError(
                f"{name}: there are {count}, from {numbers[0]} to {numbers[-1]}, and not 0 to {count - 1}"
            )


@dataclass(frozen=True)
class _Conversion:
    """A converter of transformers with the tensors that it takes."""

    model: object
    target: str
    sources: list[tuple[str, str]]
    converter: object

    def __call__(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(self.converter)
        for (pattern, name), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.target, name, pattern, tensor)
        weights = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: made[0] if isinstance(made, list) else made for name, made in weights.items()}
