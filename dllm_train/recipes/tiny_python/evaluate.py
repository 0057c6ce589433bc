"""Figures of a tiny-python checkpoint on held-out data.

`python -m dllm_train.recipes.tiny_python.evaluate FOLDER` measures an exported checkpoint again. The bound
comes from the training objectives, all generated text from `dk.sample` and `dk.infill`. It writes
evaluation.json and the model card README.md into the checkpoint's folder.
"""

import argparse
import gzip
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import dllm_kernels as dk
from dllm_train.objectives import bd3lm_loss, mdlm_loss
from dllm_train.recipes.tiny_python import arithmetic, data
from dllm_train.recipes.tiny_python.export import ATTENTION, model_card
from dllm_train.recipes.tiny_python.tokenizer import newline_ids

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ROW_LENGTH = 512
ROWS_AT_ONCE = 50  # in one call of dk.infill


def evaluate(
    folder: Path | str,
    training: dict,
    *,
    sources=None,
    noise_draws=4,
    prompts=32,
    lines=1500,
    threshold_lines=150,
    processes=1,
) -> dict:
    """Return all figures of the checkpoint in `folder`, as `model_card` shows them; `training` is copied.

    Few infilled lines come back exactly, so `lines` of them are filled at one token per step, and
    `threshold_lines` at every threshold. `processes` share the measurements, which do not depend on them.
    """
    rules = (None, *THRESHOLDS)
    tasks = [("infill", kind, rule) for rule in rules for kind in reversed(ATTENTION)]
    tasks += [("bound",), *((name, rule) for name in ("completion", "additions") for rule in rules)]
    bench = Bench(folder, sources, noise_draws, prompts, lines, threshold_lines)
    figures = measured(bench, tasks, processes)

    def by_rule(*task) -> dict:
        names = ("one_per_step", *map(str, THRESHOLDS))
        return {name: figures[(*task, rule)] for name, rule in zip(names, rules, strict=True)}

    model, train, held_out = bench.models["block_causal"], bench.train, bench.held_out
    gaps = len(bench.gaps)
    return {
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": model.config.num_hidden_layers,
            "hidden": model.config.hidden_size,
            "vocabulary": model.config.vocab_size,
            "block_size": model.config.diffusion["block_size"],
        },
        "corpus": {
            "python": platform.python_version(),
            "sha256": data.digest(train + held_out),
            "train_documents": len(train),
            "train_bytes": byte_count(train),
            "held_out_documents": len(held_out),
            "held_out_bytes": byte_count(held_out),
            "held_out_pairs": len(arithmetic.held_out_pairs()),
        },
        "training": training,
        "bound": figures[("bound",)],
        "thresholds": list(THRESHOLDS),
        "additions": {"pairs": len(arithmetic.held_out_pairs())} | by_rule("additions"),
        "completion": {"held_out_repeated_lines": held_out_repeated_lines(held_out)} | by_rule("completion"),
        "infill": {"lines": min(lines, gaps), "threshold_lines": min(threshold_lines, gaps)}
        | {kind: by_rule("infill", kind) for kind in ATTENTION},
        "environment": environment(),
    }


class Bench:
    """A checkpoint under both kinds of attention, and held-out data to measure it on."""

    def __init__(self, folder, sources, noise_draws, prompts, lines, threshold_lines):
        self.arguments = (folder, sources, noise_draws, prompts, lines, threshold_lines)
        self.models = {}
        for kind in ATTENTION:
            self.models[kind], self.tokenizer = dk.load(folder, attention=kind, dtype=torch.float32)
        self.train, self.held_out = data.split(data.collect_sources(sources))
        self.encoded = data.encode_documents(self.held_out, self.tokenizer)
        self.prompts = spread(code_prompts(self.encoded, self.tokenizer), prompts)
        self.gaps = [gap for ids in self.encoded for gap in line_gaps(ids, self.tokenizer)]
        self.noise_draws, self.lines, self.threshold_lines = noise_draws, lines, threshold_lines

    def measure(self, task: tuple) -> dict:
        """task: ("bound",), ("additions", rule), ("completion", rule) or ("infill", attention, rule); a rule
        is a threshold, or None for one token per step."""
        match task:
            case ("bound",):
                model = self.models["block_causal"]
                return bounds(model, self.tokenizer, self.held_out, self.encoded, self.noise_draws)
            case ("additions", rule):
                return additions(self.models["block_causal"], self.tokenizer, threshold=rule)
            case ("completion", rule):
                model = self.models["block_causal"]
                return completions(model, self.tokenizer, self.prompts, threshold=rule)
            case ("infill", kind, rule):
                gaps = spread(self.gaps, self.lines if rule is None else self.threshold_lines)
                return infilled_lines(self.models[kind], self.tokenizer, gaps, threshold=rule)


