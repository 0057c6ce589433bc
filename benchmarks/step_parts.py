"""What a step costs, where its time goes, and what fewer bytes for the weights cost in accuracy.

    python -m benchmarks.step_parts --output docs/performance.json

A step with the dual cache, 32 tokens of a canvas of 512, of a random model of LLaDA's architecture: its time
with stock layers and with the weights of `dk.load(weights=...)`, in all and by part, in turns within one
process; the same where neither torch nor our kernels use AVX-512, and for one thread to all. Then the
embedded model's accuracy with each kind of weights, as `dllm_train.recipes.tiny_python.evaluate` measures it.
docs/performance.md is filled from the file. `--only` measures a part of this again and keeps the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import dllm_kernels as dk
from benchmarks import machine
from benchmarks.llada_shaped import parameters, random_model
from dllm_kernels.models.fused_layers import fuse_layers
from dllm_kernels.models.gated_layers import GatedPair, gate_layers
from dllm_kernels.models.grouped_layers import GroupedLinear, group_layers
from dllm_kernels.models.stored_weights import KINDS_ON, StoredLinear, store_weights
from dllm_kernels.sampling.runner import ModelRunner
from dllm_kernels.sampling.views import StepView
from dllm_train.recipes.tiny_python import evaluate

BLOCK, CANVAS = 32, 512
FEW, MANY = 2, 18  # steps of two runs, whose difference is that of so many steps without the refresh
STOCK = "stock"
ROUNDS, THREADS_ROUNDS = 5, 3
SCALING_KINDS = (STOCK, "float32", "int8")
PARTS = ("linear layers", "vocabulary", "attention", "rest")
AVX2 = {  # environment that keeps our kernels, and those of torch and its libraries, from AVX-512
    "DLLM_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


class Stopwatch:
    """Seconds spent in functions by the name of a part, without those of functions that they call."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []  # of each function that runs, seconds of watched functions in it

    def watch(self, part: str, function: Callable) -> Callable:
        def watched(*args, **kwargs):
            start = time.perf_counter()
            self._within.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[part] += spent - self._within.pop()
                if self._within:
                    self._within[-1] += spent

        return watched

    @contextmanager
    def attached(self, places: dict[str, list[tuple[type, str]]]) -> Iterator[None]:
        """Watch the methods of `places` within this context."""
        with ExitStack() as stack:
            for part, methods in places.items():
                for owner, name in methods:
                    stack.enter_context(
                        mock.patch.object(owner, name, self.watch(part, getattr(owner, name)))
                    )
            yield


PLACES = {
    "linear layers": [
        *((kind, "forward") for kind in (nn.Linear, StoredLinear, GroupedLinear)),
        (GatedPair, "product"),
    ],
    "vocabulary": [(ModelRunner, "statistics")],
    "attention": [(StepView, "attend")],
}


def run_seconds(model, prompt: list[int], steps: int) -> dict[str, float]:
    """Return the seconds of a sampled block, in all and by part."""
    watch = Stopwatch()
    with watch.attached(PLACES):
        start = time.perf_counter()
        dk.sample(
            model, [prompt], max_new_tokens=BLOCK, block_size=BLOCK, steps=steps, cache="dual",
            stop_on_eos=False,
        )  # fmt: skip
        total = time.perf_counter() - start
    return {**watch.seconds, "all": total, "rest": total - sum(watch.seconds.values())}


