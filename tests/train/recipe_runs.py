"""Runs of the recipes on several processes with gloo, many runs in one launch, and tiny inputs for them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dllm_kernels as dk
from dllm_train.configs import config_path
from tests.process_groups import end_together
from tests.train.tiny_models import tiny

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_tokenizer(folder: Path, mask_token: str | None = "<mask>") -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: ids 0 to 255, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        **dict(bos_token="<bos>", eos_token="<end>", pad_token="<pad>", mask_token=mask_token),
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_checkpoint(
    folder: Path, architecture="llama", attention="bidirectional", shift=False, **entries
) -> Path:
    """A random model of 2 layers that `dk.load` reads, with its tokenizer."""
    tokenizer = write_tokenizer(folder)
    model = tiny(
        architecture, vocab_size=len(tokenizer), max_position_embeddings=128, gain=1.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **entries,
    )  # fmt: skip
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.diffusion = {"attention": [attention], "block_size": 8, "shift": shift}
    dk.save(model, tokenizer, folder)
    return folder


def write_chat(file: Path, rows: int = 16) -> Path:
    """Prompts and replies of several lengths."""
    examples = [
        {"prompt": f"{n} + {n * n} =", "response": "x" * (n % 5) + str(n + n * n)} for n in range(rows)
    ]
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return file


def write_documents(file: Path, rows: int = 24) -> Path:
    """Texts of several lengths."""
    texts = [f"{n}, {n + 1} and {n + 2}. " * (1 + n % 4) for n in range(rows)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def options(**given) -> list[str]:
    """Command-line options by name; tiny, silent runs unless they say otherwise."""
    defaults = dict(
        max_length=32, per_device_train_batch_size=2, report_to="none", save_strategy="no", disable_tqdm=True
    )
    return [f"--{name}={value}" for name, value in (defaults | given).items()]


def gradient_options(**given) -> list[str]:
    """Options of one step of plain SGD at rate 1: the weights change by minus the gradient."""
    step = dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, max_steps=1)
    return options(logging_steps=1, **step, **given)


def environment(**changes) -> dict:
    return (
        os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        | changes
    )


def launcher(config: str | None = None, processes: int = 2) -> list[str]:
    """The beginning of a command that starts processes: torchrun, or accelerate with a configuration."""
    python = [sys.executable, "-m"]
    if config is None:
        return [*python, "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        *python, "accelerate.commands.launch", "--config_file", str(config_path(config)), "--num_processes",
        str(processes), "--main_process_port", "0",
    ]  # fmt: skip


def run_together(
    jobs: list[tuple[str, list[str]]], folder: Path, config: str | None = None, processes=2, **changes
):
    """Run recipes with their options, one after the other, in one launch of processes."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [*launcher(config, processes), "-m", "tests.train.recipe_runs", str(file)]
    done = subprocess.run(command, env=environment(**changes), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def facts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def history(run: Path) -> list[dict]:
    """Return the log of each step."""
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def shard_on_cpus() -> None:
    """Let accelerate take FSDP on CPUs, which it would turn into DistributedDataParallel without a word."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    training_args.is_torch_bf16_gpu_available = lambda: True

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    if sys.argv[1].endswith(".json"):
        from dllm_train.recipes import finetune, pretrain

        recipes = {"finetune": finetune.finetune, "pretrain": pretrain.pretrain}
        for name, arguments in json.loads(Path(sys.argv[1]).read_text()):
            recipes[name](arguments)
        end_together()
    else:  # the module of a recipe and its own arguments
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
