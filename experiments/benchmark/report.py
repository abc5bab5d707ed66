"""What the benchmark says: tables, the promised ratios, a plot of cost against context."""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rmt_hf.files import write_whole


Row = dict[str, Any]

# Ratios that the project promises: at least the first number, or at most the second.
PROMISES: dict[str, tuple[float, float]] = {
    "training speed, ours over llama, 512": (0.95, math.inf),
    "training speed, ours over llama, 2,048": (1.2, math.inf),
    "training speed, ours over llama, 8,192": (2.2, math.inf),
    "training speed, ours over llama, 32,768": (6.0, math.inf),
    "prefill speed, ours over llama, batch 1, 512": (0.95, math.inf),
    "prefill speed, ours over llama, batch 1, 2,048": (1.2, math.inf),
    "prefill speed, ours over llama, batch 1, 8,192": (2.3, math.inf),
    "decoding time, ours over llama's best eager, batch 1, 512": (0.0, 1.10),
    "decoding time, ours over llama's best eager, batch 8, 512": (0.0, 1.0),
    "decoding time, ours, slowest over fastest context, batch 1": (0.0, 1.03),
}

TITLES = {"train": "Training", "prefill": "Prefill", "decode": "Decoding"}
FIGURES = {
    "train": "tokens per CPU second, forward and backward pass",
    "prefill": "tokens per CPU second, last-token logits only",
    "decode": "CPU milliseconds for one token of each row, after a context that was filled, not read",
}
LLAMA_EAGER, LLAMA_ALL = ("llama", "llama_static"), ("llama", "llama_static", "llama_static_compiled")


def latest(rows: Iterable[Row]) -> list[Row]:
    """One row for each contender, phase, context and batch: the last one."""
    found = {}
    for row in rows:
        if "status" in row:
            found[row["phase"], row["batch"], row["context"], row["contender"]] = row
    return list(found.values())


def with_utilization(rows: list[Row], machine: dict[str, float]) -> list[Row]:
    """Adds what share of the machine's peaks measured rows reach.

    `flops_utilization` is operations over those of a matrix product in the same CPU time; `bandwidth_utilization`, of
    decoding, is weights and state read once over bytes of a matrix-vector product in the same CPU time.

    Args:
        rows: From the run.
        machine: `flops_per_second` and `bytes_per_second`.
    """
    result = []
    for row in rows:
        if row["status"] == "measured":
            speed = row["flops"] / row["cpu_seconds"]
            row = {**row, "flops_utilization": speed / machine["flops_per_second"]}
            if row["phase"] == "decode":
                speed = (row["parameter_bytes"] + row["state_bytes"]) / row["cpu_seconds"]
                row["bandwidth_utilization"] = speed / machine["bytes_per_second"]
        result.append(row)
    return result


class Measured:
    """Measured rows, by what they are of.

    Args:
        rows: Latest rows of all states.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [row for row in rows if row["status"] == "measured"]

    def series(self, phase: str, contender: str, batch: int | None = None) -> dict[int, Row]:
        """Rows by context, shortest first; of any batch if None (training, where it follows from the context)."""
        wanted = {"phase": phase, "contender": contender} | ({} if batch is None else {"batch": batch})
        return {row["context"]: row for row in sorted(self.rows, key=_context) if wanted.items() <= row.items()}

    def batches(self, phase: str) -> list[int]:
        """Batch sizes of a phase."""
        return sorted({row["batch"] for row in self.rows if row["phase"] == phase})


def _context(row: Row) -> int:
    return row["context"]


def bytes_per_token(row: Row) -> float:
    """Memory that a step takes beyond what the process holds before it, by token."""
    return (row["peak_bytes"] - row["base_bytes"]) / (row["batch"] * row["context"])


def ratios(rows: list[Row], full: int) -> dict[str, float]:
    """The figures that the project promises, and the same at other contexts and batch sizes.

    Args:
        rows: Latest rows.
        full: Context from which on our window and memory are full; how a prompt's time and memory grow is judged from
            there.
    """
    measured = Measured(rows)
    return training_ratios(measured) | prefill_ratios(measured, full) | decoding_ratios(measured)


def training_ratios(measured: Measured) -> dict[str, float]:
    """Training: against Llama, and long rows against short ones."""
    ours, llama = measured.series("train", "ours"), measured.series("train", "llama")
    found = _speed_ratios("training speed, ours over llama", ours, llama)
    first = next(iter(ours.values()), None)
    for context, row in list(ours.items())[1:]:
        if first is not None:
            name = f"ours, {context:,} over {first['context']:,}"
            found[f"training speed, {name}"] = row["tokens_per_cpu_second"] / first["tokens_per_cpu_second"]
            found[f"training memory per token, {name}"] = bytes_per_token(row) / bytes_per_token(first)
    return found


def prefill_ratios(measured: Measured, full: int) -> dict[str, float]:
    """Prefill: against Llama, memory at the longest context, and how time grows."""
    found: dict[str, float] = {}
    for batch in measured.batches("prefill"):
        ours, llama = (measured.series("prefill", name, batch) for name in ("ours", "llama"))
        found |= _speed_ratios(f"prefill speed, ours over llama, batch {batch}", ours, llama)
        long = {context: row for context, row in ours.items() if context >= full}
        if len(long) > 1:
            (shortest, first), *_, (longest, last) = long.items()
            name = f"prefill peak memory, ours, batch {batch}, {longest:,} over {shortest:,}"
            found[name] = last["peak_bytes"] / first["peak_bytes"]
            seconds = {context: row["cpu_seconds"] for context, row in long.items()}
            found[f"prefill exponent of time, ours, batch {batch}"] = exponent(seconds)
    return found


def decoding_ratios(measured: Measured) -> dict[str, float]:
    """Decoding: against Llama's best, and the slowest context against the fastest."""
    found: dict[str, float] = {}
    for batch in measured.batches("decode"):
        llama = {name: measured.series("decode", name, batch) for name in LLAMA_ALL}
        for name in ("ours", "ours_compiled"):
            ours = measured.series("decode", name, batch)
            for context, row in ours.items():
                eager, every = (
                    min((llama[each][context]["cpu_seconds"] for each in names if context in llama[each]), default=None)
                    for names in (LLAMA_EAGER, LLAMA_ALL)
                )
                where, seconds = f"batch {batch}, {context:,}", row["cpu_seconds"]
                if eager is not None:
                    found[f"decoding time, {name} over llama's best eager, {where}"] = seconds / eager
                if every is not None:
                    found[f"decoding speed, {name} over llama's best, {where}"] = every / seconds
            times = [row["cpu_seconds"] for row in ours.values()]
            if len(times) > 1:
                found[f"decoding time, {name}, slowest over fastest context, batch {batch}"] = max(times) / min(times)
    return found


