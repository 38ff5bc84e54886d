"""Structured output: answers that are JSON as a schema describes it, in every API that can ask for it. The CLIs are
scripted: each turn takes the next of the answers that a test has written, and notes what it was told."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from conftest import Client, Reply, eventually, fault, shape

Json = Dict[str, Any]
PERSON: Json = {"type": "object", "required": ["name", "age"], "additionalProperties": False,
                "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
LOOSE: Json = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "minLength": 2}}}
BO = '{"name": "Bo", "age": 3}'
FENCED = f"Here it is:\n\n```json\n{BO}\n```\n"

# What the scripted CLIs share. An answer is {"text": str or pieces of it, "json": what claude's tool is called with,
# "after": what it says after that, "again": what it says when claude asks it for the call, "tried": what it calls in
# vain, "fails": a message, "cut": at max_tokens, "waits": for a file of that name}. A turn counts 10 tokens in, 3 out.
TURNS = """
HERE = %r
if "--version" in sys.argv:
    sys.exit()
def show(**line):
    print(json.dumps(line, separators=(",", ":")), flush=True)
def turn(**told):
    number = 0
    while True:
        try:
            os.mkdir(f"{HERE}/turn-{number:02}")
            break
        except FileExistsError:
            number += 1
    with open(f"{HERE}/turn-{number:02}/draft", "w") as file:
        json.dump({"pid": os.getpid(), **told}, file)
    os.rename(file.name, f"{HERE}/turn-{number:02}/told")
    answers = json.load(open(HERE + "/answers"))
    answer = {"text": "", **answers[min(number, len(answers) - 1)]}
    ends = time.monotonic() + 600
    while "waits" in answer and not os.path.exists(f"{HERE}/{answer['waits']}") and time.monotonic() < ends:
        time.sleep(0.01)
    return {**answer, "text": [answer["text"]] if isinstance(answer["text"], str) else answer["text"]}
"""
CLAUDE = TURNS + """
USAGE = {"input_tokens": 10, "output_tokens": 3}
first, turns = {}, 0
def event(**event):
    show(type="stream_event", event=event)
def whole(number, *content):
    show(type="assistant", message={"id": f"m{turns}-{number}", "model": "m", "content": content})
def says(number, pieces):
    event(type="message_start", message={"id": f"m{turns}-{number}", "model": "m"})
    event(type="content_block_start", index=0, content_block={"type": "text", "text": ""})
    for piece in pieces:
        event(type="content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
    whole(number, {"type": "text", "text": "".join(pieces)})
def calls(number, value, works):
    block = {"type": "tool_use", "id": f"t{number}", "name": "StructuredOutput", "input": value}
    event(type="content_block_start", index=1, content_block={**block, "input": {}})
    text = json.dumps(value)
    for at in range(0, len(text), 10_000):
        piece = text[at:at + 10_000]
        event(type="content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": piece})
    whole(number, block)
    result = {"type": "tool_result", "tool_use_id": f"t{number}", "is_error": not works, "content": "it is checked"}
    show(type="user", message={"role": "user", "content": [result]})
def ends(reason, **result):
    event(type="message_delta", delta={"stop_reason": reason})
    about = {"subtype": "success", "is_error": False, "stop_reason": reason, "num_turns": turns, "usage": USAGE,
             "modelUsage": {"m": {}}, "total_cost_usd": turns}
    show(type="result", **{**about, **result})
for line in sys.stdin:
    message = json.loads(line)
    if message["type"] == "control_request":
        first = message["request"] if message["request"]["subtype"] == "initialize" else first
        show(type="control_response", response={"subtype": "success", "request_id": message["request_id"]})
        continue
    turns += 1
    blocks = message["message"]["content"]
    answer = turn(prompt=blocks[0].get("text"), blocks=blocks, schema=first.get("jsonSchema"),
                  system=first.get("systemPrompt"))
    show(type="system", subtype="init", model="m", session_id="s", cwd=os.getcwd())
    text = "".join(answer["text"])
    if answer["text"] != [""]:
        says(0, answer["text"])
    if "json" in answer:
        calls(0, answer["json"], True)
        if "after" in answer:
            event(type="content_block_start", index=2, content_block={"type": "text", "text": ""})
            event(type="content_block_delta", index=2, delta={"type": "text_delta", "text": answer["after"]})
            whole(0, {"type": "text", "text": answer["after"]})
        ends("tool_use", result=json.dumps(answer["json"]), structured_output=answer["json"])
    elif "again" in answer:  # prose, and no call; claude has asked for one itself
        says(1, [answer["again"]])
        ends("end_turn", result=answer["again"])
    elif "tried" in answer:
        for number in range(5):
            calls(number, answer["tried"], False)
        ends("tool_use", subtype="error_max_structured_output_retries", is_error=True,
             errors=["Failed to provide valid structured output after 5 attempts"])
    elif "fails" in answer:
        ends("end_turn", is_error=True, result=answer["fails"])
    else:
        ends("max_tokens" if answer.get("cut") else "end_turn", result=text)
