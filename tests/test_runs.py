"""Runs: the real server as a process, real sockets, and scripted CLIs that tell the test what they do through files."""

import contextlib
import functools
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import clinvk
import pytest
from conftest import Client, Reply, Served, alive, children_of, eventually, fault, shape

APIS = ["native", "openai", "anthropic"]
SOME_WAYS = [("native", False), ("native", True), ("openai", True), ("anthropic", False)]  # API, stream

# What every scripted CLI can use.
PRELUDE = """
HERE = {here!r}
def note(name):  # this point is reached, and by which process
    with open(f"{{HERE}}/new-{{os.getpid()}}", "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, f"{{HERE}}/{{name}}")
def wait_for(name):
    while not os.path.exists(f"{{HERE}}/{{name}}"):
        time.sleep(0.01)
def append(line):
    with open(f"{{HERE}}/order", "a") as file:
        file.write(line + chr(10))
def say(text):
    data = text if isinstance(text, bytes) else text.encode()
    while data:
        data = data[os.write(1, data):]
"""

# A CLI with a child, a tool in a session of its own, and a daemon whose parent has gone. All live on for ten minutes.
FAMILY = """
def live(name):
    note(name)
    time.sleep(600)
def descend(stubborn=False):
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            live("pid-tool")
        live("pid-child")
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            live("pid-daemon")
        os._exit(0)
    os.wait()
    note("pid-cli")
    for name in ("pid-tool", "pid-child", "pid-daemon"):
        wait_for(name)
"""
NAMES = ("cli", "child", "tool", "daemon")
SILENT = FAMILY + "descend()\nnote('ready')\ntime.sleep(600)"
TALKING = FAMILY + "descend()\nsay('first ')\nnote('ready')\ntime.sleep(600)"
STUBBORN = FAMILY + "descend(stubborn=True)\nnote('ready')\ntime.sleep(600)"


class Stage:
    """A server whose backend "it" is a scripted CLI, and the folder through which that and the test speak."""

    def __init__(self, folder: Path, serve: Callable[..., Served], fake_cli: Callable[..., str]) -> None:
        self.folder, self.serve, self.fake_cli = folder, serve, fake_cli

    def start(self, script: str, *, backend: str = "it", environ: Optional[Dict[str, str]] = None,
              **server: Any) -> Served:
        """`server` holds settings."""
        command = self.fake_cli(PRELUDE.format(here=str(self.folder)) + script)
        settings = {"spares": 0, "live_conversations": 0, **server}
        self.server = self.serve(config={"backends": {backend: {"command": command}}, "server": settings},
                                 **(environ or {}))
        assert self.server.call("GET", "/health").status == 200
        return self.server

    def noted(self, name: str) -> bool:
        return (self.folder / name).exists()

    def await_note(self, name: str) -> int:
        """The process that says so."""
        eventually(lambda: self.noted(name))
        return int((self.folder / name).read_text())

    def allow(self, name: str) -> None:
        """Let those go on that wait for it."""
        (self.folder / name).touch()

    @property
    def order(self) -> List[str]:
        return (self.folder / "order").read_text().splitlines() if self.noted("order") else []

    def so_far(self) -> List[int]:
        """The processes of a run that have got as far as to say that they are there."""
        return [self.await_note(f"pid-{name}") for name in NAMES if self.noted(f"pid-{name}")]

    def family(self) -> List[int]:
        """The processes of a run, once all are there."""
        self.await_note("ready")
        return [self.await_note(f"pid-{name}") for name in NAMES]

    def runs(self) -> Dict[str, int]:
        return self.server.call("GET", "/health").json["runs"]

    def await_runs(self, active: int, waiting: int = 0) -> None:
        counts = {"active": active, "waiting": waiting}
        eventually(lambda: {name: self.runs()[name] for name in counts} == counts)


@pytest.fixture
def stage(tmp_path: Path, serve: Callable[..., Served], fake_cli: Callable[..., str]) -> Stage:
    return Stage(tmp_path, serve, fake_cli)


