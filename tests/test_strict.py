"""What strict.py demands: good streams pass, also with the clients' own types, and nothing may be missing in them."""

import copy
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from strict import (Heard, Json, check_anthropic_stream, check_chat_stream, check_completion, check_message,
                    check_response, check_responses_stream, check_text_completion, check_text_stream)

COUNTS = {"input_tokens": 9, "output_tokens": 5, "total_tokens": 14,
          "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
          "output_tokens_details": {"reasoning_tokens": 1}}
CHAT_COUNTS = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14,
               "prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}}
ANTHROPIC_COUNTS = {"input_tokens": 9, "output_tokens": 5, "cache_read_input_tokens": 2,
                    "cache_creation_input_tokens": 0}


# ---- OpenAI: responses

def response(status: str, output: List[Json], usage: Any = None, **more: Any) -> Json:
    return {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": status, "output": output,
            "error": None, "incomplete_details": None, "usage": usage, "parallel_tool_calls": True,
            "tool_choice": "auto", "tools": [], **more}


def numbered(*events: Json) -> List[Json]:
    return [{"type": f"response.{event.pop('type')}", "sequence_number": number, **event}
            for number, event in enumerate(copy.deepcopy(events))]


def part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": []}


THOUGHT = {"id": "rs_1", "type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm, so."}]}
SAID = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part("Hello")]}
CALLED = {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": "call_1", "name": "weather",
          "arguments": '{"city": "Rome"}'}
RS, MSG, FC = ({"output_index": n, "item_id": item["id"]} for n, item in enumerate((THOUGHT, SAID, CALLED)))
SUMMARY, CONTENT = {**RS, "summary_index": 0}, {**MSG, "content_index": 0}
OPENED: List[Json] = [{"type": "created", "response": response("in_progress", [])},
                      {"type": "in_progress", "response": response("in_progress", [])}]
RESPONSES = numbered(
    *OPENED,
    {"type": "output_item.added", "output_index": 0, "item": {**THOUGHT, "summary": []}},
    {"type": "reasoning_summary_part.added", **SUMMARY, "part": {"type": "summary_text", "text": ""}},
    {"type": "reasoning_summary_text.delta", **SUMMARY, "delta": "Hm, "},
    {"type": "reasoning_summary_text.delta", **SUMMARY, "delta": "so."},
    {"type": "reasoning_summary_text.done", **SUMMARY, "text": "Hm, so."},
    {"type": "reasoning_summary_part.done", **SUMMARY, "part": THOUGHT["summary"][0]},
    {"type": "output_item.done", "output_index": 0, "item": THOUGHT},
    {"type": "output_item.added", "output_index": 1, "item": {**SAID, "status": "in_progress", "content": []}},
    {"type": "content_part.added", **CONTENT, "part": part("")},
    {"type": "output_text.delta", **CONTENT, "delta": "Hel", "logprobs": []},
    {"type": "output_text.delta", **CONTENT, "delta": "lo", "logprobs": []},
    {"type": "output_text.done", **CONTENT, "text": "Hello", "logprobs": []},
    {"type": "content_part.done", **CONTENT, "part": part("Hello")},
    {"type": "output_item.done", "output_index": 1, "item": SAID},
    {"type": "output_item.added", "output_index": 2, "item": {**CALLED, "status": "in_progress", "arguments": ""}},
    {"type": "function_call_arguments.delta", **FC, "delta": '{"city": '},
    {"type": "function_call_arguments.delta", **FC, "delta": '"Rome"}'},
    {"type": "function_call_arguments.done", **FC, "arguments": CALLED["arguments"], "name": "weather"},
    {"type": "output_item.done", "output_index": 2, "item": CALLED},
    {"type": "completed", "response": response("completed", [THOUGHT, SAID, CALLED], COUNTS)})
FAILED = numbered(*OPENED, {"type": "failed", "response": response(
    "failed", [], error={"code": "server_error", "message": "boom"})})
CUT = numbered(*OPENED, {"type": "incomplete", "response": response(
    "incomplete", [], COUNTS, incomplete_details={"reason": "max_output_tokens"})})


# ---- OpenAI: chat completions and completions

def chunk(*choices: Json, usage: Any = None) -> Json:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": list(choices), "usage": usage}


def delta(reason: Any = None, index: int = 0, **fields: Any) -> Json:
    return {"index": index, "delta": fields, "finish_reason": reason}


def call_delta(index: int, arguments: str, **first: Any) -> Json:
    call = {"index": index, "function": {"arguments": arguments, **({"name": "weather"} if first else {})}, **first}
    return delta(tool_calls=[call])


CHAT: List[Any] = [
    chunk(delta(role="assistant", reasoning_content="Hm")), chunk(delta(reasoning_content=".")),
    chunk(delta(content="Hel")), chunk(delta(content="lo")),
    chunk(call_delta(0, "", id="call_1", type="function")), chunk(call_delta(0, '{"city": ')),
    chunk(call_delta(0, '"Rome"}')), chunk(call_delta(1, "{}", id="call_2", type="function")),
    chunk(delta("tool_calls")), chunk(usage=CHAT_COUNTS), "[DONE]"]
