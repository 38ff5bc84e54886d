"""OpenAI: chat completions, whole and streamed, from events; and stop sequences."""

import json
import random
import time
from typing import Any, Dict, Generator, List, Optional, Sequence, Tuple

import pytest

import clinvk
from clinvk import (Asked, BackendAuth, BackendFailed, BackendUnavailable, ChatCompletions, ClinvkError, Done, Event,
                    Failure, Init, Invalid, Message, OpenAI, Problem, Progress, RateLimited, Thinking, TimedOut,
                    TokenUsage, ToolResult, ToolUse, UnknownModel, Usage, cut_at)
from conftest import collect, told

INSIDE, BESIDE = Usage(101, 12, 40, 0, 7), Usage(101, 12, 40, 3, cache_inside=False)
PLAIN: List[Event] = [Init("opus"), Message("Hel", opens=True), Message("lo"), TokenUsage(INSIDE), Done(0)]
THOUGHT: List[Event] = [Thinking("Let me "), Thinking("think."), Message("Yes.", opens=True), TokenUsage(BESIDE),
                        Done(0)]
AGENT: List[Event] = [Message("I will ", opens=True), Message("look."), ToolUse("t", "Bash", {}),
                      ToolResult("t", "Bash", "hi"),
                      Thinking("hm"), Message("Do", opens=True), Message("ne."), Done(0)]
RUNS: List[Tuple[List[Event], str, str]] = [
    (PLAIN, "Hello", ""), (THOUGHT, "Yes.", "Let me think."), (AGENT, "I will look.\n\nDone.", "hm"),
    ([Done(0)], "", ""),
    ([Message("\u2028 \U0001f680\x85", opens=True), Done(0)], "\u2028 \U0001f680\x85", "")]


def usage_of(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning}}


def whole(events: Sequence[Event], **asked: Any) -> Dict[str, Any]:
    renderer = ChatCompletions(Asked("claude/opus", **asked))
    answer: Dict[str, Any] = json.loads(b"".join(renderer.whole([collect(iter(events))])))
    return answer


def sent(events: Sequence[Event], *, include_usage: bool = False, **asked: Any) -> bytes:
    return b"".join(ChatCompletions(Asked("claude/opus", **asked), include_usage=include_usage).stream(told(events)))


def chunks(events: Sequence[Event], **asked: Any) -> List[Any]:
    """The data of each event of a stream, comments as text."""
    parts = sent(events, **asked).decode().split("\n\n")
    assert parts.pop() == ""
    return [json.loads(part[6:]) if part.startswith("data: {") else part for part in parts]


def deltas(events: Sequence[Event], **asked: Any) -> List[Any]:
    """Delta and finish_reason of each chunk that has a choice."""
    return [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks(events, **asked)
            if isinstance(chunk, dict) and chunk.get("choices")]


# ---- Whole

@pytest.mark.parametrize("events, message, usage", [
    (PLAIN, {"content": "Hello"}, usage_of(101, 12, 40, 7)),
    (THOUGHT, {"content": "Yes.", "reasoning_content": "Let me think."}, usage_of(144, 12, 40)),
    (AGENT, {"content": "I will look.\n\nDone.", "reasoning_content": "hm"}, usage_of(3, 5)),
    ([Done(0)], {"content": ""}, usage_of(3, 0))])
def test_a_whole_answer_is_a_chat_completion(events: List[Event], message: Dict[str, Any],
                                             usage: Dict[str, Any]) -> None:
    answer = whole(events, characters=12)
    assert answer.pop("id").startswith("chatcmpl-") and abs(answer.pop("created") - time.time()) < 60
    assert answer == {
        "object": "chat.completion", "model": "claude/opus", "system_fingerprint": f"clinvk-{clinvk.__version__}",
        "usage": usage,
        "choices": [{"index": 0, "message": {"role": "assistant", "refusal": None, **message}, "finish_reason": "stop",
                     "logprobs": None}]}


@pytest.mark.parametrize("done, reason", [(Done(0), "stop"), (Done(0, stop="length"), "length"),
                                          (Done(0, stop="sequence", stop_sequence="x"), "stop")])
def test_the_finish_reason_says_why_the_answer_ended(done: Done, reason: str) -> None:
    assert whole([done])["choices"][0]["finish_reason"] == reason
    assert deltas([done])[-1] == ({}, reason)


