"""Sessions: turns that are stored and gone on with, the endpoints that show them, and a database that outlives its
servers. The CLIs are scripted; the servers, sockets, processes and SQLite are real."""

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple, Union

import clinvk
import pytest
from conftest import Client, Reply, Served, alive, eventually

LINES = Path(__file__).parent / "lines" / "claude"
FIELDS = {"id", "backend", "created_at", "last_used", "working_dir", "model", "initial_prompt", "status", "turn_count",
          "token_usage", "tags", "title", "backend_session_id", "metadata", "error_message"}
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
STOPPED = "server stopped during the run"
CLAUDES_NAME = "561392ff-7ebc-4f36-99df-42b616441383"  # what plain.jsonl calls its conversation

# Both scripted CLIs write down what they were told. At a prompt that begins with "hold" they wait for a file called go;
# with "family" in it, they leave a process of their own behind.
TOLD = f"""
HERE = os.path.dirname(os.path.abspath(__file__))
LINES = {str(LINES)!r}
def told(prompt):
    family = [os.getpid()]
    if "family" in prompt:
        family.append(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    about = dict(prompt=prompt, argv=sys.argv[1:], cwd=os.getcwd(), family=family)
    with open(HERE + "/told", "a") as file:
        file.write(json.dumps(about) + chr(10))
    while prompt.startswith("hold") and not os.path.exists(HERE + "/go"):
        time.sleep(0.01)
"""
TEXT = TOLD + """
prompt = sys.stdin.read()
print("said:", flush=True)
told(prompt)
if prompt.startswith("fail"):
    sys.exit("it broke")
print(prompt, end="")
"""
# Answers with the recorded lines that the prompt names, else with those of plain.jsonl.
CLAUDE = TOLD + """
if "--version" in sys.argv:
    sys.exit()
asked = json.loads(next(line for line in sys.stdin if '"type": "user"' in line))
prompt = asked["message"]["content"][0]["text"]
case = prompt if os.path.exists(f"{LINES}/{prompt}.jsonl") else "plain"
lines = open(f"{LINES}/{case}.jsonl").readlines()
begun = 1 + max([i for i, line in enumerate(lines) if '"subtype":"init"' in line], default=-1)
print("".join(lines[:begun]), end="", flush=True)
told(prompt)
print("".join(lines[begun:]), end="", flush=True)
"""

# Fails with a text that was cut in the middle of an emoji.
CUT = r"""
for line in sys.stdin:
    if '"type": "user"' in line:
        print(r'{"type": "result", "is_error": true, "session_id": "\ud83d", "result": "it broke \ud83d"}', flush=True)
        break
"""

AnyServer = Union[Client, Served]


def ask(server: AnyServer, prompt: str = "hello", backend: str = "echo", **fields: Any) -> Reply:
    return server.call("POST", "/api/v1/prompt", {"backend": backend, "prompt": prompt, **fields})


def begin(server: AnyServer, prompt: str = "hello", backend: str = "echo", **fields: Any) -> str:
    """The id of a new session."""
    reply = ask(server, prompt, backend, **fields)
    assert reply.status == 200, reply.body
    return str(reply.json["session_id"])


def listed(server: AnyServer, query: str = "") -> List[Dict[str, Any]]:
    reply = server.call("GET", f"/api/v1/sessions{query}")
    assert reply.status == 200, reply.body
    found: List[Dict[str, Any]] = reply.json["sessions"]
    return found


def shown(server: AnyServer, name: str) -> Dict[str, Any]:
    reply = server.call("GET", f"/api/v1/sessions/{name}")
    assert reply.status == 200, reply.body
    found: Dict[str, Any] = reply.json
    return found


def only(server: AnyServer) -> Dict[str, Any]:
    """The one session that there is."""
    [session] = listed(server)
    return session


def told(folder: Path) -> List[Dict[str, Any]]:
    """What the scripted CLIs have been told so far."""
    file = folder / "told"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def await_told(folder: Path, times: int = 1) -> Dict[str, Any]:
    eventually(lambda: len(told(folder)) == times)
    return told(folder)[-1]


