"""Token statistics, commits and the course of rows against their references in plain Python."""

from __future__ import annotations

import torch

import dllm_kernels as dk
from dllm_kernels.ops import reference
from dllm_kernels.ops.advance import row_shapes
from dllm_kernels.ops.reference import unmask
from fuzzing.draw import FLOATS, Draw, Finding, close, equal

OPS = torch.ops.dllm_kernels
RULES = [
    dk.Rule.quota(), dk.Rule.quota(confidence="margin"), dk.Rule.quota(confidence="random"),
    dk.Rule.quota(confidence="entropy"), dk.Rule.quota(alg_temp=0.5), dk.Rule.threshold(0.5),
    dk.Rule.threshold(0.25, strict=True), dk.Rule.factor(1.0), dk.Rule.quota_or_threshold(0.75),
    dk.Rule.entropy_bound(1.25), dk.Rule.bernoulli(4), dk.Rule.confident_stable(0.5, 0.25, 2),
    dk.Rule.edit(0.5, 0.75),
]  # fmt: skip
NOT_BLOCKS = ("confident_stable", "edit")  # what unmask_ refuses


# ---- token_stats, token_divergence and linear_token_stats ----------------------------------------------
def _options(draw: Draw, rows: int, vocabulary: int) -> dict:
    ids = range(vocabulary)
    suppressed = draw.some(ids, most=min(3, vocabulary - 1))
    left = [token for token in ids if token not in suppressed]
    noise_ids = torch.randint(-5, 100, (rows, 3)).int() if draw.chance(0.5) else None
    return {
        "temperature": draw.choice([0.0, 0.0, 0.5, 1.5]), "seed": draw.integer(-(2**40), 2**40),
        "noise_ids": noise_ids, "suppress_tokens": suppressed,
        "proposal_exclude": draw.some(left, most=min(2, len(left) - 1)),
        "confidence_exclude": draw.some(ids, most=2),
        "confidence_temperature": draw.choice([1.0, 1.0, 0.5, 2.0]), "float64": draw.chance(0.3),
    }  # fmt: skip


def token_stats(draw: Draw) -> dict:
    rows, vocabulary = draw.integer(0, 6), draw.choice([1, 2, 5, 40, 1030, 3000])
    logits = draw.floats(rows, vocabulary, dtype=draw.choice(FLOATS), scale=draw.choice([1.0, 5.0]))
    if rows and draw.chance(0.2):
        logits[draw.integer(0, rows - 1), draw.integer(0, vocabulary - 1)] = draw.choice(
            [torch.nan, 3e4, -torch.inf]
        )
    filters = {}
    if draw.chance(0.4):
        filters["top_p"] = draw.number(0, 1)
    if draw.chance(0.4):
        filters["top_k"] = draw.integer(1, vocabulary + 2)
    return {"logits": logits, **_options(draw, rows, vocabulary), **filters}


def check_token_stats(draw: Draw, call: dict, result) -> None:
    options = {name: value for name, value in call.items() if name not in ("logits", "float64")}
    _check_stats(call["logits"], options, result)


def _check_stats(logits: torch.Tensor, options: dict, result) -> None:
    """Compare with the reference, but for equally good proposals and filters that cut at a rounding."""
    if options.get("top_p") is not None and not _settled(logits, options):
        return
    token, *reals = unmask.token_stats(logits, **options)
    noise = {name: options[name] for name in ("temperature", "seed", "noise_ids")}
    score = unmask.scores(logits, **noise)
    differ = (result[0] != token).flatten()
    mine, theirs = (score.gather(1, t.reshape(-1, 1))[differ] for t in (result[0], token))
    if bool(((mine - theirs).abs() > 2e-4).any()):
        raise Finding(f"token is {result[0]}, its reference {token}")
    names = ("prob", "margin", "entropy", "logsumexp")
    for name, found, expected in zip(names, result[1:], reals, strict=True):
        close(name, found.flatten()[~differ], expected.flatten()[~differ], 1e-4)


