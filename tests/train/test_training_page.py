"""The commands of docs/training.md run, with tiny models and datasets in place of those of the hub."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dllm_kernels.cli import app
from tests.train.recipe_runs import ROOT, environment, facts, run_together, write_checkpoint, write_tokenizer
from tests.train.saved_checkpoints import assert_loads
from tests.train.tiny_models import tiny
from tools.training_options import with_table

PAGE = (ROOT / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
# A run on a CPU of seconds; later options win.
SMALL = shlex.split(
    "--max_length 32 --max_steps 2 --num_train_epochs 1 --per_device_train_batch_size 2 --save_steps 1 "
    "--gradient_accumulation_steps 1 --report_to none --disable_tqdm True --eval_noise_levels 0.5"
)
# Recipes by the process that runs them.
ALONE = [command for command in COMMANDS if command[0] == "dllm"]
TOGETHER = [command for command in COMMANDS if command[0] in ("torchrun", "accelerate", "sbatch")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Local stand-ins by the names of the page."""
    folder = tmp_path_factory.mktemp("hub")
    for name, architecture in (("smollm2", "llama"), ("qwen3", "qwen3"), ("modernbert", "modernbert")):
        write_source(folder / name, architecture, "<mask>" if name == "modernbert" else None)
    instructions = [dict(instruction=f"Add {n}.", input="", output=str(n + n)) for n in range(80)]
    conversations = [
        {"messages": [dict(role="user", content=f"{n}?"), dict(role="assistant", content=f"{n}!")]}
        for n in range(40)
    ]
    for name, rows in (
        ("alpaca", instructions),
        ("chats", conversations),
        ("plays", [{"Text": "To be. " * 99}] * 9),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "HuggingFaceTB/SmolLM2-135M-Instruct": folder / "smollm2",
        "Qwen/Qwen3-0.6B": folder / "qwen3",
        "answerdotai/ModernBERT-base": folder / "modernbert",
        "GSAI-ML/LLaDA-8B-Base": write_checkpoint(folder / "llada"),
        "Dream-org/Dream-v0-Base-7B": write_checkpoint(folder / "dream", "qwen2", shift=True),
        "tatsu-lab/alpaca[train:2000,test:20]": f"{folder / 'alpaca.jsonl'}[train:60,test:8]",
        "tatsu-lab/alpaca": folder / "alpaca.jsonl",
        "allenai/tulu-3-sft-mixture": folder / "chats.jsonl",
        "HuggingFaceTB/smoltalk:all": folder / "chats.jsonl",
        "OpenCoder-LLM/opc-sft-stage2:educational_instruct": folder / "alpaca.jsonl",
        "Trelis/tiny-shakespeare": folder / "plays.jsonl",
        "dllm_train/configs": ROOT / "dllm_train" / "configs",
        "examples/slurm.sh": ROOT / "examples" / "slurm.sh",
    }


