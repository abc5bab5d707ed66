"""A chat of many turns: answers as if all were read anew, a state of constant size, streamed output, saving."""

import functools

import pytest
import torch

from helpers import TEMPLATE, tiny_model, tiny_tokenizer
from rmt_hf.chat import Chat


ODD_ENDS = list(range(30, 50))  # end answers now and then, but not as the template does
MESSAGES = ["w10 w11", "w12", "w13 w14 w15 w16", "w17", "w18 w19", "w20"] * 2


@pytest.fixture
def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model():
    made = tiny_model()
    made.generation_config.eos_token_id = [2, *ODD_ENDS]
    return made


def read_anew(model, tokenizer, messages: list[str], **settings) -> list[str]:
    """Answers when the ids of the whole chat are read from the beginning in each turn."""
    ids: list[int] = []
    answers = []
    for message in messages:
        if ids and ids[-1] != 2:
            ids += [2]
        ids += tokenizer.encode(f"<s> w3 {message} </s> <s> w4", add_special_tokens=False)
        found = model.generate(torch.tensor([ids]), **settings)[0].tolist()
        answers.append(tokenizer.decode(found[len(ids) :], skip_special_tokens=True))
        ids = found
    return answers


@pytest.mark.parametrize("max_new_tokens", [1, 7])
def test_a_chat_is_as_if_everything_were_read_anew(model, tokenizer, max_new_tokens) -> None:
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    chat, sizes, ended = Chat(model, tokenizer, **settings), set(), set()
    answers = []
    for message in MESSAGES:
        answers.append(chat.say(message))
        sizes.add(sum(tensor.nbytes for tensor in chat.state.tensors()))
        ended.add(chat.end != "")
    assert answers == read_anew(model, tokenizer, MESSAGES, **settings)
    assert len(sizes) == 1 and chat.state.positions[0] > 4 * model.config.window_length
    assert True in ended or max_new_tokens == 1


def test_a_chat_goes_on_where_it_was_saved(model, tokenizer, tmp_path) -> None:
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    chat, other = (Chat(model, tokenizer, **settings) for _ in range(2))
    for message in MESSAGES[:7]:
        chat.say(message)
    chat.save(tmp_path / "chat")
    size = sum(file.stat().st_size for file in (tmp_path / "chat").iterdir())
    other.load(tmp_path / "chat")
    assert other.end == chat.end
    assert [other.say(message) for message in MESSAGES[7:]] == [chat.say(message) for message in MESSAGES[7:]]
    other.save(tmp_path / "chat")
    assert abs(sum(file.stat().st_size for file in (tmp_path / "chat").iterdir()) - size) < 64
    chat.state.save_pretrained(tmp_path / "chat")  # as if the second file had not been written
    chat.say("w10")
    chat.state.save_pretrained(tmp_path / "chat")
    with pytest.raises(ValueError, match="saving was interrupted"):
        other.load(tmp_path / "chat")
    with pytest.raises(ValueError, match="state"):
        Chat(tiny_model(num_memory_slots=16), tokenizer).load(tmp_path / "chat")


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_is_printed_word_by_word(model, tokenizer, capsys, streams) -> None:
    """Before each call of the model that reads a token, all words but that token's are on the screen."""
    chat, seen = Chat(model, tokenizer, max_new_tokens=6, do_sample=False, pad_token_id=0), [""]
    model.generation_config.eos_token_id = None  # all six words
    model.model.register_forward_pre_hook(lambda *_: seen.append(seen[-1] + capsys.readouterr().out))
    answer = chat.say("w10", streams=streams).split()
    whole = (seen[-1] + capsys.readouterr().out).split()
    assert len(answer) == 6 and len(seen) == 1 + 6 + 1  # the prompt, and six tokens
    if not streams:
        assert whole == []
        return
    assert whole == answer
    assert [len(text.split()) for text in seen[2:]] == [0, 1, 2, 3, 4, 6]


def test_an_interrupted_answer_leaves_the_chat_where_it_was(model, tokenizer, monkeypatch) -> None:
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    chat, other = (Chat(model, tokenizer, **settings) for _ in range(2))
    for each in (chat, other):
        each.say("w10")
    forward, calls = model.forward, []

    @functools.wraps(forward)
    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.say("w11")
    monkeypatch.undo()
    assert chat.state.positions == other.state.positions and chat.end == other.end
    assert chat.say("w12") == other.say("w12")


def test_an_end_that_was_read_is_not_read_again(model, tokenizer) -> None:
    """Also if the template puts a blank before it, or it was given as a setting."""
    tokenizer.chat_template = TEMPLATE.replace("}}</s>", "}} </s>")
    chat = Chat(model, tokenizer, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=list(range(2, 67)))
    chat.say("w10")
    assert chat.end and chat._turn("w11").split() == ["</s>", "<s>", "w3", "w11", "</s>", "<s>", "w4"]
    chat.end = "</s>"
    assert chat._turn("w11").split() == ["<s>", "w3", "w11", "</s>", "<s>", "w4"]


@pytest.mark.parametrize("setting", ["num_beams", "num_return_sequences"])
def test_a_chat_goes_on_in_one_way(model, tokenizer, setting) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be 1, got 2"):
        Chat(model, tokenizer, **{setting: 2})


def test_a_template_is_needed_and_shows_answers(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, max_new_tokens=1, pad_token_id=0)
    chat.say("w10")
    tokenizer.chat_template = TEMPLATE.replace("{{ message['content'] }}", "w5")
    with pytest.raises(ValueError, match="show answers as they are"):
        chat.say("w11")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="must have a chat_template"):
        Chat(model, tokenizer)
