"""The examples of README.md, run as they stand but for the port."""

import re
import subprocess
import sys
from typing import Any, Callable, List

import pytest
from conftest import REPO

README = (REPO / "README.md").read_text()
SCRIPTED_CLAUDE = """
def show(**line): print(json.dumps(line), flush=True)
for line in sys.stdin:
    message = json.loads(line)
    if message["type"] == "user":
        text = "claude was asked: " + message["message"]["content"][0]["text"]
        show(type="assistant", message={"id": "m", "model": "m", "content": [{"type": "text", "text": text}]})
        show(type="result", subtype="success", is_error=False, result=text, stop_reason="end_turn", num_turns=1)
"""


def examples(language: str) -> List[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def run_example(serve: Callable[..., Any], fake_cli: Callable[..., str]) -> Callable[..., str]:
    """What an example prints against a server of the README's kind; it must end with 0."""
    server = serve(config={"backends": {"claude": {"command": fake_cli(SCRIPTED_CLAUDE)}}})

    def run(example: str, *command: str) -> str:
        done = subprocess.run([*command, example.replace("http://127.0.0.1:8080", server.url)], capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run


@pytest.mark.parametrize("example, told", list(zip(examples("sh"), ['"output":"hello"', "claude was asked: What does",
                                                                    "data: [DONE]",
                                                                    '"output":"and now in French"'])))
def test_the_curl_examples_answer(example: str, told: str, run_example: Callable[..., str]) -> None:
    assert told in run_example(example, "bash", "-ec")


@pytest.mark.parametrize("example", examples("python"))
def test_the_sdk_examples_answer(example: str, run_example: Callable[..., str]) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("anthropic")
    assert run_example(example, sys.executable, "-c").strip() == "Say hello in three words"


def test_there_is_an_example_for_curl_and_each_sdk() -> None:
    assert (len(examples("sh")), len(examples("python"))) == (4, 2)


def test_the_commands_of_the_readme_are_those_of_the_project() -> None:
    assert "python3 build_zipapp.py && python3 clinvk.pyz serve" in README
    assert "-r tests/requirements.txt && .venv/bin/python -m pytest" in README
    assert (REPO / "config.example.yaml").exists() and (REPO / "tests" / "bench.py").exists()
