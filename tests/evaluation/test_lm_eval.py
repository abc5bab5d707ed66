"""The harness's adapter: nothing is cut, nothing is read twice, and figures are those of one forward pass."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import SIZES, tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf.evaluation import token_bits


pytest.importorskip("lm_eval", reason="lm_eval comes with the extra eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from rmt_hf.evaluation import lm_eval as adapter
from rmt_hf.evaluation.lm_eval import RMTLM, main


KINDS = ("rmt", "llama")
# Float32 sums of some hundred logarithms in another order.
CLOSE = {"abs": 1e-4}


def make_model(kind: str) -> torch.nn.Module:
    if kind == "rmt":
        return tiny_model(dtype=torch.float32)
    torch.manual_seed(0)
    sizes = SIZES | {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096)).eval()


def words(length: int, seed: int) -> str:
    return " ".join(f"w{number}" for number in tiny_ids(1, length, seed=seed)[0].tolist())


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


@pytest.fixture
def of_any_length(monkeypatch) -> None:
    """Contexts are read in calls of 16 tokens."""
    monkeypatch.setattr(adapter, "MEMORIZE_TOKENS", 16)


def adapters(kind: str, batch_size: int, slice_length: int = 7) -> tuple[HFLM, RMTLM]:
    model, tokenizer = make_model(kind), tiny_tokenizer()
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return plain, RMTLM(model, slice_length, batch_size, tokenizer=tokenizer)


def columns_read(model: torch.nn.Module) -> list[int]:
    """Sizes of all calls from now on, rows times columns."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda *call: sizes.append(call[2]["input_ids"].numel()), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_choices_are_scored_as_by_the_plain_adapter(kind: str, batch_size: int, of_any_length) -> None:
    plain, ours = adapters(kind, batch_size)
    one, other = words(61, 1), words(50, 2)
    pairs = [(text, f" {words(length, length)}") for length in (1, 20, 3, 9) for text in (one, other, "w5", "")]
    pairs += [(one, f" {words(3, 3)}")]  # twice
    said = plain.generate_until(requests("generate_until", (one, {"until": ["</s>"], "max_gen_toks": 3})))[0]
    pairs += [(one, f" {said}")]
    wanted = plain.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], **CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted] and found[-1][1]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_documents_cost_what_one_forward_pass_says(kind: str) -> None:
    _, ours = adapters(kind, batch_size=2)
    texts = [words(length, length) for length in (150, 8, 1, 33)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)), True)
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor([[1, *tiny_tokenizer()(text).input_ids]])
        assert score == pytest.approx(-math.log(2) * token_bits(ours.model, ids).sum().item(), **CLOSE)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", ("",)), True) == [0]


def test_the_plain_adapter_gives_the_same_of_a_document_that_it_does_not_cut() -> None:
    plain, ours = adapters("rmt", batch_size=1)
    asked = requests("loglikelihood_rolling", (words(300, 4),))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(plain.loglikelihood_rolling(asked), **CLOSE)


def test_a_context_is_read_once_for_all_its_choices(of_any_length) -> None:
    _, ours = adapters("rmt", batch_size=4)
    sizes = columns_read(ours.model)
    ours.loglikelihood(requests("loglikelihood", *((words(61, 1), f" w{number}") for number in (3, 9, 27, 50))), True)
    assert sizes == [16, 16, 16, 12, 4]  # 60 tokens, then the last one, once for each choice


def test_logits_exist_of_a_slice_at_a_time() -> None:
    _, ours = adapters("rmt", batch_size=1, slice_length=16)
    widths: list[int] = []
    ours.model.lm_head.register_forward_hook(lambda *call: widths.append(call[2].shape[1]))
    ours.loglikelihood_rolling(requests("loglikelihood_rolling", (words(200, 1),)), True)
    ours.loglikelihood(requests("loglikelihood", (words(200, 1), f" {words(40, 2)}")), True)
    assert max(widths) == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_generation_goes_on_from_the_prompt_as_by_the_plain_adapter(kind: str, batch_size: int, of_any_length) -> None:
    plain, ours = adapters(kind, batch_size)
    settings = [{"until": ["w5"], "max_gen_toks": 12}, {"until": ["</s>"], "max_gen_toks": 5}]
    asked = [(text, each) for text in (words(61, 1), "w7", words(40, 2)) for each in settings]
    wanted = plain.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", *asked), disable_tqdm=True) == wanted and any(wanted)


def test_a_prompt_that_comes_again_is_not_read_again() -> None:
    _, ours = adapters("rmt", batch_size=1)
    sizes = columns_read(ours.model)
    asked = [(words(61, 1), {"until": ["</s>"], "max_gen_toks": 2, "do_sample": True, "temperature": 1.0})] * 3
    ours.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert sizes[0] == 60 and sum(sizes) <= 60 + 3 * 3  # two tokens each, and what the state reads last


@pytest.mark.parametrize("given", [{"max_length": 8}, {"batch_size": "auto"}, {"batch_size": 0}, {"slice_length": 0}])
def test_what_it_cannot_do_is_refused(given: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))} .*must be"):
        RMTLM(make_model("rmt"), tokenizer=tiny_tokenizer(), **given)


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the harness and of datasets
def test_the_command_line_finds_the_model(tmp_path, capsys, monkeypatch) -> None:
    for part in (make_model("rmt"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    rows = [{"text": words(40, seed), "choices": ["w3", "w4 w5"], "label": seed % 2} for seed in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"), "utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    where = ["--model_args", f"pretrained={tmp_path / 'model'}", "--include_path", str(tmp_path / "tasks")]
    main([*where, "--tasks", "tiny_choice", "--device", "cpu", "--output_path", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.startswith("rmt (") and "|tiny_choice|" in said
    [results] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text("utf-8"))["results"]["tiny_choice"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
