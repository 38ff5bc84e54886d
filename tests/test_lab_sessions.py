"""Conversations of several turns with the real CLIs, each turn in a process of its own (labkit); and several CLIs in
one request."""

import collections
import contextlib
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from conftest import eventually

import labkit
from labkit import KEY, Cli, Lab, at_once, system_prompt, texts

pytestmark = pytest.mark.lab
lab, cli, another = labkit.lab, labkit.each_of("claude", "codex", "gemini"), labkit.another  # the fixtures
Json = Dict[str, Any]


@pytest.fixture(autouse=True)
def nothing_asked_yet(lab: Lab) -> None:
    lab.forget()


class Talk:
    """One session; `say` is its next turn, through any server of its database."""

    def __init__(self, cli: Cli) -> None:
        self.cli, self.id = cli, ""

    def say(self, prompt: str, cli: Any = None, **fields: Any) -> Json:
        """The answer of a turn that has succeeded."""
        if self.id:
            fields["session_id"] = self.id
        elif self.cli.name == "gemini":
            fields.setdefault("model", "gemini-2.5-flash")  # else it asks first which one to take
        reply = (cli or self.cli).prompt(prompt, ephemeral=False, **fields)
        assert (reply.status, reply.json.get("exit_code")) == (200, 0), reply.body
        self.id = reply.json["session_id"]
        return dict(reply.json)

    @property
    def session(self) -> Json:
        return dict(self.cli.served.call("GET", f"/api/v1/sessions/{self.id}", x_api_key=KEY).json)

    def files(self) -> List[Path]:
        """What the CLI has stored of it."""
        own = self.session["backend_session_id"]
        places = (".claude/projects/*", ".codex/sessions/**", ".gemini/tmp/*/chats")
        return [file for place in places for file in self.cli.home.glob(f"{place}/*.jsonl")
                if own in file.name or (self.cli.name == "gemini" and own[:8] in file.name)]


def counted(answer: Json) -> int:
    """The messages that the model saw, in an answer to `!history`."""
    return int(answer["output"].partition("[")[2].rstrip("]"))


def test_a_conversation_goes_on_when_server_and_cli_have_been_killed(another: Callable[..., Cli]) -> None:
    first = another()
    talk = Talk(first)
    talk.say("the word is 4711")
    two = talk.say("!history")
    first.served.process.kill()
    first.served.process.wait()
    second = another()
    second.lab.forget()
    three = talk.say("!history", second)
    assert counted(three) == counted(two) + 2
    assert any("the word is 4711" in text for text in texts(second.lab.asked[-1]["body"]))
    assert three["token_usage"] == two["token_usage"] and three.get("cost_usd") == pytest.approx(two.get("cost_usd"))
    talk.cli = second
    assert (talk.session["turn_count"], talk.session["status"]) == (3, "completed")


def test_two_servers_take_turns_in_one_conversation(cli: Cli, another: Callable[..., Cli], tmp_path: Path) -> None:
    (tmp_path / "home").symlink_to(cli.home)
    (tmp_path / "work").symlink_to(cli.workdir)
    other, talk = another(), Talk(cli)
    counts = [counted(talk.say("!history", server)) for server in (cli, other, cli)]
    assert [later - earlier for earlier, later in zip(counts, counts[1:])] == [2, 2]


def test_a_turn_with_tools_stays_in_the_conversation_as_it_was(cli: Cli) -> None:
    """Each call once, and its result once, however often the conversation is gone on with."""
    talk = Talk(cli)
    talk.say("!tool echo one", approval_mode="auto")
    talk.say("!tool echo two", approval_mode="auto")
    cli.lab.forget()
    talk.say("!history")
    talk.say("!history")
    for entry in cli.lab.asked[-2:]:
        kinds = collections.Counter(kinds_in(entry["body"]))
        assert (kinds["call"], kinds["result"]) == (2, 2)


def kinds_in(value: Any) -> List[str]:
    """`call` and `result`, for those of all tools in a request to any of the providers."""
    if isinstance(value, list):
        return [kind for item in value for kind in kinds_in(item)]
    if not isinstance(value, dict):
        return []
    kind = value.get("type")
    here = ["call"] if kind in ("tool_use", "function_call", "custom_tool_call") or "functionCall" in value else \
        ["result"] if kind in ("tool_result", "function_call_output", "custom_tool_call_output") or \
        "functionResponse" in value else []
    return here + [kind for name, item in value.items() if name != "tools" for kind in kinds_in(item)]


