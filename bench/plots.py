"""The plot of a GPU report: time and memory against N and against V."""

from pathlib import Path

from ipvrm_core.bench.compare import PRODUCTS


def plot(report: dict, path: Path) -> None:
    """Time and memory against N and against V, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    for column, (section, letter) in enumerate((("rows", "N"), ("vocabularies", "V"))):
        rows = [row for row in report["sections"][section]["rows"] if "cold_ms" in row]
        for name in dict.fromkeys(row["provider"] for row in rows):
            line = [row for row in rows if row["provider"] == name]
            sizes = [row["setting"]["shape"][letter] for row in line]
            axes[0, column].plot(sizes, [row["cold_ms"]["median"] for row in line], marker="o", label=name)
            if name != PRODUCTS and all(row["peak_extra_bytes"] for row in line):
                axes[1, column].plot(sizes, [row["peak_extra_bytes"] / 1e9 for row in line], marker="o", label=name)
        for axis, unit in zip(axes[:, column], ("cold ms, median", "extra GB, peak"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel=letter, ylabel=unit)
            axis.grid(True, which="both", alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
            else:
                axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    where = report["environment"].get("gpu", report["device"])
    title = f"DistRL loss, frozen head, forward and backward: {where}, commit {report['environment']['commit'][:10]}"
    figure.suptitle(f"TOY RUN, no results. {title}" if report["toy"] else title)
    figure.savefig(path, dpi=120)
