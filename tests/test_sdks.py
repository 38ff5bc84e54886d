"""openai-python and anthropic-python, all that they offer for what clinvk answers, against the real server and scripted
CLIs."""

import base64
import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from clientkit import PNG, Stage, stage, staged
from conftest import eventually

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")
__all__ = ["stage"]

HELLO, PIECES = "Hello from the echo.", ["Hello ", "from ", "the ", "echo."]
WHO = "do:json Who wrote the first program?"
IMAGE = "What is it? | image/png " + hashlib.sha256(base64.b64decode(PNG)).hexdigest()[:8]
FAILED = "scripted failed with exit code 1\nout of luck"


class Person(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    name: str
    age: int


ADA = Person(name="Ada", age=36)


def user(content: Any) -> List[Dict[str, Any]]:
    return [{"role": "user", "content": content}]


def opened(url: str) -> Tuple[Any, Any]:
    return (openai.OpenAI(base_url=url + "/openai/v1", api_key="any", timeout=60),
            anthropic.Anthropic(base_url=url + "/anthropic", api_key="any", timeout=60))


@pytest.fixture(scope="module")
def sdks(stage: Stage) -> Iterator[Tuple[Any, Any]]:
    first, second = opened(stage.url)
    with first, second:
        yield first, second


@pytest.fixture(scope="module")
def gpt(sdks: Tuple[Any, Any]) -> Any:
    return sdks[0]


@pytest.fixture(scope="module")
def claude(sdks: Tuple[Any, Any]) -> Any:
    return sdks[1]


# ---- openai-python: chat completions

def test_a_chat_completion_is_the_text_and_why_it_ended(gpt: Any) -> None:
    answer = gpt.chat.completions.create(model="echo", messages=user(HELLO))
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (HELLO, "assistant", "stop")
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.completion_tokens) == ("echo", 5, 5)
    assert answer._request_id


def test_a_streamed_chat_completion_is_the_same_in_pieces(gpt: Any) -> None:
    asked = {"model": "echo", "messages": user(HELLO), "stream_options": {"include_usage": True}}
    with gpt.chat.completions.create(stream=True, **asked) as stream:
        *chunks, last = stream
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.content for delta in deltas if delta.content] == PIECES
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert (last.choices, last.usage.total_tokens) == ([], 10)


def test_the_stream_helper_tells_each_delta_and_the_whole(gpt: Any) -> None:
    with gpt.chat.completions.stream(model="echo", messages=user(HELLO)) as stream:
        events = [event for event in stream if event.type != "chunk"]
        answer = stream.get_final_completion()
    assert [event.type for event in events] == ["content.delta"] * len(events[:-1]) + ["content.done"]
    assert [event.delta for event in events[:-1] if event.delta] == PIECES
    assert events[-1].content == answer.choices[0].message.content == HELLO


def test_the_raw_answer_tells_who_ran_and_what_was_ignored(gpt: Any) -> None:
    raw = gpt.chat.completions.with_raw_response.create(model="echo", messages=user(HELLO), temperature=0.5, seed=1)
    assert (raw.headers["x-clinvk-backend"], raw.headers["x-clinvk-ignored"]) == ("echo", "seed, temperature")
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == HELLO


@pytest.mark.parametrize("does", ["json", "fenced"])
def test_parse_gives_a_pydantic_object(gpt: Any, does: str) -> None:
    answer = gpt.chat.completions.parse(model="scripted", messages=user(f"do:{does}"), response_format=Person)
    assert answer.choices[0].message.parsed == ADA


def test_an_answer_that_is_not_what_the_schema_asks_for_is_a_refusal(gpt: Any) -> None:
    message = gpt.chat.completions.parse(model="scripted", messages=user("do:prose"), response_format=Person
                                         ).choices[0].message
    assert message.parsed is None and message.refusal


def test_the_stream_helper_gives_a_pydantic_object(gpt: Any) -> None:
    with gpt.chat.completions.stream(model="scripted", messages=user(WHO), response_format=Person) as stream:
        done = [event for event in stream if event.type == "content.done"]
        answer = stream.get_final_completion()
    assert [event.parsed for event in done] == [ADA]
    assert answer.choices[0].message.parsed == ADA


def test_an_image_in_a_chat_completion_reaches_the_cli(gpt: Any) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"}}
    parts = [{"type": "text", "text": "What is it?"}, image]
    answer = gpt.chat.completions.create(model="claude", messages=user(parts))
    assert answer.choices[0].message.content == IMAGE


def test_n_choices_are_n_runs(gpt: Any, stage: Stage) -> None:
    answer = gpt.chat.completions.create(model="scripted", messages=user("do:repeat three times"), n=3)
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in answer.choices] == [
        (index, "do:repeat three times", "stop") for index in range(3)]
    assert stage.runs("do:repeat three times") == 3


