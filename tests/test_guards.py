"""Who may come in (SPEC 7): every guard in front of every route, in each API's shape; then what each guard lets in and
what it refuses, the ways around them, working directories and flags."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from conftest import REPO, Client, Reply, Served, eventually, fault, request_of, shape

import clinvk

MakeClient = Callable[..., Client]

# A request that echo answers, for each way in.
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
BODIES: Dict[str, Any] = {
    "/api/v1/prompt": {"backend": "echo", "prompt": "hi"}, "/openai/v1/chat/completions": CHAT,
    "/anthropic/v1/messages": {**CHAT, "max_tokens": 9}, "/anthropic/v1/messages/count_tokens": CHAT}


def test_a_host_of_any_length_is_refused_at_once(serve: Callable[..., Served]) -> None:
    server = serve()
    for host in ("a" * 200_000, "@" * 200_000, "me:secret@" + "a" * 200_000):
        reply = server.raw(request_of("GET /health HTTP/1.1", f"Host: {host}"))
        assert reply.status == 403 and len(reply.body) < 1000 and b"secret" not in reply.body


# ---- Every guard in front of every route

class Asked(NamedTuple):
    """A request: `version` says whether it has Anthropic's header, which changes the shape of /v1."""
    method: str
    path: str
    version: bool

    def __str__(self) -> str:
        return f"{self.method} {self.path}" + (" anthropic-version" if self.version else "")

    @property
    def kind(self) -> str:
        return shape(self.path, anthropic_version=self.version)

    def by(self, client: Client, method: str = "", body: bytes = b"{}", **headers: Optional[str]) -> Reply:
        """The answer, all of whose headers that do not hang on the fault are right."""
        method = method or self.method
        sent: Dict[str, Optional[str]] = {"X_Request_Id": "mine-1", "Origin": "app://obsidian.md", **headers}
        if self.version:
            sent["anthropic_version"] = "2023-06-01"
        reply = client.call(method, self.path, body if method == "POST" else None, **sent)
        assert (reply.headers["x-request-id"], reply.headers["vary"]) == ("mine-1", "Origin")
        own = sent["Origin"] == "app://obsidian.md"
        assert reply.headers.get("access-control-allow-origin") == (sent["Origin"] if own else None)
        return reply


def every_route() -> Iterator[Asked]:
    """Each method and path that is registered, and what /v1/models stands for."""
    registered = [(route.method, pattern) for route in clinvk.ROUTES for pattern in route.patterns]
    for method, pattern in dict.fromkeys([*registered, ("GET", "/v1/models"), ("GET", "/v1/models/<name>")]):
        path = re.sub(r"<\w+(:\w+)?>", "echo", pattern)
        versions = (False, True) if path.startswith("/v1/") else (False,)
        yield from (Asked(method, path, version) for version in versions)


ROUTES = list(every_route())
POSTS = [asked for asked in ROUTES if asked.method == "POST"]
each_route = pytest.mark.parametrize("asked", ROUTES, ids=str)
each_post = pytest.mark.parametrize("asked", POSTS, ids=str)

AS_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
KEY = "the-right-key"
OPEN = re.compile(r"/(health|openapi\.json|metrics|docs(/.*)?)")  # without a key

# A fault -> what a request with it has in place of the right headers, the status, and a word of the message.
STRANGERS: Dict[str, Tuple[Dict[str, str], int, str]] = {
    "another Host": ({"Host": "evil.example"}, 403, "server.allowed_hosts"),
    "no Host": ({"Host": ""}, 403, "server.allowed_hosts"),
    "a foreign Origin": ({"Origin": "https://evil.example"}, 403, 'cors_allowed_origins: ["https://evil.example"]'),
    "the Origin of a file": ({"Origin": "null"}, 403, "none that could be allowed"),
    "another local port": ({"Origin": "http://localhost:3000"}, 403, 'cors_allowed_origins: ["http://localhost:3000"]')}
KEYLESS: Dict[str, Dict[str, str]] = {
    "no key": {}, "an empty key": {"X_Api_Key": ""}, "a wrong key": {"X_Api_Key": "the-wrong-key"},
    "a wrong Bearer": {"Authorization": "Bearer the-wrong-key"}, "both wrong": {"X_Api_Key": "a", "Authorization": "b"},
    "the beginning of the key": {"X_Api_Key": KEY[:-1]}, "more than the key": {"Authorization": f"Bearer {KEY}x"},
    "a key in capitals": {"X_Api_Key": KEY.upper()}, "a key that is not ASCII": {"X_Api_Key": "\xe9\xff"},
    "a Bearer that is not ASCII": {"Authorization": "Bearer \xfcber"}, "all keys": {"X_Api_Key": f"{KEY},another-key"},
    "a key twice": {"X_Api_Key": f"{KEY}, {KEY}"}, "another scheme": {"Authorization": f"Basic {KEY}"},
    "no scheme": {"Authorization": KEY}, "only a scheme": {"Authorization": "Bearer "},
    "a cookie": {"Cookie": f"X-Api-Key={KEY}"}, "another header": {"Api_Key": KEY, "Proxy_Authorization": KEY}}
