#!/usr/bin/env python3
"""Deterministic stub of the LLM HTTP APIs that AI coding CLIs talk to.

Serves, on 127.0.0.1 only, enough of four wire protocols for the real CLIs to run end to end:

* Anthropic Messages   POST /v1/messages            (claude)
* OpenAI Responses     POST /v1/responses           (codex)
* OpenAI Chat          POST /v1/chat/completions    (opencode, qwen)
* Gemini               POST /v1beta/models/M:generateContent, :streamGenerateContent  (gemini)

The reply depends only on the last user prompt.  By default it is ``STUB[<tail of last line>]``;
directives anywhere in the prompt change it:

    !slow N      N small chunks, 100 ms apart      !long N     N kilobytes of text
    !until FILE  with !slow: the last chunk once there is such a file; "too late" in its place after 30 s
    !error CODE  that HTTP error, always           !flaky N    N times HTTP 503/529, then a reply
    !think       thinking block before the text    !unicode    emoji, CJK and RTL text
    !tool [CMD]  first a shell tool call, then the text once the tool result has come back
    !loop [CMD]  a tool call on every request (for turn limits)
    !echo-system the system prompt received        !history    number of messages received
    !drop        cut the connection mid-stream     !hang       accept the request, never answer
    !call NAME {JSON}   call the offered tool NAME (exactly, or with an MCP prefix such as mcp__server__NAME,
                 mcp_server_NAME or a codex namespace) with these arguments; several directives in one prompt are
                 parallel calls of one turn.  Once results have come back the reply is GOT[<result>|<result>...];
                 a name that is not offered gives NOTOOL[NAME].  NAME may contain "." and "-".
    !say JSON    exactly that, or the text of a JSON string; the last one counts, and no schema does
    !tools       the names of the offered tools
    !gap N       with !call: N tenths of a second before each call (a model that writes slowly)

A model whose name contains "nonexistent" gets that provider's 404.
Usage: stub_llm.py [--port N] [--log FILE]   (prints the port on stdout; port 0 picks one)
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, Iterator, List, Optional, Tuple
import contextlib

Json = Dict[str, Any]
SHELL_TOOLS = ("Bash", "exec_command", "shell_command", "shell", "run_shell_command", "bash")
UNICODE_REPLY = "emoji 🚀👩‍👩‍👧‍👦 CJK 你好世界 日本語 한국어 RTL שלום مرحبا combining e\u0301 nul-safe \u2028 end"
THOUGHT = "Let me think about this."
INJECTED = re.compile(r"<(system-reminder|environment_context|session_context|user_instructions|"
                      r"skills_instructions|permissions instructions)[ >].*?</\1>", re.S)
DIRECTIVE = re.compile(r"(?:^|(?<=\s))!(slow|long|error|flaky|think|unicode|tool|loop|echo-system|history|drop|hang|"
                       r"tools|gap)\b[ \t]*(\d+)?")
SAY = re.compile(r"(?:^|(?<=\s))!say[ \t]+")
UNTIL = re.compile(r"(?:^|(?<=\s))!until[ \t]+(\S+)")
UNTIL_SECS = 30.0
CALL = re.compile(r"(?:^|(?<=\s))!call[ \t]+([\w.-]+)[ \t]*")


@dataclass
class Turn:
    """Provider-neutral view of one model request."""
    model: str
    system: str
    prompt: str
    messages: int
    tools: Dict[str, Json]
    tool_done: bool
    stream: bool
    results: List[str] = field(default_factory=list)  # tool results since the last model turn
    namespaces: Dict[str, str] = field(default_factory=dict)  # codex: tool name -> namespace
    schema: Optional[Json] = None  # structured output wanted: the reply is then a minimal conforming document


@dataclass
class Plan:
    """What to answer: thinking, then text chunks, then maybe a tool call."""
    chunks: List[str] = field(default_factory=list)
    delay: float = 0.0
    gap: float = 0.0
    until: str = ""
    thinking: str = ""
    tools: List[Tuple[str, Json]] = field(default_factory=list)
    error: int = 0
    drop: bool = False
    hang: bool = False

    @property
    def text(self) -> str:
        return "".join(self.chunks)


# ---------------------------------------------------------------- request parsing

def text_of(content: Any) -> str:
    """Text of a message's content: a string, or a list of text-bearing parts."""
    if isinstance(content, str):
        return content
    parts = [p if isinstance(p, str) else p.get("text", "") for p in content or [] if not isinstance(p, list)]
    return "\n".join(p for p in parts if p)


