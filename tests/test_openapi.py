"""/openapi.json: valid, complete, and true to what the server takes and answers; /docs, without a browser."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import clinvk
import pytest
from conftest import Client, Reply, Served, serving

needs_311 = pytest.mark.skipif(sys.version_info < (3, 11), reason="its tools are pinned to releases for 3.11 and later")
ECHO_ALONE: Dict[str, Any] = {"default_backend": "echo", "server": {"metrics_enabled": True}, "backends": {
    name: {"enabled": False} for name in ("claude", "codex", "gemini")}}
MESSAGES = [{"role": "user", "content": "hello"}]


def document(client: Client) -> Any:
    reply = client.call("GET", "/openapi.json")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    return reply.json


def operations(client: Client) -> Dict[str, Any]:
    """`POST /path` -> what the document says of it."""
    return {f"{method.upper()} {path}": told for path, methods in document(client)["paths"].items()
            for method, told in methods.items()}


@needs_311
@pytest.mark.parametrize("environ", [{}, {"CLINVK_API_KEYS": "k"}])
def test_the_document_is_valid_openapi(make_client: Callable[..., Client], environ: Dict[str, str]) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    told = document(make_client(**environ))
    assert told["openapi"] == "3.1.0"
    validator.validate(told)


def test_every_route_is_told_of_but_files_and_what_is_off(client: Client) -> None:
    routes = {f"{entry.method} {entry.path}" for entry in clinvk.ROUTES}
    assert routes - set(operations(client)) == {"GET /docs/{id}", "GET /metrics"}
    for name, told in operations(client).items():
        assert told["summary"] and told["operationId"], name
        assert {"200", "403", "429", "500"} <= set(told["responses"]), name
        assert ("413" in told["responses"]) == ("415" in told["responses"]) == name.startswith("POST"), name


@pytest.mark.parametrize("model", [
    clinvk.PromptRequest, clinvk.ParallelRequest, clinvk.ChainRequest, clinvk.CompareRequest, clinvk.ChatRequest,
    clinvk.CompletionRequest, clinvk.ResponsesRequest, clinvk.MessagesRequest, clinvk.CountRequest])
def test_every_field_that_is_checked_is_told_of(client: Client, model: Any) -> None:
    told = document(client)["components"]["schemas"][model.__name__]
    fields = clinvk.wire_fields(model)
    assert set(told["properties"]) == set(fields)
    assert told["required"] == [name for name, field in fields.items() if field.required]
    assert (told.get("additionalProperties") is False) == (not issubclass(model, clinvk.Open))


@pytest.mark.parametrize("model, field, told", [
    ("PromptRequest", "prompt", {"type": "string", "pattern": clinvk.NOT_BLANK}),
    ("PromptRequest", "workdir", {"type": ["string", "null"], "format": "directory", "pattern": "^/[^\\x00]*$"}),
    ("PromptRequest", "model", {"type": ["string", "null"], "pattern": "^(?!-)[^\\x00]*$"}),
    ("PromptRequest", "sandbox_mode", {"type": ["string", "null"], "enum": [*clinvk.SANDBOX_MODES, None]}),
    ("PromptRequest", "timeout_secs", {"type": ["number", "null"], "exclusiveMinimum": 0}),
    ("PromptRequest", "ephemeral", {"type": ["boolean", "null"], "default": False}),
    ("ParallelRequest", "max_parallel", {"type": ["integer", "null"], "minimum": 1}),
    ("ChainRequest", "pass_session_id", {"type": ["boolean", "null"], "enum": [False, None], "default": False}),
    ("MessagesRequest", "max_tokens", {"type": "integer", "minimum": 1}),
    ("ChatRequest", "metadata", {})])
def test_a_rule_is_told_as_json_schema_has_it(client: Client, model: str, field: str, told: Any) -> None:
    shown = document(client)["components"]["schemas"][model]["properties"][field]
    assert {name: value for name, value in shown.items() if name != "description"} == told


def test_backends_are_named_that_can_be_asked_for(make_client: Callable[..., Client]) -> None:
    schemas = document(make_client({**ECHO_ALONE}))["components"]["schemas"]
    assert [schemas[name]["properties"]["backend"]["enum"] for name in ("PromptRequest", "Task", "ChainStep")] == [
        ["echo"]] * 3
    assert schemas["CompareRequest"]["properties"]["backends"]["items"]["enum"] == ["echo"]


def test_a_key_is_asked_for_where_one_is_needed(make_client: Callable[..., Client]) -> None:
    told = operations(make_client())
    assert not [name for name in told if "security" in told[name]]
    assert {name for name in told if "401" in told[name]["responses"]} == {  # of the CLI's login
        "POST /openai/v1/chat/completions", "POST /openai/v1/completions", "POST /openai/v1/responses",
        "POST /anthropic/v1/messages"}
    told = operations(make_client(CLINVK_API_KEYS="k"))
    assert {name for name in told if "security" not in told[name]} == {
        "GET /health", "GET /openapi.json", "GET /docs", *(name for name in told if name.endswith("/metrics"))}
    assert all("401" in told[name]["responses"] for name in told if "security" in told[name])


def test_nothing_in_the_document_was_written_for_our_own_readers(client: Client) -> None:
    told = document(client)
    texts = re.findall(r'"(?:description|summary)": "((?:[^"\\\\]|\\\\.)*)"', json.dumps(told))
    assert len(texts) > 300
    assert not [text for text in texts if re.search(r"SPEC|BACKENDS|PROTOCOLS|waitress|\w+\(\w+: '", text)]
    for name, schema in told["components"]["schemas"].items():
        assert schema.get("description") or name.endswith(("Tokens", "Body", "Delta", "Event")), name
    for model in ("Prompt", "Parallel", "Chain", "Compare", "Chat", "Completion", "Responses", "Messages", "Count"):
        for field, schema in told["components"]["schemas"][model + "Request"]["properties"].items():
            assert schema.get("description"), (model, field)


def test_a_query_may_stand_there_without_a_value(client: Client) -> None:
    assert client.call("GET", "/api/v1/sessions?status=&backend=&limit=&offset=").status == 200
    for parameter in operations(client)["GET /api/v1/sessions"]["parameters"]:
        assert "" in parameter["schema"].get("enum", []) or parameter["schema"]["anyOf"][1] == {
            "type": "string", "maxLength": 0}


# ---- The answers are as they are told

def closed(schema: Any) -> Any:
    """`schema`, in which an object has no field that it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(value) for name, value in schema.items()}
    return {"additionalProperties": False, **inner} if isinstance(schema.get("properties"), dict) else inner


