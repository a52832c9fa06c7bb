"""Verifiers: whether a response states the gold answer."""

from ipvrm_core.trainer.verify.base import Verdict, Verifier
from ipvrm_core.trainer.verify.exact import ExactVerifier

__all__ = ["ExactVerifier", "Verdict", "Verifier", "make_verifier"]


def make_verifier(spec: str, *, timeout_s: float = 5.0, workers: int = 2) -> Verifier:
    """A verifier by name.

    "exact"                    normalised text after the last "#", in this process; timeout_s and workers do not apply.
    "math"                     math-verify in worker processes.
    "package.module:function"  your own f(response, gold) -> bool in worker processes.
    """
    if spec == "exact":
        return ExactVerifier()
    # The exact verifier needs no processes.
    from ipvrm_core.trainer.verify.pool import PooledVerifier

    if spec == "math":
        return PooledVerifier("ipvrm_core.trainer.verify.math:judge", timeout_s=timeout_s, workers=workers)
    if ":" in spec:
        return PooledVerifier(spec, timeout_s=timeout_s, workers=workers)
    raise ValueError(f"unknown verifier {spec!r}; expected 'exact', 'math' or 'package.module:function'")
