"""The tensors of a GGUF file against those that a model takes from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# Experts are one tensor per layer there and may be several modules here; transformers counts them itself.
_EXPERTS = ("_exps.", "_shexp.", "ffn_gate_inp")


def refuse_left_over_tensors(file: Path, config, weights: Iterable[str]) -> None:
    """Raise ValueError for tensors that a model has no weight for, which transformers ignores silently.

    config: of the model. weights: the names of its weights.

    Such are the frequencies of Llama 3.1 (rope_freqs), without which its positions would be wrong.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    name = str(reader.fields["general.architecture"].contents())
    arch = next(arch for arch, called in gguf.MODEL_ARCH_NAMES.items() if called == name)
    names = gguf.get_tensor_name_map(arch, config.get_text_config().num_hidden_layers)
    taken = set()
    for weight in weights:
        base, _, kind = weight.rpartition(".")
        taken.add(f"{names.get_name(base)}.{kind}")
    left = [tensor.name for tensor in reader.tensors if tensor.name not in taken]
    left = sorted(tensor for tensor in left if not any(part in tensor for part in _EXPERTS))
    if left:
        raise ValueError(f"the weights of {file} do not fit: unexpected: {', '.join(left[:8])}")