"""
CODEX = TURNS + """
counts = 0
def notify(method, **params):
    show(method=method, params=params)
def asked(method, params):
    global thread
    if method in ("thread/start", "thread/resume"):
        thread = params
        return {"thread": {"id": "t"}, "model": "m", "cwd": "/"}
    return {"turn": {"id": "u"}} if method == "turn/start" else {}
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    show(id=message["id"], result=asked(message["method"], message.get("params")))
    if message["method"] != "turn/start":
        continue
    params = message["params"]
    answer = turn(prompt=params["input"][-1]["text"], blocks=params["input"], schema=params.get("outputSchema"),
                  system=thread.get("baseInstructions"))
    counts += 1
    notify("item/started", item={"type": "agentMessage", "id": "i", "text": ""})
    for piece in answer["text"]:
        notify("item/agentMessage/delta", delta=piece)
    notify("item/completed", item={"type": "agentMessage", "id": "i", "text": "".join(answer["text"])})
    notify("thread/tokenUsage/updated", turnId="u", tokenUsage={"total": {
        "inputTokens": 10 * counts, "outputTokens": 3 * counts}})
    failed = {"status": "failed", "error": {"message": answer["fails"]}} if "fails" in answer else {}
    notify("turn/completed", turn={"id": "u", "status": "completed", **failed})
"""
GEMINI = TURNS + """
def reply(message, **result):
    show(jsonrpc="2.0", id=message["id"], result=result)
