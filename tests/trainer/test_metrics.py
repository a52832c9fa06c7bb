"""metrics.jsonl after a kill, a full disk or a power cut: a spoilt last line costs itself, any other is named."""

import json
import os

import pytest

from ipvrm_core.trainer.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2)))
    return path


SPOILT = [b'{"step": 3, "lo', b'{"step": 3, "lo\n', b"\x00\x00\x00\n", b"\xff\xfe\n", b"7\n", b'{"loss": 1.0}\n']


@pytest.mark.parametrize("last", SPOILT)
def test_a_spoilt_last_line_does_not_block_a_resume(path, last, tmp_path):
    path.write_bytes(path.read_bytes() + last)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    with MetricsLog(tmp_path, "x", total=4, done=2) as metrics:
        metrics.log(3, loss=2.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("line", SPOILT[1:])
def test_a_spoilt_line_before_others_is_named(path, line):
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + second)
    with pytest.raises(ValueError, match=rf"{path}, line 2: not a line of metrics"):
        read_metrics(path)


def _log_on_a_full_disk(folder):
    with MetricsLog(folder, "x", total=4, done=2) as metrics:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, metrics.file.fileno())
        os.close(full)
        metrics.log(3, loss=2.0)


def test_a_full_disk_is_told_with_the_path(path, tmp_path):
    with pytest.raises(OSError, match=f"{path} could not be written: .*No space left"):
        _log_on_a_full_disk(tmp_path)
