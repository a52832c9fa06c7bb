"""The Markdown of `ipvrm processbench`: what one looks at first, in %."""

from collections.abc import Iterable, Sequence

from ipvrm_core.trainer.evaluation.processbench.nulls import DRAWS, NULLS, RANDOM, same_for


def markdown(result: dict, variants: Sequence[str] = ("process", "prefix")) -> str:
    """`variants`: the ones shown first."""
    subsets = [*result["counts"], "average"]
    shown = {name: result["variants"][name] for name in [*variants, *result["variants"]]}
    table = [_row(variant, _rule(result, rule), map(found.get, subsets)) for variant, rule, found in _flat(shown)]
    for variant, found in result.get("official", {}).items():
        table.append(_row(variant, "official", map(found.get, subsets)))
    lines = [*_head("score", subsets), *table, ""]
    lines.append("F1, in brackets its 95% interval, then the accuracies on erroneous / correct solutions.")
    for name, counts in result["counts"].items():
        lines.append(_count(name, counts))
    if result["tuned_on"] is None:
        lines.append("No transferred threshold: no subset to tune it on, with solutions of both kinds, was scored.")
    if "nulls" in result:
        lines += ["", *_null_tables(result, shown, subsets)]
    return "\n".join([*lines, "", *_generator_table(result, variants[0])])


def _head(first: str, columns: Sequence[str]) -> list[str]:
    return [f"| {first} | threshold | " + " | ".join(columns) + " |", "| --- | --- |" + " --- |" * len(columns)]


def _row(name: str, rule: str, cells: Iterable[dict | None]) -> str:
    return f"| {name} | {rule} | " + " | ".join(map(_cell, cells)) + " |"


def _flat(table: dict) -> list[tuple[str, str, dict]]:
    return [(name, rule, found) for name, rules in table.items() for rule, found in rules.items()]


def _rule(result: dict, rule: str) -> str:
    return rule if rule == "oracle" else f"from {result['tuned_on']}"


def _count(name: str, counts: dict) -> str:
    lost = [f"{counts[state]} {state.replace('_', ' ')}" for state in ("truncated", "too_long") if counts[state]]
    alone = [kind for kind, other in (("erroneous", "correct"), ("correct", "erroneous")) if not counts[other]]
    return (
        f"{name}: {counts['problems']} problems, {counts['erroneous']} erroneous, {counts['correct']} correct"
        + (f"; {' and '.join(lost)}" if lost else "")
        + (f"; {alone[0]} ones alone have no F1, and the oracle's accuracy says little" if alone else "")
    )


def _null_tables(result: dict, shown: dict, subsets: Sequence[str]) -> list[str]:
    """What scores without meaning reach, and how far the model is above the best of them."""
    rows = {}
    for variant in shown:
        for null in NULLS:
            of = {"any": "", "process": " of the step", "prefix": " so far"}.get(
                same_for(null, variant), f", {variant}"
            )
            name = f"{null}, {variant}" if null == "random walk" else null + of
            rows.setdefault(name, result["nulls"][variant][null])
    table = [_row(name, _rule(result, rule), map(found.get, subsets)) for name, rule, found in _flat(rows)]
    return [
        *_head("no model", subsets),
        *table,
        "",
        f"F1 of scores that know nothing of the text; of {' and '.join(RANDOM)} mean and 95% range of {DRAWS} draws.",
        "",
        *_head("above the best of these", subsets),
        *(
            f"| {variant} | {_rule(result, rule)} | " + " | ".join(_margin(found.get(name)) for name in subsets) + " |"
            for variant, rule, found in _flat({variant: result["margins"][variant] for variant in shown})
        ),
        "",
        "Difference of F1 to the best null of the same variant, its 95% interval in resamples of the same problems, "
        "and which null that is.",
    ]


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
            + " | ".join(_percent(share, 1) for share in shares)
            + " |"
        )
    return lines


def _percent(share: float | None, digits: int) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def _cell(found: dict | None) -> str:
    if found is None:
        return "–"
    text = _percent(found["f1"], 1)
    if "ci" in found:
        text += f" [{100 * found['ci'][0]:.1f}, {100 * found['ci'][1]:.1f}]"
    if "accuracy_correct" in found:
        text += f" {_percent(found['accuracy_erroneous'], 0)}/{_percent(found['accuracy_correct'], 0)}"
    return text


def _margin(found: dict | None) -> str:
    if found is None:
        return "–"
    return (
        f"{100 * found['difference']:+.1f} [{100 * found['ci'][0]:+.1f}, {100 * found['ci'][1]:+.1f}] {found['null']}"
    )
