"""Who may come in: Host, Origin, keys, content type; working directories and flags (SPEC 7)."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import pytest
from conftest import Client, Reply, Served, eventually

import clinvk

MakeClient = Callable[..., Client]

# A request that echo answers, for each way in.
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
BODIES: Dict[str, Any] = {
    "/api/v1/prompt": {"backend": "echo", "prompt": "hi"}, "/openai/v1/chat/completions": CHAT,
    "/v1/chat/completions": CHAT, "/anthropic/v1/messages": {**CHAT, "max_tokens": 9},
    "/v1/messages": {**CHAT, "max_tokens": 9}, "/anthropic/v1/messages/count_tokens": CHAT}
each_api = pytest.mark.parametrize("path", BODIES)

# What each API calls an error: OpenAI's type and code, Anthropic's type.
NAMES = {401: ("authentication_error", "invalid_api_key", "authentication_error"),
         403: ("permission_error", None, "permission_error"),
         415: ("invalid_request_error", None, "invalid_request_error")}


def refusal(reply: Reply, path: str) -> str:
    """The message of an error, which has the status and the shape that the API of `path` gives it."""
    if "messages" in path:
        assert set(reply.json) == {"type", "error", "request_id"} and reply.json["type"] == "error"
        assert reply.json["error"]["type"] == NAMES[reply.status][2]
        assert reply.json["request_id"] == reply.headers["request-id"]
        return str(reply.json["error"]["message"])
    if "completions" in path:
        assert (reply.json["error"]["type"], reply.json["error"]["code"]) == NAMES[reply.status][:2]
        assert "param" in reply.json["error"]
        return str(reply.json["error"]["message"])
    assert reply.headers["content-type"] == "application/problem+json"
    assert (reply.json["type"], reply.json["status"]) == ("about:blank", reply.status) and reply.json["title"]
    return str(reply.json["detail"])


# ---- Host

GOOD_HOSTS = ["localhost", "localhost:8080", "LocalHost:1", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:8080"]
BAD_HOSTS = ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.2", "",
             ":1", "0.0.0.0:8080", "192.168.0.7", "[::2]:8080", "[::1].evil.example", "localhost:80.evil.example",
             "xlocalhost"]


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_this_machines_own_names_are_let_in(client: Client, host: str) -> None:
    assert client.call("GET", "/health", Host=host).status == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
@pytest.mark.parametrize("path", ["/health", "/", "/v1/models"])
def test_any_other_host_is_refused_even_where_no_key_is_needed(client: Client, host: str, path: str) -> None:
    assert client.call("GET", path, Host=host).status == 403


@each_api
def test_a_refused_host_is_told_how_to_allow_it(client: Client, path: str) -> None:
    reply = client.call("POST", path, BODIES[path], Host="evil.example")
    assert reply.status == 403
    assert all(word in refusal(reply, path) for word in ("evil.example", "server.allowed_hosts"))


@pytest.mark.parametrize("server, keys, host, status", [
    ({"allowed_hosts": ["Box.lan"]}, "", "box.LAN:8080", 200), ({"allowed_hosts": ["box.lan"]}, "", "a.box.lan", 403),
    ({"allowed_hosts": ["box.lan"]}, "", "localhost", 200), ({"host": "10.0.0.5"}, "", "10.0.0.5:8080", 200),
    ({"host": "10.0.0.5"}, "", "10.0.0.6", 403), ({"host": "0.0.0.0"}, "", "box.lan", 403),
    ({"host": "::"}, "", "box.lan", 403), ({"host": "0.0.0.0"}, "k", "box.lan", 200), ({"host": "::"}, "k", "box", 200),
    ({"host": "127.0.0.1"}, "k", "box.lan", 403), ({"host": "10.0.0.5"}, "k", "box.lan", 403)])
def test_further_hosts_come_from_the_config(make_client: MakeClient, server: Any, keys: str, host: str,
                                            status: int) -> None:
    client = make_client({"server": server}, CLINVK_API_KEYS=keys)
    assert client.call("GET", "/openai/v1/models", Host=host, X_Api_Key="k").status == status


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
    "chrome-extension://abc", "https://tauri.localhost", "*", "http://localhost:8080, http://evil.example"])
@pytest.mark.parametrize("method, path", [("POST", "/api/v1/prompt"), ("GET", "/api/v1/backends"), ("GET", "/health")])
def test_a_page_of_any_other_origin_is_refused(client: Client, origin: str, method: str, path: str) -> None:
    assert client.call(method, path, BODIES.get(path), Origin=origin).status == 403


@each_api
def test_a_refused_origin_is_named(client: Client, path: str) -> None:
    reply = client.call("POST", path, BODIES[path], Origin="https://evil.example")
    assert reply.status == 403 and "https://evil.example" in refusal(reply, path)


def test_nothing_has_run_when_a_page_is_refused(make_client: MakeClient, fake_cli: Callable[..., str],
                                                tmp_path: Path) -> None:
    leaves = fake_cli(f"open({str(tmp_path / 'ran')!r}, 'w')")
    client, body = make_client({"backends": {"own": {"command": leaves}}}), {"backend": "own", "prompt": "a"}
    for refused in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"content_type": "text/plain"}):
        assert client.call("POST", "/api/v1/prompt", body, **refused).status in (403, 415)
    assert not (tmp_path / "ran").exists()
    assert client.call("POST", "/api/v1/prompt", body).status == 200 and (tmp_path / "ran").exists()


# ---- CORS

@pytest.mark.parametrize("allowed, origin, status", [
    (["https://app.example"], "https://app.example", 200), (["https://App.example"], "https://app.EXAMPLE", 200),
    (["https://app.example"], "http://app.example", 403), (["https://app.example"], "https://app.example:444", 403),
    (["http://localhost:*"], "http://localhost:3000", 200), (["http://localhost:*"], "http://localhost", 200),
    (["http://localhost:*"], "http://localhost:3000.evil.example", 403),
    (["http://localhost:*"], "http://evil.example/localhost:3000", 403), (["http://a.b"], "http://aXb", 403),
    (["http://x", "http://[::1]:5173"], "http://[::1]:5173", 200), (["*"], "https://any.example", 200)])
@each_api
def test_an_allowed_origin_may_call_and_read(make_client: MakeClient, path: str, allowed: List[str], origin: str,
                                             status: int) -> None:
    client = make_client({"server": {"cors_allowed_origins": allowed}})
    reply = client.call("POST", path, BODIES[path], Origin=origin)
    assert reply.status == status and reply.headers["vary"] == "Origin"
    assert reply.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    assert ("x-clinvk-backend" in reply.headers.get("access-control-expose-headers", "").lower()) == (status == 200)
    assert "access-control-allow-credentials" not in reply.headers


@each_api
def test_an_error_can_be_read_by_an_allowed_origin(make_client: MakeClient, path: str) -> None:
    client = make_client({"server": {"cors_allowed_origins": ["https://a.example"], "cors_allow_credentials": True}})
    reply = client.call("POST", path, {}, Origin="https://a.example")
    assert reply.status in (400, 422) and reply.headers["access-control-allow-origin"] == "https://a.example"
    assert reply.headers["access-control-allow-credentials"] == "true"


def test_a_refused_origin_is_told_the_line_to_add(client: Client) -> None:
    reply = client.call("GET", "/health", Origin="http://localhost:3000")
    assert 'server.cors_allowed_origins: ["http://localhost:3000"]' in reply.json["detail"]


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


def test_what_waitress_refuses_can_be_read_too(serve: Callable[..., Served]) -> None:
    server = serve(config={"server": {"max_request_body_bytes": 10, "cors_allowed_origins": ["https://a.example"]}})
    reply = server.call("POST", "/api/v1/prompt", b"x" * 100, Origin="https://a.example")
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (413, "https://a.example")


# ---- Rate limit

LIMITED = {"rate_limit_enabled": True, "rate_limit_rps": 0.001, "rate_limit_burst": 2}


@each_api
def test_who_asks_too_often_is_told_when_to_ask_again(make_client: MakeClient, path: str) -> None:
    client = make_client({"server": {**LIMITED, "rate_limit_rps": 0.1}})
    replies = [client.call("POST", path, BODIES[path]) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 10
    assert "too many requests" in json.dumps(replies[-1].json)


def test_the_limit_comes_before_the_key_and_covers_every_path(make_client: MakeClient) -> None:
    client = make_client({"server": LIMITED}, CLINVK_API_KEYS="k")
    paths = ("/api/v1/backends", "/nothing", "/health", "/")
    assert [client.call("GET", path).status for path in paths] == [401, 401, 429, 429]


def test_tokens_flow_back(make_client: MakeClient) -> None:
    client = make_client({"server": {**LIMITED, "rate_limit_rps": 20, "rate_limit_burst": 1}})
    assert client.call("GET", "/health").status == 200
    eventually(lambda: client.call("GET", "/health").status == 200)


@pytest.mark.parametrize("trusted, forwarded, real, address", [
    ([], "1.1.1.1", "", "127.0.0.1"), (["127.0.0.1"], "1.1.1.1", "", "1.1.1.1"),
    (["127.0.0.0/8"], "", "2.2.2.2", "2.2.2.2"), (["127.0.0.1"], "6.6.6.6, 1.1.1.1", "", "1.1.1.1"),
    (["127.0.0.1", "10.0.0.0/8"], "1.1.1.1, 10.1.2.3", "", "1.1.1.1"), (["127.0.0.1"], "x, y", "z", "127.0.0.1"),
    (["127.0.0.1"], "", "", "127.0.0.1"), (["10.0.0.1"], "1.1.1.1", "", "127.0.0.1"),
    (["127.0.0.1"], "::1", "", "::1")])
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


@pytest.mark.parametrize("sent", [
    {}, {"X_Api_Key": ""}, {"X_Api_Key": "on"}, {"X_Api_Key": "one,two"}, {"X_Api_Key": "One"}, {"X_Api_Key": "onee"},
    {"Authorization": "one"}, {"Authorization": "Basic one"}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "},
    {"Authorization": "Bearer three"}, {"Cookie": "X-Api-Key=one"}, {"X_Api_Key": "\xe9\xff"}])
@each_api
def test_no_key_or_a_wrong_one_is_refused(make_client: MakeClient, path: str, sent: Dict[str, str]) -> None:
    reply = make_client(CLINVK_API_KEYS="one, two").call("POST", path, BODIES[path], **sent)
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert "X-Api-Key" in refusal(reply, path)
    if path.startswith("/api/v1"):
        assert reply.json["error"] == "unauthorized" and reply.json["message"] == reply.json["detail"]


@pytest.mark.parametrize("path, is_open", [
    ("/health", True), ("/openapi.json", True), ("/docs", True), ("/metrics", True), ("//health/", True),
    ("/health?key=1", True), ("/", False), ("/api/v1/backends", False), ("/openai/v1/models", False),
    ("/v1/models", False), ("/anthropic/v1/models", False), ("/nothing", False), ("/healthy", False),
    ("/api/v1/prompt/health", False), ("/health/../api/v1/backends", False)])
def test_only_what_tells_nothing_is_open_without_a_key(make_client: MakeClient, path: str, is_open: bool) -> None:
    client = make_client(CLINVK_API_KEYS="one")
    for method in ("GET", "HEAD"):
        assert (client.call(method, path).status != 401) == is_open


@pytest.mark.parametrize("sent", [{}, {"X_Api_Key": "whatever"}, {"Authorization": "Bearer whatever"}])
def test_without_keys_everything_is_open(client: Client, sent: Dict[str, str]) -> None:
    for path, body in BODIES.items():
        assert client.call("POST", path, body, **sent).status == 200


# ---- Content type

@pytest.mark.parametrize("given", ["application/json", "application/json; charset=utf-8", "Application/JSON",
                                   "application/json;charset=UTF-8"])
def test_json_is_taken(client: Client, given: str) -> None:
    for path, body in BODIES.items():
        assert client.call("POST", path, body, content_type=given).status == 200


@pytest.mark.parametrize("given", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx",
                                   "multipart/form-data; boundary=x", "text/json", "text/plain; application/json"])
@each_api
def test_what_is_not_said_to_be_json_is_refused(client: Client, path: str, given: str) -> None:
    reply = client.call("POST", path, BODIES[path], content_type=given)
    assert reply.status == 415 and "application/json" in refusal(reply, path)


def test_a_request_without_a_body_needs_no_content_type(client: Client) -> None:
    assert client.call("GET", "/health").status == 200


# ---- Working directories

@pytest.fixture
def workdir(make_client: MakeClient, tmp_path: Path) -> Callable[..., str]:
    """`workdir(path, **server settings)`: the directory that a run would start in, below a tree of its own."""
    for folder in ("a/inner", "ab", "secret/inner"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a/file").write_text("")
    for name, target in {"to_etc": "/etc", "to_secret": "secret", "to_a": "a", "nowhere": "missing"}.items():
        (tmp_path / name).symlink_to(target)

    def resolved(path: Any, home: str = "", **server: List[str]) -> str:
        below = {key: [str(tmp_path / value) for value in values] for key, values in server.items()}
        config = make_client({"server": below}, **({"HOME": home} if home else {})).server.config
        return clinvk.allowed_workdir(path, config, "body")
    return resolved


@pytest.mark.parametrize("path", ["a", "ab", "a/inner", "a/", "a/../ab", "to_a", "to_a/inner"])
def test_an_existing_directory_is_taken_with_its_links_resolved(
        workdir: Callable[..., str], tmp_path: Path, path: str) -> None:
    assert workdir(f"{tmp_path}/{path}") == os.path.realpath(tmp_path / path)


def test_without_a_workdir_it_is_the_servers_own(workdir: Callable[..., str]) -> None:
    assert workdir(None) == os.getcwd()


@pytest.mark.parametrize("path, message", [
    ("TMP/missing", "existing directory"), ("TMP/a/file", "existing directory"), ("TMP/nowhere", "existing directory"),
    ("TMP/a/file/..x", "existing directory")])
def test_what_is_no_directory_is_a_fault_of_the_request(
        workdir: Callable[..., str], tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(clinvk.Invalid, match=f"body.workdir: .*{message}"):
        workdir(path.replace("TMP", str(tmp_path)))


@pytest.mark.parametrize("path", ["/etc", "/etc/", "//etc", "/etc/.", "/proc", "/proc/self", "/sys", "/dev", "/usr/bin",
                                  "/bin", "/sbin", "/usr/sbin", "/boot", "/lib", "/usr/lib", "/usr/lib/..//lib",
                                  "/root", "/var/run", "/run", "/var/lock", "/tmp/../etc", "TMP/to_etc",
                                  "TMP/a/../to_etc"])
def test_a_directory_of_the_system_is_refused(workdir: Callable[..., str], tmp_path: Path, path: str) -> None:
    path = path.replace("TMP", str(tmp_path))
    if not os.path.isdir(path):
        pytest.skip(f"there is no {path} on this machine")
    with pytest.raises(clinvk.Forbidden, match="workdir"):
        workdir(path)


@pytest.mark.skipif(not os.path.isdir("/root"), reason="there is no /root on this machine")
def test_root_may_work_at_home(workdir: Callable[..., str]) -> None:
    assert workdir("/root", home="/root") == "/root"


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


@pytest.mark.parametrize("workdir, status", [("/etc", 403), ("etc", 422), ("/missing", 422)])
@pytest.mark.parametrize("path", [path for path in BODIES if "count_tokens" not in path])
def test_a_refused_workdir_is_an_error_of_each_api(client: Client, path: str, workdir: str, status: int) -> None:
    own = {"workdir": workdir} if path.startswith("/api") else {"clinvk": {"workdir": workdir}}
    reply = client.call("POST", path, {**BODIES[path], **own})
    assert reply.status == (400 if status == 422 and not path.startswith("/api") else status)
    if reply.status == 403:
        assert "/etc" in refusal(reply, path)


# ---- Flags

ALLOWED = {"--level": True, "--fast": False, "-d": False}


@pytest.mark.parametrize("extra", [
    [], ["--fast"], ["--level", "3"], ["--level=3"], ["--level=a b"], ["--fast", "--level", "x", "-d"],
    ["--level", "--fast"], ["-d", "-d"]])
def test_listed_flags_may_be_passed(extra: List[str]) -> None:
    clinvk.check_flags(extra, ALLOWED, "tool")


@pytest.mark.parametrize("extra, named", [
    (["--model", "x"], "--model"), (["--model=x"], "--model"), (["--fast", "x"], '"x"'), (["x"], '"x"'), ([""], '""'),
    (["--level", "3", "4"], '"4"'), (["--level=3", "4"], '"4"'), (["--level", "--model"], "--model"), (["--"], "--"),
    (["-"], "-"), (["--fastest"], "--fastest"), (["--fas"], "--fas"), (["-dx"], "-dx"), (["--level", "-1"], "-1"),
    (["--FAST"], "--FAST"), (["--fast --model"], "--fast --model")])
def test_any_other_flag_or_word_is_refused_by_name(extra: List[str], named: str) -> None:
    with pytest.raises(clinvk.Forbidden) as caught:
        clinvk.check_flags(extra, ALLOWED, "tool")
    assert str(caught.value).startswith("extra: ") and named in str(caught.value)


def test_a_refused_flag_is_told_what_is_allowed_and_how_to_allow_it() -> None:
    with pytest.raises(clinvk.Forbidden, match=r"--fast, --level, -d.*backends\.tool\.allowed_extra_flags"):
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


@pytest.mark.parametrize("path, body", [
    ("/api/v1/prompt", {"backend": "echo", "prompt": "p", "model": "--yolo"}),
    ("/api/v1/prompt", {"backend": "echo", "prompt": "p", "allowed_tools": "--dangerously-skip-permissions"}),
    ("/v1/chat/completions", {"model": "echo/--yolo", "messages": [{"role": "user", "content": "p"}]})])
def test_no_value_can_be_taken_for_a_flag(client: Client, path: str, body: Dict[str, Any]) -> None:
    reply = client.call("POST", path, body)
    assert reply.status in (400, 422) and b"must not begin with a dash" in reply.body
