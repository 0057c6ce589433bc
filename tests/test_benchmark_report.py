"""Benchmark results: what a run writes, keeps and draws."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import charts, html_page, machine, report, results, tables

ABOUT = {
    "device": "cpu",
    "cpu": "Some CPU",
    "threads": 2,
    "instruction_set": "avx2",
    "torch": "2.13.0",
    "commit": "1234567",
}
PEAKS = {"flops": 8e9}


def row(case="full", suite="attention", **fields):
    fields = {"work": {"flops": 4e9}, "baselines": {"sdpa": [6.0, 8.0, 10.0]}} | fields
    return results.Row(suite, case, "cpu", [2.0, 2.0, 2.0], **fields)


def run(commit="1234567", **about):
    return {"date": "2026-01-02", "machine": ABOUT | {"commit": commit} | about, "peaks": PEAKS}


def after(*sessions):
    """The content of a device's file after sessions of (run, rows)."""
    content = {}
    for about, rows in sessions:
        content = results.merged(content, about, rows)
    return content


# ---- figures ---------------------------------------------------------------------------------------------
def test_a_speedup_is_the_median_of_the_rounds_ratios():
    summary = row().summary()
    assert summary["baselines"]["sdpa"]["speedup"] == {"median": 4.0, "p20": 3.4, "p80": 4.6}
    assert summary["flops_per_second"] == 2e9


def test_tokens_per_second_count_each_ones_own_tokens():
    summary = row(tokens={"ours": 10, "sdpa": 4}).summary()
    assert summary["tokens_per_second"] == 5.0
    assert summary["baselines"]["sdpa"]["tokens_per_second"] == 0.5


def test_a_row_without_a_title_has_the_name_of_its_case():
    assert row().summary()["title"] == "full"
    assert row(title="no mask").summary()["title"] == "no mask"


# ---- the file of a device --------------------------------------------------------------------------------
def test_cases_keep_the_machine_and_commit_that_measured_them():
    content = after((run(), [row("full"), row("causal")]), (run(commit="89abcde"), [row("causal")]))
    of = {
        case: content["runs"][figures["run"]]["machine"]["commit"]
        for case, figures in content["suites"]["attention"].items()
    }
    assert of == {"full": "1234567", "causal": "89abcde"}


def test_cases_of_one_session_share_their_run():
    content = after((run(), [row("full")]), (run(), [row("causal", suite="loss")]))
    assert len(content["runs"]) == 1


def test_a_run_without_cases_is_forgotten_and_its_number_is_not_given_to_a_run_that_has_some():
    content = after(
        (run("a"), [row("full")]), (run("b"), [row("causal")]), (run("c"), [row("full")]),
        (run("d"), [row("other")]),
    )  # fmt: skip
    commits = [content["runs"][number]["machine"]["commit"] for number in sorted(content["runs"])]
    assert commits == ["b", "c", "d"]


def test_cases_that_a_suite_no_longer_has_are_dropped():
    before = after((run(), [row("full"), row("old"), row("greedy", suite="token_stats")]))
    content = results.merged(before, run("b"), [row("new")], {"attention": {"full", "new"}})
    assert set(content["suites"]["attention"]) == {"full", "new"}
    assert set(content["suites"]["token_stats"]) == {"greedy"}


def test_a_file_is_named_after_its_device(tmp_path):
    assert results.path_of(tmp_path, "NVIDIA H200").name == "nvidia-h200.json"


def test_a_file_of_another_form_is_refused(tmp_path):
    (tmp_path / "cpu.json").write_text('{"attention": {"cases": {}}}')
    with pytest.raises(ValueError, match=r"cpu.json .* must have device, runs and suites"):
        results.read(tmp_path / "cpu.json")


def test_cases_are_ordered_by_the_numbers_in_their_names():
    names = ["scaling[1024]", "scaling[256]", "full", "scaling[8192]"]
    ordered = [name for name, _ in results.in_order(dict.fromkeys(names))]
    assert ordered == ["full", "scaling[256]", "scaling[1024]", "scaling[8192]"]


# ---- what people read ------------------------------------------------------------------------------------
def test_the_console_names_speedup_share_of_peak_memory_and_tokens():
    lines = tables.console(
        [row(memory={"ours": 3_000_000, "sdpa": 12_000_000}, tokens={"ours": 10, "sdpa": 10})], PEAKS
    )
    assert "25% of peak" in lines[0] and "peak 3.0 MB" in lines[0] and "5 tokens/s" in lines[0]
    assert "vs sdpa" in lines[1] and "4.00x [3.40, 4.60]" in lines[1] and "peak 12.0 MB" in lines[1]


def test_markdown_names_the_run_of_each_row():
    text = tables.markdown(after((run(), [row("full")]), (run("89abcde"), [row("causal")])))
    assert "| full | 2 s | 2 GFLOP/s (25%) | sdpa 4.00× |  | 1 |" in text
    assert "- 2: Some CPU, 2 threads, avx2, torch 2.13.0, commit 89abcde, 2026-01-02." in text