for line in sys.stdin:
    message = json.loads(line)
    if message["method"] == "session/new":
        system = open(os.environ["GEMINI_SYSTEM_MD"]).read()
        reply(message, sessionId="s")
    elif message["method"] != "session/prompt":
        reply(message)
    else:
        parts = message["params"]["prompt"]
        answer = turn(prompt=parts[-1]["text"], blocks=parts, schema=None, system=system)
        for piece in answer["text"]:
            update = {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": piece}}
            show(jsonrpc="2.0", method="session/update", params={"sessionId": "s", "update": update})
        quota = {"token_count": {"input_tokens": 10, "output_tokens": 3}, "model_usage": [{"model": "m"}]}
        reply(message, stopReason="max_tokens" if answer.get("cut") else "end_turn", _meta={"quota": quota})
"""
TEXT = TURNS + """
answer = turn(prompt=sys.stdin.read(), schema=None, system=None)
for piece in answer["text"]:
    print(piece, end="", flush=True)
if "fails" in answer:
    sys.exit(answer["fails"])
"""
SCRIPTS = {"claude": CLAUDE, "codex": CODEX, "gemini": GEMINI, "mine": TEXT}


class Outcome(NamedTuple):
    """What a client is told, in whatever API."""
    text: Optional[str]
    refusal: Optional[str]
    reason: str  # why it ended: end, length, sequence or refusal
    tokens: Tuple[int, int]  # in, out


class Api(NamedTuple):
    """One way to ask for JSON."""
    path: str
    ask: Callable[[Json], Json]  # the fields that do, of a format as OpenAI's responses have it
    read: Callable[[Reply], Outcome]


def joined(found: Iterator[Optional[str]]) -> Optional[str]:
    pieces = [text for text in found if text is not None]
    return "".join(pieces) if pieces else None


def read_chat(reply: Reply) -> Outcome:
    if reply.headers["content-type"] == "application/json":
        [choice], usage = reply.json["choices"], reply.json["usage"]
        text, refusal = choice["message"]["content"], choice["message"]["refusal"]
    else:
        *chunks, last, end = reply.data
        choices = [chunk["choices"][0] for chunk in chunks]
        assert end == "[DONE]" and choices[0]["delta"] == {"role": "assistant", "content": ""}
        usage, choice = last["usage"], choices[-1]
        text = joined(choice["delta"].get("content") for choice in choices[1:])
        refusal = joined(choice["delta"].get("refusal") for choice in choices)
    assert choice["finish_reason"] in ("stop", "length")
    reason = "refusal" if refusal is not None else "end" if choice["finish_reason"] == "stop" else "length"
    return Outcome(text, refusal, reason, (usage["prompt_tokens"], usage["completion_tokens"]))


def read_responses(reply: Reply) -> Outcome:
    response = reply.json if reply.headers["content-type"] == "application/json" else reply.data[-1]["response"]
    [item] = [item for item in response["output"] if item["type"] == "message"]
    [part], usage = item["content"], response["usage"]
    text, refusal = part.get("text"), part.get("refusal")
    if reply.headers["content-type"] != "application/json":
        assert reply.data[-1]["type"] == "response." + response["status"]
        assert joined(event["delta"] for event in reply.data if event["type"].endswith("_text.delta")) == text
        assert joined(event["delta"] for event in reply.data if event["type"] == "response.refusal.delta") == refusal
    assert (response["incomplete_details"] is None) == (response["status"] == "completed")
    reason = "refusal" if refusal is not None else "end" if response["status"] == "completed" else "length"
    return Outcome(text, refusal, reason, (usage["input_tokens"], usage["output_tokens"]))


def read_anthropic(reply: Reply) -> Outcome:
    if reply.headers["content-type"] == "application/json":
        [block], usage, stop = reply.json["content"], reply.json["usage"], reply.json
        text = block["text"]
    else:
        delta = reply.data[-2]
        assert (delta["type"], reply.data[-1]["type"]) == ("message_delta", "message_stop")
        text = "".join(event["delta"]["text"] for event in reply.data if event["type"] == "content_block_delta")
        usage, stop = delta["usage"], delta["delta"]
    reason = {"end_turn": "end", "max_tokens": "length", "stop_sequence": "sequence",
              "refusal": "refusal"}[stop["stop_reason"]]
    assert (stop["stop_sequence"] is None) == (reason != "sequence")
    tokens = (usage["input_tokens"], usage["output_tokens"])
    return Outcome(*((None, text) if reason == "refusal" else (text, None)), reason, tokens)


def for_chat(form: Json) -> Json:
    named = {"json_schema": {"name": "answer", "schema": form["schema"], "strict": True}} if "schema" in form else {}
    return {"response_format": {"type": form["type"], **named}, "stream_options": {"include_usage": True}}


APIS = {"chat": Api("/openai/v1/chat/completions", for_chat, read_chat),
        "responses": Api("/openai/v1/responses", lambda form: {"text": {"format": {"name": "answer", **form}}},
                         read_responses),
        "messages": Api("/anthropic/v1/messages", lambda form: {"output_config": {"format": form}}, read_anthropic),
        "older messages": Api("/anthropic/v1/messages", lambda form: {"output_format": form}, read_anthropic)}
EVERY = [(name, stream) for name in APIS for stream in (False, True)]
each_way = pytest.mark.parametrize("api, stream", EVERY)
either = pytest.mark.parametrize("api, stream", [("chat", False), ("messages", True), ("responses", True)])


class Stage:
    """An application whose CLIs are scripted."""

    def __init__(self, folder: Path, make_client: Callable[..., Client], fake_cli: Callable[..., str]) -> None:
        self.folder, self.make_client = folder, make_client
        self.programs = {name: fake_cli(script % str(folder), name) for name, script in SCRIPTS.items()}
        self.use()

    def use(self, **server: Any) -> Client:
        """Without settings nothing waits."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        self.client = self.make_client(
            {"backends": {name: {"command": path} for name, path in self.programs.items()},
             "server": {"spares": 0, "live_conversations": 0, **server}}, GEMINI_API_KEY="k", HOME=str(home))
        return self.client

    def answers(self, *answers: Json) -> None:
        (self.folder / "answers").write_text(json.dumps(answers))

    def post(self, api: str, form: Json, model: str = "codex", *, stream: bool = False, said: Any = "Who is it?",
             **fields: Any) -> Reply:
        turns = said if isinstance(said, list) else [{"role": "user", "content": said}]
        body = {"model": model, ("input" if api == "responses" else "messages"): turns, "stream": stream,
                **({"max_tokens": 99} if "messages" in api else {}), **APIS[api].ask(form), **fields}
        return self.client.call("POST", APIS[api].path, body)

    def ask(self, api: str, schema: Json, model: str = "codex", **fields: Any) -> Outcome:
        reply = self.post(api, {"type": "json_schema", "schema": schema}, model, **fields)
        assert reply.status == 200, reply.body
        return APIS[api].read(reply)

    @property
    def told(self) -> List[Json]:
        """What each turn was told."""
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("turn-*/told"))]


