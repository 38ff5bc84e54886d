"""Native: /api/v1's answers, streams and errors, from events; and what all renderers share."""

import datetime
import json
import random
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytest

from clinvk import (Asked, BackendAuth, BackendFailed, BackendUnavailable, ClinvkError, Done, Event, Failure, Init,
                    Invalid, Message, MethodNotAllowed, Native, Problem, Progress, RateLimited, Thinking, TokenUsage,
                    ToolResult, ToolUse, Unauthorized, Usage, spliced, to_json)
from conftest import collect, told

INIT = Init("opus", "5e55", "/work/dir")


def failed(error: ClinvkError, details: str) -> Failure:
    """A failure of which the CLI wrote `details`."""
    error.details = details
    return Failure(error)


USAGE = TokenUsage(Usage(101, 12, 40, 3, 7, cache_inside=False))
COUNTS = {"input_tokens": 101, "output_tokens": 12, "cached_tokens": 40, "reasoning_tokens": 7}
PLAIN: List[Event] = [INIT, Message("Hel", opens=True), Message("lo"), USAGE, Done(0, 1234, 0.5, 1)]
FAILED: List[Event] = [Message("Hel", opens=True), failed(BackendFailed("claude failed: boom"), "stderr says"),
                       Done(1, 5)]
AGENT: List[Event] = [INIT, Thinking("hm"), Message("I will ", opens=True), Message("look."),
                      ToolUse("t1", "Bash", {"c": [1]}),
                      ToolResult("t1", "Bash", "hi", is_error=True), Progress("waiting", "no output for 10 s"),
                      Message("Done.", is_partial=False, opens=True), USAGE, Done(0, 9, None, 2)]


def whole(events: Sequence[Event], model: str = "", ignored: Sequence[str] = ()) -> Dict[str, Any]:
    native = Native(Asked(model), "claude", ignored)
    answer: Dict[str, Any] = json.loads(b"".join(native.whole([collect(iter(events))])))
    return answer


def streamed(events: Sequence[Event]) -> List[Dict[str, Any]]:
    chunks = list(Native(Asked(), "claude").stream(told(events)))
    return [json.loads(line) for line in b"".join(chunks).split(b"\n")[:-1]]


# ---- One object

@pytest.mark.parametrize("events, answer", [
    (PLAIN, {"backend": "claude", "model": "opus", "exit_code": 0, "duration_ms": 1234, "output": "Hello",
             "token_usage": COUNTS, "cost_usd": 0.5}),
    (AGENT, {"backend": "claude", "model": "opus", "exit_code": 0, "duration_ms": 9, "output": "Done.",
             "token_usage": COUNTS}),
    (FAILED, {"backend": "claude", "exit_code": 1, "duration_ms": 5, "output": "Hel",
              "error": "claude failed: boom\nstderr says"}),
    ([Failure(BackendFailed("boom")), Done(-1)],
     {"backend": "claude", "exit_code": -1, "duration_ms": 0, "output": "", "error": "boom"}),
    ([Done(0, cost_usd=0)], {"backend": "claude", "exit_code": 0, "duration_ms": 0, "output": "", "cost_usd": 0})])
def test_a_whole_answer_is_the_collected_events(events: List[Event], answer: Dict[str, Any]) -> None:
    assert whole(events) == answer


def test_fields_that_could_not_be_honoured_and_the_asked_model_are_named() -> None:
    answer = whole([Done(0)], model="balanced", ignored=["max_tokens", "verbose"])
    assert (answer["model"], answer["ignored"]) == ("balanced", ["max_tokens", "verbose"])
    assert whole(PLAIN, model="balanced")["model"] == "opus"


# ---- A stream

