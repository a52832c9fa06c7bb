"""Files: whole or not at all, locks, full disks, damage that is named."""

import json
import os

import pytest
from safetensors import SafetensorError

from ipvrm_core.trainer import files


def test_write_text_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            files.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}


def test_a_lock_is_exclusive_and_ends_with_its_block(tmp_path):
    with files.locked(tmp_path), pytest.raises(RuntimeError, match="in use"), files.locked(tmp_path):
        raise AssertionError("locked twice")
    with files.locked(tmp_path):
        pass


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    """Opening it would empty, or make, the file that it leads to."""
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(OSError, match=r"run/\.lock must be a file; got a symbolic link"),
        files.locked(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        Exception("No space left on device"),  # as tokenizers has it
    ],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize("write", [files.write_file, files.write_folder])
def test_a_full_disk_is_told_with_the_path_and_leaves_nothing(tmp_path, write, failure):
    def fill(target):
        (target / "part" if target.is_dir() else target).write_text("half")
        raise failure

    with pytest.raises(OSError, match=r"/result could not be written: .*No space left on device"):
        write(tmp_path / "result", fill)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_program_is_no_full_disk(tmp_path):
    with pytest.raises(TypeError):
        files.write_file(tmp_path / "result", lambda _: len(3))


@pytest.mark.parametrize(("read", "name"), [(files.read_json, "a.json"), (files.read_tensors, "a.safetensors")])
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path, read, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name}: not"):
        read(tmp_path / name)
