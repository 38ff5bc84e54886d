"""SPEC 5: what each fault becomes in each API's shape; and the paths of SPEC 2, over WSGI and over a real socket."""

import json
import logging
import re
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import clinvk
import pytest
from conftest import Client, fault, request_of, shape

MakeClient = Callable[..., Client]

NATIVE, OPENAI, ANTHROPIC = "/api/v1/prompt", "/openai/v1/chat/completions", "/anthropic/v1/messages"
RESPONSES = "/openai/v1/responses"
HI = [{"role": "user", "content": "hi"}]
BODIES: Dict[str, Any] = {NATIVE: {"backend": "echo", "prompt": "hi"}, OPENAI: {"model": "echo", "messages": HI},
                          ANTHROPIC: {"model": "echo", "messages": HI, "max_tokens": 9}}
each_api = pytest.mark.parametrize("path", BODIES)
compat = pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])

NO_SUCH_MODEL = ("invalid_request_error", "model_not_found", "not_found_error")


def with_model(path: str, name: str, **more: Any) -> Dict[str, Any]:
    """The body for `path` that asks the backend `name`."""
    return {**BODIES[path], ("backend" if path == NATIVE else "model"): name, **more}


# ---- Bodies that are no JSON

def body(text: str) -> bytes:
    """A right body for every API, with one more field."""
    return (json.dumps({**BODIES[NATIVE], **BODIES[ANTHROPIC]})[:-1] + ', "metadata": ' + text + "}").encode()


@pytest.mark.parametrize("sent, told", [
    (b"", "JSON"), (b"{", "JSON"), (b"{'a': 1}", "JSON"), (b"{} {}", "JSON"), (b"model=echo", "JSON"),
    (body("NaN"), "NaN"), (body("Infinity"), "Infinity"), (body("-Infinity"), "-Infinity"),
    (body("1e400"), "1e400"), (body("[-1.5e999]"), "-1.5e999"), (body('"a\nb"'), "JSON"),
    (body('"\xe9"').decode().encode("latin-1"), "UTF-8"), (b"\xff\xfe{\0}\0", "UTF-8"), (b"\x80", "at byte 0"),
    (b'{"a": "\xed\xa0\x80"}', "UTF-8"), (body('"\\ud800"'), "surrogate"), (body('"\\uDFFF x"'), "surrogate"),
    (body('{"\\udc00": "x"}'), "surrogate"), (body('"\\ude00\\ud83d"'), "surrogate"),
    (100_000 * b"[", "nested too deep"), (body(100_000 * '{"a":' + "1" + 100_000 * "}"), "nested too deep"),
    (body(200 * "[" + 200 * "]"), "200 levels"), (body(100 * '[{"a":' + "1" + 100 * "}]"), "200 levels"),
    (body(5000 * "7"), "JSON")])
@each_api
def test_what_is_no_proper_json_is_a_400(client: Client, path: str, sent: bytes, told: str) -> None:
    reply = client.call("POST", path, sent)
    assert reply.status == 400 and told in fault(reply, shape(path))


@each_api
def test_whole_characters_are_no_fault_however_they_are_written(client: Client, path: str) -> None:
    sent = json.dumps(BODIES[path]).replace("hi", "\\ud83d\\ude00 \\\\ud800 \u00e9\u2028")
    reply = client.call("POST", path, sent.encode())
    assert reply.status == 200 and "\U0001f600 \\ud800 \u00e9\u2028" in json.dumps(reply.json, ensure_ascii=False
                                                                                 ).replace("\\\\", "\\")


