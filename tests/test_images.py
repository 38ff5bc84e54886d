"""Images in requests of all three APIs: what is refused and how, and to the byte what claude, codex and gemini are
given. The CLIs are scripted: they note what they are asked. (test_lab_images.py has the real ones.)"""

import base64
import json
import random
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import clinvk
import pytest
from conftest import Client, Reply, Served, fault, shape

CHAT, RESPONSES, ANTHROPIC = "/openai/v1/chat/completions", "/openai/v1/responses", "/anthropic/v1/messages"
APIS = [CHAT, RESPONSES, ANTHROPIC]
Json = Dict[str, Any]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


PNG, PNG2 = b64(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR one"), b64(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR the other")
JPEG, GIF = b64(b"\xff\xd8\xff\xe0\0\x10JFIF"), b64(b"GIF89a\1\0\1\0")
WEBP = b64(b"RIFF\x24\0\0\0WEBPVP8 ")
TYPES = {PNG: "image/png", PNG2: "image/png", JPEG: "image/jpeg", GIF: "image/gif", WEBP: "image/webp"}


# ---- The CLIs

NOTING = """
def note(asked):
    with open(%r, "a") as notes: notes.write(json.dumps(asked) + "\\n")
def show(**line): print(json.dumps(line), flush=True)
if "--version" in sys.argv:
    sys.exit("1.2.3")
turn = 0
"""
CLIS = {"claude": """
for line in sys.stdin:
    message = json.loads(line)
    if message["type"] == "control_request":
        show(type="control_response", response={"subtype": "success", "request_id": message["request_id"]})
        continue
    turn += 1
    note(message["message"]["content"])
    text = f"answer {turn} of {os.getpid()}"
    show(type="system", subtype="init", model="m", session_id="s", cwd="/")
    show(type="assistant", message={"id": f"m{turn}", "model": "m", "content": [{"type": "text", "text": text}]})
    show(type="result", subtype="success", is_error=False, result=text, stop_reason="end_turn", num_turns=turn,
         usage={"input_tokens": 1, "output_tokens": 1}, modelUsage={"m": {}})
""", "codex": """
results = {"thread/start": {"thread": {"id": "t"}, "model": "m", "cwd": "/"}, "turn/start": {"turn": {"id": "u"}}}
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    show(id=message["id"], result=results.get(message["method"], {}))
    if message["method"] == "turn/start":
        turn += 1
        note(message["params"]["input"])
        item = {"type": "agentMessage", "id": "i", "text": f"answer {turn} of {os.getpid()}"}
        show(method="item/completed", params={"threadId": "t", "turnId": "u", "item": item})
        show(method="turn/completed", params={"threadId": "t", "turn": {"id": "u", "status": "completed"}})
""", "gemini": """
for line in sys.stdin:
    message = json.loads(line)
    result = {"sessionId": "s"} if message["method"] == "session/new" else {}
    if message["method"] == "session/prompt":
        turn += 1
        note(message["params"]["prompt"])
        said = {"type": "text", "text": f"answer {turn} of {os.getpid()}"}
        show(jsonrpc="2.0", method="session/update", params={"sessionId": "s", "update": {
            "sessionUpdate": "agent_message_chunk", "content": said}})
        result = {"stopReason": "end_turn", "_meta": {"quota": {"model_usage": [{"model": "m"}]}}}
    show(jsonrpc="2.0", id=message["id"], result=result)
"""}


class Cli:
    """A server with scripted CLIs, and what they have been asked."""

    def __init__(self, folder: Path, fake_cli: Callable[..., str]) -> None:
        self.file = folder / "asked"
        self.backends = {name: {"command": fake_cli(NOTING % str(self.file) + script, name)}
                         for name, script in CLIS.items()}

    @property
    def asked(self) -> List[Any]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []


@pytest.fixture
def cli(tmp_path: Path, fake_cli: Callable[..., str]) -> Cli:
    return Cli(tmp_path, fake_cli)


@pytest.fixture
def client(make_client: Callable[..., Client], cli: Cli) -> Client:
    return make_client({"backends": {**cli.backends, "text": {"command": "cat"}}, "server": {"spares": 0}})


# ---- The same message in all three APIs; an image is its base64, with `type` as its label

def part(path: str, said: str, label: str = "") -> Json:
    label = label or TYPES.get(said, "")
    if path == ANTHROPIC:
        source = {"type": "base64", "media_type": label, "data": said}
        return {"type": "image", "source": source} if label else {"type": "text", "text": said}
    url = f"data:{label};base64,{said}"
    if path == RESPONSES:
        return {"type": "input_image", "image_url": url} if label else {"type": "input_text", "text": said}
    return {"type": "image_url", "image_url": {"url": url}} if label else {"type": "text", "text": said}


