"""OpenAI's responses: whole and streamed, from events; what their input becomes; and how failures look to clients that
repeat a request whatever it says."""

import itertools
import json
import time
import tracemalloc
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import clinvk
import pytest
from clinvk import (Asked, BackendAuth, BackendFailed, Done, Event, Failure, Init, Message, Progress, Refusal,
                    ResponsesRequest, Thinking, TokenUsage, ToolResult, ToolUse, Usage)
from conftest import Client, Reply, collect, fault, told

Json = Dict[str, Any]
PATH, CHAT = "/openai/v1/responses", "/openai/v1/chat/completions"
INSIDE = Usage(101, 12, 40, 3, 7)
PLAIN: List[Event] = [Init("opus"), Message("Hel", opens=True), Message("lo"), TokenUsage(INSIDE), Done(0)]
THOUGHT: List[Event] = [Thinking("Let me "), Thinking("think."), Message("Yes.", opens=True), Done(0)]
AGENT: List[Event] = [Message("I will ", opens=True), Message("look."), ToolUse("t", "Bash", {}),
                      ToolResult("t", "Bash", "hi"), Thinking("hm"), Message("Do", opens=True), Message("ne."), Done(0)]
REFUSED: List[Event] = [Thinking("hm"), Refusal("No."), TokenUsage(INSIDE), Done(0)]
CUT: List[Event] = [Thinking("hm"), Message("Hel", opens=True), Done(0, stop="length")]
NOTHING: List[Event] = [Done(0)]
ODD: List[Event] = [Message("\u2028 \U0001f680\x85 \ud83d", opens=True), Done(0)]
RUNS = [PLAIN, THOUGHT, AGENT, REFUSED, CUT, NOTHING, ODD, [Thinking("hm"), Done(0)]]

RESPONSE: Json = {
    "object": "response", "model": "claude/opus", "background": False, "instructions": None, "max_output_tokens": None,
    "metadata": {}, "parallel_tool_calls": True, "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None}, "store": False, "temperature": None,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None, "truncation": "disabled",
    "error": None, "incomplete_details": None}
USAGE: Json = {"input_tokens": 101, "input_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 3},
               "output_tokens": 12,
               "output_tokens_details": {"reasoning_tokens": 7}, "total_tokens": 113}


def text_part(text: str) -> Json:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def message(status: str, *parts: Json) -> Json:
    return {"id": "msg", "type": "message", "role": "assistant", "status": status, "content": [*parts]}


def thought(status: str, *texts: str) -> Json:
    return {"id": "rs", "type": "reasoning", "status": status,
            "summary": [{"type": "summary_text", "text": text} for text in texts]}


