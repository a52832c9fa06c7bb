"""What scores without any meaning reach by the same procedure.

A threshold that is chosen on the very problems it is judged by fits their noise: on forty problems independent random
step scores have an oracle F1 of about 20%. A reward model has to be above that.

Letters: D draws.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ipvrm_core.trainer.evaluation.localisation import Sweep


def chance_f1(
    steps: Mapping[str, Sequence[int]], labels: Mapping[str, Sequence[int]], tune_on: str | None, draws: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """{"oracle" | "transferred": {subset | "average": F1 of every draw [D]}} of standard normal step scores.

    steps: the number of steps of every problem.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, np.ndarray]] = {"oracle": {name: np.empty(draws) for name in steps}}
    if tune_on is not None:
        found["transferred"] = {name: np.empty(draws) for name in steps}
    for d in range(draws):
        sweeps = {
            name: Sweep.make([rng.standard_normal(count) for count in counts], labels[name])
            for name, counts in steps.items()
        }
        best = {name: sweep.best() for name, sweep in sweeps.items()}
        for name, sweep in sweeps.items():
            found["oracle"][name][d] = best[name].f1
            if tune_on is not None:
                found["transferred"][name][d] = sweep.at(best[tune_on].threshold).f1
    for values in found.values():
        values["average"] = np.mean([values[name] for name in steps], axis=0)
    return found
