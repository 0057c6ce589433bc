"""A run of tiny-python's training: its state, and the optimiser step."""

import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from dllm_train.attention_masks import hidden_states
from dllm_train.noise import IGNORED_LABEL
from dllm_train.objectives import bd3lm_loss, mdlm_loss
from dllm_train.recipes.tiny_python import arithmetic, data, monitor
from dllm_train.recipes.tiny_python.labels import bd3lm_labels, mdlm_labels
from dllm_train.recipes.tiny_python.model import build_model, start_from
from dllm_train.recipes.tiny_python.muon import Muon
from dllm_train.recipes.tiny_python.settings import BLOCK_SIZE, Settings
from dllm_train.recipes.tiny_python.tokenizer import train_tokenizer


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
