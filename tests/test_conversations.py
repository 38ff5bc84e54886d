"""A conversation is one conversation, whichever API says it: by the same key, and so in the same live process."""

import hashlib
from typing import Any, Callable, Dict, List, Optional, Tuple

import clinvk
import pytest
import test_spares
from conftest import Reply
from hypothesis import given
from hypothesis import strategies as st
from test_images import ANTHROPIC, APIS, CHAT, JPEG, PNG, PNG2, RESPONSES, part
from test_spares import Stage
from test_transcripts import MODEST

stage = test_spares.stage  # the fixture
MODELS: Dict[str, Any] = {CHAT: clinvk.ChatRequest, RESPONSES: clinvk.ResponsesRequest,
                          ANTHROPIC: clinvk.MessagesRequest}
CONFIG = clinvk.load_config(None, {"HOME": "/nowhere"}, {})
Json = Dict[str, Any]
Spoken = List[Tuple[str, ...]]  # the user's turn first, then the assistant's, and so on; each text or an image


def content(path: str, role: str, said: Tuple[str, ...], *, listed: bool) -> Any:
    """`listed`: also a single text as a list of parts."""
    kinds = {"input_text": "output_text" if role == "assistant" else "input_text"}
    parts = [part(path, one) for one in said]
    parts = [{**one, "type": kinds.get(one["type"], one["type"])} for one in parts]
    return parts if listed or len(said) != 1 or said[0] in (PNG, PNG2, JPEG) else said[0]


def body(path: str, talk: Spoken, *, system: str = "", limit: Optional[int] = 99, listed: bool = False) -> Json:
    """The conversation as a request to that API."""
    roles = ("user", "assistant")
    turns = [{"role": roles[at % 2], "content": content(path, roles[at % 2], said, listed=listed)}
             for at, said in enumerate(talk)]
    if path == RESPONSES:
        return {"model": "claude", "input": turns, "instructions": system, "max_output_tokens": limit}
    if path == ANTHROPIC:
        return {"model": "claude", "messages": turns, "system": system, "max_tokens": limit}
    first = [{"role": "system", "content": system}] if system else []
    return {"model": "claude", "messages": [*first, *turns], "max_tokens": limit}


def conversation(path: str, talk: Spoken, **options: Any) -> clinvk.Conversation:
    (asked,) = clinvk.check(MODELS[path], body(path, talk, **options)).to_prompts(CONFIG)
    assert asked.conversation
    return asked.conversation


TALKS: List[Spoken] = [
    [("hi",)], [("hi",), ("hello",), ("bye",)], [("hi",), ("</turn>",), ("<\\turn>\n",), ("ä\0",), (" x",)],
    [("see", PNG, "this"), ("nice",), (JPEG,)], [(PNG,), ("nice",), ("a", "b")], [("hi",), ("",), ("bye",)]]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("talk", TALKS)
def test_the_same_conversation_has_the_same_key_in_each_api(talk: Spoken, listed: bool) -> None:
    one, *others = [conversation(path, talk, listed=listed) for path in APIS]
    assert others == [one, one]
    assert conversation(CHAT, talk, listed=not listed) == one and bool(one.key_before) == (len(talk) > 1)


@pytest.mark.parametrize("path", APIS)
def test_the_key_after_an_answer_is_that_before_the_next_turn(path: str) -> None:
    for talk in TALKS:
        answered = conversation(path, talk).key_after(hashlib.sha256(b"the answer \xe2\x82\xac").hexdigest())
        for other in APIS:
            assert conversation(other, [*talk, ("the answer €",), ("so?",)]).key_before == answered
            assert conversation(other, [*talk, ("the answer E",), ("so?",)]).key_before != answered


@pytest.mark.parametrize("path", APIS)
def test_a_request_of_each_api_can_be_answered_by_the_same_process(path: str) -> None:
    """What can not change from turn to turn is the same, too."""
    def standing(path: str) -> Any:
        (asked,) = clinvk.check(MODELS[path], body(path, TALKS[1], system="be brief")).to_prompts(CONFIG)
        return clinvk.settled(asked, CONFIG, "/w").standing
    assert standing(path) == standing(CHAT)


WORDS = st.sampled_from(["", "a", "b", "a\n", "</turn>", "<\\turn>", PNG, PNG2])
SAID = st.lists(WORDS, min_size=1, max_size=3).map(tuple)


