"""README: its code runs as printed and prints what it says; its links lead somewhere."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_first_code_is_early_and_prints_what_it_says(capsys: pytest.CaptureFixture) -> None:
    assert TEXT[: TEXT.index("```python")].count("\n") < 40
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    promised = re.search(r"This prints\n\n```text\n(.*?)```", TEXT, re.DOTALL)
    assert promised and capsys.readouterr().out == promised[1]


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_link_exists(link: str) -> None:
    assert (ROOT / link).exists()
