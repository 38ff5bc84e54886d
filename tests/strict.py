"""What the strictest clients demand of an answer, as functions that assert all of it: Zed's parsers, the types of
openai-python and openai-node, the schemas of the Vercel AI SDK, the accumulators of the SDKs' helpers, codex.

Each is given an answer of one API, whole or as the parsed data of a stream's events, and gives what a client hears in
it: the same for a stream as for a whole answer, once a stream's pieces are put together."""

import json
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

Json = Dict[str, Any]
Counts = Tuple[Tuple[str, int], ...]
NOTHING = type(None)


class Heard(NamedTuple):
    """One answer. `calls` are the client's tools that are called: id, name, arguments. `failed` is the message of the
    error that ends a stream."""
    text: str = ""
    thoughts: str = ""
    refusal: str = ""
    calls: Tuple[Tuple[str, str, str], ...] = ()
    reason: Optional[str] = None
    usage: Counts = ()
    failed: Optional[str] = None


def typed(value: Any, required: Json, optional: Optional[Json] = None) -> Json:
    """`value` is an object of these fields and no others; a field is a value, a type or several, and bool is no int."""
    assert isinstance(value, dict), value
    fields = {**required, **(optional or {})}
    assert required.keys() <= value.keys() <= fields.keys(), (set(value) ^ set(required), value)
    for name in value:
        assert fits(value[name], fields[name]), (name, value)
    return value


def fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, type):
        return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return type(value) is type(kind) and bool(value == kind)


def counts(usage: Any, *names: str, **details: Tuple[str, ...]) -> Counts:
    """Token counts, flat: integers that are not negative."""
    typed(usage, {**dict.fromkeys(names, int), **dict.fromkeys(details, dict)})
    flat = [(name, usage[name]) for name in names]
    for group, within in details.items():
        typed(usage[group], dict.fromkeys(within, int))
        flat += [(name, usage[group][name]) for name in within]
    assert all(count >= 0 for _, count in flat), usage
    return tuple(flat)


# ---- Server-sent events

def data_of(body: bytes) -> List[Any]:
    """The data of a stream without event names, as OpenAI's chat completions are. `[DONE]` stays as it is, comments are
    left out."""
    found = []
    for name, data in server_sent(body):
        assert not name, name
        found += [data] if data is not None else []
    return found


def events_of(body: bytes) -> List[Json]:
    """The data of a stream of named events, as Anthropic's messages and OpenAI's responses are: the name is the
    data's type. There are no comments, as clients wait for events."""
    found = []
    for name, data in server_sent(body):
        assert isinstance(data, dict) and data["type"] == name, (name, data)
        found.append(data)
    return found


def server_sent(body: bytes) -> Iterable[Tuple[str, Any]]:
    """Name and data of each event, None for a comment. Lines end with a newline only; data is one line of JSON, or
    `[DONE]`."""
    *blocks, end = body.decode().split("\n\n")
    assert end == "", "the last event is not complete"
    for block in blocks:
        name, data = "", []
        for line in block.split("\n"):
            assert "\r" not in line, line
            if line.startswith("event: "):
                assert not name and not data, block
                name = line[len("event: "):]
            elif line.startswith("data: "):
                data.append(line[len("data: "):])
            else:
                assert line.startswith(":"), line
        assert len(data) <= 1 and bool(data) >= bool(name), block
        if data:
            yield name, data[0] if data[0] == "[DONE]" else json.loads(data[0])
        else:
            yield "", None


# ---- OpenAI: chat completions

FINISHED = ("stop", "length", "tool_calls", "content_filter")
OPENAI_ERROR = {"message": str, "type": str, "param": (str, NOTHING), "code": (str, NOTHING)}
CHAT_BASE = {"id": str, "created": int, "model": str, "choices": list}


def chat_usage(usage: Any) -> Counts:
    flat = counts(usage, "prompt_tokens", "completion_tokens", "total_tokens", prompt_tokens_details=("cached_tokens",),
                  completion_tokens_details=("reasoning_tokens",))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], usage
    return flat


def check_openai_error(body: Any) -> str:
    """An error's body, or the last event of a stream that broke. Its message."""
    error = typed(typed(body, {"error": dict})["error"], OPENAI_ERROR)
    assert error["message"], body
    return str(error["message"])