def test_runs_of_one_machine_commit_and_day_share_a_line():
    second = run() | {"peaks": {"flops": 7e9}}
    text = tables.runs(after((run(), [row("full")]), (run("89abcde"), [row("a")]), (second, [row("causal")])))
    assert [line.split(":")[0] for line in text.splitlines()] == ["- 1, 3", "- 2"]


def test_names_cannot_break_a_markdown_table():
    lines = tables.grid(("a", "b"), [("x | y\nz", "1")]).splitlines()
    assert lines[2] == "| x \\| y z | 1 |"


@pytest.mark.parametrize(
    "seconds, text", [(2, "2 s"), (0.01234, "12.3 ms"), (2.5e-6, "2.5 µs"), (0.001, "1 ms")]
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


@pytest.mark.parametrize("count, text", [(2_500, "2.5 kB"), (17_000_000, "17 MB"), (1.29e9, "1.29 GB")])
def test_memory(count, text):
    assert tables.memory(count) == text


@pytest.mark.parametrize("share, text", [(0.5, "50%"), (0.0033, "0.3%"), (1.2, "120%")])
def test_percent(share, text):
    assert tables.percent(share) == text


SCALED = [row(f"scaling[{size}]", scale=("length", size)) for size in (256, 512)]


def everything():
    memory = {"ours": 3_000_000, "sdpa": 12_000_000}
    batches = [row(f"batch[{size}]", scale=("batch", size)) for size in (1, 8)]
    slower = row("slow", baselines={"bare loop": [1.0, 1.0, 1.0]})
    rows = [*SCALED, *batches, slower, row("memory", memory=memory), row("alone", baselines={})]
    return after((run(), rows))


def svgs(page):
    return [ElementTree.fromstring(chart) for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_draws_speedups_scaling_share_of_peak_and_memory():
    page = html_page.page([everything()])
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Speedups", "Scaling with length", "Scaling with batch size", "Share of peak", "Memory",
        "All figures",
    ]  # fmt: skip
    assert len(svgs(page)) == 5
    assert "commit 1234567" in page


def test_the_page_needs_nothing_from_elsewhere():
    page = html_page.page([everything()])
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://", page)


def test_every_bar_and_text_is_inside_its_chart():
    wide = row("w", baselines={"a name of many words, " * 4: [2e3] * 3, "faster": [2e-3] * 3})
    for chart in svgs(html_page.page([everything(), after((run(), [wide]))])):
        _, _, width, height = map(float, chart.get("viewBox").split())
        for rect in chart.iter("rect"):
            start, extent = float(rect.get("x")), float(rect.get("width"))
            assert 0 <= start <= start + extent <= width
        for text in chart.iter("text"):
            assert 0 <= float(text.get("x")) <= width and 0 <= float(text.get("y")) <= height


def test_a_bar_below_one_is_marked_as_slower():
    (chart,) = svgs(charts.speedup_bars([("case", [charts.Bar("a", 0.5, ""), charts.Bar("b", 2.0, "")])]))
    slower, faster = chart.iter("rect")
    assert (slower.get("class"), faster.get("class")) == ("slower", "ours")
    assert float(slower.get("x")) + float(slower.get("width")) == pytest.approx(float(faster.get("x")))


def test_names_from_users_are_escaped():
    evil = '<script>alert("1")</script> & co'
    of_users = {"suite": evil, "title": evil, "baselines": {evil: [1.0] * 3}}
    rows = [row(f"{evil}[{size}]", scale=("length", size), **of_users) for size in (1, 2)]
    content = after((run(commit=evil, cpu=evil), rows))
    page = html_page.page([content | {"device": evil}])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert len(svgs(page)) == 3  # whole, as XML


def test_files_are_written_beside_the_json(tmp_path):
    content = everything()
    written = report.write_beside(tmp_path / "cpu.json", content)
    assert sorted(path.name for path in written) == ["cpu.html", "cpu.md", "cpu.svg"]
    plot = ElementTree.fromstring((tmp_path / "cpu.svg").read_text())
    assert len(list(plot.iter("{http://www.w3.org/2000/svg}polyline"))) == 4  # ours and sdpa, twice
    assert report.plot(content) == (tmp_path / "cpu.svg").read_text()


def test_there_is_no_plot_of_cases_without_a_scale():
    assert report.plot(after((run(), [row()]))) == ""


# ---- the machine -----------------------------------------------------------------------------------------
def test_peak_memory_counts_what_a_call_allocates():
    size = 64 << 20
    counted = machine.peak_memory(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    assert counted is None or 0.9 * size < counted < 1.2 * size


def test_the_results_of_the_repository_are_in_this_format():
    for path in report.FOLDER.glob("*.json"):
        content = json.loads(path.read_text())
        assert results.path_of(report.FOLDER, content["device"]) == path
        for cases in content["suites"].values():
            for figures in cases.values():
                assert figures["run"] in content["runs"] and figures["title"]