def last_prompt(texts: List[str]) -> str:
    """The last user text that is more than CLI-injected context."""
    for text in reversed(texts):
        cleaned = INJECTED.sub("", text).strip()
        if cleaned:
            return cleaned
    return ""


def parse_anthropic(body: Json) -> Turn:
    messages = body.get("messages", [])
    texts: List[str] = []
    for message in messages:
        if message.get("role") == "user":
            content = message["content"]
            blocks = [content] if isinstance(content, str) else content
            texts += [text_of([b]) for b in blocks if isinstance(b, str) or b.get("type") == "text"]
    turns = [m for m in messages if m.get("role") != "system"]
    tail = turns[-1]["content"] if turns else ""
    done = isinstance(tail, list) and any(b.get("type") == "tool_result" for b in tail)
    tools = {t["name"]: t.get("input_schema", {}) for t in body.get("tools", []) if "name" in t}
    results = [text_of(b.get("content")) for b in tail if b.get("type") == "tool_result"] if done else []
    inline = [text_of(m["content"]) for m in messages if m.get("role") == "system"]  # newer Claude Code does this
    system = "\n[system message] ".join([text_of(body.get("system", ""))] + inline)
    return Turn(body.get("model", ""), system, last_prompt(texts), len(messages) - len(inline),
                tools, done, bool(body.get("stream")), results)


def parse_responses(body: Json) -> Turn:
    items = body.get("input", [])
    items = [{"role": "user", "content": items}] if isinstance(items, str) else items
    texts = [text_of(i.get("content")) for i in items if i.get("role") == "user"]
    developer = [text_of(i.get("content")) for i in items if i.get("role") in ("developer", "system")]
    done = bool(items) and str(items[-1].get("type", "")).endswith("call_output")
    added = [t for i in items if i.get("type") == "additional_tools" for t in i.get("tools", [])]
    offered = body.get("tools", []) + added
    flat = [(t, "") for t in offered if t.get("type") == "function"]
    flat += [(t, n["name"]) for n in offered if n.get("type") == "namespace" for t in n.get("tools", []) if "name" in t]
    tools = {t["name"]: t.get("parameters", {}) for t, _ in flat}
    namespaces = {t["name"]: n for t, n in flat if n}
    results: List[str] = []
    for item in reversed(items if done else []):
        if not str(item.get("type", "")).endswith("call_output"):
            break
        output = item.get("output")
        results.insert(0, output if isinstance(output, str) else text_of(output) or json.dumps(output))
    system = "\n[developer] ".join([body.get("instructions") or ""] + developer)
    messages = sum(1 for i in items if i.get("role") in ("user", "assistant"))
    schema = ((body.get("text") or {}).get("format") or {}).get("schema")
    return Turn(body.get("model", ""), system, last_prompt(texts), messages, tools, done, bool(body.get("stream")),
                results, namespaces, schema)


def parse_chat(body: Json) -> Turn:
    messages = body.get("messages", [])
    texts = [text_of(m.get("content")) for m in messages if m.get("role") == "user"]
    system = "\n".join(text_of(m.get("content")) for m in messages if m.get("role") in ("system", "developer"))
    tools = {t["function"]["name"]: t["function"].get("parameters", {}) for t in body.get("tools", [])}
    done = bool(messages) and messages[-1].get("role") == "tool"
    count = sum(1 for m in messages if m.get("role") in ("user", "assistant"))
    tail = [text_of(m.get("content")) for m in messages if m.get("role") == "tool"] if done else []
    return Turn(body.get("model", ""), system, last_prompt(texts), count, tools, done, bool(body.get("stream")), tail)


