"""The aims on an H200-class GPU, as ratios within one run, and where a report stands on each.

A target reads a report and returns (what was measured, met), or None where the report does not have it.
"""

from collections.abc import Callable
from typing import NamedTuple

from ipvrm_core.bench.compare import EAGER, OURS

TRL = "TRL chunked log-prob"
Outcome = tuple[str, bool] | None


class Target(NamedTuple):
    aim: str
    measured: Callable[[dict], Outcome]
    needs: tuple[str, ...] = ("distrl_loss",)  # a check of one of these failed: no claim


def find(report: dict, section: str, **wanted) -> dict:
    """The first row of the section with these values (of the row or of its setting); {} if there is none."""
    for row in report["sections"][section]["rows"]:
        facts = row.get("setting", {}) | row
        if all(facts.get(key) == value for key, value in wanted.items()) and "error" not in row:
            return row
    return {}


def median(row: dict) -> float | None:
    return row["cold_ms"]["median"] if "cold_ms" in row else None


def cublas(model: str, frozen: bool, least: float) -> Callable[[dict], Outcome]:
    def measured(report: dict) -> Outcome:
        row = find(report, "loss", model=model, frozen=frozen, loss="distrl", provider=OURS)
        share = row.get("cublas_fraction")
        return None if share is None or row.get("wrong", True) is not False else (f"{share:.1%}", share >= least)

    return measured


def faster(model: str, than: str, least: float, kind: str = "distrl") -> Callable[[dict], Outcome]:
    def measured(report: dict) -> Outcome:
        where = {"model": model, "frozen": True, "loss": kind}
        us, them = (find(report, "loss", provider=name, **where) for name in (OURS, than))
        if median(us) is None or median(them) is None or us["wrong"] is not False or them["wrong"] is not False:
            return None
        ratio = median(them) / median(us)
        return f"{ratio:.2f}x", ratio >= least

    return measured


def extra_bytes(model: str, most: float) -> Callable[[dict], Outcome]:
    def measured(report: dict) -> Outcome:
        row = find(report, "loss", model=model, frozen=True, loss="distrl", provider=OURS)
        peak = row.get("peak_extra_bytes")
        return None if peak is None else (f"{peak / 1e9:.2f} GB", peak <= most)

    return measured


def less_memory(model: str, least: float) -> Callable[[dict], Outcome]:
    def measured(report: dict) -> Outcome:
        where = {"model": model, "frozen": True, "loss": "distrl"}
        us, them = (find(report, "loss", provider=name, **where).get("peak_extra_bytes") for name in (OURS, EAGER))
        return None if not us or not them else (f"{them / us:.0f}x", them / us >= least)

    return measured


def overhead(model: str, more: str, less: str, most: float, what: str) -> Callable[[dict], Outcome]:
    """By how much one pass of the step section is above another, in time or memory."""

    def measured(report: dict) -> Outcome:
        rows = [find(report, "step", model=model, frozen=True, provider=name) for name in (more, less)]
        high, low = (row.get("peak_extra_bytes") if what == "memory" else median(row) for row in rows)
        return None if not high or not low else (f"{high / low - 1:+.1%}", high / low - 1 <= most)

    return measured


def copy_rate(least: float) -> Callable[[dict], Outcome]:
    def measured(report: dict) -> Outcome:
        row = find(report, "logits", model="Qwen3-0.6B", loss="distrl", provider=OURS)
        copy = find(report, "rates", provider="copy")
        if "gb_per_s" not in row or "gb_per_s" not in copy or row["wrong"] is not False:
            return None
        return f"{row['gb_per_s'] / copy['gb_per_s']:.1%}", row["gb_per_s"] >= least * copy["gb_per_s"]

    return measured


def most_rows(least: int) -> Callable[[dict], Outcome]:
    def measured(report: dict) -> Outcome:
        row = find(report, "largest", model="Qwen3-0.6B")
        if not row.get("fits"):
            return None
        return f"{row['rows']:,} rows in {row['peak_extra_bytes'] / 1e9:.1f} GB", row["rows"] >= least

    return measured


LARGE, LITTLE = "Qwen3-8B", "Qwen3-0.6B"
CANDIDATES, LOGPROB = "old policy, candidates", "old policy, log-prob"
BOTH = ("select_candidates", "linear_logprobs")
TARGETS = [
    Target("8B, frozen: at least 93% of the cuBLAS rate on 2 products", cublas(LARGE, True, 0.93)),
    Target("8B, frozen: at most 0.5 GB extra", extra_bytes(LARGE, 0.5e9)),
    Target("8B, frozen: at least 1.25x faster than eager", faster(LARGE, EAGER, 1.25)),
    Target("8B, frozen: at least 30x less memory than eager", less_memory(LARGE, 30)),
    Target("0.6B, frozen: at least 76% of the cuBLAS rate on 2 products", cublas(LITTLE, True, 0.76)),
    Target("1B, frozen: at least 86% of the cuBLAS rate on 2 products", cublas("Llama-3.2-1B", True, 0.86)),
    Target("0.6B, frozen: at least 2x faster than eager", faster(LITTLE, EAGER, 2.0)),
    Target("8B, trained: at least 92% of the cuBLAS rate on 3 products", cublas(LARGE, False, 0.92)),
    Target(
        "8B: old-policy pass with candidates at most 5% over log-prob alone",
        overhead(LARGE, CANDIDATES, LOGPROB, 0.05, "time"),
        BOTH,
    ),
    Target(
        "8B, frozen: DistRL at most 1% slower than GRPO", overhead(LARGE, "loss, DistRL", "loss, GRPO", 0.01, "time")
    ),
    Target(
        "8B, frozen: DistRL at most 1% more memory than GRPO",
        overhead(LARGE, "loss, DistRL", "loss, GRPO", 0.01, "memory"),
    ),
    Target("8B, frozen: at least 1.4x faster than TRL's log-prob + eager PPO", faster(LARGE, TRL, 1.4, "ppo")),
    Target(
        "logits, V = 151936: at least 80% of the copy rate on least bytes",
        copy_rate(0.80),
        ("distrl_loss_from_logits",),
    ),
    Target("V = 151936: at least 1,000,000 rows in 16 GB extra", most_rows(1_000_000)),
]
