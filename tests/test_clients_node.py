"""Real JavaScript clients of a clinvk whose backends are echo and scripted CLIs: openai-node, anthropic-typescript and
the Vercel AI SDK. Each has a script in clients/node/ that asks all it can and prints what it made of the answers."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from conftest import Served, alive, eventually, executable, serving

pytestmark = [pytest.mark.clients, pytest.mark.skipif(not shutil.which("npm"), reason="there is no npm")]
Json = Dict[str, Any]
SCRIPTS = Path(__file__).parent / "clients" / "node"

# Text CLIs, by their argument. HERE is the folder where they leave notes.
CLI = """
HERE, asked = os.path.dirname(os.path.abspath(__file__)), sys.stdin.read()
def say(text): print(text, end="", flush=True)
def leave(name, note):
    with open(os.path.join(HERE, name), "a") as notes:
        notes.write(note + "\\n")
if sys.argv[1] == "person":
    say('{"name": "Ann", "age": 3}')
elif sys.argv[1] == "fenced":
    say('Here you are:\\n```json\\n{"name": "Ann", "age": 3}\\n```\\n')
elif sys.argv[1] == "prose":
    say("She is called Ann.")
elif sys.argv[1] == "fails":
    leave("failed", asked)
    sys.exit("out of luck")
elif sys.argv[1] == "breaks":
    say("Hel")
    sys.exit("broken off")
elif sys.argv[1] == "hangs":
    leave("hanging", "%s %d" % (asked, os.getpid()))
    say("Hel")
    time.sleep(600)
"""
TEXT_CLIS = ("person", "fenced", "prose", "fails", "breaks", "hangs")
# claude: it says what it was asked, images as their type and size.
CLAUDE = """
import base64
def show(**line): print(json.dumps(line), flush=True)
def event(**event): show(type="stream_event", event=event)
def delta(kind, text): event(type="content_block_delta", index=0, delta={"type": kind + "_delta", kind: text})
def shown(block):
    if block["type"] == "image":
        source = block["source"]
        return "[%s %d] " % (source["media_type"], len(base64.b64decode(source["data"])))
    return block["text"]
def answer(text):
    reason = "max_tokens" if "too long" in text else "end_turn"
    event(type="message_start", message={"id": "m", "model": "m"})
    for thought in ("Let me ", "see."):
        delta("thinking", thought)
    for piece in text.partition(" "):
        delta("text", piece)
    show(type="assistant", message={"id": "m", "model": "m", "content": [{"type": "text", "text": text}]})
    event(type="message_delta", delta={"stop_reason": reason})
    show(type="result", subtype="success", is_error=False, result=text, stop_reason=reason, num_turns=1, usage={
        "input_tokens": 70, "output_tokens": 12, "cache_read_input_tokens": 30, "cache_creation_input_tokens": 5,
        "output_tokens_details": {"thinking_tokens": 4}})
def fail(status, text):
    show(type="result", subtype="success", is_error=True, api_error_status=status, result=text, num_turns=1)
for line in sys.stdin:
    message = json.loads(line)
    if message["type"] == "user":
        text = "".join(map(shown, message["message"]["content"]))
        if "limited" in text:
            with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "limited"), "a") as notes:
                notes.write(text + "\\n")
            fail(429, "too much")
        elif "logged out" in text:
            fail(401, "who are you")
        else:
            answer(text)