UNTYPED: Dict[str, Optional[str]] = {
    "no type": None, "an empty type": "", "text": "text/plain", "a form": "application/x-www-form-urlencoded",
    "multipart": "multipart/form-data; boundary=x", "jsonp": "application/jsonp", "another JSON": "text/json",
    "JSON as a parameter": "text/plain; application/json", "two types": "application/json, text/plain",
    "a kind of JSON": "application/problem+json"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """An application with two keys. A proxy is trusted, so that a test can have an address of its own."""
    home = tmp_path_factory.mktemp("guarded")
    (home / "config.yaml").write_text("server: {metrics_enabled: true, rate_limit_enabled: true, rate_limit_rps: 0.01, "
                                      "rate_limit_burst: 1, trusted_proxies: ['127.0.0.1']}")
    around = {"HOME": str(home), "CLINVK_API_KEYS": f"another-key, {KEY}"}
    client = Client(clinvk.load_config(str(home / "config.yaml"), around, {}))
    yield client
    client.server.close()


ADDRESSES = itertools.count(1)


def new_address() -> str:
    number = next(ADDRESSES)
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


@each_route
def test_a_request_without_a_fault_passes_every_guard(guarded: Client, asked: Asked) -> None:
    for key in ({"X_Api_Key": KEY}, {"Authorization": f"Bearer {KEY}"}, {"X_Api_Key": "another-key"}):
        reply = asked.by(guarded, X_Forwarded_For=new_address(), **key)
        assert reply.status in (200, 400, 404, 422)  # what the endpoint itself says of an empty body, or a name


@pytest.mark.parametrize("named", STRANGERS)
@each_route
def test_no_route_answers_another_host_or_a_foreign_page(guarded: Client, asked: Asked, named: str) -> None:
    headers, status, word = STRANGERS[named]
    reply = asked.by(guarded, **{"X_Api_Key": KEY, "X_Forwarded_For": new_address(), **headers})
    assert reply.status == status and word in fault(reply, asked.kind)
    assert guarded.input.tell() == 0, "nothing of the body has been read"


@pytest.mark.parametrize("named", KEYLESS)
@each_route
def test_no_route_but_the_open_ones_answers_without_a_right_key(guarded: Client, asked: Asked, named: str) -> None:
    reply = asked.by(guarded, X_Forwarded_For=new_address(), **KEYLESS[named])
    if OPEN.fullmatch(asked.path):
        assert reply.status not in (401, 403)
        return
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert all(word in fault(reply, asked.kind) for word in ("X-Api-Key", "Authorization: Bearer"))
    assert guarded.input.tell() == 0, "nothing of the body has been read"


@pytest.mark.parametrize("named", UNTYPED)
@each_post
def test_no_route_takes_a_body_that_is_not_said_to_be_json(guarded: Client, asked: Asked, named: str) -> None:
    reply = asked.by(guarded, X_Forwarded_For=new_address(), X_Api_Key=KEY, content_type=UNTYPED[named])
    assert reply.status == 415 and "application/json" in fault(reply, asked.kind)
    assert guarded.input.tell() == 0, "nothing of the body has been read"


@each_route
def test_every_route_is_limited_before_anything_else_is_looked_at(guarded: Client, asked: Asked) -> None:
    address = new_address()
    assert asked.by(guarded, X_Forwarded_For=address, X_Api_Key=KEY).status != 429
    for headers in ({"X_Api_Key": KEY}, {}, {"Host": "evil.example"}, {"content_type": "text/plain"}):
        reply = asked.by(guarded, X_Forwarded_For=address, **headers)
        assert reply.status == 429 and 90 <= int(reply.headers["retry-after"]) <= 100
        assert "too many requests" in fault(reply, asked.kind) and "www-authenticate" not in reply.headers


@each_post
def test_the_guards_stand_in_their_order_and_the_path_is_looked_at_behind_the_key(guarded: Client,
                                                                                  asked: Asked) -> None:
    faults = [({"Host": "evil.example"}, 403, "Host"), ({"Origin": "https://other.example"}, 403, "Origin"),
              ({"X_Api_Key": "wrong"}, 401, "X-Api-Key"), ({"content_type": "text/plain"}, 415, "Content-Type")]
    for first, (_, status, word) in enumerate(faults):
        headers = {name: text for fields, _, _ in faults[first:] for name, text in fields.items()}
        for path, of_path in ((asked.path, 415), ("/nothing" + asked.path, 404), ("/api/v1/backends", 405)):
            there = Asked("POST", path, asked.version)
            reply = there.by(guarded, body=b"{", **{"X_Api_Key": KEY, "X_Forwarded_For": new_address(), **headers})
            assert reply.status == (of_path if status == 415 else status) and guarded.input.tell() == 0
            assert reply.status in (404, 405) or word in fault(reply, there.kind)


METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")


@each_route
def test_a_wrong_method_is_a_405_that_says_which_are_right(guarded: Client, asked: Asked) -> None:
    right = {other.method for other in ROUTES if other.path == asked.path}
    right |= {"HEAD"} if "GET" in right else set()
    for method in {*METHODS, "HEAD"} - right:
        reply = asked.by(guarded, method, X_Api_Key=KEY, X_Forwarded_For=new_address())
        assert reply.status == 405 and set(re.split(", *", reply.headers["allow"])) == right
        if method != "HEAD":
            assert all(word in fault(reply, asked.kind) for word in (asked.path, method, *right))


@pytest.mark.parametrize("origin", ["app://obsidian.md", "http://localhost:8080"])
@each_route
def test_a_preflight_of_every_route_is_answered_without_a_key_and_without_running(guarded: Client, asked: Asked,
                                                                                  origin: str) -> None:
    reply = guarded.call("OPTIONS", asked.path, b"{}", Origin=origin, Access_Control_Request_Method=asked.method,
                         X_Forwarded_For=new_address())
    assert (reply.status, reply.body, guarded.input.tell()) == (204, b"", 0)
    assert reply.headers["access-control-allow-origin"] == origin
    assert asked.method in reply.headers["access-control-allow-methods"].split(", ")


@each_post
def test_no_route_takes_a_body_that_is_no_json(guarded: Client, asked: Asked) -> None:
    reply = asked.by(guarded, body=b"{", X_Api_Key=KEY, X_Forwarded_For=new_address())
    assert reply.status == 400 and fault(reply, asked.kind)


def test_no_route_takes_a_body_over_the_limit_whether_its_length_is_told_or_not(serve: Callable[..., Served]) -> None:
    server = serve(config={"server": {"max_request_body_bytes": 1000, "cors_allowed_origins": ["https://a.example"]}})
    with_body = {pattern for route in clinvk.ROUTES if route.body for pattern in route.patterns}
    for asked, size in itertools.product(POSTS, (1001, 4001)):  # at 4 times the limit waitress refuses by itself
        told, chunked = f"Content-Length: {size}", "Transfer-Encoding: chunked"
        headers = ["Content-Type: application/json", "X-Request-Id: mine-1", "Origin: https://a.example",
                   *(["anthropic-version: 2023-06-01"] if asked.version else [])]
        for length, body in ((told, size * " "), (chunked, f"{size:x}\r\n{size * ' '}\r\n0\r\n\r\n")):
            if asked.path not in with_body and size == 1001:
                continue  # it reads none
            reply = server.raw(request_of(f"POST {asked.path} HTTP/1.1", *headers, length, body=body))
            assert reply.status == 413 and "1000 bytes" in fault(reply, asked.kind), (asked, length)
            assert (reply.headers["x-request-id"], reply.headers["vary"]) == ("mine-1", "Origin")
            assert reply.headers["access-control-allow-origin"] == "https://a.example"


def test_without_keys_everything_is_open(client: Client) -> None:
    for sent in ({}, {"X_Api_Key": "whatever"}, {"Authorization": "Bearer whatever"}):
        for path, body in BODIES.items():
            assert client.call("POST", path, body, **sent).status == 200


def test_nothing_has_run_when_a_page_is_refused(make_client: MakeClient, fake_cli: Callable[..., str],
                                                tmp_path: Path) -> None:
    leaves = fake_cli(f"open({str(tmp_path / 'ran')!r}, 'w')")
    client, body = make_client({"backends": {"own": {"command": leaves}}}), {"backend": "own", "prompt": "a"}
    for refused in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"content_type": "text/plain"}):
        assert client.call("POST", "/api/v1/prompt", body, **refused).status in (403, 415)
    assert not (tmp_path / "ran").exists()
    assert client.call("POST", "/api/v1/prompt", body).status == 200 and (tmp_path / "ran").exists()


# ---- Ways around the guards, over a real socket

# A target, and what it is answered without a key and with one.
TARGETS = [
    ("/api/v1/backends", 401, 200), ("//api/v1/backends", 401, 200), ("/api//v1///backends/", 401, 200),
    ("/%61pi/v1/backends", 401, 200), ("/api%2Fv1%2Fbackends", 401, 200), ("/api/v1/backends?/health", 401, 200),
    ("/api/v1/backends?x=../../../health", 401, 200), ("/api/v1/backends#/health", 401, 200),
    ("/api/v1/backends?#/health", 401, 200), ("foo:/api/v1/backends", 401, 200), ("/v1/models", 401, 200),
    ("http://localhost/api/v1/backends", 401, 200), ("HTTP://LOCALHOST:1/api/v1/backends", 401, 200),
    ("/anthropic/v1/v1/models", 401, 200), ("//v1/models?beta=true", 401, 200), ("/", 401, 200),
    ("/?/health", 401, 200),
    ("/health/../api/v1/backends", 401, 404), ("/health%2F..%2Fapi/v1/backends", 401, 404),
    ("/api/v1/../v1/backends", 401, 404), ("/./api/v1/backends", 401, 404), ("/health;/api/v1/backends", 401, 404),
    ("/health;x", 401, 404), ("/health%00", 401, 404), ("/health%0A", 401, 404), ("/health%3Fx", 401, 404),
    ("/health%23", 401, 404), ("/HEALTH", 401, 404), ("/health.", 401, 404), ("/health%20", 401, 404),
    ("/%2568ealth", 401, 404), ("/health%5C..%5Capi", 401, 404), ("\\health", 401, 404), ("health", 401, 404),
    ("*", 401, 404), ("/api/v1/backends/health", 401, 404), ("/openapi.json/x", 401, 404), ("/docsx", 401, 404),
    ("/docs.", 401, 404), ("/metrics/x", 401, 404), ("//evil/health", 401, 404),
    ("/health", 200, 200), ("/health/", 200, 200), ("//health", 200, 200), ("/%68ealth", 200, 200),
    ("/health%2F", 200, 200), ("/%2Fhealth", 200, 200), ("/health?x=/api/v1/backends", 200, 200),
    ("/health#/api/v1/backends", 200, 200)]


