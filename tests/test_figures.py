"""tools/figures.py: the sections of pages that it fills, and the plots that it draws."""

import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures():
    return runpy.run_path(str(ROOT / "tools/figures.py"))


def test_a_section_is_filled_and_the_rest_of_the_page_stays(figures):
    page = "before\n<!-- figures: gpu -->\nold\n<!-- end -->\nafter\n"
    filled = figures["render"](page)
    assert filled.startswith("before\n<!-- figures: gpu -->\n") and filled.endswith("<!-- end -->\nafter\n")
    assert "old" not in filled
    assert figures["render"](filled) == filled


@pytest.mark.parametrize(
    "page, message",
    [
        ("<!-- figures: other -->\n<!-- end -->", "figures: other is not known; known: .*headline"),
        ("<!-- figures: gpu -->\n", "1 times .* but 0 sections with an end"),
        (
            "<!-- figures: gpu -->\n<!-- figures: cpu -->\n<!-- end -->",
            "2 times .* but 1 sections with an end",
        ),
    ],
)
def test_sections_that_cannot_be_filled_are_refused(figures, page, message):
    with pytest.raises(ValueError, match=message):
        figures["render"](page)


def test_every_section_of_the_repository_is_checked_and_every_name_is_used(figures):
    command = ["grep", "-rlE", "^<!-- figures: ", "--include=*.md", "--exclude-dir=.venv", "."]
    named = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    pages = {(ROOT / path).resolve() for path in named}
    assert pages <= set(figures["PAGES"])
    used = {section[1] for page in pages for section in figures["SECTION"].finditer(page.read_text())}
    assert used == set(figures["SECTIONS"])


def test_every_results_file_has_a_plot_that_is_checked(figures):
    results = {path.name for path in figures["RESULTS"].glob("*.svg")}
    assert {path.name for path in figures["plots"]()} == results | {"threads.svg"}


def test_figures_say_every_machine_that_measured_them(figures):
    about = {"cpu": "A", "threads": 2, "instruction_set": "avx2", "torch": "2", "commit": "1"}
    runs = {
        "1": {"machine": about},
        "2": {"machine": about | {"cpu": "B", "commit": "2"}},
        "3": {"machine": about},
    }
    said = figures["measured_on"]({"runs": runs})
    assert said == (
        "measured on A, 2 threads, avx2, torch 2, commit 1; B, 2 threads, avx2, torch 2, commit 2."
    )
