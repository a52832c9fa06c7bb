"""Writing so that a kill at any moment leaves either the old state or the new one."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, but is someone else's
    return True


def write_file(path: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a temporary file, flush it to disk, rename it to `path`. What killed processes left of it is removed."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if not _alive(left.suffixes[-2][1:]):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two phases may start side by side
    fill(temporary)
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """The whole text or nothing."""
    write_file(path, lambda target: target.write_text(text))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a temporary folder, flush it to disk, rename it to `path` (which must not exist yet)."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    for item in [*temporary.rglob("*"), temporary]:
        _fsync(item)
    os.rename(temporary, path)
    _fsync(path.parent)


def remove_folder(path: Path) -> None:
    """Rename first: a half-deleted folder must not look like a whole one."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; RuntimeError if another live process holds it. Dies with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{folder} is in use by another running process") from None
        yield
