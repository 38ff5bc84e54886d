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
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest
from conftest import Reply, eventually
from lab.stub_llm import INJECTED, text_of

import labkit
from labkit import KEY, Cli, Lab, texts, user

pytestmark = pytest.mark.lab
Json = Dict[str, Any]
NAMES = ["claude", "codex", "gemini"]
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
        return list(eventually(found, 60))

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

FAILURES = {"a broken stream": 502, "!error 400": 502, "!error 429": 429}


def failing(cli: Cli, failure: str) -> str:
    """A prompt that fails like that. The stub breaks off after four pieces, which are all of a short one of gemini's;
    claude asks for the rest of a long one in another way."""
    return failure if failure.startswith("!") else "!drop !long 4" if cli.name == "gemini" else "!drop"


def next_turns(cli: Waiting) -> Dict[str, Any]:
    """A conversation; after a good second turn each failure comes as a turn, alone, and the client repeats it."""
    fields = {"model": f"{cli.name}/{OTHERS[cli.name]}", "max_tokens": 500}
    talk, told = [*system("XSYS"), *user("!history")], []
    first = cli.chat(talk, **fields)
    talk += assistant(said_by(first)) + user("!history")
    cli.lab.forget()
    told.append((cli.chat(talk, **fields), list(talk[1:]), asked(cli)))
    failed = {}
    for failure in FAILURES:
        prompt = failing(cli, failure)
        talk += assistant(said_by(told[-1][0]))
        as_live = cli.chat(talk + user(prompt), **fields)
        cli.kill_all(1)
        as_cold = cli.chat(user(prompt), **fields)
        failed[failure] = (as_live, as_cold)
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


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", NAMES)
def test_a_next_turn_fails_as_a_first_one_does(everybody: Everybody, name: str, failure: str) -> None:
    live, cold = everybody.tell(next_turns, name)["failed"][failure]
    assert (start_of(live), start_of(cold)) == ("live", "cold")
    assert live.status == cold.status == FAILURES[failure], (live, cold)
    assert live.json == cold.json
    assert live.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("name", NAMES)
def test_after_a_turn_that_failed_the_history_is_there_once(everybody: Everybody, name: str) -> None:
    for reply, talk, entry in everybody.tell(next_turns, name)["told"][1::2]:
        assert (start_of(reply), reply.status) == ("spare", 200)
        sent = "\n".join(text for _, text in history(entry))
        assert "!drop" not in sent and "!error" not in sent
        for part in ("!history", "again", "HISTORY"):
            assert sent.count(part) == sum(part in message["content"] for message in talk), part


# ---- Credentials that are replaced or refused meanwhile

def new_credentials(cli: Waiting) -> List[Tuple[Reply, List[Json]]]:
    """The next turn, and another conversation, each after the credentials have been replaced; then a refused one."""
    talk = user("hello")
    talk += assistant(said_by(cli.chat(talk))) + user("again")
    told = []
    for key, messages in (("sk-second", talk), ("sk-third", user("hello"))):
        cli.ready(2)
        log_in(cli.home, key)
        cli.lab.forget()
        told.append((cli.chat(messages), cli.lab.asked))
    cli.ready(2)
    cli.lab.forget()
    refused = cli.chat(user("!error 401"))
    told.append((refused, cli.lab.asked))
    cli.kill_all(2)
    cli.lab.forget()
    told.append((cli.chat(user("!error 401")), cli.lab.asked))
    cli.kill_all(1)
    return told


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_asked_for_with_the_credentials_of_now(everybody: Everybody, name: str) -> None:
    told = everybody.tell(new_credentials, name)
    for key, answer, (reply, entries) in zip(("sk-second", "sk-third"), ("again", "hello"), told):
        assert said_by(reply) == f"STUB[{answer}]"
        assert [key_in(entry) for entry in entries] == [key]