def _settled(logits: torch.Tensor, options: dict) -> bool:
    """Return whether slightly more and slightly less top_p keep the same ids."""
    x = logits.double().nan_to_num(nan=-torch.inf, posinf=3e38, neginf=-torch.inf)
    x = x / options["confidence_temperature"]
    x[:, options["suppress_tokens"]] = -torch.inf
    low, high = (unmask.kept(x, options["top_p"] + d, options.get("top_k")) for d in (-1e-4, 1e-4))
    return torch.equal(low, high)


def token_divergence(draw: Draw) -> dict:
    rows, vocabulary = draw.integer(0, 6), draw.choice([1, 2, 40, 1030])
    dtype = draw.choice(FLOATS)
    options = _options(draw, rows, vocabulary)
    names = ("suppress_tokens", "confidence_exclude", "confidence_temperature", "float64")
    logits, previous = (draw.floats(rows, vocabulary, dtype=dtype, scale=2.0) for _ in range(2))
    return {"logits": logits, "previous": previous, **{name: options[name] for name in names}}


def check_token_divergence(draw: Draw, call: dict, result) -> None:
    options = {name: value for name, value in call.items() if name != "float64"}
    close("divergence", result, unmask.token_divergence(**options), 1e-3)


def linear_token_stats(draw: Draw) -> dict:
    rows, vocabulary, size = draw.integer(0, 70), draw.choice([1, 5, 40, 1030]), draw.integer(1, 40)
    bias = draw.floats(vocabulary, dtype=draw.choice(FLOATS)) if draw.chance(0.5) else None
    hidden = draw.floats(rows, size, dtype=draw.choice(FLOATS))
    weight = draw.floats(vocabulary, size, dtype=draw.choice(FLOATS))
    return {"hidden": hidden, "weight": weight, "bias": bias, **_options(draw, rows, vocabulary)}


def check_linear_token_stats(draw: Draw, call: dict, result) -> None:
    options = {n: v for n, v in call.items() if n not in ("hidden", "weight", "bias", "float64")}
    logits = call["hidden"].double() @ call["weight"].double().T
    if call["bias"] is not None:
        logits = logits + call["bias"].double()
    _check_stats(logits, options, result)


# ---- skinny_linear --------------------------------------------------------------------------------------
def skinny_linear(draw: Draw) -> dict:
    rows, outputs, inputs = draw.integer(0, 70), draw.integer(0, 70), draw.integer(1, 140)
    bias = draw.floats(outputs, dtype=draw.choice(FLOATS)) if draw.chance(0.5) else None
    x = draw.floats(rows, inputs, dtype=draw.choice(FLOATS))
    weight, scales = draw.floats(outputs, inputs, dtype=draw.choice(FLOATS)), None
    if draw.chance(0.5):
        weight, scales = torch.randint(-128, 128, (outputs, inputs)).to(torch.int8), torch.rand(outputs, 1)
    return {"x": x, "weight": weight, "bias": bias, "scales": scales}


def check_skinny_linear(draw: Draw, call: dict, result) -> None:
    x, weight, scales = call["x"].double(), call["weight"].double(), call["scales"]
    if scales is not None:
        scale = call["x"].float().abs().amax(1, keepdim=True) / 127
        x = (call["x"].float() * torch.where(scale > 0, 1 / scale, 0)).round().double() * scale.double()
        weight = weight * scales.double()
    bias = 0.0 if call["bias"] is None else call["bias"].double()
    size = x.abs() @ weight.abs().T + 1
    close("out", result.double() / size, (x @ weight.T + bias) / size, 1e-2)


def packed_linear(draw: Draw) -> dict:
    call = skinny_linear(draw)
    packed = dk.pack_weight(call["weight"], call["scales"])
    return call | {"weight": packed.data, "scales": packed.scales, "outputs": packed.outputs}


def check_packed_linear(draw: Draw, call: dict, result) -> None:
    inputs = call["x"].shape[1]
    packed = dk.PackedWeight(call["weight"], call["scales"], call["outputs"], inputs)
    weight, scales = packed.unpacked()
    check_skinny_linear(draw, call | {"weight": weight, "scales": scales}, result)