def write_source(folder, architecture, mask_token) -> Path:
    """A model of transformers and its tokenizer, as the hub has them."""
    tokenizer = write_tokenizer(folder, mask_token)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny(
        architecture, vocab_size=len(tokenizer), gain=1.0, max_position_embeddings=128, **ids
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(hub, tmp_path_factory):
    """The working directory of the commands, after those of one process: convert, fine-tune, sample."""
    folder = tmp_path_factory.mktemp("page")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in ALONE:
            small = SMALL if command[1] == "train" else []
            app([*stand_ins(command[1:], hub), *small], prog_name="dllm", standalone_mode=False)
    finally:
        os.chdir(before)
    return folder


def stand_ins(words, hub):
    """The words of a command with local names in place of the hub's, and 2 processes."""
    replaced = []
    for word in words:
        for name, place in hub.items():
            word = word.replace(name, str(place))
        replaced.append(word)
    for option in ("--nproc-per-node", "--num_processes"):
        if option in replaced:
            replaced[replaced.index(option) + 1] = "2"
    return replaced


def recipe_of(command) -> tuple[str, str, list[str]]:
    """The configuration, the recipe and its options of a command for several processes."""
    if command[0] == "sbatch":
        _, _, _, config, recipe, *options = command
        return config, recipe, options
    module = command.index("-m")
    recipe, options = command[module + 1].rpartition(".")[2], command[module + 2 :]
    config = (
        "torchrun" if command[0] == "torchrun" else Path(command[command.index("--config_file") + 1]).stem
    )
    return config, recipe, options


def test_the_page_has_commands_for_every_launcher():
    assert {command[0] for command in COMMANDS} == {"pip", "dllm", "torchrun", "accelerate", "sbatch"}
    assert {recipe_of(command)[0] for command in TOGETHER} == {"torchrun", "zero2", "zero3", "fsdp2"}


def test_the_table_of_options_is_what_the_recipes_take():
    assert with_table(PAGE) == PAGE, "run python tools/training_options.py"


def test_ten_minutes_convert_fine_tune_and_sample(models):
    assert_loads(models / "models" / "smollm2-alpaca", adapters=True)
    figures = json.loads((models / "models" / "smollm2-alpaca" / "eval_results.json").read_text())
    assert figures["eval_nll"] > 0
    assert facts(models / "models" / "smollm2-long")["world_size"] == 1


def test_chat_prints_the_reply_alone(models):
    model = str(models / "models" / "smollm2-alpaca")
    sampled = CliRunner().invoke(
        app, ["sample", "Add 3.", "--chat", "--model", model, "--max-new-tokens", "8"]
    )
    assert sampled.exit_code == 0, sampled.stderr
    assert not sampled.stdout.startswith("Add 3.")
    assert "tokens per forward" in sampled.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "sbatch"])
def test_a_command_of_each_launcher_runs_as_it_stands(models, hub, launcher, tmp_path):
    if launcher != "torchrun":
        pytest.importorskip("deepspeed")
    command = next(c for c in TOGETHER if c[0] == launcher and recipe_of(c)[0] in ("torchrun", "zero3"))
    changes = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if launcher == "sbatch":
        changes |= slurm_of_two_nodes(tmp_path)
        command = [command[2], *command[3:]]
    elif launcher == "accelerate":
        command = [*command[:2], "--main_process_port", "0", *command[2:]]
    words = [*stand_ins(command, hub), *SMALL, "--bf16", "False", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(words, env=environment(**changes), cwd=models, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    found = facts(tmp_path / "run")
    assert found["world_size"] == 2
    assert found["parameter_types"] == (["Parameter"] if launcher == "torchrun" else ["ZeRO-3"])
    assert_loads(tmp_path / "run")


def slurm_of_two_nodes(folder) -> dict:
    """Variables of a job on two nodes without GPUs, both of them here, and the path to its programs."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\nfor _ in 1 2; do echo 127.0.0.1; sleep 0.1; done\n")
    (programs / "srun").write_text(
        '#!/bin/sh\nSLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & wait $! && wait $first\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    path = os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"]))
    return dict(SLURM_NNODES="2", SLURM_JOB_NODELIST="node[0-1]", SLURM_JOB_ID=str(os.getpid()), PATH=path)


@pytest.mark.parametrize("config", ["zero2", "fsdp2"])
def test_the_other_commands_of_a_configuration_run(models, hub, config, tmp_path):
    if config == "zero2":
        pytest.importorskip("deepspeed")
    jobs, runs = [], []
    for command in TOGETHER:
        kind, recipe, options = recipe_of(command)
        if kind == config:
            output = options[options.index("--output_dir") + 1]
            runs.append(tmp_path / output)
            cpu = ["--use_cpu", "False"] if config == "fsdp2" else ["--bf16", "False"]
            words = [word.replace("models/", f"{models}/models/") for word in stand_ins(options, hub)]
            jobs.append((recipe, [*words, *SMALL, *cpu, "--output_dir", str(runs[-1])]))
    assert len(jobs) >= 3
    run_together(jobs, tmp_path, config)
    for run in runs:
        assert facts(run)["world_size"] == 2
        assert facts(run)["parameter_types"] == (["DTensor"] if config == "fsdp2" else ["Parameter"])
        assert_loads(run)
        assert_loads(run / "checkpoint-1")


def test_slurm_script_is_valid_bash():
    assert subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm.sh")]).returncode == 0
