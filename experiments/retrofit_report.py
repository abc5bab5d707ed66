"""The lines of `experiments.retrofit` as tables and a plot."""

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.reports import markdown, read_lines
from rmt_hf.evaluation.bits import mean_and_standard_error
from rmt_hf.files import write_whole


Line = dict[str, Any]
FULL = "full attention"


def write_retrofit_report(file: Path, directory: Path) -> None:
    """Writes `tables.md` and `retrofit.png`.

    Args:
        file: JSON lines.
        directory: Where to.
    """
    lines = read_lines(file)
    if not lines:
        return
    text = tables(lines)
    write_whole(directory / "tables.md", lambda path: path.write_text(text, "utf-8"))
    if {"text", "recall"} <= {line["table"] for line in lines}:
        write_whole(directory / "retrofit.png", lambda path: plot(lines, path))


def latest(lines: Sequence[Line], table: str, part: Any = None) -> dict[str, Line]:
    """Lines of a table (and a kind of text, distance or position) by contender: the last one measured of each."""
    return {line["contender"]: line for line in lines if line["table"] == table and part in (None, line["part"])}


def parts_of(lines: Sequence[Line], table: str) -> list[Any]:
    """Kinds of text, distances or positions that a table has."""
    found = dict.fromkeys(line["part"] for line in lines if line["table"] == table)
    return list(found) if table == "text" else sorted(found)