def test_every_event_has_its_line_with_what_the_contract_names() -> None:
    lines = streamed([*AGENT[:-1], failed(RateLimited("slow down"), "raw"), Done(1, 7, 0.25, 2)])
    assert [(line["type"], line["content"]) for line in lines] == [
        ("init", {"model": "opus", "backend_session_id": "5e55", "working_dir": "/work/dir"}),
        ("thinking", {"text": "hm", "is_partial": True}),
        ("message", {"text": "I will ", "role": "assistant", "is_partial": True}),
        ("message", {"text": "look.", "role": "assistant", "is_partial": True}),
        ("tool_use", {"tool_id": "t1", "tool_name": "Bash", "input": {"c": [1]}}),
        ("tool_result", {"tool_id": "t1", "tool_name": "Bash", "output": "hi", "is_error": True}),
        ("progress", {"stage": "waiting", "message": "no output for 10 s"}),
        ("message", {"text": "Done.", "role": "assistant", "is_partial": False}),
        ("token_usage", COUNTS),
        ("error", {"code": "rate_limit_exceeded", "message": "slow down", "details": "raw"}),
        ("done", {"exit_code": 1, "duration_ms": 7, "output": "Done.", "token_usage": COUNTS, "cost_usd": 0.25,
                  "turn_count": 2})]


@pytest.mark.parametrize("events", [PLAIN, AGENT, FAILED, [Done(0)]])
def test_lines_are_numbered_dated_and_end_with_the_one_done(events: List[Event]) -> None:
    lines = streamed([*events, Message("too late"), Done(0)])
    assert [line["sequence"] for line in lines] == list(range(1, len(events) + 1))
    assert [line["type"] for line in lines].count("done") == 1 and lines[-1]["type"] == "done"
    for line in lines:
        assert list(line) == ["type", "backend", "session_id", "timestamp", "sequence", "content"]
        assert line["backend"] == "claude" and line["timestamp"].endswith("Z")
        dated = datetime.datetime.strptime(line["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ")
        assert abs((datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None) - dated).total_seconds()) < 60


@pytest.mark.parametrize("events, answer", [(PLAIN, "Hello"), (AGENT, "Done."), (FAILED, "Hel"), ([Done(0)], "")])
def test_the_messages_after_the_last_opening_one_are_the_output_in_stream_and_whole(events: List[Event],
                                                                                    answer: str) -> None:
    lines, text = streamed(events), ""
    for event, line in zip(events, lines):
        if isinstance(event, Message):
            text = (text if not event.opens else "") + line["content"]["text"]
    assert text == lines[-1]["content"]["output"] == whole(events)["output"] == answer


def test_each_event_is_sent_when_it_comes() -> None:
    came: List[int] = []

    def events() -> Any:
        for number, event in enumerate(PLAIN):
            came.append(number)
            yield event
    chunks = Native(Asked(), "claude").stream(told(events()))
    for number in range(4):
        assert json.loads(next(chunks))["sequence"] == number + 1
        assert came[-1] == number


# ---- Bytes

NASTY = ["", "\u2028\u2029\x85\r\n", "\U0001f680 \u4f60\u597d", "half \ud83d", "\ude80 half", '"\\/\b\x00\x1f',
         "\x7f</script>"]


@pytest.mark.parametrize("text", NASTY)
def test_any_text_is_one_line_of_utf8_that_reads_back_the_same(text: str) -> None:
    data = to_json({"text": text})
    assert json.loads(data) == {"text": text}
    assert data.decode("utf-8").splitlines() == [data.decode("utf-8")]
    lines = b"".join(Native(Asked(), "claude").stream(told([Message(text, opens=True), Done(0)])))
    assert len(lines.decode("utf-8").splitlines()) == 2
    assert whole([Message(text, opens=True), Done(0)])["output"] == text


def random_tree(chance: random.Random, leaves: List[str], depth: int = 0) -> Any:
    """Nested data; each of `leaves` stands in it once, in order."""
    kind = chance.choice(["text", "number", "list", "dict"]) if depth < 4 else "text"
    if kind == "text":
        return leaves.pop(0) if leaves and chance.random() < 0.7 else chance.choice(NASTY)
    if kind == "number":
        return chance.choice([0, -1, 1.5, True, None, 10**20])
    items = [random_tree(chance, leaves, depth + 1) for _ in range(chance.randrange(5))]
    return items if kind == "list" else {f"{chance.choice(NASTY)}{n}": item for n, item in enumerate(items)}


def with_texts(value: Any, texts: Dict[str, List[str]]) -> Any:
    if isinstance(value, dict):
        return {name: with_texts(item, texts) for name, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item, texts) for item in value]
    return "".join(texts[value]) if isinstance(value, str) and value in texts else value


