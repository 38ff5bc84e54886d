"""Backends: how each CLI is called, and the events in what it prints.

`lines/NAME/CASE.jsonl` is what a real CLI printed, `CASE.events.json` what it must become: the events, without the
fields that have their default, and `says`, what we tell the CLI meanwhile. `raises` ends a run there and then."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import pytest
from conftest import collect

import clinvk
from clinvk import (BackendAuth, BackendFailed, ClinvkError, Config, Conflict, Done, Event, Failure, Forgotten, Init,
                    Message, RateLimited, Settled, TokenUsage, ToolResult, ToolUse)

LINES = Path(__file__).parent / "lines"
EVENT_TYPES = {name: kind for kind, name in clinvk.EVENT_NAMES.items()}
CLAUDE_LINE = ("-p --input-format stream-json --output-format stream-json --verbose --include-partial-messages "
               "--permission-prompt-tool stdio --no-session-persistence").split()


# ---- What the tests use

class Ears:
    """A CLI's stdin: what a backend says, in the order of the events around it."""

    def __init__(self) -> None:
        self.steps: List[Any] = []

    def say(self, message: Dict[str, Any]) -> None:
        self.steps.append(["says", message])

    def say_bytes(self, data: bytes) -> None:
        self.steps.append(["says", data.decode("utf-8", "replace")])

    def end_of_input(self) -> None:
        self.steps.append(["end of input", {}])

    @property
    def said(self) -> List[Any]:
        return [step[1] for step in self.steps if isinstance(step, list) and step[0] == "says"]


def config_of(home: Path, port: int = 8080, keys: str = "", backends: Optional[Dict[str, Any]] = None,
              **environ: str) -> Config:
    """The config of a server whose own environment is `environ`, and whose user lives in `home`."""
    home.mkdir(exist_ok=True)
    file = home / "config.yaml"
    file.write_text(json.dumps({"backends": backends or {}, "server": {"port": port}}))
    around = {"HOME": str(home), "PATH": os.environ["PATH"], "CLINVK_HOME": str(home / "clinvk"), **environ}
    return clinvk.load_config(str(file), {**around, "CLINVK_API_KEYS": keys}, {})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path / "home")


def request_of(backend: str, prompt: str = "hello", **fields: Any) -> Settled:
    """A request of the agent way, in the directory of the recordings, unless `fields` say otherwise."""
    return Settled(**{"backend": backend, "prompt": prompt, "workdir": "/home/user/work", **fields})


def backend_of(name: str, config: Config, program: Optional[List[str]] = None) -> Any:
    return clinvk.kind_of(name)(clinvk.Installed(name, program or [f"/bin/{name}"], config, ""))


def asked(name: str, config: Config, request: Settled) -> Tuple[Any, Ears]:
    """A backend that has greeted and asked, and what it said from then on."""
    backend, ears = backend_of(name, config), Ears()
    if name == "gemini" and request.resume:
        backend.replay_end = REPLAY_END  # `prepare` makes another one each time
    backend.greet(ears)
    backend.ask(request, ears)
    return backend, ears


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at:at + size] for at in range(0, len(data), size))


def hear(backend: Any, ears: Ears, data: Iterable[bytes]) -> List[Event]:
    """The events up to the first Done, as a run takes them; an error that ends the run becomes a step `raises`."""
    events: List[Event] = []
    try:
        for event in itertools.chain.from_iterable(backend.read(piece, ears) for piece in data):
            events.append(event)
            ears.steps.append(event)
            if isinstance(event, Done):
                break
    except ClinvkError as error:
        ears.steps.append(["raises", shown_error(error)])
    return events


def events_of(name: str, config: Config, lines: Iterable[Any], **fields: Any) -> List[Event]:
    """The events in messages, or lines, that a CLI prints after it has been asked."""
    backend, ears = asked(name, config, request_of(name, **fields))
    printed = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return hear(backend, ears, (line + b"\n" for line in printed))


def text_of(events: Iterable[Event]) -> str:
    """The final answer."""
    return "".join(collect(iter(events)).final)


def shown_error(error: ClinvkError, resets_at: Optional[float] = None) -> Dict[str, Any]:
    """An error, with the time at which to try again: in seconds from now, or absolute where the CLI names it."""
    after = error.retry_after
    if after is not None and resets_at and abs(after + time.time() - resets_at) < 60:
        again = {"again_at": resets_at}
    else:
        again = {} if after is None else {"retry_after": round(after, 3)}
    return {"error": type(error).__name__, "message": str(error).replace(clinvk.__version__, "VERSION"), **again}


def shown(event: Event, resets_at: Optional[float] = None) -> List[Any]:
    """An event as it stands in an events.json."""
    if isinstance(event, Failure):
        return ["error", shown_error(event.error, resets_at)]
    fields = {}
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        if value != field.default:
            fields[field.name] = value
    if "usage" in fields:
        fields = {name: value for name, value in vars(fields["usage"]).items() if value not in (0, True)}
    return [clinvk.EVENT_NAMES[type(event)], fields]


def steps_in(name: str, case: str, config: Config, size: int) -> List[Any]:
    """What a recording becomes, when it is read in pieces of `size` bytes."""
    recording = (LINES / name / f"{case}.jsonl").read_bytes()
    backend, ears = asked(name, config, request_of(name, **REQUESTS.get(f"{name}/{case}", {})))
    ears.steps.clear()
    hear(backend, ears, pieces(recording, size))
    resets_at = getattr(backend, "resets_at", None)
    return [shown(step, resets_at) if isinstance(step, Event) else step for step in ears.steps]


def recorded(name: str, case: str) -> List[Any]:
    return [json.loads(line) for line in (LINES / name / f"{case}.jsonl").read_bytes().splitlines()]


# ---- gemini's chat files, as it has stored them

PLAIN, TOOLS = "b1ba1fcf-2211-41c7-a14c-b4cee5a9bab5", "c969710e-fe48-4e72-99db-a3e54929b2a2"


def chats_of(tmp_path: Path) -> Path:
    """Where gemini stores the conversations of a project of the user's."""
    chats = tmp_path / "home" / ".gemini" / "tmp" / "work" / "chats"
    chats.mkdir(parents=True)
    return chats


def stored_chat(tmp_path: Path, chat: str, *names: str, more: Sequence[Any] = ()) -> Path:
    """`chats_of`, with a recorded chat in files of these names; `more` are lines that follow."""
    chats = chats_of(tmp_path)
    for name in names:
        lines = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in more)
        (chats / name).write_bytes((LINES / "gemini" / "chats" / f"{chat}.jsonl").read_bytes() + lines.encode())
    return chats


# ---- The recordings

# What was asked, where it was no prompt of the agent way with the default modes. `resumed` is a third turn of claude.
CONVERSATION, REPLAY_END = "a844cbb7-eb91-4045-a199-5659ec3ffa7a", "/clinvk-d297aa52-8680-4265-9d2b-3da9ea749c7e"
REQUESTS: Dict[str, Dict[str, Any]] = {
    "claude/tool": {"approval_mode": "auto"}, "gemini/tool": {"approval_mode": "auto"},
    "claude/resumed": {"keeps": True, "resume": "bc179aef-36b2-4d9a-b1dd-df2b1f4866d9"},
    "claude/resumed_331": {"keeps": True, "resume": "dd7538f2-4da6-4aa4-bb3d-cf3788e560ad"},
    "claude/resumed_error_400_331": {"keeps": True, "resume": "fe6c74de-3d77-4d57-921a-f9c0d7c509a9"},
    "codex/resumed": {"keeps": True, "resume": "01a21014-fc8b-7583-aade-03c0399f22a7"},
    "gemini/loaded": {"keeps": True, "resume": CONVERSATION, "approval_mode": "none"}}
CASES = sorted((file.parent.name, file.stem) for file in LINES.glob("*/*.jsonl"))


@pytest.mark.parametrize("size", [1, 7, 65536, 10**9])
@pytest.mark.parametrize("name, case", CASES)
def test_a_recording_becomes_its_events_in_pieces_of_any_size(name: str, case: str, size: int, config: Config) -> None:
    expected = json.loads((LINES / name / f"{case}.events.json").read_text(encoding="utf-8"))
    assert steps_in(name, case, config, size) == expected


def test_every_recording_has_its_events_and_every_event_type_occurs() -> None:
    expected = [json.loads(file.read_text(encoding="utf-8")) for file in LINES.glob("*/*.events.json")]
    assert len(expected) == len(CASES) > 50
    assert {kind for steps in expected for kind, _ in steps} == {*EVENT_TYPES, "says", "raises"}


TOOL_ANSWER, CHUNKS = "STUB[!tool echo hi]", "chunk0 chunk1 chunk2 chunk3 chunk4 "
ANSWERS = [(name, case, text) for name, cases in {
    "claude": {"plain": "STUB[hello]", "plain_331": "STUB[hello]", "slow": CHUNKS, "think": "STUB[!think]",
               "think_331": "STUB[!think]", "tool": TOOL_ANSWER, "tool_331": TOOL_ANSWER,
               "resumed": "STUB[hello again]", "resumed_331": "STUB[hello again]"},
    "codex": {"plain": "STUB[hello]", "slow": CHUNKS, "think": "STUB[!think]", "tool": TOOL_ANSWER,
              "declined": TOOL_ANSWER, "resumed": "STUB[hello]"},
    "gemini": {"plain": "STUB[hello]", "slow": CHUNKS, "think": "STUB[!think hello]",
               "tool": "STUB[!tool touch made.txt]", "loaded": "STUB[hello]"},
}.items() for case, text in cases.items()]


WHOLE = ("plain", "slow", "think", "tool", "declined", "asked", "denied", "unicode")


@pytest.mark.parametrize("name, case", [(name, case) for name, case in CASES if case.partition("_")[0] in WHOLE
                                        and name != "gemini"])
def test_the_answer_is_what_the_cli_itself_calls_the_result(name: str, case: str, config: Config) -> None:
    lines = recorded(name, case)
    result = lines[-1]["result"] if name == "claude" else lines[-1]["params"]["turn"]["items"][-1]["text"]
    assert text_of(events_of(name, config, lines, **REQUESTS.get(f"{name}/{case}", {}))) == result != ""


@pytest.mark.parametrize("name, case, text", ANSWERS)
def test_line_ends_and_blank_lines_change_nothing(name: str, case: str, text: str, config: Config) -> None:
    recording = (LINES / name / f"{case}.jsonl").read_bytes()
    request = request_of(name, **REQUESTS.get(f"{name}/{case}", {}))
    plain = hear(*asked(name, config, request), [recording])
    for changed in (recording.replace(b"\n", b"\r\n"), b"\n\n" + recording.replace(b"\n", b"\n \n")):
        assert hear(*asked(name, config, request), [changed]) == plain
    assert hear(*asked(name, config, request), [recording[:-1]]) == plain[:-2]  # without usage and Done


def test_nothing_after_the_first_done_belongs_to_the_run(config: Config) -> None:
    backend, ears = asked("claude", config, request_of("claude"))
    recording = (LINES / "claude" / "turns.jsonl").read_bytes()
    assert recording.count(b'"type":"result"') == 2
    assert text_of(hear(backend, ears, [recording])) == "STUB[first]"


# ---- A changed or unknown message costs an event, never the answer

STRANGE: List[bytes] = [b"", b"\xff\xfe", b"   ", b"Warning: not JSON", b'{"type":', b"[1, 2]", b"null", b'"text"',
                        b"17",
                        b"{}", b'{"type":"telemetry_v9","payload":{"text":"not an answer"}}', b'{"type":null}',
                        b'{"method":"item/hologram/delta","params":{"delta":"no"}}', b'{"method":"error","params":[]}',
                        b'{"id":4711,"result":{"text":"nobody asked"}}', b'{"type":"assistant"}',
                        b'{"type":"stream_event","event":{"type":"content_block_delta","delta":{"type":"new_delta"}}}',
                        b'{"jsonrpc":"2.0","method":"session/update","params":{"update":{"sessionUpdate":"mood"}}}',
                        b'{"type":"user","message":{"content":[{"type":"tool_result"}]}}',
                        b'{"type":"system","subtype":"ui_invalidate"}', b"[" * 5000]
# The words without which a line is no part of the answer, of the session, or of the turn's end.
NEEDED = (b"delta", b'"result"', b"message_start", b"turn/completed", b"agentMessage", b"agent_message_chunk", b'"id":',
          REPLAY_END.encode())


@pytest.mark.parametrize("name, case, text", ANSWERS)
def test_unknown_lines_in_between_cost_nothing(name: str, case: str, text: str, config: Config) -> None:
    chance = random.Random(f"{name}{case}")
    lines = (LINES / name / f"{case}.jsonl").read_bytes().splitlines()
    for _ in range(10):
        mixed = [line for known in lines for line in (*chance.sample(STRANGE, 2), known)]
        events = events_of(name, config, mixed, **REQUESTS.get(f"{name}/{case}", {}))
        assert (text_of(events), events[-1].exit_code) == (text, 0)  # type: ignore[attr-defined]


def mutated(value: Any, chance: random.Random) -> Any:
    """A JSON value with one thing in it left out, or of another type."""
    if isinstance(value, dict) and value:
        name = chance.choice(sorted(value))
        if chance.random() < 0.3:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: mutated(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], mutated(value[at], chance), *value[at + 1:]]
    return chance.choice([None, 0, -1.5, "", "word", [], {}, [None], {"x": []}, True, [[]]])


@pytest.mark.parametrize("name, case", CASES)
def test_changed_messages_never_raise_anything_but_an_error_of_ours(name: str, case: str, config: Config) -> None:
    chance = random.Random(f"{name}{case}")
    lines = recorded(name, case)
    for _ in range(20):
        changed = [mutated(line, chance) if chance.random() < 0.3 else line for line in lines]
        events = events_of(name, config, changed, **REQUESTS.get(f"{name}/{case}", {}))
        assert sum(isinstance(event, Done) for event in events) <= 1


@pytest.mark.parametrize("name, case, text", ANSWERS)
def test_changes_of_lines_that_are_no_part_of_the_answer_leave_it_whole(name: str, case: str, text: str,
                                                                        config: Config) -> None:
    chance = random.Random(f"{name}{case}")
    lines = (LINES / name / f"{case}.jsonl").read_bytes().splitlines()
    for _ in range(20):
        changed = [line if any(word in line for word in NEEDED) else mutated(json.loads(line), chance)
                   for line in lines]
        events = events_of(name, config, changed, **REQUESTS.get(f"{name}/{case}", {}))
        assert (text_of(events), events[-1].exit_code) == (text, 0)  # type: ignore[attr-defined]


