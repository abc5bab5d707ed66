"""README and the pages of docs: their code runs as printed and prints what they say; what they name is there."""

import re
from pathlib import Path

import pytest

from helpers import ROOT


PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": (ROOT / "README.md").read_text("utf-8"), **PAGES}
# A block of Python, and the text block that comes next, with a line of words between them at most: what it prints.
BLOCK = re.compile(
    r"```python\n(?P<code>.*?)```\n(?:\n(?:[^\n`#|][^\n]*\n\n)?```text\n(?P<printed>.*?)```)?", re.DOTALL
)
BLOCKS = [
    pytest.param(name, found["code"], found["printed"], id=f"{name}-{number}")
    for name, text in PAGES.items()
    for number, found in enumerate(BLOCK.finditer(text))
]
OURS = r"`((?:src|docs|tests|examples|experiments|model_cards)/[\w./-]+|requirements-\w+\.txt)`"
FORBIDDEN = re.compile(r"\b(?:lanes?|laid|dealt out|shared out|home file|taken back|pieces?)\b", re.IGNORECASE)


@pytest.mark.filterwarnings(r"ignore:.\w*gradient_checkpointing\w*. is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize(("name", "code", "printed"), BLOCKS)
def test_code_runs_and_prints_what_is_said(name: str, code: str, printed: str | None) -> None:
    """Only what the block itself prints is compared: a Trainer prints its logs as well."""
    lines: list[str] = []
    exec(compile(code, name, "exec"), {"print": lambda *words: lines.append(" ".join(map(str, words)) + "\n")})
    assert printed is None or "".join(lines) == printed


def test_first_code_is_early_and_prints_something() -> None:
    text = PAGES["README.md"]
    assert text[: text.index("```python")].count("\n") < 40
    assert BLOCK.search(text)["printed"]  # type: ignore[index]


@pytest.mark.parametrize("name", PAGES)
def test_what_needs_more_processes_is_python_all_the_same(name: str) -> None:
    for code in re.findall(r"```py\n(.*?)```", PAGES[name], re.DOTALL):
        compile(code, name, "exec")


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_exist(name: str) -> None:
    folder = (ROOT / name).parent
    links = set(re.findall(r"\]\(([^)#:]+)\)", PAGES[name]))
    assert not [link for link in links if not (folder / link).exists()]
    assert name == "README.md" or not [link for link in links if link.startswith("..")]  # the site has docs alone
    assert not [file for file in set(re.findall(OURS, PAGES[name])) if not (ROOT / file).exists()]


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_short_and_in_standard_words(name: str) -> None:
    assert PAGES[name].count("\n") <= (150 if name == "README.md" else 200)
    words = re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL)
    assert not FORBIDDEN.findall(words)
    wide = [line for line in words.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide


def test_every_page_is_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert not [Path(name).name for name in PAGES if name != "README.md" and f": {Path(name).name}\n" not in navigation]
