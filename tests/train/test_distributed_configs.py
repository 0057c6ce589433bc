"""The configurations for `accelerate launch` say what accelerate, torch and DeepSpeed read in them."""

import os
import runpy
import sys

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    patch_environment,
)

from dllm_train.configs import NAMES, config_path

ZERO = ("zero1", "zero2", "zero3")


@pytest.fixture
def launched(monkeypatch):
    """A function of a configuration and options: the arguments and environment that torchrun is given."""
    seen = []
    monkeypatch.setattr(
        torch.distributed.run, "run", lambda arguments: seen.append((arguments, dict(os.environ)))
    )

    def launch(name, *options):
        if name in ZERO:
            pytest.importorskip("deepspeed")
        command = ["--config_file", str(config_path(name)), "--main_process_port", "0", *options, "train.py"]
        launch_command(launch_command_parser().parse_args(command))
        return seen.pop()

    return launch


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_entry(name):
    config = load_config_from_file(str(config_path(name)))
    written = yaml.safe_load(config_path(name).read_text())
    for entry, value in written.items():
        assert getattr(config, entry) == value, entry


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("cpu", "MULTI_GPU"), ("fsdp2", "FSDP")] + [(name, "DEEPSPEED") for name in ZERO],
)
def test_each_is_of_its_kind(name, kind):
    assert load_config_from_file(str(config_path(name))).distributed_type == DistributedType(kind)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_sets_the_number_of_processes(launched, name):
    assert launched(name, "--num_processes", "3")[0].nproc_per_node == "3"


@pytest.mark.parametrize("name", NAMES)
def test_precision_is_left_to_the_recipe(launched, name):
    assert launched(name)[1]["ACCELERATE_MIXED_PRECISION"] == "no"


def test_fsdp2_is_fully_shard_with_whole_checkpoints(launched):
    with patch_environment(**launched("fsdp2")[1]):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_accepts_the_zero_configurations(launched, name):
    environment = launched(name)[1]
    from deepspeed.runtime.config import DeepSpeedConfig

    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
    entries = plugin.deepspeed_config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    config = DeepSpeedConfig({key: value for key, value in entries.items() if value != "auto"})
    assert config.zero_optimization_stage == int(name[-1])
    assert (
        config.zero_config.offload_optimizer is None or config.zero_config.offload_optimizer.device == "none"
    )
    assert config.zero_config.gather_16bit_weights_on_model_save == (name == "zero3")


def run_module(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dllm_train.configs", *arguments])
    runpy.run_module("dllm_train.configs", run_name="__main__")


def test_paths_are_printed_for_the_command_line(monkeypatch, capsys):
    for name in NAMES:
        run_module(monkeypatch, name)
        assert capsys.readouterr().out == f"{config_path(name)}\n"


@pytest.mark.parametrize("names", [["zero4"], [], ["ddp", "cpu"]])
def test_other_names_are_refused_in_one_line(monkeypatch, names):
    with pytest.raises(SystemExit) as refusal:
        run_module(monkeypatch, *names)
    assert "\n" not in refusal.value.code
