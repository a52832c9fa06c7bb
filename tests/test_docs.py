"""The documents: links lead somewhere, claims stand in the tables they link to, tables name their commits."""

import re
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(p for top in ("docs", "kernels", "bench", "ipvrm_core") for p in (ROOT / top).rglob("*.md"))]
)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)\s]*)\)")


def names(paths) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def slug(heading: str) -> str:
    """The anchor of a heading, as a renderer makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def headings(text: str) -> list[str]:
    outside = re.sub(r"(?ms)^```.*?^```", "", text)
    return re.findall(r"(?m)^#+ (.*)$", outside)


def section(text: str, anchor: str) -> str:
    """The lines from the heading `anchor` to the next heading of its rank; all of them without an anchor."""
    if not anchor:
        return text
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("#") and slug(line.lstrip("#")) == anchor)
    rank = len(lines[start]) - len(lines[start].lstrip("#"))
    end = re.compile(rf"#{{1,{rank}}} ")
    return "\n".join(takewhile(lambda line: not end.match(line), lines[start + 1 :]))


@pytest.mark.parametrize("page", names(PAGES))
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for _, target in LINK.findall(text):
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        assert not anchor or anchor in map(slug, headings(linked.read_text())), f"{page} links to {target}"


def claims() -> list[str]:
    text = (ROOT / "docs/results.md").read_text()
    return [" ".join(block.split()) for block in re.findall(r"(?ms)^- (.*?)(?=^- |^\n|\Z)", text)]


@pytest.mark.parametrize("claim", claims(), ids=lambda claim: slug(claim)[:40])
def test_a_claim_stands_in_the_tables_it_links_to(claim):
    """Every number of the sentence occurs in one of the linked sections."""
    links = [target.partition("#") for _, target in LINK.findall(claim)]
    assert links, "a claim without a link"
    evidence = " ".join(section((ROOT / "docs" / file).read_text(), anchor) for file, _, anchor in links)
    number = r"(?<![\w.])\d+(?:[.,]\d+)*"
    measured = set(re.findall(number, evidence))
    assert [n for n in re.findall(number, LINK.sub("", claim)) if n not in measured] == []


@pytest.mark.parametrize("page", names((ROOT / "docs/results").glob("*.md")))
def test_results_name_date_commit_and_device(page):
    text = (ROOT / page).read_text()
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", text)
    assert re.search(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7}\b", text)
    assert "CPU" in text or "GPU" in text
    assert Path(page).name in (ROOT / "docs/results.md").read_text(), "no claim links to it"


FILE = re.compile(r"`([\w./-]+\.(?:py|toml|md|yml|txt))`")


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "docs/glossary.md", "docs/how-it-works.md", "docs/method.md", "docs/kernels.md"]
)
def test_named_files_exist(page):
    """Under the root, or under one of the folders of code where the page leaves it out."""
    homes = [ROOT / home for home in ("", "ipvrm_core", "kernels", "docs")]
    missing = [f for f in FILE.findall((ROOT / page).read_text()) if not any((home / f).is_file() for home in homes)]
    assert missing == []
