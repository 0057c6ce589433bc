"""The originals' signatures and return types, hooks and refusals; tokens are in test_golden.py."""

import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import dllm_kernels as dk
from dllm_kernels.compat import dllm, dream, fast_dllm, llada
from tests.sampling.tiny_models import EOS, MASK, prompts_of, tiny_model


@pytest.fixture
def model():
    return tiny_model(attention="bidirectional")


@pytest.fixture
def prompt():
    return torch.tensor(prompts_of(6, 6))


def test_llada_returns_prompt_and_completion(model, prompt):
    x = llada.generate(model, prompt, steps=8, gen_length=16, block_length=8, mask_id=MASK)
    assert x.shape == (2, 22) and torch.equal(x[:, :6], prompt) and not (x == MASK).any()


def test_left_padding_comes_back_as_it_was(model):
    (long, short) = prompts_of(6, 2)
    padded = torch.tensor([long, [EOS] * 4 + short])
    real = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    found = llada.generate(model, padded, real, steps=8, gen_length=8, block_length=8, mask_id=MASK)
    alone = llada.generate(model, torch.tensor([short]), steps=8, gen_length=8, block_length=8, mask_id=MASK)
    assert torch.equal(found[:, :6], padded) and torch.equal(found[1, 4:], alone[0])


def test_end_tokens_may_be_barred_or_only_come_last(model, prompt):
    options = dict(steps=8, gen_length=8, block_length=8, mask_id=MASK)
    assert not (llada.generate(model, prompt, logits_eos_inf=True, **options)[:, 6:] == EOS).any()
    last = llada.generate(model, prompt, confidence_eos_eot_inf=True, **options)
    output = dk.sample(model, prompt, max_new_tokens=8, block_size=8, stop_on_eos=False,
                       begin_suppress_tokens=(EOS,), parity="llada")  # fmt: skip
    assert torch.equal(last, output.sequences)


def test_steps_that_do_not_come_out_even(model, prompt):
    with pytest.raises(ValueError, match="gen_length 12 must be a multiple of block_length 8"):
        llada.generate(model, prompt, gen_length=12, block_length=8)
    with pytest.raises(ValueError, match="steps 3 must be a multiple of the 2 blocks"):
        fast_dllm.generate(model, prompt, gen_length=16, block_length=8, steps=3)
    for generate in (llada.generate, fast_dllm.generate, fast_dllm.generate_with_dual_cache):
        for name in ("steps", "gen_length", "block_length"):
            for value, error in ((0, ValueError), (-8, ValueError), (True, TypeError), (8.0, TypeError)):
                with pytest.raises(error, match=f"{name} must"):
                    generate(model, prompt, mask_id=MASK, **{name: value})
    for generate in (dream.diffusion_generate, fast_dllm.diffusion_generate):
        for name in ("steps", "max_new_tokens", "num_return_sequences", "max_length"):
            for value, error in ((0, ValueError), (-8, ValueError), (True, TypeError), (8.0, TypeError)):
                with pytest.raises(error, match=f"{name} must"):
                    generate(model, prompt, alg="entropy", **{name: value})
    with pytest.raises(ValueError, match="block_length must"):
        fast_dllm.diffusion_generate(model, prompt, block_length=0)
    for sampler in (dllm.MDLMSampler(model), dllm.BD3LMSampler(model), dllm.FastdLLMLLaDASampler(model)):
        for name in ("steps", "max_new_tokens", "block_size"):
            for value, error in ((-8, ValueError), (True, TypeError), (8.0, TypeError)):
                with pytest.raises(error, match=f"{name} must"):
                    sampler.sample([[1, 2]], **{name: value})
    with pytest.raises(NotImplementedError, match="remasking is 'best'"):
        llada.generate(model, prompt, remasking="best", mask_id=MASK)


