"""The command `ipvrm`: says what to install where the trainer's packages are missing, and is `cli.main` otherwise."""

import re
import sys
from importlib.metadata import requires
from importlib.util import find_spec


def main(arguments: list[str] | None = None) -> int:
    if missing := missing_packages():
        print(f'ipvrm needs: pip install "ipvrm-core[trainer]"  (missing: {", ".join(missing)})', file=sys.stderr)
        return 2
    from ipvrm_core.trainer.commands import main as cli

    return cli.main(arguments)


def missing_packages() -> list[str]:
    """What the extra `trainer` names and cannot be imported. Every one of them is imported by its own name."""
    extra = [line for line in requires("ipvrm-core") or () if re.search(r"extra == .trainer.", line)]
    names = [re.match(r"[\w-]+", line).group().replace("-", "_") for line in extra]
    return [name for name in names if find_spec(name) is None]
