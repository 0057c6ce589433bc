"""A batch on the CPU, a model elsewhere: the host waits for nothing, since reading a meta tensor raises."""

import pytest
import torch

from dllm_train import bd3lm_loss, dream_loss, mdlm_loss, vocabulary_head
from tests.train.tiny_models import MASK, tiny

IDS = torch.randint(3, MASK, (2, 12), generator=torch.Generator().manual_seed(0))
THREE = torch.tensor(3.0, device="meta")
CASES = {
    "mdlm": (mdlm_loss, {"normalizer": THREE}),
    "padded": (mdlm_loss, {"lengths": torch.tensor([5, 9]), "certainty_weight": 0.5, "normalizer": THREE}),
    "packed": (
        mdlm_loss,
        {"document_lengths": torch.tensor([[4, 5], [12, 0]]), "loss_norm_type": "sequence", "shift": True},
    ),
    "bd3lm": (bd3lm_loss, {"block_size": 4}),
    "bd3lm-causal": (
        bd3lm_loss,
        {"block_size": 4, "clean": "causal", "ar_weight": 0.2, "normalizer": THREE, "ar_normalizer": THREE},
    ),
    "dream": (dream_loss, {"bos_id": 1, "complementary": True, "reach": 4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "dllm"), ("llama", "sdpa"), ("gpt2", "eager"), ("bert", "dllm"), ("mistral", "dllm")],
)
def test_no_step_reads_the_device_of_the_model(name, attention, case, monkeypatch):
    monkeypatch.setattr(vocabulary_head, "_is_plain", lambda *_: True)  # a head is tried in its first step
    loss, options = CASES[case]
    model = tiny(name, attention=attention).to("meta")
    output = loss(model, IDS, mask_id=MASK, **options)
    output.loss.backward()
    assert type(output.tokens) is type(output.masked) is int
    assert {output.loss.device.type, output.nll_sum.device.type, output.ce_sum.device.type} == {"meta"}
    assert not output.nll_sum.requires_grad
    assert all(p.grad.is_meta for p in model.parameters() if p.grad is not None)
