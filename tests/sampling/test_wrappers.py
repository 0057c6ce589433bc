"""Wrapped models are sampled as the model inside where the wrapper passes calls on, else refused by name."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dllm_kernels as dk
from dllm_kernels.compat import dllm, dream, fast_dllm, llada
from tests.sampling.tiny_models import EOS, MASK, prompts_of, tiny_model

PROMPT = torch.tensor(prompts_of(6, 6))


@pytest.fixture
def model():
    return tiny_model(attention="bidirectional")


@contextlib.contextmanager
def one_process(folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def nested(model):
    return torch.compile(nn.DataParallel(nn.DataParallel(model)))


WRAPPERS = {"DataParallel": nn.DataParallel, "torch.compile": torch.compile, "one in another": nested}
ASK = dict(steps=8, gen_length=8, block_length=8, mask_id=MASK)
TOKENIZER = type("Tokenizer", (), dict(mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS))()
CALLS = {
    "sample": lambda m: dk.sample(m, PROMPT, max_new_tokens=8).sequences,
    "infill": lambda m: dk.infill(m, [[5, MASK, 7]]).sequences,
    "llada": lambda m: llada.generate(m, PROMPT, **ASK),
    "llada, end tokens": lambda m: llada.generate(m, PROMPT, **ASK, logits_eos_inf=True),
    "fast_dllm": lambda m: fast_dllm.generate(m, PROMPT, **ASK)[0],
    "fast_dllm, prefix": lambda m: fast_dllm.generate_with_prefix_cache(m, PROMPT, **ASK)[0],
    "fast_dllm, dual": lambda m: fast_dllm.generate_with_dual_cache(m, PROMPT, **ASK)[0],
    "fast_dllm, dream": lambda m: fast_dllm.diffusion_generate(
        m, PROMPT, max_new_tokens=8, steps=8, block_length=8, alg="entropy"
    ),
    "dream": lambda m: dream.diffusion_generate(m, PROMPT, max_new_tokens=8, steps=8, alg="entropy"),
    "dream, hooks": lambda m: dream.diffusion_generate(
        m, PROMPT, max_new_tokens=8, steps=8, alg="entropy", generation_tokens_hook_func=lambda s, x, l: x
    ),
    "mdlm": lambda m: dllm.MDLMSampler(m, TOKENIZER).sample([*PROMPT], max_new_tokens=8, steps=8),
    "dllm's dream": lambda m: dllm.DreamSampler(m, TOKENIZER).sample(
        [*PROMPT], max_new_tokens=8, steps=8, temperature=0.0, alg="entropy"
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_tokens_are_those_of_the_model_inside(model, wrap, call):
    assert torch.equal(call(wrap(model)), call(model))


def test_a_ddp_model(model, tmp_path):
    with one_process(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(CALLS["sample"](wrapped), CALLS["sample"](model))
        with dk.enable_attention(wrapped) as inside:
            assert inside is wrapped and model.config._attn_implementation == "dllm"


class Own(nn.Module):
    """A module that may do anything with the model in it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_modules_around_a_model_are_refused(model, call):
    with pytest.raises(ValueError, match="model is a Own around a Qwen3ForCausalLM: give the inner model"):
        call(Own(model))


FUNCTIONS = {name: CALLS[name] for name in ("llada", "llada, end tokens", "fast_dllm", "mdlm")}


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_of_ids(model, call):
    """Of equal prompts, with the attention that they bring: tokens of the model itself."""

    def logits(ids):
        seen = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        with torch.no_grad():
            return model(ids, attention_mask=seen).logits

    def shown(ids):  # LLaDA's end tokens lie beyond this vocabulary
        return nn.functional.pad(logits(ids), (0, 130000), value=-1e9)

    with_end_tokens = call is CALLS["llada, end tokens"]
    expected = CALLS["llada"](model) if with_end_tokens else call(model)
    assert torch.equal(call(shown if with_end_tokens else logits), expected)


def test_hooks_with_a_function_take_rows_of_equal_length():
    def logits(ids):
        return torch.zeros(*ids.shape, 50)

    options = dict(max_new_tokens=4, steps=4, alg="entropy", mask_token_id=49)
    hooks = dict(generation_tokens_hook_func=lambda step, x, logits: x)
    assert dream.diffusion_generate(logits, torch.tensor([[1, 2]]), **options, **hooks).shape == (1, 6)
    padded = dict(attention_mask=torch.tensor([[1, 1], [0, 1]]))
    with pytest.raises(ValueError, match="takes rows of equal length"):
        dream.diffusion_generate(logits, torch.tensor([[1, 2], [0, 3]]), **options, **hooks, **padded)


# ---- peft ------------------------------------------------------------------------------------------------
@pytest.fixture
def fresh():
    tiny_model.cache_clear()
    yield tiny_model(attention="bidirectional")
    tiny_model.cache_clear()


def test_adapters_are_sampled_with(fresh):
    peft = pytest.importorskip("peft")
    plain = CALLS["sample"](fresh)
    wrapped = peft.get_peft_model(fresh, peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    found = CALLS["sample"](nn.DataParallel(wrapped))
    assert torch.equal(found, CALLS["sample"](wrapped.get_base_model())) and not torch.equal(found, plain)
    with wrapped.disable_adapter():
        assert torch.equal(CALLS["sample"](wrapped), plain)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_learned_prompt_is_not_dropped(fresh, kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(fresh, config)
    for call in CALLS.values():
        with pytest.raises(
            ValueError, match=r"the learned prompt lies in the wrapper.*That is not supported"
        ):
            call(wrapped)
