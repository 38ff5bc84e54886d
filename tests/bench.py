"""What clinvk costs, in ratios of medians: `python tests/bench.py [SECTION ...]`, after a build. Not run by pytest.

It needs requirements.txt and requirements-bench.txt. The cases of a section alternate in one run, so that a busy
machine slows all of them: the ratios hold, the times are this machine's.

first-text asks the real CLIs, at the pinned versions from npm, which a stub of their providers answers (labkit.py).
`--mine claude codex` takes those on PATH instead, as you are logged in to them: each answer is then a real request, 14
of each CLI in a round. By hand is what a script would do, with one cold process for each prompt: see HANDS. The other
sections run scripted CLIs, which answer at once.
"""

import argparse
import concurrent.futures
import contextlib
import functools
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
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import psutil

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
Json = Dict[str, Any]


# ---- Numbers

class Timed(NamedTuple):
    """Seconds from the start, or from the request."""
    first: float  # to the first text
    end: float  # to the end of the answer


class Row(NamedTuple):
    """A number of clinvk's beside the one that it is held against."""
    section: str
    case: str
    ours: float
    against: str
    theirs: float
    unit: str = "ms"
    goal: Optional[float] = None  # what the ratio is to be at most

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs if self.theirs else float("nan")

    @property
    def is_missed(self) -> bool:
        return self.goal is not None and self.ratio > self.goal

    def __str__(self) -> str:
        goal = "" if self.goal is None else f"<= {self.goal:g}" + (" MISSED" if self.is_missed else "")
        return (f"{self.case:<50} {self.ours:>9,.1f} {self.unit:<3} {self.theirs:>9,.1f} {self.unit:<3} "
                f"{self.against:<22} {self.ratio:>7.3f}  {goal}").rstrip()


Rows = Iterator[Row]


