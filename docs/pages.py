"""`make docs`, first half: gathers the Markdown of the repository into build/pages, from which the site is built.

A link is written as the repository needs it; here its target becomes the page's place on the site. What has no page
there (a source file) becomes plain text; what does not exist stays, and the strict build refuses it.
"""

import re
import shutil
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import ipvrm_core

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- public names -->"
FOLDERS = ("docs", "kernels", "ipvrm_core", "trainer", "bench", "examples")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def gathered() -> list[str]:
    """What the site shows: every page of these folders, and the pictures of docs/."""
    patterns = ["*.md", *(f"{folder}/**/*.md" for folder in FOLDERS), "docs/**/*.svg", "docs/**/*.png"]
    return sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})


def place(path: str) -> str:
    """Of a file of the repository on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def moved(markdown: str, source: str, shown: set[str]) -> str:
    """The page `source` with its links as the site needs them."""

    def link(found: re.Match) -> str:
        image, text, target, anchor = found.groups()
        path = normpath(join(dirname(source), target))
        if path in shown:
            return f"{image}[{text}]({relpath(place(path), dirname(place(source)) or '.')}{anchor or ''})"
        return text if (ROOT / path).exists() else found.group()

    return LINK.sub(link, markdown)


def public_names() -> str:
    """A directive of mkdocstrings for each function and class that `import ipvrm_core` offers."""
    offered = [getattr(ipvrm_core, name) for name in ipvrm_core.__all__]
    return "\n\n".join(f"::: {thing.__module__}.{thing.__name__}" for thing in offered if hasattr(thing, "__name__"))


def main(folder: Path = ROOT / "build" / "pages") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shown = gathered()
    for source in shown:
        target = folder / place(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".md"):
            text = moved((ROOT / source).read_text(), source, set(shown))
            target.write_text(text.replace(MARK, public_names()) if MARK in text else text)
        else:
            shutil.copyfile(ROOT / source, target)


if __name__ == "__main__":
    main()
