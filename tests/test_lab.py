"""clinvk.pyz with the real CLIs behind it and the real SDKs before it (labkit); their providers are a stub."""

import contextlib
import functools
import itertools
import json
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import pytest
from conftest import eventually
from lab.stub_llm import UNICODE_REPLY

import clinvk
import labkit
from labkit import (COMPAT, JSON_TYPE, KEY, STREAMS, WAYS, Answer, Cli, Json, anthropic, at_once, openai,
                    system_prompt, texts, user)

pytestmark = pytest.mark.lab
lab, cli, another = labkit.lab, labkit.cli, labkit.another  # the fixtures


@pytest.fixture(autouse=True)
def nothing_asked_yet(cli: Cli) -> None:
    cli.lab.forget()


# ---- Streams, text, thinking, usage

UNICODE = "🚀👩‍👩‍👧‍👦 你好 日本語 한국어 שלום مرحبا e\u0301 \u2060\ufeff\u00a0?"


@pytest.fixture(scope="module")
def thoughtful(cli: Cli) -> Dict[str, Answer]:
    """An answer with thinking, and all of Unicode in prompt and text, in every way."""
    return cli.ask_all(f"!think {UNICODE}", list(WAYS))


def as_it_comes(cli: Cli, way: str, prompt: str) -> Iterator[str]:
    """The pieces of the text."""
    if way == "native stream":
        yield from (event["content"]["text"] for event in cli.events(prompt) if event["type"] == "message")
    elif way == "openai stream":
        with cli.openai.chat.completions.create(model=cli.name, messages=user(prompt), stream=True) as stream:
            yield from (choice.delta.content for chunk in stream for choice in chunk.choices if choice.delta.content)
    else:
        with cli.anthropic.messages.stream(model=cli.name, messages=user(prompt), max_tokens=1000) as stream:
            yield from stream.text_stream


def test_a_stream_brings_the_text_while_the_provider_still_waits_to_send_the_last_piece(
        cli: Cli, tmp_path: Path) -> None:
    def heard(way: str) -> str:
        go = tmp_path / way.partition(" ")[0]
        pieces = as_it_comes(cli, way, f"!slow 10 !until {go}")
        begun = [*itertools.islice(pieces, 5)]
        go.touch()
        return "".join([*begun, *pieces])
    texts = at_once([functools.partial(heard, way) for way in STREAMS])
    assert texts == ["".join(f"chunk{i} " for i in range(10))] * len(STREAMS)


def test_all_of_unicode_gets_there_and_back_streamed_and_whole(thoughtful: Dict[str, Answer]) -> None:
    assert {way: answer.text for way, answer in thoughtful.items()} == dict.fromkeys(WAYS, f"STUB[!think {UNICODE}]")


@pytest.mark.parametrize("way", [way for way in WAYS if way != "native"])
def test_thinking_comes_as_thinking(thoughtful: Dict[str, Answer], way: str) -> None:
    assert thoughtful[way].thinking.endswith("Let me think about this.")


# What the stub counts for that prompt: 111 in, of which (claude: beside which) 40 from the cache and, with claude, 3
# into it; 22 out, with codex 7 of them for thinking. gemini's protocol tells neither of cached nor of thought tokens.
USAGE = {"openai": {"claude": (154, 22, 40, 0), "codex": (111, 22, 40, 7), "gemini": (111, 22, 0, 0)},
         "anthropic": {"claude": (111, 22, 40, 3), "codex": (71, 22, 40, 0), "gemini": (111, 22, 0, 0)},
         "native": {"claude": (111, 22, 40, 0), "codex": (111, 22, 40, 7), "gemini": (111, 22, 0, 0)}}


