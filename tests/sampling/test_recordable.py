"""What is launched on the device never looks at what its tensors hold and makes none from numbers of the
host, as a CUDA graph demands; seen by the operators that it calls."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from dllm_kernels.sampling import graph_loop
from dllm_kernels.sampling.graphs import Launches
from tests.sampling.test_block_loop import on_device
from tests.sampling.tiny_models import EOS, MASK, PAD, prompts_of, tiny_model

# Operators whose result, or its shape, follows from contents; and the one behind torch.tensor.
FORBIDDEN = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "isin", "repeat_interleave", "bincount", "lift_fresh",
}  # fmt: skip


class Recordable(TorchDispatchMode):
    """Refuses what cannot be recorded."""

    calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        assert name not in FORBIDDEN, function
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in arguments[1]), function
        if name == "_to_copy":
            assert (keywords or {}).get("device") in (None, arguments[0].device), function
        self.calls += 1
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def watched(monkeypatch) -> list[int]:
    """How many operators each launch called."""
    launch, calls = Launches.launch, []

    def within(self, name):
        with Recordable() as mode:
            launch(self, name)
        calls.append(mode.calls)

    monkeypatch.setattr(Launches, "launch", within)
    return calls


KINDS = {"block": "block_causal", "prefix": "bidirectional", "dual": "bidirectional"}
OPTIONS = {
    "plain": dict(),
    "noise": dict(threshold=0.3, temperature=0.8, eos_ids=(EOS, 5, 17, 60)),
    "filters": dict(steps_per_block=3, top_p=0.9, top_k=20),
    "shift and guidance": dict(threshold=0.3, shift=True, cfg_scale=0.5),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cache", KINDS)
def test_every_kind_of_step(cache, options, watched):
    sliding = dict(sliding_window=11, use_sliding_window=True, max_window_layers=1)
    model, prompts = tiny_model(attention=KINDS[cache], **sliding), prompts_of(3, 25)
    on_device(model, prompts, max_new_tokens=17, block_size=8, cache=cache, max_batch=1, **options)
    assert min(watched) > 10


def test_a_step_over_the_active_blocks_alone(watched, monkeypatch):
    monkeypatch.setattr(graph_loop, "FEW_TOKENS", 0)
    _, loop = on_device(tiny_model(), prompts_of(3, 25), max_new_tokens=17, block_size=8, threshold=0.3)
    assert len(loop.widths) == 2 and min(watched) > 10


SMALL = dict(mask_token_id=MASK, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, vocab_size=120)
MODELS = {
    "gpt2": lambda **more: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **SMALL, **more)),
    "bert": lambda **more: BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **SMALL, **more)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_kinds(name, watched):
    torch.manual_seed(0)
    model = MODELS[name](diffusion={"attention": ["bidirectional"]}).eval()
    on_device(model, prompts_of(3, 25), max_new_tokens=9, block_size=8, cache="dual")
    assert min(watched) > 10


def test_what_reads_a_tensor_is_seen():
    tensor = torch.arange(4)
    for reads in (
        lambda: bool(tensor.any()),
        lambda: tensor.nonzero(),
        lambda: tensor[tensor > 1],
        lambda: torch.tensor([1, 2]),
        lambda: torch.isin(tensor, tensor),
    ):
        with pytest.raises(AssertionError), Recordable():
            reads()
