"""Benchmark results: what a run writes, keeps and draws."""

import json

import torch

from benchmarks import machine, report

ABOUT = {"device": "cpu", "commit": "1234567"}


def row(case, suite="attention", **fields):
    return report.Row(
        suite, case, "cpu", [2.0, 2.0, 2.0], {"sdpa": [6.0, 8.0, 10.0]}, {"flops": 4e9}, **fields
    )


def written(folder, about, *rows):
    return json.loads(report.write(folder, about, {}, list(rows))[0].read_text())


def test_a_speed_up_is_the_median_of_the_rounds_ratios():
    summary = row("full").summary()
    assert summary["baselines"]["sdpa"]["speedup"] == {"median": 4.0, "p20": 3.4, "p80": 4.6}
    assert summary["flops_per_second"] == 2e9


def test_a_suite_keeps_cases_of_the_same_machine_and_commit(tmp_path):
    written(tmp_path, ABOUT, row("full"), row("greedy", suite="token_stats"))
    assert set(written(tmp_path, ABOUT, row("causal"))["attention"]["cases"]) == {"full", "causal"}
    results = written(tmp_path, ABOUT | {"commit": "89abcde"}, row("causal"))
    assert set(results["attention"]["cases"]) == {"causal"}
    assert results["token_stats"]["machine"]["commit"] == "1234567"


def test_a_file_is_named_after_its_device(tmp_path):
    (path,) = report.write(tmp_path, ABOUT | {"device": "NVIDIA H200"}, {}, [row("full")])
    assert path.name == "nvidia-h200.json"
    assert list(tmp_path.iterdir()) == [path]


def test_cases_with_sizes_are_drawn(tmp_path):
    rows = [row(f"scaling[{size}]", size=size) for size in (256, 512)]
    _, plot = report.write(tmp_path, ABOUT, {}, rows)
    first = plot.read_text()
    assert "<svg" in first
    report.write(tmp_path, ABOUT, {}, rows)
    assert plot.read_text() == first


def test_the_table_names_ratio_share_of_peak_and_memory():
    lines = report.table([row("full", memory={"ours": 3_000_000, "sdpa": 12_000_000})], {"flops": 8e9})
    assert "25% of peak" in lines[0] and "peak 3.0 MB" in lines[0]
    assert "vs sdpa" in lines[1] and "4.00x [3.40, 4.60]" in lines[1] and "peak 12.0 MB" in lines[1]


def test_peak_memory_counts_what_a_call_allocates():
    size = 64 << 20
    counted = machine.peak_memory(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    assert counted is None or 0.9 * size < counted < 1.2 * size