def test_two_answers_have_different_ids_and_the_chunks_of_one_the_same() -> None:
    assert whole(PLAIN)["id"] != whole(PLAIN)["id"]
    assert len({chunk["id"] for chunk in chunks(PLAIN)[:-1]}) == 1


# ---- Streamed

@pytest.mark.parametrize("events, expected", [
    (PLAIN, [{"content": "Hel"}, {"content": "lo"}]),
    (THOUGHT, [{"reasoning_content": "Let me "}, {"reasoning_content": "think."}, {"content": "Yes."}]),
    (AGENT, [{"content": "I will "}, {"content": "look."}, {"reasoning_content": "hm"}, {"content": "\n\nDo"},
             {"content": "ne."}]), ([Done(0)], [])])
def test_a_stream_is_the_role_then_the_deltas_then_the_finish_reason(events: List[Event], expected: List[Any]) -> None:
    first, *middle, last = deltas(events)
    assert first == ({"role": "assistant", "content": ""}, None)
    assert middle == [(delta, None) for delta in expected]
    assert last == ({}, "stop") and chunks(events)[-1] == "data: [DONE]"


def test_every_chunk_has_all_that_clients_ask_for() -> None:
    first = chunks(PLAIN)[0]
    assert first.pop("id").startswith("chatcmpl-") and isinstance(first.pop("created"), int)
    assert first == {"object": "chat.completion.chunk", "model": "claude/opus",
                     "system_fingerprint": f"clinvk-{clinvk.__version__}",
                     "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None,
                                  "logprobs": None}]}


@pytest.mark.parametrize("events, usage", [(PLAIN, usage_of(101, 12, 40, 7)), (THOUGHT, usage_of(144, 12, 40)),
                                           (AGENT, usage_of(3, 5)), ([Done(0)], usage_of(3, 0))])
def test_usage_comes_last_if_it_was_asked_for_and_is_the_same_as_of_a_whole_answer(events: List[Event],
                                                                                   usage: Any) -> None:
    *before, last, end = chunks(events, include_usage=True, characters=12)
    assert (last["choices"], last["usage"], end) == ([], usage, "data: [DONE]")
    assert whole(events, characters=12)["usage"] == usage
    assert all(chunk["usage"] is None for chunk in before)
    assert all("usage" not in chunk for chunk in chunks(events)[:-1])


def test_silence_is_a_comment() -> None:
    events: List[Event] = [Progress("waiting", "no output"), Message("Hi", opens=True),
                           Progress("waiting", "no output"), Done(0)]
    assert [chunk for chunk in chunks(events) if isinstance(chunk, str)] == [": keepalive"] * 2 + ["data: [DONE]"]
    assert deltas(events)[1] == ({"content": "Hi"}, None)


def test_a_failure_in_mid_stream_is_an_error_and_no_done() -> None:
    error = BackendFailed("boom")
    error.details = "stderr says"
    events: List[Event] = [Message("Hel", opens=True), Failure(error), Done(1)]
    *_, last = chunks(events, include_usage=True)
    assert last == {"error": {"message": "boom\nstderr says", "type": "api_error", "param": None,
                              "code": "backend_failed"}}
    assert b"[DONE]" not in sent(events)


@pytest.mark.parametrize("events, text, thoughts", RUNS)
def test_a_stream_says_what_a_whole_answer_says(events: List[Event], text: str, thoughts: str) -> None:
    message = whole(events)["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content", "")) == (text, thoughts)
    assert "".join(delta.get("content", "") for delta, _ in deltas(events)) == text
    assert "".join(delta.get("reasoning_content", "") for delta, _ in deltas(events)) == thoughts


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d", "half \ud83d", "line\r\nend\n\n", "data: [DONE]\n\n"])
def test_no_text_breaks_the_stream_into_other_lines(text: str) -> None:
    lines = sent([Message(text, opens=True), Done(0)]).decode().splitlines()
    assert all(line == "" or line.startswith("data: ") for line in lines) and len(lines) == 8
    assert json.loads(lines[2][6:])["choices"][0]["delta"]["content"] == text


# ---- Errors