def check_completion(answer: Any) -> List[Heard]:
    """A chat completion: its choices."""
    typed(answer, {**CHAT_BASE, "object": "chat.completion", "usage": dict}, {"system_fingerprint": str})
    usage, found = chat_usage(answer["usage"]), []
    for index, choice in enumerate(answer["choices"]):
        typed(choice, {"index": index, "message": dict, "finish_reason": FINISHED, "logprobs": None})
        message = typed(choice["message"], {"role": "assistant", "content": (str, NOTHING), "refusal": (str, NOTHING)},
                        {"reasoning_content": str, "tool_calls": list})
        calls = [check_call(call) for call in message.get("tool_calls", [])]
        assert bool(calls) == ("tool_calls" in message) and bool(calls) == (choice["finish_reason"] == "tool_calls")
        assert message["content"] is not None or calls or message["refusal"], message
        found.append(Heard(message["content"] or "", message.get("reasoning_content", ""), message["refusal"] or "",
                           tuple(calls), choice["finish_reason"], usage))
    assert found, answer
    return found


def check_call(call: Any) -> Tuple[str, str, str]:
    typed(call, {"id": str, "type": "function", "function": dict})
    function = typed(call["function"], {"name": str, "arguments": str})
    return called(call["id"], function["name"], function["arguments"])


def called(call_id: str, name: str, arguments: str) -> Tuple[str, str, str]:
    """A tool's call; its arguments are a JSON object."""
    assert call_id and name and isinstance(json.loads(arguments), dict), (call_id, name, arguments)
    return call_id, name, arguments


