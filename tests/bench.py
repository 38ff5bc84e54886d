"""What clinvk costs, in ratios of one run: `python tests/bench.py` (after a build; pytest does not run this).

Each pair of cases alternates, so that a busy machine slows both; medians. The scripted CLI speaks claude's protocol and
answers at once. The real CLIs are measured, too, if they are on PATH and logged in (each answer is a real request!) and
named: `python tests/bench.py claude codex gemini`.
"""

import contextlib
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
CLI = '''#!%s
import json, sys, time
def show(**line): print(json.dumps(line, separators=(",", ":")), flush=True)
def event(**event): show(type="stream_event", event=event)
for line in sys.stdin:
    message = json.loads(line)
    if message["type"] != "user":
        continue
    prompt = message["message"]["content"][0]["text"].split()
    show(type="system", subtype="init", model="scripted", session_id="s", cwd="/")
    event(type="message_start", message={"id": "m", "model": "scripted"})
    count, size, pause = (int(prompt[1]), int(prompt[2]), float(prompt[3])) if prompt[0] == "send" else (1, 0, 0)
    text = ""
    for number in range(count):
        piece = "%%d " %% time.monotonic_ns() + "x" * size
        text += piece
        event(type="content_block_delta", delta={"type": "text_delta", "text": piece})
        time.sleep(pause)
    show(type="assistant", message={"id": "m", "model": "scripted", "content": [{"type": "text", "text": text}]})
    show(type="result", subtype="success", is_error=False, result=text, stop_reason="end_turn", num_turns=1,
         usage={"input_tokens": 1, "output_tokens": 1}, modelUsage={"scripted": {}})
'''


