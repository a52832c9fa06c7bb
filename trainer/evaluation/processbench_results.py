"""The numbers of ProcessBench from step scores: oracle and transferred F1, intervals, generators, official mode."""

import math
from collections.abc import Sequence

import numpy as np

from ipvrm_core.trainer.evaluation import official
from ipvrm_core.trainer.evaluation.bootstrap import bootstrap_f1, interval
from ipvrm_core.trainer.evaluation.chance import chance_f1
from ipvrm_core.trainer.evaluation.localisation import F1, Sweep, harmonic
from ipvrm_core.trainer.evaluation.step_scores import VARIANTS, variants

CHANCE_DRAWS = 100


def evaluate(rows: Sequence[dict], tune_on: str = "gsm8k", resamples: int = 1000, seed: int = 0) -> dict:
    """Everything that the scores say, as a JSON-able dict.

    counts      per subset: problems, erroneous, correct, truncated, too_long (not scored, so in no F1).
    variants    per variant and rule ("oracle": best threshold of the subset itself; "transferred": the one tuned on
                `tune_on`): per subset f1, accuracy_erroneous, accuracy_correct, threshold (null: infinite), ci;
                and the average over subsets. "transferred" is left out where `tune_on` was not scored.
    chance      per rule and subset: f1 and ci of random step scores, mean and 95% range over CHANCE_DRAWS of them.
    generators  the same three numbers per generator, all subsets pooled, f1 null where it has one kind of solutions.
    official    the authors' script's numbers, where they were scored; truncated problems left out.
    """
    subsets = list(dict.fromkeys(row["subset"] for row in rows))
    used = {name: [row for row in rows if row["subset"] == name and row["sums"] is not None] for name in subsets}
    empty = [name for name, some in used.items() if not some]
    if empty:
        raise ValueError(f"no problem of {', '.join(empty)} was scored (all are too long)")
    labels = {name: [row["label"] for row in some] for name, some in used.items()}
    scores = {name: [_scores(row) for row in some] for name, some in used.items()}
    sweeps = {
        variant: {name: _sweep(name, [item[variant] for item in scores[name]], labels[name]) for name in subsets}
        for variant in VARIANTS
    }
    tuned = tune_on if tune_on in subsets else None
    result = {"tuned_on": tuned, "resamples": resamples, "counts": {name: _counts(rows, name) for name in subsets}}
    result["variants"] = {variant: _variant(sweeps[variant], tuned, resamples, seed) for variant in VARIANTS}
    if resamples:
        steps = {name: [len(row["sums"]) for row in some] for name, some in used.items()}
        drawn = chance_f1(steps, labels, tuned, CHANCE_DRAWS, seed)
        result["chance"] = {
            rule: {name: {"f1": float(values.mean()), "ci": interval(values)} for name, values in found.items()}
            for rule, found in drawn.items()
        }
    result["generators"] = {variant: _generators(sweeps[variant], used, tuned) for variant in VARIANTS}
    marked = {name: [row for row in some if row.get("official_rewards")] for name, some in used.items()}
    if all(marked.values()):
        result["official"] = _official(marked)
    return result


def _scores(row: dict) -> dict[str, list[float]]:
    """The variants of one problem; steps behind a truncation can be below no threshold."""
    known = [value for value in row["sums"] if value is not None]
    unknown = [math.inf] * (len(row["sums"]) - len(known))
    return {name: [*values, *unknown] for name, values in variants(known, row["tokens"][: len(known)]).items()}


def _sweep(subset: str, scores: list[list[float]], labels: list[int]) -> Sweep:
    try:
        return Sweep.make(scores, labels)
    except ValueError as error:
        raise ValueError(f"{subset}: {error}") from None


def _counts(rows: Sequence[dict], subset: str) -> dict[str, int]:
    own = [row for row in rows if row["subset"] == subset]
    return {
        "problems": len(own),
        "erroneous": sum(row["label"] >= 0 for row in own),
        "correct": sum(row["label"] < 0 for row in own),
        **{state: sum(row["status"] == state for row in own) for state in ("truncated", "too_long")},
    }


def _numbers(found: F1) -> dict:
    return {**found._asdict(), "threshold": found.threshold if math.isfinite(found.threshold) else None}


def _variant(sweeps: dict[str, Sweep], tuned: str | None, resamples: int, seed: int) -> dict:
    oracle = {name: sweep.best() for name, sweep in sweeps.items()}
    rules = {"oracle": oracle}
    if tuned:
        rules["transferred"] = {name: sweep.at(oracle[tuned].threshold) for name, sweep in sweeps.items()}
    drawn = bootstrap_f1(sweeps, tuned, resamples, seed) if resamples else {}
    result = {}
    for rule, found in rules.items():
        result[rule] = {name: _numbers(value) for name, value in found.items()}
        result[rule]["average"] = {"f1": float(np.mean([value.f1 for value in found.values()]))}
        for name, values_S in drawn.get(rule, {}).items():
            result[rule][name]["ci"] = interval(values_S)
    return result