def taken_in_turn(rounds: int, cases: Mapping[str, Callable[[], Timed]]) -> Dict[str, Timed]:
    """The medians of each case."""
    times: Dict[str, List[Timed]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(case())
    return {name: Timed(*map(statistics.median, zip(*found))) for name, found in times.items()}


def timed(work: Callable[[], Any]) -> Timed:
    began = time.perf_counter()
    work()
    return Timed(time.perf_counter() - began, time.perf_counter() - began)


def ms(seconds: float) -> float:
    return 1000 * seconds


# ---- clinvk

class Reply(NamedTuple):
    times: Timed
    text: str
    start: str  # how its CLI came to be there: cold, spare, live


class Clinvk:
    """clinvk.pyz with a folder of its own, and a connection to it that stays open, as an SDK's does."""
    QUIET_SECS = 0.5  # without CPU time of its CLIs

    def __init__(self, folder: Path, config: Json, environ: Optional[Dict[str, str]] = None, *,
                 start: str = "") -> None:
        """`start` is the one way in which its CLIs are to come to be there; "": it does not matter."""
        self.start = start
        server = {"spares": int(start == "spare"), "live_conversations": int(start == "live")} if start else {}
        (folder / "home").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(json.dumps({**config, "server": {**server, **config.get("server", {})}}))
        command = [sys.executable, str(REPO / "clinvk.pyz"), "serve", "--port", "0", "--config",
                   str(folder / "config.yaml")]
        around = {**(os.environ if environ is None else environ), "CLINVK_HOME": str(folder / "home")}
        self.process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env=around)
        self.port = int(self.process.stdout.readline().rsplit(b":", 1)[1])
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def __enter__(self) -> "Clinvk":
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.close()
        self.stop()
        self.process.stdout.close()

    def stop(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has been stopped
            self.process.terminate()
        self.process.wait()

    def call(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        try:
            self.connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            answer = self.connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError):  # it was idle for too long
            self.connection.close()
            return self.call(method, path, body)
        assert answer.status == 200, answer.read()
        return answer

    def ask(self, model: str, messages: Sequence[Json], *, stream: bool) -> Reply:
        """One answer of the OpenAI API."""
        began, lines, first = time.perf_counter(), [], 0.0
        body = {"model": model, "messages": messages, "stream": stream}
        answer = self.call("POST", "/openai/v1/chat/completions", body)
        for line in answer:
            lines.append(line)
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - began
        times = Timed(first, time.perf_counter() - began)
        answer.close()
        assert first, lines
        return Reply(times, text_of(lines, stream=stream), answer.getheader("X-Clinvk-Start", ""))

    def used(self) -> Dict[int, float]:
        """The CPU time of each of its CLIs' processes."""
        found = {}
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                spent = process.cpu_times()
                if "clinvk-heir" not in process.cmdline():  # the shell that outlives the server is no CLI
                    found[process.pid] = spent.user + spent.system
        return found


def text_of(lines: Sequence[bytes], *, stream: bool) -> str:
    if not stream:
        return str(json.loads(b"".join(lines))["choices"][0]["message"]["content"])
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def user(prompt: str) -> List[Json]:
    return [{"role": "user", "content": prompt}]


def wait_until_quiet(servers: Iterable[Clinvk]) -> None:
    """Until those whose CLIs are to wait have one, the others none, and all of them have gone quiet."""
    seen: Dict[Clinvk, Dict[int, float]] = {}
    since, late = time.monotonic(), time.monotonic() + 60
    while time.monotonic() - since < Clinvk.QUIET_SECS:
        used = {server: server.used() for server in servers}
        if used != seen or any(bool(used[server]) == (server.start == "cold") for server in servers if server.start):
            since, seen = time.monotonic(), used
        if time.monotonic() > late:
            print(f"the CLIs do not go quiet: {list(used.values())}", file=sys.stderr)
            return
        time.sleep(0.05)


# ---- CLIs by hand

class Hand(NamedTuple):
    """How a script asks a CLI, and what in its output means the first text, and the end."""
    flags: str
    text: bytes
    end: bytes
    model: str = ""  # what clinvk is asked for, to have the same one


HANDS = {
    "claude": Hand("-p --output-format stream-json --verbose --include-partial-messages", b'"text_delta"',
                   b'{"type":"result"'),
    "codex": Hand("exec --json --skip-git-repo-check -", b'"agent_message"', b'{"type":"turn.completed"'),
    "gemini": Hand("-o stream-json --skip-trust -m gemini-2.5-flash", b'"role":"assistant"', b'{"type":"result"',
                   "gemini/gemini-2.5-flash")}


def by_hand(name: str, program: str, prompt: str, folder: Path, environ: Dict[str, str]) -> Timed:
    """One prompt from the start of its process to the line that says the answer is complete. That it ends is
    waited for, and not counted."""
    hand, first, end = HANDS[name], 0.0, 0.0
    began = time.perf_counter()
    process = subprocess.Popen([program, *hand.flags.split()], env=environ, cwd=folder, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        assert process.stdin and process.stdout
        process.stdin.write(prompt.encode())
        process.stdin.close()
        for line in process.stdout:
            first = first or (time.perf_counter() - began if hand.text in line else 0.0)
            end = end or (time.perf_counter() - began if line.startswith(hand.end) else 0.0)
    assert first and end, f"{name} ended with {process.returncode} and without an answer"
    return Timed(first, end)


def one_process(program: str, prompt: str) -> Timed:
    """The scripted CLI by hand: started, asked, read and reaped."""
    line = json.dumps({"type": "user", "message": {"role": "user", "content": [{"type": "text", "text": prompt}]}})
    return timed(lambda: subprocess.run([program], input=line.encode() + b"\n", stdout=subprocess.PIPE, check=True))


# ---- The first text

STARTS = ("cold", "spare", "live")
PROMPTS = {"at once": "Say hello.", "streamed over 1 s": "Say hello. !slow 10"}  # the second is the stub's to obey
MY_PROMPTS = {"at once": "Say hello.", "long": "Count from one to fifty, in words."}
GOALS = {  # of the first text, by when it comes
    "claude": {"cold": (1.05, 1.05), "spare": (0.15, 0.15), "live": (0.06, 0.06)},
    "codex": {"cold": (0.9, 0.5), "spare": (0.30, 0.045), "live": (0.2, 0.2)},
    "gemini": {"cold": (0.7, 0.7), "spare": (0.08, 0.08), "live": (0.05, 0.05)}}


class Bench(NamedTuple):
    """What a section is given."""
    folder: Path  # an empty one, for it alone
    rounds: int
    mine: List[str]  # CLIs of the user's own


def first_text(bench: Bench) -> Rows:
    """The real CLIs."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("CLINVK_")}
    if bench.mine:
        for name in bench.mine:
            yield from first_text_of(name, bench, own, MY_PROMPTS)
    elif not shutil.which("npm"):
        print("first-text needs npm, or --mine", file=sys.stderr)
    else:
        import labkit
        lab = labkit.Lab(bench.folder)
        try:
            home = labkit.make_home(bench.folder / "home", lab.url)
            around = labkit.environment(home, lab.url, str(labkit.installed()))
            for name in HANDS:
                environ = {key: value for key, value in around.items() if not key.startswith("CLINVK_")}
                yield from first_text_of(name, bench, environ, PROMPTS)
        finally:
            lab.process.kill()
            lab.process.wait()


def first_text_of(name: str, bench: Bench, environ: Dict[str, str], prompts: Dict[str, str]) -> Rows:
    program = shutil.which(name, path=environ["PATH"])
    assert program, f"there is no {name} on PATH"
    config: Json = {"backends": {other: {"enabled": False} for other in HANDS if other != name}}
    empty = bench.folder / name / "empty"
    empty.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Clinvk(bench.folder / name / start, config, environ, start=start))
                   for start in STARTS]
        talks = {server: Talk(server, HANDS[name].model or name, servers) for server in servers}
        for talk in talks.values():
            talk.warm_up()
        for number, (kind, prompt) in enumerate(prompts.items()):
            def hand(prompt: str = prompt) -> Timed:
                wait_until_quiet(servers)
                return by_hand(name, program, prompt, empty, environ)
            cases: Dict[str, Callable[[], Timed]] = {"by hand": hand}
            for server, talk in talks.items():
                for stream in (True, False):
                    cases[f"{server.start} {stream}"] = functools.partial(talk.times, prompt, stream=stream)
            yield from first_text_rows(f"{name}, {kind}", taken_in_turn(bench.rounds, cases),
                                       {start: GOALS[name][start][number] for start in STARTS})


def first_text_rows(case: str, found: Dict[str, Timed], goals: Dict[str, float]) -> Rows:
    hand = found["by hand"]
    for start in STARTS:
        streamed, whole = found[f"{start} True"], found[f"{start} False"]
        yield Row("first-text", f"{case}, {start}: first text", ms(streamed.first), "by hand", ms(hand.first),
                  goal=goals[start])
        yield Row("first-text", f"{case}, {start}: end", ms(streamed.end), "by hand", ms(hand.end))
        yield Row("first-text", f"{case}, {start}: end, not streamed", ms(whole.end), "by hand", ms(hand.end))


class Talk:
    """Answers of one server that all begin in its one way; where that is live, each is a turn of one conversation."""

    def __init__(self, server: Clinvk, model: str, servers: Sequence[Clinvk]) -> None:
        self.server, self.model, self.servers = server, model, servers
        self.messages: List[Json] = []

    def warm_up(self) -> None:
        """What the first request finds out for those that follow, and the first spare and the first turn."""
        self.turn("Say hello.", stream=True)

    def turn(self, prompt: str, *, stream: bool) -> Reply:
        asked = [*self.messages, *user(prompt)]
        reply = self.server.ask(self.model, asked, stream=stream)
        if self.server.start == "live":
            self.messages = [*asked, {"role": "assistant", "content": reply.text}]
        return reply

    def times(self, prompt: str, *, stream: bool) -> Timed:
        for _ in range(5):
            wait_until_quiet(self.servers)
            reply = self.turn(prompt, stream=stream)
            if reply.start == self.server.start:
                return reply.times
            print(f"{self.model} has answered {reply.start}, not {self.server.start}: once more", file=sys.stderr)
        raise RuntimeError(f"{self.model} does not answer {self.server.start}")


# ---- Scripted CLIs

SCRIPTED = '''#!%s
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
INSTANT = """#!/bin/sh
while read -r line; do
    case $line in *'"role"'*) printf '%s\\n' \
'{"type":"system","subtype":"init","model":"instant","session_id":"s","cwd":"/"}' \
'{"type":"stream_event","event":{"type":"message_start","message":{"id":"m","model":"instant"}}}' \
'{"type":"stream_event","event":{"type":"content_block_delta","delta":{"type":"text_delta","text":"hello"}}}' \
'{"type":"assistant","message":{"id":"m","model":"instant","content":[{"type":"text","text":"hello"}]}}' \
'{"type":"result","subtype":"success","is_error":false,"result":"hello","stop_reason":"end_turn","num_turns":1,\
"usage":{"input_tokens":1,"output_tokens":1},"modelUsage":{"instant":{}}}'
    esac
done
"""


def program(folder: Path, text: str) -> str:
    """An executable with that text: a CLI that speaks claude's protocol."""
    file = folder / f"cli-{uuid.uuid4().hex}"
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


def scripted(folder: Path) -> str:
    """Answers with as much as it is asked for: `send COUNT SIZE PAUSE`; each piece begins with when it was printed."""
    return program(folder, SCRIPTED % sys.executable)


def instant(folder: Path) -> str:
    """Answers at once, and starts as fast as a program does."""
    return program(folder, INSTANT)


def runs(cli: str, **server: Any) -> Json:
    """The config of a server whose claude is `cli`."""
    others = {name: {"enabled": False} for name in HANDS if name != "claude"}
    return {"backends": {"claude": {"command": cli}, **others}, "server": server}


def overhead(bench: Bench) -> Rows:
    """The whole answer of CLIs that answer at once, against the same CLI started, asked, read and reaped."""
    for name, cli in (("instant CLI", instant(bench.folder)), ("scripted CLI", scripted(bench.folder))):
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(Clinvk(bench.folder / name / start, runs(cli), start=start))
                       for start in STARTS]
            talks = [Talk(server, "claude", servers) for server in servers]
            for talk in talks:
                talk.warm_up()

            def hand(cli: str = cli, servers: List[Clinvk] = servers) -> Timed:
                wait_until_quiet(servers)
                return one_process(cli, "hello")
            cases: Dict[str, Callable[[], Timed]] = {"by hand": hand}
            cases["no CLI (echo)"] = functools.partial(echo_times, servers)
            for talk in talks:
                cases[talk.server.start] = functools.partial(talk.times, "hello", stream=False)
            found = taken_in_turn(4 * bench.rounds, cases)
        for start in (*STARTS, "no CLI (echo)"):
            yield Row("overhead", f"{name}, {start}: whole answer", ms(found[start].end), "by hand",
                      ms(found["by hand"].end), goal=1.0 if start == "spare" else None)


