"""The choice of kernels for attention without a mask depends on facts known before the launch."""

import dataclasses

import pytest
import torch

from dllm_kernels.ops.vendor_attention import FEWEST_PAIRS, UnmaskedCall, backend

TRAINING = UnmaskedCall((9, 0), torch.bfloat16, head_dim=128, q_len=4096, kv_len=4096, needs_grad=True)


def chosen(flash_attention_3=False, **changes) -> str:
    return backend(dataclasses.replace(TRAINING, **changes), flash_attention_3=flash_attention_3)


def test_long_half_precision_calls_go_to_the_library():
    assert chosen() == chosen(dtype=torch.float16) == chosen(capability=(8, 0)) == "sdpa"
    assert chosen(flash_attention_3=True) == "flash_attention_3"


@pytest.mark.parametrize(
    "changes",
    [
        {"capability": None},
        {"capability": (7, 5)},
        {"dtype": torch.float32},
        {"head_dim": 256},
        {"q_len": 32, "kv_len": FEWEST_PAIRS // 32 - 1},
        {"kv_len": 0},
        {"deterministic": True},
    ],
)
def test_everything_else_is_ours(changes):
    assert chosen(**changes) == "dllm"


def test_flash_attention_3_is_for_hopper_and_for_wider_heads():
    assert chosen(flash_attention_3=True, head_dim=256) == "flash_attention_3"
    assert chosen(flash_attention_3=True, capability=(8, 6)) == "sdpa"
    assert chosen(flash_attention_3=True, capability=(12, 0)) == "sdpa"


def test_determinism_matters_only_to_gradients():
    assert chosen(deterministic=True, needs_grad=False) == "sdpa"


def test_the_border_is_a_number_of_pairs():
    assert chosen(q_len=512, kv_len=512) == "sdpa"
    assert chosen(q_len=512, kv_len=511) == "dllm"
