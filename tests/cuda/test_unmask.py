"""token_stats, commit_ and unmask_ on the GPU against the CPU operators: same Philox, equal tokens."""

import functools
import math

import pytest
import torch

import dllm_kernels as dk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = 5
hardware = pytest.mark.hardware


def random_logits(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def assert_agrees(gpu, logits: torch.Tensor, **options) -> int:
    """Statistics near the CPU's; returns how many tokens differ, all of them between near-equal scores."""
    expected = dk.token_stats(logits, **options)
    got = gpu(dk.token_stats, logits, **options)
    differ = got.token != expected.token
    tolerance = 1e-10 if options.get("precision") == "float64" else 1e-5
    for a, b in zip(got[1:5], expected[1:5], strict=True):
        torch.testing.assert_close(a[~differ], b[~differ], rtol=tolerance, atol=tolerance)
    return int(differ.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "vocabulary",
    [1, 3, 4, 31, 1000, 16_385]
    + [pytest.param(n, marks=hardware) for n in (16_383, 16_384, 50_257, 126_464, 262_144)],
)
def test_agrees_with_the_cpu(gpu, vocabulary, dtype):
    logits = random_logits(vocabulary, 2, vocabulary, dtype=dtype)
    assert assert_agrees(gpu, logits) == 0
    # Noise has the same bits on both; only a rounding of logit + noise could differ, and does not.
    assert assert_agrees(gpu, logits, temperature=0.8, seed=2**40 + 3) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": [0, 7, 16_390]},
        {"proposal_exclude": [3, 16_384], "temperature": 0.5},
        {"confidence_exclude": list(range(64))},
        {"confidence_temperature": 0.6},
        {"precision": "float64"},
        {"precision": "float64", "temperature": 1.0, "confidence_temperature": 2.0},
        {"noise_ids": torch.arange(12, dtype=torch.int32).reshape(4, 3), "temperature": 1.0, "seed": -1},
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_agree_with_the_cpu(gpu, options, dtype):
    assert assert_agrees(gpu, random_logits(1, 4, 16_401, dtype=dtype), **options) == 0


def test_odd_rows_agree_with_the_cpu(gpu):
    logits = random_logits(2, 8, 17_000)
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2, [5, 16_900]] = math.inf
    logits[3] = 1.0
    logits[4, ::2] = math.nan
    logits[5, 1:] = -math.inf
    for temperature in (0.0, 1.0):
        assert assert_agrees(gpu, logits, temperature=temperature, suppress_tokens=[0]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-3e4, 6e4, -1e5, 7e4, 1e20, -1e38, 3e38])
def test_logits_far_from_zero_agree_with_the_cpu(gpu, offset, dtype):
    offset = max(min(offset, float(torch.finfo(dtype).max)), float(torch.finfo(dtype).min))
    logits = (random_logits(5, 2, 300).double() * (1 + abs(offset) / 1e4) + offset).clamp(-3.4e38, 3.4e38)
    assert assert_agrees(gpu, logits.to(dtype)) == 0


@pytest.mark.parametrize("view", [lambda x: x[:, 2:6], lambda x: x.transpose(0, 1), lambda x: x[..., 5:30]])
def test_strided_logits(gpu, view):
    logits = view(random_logits(3, 3, 10, 501))
    assert torch.equal(gpu(dk.token_stats, logits).token, dk.token_stats(logits).token)


