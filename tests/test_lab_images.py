"""Images through the real CLIs, as the real SDKs send them: the provider is given them to the byte, and in their order
(labkit)."""

import base64
import struct
import zlib
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

import labkit
from labkit import Cli, Json, Lab, of_message, texts

pytestmark = pytest.mark.lab
lab = labkit.lab  # the fixture


@pytest.fixture(scope="module", params=["claude", "codex", "gemini"])
def cli(request: pytest.FixtureRequest, lab: Lab, pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    made = Cli(request.param, lab, pyz, tmp_path_factory.mktemp(request.param), config={"server": {"spares": 0}})
    yield made
    made.close()


def png(side: int, grey: int) -> str:
    """A whole one, in base64: codex and claude decode what they send."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(side * (b"\0" + side * bytes([grey])))
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(whole).decode()


IMAGES: Dict[str, str] = {"<1>": png(8, 0), "<2>": png(16, 128), "<3>": png(24, 255)}
WORDS = ("look at", "and at", "what is it?", "and these", "the last")


def told(lab: Lab) -> List[str]:
    """The images and the words in the last request to the provider, in their order."""
    body = next(entry["body"] for entry in reversed(lab.asked) if "countTokens" not in entry["path"])
    names = {data: name for name, data in IMAGES.items()}
    found: List[str] = []
    for said in texts(body.get("messages") or body.get("input") or body.get("contents")):
        image = names.get(said.rpartition(",")[2])
        found += [image] if image else [words for words in WORDS if words in said]
    return found


def data_url(name: str) -> str:
    return "data:image/png;base64," + IMAGES[name]


def block(name: str) -> Json:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGES[name]}}


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def test_the_provider_is_given_the_images_of_each_sdk_in_their_order(cli: Cli) -> None:
    """One conversation in one process, which the last turn alone is said to; the provider is sent all of it."""
    parts: List[Any] = [text("look at"), {"type": "image_url", "image_url": {"url": data_url("<1>")}}, text("and at"),
                        {"type": "image_url", "image_url": {"url": data_url("<2>")}}, text("what is it?")]
    talk: List[Any] = [{"role": "user", "content": parts}]
    first = cli.openai.chat.completions.with_raw_response.create(model=cli.name, messages=talk, max_tokens=1000)
    before = ["look at", "<1>", "and at", "<2>", "what is it?"]
    assert told(cli.lab) == before

    blocks = [text("look at"), block("<1>"), text("and at"), block("<2>"), text("what is it?")]
    answered = {"role": "assistant", "content": first.parse().choices[0].message.content}
    second = cli.anthropic.messages.with_raw_response.create(model=cli.name, max_tokens=1000, messages=[
        {"role": "user", "content": blocks}, answered, {"role": "user", "content": [block("<3>"), text("and these")]}])
    assert told(cli.lab)[-2:] == ["<3>", "and these"] and told(cli.lab)[:5] == before

    items: List[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": one} if one in WORDS else
                                     {"type": "input_image", "detail": "auto", "image_url": data_url(one)}
                                     for one in before]},
        answered, {"role": "user", "content": [{"type": "input_image", "detail": "auto", "image_url": data_url("<3>")},
                                               {"type": "input_text", "text": "and these"}]},
        {"role": "assistant", "content": of_message(second.parse()).text},
        {"role": "user", "content": [{"type": "input_image", "detail": "auto", "image_url": data_url("<1>")}]}]
    third = cli.openai.responses.with_raw_response.create(model=cli.name, input=items, max_output_tokens=1000)
    assert [reply.headers["x-clinvk-start"] for reply in (first, second, third)] == ["cold", "live", "live"]
    shown = told(cli.lab)
    assert shown[:5] == before and shown[-1] == "<1>" and shown.index("<3>") < len(shown) - 1


def test_the_images_of_earlier_turns_and_of_tools_are_in_the_transcript(cli: Cli) -> None:
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [text("and at"), block("<2>")]}
    cli.anthropic.messages.create(model=cli.name, max_tokens=1000, messages=[
        {"role": "user", "content": [text("look at"), block("<1>")]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {}}]},
        {"role": "user", "content": [result]}, {"role": "assistant", "content": "and these"},
        {"role": "user", "content": [block("<3>"), text("what is it?")]}])
    assert told(cli.lab) == ["look at", "<1>", "and at", "<2>", "and these", "<3>", "what is it?"]
