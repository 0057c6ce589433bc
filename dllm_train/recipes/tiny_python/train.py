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
import re
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dllm_train.attention_masks import hidden_states
from dllm_train.noise import IGNORED_LABEL
from dllm_train.objectives import bd3lm_loss, mdlm_loss
from dllm_train.process_group import end_process
from dllm_train.recipes.tiny_python import arithmetic, data, monitor
from dllm_train.recipes.tiny_python.evaluate import evaluate, write_evaluation
from dllm_train.recipes.tiny_python.export import export
from dllm_train.recipes.tiny_python.muon import Muon
from dllm_train.recipes.tiny_python.tokenizer import train_tokenizer

BLOCK_SIZE = 32


@dataclass
class Settings:
    """Settings of a run. `minutes` None: the schedule runs over `steps` instead of time. `sources`: a
    folder of Python files in place of the standard library. `init`: an exported checkpoint whose tokenizer
    and weights the run starts from; it then has no autoregressive phase and no focus on additions, and
    `layers` may be a multiple of its layers."""

    minutes: float | None = 60.0
    steps: int | None = None
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 640
    vocab_size: int = 4096
    rows: int = 16
    length: int = 256
    long_share: float = 0.35
    ar_share: float = 0.2
    decay_from: float = 0.5
    arithmetic_share: float = 0.15
    prompt_share: float = 0.35
    line_share: float = 0.6
    addition_length: int = 16
    long_additions_from: float = 0.5
    focus_until: float = 0.35
    eps: float = 0.1
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.03
    seed: int = 0
    sources: str | None = None
    init: str | None = None
    compile: bool = True
    monitor_minutes: float = 3.0
    checkpoint_minutes: float = 3.0