def test_noise_follows_the_seed_of_torch(model, prompt):
    options = dict(max_new_tokens=8, steps=8, alg="entropy", temperature=1.0, top_p=0.95)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(dream.diffusion_generate(model, prompt, **options))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_factor_takes_the_last_rank_too():
    """[Fast-dLLM] The surest, and the last candidate although it fails: two at a time."""
    logits = torch.zeros(1, 3, 8)
    x, nfe = fast_dllm.generate(
        lambda ids: logits.expand(len(ids), -1, -1), torch.tensor([[1]]), steps=2, gen_length=2,
        block_length=2, mask_id=7, factor=0.1,
    )  # fmt: skip
    assert nfe == 1 and x.tolist() == [[1, 0, 0]]


def test_a_threshold_within_an_even_schedule(model, prompt):
    """[Fast-dLLM's Dream without cache] Of the masks not due later, those above the threshold, or one."""
    canvas, due = torch.cat([prompt[:1], torch.full((1, 12), MASK)], dim=1), [4, 4, 4]
    forwards = 0
    while (masks := (canvas[0] == MASK).nonzero()[:, 0]).numel():
        with torch.no_grad():
            logits = model(canvas, attention_mask=torch.ones(1, 1, 18, 18, dtype=torch.bool)).logits[0, masks]
        confidence = logits.softmax(-1)
        confidence[:, MASK] = -1
        confidence, tokens = confidence.max(-1)
        later = sum(due[forwards + 1 :])
        chosen = confidence.topk(len(masks) - later).indices
        kept = [int(i) for rank, i in enumerate(chosen) if rank == 0 or confidence[i] >= 0.5]
        canvas[0, masks[kept]] = tokens[kept]
        forwards += 1
    found = fast_dllm.diffusion_generate(
        model, prompt[:1], max_new_tokens=12, steps=3, alg="confidence_threshold", threshold=0.5,
        use_cache=False, return_dict_in_generate=True, output_history=True,
    )  # fmt: skip
    assert found.sequences.tolist() == canvas.tolist() and len(found.history) == forwards > 3


