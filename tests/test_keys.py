"""API keys, right and wrong ones, appear in no log, no answer, no file, and in nothing that a CLI gets (SPEC 7, 8).
The server is real, its CLIs are scripted: each writes down what it was started with."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest
from conftest import Reply, Served, eventually, request_of

LINES = Path(__file__).parent / "lines"
RIGHT = ("first-right-key-7d1f", "second-right-key-a9c3")
WRONG = ("first-wrong-key-52e0", "second-wrong-key-be44")

# What every scripted CLI does first: write down its command line and its environment.
SPY = f"""
HERE, LINES = os.path.dirname(os.path.abspath(__file__)), {str(LINES)!r}
about = json.dumps(dict(argv=sys.argv, environ=dict(os.environ)))
with open(f"{{HERE}}/seen-{{os.path.basename(sys.argv[0])}}-{{os.getpid()}}", "w") as file:
    file.write(about)
if "--version" in sys.argv:
    sys.exit()
"""
# Says all that it was given, as its answer or, at a prompt with "fail" in it, as its last words.
TEXT = SPY + """
prompt = sys.stdin.read()
if "hold" in prompt:
    while not os.path.exists(HERE + "/go"):
        time.sleep(0.01)
if "fail" in prompt:
    sys.exit(about)
print(about)
"""
CLAUDE = SPY + """
next(line for line in sys.stdin if '"type": "user"' in line)
print(open(LINES + "/claude/plain.jsonl").read(), end="", flush=True)
"""
# Answers each call with the recorded lines up to its reply; the last one with all that is left.
JSON_RPC = SPY + """
lines = open(LINES + "/" + os.path.basename(sys.argv[0]) + "/plain.jsonl").readlines()
for line in sys.stdin:
    number = json.loads(line).get("id")
    while number and lines:
        message = json.loads(lines[0])
        print(lines.pop(0), end="", flush=True)
        if message.get("id") == number and any('"id":' in other[:30] for other in lines):
            break
"""


class Stage(NamedTuple):
    """A server with RIGHT keys, what it and its CLIs leave behind, and every answer that it gave."""
    server: Served
    folder: Path
    replies: List[Reply]

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        self.replies.append(self.server.call(method, path, body, **headers))
        return self.replies[-1]

    def raw(self, sent: bytes) -> Reply:
        self.replies.append(self.server.raw(sent))
        return self.replies[-1]

    def seen(self) -> Dict[str, str]:
        """What the CLIs were started with."""
        return {file.name: file.read_text() for file in self.folder.glob("seen-*")}

    def stored(self) -> Dict[str, str]:
        """Every file of clinvk's own, the database and its log included."""
        return {str(file): file.read_bytes().decode("latin-1")
                for file in (self.folder / "home").rglob("*") if file.is_file()}

    def answered(self) -> Dict[str, str]:
        return {f"answer {number}": f"{reply.headers} {reply.body.decode('latin-1')}"
                for number, reply in enumerate(self.replies)}


def leaks(texts: Dict[str, str], *keys: str) -> Set[Tuple[str, str]]:
    return {(place, key) for place, text in texts.items() for key in keys or (*RIGHT, *WRONG) if key in text}


@pytest.fixture(params=["environment", "gopass"])
def stage(request: pytest.FixtureRequest, serve: Callable[..., Served], fake_cli: Callable[..., str],
          tmp_path: Path) -> Iterator[Stage]:
    """Its keys come from the environment, or from gopass; a client's key stands in the environment, too."""
    fake_cli(f"print({RIGHT[0]!r}); print({RIGHT[1]!r}, end='')", "gopass")
    backends = {"own": {"command": fake_cli(TEXT, "own")}, "claude": {"command": fake_cli(CLAUDE, "claude")},
                "codex": {"command": fake_cli(JSON_RPC, "codex")}, "gemini": {"command": fake_cli(JSON_RPC, "gemini")}}
    around = {"environment": {"CLINVK_API_KEYS": ", ".join(RIGHT)}, "gopass": {"CLINVK_API_KEYS_GOPASS_PATH": "a/b"}}
    server = serve(config={"backends": backends}, PATH=f"{tmp_path}:{os.environ['PATH']}", OPENAI_API_KEY=RIGHT[1],
                   ALL_OF_THEM=",".join(RIGHT), SOME_URL=f"http://me:{RIGHT[0]}@host/", **around[request.param])
    yield Stage(server, tmp_path, [])
    (tmp_path / "go").touch()


