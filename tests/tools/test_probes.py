"""What other programs look up: answers are those of a Llama of equal size, or say that something is not there."""

import logging
import sys

import pytest
import torch
import transformers
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model
from peft.utils import constants
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import SIZES, TEMPLATE, tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf import RMTConfig, RMTForCausalLM


# PEFT 0.21 and TRL 1.16 ask transformers 5.23 for names of before.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

KINDS = ("llama", "rmt")


def make_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "rmt":
        return tiny_model(dtype=torch.float32)
    return LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A model of each kind with its tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("</s> ", " </s> ")
    for kind in KINDS:
        make_model(kind).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in KINDS}


def words(length: int, seed: int) -> str:
    return " ".join(f"w{number}" for number in tiny_ids(1, length, seed=seed)[0].tolist())


# Names

OF_CONFIG = {
    "trl": """final_logit_softcapping logit_scale output_multiplier lm_head_multiplier logits_scaling text_config
        output_router_logits router_aux_loss_coef num_experts_per_tok unsloth_version hidden_sizes num_labels""",
    "peft": "global_head_dim num_global_key_value_heads num_kv_shared_layers layer_types tie_word_embeddings",
    "accelerate": "sliding_window n_positions max_sequence_length is_encoder_decoder fp8_param hidden_size",
    "lm_eval": "n_ctx quantization_config num_key_value_heads num_attention_heads",
    "transformers": """problem_type keys_to_ignore_at_inference attention_chunk_size cross_attention_hidden_size
        is_decoder use_cache vocab_size num_hidden_layers head_dim return_dict fusion_config transformers_weights""",
}
OF_MODEL = {
    "trl": "is_loaded_in_4bit is_loaded_in_8bit hf_device_map base_model_prefix warnings_issued optimizer peft_config",
    "peft": "is_gradient_checkpointing quantization_method is_quantized _device_mesh prompt_encoder",
    "accelerate": "tp_size _tp_size is_distributed_loading_by_transformers _no_sync hf_quantizer is_parallelizable",
    "cli": "has_talker modality main_input_name input_modalities output_modalities",
    "transformers": """loss_type _is_stateful supports_gradient_checkpointing _supports_sdpa _supports_flex_attn
        supports_tp_plan supports_pp_plan _keep_in_fp32_modules framework model_tags _supports_flash_attn""",
}


@pytest.mark.parametrize("program", sorted(OF_CONFIG | OF_MODEL))
def test_names_are_answered_as_by_llama(program: str) -> None:
    ours, theirs = make_model("rmt"), make_model("llama")
    for name in OF_MODEL.get(program, "").split():
        assert getattr(ours, name, "absent") == getattr(theirs, name, "absent"), name
    for name in OF_CONFIG.get(program, "").split():
        assert getattr(ours.config, name, "absent") == getattr(theirs.config, name, "absent"), name
    assert ours.can_generate() and ours.config.get_text_config() is ours.config


def test_what_this_model_answers_another_way() -> None:
    model, llama = make_model("rmt"), make_model("llama")
    assert llama.is_backend_compatible() and not model.is_backend_compatible()  # no engine has pages for a state
    assert hasattr(llama, "init_continuous_batching") and not hasattr(model, "init_continuous_batching")
    assert not model._can_compile_fullgraph and not model.supports_context_parallel
    assert model.config.max_position_embeddings == 2**30  # a stream has no end, and nobody is to cut it
    assert model.config.auto_map == {} and RMTConfig().auto_map == {}
    assert sys.modules["transformers"].RMTForCausalLM is RMTForCausalLM  # where `architectures` are looked up


def test_attentions_that_are_not_there_are_warned_about_as_by_llama(caplog, monkeypatch) -> None:
    for kind, logger in (("llama", "transformers"), ("rmt", "rmt_hf")):
        caplog.clear()
        transformers.utils.logging.warning_once.cache_clear()
        monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
        with caplog.at_level(logging.WARNING):
            assert make_model(kind)(tiny_ids(1, 20), output_attentions=True).attentions == ()
        assert "eager" in caplog.text and "output_attentions" in caplog.text, kind


# TRL

PROMPTS = [words(20, seed) for seed in range(4)]
PAIRS = [{"prompt": text, "chosen": f" {words(9, 50)}", "rejected": f" {words(7, 90)}"} for text in PROMPTS]
TRAINERS: dict[str, tuple[list[dict], dict]] = {
    "SFT": ([{"messages": [{"role": "user", "content": text}]} for text in PROMPTS], {}),
    "DPO": (PAIRS, {}),
    "KTO": ([{"prompt": PROMPTS[i], "completion": f" {words(9, i)}", "label": bool(i % 2)} for i in range(4)], {}),
    "Reward": (PAIRS, {}),
    "GRPO": (
        [{"prompt": text} for text in PROMPTS],
        {"beta": 0.1, "num_generations": 2, "max_completion_length": 3},
    ),
}