def test_what_one_turn_was_allowed_the_next_is_not(cli: Cli) -> None:
    talk = Talk(cli)
    allowed = {"sandbox_mode": "full"} if cli.name == "codex" else {"approval_mode": "auto"}
    names = [f"{talk.cli.name}-{turn}" for turn in ("allowed", "not")]
    for name, modes in zip(names, (allowed, {})):
        talk.say(f"!tool touch {name}", **modes)
    assert [(cli.workdir / name).exists() for name in names] == [True, False]
    if cli.name == "codex":
        talk.say(f"!tool touch {names[1]}", sandbox_mode="workspace")
        assert (cli.workdir / names[1]).exists()


def test_the_system_prompt_and_the_model_of_the_first_turn_hold_for_the_others(cli: Cli) -> None:
    talk = Talk(cli)
    talk.say("hello", system_prompt="XSYS: be brief", model="gemini-2.5-pro" if cli.name == "gemini" else "stub-other")
    models = {entry["model"] for entry in cli.lab.asked}
    cli.lab.forget()
    talk.say("hello again")
    body = cli.lab.asked[-1]["body"]
    assert {entry["model"] for entry in cli.lab.asked} == models
    assert sum("XSYS" in text for text in texts(body)) == 1


def test_another_system_prompt_holds_or_is_named_as_ignored(cli: Cli) -> None:
    talk = Talk(cli)
    talk.say("hello", system_prompt="XSYS")
    cli.lab.forget()
    answer = talk.say("hello again", system_prompt="YSYS")
    body = cli.lab.asked[-1]["body"]
    sent = any("YSYS" in text for text in (system_prompt(body) if cli.name != "gemini" else texts(body)))
    assert ("system_prompt" in answer.get("ignored", [])) == (cli.name in ("codex", "gemini"))
    assert sent == (cli.name != "codex")


def test_a_prompt_that_begins_with_a_slash_stays_in_the_conversation(cli: Cli) -> None:
    talk = Talk(cli)
    talk.say("/cost of 4711?")
    talk.say("?4712")
    cli.lab.forget()
    talk.say("hello")
    said = list(texts(cli.lab.asked[-1]["body"]))
    assert all(any(part in text for text in said) for part in ("/cost of 4711?", "?4712"))


def test_what_the_cli_has_lost_is_a_clear_error_and_the_session_stays(cli: Cli) -> None:
    talk = Talk(cli)
    talk.say("hello")
    before = talk.session
    for process in cli.processes():  # among them the one that has the conversation
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.name), signal.SIGKILL)
    eventually(lambda: not cli.processes())
    for file in talk.files():
        file.unlink()
    cli.lab.forget()
    reply = cli.prompt("hello again", ephemeral=False, session_id=talk.id)
    assert (reply.status, "has lost the conversation" in reply.json["detail"]) == (404, True), reply.body
    assert cli.lab.asked == []
    assert talk.session == before


def test_delete_removes_what_the_cli_has_stored_and_nothing_else(cli: Cli) -> None:
    talk, other = Talk(cli), Talk(cli)
    other.say("hello")
    talk.say("hello")
    talk.say("hello again")
    files = eventually(talk.files)
    assert cli.served.call("DELETE", f"/api/v1/sessions/{talk.id}", x_api_key=KEY).status == 200
    eventually(lambda: not any(file.exists() for file in files))
    assert counted(other.say("!history")) > 1


def test_a_turn_that_its_client_has_left_does_not_end_the_conversation(cli: Cli) -> None:
    talk = Talk(cli)
    talk.say("the word is 4711")
    events = cli.events("!slow 50", ephemeral=False, session_id=talk.id)
    next(event for event in events if event["type"] == "message")
    assert talk.session["status"] == "active"
    events.close()  # type: ignore[attr-defined]
    eventually(lambda: talk.session["status"] == "error")
    cli.lab.forget()
    talk.say("hello")
    assert any("the word is 4711" in text for text in texts(cli.lab.asked[-1]["body"]))
    assert talk.session["status"] == "completed"