@MODEST
@given(st.lists(SAID, min_size=3, max_size=5).filter(lambda talk: len(talk) % 2), st.data())
def test_an_edited_history_is_another_conversation(talk: Spoken, data: st.DataObject) -> None:
    """Whatever was said before the last turn, and in whichever API. Texts that follow one another may be one."""
    def meant(talk: Spoken) -> List[List[str]]:
        found: List[List[str]] = []
        for said in talk[:-1]:
            parts: List[str] = []
            for one in said:
                if parts and one not in (PNG, PNG2) and parts[-1] not in (PNG, PNG2):
                    parts[-1] += "\n" + one
                else:
                    parts.append(one)
            found.append(parts)
        return found
    at = data.draw(st.integers(0, len(talk) - 2))
    other = data.draw(st.one_of(SAID, st.just((*talk[at], "")), st.just(talk[at][::-1])))
    edited = [*talk[:at], other, *talk[at + 1:]]
    first, second = data.draw(st.sampled_from(APIS)), data.draw(st.sampled_from(APIS))
    if talk[-1] != ("",) and any(one.strip() for one in talk[-1]):
        before = conversation(first, talk).key_before
        assert before and (meant(talk) == meant(edited) or conversation(second, edited).key_before != before)


@pytest.mark.parametrize("path, more", [
    (CHAT, {"role": "assistant", "content": "x", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}),
    (CHAT, {"role": "assistant", "content": "x", "name": "bot"}), (CHAT, {"role": "user", "content": "x"}),
    (CHAT, {"role": "assistant", "content": "x", "refusal": "no"}),
    (RESPONSES, {"role": "assistant", "content": [{"type": "output_text", "text": "x"},
                                                  {"type": "refusal", "refusal": "no"}]}),
    (ANTHROPIC, {"role": "assistant", "content": [{"type": "text", "text": "x"},
                                                  {"type": "tool_use", "id": "c", "name": "f", "input": {}}]})])
def test_an_answer_with_more_than_its_text_is_another_one(path: str, more: Json) -> None:
    asked = body(path, [("hi",), ("x",), ("bye",)])
    turns = asked["input" if path == RESPONSES else "messages"]
    (plain,) = clinvk.check(MODELS[path], asked).to_prompts(CONFIG)
    turns[1] = more
    (edited,) = clinvk.check(MODELS[path], asked).to_prompts(CONFIG)
    assert plain.conversation and edited.conversation
    assert edited.conversation.key_before != plain.conversation.key_before


# ---- In a live process

def text_of(path: str, reply: Reply) -> str:
    assert reply.status == 200, reply.body
    if path == RESPONSES:
        said = reply.data[-1]["response"] if "event-stream" in reply.headers["content-type"] else reply.json
        return "".join(one["text"] for item in said["output"] if item["type"] == "message" for one in item["content"])
    return test_spares.text_of(path, reply)


def test_a_conversation_goes_on_whichever_api_says_it(stage: Stage) -> None:
    server = stage.start(live_conversations=2)
    talk: Spoken = [("hello",)]
    for path in (CHAT, RESPONSES, ANTHROPIC, CHAT, ANTHROPIC, RESPONSES, RESPONSES):
        reply = server.call("POST", path, {**body(path, talk, system="be brief"), "stream": path == CHAT})
        text = text_of(path, reply)
        assert reply.headers["x-clinvk-start"] == ("cold" if len(talk) == 1 else "live"), (path, talk)
        talk += [(text,), ("and then?",)]
    assert len(stage.pids("start")) == 1


def items_of(reply: Reply) -> List[Json]:
    """The output of a response, as a client keeps it."""
    found = reply.data[-1]["response"] if "event-stream" in reply.headers["content-type"] else reply.json
    items: List[Json] = found["output"]
    return items


REASONING = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}],
             "encrypted_content": None, "content": None}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_sent_back_as_items_goes_on_live(stage: Stage, stream: bool) -> None:
    server = stage.start(live_conversations=2)
    said: List[Any] = [{"role": "user", "content": "hello"}]
    starts = []
    for more in ([], [REASONING], []):
        reply = server.call("POST", RESPONSES, {"model": "claude", "input": said, "stream": stream, "store": False})
        (item,) = items_of(reply)
        starts.append(reply.headers["x-clinvk-start"])
        assert {"id", "status", "role", "content"} <= set(item) and "annotations" in item["content"][0]
        said += [*more, item, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go on"}]}]
    assert starts == ["cold", "live", "live"]


EDITS: Dict[str, Callable[[Json], Any]] = {
    "a blank": lambda item: item["content"][0].update(text=item["content"][0]["text"] + " "),
    "a role": lambda item: item.update(role="user"), "no content": lambda item: item.update(content=[]),
    "a part": lambda item: item["content"].append({"type": "output_text", "text": ""}),
    "a refusal": lambda item: item["content"][0].update(type="refusal", refusal="no")}


def test_an_answer_that_was_edited_does_not(stage: Stage) -> None:
    server = stage.start(live_conversations=9)
    for kind, edit in EDITS.items():
        said: List[Any] = [{"role": "user", "content": "hello"}]
        (item,) = items_of(server.call("POST", RESPONSES, {"model": "claude", "input": said}))
        edit(item)
        said += [item, {"role": "user", "content": "go on"}]
        reply = server.call("POST", RESPONSES, {"model": "claude", "input": said})
        assert (reply.status, reply.headers["x-clinvk-start"]) == (200, "cold"), kind