class Run:
    """State of a training run: model, optimisers, and the counters from which everything else follows."""

    def __init__(self, settings: Settings, out: Path, device: str, rank: int = 0, world: int = 1):
        self.settings, self.out, self.device, self.rank, self.world = settings, out, device, rank, world
        self.step, self.rows_seen, self.elapsed, self.started = 0, 0, 0.0, time.monotonic()
        torch.manual_seed(settings.seed)
        documents, held_out = data.split(data.collect_sources(settings.sources))
        self.tokenizer = prepare_tokenizer(settings, out)
        self.rows = data.Rows(
            data.encode_documents(documents, self.tokenizer),
            self.tokenizer,
            seed=settings.seed,
            arithmetic_share=settings.arithmetic_share,
        )
        self.held_out = data.encode_documents(held_out, self.tokenizer)
        self.held_out_bytes = sum(len(d.text.encode()) for d in held_out)
        self.ends_line = data.ends_line(self.tokenizer)
        self.model = build_model(settings, self.tokenizer).to(device)
        if settings.init:
            start_from(self.model, settings.init)
        if settings.compile:
            self.model.base_model.compile(dynamic=False)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimisers = [
            Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay),
            torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def progress(self) -> float:
        """Return the part of the schedule that is done, in [0, 1]."""
        if self.settings.minutes is not None:
            return min(1.0, self.elapsed / (60 * self.settings.minutes))
        return min(1.0, self.step / self.settings.steps)

    def train_step(self) -> dict:
        """Take one optimiser step on two batches of rows x length positions; return its log entry.

        Every process draws the whole batch, computes its own rows and sums gradients with the others.
        """
        s, progress = self.settings, self.progress()
        factor = learning_rate_factor(progress, self.step, s.decay_from)
        for optimiser, rate in zip(self.optimisers, (s.muon_lr, s.adam_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        self.model.train()
        rng = np.random.default_rng([s.seed, 3, self.step])
        entry = {"step": self.step, "progress": round(progress, 4), "lr": round(factor, 4)}
        if progress < s.ar_share:
            total = 0.0
            for _ in range(2):
                ids, _ = self._batch(s.rows, s.length)
                loss = autoregressive_loss(self.model, ids[self.mine(len(ids))]) / (2 * self.world)
                loss.backward()
                total += float(loss.detach())
            (total,) = self._sum_over_processes(total)
            entry |= {"phase": "ar", "ar": total}
        else:
            focus = progress < s.focus_until
            turn = self.step // 3 if focus else self.step
            scale = 2 if rng.random() < s.long_share else 1
            rows, length = s.rows // scale, s.length * scale
            if focus and self.step % 3:
                objective, code = "none", 0.0
            elif turn % 2 == 0:
                objective = "mdlm"
                ids, numbers = self._batch(rows, length)
                labels = mdlm_labels(ids, self.ends_line, s.line_share, s.prompt_share / 2, rng)
                code = self._diffusion_backward(mdlm_loss, ids, labels, numbers)
            else:
                objective = "bd3lm"
                ids, numbers = self._batch(rows // 2, length)
                labels = bd3lm_labels(ids, s.prompt_share, rng)
                code = self._diffusion_backward(bd3lm_loss, ids, labels, numbers, block_size=BLOCK_SIZE)
            additions = 0.0
            if focus or self.step % 4 < 2:
                ids, labels, numbers = self._additions(progress)
                additions = self._diffusion_backward(mdlm_loss, ids, labels, numbers)
            code, additions = self._sum_over_processes(code, additions)
            entry |= {"phase": "diffusion", "length": length, objective: code, "additions": additions}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return entry | {"grad_norm": float(norm)}

    def mine(self, rows: int) -> slice:
        """Return the rows of a batch that this process computes."""
        return part_of_batch(rows, self.rank, self.world)

    def _diffusion_backward(self, loss, ids, labels, numbers, **options) -> float:
        """Add the gradient of half the loss of this process's rows; return their part of the NLL."""
        mine, tokens = self.mine(len(ids)), int((labels != IGNORED_LABEL).sum())
        output = loss(
            self.model,
            ids[mine],
            labels[mine],
            example_ids=numbers[mine],
            normalizer=tokens,
            mask_id=self.tokenizer.mask_token_id,
            seed=self.settings.seed,
            eps=self.settings.eps,
            bar_mask_token=True,
            **options,
        )
        (output.loss / 2).backward()
        return float(output.nll_sum) / tokens

    def _sum_over_processes(self, *figures: float) -> list[float]:
        """Sum gradients and figures, and set `elapsed` by the clock of process 0."""
        elapsed = time.monotonic() - self.started if self.rank == 0 else 0.0
        if self.world == 1:
            self.elapsed = elapsed
            return list(figures)
        gradients = [p.grad for p in self.model.parameters()]
        flat = torch.cat(
            [g.flatten() for g in gradients] + [torch.tensor([*figures, elapsed], device=self.device)]
        )
        torch.distributed.all_reduce(flat)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
        *figures, self.elapsed = flat[offset:].tolist()
        return figures

    def _batch(self, rows, length):
        numbers = range(self.rows_seen, self.rows_seen + rows)
        ids = torch.from_numpy(self.rows.batch(self.rows_seen, rows, length)).to(self.device)
        self.rows_seen += rows
        return ids, numbers

    def _additions(self, progress):
        """Return rows of one addition, at position 0 as prompts are: (ids, labels, row numbers).

        Only the answer is trained. The text after the line is masked, or, in half of the longer rows, partly
        shown: more lines, or the end of the document. Rows lie within one block, where block-causal and
        bidirectional attention are the same.
        """
        s = self.settings
        length = s.addition_length if progress < s.long_additions_from else BLOCK_SIZE
        count = s.rows * s.length // length
        numbers = range(self.rows_seen, self.rows_seen + count)
        self.rows_seen += count
        rng = np.random.default_rng([s.seed, 4, self.step])
        pairs = [arithmetic.training_pair(rng) for _ in range(count)]
        ids = torch.full((count, length), self.tokenizer.mask_token_id)
        labels = torch.full((count, length), IGNORED_LABEL)
        prompts = self.tokenizer([arithmetic.prompt(a, b) for a, b in pairs], add_special_tokens=False)[
            "input_ids"
        ]
        lines = self.tokenizer([arithmetic.line(a, b) for a, b in pairs], add_special_tokens=False)[
            "input_ids"
        ]
        for row, (prompt, line) in enumerate(zip(prompts, lines, strict=True)):
            ids[row, : len(line)] = torch.tensor(line)
            if length > s.addition_length and rng.random() < 0.5:
                end = [self.tokenizer.eos_token_id] if rng.random() < 0.3 else []
                more = torch.tensor([*end, *lines[row - 1], *lines[row - 2]])[: length - len(line)]
                shown = torch.from_numpy(rng.random(len(more)) < rng.random())
                ids[row, len(line) : len(line) + len(more)][shown] = more[shown]
            labels[row, len(prompt) : len(line)] = ids[row, len(prompt) : len(line)]
        return ids.to(self.device), labels.to(self.device), numbers

    def save(self):
        """Write checkpoint.pt beside itself, then rename it."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "rows_seen": self.rows_seen,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
        }
        torch.save(state, self.out / "checkpoint.pt.tmp")
        os.replace(self.out / "checkpoint.pt.tmp", self.out / "checkpoint.pt")

    def measure(self) -> dict:
        """Return a log entry of figures on held-out data."""
        figures = monitor.measure(self.model, self.tokenizer, self.held_out, self.held_out_bytes, BLOCK_SIZE)
        return {"event": "monitor", "step": self.step, "minutes": round(self.elapsed / 60, 2)} | figures

    def load(self):
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.rows_seen, self.elapsed = state["step"], state["rows_seen"], state["elapsed"]
        self.started = time.monotonic() - self.elapsed


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


def prepare_tokenizer(settings: Settings, out: Path) -> PreTrainedTokenizerFast:
    """Return the run's tokenizer: that of `init`, or one that the first process trains on the documents."""
    path = out / "tokenizer"
    if not path.exists():
        if settings.init:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(settings.init)
        else:
            documents, _ = data.split(data.collect_sources(settings.sources))
            tokenizer = train_tokenizer((d.text for d in documents), settings.vocab_size)
        tokenizer.save_pretrained(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def build_model(settings: Settings, tokenizer) -> Qwen3ForCausalLM:
    """Return a Qwen3 with tied embeddings; residual branches start at zero."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        intermediate_size=settings.mlp,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def start_from(model: Qwen3ForCausalLM, folder: str) -> None:
    """Load the weights of an exported checkpoint. A model with n times its layers computes what it does: of
    every layer it has a copy and n - 1 that add nothing yet. ValueError for another number of layers."""
    start = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers, given = model.config.num_hidden_layers, start.config.num_hidden_layers
    if layers % given:
        raise ValueError(f"layers is {layers}; it must be a multiple of the {given} layers of {folder}")
    copies, state = layers // given, {}
    for name, weight in start.state_dict().items():
        layer = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
        if layer is None:
            state[name] = weight
            continue
        for copy in range(copies):
            silent = copy > 0 and name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
            number = int(layer[2]) * copies + copy
            state[f"{layer[1]}{number}{layer[3]}"] = torch.zeros_like(weight) if silent else weight
    model.load_state_dict(state)


def part_of_batch(rows: int, rank: int, world: int) -> slice:
    """Return the rows that process `rank` of `world` computes."""
    return slice(rows * rank // world, rows * (rank + 1) // world)


def learning_rate_factor(progress: float, step: int, decay_from: float, warmup_steps: int = 30) -> float:
    """Return the factor: warm-up over the first steps, constant, then linear to zero from `decay_from` on."""
    return min(1.0, (step + 1) / warmup_steps) * min(1.0, max(0.0, (1 - progress) / (1 - decay_from)))


def autoregressive_loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross entropy of int64 ids [B, L] under causal attention."""
    hidden = hidden_states(model, ids, kind="causal")[:, :-1]
    return F.cross_entropy(model.lm_head(hidden.flatten(0, 1)), ids[:, 1:].flatten())


def mdlm_labels(ids, ends_line, line_share, prompt_share, rng) -> torch.Tensor:
    """Return labels for MDLM: of `line_share` of the rows only some lines may be masked (infilling), of
    `prompt_share` only what follows a random prefix (completion), of the others everything."""
    labels = ids.clone()
    for row in labels:
        kind = rng.random()
        if kind < line_share:
            line = np.cumsum(np.concatenate([[0], ends_line[row[:-1].cpu().numpy()]]))
            given = (rng.random(line[-1] + 1) >= rng.uniform(0.03, 0.3))[line]
            row[torch.from_numpy(given).to(row.device)] = IGNORED_LABEL
        elif kind < line_share + prompt_share:
            row[: rng.integers(0, len(row))] = IGNORED_LABEL
    return labels


def bd3lm_labels(ids, prompt_share, rng) -> torch.Tensor:
    """Return BD3LM labels: in `prompt_share` of the rows a random prefix of every block is given, as in the
    block where a prompt ends."""
    labels = ids.clone()
    offset = torch.arange(ids.shape[1], device=ids.device)
    for row in labels:
        if rng.random() < prompt_share:
            given = torch.from_numpy(rng.integers(0, BLOCK_SIZE, -(-len(row) // BLOCK_SIZE))).to(ids.device)
            row[offset % BLOCK_SIZE < given[offset // BLOCK_SIZE]] = IGNORED_LABEL
    return labels


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
