"""What a type checker and an editor find in the installed package."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ipvrm_core

ROOT = Path(__file__).resolve().parents[2]
# torch is read as Any, in seconds rather than a minute; a name that leads nowhere is Any as well
CONFIG = "[mypy]\n[mypy-torch.*,triton.*,einops.*]\nfollow_imports = skip\nignore_missing_imports = True\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder for sys.path, with the wheel in it (a wheel of Python alone is installed by unpacking)."""
    pytest.importorskip("build")
    out, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("copy") / "repository"
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))
    command = [sys.executable, "-W", "ignore", "-m", "build", "--no-isolation", "--wheel", "--outdir", out, copy]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        wheel.extractall(out / "site")
    return out / "site"


@pytest.fixture(scope="module")
def revealed(installed, tmp_path_factory) -> dict[str, str]:
    """The type of each public name. As in any environment, mypy reads only packages that have a py.typed."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "mypy.ini").write_text(CONFIG)
    lines = ["import ipvrm_core as ic", *(f"reveal_type(ic.{name})" for name in ipvrm_core.__all__)]
    (folder / "names.py").write_text("\n".join(lines))
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", os.devnull, "names.py"],
        cwd=folder,  # not the checkout, which would come first
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    types = re.findall(r'Revealed type is "(.*)"$', ran.stdout, re.MULTILINE)
    return dict(zip(ipvrm_core.__all__, types, strict=True))


def test_every_public_name_has_a_type(revealed):
    assert {name: shown for name, shown in revealed.items() if shown == "Any"} == {}
    assert "ipvrm_core.method.Method" in revealed["METHODS"]


def test_the_loss_has_its_signature(revealed):
    shown = revealed["distrl_loss"]
    assert re.findall(r"(\w+): ", shown) == list(inspect.signature(ipvrm_core.distrl_loss).parameters)
    assert "batch: ipvrm_core.types.PolicyBatch, config: ipvrm_core.types.PolicyLossConfig" in shown
    assert shown.endswith("fallback=ipvrm_core.types.PolicyLossOutput]")


def defined(name: str, package: Path) -> tuple[Path, int]:
    """The file and the line where a public name gets its meaning."""
    path = package / f"{ipvrm_core._HOMES.get(name, '__init__').replace('.', '/')}.py"
    lines = enumerate(path.read_text().splitlines(), start=1)
    return path, next(number for number, line in lines if re.match(rf"(def |class |){name}\b", line))


def test_an_editor_goes_to_the_definition(installed, tmp_path, monkeypatch):
    jedi = pytest.importorskip("jedi")
    monkeypatch.setattr(jedi.settings, "cache_directory", str(tmp_path))
    project = jedi.Project(tmp_path, sys_path=[str(installed)], smart_sys_path=False)
    names = ipvrm_core.__all__
    code = "\n".join(["import ipvrm_core as ic", *(f"ic.{name}" for name in names)])
    script = jedi.Script(code, project=project, environment=jedi.InterpreterEnvironment())
    found = {name: script.goto(line, len("ic."), follow_imports=True) for line, name in enumerate(names, start=2)}
    places = {name: [(place.module_path, place.line) for place in there] for name, there in found.items()}
    assert places == {name: [defined(name, installed / "ipvrm_core")] for name in names}
