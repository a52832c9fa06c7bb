"""The two pictures of docs/how-it-works.md:  python docs/figures.py [FOLDER]   (half a minute on one CPU core)

credit.svg: numbers of a real run in small. A policy (a GRU) learns to write chains of sums modulo 10 and is stopped
early; a copy of it becomes a reward model by `ipvrm_loss` on its own answers and their 0/1 outcomes; what is drawn is
one held-out answer. chunk.svg: a diagram, drawn from nothing but text and boxes.

Shape letters: B answers, T tokens of an answer, N = B T, V vocabulary, E hidden size.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor, nn

from ipvrm_core import ipvrm_loss, prefix_values, sigma_v, td_advantages, td_errors, value_moments

TOKENS = "0123456789+-= "  # the blank stands before a chain
STEPS = 5  # "7" -> "+5=2-4=8+6=4-1=3+9=2": five operations of the model's own choice
BETA, MARGIN, P_MIN = 10.0, 5.0, 0.1
# Told apart by colour-blind eyes.
BLUE, ORANGE, SKY, YELLOW, GREY, LIGHT = "#0072B2", "#D55E00", "#A6D8F5", "#FBE38A", "#555555", "#DDDDDD"


class Writer(nn.Module):
    """tokens [B, T] -> logits [B, T, V] of the next one, from the last WINDOW tokens: "7+5=" is enough for a sum."""

    WINDOW = 4

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(TOKENS), 16)
        self.inner = nn.Linear(16 * self.WINDOW, width)
        self.head = nn.Linear(width, len(TOKENS), bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        seen_BT = nn.functional.pad(ids_BT, (self.WINDOW - 1, 0), value=TOKENS.index(" "))
        return self.head(self.inner(self.embedding(seen_BT.unfold(1, self.WINDOW, 1)).flatten(2)).relu())


def chains(count: int) -> Tensor:
    """Right chains, the first digit included: [B, 1 + T]."""
    value_B = torch.randint(10, (count,))
    columns = [value_B]
    for _ in range(STEPS):
        minus_B, other_B = torch.randint(2, (count,)), torch.randint(10, (count,))
        value_B = (value_B + (1 - 2 * minus_B) * other_B) % 10
        columns += [10 + minus_B, other_B, torch.full_like(value_B, TOKENS.index("=")), value_B]
    return torch.stack(columns, dim=1)


def true_results(ids_BT: Tensor) -> Tensor:
    """What each step should have written, given the first digit and the operations: [B, STEPS]."""
    value_B, results = ids_BT[:, 0], []
    for step in range(STEPS):
        sign_B, other_B = ids_BT[:, 1 + 4 * step] - 10, ids_BT[:, 2 + 4 * step]
        value_B = (value_B + (1 - 2 * sign_B) * other_B) % 10
        results.append(value_B)
    return torch.stack(results, dim=1)


def well_formed(ids_BT: Tensor) -> Tensor:
    """Digits and signs stand where they belong: [B] bool."""
    pattern = chains(1)[0]
    kind = torch.tensor([0] * 10 + [1, 1, 2, 3])
    return (kind[ids_BT] == kind[pattern]).all(1)


def outcomes(ids_BT: Tensor) -> Tensor:
    """1 where the LAST result is the right one: [B]. Nothing says which step was wrong."""
    return ((ids_BT[:, 4 * STEPS] == true_results(ids_BT)[:, -1]) & well_formed(ids_BT)).float()


@torch.no_grad()
def sample(policy: Writer, count: int) -> Tensor:
    ids_BT = torch.randint(10, (count, 1))
    while ids_BT.shape[1] < 1 + 4 * STEPS:
        next_BV = policy(ids_BT[:, -Writer.WINDOW :])[:, -1].softmax(-1)
        ids_BT = torch.cat([ids_BT, next_BV.multinomial(1)], dim=1)
    return ids_BT


def log_probs(model: Writer, ids_BT: Tensor) -> Tensor:
    """Of every token of the vocabulary at every position of the answers: [N, V]."""
    return model(ids_BT[:, :-1]).log_softmax(-1).flatten(0, 1)


def of_sampled(logp_NV: Tensor, ids_BT: Tensor) -> Tensor:
    return logp_NV.gather(1, ids_BT[:, 1:].reshape(-1, 1))[:, 0]


def boundaries(ids_BT: Tensor) -> Tensor:
    """cu_seqlens [B + 1]: here all answers are equally long."""
    return torch.arange(len(ids_BT) + 1) * (ids_BT.shape[1] - 1)


def train_policy(steps: int = 150) -> Writer:
    policy = Writer()
    optimiser = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for _ in range(steps):
        ids_BT = chains(64)
        optimiser.zero_grad()
        (-of_sampled(log_probs(policy, ids_BT), ids_BT).mean()).backward()
        optimiser.step()
    return policy.requires_grad_(False)


def train_reward_model(policy: Writer, steps: int = 400) -> Writer:
    """Prefix values against the policy that wrote the answers; it learns from outcomes alone."""
    model = Writer()
    model.load_state_dict(policy.state_dict())
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        ids_BT = sample(policy, 64)
        ratio_N = of_sampled(log_probs(model, ids_BT) - log_probs(policy, ids_BT), ids_BT)
        loss_B = ipvrm_loss(ratio_N, boundaries(ids_BT), outcomes(ids_BT), beta=BETA, margin=MARGIN)
        optimiser.zero_grad()
        loss_B.mean().backward()
        optimiser.step()
    return model.requires_grad_(False)


class Example(NamedTuple):
    """One wrong answer. At its token `error`: the old policy's probabilities and the TD advantages, [V] each."""

    text: str  # the first digit, then the answer
    values_T: Tensor  # V_t
    error: int
    old_V: Tensor
    advantages_V: Tensor
    right: int  # the token that should have stood there