@pytest.mark.filterwarnings("ignore:The `KTO.*is now located in:FutureWarning")  # TRL before it moved
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_of_trl_take_a_folder_and_a_model(name: str, kind: str, folders: dict[str, str], tmp_path) -> None:
    trl = pytest.importorskip("trl")
    rows, options = TRAINERS[name]
    arguments = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, "bf16": False}
    arguments |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 0.01} | options
    losses = []
    for given in (folders[kind], AutoModelForCausalLM.from_pretrained(folders[kind])):
        if name == "Reward" and not isinstance(given, str):
            continue  # it wants a classifier, which the folder does not hold
        reward = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
        config = getattr(trl, f"{name}Config")(str(tmp_path), **arguments)
        trainer = getattr(trl, f"{name}Trainer")(
            model=given,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=None if isinstance(given, str) else tiny_tokenizer_of(folders[kind]),
            **(reward if name == "GRPO" else {}),
        )
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.tensor(losses).isfinite())
    assert name == "Reward" or losses[0] == pytest.approx(losses[1], abs=1e-6)


def tiny_tokenizer_of(folder: str) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(folder)


# PEFT


def tables_of_peft() -> dict[str, dict]:
    return {name: table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING")}


@pytest.mark.parametrize("config_class", [LoraConfig, AdaLoraConfig, IA3Config, LoHaConfig])
def test_an_adapter_without_target_modules_adapts_what_it_does_in_a_llama(config_class) -> None:
    adapted = []
    for kind in KINDS:
        options = {"total_step": 10} if config_class is AdaLoraConfig else {}
        model = make_model(kind)
        for table in tables_of_peft().values():
            table.pop("rmt", None)  # as if PEFT had been imported after the model was made
        model = get_peft_model(model, config_class(task_type="CAUSAL_LM", **options))
        model(input_ids=tiny_ids(1, 20), labels=tiny_ids(1, 20)).loss.backward()
        adapted.append(sorted(model.targeted_module_names))
    assert adapted[0] == adapted[1]


def test_every_table_of_peft_that_knows_llama_knows_this_model() -> None:
    RMTConfig().to_dict()
    assert len(tables_of_peft()) > 20
    for name, table in tables_of_peft().items():
        assert table.get("rmt") == table.get("llama"), name


# lm-eval


def test_lm_eval_cuts_nothing(folders: dict[str, str]) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is an extra of the tests")
    from lm_eval.api.instance import Instance

    found, length = {}, 2100
    for kind in KINDS:
        model = huggingface.HFLM(pretrained=folders[kind], device="cpu", batch_size=2)
        request = Instance("loglikelihood", {}, (words(length, 0), f" {words(5, 9)}"), 0)
        ((found[kind], _),) = model.loglikelihood([request])
        ids = torch.cat([tiny_ids(1, length), tiny_ids(1, 5, seed=9)], 1)
        with torch.no_grad():
            logits = model.model(ids[:, :-1]).logits[0, -5:].log_softmax(-1)
        whole = logits.gather(1, ids[0, -5:, None]).sum().item()
        # Llama's window of 2,048 tokens is cut; this model reads them all. Float32, and rows of other lengths.
        assert (found[kind] == pytest.approx(whole, abs=1e-4)) == (kind == "rmt")
        rolling = Instance("loglikelihood_rolling", {}, (words(300, 3),), 0)
        assert model.loglikelihood_rolling([rolling])[0] < 0
        until = Instance("generate_until", {}, (words(300, 4), {"until": ["w5"], "max_gen_toks": 3}), 0)
        assert isinstance(model.generate_until([until])[0], str)


# transformers serve


def served(continuous_batching: bool):
    """The application of `transformers serve`."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    manager = ModelManager(device="cpu", continuous_batching=continuous_batching)
    state = GenerationState(continuous_batching=continuous_batching)
    classes = (CompletionHandler, ResponseHandler, TranscriptionHandler, SystemOneHandler)
    names = ("completion_handler", "response_handler", "transcription_handler", "systemone_handler")
    handlers = {name: handler(manager, state) for name, handler in zip(names, classes, strict=True)}
    return build_server(manager, ChatCompletionHandler(manager, state), generation_state=state, **handlers)


@pytest.mark.parametrize(("kind", "continuous_batching"), [("llama", False), ("rmt", False), ("rmt", True)])
def test_transformers_serve_answers(kind: str, continuous_batching: bool, folders: dict[str, str]) -> None:
    for package in ("fastapi", "openai"):
        pytest.importorskip(package, reason="transformers[serving] is not installed")
    from fastapi.testclient import TestClient

    message = {"role": "user", "content": "w5 w6 w7"}
    written = make_model(kind).generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    with TestClient(served(continuous_batching)) as client:
        for path, body in (
            ("/v1/chat/completions", {"messages": [message], "max_tokens": 4}),
            ("/v1/completions", {"prompt": "w5 w6 w7", "max_tokens": 4, "temperature": 0}),
        ):
            answer = client.post(path, json={"model": folders[kind], **body, "stream": False})
            assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    assert text.split() == [f"w{number}" for number in written if number > 2]
