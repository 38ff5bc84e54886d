"""What the tests share: clinvk.pyz as a process, the application called as WSGI, and scripted CLIs."""

import contextlib
import functools
import glob
import http.client
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import clinvk  # noqa: E402


class Reply(NamedTuple):
    """An HTTP answer: `headers` have lower-case names."""
    status: int
    headers: Dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> List[Any]:
        """Of an NDJSON stream."""
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def data(self) -> List[Any]:
        """The `data:` of each event of a text/event-stream; `[DONE]` as it is."""
        found = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in found]


@functools.lru_cache(maxsize=None)
def interpreter(version: str) -> str:
    """The path of a Python of that version; skips the test if there is none."""
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    for path in [shutil.which(f"python{version}"), *glob.glob(f"{pyenv}/versions/{version}.*/bin/python{version}")]:
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:  # a shim may lead nowhere
            return path
    pytest.skip(f"no Python {version} on this machine")


def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What `condition` gives once that is true; fails if it is not within `seconds`, on a machine however busy."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {condition}")


def alive(pids: List[int]) -> List[int]:
    """Those of the processes that are there and no zombies."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith("Z")]


def children_of(parent: int, states: str = "") -> List[int]:
    """The process's children; with `states` those in one of them, such as "Z" for zombies."""
    listed = subprocess.run(["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
    rows = [row.split() for row in listed.stdout.splitlines()]
    return [int(pid) for pid, of, state in rows if of == str(parent) and (not states or state[0] in states)]


def collect(events: Iterable[clinvk.Event]) -> clinvk.Result:
    """What a run's events come to."""
    result = clinvk.Result()
    for event in events:
        result.add(event)
    return result


def told(events: Iterable[clinvk.Event]) -> Iterator[clinvk.Told]:
    """The events of a request's only run, as a renderer is given them."""
    return (clinvk.Told(0, event) for event in events)


# ---- Several tests at a time (pytest -n N --dist loadgroup)

# The real CLIs take a processor each: they run in two lanes, which take longest, and begin first.
LANES = {"test_lab_sessions": "sessions", "test_lab_spares": "sessions"}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own reads the marks
def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """The tests of a file stay together, for they share what the file sets up; those of the lab in their lane."""
    for item in items:
        in_lab = item.get_closest_marker("lab")
        item.add_marker(pytest.mark.xdist_group(LANES.get(item.path.stem, "lab") if in_lab else item.path.stem))
    items.sort(key=lambda item: not item.get_closest_marker("lab"))


# ---- Errors, as each API has them (SPEC 5)

# status -> OpenAI's type and code, Anthropic's type
NAMES: Dict[int, Tuple[str, Optional[str], str]] = {
    400: ("invalid_request_error", None, "invalid_request_error"),
    401: ("authentication_error", "invalid_api_key", "authentication_error"),
    403: ("permission_error", None, "permission_error"), 404: ("not_found_error", None, "not_found_error"),
    405: ("invalid_request_error", None, "invalid_request_error"),
    408: ("invalid_request_error", "request_timeout", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large", "request_too_large"),
    415: ("invalid_request_error", None, "invalid_request_error"),
    426: ("invalid_request_error", None, "invalid_request_error"),
    431: ("invalid_request_error", "request_header_fields_too_large", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_exceeded", "rate_limit_error"), 500: ("api_error", None, "api_error"),
    502: ("api_error", "backend_failed", "api_error"), 503: ("api_error", "backend_unavailable", "overloaded_error"),
    504: ("api_error", "timeout", "timeout_error")}


def shape(path: str, *, anthropic_version: bool = False) -> str:
    """Whose errors a path has; `anthropic_version`: the request has that header."""
    if path.startswith(("/openai/", "/v1/chat/completions", "/v1/completions", "/v1/responses")):
        return "openai"
    if path.startswith(("/anthropic", "/v1/messages")) or (path.startswith("/v1/") and anthropic_version):
        return "anthropic"
    return "openai" if path.startswith("/v1/") else "native"


def fault(reply: Reply, kind: str, names: Optional[Tuple[Any, ...]] = None) -> str:
    """The message of an error, all of whose other parts are as SPEC 5 has them."""
    names = names or NAMES.get(reply.status, ())
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", reply.headers["x-request-id"])
    assert b"Traceback" not in reply.body
    told = reply.json
    if kind == "anthropic":
        assert set(told) == {"type", "error", "request_id"} and told["type"] == "error"
        assert told["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
        assert set(told["error"]) == {"type", "message"} and told["error"]["type"] == names[2]
        return str(told["error"]["message"])
    if kind == "openai":
        error = told["error"]
        assert set(error) == {"message", "type", "param", "code"} and (error["type"], error["code"]) == names[:2]
        return str(error["message"])
    more = {401: "unauthorized", 429: "too_many_requests"}.get(reply.status)
    assert reply.headers["content-type"] == "application/problem+json"
    assert {**told, "title": "", "detail": "", "errors": []} == {
        "type": "about:blank", "title": "", "status": reply.status, "detail": "", "errors": [],
        **({"error": more, "message": told["detail"]} if more else {})}
    return str(told["detail"])


# ---- The .pyz as a process

@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clinvk.pyz, built by the Python that runs the tests, in a folder of its own."""
    target = tmp_path_factory.mktemp("pyz") / "clinvk.pyz"
    done = subprocess.run([sys.executable, str(REPO / "build_zipapp.py"), str(target)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return target


class Served:
    """A running `clinvk.pyz serve`. `process.stdout` has been read up to the end of the start-up text, `banner`."""

    def __init__(self, command: List[str], folder: Path, environ: Dict[str, str]) -> None:
        self.stderr_file = folder / f"stderr-{time.monotonic_ns()}"
        with self.stderr_file.open("wb") as stderr:
            self.process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=stderr)
        assert self.process.stdout
        self.banner = ""
        for line in iter(self.process.stdout.readline, b""):
            self.banner += line.decode()
            if line.startswith(b"Press Ctrl+C"):
                break
        assert "Press Ctrl+C" in self.banner, self.stderr
        self.url = self.banner.split()[5]
        self.host, _, port = self.url.rpartition("//")[2].rpartition(":")
        self.port = int(port)

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def connection(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host.strip("[]"), self.port, timeout=timeout)

    def call(self, method: str, path: str, body: Any = None, timeout: float = 60, **headers: str) -> Reply:
        """`body` is sent as JSON, or as it is if it is bytes; `x_api_key=` sends X-Api-Key."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if data is not None else {}
        given.update({name.replace("_", "-"): value for name, value in headers.items()})
        with contextlib.closing(self.connection(timeout)) as connection:
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def raw(self, sent: bytes) -> Reply:
        """The answer to bytes, as they come back; the status is 0 if there is none."""
        with socket.create_connection((self.host, self.port), timeout=20) as connection:
            connection.sendall(sent)
            head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return Reply(int((first.split() + ["0", "0"])[1]), {name.lower(): text for name, text in headers.items()}, body)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.process.wait(60)


@contextlib.contextmanager
def serving(pyz: Path, folder: Path) -> Iterator[Callable[..., Served]]:
    """`start(*flags, config={...}, python=..., **environ)` starts the .pyz on a free port, in `folder`, with a home
    below it; all that was started is stopped afterwards."""
    started: List[Served] = []

    def start(*flags: str, config: Optional[Dict[str, Any]] = None, python: str = sys.executable,
              **environ: str) -> Served:
        home = folder / "home"
        home.mkdir(exist_ok=True)
        command = [python, str(pyz), "serve", *([] if "--port" in flags else ["--port", "0"]), *flags]
        if config is not None:
            (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
            command += ["--config", str(folder / "config.yaml")]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CLINVK_")}
        started.append(Served(command, folder, {**inherited, "HOME": str(home), **environ}))
        return started[-1]
    try:
        yield start
    finally:
        for server in started:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()


@pytest.fixture
def serve(pyz: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`serve(*flags, config={...}, python=..., **environ)`: `serving`, in an empty folder with an empty home."""
    with serving(pyz, tmp_path) as start:
        yield start


def request_of(first: str, *headers: str, body: str = "") -> bytes:
    """A request for `Served.raw`, to localhost unless a Host is given."""
    host = [] if any(header.startswith("Host:") for header in headers) else ["Host: localhost"]
    return "\r\n".join([first, *host, *headers, "Connection: close", "", body]).encode("latin-1")


# ---- The application, called as WSGI

class Client:
    """clinvk's WSGI application in this process, of its own for each test."""

    def __init__(self, config: clinvk.Config) -> None:
        self.server = clinvk.Server(config)
        self.app = clinvk.make_app(self.server)
        self.input = io.BytesIO()  # the body of the last request, as far as it has been read

    def call(self, method: str, path: str, body: Any = None, **headers: Optional[str]) -> Reply:
        """As `Served.call`; Host is localhost unless given. A header that is None is not sent."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        path, _, query = path.partition("?")
        self.input = sent = io.BytesIO(data)  # by its own name: other threads may call, too
        environ: Dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path.encode().decode("latin-1"),
                                   "QUERY_STRING": query, "wsgi.input": sent, "HTTP_HOST": "localhost:8080",
                                   "CONTENT_LENGTH": str(len(data)), "REMOTE_ADDR": "127.0.0.1"}
        if body is not None:
            environ["CONTENT_TYPE"] = "application/json"
        for name, value in headers.items():
            environ["CONTENT_TYPE" if name.lower() == "content_type" else "HTTP_" + name.upper()] = value
        environ = {name: value for name, value in environ.items() if value is not None}
        told: List[Any] = []
        chunks = self.app(environ, lambda status, headers: told.extend((status, headers)))
        try:
            answer = b"".join(chunks)
        finally:
            chunks.close()  # type: ignore[attr-defined]
        return Reply(int(told[0].split()[0]), {k.lower(): v for k, v in told[1]}, answer)


@pytest.fixture
def make_client(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """`make_client(config={...}, **environ)`; the server behind it is closed afterwards."""
    made: List[Client] = []

    def make(config: Optional[Dict[str, Any]] = None, **environ: str) -> Client:
        file = tmp_path / "client.yaml"
        file.write_text(json.dumps(config or {}))
        around = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "CLINVK_HOME": str(tmp_path / "clinvk"), **environ}
        made.append(Client(clinvk.load_config(str(file), around, {})))
        return made[-1]
    yield make
    for client in made:
        client.server.close()


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    """An application with the default config."""
    return make_client()


# ---- Scripted CLIs

def executable(path: Path, script: str) -> str:
    """Makes a program of a Python script, the process of a scripted CLI, and gives its path.

    What it needs is imported already: json, os, signal, subprocess, sys, time."""
    path.write_text(f"#!{sys.executable}\nimport json, os, signal, subprocess, sys, time\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def fake_cli(tmp_path: Path) -> Callable[..., str]:
    """`fake_cli(script)` makes an executable in the test's folder."""
    def make(script: str, name: str = "fake") -> str:
        return executable(tmp_path / name, script)
    return make
