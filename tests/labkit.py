"""The lab: the real CLIs, at pinned versions from npm, against a stub of their providers (lab/stub_llm.py).

Nothing of it reaches another host: the CLIs are told that a proxy which is not there leads to all but this machine, so
they neither call home nor wait for an answer. It needs no namespace, no root and, once installed, no network."""

import concurrent.futures
import contextlib
import fcntl
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import pytest
from conftest import Reply, Served

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

Json = Dict[str, Any]
PINNED = {"claude": "2.1.197", "codex": "0.169.0", "gemini": "0.61.0"}
PACKAGES = {"claude": "@anthropic-ai/claude-code", "codex": "@openai/codex", "gemini": "@google/gemini-cli"}
KEYS = {"claude": "ANTHROPIC_API_KEY", "codex": "STUB_KEY", "gemini": "GEMINI_API_KEY"}
KEY = "clinvk-key-of-the-lab"  # what clinvk asks of its clients
NOWHERE = "http://127.0.0.1:9"  # no one listens there
CODEX_CONFIG = """
model = "stub-model"
model_provider = "stub"
[model_providers.stub]
name = "stub"
base_url = "%s/v1"
env_key = "STUB_KEY"
wire_api = "responses"
[analytics]
enabled = false
"""
GEMINI_SETTINGS: Json = {
    "security": {"auth": {"selectedType": "gemini-api-key"}}, "general": {"disableAutoUpdate": True},
    "privacy": {"usageStatisticsEnabled": False}}


def installed(**versions: str) -> Path:
    """The folder with the CLIs' programs; `claude="2.1.331"` asks for another version than the pinned one. The first
    call installs them (750 MB, 20 s) into $CLI_LAB or ~/.cache/cli-lab, each set of versions in a folder of its own."""
    root = Path(os.environ.get("CLI_LAB") or Path.home() / ".cache" / "cli-lab")
    wanted = {**PINNED, **versions}
    if wanted != PINNED:
        root /= "set-{claude}-{codex}-{gemini}".format(**wanted)
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in another process may be installing them
        if not (root / "ready").exists():
            (root / "package.json").write_text("{}")
            packages = [f"{PACKAGES[name]}@{version}" for name, version in wanted.items()]
            subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent", *packages], cwd=root, check=True)
            (root / "ready").touch()
    return root / "node_modules" / ".bin"


