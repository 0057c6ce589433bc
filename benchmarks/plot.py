"""The scaling plot: time over size, for every family of cases that were measured at several sizes."""

import collections
from pathlib import Path


def draw(results: dict, path: Path) -> list[Path]:
    """Draws `results` (the content of a device's file) as SVG; nothing where no case has a size."""
    families = collections.defaultdict(list)
    for suite in results.values():
        for case, figures in suite["cases"].items():
            if "size" in figures:
                families[case.split("[")[0]].append(figures)
    if not families:
        return []
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dllm_kernels"  # the same results give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(families), figsize=(6 * len(families), 4.2), squeeze=False)
    for axis, (family, cases) in zip(axes[0], sorted(families.items()), strict=True):
        cases.sort(key=lambda figures: figures["size"])
        _curve(axis, cases, lambda figures: figures["ours_seconds"], "ours", linewidth=2.5, marker="o")
        for name in dict.fromkeys(name for figures in cases for name in figures["baselines"]):
            measured = [figures for figures in cases if name in figures["baselines"]]
            _curve(
                axis,
                measured,
                lambda figures, name=name: figures["baselines"][name]["seconds"],
                name,
                marker=".",
            )
        axis.set(
            xscale="log", yscale="log", title=family.replace("_", " "), ylabel="seconds (median, p20–p80)"
        )
        axis.set_xticks([figures["size"] for figures in cases], [str(figures["size"]) for figures in cases])
        axis.minorticks_off()
        axis.set_xlabel("L")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return [path]


def _curve(axis, cases: list[dict], seconds, label: str, **style) -> None:
    sizes = [figures["size"] for figures in cases]
    (line,) = axis.plot(sizes, [seconds(figures)["median"] for figures in cases], label=label, **style)
    low, high = ([seconds(figures)[end] for figures in cases] for end in ("p20", "p80"))
    axis.fill_between(sizes, low, high, alpha=0.2, color=line.get_color())
