"""token_stats, commit_ and unmask_ on the GPU against the CPU operators: same Philox, equal tokens."""

import math

import pytest
import torch

import dllm_kernels as dk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASK = 5


def random_logits(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def assert_agrees(logits: torch.Tensor, **options) -> int:
    """Statistics near the CPU's; returns how many tokens differ, all of them between near-equal scores."""
    cpu = dk.token_stats(logits, **options)
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    gpu = dk.TokenStats(*(field.cpu() for field in dk.token_stats(logits.cuda(), **on_gpu)[:5]))
    differ = gpu.token != cpu.token
    tolerance = 1e-10 if options.get("precision") == "float64" else 1e-5
    for a, b in zip(gpu[1:5], cpu[1:5], strict=True):
        torch.testing.assert_close(a[~differ], b[~differ], rtol=tolerance, atol=tolerance)
    return int(differ.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 3, 4, 31, 1000, 16_383, 16_384, 16_385, 50_257, 126_464, 262_144])
def test_agrees_with_the_cpu(vocabulary, dtype):
    logits = random_logits(vocabulary, 5, vocabulary, dtype=dtype)
    assert assert_agrees(logits) == 0
    # Noise has the same bits on both; only a rounding of logit + noise could differ, and does not.
    assert assert_agrees(logits, temperature=0.8, seed=2**40 + 3) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": [0, 7, 40_000]},
        {"proposal_exclude": [3, 65_536], "temperature": 0.5},
        {"confidence_exclude": list(range(64))},
        {"confidence_temperature": 0.6},
        {"precision": "float64"},
        {"precision": "float64", "temperature": 1.0, "confidence_temperature": 2.0},
        {"noise_ids": torch.arange(12, dtype=torch.int32).reshape(4, 3), "temperature": 1.0, "seed": -1},
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_agree_with_the_cpu(options, dtype):
    assert assert_agrees(random_logits(1, 4, 70_001, dtype=dtype), **options) == 0


def test_odd_rows_agree_with_the_cpu():
    logits = random_logits(2, 8, 20_000)
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2, [5, 19_000]] = math.inf
    logits[3] = 1.0
    logits[4, ::2] = math.nan
    logits[5, 1:] = -math.inf
    for temperature in (0.0, 1.0):
        assert assert_agrees(logits, temperature=temperature, suppress_tokens=[0]) == 0


@pytest.mark.parametrize("view", [lambda x: x[:, 2:6], lambda x: x.transpose(0, 1), lambda x: x[..., 5:30]])
def test_strided_logits(view):
    logits = random_logits(3, 3, 10, 501)
    expected = dk.token_stats(view(logits))
    got = dk.token_stats(view(logits.cuda()))
    assert torch.equal(got.token.cpu(), expected.token)


def test_a_row_does_not_depend_on_its_companions():
    logits = random_logits(4, 70, 126_464, dtype=torch.bfloat16).cuda()
    together = dk.token_stats(logits)
    for row in (0, 33, 69):
        alone = dk.token_stats(logits[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone[:5], together[:5], strict=True))


