"""The folder-to-name table and the long description; the rest is in pyproject.toml (docs/decisions.md says why)."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

FOLDERS = {
    "ipvrm_core": "ipvrm_core",
    "ipvrm_core.kernels": "kernels",
    "ipvrm_core.trainer": "trainer",
    "ipvrm_core.bench": "bench",
}
NOTE = "\n\nThe files named above are in the source distribution, the .tar.gz beside the wheels.\n"


def without_local_links(markdown: str) -> str:
    """`[text](docs/page.md)` as `text (docs/page.md)`: where a package index shows it, such a link leads nowhere."""

    def plain(link: re.Match) -> str:
        text, target = link.groups()
        return text if text == target else f"{text} ({target})"

    return re.sub(r"!?\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)", plain, markdown)


setup(
    package_dir=dict(FOLDERS),
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in [
            name,
            *(f"{name}.{sub}" for sub in find_namespace_packages(folder, exclude=["results*", "tried*"])),
        ]
    ],
    long_description=without_local_links(Path("README.md").read_text(encoding="utf-8")) + NOTE,
    long_description_content_type="text/markdown",
)