def echo_times(servers: List[Clinvk]) -> Timed:
    """The part that is HTTP's and clinvk's own."""
    wait_until_quiet(servers)
    return servers[0].ask("echo", user("hello"), stream=False).times


@contextlib.contextmanager
def stream_of(server: Clinvk, prompt: str) -> Iterator[http.client.HTTPResponse]:
    """A streamed answer, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    with contextlib.closing(connection):
        connection.request("POST", "/openai/v1/chat/completions",
                           json.dumps({"model": "claude", "messages": user(prompt), "stream": True}),
                           {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            yield answer


def streamed_late(server: Clinvk, prompt: str) -> List[float]:
    """How late each delta comes, in ms: both clocks are the machine's monotonic one."""
    late: List[float] = []
    with stream_of(server, prompt) as answer:
        for line in answer:
            now = time.monotonic_ns()
            if b'"content":"' in line and b'"content":""' not in line:
                text = json.loads(line[6:])["choices"][0]["delta"]["content"]
                late.append((now - int(text.split()[0])) / 1e6)
    assert late, "no delta came"
    return late


def by_hand_late(cli: str, prompt: str) -> List[float]:
    """The same, read from the CLI itself."""
    late: List[float] = []
    with subprocess.Popen([cli], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        line = {"type": "user", "message": {"role": "user", "content": [{"type": "text", "text": prompt}]}}
        process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.close()
        for said in process.stdout:
            now = time.monotonic_ns()
            if b'"text_delta"' in said:
                late.append((now - int(json.loads(said)["event"]["delta"]["text"].split()[0])) / 1e6)
    return late


def late_rows(section: str, ours: List[float], theirs: List[float]) -> Rows:
    for name, at in (("median", 0.5), ("95 %", 0.95)):
        both = [sorted(found)[int(len(found) * at)] for found in (ours, theirs)]
        yield Row(section, f"a delta's delay, {name}", both[0], "by hand", both[1])


def deltas(bench: Bench) -> Rows:
    """From a delta's print in the CLI to its arrival at the client."""
    cli, ours, theirs = scripted(bench.folder), [], []
    with Clinvk(bench.folder, runs(cli), start="cold") as server:
        for _ in range(bench.rounds):
            ours += streamed_late(server, "send 100 20 0.005")
            theirs += by_hand_late(cli, "send 100 20 0.005")
    yield from late_rows("deltas", ours, theirs)


def at_once(count: int, work: Callable[[], Any]) -> List[Any]:
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(work) for _ in range(count)]]


