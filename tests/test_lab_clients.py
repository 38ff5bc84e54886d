"""Claude Code and Codex as clients of clinvk.pyz, with another of the real CLIs behind it (labkit)."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import pytest

import labkit
from labkit import KEY, NOWHERE, Cli, Json, Lab, environment, installed, make_home, texts

pytestmark = pytest.mark.lab
lab = labkit.lab  # the fixture

APIS = {"claude/sonnet": "anthropic", "codex": "responses", "gemini": "gemini"}  # model -> what the stub is asked by
STREAM_JSON = ["--output-format", "stream-json", "--verbose", "--include-partial-messages"]
AT_MOST = 200.0  # seconds for a turn, after which the client is killed


class Said(NamedTuple):
    """How a client's turn ended. `pieces` are the deltas of its text as they came."""
    code: int
    text: str
    error: str
    pieces: Sequence[str] = ()


class Client:
    """A CLI on its user's desk: clinvk is the only provider it knows of, clinvk's key its login."""

    def __init__(self, name: str, server: Cli, folder: Path) -> None:
        """Claude Code of another version than the pinned one is told of `.../anthropic/v1`, as some users have it."""
        self.name, _, version = name.partition(" ")
        self.workdir = folder
        self.go: Optional[Path] = None  # made when the third delta has come
        home = make_home(folder / "home", server.served.url + "/openai")
        programs = str(installed(**({self.name: version} if version else {})))
        base = server.served.url + ("/anthropic/v1" if version else "/anthropic")
        self.environ = {**environment(home, NOWHERE, programs), "ANTHROPIC_BASE_URL": base, "ANTHROPIC_API_KEY": KEY,
                        "STUB_KEY": KEY}

    @contextlib.contextmanager
    def running(self, *command: str) -> Iterator["subprocess.Popen[str]"]:
        """The command, which is killed with its children when its time is up; its end is waited for."""
        process = subprocess.Popen(command, cwd=self.workdir, env=self.environ, text=True, start_new_session=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        watch = threading.Timer(AT_MOST, os.killpg, (process.pid, signal.SIGKILL))
        watch.start()
        try:
            with process:
                yield process
        finally:
            watch.cancel()

    def ask(self, prompt: str, model: str, *, again: bool = False) -> Said:
        """One turn of its command for scripts; `again`: of the last conversation."""
        if self.name == "claude":
            return self.ask_claude(prompt, "--model", model, *(["--continue"] if again else []))
        resume = ["resume", "--last"] if again else []
        with self.running("codex", "exec", *resume, "--json", "--skip-git-repo-check", "-m", model, "-") as process:
            printed, _ = process.communicate(prompt)
        lines = [json.loads(line) for line in printed.splitlines()]
        items = [line["item"] for line in lines if line["type"] == "item.completed"]
        failed = [line["error"]["message"] for line in lines if line["type"] == "turn.failed"]
        return Said(process.returncode, "".join(i["text"] for i in items if i["type"] == "agent_message"),
                    "".join(failed))

    def ask_claude(self, prompt: str, *flags: str) -> Said:
        pieces: List[str] = []
        result: Json = {}
        with self.running("claude", "-p", *STREAM_JSON, *flags) as process:
            assert process.stdin and process.stdout
            process.stdin.write(prompt)
            process.stdin.close()
            for line in map(json.loads, process.stdout):
                delta = line.get("event", {}).get("delta", {})
                if delta.get("type") == "text_delta":
                    self.hear(pieces, delta["text"])
                result = line if line["type"] == "result" else result
        text, error = ("", result["result"]) if result["is_error"] else (result["result"], "")
        return Said(process.returncode, text, error, pieces)

    def hear(self, pieces: List[str], delta: str) -> None:
        pieces.append(delta)
        if self.go and len(pieces) == 3:
            self.go.touch()

    def stream(self, prompt: str, model: str) -> Said:
        """One turn as it streams: Codex does so in `codex app-server`, behind a program of any name."""
        if self.name == "claude":
            return self.ask(prompt, model)
        pieces: List[str] = []
        messages = []
        with self.running("codex", "app-server") as process:
            assert process.stdin and process.stdout

            def say(**message: Any) -> None:
                print(json.dumps(message), file=process.stdin, flush=True)
            say(id=1, method="initialize", params={"clientInfo": {"name": "desk", "version": "1"}})
            say(method="initialized")
            say(id=2, method="thread/start", params={"cwd": str(self.workdir), "model": model})
            for line in map(json.loads, process.stdout):
                if line.get("id") == 2:
                    turn = {"threadId": line["result"]["thread"]["id"], "input": [{"type": "text", "text": prompt}]}
                    say(id=3, method="turn/start", params=turn)
                elif line.get("method") == "item/agentMessage/delta":
                    self.hear(pieces, line["params"]["delta"])
                elif line.get("method") == "item/completed" and line["params"]["item"]["type"] == "agentMessage":
                    messages.append(line["params"]["item"]["text"])
                elif line.get("method") == "turn/completed":
                    break
        assert line.get("method") == "turn/completed", "killed"
        failed = line["params"]["turn"]["error"]
        return Said(process.returncode, "".join(messages), failed["message"] if failed else "", pieces)


@pytest.fixture(scope="module")
def server(lab: Lab, pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """A clinvk with all three CLIs behind it; none is started before it is asked for."""
    made = Cli("codex", lab, pyz, tmp_path_factory.mktemp("server"), config={"backends": {}, "server": {"spares": 0}})
    yield made
    made.close()


@pytest.fixture(scope="module")
def clients(server: Cli, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Client]:
    """`clients("claude 2.1.331")`: each is made once, for the first start in a new home takes longest."""
    made: Dict[str, Client] = {}

    def client(name: str) -> Client:
        if name not in made:
            made[name] = Client(name, server, tmp_path_factory.mktemp("desk"))
        return made[name]
    return client


@pytest.fixture(autouse=True)
def nothing_asked_yet(server: Cli) -> None:
    server.lab.forget()


@pytest.mark.parametrize("client, model", [
    ("claude", "codex"), ("claude 2.1.331", "gemini"), ("codex", "claude/sonnet"), ("codex", "gemini")])
def test_the_cli_that_the_model_names_holds_the_conversation(
        server: Cli, clients: Callable[[str], Client], client: str, model: str) -> None:
    desk, prompt, answer = clients(client), "Mark the word:\n你好 “plover” 🚀", "STUB[你好 “plover” 🚀]"
    told = desk.ask(prompt, model)
    assert (told.code, told.text, told.error) == (0, answer, "")
    told = desk.ask("And what is the word?", model, again=True)
    assert (told.code, told.text, told.error) == (0, "STUB[And what is the word?]", "")
    first, second = server.lab.asked
    assert [first["api"], second["api"]] == [APIS[model]] * 2
    assert not any(answer in text for text in texts(first["body"]))
    for said in (prompt, answer):
        assert sum(text.count(said) for text in texts(second["body"])) == 1, said


@pytest.mark.parametrize("client, model", [("claude", "codex"), ("codex", "codex")])
def test_the_client_shows_the_text_while_the_provider_still_waits_to_send_the_last_piece(
        clients: Callable[[str], Client], client: str, model: str, tmp_path: Path) -> None:
    desk = clients(client)
    desk.go = tmp_path / "go"
    told = desk.stream(f"!slow 10 !until {desk.go}", model)
    assert told.text == "".join(told.pieces) == "".join(f"chunk{i} " for i in range(10))


@pytest.mark.parametrize("prompt, reason", [("!error 429", "429"), ("!error 401", "not logged in")])
@pytest.mark.parametrize("client, model", [("claude", "codex"), ("codex", "codex")])
def test_a_failed_run_is_told_to_the_user_and_not_repeated(
        server: Cli, clients: Callable[[str], Client], client: str, model: str, prompt: str, reason: str) -> None:
    told = clients(client).ask(prompt, model)
    assert (told.code, told.text) == (1, "") and reason in told.error
    assert [entry["api"] for entry in server.lab.asked] == [APIS[model]]


def test_codex_does_not_repeat_a_failed_run_behind_a_program_of_another_name_either(
        server: Cli, clients: Callable[[str], Client]) -> None:
    told = clients("codex").stream("!error 429", "codex")
    assert told.text == "" and "429" in told.error
    assert [entry["api"] for entry in server.lab.asked] == ["responses"]
