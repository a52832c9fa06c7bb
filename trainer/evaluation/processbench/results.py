"""The numbers of ProcessBench from step scores: oracle and transferred F1, intervals, nulls, generators, official."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from ipvrm_core.trainer.evaluation.processbench import official
from ipvrm_core.trainer.evaluation.processbench.bootstrap import bootstrap_f1, interval, rule_f1, stacked
from ipvrm_core.trainer.evaluation.processbench.nulls import NULLS, Steps, null_draws, same_for
from ipvrm_core.trainer.evaluation.reward_model.localisation import F1, Sweep, harmonic
from ipvrm_core.trainer.evaluation.reward_model.step_scores import VARIANTS, variants


def evaluate(rows: Sequence[dict], tune_on: str = "gsm8k", resamples: int = 1000, seed: int = 0) -> dict:
    """Everything that the scores say, as a JSON-able dict.

    counts      per subset: problems, erroneous, correct, truncated, too_long (not scored, so in no F1).
    variants    per variant and rule ("oracle": best threshold of the subset itself; "transferred": the one tuned on
                `tune_on`): per subset f1, accuracy_erroneous, accuracy_correct, threshold (null: infinite), ci;
                and the average over subsets. "transferred" is left out where `tune_on` was not scored.
    nulls       per variant, null and rule: f1 of scores that know nothing (nulls.py), of random ones mean and ci of the
                draws.
    margins     per variant and rule, per subset and on average: the best null, and by how much the model is above it,
                with the ci of this difference in resamples of the same problems.
    generators  the same three numbers per generator, all subsets pooled, f1 null where it has one kind of solutions.
    official    the authors' script's numbers, where they were scored; truncated problems left out.

    A subset whose scored solutions are all of one kind has no F1: null, and its accuracy is the best one under the
    oracle rule, which says little. It is in no average, and no threshold is tuned on it.
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
    tuned = tune_on if tune_on in subsets and sweeps[VARIANTS[0]][tune_on].both else None
    drawn = _bootstrap(sweeps, tuned, resamples, seed)
    result = {"tuned_on": tuned, "resamples": resamples, "counts": {name: _counts(rows, name) for name in subsets}}
    result["variants"] = {variant: _variant(sweeps[variant], tuned, drawn.get(variant, {})) for variant in VARIANTS}
    if drawn:
        steps = {name: _steps(used[name], labels[name]) for name in _both(sweeps[VARIANTS[0]])}
        result |= _against_nulls(result["variants"], drawn, steps, tuned, resamples, seed)
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


def _steps(rows: Sequence[dict], labels: Sequence[int]) -> Steps:
    counts = [
        [None if value is None else tokens for value, tokens in zip(row["sums"], row["tokens"], strict=True)]
        for row in rows
    ]
    return Steps.make(counts, labels)


def _sweep(subset: str, scores: list[list[float]], labels: list[int]) -> Sweep:
    try:
        return Sweep.make(scores, labels, one_kind=True)
    except ValueError as error:
        raise ValueError(f"{subset}: {error}") from None


def _both(sweeps: Mapping[str, Sweep]) -> dict[str, Sweep]:
    """Those that have an F1."""
    return {name: sweep for name, sweep in sweeps.items() if sweep.both}


def _counts(rows: Sequence[dict], subset: str) -> dict[str, int]:
    own = [row for row in rows if row["subset"] == subset]
    return {
        "problems": len(own),
        "erroneous": sum(row["label"] >= 0 for row in own),
        "correct": sum(row["label"] < 0 for row in own),
        **{state: sum(row["status"] == state for row in own) for state in ("truncated", "too_long")},
    }


def _numbers(found: F1) -> dict:
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _bootstrap(sweeps: Mapping[str, dict[str, Sweep]], tuned: str | None, resamples: int, seed: int) -> dict:
    """{variant: F1 by rule and subset of every resample}, empty where there is nothing to resample."""
    if not resamples or not _both(sweeps[VARIANTS[0]]):
        return {}
    return {variant: bootstrap_f1([_both(sweeps[variant])], tuned, resamples, seed) for variant in VARIANTS}


def _variant(sweeps: dict[str, Sweep], tuned: str | None, drawn: dict) -> dict:
    oracle = {name: sweep.best() for name, sweep in sweeps.items()}
    rules = {"oracle": oracle}
    if tuned:
        rules["transferred"] = {name: sweep.at(oracle[tuned].threshold) for name, sweep in sweeps.items()}
    result = {}
    for rule, found in rules.items():
        result[rule] = {name: _numbers(value) for name, value in found.items()}
        result[rule]["average"] = {"f1": _average([value["f1"] for value in result[rule].values()])}
        for name, values_S in drawn.get(rule, {}).items():
            result[rule][name]["ci"] = interval(values_S)
    return result


def _against_nulls(
    found: Mapping[str, dict], drawn: Mapping[str, dict], steps: dict[str, Steps], tuned: str | None, resamples, seed
) -> dict:
    """{"nulls", "margins"} of `evaluate`."""
    keys = {variant: {null: (null, same_for(null, variant)) for null in NULLS} for variant in VARIANTS}
    distinct = {key: variant for variant in VARIANTS for key in keys[variant].values()}
    draws = {key: null_draws(key[0], variant, steps, seed) for key, variant in distinct.items()}
    shares = {key: stacked([rule_f1(sweeps, tuned) for sweeps in made]) for key, made in draws.items()}
    resampled = cache(lambda key: bootstrap_f1(draws[key], tuned, resamples, seed))

    def margin(variant: str, rule: str, name: str) -> dict:
        f1 = {null: float(shares[key][rule][name].mean()) for null, key in keys[variant].items()}
        best = max(f1, key=f1.__getitem__)
        difference_S = drawn[variant][rule][name] - resampled(keys[variant][best])[rule][name]
        difference = found[variant][rule][name]["f1"] - f1[best]
        return {"null": best, "difference": difference, "ci": interval(difference_S)}

    return {
        "nulls": {
            variant: {null: _null_numbers(shares[key]) for null, key in keys[variant].items()} for variant in VARIANTS
        },
        "margins": {
            variant: {rule: {name: margin(variant, rule, name) for name in row} for rule, row in drawn[variant].items()}
            for variant in VARIANTS
        },
    }


def _null_numbers(shares: dict[str, dict[str, np.ndarray]]) -> dict:
    """Mean of the draws and, of several, their interval."""
    return {
        rule: {
            name: {"f1": float(values_D.mean()), **({"ci": interval(values_D)} if len(values_D) > 1 else {})}
            for name, values_D in row.items()
        }
        for rule, row in shares.items()
    }


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
        found["average"] = {"f1": _average([value["f1"] for value in found.values()])}
    return result
