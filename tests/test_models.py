"""Model names over HTTP: the lists of both APIs, one model, Codex's catalogue, and whom a name asks."""
from __future__ import annotations

import urllib.parse
from typing import Any, Callable, Dict, List, Tuple

import pytest
from conftest import Client, Served, fault, shape

OPENAI, ANTHROPIC, RESPONSES = "/openai/v1/chat/completions", "/anthropic/v1/messages", "/openai/v1/responses"
LISTS = ["/openai/v1/models", "/v1/models", "/anthropic/v1/models"]
CONFIG: Dict[str, Any] = {
    "default_backend": "local",
    "backends": {"claude": {"command": "sh", "model": "opus", "models": {"fast": "haiku", "best": "opus-9"}},
                 "codex": {"command": "sh"}, "gemini": {"command": "sh", "model": "flash"},
                 "local": {"command": ["sh", "-c", "cat >/dev/null; echo local"]}, "absent": {"command": "no-such-cli"},
                 "off": {"command": "cat", "enabled": False}},
    "server": {"model_aliases": {"mine": "echo/alias", "house": "local", "pet": "claude/fast", "claude/pet": "echo"}}}
NAMES = ["claude", "claude/fast", "claude/best", "claude/opus", "codex", "gemini", "gemini/flash", "local", "echo"]


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    return make_client(CONFIG)


