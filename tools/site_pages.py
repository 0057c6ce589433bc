"""A hook of mkdocs: puts pages from outside docs/ on the site, and makes links of the repository work there.

In the repository a link is the path of a file. On the site it leads to the page of that file if it has one,
else to the file in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are on the site, by their place there.
FROM_OUTSIDE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "emulator.md": "simt/README.md",
    "model-card.md": "dllm_kernels/assets/tiny-python/README.md",
    "images/cpu.svg": "benchmarks/results/cpu.svg",
}
_PLACE = {source: place for place, source in FROM_OUTSIDE.items()} | {"README.md": "index.md"}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside."""
    for place, source in FROM_OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with links for the site."""
    place = page.file.src_uri
    source = FROM_OUTSIDE.get(place, f"docs/{place}")

    def led(link: re.Match) -> str:
        return link[1] + site_link(link[2], source, place, config.repo_url) + link[3]

    return _LINK.sub(led, markdown)


def site_link(target: str, source: str, place: str, repository: str) -> str:
    """Return what `target`, a link in the file `source` of the repository, is on the page at `place`."""
    if "://" in target or target.startswith("mailto:"):
        return target
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in _PLACE or path.startswith("docs/"):
        return posixpath.relpath(
            _PLACE.get(path, path.removeprefix("docs/")), posixpath.dirname(place) or "."
        )
    return f"{repository}/blob/main/{path}"