@pytest.mark.parametrize("name", NAMES)
def test_credentials_that_the_provider_refuses_are_a_401_from_a_spare_too(everybody: Everybody, name: str) -> None:
    (from_spare, asked_from_spare), (cold, asked_cold) = everybody.tell(new_credentials, name)[2:]
    assert (from_spare.status, start_of(cold)) == (401, "cold")
    assert from_spare.json == cold.json
    assert len(asked_from_spare) > len(asked_cold)  # a spare, and then a CLI that has read them anew


# ---- A CLI that hangs

def stopped(cli: Waiting) -> List[Tuple[Reply, List[Json]]]:
    """The next turn and another conversation, when all that waits hangs; and once more, when none does."""
    talk = user("hello")
    talk += assistant(said_by(cli.chat(talk))) + user("next")
    pids = cli.ready(2)
    cli.lab.forget()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    told = labkit.at_once([lambda: cli.chat(talk), lambda: cli.chat(user("another"))])
    eventually(lambda: not set(pids) & set(cli.children()))
    entries = cli.lab.asked
    cli.kill_all(2)
    return [(reply, entries) for reply in told]


@pytest.mark.parametrize("name", NAMES)
def test_a_cli_that_hangs_is_not_seen(everybody: Everybody, name: str) -> None:
    (following, entries), (another, _) = everybody.tell(stopped, name)
    assert (said_by(following), said_by(another)) == ("STUB[next]", "STUB[another]")
    assert (start_of(following), start_of(another)) == ("cold", "cold")
    assert len(entries) == 2


# ---- Sessions

class Talk:
    """A session of /api/v1; `say` is its next turn, through any server of its database."""

    def __init__(self, cli: Waiting) -> None:
        self.cli, self.id = cli, ""
        self.history: List[Tuple[str, str]] = []
        self.replies: List[Reply] = []

    def say(self, prompt: str, through: Optional[Cli] = None) -> Tuple[str, bool]:
        """How its CLI came to be there, and whether all that has been said was in the request."""
        fields: Json = {"session_id": self.id} if self.id else {"model": OTHERS[self.cli.name]}
        self.cli.lab.forget()
        reply = (through or self.cli).prompt(prompt, ephemeral=False, **fields)
        assert (reply.status, reply.json.get("exit_code")) == (200, 0), reply.body
        self.id = reply.json["session_id"]
        self.replies.append(reply)
        whole = history(asked(self.cli)) == [*self.history, ("user", prompt)]
        self.history += [("user", prompt), ("assistant", reply.json["output"])]
        return start_of(reply), whole

    @property
    def own(self) -> str:
        """What the CLI calls it."""
        told = self.cli.served.call("GET", f"/api/v1/sessions/{self.id}", x_api_key=KEY).json
        return str(told["backend_session_id"])


def restart(cli: Waiting, *, number: int) -> None:
    cli.served.process.send_signal(number)
    cli.served.process.wait(30)
    cli.__init__(cli.name, cli.pyz, cli.folder, lab=cli.lab, version=cli.version)  # type: ignore[misc]


