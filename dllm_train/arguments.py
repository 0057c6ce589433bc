"""Arguments of training scripts for HfArgumentParser (command line, YAML, JSON), and what they load.

parser = HfArgumentParser((ModelArguments, DataArguments, DiffusionTrainingArguments))
model_args, data_args, training_args = parser.parse_args_into_dataclasses()
model, tokenizer = get_model(model_args), get_tokenizer(model_args)
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import TrainingArguments

from dllm_train.meters import LEVELS, level_of

_DTYPES = ("float32", "bfloat16", "float16")


def _option(default, help: str, **metadata):
    """Return a dataclass field; lists get a copy of their own."""
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """The model to train, and how it is loaded."""

    model_name_or_path: str = _option(
        "tiny-python",
        "Folder of a diffusion checkpoint, a hub name, or 'tiny-python' (see dllm_train.convert).",
    )
    dtype: str = _option(
        "float32", "Type of the weights. --bf16 computes in bfloat16 over float32 weights.", choices=_DTYPES
    )
    attn_implementation: str = _option(
        "dllm", "Attention: 'dllm' (skips what masks hide), 'sdpa', 'eager', 'flex_attention'."
    )
    lora: bool = _option(False, "Train LoRA adapters in place of the weights.")
    r: int = _option(32, "Rank of the adapters.")
    lora_alpha: int = _option(64, "Scale of the adapters is lora_alpha / r.")
    lora_dropout: float = _option(0.05, "Dropout on the input of the adapters.")
    target_modules: str = _option(
        "all-linear", "Modules with adapters: 'all-linear', or names separated by commas."
    )
    load_in_4bit: bool = _option(
        False, "Hold the frozen weights in 4 bits (QLoRA); needs --lora and bitsandbytes."
    )

    def __post_init__(self):
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(map(repr, _DTYPES))}")
        if self.r < 1:
            raise ValueError(f"r is {self.r}; expected a rank of at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; expected 0 <= lora_dropout < 1")
        if self.load_in_4bit and not self.lora:
            raise ValueError("load_in_4bit is True without lora: weights in 4 bits are frozen. Set lora too")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError("load_in_4bit needs the package bitsandbytes, which is not installed")


@dataclass
class DataArguments:
    """The training text, and how rows are made of it."""

    dataset: str = _option(
        "", "Specification: 'name[train:5000,test:100]+other', local files, or weights '0.7*a+0.3*b'."
    )
    text_field: str = _option("text", "Field that holds the text of a document.")
    max_length: int = _option(1024, "Longest row, in tokens; that of the folder with preprocessed.")
    packing: bool = _option(
        False,
        "Pretraining: the documents of a row do not see each other; False: they are concatenated.",
    )
    drop_tail: bool = _option(False, "Pretraining: leave out the last row if it is shorter than max_length.")
    truncation: str = _option(
        "right",
        "Fine-tuning: 'right' cuts the end of longer rows, 'filter' leaves them out, 'error' refuses them.",
        choices=("right", "filter", "error"),
    )
    chat: str = _option(
        "auto",
        "Fine-tuning: 'template' is the tokenizer's chat template; 'plain' puts the reply after the prompt; "
        "'auto': the template if there is one.",
        choices=("auto", "template", "plain"),
    )
    train_on: str = _option(
        "all", "Replies that are trained in a conversation: 'all' or 'last'.", choices=("all", "last")
    )
    train_padding: bool = _option(True, "Train the end tokens that fill a row up.")
    pad_to_multiple_of: int | None = _option(
        None, "Fill rows with end tokens to a multiple of this; None: of the block, or of 32 without blocks."
    )
    streaming: bool = _option(False, "Read the data while training, without preparing it on disk first.")
    shuffle_buffer: int = _option(
        0, "With streaming, training rows are drawn from a buffer of this many; 0: in their order."
    )
    num_proc: int | None = _option(None, "Processes that tokenize.")
    preprocessed: str | None = _option(
        None, "Folder that dllm_train's preprocessing wrote; takes the place of dataset."
    )
    insert_bos: bool = _option(False, "Put the BOS token before every document that does not begin with it.")
    insert_eos: bool = _option(True, "Put the end token after every document.")
    random_truncation: float = _option(
        0.0, "Probability of cutting a row to a random length (LLaDA's pretraining: 0.01)."
    )
    response_crop: float = _option(0.0, "Probability of cutting a response at a random length (Dream's SFT).")
    batch_response_crop: bool = _option(
        False, "Cut all responses of a batch to the length of one of them (Dream's SFT, perbatch_cutoff)."
    )


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments and every option of the losses, by the loss's own keyword."""

    # Noise
    schedule: str = _option("linear", "Noise schedule.", choices=("linear", "cosine"))
    eps: float = _option(1e-3, "Earliest time, t lies in [eps, 1) (dLLM: time_epsilon).")
    stratified: bool = _option(True, "Spread times evenly over consecutive examples (antithetic).")
    noise_seed: int = _option(0, "Seed of times and masks, with the example and the epoch.")
    time_per: str = _option("block", "What shares one t in BD3LM.", choices=("block", "row"))
    complementary: bool = _option(False, "Take every example twice, the second time with its mask inverted.")
    # Loss
    loss_weight_type: str | None = _option(
        None,
        "Weight of a masked token: 'scheduler' w(t), 'uniform' 1, 'cart' context (Dream's default); "
        "None: the objective's default.",
    )
    loss_norm_type: str = _option(
        "token", "What the loss is a mean over, in the global batch.", choices=("token", "sequence", "batch")
    )
    weight_eps: float = _option(0.0, "Added to the denominator of w(t) (dLLM: 1e-6).")
    bar_mask_token: bool = _option(False, "Leave the mask token out of the softmax.")
    certainty_weight: float = _option(
        0.0, "Weight of the entropy of tokens that are already right (dParallel)."
    )
    certainty_temperature: float = _option(1.0, "Temperature of that entropy.")
    cart_p: float = _option(0.3, "Decay of Dream's context weights.")
    ar_weight: float = _option(
        0.0, "Weight of next-token prediction on BD3LM's clean half; needs clean='causal'."
    )
    # Prediction
    block_size: int | None = _option(None, "Tokens that BD3LM denoises together; None: the model's, or 32.")
    clean: str = _option(
        "block_causal", "Attention of BD3LM's clean half.", choices=("block_causal", "causal")
    )
    shift: bool | None = _option(
        None, "Position i is predicted from i - 1 (dLLM: right_shift_logits); None: as the model says."
    )
    mask_id: int | None = _option(None, "The mask token; None: the model's, or the tokenizer's.")
    bos_id: int | None = _option(
        None, "The token before a row when shift needs one; None: the model's, or the tokenizer's."
    )
    annealing_steps: float = _option(
        0, "Steps over which attention grows from causal to full; below 1: share of all steps."
    )
    annealing_length: int | None = _option(
        None, "How far ahead queries see at the end of that growth: the length of rows."
    )
    # Memory
    selective_checkpointing: bool = _option(
        False,
        "Keep matrix products and attention for the backward pass, and recompute the rest of each layer; "
        "takes the place of gradient_checkpointing, which recomputes all.",
    )
    fused_layers: bool = _option(
        False,
        "Compute norms, rotations and gated MLPs of the model by single operators that keep their inputs "
        "alone for the backward pass (dk.fuse_layers).",
    )
    # Evaluation
    eval_noise_seed: int = _option(0, "Seed of times and masks in evaluation, the same every time.")
    eval_noise_levels: list[float] = field(
        default_factory=lambda: [level / LEVELS for level in range(1, LEVELS + 1)],
        metadata={
            "help": "Noise levels, in tenths, at which evaluation reports the cross entropy. Each costs "
            "one more forward; none: the bound alone."
        },
    )
    # Defaults of transformers that would drop inputs of the losses, or wait for the device in every step
    remove_unused_columns: bool = _option(
        False, "Must be False: the losses need columns that no model's forward has."
    )
    logging_nan_inf_filter: bool = _option(False, "Must be False: a loss that is not finite stops the run.")

    def __post_init__(self):
        greater_is_better = self.greater_is_better
        super().__post_init__()
        if _is_of_evaluation(self.metric_for_best_model):
            if greater_is_better:
                raise ValueError(
                    f"greater_is_better is True; {self.metric_for_best_model} is the better the lower it is"
                )
            self.greater_is_better = False  # transformers takes what does not end in "loss" for a score
        if self.data_seed is None:
            self.data_seed = self.seed
        self._check_values()
        self._refuse_without_effect()

    def _check_values(self):
        for name, low, strict in (
            ("weight_eps", 0, False), ("certainty_weight", 0, False), ("certainty_temperature", 0, True),
            ("ar_weight", 0, False), ("annealing_steps", 0, False), ("noise_seed", 0, False),
            ("eval_noise_seed", 0, False), ("block_size", 1, False), ("annealing_length", 1, False),
            ("per_device_train_batch_size", 1, False), ("per_device_eval_batch_size", 1, False),
            ("gradient_accumulation_steps", 1, False),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value < low or (strict and value == low)):
                raise ValueError(
                    f"{name} is {value}; expected a number {'above' if strict else 'of at least'} {low}"
                )
        for name in ("noise_seed", "eval_noise_seed"):
            if getattr(self, name) >= 2**64:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number below 2**64")
        if self.max_steps == 0:
            raise ValueError("max_steps is 0; expected a positive number, or -1 for whole epochs")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps is {self.eps}; expected 0 < eps < 1")
        if not 0 < self.cart_p <= 1:
            raise ValueError(f"cart_p is {self.cart_p}; expected 0 < cart_p <= 1")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(map(repr, allowed))}"
                )
        if self.ar_weight and self.clean != "causal":
            raise ValueError(
                f"ar_weight is {self.ar_weight}, and clean is {self.clean!r}; next tokens need clean='causal'"
            )
        if self.annealing_steps and self.annealing_length is None:
            raise ValueError(
                f"annealing_length is None, and annealing_steps is {self.annealing_steps}; give the length "
                "of rows"
            )
        if self.annealing_length is not None and not self.annealing_steps:
            raise ValueError(
                f"annealing_length is {self.annealing_length}, and annealing_steps is 0: nothing is annealed"
            )
        if self.certainty_temperature != 1 and not self.certainty_weight:
            raise ValueError(
                f"certainty_temperature is {self.certainty_temperature}, and certainty_weight is 0: nothing "
                "takes it"
            )
        for level in self.eval_noise_levels:
            level_of(level)

    def _refuse_without_effect(self):
        """Refuse options of transformers that would be ignored, or would silently change the result."""
        accelerator = self.accelerator_config
        refused = {
            "remove_unused_columns": (
                self.remove_unused_columns, "the losses need columns that no forward has",
            ),
            "logging_nan_inf_filter": (
                self.logging_nan_inf_filter, "a loss that is not finite stops the run",
            ),
            "label_smoothing_factor": (self.label_smoothing_factor, "the losses have no label smoothing"),
            "accelerator_config.split_batches": (
                accelerator.split_batches, "batch sizes are those of one rank",
            ),
            "accelerator_config.dispatch_batches": (
                accelerator.dispatch_batches, "every rank reads its own batches",
            ),
            "dataloader_in_order=False": (
                not self.dataloader_in_order, "batches come in the order of the run",
            ),
            "train_sampling_strategy='batch_rebalance'": (
                self.train_sampling_strategy == "batch_rebalance", "use 'group_by_length'",
            ),
            "fp16=True on a CPU": (
                self.fp16 and self.device.type == "cpu", "accelerate would compute in float32; use bf16",
            ),
            "gradient_checkpointing beside selective_checkpointing": (
                self.gradient_checkpointing and self.selective_checkpointing, "choose one of them",
            ),
            "n_gpu > 1": (
                self.n_gpu > 1,
                "one process would use DataParallel; start one for each GPU with torchrun, or set "
                "CUDA_VISIBLE_DEVICES",
            ),
        }  # fmt: skip
        for name, (value, reason) in refused.items():
            if value:
                raise ValueError(f"{name} is not supported: {reason}")