def user(path: str, *said: str) -> Json:
    return {"role": "user", "content": [part(path, one) for one in said]}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def body_of(path: str, *messages: Json, model: str = "claude") -> Json:
    return {"model": model, "input": list(messages)} if path == RESPONSES else {
        "model": model, "messages": list(messages), "max_tokens": 9}


def ask(client: Any, path: str, *messages: Json, model: str = "claude", **fields: Any) -> Reply:
    reply: Reply = client.call("POST", path, {**body_of(path, *messages, model=model), **fields})
    return reply


def given(cli: str, *said: str) -> List[Json]:
    """What a CLI is given for texts and images, as measured with the real ones."""
    def one(text: str) -> Json:
        kind = TYPES.get(text)
        if not kind:
            return {"type": "text", "text": text}
        return {"claude": {"type": "image", "source": {"type": "base64", "media_type": kind, "data": text}},
                "codex": {"type": "image", "url": f"data:{kind};base64,{text}"},
                "gemini": {"type": "image", "mimeType": kind, "data": text}}[cli]
    # claude looks for a command of its own in the last block only
    return [*map(one, said), *([{"type": "text", "text": ""}] if cli == "claude" else [])]


# ---- To the CLIs

MESSAGES: List[Tuple[Tuple[str, ...], Tuple[str, ...]]] = [  # parts of a message, and what the CLI is given
    ((PNG,), (PNG,)), ((PNG, "what is it?"), (PNG, "what is it?")), (("before", JPEG), ("before", JPEG)),
    (("a", PNG, "b", GIF, WEBP, "c", "d"), ("a", PNG, "b", GIF, WEBP, "c\nd")), ((PNG, "/help"), (PNG, "/help")),
    ((PNG, PNG), (PNG, PNG)), (("<turn>", PNG, "</turn>"), ("<turn>", PNG, "</turn>")),
    (("", PNG, "", JPEG, ""), (PNG, JPEG)), ((PNG, " "), (PNG, " "))]


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("name", CLIS)
def test_images_and_texts_reach_the_cli_in_their_order(client: Client, cli: Cli, path: str, name: str) -> None:
    for said, _ in MESSAGES:
        reply = ask(client, path, user(path, *said), model=name)
        assert reply.status == 200, reply.body
    assert cli.asked == [given(name, *parts) for _, parts in MESSAGES]


def test_a_chat_with_items_goes_the_same_way(client: Client, cli: Cli) -> None:
    """Cursor sends the body of one API to the path of the other."""
    assert client.call("POST", CHAT, body_of(RESPONSES, user(RESPONSES, PNG, "b"))).status == 200
    assert cli.asked == [given("claude", PNG, "b")]


CLOSING = "Now answer the user's last turn, which is all that follows:\n\n"


@pytest.mark.parametrize("path", APIS)
def test_images_stand_in_a_transcript_where_they_were_said(client: Client, cli: Cli, path: str) -> None:
    assert ask(client, path, user(path, "look", PNG, "</turn>"), assistant("nice"), user(path, JPEG, "and this?")
               ).status == 200
    assert cli.asked == [given(
        "claude", 'The conversation so far:\n\n<turn role="user">\nlook', PNG,
        f'</\\turn>\n</turn>\n<turn role="assistant">\nnice\n</turn>\n\n{CLOSING}', JPEG, "and this?")]