def session(cli: Waiting) -> Tuple[Talk, List[Tuple[str, bool]]]:
    """Three turns; one each after a restart and a kill; one through another server, and one back."""
    talk = Talk(cli)
    told = [talk.say("!history") for _ in range(3)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        restart(cli, number=number)
        told += [talk.say("!history")]
    other = cli.beside()
    told += [talk.say("!history", other), talk.say("!history")]
    other.close()
    return talk, told


@pytest.mark.parametrize("name", NAMES)
def test_a_session_goes_on_in_its_process_and_without_it(everybody: Everybody, name: str) -> None:
    _, told = everybody.tell(session, name)
    assert told == [("cold", True), ("live", True), ("live", True), *[("cold", True)] * 4]


@pytest.mark.parametrize("name", NAMES)
def test_each_turn_of_a_session_tells_its_own_usage_and_cost(everybody: Everybody, name: str) -> None:
    """All of its prompts have the same length."""
    talk, _ = everybody.tell(session, name)
    answers = [reply.json for reply in talk.replies]
    assert [answer["token_usage"] for answer in answers] == [answers[0]["token_usage"]] * len(answers)
    assert [answer["model"] for answer in answers] == [OTHERS[name.split()[0]]] * len(answers)
    costs = [answer.get("cost_usd") for answer in answers]
    assert costs == pytest.approx([costs[0]] * len(costs)) if costs[0] else not any(costs)


# codex lets nobody else write a conversation meanwhile
BY_HAND = {"claude": ["claude", "-p", "--resume"],
           "gemini": ["gemini", "--skip-trust", "-p", "by hand", "--resume"]}


def by_hand(cli: Waiting) -> Tuple[str, List[Tuple[str, str]], Talk, List[Path], int]:
    """Two turns, one by hand, and one more; then the session is deleted, while its process waits."""
    talk = Talk(cli)
    talk.say("the word is 4711")
    talk.say("!history")
    if cli.name in BY_HAND:
        programs = labkit.installed(**({cli.name: cli.version} if cli.version else {}))
        around = labkit.environment(cli.home, cli.lab.url, str(programs))
        around = {name: value for name, value in around.items() if name not in labkit.KEYS.values()}
        argv = [*BY_HAND[cli.name], talk.own, *(["by hand"] if cli.name == "claude" else [])]
        done = subprocess.run(argv, cwd=cli.workdir, env=around, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True)
        assert "STUB[by hand]" in done.stdout, done
    start, _ = talk.say("and now?")
    said = history(asked(cli))
    own = talk.own
    files = files_of(cli, own)
    cli.served.call("DELETE", f"/api/v1/sessions/{talk.id}", x_api_key=KEY)
    with contextlib.suppress(AssertionError):  # what is left tells more
        eventually(lambda: not files_of(cli, own))
    return start, said, talk, files, len(files_of(cli, own))


def files_of(cli: Cli, own: str) -> List[Path]:
    """What the CLI has in its home of a conversation of its own."""
    places = [cli.home / name for name in (".claude", ".codex", ".gemini")]
    name = own[:8] if cli.name == "gemini" else own
    return [path for place in places for path in place.rglob(f"*{name}*")]


@pytest.mark.parametrize("name", [name for name in NAMES if name.split()[0] in BY_HAND])
def test_what_was_said_by_hand_between_two_turns_is_known(everybody: Everybody, name: str) -> None:
    start, said, *_ = everybody.tell(by_hand, name)
    assert start == "cold"
    assert [text for who, text in said if who == "user"] == ["the word is 4711", "!history", "by hand", "and now?"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_of_a_session_that_is_deleted_while_it_is_live(everybody: Everybody, name: str) -> None:
    *_, files, left = everybody.tell(by_hand, name)
    assert (bool(files), left) == (True, 0)


# ---- Nothing is left

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_what_waited(lab: Lab, pyz: Path, tmp_path: Path, number: signal.Signals) -> None:
    config: Json = {"backends": {}, "server": {"spares": 3, "spares_at_start": True, "live_conversations": 3}}
    cli = Waiting("claude", pyz, tmp_path, config=config, lab=lab)
    cli.ready(3)
    backends = ["claude", "codex", "gemini"]
    starts = labkit.at_once([functools.partial(cli.chat, user("hello"), model=name) for name in backends])
    assert [start_of(reply) for reply in starts] == ["spare"] * 3
    cli.ready(6)
    scratch = cli.home / ".clinvk" / "runs"
    assert any(scratch.iterdir())
    cli.served.process.send_signal(number)
    cli.served.process.wait(30)
    eventually(lambda: not cli.processes())
    if number == signal.SIGKILL:
        cli = Waiting("claude", pyz, tmp_path, lab=lab)
    assert not any(scratch.iterdir())
    cli.close()


lab = labkit.lab