@pytest.fixture
def bystander() -> Iterator[int]:
    """A process that is none of the server's business, in the group that the server is in, too."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    assert process.poll() is None, "a process was ended that belongs to nobody's run"
    process.kill()
    process.wait()


def request_of(api: str, prompt: str, backend: str, stream: bool, more: Dict[str, Any]) -> Tuple[str, Dict[str, Any]]:
    """The path and the body by which an API is asked."""
    if api == "native":
        way = {"output_format": "stream-json"} if stream else {}
        return "/api/v1/prompt", {"backend": backend, "prompt": prompt, **way, **more}
    path = "/openai/v1/chat/completions" if api == "openai" else "/anthropic/v1/messages"
    return path, {"model": backend, "max_tokens": 100, "stream": stream,
                  "messages": [{"role": "user", "content": prompt}], **more}


class Asking:
    """A request under way, on a connection of its own."""

    def __init__(self, server: Served, api: str = "native", prompt: str = "hello", *, stream: bool = False,
                 backend: str = "it", **more: Any) -> None:
        path, body = request_of(api, prompt, backend, stream, more)
        data = json.dumps(body).encode()
        self.api, self.stream = api, stream
        self.socket = socket.create_connection((server.host, server.port), timeout=120)
        self.socket.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                            f"Content-Length: {len(data)}\r\n\r\n".encode() + data)

    @functools.cached_property
    def answer(self) -> http.client.HTTPResponse:
        answer = http.client.HTTPResponse(self.socket, method="POST")
        answer.begin()
        return answer

    def until(self, word: bytes) -> bytes:
        """The lines up to the one that holds `word`."""
        read = b""
        for line in iter(self.answer.readline, b""):
            read += line
            if word in line:
                return read
        raise AssertionError(f"the answer ended without {word!r}: {read!r}")

    def reply(self, read: bytes = b"") -> Reply:
        """The whole answer; `read` is what was read before."""
        headers = {name.lower(): value for name, value in self.answer.getheaders()}
        return Reply(self.answer.status, headers, read + self.answer.read())

    def text(self, read: bytes = b"") -> str:
        """The answer's text, from the whole of it."""
        return text_of(self.api, self.reply(read), self.stream)

    def leave(self) -> None:
        if "answer" in vars(self):
            self.answer.close()
        self.socket.close()


def text_of(api: str, reply: Reply, stream: bool) -> str:
    assert reply.status == 200, reply.body
    if not stream:
        message = reply.json
        return {"native": lambda: message["output"], "openai": lambda: message["choices"][0]["message"]["content"],
                "anthropic": lambda: message["content"][0]["text"]}[api]()
    if api == "native":
        return "".join(line["content"]["text"] for line in reply.lines if line["type"] == "message")
    if api == "openai":
        assert reply.data[-1] == "[DONE]"
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in reply.data[:-1])
    assert reply.data[-1] == {"type": "message_stop"}
    return "".join(event["delta"]["text"] for event in reply.data if event["type"] == "content_block_delta")


# ---- Text as it is printed

@pytest.mark.parametrize("api", APIS)
def test_a_piece_arrives_while_the_cli_still_waits_to_print_the_next(stage: Stage, api: str) -> None:
    asking = Asking(stage.start("say('first ')\nwait_for('go')\nsay('second')"), api, stream=True)
    read = asking.until(b"first ")
    assert b"second" not in read
    stage.allow("go")
    assert asking.text(read) == "first second"


@pytest.mark.parametrize("api", APIS)
def test_claudes_deltas_arrive_while_it_still_waits_to_print_the_next(stage: Stage, api: str) -> None:
    script = """
if "--version" in sys.argv:
    sys.exit(print("2.1.197 (Claude Code)"))
def line(**message):
    say(json.dumps(message) + chr(10))
def delta(text):
    line(type="stream_event", event={"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}})
asked = next(message for message in map(json.loads, sys.stdin) if message["type"] == "user")
line(type="stream_event", event={"type": "message_start", "message": {"id": "msg_1"}})
delta(asked["message"]["content"][0]["text"] + " first ")
wait_for("go")
delta("second")
line(type="result", subtype="success", is_error=False, num_turns=1, stop_reason="end_turn", result="")
"""
    asking = Asking(stage.start(script, backend="claude"), api, "you:", stream=True, backend="claude")
    read = asking.until(b"first ")
    stage.allow("go")
    assert asking.text(read) == "you: first second"


@pytest.mark.parametrize("api", APIS)
def test_an_answer_is_the_same_streamed_and_in_one_piece(stage: Stage, api: str) -> None:
    text = "Zeile 1\n\n  \u00fc\u20ac \U0001f600 {}\u2028\t\\ \"quoted\" data: [DONE]\r\nend\n"
    pieces = [text.encode()[i:i + 3] for i in range(0, len(text.encode()), 3)]
    server = stage.start(f"for piece in {pieces!r}:\n    say(piece)\n    time.sleep(0.001)")
    assert Asking(server, api, stream=False).text() == text
    assert Asking(server, api, stream=True).text() == text


@pytest.mark.parametrize("pieces, text", [
    ([b"a\xc3", b"\xa9b"], "a\u00e9b"), ([b"a\xf0\x9f", b"\x98\x80"], "a\U0001f600"),
    ([b"a\xff\xfe", b"ok"], "a\ufffd\ufffdok"), ([b"a", b"ok\xc3"], "aok\ufffd")])
def test_a_character_in_two_pieces_is_whole_and_invalid_bytes_are_replaced(
        stage: Stage, pieces: List[bytes], text: str) -> None:
    asking = Asking(stage.start(f"say({pieces[0]!r})\nwait_for('go')\nsay({pieces[1]!r})"), stream=True)
    read = asking.until(b'"message"')
    stage.allow("go")
    assert asking.text(read) == text


def test_a_prompt_of_any_kind_and_size_reaches_the_cli_on_stdin_alone(stage: Stage) -> None:
    script = "say(f'{len(sys.argv)} word:')\nfor data in iter(lambda: os.read(0, 4096), b''):\n    say(data)"
    server = stage.start(script)
    for prompt in ("-x", "--help", "help", "/cost", "a\0b", " \u00fc\n", "0123456789abcde\n" * 131072):
        answer = Asking(server, "native", prompt).text()
        assert answer.startswith("1 word:" + prompt[:100])
        assert answer[7:] == prompt, "something of a long prompt was lost"


