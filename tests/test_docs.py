"""README.md and docs/: examples run as they stand, each page in one namespace from top to bottom, links lead
somewhere, and what pages list is complete."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dllm_kernels
import dllm_train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


ELSEWHERE = {"tutorial.md": "tests/test_tutorial.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    if page.name in ELSEWHERE:
        pytest.skip(f"{ELSEWHERE[page.name]} runs them with the commands between")
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


# ---- the site ----------------------------------------------------------------------------------------
class Tagged(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name objects of its extensions."""


Tagged.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Tagged)


def places(entry) -> list[str]:
    """Return the pages of an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [place for part in parts for place in places(part)]


def test_the_navigation_has_every_page_once():
    listed = places(SITE["nav"])
    assert len(listed) == len(set(listed))
    hook = (ROOT / "tools" / "site_pages.py").read_text()
    outside = re.findall(r'^    "([\w./-]+\.md)": "([\w./-]+)",$', hook, re.MULTILINE)
    assert all((ROOT / source).is_file() for _, source in outside)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(listed) == pages | {place for place, _ in outside}


@pytest.mark.parametrize(("package", "page"), [(dllm_kernels, "api.md"), (dllm_train, "api-train.md")])
def test_the_reference_has_every_public_name_once(package, page):
    text = (ROOT / "docs" / page).read_text()
    listed = re.findall(rf"^::: {package.__name__}\.(?:\w+\.)*(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(set(package.__all__) - {"__version__"})


@pytest.mark.parametrize("page", [*PAGES, *GUIDES], ids=lambda page: page.name)
def test_links_to_a_heading_find_it(page):
    """Links within a page, and to headings of other pages; slugs as on GitHub and on the site."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        text = (page.parent / target).read_text() if target else page.read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in map(slug, headings), f"{target}#{anchor}"


def slug(heading: str) -> str:
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")


# ---- troubleshooting ---------------------------------------------------------------------------------
MESSAGES = re.findall(
    r"^\| `(.+?)` \| .+ \|$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE
)


def fragments(message: str) -> list[str]:
    """Return what stands between the parts of a message that differ."""
    return [part for part in message.split("…") if len(part.strip()) > 1]


@functools.cache
def texts_of_python() -> list[str]:
    """Return every string of the packages; what an f-string fills in is a tab."""
    files = [*(ROOT / "dllm_kernels").rglob("*.py"), *(ROOT / "dllm_train").rglob("*.py"), ROOT / "setup.py"]
    found = []
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "\t" for part in node.values)
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@functools.cache
def text_of_cpp() -> str:
    sources = [path for ending in ("h", "cpp") for path in (ROOT / "csrc").rglob(f"*.{ending}")]
    files = [*sources, *(ROOT / "cmake").glob("*.cmake"), ROOT / "CMakeLists.txt"]
    return re.sub(r'"\s*"', "", "\n".join(file.read_text() for file in files))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_the_page_explains_is_in_the_sources(message):
    parts = fragments(message)
    assert sum(map(len, parts)) >= 12, "too little to recognize"
    in_order = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    said = any(in_order.search(text) for text in texts_of_python())
    assert said or all(part in text_of_cpp() for part in parts)


def test_the_page_explains_a_hundred_messages():
    assert len(MESSAGES) == len(set(MESSAGES)) >= 100
