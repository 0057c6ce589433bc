"""Make the pictures of README.md and docs/ from real runs of the embedded model.

    python tools/pictures.py             every picture into docs/images
    python tools/pictures.py NAME ...    those alone: live, replay

`live` is a recording of the live view as an animated SVG, with the times that the forwards took. `replay` are
screenshots of a replay page, which need Chromium.
"""

from __future__ import annotations

import html
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.style import Style

sys.path.insert(0, str(Path(__file__).parents[1]))
import dllm_kernels as dk
from dllm_kernels import demo
from dllm_kernels.sampling.loop import Round
from dllm_kernels.viewer.replay import write_replay
from dllm_kernels.viewer.terminal import MASK_CELL, TerminalView
from tools import chromium

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS, LINES = 48, 40  # of a pane; no canvas has so many lines
RUNS = 5
SLOWER = 8  # times: a whole run is over in a blink
BEFORE, AFTER = 1.0, 4.0  # seconds that the first and the last frame stand
CELL, LINE, SIZE = 7.6, 18.0, 12.6  # pixels: width and height of a character's cell, size of the font
MARGIN, GAP, TITLE, NOTE = 14.0, 16.0, 44.0, 34.0


# ---- the recording ----------------------------------------------------------------------------------------


@dataclass
class Frame:
    """What a pane shows from `at` seconds on: lines of (column, text, style)."""

    at: float
    lines: list[list[tuple[int, str, Style]]]


class Recorder(TerminalView):
    """A live view that keeps its rounds and draws them after the run."""

    def __init__(self, tokenizer, mask_id: int, canvas: torch.Tensor):
        console = Console(width=COLUMNS + 4, height=LINES, force_terminal=True, color_system="truecolor")
        super().__init__(tokenizer, mask_id, console=console, colour="confidence")
        none = torch.empty(0, dtype=torch.int64)
        self.events = [(0.0, Round(none, none, none, none.float(), canvas, 0))]
        self.started = time.perf_counter()

    def __call__(self, event: Round) -> None:
        self.events.append((time.perf_counter() - self.started, event))

    def seconds(self) -> float:
        return self.events[-1][0]

    def frames(self) -> list[Frame]:
        frames = []
        for at, event in self.events:
            fresh = self._note(event)
            panel = self.picture(event.canvas[0].tolist(), fresh, event.forwards, at)
            frames.append(Frame(at, list(cells(self.console, panel.renderable))))
        return frames


def cells(console: Console, picture: RenderableType) -> Iterator[list[tuple[int, str, Style]]]:
    """Return the lines of what is drawn: runs of one style without the blanks around them."""
    for line in console.render_lines(picture, console.options.update_width(COLUMNS)):
        column, runs = 0, []
        for text, style, _ in line:
            if text.strip():
                runs.append((column + len(text) - len(text.lstrip()), text.strip(), style or Style()))
            column += len(text)
        yield runs


class Watched:
    """A model that tells a recorder what its last forward committed: the plain loop has no callback."""

    def __init__(self, model, recorder: Recorder):
        self.model, self.config, self.recorder, self.forwards = model, model.config, recorder, 0

    def __call__(self, input_ids, **options):
        if self.forwards:
            self.tell(input_ids)
        self.before, self.forwards = input_ids.clone(), self.forwards + 1
        output = self.model(input_ids=input_ids, **options)
        self.logits = output.logits
        return output

    def tell(self, canvas) -> None:
        positions = (canvas != self.before)[0].nonzero()[:, 0]
        tokens = canvas[0, positions]
        probabilities = self.logits[0, positions].softmax(-1).gather(-1, tokens[:, None])[:, 0]
        rows = torch.zeros_like(positions)
        self.recorder(Round(rows, positions, tokens, probabilities, canvas.clone(), self.forwards))