@contextlib.contextmanager
def server(folder: Path, cli: str) -> Iterator[Tuple[subprocess.Popen[bytes], int]]:
    """clinvk.pyz, and its port. `cli` is what it runs for claude."""
    folder.mkdir(exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(json.dumps({"backends": {"claude": {"command": cli}} if cli else {}}))
    command = [sys.executable, str(REPO / "clinvk.pyz"), "serve", "--port", "0", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
                               env={**os.environ, "CLINVK_HOME": str(folder / "home")})
    assert process.stdout
    port = int(process.stdout.readline().rsplit(b":", 1)[1])
    try:
        yield process, port
    finally:
        process.terminate()
        process.wait()


def ask(port: int, backend: str, prompt: str, *, stream: bool) -> Iterator[bytes]:
    """The pieces of an answer, as they arrive."""
    body = {"model": backend, "messages": [{"role": "user", "content": prompt}], "stream": stream}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.request("POST", "/openai/v1/chat/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        yield from iter(lambda: answer.read1(65536), b"")


def by_hand(backend: str, program: str, prompt: str, folder: Path) -> float:
    """Seconds from the start of the CLI, in the form clinvk uses it, to the end of its answer."""
    import clinvk
    config = clinvk.load_config(None, {**os.environ, "CLINVK_HOME": str(folder / "home")}, {})
    speaker = clinvk.kind_of(backend)(backend, [program], config, "")
    asked = clinvk.PromptRequest(backend=backend, prompt=prompt, isolated=True)
    request = clinvk.settled(asked, config, str(folder))
    children = clinvk.Children(2**30)
    began = time.perf_counter()
    speaker.prepare(request, lambda *command: clinvk.output_of(children, clinvk.Stop(), *command))
    command = speaker.command(request)
    process = subprocess.Popen(command.argv, cwd=command.cwd, env=command.env, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    mouth = Plain(process)
    speaker.greet(mouth)
    speaker.ask(request, mouth)
    assert process.stdout
    done = False
    while not done:
        data = os.read(process.stdout.fileno(), 65536)
        assert data, f"{backend} ended without an answer"
        done = any(isinstance(event, clinvk.Done) for event in speaker.read(data, mouth))
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    speaker.clean_up()
    return seconds


class Plain:
    """The stdin of a CLI that is run by hand."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin
        self.stdin = process.stdin

    def say(self, message: Dict[str, Any]) -> None:
        self.stdin.write(json.dumps(message).encode() + b"\n")

    def say_bytes(self, data: bytes) -> None:
        self.stdin.write(data)

    def end_of_input(self) -> None:
        self.stdin.close()


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def overhead(backend: str, program: str, port: int, folder: Path, rounds: int) -> None:
    """The whole answer through clinvk against the bare CLI's own protocol."""
    times: Tuple[List[float], List[float]] = ([], [])
    for _ in range(rounds):
        times[0].append(by_hand(backend, program, "hello", folder))
        times[1].append(seconds_of(lambda: list(ask(port, backend, "hello", stream=False))))
    hand, ours = map(statistics.median, times)
    print(f"{backend:>8}: whole answer {1000 * ours:7.1f} ms through clinvk, {1000 * hand:7.1f} ms by hand: "
          f"ratio {ours / hand:.2f}")


def delays(port: int) -> None:
    """From a delta's print in the CLI to its arrival at the client; both clocks are the machine's monotonic one."""
    found = []
    for data in ask(port, "claude", "send 300 20 0.005", stream=True):
        now = time.monotonic_ns()
        for line in data.split(b"\n"):
            if b'"content":"' in line and line.startswith(b"data: {"):
                text = json.loads(line[6:])["choices"][0]["delta"]["content"]
                found += [(now - int(text.split()[0])) / 1e6] if text else []
    found.sort()
    late = found[int(len(found) * .95)]
    print(f"  deltas: passed on in {statistics.median(found):.2f} ms at the median, {late:.2f} ms at 95 % "
          f"({len(found)} deltas)")


def memory(process: subprocess.Popen[bytes], port: int) -> None:
    """What an answer of 10 MB adds to the server's peak memory, in times its size."""
    def peak() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    for stream in (False, True, True):
        before = peak()
        size = sum(map(len, ask(port, "claude", "send 20 524288 0", stream=stream)))
        print(f"  memory: a {'streamed' if stream else 'whole'} answer of {size / 1e6:.1f} MB adds "
              f"{(peak() - before) / size:.2f} times its size to the peak")


FEW, MANY = 1_000, 100_000


def filled_home(home: Path, count: int) -> List[str]:
    """A database of so many sessions, of four backends, a tenth of them failed; their ids."""
    import clinvk
    store = clinvk.Store(clinvk.load_config(None, {**os.environ, "CLINVK_HOME": str(home)}, {}))
    began = time.time() - count
    backends = ("claude", "codex", "gemini", "echo")
    sessions = [clinvk.Session(uuid.uuid4().hex, backends[n % 4], began + n, began + n, "/", "m", f"prompt {n}",
                               ["api"], {"n": str(n)}, f"prompt {n}\n" * 20, "", turn_count=1,
                               status="error" if n % 9 == 0 else "completed") for n in range(count)]
    with store.write() as db:
        for session in sessions:
            store.put(db, session)
    store.close(0)
    return [session.id for session in sessions]


def call(port: int, method: str, path: str, body: Any = None) -> Any:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return json.loads(answer.read())


def many_sessions(folder: Path) -> None:
    """What MANY stored sessions cost, against FEW."""
    homes = {count: folder / f"{count}" for count in (FEW, MANY)}
    ids = {count: filled_home(home / "home", count) for count, home in homes.items()}
    starts: Dict[int, List[float]] = {FEW: [], MANY: []}
    for _ in range(7):
        for count, home in homes.items():
            began = time.perf_counter()
            with server(home, ""):
                starts[count].append(time.perf_counter() - began)
    compared("start", starts)
    echo = {"backend": "echo", "prompt": "hello"}
    calls: Dict[str, Callable[[int, int], Any]] = {
        "list": lambda port, _: call(port, "GET", "/api/v1/sessions"),
        "list, filtered": lambda port, _: call(port, "GET", "/api/v1/sessions?backend=codex&status=completed"),
        "list, last page": lambda port, count: call(port, "GET", f"/api/v1/sessions?offset={count - 100}"),
        "get by prefix": lambda port, count: call(port, "GET", f"/api/v1/sessions/{ids[count][count // 2][:12]}"),
        "delete": lambda port, count: call(port, "DELETE", f"/api/v1/sessions/{ids[count].pop()}"),
        "a turn of echo": lambda port, _: call(port, "POST", "/api/v1/prompt", echo),
        "health": lambda port, _: call(port, "GET", "/health")}
    with server(homes[FEW], "") as (_, few), server(homes[MANY], "") as (_, many):
        for name, work in calls.items():
            times: Dict[int, List[float]] = {FEW: [], MANY: []}
            for _ in range(31):
                for count, port in ((FEW, few), (MANY, many)):
                    times[count].append(seconds_of(lambda: work(port, count)))  # noqa: B023
            compared(name, times)


def compared(name: str, times: Dict[int, List[float]]) -> None:
    few, many = (1000 * statistics.median(times[count]) for count in (FEW, MANY))
    print(f"{name:>16}: {many:7.1f} ms with {MANY:,} sessions, {few:7.1f} ms with {FEW:,}: ratio {many / few:.2f}")


def main() -> None:
    if not (REPO / "clinvk.pyz").exists():
        sys.exit("build it first: python3 build_zipapp.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scripted = folder / "scripted"
        scripted.write_text(CLI % sys.executable)
        scripted.chmod(0o755)
        with server(folder, str(scripted)) as (process, port):
            list(ask(port, "claude", "hello", stream=True))
            if sys.platform == "linux":
                memory(process, port)
            delays(port)
            overhead("claude", str(scripted), port, folder, 21)
        real = [backend for backend in sys.argv[1:] if shutil.which(backend)]
        many_sessions(folder)
        with server(folder, "") as (_, port):
            for backend in real:
                print(f"the real {backend}:")
                overhead(backend, str(shutil.which(backend)), port, folder, 5)


if __name__ == "__main__":
    main()
