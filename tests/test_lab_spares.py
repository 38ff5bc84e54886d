"""The real CLIs (labkit) that wait: started before the request comes, or with the conversation whose last answer they
gave. What they say to the provider is what one that is started for the request says.

Each test is a story that is told of all the CLIs at once, each behind a clinvk of its own."""

import concurrent.futures
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import pytest
from conftest import Reply, eventually
from lab.stub_llm import INJECTED, text_of

import labkit
from labkit import KEY, Cli, Lab, texts, user

pytestmark = pytest.mark.lab
Json = Dict[str, Any]
NAMES = ["claude", "codex", "gemini", "claude 2.1.331"]
WAITING: Json = {"server": {"spares": 1, "live_conversations": 1}}
OTHERS = {"claude": "claude-haiku-4-5", "codex": "stub-other", "gemini": "gemini-2.5-pro"}


# ---- Credentials that stand in files

CODEX_CONFIG = labkit.CODEX_CONFIG.replace('env_key = "STUB_KEY"', "requires_openai_auth = true")


def log_in(home: Path, key: str) -> None:
    """The three CLIs use this key from now on."""
    for name, text in ((".claude/settings.json", json.dumps({"env": {"ANTHROPIC_API_KEY": key}})),
                       (".codex/auth.json", json.dumps({"OPENAI_API_KEY": key})),
                       (".gemini/.env", f"GEMINI_API_KEY={key}\n")):
        file = home / name
        file.parent.mkdir(exist_ok=True)
        file.with_name("new").write_text(text)
        file.with_name("new").replace(file)


def key_in(entry: Json) -> str:
    """The one that a request has to a provider."""
    headers = entry["headers"]
    sent = headers.get("x-api-key") or headers.get("x-goog-api-key") or headers.get("authorization", "")
    return str(sent).rpartition(" ")[2]


# ---- Everybody

class Waiting(Cli):
    """One CLI that may wait, behind a clinvk and a stub of its own; its credentials stand in files."""

    def __init__(self, name: str, pyz: Path, folder: Path, *, config: Json = WAITING, lab: Optional[Lab] = None,
                 **options: Any) -> None:
        lab = lab or Lab(folder)
        if not (folder / "home").exists():
            home = labkit.make_home(folder / "home", lab.url)
            (home / ".codex" / "config.toml").write_text(CODEX_CONFIG % lab.url)
            log_in(home, "sk-first")
        self.pyz, self.folder = pyz, folder
        super().__init__(name, lab, pyz, folder, config=config, **options, **dict.fromkeys(labkit.KEYS.values()))

    def beside(self, **options: Any) -> Cli:
        """A further clinvk in the same home."""
        return Waiting(self.name, self.pyz, self.folder, lab=self.lab, version=self.version, **options)

    def chat(self, messages: List[Json], **fields: Any) -> Reply:
        return self.served.call("POST", "/v1/chat/completions", {"model": self.name, "messages": messages, **fields},
                                x_api_key=KEY)

    def message(self, messages: List[Json], **fields: Any) -> Reply:
        body = {"model": self.name, "max_tokens": 1000, "messages": messages, **fields}
        return self.served.call("POST", "/anthropic/v1/messages", body, x_api_key=KEY)

    # ---- What waits

    def children(self) -> List[int]:
        """The processes that clinvk itself has started, less those that have ended."""
        found = []
        for process in self.processes():
            with contextlib.suppress(OSError):
                state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
                found += [int(process.name)] if (int(parent), state == "Z") == (self.served.process.pid, False) else []
        return found

    def ready(self, number: int) -> List[int]:
        """The CLIs that wait, once it is so many and they have nothing to do."""
        def found() -> List[int]:
            before = used(self.children())
            time.sleep(0.25)
            after = used(self.children())
            return list(after) if before == after and len(after) == number else []
        return list(eventually(found, 40))

    def kill_all(self, number: int) -> None:
        """What waits: the next request finds nothing."""
        for pid in self.ready(number):
            os.kill(pid, signal.SIGKILL)