def record(model, tokenizer, ids: list[int]) -> dict[str, list[Frame]]:
    """Return the frames of the plain loop and of ours by the name to show: of the median of RUNS each."""
    canvas, mask_id = torch.tensor([ids]), model.config.mask_token_id
    options = dict(block_size=len(ids), threshold=demo.THRESHOLD)
    recorded: tuple[list[Recorder], list[Recorder]] = [], []
    for _ in range(RUNS):
        plain = Recorder(tokenizer, mask_id, canvas)
        watched = Watched(model, plain)
        filled, _ = demo.plain_loop(watched, canvas)
        watched.tell(filled)
        ours = Recorder(tokenizer, mask_id, canvas)
        output = dk.infill(model, [ids], on_round=ours, **options)
        if not torch.equal(output.sequences, filled):
            raise SystemExit("the two loops wrote different texts: python tools/pick_gaps.py")
        recorded[0].append(plain)
        recorded[1].append(ours)
    plain, ours = (sorted(runs, key=Recorder.seconds)[RUNS // 2] for runs in recorded)
    return {
        "LLaDA’s loop, one token per forward": plain.frames(),
        f"dk.infill, threshold={demo.THRESHOLD}": ours.frames(),
    }


# ---- the recording as an SVG ------------------------------------------------------------------------------

LOOK = f"""
text{{font:{SIZE}px ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}}
text{{white-space:pre;fill:#24292f}}
.pane{{fill:#fff;stroke:#d0d7de}}.rule{{stroke:#d0d7de}}.mask{{fill:#d5dae1}}.dim{{fill:#6a737d}}
.title{{font-weight:700}}.note{{fill:#6a737d;text-anchor:middle}}
.title,.note{{font-family:system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}}
@media(prefers-color-scheme:dark){{
text{{fill:#e6edf3}}.pane{{fill:#0d1117;stroke:#30363d}}.rule{{stroke:#30363d}}
.mask{{fill:#313843}}.dim,.note{{fill:#8d96a0}}
}}
"""


@dataclass
class Animation:
    """Elements of an SVG, each visible from one share of the loop to another."""

    length: float
    elements: list[str] = field(default_factory=list)
    rules: dict[tuple[float, float], str] = field(default_factory=dict)

    def add(self, element: str, start: float, end: float) -> None:
        """Show an element from `start` to `end` seconds; without animations only what stands at the end."""
        if start <= 0 and end >= self.length:
            self.elements.append(element)
            return
        name = self.rules.setdefault((start, end), f"t{len(self.rules)}")
        last = " last" if end >= self.length else ""
        self.elements.append(f'<g class="t {name}{last}">{element}</g>')

    def style(self) -> str:
        lines = [f".t{{visibility:hidden;animation:{self.length:.2f}s step-end infinite}}"]
        for (start, end), name in self.rules.items():
            first, last = (f"{100 * at / self.length:.2f}%" for at in (start, end))
            hidden = "" if start <= 0 else "0%{visibility:hidden}"
            off = "" if end >= self.length else f"{last}{{visibility:hidden}}"
            lines.append(f"@keyframes {name}{{{hidden}{first}{{visibility:visible}}{off}}}")
            lines.append(f".{name}{{animation-name:{name}}}")
        lines.append("@media(prefers-reduced-motion:reduce){.t{animation:none}.last{visibility:visible}}")
        return "\n".join(lines)


def drawn(line: list[tuple[int, str, Style]], x: float, y: float) -> str:
    """Return one line of a frame as elements of an SVG."""
    parts = []
    for column, text, style in line:
        left = x + column * CELL
        if set(text) == {MASK_CELL}:
            box = f"h{CELL - 1.6:.1f}v{LINE - 5:.1f}h{1.6 - CELL:.1f}z"
            cells = "".join(f"M{left + at * CELL + 0.8:.1f} {y - 11:.1f}{box}" for at in range(len(text)))
            parts.append(f'<path class="mask" d="{cells}"/>')
            continue
        colour = f"fill:{style.color.triplet.hex};" if style.color else ""
        weight = "font-weight:700;text-decoration:underline" if style.bold else ""
        look = f' style="{colour}{weight}"' if colour or weight else ' class="dim"' if style.dim else ""
        place = f'x="{left:.1f}" y="{y:.1f}" textLength="{len(text) * CELL:.1f}"'
        parts.append(f"<text {place}{look}>{html.escape(text)}</text>")
    return "".join(parts)


def animated(panes: dict[str, list[Frame]], note: str) -> str:
    """Return panes side by side as an SVG that runs through their frames at their times, over and over."""
    length = BEFORE + SLOWER * max(frames[-1].at for frames in panes.values()) + AFTER
    animation = Animation(length)
    rows = max(len(frame.lines) for frames in panes.values() for frame in frames)
    pane = COLUMNS * CELL + 2 * MARGIN
    width, height = len(panes) * pane + (len(panes) - 1) * GAP, TITLE + rows * LINE + MARGIN + NOTE
    for number, (name, frames) in enumerate(panes.items()):
        left = number * (pane + GAP)
        animation.elements.append(
            f'<rect class="pane" x="{left + 0.5:.1f}" y="0.5" width="{pane - 1:.1f}" '
            f'height="{height - NOTE - 1:.1f}" rx="9"/>'
            f'<text class="title" x="{left + MARGIN:.1f}" y="25">{html.escape(name)}</text>'
            f'<path class="rule" d="M{left + 1:.1f} 38.5h{pane - 2:.1f}"/>'
        )
        starts = [0.0, *(BEFORE + SLOWER * frame.at for frame in frames[1:])]
        for row in range(rows):
            lines = [frame.lines[row] if row < len(frame.lines) else [] for frame in frames]
            since = 0
            for at in range(1, len(frames) + 1):
                if at < len(frames) and lines[at] == lines[since]:
                    continue
                end = length if at == len(frames) else starts[at]
                if lines[since]:
                    element = drawn(lines[since], left + MARGIN, TITLE + row * LINE + 14)
                    animation.add(element, starts[since], end)
                since = at
    animation.elements.append(
        f'<text class="note" x="{width / 2:.1f}" y="{height - 11:.1f}">{html.escape(note)}</text>'
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" role="img">',
            "<title>The same text written by LLaDA's loop and by dllm_kernels</title>",
            f"<style>{LOOK}{animation.style()}</style>",
            *animation.elements,
            "</svg>\n",
        )
    )


def live() -> None:
    """Write docs/images/live.svg."""
    model, tokenizer = dk.load("tiny-python", device="cpu", attention="bidirectional")
    panes = record(model, tokenizer, demo.hidden_ids(demo.FILE, tokenizer))
    parameters = sum(weight.numel() for weight in model.parameters()) / 1e6
    threads = torch.get_num_threads()
    note = (
        f"Both write the same text with the same model ({parameters:.1f}M parameters), on {threads} CPU "
        f"thread{'s'[: threads - 1]}; shown {SLOWER}× slower than it was."
    )
    write(IMAGES / "live.svg", animated(panes, note).encode())


# ---- the replay page --------------------------------------------------------------------------------------

SHOTS = {  # name -> size of the window, dark, and what to do before the shutter
    "replay-light": (1200, 790, False, "jump(steps)"),
    "replay-dark": (1200, 790, True, "jump(1)"),
    "replay-phone": (360, 740, False, "document.querySelector('input[value=probability]').click()"),
}


def replay() -> None:
    """Write screenshots of a replay page into docs/images."""
    model, tokenizer = dk.load("tiny-python", device="cpu", attention="bidirectional")
    ids = demo.hidden_ids(demo.FILE, tokenizer)
    options = dict(block_size=len(ids), logprobs=5)
    ours = dk.infill(model, [ids], threshold=demo.THRESHOLD, **options)
    runs = {f"threshold {demo.THRESHOLD}": ours, "one token per forward": dk.infill(model, [ids], **options)}
    unsure = int(ours.logprobs[0].argmin())
    with tempfile.TemporaryDirectory() as folder, chromium.page() as page:
        path = Path(folder) / "replay.html"
        for name, (width, height, dark, script) in SHOTS.items():
            write_replay(path, runs, tokenizer, mask_id=model.config.mask_token_id)
            page.open(path, width=width, height=height, dark=dark, scale=2 if width < 600 else 1)
            page.run(script)
            page.run(f"choose(runs[0].tokens[{unsure}])")
            write(IMAGES / f"{name}.png", page.screenshot())


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    print(f"{path.relative_to(ROOT)}: {len(content) / 1024:.0f} kB")


PICTURES = {"live": live, "replay": replay}


def main(names: list[str]) -> None:
    if unknown := set(names) - PICTURES.keys():
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such picture; known: {', '.join(PICTURES)}")
    for name in names or PICTURES:
        PICTURES[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
