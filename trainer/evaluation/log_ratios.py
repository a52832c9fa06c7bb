"""The former name of `token_scores`; goes once phases/evaluate.py has the new one."""

from ipvrm_core.trainer.evaluation.token_scores import Scorer as Pair

__all__ = ["Pair"]
