"""The runs of `experiments.evidence` as a table and a plot."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmt_hf.files import write_whole


REFERENCE = "default"  # the form that all others are one step away from


def read_runs(file: Path, order: Sequence[str] = ()) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """Runs by task, row and seed, rows in an order; of several runs with other settings the last one counts."""
    runs: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    for run in sorted(lines, key=lambda run: order.index(run["row"]) if run["row"] in order else len(order)):
        runs.setdefault(run["task"], {}).setdefault(run["row"], {})[run["seed"]] = run
    return runs


def write_evidence(file: Path, directory: Path, order: Sequence[str] = ()) -> None:
    """Writes `table.md` and `evidence.png` of the runs in a file of JSON lines, rows in an order."""
    runs = read_runs(file, order)
    text = "\n".join(table(task, rows) for task, rows in runs.items())
    write_whole(directory / "table.md", lambda path: path.write_text(text, "utf-8"))
    write_whole(directory / "evidence.png", lambda path: plot(runs, path))


def score(task: str, run: dict[str, Any]) -> float:
    """What a run is judged by: accuracy at 8 segments, or mean bits per byte beyond the window."""
    return run["accuracy_8"] if task == "recall" else statistics.fmean(run["bits_per_byte"]["own"])


def differences(task: str, rows: dict[str, dict[int, dict[str, Any]]], name: str) -> list[float]:
    """Score of a row minus that of the default, for each seed that both have."""
    ours, theirs = rows.get(REFERENCE, {}), rows[name]
    return [score(task, theirs[seed]) - score(task, ours[seed]) for seed in sorted(set(ours) & set(theirs))]


def mean_and_error(values: list[float]) -> str:
    """Mean ± standard error over seeds; a single value has none."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{error}" if values else ""


def table(task: str, rows: dict[str, dict[int, dict[str, Any]]]) -> str:
    """A Markdown table of one task."""
    columns = ["accuracy, 8 segments", "minus default", "64 segments"] if task == "recall" else []
    columns = columns or ["bits per byte", "minus default", "emptied minus own", "another's minus own"]
    columns = ["", "seeds", *columns, "parameters", "state bytes", "training, CPU s", "decoding, CPU ms"]
    lines = [f"## {task}", "", "|" + "|".join(columns) + "|", "|---" * len(columns) + "|"]
    for name, seeds in rows.items():
        runs = list(seeds.values())
        cells = [name, str(len(runs)), mean_and_error([score(task, run) for run in runs])]
        cells.append("" if name == REFERENCE else mean_and_error(differences(task, rows, name)))
        if task == "recall":
            cells.append(mean_and_error([run["accuracy_64"] for run in runs]))
        else:
            cells += [ablation_difference(runs, name) for name in ("empty", "other")]
        first = runs[0]
        cells += [f"{first['parameters']:,}", f"{first['state_bytes']:,}"]
        cells += [
            f"{statistics.fmean(run[key] for run in runs):.1f}" for key in ("train_seconds", "decode_milliseconds")
        ]
        lines.append("|" + "|".join(cells) + "|")
    return "\n".join(lines) + "\n"


def ablation_difference(runs: list[dict[str, Any]], ablation: str) -> str:
    """How much worse text is predicted under an ablation of memory: mean over documents, then over seeds."""
    bits = [run["bits_per_byte"] for run in runs if ablation in run["bits_per_byte"]]
    return mean_and_error([statistics.fmean(each[ablation]) - statistics.fmean(each["own"]) for each in bits])


def plot(runs: dict[str, dict[str, dict[int, dict[str, Any]]]], path: Path) -> None:
    """The score of every row, a panel for each task, a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (task, rows) in zip(panels, runs.items(), strict=True):
        for index, (name, seeds) in enumerate(rows.items()):
            scores = [score(task, run) for run in seeds.values()]
            axes.plot(scores, [index] * len(scores), "o", color="C0" if name != REFERENCE else "C3", alpha=0.6)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set(title=task, xlabel="accuracy at 8 segments" if task == "recall" else "bits per byte beyond the window")
    figure.savefig(path, dpi=120)