def used(pids: Sequence[int]) -> Dict[int, Tuple[str, ...]]:
    """The processor time that each process has had."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[pid] = tuple(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
    return found


Story = Callable[[Waiting], Any]


class Everybody:
    """All the CLIs. A story is told of all of them at once when the first of its tests asks for it, and told once."""

    def __init__(self, pyz: Path, folder: Path) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(len(NAMES))
        self.told: Dict[Story, Dict[str, Any]] = {}
        self.clis: Dict[str, Waiting] = {}
        for name in NAMES:
            (folder / name).mkdir()
            backend, _, version = name.partition(" ")
            self.clis[name] = Waiting(backend, pyz, folder / name, version=version)

    def tell(self, story: Story, name: str) -> Any:
        """What the story gives; it fails as that does."""
        if story not in self.told:
            self.told[story] = {one: self.pool.submit(story, cli) for one, cli in self.clis.items()}
            concurrent.futures.wait(self.told[story].values())
        return self.told[story][name].result()

    def close(self) -> None:
        self.pool.shutdown()
        for cli in self.clis.values():
            cli.close()
            cli.lab.process.kill()
            cli.lab.process.wait()


@pytest.fixture(scope="module")
def everybody(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everybody]:
    made = Everybody(pyz, tmp_path_factory.mktemp("waiting"))
    yield made
    made.close()


def system(text: str) -> List[Json]:
    return [{"role": "system", "content": text}]


def assistant(text: str) -> List[Json]:
    return [{"role": "assistant", "content": text}]


def said_by(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return str(reply.json["choices"][0]["message"]["content"])


def start_of(reply: Reply) -> str:
    return reply.headers["x-clinvk-start"]


def asked(cli: Cli) -> Json:
    """The one request for an answer since `forget`."""
    entries = cli.lab.asked
    assert len(entries) == 1, [entry["prompt"] for entry in entries]
    return entries[0]


def history(entry: Json) -> List[Tuple[str, str]]:
    """Who said what, in a request to any of the providers; what the CLIs add to it is left out."""
    body = entry["body"]
    found = []
    for message in body.get("messages") or body.get("input") or body["contents"]:
        text = INJECTED.sub("", text_of(message.get("content") or message.get("parts"))).strip()
        if message.get("role") in ("user", "assistant", "model") and text:
            found.append(("user" if message["role"] == "user" else "assistant", text))
    return found


# ---- A spare says what a CLI says that is started for the request

def request_of(cli: Waiting, name: str) -> Reply:
    """Each differs from the one before in all that can be said."""
    other = f"{cli.name}/{OTHERS[cli.name]}"
    if name == "300 kB":
        return cli.chat([*system("You are a parrot."), *user("300 kB " * 45_000)], model=other, max_tokens=60,
                        reasoning_effort="high")
    if name == "nothing but a prompt":
        return cli.chat(user("hello"))
    if name == "all there is":
        return cli.chat([*system("You are a pirate."), *user("/cost")], model=other, max_tokens=50,
                        reasoning_effort="low")
    return cli.message(user("@/etc/hostname"), system="", max_tokens=4000,
                       thinking={"type": "enabled", "budget_tokens": 2000})


REQUESTS = ["300 kB", "nothing but a prompt", "all there is", "thinking"]


class Sent(NamedTuple):
    start: str  # how its CLI came to be there
    asked: List[Json]  # the requests to the provider


def same_requests(cli: Waiting) -> Dict[str, Tuple[Sent, Sent]]:
    """Each of REQUESTS, cold, and from a spare that was started for the one before it."""
    def sent(name: str) -> Sent:
        cli.lab.forget()
        reply = request_of(cli, name)
        assert reply.status == 200, reply.body
        return Sent(start_of(reply), cli.lab.asked)
    cold, spare = {}, {}
    for name, following in zip(REQUESTS, [*REQUESTS[1:], REQUESTS[0]]):
        cold[name] = sent(name)
        cli.ready(2)
        spare[following] = sent(following)
        cli.kill_all(2)
    return {name: (cold[name], spare[name]) for name in REQUESTS}


ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
TIME = re.compile(r'(?<=_at_unix_ms":)\d+')
SCRATCH = re.compile(r"/runs/\d+-\w+/\.gemini/tmp/empty(-1)?")


def without_ids(value: Any) -> Any:
    if isinstance(value, str):
        return SCRATCH.sub("<scratch>", TIME.sub("<time>", ID.sub("<id>", value)))
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    return {name: without_ids(item) for name, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_spare_asks_as_a_cli_does_that_is_started_for_the_request(everybody: Everybody, name: str,
                                                                    request_name: str) -> None:
    cold, spare = everybody.tell(same_requests, name)[request_name]
    assert (cold.start, spare.start, len(cold.asked), len(spare.asked)) == ("cold", "spare", 1, 1)
    for part in ("path", "model", "body"):
        assert without_ids(spare.asked[0][part]) == without_ids(cold.asked[0][part])


# ---- The next turn, on the process that gave the answer before

FAILURES = ["!drop !long 4", "!error 400", "!error 429"]


def next_turns(cli: Waiting) -> Dict[str, Any]:
    """A conversation; after a good second turn each failure comes as a turn, alone, and the client repeats it."""
    fields = {"model": f"{cli.name}/{OTHERS[cli.name]}", "max_tokens": 500}
    talk, told = [*system("XSYS"), *user("!history")], []
    first = cli.chat(talk, **fields)
    talk += assistant(said_by(first)) + user("!history")
    cli.lab.forget()
    told.append((cli.chat(talk, **fields), list(talk[1:]), asked(cli)))
    failed = {}
    for prompt in FAILURES:
        talk += assistant(said_by(told[-1][0]))
        as_live = cli.chat(talk + user(prompt), **fields)
        cli.kill_all(1)
        as_cold = cli.chat(user(prompt), **fields)
        failed[prompt] = (as_live, as_cold)
        cli.ready(1)
        cli.lab.forget()
        again = cli.chat(talk + user("again"), **fields)
        told.append((again, talk[1:] + user("again"), asked(cli)))
        talk += user("again") + assistant(said_by(again)) + user("!history")
        cli.lab.forget()
        told.append((cli.chat(talk, **fields), list(talk[1:]), asked(cli)))
    cli.kill_all(2)
    return {"first": first, "told": told, "failed": failed}


@pytest.mark.parametrize("name", NAMES)
def test_the_next_turn_goes_on_in_the_process_that_gave_the_answer(everybody: Everybody, name: str) -> None:
    story = everybody.tell(next_turns, name)
    assert start_of(story["first"]) == "cold"
    for reply, talk, entry in story["told"][::2]:
        assert start_of(reply) == "live"
        assert said_by(reply) == f"HISTORY[{entry['messages']}]"
        assert (entry["model"], entry["body"].get("max_tokens")) == (
            OTHERS[name.split()[0]], 500 if "claude" in name else None)
        assert sum("XSYS" in text for text in texts(entry["body"])) == 1
        ends = history(entry)[-2:]
        assert ends == [(message["role"], message["content"]) for message in talk[-2:]]


@pytest.mark.parametrize("name", NAMES)
def test_the_history_of_a_next_turn_is_exact(everybody: Everybody, name: str) -> None:
    reply, talk, entry = everybody.tell(next_turns, name)["told"][0]
    assert start_of(reply) == "live"
    assert history(entry) == [(message["role"], message["content"]) for message in talk]


@pytest.mark.parametrize("name", NAMES)
def test_the_usage_of_a_next_turn_is_its_own(everybody: Everybody, name: str) -> None:
    story = everybody.tell(next_turns, name)
    usages = [reply.json["usage"] for reply, _, _ in story["told"][::2]]
    assert usages == [story["first"].json["usage"]] * len(usages)


@pytest.mark.parametrize("prompt", FAILURES)
@pytest.mark.parametrize("name", NAMES)
def test_a_next_turn_fails_as_a_first_one_does(everybody: Everybody, name: str, prompt: str) -> None:
    live, cold = everybody.tell(next_turns, name)["failed"][prompt]
    assert (start_of(live), start_of(cold)) == ("live", "cold")
    assert live.status == cold.status == (429 if prompt == "!error 429" else 502), (live, cold)
    assert live.json == cold.json
    assert live.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("name", NAMES)
def test_after_a_turn_that_failed_the_history_is_there_once(everybody: Everybody, name: str) -> None:
    for reply, talk, entry in everybody.tell(next_turns, name)["told"][1::2]:
        assert (start_of(reply), said_by(reply)) == ("spare", "STUB[again]")
        sent = "\n".join(text for _, text in history(entry))
        assert not any(prompt in sent for prompt in FAILURES)
        for part in ("!history", "again", "HISTORY"):
            assert sent.count(part) == sum(part in message["content"] for message in talk), part