@pytest.mark.parametrize("error, status, kind, code, param", [
    (Invalid([Problem("messages[0].role", "must be one of")]), 400, "invalid_request_error", None, "messages[0].role"),
    (UnknownModel("no"), 404, "invalid_request_error", "model_not_found", "model"),
    (BackendAuth("log in"), 401, "authentication_error", "backend_auth", None),
    (RateLimited("slow"), 429, "rate_limit_error", "rate_limit_exceeded", None),
    (BackendUnavailable("full"), 503, "api_error", "backend_unavailable", None),
    (BackendFailed("boom"), 502, "api_error", "backend_failed", None),
    (TimedOut("late"), 504, "api_error", "timeout", None),
    (ClinvkError("ours"), 500, "api_error", None, None)])
def test_errors_have_openais_shape(error: ClinvkError, status: int, kind: str, code: Optional[str],
                                   param: Optional[str]) -> None:
    assert (OpenAI.status(error), OpenAI.error_type) == (status, "application/json")
    assert OpenAI.error(error, "id") == {
        "error": {"message": str(error), "type": kind, "param": param, "code": code}}


# ---- What openai-python makes of it

def openai_client(body: bytes, content_type: str) -> Any:
    """A real client, whose server answers with `body`."""
    openai, http = pytest.importorskip("openai"), pytest.importorskip("httpx2")

    def answer(request: Any) -> Any:
        return http.Response(200, content=body, headers={"Content-Type": content_type})
    return openai.OpenAI(api_key="k", base_url="http://localhost/openai/v1",
                         http_client=http.Client(transport=http.MockTransport(answer)))