def test_a_cli_that_reads_no_prompt_still_answers(stage: Stage) -> None:
    reply = Asking(stage.start("say('done')"), "native", "x" * 2_000_000).reply()
    assert (reply.json["output"], reply.json["exit_code"]) == ("done", 0)


def test_a_cli_that_closes_stdout_and_lives_on_is_ended_and_its_text_kept(stage: Stage) -> None:
    server = stage.start("note('pid')\nsay('text')\nos.close(1)\ntime.sleep(600)")
    reply = Asking(server).reply()
    assert (reply.json["output"], reply.json["exit_code"], "error" in reply.json) == ("text", -1, True)
    eventually(lambda: not alive([stage.await_note("pid")]))


@pytest.mark.parametrize("lives", ["time.sleep(600)", "while True:\n        say('.')\n        time.sleep(0.02)"],
                         ids=["silent", "talking"])
def test_an_answer_does_not_wait_for_a_child_that_holds_stdout_and_that_is_ended(stage: Stage, lives: str) -> None:
    server = stage.start(f"say('text')\nif os.fork() == 0:\n    note('pid')\n    {lives}\nwait_for('pid')")
    reply = Asking(server, timeout_secs=20).reply()
    assert (reply.json["output"].rstrip("."), reply.json["exit_code"]) == ("text", 0)
    eventually(lambda: not alive([stage.await_note("pid")]))


def test_what_a_cli_prints_at_the_moment_of_its_exit_is_not_lost(make_client: Callable[..., Client]) -> None:
    """It prints and exits while its reader, after a silence, asks whether the run must stop."""
    command = clinvk.Command(["sh", "-c", "read go; echo last words"], "/", dict(os.environ))
    children = make_client().server.children
    child = children.start(command)

    def let_it_end() -> bool:
        with contextlib.suppress(ChildProcessError):  # it has been reaped
            child.say_bytes(b"go\n")
            os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
        return False
    try:
        assert b"".join(child.output(clinvk.Stop(gone=let_it_end))) == b"last words\n"
    finally:
        children.dismiss(child, lambda: None, patience=0.0)


# ---- A run that fails

def test_a_failed_cli_gives_its_exit_code_and_what_it_wrote_to_stderr(stage: Stage) -> None:
    server = stage.start("say('half')\nsys.exit(print('no such planet', file=sys.stderr) or 3)")
    reply = Asking(server).reply()
    assert (reply.status, reply.json["output"], reply.json["exit_code"]) == (200, "half", 3)
    assert "no such planet" in reply.json["error"]
    *_, error, done = Asking(server, stream=True).reply().lines
    assert (error["type"], done["type"], done["content"]["exit_code"]) == ("error", "done", 3)
    assert "no such planet" in json.dumps(error["content"])


