"""`python -m ipvrm_core.bench.predictions`: what the machine code says the head can reach, before a GPU has seen it.

    time = products / RATE + N V (bytes a logit of the row kernels) / BANDWIDTH,    share = products alone / time

The bytes are counted (bench/machine_code.py), the two constants are assumed, for an H200: what cuBLAS and a copy were
reported to reach there. `bench.gpu` measures both in its section `rates`; compare shares, not milliseconds. Prints a
Markdown table to be committed before the first measurement.
"""

from datetime import date

from ipvrm_core.bench.launches import LAUNCHES
from ipvrm_core.bench.machine_code import Loop
from ipvrm_core.bench.offline import compiling_for

RATE = 780e12  # flop/s of a bfloat16 product of these shapes
BANDWIDTH = 0.9 * 4.3e12  # bytes/s: a row kernel at 90% of a copy
N = 8192
SHAPES = {  # D, V, trained head, aim
    "Qwen3-0.6B": (1024, 151936, False, 0.76),
    "Llama-3.2-1B": (2048, 128256, False, 0.86),
    "Qwen3-8B": (4096, 151936, False, 0.93),
    "Qwen3-8B, trained head": (4096, 151936, True, 0.92),
}
ONE, TWO = "policy loss, one visit, float32 to bfloat16", "gradient, float32 to bfloat16"
STATISTICS = "log-probs, float32, V 151936"


def sweeps(case: str) -> list[Loop]:
    """The loops of a shipped launch on sm_90."""
    launch = next(shipped.launch for shipped in LAUNCHES if shipped.case == case)
    with compiling_for("sm_90") as kernels:
        launch("sm_90")
    return kernels[0].loops


def moved(loop: Loop) -> float:
    return loop.loaded + loop.stored


def share(D: int, V: int, trained: bool, bytes_per_logit: float) -> tuple[float, float, float]:
    """(seconds of the products, of the row kernels, the products' share of the sum)."""
    products = (3 if trained else 2) * 2 * N * D * V / RATE
    rows = N * V * bytes_per_logit / BANDWIDTH
    return products, rows, products / (products + rows)


def table() -> str:
    one, (statistics, *_), two = sweeps(ONE)[0], sweeps(STATISTICS), sweeps(TWO)[0]
    before = moved(statistics) + moved(two)
    lines = [
        f"{date.today()}: N = {N}, {RATE / 1e12:.0f} Tflop/s and {BANDWIDTH / 1e12:.2f} TB/s assumed.",
        f"Counted on sm_90: one visit {one} a logit; two visits {statistics}, then {two}.",
        "",
        "| head | products | one visit | share of the products alone | aim | two visits | share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (D, V, trained, aim) in SHAPES.items():
        products, rows, reached = share(D, V, trained, moved(one))
        _, old_rows, old = share(D, V, trained, before)
        cells = [f"{products * 1e3:.1f} ms", f"{rows * 1e3:.1f} ms", f"{reached:.0%}", f"{aim:.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {old_rows * 1e3:.1f} ms | {old:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