def step_seconds(models: dict[str, nn.Module], rounds: int, canvas: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of a step for each of `models`, which take turns: in all and by part."""
    generator = torch.Generator().manual_seed(0)
    highest = next(iter(models.values())).config.mask_token_id
    prompt = torch.randint(2, highest, (canvas - BLOCK,), generator=generator).tolist()
    runs = {(name, steps): [] for name in models for steps in (FEW, MANY)}
    for round_number in range(rounds + 1):
        for (name, steps), found in runs.items():
            seconds = run_seconds(models[name], prompt, steps)
            if round_number:  # the first is to warm up
                found.append(seconds)
    return {
        name: {
            part: (median_of(runs[name, MANY], part) - median_of(runs[name, FEW], part)) / (MANY - FEW)
            for part in ("all", *PARTS)
        }
        for name in models
    }


def median_of(runs: list[dict[str, float]], part: str) -> float:
    return statistics.median(seconds[part] for seconds in runs)


def with_weights(model: nn.Module, kind: str) -> nn.Module:
    """Return `model`, or a copy as `dk.load(weights=kind)` makes it."""
    if kind == STOCK:
        return model
    model = copy.deepcopy(model)
    store_weights(model, kind)
    fuse_layers(model)
    gate_layers(model)
    group_layers(model)
    return model


def moved(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return bytes of weights that a step reads, and its operations, for linear layers and vocabulary."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | StoredLinear)]
    groups = {"linear layers": [m for m in layers if m is not head], "vocabulary": [head]}
    return {
        name: {
            "bytes": float(sum(stored_bytes(m) for m in group)),
            "operations": float(sum(2 * BLOCK * m.in_features * m.out_features for m in group)),
        }
        for name, group in groups.items()
    }


def stored_bytes(layer: nn.Module) -> int:
    return layer.stored[0].nbytes if isinstance(layer, StoredLinear) else layer.weight.nbytes


def accuracy(kinds: tuple[str, ...], smoke: bool) -> dict[str, dict[str, float]]:
    """Return figures of the embedded model with each kind of weights; agreement: the share of the tokens of
    completed code that equal those of stock layers up to the first difference of a prompt."""
    held_out, figures, completed = None, {}, {}
    for kind in kinds:
        weights = None if kind == STOCK else kind
        model, tokenizer = dk.load("tiny-python", device="cpu", dtype=torch.float32, weights=weights)
        if held_out is None:
            _, held_out = evaluate.data.split(evaluate.data.collect_sources(None))
            held_out = held_out[: 1 if smoke else None]
            encoded = evaluate.data.encode_documents(held_out, tokenizer)
            prompts = evaluate.spread(evaluate.code_prompts(encoded, tokenizer), 2 if smoke else 32)
            gaps = [gap for ids in encoded for gap in evaluate.line_gaps(ids, tokenizer)]
            gaps = evaluate.spread(gaps, 4 if smoke else 500)
        output = dk.sample(model, prompts, max_new_tokens=BLOCK, stop_on_eos=False)
        completed[kind] = [
            output.sequences[row, len(prompt) : len(prompt) + BLOCK] for row, prompt in enumerate(prompts)
        ]
        figures[kind] = {
            "bits_per_byte": evaluate.bounds(model, tokenizer, held_out, encoded, 1 if smoke else 4)[
                "bd3lm_bits_per_byte"
            ],
            "additions": evaluate.additions(model, tokenizer, threshold=0.9)["exact"],
            "infilled": evaluate.infilled_lines(model, tokenizer, gaps)["exact"],
            "agreement": agreement(completed[STOCK], completed[kind]),
        }
    return figures


def agreement(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    same = sum(int((a == b).cumprod(0).sum()) for a, b in zip(expected, found, strict=True))
    return same / sum(len(a) for a in expected)


def thread_counts() -> list[int]:
    cores = os.cpu_count() or 1
    return sorted({1, cores, *(2**i for i in range(1, cores.bit_length()) if 2**i < cores)})


def measure_steps(smoke: bool) -> dict:
    """Return seconds of a step with each kind of weights, and what the machine could reach."""
    rounds, canvas = (1, 64) if smoke else (ROUNDS, CANVAS)
    models = {kind: with_weights(random_stock(smoke), kind) for kind in (STOCK, *KINDS_ON["cpu"])}
    return {
        "peaks": machine.peaks("cpu"),
        "model": parameters(models[STOCK]),
        "canvas": canvas,
        "block": BLOCK,
        "moved": {kind: moved(model) for kind, model in models.items()},
        "seconds": step_seconds(models, rounds, canvas),
    }


def measure_avx2(smoke: bool) -> dict:
    """Return what `measure_steps` finds in a process where neither side uses AVX-512."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        command = [sys.executable, "-m", "benchmarks.step_parts", "--only", "steps", "--output", str(file)]
        subprocess.run(command + ["--smoke"] * smoke, env=os.environ | AVX2, check=True)
        return json.loads(file.read_text())["steps"]


def measure_threads(smoke: bool) -> dict:
    """Return seconds of a step by the number of threads and the kind of weights."""
    rounds, canvas = (1, 64) if smoke else (THREADS_ROUNDS, CANVAS)
    models = {kind: with_weights(random_stock(smoke), kind) for kind in SCALING_KINDS}
    before, seconds = torch.get_num_threads(), {}
    for threads in thread_counts():
        torch.set_num_threads(threads)
        steps = step_seconds(models, rounds, canvas)
        seconds[str(threads)] = {kind: step["all"] for kind, step in steps.items()}
    torch.set_num_threads(before)
    return {"seconds": seconds}


def measure_accuracy(smoke: bool) -> dict:
    """Return the accuracy of the embedded model with each kind of weights."""
    return {"figures": accuracy((STOCK, *KINDS_ON["cpu"]), smoke)}


def random_stock(smoke: bool) -> nn.Module:
    return random_model(*((2, 64, 256) if smoke else (16, 1024, 50_257)))


SECTIONS = {
    "steps": measure_steps,
    "avx2": measure_avx2,
    "threads": measure_threads,
    "accuracy": measure_accuracy,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file that is written")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: the figures mean nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.only:
        found[name] = {"machine": machine.about("cpu"), **SECTIONS[name](options.smoke)}
    text = json.dumps({name: found[name] for name in SECTIONS if name in found}, indent=1) + "\n"
    beside = options.output.with_name(options.output.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, options.output)


if __name__ == "__main__":
    main()
