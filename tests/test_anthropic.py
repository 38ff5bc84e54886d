"""Anthropic: messages, whole and streamed, from events."""

import json
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest

from clinvk import (Anthropic, Asked, BackendAuth, BackendFailed, BackendUnavailable, ClinvkError, Done, Event, Failure,
                    Init, Invalid, Message, Problem, Progress, RateLimited, Thinking, TimedOut, TokenUsage, ToolResult,
                    ToolUse, UnknownModel, Usage)
from conftest import collect, told

INSIDE, BESIDE = Usage(101, 12, 40, 0, 7), Usage(101, 12, 40, 3, cache_inside=False)
PLAIN: List[Event] = [Init("opus"), Message("Hel", opens=True), Message("lo"), TokenUsage(BESIDE), Done(0)]
THOUGHT: List[Event] = [Thinking("Let me "), Thinking("think."), Message("Yes.", opens=True), TokenUsage(INSIDE),
                        Done(0)]
AGENT: List[Event] = [Message("I will ", opens=True), Message("look."), ToolUse("t", "Bash", {}),
                      ToolResult("t", "Bash", "hi"),
                      Thinking("hm"), Message("Do", opens=True), Message("ne."), Done(0)]
RUNS: List[Tuple[List[Event], str, str]] = [
    (PLAIN, "Hello", ""), (THOUGHT, "Yes.", "Let me think."), (AGENT, "I will look.\n\nDone.", "hm"),
    ([Done(0)], "", ""),
    ([Thinking("only"), Done(0)], "", "only"), ([Message("\u2028 \U0001f680\x85", opens=True), Done(0)],
                                                "\u2028 \U0001f680\x85", "")]


def usage_of(fresh: int, output: int, read: int = 0, created: int = 0) -> Dict[str, int]:
    return {"input_tokens": fresh, "output_tokens": output, "cache_read_input_tokens": read,
            "cache_creation_input_tokens": created}


def whole(events: Sequence[Event], **asked: Any) -> Dict[str, Any]:
    answer: Dict[str, Any] = json.loads(b"".join(Anthropic(Asked("opus", **asked)).whole([collect(iter(events))])))
    return answer


def sent(events: Sequence[Event], **asked: Any) -> bytes:
    return b"".join(Anthropic(Asked("opus", **asked)).stream(told(events)))


def streamed(events: Sequence[Event], **asked: Any) -> List[Dict[str, Any]]:
    """The data of each event; its name is the type in it."""
    parts = sent(events, **asked).decode().split("\n\n")
    assert parts.pop() == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        found.append(json.loads(data[len("data: "):]))
        assert name == f"event: {found[-1]['type']}" and data.startswith("data: ")
    return found


def begun(index: int, kind: str) -> Dict[str, Any]:
    block = {"type": "text", "text": ""} if kind == "text" else {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, kind: str, text: str) -> Dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": f"{kind}_delta", kind: text}}


def ended(index: int) -> Dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


# ---- Whole

@pytest.mark.parametrize("events, content, usage", [
    (PLAIN, [{"type": "text", "text": "Hello"}], usage_of(101, 12, 40, 3)),
    (THOUGHT, [{"type": "thinking", "thinking": "Let me think.", "signature": ""}, {"type": "text", "text": "Yes."}],
     usage_of(61, 12, 40)),
    (AGENT, [{"type": "thinking", "thinking": "hm", "signature": ""},
             {"type": "text", "text": "I will look.\n\nDone."}],
     usage_of(3, 5)),
    ([Done(0)], [{"type": "text", "text": ""}], usage_of(3, 0))])
def test_a_whole_answer_is_a_message(events: List[Event], content: List[Any], usage: Dict[str, int]) -> None:
    answer = whole(events, characters=12)
    assert answer.pop("id").startswith("msg_")
    assert answer == {"type": "message", "role": "assistant", "model": "opus", "content": content,
                      "stop_reason": "end_turn",
                      "stop_sequence": None, "usage": usage}


@pytest.mark.parametrize("done, reason, sequence", [
    (Done(0), "end_turn", None), (Done(0, stop="length"), "max_tokens", None),
    (Done(0, stop="sequence", stop_sequence="END"), "stop_sequence", "END")])