@pytest.mark.parametrize("api", ["openai", "anthropic"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_fails_before_its_first_event_is_an_http_error_with_the_reason(
        stage: Stage, api: str, stream: bool) -> None:
    server = stage.start("sys.exit(print('no such planet', file=sys.stderr) or 3)")
    reply = Asking(server, api, stream=stream).reply()
    assert (reply.status, reply.json["error"]["type"]) == (502, "api_error")
    assert reply.headers["x-should-retry"] == "false"
    assert "no such planet" in reply.json["error"]["message"]


@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_a_failure_in_mid_stream_is_an_error_event_and_the_end(stage: Stage, api: str) -> None:
    reply = Asking(stage.start("say('half')\nsys.exit(3)"), api, stream=True).reply()
    assert (reply.status, reply.data[-1]["error"]["type"]) == (200, "api_error")
    assert b"half" in reply.body


def test_of_a_flood_on_stderr_the_end_is_kept(stage: Stage) -> None:
    script = "sys.stderr.write('first words' + 'x' * 1_000_000 + '\\nlast words')\nsay('text')\nsys.exit(1)"
    reply = Asking(stage.start(script)).reply()
    assert (reply.json["output"], reply.json["exit_code"]) == ("text", 1)
    assert "last words" in reply.json["error"] and "first words" not in reply.json["error"]
    assert len(reply.json["error"]) < 70_000


def test_what_a_cli_writes_to_stderr_after_it_closed_stdout_is_told(
        make_client: Callable[..., Client], fake_cli: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert clinvk.Child.LAST_WORDS >= 1
    monkeypatch.setattr(clinvk.Child, "LAST_WORDS", 20.0)  # a busy machine may take longer for the 0.3 s
    script = "os.close(1)\ntime.sleep(0.3)\nsys.exit(print('no such planet', file=sys.stderr) or 3)"
    client = make_client({"backends": {"it": {"command": fake_cli(script)}}})
    reply = client.call("POST", "/api/v1/prompt", {"backend": "it", "prompt": "hello"})
    assert reply.json["exit_code"] == 3
    assert "no such planet" in reply.json["error"]


def test_a_cli_that_was_killed_has_failed(stage: Stage) -> None:
    reply = Asking(stage.start("say('half')\nos.kill(os.getpid(), signal.SIGKILL)")).reply()
    assert (reply.status, reply.json["output"], "error" in reply.json) == (200, "half", True)
    assert reply.json["exit_code"] != 0


@pytest.mark.parametrize("api, stream", SOME_WAYS)
def test_a_program_that_can_not_be_started_is_a_503_and_takes_no_slot(stage: Stage, api: str, stream: bool) -> None:
    server = stage.start("", max_concurrent_runs=1)
    (stage.folder / "fake").write_text("#!/no/such/interpreter\n")
    for _ in range(2):
        reply = Asking(server, api, stream=stream).reply()
        assert (reply.status, "can not be started" in reply.body.decode()) == (503, True)
    stage.await_runs(active=0)


# ---- Ending: a client that has gone

def close(asking: Asking) -> None:
    asking.leave()


def half_close(asking: Asking) -> None:
    asking.socket.shutdown(socket.SHUT_WR)


def reset(asking: Asking) -> None:
    asking.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    asking.leave()


WAYS = [(script, stream, goes) for script, stream in ((TALKING, True), (SILENT, True), (SILENT, False))
        for goes in (close, half_close, reset)]


@pytest.mark.parametrize("api, script, stream, goes", [
    *(("native", *way) for way in WAYS), ("openai", TALKING, True, close), ("openai", SILENT, False, close),
    ("anthropic", SILENT, True, half_close)])
def test_nothing_of_a_silent_run_outlives_its_client(stage: Stage, bystander: int, api: str, script: str, stream: bool,
                                                     goes: Callable[[Asking], None]) -> None:
    server = stage.start(script, max_concurrent_runs=1)
    asking = Asking(server, api, stream=stream)
    if script == TALKING:
        asking.until(b"first ")
    family = stage.family()
    assert alive(family) == sorted(family)
    goes(asking)
    eventually(lambda: not alive(family))
    stage.await_runs(active=0)
    assert children_of(server.process.pid, "Z") == []
    assert os.getpgid(server.process.pid) == os.getpgid(bystander)


@pytest.mark.parametrize("then", ["time.sleep(600)", "while True:\n    say('more ')\n    time.sleep(0.01)"],
                         ids=["silent", "talking"])
def test_processes_that_ignore_a_sigterm_are_killed(stage: Stage, then: str) -> None:
    asking = Asking(stage.start(FAMILY + "descend(stubborn=True)\nnote('ready')\n" + then), stream=True)
    family = stage.family()
    asking.leave()
    eventually(lambda: not alive(family))
    stage.await_runs(active=0)


def test_a_cli_and_its_tools_may_clean_up_and_are_told_once(
        stage: Stage, make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    assert clinvk.GRACE >= 1.5
    monkeypatch.setattr(clinvk, "GRACE", 20.0)  # a busy machine may take longer for the 0.3 s
    script = PRELUDE.format(here=str(stage.folder)) + """
def clean_up(number, frame):
    append(name)
    time.sleep(0.3)
    note("clean-" + name)
    os._exit(0)
signal.signal(signal.SIGTERM, clean_up)
name = "cli"
if os.fork() == 0:
    name = "tool"
    os.setsid()
    note("pid-tool")
    time.sleep(600)
wait_for("pid-tool")
note("pid-cli")
time.sleep(600)"""
    children = make_client().server.children
    child = children.start(clinvk.Command([stage.fake_cli(script)], "/", dict(os.environ)))
    family = [stage.await_note("pid-cli"), stage.await_note("pid-tool")]
    children.dismiss(child, clinvk.nothing, patience=0.0).join()
    assert not alive(family)
    assert stage.noted("clean-cli") and stage.noted("clean-tool")
    assert sorted(stage.order) == ["cli", "tool"]


def test_ending_one_run_leaves_the_others_of_its_backend_alone(stage: Stage) -> None:
    server = stage.start("name = sys.stdin.read()\nnote('pid-' + name)\nwait_for('go')\nsay('still here')")
    leaver, stayer = Asking(server, prompt="leaver"), Asking(server, prompt="stayer")
    pids = [stage.await_note("pid-leaver"), stage.await_note("pid-stayer")]
    leaver.leave()
    eventually(lambda: alive(pids) == pids[1:])
    stage.allow("go")
    assert stayer.text() == "still here"


@pytest.mark.parametrize("how", [{}, {"start_new_session": True}, {"env": {}}],
                         ids=["same group", "another session", "another environment"])
def test_what_a_cli_leaves_behind_after_a_good_answer_is_ended_too(stage: Stage, how: Dict[str, Any]) -> None:
    script = f"""
process = subprocess.Popen(["sleep", "600"], stdin=-3, stdout=-3, stderr=-3, **{how!r})
append(str(process.pid))
say("answer")"""
    server = stage.start(script)
    assert Asking(server).text() == "answer"
    eventually(lambda: not alive(list(map(int, stage.order))))
    stage.await_runs(active=0)
    assert children_of(server.process.pid, "Z") == []


def test_a_cli_that_does_not_go_after_its_answer_is_ended(stage: Stage) -> None:
    script = """
if "--version" in sys.argv:
    sys.exit(print("2.1.197 (Claude Code)"))
note("pid")
for line in sys.stdin:
    if '"user"' in line:
        say(json.dumps({"type": "result", "is_error": False, "num_turns": 1, "stop_reason": "end_turn"}) + chr(10))
time.sleep(600)"""
    reply = Asking(stage.start(script, backend="claude"), backend="claude").reply()
    assert (reply.status, reply.json["exit_code"]) == (200, 0)
    eventually(lambda: not alive([stage.await_note("pid")]))


def test_a_stop_sequence_ends_the_cli(stage: Stage) -> None:
    script = TALKING.replace("say('first ')\nnote('ready')", "note('ready')\nsay('one END two')")
    assert Asking(stage.start(script), "openai", stop=["END"]).text() == "one "
    eventually(lambda: not alive(stage.family()))


@pytest.mark.parametrize("script", ["note('ready')\ntime.sleep(600)", "note('ready')\nsys.exit(3)"],
                         ids=["client gone", "failed"])
def test_the_scratch_directory_of_a_run_is_removed(stage: Stage, script: str) -> None:
    script = "if '--version' in sys.argv:\n    sys.exit()\nappend(os.environ['GEMINI_CLI_HOME'])\n" + script
    server = stage.start(script, backend="gemini", environ={"GEMINI_API_KEY": "key"})
    asking = Asking(server, "openai", backend="gemini")
    stage.await_note("ready")
    asking.leave()
    scratch = Path(stage.order[0])
    eventually(lambda: not scratch.exists())
    assert list(scratch.parent.iterdir()) == []


# ---- Ending: time, size, and the server's own end

def test_a_run_whose_time_is_up_is_ended_with_minus_1_and_what_it_said(stage: Stage) -> None:
    reply = Asking(stage.start(TALKING), "native", "x" * 2_000_000, timeout_secs=5).reply()
    assert (reply.status, reply.json["exit_code"], reply.json["output"]) == (200, -1, "first ")
    assert "time is up" in reply.json["error"] and "timeout_secs" in reply.json["error"]
    eventually(lambda: not alive(stage.family()))


@pytest.mark.parametrize("api, kind, stream", [("openai", "api_error", True), ("anthropic", "timeout_error", False)])
def test_a_compat_run_whose_time_is_up_is_a_504_and_must_not_be_repeated(
        stage: Stage, api: str, kind: str, stream: bool) -> None:
    reply = Asking(stage.start(SILENT, request_timeout_secs=1), api, stream=stream).reply()
    assert (reply.status, reply.json["error"]["type"], reply.headers["x-should-retry"]) == (504, kind, "false")
    eventually(lambda: not alive(stage.so_far()))


def test_a_cli_that_talks_without_end_is_ended_when_its_time_is_up(stage: Stage) -> None:
    server = stage.start("note('pid-cli')\nwhile True:\n    say('more ')\n    time.sleep(0.01)")
    *_, error, done = Asking(server, stream=True, timeout_secs=2).reply().lines
    assert (error["type"], done["type"], done["content"]["exit_code"]) == ("error", "done", -1)
    eventually(lambda: not alive(stage.so_far()))


def test_a_run_is_ended_in_time_though_its_client_reads_nothing(stage: Stage) -> None:
    server = stage.start("note('pid-cli')\nwhile True:\n    say('x' * 65536)")
    asking = Asking(server, stream=True, timeout_secs=2)
    eventually(lambda: "POST /api/v1/prompt" in server.stderr)  # logged when the server is done with it
    eventually(lambda: not alive(stage.so_far()))
    stage.await_runs(active=0)
    asking.leave()


def test_a_client_that_takes_nothing_of_a_finished_answer_is_dropped_in_time(stage: Stage) -> None:
    server = stage.start("say('x' * 20_000_000)", write_timeout_secs=1)
    asking = Asking(server)
    eventually(lambda: "POST /api/v1/prompt" in server.stderr)  # logged when the server is done with it
    asking.leave()


def test_a_client_that_has_sent_its_next_requests_and_left_is_noticed(stage: Stage) -> None:
    asking = Asking(stage.start(TALKING))
    asking.socket.sendall(2 * b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    family = stage.family()
    asking.leave()
    eventually(lambda: not alive(family))


def test_time_that_is_up_in_the_line_is_a_504_however_long_that_was(
        make_client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clinvk, "SILENCE", 0.2)
    client = make_client({"server": {"max_concurrent_runs": 1}})
    assert list(client.server.slots.take(clinvk.Stop())) == []  # the only slot
    for path, body in (("/api/v1/prompt", {"backend": "echo", "prompt": "p", "timeout_secs": 1}),
                       ("/v1/messages", {"model": "echo", "max_tokens": 1, "clinvk": {"timeout_secs": 1},
                                         "messages": [{"role": "user", "content": "p"}]})):
        reply = client.call("POST", path, body)
        assert reply.status == 504
        assert "1 runs were going on for 1 s, and this one could not begin" in fault(reply, shape(path))
    streamed = client.call("POST", "/api/v1/prompt", {"backend": "echo", "prompt": "p", "timeout_secs": 5,
                                                      "output_format": "stream-json"})  # in which it has begun
    first, *_, error, done = streamed.lines
    assert (first["type"], error["type"], done["type"]) == ("progress", "error", "done")
    assert (error["content"]["code"], done["content"]["exit_code"]) == ("timeout", -1)


def test_a_run_without_a_process_is_ended_in_time_too(client: Any) -> None:
    reply = client.call("POST", "/api/v1/prompt", {"backend": "echo", "prompt": "a " * 1000, "timeout_secs": 1e-6})
    assert (reply.status, reply.json["exit_code"]) == (200, -1) and "time is up" in reply.json["error"]
    assert client.server.slots.active == 0


def started_family(folder: Path) -> Tuple[clinvk.Children, clinvk.Child, List[int]]:
    """A CLI, and a process that it has started in a session of its own; and the numbers of both."""
    children = clinvk.Children(10**6)
    script = "import os, subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
    command = clinvk.Command([sys.executable, "-c", script + "; import time; time.sleep(600)"], str(folder), {})
    child = children.start(command)
    other = next(int(data) for data in child.output(clinvk.Stop()) if data)
    return children, child, [child.process.pid, other]


def test_what_can_not_be_looked_up_is_no_sign_that_nothing_is_left(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    children, child, family = started_family(tmp_path)
    look, failures = clinvk.processes, iter([OSError("Too many open files")] * 3)

    def processes(mark: str) -> List[clinvk.Process]:
        for failure in failures:
            raise failure
        return look(mark)
    monkeypatch.setattr(clinvk, "processes", processes)
    children.dismiss(child, clinvk.nothing, patience=0.0).join()
    assert alive(family) == [] and children.wait_until_gone(0)
    children.dismiss_heir()


def test_what_can_not_be_ended_is_given_up_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    children, child, family = started_family(tmp_path)
    kill = os.kill
    monkeypatch.setattr(clinvk, "LAST_LOOK", 0.5)
    monkeypatch.setattr(clinvk.os, "kill", lambda pid, number: kill(pid, number) if number == 0 else None)
    children.dismiss(child, clinvk.nothing, patience=0.0).join(60)
    assert children.wait_until_gone(0) and set(alive(family)) == set(family)
    assert all(str(pid) in caplog.text for pid in family) and "do not end" in caplog.text
    monkeypatch.undo()
    clinvk.end_descendants(child.process, child.mark)
    assert alive(family) == []
    children.dismiss_heir()


def test_a_second_signal_changes_nothing(make_client: Callable[..., Any]) -> None:
    server, numbers = make_client().server, (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: clinvk.stop_serving(server, *_)) for number in numbers}
    try:
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        for number in numbers:
            signal.raise_signal(number)
        assert server.closing.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_home_that_can_not_be_written_is_an_unavailable_backend(make_client: Callable[..., Any]) -> None:
    client = make_client({"backends": {"gemini": {"command": "cat"}}}, GEMINI_API_KEY="x")
    (client.server.config.home / "runs").touch()  # where its scratch directory was to be
    body = {"model": "gemini", "messages": [{"role": "user", "content": "hi"}]}
    reply = client.call("POST", "/openai/v1/chat/completions", body)
    assert reply.status == 503 and "gemini can not be started" in fault(reply, "openai")


def test_a_cli_that_closes_its_stderr_is_asked_no_more_often_than_another(tmp_path: Path) -> None:
    """What is closed is ready to be read for ever."""
    children = clinvk.Children(10**6)
    command = clinvk.Command(["sh", "-c", "exec 2>/dev/null; sleep 1; echo end"], str(tmp_path), dict(os.environ))
    child = children.start(command)
    heard = list(child.output(clinvk.Stop()))
    assert b"".join(heard) == b"end\n" and len(heard) < 100
    children.dismiss(child, clinvk.nothing, patience=0.0).join()
    children.dismiss_heir()


def test_a_directory_that_is_another_when_the_run_begins_is_refused(
        make_client: Callable[..., Any], fake_cli: Callable[..., str], tmp_path: Path) -> None:
    client = make_client({"server": {"max_concurrent_runs": 1}, "backends": {"own": {"command": fake_cli("print(1)")}}})
    assert list(client.server.slots.take(clinvk.Stop())) == []  # the only slot
    (tmp_path / "work").mkdir()
    body = {"backend": "own", "prompt": "p", "workdir": str(tmp_path / "work")}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.call, "POST", "/api/v1/prompt", body)
        eventually(lambda: client.server.slots.waiting)
        (tmp_path / "work").rmdir()
        (tmp_path / "work").symlink_to("/etc")
        client.server.slots.release()
        reply = asked.result()
    assert (reply.status, "no longer the directory" in reply.json["detail"]) == (403, True)


LITTERS = """
seen = sorted(os.listdir())
number = int(sys.stdin.read())
open("file", "w").write(str(number))
os.mkdir("folder")
open("folder/inner", "w").write(str(number))
os.symlink("/etc/hostname", "link")
print(seen)
"""


def test_what_a_cli_leaves_in_the_directory_of_the_model_the_next_one_does_not_see(
        make_client: Callable[..., Any], fake_cli: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    client = make_client({"backends": {"litters": {"command": fake_cli(LITTERS)}}})
    left = client.server.config.home / "left"
    for number in range(3):
        body = {"model": "litters", "messages": [{"role": "user", "content": str(number)}]}
        answer = client.call("POST", "/openai/v1/chat/completions", body).json
        assert answer["choices"][0]["message"]["content"] == "[]\n"
    inner = left / "folder" / "inner"  # what the last one has left still lies in its place
    assert (left / "file").read_text() == inner.read_text() == "1"
    assert (left / "link").is_symlink()
    assert f"a CLI has left 'file' in the directory of the model, which is to be empty: it is '{left / 'file'}'" in \
        caplog.text


def test_a_directory_of_the_model_that_can_not_be_emptied_is_an_error_that_says_so(client: Any) -> None:
    empty = clinvk.own_directory(client.server.config, "empty")
    (empty / "AGENTS.md").touch()
    (empty.parent / "left").touch()  # where it was to go
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    reply = client.call("POST", "/openai/v1/chat/completions", body)
    assert reply.status == 503 and "must be empty" in reply.json["error"]["message"]


def test_a_server_whose_directory_is_gone_asks_for_another_one(
        make_client: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    client = make_client()
    (tmp_path / "here").rmdir()
    told = [client.call("POST", "/api/v1/prompt", {"backend": "echo", "prompt": "p", **more})
            for more in ({}, {"workdir": str(tmp_path)})]
    assert [reply.status for reply in told] == [422, 200] and "body.workdir" in told[0].json["detail"]


def test_a_cli_that_prints_too_much_is_ended(stage: Stage) -> None:
    server = stage.start("note('pid')\nwhile True:\n    say('x' * 1000)", max_output_bytes=100_000)
    reply = Asking(server).reply()
    assert (reply.status, reply.json["exit_code"], set(reply.json["output"])) == (200, -1, {"x"})
    assert "server.max_output_bytes" in reply.json["error"]
    assert 0 < len(reply.json["output"]) <= 100_000
    assert [Asking(server, api).reply().status for api in ("openai", "anthropic")] == [502, 502]
    eventually(lambda: not alive([stage.await_note("pid")]))


@pytest.mark.parametrize("number, script", [(signal.SIGTERM, TALKING), (signal.SIGINT, STUBBORN)])
def test_a_server_that_is_stopped_in_mid_run_leaves_nothing(
        stage: Stage, bystander: int, number: int, script: str) -> None:
    server = stage.start(script, max_concurrent_runs=1)
    first = Asking(server)
    family = stage.family()
    second = Asking(server, prompt="waits")
    stage.await_runs(active=1, waiting=1)
    family += children_of(server.process.pid)
    server.process.send_signal(number)
    assert server.process.wait(30) == 0
    eventually(lambda: not alive(family))
    assert "Traceback" not in server.stderr
    first.leave()
    second.leave()


def test_a_server_that_was_killed_leaves_nothing(stage: Stage, bystander: int) -> None:
    server = stage.start(STUBBORN)
    asking = Asking(server)
    family = stage.family() + children_of(server.process.pid)
    server.process.kill()
    server.process.wait()
    eventually(lambda: not alive(family))
    asking.leave()


def test_a_second_ctrl_c_does_not_leave_the_clis_behind(stage: Stage) -> None:
    server = stage.start(STUBBORN)
    asking = Asking(server)
    family = stage.family()
    for _ in range(3):
        server.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(0.3)
    assert server.process.wait(30) == 0
    eventually(lambda: not alive(family))
    assert "Traceback" not in server.stderr
    asking.leave()


# ---- Slots

ONE_BY_ONE = "name = sys.stdin.read()\nappend(name)\nwait_for('go-' + name)\nsay(name)"


def test_runs_wait_in_the_order_in_which_they_came(stage: Stage) -> None:
    server = stage.start(ONE_BY_ONE, max_concurrent_runs=2)
    asked = []
    for number in range(12):
        asked.append(Asking(server, APIS[number % 3], f"{number:02}", stream=number % 2 == 0))
        stage.await_runs(active=min(2, number + 1), waiting=max(0, number - 1))
        eventually(lambda: len(stage.order) == min(2, len(asked)))
    assert stage.runs() == {"active": 2, "waiting": 10, "limit": 2}
    for number, asking in enumerate(asked):
        stage.allow(f"go-{number:02}")
        assert asking.text() == f"{number:02}"
        eventually(lambda served=number + 1: len(stage.order) == min(12, served + 2))
    assert stage.order == [f"{number:02}" for number in range(12)]


@pytest.mark.parametrize("api, stream", SOME_WAYS)
def test_a_full_line_is_a_503_with_retry_after(stage: Stage, api: str, stream: bool) -> None:
    server = stage.start(ONE_BY_ONE, max_concurrent_runs=1, max_waiting_runs=1)
    first = Asking(server, prompt="first")
    stage.await_runs(active=1)
    second = Asking(server, prompt="second")
    stage.await_runs(active=1, waiting=1)
    refused = Asking(server, api, "third", stream=stream).reply()
    kind = {"native": None, "openai": "api_error", "anthropic": "overloaded_error"}[api]
    assert (refused.status, refused.json.get("error", {}).get("type")) == (503, kind)
    assert int(refused.headers["retry-after"]) >= 1 and "x-should-retry" not in refused.headers
    stage.allow("go-first")
    stage.allow("go-second")
    assert (first.text(), second.text(), stage.order) == ("first", "second", ["first", "second"])


@pytest.mark.parametrize("api, stream", SOME_WAYS)
def test_waiting_counts_towards_the_time_limit_and_nothing_is_started_then(
        stage: Stage, api: str, stream: bool) -> None:
    server = stage.start(ONE_BY_ONE, max_concurrent_runs=1)
    first = Asking(server, prompt="first")
    stage.await_runs(active=1)
    limit = {"timeout_secs": 0.5}
    reply = Asking(server, api, "second", stream=stream, **(limit if api == "native" else {"clinvk": limit})).reply()
    assert (reply.status, "x-should-retry" in reply.headers) == (504, False)
    assert stage.runs() == {"active": 1, "waiting": 0, "limit": 1}
    stage.allow("go-first")
    assert (first.text(), stage.order) == ("first", ["first"])


@pytest.mark.parametrize("goes, stream", [(close, False), (half_close, True), (reset, False)])
def test_a_waiting_client_that_leaves_is_out_of_the_line(
        stage: Stage, goes: Callable[[Asking], None], stream: bool) -> None:
    server = stage.start(ONE_BY_ONE, max_concurrent_runs=1)
    first = Asking(server, prompt="first")
    stage.await_runs(active=1)
    leaver = Asking(server, prompt="leaver", stream=stream)
    stage.await_runs(active=1, waiting=1)
    last = Asking(server, prompt="last")
    stage.await_runs(active=1, waiting=2)
    goes(leaver)
    stage.await_runs(active=1, waiting=1)
    stage.allow("go-first")
    stage.allow("go-last")
    assert (first.text(), last.text(), stage.order) == ("first", "last", ["first", "last"])


def test_a_slot_is_taken_until_the_last_process_of_its_run_has_gone(stage: Stage) -> None:
    server = stage.start(STUBBORN, max_concurrent_runs=1)
    first = Asking(server)
    family = stage.family()
    (stage.folder / "ready").unlink()
    second = Asking(server)
    stage.await_runs(active=1, waiting=1)
    first.leave()
    stage.await_note("ready")
    assert not alive(family)
    second.leave()


def test_many_clients_at_once_are_all_served_and_health_answers_meanwhile(stage: Stage) -> None:
    server = stage.start("name = sys.stdin.read()\nsay(name)\nwait_for('go')\nsay(name)")
    asked = [Asking(server, APIS[n % 3], f"<{n}>", stream=n % 2 == 0) for n in range(50)]
    texts: Dict[int, str] = {}
    readers = [threading.Thread(target=lambda n=n, a=a: texts.update({n: a.text()})) for n, a in enumerate(asked)]
    for reader in readers:
        reader.start()
    stage.await_runs(active=8, waiting=42)  # it is answered while all the slots are taken
    stage.allow("go")
    for reader in readers:
        reader.join()
    assert texts == {n: f"<{n}>" * 2 for n in range(50)}
    stage.await_runs(active=0)


# ---- Silence

@pytest.fixture(scope="module")
def silence(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dict[str, Tuple[Asking, bytes]]]:
    """Each API's client, and what it was told while its CLI was silent for ten seconds; then the CLIs have answered."""
    folder = tmp_path_factory.mktemp("silence")
    cli = folder / "fake"
    cli.write_text(f"#!/bin/sh\nwhile [ ! -e '{folder}/go' ]; do sleep 0.1; done\nprintf late\n")
    cli.chmod(0o755)
    settings = {"max_concurrent_runs": 3, "port": 0, "spares": 0, "live_conversations": 0}
    (folder / "config.yaml").write_text(json.dumps({"backends": {"it": {"command": str(cli)}}, "server": settings}))
    server = Served([sys.executable, str(pyz), "serve", "--config", str(folder / "config.yaml")], folder,
                    {**os.environ, "HOME": str(folder)})
    try:
        asked = {api: Asking(server, api, stream=True) for api in APIS}
        eventually(lambda: server.call("GET", "/health").json["runs"]["active"] == 3)
        signs = {"native": b'"progress"', "openai": b": keepalive", "anthropic": b'"ping"'}
        read = {api: asked[api].until(signs[api]) for api in APIS}
        (folder / "go").touch()
        yield {api: (asked[api], read[api]) for api in APIS}
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.parametrize("api", APIS)
def test_ten_seconds_of_silence_are_filled_and_the_answer_still_comes(
        silence: Dict[str, Tuple[Asking, bytes]], api: str) -> None:
    asking, read = silence[api]
    assert b"late" not in read
    assert asking.text(read) == "late"
