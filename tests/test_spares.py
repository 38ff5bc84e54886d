"""CLIs that wait, for their first request or for the next turn of a conversation: the real server as a process, and
scripted CLIs that note in a file when they were started, with what, and what they were told."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import clinvk
import pytest
from conftest import Client, Reply, Served, alive, children_of, eventually

OPENAI, ANTHROPIC, NATIVE = "/openai/v1/chat/completions", "/anthropic/v1/messages", "/api/v1/prompt"
WAYS = [(OPENAI, False), (OPENAI, True), (ANTHROPIC, False), (ANTHROPIC, True)]  # path, stream
SOON = 60.0  # seconds for what takes at most three, on a busy machine
A_WHILE = 0.7  # seconds in which a spare would be there, if one were started
PATIENT = 60.0  # seconds that clinvk has for what it gives two to five

# What both scripted CLIs do: a note is {"did": "start", "pid": ...} and the like.
NOTING = """
HERE, ME = %r, str(os.getpid())
if "--version" in sys.argv:
    sys.exit("1.2.3")
NOTES = os.open(HERE + "/notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(did, **more):
    os.write(NOTES, json.dumps({"did": did, "pid": os.getpid(), **more}).encode() + b"\\n")
def noted(name): return os.path.exists(HERE + "/" + name)
def show(**line): print(json.dumps(line, separators=(",", ":")), flush=True)
if noted("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("start", argv=sys.argv[1:])
"""
# claude. The last line of a prompt may have words that say what to do; the file fault-PID says what that process does
# when it is asked. It answers "answer TURN of PID".
CLAUDE = NOTING + """
def option(flag): return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else None
def event(**event): show(type="stream_event", event=event)
LIMIT = "CLAUDE_CODE_MAX_OUTPUT_TOKENS"
told = {"model": option("--model"), "max_tokens": os.environ.get(LIMIT), "system": None, "effort": None}
def settle(request):
    for agent in request.get("agents", {}).values():
        told["model"] = agent["model"]
    told["system"] = request.get("systemPrompt", told["system"])
    settings = request.get("settings", {})
    told["max_tokens"] = settings.get("env", {}).get(LIMIT, told["max_tokens"])
    told["effort"] = settings.get("effortLevel", told["effort"])
def use_tool(leaves_one_running):
    block = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {}}
    show(type="assistant", message={"id": "tool", "model": "m", "content": [block]})
    if leaves_one_running:
        note("daemon", child=subprocess.Popen(["sleep", "600"], start_new_session=True, stdin=subprocess.DEVNULL,
                                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)
def answer(turn, does):
    global ballast
    show(type="system", subtype="init", model="m", session_id=session, cwd=os.getcwd())
    if "break" in does or noted("fault-" + ME) and open(HERE + "/fault-" + ME).read() == "breaks":
        sys.exit(1)
    if "tool" in does or "daemon" in does:
        time.sleep(0.5)  # a provider takes longer until it asks for a tool
        use_tool("daemon" in does)
    text = f"answer {turn} of {ME}"
    event(type="message_start", message={"id": f"m{turn}", "model": "m"})
    event(type="content_block_delta", delta={"type": "text_delta", "text": text})
    while "hold" in does and not noted("go"):
        time.sleep(0.01)
    if "grow" in does:
        ballast = b"x" * (800 * 2**20)
    reason = "max_tokens" if "cut" in does else "end_turn"
    show(type="assistant", message={"id": f"m{turn}", "model": "m", "content": [{"type": "text", "text": text}]})
    event(type="message_delta", delta={"stop_reason": reason})
    show(type="result", subtype="success", is_error="fail" in does, result=text, stop_reason=reason, num_turns=turn,
         usage={"input_tokens": 200_000 if "much" in does else 1, "output_tokens": 1}, modelUsage={"m": {}})
    if "mumble" in does:
        time.sleep(0.3)
        event(type="content_block_delta", delta={"type": "text_delta", "text": "and by the way"})
session = option("--session-id") or option("--resume") or "s"
turn = 0
for line in sys.stdin:
    message = json.loads(line)
    if message["type"] == "control_request":
        settle(message["request"])
        show(type="control_response", response={"subtype": "success", "request_id": message["request_id"]})
        if message["request"] == {"subtype": "apply_flag_settings", "settings": {}}:
            note("ready")
        continue
    prompt = message["message"]["content"][0]["text"]
    if noted("fault-" + ME):
        fault = open(HERE + "/fault-" + ME).read()
        if fault == "dies":
            sys.exit(1)
        while fault == "says nothing":
            time.sleep(600)
        if fault == "wakes up late":  # when it is told to end: it is given up after three seconds
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.pause()
    turn += 1
    note("asked", prompt=prompt, turn=turn, **told)
    answer(turn, prompt.splitlines()[-1].split())
if noted("slow"):
    time.sleep(0.5)  # it stores the conversation
note("end")
while noted("stubborn"):
    time.sleep(600)
"""
CODEX = NOTING + """
def asked(method, params):
    if method == "turn/start":
        note("asked", prompt=params["input"][0]["text"], turn=1)
        return {"turn": {"id": "u"}}
    return {"thread": {"id": "t"}, "model": "m", "cwd": "/"} if method == "thread/start" else {}
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    show(id=message["id"], result=asked(message["method"], message.get("params")))
    if message["method"] == "initialize":
        note("ready")
    if message["method"] == "turn/start":
        item = {"type": "agentMessage", "id": "i", "text": f"answer 1 of {ME}"}
        show(method="item/completed", params={"threadId": "t", "turnId": "u", "item": item})
        show(method="turn/completed", params={"threadId": "t", "turn": {"id": "u", "status": "completed"}})
"""
AnyServer = Union[Client, Served]
Json = Dict[str, Any]


class Answer(NamedTuple):
    """What a scripted CLI has answered, and how it came to be there."""
    start: str
    text: str
    reply: Reply

    @property
    def turn(self) -> int:
        return int(self.text.split()[1])

    @property
    def pid(self) -> int:
        return int(self.text.split()[3])


def text_of(path: str, reply: Reply) -> str:
    """The text of an answer, whole or streamed."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        if path == OPENAI:
            deltas = [chunk["choices"][0]["delta"] for chunk in reply.data if chunk != "[DONE]" and chunk["choices"]]
            return "".join(delta.get("content") or "" for delta in deltas)
        return "".join(event["delta"].get("text", "") for event in reply.data if event["type"] == "content_block_delta")
    if path == NATIVE:
        return str(reply.json["output"])
    return str(reply.json["choices"][0]["message"]["content"] if path == OPENAI else reply.json["content"][0]["text"])


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Json:
    return {"role": "assistant", "content": content}


class Stage:
    """A server whose claude and codex are scripted CLIs, and what those have noted."""

    def __init__(self, folder: Path, serve: Callable[..., Served], make_client: Callable[..., Client],
                 fake_cli: Callable[..., str]) -> None:
        self.folder, self.serve, self.make_client = folder, serve, make_client
        self.claude = fake_cli(CLAUDE % str(folder), "claude")
        self.codex = fake_cli(CODEX % str(folder), "codex")
        self.text = fake_cli(NOTING % str(folder) + "print('answer 1 of', ME)", "text")
        self.home = folder / "claude-home"
        self.home.mkdir()

    def config(self, **server: Any) -> Json:
        return {"backends": {"claude": {"command": self.claude}, "codex": {"command": self.codex},
                             "gemini": {"enabled": False}, "text": {"command": self.text}},
                "server": {"metrics_enabled": True, "spares": 0, "live_conversations": 0, **server}}

    def start(self, **server: Any) -> Served:
        """`server` holds settings; without them nothing waits."""
        self.server: AnyServer = self.serve(config=self.config(**server), CLAUDE_CONFIG_DIR=str(self.home))
        return self.server

    def in_process(self, **server: Any) -> Client:
        """The same without a process of its own."""
        self.server = self.make_client(self.config(**server), CLAUDE_CONFIG_DIR=str(self.home))
        return self.server

    def notes(self, *did: str) -> List[Json]:
        file = self.folder / "notes"
        notes = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [note for note in notes if note["did"] in did]

    def order(self) -> List[Tuple[str, int]]:
        """Which processes have started, and ended by themselves, in that order."""
        return [(note["did"], note["pid"]) for note in self.notes("start", "end")]

    def pids(self, did: str) -> List[int]:
        return [note["pid"] for note in self.notes(did)]

    def spares(self) -> List[int]:
        """The processes that are there for a first request."""
        pids = [pid for pid in self.pids("ready") if pid not in self.pids("asked")]
        return alive(pids) if pids else []

    def spare(self) -> int:
        """The one that is there, once it is."""
        eventually(lambda: len(self.spares()) == 1, SOON)
        return self.spares()[0]

    def gone(self, *pids: int) -> None:
        eventually(lambda: not alive(list(pids)), SOON)

    def say(self, messages: Union[str, List[Json]] = "hello", path: str = OPENAI, *,
            server: Optional[AnyServer] = None, **fields: Any) -> Answer:
        """Ask, and look at the answer."""
        reply = self.post(messages, path, server=server, **fields)
        assert reply.status == 200, reply.body
        return Answer(reply.headers["x-clinvk-start"], text_of(path, reply), reply)

    def post(self, messages: Union[str, List[Json]] = "hello", path: str = OPENAI, *,
             server: Optional[AnyServer] = None, **fields: Any) -> Reply:
        if path == NATIVE:
            body = {"backend": "claude", "prompt": messages, **fields}
        else:
            messages = [user(messages)] if isinstance(messages, str) else messages
            limit = {"max_tokens": 99} if path == ANTHROPIC else {}
            body = {"model": "claude", "messages": messages, **limit, **fields}
        return (server or self.server).call("POST", path, body)

    def with_a_spare(self, **server: Any) -> int:
        """Start a server, and have it answer once; the spare that is there then."""
        self.start(spares=1, **server)
        assert self.say().start == "cold"
        return self.spare()

    def fault(self, pid: int, what: str) -> None:
        """What that process does when it is asked."""
        (self.folder / f"fault-{pid}").write_text(what)

    def asked(self, text: str) -> List[Json]:
        """The prompts with that text which have reached a provider."""
        return [note for note in self.notes("asked") if text in note["prompt"]]


@pytest.fixture
def stage(tmp_path: Path, serve: Callable[..., Served], make_client: Callable[..., Client],
          fake_cli: Callable[..., str]) -> Stage:
    return Stage(tmp_path, serve, make_client, fake_cli)


# ---- Spares

@pytest.mark.parametrize("path, stream", WAYS)
def test_the_first_request_is_cold_and_the_next_ones_are_answered_by_spares_each_used_once(
        stage: Stage, path: str, stream: bool) -> None:
    server = stage.start(spares=1)
    assert stage.say(path=path, stream=stream).start == "cold"
    for _ in range(2):
        spare = stage.spare()
        answer = stage.say("next", path, stream=stream)
        assert (answer.start, answer.turn, answer.pid) == ("spare", 1, spare)
        stage.gone(spare)
    eventually(lambda: re.findall(r"exit=0 start=(\w+) ", server.stderr) == ["cold", "spare", "spare"])
    counts = 'clinvk_first_output_seconds_count{backend="claude",start="%s"} %d\n'
    metrics = server.call("GET", "/metrics").body.decode()
    assert counts % ("cold", 1) in metrics and counts % ("spare", 2) in metrics


@pytest.mark.parametrize("path, fields, told", [
    (OPENAI, {}, (None, None, None, "")),
    (OPENAI, {"model": "claude/m1", "max_tokens": 77, "reasoning_effort": "high"}, ("m1", "77", "high", [])),
    (ANTHROPIC, {"system": "Be brief.", "max_tokens": 55}, (None, "55", None, "Be brief.")),
    (ANTHROPIC, {"system": "Be brief.", "model": "claude/m2"}, ("m2", "99", None, "Be brief."))])
def test_what_a_request_asks_for_reaches_the_spare(
        stage: Stage, path: str, fields: Json, told: Tuple[Any, ...]) -> None:
    spare = stage.with_a_spare()
    answer = stage.say("second", path, **fields)
    [asked] = stage.asked("second")
    assert (answer.start, asked["pid"], answer.pid, asked["prompt"]) == ("spare", spare, spare, "second")
    assert tuple(asked[name] for name in ("model", "max_tokens", "effort", "system")) == told


def test_a_spare_of_codex_is_asked_in_the_thread_that_it_has_begun_ahead(stage: Stage) -> None:
    stage.start(spares=1)
    assert stage.say(model="codex").start == "cold"
    spare = stage.spare()
    assert stage.say(model="codex")[:2] == ("spare", f"answer 1 of {spare}")


@pytest.mark.parametrize("spares, path, fields", [
    (0, OPENAI, {}), (1, NATIVE, {}), (1, NATIVE, {"ephemeral": True}), (1, OPENAI, {"clinvk": {"workdir": "."}}),
    (1, OPENAI, {"model": "text"}), (1, OPENAI, {"clinvk": {"extra": ["--effort", "high"]}})])
def test_these_requests_leave_no_spare(stage: Stage, spares: int, path: str, fields: Json) -> None:
    if "clinvk" in fields and "workdir" in fields["clinvk"]:
        fields = {"clinvk": {"workdir": str(stage.folder)}}
    server = stage.start(spares=spares)
    assert stage.say("hello", path, **fields).start == "cold"
    eventually(lambda: " start=cold " in server.stderr)
    time.sleep(A_WHILE)
    assert len(stage.notes("start")) == 1
    assert stage.say("hello", path, **fields).start == "cold"


@pytest.mark.parametrize("path, fields", [(NATIVE, {}), (OPENAI, {"clinvk": {"extra": ["--effort", "high"]}}),
                                          (OPENAI, {"model": "codex"})])
def test_these_requests_do_not_take_a_spare_that_is_there(stage: Stage, path: str, fields: Json) -> None:
    spare = stage.with_a_spare()
    answer = stage.say("hello", path, **fields)
    assert answer.start == "cold" and answer.pid != spare and spare not in stage.pids("asked")


@pytest.mark.parametrize("at_start", [False, True])
def test_at_server_start_there_is_a_spare_only_if_that_is_asked_for(stage: Stage, at_start: bool) -> None:
    stage.start(spares=1, spares_at_start=at_start)
    if at_start:
        spare = stage.spare()
        assert stage.say()[:2] == ("spare", f"answer 1 of {spare}")
    else:
        time.sleep(A_WHILE)
        assert not stage.notes("start") and stage.say().start == "cold"


def test_no_spare_is_started_while_a_run_is_going_on(stage: Stage) -> None:
    stage.start(spares=1)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(stage.say, "hold")
        eventually(lambda: stage.asked("hold"), SOON)
        assert stage.say("short").start == "cold"
        time.sleep(A_WHILE)
        assert len(stage.notes("start")) == 2
        (stage.folder / "go").touch()
        assert long.result().start == "cold"
    spare = stage.spare()
    assert stage.say()[:2] == ("spare", f"answer 1 of {spare}")


@pytest.mark.parametrize("spares, first", [(1, False), (2, True)])
def test_the_backend_wanted_longest_ago_loses_its_spare_when_there_would_be_too_many(
        stage: Stage, spares: int, first: bool) -> None:
    stage.start(spares=spares)
    stage.say()
    of_claude = stage.spare()
    assert stage.say(model="codex").start == "cold"
    eventually(lambda: len(stage.spares()) == spares and stage.spares() != [of_claude], SOON)
    assert (of_claude in stage.spares()) is first
    eventually(lambda: stage.say(model="codex").start == "spare", SOON)


def test_a_spare_that_nobody_needs_ends(stage: Stage) -> None:
    stage.start(spares=1, spare_idle_secs=5)
    assert stage.say().start == "cold"
    spare = eventually(lambda: stage.pids("start")[1:])[0]
    stage.gone(spare)
    time.sleep(A_WHILE)
    assert len(stage.pids("start")) == 2 and stage.say().start == "cold"


def replace_program(stage: Stage) -> None:
    new = stage.folder / "new"
    new.write_text(Path(stage.claude).read_text() + "# newer\n")
    new.chmod(0o755)
    os.replace(new, stage.claude)


CHANGES: Dict[str, Callable[[Stage], Any]] = {
    "credentials": lambda stage: (stage.home / ".credentials.json").write_text("{}"),
    "settings": lambda stage: (stage.home / "settings.json").write_text("{}"), "program": replace_program}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("what", CHANGES)
def test_no_answer_comes_from_a_spare_started_before_its_login_settings_or_program_changed(
        stage: Stage, what: str, at_once: bool) -> None:
    spare = stage.with_a_spare()
    CHANGES[what](stage)
    if not at_once:
        stage.gone(spare)
        stage.spare()
    answer = stage.say("after")
    assert answer.pid != spare and (at_once or answer.start == "spare")
    stage.gone(spare)


@pytest.mark.parametrize("what", CHANGES)
def test_no_conversation_goes_on_in_a_process_started_before_such_a_change(stage: Stage, what: str) -> None:
    stage.start(live_conversations=1)
    first = stage.say("hello")
    CHANGES[what](stage)
    answer = stage.say([user("hello"), assistant(first.text), user("and now?")])
    assert answer.start == "cold"
    stage.gone(first.pid)


# ---- Failures that nobody sees, and those that must be seen

FAULTS: Dict[str, Callable[[Stage, int], Any]] = {
    "died": lambda stage, pid: os.kill(pid, signal.SIGKILL), "hangs": lambda stage, pid: os.kill(pid, signal.SIGSTOP),
    "dies": lambda stage, pid: stage.fault(pid, "dies"),
    "says nothing": lambda stage, pid: stage.fault(pid, "says nothing"),
    "wakes up late": lambda stage, pid: stage.fault(pid, "wakes up late")}


@pytest.mark.parametrize("fault, stream", [("died", False), ("dies", True), ("hangs", True), ("says nothing", False),
                                           ("wakes up late", True)])
def test_a_spare_that_fails_before_its_provider_is_asked_is_not_seen(stage: Stage, fault: str, stream: bool) -> None:
    spare = stage.with_a_spare()
    FAULTS[fault](stage, spare)
    answer = stage.say("second", stream=stream)
    assert (answer.start, answer.turn) == ("cold", 1) and answer.pid != spare
    stage.gone(spare)
    [asked] = stage.asked("second")
    assert asked["pid"] == answer.pid


@pytest.mark.parametrize("fault", FAULTS)
def test_a_conversation_whose_process_fails_before_its_provider_is_asked_goes_on_in_another(
        stage: Stage, fault: str) -> None:
    stage.start(live_conversations=1)
    first = stage.say("hello")
    FAULTS[fault](stage, first.pid)
    answer = stage.say([user("hello"), assistant(first.text), user("second")])
    assert (answer.start, answer.turn) == ("cold", 1) and answer.pid != first.pid
    stage.gone(first.pid)
    [asked] = stage.asked("second")
    assert "hello" in asked["prompt"] and first.text in asked["prompt"]


@pytest.mark.parametrize("live", [False, True])
def test_one_that_fails_when_its_provider_has_been_asked_is_seen_and_nobody_asks_again(
        stage: Stage, live: bool) -> None:
    stage.start(spares=int(not live), live_conversations=int(live))
    first = stage.say("hello")
    waiting = first.pid if live else stage.spare()
    stage.fault(waiting, "breaks")
    reply = stage.post([user("hello"), assistant(first.text), user("second")])
    assert (reply.status, reply.headers["x-should-retry"]) == (502, "false")
    assert reply.headers["x-clinvk-start"] == ("live" if live else "spare")
    assert [note["pid"] for note in stage.asked("second")] == [waiting]


# ---- Live conversations

def parts(text: str) -> List[Json]:
    return [{"type": "text", "text": text}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
@pytest.mark.parametrize("first, answered, second", [(str, str, str), (parts, str, str), (str, parts, parts)])
def test_a_conversation_goes_on_in_the_process_that_gave_its_last_answer(
        stage: Stage, path: str, stream: bool, first: Callable[[str], Any], answered: Callable[[str], Any],
        second: Callable[[str], Any]) -> None:
    server = stage.start(live_conversations=1)
    fields: Json = {"stream": stream, **({"system": "Be brief."} if path == ANTHROPIC else {})}
    said = [user(first("hello"))]
    before = stage.say(said, path, **fields)
    for turn, text in enumerate(["and now?", "and then?"], 2):
        said += [assistant(answered(before.text)), user(second(text))]
        before = stage.say(said, path, **fields)
        assert (before.start, before.turn, before.pid) == ("live", turn, stage.notes("start")[0]["pid"])
        assert stage.notes("asked")[-1]["prompt"] == text
    eventually(lambda: re.findall(r" start=(\w+) ", server.stderr) == ["cold", "live", "live"])
    metrics = server.call("GET", "/metrics").body.decode()
    assert 'clinvk_first_output_seconds_count{backend="claude",start="live"} 2\n' in metrics


SAID = [user("one"), assistant("ANSWER"), user("two")]


@pytest.mark.parametrize("messages, fields", [
    ([user("won"), *SAID[1:]], {}), ([SAID[0], assistant("ANSWER!"), SAID[2]], {}),
    ([*SAID, user("three")], {}), ([*SAID[:2]], {}), ([*SAID, assistant("three"), user("four")], {}),
    ([{**SAID[0], "name": "Ann"}, *SAID[1:]], {}), ([*SAID[:2], {**SAID[2], "name": "Ann"}], {}),
    ([{"role": "system", "content": "Be brief."}, *SAID], {}),
    (SAID, {"model": "claude/m2"}), (SAID, {"max_tokens": 9}), (SAID, {"reasoning_effort": "low"}),
    (SAID, {"clinvk": {"approval_mode": "none"}})])
def test_another_conversation_than_the_one_that_was_answered_begins_anew(
        stage: Stage, messages: List[Json], fields: Json) -> None:
    stage.start(live_conversations=2)
    first = stage.say("one")
    told = [{**message, "content": message["content"].replace("ANSWER", first.text)} for message in messages]
    answer = stage.say(told, **fields)
    assert (answer.start, answer.turn) == ("cold", 1) and answer.pid != first.pid
    prompt = stage.notes("asked")[-1]["prompt"]
    assert all(message["content"] in prompt for message in told if message["role"] != "system")
    assert stage.say([user("one"), assistant(first.text), user("two")])[:2] == ("live", f"answer 2 of {first.pid}")


def test_conversations_at_once_go_on_each_in_its_own_process(stage: Stage) -> None:
    stage.start(live_conversations=2)
    talks = [[user(name)] for name in ("one", "two")]
    answers = [stage.say(talk) for talk in talks]
    for turn in (2, 3):
        for number, talk in enumerate(talks):
            talk += [assistant(answers[number].text), user(f"turn {turn}")]
        with ThreadPoolExecutor(2) as pool:
            after = list(pool.map(stage.say, talks))
        assert [(a.start, a.turn, a.pid) for a in after] == [("live", turn, a.pid) for a in answers]
        answers = after


@pytest.mark.parametrize("limit, starts", [(0, ["cold", "cold"]), (1, ["live", "cold"]), (2, ["live", "live"])])
def test_the_last_conversations_are_kept_and_no_more(stage: Stage, limit: int, starts: List[str]) -> None:
    stage.start(live_conversations=limit)
    answers = [stage.say(name) for name in ("one", "two")]
    for ended in answers[:2 - limit]:
        stage.gone(ended.pid)
    again = [stage.say([user(name), assistant(answer.text), user("next")]).start
             for name, answer in reversed(list(zip(("one", "two"), answers)))]
    assert again == starts


def test_of_two_that_go_on_with_a_conversation_at_once_one_begins_anew(stage: Stage) -> None:
    stage.start(live_conversations=2)
    first = stage.say("one")
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(stage.say, [[user("one"), assistant(first.text), user("next")]] * 2))
    assert sorted(answer.start for answer in answers) == ["cold", "live"]
    for answer in answers:
        assert (answer.turn, answer.pid == first.pid) == ((2, True) if answer.start == "live" else (1, False))


@pytest.mark.parametrize("prompt, fields, reason", [
    ("hello", {"stop": [" of"]}, "stop"), ("cut", {}, "length"), ("much", {}, "stop"), ("grow", {}, "stop"),
    ("mumble", {}, "stop")])
def test_these_answers_are_not_gone_on_with(stage: Stage, prompt: str, fields: Json, reason: str) -> None:
    """Cut by a stop sequence or by max_tokens; a long context; a process that takes much memory, or goes on talking."""
    stage.start(live_conversations=2)
    first = stage.say(prompt, **fields)
    assert first.reply.json["choices"][0]["finish_reason"] == reason
    pid = stage.asked(prompt)[0]["pid"]
    stage.gone(pid)
    for text in {first.text, f"answer 1 of {pid}"}:
        assert stage.say([user(prompt), assistant(text), user("next")], **fields).start == "cold"


def test_a_run_that_failed_is_not_gone_on_with(stage: Stage) -> None:
    stage.start(live_conversations=2)
    assert stage.post("fail").status == 502
    [failed] = stage.pids("start")
    stage.gone(failed)
    assert stage.say([user("fail"), assistant(f"answer 1 of {failed}"), user("next")]).start == "cold"


def test_an_answer_whose_client_left_is_not_gone_on_with(stage: Stage) -> None:
    server = stage.start(live_conversations=2)
    with contextlib.closing(server.connection()) as connection:
        body = {"model": "claude", "messages": [user("hold")], "stream": True}
        connection.request("POST", OPENAI, json.dumps(body), {"Content-Type": "application/json"})
        with contextlib.closing(connection.getresponse()) as answer:
            while b"answer" not in answer.readline():
                pass
    [left] = stage.pids("start")
    stage.gone(left)
    assert stage.say([user("hold"), assistant(f"answer 1 of {left}"), user("next")]).start == "cold"


# ---- Sessions

def session(stage: Stage, prompt: str, **fields: Any) -> Answer:
    return stage.say(prompt, NATIVE, **fields)


def test_a_session_goes_on_in_the_process_of_its_last_turn(stage: Stage) -> None:
    stage.start(live_conversations=1)
    first = session(stage, "one")
    name = first.reply.json["session_id"]
    for turn in (2, 3):
        answer = session(stage, f"turn {turn}", session_id=name)
        assert (answer.start, answer.turn, answer.pid) == ("live", turn, first.pid)
        assert stage.notes("asked")[-1]["prompt"] == f"turn {turn}"
    assert stage.server.call("GET", f"/api/v1/sessions/{name}").json["turn_count"] == 3


@pytest.mark.parametrize("fields", [{"approval_mode": "auto"}, {"sandbox_mode": "read-only"}, {"max_turns": 3},
                                    {"system_prompt": "Be brief."}])
def test_a_turn_that_its_process_can_not_take_resumes_in_another_once_that_has_gone(
        stage: Stage, monkeypatch: pytest.MonkeyPatch, fields: Json) -> None:
    assert clinvk.PATIENCE >= 2
    monkeypatch.setattr(clinvk, "PATIENCE", PATIENT)
    (stage.folder / "slow").touch()
    stage.in_process(live_conversations=1)
    first = session(stage, "one")
    answer = session(stage, "two", session_id=first.reply.json["session_id"], **fields)
    assert (answer.start, answer.turn) == ("cold", 1)
    assert stage.order()[:3] == [("start", first.pid), ("end", first.pid), ("start", answer.pid)]
    assert "--resume" in stage.notes("start")[1]["argv"]


def test_a_deleted_session_has_no_process(stage: Stage) -> None:
    server = stage.start(live_conversations=1)
    first = session(stage, "one")
    assert alive([first.pid])
    assert server.call("DELETE", f"/api/v1/sessions/{first.reply.json['session_id']}").status in (200, 204)
    assert not alive([first.pid])


def test_two_servers_hand_a_session_to_each_other(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clinvk.PATIENCE >= 2 and clinvk.HELD_SECS >= 5
    monkeypatch.setattr(clinvk, "PATIENCE", PATIENT)
    monkeypatch.setattr(clinvk, "HELD_SECS", PATIENT)
    (stage.folder / "slow").touch()
    servers = [stage.in_process(live_conversations=1), stage.in_process(live_conversations=1)]
    answer = session(stage, "one", server=servers[0])
    name = answer.reply.json["session_id"]
    for server in (servers[1], servers[0]):
        before = answer.pid
        answer = session(stage, "next", session_id=name, server=server)
        assert answer.start == "cold" and answer.pid != before and not alive([before])
        assert stage.order()[-2:] == [("end", before), ("start", answer.pid)]
        last = session(stage, "again", session_id=name, server=server)
        assert (last.start, last.pid) == ("live", answer.pid)


def test_a_conversation_that_the_cli_itself_has_gone_on_with_is_read_anew(stage: Stage) -> None:
    transcript = stage.home / "projects" / "here" / "x.jsonl"
    transcript.parent.mkdir(parents=True)
    waiting = stage.in_process(live_conversations=1).server.spares
    first = session(stage, "one")
    argv = stage.notes("start")[0]["argv"]
    transcript = transcript.with_name(argv[argv.index("--session-id") + 1] + ".jsonl")
    transcript.write_text("one\n")
    eventually(lambda: [one.stored for one in waiting.live] != [None])  # it is looked at once, soon after the turn
    transcript.write_text("one\ntwo\n")
    answer = session(stage, "three", session_id=first.reply.json["session_id"])
    assert answer.start == "cold" and "--resume" in stage.notes("start")[1]["argv"]


@pytest.mark.parametrize("prompt, start", [("use a tool", "live"), ("start a daemon", "cold")])
def test_a_process_in_which_a_tool_left_something_running_is_not_kept(stage: Stage, prompt: str, start: str) -> None:
    stage.start(live_conversations=1)
    first = session(stage, prompt)
    if start == "cold":
        stage.gone(first.pid, stage.notes("daemon")[0]["child"])
    assert session(stage, "next", session_id=first.reply.json["session_id"]).start == start


# ---- Memory

@pytest.mark.parametrize("available, short", [(99, True), (100, False), (900, False), (0, True)])
def test_memory_is_short_when_less_than_a_tenth_of_it_can_be_had(
        monkeypatch: pytest.MonkeyPatch, available: int, short: bool) -> None:
    text = f"MemTotal:     1000 kB\nMemFree:        50 kB\nMemAvailable: {available} kB\nHugePages_Total:   0\n"
    monkeypatch.setattr(Path, "read_text", lambda path, *_: {"/proc/meminfo": text}[str(path)])
    assert clinvk.memory_is_short() is short


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/meminfo")
def test_nothing_waits_on_a_machine_that_is_short_of_memory(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.in_process(spares=1, live_conversations=1)
    first = stage.say("one")
    spare = stage.spare()
    monkeypatch.setattr(clinvk, "SHORT", 1.1)
    stage.gone(first.pid, spare)
    assert stage.say("two").start == "cold"
    time.sleep(A_WHILE)
    assert not stage.spares()
    stage.gone(*stage.pids("start"))


# ---- The end

@pytest.fixture
def crowd(stage: Stage, request: pytest.FixtureRequest) -> List[int]:
    """The processes of a server that has a spare, and a live conversation of either kind."""
    if getattr(request, "param", False):
        (stage.folder / "stubborn").touch()
    server = stage.start(spares=1, live_conversations=2)
    live = [stage.say("one").pid, session(stage, "two").pid]
    spare = stage.spare()
    assert isinstance(server, Served) and alive([*live, spare]) == sorted([*live, spare])
    return [*live, spare, *children_of(server.process.pid)]


@pytest.mark.parametrize("crowd", [False, True], indirect=True, ids=["meek", "stubborn"])
def test_nothing_that_waits_outlives_a_server_that_is_stopped(stage: Stage, crowd: List[int]) -> None:
    assert isinstance(stage.server, Served)
    assert stage.server.stop() == 0
    if (stage.folder / "stubborn").exists():  # of the four seconds for all to go, these take 3.5 and what it costs
        stage.gone(*crowd)
    assert not alive(crowd)


@pytest.mark.parametrize("crowd", [False, True], indirect=True, ids=["meek", "stubborn"])
def test_nothing_that_waits_outlives_a_server_that_is_killed(stage: Stage, crowd: List[int]) -> None:
    assert isinstance(stage.server, Served)
    stage.server.process.kill()
    eventually(lambda: not alive(crowd))


# claude in as little as there is: it starts and answers within the milliseconds of a shell.
QUICK = r"""#!/bin/sh
turn=0
while read -r line; do
    case $line in
    *'"type": "user"'*)
        turn=$((turn + 1))
        text='{"type":"text","text":"answer '$turn' of '$$'"}'
        echo '{"type":"system","subtype":"init","model":"m","session_id":"s","cwd":"/"}'
        echo '{"type":"assistant","message":{"id":"m'$turn'","model":"m","content":['$text']}}'
        echo '{"type":"result","subtype":"success","is_error":false,"stop_reason":"end_turn","modelUsage":{"m":{}}}'
        ;;
    *)  echo '{"type":"control_response","response":{"subtype":"success","request_id":"x"}}'
    esac
done
"""


def kept_by(server: Served) -> Dict[str, int]:
    """What the server has of its machine."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return {"processes": len(children_of(server.process.pid)),
            "threads": int(status.split("Threads:")[1].split()[0]),
            "descriptors": len(os.listdir(f"/proc/{server.process.pid}/fd")),
            "kilobytes": int(status.split("VmRSS:")[1].split()[0])}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_thousand_requests_leave_no_more_than_a_hundred(stage: Stage) -> None:
    Path(stage.claude).write_text(QUICK)
    server = stage.start(spares=1, live_conversations=2)
    starts: List[str] = []
    kept = []
    with contextlib.closing(server.connection()) as connection:
        for until in (100, 1000):
            while len(starts) < until:
                talk = [user(f"number {len(starts)}")]
                for _ in range(2):
                    body = json.dumps({"model": "claude", "messages": talk})
                    connection.request("POST", OPENAI, body, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    starts.append(answer.headers["X-Clinvk-Start"])
                    talk += [assistant(json.loads(answer.read())["choices"][0]["message"]["content"]), user("next")]
            eventually(lambda: kept_by(server)["processes"] == 4, SOON)
            kept.append(kept_by(server))
    assert starts.count("live") == 500
    few, kilobytes = kept[0], kept[1]["kilobytes"]
    eventually(lambda: all(count <= few[name] for name, count in kept_by(server).items() if name != "kilobytes"))
    assert kilobytes < 1.1 * few["kilobytes"]