CALLS = [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
         {"id": "call_2", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
COMPLETION = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "usage": CHAT_COUNTS,
    "choices": [{"index": 0, "finish_reason": "tool_calls", "logprobs": None, "message": {
        "role": "assistant", "content": "Hello", "refusal": None, "reasoning_content": "Hm.", "tool_calls": CALLS}}]}


def text_chunk(text: str, reason: Any = None) -> Json:
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m",
            "choices": [{"text": text, "index": 0, "finish_reason": reason, "logprobs": None}]}


TEXT: List[Any] = [text_chunk("Hel"), text_chunk("lo"), text_chunk("", "stop"),
                   {**text_chunk(""), "choices": [], "usage": CHAT_COUNTS}, "[DONE]"]
TEXT_COMPLETION = {**text_chunk("Hello", "stop"), "usage": CHAT_COUNTS}


# ---- Anthropic: messages

def block(index: int, kind: str, deltas: List[Json], **fields: Any) -> List[Json]:
    return [{"type": "content_block_start", "index": index, "content_block": {"type": kind, **fields}},
            *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": index}]


MESSAGE: Json = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "tool_use",
                 "stop_sequence": None, "usage": ANTHROPIC_COUNTS, "content": [
                     {"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "Hello"},
                     {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Rome"}}]}
MESSAGES = [
    {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}},
    *block(0, "thinking", [{"type": "thinking_delta", "thinking": "Hm."}, {"type": "signature_delta", "signature": ""}],
           thinking="", signature=""),
    *block(1, "text", [{"type": "text_delta", "text": "Hel"}, {"type": "text_delta", "text": "lo"}], text=""),
    *block(2, "tool_use", [{"type": "input_json_delta", "partial_json": '{"city": '},
                           {"type": "input_json_delta", "partial_json": '"Rome"}'}], id="call_1", name="weather",
           input={}),
    {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": ANTHROPIC_COUNTS},
    {"type": "message_stop"}]


# ---- The tests

def chat(data: List[Any]) -> List[Heard]:
    return check_chat_stream(data, include_usage=True)


def text(data: List[Any]) -> List[Heard]:
    return check_text_stream(data, include_usage=True)


STREAMS: List[Tuple[Callable[[List[Any]], List[Heard]], List[Any], Callable[[Any], List[Heard]], Any]] = [
    (chat, CHAT, check_completion, COMPLETION), (text, TEXT, check_text_completion, TEXT_COMPLETION),
    (check_responses_stream, RESPONSES, check_response, RESPONSES[-1]["response"]),
    (check_anthropic_stream, MESSAGES, check_message, MESSAGE)]
EACH = pytest.mark.parametrize("check, good, check_whole, whole", STREAMS,
                               ids=["chat", "completions", "responses", "messages"])
REFUSED = (AssertionError, LookupError, TypeError, ValueError)


@EACH
def test_a_good_stream_says_what_the_whole_answer_says(check: Any, good: List[Any], check_whole: Any,
                                                       whole: Any) -> None:
    [heard] = check(good)
    assert [heard] == check_whole(whole) and heard.text == "Hello" and heard.reason and heard.failed is None


def fields(value: Any) -> Iterator[Dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from fields(inner)


def spoiled(good: Any) -> Iterator[Any]:
    """Copies of an answer, each without one of its fields."""
    for number, value in enumerate(list(fields(good))):
        for name in value:
            if name not in ("logprobs", "name", "city") or value.get("type") == "function_call":
                copied = copy.deepcopy(good)
                del list(fields(copied))[number][name]
                yield copied


@EACH
def test_no_field_may_be_missing(check: Any, good: List[Any], check_whole: Any, whole: Any) -> None:
    heard = check(good)
    for stream in spoiled(good):
        with pytest.raises(REFUSED):
            assert check(stream) == heard
    for answer in spoiled(whole):
        with pytest.raises(REFUSED):
            assert check_whole(answer) == heard


@EACH
def test_no_event_may_be_missing_or_out_of_order(check: Any, good: List[Any], check_whole: Any, whole: Any) -> None:
    heard = check(good)
    for number in range(len(good)):
        swapped = good[:number] + good[number:number + 2][::-1] + good[number + 2:]
        can_swap = check is chat and number in (1, 3)  # deltas of different kinds
        for stream in (good[:number] + good[number + 1:], [] if can_swap or swapped == good else swapped):
            if check is check_responses_stream:  # so that the numbers alone do not tell
                stream = [{**event, "sequence_number": count} for count, event in enumerate(stream)]
            with pytest.raises(REFUSED):
                assert check(stream) == heard


def test_a_response_can_fail_or_be_cut() -> None:
    assert check_responses_stream(FAILED)[0].failed == "boom"
    assert check_responses_stream(CUT)[0].reason == "max_output_tokens"


def test_openai_pythons_types_take_what_strict_clients_take() -> None:
    chat_types = pytest.importorskip("openai.types.chat")
    types, responses = pytest.importorskip("openai.types"), pytest.importorskip("openai.types.responses")
    pydantic = pytest.importorskip("pydantic")
    event_type = pydantic.TypeAdapter(responses.ResponseStreamEvent)
    for event in [*RESPONSES, *FAILED, *CUT]:
        event_type.validate_python(event)
    responses.Response.model_validate(RESPONSES[-1]["response"])
    chat_types.ChatCompletion.model_validate(COMPLETION)
    types.Completion.model_validate(TEXT_COMPLETION)
    for found in CHAT[:-1]:
        chat_types.ChatCompletionChunk.model_validate(found)