# ---- commit_ and unmask_ -------------------------------------------------------------------------------
def _canvas(draw: Draw, batch: int, length: int, mask_id: int) -> torch.Tensor:
    canvas = torch.randint(0, mask_id, (batch, length)).masked_fill(torch.rand(batch, length) < 0.6, mask_id)
    return canvas.to(draw.choice([torch.int32, torch.int64]))


def _commit_options(draw: Draw, rule: dk.Rule, batch: int) -> dict:
    names = ("rule", "parameters", "strict", "confidence", "alg_temp")
    options = dict(zip(names, rule.code, strict=True)) | {"seed": draw.integer(0, 2**40)}
    if rule.needs_quota:
        options["quota"] = torch.randint(0, 6, (batch,)).int()
    if rule.name == "bernoulli" or draw.chance(0.5):
        options["step"] = torch.randint(0, 5, (batch,)).int()
    if draw.chance(0.5):
        options["sequence_ids"] = torch.randint(0, 9, (batch,)).int()
    if draw.chance(0.5):
        options["progress"] = torch.full((batch, 2), 77, dtype=torch.int32)
    return options


def commit_(draw: Draw) -> dict:
    batch, length, mask_id = draw.integer(0, 4), draw.integer(1, 20), draw.integer(1, 9)
    candidates, rule = draw.integer(0, length), draw.choice(RULES)
    shape = (batch, candidates)
    order = torch.rand(batch, length).argsort(-1)[:, :candidates]
    dtype = draw.choice([torch.float32, torch.float64])
    # Sixteenths: many equal confidences, and sums that round nowhere.
    prob, margin, entropy, divergence = (torch.randint(0, 17, (4, *shape)) / 16).to(dtype)
    call = {
        "canvas": _canvas(draw, batch, length, mask_id),
        "positions": order.masked_fill(torch.rand(shape) < 0.1, -1).int(),
        "token": torch.randint(0, mask_id + 1, shape), "prob": prob, "margin": margin, "entropy": entropy,
        "mask_id": mask_id, **_commit_options(draw, rule, batch),
    }  # fmt: skip
    if rule.needs_state:
        call |= {"divergence": divergence, "state": torch.randint(0, 3, (batch, length)).int()}
    return call


def check_commit_(draw: Draw, call: dict, result, before: dict) -> None:
    rule = RULES[[r.code for r in RULES].index(tuple(call[n] for n in _CODE))]
    per_row = [name for name in ("quota", "step", "sequence_ids", "state") if name in before]
    lists = {name: before[name].tolist() for name in per_row}
    if rule.alg_temp > 0:
        return  # keys of drawn positions lie as near to each other as floats do
    canvas, accepted, progress = unmask.commit(
        before["canvas"].tolist(), before["positions"].tolist(),
        tuple(before[name] for name in ("token", "prob", "margin", "entropy")), rule,
        mask_id=call["mask_id"], seed=call["seed"], divergence=before.get("divergence"), **lists,
    )  # fmt: skip
    equal("canvas", call["canvas"].tolist(), canvas)
    equal("accepted", result.tolist(), accepted)
    if "progress" in call:
        equal("progress", call["progress"].tolist(), progress)
    if "state" in call:
        equal("state", call["state"].tolist(), lists["state"])


_CODE = ("rule", "parameters", "strict", "confidence", "alg_temp")


def unmask_(draw: Draw) -> dict:
    batch, length, mask_id = draw.integer(0, 3), draw.integer(1, 16), draw.integer(1, 9)
    block, vocabulary = draw.integer(0, length), mask_id + draw.integer(2, 40)
    rule = draw.choice([rule for rule in RULES if rule.name not in NOT_BLOCKS])
    options = _options(draw, batch * block, vocabulary)
    del options["noise_ids"], options["seed"]
    options["suppress_tokens"] = [t for t in options["suppress_tokens"] if t != 0]
    options["proposal_exclude"] = [t for t in options["proposal_exclude"] if t != 0]
    return {
        "canvas": _canvas(draw, batch, length, mask_id),
        "logits": draw.floats(batch, block, vocabulary, dtype=draw.choice(FLOATS), scale=3.0),
        "block_start": torch.randint(0, length - block + 1, (batch,)).int(), "mask_id": mask_id,
        **_commit_options(draw, rule, batch), **options,
    }  # fmt: skip