@pytest.fixture
def stage(tmp_path: Path, make_client: Callable[..., Client], fake_cli: Callable[..., str]) -> Stage:
    return Stage(tmp_path, make_client, fake_cli)


def in_words(told: Json, schema: Json) -> bool:
    """Whether a CLI was told of the schema in its system prompt; one from config alone has that in its prompt."""
    return json.dumps(schema) in (told["prompt"] if told["system"] is None else told["system"])


# ---- An answer that fits

@each_way
def test_an_answer_is_the_json_and_nothing_else(stage: Stage, api: str, stream: bool) -> None:
    stage.answers({"text": ["Here it", " is:\n\n``", "`json\n", BO, "\n```\n"]})
    assert stage.ask(api, PERSON, stream=stream) == Outcome(BO, None, "end", (10, 3))
    [told] = stage.told
    assert (told["prompt"], told["schema"], told["system"]) == ("Who is it?", PERSON, "")


ASKED = {  # backend, schema -> how it is told of it
    ("claude", "PERSON"): "schema", ("claude", "LOOSE"): "schema", ("codex", "PERSON"): "schema",
    ("codex", "LOOSE"): "words", ("gemini", "PERSON"): "words", ("mine", "PERSON"): "words"}


@pytest.mark.parametrize("api, stream", [("chat", False), ("messages", True)])
@pytest.mark.parametrize("model, schema", ASKED)
def test_a_backend_is_told_of_the_schema_as_it_can_be(stage: Stage, api: str, stream: bool, model: str,
                                                      schema: str) -> None:
    stage.answers({"text": FENCED} if model != "claude" else {"text": ["I will ", "say it."], "json": json.loads(BO)})
    wanted: Json = globals()[schema]
    outcome = stage.ask(api, wanted, model, stream=stream)
    assert outcome[:3] == (BO, None, "end")
    [told] = stage.told
    by_schema = ASKED[model, schema] == "schema"
    assert (told["schema"], in_words(told, wanted)) == (wanted if by_schema else None, not by_schema)


@either
def test_any_object_can_be_asked_for(stage: Stage, api: str, stream: bool) -> None:
    stage.answers({"text": "[1]"}, {"text": '{"a": [1]}'})
    reply = stage.post(api, {"type": "json_object"}, stream=stream)
    assert APIS[api].read(reply) == Outcome('{"a": [1]}', None, "end", (20, 6))
    assert in_words(stage.told[0], {"type": "object"}) and "$: must be object, not array" in stage.told[1]["prompt"]


@pytest.mark.parametrize("api", APIS)
def test_a_schema_that_takes_anything_takes_json_only(stage: Stage, api: str) -> None:
    stage.answers({"text": "no"}, {"text": "[1]"})
    assert stage.ask(api, {}) == Outcome("[1]", None, "end", (20, 6))


@pytest.mark.parametrize("api", APIS)
def test_text_is_asked_for_as_if_nothing_were(stage: Stage, api: str) -> None:
    stage.answers({"text": FENCED})
    assert APIS[api].read(stage.post(api, {"type": "text"})).text == FENCED
    assert (stage.told[0]["schema"], stage.told[0]["system"]) == (None, "")


@each_way
def test_one_of_the_two_fields_of_anthropic_is_stronger(stage: Stage, api: str, stream: bool) -> None:
    stage.answers({"text": BO})
    both = {"output_format": {"type": "json_schema", "schema": LOOSE}} if "messages" in api else {}
    assert stage.ask("messages" if both else api, PERSON, stream=stream, **both).text == BO
    assert stage.told[0]["schema"] == PERSON


@pytest.mark.parametrize("model", ["codex", "gemini"])
def test_the_words_come_after_the_clients_own_system_prompt(stage: Stage, model: str) -> None:
    stage.answers({"text": BO})
    system = {"role": "system", "content": "You are a pirate."}
    stage.ask("chat", LOOSE, model, said=[system, {"role": "user", "content": "Who?"}])
    first, _, rest = stage.told[0]["system"].partition("\n\n")
    assert first == "You are a pirate." and json.dumps(LOOSE) in rest