def measured(bench: Bench, tasks: list[tuple], processes: int) -> dict:
    """Return the figures of each task, which `processes` take in turn."""
    if processes == 1:
        return {task: bench.measure(task) for task in tasks}
    with torch.multiprocessing.get_context("spawn").Pool(processes, _set_up, bench.arguments) as pool:
        return dict(zip(tasks, pool.map(_measure, tasks, chunksize=1), strict=True))


def _set_up(*arguments) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(*arguments)


def _measure(task: tuple) -> dict:
    return _bench.measure(task)


def additions(model, tokenizer, **rule) -> dict:
    """Measure held-out pairs: whether the line is right, and its tokens over the forwards that it took."""
    pairs, newlines = arithmetic.held_out_pairs(), newline_ids(tokenizer)
    prompts = [tokenizer(arithmetic.prompt(a, b), add_special_tokens=False)["input_ids"] for a, b in pairs]
    output = dk.sample(model, prompts, max_new_tokens=16, eos_ids=newlines, **rule)
    exact = tokens = forwards = 0
    for row, (prompt, (a, b)) in enumerate(zip(prompts, pairs, strict=True)):
        start, length = len(prompt), int(output.lengths[row])
        answer = slice(start, start + length + 1)
        line = tokenizer.decode(output.sequences[row, : answer.stop])
        exact += line.rstrip("\n") + "\n" == arithmetic.line(a, b) and line.endswith("\n")
        steps = output.unmask_step[row, answer]
        tokens += int((steps >= 0).sum())
        forwards += int(steps.max()) + 1
    return {"exact": exact / len(pairs), "tokens_per_forward": tokens / forwards}


def completions(model, tokenizer, prompts, **rule) -> dict:
    """Measure 128 tokens after each prompt: tokens up to the first end token over the forwards they took, and
    the share of completed lines that repeat the previous line."""
    output = dk.sample(model, prompts, max_new_tokens=128, **rule)
    tokens = forwards = repeated = lines = 0
    for row, prompt in enumerate(prompts):
        end = len(prompt) + int(output.lengths[row])
        counted = output.unmask_step[row, len(prompt) : end + 1]
        counted = counted[counted >= 0]
        if len(counted):
            tokens += len(counted)
            forwards += int(counted.max()) + 1
        completed = tokenizer.decode(output.sequences[row, len(prompt) : end])
        counts = repeated_lines(tokenizer.decode(prompt), completed)
        repeated, lines = repeated + counts[0], lines + counts[1]
    return {
        "prompts": len(prompts),
        "tokens_per_forward": tokens / forwards,
        "repeated_lines": repeated / max(lines, 1),
    }


def repeated_lines(before: str, text: str) -> tuple[int, int]:
    """Return (lines of `text` that equal the previous line, lines of `text`). Blank lines do not count, nor
    does an unfinished last line; the line before the first is the last of `before`."""
    given = [line for line in before.split("\n") if line.strip()][-1:]
    lines = [*given, *(line for line in text.split("\n")[:-1] if line.strip())]
    return sum(a == b for a, b in itertools.pairwise(lines)), len(lines) - len(given)


def held_out_repeated_lines(documents) -> float:
    """Return the share of the documents' lines that repeat the previous line."""
    counts = [repeated_lines("", document.text) for document in documents]
    return sum(repeated for repeated, _ in counts) / sum(lines for _, lines in counts)


def infilled_lines(model, tokenizer, gaps, **rule) -> dict:
    """Fill each gap (ids, start, end), with as many masks as the line has tokens; exact if all come back."""
    exact = tokens = forwards = 0
    for part in (gaps[first : first + ROWS_AT_ONCE] for first in range(0, len(gaps), ROWS_AT_ONCE)):
        canvases = []
        for ids, start, end in part:
            canvases.append([*ids[:start], *[tokenizer.mask_token_id] * (end - start), *ids[end:]])
        output = dk.infill(model, canvases, **rule)
        for row, (ids, start, end) in enumerate(part):
            exact += output.sequences[row, start:end].tolist() == ids[start:end]
            tokens += end - start
            forwards += int(output.unmask_step[row, start:end].max()) + 1
    return {"exact": exact / len(gaps), "tokens_per_forward": tokens / forwards}