def bodies(backend: str, prompt: str) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """A request of each kind that runs a CLI."""
    task = {"backend": backend, "prompt": prompt}
    chat = {"model": backend, "messages": [{"role": "user", "content": prompt}], "max_tokens": 9}
    yield "/api/v1/prompt", {**task, "metadata": {"a": "b"}}
    yield "/api/v1/prompt", {**task, "output_format": "stream-json", "verbose": True}
    yield "/api/v1/parallel", {"tasks": [task, task]}
    yield "/api/v1/chain", {"steps": [task, {**task, "prompt": "{{previous}}"}]}
    yield "/api/v1/compare", {"backends": [backend], "prompt": prompt}
    for path in ("/openai/v1/chat/completions", "/anthropic/v1/messages"):
        for stream in (False, True):
            yield path, {**chat, "stream": stream}
        yield path, {**chat, "clinvk": {"workdir": "/tmp", "verbose": True}}


def dry(body: Dict[str, Any]) -> Dict[str, Any]:
    return {**body, "clinvk": {"workdir": "/tmp", "dry_run": True}} if "messages" in body else {**body, "dry_run": True}


def with_key(key: str) -> List[Dict[str, str]]:
    return [{"X_Api_Key": key}, {"Authorization": f"Bearer {key}"}]


def test_no_key_is_in_an_answer_a_log_a_file_or_what_a_cli_gets(stage: Stage) -> None:
    ways = [*with_key(RIGHT[0]), *with_key(RIGHT[1])]
    for number, backend in enumerate(("own", "claude", "codex", "gemini", "echo")):
        kinds, right = list(bodies(backend, "hello")), ways[number % len(ways)]
        for path, body in kinds if backend == "own" else kinds[::4]:  # one of each API
            reply = stage.call("POST", path, body, **right)
            assert (reply.status, b'"error":' in reply.body) == (200, False), (backend, path, reply.body)
        for path, body in kinds:
            assert stage.call("POST", path, dry(body), **right).status == 200, (backend, path)
            assert {stage.call("POST", path, body, **wrong).status for wrong in with_key(WRONG[number % 2])} == {401}
    for path, body in bodies("own", "fail"):
        assert b"environ" in stage.call("POST", path, body, **ways[0]).body, "the CLI's last words are told"
    session = stage.call("GET", "/api/v1/sessions", **ways[0]).json["sessions"][0]["id"]
    for method, path in (("GET", "/api/v1/backends"), ("GET", f"/api/v1/sessions/{session}"), ("GET", "/health"),
                         ("GET", "/openai/v1/models"), ("GET", "/"), ("DELETE", f"/api/v1/sessions/{session}")):
        assert {stage.call(method, path, **wrong).status for wrong in with_key(WRONG[0])} <= {200, 401}
        assert stage.call(method, path, **ways[1]).status == 200
    names = {name.split("-")[1] for name in stage.seen()}
    assert names >= {"own", "claude", "codex", "gemini"} and b"OPENAI_API_KEY" not in stage.replies[0].body
    assert leaks(stage.answered()) | leaks(stage.seen()) | leaks(stage.stored()) == set()
    assert any("sessions.db-wal" in name for name in stage.stored())
    assert stage.server.stop() == 0 and stage.server.process.stdout
    printed = {"stderr": stage.server.stderr, "stdout": stage.server.process.stdout.read().decode(),
               "banner": stage.server.banner}
    assert leaks(stage.stored()) | leaks(printed) == set()
    assert len(stage.server.stderr.splitlines()) >= len(stage.replies)