def test_a_session_whose_first_turn_failed_can_be_gone_on_with(cli: Cli) -> None:
    talk = Talk(cli)
    model = "gemini-2.5-flash" if cli.name == "gemini" else None
    failed = cli.prompt("!error 400", ephemeral=False, model=model, system_prompt="XSYS")
    assert failed.json["exit_code"] == 1, failed.body
    talk.id = failed.json["session_id"]
    assert talk.session["status"] == "error" and talk.session["error_message"]
    talk.say("the word is 4711")
    assert (talk.session["status"], talk.session["error_message"], talk.session["turn_count"]) == ("completed", "", 2)
    cli.lab.forget()
    talk.say("hello")
    said = list(texts(cli.lab.asked[-1]["body"]))
    assert [sum(part in text for text in said) for part in ("the word is 4711", "XSYS")] == [2, 1]  # the answer, too


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.6])
def test_a_session_whose_first_turn_was_cut_off_can_be_gone_on_with(cli: Cli, seconds: float) -> None:
    talk = Talk(cli)
    cut = cli.prompt("!slow 50", ephemeral=False, timeout_secs=seconds, system_prompt="XSYS")
    assert cut.json["exit_code"] == -1, cut.body
    talk.id = cut.json["session_id"]
    cli.lab.forget()
    talk.say("hello")
    assert sum("XSYS" in text for text in texts(cli.lab.asked[-1]["body"])) == 1
    assert talk.session["status"] == "completed"


def test_conversations_at_once_in_one_directory_stay_apart(cli: Cli) -> None:
    talks = [Talk(cli) for _ in range(3)]  # one more than run at once, and than may wait
    at_once([functools.partial(talk.say, f"first of {n}") for n, talk in enumerate(talks)])
    at_once([functools.partial(talk.say, "!history") for talk in talks])
    cli.lab.forget()
    for n, talk in enumerate(talks):
        talk.say("hello")
        said = [text for text in texts(cli.lab.asked[-1]["body"]) if "first of" in text and "STUB" not in text]
        assert len(said) == 1 and f"first of {n}" in said[0]


# ---- Several CLIs in one request

@pytest.fixture(scope="module")
def all_three(lab: Lab, pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One clinvk with all of the CLIs behind it."""
    made = Cli("claude", lab, pyz, tmp_path_factory.mktemp("all"), config={"backends": {}})
    yield made
    made.close()


def test_one_prompt_is_compared_across_all_three(all_three: Cli) -> None:
    body = {"backends": ["claude", "codex", "gemini"], "prompt": "hello"}
    answer = all_three.served.call("POST", "/api/v1/compare", body, x_api_key=KEY).json
    assert [(one["backend"], one["exit_code"], one["output"]) for one in answer["results"]] == [
        (name, 0, "STUB[hello]") for name in body["backends"]]
    assert all(one["model"] and one["token_usage"]["output_tokens"] for one in answer["results"])


def test_a_chain_hands_each_output_to_the_next_cli(all_three: Cli) -> None:
    steps = [{"backend": "claude", "prompt": "first"}, {"backend": "codex", "prompt": "say {{previous}}"},
             {"backend": "gemini", "prompt": "and {{previous}}"}]
    answer = all_three.served.call("POST", "/api/v1/chain", {"steps": steps}, x_api_key=KEY).json
    assert answer["results"][-1]["output"] == "STUB[and STUB[say STUB[first]]]"
    assert all_three.served.call("GET", "/api/v1/sessions", x_api_key=KEY).json["total"] == 0


def test_fail_fast_leaves_no_process_of_the_others(lab: Lab, pyz: Path, tmp_path: Path) -> None:
    failing = Cli("claude", lab, pyz, tmp_path, config={"backends": {
        "gemini": {"enabled": True}, "broken": {"command": [sys.executable, "-c", "raise SystemExit(3)"]}}})
    def versions() -> List[str]:
        listed = failing.served.call("GET", "/api/v1/backends", x_api_key=KEY).json["backends"]
        return [backend["version"] for backend in listed if backend["name"] in ("claude", "codex", "gemini")]
    eventually(lambda: all(versions()) and not failing.processes())  # else CLIs are asked for them in between
    tasks = [{"backend": name, "prompt": "!hang"} for name in ("claude", "codex", "gemini")]
    body = {"tasks": [*tasks, {"backend": "broken", "prompt": "x"}], "max_parallel": 4, "fail_fast": True}
    answer = failing.served.call("POST", "/api/v1/parallel", body, x_api_key=KEY).json
    assert [one["error"] for one in answer["results"][:3]] == ["canceled"] * 3, json.dumps(answer)
    eventually(lambda: not failing.processes())
    failing.close()
