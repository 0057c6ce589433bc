"""Packed rows: the loss and gradients of their documents, each alone, whatever computes the attention."""

import pytest
import torch

from dllm_train import Noise, bd3lm_loss, dream_loss, loss_normalizer, mdlm_loss, sample_noise
from tests.train.tiny_models import MASK, tiny

DOCUMENTS = torch.tensor([[5, 4, 0], [3, 0, 8]])  # in rows of 12: three positions of padding, and one
LENGTH, BLOCK = 12, 3
IDS = torch.randint(3, MASK, (2, LENGTH), generator=torch.Generator().manual_seed(0))
PIECES = [(0, 0, 5), (0, 5, 9), (1, 0, 3), (1, 3, 11)]  # row, start, end
NOISE = Noise(
    torch.linspace(0.3, 0.8, 2 * LENGTH).view(2, LENGTH), torch.arange(2 * LENGTH).view(2, LENGTH) % 3 != 1
)
LABELS = IDS.clone()
for row, start, _ in PIECES:
    LABELS[row, start] = -100  # with shift a document alone would get BOS

LOSSES = {
    "mdlm": (mdlm_loss, {}),
    "mdlm-shift-reach": (mdlm_loss, {"shift": True, "reach": 1}),
    "bd3lm": (bd3lm_loss, {"block_size": BLOCK}),
    "bd3lm-shift": (bd3lm_loss, {"block_size": BLOCK, "shift": True}),
    "bd3lm-causal": (bd3lm_loss, {"block_size": BLOCK, "clean": "causal", "ar_weight": 0.2}),
    "dream": (dream_loss, {}),
}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    ("llama", "eager", "token"),
    ("llama", "sdpa", "token"),
    ("llama", "dllm", "token"),
    ("llama", "dllm", "sequence"),
    ("llama", "dllm", "batch"),
    ("llama-longrope", "dllm", "token"),
    ("llama-dynamic", "sdpa", "token"),
    ("gpt2", "dllm", "token"),
    ("gemma3", "eager", "token"),
    ("gemma3", "dllm", "token"),
    ("modernbert", "sdpa", "token"),
]


@pytest.mark.parametrize(("name", "attention", "norm"), CASES)
@pytest.mark.parametrize("objective", LOSSES)
def test_packed_documents_equal_documents_alone(name, attention, norm, objective):
    loss, options = LOSSES[objective]
    options = options | {"mask_id": MASK, "loss_norm_type": norm}
    packed, alone = (tiny(name, attention=attention) for _ in range(2))
    whole = loss(packed, IDS, LABELS, noise=NOISE, document_lengths=DOCUMENTS, **options)
    whole.loss.backward()

    shift = options.get("shift", loss is dream_loss)
    total = loss_normalizer(LABELS, norm, document_lengths=DOCUMENTS, shift=shift)
    assert total == (16 if norm == "token" else 4)
    options["normalizer"] = total
    if "ar_weight" in options:
        options["ar_normalizer"] = 16
    summed, tokens = 0.0, 0
    for row, start, end in PIECES:
        piece = (slice(row, row + 1), slice(start, end))
        noise = Noise(NOISE.t[piece], NOISE.masked[piece])
        output = loss(alone, IDS[piece], LABELS[piece], noise=noise, **options)
        output.loss.backward()
        summed, tokens = summed + output.loss.detach(), tokens + output.tokens
    torch.testing.assert_close(whole.loss.detach(), summed, rtol=1e-5, atol=1e-6)
    assert whole.tokens == tokens
    expected = gradients(alone)
    assert gradients(packed).keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in gradients(packed).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=2e-5 * largest)


