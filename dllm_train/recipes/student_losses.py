"""What a student of its own text learns: losses in the states that its sampler passed.

A loss is a scalar with gradients, or None where there is no text for it.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_kernels.models.families import diffusion_of
from dllm_train.attention_masks import hidden_states
from dllm_train.objectives import bd3lm_loss, mdlm_loss
from dllm_train.recipes import own_text
from dllm_train.recipes.own_text import NEVER

if TYPE_CHECKING:
    from dllm_train.recipes.parallel_decoding import Settings


class StudentLosses:
    """Losses of a model on completions, filled rows and loops, as `own_text` has them.

    completing: the kind of attention with which it completes. block_size: tokens of a block in which it
    decodes. bos_id: before the first token of rows that predict shifted ones. rng of the methods: a NumPy
    generator, which draws states and gaps.
    """

    def __init__(self, model, settings: "Settings", *, completing: str, block_size: int, bos_id: int | None):
        diffusion = diffusion_of(model)
        self.model, self.settings, self.completing = model, settings, completing
        self.block_size, self.bos_id = block_size, bos_id
        self.mask_id, self.shift = diffusion.mask_id, diffusion.shift

    def completed(self, texts: Sequence[own_text.Completion], rng) -> Tensor | None:
        """Return the `judged` loss of completions."""
        ids, steps = self.rows_of(texts)
        judged = torch.full(ids.shape, torch.nan)
        for row, text in enumerate(texts):
            start, end = len(text.prompt), len(text.whole)
            judged[row, start:end] = torch.tensor(text.judged)
            common = ~torch.tensor(text.trained) & (judged[row, start:end] >= self.settings.likely)
            judged[row, start:end][common] = torch.nan
        if self.completing == "bidirectional":  # no state has two blocks that are written in part
            later = self._after_one_block(steps, rng)
            ids[later], steps[later] = self.mask_id, NEVER
        return self.judged(self.completing, ids, steps, judged, rng)

    def filled(self, kind: str, texts: Sequence[own_text.FilledRow], rng) -> Tensor | None:
        """Return the `judged` loss of six of ten gaps filled under attention `kind`; the others have the
        dataset's text."""
        ids, steps = self.rows_of(texts)
        judged = torch.full(ids.shape, torch.nan)
        for row, text in enumerate(texts):
            judged[row, : len(text.judged)] = torch.tensor(text.judged)
            for number in rng.permutation(len(text.gaps))[math.ceil(0.6 * len(text.gaps)) :]:
                gap = slice(*text.gaps[number])
                ids[row, gap], steps[row, gap] = torch.tensor(text.given[gap]), NEVER
        return self.judged(kind, ids, steps, judged, rng)

    def given(self, kind: str, texts: Sequence[own_text.FilledRow], rng) -> Tensor | None:
        """Return the cross entropy of the dataset's text in six of ten gaps, masked wholly or in part."""
        ids, masked = self._blank(len(texts), self.mask_id), self._blank(len(texts), False)
        for row, text in enumerate(texts):
            ids[row, : len(text.given)] = torch.tensor(text.given)
            for number in rng.permutation(len(text.gaps))[: math.ceil(0.6 * len(text.gaps))]:
                start, end = text.gaps[number]
                share = 1.0 if rng.random() < 0.6 else rng.random()
                masked[row, start:end] = torch.from_numpy(rng.random(end - start) < share)
        if not masked.any():
            return None
        logits, tokens = self.predictions(self.model, kind, ids, masked, masked)
        return torch.nn.functional.cross_entropy(logits, tokens)

    def judged(self, kind: str, ids: Tensor, steps: Tensor, judged: Tensor, rng) -> Tensor | None:
        """Return the mean loss of tokens that one forward wrote, in the state before it.

        1 - p of a likely token, and caution * p of an unlikely one. Being linear, it is least where p is 1
        for tokens of which a share above caution / (1 + caution) is likely, and 0 for others: a decision.
        With -log p and -log(1 - p), p would become that share.
        ids, steps: int64 [B, L], tokens and the forwards that wrote them. judged: float32 [B, L], their
        probability by the judge; nan: no loss.
        """
        masked, written = own_text.states_passed(steps, self.block_size, rng)
        likely, unlikely = judged >= self.settings.likely, judged < self.settings.unlikely
        written &= likely | unlikely
        if not written.any():
            return None
        logits, tokens = self.predictions(self.model, kind, ids, masked, written)
        p = logits.softmax(1).gather(1, tokens[:, None])[:, 0]
        return torch.where(likely[written].to(p.device), 1 - p, self.settings.caution * p).mean()

    def real(self, kind: str, ids: Tensor, numbers: Sequence[int]) -> Tensor:
        """Return the objective of attention `kind` on rows int64 [B, L], which the dataset numbers so."""
        loss, options = self._objective(kind)
        return loss(
            self.model, ids, example_ids=numbers, seed=self.settings.seed, eps=self.settings.eps, **options
        ).loss

    def loops(self, texts: Sequence[own_text.Loop], rng) -> Tensor | None:
        """Return the mean over loops of the `margin_loss` of their tokens, in states of decoding.

        Of a line that comes again it is the least one: another token in one place is another line. Where a
        few tokens alternate it is the mean: each of them has to lose.
        """
        ids, labelled = self._blank(len(texts), self.mask_id), self._blank(len(texts), False)
        looping = torch.zeros_like(labelled)
        alternating = torch.zeros(len(texts), dtype=torch.bool)
        for row, text in enumerate(texts):
            start, end = text.start // self.block_size * self.block_size, len(text.ids)
            ids[row, :end] = torch.tensor(text.ids)
            labelled[row, start:end] = True
            tokens = set(text.ids[text.start : text.end])
            alternating[row] = 2 * len(tokens) <= text.end - text.start
            if alternating[row]:  # and mostly goes on to the end of the block
                looping[row, text.start : end] = torch.isin(
                    ids[row, text.start : end], torch.tensor([*tokens])
                )
            else:
                looping[row, text.start : text.end] = True
        masked = own_text.states_of_decoding(labelled, self.block_size, rng)
        if not (looping & masked).any():
            return None
        logits, tokens = self.predictions(self.model, self.completing, ids, masked, looping & masked)
        losses = margin_loss(logits, tokens, self.settings.margin)
        row = (looping & masked).nonzero()[:, 0].to(losses.device)
        found = losses.new_zeros(len(texts))
        least, mean = (
            found.scatter_reduce(0, row, losses, reduce, include_self=False) for reduce in ("amin", "mean")
        )
        return torch.where(alternating.to(row.device), mean, least)[row.unique()].mean()

    # ---- rows -------------------------------------------------------------------------------------------
    def predictions(
        self, model, kind: str, ids: Tensor, masked: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (logits float32 [N, V], tokens int64 [N]) of the `chosen` places of rows.

        ids: int64 [B, L]. masked, chosen: bool [B, L].
        """
        ids, masked, chosen = (tensor.to(model.device) for tensor in (ids, masked, chosen))
        noised = ids.masked_fill(masked, self.mask_id)
        if kind == "block_causal":
            both = torch.cat([noised, ids], dim=1)
            hidden = hidden_states(model, both, kind="block_diffusion", block_size=self.block_size)
        else:
            hidden = hidden_states(model, noised, kind="full")
        row, column = chosen.nonzero(as_tuple=True)
        chosen_states = hidden[row, column - int(self.shift)]
        logits = reduce(lambda states, part: part(states), diffusion_of(model).head, chosen_states).float()
        logits[:, self.mask_id] = -torch.inf
        return logits, ids[chosen]

    def rows_of(self, texts: list) -> tuple[Tensor, Tensor]:
        """Return ids and steps, int64 [texts, length], of completions or filled rows."""
        ids, steps = self._blank(len(texts), self.mask_id), self._blank(len(texts), NEVER)
        for row, text in enumerate(texts):
            end = len(text.whole)
            ids[row, :end] = torch.tensor(text.whole)
            steps[row, end - len(text.steps) : end] = torch.tensor(text.steps)
        return ids, steps

    def _blank(self, rows: int, value: int | bool) -> Tensor:
        """Return [rows, length] of one value."""
        return torch.full((rows, self.settings.length), value)

    def _after_one_block(self, steps: Tensor, rng) -> Tensor:
        """Return bool [rows, length]: what follows one block of each row that was written."""
        block = torch.arange(steps.shape[1]) // self.block_size
        later = self._blank(len(steps), False)
        for row, written in enumerate(steps != NEVER):
            if written.any():
                later[row] = block > int(rng.choice(block[written]))
        return later

    def _objective(self, kind: str) -> tuple[Callable, dict]:
        options = {"mask_id": self.mask_id, "bar_mask_token": True}
        if kind == "block_causal":
            return bd3lm_loss, options | {"block_size": self.block_size}
        return mdlm_loss, options | {"shift": self.shift, "bos_id": self.bos_id}


def margin_loss(logits: Tensor, tokens: Tensor, margin: float) -> Tensor:
    """Return softplus(margin + logit of the token - largest logit of the others), float32 [N].

    logits: float32 [N, V]. tokens: int64 [N]. The loss is small where the token is not the argmax.
    -log(1 - p) would hardly move a token that wins a flat distribution with p = 0.1.
    """
    own = logits.gather(1, tokens[:, None])[:, 0]
    others = logits.scatter(1, tokens[:, None], -torch.inf).amax(1)
    return torch.nn.functional.softplus(margin + own - others)