def test_the_stop_reason_says_why_the_answer_ended(done: Done, reason: str, sequence: Optional[str]) -> None:
    answer = whole([done])
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert streamed([done])[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


# ---- Streamed

@pytest.mark.parametrize("events, blocks", [
    (PLAIN, [begun(0, "text"), delta(0, "text", "Hel"), delta(0, "text", "lo"), ended(0)]),
    (THOUGHT, [begun(0, "thinking"), delta(0, "thinking", "Let me "), delta(0, "thinking", "think."),
               delta(0, "signature", ""), ended(0), begun(1, "text"), delta(1, "text", "Yes."), ended(1)]),
    (AGENT, [begun(0, "text"), delta(0, "text", "I will "), delta(0, "text", "look."), ended(0), begun(1, "thinking"),
             delta(1, "thinking", "hm"), delta(1, "signature", ""), ended(1), begun(2, "text"),
             delta(2, "text", "\n\nDo"),
             delta(2, "text", "ne."), ended(2)]),
    ([Done(0)], [begun(0, "text"), delta(0, "text", ""), ended(0)]),
    ([Thinking("only"), Done(0)], [begun(0, "thinking"), delta(0, "thinking", "only"), delta(0, "signature", ""),
                                   ended(0),
                                   begun(1, "text"), delta(1, "text", ""), ended(1)])])
def test_a_stream_opens_fills_and_closes_one_block_after_the_other(events: List[Event], blocks: List[Any]) -> None:
    start, ping, *middle, last, stop = streamed(events)
    assert (start["type"], ping) == ("message_start", {"type": "ping"})
    assert middle == blocks
    assert (last["type"], stop) == ("message_delta", {"type": "message_stop"})


@pytest.mark.parametrize("events, usage", [(PLAIN, usage_of(101, 12, 40, 3)), (THOUGHT, usage_of(61, 12, 40)),
                                           (AGENT, usage_of(3, 5)), ([Done(0)], usage_of(3, 0))])
def test_the_message_delta_has_the_whole_usage_as_a_whole_answer_has(events: List[Event],
                                                                     usage: Dict[str, int]) -> None:
    last = streamed(events, characters=12)[-2]
    assert last == {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                    "usage": usage}
    assert whole(events, characters=12)["usage"] == usage


@pytest.mark.parametrize("events, characters, usage", [
    (PLAIN, 0, usage_of(1, 1)), (PLAIN, 400, usage_of(100, 1)),
    ([TokenUsage(BESIDE), *PLAIN], 400, usage_of(101, 1, 40, 3))])
def test_the_message_start_has_an_input_count_that_is_not_0(events: List[Event], characters: int, usage: Any) -> None:
    start = streamed(events, characters=characters)[0]["message"]
    assert start.pop("id").startswith("msg_")
    assert start == {"type": "message", "role": "assistant", "model": "opus", "content": [], "stop_reason": None,
                     "stop_sequence": None, "usage": usage}


def test_silence_is_a_ping_also_before_the_answer_and_inside_a_block() -> None:
    waiting = Progress("waiting", "no output")
    kinds = [line["type"] for line in streamed([waiting, Message("a", opens=True), waiting, Message("b"), Done(0)])]
    assert kinds == ["message_start", "ping", "ping", "content_block_start", "content_block_delta", "ping",
                     "content_block_delta", "content_block_stop", "message_delta", "message_stop"]


def test_a_failure_in_mid_stream_is_an_error_event_and_the_end() -> None:
    error = BackendUnavailable("full")
    error.details = "stderr says"
    events: List[Event] = [Message("Hel", opens=True), Failure(error), Done(1)]
    *_, last = streamed(events, request_id="r1")
    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "full\nstderr says"},
                    "request_id": "r1"}
    assert b"message_stop" not in sent(events)


@pytest.mark.parametrize("events, text, thoughts", RUNS)
def test_a_stream_says_what_a_whole_answer_says(events: List[Event], text: str, thoughts: str) -> None:
    found = {"text": "", "thinking": ""}
    for block in whole(events)["content"]:
        found[block["type"]] += block[block["type"]]
    assert found == {"text": text, "thinking": thoughts}
    deltas = [line["delta"] for line in streamed(events) if line["type"] == "content_block_delta"]
    assert "".join(d.get("text", "") for d in deltas) == text
    assert "".join(d.get("thinking", "") for d in deltas) == thoughts


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d", "half \ud83d", "line\r\nend\n\n",
                                  "event: error\ndata: {}\n\n"])
