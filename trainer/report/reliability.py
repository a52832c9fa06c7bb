"""The reliability diagram: how often answers are right against what sigma(vbar_t) says, at four places of an answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from ipvrm_core.trainer.evaluation.reward_model.calibration import BINS, expected_calibration_error
from ipvrm_core.trainer.report.plots import STYLE, Picture, style_of, svg_of, write_png

WIDTH, HEIGHT, LEFT, RIGHT = 3.5, 4.9, 0.15, 0.97  # inches; the sides of the axes as shares of the width
TITLE = "{}: reliability of σ(v̄ₜ)"


def diagram(key: str, bins: Mapping[str, Sequence[dict]], folder: Path) -> Picture:
    """`figure` as a picture of the page."""
    name, title = f"{key.replace('.', '-')}-reliability", TITLE.format(key)
    with rc_context(STYLE):
        drawn = figure(key, bins)
        picture = Picture(name, title, svg_of(drawn, name, title))
        write_png(drawn, folder, name)
        return picture


def figure(key: str, bins: Mapping[str, Sequence[dict]]) -> Figure:
    """One curve a place over the diagonal, its ECE in the legend; below, how many answers each bin holds.

    bins: {percent of the answer: bins of `calibration.reliability`}. A point stands at the mean prediction of its bin.
    """
    drawn = Figure((WIDTH, HEIGHT))
    upper, lower = drawn.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="#8a8f98", linewidth=1, linestyle="dashed", label="calibrated")
    width = 0.8 / BINS / len(bins)
    for index, (percent, found) in enumerate(bins.items()):
        style = style_of(index)
        label = f"after {percent} %: ECE {expected_calibration_error(found):.3f}"
        predicted, right = ([item[mean] for item in found] for mean in ("predicted", "right"))
        upper.plot(predicted, right, linewidth=1.4, marker="o", markersize=3, clip_on=False, label=label, **style)
        left = [(item["low"] + item["high"]) / 2 + (index - len(bins) / 2) * width for item in found]
        lower.bar(left, [item["count"] for item in found], width, align="edge", color=style["color"])
    upper.set_title(TITLE.format(key), x=-LEFT / (RIGHT - LEFT))
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of right answers")
    lower.set(xlabel="predicted probability σ(v̄ₜ)", ylabel="answers per bin")
    drawn.legend(*upper.get_legend_handles_labels(), loc="lower left", ncols=2, frameon=False, fontsize=7)
    drawn.subplots_adjust(left=LEFT, right=RIGHT, top=0.95, bottom=0.21, hspace=0.12)
    return drawn
