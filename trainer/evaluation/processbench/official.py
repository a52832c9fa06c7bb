"""ProcessBench as the authors' published script has it, quirks included, so that its numbers can be compared with ours.

What differs from ours (read from process_bench/process_eval.py of gaoshiping/IPVRM, June 2026):
* steps are written "Step 1: ...", and each boundary is the length of a separate tokenisation of the conversation up to
  that step, end-of-turn token and a blank line included, less 2: it lies up to two tokens inside the next step;
* the last step holds the end-of-turn token;
* a mean divides by one less than the number of tokens summed;
* sigma(0.001 * sum) is cut by 1000 equidistant thresholds in [-1, 1]: of those, about one for every 8 nats;
* sums are float32;
* every token equal to the padding token is masked in attention, in problem and answer too, though it is still scored.
  The padding token is the tokenizer's own, or EOS where it has none: where it also ends the turns (pad = eos, as in
  SmolLM2) nothing sees the end of the user's turn; where it is a token of its own (Qwen) nothing changes.
"""

from collections.abc import Sequence

import numpy as np

from ipvrm_core.trainer.evaluation.reward_model.localisation import F1, Sweep
from ipvrm_core.trainer.text.steps import Format, chat_text

COEFFICIENT = 0.001
THRESHOLDS = 1000
FORMAT = Format(step="Step {number}: {step}")
NAMES = {"prefix": "sum", "process": "sum_diff", "prefix_mean": "mean", "process_mean": "mean_diff"}  # ours: theirs


def boundaries(tokenizer, problem: str, steps: Sequence[str], form: Format = FORMAT) -> list[int]:
    """[1 + S]: rows of the shifted log-probs (row j predicts token j + 1) where the sum starts, and of each step's end.

    Needs a chat template, as the script does.
    """
    if not tokenizer.chat_template:
        raise ValueError("the official mode needs a tokenizer with a chat template")
    pieces, ends = form.pieces(steps), []
    for count in range(len(pieces) + 1):
        text = chat_text(tokenizer, problem, "\n\n".join(pieces[:count]), form.system_prompt, "problem").strip()
        text += "\n\n" if 0 < count < len(pieces) else ""
        ends.append(max(0, len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 2))
    return ends


def rewards(log_ratio: Sequence[float], rows: Sequence[int]) -> tuple[list[float], list[int]]:
    """The script's `reward` of every step, and what its mean divides by; log_ratio[j] is of token j + 1."""
    rows = [min(row, len(log_ratio) - 1) for row in rows]
    q_N = np.float32(COEFFICIENT) * np.asarray(log_ratio, np.float32)
    q_N[: rows[0]] = 0
    total_N = q_N.cumsum(dtype=np.float32)
    return total_N[rows[1:]].tolist(), [row - rows[0] for row in rows[1:]]


def variants(reward: Sequence[float], lengths: Sequence[int]) -> dict[str, np.ndarray]:
    """The four probabilities of every step, under our names."""
    reward_S, length_S = np.asarray(reward, float), np.asarray(lengths)
    mean_S = np.divide(reward_S, length_S, out=np.zeros_like(reward_S), where=length_S > 0)
    own_S = np.diff(reward_S, prepend=0.0)
    # The script gets the lengths back from sum / mean, and where the mean is 0 counts one token.
    recovered = [0]
    for length, mean in zip(length_S, mean_S, strict=True):
        recovered.append(int(length) if abs(mean) > 1e-9 else recovered[-1] + 1)
    own_length_S = np.maximum(np.diff(recovered), 1)
    scale = np.sqrt(COEFFICIENT)
    exponents = {
        "prefix": reward_S,
        "process": own_S,
        "prefix_mean": mean_S / scale,
        "process_mean": own_S / own_length_S / scale,
    }
    return {name: 1 / (1 + np.exp(-exponent_S)) for name, exponent_S in exponents.items()}


def best_f1(probabilities: Sequence[Sequence[float]], labels: Sequence[int]) -> F1:
    """The best F1 of the script's grid, of equal ones the first; no other threshold is tried. nan of one kind alone."""
    return Sweep.make(probabilities, labels, np.linspace(-1, 1, THRESHOLDS), one_kind=True).best()