"""


def installed() -> Path:
    """The folder with the clients' packages. The first call installs them (90 MB, 15 s) into $NODE_CLIENTS or
    ~/.cache/clinvk-node-clients, each set of versions in a folder of its own."""
    lock_file = SCRIPTS / "package-lock.json"
    root = Path(os.environ.get("NODE_CLIENTS") or Path.home() / ".cache" / "clinvk-node-clients")
    root /= hashlib.sha256(lock_file.read_bytes()).hexdigest()[:12]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in another process may be installing them
        if not (root / "ready").exists():
            for file in (SCRIPTS / "package.json", lock_file):
                shutil.copy(file, root)
            command = ["npm", "ci", "--no-audit", "--no-fund", "--silent", "--ignore-scripts"]
            subprocess.run(command, cwd=root, check=True)
            (root / "ready").touch()
    return root / "node_modules"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node")


@pytest.fixture(scope="module")
def server(pyz: Path, folder: Path) -> Iterator[Served]:
    cli = executable(folder / "cli", CLI)
    backends: Json = {name: {"command": [cli, name]} for name in TEXT_CLIS}
    backends.update(parrot={"command": ["cat"]}, missing={"command": [str(folder / "missing")]},
                    claude={"command": executable(folder / "claude", CLAUDE)},
                    codex={"enabled": False}, gemini={"enabled": False})
    with serving(pyz, folder) as start:
        yield start(config={"backends": backends, "server": {
            "spares": 0, "live_conversations": 0,
            "model_aliases": {"claude-opus-4-5": "person", "claude-opus-5": "prose"}}})


@pytest.fixture(scope="module")
def told_by(server: Served, folder: Path) -> Callable[[str], Json]:
    """What a client's script prints."""
    (folder / "node_modules").symlink_to(installed())
    for script in SCRIPTS.glob("*.mjs"):
        shutil.copy(script, folder)

    def run(name: str) -> Json:
        done = subprocess.run(["node", f"{name}.mjs", server.url], cwd=folder, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr
        told: Json = json.loads(done.stdout)
        return told
    return run


@pytest.fixture(scope="module")
def openai(told_by: Callable[[str], Json]) -> Json:
    return told_by("openai")


@pytest.fixture(scope="module")
def anthropic(told_by: Callable[[str], Json]) -> Json:
    return told_by("anthropic")


@pytest.fixture(scope="module")
def vercel(told_by: Callable[[str], Json]) -> Json:
    return told_by("vercel")


PIECES, TEXT, ANN = ["one ", "two ", "three"], "one two three", {"name": "Ann", "age": 3}
COUNTED = ["one", " ", "two three"]  # claude's pieces
TRANSCRIPT = """Be brief.

The conversation so far:

<turn role="user">
What?
</turn>
<turn role="assistant">
That.
</turn>

Now answer the user's last turn, which is all that follows:

Why?"""
UNKNOWN = 'no backend goes by the model name "nothing-known". There is: claude, codex, gemini, breaks, '
OUT_OF_LUCK, BROKEN_OFF = "fails failed with exit code 1\nout of luck", "breaks failed with exit code 1\nbroken off"
LOGIN = "claude is not logged in (who are you). Run claude and use /login, or set ANTHROPIC_API_KEY"
MODELS = ["claude", "breaks", "fails", "fenced", "hangs", "parrot", "person", "prose", "echo"]


def openai_usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning}}


def responses_usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0, written: int = 0) -> Json:
    return {"input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
            "output_tokens_details": {"reasoning_tokens": reasoning}}


def anthropic_usage(fresh: int, output: int, read: int = 0, created: int = 0) -> Json:
    return {"input_tokens": fresh, "output_tokens": output, "cache_read_input_tokens": read,
            "cache_creation_input_tokens": created}


def starts(folder: Path, name: str) -> List[str]:
    """The prompts of the CLIs that have left a note."""
    return (folder / name).read_text().splitlines()


def error(raised: str, status: int, message: str, code: Optional[str] = None, param: Optional[str] = None) -> Json:
    """What openai-node raises."""
    named = {"code": code, "param": param}
    return {"raised": raised, "status": status, "message": f"{status} {message}",
            **{name: value for name, value in named.items() if value}}


def anthropic_error(told: Json) -> List[Any]:
    """Class, status, type and message of what anthropic-typescript raises: its message is the body."""
    body = json.loads(told["message"].partition(" ")[2] if "status" in told else told["message"])
    return [told["raised"], told.get("status"), body["error"]["type"], body["error"]["message"]]


# ---- openai-node

def test_openai_node_reads_a_whole_answer(openai: Json) -> None:
    assert openai["chat"] == {
        "kind": "chatcmpl", "object": "chat.completion", "model": "echo", "usage": openai_usage(4, 4),
        "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT, "refusal": None},
                     "finish_reason": "stop", "logprobs": None}]}


