"""Reports: a comparison in words, as a table and as a plot; where its numbers come from; files whole or absent."""

import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments.comparison import Comparison
from rmt_hf.files import write_whole


# What a report calls these; any other model or condition goes by its name.
LABELS = {
    "own": "(a) own memory",
    "empty": "(b) memory emptied at every segment",
    "other": "(c) memory of another document",
    "no_memory": "(d) model without memory",
}


def label(name: str) -> str:
    """What a report calls a model or condition at first mention."""
    return LABELS.get(name, name)


def tag(name: str) -> str:
    """What a report calls it from then on: "(a)" for one of `LABELS`, else its name."""
    return LABELS[name].partition(" ")[0] if name in LABELS else name


def verdict(comparison: Comparison, name: str) -> str:
    """One sentence on one against the reference, which says "no difference" within three standard errors.

    Args:
        comparison: What was measured.
        name: A model or condition other than the reference.
    """
    difference, error = comparison.overall_difference(name)
    ratio = difference / error if error else 0.0
    measured = f"{difference:+.4f} ± {error:.4f} bits per byte, {ratio:+.1f} standard errors"
    reference = tag(comparison.reference)
    if abs(difference) <= 3 * error:
        return f"{label(name)} against {reference}: no difference beyond three standard errors ({measured})."
    return f"{label(name)} is {'worse' if difference > 0 else 'better'} than {reference} ({measured})."


def table(comparison: Comparison) -> str:
    """Bits per byte by position as a Markdown table: the reference, then paired differences, with standard errors.

    Args:
        comparison: What was measured.
    """
    names, reference = comparison.others, comparison.reference
    header = ["tokens read", label(reference), *(f"{label(name)} − {tag(reference)}" for name in names)]
    spans = [f"{start:,}–{end:,}" for start, end in itertools.pairwise(comparison.edges)]
    columns = [comparison.by_position(reference), *(comparison.difference_by_position(name) for name in names)]
    lines = [
        [span, *(f"{mean:.4f} ± {error:.4f}" for mean, error in row)]
        for span, *row in zip(spans, *columns, strict=True)
    ]
    overall = [comparison.overall(reference), *(comparison.overall_difference(name) for name in names)]
    lines.append(
        [f"**all beyond the window of {comparison.window_length}**", *(f"**{x:.4f} ± {e:.4f}**" for x, e in overall)]
    )
    return markdown(header, lines)


def plot(comparison: Comparison, path: Path) -> None:
    """Bits per byte by position and paired differences from the reference, as a picture. Needs matplotlib.

    Bands are one standard error over documents to each side.

    Args:
        comparison: What was measured; each model or condition has one colour.
        path: Where to write it; the suffix names the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    levels, differences = figure.subplots(1, 2)
    positions, reference = comparison.edges[1:], tag(comparison.reference)
    differences.axhline(0, color="C0")
    for index, name in enumerate((comparison.reference, *comparison.others)):
        curves = [(levels, comparison.by_position(name), label(name))]
        if index:
            curves.append((differences, comparison.difference_by_position(name), f"{label(name)} − {reference}"))
        for axes, points, words in curves:
            means, errors = torch.tensor(points, dtype=torch.float64).unbind(1)
            axes.plot(positions, means.tolist(), marker="o", color=f"C{index}", label=words)
            axes.fill_between(
                positions, *((means + side * errors).tolist() for side in (-1, 1)), alpha=0.2, color=f"C{index}"
            )
    titles = (levels, "Bits per byte"), (differences, f"Difference from {reference}")
    for axes, title in titles:
        axes.set(title=f"{title}, one standard error", xlabel="tokens of the document read so far")
        axes.set_xscale("log", base=2)
        axes.set_xticks(positions, [f"{position:,}" for position in positions], rotation=45)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def write_metrics(path: Path, comparison: Comparison, **sections: object) -> None:
    """Writes every figure of a comparison as JSON.

    Args:
        path: Where to; its folder is made if it does not exist.
        comparison: What was measured.
        sections: What else belongs to the numbers, by name: `facts`, what was run, where and how, with `environment`.

    Raises:
        ValueError: If there is a number that JSON does not know, NaN or infinite; nothing is written then.
    """
    metrics = json.dumps({**comparison.metrics(), **sections}, indent=1, allow_nan=False)
    write_whole(path, lambda temporary: temporary.write_text(metrics, "utf-8"))


REPORT = """# {title}

{verdicts}

{table}

![Bits per byte by position](bits_per_byte.png)

Bits per byte of held-out documents, each read as one stream: mean over {documents} documents ± standard error.
Differences are paired by document. (b) and (c) are model (a) with its memory changed before every segment: emptied,
or exchanged for what (a) had written when it had read another document up to the same position. (d) is another
model, as large, trained without memory on the same tokens.

{facts}

What the model goes on to say after the first lines of a held-out document:

```text
{sample}
```
"""


def write_report(folder: Path, title: str, comparison: Comparison, facts: dict[str, object], sample: str) -> None:
    """Writes report.md, metrics.json and bits_per_byte.png.

    Args:
        folder: Where to; made if it does not exist.
        title: Headline.
        comparison: The measured conditions.
        facts: What was run, where and how; listed in the report as they are.
        sample: Generated text.
    """
    text = REPORT.format(
        title=title,
        verdicts="\n".join(f"- {verdict(comparison, name)}" for name in comparison.others),
        table=table(comparison),
        documents=len(comparison.token_bytes),
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        sample=sample.strip(),
    )
    write_whole(folder / "bits_per_byte.png", lambda path: plot(comparison, path))
    write_metrics(folder / "metrics.json", comparison, facts=facts, sample=sample)
    write_whole(folder / "report.md", lambda path: path.write_text(text, "utf-8"))


def environment(packages: tuple[str, ...] = ("torch", "transformers")) -> dict[str, str]:
    """Where and with what a number was made: command, commit, machine, versions; no host name.

    Args:
        packages: Distributions whose versions belong to the number.
    """
    return {
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
        "commit": _git_commit(),
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _program() -> list[str]:
    """What was run: a module by its name, or a script by its path from here."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__")]
    path = Path(sys.argv[0]).resolve()
    return [str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name]


def _git_commit() -> str:
    """Commit of the source tree, and whether files differ from it; "unknown" outside a git tree."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        result = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines of what was measured; none if the file does not exist yet."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines whole or not at all. ValueError if one has a number that JSON does not know."""
    text = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines)
    write_whole(file, lambda path: path.write_text(text, "utf-8"))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is words."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