def with_value(tree: Any, path: str, value: Any) -> Any:
    """`tree` with another value at a path such as `result.usage`."""
    head, _, rest = path.partition(".")
    return {**tree, head: with_value(tree[head], rest, value) if rest else value}


@pytest.mark.parametrize("name, path, value", [
    ("claude", "modelUsage", []), ("claude", "usage", "many"), ("claude", "usage.input_tokens", "1"),
    ("claude", "usage.output_tokens_details", 7), ("claude", "result", ["text"]), ("claude", "num_turns", "2"),
    ("codex", "params.turn.status", None), ("codex", "params.turn", {"id": "U"}),
    ("codex", "params.turn", {"status": "failed", "error": "no"}), ("gemini", "result._meta", "none"),
    ("gemini", "result._meta.quota.token_count", 9)])
def test_a_last_message_that_is_not_understood_still_ends_the_run(name: str, path: str, value: Any,
                                                                  config: Config) -> None:
    *lines, last = recorded(name, "plain")
    events = events_of(name, config, [*lines, with_value(last, path, value)])
    assert isinstance(events[-1], Done), "it would wait for the time limit"
    assert text_of(events) == "STUB[hello]"


@pytest.mark.parametrize("name, answer", [("codex", {"id": 2, "result": {"thread": {}}}),
                                          ("gemini", {"jsonrpc": "2.0", "id": 2, "result": {"session": "S"}})])
def test_a_reply_without_which_it_can_not_go_on_fails_the_run(name: str, answer: Any, config: Config) -> None:
    events = events_of(name, config, [recorded(name, "plain")[0], answer])
    assert [type(event) for event in events] == [Failure, Done], "it would wait for the time limit"


@pytest.mark.parametrize("name, known, changed", [
    ("claude", b'"type":"text_delta","text"', b'"type":"text_delta_v2","words"'),
    ("claude", b'"type":"stream_event"', b'"type":"stream_event_v2"'),
    ("claude", b'"type":"content_block_delta"', b'"type":"content_block_delta_v2"'),
    ("codex", b"item/agentMessage/delta", b"item/agentMessage/delta_v2"), ("codex", b',"delta":', b',"delta_v2":')])
def test_deltas_that_are_not_understood_leave_the_whole_text(name: str, known: bytes, changed: bytes,
                                                             config: Config) -> None:
    recording = (LINES / name / "slow.jsonl").read_bytes()
    assert known in recording
    events = events_of(name, config, recording.replace(known, changed).splitlines())
    assert text_of(events) == "chunk0 chunk1 chunk2 chunk3 chunk4 "


# ---- Text that comes more than once

def delta(text: str) -> Dict[str, Any]:
    inner = {"type": "text_delta", "text": text}
    return {"type": "stream_event", "event": {"type": "content_block_delta", "delta": inner}}


def start(message: str) -> Dict[str, Any]:
    return {"type": "stream_event", "event": {"type": "message_start", "message": {"id": message}}}


STOPPED = [{"type": "stream_event", "event": {"type": "message_delta", "delta": {"stop_reason": "tool_use"}}},
           {"type": "stream_event", "event": {"type": "message_stop"}}]


def whole(message: str, *content: Any) -> Dict[str, Any]:
    blocks = [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]
    return {"type": "assistant", "message": {"id": message, "model": "m", "content": blocks}}


ABANDONED = {"type": "stream_event", "event": {"type": "message_stop"}, "abandoned_blocks": {"from_block_index": 0}}


@pytest.mark.parametrize("lines, texts", [
    ([start("1"), delta("Hel"), delta("lo"), whole("1", "Hello")], ["Hel", "lo"]),
    ([whole("1", "Hello")], ["Hello"]),
    ([whole("1", "Hel", "lo")], ["Hel", "lo"]),
    ([start("1"), delta("Hel"), whole("2", "Hello")], ["Hel", "lo"]),  # the stream broke; 2.1.197 asks again
    ([start("1"), delta("Hel"), ABANDONED, start("2"), delta("He"), delta("llo!"), whole("2", "Hello!")],
     ["Hel", "lo!"]),
    ([start("1"), delta("Hel"), ABANDONED, start("2"), delta("He"), ABANDONED, start("3"), delta("Hello")],
     ["Hel", "lo"]),
    ([start("1"), delta("Hel"), ABANDONED, start("2"), delta("He"), ABANDONED, whole("3", "Hello")], ["Hel", "lo"]),
    ([start("1"), delta("Hello"), ABANDONED, start("2"), delta("Hello"), whole("2", "Hello")], ["Hello"]),
    ([start("1"), delta("One"), whole("1", "One"), *STOPPED, start("2"), delta("Two"), whole("2", "Two")],
     ["One", "Two"]),
    ([start("1"), delta("One"), whole("1", "One"), *STOPPED, whole("2", "Two")], ["One", "Two"]),
    ([whole("1", "One"), {"type": "user", "message": {"content": []}}, whole("2", "Two")], ["One", "Two"]),
    ([start("1"), delta("")], [])])
def test_claude_sends_no_text_twice(lines: List[Any], texts: List[str], config: Config) -> None:
    assert [event.text for event in events_of("claude", config, lines) if isinstance(event, Message)] == texts


@pytest.mark.parametrize("lines", [
    [start("1"), delta("Hello"), ABANDONED, start("2"), delta("Goodbye")],
    [start("1"), delta("Hello"), whole("2", "Help")]])
def test_another_answer_after_a_broken_stream_is_a_failure(lines: List[Any], config: Config) -> None:
    backend, ears = asked("claude", config, request_of("claude"))
    events = hear(backend, ears, (json.dumps(line).encode() + b"\n" for line in lines))
    assert (text_of(events), ears.steps[-1][0], ears.steps[-1][1]["error"]) == ("Hello", "raises", "BackendFailed")


def codex_line(method: str, **params: Any) -> Dict[str, Any]:
    return {"method": method, "params": params}


def codex_item(step: str, item: str, text: str = "") -> Dict[str, Any]:
    return codex_line(f"item/{step}", item={"type": "agentMessage", "id": item, "text": text})


def codex_delta(item: str, text: str) -> Dict[str, Any]:
    return codex_line("item/agentMessage/delta", itemId=item, delta=text)


RETRY = codex_line("error", error={"message": "Reconnecting... 1/5"}, willRetry=True)


@pytest.mark.parametrize("lines, texts", [
    ([codex_item("started", "1"), codex_delta("1", "Hel"), codex_delta("1", "lo"),
      codex_item("completed", "1", "Hello")], ["Hel", "lo"]),
    ([codex_item("started", "1"), codex_item("completed", "1", "Hello")], ["Hello"]),
    ([codex_item("started", "1"), codex_delta("1", "Hel"), RETRY, codex_item("started", "2"), codex_delta("2", "He"),
      codex_delta("2", "llo"), codex_item("completed", "2", "Hello")], ["Hel", "lo"]),
    ([codex_item("started", "1"), codex_delta("1", "Hel"), RETRY, codex_item("started", "2"),
      codex_item("completed", "2", "Hello")], ["Hel", "lo"]),
    ([RETRY, codex_item("started", "1"), codex_delta("1", "Hello")], ["Hello"]),
    ([codex_item("started", "1"), codex_delta("1", "One"), codex_item("completed", "1", "One"),
      codex_item("started", "2"), codex_delta("2", "Two"), codex_item("completed", "2", "Two")], ["One", "Two"])])
def test_codex_sends_no_text_twice(lines: List[Any], texts: List[str], config: Config) -> None:
    assert [event.text for event in events_of("codex", config, lines) if isinstance(event, Message)] == texts


def test_a_retry_between_two_messages_of_codex_does_not_compare_the_next_with_the_last(config: Config) -> None:
    lines = [codex_item("started", "1"), codex_delta("1", "I will run a tool."),
             codex_item("completed", "1", "I will run a tool."), RETRY, codex_item("started", "2"),
             codex_delta("2", "Done.")]
    events = events_of("codex", config, lines)
    assert [e for e in events if isinstance(e, Message)] == [Message("I will run a tool.", opens=True),
                                                             Message("Done.", opens=True)]


def test_a_retry_of_claude_between_two_messages_does_not_compare_the_next_with_the_last(config: Config) -> None:
    lines = [start("1"), delta("I will run a tool."), whole("1", "I will run a tool."), *STOPPED, start("2"),
             ABANDONED, start("3"), delta("Done.")]
    events = events_of("claude", config, lines)
    assert [e for e in events if isinstance(e, Message)] == [Message("I will run a tool.", opens=True),
                                                             Message("Done.", opens=True)]


def test_what_a_subagent_says_is_no_part_of_the_answer_but_its_tools_are_shown(config: Config) -> None:
    tool = {"type": "tool_use", "id": "t", "name": "Read", "input": {"path": "x"}}
    hidden = [start("9"), delta("hidden"), whole("9", "hidden", tool)]
    lines = [{**line, "parent_tool_use_id": "task"} for line in hidden]
    assert events_of("claude", config, lines) == [ToolUse("t", "Read", {"path": "x"})]


