"""Reports: verdicts follow from the numbers, files are whole or absent, and say where their numbers come from."""

import json
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from experiments.comparison import Comparison
from experiments.reports import environment, plot, table, verdict, write_metrics, write_report
from rmt_hf.files import write_whole


def make_comparison(shift: float, noise: float = 0.1) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(8, 63, generator=generator)
    other = own + shift + noise * torch.randn(8, 1, generator=generator)
    return Comparison({"own": own, "other": other}, torch.ones(8, 63, dtype=torch.int64), window_length=4)


@pytest.mark.parametrize(("shift", "words"), [(1.0, "is worse than"), (-1.0, "is better than"), (0.0, "no difference")])
def test_verdict_follows_from_the_numbers(shift, words):
    assert words in verdict(make_comparison(shift), "other")


def test_report_holds_every_figure(tmp_path):
    comparison = make_comparison(1.0)
    write_report(tmp_path / "report", "Title", comparison, {"seconds": 3}, "To be | or not")
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [
        "bits_per_byte.png",
        "metrics.json",
        "report.md",
    ]
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    for mean, error in [comparison.overall("own"), *comparison.difference_by_position("other")]:
        assert f"{mean:.4f} ± {error:.4f}" in text
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text("utf-8"))
    assert metrics["difference"]["other"] == list(comparison.overall_difference("other"))
    assert metrics["facts"] == {"seconds": 3} and metrics["sample"] == "To be | or not"


def test_any_models_are_compared_by_their_names(tmp_path):
    own, other = make_comparison(1.0).bits.values()
    bits = {"small": other, "large": own, "medium": (own + other) / 2}
    comparison = Comparison(bits, torch.ones(8, 63, dtype=torch.int64), window_length=4, reference="large")
    assert verdict(comparison, "small").startswith("small is worse than large (+1.0")
    assert table(comparison).startswith("| tokens read | large | small − large | medium − large |")
    write_metrics(tmp_path / "metrics.json", comparison, seconds=3)
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics["reference"] == "large" and metrics["seconds"] == 3
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path / "broken.json", comparison, seconds=float("nan"))
    plot(comparison, tmp_path / "bits.svg")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bits.svg", "metrics.json"]


def test_a_plot_has_a_curve_and_a_band_for_each(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: figures.append(figure))
    comparison = make_comparison(1.0)
    plot(comparison, tmp_path / "bits.png")
    levels, differences = figures[0].axes
    for axes, points in (
        (levels, [comparison.by_position("own"), comparison.by_position("other")]),
        (differences, [comparison.difference_by_position("other")]),
    ):
        for line, band, pairs in zip(axes.lines[-len(points) :], axes.collections, points, strict=True):
            assert line.get_ydata() == pytest.approx([mean for mean, _ in pairs])
            edges = {round(float(height), 9) for height in band.get_paths()[0].vertices[:, 1]}
            assert edges >= {round(mean + side * error, 9) for mean, error in pairs for side in (-1, 1)}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "numbers.json"
    write_whole(path, lambda name: name.write_text("old"))

    def fail(name):
        name.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    def write(name):
        name.mkdir()
        (name / "new").touch()

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    write_whole(tmp_path / "model", write)
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "new"]


def test_environment_names_no_path_of_the_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/else/train.py", "--steps", "3"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    found = environment(("torch",))
    assert found["command"] == "python train.py --steps 3"
    assert found["torch"] == torch.__version__ and "threads" in found["machine"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("experiments.benchmark.__main__", None))
    assert environment(("torch",))["command"] == "python -m experiments.benchmark --steps 3"