def parse_gemini(body: Json, model: str, stream: bool) -> Turn:
    contents = body.get("contents", [])
    texts = [part["text"] for c in contents if c.get("role", "user") == "user"
             for part in c.get("parts", []) if "text" in part]
    declared = [d for t in body.get("tools", []) for d in t.get("functionDeclarations", [])]
    tools = {d["name"]: d.get("parametersJsonSchema") or d.get("parameters") or {} for d in declared}
    done = bool(contents) and any("functionResponse" in p for p in contents[-1].get("parts", []))
    results = [json.dumps(p["functionResponse"].get("response"), ensure_ascii=False)
               for p in contents[-1].get("parts", []) if "functionResponse" in p] if done else []
    system = text_of((body.get("systemInstruction") or {}).get("parts", []))
    config = body.get("generationConfig") or {}
    return Turn(model, system, last_prompt(texts), len(contents), tools, done, stream, results, {},
                config.get("responseJsonSchema") or config.get("responseSchema"))


def sample(schema: Json) -> Any:
    """The smallest value that fits a JSON schema (Gemini's model router asks for one)."""
    if schema.get("enum"):
        return schema["enum"][0]
    kind = str(schema.get("type", "string")).lower()
    if kind == "object":
        return {key: sample(value) for key, value in schema.get("properties", {}).items()}
    return {"array": [], "integer": 1, "number": 1, "boolean": False}.get(kind, "stub")


# ---------------------------------------------------------------- deciding the reply