class Lab:
    """The stub of the providers. Its log has every request, bodies included."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "stub.jsonl"
        self.log.touch()
        stub = Path(__file__).parent / "lab" / "stub_llm.py"
        self.process = subprocess.Popen([sys.executable, str(stub), "--log", str(self.log), "--log-bodies"],
                                        stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.read_from = 0

    def forget(self) -> None:
        """`asked` gives what comes from now on."""
        self.read_from = self.log.stat().st_size

    @property
    def asked(self) -> List[Json]:
        """The requests for an answer since `forget`: method, path, `prompt`, `body`, `headers` ..."""
        with self.log.open("rb") as log:
            log.seek(self.read_from)
            entries = [json.loads(line) for line in log.read().splitlines() if line.endswith(b"}")]
        return [entry for entry in entries if "api" in entry]


def texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(inner)


def system_prompt(body: Json) -> List[str]:
    """The texts of the system prompt in a request to any of the providers."""
    if "input" in body:
        developer = [item["content"] for item in body["input"] if item.get("role") in ("developer", "system")]
        found = [body.get("instructions", ""), *(part["text"] for content in developer for part in content)]
    elif "contents" in body:
        found = [part["text"] for part in body.get("systemInstruction", {}).get("parts", [])]
    else:
        found = [block["text"] for block in body.get("system", [])]
    return [text for text in found if text]


def make_home(home: Path, stub: str) -> Path:
    """A home in which codex and gemini are set up to ask the stub."""
    for folder, name, text in ((".codex", "config.toml", CODEX_CONFIG % stub),
                               (".gemini", "settings.json", json.dumps(GEMINI_SETTINGS))):
        (home / folder).mkdir(parents=True)
        (home / folder / name).write_text(text)
    (home / "tmp").mkdir()
    return home


def environment(home: Path, stub: str, programs: str) -> Dict[str, str]:
    """What the server runs with: nothing of the tests' own but PATH, and clinvk's key where an SDK looks for it."""
    return {"HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "LANG": "C.UTF-8",
            "TMPDIR": str(home / "tmp"), "CLINVK_API_KEYS": KEY, "CLINVK_BACKEND": "echo",
            "OPENAI_API_KEY": KEY, "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE, "NO_PROXY": "127.0.0.1,localhost",
            "ANTHROPIC_BASE_URL": stub, "GOOGLE_GEMINI_BASE_URL": stub, "DISABLE_AUTOUPDATER": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "GEMINI_CLI_NO_RELAUNCH": "true",
            **dict.fromkeys(KEYS.values(), "sk-dummy")}


class Answer(NamedTuple):
    """An answer of any API. `pieces` are its texts as they came; a whole answer is one piece."""
    pieces: List[str]
    thinking: str
    usage: Json

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Cli:
    """One CLI behind a clinvk of its own, which runs in `workdir` with the home `home`."""

    def __init__(self, name: str, lab: Lab, pyz: Path, folder: Path, *, version: str = "",
                 config: Optional[Json] = None, before_path: Sequence[Path] = (), **environ: Optional[str]) -> None:
        """`version` is another one than the pinned; `environ` changes the environment, None removes from it."""
        self.name, self.version, self.lab = name, version, lab
        self.home, self.workdir = folder / "home", folder / "work"
        if not self.home.exists():
            make_home(self.home, lab.url)
        self.workdir.mkdir(exist_ok=True)
        others = {other: {"enabled": False} for other in PINNED if other != name}  # nor asked for their versions
        (folder / "config.yaml").write_text(json.dumps({"backends": others, **(config or {})}))
        programs = os.pathsep.join(map(str, [*before_path, installed(**({name: version} if version else {}))]))
        around = {**environment(self.home, lab.url, programs), **environ}
        command = [sys.executable, str(pyz), "serve", "--port", "0", "--config", str(folder / "config.yaml")]
        self.served = Served(command, self.workdir, {k: v for k, v in around.items() if v is not None})
        self.openai = openai.OpenAI(base_url=self.served.url + "/openai/v1", api_key=KEY, timeout=300)
        self.anthropic = anthropic.Anthropic(base_url=self.served.url + "/anthropic", api_key=KEY, timeout=300)

    def close(self) -> None:
        self.openai.close()
        self.anthropic.close()
        self.served.stop()

    def processes(self) -> List[Path]:
        """The /proc directories of what runs for this clinvk, itself excepted: their HOME tells."""
        mark, found = f"HOME={self.home}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(process)
        return [process for process in found if int(process.name) != self.served.process.pid]

    def command_lines(self) -> List[str]:
        """Of `processes`; a NUL follows each argument."""
        found = []
        for process in self.processes():
            with contextlib.suppress(OSError):
                found.append((process / "cmdline").read_text())
        return found

    # ---- A prompt, in each API's two ways

    def ask(self, way: str, prompt: str, **fields: Any) -> Answer:
        """`way` is one of WAYS; `fields` are more of the request's own. Fails as the SDK does."""
        return WAYS[way](self, prompt, **fields)

    def ask_all(self, prompt: str, ways: Sequence[str], **fields: Any) -> Dict[str, Answer]:
        """Several ways at once."""
        return dict(zip(ways, at_once([functools.partial(self.ask, way, prompt, **fields) for way in ways])))

    def prompt(self, prompt: str, **fields: Any) -> Reply:
        """POST /api/v1/prompt; nothing is stored, unless `fields` say otherwise."""
        body = {"backend": self.name, "prompt": prompt, "ephemeral": True, **fields}
        return self.served.call("POST", "/api/v1/prompt", body, x_api_key=KEY)

    def events(self, prompt: str, **fields: Any) -> Iterator[Json]:
        """The NDJSON events of /api/v1/prompt, as they come."""
        body = {"backend": self.name, "prompt": prompt, "ephemeral": True, "output_format": "stream-json", **fields}
        with contextlib.closing(self.served.connection()) as connection:
            connection.request("POST", "/api/v1/prompt", json.dumps(body), {**JSON_TYPE, "X-Api-Key": KEY})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            for line in answer:
                yield json.loads(line)

    def native(self, prompt: str, **fields: Any) -> Answer:
        answer = self.prompt(prompt, **fields).json
        assert answer["exit_code"] == 0, answer
        return Answer([answer["output"]], "", answer["token_usage"])

    def native_stream(self, prompt: str, **fields: Any) -> Answer:
        events = list(self.events(prompt, **fields))
        said = {kind: [e["content"]["text"] for e in events if e["type"] == kind] for kind in ("message", "thinking")}
        return Answer(said["message"], "".join(said["thinking"]), events[-1]["content"]["token_usage"])

    def openai_whole(self, prompt: str, **fields: Any) -> Answer:
        asked = {"model": self.name, "messages": user(prompt), **fields}
        answer = self.openai.chat.completions.create(**asked)
        message = answer.choices[0].message
        return Answer([message.content], getattr(message, "reasoning_content", ""), answer.usage.model_dump())

    def openai_stream(self, prompt: str, **fields: Any) -> Answer:
        pieces, thoughts, usage = [], [], {}
        asked = {"model": self.name, "messages": user(prompt), "stream_options": {"include_usage": True}, **fields}
        with self.openai.chat.completions.create(stream=True, **asked) as stream:
            for chunk in stream:
                usage = chunk.usage.model_dump() if chunk.usage else usage
                for delta in (choice.delta for choice in chunk.choices):
                    pieces += [delta.content] if delta.content else []
                    thoughts.append(getattr(delta, "reasoning_content", None) or "")
        return Answer(pieces, "".join(thoughts), usage)

    def anthropic_whole(self, prompt: str, **fields: Any) -> Answer:
        asked = {"model": self.name, "max_tokens": 1000, "messages": user(prompt), **fields}
        return of_message(self.anthropic.messages.create(**asked))

    def anthropic_stream(self, prompt: str, **fields: Any) -> Answer:
        asked = {"model": self.name, "max_tokens": 1000, "messages": user(prompt), **fields}
        with self.anthropic.messages.stream(**asked) as stream:
            pieces = list(stream.text_stream)
            told = of_message(stream.get_final_message())
        assert told.text == "".join(pieces)
        return Answer(pieces, told.thinking, told.usage)