def example(policy: Writer, reward_model: Writer, count: int = 1000) -> Example:
    """Of `count` new answers: one wrong step, neither the first nor the last, its right and its written digit both
    candidates; among these the one whose right digit the old policy thought least likely."""
    ids_BT = sample(policy, count)
    old_NV = log_probs(policy, ids_BT)
    delta_NV = td_errors(log_probs(reward_model, ids_BT), old_NV, BETA)
    values_N = prefix_values(of_sampled(delta_NV, ids_BT), boundaries(ids_BT), beta=1.0)  # beta is in delta
    advantages_NV = td_advantages(delta_NV, sigma_v(value_moments(values_N)))
    T, results_BS, found = ids_BT.shape[1] - 1, true_results(ids_BT), []
    for b, ids_T in enumerate(ids_BT):
        step = first_error(ids_T)
        if step is None or not 1 <= step < STEPS - 1:
            continue
        t = 4 * step + 3  # the place of its result in the answer
        old_V, right = old_NV[b * T + t].exp(), int(results_BS[b, step])
        if old_V[right] >= P_MIN and old_V[ids_T[1 + t]] >= P_MIN:
            text = "".join(TOKENS[i] for i in ids_T)
            found.append(Example(text, values_N[b * T : (b + 1) * T], t, old_V, advantages_NV[b * T + t], right))
    if not found:
        raise RuntimeError(f"none of {count} answers has one wrong step whose right digit was a candidate")
    return min(found, key=lambda e: e.old_V[e.right])


def first_error(ids_T: Tensor) -> int | None:
    """The one step that does not follow from the result before it; None without one, with several, or malformed."""
    if not well_formed(ids_T[None])[0]:
        return None
    before, sign, other, result = ids_T[0:-1:4], ids_T[1::4] - 10, ids_T[2::4], ids_T[4::4]
    wrong = ((before + (1 - 2 * sign) * other - result) % 10).nonzero()[:, 0].tolist()
    return wrong[0] if len(wrong) == 1 else None


