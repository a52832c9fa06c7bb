"""The pictures: small figures of one quantity each, the same as inline SVG and as PNG.

Only the Figure API: no pyplot, no state that outlives a call.
"""

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ipvrm_core.trainer.report.collect import Points

# Okabe and Ito's colours, which differ for every common kind of colour vision; the dashes start over with each round.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WIDTH, HEIGHT, LEFT, RIGHT = 3.5, 2.1, 0.66, 0.08  # inches
DASHES = ("solid", "dashed", "dotted")  # names that both matplotlib and CSS know
STYLE = {
    "font.size": 8,
    "ytick.labelsize": 7.5,
    "xtick.labelsize": 7.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3d434b",
    "xtick.color": "#3d434b",
    "ytick.color": "#3d434b",
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Panel:
    """One quantity: its name in metrics.jsonl, its title, the label of its axis, and what values are multiplied by."""

    name: str
    title: str
    axis: str
    scale: float = 1.0
    optional: bool = False  # all zeros means "not in use": no line
    relative: bool = False  # divided by the first value


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    svg: str


def style_of(index: int) -> dict:
    """Colour and dashes of the index-th line, the same in every picture and in the legend."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def window(count: int) -> int:
    """Width of the moving average: a fifteenth of the points, odd; 1 (none) below 30 points."""
    return 1 if count < 30 else (count // 15) | 1


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average; at the ends over the points that are there."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def curves(panel: Panel, series: Mapping[str, Points], order: list[str], folder: Path, prefix: str) -> Picture | None:
    """All `series` over steps: raw thin, smoothed thick. `order` fixes the styles; None: there is nothing to draw."""
    series = {
        label: points
        for label, points in series.items()
        if points and not (panel.optional and all(value == 0 for _, value in points))
    }
    if not series:
        return None
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.add_subplot()
        _set_height(figure, HEIGHT)
        axes.set_title(panel.title, x=-LEFT / (WIDTH - LEFT - RIGHT), y=1.0)
        axes.ticklabel_format(scilimits=(-3, 5), useOffset=False)
        axes.yaxis.get_offset_text().set(x=1.0, horizontalalignment="right")
        for label, points in series.items():
            steps, values = np.array(points, dtype=float).T
            values = values / (values[0] or 1.0) if panel.relative else values * panel.scale
            width, style = window(len(points)), style_of(order.index(label))
            if width > 1:
                axes.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.3)
                axes.plot(steps, smooth(values, width), linewidth=1.6, **style)
            else:
                axes.plot(steps, values, linewidth=1.4, marker="o", markersize=2.5, **style)
        axes.set(xlabel="step", ylabel=panel.axis)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        return _save(figure, folder, f"{prefix}-{panel.name}", panel.title, {k: order.index(k) for k in series})


def _set_height(figure: Figure, height: float) -> None:
    """`height` inches, of which the axes keep their size and distance from the top: the same in every picture."""
    figure.set_size_inches(WIDTH, height)
    bottom = (0.42 + height - HEIGHT) / height
    figure.subplots_adjust(left=LEFT / WIDTH, right=1 - RIGHT / WIDTH, bottom=bottom, top=1 - 0.26 / height)


def _save(figure: Figure, folder: Path, name: str, title: str, legend: dict[str, int]) -> Picture:
    """The page has one legend for many pictures, a PNG stands alone and gets its own."""
    picture = Picture(name, title, svg_of(figure, name, title))
    handles = [Line2D([], [], linewidth=1.6, **style_of(index)) for index in legend.values()]
    _set_height(figure, HEIGHT + 0.17 * -(-len(handles) // 2) + 0.05)
    figure.legend(handles, list(legend), loc="lower left", ncols=2, frameon=False, fontsize=7, borderaxespad=0)
    write_png(figure, folder, name)
    return picture


def write_png(figure: Figure, folder: Path, name: str) -> None:
    temporary = folder / f".{name}.png.tmp"
    figure.savefig(temporary, format="png", dpi=160)
    os.replace(temporary, folder / f"{name}.png")


def svg_of(figure: Figure, name: str, title: str) -> str:
    """The <svg> element alone; its ids carry `name`, since many such elements share a page."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r'\bid="', f'id="{name}-', text[text.index("<svg") :])
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    head = f'<svg role="img" aria-label="{title}" '
    return re.sub(r'^<svg (.*?)width="[^"]*" height="[^"]*"|^<svg ', lambda m: head + (m[1] or ""), text, flags=re.S)
