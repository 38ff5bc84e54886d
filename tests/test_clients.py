"""Real clients of Python's, each at its pinned version in a process of its own, against the real server and scripted
CLIs: what reaches the one who calls them, to the letter."""

import base64
import functools
import hashlib
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional

import pytest
from clientkit import PNG, Json, Stage, ask, installed, stage, surroundings

pytestmark = pytest.mark.clients
__all__ = ["stage"]

HELLO, PIECES = "Hello from the echo.", ["Hello ", "from ", "the ", "echo."]
WHOLE: Json = {"text": HELLO, "usage": [5, 5], "model": "echo"}
SYSTEM = "Be brief.\n\ndo:repeat"
CONVERSATION = """The conversation so far:

<turn role="user">
One?
</turn>
<turn role="assistant">
One.
</turn>
<turn role="user">
Two?
</turn>
<turn role="assistant">
Two.
</turn>

Now answer the user's last turn, which is all that follows:

Three?"""
ENVIRONMENTS = {"langchain": "python", "litellm": "python", "pydantic_ai": "python", "llm": "python",
                "llama_index": "llama-index"}


class Raised(NamedTuple):
    """What a client raises: the class, the status it knows, and words of its message."""
    kind: str
    status: Optional[int]
    words: str


def errors(failed: str, unknown: str, refused: str) -> Json:
    """The classes that one of the clients has for a failed run, a model that is not there and a bad request."""
    return {"failure": Raised(failed, 502, "out of luck"), "failure_streamed": Raised(failed, 502, "out of luck"),
            "typo": Raised(unknown, 404, "echo"), "forced_tool": Raised(refused, 400, "tool_choice")}


def langchain(finish: str, provider: str) -> Json:
    whole = {**WHOLE, "finish": finish}
    streamed = {**whole, "role": "AIMessageChunk", "pieces": PIECES}
    return {"whole": {**whole, "role": "ai"}, "stream": streamed, "system": SYSTEM, "conversation": CONVERSATION,
            "reasoning": HELLO, "tools": {"text": HELLO, "calls": []},
            **errors(f"{provider}APIError", f"{provider}ModelNotFoundError", f"{provider}InvalidRequestError")}


def litellm() -> Json:
    whole = {**WHOLE, "finish": "stop", "role": "assistant"}
    return {"whole": whole, "stream": {**whole, "pieces": PIECES}, "system": SYSTEM, "conversation": CONVERSATION,
            "reasoning": HELLO, "tools": {"text": HELLO, "calls": None},
            **errors("BadGatewayError", "NotFoundError", "BadRequestError")}


def pydantic_ai() -> Json:
    whole = {**WHOLE, "finish": "stop"}
    return {"whole": whole, "stream": {**whole, "pieces": PIECES}, "system": "Be brief.\nBe kind.\n\ndo:repeat",
            "conversation": CONVERSATION, "reasoning": HELLO, "tools": HELLO,
            **errors("ModelServerError", "ModelNotFoundError", "ModelRequestRejectedError")}


def llama_index() -> Json:
    streamed = {"text": HELLO, "pieces": PIECES}
    return {"whole": {**WHOLE, "role": "assistant"}, "complete": HELLO, "stream": streamed, "stream_complete": streamed,
            "system": SYSTEM, "conversation": CONVERSATION, "tools": {"text": HELLO, "calls": []},
            **errors("InternalServerError", "NotFoundError", "BadRequestError")}


def without(expected: Json, *cases: str) -> Json:
    return {case: what for case, what in expected.items() if case not in cases}


ADA = {"name": "Ada", "age": 36}
LLM: Json = {
    "whole": {"out": HELLO, **WHOLE}, "stream": {"out": HELLO, **WHOLE}, "system": SYSTEM, "reasoning": HELLO,
    "tools": HELLO, "conversation": CONVERSATION.replace("One.", "One?").partition('\n<turn role="user">\nTwo')[0]
    + "\n\nNow answer the user's last turn, which is all that follows:\n\nTwo?",
    "failure": Raised("ClickException", None, "exit code 1: Error: Error code: 502 - scripted failed with exit code 1\n"
                                              "out of luck\n"),
    "failure_streamed": Raised("ClickException", None, "exit code 1: Error: Error code: 502 - scripted failed"),
    "typo": Raised("ClickException", None, 'exit code 1: Error: Error code: 404 - no backend goes by the model name')}