class Brain:
    """Turns a Turn into a Plan; remembers only the !flaky counters."""

    def __init__(self) -> None:
        self.failures: Dict[str, int] = {}
        self.lock = threading.Lock()

    def plan(self, turn: Turn) -> Plan:
        if "nonexistent" in turn.model:
            return Plan(error=404)
        for match in reversed(list(SAY.finditer(turn.prompt))):
            return Plan(chunks=[self._said(turn.prompt, match.end())])
        if turn.schema:
            return Plan(chunks=[json.dumps(sample(turn.schema))])
        found = {m.group(1): (m.group(2), m.end()) for m in DIRECTIVE.finditer(turn.prompt)}
        number = {name: int(value[0]) if value[0] else 0 for name, value in found.items()}
        if "error" in found:
            return Plan(error=number["error"] or 500)
        if "flaky" in found and self._fail_again(turn.prompt, number["flaky"]):
            return Plan(error=503)
        plan = Plan(drop="drop" in found, hang="hang" in found, thinking=THOUGHT if "think" in found else "")
        calls = self._calls(turn)
        if calls and not turn.tool_done:
            plan.tools = [(name, args) for name, args in calls if name in turn.tools]
            missing = [name for name, _ in calls if name not in turn.tools]
            plan.gap = number.get("gap", 0) / 10
            plan.chunks = ["NOTOOL[{}]".format(",".join(missing))] if missing else ["I will ", "call it."]
            return plan
        if calls:
            plan.chunks = ["GOT[", "|".join(turn.results), "]"]
            return plan
        for name in ("tool", "loop"):
            if name in found and turn.tools and (name == "loop" or not turn.tool_done):
                rest = turn.prompt[found[name][1]:].split("\n")[0]
                plan.tools = [self._tool_call(turn, rest.split("!")[0].strip() or "echo hi")]
                plan.chunks = ["I will ", "run a tool."]
                return plan
        if "slow" in found:
            plan.chunks, plan.delay = [f"chunk{i} " for i in range(number["slow"])], 0.1
            plan.until = "".join(UNTIL.findall(turn.prompt))
        else:
            text = self._text(turn, found, number)
            size = max(12, len(text) // 20)
            plan.chunks = [text[i:i + size] for i in range(0, len(text), size)]
        return plan

    def _fail_again(self, prompt: str, limit: int) -> bool:
        with self.lock:
            self.failures[prompt] = self.failures.get(prompt, 0) + 1
            return self.failures[prompt] <= limit

    @staticmethod
    def _said(prompt: str, begin: int) -> str:
        value, end = json.JSONDecoder().raw_decode(prompt, begin)
        return value if isinstance(value, str) else prompt[begin:end]

    @staticmethod
    def _calls(turn: Turn) -> List[Tuple[str, Json]]:
        calls: List[Tuple[str, Json]] = []
        for match in CALL.finditer(turn.prompt):
            name = match.group(1)
            ends = [t for t in turn.tools if t.endswith(("_" + name, "." + name))]
            offered = name if name in turn.tools else (ends or [name])[0]
            try:
                args, _ = json.JSONDecoder().raw_decode(turn.prompt, match.end())
            except ValueError:
                args = {}
            calls.append((offered, args if isinstance(args, dict) else {}))
        return calls

    @staticmethod
    def _text(turn: Turn, found: Dict[str, Any], number: Dict[str, int]) -> str:
        if "long" in found:
            line = "0123456789abcdef " * 3 + "end of line\n"
            return (line * (number["long"] * 1024 // len(line) + 1))[:number["long"] * 1024]
        if "unicode" in found:
            return UNICODE_REPLY
        if "echo-system" in found:
            return "SYSTEM<" + turn.system + ">"
        if "tools" in found:
            return "TOOLS[{}]".format(",".join(turn.namespaces.get(t, "") + t for t in turn.tools))
        if "history" in found:
            return f"HISTORY[{turn.messages}]"
        return "STUB[" + (turn.prompt.splitlines() or [""])[-1][-60:] + "]"

    @staticmethod
    def _tool_call(turn: Turn, command: str) -> Tuple[str, Json]:
        name = next((n for n in SHELL_TOOLS if n in turn.tools), sorted(turn.tools)[0])
        schema = turn.tools[name]
        props = schema.get("properties", {})
        args: Json = {key: sample(props.get(key, {})) for key in schema.get("required", [])}
        for key in ("command", "cmd"):
            if key in props:
                is_list = str(props[key].get("type", "")).lower() == "array"
                args[key] = ["bash", "-lc", command] if is_list else command
        return name, args


# ---------------------------------------------------------------- reply encoding

def sse(data: Json, event: str = "") -> bytes:
    head = f"event: {event}\n" if event else ""
    return (head + "data: " + json.dumps(data, ensure_ascii=False) + "\n\n").encode("utf-8")


def counts(turn: Turn, plan: Plan) -> Tuple[int, int, int, int]:
    """(input, cached, output, reasoning) token counts: made up, but stable and distinct."""
    return 100 + len(turn.prompt) // 4, 40, 10 + len(plan.text) // 4, 7 if plan.thinking else 0


def anthropic_events(turn: Turn, plan: Plan) -> Iterator[bytes]:
    tokens_in, cached, tokens_out, _ = counts(turn, plan)
    usage = {"input_tokens": tokens_in, "cache_creation_input_tokens": 3, "cache_read_input_tokens": cached,
             "output_tokens": 1}
    yield sse({"type": "message_start", "message": {
        "id": new_id("msg"), "type": "message", "role": "assistant", "model": turn.model, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": usage}}, "message_start")
    blocks: List[Tuple[Json, List[Json]]] = []
    if plan.thinking:
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""},
                       [{"type": "thinking_delta", "thinking": plan.thinking[:10]},
                        {"type": "thinking_delta", "thinking": plan.thinking[10:]},
                        {"type": "signature_delta", "signature": "c3R1Yg=="}]))
    blocks.append(({"type": "text", "text": ""}, [{"type": "text_delta", "text": c} for c in plan.chunks]))
    for name, args in plan.tools:
        text = json.dumps(args)
        blocks.append(({"type": "tool_use", "id": new_id("toolu"), "name": name, "input": {}},
                       [{"type": "input_json_delta", "partial_json": text[:len(text) // 2]},
                        {"type": "input_json_delta", "partial_json": text[len(text) // 2:]}]))
    for index, (start, deltas) in enumerate(blocks):
        yield sse({"type": "content_block_start", "index": index, "content_block": start}, "content_block_start")
        for delta in deltas:
            yield sse({"type": "content_block_delta", "index": index, "delta": delta}, "content_block_delta")
        yield sse({"type": "content_block_stop", "index": index}, "content_block_stop")
    yield sse({"type": "message_delta", "delta": {"stop_reason": "tool_use" if plan.tools else "end_turn",
                                                  "stop_sequence": None},
               "usage": dict(usage, output_tokens=tokens_out)}, "message_delta")
    yield sse({"type": "message_stop"}, "message_stop")


def anthropic_body(turn: Turn, plan: Plan) -> Json:
    tokens_in, cached, tokens_out, _ = counts(turn, plan)
    content: List[Json] = [{"type": "text", "text": plan.text}]
    if plan.thinking:
        content.insert(0, {"type": "thinking", "thinking": plan.thinking, "signature": "c3R1Yg=="})
    for name, args in plan.tools:
        content.append({"type": "tool_use", "id": new_id("toolu"), "name": name, "input": args})
    return {"id": new_id("msg"), "type": "message", "role": "assistant", "model": turn.model, "content": content,
            "stop_reason": "tool_use" if plan.tools else "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": tokens_in, "cache_creation_input_tokens": 3,
                      "cache_read_input_tokens": cached, "output_tokens": tokens_out}}


def responses_body(turn: Turn, plan: Plan, status: str = "completed") -> Json:
    tokens_in, cached, tokens_out, reasoning = counts(turn, plan)
    output: List[Json] = []
    if plan.thinking:
        output.append({"type": "reasoning", "id": new_id("rs"), "encrypted_content": "c3R1Yg==",
                       "summary": [{"type": "summary_text", "text": plan.thinking}]})
    output.append({"type": "message", "id": new_id("msg"), "role": "assistant", "status": "completed",
                   "content": [{"type": "output_text", "text": plan.text, "annotations": []}]})
    for name, args in plan.tools:
        call = {"type": "function_call", "id": new_id("fc"), "call_id": new_id("call"),
                "status": "completed", "name": name, "arguments": json.dumps(args)}
        if name in turn.namespaces:
            call["namespace"] = turn.namespaces[name]
        output.append(call)
    return {"id": new_id("resp"), "object": "response", "created_at": int(time.time()), "status": status,
            "model": turn.model, "output": output, "error": None, "parallel_tool_calls": False,
            "usage": {"input_tokens": tokens_in, "input_tokens_details": {"cached_tokens": cached},
                      "output_tokens": tokens_out, "output_tokens_details": {"reasoning_tokens": reasoning},
                      "total_tokens": tokens_in + tokens_out}}


def responses_events(turn: Turn, plan: Plan) -> Iterator[bytes]:
    body = responses_body(turn, plan)

    def event(kind: str, **fields: Any) -> bytes:
        return sse(dict(fields, type=kind), kind)

    yield event("response.created", response=dict(body, status="in_progress", output=[], usage=None))
    for index, item in enumerate(body["output"]):
        place = {"item_id": item["id"], "output_index": index}
        empty = {"message": {"content": []}, "reasoning": {"summary": []}, "function_call": {"arguments": ""}}
        yield event("response.output_item.added", output_index=index,
                    item=dict(item, status="in_progress", **empty[item["type"]]))
        if item["type"] == "reasoning":
            yield event("response.reasoning_summary_part.added", summary_index=0,
                        part={"type": "summary_text", "text": ""}, **place)
            yield event("response.reasoning_summary_text.delta", summary_index=0, delta=plan.thinking, **place)
            yield event("response.reasoning_summary_text.done", summary_index=0, text=plan.thinking, **place)
        elif item["type"] == "message":
            for chunk in plan.chunks:
                yield event("response.output_text.delta", content_index=0, delta=chunk, **place)
            yield event("response.output_text.done", content_index=0, text=plan.text, **place)
        yield event("response.output_item.done", output_index=index, item=item)
    yield event("response.completed", response=body)


def chat_events(turn: Turn, plan: Plan) -> Iterator[bytes]:
    tokens_in, cached, tokens_out, reasoning = counts(turn, plan)
    base = {"id": new_id("chatcmpl"), "object": "chat.completion.chunk", "created": int(time.time()),
            "model": turn.model}

    def chunk(delta: Json, finish: Optional[str] = None) -> bytes:
        return sse(dict(base, choices=[{"index": 0, "delta": delta, "finish_reason": finish}]))

    yield chunk({"role": "assistant", "content": ""})
    if plan.thinking:
        yield chunk({"reasoning_content": plan.thinking})
    for text in plan.chunks:
        yield chunk({"content": text})
    for index, (name, args) in enumerate(plan.tools):
        yield chunk({"tool_calls": [{"index": index, "id": new_id("call"), "type": "function", "function": {
            "name": name, "arguments": json.dumps(args)}}]})
    yield chunk({}, "tool_calls" if plan.tools else "stop")
    yield sse(dict(base, choices=[], usage={
        "prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning}}))
    yield b"data: [DONE]\n\n"


def chat_body(turn: Turn, plan: Plan) -> Json:
    tokens_in, _, tokens_out, _ = counts(turn, plan)
    message: Json = {"role": "assistant", "content": plan.text}
    if plan.tools:
        message["tool_calls"] = [{"id": new_id("call"), "type": "function", "function": {
            "name": name, "arguments": json.dumps(args)}} for name, args in plan.tools]
    return {"id": new_id("chatcmpl"), "object": "chat.completion", "created": int(time.time()), "model": turn.model,
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if plan.tools else "stop"}],
            "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out,
                      "total_tokens": tokens_in + tokens_out}}


def gemini_chunk(turn: Turn, plan: Plan, parts: List[Json], last: bool) -> Json:
    tokens_in, cached, tokens_out, reasoning = counts(turn, plan)
    candidate: Json = {"content": {"role": "model", "parts": parts}, "index": 0}
    if last:
        candidate["finishReason"] = "STOP"
    return {"candidates": [candidate], "modelVersion": turn.model, "responseId": "stub", "usageMetadata": {
        "promptTokenCount": tokens_in, "cachedContentTokenCount": cached, "candidatesTokenCount": tokens_out,
        "thoughtsTokenCount": reasoning, "totalTokenCount": tokens_in + tokens_out + reasoning}}


def gemini_parts(plan: Plan) -> List[Json]:
    parts: List[Json] = [{"text": c} for c in plan.chunks] or [{"text": ""}]
    if plan.thinking:
        parts.insert(0, {"text": "**Thinking** " + plan.thinking, "thought": True})
    for name, args in plan.tools:
        parts.append({"functionCall": {"name": name, "args": args}})
    return parts


def gemini_body(turn: Turn, plan: Plan) -> Json:
    return gemini_chunk(turn, plan, gemini_parts(plan), True)


def gemini_events(turn: Turn, plan: Plan) -> Iterator[bytes]:
    parts = gemini_parts(plan)
    for index, part in enumerate(parts):
        yield sse(gemini_chunk(turn, plan, [part], index == len(parts) - 1))


def there(file: str) -> bool:
    """Waits until there is such a file; whether there is."""
    ends = time.monotonic() + UNTIL_SECS
    while not os.path.exists(file) and time.monotonic() < ends:
        time.sleep(0.02)
    return os.path.exists(file)


def error_body(api: str, code: int, model: str) -> Json:
    """Each provider's own error shape."""
    if api == "anthropic":
        kinds = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                 404: "not_found_error", 429: "rate_limit_error", 529: "overloaded_error"}
        text = {401: "invalid x-api-key", 404: "model: " + model, 529: "Overloaded"}.get(code, f"stub error {code}")
        return {"type": "error", "error": {"type": kinds.get(code, "api_error"), "message": text},
                "request_id": "req_stub"}
    if api == "gemini":
        kinds = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
                 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
        text = f"models/{model} is not found for API version v1beta" if code == 404 else f"stub error {code}"
        return {"error": {"code": code, "message": text, "status": kinds.get(code, "INTERNAL")}}
    kinds = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
    text = {401: "Incorrect API key provided: sk-dummy.",
            404: f"The model `{model}` does not exist or you do not have access to it."}.get(
                code, f"stub error {code}")
    return {"error": {"message": text, "type": "invalid_request_error" if code < 429 else "server_error",
                      "param": None, "code": kinds.get(code)}}


IDS = itertools.count(time.time_ns() & 0xFFFFFFFFFFFF)


def new_id(prefix: str) -> str:
    return f"{prefix}_{next(IDS):012x}"


# ---------------------------------------------------------------- HTTP

ENCODERS = {"anthropic": (anthropic_events, anthropic_body), "responses": (responses_events, responses_body),
            "chat": (chat_events, chat_body), "gemini": (gemini_events, gemini_body)}
GEMINI_PATH = re.compile(r"/v1(?:beta)?/models/([^:/]+):(\w+)")


class Handler(BaseHTTPRequestHandler):
    """Routes requests, logs them, writes JSON or SSE."""
    protocol_version = "HTTP/1.1"
    server: StubServer

    def do_HEAD(self) -> None:
        self.record({})
        self.send_json(200, {})

    def do_GET(self) -> None:
        self.record({})
        if self.path.split("?")[0].endswith("/models"):
            models = [{"id": "stub-model", "object": "model", "owned_by": "stub", "type": "model"}]
            return self.send_json(200, {"object": "list", "data": models, "models": []})
        self.send_json(404, {"error": {"message": "not found", "type": "not_found_error"}})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(raw or b"{}")
        except ValueError:
            return self.send_json(400, {"error": {"message": "bad JSON"}})
        path = self.path.split("?")[0]
        gemini = GEMINI_PATH.match(path)
        if path.endswith("/messages/count_tokens"):
            self.record(body)
            return self.send_json(200, {"input_tokens": len(raw) // 4})
        if gemini and gemini.group(2) == "countTokens":
            self.record(body)
            return self.send_json(200, {"totalTokens": len(raw) // 4})
        if path.endswith("/messages"):
            return self.answer("anthropic", parse_anthropic(body), body)
        if path.endswith("/responses"):
            return self.answer("responses", parse_responses(body), body)
        if path.endswith("/chat/completions"):
            return self.answer("chat", parse_chat(body), body)
        if gemini:
            stream = gemini.group(2) == "streamGenerateContent"
            return self.answer("gemini", parse_gemini(body, gemini.group(1), stream), body)
        self.record(body)
        self.send_json(404, {"error": {"message": "not found", "type": "not_found_error"}})

    def answer(self, api: str, turn: Turn, body: Json) -> None:
        plan = self.server.brain.plan(turn)
        self.record(body, api=api, model=turn.model, stream=turn.stream, messages=turn.messages,
                    prompt=turn.prompt[-200:], prompt_chars=len(turn.prompt), system_chars=len(turn.system),
                    tools=sorted(turn.tools), tool_done=turn.tool_done, error=plan.error)
        if plan.hang:
            time.sleep(600)
        if plan.error:
            return self.send_json(plan.error, error_body(api, plan.error, turn.model))
        events, whole = ENCODERS[api]
        if not turn.stream:
            return self.send_json(200, whole(turn, plan))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for index, piece in enumerate(events(turn, plan)):
            if plan.drop and index == 4:
                return
            if plan.gap and (b"content_block_start" in piece and b"tool_use" in piece or b"functionCall" in piece
                             or b"output_item.added" in piece and b"function_call" in piece):
                time.sleep(plan.gap)
            if plan.until and f"{plan.chunks[-1]}\"".encode() in piece:
                if not there(plan.until):
                    piece = piece.replace(plan.chunks[-1].encode(), b"too late")
                plan.until = ""
            self.wfile.write(piece)
            self.wfile.flush()
            if plan.delay and b"delta" in piece or plan.delay and api == "gemini":
                time.sleep(plan.delay)

    def send_json(self, code: int, body: Json) -> None:
        data = json.dumps(body).encode("utf-8")
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def record(self, body: Json, **summary: Any) -> None:
        entry = dict(summary, bytes=int(self.headers.get("Content-Length") or 0), time=round(time.time(), 3),
                     method=self.command, path=self.path, keys=sorted(body))
        if self.server.log_path:
            with self.server.log_lock, open(self.server.log_path, "a", encoding="utf-8") as log:
                if self.server.log_bodies:
                    entry["body"] = body
                    entry["headers"] = {k.lower(): v for k, v in self.headers.items()}
                log.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Silence the default stderr access log."""


class StubServer(ThreadingHTTPServer):
    """The server with its shared state."""
    daemon_threads = True

    def __init__(self, port: int, log_path: Optional[str], log_bodies: bool = False) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.brain = Brain()
        self.log_path, self.log_bodies, self.log_lock = log_path, log_bodies, threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is not news."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Stub LLM APIs on 127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", help="JSONL file for a summary of each request")
    parser.add_argument("--log-bodies", action="store_true", help="also log whole request bodies")
    options = parser.parse_args()
    server = StubServer(options.port, options.log, options.log_bodies)
    print(server.server_address[1], flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
