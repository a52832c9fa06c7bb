"""`python -m ipvrm_core.bench.predictions`: what the machine code says the head can reach, before a GPU has seen it.

    time = products / RATE + N V (bytes a logit of the row kernels) / BANDWIDTH + dW,    share = products alone / time

dW, with a trained head: the product of every chunk but the first reads and writes V D float32 numbers, which takes
longer than its arithmetic below about 800 rows a chunk; at the end they are rounded once.

The bytes are counted (bench/machine_code.py), the two constants are assumed, for an H200: what cuBLAS and a copy were
reported to reach there. `bench.gpu` measures both in its section `rates`; compare shares, not milliseconds. Prints a
Markdown table to be committed before the first measurement.
"""

from datetime import date

import torch

from ipvrm_core.bench.launches import LAUNCHES
from ipvrm_core.bench.machine_code import Loop
from ipvrm_core.bench.offline import compiling_for
from ipvrm_core.fused.head import default_buffer_bytes, rows_per_chunk

RATE = 780e12  # flop/s of a bfloat16 product of these shapes
BANDWIDTH = 0.9 * 4.3e12  # bytes/s: a row kernel at 90% of a copy
N = 8192
FROZEN, TRAINED = (default_buffer_bytes(torch.device("cuda"), trained) for trained in (False, True))
SHAPES = {  # D, V, trained head, bytes of the chunk's buffers, aim
    "Qwen3-0.6B": (1024, 151936, False, FROZEN, 0.76),
    "Llama-3.2-1B": (2048, 128256, False, FROZEN, 0.86),
    "Qwen3-8B": (4096, 151936, False, FROZEN, 0.93),
    "Qwen3-8B, trained head": (4096, 151936, True, TRAINED, 0.92),
    "the same, a frozen head's chunk": (4096, 151936, True, FROZEN, 0.92),
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


def gradient_of_weight(D: int, V: int, n: int) -> float:
    """Seconds that dW takes beyond the arithmetic of its product, with n rows a chunk."""
    chunks = -(-N // n)
    arithmetic, moved = 2 * n * D * V / RATE, (2 * 4 * D * V + 2 * n * (V + D)) / BANDWIDTH
    return (chunks - 1) * max(0.0, moved - arithmetic) + (4 + 2) * D * V / BANDWIDTH


def table() -> str:
    one, (statistics, *_), two = sweeps(ONE)[0], sweeps(STATISTICS), sweeps(TWO)[0]
    before = moved(statistics) + moved(two)
    lines = [
        f"{date.today()}: N = {N}, {RATE / 1e12:.0f} Tflop/s and {BANDWIDTH / 1e12:.2f} TB/s assumed.",
        f"Counted on sm_90: one visit {one} a logit; two visits {statistics}, then {two}.",
        "",
        "| head | rows a chunk | products | dW | one visit | share of the products alone | aim | two visits | share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (D, V, trained, buffer, aim) in SHAPES.items():
        n = rows_per_chunk(N, V, 4 + 2, buffer)
        products = (3 if trained else 2) * 2 * N * D * V / RATE
        weight = gradient_of_weight(D, V, n) if trained else 0.0
        rows, old_rows = (N * V * size / BANDWIDTH for size in (moved(one), before))
        reached, old = (products / (products + weight + seconds) for seconds in (rows, old_rows))
        times = [f"{seconds * 1e3:.1f} ms" for seconds in (products, weight, rows)]
        cells = [name, f"{n}", *times, f"{reached:.0%}", f"{aim:.0%}", f"{old_rows * 1e3:.1f} ms", f"{old:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
