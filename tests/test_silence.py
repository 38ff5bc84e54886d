"""What a stream's client is told while a run goes on of which it is shown nothing, so that it keeps the connection."""
from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import executable

import clinvk
from clinvk import Done, Message, Refusal, Thinking, ToolResult, ToolUse

# Says a word every 0.05 s until it has been heard; together they are JSON.
SLOW = """
sys.stdin.read()
ends = time.monotonic() + 30
print("{", end="", flush=True)
while not os.path.exists(%r) and time.monotonic() < ends:
    print(" ", end="", flush=True)
    time.sleep(0.05)
print("}", end="", flush=True)
"""
# claude, which prints what is no part of an answer until a file is there: a tool's input as it grows, and news.
BUSY = """
def show(**line): print(json.dumps(line), flush=True)
for line in sys.stdin:
    if json.loads(line)["type"] == "user":
        show(type="system", subtype="init", model="m", session_id="s", cwd="/")
        ends = time.monotonic() + 30
        while not os.path.exists(%r) and time.monotonic() < ends:
            show(type="stream_event", event={"type": "content_block_delta", "index": 1, "delta": {
                "type": "input_json_delta", "partial_json": "x"}})
            show(type="system", subtype="news")
            time.sleep(0.05)
        show(type="assistant", message={"id": "m", "model": "m", "content": [{"type": "text", "text": "{}"}]})
        show(type="result", subtype="success", is_error=False, result="{}", stop_reason="end_turn", num_turns=1,
             usage={"input_tokens": 1, "output_tokens": 1}, modelUsage={"m": {}})
"""
FORMAT: Dict[str, Any] = {"type": "json_schema", "name": "any", "schema": {"type": "object"}}
STREAMS = [  # a path, its body, and what stands in its stream for silence
    ("/openai/v1/chat/completions", {"messages": [{"role": "user", "content": "p"}],
                                     "response_format": {"type": "json_object"}}, b": keepalive\n\n"),
    ("/openai/v1/responses", {"input": "p", "text": {"format": FORMAT}}, b"event: response.in_progress\n"),
    ("/anthropic/v1/messages", {"messages": [{"role": "user", "content": "p"}], "max_tokens": 9,
                                "output_config": {"format": FORMAT}}, b"event: ping\n")]


def until_heard(make_client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, script: str,
                sign: bytes) -> Any:
    """A client whose backend of that name speaks until three signs of life have come, and `heard` is in the folder."""
    monkeypatch.setattr(clinvk, "SILENCE", 0.2)
    command = executable(folder / name, script % str(folder / "heard"))
    client = make_client({"backends": {name: {"command": command}}})
    answer = client.app

    def app(*asked: Any) -> Iterator[bytes]:
        """The answer, after three signs of which the CLI may end its own."""
        signs = 0
        with contextlib.closing(answer(*asked)) as chunks:
            for chunk in chunks:
                signs += sign in chunk
                if signs == 3:
                    (folder / "heard").touch()
                yield chunk
    client.app = app
    return client


@pytest.mark.parametrize("path, body, sign", STREAMS)
def test_json_that_takes_its_time_is_announced_by_signs_of_life(
        make_client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str,
        body: Dict[str, Any], sign: bytes) -> None:
    client = until_heard(make_client, monkeypatch, tmp_path, "slow", SLOW, sign)
    reply = client.call("POST", path, {"model": "slow", "stream": True, **body})
    assert reply.status == 200 and (tmp_path / "heard").exists()
    answered = re.search(rb"\{ +\}", reply.body)
    assert answered and reply.body.count(sign, 0, answered.start()) > 2


NATIVE: Tuple[str, Dict[str, Any], bytes] = (
    "/api/v1/prompt", {"backend": "claude", "prompt": "p", "output_format": "stream-json", "ephemeral": True},
    b'"type":"progress"')


@pytest.mark.parametrize("path, body, sign", [*STREAMS, NATIVE])
def test_a_cli_that_prints_what_is_no_part_of_the_answer_is_silent_to_the_client(
        make_client: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str,
        body: Dict[str, Any], sign: bytes) -> None:
    client = until_heard(make_client, monkeypatch, tmp_path, "claude", BUSY, sign)
    compat = {} if path == NATIVE[0] else {"model": "claude", "stream": True}
    assert client.call("POST", path, {**compat, **body}).status == 200 and (tmp_path / "heard").exists()


def heard(kind: Any, events: List[clinvk.Event], monkeypatch: pytest.MonkeyPatch) -> List[type]:
    """The types of the events, once the streams of an API have been seen to; each event comes after 0.1 s."""
    clock = iter(range(1000))
    monkeypatch.setattr(clinvk.time, "monotonic", lambda: next(clock) / 10)
    monkeypatch.setattr(clinvk, "SILENCE", 0.25)
    told = clinvk.never_silent((clinvk.Told(0, event) for event in events), kind.shown)
    return [type(one.event) for one in told]


TOOLS = [ToolUse("1", "t", {}), ToolResult("1", "t", "")] * 8


@pytest.mark.parametrize("kind, events, signs", [
    (clinvk.OpenAI, TOOLS, True), (clinvk.Anthropic, TOOLS, True), (clinvk.Responses, TOOLS, True),
    (clinvk.Completions, [Thinking("a")] * 16, True),
    *((kind, [event] * 16, False) for kind in (clinvk.OpenAI, clinvk.Anthropic, clinvk.Responses)
      for event in (Message("a"), Thinking("a"), Refusal("a")))])
def test_what_a_client_is_not_shown_is_silence(kind: Any, events: List[clinvk.Event], signs: bool,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    types = heard(kind, [*events, Done(0)], monkeypatch)
    assert [each for each in types if each is not clinvk.Progress] == [*map(type, events), Done]
    assert (types.count(clinvk.Progress) > 2) is signs