@pytest.mark.parametrize("rows, vocabulary", [(5, 17_000), pytest.param(70, 126_464, marks=hardware)])
def test_a_row_does_not_depend_on_its_companions(gpu, rows, vocabulary):
    logits = random_logits(4, rows, vocabulary, dtype=torch.bfloat16)
    together = gpu(dk.token_stats, logits)
    for row in (0, rows // 2, rows - 1):
        alone = gpu(dk.token_stats, logits[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone[:5], together[:5], strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_linear_token_stats_agrees_with_the_cpu(gpu, temperature):
    hidden, weight, bias = random_logits(0, 3, 7, 64) / 8, random_logits(1, 3000, 64), random_logits(2, 3000)
    expected = dk.linear_token_stats(hidden, weight, bias, temperature=temperature, seed=3)
    got = gpu(dk.linear_token_stats, hidden, weight, bias, temperature=temperature, seed=3)
    assert torch.equal(got.token, expected.token)
    torch.testing.assert_close(got.prob, expected.prob, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("candidates", [3065, 3072])
def test_candidates_that_fill_48_kilobytes(gpu, candidates):
    """Of shared memory, in which the kernel has variables besides."""
    stats = dk.token_stats(random_logits(6, candidates, 9))
    canvas = torch.full((1, candidates), 20)
    positions = torch.arange(candidates, dtype=torch.int32)[None]
    expected, options = canvas.clone(), dict(mask_id=20)
    dk.commit_(expected, positions, stats, dk.Rule.threshold(0.6), **options)
    gpu(dk.commit_, canvas, positions, stats, dk.Rule.threshold(0.6), **options)
    assert torch.equal(canvas, expected) and 0 < (canvas == 20).sum() < candidates


RULES = [
    dk.Rule.quota(),
    dk.Rule.quota(confidence="margin"),
    dk.Rule.quota(confidence="random"),
    dk.Rule.quota(alg_temp=0.5),
    dk.Rule.threshold(0.5),
    dk.Rule.threshold(0.5, strict=True),
    dk.Rule.threshold(-1.0, confidence="entropy"),
    dk.Rule.factor(1.0),
    dk.Rule.quota_or_threshold(0.75),
    dk.Rule.entropy_bound(2.25),
    dk.Rule.bernoulli(7),
    dk.Rule.confident_stable(0.5, 0.25, 2),
    dk.Rule.confident_stable(0.25, 0.75, 1, strict=False, confidence="margin"),
    dk.Rule.edit(0.5, 0.75),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("candidates", [1, 32, 300, pytest.param(1000, marks=hardware)])
@pytest.mark.parametrize("ids, reals", [(torch.int64, torch.float32), (torch.int32, torch.float64)])
def test_commit_agrees_with_the_cpu(gpu, rule, candidates, ids, reals):
    """Confidences in eighths: ties abound."""
    g = torch.Generator().manual_seed(candidates)
    batch, length = 3, candidates + 7
    canvas = torch.randint(0, 5, (batch, length), generator=g)
    canvas[torch.rand(batch, length, generator=g) < 0.7] = MASK
    positions = torch.stack([torch.randperm(length, generator=g)[:candidates] for _ in range(batch)]).int()
    positions[torch.rand(batch, candidates, generator=g) < 0.1] = -1
    token = torch.randint(0, 7, (batch, candidates), generator=g)
    eighths = torch.randint(0, 9, (5, batch, candidates), generator=g).to(reals) / 8
    eighths[4][eighths[4] == 1] = math.nan
    row = torch.arange(batch, dtype=torch.int32)
    state = torch.randint(0, 3, (batch, length), generator=g, dtype=torch.int32)
    canvas = canvas.to(ids)
    results = []
    for commit in (dk.commit_, functools.partial(gpu, dk.commit_)):
        changed = {"canvas": canvas.clone(), "progress": torch.zeros(batch, 2, dtype=torch.int32)}
        if rule.needs_state:
            changed["state"] = state.clone()
        accepted = commit(
            positions=positions,
            stats=dk.TokenStats(token, *eighths),
            rule=rule,
            mask_id=MASK,
            quota=row + 3 if rule.needs_quota else None,
            step=row * 2,
            sequence_ids=row + 9,
            seed=4,
            **changed,
        )
        results.append([accepted, *changed.values()])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("n, every", [(300, 370), pytest.param(4000, 37, marks=hardware)])
def test_bernoulli_draws_agree_with_the_cpu(gpu, n, every):
    """Steps of a schedule: the probabilities agree to the bit."""
    steps = 1000
    positions = torch.arange(n, dtype=torch.int32)[None]
    stats = dk.TokenStats(torch.zeros(1, n, dtype=torch.int64), *torch.zeros(4, 1, n))
    for step in range(0, steps, every):
        canvas, expected = torch.full((1, n), MASK), torch.full((1, n), MASK)
        rule = dk.Rule.bernoulli(steps)
        gpu(dk.commit_, canvas, positions, stats, rule, mask_id=MASK, step=step)
        dk.commit_(expected, positions, stats, rule, mask_id=MASK, step=step)
        assert torch.equal(canvas, expected)


def step(canvas, logits, start, **options):
    return dk.unmask_(
        canvas,
        logits,
        dk.Rule.threshold(0.3),
        mask_id=MASK,
        block_start=start,
        block_size=logits.shape[1],
        **options,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocabulary", [999, pytest.param(50_257, marks=hardware)])
def test_unmask_agrees_with_the_cpu(gpu, vocabulary, temperature):
    g = torch.Generator().manual_seed(6)
    logits = random_logits(7, 4, 32, vocabulary, dtype=torch.bfloat16)
    canvas = torch.randint(0, 5, (4, 100), generator=g)
    canvas[torch.rand(4, 100, generator=g) < 0.6] = MASK
    start = torch.tensor([0, 10, 68, 31], dtype=torch.int32)
    expected = canvas.clone()
    accepted = gpu(step, canvas, logits, start, temperature=temperature, seed=3)
    assert torch.equal(accepted, step(expected, logits, start, temperature=temperature, seed=3))
    assert torch.equal(canvas, expected)


def test_positions_outside_the_canvas_are_absent(gpu):
    canvas = torch.full((1, 4), MASK)
    stats = dk.TokenStats(torch.zeros(1, 3, dtype=torch.int64), *torch.ones(4, 1, 3))
    positions = torch.tensor([[-5, 2, 10**6]], dtype=torch.int32)
    accepted = gpu(dk.commit_, canvas, positions, stats, dk.Rule.quota(), mask_id=MASK, quota=3)
    assert accepted.tolist() == [[False, True, False]] and canvas.tolist() == [[MASK, MASK, 0, MASK]]
    logits = torch.zeros(1, 3, 10)
    for start in (-2, 3, 10**6):
        gpu(step, canvas, logits, torch.tensor([start], dtype=torch.int32))
    assert canvas.tolist() == [[0, MASK, 0, 0]]


# ---- on a GPU only ------------------------------------------------------------------------------------
def test_fifty_repeats_are_equal_in_bits():
    logits = random_logits(5, 32, 126_464, dtype=torch.bfloat16).cuda()
    first = dk.token_stats(logits, temperature=0.7)
    for _ in range(50):
        again = dk.token_stats(logits, temperature=0.7)
        assert all(torch.equal(a, b) for a, b in zip(first[:5], again[:5], strict=True))


@pytest.mark.graph
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_step_follows_its_inputs(temperature):
    """Capture once; on replay logits, canvas, start and step have changed in place."""
    canvas, logits = torch.full((2, 64), MASK).cuda(), torch.zeros(2, 16, 3000).cuda()
    start, count = torch.zeros(2, dtype=torch.int32).cuda(), torch.zeros(2, dtype=torch.int32).cuda()
    progress = torch.zeros(2, 2, dtype=torch.int32).cuda()
    options = {"temperature": temperature, "seed": 1, "step": count, "progress": progress}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(canvas.clone(), logits, start, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(canvas, logits, start, **options)
    for i in range(3):
        fresh = random_logits(i, 2, 16, 3000)
        logits.copy_(fresh)
        canvas.fill_(MASK)
        start.copy_(torch.tensor([i, 10 * i], dtype=torch.int32))
        count.fill_(i)
        graph.replay()
        expected, expected_progress = torch.full((2, 64), MASK), torch.zeros(2, 2, dtype=torch.int32)
        step(
            expected,
            fresh,
            start.cpu(),
            temperature=temperature,
            seed=1,
            step=count.cpu(),
            progress=expected_progress,
        )
        assert torch.equal(canvas.cpu(), expected) and torch.equal(progress.cpu(), expected_progress)


def test_runs_on_the_current_stream():
    """The side stream is kept busy; a kernel on another stream would read the logits too early."""
    logits, busy = torch.zeros(4, 30_000).cuda(), torch.randn(4096, 4096).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        logits[:, 777] = 1
        token = dk.token_stats(logits).token
    assert token.tolist() == [777] * 4


def test_opcheck():
    logits = torch.randn(2, 4, 100).cuda()
    torch.library.opcheck(torch.ops.dllm_kernels.token_stats, (logits,), {"temperature": 1.0})
    args = (torch.full((2, 6), MASK).cuda(), logits, torch.ones(2, dtype=torch.int32).cuda())
    torch.library.opcheck(torch.ops.dllm_kernels.unmask_, (*args, *dk.Rule.threshold(0.5).code, MASK))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="suppress_tokens may list at most 64 ids on CUDA, got 65"):
        dk.token_stats(torch.zeros(1, 100).cuda(), suppress_tokens=range(65))
    with pytest.raises(ValueError, match="positions must be on the device of canvas"):
        stats = dk.token_stats(torch.zeros(1, 3, 10).cuda())
        dk.commit_(
            torch.zeros(1, 3, dtype=torch.int64).cuda(),
            torch.arange(3, dtype=torch.int32)[None],
            stats,
            dk.Rule.threshold(0.5),
            mask_id=1,
        )
