"""The import directions of the repository, read from the source of every file.

kernels -> torch, triton | ipvrm_core in floors, each on those below it, kernels lazily | trainer, bench -> anything but
each other, and no circle between rooms (a folder, or a file beside them) | nobody else imports trainer or bench.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ipvrm_core

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "trainer", "bench", "tests")
ANY = ("",)


class Rule(NamedTuple):
    """Prefixes of dotted names. The standard library is always allowed; `refused` wins over the others."""

    allowed: tuple[str, ...]
    lazily: tuple[str, ...] = ()  # also allowed inside functions and under TYPE_CHECKING
    refused: tuple[str, ...] = ()


OTHERS = ("ipvrm_core.trainer", "ipvrm_core.bench")
FLOORS = (  # of ipvrm_core: each imports from itself and from those before it
    ("ipvrm_core.dispatch", "ipvrm_core.packing", "ipvrm_core.registry"),
    ("ipvrm_core.sequences",),
    ("ipvrm_core.types",),
    ("ipvrm_core.reference",),
    ("ipvrm_core.fused",),
    ("ipvrm_core.ops",),
    ("ipvrm_core.heads", "ipvrm_core.method", "ipvrm_core.objectives"),
    ("ipvrm_core.estimators",),
    ("ipvrm_core.credit",),
)
KERNELS = ("ipvrm_core.kernels", "triton")


def _floors() -> dict[str, Rule]:
    rules, below = {}, ("torch", "einops")
    for floor in FLOORS:
        below = (*below, *floor)
        for room in floor:
            path = room.replace(".", "/")
            lazily = KERNELS if path in ("ipvrm_core/sequences", "ipvrm_core/fused") else ()
            rules[path if (ROOT / path).is_dir() else f"{path}.py"] = Rule(below, lazily=lazily)
    return rules


RULES = {  # the longest matching path decides
    "": Rule(ANY, refused=OTHERS),
    "kernels": Rule(("torch", "triton", "ipvrm_core.kernels")),
    "ipvrm_core": Rule(("torch", "einops", "ipvrm_core"), refused=("ipvrm_core.kernels", *OTHERS)),
    **_floors(),
    "ipvrm_core/objectives": Rule(
        ("torch", *(f"ipvrm_core.{name}" for name in ("packing", "registry", "sequences", "objectives")))
    ),
    **{
        f"ipvrm_core/fused/{name}.py": Rule(  # themselves imported lazily
            ("torch", "ipvrm_core.fused", "ipvrm_core.types", "ipvrm_core.kernels")
        )
        for name in ("triton_rows", "sharded_triton_rows")
    },
    "ipvrm_core/integrations": Rule(
        ("torch", "einops", "ipvrm_core"), lazily=ANY, refused=("ipvrm_core.kernels", *OTHERS)
    ),
    "trainer": Rule(ANY, refused=("ipvrm_core.bench",)),
    "bench": Rule(ANY, refused=("ipvrm_core.trainer",)),
    "tests": Rule(ANY),
}
BARE = ("kernels", "trainer", "bench")  # `kernels` is also a Hugging Face package


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(prefix == "" or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def rule_for(path: str) -> Rule:
    matching = [key for key in RULES if key in ("", path) or path.startswith(key + "/")]
    return RULES[max(matching, key=len)]


def module_of(path: str) -> list[str]:
    """The package that relative imports in this file start from."""
    parts = path.split("/")[:-1]
    return ["ipvrm_core", *parts] if parts and parts[0] in BARE else parts


def imports(path: str, tree: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(dotted name, inside a function or TYPE_CHECKING, line); `from a import b` counts as a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (
                (".".join([*base, *filter(None, [node.module]), a.name]), lazy, node.lineno) for a in node.names
            )
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            argument = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if called in ("import_module", "__import__", "importorskip") and isinstance(argument, str):
                yield argument, lazy, node.lineno
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(path, node, lazy or guarded or inside)


def violations(path: str, source: str) -> list[str]:
    rule, found = rule_for(path), []
    for name, lazy, line in imports(path, ast.parse(source)):
        if name.split(".")[0] in sys.stdlib_module_names:
            continue
        allowed = under(name, rule.allowed) or (lazy and under(name, rule.lazily))
        if under(name, BARE) or under(name, rule.refused) or not allowed:
            found.append(f"{path}:{line} imports {name}{' lazily' if lazy else ''}")
    return found


def sources() -> list[str]:
    def skipped(part: str) -> bool:
        return part.startswith(".") or part in ("build", "dist", "shared", "venv") or part.endswith(".egg-info")

    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(path.as_posix() for path in paths if not any(map(skipped, path.parts)))


def test_import_directions():
    files = sources()
    assert "ipvrm_core/reference/policy_loss.py" in files
    assert "tests/test_imports.py" in files
    assert [text for path in files for text in violations(path, (ROOT / path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/softmax.py", "from ipvrm_core.types import LogProbs"),
        ("kernels/softmax.py", "import einops"),
        ("kernels/softmax.py", "from ..types import LogProbs"),  # kernels/ is ipvrm_core.kernels
        ("ipvrm_core/types.py", "import triton"),
        ("ipvrm_core/packing.py", "import transformers"),
        ("ipvrm_core/sequences/values.py", "from ipvrm_core.ops import distrl_loss"),
        ("ipvrm_core/sequences/values.py", "from ipvrm_core import distrl_loss"),
        ("ipvrm_core/sequences/values.py", "from ..fused import head"),
        ("ipvrm_core/fused/head.py", "from ipvrm_core.objectives import find"),
        ("ipvrm_core/fused/head.py", "import ipvrm_core.kernels.softmax"),
        ("ipvrm_core/ops/distrl_loss.py", "import ipvrm_core.kernels"),  # at the top: not lazily
        ("ipvrm_core/ops/distrl_loss.py", "from ipvrm_core import kernels"),
        ("ipvrm_core/ops/distrl_loss.py", "if True:\n    from ipvrm_core.kernels import softmax"),
        ("ipvrm_core/ops/distrl_loss.py", "class A:\n    import triton"),
        ("ipvrm_core/objectives/ipvrm.py", "from ipvrm_core.fused.head import Head"),
        ("ipvrm_core/objectives/ipvrm.py", "def f():\n    from ipvrm_core.trainer import config"),
        ("ipvrm_core/integrations/trl.py", "import trl"),
        ("ipvrm_core/integrations/trl.py", "def f():\n    from ipvrm_core import trainer"),
        ("ipvrm_core/method.py", "from ipvrm_core.bench import cases"),
        ("ipvrm_core/method.py", "def f():\n    import transformers"),
        ("ipvrm_core/method.py", "from importlib import import_module\nimport_module('ipvrm_core.trainer.config')"),
        ("trainer/cli.py", "from ipvrm_core.bench.cases import Case"),
        ("bench/cpu.py", "from ipvrm_core.trainer import config"),
        ("docs/plot.py", "import ipvrm_core.trainer"),
        ("setup.py", "import bench"),
        ("trainer/cli.py", "from trainer import config"),
        ("tests/test_kernels.py", "import kernels.softmax"),
        ("tests/test_kernels.py", "def f():\n    __import__('kernels')"),
    ],
)
def test_the_checker_catches(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/softmax.py", "import math\nimport torch\nimport triton.language as tl\nfrom .tiles import cdiv"),
        ("kernels/softmax.py", "from ipvrm_core.kernels.tiles import cdiv"),
        ("ipvrm_core/reference/logprobs.py", "from torch.nn import functional\nfrom ipvrm_core import types"),
        ("ipvrm_core/sequences/values.py", "from . import segments\nfrom ..packing import pack"),
        ("ipvrm_core/fused/rows.py", "def f():\n    from ipvrm_core.kernels import softmax"),
        ("ipvrm_core/fused/rows.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
        ("ipvrm_core/objectives/ipvrm.py", "from ipvrm_core.sequences.reward_losses import ipvrm_loss"),
        (
            "ipvrm_core/integrations/trl.py",
            "from ipvrm_core import distrl_loss\ndef f():\n    import trl, transformers",
        ),
        ("trainer/cli.py", "import transformers\nfrom ipvrm_core.trainer import config\nfrom ipvrm_core import pack"),
        ("bench/cpu.py", "from ipvrm_core.bench import cases\nimport ipvrm_core.kernels.softmax"),
        ("tests/test_cli.py", "from ipvrm_core.trainer import config\nfrom ipvrm_core.bench import cases"),
    ],
)
def test_the_checker_lets_pass(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_folders_are_not_packages_of_their_own(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    assert [p for name in ("torch", "triton") for p in (ROOT / folder).rglob(name)] == []


def room(parts: list[str]) -> str:
    """A folder of trainer/, trainer/evaluation/ or ipvrm_core/, or a file beside them."""
    return "/".join(parts[: 3 if parts[:2] == ["trainer", "evaluation"] else 2]).removesuffix(".py")


def without_type_checking(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if hasattr(node, "body") and isinstance(node.body, list):
            node.body = [
                child
                for child in node.body
                if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            ] or [ast.Pass()]
    return tree


def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports from), lazily or not."""
    files = [path for path in sources() if path.startswith(("trainer/", "ipvrm_core/"))]
    rooms = {room(path.split("/")) for path in files}
    found = set()
    for path in files:
        for name, _, _ in imports(path, without_type_checking(ast.parse((ROOT / path).read_text()))):
            parts = name.split(".")
            there = room(parts[1:] if parts[1:2] == ["trainer"] else parts)
            if there in rooms and there != room(path.split("/")):
                found.add((room(path.split("/")), there))
    return found