def clients(bench: Bench) -> Rows:
    """So many requests at once, until the last has its answer, against as many CLIs started at once."""
    cli = scripted(bench.folder)
    with Clinvk(bench.folder, runs(cli)) as server:
        for count in (8, 32):
            found = taken_in_turn(bench.rounds, {
                "by hand": lambda: timed(lambda: at_once(count, lambda: one_process(cli, "hello"))),  # noqa: B023
                "ours": lambda: timed(lambda: at_once(count, lambda: streamed_late(server, "hello")))})  # noqa: B023
            yield Row("clients", f"{count} clients at once, all answers", ms(found["ours"].end), f"{count} by hand",
                      ms(found["by hand"].end))


def streams(bench: Bench) -> Rows:
    """50 answers of 2 s at once, each in 20 deltas."""
    cli, prompt, ours, theirs = scripted(bench.folder), "send 20 20 0.1", [], []
    with Clinvk(bench.folder, runs(cli, max_concurrent_runs=50)) as server:
        found = taken_in_turn(2, {
            "by hand": lambda: timed(lambda: theirs.extend(at_once(50, lambda: by_hand_late(cli, prompt)))),
            "ours": lambda: timed(lambda: ours.extend(at_once(50, lambda: streamed_late(server, prompt))))})
    yield Row("streams", "50 slow streams, all answers", ms(found["ours"].end), "50 by hand", ms(found["by hand"].end))
    yield from late_rows("streams", flat(ours), flat(theirs))


