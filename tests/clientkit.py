"""Real Python clients, at pinned versions from PyPI, each in a process of its own: they want different versions of the
same packages. What they ask is in clients/python/; `ask` runs one of those scripts."""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

import pytest
from conftest import Served, executable, interpreter, serving

FOLDER = Path(__file__).parent / "clients" / "python"
Json = Dict[str, Any]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # as base64
NOWHERE = "http://127.0.0.1:9"  # no one listens there


def installed(name: str) -> Path:
    """The folder of the programs of an environment with the packages of clients/python/NAME.txt, which is what
    `uv pip compile --universal --python-version 3.11` made of NAME.in. The first call makes it (5 s, 200 to 550 MB)
    below $PYTHON_CLIENTS or ~/.cache/clinvk-python-clients, a new one when the pins change."""
    pins, python = FOLDER / f"{name}.txt", interpreter("3.11")
    mark = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    root = Path(os.environ.get("PYTHON_CLIENTS") or Path.home() / ".cache" / "clinvk-python-clients") / f"{name}-{mark}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in another process may be making it
        if not (root / "ready").exists():
            uv("venv", "--clear", "--python", python, str(root / "venv"))
            uv("pip", "install", "--python", str(root / "venv" / "bin" / "python"), "--requirements", str(pins))
            (root / "ready").touch()
    return root / "venv" / "bin"


def uv(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "uv", "--quiet", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"uv {' '.join(words)}: {done.stderr}"


def ask(environment: str, script: str, url: str, cases: List[str], home: Path) -> Json:
    """What a script of clients/ has been told in each case."""
    command = [str(installed(environment) / "python"), str(FOLDER / script), url, *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings(home), timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def surroundings(home: Path) -> Dict[str, str]:
    """An environment without keys and settings of the one who runs the tests. The proxy, which is not there, leads to
    all but this machine: what a client would fetch or tell elsewhere fails at once."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "HTTP_PROXY": NOWHERE,
            "HTTPS_PROXY": NOWHERE, "NO_PROXY": "127.0.0.1,localhost", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


# ---- What answers

# A text CLI. The word after the last "do:" of its prompt says what it does; the prompt is noted in the file `asked`.
SCRIPTED = """
import re
asked = sys.stdin.read()
with open(%r, "a") as notes:
    notes.write(json.dumps(asked) + "\\n")
does = re.findall(r"\\bdo:(\\w+)", asked)[-1]
if "Git commit messages" in asked:
    print("fix: let f return 2")
elif does == "edit":
    print("So be it.", "", "a.py", "```python", "<<<<<<< SEARCH", "    return 1", "=======", "    return 2",
          ">>>>>>> REPLACE", "```", sep="\\n")
elif does == "repeat":
    sys.stdout.write(asked)
elif does == "json":
    print('{"name": "Ada", "age": 36}')
elif does == "fenced":
    print('```json\\n{"name": "Ada", "age": 36}\\n```')
elif does == "prose":
    print("It was Ada, who was 36.")
elif does == "fail":
    sys.exit("out of luck")
elif does == "wait":
    print("first", end=" ", flush=True)
    while not os.path.exists(%r):
        time.sleep(0.02)
    print("second", end="")
"""
# claude, in its protocol, which answers with what it was given, empty text left out: an image is named by its type and
# the digest of its bytes.
CLAUDE = """
import base64, hashlib
if "--version" in sys.argv:
    sys.exit(print("2.1.197 (Claude Code)"))
def show(**line): print(json.dumps(line), flush=True)
def event(**event): show(type="stream_event", event=event)
def named(block):
    if block["type"] == "text":
        return block["text"]
    source = block["source"]
    return source["media_type"] + " " + hashlib.sha256(base64.b64decode(source["data"])).hexdigest()[:8]
for line in sys.stdin:
    message = json.loads(line)
    if message["type"] == "control_request":
        show(type="control_response", response={"subtype": "success", "request_id": message["request_id"]})
        continue
    text = " | ".join(filter(None, map(named, message["message"]["content"])))
    if "do:json" in text:
        text = '{"name": "Ada", "age": 36}'
    event(type="message_start", message={"id": "m", "model": "claude-scripted"})
    event(type="content_block_delta", delta={"type": "text_delta", "text": text})
    event(type="message_delta", delta={"stop_reason": "end_turn"})
    show(type="result", subtype="success", is_error=False, result=text, stop_reason="end_turn", num_turns=1,
         usage={"input_tokens": 7, "output_tokens": 3}, modelUsage={"claude-scripted": {}})
"""


class Stage(NamedTuple):
    """A clinvk with the backends `echo`, `scripted` and `claude`."""
    served: Served
    folder: Path

    @property
    def url(self) -> str:
        return self.served.url

    def runs(self, words: str) -> int:
        """How often `scripted` was started with a prompt that has these words."""
        return sum(words in json.loads(line) for line in (self.folder / "asked").read_text().splitlines())

    def go(self) -> None:
        """Let the `scripted` that waits print the rest."""
        (self.folder / "go").touch()


@contextlib.contextmanager
def staged(pyz: Path, folder: Path, **server: Any) -> Iterator[Stage]:
    """`server`: more of that part of its config."""
    scripted = executable(folder / "scripted", SCRIPTED % (str(folder / "asked"), str(folder / "go")))
    backends = {"scripted": {"command": scripted}, "claude": {"command": executable(folder / "claude", CLAUDE)},
                "codex": {"enabled": False}, "gemini": {"enabled": False}}
    with serving(pyz, folder) as start:
        yield Stage(start(config={"backends": backends, "server": {"spares": 0, **server}}), folder)


@pytest.fixture(scope="module")
def stage(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One for the whole module."""
    with staged(pyz, tmp_path_factory.mktemp("stage")) as made:
        yield made
