"""No call leaves memory behind: 100 bytes a call are gigabytes in a server that samples for days."""

import ctypes
import gc

import pytest
import torch

import dllm_kernels as dk
from tests.ops.test_bad_input import OPS, calls
from tests.ops.test_overlap import advance_call, loss_call
from tests.sampling.tiny_models import tiny_model

# The modules that register what is written in Python load with their functions.
LOADED = dk.linear_diffusion_cross_entropy, dk.advance_
CALLS, MOST_BYTES = 1500, 16  # a leaked object takes more; torch's own caches may grow a little


class HeapUse(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(7)] + [("in_use", ctypes.c_size_t)]
    _fields_ += [("free", ctypes.c_size_t), ("top", ctypes.c_size_t)]


@pytest.fixture(scope="module")
def heap():
    """Bytes of the C and C++ heap in use."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("only glibc from 2.33 on says what is in use")
    mallinfo.restype = HeapUse

    def in_use() -> int:
        gc.collect()
        return mallinfo().in_use

    return in_use


def per_call(heap, call, count: int) -> float:
    for _ in range(count // 4):
        call()
    before = heap()
    for _ in range(count):
        call()
    return (heap() - before) / count


def losses() -> dict[str, dict]:
    call, rows = loss_call(), torch.zeros(4)
    tensors = {name: call[name] for name in ("logits", "targets", "weights", "suppress_tokens")}
    linear = {"hidden": torch.randn(4, 3), "weight": torch.randn(8, 3), "bias": torch.randn(8)}
    linear |= {"targets": call["targets"], "weights": call["weights"]}
    return {
        "diffusion_cross_entropy": tensors,
        "diffusion_cross_entropy_gradient_": tensors | {"weights": rows},
        "diffusion_cross_entropy_backward": tensors | {"grad_loss": torch.ones(()), "logsumexp": rows},
        "linear_diffusion_cross_entropy": linear | {"suppress_tokens": [1], "needs_grad": [True] * 3},
        "scaled_gradient": {
            "gradient": rows, "grad_loss": torch.ones(()), "loss": torch.ones(()), "dtype": torch.float32,
        },
    }  # fmt: skip


def attention_backward() -> dict:
    q = torch.randn(1, 2, 4, 8)
    out, lse = dk.block_attention(q, q, q, return_lse=True)
    return {
        "grad_out": q, "grad_lse": lse, "q": q, "k": q, "v": q, "out": out, "lse": lse, "spans": None,
        "scale": 1.0,
    }  # fmt: skip


def layers() -> dict[str, dict]:
    rows, weight, heads = torch.randn(3, 8), torch.randn(8), torch.randn(1, 2, 4, 8)
    angles = {"cos": torch.randn(1, 4, 8), "sin": torch.randn(1, 4, 8)}
    packed = {"x": rows, "weight": dk.pack_weight(torch.randn(16, 8)).data, "bias": torch.randn(16)}
    pair = {"weight": dk.pack_weight(torch.randn(32, 8)).data, "bias": torch.randn(32)}
    return {
        "pack_weight": {"weight": torch.randn(5, 8)},
        "packed_linear": packed | {"outputs": 16},
        "packed_gated_linear": packed | pair | {"outputs": 16},
        "rms_norm_backward": {
            "grad": rows, "x": rows, "weight": weight, "eps": 1e-5, "grad_sum": rows,
            "needs_grad_weight": True,
        },
        "silu_mul_backward": {"grad": rows, "gate": rows, "up": rows},
        "rotate_half_backward": angles | {"grad_query": heads, "grad_key": heads},
    }  # fmt: skip


EVERY = calls() | losses() | layers()
EVERY |= {"advance_": advance_call(), "block_attention_backward": attention_backward()}
LISTS = {"suppress_tokens": [1, 2], "proposal_exclude": [3], "confidence_exclude": [1], "stop_ids": [1, 2]}
# Asked once in a process.
ONCE = {"isas_built", "isa_active", "isa_error", "rules", "confidences", "block_row_layout"}
ELSEWHERE = {
    "chunked_linear_token_stats",
    "attend_current_view",
    "merged_linear",
    "spans_of_dense",
}  # written in Python


def test_every_operator_is_called_here():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("dllm_kernels::")}  # fmt: skip
    assert names - ONCE - ELSEWHERE == {*EVERY}


@pytest.mark.parametrize("operator", EVERY)
def test_an_operator_frees_what_it_takes(heap, operator):
    function, call = getattr(OPS, operator), EVERY[operator]
    taken = {argument.name for argument in function.default._schema.arguments}
    call = {name: ids for name, ids in LISTS.items() if name in taken} | call
    with torch.no_grad():
        assert per_call(heap, lambda: function(**call), CALLS) < MOST_BYTES


def test_no_schema_holds_a_string():
    """torch's stable ABI does not free them."""
    for operator in EVERY:
        schema = getattr(OPS, operator).default._schema
        assert not any("str" in str(argument.type) for argument in schema.arguments)


def test_sampling_frees_what_it_takes(heap):
    model = tiny_model()
    prompts = [[1, 2, 3]]

    def call():
        dk.sample(model, prompts, max_new_tokens=4, block_size=4, threshold=0.5)

    assert per_call(heap, call, 60) < 64
