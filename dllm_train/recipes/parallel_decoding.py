"""Teach a diffusion language model to decode more tokens per forward, from its own text.

    python -m dllm_train.recipes.parallel_decoding --model CKPT --dataset SPEC --output DIR

or the same under `torchrun --nproc-per-node N -m`. In every round the model completes prompts and fills lines
of the dataset, several tokens per forward at a low threshold. A judge, by default the model from before, says
how likely each token is beside the others (pseudo-likelihood, Besag 1975). Then the model is trained on its
own text, in the very states that the sampler passed, on what was written in them: likely tokens become surer,
unlikely ones less sure. Of every loop one token has to lose against another by a margin (where unlikelihood,
Welleck et al. 2020, lowers all). The dataset's own text in the filled lines, and the model's own objectives
on rows of the dataset, keep what the model knows.
OUTPUT/model is the student after the last finished round; --resume continues from there.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed

import dllm_kernels as dk
from dllm_kernels.models.families import diffusion_of
from dllm_train.data import load_pretraining_dataset
from dllm_train.recipes import own_text
from dllm_train.recipes.own_text import NEVER
from dllm_train.recipes.student_losses import StudentLosses

ROWS_JUDGED = 8  # at once: every masked token has a row of logits


@dataclass
class Settings:
    """Numbers of rows and texts are those of all processes together.

    rounds, steps: rounds of writing, and training steps after each. length: tokens of a row, of which prompts
    take an eighth to a half. prompts, gap_rows: what the model completes, and fills, in a round. memory: how
    many rounds' texts are trained on. rows, loops: of a batch of own text, and of loops to unlearn.
    threshold: to decode with later; half of the prompts are completed with it, so that its loops are
    unlearned. low_threshold: of the other half, and of filled gaps; it shows what could be written at once.
    temperature, draws: of the blocks of which one replaces a loop. likely, unlikely: by the judge, from which
    probability a token is learned, and below which it is unlearned. caution: how much an unlikely token
    weighs. margin: in logits, of another token over one of a loop. *_weight: of a loss in the sum. eps: least
    noise of the dataset's rows. bfloat16: compute in it; the weights stay as they are. student_share: of the
    weights in the end; the rest is the judge's, which brings the bound back (WiSE-FT, Wortsman et al. 2022).
    """

    rounds: int = 24
    steps: int = 20
    length: int = 256
    prompts: int = 48
    gap_rows: int = 32
    memory: int = 4
    rows: int = 12
    loops: int = 8
    threshold: float = 0.9
    low_threshold: float = 0.6
    temperature: float = 0.8
    draws: int = 4
    learning_rate: float = 3e-4
    warmup_steps: int = 20
    own_weight: float = 7.0
    loops_weight: float = 2.0
    margin: float = 1.0
    likely: float = 0.2
    unlikely: float = 0.02
    caution: float = 2.0
    given_weight: float = 2.0
    real_weight: float = 3.0
    eps: float = 0.05
    bfloat16: bool = False
    student_share: float = 1.0
    seed: int = 0


class Teaching:
    """A run: the model, its optimizers, and the texts that it wrote in the last rounds.

    model: as `dk.load` returns it. judge: another one with its tokens and kinds of attention; None: the model
    as it is now. row: a function from an index to `settings.length` ids of the dataset.
    optimizers: a function from the model and the learning rate to a list of optimizers; None: `adamw`.
    also: a function from a random generator to one more loss of every step, or None.
    Raises ValueError for a checkpoint or settings that the recipe cannot train.
    """

    def __init__(
        self, model, tokenizer, row: Callable[[int], Sequence[int]], output: Path, settings: Settings, *,
        judge=None, optimizers: Callable | None = None, also: Callable | None = None,
    ):  # fmt: skip
        self.judge = (judge or copy.deepcopy(model)).requires_grad_(False)
        self.model, self.tokenizer, self.row, self.settings = model, tokenizer, row, settings
        self.output, self.also = output, also
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.kinds = list(model.config.diffusion["attention"])
        self.completing = "block_causal" if "block_causal" in self.kinds else self.kinds[0]
        diffusion = diffusion_of(model)
        self.block_size, self.mask_id = diffusion.block_size or 32, diffusion.mask_id
        self.shift, self.end_ids = diffusion.shift, diffusion.eos_ids
        self._check()
        self.losses = StudentLosses(
            model, settings, completing=self.completing, block_size=self.block_size,
            bos_id=tokenizer.bos_token_id,
        )  # fmt: skip
        self.ends = own_text.ends_line(tokenizer, self.end_ids)
        self.optimizers = (optimizers or adamw)(model, settings.learning_rate)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.step, self.round, self.texts = 0, 0, []

    def run(self) -> None:
        """Teach to the end of the last round. log.jsonl gets a line with the settings, and one per round,
        which ends with a checkpoint."""
        start = {"event": "start", "step": self.step, "processes": self.world}
        self._log(start | {"settings": asdict(self.settings)})
        while self.round < self.settings.rounds:
            started, totals = time.monotonic(), {}
            texts, figures = self.write()
            self.texts = [*self.texts, texts][-self.settings.memory :]
            figures["seconds_of_writing"] = time.monotonic() - started
            self.model.train()
            for _ in range(self.settings.steps):
                for name, loss in self.train_step().items():
                    totals.setdefault(name, []).append(loss)
            self.round += 1
            self.save()
            figures |= {name: float(np.mean(losses)) for name, losses in totals.items()}
            figures["seconds"] = time.monotonic() - started
            figures = {name: round(value, 4) for name, value in figures.items()}
            self._log({"round": self.round, "step": self.step} | figures)

    def write(self) -> tuple[dict, dict]:
        """Let the current model complete prompts and fill gaps: this process's share of a round.

        Returns {"completions", "loops", and for each kind of attention its filled rows}, and figures of them.
        """
        s, rng = self.settings, np.random.default_rng([self.settings.seed, 1, self.round, self.rank])
        writers, texts = self._writers(), {"completions": [], "loops": []}
        figures, count = {}, -(-s.prompts // (2 * self.world))
        for name, threshold in (("", s.threshold), ("_low", s.low_threshold)):
            speeds = []
            for first in range(0, count, own_text.ROWS_AT_ONCE):
                written = own_text.complete(
                    writers[self.completing], self._prompts(min(own_text.ROWS_AT_ONCE, count - first), rng),
                    self.ends, end_ids=self.end_ids, block_size=self.block_size, tokens=s.length // 2,
                    threshold=threshold, temperature=s.temperature, draws=s.draws,
                    seed=int(rng.integers(2**31)),
                )  # fmt: skip
                texts["completions"] += written.completions
                texts["loops"] += written.loops
                speeds.append(written.tokens_per_forward)
            figures[f"tokens_per_forward{name}"] = float(np.mean(speeds))
        common = own_text.leave_out_common_phrases(texts["completions"])
        figures["unlikely_completed"] = self.judge_texts(self.completing, texts["completions"])
        rows = [self._any_row(rng) for _ in range(-(-s.gap_rows // self.world))]
        gaps = [own_text.choose_gaps(ids, self.ends, rng) for ids in rows]
        for kind, writer in writers.items():
            texts[kind] = own_text.fill(writer, rows, gaps, mask_id=self.mask_id, threshold=s.low_threshold)
            figures[f"unlikely_{kind}"] = self.judge_texts(kind, texts[kind])
        figures["loops_per_completion"] = len(texts["loops"]) / (2 * count)
        figures["common_phrases"] = common
        return texts, figures

    @torch.no_grad()
    def judge_texts(self, kind: str, texts: list) -> float:
        """Set `judged` of completions or filled rows. Return the share of tokens that are unlikely.

        Every second token is masked, then every other one, so that each is judged beside its neighbours.
        """
        judged: list[float] = []
        for first in range(0, len(texts), ROWS_JUDGED):
            part = texts[first : first + ROWS_JUDGED]
            ids, steps = self.losses.rows_of(part)
            probabilities = torch.full(ids.shape, torch.nan)
            for parity in range(2):
                masked = (steps != NEVER) & (torch.arange(ids.shape[1]) % 2 == parity)
                logits, tokens = self.losses.predictions(self.judge, kind, ids, masked, masked)
                probabilities[masked] = logits.softmax(1).gather(1, tokens[:, None])[:, 0].cpu()
            for text, row in zip(part, probabilities, strict=True):
                text.judged = row[len(text.whole) - len(text.steps) : len(text.whole)].tolist()
            judged += probabilities[steps != NEVER].tolist()
        return float(np.mean(np.array(judged) < self.settings.unlikely)) if judged else 0.0

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step on the sum of all losses; return them."""
        s, rng = self.settings, np.random.default_rng([self.settings.seed, 2, self.step, self.rank])
        factor = min(1.0, (self.step + 1) / s.warmup_steps) * (1 - self.step / (s.rounds * s.steps))
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        kind = self.kinds[self.step % len(self.kinds)]
        own, drawn = self.losses, partial(self._choose, rng=rng)
        losses: dict[str, tuple[float, Callable]] = {
            "completed": (s.own_weight, lambda: own.completed(drawn("completions", s.rows), rng)),
            f"filled_{kind}": (s.own_weight, lambda: own.filled(kind, drawn(kind, s.rows), rng)),
            f"given_{kind}": (s.given_weight, lambda: own.given(kind, drawn(kind, s.rows), rng)),
            f"real_{kind}": (s.real_weight, lambda: own.real(kind, *self._dataset_rows())),
            "loops": (s.loops_weight, lambda: own.loops(drawn("loops", s.loops), rng)),
        }
        if self.also:
            losses["also"] = (1.0, lambda: self.also(rng))
        figures = {}
        for name, (weight, loss) in losses.items():
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=s.bfloat16):
                value = loss()
            if value is not None:
                if not torch.isfinite(value):
                    raise FloatingPointError(f"step {self.step}: the loss {name!r} is {float(value)}")
                (value * weight / self.world).backward()
                figures[name] = float(value.detach())
        self._sum_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return figures

    # ---- state -------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Write OUTPUT/model, and the rest that a resumed run needs."""
        if self.rank == 0:
            dk.save(self.model, self.tokenizer, self.output / "model")
        state = {
            "step": self.step,
            "round": self.round,
            "texts": self.texts,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        path = self.output / f"state-{self.rank}.pt"
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self) -> None:
        """Load the files of `save`."""
        path = self.output / f"state-{self.rank}.pt"
        if not path.exists():
            raise ValueError(f"resume: {str(path)!r} does not exist")
        state = torch.load(path, map_location="cpu", weights_only=False)
        self.step, self.round, self.texts = state["step"], state["round"], state["texts"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    # ---- helpers -----------------------------------------------------------------------------------------
    def _log(self, entry: dict) -> None:
        if self.rank == 0:
            with (self.output / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")

    def _check(self) -> None:
        s = self.settings
        if self.mask_id is None:
            raise ValueError("model has no mask_token_id; convert it first (dllm convert)")
        if self.shift and self.completing == "block_causal":
            raise ValueError("model predicts shifted tokens in blocks; this recipe has no loss for that")
        if s.length < 4 * self.block_size:
            raise ValueError(
                f"length is {s.length}; expected at least four blocks of {self.block_size} tokens"
            )
        judge, own = diffusion_of(self.judge), diffusion_of(self.model)
        for name in ("vocab_size", "mask_id", "shift"):
            if getattr(judge, name) != getattr(own, name):
                raise ValueError(
                    f"judge has {name} {getattr(judge, name)}; expected the model's {getattr(own, name)}"
                )
        shapes, judged = (
            {name: weight.shape for name, weight in which.named_parameters()}
            for which in (self.model, self.judge)
        )
        if s.student_share < 1 and shapes != judged:
            raise ValueError(
                f"student_share is {s.student_share}; expected 1, since the judge's weights have other shapes"
            )
        for name in ("rows", "prompts", "gap_rows"):
            if getattr(s, name) < self.world:
                raise ValueError(f"{name} is {getattr(s, name)}; expected at least one for each process")

    def _writers(self) -> dict:
        """Save the model, and return a copy of it to sample from for each kind of attention."""
        if self.rank == 0:
            dk.save(self.model, self.tokenizer, self.output / "model")
        if self.world > 1:
            distributed.barrier()
        options = {"device": self.model.device, "dtype": self.model.dtype}
        if self.settings.bfloat16:
            options["dtype"] = torch.bfloat16
        return {kind: dk.load(self.output / "model", attention=kind, **options)[0] for kind in self.kinds}

    def _any_row(self, rng) -> list[int]:
        return list(map(int, self.row(int(rng.integers(2**31)))))

    def _prompts(self, count: int, rng) -> list[list[int]]:
        """Return beginnings of rows, of lengths that are equal modulo the block size: to the end of a line,
        where rows with such lines are found."""
        residue = int(rng.integers(self.block_size))
        lengths = range(self.settings.length // 8, self.settings.length // 2 + 1)
        lengths, prompts = {n for n in lengths if n % self.block_size == residue}, []
        for tried in range(64 * count):
            ids = self._any_row(rng)
            fitting = lengths & set(own_text.line_starts(ids, self.ends)) if tried < 32 * count else lengths
            if fitting:
                prompts.append(ids[: rng.choice(sorted(fitting))])
            if len(prompts) == count:
                break
        return prompts

    def _dataset_rows(self) -> tuple[Tensor, range]:
        """Return this process's rows of the dataset in this step, int64 [rows, length], and their numbers."""
        count = max(1, self.settings.rows // self.world)
        first = (self.step * self.world + self.rank) * count
        numbers = range(first, first + count)
        return torch.tensor([list(map(int, self.row(number))) for number in numbers]), numbers

    def _choose(self, name: str, count: int, rng) -> list:
        """Draw this process's share of `count` texts, half of them from the last round."""
        rounds = [texts[name] for texts in self.texts]
        remembered = [text for texts in rounds for text in texts]
        chosen = []
        for _ in range(max(1, count // self.world) if remembered else 0):
            texts = rounds[-1] if rounds[-1] and rng.random() < 0.5 else remembered
            chosen.append(texts[rng.integers(len(texts))])
        return chosen

    def _sum_gradients(self) -> None:
        if self.world == 1:
            return
        gradients = [p.grad for p in self.model.parameters()]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def adamw(model, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return AdamW; norms and biases do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or name, as dk.load takes it")
    parser.add_argument("--judge", help="checkpoint that judges the model's text; default: MODEL")
    parser.add_argument("--dataset", required=True, help="dataset specification; its train split is used")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--resume", action="store_true", help="go on from the last finished round of OUTPUT")
    add_settings(parser)
    options = parser.parse_args(arguments)
    start_processes()
    model, tokenizer = dk.load(options.model, dtype=torch.float32, fused=True)
    settings = settings_of(options)
    rows = load_pretraining_dataset(
        options.dataset, tokenizer, max_length=settings.length, text_field=options.text_field, packing=False,
        drop_tail=True, seed=settings.seed,
    )["train"]  # fmt: skip

    def row(index: int) -> list[int]:
        return rows[index % len(rows)]["input_ids"]

    judge, _ = dk.load(options.judge or options.model, dtype=torch.float32, fused=True)
    teach(model, tokenizer, row, options.output, settings, options.resume, judge=judge)


def teach(model, tokenizer, row, output: Path, settings: Settings, resume: bool = False, **options) -> None:
    """Run a `Teaching` from the beginning, or from where `output` stands, and mix the weights in the end."""
    output.mkdir(parents=True, exist_ok=True)
    teaching = Teaching(model, tokenizer, row, output, settings, **options)
    if resume:
        teaching.load()
    elif teaching.rank == 0:
        (output / "log.jsonl").unlink(missing_ok=True)
    teaching.run()
    if settings.student_share < 1:
        weights = dict(teaching.judge.named_parameters())
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(weights[name].lerp(weight, settings.student_share))
    if teaching.rank == 0:
        dk.save(model, tokenizer, output / "model")


def start_processes() -> None:
    """Join the processes that torchrun started, if it did; each computes on a GPU of its own, or one core."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            torch.set_num_threads(1)
        distributed.init_process_group()


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of Settings."""
    for field in fields(Settings):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=field.type, default=field.default)


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})


if __name__ == "__main__":
    main()
