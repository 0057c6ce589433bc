"""Losses equal the cross entropy of the model's own logits under a mask given to plain transformers, with all
their gradients, whatever the model's head, windows, positions and attention implementation are."""

import pytest
import torch
import torch.nn.functional as F

from dllm_train import Noise, bd3lm_loss, mdlm_loss
from tests.train.tiny_models import MASK, MODELS, tiny

BLOCK, LENGTH = 4, 12
LENGTHS = torch.tensor([LENGTH, 9, 5])
FIRST_POSITION = {"roberta": 1, "xlm-roberta": 1}  # padding token + 1
WINDOWS = {name: 3 for name in ("qwen2-windows", "mistral", "gemma2", "gemma3", "cohere2", "olmo3", "phi3")}
WINDOWS["modernbert"] = 6 // 2 + 1


@pytest.fixture(scope="module")
def batch():
    """ids [3, 12], with the padding token among those that are to be predicted, and noise."""
    torch.manual_seed(1)
    ids = torch.randint(3, MASK, (3, LENGTH))
    ids[:, 3] = 0
    t = torch.rand(3, 1).clamp(min=0.4).expand(3, LENGTH)
    masked = torch.rand(3, LENGTH) < 0.6
    masked[0, 3] = masked[1, 2] = True
    masked[:, 4] = False
    return ids, Noise(t, masked)


def visible(objective):
    """bool [3, S, S], written out, and the position of each index within its row."""
    half = LENGTH
    size = half if objective == "mdlm" else 2 * half
    position = torch.arange(size) % half
    mask = torch.zeros(3, size, size, dtype=torch.bool)
    for row, length in enumerate(LENGTHS.tolist()):
        for q in range(size):
            for k in range(size):
                block_q, block_k = position[q] // BLOCK, position[k] // BLOCK
                if max(position[q], position[k]) >= length:
                    seen = q == k
                elif objective == "mdlm":
                    seen = True
                elif k < half:
                    seen = q < half and block_q == block_k
                else:
                    seen = block_k < block_q if q < half else block_k <= block_q
                mask[row, q, k] = seen
    return mask, position


def masks_for(model, name, objective):
    """Return the masks for plain transformers on "eager", and the position ids."""
    mask, position = visible(objective)

    def additive(window):
        seen = mask if window is None else mask & ((position[:, None] - position).abs() < window)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]

    window = WINDOWS.get(name)
    kinds = getattr(model.config, "layer_types", None)
    if window is None or kinds is None:
        masks = additive(window)
    else:
        masks = {"full_attention": additive(None), "sliding_attention": additive(window)}
    return masks, (position + FIRST_POSITION.get(name, 0)).expand(3, -1)


def expected(name, batch, objective, **entries):
    """The loss written out with the stock model's logits, and the gradient of every parameter."""
    model = tiny(name, attention="eager", **entries)
    for module in model.get_input_embeddings().modules():
        module.padding_idx = None  # transformers would leave the padding token's row without gradient
    ids, noise = batch
    masked = noise.masked & (torch.arange(LENGTH) < LENGTHS[:, None])
    noised = torch.where(masked, MASK, ids)
    inputs = noised if objective == "mdlm" else torch.cat([noised, ids], dim=1)
    masks, positions = masks_for(model, name, objective)
    logits = model(input_ids=inputs, attention_mask=masks, position_ids=positions).logits[:, :LENGTH]
    ce = F.cross_entropy(logits[masked].float(), ids[masked], reduction="none")
    loss = (ce / noise.t[masked]).sum() / LENGTHS.sum()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def loss_of(model, batch, objective, **options):
    ids, noise = batch
    loss = mdlm_loss if objective == "mdlm" else bd3lm_loss
    if objective == "bd3lm":
        options["block_size"] = BLOCK
    return loss(model, ids, mask_id=MASK, noise=noise, lengths=LENGTHS, **options).loss


def assert_same(loss, gradients, expected_loss, expected_gradients):
    torch.testing.assert_close(loss, expected_loss, rtol=2e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values() if g is not None)
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is None or not gradients[name].any(), name
        else:
            torch.testing.assert_close(
                gradients[name], gradient, rtol=1e-3, atol=2e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, a) for n in MODELS for a in ("eager", "sdpa", "dllm") if (n, a) != ("gemma2", "sdpa")],
)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name, attention, objective, batch):
    model = tiny(name, attention=attention)
    loss = loss_of(model, batch, objective)
    loss.backward()
    assert_same(loss, {n: p.grad for n, p in model.named_parameters()}, *expected(name, batch, objective))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "bert", "roberta", "modernbert"])
def test_the_other_kind_of_embeddings_too(name, batch):
    tied = not tiny(name, attention="eager").config.tie_word_embeddings
    model = tiny(name, attention="eager", tie_word_embeddings=tied)
    loss = loss_of(model, batch, "mdlm")
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert_same(loss, gradients, *expected(name, batch, "mdlm", tie_word_embeddings=tied))
