"""A hook of mkdocs: puts pages from outside docs/ on the site, and makes links of the repository work there.

In the repository a link is the path of a file. On the site it leads to the page of that file if it has one,
else to the file in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
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
_REFERENCE = re.compile(r'(?:href|src)="(?![a-z]+:|//)([^"#?]+)')
_TABLE_ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
_CODE = re.compile(r"`[^`\n]+`")
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

    return _TABLE_ROW.sub(_with_bars, _LINK.sub(led, markdown))


def _with_bars(row: re.Match) -> str:
    """Return a row of a table with bars in code as they are: GitHub needs a backslash, which mkdocs shows."""
    return _CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0])


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site with a link or image that leads nowhere; mkdocs itself checks those in Markdown alone."""
    site = Path(config.site_dir)
    broken = [
        f"{page.relative_to(site)}: {target}"
        for page in site.rglob("*.html")
        if page.name != "404.html"  # which is shown at any address, so its links are absolute
        for target in set(_REFERENCE.findall(page.read_text()))
        if not (page.parent / unquote(target)).exists()
    ]
    if broken:
        raise PluginError("broken links:\n" + "\n".join(sorted(broken)))


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
