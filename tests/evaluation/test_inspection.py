"""Seeing memory: what is noted of a text is what the state and attention say, and a browser shows it."""

import base64
import html
import json
import re
import shutil
import subprocess
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from helpers import FORMS, S, make_source, tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf.conversion import add_memory
from rmt_hf.inspection import LASTING, NEVER, NOTHING, PRESENT, SINK, WINDOW, main, trace, write_page, write_picture


LENGTH = 7 * S + 5
IDS = tiny_ids(1, LENGTH)
TEXT = " ".join(f"w{number}" for number in IDS[0].tolist())
ALL = 100  # more reads than there are columns


@pytest.fixture(scope="module")
def found():
    return trace(tiny_model(**FORMS["two parts"]), tiny_tokenizer(), TEXT)


# What is noted


@pytest.mark.parametrize("form", FORMS)
def test_what_is_held_is_what_states_hold(form: str) -> None:
    """States that read as much in one call, which writes all segments at once."""
    model = tiny_model(**FORMS[form])
    found = trace(model, tiny_tokenizer(), TEXT, num_reads=0)
    for position in [*range(S, LENGTH, S), LENGTH]:
        slots = model.memorize(IDS[:, :position]).slots()
        held = {(slot.layer, slot.head, slot.position) for slot in slots}
        first = max(0, position // S - model.config.num_lookback_segments) * S
        for token in range(position):
            wanted = [
                (layer, head, token) in held or token >= first for layer, head in product(*map(range, sizes(found)))
            ]
            assert found.held(position)[:, :, token].flatten().tolist() == wanted
    lasting = {(*slot[1:3], slot.position) for slot in slots if slot.part == "lasting"}
    for place in product(*map(range, found.part.shape)):
        if found.dropped[place] < 0:
            wanted = LASTING if place in lasting else PRESENT if place in held else WINDOW
            assert found.part[place] == wanted


def sizes(found) -> tuple[int, int]:
    return found.part.shape[:2]


@pytest.mark.parametrize("form", ["gated select", "two parts", "present", "mean", "sink", "no memory"])
def test_what_is_read_is_what_is_held(form: str) -> None:
    fields = {**FORMS[form], "fusion_type": "gated"}
    found = trace(tiny_model(**fields), tiny_tokenizer(), TEXT, num_reads=ALL)
    # Softmax in float32 here sums to 1 up to the rounding of some 30 terms.
    torch.testing.assert_close(found.read_weights.sum(-1), torch.ones(found.part.shape), rtol=0, atol=1e-5)
    for token in range(0, LENGTH, 3):
        held, window = found.held(token), max(0, token // S * S + S - found.window_length)
        for place in product(*map(range, sizes(found))):
            read, weights = (each[place][token] for each in (found.read_positions, found.read_weights))
            assert set(read[weights > 0].tolist()) - {SINK} == set(held[place].nonzero().flatten().tolist())
            assert set(read[weights == 0].tolist()) <= {NOTHING}
            in_slots = weights[(read >= 0) & (read < window)].sum()
            wanted = torch.stack([in_slots, weights[read == SINK].sum()])
            torch.testing.assert_close(found.shares[place][token], wanted, rtol=0, atol=1e-5)
    assert (found.shares[..., 1].amax() > 0) == bool(fields.get("use_attention_sink"))


def test_where_all_is_kept_weights_are_those_of_the_source() -> None:
    source = make_source("llama")
    fields = {"segment_length": S, "chunk_length": 4, "num_slots_per_chunk": 4, "num_memory_slots": 8 * S}
    model = add_memory(source, **fields, use_attention_sink=False)
    found = trace(model, tiny_tokenizer(), TEXT, num_reads=ALL)
    source.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = torch.stack(source(IDS, output_attentions=True).attentions)[:, 0].unflatten(1, (2, -1)).mean(2)
    dense = torch.zeros(*found.part.shape, LENGTH + 2)
    dense.scatter_(3, found.read_positions - NOTHING, found.read_weights)
    torch.testing.assert_close(dense[..., 2:], wanted.float(), rtol=0, atol=1e-5)  # weights are kept in float32
    few = trace(model, tiny_tokenizer(), TEXT, num_reads=2)
    torch.testing.assert_close(few.read_weights, found.read_weights[..., :2])
    assert (found.dropped == -1).all()


def test_words_are_those_of_the_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "  w5 w6\n\nw7  w8 " + TEXT
    found = trace(tiny_model(), tokenizer, text, max_tokens=3)
    assert found.words == ["w5 ", "w6\n\n", "w7  "] and found.part.shape == (2, 2, 3)
    ends = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert trace(tiny_model(), tokenizer, "w5 w6").words == ["<s>", "w5 ", "w6", "</s>"]


def test_the_model_is_as_before() -> None:
    model = tiny_model().train()
    trace(model, tiny_tokenizer(), TEXT, max_tokens=20)
    broken = tiny_model(attention_dropout=0.5).train()
    broken.model.layers[1].mlp.forward = lambda hidden_states: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trace(broken, tiny_tokenizer(), TEXT)
    for each in (model, broken):
        assert each.training and each.config._attn_implementation == "sdpa"
        assert not any(module._forward_hooks for module in each.modules())


class SlowTokenizer:
    is_fast = False


BAD = {
    "max_tokens must be from 1 to 65,533, got 0": lambda: {"max_tokens": 0},
    "num_reads must be at least 0, got -1": lambda: {"num_reads": -1},
    "text must have at least one token": lambda: {"text": "  "},
    "tokenizer must be a fast one, got SlowTokenizer": lambda: {"tokenizer": SlowTokenizer()},
    "model must be one with memory, got 'llama'": lambda: {"model": make_source("llama")},
    'num_reads must be 0 with fusion_type="softmax", got 6': lambda: {"model": tiny_model(**FORMS["paper"])},
    "input_ids must lie in 0 .. 8": lambda: {"model": tiny_model(vocab_size=9)},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_traced_is_refused(message: str) -> None:
    given = {"model": tiny_model(), "tokenizer": tiny_tokenizer(), "text": TEXT} | BAD[message]()
    before = given["model"].config._attn_implementation
    with pytest.raises(ValueError, match=message):
        trace(**given)
    assert given["model"].config._attn_implementation == before


# Files


def test_a_page_has_all_numbers_and_asks_nobody(found, tmp_path: Path) -> None:
    hostile = found._replace(words=["</script><b>{{packed}}", *found.words[1:]])
    write_page(hostile, tmp_path / "page.html", title="<b>")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert not re.search(r"https?:|src=|href=|url\(|import |fetch\(", page)
    facts = json.loads(re.search(r'id="facts">(.*?)</script>', page)[1])
    assert facts["words"] == hostile.words and facts["title"] == "<b>"
    packed = zlib.decompress(base64.b64decode(re.search(r'id="packed">(.*?)</script>', page)[1]))
    size, reads = found.part.numel(), facts["reads"]
    wide, narrow = np.frombuffer(packed[: 2 * size * (reads + 1)], "<u2"), np.frombuffer(packed, "u1")
    assert (wide[: size * reads] == found.read_positions.numpy().ravel() + 2).all()
    assert ((wide[size * reads :] == NEVER) == (found.dropped < 0).numpy().ravel()).all()
    weights = narrow[2 * size * (reads + 1) + size :][: size * reads].astype(float)
    # 255 steps of the square root: half a step is 1 / 255 of a weight of 1.
    np.testing.assert_allclose((weights / 255) ** 2, found.read_weights.numpy().ravel(), atol=1 / 250)
    assert len(packed) == 2 * size * (reads + 1) + size * (1 + reads + 2)


def test_a_folder_is_not_replaced(found, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    for write in (write_page, write_picture):
        with pytest.raises(ValueError, match="must be a file, got a folder"):
            write(found, tmp_path)
    with pytest.raises(ValueError, match="must be a file, got a folder"):
        main(["no model", "no text", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("form", ["two parts", "no memory"])
def test_the_command_writes_a_page_and_a_picture(form: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs it")
    for part in (tiny_model(dtype=torch.float32, **FORMS[form]), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    names = [str(tmp_path / name) for name in ("model", "text.txt", "page.html")]
    main([*names, "--picture", str(tmp_path / "map.png"), "--max-tokens", "50", "--num-reads", "0"])
    assert capsys.readouterr().out == f"{names[2]}: 50 tokens\n"
    facts = json.loads(re.search(r'id="facts">(.*?)</script>', (tmp_path / "page.html").read_text("utf-8"))[1])
    assert (facts["title"], len(facts["words"]), facts["reads"]) == ("text.txt", 50, 0)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
OPTIONS += " --disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
STEPS = """<script type="module">
const steps = STEPS, results = [];
while (!document.documentElement.dataset.ready) await new Promise(resolve => setTimeout(resolve, 20));
const shown = id => document.getElementById(id).textContent;
for (const [id, event, value] of [[], ...steps]) {
  const element = document.getElementById(id);
  if (event === "keydown") element.dispatchEvent(new KeyboardEvent(event, { key: value, bubbles: true }));
  else if (event) { if (value !== undefined) element.value = value;
    element.dispatchEvent(new Event(event, { bubbles: true })); }
  await new Promise(resolve => setTimeout(resolve, 400));  // the address comes later
  results.push({ word: shown("word"), fate: shown("fate"), clock: shown("clock"), text: shown("text"),
    reads: [...document.querySelectorAll("#reads li")].map(item => item.textContent), sums: shown("sums"),
    held: [...document.querySelectorAll("#text span")].map(span => span.className === "held"),
    chosen: document.querySelectorAll("[aria-selected=true]").length, address: location.hash,
    grid: [...document.querySelectorAll("#grid i")].map(box => box.title) });
}
document.body.dataset.results = JSON.stringify(results);
</script>"""


def browse(page: Path, address: str, steps: list) -> list[dict]:
    """What the page shows at this address, and after each event (id of an element, event, value)."""
    driven = page.with_name("driven.html")
    driven.write_text(page.read_text("utf-8") + STEPS.replace("STEPS", json.dumps(steps), 1), "utf-8")
    command = [CHROMIUM, *OPTIONS.split(), f"--user-data-dir={page.parent / 'profile'}", f"{driven.as_uri()}#{address}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r'data-results="([^"]*)"', result.stdout)[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_what_was_noted(found, tmp_path: Path) -> None:
    found = found._replace(words=["</script><b>", *found.words[1:]])
    write_page(found, tmp_path / "page.html")
    before = 5 * S
    steps = [("text", "keydown", "ArrowRight"), ("text", "keydown", "End"), ("text", "keydown", "ArrowDown")]
    steps += [("after", "input", str(before // S)), ("layer", "change", "1"), ("head", "change", "0"), ("t9", "click")]
    start, right, end, down, earlier, layer, head, click = browse(tmp_path / "page.html", "token=2&after=-3", steps)
    assert start["text"] == "".join(found.words) and start["clock"] == f"0 of {LENGTH} tokens"
    assert start["word"] == f"Token 2: “{found.words[2].strip()}”" and start["fate"] == "Not read yet."
    assert right["word"].startswith("Token 3: ") and "token=3" in right["address"] and right["chosen"] == 1
    assert end["word"] == down["word"] and end["word"].startswith(f"Token {LENGTH - 1}: ")
    weights, positions = found.read_weights[:, :, -1], found.read_positions[:, :, -1]
    largest = [
        (sum(weights[positions == token].tolist()) / 4, token) for token in range(LENGTH) if (positions == token).any()
    ]
    weight, token = max(largest)
    assert len(down["reads"]) == min(12, len(largest))
    shown = float(down["reads"][0].split("\N{NO-BREAK SPACE}")[0])
    assert shown == pytest.approx(100 * weight, abs=0.5)  # a byte for a weight
    assert down["reads"][0].endswith(f"{LENGTH - 1 - token} before" if token < LENGTH - 1 else "itself")
    slots, sink, window = (float(part) for part in re.findall(r"([\d.]+)\xa0%", down["sums"]))
    mean = found.shares[:, :, -1].mean((0, 1)) * 100
    assert (slots, sink) == pytest.approx(mean.tolist(), abs=0.5) and slots + sink + window == pytest.approx(
        100, abs=0.2
    )
    held = found.held(before)
    held[:, :, before] = False  # is to be read next
    assert earlier["held"] == held.any(0).any(0).tolist() and earlier["clock"] == f"{before} of {LENGTH} tokens"
    assert layer["held"] == held[1].any(0).tolist() and head["held"] == held[1, 0].tolist()
    gone, age = int(found.dropped[1, 0, 9]), before - 9
    fate = f"gone: dropped {gone - 9} tokens later, at token {gone}"
    fate = fate if 0 <= gone <= before else f"held in a {('', 'present', 'lasting')[found.part[1, 0, 9]]} slot"
    assert click["fate"] == f"{age} tokens ago. In layer 1, head 0 it is {fate}."
    kinds = [title.split(": ")[1].split(" at ")[0] for title in click["grid"]]  # a row for each head
    assert [kind != "dropped" for kind in kinds] == held[:, :, 9].T.flatten().tolist()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_a_page_without_reads(tmp_path: Path) -> None:
    found = trace(tiny_model(**FORMS["paper"]), tiny_tokenizer(), TEXT, num_reads=0)
    write_page(found, tmp_path / "page.html")
    [shown] = browse(tmp_path / "page.html", "token=0&layer=99", [])
    assert shown["reads"] == [] and shown["held"] == found.held(LENGTH)[1].any(0).tolist()
