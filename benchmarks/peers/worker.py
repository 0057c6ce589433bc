"""Runs in a peer's own interpreter: imports its checkout, loads weights, samples and trains as it is asked.

    python worker.py NAME FOLDER    one JSON request per line in, {"result": ...} or {"error": ...} out

This file needs torch and safetensors besides what the checkout itself needs, and nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file


class LLaDA:
    """ML-GSAI/LLaDA, generate.py: it has no model of its own and runs the stock one without a causal mask."""

    def __init__(self, folder: Path):
        sys.path.insert(0, str(folder))
        self.generate = importlib.import_module("generate").generate

    def load(self, checkpoint: Path, attention: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = weighed(LlamaForCausalLM, LlamaConfig, checkpoint)
        for module in self.model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False

    def sample(self, sampler: str, prompt: list[int], new_tokens: int, block_size: int, mask_id: int):
        return self.generate(
            self.model,
            torch.tensor([prompt]),
            steps=new_tokens,
            gen_length=new_tokens,
            block_length=block_size,
            mask_id=mask_id,
        )


class FastDLLM:
    """NVlabs/Fast-dLLM, llada/generate.py with its model (in v1/ of later checkouts)."""

    def __init__(self, folder: Path):
        folders = [folder / "v1" / "llada", folder / "llada"]
        sys.path.insert(0, str(next(filter(Path.is_dir, folders), folder)))
        self.module = importlib.import_module("generate")

    def load(self, checkpoint: Path, attention: str) -> None:
        config = importlib.import_module("model.configuration_llada").LLaDAConfig
        self.model = weighed(self.module.LLaDAModelLM, config, checkpoint)

    def sample(self, sampler: str, prompt: list[int], new_tokens: int, block_size: int, mask_id: int):
        ids, _ = getattr(self.module, f"generate_with_{sampler.replace(' ', '_')}")(
            self.model,
            torch.tensor([prompt]),
            steps=new_tokens,
            gen_length=new_tokens,
            block_length=block_size,
            mask_id=mask_id,
        )
        return ids


class DLLM:
    """ZHZisZZ/dllm: its samplers and trainers with its models of LLaDA and of block-causal Qwen3."""

    def __init__(self, folder: Path):
        sys.path.insert(0, str(folder))
        # Without the __init__ of these packages, which import everything.
        pipelines = [f"dllm.pipelines{name}" for name in ("", ".llada", ".a2d", ".a2d.models")]
        for name in ("dllm", "dllm.core", "dllm.utils", *pipelines, "dllm.pipelines.a2d.models.qwen3"):
            package = sys.modules.setdefault(name, ModuleType(name))
            package.__path__ = [str(folder.joinpath(*name.split(".")))]
        self.samplers = importlib.import_module("dllm.core.samplers")

    def load(self, checkpoint: Path, attention: str) -> None:
        if attention == "bidirectional":
            models = importlib.import_module("dllm.pipelines.llada.models.modeling_llada")
            self.model = weighed(lambda config: _on_cpu(models, config), models.LLaDAConfig, checkpoint)
        else:
            models = importlib.import_module("dllm.pipelines.a2d.models.qwen3.modeling_qwen3")
            self.model = weighed(models.A2DQwen3LMHeadModel, models.A2DQwen3Config, checkpoint)

    def sample(self, sampler: str, prompt: list[int], new_tokens: int, block_size: int, mask_id: int):
        # No end token: it would end the completion, and the others here fill theirs.
        tokens = SimpleNamespace(mask_token_id=mask_id, bos_token_id=-1, eos_token_id=-1, pad_token_id=-1)
        config = getattr(self.samplers, f"{sampler}Config")
        options = config(max_new_tokens=new_tokens, block_size=block_size, steps=new_tokens)
        run = getattr(self.samplers, sampler)(model=self.model, tokenizer=tokens)
        return run.sample([torch.tensor(prompt)], options)

    def prepare_training(self, rows: list[list[int]], block_size: int | None, arguments: dict) -> None:
        """Make the trainer of `rows`, of MDLM where block_size is None, else of BD3LM; needs torchmetrics."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        trainers = importlib.import_module("dllm.core.trainers")
        trainers.MDLMConfig.group_by_length = False  # it asks for a field that transformers 5 no longer has
        options = {
            **arguments,
            "bf16": False,
            "eval_strategy": "no",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "remove_unused_columns": False,
        }
        if block_size is None:
            made, config = trainers.MDLMTrainer, trainers.MDLMConfig(**options)
        else:
            made, config = trainers.BD3LMTrainer, trainers.BD3LMConfig(**options, block_size=block_size)
        tokens = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<mask>": self.model.config.mask_token_id}))
        )
        tokens.mask_token, tokens.padding_side = "<mask>", "right"

        def stacked(items: list[dict]) -> dict:
            ids = torch.tensor([item["input_ids"] for item in items])
            return {"input_ids": ids, "labels": ids.clone()}

        self.trainer = made(
            model=self.model.train(),
            args=config,
            train_dataset=[{"input_ids": row} for row in rows],
            data_collator=stacked,
            processing_class=tokens,
        )

    def train(self) -> None:
        self.trainer.train()


ADAPTERS = {"llada": LLaDA, "fast-dllm": FastDLLM, "dllm": DLLM}


def _on_cpu(models: ModuleType, config) -> torch.nn.Module:
    """Return dLLM's LLaDA; made from its config alone it goes to a GPU, whether there is one or not."""
    inner = models.create_model_config_from_pretrained_config(config)
    inner.init_device = "cpu"
    return models.LLaDAModelLM(config, model=models.LLaDAModel(inner))


def weighed(make, config_class, checkpoint: Path) -> torch.nn.Module:
    """Return make(config) in float32 with the weights of `checkpoint`, every one of them and no others."""
    model = make(config_class.from_pretrained(checkpoint)).float()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return model.eval()


class Worker:
    """Requests of incoming lines: methods of this class, with arguments by name."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def load(self, checkpoint: str, attention: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.adapter = ADAPTERS[self.name](self.folder)
        self.adapter.load(Path(checkpoint), attention)

    def sample(self, **options) -> list[int]:
        """Return the prompt and its completion."""
        return self.adapter.sample(**options)[0].tolist()

    def prepare_training(self, **options) -> None:
        self.adapter.prepare_training(**options)

    def train(self) -> None:
        self.adapter.train()


def answered(worker: Worker, line: str) -> dict:
    request = json.loads(line)
    try:
        return {"result": getattr(worker, request.pop("do"))(**request)}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a checkout prints does not mix with the answers
    worker = Worker(sys.argv[1], Path(sys.argv[2]))
    for line in sys.stdin:
        answers.write(json.dumps(answered(worker, line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its names are not theirs
    main()