@pytest.fixture(scope="module")
def keyed(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a key."""
    folder = tmp_path_factory.mktemp("keyed")
    environ = {"HOME": str(folder), "PATH": os.environ["PATH"], "CLINVK_API_KEYS": KEY}
    server = Served([sys.executable, str(pyz), "serve", "--port", "0"], folder, environ)
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.stderr and "python exception" not in server.stderr


@pytest.mark.parametrize("target, without, with_key", TARGETS)
def test_no_way_to_write_a_path_leads_past_the_key(keyed: Served, target: str, without: int, with_key: int) -> None:
    for method in ("GET", "HEAD"):
        assert keyed.raw(request_of(f"{method} {target} HTTP/1.1")).status == without
        assert keyed.raw(request_of(f"{method} {target} HTTP/1.1", "X-Api-Key: the-wrong-key")).status == without
        assert keyed.raw(request_of(f"{method} {target} HTTP/1.1", f"X-Api-Key: {KEY}")).status == with_key


@pytest.mark.parametrize("target", ["/docs/../api/v1/backends", "/docs/..%2Fapi/v1/backends",
                                    "/docs%2F../api/v1/backends", "/docs/%2e%2e/api/v1/backends"])
def test_no_file_of_the_docs_is_an_endpoint(keyed: Served, target: str) -> None:
    for key in ([], [f"X-Api-Key: {KEY}"]):
        assert keyed.raw(request_of(f"GET {target} HTTP/1.1", *key)).status in (401, 404)


@pytest.mark.parametrize("first, headers, status", [
    ("get /api/v1/backends HTTP/1.1", [], 400), ("post /api/v1/prompt HTTP/1.1", ["Content-Length: 2"], 400),
    ("Post /api/v1/prompt HTTP/1.1", ["Content-Type: application/json", "Content-Length: 2"], 400),
    ("GET /api/v1/prompt HTTP/1.1", ["X-HTTP-Method-Override: POST", "X-Method-Override: POST"], 405),
    ("POST /health HTTP/1.1", ["X-HTTP-Method: GET", "Content-Type: application/json", "Content-Length: 2"], 405),
    ("POST /api/v1/prompt HTTP/1.1", ["Content-Length: 2"], 415),  # without any type
    ("POST /api/v1/prompt HTTP/1.1", ["Content_Type: application/json", "Content-Length: 2"], 415),
    ("OPTIONS /api/v1/prompt HTTP/1.1", [], 405), ("OPTIONS * HTTP/1.1", [], 404),
    ("CONNECT localhost:443 HTTP/1.1", [], 404), ("GET /api/v1/backends HTTP/1.0", [], 200)])
def test_no_other_method_is_taken_for_one_that_runs(keyed: Served, first: str, headers: List[str], status: int) -> None:
    body = "{}" if any("Length" in header for header in headers) else ""
    assert keyed.raw(request_of(first, f"X-Api-Key: {KEY}", *headers, body=body)).status == status
    assert keyed.raw(request_of(first, *headers, body=body)).status in (400, 401, status if "/health" in first else 401)


@pytest.mark.parametrize("headers", [
    ["X-Api-Key: wrong", f"X-Api-Key: {KEY}"], [f"X-Api-Key: {KEY}", f"X-Api-Key: {KEY}"], [f"X_Api_Key: {KEY}"],
    [f"Authorization: Bearer {KEY}", "Authorization: Bearer wrong"],
    [f"Proxy-Authorization: Bearer {KEY}"], [f"Cookie: X-Api-Key={KEY}"], ["Origin: app://x"],
    ["Access-Control-Request-Method: GET", "Origin: app://x"], ["X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1"],
    ["X-Original-URL: /health", "X-Rewrite-URL: /health", "X-Forwarded-Prefix: /health"]])
def test_no_other_header_is_taken_for_a_key(keyed: Served, headers: List[str]) -> None:
    assert keyed.raw(request_of("GET /api/v1/backends HTTP/1.1", *headers)).status == 401


@pytest.mark.parametrize("first, headers, status", [
    ("GET /health HTTP/1.1", ["Host: localhost", "Host: evil.example"], 403),
    ("GET /health HTTP/1.1", ["Host: evil.example", "Host: localhost"], 403),
    ("GET /health HTTP/1.1", ["Host: localhost", "Host: localhost"], 403),
    ("GET /health HTTP/1.1", ["Host: evil.example", "X-Forwarded-Host: localhost", "Forwarded: host=localhost"], 403),
    ("GET /health HTTP/1.1", ["Host: localhost\r\n .evil.example"], 403), ("GET /health HTTP/1.1", ["Host:"], 403),
    ("GET /health HTTP/1.1", ["Host: LocalHost:65536"], 200), ("GET /health HTTP/1.1", ["Host: \t[::1]:1 "], 200),
    ("GET /health HTTP/1.0", ["Host: evil.example"], 403), ("GET /health", ["Host: evil.example"], 403),
    ("GET http://evil.example/health HTTP/1.1", ["Host: localhost"], 403),
    ("GET http://evil.example HTTP/1.1", ["Host: localhost"], 403),
    ("GET https://localhost@evil.example/health HTTP/1.1", ["Host: localhost"], 403),
    ("GET x://localhost:1@evil.example?/health HTTP/1.1", ["Host: localhost"], 403),
    ("GET ht\ttp://evil.example/health HTTP/1.1", ["Host: localhost"], 403),
    ("GET http://localhost/health HTTP/1.1", ["Host: evil.example"], 403),
    ("GET http://[::1]:80/health HTTP/1.1", ["Host: localhost"], 200),
    ("GET //evil.example/health HTTP/1.1", ["Host: localhost"], 404)])
def test_no_way_to_write_a_host_leads_past_its_check(keyed: Served, first: str, headers: List[str],
                                                     status: int) -> None:
    assert keyed.raw(request_of(first, *headers, f"X-Api-Key: {KEY}")).status == status


@pytest.mark.parametrize("first", ["GET /health HTTP/1.1", "GET /health HTTP/1.0", "GET /health"])
def test_a_request_without_a_host_is_refused(keyed: Served, first: str) -> None:
    assert keyed.raw(f"{first}\r\nConnection: close\r\nX-Api-Key: {KEY}\r\n\r\n".encode()).status == 403


# ---- Host

GOOD_HOSTS = ["localhost", "localhost:8080", "LocalHost:1", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:8080"]
BAD_HOSTS = ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.2", "",
             ":1", "0.0.0.0:8080", "192.168.0.7", "[::2]:8080", "[::1].evil.example", "localhost:80.evil.example",
             "xlocalhost", "localhost.", "user@localhost", "localhost:80@evil.example", "localhost:x",
             "localhost:80:80", "localhost, localhost", "localhost localhost", "[::1", "[::1%25lo]", "127.1",
             "0x7f.0.0.1", "2130706433", "127.0.0.1.", "localhost/", "http://localhost", "::ffff:127.0.0.1", "[]",
             "[]:80", "[localhost]", "[127.0.0.1]:8080", "[evil.example]"]


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_this_machines_own_names_are_let_in(client: Client, host: str) -> None:
    assert client.call("GET", "/health", Host=host).status == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_any_other_host_is_refused_even_where_no_key_is_needed(client: Client, host: str) -> None:
    assert client.call("GET", "/health", Host=host).status == 403


@pytest.mark.parametrize("server, keys, host, status", [
    ({"allowed_hosts": ["Box.lan"]}, "", "box.LAN:8080", 200), ({"allowed_hosts": ["box.lan"]}, "", "a.box.lan", 403),
    ({"allowed_hosts": ["box.lan:80", "[fd00::1]"]}, "", "box.lan:81", 200),
    ({"allowed_hosts": ["box.lan:80", "[fd00::1]"]}, "", "[FD00::1]:81", 200),
    ({"allowed_hosts": ["box.lan"]}, "", "localhost", 200), ({"host": "10.0.0.5"}, "", "10.0.0.5:8080", 200),
    ({"host": "10.0.0.5"}, "", "10.0.0.6", 403), ({"host": "0.0.0.0"}, "", "box.lan", 403),
    ({"host": "::"}, "", "box.lan", 403), ({"host": "0.0.0.0"}, "k", "box.lan", 200), ({"host": "::"}, "k", "box", 200),
    ({"host": "127.0.0.1"}, "k", "box.lan", 403), ({"host": "10.0.0.5"}, "k", "box.lan", 403)])
def test_further_hosts_come_from_the_config(make_client: MakeClient, server: Any, keys: str, host: str,
                                            status: int) -> None:
    client = make_client({"server": server}, CLINVK_API_KEYS=keys)
    assert client.call("GET", "/openai/v1/models", Host=host, X_Api_Key="k").status == status


@pytest.mark.parametrize("server, keys, remote, host, passes", [
    ({"host": "0.0.0.0"}, "", "127.0.0.1", "localhost", True),
    ({"host": "0.0.0.0"}, "", "10.0.0.2", "localhost", False),  # Host is what the caller likes
    ({"host": "0.0.0.0", "allowed_hosts": ["box"]}, "", "10.0.0.2", "box", True),
    ({"host": "0.0.0.0"}, "k", "10.0.0.2", "anything", True),
    ({"host": "10.0.0.1"}, "", "10.0.0.2", "10.0.0.1", False),
    ({"host": "10.0.0.1"}, "", "10.0.0.1", "10.0.0.1", True),
    ({"host": "10.0.0.1"}, "k", "10.0.0.2", "10.0.0.1", True),
    ({"host": "::"}, "", "::ffff:127.0.0.1", "localhost", True)])
def test_other_machines_need_keys_or_a_name_that_was_allowed(
        make_client: Callable[..., Any], server: Any, keys: str, remote: str, host: str, passes: bool) -> None:
    config = make_client({"server": server}, CLINVK_API_KEYS=keys).server.config
    head = clinvk.Head({"REQUEST_METHOD": "GET", "PATH_INFO": "/", "HTTP_HOST": host, "REMOTE_ADDR": remote})
    with contextlib.nullcontext() if passes else pytest.raises(clinvk.Forbidden):
        clinvk.check_host(config, head)


# ---- Origin

@pytest.mark.parametrize("origin", [
    None, "http://localhost:8080", "https://localhost:8080", "HTTP://LOCALHOST:8080", "app://obsidian.md",
    "app://-", "tauri://localhost", "vscode-webview://1a2b3c", "vscode-file://vscode-app"])
def test_own_pages_and_desktop_apps_may_call(client: Client, origin: Optional[str]) -> None:
    sent = {} if origin is None else {"Origin": origin}
    assert client.call("POST", "/api/v1/prompt", BODIES["/api/v1/prompt"], **sent).status == 200


@pytest.mark.parametrize("origin", [
    "https://evil.example", "http://localhost:3000", "http://localhost", "http://127.0.0.1:8080", "null", "", "file://",
    "http://localhost:8080.evil.example", "https://app", "http://app://x", "app", "app:", "apps://x", "xapp://x",
    "chrome-extension://abc", "https://tauri.localhost", "*", "http://localhost:8080, http://evil.example",
    "app://x, https://evil.example", "app://x https://evil.example", "https://evil.example, app://x"])
def test_a_page_of_any_other_origin_is_refused(client: Client, origin: str) -> None:
    assert client.call("GET", "/health", Origin=origin).status == 403


@pytest.mark.parametrize("site, dest, status", [
    ("cross-site", "image", 403), ("same-site", "object", 403), ("cross-site", "iframe", 403), ("cross-site", "", 403),
    ("cross-site", "document", 200), ("same-origin", "image", 200), ("none", "document", 200), ("", "", 200)])
def test_what_a_page_loads_without_an_origin_is_refused_by_its_site(client: Client, site: str, dest: str,
                                                                    status: int) -> None:
    """A GET of an element has no Origin; the browser says by itself what kind of page asks, and for what."""
    said = {"Sec_Fetch_Site": site, "Sec_Fetch_Dest": dest} if site else {}
    assert client.call("GET", "/api/v1/sessions", **said).status == status


# ---- CORS

@pytest.mark.parametrize("allowed, origin, status", [
    (["https://app.example"], "https://app.example", 200), (["https://App.example"], "https://app.EXAMPLE", 200),
    (["https://app.example"], "http://app.example", 403), (["https://app.example"], "https://app.example:444", 403),
    (["http://localhost:*"], "http://localhost:3000", 200), (["http://localhost:*"], "http://localhost", 200),
    (["http://localhost:*"], "http://localhost:3000.evil.example", 403),
    (["http://localhost:*"], "http://evil.example/localhost:3000", 403), (["http://a.b"], "http://aXb", 403),
    (["http://x", "http://[::1]:5173"], "http://[::1]:5173", 200), (["*"], "https://any.example", 200),
    (["https://app.example"], "https://app.example, https://evil.example", 403),
    (["*"], "https://app.example, https://evil.example", 403)])
def test_an_allowed_origin_may_call_and_read(make_client: MakeClient, allowed: List[str], origin: str,
                                             status: int) -> None:
    client = make_client({"server": {"cors_allowed_origins": allowed}})
    reply = client.call("POST", "/api/v1/prompt", BODIES["/api/v1/prompt"], Origin=origin)
    assert reply.status == status and reply.headers["vary"] == "Origin"
    assert reply.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    assert ("x-clinvk-backend" in reply.headers.get("access-control-expose-headers", "").lower()) == (status == 200)
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize("path", BODIES)
def test_credentials_are_allowed_if_the_config_says_so_on_errors_too(make_client: MakeClient, path: str) -> None:
    client = make_client({"server": {"cors_allowed_origins": ["https://a.example"], "cors_allow_credentials": True}})
    for body in (BODIES[path], {}):
        reply = client.call("POST", path, body, Origin="https://a.example")
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        assert reply.headers["access-control-allow-credentials"] == "true"


ASKED = "Content-Type, x-api-key, X-Stainless-Os, anthropic-version, openai-beta, Authorization, X-Evil, accept"


@pytest.mark.parametrize("origin", ["https://a.example", "app://obsidian.md", "http://localhost:8080"])
def test_a_preflight_is_answered_without_a_key(make_client: MakeClient, origin: str) -> None:
    client = make_client({"server": {"cors_allowed_origins": ["https://a.example"], "cors_max_age": 7}},
                         CLINVK_API_KEYS="k")
    reply = client.call("OPTIONS", "/v1/messages", Origin=origin, Access_Control_Request_Method="POST",
                        Access_Control_Request_Headers=ASKED, Access_Control_Request_Private_Network="true")
    assert (reply.status, reply.body) == (204, b"")
    told = {name.rpartition("access-control-")[2]: text for name, text in reply.headers.items()}
    assert (told["allow-origin"], told["max-age"], told["allow-private-network"]) == (origin, "7", "true")
    assert {"POST", "DELETE"} <= set(told["allow-methods"].split(", "))
    assert told["allow-headers"] == ASKED.replace("X-Evil, ", "")


@pytest.mark.parametrize("method, headers, status", [
    ("OPTIONS", {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}, 403),
    ("OPTIONS", {"Access_Control_Request_Method": "POST"}, 401),  # no browser asks so
    ("OPTIONS", {"Origin": "http://localhost:8080", "X_Api_Key": "k"}, 405),
    ("POST", {"Origin": "http://localhost:8080", "Access_Control_Request_Method": "POST"}, 401)])
def test_what_is_no_preflight_of_an_allowed_origin_needs_all_the_rest(make_client: MakeClient, method: str,
                                                                      headers: Dict[str, str], status: int) -> None:
    client = make_client(CLINVK_API_KEYS="k")
    assert client.call(method, "/api/v1/prompt", BODIES["/api/v1/prompt"], **headers).status == status


# ---- Rate limit

LIMITED = {"rate_limit_enabled": True, "rate_limit_rps": 0.001, "rate_limit_burst": 2}


@pytest.mark.parametrize("burst", [1, 3])
def test_an_address_may_ask_as_often_as_the_burst_says(make_client: MakeClient, burst: int) -> None:
    client = make_client({"server": {**LIMITED, "rate_limit_burst": burst}}, CLINVK_API_KEYS=KEY)
    paths = itertools.cycle(("/api/v1/backends", "/nothing", "/health", "/"))
    asked = [client.call("GET", path).status for path, _ in zip(paths, range(burst + 3))]
    assert 429 not in asked[:burst] and asked[burst:] == [429] * 3
    assert client.call("GET", "/health", X_Forwarded_For="1.2.3.4").status == 429, "only a trusted proxy says who asks"


def test_tokens_flow_back(make_client: MakeClient) -> None:
    client = make_client({"server": {**LIMITED, "rate_limit_rps": 20, "rate_limit_burst": 1}})
    assert client.call("GET", "/health").status == 200
    eventually(lambda: client.call("GET", "/health").status == 200)


@pytest.mark.parametrize("trusted, forwarded, real, address", [
    ([], "1.1.1.1", "", "127.0.0.1"), (["127.0.0.1"], "1.1.1.1", "", "1.1.1.1"),
    (["127.0.0.0/8"], "", "2.2.2.2", "2.2.2.2"), (["127.0.0.1"], "6.6.6.6, 1.1.1.1", "", "1.1.1.1"),
    (["127.0.0.1", "10.0.0.0/8"], "1.1.1.1, 10.1.2.3", "", "1.1.1.1"), (["127.0.0.1"], "x, y", "z", "127.0.0.1"),
    (["127.0.0.1"], "", "", "127.0.0.1"), (["10.0.0.1"], "1.1.1.1", "", "127.0.0.1"),
    (["127.0.0.1"], "::1", "", "::1"), (["127.0.0.1"], "6.6.6.6, 1.1.1.1:4711", "", "1.1.1.1"),
    (["127.0.0.1"], "6.6.6.6, [2001:db8::1]:4711", "", "2001:db8::1"), (["127.0.0.1"], "[::2]", "", "::2"),
    (["127.0.0.1"], "6.6.6.6, unknown", "", "127.0.0.1"), (["127.0.0.1"], "6.6.6.6, 1.1.1.1.evil", "", "127.0.0.1"),
    (["127.0.0.1"], "x, y", "6.6.6.6", "127.0.0.1"), (["127.0.0.1"], "6.6.6.6, 127.0.0.1", "", "6.6.6.6"),
    (["127.0.0.1"], "6.6.6.6, x, 127.0.0.1", "7.7.7.7", "127.0.0.1"), (["127.0.0.1"], "", "2.2.2.2:80", "2.2.2.2"),
    (["127.0.0.1"], "127.0.0.1", "", "127.0.0.1"), (["127.0.0.1"], "::ffff:127.0.0.1", "", "127.0.0.1"),
    (["127.0.0.1"], "fe80::1%\x1b[31m", "", "127.0.0.1")])
def test_only_a_trusted_proxy_says_who_asks(make_client: MakeClient, trusted: List[str], forwarded: str, real: str,
                                            address: str) -> None:
    config = make_client({"server": {"trusted_proxies": trusted}}).server.config
    head = clinvk.Head({"REQUEST_METHOD": "GET", "REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": forwarded,
                        "HTTP_X_REAL_IP": real})
    assert clinvk.client_address(config, head) == address


def test_each_address_has_its_own_bucket_through_a_proxy(serve: Callable[..., Served]) -> None:
    server = serve(config={"server": {**LIMITED, "rate_limit_burst": 1, "trusted_proxies": ["127.0.0.1"]}})
    asked = [server.call("GET", "/api/v1/backends", X_Forwarded_For=f"1.1.1.{last}").status for last in (1, 2, 1)]
    assert asked == [200, 200, 429]


def test_no_more_addresses_are_remembered_than_there_may_be(make_client: MakeClient) -> None:
    client = make_client({"server": {**LIMITED, "rate_limit_burst": 1, "trusted_proxies": ["127.0.0.1"]}})
    limit, config = client.server.rate_limit, client.server.config
    for number in range(limit.MOST + 10):
        address = f"10.{number >> 8}.{number & 255}.1"
        head = clinvk.Head({"REQUEST_METHOD": "GET", "REMOTE_ADDR": "127.0.0.1", "HTTP_X_REAL_IP": address})
        limit.check(config, head)
    assert len(limit.buckets) == limit.MOST and "10.0.0.1" not in limit.buckets


# ---- Keys

@pytest.mark.parametrize("sent", [
    {"X_Api_Key": "one"}, {"X_Api_Key": "two"}, {"Authorization": "Bearer one"}, {"Authorization": "bearer two"},
    {"Authorization": "Bearer  one "}, {"X_Api_Key": "one", "Authorization": "Bearer one"}])
def test_a_right_key_is_let_in(make_client: MakeClient, sent: Dict[str, str]) -> None:
    client = make_client(CLINVK_API_KEYS="one, two")
    for path, body in BODIES.items():
        assert client.call("POST", path, body, **sent).status == 200


@pytest.mark.parametrize("key", ["schl\u00fcssel".encode(), b"schl\xfcssel", b"\xff\xfe"])
def test_a_key_may_have_any_bytes(make_client: MakeClient, key: bytes) -> None:
    client = make_client(CLINVK_API_KEYS="one," + key.decode(errors="surrogateescape"))
    for sent, status in ((key, 200), (key + b"x", 401), (key[:-1], 401), (b"", 401), (b"one", 200)):
        for headers in ({"X_Api_Key": sent.decode("latin-1")}, {"Authorization": "Bearer " + sent.decode("latin-1")}):
            assert client.call("GET", "/api/v1/backends", **headers).status == status


# ---- Content type

@pytest.mark.parametrize("given", ["application/json", "application/json; charset=utf-8", "Application/JSON",
                                   "application/json;charset=UTF-8"])
def test_json_is_taken(client: Client, given: str) -> None:
    for path, body in BODIES.items():
        assert client.call("POST", path, body, content_type=given).status == 200


def test_a_request_without_a_body_needs_no_content_type(client: Client) -> None:
    assert client.call("GET", "/health").status == 200


# ---- Working directories

@pytest.fixture
def workdir(make_client: MakeClient, tmp_path: Path) -> Callable[..., str]:
    """`workdir(path, **server settings)`: the directory that a run would start in, below a tree of its own."""
    for folder in ("a/inner", "ab", "secret/inner"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a/file").write_text("")
    links = {"to_etc": "/etc", "to_secret": "secret", "to_a": "a", "nowhere": "missing", "loop": "loop",
             "chain": "to_a", "chain_to_etc": "to_etc", "to_root": "/root", "a/up": "..", "a/loop": "loop",
             "a/out": "../secret/inner", "to_ssl": "/etc/ssl"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)

    def resolved(path: Any, home: str = "", **server: List[str]) -> str:
        below = {key: [str(tmp_path / value) for value in values] for key, values in server.items()}
        config = make_client({"server": below}, **({"HOME": home} if home else {})).server.config
        return clinvk.allowed_workdir(path, config, "body")
    return resolved


@pytest.mark.parametrize("path", ["a", "ab", "a/inner", "a/", "a/../ab", "to_a", "to_a/inner", "to_a/../ab",
                                  "a//inner/.", "chain", "chain/inner/", "a/up/ab", "a/up/to_a/up"])
def test_an_existing_directory_is_taken_with_its_links_resolved(
        workdir: Callable[..., str], tmp_path: Path, path: str) -> None:
    assert workdir(f"{tmp_path}/{path}") == os.path.realpath(tmp_path / path)


# Its arguments: where clinvk.py is, a blocked directory, and others, of which it says what becomes of them.
ASKS_FOR = """
import sys
sys.path.insert(0, sys.argv[1])
import clinvk
server = clinvk.ServerConfig(blocked_workdir_prefixes=[sys.argv[2]])
for path in sys.argv[3:]:
    try:
        print(clinvk.allowed_workdir(path, clinvk.Config(server=server), "body"))
    except clinvk.Forbidden:
        print("blocked")
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare on this machine")
def test_a_blocked_directory_is_blocked_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "secret" / "inner").mkdir(parents=True)
    (tmp_path / "other" / "inner").mkdir(parents=True)
    mounted = 'mount --bind secret other && exec "$0" -c "$1" "$2" "$PWD/secret" "$PWD/other" "$PWD/other/inner" "$PWD"'
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", mounted, sys.executable, ASKS_FOR,
                           str(REPO)], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode and re.match("unshare:|mount:", done.stderr):
        pytest.skip("nothing can be mounted here")
    assert (done.stdout.split(), done.stderr) == (["blocked", "blocked", str(tmp_path)], "")