WAYS: Dict[str, Callable[..., Answer]] = {
    "openai": Cli.openai_whole, "openai stream": Cli.openai_stream, "anthropic": Cli.anthropic_whole,
    "anthropic stream": Cli.anthropic_stream, "native": Cli.native, "native stream": Cli.native_stream}
STREAMS = [way for way in WAYS if way.endswith("stream")]
COMPAT = [way for way in WAYS if not way.startswith("native")]
JSON_TYPE = {"Content-Type": "application/json"}


def user(prompt: str) -> List[Json]:
    return [{"role": "user", "content": prompt}]


def of_message(message: Any) -> Answer:
    """What one of Anthropic's messages holds."""
    said = [block.text for block in message.content if block.type == "text"]
    thought = [block.thinking for block in message.content if block.type == "thinking"]
    return Answer(said, "".join(thought), message.usage.model_dump())


def at_once(calls: List[Callable[[], Any]]) -> List[Any]:
    """What each of them gives; two run at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


# ---- Fixtures

@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A stub of the providers, on a port of its own."""
    stub = Lab(tmp_path_factory.mktemp("stub"))
    yield stub
    stub.process.kill()
    stub.process.wait()


def each_of(*names: str) -> Any:
    """The fixture `cli`: each CLI in turn, in a home and a directory where there is nothing but its set-up. Its tests
    share one clinvk."""
    @pytest.fixture(scope="module", params=names)
    def cli(request: pytest.FixtureRequest, lab: Lab, pyz: Path,
            tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
        name, _, version = request.param.partition(" ")
        made = Cli(name, lab, pyz, tmp_path_factory.mktemp(name), version=version)
        yield made
        made.close()
    return cli


cli = each_of("claude", "codex", "gemini", "claude 2.1.331")


@pytest.fixture
def another(cli: Cli, lab: Lab, pyz: Path, tmp_path: Path) -> Iterator[Callable[..., Cli]]:
    """`another(config={...}, **environ)`: the same CLI behind a further clinvk; tmp_path / "home" is its home."""
    made: List[Cli] = []

    def make(**options: Any) -> Cli:
        made.append(Cli(cli.name, lab, pyz, tmp_path, version=cli.version, **options))
        return made[-1]
    yield make
    for one in made:
        one.close()