def _is_of_evaluation(metric: str | None) -> bool:
    """Return whether a metric is one of DiffusionTrainer's, such as nll, or eval_short_nll of a dataset."""
    return metric is not None and re.fullmatch(r"(.*_)?(loss|nll|ppl|ce_t[01]\.\d)", metric) is not None


_CHOICES = {
    "schedule": ("linear", "cosine"),
    "time_per": ("block", "row"),
    "loss_weight_type": (None, "scheduler", "uniform", "cart"),
    "loss_norm_type": ("token", "sequence", "batch"),
    "clean": ("block_causal", "causal"),
}


def get_model(model_args: ModelArguments):
    """Return the model to train, on the CPU (4 bits: where bitsandbytes puts it), with adapters if `lora`."""
    if model_args.load_in_4bit:
        model = _model_in_4_bits(model_args)
    else:
        import dllm_kernels as dk

        model, _ = dk.load(
            model_args.model_name_or_path, device="cpu", dtype=getattr(torch, model_args.dtype)
        )
    model.set_attn_implementation(model_args.attn_implementation)
    return _with_adapters(model, model_args) if model_args.lora else model


def get_tokenizer(model_args: ModelArguments):
    """Return the tokenizer of the checkpoint, without reading its weights; ValueError if it has none."""
    from dllm_kernels.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(model_args.model_name_or_path)
    if tokenizer is None:
        raise ValueError(f"{model_args.model_name_or_path} has no tokenizer; save one into it")
    return tokenizer


