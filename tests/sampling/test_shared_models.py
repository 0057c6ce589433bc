"""One model used by several calls at once, nested or in threads: tokens as alone, nothing left behind."""

import copy
import functools
import threading

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import dllm_kernels as dk
from tests.sampling.tiny_models import prompts_of, tiny_model

OPTIONS = dict(max_new_tokens=14, threshold=0.3)


@pytest.fixture(scope="module")
def traced_model():
    """torch.compile traces it once, and runs what it traced with torch's own operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        yield copy.deepcopy(tiny_model())


@pytest.fixture
def model(traced_model):
    """In training mode, to be left so."""
    yield traced_model.train()
    assert traced_model.config._attn_implementation == "sdpa"
    assert all(module.training and "forward" not in vars(module) for module in traced_model.modules())


def together(*plans):
    """Results of functions that run at once, each in its thread."""
    results, start = [None] * len(plans), threading.Barrier(len(plans))

    def work(index, plan):
        start.wait()
        try:
            results[index] = plan()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=item) for item in enumerate(plans)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("compiled", [(False, False), (True, False), (True, True)])
def test_two_threads_sample_one_model(model, compiled):
    """The one with fewer rows is done first, and must not take the other's attention away."""
    prompts = prompts_of(3, 17, 9, 30)
    work = [(prompts, compiled[0]), (prompts[:1], compiled[1])]
    expected = [dk.sample(model, some, compile=c, **OPTIONS).sequences for some, c in work]
    for _ in range(4):
        outputs = together(
            *(lambda some=some, c=c: dk.sample(model, some, compile=c, **OPTIONS) for some, c in work)
        )
        assert not [output for output in outputs if isinstance(output, BaseException)]
        assert all(torch.equal(o.sequences, e) for o, e in zip(outputs, expected, strict=True))


def test_a_model_without_a_row_of_its_own_is_first_seen_by_several_threads():
    """What looks at its head hooks into its forward, where other threads' forwards pass too."""
    config = GPTNeoXConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        mask_token_id=119, eos_token_id=118, diffusion={"attention": ["bidirectional"]},
    )  # fmt: skip
    for _ in range(4):
        sample = functools.partial(dk.sample, GPTNeoXForCausalLM(config).eval(), prompts_of(3, 9), **OPTIONS)
        outputs, expected = together(sample, sample, sample), sample().sequences
        assert all(torch.equal(output.sequences, expected) for output in outputs), outputs


def test_another_attention_chosen_meanwhile(model):
    with dk.enable_attention(model):
        model.set_attn_implementation("eager")
        dk.sample(model, [[1]], **OPTIONS)
    assert model.config._attn_implementation == "sdpa"


def test_the_first_to_leave_leaves_the_attention_to_the_other(model):
    """Contexts that overlap without one inside the other, as threads make them."""
    first, second = dk.enable_attention(model), dk.enable_attention(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.config._attn_implementation == "dllm"
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("compiled", [(False, False), (True, False), (False, True), (True, True)])
def test_a_callback_samples_the_same_model(model, compiled):
    outer, inner = compiled
    prompts = prompts_of(3, 9)
    expected = [dk.sample(model, prompts, compile=c, **OPTIONS).sequences for c in compiled]
    nested = []

    def again(event):
        nested.append(dk.sample(model, prompts, compile=inner, **OPTIONS).sequences)

    output = dk.sample(model, prompts, compile=outer, on_round=again, **OPTIONS)
    assert torch.equal(output.sequences, expected[0])
    assert len(nested) > 2 and all(torch.equal(ids, expected[1]) for ids in nested)


def test_a_callback_runs_the_compiled_model_itself(model):
    """Its own forward, under its own mask."""
    ids, inside = torch.tensor([[1, 2, 3]]), []
    with torch.no_grad():
        expected = model.eval()(ids).logits
    model.train()
    dk.sample(model, [[1]], compile=True, on_round=lambda event: inside.append(model(ids).logits), **OPTIONS)
    assert all(torch.allclose(logits, expected, atol=1e-3) for logits in inside)


def test_events_are_the_callers_own():
    """Kept ones stay as they were, and writing into one changes nothing."""
    prompts, events = prompts_of(3, 9), []
    expected = dk.sample(tiny_model(), prompts, history=True, **OPTIONS)

    def scribble(event):
        events.append((event.canvas.clone(), event.canvas))
        for tensor in (event.rows, event.positions, event.tokens):
            tensor.fill_(7)

    output = dk.sample(tiny_model(), prompts, on_round=scribble, **OPTIONS)
    assert all(torch.equal(then, now) for then, now in events)
    assert torch.equal(output.sequences, expected.sequences)
    for (canvas, _), kept in zip(events, expected.history[1:], strict=True):
        assert torch.equal(canvas, kept)

    found = dk.sample(
        tiny_model(), prompts, on_round=lambda event: event.canvas.fill_(7), **OPTIONS
    ).sequences
    assert torch.equal(found, expected.sequences)


def test_results_are_ordinary_tensors(model):
    """Although the forwards run in inference mode: autograd takes them and they may be written."""
    events = []
    with torch.enable_grad():
        output = dk.sample(model, prompts_of(3, 9), history=True, on_round=events.append, **OPTIONS)
        tensors = [output.sequences, output.lengths, output.unmask_step, output.row_forwards, *output.history]
        tensors += [events[0].canvas, events[0].tokens]
        assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)
        model(output.sequences).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_compiling_under_autocast_is_refused(model):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="compile=True under"):
        dk.sample(model, [[1]], compile=True, **OPTIONS)


def test_cached_tokens_under_autocast_are_those_without_a_cache():
    """Pages hold what attention is given there, so that both round alike."""
    block_causal, options = tiny_model(), dict(max_new_tokens=24, block_size=8, threshold=0.3)
    for seed in range(6):
        prompts = prompts_of(18, 9, seed=seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            none, block = (
                dk.sample(block_causal, prompts, cache=cache, **options).sequences
                for cache in ("none", "block")
            )
        assert torch.equal(none, block)