def test_dream_returns_an_object_with_history(model, prompt):
    output = dream.diffusion_generate(
        model, prompt, max_new_tokens=8, steps=4, alg="maskgit_plus", output_history=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert len(output.history) == 4 and torch.equal(output.history[-1], output.sequences)
    with pytest.raises(TypeError, match="'stepps' is not an option"):
        dream.diffusion_generate(model, prompt, stepps=4)


def test_dream_hooks_see_and_change_every_step(model, prompt):
    options = dict(max_new_tokens=8, steps=4, alg="maskgit_plus")
    plain = dream.diffusion_generate(model, prompt, **options)
    seen = []

    def tokens(step, x, logits):
        seen.append((step, None if logits is None else tuple(logits.shape)))
        return x

    hooked = dream.diffusion_generate(model, prompt, generation_tokens_hook_func=tokens, **options)
    assert torch.equal(hooked, plain)
    assert seen == [(None, None), *((step, (2, 14, 120)) for step in range(4))]

    def always_five(step, x, logits):
        return logits.index_fill(-1, torch.tensor([5]), 1e4)

    fives = dream.diffusion_generate(model, prompt, generation_logits_hook_func=always_five, **options)
    assert (fives[:, 6:] == 5).all()

    def write_seven(step, x, logits):
        x[:, 9] = 7
        return x

    assert (
        dream.diffusion_generate(model, prompt, generation_tokens_hook_func=write_seven, **options)[:, 9] == 7
    ).all()


def test_hooks_see_every_step_of_padded_prompts(model):
    """[Dream] Steps that commit nothing call the hooks too; a shorter row's tokens are those of it alone."""
    (long, short), steps = prompts_of(6, 2), []
    padded = torch.tensor([long, [EOS] * 4 + short])
    real = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    options = dict(max_new_tokens=8, steps=12, alg="entropy")

    def watched(step, x, logits):
        steps.append(step)
        return x

    hooked = dream.diffusion_generate(
        model, padded, attention_mask=real, generation_tokens_hook_func=watched, **options
    )
    plain = dream.diffusion_generate(model, padded, attention_mask=real, **options)
    assert torch.equal(hooked, plain) and steps == [None, *range(12)]


NOISY = (
    dict(temperature=0.7),
    dict(temperature=0.7, top_p=0.9),
    dict(temperature=1.3, top_k=20, alg_temp=0.3),
)


@pytest.mark.parametrize("alg", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_hooks_that_change_nothing(model, alg):
    """The tokens are those without hooks, for every alg, with noise, and padded."""
    (long, short) = prompts_of(6, 2)
    padded = torch.tensor([long, [EOS] * 4 + short])
    real = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    for drawn in (dict(), *NOISY):
        options = dict(max_new_tokens=8, steps=12, alg=alg, attention_mask=real, **drawn)
        found = []
        for hook in (None, dream.same_logits):
            torch.manual_seed(3)
            found.append(dream.diffusion_generate(model, padded, generation_logits_hook_func=hook, **options))
        assert torch.equal(*found)


def test_hooks_that_change_nothing_among_equals():
    """Tokens that are equally sure are ranked alike."""

    def model(ids):
        return torch.zeros(*ids.shape, 8).index_fill(2, torch.tensor([3]), 1.0)

    histories = [
        dream.diffusion_generate(
            model, torch.tensor([[1, 2]]), max_new_tokens=64, steps=16, mask_token_id=7, alg="entropy",
            output_history=True, return_dict_in_generate=True, generation_logits_hook_func=hook,
        ).history
        for hook in (None, dream.same_logits)
    ]  # fmt: skip
    assert all(map(torch.equal, *histories))


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_hooks_that_change_nothing_in_a_dllm_sampler(attention):
    sampler = dllm.DreamSampler(tiny_model(attention=attention))
    for drawn in (dict(temperature=0.0), dict(temperature=0.7, stochastic_transfer=True), *NOISY):
        options = dict(alg="entropy", steps=5, max_new_tokens=8) | drawn
        found = []
        for hook in ({}, dict(generation_logits_hook_func=lambda step, x, logits: logits)):
            torch.manual_seed(3)
            found.append(sampler.sample(prompts_of(3, 5), **options, **hook))
        assert torch.equal(*found)


def test_hooks_refuse_what_they_refuse_without(model):
    options = dict(max_new_tokens=4, steps=4, alg="entropy", generation_logits_hook_func=dream.same_logits)
    prompt = torch.tensor(prompts_of(4, 4))
    for mask, said in (
        ([1, 1, 0, 0], "must pad inputs on the left"),
        ([1, 0, 1, 1], "has zeros between ones"),
        ([-1e9, 0, 0, 0], "must hold 1 for tokens and 0 for padding"),
    ):
        with pytest.raises(ValueError, match=said):
            dream.diffusion_generate(model, prompt, attention_mask=torch.tensor([mask, [1] * 4]), **options)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is block-causal; leave the hooks out"):
        dream.diffusion_generate(tiny_model(), prompt, **options)
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.1000000, got 0"):
        dream.diffusion_generate(model, prompt, **options | dict(steps=0))
    with pytest.raises(ValueError, match="row 0 needs 304 positions"):
        dream.diffusion_generate(model, prompt, **options | dict(max_new_tokens=300))
    with pytest.raises(ValueError, match=r"prompts\[0\] holds id 6.."):
        dream.diffusion_generate(model, prompt + 500, **options)
    config = MambaConfig(
        vocab_size=120,
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        diffusion={"attention": ["bidirectional"]},
    )
    with pytest.raises(ValueError, match="has no attention"):
        dream.diffusion_generate(MambaForCausalLM(config).eval(), prompt, mask_token_id=MASK, **options)


@pytest.mark.parametrize(
    "hook", [lambda *_: None, lambda step, x, logits: logits[:, :-1], lambda step, x, logits: logits.double()]
)
def test_a_hook_gives_what_it_was_given(model, prompt, hook):
    options = dict(max_new_tokens=4, steps=4, alg="entropy")
    with pytest.raises(
        TypeError, match=r"the logits hook gave a .*; it must give a torch.float32 Tensor \[2,"
    ):
        dream.diffusion_generate(model, prompt, generation_logits_hook_func=hook, **options)
    with pytest.raises(TypeError, match=r"the tokens hook gave a .*; it must give a torch.int64 Tensor \[2,"):
        dream.diffusion_generate(
            model, prompt, generation_tokens_hook_func=lambda step, x, logits: x.float(), **options
        )


def test_dream_counts_its_length_as_there(model):
    """The default max_length is one of new tokens; one that is given counts the prompt."""
    prompt = torch.tensor(prompts_of(6))
    lengths = [
        dream.diffusion_generate(model, prompt, alg="entropy", steps=4, **options).shape
        for options in (dict(), dict(max_length=20), dict(num_return_sequences=3, max_new_tokens=4))
    ]
    assert lengths == [(1, 26), (1, 20), (3, 10)]
    config = SimpleNamespace(max_length=16, steps=2, alg="entropy")
    assert dream.diffusion_generate(model, prompt, config).shape == (1, 16)
    assert fast_dllm.diffusion_generate(model, prompt, config, block_length=5).shape == (1, 16)
    with pytest.raises(ValueError, match="inputs has 6 tokens, max_length is 6"):
        dream.diffusion_generate(model, prompt, max_length=6)


def test_bad_input_is_named(model, prompt):
    for generate in (llada.generate, fast_dllm.generate, fast_dllm.generate_with_dual_cache):
        with pytest.raises(TypeError, match=r"prompt must be an int64 Tensor \[B, S\], got torch.float32"):
            generate(model, prompt.float(), mask_id=MASK)
    for generate in (dream.diffusion_generate, fast_dllm.diffusion_generate):
        with pytest.raises(TypeError, match=r"inputs must be an int64 Tensor \[B, S\]"):
            generate(model, prompt[0], alg="entropy", max_new_tokens=8)
        with pytest.raises(TypeError, match="inputs is a NoneType"):
            generate(model, alg="entropy", max_new_tokens=8)
        with pytest.raises(ValueError, match=r"attention_mask is \[1, 6\], inputs is \[2, 6\]"):
            generate(model, prompt, alg="entropy", max_new_tokens=8, attention_mask=torch.ones(1, 6))
    with pytest.raises(NotImplementedError, match="alg is 'confidence_threshold'"):
        dream.diffusion_generate(model, prompt, alg="confidence_threshold")
    with pytest.raises(NotImplementedError, match="generation_logits_hook_func needs use_cache=False"):
        fast_dllm.diffusion_generate(model, prompt, alg="entropy", generation_logits_hook_func=lambda *_: 0)
    with pytest.raises(NotImplementedError, match="alg is 'origin'"):
        dllm.DreamSampler(model).sample([[1]], temperature=0.0)
    with pytest.raises(ValueError, match="use_cache is 'block'"):
        dllm.FastdLLMLLaDASampler(model).sample([[1]], use_cache="block")
    with pytest.raises(ValueError, match='"confidence_threshold" needs threshold'):
        dllm.FastdLLMDreamSampler(model).sample([[1]], alg="confidence_threshold", temperature=0.0)
    with pytest.raises(ValueError, match="max_length is 4; the longest prompt has 6"):
        dllm.MDLMSampler(model).sample(prompt, max_new_tokens=None, max_length=4)
    with pytest.raises(ValueError, match="max_new_tokens and max_length are None"):
        dllm.BD3LMSampler(model).sample(prompt, max_new_tokens=None)


def test_a_model_completes_nothing(model):
    """[dLLM] An empty prompt is a canvas of masks."""
    for sampler in (dllm.MDLMSampler(model), dllm.BD3LMSampler(model)):
        found = sampler.sample([[], [1, 2]], max_new_tokens=8, block_size=4, steps=8)
        assert not (found == MASK).any()


def test_dllm_samplers_return_tensors_or_objects(model):
    prompts = prompts_of(5, 9)
    sampler = dllm.MDLMSampler(model)
    config = dllm.MDLMSamplerConfig(max_new_tokens=8, block_size=4, steps=8)
    plain = sampler.sample(prompts, config)
    output = sampler.sample(prompts, config, return_dict=True)
    assert plain.shape == (2, 17) and torch.equal(output.sequences, plain)
    assert torch.equal(output.histories[-1], plain) and (output.histories[0] == MASK).any()
    assert plain[0, 13:].tolist() == [EOS] * 4, "shorter rows are filled up with the end token"
    with pytest.raises(TypeError, match="'threshold' is not an option of MDLMSamplerConfig"):
        sampler.sample(prompts, threshold=0.5)
    with pytest.raises(NotImplementedError, match="scheduler is square"):
        dllm.MDLMSampler(model, scheduler="square").sample(prompts)


def test_dllm_samplers_take_fewer_steps_than_blocks_and_begin_empty_prompts(model):
    special = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, bos_token_id=7)
    sampler = dllm.MDLMSampler(model, special)
    options = dict(max_new_tokens=8, block_size=4, steps=1, right_shift_logits=True)
    found = sampler.sample([[], [1, 2]], **options)
    assert found.shape == (2, 10) and found[0, 0] == 7 and not (found == MASK).any()


def test_dllm_samplers_leave_the_model_as_it_was():
    model = tiny_model(attention="bidirectional")
    before = dict(model.config.diffusion)
    dllm.BD3LMSampler(model).sample(prompts_of(5), max_new_tokens=8, block_size=8, steps=8)
    assert model.config.diffusion == before


def test_dllm_samplers_leave_other_threads_alone():
    """While MDLM is in a forward of a block-causal model, others sample it under its own attention."""
    model, found = tiny_model(num_hidden_layers=1), []

    def tokens():
        return dk.sample(model, prompts_of(5), max_new_tokens=8).sequences

    def meanwhile(*_):
        handle.remove()
        other = threading.Thread(target=lambda: found.append(tokens()))
        other.start()
        other.join(60)

    alone = tokens()
    handle = model.model.layers[0].register_forward_pre_hook(meanwhile)
    whole = dllm.MDLMSampler(model).sample(prompts_of(5), max_new_tokens=8, steps=8)
    assert torch.equal(found[0], alone) and not torch.equal(whole, alone)
    assert torch.equal(dllm.MDLMSampler(model).sample(prompts_of(5), max_new_tokens=8, steps=8), whole)


SEEDED = {
    "llada": lambda model, ids: llada.generate(
        model, ids, steps=8, gen_length=16, block_length=8, temperature=1.0, mask_id=MASK
    ),
    "llada, random": lambda model, ids: llada.generate(
        model, ids, steps=8, gen_length=16, block_length=8, remasking="random", mask_id=MASK
    ),
    "fast_dllm": lambda model, ids: fast_dllm.generate_with_dual_cache(
        model, ids, steps=8, gen_length=16, block_length=8, temperature=1.0, mask_id=MASK
    )[0],
    "dllm, random": lambda model, ids: dllm.MDLMSampler(model).sample(
        [*ids], max_new_tokens=16, steps=8, block_size=8, remasking="random"
    ),
    "dream": lambda model, ids: dream.diffusion_generate(model, ids, max_new_tokens=16, steps=8),
}


@pytest.mark.parametrize("generate", SEEDED.values(), ids=SEEDED)
def test_what_is_drawn_follows_torchs_seed(generate, model, prompt):
    """The same seed, the same tokens; without a seed every call draws again, as in the originals."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(generate(model, prompt))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.manual_seed(1)
    assert torch.equal(generate(model, prompt), found[0])
    assert not torch.equal(generate(model, prompt), found[0])