def test_no_text_breaks_the_stream_into_other_lines(text: str) -> None:
    lines = sent([Message(text, opens=True), Done(0)]).decode().splitlines()
    assert all(line == "" or line.startswith(("data: {", "event: ")) for line in lines)
    assert streamed([Message(text, opens=True), Done(0)])[3] == delta(0, "text", text)


# ---- Errors

@pytest.mark.parametrize("error, status, kind", [
    (Invalid([Problem("max_tokens", "is required")]), 400, "invalid_request_error"),
    (UnknownModel("no"), 404, "not_found_error"),
    (BackendAuth("log in"), 401, "authentication_error"), (RateLimited("slow"), 429, "rate_limit_error"),
    (BackendUnavailable("full"), 503, "overloaded_error"), (BackendFailed("boom"), 502, "api_error"),
    (TimedOut("late"), 504, "timeout_error"), (ClinvkError("ours"), 500, "api_error")])
def test_errors_have_anthropics_shape(error: ClinvkError, status: int, kind: str) -> None:
    assert (Anthropic.status(error), Anthropic.error_type) == (status, "application/json")
    assert Anthropic.error(error, "r1") == {
        "type": "error", "error": {"type": kind, "message": str(error)}, "request_id": "r1"}


# ---- What anthropic-python makes of it

QUESTION: Dict[str, Any] = {"model": "opus", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}


def anthropic_client(body: bytes, content_type: str) -> Any:
    """A real client, whose server answers with `body`."""
    anthropic, http = pytest.importorskip("anthropic"), pytest.importorskip("httpx2")

    def answer(request: Any) -> Any:
        return http.Response(200, content=body, headers={"Content-Type": content_type})
    return anthropic.Anthropic(api_key="k", base_url="http://localhost/anthropic",
                               http_client=http.Client(transport=http.MockTransport(answer)))


def said(message: Any) -> Tuple[str, str]:
    """Text and thoughts of an SDK's message; every thinking block has a signature."""
    assert all(isinstance(block.signature, str) for block in message.content if block.type == "thinking")
    return ("".join(block.text for block in message.content if block.type == "text"),
            "".join(block.thinking for block in message.content if block.type == "thinking"))


@pytest.mark.parametrize("events, text, thoughts", RUNS)
def test_anthropic_python_reads_a_whole_answer(events: List[Event], text: str, thoughts: str) -> None:
    body = b"".join(Anthropic(Asked("opus")).whole([collect(iter(events))]))
    answer = anthropic_client(body, "application/json").messages.create(**QUESTION)
    type(answer).model_validate(json.loads(body))  # strict, as create() is not
    assert said(answer) == (text, thoughts)


@pytest.mark.parametrize("events, text, thoughts", RUNS)
def test_anthropic_python_gathers_a_stream(events: List[Event], text: str, thoughts: str) -> None:
    body = sent([Progress("waiting", ""), *events], characters=12)
    with anthropic_client(body, "text/event-stream").messages.stream(**QUESTION) as stream:
        answer = stream.get_final_message()
    type(answer).model_validate(answer.to_dict())
    assert (said(answer), answer.stop_reason) == ((text, thoughts), "end_turn")
    usage = whole(events, characters=12)["usage"]
    assert {name: getattr(answer.usage, name) for name in usage} == usage


def test_anthropic_python_raises_on_a_failure_in_mid_stream() -> None:
    anthropic = pytest.importorskip("anthropic")
    events = [Message("Hel", opens=True), Failure(BackendFailed("boom")), Done(1)]
    client = anthropic_client(sent(events), "text/event-stream")
    heard = []
    with pytest.raises(anthropic.APIStatusError, match="boom"), client.messages.stream(**QUESTION) as stream:
        for text in stream.text_stream:
            heard.append(text)
    assert heard == ["Hel"]


def test_tokens_of_a_text_are_estimated_alike_as_a_string_and_as_a_block(client: Any) -> None:
    contents = ["hello world", [{"type": "text", "text": "hello world"}]]
    told = [client.call("POST", "/anthropic/v1/messages/count_tokens",
                        {"model": "echo", "messages": [{"role": "user", "content": content}]}) for content in contents]
    assert [reply.json for reply in told] == [{"input_tokens": 3}] * 2
    assert told[0].headers["x-clinvk-estimate"] == "true"
