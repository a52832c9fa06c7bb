"""The folder-to-name table; everything else is in pyproject.toml (docs/decisions.md says why)."""

from setuptools import find_namespace_packages, setup

FOLDERS = {
    "ipvrm_core": "ipvrm_core",
    "ipvrm_core.kernels": "kernels",
    "ipvrm_core.trainer": "trainer",
    "ipvrm_core.bench": "bench",
}

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
)
