"""A chat of many turns: answers as if all were read anew, a state of constant size, streamed output, saving."""

import functools

import pytest
import torch

from helpers import TEMPLATE, tiny_model, tiny_tokenizer
from rmt_hf.chat import Chat, Moment


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
    """Before each call of the model that reads a token, its word is on the screen."""
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
    assert [len(text.split()) for text in seen[2:]] == [1, 2, 3, 4, 5, 6]


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
    assert chat.end and chat._turn(chat.moment, "w11").split() == ["</s>", "<s>", "w3", "w11", "</s>", "<s>", "w4"]
    assert chat._turn(Moment(chat.state, "</s>"), "w11").split() == ["<s>", "w3", "w11", "</s>", "<s>", "w4"]


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


GREEDY = {"do_sample": False, "max_new_tokens": 6}


def test_a_stream_of_words_is_the_answer(model, tokenizer) -> None:
    chat, other = (Chat(model, tokenizer, **GREEDY) for _ in range(2))
    for message in MESSAGES[:4]:
        words = list(chat.stream(message))
        assert len(words) > 1 or chat.end
        assert "".join(words) == other.say(message)
    assert chat.state.positions == other.state.positions


@pytest.mark.parametrize("how", ["closed", "dropped", "failed"])
def test_a_stream_that_is_not_read_to_its_end_changes_nothing(model, tokenizer, how, monkeypatch) -> None:
    chat, other = (Chat(model, tokenizer, **GREEDY) for _ in range(2))
    model.generation_config.eos_token_id = None
    for each in (chat, other):
        each.say("w10")
    forward, calls = model.forward, []

    @functools.wraps(forward)
    def count(*args, **kwargs):
        calls.append(1)
        if how == "failed" and len(calls) == 3:
            raise RuntimeError("broken")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", count)
    chat.settings["max_new_tokens"] = 2000
    words = chat.stream("w11")
    next(words)
    if how == "closed":
        words.close()
    elif how == "failed":
        with pytest.raises(RuntimeError, match="broken"):
            list(words)
    else:
        del words
    assert len(calls) < 1500  # nobody waits for the rest
    monkeypatch.undo()
    chat.settings["max_new_tokens"] = GREEDY["max_new_tokens"]
    assert chat.state.positions == other.state.positions
    assert chat.say("w12") == other.say("w12")


def test_a_turn_is_undone_and_said_anew(model, tokenizer) -> None:
    chat, other = (Chat(model, tokenizer, num_undo=2, **GREEDY) for _ in range(2))
    answers = [chat.say(message) for message in MESSAGES[:4]]
    assert [chat.undo(), chat.undo()] == MESSAGES[3:1:-1]
    with pytest.raises(RuntimeError, match="no turn to undo: 2 turns"):
        chat.undo()
    with pytest.raises(RuntimeError, match="no turn to undo"):
        next(chat.regenerate())
    assert [chat.say(message) for message in MESSAGES[2:4]] == answers[2:]
    for message in MESSAGES[:3]:
        other.say(message)
    other.say("w21")
    chat.settings |= {"do_sample": True, "temperature": 3.0}
    torch.manual_seed(0)
    before = chat.state
    assert next(words := chat.regenerate()) and words.close() is None
    assert chat.state is before  # an answer that nobody reads to its end does not replace one
    found = ["".join(chat.regenerate()) for _ in range(3)]
    assert len({*found, answers[3]}) > 2
    assert chat.undo() == MESSAGES[3]
    chat.settings["do_sample"] = False
    assert chat.say("w21") == other.say(other.undo())


def test_a_chat_without_undo_keeps_one_state(model, tokenizer) -> None:
    chat = Chat(model, tokenizer, num_undo=0, **GREEDY)
    chat.say("w10")
    assert not chat.before
    with pytest.raises(RuntimeError, match="larger num_undo"):
        chat.undo()


def test_a_system_prompt_is_read_once(model, tokenizer) -> None:
    tokenizer.chat_template = TEMPLATE.replace("'user' and", "'system' and 'w5' or message['role'] == 'user' and")
    chat, whole = Chat(model, tokenizer, system="w30 w31", **GREEDY), []
    for message in MESSAGES[:3]:
        ids = tokenizer.encode(chat._turn(chat.moment, message), add_special_tokens=False)
        assert (tokenizer.encode("w5 w30 w31") == ids[1:4]) is not whole
        assert (33 - 3 in ids) == (not whole)
        before = chat.state.positions
        answer = chat.say(message)
        whole.append(answer)
        assert chat.state.positions[0] - sum(before) <= len(ids) + 6
    plain = Chat(model, tokenizer, **GREEDY)
    assert [plain.say(message) for message in MESSAGES[:3]] != whole


@pytest.mark.parametrize("num_words", [1, 2, 20])
def test_what_stops_an_answer_is_neither_said_nor_remembered(model, tokenizer, num_words) -> None:
    """Also a stop string of more tokens than the state can go back."""
    model.generation_config.eos_token_id = None
    settings = {"do_sample": False, "max_new_tokens": 40}
    answer = Chat(model, tokenizer, **settings).say("w10").split()
    start = 5
    stop = " ".join(answer[start : start + num_words])
    start = next(at for at in range(40) if " ".join(answer[at : at + num_words]) == stop)
    assert num_words < 9 or num_words > model.config.segment_length
    chat = Chat(model, tokenizer, stop=["w3 w3 w3 w3", stop], **settings)
    words = list(chat.stream("w10"))
    assert "".join(words).split() == answer[:start] and stop not in "".join(words)
    expected = model.memorize(torch.tensor([tokenizer.encode(f"<s> w3 w10 </s> <s> w4 {' '.join(answer[:start])}")]))
    assert chat.state.positions == expected.positions
    assert torch.equal(chat.state.history[:, 0], expected.history[:, 0])
    with pytest.raises(ValueError, match="at least one character"):
        Chat(model, tokenizer, stop=[""]).say("w10")


def test_a_stop_string_may_begin_within_a_token(model, tokenizer) -> None:
    model.generation_config.eos_token_id = None
    answer = Chat(model, tokenizer, **GREEDY).say("w10").split()
    chat = Chat(model, tokenizer, stop=[f"{answer[3][1:]} {answer[4]}"], **GREEDY)
    assert chat.say("w10").split() == [*answer[:3], "w"]
    expected = tokenizer.encode(f"<s> w3 w10 </s> <s> w4 {' '.join(answer[:3])} w")
    history = model.memorize(torch.tensor([expected])).history
    assert chat.state.positions == [len(expected)] and torch.equal(chat.state.history[:, 0], history[:, 0])


def test_a_message_of_any_length_is_read_in_calls_of_bounded_size(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("rmt_hf.chat.PROMPT_TOKENS", 7)
    message, (chat, other) = " ".join(MESSAGES * 3), (Chat(model, tokenizer, **GREEDY) for _ in range(2))
    answer = chat.say(message)
    monkeypatch.undo()
    assert answer == other.say(message) and chat.state.positions == other.state.positions
