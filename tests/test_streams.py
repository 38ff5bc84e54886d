"""Any run that can be, through each API's renderer: what comes out is what the strictest clients demand (strict.py),
and a stream says what a whole answer says."""

import itertools
import json
import tracemalloc
from typing import Any, Callable, List, NamedTuple, Tuple, Type

import pytest
from clinvk import (Anthropic, Asked, BackendAuth, BackendFailed, ChatCompletions, Completions, Done, Event, Failure,
                    Init, Message, Progress, RateLimited, Refusal, Renderer, Responses, Thinking, TimedOut, Told,
                    TokenUsage, ToolResult, ToolUse, Usage)
from conftest import Client, collect, told
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strict import (Heard, check_anthropic_error, check_anthropic_stream, check_chat_stream, check_completion,
                    check_message, check_openai_error, check_response, check_responses_stream, check_text_completion,
                    check_text_stream, data_of, events_of)

MODEST = settings(max_examples=50, deadline=None, derandomize=True, database=None,
                  suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


# ---- Runs that can be

TEXT = st.text(st.sampled_from("ab :,{}[]\"\\\n\r\t\0\x85\u2028\u00e9\U0001f680"), min_size=1, max_size=6)
TOKENS = st.integers(0, 10**6)
NAMES = st.sampled_from(["Bash", "Read", "mcp__clinvk__weather"])
USAGE = st.builds(lambda fresh, output, cached, created, thought, inside: Usage(
    fresh + inside * (cached + created), output, cached, created, thought, cache_inside=inside),
    st.integers(1, 10**6), TOKENS, TOKENS, TOKENS, TOKENS, st.booleans())  # some of the input came from no cache
STEP = st.one_of(
    st.builds(lambda text, opens: [Message(text, opens=opens)], TEXT, st.booleans()),
    st.builds(lambda text: [Message(text, is_partial=False, opens=True)], TEXT),
    st.builds(lambda text, partial: [Thinking(text, partial)], TEXT, st.booleans()),
    st.builds(lambda name: [ToolUse("t", name, {"command": "ls"})], NAMES),
    st.builds(lambda name, text, bad: [ToolUse("t", name, {}), ToolResult("t", name, text, bad)], NAMES, TEXT,
              st.booleans()),
    st.builds(lambda usage: [TokenUsage(usage)], USAGE),
    st.just([Progress("waiting", "no output for 10 s")]))
ERROR = st.builds(lambda kind, text: kind(text), st.sampled_from([BackendFailed, BackendAuth, RateLimited, TimedOut]),
                  TEXT)
DONE = st.one_of(st.builds(Done, st.just(0), stop=st.sampled_from(["end", "length"])),
                 st.builds(lambda text: Done(0, stop="sequence", stop_sequence=text), TEXT))


@st.composite
def runs(draw: Callable[..., Any], *, fails: bool = True) -> List[Event]:
    """A run's events: the first text opens a message, a Refusal stands in place of all text, a Failure is followed by
    the Done, which is the last."""
    events: List[Event] = [Init("model", "id", "/")] if draw(st.booleans()) else []
    for step in draw(st.lists(STEP, max_size=8)):
        events += step
    texts = [number for number, event in enumerate(events) if isinstance(event, Message)]
    if texts:
        first = events[texts[0]]
        assert isinstance(first, Message)
        events[texts[0]] = Message(first.text, first.is_partial, opens=True)
    end = draw(st.sampled_from(["done", "refused", "failed"] if fails else ["done", "refused"]))
    if end == "failed":
        return [*events, Failure(draw(ERROR)), Done(draw(st.sampled_from([1, -1])))]
    if end == "refused":
        return [*(event for event in events if not isinstance(event, Message)), Refusal(draw(TEXT)), Done(0)]
    return [*events, draw(DONE)]


# ---- The APIs

class Api(NamedTuple):
    """A renderer, how its stream is read, and what is demanded of its answers."""
    renderer: Type[Renderer]
    read: Callable[[bytes], List[Any]]
    check_stream: Callable[..., List[Heard]]
    check_whole: Callable[[Any], List[Heard]]
    check_error: Callable[[Any], str]
    path: str

    @property
    def asks_for_usage(self) -> bool:
        """Whether a stream tells the usage only if it was asked for."""
        return self.read is data_of

    def streamed(self, events: List[Told], **asked: Any) -> List[Heard]:
        wants = {"include_usage": True} if self.asks_for_usage else {}
        body = b"".join(self.renderer(Asked("model", **asked), **wants).stream(iter(events)))
        return self.check_stream(self.read(body), **wants)

    def whole(self, *runs: List[Event], **asked: Any) -> List[Heard]:
        results = [collect(iter(events)) for events in runs]
        return self.check_whole(json.loads(b"".join(self.renderer(Asked("model", **asked)).whole(results))))


CHAT = Api(ChatCompletions, data_of, check_chat_stream, check_completion, check_openai_error,
           "/openai/v1/chat/completions")
TEXTS = Api(Completions, data_of, check_text_stream, check_text_completion, check_openai_error,
            "/openai/v1/completions")
RESPONSES = Api(Responses, events_of, check_responses_stream, check_response, check_openai_error,
                "/openai/v1/responses")
MESSAGES = Api(Anthropic, events_of, check_anthropic_stream, check_message, check_anthropic_error,
               "/anthropic/v1/messages")
APIS = [CHAT, TEXTS, RESPONSES, MESSAGES]
EACH = pytest.mark.parametrize("api", APIS, ids=[api.path for api in APIS])


def said_by(events: List[Event], api: Api) -> Tuple[str, str, str]:
    """Text, thoughts and refusal, as the API tells them: a blank line before each further message. Completions have
    text alone; Anthropic's refusals are text."""
    texts = {Message: "", Thinking: "", Refusal: ""}
    for event in events:
        if isinstance(event, Message) and event.opens and texts[Message]:
            texts[Message] += "\n\n"
        if isinstance(event, (Message, Thinking, Refusal)):
            texts[type(event)] += event.text
    if api is TEXTS:
        return texts[Message], "", ""
    if api is MESSAGES:
        return texts[Message] + texts[Refusal], texts[Thinking], ""
    return texts[Message], texts[Thinking], texts[Refusal]


AGENT: List[Event] = [
    Init("model"), Message("I will ", opens=True), Message("look."), Thinking("hm"), Message("Or", opens=True),
    ToolUse("t", "Bash", {}), ToolResult("t", "Bash", "hi"), Message("not."), TokenUsage(Usage(9, 5)), Done(0)]


@EACH
@MODEST
@given(events=runs(), characters=st.integers(0, 100))
@example(events=AGENT, characters=0)
def test_a_stream_is_what_strict_clients_demand_and_says_what_a_whole_answer_says(api: Api, events: List[Event],
                                                                                  characters: int) -> None:
    [heard] = api.streamed(list(told(events)), characters=characters)
    assert (heard.text, heard.thoughts, heard.refusal) == said_by(events, api)
    failures = [event for event in events if isinstance(event, Failure)]
    if failures:
        assert heard.failed == failures[0].error.full_message and heard.reason is None
    else:
        assert [heard] == api.whole(events, characters=characters)
        refused = any(isinstance(event, Refusal) for event in events)
        assert api is not MESSAGES or refused == (heard.reason == "refusal")


@pytest.mark.parametrize("api", [CHAT, TEXTS], ids=["chat", "completions"])
@MODEST
@given(runs=st.lists(runs(fails=False), min_size=2, max_size=3), order=st.randoms(use_true_random=False))
def test_the_choices_of_several_runs_are_what_strict_clients_demand(api: Api, runs: List[List[Event]],
                                                                    order: Any) -> None:
    """The events of the runs come in any order."""
    turns = [index for index, events in enumerate(runs) for _ in events]
    order.shuffle(turns)
    left = [iter(events) for events in runs]
    heard = api.streamed([Told(index, next(left[index])) for index in turns], answers=len(runs))
    assert heard == api.whole(*runs, answers=len(runs))
    assert [(choice.text, choice.thoughts, choice.refusal) for choice in heard] == [
        said_by(events, api) for events in runs]


@pytest.mark.parametrize("api", [CHAT, TEXTS], ids=["chat", "completions"])
@MODEST
@given(events=runs())
def test_a_stream_is_what_strict_clients_demand_also_if_they_do_not_ask_for_usage(api: Api,
                                                                                  events: List[Event]) -> None:
    [heard] = api.check_stream(data_of(b"".join(api.renderer(Asked("model")).stream(told(events)))))
    assert (heard.text, heard.usage) == (said_by(events, api)[0], ())


@EACH
@pytest.mark.parametrize("error", [BackendFailed("boom"), BackendAuth("log in"), RateLimited("slow"), TimedOut("late")])
def test_an_error_is_what_strict_clients_demand(error: Any, api: Api) -> None:
    assert api.check_error(json.loads(json.dumps(api.renderer.error(error, "request")))) == str(error)


@EACH
def test_the_server_itself_answers_as_strict_clients_demand(api: Api, client: Client) -> None:
    prompt = "one two"
    body = {"model": "echo", "max_tokens": 9, "input": prompt, "prompt": prompt, "messages": [
        {"role": "user", "content": prompt}], "stream_options": {"include_usage": True}}
    wants = {"include_usage": True} if api.asks_for_usage else {}
    streamed = client.call("POST", api.path, {**body, "stream": True})
    [heard] = api.check_stream(api.read(streamed.body), **wants)
    assert [heard] == api.check_whole(client.call("POST", api.path, body).json) and heard.text == prompt
    assert api.check_error(client.call("POST", api.path, {**body, "model": "nothing-known"}).json)


@pytest.mark.parametrize("renderer", [ChatCompletions, Completions, Responses, Anthropic])
@pytest.mark.parametrize("way", ["whole", "stream"])
def test_a_long_answer_is_held_once(renderer: Any, way: str) -> None:
    pieces = 1000
    run = itertools.chain((Message("x" * 10_000, opens=not number) for number in range(pieces)), [Done(0)])
    tracemalloc.start()
    try:
        whole = renderer(Asked("m")).whole([collect(run)]) if way == "whole" else []
        size = sum(map(len, whole or renderer(Asked("m")).stream(told(run))))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > pieces * 10_000 > peak / 1.3