def _speed_ratios(name: str, ours: dict[int, Row], theirs: dict[int, Row]) -> dict[str, float]:
    """Tokens per second, ours over theirs, at the contexts of both."""
    return {
        f"{name}, {context:,}": row["tokens_per_cpu_second"] / theirs[context]["tokens_per_cpu_second"]
        for context, row in ours.items()
        if context in theirs
    }


def exponent(seconds: dict[int, float]) -> float:
    """Exponent of the power law that fits times best, by least squares of logarithms; seconds by length."""
    x, y = [math.log(length) for length in seconds], [math.log(value) for value in seconds.values()]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    pairs = zip(x, y, strict=True)
    return sum((a - x_mean) * (b - y_mean) for a, b in pairs) / sum((a - x_mean) ** 2 for a in x)


def promises(figures: dict[str, float]) -> dict[str, dict[str, Any]]:
    """What was promised of ratios that were measured, and whether it holds."""
    found = {}
    for name, (least, most) in PROMISES.items():
        if name in figures:
            words = f"at most {most}" if least == 0 else f"at least {least}"
            found[name] = {"promise": words, "holds": least <= figures[name] <= most}
    return found


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def overview(rows: list[Row]) -> str:
    """One table for each phase and batch, contexts down and contenders across; what is missing, with the reason."""
    parts = []
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for phase, title in TITLES.items():
        of_phase = [row for row in rows if row["phase"] == phase]
        for batch in [None] if phase == "train" else sorted({row["batch"] for row in of_phase}):
            chosen = [row for row in of_phase if batch is None or row["batch"] == batch]
            if chosen:
                heading = title if batch is None else f"{title}, batch {batch}"
                parts += [f"## {heading}", f"{FIGURES[phase]}.", _pivot(chosen, names), _missing(chosen)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _pivot(rows: list[Row], names: list[str]) -> str:
    cells = {(row["context"], row["contender"]): _headline(row) for row in rows}
    columns = [name for name in names if any(name == contender for _, contender in cells)]
    contexts = sorted({context for context, _ in cells})
    lines = [[f"{context:,}", *(cells.get((context, name), "") for name in columns)] for context in contexts]
    return markdown(["context", *columns], lines)


def _headline(row: Row) -> str:
    if row["status"] != "measured":
        return "–"
    return f"{1000 * row['cpu_seconds']:.1f}" if row["phase"] == "decode" else f"{row['tokens_per_cpu_second']:,.0f}"


def _missing(rows: list[Row]) -> str:
    left_out = [row for row in rows if row["status"] != "measured"]
    return "\n".join(f"- {row['contender']}, {row['context']:,}: {row['status']}, {row['reason']}" for row in left_out)


def details(rows: list[Row]) -> str:
    """Every measured row with all of its figures."""
    header = ["phase", "batch", "context", "contender", "CPU s", "wall s", "repetitions", "GFLOP", "of peak FLOP/s"]
    header += ["of bandwidth", "peak MiB", "above base MiB", "state MB"]
    lines = []
    for row in Measured(rows).rows:
        line = [row["phase"], str(row["batch"]), f"{row['context']:,}", row["contender"]]
        line += [f"{row['cpu_seconds']:.4g}", f"{row['wall_seconds']:.4g}", str(row["repetitions"])]
        line += [f"{row['flops'] / 1e9:,.3f}", f"{row['flops_utilization']:.0%}"]
        line.append(f"{row['bandwidth_utilization']:.0%}" if "bandwidth_utilization" in row else "")
        line += [f"{row['peak_bytes'] / 2**20:,.0f}", f"{(row['peak_bytes'] - row['base_bytes']) / 2**20:,.0f}"]
        line.append("" if row["state_bytes"] is None else f"{row['state_bytes'] / 1e6:.2f}")
        lines.append(line)
    return markdown(header, lines)


NOTES = """Fastest repetition of training and prefill, median token of decoding. `ours` trains with the loss that never
holds all logits, `ours_all_logits` with the ordinary one. GFLOP are those of matrix products, convolutions and
attention: causal kernels count the pairs that they compute, kernels with a mask all pairs, because they compute what is
masked as well. Peak memory is that of the process in the cell; contexts that take turns when decoding share one figure.
Bandwidth is that of weights and state, each read once."""


def plot(rows: list[Row], path: Path) -> None:
    """CPU milliseconds per token against context, logarithmic, a panel for each phase. Needs matplotlib."""
    from matplotlib.figure import Figure

    measured = Measured(rows)
    names = list(dict.fromkeys(row["contender"] for row in measured.rows))
    phases = [phase for phase in TITLES if measured.batches(phase)]
    figure = Figure(figsize=(4 * len(phases) + 3, 4.5), layout="constrained")
    panels = figure.subplots(1, max(1, len(phases)), squeeze=False)[0]
    for axes, phase in zip(panels, phases, strict=False):
        batches: list[int | None] = [None] if phase == "train" else [*measured.batches(phase)]
        for name in names:
            for batch, style in zip(batches, ("o-", "s--", "^:", "v-.") * len(batches), strict=False):
                points = measured.series(phase, name, batch)
                costs = [1000 / row["tokens_per_cpu_second"] for row in points.values()]
                words = name if batch in (None, batches[0]) else None
                axes.plot(list(points), costs, style, color=f"C{names.index(name)}", label=words, markersize=4)
        styles = "" if phase == "train" else " (" + ", ".join(map(_style_words, enumerate(batches))) + ")"
        axes.set(title=TITLES[phase] + styles, xlabel="context, tokens", ylabel="CPU ms per token")
        axes.set(xscale="log", yscale="log")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def _style_words(item: tuple[int, int | None]) -> str:
    index, batch = item
    return f"{('solid', 'dashed', 'dotted', 'dash-dotted')[index % 4]}: batch {batch}"


def report(
    args: argparse.Namespace, rows: list[Row], full: int, settings: dict[str, Any], where: dict[str, str]
) -> dict[str, Any]:
    """Prints the tables and writes benchmark.json, table.md and benchmark.png.

    Args:
        args: Of the command line.
        rows: All rows of the run, those of the machine's peaks as well.
        full: See `ratios`.
        settings: What the figures were measured with.
        where: From `experiments.reports.environment`.

    Returns:
        What benchmark.json holds.
    """
    peaks: list[Row] = [row for row in rows if row["phase"] == "machine"]
    machine = {name: max(row[name] for row in peaks) for name in ("flops_per_second", "bytes_per_second")}
    order = [*args.contender, *sorted({row["contender"] for row in latest(rows)} - set(args.contender))]
    done = sorted(
        with_utilization(latest(rows), machine),
        key=lambda row: (list(TITLES).index(row["phase"]), row["batch"], row["context"], order.index(row["contender"])),
    )
    figures = ratios(done, full)
    promised = promises(figures)
    results: dict[str, Any] = {"ratios": figures, "promises": promised, "machine": machine, "rows": done}
    results |= {"settings": settings, "environment": where}
    lines = [[name, f"{value:.3f}", _promise_words(promised.get(name))] for name, value in figures.items()]
    table = markdown(["ratio", "", "promised"], lines)
    text = "\n\n".join([overview(done) + "\n## Ratios", table])
    print(text)
    whole = "\n\n".join(["# Benchmark", NOTES, text, "## All figures", details(done)]) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        "benchmark.json": lambda path: path.write_text(json.dumps(results, indent=1) + "\n", "utf-8"),
        "table.md": lambda path: path.write_text(whole, "utf-8"),
        "benchmark.png": lambda path: plot(done, path),
    }
    for name, write in writers.items():
        write_whole(args.output_dir / name, write)
    return results


def _promise_words(promise: dict[str, Any] | None) -> str:
    return "" if promise is None else f"{promise['promise']}: {'holds' if promise['holds'] else 'does not hold'}"