def check_unmask_(draw: Draw, call: dict, result, before: dict) -> None:
    """Compare with token_stats and commit_."""
    batch, block, _ = before["logits"].shape
    positions = before["block_start"][:, None] + torch.arange(block, dtype=torch.int32)
    zeros = torch.zeros(batch, dtype=torch.int32)
    sequence = before.get("sequence_ids", torch.arange(batch, dtype=torch.int32))
    ids = torch.broadcast_tensors(sequence[:, None], positions, before.get("step", zeros)[:, None])
    names = ("temperature", "seed", "proposal_exclude", "confidence_exclude", "confidence_temperature")
    options = {name: before[name] for name in (*names, "float64")}
    barred = before["suppress_tokens"]
    if before["mask_id"] not in before["proposal_exclude"]:
        barred = [*barred, before["mask_id"]]
    stats = OPS.token_stats(
        before["logits"], noise_ids=torch.stack(ids, -1), suppress_tokens=barred, **options
    )
    names = (*_CODE, "mask_id", "seed", "quota", "step", "sequence_ids", "progress")
    shared = {name: before[name] for name in names if name in before}
    accepted = OPS.commit_(before["canvas"], positions.contiguous(), *stats[:4], **shared)
    equal("accepted", result, accepted)
    equal("canvas", call["canvas"], before["canvas"])
    if "progress" in call:
        equal("progress", call["progress"], before["progress"])


# ---- advance_ ------------------------------------------------------------------------------------------
def advance_(draw: Draw) -> dict:
    """Rows somewhere on their way: admitted, then moved a few steps with commits between them."""
    size, batch, blocks = draw.integer(1, 5), draw.integer(0, 3), draw.integer(1, 5)
    length, mask_id, end = blocks * size, 9, 8
    canvas = torch.where(torch.rand(batch, length) < 0.5, mask_id, 1)
    canvas = canvas.to(draw.choice([torch.int32, torch.int64]))
    rows = dk.BlockRows.empty(batch, size, draw.integer(size, 3 * size), "cpu")
    for row in range(batch):
        given = draw.integer(0, length)
        canvas[row, :given] = 1
        stop, steps = draw.integer(given, length), draw.integer(0, 4)
        rows.admit_(row, given=given, stop=stop, canvas_end=length, steps=steps)
    options = {"mask_id": mask_id, "quota_total": draw.choice([0, size])}
    options["stop_ids"] = draw.choice([[], [end, 7]])
    options |= {"rows": rows.buffer, "block_size": rows.block_size, "queries": rows.queries}
    for _ in range(draw.integer(0, 4)):
        OPS.advance_(canvas, **options)
        for row in range(batch):
            listed = rows.candidates[row][rows.candidates[row] >= 0].long()
            masked = listed[canvas[row, listed] == mask_id]
            canvas[row, masked[: max(1, int(rows.quota[row]))]] = draw.choice([1, 1, 1, end])
    return {"canvas": canvas, **options}


def check_advance_(draw: Draw, call: dict, result, before: dict) -> None:
    rows, expected = (
        dk.BlockRows(arguments["rows"], arguments["block_size"], arguments["queries"])
        for arguments in (call, before)
    )
    options = {"mask_id": before["mask_id"], "stop_ids": before["stop_ids"]}
    reference.advance_(before["canvas"], expected, quota_total=before["quota_total"] or None, **options)
    for name in row_shapes(rows.block_size, rows.queries):
        equal(name, getattr(rows, name), getattr(expected, name))


CALLS = {
    "token_stats": (token_stats, check_token_stats),
    "token_divergence": (token_divergence, check_token_divergence),
    "linear_token_stats": (linear_token_stats, check_linear_token_stats),
    "skinny_linear": (skinny_linear, check_skinny_linear),
    "packed_linear": (packed_linear, check_packed_linear),
    "commit_": (commit_, check_commit_),
    "unmask_": (unmask_, check_unmask_),
    "advance_": (advance_, check_advance_),
}