def faults(client: Client, schema: Any, value: Any) -> List[str]:
    jsonschema = pytest.importorskip("jsonschema")
    whole = closed({"components": document(client)["components"], **schema})
    return [error.message for error in jsonschema.Draft202012Validator(whole).iter_errors(value)]


def told_for(client: Client, method: str, path: str, reply: Reply) -> Any:
    """What the document says of that answer."""
    content = operations(client)[f"{method} {path}"]["responses"][str(reply.status)]["content"]
    return content[reply.headers["content-type"].partition(";")[0]]["schema"]


def sent(reply: Reply) -> Iterator[Any]:
    """What an answer is made of: the whole, or the lines or data of a stream."""
    kind = reply.headers["content-type"]
    if kind == "application/x-ndjson":
        yield from map(json.loads, reply.body.splitlines())
    elif kind == "text/event-stream":
        lines = [line[6:] for line in reply.body.decode().splitlines() if line.startswith("data: ")]
        yield from (json.loads(line) for line in lines if line != "[DONE]")
    else:
        yield reply.json


PROMPT: Dict[str, Any] = {"backend": "echo", "prompt": "hello"}
CHAT: Dict[str, Any] = {"model": "echo", "messages": MESSAGES}


@needs_311
@pytest.mark.parametrize("method, path, body", [
    ("POST", "/api/v1/prompt", PROMPT), ("POST", "/api/v1/prompt", {**PROMPT, "max_turns": 3, "ephemeral": True}),
    ("POST", "/api/v1/prompt", {**PROMPT, "output_format": "stream-json"}),
    ("POST", "/api/v1/prompt", {"backend": "x"}),
    ("POST", "/api/v1/prompt", {**PROMPT, "backend": "failing"}),
    ("POST", "/api/v1/prompt", {**PROMPT, "backend": "failing", "output_format": "stream-json"}),
    ("POST", "/api/v1/prompt", {**PROMPT, "session_id": "ffff"}),
    ("POST", "/api/v1/parallel", {"tasks": [PROMPT, {**PROMPT, "backend": "failing"}]}),
    ("POST", "/api/v1/parallel", {"tasks": [PROMPT, PROMPT], "stream": True}),
    ("POST", "/api/v1/chain", {"steps": [PROMPT, {**PROMPT, "backend": "failing"}]}),
    ("POST", "/api/v1/chain", {"steps": [PROMPT], "stream": True}),
    ("POST", "/api/v1/compare", {"backends": ["echo", "failing"], "prompt": "hello"}),
    ("POST", "/api/v1/compare", {"backends": ["echo"], "prompt": "hello", "stream": True}),
    ("POST", "/openai/v1/chat/completions", CHAT), ("POST", "/openai/v1/chat/completions", {**CHAT, "stream": True}),
    ("POST", "/openai/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/openai/v1/chat/completions", {**CHAT, "model": "failing"}),
    ("POST", "/openai/v1/chat/completions", {**CHAT, "model": "failing", "stream": True}),
    ("POST", "/openai/v1/chat/completions", {**CHAT, "model": "nobody"}),
    ("POST", "/anthropic/v1/messages", {**CHAT, "max_tokens": 9}), ("POST", "/anthropic/v1/messages", CHAT),
    ("POST", "/anthropic/v1/messages", {**CHAT, "max_tokens": 9, "stream": True}),
    ("POST", "/anthropic/v1/messages", {**CHAT, "max_tokens": 9, "model": "failing"}),
    ("POST", "/anthropic/v1/messages", {**CHAT, "max_tokens": 9, "model": "failing", "stream": True}),
    ("POST", "/anthropic/v1/messages/count_tokens", CHAT), ("GET", "/openai/v1/models", None),
    ("GET", "/openai/v1/models?client_version=1", None),
    ("GET", "/anthropic/v1/models", None), ("GET", "/api/v1/backends", None), ("GET", "/api/v1/sessions", None),
    ("GET", "/api/v1/sessions?limit=x", None), ("GET", "/health", None), ("GET", "/", None),
    ("GET", "/openai/v1/models/echo", None), ("GET", "/anthropic/v1/models/echo", None),
    ("GET", "/openai/v1/models/nobody", None), ("GET", "/api/v1/sessions/ffff", None),
    ("DELETE", "/api/v1/sessions/ffff", None)])