def test_openai_node_reads_a_stream(openai: Json) -> None:
    assert openai["chat streamed"] == {"pieces": PIECES, "finish_reason": "stop", "usage": openai_usage(4, 4)}


def test_openai_nodes_helper_gathers_a_stream(openai: Json) -> None:
    message = {"role": "assistant", "content": TEXT, "refusal": None, "parsed": None}
    assert openai["chat helper"] == {"pieces": PIECES, "message": message, "finish_reason": "stop"}


def test_openai_nodes_conversation_and_system_prompts_come_to_the_cli_whole(openai: Json) -> None:
    assert openai["conversation"] == TRANSCRIPT.replace("Be brief.", "Be brief.\nBe kind.")


def test_openai_node_reads_the_clis_own_counts(openai: Json) -> None:
    usage = openai_usage(105, 12, 30, 4)
    assert openai["counted"] == {"text": TEXT, "finish_reason": "stop", "usage": usage}
    assert openai["counted streamed"] == {"pieces": COUNTED, "finish_reason": "stop", "usage": usage}


def test_openai_node_is_told_what_the_cli_thinks(openai: Json) -> None:
    assert openai["thoughts"] == {"role": "assistant", "content": TEXT, "refusal": None,
                                  "reasoning_content": "Let me see."}
    assert openai["thoughts streamed"] == {"pieces": ["Let me ", "see."]}


def test_openai_node_is_told_why_an_answer_ends(openai: Json) -> None:
    assert (openai["cut"], openai["stop"]) == ("length", "one two")


def test_openai_node_gets_an_answer_though_the_cli_can_not_call_its_tools(openai: Json) -> None:
    assert openai["tools"] == {"text": TEXT, "ignored": "tools", "backend": "echo"}
    assert openai["tool runner"] == TEXT


def test_openai_nodes_tool_results_come_to_the_cli(openai: Json) -> None:
    assert '<tool_call id="call_1" name="weather">{"city":"Rome"}</tool_call>' in openai["tool results"]
    assert '<tool_result id="call_1">sunny</tool_result>' in openai["tool results"]


def test_openai_node_lists_models(openai: Json) -> None:
    assert (openai["models"], openai["one model"]) == (MODELS, "claude/opus")