class Choice:
    """One choice of a chat completion's stream."""
    DELTA = {"role": "assistant", "content": (str, NOTHING), "reasoning_content": str, "refusal": (str, NOTHING),
             "tool_calls": list}

    def __init__(self) -> None:
        self.texts: Dict[str, str] = {"content": "", "reasoning_content": "", "refusal": ""}
        self.calls: List[List[str]] = []
        self.reason: Optional[str] = None
        self.begun = False

    def add(self, choice: Any) -> None:
        typed(choice, {"index": int, "delta": dict, "finish_reason": (*FINISHED, None)}, {"logprobs": None})
        delta = typed(choice["delta"], {}, self.DELTA)
        assert self.reason is None, ("after the finish_reason", choice)
        assert ("role" in delta) != self.begun, ("the role comes first, and once", choice)
        self.begun = True
        for name in self.texts:
            self.texts[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", []):
            self.add_call(call)
        if choice["finish_reason"]:
            self.reason = choice["finish_reason"]
            assert delta == {}, ("a delta beside the finish_reason", choice)
            assert bool(self.calls) == (self.reason == "tool_calls"), choice

    def add_call(self, call: Any) -> None:
        """The first delta of a call has its id and name, and the calls are numbered as they come."""
        if call["index"] == len(self.calls):
            typed(call, {"index": int, "id": str, "type": "function", "function": dict})
            function = typed(call["function"], {"name": str, "arguments": str})
            self.calls.append([call["id"], function["name"], function["arguments"]])
        else:
            typed(call, {"index": len(self.calls) - 1, "function": dict})
            self.calls[-1][2] += typed(call["function"], {"arguments": str})["arguments"]

    def heard(self, usage: Counts, failed: Optional[str]) -> Heard:
        assert self.reason or failed is not None, "no finish_reason"
        calls = [called(*call) if self.reason else (call[0], call[1], call[2]) for call in self.calls]
        return Heard(self.texts["content"], self.texts["reasoning_content"], self.texts["refusal"], tuple(calls),
                     self.reason, usage, failed)


def check_chat_stream(data: List[Any], *, include_usage: bool = False) -> List[Heard]:
    """The data of a chat completion's stream, `[DONE]` included: its choices."""
    *chunks, last = data
    failed = None if last == "[DONE]" else check_openai_error(last)
    base = {name: chunks[0][name] for name in ("id", "created", "model", "system_fingerprint") if name in chunks[0]}
    choices: Dict[int, Choice] = {}
    usage: Optional[Counts] = None
    for chunk in chunks:
        assert usage is None, ("after the usage", chunk)
        typed(chunk, {**CHAT_BASE, "object": "chat.completion.chunk", **({"usage": (dict, NOTHING)} if include_usage
                                                                         else {})}, {"system_fingerprint": str})
        assert {name: chunk.get(name) for name in base} == base, chunk
        if chunk.get("usage"):
            usage = chat_usage(chunk["usage"])
        assert bool(chunk["choices"]) != bool(chunk.get("usage")), chunk
        for choice in chunk["choices"]:
            assert 0 <= choice["index"] <= len(choices), choice
            choices.setdefault(choice["index"], Choice()).add(choice)
    assert choices and bool(usage) == (include_usage and failed is None), "usage"
    return [choices[index].heard(usage or (), failed) for index in sorted(choices)]


# ---- OpenAI: completions

COMPLETED = ("stop", "length", "content_filter")


def check_text_completion(answer: Any) -> List[Heard]:
    """A completion of the older API: its choices."""
    typed(answer, {**CHAT_BASE, "object": "text_completion", "usage": dict}, {"system_fingerprint": str})
    usage, found = chat_usage(answer["usage"]), []
    for index, choice in enumerate(answer["choices"]):
        typed(choice, {"text": str, "index": index, "finish_reason": COMPLETED, "logprobs": None})
        found.append(Heard(choice["text"], reason=choice["finish_reason"], usage=usage))
    assert found, answer
    return found


def check_text_stream(data: List[Any], *, include_usage: bool = False) -> List[Heard]:
    """The data of a completion's stream, `[DONE]` included: its choices."""
    *chunks, last = data
    failed = None if last == "[DONE]" else check_openai_error(last)
    found: Dict[int, Heard] = {}
    usage: Counts = ()
    for chunk in chunks:
        assert not usage, ("after the usage", chunk)
        typed(chunk, {**CHAT_BASE, "object": "text_completion"}, {"system_fingerprint": str, "usage": (dict, NOTHING)})
        assert [chunk[name] for name in ("id", "created", "model")] == [
            chunks[0][name] for name in ("id", "created", "model")]
        usage = chat_usage(chunk["usage"]) if chunk.get("usage") else ()
        assert bool(chunk["choices"]) != bool(usage), chunk
        for choice in chunk["choices"]:
            typed(choice, {"text": str, "index": int, "finish_reason": (*COMPLETED, None), "logprobs": None})
            before = found.get(choice["index"], Heard())
            assert before.reason is None, choice
            found[choice["index"]] = before._replace(text=before.text + choice["text"], reason=choice["finish_reason"])
    assert bool(usage) == (include_usage and failed is None), "usage"
    if failed is not None and not found:
        return [Heard(failed=failed)]
    assert found.keys() == set(range(len(found))) and found, found
    assert failed is not None or all(heard.reason for heard in found.values()), "no finish_reason"
    return [found[index]._replace(usage=usage, failed=failed) for index in sorted(found)]


# ---- OpenAI: responses

RESPONSE = {"id": str, "object": "response", "created_at": (int, float), "model": str, "status": str, "output": list,
            "error": (dict, NOTHING), "incomplete_details": (dict, NOTHING), "usage": (dict, NOTHING),
            "parallel_tool_calls": bool, "tool_choice": (str, dict), "tools": list}
MORE_OF_RESPONSE = ("background", "completed_at", "instructions", "max_output_tokens", "max_tool_calls", "metadata",
                    "previous_response_id", "prompt_cache_key", "reasoning", "safety_identifier", "service_tier",
                    "store", "temperature", "text", "top_logprobs", "top_p", "truncation", "user")
ITEMS: Dict[str, Json] = {
    "message": {"id": str, "type": "message", "role": "assistant", "status": str, "content": list},
    "function_call": {"id": str, "type": "function_call", "status": str, "call_id": str, "name": str,
                      "arguments": str},
    "reasoning": {"id": str, "type": "reasoning", "summary": list}}
MORE_OF_ITEMS: Dict[str, Json] = {
    "message": {}, "function_call": {}, "reasoning": {"status": str, "content": list,
                                                      "encrypted_content": (str, NOTHING)}}
KEPT_ALIVE = ("keepalive", "response.in_progress")  # what may come again in silence


def responses_usage(usage: Any) -> Counts:
    within = tuple(usage["input_tokens_details"])
    assert within in (("cached_tokens",), ("cached_tokens", "cache_write_tokens")), usage
    flat = counts(usage, "input_tokens", "output_tokens", "total_tokens", input_tokens_details=within,
                  output_tokens_details=("reasoning_tokens",))
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"], usage
    return flat


def check_part(part: Any) -> Json:
    """A part of a message."""
    if part["type"] == "refusal":
        return typed(part, {"type": "refusal", "refusal": str})
    return typed(part, {"type": "output_text", "text": str, "annotations": []}, {"logprobs": []})


def check_item(item: Any, status: Optional[str]) -> Json:
    """An item of the output."""
    kind = item["type"]
    typed(item, ITEMS[kind], MORE_OF_ITEMS[kind])
    assert item["id"] and item.get("status", status) == status, item
    if kind == "message":
        for part in item["content"]:
            check_part(part)
    elif kind == "reasoning":
        for part in item["summary"]:
            typed(part, {"type": "summary_text", "text": str})
        for part in item.get("content", []):
            typed(part, {"type": "reasoning_text", "text": str})
    elif status == "completed":
        called(item["call_id"], item["name"], item["arguments"])
    return dict(item)


def check_response(response: Any) -> List[Heard]:
    """A response that is over."""
    typed(response, RESPONSE, dict.fromkeys(MORE_OF_RESPONSE, object))
    status = response["status"]
    assert status in ("completed", "incomplete", "failed"), response
    assert bool(response["error"]) == (status == "failed"), response
    assert bool(response["incomplete_details"]) == (status == "incomplete"), response
    failed, reason = None, status
    if status == "failed":
        error = typed(response["error"], {"code": str, "message": str}, {"type": str, "param": NOTHING})
        assert error["code"] and error["message"], error
        failed = error["message"]
    elif status == "incomplete":
        reason = typed(response["incomplete_details"], {"reason": ("max_output_tokens", "content_filter")})["reason"]
    usage = responses_usage(response["usage"]) if status != "failed" or response["usage"] else ()
    for item in response["output"]:
        check_item(item, "completed" if status == "completed" else item.get("status"))
    assert len({item["id"] for item in response["output"]}) == len(response["output"]), "ids"
    assert response["output"] or status != "completed", "no output"
    return [said_in(response["output"])._replace(reason=reason, usage=usage, failed=failed)]


def said_in(output: List[Json]) -> Heard:
    """What the items of an output say."""
    found = [part for item in output for part in [*item.get("summary", []), *item.get("content", [])]]
    texts = {kind: "".join(part[field] for part in found if part["type"] == kind) for kind, field in (
        ("output_text", "text"), ("refusal", "refusal"), ("summary_text", "text"), ("reasoning_text", "text"))}
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
    return Heard(texts["output_text"], texts["summary_text"] + texts["reasoning_text"], texts["refusal"], tuple(calls))


class Output:
    """The output of a response, put together from the events of its stream: one item is open at a time."""
    # Event -> what its parts are called in the item, of what type they are, and the field with their text.
    PARTS = {"output_text": ("content", "output_text", "text"), "refusal": ("content", "refusal", "refusal"),
             "reasoning_text": ("content", "reasoning_text", "text"),
             "reasoning_summary_text": ("summary", "summary_text", "text")}
    INDEX = {"content": "content_index", "summary": "summary_index"}

    def __init__(self) -> None:
        self.items: List[Json] = []
        self.open = self.part_open = self.text_done = False

    def add(self, event: Json) -> None:
        _, _, kind = event["type"].partition(".")
        name, _, step = kind.rpartition(".")
        if name == "output_item":
            getattr(self, f"item_{step}")(event)
            return
        assert self.open and event["output_index"] == len(self.items) - 1, event
        assert event["item_id"] == self.items[-1]["id"], event
        if name in ("content_part", "reasoning_summary_part"):
            self.part("content" if name == "content_part" else "summary", step, event)
        elif name == "function_call_arguments":
            self.arguments(step, event)
        else:
            self.text(*self.PARTS[name], step, event)

    def item_added(self, event: Json) -> None:
        typed(event, {"type": str, "sequence_number": int, "output_index": len(self.items), "item": dict})
        assert not self.open, event
        item = check_item(event["item"], "in_progress")
        assert not item.get("content") and not item.get("summary") and not item.get("arguments"), event
        self.items.append(json.loads(json.dumps(item)))
        self.open, self.text_done = True, False

    def item_done(self, event: Json) -> None:
        typed(event, {"type": str, "sequence_number": int, "output_index": len(self.items) - 1, "item": dict})
        assert self.open and not self.part_open, event
        done = check_item(event["item"], event["item"].get("status"))
        assert done.get("status") in ("completed", "incomplete", None), event
        mine = {**self.items[-1], **({"status": done["status"]} if "status" in done else {})}
        assert without_logprobs(done) == without_logprobs(mine), (done, mine)
        assert done["type"] != "function_call" or self.text_done or done["status"] != "completed", event
        self.items[-1], self.open = done, False

    def part(self, group: str, step: str, event: Json) -> None:
        index, parts = self.INDEX[group], self.items[-1].setdefault(group, [])
        typed(event, {"type": str, "sequence_number": int, "output_index": int, "item_id": str, index: int,
                      "part": dict})
        if step == "added":
            assert not self.part_open and event[index] == len(parts), event
            assert not event["part"].get("text") and not event["part"].get("refusal"), event
            parts.append(dict(event["part"]))
            self.part_open, self.text_done = True, False
        else:
            assert step == "done" and self.part_open and self.text_done and event[index] == len(parts) - 1, event
            assert without_logprobs(event["part"]) == without_logprobs(parts[-1]), event
            self.part_open = False

    def text(self, group: str, kind: str, field: str, step: str, event: Json) -> None:
        index, parts = self.INDEX[group], self.items[-1][group]
        logprobs = {"logprobs": []} if kind == "output_text" else {}
        named = "delta" if step == "delta" else field
        typed(event, {"type": str, "sequence_number": int, "output_index": int, "item_id": str, index: int, named: str,
                      **logprobs})
        assert self.part_open and not self.text_done and event[index] == len(parts) - 1, event
        assert parts[-1]["type"] == kind, event
        if step == "delta":
            parts[-1][field] += event["delta"]
        else:
            assert step == "done" and event[field] == parts[-1][field], event
            self.text_done = True

    def arguments(self, step: str, event: Json) -> None:
        named = "delta" if step == "delta" else "arguments"
        typed(event, {"type": str, "sequence_number": int, "output_index": int, "item_id": str, named: str},
              {"name": self.items[-1]["name"]})
        assert not self.text_done, event
        if step == "delta":
            self.items[-1]["arguments"] += event["delta"]
        else:
            assert step == "done" and event["arguments"] == self.items[-1]["arguments"], event
            self.text_done = True


def without_logprobs(value: Any) -> Any:
    """They may be there or not, and are empty."""
    if isinstance(value, dict):
        return {name: without_logprobs(inner) for name, inner in value.items() if name != "logprobs"}
    return [without_logprobs(inner) for inner in value] if isinstance(value, list) else value


def check_responses_stream(events: List[Json]) -> List[Heard]:
    """The data of a response's stream."""
    assert [event["sequence_number"] for event in events] == list(range(len(events))), "sequence numbers"
    assert not any(event.get("error") for event in events), "SDKs take any event with an error for the end"
    created, progress, *middle, last = events
    assert (created["type"], progress["type"]) == ("response.created", "response.in_progress")
    output = Output()
    for event in (created, progress):
        opening(event, created["response"]["id"])
    for event in middle:
        if event["type"] == "response.in_progress":
            opening(event, created["response"]["id"])
        elif event["type"] not in KEPT_ALIVE:
            output.add(event)
    typed(last, {"type": f"response.{last['response']['status']}", "sequence_number": int, "response": dict})
    [heard] = check_response(last["response"])
    assert last["response"]["id"] == created["response"]["id"], last
    if heard.failed is not None:
        return [said_in(output.items)._replace(failed=heard.failed)]
    assert not output.open, last
    assert without_logprobs(last["response"]["output"]) == without_logprobs(output.items), last
    return [heard]


def opening(event: Json, response_id: str) -> None:
    """An event before the output."""
    typed(event, {"type": str, "sequence_number": int, "response": dict})
    response = typed(event["response"], RESPONSE, dict.fromkeys(MORE_OF_RESPONSE, object))
    assert response["id"] == response_id, event
    assert {**response, "status": "in_progress", "output": [], "error": None, "incomplete_details": None,
            "usage": None} == response, event


# ---- Anthropic: messages

STOPPED = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal")
ANTHROPIC_ERRORS = ("invalid_request_error", "authentication_error", "permission_error", "not_found_error",
                    "request_too_large", "rate_limit_error", "api_error", "overloaded_error", "timeout_error")
BLOCKS: Dict[str, Json] = {
    "text": {"type": "text", "text": str}, "thinking": {"type": "thinking", "thinking": str, "signature": str},
    "tool_use": {"type": "tool_use", "id": str, "name": str, "input": dict}}
EMPTY: Dict[str, Json] = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""},
                          "tool_use": {"input": {}}}