@pytest.mark.parametrize("path, wrap", [
    (ANTHROPIC, lambda deep: {"messages": [{"role": "user", "content": [{"type": "tool_use", "input": deep}]}]}),
    (ANTHROPIC + "/count_tokens", lambda deep: {"tools": [deep]}),
    (OPENAI, lambda deep: {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": deep}}}}),
    (OPENAI, lambda deep: {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": deep}}}}),
    (RESPONSES, lambda deep: {"text": {"format": {"type": "json_schema", "schema": {"const": deep}}}}),
    (RESPONSES, lambda deep: {"stream": True, "text": {"format": {"type": "json_schema", "schema": {"const": deep}}}}),
    (RESPONSES, lambda deep: {"stream": True, "metadata": deep}),
    (OPENAI, lambda deep: {"clinvk": {"metadata": deep}}), (NATIVE, lambda deep: {"metadata": deep})])
def test_no_depth_is_a_defect_of_ours(client: Client, path: str, wrap: Callable[[Any], Any]) -> None:
    base = BODIES.get(path) or {**BODIES[ANTHROPIC], "input": "hi"}
    mark = json.dumps({**base, **wrap("DEEP")})
    before = mark.partition("DEEP")[0]
    around = sum(before.count(opened) for opened in "[{") - sum(before.count(closed) for closed in "]}")
    for depth in [5, 100, *range(190, 203), 900]:
        sent = mark.replace('"DEEP"', '{"not":' * depth + "{}" + "}" * depth).encode()
        reply = client.call("POST", path, sent)
        assert reply.status in (200, 400, 422) and b"clinvk has a defect" not in reply.body
        assert (b"nested too deep: 200 levels" in reply.body) == (around + depth + 1 > 200)


# ---- Fields

@pytest.mark.parametrize("path, change, place, told", [
    (NATIVE, {"prompt": None}, "body.prompt", "is required"), (NATIVE, {"prompt": ""}, "body.prompt", "than blanks"),
    (NATIVE, {"prompt": 1}, "body.prompt", "must be a string"), (NATIVE, {"backend": None}, "body.backend", "required"),
    (NATIVE, {"promt": "x"}, "body.promt", 'did you mean "prompt"?'),
    (NATIVE, {"isolated": True}, "body.isolated", "not known"), (NATIVE, {"prompt": " \n"}, "body.prompt", "blanks"),
    (NATIVE, {"max_turns": -1}, "body.max_turns", "at least 0"), (NATIVE, {"ephemeral": 1}, "body.ephemeral", "true"),
    (NATIVE, {"extra": ["-x", 1]}, "body.extra[1]", "a string"),
    (NATIVE, {"metadata": {"a": 1}}, "body.metadata.a", "a string"),
    (NATIVE, {"timeout_secs": 0}, "body.timeout_secs", "more than 0"),
    (NATIVE, {"approval_mode": "yes"}, "body.approval_mode", "default, auto, none, always"),
    (NATIVE, {"timeout_secs": 10 ** 400}, "body.timeout_secs", ""),
    (OPENAI, {"model": None}, "model", "is required"), (OPENAI, {"messages": []}, "messages", "not be empty"),
    (OPENAI, {"messages": "hi"}, "messages", "must be a list"), (OPENAI, {"n": 9}, "n", "at most 8"),
    (OPENAI, {"messages": [{"role": "user", "content": [{"type": "text"}, {"type": "file"}]}]},
     "messages[0].content[1].type", '"file" is not supported'),
    (OPENAI, {"stream": "yes"}, "stream", "true or false"), (OPENAI, {"stop": list("abcde")}, "stop", "at most 4"),
    (OPENAI, {"clinvk": {"wrokdir": "x"}}, "clinvk.wrokdir", 'did you mean "workdir"?'),
    (OPENAI, {"clinvk": {"prompt": "x"}}, "clinvk.prompt", "can not be set here"),
    (OPENAI, {"clinvk": {"workdir": "a"}}, "clinvk.workdir", "an absolute path"),
    *[(NATIVE, {"workdir": path}, "body.workdir", "an absolute path")
      for path in ("a", "./a", "../a", "~", "~/x", "", "$HOME", "file:///tmp", " /tmp")],
    (ANTHROPIC, {"max_tokens": None}, "max_tokens", "is required"),
    (ANTHROPIC, {"max_tokens": 0}, "max_tokens", "at least 1"),
    (ANTHROPIC, {"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
    (ANTHROPIC, {"messages": [{"role": "assistant", "content": "a"}]}, "messages[0].role", 'must be "user"')])
def test_a_wrong_field_is_named_with_what_is_allowed(client: Client, path: str, change: Any, place: str,
                                                     told: str) -> None:
    reply = client.call("POST", path, {**BODIES[path], **change})
    assert reply.status == (422 if path == NATIVE else 400)
    message = fault(reply, shape(path))
    assert place in message and told in message
    if path == NATIVE:
        assert [error["location"] for error in reply.json["errors"]] == [place]
        assert set(reply.json["errors"][0]) == {"location", "message", "value"}
    if path == OPENAI:
        assert reply.json["error"]["param"] == place


def test_every_fault_has_its_place_and_value(client: Client) -> None:
    reply = client.call("POST", NATIVE, {"prompt": 7, "max_turns": -2, "promt": "x"})
    assert sorted((e["location"], e["value"]) for e in reply.json["errors"] if e["location"] != "body.promt") == [
        ("body.backend", None), ("body.max_turns", -2), ("body.prompt", 7)]


@pytest.mark.parametrize("sent", [b"[]", b"null", b'"text"', b"1", b"true"])
@each_api
def test_json_that_is_no_object_is_a_wrong_type(client: Client, path: str, sent: bytes) -> None:
    reply = client.call("POST", path, sent)
    assert reply.status == (422 if path == NATIVE else 400) and "body: must be an object" in fault(reply, shape(path))


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.5, "seed": 1, "colour": [1]}, {"tools": [{}]}])
@compat
def test_the_compat_apis_take_unknown_fields_and_name_them(client: Client, path: str, fields: Any) -> None:
    reply = client.call("POST", path, {**BODIES[path], **fields})
    named = {name for name in reply.headers.get("x-clinvk-ignored", "").split(", ") if name}
    assert (reply.status, named - {"max_tokens"}) == (200, set(fields))


@pytest.mark.parametrize("path, fields, named", [
    (OPENAI, {"max_tokens": 5}, "max_tokens"), (OPENAI, {"max_completion_tokens": 5}, "max_completion_tokens"),
    (OPENAI, {"reasoning_effort": "low"}, "reasoning_effort"),
    (RESPONSES, {"max_output_tokens": 5}, "max_output_tokens"),
    (RESPONSES, {"reasoning": {"effort": "low"}}, "reasoning.effort"),
    (ANTHROPIC, {"system": "s"}, "max_tokens, system"), (RESPONSES, {"clinvk": {"max_tokens": 5}}, "max_tokens"),
    (ANTHROPIC, {"output_config": {"effort": "low"}}, "max_tokens, output_config.effort"),
    (ANTHROPIC, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "max_tokens, thinking")])
def test_what_a_backend_can_not_do_is_called_what_the_request_calls_it(client: Client, path: str, fields: Any,
                                                                       named: str) -> None:
    body = {"model": "echo", "input": "hi", **fields} if path == RESPONSES else {**BODIES[path], **fields}
    assert client.call("POST", path, body).headers["x-clinvk-ignored"] == named


# ---- Backends

@pytest.mark.parametrize("path, body, place", [
    ("/api/v1/prompt", {"backend": "claude", "prompt": "p", "model": "fast"}, "body.model"),
    ("/api/v1/parallel", {"tasks": [{"backend": "claude", "prompt": "p", "model": "fast"}]}, "body.tasks[0].model"),
    ("/api/v1/compare", {"backends": ["claude"], "prompt": "p", "model": "fast"}, "body.model")])
def test_an_alias_that_is_not_set_is_told_by_its_place(make_client: MakeClient, path: str, body: Any,
                                                       place: str) -> None:
    reply = make_client({"backends": {"claude": {"command": "cat"}}}).call("POST", path, body)
    assert (reply.status, [error["location"] for error in reply.json["errors"]]) == (422, [place])


@pytest.mark.parametrize("name, near", [("cluade", "claude"), ("ehco", "echo"), ("zzz", "")])
@each_api
def test_an_unknown_backend_is_told_what_is_near_and_what_there_is(client: Client, path: str, name: str,
                                                                   near: str) -> None:
    reply = client.call("POST", path, with_model(path, name))
    assert reply.status == (422 if path == NATIVE else 404)
    message = fault(reply, shape(path), NO_SUCH_MODEL)
    assert "claude, codex, gemini, echo" in message and (f'did you mean "{near}"?' in message) == bool(near)
    if path == NATIVE:
        assert reply.json["errors"][0]["location"] == "body.backend"


@pytest.mark.parametrize("path, kind", [
    ("/openai/v1/models/cluade", "openai"), ("/v1/models/cluade", "openai"),
    ("/anthropic/v1/models/cluade", "anthropic"), ("/anthropic/v1/v1/models/cluade", "anthropic")])
def test_an_unknown_model_is_a_404(client: Client, path: str, kind: str) -> None:
    reply = client.call("GET", path)
    assert reply.status == 404 and 'did you mean "claude"?' in fault(reply, kind, NO_SUCH_MODEL)


@pytest.mark.parametrize("stream", [False, True])
@each_api
def test_a_disabled_backend_is_a_503_that_says_how_to_enable_it(make_client: MakeClient, path: str,
                                                                stream: bool) -> None:
    client = make_client({"backends": {"echo": {"enabled": False}}})
    more = {} if path == NATIVE else {"stream": stream}
    reply = client.call("POST", path, with_model(path, "echo", **more))
    assert reply.status == 503 and "backends.echo.enabled" in fault(reply, shape(path))
    assert "x-should-retry" not in reply.headers


@pytest.mark.parametrize("name, told", [
    ("codex", 'codex is not installed: no "codex" on PATH. Install it, or set backends.codex.command'),
    ("own", 'own is not installed: no "no-such-cli" on PATH. Install it, or set backends.own.command')])
@each_api
def test_a_cli_that_is_not_installed_is_a_503_that_says_what_to_do(make_client: MakeClient, path: str, name: str,
                                                                   told: str) -> None:
    client = make_client({"backends": {"own": {"command": ["no-such-cli", "-x"]}}}, PATH="/nowhere")
    reply = client.call("POST", path, with_model(path, name))
    assert (reply.status, fault(reply, shape(path))) == (503, told)


@pytest.mark.parametrize("stream", [False, True])
@compat
def test_a_cli_that_fails_is_a_502_that_is_not_to_be_repeated(make_client: MakeClient, fake_cli: Callable[..., str],
                                                              path: str, stream: bool) -> None:
    client = make_client({"backends": {"own": {"command": fake_cli("print('no', file=sys.stderr); sys.exit(3)")}}})
    reply = client.call("POST", path, with_model(path, "own", stream=stream))
    assert (reply.status, reply.headers["x-should-retry"]) == (502, "false")
    assert "own failed with exit code 3" in fault(reply, shape(path))


def test_a_run_that_failed_is_an_answer_of_the_native_api(make_client: MakeClient,
                                                          fake_cli: Callable[..., str]) -> None:
    script = "print('half'); print('why', file=sys.stderr); sys.exit(3)"
    client = make_client({"backends": {"own": {"command": fake_cli(script)}}})
    reply = client.call("POST", NATIVE, with_model(NATIVE, "own"))
    assert (reply.status, reply.json["exit_code"], reply.json["output"]) == (200, 3, "half\n")
    assert "exit code 3" in reply.json["error"] and "why" in reply.json["error"]


@compat
def test_a_run_whose_time_is_up_is_a_504_that_is_not_to_be_repeated(make_client: MakeClient, path: str,
                                                                    fake_cli: Callable[..., str]) -> None:
    client = make_client({"backends": {"own": {"command": fake_cli("print('half', flush=True); time.sleep(30)")}}})
    reply = client.call("POST", path, with_model(path, "own", clinvk={"timeout_secs": 0.4}))
    assert (reply.status, reply.headers["x-should-retry"]) == (504, "false")
    assert "timeout_secs" in fault(reply, shape(path))


def test_a_run_whose_time_is_up_is_an_answer_of_the_native_api(make_client: MakeClient,
                                                               fake_cli: Callable[..., str]) -> None:
    client = make_client({"backends": {"own": {"command": fake_cli("print('half', flush=True); time.sleep(30)")}}})
    reply = client.call("POST", NATIVE, with_model(NATIVE, "own", timeout_secs=0.4))
    assert (reply.status, reply.json["exit_code"]) == (200, -1)  # whether it has said anything by then
    assert "time is up" in reply.json["error"]


@compat
def test_a_cli_that_prints_too_much_is_a_502(make_client: MakeClient, fake_cli: Callable[..., str], path: str) -> None:
    client = make_client({"backends": {"own": {"command": fake_cli("print(9999 * 'x')")}},
                          "server": {"max_output_bytes": 1000}})
    reply = client.call("POST", path, with_model(path, "own"))
    assert (reply.status, reply.headers["x-should-retry"]) == (502, "false")
    assert "max_output_bytes" in fault(reply, shape(path))


@each_api
def test_a_defect_of_ours_is_a_500_whose_traceback_only_the_log_has(
        client: Client, path: str, caplog: pytest.LogCaptureFixture) -> None:
    client.server.programs = None  # type: ignore[assignment]
    reply = client.call("POST", path, BODIES[path], X_Request_Id="r-1")
    assert reply.status == 500 and "r-1" in fault(reply, shape(path))
    assert "Traceback" in caplog.text and "r-1" in caplog.text


@compat
def test_a_defect_before_anything_is_sent_is_a_500_of_a_stream_too(client: Client, path: str,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(renderer: Any, told: Any) -> Iterator[bytes]:
        yield from {}["missing"]
    for renderer in (clinvk.ChatCompletions, clinvk.Anthropic):
        monkeypatch.setattr(renderer, "stream", defective)
    reply = client.call("POST", path, {**BODIES[path], "stream": True}, X_Request_Id="r-1")
    assert reply.status == 500 and "r-1" in fault(reply, shape(path))


# ---- Paths and methods

@pytest.mark.parametrize("path", ["/nothing", "/api/v1/nothing", "/api/v2/prompt", "/openai/v1/nothing", "/v1/nothing",
                                  "/anthropic/v1/nothing", "/anthropic/v1/messages/x", "/v1/messages/x", "/openapi",
                                  "/openai/v1/chat", "/..", "/api/v1/prompt/x", "/caf\u00e9"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path_is_a_404_in_the_shape_of_its_api(client: Client, path: str, method: str) -> None:
    reply = client.call(method, path, {} if method == "POST" else None)
    assert reply.status == 404 and path in fault(reply, shape(path))


@pytest.mark.parametrize("path, near", [("/api/v1/promt", NATIVE), ("/openai/v1/chat/completion", OPENAI),
                                        ("/anthropic/v1/message", ANTHROPIC)])
def test_an_unknown_path_is_told_what_is_near(client: Client, path: str, near: str) -> None:
    assert f'did you mean "{near}"?' in fault(client.call("POST", path, {}), shape(path))


@pytest.mark.parametrize("path", ["/", "/anthropic", "/openai/v1", "/health", "/api/v1/backends", "/openai/v1/models",
                                  "/openai/v1/models/echo", "/anthropic/v1/models", "/anthropic/v1/models/echo",
                                  "/v1/models", "/v1/models/echo", "/anthropic/v1/v1/models", "/health/"])
def test_head_works_where_get_does(client: Client, path: str) -> None:
    got, head = client.call("GET", path), client.call("HEAD", path)
    assert (got.status, head.status, head.body) == (200, 200, b"")
    assert got.body and head.headers["content-type"] == got.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/", "/anthropic", "/openai/v1", "/anthropic/", "/openai/v1/?x=1"])
def test_the_root_names_the_version_and_the_ways_in(client: Client, path: str) -> None:
    told = client.call("GET", path)
    assert re.fullmatch(r"\d+\.\d+\.\d+", told.json["version"]) and OPENAI in told.body.decode()


ALTERNATIVES = [("/v1/chat/completions", OPENAI), ("/v1/messages", ANTHROPIC), ("/anthropic/v1/v1/messages", ANTHROPIC),
                *((path + "/count_tokens", ANTHROPIC + "/count_tokens")
                  for path in ("/v1/messages", "/anthropic/v1/v1/messages")), ("/v1/responses", "/openai/v1/responses")]
WRITTEN = ["{}", "{}?beta=true", "{}?api-version=1&x=%2Fa%3Fb", "{}/", "/{}", "{}//", "{}?/v1/models"]


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("path, main", ALTERNATIVES)
def test_the_other_paths_that_clients_build_lead_to_the_same_endpoint(client: Client, path: str, main: str,
                                                                      written: str) -> None:
    body = BODIES[ANTHROPIC] if "messages" in path else BODIES[OPENAI]
    wanted, found = client.call("POST", main, body), client.call("POST", written.format(path), body)
    assert found.status == wanted.status
    assert found.json.keys() == wanted.json.keys()
    if found.status == 200:
        kept = ("object", "type", "input_tokens")
        assert [found.json.get(key) for key in kept] == [wanted.json.get(key) for key in kept]


@pytest.mark.parametrize("written", [*WRITTEN[:-1], WRITTEN[0].replace("{}", "/{}//")])
@pytest.mark.parametrize("path, anthropic", [
    ("/openai/v1/models", False), ("/v1/models", False), ("/anthropic/v1/models", True),
    ("/anthropic/v1/v1/models", True)])
def test_lists_of_models_have_the_shape_of_the_path(client: Client, path: str, anthropic: bool, written: str) -> None:
    told, one = client.call("GET", written.format(path)).json, client.call("GET", written.format(path + "/echo")).json
    assert "echo" in [model["id"] for model in told["data"]] and one["id"] == "echo"
    assert ("has_more" in told, one.get("type") == "model") == (anthropic, anthropic)


def test_v1_models_has_anthropics_shape_for_anthropics_clients(client: Client) -> None:
    for path, key in (("/v1/models", "has_more"), ("/v1/models/echo", "display_name"),
                      ("/v1/models/cluade", "request_id"), ("/v1/nothing", "request_id")):
        assert key in client.call("GET", path, anthropic_version="2023-06-01").json
        assert key not in client.call("GET", path).json


# ---- Size

@each_api
def test_a_body_over_the_limit_is_a_413(make_client: MakeClient, path: str) -> None:
    exact = json.dumps(BODIES[path]).encode()
    client = make_client({"server": {"max_request_body_bytes": len(exact)}})
    assert client.call("POST", path, exact).status == 200
    reply = client.call("POST", path, exact + b" ")
    assert reply.status == 413 and "server.max_request_body_bytes" in fault(reply, shape(path))


def test_a_limit_of_0_is_none(make_client: MakeClient) -> None:
    client = make_client({"server": {"max_request_body_bytes": 0}})
    reply = client.call("POST", NATIVE, {"backend": "echo", "prompt": 11_000_000 * "x"})
    assert (reply.status, len(reply.json["output"])) == (200, 11_000_000)


# ---- Request ids

@pytest.mark.parametrize("sent, kept", [
    ("a", True), ("A-z_0.9", True), (128 * "x", True), (129 * "x", False), ("", False), ("a b", False), ("a/b", False),
    ("\u00fc", False), ("a\n", False), (None, False)])
@pytest.mark.parametrize("path, method", [("/health", "GET"), (NATIVE, "POST"), (OPENAI, "POST"), ("/nothing", "GET"),
                                          (ANTHROPIC, "GET")])
def test_every_answer_has_the_request_id_of_the_client_or_a_new_one(
        client: Client, path: str, method: str, sent: Optional[str], kept: bool,
        caplog: pytest.LogCaptureFixture) -> None:
    headers = {} if sent is None else {"X_Request_Id": sent}
    caplog.set_level(logging.INFO, "clinvk")
    body = BODIES.get(path) if method == "POST" else None
    first, second = (client.call(method, path, body, **headers).headers["x-request-id"] for _ in range(2))
    assert (first == sent, first == second) == (kept, kept)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", first) and first in caplog.text


@pytest.mark.parametrize("method, path, body", [
    ("POST", ANTHROPIC, BODIES[ANTHROPIC]), ("POST", ANTHROPIC, {**BODIES[ANTHROPIC], "stream": True}),
    ("POST", ANTHROPIC, {}), ("POST", "/v1/messages", {}), ("GET", ANTHROPIC, None),
    ("GET", "/anthropic/v1/models", None),
    ("POST", ANTHROPIC + "/count_tokens", BODIES[ANTHROPIC]), ("GET", "/anthropic/nothing", None)])
def test_every_answer_of_anthropics_api_has_its_request_id_header(client: Client, method: str, path: str,
                                                                  body: Any) -> None:
    reply = client.call(method, path, body)
    assert reply.headers["request-id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("name", ["X_Request_Id", "Origin", "Host", "Authorization", "X_Api_Key", "anthropic_version",
                                  "content_type", "User_Agent"])
def test_a_header_of_odd_bytes_is_no_defect_of_ours(make_client: MakeClient, name: str) -> None:
    client = make_client(CLINVK_API_KEYS="k")
    reply = client.call("POST", ANTHROPIC, BODIES[ANTHROPIC], **{"X_Api_Key": "k", name: "caf\xe9"})
    assert reply.status == {"Origin": 403, "Host": 403, "X_Api_Key": 401, "content_type": 415}.get(name, 200)
    assert "request-id" in reply.headers


# ---- Over a real socket

MALFORMED: List[Tuple[bytes, str]] = [
    (b"GARBAGE\r\n\r\n", "native"), (b"GET\r\n\r\n", "native"), (b"\x16\x03\x01\x02\x00\r\n\r\n", "native"),
    (request_of("GET /health HTTP/1.1", "No colon"), "native"), (request_of("GET /health HTTP/1.1", "A : b"), "native"),
    *((request_of(f"POST {path} HTTP/1.1", bad), shape(path)) for path in BODIES
      for bad in ("Content-Length: many", "Content-Length: -1", "Content-Length: 1, 2", "No colon", "A : b")),
    *((request_of(f"POST {path} HTTP/1.1", "Transfer-Encoding: chunked", body="zz\r\n"), shape(path))
      for path in BODIES)]


def test_malformed_http_is_a_400_in_the_shape_of_the_api(serve: Callable[..., Any]) -> None:
    server = serve()
    for sent, kind in MALFORMED:
        reply = server.raw(sent)
        assert reply.status == 400, sent
        assert fault(reply, kind), sent
    reply = server.raw(request_of("POST /v1/models HTTP/1.1", "anthropic-version: 1", "Content-Length: x"))
    assert fault(reply, "anthropic")
    assert server.call("GET", "/health").status == 200 and "Traceback" not in server.stderr


def test_what_waitress_can_not_do_is_no_defect_of_ours(serve: Callable[..., Any]) -> None:
    server = serve()
    reply = server.raw(request_of("GET /health HTTP/1.1", "Transfer-Encoding: gzip"))
    assert reply.status == 400 and "its log" not in fault(reply, "native")


def test_what_waitress_refuses_has_the_request_id_of_the_client(serve: Callable[..., Any]) -> None:
    reply = serve().raw(request_of(f"POST {OPENAI} HTTP/1.1", "X-Request-Id: mine-1", "Content-Length: x"))
    assert (reply.status, reply.headers["x-request-id"]) == (400, "mine-1")


def test_a_client_that_sends_too_much_can_read_why(serve: Callable[..., Any]) -> None:
    reply = serve().call("POST", "/openai/v1/chat/completions", b" " * 12_000_000)
    assert reply.status == 413 and "10485760 bytes" in fault(reply, "openai")


def test_a_body_of_just_the_limit_is_taken_over_a_socket(serve: Callable[..., Any]) -> None:
    server = serve(config={"server": {"max_request_body_bytes": 1000}})
    for path in BODIES:
        assert server.call("POST", path, json.dumps(BODIES[path]).encode().ljust(1000)).status == 200
        assert server.call("POST", path, json.dumps(BODIES[path]).encode().ljust(1001)).status == 413


def test_paths_over_a_real_socket_are_what_their_writers_meant(serve: Callable[..., Any]) -> None:
    server = serve()
    for path, name in [
            ("/openai/v1/models/echo%2Fx", "echo/x"), ("/v1/models/echo%2fx%3Fy", "echo/x?y"),
            ("/openai/v1/models/echo/x/y?z=1", "echo/x/y"), ("/anthropic/v1/models/echo%2F%C3%BC", "echo/\u00fc"),
            ("/anthropic/v1/v1/models/echo%2Fx", "echo/x"), ("//openai//v1//models//echo%2Fx", "echo/x"),
            ("/openai/v1/models/echo%20x%2F..?q=%2F", None), (f"{server.url}/openai/v1/models/echo%2Fx", "echo/x")]:
        reply = server.call("GET", path)
        assert (reply.status, reply.json.get("id")) == ((200, name) if name else (404, None)), path
    for path in ("//health", "/health?x=%2F", "/%68ealth", "//health//", f"{server.url}/health"):
        assert server.call("GET", path).json.get("status") in ("ok", "degraded"), path
    for path, _ in ALTERNATIVES[:5]:
        body = BODIES[ANTHROPIC] if "messages" in path else BODIES[OPENAI]
        for written in ("/{}?beta=true", "{}//"):
            assert server.call("POST", written.format(path), body).status == 200, path


@pytest.mark.parametrize("name", ["\u043f\u043e\u043b\u0435", "a\r\nX-Evil: 1", "a\nb", "\U0001f600", "\xe9", "a, b\0"])
def test_an_unknown_field_of_any_name_is_no_fault(make_client: MakeClient, name: str) -> None:
    client = make_client()
    for path in (OPENAI, ANTHROPIC):
        reply = client.call("POST", path, {**BODIES[path], name: 1, "seed": 1})
        told = reply.headers["x-clinvk-ignored"]
        assert reply.status == 200 and "seed" in told
        assert re.fullmatch(r"[\x20-\x7e]*", told), "a header that can be sent, and that adds no other"


def test_head_and_errors_keep_a_connection_in_step(serve: Callable[..., Any]) -> None:
    connection = serve().connection()
    for method, path, status in [("HEAD", "/health", 200), ("GET", "/nothing", 404), ("HEAD", "/nothing", 404),
                                 ("HEAD", OPENAI, 405), ("GET", "/health", 200)]:
        connection.request(method, path)
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, method == "GET")
    connection.close()
