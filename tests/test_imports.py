"""The import directions of the repository, read from the source of every file.

kernels -> torch, triton | types, packing, reference -> torch, einops | chunked, ops -> those, kernels lazily
| objectives -> ops, reference | trainer, bench -> anything but each other | nobody else imports trainer or bench.
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
PLAIN = ("torch", "einops", "ipvrm_core.types", "ipvrm_core.packing", "ipvrm_core.reference")
CHUNKED = (*PLAIN, "ipvrm_core.fused")

RULES = {  # the longest matching path decides
    "": Rule(ANY, refused=OTHERS),
    "kernels": Rule(("torch", "triton", "ipvrm_core.kernels")),
    "ipvrm_core": Rule(("torch", "einops", "ipvrm_core"), refused=("ipvrm_core.kernels", *OTHERS)),
    "ipvrm_core/types.py": Rule(PLAIN),
    "ipvrm_core/packing.py": Rule(PLAIN),
    "ipvrm_core/reference": Rule(PLAIN),
    "ipvrm_core/chunked": Rule(CHUNKED, lazily=("ipvrm_core.kernels",)),
    "ipvrm_core/chunked/triton_rows.py": Rule((*CHUNKED, "ipvrm_core.kernels")),  # itself imported lazily
    "ipvrm_core/ops": Rule((*CHUNKED, "ipvrm_core.ops"), lazily=("ipvrm_core.kernels", "triton")),
    "ipvrm_core/objectives": Rule((*PLAIN, "ipvrm_core.ops", "ipvrm_core.objectives")),
    "ipvrm_core/adapters": Rule(("torch", "einops", "ipvrm_core"), lazily=ANY, refused=("ipvrm_core.kernels", *OTHERS)),
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
        ("ipvrm_core/reference/values.py", "from ipvrm_core.ops import distrl_loss"),
        ("ipvrm_core/reference/values.py", "from ipvrm_core import distrl_loss"),
        ("ipvrm_core/reference/values.py", "from ..chunked import head"),
        ("ipvrm_core/chunked/head.py", "from ipvrm_core.objectives import find"),
        ("ipvrm_core/chunked/head.py", "import ipvrm_core.kernels.softmax"),
        ("ipvrm_core/ops/distrl_loss.py", "import ipvrm_core.kernels"),  # at the top: not lazily
        ("ipvrm_core/ops/distrl_loss.py", "from ipvrm_core import kernels"),
        ("ipvrm_core/ops/distrl_loss.py", "if True:\n    from ipvrm_core.kernels import softmax"),
        ("ipvrm_core/ops/distrl_loss.py", "class A:\n    import triton"),
        ("ipvrm_core/objectives/ipvrm.py", "from ipvrm_core.fused.head import Head"),
        ("ipvrm_core/objectives/ipvrm.py", "def f():\n    from ipvrm_core.trainer import config"),
        ("ipvrm_core/adapters/trl.py", "import trl"),
        ("ipvrm_core/adapters/trl.py", "def f():\n    from ipvrm_core import trainer"),
        ("ipvrm_core/presets.py", "from ipvrm_core.bench import cases"),
        ("ipvrm_core/presets.py", "def f():\n    import transformers"),
        ("ipvrm_core/presets.py", "from importlib import import_module\nimport_module('ipvrm_core.trainer.config')"),
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
        ("ipvrm_core/reference/values.py", "from torch.nn import functional\nfrom ipvrm_core.types import LogProbs"),
        ("ipvrm_core/reference/values.py", "from . import segments\nfrom ..packing import pack"),
        ("ipvrm_core/ops/distrl_loss.py", "def f():\n    from ipvrm_core.kernels import softmax"),
        ("ipvrm_core/ops/distrl_loss.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
        ("ipvrm_core/objectives/ipvrm.py", "from ipvrm_core.ops.linear_logprobs import linear_logprobs"),
        ("ipvrm_core/adapters/trl.py", "from ipvrm_core import distrl_loss\ndef f():\n    import trl, transformers"),
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


def test_import_ipvrm_core_loads_no_heavy_package():
    """A fresh interpreter, outside the repository."""
    code = "import sys, ipvrm_core; dir(ipvrm_core); print(*{m.split('.')[0] for m in sys.modules})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/", env=environment
    ).stdout.split()
    assert "ipvrm_core" in loaded
    assert not {"torch", "triton", "transformers", "einops", "numpy"} & set(loaded)


@pytest.mark.parametrize("name", ipvrm_core.__all__)
def test_every_public_name_resolves(name):
    value = getattr(ipvrm_core, name)
    assert getattr(ipvrm_core, name) is value  # cached
    if name != "METHODS" and not name.startswith("__"):
        assert value.__name__ == name


def test_public_names_come_from_the_public_layers():
    layers = {target.split(".")[0] for target in ipvrm_core._EXPORTS.values()}
    assert layers <= {"ops", "types", "packing", "reference", "presets", "objectives"}


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = ipvrm_core.no_such_name
    assert set(ipvrm_core.__all__) <= set(dir(ipvrm_core))
