"""The command `rmt`: its help, what it hands on, what it says of what a user can mend, and each command once."""

import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmt_hf
from helpers import ROOT, TEMPLATE, make_source, tiny_model, tiny_tokenizer
from rmt_hf.chat import Chat
from rmt_hf.cli import COMMANDS, main


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model() -> str:
    """A folder of a model with a tokenizer that has a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for part in (tiny_model(dtype=torch.float32), tokenizer):
        part.save_pretrained("model")
    return "model"


@pytest.fixture
def source() -> str:
    for part in (make_source("llama", torch.float32), tiny_tokenizer()):
        part.save_pretrained("source")
    return "source"


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return str(caught.value.code)  # a message means exit code 1


# The command itself


def test_it_is_installed_as_rmt_and_runs_as_a_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["rmt"]) is main
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); sys.argv[1:] = ['card', 'nowhere']\n"
    program += "import runpy; runpy.run_module('rmt_hf', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.endswith("rmt card: There is no folder nowhere.\n")


def test_the_version(capsys) -> None:
    assert refusal("--version") == "0"
    assert capsys.readouterr().out == f"rmt_hf {rmt_hf.__version__}\n"


def test_help_names_every_command_with_an_example(capsys) -> None:
    assert refusal("--help") == "0"
    said = capsys.readouterr().out
    assert list(COMMANDS) == ["convert", "calibrate", "chat", "serve", "evaluate", "inspect", "card"]
    for name, command in COMMANDS.items():
        assert f"  {name} " in said and command.purpose in said and f"rmt {name} {command.example}\n" in said


@pytest.mark.parametrize("name", ["convert", "calibrate", "chat", "inspect", "card"])
def test_help_of_a_command(name, capsys) -> None:
    assert refusal(name, "--help") == "0"
    said = capsys.readouterr().out
    assert said.startswith(f"example: rmt {name} {COMMANDS[name].example}\n\nusage: rmt {name} [-h] ")


@pytest.mark.parametrize("arguments", [[], ["remember"], ["convert"], ["chat", "model", "--loud"], ["card", "m", "n"]])
def test_wrong_options_end_with_2(arguments, capsys) -> None:
    assert refusal(*arguments) == "2"
    assert re.fullmatch(r"usage: rmt.*\nrmt.*: error: [^\n]+\n", capsys.readouterr().err, re.DOTALL)


def test_arguments_are_handed_on_as_they_are(monkeypatch) -> None:
    given = []
    monkeypatch.setattr("rmt_hf.conversion.main", given.extend)
    main(["convert", "--back", "a", "--", "-b"])
    assert given == ["--back", "a", "--", "-b"]


def test_an_example_has_the_options_of_its_command() -> None:
    for name in ("convert", "calibrate", "chat", "inspect", "card"):
        assert refusal(name, *COMMANDS[name].example.split()).startswith(f"rmt {name}: ")  # not 2: there is no MODEL


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("seed must be at least 0."), "rmt convert: seed must be at least 0."),
        (FileExistsError("target exists."), "rmt convert: target exists."),
        (OSError("No such model."), "rmt convert: No such model."),
        (ImportError("jinja2 is needed."), "rmt convert: jinja2 is needed."),
        (ModuleNotFoundError("No", name="datasets"), 'rmt convert: datasets is missing: pip install "rmt_hf[train]".'),
        (KeyboardInterrupt(), "130"),
    ],
)
def test_what_a_user_can_mend_is_said_without_a_traceback(error, said, monkeypatch) -> None:
    def fail(arguments) -> None:
        raise error

    monkeypatch.setattr("rmt_hf.conversion.main", fail)
    assert refusal("convert") == said


@pytest.mark.parametrize("error", [ModuleNotFoundError("No", name="rmt_hf.conversions"), KeyError("a"), TypeError("b")])
def test_a_fault_of_ours_has_a_traceback(error, monkeypatch) -> None:
    def fail(arguments) -> None:
        raise error

    monkeypatch.setattr("rmt_hf.conversion.main", fail)
    with pytest.raises(type(error)):
        main(["convert"])


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("serve", "uvicorn", "serve"), ("evaluate", "lm_eval", "eval"), ("calibrate", "datasets", "train")],
)
def test_an_extra_that_is_missing_is_named(name, module, extra, monkeypatch) -> None:
    for loaded in [*sys.modules]:
        if loaded.split(".")[0] == module or loaded in ("rmt_hf.texts", f"rmt_hf.{COMMANDS[name].function[:-5]}"):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    said = refusal(name, "model", "texts", "target")
    assert module in said and f'pip install "rmt_hf[{extra}]".' in said


# Its commands


def test_convert_and_calibrate(source, capsys, tmp_path) -> None:
    sizes = ["--segment-length", "8", "--num-memory-slots", "32"]
    main(["convert", source, "model", *sizes, "--num-lasting-slots", "16"])
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{3 + number % 64}" for number in range(20_000)), "utf-8")
    main(["calibrate", "model", "words.txt", "calibrated", "--num-documents", "2"])
    assert re.search(r"calibrated: scores explain -?\d+% of ", capsys.readouterr().out)
    before, after = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("model", "calibrated"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".score_proj." in name for name in changed)
    assert AutoTokenizer.from_pretrained("calibrated")("w5").input_ids == [5]
    assert refusal("calibrate", "nowhere", "nothing", "calibrated").startswith("rmt calibrate: calibrated exists")
    assert "There is no file" in refusal("calibrate", "model", "none.txt", "other")
    assert "must hold two characters" in refusal("calibrate", "model", str(empty(tmp_path)), "other")
    main(["convert", source, "present", *sizes])
    assert "num_lasting_slots must be above 0" in refusal("calibrate", "present", "words.txt", "other")
    assert not (tmp_path / "other").exists()
    assert "exists already" in refusal("convert", source, "model")
    assert refusal("convert", "model", "back", "--back", *sizes) == "2"


def empty(folder):
    (folder / "empty.txt").write_text("", "utf-8")
    return folder / "empty.txt"


def test_inspect(model, tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + number}" for number in range(40)), "utf-8")
    main(["inspect", model, "text.txt", "page.html"])
    assert "page.html: 40 tokens" in capsys.readouterr().out and (tmp_path / "page.html").stat().st_size > 1000
    assert "none.txt" in refusal("inspect", model, "none.txt", "page.html")


def test_what_has_no_memory_is_refused(source) -> None:
    assert "source has no memory ('llama'): rmt convert SOURCE TARGET" in refusal("chat", source)
    assert "source has no memory ('llama'): rmt convert SOURCE TARGET" in refusal("card", source)


def talk(monkeypatch, *lines: str | type[BaseException], options: tuple[str, ...] = ()) -> None:
    """A chat in which this is typed, or pressed."""
    left = iter(lines)

    def typed(prompt: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    main(["chat", "model", "--max-new-tokens", "4", "--temperature", "0", *options])


def test_chat(model, monkeypatch, capsys, tmp_path) -> None:
    keep = ("--keep", "kept")
    talk(monkeypatch, "/undo", "w10 w11", "/again", "/state", "", "w12", options=keep)
    none, first, again, state, second, last = capsys.readouterr().out.splitlines()
    assert none == "There is no turn to undo." and first == again != second and len(first.split()) == 4
    number, bytes_of = re.fullmatch(r"(\d+) tokens read, ([\d,]+) bytes of state", state).groups()
    assert last.endswith(f"{bytes_of} bytes of state") and int(last.split()[0]) > int(number)

    talk(monkeypatch, "/undo", "/quit", "w13", options=keep)  # what was undone in another process stays
    assert capsys.readouterr().out.splitlines() == [none, last]
    talk(monkeypatch, "w10 w11", "w12", "/undo", KeyboardInterrupt)
    assert capsys.readouterr().out.splitlines() == [first, second, "Undone: w12", state]
    talk(monkeypatch, "w10 w11", "/undo", "/state", "w12", "/undo", options=("--keep", "undone"))
    assert "tokens read" not in capsys.readouterr().out and not (tmp_path / "undone" / "chat.json").exists()

    word = first.split()[2]
    talk(monkeypatch, "w10 w11", options=("--stop", word))
    assert capsys.readouterr().out.splitlines()[0].split() == first[: first.index(word)].split()
    talk(monkeypatch, "w10 w11", options=("--system", "w20 w21"))
    told = capsys.readouterr().out.splitlines()
    assert told[0] != first and int(told[1].split()[0]) > int(number)
    (tmp_path / "kept" / "chat.json").write_text('{"end": "", "positions": [1]}', "utf-8")
    assert "saving was interrupted" in refusal("chat", "model", *keep)


def test_an_answer_that_is_interrupted_is_not_of_the_chat(model, monkeypatch, capsys) -> None:
    whole = Chat.stream

    def interrupted(self, message):
        words = whole(self, message)
        if message == "w12":
            yield next(words)
            raise KeyboardInterrupt
        yield from words

    monkeypatch.setattr(Chat, "stream", interrupted)
    talk(monkeypatch, "w10 w11", "/state", "w12", "/state")
    _, state, _, told, *after = capsys.readouterr().out.splitlines()
    assert told == "Interrupted: the chat stands where it stood." and after == [state, state]


def test_card(model, tmp_path, capsys) -> None:
    given = ["--license", "mit", "--datasets", "one", "two", "--base-model", "org/base", "--tags", "tiny"]
    main(["card", model, *given, "--result", "Hamlet", "bits per byte", "1.51"])
    assert capsys.readouterr().out.endswith("model/README.md\n")
    text = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "license: mit" in text and "- one\n- two\n" in text and "org/base" in text and "- tiny\n" in text
    assert "| Hamlet | bits per byte | 1.51 |" in text
    main(["card", model, "--result", "Hamlet", "bits per byte", "1.5"])
    text = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "license: mit" in text and "| Hamlet | bits per byte | 1.5 |" in text and "1.51" not in text
    assert refusal("card", model, "--result", "Hamlet", "bits", "few").startswith("rmt card: could not convert")


def test_evaluate_is_the_harness(capsys, monkeypatch) -> None:
    assert refusal("evaluate", "run", "--help") == "0"
    said = capsys.readouterr().out
    assert said.startswith(f"example: rmt evaluate {COMMANDS['evaluate'].example}\n") and "--tasks" in said


def test_serve_refuses_what_is_no_model() -> None:
    assert refusal("serve", "no/such/model").startswith("rmt serve: ")