def test_spliced_texts_give_the_same_json_as_the_whole_value() -> None:
    chance = random.Random(5)
    for _ in range(500):
        leaves = [f"text-{n}-marker" for n in range(3)]
        value = [random_tree(chance, leaves), random_tree(chance, leaves), *leaves]
        texts = {f"text-{n}-marker": [chance.choice(NASTY) for _ in range(chance.randrange(6))] for n in range(3)}
        expected = with_texts(value, texts)
        found = b"".join(spliced(value, {name: list(pieces) for name, pieces in texts.items()}))
        assert json.loads(found) == json.loads(json.dumps(expected))  # two halves of a pair become one character


def test_a_text_that_looks_like_a_marker_is_left_alone() -> None:
    text = "text-0123456789abcdef0123456789abcdef"
    assert whole([Message(text, opens=True), Message(text), Done(0)])["output"] == text * 2


def test_a_text_is_let_go_as_it_is_written() -> None:
    result = collect(iter([Message("x" * 1000, opens=True), *[Message("y" * 1000)] * 9, Done(0)]))
    chunks = Native(Asked(), "claude").whole([result])
    assert result.final == [] and len(b"".join(chunks)) > 10_000


# ---- Errors

def problem(status: int, title: str, detail: str, errors: Optional[List[Any]] = None,
            **more: str) -> Tuple[int, str, Any]:
    return status, "application/problem+json", {"type": "about:blank", "title": title, "status": status,
                                                "detail": detail,
                                                "errors": errors or [], **more}


@pytest.mark.parametrize("error, answer", [
    (BackendUnavailable("codex is not installed"), problem(503, "Service Unavailable", "codex is not installed")),
    (Invalid([Problem("body.model", "must be a string", 7)]),
     problem(422, "Unprocessable Entity", "body.model: must be a string",
             [{"location": "body.model", "message": "must be a string", "value": 7}])),
    (Unauthorized("no key"), problem(401, "Unauthorized", "no key", error="unauthorized", message="no key")),
    (RateLimited("slow"), problem(429, "Too Many Requests", "slow", error="too_many_requests", message="slow"))])
def test_errors_are_problem_json(error: ClinvkError, answer: Any) -> None:
    body = Native.error(error, "id")
    body["title"] = body["title"].replace("Content", "Entity")  # Python 3.13 has RFC 9110's name of 422
    assert (Native.status(error), Native.error_type, body) == answer


def prompted(error: ClinvkError) -> ClinvkError:
    error.prompted = True
    return error


def again_after(seconds: float) -> ClinvkError:
    error = RateLimited("slow")
    error.retry_after = seconds
    return error


@pytest.mark.parametrize("error, headers", [
    (BackendFailed("boom"), {}), (prompted(BackendFailed("boom")), {"x-should-retry": "false"}),
    (again_after(12.6), {"Retry-After": "13"}), (again_after(12.2), {"Retry-After": "13"}),
    (again_after(-5), {"Retry-After": "1"}),
    (again_after(0), {"Retry-After": "1"}),
    (prompted(again_after(3)), {"x-should-retry": "false", "Retry-After": "3"}),
    (MethodNotAllowed("no", "GET, HEAD"), {"Allow": "GET, HEAD"}), (Unauthorized("no"), {"WWW-Authenticate": "Bearer"}),
    (BackendAuth("log in"), {})])
def test_an_errors_headers_say_whether_and_when_to_try_again(error: ClinvkError, headers: Dict[str, str]) -> None:
    assert Native.error_headers(error) == headers


# ---- Usage

@pytest.mark.parametrize("usage, every, fresh", [
    (Usage(100, 5), 100, 100), (Usage(100, 5, 40), 100, 60), (Usage(100, 5, 40, 3), 100, 57),
    (Usage(100, 5, 40, 3, cache_inside=False), 143, 100), (Usage(10, 5, 40), 10, 0), (Usage(), 0, 0)])
def test_cached_input_is_counted_inside_or_beside_as_the_provider_does(usage: Usage, every: int, fresh: int) -> None:
    assert (usage.all_input, usage.fresh_input) == (every, fresh)