def test_no_circle_between_rooms():
    left = arrows()
    assert ("trainer/rl", "trainer/language_model") in left
    assert ("trainer/evaluation/reward_model", "trainer/evaluation/policy") in left
    assert ("ipvrm_core/credit", "ipvrm_core/estimators") in left
    while True:  # rooms that import from nowhere are taken away, floor by floor
        importing = {here for here, _ in left}
        fewer = {(here, there) for here, there in left if there in importing}
        if fewer == left:
            break
        left = fewer
    assert left == set()


def test_import_ipvrm_core_loads_no_heavy_package():
    """A fresh interpreter, outside the repository."""
    code = "import sys, ipvrm_core; dir(ipvrm_core); print(*{m.split('.')[0] for m in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/", env=environment
    ).stdout.split()
    assert "ipvrm_core" in loaded
    assert not {"torch", "triton", "transformers", "einops", "numpy"} & set(loaded)


def test_the_loss_costs_no_more_than_torch():
    """No dynamo (seconds), no triton (a second), no transformers: what the first call needs is imported by it."""
    code = "import sys, ipvrm_core; ipvrm_core.distrl_loss; ipvrm_core.select_candidates; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/", env=environment
    ).stdout.split()
    assert "torch" in loaded
    assert not {"torch._dynamo", "triton", "transformers"} & set(loaded)


@pytest.mark.parametrize("name", ipvrm_core.__all__)
def test_every_public_name_resolves(name):
    value = getattr(ipvrm_core, name)
    assert getattr(ipvrm_core, name) is value  # cached
    if name != "METHODS" and not name.startswith("__"):
        assert value.__name__ == name


def test_type_checkers_read_what_runs():
    """The imports under TYPE_CHECKING and the table of homes name the same."""
    tree = ast.parse(Path(ipvrm_core.__file__).read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    named = {alias.asname: node.module for node in guarded.body for alias in node.names if alias.name == alias.asname}
    assert named == {name: f"ipvrm_core.{home}" for name, home in ipvrm_core._HOMES.items()}
    assert len(guarded.body) == len(named)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = ipvrm_core.no_such_name
    assert set(ipvrm_core.__all__) <= set(dir(ipvrm_core))
