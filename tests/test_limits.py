"""SPEC 6 on the wire: how long a connection and a request may take, how many there may be, and bodies that are cut up,
or lie about their length. The real server as a process, and real sockets."""

import contextlib
import json
import os
import select
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import pytest
from conftest import Client, Reply, Served, eventually, fault, serving, shape

import clinvk

NATIVE, OPENAI, ANTHROPIC = "/api/v1/prompt", "/openai/v1/chat/completions", "/anthropic/v1/messages"
HI = [{"role": "user", "content": "hi"}]
BODIES: Dict[str, bytes] = {
    path: json.dumps(body).encode() for path, body in [
        (NATIVE, {"backend": "echo", "prompt": "hi"}), (OPENAI, {"model": "echo", "messages": HI}),
        (ANTHROPIC, {"model": "echo", "messages": HI, "max_tokens": 9})]}
each_api = pytest.mark.parametrize("path", BODIES)
LATE = 60.0  # seconds that a limit may be late on a machine that is busy with other things
NEVER = 600  # seconds: what has such a limit is not ended by it
PATIENT = {"read_timeout_secs": NEVER, "idle_timeout_secs": NEVER, "write_timeout_secs": NEVER}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

Serve = Callable[..., Served]


def head(first: str, *headers: str) -> bytes:
    return "\r\n".join([first, "Host: localhost", "Content-Type: application/json", *headers, "", ""]).encode()


def post(path: str, *headers: str, body: bytes = b"") -> bytes:
    return head(f"POST {path} HTTP/1.1", *headers) + body


def whole(path: str) -> bytes:
    """A right request."""
    return post(path, f"Content-Length: {len(BODIES[path])}", body=BODIES[path])


