"""The package: one version, imports that need no extra, floors that are tested, and a wheel of nothing but itself."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import rmt_hf
from helpers import ROOT


SOURCE = Path(rmt_hf.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OF_TRAINING = ["RMTMemoryCallback", "RMTTrainer", "RMTTrainingArguments", "StreamSchedule"]


# Names


WITHOUT_EXTRAS = """
import sys

sys.modules |= dict.fromkeys(("datasets", "peft", "trl"))  # as if they were not installed
import rmt_hf
from rmt_hf import *

assert RMTForCausalLM is rmt_hf.RMTForCausalLM and set(sys.argv[1:]) <= set(dir(rmt_hf))
assert "rmt_hf.training" not in sys.modules
for name in sys.argv[1:]:
    try:
        getattr(rmt_hf, name)
    except ImportError as error:
        print(error)
"""


def test_all_but_training_needs_no_extra() -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent)}  # a checkout will do
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *OF_TRAINING]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    wanted = [f'{name} needs datasets: pip install "rmt_hf[train]".' for name in OF_TRAINING]
    assert result.stdout.splitlines() == wanted


def test_every_public_name_is_there() -> None:
    for name in [*rmt_hf.__all__, *OF_TRAINING]:
        assert getattr(rmt_hf, name).__name__ == name and name in dir(rmt_hf)
    assert dir(rmt_hf) == sorted(set(dir(rmt_hf)))
    with pytest.raises(AttributeError, match="module 'rmt_hf' has no attribute 'RMTTrainr'"):
        _ = rmt_hf.RMTTrainr


def test_an_error_of_ours_names_no_extra(monkeypatch) -> None:
    monkeypatch.delattr(rmt_hf, "training", raising=False)
    monkeypatch.setitem(sys.modules, "rmt_hf.training", None)  # as a file that is missing
    with pytest.raises(ModuleNotFoundError, match=r"rmt_hf\.training"):
        _ = rmt_hf.RMTTrainer


# Floors


def floor_of(requirement: str) -> tuple[str, str]:
    parsed = Requirement(requirement)
    [version] = [each.version for each in parsed.specifier if each.operator == ">="]
    return parsed.name, version


def pins(name: str) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text("utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def test_lower_bounds_are_those_that_are_tested() -> None:
    extras = PROJECT["optional-dependencies"]
    floors = dict(map(floor_of, PROJECT["dependencies"] + extras["train"] + extras["chat"]))
    del floors["torch"]  # the version that requirements-dev.txt has
    lowest = pins("requirements-lowest.txt")
    assert {name: lowest[name].removesuffix(".0") for name in floors} == floors
    assert lowest.keys() - floors.keys() == {"huggingface_hub", "tokenizers"}  # bounded by transformers


def test_what_is_developed_with_is_pinned() -> None:
    extras = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    for extra, requirements in extras.items():
        developed = pins(f"requirements-{extra if extra in ('docs', 'demo') else 'dev'}.txt")
        for requirement in map(Requirement, requirements):
            if requirement.name != "rmt_hf":
                assert requirement.specifier.contains(developed[requirement.name]), requirement


def load_configuration(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The file that a Hub folder is entered by, as a transformers of another version loads it."""
    # Not by the name that this file imported: transformers puts another module in its place later.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    spec = importlib.util.spec_from_file_location("configuration_of_a_visitor", SOURCE / "configuration_rmt.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("version", ["4.57.1", "5.9.0", "5.22.2"])
def test_an_older_transformers_is_told_so(version: str, monkeypatch) -> None:
    floor = dict(map(floor_of, PROJECT["dependencies"]))["transformers"]
    with pytest.raises(ImportError, match=rf"needs transformers>={floor}, got {version}: pip install -U transformers"):
        load_configuration(monkeypatch, version)


@pytest.mark.parametrize("version", ["5.23.0", "5.24.0.dev0", "6.0.0rc1", "10.0"])
def test_a_newer_transformers_is_not(version: str, monkeypatch) -> None:
    load_configuration(monkeypatch, version)


# What is built


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution, built without a network, and the wheel of the latter."""
    folder = tmp_path_factory.mktemp("dist")

    def build(source: Path, target: str, directory: Path) -> None:
        command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
        result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr

    build(ROOT, "wheel", folder)
    build(ROOT, "sdist", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    build(folder / f"rmt_hf-{rmt_hf.__version__}", "wheel", folder / "again")
    return folder


ABOUT = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_is_the_package_and_nothing_else(built: Path) -> None:
    files = files_of(built / f"rmt_hf-{rmt_hf.__version__}-py3-none-any.whl")
    about = f"rmt_hf-{rmt_hf.__version__}.dist-info"
    package = {path.relative_to(SOURCE.parent).as_posix() for kind in ("*.py", "*.html") for path in SOURCE.rglob(kind)}
    package |= {"rmt_hf/py.typed"}
    assert files.keys() == package | {f"{about}/{name}" for name in ABOUT}
    metadata = message_from_bytes(files[f"{about}/METADATA"])
    assert metadata["Version"] == rmt_hf.__version__ and metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_all("Provides-Extra") == sorted(PROJECT["optional-dependencies"])


def test_the_source_distribution_has_no_more_than_the_package_needs(built: Path) -> None:
    with tarfile.open(built / f"rmt_hf-{rmt_hf.__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    papers = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
    assert {name for name in names if not name.startswith("src/rmt_hf/")} == papers
    [wheel] = (built / "again").glob("*.whl")
    assert files_of(wheel) == files_of(built / wheel.name)  # the same, from the source distribution alone


# Beside the package


def test_the_change_log_has_this_version() -> None:
    assert f"\n## [{rmt_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_citation_is_of_this_version() -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == rmt_hf.__version__ and citation["license"] == PROJECT["license"]
    [paper] = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