RESPONSE = {"text": HELLO, "usage": [5, 5]}
IMAGE = "What is it? | image/png " + hashlib.sha256(base64.b64decode(PNG)).hexdigest()[:8]
# client -> way -> case, a function of the client's script in clients/python/ -> what comes of it.
CASES: Dict[str, Dict[str, Json]] = {
    "langchain": {
        "chat": {**langchain("stop", "OpenAI"), "schema": ADA, "json_mode": ADA, "image": IMAGE},
        "responses": {**langchain("completed", "OpenAI"), "schema": ADA, "json_mode": ADA, "image": IMAGE},
        "anthropic": {**langchain("end_turn", "Anthropic"), "schema": ADA, "image": IMAGE}},
    "litellm": {
        "openai": {**litellm(), "schema": ADA, "json_object": ADA, "image": IMAGE, "responses": RESPONSE,
                   "responses_schema": ADA, "completions": HELLO},
        "anthropic": {**litellm(), "known_schema": ADA, "json_object": ADA, "image": IMAGE, "responses": RESPONSE,
                      "responses_stream": PIECES}},
    "pydantic_ai": {
        "chat": {**pydantic_ai(), "native": ADA, "prompted": ADA, "image": IMAGE},
        "responses": {**pydantic_ai(), "system": "Be kind.\nBe brief.\n\ndo:repeat", "native": ADA, "prompted": ADA,
                      "image": IMAGE},
        "anthropic": {**pydantic_ai(), "known_native": ADA, "prompted": ADA, "image": IMAGE}},
    "llama_index": {
        "chat": {**llama_index(), "schema": ADA, "schema_in_the_prompt": ADA, "image": IMAGE},
        "responses": {**without(llama_index(), "forced_tool"), "schema": ADA, "image": IMAGE},
        "completions": without(llama_index(), "whole", "stream", "system", "conversation", "tools", "forced_tool")},
    "llm": {"chat": {**LLM, "schema": ADA, "image": IMAGE, "completions": HELLO}}}
Told = Callable[[str], Json]


@pytest.fixture(scope="module")
def told(stage: Stage) -> Told:
    """What a client has been told in each of its cases; it is asked once."""
    def of(client: str) -> Json:
        names = [f"{way} {case}" for way, cases in CASES[client].items() for case in cases]
        return ask(ENVIRONMENTS[client], f"ask_{client}.py", stage.url, names, stage.folder)
    return functools.lru_cache(maxsize=None)(of)


def each_case() -> Iterator[Any]:
    for client, ways in CASES.items():
        for way, cases in ways.items():
            for case, expected in cases.items():
                yield pytest.param(client, f"{way} {case}", expected, id=f"{client} {way} {case}")


@pytest.mark.parametrize("client, case, expected", each_case())
def test_a_client_gets_what_it_asked_for(told: Told, client: str, case: str, expected: Any) -> None:
    got = told(client)[case]
    if isinstance(expected, Raised):
        assert (got["raised"], got["status"]) == expected[:2], got
        assert expected.words in got["says"]
    else:
        assert got == expected


@pytest.mark.parametrize("client, way", [(client, way) for client, ways in CASES.items() for way in ways])
def test_a_run_that_failed_is_not_repeated(told: Told, stage: Stage, client: str, way: str) -> None:
    told(client)
    assert [stage.runs(f"do:fail {client} {way} {case}") for case in ("whole", "stream")] == [1, 1]


# ---- Programs

def test_llm_prints_a_piece_while_the_cli_still_waits_to_print_the_next(stage: Stage) -> None:
    folder = stage.folder / "llm-user"
    folder.mkdir()
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: scripted\n  api_base: {stage.url}/openai/v1\n")
    command = [str(installed("python") / "llm"), "-m", "mine", "do:wait"]
    environ = {**surroundings(stage.folder), "LLM_USER_PATH": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as llm:
        assert llm.stdout and llm.stdout.read(6) == b"first "
        stage.go()
        assert llm.stdout.read() == b"second\n"
    assert llm.returncode == 0


def author() -> Dict[str, str]:
    return {f"GIT_{who}_{what}": "any@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *words: str) -> str:
    environ = {**surroundings(folder), **author()}
    return subprocess.run(["git", *words], cwd=folder, env=environ, check=True, capture_output=True, text=True).stdout


def test_aider_edits_a_file_and_commits_it(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    return 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    quiet = ["--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--no-pretty",
             "--no-show-release-notes", "--no-gitignore"]
    command = [str(installed("aider") / "aider"), *quiet, "--map-tokens", "0", "--edit-format", "diff",
               "--model", "openai/scripted", "--message", "do:edit Let f return 2.", "a.py"]
    environ = {**surroundings(stage.folder), **author(), "OPENAI_API_BASE": stage.url + "/openai/v1",
               "OPENAI_API_KEY": "any"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (tmp_path / "a.py").read_text() == "def f():\n    return 2\n", done.stdout + done.stderr
    assert git(tmp_path, "log", "--format=%s").split("\n") == ["fix: let f return 2", "one", ""]
    assert git(tmp_path, "status", "--short", "a.py") == ""
    assert (stage.runs("do:edit"), stage.runs("Git commit messages")) == (2, 1)  # the second is shown the edit