def draw_credit(shown: Example, path: Path) -> None:
    """Above V_t along the answer, below the vocabulary at the wrong token."""
    figure, axes = plt.subplot_mosaic("VV;PA", figsize=(10, 6.6), layout="constrained", height_ratios=(1.15, 1))
    draw_values(axes["V"], shown)
    draw_vocabulary(axes["P"], axes["A"], shown)
    save(figure, path)


def draw_values(axis: Axes, shown: Example) -> None:
    T, error = len(shown.values_T), shown.error
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.axvspan(error - 0.5, error + 0.5, color=ORANGE, alpha=0.15, linewidth=0)
    axis.plot(range(T), shown.values_T.tolist(), color=BLUE, marker="o", markersize=5)
    axis.plot(error, shown.values_T[error].item(), color=ORANGE, marker="o", markersize=8)
    before, after = shown.values_T[error - 1 : error + 1].tolist()
    axis.annotate(
        f"{shown.text[error - 3 : error]} is {TOKENS[shown.right]} modulo 10, {shown.text[error + 1]} was written:\n"
        f"this token moves the value by delta = {after - before:.0f}",
        (error - 0.5, (before + after) / 2),
        xytext=(error - 9, 0.8 * after),
        arrowprops={"arrowstyle": "->", "color": ORANGE, "linewidth": 1.5},
        color=ORANGE,
    )
    axis.set_xticks(range(T), list(shown.text[1:]), fontfamily="monospace", fontsize=14)
    axis.get_xticklabels()[error].set_color(ORANGE)
    axis.set_xlim(-0.6, T - 0.4)
    axis.set_ylabel("prefix value V_t")
    axis.set_title(f"An answer to the prompt {shown.text[0]}, token by token: the value falls where it goes wrong")


def draw_vocabulary(left: Axes, right: Axes, shown: Example) -> None:
    tokens = [v for v in range(len(TOKENS)) if TOKENS[v] != " "]
    old, advantages = shown.old_V[tokens].tolist(), shown.advantages_V[tokens].tolist()
    candidate = [p >= P_MIN for p in old]
    colours = [(BLUE if a > 0 else ORANGE) if c else LIGHT for a, c in zip(advantages, candidate, strict=True)]
    left.bar(range(len(tokens)), old, color=colours)
    left.axhline(P_MIN, color=GREY, linestyle="--", linewidth=1)
    left.text(4.5, P_MIN + 0.02, f"P_min = {P_MIN}", color=GREY, ha="center")
    left.set_ylabel("pi_old(v)")
    left.set_title("At that token: what the policy thought likely")
    right.bar(range(len(tokens)), advantages, color=colours)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set_ylabel("A_TD(v) = delta(v) / sigma_V")
    right.set_title("and the TD advantage of every token")
    right.text(
        4.5, 0.8 * min(advantages), "grey: known too, but not used,\nsince pi_old(v) < P_min", color=GREY, ha="center"
    )
    written = TOKENS.index(shown.text[shown.error + 1])
    for v, word in ((shown.right, "right"), (written, "sampled")):
        place = tokens.index(v)
        left.text(place, old[place] + 0.02, f"{word}\n{old[place]:.2f}", ha="center", va="bottom")
        high = max(advantages[place], 0)
        right.text(place, high + 0.1, f"{word}\n{advantages[place]:+.1f}", ha="center", va="bottom")
    left.set_ylim(0, 1.3 * max(old))
    right.set_ylim(1.1 * min(advantages), max(1.0, *advantages) - 0.28 * min(advantages))
    for axis in (left, right):
        axis.set_xticks(range(len(tokens)), [TOKENS[v] for v in tokens], fontfamily="monospace", fontsize=13)