def test_claude_is_told_only_the_words_of_a_schema_that_it_knows(stage: Stage) -> None:
    stage.answers({"json": {"name": "Bo"}})
    schema = {**LOOSE, "$schema": "https://json-schema.org/draft/2020-12/schema", "x-mine": 1,
              "properties": {"name": {"type": "string", "format": "email"}, "format": {"const": 1}}}
    stage.answers({"json": {"name": "bo@example.org"}})
    assert stage.ask("chat", schema, "claude").text == '{"name": "bo@example.org"}'
    assert stage.told[0]["schema"] == {**LOOSE, "properties": {"name": {"type": "string"}, "format": {"const": 1}}}


def test_claude_is_told_in_words_of_what_is_no_object(stage: Stage) -> None:
    stage.answers({"text": "[1]"})
    schema = {"type": "array", "items": {"type": "integer"}}
    assert stage.ask("chat", schema, "claude").text == "[1]"
    assert stage.told[0]["schema"] is None and in_words(stage.told[0], schema)


@pytest.mark.parametrize("api, stream", [("chat", False), ("responses", True)])
def test_a_million_characters_of_json_get_through(stage: Stage, api: str, stream: bool) -> None:
    rows = {"rows": [{"name": f"row {number} " + 500 * "\u4f60", "age": number} for number in range(2000)]}
    schema = {"type": "object", "properties": {"rows": {"type": "array", "items": PERSON}}}
    stage.answers({"text": ["One ", "moment."], "json": rows, "after": "That is all."})
    outcome = stage.ask(api, schema, "claude", stream=stream)
    assert json.loads(outcome.text or "") == rows and len(outcome.text or "") > 10**6 and len(stage.told) == 1


# ---- An answer that does not fit

FAULTS = [("No.", "the answer is not one JSON value"), ('{"name": "Bo"}', "$.age: is required"), ("", "is empty"),
          (f"{BO} {BO}", "not one JSON value"), (f"```\n{BO}\n```\n```\n{BO}\n```", "not one JSON value")]


@each_way
def test_what_does_not_fit_is_asked_for_once_more_with_the_fault(stage: Stage, api: str, stream: bool) -> None:
    wrong, told = FAULTS[EVERY.index((api, stream)) % len(FAULTS)]
    stage.answers({"text": wrong}, {"text": BO})
    assert stage.ask(api, PERSON, stream=stream) == Outcome(BO, None, "end", (20, 6))
    first, again = stage.told
    assert told in again["prompt"] and json.dumps(PERSON) in again["prompt"] and wrong in again["prompt"]
    assert "Who is it?" in again["prompt"] and again["schema"] == PERSON and again["pid"] != first["pid"]


@either
@pytest.mark.parametrize("model", ["claude", "gemini", "mine"])
def test_each_backend_is_asked_once_more(stage: Stage, api: str, stream: bool, model: str) -> None:
    mended = {"json": json.loads(BO)} if model == "claude" else {"text": FENCED}
    stage.answers({"text": '{"name": "Bo"}'}, mended)
    assert stage.ask(api, PERSON, model, stream=stream)[:3] == (BO, None, "end")
    assert len(stage.told) == 2 and "$.age: is required" in stage.told[1]["prompt"]


@each_way
def test_what_still_does_not_fit_is_a_refusal(stage: Stage, api: str, stream: bool) -> None:
    stage.answers({"text": "I can not say."}, {"text": "I really can not."})
    assert stage.ask(api, PERSON, stream=stream) == Outcome(None, "I really can not.", "refusal", (20, 6))
    assert len(stage.told) == 2


@either
def test_a_refusal_of_json_names_the_fault_and_the_answer(stage: Stage, api: str, stream: bool) -> None:
    for text, *faults in (('{"name": 1}', "$.name: must be string, not integer", "$.age: is required"),
                          ("true", "$: must be object, not boolean"), (' "Bo"\n', "$: must be object, not string"),
                          ("-1.5", "$: must be object, not number"), ("[", "not one JSON value")):
        stage.answers({"text": text})
        refusal = stage.ask(api, PERSON, stream=stream).refusal or ""
        assert [part for part in (*faults, text.strip()) if part not in refusal] == []