def test_n_streamed_choices_come_under_their_index(gpt: Any) -> None:
    texts, ends = ["", "", ""], []
    with gpt.chat.completions.create(model="echo", messages=user(HELLO), n=3, stream=True) as stream:
        for choice in (choice for chunk in stream for choice in chunk.choices):
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason == "stop" else []
    assert (texts, sorted(ends)) == ([HELLO] * 3, [0, 1, 2])


def test_a_completion_is_a_text(gpt: Any) -> None:
    answer = gpt.completions.create(model="echo", prompt=HELLO)
    choice = answer.choices[0]
    assert (answer.object, choice.text, choice.finish_reason) == ("text_completion", HELLO, "stop")
    assert answer.usage.completion_tokens == 5 and answer.usage.prompt_tokens > 5  # it is told what a completion is
    with gpt.completions.create(model="echo", prompt=HELLO, stream=True) as stream:
        assert [chunk.choices[0].text for chunk in stream if chunk.choices and chunk.choices[0].text] == PIECES


def test_models_are_listed_and_found(gpt: Any, claude: Any) -> None:
    for models in (gpt.models, claude.models):
        assert {"claude", "scripted", "echo"} <= {model.id for model in models.list()}
        assert models.retrieve("scripted").id == "scripted"
    with pytest.raises(openai.NotFoundError):
        gpt.models.retrieve("ecko")
    with pytest.raises(anthropic.NotFoundError):
        claude.models.retrieve("ecko")


# ---- openai-python: responses

def test_a_response_is_the_text_and_its_usage(gpt: Any) -> None:
    answer = gpt.responses.create(model="echo", input=HELLO, reasoning={"effort": "low"})
    assert (answer.output_text, answer.status, answer.error) == (HELLO, "completed", None)
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (5, 5, 10)
    assert [(item.type, item.role, item.status) for item in answer.output] == [("message", "assistant", "completed")]


def test_a_response_keeps_instructions_and_the_conversation(gpt: Any) -> None:
    talk = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "One."}, *user("do:repeat")]
    answer = gpt.responses.create(model="scripted", instructions="Be brief.", input=talk)
    chat = gpt.chat.completions.create(model="scripted", messages=[{"role": "system", "content": "Be brief."}, *talk])
    assert answer.output_text == chat.choices[0].message.content
    assert answer.output_text.startswith("Be brief.\n\n")


def test_a_streamed_response_is_its_events_in_order(gpt: Any) -> None:
    with gpt.responses.stream(model="echo", input=HELLO) as stream:
        events = list(stream)
        answer = stream.get_final_response()
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [event.delta for event in deltas] == PIECES
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events if event not in deltas] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"]
    assert (answer.output_text, answer.usage.total_tokens) == (HELLO, 10)


def test_a_parsed_response_is_a_pydantic_object(gpt: Any) -> None:
    assert gpt.responses.parse(model="scripted", input=WHO, text_format=Person).output_parsed == ADA
    with gpt.responses.stream(model="scripted", input=WHO, text_format=Person) as stream:
        assert stream.get_final_response().output_parsed == ADA


def test_an_image_in_a_response_reaches_the_cli(gpt: Any) -> None:
    parts = [{"type": "input_text", "text": "What is it?"},
             {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}]
    assert gpt.responses.create(model="claude", input=user(parts)).output_text == IMAGE


# ---- anthropic-python

def test_a_message_is_the_text_and_why_it_ended(claude: Any) -> None:
    answer = claude.messages.create(model="echo", max_tokens=99, messages=user(HELLO))
    assert [(block.type, block.text) for block in answer.content] == [("text", HELLO)]
    assert (answer.role, answer.stop_reason, answer.model) == ("assistant", "end_turn", "echo")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 5)


def test_the_stream_helper_tells_each_event_of_a_message(claude: Any) -> None:
    with claude.messages.stream(model="echo", max_tokens=99, messages=user(HELLO)) as stream:
        events = list(stream)
        answer = stream.get_final_message()
    assert [event.type for event in events] == [
        "message_start", "content_block_start", *["content_block_delta", "text"] * 4, "content_block_stop",
        "message_delta", "message_stop"]
    assert [event.text for event in events if event.type == "text"] == PIECES
    assert (answer.content[0].text, answer.stop_reason, answer.usage.input_tokens) == (HELLO, "end_turn", 5)


def test_tokens_are_counted_and_said_to_be_an_estimate(claude: Any) -> None:
    raw = claude.messages.with_raw_response.count_tokens(model="echo", messages=user(HELLO), system="Be brief.")
    assert (raw.parse().input_tokens, raw.headers["x-clinvk-estimate"]) == (8, "true")


