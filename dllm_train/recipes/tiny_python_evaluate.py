"""Figures of a tiny-python checkpoint on held-out data.

`python -m dllm_train.recipes.tiny_python_evaluate FOLDER` measures an exported checkpoint again. The bound
comes from the training objectives, everything generated from `dk.sample` and `dk.infill`. Writes
evaluation.json and the model card README.md into the checkpoint's folder.
"""

import argparse
import gzip
import importlib.metadata
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
from dllm_train import arithmetic, data
from dllm_train.objectives import bd3lm_loss, mdlm_loss
from dllm_train.python_tokenizer import newline_ids
from dllm_train.recipes.tiny_python_export import ATTENTION, model_card

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
) -> dict:
    """All figures of the checkpoint in `folder`, as `model_card` shows them; `training` is taken over.

    Infilled lines are few that come back exactly, so `lines` of them are filled at one token per step, and
    `threshold_lines` at every threshold.
    """
    models = {}
    for kind in ATTENTION:
        models[kind], tokenizer = dk.load(folder, attention=kind, dtype=torch.float32)
    train, held_out = data.split(data.collect_sources(sources))
    encoded = data.encode_documents(held_out, tokenizer)
    model = models["block_causal"]
    gaps = [gap for ids in encoded for gap in line_gaps(ids, tokenizer)]
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
        "bound": bounds(model, tokenizer, held_out, encoded, noise_draws),
        "thresholds": list(THRESHOLDS),
        "additions": {"pairs": len(arithmetic.held_out_pairs())} | at_every_rule(additions, model, tokenizer),
        "completion": at_every_rule(
            completions, model, tokenizer, spread(code_prompts(encoded, tokenizer), prompts)
        ),
        "infill": {"lines": min(lines, len(gaps)), "threshold_lines": min(threshold_lines, len(gaps))}
        | {
            kind: {
                "one_per_step": infilled_lines(models[kind], tokenizer, spread(gaps, lines)),
                **by_threshold(infilled_lines, models[kind], tokenizer, spread(gaps, threshold_lines)),
            }
            for kind in ATTENTION
        },
        "environment": environment(),
    }


def at_every_rule(measure, *arguments) -> dict:
    """Figures at one token per step, and at every threshold."""
    return {"one_per_step": measure(*arguments)} | by_threshold(measure, *arguments)


def by_threshold(measure, *arguments) -> dict:
    return {str(t): measure(*arguments, threshold=t) for t in THRESHOLDS}


def additions(model, tokenizer, **rule) -> dict:
    """Held-out pairs: the line's text must be right; its tokens over the forwards until all of them stood."""
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
    """128 tokens after each prompt; tokens up to the first end token over the forwards until they stood."""
    output = dk.sample(model, prompts, max_new_tokens=128, **rule)
    tokens = forwards = 0
    for row, prompt in enumerate(prompts):
        counted = output.unmask_step[row, len(prompt) : len(prompt) + int(output.lengths[row]) + 1]
        counted = counted[counted >= 0]
        if len(counted):
            tokens += len(counted)
            forwards += int(counted.max()) + 1
    return {"prompts": len(prompts), "tokens_per_forward": tokens / forwards}


def infilled_lines(model, tokenizer, gaps, **rule) -> dict:
    """Each gap (ids, start, end): as many masks as the line has tokens; exact when all of them are back."""
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
    """Bits per byte of the held-out documents, end tokens included, in rows without context from before; the
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
    """Prompts of up to `length` tokens that begin and end at line ends, from all over the documents."""
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
    """(row ids, start, end): every line with text on it of up to 24 tokens, without its newline, in a row of
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
    """`count` of the items, evenly spaced."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def byte_count(documents) -> int:
    return sum(len(document.text.encode()) for document in documents)


def environment() -> dict:
    """Machine, commit and versions that figures belong to."""
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
    """Commit of the source tree, with "+" when it has changes; "unknown" outside of git."""
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
    """evaluation.json and README.md, each written beside its target and renamed."""
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
    folder = parser.parse_args(arguments).folder
    training = json.loads((folder / "evaluation.json").read_text())["training"]
    write_evaluation(folder, evaluate(folder, training))


if __name__ == "__main__":
    main()
