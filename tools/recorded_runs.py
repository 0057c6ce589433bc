"""Record what the sampler does in some 500 runs, and check later that it still does the same, bit for bit.

    python tools/recorded_runs.py record runs.json
    python tools/recorded_runs.py check runs.json

For changes that are to change nothing: every rule with every cache on several models, then the other options.
A run is what comes out of `dk.sample` or `dk.infill` (tokens, lengths, the step of each token, forwards), and
again with the canvas after every round. Bits are those of one machine: record and check on the same. Exit
status 1: something differs, or a run is gone.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import dllm_kernels as dk
from tests.sampling.tiny_models import EOS, MASK, prompts_of, tiny_model

CACHES = {"bidirectional": ("none", "prefix", "dual"), "block_causal": ("none", "block")}
ARCHITECTURES = ("qwen3", "llama")
RULES = {
    "one": {},
    "quota": {"steps_per_block": 3},
    "dllm": {"steps_per_block": 3, "schedule": "dllm", "stochastic": True},
    "dllm_cosine": {"steps_per_block": 4, "schedule": "dllm_cosine"},
    "dream": {"steps_per_block": 3, "schedule": "dream"},
    "margin": {"steps_per_block": 3, "confidence": "margin"},
    "entropy": {"steps_per_block": 3, "confidence": "entropy"},
    "random": {"steps_per_block": 4, "confidence": "random"},
    "drawn": {"steps_per_block": 3, "alg_temp": 0.5},
    "threshold": {"threshold": 0.3},
    "threshold_margin": {"threshold": 0.2, "confidence": "margin", "strict": True},
    "quota_or_threshold": {"rule": "quota_or_threshold", "threshold": 0.5, "steps_per_block": 3},
    "factor": {"factor": 1.2},
    "entropy_bound": {"entropy_bound": 1.0},
    "bernoulli": {"rule": "bernoulli", "steps_per_block": 5},
    "klass": {"threshold": 0.2, "kl_threshold": 0.5},
    "edit": {"threshold": 0.3, "edit_threshold": 0.3},
}
OPTIONS = {
    "temperature": {"temperature": 0.7, "seed": 5},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.6},
    "guidance": {"cfg_scale": 0.7},
    "guidance_keeps": {"cfg_scale": 0.7, "cfg_keep_tokens": (3, 4, 5)},
    "shift": {"shift": True},
    "suppress": {"suppress_tokens": tuple(range(0, 110, 2))},
    "begin_suppress": {"begin_suppress_tokens": (EOS,)},
    "no_stop": {"stop_on_eos": False},
    "many_ends": {"eos_ids": (EOS, *range(20, 34))},
    "max_batch": {"max_batch": 2},
    "refresh": {"refresh_every": 2},
    "suffix_window": {"suffix_window": 8},
    "steps": {"steps": 7},
    "block_5": {"block_size": 5},
}
PARITIES = ("llada", "llada_fp64", "fast_dllm", "fast_dllm_dream", "dream")


def runs() -> Iterator[tuple[str, Callable]]:
    """Yield the name of each run, and a function that runs it."""
    for architecture, attention in itertools.product(ARCHITECTURES, CACHES):
        for cache, (rule, options) in itertools.product(CACHES[attention], RULES.items()):
            yield _run(f"{rule}", architecture, attention, cache, options)
        for cache, (name, options) in itertools.product(CACHES[attention], OPTIONS.items()):
            for rule in ("one",) if name == "steps" else ("quota", "threshold"):
                yield _run(f"{rule}+{name}", architecture, attention, cache, {**RULES[rule], **options})
    for rule, options in RULES.items():
        yield _run(rule, "callable", "bidirectional", "none", {**options, "mask_id": MASK, "eos_ids": (EOS,)})
    for attention, rule in itertools.product(CACHES, RULES):
        yield _run(rule, "qwen3", attention, "none", RULES[rule], infilled=True)
    for parity in PARITIES:
        yield _run("parity", "qwen3", "bidirectional", None, {"parity": parity, "steps": 16})


def _run(rule, architecture, attention, cache, options, infilled=False) -> tuple[str, Callable]:
    options = {"block_size": 8, "seed": 11, **options} | ({"cache": cache} if cache else {})
    shown = options.get("parity") or cache
    name = f"{'infill' if infilled else 'sample'} {architecture} {attention} {shown} {rule}"

    def run() -> list:
        model = tiny_model(architecture if architecture != "callable" else "qwen3", attention)
        if architecture == "callable":
            model = functools.partial(_logits, model)
        canvases = []

        def keep(event) -> None:
            canvases.append([row.tolist() for row in event.canvas])

        prompts = prompts_of(1, 7, 8, 19)
        if infilled:
            prompts = [[MASK if i % 3 else token for i, token in enumerate(prompt)] for prompt in prompts]
            outputs = [dk.infill(model, prompts, on_round=event, **options) for event in (None, keep)]
        else:
            outputs = [
                dk.sample(model, prompts, on_round=event, max_new_tokens=21, **options)
                for event in (None, keep)
            ]
        return [*map(_content, outputs), canvases]

    return name, run


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def _content(output: dk.SampleOutput) -> dict:
    return {
        "sequences": output.sequences.tolist(),
        "lengths": output.lengths.tolist(),
        "unmask_step": output.unmask_step.tolist(),
        "forwards": output.forwards,
        "tokens_per_forward": float(output.tokens_per_forward).hex(),
    }


def outcome(run: Callable) -> str:
    """Return a digest of what a run gives, or what it raises."""
    try:
        given = run()
    except (ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = {name: outcome(run) for name, run in runs()}
    refused = sum(": " in value for value in found.values())
    if arguments.what == "record":
        arguments.file.write_text(json.dumps(found, indent=0) + "\n")
        print(f"{len(found)} runs recorded, {refused} of them refusals")
        return 0
    expected = json.loads(arguments.file.read_text())
    differ = [name for name, value in expected.items() if found.get(name) != value]
    for name in differ:
        print(f"differs: {name}\n  was {expected[name]}\n  is  {found.get(name)}")
    print(f"{len(expected)} runs, {len(differ)} differ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