def chunked(body: bytes, size: int = 7) -> bytes:
    pieces = [body[at:at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


CHUNKS = "Transfer-Encoding: chunked"
HEALTH = head("GET /health HTTP/1.1")


class Wire:
    """A connection, byte by byte: `drip` is sent ever again while it is watched."""

    def __init__(self, server: Served, sent: bytes = b"", drip: bytes = b"", receive_buffer: int = 0) -> None:
        self.socket = socket.socket(socket.AF_INET6 if ":" in server.host else socket.AF_INET)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(120)
        self.began = time.monotonic()
        self.socket.connect((server.host, server.port))
        self.drip, self.heard = drip, b""
        self.lasted: Optional[float] = None  # seconds until the server closed it
        self.send(sent)

    def send(self, data: bytes) -> "Wire":
        self.socket.sendall(data)
        return self

    def hear(self) -> None:
        """What there is; blocks until there is something."""
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            data = b""
        self.heard += data
        if not data:
            self.lasted = time.monotonic() - self.began

    def until(self, word: bytes) -> None:
        while word not in self.heard:
            assert self.lasted is None, self.heard
            self.hear()

    def to_the_end(self) -> bytes:
        """All that comes until the server closes the connection."""
        while self.lasted is None:
            self.hear()
        self.socket.close()
        return self.heard

    def answers(self) -> List[Reply]:
        return replies(self.to_the_end())


def replies(data: bytes) -> List[Reply]:
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        size = int(headers.get("content-length", 0))
        found.append(Reply(int(first.split()[1]), headers, rest[:size]))
        data = rest[size:]
    return found


def watch(wires: Iterable[Wire], seconds: float, every: float = 0.1) -> None:
    """Until the server has closed all of them; those that drip send a drop `every` so many seconds."""
    poll, ends, drips_at = select.poll(), time.monotonic() + seconds, 0.0
    live = {wire.socket.fileno(): wire for wire in wires}
    for number in live:
        poll.register(number, select.POLLIN)
    while live and time.monotonic() < ends:
        for number, _ in poll.poll(1000 * every):
            live[number].hear()
            if live[number].lasted is not None:
                poll.unregister(number)
                del live[number]
        if time.monotonic() > drips_at:
            drips_at = time.monotonic() + every
            for wire in live.values():
                with contextlib.suppress(ConnectionError):  # then it will be heard
                    wire.socket.send(wire.drip)
    assert not live, f"after {seconds} s {len(live)} connections are still open"


def message(reply: Reply, path: str) -> str:
    """What an error says, in the shape that errors on this path have."""
    assert reply.headers["connection"] == "close" and reply.headers["x-request-id"]
    return fault(reply, shape(path))


def answer_text(reply: Reply, path: str) -> str:
    assert reply.status == 200, reply.body
    told = reply.json
    return str({NATIVE: lambda: told["output"], OPENAI: lambda: told["choices"][0]["message"]["content"],
                ANTHROPIC: lambda: told["content"][0]["text"]}[path]())


@pytest.fixture
def descriptors() -> None:
    """This process may have as many connections open as a server of ours."""
    clinvk.raise_descriptor_limit(clinvk.ServerConfig())


def at_most(files: int, folder: Path, *, hard: bool) -> str:
    """A Python that starts with so many files allowed."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nulimit -{"n" if hard else "Sn"} {files}\nexec "{sys.executable}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def open_files(server: Served) -> Dict[int, str]:
    """Descriptor -> what it is."""
    found = {}
    for number in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just been closed
            found[int(number.name)] = os.readlink(number)
    return found


def next_descriptor(server: Served) -> int:
    files = open_files(server)
    return next(number for number in range(9999) if number not in files)


def connections(server: Served) -> int:
    """How many of them are open: all its sockets but the one that listens."""
    return sum(name.startswith("socket:") for name in open_files(server).values()) - 1


def processor_time(server: Served) -> float:
    """Seconds, all threads."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- read_timeout_secs: from a request's first byte to its last

def test_a_slow_request_is_a_408_in_its_apis_shape_however_regularly_its_bytes_come(serve: Serve) -> None:
    server = serve(config={"server": {"read_timeout_secs": 1.5, "idle_timeout_secs": NEVER}})
    cases = [(Wire(server, b"POST /v1/messages HTTP/1.1\r\nX-A: ", b"a"), ANTHROPIC), (Wire(server, b"P"), "/api"),
             (Wire(server, b"POST /openai/v1/nothing HTTP/1.1"), "/api"),
             *((Wire(server, post(path, "Content-Length: 1000"), b" "), path) for path in BODIES),
             *((Wire(server, post(path, "Content-Length: 1000", body=b"{")), path) for path in BODIES),
             *((Wire(server, post(path, CHUNKS), b"1\r\n \r\n"), path) for path in BODIES),
             *((Wire(server, post(path, CHUNKS), b"0"), path) for path in BODIES),
             *((Wire(server, post(path, "Content-Length: 9", "Expect: 100-continue"), b""), path) for path in BODIES)]
    watch([wire for wire, _ in cases], 1.5 + LATE)
    for wire, path in cases:
        *_, reply = wire.answers()
        assert wire.lasted is not None and wire.lasted > 1.4
        assert reply.status == 408 and "1.5 s" in message(reply, path)
        assert "server.read_timeout_secs" in message(reply, path)
    lasted = [int(line.split()[-3]) for line in server.stderr.splitlines() if " 408 " in line]  # as the log tells it
    assert len(lasted) == len(cases) and min(lasted) > 1400


def test_a_request_that_comes_in_time_is_answered_however_it_is_cut_up(serve: Serve) -> None:
    server = serve(config={"server": {"read_timeout_secs": 20}})
    for path in BODIES:
        for sent in (whole(path), post(path, CHUNKS, body=chunked(BODIES[path]))):
            wire = Wire(server)
            for at in range(len(sent)):
                wire.send(sent[at:at + 1])
            wire.send(head("GET /health HTTP/1.1", "Connection: close"))
            first, second = wire.answers()
            assert answer_text(first, path) == "hi" and second.json["version"]


def test_a_client_that_is_refused_and_goes_on_to_send_slowly_can_read_why(serve: Serve) -> None:
    server = serve(config={"server": {"read_timeout_secs": 8, "max_request_body_bytes": 1000}})
    wire = Wire(server, HEALTH)
    wire.until(b'"version"')
    time.sleep(6)  # which are no part of the next request's time
    wire.send(post(OPENAI, "Content-Length: 1000000"))
    for _ in range(15):  # longer than it lingers after a 408
        time.sleep(0.2)
        wire.send(b"    ")
    *_, reply = wire.answers()
    assert reply.status == 413


@LINUX
def test_a_slow_sender_that_reads_nothing_is_gone_soon_too(serve: Serve) -> None:
    server = serve(config={"server": {**PATIENT, "read_timeout_secs": 1}})
    silent, dripping = (Wire(server, post(OPENAI, "Content-Length: 1000")) for _ in range(2))
    with contextlib.suppress(ConnectionError):
        while dripping.send(b" ") and time.monotonic() < dripping.began + LATE:
            time.sleep(0.1)
    eventually(lambda: connections(server) == 0, LATE)
    for wire in (silent, dripping):
        wire.socket.close()


def test_the_time_of_a_request_does_not_run_while_the_one_before_is_answered(
        serve: Serve, fake_cli: Callable[..., str]) -> None:
    limits = {"read_timeout_secs": 6, "idle_timeout_secs": 1, "write_timeout_secs": 1}
    server = serve(config={"server": limits, "backends": {"own": {"command": fake_cli("time.sleep(6.5); print('x')")}}})
    asked = json.dumps({"backend": "own", "prompt": "p"}).encode()
    wire = Wire(server, post(NATIVE, f"Content-Length: {len(asked)}", body=asked) + HEALTH[:20])
    wire.until(b'"output":"x')
    time.sleep(1)  # there are six
    wire.send(HEALTH[20:])
    first, second = wire.answers()
    assert (first.json["output"], second.status) == ("x\n", 200)


def test_a_slow_request_took_as_long_as_the_log_tells_though_more_of_it_comes_until_it_is_refused(
        make_client: Callable[..., Client], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "clinvk")
    listening = clinvk.listen(make_client({"server": {"port": 0, "read_timeout_secs": 50}}).server)
    ours, its = socket.socketpair()
    with contextlib.closing(listening), its:
        channel = clinvk.Channel(listening, ours, ("127.0.0.1", 1), listening.adj, {})
        with channel.outbuf_lock:  # which a worker takes first
            channel.received(b"POST ")
            channel.begun_at = channel.moved_at = time.monotonic() - 100
            channel.look(time.monotonic())
            channel.received(b"/health")
        [line] = eventually(lambda: [line for line in caplog.messages if " 408 " in line])
        assert int(line.split()[-3]) >= 100_000


# ---- idle_timeout_secs: a connection without a request

def test_an_idle_connection_is_closed_silently_whether_it_was_used_or_not(serve: Serve) -> None:
    server = serve(config={"server": {"read_timeout_secs": NEVER, "idle_timeout_secs": 2}})
    unused = [Wire(server), Wire(server, b"\r\n"), Wire(server, drip=b"\r\n\r\n"), Wire(server, drip=b"\n")]
    used = [Wire(server, HEALTH), Wire(server, HEALTH + b"\r\n")]
    for wire in used:
        wire.until(b'"runs"')
    watch([*unused, *used], 2 + LATE)
    assert [wire.lasted for wire in (*unused, *used) if (wire.lasted or 0) < 1.9] == []
    assert [wire.heard for wire in unused] == 4 * [b""] and [len(replies(wire.heard)) for wire in used] == [1, 1]


def test_a_connection_is_idle_only_since_its_last_answer(serve: Serve) -> None:
    server = serve(config={"server": {"idle_timeout_secs": 6}})
    wire = Wire(server)
    while time.monotonic() < wire.began + 7:  # longer than a connection may be idle
        time.sleep(1.2)  # it is looked at once a second
        wire.send(HEALTH)
        wire.heard = b""
        wire.until(b'"runs"')
    assert wire.lasted is None


def test_no_limit_of_a_connection_ends_a_run_that_is_silent_for_longer(
        serve: Serve, fake_cli: Callable[..., str]) -> None:
    limits = {"read_timeout_secs": 3, "idle_timeout_secs": 3, "write_timeout_secs": 3}
    server = serve(config={"server": limits, "backends": {"own": {"command": fake_cli("time.sleep(4.5); print('x')")}}})
    wires = []
    for fields in ({}, {"output_format": "stream-json"}):
        asked = json.dumps({"backend": "own", "prompt": "p", **fields}).encode()
        wires.append(Wire(server, post(NATIVE, f"Content-Length: {len(asked)}", "Connection: close", body=asked)))
    for wire in wires:
        heard = wire.to_the_end()
        assert b" 200 OK" in heard and b"x\\n" in heard


# ---- write_timeout_secs: without the client taking a byte

def test_the_time_in_which_nothing_was_there_to_take_does_not_count(make_client: Callable[..., Client]) -> None:
    """A run took longer than that, and the main thread looks just when its answer has come."""
    listening = clinvk.listen(make_client({"server": {"port": 0, "write_timeout_secs": 3}}).server)
    ours, its = socket.socketpair()
    with contextlib.closing(listening), its:
        channel = clinvk.Channel(listening, ours, ("127.0.0.1", 1), listening.adj, {})
        channel.requests.append("one that is being answered")
        channel.moved_at -= 100
        with contextlib.suppress(BlockingIOError):
            while ours.send(bytes(65536), socket.MSG_DONTWAIT):
                pass  # until the kernel has room for no more
        channel.write_soon(b"the answer")
        channel.look(time.monotonic())
        assert channel.connected
        channel.look(time.monotonic() + 4)
        assert not channel.connected


def test_a_client_that_takes_bytes_slowly_but_steadily_gets_them_all(
        serve: Serve, fake_cli: Callable[..., str]) -> None:
    """The kernel takes no more of us for longer than that: it has MB of its own to send first."""
    command = fake_cli("sys.stdin.read(); print('x' * 7_000_000)")
    server = serve(config={"server": {"write_timeout_secs": 6}, "backends": {"own": {"command": command}}})
    asked = json.dumps({"backend": "own", "prompt": "p"}).encode()
    wire = Wire(server, post(NATIVE, f"Content-Length: {len(asked)}", "Connection: close", body=asked))
    wire.hear()
    ends = time.monotonic() + 8
    while time.monotonic() < ends:
        time.sleep(0.5)
        wire.hear()
    (reply,) = replies(wire.to_the_end())
    assert len(reply.json["output"]) == 7_000_001


@pytest.mark.parametrize("sent, times", [("a file of the docs", 8), ("a long answer", 1)])
def test_clients_that_read_nothing_hold_no_threads(
        serve: Serve, fake_cli: Callable[..., str], sent: str, times: int) -> None:
    """Whether they send one request behind the other, or have a long answer to read: there are 21 threads."""
    command = fake_cli("sys.stdin.read(); print('x' * 12_000_000)")
    server = serve(config={"server": {"max_concurrent_runs": 1, "max_waiting_runs": 4},
                           "backends": {"own": {"command": command}}})
    asked = json.dumps({"backend": "own", "prompt": "p"}).encode()
    request = {"a file of the docs": head("GET /docs/swagger-ui-bundle.js HTTP/1.1"),
               "a long answer": post(NATIVE, f"Content-Length: {len(asked)}", body=asked)}[sent]
    wires = []
    for _ in range(25):
        wires.append(Wire(server, times * request, receive_buffer=SMALL))
        wires[-1].until(b" 200 OK")
    assert server.call("GET", "/health").status == 200
    for wire in wires:
        wire.socket.close()


def test_no_more_is_answered_than_a_client_has_room_for(serve: Serve) -> None:
    """Or answers of 1.6 MB each would fill the memory of a server whose client reads none."""
    server = serve()
    wire = Wire(server, 40 * head("GET /docs/swagger-ui-bundle.js HTTP/1.1"), receive_buffer=SMALL)
    wire.until(b" 200 OK")
    for _ in range(3):
        time.sleep(0.5)
        assert server.call("GET", "/health").status == 200
    assert 1 <= eventually(lambda: server.stderr.count("swagger-ui-bundle.js")) < 10
    wire.socket.close()


def test_what_is_refused_early_takes_from_the_rate_limit_too(serve: Serve) -> None:
    server = serve(config={"server": {"rate_limit_enabled": True, "rate_limit_burst": 2, "rate_limit_rps": 0.01}})
    malformed = post(OPENAI, "Content-Length: x")
    assert [server.raw(malformed).status for _ in range(3)] == [400, 400, 429]
    assert fault(server.raw(malformed), "openai") and server.call("GET", "/health").status == 429


def test_what_is_sent_one_behind_the_other_is_answered_in_order_once_it_is_read(serve: Serve) -> None:
    paths = ["/docs/swagger-ui-bundle.js", "/health", "/docs/swagger-ui-bundle.js", "/docs/start.js", "/health"]
    requests = [head(f"GET {path} HTTP/1.1") for path in paths[:-1]]
    wire = Wire(serve(), b"".join(requests) + head("GET /health HTTP/1.1", "Connection: close"))
    wire.until(b" 200 OK")
    time.sleep(0.5)  # more than the kernel takes has come
    assert [b"SwaggerUIBundle" in each.body for each in wire.answers()] == ["docs" in path for path in paths]


SMALL = 4096  # bytes that a client has room for


def taken_by_the_kernel() -> int:
    """How many bytes a connection takes though its client reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.connect(listening.getsockname())
        with listening.accept()[0] as accepted:
            accepted.setblocking(False)
            taken = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    taken += accepted.send(bytes(65536))
    return taken


def unread(server: Served) -> Tuple[Wire, int]:
    """A finished answer, half a megabyte of which lies in waitress, as its client takes nothing; the text's length."""
    length = taken_by_the_kernel() + 500_000
    asked = json.dumps({"backend": "echo", "prompt": length * "x"}).encode()
    wire = Wire(server, post(NATIVE, f"Content-Length: {len(asked)}", body=asked), receive_buffer=SMALL)
    eventually(lambda: f"POST {NATIVE} 200" in server.stderr)  # logged when the server is done with it
    return wire, length


@LINUX
def test_what_is_left_of_a_finished_answer_waits_for_write_timeout_secs(serve: Serve) -> None:
    server = serve(config={"server": {"write_timeout_secs": 1, "idle_timeout_secs": NEVER}})
    idle, (wire, _) = Wire(server), unread(server)
    eventually(lambda: connections(server) == 1, LATE)
    idle.send(head("GET /health HTTP/1.1", "Connection: close")).answers()  # it is the one that is left
    wire.socket.close()


def test_what_is_left_of_a_finished_answer_waits_no_less_than_that(serve: Serve) -> None:
    server = serve(config={"server": {"write_timeout_secs": NEVER, "idle_timeout_secs": 4, "read_timeout_secs": 4}})
    wire, length = unread(server)
    time.sleep(5.5)  # longer than every other limit
    while not wire.heard.endswith(b"}"):
        wire.hear()
        assert wire.lasted is None
    (reply,) = replies(wire.heard)
    assert len(reply.json["output"]) == length
    assert wire.send(head("GET /health HTTP/1.1", "Connection: close")).answers()[-1].status == 200


@LINUX
def test_a_run_whose_client_takes_nothing_is_ended(serve: Serve, fake_cli: Callable[..., str], tmp_path: Path) -> None:
    script = (f"open('{tmp_path}/started', 'w')\n"
              f"print({taken_by_the_kernel() + 500_000} * 'x', flush=True); time.sleep(600)")
    server = serve(config={"server": {"write_timeout_secs": 1}, "backends": {"own": {"command": fake_cli(script)}}})
    asked = json.dumps({"backend": "own", "prompt": "p", "output_format": "stream-json"}).encode()
    wire = Wire(server, post(NATIVE, f"Content-Length: {len(asked)}", body=asked), receive_buffer=SMALL)
    eventually((tmp_path / "started").exists)
    eventually(lambda: server.call("GET", "/health").json["runs"]["active"] == 0, LATE)
    eventually(lambda: connections(server) == 0, LATE)
    wire.socket.close()


@LINUX
def test_when_the_time_of_a_run_is_up_its_client_is_not_waited_for(serve: Serve, fake_cli: Callable[..., str]) -> None:
    server = serve(config={"server": PATIENT,
                           "backends": {"own": {"command": fake_cli("while True: print(65536 * 'x')")}}})
    asked = json.dumps({"backend": "own", "prompt": "p", "output_format": "stream-json", "timeout_secs": 5}).encode()
    wire = Wire(server, post(NATIVE, f"Content-Length: {len(asked)}", body=asked), receive_buffer=SMALL)
    eventually(lambda: f"POST {NATIVE} 200" in server.stderr)
    eventually(lambda: connections(server) == 0, LATE)
    wire.socket.close()


# ---- How many there may be

def six_hundred(server: Served) -> List[Wire]:
    """Connections of which every other one sends a request slowly."""
    return [Wire(server, post(OPENAI, "Content-Length: 1000"), b" ") if number % 2 else Wire(server)
            for number in range(600)]


@LINUX
def test_six_hundred_slow_and_idle_connections_keep_nobody_waiting(serve: Serve, descriptors: None) -> None:
    server = serve(config={"server": PATIENT})
    wires = six_hundred(server)
    for _ in range(5):
        assert server.call("GET", "/health").status == 200
        assert answer_text(server.call("POST", NATIVE, BODIES[NATIVE]), NATIVE) == "hi"
    assert connections(server) >= 600, "somebody was answered only because there was room"
    for wire in wires:
        wire.socket.close()


def test_six_hundred_slow_and_idle_connections_are_gone_in_time(serve: Serve, descriptors: None) -> None:
    server = serve(config={"server": {"read_timeout_secs": 3, "idle_timeout_secs": 3}})
    wires = six_hundred(server)
    watch(wires, LATE, 0.5)
    slow, idle = wires[1::2], wires[::2]
    assert [wire.lasted for wire in wires if (wire.lasted or 0) < 2.9] == []
    assert {reply.status for wire in slow for reply in replies(wire.heard)} == {408}
    assert {wire.heard for wire in idle} == {b""} and all(wire.heard for wire in slow)
    for wire in wires:
        wire.socket.close()


def test_at_the_limit_the_connection_that_waits_for_longest_makes_room(
        serve: Serve, tmp_path: Path, fake_cli: Callable[..., str]) -> None:
    script = f"while not os.path.exists('{tmp_path}/go'):\n    time.sleep(0.05)\nprint('x')"
    server = serve(config={"server": PATIENT, "backends": {"own": {"command": fake_cli(script)}}},
                   python=at_most(64, tmp_path, hard=True))  # half of it is for connections
    asked = json.dumps({"backend": "own", "prompt": "p"}).encode()
    oldest = Wire(server, post(NATIVE, f"Content-Length: {len(asked)}", body=asked))
    eventually(lambda: server.call("GET", "/health").json["runs"]["active"] == 1)
    half_sent = [Wire(server, post(OPENAI, "Content-Length: 1000", body=b"{")) for _ in range(5)]
    idle = [Wire(server) for _ in range(5)]
    for _ in range(3):
        assert server.call("GET", "/health").status == 200
    more = [Wire(server, HEALTH) for _ in range(40)]
    for wire in more:
        wire.until(b'"runs"')
    watch([*half_sent, *idle], LATE)  # all are closed, without a word
    assert {wire.heard for wire in (*half_sent, *idle)} == {b""}
    (tmp_path / "go").touch()
    oldest.until(b'"output":"x')
    for wire in more:
        wire.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            wire.hear()
    assert 20 < sum(wire.lasted is None for wire in more) < 32
    more[-1].socket.setblocking(True)
    assert more[-1].send(head("GET /health HTTP/1.1", "Connection: close")).answers()[-1].status == 200
    for wire in (oldest, *more):
        wire.socket.close()


@LINUX
def test_without_a_free_descriptor_nothing_spins_and_the_next_one_gets_in(
        serve: Serve, tmp_path: Path, fake_cli: Callable[..., str]) -> None:
    import resource

    def allow(files: int) -> None:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (files, 4096))  # type: ignore[attr-defined]
    script = f"open('{tmp_path}/started-' + str(os.getpid()), 'w'); time.sleep(600)"
    server = serve(config={"server": PATIENT, "backends": {"own": {"command": fake_cli(script)}}})
    eventually(lambda: server.call("GET", "/health").status == 200 and connections(server) == 0)
    least = next_descriptor(server)
    idle = [Wire(server, HEALTH) for _ in range(2)]
    for wire in idle:
        wire.until(b'"runs"')
    asked = json.dumps({"backend": "own", "prompt": "p"}).encode()
    running = [Wire(server, post(NATIVE, f"Content-Length: {len(asked)}", body=asked)) for _ in range(2)]
    eventually(lambda: len(list(tmp_path.glob("started-*"))) == 2)
    eventually(lambda: connections(server) == 4)

    allow(next_descriptor(server))
    third, fourth = Wire(server, HEALTH), Wire(server, HEALTH)
    for wire in (third, fourth):  # the idle ones make room
        wire.until(b'"runs"')
    watch(idle, LATE)

    allow(least)  # however many are closed, none is free
    last = Wire(server, HEALTH)
    watch([third, fourth], LATE)
    eventually(lambda: "nobody can be let in" in server.stderr)
    before = processor_time(server)
    time.sleep(2)
    assert processor_time(server) - before < 0.7 and last.heard == b""
    assert server.stderr.count("nobody can be let in") == 1
    allow(4096)
    last.until(b'"runs"')
    assert server.call("GET", "/health").json["runs"]["active"] == 2
    for wire in (last, *running):
        wire.socket.close()


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_the_limit_of_open_files_is_raised_as_far_as_it_may(
        serve: Serve, tmp_path: Path, descriptors: None, fake_cli: Callable[..., str]) -> None:
    config = {"backends": {"own": {"command": ["sh", "-c", "ulimit -n"]}}}
    for hard, least in ((False, 1000), (True, 100)):
        server = serve(config=config, python=at_most(100, tmp_path, hard=hard))
        reply = server.call("POST", NATIVE, {"backend": "own", "prompt": "p"})
        assert int(reply.json["output"]) >= least


# ---- Bodies that are cut up, or lie about their length

BIG = {"max_request_body_bytes": 1000}
HIS = {path: len(body) for path, body in BODIES.items()}
REFUSED: List[Tuple[str, Callable[[str], bytes], int, str]] = [
    ("both lengths", lambda path: post(path, CHUNKS, f"Content-Length: {HIS[path]}", body=chunked(BODIES[path])),
     400, "not both"),
    ("two lengths", lambda path: post(path, "Content-Length: 3", f"Content-Length: {HIS[path]}", body=BODIES[path]),
     400, "Content-Length"),
    *((f"a length of {length[:5]}", lambda path, length=length: post(path, f"Content-Length: {length}",  # type: ignore
                                                                   body=BODIES[path]), 400, "Content-Length")
      for length in ("-1", "+5", "5.0", "0x5", "five", "", "5 5", "1_0", "\u00b2")),
    ("a chunk size that is not hex", lambda path: post(path, CHUNKS, body=b"zz\r\n"), 400, "chunk size"),
    ("a chunk size with a prefix", lambda path: post(path, CHUNKS, body=b"0x2\r\n{}\r\n0\r\n\r\n"), 400, "chunk size"),
    ("a negative chunk size", lambda path: post(path, CHUNKS, body=b"-2\r\n{}\r\n0\r\n\r\n"), 400, "chunk size"),
    ("a chunk longer than it says", lambda path: post(path, CHUNKS, body=b"2\r\n{}{}\r\n0\r\n\r\n"), 400, "terminated"),
    ("another coding", lambda path: post(path, "Transfer-Encoding: gzip", body=b"{}"), 400, "chunked"),
    ("two codings", lambda path: post(path, "Transfer-Encoding: gzip, chunked", body=chunked(b"{}")), 400, "chunked"),
    ("chunks in HTTP/1.0", lambda path: head(f"POST {path} HTTP/1.0", CHUNKS, "Connection: keep-alive")
     + chunked(BODIES[path]), 400, "HTTP/1.1"),
    ("a length over the limit", lambda path: post(path, "Content-Length: 1001", "Connection: close", body=1001 * b" "),
     413, "1000 bytes"),
    ("a length far over the limit, asked about first", lambda path: post(path, "Content-Length: 100000",
                                                                         "Expect: 100-continue"), 413, "1000 bytes"),
    ("a length far over the limit", lambda path: post(path, "Content-Length: 20000000", body=20_000_000 * b" "),
     413, "1000 bytes"),
    ("chunks over the limit", lambda path: post(path, CHUNKS, "Connection: close", body=chunked(1001 * b" ", 100)),
     413, "1000 bytes"),
    ("chunks far over the limit", lambda path: post(path, CHUNKS, body=chunked(20_000_000 * b" ", 100_000)),
     413, "1000 bytes"),
    ("a huge head", lambda path: post(path, "X-A: " + 300_000 * "a"), 431, "262144 bytes")]


@pytest.mark.parametrize("request_of, status, told", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_body_that_can_not_be_told_from_what_follows_or_is_too_long_is_refused_readably(
        small: Served, request_of: Callable[[str], bytes], status: int, told: str) -> None:
    for path in BODIES:
        (reply,) = Wire(small, request_of(path)).answers()
        assert reply.status == status and told in message(reply, path)
    assert small.call("GET", "/health").status == 200 and "Traceback" not in small.stderr
    assert "uncaptured" not in small.stderr


@pytest.fixture(scope="module")
def small(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server for the whole table, that takes bodies of up to 1000 bytes."""
    with serving(pyz, tmp_path_factory.mktemp("small")) as start:
        server = start(config={"server": {**BIG, "read_timeout_secs": NEVER}})
        yield server
        assert server.stop() == 0


@each_api
def test_chunks_up_to_the_limit_are_taken(small: Served, path: str) -> None:
    for size in (7, 1000):
        (reply,) = Wire(small, post(path, CHUNKS, "Connection: close",
                                    body=chunked(BODIES[path].ljust(1000), size))).answers()
        assert answer_text(reply, path) == "hi"
    trailer = chunked(BODIES[path])[:-2] + b"X-A: b\r\n\r\n"
    wire = Wire(small, post(path, CHUNKS, body=b";x=1\r\n".join(trailer.split(b"\r\n", 1)))
                + head("GET /health HTTP/1.1", "Connection: close"))
    first, second = wire.answers()
    assert answer_text(first, path) == "hi" and second.json["version"]


@each_api
def test_what_follows_a_body_is_a_request_of_its_own_or_refused_and_never_of_the_body(small: Served, path: str) -> None:
    for rest, status in ((b"junk\r\n\r\n", 400), (BODIES[path] + b"\r\n\r\n", 400),
                         (head("GET /health HTTP/1.1", "Connection: close"), 200)):
        first, second = Wire(small, whole(path) + rest).answers()
        assert answer_text(first, path) == "hi" and second.status == status
    sent = post(path, f"Content-Length: {HIS[path]}", "Connection: close", body=BODIES[path] + b"junk")
    (only,) = Wire(small, sent).answers()
    assert answer_text(only, path) == "hi"


@each_api
def test_a_connection_that_is_half_closed_before_its_body_has_come_is_closed_at_once(small: Served, path: str) -> None:
    for sent in (post(path, "Content-Length: 999", body=BODIES[path]), post(path, CHUNKS, body=b"2\r\n{}\r\n")):
        wire = Wire(small, sent)
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.answers() == []


@pytest.mark.parametrize("sent, ok", [
    (post(OPENAI, "Content-Length: " + 5000 * "9"), {400, 413}), (head("GET http://[::1/health HTTP/1.1"), {400}),
    (head("GET /" + 300_000 * "a" + " HTTP/1.1"), {431}), (post(OPENAI, CHUNKS, body=300_000 * b"0"), {400}),
    (post(OPENAI, CHUNKS, body=b"0\r\nX-A: " + 300_000 * b"0"), {400})],
    ids=["a length of 5000 digits", "half an address", "a huge URL", "a huge chunk line", "a huge trailer"])
def test_what_waitress_would_fall_over_or_read_for_ever_is_refused(serve: Serve, sent: bytes, ok: Any) -> None:
    server = serve()
    (reply,) = Wire(server, sent).answers()
    assert reply.status in ok and reply.headers["connection"] == "close"
    (line,) = eventually(lambda: server.stderr.splitlines())
    path = line.split()[4]  # waitress has read one, or not, as the bytes came
    assert f" {reply.status} " in line and len(path) <= clinvk.LONGEST_LOGGED and len(line) - len(path) < 200


def test_a_client_that_asks_before_it_sends_is_told_to_go_on_only_if_there_is_a_body_to_come(small: Served) -> None:
    wire = Wire(small, post(OPENAI, f"Content-Length: {HIS[OPENAI]}", "Expect: 100-continue", "Connection: close"))
    wire.until(b"100 Continue\r\n\r\n")
    _, reply = wire.send(BODIES[OPENAI]).answers()
    assert answer_text(reply, OPENAI) == "hi"
    for headers in ([], ["Content-Length: 0"]):
        (reply,) = Wire(small, head("GET /health HTTP/1.1", "Expect: 100-continue", "Connection: close",
                                    *headers)).answers()
        assert reply.status == 200


def test_a_body_on_a_get_is_read_over(small: Served) -> None:
    for length, body in ((f"Content-Length: {HIS[NATIVE]}", BODIES[NATIVE]), (CHUNKS, chunked(BODIES[NATIVE]))):
        wire = Wire(small, head("GET /health HTTP/1.1", length) + body + head("GET /health HTTP/1.1",
                                                                              "Connection: close"))
        assert [reply.status for reply in wire.answers()] == [200, 200]
