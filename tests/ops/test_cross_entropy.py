"""diffusion_cross_entropy and linear_diffusion_cross_entropy against torch's cross entropy in float64."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dllm_kernels import diffusion_cross_entropy, linear_diffusion_cross_entropy
from dllm_kernels.ops import linear_cross_entropy, reference
from tests.ops.instruction_set_helpers import results_of_each

OPS = torch.ops.dllm_kernels
# Of gradients, as a share of their largest entry: a logsumexp of 100 is rounded to 4e-6 in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 8e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def random_batch(shape, vocabulary, size=12, zeros=0.4, dtype=torch.float32):
    """hidden, weight, bias, targets, weights; the targets of rows of weight 0 are out of range."""
    hidden, weight = torch.randn(*shape, size), torch.randn(vocabulary, size)
    weights = torch.randn(shape) * (torch.rand(shape) >= zeros)
    targets = torch.randint(0, vocabulary, shape).masked_fill(weights == 0, -100)
    return hidden.to(dtype), weight.to(dtype), torch.randn(vocabulary).to(dtype), targets, weights


def formula(logits, targets, weights, suppress_tokens=()):
    """Σ w · CE and each CE in float64, rows of weight 0 set aside."""
    kept = weights != 0
    barred = torch.zeros(logits.shape[-1], dtype=torch.bool)
    barred[list(suppress_tokens)] = True
    rows = logits.double()[kept].masked_fill(barred, -torch.inf)
    ce = F.cross_entropy(rows, targets[kept], reduction="none")
    return (weights.double()[kept] * ce).sum(), torch.zeros(weights.shape).double().masked_scatter(kept, ce)


def largest(tensor):
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def assert_near(got, exact, bound, scale=0.0):
    """Differences below `bound` times the largest entry of `exact`, or times `scale` if that is larger."""
    assert got.shape == exact.shape
    bound = bound * max(scale, largest(exact)) + 1e-30
    torch.testing.assert_close(got.double(), exact.double(), rtol=0, atol=bound)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss * 0.3, tensors)


def check_logits_loss(logits, targets, weights, suppress_tokens=()):
    dtype = logits.dtype
    mine = [logits.detach().requires_grad_(), weights.clone().requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in mine]
    loss, ce = diffusion_cross_entropy(
        mine[0], targets, mine[1], suppress_tokens=suppress_tokens, return_ce=True
    )
    exact_loss, exact_ce = formula(exact[0], targets, exact[1], suppress_tokens)
    precision = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == ce.dtype == precision and loss.shape == () and not ce.requires_grad
    torch.testing.assert_close(ce.double(), exact_ce, rtol=TOLERANCE[precision], atol=TOLERANCE[precision])
    size = float((weights.double().abs() * (exact_ce.detach() + 1)).sum())
    assert_near(loss.detach(), exact_loss.detach(), TOLERANCE[precision], size)
    for got, expected in zip(gradients(loss, *mine), gradients(exact_loss, *exact), strict=True):
        assert_near(got, expected, TOLERANCE[got.dtype], largest(weights))


def check_linear_loss(hidden, weight, bias, targets, weights, suppress_tokens=()):
    given = [hidden, weight, weights] + ([] if bias is None else [bias])
    mine = [t.detach().requires_grad_() for t in given]
    exact = [t.detach().double().requires_grad_() for t in given]
    loss, ce = linear_diffusion_cross_entropy(
        *mine[:2], targets, *mine[2:], suppress_tokens=suppress_tokens, return_ce=True
    )
    logits = F.linear(*exact[:2], *exact[3:])
    exact_loss, exact_ce = formula(logits, targets, exact[2], suppress_tokens)
    precision = torch.promote_types(hidden.dtype, torch.float32)
    assert loss.dtype == ce.dtype == precision and not ce.requires_grad
    torch.testing.assert_close(ce.double(), exact_ce, rtol=1e-5, atol=1e-5)
    size = float((weights.double().abs() * (exact_ce.detach() + 1)).sum())
    assert_near(loss.detach(), exact_loss.detach(), 10 * TOLERANCE[precision], size)
    for got, expected in zip(gradients(loss, *mine), gradients(exact_loss, *exact), strict=True):
        bound = 10 * TOLERANCE[torch.promote_types(got.dtype, torch.float32)] + TOLERANCE[got.dtype]
        assert_near(got, expected, bound, largest(weights))


# ---- values and gradients --------------------------------------------------------------------------------
@given(st.data())
def test_the_loss_of_logits_equals_the_formula(data):
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=0, max_size=3)))
    vocabulary = draw(st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 2050])))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    *_, targets, weights = random_batch(shape, vocabulary)
    logits = (draw(st.sampled_from([1, 30])) * torch.randn(*shape, vocabulary)).to(dtype)
    suppressed = draw(st.lists(st.integers(0, vocabulary - 1), max_size=3))
    weights[torch.isin(targets, torch.tensor(suppressed, dtype=torch.int64))] = 0
    layout = draw(st.sampled_from(["contiguous", "columns", "every second", "without the first"]))
    if layout == "columns" and len(shape) > 0:
        logits = logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "every second":
        logits = logits.repeat_interleave(2, -1)[..., ::2]
    elif layout == "without the first" and len(shape) > 0:
        logits = torch.cat([logits[..., :1, :], logits], -2)[..., 1:, :]
    check_logits_loss(logits, targets, weights, suppressed)


@settings(max_examples=40)
@given(st.data())
def test_the_projected_loss_equals_the_formula(data):
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=3)))
    vocabulary, size = draw(st.sampled_from([1, 5, 64, 1030])), draw(st.integers(1, 20))
    dtype = draw(
        st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    hidden, weight, bias, targets, weights = random_batch(shape, vocabulary, size, dtype=dtype)
    if draw(st.booleans()):
        hidden, weight = (t.repeat_interleave(2, -1)[..., ::2] for t in (hidden, weight))
    if draw(st.booleans()) and hidden.dim() > 1:
        hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    suppressed = draw(st.lists(st.integers(0, vocabulary - 1), max_size=2))
    weights[torch.isin(targets, torch.tensor(suppressed, dtype=torch.int64))] = 0
    check_linear_loss(hidden, weight, draw(st.sampled_from([None, bias])), targets, weights, suppressed)


def test_chunks_of_any_size_give_the_same_loss(monkeypatch):
    hidden, weight, bias, targets, weights = random_batch((3, 50), 130)
    for rows, ids in ((1, 200), (7, 33), (64, 130), (1000, 1)):
        monkeypatch.setattr(linear_cross_entropy, "MIN_CHUNK_ROWS", rows)
        monkeypatch.setattr(linear_cross_entropy, "CPU_BLOCK_IDS", ids)
        check_linear_loss(hidden, weight, bias, targets, weights)


def test_logits_exist_for_one_chunk_of_rows_only(monkeypatch):
    sizes = []
    kernel = OPS.diffusion_cross_entropy_gradient_

    class Recording:
        def __getattr__(self, name):
            return getattr(OPS, name)

        def diffusion_cross_entropy_gradient_(self, logits, *rest):
            sizes.append(len(logits))
            return kernel(logits, *rest)

    monkeypatch.setattr(linear_cross_entropy, "_ops", Recording())
    monkeypatch.setattr(linear_cross_entropy, "MIN_CHUNK_ROWS", 250)
    hidden, weight, _, targets, weights = random_batch((1000,), 40, size=4, zeros=0.0)
    linear_diffusion_cross_entropy(hidden.requires_grad_(), weight, targets, weights)
    assert sizes == [250] * 4


@pytest.mark.parametrize("needs_grad", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_gradients_that_are_needed_exist(needs_grad):
    hidden, weight, bias, targets, weights = random_batch((20,), 33)
    inputs = [t.requires_grad_(need) for t, need in zip((hidden, weight, bias), needs_grad, strict=True)]
    linear_diffusion_cross_entropy(*inputs[:2], targets, weights, inputs[2]).backward()
    assert tuple(t.grad is not None for t in inputs) == needs_grad
    results = OPS.linear_diffusion_cross_entropy(hidden, weight, targets, weights, bias, [], needs_grad)
    assert tuple(bool(t.numel()) for t in results[2:]) == needs_grad


def test_a_kept_graph_gives_the_same_gradients_again():
    hidden, weight, bias, targets, weights = random_batch((20,), 33)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_diffusion_cross_entropy(*inputs[:2], targets, weights, inputs[2])
    first = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs)
    assert all(map(torch.equal, first, second)) and first[1].any()


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, bias, targets, weights = random_batch((30,), 70)
    weight.requires_grad_()
    with_gradient = linear_diffusion_cross_entropy(hidden, weight, targets, weights, bias)
    with torch.no_grad():
        without = linear_diffusion_cross_entropy(hidden, weight, targets, weights, bias)
    torch.testing.assert_close(without, with_gradient.detach(), rtol=1e-6, atol=0)
    assert with_gradient.requires_grad and not without.requires_grad


# ---- rows of weight 0 ------------------------------------------------------------------------------------
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_rows_of_weight_zero_have_no_influence(junk):
    hidden, weight, _, targets, weights = random_batch((4, 9), 40)
    ignored = weights == 0
    targets[ignored] = 2**40
    assert ignored.any() and not ignored.all()

    def results(fill):
        x = hidden.masked_fill(ignored[..., None], fill).requires_grad_()
        w = weight.clone().requires_grad_()
        linear = linear_diffusion_cross_entropy(x, w, targets, weights)
        logits = F.linear(hidden, weight).masked_fill(ignored[..., None], fill).requires_grad_()
        plain = diffusion_cross_entropy(logits, targets, weights)
        return linear, plain, *torch.autograd.grad(linear + plain, (x, w, logits))

    for clean, dirty in zip(results(0.0), results(junk), strict=True):
        assert torch.equal(clean, dirty)
    assert not results(junk)[2][ignored].any() and not results(junk)[4][ignored].any()


@pytest.mark.parametrize("shape", [(5,), (0,), (2, 0, 3)])
def test_nothing_masked_costs_nothing(shape):
    hidden, weight, bias, targets, _ = random_batch(shape, 30, zeros=1.0)
    weights = torch.zeros(shape)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss, ce = linear_diffusion_cross_entropy(*inputs[:2], targets, weights, inputs[2], return_ce=True)
    assert float(loss.detach()) == 0 and not ce.any()
    assert all(
        not g.any() and g.shape == t.shape for g, t in zip(gradients(loss, *inputs), inputs, strict=True)
    )
    logits = torch.full((*shape, 30), torch.nan, requires_grad=True)
    loss = diffusion_cross_entropy(logits, targets, weights)
    assert float(loss.detach()) == 0 and not gradients(loss, logits)[0].any()


# ---- numbers of any size ---------------------------------------------------------------------------------
def test_special_logits_give_what_torch_gives():
    logits = torch.randn(6, 2100)
    logits[0] = -torch.inf
    logits[0, 2000] = -1000.0  # whole chunks of -inf, then a very low maximum
    logits[1, 5], logits[2, 7] = torch.nan, torch.inf
    logits[3] = -torch.inf
    logits[4, 1500] = 1e30
    targets, weights = torch.tensor([2000, 1, 1, 1, 1500, 3]), torch.ones(6)
    _, ce = diffusion_cross_entropy(logits, targets, weights, return_ce=True)
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ce, expected, equal_nan=True)
    assert ce[:5].isnan().tolist() == [False, True, True, True, False]

    in_place, exact = logits.clone(), logits.clone().requires_grad_()
    OPS.diffusion_cross_entropy_gradient_(in_place, targets, weights, [])
    F.cross_entropy(exact, targets, reduction="sum").backward()
    finite = [0, 4, 5]
    torch.testing.assert_close(in_place[finite], exact.grad[finite], rtol=1e-5, atol=1e-6)
    assert in_place[1:4].isnan().any(-1).all()


def test_small_float16_gradients_survive_until_they_are_scaled():
    """Gradients of a loss divided by its tokens are below the range of float16; loss scaling comes later."""
    hidden, weight, _, targets, weights = random_batch((8,), 50, dtype=torch.float16)
    inputs = [t.requires_grad_() for t in (hidden, weight)]
    loss = linear_diffusion_cross_entropy(*inputs, targets, weights * 1e-9)
    expected = torch.autograd.grad(linear_diffusion_cross_entropy(*inputs, targets, weights), inputs)
    for got, full in zip(torch.autograd.grad(loss * 1e9, inputs), expected, strict=True):
        torch.testing.assert_close(got, full, rtol=2e-3, atol=1e-3)


def test_the_gradient_of_weights_is_the_cross_entropy():
    *_, targets, weights = random_batch((9,), 40)
    weights = weights.bfloat16().requires_grad_()
    loss, ce = diffusion_cross_entropy(torch.randn(9, 40), targets, weights, return_ce=True)
    (gradient,) = torch.autograd.grad(2 * loss, weights)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, (2 * ce).bfloat16())


# ---- determinism -----------------------------------------------------------------------------------------
def test_bits_do_not_depend_on_threads_or_company():
    *_, targets, weights = random_batch((200,), 3000)
    logits = torch.randn(200, 3000)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        in_place = logits.clone()
        gradient = OPS.diffusion_cross_entropy_gradient_(in_place, targets, weights, [])
        loss, ce, logsumexp = OPS.diffusion_cross_entropy(logits, targets, weights, [])
        grad_logits = OPS.diffusion_cross_entropy_backward(
            torch.tensor(0.7), logits, targets, weights, logsumexp, []
        )
        results.append((loss, ce, logsumexp, grad_logits, in_place, *gradient))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    _, alone, _ = OPS.diffusion_cross_entropy(logits[70:73], targets[70:73], weights[70:73], [])
    assert torch.equal(alone, results[0][1][70:73])


ON_EACH = """
from dllm_kernels import diffusion_cross_entropy
torch.manual_seed(1)
targets, weights, results = torch.randint(0, 2500, (6,)), torch.rand(6), []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    logits = (5 * torch.randn(6, 2500)).to(dtype).requires_grad_()
    loss = diffusion_cross_entropy(logits, targets, weights)
    results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