@torch.no_grad()
def bounds(model, tokenizer, held_out, encoded, draws) -> dict:
    """Return bits per byte of the held-out documents, end tokens included, without earlier context; the
    standard error is over `draws` independent noise draws."""
    stream = np.concatenate(encoded).astype(np.int64)
    whole = stream[: len(stream) // ROW_LENGTH * ROW_LENGTH].reshape(-1, ROW_LENGTH)
    parts = [*np.array_split(whole, max(1, len(whole) // 8)), stream[whole.size :][None]]
    size, block_size = byte_count(held_out), model.config.diffusion["block_size"]
    figures: dict = {"row_length": ROW_LENGTH, "noise_draws": draws, "tokens": len(stream)}
    for name, loss, options in (("bd3lm", bd3lm_loss, {"block_size": block_size}), ("mdlm", mdlm_loss, {})):
        totals = []
        for draw in range(draws):
            nats, first = 0.0, 0
            for part in parts:
                output = loss(
                    model,
                    torch.from_numpy(part).to(model.device),
                    mask_id=tokenizer.mask_token_id,
                    seed=1,
                    epoch=draw,
                    example_ids=range(first, first + len(part)),
                    bar_mask_token=True,
                    **options,
                )
                nats, first = nats + float(output.nll_sum), first + len(part)
            totals.append(nats / math.log(2) / size)
        figures[f"{name}_bits_per_byte"] = float(np.mean(totals))
        figures[f"{name}_standard_error"] = float(np.std(totals, ddof=1) / math.sqrt(draws))
    text = b"".join(document.text.encode() for document in held_out)
    return figures | {"gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text)}


def code_prompts(encoded, tokenizer, length: int = 128) -> list[list[int]]:
    """Return prompts of up to `length` tokens between line ends, from all over the documents."""
    ends_line, prompts = data.ends_line(tokenizer), []
    for ids in encoded:
        starts = np.concatenate([[0], np.flatnonzero(ends_line[ids]) + 1])
        for place in range(0, len(ids) - 2 * length, length):
            first = starts[np.searchsorted(starts, place)]
            last = starts[np.searchsorted(starts, first + length, side="right") - 1]
            if last > first:
                prompts.append(ids[first:last].tolist())
    return prompts


def line_gaps(ids: np.ndarray, tokenizer, window: int = 256) -> list[tuple[list[int], int, int]]:
    """Return (row ids, start, end): every nonblank line of up to 24 tokens, without its newline, in a row of
    up to `window` tokens that begins at a line's start and has more lines on both sides."""
    ends_line = data.ends_line(tokenizer)
    starts = np.concatenate([[0], np.flatnonzero(ends_line[ids]) + 1])
    gaps = []
    for start, end in zip(starts[:-1], starts[1:] - 1, strict=True):
        if end - start > 24 or not tokenizer.decode(ids[start:end]).strip():
            continue
        first = starts[np.searchsorted(starts, max(0, start - window // 2))]
        stop = starts[np.searchsorted(starts, min(first + window, starts[-1]), side="right") - 1]
        if first < start and stop > end + 1:
            gaps.append((ids[first:stop].tolist(), int(start - first), int(end - first)))
    return gaps


def spread(items: list, count: int) -> list:
    """Return `count` of the items, evenly spaced."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def byte_count(documents) -> int:
    return sum(len(document.text.encode()) for document in documents)


def environment() -> dict:
    """Return machine, commit and versions that figures belong to."""
    names = ("torch", "transformers", "tokenizers", "numpy")
    versions = {"dllm_kernels": dk.__version__, "python": platform.python_version()}
    return {
        "machine": processor_name(),
        "cores": os.cpu_count(),
        "commit": commit(),
        "versions": versions | {name: importlib.metadata.version(name) for name in names},
    }


def processor_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the source tree, with "+" when it has changes; "unknown" outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def write_evaluation(folder: Path, evaluation: dict) -> None:
    """Write evaluation.json and README.md, each written beside its target and renamed."""
    texts = {"evaluation.json": json.dumps(evaluation, indent=1) + "\n", "README.md": model_card(evaluation)}
    for name, text in texts.items():
        beside = folder / f"{name}.tmp"
        beside.write_text(text)
        os.replace(beside, folder / name)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="checkpoint folder; holds an evaluation.json already")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the measurements")
    options = parser.parse_args(arguments)
    training = json.loads((options.folder / "evaluation.json").read_text())["training"]
    write_evaluation(options.folder, evaluate(options.folder, training, processes=options.processes))


if __name__ == "__main__":
    main()