def asked(path: str, model: str) -> Dict[str, Any]:
    body: Dict[str, Any] = {"model": model, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    return {"model": model, "input": "hi"} if path == RESPONSES else body


@pytest.mark.parametrize("path", LISTS)
def test_the_list_is_what_can_run_with_its_aliases_and_its_default_model(client: Client, path: str) -> None:
    assert [model["id"] for model in client.call("GET", path).json["data"]] == NAMES


@pytest.mark.parametrize("path", LISTS)
def test_a_name_of_the_list_and_any_other_that_a_backend_takes_can_be_looked_up(client: Client, path: str) -> None:
    for name in [*NAMES, "default", "mine", "house", "claude/pet", "local/any/thing", "gpt-5.1", "claude/ü #"]:
        reply = client.call("GET", f"{path}/{name}")  # what waitress makes of the %2F in a URL
        assert (reply.status, reply.json.get("id")) == (200, name)


def test_a_slash_or_any_other_character_of_a_name_may_come_quoted(serve: Callable[..., Served]) -> None:
    server = serve(config=CONFIG)
    for name in ("claude/opus", "mine", "local/any/thing", "claude/ü ?#"):
        for quoted in (urllib.parse.quote(name, safe=""), urllib.parse.quote(name)):
            reply = server.call("GET", f"/openai/v1/models/{quoted}?limit=3")
            assert (reply.status, reply.json["id"]) == (200, name), quoted


UNKNOWN = [  # a name, and what is said of it
    ("cluade", 404, 'did you mean "claude"?'), ("hose", 404, 'did you mean "house"?'), ("xyzzy", 404, "mine, house"),
    ("cluade/x", 404, '"cluade/x"'), ("absent", 503, 'no "no-such-cli" on PATH'),
    ("off/x", 503, "backends.off.enabled")]


@pytest.mark.parametrize("way", [*LISTS, OPENAI, ANTHROPIC, RESPONSES])
def test_what_no_backend_goes_by_is_an_error_that_says_what_there_is(client: Client, way: str) -> None:
    for name, status, words in UNKNOWN:
        reply = client.call("GET", f"{way}/{name}") if way in LISTS else client.call("POST", way, asked(way, name))
        not_found = ("invalid_request_error", "model_not_found", "not_found_error") if status == 404 else None
        assert reply.status == status and words in fault(reply, shape(way), not_found)


MEANT = [("local", "local", None), ("default", "local", None), ("house", "local", None), ("echo", "echo", None),
         ("claude/any/thing", "claude", "any/thing"), ("codex", "codex", None), ("claude", "claude", "opus"),
         ("gemini-3", "gemini", "gemini-3"), ("pet", "claude", "haiku"), ("mine", "echo", None),
         ("echo/any/thing", "echo", None), ("claude/pet", "echo", None)]


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_says_in_headers_who_gave_it_and_repeats_the_name_asked_for(
        client: Client, path: str, stream: bool) -> None:
    for model, backend, named in MEANT:
        dry = {"clinvk": {"dry_run": backend not in ("local", "echo")}}
        reply = client.call("POST", path, {**asked(path, model), "stream": stream, **dry})
        assert (reply.status, reply.headers["x-clinvk-backend"]) == (200, backend)
        assert reply.headers.get("x-clinvk-model") == named  # what its CLI is told; echo, say, takes no model
        ignored = model in ("mine", "echo/any/thing")
        assert ("model" in reply.headers.get("x-clinvk-ignored", "").split(", ")) == ignored
        first = reply.json if not stream else reply.data[0]
        assert {**first, **first.get("message", {}), **first.get("response", {})}["model"] == model


def test_a_header_holds_no_line_of_a_name(client: Client) -> None:
    reply = client.call("POST", OPENAI, {**asked(OPENAI, "claude/a\r\nSet-Cookie: é\x85\u2028"),
                                         "clinvk": {"dry_run": True}})
    assert reply.headers["x-clinvk-model"] == "a??Set-Cookie: ???"


def test_a_model_that_a_backend_can_not_be_told_is_ignored_and_not_said_to_have_answered(client: Client) -> None:
    asked = {"backend": "local", "prompt": "hi", "model": "any"}
    told = client.call("POST", "/api/v1/prompt", asked).json
    session = client.call("GET", f"/api/v1/sessions/{told['session_id']}").json
    assert (told.get("model"), told["ignored"], session["model"]) == (None, ["model"], "")


# ---- Codex

def catalogue(client: Client, version: str = "0.169.0") -> List[Dict[str, Any]]:
    found: List[Dict[str, Any]] = client.call("GET", f"/openai/v1/models?client_version={version}").json["models"]
    return found


def test_codex_is_told_the_same_models_in_its_own_form(client: Client) -> None:
    plain, told = (client.call("GET", f"/openai/v1/models{query}").json for query in ("", "?client_version=0.169.0"))
    assert set(plain) == {"object", "data"} and plain == {name: told[name] for name in plain}
    assert [model["slug"] for model in told["models"]] == NAMES
    assert [model["priority"] for model in told["models"]] == list(range(len(NAMES)))


# codex 0.169.0 refuses the whole list if one of these is not there, or is of another type.
REQUIRED = {"slug": str, "display_name": str, "supported_reasoning_levels": list, "shell_type": str, "visibility": str,
            "supported_in_api": bool, "priority": int, "base_instructions": str, "support_verbosity": bool,
            "truncation_policy": dict, "experimental_supported_tools": list}


def test_codex_finds_all_that_it_must_have_and_no_tool_that_clinvk_does_not_offer(client: Client) -> None:
    for model in catalogue(client):
        assert {name: type(model.get(name)) for name in REQUIRED} == REQUIRED
        assert model["shell_type"] == "disabled" and model["experimental_supported_tools"] == []
        assert "apply_patch_tool_type" not in model and model["base_instructions"]
        assert model["truncation_policy"]["mode"] in ("bytes", "tokens") and model["truncation_policy"]["limit"] > 0


def test_codex_is_told_what_the_backend_can(client: Client) -> None:
    told = {model["slug"]: model for model in catalogue(client)}
    levels = [told[name]["supported_reasoning_levels"] for name in ("claude/opus", "codex", "gemini", "echo", "local")]
    assert [[level["effort"] for level in one] for one in levels] == [["low", "medium", "high", "xhigh"]] * 2 + [[]] * 3
    assert all(level["description"] for one in levels for level in one)
    assert {name: (model["context_window"], model["input_modalities"]) for name, model in told.items()} == {
        **{name: (200_000, ["text", "image"]) for name in NAMES if name.startswith("claude")},
        "codex": (258_400, ["text", "image"]), "gemini": (1_000_000, ["text", "image"]),
        "gemini/flash": (1_000_000, ["text", "image"]), "local": (128_000, ["text"]), "echo": (128_000, ["text"])}


@pytest.mark.parametrize("path", LISTS)
def test_any_other_query_leaves_the_list_as_it_is(client: Client, path: str) -> None:
    for query in ("", "?limit=1000", "?client_version=", "?client_versions=1", "?beta=true&x=%00"):
        reply = client.call("GET", path + query)
        assert (reply.status, "models" in reply.json) == (200, False)


def test_the_document_tells_of_the_catalogue(client: Client) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = client.call("GET", "/openapi.json").json
    told = document["paths"]["/openai/v1/models"]["get"]
    assert [parameter["name"] for parameter in told["parameters"]] == ["client_version"]
    schema = told["responses"]["200"]["content"]["application/json"]["schema"]
    validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    for query in ("", "?client_version=1"):
        assert not list(validator.iter_errors(client.call("GET", "/openai/v1/models" + query).json))
    entry = document["components"]["schemas"]["CodexModel"]
    assert set(entry["properties"]) == set(catalogue(client)[0]) >= set(REQUIRED) and set(entry["required"]) >= set(
        REQUIRED)


UPGRADE: List[Tuple[str, str]] = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
                                  ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
                                  ("openai-beta", "responses_websockets=2026-02-06")]


def test_a_websocket_is_a_426_so_that_codex_goes_over_to_post(serve: Callable[..., Served]) -> None:
    server = serve()
    for path in (RESPONSES, "/v1/responses", ANTHROPIC):
        reply = server.call("GET", path, **{name.replace("-", "_"): value for name, value in UPGRADE})
        assert (reply.status, "allow" in reply.headers) == (426, False)
        assert "send POST" in fault(reply, shape(path))
    reply = server.call("POST", RESPONSES, asked(RESPONSES, "echo"), Upgrade="websocket")
    assert (reply.status, reply.json["status"]) == (200, "completed")


def test_nothing_else_is_a_426(client: Client) -> None:
    for method, path, upgrade, status in [
            ("GET", RESPONSES, "", 405), ("GET", RESPONSES, "h2c", 405), ("GET", RESPONSES, "WebSocket", 426),
            ("PUT", RESPONSES, "websocket", 405), ("GET", "/openai/v1/models", "websocket", 200),
            ("GET", "/openai/v1/nothing", "websocket", 404)]:
        reply = client.call(method, path, Upgrade=upgrade)
        assert reply.status == status and (reply.headers.get("allow") == "POST") == (status == 405)
