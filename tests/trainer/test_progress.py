"""Long work says how far it has come where there is no terminal."""

import io
import sys
import time

from ipvrm_core.trainer.progress import Progress, progress


def test_lines_without_a_terminal_even_while_nothing_is_finished(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with Progress("scores", 40, done=10, unit="problem", every=0.02) as shown:
        time.sleep(0.05)
        assert written.getvalue().startswith("scores 10/40 problems  0 s\n")
        shown.update(5)
        time.sleep(0.05)
    lines = written.getvalue().splitlines()
    assert lines[-1].startswith("scores 15/40 problems  0 s, ")
    time.sleep(0.05)
    assert written.getvalue().splitlines() == lines  # the work is over


def test_short_work_is_silent_and_keeps_its_items(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    assert list(progress("abc", "letters")) == ["a", "b", "c"]
    assert written.getvalue() == ""


def test_the_time_that_is_left(monkeypatch):
    """5 of 30 units in 60 s: 25 more take 300 s."""
    with Progress("x", 40, done=10, every=60) as shown:
        shown.update(5)
        monkeypatch.setattr(time, "monotonic", lambda: shown.began + 60)
        assert shown.line() == "x 15/40 steps  60 s, 5.0 min left"