@either
def test_an_image_is_shown_again(stage: Stage, api: str, stream: bool) -> None:
    stage.answers({"text": "No."}, {"text": BO})
    data = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    image = {"chat": {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}},
             "responses": {"type": "input_image", "image_url": "data:image/png;base64," + data},
             "messages": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}}[api]
    text = {"type": "input_text" if api == "responses" else "text", "text": "Who is it?"}
    assert stage.ask(api, PERSON, stream=stream, said=[{"role": "user", "content": [image, text]}]).text == BO
    for told in stage.told:
        assert [block["url"][-9:] for block in told["blocks"] if block["type"] == "image"] == ["ErkJggg=="]


@either
def test_a_run_that_fails_is_not_repaired(stage: Stage, api: str, stream: bool) -> None:
    stage.answers({"fails": "boom"})
    reply = stage.post(api, {"type": "json_schema", "schema": PERSON}, stream=stream)
    assert reply.status == 502 and "boom" in fault(reply, shape(APIS[api].path)) and len(stage.told) == 1


@either
@pytest.mark.parametrize("model", ["claude", "codex", "mine"])
def test_a_run_that_fails_when_it_is_asked_once_more_is_an_error_that_must_not_be_repeated(
        stage: Stage, api: str, stream: bool, model: str) -> None:
    stage.answers({"text": "No."}, {"fails": "boom"})
    reply = stage.post(api, {"type": "json_schema", "schema": PERSON}, model, stream=stream)
    assert (reply.status, reply.headers["x-should-retry"], len(stage.told)) == (502, "false", 2)
    assert ("boom" in fault(reply, shape(APIS[api].path)))


def test_an_error_after_the_first_answer_must_not_be_repeated_even_if_nothing_runs_any_more(stage: Stage) -> None:
    """The second run waits in vain for the slot that another request has got."""
    stage.use(max_concurrent_runs=1)
    stage.answers({"text": "No.", "waits": "go-0"}, {"text": "hi", "waits": "go-1"})
    form = {"type": "json_schema", "schema": PERSON}
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(stage.post, "chat", form, clinvk={"timeout_secs": 5})
        eventually(lambda: stage.told)
        other = pool.submit(stage.post, "chat", {"type": "text"}, "mine")
        eventually(lambda: stage.client.server.slots.waiting)
        (stage.folder / "go-0").touch()
        reply = asked.result()
        (stage.folder / "go-1").touch()
        assert other.result().status == 200
    assert (reply.status, reply.headers["x-should-retry"], len(stage.told)) == (504, "false", 2)


@pytest.mark.parametrize("model", ["claude", "gemini"])
@either
def test_an_answer_that_is_cut_is_told_as_it_is(stage: Stage, api: str, stream: bool, model: str) -> None:
    stage.answers({"text": ['{"name": ', '"B'], "cut": True})
    assert stage.ask(api, PERSON, model, stream=stream) == Outcome('{"name": "B', None, "length", (10, 3))
    assert len(stage.told) == 1


STOPS = [  # the answer, the stop sequence -> what is told
    ({"text": [BO[:9], BO[9:], "\nEN", "D and so on"]}, "END", BO), ({"text": FENCED + "END"}, "END", BO),
    ({"text": BO}, '"age"', '{"name": "Bo", '), ({"text": ["I will ", "say."], "json": json.loads(BO)}, "END", BO),
    ({"text": ["I say "], "json": json.loads(BO)}, "say", BO)]


@pytest.mark.parametrize("api, stream", [("chat", True), ("messages", False)])
@pytest.mark.parametrize("answer, stop, text", STOPS)
def test_stop_sequences_cut_the_json_and_nothing_before_it(
        stage: Stage, api: str, stream: bool, answer: Json, stop: str, text: str) -> None:
    stage.answers(answer)
    model, cut = "claude" if "json" in answer else "codex", "json" not in answer
    field = {"stop": stop} if api == "chat" else {"stop_sequences": [stop, "never"]}
    outcome = stage.ask(api, PERSON, model, stream=stream, **field)
    assert ((outcome.text or "").strip(), outcome.refusal, len(stage.told)) == (text.strip(), None, 1)
    assert outcome.reason == ("sequence" if cut and api == "messages" else "end")


# ---- What claude does of its own