@pytest.mark.parametrize("update, text", [
    ({"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "[MODE_UPDATE] yolo"}}, ""),
    ({"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "HISTORY"}}, "")])
def test_what_gemini_says_before_the_prompt_is_no_part_of_the_answer(update: Any, text: str, config: Config) -> None:
    lines = recorded("gemini", "plain")
    early = {"jsonrpc": "2.0", "method": "session/update", "params": {"sessionId": "S", "update": update}}
    assert text_of(events_of("gemini", config, [lines[0], early, *lines[1:]])) == "STUB[hello]" + text


# ---- Lines

def lines_of(data: Iterable[bytes], repeats: bool = False, long: int = clinvk.Lines.LONG) -> List[bytes]:
    """The lines in pieces; a line over `long` bytes is asked about, and `repeats` is the answer."""
    lines = clinvk.Lines(lambda head: repeats)
    lines.LONG = long  # type: ignore[misc]
    lines.start()
    return [line for piece in data for line in lines.feed(piece)]


def split_anywhere(data: bytes, chance: random.Random, cuts: int) -> List[bytes]:
    at = sorted(chance.randrange(len(data) + 1) for _ in range(cuts))
    return [data[begin:end] for begin, end in zip([0, *at], [*at, len(data)])]


def test_lines_are_whole_wherever_the_pieces_are_split() -> None:
    chance = random.Random(1)
    texts = ["\u4f60\u2028\\\"\u00e9" * chance.randrange(20) for _ in range(30)]
    wanted = [json.dumps({"text": text}, ensure_ascii=chance.random() < 0.5).encode() for text in texts]
    data = b"".join(line + chance.choice([b"\n", b"\r\n", b"\n\n", b"\n \t\n"]) for line in wanted)
    for _ in range(200):
        found = lines_of(split_anywhere(data, chance, chance.randrange(60)))
        assert [line.strip() for line in found] == wanted


def test_a_line_without_its_end_is_not_given_out() -> None:
    assert lines_of([b'{"a":1}\n{"b":', b"2}"]) == [b'{"a":1}']


TAIL = {"type": "result", "after": ['"', "\\", "x"], "n": 7}


@pytest.mark.parametrize("text", ['say "hi" ', "back\\slash\\\\", "\n\t", "\u4f60\u597d\U0001f680", "x", '"', "\\",
                                  '\\"'])
@pytest.mark.parametrize("ascii", [True, False])
def test_a_long_string_that_only_repeats_is_dropped_and_the_line_stays_json(text: str, ascii: bool) -> None:
    chance, long = random.Random(text), 2000
    value = {"head": 'a"b\\', "long": text * (20_000 // len(text)), **TAIL}
    line = json.dumps(value, ensure_ascii=ascii).encode() + b"\n"
    for _ in range(30):
        parts = [line[:long + 9], *split_anywhere(line[long + 9:], chance, 40)]
        assert [json.loads(found) for found in lines_of(parts, repeats=True, long=long)] == [{**value, "long": ""}]


def test_a_line_that_is_not_long_is_never_dropped() -> None:
    lines = [json.dumps({"text": "x" * (clinvk.Lines.LONG - 100)}).encode()] * 5
    assert lines_of(pieces(b"\n".join([*lines, b""]), 65536), repeats=True) == lines


def test_every_split_of_a_dropped_strings_end_is_understood() -> None:
    head = b'{"long":"' + b"x" * 100
    tail = 'end \\\\ \\" \\\\\\" \u4f60 \\\\","z":"\\""}\n'.encode()
    for cut, second in itertools.combinations(range(len(tail) + 1), 2):
        found = lines_of([head, tail[:cut], tail[cut:second], tail[second:]], repeats=True, long=100)
        assert found == [b'{"long":"","z":"\\""}']


def test_the_line_after_a_dropped_string_is_whole() -> None:
    long = b'{"long":"' + b"x" * 3_000_000 + b'"}\n'
    found = lines_of(pieces(long + b'{"a":"b"}\n' + long, 65536), repeats=True)
    assert found == [b'{"long":""}', b'{"a":"b"}', b'{"long":""}']


def test_two_long_strings_of_one_line_are_both_dropped() -> None:
    long = "y" * 2_000_000
    line = json.dumps({"text": long, "result": long, "end": 1}).encode() + b"\n"
    assert [json.loads(found) for found in lines_of(pieces(line, 65536), repeats=True)] == [
        {"text": "", "result": "", "end": 1}]


def test_a_long_line_that_says_something_new_is_never_dropped() -> None:
    line = json.dumps({"text": 'new "text" \\ ' * 800_000}).encode()
    assert lines_of(pieces(line + b"\n", 65536)) == [line]


@pytest.mark.parametrize("text", ['{"a": "b"}\n', '"', '\\"'])
def test_a_long_string_full_of_quotes_is_dropped_as_fast_as_any(text: str) -> None:
    line = json.dumps({"long": text * (10_000_000 // len(text))}).encode() + b"\n"
    began = time.process_time()
    assert lines_of(pieces(line, 65536), repeats=True) == [b'{"long": ""}']
    assert time.process_time() - began < 3


TEN_MB = 'A "long" answer,\n\\ \u4f60\u597d. ' * 420_000
TWO_MB = TEN_MB[:2_000_000]


def long_run(name: str, text: str) -> List[bytes]:
    """A run in which `text` comes in two deltas, then whole as often as the CLI says it again."""
    first, second, whole_text = (json.dumps(part, ensure_ascii=False).encode()
                                 for part in (text[:999], text[999:], text))
    lines: List[bytes] = []
    for line in (LINES / name.partition("_")[0] / f"plain{name[6:]}.jsonl").read_bytes().splitlines(keepends=True):
        is_delta = b"STUB" in line and b"delta" in line[:120]
        lines += [line.replace(b'"STUB[hello]"', part) for part in ((first, second) if is_delta else (whole_text,))]
    return lines


@pytest.mark.parametrize("name", ["claude", "claude_331", "codex"])
def test_an_answer_of_10_mb_comes_once_and_what_repeats_it_is_not_held(name: str, config: Config) -> None:
    backend, ears = asked(name.partition("_")[0], config, request_of(name.partition("_")[0]))
    held, events = 0, []
    for line in long_run(name, TEN_MB):
        for piece in pieces(line, 65536):
            events += list(backend.read(piece, ears))
            held = held if b"delta" in line[:120] else max(held, len(backend.lines.line))
    assert text_of(events) == TEN_MB and events[-1].exit_code == 0
    assert held < 1_000_000


@pytest.mark.parametrize("name, lines, found", [
    ("claude", [whole("2", TWO_MB)], Message(TWO_MB, is_partial=False, opens=True)),
    ("claude", [start("1"), delta(TWO_MB)], Message(TWO_MB, opens=True)),
    ("claude", [start("1"), delta("I write."), whole("1", {"type": "tool_use", "id": "t", "name": "Write",
                                                           "input": {"content": TWO_MB}})],
     ToolUse("t", "Write", {"content": TWO_MB})),
    ("claude", [start("1"), delta("I read."), {"type": "user", "message": {"content": [
        {"type": "tool_result", "tool_use_id": "t", "content": TWO_MB}]}}], ToolResult("t", "", TWO_MB)),
    ("codex", [codex_item("started", "1"), codex_item("completed", "1", TWO_MB)],
     Message(TWO_MB, is_partial=False, opens=True)),
    ("codex", [codex_item("started", "1"), codex_delta("1", "I read."), codex_line("item/completed", item={
        "type": "commandExecution", "id": "c", "command": "cat", "aggregatedOutput": TWO_MB})],
     ToolResult("c", "shell", TWO_MB))])
def test_what_has_not_been_said_before_is_whole_however_long(name: str, lines: List[Any], found: Event,
                                                             config: Config) -> None:
    backend, ears = asked(name, config, request_of(name))
    data = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
    assert hear(backend, ears, pieces(data, 65536))[-1] == found


# ---- Conversations that go on

def counted(inputs: int, cost: float) -> Dict[str, Any]:
    """What claude tells of a model."""
    return {"m": {"inputTokens": inputs, "outputTokens": 10, "cacheReadInputTokens": 40, "costUSD": cost}}


RUNNING_ON = {"modelUsage": counted(300, 0.75), "total_cost_usd": 0.75}


@pytest.mark.parametrize("result, inputs, cost", [
    ({**RUNNING_ON, "usage": {"input_tokens": 7}}, 7, 0.75),  # 2.1.197: there is one turn in a process
    ({**RUNNING_ON, "usage": {"input_tokens": 0}}, 300, 0.75),
    ({**RUNNING_ON, "usage": {"input_tokens": 7}, "model_usage_since_last_result": counted(100, 0.25)}, 7, 0.25),
    ({**RUNNING_ON, "usage": {}, "model_usage_since_last_result": counted(100, 0.25)}, 100, 0.25),  # a broken stream
    ({**RUNNING_ON, "usage": {}, "model_usage_since_last_result": {}}, None, 0),
    ({"modelUsage": [], "total_cost_usd": None}, None, None), ({"total_cost_usd": "0.1"}, None, None),
    ({"total_cost_usd": float("nan"), "usage": {"input_tokens": 7}}, 7, None),
    ({"total_cost_usd": 0.5, "usage": {"input_tokens": 7, "output_tokens": "9"}}, None, 0.5),
    ({**RUNNING_ON, "usage": None, "model_usage_since_last_result": {"m": None}}, None, None),
    ({**RUNNING_ON, "usage": {"input_tokens": 7}, "model_usage_since_last_result": []}, 7, 0)])
def test_a_turn_of_claude_has_its_own_counts_and_cost(result: Any, inputs: Optional[int], cost: Optional[float],
                                                      config: Config) -> None:
    events = events_of("claude", config, [{"type": "result", "result": "x", "stop_reason": "end_turn", **result}])
    assert [event.usage.input_tokens for event in events if isinstance(event, TokenUsage)] == \
        ([] if inputs is None else [inputs])
    assert (events[-1].exit_code, events[-1].cost_usd) == (0, cost)  # type: ignore[attr-defined]


NO_SESSIONS, NO_SUCH = "No previous sessions found for this project.", 'Invalid session identifier "S".\n  Searched for'


@pytest.mark.parametrize("name, error, kind", [
    ("codex", {"code": -32600, "message": "no rollout found for thread id T"}, Forgotten),
    ("codex", {"code": -32600, "message": "thread T already has an active writer"}, Conflict),
    ("codex", {"code": -32603, "message": "failed to read thread: T is empty"}, BackendFailed),
    ("gemini", {"code": -32603, "message": "Internal error", "data": {"details": NO_SESSIONS}}, Forgotten),
    ("gemini", {"code": -32603, "message": "Internal error", "data": {"details": NO_SUCH}}, Forgotten),
    ("gemini", {"code": -32603, "message": "Internal error", "data": {"details": "no space left"}}, BackendFailed)])
def test_a_conversation_that_can_not_go_on_is_an_error_that_says_why(name: str, error: Any, kind: type,
                                                                     config: Config) -> None:
    lines = [recorded(name, "plain")[0], {"id": 2, "error": error}]
    failure, done = events_of(name, config, lines, keeps=True, resume=CONVERSATION)
    assert isinstance(failure, Failure) and type(failure.error) is kind
    assert done == Done(1)


# What gemini says when it loads a conversation: `loaded`, by what it is.
GREETED, CONTEXT, OPEN, USER, TEXT, TOOL, ANSWER, MARK, COMMANDS, MODE, MODE_SET, REPLY, ENDED = range(13)
REST = [MODE, MODE_SET, REPLY, ENDED]
ORDERS = {"as recorded": [GREETED, CONTEXT, OPEN, USER, TEXT, TOOL, ANSWER, MARK, COMMANDS, *REST],
          "the reply comes last": [GREETED, CONTEXT, USER, TEXT, TOOL, ANSWER, MARK, OPEN, COMMANDS, *REST],
          "the reply comes last of all": [GREETED, CONTEXT, USER, TEXT, TOOL, ANSWER, MARK, COMMANDS, OPEN, *REST],
          "the commands come in the middle": [GREETED, CONTEXT, OPEN, USER, COMMANDS, TEXT, TOOL, ANSWER, MARK, *REST],
          "the reply comes in the middle": [GREETED, CONTEXT, USER, TEXT, OPEN, COMMANDS, TOOL, ANSWER, MARK, *REST],
          "nothing is replayed": [GREETED, OPEN, MARK, COMMANDS, *REST],
          "the mode is told twice": [GREETED, OPEN, MARK, MODE, *REST]}


@pytest.mark.parametrize("mode", ["none", "default"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_gemini_gets_the_prompt_after_the_replay_of_which_nothing_is_an_answer(order: List[int], mode: str,
                                                                               config: Config) -> None:
    lines, said_at = recorded("gemini", "loaded"), []
    backend, ears = asked("gemini", config, request_of("gemini", keeps=True, resume=CONVERSATION, approval_mode=mode))
    events: List[Event] = []
    for kind in order if mode == "none" else [kind for kind in order if kind not in (MODE, MODE_SET)]:
        line = {**lines[kind], "id": 3} if kind == ENDED and mode == "default" else lines[kind]
        events += backend.read_message(line, ears)
        said_at += [kind] * (len(ears.said) - len(said_at) - 1)
    assert said_at == [GREETED, max(OPEN, MARK, key=order.index), *([MODE_SET] if mode == "none" else [])]
    load, *mode_set, prompt = ears.said[1:]
    assert (load["method"], load["params"]) == (
        "session/load", {"sessionId": CONVERSATION, "cwd": "/home/user/work", "mcpServers": []})
    assert [said["method"] for said in (*mode_set, prompt)] == [
        *(["session/set_mode"] if mode == "none" else []), "session/prompt"]
    assert prompt["params"] == {"sessionId": CONVERSATION, "prompt": [{"type": "text", "text": "hello"}]}
    assert [type(event) for event in events] == [Init, Message, clinvk.TokenUsage, Done]
    assert text_of(events) == "STUB[hello]"


@pytest.mark.parametrize("kind, text", [("agent_message_chunk", REPLAY_END), ("user_message_chunk", REPLAY_END[:-1]),
                                        ("user_message_chunk", f"{REPLAY_END}?"), ("user_message_chunk", "/clinvk-")])
def test_only_our_own_mark_ends_a_replay(kind: str, text: str, config: Config) -> None:
    lines = recorded("gemini", "loaded")
    backend, ears = asked("gemini", config, request_of("gemini", keeps=True, resume=CONVERSATION))
    other = with_value(with_value(lines[MARK], "params.update.sessionUpdate", kind), "params.update.content.text", text)
    for line in (lines[GREETED], lines[OPEN], other):
        list(backend.read_message(line, ears))
    assert ears.said[-1]["method"] == "session/load"


SILENCE = round(clinvk.Gemini.REPLAY_SILENCE / clinvk.TICK)


def silent(backend: Any, ears: Ears, ticks: int) -> List[str]:
    """What has been said after so many ticks of silence."""
    for _ in range(ticks):
        list(backend.look(ears))
    return [said["method"] for said in ears.said]


def test_a_replay_that_does_not_end_as_we_know_it_has_ended_when_nothing_more_comes(config: Config) -> None:
    lines = recorded("gemini", "loaded")
    backend, ears = asked("gemini", config, request_of("gemini", keeps=True, resume=CONVERSATION))
    events = [event for line in lines[:MARK] for event in backend.read_message(line, ears)]
    assert silent(backend, ears, SILENCE)[-1] == "session/load"
    assert silent(backend, ears, 3)[-1] == "session/prompt"
    for line in (lines[MARK], lines[REPLY], {**lines[ENDED], "id": 3}):
        events += backend.read_message(line, ears)
    assert silent(backend, ears, 2 * SILENCE).count("session/prompt") == 1
    assert (text_of(events), type(events[-1])) == ("STUB[hello]", Done)


def test_a_slow_start_of_gemini_is_no_silence_of_the_replay(config: Config) -> None:
    lines = [json.dumps(line).encode() + b"\n" for line in recorded("gemini", "loaded")]
    backend, ears = asked("gemini", config, request_of("gemini", keeps=True, resume=CONVERSATION))
    assert silent(backend, ears, 2 * SILENCE) == ["initialize"]
    hear(backend, ears, [lines[GREETED]])
    assert silent(backend, ears, 2 * SILENCE)[-1] == "session/load"
    for line in lines[OPEN:MARK]:
        hear(backend, ears, [line])
        assert silent(backend, ears, SILENCE // 2)[-1] == "session/load"
    hear(backend, ears, [lines[MARK]])
    assert ears.said[-1]["method"] == "session/prompt"


# ---- gemini's conversations are made ready to be loaded

def said_in(lines: Iterable[Any]) -> List[Tuple[str, str]]:
    """Who said what in a chat file, in order: a tool's call is its command, its result what the command printed."""
    found = []
    for line in lines:
        parts = line["content"] if isinstance(line["content"], list) else [{"text": line["content"]}]
        parts = [*parts, *({"functionCall": call} for call in line.get("toolCalls") or []),
                 *(part for call in line.get("toolCalls") or [] for part in call.get("result") or [])]
        text = "".join(part.get("text", "") for part in parts)
        if text and not text.startswith("<session_context>"):
            found.append((line["type"], text))
        found += [("call", part["functionCall"]["args"]["command"]) for part in parts if "functionCall" in part]
        found += [("result", part["functionResponse"]["response"]["output"].split("Output: ")[1].split("\n")[0])
                  for part in parts if "functionResponse" in part]
    return found


def prepared(chats: Path, session: str) -> List[Any]:
    """The lines of the file that is to be loaded, less the end mark."""
    mark = clinvk.prepare_to_load(chats.parent.parent, session, "/home/user/work")
    assert [file.name for file in chats.iterdir()] == [f"session-clinvk-{session}.jsonl"]
    metadata, *lines, last = [json.loads(line) for line in next(chats.iterdir()).read_bytes().splitlines()]
    assert (last["type"], last["content"]) == ("user", [{"text": mark}])
    assert mark.startswith("/clinvk-") and len(mark) > 40
    assert metadata["sessionId"] == session and "messages" not in metadata
    assert metadata["projectHash"] == hashlib.sha256(b"/home/user/work").hexdigest()
    ids = [line["id"] for line in (*lines, last)]
    assert len(set(ids)) == len(ids)
    assert mark not in json.dumps(lines)
    return lines


SHELL, CALLS = "run_shell_command", "I will call it."
ONE_TOOL = [("user", "!tool echo one first"), ("gemini", "I will run a tool."), ("call", "echo one first"),
            ("result", "one first"), ("gemini", "STUB[!tool echo one first]")]
TWO_TOOLS = [*ONE_TOOL, ("user", "!tool echo two second"), ("gemini", "I will run a tool."),
             ("call", "echo two second"), ("result", "two second"), ("gemini", "STUB[!tool echo two second]"),
             ("user", f'third !call {SHELL} {{"command":"echo aa"}} !call {SHELL} {{"command":"echo bb"}}'),
             ("gemini", CALLS), ("call", "echo aa"), ("call", "echo bb"), ("result", "aa"), ("result", "bb")]
TWO_LOADS = [("user", "\u2060/slash question"), ("gemini", "STUB[/slash question]"),
             ("user", f'four !call {SHELL} {{"command":"echo cc"}} !call {SHELL} {{"command":"false"}}'),
             ("gemini", CALLS), ("call", "echo cc"), ("call", "false"), ("result", "cc"), ("result", "(empty)")]
HELLO = [("user", "hello"), ("gemini", "STUB[hello]")]
STORED = [("plain", PLAIN, HELLO), ("two_tool_turns", TOOLS, TWO_TOOLS), ("two_loads", TOOLS, [*TWO_TOOLS, *TWO_LOADS]),
          ("without_metadata", CONVERSATION, HELLO)]


def names_of(session: str) -> Tuple[str, str]:
    """A file's name as gemini gives it, and as we do."""
    return f"session-2026-11-25T03-45-{session[:8]}.jsonl", f"session-clinvk-{session}.jsonl"


@pytest.mark.parametrize("name", [0, 1], ids=["gemini's name", "ours"])
@pytest.mark.parametrize("chat, session, said", STORED, ids=[chat for chat, *_ in STORED])
def test_a_stored_conversation_is_said_once_and_in_order(chat: str, session: str, said: Any, name: int,
                                                         tmp_path: Path) -> None:
    chats = stored_chat(tmp_path, chat, names_of(session)[name])
    lines = prepared(chats, session)
    assert [step for step in said_in(lines) if not step[1].startswith("GOT[")] == said
    again = prepared(chats, session)
    assert said_in(again) == said_in(lines)
    assert [{**line, "id": 0} for line in again] == [{**line, "id": 0} for line in lines]


def test_the_call_of_a_tool_stands_in_one_message_with_its_result_or_right_before_it(tmp_path: Path) -> None:
    chats, called = stored_chat(tmp_path, "two_loads", names_of(TOOLS)[1]), []
    lines = prepared(chats, TOOLS)
    for line, after in zip(lines, lines[1:]):
        calls = clinvk.ids_in(line, "functionCall")
        assert calls == (clinvk.ids_in(after, "functionResponse") if calls else [])
        called += calls
        for call in line.get("toolCalls") or []:
            assert [part["functionResponse"]["id"] for part in call["result"]] == [call["id"]]
            called.append(call["id"])
    assert len(called) == len(set(called)) == 6
    results = [name for line in lines for name in clinvk.ids_in(line, "functionResponse")]
    assert results == called[:4], "the others stand with their calls"


def test_what_a_load_left_beside_the_conversation_is_removed_and_never_loaded(tmp_path: Path) -> None:
    own, ours = names_of(PLAIN)
    chats = stored_chat(tmp_path, "plain", ours)
    (chats / own).write_text('{"$set": {"messages": []}}\n')
    assert said_in(prepared(chats, PLAIN)) == HELLO


def turn(name: str, *parts: Any, kind: str = "user") -> Dict[str, Any]:
    return {"id": name, "timestamp": "2026-11-25T03:46:00.000Z", "type": kind, "content": list(parts)}


@pytest.mark.parametrize("text, loaded", [
    ("/help me", "\u2060/help me"), ("? what", "\u2060? what"), ("  /help", "\u2060  /help"),
    ("see /help", "see /help"), ("\u2060/help", "\u2060/help"), ("why?", "why?"), ("/clinvk-x", "\u2060/clinvk-x")])
def test_a_turn_that_gemini_would_leave_out_begins_with_a_word_joiner(text: str, loaded: str, tmp_path: Path) -> None:
    more = [turn("u", {"text": text[:2]}, {"text": text[2:]}), turn("g", {"text": "/answer"}, kind="gemini")]
    chats = stored_chat(tmp_path, "plain", names_of(PLAIN)[0], more=more)
    for _ in range(2):
        assert said_in(prepared(chats, PLAIN)) == [*HELLO, ("user", loaded), ("gemini", "/answer")]


@pytest.mark.parametrize("to, said", [("a", HELLO), ("b", [*HELLO, ("user", "a")]), ("not there", []),
                                      ("a5a6e1ca-3895-40f2-849a-898e42245954", HELLO[:1])])
def test_what_was_rewound_is_not_loaded(to: str, said: Any, tmp_path: Path) -> None:
    more = [turn("a", {"text": "a"}), turn("b", {"text": "b"}, kind="gemini"), {"$rewindTo": to}]
    after = turn("c", {"text": "c"})
    chats = stored_chat(tmp_path, "plain", names_of(PLAIN)[0], more=[*more, after])
    assert said_in(prepared(chats, PLAIN)) == [*said, ("user", "c")]


def test_the_last_state_of_a_message_counts_and_a_result_without_its_call_does_not(tmp_path: Path) -> None:
    refused = {"functionResponse": {"id": "t", "name": SHELL, "response": {"error": "canceled by the user"}}}
    more = [turn("a", {"text": "first"}), turn("a", {"text": "last"}), turn("r", refused), turn("b", {"text": "b"})]
    chats = stored_chat(tmp_path, "plain", names_of(PLAIN)[0], more=more)
    assert said_in(prepared(chats, PLAIN)) == [*HELLO, ("user", "last"), ("user", "b")]


def test_lines_that_set_all_messages_anew_replace_those_before(tmp_path: Path) -> None:
    more = [turn("a", {"text": "a"}), {"$set": {"messages": [turn("b", {"text": "b"})]}}, turn("c", {"text": "c"})]
    chats = stored_chat(tmp_path, "plain", names_of(PLAIN)[0], more=more)
    assert said_in(prepared(chats, PLAIN)) == [("user", "b"), ("user", "c")]


CALL = {"functionCall": {"id": "t", "name": SHELL, "args": {"command": "ls"}}}
RESULT = {"functionResponse": {"id": "t", "name": SHELL, "response": {"output": "Output: made.txt\n"}}}
HANGING = {"toolCalls": [{**CALL["functionCall"], "status": "success", "result": [RESULT]}]}


@pytest.mark.parametrize("more", [
    [turn("g", CALL, kind="gemini"), turn("r", RESULT)],
    [{**turn("g", kind="gemini"), **HANGING}, turn("r", RESULT)], [{**turn("g", kind="gemini"), **HANGING}],
    [{**turn("g", CALL, kind="gemini"), **HANGING}, turn("r", RESULT)],
    [{**turn("g", kind="gemini"), **HANGING}, turn("r", RESULT), turn("s", RESULT)],
    [turn("g", CALL, kind="gemini"), turn("r", RESULT), turn("s", RESULT)]])
def test_however_often_a_call_is_stored_it_is_loaded_once_with_its_result(more: List[Any], tmp_path: Path) -> None:
    chats = stored_chat(tmp_path, "plain", names_of(PLAIN)[0], more=more)
    for _ in range(2):
        assert said_in(prepared(chats, PLAIN)) == [*HELLO, ("call", "ls"), ("result", "made.txt")]


def test_an_answer_that_only_the_result_of_claude_tells_is_an_answer(config: Config) -> None:
    result = {"type": "result", "result": "hello", "stop_reason": "end_turn", "num_turns": 1}
    said = {"type": "assistant", "message": {"id": "m", "content": [{"type": "text", "text": "hello"}]}}
    for lines in ([result], [{"type": "answer", "text": "hello"}, result], [said, result]):
        assert [event.text for event in events_of("claude", config, lines) if isinstance(event, Message)] == ["hello"]
    for other in ({"is_error": True}, {"num_turns": 0}):  # the second: claude itself, without its model
        events = events_of("claude", config, [{**result, **other}])
        assert not [event for event in events if isinstance(event, Message)]


@pytest.mark.parametrize("written, text", [
    (b"a\\ud83d b", "a\ufffd b"), (b"\\uDE00\\ud83d", "\ufffd\ufffd"),
    (b"\\ud83d\\ude00 \\\\ud83d", "\U0001f600 \\ud83d"), (b"a\xffb", "a\ufffdb"),
    ("é\U0001f600".encode(), "é\U0001f600")])
def test_what_is_no_whole_character_is_replaced_and_costs_no_line(config: Config, written: bytes, text: str) -> None:
    told = json.dumps({"type": "assistant", "message": {"id": "m", "content": [{"type": "text", "text": "TEXT"}]}})
    events = events_of("claude", config, [told.encode().replace(b"TEXT", written), b'{"type": "result"}'])
    assert text_of(events) == text


@pytest.mark.parametrize("line", ['{"id":"0000","timestamp":"2026-1', "[]\n", "7\n", "\n", "no JSON\n",
                                  '{"$set":{"lastUpdated":"2026"}}\n'])
def test_a_line_that_gemini_does_not_understand_is_left_out(line: str, tmp_path: Path) -> None:
    chats = stored_chat(tmp_path, "plain", names_of(PLAIN)[0], more=[line])
    assert said_in(prepared(chats, PLAIN)) == HELLO


def test_a_conversation_that_is_not_understood_is_loaded_as_it_is(tmp_path: Path) -> None:
    own, ours = names_of(PLAIN)
    chats = stored_chat(tmp_path, "plain", own, more=[turn("a", {"functionResponse": {"new": 1}})])
    stored = (chats / own).read_text().splitlines()
    mark = clinvk.prepare_to_load(chats.parent.parent, PLAIN, "/home/user/work")
    assert [file.name for file in chats.iterdir()] == [ours]
    *lines, last = [line for line in (chats / ours).read_text().splitlines() if line]
    assert lines == stored
    assert json.loads(last)["content"] == [{"text": mark}]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\u4f60", "\\"])
def test_no_character_of_a_turn_ends_its_line(character: str, tmp_path: Path) -> None:
    line = json.dumps(turn("a", {"text": f"a{character}b"}), ensure_ascii=False) + "\n"
    chats = stored_chat(tmp_path, "plain", names_of(PLAIN)[0], more=[line])
    assert said_in(prepared(chats, PLAIN)) == [*HELLO, ("user", f"a{character}b")]


def test_a_conversation_whose_file_is_gone_is_forgotten(tmp_path: Path) -> None:
    chats = stored_chat(tmp_path, "plain", *names_of(PLAIN))
    with pytest.raises(Forgotten, match="begin another session"):
        clinvk.prepare_to_load(chats.parent.parent, CONVERSATION, "/home/user/work")
    assert sorted(file.name for file in chats.iterdir()) == sorted(names_of(PLAIN))


def test_a_conversation_of_which_no_turn_was_kept_begins_anew(tmp_path: Path) -> None:
    name, chats = names_of(PLAIN)[0], chats_of(tmp_path)
    stored = (LINES / "gemini" / "chats" / "plain.jsonl").read_bytes().splitlines(keepends=True)
    (chats / name).write_bytes(b"".join(stored[:4]))  # as after a first turn that failed
    backend, ears = backend_of("gemini", config_of(tmp_path / "home")), Ears()
    request = request_of("gemini", keeps=True, resume=PLAIN)
    backend.prepare(request, lambda *args: b"never called")
    backend.greet(ears)
    backend.ask(request, ears)
    events = hear(backend, ears, [(LINES / "gemini" / "plain.jsonl").read_bytes()])
    assert [said["method"] for said in ears.said] == ["initialize", "session/new", "session/prompt"]
    assert text_of(events) == "STUB[hello]"
    assert isinstance(events[0], Init) and events[0].backend_session_id not in ("", PLAIN)
    new = f"session-2026-11-25T03-46-{events[0].backend_session_id[:8]}.jsonl"
    (chats / new).write_text("{}")
    backend.clean_up()
    assert new in [file.name for file in chats.iterdir()]


@pytest.mark.parametrize("resume", ["", PLAIN])
def test_gemini_prepares_only_what_it_is_to_load(resume: str, tmp_path: Path) -> None:
    chats = stored_chat(tmp_path, "plain", names_of(PLAIN)[0])
    backend = backend_of("gemini", config_of(tmp_path / "home"))
    backend.prepare(request_of("gemini", keeps=True, resume=resume), lambda *args: b"never called")
    assert [file.name for file in chats.iterdir()] == [names_of(PLAIN)[bool(resume)]]
    assert backend.replay_end == (json.loads(next(chats.iterdir()).read_bytes().splitlines()[-1])["content"][0]["text"]
                                  if resume else "")


# ---- What claude and codex are told to forget

@pytest.mark.parametrize("environ, own", [({}, {}), ({"CLAUDE_CONFIG_DIR": "elsewhere"}, {}),
                                          ({}, {"CLAUDE_CONFIG_DIR": "elsewhere"})])
def test_claude_forgets_all_of_a_conversation_and_nothing_of_another(environ: Any, own: Any, tmp_path: Path) -> None:
    around, added = ({name: str(tmp_path / folder) for name, folder in names.items()} for names in (environ, own))
    config = config_of(tmp_path / "home", backends={"claude": {"env": added}}, **around)
    home = tmp_path / ("elsewhere" if environ or own else "home/.claude")
    others = [f"projects/-home-user-work/{PLAIN}.jsonl", f"projects/-home-user-work/{PLAIN}/subagents/a.jsonl",
              f"projects/-home-user-work/memory/{CONVERSATION}", f"session-env/{PLAIN}/x"]
    both = [*others, *(name.replace(PLAIN, CONVERSATION) for name in others if PLAIN in name),
            f"projects/-other/{CONVERSATION}.jsonl"]
    for name in both:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("{}")
    for _ in range(2):  # what is not there any more is forgotten
        backend_of("claude", config).forget(CONVERSATION, lambda *args: b"never called")
        left = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() or CONVERSATION in path.name]
        assert sorted(left) == sorted(others)


# A codex that answers thread/delete with the text in its user's file `answer`, unless its stdin is closed before.
DELETES = """
import select
for line in sys.stdin:
    open(os.environ["HOME"] + "/told", "a").write(line)
    call = json.loads(line)
    if call.get("method") == "initialize":
        print('{"id":1,"result":{}}', flush=True)
    elif call.get("method") == "thread/delete" and not select.select([sys.stdin], [], [], 0.2)[0]:
        print(open(os.environ["HOME"] + "/answer").read(), flush=True)
"""
NO_ROLLOUT = '{"code":-32600,"message":"no rollout found for thread id T"}'
WRITER = '{"code":-32600,"message":"thread T already has an active writer"}'


@pytest.mark.parametrize("answer, reason", [
    ('{"id":2,"result":{}}', None), (f'{{"id":2,"error":{NO_ROLLOUT}}}', None),
    (f'{{"error":{NO_ROLLOUT},"id":2}}', None),  # as 0.169.0 writes it
    (f'{{"id":2,"error":{WRITER}}}', "active writer"), (f'{{"error":{WRITER},"id":2}}', "active writer"),
    ('{"method":"warning","params":{}}\n{"id":2,"result":{}}', None)])
def test_codex_is_asked_to_delete_a_thread_and_waited_for(answer: str, reason: Optional[str], tmp_path: Path,
                                                          fake_cli: Callable[..., str]) -> None:
    config = config_of(tmp_path / "home")
    config.home.mkdir()
    (tmp_path / "home" / "answer").write_text(answer)
    backend = backend_of("codex", config, [fake_cli(DELETES, "codex")])
    with asking(5) as output_of, pytest.raises(BackendFailed, match=reason) if reason else contextlib.nullcontext():
        backend.forget(CONVERSATION, output_of)
    told = [json.loads(line) for line in (tmp_path / "home" / "told").read_text().splitlines()]
    assert [call["method"] for call in told] == ["initialize", "initialized", "thread/delete"]
    assert told[-1] == {"id": 2, "method": "thread/delete", "params": {"threadId": CONVERSATION}}


# ---- What they ask of us

@pytest.mark.parametrize("fields, granted", [
    ({}, False), ({"approval_mode": "auto"}, True), ({"approval_mode": "none"}, False),
    ({"approval_mode": "always"}, False), ({"approval_mode": "auto", "sandbox_mode": "workspace"}, True),
    ({"approval_mode": "auto", "sandbox_mode": "read-only"}, False),
    ({"approval_mode": "auto", "isolated": True}, False)])
def test_claude_and_gemini_get_leave_for_a_tool_only_if_the_modes_say_so(fields: Dict[str, Any], granted: bool,
                                                                         config: Config) -> None:
    question = next(line for line in recorded("claude", "asked") if line["type"] == "control_request")
    backend, ears = asked("claude", config, request_of("claude", **fields))
    list(backend.read_message(question, ears))
    answer = ears.said[-1]["response"]
    assert (answer["subtype"], answer["request_id"]) == ("success", question["request_id"])
    assert (answer["response"]["behavior"] == "allow") is granted
    assert answer["response"].get("updatedInput") == (question["request"]["input"] if granted else None)

    question = next(line for line in recorded("gemini", "denied") if line.get("method") == "session/request_permission")
    backend, ears = asked("gemini", config, request_of("gemini", **fields))
    list(backend.read_message(question, ears))
    assert ears.said[-1] == {"jsonrpc": "2.0", "id": 0, "result": {"outcome": {
        "outcome": "selected", "optionId": "proceed_once" if granted else "cancel"}}}


@pytest.mark.parametrize("approval", ["default", "auto", "none", "always"])
@pytest.mark.parametrize("method, answer", [
    ("item/commandExecution/requestApproval", {"result": {"decision": "decline"}}),
    ("item/fileChange/requestApproval", {"result": {"decision": "decline"}}),
    ("item/permissions/requestApproval", {"result": {"permissions": {}}}),
    ("item/tool/requestUserInput", {"result": {"answers": {}}}),
    ("mcpServer/elicitation/request", {"result": {"action": "decline"}}),
    ("something/new", {"error": {"code": -32601, "message": "not supported by clinvk"}})])
def test_codex_is_refused_whatever_it_asks_and_always_answered(method: str, answer: Any, approval: str,
                                                               config: Config) -> None:
    backend, ears = asked("codex", config, request_of("codex", approval_mode=approval))
    list(backend.read_message({"method": method, "id": 7, "params": {}}, ears))
    assert ears.said[-1] == {"id": 7, **answer}


@pytest.mark.parametrize("name, question, error", [
    ("claude", {"type": "control_request", "request_id": "q", "request": {"subtype": "hook_callback"}},
     {"type": "control_response", "response": {"subtype": "error", "request_id": "q",
                                               "error": "not supported by clinvk"}}),
    ("gemini", {"jsonrpc": "2.0", "id": 5, "method": "fs/read_text_file", "params": {"path": "/etc/passwd"}},
     {"jsonrpc": "2.0", "id": 5, "error": {"code": -32601, "message": "not supported by clinvk"}}),
    ("gemini", {"jsonrpc": "2.0", "id": 6, "method": "session/request_permission", "params": {"options": []}},
     {"jsonrpc": "2.0", "id": 6, "result": {"outcome": {"outcome": "cancelled"}}})])
def test_what_we_do_not_know_is_answered_with_a_refusal(name: str, question: Any, error: Any, config: Config) -> None:
    backend, ears = asked(name, config, request_of(name, approval_mode="auto"))
    list(backend.read_message(question, ears))
    assert ears.said[-1] == error


# ---- What is said to them

def user_message(prompt: str) -> Dict[str, Any]:
    return {"type": "user", "message": {"role": "user", "content": [{"type": "text", "text": prompt},
                                                                    {"type": "text", "text": ""}]}}


def effort_level(level: str) -> Dict[str, Any]:
    return {"subtype": "apply_flag_settings", "settings": {"effortLevel": level}}


def thinking(tokens: int) -> Dict[str, Any]:
    return {"subtype": "set_max_thinking_tokens", "max_thinking_tokens": tokens}


@pytest.mark.parametrize("fields, requests", [
    ({}, []),
    ({"system_prompt": "Be brief."}, [{"subtype": "initialize", "appendSystemPrompt": "Be brief."}]),
    ({"keeps": True}, [{"subtype": "initialize", "systemPromptSnapshot": False}]),
    ({"keeps": True, "resume": "C", "system_prompt": "Be brief."},
     [{"subtype": "initialize", "appendSystemPrompt": "Be brief.", "systemPromptSnapshot": False}]),
    ({"isolated": True}, [{"subtype": "initialize", "systemPrompt": ""}]),
    ({"isolated": True, "system_prompt": "Be brief."}, [{"subtype": "initialize", "systemPrompt": "Be brief."}]),
    ({"effort": "minimal"}, [effort_level("low"), thinking(1024)]),
    ({"effort": "xhigh"}, [effort_level("xhigh"), thinking(31999)]),
    ({"effort": "none"}, [thinking(0)]),
    ({"effort": "high", "thinking_tokens": 0}, [effort_level("high"), thinking(0)]),
    ({"effort": "unheard of"}, []),
    ({"thinking_tokens": 0}, [thinking(0)]), ({"thinking_tokens": 2048}, [thinking(2048)])])
def test_claude_is_told_system_prompt_and_effort_before_the_prompt(fields: Any, requests: List[Any],
                                                                    config: Config) -> None:
    _, ears = asked("claude", config, request_of("claude", "/cost", **fields))
    *controls, prompt = ears.said
    assert [control["request"] for control in controls] == requests
    assert len({control["request_id"] for control in controls}) == len(controls)
    assert prompt == user_message("/cost")


THREAD = {"cwd": "/home/user/work", "approvalPolicy": "never"}
UNTRUSTED = {"config": {"projects": {"/home/user/work": {"trust_level": "untrusted"}}}}


@pytest.mark.parametrize("fields, thread", [
    ({}, THREAD), ({"model": "m"}, {**THREAD, "model": "m"}),
    ({"system_prompt": "Be brief."}, {**THREAD, "developerInstructions": "Be brief."}),
    ({"isolated": True, "system_prompt": "Be brief.", "approval_mode": "always", "sandbox_mode": "full", "model": "m"},
     {**THREAD, "model": "m", "sandbox": "read-only", "baseInstructions": "Be brief."}),
    ({"isolated": True}, {**THREAD, "sandbox": "read-only", "baseInstructions": ""}),
    ({"sandbox_mode": "read-only"}, {**THREAD, **UNTRUSTED, "sandbox": "read-only"}),
    ({"sandbox_mode": "workspace"}, {**THREAD, **UNTRUSTED, "sandbox": "workspace-write"}),
    ({"sandbox_mode": "full"}, {**THREAD, **UNTRUSTED, "sandbox": "danger-full-access"}),
    ({"approval_mode": "auto"}, THREAD), ({"approval_mode": "none"}, THREAD),
    ({"approval_mode": "always"}, {**THREAD, "approvalPolicy": "untrusted"})])
@pytest.mark.parametrize("turn, method, which", [
    ({}, "thread/start", {"ephemeral": True}), ({"keeps": True}, "thread/start", {"ephemeral": False}),
    ({"keeps": True, "resume": "T"}, "thread/resume", {"threadId": "T", "excludeTurns": True})])
def test_codex_is_told_modes_and_system_prompt_with_the_thread(turn: Any, method: str, which: Any, fields: Any,
                                                               thread: Any, config: Config) -> None:
    _, ears = asked("codex", config, request_of("codex", **fields, **turn))
    initialize, initialized, started = ears.said
    assert (initialize["id"], initialize["method"], initialized) == (1, "initialize", {"method": "initialized"})
    assert started == {"id": 2, "method": method, "params": {**thread, **which}}


@pytest.mark.parametrize("text, is_decided", [
    ('[projects."{repo}/sub"]', True), ("[projects.'{repo}/sub']", True), ('[projects."{repo}"]', True),
    ('[projects]\nprojects."{repo}".trust_level = "trusted"', True), ('[projects."{repo}/sub/more"]', False),
    ('[projects."{above}"]', False), ('[mcp_servers.x]\nargs = ["{repo}"]', False), ("", False)])
def test_only_a_directory_whose_trust_the_user_has_decided_is_left_to_codex(text: str, is_decided: bool,
                                                                            tmp_path: Path) -> None:
    """Of any other codex would write into the user's config that it is trusted, and start what it names."""
    config, repo = config_of(tmp_path / "home"), tmp_path / "repo"
    for folder in (tmp_path / "home" / ".codex", repo / ".git", repo / "sub"):
        folder.mkdir(parents=True)
    (tmp_path / "home" / ".codex" / "config.toml").write_text(text.format(repo=repo, above=tmp_path))
    _, ears = asked("codex", config, request_of("codex", sandbox_mode="workspace", workdir=str(repo / "sub")))
    decided = {} if is_decided else {"config": {"projects": {str(repo / "sub"): {"trust_level": "untrusted"}}}}
    assert ears.said[-1]["params"] == {**THREAD, "ephemeral": True, "sandbox": "workspace-write",
                                       "cwd": str(repo / "sub"), **decided}


@pytest.mark.parametrize("effort, told", [("", {}), ("high", {"effort": "high"}), ("none", {"effort": "none"}),
                                          ("max", {})])
def test_codex_is_told_the_prompt_and_the_effort_with_the_turn(effort: str, told: Any, config: Config) -> None:
    backend, ears = asked("codex", config, request_of("codex", "-x", effort=effort))
    hear(backend, ears, [(LINES / "codex" / "plain.jsonl").read_bytes()])
    thread = recorded("codex", "plain")[4]["result"]["thread"]["id"]
    assert ears.said[-1] == {"id": 3, "method": "turn/start", "params": {
        "threadId": thread, "input": [{"type": "text", "text": "-x"}], **told}}


@pytest.mark.parametrize("fields, mode, prompt", [
    ({}, None, "hello"), ({"approval_mode": "always"}, None, "hello"), ({"approval_mode": "auto"}, "autoEdit", "hello"),
    ({"approval_mode": "none"}, "yolo", "hello"), ({"sandbox_mode": "read-only"}, "plan", "hello"),
    ({"approval_mode": "none", "sandbox_mode": "read-only"}, "plan", "hello"),
    ({"approval_mode": "none", "isolated": True}, None, "hello"),
    ({"system_prompt": "Be brief."}, None, "Be brief.\n\nhello"),
    ({"system_prompt": "Be brief.", "isolated": True}, None, "hello")])
def test_gemini_is_told_its_mode_before_the_prompt(fields: Any, mode: Optional[str], prompt: str,
                                                       config: Config) -> None:
    backend, ears = asked("gemini", config, request_of("gemini", **fields))
    lines = recorded("gemini", "plain")
    for line in (*lines[:2], {"jsonrpc": "2.0", "id": 3, "result": {}}):
        list(backend.read_message(line, ears))
    session = {"sessionId": lines[1]["result"]["sessionId"]}
    asks = [("session/set_mode", {**session, "modeId": mode})] if mode else []
    asks.append(("session/prompt", {**session, "prompt": [{"type": "text", "text": prompt}]}))
    assert [(said["method"], said["params"]) for said in ears.said] == [
        ("initialize", ears.said[0]["params"]), ("session/new", {"cwd": "/home/user/work", "mcpServers": []}), *asks]
    assert [said["id"] for said in ears.said] == list(range(1, len(ears.said) + 1))


def test_gemini_hears_nothing_of_the_prompt_before_it_has_answered_the_greeting(config: Config) -> None:
    _, ears = asked("gemini", config, request_of("gemini"))
    assert [said["method"] for said in ears.said] == ["initialize"]
    later, heard = backend_of("gemini", config), Ears()
    later.greet(heard)
    list(later.read_message(recorded("gemini", "plain")[0], heard))
    later.ask(request_of("gemini"), heard)
    assert [said["method"] for said in heard.said] == ["initialize", "session/new"]


# ---- Commands

def test_claude_the_model_way_has_no_tools_and_none_of_the_users_files(config: Config) -> None:
    request = request_of("claude", isolated=True, model="opus", workdir="/empty", approval_mode="none", max_turns=3,
                         sandbox_mode="full", allowed_tools="Bash")
    command = backend_of("claude", config).command(request)
    assert command.argv == ["/bin/claude", *CLAUDE_LINE, "--model", "opus", "--safe-mode", "--strict-mcp-config",
                            "--tools", "", "--disable-slash-commands"]
    assert command.cwd == "/empty"
    assert set(command.env.items()) - set(config.environ.items()) == {("CLAUDE_CODE_DISABLE_ATTACHMENTS", "1")}


@pytest.mark.parametrize("fields, tail", [
    ({}, ["--permission-mode", "default"]), ({"approval_mode": "auto"}, ["--permission-mode", "acceptEdits"]),
    ({"approval_mode": "none"}, ["--permission-mode", "dontAsk"]),
    ({"approval_mode": "always"}, ["--permission-mode", "default"]),
    ({"sandbox_mode": "read-only"}, ["--permission-mode", "plan"]),
    ({"sandbox_mode": "workspace", "approval_mode": "auto"}, ["--permission-mode", "acceptEdits"]),
    ({"sandbox_mode": "full"}, ["--permission-mode", "bypassPermissions"]),
    ({"sandbox_mode": "read-only", "approval_mode": "none"}, ["--permission-mode", "plan"]),
    ({"max_turns": 4, "allowed_tools": "Read,Edit"},
     ["--permission-mode", "default", "--max-turns", "4", "--allowedTools", "Read,Edit"]),
    ({"extra": ["--effort", "low"]}, ["--permission-mode", "default", "--own", "1", "--effort", "low"])])
def test_claude_the_agent_way_is_told_its_modes_on_the_command_line(fields: Any, tail: List[str],
                                                                        tmp_path: Path) -> None:
    own = ["--own", "1"] if "extra" in fields else []
    config = config_of(tmp_path / "home", backends={"claude": {"extra_flags": own}})
    command = backend_of("claude", config).command(request_of("claude", **fields))
    assert command.argv == ["/bin/claude", *CLAUDE_LINE, *tail]


@pytest.mark.parametrize("fields, shown", [
    ({}, ["--no-session-persistence"]), ({"keeps": True}, []),
    ({"keeps": True, "resume": CONVERSATION}, ["--resume", CONVERSATION]),
    ({"keeps": True, "resume": CONVERSATION, "model": "m"}, ["--model", "m", "--resume", CONVERSATION])])
def test_claude_stores_only_what_is_kept_and_goes_on_with_it(fields: Any, shown: List[str], config: Config) -> None:
    argv = backend_of("claude", config).command(request_of("claude", **fields)).argv
    assert argv == ["/bin/claude", *CLAUDE_LINE[:-1], *shown, "--permission-mode", "default"]


@pytest.mark.parametrize("fields, limits", [
    ({}, {}), ({"max_tokens": 9}, {"MAX_OUTPUT_TOKENS": "9"}),
    ({"max_tokens": 9, "isolated": True}, {"MAX_OUTPUT_TOKENS": "9", "DISABLE_THINKING": "1"}),
    ({"max_tokens": 9, "isolated": True, "effort": "low"}, {"MAX_OUTPUT_TOKENS": "9"}),
    ({"max_tokens": 9, "isolated": True, "thinking_tokens": 1024}, {"MAX_OUTPUT_TOKENS": "9"})])
def test_max_tokens_of_claude_is_not_spent_on_thinking_that_nobody_asked_for(fields: Any, limits: Any,
                                                                             config: Config) -> None:
    env = backend_of("claude", config).command(request_of("claude", **fields)).env
    expected = {"DISABLE_ATTACHMENTS": "1", **limits}
    assert {k[12:]: v for k, v in env.items() if k.startswith("CLAUDE_CODE_")} == expected


@pytest.mark.parametrize("isolated", [True, False])
def test_codex_has_a_home_of_clinvks_own_the_model_way_only(isolated: bool, tmp_path: Path) -> None:
    config = config_of(tmp_path / "home", backends={"codex": {"extra_flags": ["-c", "a=1"]}}, CODEX_HOME="/users/own")
    request = request_of("codex", isolated=isolated, extra=["-y"])
    command = backend_of("codex", config, ["/bin/codex", "x"]).command(request)
    assert command.argv == ["/bin/codex", "x", "-c", "a=1", "-y", "app-server"]
    assert command.env["CODEX_HOME"] == (str(config.home / "codex") if isolated else "/users/own")
    assert command.cwd == "/home/user/work"


@pytest.mark.parametrize("fields, tail", [
    ({}, []), ({"model": "gemini-2.5-flash"}, ["-m", "gemini-2.5-flash"]), ({"sandbox_mode": "workspace"}, ["-s"]),
    ({"sandbox_mode": "read-only"}, []), ({"sandbox_mode": "full"}, []),
    ({"isolated": True}, ["-e", "none", "-m", "flash"]),
    ({"isolated": True, "model": "pro"}, ["-e", "none", "-m", "pro"]),
    ({"isolated": True, "sandbox_mode": "workspace"}, ["-e", "none", "-m", "flash"]),
    ({"model": "m", "extra": ["--debug"]}, ["-m", "m", "--debug"])])
def test_gemini_is_told_model_and_sandbox_on_the_command_line(fields: Any, tail: List[str], config: Config) -> None:
    backend = backend_of("gemini", config)
    command = backend.command(request_of("gemini", **fields))
    session = [] if fields.get("isolated") else ["--session-id", backend.first_session]  # so that it can be removed
    assert command.argv == ["/bin/gemini", "--acp", "--skip-trust", *session, *tail]
    assert (command.env["GEMINI_CLI_NO_RELAUNCH"], command.env["NO_BROWSER"]) == ("true", "true")
    own = str(backend.scratch) if fields.get("isolated") else None
    assert command.env.get("GEMINI_CLI_HOME") == own


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("name", ["claude", "codex", "gemini", "mine"])
def test_no_prompt_is_ever_on_the_command_line_or_in_the_environment(name: str, isolated: bool, tmp_path: Path) -> None:
    config = config_of(tmp_path / "home", backends={"mine": {"command": ["mine", "--plain"]}})
    request = request_of(name, "PROMPT-4711", system_prompt="SYSTEM-4711", isolated=isolated)
    command = backend_of(name, config).command(request)
    assert "4711" not in repr((command.argv, command.env, command.cwd))


def told_in(plan: str) -> List[Any]:
    """The messages that a dry run shows."""
    return [json.loads(line) for line in plan.partition("# told:\n")[2].splitlines()]


def test_dry_run_shows_command_directory_variables_and_messages_and_leaves_nothing_behind(config: Config) -> None:
    request = request_of("gemini", "hi", isolated=True, extra=["a b"], workdir="/work")
    first, *rest = backend_of("gemini", config).plan(request).splitlines()
    assert first == "/bin/gemini --acp --skip-trust -e none -m flash 'a b'"
    assert "# in /work" in rest and "# with NO_BROWSER=true" in rest
    assert list((config.home / "runs").iterdir()) == []
    claude = backend_of("claude", config).plan(request_of("claude", "hi", max_tokens=500, system_prompt="be brief"))
    assert "# with CLAUDE_CODE_MAX_OUTPUT_TOKENS=500" in claude.splitlines()
    assert told_in(claude)[0]["request"]["appendSystemPrompt"] == "be brief"
    assert told_in(claude)[1]["message"]["content"][0] == {"type": "text", "text": "hi"}


@pytest.mark.parametrize("name, resume, methods", [
    ("codex", "", ["initialize", "initialized", "thread/start", "turn/start"]),
    ("codex", CONVERSATION, ["initialize", "initialized", "thread/resume", "turn/start"]),
    ("gemini", "", ["initialize", "session/new", "session/set_mode", "session/prompt"]),
    ("gemini", CONVERSATION, ["initialize", "session/load", "session/set_mode", "session/prompt"])])
def test_dry_run_shows_the_calls_that_hang_on_replies_too(name: str, resume: str, methods: List[str],
                                                          config: Config) -> None:
    request = request_of(name, "hi", approval_mode="auto", keeps=True, resume=resume)
    told = told_in(backend_of(name, config).plan(request))
    assert [message["method"] for message in told] == methods
    assert told[-1]["params"].get("input", told[-1]["params"].get("prompt")) == [{"type": "text", "text": "hi"}]
    assert resume in (told[-2] if name == "codex" else told[1])["params"].values() or not resume


def test_dry_run_of_a_later_turn_of_claude_shows_what_it_goes_on_with(config: Config) -> None:
    plan = backend_of("claude", config).plan(request_of("claude", "hi", keeps=True, resume=CONVERSATION))
    assert f" --resume {CONVERSATION} " in plan.splitlines()[0]
    assert told_in(plan)[-1]["message"]["content"][0] == {"type": "text", "text": "hi"}


def test_dry_run_of_a_later_turn_leaves_the_conversation_as_it_is(tmp_path: Path) -> None:
    chats = stored_chat(tmp_path, "plain", f"session-2026-11-25T03-45-{PLAIN[:8]}.jsonl")
    backend_of("gemini", config_of(tmp_path / "home")).plan(request_of("gemini", keeps=True, resume=PLAIN))
    assert [file.name for file in chats.iterdir()] == [f"session-2026-11-25T03-45-{PLAIN[:8]}.jsonl"]


@pytest.mark.parametrize("before, mode, config, sandbox", [
    ("full", "default", {"sandbox_mode": None, "projects": None}, "read-only"),
    ("full", "default", {"sandbox_mode": "workspace-write"}, "workspace-write"),
    ("full", "default", {"projects": {"HERE": {"trust_level": "trusted"}}}, "workspace-write"),
    ("full", "default", {"projects": {"/elsewhere": {"trust_level": "trusted"}}}, "read-only"),
    ("full", "read-only", None, "read-only"), ("", "default", None, None)])
def test_a_turn_of_codex_has_its_own_sandbox_not_that_of_a_turn_before_it(
        before: str, mode: str, config: Any, sandbox: Optional[str], tmp_path: Path) -> None:
    """`config` is what codex says its config is in that directory; None: it is not asked."""
    backend = backend_of("codex", config_of(tmp_path / "home"))
    request = request_of("codex", keeps=True, resume="T", sandbox_before=before, sandbox_mode=mode,
                         workdir=str(tmp_path))

    def output_of(command: clinvk.Command, said: bytes, until: bytes) -> bytes:
        assert config is not None and b'"config/read"' in said
        return json.dumps({"id": 2, "result": {"config": config}}, separators=(",", ":")).replace(
            "HERE", str(tmp_path)).encode() + b"\n"
    backend.prepare(request, output_of)
    assert backend.thread(request).get("sandbox") == sandbox


@pytest.mark.parametrize("flags, shown", [
    (["-c", "model_providers.x.api_key=s3cret-one"], "-c 'model_providers.x.api_key=<secret>'"),
    (["--api-key", "s3cret-two", "--debug"], "--api-key '<secret>' --debug"),
    (["--token=s3cret-three"], "'--token=<secret>'"), (["-H", "Bearer s3cret"], "-H '<secret>'"),
    (["--proxy=http://me:s3cret@proxy"], "'--proxy=<secret>'"),
    (["--settings", '{"env":{"ANTHROPIC_AUTH_TOKEN":"s3cret"}}'], "--settings '<secret>' -p"),
    (["-c", 'p.http_headers={"X-Api-Key"="s3cret"}'], "-c 'p.http_headers=<secret>'"),
    (["-H", "X-Api-Key: s3cret"], "-H '<secret>'"), (["--api-key", "-s3cret"], "--api-key '<secret>'"),
    (["--max-tokens", "5", "-c", "x.max_tokens=7"], "--max-tokens 5 -c x.max_tokens=7")])
def test_dry_run_shows_no_key(flags: List[str], shown: str, tmp_path: Path) -> None:
    config = config_of(tmp_path / "home", OPENAI_API_KEY="sk-from-around", backends={"codex": {
        "env": {"MY_TOKEN": "from-the-config"}, "extra_flags": [*flags, "-p", "from-the-config"]}})
    plan = backend_of("codex", config).plan(request_of("codex", "is sk-from-around a key?"))
    assert shown in plan and "<OPENAI_API_KEY>" in plan and "-p <MY_TOKEN>" in plan
    assert all(secret not in plan for secret in ("sk-from-around", "from-the-config", "s3cret"))


NOT_INHERITED = """CLAUDECODE CLAUDE_CODE_ENTRYPOINT CLAUDE_CODE_SESSION_ID CLAUDE_CODE_SSE_PORT CLAUDE_CODE_EXECPATH
    CLAUDE_CODE_CHILD_SESSION CLAUDE_CODE_SIMPLE CLAUDE_CODE_SAFE_MODE CLAUDE_CODE_REMOTE
    CLAUDE_CODE_SUBPROCESS_ENV_SCRUB CLAUDE_CODE_EXTRA_BODY CLAUDE_CODE_MAX_OUTPUT_TOKENS
    CLAUDE_CODE_DISABLE_THINKING CLAUDE_CODE_MAX_TURNS
    ENABLE_TOOL_SEARCH CODEX_SANDBOX CODEX_SANDBOX_NETWORK_DISABLED CODEX_THREAD_ID CODEX_CI
    CODEX_INTERNAL_ORIGINATOR_OVERRIDE GEMINI_CLI GEMINI_CLI_TRUST_WORKSPACE GEMINI_SYSTEM_MD GEMINI_SANDBOX SANDBOX
    CLINVK_HOME CLINVK_API_KEYS CLINVK_ANYTHING""".split()


@pytest.mark.parametrize("variable", NOT_INHERITED)
def test_what_marks_or_changes_a_nested_run_is_not_inherited(variable: str, tmp_path: Path) -> None:
    env = clinvk.child_environ(config_of(tmp_path / "home", **{variable: "1", "KEPT": "yes"}), "claude")
    assert variable not in env and env["KEPT"] == "yes"


@pytest.mark.parametrize("url, port, passes", [
    ("http://127.0.0.1:8080", 8080, False), ("http://localhost:8080/anthropic", 8080, False),
    ("http://[::1]:8080/openai/v1", 8080, False), ("http://LocalHost:8080/anthropic", 8080, False),
    ("http://localhost/v1", 80, False), ("http://localhost:8081/v1", 8080, True),
    ("https://api.example.com", 8080, True), ("http://127.0.0.1:8899/v1", 8080, True), ("", 8080, True),
    ("not a url", 8080, True)])
@pytest.mark.parametrize("variable", ["ANTHROPIC_BASE_URL", "OPENAI_BASE_URL", "GOOGLE_GEMINI_BASE_URL"])
def test_a_base_url_that_points_at_this_server_is_not_inherited(variable: str, url: str, port: int, passes: bool,
                                                                tmp_path: Path) -> None:
    env = clinvk.child_environ(config_of(tmp_path / "home", port, **{variable: url}), "claude")
    assert env.get(variable) == (url if passes else None)


def test_a_clinvk_key_that_was_exported_for_clients_does_not_become_a_login(tmp_path: Path) -> None:
    config = config_of(tmp_path / "home", keys="k1, k2", ANTHROPIC_API_KEY="k2", OPENAI_API_KEY="a real one")
    env = clinvk.child_environ(config, "claude")
    assert "ANTHROPIC_API_KEY" not in env and env["OPENAI_API_KEY"] == "a real one"


def test_a_backends_own_environment_is_added_last(tmp_path: Path) -> None:
    own = {"A": "own", "CLAUDECODE": "own", "CLAUDE_CODE_DISABLE_ATTACHMENTS": "0"}
    config = config_of(tmp_path / "home", backends={"claude": {"env": own}}, A="inherited")
    assert own.items() <= backend_of("claude", config).command(request_of("claude")).env.items()
    assert clinvk.child_environ(config, "codex")["A"] == "inherited"


EVERYTHING = {"model": "m", "approval_mode": "auto", "sandbox_mode": "workspace", "max_tokens": 5, "max_turns": 2,
              "system_prompt": "s", "allowed_tools": "Read", "verbose": True, "effort": "low", "thinking_tokens": 1024}
AGENT_ONLY = ["approval_mode", "sandbox_mode", "max_turns", "allowed_tools"]


@pytest.mark.parametrize("name, fields, names", [
    ("claude", {}, []), ("claude", EVERYTHING, ["sandbox_mode", "verbose"]),
    ("claude", {"sandbox_mode": "full", "approval_mode": "auto"}, ["approval_mode"]),
    ("claude", {**EVERYTHING, "isolated": True}, [*AGENT_ONLY, "verbose"]),
    ("claude", {"effort": "none"}, []), ("claude", {"effort": "extreme"}, ["reasoning_effort"]),
    ("codex", {}, []), ("codex", EVERYTHING, ["max_tokens", "max_turns", "allowed_tools", "verbose", "thinking"]),
    ("codex", {**EVERYTHING, "isolated": True}, [*AGENT_ONLY, "max_tokens", "verbose", "thinking"]),
    ("codex", {"effort": "max"}, ["reasoning_effort"]),
    ("codex", {"resume": "T", "model": "m"}, []), ("codex", {"resume": "T", "system_prompt": "s"}, ["system_prompt"]),
    ("claude", {"resume": "C", "system_prompt": "s"}, []),
    ("gemini", {}, []), ("gemini", EVERYTHING, ["max_turns", "allowed_tools", "verbose", "reasoning_effort", "thinking",
                                                "max_tokens", "system_prompt"]),
    ("gemini", {**EVERYTHING, "isolated": True}, [*AGENT_ONLY, "verbose", "reasoning_effort", "thinking"]),
    ("gemini", {"max_tokens": 5, "model": "flash", "isolated": True}, ["max_tokens"]),
    ("gemini", {"max_tokens": 5, "isolated": True}, ["max_tokens"]),
    ("mine", EVERYTHING, ["model", *AGENT_ONLY, "max_tokens", "verbose", "reasoning_effort", "thinking"]),
    ("echo", {"model": "m", "max_tokens": 5}, ["model", "max_tokens"])])
def test_fields_that_a_cli_can_not_honour_are_named(name: str, fields: Any, names: List[str], tmp_path: Path) -> None:
    config = config_of(tmp_path / "home", backends={"mine": {"command": "mine"}})
    ignored = backend_of(name, config).ignored(request_of(name, **fields))
    assert sorted(ignored) == sorted(names)


MILLION = clinvk.Codex.LONGEST


@pytest.mark.parametrize("name, prompt, reason", [
    ("claude", " \n\t", "blank"), ("codex", "\u3000", "blank"), ("gemini", "\n", "blank"), ("claude", "/cost", ""),
    ("claude", "-x", ""), ("codex", "help", ""), ("codex", "x" * MILLION, ""),
    ("codex", "x" * (MILLION + 1), "1048576"), ("claude", "x" * (MILLION + 1), ""), ("gemini", "/help", "/help"),
    ("gemini", "/about me", "/about"), ("gemini", "  /memory show", "/memory"), ("gemini", "$ restore", "/restore"),
    ("gemini", "\ufeff/init", "/init"), ("gemini", "/\ufeffinit", "/init"), ("gemini", "/init\ufeff", "/init"),
    ("gemini", "/init\nnow", "/init"), ("gemini", "/extensions", "/extensions"), ("gemini", "/helpful", ""),
    ("gemini", "/cost", ""), ("gemini", "see /help", ""), ("gemini", "@file", "")])
def test_prompts_that_a_cli_can_not_be_given_are_refused_with_the_reason(name: str, prompt: str, reason: str,
                                                                         config: Config) -> None:
    refusal = backend_of(name, config).refuses(request_of(name, prompt))
    assert (reason in refusal) if reason else (refusal == "")


def test_a_word_that_gemini_takes_for_a_command_passes_behind_a_system_prompt(config: Config) -> None:
    assert backend_of("gemini", config).refuses(request_of("gemini", "/help", system_prompt="Be brief.")) == ""
    assert "/help" in backend_of("gemini", config).refuses(request_of("gemini", "me", system_prompt="/help"))


# ---- gemini's home

def written(home: Path, **files: str) -> Path:
    """A user's `~/.gemini`; `a__b` is the file a.b."""
    (home / ".gemini").mkdir(parents=True)
    for name, text in files.items():
        (home / ".gemini" / name.replace("__", ".")).write_text(text)
    return home / ".gemini"


OAUTH = '{"security": {"auth": {"selectedType": "oauth-personal"}}, "mcpServers": {"evil": {}}} // mine\n'


def test_the_model_way_of_gemini_sees_the_login_our_settings_and_nothing_else(tmp_path: Path) -> None:
    config = config_of(tmp_path / "home")
    users = written(tmp_path / "home", settings__json=OAUTH, oauth_creds__json='{"refresh_token": "r"}',
                    GEMINI__md="SECRET", trustedFolders__json="{}", google_accounts__json="{}")
    (tmp_path / "home" / ".env").write_text("GEMINI_API_KEY=k")
    request = request_of("gemini", isolated=True, model="gemini-2.5-pro", max_tokens=77, system_prompt="Be brief.")
    backend = backend_of("gemini", config)
    command = backend.command(request)
    home = backend.scratch
    assert home and command.env["GEMINI_CLI_HOME"] == command.env["TMPDIR"] == str(home)
    assert sorted(path.name for path in home.iterdir()) == [".env", ".gemini", "system.md"]
    inside = {path.name: path for path in (home / ".gemini").iterdir()}
    assert sorted(inside) == ["google_accounts.json", "oauth_creds.json", "settings.json"]
    assert inside["oauth_creds.json"].resolve() == users / "oauth_creds.json"
    settings = json.loads(inside["settings.json"].read_text())
    assert settings.pop("security") == {"auth": {"selectedType": "oauth-personal"}}
    assert settings.pop("modelConfigs")["overrides"] == [{"match": {"model": "gemini-2.5-pro"}, "modelConfig": {
        "generateContentConfig": {"maxOutputTokens": 77}}}]
    assert settings["tools"] == {"core": ["none"]} and settings["hooksConfig"] == {"enabled": False}
    assert "mcpServers" not in settings
    assert command.env["GEMINI_SYSTEM_MD"] == str(home / "system.md")
    assert not any(Path(command.env[f"GEMINI_CLI_SYSTEM_{kind}_PATH"]).exists() for kind in ("SETTINGS", "DEFAULTS"))
    assert (home / "system.md").read_text() == "Be brief."
    assert (home.stat().st_mode & 0o777, (home / ".gemini").stat().st_mode & 0o777) == (0o700, 0o700)


def test_the_model_way_of_gemini_takes_the_users_model(tmp_path: Path) -> None:
    config = config_of(tmp_path / "home")
    written(tmp_path / "home", settings__json='/* mine */ {"model": {"name": "gemini-x"}, "url": "http://a//b"}')
    assert backend_of("gemini", config).command(request_of("gemini", isolated=True)).argv[-2:] == ["-m", "gemini-x"]
    assert "-m" not in backend_of("gemini", config).command(request_of("gemini")).argv


def test_the_agent_way_of_gemini_keeps_the_users_home(tmp_path: Path) -> None:
    config = config_of(tmp_path / "home")
    backend = backend_of("gemini", config)
    command = backend.command(request_of("gemini"))
    assert backend.scratch and list(backend.scratch.iterdir()) == []
    assert command.env["GEMINI_DEBUG_LOG_FILE"] == str(backend.scratch / "debug.log")
    assert {"GEMINI_CLI_HOME", "GEMINI_SYSTEM_MD"}.isdisjoint(command.env)


@pytest.mark.parametrize("files, logged_in", [
    ({"settings__json": OAUTH}, False), ({"settings__json": OAUTH, "oauth_creds__json": "{}"}, False),
    ({"settings__json": OAUTH, "oauth_creds__json": "not json"}, False),
    ({"settings__json": OAUTH, "oauth_creds__json": '{"refresh_token": "r"}'}, True),
    ({"settings__json": OAUTH, "gemini-credentials__json": "encrypted"}, True),
    ({"settings__json": '{"security": {"auth": {"selectedType": "gemini-api-key"}}}'}, True), ({}, True),
    ({"settings__json": "not json"}, True), ({"settings__json": "[]"}, True)])
def test_gemini_is_not_started_when_it_would_wait_for_a_login(files: Dict[str, str], logged_in: bool,
                                                              tmp_path: Path) -> None:
    config = config_of(tmp_path / "home")
    written(tmp_path / "home", **files)
    with contextlib.nullcontext() if logged_in else pytest.raises(BackendAuth, match="Run gemini once"):
        backend_of("gemini", config).command(request_of("gemini"))
    assert (config.home / "runs").exists() is logged_in


def substituted(template: str) -> str:
    """What gemini 0.61 makes of a system prompt file when there are neither skills nor sub-agents nor tools."""
    for variable in ("${AgentSkills}", "${SubAgents}"):
        template = template.replace(variable, "")
    return template.replace("${AvailableTools}", "No tools are currently available.")


@pytest.mark.parametrize("text", ["plain", "${AgentSkills}", "a ${SubAgents} b ${AgentSkills}${SubAgents}",
                                  "${Other} $ {}", "${AgentSkills", "${Sub${AgentSkills}Agents}"])
def test_a_system_prompt_reaches_gemini_to_the_letter(text: str) -> None:
    assert substituted(clinvk.literal(text)) == text


def test_the_tools_variable_in_a_system_prompt_is_not_replaced_by_gemini() -> None:
    assert substituted(clinvk.literal("use ${AvailableTools}!")).replace("\u2060", "") == "use ${AvailableTools}!"


@pytest.mark.parametrize("case, fields, kept", [
    ("plain", {}, ["another"]), ("plain", {"keeps": True}, ["another", "session"]),
    ("loaded", REQUESTS["gemini/loaded"], ["another", "ours"])])
def test_of_what_gemini_stores_only_a_kept_conversation_is_left(case: str, fields: Any, kept: List[str],
                                                                tmp_path: Path) -> None:
    config, chats = config_of(tmp_path / "home"), chats_of(tmp_path)
    backend, ears = asked("gemini", config, request_of("gemini", **fields))
    session = CONVERSATION if case == "loaded" else recorded("gemini", case)[1]["result"]["sessionId"]
    names = {"session": f"session-2026-{session[:8]}.jsonl", "first": f"session-2026-{backend.first_session[:8]}.jsonl",
             "ours": f"session-clinvk-{session}.jsonl", "another": "session-2026-12345678.jsonl"}
    for name in names if case == "loaded" else ("session", "first", "another"):
        (chats / names[name]).write_text("{}")
    hear(backend, ears, [(LINES / "gemini" / f"{case}.jsonl").read_bytes()])
    backend.clean_up()
    assert sorted(path.name for path in chats.iterdir()) == sorted(names[name] for name in kept)


def test_gemini_forgets_all_of_a_session_and_nothing_of_another(tmp_path: Path) -> None:
    chats = chats_of(tmp_path)
    backend = backend_of("gemini", config_of(tmp_path / "home"))
    others = ["session-clinvk-12345678-eb91-4045-a199-5659ec3ffa7a.jsonl", "session-2026-11-25T03-45-12345678.jsonl"]
    for name in (f"session-clinvk-{CONVERSATION}.jsonl", f"session-2026-11-25T03-45-{CONVERSATION[:8]}.jsonl",
                 f"session-2026-11-25T03-46-{CONVERSATION[:8]}.jsonl", *others):
        (chats / name).write_text("{}")
    for _ in range(2):  # what is not there any more is forgotten
        backend.forget(CONVERSATION, lambda *args: b"never called")
        assert sorted(path.name for path in chats.iterdir()) == sorted(others)


def test_a_429_that_gemini_only_writes_to_its_debug_log_ends_the_run(tmp_path: Path) -> None:
    backend = backend_of("gemini", config_of(tmp_path / "home"))
    assert list(backend.look(Ears())) == []
    backend.command(request_of("gemini"))
    scratch = backend.scratch
    assert scratch and list(backend.look(Ears())) == []
    shutil.copy(LINES / "gemini" / "error_429.stderr", scratch / "debug.log")
    with pytest.raises(RateLimited):
        list(backend.look(Ears()))


@pytest.mark.parametrize("line", [b"Please visit: https://accounts.google.com/o/oauth2/v2/auth?x=1",
                                  b"Enter the authorization code: "])
def test_gemini_that_asks_for_a_login_on_stdout_is_ended(line: bytes, config: Config) -> None:
    backend, ears = asked("gemini", config, request_of("gemini"))
    assert hear(backend, ears, [line + b"\n"]) == []
    assert ears.steps[-1][0] == "raises" and ears.steps[-1][1]["error"] == "BackendAuth"


# ---- codex's home

# A codex that answers config/read with the JSON in its CODEX_HOME/answer, and notes that it was asked.
READS_CONFIG = """
home = os.environ.get("CODEX_HOME") or os.path.join(os.environ["HOME"], ".codex")
open(os.path.join(home, "asked"), "a").write("x")
for line in sys.stdin:
    call = json.loads(line)
    if call.get("method") == "initialize":
        print(json.dumps({"id": 1, "result": {}}), flush=True)
    elif call.get("method") == "config/read":
        answer = json.load(open(os.path.join(home, "answer")))
        print(json.dumps({"id": 2, **answer}, separators=(",", ":")), flush=True)
"""


@contextlib.contextmanager
def asking(seconds: float = 20) -> Iterator[clinvk.OutputOf]:
    """The real `output_of`, for commands that end within some seconds."""
    children = clinvk.Children(2**20)
    try:
        yield functools.partial(clinvk.output_of, children, clinvk.Stop().allow(seconds))
    finally:
        children.wait_until_gone(5)
        getattr(children, "dismiss_heir", lambda: None)()


@dataclasses.dataclass
class CodexUser:
    """A user of codex: `config.toml` is a file, and codex says that it means `layers`."""
    config: Config
    program: str
    home: Path

    def means(self, *layers: Tuple[str, Any], text: str = "model = 1\n") -> None:
        found = [{"name": {"type": kind}, "config": content} for kind, content in layers]
        (self.home / "answer").write_text(json.dumps({"result": {"layers": found}}))
        (self.home / "config.toml").write_text(text)

    def prepare(self) -> str:
        """clinvk's own config.toml after a run has been prepared."""
        with asking() as output_of:
            backend = backend_of("codex", self.config, [self.program])
            backend.prepare(request_of("codex", isolated=True, workdir=str(self.home)), output_of)
        return (self.config.home / "codex" / "config.toml").read_text()

    @property
    def asked(self) -> int:
        return len((self.home / "asked").read_text()) if (self.home / "asked").exists() else 0


@pytest.fixture
def codex_user(tmp_path: Path, fake_cli: Callable[..., str]) -> CodexUser:
    config = config_of(tmp_path / "home")
    (tmp_path / "home" / ".codex").mkdir()
    return CodexUser(config, fake_cli(READS_CONFIG, "codex"), tmp_path / "home" / ".codex")


def tomllib() -> types.ModuleType:
    module: types.ModuleType = pytest.importorskip("tomllib")  # Python 3.11
    return module


def test_the_model_way_of_codex_keeps_model_and_provider_of_the_user_and_nothing_else(codex_user: CodexUser) -> None:
    provider = {"stub": {"name": "Stub \u00e9", "base_url": "http://x/v1", "env_key": None, "n": 1, "ok": True}}
    users = {"model": "m1", "model_providers": provider, "mcp_servers": {"evil": {}}, "web_search": "live"}
    codex_user.means(("user", users))
    found = tomllib().loads(codex_user.prepare())
    del provider["stub"]["env_key"]
    assert found == {**clinvk.Codex.ISOLATED, "model": "m1", "model_providers": provider}
    assert found["features"]["shell_tool"] is False and found["project_doc_max_bytes"] == 0
    own = codex_user.config.home / "codex"
    assert (own.stat().st_mode & 0o777, (own / "config.toml").stat().st_mode & 0o777) == (0o700, 0o600)


def test_layers_of_codexs_config_count_in_order_and_a_projects_not_at_all(codex_user: CodexUser) -> None:
    codex_user.means(("project", {"model": "evil", "model_provider": "evil"}),
                     ("user", {"model": "users", "profile": "p", "profiles": {"p": {"model_verbosity": "low"}}}),
                     ("system", {"model": "systems", "service_tier": "flex"}))
    found = tomllib().loads(codex_user.prepare())
    assert (found["model"], found["service_tier"], found["model_verbosity"]) == ("users", "flex", "low")
    assert "model_provider" not in found


def test_codex_is_asked_for_its_config_only_after_that_has_changed(codex_user: CodexUser) -> None:
    first = codex_user.prepare()
    assert codex_user.asked == 0 and first.startswith("# from nothing")
    codex_user.means(("user", {"model": "m1"}))
    assert codex_user.prepare() == codex_user.prepare() and codex_user.asked == 1
    codex_user.means(("user", {"model": "m2"}), text="model = 2  # changed\n")
    assert 'model" = "m2"' in codex_user.prepare() and codex_user.asked == 2


def test_codexs_login_is_linked_for_as_long_as_it_exists(codex_user: CodexUser) -> None:
    users, own = codex_user.home / "auth.json", codex_user.config.home / "codex" / "auth.json"
    codex_user.prepare()
    assert not os.path.lexists(own)
    users.write_text("{}")
    codex_user.prepare()
    assert own.is_symlink() and own.resolve() == users
    users.unlink()
    codex_user.prepare()
    assert not os.path.lexists(own)


@pytest.mark.parametrize("answer, reason", [({"error": {"code": -1, "message": "bad toml at line 3"}}, "bad toml"),
                                            (None, "did not answer")])
def test_a_config_that_codex_can_not_read_fails_the_run(answer: Any, reason: str, codex_user: CodexUser) -> None:
    codex_user.means()
    (codex_user.home / "answer").write_text(json.dumps(answer) if answer else "no JSON: codex ends")
    with pytest.raises(BackendFailed, match=reason):
        codex_user.prepare()
    assert not (codex_user.config.home / "codex" / "config.toml").exists()


def test_the_agent_way_of_codex_prepares_nothing(codex_user: CodexUser) -> None:
    codex_user.means()
    backend_of("codex", codex_user.config).prepare(request_of("codex"), lambda *args: b"never called")
    assert not (codex_user.config.home / "codex").exists()


def random_json(chance: random.Random, depth: int = 0) -> Any:
    kinds = ["text", "int", "bool", "float", *(["list", "dict"] if depth < 3 else [])]
    kind = chance.choice(kinds)
    letters = "ab \"\\\n\t\r\x00\x1f\x7f\u00e9\u2028\U0001f680'#=[]{}.-"
    text = "".join(chance.choice(letters) for _ in range(chance.randrange(9)))
    if kind in ("list", "dict"):
        items = [random_json(chance, depth + 1) for _ in range(chance.randrange(4))]
        return items if kind == "list" else {f"{text}{n}": item for n, item in enumerate(items)}
    return {"text": text, "int": chance.randrange(-10**6, 10**6), "bool": chance.random() < 0.5,
            "float": chance.choice([0.5, -1e300, 1e-7, 3.0])}[kind]


def test_any_json_value_survives_as_toml() -> None:
    chance = random.Random(3)
    for _ in range(300):
        value = random_json(chance)
        assert tomllib().loads(f"{clinvk.toml('a key')} = {clinvk.toml(value)}\n") == {"a key": value}


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def native_place() -> Tuple[str, str]:
    arm = platform.machine().lower() in ("aarch64", "arm64")
    system, vendor = ("darwin", "apple-darwin") if sys.platform == "darwin" else ("linux", "unknown-linux-musl")
    return f"codex-{system}-{'arm64' if arm else 'x64'}", f"vendor/{'aarch64' if arm else 'x86_64'}-{vendor}/bin/codex"


@pytest.mark.parametrize("base", ["codex/node_modules/@openai/{name}", "{name}", "codex"])
def test_the_binary_behind_npms_wrapper_is_found(base: str, tmp_path: Path) -> None:
    name, inner = native_place()
    scope = tmp_path / "lib" / "node_modules" / "@openai"
    script = executable(scope / "codex" / "bin" / "codex.js")
    wrapper = tmp_path / "bin" / "codex"
    wrapper.parent.mkdir()
    wrapper.symlink_to(script)
    assert clinvk.native_codex(str(wrapper)) == str(wrapper)
    binary = executable(scope / base.format(name=name) / inner)
    assert clinvk.native_codex(str(wrapper)) == str(binary)
    binary.chmod(0o644)
    assert clinvk.native_codex(str(wrapper)) == str(wrapper)


def test_a_codex_that_is_no_npm_wrapper_is_taken_as_it_is(tmp_path: Path) -> None:
    executable(tmp_path / native_place()[1])
    plain = executable(tmp_path / "bin" / "codex")
    assert clinvk.native_codex(str(plain)) == str(plain)


# ---- Finding them, and what they say their version is

def test_a_program_is_looked_for_on_the_backends_own_path(tmp_path: Path) -> None:
    found = executable(tmp_path / "bin" / "claude")
    backends = {"claude": {"env": {"PATH": str(tmp_path / "bin")}}, "gemini": {"command": ["claude", "--gem"]},
                "mine": {"command": [str(found), "-p"]}}
    config = config_of(tmp_path / "home", backends=backends, PATH="/nowhere")
    assert clinvk.Claude.find("claude", config) == [str(found)]
    assert clinvk.Gemini.find("gemini", config) is None
    assert clinvk.Text.find("mine", config) == [str(found), "-p"]
    assert clinvk.Echo.find("echo", config) == []


@pytest.mark.parametrize("printed, version", [("2.1.197 (Claude Code)", "2.1.197"), ("codex-cli 0.169.0", "0.169.0"),
                                              ("1.2.3-rc.1\n", "1.2.3-rc.1"), ("unknown", ""), ("", "")])
def test_a_version_is_what_the_cli_prints(printed: str, version: str, config: Config) -> None:
    def output_of(command: clinvk.Command, said: bytes, until: bytes) -> bytes:
        return subprocess.run([*command.argv[:-1], printed], stdout=subprocess.PIPE, env=command.env).stdout
    assert clinvk.Claude.version_of("claude", ["/bin/echo"], config, output_of) == version


# ---- Ends without an answer

@pytest.mark.parametrize("name, code, stderr, error", [
    ("claude", 1, "", BackendFailed), ("claude", 0, "odd", BackendFailed), ("codex", 1, "boom", BackendFailed),
    ("claude", 1, "Invalid API key \u00b7 Please run /login", BackendAuth),
    ("gemini", 41, "Please set an Auth method", BackendAuth), ("gemini", 1, "real", BackendFailed)])
def test_a_cli_that_goes_without_an_end_has_failed(name: str, code: int, stderr: str, error: Any,
                                                   config: Config) -> None:
    failure, done = backend_of(name, config).at_end(code, stderr)
    assert (type(failure.error), done) == (error, Done(code or 1))


@pytest.mark.parametrize("name, stderr, reason", [
    ("codex", "WARNING: proceeding, could not update PATH\nboom\n", "boom"),
    ("codex", "Reading prompt from stdin...", ""),
    ("gemini", "\x1b[33m[STARTUP] phase\x1b[0m\nRipgrep is not available.\n\n256-color\nreal\n", "real"),
    ("claude", "[claude-code:unrecoverable-error]\nreal\nreason", "real\nreason"), ("mine", "256-color", "256-color"),
    ("claude", "\x1b[1;31mred\x1b[0m", "red"), ("claude", "x" * 9999, "x" * 4000)])
def test_what_a_cli_always_writes_to_stderr_is_no_reason(name: str, stderr: str, reason: str) -> None:
    assert clinvk.quiet(stderr, clinvk.kind_of(name).noise) == reason


# ---- Text and echo

@pytest.fixture
def text_backend(tmp_path: Path) -> Any:
    config = config_of(tmp_path / "home", backends={"mine": {"command": ["mine", "-q"]}})
    return backend_of("mine", config, ["/bin/mine", "-q"])


@pytest.mark.parametrize("data, text", [
    ("h\u00e9llo \u4f60 \U0001f680".encode(), "h\u00e9llo \u4f60 \U0001f680"), (b"", ""), (b"a\xffb", "a\ufffdb"),
    (b"cut \xe4\xbd", "cut \ufffd"), (b"{}\n\n", "{}\n\n")])
@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_text_cli_answers_with_all_it_prints(data: bytes, text: str, size: int, text_backend: Any) -> None:
    events = [*hear(text_backend, Ears(), pieces(data, size)), *text_backend.at_end(0, "")]
    assert (text_of(events), events[-1]) == (text, Done(0))
    assert [event.opens for event in events[:-1]] == [True, *[False] * (len(events) - 2)][:len(events) - 1]


def test_a_text_cli_that_fails_is_a_failure_with_its_exit_code(text_backend: Any) -> None:
    failure, done = text_backend.at_end(3, "no such model\n")
    assert (type(failure.error), done) == (BackendFailed, Done(3))


@pytest.mark.parametrize("prompt", ["-x", "\u4f60\n", "half a pair: \ud83d"])
def test_a_text_cli_gets_the_prompt_on_stdin_and_then_its_end(prompt: str, text_backend: Any) -> None:
    ears = Ears()
    text_backend.greet(ears)
    text_backend.ask(request_of("mine", prompt), ears)
    assert ears.steps == [["says", prompt.encode("utf-8", "replace").decode()], ["end of input", {}]]
    told = Ears()
    text_backend.ask(request_of("mine", prompt, system_prompt="Be brief."), told)
    assert told.said == [f"Be brief.\n\n{ears.said[0]}"]
    assert text_backend.command(request_of("mine", prompt, extra=["-v"])).argv == ["/bin/mine", "-q", "-v"]


@pytest.mark.parametrize("prompt", ["one", "two words", "  lead", "trail  ", "a\n\n  b\tc ", " ",
                                    "\u4f60 \U0001f680", "a" * 9999])
def test_echo_answers_with_the_prompt_word_by_word(prompt: str, config: Config) -> None:
    events = list(backend_of("echo", config).answer(request_of("echo", prompt)))
    words = [event for event in events if isinstance(event, Message)]
    assert (text_of(events), events[-1]) == (prompt, Done(0, turn_count=1))
    assert all(len(word.text.split()) <= 1 for word in words)
    assert [word.opens for word in words] == [n == 0 for n in range(len(words))]


# ---- Files for the model way

def test_scratch_directories_of_servers_that_are_gone_are_swept(config: Config) -> None:
    """A number may be ours again, in a container."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    runs = clinvk.scratch_directory(config).parent  # with one of a server that had our number
    others = [f"{os.getppid()}-abc", "notes-x"]
    for name in (f"{ended.pid}-abc", *others):
        (runs / name).mkdir()
    clinvk.sweep(config)
    assert sorted(path.name for path in runs.iterdir()) == sorted(others)


@pytest.mark.parametrize("name", ["claude", "codex", "gemini"])
def test_what_a_cli_has_taken_in_is_of_its_day(name: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = []
    for zone in ("UTC-14", "UTC-14", "UTC+12"):  # POSIX signs: 26 hours lie between them
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        stamps.append(backend_of(name, config).stamps(request_of(name)))
    monkeypatch.undo()
    time.tzset()
    assert stamps[0] == stamps[1] != stamps[2]


@pytest.mark.parametrize("schema, told", [
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "null"}}}, True),
    ({"type": "object", "properties": {"a": {"$ref": "#/components/b"}}, "components": {"b": {"type": "null"}}}, False),
    ({"type": "object", "properties": {"a": {"$ref": "#b"}}, "$defs": {"b": {"$anchor": "b"}}}, False)])
def test_claude_is_told_no_schema_of_which_a_part_would_be_left_out_that_it_refers_to(schema: Any, told: bool,
                                                                                   config: Config) -> None:
    assert clinvk.schema_faults(schema) == []
    assert (backend_of("claude", config).schema_for(schema) == schema) is told
    assert told or backend_of("claude", config).schema_for(schema) is None
