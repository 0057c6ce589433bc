"""The examples of README.md and docs/ run as they stand, each page in one namespace from top to bottom."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python"), "an example that does not begin or end its own lines"
    namespace = {"__name__": "example"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block.group(1), str(page), "exec")
        exec(code, namespace)


def test_the_first_screen_of_the_readme_has_a_figure_a_picture_an_example_and_a_table():
    text = (ROOT / "README.md").read_text()
    first = text[: text.index("\n## ")]
    sentence = re.search(r"<!-- figures: headline -->\n(.*?)<!-- end -->", first, re.DOTALL)[1]
    assert re.search(r"\d\.\d× as fast", sentence)
    (example,) = BLOCK.findall(first)
    assert len([line for line in example.splitlines() if line]) <= 6
    assert re.search(r"!\[.+\]\(docs/images/live.svg\)", first)
    assert first.count("\n| --- ") == 1
    assert len(first.splitlines()) <= 45


def test_the_readmes_table_names_every_row_once():
    (table,) = re.findall(
        r"<!-- figures: first-page -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    names = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(names) == len(set(names)) > 3
    assert not any("the same" in name for name in names)


def test_a_path_that_the_contributing_guide_names_exists():
    named = re.findall(r"`([\w.]+(?:/[\w.]+)+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    for path in set(named) - {"some/python"}:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", [*PAGES, *GUIDES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_figures_are_what_was_measured():
    command = [sys.executable, "tools/figures.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
