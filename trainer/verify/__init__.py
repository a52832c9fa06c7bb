"""Verifiers: whether a response states the gold answer."""

from ipvrm_core.trainer.verify.base import Verdict, Verifier
from ipvrm_core.trainer.verify.exact import ExactVerifier

__all__ = ["JUDGES", "ExactVerifier", "Verdict", "Verifier", "make_verifier"]

JUDGES = {"math": "ipvrm_core.trainer.verify.math:judge", "boxed": "ipvrm_core.trainer.verify.math:judge_boxed"}


def make_verifier(spec: str, **settings) -> Verifier:
    r"""A verifier by name; the settings are those of `PooledVerifier`.

    "exact"                    normalised text after the last "#", in this process; the settings do not apply.
    "math"                     math-verify in worker processes, on the last answer that the response states.
    "boxed"                    the same on the content of the last \boxed{} alone.
    "package.module:function"  your own f(response, gold) -> bool in worker processes; imports that module.
    """
    if spec == "exact":
        return ExactVerifier()
    # The exact verifier needs no processes.
    from ipvrm_core.trainer.verify.pool import PooledVerifier

    judge = JUDGES.get(spec, spec)
    if ":" not in judge:
        raise ValueError(f"unknown verifier {spec!r}; expected 'exact', 'math', 'boxed' or 'package.module:function'")
    return PooledVerifier(judge, **settings)