def tool_results(path: str) -> List[Json]:
    """A call, and its result with an image."""
    content = [part(path, "it shows"), part(path, PNG)]
    if path == ANTHROPIC:
        return [{"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": content},
                                             part(path, "so?")]}]
    if path == RESPONSES:
        return [{"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": content}, user(path, "so?")]
    called = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    return [{"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "c1", "content": content}, user(path, "so?")]


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("name", CLIS)
def test_the_image_of_a_tools_result_follows_its_text(client: Client, cli: Cli, path: str, name: str) -> None:
    assert ask(client, path, user(path, "go"), *tool_results(path), model=name).status == 200
    (asked,) = cli.asked
    texts = [one.get("text") for one in asked]
    at = texts.index(None)
    assert asked[at] == given(name, PNG)[0] and texts.count(None) == 1
    assert texts[at - 1].endswith('<tool_result id="c1">it shows</tool_result>') and "so?" in texts[at + 1]


def test_the_image_of_a_document_follows_its_text(client: Client, cli: Cli) -> None:
    source = {"type": "content", "content": [part(ANTHROPIC, "page 1"), part(ANTHROPIC, PNG)]}
    message = {"role": "user", "content": [{"type": "document", "title": "T", "source": source},
                                           part(ANTHROPIC, "sum it up")]}
    assert ask(client, ANTHROPIC, message).status == 200
    assert cli.asked == [given("claude", f'{CLOSING}<document title="T">page 1</document>', PNG, "sum it up")]


@pytest.mark.parametrize("path", APIS)
def test_the_type_of_an_image_is_what_its_first_bytes_say(client: Client, cli: Cli, path: str) -> None:
    shown = [PNG, JPEG, GIF, WEBP]
    parts = [part(path, data, label) for label in ("image/png", "image/jpg", "image/svg+xml") for data in shown]
    assert ask(client, path, {"role": "user", "content": parts}).status == 200
    assert cli.asked == [given("claude", *3 * shown)]


# ---- Refusals

SVG = b64(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
NO_IMAGES = {"no base64": "%%%" + PNG, "one character less": PNG[:-1], "a line end": PNG[:20] + "\r\n" + PNG[20:],
             "a line end last": PNG + "\n", "of URLs": b64(b"\x89PNG\r\n\x1a\n\0\xfb\xef\xbe").replace("+", "-"),
             "empty": "", "no padding": b64(b"GIF89a\1").rstrip("="), "too much": PNG + "====", "svg": SVG,
             "bmp": b64(b"BM\x46\0\0\0"), "a sound": b64(b"RIFF\x24\0\0\0WAVEfmt "), "text": b64(b"hello, you"),
             "inner padding": GIF[:8] + "=" + GIF[8:] + "===", "pdf": b64(b"%PDF-1.7 x")}
PLACES = {CHAT: "messages[1].content[1].image_url.url", RESPONSES: "input[1].content[1].image_url",
          ANTHROPIC: "messages[1].content[1].source.data"}


@pytest.mark.parametrize("path", APIS)
def test_what_is_no_image_is_refused_by_its_place_and_not_repeated(client: Client, cli: Cli, path: str) -> None:
    for kind, data in NO_IMAGES.items():
        message = {"role": "user", "content": [part(path, "hi"), part(path, data, "image/png")]}
        reply = ask(client, path, assistant("hm") if path != ANTHROPIC else user(path, "hm"), message)
        said = fault(reply, shape(path))
        assert reply.status == 400 and said.startswith(PLACES[path] + ": "), kind
        assert "PNG, JPEG, GIF or WebP" in said and "base64" in said and "without line ends" in said
        assert len(data) < 9 or data[:9] not in reply.body.decode(), kind
    assert not cli.asked


URLS = ["http://example.com/a.png", "https://example.com/a.png?x=data:image/png;base64," + PNG, "file:///etc/hostname",
        "", PNG, f"data:text/plain;base64,{PNG}", f"data:image/png,{PNG}", f"data:;base64,{PNG}", "/a.png",
        f" data:image/png;base64,{PNG}", f"data:image/png;base64:{PNG}", "ftp://x", "data:image/svg+xml,<svg/>"]


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_url_that_holds_no_image_is_refused_and_nothing_is_fetched(client: Client, cli: Cli, path: str) -> None:
    for url in URLS:
        image = ({"type": "image_url", "image_url": {"url": url}} if path == CHAT else
                 {"type": "input_image", "image_url": url})
        reply = ask(client, path, user(path, "hi"), {"role": "user", "content": [part(path, "hi"), image]})
        said = fault(reply, shape(path))
        assert reply.status == 400 and said.startswith(PLACES[path] + ": must begin with data:image/png;base64,"), url
        assert "fetches nothing" in said and "example.com" not in said and PNG not in said
        assert reply.json["error"]["param"] == PLACES[path]
    assert not cli.asked


@pytest.mark.parametrize("source, place", [
    ({"type": "url", "url": "https://example.com/a.png"}, "source.type"), ({"type": "file", "file_id": "f"},
                                                                           "source.type"),
    ({"type": "base64", "media_type": "image/png"}, "source.data"), ({"data": PNG}, "source.type"), (PNG, "source"),
    ({"type": "base64", "data": 1}, "source.data"), (None, "source")])
def test_any_other_source_of_anthropics_is_refused(client: Client, cli: Cli, source: Any, place: str) -> None:
    reply = ask(client, ANTHROPIC, {"role": "user", "content": [{"type": "image", "source": source}]})
    said = fault(reply, "anthropic")
    assert reply.status == 400 and said.startswith(f"messages[0].content[0].{place}: ") and not cli.asked
    assert "example.com" not in said and PNG not in said


@pytest.mark.parametrize("image, place", [
    ({"type": "image_url"}, "image_url"), ({"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"},
                                           "image_url"),
    ({"type": "image_url", "image_url": {}}, "image_url.url"), ({"type": "input_image", "file_id": "f"}, "type")])
def test_any_other_form_of_openais_is_refused(client: Client, image: Json, place: str) -> None:
    reply = ask(client, CHAT, {"role": "user", "content": [image]})
    assert reply.status == 400 and fault(reply, "openai").startswith(f"messages[0].content[0].{place}: ")
    assert PNG not in reply.body.decode()


def test_a_file_of_openais_is_no_image(client: Client) -> None:
    reply = ask(client, RESPONSES, {"role": "user", "content": [{"type": "input_image", "file_id": "f"}]})
    assert reply.status == 400 and "input[0].content[0].image_url: is required" in fault(reply, "openai")


@pytest.mark.parametrize("path, role", [(CHAT, "system"), (CHAT, "developer"), (RESPONSES, "system"),
                                        (RESPONSES, "developer"), (ANTHROPIC, "system")])
def test_a_system_prompt_has_no_image(client: Client, cli: Cli, path: str, role: str) -> None:
    system = {"role": role, "content": [part(path, "see"), part(path, PNG)]}
    reply = ask(client, path, user(path, "hi"), system, user(path, "hi"))
    assert reply.status == 400 and "put the image into a message of the user" in fault(reply, shape(path))
    assert not cli.asked and PNG not in reply.body.decode()


def test_the_system_field_of_anthropics_has_no_image(client: Client) -> None:
    reply = ask(client, ANTHROPIC, user(ANTHROPIC, "hi"), system=[part(ANTHROPIC, PNG)])
    assert reply.status == 400 and fault(reply, "anthropic").startswith("system[0].type: ")


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("name", ["echo", "text"])
def test_a_backend_that_takes_text_only_says_so(client: Client, path: str, name: str) -> None:
    for messages in ([user(path, PNG, "hi")], [user(path, PNG), assistant("hm"), user(path, "hi")]):
        reply = ask(client, path, *messages, model=name)
        said = fault(reply, shape(path))
        assert reply.status == 400 and f"{name} takes text only: leave it out, or ask another backend" in said
        assert said.startswith("input: " if path == RESPONSES else "messages: ") and PNG not in said


def test_a_native_prompt_is_text(client: Client) -> None:
    reply = client.call("POST", "/api/v1/prompt", {"backend": "claude", "prompt": "hi", "images": [PNG]})
    assert reply.status == 422 and "body.images" in reply.body.decode()


# ---- Counting

def test_an_image_counts_and_not_by_its_bytes(client: Client) -> None:
    def counted(*said: str) -> int:
        return int(ask(client, ANTHROPIC + "/count_tokens", user(ANTHROPIC, *said)).json["input_tokens"])
    large = b64(b"\x89PNG\r\n\x1a\n\0" + bytes(300_000))
    TYPES[large] = "image/png"
    assert counted("hi") < 10 and 1000 < counted(PNG) == counted(large) < 3000
    assert counted(PNG, "hi", PNG) > 1.9 * counted(PNG)


def test_an_image_in_a_result_counts_too(client: Client) -> None:
    messages = tool_results(ANTHROPIC)
    assert ask(client, ANTHROPIC + "/count_tokens", user(ANTHROPIC, "hi"), *messages).json["input_tokens"] > 1000


# ---- Processes that wait

def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return str(reply.json["choices"][0]["message"]["content"])


def of_start(reply: Reply) -> str:
    text_of(reply)
    return reply.headers["x-clinvk-start"]


@pytest.mark.parametrize("name", CLIS)
def test_a_conversation_with_images_goes_on_in_its_process(serve: Callable[..., Served], cli: Cli, name: str) -> None:
    server = serve(config={"backends": cli.backends, "server": {"spares": 0, "live_conversations": 2}})
    first = ask(server, CHAT, user(CHAT, "see", PNG), model=name)
    talk = [user(CHAT, "see", PNG), assistant(text_of(first)), user(CHAT, JPEG, "and this?")]
    second = ask(server, CHAT, *talk, model=name)
    assert [of_start(first), of_start(second)] == ["cold", "live"]
    third = ask(server, CHAT, *talk, assistant(text_of(second)), user(CHAT, "bye"), model=name)
    assert of_start(third) == "live" and len({text.split()[3] for text in map(text_of, (first, second, third))}) == 1
    assert cli.asked == [given(name, "see", PNG), given(name, JPEG, "and this?"), given(name, "bye")]


def test_another_image_is_another_conversation(serve: Callable[..., Served], cli: Cli) -> None:
    server = serve(config={"backends": cli.backends, "server": {"spares": 0, "live_conversations": 9}})
    answer = text_of(ask(server, CHAT, user(CHAT, "see", PNG)))
    for first in (("see", PNG2), ("see",), (PNG, "see"), ("see", PNG, PNG), ("see", "", PNG), ("see", JPEG)):
        other = ask(server, CHAT, user(CHAT, *first), assistant(answer), user(CHAT, "so?"))
        assert of_start(other) == "cold", first
    assert of_start(ask(server, CHAT, user(CHAT, "see", PNG), assistant(answer), user(CHAT, PNG))) == "live"
    assert cli.asked[-1] == given("claude", PNG)


@pytest.mark.parametrize("name", CLIS)
def test_a_spare_is_given_images_too(serve: Callable[..., Served], cli: Cli, name: str) -> None:
    server = serve(config={"backends": cli.backends, "server": {"spares": 1, "live_conversations": 0}})
    starts: List[str] = []
    for pause in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):  # until the next one has been started
        time.sleep(pause)
        starts.append(of_start(ask(server, CHAT, user(CHAT, PNG, "hi"), model=name)))
        if starts[-1] == "spare":
            break
    assert starts[-1] == "spare" and cli.asked == [given(name, PNG, "hi")] * len(starts)


# ---- Size

LARGE = b"\x89PNG\r\n\x1a\n\0" + random.Random(1).getrandbits(8 * 6_900_000).to_bytes(6_900_000, "big")  # 9.2 MB


def test_an_image_as_large_as_a_body_may_be_gets_there(serve: Callable[..., Served], cli: Cli) -> None:
    server = serve(config={"backends": cli.backends, "server": {"spares": 0}})
    large = b64(LARGE)
    for path, name in zip(APIS, CLIS):
        message = {"role": "user", "content": [part(path, large, "image/png"), part(path, "hi")]}
        assert ask(server, path, message, model=name).status == 200
    found = [next(text for text in (one.get("data"), one.get("url", "").rpartition(",")[2],
                                    one.get("source", {}).get("data")) if text) for one, *_ in cli.asked]
    assert found == [large] * 3


def test_looking_at_an_image_takes_no_memory_to_speak_of() -> None:
    """A pattern with a group that repeats took 340 MB for this, and 1.6 s."""
    tracemalloc = pytest.importorskip("tracemalloc")
    large = b64(LARGE)
    assert clinvk.image_of(large) == clinvk.Image("image/png", large)
    assert clinvk.image_of(large[:-1] + "\n") is None and clinvk.image_of(large[:-4] + "a===") is None
    tracemalloc.start()
    clinvk.image_of(large)
    assert tracemalloc.get_traced_memory()[1] < 4 * len(large)
    tracemalloc.stop()


def test_what_is_checked_is_what_the_document_tells(client: Client) -> None:
    """Of data as short as this the pattern may be asked, too."""
    jsonschema = pytest.importorskip("jsonschema")
    schemas = client.call("GET", "/openapi.json").json["components"]["schemas"]
    told = {"data": schemas["ImageSource"]["properties"]["data"], "url": schemas["ImageURL"]["properties"]["url"],
            "image_url": schemas["InputImage"]["properties"]["image_url"]}
    chance = random.Random(4)
    tried = [*NO_IMAGES.values(), PNG, PNG2, JPEG, GIF, WEBP]
    for data in (PNG, GIF, WEBP, JPEG):
        for _ in range(60):  # near misses
            at = chance.randrange(len(data))
            tried.append(data[:at] + chance.choice(["", "=", "A", "\n", "+", "-"]) + data[at + chance.randrange(3):])
    for data in tried:
        taken = clinvk.image_of(data) is not None
        for name, value in (("data", data), ("url", f"data:image/png;base64,{data}"),
                            ("image_url", f"data:image/png;base64,{data}")):
            at_end = value.endswith("\n")  # "$" stands before it, too, where the pattern is Python's
            assert jsonschema.Draft202012Validator(told[name]).is_valid(value) == taken or at_end, data
