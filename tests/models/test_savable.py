"""dk.save refuses by name, with a remedy: nothing is written, and the results of the remedies load."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import dllm_kernels as dk
from tests.process_groups import end_together
from tests.sampling.tiny_models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def model():
    return copy.deepcopy(tiny_model("llama"))


def refuse(model, folder, reason: str, error=ValueError) -> None:
    with pytest.raises(error, match=reason):
        dk.save(model, None, folder / "new")
    assert not (folder / "new").exists()


def with_adapter(model, **options):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}],
    ids=str,
)
def test_adapters(model, tmp_path, options):
    adapted = with_adapter(model, **options)
    refuse(
        adapted,
        tmp_path,
        r"model is a PeftModel; .*: save the model that model.merge_and_unload\(\)",
        TypeError,
    )
    refuse(adapted.get_base_model(), tmp_path, r"an adapter; save the model that peft_model.merge_and_unload")
    expected = adapted(IDS).logits
    dk.save(adapted.merge_and_unload(), None, tmp_path / "merged")
    again, _ = dk.load(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_was_put_into_the_model(model, tmp_path):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["v_proj"], r=2), model)
    refuse(model, tmp_path, r"holds model.layers.0.self_attn.v_proj.base_layer.weight, .* an adapter; save")


def test_a_learned_prompt(model, tmp_path):
    peft = pytest.importorskip("peft")
    prompted = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    refuse(prompted, tmp_path, r"model is a PeftModelForCausalLM; .* a learned prompt is not part", TypeError)


def test_a_merged_adapter_that_is_still_there(model, tmp_path):
    adapted = with_adapter(model)
    adapted.merge_adapter()
    refuse(adapted.get_base_model(), tmp_path, "an adapter; save the model")


def test_a_folder_with_an_adapter_alone_needs_a_base(model, tmp_path):
    with_adapter(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base_model_name_or_path None; name the model with base="):
        dk.load(tmp_path)


def test_wrappers(model, tmp_path):
    refuse(torch.compile(model), tmp_path, r"it is compiled; save model._orig_mod", TypeError)
    refuse(nn.DataParallel(model), tmp_path, r"it is wrapped; save model.module", TypeError)
    compiled = torch.compile(model)._orig_mod
    dk.save(compiled, None, tmp_path / "compiled")
    again, _ = dk.load(tmp_path / "compiled", device="cpu")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_compiled_part(model, tmp_path):
    model.model.layers[0] = torch.compile(model.model.layers[0])
    refuse(model, tmp_path, r"holds model.layers.0._orig_mod.* torch.compile; put")


CHANGES = {
    "weight norm": (lambda m: parametrizations.weight_norm(m.lm_head), "parametrization; call torch"),
    "pruning": (
        lambda m: prune.l1_unstructured(m.model.layers[0].mlp.up_proj, "weight", 0.5),
        "pruning or spectral normalization; call",
    ),
    "another head": (lambda m: setattr(m, "lm_head", nn.Linear(32, 8)), "holds lm_head.bias, which"),
    "another size": (
        lambda m: setattr(m, "lm_head", nn.Linear(32, 8, bias=False)), r"lm_head.weight .* by its config"
    ),
    "no weight": (lambda m: delattr(m.lm_head, "weight"), "lacks lm_head.weight; put back"),
    "offloaded": (lambda m: m.model.norm.to("meta"), "model.norm.weight of .* is on the meta device"),
    "integers": (
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.char(), requires_grad=False)),
        "lm_head.weight of this LlamaForCausalLM is torch.int8, so it is quantized",
    ),
    "bytes": (
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.to(torch.float8_e4m3fn), False)),
        "lm_head.weight of this LlamaForCausalLM is torch.float8_e4m3fn, so it is quantized",
    ),
    "ties by hand": (
        lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight),
        "are one tensor, and its config does not tie them",
    ),
    "ties of the config alone": (
        lambda m: setattr(m.config, "tie_word_embeddings", True),
        "differ, and its config ties them; set model.config.tie_word_embeddings = False",
    ),
    "quantized": (
        lambda m: setattr(m.config, "quantization_config", {"bits": 4}),
        r"is quantized, which dk.load does not read; save model.dequantize\(\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_other_weights_than_the_class_has(model, tmp_path, change, reason):
    change(model)
    refuse(model, tmp_path, reason)


def test_sharded_weights(model, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        weight = model.lm_head.weight
        sharded = distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)))
        model.lm_head.weight = nn.Parameter(sharded)
        refuse(model, tmp_path, r"lm_head.weight of .* is sharded \(a DTensor\); gather the weights with")
    finally:
        torch.distributed.destroy_process_group()


def test_merged_projections_are_the_stock_weights(model, tmp_path):
    from dllm_kernels.models.merged_projections import merge_projections

    expected = model(IDS).logits
    merge_projections(model)
    dk.save(model, None, tmp_path / "new")
    again, _ = dk.load(tmp_path / "new", device="cpu")
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def _save_in_process(rank: int, folder: str) -> None:
    """Run in two processes: both save to folder/shared, and one to folder/own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model, _ = dk.load(f"{folder}/source", device="cpu")
    for turn in (0, 1):  # the last to write is each of them once
        if rank == turn:
            torch.distributed.barrier()
        dk.save(model, None, f"{folder}/shared{turn}")
        if rank != turn:
            torch.distributed.barrier()
    if rank == 1:
        dk.save(model, None, f"{folder}/own")
    end_together()


def test_every_process_writes_whole_checkpoints(model, tmp_path):
    """transformers would leave the weights out on every rank but 0."""
    dk.save(model, None, tmp_path / "source")
    torch.multiprocessing.spawn(_save_in_process, (str(tmp_path),), nprocs=2)
    for name in ("shared0", "shared1", "own"):
        again, _ = dk.load(tmp_path / name, device="cpu")
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), (name, key)
