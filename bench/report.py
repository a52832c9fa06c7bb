"""`python -m ipvrm_core.bench.report results.json --plot out.png`: Markdown tables of a GPU report, and its plot.

Nothing is computed that was not measured. A speed-up needs the function's correctness checks and the case's error
against float64 to be good; otherwise the table says why there is none. A toy report says so above every table.
"""

import argparse
import json
from pathlib import Path

from ipvrm_core.bench.compare import OURS, PRODUCTS
from ipvrm_core.bench.invariants import CAPTURED, COMPILED
from ipvrm_core.bench.plots import plot
from ipvrm_core.bench.targets import TARGETS, find

TOY = "**TOY RUN on {}: tiny sizes, to see that the command works. No number here is a result.**"


def markdown(report: dict) -> str:
    toy = TOY.format(report["device"]) if report["toy"] else None
    parts = [_head(report)]
    for title, body in (
        ("Targets", targets(report)),
        ("Correctness", correctness(report)),
        ("Loss, forward and backward", cases(report, "loss")),
        ("Step cost: DistRL against GRPO (alpha = 0, K = 0), same code", step_cost(report)),
        ("Given logits", cases(report, "logits")),
        ("Largest N", largest(report)),
        ("Launch configurations (block / warps) and buffer sizes", tuning(report)),
        ("Against N", cases(report, "rows")),
        ("Against V", cases(report, "vocabularies")),
        ("Candidates, masks, flat and peaked rows", cases(report, "variants")),
        ("Peers", peer_table(report)),
    ):
        parts += [f"## {title}", *([toy] if toy else []), body]
    return "\n\n".join(parts)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def checked(report: dict, function: str) -> str | None:
    """None if every check of the function passed; else why no claim may be made about it."""
    rows = [row for row in report["sections"]["correctness"]["rows"] if row["function"] == function]
    failed = [row["check"] for row in rows if row["passed"] is False]
    if failed:
        return f"check failed: {failed[0]}"
    # Compiling and capturing come last and say nothing about the numbers: time may run out before them.
    about_numbers = [row for row in rows if row["check"] not in (COMPILED, CAPTURED)]
    return None if rows and all(row["passed"] for row in about_numbers) else "not checked in this run"


def targets(report: dict) -> str:
    rows = []
    for target in TARGETS:
        outcome = None if report["toy"] else target.measured(report)
        refused = [reason for name in target.needs if (reason := checked(report, name))]
        if outcome is None:
            state = ["-", "waits for a GPU" if report["toy"] else "not measured in this run"]
        elif refused:
            state = ["-", refused[0]]
        else:
            state = [outcome[0], "met" if outcome[1] else "missed"]
        rows.append([target.aim, *state])
    return table(["aim", "measured", "state"], rows)


def correctness(report: dict) -> str:
    section = report["sections"]["correctness"]
    names = list(dict.fromkeys(row["function"] for row in section["rows"]))
    rows = []
    for name in names:
        states = [row["passed"] for row in section["rows"] if row["function"] == name]
        rows.append([name, states.count(True), states.count(False), states.count(None)])
    lines = (
        [_state(section), table(["function", "passed", "failed", "no time left"], rows)] if rows else [_state(section)]
    )
    lines += [
        f"- FAILED {row['function']}, {row['check']}: {row['detail']}"
        for row in section["rows"]
        if row["passed"] is False
    ]
    memory = report["sections"]["memcheck"]
    for row in memory["rows"]:
        state = row.get("skipped") or ("passed" if row["passed"] else "FAILED") + f" ({row['detail']})"
        lines.append(f"{row['tool']}: {state}")
    return "\n\n".join([*lines, *([] if memory["rows"] else [f"memcheck: {_state(memory)}"])])


def cases(report: dict, section: str) -> str:
    """A table a case. `/ ours` is the time over the library's: 2x means that the library is twice as fast."""
    rows = report["sections"][section]["rows"]
    names = list(dict.fromkeys(row["case"] for row in rows))
    copy = find(report, "rates", provider="copy").get("gb_per_s")
    function = "distrl_loss_from_logits" if section == "logits" else "distrl_loss"
    parts = [_state(report["sections"][section])]
    for name in names:
        group = [row for row in rows if row["case"] == name]
        if "skipped" in group[0]:
            parts.append(f"{name}: {group[0]['skipped']}")
            continue
        refused = "toy" if report["toy"] else checked(report, function)
        clocks = group[0].get("clocks")
        parts.append(f"**{name}**")
        if clocks:
            parts.append(f"SM clock {_range(clocks['clocks.sm'])} MHz, power {_range(clocks['power.draw'])} W")
        header = ["TOY, no results" if report["toy"] else "", *_HEADER[1:]]
        parts.append(table(header, [_line(row, group, copy, refused) for row in group]))
    return "\n\n".join(parts)


_HEADER = [
    "",
    "computes",
    "cold ms (p10-p90)",
    "hot ms",
    "rounds",
    "extra GB",
    "rate",
    "error h or z",
    "error W",
    "/ ours",
]


def _line(row: dict, group: list[dict], copy: float | None, refused: str | None) -> list[str]:
    if "error" in row:
        return [row["provider"], row["computes"], row["error"], *["-"] * (len(_HEADER) - 3)]
    deviation = row.get("deviation", {})
    rate = f"{row['cublas_fraction']:.1%} of cuBLAS" if "cublas_fraction" in row else "-"
    if "gb_per_s" in row:
        rate = f"{row['gb_per_s']:.0f} GB/s" + (f" ({row['gb_per_s'] / copy:.0%} of copy)" if copy else "")
    errors = [f"{deviation[name]:.1e}" if name in deviation else "-" for name in ("rows", "weight")]
    return [
        row["provider"],
        row["computes"],
        _spread(row["cold_ms"]),
        f"{row['hot_ms']['median']:.3f}",
        row["rounds"],
        _gigabytes(row),
        rate,
        *errors,
        _speed_up(row, group, refused),
    ]