@pytest.mark.skipif(sys.platform != "darwin", reason="macOS takes capital letters for small ones")
@pytest.mark.parametrize("path", ["/ETC", "/private/ETC", "/private/etc", "/USR/Bin", "/private/var/run", "/DEV"])
def test_a_directory_of_the_system_is_refused_however_macos_lets_it_be_written(workdir: Callable[..., str],
                                                                               path: str) -> None:
    with pytest.raises(clinvk.Forbidden, match="workdir"):
        workdir(path)


def test_without_a_workdir_it_is_the_servers_own(workdir: Callable[..., str]) -> None:
    assert workdir(None) == os.getcwd()


@pytest.mark.parametrize("rules", [{"blocked_workdir_prefixes": ["HERE"]}, {"allowed_workdir_prefixes": ["ELSEWHERE"]}])
def test_the_servers_own_directory_is_held_to_the_rules_too(make_client: MakeClient, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch, rules: Any) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = {"HERE": str(tmp_path / "here"), "ELSEWHERE": str(tmp_path / "elsewhere")}
    client = make_client({"server": {key: [places[value] for value in values] for key, values in rules.items()}})
    reply = client.call("POST", "/api/v1/prompt", {"backend": "echo", "prompt": "a"})
    assert reply.status == 403 and f"the server's own directory, {tmp_path / 'here'}," in fault(reply, "native")
    chat = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}
    assert client.call("POST", "/openai/v1/chat/completions", chat).status == 200  # it runs in a place of clinvk's


