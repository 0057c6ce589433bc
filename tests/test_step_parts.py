"""benchmarks.step_parts: where the time of a step goes."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import step_parts, step_tables
from benchmarks.llada_shaped import random_model
from dllm_kernels.models.stored_weights import StoredLinear


def test_a_part_does_not_count_what_other_parts_take_within_it(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = step_parts.Stopwatch()
    inner = watch.watch("inner", lambda x: x + 1)
    outer = watch.watch("outer", lambda x: 2 * inner(x))
    assert outer(5) == 12
    assert watch.seconds == {"inner": 3.0, "outer": 7.0}


def test_a_part_that_fails_is_counted_and_methods_are_put_back():
    class Part:
        def run(self):
            raise ValueError("no")

    run, watch = Part.run, step_parts.Stopwatch()
    with watch.attached({"part": [(Part, "run")]}), pytest.raises(ValueError, match="no"):
        Part().run()
    assert watch.seconds["part"] > 0 and Part.run is run


@pytest.fixture(scope="module")
def models():
    stock = random_model(2, 64, 256)
    return {kind: step_parts.with_weights(stock, kind) for kind in ("stock", "bfloat16", "int8")}


def test_the_parts_of_a_step_are_the_whole(models):
    forward = nn.Linear.forward
    for step in step_parts.step_seconds(models, rounds=1, canvas=64).values():
        assert sum(step[part] for part in step_parts.PARTS) == pytest.approx(step["all"])
    seconds = step_parts.run_seconds(models["int8"], [5] * 32, steps=4)
    assert min(seconds[part] for part in step_parts.PARTS) > 0
    assert nn.Linear.forward is forward and "watched" not in StoredLinear.forward.__name__


def test_bytes_and_operations_are_those_of_the_layers(models):
    inputs = 4 * 64 * 64 + 3 * 64 * 192
    for kind, bytes_each, of_vocabulary in (("stock", 4, 4), ("bfloat16", 2, 4), ("int8", 1, 1)):
        moved = step_parts.moved(models[kind])
        assert moved["linear layers"] == {"bytes": 2 * inputs * bytes_each, "operations": 2 * 32 * 2 * inputs}
        assert moved["vocabulary"]["bytes"] == 256 * 64 * of_vocabulary


def test_agreement_ends_at_the_first_other_token():
    expected = [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4])]
    assert step_parts.agreement(expected, expected) == 1
    assert step_parts.agreement(expected, [torch.tensor([1, 9, 3, 4]), expected[1]]) == 5 / 8


def test_thread_counts_are_powers_of_two_and_all_cores(monkeypatch):
    for cores, counts in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(step_parts.os, "cpu_count", lambda cores=cores: cores)
        assert step_parts.thread_counts() == counts


def test_one_section_is_measured_again_and_the_others_stay(tmp_path, monkeypatch):
    path = tmp_path / "performance.json"
    sections = {name: lambda smoke, name=name: {"of": name, "smoke": smoke} for name in step_parts.SECTIONS}
    monkeypatch.setattr(step_parts, "SECTIONS", sections)
    threads = torch.get_num_threads()
    step_parts.main(["--output", str(path)])
    step_parts.main(["--output", str(path), "--only", "threads", "--smoke"])
    torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert [*found] == ["steps", "avx2", "threads", "accuracy"]
    assert [section["smoke"] for section in found.values()] == [False, False, True, False]
    assert all(section["machine"]["device"] == "cpu" for section in found.values())


def test_the_avx2_section_is_of_a_process_held_to_it(monkeypatch):
    def run(command, *, env, check):
        assert check and {name: env[name] for name in step_parts.AVX2} == step_parts.AVX2
        assert command[-1] == "--smoke"
        Path(command[command.index("--output") + 1]).write_text(json.dumps({"steps": {"seconds": 1}}))

    monkeypatch.setattr(step_parts.subprocess, "run", run)
    assert step_parts.measure_avx2(smoke=True) == {"seconds": 1}


def test_tables_show_every_kind_and_the_machine():
    step = {"all": 0.1, "linear layers": 0.05, "vocabulary": 0.02, "attention": 0.02, "rest": 0.01}
    work = {"linear layers": {"bytes": 1e9, "operations": 5e9}}
    about = {"cpu": "A | B", "threads": 2, "instruction_set": "avx2", "torch": "2", "commit": "1"}
    figures = {
        "steps": {
            "machine": about, "peaks": {"bytes": 40e9, "flops": 200e9},
            "model": "1M", "canvas": 64, "block": 32,
            "moved": {"stock": work, "int8": work},
            "seconds": {"stock": step, "int8": {**step, "all": 0.025}},
        },
        "threads": {"machine": about, "seconds": {"1": {"stock": 0.2}, "2": {"stock": 0.1}}},
        "accuracy": {
            "machine": about,
            "figures": {
                "int8": {"bits_per_byte": 1.5, "additions": 1.0, "infilled": 0.1, "agreement": 0.75},
            },
        },
    }  # fmt: skip
    assert "| `int8` | 25 ms | 4.00× | 50 ms |" in step_tables.steps(figures)
    slow = {"avx2": {**figures["steps"], "seconds": {"stock": step, "int8": {**step, "all": 0.05}}}}
    assert "| `int8` | 50 ms | 2.00× | 50 ms |" in step_tables.steps(slow, "avx2")
    assert "20 GB/s (50%) | 100 GFLOP/s (50%) |" in step_tables.limits(figures)
    assert "| weights | 1 thread | 2 threads |" in step_tables.threads(figures)
    assert "| `int8` | 4.00× | 1.5000 | 100.0% | 10.0% | 75.0% |" in step_tables.accuracy(figures)
    assert step_tables.threads_plot(figures).startswith("<svg")
    for table in (step_tables.steps, step_tables.limits, step_tables.threads, step_tables.accuracy):
        assert table(figures).endswith("Measured on A | B, 2 threads, avx2, torch 2, commit 1.\n")