def _speed_up(row: dict, group: list[dict], refused: str | None) -> str:
    """Time of this row over ours, or why that may not be said."""
    us = next((other for other in group if other["provider"] == OURS), {})
    if row["provider"] in (OURS, PRODUCTS) or "cold_ms" not in us:
        return "-"
    if refused:
        return refused
    if us["wrong"] is None or row["wrong"] is None:
        return "error not measured"
    if us["wrong"] or row["wrong"]:
        return f"the gradient of {OURS if us['wrong'] else row['provider']} is wrong"
    return f"{row['cold_ms']['median'] / us['cold_ms']['median']:.2f}x"


def step_cost(report: dict) -> str:
    section, first = report["sections"]["step"], "TOY, no results" if report["toy"] else "pass"
    parts = [_state(section)]
    for name in dict.fromkeys(row["case"] for row in section["rows"]):
        group = {row.get("provider"): row for row in section["rows"] if row["case"] == name}
        if None in group:
            parts.append(f"{name}: {group[None]['skipped']}")
            continue
        lines = [
            [what, row["error"], "-"] if "error" in row else [what, _spread(row["cold_ms"]), _gigabytes(row)]
            for what, row in group.items()
        ]
        parts += [f"**{name}**", table([first, "cold ms (p10-p90)", "extra GB"], lines), _overheads(report, group)]
    return "\n\n".join(parts)


def _overheads(report: dict, group: dict[str, dict]) -> str:
    """What DistRL adds to the two passes that GRPO has too; the reward model's pass is its own."""
    functions = ("distrl_loss", "linear_logprobs", "select_candidates")
    refused = ["toy"] if report["toy"] else [reason for name in functions if (reason := checked(report, name))]
    if refused:
        return f"DistRL over GRPO: {refused[0]}"
    texts = []
    for what, more, less in (
        ("loss", "loss, DistRL", "loss, GRPO"),
        ("old-policy pass", "old policy, candidates", "old policy, log-prob"),
    ):
        high, low = group[more], group[less]
        if "error" not in high and "error" not in low:
            time = high["cold_ms"]["median"] / low["cold_ms"]["median"] - 1
            peaks = (high["peak_extra_bytes"], low["peak_extra_bytes"])
            memory = f", {peaks[0] / peaks[1] - 1:+.1%} memory" if all(peaks) else ""
            texts.append(f"{what} {time:+.1%} time{memory}")
    return "DistRL over GRPO: " + "; ".join(texts)


def largest(report: dict) -> str:
    section = report["sections"]["largest"]
    rows = []
    for row in section["rows"]:
        points = ", ".join(
            f"{n}: {'-' if peak is None else f'{peak / 1e9:.2f} GB'}" for n, peak in row.get("points", [])
        )
        ran = f"{row['peak_extra_bytes'] / 1e9:.2f} GB" if "fits" in row else row.get("skipped", "-")
        rows.append([row["case"], points, row.get("predicted_rows", "-"), ran])
    return "\n\n".join([_state(section), table(["case", "measured peaks", "N for 16 GB", "run at that N"], rows)])


def tuning(report: dict) -> str:
    section, first = report["sections"]["tuning"], "TOY, no results" if report["toy"] else ""
    parts = [_state(section)]
    for name in dict.fromkeys(row["case"] for row in section["rows"]):
        lines = []
        for row in (row for row in section["rows"] if row["case"] == name and "provider" in row):
            rate = f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "-"
            times = [row["error"], "-"] if "error" in row else [_spread(row["cold_ms"]), _gigabytes(row)]
            lines.append([row["provider"] + (" (in use)" if row.get("in_use") else ""), *times, rate])
        parts += [f"**{name}**", table([first, "cold ms (p10-p90)", "extra GB", "GB/s"], lines)]
    return "\n\n".join(parts)


def peer_table(report: dict) -> str:
    rows = [
        [
            peer["name"],
            peer["level"],
            peer["install"],
            peer["version"] or "-",
            peer["call"],
            peer["unavailable"] or "available",
        ]
        for peer in report["peers"]
    ]
    return table(["peer", "level", "install", "here", "call", "state"], rows)


def _head(report: dict) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in report["environment"].items())
    command = f"`{report['command']}`, {report['date']}, backend {report['backend']}"
    rows = [] if report["toy"] else report["sections"]["rates"]["rows"]
    rates = [f"- {row['provider']}: {row['tflop_per_s']:.0f} TFLOP/s" for row in rows if "tflop_per_s" in row]
    rates += [f"- {row['provider']}: {row['gb_per_s']:.0f} GB/s" for row in rows if "gb_per_s" in row]
    return "\n\n".join(["# GPU benchmark", command, "\n".join([facts, *rates])])


def _state(section: dict) -> str:
    if section["status"] == "done":
        return f"{section['seconds']:.0f} s"
    return f"{section['status']}: {section['reason']}"


def _range(values: dict) -> str:
    return f"{values['median']:.0f} ({values['min']:.0f} to {values['max']:.0f})"


def _gigabytes(row: dict) -> str:
    peak = row["peak_extra_bytes"]
    return "-" if peak is None else f"{peak / 1e9:.3f}"


def _spread(values: dict) -> str:
    return f"{values['median']:.3f} ({values['p10']:.3f}-{values['p90']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the JSON that bench.gpu wrote")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    print(markdown(report))
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