def flat(lists: Iterable[List[float]]) -> List[float]:
    return [value for one in lists for value in one]


def busy(bench: Bench) -> Rows:
    """What a server says of itself, and how long its end takes, in the middle of 50 answers against idle."""
    config = runs(scripted(bench.folder), max_concurrent_runs=50)

    def answering(server: Clinvk, stack: contextlib.ExitStack) -> None:
        for _ in range(50):
            stack.enter_context(stream_of(server, "send 1000000 20 0.1")).readline()

    def ended(*, answers: bool) -> Timed:
        with Clinvk(bench.folder / "ended", config) as server, contextlib.ExitStack() as stack:
            if answers:
                answering(server, stack)
            return timed(server.stop)
    with Clinvk(bench.folder / "idle", config) as idle, Clinvk(bench.folder / "busy", config) as server, \
            contextlib.ExitStack() as stack:
        answering(server, stack)
        health = taken_in_turn(6 * bench.rounds, {
            "busy": lambda: timed(lambda: server.call("GET", "/health").read()),
            "idle": lambda: timed(lambda: idle.call("GET", "/health").read())})
    end = taken_in_turn(bench.rounds, {"busy": functools.partial(ended, answers=True),
                                       "idle": functools.partial(ended, answers=False)})
    for name, found in (("/health", health), ("from SIGTERM to the end", end)):
        yield Row("busy", f"{name}, 50 answers going on", ms(found["busy"].end), "none", ms(found["idle"].end))


