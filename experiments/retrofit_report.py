"""The lines of `experiments.retrofit` as tables and a plot."""

import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rmt_hf.evaluation.bits import mean_and_standard_error
from rmt_hf.files import write_whole


Line = dict[str, Any]


def write_retrofit_report(file: Path, directory: Path) -> None:
    """Writes `tables.md` and `retrofit.png`.

    Args:
        file: JSON lines.
        directory: Where to.
    """
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    if not lines:
        return
    text = tables(lines)
    write_whole(directory / "tables.md", lambda path: path.write_text(text, "utf-8"))
    if {"text", "recall"} <= {line["table"] for line in lines}:
        write_whole(directory / "retrofit.png", lambda path: plot(lines, path))


def of_table(lines: Sequence[Line], table: str) -> dict[str, Line]:
    """The lines of a table by contender, ours first; of several the last one counts, and only what is like the last."""
    chosen = [line for line in lines if line["table"] == table]
    shapes = [(line.get("edges"), line.get("distance"), len(line.get("bytes", ()))) for line in chosen]
    found = {line["contender"]: line for line, shape in zip(chosen, shapes, strict=True) if shape == shapes[-1]}
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("ours")))


def pair(samples: Sequence[float]) -> str:
    """Mean ± standard error; a single sample has none."""
    if len(samples) == 1:
        return f"{samples[0]:.4f}"
    return "{:.4f} ± {:.4f}".format(*mean_and_standard_error(torch.tensor(samples, dtype=torch.float64)))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is words."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def per_byte(line: Line, first: int = 0) -> list[list[float]]:
    """Bits per byte of each document: bucket by bucket, then all from bucket `first` on."""
    bits, sizes = (torch.tensor(line[name], dtype=torch.float64) for name in ("bits", "bytes"))
    overall = bits[:, first:].sum(1, keepdim=True) / sizes[:, first:].sum(1, keepdim=True)
    return torch.cat([bits / sizes, overall], 1).tolist()


def bits_table(lines: dict[str, Line], first: int) -> str:
    """Bits per byte by position, one row for each contender; the last column is of all buckets from `first` on."""
    edges = next(iter(lines.values()))["edges"]
    header = ["", *(f"{start:,}–{end:,}" for start, end in itertools.pairwise(edges)), f"from {edges[first]:,} on"]
    rows = [[name, *map(pair, zip(*per_byte(line, first), strict=True))] for name, line in lines.items()]
    return markdown(header, rows)


def differences(lines: dict[str, Line], first: int) -> str:
    """By how much each is worse than ours from bucket `first` on, paired by document."""
    ours = [document[-1] for document in per_byte(lines["ours"], first)]
    words = []
    for name, line in lines.items():
        theirs = [document[-1] for document in per_byte(line, first)]
        words.append(f"{name} {pair([b - a for a, b in zip(ours, theirs, strict=True)])}")
    return "Minus ours, bits per byte, paired by document: " + "; ".join(words[1:]) + "."


def recovered(lines: dict[str, Line]) -> str:
    """Which share of the gap between each window and full attention ours makes good, beyond our window."""
    means = {name: statistics.fmean(document[-1] for document in per_byte(line, 1)) for name, line in lines.items()}
    shares = []
    for name, mean in means.items():
        gap = mean - means["full attention"]
        if "window" in name and gap > 0:
            shares.append(f"{name} {(mean - means['ours']) / gap:.2f} of {gap:.4f}")
    return "Share of the gap to full attention that ours makes good, beyond our window: " + "; ".join(shares) + "."


def recall_shares(lines: Sequence[Line], kind: str) -> dict[str, dict[int, list[float]]]:
    """Share of right answers of each row, by contender and distance."""
    found: dict[str, dict[int, list[float]]] = {}
    for distance in sorted({line["distance"] for line in lines if line["table"] == "recall"}):
        for name, line in of_table([line for line in lines if line.get("distance") == distance], "recall").items():
            found.setdefault(name, {})[distance] = line["shares"][kind]
    return found


def recall_table(lines: Sequence[Line], kind: str) -> str:
    """Share of right answers by distance."""
    shares = recall_shares(lines, kind)
    distances = sorted({distance for each in shares.values() for distance in each})
    rows = [[name, *(pair(each[d]) if d in each else "" for d in distances)] for name, each in shares.items()]
    return markdown([f"{kind}: windows back", *map(str, distances)], rows)


def tables(lines: Sequence[Line]) -> str:
    """Everything that was measured, in words and tables."""
    parts = []
    by_table = {name: of_table(lines, name) for name in ("text", "stream", "chat", "cost")}
    if text := by_table["text"]:
        number = len(next(iter(text.values()))["bits"])
        parts.append(f"Bits per byte by position, {number} held-out plays, mean ± standard error over plays:")
        parts.append(bits_table(text, 1))
        parts += [differences(text, 1)] if "ours" in text else []
        parts += [recovered(text)] if {"ours", "full attention"} <= set(text) else []
    if stream := by_table["stream"]:
        parts += ["Bits per byte of one stream, the King James Bible:", bits_table(stream, 0)]
    if kinds := next((line["shares"] for line in lines if line["table"] == "recall"), None):
        parts.append("Share of codes, told in held-out plays, that are given when asked for; ± over rows:")
        parts += [recall_table(lines, kind) for kind in kinds]
    if chat := by_table["chat"]:
        same = next(iter(chat.values()))["same"]
        parts.append(f"Of {len(same)} chat prompts, {sum(same)} are answered with the same 32 tokens as by the source.")
    if cost := by_table["cost"]:
        rows = [[name, f"{line['ms']:.1f}", f"{line['state_bytes']:,}"] for name, line in cost.items()]
        position = next(iter(cost.values()))["position"]
        parts += [f"After {position:,} tokens:", markdown(["", "CPU ms a token", "state, bytes"], rows)]
    made = [{**line["environment"], "dtype": line["settings"]["dtype"]} for line in lines]
    origins = {json.dumps(each, sort_keys=True): each for each in made}
    parts.append("Made by:")
    parts.append(
        "\n".join("- " + ", ".join(f"{name} {value}" for name, value in each.items()) for each in origins.values())
    )
    return "\n\n".join(parts) + "\n"


def plot(lines: Sequence[Line], path: Path) -> None:
    """Bits per byte by position, and answers by distance. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours: dict[str, str] = {}

    def colour(name: str) -> str:  # the same in both panels, whose windows may differ by a few tokens (dtypes)
        return colours.setdefault(re.sub(r"\d+", "", name), f"C{len(colours)}")

    for name, line in of_table(lines, "text").items():
        columns = zip(*per_byte(line), strict=True)
        means = [sum(column) / len(column) for column in columns][:-1]
        width = 2.5 if name == "ours" else 1.2
        left.plot(line["edges"][1:], means, marker="o", label=name, color=colour(name), linewidth=width)
    for kind, style in (("needle", "--"), ("key/value", "-")):
        for name, shares in recall_shares(lines, kind).items():
            means, label = [statistics.fmean(each) for each in shares.values()], name if style == "-" else None
            right.plot(list(shares), means, style, marker="o", label=label, color=colour(name))
    left.set(title="Held-out plays", xlabel="tokens read so far", ylabel="bits per byte")
    right.set(
        title="One of four codes, told in a play (dashed: the only one)", xlabel="windows back", ylabel="right answers"
    )
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