def plain(value: Any) -> Any:
    """With ids that are the same each time, and without the time."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    ids = {name: text.partition("_")[0] for name, text in value.items() if name in ("id", "item_id")}
    return {name: ids.get(name) or plain(item) for name, item in value.items()
            if name not in ("created_at", "completed_at")}


def renderer(characters: int = 0, **own: Any) -> clinvk.Responses:
    return clinvk.Responses(Asked("claude/opus", characters), **own)


def whole(events: Sequence[Event], **asked: Any) -> Json:
    answer: Json = json.loads(b"".join(renderer(**asked).whole([collect(iter(events))])))
    return answer


def sent(events: Sequence[Event], **asked: Any) -> bytes:
    return b"".join(renderer(**asked).stream(told(events)))


def streamed(events: Sequence[Event], **asked: Any) -> List[Json]:
    """The events of a stream, each of which must have its type and its number."""
    found = []
    *parts, end = sent(events, **asked).decode("utf-8", "surrogatepass").split("\n\n")
    for part in parts:
        head, data = part.split("\n")
        found.append(json.loads(data[len("data: "):]))
        assert head == "event: " + found[-1]["type"]
    assert end == "" and [event.pop("sequence_number") for event in found] == [*range(len(found))]
    return found


# ---- Whole

def test_a_whole_answer_is_a_response() -> None:
    answer = whole(PLAIN)
    assert answer["id"].startswith("resp_") and answer["output"][0]["id"].startswith("msg_")
    assert all(isinstance(answer[name], int) and abs(answer[name] - time.time()) < 60
               for name in ("created_at", "completed_at"))
    assert plain(answer) == {"id": "resp", **RESPONSE, "status": "completed", "usage": USAGE,
                             "output": [message("completed", text_part("Hello"))]}


@pytest.mark.parametrize("events, output", [
    (THOUGHT, [thought("completed", "Let me think."), message("completed", text_part("Yes."))]),
    (AGENT, [thought("completed", "hm"), message("completed", text_part("I will look.\n\nDone."))]),
    (REFUSED, [thought("completed", "hm"), message("completed", {"type": "refusal", "refusal": "No."})]),
    (CUT, [thought("completed", "hm"), message("incomplete", text_part("Hel"))]),
    (NOTHING, [message("completed", text_part(""))])])
def test_each_kind_of_output_is_an_item_of_a_whole_answer(events: List[Event], output: List[Json]) -> None:
    assert plain(whole(events)["output"]) == output


@pytest.mark.parametrize("stop, status, details", [
    ("end", "completed", None), ("sequence", "completed", None),
    ("length", "incomplete", {"reason": "max_output_tokens"})])
def test_the_status_says_whether_the_answer_is_whole(stop: str, status: str, details: Any) -> None:
    events: List[Event] = [Message("Hel", opens=True), Done(0, stop=stop)]
    for answer in (whole(events), streamed(events)[-1]["response"]):
        assert (answer["status"], answer["incomplete_details"], answer["error"]) == (status, details, None)
        assert answer["output"][0]["status"] == status
    assert streamed(events)[-1]["type"] == f"response.{status}"


def test_the_answer_repeats_what_it_was_asked() -> None:
    asked = clinvk.check(ResponsesRequest, {
        "model": "claude", "input": "hi", "instructions": "Be brief.", "max_output_tokens": 9, "metadata": {"a": "b"},
        "tool_choice": "none", "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}}})
    repeated = {"instructions": "Be brief.", "max_output_tokens": 9, "metadata": {"a": "b"}, "tool_choice": "none",
                "reasoning": {"effort": "low", "summary": "auto"},
                "text": {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}}}
    for response in (whole(PLAIN, repeated=asked.repeated), streamed(PLAIN, repeated=asked.repeated)[0]["response"]):
        assert {name: response[name] for name in repeated} == repeated
    nothing = clinvk.check(ResponsesRequest, {"model": "claude", "input": "hi"}).repeated
    assert {**RESPONSE, **nothing} == RESPONSE


# ---- Streamed

def test_a_stream_tells_the_response_then_the_item_its_part_and_its_text_and_closes_them() -> None:
    begun = {"id": "resp", **RESPONSE, "status": "in_progress", "usage": None, "output": []}
    place = {"item_id": "msg", "output_index": 0, "content_index": 0}
    assert plain(streamed(PLAIN)) == [
        {"type": "response.created", "response": begun}, {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": message("in_progress")},
        {"type": "response.content_part.added", **place, "part": text_part("")},
        {"type": "response.output_text.delta", **place, "delta": "Hel", "logprobs": []},
        {"type": "response.output_text.delta", **place, "delta": "lo", "logprobs": []},
        {"type": "response.output_text.done", **place, "text": "Hello", "logprobs": []},
        {"type": "response.content_part.done", **place, "part": text_part("Hello")},
        {"type": "response.output_item.done", "output_index": 0, "item": message("completed", text_part("Hello"))},
        {"type": "response.completed", "response": {
            **begun, "status": "completed", "usage": USAGE, "output": [message("completed", text_part("Hello"))]}}]


def test_thinking_is_an_item_before_and_between_the_texts() -> None:
    place = {"item_id": "rs", "output_index": 0, "summary_index": 0}
    events = plain(streamed(THOUGHT))
    assert events[2:9] == [
        {"type": "response.output_item.added", "output_index": 0, "item": thought("in_progress")},
        {"type": "response.reasoning_summary_part.added", **place, "part": {"type": "summary_text", "text": ""}},
        {"type": "response.reasoning_summary_text.delta", **place, "delta": "Let me "},
        {"type": "response.reasoning_summary_text.delta", **place, "delta": "think."},
        {"type": "response.reasoning_summary_text.done", **place, "text": "Let me think."},
        {"type": "response.reasoning_summary_part.done", **place,
         "part": {"type": "summary_text", "text": "Let me think."}},
        {"type": "response.output_item.done", "output_index": 0, "item": thought("completed", "Let me think.")}]
    assert [event.get("output_index") for event in events[9:-1]] == [1] * 6
    assert [item["type"] for item in streamed(AGENT)[-1]["response"]["output"]] == ["message", "reasoning", "message"]


def test_a_refusal_is_a_part_of_its_own() -> None:
    place, part = {"item_id": "msg", "output_index": 1, "content_index": 0}, {"type": "refusal", "refusal": "No."}
    assert plain(streamed(REFUSED))[-7:-1] == [
        {"type": "response.output_item.added", "output_index": 1, "item": message("in_progress")},
        {"type": "response.content_part.added", **place, "part": {"type": "refusal", "refusal": ""}},
        {"type": "response.refusal.delta", **place, "delta": "No."},
        {"type": "response.refusal.done", **place, "refusal": "No."},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": 1, "item": message("completed", part)}]


@pytest.mark.parametrize("events", RUNS)
def test_every_item_is_opened_filled_and_closed_before_the_next_and_is_in_the_last_event(events: List[Event]) -> None:
    told = streamed(events)[2:]
    last, told = told[-1], told[:-1]
    items = last["response"]["output"]
    assert len({item["id"] for item in items}) == len(items)
    for index, item in enumerate(items):
        own = [event for event in told if event["output_index"] == index]
        kinds = [event["type"].rpartition(".") for event in own]
        assert own == told[:len(own)] and (kinds[0][2], kinds[1][2]) == ("added", "added")
        assert [kind for _, _, kind in kinds[-3:]] == ["done"] * 3 and {kind for _, _, kind in kinds[2:-3]} == {"delta"}
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]} and own[-1]["item"] == item
        text = "".join(event["delta"] for event in own[2:-3])
        [part] = item.get("content") or item["summary"]
        assert own[-2]["part"] == part and text == part.get("text", part.get("refusal"))
        assert own[-3].get("text", own[-3].get("refusal")) == text
        told = told[len(own):]
    assert told == []


@pytest.mark.parametrize("events", RUNS)
def test_a_stream_says_what_a_whole_answer_says(events: List[Event]) -> None:
    def said(response: Json) -> Tuple[Any, ...]:
        parts = {kind: [part for item in response["output"] for part in item.get(kind) or ()]
                 for kind in ("content", "summary")}
        texts = {(kind, name): "".join(part.get(name, "") for part in found) for kind, found in parts.items()
                 for name in ("text", "refusal")}
        return (texts, response["status"], response["usage"])
    assert said(streamed(events, characters=12)[-1]["response"]) == said(whole(events, characters=12))


def test_silence_is_an_event_with_the_next_number() -> None:
    silence = Progress("waiting", "no output")
    kinds = [event["type"].rpartition(".")[2] for event in streamed([silence, *PLAIN[:2], silence, *PLAIN[2:]])]
    assert kinds == ["created", "in_progress", "in_progress", "added", "added", "delta", "in_progress", "delta", "done",
                     "done", "done", "completed"]


@pytest.mark.parametrize("asked, code", [({}, "backend_failed"), ({"final_code": "invalid_prompt"}, "invalid_prompt")])
def test_a_failure_in_mid_stream_is_a_failed_response_and_the_end(asked: Json, code: str) -> None:
    error = BackendFailed("boom")
    error.details = "stderr says"
    events = streamed([Message("Hel", opens=True), Failure(error), Done(1)], **asked)
    assert [event["type"] for event in events[-2:]] == ["response.output_text.delta", "response.failed"]
    assert plain(events[-1]["response"]) == {
        "id": "resp", **RESPONSE, "status": "failed", "usage": None, "output": [],
        "error": {"type": "api_error", "code": code, "message": "boom\nstderr says"}}


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d", "half \ud83d", "line\r\nend\n\n", "event: x\n\n"])
def test_no_text_breaks_the_stream_into_other_lines(text: str) -> None:
    lines = sent([Message(text, opens=True), Done(0)]).decode("utf-8", "surrogatepass").splitlines()
    assert all(line == "" or line.startswith(("data: {", "event: response.")) for line in lines)
    assert text in [json.loads(line[6:]).get("delta") for line in lines if line.startswith("data: ")]


def test_an_answer_of_ten_megabytes_is_held_as_it_came_and_in_one_event_at_a_time() -> None:
    size, piece = 10_000_000, 2000
    for streams in (False, True):
        tracemalloc.start()
        renderer = clinvk.Responses(Asked("m"))
        events: Any = itertools.chain((Message(chr(97 + n % 26) * piece, opens=not n) for n in range(size // piece)),
                                      [Done(0)])
        blocks: Any = renderer.stream(told(events)) if streams else renderer.whole([collect(events)])
        length = sum(map(len, blocks))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (length // size, peak < 3 * size) == (5 if streams else 1, True), peak


# ---- What openai-python makes of it

def openai_client(body: bytes, content_type: str) -> Any:
    """A real client, whose server answers with `body`."""
    openai, http = pytest.importorskip("openai"), pytest.importorskip("httpx2")

    def answer(request: Any) -> Any:
        return http.Response(200, content=body, headers={"Content-Type": content_type})
    return openai.OpenAI(api_key="k", base_url="http://localhost/openai/v1",
                         http_client=http.Client(transport=http.MockTransport(answer)))


QUESTION: Json = {"model": "claude/opus", "input": "hello"}


@pytest.mark.parametrize("events", RUNS[:-2])
def test_openai_python_reads_a_whole_answer_and_gathers_the_same_from_a_stream(events: List[Event]) -> None:
    body = b"".join(clinvk.Responses(Asked("claude/opus")).whole([collect(iter(events))]))
    answer = openai_client(body, "application/json").responses.create(**QUESTION)
    type(answer).model_validate(json.loads(body), strict=True)  # as create() does not
    with openai_client(sent([Progress("", ""), *events]), "text/event-stream").responses.stream(**QUESTION) as stream:
        for event in stream:
            type(event).model_validate(event.to_dict(warnings=False))
            last = event
    assert last.response.output_text == answer.output_text and last.response.status == answer.status


def test_openai_python_is_told_of_a_failure() -> None:
    events: List[Event] = [Message("Hel", opens=True), Failure(BackendFailed("boom")), Done(1)]
    *_, last = openai_client(sent(events), "text/event-stream").responses.create(**QUESTION, stream=True)
    assert (last.type, last.response.status, last.response.error.message) == ("response.failed", "failed", "boom")


# ---- What the input becomes

@pytest.fixture
def config(make_client: Callable[..., Client]) -> clinvk.Config:
    return make_client().server.config


def asked_of(config: clinvk.Config, **body: Any) -> clinvk.PromptRequest:
    request = clinvk.check(ResponsesRequest, {"model": "claude", **body})
    [asked] = request.to_prompts(config)
    return asked


def user(content: Any) -> Json:
    return {"type": "message", "role": "user", "content": content}


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
IMAGE = {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "auto"}
ITEMS: Dict[str, Tuple[Json, str]] = {  # what an item becomes in a transcript
    "call": ({"type": "function_call", "id": "fc", "call_id": "c1", "name": "get", "arguments": '{"a": 1}'},
             '<tool_call id="c1" name="get">{"a": 1}</tool_call>'),
    "call in a namespace": ({"type": "function_call", "call_id": "c1", "namespace": "mcp", "name": "get",
                             "arguments": "{}"}, '<tool_call id="c1" name="mcp.get">{}</tool_call>'),
    "call in free form": ({"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin"},
                          '<tool_call id="c1" name="apply_patch">*** Begin</tool_call>'),
    "call of a shell": ({"type": "local_shell_call", "call_id": "c1", "action": {"command": ["ls"]}, "status": "x"},
                        '<tool_call id="c1" name="local_shell_call">{"command": ["ls"]}</tool_call>'),
    "result": ({"type": "function_call_output", "call_id": "c1", "output": "21 degrees"},
               '<tool_result id="c1">21 degrees</tool_result>'),
    "result in parts": ({"type": "function_call_output", "call_id": "c1", "output": [
        {"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        '<tool_result id="c1">one\ntwo</tool_result>'),
    "result in free form": ({"type": "custom_tool_call_output", "call_id": "c1", "output": "Done!"},
                            '<tool_result id="c1">Done!</tool_result>'),
    "result that is JSON": ({"type": "function_call_output", "call_id": "c1", "output": {"a": 1}},
                            '<tool_result id="c1">{"a": 1}</tool_result>'),
    "answer": ({"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [
        {"type": "output_text", "text": "Hello.", "annotations": []}]}, '<turn role="assistant">\nHello.\n</turn>'),
    "refusal": ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                '<turn role="assistant">\nNo.\n</turn>'),
    "no type": ({"role": "user", "content": "And this?"}, '<turn role="user">\nAnd this?\n</turn>'),
    "null type": ({"type": None, "role": "user", "content": "And this?", "id": None}, "And this?")}


@pytest.mark.parametrize("name", ITEMS)
def test_an_item_is_a_part_of_the_transcript(config: clinvk.Config, name: str) -> None:
    item, shown = ITEMS[name]
    asked = asked_of(config, input=[user("hi"), item, user("go on")])
    assert shown in asked.prompt and asked.prompt.endswith("all that follows:\n\ngo on")


def test_one_message_is_the_prompt_as_it_stands(config: clinvk.Config) -> None:
    for given in (" /cost ", [{"role": "user", "content": " /cost "}],
                  [user([{"type": "input_text", "text": " /cost "}])]):
        assert asked_of(config, input=given).prompt == " /cost "


def test_the_images_of_messages_and_of_results_are_shown_in_their_places(config: clinvk.Config) -> None:
    result = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "seen"}, IMAGE]}
    asked = asked_of(config, input=[user([{"type": "input_text", "text": "look"}, IMAGE]), ITEMS["call"][0], result])
    image = clinvk.Image("image/png", PNG)
    at = [part._replace(at=0) if isinstance(part, clinvk.Image) else part for part in asked.parts]
    assert [part for part in at if not isinstance(part, str)] == [image, image]
    first, second = (at.index(image), len(at) - 1 - at[::-1].index(image))
    assert str(at[first - 1]).endswith("look") and str(at[second - 1]).endswith("seen</tool_result>")


def test_thinking_and_further_tools_are_left_out(config: clinvk.Config) -> None:
    silent = [{"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "secret"}],
               "content": None, "encrypted_content": "secret"},
              {"type": "additional_tools", "role": "developer", "tools": [{"type": "namespace", "name": "secret"}]}]
    asked = asked_of(config, input=[silent[1], user("hi"), silent[0]])
    assert (asked.prompt, asked.system_prompt) == ("hi", None)


def test_instructions_and_system_and_developer_messages_are_the_system_prompt(config: clinvk.Config) -> None:
    asked = asked_of(config, instructions="one", input=[
        {"role": "developer", "content": "two"}, user("hi"),
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "three"}]}])
    assert (asked.prompt, asked.system_prompt) == ("hi", "one\ntwo\nthree")


def test_what_the_assistant_said_and_called_is_one_turn(config: clinvk.Config) -> None:
    answer = {"role": "assistant", "content": "I look."}
    empty = {"role": "assistant", "content": []}
    prompt = asked_of(config, input=[user("hi"), answer, empty, *[ITEMS["call"][0]] * 2, ITEMS["result"][0]]).prompt
    call = ITEMS["call"][1]
    assert prompt.count('<turn role="assistant">') == 2 and f"{call}\n{call}\n</turn>" in prompt


def test_null_means_absent(config: clinvk.Config) -> None:
    fields = dict.fromkeys(["instructions", "stream", "max_output_tokens", "reasoning", "text", "tools", "tool_choice",
                            "previous_response_id", "conversation", "background", "metadata", "user", "clinvk",
                            "stream_options", "parallel_tool_calls", "temperature"])
    assert asked_of(config, input="hi", **fields) == asked_of(config, input="hi")
    assert asked_of(config, input="hi", reasoning={"effort": None, "summary": None}, text={"format": None}) == \
        asked_of(config, input="hi")


def test_what_is_asked_for_is_in_the_run(config: clinvk.Config) -> None:
    asked = asked_of(config, model="codex/gpt-x", input="hi", reasoning={"effort": "high"}, max_output_tokens=7,
                     text={"format": {"type": "json_object"}})
    assert (asked.backend, asked.model, asked.effort, asked.max_tokens, asked.schema) == (
        "codex", "gpt-x", "high", 7, {"type": "object"})


@pytest.mark.parametrize("fields, place, told", [
    ({"input": None}, "input", "is required"), ({"input": []}, "input", "must not be empty"),
    ({"input": 1}, "input", "must be a string or a list"), ({"input": "  "}, "input", "have no text"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", '"item_reference" is not supported'),
    ({"input": [user("hi"), {"type": "computer_call"}]}, "input[1].type", "message, function_call"),
    ({"input": [user([{"type": "input_file", "file_id": "f"}])]}, "input[0].content[0].type", '"input_file" is not'),
    ({"input": [user([{"type": "input_audio"}])]}, "input[0].content[0].type", "input_text"),
    ({"input": [user([{"type": "input_image", "image_url": "https://x/y.png"}])]}, "input[0].content[0].image_url",
     "fetches nothing"),
    ({"input": [user([{"type": "input_image", "file_id": "f"}])]}, "input[0].content[0].image_url", "is required"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "system, developer, user, assistant"),
    ({"input": [{"role": "user"}]}, "input[0].content", "is required"),
    ({"input": [{"role": "system", "content": "x"}]}, "input", "a message of the user"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole input"),
    ({"conversation": "conv_1"}, "conversation", "send the whole input"),
    ({"background": True}, "background", "stores no responses"),
    ({"tool_choice": "required", "tools": [{}]}, "tool_choice", "yet"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1")])
def test_what_can_not_be_done_is_a_400_that_names_it(client: Client, fields: Json, place: str, told: str) -> None:
    reply = client.call("POST", PATH, {"model": "echo", "input": "hi", **fields})
    assert reply.status == 400 and told in fault(reply, "openai")
    assert reply.json["error"]["param"] == place


def test_unknown_fields_are_named(client: Client) -> None:
    reply = client.call("POST", PATH, {"model": "echo", "input": "hi", "store": True, "include": ["x"], "truncation": 1,
                                       "prompt_cache_key": "k", "tools": [{"type": "web_search"}], "n": 2})
    assert reply.status == 200 and set(reply.headers["x-clinvk-ignored"].split(", ")) == {
        "store", "include", "truncation", "prompt_cache_key", "tools", "n"}


# ---- Where it answers

@pytest.mark.parametrize("path", [PATH, "/v1/responses", PATH + "?x=1"])
def test_it_answers_whole_and_streamed(client: Client, path: str) -> None:
    reply = client.call("POST", path, {"model": "echo", "input": "one two", "instructions": "Be brief."})
    assert reply.json["output"][0]["content"][0]["text"] == "one two" and reply.headers["x-clinvk-backend"] == "echo"
    assert (reply.json["instructions"], reply.json["model"]) == ("Be brief.", "echo")
    stream = client.call("POST", path, {"model": "echo", "input": "one two", "stream": True})
    assert stream.headers["content-type"] == "text/event-stream" and stream.headers["cache-control"] == "no-cache"
    assert [event["delta"] for event in stream.data if event["type"].endswith(".delta")] == ["one ", "two"]
    assert stream.data[-1]["response"]["output"][0]["content"][0]["text"] == "one two"


CURSORS: Json = {"model": "echo", "input": [{"role": "system", "content": "You are in an editor."},
                                            {"role": "user", "content": [{"type": "input_text", "text": "one two"}]}],
                 "tools": [{"type": "function", "name": "read", "parameters": {}}, {"type": "custom", "name": "patch"}],
                 "include": ["reasoning.encrypted_content"], "store": False, "text": {"verbosity": "low"},
                 "reasoning": {"effort": "medium"}, "user": "u", "metadata": {}}


@pytest.mark.parametrize("path", [CHAT, "/v1/chat/completions"])
def test_the_body_of_a_response_is_answered_as_a_chat_completion_where_one_is_asked_for(client: Client,
                                                                                        path: str) -> None:
    reply = client.call("POST", path, CURSORS)
    assert reply.json["object"] == "chat.completion" and reply.json["choices"][0]["message"]["content"] == "one two"
    for messages in ({}, {"messages": None}):
        stream = client.call("POST", path, {**CURSORS, **messages, "stream": True,
                                            "stream_options": {"include_usage": True}}).data
        assert {chunk["object"] for chunk in stream[:-1]} == {"chat.completion.chunk"} and stream[-1] == "[DONE]"
        assert [chunk["choices"][0]["delta"].get("content") for chunk in stream[:-2]] == ["", "one ", "two", None]
        assert (stream[-2]["choices"], stream[-2]["usage"]["total_tokens"] > 0) == ([], True)


@pytest.mark.parametrize("body, place", [
    ({"model": "echo"}, "messages"), ({"model": "echo", "input": None}, "messages"),
    ({"model": "echo", "input": [{"type": "item_reference"}]}, "input[0].type"),
    ({"model": "echo", "input": "hi", "messages": []}, "messages"),
    ({"model": "echo", "input": "hi", "previous_response_id": "x"}, "previous_response_id")])
def test_a_fault_there_is_named_in_the_body_that_came(client: Client, body: Json, place: str) -> None:
    reply = client.call("POST", CHAT, body)
    assert reply.status == 400 and fault(reply, "openai") and reply.json["error"]["param"] == place


# ---- Clients that repeat what must not be repeated

AI_SDK = "ai/6.0.1 ai-sdk/openai/3.0.1 runtime/node.js/22"
BODIES: Dict[str, Json] = {PATH: {"input": "hi"}, CHAT: {"messages": [{"role": "user", "content": "hi"}]},
                           "/openai/v1/completions": {"prompt": "hi"}}
CODEX = {"originator": "codex_exec", "x_codex_turn_metadata": "{}"}
WHO: List[Tuple[Dict[str, str], int, Optional[str]]] = [
    (CODEX, 400, "invalid_prompt"), ({**CODEX, "originator": "an-editor"}, 400, "invalid_prompt"),
    ({"user_agent": AI_SDK}, 424, "backend_failed"), ({"user_agent": "OpenAI/Python 3"}, 502, "backend_failed"),
    ({"originator": "somebody"}, 502, "backend_failed"), ({}, 502, "backend_failed")]


@pytest.fixture
def failing(make_client: Callable[..., Client], fake_cli: Callable[..., str]) -> Client:
    """Backends that fail: `mine` before it has said anything, `late` after that; and `gemini`, which is off."""
    before = fake_cli("sys.stdin.read(); sys.exit('it broke')", "mine")
    after = fake_cli("print('Hel', flush=True); time.sleep(0.3); sys.exit('it broke')", "late")
    return make_client({"backends": {"mine": {"command": before}, "late": {"command": after},
                                     "gemini": {"enabled": False}}})


@pytest.mark.parametrize("headers, status, code", WHO)
@pytest.mark.parametrize("path", BODIES)
def test_a_failed_run_is_an_error_that_its_client_does_not_repeat(failing: Client, path: str, headers: Dict[str, str],
                                                                  status: int, code: Optional[str]) -> None:
    for stream in (False, True):
        reply = failing.call("POST", path, {"model": "mine", "stream": stream, **BODIES[path]}, **headers)
        assert (reply.status, reply.headers["x-should-retry"]) == (status, "false")
        assert "it broke" in fault(reply, "openai", ("api_error", code))


@pytest.mark.parametrize("headers, status, code", WHO)
def test_a_run_that_fails_in_mid_stream_is_a_failed_response_with_that_code(failing: Client, headers: Dict[str, str],
                                                                            status: int, code: Optional[str]) -> None:
    reply = failing.call("POST", PATH, {"model": "late", "input": "hi", "stream": True}, **headers)
    last = reply.data[-1]
    error = last["response"]["error"]
    assert (reply.status, last["type"], error["code"]) == (200, "response.failed", code)
    assert "it broke" in error["message"]


@pytest.mark.parametrize("headers", [who[0] for who in WHO])
def test_an_error_before_any_run_is_as_ever(failing: Client, headers: Dict[str, str]) -> None:
    unknown = failing.call("POST", PATH, {"model": "nobody", "input": "hi"}, **headers)
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")
    wrong = failing.call("POST", PATH, {"model": "mine"}, **headers)
    assert (wrong.status, wrong.json["error"]["code"]) == (400, None)
    off = failing.call("POST", PATH, {"model": "gemini", "input": "hi"}, **headers)
    assert (off.status, off.json["error"]["code"]) == (503, "backend_unavailable")
    assert not any("x-should-retry" in reply.headers for reply in (unknown, wrong, off))


@pytest.mark.parametrize("path, body", [
    ("/anthropic/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]})])
def test_a_failed_message_keeps_its_shape(failing: Client, path: str, body: Json) -> None:
    reply: Reply = failing.call("POST", path, {"model": "mine", **body}, user_agent=AI_SDK)
    assert reply.status == 424 and "it broke" in fault(reply, "anthropic", (None, None, "api_error"))


def test_a_login_that_is_missing_is_final_for_codex_and_a_401_for_others(
        make_client: Callable[..., Client], fake_cli: Callable[..., str]) -> None:
    cli = fake_cli("sys.exit('Please run /login')", "claude")
    client = make_client({"backends": {"claude": {"command": cli}}, "server": {"spares": 0}})
    for headers, status in ((CODEX, 400), ({"user_agent": AI_SDK}, 401), ({}, 401)):
        reply = client.call("POST", PATH, {"model": "claude", "input": "hi"}, **headers)
        assert (reply.status, reply.json["error"]["type"]) == (status, BackendAuth.openai[0])