@pytest.mark.parametrize("key", [RIGHT[0], WRONG[0]], ids=["right", "wrong"])  # pytest exports the ids
def test_no_key_in_an_odd_place_is_told_or_logged(stage: Stage, key: str) -> None:
    chat = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "api_key": key}
    for sent in ({}, *with_key(RIGHT[1]), *with_key(WRONG[1])):
        for path in ("/api/v1/prompt", "/openai/v1/chat/completions", "/anthropic/v1/messages", "/nothing", "/health"):
            for query in (f"?key={key}", f"?api_key={key}&limit={key}", f"?{key}"):
                stage.call("GET", path + query, **sent)
            for body in (chat, {"api_key": key}, f'{{"api_key": "{key}"'.encode(), f'{{"{key}'.encode(), key.encode()):
                stage.call("POST", path, body, **sent)
        stage.call("GET", f"/api/v1/sessions?limit=x&key={key}", **sent)
        if key in RIGHT:  # the server knows no other; its answer tells them to who sent them
            stage.server.call("GET", f"/{key}/x", X_Request_Id=key, **sent)
        stage.call("GET", "/api/v1/backends", Cookie=f"key={key}", User_Agent=key, Referer=f"http://x/{key}", **sent)
    lines = ("GET /v1/models HTTP/1.1", "POST /anthropic/v1/messages HTTP/1.1", "GET /api/v1/prompt HTTP/1.0")
    for header in (f"X-Api-Key : {key}", f"X-Api-Key {key}", f"X-Api-Key: {key}\nX: y", f"X-Api-Key: {key}\rX: y",
                   f"X-Api-Key: \0{key}", f"Authorization: Basic {key}", f"Authorization: {key}",
                   f"A: b\r\n X-Api-Key: {key}", f"X-Api-Key: {key}\r\nContent-Length: x", f"{key}: x",
                   f"X_Api_Key: {key}", f"X-{key}"):
        for first in lines:
            for where in (request_of(first, header), request_of(first, "Content-Length: 1, 2", header),
                          f"{first}\r\n {header}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()):
                assert stage.raw(where).status
    for target in (f"http://{key}@localhost/v1/models", f"http://user:{key}@localhost/health", f"/health#{key}",
                   f"/v1/models?{key}#{key}"):
        stage.raw(request_of(f"GET {target} HTTP/1.1"))
    assert stage.server.stop() == 0
    assert leaks({**stage.answered(), **stage.seen(), **stage.stored(), "stderr": stage.server.stderr}) == set()


def test_a_request_id_of_our_own_is_logged_as_it_was_answered(serve: Callable[..., Served]) -> None:
    """With a short key left out, the log would tell that key beside the answer."""
    server = serve(CLINVK_API_KEYS=",".join("0123456789abcdef"))
    request_id = server.call("GET", "/health").headers["x-request-id"]
    eventually(lambda: f" ms {request_id}\n" in server.stderr)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc on this system")
def test_no_key_is_on_the_command_line_or_in_the_environment_of_any_process_below_the_server(stage: Stage) -> None:
    def told_by(process: Path, name: str) -> str:
        try:
            return (process / name).read_bytes().decode("latin-1")
        except (FileNotFoundError, ProcessLookupError):
            return ""  # it has gone meanwhile

    def below(pid: str) -> List[Path]:
        """The processes that it has started, and what these have started."""
        parents = {process: told_by(process, "stat").rpartition(")")[2].split()[1:2]
                   for process in Path("/proc").glob("[0-9]*")}
        children = [process for process, parent in parents.items() if parent == [pid]]
        return [found for child in children for found in (child, *below(child.name))]
    with contextlib.closing(stage.server.connection()) as connection:
        connection.request("POST", "/api/v1/prompt", json.dumps({"backend": "own", "prompt": "hold"}),
                           {"Content-Type": "application/json", "X-Api-Key": RIGHT[0]})
        eventually(lambda: any("seen-own" in name for name in stage.seen()))
        family = below(str(stage.server.process.pid))
        told = {f"{process} {name}": told_by(process, name) for process in family for name in ("cmdline", "environ")}
        assert any("/own" in text for place, text in told.items() if "cmdline" in place) and leaks(told) == set()
        (stage.folder / "go").touch()
        assert connection.getresponse().status == 200


def test_a_gopass_that_fails_is_told_without_what_it_printed(pyz: Path, fake_cli: Callable[..., str],
                                                             tmp_path: Path) -> None:
    fake_cli(f"print({RIGHT[0]!r}); sys.exit('it is locked')", "gopass")
    around = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "CLINVK_API_KEYS_GOPASS_PATH": "a/b"}
    done = subprocess.run([sys.executable, str(pyz), "serve", "--port", "0"], env=around, capture_output=True,
                          text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "") and re.search("it is locked", done.stderr)
    assert RIGHT[0] not in done.stderr