def test_repeats_are_equal_in_bits():
    logits = random_logits(5, 32, 126_464, dtype=torch.bfloat16).cuda()
    first = dk.token_stats(logits, temperature=0.7)
    for _ in range(50):
        again = dk.token_stats(logits, temperature=0.7)
        assert all(torch.equal(a, b) for a, b in zip(first[:5], again[:5], strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_linear_token_stats_agrees_with_the_cpu(temperature):
    hidden, weight, bias = random_logits(0, 3, 7, 64) / 8, random_logits(1, 3000, 64), random_logits(2, 3000)
    cpu = dk.linear_token_stats(hidden, weight, bias, temperature=temperature, seed=3)
    gpu = dk.linear_token_stats(hidden.cuda(), weight.cuda(), bias.cuda(), temperature=temperature, seed=3)
    assert torch.equal(gpu.token.cpu(), cpu.token)
    torch.testing.assert_close(gpu.prob.cpu(), cpu.prob, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, value", [("top_p", 0.9), ("top_k", 5), ("previous", torch.zeros(2, 5))])
def test_what_only_the_cpu_does_is_refused(name, value):
    value = value.cuda() if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=f"token_stats: {name} is not available on CUDA yet; leave it None"):
        dk.token_stats(torch.zeros(2, 5).cuda(), **{name: value})


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
@pytest.mark.parametrize("candidates", [1, 32, 300, 1000])
@pytest.mark.parametrize("ids, reals", [(torch.int64, torch.float32), (torch.int32, torch.float64)])
def test_commit_agrees_with_the_cpu(rule, candidates, ids, reals):
    """Confidences in eighths: ties abound."""
    g = torch.Generator().manual_seed(candidates)
    batch, length = 6, candidates + 7
    canvas = torch.randint(0, 5, (batch, length), generator=g)
    canvas[torch.rand(batch, length, generator=g) < 0.7] = MASK
    positions = torch.stack([torch.randperm(length, generator=g)[:candidates] for _ in range(batch)]).int()
    positions[torch.rand(batch, candidates, generator=g) < 0.1] = -1
    token = torch.randint(0, 7, (batch, candidates), generator=g)
    eighths = torch.randint(0, 9, (5, batch, candidates), generator=g).to(reals) / 8
    eighths[4][eighths[4] == 1] = math.nan
    counters = torch.randint(0, 3, (batch, length), generator=g, dtype=torch.int32)
    arguments = [canvas.to(ids), positions, dk.TokenStats(token, *eighths), rule]
    row = torch.arange(batch, dtype=torch.int32)
    options = {
        "quota": row + 3 if rule.needs_quota else None,
        "step": row * 2,
        "sequence_ids": row + 9,
        "seed": 4,
    }

    def run(device):
        moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
        moved[0] = moved[0].clone()
        moved[2] = dk.TokenStats(*(field.to(device) for field in moved[2]))
        state = counters.clone().to(device) if rule.needs_state else None
        progress = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        keyed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        accepted = dk.commit_(*moved, mask_id=MASK, progress=progress, state=state, **keyed)
        return moved[0].cpu(), accepted.cpu(), progress.cpu(), counters if state is None else state.cpu()

    for got, expected in zip(run("cuda"), run("cpu"), strict=True):
        assert torch.equal(got, expected)


def test_bernoulli_draws_agree_with_the_cpu():
    """Steps of a schedule, 4,000 draws each: the probabilities agree to the bit."""
    steps, n = 1000, 4000
    positions, stats = (
        torch.arange(n, dtype=torch.int32)[None],
        dk.TokenStats(torch.zeros(1, n, dtype=torch.int64), *torch.zeros(4, 1, n)),
    )
    for step in range(0, steps, 37):
        rows = []
        for device in ("cpu", "cuda"):
            canvas = torch.full((1, n), MASK, device=device)
            moved = dk.TokenStats(*(field.to(device) for field in stats))
            dk.commit_(canvas, positions.to(device), moved, dk.Rule.bernoulli(steps), mask_id=MASK, step=step)
            rows.append(canvas.cpu())
        assert torch.equal(*rows)


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
def test_unmask_agrees_with_the_cpu(temperature):
    g = torch.Generator().manual_seed(6)
    logits = random_logits(7, 4, 32, 50_257, dtype=torch.bfloat16)
    canvas = torch.randint(0, 5, (4, 100), generator=g)
    canvas[torch.rand(4, 100, generator=g) < 0.6] = MASK
    start = torch.tensor([0, 10, 68, 31], dtype=torch.int32)
    on_gpu = canvas.cuda()
    accepted = step(on_gpu, logits.cuda(), start.cuda(), temperature=temperature, seed=3)
    assert torch.equal(accepted.cpu(), step(canvas, logits, start, temperature=temperature, seed=3))
    assert torch.equal(on_gpu.cpu(), canvas)


def test_positions_outside_the_canvas_are_absent():
    canvas = torch.full((1, 4), MASK).cuda()
    stats = dk.TokenStats(torch.zeros(1, 3, dtype=torch.int64).cuda(), *torch.ones(4, 1, 3).cuda())
    positions = torch.tensor([[-5, 2, 10**6]], dtype=torch.int32).cuda()
    accepted = dk.commit_(canvas, positions, stats, dk.Rule.quota(), mask_id=MASK, quota=3)
    assert accepted.tolist() == [[False, True, False]] and canvas.tolist() == [[MASK, MASK, 0, MASK]]
    logits = torch.zeros(1, 3, 10).cuda()
    for start in (-2, 3, 10**6):
        step(canvas, logits, torch.tensor([start], dtype=torch.int32).cuda())
    assert canvas.tolist() == [[0, MASK, 0, 0]]


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
    torch.library.opcheck(
        torch.ops.dllm_kernels.unmask_, (*args, "threshold", [0.5], False, "prob", 0.0, MASK)
    )


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
