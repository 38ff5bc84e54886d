"""Any run that can be, through each API's renderer: what comes out is what the strictest clients demand (strict.py),
and a stream says what a whole answer says."""

import json
from typing import Any, Callable, List, NamedTuple, Tuple, Type

import pytest
from clinvk import (Anthropic, Asked, BackendAuth, BackendFailed, Done, Event, Failure, Init, Message, OpenAI, Progress,
                    RateLimited, Renderer, Thinking, TimedOut, TokenUsage, ToolResult, ToolUse, Usage, collect)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strict import (Heard, check_anthropic_error, check_anthropic_stream, check_chat_stream, check_completion,
                    check_message, check_openai_error, data_of, events_of)

MODEST = settings(max_examples=120, deadline=None, derandomize=True, database=None,
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
def runs(draw: Callable[..., Any]) -> List[Event]:
    """A run's events: the first text opens a message, a Failure is followed by the Done, which is the last."""
    events: List[Event] = [Init("model", "id", "/")] if draw(st.booleans()) else []
    for step in draw(st.lists(STEP, max_size=8)):
        events += step
    texts = [number for number, event in enumerate(events) if isinstance(event, Message)]
    if texts:
        first = events[texts[0]]
        assert isinstance(first, Message)
        events[texts[0]] = Message(first.text, first.is_partial, opens=True)
    return [*events, *([Failure(draw(ERROR)), Done(draw(st.sampled_from([1, -1])))] if draw(st.booleans())
                       else [draw(DONE)])]


# ---- The APIs

class Api(NamedTuple):
    """A renderer, how its stream is read, and what is demanded of its answers. With OpenAI's responses in clinvk:
    Api(Responses, events_of, check_responses_stream, check_response, check_openai_error)."""
    renderer: Type[Renderer]
    read: Callable[[bytes], List[Any]]
    check_stream: Callable[..., List[Heard]]
    check_whole: Callable[[Any], List[Heard]]
    check_error: Callable[[Any], str]

    def stream(self, events: List[Event], **asked: Any) -> List[Any]:
        return self.read(b"".join(self.renderer(Asked("model", **asked)).stream(iter(events))))

    def whole(self, events: List[Event], **asked: Any) -> Any:
        return json.loads(b"".join(self.renderer(Asked("model", **asked)).whole(collect(iter(events)))))


APIS = [Api(OpenAI, data_of, check_chat_stream, check_completion, check_openai_error),
        Api(Anthropic, events_of, check_anthropic_stream, check_message, check_anthropic_error)]
EACH = pytest.mark.parametrize("api", APIS, ids=[api.renderer.name for api in APIS])


def said_by(events: List[Event]) -> Tuple[str, str]:
    """Text and thoughts, as every compat API tells them: a blank line before each further message."""
    text = thoughts = ""
    for event in events:
        if isinstance(event, Message):
            text += ("\n\n" if event.opens and text else "") + event.text
        elif isinstance(event, Thinking):
            thoughts += event.text
    return text, thoughts


@EACH
@MODEST
@given(events=runs(), characters=st.integers(0, 100))
def test_a_stream_is_what_strict_clients_demand_and_says_what_a_whole_answer_says(api: Api, events: List[Event],
                                                                                  characters: int) -> None:
    asked = {"include_usage": True} if api.check_stream is check_chat_stream else {}
    [heard] = api.check_stream(api.stream(events, characters=characters, **asked), **asked)
    assert (heard.text, heard.thoughts) == said_by(events)
    failures = [event for event in events if isinstance(event, Failure)]
    if failures:
        assert heard.failed == failures[0].error.whole and heard.reason is None
    else:
        assert [heard] == api.check_whole(api.whole(events, characters=characters))


@MODEST
@given(events=runs())
def test_a_chat_stream_is_as_strict_clients_demand_also_without_usage(events: List[Event]) -> None:
    [heard] = check_chat_stream(APIS[0].stream(events))
    assert (heard.text, heard.usage) == (said_by(events)[0], ())


@EACH
@pytest.mark.parametrize("error", [BackendFailed("boom"), BackendAuth("log in"), RateLimited("slow"), TimedOut("late")])
def test_an_error_is_what_strict_clients_demand(error: Any, api: Api) -> None:
    assert api.check_error(json.loads(json.dumps(api.renderer.error(error, "request")))) == str(error)