def test_tokens_are_counted_of_a_request_with_a_schema(claude: Any) -> None:
    assert claude.messages.count_tokens(model="echo", messages=user(HELLO), output_format=Person).input_tokens >= 5


@pytest.mark.parametrize("does", ["json", "fenced"])
def test_a_parsed_message_is_a_pydantic_object(claude: Any, does: str) -> None:
    asked = {"model": "scripted", "max_tokens": 99, "messages": user(f"do:{does}"), "output_format": Person}
    assert claude.messages.parse(**asked).parsed_output == ADA
    assert claude.beta.messages.parse(**asked).parsed_output == ADA
    with claude.messages.stream(**asked) as stream:
        assert stream.get_final_message().parsed_output == ADA


def test_an_image_in_a_message_reaches_the_cli(claude: Any) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    answer = claude.messages.create(model="claude", max_tokens=99,
                                    messages=user([{"type": "text", "text": "What is it?"}, image]))
    assert answer.content[0].text == IMAGE


# ---- Failures, of both

Ask = Callable[[Tuple[Any, Any], str, str], Any]
WAYS: Dict[str, Ask] = {
    "chat": lambda sdks, model, prompt: sdks[0].chat.completions.create(model=model, messages=user(prompt)),
    "chat stream": lambda sdks, model, prompt: list(sdks[0].chat.completions.create(
        model=model, messages=user(prompt), stream=True)),
    "completion": lambda sdks, model, prompt: sdks[0].completions.create(model=model, prompt=prompt),
    "response": lambda sdks, model, prompt: sdks[0].responses.create(model=model, input=prompt),
    "response stream": lambda sdks, model, prompt: list(sdks[0].responses.create(
        model=model, input=prompt, stream=True)),
    "message": lambda sdks, model, prompt: sdks[1].messages.create(model=model, max_tokens=99, messages=user(prompt)),
    "message stream": lambda sdks, model, prompt: list(sdks[1].messages.create(
        model=model, max_tokens=99, messages=user(prompt), stream=True))}
every_way = pytest.mark.parametrize("way", WAYS)


def errors_of(way: str) -> Any:
    return anthropic if way.startswith("message") else openai


@every_way
def test_a_run_that_failed_is_an_error_of_the_server_and_not_repeated(sdks: Any, stage: Stage, way: str) -> None:
    with pytest.raises(errors_of(way).InternalServerError) as raised:
        WAYS[way](sdks, "scripted", f"do:fail as a {way}.")
    assert raised.value.status_code == 502
    assert "out of luck" in str(raised.value)
    assert stage.runs(f"do:fail as a {way}.") == 1


@every_way
def test_a_typo_in_the_models_name_is_not_found_and_costs_nothing(sdks: Any, stage: Stage, way: str) -> None:
    with pytest.raises(errors_of(way).NotFoundError, match=r'did you mean \\?"scripted\\?"'):
        WAYS[way](sdks, "skripted", f"do:repeat for a typo as a {way}.")
    assert stage.runs(f"do:repeat for a typo as a {way}.") == 0


either_sdk = pytest.mark.parametrize("way", ["chat", "message"])


@contextlib.contextmanager
def limited(pyz: Path, tmp_path: Path, rps: float) -> Iterator[Tuple[Any, Callable[[], List[str]]]]:
    """The SDKs of a server that lets one request through at once and then `rps` a second, and what it has answered."""
    limits = {"rate_limit_enabled": True, "rate_limit_rps": rps, "rate_limit_burst": 1}
    with staged(pyz, tmp_path, **limits) as stage, contextlib.ExitStack() as stack:
        yield (tuple(stack.enter_context(sdk) for sdk in opened(stage.url)),
               lambda: re.findall(r" POST \S+ (\d+) ", stage.served.stderr))


@either_sdk
def test_a_request_over_the_rate_limit_is_made_again_when_the_answer_says(pyz: Path, tmp_path: Path, way: str) -> None:
    # By itself an SDK waits half a second and a whole one, and then gives up.
    with limited(pyz, tmp_path, rps=0.2) as (sdks, statuses):
        for _ in range(2):
            WAYS[way](sdks, "echo", HELLO)
        eventually(lambda: statuses() == ["200", "429", "200"])


@either_sdk
def test_a_request_over_the_rate_limit_is_a_rate_limit_error(pyz: Path, tmp_path: Path, way: str) -> None:
    with limited(pyz, tmp_path, rps=0.001) as (sdks, statuses):
        sdks = tuple(sdk.with_options(max_retries=0) for sdk in sdks)
        WAYS[way](sdks, "echo", HELLO)
        with pytest.raises(errors_of(way).RateLimitError) as raised:
            WAYS[way](sdks, "echo", HELLO)
        eventually(lambda: statuses() == ["200", "429"])
    assert 900 < int(raised.value.response.headers["retry-after"]) <= 1000
