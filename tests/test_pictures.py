"""tools/pictures.py: an animation shows each element in its time; the pictures of the pages are there."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.style import Style

from dllm_kernels.viewer.terminal import MASK_CELL
from tools import pictures

ROOT = Path(__file__).parents[1]


def frame(at: float, *lines: str) -> pictures.Frame:
    return pictures.Frame(at, [[(0, line, Style())] if line else [] for line in lines])


def intervals(picture: str) -> dict[str, tuple[float, float]]:
    """Return the shares of the loop in which each text that comes or goes is visible, in percent."""
    keyframes = dict(re.findall(r"@keyframes (t\d+)\{(.*?\})\}", picture))
    times = {}
    for name, text in re.findall(r'<g class="t (t\d+)(?: last)?"><text[^>]*>(.*?)</text>', picture):
        start = re.search(r"([\d.]+)%\{visibility:visible\}(?:([\d.]+)%)?", keyframes[name])
        times[text] = float(start[1]), float(start[2] or 100)
    return times


def test_a_line_stands_from_its_frame_to_the_next_that_changes_it():
    picture = pictures.animated({"pane": [frame(0, "a", "x"), frame(0.5, "b", "x"), frame(1, "c", "x")]}, "")
    length = pictures.BEFORE + pictures.SLOWER + pictures.AFTER
    second = 100 * (pictures.BEFORE + pictures.SLOWER / 2) / length
    third = 100 * (pictures.BEFORE + pictures.SLOWER) / length
    times = intervals(picture)
    assert times["a"] == pytest.approx((0, second), abs=0.01)
    assert times["b"] == pytest.approx((second, third), abs=0.01)
    assert times["c"] == pytest.approx((third, 100), abs=0.01)
    assert "x" not in times and ">x</text>" in picture


def test_masks_are_boxes_and_text_is_escaped():
    picture = pictures.animated({"<pane>": [frame(0, 3 * MASK_CELL, "a < b")]}, "note & so on")
    (boxes,) = re.findall(r'<path class="mask" d="([^"]*)"', picture)
    assert boxes.count("M") == 3
    texts = {
        element.text for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")
    }
    assert texts == {"<pane>", "a < b", "note & so on"}


def test_the_recording_of_the_first_page_is_small_and_runs_no_script():
    path = ROOT / "docs/images/live.svg"
    elements = {element.tag.partition("}")[2] for element in ElementTree.parse(path).iter()}
    assert elements == {"svg", "title", "style", "rect", "text", "path", "g"}
    assert path.stat().st_size < 150_000
    assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")


def test_every_picture_of_a_page_exists():
    for name in pictures.SHOTS:
        assert (ROOT / "docs/images" / f"{name}.png").exists()
