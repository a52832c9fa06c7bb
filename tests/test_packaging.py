"""What a user gets: the wheel, its description, the source distribution, the command without the trainer extra."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from ipvrm_core.trainer import entry

ROOT = Path(__file__).resolve().parents[1]
LOCAL_LINK = re.compile(r"\]\((?!\w+:|#)")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, unpacked as `source/`, and the wheel that was built from it."""
    pytest.importorskip("build")
    out, copy = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("copy") / "repository"
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))
    command = [sys.executable, "-W", "ignore", "-m", "build", "--no-isolation", "--outdir", out, copy]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out, filter="data")
    next(path for path in out.iterdir() if path.is_dir()).rename(out / "source")
    return out


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel):
    return HeaderParser().parsestr(next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("/METADATA")))


def test_wheel_metadata(metadata):
    assert metadata["Author"] == "the ipvrm-core authors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "GRPO" in metadata["Keywords"].split(",")
    assert metadata.get_all("Project-URL") is None
    assert metadata["Home-page"] is None


def test_the_long_description_has_no_link_that_leads_nowhere(metadata):
    """A package index has no docs/ folder: local links are written out, and what they name is in the sdist."""
    readme, shown = (ROOT / "README.md").read_text(), metadata.get_payload()
    targets = re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", readme)
    assert "docs/method.md" in targets
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert not LOCAL_LINK.search(shown)
    assert [target for target in targets if target not in shown] == []
    assert "source distribution" in shown


def test_wheel_files(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"ipvrm_core", names[-1].split("/")[0]}  # nothing named kernels
    for name in ("py.typed", "kernels/softmax.py", "trainer/configs/demo.toml", "trainer/report/page.html"):
        assert f"ipvrm_core/{name}" in names


def test_sdist_holds_the_repository(built):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    kept = [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]
    assert [path for path in kept if not (built / "source" / path).is_file()] == []
    assert not list((built / "source").rglob("*.pyc"))


def test_tests_run_from_the_sdist(built):
    """In a fresh folder; the imports must not come from this checkout. Without conftest.py, which is slow to import."""
    source = built / "source"
    (source / "tests" / "test_place.py").write_text(
        "import ipvrm_core\nfrom ipvrm_core.trainer.config import load\n\n\n"
        "def test_place():\n"
        f"    assert ipvrm_core.__file__.startswith({str(source)!r})\n"
        "    assert load('demo', []).rm\n"
    )
    files = ["tests/test_place.py", "tests/core/test_packing.py"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *files]
    ran = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_command_without_its_packages_says_what_to_install(monkeypatch, capsys):
    there = entry.find_spec
    monkeypatch.setattr(entry, "find_spec", lambda name: None if name in ("pydantic", "math_verify") else there(name))
    assert entry.main(["config"]) == 2
    error = capsys.readouterr().err
    assert error == 'ipvrm needs: pip install "ipvrm-core[trainer]"  (missing: math_verify, pydantic)\n'


def test_the_command_loads_nothing_of_the_trainer_before_it_has_looked():
    code = "import sys; sys.modules['pydantic'] = None; from ipvrm_core.trainer.entry import main"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_command_starts_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"ipvrm": "ipvrm_core.trainer.entry:main"}
    assert entry.missing_packages() == []
    assert entry.main(["config"]) == 0