@pytest.mark.parametrize("path, message", [
    ("TMP/missing", "existing directory"), ("TMP/a/file", "existing directory"), ("TMP/nowhere", "existing directory"),
    ("TMP/a/file/..x", "existing directory"), ("TMP/loop", "existing directory"), ("TMP/a/file/", "existing directory"),
    ("TMP/loop/..", "existing directory"), ("TMP/" + 300 * "x", "existing directory"), ("/dev/null", "existing"),
    ("TMP/a\0", "existing directory")])
def test_what_is_no_directory_is_a_fault_of_the_request(
        workdir: Callable[..., str], tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(clinvk.Invalid, match=f"body.workdir: .*{message}"):
        workdir(path.replace("TMP", str(tmp_path)))


@pytest.mark.parametrize("path", ["/etc", "/etc/", "//etc", "/etc/.", "/proc", "/proc/self", "/sys", "/dev", "/usr/bin",
                                  "/bin", "/sbin", "/usr/sbin", "/boot", "/lib", "/usr/lib", "/usr/lib/..//lib",
                                  "/root", "/var/run", "/run", "/var/lock", "/tmp/../etc", "TMP/to_etc",
                                  "TMP/a/../to_etc", "TMP/chain_to_etc", "TMP/to_etc/../etc", "TMP/a/up/to_etc",
                                  "/proc/self/root/etc", "/etc/../etc", "/proc/self/task/..", "TMP/to_ssl"])
def test_a_directory_of_the_system_is_refused(workdir: Callable[..., str], tmp_path: Path, path: str) -> None:
    path = path.replace("TMP", str(tmp_path))
    if not os.path.isdir(path):
        pytest.skip(f"there is no {path} on this machine")
    with pytest.raises(clinvk.Forbidden, match="workdir"):
        workdir(path)


@pytest.mark.parametrize("path", ["TMP/loop/../to_etc", "TMP/loop/../to_ssl", "TMP/loop/../a/out", "TMP/a/loop/../out",
                                  "TMP/a/loop/../../loop/../secret/inner", "TMP/a/loop/x/../../out"])
@pytest.mark.parametrize("settings", [{"blocked_workdir_prefixes": ["secret"]}, {"allowed_workdir_prefixes": ["a"]}])
def test_a_loop_of_links_hides_no_link_to_a_directory_that_is_refused(
        workdir: Callable[..., str], tmp_path: Path, path: str, settings: Any) -> None:
    with pytest.raises(clinvk.Invalid, match="existing directory"):
        workdir(path.replace("TMP", str(tmp_path)), **settings)


@pytest.mark.skipif(not os.path.isdir("/root"), reason="there is no /root on this machine")
@pytest.mark.parametrize("home, is_home", [("/root", True), ("/root/", True), ("//root/.", True), ("TMP/to_root", True),
                                           ("/home", False), ("/", False), ("/root/own", False), ("TMP/a", False)])
def test_only_root_may_work_in_the_home_of_root(workdir: Callable[..., str], tmp_path: Path, home: str,
                                                is_home: bool) -> None:
    with contextlib.nullcontext() if is_home else pytest.raises(clinvk.Forbidden, match="blocked"):
        assert workdir("/root", home=home.replace("TMP", str(tmp_path))) == "/root"


@pytest.mark.parametrize("path", ["secret", "secret/inner", "to_secret", "to_secret/inner", "a/../secret"])
@pytest.mark.parametrize("prefix", ["secret", "secret/", "to_secret"])
def test_the_config_blocks_more(workdir: Callable[..., str], tmp_path: Path, path: str, prefix: str) -> None:
    with pytest.raises(clinvk.Forbidden, match="blocked"):
        workdir(f"{tmp_path}/{path}", blocked_workdir_prefixes=[prefix])
    with pytest.raises(clinvk.Forbidden, match="blocked"):
        workdir("/etc", blocked_workdir_prefixes=[prefix])


@pytest.mark.parametrize("path, blocked, allowed, refused", [
    ("ab", ["a"], [], ""), ("a", ["ab"], [], ""), ("a", ["a/inner"], [], ""), ("ab", [], ["a"], "none of"),
    ("a", [], ["a"], ""), ("a/inner", [], ["a"], ""), ("to_a", [], ["a"], ""), ("a", [], ["to_a"], ""),
    ("a", [], ["ab", "a/"], ""), ("to_secret", [], ["a"], "none of"), ("a/../secret", [], ["a"], "none of"),
    ("a/inner", ["a/inner"], ["a"], "blocked"), ("ab", ["a"], ["ab"], "")])
def test_a_prefix_matches_whole_components(workdir: Callable[..., str], tmp_path: Path, path: str, blocked: List[str],
                                           allowed: List[str], refused: str) -> None:
    settings = {"blocked_workdir_prefixes": blocked, "allowed_workdir_prefixes": allowed}
    if refused:
        with pytest.raises(clinvk.Forbidden, match=refused):
            workdir(f"{tmp_path}/{path}", **settings)
    else:
        assert workdir(f"{tmp_path}/{path}", **settings) == os.path.realpath(tmp_path / path)


def test_a_system_directory_stays_blocked_when_everything_is_allowed(make_client: MakeClient) -> None:
    config = make_client({"server": {"allowed_workdir_prefixes": ["/", "/etc"]}}).server.config
    with pytest.raises(clinvk.Forbidden, match="blocked"):
        clinvk.allowed_workdir("/etc", config, "body")
    assert clinvk.allowed_workdir("/tmp", config, "body") == os.path.realpath("/tmp")


@AS_ROOT
def test_a_directory_that_can_not_be_entered_is_an_error_that_says_so(make_client: MakeClient, tmp_path: Path) -> None:
    (tmp_path / "locked" / "inner").mkdir(parents=True)
    (tmp_path / "locked").chmod(0)
    client = make_client({"backends": {"own": {"command": "cat"}}})
    for place, status, word in (("locked", 403, "can not be entered"), ("locked/inner", 422, "existing directory")):
        body = {"backend": "own", "prompt": "a", "workdir": str(tmp_path / place)}
        reply = client.call("POST", "/api/v1/prompt", body)
        assert (reply.status, word in fault(reply, "native")) == (status, True)
    (tmp_path / "locked").chmod(0o700)


@pytest.mark.parametrize("workdir, status", [("/etc", 403), ("etc", 422), ("/missing", 422), ("/tmp\0", 422)])
@pytest.mark.parametrize("path", [path for path in BODIES if "count_tokens" not in path])
def test_a_refused_workdir_is_an_error_of_each_api(client: Client, path: str, workdir: str, status: int) -> None:
    own = {"workdir": workdir} if path.startswith("/api") else {"clinvk": {"workdir": workdir}}
    reply = client.call("POST", path, {**BODIES[path], **own})
    assert reply.status == (400 if status == 422 and not path.startswith("/api") else status)
    assert "workdir" in fault(reply, shape(path))


# ---- Flags

ALLOWED = {"--level": True, "--fast": False, "-d": False, "--own": None}  # nobody knows whether a value follows that


@pytest.mark.parametrize("extra", [
    [], ["--fast"], ["--level", "3"], ["--level=3"], ["--level=a b"], ["--fast", "--level", "x", "-d"],
    ["--own", "--fast"], ["--own", "x", "--own=y", "--own"], ["-d", "-d"]])
def test_listed_flags_may_be_passed(extra: List[str]) -> None:
    clinvk.check_flags(extra, ALLOWED, "tool")


@pytest.mark.parametrize("extra, named", [
    (["--model", "x"], "--model"), (["--model=x"], "--model"), (["--fast", "x"], '"x"'), (["x"], '"x"'), ([""], '""'),
    (["--level", "3", "4"], '"4"'), (["--level=3", "4"], '"4"'), (["--level", "--model"], "--level"), (["--"], "--"),
    (["-"], "-"), (["--fastest"], "--fastest"), (["--fas"], "--fas"), (["-dx"], "-dx"), (["--level", "-1"], "--level"),
    (["--level", "--level", "x"], "--level needs a value"), (["--fast", "--level"], "--level needs a value"),
    (["--FAST"], "--FAST"), (["--fast --model"], "--fast --model")])
def test_any_other_flag_or_word_is_refused_by_name(extra: List[str], named: str) -> None:
    with pytest.raises(clinvk.Forbidden) as caught:
        clinvk.check_flags(extra, ALLOWED, "tool")
    assert str(caught.value).startswith("extra: ") and named in str(caught.value)


def test_a_refused_flag_is_told_what_is_allowed_and_how_to_allow_it() -> None:
    with pytest.raises(clinvk.Forbidden, match=r"--fast, --level, --own, -d.*backends\.tool\.allowed_extra_flags"):
        clinvk.check_flags(["--model"], ALLOWED, "tool")


@pytest.mark.parametrize("settings, extra, status, output", [
    ({}, ["--up"], 403, ""), ({"allowed_extra_flags": ["--up"]}, ["--up", "1"], 200, "['--up', '1']"),
    ({"allowed_extra_flags": ["--up"]}, ["--down"], 403, ""),
    ({"extra_flags": ["--mine"]}, ["--mine"], 403, ""), ({"extra_flags": ["--mine"]}, [], 200, "['--mine']"),
    ({"extra_flags": ["--mine"], "allowed_extra_flags": ["--up"]}, ["--up=2"], 200, "['--mine', '--up=2']")])
def test_the_config_says_which_flags_a_request_may_pass(make_client: MakeClient, fake_cli: Callable[..., str],
                                                        settings: Any, extra: List[str], status: int,
                                                        output: str) -> None:
    client = make_client({"backends": {"own": {"command": fake_cli("print(sys.argv[1:])"), **settings}}})
    reply = client.call("POST", "/api/v1/prompt", {"backend": "own", "prompt": "a", "extra": extra})
    assert reply.status == status
    assert reply.json.get("output", "").strip() == output


@pytest.mark.parametrize("backend, flags", [
    ("claude", ["--model", "--system-prompt", "--append-system-prompt", "--output-format", "--input-format", "--resume",
                "-r", "--continue", "-c", "--session-id", "--permission-mode", "--dangerously-skip-permissions",
                "--settings", "--mcp-config", "--add-dir", "--print", "-p", "--allowedTools",
                "--setting-sources", "--agents"]),
    ("codex", ["-m", "--model", "-c", "--config", "-s", "--sandbox", "-a", "--ask-for-approval", "--full-auto", "-C",
               "--cd", "--add-dir", "--dangerously-bypass-approvals-and-sandbox", "-p", "--profile", "--json"]),
    ("gemini", ["-m", "--model", "-p", "--prompt", "-s", "--sandbox", "-y", "--yolo", "--approval-mode", "--acp",
                "--include-directories", "--allowed-mcp-server-names", "-o", "--output-format", "-r", "--resume"])])
def test_no_flag_that_the_server_decides_can_be_passed(backend: str, flags: List[str]) -> None:
    allowed = clinvk.BACKENDS[backend].extra_flags
    for flag in flags:
        for extra in ([flag], [flag, "x"], [flag + "=x"]):
            with pytest.raises(clinvk.Forbidden):
                clinvk.check_flags(extra, allowed, backend)


PASSED: List[Tuple[str, List[str]]] = [
    ("claude", []), ("claude", ["--effort", "high"]), ("claude", ["--effort=high"]), ("claude", ["--betas", "x"]),
    ("claude", ["--max-budget-usd", "0.5"]), ("claude", ["--disallowedTools", "Bash,Edit"]),
    ("claude", ["--disallowed-tools=Bash Edit"]), ("claude", ["--exclude-dynamic-system-prompt-sections"]),
    ("claude", ["--effort", "low", "--betas=x", "--allowed=y"]), ("codex", []), ("codex", ["--allowed", "--allowed=y"]),
    ("gemini", ["--debug"]), ("gemini", ["-d", "--debug"]), ("gemini", ["--allowed=y"]), ("own", ["--allowed", "y"])]
# A value with a dash, one too many, one that no flag asked for, an abbreviation that a parser would expand, short flags
# in one word, capitals, a path into an option, what the server decides.
REFUSED: List[Tuple[str, List[str], str]] = [
    *(("claude", extra, named) for extra, named in [
        (["--effort", "-1"], "--effort needs"), (["--effort", "--model"], "--effort"), (["--betas", "x", "y"], '"y"'),
        (["--effort", "--betas", "mcp"], "--effort needs"), (["--betas"], "--betas needs"),
        (["--effort=high", "x"], '"x"'), (["--exclude-dynamic-system-prompt-sections", "x"], '"x"'), (["x"], '"x"'),
        (["--eff", "high"], "--eff"), (["--effor=high"], "--effor"), (["--disallowed"], "--disallowed"),
        (["--dangerously-skip"], "--dangerously-skip"), (["-dp"], "-dp"), (["-cr"], "-cr"), (["-p=x"], "-p"),
        (["--Effort", "high"], "--Effort"), (["--effort high"], "--effort high"), (["--", "x"], "--"), (["-"], "-"),
        (["--effort", "high", "--settings={}"], "--settings"), (["--allowed-tools", "Bash"], "--allowed-tools"),
        (["--mcp-config", "x"], "--mcp-config"), (["--add-dir=/"], "--add-dir"), ([""], '""'),
        (["\u2013\u2013model"], '"\u2013\u2013model"'), ([" --model"], '" --model"'), (["--allow", "y"], "--allow")]),
    *(("codex", extra, named) for extra, named in [
        (["-c", "x=y"], "-c"), (["-cx=y"], "-cx"), (["--config=x=y"], "--config"), (["--yolo"], "--yolo"),
        (["--full-auto"], "--full-auto"), (["exec"], '"exec"'), (["-sdanger-full-access"], "-sdanger-full-access"),
        (["--allowedx"], "--allowedx"), (["--allowed", "y", "exec"], '"exec"'), (["--enable=hooks"], "--enable")]),
    *(("gemini", extra, named) for extra, named in [
        (["--debug", "x"], '"x"'), (["-dy"], "-dy"), (["-yd"], "-yd"), (["-d", "-y"], "-y"), (["--deb"], "--deb"),
        (["--no-debug"], "--no-debug"), (["--debug.x=1"], "--debug.x"), (["--yolo"], "--yolo"), (["-ddd"], "-ddd"),
        (["--approvalMode=yolo"], "--approvalMode"), (["--policy", "x"], "--policy"), (["-e", "x"], "-e")]),
    ("own", ["--other"], "--other"), ("own", ["-b"], "-b"), ("own", ["--allowed", "y", "z"], '"z"')]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Reply]]:
    """`planned(backend, extra)`: the answer to a dry run; the config of each backend allows one flag more."""
    home = tmp_path_factory.mktemp("planned")
    backends = {name: {"command": "/bin/cat", "allowed_extra_flags": ["--allowed", "-a"]}
                for name in ("claude", "codex", "gemini", "own")}
    (home / "config.yaml").write_text(json.dumps({"backends": backends}))
    client = Client(clinvk.load_config(str(home / "config.yaml"), {"HOME": str(home), "GEMINI_API_KEY": "x"}, {}))
    yield lambda backend, extra, **fields: client.call(
        "POST", "/api/v1/prompt", {"backend": backend, "prompt": "a", "extra": extra, "dry_run": True, **fields})
    client.server.close()