def draw_chunk(path: Path) -> None:
    """What happens to the rows of one chunk, left to right."""
    figure = plt.figure(figsize=(10, 5))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 50))
    axis.axis("off")
    axis.text(45, 47.5, "for each chunk of n rows", ha="center", va="center", fontsize=13, style="italic")
    draw_rows(axis, 4, "h  [N, D]", SKY)
    draw_box(axis, (16, 37, 9, 6), "W  [V, D]", LIGHT)
    draw_box(axis, (31, 34, 33, 6), "z: logits of n rows  [n, V]", YELLOW)
    draw_box(axis, (40, 24.5, 15, 5), "2  row kernel", "white", rounded=True)
    draw_box(axis, (31, 14, 33, 6), "dz = dLoss/dz / scale  [n, V]", YELLOW)
    draw_rows(axis, 88, "dh  [N, D]", SKY)
    draw_box(axis, (75, 3, 9, 6), "dW  [V, D]", LIGHT)
    draw_box(axis, (4, 2, 60, 7), f"[N, V] never exists: {sizes()}", "white", dashed=True)
    axis.text(
        21.6,
        26.6,
        "sampled token and\ncandidates: ids, old\nlog-probs, advantages\n[n, 1 + K]",
        ha="center",
        va="center",
    )
    axis.text(66, 27, "loss, metrics", va="center")
    for start, end, label, place in (
        ((12.3, 30), (30.6, 36), "1  z = h W\u1d40", (13.3, 35)),
        ((25.3, 40), (30.6, 38), "", (0, 0)),
        ((47.5, 33.6), (47.5, 29.9), "", (0, 0)),
        ((31.5, 27), (39.4, 27), "", (0, 0)),
        ((55.6, 27), (65.3, 27), "", (0, 0)),
        ((47.5, 23.9), (47.5, 20.4), "", (0, 0)),
        ((64.4, 18), (87.6, 30), "3  dh = scale dz W", (76.5, 20.5)),
        ((64.4, 15.5), (74.6, 8), "4  dW += dz\u1d40 h,\n    if W is trained", (72.5, 13)),
    ):
        axis.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=GREY, shrinkA=0, shrinkB=0)
        )
        axis.text(*place, label, va="center", ha="left")
    save(figure, path)


def sizes(rows: int = 16384, vocabulary: int = 151936, buffer: int = 416 << 20) -> str:
    """In float32 with its gradient in bfloat16; a chunk is what the default buffer of a GPU holds, by 128 rows."""
    n = buffer // (6 * vocabulary) // 128 * 128
    whole, chunk = (6 * vocabulary * count / 2**30 for count in (rows, n))
    return f"{whole:.1f} GiB for N = {rows}, V = {vocabulary};\na chunk of n = {n} rows takes {chunk:.1f} GiB"


def draw_rows(axis: Axes, x: float, label: str, colour: str) -> None:
    """A tall [N, D], cut into chunks; the one at hand is filled."""
    for number in range(6):
        here = number == 3
        axis.add_patch(Rectangle((x, 12 + 5 * number), 8, 5, facecolor=colour if here else "white", edgecolor="black"))
    axis.text(x + 4, 29.5, "n rows", ha="center", va="center")
    axis.text(x + 4, 44, label, ha="center", va="center")


def draw_box(axis: Axes, place: tuple, label: str, colour: str, *, rounded: bool = False, dashed: bool = False) -> None:
    x, y, width, height = place
    style = {"boxstyle": f"round,pad=0,rounding_size={1.5 if rounded else 0.01}", "linestyle": "--" if dashed else "-"}
    axis.add_patch(FancyBboxPatch((x, y), width, height, facecolor=colour, edgecolor="black", **style))
    axis.text(x + width / 2, y + height / 2, label, ha="center", va="center")


def save(figure: Figure, path: Path) -> None:
    """The same bytes on every run: no date, no random ids."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


STYLE = {
    "svg.hashsalt": "ipvrm-core",
    "font.size": 11.5,
    "axes.titlesize": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


def main(folder: Path, suffix: str = ".svg") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plt.rcParams.update(STYLE)
    draw_chunk(folder / f"chunk{suffix}")
    policy = train_policy()
    draw_credit(example(policy, train_reward_model(policy)), folder / f"credit{suffix}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