DELTAS = {"text": ("text_delta",), "thinking": ("thinking_delta", "signature_delta"),
          "tool_use": ("input_json_delta",)}


def anthropic_usage(usage: Any) -> Counts:
    return counts(usage, "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def check_anthropic_error(body: Any) -> str:
    """An error's body, or the last event of a stream that broke. Its message."""
    typed(body, {"type": "error", "error": dict, "request_id": str})
    error = typed(body["error"], {"type": ANTHROPIC_ERRORS, "message": str})
    assert error["message"], body
    return str(error["message"])


def heard_in(blocks: List[Json], stop: Json, usage: Counts, failed: Optional[str] = None) -> Heard:
    """What the content blocks of a message say."""
    calls = [(block["id"], block["name"], json.dumps(block["input"])) for block in blocks
             if block["type"] == "tool_use"]
    assert failed is not None or bool(calls) == (stop["stop_reason"] == "tool_use"), stop
    texts = {kind: "".join(block[kind] for block in blocks if block["type"] == kind) for kind in ("text", "thinking")}
    return Heard(texts["text"], texts["thinking"], "", tuple(calls), stop.get("stop_reason"), usage, failed)


def check_stop(stop: Json) -> None:
    assert stop["stop_reason"] in STOPPED, stop
    assert isinstance(stop["stop_sequence"], str) == (stop["stop_reason"] == "stop_sequence"), stop


def check_message(message: Any) -> List[Heard]:
    """A message of the assistant's."""
    typed(message, {"id": str, "type": "message", "role": "assistant", "model": str, "content": list,
                    "stop_reason": str, "stop_sequence": (str, NOTHING), "usage": dict})
    check_stop(message)
    assert message["content"], message
    for block in message["content"]:
        typed(block, BLOCKS[block["type"]])
    return [heard_in(message["content"], message, anthropic_usage(message["usage"]))]


class Content:
    """The content blocks of a message, put together from the events of its stream: one is open at a time."""

    def __init__(self) -> None:
        self.blocks: List[Json] = []
        self.open = self.signed = False
        self.json = ""

    def add(self, event: Json) -> None:
        {"content_block_start": self.start, "content_block_delta": self.delta, "content_block_stop": self.stop}[
            event["type"]](event)

    def start(self, event: Json) -> None:
        typed(event, {"type": str, "index": len(self.blocks), "content_block": dict})
        block = event["content_block"]
        typed(block, {**BLOCKS[block["type"]], **EMPTY[block["type"]]})
        assert not self.open, event
        self.blocks.append(dict(block))
        self.open, self.signed, self.json = True, False, ""

    def delta(self, event: Json) -> None:
        typed(event, {"type": str, "index": len(self.blocks) - 1, "delta": dict})
        block, delta = self.blocks[-1], event["delta"]
        field = {"input_json_delta": "partial_json"}.get(delta["type"], delta["type"][:-len("_delta")])
        typed(delta, {"type": DELTAS[block["type"]], field: str})
        assert self.open and not self.signed, event
        self.signed = delta["type"] == "signature_delta"
        if field == "partial_json":
            self.json += delta[field]
        else:
            block[field] += delta[field]

    def stop(self, event: Json) -> None:
        typed(event, {"type": str, "index": len(self.blocks) - 1})
        assert self.open and self.signed == (self.blocks[-1]["type"] == "thinking"), event
        if self.blocks[-1]["type"] == "tool_use":
            self.blocks[-1]["input"] = json.loads(self.json or "{}")
        self.open = False


def check_anthropic_stream(events: List[Json]) -> List[Heard]:
    """The data of a message's stream."""
    start, *rest = events
    message = typed(typed(start, {"type": "message_start", "message": dict})["message"], {
        "id": str, "type": "message", "role": "assistant", "model": str, "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": dict})
    assert anthropic_usage(message["usage"])[0][1] > 0, start
    content = Content()
    usage: Counts = ()
    *middle, last = [event for event in rest if event != {"type": "ping"}]
    failed = check_anthropic_error(last) if last["type"] == "error" else None
    stop: Json = {}
    for event in middle:
        assert not stop, ("after the message_delta", event)
        if event["type"] == "message_delta":
            typed(event, {"type": str, "delta": dict, "usage": dict})
            stop = typed(event["delta"], {"stop_reason": str, "stop_sequence": (str, NOTHING)})
            check_stop(stop)
            usage = anthropic_usage(event["usage"])
        else:
            content.add(event)
    if failed is None:
        assert last == {"type": "message_stop"} and rest[-1] == last and stop and not content.open, last
        assert content.blocks, "no content"
    return [heard_in(content.blocks, stop, usage, failed)]