def test_an_answer_has_the_shape_that_is_told_and_nothing_more(
        make_client: Callable[..., Client], method: str, path: str, body: Any) -> None:
    client = make_client({"backends": {"failing": {"command": ["sh", "-c", "echo some; exit 3"]}}})
    client.call("POST", "/api/v1/prompt", PROMPT)  # a session
    reply = client.call(method, path, body)
    pattern = path.partition("?")[0]
    for name in ("echo", "nobody", "ffff"):
        pattern = pattern.replace(f"/{name}", "/{id}")
    schema = told_for(client, method, pattern, reply)
    if reply.headers["content-type"] == "text/event-stream":
        schema = schema.get("anyOf", [schema])[0]["properties"]["data"]["contentSchema"]
    assert [faults(client, schema, value) for value in sent(reply)] == [[] for _ in sent(reply)]


@needs_311
def test_a_session_has_the_shape_that_is_told(client: Client) -> None:
    session = client.call("POST", "/api/v1/prompt", PROMPT).json["session_id"]
    for method in ("GET", "DELETE"):
        reply = client.call(method, f"/api/v1/sessions/{session}")
        assert not faults(client, told_for(client, method, "/api/v1/sessions/{id}", reply), reply.json)


CHATS, RESPONSES = "/openai/v1/chat/completions", "/openai/v1/responses"
CALL, RESULT = {"type": "function_call", "name": "f"}, {"type": "function_call_output", "output": "4711"}


@needs_311
@pytest.mark.parametrize("path, field, value, is_taken", [
    (RESPONSES, "input", [{"role": "user", "content": "x"}], True), (RESPONSES, "input", "x", True),
    (RESPONSES, "input", [{"role": "user", "content": "x", "type": None}], True), (RESPONSES, "input", " ", False),
    (RESPONSES, "input", [{"role": "user", "content": [{"type": "input_text", "text": "x"}], "type": "message"}], True),
    (RESPONSES, "input", [CALL], True), (RESPONSES, "input", [RESULT], True), (RESPONSES, "input", [], False),
    (RESPONSES, "input", [{"type": "reasoning"}], False), (RESPONSES, "metadata", {"a": 1}, False),
    (RESPONSES, "metadata", {"a": "1"}, True), (RESPONSES, "input", [{"role": "user", "content": " "}], False),
    (CHATS, "messages", [{"role": "assistant", "function_call": {"name": "f"}}], True),
    (CHATS, "messages", [{"role": "assistant", "content": None}], False)])