def _generators(sweeps: dict[str, Sweep], used: dict[str, list[dict]], tuned: str | None) -> dict:
    """Thresholds are those of the subsets (oracle) or the tuned one; only the problems are split up."""
    names = np.array([row["generator"] for some in used.values() for row in some])
    erroneous_R = np.concatenate([sweep.erroneous_R for sweep in sweeps.values()])
    rules = {"oracle": [sweep.right(sweep.best().threshold) for sweep in sweeps.values()]}
    if tuned:
        threshold = sweeps[tuned].best().threshold
        rules["transferred"] = [sweep.right(threshold) for sweep in sweeps.values()]
    result: dict = {}
    for generator in sorted(set(names)):
        own_R = names == generator
        kinds = {"erroneous": own_R & erroneous_R, "correct": own_R & ~erroneous_R}
        entry = {kind: int(kind_R.sum()) for kind, kind_R in kinds.items()}
        for rule, hits in rules.items():
            right_R = np.concatenate(hits)
            shares = {kind: float(right_R[kind_R].mean()) if kind_R.any() else None for kind, kind_R in kinds.items()}
            both = None not in shares.values()
            entry[rule] = {
                "f1": float(harmonic(shares["erroneous"], shares["correct"])) if both else None,
                **{f"accuracy_{kind}": share for kind, share in shares.items()},
            }
        result[generator] = entry
    return result


def _official(marked: dict[str, list[dict]]) -> dict:
    result: dict = {variant: {} for variant in VARIANTS}
    for name, rows in marked.items():
        scored = [official.variants(row["official_rewards"], row["official_lengths"]) for row in rows]
        for variant in VARIANTS:
            found = official.best_f1([item[variant] for item in scored], [row["label"] for row in rows])
            result[variant][name] = _numbers(found)
    for found in result.values():
        found["average"] = {"f1": float(np.mean([value["f1"] for value in found.values()]))}
    return result


def markdown(result: dict, variants: Sequence[str] = ("process", "prefix")) -> str:
    """The tables that one looks at, in %."""
    subsets = [*result["counts"], "average"]
    lines = ["| score | threshold | " + " | ".join(subsets) + " |", "| --- | --- |" + " --- |" * len(subsets)]
    shown = {name: result["variants"][name] for name in [*variants, *result["variants"]]}
    if "chance" in result:
        shown["random scores"] = result["chance"]
    for variant, rules in shown.items():
        for rule, found in rules.items():
            threshold = rule if rule == "oracle" else f"from {result['tuned_on']}"
            lines.append(f"| {variant} | {threshold} | " + " | ".join(_cell(found[name]) for name in subsets) + " |")
    for variant, found in result.get("official", {}).items():
        lines.append(f"| {variant} | official | " + " | ".join(_cell(found[name]) for name in subsets) + " |")
    lines += ["", "F1, in brackets its 95% interval, then the accuracies on erroneous / correct solutions."]
    if "chance" in result:
        lines.append(f"Random scores: independent normal ones; mean and 95% range of {CHANCE_DRAWS} draws.")
    for name, counts in result["counts"].items():
        lost = [f"{counts[state]} {state.replace('_', ' ')}" for state in ("truncated", "too_long") if counts[state]]
        lines.append(
            f"{name}: {counts['problems']} problems, {counts['erroneous']} erroneous, {counts['correct']} correct"
            + (f"; {' and '.join(lost)}" if lost else "")
        )
    if result["tuned_on"] is None:
        lines.append("No transferred threshold: the subset to tune it on was not scored.")
    lines += ["", *_generator_table(result, variants[0])]
    return "\n".join(lines)


def _generator_table(result: dict, variant: str) -> list[str]:
    rule = "transferred" if result["tuned_on"] else "oracle"
    lines = [
        f"| generator ({variant}, {rule}) | erroneous | correct | F1 | on erroneous | on correct |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for generator, entry in result["generators"][variant].items():
        found = entry[rule]
        shares = [found["f1"], found["accuracy_erroneous"], found["accuracy_correct"]]
        lines.append(
            f"| {generator or '(none)'} | {entry['erroneous']} | {entry['correct']} | "
            + " | ".join("–" if share is None else f"{100 * share:.1f}" for share in shares)
            + " |"
        )
    return lines


def _cell(found: dict) -> str:
    text = f"{100 * found['f1']:.1f}"
    if "ci" in found:
        text += f" [{100 * found['ci'][0]:.1f}, {100 * found['ci'][1]:.1f}]"
    if "accuracy_correct" in found:
        text += f" {100 * found['accuracy_erroneous']:.0f}/{100 * found['accuracy_correct']:.0f}"
    return text