def sql(file: Path, statement: str, *values: Any) -> List[Any]:
    """What a statement gives, over a connection of the test's own."""
    with contextlib.closing(sqlite3.connect(str(file), timeout=10)) as db, db:
        return db.execute(statement, values).fetchall()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def scripted(fake_cli: Callable[..., str]) -> Dict[str, Any]:
    """A config with two scripted CLIs: "it", which prints text and has no memory, and claude, which has one."""
    return {"backends": {"it": {"command": fake_cli(TEXT, "it")}, "claude": {"command": fake_cli(CLAUDE, "claude")}}}


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Where the servers of `serve` keep their sessions."""
    return tmp_path / "home" / ".clinvk" / "sessions.db"


@pytest.fixture
def clients_database(tmp_path: Path) -> Path:
    """Where those of `client` and `make_client` do."""
    return tmp_path / "clinvk" / "sessions.db"


@pytest.fixture
def meanwhile(serve: Callable[..., Served]) -> Iterator[Callable[..., "Future[Reply]"]]:
    """`meanwhile(ask, server, ...)` asks in a thread of its own; its `.result()` is the answer."""
    pool = ThreadPoolExecutor(8)
    yield pool.submit
    pool.shutdown(wait=False)


# ---- What is stored

def test_a_prompt_is_stored_as_a_session(make_client: Callable[..., Client], tmp_path: Path) -> None:
    client = make_client({"session": {"default_tags": ["work", "laptop"]}})
    reply = ask(client, "\n  Hello there \nand more", workdir=str(tmp_path), metadata={"ticket": "7"})
    session = shown(client, reply.json["session_id"])
    times = [session.pop("created_at"), session.pop("last_used")]
    assert session == {
        "id": reply.json["session_id"], "backend": "echo", "working_dir": str(tmp_path), "model": "echo",
        "initial_prompt": "\n  Hello there \nand more", "status": "completed", "turn_count": 1,
        "token_usage": {"input_tokens": 0, "output_tokens": 0, "cached_tokens": 0, "reasoning_tokens": 0},
        "tags": ["work", "laptop", "api"], "title": "Hello there", "backend_session_id": "",
        "metadata": {"ticket": "7"}, "error_message": ""}
    assert re.fullmatch("[0-9a-f]{32}", session["id"]) and set(session) | {"created_at", "last_used"} == FIELDS
    assert all(re.fullmatch(TIME, text) for text in times) and times == sorted(times)
    assert clinvk.utc(time.time() - 60) < times[0] < clinvk.utc(time.time() + 60)


def test_a_session_has_what_its_cli_says(make_client: Callable[..., Client], scripted: Dict[str, Any]) -> None:
    client = make_client(scripted)
    session = shown(client, begin(client, backend="claude"))
    assert (session["model"], session["backend_session_id"]) == ("claude-haiku-4-5", CLAUDES_NAME)
    assert session["token_usage"] == {"input_tokens": 101, "output_tokens": 12, "cached_tokens": 40,
                                      "reasoning_tokens": 0}


def test_the_model_that_was_asked_for_is_the_sessions(make_client: Callable[..., Client],
                                                      scripted: Dict[str, Any]) -> None:
    client = make_client(scripted)
    assert shown(client, begin(client, backend="claude", model="small"))["model"] == "small"


@pytest.mark.parametrize("prompt, title", [
    ("one line", "one line"), ("\n \t\r\n  second line  \nthird", "second line"), ("x" * 51, "x" * 50),
    ("é" * 80 + "\nmore", "é" * 50)])
def test_the_title_is_the_first_line_that_says_something(client: Client, prompt: str, title: str) -> None:
    assert shown(client, begin(client, prompt))["title"] == title


@pytest.mark.parametrize("backend", ["echo", "it", "claude"])
def test_an_ephemeral_run_leaves_no_session(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path, backend: str) -> None:
    client = make_client(scripted)
    reply = ask(client, "hello", backend, ephemeral=True, metadata={"a": "b"})
    assert (reply.status, "session_id" in reply.json, reply.json["ignored"]) == (200, False, ["metadata"])
    assert listed(client) == []
    assert [("--no-session-persistence" in run["argv"]) for run in told(tmp_path)] == (
        [] if backend == "echo" else [backend == "claude"])


def test_a_clis_own_store_is_used_if_the_run_is_kept(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path) -> None:
    begin(make_client(scripted), backend="claude")
    assert "--no-session-persistence" not in told(tmp_path)[0]["argv"]


def test_metadata_that_is_stored_is_not_ignored(client: Client) -> None:
    assert "ignored" not in ask(client, metadata={"a": "b"}).json


@pytest.mark.parametrize("backend", ["echo", "it", "claude"])
def test_a_dry_run_stores_nothing(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path, backend: str) -> None:
    client = make_client(scripted)
    reply = ask(client, backend=backend, dry_run=True)
    assert (reply.status, "session_id" in reply.json, listed(client), told(tmp_path)) == (200, False, [], [])


def test_a_dry_run_shows_no_system_prompt_but_its_own(make_client: Callable[..., Client],
                                                      scripted: Dict[str, Any]) -> None:
    scripted["backends"]["claude"]["system_prompt"] = "of the config"
    client = make_client(scripted)
    name = begin(client, backend="claude", system_prompt="of the session")
    for fields, shown in (({}, "<system prompt>"), ({"session_id": name}, "<system prompt>"),
                          ({"system_prompt": "my own"}, "my own"),
                          ({"session_id": name, "system_prompt": "my own"}, "my own")):
        plan = ask(client, backend="claude", dry_run=True, **fields).json["output"]
        assert f'"appendSystemPrompt": "{shown}"' in plan and "of the" not in plan


def test_a_dry_run_of_a_further_turn_changes_nothing(client: Client) -> None:
    before = shown(client, begin(client))
    assert ask(client, "more", session_id=before["id"], dry_run=True, metadata={"a": "b"}).status == 200
    assert shown(client, before["id"]) == before


def test_what_the_compat_apis_run_is_not_stored(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path) -> None:
    client = make_client({**scripted, "server": {"compat_mode": "agent"}})
    asked = {"model": "it", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    for path in ("/openai/v1/chat/completions", "/anthropic/v1/messages"):
        for more in ({}, {"stream": True}, {"clinvk": {"workdir": str(tmp_path)}}):
            assert client.call("POST", path, {**asked, **more}).status == 200
    assert len(told(tmp_path)) == 6 and listed(client) == []


@pytest.mark.parametrize("path, body", [
    ("parallel", {"tasks": [{"backend": "echo", "prompt": "a"}]}),
    ("chain", {"steps": [{"backend": "echo", "prompt": "a"}]}), ("compare", {"backends": ["echo"], "prompt": "a"})])
def test_a_fan_out_stores_nothing(client: Client, path: str, body: Any) -> None:
    assert client.call("POST", f"/api/v1/{path}", body).status == 200
    assert listed(client) == []


# ---- Streams

def test_a_session_is_active_until_the_done_line_has_come(
        serve: Callable[..., Served], scripted: Dict[str, Any], tmp_path: Path) -> None:
    server = serve(config=scripted)
    body = {"backend": "it", "prompt": "hold on", "output_format": "stream-json"}
    with contextlib.closing(server.connection()) as connection:
        connection.request("POST", "/api/v1/prompt", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        lines = [json.loads(answer.readline())]
        await_told(tmp_path)
        assert only(server)["status"] == "active"
        (tmp_path / "go").touch()
        while lines[-1]["type"] != "done":
            lines.append(json.loads(answer.readline()))
        session = only(server)
    assert (session["status"], session["turn_count"]) == ("completed", 1)
    assert {line["session_id"] for line in lines} == {session["id"]} and len(lines) > 2


def test_every_line_of_a_further_turn_names_the_session(client: Client) -> None:
    first = begin(client)
    lines = ask(client, "one two three", session_id=first[:20], output_format="stream-json").lines
    assert [line["session_id"] for line in lines] == [first] * len(lines) and len(lines) > 3


# ---- Going on

@pytest.mark.parametrize("form", [lambda name: name, lambda name: name.upper(), lambda name: name[:12],
                                  lambda name: name[:5].upper()], ids=["id", "upper case", "prefix", "upper prefix"])
def test_a_session_is_continued_by_its_id_or_the_first_of_its_digits(
        client: Client, form: Callable[[str], str]) -> None:
    first, other = begin(client, "first"), begin(client, "other")
    before = shown(client, first)
    time.sleep(0.01)
    reply = ask(client, "second", session_id=form(first))
    assert (reply.status, reply.json["session_id"], reply.json["output"]) == (200, first, "second")
    after = shown(client, first)
    assert (before["turn_count"], after["turn_count"], shown(client, other)["turn_count"]) == (1, 2, 1)
    assert after["last_used"] > before["last_used"]
    assert {**after, "turn_count": 1, "last_used": before["last_used"]} == before  # all else is as it was


def test_metadata_of_a_further_turn_is_merged(client: Client) -> None:
    first = begin(client, metadata={"a": "1", "b": "1"})
    ask(client, session_id=first, metadata={"b": "2", "c": "2"})
    assert shown(client, first)["metadata"] == {"a": "1", "b": "2", "c": "2"}


@pytest.mark.parametrize("counts, turns", [(True, 3), (False, 0)])
def test_token_counts_are_summed_unless_config_says_no(
        make_client: Callable[..., Client], scripted: Dict[str, Any], counts: bool, turns: int) -> None:
    client = make_client({**scripted, "session": {"store_token_usage": counts}})
    replies = [ask(client, backend="claude")]
    replies += [ask(client, backend="claude", session_id=replies[0].json["session_id"]) for _ in range(2)]
    own = {"input_tokens": 101, "output_tokens": 12, "cached_tokens": 40, "reasoning_tokens": 0}
    assert [reply.json["token_usage"] for reply in replies] == [own] * 3  # each answer has its own
    assert only(client)["token_usage"] == {name: turns * count for name, count in own.items()}
    assert only(client)["turn_count"] == 3


def test_the_cli_is_told_which_conversation_goes_on_and_where(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path) -> None:
    client, (one, two) = make_client(scripted), (tmp_path / "one", tmp_path / "two")
    one.mkdir()
    two.mkdir()
    first = begin(client, backend="claude", workdir=str(one), model="small")
    reply = ask(client, backend="claude", session_id=first, workdir=str(two), model="large")
    assert sorted(reply.json["ignored"]) == ["model", "workdir"]
    for run in told(tmp_path):
        assert run["cwd"] == str(one) and run["argv"][run["argv"].index("--model") + 1] == "small"
    assert "--resume" not in told(tmp_path)[0]["argv"]
    assert told(tmp_path)[1]["argv"][told(tmp_path)[1]["argv"].index("--resume") + 1] == CLAUDES_NAME
    assert (only(client)["working_dir"], only(client)["model"]) == (str(one), "small")


def test_the_sessions_own_workdir_and_model_are_not_ignored(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path) -> None:
    client, same = make_client(scripted), {"workdir": str(tmp_path), "model": "small"}
    first = begin(client, backend="claude", **same)
    assert "ignored" not in ask(client, backend="claude", session_id=first, **same).json


@pytest.mark.parametrize("backend, fields, status, word", [
    ("it", {}, 409, "echo"), ("claude", {"ephemeral": False}, 409, "echo"), ("echo", {"ephemeral": True}, 422, ""),
    ("echo", {"session_id": "f" * 32}, 404, "f" * 32), ("echo", {"session_id": "0123456789" * 4}, 404, ""),
    ("echo", {"session_id": "../x"}, 404, "hex"), ("echo", {"session_id": "%"}, 404, "hex"),
    ("echo", {"session_id": "abcdefg"}, 404, "hex"), ("echo", {"session_id": " "}, 404, "hex"),
    ("echo", {"session_id": ""}, 422, "empty"), ("echo", {"session_id": 7}, 422, "string")])
def test_a_session_that_can_not_be_continued_so_is_left_alone(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path, backend: str, fields: Any,
        status: int, word: str) -> None:
    client = make_client(scripted)
    before = shown(client, begin(client))
    reply = ask(client, "more", backend, **{"session_id": before["id"], **fields})
    assert reply.status == status and word in reply.json["detail"]
    assert reply.headers["content-type"] == "application/problem+json"
    assert (listed(client), told(tmp_path)) == ([before], [])
    if status == 422:
        assert reply.json["errors"][0]["location"] == "body." + next(iter(fields))


def test_digits_that_several_sessions_begin_with_are_a_conflict(client: Client) -> None:
    ids: List[str] = []
    while len({name[0] for name in ids}) == len(ids):
        ids.append(begin(client))
    two = [name for name in ids if name[0] == ids[-1][0]]
    for reply in (ask(client, session_id=ids[-1][0]), client.call("GET", f"/api/v1/sessions/{ids[-1][0]}"),
                  client.call("DELETE", f"/api/v1/sessions/{ids[-1][0]}")):
        assert reply.status == 409 and all(name in reply.json["detail"] for name in two)
    assert {(session["id"], session["turn_count"]) for session in listed(client)} == {(name, 1) for name in ids}


def test_a_backend_without_memory_can_not_go_on(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path) -> None:
    client = make_client(scripted)
    before = shown(client, begin(client, backend="it"))
    reply = ask(client, "more", "it", session_id=before["id"])
    assert reply.status == 400 and "it has no memory" in reply.json["detail"]
    assert (listed(client), len(told(tmp_path))) == ([before], 1)


def test_a_conversation_that_its_cli_has_lost_is_not_found_and_the_session_stays(
        make_client: Callable[..., Client], scripted: Dict[str, Any]) -> None:
    client = make_client(scripted)
    before = shown(client, begin(client, backend="claude"))
    reply = ask(client, "resume_unknown", "claude", session_id=before["id"])
    assert reply.status == 404 and "lost the conversation" in reply.json["detail"]
    assert listed(client) == [before]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_completion_that_names_a_session_continues_it(client: Client, stream: bool) -> None:
    first = begin(client)
    body = {"model": "echo", "messages": [{"role": "user", "content": "more"}], "stream": stream,
            "clinvk": {"session_id": first[:20]}}
    reply = client.call("POST", "/openai/v1/chat/completions", body)
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in reply.data[:-1]) if stream else \
        reply.json["choices"][0]["message"]["content"]
    assert (reply.status, said, only(client)["turn_count"], only(client)["status"]) == (200, "more", 2, "completed")


def test_a_chat_completion_continues_the_way_of_the_agent(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path) -> None:
    client = make_client(scripted)
    first = begin(client, backend="claude", workdir=str(tmp_path))
    body = {"model": "claude", "messages": [{"role": "user", "content": "more"}], "clinvk": {"session_id": first}}
    assert client.call("POST", "/openai/v1/chat/completions", body).status == 200
    run = told(tmp_path)[1]
    assert run["cwd"] == str(tmp_path) and CLAUDES_NAME in run["argv"] and "--safe-mode" not in run["argv"]
    assert only(client)["turn_count"] == 2


def test_a_session_whose_directory_is_gone_says_so(client: Client, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    name = begin(client, workdir=str(tmp_path / "there"))
    (tmp_path / "there").rmdir()
    reply = ask(client, session_id=name)
    assert (reply.status, f"{tmp_path}/there" in reply.json["detail"]) == (409, True)


def test_a_stop_sequence_ends_a_turn_well(client: Client) -> None:
    name = begin(client)
    body = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}], "stop": "two",
            "clinvk": {"session_id": name}}
    reply = client.call("POST", "/openai/v1/chat/completions", body)
    assert reply.json["choices"][0]["message"]["content"] == "one "
    assert (only(client)["status"], only(client)["turn_count"]) == ("completed", 2)
    body["clinvk"] = {"session_id": name, "ephemeral": True}
    assert client.call("POST", "/openai/v1/chat/completions", body).status == 400
    assert only(client)["turn_count"] == 2


# ---- Two at once

@pytest.mark.parametrize("elsewhere", [False, True], ids=["one server", "two servers"])
def test_the_second_of_two_turns_at_once_is_refused_and_the_first_not_disturbed(
        serve: Callable[..., Served], scripted: Dict[str, Any], meanwhile: Callable[..., Any], tmp_path: Path,
        elsewhere: bool) -> None:
    server = serve(config=scripted)
    other = serve(config=scripted) if elsewhere else server
    name = begin(server, backend="claude")
    first = meanwhile(ask, server, "hold on", "claude", session_id=name)
    await_told(tmp_path, 2)
    second = ask(other, "too early", "claude", session_id=name, metadata={"early": "yes"})
    assert (second.status, shown(other, name)["status"]) == (409, "active") and "in use" in second.json["detail"]
    streamed = ask(other, "too early", "claude", session_id=name, output_format="stream-json")
    assert (streamed.status, len(told(tmp_path))) == (409, 2)
    (tmp_path / "go").touch()
    assert (first.result().status, first.result().json["exit_code"]) == (200, 0)
    session = shown(other, name)
    assert (session["status"], session["turn_count"], session["metadata"]) == ("completed", 2, {})
    assert ask(other, "now", "claude", session_id=name).json["exit_code"] == 0
    assert shown(server, name)["turn_count"] == 3


def test_of_many_turns_at_once_each_is_counted_or_refused(serve: Callable[..., Served]) -> None:
    servers = [serve(), serve()]
    name = begin(servers[0])
    with ThreadPoolExecutor(8) as pool:
        statuses = [reply.status for reply in pool.map(lambda n: ask(servers[n % 2], session_id=name), range(80))]
    assert set(statuses) <= {200, 409} and statuses.count(200) > 0
    assert shown(servers[1], name)["turn_count"] == 1 + statuses.count(200)


def test_the_end_of_a_turn_does_not_end_the_one_after_it(client: Client) -> None:
    """An answer is there before its turn has been cleared away, and the next turn may begin with it."""
    name = begin(client)
    asked = clinvk.PromptRequest(backend="echo", prompt="more", session_id=name)
    first, second, third = [client.server.start(asked, clinvk.Stop(), at="", prompt_at="", ran=[]).events
                            for _ in range(3)]
    assert isinstance(list(itertools.islice(first, 3))[-1], clinvk.Done)
    next(second)
    first.close()
    assert only(client)["status"] == "active"
    with pytest.raises(clinvk.Conflict):
        next(third)
    second.close()


def test_a_turn_goes_on_from_what_the_one_before_it_has_left(
        make_client: Callable[..., Client], tmp_path: Path, scripted: Dict[str, Any], clients_database: Path) -> None:
    """That one may have ended only after the session was looked up: here one that gives the conversation its name."""
    client = make_client(scripted)
    name = begin(client, backend="claude")
    sql(clients_database, "UPDATE sessions SET backend_session_id = ''")
    asked = clinvk.PromptRequest(backend="claude", prompt="more", session_id=name)
    waiting = client.server.start(asked, clinvk.Stop(), at="", prompt_at="", ran=[]).events
    assert ask(client, backend="claude", session_id=name).json["exit_code"] == 0
    assert isinstance(list(waiting)[-1], clinvk.Done)
    argv = told(tmp_path)[-1]["argv"]
    assert argv[argv.index("--resume") + 1] == CLAUDES_NAME


def test_a_conversation_of_claude_has_its_name_before_it_begins(
        serve: Callable[..., Served], scripted: Dict[str, Any], tmp_path: Path) -> None:
    """So that a turn that breaks off before claude has said anything is gone on with, and can be deleted."""
    server = serve(config=scripted)
    for turn in range(2):
        with contextlib.closing(server.connection()) as connection:
            body = {"backend": "claude", "prompt": "hold", **({"session_id": only(server)["id"]} if turn else {})}
            connection.request("POST", "/api/v1/prompt", json.dumps(body), {"Content-Type": "application/json"})
            await_told(tmp_path, turn + 1)
            eventually(lambda: only(server)["backend_session_id"] == CLAUDES_NAME)
        eventually(lambda: only(server)["status"] == "error")
        transcript = tmp_path / "home" / ".claude" / "projects" / "here" / f"{CLAUDES_NAME}.jsonl"
        transcript.parent.mkdir(parents=True, exist_ok=True)
        transcript.touch()
    first, second = [one["argv"] for one in told(tmp_path)]
    assert re.fullmatch("[0-9a-f-]{36}", first[first.index("--session-id") + 1]) and "--resume" not in first
    assert second[second.index("--resume") + 1] == CLAUDES_NAME and "--session-id" not in second
    assert server.call("DELETE", f"/api/v1/sessions/{only(server)['id']}").status == 200
    assert not transcript.exists()


@pytest.mark.parametrize("stored, flag", [(False, "--session-id"), (True, "--resume")])
def test_a_turn_that_claude_has_said_nothing_of_is_gone_on_with_if_claude_has_stored_it(
        make_client: Callable[..., Client], fake_cli: Callable[..., str], tmp_path: Path, stored: bool,
        flag: str) -> None:
    silent = CLAUDE.replace('print("".join(lines[:begun]), end="", flush=True)', "begun = 0")
    client = make_client({"backends": {"claude": {"command": fake_cli(silent, "claude")}}})
    assert ask(client, "hold", "claude", timeout_secs=1).json["exit_code"] == -1
    session = only(client)
    name = session["backend_session_id"]
    transcript = tmp_path / ".claude" / "projects" / "here" / f"{name}.jsonl"
    transcript.parent.mkdir(parents=True)
    if stored:
        transcript.touch()
    assert ask(client, "more", "claude", session_id=session["id"]).json["exit_code"] == 0
    argv = told(tmp_path)[-1]["argv"]
    assert argv[argv.index(flag) + 1] == name
    assert ("--resume" in argv) == stored


def test_a_turn_that_a_stop_sequence_ends_has_ended_its_cli_before_that_is_told(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path) -> None:
    client = make_client(scripted)
    asked = clinvk.PromptRequest(backend="claude", prompt="family", stops=("UB",))
    events = client.server.start(asked, clinvk.Stop(), at="", prompt_at="", ran=[]).events
    with contextlib.closing(events):
        done = next(event for event in events if isinstance(event, clinvk.Done))
        assert done.stop_sequence == "UB" and alive(told(tmp_path)[-1]["family"]) == []
        assert only(client)["status"] == "completed"


# ---- Runs that fail

@pytest.mark.parametrize("backend, prompt, words", [
    ("it", "fail", "it broke"), ("claude", "error_400", "claude failed"), ("claude", "logged_out", "not logged in")])
def test_a_failed_run_leaves_a_session_with_its_error(
        make_client: Callable[..., Client], scripted: Dict[str, Any], backend: str, prompt: str, words: str) -> None:
    client = make_client(scripted)
    reply = ask(client, prompt, backend)
    assert (reply.status, reply.json["session_id"]) == (200, only(client)["id"]) and reply.json["exit_code"]
    assert only(client)["status"] == "error"
    assert only(client)["error_message"] == reply.json["error"] and words in reply.json["error"]


def test_a_session_goes_on_after_a_failed_run(make_client: Callable[..., Client], scripted: Dict[str, Any]) -> None:
    client = make_client(scripted)
    name = begin(client, "error_400", "claude")
    assert ask(client, "again", "claude", session_id=name).json["exit_code"] == 0
    session = only(client)
    assert (session["status"], session["error_message"], session["turn_count"]) == ("completed", "", 2)


def test_a_run_that_is_out_of_time_leaves_an_error(
        make_client: Callable[..., Client], scripted: Dict[str, Any]) -> None:
    client = make_client(scripted)
    reply = ask(client, "hold on", "it", timeout_secs=0.5)
    assert (reply.status, reply.json["exit_code"], only(client)["status"]) == (200, -1, "error")
    assert "time is up" in only(client)["error_message"]


@pytest.mark.parametrize("change", [{"command": "no-such-program"}, {"enabled": False}])
def test_a_run_that_could_not_start_leaves_no_session_and_no_turn(
        make_client: Callable[..., Client], scripted: Dict[str, Any], change: Dict[str, Any]) -> None:
    client = make_client(scripted)
    before = shown(client, begin(client, backend="claude"))
    scripted["backends"]["claude"].update(change)
    client = make_client(scripted)
    assert ask(client, backend="claude").status == 503
    assert ask(client, backend="claude", session_id=before["id"], metadata={"a": "b"}).status == 503
    assert listed(client) == [before]


@pytest.mark.parametrize("fields", [{}, {"output_format": "stream-json"}], ids=["whole", "stream"])
def test_a_program_that_breaks_at_the_start_leaves_no_session(
        make_client: Callable[..., Client], fake_cli: Callable[..., str], fields: Any) -> None:
    script = Path(fake_cli(""))
    script.write_text("#!/no/such/interpreter\n")
    client = make_client({"backends": {"it": {"command": str(script)}}})
    assert (ask(client, backend="it", **fields).status, listed(client)) == (503, [])


@pytest.mark.parametrize("places, fields, status", [(0, {}, 503), (0, {"output_format": "stream-json"}, 503),
                                                    (1, {"timeout_secs": 0.3}, 504)],
                         ids=["line full", "line full, stream", "time up in the line"])
def test_a_request_that_gets_no_slot_leaves_everything_as_it_was(
        serve: Callable[..., Served], scripted: Dict[str, Any], meanwhile: Callable[..., Any], tmp_path: Path,
        places: int, fields: Any, status: int) -> None:
    server = serve(config={**scripted, "server": {"max_concurrent_runs": 1, "max_waiting_runs": places}})
    before = shown(server, begin(server, backend="claude"))
    meanwhile(ask, server, "hold on", "it")
    await_told(tmp_path, 2)
    assert ask(server, "new", "claude", **fields).status == status
    assert ask(server, "more", "claude", session_id=before["id"], metadata={"a": "b"}, **fields).status == status
    assert [session["initial_prompt"] for session in listed(server)] == ["hold on", "hello"]
    assert shown(server, before["id"]) == before


@pytest.mark.parametrize("fields", [{}, {"output_format": "stream-json"}], ids=["whole", "stream"])
def test_a_client_that_goes_away_leaves_an_error_that_can_be_continued(
        serve: Callable[..., Served], scripted: Dict[str, Any], tmp_path: Path, fields: Any) -> None:
    server = serve(config=scripted)
    with contextlib.closing(server.connection()) as connection:
        body = {"backend": "claude", "prompt": "hold family", **fields}
        connection.request("POST", "/api/v1/prompt", json.dumps(body), {"Content-Type": "application/json"})
        family = await_told(tmp_path)["family"]
        eventually(lambda: only(server)["backend_session_id"] == CLAUDES_NAME)  # stored when the CLI told it
        assert only(server)["status"] == "active"
    eventually(lambda: only(server)["status"] != "active")
    session = only(server)
    assert session["status"] == "error" and session["error_message"] and alive(family) == []
    assert session["backend_session_id"] == CLAUDES_NAME
    assert ask(server, "again", "claude", session_id=session["id"]).json["exit_code"] == 0
    assert CLAUDES_NAME in told(tmp_path)[1]["argv"]
    assert only(server)["status"] == "completed"


@pytest.mark.parametrize("form", ["json", "stream-json"])
def test_a_failure_in_half_a_character_is_stored_and_told_to_its_end(
        make_client: Callable[..., Client], fake_cli: Callable[..., str], form: str) -> None:
    client = make_client({"backends": {"claude": {"command": fake_cli(CUT, "claude")}}})
    reply = ask(client, "p", "claude", output_format=form)
    [session] = client.call("GET", "/api/v1/sessions").json["sessions"]
    assert (session["status"], session["error_message"]) == ("error", "claude failed: it broke \ufffd")
    if form == "json":
        assert (reply.json["exit_code"], reply.json["error"]) == (1, session["error_message"])
    else:
        assert [line["type"] for line in reply.lines][-2:] == ["error", "done"]


# ---- GET and DELETE

def test_sessions_are_listed_last_used_first(client: Client) -> None:
    a, b, c = [begin(client, prompt) for prompt in "abc"]
    assert [session["id"] for session in listed(client)] == [c, b, a]
    ask(client, session_id=a)
    assert [session["id"] for session in listed(client)] == [a, c, b]
    assert all(set(session) == FIELDS for session in listed(client))


@pytest.mark.parametrize("query, prompts, total", [
    ("", "e d c b a", 5), ("?backend=echo", "d b", 2), ("?backend=it", "e c a", 3), ("?status=error", "e a", 2),
    ("?status=completed", "d c b", 3), ("?backend=it&status=completed", "c", 1), ("?backend=echo&status=error", "", 0),
    ("?status=active", "", 0), ("?status=paused", "", 0), ("?backend=gemini", "", 0), ("?limit=2", "e d", 5),
    ("?limit=2&offset=2", "c b", 5), ("?limit=2&offset=4", "a", 5), ("?offset=5", "", 5), ("?offset=99", "", 5),
    ("?backend=it&limit=1&offset=1", "c", 3), ("?backend=&status=&limit=&offset=", "e d c b a", 5)])
def test_the_list_can_be_filtered_and_cut(
        make_client: Callable[..., Client], scripted: Dict[str, Any], query: str, prompts: str, total: int) -> None:
    client = make_client(scripted)
    for prompt, backend in (("fail a", "it"), ("b", "echo"), ("c", "it"), ("d", "echo"), ("fail e", "it")):
        begin(client, prompt, backend)
    reply = client.call("GET", f"/api/v1/sessions{query}").json
    assert " ".join(session["initial_prompt"].split()[-1] for session in reply.pop("sessions")) == prompts
    given = dict(re.findall(r"(limit|offset)=(\d+)", query))
    assert reply == {"total": total, "limit": int(given.get("limit", 100)), "offset": int(given.get("offset", 0))}


def test_no_more_than_a_hundred_are_listed_unless_asked_for(client: Client) -> None:
    for number in range(101):
        begin(client, str(number))
    assert [len(listed(client, query)) for query in ("", "?limit=101", "?offset=100")] == [100, 101, 1]


@pytest.mark.parametrize("query, place, words", [
    ("limit=0", "query.limit", "at least 1"), ("limit=-1", "query.limit", ""), ("limit=x", "query.limit", "number"),
    ("limit=1.5", "query.limit", "number"), ("offset=-1", "query.offset", ""), ("offset=x", "query.offset", "number"),
    ("offset=99999999999999999999", "query.offset", ""), ("status=done", "query.status", "completed"),
    ("backend=ecko", "query.backend", 'did you mean "echo"'), ("limt=1", "query.limt", 'did you mean "limit"'),
    ("state=active", "query.state", "not known")])
def test_a_wrong_query_is_named(client: Client, query: str, place: str, words: str) -> None:
    reply = client.call("GET", f"/api/v1/sessions?{query}")
    assert (reply.status, reply.json["errors"][0]["location"]) == (422, place)
    assert words in reply.json["errors"][0]["message"]


def test_sessions_of_a_backend_that_is_no_longer_configured_are_still_there(
        make_client: Callable[..., Client], scripted: Dict[str, Any]) -> None:
    name = begin(make_client(scripted), backend="it")
    later = make_client()
    assert [session["id"] for session in listed(later, "?backend=it")] == [name]
    assert ask(later, backend="it", session_id=name).status == 422


@pytest.mark.parametrize("characters", [1, 999, 1000, 1001, 5000])
def test_a_list_has_the_beginning_of_a_long_prompt_and_the_session_all_of_it(client: Client, characters: int) -> None:
    prompt = ("é" + "abcdefghi" * 600)[:characters]
    name = begin(client, prompt)
    in_list = only(client)["initial_prompt"]
    assert in_list == prompt if characters <= 1000 else in_list.rstrip("…") == prompt[:1000]
    assert shown(client, name)["initial_prompt"] == prompt


@pytest.mark.parametrize("path", ["", "/{id}", "/{prefix}"])
def test_head_works_where_get_does(client: Client, path: str) -> None:
    name = begin(client)
    filled = "/api/v1/sessions" + path.format(id=name, prefix=name[:4].upper())
    got, head = client.call("GET", filled), client.call("HEAD", filled)
    assert (got.status, head.status, head.body) == (200, 200, b"")
    assert head.headers["content-length"] == got.headers["content-length"]


def test_head_of_a_session_that_is_not_there_is_not_found(client: Client) -> None:
    assert client.call("HEAD", "/api/v1/sessions/abc").status == 404


@pytest.mark.parametrize("form", [lambda name: name, lambda name: name[:8], lambda name: name[:8].upper()],
                         ids=["id", "prefix", "upper prefix"])
def test_a_deleted_session_is_gone(client: Client, form: Callable[[str], str]) -> None:
    name, other = begin(client), begin(client)
    reply = client.call("DELETE", f"/api/v1/sessions/{form(name)}")
    assert (reply.status, reply.json) == (200, {"deleted": True, "id": name})
    assert [client.call(method, f"/api/v1/sessions/{name}").status for method in ("GET", "DELETE")] == [404, 404]
    assert ask(client, session_id=name).status == 404
    assert only(client)["id"] == other


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("name", ["f" * 32, "0" * 33, "xyz", "%25", "_"])
def test_what_is_no_session_is_not_found(client: Client, method: str, name: str) -> None:
    begin(client)
    assert client.call(method, f"/api/v1/sessions/{name}").status == 404
    assert len(listed(client)) == 1


@pytest.mark.parametrize("elsewhere", [False, True], ids=["one server", "two servers"])
def test_a_session_is_not_deleted_while_a_turn_of_it_runs(
        serve: Callable[..., Served], scripted: Dict[str, Any], meanwhile: Callable[..., Any], tmp_path: Path,
        elsewhere: bool) -> None:
    server = serve(config=scripted)
    other = serve(config=scripted) if elsewhere else server
    running = meanwhile(ask, server, "hold on", "it")
    await_told(tmp_path)
    name = only(other)["id"]
    assert other.call("DELETE", f"/api/v1/sessions/{name}").status == 409
    (tmp_path / "go").touch()
    assert running.result().json["session_id"] == name and only(other)["status"] == "completed"
    assert other.call("DELETE", f"/api/v1/sessions/{name}").json == {"deleted": True, "id": name}
    assert listed(server) == []


def test_a_further_turn_of_a_session_that_was_just_deleted_does_not_bring_it_back(
        serve: Callable[..., Served]) -> None:
    first, second = serve(), serve()
    name = begin(first)
    assert second.call("DELETE", f"/api/v1/sessions/{name}").status == 200
    assert ask(first, session_id=name).status == 404
    assert (listed(first), listed(second)) == ([], [])


# ---- Retention

@pytest.mark.parametrize("days, kept", [(None, [0, 1, 29]), (2, [0, 1]), (0.5, [0]), (0, [0, 1, 29, 31, 4000])])
def test_sessions_older_than_retention_days_are_gone_after_a_start(
        serve: Callable[..., Served], database: Path, days: Optional[float], kept: List[int]) -> None:
    server = serve()
    ids = {age: begin(server, f"{age} days") for age in (0, 1, 29, 31, 4000)}
    server.stop()
    for age, name in ids.items():
        sql(database, "UPDATE sessions SET last_used = last_used - ?, created_at = created_at - ? WHERE id = ?",
            86400 * age, 86400 * 5000, name)  # however old: last use counts
    server = serve(config={"session": {} if days is None else {"retention_days": days}})
    eventually(lambda: len(listed(server)) <= len(kept))
    time.sleep(0.2)  # for what would delete too much
    assert [session["id"] for session in listed(server)] == [ids[age] for age in kept]


def test_thousands_of_old_sessions_are_deleted_at_one_start(serve: Callable[..., Served], database: Path) -> None:
    server = serve()
    name = begin(server)
    server.stop()
    columns = [row[1] for row in sql(database, "PRAGMA table_info(sessions)")]
    made = {"id": "printf('%032x', n)", "last_used": "last_used - 31 * 86400"}
    sql(database, f"""WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 2500)
                      INSERT INTO sessions ({', '.join(columns)})
                      SELECT {', '.join(made.get(column, column) for column in columns)} FROM sessions, numbers""")
    assert sql(database, "SELECT count(*) FROM sessions") == [(2501,)]
    server = serve()
    eventually(lambda: [session["id"] for session in listed(server)] == [name])


# ---- Servers that are killed or stopped

def test_a_turn_of_a_killed_server_is_an_error_after_the_next_start(
        serve: Callable[..., Served], scripted: Dict[str, Any], meanwhile: Callable[..., Any], tmp_path: Path,
        database: Path) -> None:
    server = serve(config=scripted)
    done = begin(server, "done", "claude")
    meanwhile(ask, server, "hold on", "claude", metadata={"a": "b"})
    family = await_told(tmp_path, 2)["family"]
    server.process.kill()
    server.process.wait()
    server = serve(config=scripted)
    session, other = listed(server)
    assert (session["status"], session["error_message"]) == ("error", STOPPED)
    assert (session["initial_prompt"], session["metadata"]) == ("hold on", {"a": "b"})
    assert (other["id"], other["status"], other["error_message"]) == (done, "completed", "")
    assert ask(server, "again", "claude", session_id=session["id"]).json["exit_code"] == 0
    assert shown(server, session["id"])["status"] == "completed"
    assert len(list((database.parent / "servers").iterdir())) == 1  # nothing is left of the one that was killed
    eventually(lambda: alive(family) == [])


def test_a_turn_of_a_server_that_lives_stays_active_when_another_starts(
        serve: Callable[..., Served], scripted: Dict[str, Any], meanwhile: Callable[..., Any], tmp_path: Path) -> None:
    server, killed = serve(config=scripted), serve(config=scripted)
    running = meanwhile(ask, server, "hold on", "claude")
    await_told(tmp_path)
    name = only(server)["id"]
    killed.process.kill()
    killed.process.wait()
    others = [serve(config=scripted), serve(config=scripted)]
    assert [shown(each, name)["status"] for each in (server, *others)] == ["active"] * 3
    assert [ask(each, "now", "claude", session_id=name).status for each in others] == [409, 409]
    assert others[0].stop() == 0 and shown(others[1], name)["status"] == "active"
    (tmp_path / "go").touch()
    assert running.result().json["exit_code"] == 0
    assert (shown(others[1], name)["status"], shown(others[1], name)["error_message"]) == ("completed", "")


@pytest.mark.parametrize("what", ["continued", "deleted"])
def test_a_session_that_a_killed_server_left_active_can_be_used_through_one_that_runs(
        serve: Callable[..., Served], scripted: Dict[str, Any], meanwhile: Callable[..., Any], tmp_path: Path,
        what: str) -> None:
    server, killed = serve(config=scripted), serve(config=scripted)
    meanwhile(ask, killed, "hold on", "claude")
    await_told(tmp_path)
    name = only(server)["id"]
    assert ask(server, "early", "claude", session_id=name).status == 409
    killed.process.kill()
    killed.process.wait()
    if what == "deleted":
        assert server.call("DELETE", f"/api/v1/sessions/{name}").status == 200 and listed(server) == []
    else:
        assert ask(server, "again", "claude", session_id=name).json["exit_code"] == 0
        assert (only(server)["status"], only(server)["error_message"]) == ("completed", "")


@pytest.mark.parametrize("fields", [{}, {"output_format": "stream-json"}], ids=["whole", "stream"])
def test_sigterm_in_mid_run_stores_the_session_and_leaves_no_process(
        serve: Callable[..., Served], scripted: Dict[str, Any], meanwhile: Callable[..., Any], tmp_path: Path,
        database: Path, fields: Any) -> None:
    server = serve(config=scripted)
    for backend in ("it", "claude"):
        meanwhile(ask, server, "hold family", backend, **fields)
    eventually(lambda: len(told(tmp_path)) == 2)
    assert server.stop() == 0
    assert alive([pid for run in told(tmp_path) for pid in run["family"]]) == []
    assert sql(database, "SELECT status FROM sessions") == [("error",), ("error",)]
    assert all(message for (message,) in sql(database, "SELECT error_message FROM sessions"))
    assert "Traceback" not in server.stderr and list((database.parent / "servers").iterdir()) == []
    assert {session["status"] for session in listed(serve(config=scripted))} == {"error"}


# ---- The database

@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_nobody_else_can_read_the_sessions(serve: Callable[..., Served], database: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        server = serve()
        begin(server, "a secret")
        files = sorted(database.parent.glob("sessions.db*"))
        assert [file.name for file in files] == ["sessions.db", "sessions.db-shm", "sessions.db-wal"]
        assert [mode(file) for file in files] == [0o600] * 3 and mode(database.parent) == 0o700
        assert sql(database, "PRAGMA journal_mode") == [("wal",)]
    finally:
        os.umask(before)


WAITED = re.compile(r" 503 (\d+) ms ")


def test_a_database_that_another_program_holds_is_an_error_for_all_at_the_same_time(
        serve: Callable[..., Served], database: Path, meanwhile: Callable[..., "Future[Reply]"]) -> None:
    server = serve()
    with contextlib.closing(sqlite3.connect(str(database), isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        asked = [meanwhile(ask, server) for _ in range(8)]
        assert server.call("GET", "/health").status == 200 and listed(server) == []
        assert {one.result().status for one in asked} == {503}
        holder.execute("ROLLBACK")
    waited = eventually(lambda: WAITED.findall(server.stderr) if server.stderr.count(" 503 ") == 8 else [])
    assert max(map(int, waited)) < 4000 * clinvk.LOCK_WAIT, "one after the other it were 8 times that"
    assert ask(server).status == 200


@pytest.mark.parametrize("variable, found", [({}, 0o700), ({"CLINVK_HOME": ""}, 0o700), (None, 0o755)])
def test_a_home_that_was_there_is_closed_to_others_unless_it_was_chosen(
        serve: Callable[..., Served], tmp_path: Path, variable: Optional[Dict[str, str]], found: int) -> None:
    home = tmp_path / "home" / ".clinvk"
    home.mkdir(parents=True, mode=0o755)
    home.chmod(0o755)
    serve(**({"CLINVK_HOME": str(home)} if variable is None else variable))
    assert mode(home) == found


def test_a_database_that_others_could_read_is_closed_to_them(serve: Callable[..., Served], database: Path) -> None:
    server = serve()
    name = begin(server)
    server.stop()
    database.chmod(0o666)
    server = serve()
    assert only(server)["id"] == name and begin(server)
    assert {mode(file) for file in database.parent.glob("sessions.db*")} == {0o600}


def newer(file: Path) -> None:
    sql(file, "CREATE TABLE sessions (id TEXT)")
    sql(file, "PRAGMA user_version = 99")


def newer_in_wal_mode(file: Path) -> None:
    sql(file, "PRAGMA journal_mode = WAL")
    newer(file)


def somebody_elses(file: Path) -> None:
    sql(file, "CREATE TABLE sessions (cookie TEXT)")
    sql(file, "INSERT INTO sessions VALUES ('theirs')")


def somebody_elses_with_a_version(file: Path) -> None:
    somebody_elses(file)
    sql(file, "PRAGMA user_version = 1")


def refused(serve: Callable[..., Served]) -> None:
    """A start that must fail."""
    with pytest.raises(AssertionError):
        serve()


def stderr_of_last(folder: Path) -> str:
    return max(folder.glob("stderr-*"), key=lambda file: int(file.name[7:])).read_text()


@pytest.mark.parametrize("make", [
    newer, newer_in_wal_mode, somebody_elses, somebody_elses_with_a_version,
    lambda file: file.write_bytes(b"this is no database\n" * 500), lambda file: file.mkdir()],
    ids=["newer", "newer, WAL", "somebody else's", "somebody else's with a version", "text", "a directory"])
def test_a_database_that_is_none_of_ours_stops_the_start_and_is_left_alone(
        serve: Callable[..., Served], tmp_path: Path, database: Path, make: Callable[[Path], Any]) -> None:
    database.parent.mkdir(parents=True)
    make(database)
    before = database.is_file() and (database.read_bytes(), mode(database))
    refused(serve)
    said = stderr_of_last(tmp_path)
    assert len(said.splitlines()) == 1 and str(database) in said and "Traceback" not in said
    assert (database.is_file() and (database.read_bytes(), mode(database))) == before
    assert [file.name for file in database.parent.glob("sessions.db*")] == ["sessions.db"]


def test_a_start_that_is_refused_for_the_database_exits_with_1(pyz: Path, tmp_path: Path) -> None:
    newer(tmp_path / "sessions.db")
    done = subprocess.run([str(pyz), "serve", "--port", "0"], capture_output=True, text=True, timeout=30,
                          env={**os.environ, "CLINVK_HOME": str(tmp_path)})
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert str(tmp_path / "sessions.db") in done.stderr and "newer" in done.stderr


def test_a_newer_version_that_is_only_in_the_log_yet_is_seen(
        serve: Callable[..., Served], tmp_path: Path, database: Path) -> None:
    database.parent.mkdir(parents=True)
    crashed = tmp_path / "crashed"
    with contextlib.closing(sqlite3.connect(str(crashed))) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA user_version = 99")
        for end in ("", "-wal"):
            shutil.copy(f"{crashed}{end}", f"{database}{end}")
    before = [Path(f"{database}{end}").read_bytes() for end in ("", "-wal")]
    assert len(before[1]) > 0
    refused(serve)
    assert "newer" in stderr_of_last(tmp_path)
    assert [Path(f"{database}{end}").read_bytes() for end in ("", "-wal")] == before


def test_an_empty_file_becomes_a_database(serve: Callable[..., Served], database: Path) -> None:
    database.parent.mkdir(parents=True)
    database.touch()
    server = serve()
    name = begin(server)
    assert only(server)["id"] == name


@pytest.mark.parametrize("round_", range(3))
def test_servers_that_start_at_the_same_time_make_one_database(
        serve: Callable[..., Served], tmp_path: Path, round_: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        servers = list(pool.map(lambda _: serve(), range(4)))
        ids = set(pool.map(begin, servers * 3))
    assert len(ids) == 12
    for server in servers:
        assert {session["id"] for session in listed(server)} == ids
        server.process.kill()
        server.process.wait()
    assert {session["id"] for session in listed(serve())} == ids


def test_what_one_server_stores_is_seen_by_all_however_others_come_and_go(
        serve: Callable[..., Served], database: Path) -> None:
    first = serve()
    ids = [begin(first)]
    for comes in (True, False):  # a server starts, and goes; and a look at the database from outside
        other = serve()
        ids += [begin(first), begin(other)]
        assert {session["id"] for session in listed(first)} == {session["id"] for session in listed(other)} == set(ids)
        if comes:
            other.stop()
        else:
            assert sql(database, "SELECT count(*) FROM sessions") == [(len(ids),)]
        ids.append(begin(first))
    first.process.kill()
    first.process.wait()
    assert {session["id"] for session in listed(serve())} == set(ids)


def test_servers_can_clear_away_at_once_what_killed_ones_left(tmp_path: Path) -> None:
    for number in range(500):
        (tmp_path / f"{number:032x}").touch()
    leases = [clinvk.Lease(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(clinvk.Lease.sweep, leases))
    assert {file.name for file in tmp_path.iterdir()} == {lease.name for lease in leases}
    for lease in leases:
        lease.end()


# ---- A database that can not be used

def by_a_directory(file: Path) -> None:
    os.rename(file, f"{file}.aside")
    file.mkdir()


def by_garbage(file: Path) -> None:
    os.rename(file, f"{file}.aside")
    file.write_bytes(b"this is no database\n" * 500)


def by_a_newer_one(file: Path) -> None:
    os.rename(file, f"{file}.aside")
    newer(file)


def put_back(file: Path) -> None:
    if file.is_dir():
        file.rmdir()
    os.replace(f"{file}.aside", file)


REPLACED = pytest.mark.parametrize("replaced", [by_a_directory, by_garbage, by_a_newer_one])


def test_health_tells_of_the_store(client: Client) -> None:
    for count in range(3):
        reply = client.call("GET", "/health")
        assert reply.json["session_store"] == {"available": True, "session_count": count, "error": None}
        assert reply.status == 200 and reply.json["status"] in ("ok", "degraded")
        begin(client)


@REPLACED
def test_health_is_bad_while_the_store_is(
        client: Client, clients_database: Path, replaced: Callable[[Path], None]) -> None:
    begin(client)
    replaced(clients_database)
    for _ in range(2):
        reply = client.call("GET", "/health")
        store = reply.json["session_store"]
        assert (reply.status, reply.json["status"], store["available"]) == (503, "unhealthy", False)
        assert store["session_count"] is None and str(clients_database) in store["error"]


@REPLACED
def test_without_a_store_nothing_runs_but_what_is_ephemeral(
        make_client: Callable[..., Client], scripted: Dict[str, Any], tmp_path: Path, clients_database: Path,
        replaced: Callable[[Path], None]) -> None:
    client = make_client(scripted)
    name = begin(client, backend="claude")
    replaced(clients_database)
    for fields in ({}, {"session_id": name}, {"output_format": "stream-json"}):
        assert ask(client, "hello", "claude", **fields).status == 503
    assert [client.call(method, f"/api/v1/sessions/{name}").status for method in ("GET", "DELETE")] == [503, 503]
    assert (client.call("GET", "/api/v1/sessions").status, len(told(tmp_path))) == (503, 1)
    assert ask(client, "hello", "claude", ephemeral=True).json["exit_code"] == 0
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
    assert client.call("POST", "/openai/v1/chat/completions", body).status == 200
    assert client.call("POST", "/api/v1/parallel", {"tasks": [{"backend": "echo", "prompt": "a"}]}).status == 200


@pytest.mark.parametrize("replaced", [by_a_directory, by_garbage])
def test_a_store_that_is_put_back_is_used_again(
        client: Client, clients_database: Path, replaced: Callable[[Path], None]) -> None:
    name = begin(client)
    replaced(clients_database)
    assert (ask(client).status, client.call("GET", "/health").status) == (503, 503)
    put_back(clients_database)
    assert client.call("GET", "/health").status == 200
    assert only(client)["id"] == name and ask(client, session_id=name).status == 200


@pytest.mark.parametrize("ends", [("",), ("", "-wal", "-shm")], ids=["the file", "the file and its log"])
def test_a_database_that_was_removed_is_made_anew_and_used(
        serve: Callable[..., Served], database: Path, ends: Tuple[str, ...]) -> None:
    server, other = serve(), serve()
    begin(server, "lost")
    begin(other, "lost")
    for end in ends:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{database}{end}").unlink()
    assert server.call("GET", "/health").json["session_store"]["session_count"] == 0
    ids = {begin(server), begin(other), begin(server)}
    assert {session["id"] for session in listed(server)} == {session["id"] for session in listed(other)} == ids
    assert {mode(file) for file in database.parent.glob("sessions.db*")} == {0o600}
    for each in (server, other):
        each.process.kill()
        each.process.wait()
    assert {session["id"] for session in listed(serve())} == ids


def test_a_run_whose_end_can_not_be_stored_says_so_and_has_its_answer(
        serve: Callable[..., Served], scripted: Dict[str, Any], meanwhile: Callable[..., Any], tmp_path: Path,
        database: Path) -> None:
    server = serve(config=scripted)
    running = meanwhile(ask, server, "hold on", "it")
    await_told(tmp_path)
    by_a_directory(database)
    (tmp_path / "go").touch()
    reply = running.result()
    assert (reply.status, reply.json["output"]) == (200, "said:\nhold on")
    assert reply.json["exit_code"] != 0 and "not stored" in reply.json["error"]


def test_a_server_without_a_store_stops_cleanly(serve: Callable[..., Served], database: Path) -> None:
    server = serve()
    begin(server)
    by_a_directory(database)
    assert (server.stop(), "Traceback" in server.stderr) == (0, False)


def test_a_turn_whose_end_could_not_be_stored_does_not_stay_active(
        serve: Callable[..., Served], scripted: Dict[str, Any], database: Path, tmp_path: Path,
        meanwhile: Callable[..., "Future[Reply]"]) -> None:
    server = serve(config=scripted)
    running = meanwhile(ask, server, "hold", "it")
    await_told(tmp_path)
    with contextlib.closing(sqlite3.connect(str(database), isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        (tmp_path / "go").touch()
        answer = running.result().json
        holder.execute("ROLLBACK")
    assert answer["output"] == "said:\nhold" and answer["exit_code"] == -1 and "not stored" in answer["error"]
    begin(server)  # the next who writes makes up for it
    [session] = listed(server, "?backend=it")
    assert (session["status"], session["error_message"]) == ("error", clinvk.GIVEN_UP)
    assert server.call("DELETE", f"/api/v1/sessions/{session['id']}").status == 200


def test_many_long_prompts_at_once_are_all_stored(serve: Callable[..., Served],
                                                  meanwhile: Callable[..., "Future[Reply]"]) -> None:
    server, prompt = serve(), "x" * 4_000_000
    asked = [meanwhile(ask, server, prompt) for _ in range(12)]
    assert {one.result().status for one in asked} == {200}
    assert {session["status"] for session in listed(server)} == {"completed"}


# ---- Killed under load

ROUNDS = 50
SHELL = 'prompt=$(cat); sleep $(printf 0.%03d $((20 + $$ % 81))); case $prompt in fail*) exit 3;; esac; echo "$prompt"'


class Ledger:
    """What one client was told, over all rounds."""

    def __init__(self) -> None:
        self.turns: Dict[str, int] = {}  # session -> how many of its turns were answered
        self.said: Dict[str, str] = {}  # session -> its status by the last answer
        self.cut: Set[str] = set()  # sessions of which a later turn was cut off
        self.echoes: List[str] = []
        self.answers = 0

    def load(self, server: Served, chance: random.Random) -> None:
        """Half new sessions, half further turns, until the server has gone."""
        while True:
            name = chance.choice(self.echoes) if self.echoes and chance.random() < 0.5 else ""
            backend = "echo" if name or chance.random() < 0.5 else "it"
            more = {"session_id": name} if name else {}
            try:
                reply = ask(server, chance.choice(["hello there", "fail"]), backend, **more)
            except (OSError, http.client.HTTPException):
                self.cut |= {name}
                return
            assert reply.status == 200, reply.body
            self.answered(reply.json["session_id"], backend, reply.json["exit_code"])

    def answered(self, name: str, backend: str, exit_code: int) -> None:
        self.cut.discard(name)
        self.answers += 1
        self.turns[name] = self.turns.get(name, 0) + 1
        self.said[name] = "error" if exit_code else "completed"
        if backend == "echo" and self.turns[name] == 1:
            self.echoes.append(name)

    def keeps(self, session: Dict[str, Any]) -> bool:
        """Whether a session is as was answered."""
        name, status = session["id"], session["status"]
        same = status == self.said[name] or (name in self.cut and status == "error" and
                                             session["error_message"] == STOPPED)
        return same and int(session["turn_count"]) >= self.turns[name]


def integrity(database: Path, aside: Path) -> List[Any]:
    """Of a copy: to open the database itself would mend what the next server has to."""
    for end in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(f"{database}{end}", f"{aside}{end}")
    return sql(aside, "PRAGMA integrity_check")


def test_no_answered_turn_is_lost_however_often_the_server_is_killed(
        serve: Callable[..., Served], tmp_path: Path, database: Path) -> None:
    config = {"backends": {"it": {"command": ["sh", "-c", SHELL]}}}
    chance, ledgers = random.Random(16), [Ledger() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        def answered() -> int:
            return sum(ledger.answers for ledger in ledgers)
        for round_ in range(ROUNDS):
            server = serve(config=config)
            loads = [pool.submit(ledger.load, server, random.Random(8 * round_ + i))
                     for i, ledger in enumerate(ledgers)]
            answers = answered() + chance.randint(1, 24)
            eventually(lambda answers=answers: answered() >= answers)
            server.process.kill()
            server.process.wait()
            for load in loads:
                load.result(30)
            assert integrity(database, tmp_path / "copy") == [("ok",)]
    server = serve(config=config)
    found: Dict[str, Dict[str, Any]] = {}
    while len(found) < server.call("GET", "/api/v1/sessions?limit=1").json["total"]:
        found.update({session["id"]: session for session in listed(server, f"?limit=1000&offset={len(found)}")})
    assert not [session for session in found.values() if session["status"] == "active"]
    assert sum(len(ledger.echoes) for ledger in ledgers) > ROUNDS  # sessions of many turns, and others
    for ledger in ledgers:
        assert not [name for name in ledger.turns if name not in found or not ledger.keeps(found[name])]
