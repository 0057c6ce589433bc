"""The trainers compute, log, save and refuse, in one process."""

import copy
import math
from dataclasses import replace
from itertools import chain

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_kernels as dk
from dllm_kernels.models.stored_weights import store_tied_head, store_weights
from dllm_train import (
    DiffusionCollator,
    DiffusionTrainer,
    MDLMTrainer,
    ModelArguments,
    bd3lm_loss,
    dream_loss,
    get_model,
    mdlm_loss,
)
from tests.train.tiny_models import MASK, tiny
from tests.train.trainer_runs import BLOCK, Gradients, examples, losses, tokenizer, trainer

LOSSES = {
    "mdlm": (mdlm_loss, {}),
    "bd3lm": (bd3lm_loss, {"block_size": BLOCK}),
    "dream": (dream_loss, {"bos_id": 1}),
}


def batch(rows, objective, numbers=None):
    """The batch of all rows, collated as the trainer does."""
    block_size = BLOCK if objective == "bd3lm" else None
    collator = DiffusionCollator(tokenizer(), block_size=block_size, train_padding=block_size is not None)
    numbers = range(len(rows)) if numbers is None else numbers
    return collator([{**row, "example_id": n} for row, n in zip(rows, numbers, strict=True)])


@pytest.mark.parametrize("objective", LOSSES)
def test_a_step_takes_the_gradient_of_the_loss_of_the_whole_batch(objective, tmp_path):
    function, options = LOSSES[objective]
    kept = Gradients()
    trained = trainer(tmp_path, objective, callbacks=[kept], noise_seed=5, per_device_train_batch_size=2,
                      gradient_accumulation_steps=4)  # fmt: skip
    model = copy.deepcopy(trained.model)
    trained.train()
    output = function(model.train(), **batch(examples(), objective), mask_id=MASK, seed=5, epoch=0, **options)
    output.loss.backward()
    assert losses(trained) == [pytest.approx(output.loss.item(), rel=1e-5)]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(kept.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_noise_is_keyed_by_the_number_of_the_example_and_the_epoch(tmp_path):
    trained = trainer(tmp_path, noise_seed=3, num_train_epochs=2, max_steps=-1, learning_rate=0.0)
    model = copy.deepcopy(trained.model)
    trained.train()
    rows = batch(examples(), "mdlm")
    expected = [mdlm_loss(model, **rows, mask_id=MASK, seed=3, epoch=e).loss.item() for e in (0, 1)]
    assert losses(trained) == pytest.approx(expected, rel=1e-5)
    assert not math.isclose(*expected, rel_tol=1e-3)


def test_an_example_keeps_a_number_of_its_own(tmp_path):
    rows = [{**row, "example_id": 100 + index} for index, row in enumerate(examples())]
    trained = trainer(tmp_path, rows=rows)
    model = copy.deepcopy(trained.model)
    trained.train()
    of_numbers = batch(examples(), "mdlm", range(100, 108))
    expected = mdlm_loss(model, **of_numbers, mask_id=MASK).loss.item()
    assert losses(trained) == pytest.approx([expected], rel=1e-5)


def test_every_example_is_seen_once_an_epoch_in_an_order_of_its_own(tmp_path):
    seen = []

    class Kept(DiffusionCollator):
        def __call__(self, rows):
            seen.append([row["example_id"] for row in rows])
            return super().__call__(rows)

    options = dict(per_device_train_batch_size=3, num_train_epochs=2, max_steps=-1)
    trainer(tmp_path, rows=examples(10), collator=Kept(tokenizer()), **options).train()
    first, second = [*chain(*seen[:4])], [*chain(*seen[4:])]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


@pytest.mark.parametrize("objective", LOSSES)
def test_meters_are_the_bound_and_cross_entropies_of_the_loss(objective, tmp_path):
    function, options = LOSSES[objective]
    trained = trainer(tmp_path, objective, learning_rate=0.0, max_steps=4, logging_steps=4, rows=examples(16))
    model = copy.deepcopy(trained.model)
    trained.train()
    entry = trained.state.log_history[0]
    rows = examples(16)
    outputs = [
        function(model, **batch(rows, objective), mask_id=MASK, epoch=epoch, **options) for epoch in (0, 1)
    ]
    nll = sum(float(o.nll_sum) for o in outputs) / sum(o.tokens for o in outputs)
    assert entry["nll"] == pytest.approx(nll, rel=1e-5)
    assert entry["ppl"] == pytest.approx(math.exp(nll), rel=1e-5)
    t, ce = torch.cat([o.t for o in outputs]), torch.cat([o.ce for o in outputs])
    for level in range(10):
        of_level = ce[(t * 10).floor() == level]
        if len(of_level):
            assert entry[f"ce_t{(level + 1) / 10}"] == pytest.approx(float(of_level.mean()), rel=1e-4)
        else:
            assert f"ce_t{(level + 1) / 10}" not in entry


@pytest.mark.parametrize("objective", LOSSES)
def test_evaluation_is_the_bound_and_does_not_depend_on_batches_or_training_options(objective, tmp_path):
    function, options = LOSSES[objective]
    rows = examples(7, seed=4)
    plain = trainer(tmp_path, objective, evaluated=rows, eval_noise_seed=9)
    other = trainer(
        tmp_path, objective, evaluated=rows, eval_noise_seed=9, per_device_eval_batch_size=2, noise_seed=77,
        loss_weight_type="uniform", loss_norm_type="batch", complementary=True, certainty_weight=2.0,
        weight_eps=1e-2,
    )  # fmt: skip
    found, again, of_other = (
        {
            k: v
            for k, v in one.evaluate().items()
            if k.startswith(("eval_loss", "eval_nll", "eval_ppl", "eval_ce"))
        }
        for one in (plain, plain, other)
    )
    output = function(plain.model, **batch(rows, objective), mask_id=MASK, seed=9, **options)
    assert found["eval_loss"] == found["eval_nll"] == pytest.approx(output.nll, rel=1e-5)
    assert again == found
    assert of_other == pytest.approx(found, rel=1e-4)


def test_cross_entropy_at_a_level_of_one_masks_every_trained_token(tmp_path):
    rows = examples(3, seed=4)
    trained = trainer(tmp_path, evaluated=rows)
    found = trained.evaluate()["eval_ce_t1.0"]
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        masked = ids.masked_fill(labels != -100, MASK)
        with dk.enable_attention(trained.model), torch.no_grad():
            logits = trained.model(masked).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    assert found == pytest.approx(total / count, rel=1e-5)


def test_evaluation_reads_streams_and_keeps_workers(tmp_path):
    rows = examples(5, seed=4)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    plain = trainer(tmp_path, evaluated=rows)
    workers = dict(dataloader_num_workers=2, dataloader_persistent_workers=True, per_device_eval_batch_size=2)
    for other in (trainer(tmp_path, evaluated=Stream()), trainer(tmp_path, evaluated=rows, **workers)):
        for _ in range(2):
            assert other.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_predict_reports_the_same_figures(tmp_path):
    trained = trainer(tmp_path, evaluated=examples(5, seed=4))
    output = trained.predict(examples(5, seed=4))
    assert output.predictions is None
    assert output.metrics["test_loss"] == trained.evaluate()["eval_loss"]


def test_evaluation_of_several_datasets_names_each(tmp_path):
    datasets = {"short": examples(3, seed=1), "other": examples(4, seed=2)}
    metrics = trainer(tmp_path, evaluated=datasets).evaluate()
    assert {"eval_short_loss", "eval_other_loss", "eval_other_ce_t0.5"} <= metrics.keys()


@pytest.mark.parametrize(
    "architecture, objective",
    [*(("llama", objective) for objective in LOSSES)]
    + [(name, "mdlm") for name in ("qwen2-windows", "gpt2", "qwen3-moe", "bert", "modernbert")],
)
def test_gradient_checkpointing_changes_nothing(architecture, objective, tmp_path):
    kept = Gradients(), Gradients()
    for of_one, recomputed in zip(kept, (False, True), strict=True):
        model = tiny(architecture, gain=2.0, attention="dllm")
        options = dict(callbacks=[of_one], gradient_checkpointing=recomputed)
        trainer(tmp_path, objective, model=model, **options).train()
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == recomputed
    for name, gradient in kept[0].steps[0].items():
        torch.testing.assert_close(kept[1].steps[0][name], gradient, rtol=1e-5, atol=1e-7)


def test_autocast_to_bfloat16_keeps_float32_weights(tmp_path):
    whole, half = trainer(tmp_path), trainer(tmp_path, bf16=True)
    whole.train(), half.train()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert losses(half) == pytest.approx(losses(whole), rel=2e-2)
    assert losses(half) != losses(whole)


def test_annealing_lets_queries_see_ahead_by_a_bound_that_grows(tmp_path, monkeypatch):
    reaches = []

    def objective(*args, reach, **options):
        reaches.append(reach)
        return mdlm_loss(*args, reach=reach, **options)

    monkeypatch.setattr(MDLMTrainer, "objective", staticmethod(objective))
    trainer(tmp_path, max_steps=40, annealing_steps=0.75, annealing_length=100).train()
    assert all(0 <= reach <= 100 * step / 30 for step, reach in enumerate(reaches[:30]))
    assert len(set(reaches[:30])) > 15
    assert reaches[30:] == [None] * 10


# ---- checkpoints -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("objective", LOSSES)
def test_every_checkpoint_loads_with_dk_load_and_with_transformers(architecture, objective, tmp_path):
    trained = trainer(
        tmp_path,
        objective,
        model=tiny(architecture, attention="dllm"),
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    trained.train()
    trained.save_model(tmp_path / "final")
    for folder in ("checkpoint-1", "checkpoint-2", "final"):
        model, words = dk.load(tmp_path / folder)
        assert model.config.mask_token_id == words.mask_token_id == MASK
        diffusion = model.config.diffusion
        assert diffusion["attention"] == ["block_causal" if objective == "bd3lm" else "bidirectional"]
        assert diffusion["shift"] == (objective == "dream")
        assert diffusion.get("block_size") == (BLOCK if objective == "bd3lm" else None)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert AutoTokenizer.from_pretrained(tmp_path / folder).mask_token_id == MASK
        for name, weight in model.state_dict().items():
            assert torch.equal(plain.state_dict()[name], weight)
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    dk.sample(model, [[5, 6, 7]], max_new_tokens=8, block_size=BLOCK)


def test_checkpoints_of_adapters_load_with_dk_load_and_with_peft(tmp_path):
    base = tiny("llama", gain=2.0)
    base.config.diffusion, base.config.mask_token_id = {"attention": ["bidirectional"]}, MASK
    dk.save(base, tokenizer(), tmp_path / "base")
    model = get_model(ModelArguments(str(tmp_path / "base"), lora=True, r=2, lora_dropout=0.0))
    trained = trainer(tmp_path / "run", model=model, max_steps=2, save_strategy="steps", save_steps=1)
    trained.train()
    trained.save_model(tmp_path / "final")
    ids = torch.tensor([[5, 6, 7, MASK, 9]])
    with torch.no_grad():
        expected = trained.model.eval()(ids).logits
    for folder in ("run/checkpoint-2", "final"):
        assert not (tmp_path / folder / "config.json").exists()
        merged, words = dk.load(tmp_path / folder)
        plain = PeftModel.from_pretrained(dk.load(tmp_path / "base")[0], tmp_path / folder)
        assert words.mask_token_id == MASK
        for found in (merged, plain):
            torch.testing.assert_close(found(ids).logits, expected)
    first = dk.load(tmp_path / "run" / "checkpoint-1")[0]
    assert not torch.equal(first(ids).logits, merged(ids).logits)


def test_an_adapter_whose_checkpoint_could_not_say_what_was_trained_is_refused(tmp_path):
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"would change to \{'attention': \['bidirectional'\]\}"):
        trainer(tmp_path, model=adapted)
    adapted = get_peft_model(
        marked(attention=["block_causal"], block_size=16), LoraConfig(target_modules="all-linear")
    )
    with pytest.raises(ValueError, match=r"would change to \{'block_size': 4\}"), pytest.warns(UserWarning):
        trainer(tmp_path, "bd3lm", model=adapted)


def test_a_save_that_ends_early_leaves_the_model_of_before(tmp_path, monkeypatch):
    trained = trainer(tmp_path)
    trained.save_model(tmp_path / "final")
    before = dk.load(tmp_path / "final")[0].state_dict()
    trained.train()

    def out_of_space(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(trained.processing_class, "save_pretrained", out_of_space)
    with pytest.raises(OSError, match="no space left"):
        trained.save_model(tmp_path / "final")
    for name, weight in dk.load(tmp_path / "final")[0].state_dict().items():
        assert torch.equal(weight, before[name])


# ---- losses that are not finite ----------------------------------------------------------------------------
@pytest.fixture
def poisoned(monkeypatch):
    """The loss of example 5, and so its gradient, is NaN; it is in the third batch of two."""

    def objective(model, *, example_ids, **options):
        output = mdlm_loss(model, example_ids=example_ids, **options)
        spoilt = math.nan if 5 in example_ids.tolist() else 1.0
        return replace(output, loss=output.loss * spoilt, nll_sum=output.nll_sum * spoilt)

    monkeypatch.setattr(MDLMTrainer, "objective", staticmethod(objective))
    options = dict(train_sampling_strategy="sequential", per_device_train_batch_size=2, max_steps=4)
    return lambda folder, **others: trainer(folder, **{**options, **others})


@pytest.mark.parametrize("logging_steps", [1, 3, 100])
def test_a_loss_that_is_not_finite_stops_the_run_by_step_and_examples(logging_steps, poisoned, tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss of step 3 is nan, on examples \[4, 5\]"):
        poisoned(tmp_path, logging_steps=logging_steps).train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trained = trainer(tmp_path)
    with torch.no_grad():
        trained.model.lm_head.weight[3, 2] = math.inf
    with pytest.raises(FloatingPointError, match=r"lm_head.weight has weights that are not finite"):
        trained.save_model(tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_nothing_is_saved_after_a_loss_that_is_not_finite(poisoned, tmp_path):
    with pytest.raises(FloatingPointError, match="step 3"):
        poisoned(tmp_path, logging_steps=100, save_strategy="steps", save_steps=2).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_an_evaluation_that_is_not_finite_names_its_examples(poisoned, tmp_path):
    trained = poisoned(tmp_path, evaluated=examples(7), per_device_eval_batch_size=3)
    with pytest.raises(FloatingPointError, match=r"evaluation of step 0 is nan, on examples \[3, 4, 5\]"):
        trained.evaluate()


# ---- what is refused ---------------------------------------------------------------------------------------
def marked(**entry):
    model = tiny("llama", attention="dllm")
    model.config.diffusion, model.config.mask_token_id = entry, MASK
    return model


class NoWords:
    eos_token_id, bos_token_id, mask_token_id = 2, 1, None


REFUSALS = {
    "the objective of another attention": (
        lambda f: trainer(f, "bd3lm", model=marked(attention=["bidirectional"])),
        r"BD3LMTrainer trains block_causal .* config.diffusion of the model says \['bidirectional'\]",
    ),
    "block-causal models with MDLM": (
        lambda f: trainer(f, "mdlm", model=marked(attention=["block_causal"], block_size=4)),
        "MDLMTrainer trains bidirectional attention",
    ),
    "another shift": (
        lambda f: trainer(f, model=marked(attention=["bidirectional"], shift=True), shift=False),
        "shift is False, and config.diffusion of the model says True",
    ),
    "two mask tokens": (
        lambda f: trainer(f, mask_id=46), "mask_id is 46, mask_token_id of the tokenizer is 47",
    ),
    "no mask token": (
        lambda f: MDLMTrainer(tiny("llama"), trainer(f).args, processing_class=NoWords()),
        "no mask token is known",
    ),
    "no examples": (lambda f: trainer(f, rows=[]), "train_dataset is empty"),
    "no examples to evaluate": (lambda f: trainer(f, evaluated={"a": []}), r"eval_dataset\['a'\] is empty"),
    "a missing field": (
        lambda f: trainer(f, rows=[{"text": "a"}]), "example 0 of train_dataset has no field 'input_ids'",
    ),
    "dropout of attention": (
        lambda f: trainer(f, model=tiny("llama", attention="dllm", attention_dropout=0.1)),
        "attention_dropout of this LlamaForCausalLM is 0.1",
    ),
    "metrics of logits": (
        lambda f: MDLMTrainer(
            tiny("llama"), trainer(f).args, processing_class=tokenizer(), compute_metrics=len
        ),
        "compute_metrics is not supported",
    ),
    "blocks in MDLM": (lambda f: trainer(f, block_size=8), "block_size is 8; it has a meaning for BD3LM"),
    "context weights in MDLM": (
        lambda f: trainer(f, loss_weight_type="cart"), "loss_weight_type is 'cart'; it has a meaning for D",
    ),
    "their decay in MDLM": (lambda f: trainer(f, cart_p=0.5), "cart_p is 0.5; it has a meaning for Dream"),
    "their decay without them": (
        lambda f: trainer(f, "dream", cart_p=0.5, loss_weight_type="uniform"), "cart_p is 0.5",
    ),
    "times of blocks in MDLM": (lambda f: trainer(f, time_per="row"), "time_per is 'row'; .* for BD3LM"),
    "BOS outside of the vocabulary": (
        lambda f: trainer(f, bos_id=48), r"bos_id must lie in 0\.\.47, got 48",
    ),
    "lengths of a stream": (
        lambda f: trainer(
            f, rows=datasets.Dataset.from_list(examples()).to_iterable_dataset(),
            train_sampling_strategy="group_by_length",
        ).train(),
        "train_sampling_strategy is 'group_by_length', and train_dataset is a stream",
    ),
    "labels that are all ignored": (
        lambda f: trainer(f, evaluated=[{"input_ids": [5, 6], "labels": [-100, -100]}]).evaluate(),
        "eval_loss has no value: no example of this dataset has a token with a label",
    ),
    "annealing of blocks": (
        lambda f: trainer(f, "bd3lm", annealing_steps=3, annealing_length=9), "annealing_steps is 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_contradictions_are_refused_by_name(case, tmp_path):
    refused, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        refused(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [iter(examples()), {"train": examples()}, datasets.DatasetDict(a=datasets.Dataset.from_list(examples()))],
)
def test_what_is_no_single_dataset_is_refused(rows, tmp_path):
    with pytest.raises(TypeError, match=f"train_dataset is a {type(rows).__name__}; expected one split"):
        trainer(tmp_path, rows=rows)


def test_steps_without_labels_are_told(tmp_path, caplog):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8
    trainer(tmp_path, rows=rows, max_steps=2).train()
    assert "no example had a label in the steps before step 2" in caplog.text


@pytest.mark.parametrize("role", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_a_mask_token_with_another_role_is_refused(role, tmp_path):
    model = tiny("llama", **{role: MASK})
    with pytest.raises(ValueError, match=f"which is the {role} too"):
        trainer(tmp_path, model=model)


def test_a_mask_token_outside_the_vocabulary_is_refused(tmp_path):
    model = tiny("llama", vocab_size=MASK)
    with pytest.raises(ValueError, match=r"mask_token_id of the tokenizer must lie in 0\.\.46, got 47"):
        trainer(tmp_path, model=model)


def test_a_missing_field_of_a_later_example_is_named(tmp_path):
    rows = [*examples(3), {"text": "a"}]
    with pytest.raises(ValueError, match="example 3 of train_dataset has no field 'input_ids'"):
        trainer(tmp_path, rows=rows).train()


def test_the_base_class_has_no_objective(tmp_path):
    with pytest.raises(TypeError, match="use MDLMTrainer, BD3LMTrainer or DreamTrainer"):
        DiffusionTrainer(tiny("llama"))


def test_a_batch_without_numbers_is_refused(tmp_path):
    collator = DiffusionCollator(tokenizer())
    without = lambda rows: {k: v for k, v in collator(rows).items() if k != "example_ids"}  # noqa: E731
    with pytest.raises(ValueError, match="has no example_ids"):
        trainer(tmp_path, collator=without).train()


def test_a_new_block_size_is_taken_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="block_size is 4, and the model was trained with 16"):
        trained = trainer(tmp_path, "bd3lm", model=marked(attention=["block_causal"], block_size=16))
    assert trained.model.config.diffusion["block_size"] == 4


def test_settings_are_read_from_the_model(tmp_path):
    entry = dict(attention=["bidirectional", "block_causal"], block_size=16, shift=True)
    trained = trainer(tmp_path, "bd3lm", model=marked(**entry), block_size=None)
    assert (trained.settings.block_size, trained.settings.shift, trained.settings.mask_id) == (16, True, MASK)
    assert trained.settings.bos_id == 1
    assert trained.model.config.diffusion == {**entry, "attention": ["block_causal", "bidirectional"]}


def test_stored_weights_are_not_trained(tmp_path):
    model = marked(attention=["bidirectional"], shift=False)
    assert store_weights(model, "int8")
    with pytest.raises(
        ValueError, match=r"weights of this LlamaForCausalLM are stored for .*\(model\.layers\.0"
    ):
        trainer(tmp_path, model=model)
    options = dict(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"stored for inference \(.*down_proj\.modules_to_save\.default"):
        adapters = LoraConfig(**options, modules_to_save=["down_proj"])
        trainer(tmp_path, model=get_peft_model(copy.deepcopy(model), adapters))
    trained = trainer(tmp_path, model=get_peft_model(model, LoraConfig(**options)))
    assert {name for name, weight in trained.model.named_parameters() if weight.requires_grad}


def test_a_head_that_copies_the_embedding_is_not_trained(tmp_path):
    model = tiny("qwen3")
    assert store_tied_head(model, "int8")
    with pytest.raises(ValueError, match="vocabulary head of this Qwen3ForCausalLM is an 8-bit copy of its"):
        trainer(tmp_path, model=model)