def pair(samples: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard error; a single sample has none."""
    if len(samples) == 1:
        return f"{samples[0]:.{digits}f}"
    mean, error = mean_and_standard_error(torch.tensor(samples, dtype=torch.float64))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def per_byte(line: Line, first: int = 0) -> list[list[float]]:
    """Bits per byte of each document: bucket by bucket, then all from bucket `first` on."""
    bits, sizes = (torch.tensor(line[name], dtype=torch.float64) for name in ("bits", "bytes"))
    overall = bits[:, first:].sum(1, keepdim=True) / sizes[:, first:].sum(1, keepdim=True)
    return torch.cat([bits / sizes, overall], 1).tolist()


def beyond(line: Line) -> list[float]:
    """Bits per byte of each document from the end of the first window on."""
    return [document[-1] for document in per_byte(line, 1)]


def bits_table(lines: dict[str, Line], first: int) -> str:
    """Bits per byte by position, one row for each contender; the last column is of all buckets from `first` on."""
    edges = next(iter(lines.values()))["edges"]
    header = ["", *(f"{start:,}–{end:,}" for start, end in itertools.pairwise(edges)), f"from {edges[first]:,} on"]
    rows = [[name, *map(pair, zip(*per_byte(line, first), strict=True))] for name, line in lines.items()]
    return markdown(header, rows)


def closed(lines: dict[str, Line], name: str) -> str:
    """Which share of the gap between the window alone and full attention a contender closes."""
    window = next((each for each in lines if each.startswith("window of")), None)
    if window is None or FULL not in lines:
        return ""
    none, full, own = (statistics.fmean(beyond(lines[each])) for each in (window, FULL, name))
    return f"{(none - own) / (none - full):.2f}"


def kinds_table(lines: Sequence[Line]) -> str:
    """Bits per byte beyond the first window of each kind of text, and the share of the gap that is closed."""
    by_kind = {kind: latest(lines, "text", kind) for kind in parts_of(lines, "text")}

    def cell(found: dict[str, Line], name: str) -> str:
        return f"{pair(beyond(found[name]))} ({closed(found, name)})" if name in found else ""

    names = dict.fromkeys(name for found in by_kind.values() for name in found)
    rows = [[name, *(cell(found, name) for found in by_kind.values())] for name in names]
    return markdown(["", *by_kind], rows)


def differences(lines: dict[str, Line], name: str) -> str:
    """By how much each is worse than one of them beyond the first window, paired by document."""
    own = beyond(lines[name])
    words = [
        f"{other} {pair([b - a for a, b in zip(own, beyond(line), strict=True)])}"
        for other, line in lines.items()
        if other != name and len(line["bits"]) == len(own)
    ]
    return f"Minus {name}, bits per byte, paired by document: {'; '.join(words)}."


def ablation_table(lines: Sequence[Line]) -> str:
    """By how much a memory that is emptied, or another document's, is worse than the own, beyond the first window."""
    chosen = [line for line in lines if line["table"] == "ablation"]
    found = {(line["contender"], line["memory"]): beyond(line) for line in chosen}
    rows = []
    for name in dict.fromkeys(contender for contender, _ in found):
        own, *others = (found[name, memory] for memory in ("own", "emptied", "of another document"))
        rows.append([name, pair(own), *(pair([b - a for a, b in zip(own, each, strict=True)]) for each in others)])
    return markdown(["", "own memory", "emptied", "of another document"], rows)


def recall_shares(lines: Sequence[Line], kind: str) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Of each row of a kind of question: share of right answers, and mean log-probability."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for line in lines:
        if line["table"] == "recall":
            name = line["contender"] if line["memory"] == "own" else f"{line['contender']}, memory {line['memory']}"
            rows = [list(zip(*row, strict=True)) for row in line["answers"][kind]]
            means = [(statistics.fmean(right), statistics.fmean(logs)) for right, logs in rows]
            found.setdefault(name, {})[line["part"]] = means
    return found


def recall_table(lines: Sequence[Line], kind: str) -> str:
    """Share of right answers by distance, ± over rows, and the mean log-probability of a token of the answer."""
    shares, distances = recall_shares(lines, kind), parts_of(lines, "recall")
    rows = []
    for name, found in shares.items():
        cells = []
        for distance in distances:
            right, logs = zip(*found[distance], strict=True) if distance in found else ((), ())
            cells.append(f"{pair(right, 2)} ({statistics.fmean(logs):.2f})" if right else "")
        rows.append([name, *cells])
    return markdown([f"{kind}: windows back", *map(str, distances)], rows)


def chat_words(name: str, line: Line) -> str:
    """How many chat prompts are answered as by the source."""
    same = sum(alike == length for alike, length in line["alike"])
    begun = statistics.fmean(alike / length for alike, length in line["alike"])
    return f"{name}: {same} of {len(line['alike'])} alike to the last token, on average the first {begun:.0%}"


def cost_table(lines: Sequence[Line]) -> str:
    """What a prompt and a token after it cost, and what is carried."""
    rows = []
    for line in lines:
        times = (f"{line[name]:,.1f}" for name in ("prompt_seconds", "ms"))
        rows.append([f"{line['contender']}, {line['settings']['dtype']}", *times, f"{line['state_bytes']:,}"])
    return markdown(["", "CPU s of the prompt", "CPU ms a token", "state, bytes"], rows)


def tables(lines: Sequence[Line]) -> str:
    """Everything that was measured, in words and tables."""
    parts = []
    if kinds := parts_of(lines, "text"):
        parts += [
            "Bits per byte of held-out documents beyond the first window, mean ± standard error over documents, and "
            "in brackets the share of the gap between the window alone and full attention that is closed:",
            kinds_table(lines),
        ]
        for kind in kinds:
            found = latest(lines, "text", kind)
            parts += [f"{kind.capitalize()}, by position:", bits_table(found, 1)]
            parts += [differences(found, "untrained" if "untrained" in found else list(found)[-1])]
    if any(line["table"] == "ablation" for line in lines):
        parts += ["Plays, bits per byte beyond the first window with the own memory, and what other memories add:"]
        parts += [ablation_table(lines)]
    if stream := latest(lines, "stream"):
        parts += ["One stream, the King James Bible:", bits_table(stream, 0)]
    answers: dict[str, Any] = next((line["answers"] for line in lines if line["table"] == "recall"), {})
    if answers:
        parts.append(
            "Share of right answers, ± over rows, and mean log-probability of a token of the answer, when asked for a "
            "fact told in a play:"
        )
    parts += [recall_table(lines, kind) for kind in answers]
    if chat := latest(lines, "chat"):
        words = "; ".join(chat_words(name, line) for name, line in chat.items())
        parts.append(f"Chat prompts, answered by the likeliest tokens: {words}.")
    for position in parts_of(lines, "cost"):
        chosen = [line for line in lines if line["table"] == "cost" and line["part"] == position]
        parts += [f"After {position:,} tokens:", cost_table(chosen)]
    made = [{**line["environment"], "dtype": line["settings"]["dtype"]} for line in lines]
    origins = {json.dumps(each, sort_keys=True): each for each in made}
    parts.append("Made by:")
    parts.append(
        "\n".join("- " + ", ".join(f"{name} {value}" for name, value in each.items()) for each in origins.values())
    )
    return "\n\n".join(parts) + "\n"


def plot(lines: Sequence[Line], path: Path) -> None:
    """Bits per byte of plays by position, and answers by distance. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    text = latest(lines, "text", parts_of(lines, "text")[0])
    colours = {name: f"C{index % 10}" for index, name in enumerate(text)}
    for name, line in text.items():
        means = [statistics.fmean(column) for column in zip(*per_byte(line), strict=True)][:-1]
        left.plot(line["edges"][1:], means, marker="o", label=name, color=colours[name])
    kinds = list(next(line["answers"] for line in lines if line["table"] == "recall"))
    for name, shares in recall_shares(lines, kinds[-1]).items():
        distances = sorted(shares)
        means = [statistics.fmean(share for share, _ in shares[distance]) for distance in distances]
        right.plot(distances, means, marker="o", label=name, color=colours.get(name, "0.8"))
    left.set(title=parts_of(lines, "text")[0].capitalize(), xlabel="tokens read so far", ylabel="bits per byte")
    right.set(title=kinds[-1].capitalize(), xlabel="windows back", ylabel="right answers")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