@pytest.mark.parametrize("case", ["unknown model", "unknown model retrieved"])
def test_an_unknown_model_is_a_not_found_error_of_openai_node(case: str, openai: Json) -> None:
    told = openai[case]
    assert told.pop("message").startswith(f"404 {UNKNOWN}")
    assert told == {"raised": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"}


def test_a_bad_request_is_a_bad_request_error_of_openai_node(openai: Json) -> None:
    roles = "system, developer, user, assistant, tool, function"
    assert openai["bad request"] == error("BadRequestError", 400, f"messages[0].role: must be one of {roles}",
                                          param="messages[0].role")


@pytest.mark.parametrize("case, prompt", [("failed", "openai whole"), ("failed streamed", "openai streamed")])
def test_a_failed_run_is_an_error_of_openai_node_that_it_does_not_repeat(case: str, prompt: str, openai: Json,
                                                                         folder: Path) -> None:
    assert openai[case] == error("InternalServerError", 502, OUT_OF_LUCK, "backend_failed")
    assert starts(folder, "failed").count(prompt) == 1


def test_a_run_that_breaks_in_mid_stream_is_an_error_of_openai_node(openai: Json) -> None:
    assert openai["broken"] == {"pieces": ["Hel"], "raised": "APIError", "code": "backend_failed",
                                "message": BROKEN_OFF}


def test_a_usage_limit_is_a_rate_limit_error_of_openai_node_that_it_does_not_repeat(openai: Json, folder: Path) -> None:
    assert openai["limited"] == error("RateLimitError", 429, "too much. Try again later", "rate_limit_exceeded")
    assert starts(folder, "limited").count("limited openai") == 1


def test_a_missing_login_is_an_authentication_error_of_openai_node(openai: Json) -> None:
    assert openai["logged out"] == error("AuthenticationError", 401, LOGIN, "backend_auth")


def test_openai_node_asks_again_for_what_has_not_run(openai: Json) -> None:
    told = openai["retried"]
    assert (told["raised"], told["status"], told["code"]) == ("InternalServerError", 503, "backend_unavailable")
    assert told["times"] == 2


@pytest.mark.parametrize("client", ["openai", "anthropic"])
def test_a_client_that_leaves_a_stream_ends_the_cli(client: str, folder: Path, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(client)["left"] == "Hel"
    [pid] = [int(note.split()[-1]) for note in starts(folder, "hanging") if note.startswith(f"{client} left")]
    eventually(lambda: not alive([pid]))


# ---- anthropic-typescript

def test_anthropic_typescript_reads_a_whole_answer(anthropic: Json) -> None:
    assert anthropic["message"] == {
        "kind": "msg", "type": "message", "role": "assistant", "model": "echo", "usage": anthropic_usage(4, 4),
        "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn", "stop_sequence": None}


def test_anthropic_typescripts_helper_gathers_a_stream(anthropic: Json) -> None:
    assert anthropic["message streamed"] == {
        "pieces": PIECES, "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn", "stop_sequence": None,
        "usage": anthropic_usage(4, 4)}


def test_anthropic_typescript_reads_the_events_in_their_order(anthropic: Json) -> None:
    assert anthropic["events"] == ["message_start", "content_block_start", *["content_block_delta"] * 3,
                                   "content_block_stop", "message_delta", "message_stop"]


def test_anthropic_typescripts_conversation_and_system_prompt_come_to_the_cli_whole(anthropic: Json) -> None:
    assert anthropic["conversation"] == TRANSCRIPT
    assert anthropic["system in blocks"] == f"Be brief.\n\n{TEXT}"


def test_anthropic_typescript_reads_thoughts_and_the_clis_own_counts(anthropic: Json) -> None:
    answer = {"content": [{"type": "thinking", "thinking": "Let me see.", "signature": ""},
                          {"type": "text", "text": TEXT}],
              "stop_reason": "end_turn", "stop_sequence": None, "usage": anthropic_usage(70, 12, 30, 5)}
    assert anthropic["counted"] == answer
    assert anthropic["counted streamed"] == {"pieces": COUNTED, **answer}
    assert anthropic["thoughts streamed"] == {"pieces": ["Let me ", "see."]}


def test_anthropic_typescript_is_told_why_an_answer_ends(anthropic: Json) -> None:
    assert anthropic["cut"] == "max_tokens"
    assert anthropic["stop"] == {"content": [{"type": "text", "text": "one two"}], "stop_reason": "stop_sequence",
                                 "stop_sequence": " three", "usage": anthropic_usage(4, 2)}


def test_anthropic_typescript_counts_tokens(anthropic: Json) -> None:
    assert anthropic["count"] == {"input_tokens": 4}


def test_anthropic_typescript_gets_an_answer_though_the_cli_can_not_call_its_tools(anthropic: Json) -> None:
    assert anthropic["tools"] == {"text": TEXT, "ignored": "tools, max_tokens"}
    assert anthropic["tool runner"] == TEXT


def test_anthropic_typescripts_tool_results_come_to_the_cli(anthropic: Json) -> None:
    assert '<tool_call id="call_1" name="weather">{"city": "Rome"}</tool_call>' in anthropic["tool results"]
    assert '<tool_result id="call_1">sunny</tool_result>' in anthropic["tool results"]


def test_anthropic_typescript_lists_models(anthropic: Json) -> None:
    assert (anthropic["models"], anthropic["one model"]) == (MODELS, "claude/opus")


@pytest.mark.parametrize("case, raised, status, kind, message", [
    ("unknown model", "NotFoundError", 404, "not_found_error", UNKNOWN),
    ("unknown model retrieved", "NotFoundError", 404, "not_found_error", UNKNOWN),
    ("bad request", "BadRequestError", 400, "invalid_request_error", "max_tokens: must be at least 1"),
    ("failed", "InternalServerError", 502, "api_error", OUT_OF_LUCK),
    ("failed streamed", "InternalServerError", 502, "api_error", OUT_OF_LUCK),
    ("broken", "APIError", None, "api_error", BROKEN_OFF),
    ("limited", "RateLimitError", 429, "rate_limit_error", "too much. Try again later"),
    ("logged out", "AuthenticationError", 401, "authentication_error", LOGIN),
    ("retried", "ServiceUnavailableError", 503, "overloaded_error", "missing is not installed: ")])
def test_anthropic_typescript_raises_its_own_class_for_each_error(case: str, raised: str, status: Optional[int],
                                                                  kind: str, message: str, anthropic: Json) -> None:
    *known, told = anthropic_error(anthropic[case])
    assert known == [raised, status, kind] and told.startswith(message)


def test_anthropic_typescript_repeats_only_what_has_not_run(anthropic: Json, folder: Path) -> None:
    failed = starts(folder, "failed")
    assert (failed.count("anthropic whole"), failed.count("anthropic streamed")) == (1, 1)
    assert starts(folder, "limited").count("limited anthropic") == 1
    assert anthropic["retried"]["times"] == 2 and anthropic["broken"]["pieces"] == ["Hel"]


# ---- The Vercel AI SDK

def vercel_usage(way: str, tokens: int, output: int, cached: int = 0, reasoning: int = 0) -> Json:
    counts = {"inputTokens": tokens, "outputTokens": output, "totalTokens": tokens + output,
              "cachedInputTokens": cached}
    return counts if way == "anthropic" else {**counts, "reasoningTokens": reasoning}


def thoughts(way: str, text: str) -> str:
    """What the SDK makes of thinking: it does not look for any in OpenAI's own chat completions."""
    return "" if way == "chat" else text


WAYS = pytest.mark.parametrize("way", ["responses", "chat", "compatible", "strict", "anthropic"])


@WAYS
def test_the_vercel_sdk_reads_a_whole_answer(way: str, vercel: Json) -> None:
    assert vercel[f"{way}: text"] == {"text": TEXT, "finish_reason": "stop", "usage": vercel_usage(way, 4, 4)}


@WAYS
def test_the_vercel_sdk_reads_a_stream(way: str, vercel: Json) -> None:
    usage = {} if way == "compatible" else vercel_usage(way, 4, 4)  # which does not ask for it
    assert vercel[f"{way}: text streamed"] == {"pieces": PIECES, "thoughts": "", "finish_reason": "stop",
                                               "usage": usage}


@WAYS
def test_the_vercel_sdks_conversation_and_system_prompt_come_to_the_cli_whole(way: str, vercel: Json) -> None:
    assert vercel[f"{way}: conversation"] == TRANSCRIPT


@WAYS
def test_the_vercel_sdk_reads_thoughts_and_the_clis_own_counts(way: str, vercel: Json) -> None:
    told, streamed = vercel[f"{way}: counted"], vercel[f"{way}: counted streamed"]
    usage = vercel_usage(way, 105, 12, 30, 4)
    assert (told["text"], told["finish_reason"], told["usage"]) == (TEXT, "stop", usage)
    assert (streamed["pieces"], streamed["finish_reason"]) == (COUNTED, "stop")
    assert streamed["usage"] == ({} if way == "compatible" else usage)
    assert [told.get("thoughts", ""), streamed["thoughts"]] == [thoughts(way, "Let me see.")] * 2


@WAYS
def test_the_vercel_sdk_is_told_that_an_answer_was_cut(way: str, vercel: Json) -> None:
    assert vercel[f"{way}: cut"] == "length"


@WAYS
def test_the_vercel_sdk_gets_an_answer_though_the_cli_can_not_call_its_tools(way: str, vercel: Json) -> None:
    assert (vercel[f"{way}: tools"], vercel[f"{way}: tools streamed"]) == (TEXT, PIECES)


@WAYS
def test_the_vercel_sdks_tool_results_come_to_the_cli(way: str, vercel: Json) -> None:
    assert '<tool_call id="call_1" name="weather">' in vercel[f"{way}: tool results"]
    assert '<tool_result id="call_1">sunny</tool_result>' in vercel[f"{way}: tool results"]


@WAYS
def test_an_unknown_model_is_an_api_call_error_of_the_vercel_sdk(way: str, vercel: Json) -> None:
    told = vercel[f"{way}: unknown model"]
    assert (told["raised"], told["status"]) == ("APICallError", 404) and told["message"].startswith(UNKNOWN)


@WAYS
def test_a_failed_run_is_an_api_call_error_that_the_vercel_sdk_does_not_repeat(way: str, vercel: Json,
                                                                               folder: Path) -> None:
    told = {"raised": "APICallError", "status": 424, "message": OUT_OF_LUCK}  # it repeats a 502, whatever a header says
    assert vercel[f"{way}: failed"] == told
    assert vercel[f"{way}: failed streamed"] == {"pieces": [], "errors": [told]}
    failed = starts(folder, "failed")
    assert (failed.count(f"vercel {way} whole"), failed.count(f"vercel {way} streamed")) == (1, 1)


@WAYS
def test_a_run_that_breaks_in_mid_stream_is_an_error_part_of_the_vercel_sdks_stream(way: str, vercel: Json) -> None:
    told = vercel[f"{way}: broken"]
    assert (told["pieces"], [error["message"] for error in told["errors"]]) == (["Hel"], [BROKEN_OFF])


def test_a_text_cli_can_not_be_made_to_call_a_tool_for_an_object(vercel: Json) -> None:
    told = vercel["anthropic: object by tool"]
    assert (told["raised"], told["status"]) == ("APICallError", 400) and "tool_choice" in told["message"]


# ---- Objects, images, choices, completions and responses

@pytest.mark.parametrize("case", ["parsed", "parsed from a fence"])
def test_openai_nodes_parse_helper_reads_an_object(case: str, openai: Json) -> None:
    message = openai[case]
    assert json.loads(message["content"]) == message["parsed"] == ANN
    assert (message["role"], message["refusal"]) == ("assistant", None)


def test_openai_nodes_stream_helper_reads_an_object(openai: Json) -> None:
    told = openai["parsed streamed"]
    assert told["message"]["parsed"] == json.loads(told["text"]) == json.loads(told["message"]["content"]) == ANN


def test_openai_node_is_told_why_there_is_no_object(openai: Json) -> None:
    message = openai["refused"]
    assert message["parsed"] is None and not message["content"]
    assert isinstance(message["refusal"], str) and message["refusal"]


def test_openai_node_gets_json_if_it_asks_for_any(openai: Json) -> None:
    assert openai["json object"] == ANN


@pytest.mark.parametrize("case", ["parsed", "parsed from a fence", "parsed streamed"])
def test_anthropic_typescripts_parse_helper_reads_an_object(case: str, anthropic: Json) -> None:
    assert anthropic[case] == ANN


@WAYS
def test_the_vercel_sdk_reads_an_object(way: str, vercel: Json) -> None:
    assert (vercel[f"{way}: object"], vercel[f"{way}: output"]) == (ANN, ANN)
    assert vercel[f"{way}: object streamed"] == {"object": ANN, "last": ANN}


@WAYS
def test_an_answer_that_is_no_object_is_a_no_object_generated_error_of_the_vercel_sdk(way: str, vercel: Json) -> None:
    assert vercel[f"{way}: no object"]["raised"] == "NoObjectGeneratedError"


def shows_the_pixel(text: str) -> bool:
    """Whether claude was sent the picture, and the question about it."""
    return "[image/png 70] " in text and "What is it?" in text


def test_an_image_of_openai_nodes_comes_to_the_cli(openai: Json) -> None:
    assert shows_the_pixel(openai["image"])
    told = openai["image from afar"]
    assert (told["raised"], told["status"]) == ("BadRequestError", 400) and "image_url" in told["param"]


def test_an_image_of_anthropic_typescripts_comes_to_the_cli(anthropic: Json) -> None:
    assert shows_the_pixel(anthropic["image"])


@WAYS
def test_an_image_of_the_vercel_sdks_comes_to_the_cli(way: str, vercel: Json) -> None:
    assert shows_the_pixel(vercel[f"{way}: image"])


def test_openai_node_gets_as_many_choices_as_it_asks_for(openai: Json) -> None:
    told = openai["choices"]
    assert told["choices"] == [[0, TEXT], [1, TEXT], [2, TEXT]]
    assert told["usage"]["completion_tokens"] == 12
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] + 12
    assert openai["choices streamed"] == [[0, TEXT, "stop"], [1, TEXT, "stop"], [2, TEXT, "stop"]]


def test_openai_node_reads_a_completion(openai: Json, folder: Path) -> None:
    told = openai["completion"]
    assert (told["object"], told["choices"]) == ("text_completion", [
        {"text": TEXT, "index": 0, "finish_reason": "stop", "logprobs": None}])
    assert told["usage"] == openai_usage(told["usage"]["prompt_tokens"], 4)  # the CLI is told besides what to do
    assert openai["completion streamed"] == {"pieces": PIECES, "finish_reason": "stop"}
    assert openai["completion failed"] == error("InternalServerError", 502, OUT_OF_LUCK, "backend_failed")
    assert starts(folder, "failed").count("openai completion") == 1


def test_the_vercel_sdk_reads_a_completion(vercel: Json) -> None:
    prompt = f"user:\n{TEXT}\n\nassistant:\n"  # so it writes any prompt
    assert vercel["completion"] == prompt
    told = vercel["completion streamed"]
    assert ("".join(told["pieces"]), told["finish_reason"]) == (prompt, "stop") and len(told["pieces"]) > 1


def test_openai_node_reads_a_whole_response(openai: Json) -> None:
    assert openai["response"] == {
        "kind": "resp", "status": "completed", "model": "echo", "output_text": TEXT, "types": ["message"],
        "usage": responses_usage(4, 4), "error": None}


def test_openai_node_reads_the_events_of_a_response_in_their_order(openai: Json) -> None:
    parts = ["created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * 3,
             "output_text.done", "content_part.done", "output_item.done", "completed"]
    assert openai["response streamed"] == {"pieces": PIECES, "types": [f"response.{part}" for part in parts]}


def test_openai_nodes_helper_gathers_a_response(openai: Json) -> None:
    assert openai["response helper"] == {"pieces": PIECES, "status": "completed", "output_text": TEXT}


def test_the_turns_and_instructions_of_a_response_come_to_the_cli_whole(openai: Json) -> None:
    assert openai["response conversation"] == TRANSCRIPT


def test_openai_node_reads_the_clis_own_counts_in_a_response(openai: Json) -> None:
    assert openai["response counted"] == responses_usage(105, 12, 30, 4, 5)


def test_openai_nodes_parse_helpers_read_an_object_in_a_response(openai: Json) -> None:
    assert (openai["response parsed"], openai["response parsed streamed"]) == (ANN, ANN)


def test_an_image_in_a_response_comes_to_the_cli(openai: Json) -> None:
    assert shows_the_pixel(openai["response image"])


@pytest.mark.parametrize("case, prompt", [("response failed", "openai response"),
                                          ("response failed streamed", "openai response streamed")])
def test_a_failed_run_of_a_response_is_an_error_that_openai_node_does_not_repeat(case: str, prompt: str, openai: Json,
                                                                                folder: Path) -> None:
    assert openai[case] == error("InternalServerError", 502, OUT_OF_LUCK, "backend_failed")
    assert starts(folder, "failed").count(prompt) == 1


def test_a_response_that_breaks_in_mid_stream_ends_as_failed(openai: Json) -> None:
    told = openai["response broken"]
    assert (told["pieces"], told["last"]) == (["Hel"], "response.failed") and told["code"]


def test_a_response_of_an_unknown_model_or_to_an_earlier_one_is_refused(openai: Json) -> None:
    unknown, earlier = openai["response of an unknown model"], openai["response to an earlier one"]
    assert (unknown["raised"], unknown["status"], unknown["code"]) == ("NotFoundError", 404, "model_not_found")
    assert (earlier["raised"], earlier["status"]) == ("BadRequestError", 400)
    assert earlier["param"] == "previous_response_id"
