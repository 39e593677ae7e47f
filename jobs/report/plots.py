"""Curves of a report as SVG: text stays text, equal data give equal bytes, and dark pages are
served.

Ink and grid are drawn in two colours of their own, which a style sheet in the file exchanges where
dark is preferred. Any other program reads the light ones.
"""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

INK, GRID = "#1d2127", "#dcdfe4"
DARK = {INK: "#d8dce2", GRID: "#3a4048"}
REAL, GENERATED = "#2f7fd1", "#d9722e"
SIZE_IN = (5.6, 3.5)
SMOOTHED_OVER = 20
"""Points of a loss curve that one point of its mean covers, of a long curve."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gigabrush",
    "font.family": ["sans-serif"],
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def plot_losses(lines: Sequence[dict[str, Any]], *, by_level: bool) -> bytes | None:
    """The loss over steps, or that of each level where there are several; None where none is
    recorded.
    """
    steps = np.array([float(line["step"]) for line in lines])
    if by_level:
        rows = [line.get("level_losses") or [] for line in lines]
        count = min((len(row) for row in rows), default=0)
        count = count if count > 1 else 0
        curves = {f"{1 << k} px": np.array([float(row[k]) for row in rows]) for k in range(count)}
    else:
        curves = {"": np.array([float(line["loss"]) for line in lines])}
    if len(steps) == 0 or not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        for number, (label, values) in enumerate(curves.items()):
            colour = f"C{number}"
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            x, smooth = _running_mean(steps, values)
            marker = "o" if len(x) == 1 else None
            axes.plot(x, smooth, color=colour, linewidth=2, label=label, marker=marker)
        if by_level:
            axes.legend(title="side of a cell", ncols=2, title_fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss of a level" if by_level else "loss")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
        return _svg(figure)


def _running_mean(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    width = min(SMOOTHED_OVER, max(len(x) // 5, 1))
    window = np.full(width, 1 / width)
    return np.convolve(x, window, "valid"), np.convolve(y, window, "valid")


def plot_spectrum(octaves: Sequence[dict[str, Any]], *, ratio: bool) -> bytes | None:
    """Power per octave of real and generated images, or its log2 ratio; None where nothing was
    measured.
    """
    names = ("log2_ratio",) if ratio else ("real", "generated")
    found = [o for o in octaves if all(isinstance(o.get(n), int | float) for n in names)]
    if not found:
        return None
    places = np.arange(len(found))
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        if ratio:
            heights = [float(o["log2_ratio"]) for o in found]
            axes.bar(places, heights, color=GENERATED, width=0.6)
            axes.axhline(0, color=INK, linewidth=1)
            reach = max(1.0, 1.15 * max(abs(h) for h in heights))
            axes.set_ylim(-reach, reach)
            axes.set_ylabel("log2 (generated / real)")
        else:
            for name, colour, marker in (("real", REAL, "o"), ("generated", GENERATED, "s")):
                values = [float(o[name]) for o in found]
                axes.plot(places, values, color=colour, marker=marker, linewidth=2, label=name)
            if all(o[name] > 0 for o in found for name in names):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_locator(NullLocator())
            axes.legend()
            axes.set_ylabel("variance of the octave")
        axes.set_xticks(places, [_octave(o, k) for k, o in enumerate(found)])
        axes.set_xlabel("octave: from details of ... to ... px")
        return _svg(figure)


def _octave(octave: dict[str, Any], number: int) -> str:
    level = octave.get("level", number)
    low, high = octave.get("cells_px") or (1 << level, 2 << level)
    return f"{low:g}–{high:g}"


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_IN, layout="constrained")
    axes = figure.add_subplot()
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure, axes


def _svg(figure: Figure) -> bytes:
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    stream = io.BytesIO()
    nothing = {name: None for name in ("Date", "Creator", "Format", "Type")}
    figure.savefig(stream, format="svg", metadata=nothing)
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    sheet = f"<style>@media(prefers-color-scheme:dark){{{rules}}}</style>"
    head, opened, body = stream.getvalue().decode().partition("<defs>")
    return f"{head}{sheet}{opened}{body}".encode()