def big(bench: Bench) -> Rows:
    """An answer of 10 MB."""
    cli, prompt, mega = scripted(bench.folder), "send 20 524288 0", 2**20
    with Clinvk(bench.folder, runs(cli), start="cold") as server:
        for name, stream in (("streamed", True), ("whole", False)):
            before, peak, size = server.process.memory_info().rss, 0, 0
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                asked = pool.submit(server.ask, "claude", user(prompt), stream=stream)
                while not asked.done():
                    peak = max(peak, server.process.memory_info().rss)
                    time.sleep(0.002)
                size = len(asked.result().text)
            yield Row("big", f"an answer of 10 MB, {name}: added memory", max(0, peak - before) / mega, "its size",
                      size / mega, "MB")
        found = taken_in_turn(bench.rounds, {
            "by hand": lambda: one_process(cli, prompt),
            "streamed": lambda: server.ask("claude", user(prompt), stream=True).times,
            "whole": lambda: server.ask("claude", user(prompt), stream=False).times})
    for name in ("streamed", "whole"):
        yield Row("big", f"an answer of 10 MB, {name}: time", ms(found[name].end), "by hand", ms(found["by hand"].end))


def start_up(bench: Bench) -> Rows:
    """To the line that says the server listens, against an empty Python."""
    def started() -> Timed:
        began = time.perf_counter()
        with Clinvk(bench.folder / "server", {}):
            return Timed(0, time.perf_counter() - began)
    found = taken_in_turn(3 * bench.rounds, {
        "ours": started, "by hand": lambda: timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))})
    yield Row("start-up", "the server listens", ms(found["ours"].end), "python -c pass", ms(found["by hand"].end))


def growth(bench: Bench) -> Rows:
    """What the server holds after 1,000 requests, against after 100."""
    held = []
    with Clinvk(bench.folder, runs(instant(bench.folder))) as server:
        for count in (100, 900):
            for number in range(count):
                server.ask("claude", user(f"hello {number}"), stream=bool(number % 2))
            wait_until_quiet([server])
            process = server.process
            held.append({"memory": (process.memory_info().rss / 2**20, "MB"), "threads": (process.num_threads(), ""),
                         "descriptors": (process.num_fds(), ""),
                         "processes": (1 + len(process.children(recursive=True)), "")})
    for name, (few, unit) in held[0].items():
        yield Row("growth", f"{name} after 1,000 requests", held[1][name][0], "after 100", few, unit,
                  goal=1.1 if name == "memory" else 1.0)


# ---- Stored sessions

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


ECHO = {"backend": "echo", "prompt": "hello"}
CALLS: Dict[str, Callable[[Clinvk, List[str]], http.client.HTTPResponse]] = {
    "list": lambda server, _: server.call("GET", "/api/v1/sessions"),
    "list, filtered": lambda server, _: server.call("GET", "/api/v1/sessions?backend=codex&status=completed"),
    "list, last page": lambda server, ids: server.call("GET", f"/api/v1/sessions?offset={len(ids) - 100}"),
    "get by prefix": lambda server, ids: server.call("GET", f"/api/v1/sessions/{ids[len(ids) // 2][:12]}"),
    "delete": lambda server, ids: server.call("DELETE", f"/api/v1/sessions/{ids.pop()}"),
    "a turn of echo": lambda server, _: server.call("POST", "/api/v1/prompt", ECHO),
    "health": lambda server, _: server.call("GET", "/health")}


def sessions(bench: Bench) -> Rows:
    """What MANY stored sessions cost, against FEW."""
    homes = {count: bench.folder / f"{count}" for count in (FEW, MANY)}
    ids = {count: filled_home(home / "home", count) for count, home in homes.items()}

    def started(count: int) -> Timed:
        began = time.perf_counter()
        with Clinvk(homes[count], {}):
            return Timed(0, time.perf_counter() - began)
    yield session_row("start", {count: functools.partial(started, count) for count in homes}, 2 * bench.rounds)
    with Clinvk(homes[FEW], {}) as few, Clinvk(homes[MANY], {}) as many:
        for name, work in CALLS.items():
            cases = {count: functools.partial(timed, functools.partial(read, work, server, ids[count]))
                     for count, server in ((FEW, few), (MANY, many))}
            yield session_row(name, cases, 6 * bench.rounds)


