"""Writing so that a kill at any moment leaves either the old state or the new one, and reading that names the file."""

import errno
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A failure to write says where: a full disk comes without a name, and from Rust as a class of its own."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path} could not be written: {error}") from error
    except Exception as error:
        from safetensors import SafetensorError

        if type(error) is not Exception and not isinstance(error, SafetensorError):
            raise
        raise OSError(f"{path} could not be written: {error}") from error


def write_file(path: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a temporary file, flush it to disk, rename it to `path`. What killed processes left of it is removed."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if not _alive(left.suffixes[-2][1:]):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two phases may start side by side
    try:
        with naming(path):
            fill(temporary)
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The whole text or nothing."""
    write_file(path, lambda target: target.write_text(text))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path):
    """ValueError names the file if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # bytes that are no text, or a text that is no JSON
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_tensors(path: Path) -> dict:
    """A safetensors file; ValueError names it if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a temporary folder, flush it to disk, rename it to `path` (which must not exist yet)."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with naming(path):
            temporary.mkdir(parents=True)
            fill(temporary)
            for item in [*temporary.rglob("*"), temporary]:
                _fsync(item)
            os.rename(temporary, path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Rename first: a half-deleted folder must not look like a whole one."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of the above; the caller holds `folder`."""
    for left in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; RuntimeError if another live process holds it. Dies with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:  # a symbolic link would make, and hold, a file anywhere
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path} must be a file; got a symbolic link to {os.readlink(path)}") from None
        raise
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{folder} is in use by another running process") from None
        yield
    finally:
        os.close(handle)
