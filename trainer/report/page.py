"""The page: pictures and tables of a run, put into page.html."""

import math
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ipvrm_core.trainer.config import Config
from ipvrm_core.trainer.files import write_text
from ipvrm_core.trainer.report import panels, plots, tables
from ipvrm_core.trainer.report.collect import Phase, collect
from ipvrm_core.trainer.report.reliability import diagram


def build(config: Config, run: Path) -> Path:
    """Write run/report/index.html and its pictures as PNG; returns the page's path. Works on unfinished runs."""
    data = collect(config, Path(run))
    folder = data.folder / "report"
    if folder.is_symlink():  # the pictures would go wherever it leads
        raise OSError(f"{folder} must be a folder of the run; got a symbolic link to {folder.readlink()}")
    folder.mkdir(exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, points=points, number=number, duration=duration, safe_svg=Markup)
    groups = panels.with_others(name for phase in data.policies for name in phase.names)
    page = environment.get_template("page.html").render(
        run=data,
        sources=tables.sources(data.config),
        policies=tables.policies(data),
        reward_models=tables.reward_models(data),
        choices=tables.choices(data),
        ranks=tables.ranks(data),
        sft_rows=tables.training([data.sft] if data.sft else [], "nll"),
        sft_pictures=_curves([data.sft] if data.sft else [], panels.SFT, folder, "sft"),
        rm_rows=tables.training(data.reward_models, "loss", ("held_out_auc", "held_out_auc_sum")),
        rm_pictures=_curves(data.reward_models, panels.REWARD_MODEL, folder, "rm"),
        rm_legend=_legend(data.reward_models),
        rm_reliability=[diagram(key, bins, folder) for key, bins in data.calibration.items()],
        rl_pictures={title: _curves(data.policies, group, folder, "rl") for title, group in groups.items()},
        rl_legend=_legend(data.policies),
        cost=tables.cost(data),
        config_json=data.config.model_dump_json(indent=1),
        method=tables.method,
    )
    target = folder / "index.html"
    write_text(target, page)
    return target


def _curves(phases: list[Phase], group: Iterable[plots.Panel], folder: Path, prefix: str) -> list[plots.Picture]:
    order = [phase.key for phase in phases]
    drawn = (
        plots.curves(panel, {phase.key: phase.points(panel.name) for phase in phases}, order, folder, prefix)
        for panel in group
    )
    return [picture for picture in drawn if picture]


def _legend(phases: list[Phase]) -> list[tuple[str, dict]]:
    """(label, line style) of the phases that have something to show."""
    return [(phase.key, plots.style_of(index)) for index, phase in enumerate(phases) if phase.lines]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def points(change: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * change:+.1f}".replace("-", "\N{MINUS SIGN}")


def number(value: float | None) -> str:
    """Three significant digits, whole numbers in full."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits < 6 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """1 h 02 min, 4 min 05 s, 12.3 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