@pytest.mark.parametrize("way", WAYS)
def test_the_usage_is_the_providers(cli: Cli, thoughtful: Dict[str, Answer], way: str) -> None:
    usage, api = thoughtful[way].usage, way.split()[0]
    names = {"openai": ("prompt_tokens", "completion_tokens"),
             "anthropic": ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
             "native": ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")}[api]
    told = [usage[name] for name in names]
    if api == "openai":
        told.append(usage["prompt_tokens_details"]["cached_tokens"])
        told.append(usage["completion_tokens_details"]["reasoning_tokens"])
    assert tuple(told) == USAGE[api][cli.name]


def test_a_line_separator_in_an_answer_is_kept_or_the_run_fails(cli: Cli) -> None:
    """gemini takes U+2028 in its provider's stream for the end of a line."""
    told = cli.prompt("!unicode").json
    if cli.name == "gemini":
        assert told["exit_code"] != 0 and told["error"]
        with pytest.raises(openai.InternalServerError):
            cli.ask("openai", "!unicode")
    else:
        assert [told["output"], cli.ask("openai stream", "!unicode").text] == [UNICODE_REPLY, UNICODE_REPLY]


# ---- Tools of the agent

def test_the_output_of_a_run_with_a_tool_is_the_last_message_alone(cli: Cli) -> None:
    events = list(cli.events("!tool echo hi", approval_mode="auto"))
    kinds = [event["type"] for event in events]
    assert kinds.index("message") < kinds.index("tool_use") < kinds.index("tool_result") < len(kinds) - 1
    assert (kinds.count("done"), [event["sequence"] for event in events]) == (1, list(range(1, len(events) + 1)))
    assert events[-1]["content"]["output"] == "STUB[!tool echo hi]"
    said = "".join(event["content"]["text"] for event in events if event["type"] == "message")
    assert said == "I will run a tool.STUB[!tool echo hi]"
    assert any("hi" in text.split() for text in texts(cli.lab.asked[-1]["body"]) if "!tool" not in text)


# approval_mode, sandbox_mode -> whether a command may write; codex has a sandbox of its own, gemini's needs a container
WRITES = {("default", "default"): False, ("always", "default"): False, ("auto", "read-only"): False,
          ("auto", "own"): True}


def test_a_command_writes_only_where_the_modes_let_it(cli: Cli, tmp_path: Path) -> None:
    def tried(approval: str, sandbox: str) -> bool:
        file = tmp_path / f"{approval}-{sandbox}"
        mode = sandbox if sandbox != "own" else "workspace" if cli.name == "codex" else "default"
        told = cli.prompt(f"!tool touch {file}", workdir=str(tmp_path), approval_mode=approval, sandbox_mode=mode)
        assert (told.status, told.json["exit_code"]) == (200, 0), told.body
        return file.exists()
    assert dict(zip(WRITES, at_once([functools.partial(tried, *modes) for modes in WRITES]))) == WRITES
    assert len([request for request in cli.lab.asked if request["tools"]]) >= len(WRITES)


# ---- Failures

MOST = 5  # times that a CLI asks its provider for one answer; by hand codex does 6 times, claude 11, gemini for minutes
FAILURES = {  # prompt, model -> status, OpenAI's type and code, Anthropic's type
    ("!error 401", ""): (401, "authentication_error", "backend_auth", "authentication_error"),
    ("!error 429", ""): (429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
    ("hello", "nonexistent-x"): (404, "invalid_request_error", "model_not_found", "not_found_error"),
    ("!hang", ""): (504, "api_error", "timeout", "timeout_error")}
CLASSES = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError", 504: "InternalServerError"}


class Failed(NamedTuple):
    """The SDK's exception. A stream begins after 10 s, whatever comes: on a busy machine a failure is told in it."""
    error: Any
    may_have_begun: bool


def failed(cli: Cli, way: str, prompt: str, **fields: Any) -> Failed:
    began, sdk = time.monotonic(), openai if way.startswith("openai") else anthropic
    with pytest.raises(sdk.APIError) as caught:
        cli.ask(way, prompt, **fields)
    return Failed(caught.value, way.endswith("stream") and time.monotonic() - began > clinvk.SILENCE)


def assert_is(failure: Failed, way: str, status: int, kind: str, code: str, anthropic_kind: str) -> None:
    error, sdk = failure.error, openai if way.startswith("openai") else anthropic
    if getattr(error, "status_code", 200) == 200:  # the OpenAI SDK has none for what a stream tells
        assert failure.may_have_begun, (way, error)
    else:
        assert error.status_code == status and isinstance(error, getattr(sdk, CLASSES[status])), (way, error)
    told = (error.type, error.code) if sdk is openai else (error.body["error"]["type"],)
    assert told == ((kind, code) if sdk is openai else (anthropic_kind,)), (way, error)


@pytest.mark.parametrize("prompt, model", FAILURES)
def test_a_failure_is_the_sdks_own_error_at_the_first_try(cli: Cli, prompt: str, model: str) -> None:
    fields: Dict[str, Any] = {"model": f"{cli.name}/{model}"} if model else {}
    fields["extra_body"] = {"clinvk": {"timeout_secs": 3}} if prompt == "!hang" else {}
    ways = COMPAT if prompt == "!hang" else ["openai stream", "anthropic"]  # the others without a login, below
    before = cli.served.stderr.count(" POST ")
    failures = at_once([functools.partial(failed, cli, way, prompt, **fields) for way in ways])
    for way, failure in zip(ways, failures):
        assert_is(failure, way, *FAILURES[prompt, model])
        assert failure.may_have_begun or failure.error.response.headers["x-should-retry"] == "false"
    eventually(lambda: cli.served.stderr.count(" POST ") == before + len(ways))
    assert len(cli.lab.asked) <= (1 if prompt == "!hang" else MOST) * len(ways)


@pytest.mark.parametrize("prompt, model", FAILURES)
def test_a_failed_run_of_the_own_api_is_an_answer_with_an_error(cli: Cli, prompt: str, model: str) -> None:
    fields: Dict[str, Any] = {"model": model} if model else {}
    told = cli.prompt(prompt, **fields, **({"timeout_secs": 3} if prompt == "!hang" else {}))
    assert told.status == 200 and told.json["exit_code"] != 0
    assert told.json["error"].startswith("time is up") == (prompt == "!hang")
    assert len(cli.lab.asked) <= (1 if prompt == "!hang" else MOST)


@pytest.mark.parametrize("cli, chosen", [("claude", ""), ("claude 2.1.331", ""), ("codex", ""), ("gemini", ""),
                                         ("gemini", "gemini-api-key"), ("gemini", "oauth-personal")], indirect=["cli"])
def test_a_cli_without_a_login_fails_and_opens_no_browser(cli: Cli, another: Callable[..., Cli], tmp_path: Path,
                                                          chosen: str) -> None:
    for name in ("xdg-open", "open", "x-www-browser", "sensible-browser", "firefox", "chrome"):
        executable(tmp_path / "bin" / name, f"touch {tmp_path}/opened")
    out = another(before_path=[tmp_path / "bin"], ANTHROPIC_API_KEY=None, STUB_KEY=None, GEMINI_API_KEY=None,
                  GOOGLE_GEMINI_BASE_URL=None)  # to an address that it is given gemini goes without a key, too
    settings = {"security": {"auth": {"selectedType": chosen}}} if chosen else {}
    (out.home / ".gemini" / "settings.json").write_text(json.dumps(settings))
    ways = ["openai", "anthropic stream"]
    calls = [functools.partial(failed, out, way, "hello") for way in ways]
    *failures, told = at_once([*calls, lambda: out.prompt("hello")])
    for way, failure in zip(ways, failures):
        assert_is(failure, way, *FAILURES["!error 401", ""])
    assert told.status == 200 and told.json["exit_code"] != 0 and not told.json.get("output"), told.body
    assert "not logged in" in told.json["error"]
    assert not (tmp_path / "opened").exists() and not out.lab.asked


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# ---- Prompts

PROMPTS = {"a flag": "-x", "a sub-command": "help", "a command": "/cost", "another command": "/clear",
           "a shell line": "!ls", "a file": "look at @{secret} please", "a file alone": "@{secret}",
           "2 MB": "".join(f"{n:09} " for n in range(200_000)), "NUL": "a\0b",
           "blanks around": "  \n blanks around \n "}
REFUSED = {("codex", "2 MB"): "codex takes 1048576 at most"}


@pytest.fixture(scope="module")
def session(cli: Cli) -> Dict[str, str]:
    """Of the agent, to go on with: it begins with the first prompt."""
    return {}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_gets_to_the_provider_to_the_letter(cli: Cli, session: Dict[str, str], tmp_path: Path,
                                                     name: str) -> None:
    """The model is asked for the first time; the agent in a conversation, in the process that goes on with it."""
    (tmp_path / "secret").write_text("what stands in the file")
    prompt = PROMPTS[name].replace("{secret}", str(tmp_path / "secret"))
    body = {"model": cli.name, "messages": [{"role": "user", "content": prompt}]}
    answers = at_once([lambda: cli.served.call("POST", "/v1/chat/completions", body, x_api_key=KEY),
                       lambda: cli.prompt(prompt, ephemeral=False, **session)])
    sent = [list(texts(request["body"])) for request in cli.lab.asked]
    if (cli.name, name) in REFUSED:
        assert ([told.status for told in answers], sent) == ([400, 422], [])
        assert all(REFUSED[cli.name, name] in told.body.decode() for told in answers)
    else:
        assert [(told.status, told.json.get("exit_code", 0)) for told in answers] == [(200, 0)] * 2, answers
        assert len(sent) >= 2 and [strings for strings in sent if prompt not in strings] == []
        assert not any("what stands in the file" in text for strings in sent for text in strings)
        session["session_id"] = answers[1].json["session_id"]


SENTENCE = "You are a Claude agent, built on Anthropic's Claude Agent SDK."  # which claude always sends


def assert_model_way(cli: Cli, *system: str) -> None:
    """What the provider was asked has that system prompt alone, and no tools."""
    assert cli.lab.asked
    for request in cli.lab.asked:
        found = [text for text in system_prompt(request["body"]) if not text.startswith("x-anthropic-billing-header")]
        assert found == [*([SENTENCE] if cli.name == "claude" else []), *system]
        assert not request["tools"]


def test_a_conversation_and_its_system_prompt_get_there_whole_through_both_sdks(cli: Cli) -> None:
    turns = [("user", "first question"), ("assistant", "earlier answer"), ("user", "and !history")]
    messages = [{"role": role, "content": text} for role, text in turns]
    system = {"role": "system", "content": "You are a pirate."}
    answers = at_once([lambda: cli.ask("openai", "", messages=[system, *messages]),
                       lambda: cli.ask("anthropic stream", "", messages=messages, system=system["content"])])
    assert [answer.text[:8] for answer in answers] == ["HISTORY[", "HISTORY["]
    for request in cli.lab.asked:
        sent = "\n".join(texts(request["body"]))
        assert [text for _, text in turns] == sorted((text for _, text in turns), key=sent.index)
    assert_model_way(cli, "You are a pirate.")


# ---- What reaches the provider besides the prompt

def test_where_the_client_sends_no_system_prompt_there_is_none_and_there_are_no_tools(cli: Cli) -> None:
    cli.ask("openai stream", "hello")
    assert_model_way(cli)


HONOURED = {  # request -> what is in the request to the provider, and what is ignored
    "claude": ({"max_tokens": 50, "output_config": {"effort": "low"}}, set()),
    "codex": ({"reasoning": {"effort": "low"}}, {"max_tokens"}),
    "gemini": ({"generationConfig": {"maxOutputTokens": 50}}, {"reasoning_effort"})}


def test_what_a_cli_can_not_do_is_named_and_the_rest_is_done(cli: Cli) -> None:
    asked = {"model": f"{cli.name}/gemini-2.5-flash", "messages": user("hello"), "max_tokens": 50, "temperature": 0.5,
             "reasoning_effort": "low"}
    told = cli.served.call("POST", "/openai/v1/chat/completions", asked, x_api_key=KEY)
    wanted, ignored = HONOURED[cli.name]
    assert contains(cli.lab.asked[-1]["body"], wanted), cli.lab.asked[-1]["body"]
    assert set(told.headers["x-clinvk-ignored"].split(", ")) == {"temperature", *ignored}


def contains(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(contains(whole.get(name), value) for name, value in part.items())
    return bool(whole == part)


def test_a_thinking_budget_gets_there_or_is_named_as_ignored(cli: Cli) -> None:
    asked = {"model": f"{cli.name}/claude-haiku-4-5", "messages": user("hello"), "max_tokens": 4000,
             "thinking": {"type": "enabled", "budget_tokens": 2000}}
    told = cli.served.call("POST", "/anthropic/v1/messages", asked, x_api_key=KEY)
    if cli.name == "claude":
        assert cli.lab.asked[-1]["body"]["thinking"]["budget_tokens"] == 2000
    else:
        assert "thinking" in told.headers["x-clinvk-ignored"].split(", ")


def test_nothing_of_clinvks_own_environment_is_in_the_clis(cli: Cli) -> None:
    """CLINVK_RUN marks whose a process is."""
    with cli.openai.chat.completions.create(model=cli.name, messages=user("!slow 10"), stream=True) as stream:
        next(iter(stream))
        environs = []
        for process in cli.processes():
            with contextlib.suppress(OSError):  # it has gone meanwhile
                environs.append((process / "environ").read_text())
    assert environs and not any(KEY in environ for environ in environs)
    names = {line.partition("=")[0] for environ in environs for line in environ.split("\0")}
    assert {name for name in names if name.startswith("CLINVK_")} == {"CLINVK_RUN"}


# ---- Structured output

PERSON: Json = {"type": "object", "required": ["name", "age"], "additionalProperties": False,
                "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
BO = '{"name": "Bo", "age": 3}'
AS_SCHEMA: Json = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


def saying(cli: Cli, text: str) -> str:
    """What makes the stub answer that: claude's model by a call of the tool that claude offers for it."""
    return f"!call StructuredOutput {text}" if cli.name == "claude" else f"!say {text}"


def test_each_cli_is_told_of_a_schema_in_its_way_and_the_answer_is_the_json_alone(cli: Cli) -> None:
    fenced = json.dumps(f"Here it is:\n```json\n{BO}\n```")
    prompt = saying(cli, fenced if cli.name == "gemini" else BO)
    form = {"type": "json_schema", "name": "person", "schema": PERSON}
    chat, response = at_once([
        lambda: cli.ask("openai stream", prompt, response_format=AS_SCHEMA).text,
        lambda: cli.openai.responses.create(model=cli.name, input=prompt, text={"format": form}).output_text])
    assert [json.loads(chat), json.loads(response)] == [json.loads(BO)] * 2
    first, second = (request["body"] for request in cli.lab.asked)
    for body in (first, second):
        if cli.name == "claude":
            assert [(tool["name"], tool["input_schema"]) for tool in body["tools"]] == [("StructuredOutput", PERSON)]
        elif cli.name == "codex":
            assert (body["text"]["format"]["schema"], body["text"]["format"]["strict"]) == (PERSON, True)
        else:
            assert json.dumps(PERSON) in "".join(system_prompt(body))


def test_an_answer_in_prose_is_asked_for_once_more_and_then_refused(cli: Cli) -> None:
    """What is asked once more holds the schema, and so what the stub is to say to it."""
    mended = {"type": "object", "description": f"and {saying(cli, '{}')} now"}
    refused = {"type": "object", "required": ["name"]}  # for codex, too, a schema that it is told in words
    forms = [{"type": "json_schema", "json_schema": {"name": "n", "schema": schema}} for schema in (mended, refused)]
    ask = functools.partial(cli.openai.chat.completions.create, model=cli.name, messages=user('!say "I will not."'))
    told = [answer.choices[0].message for answer in at_once([functools.partial(ask, response_format=f) for f in forms])]
    assert [(told[0].content, told[0].refusal), told[1].content] == [("{}", None), None]
    assert told[1].refusal.startswith("STUB[")
    by_claude_itself = 3 if cli.name == "claude" else 0  # which asks its model for the call itself, each time
    assert len(cli.lab.asked) == 4 + by_claude_itself


# ---- The operator's own files

def plant(home: Path, workdir: Path, started: Path) -> None:
    """Memory files in both places, which are repositories, and MCP servers and hooks that leave a file in `started`."""
    server = executable(started.with_name("server"), 'touch "$1"')
    started.mkdir()
    for place, at in (("home", home), ("project", workdir)):
        mcp = {"mcpServers": {f"planted-{place}": {"command": str(server), "args": [f"{started}/mcp-{place}"]}}}
        hook = {"type": "command", "name": "planted", "command": f"touch {started}/hook-{place}"}
        hooks = {"hooks": {"SessionStart": [{"hooks": [hook]}], "UserPromptSubmit": [{"hooks": [hook]}],
                           "BeforeAgent": [{"hooks": [hook]}]}}
        for name in (".claude", ".codex", ".gemini"):
            (at / name).mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "init", "--quiet", str(at)], check=True)
        memory = (".claude/CLAUDE.md", ".codex/AGENTS.md", ".gemini/GEMINI.md") if place == "home" else ()
        for name in (*memory, "CLAUDE.md", "AGENTS.md", "GEMINI.md"):
            (at / name).write_text(f"planted in {place}\n")
        (at / (".claude.json" if place == "home" else ".mcp.json")).write_text(json.dumps(mcp))
        (at / ".claude" / "settings.json").write_text(json.dumps(hooks))
        (at / ".gemini" / "settings.json").write_text(json.dumps({**labkit.GEMINI_SETTINGS, **mcp, **hooks}))
        config = at / ".codex" / "config.toml"
        text = config.read_text() if config.exists() else ""
        config.write_text(f'notify = ["touch", "{started}/notify-{place}"]\n{text}\n[mcp_servers.planted-{place}]\n'
                          f'command = "{server}"\nargs = ["{started}/mcp-{place}"]\n')


@pytest.fixture(scope="module")
def planted(cli: Cli, pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """The CLI in a home and a directory where there are files of the operator's."""
    folder = tmp_path_factory.mktemp("planted")
    plant(labkit.make_home(folder / "home", cli.lab.url), folder / "work", folder / "started")
    made = Cli(cli.name, cli.lab, pyz, folder, version=cli.version)
    yield made
    made.close()


def started_in(cli: Cli) -> List[str]:
    return sorted(file.name for file in (cli.home.parent / "started").iterdir())


def planted_in(cli: Cli) -> List[str]:
    """Which of the planted texts have reached the provider."""
    sent = "\n".join(text for request in cli.lab.asked for text in texts(request["body"]))
    return [place for place in ("home", "project") if f"planted in {place}" in sent]


def test_the_model_sees_and_starts_nothing_of_the_operators(planted: Cli) -> None:
    planted.ask_all("hello", ["openai", "anthropic stream"])
    assert (len(planted.lab.asked), planted_in(planted), started_in(planted)) == (2, [], [])


STARTED = {"claude": ["hook-home", "hook-project", "mcp-home", "mcp-project"], "codex": ["mcp-home", "notify-home"],
           "gemini": ["hook-home", "mcp-home"]}  # codex and gemini do not trust that project


def test_the_agent_has_the_operators_files_and_servers(planted: Cli) -> None:
    planted.ask("native", "hello", workdir=str(planted.workdir))
    assert planted_in(planted) == ["home", "project"]
    eventually(lambda: started_in(planted) == STARTED[planted.name])


# ---- What is left behind

LEFT = (".claude/projects", ".claude/sessions", ".claude/todos", ".codex/sessions", ".codex/archived_sessions",
        ".gemini/tmp/*/chats", ".clinvk/codex/sessions", ".clinvk/runs", ".clinvk/empty")


@pytest.fixture(scope="module")
def quiet(cli: Cli, pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """The CLI behind a clinvk in which nothing waits."""
    made = Cli(cli.name, cli.lab, pyz, tmp_path_factory.mktemp("quiet"), version=cli.version,
               config={"server": {"spares": 0, "live_conversations": 0}})
    yield made
    made.close()


def test_runs_leave_no_session_and_no_scratch_file(quiet: Cli) -> None:
    def left() -> List[Path]:
        return [path for place in LEFT for path in quiet.home.glob(f"{place}/**/*") if path.is_file()]
    at_once([lambda: quiet.ask("openai", "hello"), lambda: quiet.ask("native", "hello"),
             lambda: quiet.ask("native", "!tool echo hi", approval_mode="auto")])
    eventually(lambda: left() == [])


LEAVINGS = {  # path, stream, prompt
    "a stream of OpenAI's": ("/openai/v1/chat/completions", True, "!slow 6000"),
    "a stream of Anthropic's": ("/anthropic/v1/messages", True, "!slow 6000"),
    "a whole answer": ("/openai/v1/chat/completions", False, "!hang"),
    "a tool": ("/api/v1/prompt", True, "!tool tail -f /dev/null")}


@pytest.mark.parametrize("name", LEAVINGS)
def test_nothing_runs_on_for_a_client_that_has_left(quiet: Cli, name: str) -> None:
    path, stream, prompt = LEAVINGS[name]
    eventually(lambda: not quiet.processes())  # it may still be asking for the CLI's version
    body = {"backend": quiet.name, "prompt": prompt, "approval_mode": "auto", "output_format": "stream-json",
            "ephemeral": True} if path == "/api/v1/prompt" else \
        {"model": quiet.name, "max_tokens": 100, "messages": user(prompt), "stream": stream}
    connection = quiet.served.connection()
    connection.request("POST", path, json.dumps(body), {**JSON_TYPE, "X-Api-Key": KEY})
    eventually(lambda: quiet.lab.asked)
    answer = connection.getresponse() if stream else None
    assert answer is None or answer.readline()
    if "!tool" in prompt:
        eventually(lambda: any(line.startswith("tail\0") for line in quiet.command_lines()))
    assert quiet.processes()
    for one in filter(None, (answer, connection)):
        one.close()
    eventually(lambda: not quiet.processes())
