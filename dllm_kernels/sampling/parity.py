"""Parity modes: what a reference implementation does besides its options, so that tokens come out as there.

A mode is a row of the table. `fixed` are the options it settles; whoever gives another value for one of them
contradicts it; `usual` are those it has where nothing else is said. The rest are particulars that no option
names. All hold at temperature 0, on the same float32 model; where a reference would leave masks in its output
or never end, the rules of this library hold instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Parity:
    """How a reference differs.

    precision: of the softmax behind confidences. mask_in_softmax: the mask token is barred from the argmax
    only. blocks_from_prompt: block-causal blocks count from the end of each row's prompt, whose first block
    is then short, as left padding to whole blocks has it; the last block ends with the canvas.
    shift_in_window: with a cache, the first position that a step computes is predicted by its own output.
    factor_takes_all: if only the last rank fails the factor rule, it is accepted too.
    threshold_within_quota: without a cache a threshold accepts at most what the schedule has due by then, an
    even one in place of "dream". refresh_commits_start: a refresh commits exactly the block's first position.
    every_block_counts: `steps` are spread over all blocks of the longest canvas, those without masks too.
    ranked_by_topk: where canvases are padded that torch.topk ranks, whose order among equals is its own.
    padding_seen: shorter rows are filled up with end tokens that are attended to. empty_prompts: they are
    completed like others.
    """

    fixed: Mapping[str, object] = field(default_factory=dict)
    usual: Mapping[str, object] = field(default_factory=dict)
    precision: str = "float32"
    mask_in_softmax: bool = True
    blocks_from_prompt: bool = False
    shift_in_window: bool = False
    factor_takes_all: bool = False
    threshold_within_quota: bool = False
    refresh_commits_start: bool = False
    every_block_counts: bool = False
    ranked_by_topk: str | None = None
    padding_seen: bool = False
    empty_prompts: bool = False


NONE = Parity(mask_in_softmax=False)
_NO_STOP = dict(stop_on_eos=False)

PARITY = {
    "llada": Parity(dict(schedule="llada", cache="none", **_NO_STOP), ranked_by_topk="left"),
    "llada_fp64": Parity(
        dict(schedule="llada", cache="none", **_NO_STOP), precision="float64", ranked_by_topk="left"
    ),
    "fast_dllm": Parity(dict(schedule="llada", **_NO_STOP), precision="float64", factor_takes_all=True),
    "fast_dllm_dream": Parity(
        _NO_STOP,
        dict(schedule="dream"),
        shift_in_window=True,
        threshold_within_quota=True,
        refresh_commits_start=True,
        ranked_by_topk="left",
    ),
    "dllm_mdlm": Parity(
        _NO_STOP,
        dict(schedule="dllm"),
        shift_in_window=True,
        every_block_counts=True,
        ranked_by_topk="right",
        empty_prompts=True,
    ),
    "dllm_dream": Parity(_NO_STOP, dict(schedule="dllm"), ranked_by_topk="left", empty_prompts=True),
    "dllm_bd3lm": Parity(_NO_STOP, dict(schedule="dllm"), blocks_from_prompt=True, empty_prompts=True),
    "dllm_fast_dllm": Parity(
        _NO_STOP,
        dict(schedule="dllm"),
        shift_in_window=True,
        every_block_counts=True,
        padding_seen=True,
        empty_prompts=True,
    ),
    "dllm_fast_dllm_dream": Parity(
        _NO_STOP,
        shift_in_window=True,
        threshold_within_quota=True,
        refresh_commits_start=True,
        ranked_by_topk="left",
        empty_prompts=True,
    ),
    "dream": Parity(dict(schedule="dream", cache="none", **_NO_STOP), ranked_by_topk="left"),
    "llada2": Parity(dict(rule="quota_or_threshold")),
}