def get_sampler(model_args: ModelArguments, model=None, tokenizer=None) -> "Sampler":
    """Return a Sampler of `model` and `tokenizer`; None loads the one of `model_args`."""
    model = get_model(model_args) if model is None else model
    return Sampler(model, get_tokenizer(model_args) if tokenizer is None else tokenizer)


@dataclass(frozen=True)
class Sampler:
    """`dk.sample` and `dk.infill` of one model, or function of ids, and its tokenizer, in eval mode."""

    model: torch.nn.Module | Callable
    tokenizer: object

    def sample(self, prompts, config=None, **overrides):
        """Return `dk.sample(model, prompts, ...)`, a SampleOutput."""
        return self._run("sample", prompts, config, overrides)

    def infill(self, canvases, config=None, **overrides):
        """Return `dk.infill(model, canvases, ...)`, a SampleOutput."""
        return self._run("infill", canvases, config, overrides)

    def _run(self, function: str, given, config, overrides):
        import dllm_kernels as dk

        run = partial(getattr(dk, function), self.model, given, tokenizer=self.tokenizer, config=config)
        if not isinstance(self.model, torch.nn.Module):
            return run(**overrides)
        training = self.model.training
        self.model.eval()
        try:
            return run(**overrides)
        finally:
            self.model.train(training)


