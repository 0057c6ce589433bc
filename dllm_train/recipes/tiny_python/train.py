"""Train `tiny-python`, the embedded model: `python -m dllm_train.recipes.tiny_python --minutes 60`.

One command: corpus (the standard library of the running Python and generated additions), tokenizer, an
autoregressive phase, a diffusion phase (every step half BD3LM, half MDLM), evaluation and export. `--resume`
continues from the last checkpoint in --out; `--init FOLDER` starts a diffusion phase from an exported
checkpoint. Runs on 2 CPU cores or one GPU.
"""

import argparse
import itertools
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dllm_train.process_group import end_process
from dllm_train.recipes.tiny_python.evaluate import evaluate, write_evaluation
from dllm_train.recipes.tiny_python.export import export
from dllm_train.recipes.tiny_python.model import build_model
from dllm_train.recipes.tiny_python.run import Run, prepare_tokenizer
from dllm_train.recipes.tiny_python.settings import BLOCK_SIZE, Settings


def train(settings: Settings, out: Path, *, resume: bool = False, device: str = "cpu", processes: int = 1):
    """Run the schedule to its end; the result is out/checkpoint.pt. Log: out/log.jsonl, an object per line.

    With `processes` > 1 (CPU) each batch is divided among that many single-threaded processes, which lose
    less than threads if other work shares the cores.
    """
    if resume and not (out / "checkpoint.pt").exists():
        raise ValueError(f"resume: {str(out / 'checkpoint.pt')!r} does not exist")
    if settings.rows // 4 % processes:
        raise ValueError(f"processes is {processes}; it must divide a quarter of the {settings.rows} rows")
    out.mkdir(parents=True, exist_ok=True)
    prepare_tokenizer(settings, out)
    if processes == 1:
        _train_process(0, 1, settings, out, resume, device, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _train_process,
            (processes, settings, out, resume, device, f"{folder}/rendezvous"),
            nprocs=processes,
        )


def _train_process(rank, world, settings, out, resume, device, rendezvous):
    if world > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
        )
    run = Run(settings, out, device, rank, world)
    if resume:
        run.load()
    log = JsonLines(out / "log.jsonl", append=resume) if rank == 0 else None
    if rank == 0:
        log.write(
            {
                "event": "start",
                "settings": asdict(settings),
                "corpus_tokens": len(run.rows.stream),
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "step": run.step,
            }
        )
    next_monitor = next_checkpoint = run.elapsed
    while run.progress() < 1:
        entry = run.train_step()
        if rank > 0:
            continue
        log.write(entry | {"minutes": round(run.elapsed / 60, 3)})
        if run.elapsed >= next_checkpoint + 60 * settings.checkpoint_minutes:
            run.save()
            next_checkpoint = run.elapsed
        if run.elapsed >= next_monitor + 60 * settings.monitor_minutes and entry["phase"] == "diffusion":
            log.write(run.measure())
            next_monitor = run.elapsed
    if rank == 0:
        run.save()
        log.write(run.measure())
    end_process()


def finish(settings: Settings, out: Path, folder: Path) -> None:
    """Export out/checkpoint.pt to `folder`, measure the exported files and write their model card."""
    tokenizer = prepare_tokenizer(settings, out)
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = build_model(settings, tokenizer)
    model.load_state_dict(state["model"])
    export(model, tokenizer, folder, BLOCK_SIZE)
    summary = training_summary(out / "log.jsonl")
    if settings.init:
        summary["init"] = json.loads((Path(settings.init) / "evaluation.json").read_text())["training"]
    write_evaluation(folder, evaluate(folder, summary, sources=settings.sources))


def training_summary(log: Path) -> dict:
    """Return steps and minutes of the run, its first settings (without paths), and the changes of later
    starts."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    starts = [entry for entry in entries if entry.get("event") == "start"]
    steps = [entry for entry in entries if "phase" in entry]
    changes = []
    for before, after in itertools.pairwise(starts):
        new = {k: v for k, v in after["settings"].items() if before["settings"].get(k) != v}
        changes.append({"step": after["step"], "settings": new})
    return {
        "steps": steps[-1]["step"] + 1,
        "minutes": steps[-1]["minutes"],
        "settings": {k: v for k, v in starts[0]["settings"].items() if k not in ("init", "sources")},
        "resumed": changes,
    }


class JsonLines:
    """A file of one JSON object per line, flushed after each."""

    def __init__(self, path: Path, append: bool):
        self.file = path.open("a" if append else "w")

    def write(self, entry: dict):
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()


def default_processes() -> int:
    """Return one per core up to 4 on a CPU, one on a GPU."""
    return 1 if torch.cuda.is_available() else max(p for p in (1, 2, 4) if p <= (os.cpu_count() or 1))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-python"))
    parser.add_argument(
        "--minutes", type=float, default=Settings.minutes, help="wall-clock budget of training"
    )
    parser.add_argument("--steps", type=int, help="run this many steps instead of a wall-clock budget")
    parser.add_argument("--layers", type=int, default=Settings.layers)
    parser.add_argument("--muon-lr", type=float, default=Settings.muon_lr)
    parser.add_argument("--adam-lr", type=float, default=Settings.adam_lr)
    parser.add_argument("--arithmetic-share", type=float, default=Settings.arithmetic_share)
    parser.add_argument("--decay-from", type=float, default=Settings.decay_from)
    parser.add_argument("--export", type=Path, help="folder of the finished checkpoint; default: OUT/export")
    parser.add_argument("--init", help="exported checkpoint to begin the diffusion phase with")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--processes", type=int, default=default_processes(), help="CPU processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    settings = replace(
        Settings(),
        minutes=None if options.steps else options.minutes,
        steps=options.steps,
        layers=options.layers,
        muon_lr=options.muon_lr,
        adam_lr=options.adam_lr,
        arithmetic_share=options.arithmetic_share,
        decay_from=options.decay_from,
        seed=options.seed,
        init=options.init,
        compile=not options.no_compile,
    )
    if settings.init:
        settings = replace(settings, ar_share=0.0, focus_until=0.0)
    train(settings, options.out, resume=options.resume, device=options.device, processes=options.processes)
    finish(settings, options.out, options.export or options.out / "export")


if __name__ == "__main__":
    main()
