"""Unmasking in plain PyTorch, NumPy and Python: softmax in float64, sorted lists, its own Philox."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Compute Philox4x32-10 [Salmon et al. 2011] of counters [..., 4]; return uint32 words [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def _words(seed: int, first_word, position: int, step: int, sequence: int) -> np.ndarray:
    first_word = np.asarray(first_word, dtype=np.int64)
    rest = np.array([position, step, sequence], dtype=np.int64)
    counter = np.concatenate([first_word[:, None], np.broadcast_to(rest, (len(first_word), 3))], -1)
    return philox4x32_10(counter.astype(np.uint32), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def uniform(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.float64) + 0.5) / 2**32


def gumbel(words: np.ndarray) -> np.ndarray:
    """Return −ln(−ln(1 − w)) in float64."""
    return -np.log(-np.log1p(-uniform(words)))


def token_noise(vocabulary: int, seed: int, sequence: int, position: int, step: int) -> np.ndarray:
    """Return one row's Gumbel noise, float64: word v mod 4 of counter (v div 4, position, step, sequence)."""
    words = _words(seed, np.arange((vocabulary + 3) // 4), position, step, sequence)
    return gumbel(words.reshape(-1)[:vocabulary])


def scores(
    logits: Tensor, temperature: float = 0.0, seed: int = 0, noise_ids: Tensor | None = None
) -> Tensor:
    """Return the scores whose argmax is the proposal, float64 [N, V], before anything is barred."""
    x = _tame(logits.reshape(-1, logits.shape[-1]).double())
    if temperature > 0:
        for row in range(len(x)):
            sequence, position, step = (
                (0, row, 0) if noise_ids is None else noise_ids.reshape(-1, 3)[row].tolist()
            )
            x[row] += temperature * torch.from_numpy(token_noise(x.shape[1], seed, sequence, position, step))
    return x


def kept(x: Tensor, top_p: float | None = None, top_k: int | None = None) -> Tensor:
    """Return the ids of x [N, V] that top-p, then top-k keep, bool, as in Dream."""
    result = x > -math.inf
    if top_p is not None and top_p < 1:
        ordered = x.sort(dim=-1, descending=True, stable=True)
        above = ordered.values.softmax(-1).cumsum(-1) > top_p
        removed = above.roll(1, -1)  # the first above top_p stays
        removed[:, 0] = False
        result &= ~torch.zeros_like(result).scatter(-1, ordered.indices, removed)
    if top_k is not None:
        left = x.masked_fill(~result, -math.inf)
        result &= x >= left.topk(min(top_k, x.shape[1])).values[:, -1:]
    return result


def token_stats(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    noise_ids: Tensor | None = None,
    suppress_tokens=(),
    proposal_exclude=(),
    confidence_exclude=(),
    top_p: float | None = None,
    top_k: int | None = None,
    confidence_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return token, prob, margin, entropy, logsumexp of each row; see `dllm_kernels.token_stats`."""
    leading, vocabulary = logits.shape[:-1], logits.shape[-1]
    clean = _tame(logits.reshape(-1, vocabulary).double())
    barred = [*suppress_tokens, *proposal_exclude]
    x = clean / confidence_temperature
    x[:, list(suppress_tokens)] = -math.inf
    dropped = ~kept(x, top_p, top_k)
    x[dropped] = -math.inf
    x[:, list(confidence_exclude)] = -math.inf
    proposal = scores(logits, temperature, seed, noise_ids).masked_fill(dropped, -math.inf)
    for values in (proposal, clean):
        values[:, barred] = -math.inf
    allowed = [v for v in range(vocabulary) if v not in set(barred)]
    rows = []
    for score, row, unfiltered in zip(proposal, x, clean, strict=True):
        found = bool((score > -math.inf).any())
        choice = score if found else unfiltered
        token = int(choice.argmax()) if bool((choice > -math.inf).any()) else allowed[0]
        if not (row > -math.inf).any():
            rows.append((token, 0.0, 0.0, math.log(vocabulary), -math.inf))
            continue
        p = row.softmax(-1)
        counted = found and row[token] > -math.inf
        top = p.topk(min(2, vocabulary)).values
        rows.append(
            (
                token,
                float(p[token]) if counted else 0.0,
                float(top[0] - (top[1] if vocabulary > 1 else 0.0)) if counted else 0.0,
                float(torch.special.entr(p).sum()),
                float(row.logsumexp(-1)),
            )
        )
    columns = list(zip(*rows, strict=True)) or [()] * 5
    dtypes = [torch.int64, *[torch.float64] * 4]
    return tuple(torch.tensor(c, dtype=d).reshape(leading) for c, d in zip(columns, dtypes, strict=True))


def token_divergence(
    logits: Tensor,
    previous: Tensor,
    *,
    suppress_tokens=(),
    confidence_exclude=(),
    confidence_temperature: float = 1.0,
) -> Tensor:
    """Return Σ p·(ln p − ln q), float64, p and q the softmax of the rows of logits and previous."""
    log_p, log_q = (_tame(x.double()) / confidence_temperature for x in (logits, previous))
    for x in (log_p, log_q):
        x[..., [*suppress_tokens, *confidence_exclude]] = -math.inf
    empty = (log_p.amax(-1) == -math.inf) | (log_q.amax(-1) == -math.inf)
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    terms = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0)
    return terms.sum(-1).masked_fill(empty, math.inf)


def linear_token_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **options):
    """Return `token_stats` of the logits, computed in float64."""
    logits = hidden.double() @ weight.double().T
    return token_stats(logits if bias is None else logits + bias.double(), **options)


def commit(
    canvas: list[list[int]],
    positions: list[list[int]],
    stats: tuple[Tensor, ...],
    rule,
    *,
    mask_id: int,
    quota: list[int] | None = None,
    step: list[int] | None = None,
    sequence_ids: list[int] | None = None,
    seed: int = 0,
    divergence: Tensor | None = None,
    state: list[list[int]] | None = None,
) -> tuple[list[list[int]], list[list[bool]], list[list[int]]]:
    """Return canvas, accepted and progress of `dllm_kernels.commit_`, by sorting rows; `state` in place."""
    canvas = [list(row) for row in canvas]
    accepted, progress = [], []
    shape = (len(positions), len(positions[0]) if positions else 0)
    token, prob, margin, entropy = (field.reshape(shape).tolist() for field in stats[:4])
    for b, row in enumerate(positions):
        held = {c: canvas[b][position] for c, position in enumerate(row) if position >= 0}
        masked = [c for c, token_id in held.items() if token_id == mask_id]
        if rule.name == "confident_stable":
            count_stable_steps(state[b], [row[c] for c in masked], divergence.reshape(shape)[b, masked], rule)
        candidates = []
        for c in (c for c in masked if token[b][c] != mask_id):
            draw = (row[c], step[b] if step else 0, sequence_ids[b] if sequence_ids else b)
            kinds = {"prob": prob[b][c], "margin": margin[b][c], "entropy": -entropy[b][c]}
            if rule.confidence == "random":
                kinds["random"] = float(np.float32(uniform(_words(seed, [0xFFFFFFFF], *draw)[0, 0])))
            confidence = -math.inf if math.isnan(kinds[rule.confidence]) else kinds[rule.confidence]
            key = confidence
            if rule.alg_temp > 0:
                key = confidence / rule.alg_temp + gumbel(_words(seed, [0xFFFFFFFE], *draw)[0, 0])
            drawn = uniform(_words(seed, [0xFFFFFFFD], *draw)[0, 0])
            stable = state[b][row[c]] if state else 0
            candidates.append(_Candidate(-key, row[c], c, confidence, entropy[b][c], stable, drawn))
        candidates.sort()
        unmasked = _accepted(rule, candidates, quota and quota[b], step and step[b])
        edited = set()
        if rule.name == "edit":
            proposed = {c for c in held if token[b][c] not in (held[c], mask_id)}
            edited = {c for c in proposed - {*masked} if _above(rule, prob[b][c], rule.parameters[1])}
        for c in unmasked | edited:
            canvas[b][row[c]] = token[b][c]
        accepted.append([c in unmasked | edited for c in range(len(row))])
        progress.append([len(masked) - len(unmasked), len(unmasked) + len(edited)])
    return canvas, accepted, progress


class _Candidate(NamedTuple):
    """A candidate, ordered by acceptance. c: index in the list of positions; drawn: uniform in (0, 1)."""

    key: float
    position: int
    c: int
    confidence: float
    entropy: float
    stable: int
    drawn: float


def count_stable_steps(state: list[int], positions: list[int], divergence: Tensor, rule) -> None:
    """Increment or reset the counters in place; a divergence not below the bound, NaN included, resets."""
    bound = rule.parameters[1]
    for position, stable in zip(positions, (divergence < bound).tolist(), strict=True):
        state[position] = state[position] + 1 if stable else 0


def _above(rule, value: float, bound: float) -> bool:
    return value > bound or (value == bound and not rule.strict)


def _accepted(rule, candidates: list[_Candidate], quota: int | None, step: int | None) -> set[int]:
    """Return the sorted candidates that a rule accepts."""
    c = [candidate.c for candidate in candidates]
    if rule.name == "quota":
        return {*c[:quota]}
    if rule.name == "bernoulli":
        steps, eps = rule.parameters
        t, s = (1 + (eps - 1) * j / steps for j in (step, step + 1))
        return {x.c for x in candidates if step >= steps - 1 or x.drawn < 1 - s / t}
    bound = rule.parameters[0]
    above = {x.c for x in candidates if _above(rule, x.confidence, bound)}
    if rule.name in ("threshold", "edit"):
        return above or {*c[:1]}
    if rule.name == "quota_or_threshold":
        return above if len(above) >= quota else {*c[:quota]}
    if rule.name == "confident_stable":
        return {x.c for x in candidates if x.c in above and x.stable >= rule.parameters[2]} or {*c[:1]}
    if rule.name == "factor":
        kept = lambda r: r == 1 or _above(rule, candidates[r - 1].confidence, 1 - bound / (r + 1))  # noqa: E731
        ranks = range(1, len(candidates) + 1)
        return {c[r - 1] for r in itertools.takewhile(kept, ranks)}
    if rule.name == "entropy_bound":
        before = itertools.accumulate((x.entropy for x in candidates), initial=0.0)
        kept = itertools.takewhile(lambda pair: pair[0] <= bound, zip(before, c, strict=False))
        return {place for _, place in kept} | {*c[:1]}
    raise ValueError(rule.name)


def _tame(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=-math.inf, posinf=torch.finfo(torch.float32).max, neginf=-math.inf)
