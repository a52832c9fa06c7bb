"""`make docs`: where links go, and that menu and API page are complete. The build itself refuses dead links."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import ipvrm_core

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
SPEC = spec_from_file_location("site_pages", ROOT / "docs" / "pages.py")
site = module_from_spec(SPEC)
SPEC.loader.exec_module(site)


@pytest.mark.parametrize(
    ("source", "markdown", "expected"),
    [
        ("README.md", "[the method](docs/method.md#loss)", "[the method](method.md#loss)"),
        ("README.md", "[bench/](bench/README.md)", "[bench/](bench/README.md)"),
        ("docs/kernels.md", "[why](method.md)", "[why](method.md)"),
        ("docs/kernels.md", "[there](../kernels/README.md)", "[there](kernels/README.md)"),
        ("docs/results/demo.md", "![dots](../objectives.png)", "![dots](../objectives.png)"),
        ("kernels/README.md", "[kernels](../docs/kernels.md)", "[kernels](../kernels.md)"),
        ("kernels/README.md", "[home](../README.md)", "[home](../index.md)"),
        ("docs/method.md", "[code](../setup.py)", "code"),  # no page of its own
        ("docs/method.md", "[a](#b) [c](https://example.org/d.md)", "[a](#b) [c](https://example.org/d.md)"),
        ("docs/method.md", "[gone](nowhere.md)", "[gone](nowhere.md)"),  # left for the strict build to refuse
    ],
)
def test_links(source, markdown, expected):
    assert site.moved(markdown, source, set(site.gathered())) == expected


def pages(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


def test_the_menu_names_every_page_once():
    menu = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(site.place(path) for path in site.gathered() if path.endswith(".md"))


def test_every_public_name_is_on_the_page():
    shown, page = site.public_names(), (ROOT / "docs" / "api.md").read_text()
    assert site.MARK in page
    for name in ipvrm_core.__all__:
        assert name.startswith("__") or f".{name}\n" in shown + "\n" or f"`{name}`" in page, name


def test_the_pages_are_gathered(tmp_path):
    site.main(tmp_path / "pages")
    assert "](method.md" in (tmp_path / "pages" / "index.md").read_text()
    assert "::: ipvrm_core." in (tmp_path / "pages" / "api.md").read_text()
    assert (tmp_path / "pages" / "credit.svg").is_file()
