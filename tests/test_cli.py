"""The command line: clinvk.pyz as a process, from its start-up text to its exit code."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set

import clinvk
import pytest
from conftest import Served, eventually, interpreter

# SPEC 1, whole; a version shows those of the paths that it has.
START_UP_TEXT = """\
clinvk API server starting on http://127.0.0.1:PORT

Available endpoints:
  Custom API:     /api/v1/prompt, /api/v1/parallel, /api/v1/chain, /api/v1/compare
  OpenAI:         /openai/v1/models, /openai/v1/chat/completions
  Anthropic:      /anthropic/v1/messages
  Docs:           /openapi.json
  Health:         /health

Press Ctrl+C to stop
"""
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \S+ [A-Z]+ /\S* \d{3} \d+ ms [A-Za-z0-9._-]+( .*)?")
AS_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(pyz: Path, tmp_path: Path) -> Call:
    """`call(*arguments, **environ)` runs the .pyz to its end, in an empty folder, with an empty home."""
    def run(*arguments: object, **environ: str) -> "subprocess.CompletedProcess[str]":
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CLINVK_")}
        return subprocess.run([sys.executable, str(pyz), *map(str, arguments)], capture_output=True, text=True,
                              cwd=home, env={**inherited, "HOME": str(home), **environ}, timeout=120)
    return run


def refusal(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line on stderr of a server that could not start."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@contextlib.contextmanager
def running(arguments: List[str], folder: Path, environ: Dict[str, str]) -> Iterator[Served]:
    """A server whose command line and environment are just these."""
    server = Served([sys.executable, *arguments], folder, environ)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def free_port() -> int:
    """None of those that a system gives to whoever asks for any: nobody else takes it meanwhile."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


# ---- Help and versions