@either
@pytest.mark.parametrize("answer", [{"text": ["Let me ", "see."], "json": json.loads(BO)},
                                    {"text": "Bo.", "again": FENCED}, {"text": FENCED}])
def test_what_claude_says_before_is_no_part_of_the_answer(stage: Stage, api: str, stream: bool, answer: Json) -> None:
    stage.answers(answer)
    assert stage.ask(api, PERSON, "claude", stream=stream) == Outcome(BO, None, "end", (10, 3))
    assert len(stage.told) == 1


@either
def test_claude_is_asked_once_more_if_it_has_asked_its_model_in_vain(stage: Stage, api: str, stream: bool) -> None:
    stage.answers({"text": "Bo.", "again": "As I said: Bo."}, {"json": json.loads(BO)})
    assert stage.ask(api, PERSON, "claude", stream=stream) == Outcome(BO, None, "end", (20, 6))
    assert "Bo.\n\nAs I said: Bo." in stage.told[1]["prompt"]


@either
def test_claude_that_has_tried_often_enough_is_a_refusal_and_is_not_asked_again(stage: Stage, api: str,
                                                                                stream: bool) -> None:
    stage.answers({"tried": {"name": "Bo"}})
    outcome = stage.ask(api, PERSON, "claude", stream=stream)
    assert (outcome.text, outcome.reason, len(stage.told)) == (None, "refusal", 1)
    assert "Failed to provide valid structured output after 5 attempts" in (outcome.refusal or "")


def test_the_call_of_the_answer_is_no_tool_of_the_clients(stage: Stage) -> None:
    """A stream of the agent's would show it."""
    stage.answers({"text": "Let me see.", "json": json.loads(BO)})
    reply = stage.post("chat", {"type": "json_schema", "schema": PERSON}, "claude", stream=True)
    assert b"StructuredOutput" not in reply.body and b"Let me see" not in reply.body


# ---- Schemas that can not be used

@pytest.mark.parametrize("schema, told", [
    ({"type": "thing"}, "$.type: must be one of array, boolean"),
    ({"type": "object", "properties": {"a b": {"minLength": -1}}}, '$.properties["a b"].minLength: must be a whole'),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}}, '$.properties.a["$ref"]'), ({"pattern": "("}, "$.pattern"),
    ({"$ref": "#"}, "leads back to itself")])
@pytest.mark.parametrize("api", APIS)
def test_a_schema_that_says_nothing_sound_is_a_400_that_names_the_place(stage: Stage, api: str, schema: Json,
                                                                        told: str) -> None:
    stage.answers({"text": BO})
    reply = stage.post(api, {"type": "json_schema", "schema": schema})
    place = {"chat": "response_format.json_schema.schema", "responses": "text.format.schema",
             "messages": "output_config.format.schema", "older messages": "output_format.schema"}[api]
    message = fault(reply, shape(APIS[api].path))
    assert reply.status == 400 and place in message and not stage.told
    assert told in message or (told.startswith("$.properties.a[") and "leads to no schema" in message)
    if api in ("chat", "responses"):
        assert reply.json["error"]["param"] == place


