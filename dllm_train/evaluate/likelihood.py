"""Estimate log p(target | context) of diffusion language models, for many requests at once.

| estimator | what it returns |
|---|---|
| monte_carlo | a lower bound from `samples` random masks of the targets, with its standard error [LLaDA] |
| block | the bounds of all target blocks given the clean blocks before them, for block-causal models |
| ar_ftb, ar_btf | the chain rule, front to back or back to front; exact [Dream] |
| confidence | the chain rule in the order in which the sampler would reveal the targets [iLLaDA] |

"auto" is "block" for block-causal models and "monte_carlo" for others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dllm_kernels._arguments import integer, kind
from dllm_train.evaluate.estimation import Estimation
from dllm_train.evaluate.segments import Request


@dataclass(frozen=True)
class Estimate:
    """An estimate of log p(target | context).

    log_likelihood: nats; in expectation a lower bound with "monte_carlo" and "block".
    standard_error: of the estimate over its samples; 0.0 where there is nothing random, NaN for one sample.
    is_greedy: whether greedy decoding generates the target; None unless `check_greedy`.
    """

    log_likelihood: float
    standard_error: float
    is_greedy: bool | None = None


def log_likelihoods(
    model: nn.Module,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    estimator: str = "auto",
    samples: int = 128,
    seed: int = 0,
    batch_tokens: int | None = None,
    check_greedy: bool = False,
    request_ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    parity: str | None = None,
) -> list[Estimate]:
    """Return an estimate for each request (context ids, target ids), in the order of the requests.

    model: a transformers model marked for diffusion, or a wrapper that only forwards calls (DDP, adapters).
    samples: masks of each request, with "block" of each block. seed, request_ids: the noise depends on the
    seed, a request's id (0 .. 2**32 - 1; default: its index) and nothing else, so no batch, order or rank
    changes a mask.
    batch_tokens: tokens of one forward; default: 2048 on a CPU, 32768 elsewhere. It changes an answer only by
    rounding: of matrix products, and in block-causal models of attention too.
    check_greedy: also compare the target with what the sampler fills in for as many mask tokens, one token at
    a time, the most confident first; in block-causal models block by block. Costs up to a forward per target.
    progress: called as progress(done, total) after every few forwards, in tokens.
    parity: "llada" rounds the numbers of masks as LLaDA's evaluation does, for "monte_carlo".
    Raises TypeError and ValueError for values out of range, and ValueError for requests without a target or
    longer than the model's positions, for models without a mask token, and for estimators that do not fit.
    """
    estimation = Estimation.of(model, estimator, samples, seed, batch_tokens, parity)
    ids = _noise_ids(request_ids, len(requests))
    checked = []
    for index, (request, noise_id) in enumerate(zip(requests, ids, strict=True)):
        name = f"requests[{index}]"
        checked.append(_request(name, *_pair(name, request), noise_id))
        estimation.check(checked[-1])
        estimation.check_length(checked[-1])
    results = estimation.run(checked, check_greedy, progress)
    return [
        Estimate(value, math.sqrt(variance), not failed if check_greedy else None)
        for value, variance, failed in results.tolist()
    ]


def rolling_log_likelihood(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    context: Sequence[int] = (),
    window: int | None = None,
    estimator: str = "auto",
    samples: int = 128,
    seed: int = 0,
    batch_tokens: int | None = None,
    request_ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    parity: str | None = None,
) -> list[Estimate]:
    """Return an estimate of log p(document | context) for each document, a sequence of token ids.

    A document is scored in disjoint windows of `window` positions, by default as many as the model has. The
    first window begins with `context`, such as the token that begins texts. Each other one begins with the
    last token of the window before. A document that fits is scored as a whole.
    Other arguments and errors as in `log_likelihoods`.
    """
    estimation = Estimation.of(model, estimator, samples, seed, batch_tokens, parity)
    positions = estimation.diffusion.max_positions
    size = positions if window is None else integer("window", window, 2)
    if positions is not None and size > positions:
        raise ValueError(f"window is {size}; the model has {positions} positions")
    if size is not None and len(context) >= size:
        raise ValueError(f"context has {len(context)} tokens, so windows of {size} have no room for a target")
    windows, counts = [], []
    for index, noise_id in enumerate(_noise_ids(request_ids, len(documents))):
        document = _request(f"documents[{index}]", context, documents[index], noise_id)
        estimation.check(document)
        cut = _windows(document, size)
        windows += cut
        counts.append(len(cut))
    results = estimation.run(windows, False, progress)
    sums = np.zeros((len(documents), 2))
    np.add.at(sums, np.repeat(np.arange(len(documents)), counts), results[:, :2])
    return [Estimate(value, math.sqrt(variance)) for value, variance in sums.tolist()]


def _windows(document: Request, size: int | None) -> list[Request]:
    """Cut a document into requests of at most `size` positions; the later ones have one token of context."""
    length, given = len(document.ids), document.given
    end = length if size is None else min(size, length)
    windows = [Request(document.name, document.ids[:end], given, document.noise_id)]
    while end < length:
        start, end = end - 1, min(end - 1 + size, length)
        ids, place = document.ids[start:end], start + 1 - given
        windows.append(Request(document.name, ids, 1, document.noise_id, place))
    return windows


# ---- what requests may be --------------------------------------------------------------------------------
def _pair(name: str, request) -> tuple[Sequence[int], Sequence[int]]:
    if isinstance(request, str | bytes | Tensor) or not isinstance(request, Sequence) or len(request) != 2:
        raise TypeError(f"{name} is a {kind(request)}; expected a pair (context ids, target ids)")
    return request[0], request[1]


def _request(name: str, context, target, noise_id: int) -> Request:
    context, target = _ids(f"the context of {name}", context), _ids(f"the target of {name}", target)
    if not len(target):
        raise ValueError(f"{name} has an empty target; expected at least one token to score")
    return Request(name, np.concatenate([context, target]), len(context), noise_id)


def _ids(name: str, values) -> np.ndarray:
    """Return token ids as int64 [n]."""
    ids = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(f"{name} is a {kind(values)}; expected a sequence of integers")
    return ids.astype(np.int64)


def _noise_ids(request_ids: Sequence[int] | None, count: int) -> Sequence[int]:
    if request_ids is None:
        return range(count)
    if len(request_ids) != count:
        raise ValueError(f"request_ids has {len(request_ids)} entries for {count} requests")
    return [integer(f"request_ids[{index}]", value, 0, 2**32 - 1) for index, value in enumerate(request_ids)]