def read(work: Callable[[Clinvk, List[str]], http.client.HTTPResponse], server: Clinvk, ids: List[str]) -> None:
    work(server, ids).read()


def session_row(name: str, cases: Mapping[int, Callable[[], Timed]], rounds: int) -> Row:
    found = taken_in_turn(rounds, {str(count): case for count, case in cases.items()})
    return Row("sessions", f"{name}, {MANY:,} sessions", ms(found[str(MANY)].end), f"{FEW:,} sessions",
               ms(found[str(FEW)].end))


# ---- The picture

INK, BLUE = "#7d8590", "#3b82c4"  # both can be read on white and on black


def plot(rows: Sequence[Row], file: str) -> None:
    """The first text of each CLI by hand, and in the three ways; what has not been measured is left out."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 9, "text.color": INK, "ytick.color": INK, "svg.hashsalt": "clinvk",
                             "svg.fonttype": "none", "axes.titlecolor": INK})
    found = {row.case: row for row in rows if row.section == "first-text"}
    names = [name for name in HANDS if f"{name}, at once, cold: first text" in found]
    figure, axes = pyplot.subplots(len(names), 1, figsize=(7.2, 1.45 * len(names)), squeeze=False)
    for name, (place,) in zip(names, axes):
        plot_one(place, name, [found[f"{name}, at once, {start}: first text"] for start in STARTS])
    figure.suptitle("Time to the first text, by hand = 1", fontsize=10, x=0.02, ha="left", color=INK)
    figure.tight_layout()
    figure.savefig(file, transparent=True, metadata={"Date": None} if file.endswith(".svg") else None)


def plot_one(axes: Any, name: str, rows: Sequence[Row]) -> None:
    bars = [("by hand", 1.0, rows[0].theirs),
            *((f"clinvk, {label}", row.ratio, row.ours) for label, row in zip(("cold", "spare", "next turn"), rows))]
    drawn = axes.barh([bar[0] for bar in bars], [bar[1] for bar in bars], color=[INK, BLUE, BLUE, BLUE], height=0.62)
    axes.bar_label(drawn, [f"{ratio:.2f}   ({took:,.0f} ms)" for _, ratio, took in bars], padding=4, color=INK)
    axes.set_title(name, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_xlim(0, 1.3 * max(bar[1] for bar in bars))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(INK)


# ---- The command

SECTIONS: Dict[str, Callable[[Bench], Rows]] = {
    "first-text": first_text, "overhead": overhead, "deltas": deltas, "clients": clients, "streams": streams,
    "busy": busy, "big": big, "start-up": start_up, "growth": growth, "sessions": sessions}


def measured(names: Sequence[str], rounds: int, mine: List[str]) -> Iterator[Row]:
    for name in names:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for row in SECTIONS[name](Bench(Path(folder), rounds, mine)):
                print(row, file=sys.stderr, flush=True)
                yield row


def show(rows: Sequence[Row]) -> None:
    print(f"{'':<50} {'clinvk':>13} {'against':>13} {'':<22} {'ratio':>7}  goal")
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            print(f"{section}:")
        print(row)
    missed = sum(row.is_missed for row in rows)
    print(f"{missed} of {sum(row.goal is not None for row in rows)} goals are missed.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"default: all of {', '.join(SECTIONS)}")
    parser.add_argument("--mine", nargs="+", choices=sorted(HANDS), default=[], metavar="CLI",
                        help="ask these CLIs of yours (real requests)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each case is measured (default: 5; some more)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", metavar="FILE", help="draw the first text (SVG or PNG)")
    options = parser.parse_args()
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    if not (REPO / "clinvk.pyz").exists():
        sys.exit("build it first: python3 build_zipapp.py")
    rows = list(measured(options.sections or list(SECTIONS), options.rounds, options.mine))
    show(rows)
    if options.json:
        Path(options.json).write_text(json.dumps([{**row._asdict(), "ratio": row.ratio} for row in rows], indent=1))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
