"""What the scripts beside this one share: each asks the clinvk at `URL` through one client, in the cases that its
arguments name, and prints {case: what came back} as one line of JSON."""

import base64
import functools
import json
import sys
import traceback
from typing import Any, Callable, Dict, Sequence

from pydantic import BaseModel

URL, ASKED = sys.argv[1], sys.argv[2:]
OPENAI, ANTHROPIC, KEY = URL + "/openai/v1", URL + "/anthropic", "any"
HELLO = "Hello from the echo."
WHO = "do:json Who wrote the first program?"  # the scripted CLI answers with a Person
PNG_TEXT = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
PNG = base64.b64decode(PNG_TEXT)
Json = Dict[str, Any]


class Person(BaseModel):
    name: str
    age: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def failing(client: str, way: str, case: str) -> str:
    """A prompt on which the scripted CLI fails; the rest of the line tells its runs apart from all others."""
    return f"do:fail {client} {way} {case}"


def outcome(ask: Callable[[], Any]) -> Any:
    """What `ask` gives; of an exception its class, the status that it knows and its message."""
    try:
        return ask()
    except Exception as error:
        traceback.print_exc()
        return {"raised": type(error).__name__, "status": getattr(error, "status_code", None), "says": str(error)}


def tell(ways: Sequence[str], cases: Sequence[Callable[[str], Any]]) -> None:
    """Ask in each way; the name of a case is its way and its function's name."""
    known = {f"{way} {case.__name__}": functools.partial(case, way) for way in ways for case in cases}
    print(json.dumps({name: outcome(known[name]) for name in ASKED}))
