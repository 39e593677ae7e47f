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
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from jobs.report.progress import Progress

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


def plot_losses(progress: Progress, *, by_level: bool) -> bytes | None:
    """The loss of every part over the steps of the run, or that of each of its levels where there
    are several; None where none is recorded.
    """
    parts, curves = progress.parts, []
    for number, part in enumerate(parts):
        lines = [line for line in progress.losses if line.part == part]
        if not by_level:
            points = [(line.step, line.loss) for line in lines]
            curves.append((part, _colour(number, 0, 1), points))
            continue
        levels = sorted({level for line in lines for level in line.levels}, reverse=True)
        for place, level in enumerate(levels):
            points = [
                (line.step, loss)
                for line in lines
                for k, loss in zip(line.levels, line.level_losses, strict=True)
                if k == level
            ]
            name = f"{1 << level} px"
            name = f"{part} {name}" if len(parts) > 1 else name
            curves.append((name, _colour(number, place, len(levels)), points))
    curves = [curve for curve in curves if curve[2]]
    if not curves or (by_level and len(curves) < 2):
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        for label, colour, points in curves:
            steps, values = np.array(points, float).T
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
            x, smooth = _running_mean(steps, values)
            marker = "o" if len(x) == 1 else None
            axes.plot(x, smooth, color=colour, linewidth=2, label=label, marker=marker)
        if len(curves) > 1:
            title = "side of a cell" if by_level else "block"
            axes.legend(title=title, ncols=3 if by_level else 2, title_fontsize=10)
        _over_steps(axes, "loss of a level" if by_level else "loss")
        return _svg(figure)


def plot_held_out(progress: Progress) -> bytes | None:
    """The held-out error of every part over the steps of the run; None where none is recorded."""
    if not progress.held_out:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        axes.axhline(1, color=INK, linewidth=1, linestyle="--")
        for number, part in enumerate(progress.parts):
            points = [(line.step, line.mean) for line in progress.held_out if line.part == part]
            if points:
                steps, values = np.array(points, float).T
                colour = _colour(number, 0, 1)
                axes.plot(steps, values, "o-", color=colour, label=part, markersize=3, linewidth=2)
        axes.set_ylim(bottom=0)
        axes.legend(title="block", ncols=2, title_fontsize=10)
        _over_steps(axes, "held-out error")
        return _svg(figure)


def _colour(part: int, place: int, places: int) -> tuple[float, float, float]:
    """A hue for each part, lighter for its finer levels."""
    white = 0.6 * place / max(places - 1, 1)
    r, g, b = ((1 - white) * value + white for value in to_rgb(f"C{part}"))
    return r, g, b


def _over_steps(axes: Axes, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.02)


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