def _with_adapters(model, model_args: ModelArguments):
    from peft import LoraConfig, get_peft_model

    from dllm_kernels.models.stored_weights import StoredLinear

    targets = [name.strip() for name in model_args.target_modules.split(",")]
    name = model_args.model_name_or_path
    if targets == ["all-linear"] and any(isinstance(module, StoredLinear) for module in model.modules()):
        raise ValueError(
            f"lora is True, and {name} stores the weights of its linear layers for inference, which take no "
            "adapters; name a checkpoint of whole weights"
        )
    model.name_or_path = (
        str(Path(name).resolve()) if Path(name).is_dir() else name
    )  # peft stores where its base lies
    return get_peft_model(
        model,
        LoraConfig(
            r=model_args.r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
        ),
    )


def _model_in_4_bits(model_args: ModelArguments):
    from peft import prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from dllm_kernels.models.checkpoint import checkpoint_folder

    folder = checkpoint_folder(model_args.model_name_or_path)
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} cannot be loaded in 4 bits: its weights are quantized already")
    if not getattr(config, "diffusion", None):
        raise ValueError(
            f"{folder} cannot be loaded in 4 bits: it is not a stock causal LM with a diffusion entry in "
            "config.json; convert it first (dllm_train.convert)"
        )
    dtype = getattr(torch, model_args.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