@pytest.mark.parametrize("backend, extra", PASSED)
def test_the_listed_flags_of_each_backend_reach_its_command_line(planned: Callable[..., Reply], backend: str,
                                                                 extra: List[str]) -> None:
    reply = planned(backend, extra)
    assert reply.status == 200
    argv = shlex.split(reply.json["output"].splitlines()[0])
    assert argv[len(argv) - len(extra) - (backend == "codex"):][:len(extra)] == extra


@pytest.mark.parametrize("backend, extra, passed", [
    ("codex", ["--allowed", "logout"], ["--allowed=logout"]), ("claude", ["--allowed", "mcp"], ["--allowed=mcp"]),
    ("gemini", ["--debug", "--allowed", "mcp"], ["--debug", "--allowed=mcp"]),
    ("codex", ["-a", "-a"], ["-a", "-a"]), ("codex", ["--allowed", "", "-a"], ["--allowed=", "-a"]),
    ("claude", ["--effort", "low", "-a", "--allowed"], ["--effort", "low", "-a", "--allowed"])])
def test_no_word_after_a_flag_of_the_config_can_be_taken_for_a_subcommand(
        planned: Callable[..., Reply], backend: str, extra: List[str], passed: List[str]) -> None:
    argv = shlex.split(planned(backend, extra).json["output"].splitlines()[0])
    assert argv[len(argv) - len(passed) - (backend == "codex"):][:len(passed)] == passed