@pytest.mark.parametrize("name", ["llama-longrope", "llama-dynamic"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_sequence_is_rotated_by_its_own_length(name, packed):
    """transformers takes the frequencies of a forward from its largest position."""
    if packed:
        pieces, layout = PIECES, {"document_lengths": DOCUMENTS}
    else:
        pieces, layout = [(0, 0, 12), (1, 0, 3)], {"lengths": torch.tensor([12, 3])}
    model = tiny(name)
    with torch.no_grad():
        found = mdlm_loss(model, IDS, mask_id=MASK, noise=NOISE, **layout).ce
        expected = []
        for row, start, end in pieces:
            masked, ids = (table[row : row + 1, start:end] for table in (NOISE.masked, IDS))
            sees_all = torch.ones(1, 1, end - start, end - start, dtype=torch.bool)
            logits = tiny(name)(ids.masked_fill(masked, MASK), attention_mask=sees_all).logits[masked]
            expected.append(torch.nn.functional.cross_entropy(logits, ids[masked], reduction="none"))
    torch.testing.assert_close(found, torch.cat(expected))


def test_checkpointed_layers_are_rotated_alike():
    model, checkpointed = tiny("llama-longrope"), tiny("llama-longrope").train()
    checkpointed.gradient_checkpointing_enable()
    for one in (model, checkpointed):
        mdlm_loss(one, IDS, mask_id=MASK, noise=NOISE, document_lengths=DOCUMENTS).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradients(checkpointed)[name], gradient)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("block_size", [None, 2])
def test_every_document_has_times_of_its_own(block_size, stratified):
    options = {"block_size": block_size, "stratified": stratified}
    documents = torch.tensor([[5, 4, 3], [7, 5, 0]])
    labels = torch.zeros(2, 12, dtype=torch.int64)
    t = sample_noise(labels, [3, 8], document_lengths=documents, **options).t
    groups = [(0, 5), (5, 9), (9, 12)] if block_size is None else [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9)]
    for start, end in groups:
        assert (t[0, start:end] == t[0, start]).all()
    starts = [t[0, start] for start, _ in groups]
    assert len(set(map(float, starts))) == len(starts)
    first = sample_noise(labels[:1], [3], document_lengths=documents[:1], **options)
    assert torch.equal(first.t, t[:1])
    padded = torch.zeros(1, 17, dtype=torch.int64)
    padded = sample_noise(padded, [3], document_lengths=documents[:1], **options)
    assert torch.equal(padded.t[:, :12], first.t)
    assert torch.equal(padded.masked[:, :12], first.masked)


def test_the_first_token_of_a_shifted_document_is_given():
    output = mdlm_loss(
        tiny("llama"), IDS, mask_id=MASK, document_lengths=DOCUMENTS, shift=True,
        noise=Noise(NOISE.t, torch.ones_like(NOISE.masked)),
    )  # fmt: skip
    assert (
        output.tokens == output.masked == loss_normalizer(IDS, document_lengths=DOCUMENTS, shift=True) == 16
    )
    assert loss_normalizer(IDS, document_lengths=DOCUMENTS) == 20


def test_only_the_longest_document_needs_positions():
    """GPT-2 has 80 positions; two documents of 60 tokens fit in one row."""
    ids = torch.full((1, 120), 5)
    model = tiny("gpt2")
    assert mdlm_loss(model, ids, mask_id=MASK, document_lengths=torch.tensor([[60, 60]])).loss.isfinite()
    with pytest.raises(ValueError, match=r"81 tokens.* has 80 positions"):
        mdlm_loss(model, ids, mask_id=MASK, document_lengths=torch.tensor([[39, 81]]))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (
            r"document_lengths has shape \[3, 1\]; expected \[2, D\]",
            {"document_lengths": torch.ones(3, 1).long()},
        ),
        ("document_lengths is a torch.float32", {"document_lengths": torch.ones(2, 1)}),
        ("document_lengths is a list", {"document_lengths": [[12], [12]]}),
        ("document_lengths holds -1", {"document_lengths": torch.tensor([[13, -1], [5, 5]])}),
        ("sum to 13; rows of input_ids have 12", {"document_lengths": torch.tensor([[13], [5]])}),
        (
            r"lengths is \[9, 12\], and document_lengths sum to \[9, 11\]",
            {"document_lengths": DOCUMENTS, "lengths": torch.tensor([9, 12])},
        ),
    ],
)
def test_bad_documents_are_named(text, options):
    with pytest.raises((TypeError, ValueError), match=text):
        mdlm_loss(tiny("llama"), IDS, mask_id=MASK, **options)
