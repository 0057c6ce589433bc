"""A training step with our losses and with the plain implementation, on the same model, batch and noise.

The plain one is what people write first: a dense boolean mask with SDPA, logits of every position, torch's
cross entropy. Its loss and gradients must equal ours before anything is timed.

pytest benchmarks -k training --peer dllm=DIR    # and dLLM's own trainer
"""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import dllm_kernels as dk
from benchmarks import training_loops
from benchmarks.peers.process import PeerProcess
from benchmarks.test_sampling import BLOCK, random_model
from benchmarks.training_loops import plain_loss
from dllm_train import Noise, bd3lm_loss, mdlm_loss, sample_noise
from dllm_train.selective_checkpointing import checkpoint_selectively

LONGEST_COMPILED = 512  # of the plain implementation
# A step of the plain implementation takes a minute in the end.
ROUNDS = {512: 5, 2048: 3, 4096: 2}
STEPS = {512: 6, 2048: 2, 4096: 1}  # of one run of a trainer
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative; of a gradient as a whole


@functools.cache
def plain_model(smoke: bool) -> Qwen3ForCausalLM:
    """The 60M model of the sampling benchmarks, in training, with torch's attention."""
    model = copy.deepcopy(random_model("bidirectional", smoke)).train()
    model.set_attn_implementation("sdpa")
    model.config.diffusion = {
        "attention": ["bidirectional", "block_causal"],
        "block_size": BLOCK,
        "shift": False,
    }
    return model


@functools.cache
def our_model(smoke: bool, mode: str) -> Qwen3ForCausalLM:
    """Return the model with the same weights and our attention; a smoke run compiles nothing."""
    compiled = mode.endswith("compiled") and not smoke
    model = with_options(plain_model(smoke), "dllm", compiled, fused=mode.startswith("fused"))
    if mode == "selective":
        checkpoint_selectively(model)
    return model


def with_options(model, attention: str, compiled: bool, fused: bool = False) -> Qwen3ForCausalLM:
    """Return a copy of `model` with another attention, its layers fused and compiled or not."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    if fused:
        dk.fuse_layers(model)
    if compiled:
        torch.compiler.reset()
        model.base_model.compile(dynamic=False)
    return model


def batch(model, rows: int, length: int, block_size: int | None) -> tuple[Tensor, Noise]:
    """Random ids [rows, length], and the noise of the objective."""
    ids = torch.randint(1, model.config.vocab_size - 1, (rows, length))
    return ids, sample_noise(ids, range(rows), block_size=block_size)


# ---- the comparisons -------------------------------------------------------------------------------------
def our_step(model, ids: Tensor, noise: Noise, block_size: int | None) -> Tensor:
    """Loss and gradients of one batch, with nothing left of the gradients before."""
    options = dict(mask_id=model.config.vocab_size - 1, noise=noise)
    model.zero_grad(set_to_none=False)
    if block_size is None:
        loss = mdlm_loss(model, ids, **options).loss
    else:
        loss = bd3lm_loss(model, ids, block_size=block_size, **options).loss
    loss.backward()
    return loss.detach()


def plain_step(model, ids: Tensor, noise: Noise, block_size: int | None) -> Tensor:
    model.zero_grad(set_to_none=False)
    loss = plain_loss(model, ids, noise, block_size)
    loss.backward()
    return loss.detach()


def assert_equal_steps(ours, plain, *inputs) -> None:
    torch.testing.assert_close(
        our_step(ours, *inputs), plain_step(plain, *inputs), atol=0, rtol=LOSS_TOLERANCE
    )
    for (name, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        error = (parameter.grad - other.grad).norm() / other.grad.norm()
        assert error < GRADIENT_TOLERANCE, f"gradient of {name}: relative error {error:.1e}"


SIZES = [("mdlm", 512, 2), ("bd3lm", 512, 2), ("bd3lm", 2048, 1), ("bd3lm", 4096, 1)]
PLAIN = "dense mask, all logits"
MODES = {
    "eager": "",
    "fused": ", fused layers",
    "selective": ", selective checkpointing",
    "compiled": ", torch.compile",
    "fused-compiled": ", fused layers, torch.compile",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective, length, rows", SIZES)
def test_training_step(compare, pick, smoke, objective, length, rows, mode):
    """Forward and backward; memory is what a step takes beyond weights and gradients."""
    ours, plain = our_model(smoke, mode), plain_model(smoke)
    block_size = BLOCK if objective == "bd3lm" else None
    inputs = batch(ours, rows, pick(length, 64), block_size)
    assert_equal_steps(ours, plain, *inputs, block_size)
    baselines = {PLAIN: lambda: plain_step(plain, *inputs, block_size)}
    if mode == "compiled" and not smoke and length <= LONGEST_COMPILED:
        plain_compiled = with_options(plain, "sdpa", compiled=True)
        baselines[f"{PLAIN}, compiled"] = lambda: plain_step(plain_compiled, *inputs, block_size)
    compare(
        lambda: our_step(ours, *inputs, block_size),
        baselines,
        title=f"training step, {described(objective, ids=inputs[0], mode=mode)}",
        rounds=ROUNDS[length],
        memory=True,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective, length, rows", SIZES)
def test_training_run(compare, pick, smoke, named_peers, objective, length, rows, mode):
    """Whole trainers, optimizer and data included; "bare loop" tells what the trainer itself costs."""
    block_size = BLOCK if objective == "bd3lm" else None
    ours, plain = our_model(smoke, mode), plain_model(smoke)
    ids = torch.randint(1, plain.config.vocab_size - 1, (STEPS[length] * rows, pick(length, 64)))
    with peer_trainer(named_peers, plain, ids, rows, block_size) as theirs:
        compare(
            training_loops.our_trainer(ours, ids, rows, block_size),
            {
                "plain trainer": training_loops.plain_trainer(plain, ids, rows, block_size),
                "bare loop": training_loops.bare_loop(ours, ids, rows, block_size),
                **theirs,
            },
            title=f"whole trainer, {described(objective, ids=ids[:rows], mode=mode)}",
            rounds=2,
        )


def described(objective: str, ids: Tensor, mode: str) -> str:
    rows, length = ids.shape
    batch = f"{rows} {'rows' if rows > 1 else 'row'} of {length}"
    return f"{objective.upper()}, {batch}{MODES[mode]}"


@contextmanager
def peer_trainer(named_peers, model, ids, rows, block_size):
    """Give dLLM's trainer by its name, where --peer names a checkout; it runs in its own process."""
    if "dllm" not in named_peers:
        yield {}
        return
    with PeerProcess(named_peers["dllm"], model, "block_causal") as process:
        process.prepare_training(ids, block_size, training_loops.arguments(rows))
        yield {"dLLM's trainer": process.train}