def test_a_request_is_taken_if_the_document_allows_it(client: Client, path: str, field: str, value: Any,
                                                      is_taken: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    body = {"model": "echo", **({"input": "x"} if path == RESPONSES else {}), field: value}
    told = operations(client)[f"POST {path}"]["requestBody"]["content"]["application/json"]["schema"]
    whole = jsonschema.Draft202012Validator({**told, "components": document(client)["components"]})
    assert (client.call("POST", path, body).status == 200, whole.is_valid(body)) == (is_taken, is_taken)


def test_how_a_cli_came_to_be_there_is_told_of_errors_too(client: Client) -> None:
    answers = operations(client)[f"POST {CHATS}"]["responses"]
    assert {status for status, answer in answers.items() if "X-Clinvk-Start" in answer["headers"]} == {
        "200", "401", "404", "429", "502", "503", "504"}


# ---- schemathesis: what is told is taken, what is not is refused

HOOKS = """
import schemathesis, tempfile
from hypothesis import strategies

schemathesis.openapi.format("directory", strategies.just(tempfile.gettempdir()))  # one that is there


@schemathesis.hook
def before_call(context, case, arguments):
    "Time limits that echo can keep: shorter ones end in a 504, as they should."
    body = case.body if isinstance(case.body, dict) else {}
    lists = [body[name] for name in ("tasks", "steps") if isinstance(body.get(name), list)]
    for options in [body, body.get("clinvk"), *(item for items in lists for item in items)]:
        limit = options.get("timeout_secs") if isinstance(options, dict) else None
        if isinstance(limit, (int, float)) and 0 < limit < 10:
            options["timeout_secs"] = 10
    for schema in schemas_in(body):
        schema.clear()
    for messages in (body.get("messages"), body.get("input")):
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict) and message.get("role") in ("system", "developer") and holds_image(message):
                message["role"] = "user"  # a system prompt has no images, which the document does not say


def holds_image(value):
    if isinstance(value, dict) and value.get("type") in ("image", "image_url", "input_image"):
        return True
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(holds_image, inside))


def schemas_in(value):
    "JSON Schemas in a body: what makes one of an object, the document does not say."
    if isinstance(value, dict) and isinstance(value.get("schema"), dict):
        yield value["schema"]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from schemas_in(inner)
"""


@needs_311
def test_schemathesis_finds_nothing_with_all_its_checks(serve: Callable[..., Served], tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    server = serve(config=ECHO_ALONE)
    (tmp_path / "hooks.py").write_text(HOOKS)
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json", "--checks", "all",
               "--max-examples", "5", "--seed", "1", "--continue-on-failure", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks"}, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in server.stderr


# ---- /docs

@pytest.fixture(scope="module")
def keyed(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(pyz, tmp_path_factory.mktemp("keyed")) as start:
        yield start(CLINVK_API_KEYS="k")


@pytest.mark.parametrize("path, kind, begins", [
    ("/docs", "text/html", b"<!DOCTYPE html>"), ("/docs/", "text/html", b"<!DOCTYPE html>"),
    ("/docs/start.js", "text/javascript", b"SwaggerUIBundle("), ("/docs/swagger-ui.css", "text/css", b"."),
    ("/docs/swagger-ui-bundle.js", "text/javascript", b"/*! For license"),
    ("/docs/favicon-32x32.png", "image/png", b"\x89PNG")])
def test_the_page_and_its_files_come_from_inside_the_pyz(keyed: Served, path: str, kind: str, begins: bytes) -> None:
    reply = keyed.call("GET", path)
    assert reply.status == 200 and reply.body.startswith(begins)
    assert reply.headers["content-type"].startswith(kind)
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
    assert b"https://" not in reply.body or path.endswith(("bundle.js", ".css"))


@pytest.mark.parametrize("name", ["index.html", "LICENSE", "..%2Fclinvk.py", "swagger-ui.css%00", "start.js/x"])
def test_no_other_file_can_be_had(keyed: Served, name: str) -> None:
    reply = keyed.call("GET", f"/docs/{name}")
    assert (reply.status, reply.headers["content-type"]) == (404, "application/problem+json")


def test_without_the_pyz_the_page_says_what_to_build(client: Client) -> None:
    reply = client.call("GET", "/docs/swagger-ui.css")
    assert reply.status == 404 and "build_zipapp.py" in reply.json["detail"]