logits = 5 * torch.randn(6, 2500)
gradient_ = torch.ops.dllm_kernels.diffusion_cross_entropy_gradient_
results.append((*gradient_(logits, targets, weights, []), logits))
"""


def test_every_instruction_set_of_this_machine_agrees(tmp_path):
    results = results_of_each(ON_EACH, tmp_path)
    for result in results.values():
        for got, base in zip(result, results["baseline"], strict=True):
            for a, b in zip(got, base, strict=True):
                assert_near(a, b, TOLERANCE[a.dtype])


# ---- the reference ---------------------------------------------------------------------------------------
def test_operators_and_reference_pass_gradcheck():
    hidden, weight, bias, targets, weights = random_batch((2, 3), 7, size=3, dtype=torch.float64)
    weights = weights.double()
    head = [t.requires_grad_() for t in (hidden, weight, bias)]
    logits = torch.randn(2, 3, 7).double().requires_grad_()
    for module in (reference, OPS):
        assert torch.autograd.gradcheck(
            lambda x, module=module: module.diffusion_cross_entropy(x, targets, weights, [])[0], [logits]
        )
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_diffusion_cross_entropy(x, w, targets, weights, b), head
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: reference.linear_diffusion_cross_entropy(x, w, targets, weights, b)[0], head
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_equal_the_reference(dtype):
    """The reference also serves devices without a kernel."""
    *_, targets, weights = random_batch((4, 5), 40)
    logits, suppressed = torch.randn(4, 5, 40).to(dtype), [3]
    weights[targets == 3] = 0
    ours = OPS.diffusion_cross_entropy(logits, targets, weights, suppressed)
    plain = reference.diffusion_cross_entropy(logits, targets, weights, suppressed)
    arguments = (torch.tensor(0.7), logits, targets, weights, ours[2], suppressed)
    backward = [module.diffusion_cross_entropy_backward(*arguments) for module in (OPS, reference)]
    for a, b in zip((*ours, backward[0]), (*plain, backward[1]), strict=True):
        assert a.dtype == b.dtype
        assert_near(a, b, 2 * TOLERANCE[a.dtype])
    if dtype in (torch.float32, torch.float64):
        rows = [logits.flatten(0, 1).clone() for _ in range(2)]
        flat = targets.flatten(), weights.flatten(), suppressed
        got = OPS.diffusion_cross_entropy_gradient_(rows[0], *flat)
        expected = reference.diffusion_cross_entropy_gradient_(rows[1], *flat)
        for a, b in zip((*got, rows[0]), (*expected, rows[1]), strict=True):
            assert_near(a, b, 2 * TOLERANCE[dtype])


# ---- as torch operators ----------------------------------------------------------------------------------
def linear_cases():
    torch.manual_seed(0)
    hidden, weight, bias, targets, weights = random_batch((2, 5), 9)
    weights[targets == 2] = 0
    columns = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    x, w, b, row_weights = (t.clone().requires_grad_() for t in (hidden, weight, bias, weights))
    none, halves = [False] * 3, [t.bfloat16() for t in (hidden, weight, bias)]
    yield "no gradient", (hidden, weight, targets, weights, None, [], none)
    yield "transposed", (columns, weight.T.contiguous().T, targets, weights, bias, [2], none)
    yield "no rows", (hidden[:0], weight, targets[:0], weights[:0], bias, [], none)
    yield "bfloat16", (halves[0], halves[1], targets, weights, halves[2], [], none)
    yield "all gradients", (x, w, targets, weights, b, [], [True, True, True])
    yield "gradient of hidden", (x, weight, targets, weights, None, [], [True, False, False])
    yield "gradients of the head", (hidden, w, targets, weights, b, [], [False, True, True])
    yield "gradient of weights", (hidden, weight, targets, row_weights, None, [], none)


@pytest.mark.parametrize("case", list(linear_cases()), ids=lambda case: case[0])
def test_linear_opcheck(case):
    opcheck(OPS.linear_diffusion_cross_entropy.default, case[1])


def logits_cases():
    torch.manual_seed(0)
    *_, targets, weights = random_batch((2, 5), 9)
    weights[targets == 2] = 0
    logits, row_weights = torch.randn(2, 5, 9), weights.clone().requires_grad_()
    yield "no gradient", (logits, targets, weights, [2])
    yield "transposed", (logits.transpose(0, 1).contiguous().transpose(0, 1), targets, weights, [])
    yield "no rows", (logits[:0], targets[:0], weights[:0], [])
    yield "float16", (logits.half().requires_grad_(), targets, weights, [])
    yield "gradients", (logits.clone().requires_grad_(), targets, row_weights, [2])
    yield "gradient of weights", (logits, targets, row_weights, [])


@pytest.mark.parametrize("case", list(logits_cases()), ids=lambda case: case[0])
def test_logits_opcheck(case):
    opcheck(OPS.diffusion_cross_entropy.default, case[1])
    logits, targets, weights, suppressed = (t.detach() if isinstance(t, torch.Tensor) else t for t in case[1])
    logsumexp = OPS.diffusion_cross_entropy(logits, targets, weights, suppressed)[2]
    opcheck(
        OPS.diffusion_cross_entropy_backward.default,
        (torch.tensor(0.7), logits, targets, weights, logsumexp, suppressed),
    )
    rows = logits.float().reshape(-1, 9), targets.flatten(), weights.flatten(), suppressed
    opcheck(OPS.diffusion_cross_entropy_gradient_.default, rows)


def test_compiles_as_one_graph_with_dynamic_shapes():
    def losses(hidden, weight, targets, weights):
        plain = diffusion_cross_entropy(F.linear(hidden, weight), targets, weights)
        return plain + linear_diffusion_cross_entropy(hidden, weight, targets, weights)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend=counter)
    for rows, zeros in ((6, 0.0), (6, 0.9), (11, 0.4)):
        hidden, weight, _, targets, weights = random_batch((2, rows), 40, zeros=zeros)
        inputs = [t.requires_grad_() for t in (hidden, weight)]
        expected = losses(*inputs, targets, weights)
        got = compiled(*inputs, targets, weights)
        assert torch.equal(got, expected)
        for a, b in zip(gradients(got, *inputs), gradients(expected, *inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_mixed_dtypes(dtype):
    hidden, weight, bias, targets, weights = random_batch((6,), 20)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = linear_diffusion_cross_entropy(hidden.to(dtype), weight, targets, weights, bias)
    expected = linear_diffusion_cross_entropy(
        hidden.to(dtype), weight.to(dtype), targets, weights, bias.to(dtype)
    )
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.dtype == torch.float32 and gradient.any()


# ---- bad input -------------------------------------------------------------------------------------------
HIDDEN, WEIGHT, TARGETS, WEIGHTS = torch.zeros(4, 8), torch.zeros(10, 8), torch.zeros(4).long(), torch.ones(4)
LOGITS, OUTSIDE = torch.zeros(4, 10), torch.tensor([0, -1, -100, 0])
BAD_LINEAR = {
    r"hidden must be float \[..., H\], got torch.int64": {"hidden": HIDDEN.long()},
    r"weight must be float32 \[V, 8\], got torch.float32 Tensor \[10, 7\]": {"weight": WEIGHT[:, :7]},
    r"weight must be float32 \[V, 8\], got torch.bfloat16": {"weight": WEIGHT.bfloat16()},
    r"weight must be float32 \[V, 8\], got torch.float32 Tensor \[0, 8\]": {"weight": WEIGHT[:0]},
    r"bias must be float32 \[10\], got torch.float32 Tensor \[9\]": {"bias": torch.zeros(9)},
    r"targets must be int64 \[4\], an entry for each row of hidden": {"targets": TARGETS[:3]},
    r"targets must be int64 \[4\], .*, got torch.int32": {"targets": TARGETS.int()},
    r"weights must be float \[4\], .*, got torch.bool": {"weights": WEIGHTS.bool()},
    "targets must lie between 0 and 9 where weights is not 0, got -100 in row 2": {
        "targets": OUTSIDE,
        "weights": torch.tensor([1.0, 0, 1, 1]),
    },
    "targets must not be one of suppress_tokens where weights is not 0, got 0 in row 0": {
        "suppress_tokens": [0]
    },
}
BAD_LOGITS = {
    "logits must be float32 or .* or float64, got int64": {"logits": LOGITS.long()},
    r"logits must have a vocabulary of 1 to 2\^30 ids, got 0": {"logits": LOGITS[:, :0]},
    "targets must be int64, got int32": {"targets": TARGETS.int()},
    r"targets must have one entry for each row of logits \[4, 10\], got shape \[3\]": {
        "targets": TARGETS[:3]
    },
    "weights must be float32 or .* or float64, got bool": {"weights": WEIGHTS.bool()},
    r"weights must have one entry for each row of logits \[4, 10\], got shape \[1\]": {
        "weights": WEIGHTS[:1]
    },
    "targets must lie between 0 and 9 where weights is not 0, got -1 in row 1": {"targets": OUTSIDE},
    "targets must not be one of suppress_tokens where weights is not 0, got 0 in row 0": {
        "suppress_tokens": [0]
    },
    "suppress_tokens must lie between 0 and 9, got 10": {"suppress_tokens": [10]},
}


@pytest.mark.parametrize("text", BAD_LINEAR)
def test_bad_arguments_of_the_projected_loss_are_refused_by_name(text):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "weights": WEIGHTS, "bias": None}
    arguments |= {"suppress_tokens": []} | BAD_LINEAR[text]
    with pytest.raises(ValueError, match="^linear_diffusion_cross_entropy: " + text):
        linear_diffusion_cross_entropy(**arguments)
    with pytest.raises(ValueError, match="^linear_diffusion_cross_entropy: " + text):
        OPS.linear_diffusion_cross_entropy(**arguments, needs_grad=[False] * 3)


@pytest.mark.parametrize("text", BAD_LOGITS)
def test_bad_arguments_of_the_loss_of_logits_are_refused_by_name(text):
    arguments = {"logits": LOGITS, "targets": TARGETS, "weights": WEIGHTS, "suppress_tokens": []}
    arguments |= BAD_LOGITS[text]
    for loss in (diffusion_cross_entropy, OPS.diffusion_cross_entropy):
        with pytest.raises(ValueError, match="^diffusion_cross_entropy: " + text):
            loss(**arguments)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="targets must be a Tensor, got list"):
        linear_diffusion_cross_entropy(HIDDEN, WEIGHT, [0] * 4, WEIGHTS)
    with pytest.raises(TypeError, match="weights must be a Tensor, got float"):
        diffusion_cross_entropy(LOGITS, TARGETS, 1.0)


@pytest.mark.parametrize("weights", [torch.ones(3), torch.zeros(3)], ids=["weighted", "all 0"])
@pytest.mark.parametrize(
    "call",
    [
        lambda *rest, **options: diffusion_cross_entropy(torch.randn(3, 5), *rest, **options),
        lambda *rest, **options: linear_diffusion_cross_entropy(
            torch.randn(3, 4), torch.randn(5, 4), *rest, **options
        ),
    ],
    ids=["logits", "linear"],
)
def test_suppress_tokens_are_checked_whatever_the_weights(call, weights):
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="suppress_tokens must be a sequence of integers, got int"):
        call(targets, weights, suppress_tokens=4)
    with pytest.raises(TypeError, match="suppress_tokens must be an integer, got float"):
        call(targets, weights, suppress_tokens=[0.5])
    for token in (5, -1):
        with pytest.raises(ValueError, match=f"suppress_tokens must lie between 0 and 4, got {token}"):
            call(targets, weights, suppress_tokens=[token])
