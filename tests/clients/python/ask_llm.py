"""simonw/llm, by its command line, with models set up as its documentation tells."""

import json
from pathlib import Path

import click
from click.testing import CliRunner
from llm.cli import cli
from told import HELLO, OPENAI, PNG, WHO, Json, failing, tell

FOLDER = Path.home() / "llm"
RUNNER = CliRunner(env={"LLM_USER_PATH": str(FOLDER)})
MODELS = [{"model_id": name, "model_name": name, "api_base": OPENAI, "vision": True, "supports_schema": True,
           "supports_tools": True, "reasoning": True} for name in ("echo", "ecko", "scripted", "claude")]
OLD = {"model_id": "old-echo", "model_name": "echo", "api_base": OPENAI, "completion": True}
FOLDER.mkdir()
(FOLDER / "extra-openai-models.yaml").write_text(json.dumps([*MODELS, OLD]))  # JSON is YAML
(FOLDER / "image.png").write_bytes(PNG)


def llm(*words: str) -> str:
    """What it prints, less the last line's end."""
    done = RUNNER.invoke(cli, list(words))
    if done.exit_code:
        raise click.ClickException(f"exit code {done.exit_code}: {done.stdout}{done.stderr}")
    return done.stdout[:-1]


def logged() -> Json:
    """What llm has kept of the last answer."""
    row = json.loads(RUNNER.invoke(cli, ["logs", "--json", "-n", "1"]).stdout)[0]
    return {"text": row["response"], "usage": [row["input_tokens"], row["output_tokens"]], "model": row["model"]}


def whole(way: str) -> Json:
    return {"out": llm("-m", "echo", "--no-stream", HELLO), **logged()}


def stream(way: str) -> Json:
    return {"out": llm("-m", "echo", HELLO), **logged()}


def system(way: str) -> str:
    return llm("-m", "scripted", "-s", "Be brief.", "do:repeat")


def conversation(way: str) -> str:
    llm("-m", "echo", "One?")
    return llm("-c", "Two?")


def failure(way: str) -> str:
    return llm("-m", "scripted", "--no-stream", failing("llm", way, "whole"))


def failure_streamed(way: str) -> str:
    return llm("-m", "scripted", failing("llm", way, "stream"))


def typo(way: str) -> str:
    return llm("-m", "ecko", HELLO)


def tools(way: str) -> str:
    return llm("-m", "echo", "-T", "llm_version", HELLO)


def reasoning(way: str) -> str:
    return llm("-m", "echo", "-o", "reasoning_effort", "low", HELLO)


def schema(way: str) -> Json:
    return json.loads(llm("-m", "scripted", "--schema", "name, age int", WHO))


def image(way: str) -> str:
    return llm("-m", "claude", "What is it?", "-a", str(FOLDER / "image.png"))


def completions(way: str) -> str:
    return llm("-m", "old-echo", HELLO)


tell(["chat"], [whole, stream, system, conversation, failure, failure_streamed, typo, tools, reasoning, schema, image,
                completions])