@pytest.mark.parametrize("api, place, format", [
    ("chat", "response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("chat", "response_format.json_schema.schema", {"response_format": {"type": "json_schema", "json_schema": {}}}),
    ("chat", "response_format.type", {"response_format": {"type": "yaml"}}),
    ("responses", "text.format.schema", {"text": {"format": {"type": "json_schema"}}}),
    ("messages", "output_config.format.schema", {"output_config": {"format": {"type": "json_schema", "schema": None}}}),
    ("messages", "output_config.format.schema", {"output_config": {"format": {"type": "json_schema", "schema": 1}}})])
def test_a_format_that_is_not_whole_is_a_400_that_names_the_place(stage: Stage, api: str, place: str,
                                                                  format: Json) -> None:
    reply = stage.post(api, {"type": "text"}, **format)
    assert reply.status == 400 and place + ":" in fault(reply, shape(APIS[api].path))


# ---- CLIs that wait

def test_a_process_that_has_given_a_wrong_answer_is_asked_once_more_in_few_words(stage: Stage) -> None:
    for model in ("claude", "codex", "gemini"):
        before = len(stage.told)
        stage.use(live_conversations=1)
        mended = {"json": json.loads(BO)} if model == "claude" else {"text": BO}
        stage.answers(*[{}] * before, {"text": "Bo."}, mended)
        assert stage.ask("chat", LOOSE, model) == Outcome(BO, None, "end", (20, 6)), model
        first, again = stage.told[before:]
        assert again["pid"] == first["pid"] and again["prompt"].startswith("Your answer does not fit"), model


@pytest.mark.parametrize("model", ["claude", "codex", "gemini"])
@pytest.mark.parametrize("schema, live", [(PERSON, True), (LOOSE, False), (None, False)])
def test_a_conversation_goes_on_in_its_process_only_for_the_same_schema(stage: Stage, model: str, schema: Any,
                                                                        live: bool) -> None:
    stage.use(live_conversations=1)
    answer = {"json": json.loads(BO)} if model == "claude" else {"text": BO}
    stage.answers(answer)
    told = stage.ask("chat", PERSON, model)
    turns = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": told.text},
             {"role": "user", "content": "And who else?"}]
    form = {"type": "json_schema", "schema": schema} if schema else {"type": "text"}
    reply = stage.post("chat", form, model, said=turns)
    assert (reply.status, reply.headers["x-clinvk-start"]) == (200, "live" if live else "cold")
    first, second = stage.told
    assert (first["pid"] == second["pid"]) is live and second["prompt"].endswith("And who else?")
    assert read_chat(reply).text == BO


def test_a_conversation_goes_on_in_its_process_after_what_claude_has_said_before_its_answer(stage: Stage) -> None:
    stage.use(live_conversations=1)
    stage.answers({"text": "Let me see.", "json": json.loads(BO)})
    turns = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": BO},
             {"role": "user", "content": "And who else?"}]
    assert stage.ask("chat", PERSON, "claude").text == BO
    assert stage.post("chat", {"type": "json_schema", "schema": PERSON}, "claude", said=turns).headers[
        "x-clinvk-start"] == "cold"  # it was not told to the client, and so is no part of the conversation


# ---- Sessions, and the other ways to run

def test_a_dry_run_shows_how_the_schema_would_be_told(stage: Stage) -> None:
    for model in SCRIPTS:
        for schema, own in ((PERSON, model in ("claude", "codex")), (LOOSE, model == "claude")):
            reply = stage.post("chat", {"type": "json_schema", "schema": schema}, model, clinvk={"dry_run": True})
            plan = reply.json["choices"][0]["message"]["content"]
            assert (("jsonSchema" in plan or "outputSchema" in plan) == own), plan
            assert not stage.told


@pytest.mark.parametrize("model", ["claude", "codex"])
@pytest.mark.parametrize("schema", [PERSON, LOOSE])
def test_a_session_is_asked_for_json_in_its_next_turn_and_only_once(stage: Stage, model: str, schema: Json) -> None:
    stage.answers({"text": "hello"}, {"text": "Bo."})
    first = {"backend": model, "prompt": "hi", "system_prompt": "Be brief."}
    begun = stage.client.call("POST", "/api/v1/prompt", first)
    outcome = stage.ask("chat", schema, model, clinvk={"session_id": begun.json["session_id"]})
    assert outcome == Outcome(None, "Bo.", "refusal", (10, 3))
    _, told = stage.told  # a wrong answer is in the session, too: it is not for clinvk to go on with that
    by_schema = model == "claude" or schema is PERSON
    assert (told["schema"], json.dumps(schema) in told["prompt"]) == (schema if by_schema else None, not by_schema)
    assert told["prompt"].startswith("Who is it?")


@pytest.mark.parametrize("session, status, param", [(True, 400, "clinvk.session_id"), (False, 404, None)])
def test_a_session_has_one_next_turn(stage: Stage, session: bool, status: int, param: Optional[str]) -> None:
    stage.answers({"text": "hello"})
    begun = stage.client.call("POST", "/api/v1/prompt", {"backend": "codex", "prompt": "hi"}).json["session_id"]
    reply = stage.post("chat", {"type": "text"}, n=2, clinvk={"session_id": begun if session else "f" * 32})
    assert (reply.status, reply.json["error"]["param"], len(stage.told)) == (status, param, 1)


def test_echo_answers_with_json_if_it_is_asked_json(stage: Stage) -> None:
    assert stage.ask("chat", PERSON, "echo", said=FENCED).text == BO
    assert stage.ask("chat", PERSON, "echo", said="Who?").refusal == "Who?"
