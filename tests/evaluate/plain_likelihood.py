"""Likelihoods written out: plain transformers in float64, dense masks, single rows, all masks enumerated."""

import copy
import itertools

import torch

BLOCK, MASK = 4, 47


class PlainModel:
    """A float64 copy of `model` on transformers' own "eager" attention."""

    def __init__(self, model, *, block_causal=False, shift=False, window=None):
        self.model = copy.deepcopy(model).double().eval()
        self.model.set_attn_implementation("eager")
        self.block_causal, self.shift, self.window = block_causal, shift, window

    def log_p(self, ids):
        """log p over the vocabulary of every position of a row, [S, V], from the output that predicts it."""
        size = len(ids)
        place = torch.arange(size)
        seen = torch.ones(size, size, dtype=torch.bool)
        if self.block_causal:
            seen = place[None] // BLOCK <= place[:, None] // BLOCK
        if self.window is not None:
            seen &= (place[None] - place[:, None]).abs() < self.window
        mask = torch.zeros(1, 1, size, size, dtype=torch.float64)
        mask.masked_fill_(~seen, torch.finfo(torch.float64).min)
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0]
        source = (place - 1).clamp(min=0) if self.shift else place
        return torch.log_softmax(logits, dim=-1)[source]

    def segments(self, context, target):
        """[(tokens before and in the segment, places of its targets)] of what is denoised together."""
        ids, given = [*context, *target], len(context)
        places = range(given, len(ids))
        if not self.block_causal:
            return [(ids, list(places))]
        blocks = [list(block) for _, block in itertools.groupby(places, lambda place: place // BLOCK)]
        return [(ids[: block[-1] + 1], block) for block in blocks]

    def masked_log_p(self, ids, masked):
        """[log p of each masked token] when those at the places `masked` are masked."""
        noised = [MASK if place in masked else token for place, token in enumerate(ids)]
        log_p = self.log_p(noised)
        return [float(log_p[place, ids[place]]) for place in sorted(masked)]

    def bound(self, context, target):
        """The exact bound: over segments, the mean over k in 1..L of the mean over all masks of k targets of
        L / k times the sum of log p."""
        total = 0.0
        for ids, places in self.segments(context, target):
            length = len(places)
            for count in range(1, length + 1):
                masks = list(itertools.combinations(places, count))
                scores = [sum(self.masked_log_p(ids, set(mask))) for mask in masks]
                total += sum(scores) / len(masks) * (length / count) / length
        return total

    def chain(self, context, target, *, backwards=False):
        """The chain rule within every segment."""
        total = 0.0
        for ids, places in self.segments(context, target):
            for index, place in enumerate(places):
                masked = places[: index + 1] if backwards else places[index:]
                scores = dict(zip(masked, self.masked_log_p(ids, set(masked)), strict=True))
                total += scores[place]
        return total

    def revealed(self, context, target):
        """(log p in the order of the sampler, whether it would have written the target)."""
        total, greedy = 0.0, True
        for ids, places in self.segments(context, target):
            masked = list(places)
            while masked:
                log_p = self.log_p([MASK if place in masked else token for place, token in enumerate(ids)])
                allowed = torch.log_softmax(log_p.index_fill(1, torch.tensor([MASK]), -torch.inf), dim=-1)
                best = max(masked, key=lambda place: float(allowed[place].max()))
                total += float(log_p[best, ids[best]])
                greedy &= int(allowed[best].argmax()) == ids[best]
                masked.remove(best)
        return total, greedy
