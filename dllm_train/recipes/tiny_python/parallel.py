"""The last part of tiny-python's training: decoding in parallel, learned from its own text.

    torchrun --nproc-per-node 2 -m dllm_train.recipes.tiny_python.parallel --model FOLDER --output DIR

The recipe parallel_decoding on the recipe's own corpus, with Muon and with single additions in every step and
in the end. Then it exports to --export, measures and writes the model card.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import distributed

import dllm_kernels as dk
from dllm_kernels.models.checkpoint import checkpoint_folder
from dllm_train.noise import IGNORED_LABEL
from dllm_train.objectives import mdlm_loss
from dllm_train.process_group import end_process
from dllm_train.recipes.parallel_decoding import add_settings, settings_of, start_processes, teach
from dllm_train.recipes.tiny_python import arithmetic, data
from dllm_train.recipes.tiny_python.evaluate import evaluate, write_evaluation
from dllm_train.recipes.tiny_python.export import export
from dllm_train.recipes.tiny_python.muon import Muon

ARITHMETIC_SHARE = 0.06
ADDITIONS = 24  # of a step, in all processes
REPEATED_STEPS, REPEATED_RATE = 60, 2e-5  # of additions alone, in the end
MUON_RATE = 10  # times the rate of AdamW, which trains the embedding and the norms


def additions_loss(model, tokenizer, block_size: int, count: int, rng) -> torch.Tensor:
    """Return the loss on answers of `count` additions, each at the start of a row of one block."""
    pairs = [arithmetic.training_pair(rng) for _ in range(count)]
    ids = torch.full((count, block_size), tokenizer.mask_token_id)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for row, pair in enumerate(pairs):
        prompt, line = (
            tokenizer(text(*pair), add_special_tokens=False)["input_ids"]
            for text in (arithmetic.prompt, arithmetic.line)
        )
        ids[row, : len(line)] = torch.tensor(line)
        labels[row, len(prompt) : len(line)] = ids[row, len(prompt) : len(line)]
    return mdlm_loss(
        model, ids, labels, mask_id=tokenizer.mask_token_id, seed=int(rng.integers(2**31)), eps=0.3,
        loss_weight_type="uniform", bar_mask_token=True,
    ).loss  # fmt: skip


def repeat_additions(model, tokenizer, block_size: int, seed: int) -> None:
    """Train on additions alone for a moment: a mix of two models' weights has forgotten some carries."""
    rng, optimizer = np.random.default_rng([seed, 3]), torch.optim.AdamW(model.parameters(), lr=REPEATED_RATE)
    for _ in range(REPEATED_STEPS):
        optimizer.zero_grad(set_to_none=True)
        additions_loss(model, tokenizer, block_size, 4 * ADDITIONS, rng).backward()
        optimizer.step()


def optimizers(model, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=MUON_RATE * learning_rate),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-python", help="exported checkpoint")
    parser.add_argument("--judge", help="checkpoint; default: MODEL")
    parser.add_argument("--output", type=Path, default=Path("runs/tiny-python-parallel"))
    parser.add_argument("--export", type=Path, help="finished checkpoint; default: OUTPUT/export")
    parser.add_argument("--sources", help="folder of Python files; default: the standard library")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-evaluation", action="store_true", help="export alone")
    add_settings(parser)
    options = parser.parse_args(arguments)
    start_processes()
    settings = settings_of(options)
    model, tokenizer = dk.load(options.model, dtype=torch.float32, fused=True)
    before = json.loads((checkpoint_folder(options.model) / "evaluation.json").read_text())["training"]
    documents, _ = data.split(data.collect_sources(options.sources))
    encoded = data.encode_documents(documents, tokenizer)
    rows = data.Rows(encoded, tokenizer, seed=settings.seed, arithmetic_share=ARITHMETIC_SHARE)
    processes = distributed.get_world_size() if distributed.is_initialized() else 1

    block_size = model.config.diffusion["block_size"]

    def additions(rng):
        return 0.3 * additions_loss(model, tokenizer, block_size, ADDITIONS // processes, rng)

    judge = dk.load(options.judge or options.model, dtype=torch.float32, fused=True)[0]
    teach(
        model, tokenizer, lambda index: rows.row(index, settings.length), options.output, settings,
        options.resume, judge=judge, optimizers=optimizers, also=additions,
    )  # fmt: skip
    if processes > 1:
        rank = distributed.get_rank()
        if rank > 0:
            end_process()
        distributed.destroy_process_group()
    repeat_additions(model, tokenizer, block_size, settings.seed)
    folder = options.export or options.output / "export"
    export(model, tokenizer, folder, block_size)
    if not options.no_evaluation:
        summary = training_summary(options.output / "log.jsonl") | {"init": before}
        write_evaluation(folder, evaluate(folder, summary, sources=options.sources))


def training_summary(log: Path) -> dict:
    """Return the run's entry in the model card: its length, its first settings, and the changes of later
    starts."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    starts = [entry for entry in entries if entry.get("event") == "start"]
    rounds = [entry for entry in entries if "round" in entry]
    changes = []
    for before, after in pairwise(starts):
        new = {k: v for k, v in after["settings"].items() if before["settings"].get(k) != v}
        changes.append({"step": after["step"], "settings": new})
    return {
        "recipe": "parallel_decoding",
        "steps": rounds[-1]["step"],
        "minutes": round(sum(entry["seconds"] for entry in rounds) / 60, 3),
        "processes": starts[0]["processes"],
        "settings": starts[0]["settings"],
        "resumed": changes,
    }


if __name__ == "__main__":
    main()