QUESTION: Dict[str, Any] = {"model": "claude/opus", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("events, text, thoughts", RUNS)
def test_openai_python_reads_a_whole_answer(events: List[Event], text: str, thoughts: str) -> None:
    body = b"".join(ChatCompletions(Asked("claude/opus")).whole([collect(iter(events))]))
    answer = openai_client(body, "application/json").chat.completions.create(**QUESTION)
    type(answer).model_validate(json.loads(body))  # strict, as create() is not
    assert answer.choices[0].message.content == text
    assert getattr(answer.choices[0].message, "reasoning_content", "") == thoughts
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("events, text, thoughts", RUNS)
def test_openai_python_gathers_a_stream(events: List[Event], text: str, thoughts: str) -> None:
    body = sent([Progress("waiting", ""), *events], include_usage=True)
    client = openai_client(body, "text/event-stream")
    with client.chat.completions.stream(**QUESTION) as stream:
        for event in stream:
            if event.type == "chunk":
                type(event.chunk).model_validate(event.chunk.to_dict())
        answer = stream.get_final_completion()
    assert (answer.choices[0].message.content or "", answer.choices[0].finish_reason) == (text, "stop")
    assert answer.usage.total_tokens == whole(events)["usage"]["total_tokens"]


def test_openai_python_raises_on_a_failure_in_mid_stream() -> None:
    openai = pytest.importorskip("openai")
    client = openai_client(sent([Message("Hel", opens=True), Failure(BackendFailed("boom")), Done(1)]),
                           "text/event-stream")
    heard = []
    with pytest.raises(openai.APIError, match="boom"):
        for chunk in client.chat.completions.create(**QUESTION, stream=True):
            heard.append(chunk.choices[0].delta.content)
    assert heard == ["", "Hel"]


# ---- Stop sequences

class Run:
    """Events, and whether their reader has closed them."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events, self.closed, self.taken = events, False, 0

    def __iter__(self) -> Generator[Event, None, None]:
        try:
            for event in self.events:
                self.taken += 1
                yield event
        finally:
            self.closed = True


def cut(stops: List[str], events: Sequence[Event]) -> List[Event]:
    return list(cut_at(stops, iter(Run(events))))


def pieces_of(text: str, chance: random.Random) -> List[Event]:
    at = sorted(chance.randrange(len(text) + 1) for _ in range(chance.randrange(9)))
    parts = [text[begin:end] for begin, end in zip([0, *at], [*at, len(text)])]
    return [Message(part, opens=number == 0) for number, part in enumerate(parts)]


def answer_of(events: Sequence[Event]) -> Tuple[str, Any]:
    return "".join(event.text for event in events if isinstance(event, Message)), events[-1]


@pytest.mark.parametrize("stops, text, answer, stop", [
    (["STOP"], "one STOP two STOP", "one ", "STOP"), (["STOP"], "STOP", "", "STOP"),
    (["STOP"], "one STO", "one STO", None),
    (["B", "A"], "xAB", "x", "A"), (["\n"], "a\nb", "a", "\n"), (["aab"], "aaab", "a", "aab"), (["x"], "", "", None),
    (["\u4f60\u597d"], "\U0001f680\u4f60\u4f60\u597d", "\U0001f680\u4f60", "\u4f60\u597d")])
def test_an_answer_is_cut_before_the_first_stop_sequence(stops: List[str], text: str, answer: str,
                                                         stop: Optional[str]) -> None:
    done = Done(0, stop="sequence", stop_sequence=stop) if stop else Done(0)
    assert answer_of(cut(stops, [Message(text, opens=True), Done(0)])) == (answer, done)
    assert answer_of(cut(stops, [*[Message(letter) for letter in text], Done(0)])) == (answer, done)


def test_an_answer_in_pieces_is_cut_where_the_one_in_one_piece_is() -> None:
    chance = random.Random(7)
    for _ in range(3000):
        text = "".join(chance.choice("ab\n") for _ in range(chance.randrange(1, 25)))
        stops = ["".join(chance.choice("ab\n") for _ in range(chance.randrange(1, 5)))
                 for _ in range(chance.randrange(1, 5))]
        answer, done = answer_of(cut(stops, [Message(text, opens=True), Done(0)]))
        assert answer_of(cut(stops, [*pieces_of(text, chance), Done(0)])) == (answer, done), (text, stops)
        assert text.startswith(answer + (done.stop_sequence or "")) and not any(stop in answer for stop in stops)


def test_the_run_is_ended_as_soon_as_a_stop_sequence_is_there() -> None:
    run = Run([Message("one ST", opens=True), Message("OP two"), Message(" three"), TokenUsage(INSIDE), Done(0)])
    events = list(cut_at(["STOP"], iter(run)))
    assert events[-1] == Done(0, stop="sequence", stop_sequence="STOP")
    assert (run.closed, run.taken) == (True, 2)


def test_closing_a_cut_stream_closes_the_run() -> None:
    run = Run([Message("one", opens=True), Message("two"), Done(0)])
    events = cut_at(["STOP"], iter(run))
    next(events)
    events.close()
    assert run.closed


def test_text_that_can_be_no_stop_sequence_is_not_held_back() -> None:
    events = cut_at(["STOP"], iter(Run([Message("abcS", opens=True), Message("TOx"), Message("y"), Done(0)])))
    assert [getattr(event, "text", None) for event in events] == ["abc", "STOx", "y", None]


@pytest.mark.parametrize("last, text", [(Done(0), "abcST"), (Failure(BackendFailed("boom")), "abcST"),
                                        (Message("B", opens=True), "abcST\n\nB")])
def test_what_was_held_back_is_sent_before_what_follows_the_text(last: Event, text: str) -> None:
    events = cut(["STOP"], [Message("abcST", opens=True), last, Done(0)])
    assert whole(events)["choices"][0]["message"]["content"] == text
    assert isinstance(last, Message) or events.index(last) == 2


def test_other_events_pass_unchanged() -> None:
    events: List[Event] = [Init("m"), Thinking("STOP"), Progress("waiting", "STOP"), Message("fine", opens=True),
                           ToolResult("t", "Bash", "STOP"), TokenUsage(INSIDE), Done(0)]
    assert cut(["STOP"], events) == events


@pytest.mark.parametrize("stops", [["\n\n"], ["look.\n"], ["\nD"]])
def test_a_stop_sequence_may_lie_across_two_messages_of_an_agent_run(stops: List[str]) -> None:
    text = whole(cut(stops, AGENT))["choices"][0]["message"]["content"]
    assert text == "I will look.\n\nDone.".partition(stops[0])[0]


def test_a_whole_answer_is_sent_in_few_blocks_however_many_pieces_it_came_in() -> None:
    blocks = [*clinvk.spliced({"text": "T", "rest": 1}, {"T": ["ab"] * 100_000})]
    assert 1 < len(blocks) < 6 and json.loads(b"".join(blocks)) == {"text": "ab" * 100_000, "rest": 1}