@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_has_examples_that_can_be_copied(call: Call, arguments: List[str]) -> None:
    done = call(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    words = ("clinvk.pyz serve", "--port", "--config", "version", "curl")
    assert [word for word in words if word not in done.stdout] == []
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_help_of_serve_names_its_flags_and_their_defaults(call: Call) -> None:
    text = call("serve", "--help").stdout
    words = ("--host", "127.0.0.1", "-p", "--port", "8080", "--config", "config.yaml")
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_the_version_names_python_and_what_is_inside(call: Call, argument: str) -> None:
    done = call(argument)
    wanted = Path(__file__).with_name("requirements.txt").read_text()
    pins = re.findall(r"^(?:bottle|waitress|PyYAML)==([\d.]+)", wanted, re.MULTILINE)
    python = ".".join(map(str, sys.version_info[:3]))
    assert (done.returncode, done.stderr, done.stdout.count("\n"), len(pins)) == (0, "", 1, 3)
    assert [part for part in (clinvk.__version__, python, *pins) if part not in done.stdout] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
@pytest.mark.parametrize("arguments", [["serve", "--port", "0"], ["version"], []])
def test_what_it_prints_and_nobody_takes_is_one_line_of_an_error(pyz: Path, tmp_path: Path,
                                                                 arguments: List[str]) -> None:
    read_by_nobody, pipe = os.pipe()
    os.close(read_by_nobody)
    with open("/dev/full", "wb") as full, open(pipe, "wb") as broken:
        for stdout, why in ((full, "No space left on device"), (broken, "Broken pipe")):
            done = subprocess.run([sys.executable, str(pyz), *arguments], stdout=stdout, stderr=subprocess.PIPE,
                                  text=True, env={"HOME": str(tmp_path), "PATH": os.defpath}, timeout=60)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert done.stderr.startswith(f"clinvk: stdout can not be written: {why}.")


@pytest.mark.parametrize("arguments", [["sevre"], ["serve", "--prot", "1"], ["serve", "--port", "many"]])
def test_an_unknown_word_is_refused_with_the_usage(call: Call, arguments: List[str]) -> None:
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: clinvk.pyz" in done.stderr and arguments[-1] in done.stderr


# ---- Start

def test_the_start_up_text_names_the_endpoints_that_there_are(serve: Callable[..., Served]) -> None:
    server = serve()
    paths = set(re.findall(r"/[a-z][\w/.]*", START_UP_TEXT.partition("endpoints:")[2]))
    there = {path for path in paths if server.call("GET", path).status != 404}
    expected = ""
    for line in START_UP_TEXT.replace("PORT", str(server.port)).splitlines(keepends=True):
        kind, named, rest = line.partition(":  ")
        kept = [path for path in rest.split() if path.strip(",") in there]
        expected += line if not named else f"{(kind + ':').ljust(17)} {' '.join(kept).strip(',')}\n" if kept else ""
    assert server.banner == expected
    assert "/api/v1/prompt" in server.banner and "/health" in server.banner


def test_flag_beats_environment_beats_file(pyz: Path, tmp_path: Path) -> None:
    ports = [free_port() for _ in range(3)]
    (tmp_path / "my.yaml").write_text(f"server: {{port: {ports[0]}}}")
    environ = {"HOME": str(tmp_path), "PATH": os.defpath}
    for flags, more, port in [([], {}, ports[0]), ([], {"CLINVK_PORT": str(ports[1])}, ports[1]),
                              (["-p", str(ports[2])], {"CLINVK_PORT": str(ports[1])}, ports[2])]:
        with running([str(pyz), "serve", "--config", str(tmp_path / "my.yaml"), *flags], tmp_path,
                     {**environ, **more}) as server:
            assert (server.port, server.call("GET", "/health").status) == (port, 200)


def test_the_config_file_is_the_homes_unless_environment_or_flag_name_another(
        serve: Callable[..., Served], tmp_path: Path) -> None:
    def backends(server: Served) -> Set[str]:
        names = {row["name"] for row in server.call("GET", "/api/v1/backends").json["backends"]}
        return names - {"claude", "codex", "gemini", "echo"}
    (tmp_path / "home" / ".clinvk").mkdir(parents=True)
    (tmp_path / "home" / ".clinvk" / "config.yaml").write_text("backends: {homely: {command: cat}}")
    (tmp_path / "named.yaml").write_text("backends: {named: {command: cat}}")
    named = {"CLINVK_CONFIG": str(tmp_path / "named.yaml")}
    assert backends(serve()) == {"homely"}
    assert backends(serve(**named)) == {"named"}
    assert backends(serve(config={"backends": {"flagged": {"command": "cat"}}}, **named)) == {"flagged"}


def test_everything_that_is_kept_lies_in_the_home_which_nobody_else_can_read(
        serve: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    server = serve(CLINVK_HOME=str(tmp_path / "elsewhere" / "deep" / "clinvk"))
    assert server.call("GET", "/health").status == 200
    assert list((tmp_path / "home").iterdir()) == []
    home = tmp_path / "elsewhere" / "deep" / "clinvk"
    assert (home.is_dir(), home.stat().st_mode & 0o077) == (True, 0)


def test_it_starts_in_any_folder_without_a_home(pyz: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder with bl\u00e4nks"
    folder.mkdir()
    home = tmp_path / "not there yet"
    with running([str(pyz), "serve", "--port", "0"], folder, {"HOME": str(home), "PATH": os.defpath}) as server:
        assert server.call("POST", "/api/v1/prompt", {"backend": "echo", "prompt": "hello"}).json["output"] == "hello"
        assert server.stop() == 0
    assert [path.name for path in folder.iterdir()] == [server.stderr_file.name]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST.", "127.1.2.3", "[::1]", socket.gethostname()])
def test_a_base_url_that_points_at_the_server_itself_is_not_in_a_cli(serve: Callable[..., Served], host: str) -> None:
    """A shell in which claude is to use clinvk may start clinvk, too: each claude would call it, and so on."""
    port, config = free_port(), {"backends": {"shown": {"command": "env"}}}
    urls = {"ANTHROPIC_BASE_URL": f"http://{host}:{port}/anthropic", "OPENAI_BASE_URL": f"http://{host}:{port + 1}/v1"}
    server = serve("--port", str(port), config=config, **urls)
    told = server.call("POST", "/api/v1/prompt", {"backend": "shown", "prompt": "x"}).json["output"]
    assert [line for line in told.splitlines() if "BASE_URL" in line] == [f"OPENAI_BASE_URL={urls['OPENAI_BASE_URL']}"]


def test_two_servers_share_one_home(serve: Callable[..., Served]) -> None:
    first, second = serve(), serve()
    for server in (first, second):
        answer = server.call("POST", "/api/v1/prompt", {"backend": "echo", "prompt": "hello"}).json
        assert answer["output"] == "hello"
    assert first.stop() == 0
    assert second.call("GET", "/health").status == 200


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_is_listened_on_and_shown_in_brackets(serve: Callable[..., Served]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    server = serve("--host", "::1")
    assert server.url == f"http://[::1]:{server.port}"
    assert server.call("GET", "/health").status == 200


@pytest.mark.parametrize("host, environ, warns", [
    ("0.0.0.0", {}, True), ("127.0.0.1", {}, False), ("localhost", {}, False),
    ("0.0.0.0", {"CLINVK_API_KEYS": "key"}, False)])
def test_an_address_that_others_reach_is_warned_of_unless_there_are_keys(
        serve: Callable[..., Served], host: str, environ: Dict[str, str], warns: bool) -> None:
    server = serve("--host", host, **environ)
    assert server.call("GET", "/health", Host="localhost").status == 200
    words = [word in server.stderr for word in ("warning", "allowed_hosts", "CLINVK_API_KEYS", "403")]
    assert words == [warns] * 4


@pytest.mark.parametrize("origins, keys, warns", [
    (["*"], "", True), (["https://a.example", "*"], "", True), (["*"], "key", False), ([], "", False),
    (["http://localhost:*"], "", False)])
def test_pages_of_any_origin_are_warned_of_unless_there_are_keys(serve: Callable[..., Served], origins: List[str],
                                                                 keys: str, warns: bool) -> None:
    server = serve(config={"server": {"cors_allowed_origins": origins}}, CLINVK_API_KEYS=keys)
    assert server.call("GET", "/health").status == 200  # what it warns of has been said
    lines = [line for line in server.stderr.splitlines() if "warning" in line]
    words = ("clinvk: warning: ", 'server.cors_allowed_origins has "*"', "any web page", "CLINVK_API_KEYS")
    assert len(lines) == warns and all(word in line for line in lines for word in words)


SECRETS = {"claude": {"env": {"ANTHROPIC_API_KEY": "s3cret", "LANG": "C", "HTTPS_PROXY": "http://me:s3cret@proxy",
                              "ANTHROPIC_CUSTOM_HEADERS": "A: Bearer s3cret"}},
           "codex": {"extra_flags": ["-c", "x.token=s3cret"]},
           "own": {"command": ["cat", "--password", "s3cret"], "env": {"GH_TOKEN": "s3cret"}}}
NAMES = ("backends.claude.env.ANTHROPIC_API_KEY, backends.claude.env.HTTPS_PROXY, "
         "backends.claude.env.ANTHROPIC_CUSTOM_HEADERS, backends.codex.extra_flags, backends.own.env.GH_TOKEN, "
         "backends.own.command")
PLAIN = {"claude": {"env": {"LANG": "C", "MAX_TOKENS": "5"}, "extra_flags": ["--effort", "high"]},
         "own": {"command": ["cat", "-"], "allowed_extra_flags": ["--api-key"]}}


@pytest.mark.skipif(os.name == "nt", reason="no such modes on Windows")
@pytest.mark.parametrize("backends, mode, named", [
    (SECRETS, 0o644, NAMES), (SECRETS, 0o640, NAMES), (SECRETS, 0o604, NAMES), (SECRETS, 0o600, ""),
    (SECRETS, 0o622, ""), (PLAIN, 0o644, ""), ({}, 0o666, "")])
@pytest.mark.parametrize("by_flag", [True, False])
def test_a_config_with_secrets_that_others_can_read_is_warned_of(
        pyz: Path, tmp_path: Path, backends: Any, mode: int, named: str, by_flag: bool) -> None:
    file = tmp_path / "for all" / "my config.yaml" if by_flag else tmp_path / ".clinvk" / "config.yaml"
    file.parent.mkdir(mode=0o755)
    file.write_text(json.dumps({"backends": backends}))
    file.chmod(mode)
    arguments = [str(pyz), "serve", "--port", "0", *(["--config", str(file)] if by_flag else [])]
    with running(arguments, tmp_path, {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}) as server:
        assert server.call("GET", "/health").status == 200  # what it warns of has been said
        lines = [line for line in server.stderr.splitlines() if "warning" in line]
        assert "s3cret" not in server.stderr
    warning = (f"clinvk: warning: {file} can be read by other users (mode {mode:04o}), and holds secrets ({named}). "
               f"Run: chmod 600 {shlex.quote(str(file))}")
    assert lines == ([warning] if named and by_flag else [])  # the start has closed ~/.clinvk for others


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.11", "3.12", "3.13"])
def test_each_python_serves_all_three_apis_and_stops(serve: Callable[..., Served], version: str) -> None:
    server = serve(python=interpreter(version))
    chat = {"model": "echo", "max_tokens": 9, "messages": [{"role": "user", "content": "one two"}]}
    asked: List[Any] = [
        ("/api/v1/prompt", {"backend": "echo", "prompt": "one two"}, {"output_format": "stream-json"}, b'"done"'),
        ("/openai/v1/chat/completions", chat, {"stream": True}, b"data: [DONE]"),
        ("/anthropic/v1/messages", chat, {"stream": True}, b'"message_stop"')]
    for path, body, stream, end in asked:
        whole, streamed = server.call("POST", path, body), server.call("POST", path, {**body, **stream})
        assert (whole.status, b"one two" in whole.body, streamed.status) == (200, True, 200)
        assert [word in streamed.body for word in (b"one", b"two", end)] == [True] * 3
    assert server.stop() == 0
    assert [line for line in server.stderr.splitlines() if not LOG_LINE.fullmatch(line)] == []
    assert len(server.stderr.splitlines()) == 6


# ---- Refusals: one line that says how to mend it, and exit code 1

@pytest.mark.parametrize("in_use", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_refused_with_the_flag_that_helps(call: Call, in_use: str) -> None:
    with contextlib.closing(socket.create_server((in_use, 0))) as taken:
        port = taken.getsockname()[1]
        line = refusal(call("serve", "--port", port))
    assert f"127.0.0.1:{port}" in line and "in use" in line and "--port" in line


def test_a_second_server_on_the_port_of_the_first_is_refused(call: Call, serve: Callable[..., Served]) -> None:
    server = serve()
    assert "in use" in refusal(call("serve", "--port", server.port))
    assert server.call("GET", "/health").status == 200


@AS_ROOT
def test_a_privileged_port_is_refused_with_the_flag_that_helps(call: Call) -> None:
    assert "--port" in refusal(call("serve", "--port", 1))


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid", "256.256.256.256", "-", "http://localhost"])
def test_a_host_that_is_not_ours_is_refused_with_the_flag_that_helps(call: Call, host: str) -> None:
    line = refusal(call("serve", f"--host={host}", "--port", free_port()))
    assert host in line and "--host" in line


@pytest.mark.parametrize("port", ["-1", "65536", "99999999999"])
def test_a_port_that_is_none_is_refused_and_the_flag_named(call: Call, port: str) -> None:
    line = refusal(call("serve", f"--port={port}"))
    assert "--port" in line and port in line
    assert "CLINVK_PORT" in refusal(call("serve", CLINVK_PORT=port))


@pytest.mark.parametrize("text, words", [
    ("server: {prot: 1}", ["prot", "port"]), ("server: {port: many}", ["server.port", "many"]), ("a: b: c", ["YAML"]),
    ("- list", ["mapping"]), ("backends: {new: {}}", ["backends.new.command"]), ("server: {port: 70000}", ["65535"]),
    ("default_backend: cluade", ["default_backend", "claude"]), ("server: {host: ''}", ["server.host"]),
    ("\x00", ["YAML"]), ("server: {port: 1}\nserver: {port: 2}", ["twice"])])
def test_a_bad_config_is_refused_and_file_and_fault_named(
        call: Call, tmp_path: Path, text: str, words: List[str]) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    line = refusal(call("serve", "--config", file))
    assert [word for word in (str(file), *words) if word not in line] == []


def test_a_config_that_is_not_utf8_or_not_there_or_a_folder_is_refused(call: Call, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"default_backend: \xe9")
    for name in ("latin.yaml", "missing.yaml", "."):
        assert str(tmp_path / name) in refusal(call("serve", "--config", tmp_path / name))
        assert str(tmp_path / name) in refusal(call("serve", CLINVK_CONFIG=str(tmp_path / name)))


@pytest.mark.parametrize("model", ["nope", "b", ""])
def test_an_alias_that_leads_to_no_model_is_refused(call: Call, tmp_path: Path, model: str) -> None:
    (tmp_path / "my.yaml").write_text(json.dumps({"server": {"model_aliases": {"a": model, "b": "echo/x"}}}))
    line = refusal(call("serve", "--port", 0, "--config", tmp_path / "my.yaml"))
    assert f"{tmp_path / 'my.yaml'}: server.model_aliases.a: no backend goes by the model name \"{model}\"" in line


def test_a_config_without_a_name_is_refused(call: Call) -> None:
    assert "--config: names no file" in refusal(call("serve", "--config", ""))


@AS_ROOT
def test_a_config_that_may_not_be_read_is_refused(call: Call, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").touch(mode=0)
    assert "my.yaml" in refusal(call("serve", "--config", tmp_path / "my.yaml"))


def test_a_home_that_can_not_be_made_is_refused_and_named(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refusal(call("serve", "--port", 0, CLINVK_HOME=str(tmp_path / "file" / "clinvk")))
    assert str(tmp_path / "file") in line and "CLINVK_HOME" in line and "can not listen" not in line


@AS_ROOT
def test_a_home_that_may_not_be_written_is_refused_and_named(call: Call, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    line = refusal(call("serve", "--port", 0, CLINVK_HOME=str(tmp_path / "locked" / "clinvk")))
    assert str(tmp_path / "locked") in line and "CLINVK_HOME" in line


# ---- Stop

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_right_after_the_start_up_text_is_a_clean_one(serve: Callable[..., Served], number: int) -> None:
    for _ in range(3):
        server = serve()
        server.process.send_signal(number)
        assert (server.process.wait(30), server.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_connection_that_is_kept_alive_does_not_hold_up_a_stop(
        serve: Callable[..., Served], number: int) -> None:
    server = serve()
    with contextlib.closing(server.connection()) as kept, contextlib.closing(server.connection()) as unused:
        unused.connect()
        kept.request("GET", "/health")
        assert kept.getresponse().read() and kept.sock
        server.process.send_signal(number)
        assert server.process.wait(30) == 0
        assert (kept.sock.recv(1), len(server.stderr.splitlines())) == (b"", 1)


def test_after_a_stop_the_same_port_can_be_had_at_once(serve: Callable[..., Served]) -> None:
    server = serve()
    with contextlib.closing(server.connection()) as kept:
        kept.request("GET", "/health")
        kept.getresponse().read()
        assert server.stop() == 0
    again = serve("--port", str(server.port))
    assert (again.port, again.call("GET", "/health").status) == (server.port, 200)


# ---- Log

def test_each_request_is_one_log_line_with_its_id_and_never_the_prompt(serve: Callable[..., Served]) -> None:
    server = serve(CLINVK_API_KEYS="key-of-ours")
    asked: List[Any] = [("POST", "/api/v1/prompt", {"backend": "echo", "prompt": "secret words"}, 200),
                        ("POST", "/api/v1/prompt", {"backend": "secret words", "prompt": "secret words"}, 422),
                        ("POST", "/openai/v1/chat/completions", {"model": "echo", "stream": True, "messages": [
                            {"role": "user", "content": "secret words"}]}, 200),
                        ("GET", "/nowhere?key=secret+words", None, 404), ("HEAD", "/health", None, 200)]
    for number, (method, path, body, status) in enumerate(asked):
        headers = {"x_request_id": f"id-{number}", "x_api_key": "key-of-ours"}
        assert server.call(method, path, body, **headers).status == status
    lines = eventually(lambda: len(server.stderr.splitlines()) >= len(asked) and server.stderr.splitlines())
    assert [LOG_LINE.fullmatch(line) is not None for line in lines] == [True] * len(asked)
    lines.sort(key=lambda line: line.partition("id-")[2])  # a line is written once its answer has gone
    assert [f" {m} {p.partition('?')[0]} {s} " in line and f"id-{n}" in line
            for n, ((m, p, _, s), line) in enumerate(zip(asked, lines))] == [True] * len(asked)
    assert "secret" not in server.stderr and "key-of-ours" not in server.stderr


def test_a_request_id_of_a_strange_kind_and_a_path_with_a_line_end_can_forge_no_line(
        serve: Callable[..., Served]) -> None:
    server = serve()
    reply = server.call("GET", "/a%0Ab%1B[31m", x_request_id="two words")
    assert (reply.status, " " in reply.headers["x-request-id"]) == (404, False)
    line, = eventually(lambda: server.stderr.splitlines())
    assert LOG_LINE.fullmatch(line) and "\x1b" not in line and reply.headers["x-request-id"] in line
