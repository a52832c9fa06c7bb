"""`ipvrm report`: one self-contained page about a run, finished or not."""

from ipvrm_core.trainer.report.page import build

__all__ = ["build"]