@pytest.mark.parametrize("backend", ["claude", "codex", "gemini"])
@pytest.mark.parametrize("extra", [["-a", "y"], ["-a", "c"], ["--allowed", "-a", "y"], ["-a", "-a", "x=y"]])
def test_no_word_after_a_short_flag_of_the_config_becomes_further_short_flags(planned: Callable[..., Reply],
                                                                              backend: str, extra: List[str]) -> None:
    reply = planned(backend, extra)
    assert reply.status == 403 and "extra: -a can not be given a value" in fault(reply, "native")


@pytest.mark.parametrize("backend, extra, named", REFUSED)
def test_any_other_flag_or_word_of_each_backend_is_refused_by_name(planned: Callable[..., Reply], backend: str,
                                                                   extra: List[str], named: str) -> None:
    for fields in ({}, {"dry_run": None}, {"ephemeral": True}):
        reply = planned(backend, extra, **fields)
        assert reply.status == 403 and f"extra: {named} " in fault(reply, "native")


@pytest.mark.parametrize("path, body", [
    ("/api/v1/prompt", {"backend": "echo", "prompt": "p", "model": "--yolo"}),
    ("/api/v1/prompt", {"backend": "echo", "prompt": "p", "allowed_tools": "--dangerously-skip-permissions"}),
    ("/v1/chat/completions", {"model": "echo/--yolo", "messages": [{"role": "user", "content": "p"}]})])
def test_no_value_can_be_taken_for_a_flag(client: Client, path: str, body: Dict[str, Any]) -> None:
    reply = client.call("POST", path, body)
    assert reply.status in (400, 422) and b"must not begin with a dash" in reply.body
