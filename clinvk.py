"""clinvk: the AI CLIs of a workstation behind one local HTTP server, in three API styles.

The file stands in the order a request travels: what is below uses what is above, never the reverse.
SPEC n is a section of the contract, BACKENDS and PROTOCOLS are facts measured on the real CLIs.

Errors        what a client can be told, one class each
Fields        how models are declared and checked: requests, the config
Config        the file, the environment and the flags, as one Config
JSON Schema   whether one can be checked against, and what is wrong with a value
Requests      each API's requests as models; all of them become a PromptRequest
Events        the steps of a run, and a run's Result
Files         clinvk's own directories
Backends      claude, codex, gemini, and any other CLI: how each is called and read
Processes     slots to run in; CLIs as processes, ended with all their descendants
Spares        CLIs that wait for a request, started ahead or after an answer
Runs          one prompt and its answer, from the slot to the last event
Sessions      runs that are stored, and can be gone on with
Fan-out       several runs as one
Answers       the shapes of what clients are answered
Renderers     events as each API's answers, streams and errors
Guards        who may come in; where a run may start
Metrics       what has happened, for Prometheus
Server        what lives as long as the server, and how it starts a run
Routes        one function per endpoint
OpenAPI       /openapi.json, made of the models and the shapes; /docs
HTTP          the way of every request, as WSGI
Connections   waitress, and what that does not do by itself
Command line  serve, version
"""
from __future__ import annotations

import argparse
import bisect
import codecs
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fractions
import functools
import graphlib
import hashlib
import hmac
import http
import inspect
import ipaddress
import itertools
import json
import logging
import math
import mmap
import operator
import os
import pkgutil
import platform
import queue
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import (Annotated, Any, Callable, ClassVar, Container, Deque, Dict, FrozenSet, Generator, Iterable,
                    Iterator, List, Literal, Mapping, NamedTuple, Optional, Pattern, Protocol, Sequence, Set,
                    Tuple, Type, TypedDict, TypeVar, Union, cast, get_args, get_origin, get_type_hints)


import bottle
import waitress.adjustments
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.wasyncore
import yaml

try:
    import fcntl
    import resource
    import termios
except ImportError:  # Windows
    fcntl = resource = termios = None  # type: ignore[assignment]

__version__ = "0.1.0"

Json = Dict[str, Any]
TICK = 0.1  # seconds between two looks at whether a silent run must end
LOG = logging.getLogger("clinvk")
SILENCE = 10.0  # seconds without output after which a client is told that the run is still going on


# ==== Errors ======================================================================================
# In: a fact, where it is known. Out: an exception that each API's renderer can show (SPEC 5).

class Problem(NamedTuple):
    """One thing that is wrong with a request or a config file. `location` is a path such as `messages[0].content`."""
    location: str
    message: str
    value: Any = None


class ClinvkError(Exception):
    """What a client is told: what was wrong and what to do. One subclass per row of SPEC 5."""
    status: int = 500
    native_status: Optional[int] = None  # where /api/v1 differs
    openai: Tuple[str, Optional[str]] = ("api_error", None)  # type, code
    anthropic: str = "api_error"
    prompted = False  # whether a CLI had already been given the prompt: then SDKs must not repeat the request
    problems: Sequence[Problem] = ()
    details = ""  # what the CLI wrote about it

    def __init__(self, message: str, *, retry_after: Optional[float] = None) -> None:
        """`retry_after`: seconds."""
        super().__init__(message)
        self.retry_after = retry_after

    @property
    def full_message(self) -> str:
        """The message, and the details."""
        return "\n".join(part for part in (str(self), self.details) if part)

    @property
    def code(self) -> str:
        """The one word that names this error in events and logs."""
        return self.openai[1] or self.openai[0]


class BadRequest(ClinvkError):
    """Not JSON, not UTF-8, NaN, nested too deep, or something this version can not do."""
    status, openai, anthropic = 400, ("invalid_request_error", None), "invalid_request_error"


class Invalid(BadRequest):
    """Fields that are missing, wrong, out of range or (where that is checked) unknown."""
    native_status = 422

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{p.location}: {p.message}" for p in problems))
        self.problems = problems


class UnknownModel(ClinvkError):
    """No backend goes by that name, or its CLI says that it has no such model."""
    status, openai, anthropic = 404, ("invalid_request_error", "model_not_found"), "not_found_error"
    native_status = 422

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.problems = [Problem("model", message)]


class BackendAuth(ClinvkError):
    """The CLI is not logged in, or its provider refuses its login."""
    status, openai, anthropic = 401, ("authentication_error", "backend_auth"), "authentication_error"


class Forbidden(ClinvkError):
    """A Host, an Origin, a working directory or a flag that is not allowed."""
    status, openai, anthropic = 403, ("permission_error", None), "permission_error"


class NotFound(ClinvkError):
    """No such path, or no such session."""
    status, openai, anthropic = 404, ("not_found_error", None), "not_found_error"


class Forgotten(NotFound):
    """The session is there, but its CLI has lost the conversation."""


class Conflict(ClinvkError):
    """A session that is in use, that belongs to another backend, or a prefix that several have."""
    status, openai, anthropic = 409, ("invalid_request_error", "conflict"), "invalid_request_error"


class MethodNotAllowed(ClinvkError):
    """The path is there, but not for this method."""
    status, openai, anthropic = 405, ("invalid_request_error", None), "invalid_request_error"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class NoWebSocket(ClinvkError):
    """A websocket is asked for, and there is none. Codex goes over to POST at once; a 405 it would ask again."""
    status, openai, anthropic = 426, ("invalid_request_error", None), "invalid_request_error"


class WrongType(ClinvkError):
    """A body that is not said to be JSON: a web page can send any other type without asking first."""
    status, openai, anthropic = 415, ("invalid_request_error", None), "invalid_request_error"


class TooLarge(ClinvkError):
    """The body is over `server.max_request_body_bytes`."""
    status, openai, anthropic = 413, ("invalid_request_error", "request_too_large"), "request_too_large"


class HeadTooLarge(ClinvkError):
    """The request line and the headers are too large."""
    status, anthropic = 431, "invalid_request_error"
    openai = ("invalid_request_error", "request_header_fields_too_large")


class TooSlow(ClinvkError):
    """The request did not come whole within `server.read_timeout_secs`."""
    # Anthropic's `timeout_error` is for 504 only.
    status, openai, anthropic = 408, ("invalid_request_error", "request_timeout"), "invalid_request_error"


class Unauthorized(ClinvkError):
    """No key, or a wrong one."""
    status, openai, anthropic = 401, ("authentication_error", "invalid_api_key"), "authentication_error"


class RateLimited(ClinvkError):
    """Too many requests; or the CLI's provider said 429, or its usage limit is reached."""
    status, openai, anthropic = 429, ("rate_limit_error", "rate_limit_exceeded"), "rate_limit_error"


class BackendUnavailable(ClinvkError):
    """The CLI is not installed or is disabled, or the waiting line is full."""
    status, openai, anthropic = 503, ("api_error", "backend_unavailable"), "overloaded_error"


class Defect(ClinvkError):
    """clinvk itself failed; its log tells more under the request id."""


class StoreUnavailable(ClinvkError):
    """The database of the sessions can not be read or written."""
    status, openai, anthropic = 503, ("api_error", "session_store_unavailable"), "api_error"


class BackendFailed(ClinvkError):
    """The CLI ran and failed, or printed too much."""
    status, openai, anthropic = 502, ("api_error", "backend_failed"), "api_error"


class TimedOut(ClinvkError):
    """The time of the request is up."""
    status, openai, anthropic = 504, ("api_error", "timeout"), "timeout_error"


class Canceled(ClinvkError):
    """The run was ended because nobody waits for it any more: the client has gone, or the server stops."""
    status, openai, anthropic = 503, ("api_error", "canceled"), "overloaded_error"


class ConfigError(Exception):
    """Why the server can not start: one line that says what and how to mend it."""


# ==== Fields ======================================================================================
# In: a JSON (or YAML) value and a dataclass whose fields say what is allowed. Out: an instance, or every problem.

Model = TypeVar("Model")


class FieldRules(NamedTuple):
    """What a field must be, besides of its type. The rules for a text or a number are those of a list's items, too."""
    doc: str = ""  # for /openapi.json
    minimum: Optional[float] = None
    maximum: Optional[float] = None
    above: Optional[float] = None  # what the number must be more than
    choices: Sequence[Any] = ()
    longest: Optional[int] = None  # how many items a list may have
    not_empty: bool = False  # a text or a list
    not_blank: bool = False
    free_text: bool = False  # it never reaches a command line or a file name: NUL is allowed in it
    flag_value: bool = False  # it follows a flag there: it must not be taken for another one
    directory: bool = False  # an absolute path
    names_backend: bool = False  # for /openapi.json: whether there is one of that name is checked elsewhere


def param(default: Any = dataclasses.MISSING, **rules: Any) -> Any:
    """A field that may come over the wire; `rules` are FieldRules. `default` is a value, or list, dict or a dataclass
    to make one of."""
    metadata = {"rules": FieldRules(**rules)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def internal(default: Any) -> Any:
    """A field that our own code sets; on the wire its name is unknown."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default)
    return dataclasses.field(default=default)


class Open:
    """A model of somebody else's API: fields we do not know are allowed; their names are kept in `unknown`."""

    def problems(self) -> Iterable[Problem]:
        """What is wrong with it that its fields' rules do not say; CHECKED_IN_CODE tells that in /openapi.json. A
        `location` begins with the name of a field."""
        return ()


class Kept(Open):
    """A model of which all is kept, the fields we do not know included: `whole` is the JSON object as it came."""
    whole: Json


def check(model: Type[Model], value: Any, where: str = "") -> Model:
    """`value` as an instance of `model`. Raises Invalid with every problem; null means absent."""
    checker = Checker()
    built = checker.model(model, value, where)
    if checker.problems:
        raise Invalid(checker.problems)
    if hasattr(built, "unknown"):
        built = dataclasses.replace(built, unknown=tuple(dict.fromkeys(checker.unknown)))
    return cast(Model, built)


class WireField(NamedTuple):
    kind: Any  # its type
    rules: FieldRules
    required: bool
    default: Any


@functools.lru_cache(maxsize=None)
def wire_fields(model: Any) -> Dict[str, WireField]:
    """The fields of a model that may come over the wire."""
    hints = get_type_hints(model)
    missing = dataclasses.MISSING
    return {f.name: WireField(hints[f.name], f.metadata["rules"], f.default is f.default_factory is missing, f.default)
            for f in dataclasses.fields(model) if "rules" in f.metadata}


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def place_of(name: str, at: str) -> str:
    """Of a field of the object that stands at `at`; "" is the whole."""
    return f"{at}.{name}" if at else name


class Checker:
    """Collects what is wrong with a value instead of stopping at the first problem."""

    def __init__(self) -> None:
        self.problems: List[Problem] = []
        self.unknown: List[str] = []

    def wrong(self, at: str, message: str, value: Any = None) -> None:
        shown = isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
        self.problems.append(Problem(at, message, value if shown else None))

    def model(self, model: Any, value: Any, at: str) -> Any:
        if not isinstance(value, dict):
            return self.wrong(at or "body", "must be an object", value)
        fields, before = wire_fields(model), len(self.problems)
        for name in value:
            if name not in fields:
                self.stranger(model, str(name), at, fields, value[name])
        built = {}
        for name, field in fields.items():
            place = place_of(name, at)
            if value.get(name) is not None:
                built[name] = self.value(field.kind, value[name], place, field.rules)
            elif field.required:
                self.wrong(place, "is required")
        if issubclass(model, Kept):
            built["whole"] = value
        return self.checked(model(**built), at) if len(self.problems) == before else None

    def checked(self, built: Any, at: str) -> Any:
        for problem in built.problems() if isinstance(built, Open) else ():
            self.wrong(place_of(problem.location, at), problem.message)
        return built

    def stranger(self, model: Any, name: str, at: str, known: Iterable[str], value: Any) -> None:
        """A field that `model` does not have, or not over the wire though its base has."""
        place = place_of(name, at)
        if issubclass(model, Open):
            if value is not None and not issubclass(model, Kept):
                self.unknown.append(re.sub(r"\[\d+\]", "", place))
        elif any(name in wire_fields(base) for base in model.__mro__[1:-1]):
            if value is not None:
                self.wrong(place, "can not be set here; leave it out")
        else:
            self.wrong(place, "is not known" + nearest(name, known))

    def value(self, kind: Any, value: Any, at: str, rules: FieldRules) -> Any:
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Union:
            return self.union([k for k in inner if k is not type(None)], value, at, rules)
        if origin is list:
            return self.items(inner[0], value, at, rules)
        if origin is dict:
            return self.mapping(inner[1], value, at, rules)
        if dataclasses.is_dataclass(kind):
            return self.model(kind, value, at)
        return value if kind is Any else self.scalar(kind, value, at, rules)

    def union(self, kinds: List[Any], value: Any, at: str, rules: FieldRules) -> Any:
        """The kind whose JSON type is the value's; of several objects, the one whose `type` is."""
        fitting = [kind for kind in kinds if len(kinds) == 1 or json_type(kind) == json_type(type(value))]
        if not fitting:
            names = dict.fromkeys(ARTICLES[json_type(kind)] for kind in kinds)
            return self.wrong(at, "must be " + " or ".join(names), value)
        if len(fitting) > 1:
            by_type = {name: kind for kind in fitting for name in wire_fields(kind)["type"].rules.choices}
            default = next((fields["type"].default for fields in map(wire_fields, fitting)
                            if not fields["type"].required), None)
            name = value.get("type") or default
            if name not in [*by_type]:
                problem = "is required" if name is None else f"{json.dumps(name)} is not supported"
                return self.wrong(f"{at}.type", f"{problem}; send one of {', '.join(by_type)}", name)
            fitting = [by_type[name]]
        return self.value(fitting[0], value, at, rules)

    def items(self, kind: Any, value: Any, at: str, rules: FieldRules) -> Any:
        if not isinstance(value, list):
            return self.wrong(at, "must be a list", value)
        if rules.not_empty and not value:
            self.wrong(at, "must not be empty")
        if rules.longest and len(value) > rules.longest:
            self.wrong(at, f"must have at most {rules.longest} items")
        inner = rules._replace(not_empty=False, longest=None)
        return [self.value(kind, item, f"{at}[{index}]", inner) for index, item in enumerate(value)]

    def mapping(self, kind: Any, value: Any, at: str, rules: FieldRules) -> Any:
        if not isinstance(value, dict):
            return self.wrong(at, "must be an object", value)
        for name in value:
            if not isinstance(name, str):
                self.wrong(at, f"{name!r} must be a string; put it in quotes")
        if dataclasses.is_dataclass(kind):  # null means absent here, too
            value = {name: {} if item is None else item for name, item in value.items()}
        return {name: self.value(kind, item, f"{at}.{name}", rules) for name, item in value.items()}

    def scalar(self, kind: Any, value: Any, at: str, rules: FieldRules) -> Any:
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**1023 else math.inf
        if type(value) is not kind:
            return self.wrong(at, f"must be {ARTICLES[json_type(kind)]}", value)
        problem = text_problem(value, rules) if kind is str else number_problem(value, rules)
        if rules.choices and value not in rules.choices:
            problem = "must be one of " + ", ".join(map(str, rules.choices))
        if problem:
            self.wrong(at, problem, value)
        return value


ARTICLES = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false",
            "list": "a list", "dict": "an object", "NoneType": "null"}


def json_type(kind: Any) -> str:
    """The name of the JSON type that a Python type or annotation is written as."""
    plain = get_origin(kind) or kind
    return "dict" if dataclasses.is_dataclass(plain) else str(plain.__name__)


def text_problem(value: str, rules: FieldRules) -> str:
    if rules.not_empty and not value:
        return "must not be empty"
    if rules.not_blank and not value.strip():
        return "must have more than blanks"
    if rules.flag_value and value.startswith("-"):
        return "must not begin with a dash"
    if rules.directory and not os.path.isabs(value):
        return "must be an absolute path"
    if "\0" in value and not rules.free_text:
        return "must not contain a NUL character"
    return ""


def number_problem(value: Any, rules: FieldRules) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if rules.minimum is not None and value < rules.minimum:
        return f"must be at least {rules.minimum:g}"
    if rules.above is not None and not value > rules.above:
        return f"must be more than {rules.above:g}"
    if rules.maximum is not None and value > rules.maximum:
        return f"must be at most {rules.maximum:g}"
    return ""


# ==== Config ======================================================================================
# In: a YAML file, the environment, command line flags. Out: one frozen Config (SPEC 6).

BUILT_IN = ("claude", "codex", "gemini", "echo")
APPROVAL_MODES = ("default", "auto", "none", "always")
SANDBOX_MODES = ("default", "read-only", "workspace", "full")
OUTPUT_FORMATS = ("default", "text", "json", "stream-json")
TERMINAL_ONLY = "of the terminal commands; accepted and without effect"


@dataclass(frozen=True)
class UnifiedFlags:
    approval_mode: str = param("default", choices=APPROVAL_MODES)
    sandbox_mode: str = param("default", choices=SANDBOX_MODES)
    verbose: bool = param(False)
    dry_run: bool = param(False, doc="answer with the command line that would run, and run nothing")
    max_turns: int = param(0, minimum=0, doc="0: no limit")
    max_tokens: int = param(0, minimum=0, doc="0: no limit")
    command_timeout_secs: float = param(0.0, minimum=0, doc="0: server.request_timeout_secs")


MODEL_ALIASES = ("fast", "balanced", "best")


@dataclass(frozen=True)
class ModelAliases:
    """What each of MODEL_ALIASES means on a backend; empty: nothing."""
    fast: str = param("")
    balanced: str = param("")
    best: str = param("")


@dataclass(frozen=True)
class BackendConfig:
    command: Union[str, List[str]] = param("", doc="program, or program and arguments; empty: the backend's own name")
    model: str = param("", doc="empty: the CLI's own")
    models: ModelAliases = param(ModelAliases)
    allowed_tools: str = param("")
    approval_mode: str = param("", choices=("", *APPROVAL_MODES), doc="empty: unified_flags.approval_mode")
    sandbox_mode: str = param("", choices=("", *SANDBOX_MODES), doc="empty: unified_flags.sandbox_mode")
    enabled: bool = param(True)
    system_prompt: str = param("", free_text=True)
    extra_flags: List[str] = param(list, doc="always added to the command line")
    allowed_extra_flags: List[str] = param(list, doc="what requests may pass in `extra` besides the built-in list")
    env: Dict[str, str] = param(dict, doc="added to the CLI's environment")


@dataclass(frozen=True)
class SessionConfig:
    retention_days: float = param(30.0, minimum=0)
    store_token_usage: bool = param(True)
    default_tags: List[str] = param(list)
    auto_resume: bool = param(True, doc=TERMINAL_ONLY)


@dataclass(frozen=True)
class OutputConfig:
    format: str = param("json", choices=OUTPUT_FORMATS[1:])
    show_tokens: bool = param(False, doc=TERMINAL_ONLY)
    show_timing: bool = param(False, doc=TERMINAL_ONLY)
    color: bool = param(True, doc=TERMINAL_ONLY)


@dataclass(frozen=True)
class ParallelConfig:
    max_workers: int = param(3, minimum=1)
    fail_fast: bool = param(False)
    aggregate_output: bool = param(True, doc=TERMINAL_ONLY)


@dataclass(frozen=True)
class ServerConfig:
    host: str = param("127.0.0.1", not_empty=True)
    port: int = param(8080, minimum=0, maximum=65535)
    request_timeout_secs: float = param(300.0, above=0)
    read_timeout_secs: float = param(30.0, above=0)
    write_timeout_secs: float = param(300.0, above=0)
    idle_timeout_secs: float = param(120.0, above=0)
    api_keys_gopass_path: str = param("", flag_value=True)
    rate_limit_enabled: bool = param(False)
    rate_limit_rps: float = param(10.0, above=0)
    rate_limit_burst: int = param(20, minimum=1)
    rate_limit_cleanup_secs: float = param(180.0, above=0)
    trusted_proxies: List[str] = param(list)
    max_request_body_bytes: int = param(10 * 1024 * 1024, minimum=0, doc="0: no limit")
    cors_allowed_origins: List[str] = param(list)
    cors_allow_credentials: bool = param(False)
    cors_max_age: int = param(300, minimum=0)
    allowed_hosts: List[str] = param(list)
    allowed_workdir_prefixes: List[str] = param(list, directory=True)
    blocked_workdir_prefixes: List[str] = param(list, directory=True)
    metrics_enabled: bool = param(False)
    model_aliases: Dict[str, str] = param(dict)
    compat_mode: str = param("model", choices=("model", "agent"))
    spares: int = param(2, minimum=0)
    spare_idle_secs: float = param(300.0, above=0)
    spares_at_start: bool = param(False)
    live_conversations: int = param(2, minimum=0)
    max_concurrent_runs: int = param(8, minimum=1, maximum=1000)
    max_waiting_runs: int = param(64, minimum=0, maximum=10_000)
    max_output_bytes: int = param(64 * 1024 * 1024, minimum=1)


@dataclass(frozen=True)
class Config:
    """Every setting. `home` is clinvk's own directory, `keys` what a client must send one of (none: open)."""
    default_backend: str = param("claude", not_empty=True)
    unified_flags: UnifiedFlags = param(UnifiedFlags)
    backends: Dict[str, BackendConfig] = param(dict)
    session: SessionConfig = param(SessionConfig)
    output: OutputConfig = param(OutputConfig)
    parallel: ParallelConfig = param(ParallelConfig)
    server: ServerConfig = param(ServerConfig)
    home: Path = internal(Path())
    file: Optional[Path] = dataclasses.field(default=None, compare=False)  # of the config; None: there was none
    here: str = internal("")  # the directory in which the server was started
    keys: Tuple[str, ...] = internal(())
    environ: Mapping[str, str] = internal(dict)  # what the CLIs inherit

    def names(self) -> List[str]:
        """Every configured backend: the built-in CLIs, then the configured ones in order of name, `echo` last."""
        extra = sorted(set(self.backends) - set(BUILT_IN))
        return [*BUILT_IN[:-1], *extra, BUILT_IN[-1]]


# Environment variable -> the key it sets.
VARIABLES = {
    "CLINVK_BACKEND": "default_backend", "CLINVK_CLAUDE_MODEL": "backends.claude.model",
    "CLINVK_CODEX_MODEL": "backends.codex.model", "CLINVK_GEMINI_MODEL": "backends.gemini.model",
    "CLINVK_API_KEYS_GOPASS_PATH": "server.api_keys_gopass_path", "CLINVK_HOST": "server.host",
    "CLINVK_PORT": "server.port",
}


class StrictLoader(yaml.SafeLoader):
    """YAML as written: a key that stands twice is an error, not an overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        seen: Set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def load_config(path: Optional[str], environ: Mapping[str, str], flags: Mapping[str, Any]) -> Config:
    """Flags beat environment beats file beats defaults. Raises ConfigError: file, key, what is allowed.

    `path` is what --config says; `flags` maps a key such as `server.port` to a value of the command line."""
    home = Path(environ.get("CLINVK_HOME") or Path(environ.get("HOME") or Path.home()) / ".clinvk").absolute()
    if path == "":
        raise ConfigError("--config: names no file; leave it out, or name one")
    named = path or environ.get("CLINVK_CONFIG")
    file = Path(named) if named else home / "config.yaml"
    is_there = bool(named) or file.exists()
    tree = read_yaml(file) if is_there else {}
    sources = {}
    for variable, key in VARIABLES.items():
        if environ.get(variable):
            sources[key] = variable
            put(tree, key, number_of(environ[variable]) if key == "server.port" else environ[variable])
    for key, value in flags.items():
        sources[key] = "--" + key.rpartition(".")[2]
        put(tree, key, value)
    try:
        config = check(Config, tree)
    except Invalid as error:
        raise ConfigError("; ".join(explain(p, sources.get(p.location, str(file))) for p in error.problems)) from None
    given = {name: BackendConfig() for name in BUILT_IN}
    config = dataclasses.replace(config, backends={**given, **config.backends}, home=home, here=working_directory(),
                                 file=file if is_there else None, environ=dict(environ))
    refuse_contradictions(config, lambda key: sources.get(key, str(file)))
    return dataclasses.replace(config, keys=keys_of(config))


GOPASS_SECS = 30.0  # somebody may have to type a passphrase


def keys_of(config: Config) -> Tuple[str, ...]:
    """The keys in the environment, else those that gopass keeps; none: the server is open. Raises ConfigError if gopass
    was to have some, and does not tell them."""
    path, given = config.server.api_keys_gopass_path, config.environ.get("CLINVK_API_KEYS", "")
    if given and not words_of(given):
        raise ConfigError("CLINVK_API_KEYS: has no key in it; give keys with commas between them, or unset it")
    if path and not words_of(given):
        try:
            given = subprocess.run(["gopass", "show", "--password", path], env=dict(config.environ), check=True,
                                   stdin=subprocess.DEVNULL, capture_output=True, timeout=GOPASS_SECS, encoding="utf-8",
                                   errors="replace").stdout
        except (OSError, subprocess.SubprocessError) as error:
            told = getattr(error, "stderr", None) or ""  # bytes if its time was up, whatever the encoding
            said = " ".join((told if isinstance(told, str) else told.decode(errors="replace")).split())[-300:]
            raise ConfigError(f"server.api_keys_gopass_path: `gopass show --password {path}` does not tell the keys ("
                              f"{said or error}). Mend that, or give them in CLINVK_API_KEYS") from None
        if not words_of(given):
            raise ConfigError(f"server.api_keys_gopass_path: `gopass show --password {path}` tells no keys")
    return words_of(given)


def words_of(text: str) -> Tuple[str, ...]:
    """What stands between commas and line ends."""
    return tuple(word.strip() for word in re.split(r"[,\r\n]", text) if word.strip())


def working_directory() -> str:
    """The server's own; "" if it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def read_yaml(file: Path) -> Json:
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise ConfigError(f"{file}: can not be read: {error.strerror}. Mend that, or name another file with --config"
                          ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: is not YAML: {' '.join(str(error).split())}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{file}: must be a mapping of keys to values, like config.example.yaml")
    return tree or {}


def put(tree: Json, key: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings; what stands in the way and is no mapping is left for `check` to refuse."""
    *parents, last = key.split(".")
    for name in parents:
        if tree.get(name) is None:
            tree[name] = {}
        if not isinstance(tree[name], dict):
            return
        tree = tree[name]
    tree[last] = value


def number_of(text: str) -> Union[int, str]:
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text


def explain(problem: Problem, source: str) -> str:
    """`source`: an environment variable or a flag, which says where; or a file, in which the place is to be named."""
    location = "" if source in VARIABLES or source.startswith("--") else f"{problem.location} "
    shown = "" if problem.value is None else f" (it is {problem.value!r})"
    return f"{source}: {location}{problem.message}{shown}"


def refuse_contradictions(config: Config, source: Callable[[str], str]) -> None:
    """What each key allows by itself, but not together with others, or not yet."""
    for name, backend in config.backends.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name == "default":
            raise ConfigError(f"{source('')}: backends.{name}: a name is 1 to 64 letters, digits, '.', '_' or '-', "
                              "and not 'default'")
        if name not in BUILT_IN and not backend.command:
            raise ConfigError(f"{source('')}: backends.{name}.command is required: clinvk has no backend of that name"
                              + nearest(name, BUILT_IN))
        program = backend.command if isinstance(backend.command, str) else "".join(backend.command[:1])
        is_blank = bool(backend.command) and not program.strip()
        if is_blank or any(not re.fullmatch(r"[^=\0]+", variable) for variable in backend.env):
            raise ConfigError(f"{source('')}: backends.{name}: command and the names in env must not be empty, and a "
                              "name has no '='")
    refuse_origins(config.server, source)
    for host in config.server.allowed_hosts:
        if not re.fullmatch(r"[^\s*/,@]+", host):
            raise ConfigError(f"{source('server.allowed_hosts')}: server.allowed_hosts: {host!r} must be one host's "
                              "name or address, such as box.local; with API keys and server.host 0.0.0.0 any will do")
    for network in config.server.trusted_proxies:
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError:
            raise ConfigError(f"{source('server.trusted_proxies')}: server.trusted_proxies: {network!r} must be an "
                              "address, or a network such as 10.0.0.0/8") from None
    if config.default_backend not in config.backends:
        raise ConfigError(f"{source('default_backend')}: default_backend must be one of {', '.join(config.names())}"
                          + nearest(config.default_backend, config.backends))


ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d+|:\*)?", re.IGNORECASE)


def refuse_origins(server: ServerConfig, source: Callable[[str], str]) -> None:
    for origin in server.cors_allowed_origins:
        if not ORIGIN.fullmatch(origin):
            raise ConfigError(f"{source('server.cors_allowed_origins')}: server.cors_allowed_origins: {origin!r} must "
                              "be a scheme, a host and perhaps a port, such as https://app.example or "
                              'http://localhost:*, or "*"')
        if origin == "*" and server.cors_allow_credentials:
            raise ConfigError(f"{source('server.cors_allow_credentials')}: server.cors_allow_credentials can not be "
                              'true together with the origin "*": name the origins')


# ==== JSON Schema =================================================================================
# In: a JSON Schema, and a value. Out: what is wrong with the one or the other.

Place = Tuple[Union[str, int], ...]  # the keys and indexes that lead to a part of a value
FAULTS_TOLD = 10  # of one answer: enough for a model to mend it


class Fault(NamedTuple):
    """What is wrong with a part of a value; or of a schema, as a value that is to be one."""
    at: Place
    message: str

    def __str__(self) -> str:
        steps = [f".{key}" if re.fullmatch(r"[A-Za-z_$][\w$-]*", str(key)) else f"[{json.dumps(key)}]"
                 for key in self.at]
        return f"${''.join(steps)}: {self.message}"


def schema_faults(schema: Any) -> List[str]:
    """Why no value can be checked against this schema; nothing, if one can."""
    return [str(fault) for fault in JsonSchema(schema).faults()][:FAULTS_TOLD]


def value_faults(value: Any, schema: Any) -> List[str]:
    """What is wrong with a value. The schema must be one without faults."""
    judge = Judge(JsonSchema(schema))
    try:
        with contextlib.closing(judge.searches):
            found = judge.judge(schema, value, ()).faults
    except RecursionError:
        return ["$: is nested too deep to be checked"]
    except TimeoutError:
        return [f"$: looking for the patterns of the schema takes more than {Searches.SECS:g} s"]
    return [*dict.fromkeys(map(str, found))][:FAULTS_TOLD]


def kinds_of(value: Any) -> Tuple[str, ...]:
    """The JSON types of a value, the narrowest first: 1.0 is an integer, too."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ("integer", "number") if isinstance(value, int) or value.is_integer() else ("number",)
    return ({bool: "boolean", str: "string", list: "array", dict: "object"}.get(type(value), "null"),)


def comparable(value: Any) -> Any:
    """Equal, and hashed alike, for what is equal in JSON: 1 and 1.0, not 1 and true."""
    if isinstance(value, dict):
        return "object", frozenset((name, comparable(item)) for name, item in value.items())
    if isinstance(value, list):
        return "array", tuple(map(comparable, value))
    return ("boolean", value) if isinstance(value, bool) else value


def is_multiple(value: float, factor: float) -> bool:
    """In the decimals as they are written: 0.3 is a multiple of 0.1."""
    return fractions.Fraction(repr(value)) % fractions.Fraction(repr(factor)) == 0


# What in a pattern is no operator: an escape, or a set of characters, which without an end goes on to the very end; so
# each character is looked at once.
LITERAL = r"\\.|\[(?:\\.|[^]\\])*(?:\]|\Z)"


@functools.lru_cache(maxsize=1000)
def expression(text: str) -> Pattern[str]:
    """A pattern, whose `$` is the very end as in JSON Schema: Python's own also fits before a last newline."""
    return re.compile(re.sub(rf"({LITERAL})|\$", lambda found: found[1] or r"\Z", text, flags=re.DOTALL))


def is_quick(pattern: str, text: str) -> bool:
    """Whether looking for it can not take long: no groups, and not two quantifiers that share the text out."""
    bare = re.sub(LITERAL, "", pattern, flags=re.DOTALL)
    return len(text) <= 10_000 and "(" not in bare and len(re.findall(r"[*+?]|\{\d*,", bare)) < 2


class Searches:
    """Looks for the patterns of a schema in a process of its own, which can be ended: Python's `re` may take for ever,
    and no other thread runs meanwhile. It is no CLI, and starts nothing; a limit of CPU time ends it in any case."""
    SECS = 5.0  # for all of them
    PROGRAM = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
except ImportError:
    pass
for line in sys.stdin:
    print(int(bool(re.search(*json.loads(line)))), flush=True)
"""

    def __init__(self) -> None:
        self.process: Optional[subprocess.Popen[str]] = None
        self.limit = threading.Timer(self.SECS, self.end)

    def finds(self, pattern: str, text: str) -> bool:
        """Raises TimeoutError."""
        if is_quick(pattern, text):
            return bool(expression(pattern).search(text))
        if not self.process:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", self.PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, encoding="ascii")
            self.limit.daemon = True
            self.limit.start()
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([expression(pattern).pattern, text]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise TimeoutError from None
        said = self.process.stdout.readline()
        if not said:
            raise TimeoutError
        return said == "1\n"

    def end(self) -> None:
        if self.process:
            self.process.kill()

    def close(self) -> None:
        self.limit.cancel()
        self.end()
        if self.process:
            self.process.communicate()


# ---- Formats: those that the strict modes of OpenAI and Anthropic know. Any other is a remark.

LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
TIME = (r"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
        r"|23:59:60(?:\.[0-9]+)?(?:[Zz]|[+-]00:00))")
EMAIL_USER = r"(?:[\w!#$%&'*+/=?^`{|}~-]+(?:\.[\w!#$%&'*+/=?^`{|}~-]+)*|\"(?:[^\"\\\n]|\\.)+\")"


def is_date(text: str) -> bool:
    """RFC 3339's: with year, month and day, and on the calendar."""
    try:
        return bool(re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text) and datetime.date.fromisoformat(text))
    except ValueError:
        return False


def is_ip(kind: Callable[[str], Any], text: str) -> bool:
    try:
        return bool(kind(text)) and "%" not in text
    except ValueError:
        return False


FORMATS: Dict[str, Callable[[str], Any]] = {
    "date": is_date,
    "time": re.compile(TIME).fullmatch,
    "date-time": lambda text: is_date(text[:10]) and re.fullmatch("[Tt]" + TIME, text[10:]),
    "duration": re.compile(r"P(?!\Z)(?:[0-9]+W|(?:[0-9]+Y)?(?:[0-9]+M)?(?:[0-9]+D)?"
                           r"(?:T(?!\Z)(?:[0-9]+H)?(?:[0-9]+M)?(?:[0-9]+S)?)?)").fullmatch,
    "email": re.compile(rf"{EMAIL_USER}@{LABEL}(?:\.{LABEL})*", re.ASCII).fullmatch,
    "hostname": re.compile(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*").fullmatch,
    "ipv4": functools.partial(is_ip, ipaddress.IPv4Address),
    "ipv6": functools.partial(is_ip, ipaddress.IPv6Address),
    "uuid": re.compile("[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}").fullmatch,
    "uri": re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?:[\w!#$&'()*+,./:;=?@\[\]~-]|%[0-9A-Fa-f]{2})*", re.ASCII).fullmatch,
}


# ---- Keywords. What each may say in a schema, those that look at a value as a whole, and those that hold schemas.

class Rule(NamedTuple):
    """A keyword that looks at a value as a whole."""
    kind: str  # of the values that it speaks of; "": of all
    holds: Callable[[Any, Any], Any]  # of the value, and what the schema says
    message: str


RULES = {
    "enum": Rule("", lambda value, all_of: comparable(value) in map(comparable, all_of), "must be one of {}"),
    "const": Rule("", lambda value, other: comparable(value) == comparable(other), "must be {}"),
    "minLength": Rule("string", lambda value, least: len(value) >= least, "must have at least {} characters"),
    "maxLength": Rule("string", lambda value, most: len(value) <= most, "must have at most {} characters"),
    "format": Rule("string", lambda text, name: name not in FORMATS or FORMATS[name](text), "must be of the format {}"),
    "minimum": Rule("number", lambda value, least: value >= least, "must be at least {}"),
    "maximum": Rule("number", lambda value, most: value <= most, "must be at most {}"),
    "exclusiveMinimum": Rule("number", lambda value, below: value > below, "must be more than {}"),
    "exclusiveMaximum": Rule("number", lambda value, above: value < above, "must be less than {}"),
    "multipleOf": Rule("number", is_multiple, "must be a multiple of {}"),
    "minItems": Rule("array", lambda value, least: len(value) >= least, "must have at least {} items"),
    "maxItems": Rule("array", lambda value, most: len(value) <= most, "must have at most {} items"),
    "uniqueItems": Rule("array", lambda value, on: not on or len(set(map(comparable, value))) == len(value),
                        "must not have two equal items"),
    "minProperties": Rule("object", lambda value, least: len(value) >= least, "must have at least {} properties"),
    "maxProperties": Rule("object", lambda value, most: len(value) <= most, "must have at most {} properties"),
}
TYPES = frozenset("null boolean integer number string array object".split())
REFERENCES = frozenset("$ref $dynamicRef $recursiveRef".split())  # all the same where there is but one document
ONE_SCHEMA = ("additionalProperties unevaluatedProperties propertyNames additionalItems unevaluatedItems contains "
              "not if then else")
NAMED_SCHEMAS = frozenset("properties patternProperties dependentSchemas dependencies $defs definitions".split())
HOLD_SCHEMAS = NAMED_SCHEMAS.union(f"{ONE_SCHEMA} items prefixItems allOf anyOf oneOf".split())
SAME_VALUE = REFERENCES.union("allOf anyOf oneOf not if then else dependentSchemas dependencies".split())


def is_schema(said: Any) -> bool:
    return isinstance(said, (dict, bool))


def is_count(said: Any) -> bool:
    return kinds_of(said)[0] == "integer" and said >= 0


def is_number(said: Any) -> bool:
    return kinds_of(said)[-1] == "number" and abs(said) < math.inf


def is_pattern(said: Any) -> bool:
    try:
        return isinstance(said, str) and bool(expression(said))
    except (re.error, OverflowError, RecursionError):
        return False


def is_text(said: Any) -> bool:
    return isinstance(said, str)


def are_texts(said: Any) -> bool:
    return isinstance(said, list) and all(isinstance(item, str) for item in said)


def listed(said: Any) -> Any:
    """`type` may be a name or a list of names."""
    return [said] if isinstance(said, str) else said


# What a keyword may say, but for the schemas in it.
SHAPES: Dict[str, Tuple[Callable[[Any], Any], str]] = {keyword: (fits, message) for keywords, fits, message in (
    ("minLength maxLength minItems maxItems minProperties maxProperties minContains maxContains", is_count,
     "a whole number, 0 or more"),
    ("minimum maximum exclusiveMinimum exclusiveMaximum", is_number, "a number"),
    ("multipleOf", lambda said: is_number(said) and said > 0, "a number above 0"),
    ("uniqueItems", lambda said: isinstance(said, bool), "true or false"),
    ("$ref $dynamicRef $recursiveRef $anchor $dynamicAnchor $id format", is_text, "a string"),
    ("pattern", is_pattern, "a regular expression that Python knows"),
    ("type", lambda said: are_texts(listed(said)) and said and TYPES.issuperset(listed(said)),
     f"one of {', '.join(sorted(TYPES))}, or a list of these"),
    ("enum", lambda said: isinstance(said, list), "a list"),
    ("required", are_texts, "a list of strings"),
    ("dependentRequired", lambda said: isinstance(said, dict) and all(map(are_texts, said.values())),
     "an object of lists of strings"),
    (ONE_SCHEMA, is_schema, "a schema: an object, or true or false"),
    ("items", lambda said: is_schema(said) or isinstance(said, list), "a schema: an object, or true or false"),
    ("properties dependentSchemas $defs definitions", lambda said: isinstance(said, dict), "an object of schemas"),
    ("dependencies", lambda said: isinstance(said, dict) and all(
        are_texts(item) for item in said.values() if isinstance(item, list)), "an object of schemas or string lists"),
    ("patternProperties", lambda said: isinstance(said, dict) and all(map(is_pattern, said)),
     "an object of schemas, named by regular expressions that Python knows"),
    ("allOf anyOf oneOf", lambda said: isinstance(said, list) and said, "a list of schemas, not empty"),
    ("prefixItems", lambda said: isinstance(said, list), "a list of schemas"),
) for keyword in keywords.split()}


def schemas_in(schema: Json) -> Iterator[Tuple[str, Place, Any]]:
    """The schemas that stand in one: keyword, place, schema."""
    for keyword in filter(HOLD_SCHEMAS.__contains__, schema):
        said = schema[keyword]
        if keyword in NAMED_SCHEMAS and isinstance(said, dict):
            yield from ((keyword, (keyword, name), item) for name, item in said.items()
                        if keyword != "dependencies" or not isinstance(item, list))
        elif isinstance(said, list):
            yield from ((keyword, (keyword, index), item) for index, item in enumerate(said))
        elif is_schema(said):
            yield keyword, (keyword,), said


def members(value: Any) -> Iterable[Tuple[Union[str, int], Any]]:
    """The properties or the items of a value, by name or index."""
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


def schemas_for(schema: Json, value: Any, place: Any, finds: Callable[[str, str], bool]) -> List[Any]:
    """What a schema says of one member of the value, but for `unevaluated...`."""
    if isinstance(value, list):
        first, rest = schema.get("prefixItems", ()), schema.get("items")
        if isinstance(rest, list):  # draft-07
            first, rest = rest, schema.get("additionalItems")
        return [first[place]] if place < len(first) else [] if rest is None else [rest]
    named = [schema["properties"][place]] if place in schema.get("properties", ()) else []
    named += [item for text, item in schema.get("patternProperties", {}).items() if finds(text, place)]
    return named or ([schema["additionalProperties"]] if "additionalProperties" in schema else [])


class JsonSchema:
    """A JSON Schema, draft 2020-12, or draft-07 where that has other words: the schemas in it, and its faults."""

    def __init__(self, document: Any) -> None:
        self.document = document
        self.url = str(document.get("$id", "")).partition("#")[0] if isinstance(document, dict) else ""
        self.anchors: Dict[str, Any] = {}  # none, while they are looked for
        self.anchors = {str(schema[word]).lstrip("#"): schema for _, schema in self.reached()
                        if isinstance(schema, dict) for word in ("$anchor", "$dynamicAnchor", "$id") if word in schema}

    def named(self, reference: Any) -> Any:
        """What a `$ref` leads to; None: nothing in this document."""
        url, _, fragment = str(reference).partition("#")
        if url not in ("", self.url):
            return None
        found, fragment = self.document, urllib.parse.unquote(fragment)
        if not fragment.startswith("/"):
            return self.anchors.get(fragment) if fragment else found
        for part in fragment[1:].split("/"):
            inner = {str(place): item for place, item in members(found)}
            found = inner.get(part.replace("~1", "/").replace("~0", "~"))
        return found

    def next_of(self, schema: Json) -> Iterator[Tuple[str, Place, Any]]:
        """The schemas that stand in one, or that it refers to: keyword, place, schema."""
        yield from schemas_in(schema)
        for keyword in REFERENCES.intersection(schema):
            found = self.named(schema[keyword])
            if found is not None:
                yield keyword, (keyword,), found

    def reached(self) -> Iterator[Tuple[Place, Any]]:
        """Every schema that stands in the document, or that a reference leads to, and where."""
        seen: Set[int] = set()
        waiting: Deque[Tuple[Place, Any]] = collections.deque([((), self.document)])
        while waiting:
            at, schema = waiting.popleft()
            if id(schema) in seen:
                continue
            yield at, schema
            if isinstance(schema, dict):
                seen.add(id(schema))
                waiting.extend(((*at, *inner), item) for _, inner, item in self.next_of(schema))

    def faults(self) -> Iterator[Fault]:
        """Why no value can be checked against it."""
        same_value: Dict[int, List[int]] = {}  # the schemas that look at the same value next
        places: Dict[int, Place] = {}
        for at, schema in self.reached():
            if isinstance(schema, dict):
                wrong = {keyword: self.fault_of(schema, keyword) for keyword in schema}
                yield from (Fault((*at, keyword), message) for keyword, message in wrong.items() if message)
                places[id(schema)] = at
                same_value[id(schema)] = [id(item) for keyword, _, item in self.next_of(schema)
                                          if keyword in SAME_VALUE]
            elif not is_schema(schema):
                yield Fault(at, "must be a schema: an object, or true or false")
        try:
            graphlib.TopologicalSorter(same_value).prepare()
        except graphlib.CycleError as error:
            yield Fault(places[error.args[1][0]], "leads back to itself without a step into the value")

    def fault_of(self, schema: Json, keyword: str) -> str:
        said = schema[keyword]
        fits, wanted = SHAPES.get(keyword, (None, ""))
        if fits and not fits(said):
            return f"must be {wanted}"
        if keyword in REFERENCES and self.named(said) is None:
            return f"{json.dumps(said)} leads to no schema of this document"
        if keyword == "$id" and schema is not self.document and not said.startswith("#"):
            return "is supported at the top only"
        return ""


class Verdict(NamedTuple):
    """What a schema finds wrong with a value, and the members of the value that it spoke of."""
    faults: List[Fault]
    known: FrozenSet[Union[str, int]] = frozenset()


class Judge:
    """What the schemas of a document say of one value.

    `format` counts for those of FORMATS, and what stands beside a `$ref` counts in draft-07, too."""

    def __init__(self, document: JsonSchema) -> None:
        self.document = document
        self.searches = Searches()
        # By a `$ref`: schemas that refer to each other twice would take twice as long at each level.
        self.judged: Dict[Tuple[int, int, Place], Verdict] = {}

    def judge(self, schema: Any, value: Any, at: Place) -> Verdict:
        """One schema of this document, and one value, which stands at that place."""
        if isinstance(schema, bool):
            return Verdict([] if schema else [Fault(at, "must not be there")])
        wrong = [Fault(at, message) for message in faults_by_rule(schema, value)]
        if isinstance(value, str) and not self.searches.finds(schema.get("pattern", ""), value):
            wrong.append(Fault(at, f"must match the pattern {shown_rule(schema['pattern'])}"))
        known: Set[Union[str, int]] = set()
        for verdict in self.verdicts(schema, value, at):
            wrong += verdict.faults
            known |= verdict.known
        for place, item in members(value):
            for inner in schemas_for(schema, value, place, self.searches.finds):
                wrong += self.judge(inner, item, (*at, place)).faults
                known.add(place)
        rest = schema.get("unevaluatedItems" if isinstance(value, list) else "unevaluatedProperties")
        if rest is not None:
            for place, item in members(value):
                wrong += [] if place in known else self.judge(rest, item, (*at, place)).faults
                known.add(place)
        return Verdict(wrong, frozenset(known))

    def verdicts(self, schema: Json, value: Any, at: Place) -> Iterator[Verdict]:
        """Of the keywords that hand the whole value on to other schemas."""
        for word in REFERENCES.intersection(schema):
            inner = self.document.named(schema[word])
            key = id(inner), id(value), at
            if key not in self.judged:
                self.judged[key] = self.judge(inner, value, at)
            yield self.judged[key]
        for inner in schema.get("allOf", ()):
            yield self.judge(inner, value, at)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                yield choice(word, [self.judge(inner, value, at) for inner in schema[word]], at)
        if "not" in schema and not self.judge(schema["not"], value, at).faults:
            yield Verdict([Fault(at, "must not fit the schema of `not`")])
        if "if" in schema:
            tried = self.judge(schema["if"], value, at)
            yield from [] if tried.faults else [tried]
            yield self.judge(schema.get("else" if tried.faults else "then", True), value, at)
        if isinstance(value, dict):
            yield from self.verdicts_on_names(schema, value, at)
        if isinstance(value, list) and "contains" in schema:
            yield self.verdict_on_contents(schema, value, at)

    def verdicts_on_names(self, schema: Json, value: Json, at: Place) -> Iterator[Verdict]:
        required = [*schema.get("required", ())]
        for word in ("dependencies", "dependentRequired", "dependentSchemas"):
            for name, needed in schema.get(word, {}).items():
                if name in value and isinstance(needed, list):
                    required += needed
                elif name in value:
                    yield self.judge(needed, value, at)
        yield Verdict([Fault((*at, name), "is required") for name in required if name not in value])
        for name in value if "propertyNames" in schema else ():
            yield Verdict([Fault((*at, name), f"its name {fault.message}")
                           for fault in self.judge(schema["propertyNames"], name, at).faults])

    def verdict_on_contents(self, schema: Json, value: List[Any], at: Place) -> Verdict:
        fitting = frozenset(index for index, item in enumerate(value)
                            if not self.judge(schema["contains"], item, (*at, index)).faults)
        least, most = schema.get("minContains", 1), schema.get("maxContains", math.inf)
        if least <= len(fitting) <= most:
            return Verdict([], fitting)
        wanted = f"at least {least}" if len(fitting) < least else f"at most {most}"
        return Verdict([Fault(at, f"must have {wanted} items that fit `contains`, has {len(fitting)}")], fitting)


def faults_by_rule(schema: Json, value: Any) -> Iterator[str]:
    """What the keywords say that look at a value as a whole."""
    kinds = kinds_of(value)
    types = listed(schema.get("type", kinds[0]))
    if not set(types).intersection(kinds):
        yield f"must be {' or '.join(types)}, not {kinds[0]}"
    for keyword in filter(RULES.__contains__, schema):
        rule, said = RULES[keyword], schema[keyword]
        if rule.kind in ("", *kinds) and not rule.holds(value, said):
            yield rule.message.format(shown_rule(said))


def shown_rule(said: Any) -> str:
    """What a keyword says, as a message shows it."""
    shown = json.dumps(said, ensure_ascii=False)
    return shown if len(shown) <= 200 else shown[:200] + " ..."


def choice(word: str, verdicts: List[Verdict], at: Place) -> Verdict:
    """Of `anyOf` and `oneOf`. If nothing fits, the faults of the schema that comes nearest: its own type fits."""
    fitting = [verdict for verdict in verdicts if not verdict.faults]
    known: FrozenSet[Union[str, int]] = frozenset().union(*(verdict.known for verdict in fitting))
    if len(fitting) > 1 and word == "oneOf":
        return Verdict([Fault(at, f"must fit exactly one of the schemas of oneOf, fits {len(fitting)}")])
    if fitting:
        return Verdict([], known)
    near = [verdict.faults for verdict in verdicts if all(fault.at != at for fault in verdict.faults)]
    if near:
        return Verdict(min(near, key=len))
    messages = dict.fromkeys(fault.message for verdict in verdicts for fault in verdict.faults if fault.at == at)
    return Verdict([Fault(at, ", or ".join([*messages][:FAULTS_TOLD]))])


# ---- OpenAI's strict mode, as its guide to structured outputs says. What the guide leaves open counts as not taken.

STRICT_KEYWORDS = frozenset("""
    $schema $defs definitions $ref title description type enum const anyOf properties required additionalProperties
    items pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minItems maxItems""".split())
STRICT_FORMATS = FORMATS.keys() - {"uri"}


def is_strict(schema: Any) -> bool:
    """Whether OpenAI takes a schema with `strict: true`."""
    document = JsonSchema(schema)
    if any(document.faults()) or not isinstance(schema, dict) or schema.get("type") != "object" or "anyOf" in schema:
        return False
    parts = [(at, part) for at, part in document.reached() if isinstance(part, dict)]
    return (all(is_strict_part(at, part) for at, part in parts)
            and sum(len(part.get("properties", ())) for _, part in parts) <= 5000
            and sum(len(part.get("enum", ())) for _, part in parts) <= 1000)


def is_strict_part(at: Place, part: Json) -> bool:
    """Whether this schema may stand there, whatever stands in it."""
    words, types, properties = part.keys(), listed(part.get("type", [])), {*part.get("properties", ())}
    if not STRICT_KEYWORDS.issuperset(words) or part.get("format", "date") not in STRICT_FORMATS:
        return False
    if "$ref" in words:
        return words == {"$ref"}
    if words.isdisjoint({"type", "anyOf", "enum", "const"}):
        return False
    is_full = part.get("additionalProperties") is False and {*part.get("required", ())} == properties
    if ("object" in types or properties) and not is_full:
        return False
    if isinstance(part.get("items"), dict) != ("array" in types):
        return False
    inner = [schema for keyword, _, schema in schemas_in(part) if keyword != "additionalProperties"]
    levels = sum(step in ("properties", "items") for step in at)
    return all(isinstance(schema, dict) for schema in inner) and (levels < 10 or not inner)


def with_words(schema: Any, words: Container[str]) -> Any:
    """The schema with these keywords only, in itself and in the schemas that stand in it."""
    if isinstance(schema, list):
        return [with_words(item, words) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {keyword: said for keyword, said in schema.items() if keyword in words}
    for keyword in HOLD_SCHEMAS.intersection(kept):
        said = kept[keyword]
        if keyword in NAMED_SCHEMAS and isinstance(said, dict):
            kept[keyword] = {name: with_words(item, words) for name, item in said.items()}
        else:
            kept[keyword] = with_words(said, words)
    return kept


# ==== Requests ====================================================================================
# In: a client's JSON object. Out: a PromptRequest, the one thing that every backend understands.

DRY = "Nothing runs; each answer is the command line that would."
STREAM = "Answer NDJSON: every run's events as they happen, and the whole answer as the last line."


class Image(NamedTuple):
    """A picture in a prompt, after the first `at` characters of its text."""
    media_type: str
    data: str  # base64
    at: int = 0


Parts = List[Union[str, Image]]  # of a prompt, in order
IMAGE_LENGTH = 6000  # characters that an image counts as: about as much as one of a million pixels


class Prompt(NamedTuple):
    """What a CLI is asked."""
    text: str
    images: Tuple[Image, ...] = ()

    @property
    def parts(self) -> Parts:
        """Text and images, in order; no text is empty."""
        places = [0, *(image.at for image in self.images), len(self.text)]
        texts = [self.text[begin:end] for begin, end in zip(places, places[1:])]
        return [part for pair in itertools.zip_longest(texts, self.images) for part in pair if part]


def prompt_of(parts: Iterable[Union[str, Image]]) -> Prompt:
    texts: List[str] = []
    images: List[Image] = []
    for part in parts:
        if isinstance(part, Image):
            images.append(part._replace(at=length(texts)))
        else:
            texts.append(part)
    return Prompt("".join(texts), tuple(images))


def length(pieces: Iterable[str]) -> int:
    return sum(map(len, pieces))


class Conversation(NamedTuple):
    """The conversation of which a prompt is the last turn. By its key the process is found that gave its last answer: a
    digest of all that was said, or a session and the count of its turns."""
    key_before: str  # without this turn; "": no process can have heard what was said
    turn: Prompt  # this turn alone: what the process that has is asked
    key: str  # with this turn
    session_id: str = ""  # its session, if it is one's

    def key_after(self, answer: str) -> str:
        """With this turn's answer, of which `answer` is the SHA-256 in hex."""
        return self.key if self.session_id else digest(self.key, "assistant", "", [("", (), "")], answer)


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def utf8(text: str) -> bytes:
    return text.encode(errors="replace")


# ---- /api/v1: one prompt, or several

@dataclass(frozen=True)
class PromptRequest:
    """One prompt for one backend. What is left out is taken from the config."""
    # None is "not said": `settled` puts the config's value there.
    backend: str = param(not_empty=True, names_backend=True, doc="A configured backend's name.")
    prompt: str = param(not_blank=True, free_text=True, doc="What the CLI is asked.")
    model: Optional[str] = param(None, flag_value=True, doc="Passed to the CLI; `fast`, `balanced` and `best` are "
                                 "aliases of the config.")
    workdir: Optional[str] = param(None, directory=True, doc="Where the CLI runs: the absolute path of a directory "
                                   "that is there, and that the config allows. Default: the server's own.")
    session_id: Optional[str] = param(None, not_empty=True, doc="Continue that session: its id, or the first of its "
                                      "digits. Its workdir and model are taken over.")
    ephemeral: bool = param(False, doc="Store nothing, here or in the CLI.")
    approval_mode: Optional[str] = param(None, choices=APPROVAL_MODES, doc="What the CLI may do without being asked.")
    sandbox_mode: Optional[str] = param(None, choices=SANDBOX_MODES, doc="What the CLI's tools may reach.")
    output_format: str = param("default", choices=OUTPUT_FORMATS, doc="`stream-json` streams NDJSON events; the others "
                               "answer one JSON object. Default: output.format of the config.")
    max_tokens: Optional[int] = param(None, minimum=0, doc="Of the answer; 0: no limit.")
    max_turns: Optional[int] = param(None, minimum=0, doc="Of the agent; 0: no limit.")
    system_prompt: Optional[str] = param(None, free_text=True, doc="In place of the CLI's own, or added to it, as the "
                                         "CLI has it.")
    allowed_tools: Optional[str] = param(None, flag_value=True, doc="Comma-separated; claude only.")
    verbose: Optional[bool] = param(None, doc="The CLI's own verbose mode.")
    dry_run: Optional[bool] = param(None, doc="Answer with the command line that would run, and run nothing.")
    extra: List[str] = param(list, doc="Further flags for the CLI, as the backend's list and the config allow.")
    metadata: Dict[str, str] = param(dict, free_text=True, doc="Stored with the session.")
    timeout_secs: Optional[float] = param(None, above=0, doc="Seconds; at most server.request_timeout_secs.")
    isolated: bool = internal(False)  # the model way (SPEC 2.0): a chat, without the agent's tools and files
    keeps: bool = internal(False)  # the CLI stores the conversation
    resume: str = internal("")  # the CLI's own name for the conversation to go on with
    begins: bool = internal(False)  # the CLI has not said yet that it is there
    sandbox_before: str = internal("")  # the last sandbox_mode that a turn of it has named
    same_system_prompt: bool = internal(False)  # system_prompt is what that conversation began with
    stops: Tuple[str, ...] = internal(())  # the run ends where one of these comes in its text
    effort: str = internal("")  # how hard to think: low, medium, high ...
    thinking_tokens: Optional[int] = internal(None)
    conversation: Optional[Conversation] = internal(None)
    turns: Tuple[Turn, ...] = internal(())  # those that the prompt is made of, if another one may follow
    images: Tuple[Image, ...] = internal(())  # in the prompt
    schema: Optional[Json] = internal(None)  # JSON Schema: the answer is to be JSON that it describes

    @property
    def streams(self) -> bool:
        return self.output_format == "stream-json"

    @property
    def parts(self) -> Parts:
        """The prompt's text and images, in order."""
        return Prompt(self.prompt, self.images).parts

    @property
    def characters(self) -> int:
        """All that its tokens are estimated from."""
        return len(self.prompt) + len(self.system_prompt or "") + IMAGE_LENGTH * len(self.images)


@dataclass(frozen=True)
class Task(PromptRequest):
    """One of several runs."""
    session_id: Optional[str] = internal(None)


@dataclass(frozen=True)
class ParallelRequest:
    """Several runs at once. None of them keeps a session."""
    tasks: List[Task] = param(not_empty=True, longest=100, doc="What is to run.")
    max_parallel: Optional[int] = param(None, minimum=1, doc="How many run at once. Default: parallel.max_workers "
                                        "of the config.")
    fail_fast: Optional[bool] = param(None, doc="After a failure end the others. Default: "
                                      "parallel.fail_fast of the config.")
    dry_run: bool = param(False, doc=DRY)
    stream: bool = param(False, doc=STREAM)


@dataclass(frozen=True)
class ChainStep(Task):
    """One step: `{{previous}}` in its prompt is the last step's output."""
    name: str = param("", doc="Shown in the answer.")
    output_format: str = internal("default")


@dataclass(frozen=True)
class ChainRequest:
    """Several runs, one after the other. None of them keeps a session."""
    steps: List[ChainStep] = param(not_empty=True, longest=100, doc="In the order in which they run.")
    stop_on_failure: bool = param(False, doc="After a failure start no further step.")
    pass_working_dir: bool = param(False, doc="A step without a workdir runs in that of the step before.")
    pass_session_id: bool = param(False, doc="A chain keeps no session.")
    persist_sessions: bool = param(False, doc="A chain keeps no session.")
    dry_run: bool = param(False, doc=DRY)
    stream: bool = param(False, doc=STREAM)


@dataclass(frozen=True)
class CompareRequest:
    """One prompt on several backends. None of the runs keeps a session."""
    backends: List[str] = param(not_empty=True, longest=100, names_backend=True, doc="Names of configured backends.")
    prompt: str = param(not_blank=True, free_text=True, doc="What they are asked.")
    model: Optional[str] = param(None, flag_value=True, doc="Passed to each CLI, or an alias of the config.")
    workdir: Optional[str] = param(None, directory=True, doc="Where they run.")
    sequential: bool = param(False, doc="One after the other.")
    dry_run: bool = param(False, doc=DRY)
    stream: bool = param(False, doc=STREAM)


@dataclass(frozen=True)
class AgentOptions(PromptRequest):
    """How a chat runs. With `workdir` the agent runs there, with the CLI's tools and files, in place of the model."""
    backend: str = internal("")
    prompt: str = internal("")
    model: Optional[str] = internal(None)
    workdir: Optional[str] = param(None, directory=True, doc="Where the agent runs. Without it the model runs, in an "
                                   "empty directory of clinvk's.")
    ephemeral: bool = param(False, doc="Without a session_id nothing is stored anyway.")
    output_format: str = internal("default")


# ---- With nothing left open

@dataclass(frozen=True)
class Settled(PromptRequest):
    """A PromptRequest with nothing left open: what a backend gets. Empty text and 0 mean "the CLI's own"."""
    model: str = ""
    workdir: str = ""
    approval_mode: str = "default"
    sandbox_mode: str = "default"
    max_tokens: int = 0
    max_turns: int = 0
    system_prompt: str = ""
    allowed_tools: str = ""
    verbose: bool = False
    dry_run: bool = False
    timeout_secs: float = 0.0

    def with_prompt(self, prompt: Prompt) -> Settled:
        return dataclasses.replace(self, prompt=prompt.text, images=prompt.images)

    @property
    def standing(self) -> Tuple[Any, ...]:
        """All that can not change from turn to turn of a conversation in one process; but for the model of a session,
        which the first turn may leave to the CLI, and the next ones name."""
        return (self.backend, self.isolated, self.keeps, "" if self.keeps else self.model, self.workdir,
                self.approval_mode, self.sandbox_mode, self.max_tokens, self.max_turns, self.system_prompt,
                self.allowed_tools, self.verbose, tuple(self.extra), self.effort, self.thinking_tokens, self.schema)


def settled(request: PromptRequest, config: Config, workdir: str) -> Settled:
    """Fill in from config what the request leaves open; `workdir` is the directory, already checked."""
    backend, flags = config.backends[request.backend], config.unified_flags

    def first(asked: Any, configured: Any) -> Any:
        return configured if asked is None else asked
    given = {f.name: getattr(request, f.name) for f in dataclasses.fields(PromptRequest)}
    given.update(
        model=named_model(request.model or backend.model, request.backend, config), workdir=workdir,
        approval_mode=first(request.approval_mode, backend.approval_mode or flags.approval_mode),
        sandbox_mode=first(request.sandbox_mode, backend.sandbox_mode or flags.sandbox_mode),
        output_format=config.output.format if request.output_format == "default" else request.output_format,
        max_tokens=first(request.max_tokens, flags.max_tokens), max_turns=first(request.max_turns, flags.max_turns),
        system_prompt=first(request.system_prompt, "" if request.isolated else backend.system_prompt),
        allowed_tools=first(request.allowed_tools, backend.allowed_tools),
        verbose=first(request.verbose, flags.verbose), dry_run=first(request.dry_run, flags.dry_run),
        timeout_secs=min(request.timeout_secs or flags.command_timeout_secs or config.server.request_timeout_secs,
                         config.server.request_timeout_secs))
    return Settled(**given)


def named_model(model: str, backend: str, config: Config) -> str:
    """What a backend's CLI is told for a model's name, which may be one of MODEL_ALIASES."""
    if model not in MODEL_ALIASES:
        return model
    meant = getattr(config.backends[backend].models, model)
    if not meant:
        raise UnknownModel(f"model: there is no such alias; set backends.{backend}.models.{model}")
    return str(meant)


# ---- Which backend a model's name means

# Words in a model's name -> the backend whose CLI knows it.
MODEL_WORDS = (("claude|opus|sonnet|haiku", "claude"), (r"gpt|codex|(?<![a-z])o\d", "codex"), ("gemini", "gemini"))


def backend_of(model: str, config: Config) -> Tuple[str, Optional[str]]:
    """SPEC 2.4: which backend a compat request's `model` means, and the model to name to its CLI (None: its default).

    Raises UnknownModel with what is near and what there is: a typo must not spend money."""
    model = config.server.model_aliases.get(model, model)
    if model in config.backends:
        return model, None
    head, _, rest = model.partition("/")
    if head in config.backends and rest:
        return head, rest
    if model == "default":
        return config.default_backend, None
    for pattern, name in MODEL_WORDS:
        if re.search(pattern, model, re.IGNORECASE):
            return name, model
    known = [*config.names(), "default", *config.server.model_aliases]
    raise UnknownModel(f'no backend goes by the model name "{model}"{nearest(model, known) or "."} There is: '
                       + ", ".join(known) + '; or "backend/model", or a name that the CLI knows, such as claude-..., '
                       "gpt-... or gemini-...")


def refuse_aliases(config: Config) -> None:
    """Raises ConfigError if an alias leads to no model, but perhaps to another alias."""
    bare = dataclasses.replace(config, server=dataclasses.replace(config.server, model_aliases={}))
    for alias, model in config.server.model_aliases.items():
        try:
            backend_of(model, bare)
        except UnknownModel as error:
            raise ConfigError(f"{config.file}: server.model_aliases.{alias}: {error}") from None


# ---- Conversations: many turns as one prompt

class Piece(NamedTuple):
    """A part of a turn: an image, or else plain text if `tag` is empty, or else an element with attributes."""
    text: str
    tag: str = ""
    attributes: Tuple[Tuple[str, str], ...] = ()
    image: Optional[Image] = None
    holds_marks: bool = False  # its text is part of a transcript already, with elements in it


class Turn(NamedTuple):
    role: str
    pieces: List[Piece]
    name: str = ""


MARKS = re.compile(r"<(/?)(\\*)(?=(?:turn|tool_call|tool_result|document)\b)")


def as_prompt(turns: List[Turn]) -> Prompt:
    """One user turn without marks stands as it is; anything else is a transcript, every turn marked by its role.

    Text that looks like one of the marks gets a backslash after its `<`, so no turn can pass itself off as another."""
    if len(turns) == 1 and turns[0].role == "user" and not any(piece.tag for piece in turns[0].pieces):
        return prompt_of(lines_of(piece.image or piece.text for piece in turns[0].pieces))
    *before, last = turns
    if last.role == "assistant":
        before, closing = turns, "Go on from where the assistant's last turn ends; do not repeat it."
    elif last.role == "user":
        by = f" (by {json.dumps(escaped(last.name), ensure_ascii=False)})" if last.name else ""
        closing = f"Now answer the user's last turn{by}, which is all that follows:\n\n"
    else:
        before, closing = turns, "Go on with the answer to the user, now that the tool has answered."
    told: Parts = [] if not before else ["The conversation so far:\n"]
    for turn in before:
        told += [f"\n<turn{attributes_text((('role', turn.role), ('name', turn.name)))}>\n", *said(turn), "\n</turn>"]
    told += ["\n\n" if before else "", closing, *(said(last) if last.role == "user" else [])]
    return prompt_of(told)


def said(turn: Turn) -> Parts:
    """What a turn of a transcript says."""
    return lines_of(piece.image or marked(piece) for piece in turn.pieces)


def lines_of(parts: Iterable[Union[str, Image]]) -> Parts:
    """Texts that follow one another as one, each in a line of its own."""
    lines: Parts = []
    for part in parts:
        if isinstance(part, str) and lines and isinstance(lines[-1], str):
            lines[-1] += "\n" + part
        else:
            lines.append(part)
    return lines


def conversation_of(turns: List[Turn]) -> Conversation:
    """Only a last turn of the user's, after an answer, can be said alone to the process that gave that answer."""
    *earlier, last = turns
    goes_on = earlier and earlier[-1].role == "assistant" and last.role == "user" and not last.name
    turn = as_prompt([last]) if goes_on else Prompt("")
    before = functools.reduce(key_with, earlier, "")
    return Conversation(before if turn.text.strip() or turn.images else "", turn, key_with(before, last))


def replied(request: Settled, answer: str, text: str) -> Settled:
    """A request that goes on after its answer: the user says `text`."""
    turns = [*request.turns, Turn("assistant", [Piece(answer)]), Turn("user", [Piece(text)])]
    return dataclasses.replace(request.with_prompt(as_prompt(turns)), turns=tuple(turns),
                               conversation=conversation_of(turns) if request.conversation else None)


def key_with(before: str, turn: Turn) -> str:
    """The key of a conversation with one more turn."""
    kinds = [(piece.tag, piece.attributes, piece.image.media_type if piece.image else "") for piece in turn.pieces]
    contents = [piece.image.data if piece.image else piece.text for piece in turn.pieces]
    return digest(before, turn.role, turn.name, kinds, *(hashlib.sha256(utf8(c)).hexdigest() for c in contents))


def marked(piece: Piece) -> str:
    """A piece of text as it stands in a transcript."""
    text = piece.text if piece.holds_marks else escaped(piece.text)
    return f"<{piece.tag}{attributes_text(piece.attributes)}>{text}</{piece.tag}>" if piece.tag else text


def escaped(text: str) -> str:
    return MARKS.sub(r"<\1\\\2", text)


def attributes_text(attributes: Iterable[Tuple[str, str]]) -> str:
    return "".join(f" {name}={json.dumps(escaped(value), ensure_ascii=False)}" for name, value in attributes if value)


# ---- What the requests of all three APIs are made of

LENIENT = "Accepted and without effect."
BASE64 = (string.ascii_letters + string.digits + "+/").encode()
# How an image begins in base64: PNG, JPEG, GIF, WebP (which is a RIFF, as sounds are).
IMAGE_BEGINS = re.compile(r"(?:(iVBORw0KGgo)[A-Za-z0-9+/]|(/9j/)|(R0lGOD)[A-Za-z0-9+/]{2}|"
                          r"(UklGR)[A-Za-z0-9+/]{6}XRUJQ)")
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")  # in the order of IMAGE_BEGINS
IMAGE_URL = re.compile(r"data:image/[a-z.+-]+;base64,")
FETCHES_NOTHING = "clinvk fetches nothing: send the image itself, in base64"


def image_of(data: str) -> Optional[Image]:
    """An image from its base64; the type is what its first bytes say. None if it is none of IMAGE_TYPES."""
    found = IMAGE_BEGINS.match(data) if is_base64(data) else None
    return Image(IMAGE_TYPES[found.lastindex - 1], data) if found and found.lastindex else None


def is_base64(text: str) -> bool:
    """With its padding, and without line ends."""
    rest = utf8(text).translate(None, BASE64)
    return len(text) % 4 == 0 and rest in (b"", b"=", b"==") and text.endswith(rest.decode())


def image_problems(field: str, data: str) -> Iterator[Problem]:
    if not image_of(data):
        yield Problem(field, "must be a PNG, JPEG, GIF or WebP image in base64, without line ends")


def image_url_problems(field: str, url: str) -> Iterator[Problem]:
    found = IMAGE_URL.match(url)
    if found:
        yield from image_problems(field, url[found.end():])
    else:
        yield Problem(field, f"must begin with data:image/png;base64, or the like; {FETCHES_NOTHING}")


def image_piece(url: str) -> Piece:
    """`url` is a data URL, or base64 alone."""
    return Piece("", image=image_of(url.rpartition(",")[2]))


class Part(Open):
    """A part of what somebody says."""

    def pieces(self) -> List[Piece]:
        """It, as it stands in a turn."""
        raise NotImplementedError


def pieces_of(content: Union[None, str, Sequence[Part]]) -> List[Piece]:
    """What somebody says, in one text or in parts, as it stands in a turn."""
    if isinstance(content, str):
        return [Piece(content)]
    return [piece for part in content or () for piece in part.pieces()]


@dataclass(frozen=True)
class TextPart(Part):
    """A part of a message: text."""
    type: str = param(choices=("text",))
    text: str = param("", free_text=True)

    def pieces(self) -> List[Piece]:
        return [Piece(self.text)]


def pieces_text(pieces: Iterable[Piece]) -> str:
    return "\n".join(piece.text for piece in pieces if not piece.image)


def tool_result(pieces: List[Piece], *attributes: Tuple[str, str]) -> List[Piece]:
    """What a tool has answered; images follow its text."""
    text = "\n".join(marked(piece) for piece in pieces if not piece.image)
    return [Piece(text, "tool_result", attributes, holds_marks=True), *(piece for piece in pieces if piece.image)]


SYSTEM = ("system", "developer")  # roles whose turns are the system prompt


def system_text(turns: Iterable[Turn]) -> Optional[str]:
    """The system prompt among them; None if there is none."""
    pieces = [piece for turn in turns if turn.role in SYSTEM for piece in turn.pieces]
    if any(piece.image for piece in pieces):
        raise BadRequest("a system prompt is text: put the image into a message of the user")
    return pieces_text(pieces) or None


def not_yet(field: str, what: str) -> Invalid:
    return Invalid([Problem(field, f"{what} can not be used in clinvk {__version__} yet; leave the field out")])


def texts_of(stop: Union[None, str, List[str]]) -> List[str]:
    return [text for text in ([stop] if isinstance(stop, str) else stop or []) if text]


FORMS = ("text", "json_object", "json_schema")  # of answers


def wanted_schema(form: str, schema: Optional[Json]) -> Optional[Json]:
    """That of an answer of one of FORMS; None if it may be any text."""
    return {"text": None, "json_object": {"type": "object"}, "json_schema": schema}[form]


@dataclass(frozen=True)
class Format(Open):
    """What form the answer has: any text, a JSON object, or JSON that a JSON Schema describes."""
    type: str = param("text", choices=FORMS)
    schema: Optional[Dict[str, Any]] = param(None, doc="JSON Schema, for json_schema.")
    name: str = param("", free_text=True, doc=LENIENT)
    description: Any = param(None, doc=LENIENT)
    strict: Optional[bool] = param(None, doc="The answer fits the schema in any case.")

    def problems(self) -> Iterator[Problem]:
        if self.type == "json_schema" and self.schema is None:
            yield Problem("schema", "is required")
        yield from (Problem("schema", fault) for fault in schema_faults(self.schema or {}))

    @property
    def wanted(self) -> Optional[Json]:
        return wanted_schema(self.type, self.schema)


@dataclass(frozen=True)
class StreamOptions(Open):
    """What a stream tells besides the answer."""
    include_usage: bool = param(False, doc="One more chunk, with the token counts.")


class Compat(Open):
    """What the requests of the OpenAI and Anthropic APIs have in common."""
    model: str
    stream: bool
    clinvk: Optional[AgentOptions]
    unknown: Tuple[str, ...]
    PROMPT_AT: ClassVar[str] = "messages"  # the field that its prompt is in
    CALLED: ClassVar[Mapping[str, str]] = {}  # the fields of a PromptRequest that have another name

    @property
    def stops(self) -> List[str]:
        """Before the first of these an answer ends."""
        return []

    def to_prompts(self, config: Config) -> List[PromptRequest]:
        """The runs that this request asks for, one for each of its answers."""
        raise NotImplementedError

    def ignored(self) -> List[str]:
        """The fields that are without effect, whatever the backend."""
        return list(self.unknown)

    def called(self, name: str) -> str:
        """What this API calls a field of a PromptRequest; in `clinvk` it has its own name."""
        is_own = self.clinvk and getattr(self.clinvk, name, None) not in (None, "")
        return name if is_own else self.CALLED.get(name, name)

    def prompt_request(self, config: Config, turns: List[Turn], system_prompt: Optional[str],
                       **fields: Any) -> PromptRequest:
        """A run: of the model, or of the agent if `clinvk.workdir` or config says so. What `clinvk` says counts for
        more than `fields`."""
        backend, model = backend_of(self.model, config)
        options = self.clinvk or AgentOptions()
        isolated = options.workdir is None and options.session_id is None and config.server.compat_mode == "model"
        if not any(piece.tag or piece.image or piece.text.strip() for turn in turns for piece in turn.pieces):
            raise Invalid([Problem(self.PROMPT_AT, "have no text to answer")])
        check(PromptRequest, {"backend": backend, "model": model, "prompt": "-"})  # neither is to be taken for a flag
        prompt = as_prompt(turns)
        fields = {name: value for name, value in fields.items() if getattr(options, name) in (None, "")}
        return dataclasses.replace(options, backend=backend, model=model, prompt=prompt.text, images=prompt.images,
                                   system_prompt=system_prompt, isolated=isolated, stops=tuple(self.stops),
                                   turns=tuple(turns) if fields.get("schema") is not None else (),
                                   conversation=conversation_of(turns) if isolated else None,
                                   ephemeral=options.ephemeral or options.session_id is None, **fields)


NOT_OFFERED = "Not offered to the CLI in this version."


class Chat(Compat):
    """A conversation to go on with. Each API has one kind, and OpenAI's has two."""
    tools: List[Any]
    tool_choice: Any

    @property
    def choice(self) -> Any:
        """What is to become of the client's tools, in OpenAI's words."""
        return self.tool_choice

    def turns(self) -> List[Turn]:
        """All that has been said, with the system prompt."""
        raise NotImplementedError

    def chat_request(self, config: Config, **fields: Any) -> PromptRequest:
        """A run that answers the last turn."""
        if self.tools and self.choice not in (None, "auto", "none"):
            raise not_yet("tool_choice", 'a choice other than "auto" and "none"')
        turns = self.turns()
        talk = [turn for turn in turns if turn.role not in SYSTEM]
        if not talk:
            raise Invalid([Problem(self.PROMPT_AT, "must have a message of the user")])
        system, more = system_text(turns), self.clinvk.system_prompt if self.clinvk else None
        return self.prompt_request(config, talk, f"{system}\n{more}" if system and more else system or more, **fields)

    def ignored(self) -> List[str]:
        return [*(["tools"] if self.tools and self.choice != "none" else []), *self.unknown]


# ---- OpenAI: chat completions

@dataclass(frozen=True)
class RefusalPart(Part):
    """A part of a message of the assistant: why it did not answer."""
    type: str = param(choices=("refusal",))
    refusal: str = param("", free_text=True)

    def pieces(self) -> List[Piece]:
        return [Piece(self.refusal)]


@dataclass(frozen=True)
class ImageURL(Open):
    """An image, in the URL itself."""
    url: str = param(doc="data:image/png;base64, and so on.")
    detail: Any = param(None, doc=LENIENT)

    def problems(self) -> Iterator[Problem]:
        return image_url_problems("url", self.url)


@dataclass(frozen=True)
class ImagePart(Part):
    """A part of a message: an image."""
    type: str = param(choices=("image_url",))
    image_url: ImageURL = param()

    def pieces(self) -> List[Piece]:
        return [image_piece(self.image_url.url)]


@dataclass(frozen=True)
class CalledFunction(Open):
    """The function that a tool call names, and its arguments as JSON text."""
    name: str = param("")
    arguments: str = param("", free_text=True)


@dataclass(frozen=True)
class CalledTool(Open):
    """The tool that is called with text of any form."""
    name: str = param("")
    input: str = param("", free_text=True)


@dataclass(frozen=True)
class ToolCall(Part):
    """A call of a client's tool, from an earlier answer."""
    id: str = param("")
    type: str = param("function")
    function: CalledFunction = param(CalledFunction)
    custom: CalledTool = param(CalledTool)

    def pieces(self) -> List[Piece]:
        named = (("id", self.id), ("name", self.function.name or self.custom.name))
        return [Piece(self.function.arguments or self.custom.input, "tool_call", named)]


@dataclass(frozen=True)
class ChatMessage(Open):
    """One turn. Those of `system` and `developer` are the system prompt."""
    role: str = param(choices=("system", "developer", "user", "assistant", "tool", "function"))
    content: Union[None, str, List[Union[TextPart, RefusalPart, ImagePart]]] = param(None, free_text=True)
    name: str = param("", doc="Of the one who speaks.")
    refusal: str = param("", free_text=True)
    reasoning_content: Any = param(None, doc="Thinking of earlier answers is left out.")
    tool_calls: List[ToolCall] = param(list, doc="What the assistant called in this turn.")
    function_call: Optional[CalledFunction] = param(None, doc="The same, as it was before there were tools.")
    tool_call_id: str = param("", doc="Of the call that this message of the role `tool` answers.")

    def turn(self) -> Turn:
        pieces = pieces_of(self.content)
        if self.refusal:
            pieces.append(Piece(self.refusal))
        old = [ToolCall(function=self.function_call)] if self.function_call else []
        pieces += pieces_of([*self.tool_calls, *old])
        if self.role in ("tool", "function"):
            return Turn("tool", tool_result(pieces, ("id", self.tool_call_id), ("name", self.name)))
        return Turn(self.role, pieces, self.name)


@dataclass(frozen=True)
class NamedSchema(Open):
    """JSON Schema of the answer."""
    schema: Dict[str, Any] = param(doc="JSON Schema.")
    name: Any = param(None, doc=LENIENT)
    description: Any = param(None, doc=LENIENT)
    strict: Any = param(None, doc="The answer fits the schema in any case.")

    def problems(self) -> Iterator[Problem]:
        return (Problem("schema", fault) for fault in schema_faults(self.schema))


@dataclass(frozen=True)
class ResponseFormat(Open):
    """What form the answer has: any text, a JSON object, or JSON that a JSON Schema describes."""
    type: str = param("text", choices=FORMS)
    json_schema: Optional[NamedSchema] = param(None, doc="For json_schema.")

    def problems(self) -> Iterator[Problem]:
        if self.type == "json_schema" and self.json_schema is None:
            yield Problem("json_schema", "is required")

    @property
    def wanted(self) -> Optional[Json]:
        return wanted_schema(self.type, self.json_schema.schema if self.json_schema else None)


STOP_DOC = "The answer ends before the first of these."
NO_LOGPROBS = "are not given by any CLI; leave the field out"
MODEL_DOC = ("`claude`, `codex`, `gemini` or another configured backend; `backend/model`; the name of a model that one "
             "of them has; `default`; an alias of the config.")


@dataclass(frozen=True)
class ChatRequest(Chat):
    """A chat completion. Fields that are not here are accepted, and named in the answer's header X-Clinvk-Ignored."""
    model: str = param(not_empty=True, doc=MODEL_DOC)
    messages: List[ChatMessage] = param(not_empty=True, doc="The conversation; the last turn of the user is the one to "
                                        "answer.")
    stream: bool = param(False, doc="Answer as server-sent events.")
    stream_options: StreamOptions = param(StreamOptions, doc="What a stream tells besides the answer.")
    n: int = param(1, minimum=1, maximum=8, doc="How many answers, each from a run of its own.")
    stop: Union[None, str, List[str]] = param(None, longest=4, free_text=True, doc=STOP_DOC)
    max_tokens: Optional[int] = param(None, minimum=1, doc="Of the answer, where the CLI can.")
    max_completion_tokens: Optional[int] = param(None, minimum=1, doc="As max_tokens, and stronger.")
    reasoning_effort: str = param("", doc="low, medium, high ...: where the CLI can.")
    response_format: ResponseFormat = param(ResponseFormat, doc="What form the answer has.")
    tools: List[Any] = param(list, doc=NOT_OFFERED)
    tool_choice: Any = param(None, doc="What the client's tools are for: `auto` or `none`.")
    logprobs: bool = param(False, doc="No CLI gives them.")
    user: Any = param(None, doc=LENIENT)
    metadata: Any = param(None, doc=LENIENT)
    clinvk: Optional[AgentOptions] = param(None, doc="How the chat runs.")
    unknown: Tuple[str, ...] = internal(())

    def problems(self) -> Iterator[Problem]:
        if self.logprobs:
            yield Problem("logprobs", NO_LOGPROBS)

    @property
    def stops(self) -> List[str]:
        return texts_of(self.stop)

    def turns(self) -> List[Turn]:
        return [message.turn() for message in self.messages]

    def to_prompts(self, config: Config) -> List[PromptRequest]:
        one = self.chat_request(config, effort=self.reasoning_effort, schema=self.response_format.wanted,
                                max_tokens=self.max_completion_tokens or self.max_tokens)
        return [one] * self.n

    def called(self, name: str) -> str:
        return "max_completion_tokens" if name == "max_tokens" and self.max_completion_tokens else super().called(name)


# ---- OpenAI: completions

COMPLETES = ("You complete texts. Answer with what comes after the text that you are given, and with nothing else: do "
             "not repeat the text, explain nothing, and use no code fences.")
FILLS = ("You fill gaps in texts. You are given what stands before the gap, in <before>, and what stands after it, in "
         "<after>. Answer with what stands in the gap, and with nothing else: repeat nothing, explain nothing, and use "
         "no code fences.")


@dataclass(frozen=True)
class CompletionRequest(Compat):
    """A text to complete. Fields that are not here are accepted, and named in the answer's header X-Clinvk-Ignored."""
    PROMPT_AT: ClassVar[str] = "prompt"
    model: str = param(not_empty=True, doc=MODEL_DOC)
    prompt: Union[str, List[str]] = param(longest=16, free_text=True, doc="The text, or several texts. Only with a "
                                          "suffix it may be empty.")
    suffix: str = param("", free_text=True, doc="What comes after the text that is asked for.")
    echo: bool = param(False, doc="The answer begins with the prompt.")
    stream: bool = param(False, doc="Answer as server-sent events.")
    stream_options: StreamOptions = param(StreamOptions, doc="What a stream tells besides the answer.")
    n: int = param(1, minimum=1, maximum=8, doc="How many answers for each prompt, each from a run of its own.")
    stop: Union[None, str, List[str]] = param(None, longest=4, free_text=True, doc=STOP_DOC)
    max_tokens: Optional[int] = param(None, minimum=1, doc="Of the answer, where the CLI can.")
    logprobs: Any = param(None, doc="No CLI gives them.")
    best_of: Optional[int] = param(None, minimum=1, doc="1: no CLI tells which answer is best.")
    user: Any = param(None, doc=LENIENT)
    clinvk: Optional[AgentOptions] = param(None, doc="How it runs.")
    unknown: Tuple[str, ...] = internal(())

    def problems(self) -> Iterator[Problem]:
        if self.logprobs is not None:
            yield Problem("logprobs", NO_LOGPROBS)
        if self.prompt == []:
            yield Problem("prompt", "must not be empty")
        if (self.best_of or 1) > 1:
            yield Problem("best_of", "must be 1: no CLI tells which of several answers is the likeliest")

    @property
    def stops(self) -> List[str]:
        return texts_of(self.stop)

    @property
    def texts(self) -> List[str]:
        """The prompt of each answer."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [text for text in prompts for _ in range(self.n)]

    def to_prompts(self, config: Config) -> List[PromptRequest]:
        return [dataclasses.replace(self.completion(text, config), conversation=None) for text in self.texts]

    def completion(self, text: str, config: Config) -> PromptRequest:
        """A run; nothing follows its answer, so that no CLI is to wait for that."""
        asked = f"<before>{text}</before>\n<after>{self.suffix}</after>" if self.suffix else text
        system = self.clinvk.system_prompt if self.clinvk else None
        return self.prompt_request(config, [Turn("user", [Piece(asked)])],
                                   system or (FILLS if self.suffix else COMPLETES), max_tokens=self.max_tokens)


# ---- OpenAI: responses

@dataclass(frozen=True)
class InputText(TextPart):
    """A part of a message: text."""
    type: str = param(choices=("input_text", "output_text", "text"))
    annotations: Any = param(None, doc=LENIENT)
    logprobs: Any = param(None, doc=LENIENT)


@dataclass(frozen=True)
class InputImage(Part):
    """A part of a message: an image."""
    type: str = param(choices=("input_image",))
    image_url: str = param(doc="data:image/png;base64, and so on.")
    detail: Any = param(None, doc=LENIENT)

    def problems(self) -> Iterator[Problem]:
        return image_url_problems("image_url", self.image_url)

    def pieces(self) -> List[Piece]:
        return [image_piece(self.image_url)]


@dataclass(frozen=True)
class InputMessage(Open):
    """One turn. Those of `system` and `developer` are part of the system prompt."""
    role: str = param(choices=("system", "developer", "user", "assistant"))
    content: Union[str, List[Union[InputText, InputImage, RefusalPart]]] = param(free_text=True)
    type: str = param("message", choices=("message",))
    id: Any = param(None, doc=LENIENT)
    status: Any = param(None, doc=LENIENT)
    phase: Any = param(None, doc=LENIENT)

    def turn(self) -> Turn:
        return Turn(self.role, pieces_of(self.content))


@dataclass(frozen=True)
class CallItem(Kept):
    """A tool that was called in an earlier answer."""
    NOT_SAID: ClassVar[FrozenSet[str]] = frozenset({"type", "id", "call_id", "name", "namespace", "status"})
    type: str = param(choices=("function_call", "custom_tool_call", "local_shell_call", "web_search_call",
                               "tool_search_call"))
    call_id: str = param("")
    name: str = param("")
    namespace: str = param("")
    whole: Json = internal(dict)

    def turn(self) -> Turn:
        name = ".".join(part for part in (self.namespace, self.name or self.type) if part)
        return Turn("assistant", [Piece(rest_of(self), "tool_call", (("id", self.call_id), ("name", name)))])


@dataclass(frozen=True)
class OutputItem(Kept):
    """What a tool has answered."""
    NOT_SAID: ClassVar[FrozenSet[str]] = frozenset({"type", "id", "call_id", "status", "execution"})
    type: str = param(choices=("function_call_output", "custom_tool_call_output", "local_shell_call_output",
                               "tool_search_output"))
    call_id: str = param("")
    output: Union[None, str, List[Union[InputText, InputImage]], Dict[str, Any]] = param(None, free_text=True)
    whole: Json = internal(dict)

    def turn(self) -> Turn:
        said = self.output if isinstance(self.output, list) else rest_of(self)
        return Turn("tool", tool_result(pieces_of(said), ("id", self.call_id)))


def rest_of(item: Union[CallItem, OutputItem]) -> str:
    """All that an item says but its NOT_SAID: the text of a field, if there is only one; else JSON."""
    fields = {name: value for name, value in item.whole.items() if name not in item.NOT_SAID}
    if not fields:
        return ""
    said = next(iter(fields.values())) if len(fields) == 1 else fields
    return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)


@dataclass(frozen=True)
class SilentItem(Open):
    """Thinking of an earlier answer, which is left out; or further tools."""
    type: str = param(choices=("reasoning", "additional_tools"))

    def turn(self) -> None:
        return None


@dataclass(frozen=True)
class TextForm(Open):
    """What form the answer has."""
    format: Format = param(Format, doc="Any text, a JSON object, or JSON that a JSON Schema describes.")


@dataclass(frozen=True)
class Reasoning(Open):
    """How hard the CLI is to think, where it can."""
    effort: str = param("")
    summary: Optional[str] = param(None, doc="What there is of its thinking is always told.")
    generate_summary: Any = param(None, doc="The same, as it was called before.")


Item = Union[InputMessage, CallItem, OutputItem, SilentItem]


@dataclass(frozen=True)
class ResponsesRequest(Chat):
    """A response, of which nothing is stored. Fields that are not here are accepted, and named in the answer's header
    X-Clinvk-Ignored."""
    PROMPT_AT: ClassVar[str] = "input"
    CALLED = {"max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort",
              "system_prompt": "instructions"}
    model: str = param(not_empty=True, doc=MODEL_DOC)
    input: Union[str, List[Item]] = param(not_empty=True, free_text=True, doc="The whole conversation; the last turn "
                                          "of the user is the one to answer.")
    instructions: str = param("", free_text=True, doc="The system prompt.")
    stream: bool = param(False, doc="Answer as server-sent events.")
    stream_options: StreamOptions = param(StreamOptions, doc="What a stream of chunks tells besides the answer.")
    max_output_tokens: Optional[int] = param(None, minimum=1, doc="Of the answer, where the CLI can.")
    reasoning: Reasoning = param(Reasoning, doc="How hard the CLI is to think, where it can.")
    text: TextForm = param(TextForm, doc="What form the answer has.")
    tools: List[Any] = param(list, doc=NOT_OFFERED)
    tool_choice: Any = param(None, doc="What the client's tools are for: `auto` or `none`.")
    parallel_tool_calls: Any = param(None, doc=LENIENT)
    previous_response_id: Any = param(None, doc="Nothing is stored: send the whole input.")
    conversation: Any = param(None, doc="Nothing is stored: send the whole input.")
    background: bool = param(False, doc="Nothing is stored that could be fetched later.")
    metadata: Dict[str, str] = param(dict, free_text=True, doc="The answer repeats it.")
    user: Any = param(None, doc=LENIENT)
    clinvk: Optional[AgentOptions] = param(None, doc="How it runs.")
    unknown: Tuple[str, ...] = internal(())

    def problems(self) -> Iterator[Problem]:
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                yield Problem(name, "can not be used, as clinvk stores no responses: send the whole input, and leave "
                                    "it out")
        if self.background:
            yield Problem("background", "can not be true, as clinvk stores no responses: stream, if the answer takes "
                                        "long")

    def turns(self) -> List[Turn]:
        items = self.input if isinstance(self.input, list) else [InputMessage("user", self.input)]
        turns = [turn for turn in (item.turn() for item in items) if turn]
        if self.instructions:
            turns.insert(0, Turn("system", [Piece(self.instructions)]))
        return [*(turn for turn in turns if turn.role in SYSTEM),
                *one_turn_an_answer([turn for turn in turns if turn.role not in SYSTEM])]

    def to_prompts(self, config: Config) -> List[PromptRequest]:
        return [self.chat_request(config, effort=self.reasoning.effort, max_tokens=self.max_output_tokens,
                                  schema=self.text.format.wanted)]

    @property
    def repeated(self) -> Json:
        """The fields that the answer repeats."""
        form = self.text.format
        described = {"name": form.name or "answer", "schema": form.schema, "strict": form.strict} if form.schema else {}
        return {"instructions": self.instructions or None, "max_output_tokens": self.max_output_tokens,
                "metadata": self.metadata, "tool_choice": "none" if self.tool_choice == "none" else "auto",
                "reasoning": {"effort": self.reasoning.effort or None, "summary": self.reasoning.summary},
                "text": {"format": {"type": form.type, **described}}}


def one_turn_an_answer(turns: List[Turn]) -> List[Turn]:
    """A call belongs to the turn in which the assistant has said something before it."""
    joined: List[Turn] = []
    for turn in turns:
        if joined and turn.role == joined[-1].role == "assistant" and any(piece.tag for piece in turn.pieces):
            joined[-1] = joined[-1]._replace(pieces=joined[-1].pieces + turn.pieces)
        else:
            joined.append(turn)
    return joined


# ---- Anthropic

@dataclass(frozen=True)
class TextBlock(TextPart):
    """Text."""
    citations: Any = param(None, doc=LENIENT)
    cache_control: Any = param(None, doc=LENIENT)


@dataclass(frozen=True)
class ImageSource(Open):
    """An image, in base64."""
    type: str = param(choices=("base64", "url", "file"))
    media_type: str = param("", doc="What counts is how the image begins.")
    data: str = param("")

    def problems(self) -> Iterator[Problem]:
        if self.type == "base64":
            yield from image_problems("data", self.data)
        else:
            yield Problem("type", f"must be base64; {FETCHES_NOTHING}")


@dataclass(frozen=True)
class ImageBlock(Part):
    """An image."""
    type: str = param(choices=("image",))
    source: ImageSource = param()
    cache_control: Any = param(None, doc=LENIENT)

    def pieces(self) -> List[Piece]:
        return [image_piece(self.source.data)]


@dataclass(frozen=True)
class ToolUseBlock(Part):
    """A call of a client's tool, from an earlier answer."""
    type: str = param(choices=("tool_use",))
    id: str = param("")
    name: str = param("")
    input: Any = param(None)
    cache_control: Any = param(None, doc=LENIENT)

    def pieces(self) -> List[Piece]:
        return [Piece(json.dumps(self.input, ensure_ascii=False), "tool_call", (("id", self.id), ("name", self.name)))]


@dataclass(frozen=True)
class ToolResultBlock(Part):
    """What a client's tool answered."""
    type: str = param(choices=("tool_result",))
    tool_use_id: str = param("")
    content: Union[None, str, List[Union[TextBlock, ImageBlock, DocumentBlock, SearchResultBlock]]] = param(
        None, free_text=True)
    is_error: bool = param(False)
    cache_control: Any = param(None, doc=LENIENT)

    def pieces(self) -> List[Piece]:
        return tool_result(pieces_of(self.content), ("id", self.tool_use_id),
                           ("error", "true" if self.is_error else ""))


@dataclass(frozen=True)
class ThinkingBlock(Part):
    """Thinking of an earlier answer. It is left out, as in Anthropic's API."""
    type: str = param(choices=("thinking", "redacted_thinking"))
    thinking: str = param("", free_text=True)
    signature: str = param("")
    data: str = param("")

    def pieces(self) -> List[Piece]:
        return []


@dataclass(frozen=True)
class TextSource(Open):
    """A document's text."""
    type: str = param(choices=("text",))
    data: str = param("", free_text=True)
    media_type: str = param("")


@dataclass(frozen=True)
class ContentSource(Open):
    """A document in blocks."""
    type: str = param(choices=("content",))
    content: Union[None, str, List[Union[TextBlock, ImageBlock]]] = param(None, free_text=True)


@dataclass(frozen=True)
class DocumentBlock(Part):
    """A document, whose source is text."""
    type: str = param(choices=("document",))
    source: Union[TextSource, ContentSource] = param()
    title: str = param("", free_text=True)
    context: str = param("", free_text=True)
    citations: Any = param(None, doc=LENIENT)
    cache_control: Any = param(None, doc=LENIENT)

    def pieces(self) -> List[Piece]:
        source = self.source
        inside = [Piece(source.data)] if isinstance(source, TextSource) else pieces_of(source.content)
        return [Piece(pieces_text(inside), "document", (("title", self.title), ("context", self.context))),
                *(piece for piece in inside if piece.image)]


@dataclass(frozen=True)
class SearchResultBlock(Part):
    """What a search of the client's found."""
    type: str = param(choices=("search_result",))
    source: str = param("", free_text=True)
    title: str = param("", free_text=True)
    content: Union[None, str, List[TextBlock]] = param(None, free_text=True)
    citations: Any = param(None, doc=LENIENT)
    cache_control: Any = param(None, doc=LENIENT)

    def pieces(self) -> List[Piece]:
        return [Piece(pieces_text(pieces_of(self.content)), "document",
                      (("title", self.title), ("source", self.source)))]


Block = Union[TextBlock, ImageBlock, ToolUseBlock, ToolResultBlock, ThinkingBlock, DocumentBlock, SearchResultBlock]


@dataclass(frozen=True)
class MessageParam(Open):
    """One turn."""
    role: str = param(choices=("user", "assistant", "system"))
    content: Union[str, List[Block]] = param(free_text=True)

    def turn(self) -> Turn:
        return Turn(self.role, pieces_of(self.content))


@dataclass(frozen=True)
class ThinkingParam(Open):
    """How much the CLI may think, where it can: `disabled`, `enabled` or `adaptive`."""
    type: str = param("")
    budget_tokens: Optional[int] = param(None, minimum=0)

    @property
    def tokens(self) -> Optional[int]:
        return 0 if self.type == "disabled" else self.budget_tokens


@dataclass(frozen=True)
class ToolChoiceParam(Open):
    """Whether the client's tools may be called."""
    type: str = param("auto")
    disable_parallel_tool_use: Any = param(None, doc=LENIENT)


@dataclass(frozen=True)
class OutputConfigParam(Open):
    """How hard the CLI is to try, where it can, and what form the answer has."""
    effort: str = param("")
    format: Format = param(Format)


@dataclass(frozen=True)
class MessagesRequest(Chat):
    """A message. Fields that are not here are accepted, and named in the answer's header X-Clinvk-Ignored."""
    CALLED = {"reasoning_effort": "output_config.effort", "system_prompt": "system"}
    model: str = param(not_empty=True, doc="As in a chat completion.")
    messages: List[MessageParam] = param(not_empty=True, doc="The conversation; the first turn is the user's.")
    max_tokens: int = param(minimum=1, doc="Of the answer, where the CLI can.")
    system: Union[None, str, List[TextBlock]] = param(None, free_text=True, doc="The system prompt.")
    stream: bool = param(False, doc="Answer as server-sent events.")
    stop_sequences: List[str] = param(list, free_text=True, doc=STOP_DOC)
    metadata: Any = param(None, doc=LENIENT)
    thinking: Optional[ThinkingParam] = param(None, doc="How much the CLI may think, where it can.")
    tools: List[Any] = param(list, doc=NOT_OFFERED)
    tool_choice: ToolChoiceParam = param(ToolChoiceParam, doc="What the client's tools are for.")
    output_format: Format = param(Format, doc="What form the answer has; output_config.format is stronger.")
    output_config: OutputConfigParam = param(OutputConfigParam, doc="How hard the CLI is to try, where it can, and "
                                             "what form the answer has.")
    clinvk: Optional[AgentOptions] = param(None, doc="How the chat runs.")
    unknown: Tuple[str, ...] = internal(())

    def problems(self) -> Iterator[Problem]:
        if self.messages[0].role == "assistant":
            yield Problem("messages[0].role", 'must be "user"')

    @property
    def stops(self) -> List[str]:
        return texts_of(self.stop_sequences)

    @property
    def choice(self) -> Any:
        return self.tool_choice.type

    def turns(self) -> List[Turn]:
        return [Turn("system", pieces_of(self.system)), *(message.turn() for message in self.messages)]

    def to_prompts(self, config: Config) -> List[PromptRequest]:
        wanted = self.output_config.format.wanted
        return [self.chat_request(
            config, effort=self.output_config.effort, max_tokens=self.max_tokens,
            thinking_tokens=self.thinking.tokens if self.thinking else None,
            schema=self.output_format.wanted if wanted is None else wanted)]


@dataclass(frozen=True)
class CountRequest(Open):
    """What is to be counted. Other fields are accepted and without effect."""
    model: str = param(not_empty=True, doc="As in a chat completion.")
    messages: List[MessageParam] = param(not_empty=True, doc="The conversation.")
    system: Union[None, str, List[TextBlock]] = param(None, free_text=True, doc="The system prompt.")
    tools: List[Any] = param(list, doc="Their JSON counts.")
    unknown: Tuple[str, ...] = internal(())

    def characters(self) -> int:
        texts = [pieces_of(content) for content in (self.system, *(m.content for m in self.messages))]
        tools = [json.dumps(tool, ensure_ascii=False) for tool in self.tools]
        said = sum(IMAGE_LENGTH if piece.image else len(piece.text) for pieces in texts for piece in pieces)
        return sum(map(len, tools)) + said


# ==== Events ======================================================================================
# In: what a backend understood of its CLI's lines. Out: the steps of a run, and their sum, a Result.

@dataclass(frozen=True)
class Usage:
    """Token counts of one run, as the provider names them.

    Anthropic counts cached input beside `input_tokens`, the others inside: `cache_inside` says which."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_creation_tokens: int = 0
    reasoning_tokens: int = 0
    cache_inside: bool = True

    def __add__(self, other: Usage) -> Usage:
        """Of two runs of one backend."""
        counts = {name: count + getattr(other, name) for name, count in vars(self).items() if name != "cache_inside"}
        return dataclasses.replace(self, **counts)

    @property
    def all_input(self) -> int:
        """Input, cached or not: OpenAI's `prompt_tokens`."""
        return self.input_tokens + (0 if self.cache_inside else self.cached_tokens + self.cache_creation_tokens)

    @property
    def fresh_input(self) -> int:
        """Input that came from no cache: Anthropic's `input_tokens`."""
        beside = self.cached_tokens + self.cache_creation_tokens if self.cache_inside else 0
        return max(0, self.input_tokens - beside)


class TokenCounts(TypedDict):
    """Tokens, as the provider counts them."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int


def native_usage(usage: Usage) -> TokenCounts:
    """The four counts of /api/v1."""
    return {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens, "reasoning_tokens": usage.reasoning_tokens}


def utc(seconds: float) -> str:
    """RFC 3339, to the millisecond."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="milliseconds").replace(
        "+00:00", "Z")


def estimate(characters: int) -> int:
    """Tokens of a text whose count nobody told us: 4 characters a token."""
    return (characters + 3) // 4


@dataclass(frozen=True)
class Event:
    """One step of a run."""


@dataclass(frozen=True)
class Init(Event):
    """The CLI is ready. `backend_session_id` is its own name for the conversation."""
    model: str = ""
    backend_session_id: str = ""
    working_dir: str = ""


@dataclass(frozen=True)
class Message(Event):
    """Answer text. `opens`: a new message begins, so what was said before is not part of the final answer."""
    text: str
    is_partial: bool = True
    opens: bool = False


@dataclass(frozen=True)
class Refusal(Event):
    """Why the answer is not what was asked for. No Message comes besides."""
    text: str


@dataclass(frozen=True)
class Thinking(Event):
    """A piece of what the CLI thinks, or with `is_partial` false the whole of it."""
    text: str
    is_partial: bool = True


@dataclass(frozen=True)
class ToolUse(Event):
    """A tool is called."""
    tool_id: str
    tool_name: str
    input: Any


@dataclass(frozen=True)
class ToolResult(Event):
    """What a tool has answered."""
    tool_id: str
    tool_name: str
    output: str
    is_error: bool = False


@dataclass(frozen=True)
class TokenUsage(Event):
    """The counts of the run up to here; the last one holds."""
    usage: Usage


@dataclass(frozen=True)
class Progress(Event):
    """The run goes on: what is waited for."""
    stage: str
    message: str


@dataclass(frozen=True)
class Failure(Event):
    """The run has failed; a Done follows."""
    error: ClinvkError


@dataclass(frozen=True)
class Done(Event):
    """The last event of every run. `exit_code` is 0 only for success, -1 if we ended the run."""
    exit_code: int
    duration_ms: int = 0
    cost_usd: Optional[float] = None
    turn_count: Optional[int] = None
    stop: str = "end"  # end, length, or sequence: a stop sequence of the client's was met
    stop_sequence: Optional[str] = None
    waits: bool = False  # the CLI waits for the next turn of the conversation


def failing(error: ClinvkError, exit_code: int = -1) -> Iterator[Event]:
    """The last events of a run that has failed."""
    yield Failure(error)
    yield Done(exit_code)


class Result:
    """A run's events collected. Text is kept in the pieces it came in: an answer of 10 MB is held once."""

    def __init__(self) -> None:
        self.init = Init()
        self.messages: List[List[str]] = []
        self.refusal: Optional[str] = None
        self.thoughts: List[str] = []
        self.usage: Optional[Usage] = None
        self.failure: Optional[Failure] = None
        self.done = Done(-1)
        self.ended = False

    def add(self, event: Event) -> None:
        if isinstance(event, Message):
            if event.opens or not self.messages:
                self.messages.append([])
            self.messages[-1].append(event.text)
        elif isinstance(event, Thinking):
            self.thoughts.append(event.text)
        elif isinstance(event, Refusal):
            self.refusal = event.text
        elif isinstance(event, TokenUsage):
            self.usage = event.usage
        elif isinstance(event, Init):
            self.init = event
        elif isinstance(event, Failure):
            self.failure = event
        elif isinstance(event, Done):
            self.done, self.ended = event, True

    @property
    def final(self) -> List[str]:
        """The last message, in pieces: /api/v1's `output`."""
        return self.messages[-1] if self.messages else []

    @property
    def text(self) -> str:
        return "".join(self.final)

    @property
    def said(self) -> List[str]:
        """Every message, in pieces, with a blank line between them: what a compat stream sends, too."""
        if len(self.messages) == 1:
            return self.messages[0]
        parts: List[str] = []
        for message in self.messages:
            parts += ([PARAGRAPH] if parts else []) + message
        return parts


class Joined:
    """A run's messages as one text, as a client of the OpenAI and Anthropic APIs gets it: a blank line between them."""

    def __init__(self) -> None:
        self.begun, self.characters = False, 0

    def add(self, message: Message) -> str:
        """What it adds to the text."""
        text = PARAGRAPH + message.text if message.opens and self.begun else message.text
        self.begun, self.characters = True, self.characters + len(text)
        return text


PARAGRAPH = "\n\n"
Events = Generator[Event, None, None]  # a run: closing it ends the run


# ==== Files =======================================================================================
# In: a Config, names. Out: clinvk's own directories, and files that others read or write meanwhile.

def own_directory(config: Config, name: str) -> Path:
    """A directory in clinvk's home; both are made if need be, then for nobody else to read. A home that others share
    stays open to them if it was chosen by CLINVK_HOME."""
    directory = config.home / name
    if not directory.is_dir():
        config.home.parent.mkdir(parents=True, exist_ok=True)
        config.home.mkdir(mode=0o700, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    if not config.environ.get("CLINVK_HOME") and config.home.stat().st_mode & 0o077:
        config.home.chmod(0o700)
    return directory


def link(source: Path, target: Path) -> None:
    """`target` points at `source`, if that exists: a login that the CLI refreshes is refreshed for the user, too."""
    if target.is_symlink() and os.readlink(target) == str(source) and source.exists():
        return
    with contextlib.suppress(FileNotFoundError):
        target.unlink()
    if source.exists():
        with contextlib.suppress(FileExistsError):  # another run was first
            target.symlink_to(source)


def file_stamp(file: Path) -> str:
    """What changes when a file does, or when another takes its place; "nothing" if there is none that we may see."""
    try:
        status = file.stat()
    except OSError:
        return "nothing"
    return f"{os.path.realpath(file)} {status.st_ino} {status.st_mtime_ns} {status.st_size}"


def write_whole(target: Path, text: str) -> None:
    """A file that others read meanwhile has its old text or its new one. Mode 0600."""
    handle, name = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, target)


def scratch_directory(config: Config) -> Path:
    """A new directory for one run. Its name says whose it is, for `sweep`."""
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=own_directory(config, "runs")))


def sweep(config: Config) -> None:
    """Remove the scratch directories of servers that were killed; to be called before there are any of our own."""
    for directory in (config.home / "runs").glob("*-*"):
        owner = directory.name.partition("-")[0]
        if owner.isdigit() and (int(owner) == os.getpid() or not is_alive(int(owner))):  # in a container, ours again
            shutil.rmtree(directory, ignore_errors=True)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# ==== Backends ====================================================================================
# In: a Settled request. Out: a command line, the messages that ask it, and the events in what the CLI prints.

class Command(NamedTuple):
    """What a process is started with. `env` is all of its environment."""
    argv: List[str]
    cwd: str
    env: Dict[str, str]


class Mouth(Protocol):
    """Where a backend says things to its CLI: what a Child is to it."""

    def say(self, message: Json) -> None:
        """Send one JSON line."""

    def say_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""

    def end_of_input(self) -> None:
        """Close its stdin, once everything said has gone out."""


# Runs a command to its end, or until what it prints matches a pattern; what it is to be told goes first.
OutputOf = Callable[[Command, bytes, bytes], bytes]


# What marks or redirects a nested session (BACKENDS, TOOLS B4), or changes a run behind the request's back.
NOT_INHERITED = frozenset("""
    CLAUDECODE CLAUDE_CODE_ENTRYPOINT CLAUDE_CODE_SESSION_ID CLAUDE_CODE_SSE_PORT CLAUDE_CODE_EXECPATH
    CLAUDE_CODE_CHILD_SESSION CLAUDE_CODE_SIMPLE CLAUDE_CODE_SAFE_MODE CLAUDE_CODE_REMOTE
    CLAUDE_CODE_SUBPROCESS_ENV_SCRUB CLAUDE_CODE_EXTRA_BODY CLAUDE_CODE_MAX_OUTPUT_TOKENS CLAUDE_CODE_DISABLE_THINKING
    CLAUDE_CODE_MAX_TURNS IS_SANDBOX ENABLE_TOOL_SEARCH CODEX_SANDBOX CODEX_SANDBOX_NETWORK_DISABLED CODEX_THREAD_ID
    CODEX_CI CODEX_INTERNAL_ORIGINATOR_OVERRIDE GEMINI_CLI GEMINI_CLI_TRUST_WORKSPACE GEMINI_SYSTEM_MD GEMINI_SANDBOX
    SANDBOX""".split())


def child_environ(config: Config, name: str, **more: str) -> Dict[str, str]:
    """The server's environment, less clinvk's own, less what would make a CLI call us back; plus the backend's."""
    def passes(variable: str, value: str) -> bool:
        loops = variable.endswith("_BASE_URL") and is_own_url(value, config)
        tells_a_key = value in config.keys or any(key in value for key in config.keys if len(key) >= UNMISTAKABLE)
        return not (variable.startswith("CLINVK_") or variable in NOT_INHERITED or tells_a_key or loops)
    inherited = {variable: value for variable, value in config.environ.items() if passes(variable, value)}
    return {**inherited, **more, **config.backends[name].env}


UNMISTAKABLE = 8  # characters from which on a key is not found in a text by chance


OWN_HOSTS = re.compile(r"(.+\.)?localhost|ip6-localhost|ip6-loopback|127\.[0-9.]+|0\.0\.0\.0|::1?|::ffff:7f.*")


def is_own_url(url: str, config: Config) -> bool:
    """Whether a URL points at this server: a CLI that took it for its provider would call us back, and so on."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return False
    host = (parts.hostname or "").rstrip(".")
    is_own = host in (config.server.host.lower(), socket.gethostname().lower()) or OWN_HOSTS.fullmatch(host)
    return bool(is_own) and port == config.server.port


def command_of(name: str, config: Config) -> List[str]:
    """The configured program and its first arguments; by default the backend's own name."""
    command = config.backends[name].command
    return [command] if isinstance(command, str) and command else list(command) or [name]


class Installed(NamedTuple):
    """A configured backend whose CLI is there."""
    name: str
    program: List[str]  # absolute, and its first arguments; [] if it needs none
    config: Config
    version: str  # "" until it has been looked up


class Backend:
    """How one CLI is called and read. An instance is the memory of one child.

    A subclass says what must be known at the start (`command`), what is said once before any request (`greet`), how a
    request is asked (`ask`), and what the CLI's output means (`read`, up to one Done). Further facts about its CLI are
    in the attributes below; constants of its own are in capitals."""
    honours: ClassVar[FrozenSet[str]] = frozenset()  # request fields; others that are set come back as `ignored`
    efforts: ClassVar[Container[str]] = ()  # how hard the CLI can be told to think
    extra_flags: ClassVar[Dict[str, bool]] = {}  # what `extra` may hold -> whether a value follows
    has_subcommands: ClassVar[bool] = True  # so that a word on its command line could be one
    streams: ClassVar[Literal["deltas", "messages"]] = "deltas"
    remembers: ClassVar[bool] = True  # whether it can go on with a conversation
    stores_at_exit: ClassVar[bool] = False  # whether a conversation is whole, and free for another process, only then
    can_wait: ClassVar[bool] = False  # whether it can be started ahead of its first request, and has `ask_on`
    shows_images: ClassVar[bool] = False  # to its model
    context_window: ClassVar[int] = 128_000  # tokens that its usual model takes
    noise: ClassVar[str] = ""  # a pattern: lines of stderr that mean nothing
    home_at: ClassVar[Tuple[str, str]] = ("", "")  # what variable names the CLI's own home; else where in HOME it is
    settings_files: ClassVar[Tuple[str, ...]] = ()  # login and settings, in its own home: it reads them at its start
    memory_files: ClassVar[Tuple[str, ...]] = ()  # further ones that it reads there as an agent
    workdir_files: ClassVar[Tuple[str, ...]] = ()  # and those that it reads then in the directory in which it runs

    def __init__(self, cli: Installed) -> None:
        self.name, self.program, self.config, self.cli_version = cli
        self.own_flags = self.config.backends[self.name].extra_flags
        self.started_ahead = False  # of its first request
        self.accepted = False  # the CLI has taken the present turn up: from here on its provider may have been asked
        self.scratch: Optional[Path] = None  # a directory of the run's own

    @staticmethod
    def new_conversation() -> str:
        """A name for one, if the CLI lets us choose it."""
        return ""

    @functools.cached_property
    def user_home(self) -> Path:
        """The CLI's own home, as the CLI itself finds it."""
        variable, directory = self.home_at
        environ = child_environ(self.config, self.name)
        return Path(environ.get(variable) or Path(environ.get("HOME") or Path.home()) / directory)

    @classmethod
    def find(cls, name: str, config: Config) -> Optional[List[str]]:
        """Program (absolute) and first arguments, or None if it is not installed."""
        command = command_of(name, config)
        path = config.backends[name].env.get("PATH") or config.environ.get("PATH") or os.defpath
        found = shutil.which(command[0], path=path)
        return found and [os.path.abspath(found), *command[1:]]  # type: ignore[return-value]

    def ignored(self, request: Settled) -> List[str]:
        """The fields that this request sets and this CLI has no way to do."""
        names = ("model", "approval_mode", "sandbox_mode", "max_tokens", "max_turns", "system_prompt", "allowed_tools",
                 "verbose", "effort", "thinking_tokens")
        shown = {"effort": "reasoning_effort", "thinking_tokens": "thinking"}
        by_way = {"approval_mode", "sandbox_mode", "allowed_tools", "max_turns"} if request.isolated else set()
        given = [n for n in names if getattr(request, n) not in ("", "default", 0, None, False)]
        unable = by_way if not request.effort or request.effort in self.efforts else {*by_way, "effort"}
        return [shown.get(n, n) for n in given if n not in self.honours or n in unable]

    def refuses(self, request: Settled) -> str:
        """Why this CLI can not be given that prompt; "" if it can."""
        if request.images and not self.shows_images:
            return f"has an image, and {self.name} takes text only: leave it out, or ask another backend"
        return "" if request.prompt.strip() or request.images else "must have more than blanks"

    def schema_for(self, schema: Json) -> Optional[Json]:
        """A JSON Schema as the CLI is told of it, to see itself to it that the answer fits. None: it has no way to do
        that with this one, and is told in words."""
        return None

    def plan(self, request: Settled) -> str:
        """What `dry_run` shows: the command line; where it would run, and the variables that are set for it; what it
        would be told. What its answers will name is in angle brackets. Keys are left out."""
        try:
            command, told = self.command(request), Rehearsal()
            self.rehearse(request, told)
        finally:
            Backend.clean_up(self)  # nothing but scratch files: a conversation that is stored has been stored before
        inherited = child_environ(self.config, self.name)
        added = [f"{name}={value}" for name, value in command.env.items() if inherited.get(name) != value]
        about = [f"# in {command.cwd}", *(f"# with {item}" for item in added), "# told:"]
        shown = "\n".join([shlex.join(without_secret_values(command.argv)), *about, told.said.decode()])
        return without_secrets(shown, {**self.config.environ, **self.config.backends[self.name].env})

    def rehearse(self, request: Settled, told: Mouth) -> None:
        """Say all that a run would say."""
        self.greet(told)
        self.ask(request, told)

    def prepare(self, request: Settled, output_of: OutputOf) -> None:
        """What has to be found out, by a CLI of its own, before the command line can be made."""

    def command(self, request: Settled) -> Command:
        raise NotImplementedError

    def greet(self, mouth: Mouth) -> None:
        """Say what comes before any request."""

    def look_ahead(self, request: Settled, mouth: Mouth) -> None:
        """Say what can be said before there is a request, in the hope of one that is like this."""

    def ask(self, request: Settled, mouth: Mouth) -> None:
        raise NotImplementedError

    def ask_on(self, request: Settled, mouth: Mouth) -> None:
        """The next turn of the conversation, in the same process. A backend that can wait has this, and sets `accepted`
        in each turn, before its CLI asks the provider."""
        raise NotImplementedError

    def lasts(self, request: Settled) -> bool:
        """Whether the process that has answered this can take another turn."""
        return True

    def stored_files(self) -> Iterable[Path]:
        """Where the CLI has stored the conversation, if another process can go on with it."""
        return ()

    def stored(self) -> str:
        """What changes when another process goes on with the conversation; "" if none can."""
        return " ".join(map(file_stamp, self.stored_files()))

    def stamps(self, request: Settled) -> Tuple[str, ...]:
        """What changes with what the CLI takes in at its start: the date, its program, login and settings; of an agent,
        also its memory."""
        home = self.user_home if self.home_at[0] else Path()
        files = [Path(word) for word in self.program if os.path.isabs(word)]
        files += [home / name for name in self.settings_files]
        if not request.isolated:
            files += [home / name for name in self.memory_files]
            files += [Path(request.workdir, name) for name in self.workdir_files]
        return (str(datetime.date.today()), *map(file_stamp, files))

    def read(self, data: bytes, mouth: Mouth) -> Iterator[Event]:
        """The events in a piece of stdout. What the CLI asks of us is answered through `mouth`."""
        raise NotImplementedError

    def look(self, mouth: Mouth) -> Iterator[Event]:
        """Called every TICK of silence: a CLI that tells elsewhere that it waits in vain can be ended."""
        return iter(())

    def at_end(self, exit_code: int, stderr: str) -> Iterator[Event]:
        """The last events of a CLI that has gone without a Done."""
        error = self.classified(stderr) or BackendFailed(f"{self.name} ended with exit code {exit_code} before its "
                                                         "answer was complete")
        return failing(error, exit_code or 1)

    def classified(self, stderr: str) -> Optional[ClinvkError]:
        """The error that a CLI's last words mean; None if they say nothing that we know."""
        return None

    def clean_up(self) -> None:
        """Remove what the run has left behind; called once its processes have gone."""
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def forget(self, session_id: str, output_of: OutputOf) -> None:
        """Delete what the CLI has stored of a conversation. Raises ClinvkError or OSError if that fails."""

    @classmethod
    def version_of(cls, name: str, program: List[str], config: Config, output_of: OutputOf) -> str:
        """What the CLI says its version is; "" if it does not say."""
        said = output_of(Command([*program, "--version"], str(config.home), child_environ(config, name)), b"", b"")
        found = re.search(r"\d+\.\d+\.\d+\S*", said.decode(errors="replace"))
        return found.group() if found else ""


class Rehearsal:
    """A Mouth that leads to no CLI."""

    def __init__(self) -> None:
        self.said = b""

    def say(self, message: Json) -> None:
        self.say_bytes(json.dumps(message, ensure_ascii=False).encode(errors="replace") + b"\n")

    def say_bytes(self, data: bytes) -> None:
        self.said += data

    def end_of_input(self) -> None:
        pass


NOT_ALLOWED = "not allowed by the request's approval_mode and sandbox_mode"


def grants_leave(request: Settled) -> bool:
    """Whether a tool that asks for leave gets it."""
    return request.approval_mode == "auto" and request.sandbox_mode != "read-only" and not request.isolated


# ---- What is not shown: secrets, and noise

def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """`text` less the values of the variables whose names say that they are secret."""
    for name, value in environ.items():
        if SECRET.search(name) and len(value) > 7:
            text = text.replace(value, f"<{name}>")
    return text


def without_secret_values(argv: Sequence[str]) -> List[str]:
    """A command line less what speaks of a secret: the rest of such a word, and the value of such a flag."""
    shown = list(argv[:1])
    hides = False  # the word before is such a flag, and this may be its value
    for word in argv[1:]:
        name, assigned, _ = word.partition("=")
        secret, is_flag = bool(SECRET.search(word)), word.startswith("-")
        if hides and not word.startswith("--"):
            shown.append("<secret>")
        elif SECRET_VALUE.search(word):
            shown.append(f"{name}=<secret>" if assigned and re.fullmatch(r"[\w.-]+", name) else "<secret>")
        elif secret and assigned and re.fullmatch(r"[\w.-]+", name):
            shown.append(f"{name}=<secret>")
        else:
            shown.append("<secret>" if secret and not is_flag else word)
        hides = secret and is_flag and not assigned
    return shown


SECRET = re.compile("key|secret|passw|passphrase|credential|token(?!s)|authorization|(^|_)pat$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]+@|\b(bearer|basic) ", re.IGNORECASE)


def secrets_in(config: Config) -> List[str]:
    """The keys of the config file that seem to hold a secret."""
    found = []
    for name, backend in config.backends.items():
        found += [f"backends.{name}.env.{variable}" for variable, value in backend.env.items()
                  if SECRET.search(variable) or SECRET_VALUE.search(value)]
        for key, words in (("command", command_of(name, config)), ("extra_flags", [name, *backend.extra_flags])):
            if without_secret_values(words) != words:
                found.append(f"backends.{name}.{key}")
    return found


def quiet(stderr: str, noise: str) -> str:
    """What a CLI wrote to stderr, less the lines that it always writes."""
    lines = [line for line in re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", stderr).splitlines()
             if line.strip() and not (noise and re.search(noise, line))]
    return "\n".join(lines)[-4000:]


# ---- Lines of JSON

class Lines:
    """Bytes in the pieces they are read in -> whole lines.

    An answer of 10 MB comes three times from claude: in deltas, whole, and in the result. `repeats` is asked about the
    head of a line that grows over LONG: if that only says again what is known, its long string is dropped unread."""
    LONG = 128 * 1024
    INSIDE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)

    def __init__(self, repeats: Callable[[bytes], bool]) -> None:
        self.repeats = repeats
        self.start()

    def start(self) -> None:
        """A new line."""
        self.line, self.look_at = bytearray(), self.LONG
        self.dropping, self.carry = False, b""  # inside a dropped string; the escape that the last piece broke off in

    def feed(self, data: bytes) -> Iterator[bytes]:
        *whole, rest = data.split(b"\n")
        for part in whole:
            self.add(part)
            line = bytes(self.line)
            self.start()
            if line.strip():
                yield line
        self.add(rest)

    def add(self, part: bytes) -> None:
        self.line += self.after_string(part) if self.dropping else part
        if len(self.line) > self.look_at:
            self.look_at = 2 * len(self.line)
            if self.repeats(bytes(self.line[:400])):
                self.drop()

    def drop(self) -> None:
        """Empty the string in which the line so far ends, and drop the rest of it as it comes."""
        opened = self.line.find(b'"')
        while opened >= 0:
            closed = self.end_of_inside(self.line, opened + 1)
            if self.line[closed:closed + 1] != b'"':
                break
            opened = self.line.find(b'"', closed + 1)
        if opened >= 0:
            inside = bytes(self.line[opened + 1:])
            del self.line[opened + 1:]
            self.dropping, self.look_at = True, self.LONG
            self.line += self.after_string(inside)

    def end_of_inside(self, text: Union[bytes, bytearray], begin: int) -> int:
        """Where what is in a string's quotes ends: at the closing one, at an escape that is broken off, or the end."""
        return self.INSIDE.match(text, begin).end()  # type: ignore[union-attr]  # it matches anything

    def after_string(self, part: bytes) -> bytes:
        """What follows the string that is being dropped, from its closing quote on; b"" if it goes on."""
        part = self.carry + part
        rest = part[self.end_of_inside(part, 0):]
        self.dropping = not rest.startswith(b'"')
        self.carry = rest if self.dropping else b""
        return b"" if self.dropping else rest


class JsonLines(Backend):
    """A CLI that prints one JSON object a line."""

    def __init__(self, cli: Installed) -> None:
        super().__init__(cli)
        self.lines = Lines(self.repeats)

    def read(self, data: bytes, mouth: Mouth) -> Iterator[Event]:
        for line in self.lines.feed(data):
            try:
                message = self.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):
                LOG.warning("%s printed a line that is no JSON (%d bytes)", self.name, len(line))
                self.not_json(line)
                continue
            if isinstance(message, dict):
                yield from self.read_message(message, mouth)

    @staticmethod
    def loads(line: str) -> Any:
        """JSON, made of whole characters: half of a surrogate pair, which no database and no client takes, is replaced
        as bytes are that are no UTF-8. Node writes it so where a text has been cut in the middle of an emoji."""
        message = json.loads(line)
        if "\\ud" not in line and "\\uD" not in line:
            return message
        written = json.dumps(message, ensure_ascii=False).encode("utf-16", "surrogatepass")
        return json.loads(written.decode("utf-16", "replace"))

    def read_message(self, message: Json, mouth: Mouth) -> Iterator[Event]:
        """A line that a newer CLI has changed costs an event, never the answer; unless nothing can follow it."""
        try:
            yield from self.parse_line(message, mouth)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            kind = str(message.get("type") or message.get("method"))[:80]
            LOG.warning("%s %s: a message of type %a is not understood (%s)", self.name, self.cli_version, kind,
                        type(error).__name__)
            if self.is_decisive(message):
                yield from failing(BackendFailed(
                    f"{self.name} {self.cli_version} says what clinvk {__version__} does not understand (in its "
                    f"message {kind}); is there a newer clinvk?"), 1)

    def is_decisive(self, message: Json) -> bool:
        """Whether the run hangs on this message: nothing will follow it by itself."""
        raise NotImplementedError

    def not_json(self, line: bytes) -> None:
        """A line that is part of no answer; a CLI that asks for a login there is ended by raising BackendAuth."""

    def repeats(self, head: bytes) -> bool:
        """Whether a long line, of which this is the head, only says again what is known."""
        return False

    def parse_line(self, message: Json, mouth: Mouth) -> Iterator[Event]:
        """One message of the CLI -> 0 or more events. An unknown type gives none: newer CLIs add types."""
        raise NotImplementedError


class Spoken:
    """The answer text of a CLI that has gone out, so that nothing is sent twice: neither a text that comes in deltas
    and then as a whole, nor one that the CLI says again because its provider's stream broke."""

    def __init__(self) -> None:
        self.sent: List[str] = []  # of the present part: a block of claude's, an item of codex's
        self.again = ""  # what has gone out and is now to be said once more
        self.opens = True  # the next text begins a new message
        self.nothing_yet = True

    def begins(self, *, message: bool) -> None:
        """A new part, or a new message; unless the present one is being said again."""
        if not self.again:
            self.sent = []
            self.opens = self.opens or message

    def breaks(self) -> None:
        """What has gone out of the present part will come once more."""
        self.again = "".join(self.sent)

    def says(self, text: str, *, is_partial: bool = True) -> Iterator[Event]:
        """Raises BackendFailed if a repetition says something else: what has been sent can not be taken back."""
        common = min(len(text), len(self.again))
        if text[:common] != self.again[:common]:
            raise BackendFailed("the provider's stream broke, and another answer then began; ask again")
        self.again, text = self.again[common:], text[common:]
        if text:
            self.sent.append(text)
            yield Message(text, is_partial=is_partial, opens=self.opens)
            self.opens = self.nothing_yet = False

    def ends(self, whole: str) -> Iterator[Event]:
        """The present part as a whole: what of it has not gone out is said now. "" if it was dropped as known."""
        if self.sent and not whole:
            return
        self.breaks()
        yield from self.says(whole, is_partial=False)


def usage_of(read: Callable[[Any], Optional[Usage]], counts: Any) -> Iterator[Event]:
    """The counts that a CLI tells, if they are as `read` knows them: an answer does not hang on them."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        usage = read(counts)
        if usage and all(isinstance(count, int) for count in vars(usage).values()):
            yield TokenUsage(usage)


# ---- claude

class Claude(JsonLines):
    """claude 2.1.197 and 2.1.331, stream-json both ways (PROTOCOLS 3).

    The model is named at the start, and to a process that has waited as that of the AGENT it was started with:
    `set_model` would put text into the prompt (2.1.197) or ask the provider once more (2.1.331). stdin stays open until
    the result: 2.1.197 loses the end of a long answer at an early EOF."""
    honours = frozenset({"model", "approval_mode", "sandbox_mode", "max_tokens", "max_turns", "system_prompt",
                         "allowed_tools", "effort", "thinking_tokens"})
    extra_flags = {"--effort": True, "--max-budget-usd": True, "--disallowedTools": True, "--disallowed-tools": True,
                   "--betas": True, "--exclude-dynamic-system-prompt-sections": False}
    efforts: ClassVar[Dict[str, str]] = {"none": "", "minimal": "low", "low": "low", "medium": "medium",
                                         "high": "high", "xhigh": "xhigh", "max": "max"}
    stores_at_exit = True
    can_wait = True
    shows_images = True
    context_window = 200_000
    noise = r"^\[claude-code:|no stdin data received"
    home_at = ("CLAUDE_CONFIG_DIR", ".claude")
    settings_files = (".credentials.json", "settings.json")
    memory_files = ("CLAUDE.md",)
    workdir_files = ("CLAUDE.md", "CLAUDE.local.md", ".mcp.json", ".claude/CLAUDE.md", ".claude/settings.json",
                     ".claude/settings.local.json")
    LINE = ("-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose",
            "--include-partial-messages", "--permission-prompt-tool", "stdio")
    ISOLATED = ("--safe-mode", "--strict-mcp-config", "--tools", "", "--disable-slash-commands")
    PERMISSION = {"default": "default", "auto": "acceptEdits", "none": "dontAsk", "always": "default"}
    # Tokens, for the models that know no effort: 4.5 and before. The others take notice of the 0 only.
    THINKING: ClassVar[Dict[str, int]] = {"none": 0, "minimal": 1024, "low": 2048, "medium": 8192, "high": 31999,
                                          "xhigh": 31999, "max": 31999}
    AGENT = "clinvk-9e41"  # nobody's own: it would be taken in place of ours
    RETRIES_OF_429 = 2  # about 4 s; after that the provider means it
    SCHEMA_TOOL = "StructuredOutput"  # claude's own, which its model calls with the answer
    SCHEMA_UNMET = "error_max_structured_output_retries"  # the result, if it has not done that well in five tries
    # What its strict validator knows. With any other word in a schema the tool is silently not there.
    SCHEMA_WORDS = frozenset("""
        type enum const properties required additionalProperties patternProperties propertyNames minProperties
        maxProperties items additionalItems contains minItems maxItems uniqueItems minLength maxLength pattern minimum
        maximum exclusiveMinimum exclusiveMaximum multipleOf allOf anyOf oneOf not if then else dependencies $ref $defs
        definitions title description default examples""".split())

    def __init__(self, cli: Installed) -> None:
        super().__init__(cli)
        self.grants = False  # whether tools that ask are allowed
        self.model = ""
        self.message_id = ""
        self.streaming = False  # inside of a message that comes in deltas
        self.spoken = Spoken()
        self.stop = "end"
        self.blamed = ""  # the kind of error that an <synthetic> message named
        self.resets_at: Optional[float] = None  # when a usage limit ends, seconds since the epoch
        self.tools: Dict[str, str] = {}  # id -> name
        self.before: Json = {}  # the result of the turn before
        self.session_id = ""
        self.has_hooks = False  # which may take their time before the turn begins
        self.has_schema = False  # so that the answer is in the result

    def lasts(self, request: Settled) -> bool:
        """A budget is the process's own."""
        return not any(word.startswith("--max-budget") for word in [*self.own_flags, *request.extra])

    def schema_for(self, schema: Json) -> Optional[Json]:
        """An object's, as far as claude knows its words: clinvk looks at the answer, too."""
        known = with_words(schema, self.SCHEMA_WORDS)
        whole = not any(JsonSchema(known).faults())  # a `$ref` may lead to what claude does not know
        return known if isinstance(known, dict) and known.get("type") == "object" and whole else None

    def stored_files(self) -> Iterable[Path]:
        return self.transcripts(self.session_id)

    def command(self, request: Settled) -> Command:
        limits = {} if self.started_ahead else self.limits(request)
        env = child_environ(self.config, self.name, CLAUDE_CODE_DISABLE_ATTACHMENTS="1", **limits)
        goes_on = not request.begins or self.transcripts(request.resume)
        argv = [*self.program, *self.LINE, *([] if request.keeps else ["--no-session-persistence"]),
                *(["--agent", self.AGENT] if self.started_ahead else option("--model", request.model)),
                *option("--resume" if goes_on else "--session-id", request.resume)]
        if request.isolated:
            argv += self.ISOLATED
        else:
            argv += ["--permission-mode", self.permission_mode(request), *option("--max-turns", request.max_turns),
                     *option("--allowedTools", request.allowed_tools)]
        return Command([*argv, *self.own_flags, *request.extra], request.workdir, env)

    def limits(self, request: Settled) -> Dict[str, str]:
        """Variables, for a process or for a turn. Thinking could take all of the tokens, before any answer."""
        if not request.max_tokens:
            return {}
        thinks = not request.isolated or request.effort not in ("", "none") or request.thinking_tokens
        return {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(request.max_tokens),
                **({} if thinks else {"CLAUDE_CODE_DISABLE_THINKING": "1"})}

    @staticmethod
    def new_conversation() -> str:
        return str(uuid.uuid4())

    def transcripts(self, session_id: str) -> List[Path]:
        """Where claude has stored a conversation; none, or one."""
        return list(self.user_home.glob(f"projects/*/{session_id}.jsonl"))

    def permission_mode(self, request: Settled) -> str:
        by_sandbox = {"read-only": "plan", "full": "bypassPermissions"}
        return by_sandbox.get(request.sandbox_mode) or self.PERMISSION[request.approval_mode]

    def greet(self, mouth: Mouth) -> None:
        """One that is started ahead is to say when it is there."""
        if self.started_ahead:
            mouth.say(control("apply_flag_settings", settings={}))

    def ask(self, request: Settled, mouth: Mouth) -> None:
        self.grants, self.has_schema = grants_leave(request), request.schema is not None
        first: Json = {}
        if request.isolated or request.system_prompt:
            first["systemPrompt" if request.isolated else "appendSystemPrompt"] = request.system_prompt
        if request.schema is not None:
            first["jsonSchema"] = request.schema
        if request.keeps:  # else 2.1.331 takes system prompt and tools from the first turn, whatever a later one says
            first["systemPromptSnapshot"] = False
        if self.started_ahead and request.model:
            # A list is an empty system prompt, which that of the agent does not replace.
            first["systemPrompt"] = request.system_prompt or []
            first["agents"] = {self.AGENT: {"description": "-", "prompt": "-", "model": request.model}}
        if first:
            mouth.say(control("initialize", **first))
        settings: Json = {"env": self.limits(request)} if self.started_ahead and request.max_tokens else {}
        if self.efforts.get(request.effort):
            settings["effortLevel"] = self.efforts[request.effort]
        if settings:
            mouth.say(control("apply_flag_settings", settings=settings))
        thinking = request.thinking_tokens
        if thinking is None:
            thinking = self.THINKING.get(request.effort)
        if thinking is not None:
            mouth.say(control("set_max_thinking_tokens", max_thinking_tokens=thinking))
        self.say_prompt(request, mouth)

    def ask_on(self, request: Settled, mouth: Mouth) -> None:
        self.spoken, self.stop, self.blamed = Spoken(), "end", ""
        self.has_hooks = not request.isolated
        if self.has_hooks:
            mouth.say(control("apply_flag_settings", settings={}))
        self.say_prompt(request, mouth)

    def say_prompt(self, request: Settled, mouth: Mouth) -> None:
        """Only the last block is looked at for a slash command, and an empty one is not sent on: so `/cost`, too, is a
        prompt, to the letter."""
        blocks = [*map(claude_block, request.parts), {"type": "text", "text": ""}]
        mouth.say({"type": "user", "message": {"role": "user", "content": blocks}})

    def repeats(self, head: bytes) -> bool:
        """The whole message that has just been streamed, and the result (2.1.331 names its type at the end only)."""
        whole = b'"type":"assistant"' in head and self.message_id.encode() in head and b'[{"type":"text"' in head
        result = not self.has_schema and head.startswith((b'{"type":"result"', b'{"duration_api_ms"'))
        return bool(self.spoken.sent) and (whole or result)

    def is_decisive(self, message: Json) -> bool:
        return message.get("type") == "result"

    def ignored(self, request: Settled) -> List[str]:
        """claude has one mode for approval and sandbox: read-only and full leave no choice, workspace has no place."""
        names = super().ignored(request)
        if not request.isolated and request.sandbox_mode == "workspace":
            names.append("sandbox_mode")
        elif not request.isolated and request.sandbox_mode != "default" and request.approval_mode != "default":
            names.append("approval_mode")
        return names

    def parse_line(self, message: Json, mouth: Mouth) -> Iterator[Event]:
        kind = message.get("type")
        if kind == "stream_event" and not message.get("parent_tool_use_id"):
            yield from self.parse_delta(message["event"])
            if "abandoned_blocks" in message:
                self.spoken.breaks()
        elif kind == "assistant":
            yield from self.parse_whole(message)
        elif kind == "user":
            yield from self.parse_tool_results(message["message"]["content"])
        elif kind == "system":
            yield from self.parse_system(message)
        elif kind == "rate_limit_event" and message["rate_limit_info"].get("status") == "rejected":
            self.resets_at = message["rate_limit_info"].get("resetsAt")
        elif kind == "control_request":
            mouth.say(self.permission(message))
        elif kind == "control_response" and self.has_hooks:
            self.accepted = True
        elif kind == "result":
            yield from self.parse_result(message)

    def parse_delta(self, event: Json) -> Iterator[Event]:
        """One of the provider's own stream events."""
        if event["type"] == "message_start":
            self.message_id, self.streaming = event["message"]["id"], True
            self.spoken.begins(message=True)
        elif event["type"] == "content_block_start":
            self.spoken.begins(message=False)
        elif event["type"] == "message_delta":
            self.streaming = False
            self.stop = "length" if event["delta"].get("stop_reason") == "max_tokens" else "end"
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "text_delta" and delta["text"]:
                yield from self.spoken.says(delta["text"])
            elif delta["type"] == "thinking_delta" and delta["thinking"]:
                yield Thinking(delta["thinking"])

    def parse_whole(self, message: Json) -> Iterator[Event]:
        """A message as a whole: its text has gone out already, unless the stream broke."""
        whole = message["message"]
        if whole.get("model") == "<synthetic>":
            self.blamed = message.get("error") or self.blamed
            return
        for block in whole["content"]:
            if block["type"] == "tool_use":
                self.tools[block["id"]] = block["name"]
                if block["name"] == self.SCHEMA_TOOL:  # the answer
                    continue
                yield ToolUse(block["id"], block["name"], block["input"])
            elif block["type"] == "text" and not message.get("parent_tool_use_id"):
                yield from self.whole_text(block["text"], whole["id"])

    def whole_text(self, text: str, message_id: str) -> Iterator[Event]:
        """A text block as a whole: of the streamed message, of one in its place since the stream broke, or its own."""
        if self.streaming or self.spoken.again:
            self.streaming = message_id == self.message_id
            yield from self.spoken.ends(text)
        else:
            self.spoken.begins(message=message_id != self.message_id)
            yield from self.spoken.says(text, is_partial=False)
        self.message_id = message_id

    def parse_tool_results(self, content: Any) -> Iterator[Event]:
        for block in content if isinstance(content, list) else []:
            name = self.tools.get(block.get("tool_use_id"), "")
            if block["type"] == "tool_result" and name != self.SCHEMA_TOOL:
                yield ToolResult(block["tool_use_id"], name, plain(block.get("content")),
                                 is_error=bool(block.get("is_error")))

    def parse_system(self, message: Json) -> Iterator[Event]:
        if message["subtype"] == "init":
            self.model, self.accepted = message.get("model", ""), True
            self.session_id = message.get("session_id", "")
            yield Init(self.model, self.session_id, message.get("cwd", ""))
        elif message["subtype"] == "api_retry":
            status, delay = message.get("error_status"), message["retry_delay_ms"] / 1000
            yield Progress("retrying", f"the provider said {status or 'nothing'}; claude tries again in {delay:.1f} s")
            if status in (401, 403):
                raise self.error(status, f"the provider refuses claude's login ({status})")
            if status == 429 and (message["attempt"] > self.RETRIES_OF_429 or delay > 5):
                raise self.error(429, "claude's provider says 429, too many requests", retry_after=delay)

    def parse_result(self, message: Json) -> Iterator[Event]:
        text = message.get("result") or "; ".join(message.get("errors") or []) or str(message.get("subtype"))
        own, self.before = own_result(message, self.before), message
        yield from usage_of(claude_usage, own)
        spoken, self.spoken = self.spoken, Spoken()
        if "structured_output" in message:
            yield Message(json.dumps(message["structured_output"], ensure_ascii=False), opens=True)
        elif spoken.nothing_yet and message.get("result") and message.get("num_turns") and not message.get("is_error"):
            yield Message(text, opens=True)  # the model has answered in a way that is not understood
        broken = message.get("stop_reason") is None and not claude_models(own) and message.get("num_turns")
        failed = bool(message.get("is_error"))
        if message.get("subtype") == self.SCHEMA_UNMET:
            yield Refusal(text)
        elif failed:
            yield Failure(self.error(message.get("api_error_status"), text))
        elif broken:
            failed = True
            yield Failure(BackendFailed("the provider's stream ended before the answer was complete; ask again"))
        yield Done(1 if failed else 0, cost_usd=claude_cost(own), turn_count=message.get("num_turns"),
                   stop=self.stop)

    def error(self, status: Optional[int], text: str, retry_after: Optional[float] = None) -> ClinvkError:
        """What a failed result, or the kind of error that was named before it, means to a client."""
        if status in (401, 403) or self.blamed == "authentication_failed":
            return BackendAuth(f"claude is not logged in ({text}). Run claude and use /login, or set ANTHROPIC_API_KEY")
        if text.startswith("No conversation found"):
            return forgotten("claude")
        if status == 429 or self.blamed == "rate_limit":
            return rate_limited(text, self.resets_at - time.time() if self.resets_at else retry_after)
        if self.blamed == "model_not_found":
            return UnknownModel(f"claude: {text}")
        return BackendFailed(f"claude failed: {text}")

    def classified(self, stderr: str) -> Optional[ClinvkError]:
        return self.error(401, "it asks for a login") if "Please run /login" in stderr else None

    def forget(self, session_id: str, output_of: OutputOf) -> None:
        for transcript in self.transcripts(session_id):
            transcript.unlink()
            shutil.rmtree(transcript.with_suffix(""), ignore_errors=True)  # of its subagents, if there were any
        shutil.rmtree(self.user_home / "session-env" / session_id, ignore_errors=True)

    def permission(self, message: Json) -> Json:
        """The answer to what claude asks of us: leave for a tool, as the approval mode says; all else is refused."""
        asked, request_id = message["request"], message["request_id"]
        if asked.get("subtype") != "can_use_tool":
            return {"type": "control_response", "response": {"subtype": "error", "request_id": request_id,
                                                             "error": "not supported by clinvk"}}
        answer = {"behavior": "allow", "updatedInput": asked.get("input", {})} if self.grants else {
            "behavior": "deny", "message": NOT_ALLOWED}
        return {"type": "control_response", "response": {"subtype": "success", "request_id": request_id,
                                                         "response": answer}}


def control(subtype: str, **fields: Any) -> Json:
    """A control request of claude's stream-json."""
    return {"type": "control_request", "request_id": f"clinvk-{subtype}", "request": {"subtype": subtype, **fields}}


def claude_block(part: Union[str, Image]) -> Json:
    """A part of a prompt, as Anthropic's API has it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "source": {"type": "base64", "media_type": part.media_type, "data": part.data}}


def option(flag: str, value: Any) -> List[str]:
    """A flag and its value, if there is one."""
    return [flag, str(value)] if value else []


def plain(content: Any) -> str:
    """The text of a tool's result: a string, or blocks."""
    if isinstance(content, list):
        return "\n".join(block.get("text", f"[{block.get('type')}]") for block in content)
    return content if isinstance(content, str) else ""


def claude_usage(result: Json) -> Optional[Usage]:
    """A turn's counts. After a broken stream `usage` is all 0, while those by model are right."""
    usage = result.get("usage") or {}
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    counts = [usage.get(name) or 0 for name in names]
    if not any(counts):
        twins = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")
        counts = [sum(model.get(name) or 0 for model in claude_models(result)) for name in twins]
    fresh, output, cached, created = counts
    thinking = (usage.get("output_tokens_details") or {}).get("thinking_tokens") or 0
    return Usage(fresh, output, cached, created, thinking, cache_inside=False) if any(counts) else None


def own_result(result: Json, before: Json) -> Json:
    """A turn's result less those of the turns before it in the same process: `modelUsage` and `total_cost_usd` run on.
    2.1.331, where they run on over the conversation, tells the turn's own besides. What is not as we know it stays."""
    own = dict(result)
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        if result.get("model_usage_since_last_result") is None and before:
            sums = before["modelUsage"]
            counts = {name: {key: value - sums.get(name, {}).get(key, 0) for key, value in model.items()
                             if isinstance(value, (int, float))} for name, model in result["modelUsage"].items()}
            own["modelUsage"] = {name: model for name, model in counts.items() if model.get("outputTokens")}
            own["total_cost_usd"] = result["total_cost_usd"] - before["total_cost_usd"]
    return own


def claude_models(result: Json) -> List[Json]:
    """A turn's counts by model. Those of `modelUsage`, and `total_cost_usd`, run on over the turns of a process; since
    2.1.331 over those of a conversation, and what is the turn's own stands beside them."""
    own = result.get("model_usage_since_last_result")
    counts = result.get("modelUsage") if own is None else own
    return list(counts.values()) if isinstance(counts, dict) else []


def claude_cost(result: Json) -> Optional[float]:
    """A turn's own, in USD; None if it is not known, or no number."""
    cost = result.get("total_cost_usd")
    with contextlib.suppress(TypeError, AttributeError):
        if cost is not None and result.get("model_usage_since_last_result") is not None:
            cost = sum(model.get("costUSD") or 0 for model in claude_models(result))
        return float(cost) if math.isfinite(cost) else None  # type: ignore[arg-type]
    return None


def forgotten(backend: str) -> Forgotten:
    return Forgotten(f"{backend} has lost the conversation of this session, whose file was deleted: begin another "
                     "session, and say in it what it must know")


def rate_limited(message: str, retry_after: Optional[float]) -> RateLimited:
    return RateLimited(f"{message}. Try again later", retry_after=30 if retry_after is None else retry_after)


# ---- JSON-RPC, which codex and gemini share

class JsonRpc(JsonLines):
    """Calls and notifications, both ways, one a line. `call` is followed by `then` when its reply comes."""
    version_field: ClassVar[Json] = {}  # what every message carries
    REHEARSED: ClassVar[Json] = {"thread": {"id": "<thread>"}, "turn": {"id": "<turn>"}, "sessionId": "<session>"}

    def __init__(self, cli: Installed) -> None:
        super().__init__(cli)
        self.replies: Dict[int, Callable[[Json, Mouth], Iterator[Event]]] = {}
        self.calls = 0

    def call(self, mouth: Mouth, method: str, params: Json, then: Callable[[Json, Mouth], Iterator[Event]]) -> None:
        self.calls += 1
        self.replies[self.calls] = then
        mouth.say({**self.version_field, "id": self.calls, "method": method, "params": params})

    def notify(self, mouth: Mouth, method: str) -> None:
        mouth.say({**self.version_field, "method": method})

    def rehearse(self, request: Settled, told: Mouth) -> None:
        """With replies as the CLI would give them, as far as a next call hangs on them."""
        super().rehearse(request, told)
        while self.replies:
            then = self.replies.pop(min(self.replies))
            for _ in then(self.REHEARSED, told):
                pass

    def parse_line(self, message: Json, mouth: Mouth) -> Iterator[Event]:
        if "method" in message and "id" in message:
            yield from self.shown(message["method"], message.get("params") or {})
            answer = self.asked(message["method"], message.get("params") or {})
            mouth.say({**self.version_field, "id": message["id"], **answer})
        elif "method" in message:
            yield from self.notified(message["method"], message.get("params") or {}, mouth)
        elif message.get("id") in self.replies:
            then = self.replies.pop(message["id"])
            if "error" in message:
                yield from failing(self.rpc_error(message["error"]), 1)
            else:
                yield from then(message.get("result") or {}, mouth)

    def asked(self, method: str, params: Json) -> Json:
        """The `result` or `error` for what the CLI asks of us."""
        return {"error": {"code": -32601, "message": "not supported by clinvk"}}

    def shown(self, method: str, params: Json) -> Iterator[Event]:
        """The events in what the CLI asks of us."""
        return iter(())

    def is_decisive(self, message: Json) -> bool:
        """A reply: each call is a step on the way to the answer."""
        return "method" not in message

    def notified(self, method: str, params: Json, mouth: Mouth) -> Iterator[Event]:
        """The events in a notification."""
        raise NotImplementedError

    def rpc_error(self, error: Json) -> ClinvkError:
        """What a call that failed means to a client."""
        raise NotImplementedError

    def nothing(self, reply: Json, mouth: Mouth) -> Iterator[Event]:
        """For a reply that needs nothing done."""
        return iter(())


# ---- codex

class Codex(JsonRpc):
    """codex-cli 0.169.0, app-server (PROTOCOLS 4).

    The model way has a CODEX_HOME of clinvk's own, for AGENTS.md in the user's can not be switched off: its config.toml
    is ISOLATED and the user's KEPT keys, its auth.json a link to the user's."""
    honours = frozenset({"model", "approval_mode", "sandbox_mode", "system_prompt", "effort"})
    efforts = frozenset({"none", "minimal", "low", "medium", "high", "xhigh"})
    stores_at_exit = True
    can_wait = True
    shows_images = True
    context_window = 258_400
    noise = r"WARNING: proceeding|could not (create|update) PATH|Reading prompt from stdin|could not find bubblewrap"
    home_at = ("CODEX_HOME", ".codex")
    settings_files = ("auth.json", "config.toml")
    memory_files = ("AGENTS.md",)
    workdir_files = ("AGENTS.md", ".codex/config.toml")
    SANDBOX = {"read-only": "read-only", "workspace": "workspace-write", "full": "danger-full-access"}
    LONGEST = 1_048_576  # characters of a prompt
    REPLY = rb'(?m)^\{("id":2,.*|"error":.*,"id":2)\}$\n'  # to a second call
    KEPT = ("model", "model_provider", "model_providers", "openai_base_url", "chatgpt_base_url",
            "cli_auth_credentials_store", "forced_login_method", "forced_chatgpt_workspace_id",
            "model_reasoning_effort", "model_reasoning_summary", "model_verbosity", "model_context_window",
            "service_tier")
    ISOLATED: ClassVar[Json] = {
        "web_search": "disabled", "project_doc_max_bytes": 0, "include_permissions_instructions": False,
        "include_environment_context": False, "include_apps_instructions": False,
        "include_collaboration_mode_instructions": False,
        "tools": {"experimental_request_user_input": {"enabled": False}},
        "skills": {"include_instructions": False, "bundled": {"enabled": False}},
        "agents": {"enabled": False}, "analytics": {"enabled": False},
        "features": dict.fromkeys(
            ("shell_tool", "unified_exec", "view_image", "multi_agent_v2", "goals", "image_generation", "apps",
             "plugins", "hooks", "tool_suggest", "sleep_tool", "shell_snapshot", "skill_search", "browser_use",
             "computer_use", "in_app_browser"), False)}

    def __init__(self, cli: Installed) -> None:
        super().__init__(cli)
        self.spoken = Spoken()
        self.turn_id = ""
        self.counts: Json = {}  # of tokens, in the whole thread
        self.counts_before: Json = {}  # those of its earlier turns
        self.default_sandbox = "<that of the config>"  # looked up only if a thread would keep another one
        self.resets_at: Optional[float] = None
        self.tools: Set[str] = set()  # items that have been shown as a ToolUse
        self.thread_id = ""
        self.begun: Optional[Init] = None  # what is told of the thread in a later turn
        self.ahead: Tuple[int, Json] = (0, {})  # the thread/start that was said ahead: its number (0: none), its params

    @classmethod
    def find(cls, name: str, config: Config) -> Optional[List[str]]:
        """The native binary behind npm's wrapper, which takes 0.1 s to find it, too."""
        found = super().find(name, config)
        return found and [native_codex(found[0]), *found[1:]]

    def refuses(self, request: Settled) -> str:
        if len(request.prompt) > self.LONGEST:
            return f"has {len(request.prompt)} characters; codex takes {self.LONGEST} at most"
        return super().refuses(request)

    def schema_for(self, schema: Json) -> Optional[Json]:
        """codex asks for OpenAI's strict mode, which refuses any other one."""
        return schema if is_strict(schema) else None

    def ignored(self, request: Settled) -> List[str]:
        """A thread keeps the instructions that it began with."""
        another = request.resume and request.system_prompt and not request.same_system_prompt
        return super().ignored(request) + (["system_prompt"] if another else [])

    def prepare(self, request: Settled, output_of: OutputOf) -> None:
        """Bring clinvk's own CODEX_HOME up to date with the user's, which codex itself reads to us when it changed."""
        if not request.isolated:
            if self.keeps_sandbox(request):
                self.default_sandbox = self.configured_sandbox(request, output_of)
            return
        own, users = own_directory(self.config, "codex"), self.user_home
        link(users / "auth.json", own / "auth.json")
        stamp = f"# from {file_stamp(users / 'config.toml')}, clinvk {__version__}, {shlex.join(self.program)}\n"
        target = own / "config.toml"
        if not target.exists() or not target.read_text(encoding="utf-8").startswith(stamp):
            kept = self.user_settings(request, output_of) if (users / "config.toml").exists() else {}
            lines = [f"{toml(key)} = {toml(value)}\n" for key, value in {**self.ISOLATED, **kept}.items()]
            write_whole(target, stamp + "".join(lines))

    def keeps_sandbox(self, request: Settled) -> bool:
        """Whether a thread would go on in the sandbox of an earlier turn, though this one names none."""
        return bool(request.resume and request.sandbox_before) and request.sandbox_mode not in self.SANDBOX

    def configured_sandbox(self, request: Settled, output_of: OutputOf) -> str:
        """What a new thread would get in that directory."""
        asked = {"includeLayers": False, "cwd": request.workdir}
        config = self.answer_to("config/read", asked, request.workdir, output_of)["config"]
        known = set(self.projects(request.workdir)) & set(config.get("projects") or {})
        return config.get("sandbox_mode") or ("workspace-write" if known else "read-only")

    def user_settings(self, request: Settled, output_of: OutputOf) -> Json:
        """The KEPT keys of the user's config, as codex understands it."""
        asked = {"includeLayers": True, "cwd": request.workdir}
        told = self.answer_to("config/read", asked, request.workdir, output_of)
        settings: Json = {}
        for layer in reversed(told["layers"]):
            if layer["name"]["type"] != "project":
                settings.update(layer["config"])
        settings.update((settings.get("profiles") or {}).get(settings.get("profile")) or {})
        return {key: settings[key] for key in self.KEPT if key in settings}

    def answer_to(self, method: str, params: Json, cwd: str, output_of: OutputOf) -> Json:
        """The result of one call, which an app-server of its own answers. Raises BackendFailed if it does not."""
        said = [{"id": 1, "method": "initialize", "params": CODEX_CLIENT}, {"method": "initialized"},
                {"id": 2, "method": method, "params": params}]
        command = Command([*self.program, "app-server"], cwd, child_environ(self.config, self.name))
        told = output_of(command, b"".join(json.dumps(message).encode() + b"\n" for message in said), self.REPLY)
        found = re.search(self.REPLY, told)
        reply = json.loads(found.group()) if found else {"error": {"message": "it did not answer"}}
        if "error" in reply:
            raise BackendFailed(f"codex does not do {method}: {reply['error'].get('message', '')}")
        return cast(Json, reply["result"])

    def forget(self, session_id: str, output_of: OutputOf) -> None:
        try:
            self.answer_to("thread/delete", {"threadId": session_id}, str(self.config.home), output_of)
        except BackendFailed as error:
            if "no rollout found" not in str(error):  # it is not there any more
                raise

    def command(self, request: Settled) -> Command:
        env = child_environ(self.config, self.name)
        if request.isolated:
            env["CODEX_HOME"] = str(own_directory(self.config, "codex"))
        return Command([*self.program, *self.own_flags, *request.extra, "app-server"], request.workdir, env)

    def greet(self, mouth: Mouth) -> None:
        self.call(mouth, "initialize", CODEX_CLIENT, self.nothing)
        self.notify(mouth, "initialized")

    def stored_files(self) -> Iterable[Path]:
        return self.user_home.glob(f"sessions/*/*/*/rollout-*{self.thread_id}.jsonl")

    def look_ahead(self, request: Settled, mouth: Mouth) -> None:
        """The thread costs as much time as all the rest; a request that has other instructions gets another one."""
        params = {"ephemeral": True, **self.thread(request)}
        self.call(mouth, "thread/start", params, self.nothing)
        self.ahead = self.calls, params

    def ask(self, request: Settled, mouth: Mouth) -> None:
        then = functools.partial(self.thread_started, request)
        number, params = self.ahead
        if number and params == {"ephemeral": not request.keeps, **self.thread(request)}:
            self.replies[number] = then  # its reply may be there, but what a spare prints is read only now
            return
        if request.resume:
            of_before = {"threadId": request.resume, "excludeTurns": True}
            self.call(mouth, "thread/resume", {**of_before, **self.thread(request)}, then)
        else:
            self.call(mouth, "thread/start", {"ephemeral": not request.keeps, **self.thread(request)}, then)

    def thread(self, request: Settled) -> Json:
        """How a thread is to run. `untrusted` is the approval policy that asks; what it asks is declined."""
        thread: Json = {"cwd": request.workdir,
                        "approvalPolicy": "untrusted" if request.approval_mode == "always" else "never"}
        if request.model:
            thread["model"] = request.model
        if request.isolated:
            return {**thread, "sandbox": "read-only", "approvalPolicy": "never",
                    "baseInstructions": request.system_prompt}
        if request.system_prompt:
            thread["developerInstructions"] = request.system_prompt
        if request.sandbox_mode in self.SANDBOX or self.keeps_sandbox(request):
            thread["sandbox"] = self.SANDBOX.get(request.sandbox_mode, self.default_sandbox)
            if not self.trusts(request.workdir):  # else codex writes into the user's config that it does, from now on
                thread["config"] = {"projects": {request.workdir: {"trust_level": "untrusted"}}}
        return thread

    def trusts(self, workdir: str) -> bool:
        """Whether the user's config says something of this directory, or of the repository it is in."""
        with contextlib.suppress(OSError):
            text = (self.user_home / "config.toml").read_text(encoding="utf-8", errors="replace")
            names = [name for place in self.projects(workdir) for name in (json.dumps(place), f"'{place}'")]
            return any(f"projects.{name}" in text for name in names)
        return False

    @staticmethod
    def projects(workdir: str) -> List[str]:
        """What codex goes by: the directory, and the root of its repository, if it is in one."""
        here = Path(workdir)
        return [workdir, *[str(place) for place in (here, *here.parents) if (place / ".git").exists()][:1]]

    def thread_started(self, request: Settled, reply: Json, mouth: Mouth) -> Iterator[Event]:
        self.thread_id = reply["thread"]["id"]
        self.begun = Init(reply.get("model", ""), self.thread_id, reply.get("cwd", ""))
        yield self.begun
        self.start_turn(request, mouth, self.turn_started)

    def ask_on(self, request: Settled, mouth: Mouth) -> None:
        self.spoken, self.counts_before, self.tools = Spoken(), self.counts, set()
        self.start_turn(request, mouth, self.next_turn_started)

    def start_turn(self, request: Settled, mouth: Mouth, then: Callable[[Json, Mouth], Iterator[Event]]) -> None:
        turn: Json = {"threadId": self.thread_id, "input": [*map(codex_input, request.parts)]}
        if request.effort in self.efforts:
            turn["effort"] = request.effort
        if request.schema is not None:
            turn["outputSchema"] = request.schema
        self.call(mouth, "turn/start", turn, then)

    def turn_started(self, reply: Json, mouth: Mouth) -> Iterator[Event]:
        self.turn_id, self.accepted = reply["turn"]["id"], True
        return iter(())

    def next_turn_started(self, reply: Json, mouth: Mouth) -> Iterator[Event]:
        assert self.begun
        yield self.begun
        yield from self.turn_started(reply, mouth)

    def repeats(self, head: bytes) -> bool:
        """Whole texts that have come as deltas."""
        whole = b'"method":"item/completed"' in head and b'"type":"agentMessage"' in head
        return (bool(self.spoken.sent) and whole) or b'"method":"turn/completed"' in head

    def is_decisive(self, message: Json) -> bool:
        return super().is_decisive(message) or message["method"] == "turn/completed"

    def notified(self, method: str, params: Json, mouth: Mouth) -> Iterator[Event]:
        if method == "item/agentMessage/delta":
            yield from self.spoken.says(params["delta"])
        elif method == "item/reasoning/summaryTextDelta":
            yield Thinking(params["delta"])
        elif method == "item/started":
            yield from self.item_started(params["item"])
        elif method == "item/completed":
            yield from self.item_completed(params["item"])
        elif method == "thread/tokenUsage/updated":
            if params["turnId"] == self.turn_id:
                self.counts = params["tokenUsage"]["total"]
            else:
                self.counts_before = params["tokenUsage"]["total"]
        elif method == "account/rateLimits/updated":
            limit = params["rateLimits"].get("primary") or {}
            self.resets_at = limit.get("resetsAt") if limit.get("usedPercent", 0) >= 100 else None
        elif method == "error" and params.get("willRetry"):
            self.spoken.breaks()
            yield from self.retrying(params["error"])
        elif method == "turn/completed":
            yield from self.turn_completed(params["turn"])

    def item_started(self, item: Json) -> Iterator[Event]:
        if item["type"] == "agentMessage":
            self.spoken.begins(message=True)
        elif item["type"] in CODEX_TOOLS:
            self.tools.add(item["id"])
            called = {name: item[name] for name in CODEX_TOOLS[item["type"]] if name in item}
            yield ToolUse(item["id"], codex_tool_name(item), called)

    def item_completed(self, item: Json) -> Iterator[Event]:
        if item["type"] == "agentMessage":
            yield from self.spoken.ends(item["text"])
            self.spoken.begins(message=True)  # of what is complete, nothing is said again
        elif item["type"] in CODEX_TOOLS:
            if item["id"] not in self.tools:
                yield from self.item_started(item)
            output = item.get("aggregatedOutput") or plain((item.get("result") or {}).get("content"))
            failed = item.get("status") in ("failed", "declined")
            yield ToolResult(item["id"], codex_tool_name(item), output, is_error=failed)

    def retrying(self, error: Json) -> Iterator[Event]:
        yield Progress("retrying", str(error.get("message")))
        if codex_status(error) in (401, 403):
            raise self.turn_error(error)

    def turn_completed(self, turn: Json) -> Iterator[Event]:
        self.spoken = Spoken()
        yield from usage_of(functools.partial(codex_usage, self.counts_before), self.counts)
        failed = turn["status"] != "completed"
        if failed:
            yield Failure(self.turn_error(turn.get("error") or {"message": f"the turn was {turn['status']}"}))
        yield Done(1 if failed else 0, turn_count=1)

    def turn_error(self, error: Json) -> ClinvkError:
        """`additionalDetails` is left out: it holds the provider's address, and a part of the key."""
        error = error if isinstance(error, dict) else {"message": str(error)}
        kind, status = error.get("codexErrorInfo"), codex_status(error)
        text = str(error.get("message") or "it did not say why")
        if status in (401, 403) or kind == "unauthorized" or text.startswith("Missing environment variable"):
            reason = f"its provider says {status}" if status else text
            return BackendAuth(f"codex is not logged in ({reason}). Run `codex login`")
        if status == 429 or kind in ("usageLimitExceeded", "rateLimitExceeded"):
            return rate_limited(f"codex: {text}", self.resets_at - time.time() if self.resets_at else None)
        if kind == "modelNotFound":
            return UnknownModel(f"codex: {text}")
        return BackendFailed(f"codex failed: {text}")

    def rpc_error(self, error: Json) -> ClinvkError:
        text = str(error.get("message"))
        if "no rollout found" in text:
            return forgotten("codex")
        if "active writer" in text:
            return Conflict("codex has the conversation of this session open elsewhere: close it there, or begin "
                            "another session")
        return BackendFailed(f"codex refused the request: {text}")

    def asked(self, method: str, params: Json) -> Json:
        """Nothing is ever accepted: codex runs what it accepts without its sandbox."""
        if method in CODEX_REFUSALS:
            return {"result": CODEX_REFUSALS[method]}
        return {"result": {"currentTimeAt": int(time.time())}} if method == "currentTime/read" else super().asked(
            method, params)


CODEX_CLIENT: Json = {"clientInfo": {"name": "clinvk", "title": "clinvk", "version": __version__}}
CODEX_REFUSALS: Dict[str, Json] = {
    "item/commandExecution/requestApproval": {"decision": "decline"},
    "item/fileChange/requestApproval": {"decision": "decline"}, "item/permissions/requestApproval": {"permissions": {}},
    "item/tool/requestUserInput": {"answers": {}}, "mcpServer/elicitation/request": {"action": "decline"}}
# Items that are tool calls -> the fields that say what is called.
CODEX_TOOLS: Dict[str, Tuple[str, ...]] = {
    "commandExecution": ("command", "cwd"), "fileChange": ("changes",), "mcpToolCall": ("server", "tool", "arguments"),
    "dynamicToolCall": ("tool", "arguments"), "webSearch": ("query",)}


def codex_input(part: Union[str, Image]) -> Json:
    """A part of a prompt."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "url": f"data:{part.media_type};base64,{part.data}"}


def codex_tool_name(item: Json) -> str:
    return str(item.get("tool") or {"commandExecution": "shell"}.get(item["type"], item["type"]))


def codex_status(error: Json) -> Optional[int]:
    """The provider's HTTP status in a turn's error, if it holds one."""
    kind = error.get("codexErrorInfo")
    inner = next(iter(kind.values()), None) if isinstance(kind, dict) else None
    return inner.get("httpStatusCode") if isinstance(inner, dict) else None


def codex_usage(before: Json, total: Json) -> Optional[Usage]:
    """A turn's counts, from those of its thread before and after it."""
    names = ("inputTokens", "outputTokens", "cachedInputTokens", "cacheWriteInputTokens", "reasoningOutputTokens")
    return Usage(*(total.get(name, 0) - before.get(name, 0) for name in names)) if total != before else None


def native_codex(wrapper: str) -> str:
    """npm's `codex` is a node script around a binary in a package of its own; the wrapper if that is not found."""
    script = os.path.realpath(wrapper)
    is_arm = platform.machine().lower() in ("aarch64", "arm64")
    system, vendor = ("darwin", "apple-darwin") if sys.platform == "darwin" else ("linux", "unknown-linux-musl")
    triple = f"{'aarch64' if is_arm else 'x86_64'}-{vendor}"
    package, name = os.path.dirname(os.path.dirname(script)), f"codex-{system}-{'arm64' if is_arm else 'x64'}"
    for base in (f"{package}/node_modules/@openai/{name}", f"{os.path.dirname(package)}/{name}", package):
        binary = f"{base}/vendor/{triple}/bin/codex"
        if script.endswith(".js") and os.access(binary, os.X_OK):
            return binary
    return wrapper


def toml(value: Any) -> str:
    """A JSON value as TOML; objects as inline tables, null left out."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items() if v is not None) + "}"
    return repr(value)


# ---- gemini

class Gemini(JsonRpc):
    """gemini-cli 0.61.0, Agent Client Protocol (PROTOCOLS 5).

    The model way has a home of its own per run (settings, links to the login, the system prompt), removed afterwards.
    Nothing but `initialize` is said before that is answered: without a login gemini takes lines for a login code."""
    honours = frozenset({"model", "approval_mode", "sandbox_mode", "max_tokens", "system_prompt"})
    extra_flags = {"--debug": False, "-d": False}
    version_field: ClassVar[Json] = {"jsonrpc": "2.0"}
    can_wait = True
    shows_images = True
    context_window = 1_000_000
    noise = r"256-color|\[STARTUP\]|Ripgrep is not available|YOLO mode|Loaded cached credentials"
    home_at = ("GEMINI_CLI_HOME", "")
    settings_files = (".gemini/oauth_creds.json", ".gemini/google_accounts.json", ".gemini/gemini-credentials.json",
                      ".gemini/.env", ".env")
    memory_files = (".gemini/GEMINI.md", ".gemini/settings.json")
    workdir_files = ("GEMINI.md", ".gemini/settings.json")
    PERMISSION = {"default": "default", "auto": "autoEdit", "none": "yolo", "always": "default"}
    ALIASES = frozenset({"auto", "pro", "flash", "flash-lite"})
    REPLAY_SILENCE = 3.0  # seconds
    MODEL = "flash"  # of the model way, if none is said: "auto" asks the provider first which one to take
    # JavaScript's blanks: those of Python, and U+FEFF.
    COMMANDS = re.compile("[\\s\ufeff]*[/$][\\s\ufeff]*(memory|extensions|init|restore|about|help)([\\s\ufeff]|$)")
    LINKED = ("oauth_creds.json", "google_accounts.json", "gemini-credentials.json", "installation_id", ".env")
    ISOLATED: ClassVar[Json] = {
        "privacy": {"usageStatisticsEnabled": False},
        "general": {"enableAutoUpdate": False, "enableAutoUpdateNotification": False, "topicUpdateNarration": False,
                    "plan": {"enabled": False}, "maxAttempts": 1},
        "advanced": {"ignoreLocalEnv": True}, "tools": {"core": ["none"]}, "skills": {"enabled": False},
        "hooksConfig": {"enabled": False}, "experimental": {"enableAgents": False},
        # Without markers no GEMINI.md of a directory above is looked for, which a repository might hold.
        "context": {"includeDirectoryTree": False, "memoryBoundaryMarkers": []},
        "model": {"disableLoopDetection": True}}

    def __init__(self, cli: Installed) -> None:
        super().__init__(cli)
        self.request: Optional[Settled] = None
        self.grants = False  # whether tools that ask are allowed
        self.first_session = str(uuid.uuid4())  # gemini stores one at its start, besides the one that we ask for
        self.session = self.model = ""
        self.default_model = self.started_with = ""
        self.auth: Any = None  # how the user logs in
        self.place = ""  # another name of the directory that it runs in, to open its session there
        self.limit: Optional[Tuple[str, int]] = None  # for which model its settings have what max_tokens
        self.begun = False  # the session is open
        self.anew = False  # nothing of the conversation to go on with has been stored: it begins only now
        self.logged = 0  # bytes of its debug log, when the turn began
        self.loaded = False  # its session is one that another process began
        self.replay_end = ""  # the text that a replay of the conversation ends with; "" once it has
        self.silent_ticks = 0  # since something was last heard of the session
        self.prompted = False  # nothing that comes before is part of the answer
        self.opens = True
        self.characters = 0  # of answer text that have come
        self.tools: Dict[str, str] = {}  # id -> name

    def refuses(self, request: Settled) -> str:
        first = next(iter(self.whole_prompt(request)), "")
        found = self.COMMANDS.match(first) if isinstance(first, str) else None
        if found:
            return f"begins with /{found.group(1)}, which gemini takes for a command of its own; put a word before it"
        return super().refuses(request)

    def ignored(self, request: Settled) -> List[str]:
        unmatched = request.max_tokens and (not request.isolated or request.model in self.ALIASES or not request.model)
        given = request.system_prompt and not request.isolated and not request.same_system_prompt
        return [*super().ignored(request), *(["max_tokens"] if unmatched else []),
                *(["system_prompt"] if given else [])]

    def whole_prompt(self, request: Settled) -> Parts:
        """In the agent way there is no place for a system prompt but the prompt, of the first turn."""
        said_before = request.resume and request.same_system_prompt and not self.anew
        if request.isolated or not request.system_prompt or said_before:
            return request.parts
        return prompt_of([f"{request.system_prompt}\n\n", *request.parts]).parts

    def command(self, request: Settled) -> Command:
        users = read_json_with_comments(self.user_home / ".gemini" / "settings.json")
        self.refuse_without_login(users)
        self.scratch = scratch_directory(self.config)
        env = child_environ(self.config, self.name, GEMINI_CLI_NO_RELAUNCH="true", NO_BROWSER="true",
                            GEMINI_DEBUG_LOG_FILE=str(self.scratch / "debug.log"))
        argv = [*self.program, "--acp", "--skip-trust"]
        self.default_model = (users.get("model") or {}).get("name") or self.MODEL
        if request.isolated:
            argv += ["-e", "none"]
            env.update(GEMINI_CLI_HOME=str(self.scratch), GEMINI_SYSTEM_MD=str(self.scratch / "system.md"),
                       TMPDIR=str(self.scratch), GEMINI_CLI_SYSTEM_SETTINGS_PATH=str(self.scratch / "none"),
                       GEMINI_CLI_SYSTEM_DEFAULTS_PATH=str(self.scratch / "none"))  # those have hooks and servers, too
            self.furnish(self.scratch, users)
            self.write_system_prompt(request)
            self.write_settings(request)
        else:
            argv += ["--session-id", self.first_session, *(["-s"] if request.sandbox_mode == "workspace" else [])]
        self.started_with = self.model_of(request)
        argv += [*option("-m", self.started_with), *self.own_flags, *request.extra]
        return Command(argv, request.workdir, env)

    def stamps(self, request: Settled) -> Tuple[str, ...]:
        """Of the user's settings, which gemini itself writes anew now and then, the model way takes two."""
        users = read_json_with_comments(self.user_home / ".gemini" / "settings.json") if request.isolated else {}
        return (*super().stamps(request), json.dumps([users.get("security"), users.get("model")]))

    def stored_files(self) -> Iterable[Path]:
        return loadable_files(self.chats(), self.session) or chat_files(self.chats(), self.session)

    def model_of(self, request: Settled) -> str:
        return request.model or (self.default_model if request.isolated else "")

    def furnish(self, home: Path, users: Json) -> None:
        """A gemini home in which there is nothing but the login."""
        (home / ".gemini").mkdir(mode=0o700)
        for name in self.LINKED:
            link(self.user_home / ".gemini" / name, home / ".gemini" / name)
        link(self.user_home / ".env", home / ".env")
        self.auth = (users.get("security") or {}).get("auth")

    def write_system_prompt(self, request: Settled) -> None:
        """gemini reads it when it opens a session."""
        assert self.scratch
        (self.scratch / "system.md").write_text(literal(request.system_prompt), encoding="utf-8")

    def write_settings(self, request: Settled) -> None:
        assert self.scratch
        self.limit = self.limit_of(request)
        settings: Json = {**self.ISOLATED, **({"security": {"auth": self.auth}} if self.auth else {})}
        if self.limit:
            settings["modelConfigs"] = {"overrides": [{"match": {"model": request.model}, "modelConfig": {
                "generateContentConfig": {"maxOutputTokens": request.max_tokens}}}]}
        write_whole(self.scratch / ".gemini" / "settings.json", json.dumps(settings))

    @staticmethod
    def limit_of(request: Settled) -> Optional[Tuple[str, int]]:
        return (request.model, request.max_tokens) if request.max_tokens and request.model else None

    def furnish_for(self, request: Settled) -> None:
        """What it could not be started with. For ten seconds gemini keeps the settings that it has read for a
        directory, so that others need another name of it."""
        assert self.scratch
        self.write_system_prompt(request)
        if self.limit_of(request) != self.limit:
            self.write_settings(request)
            self.place = str(self.scratch / "empty")
            os.symlink(request.workdir, self.place)

    def refuse_without_login(self, users: Json) -> None:
        """A login with Google that is missing makes gemini ask for a code, for ever."""
        chosen = ((users.get("security") or {}).get("auth") or {}).get("selectedType")
        login = read_json_with_comments(self.user_home / ".gemini" / "oauth_creds.json")
        elsewhere = (self.user_home / ".gemini" / "gemini-credentials.json").exists()
        if chosen == "oauth-personal" and not login.get("refresh_token") and not elsewhere:
            raise self.logged_out("no login with Google is stored")

    def logged_out(self, reason: str) -> BackendAuth:
        return BackendAuth(f"gemini is not logged in ({reason}). Run gemini once and log in, or set GEMINI_API_KEY")

    def greet(self, mouth: Mouth) -> None:
        nothing_of_ours = {"fs": {"readTextFile": False, "writeTextFile": False}, "terminal": False}
        self.call(mouth, "initialize", {"protocolVersion": 1, "clientCapabilities": nothing_of_ours}, self.initialized)

    def prepare(self, request: Settled, output_of: OutputOf) -> None:
        if request.resume:
            self.replay_end = prepare_to_load(self.chats(), request.resume, request.workdir)
            self.anew = not self.replay_end

    def chats(self) -> Path:
        """Where gemini stores conversations, in a directory per project."""
        return self.user_home / ".gemini" / "tmp"

    def ask(self, request: Settled, mouth: Mouth) -> None:
        self.request, self.grants = request, grants_leave(request)
        if self.started_ahead:
            self.furnish_for(request)
        if 1 not in self.replies:  # it is past its greeting
            self.open_session(request, mouth)

    def initialized(self, reply: Json, mouth: Mouth) -> Iterator[Event]:
        if self.request:
            self.open_session(self.request, mouth)
        return iter(())

    def open_session(self, request: Settled, mouth: Mouth) -> None:
        place = {"cwd": self.place or request.workdir, "mcpServers": []}
        self.loaded = bool(request.resume) and not self.anew
        if self.loaded:
            self.call(mouth, "session/load", {"sessionId": request.resume, **place}, self.session_begun)
        else:
            self.call(mouth, "session/new", place, self.session_begun)

    def ask_on(self, request: Settled, mouth: Mouth) -> None:
        """A session that is open says nothing before its provider does, unless it is asked for its mode."""
        self.request, self.prompted, self.opens, self.characters, self.anew = request, False, True, 0, False
        self.logged = len(self.log())
        mode = {"sessionId": self.session, "modeId": self.mode(request)}
        self.call(mouth, "session/set_mode", mode, self.mode_kept)

    def mode_kept(self, reply: Json, mouth: Mouth) -> Iterator[Event]:
        assert self.request
        yield Init(self.model, self.session, self.request.workdir)
        self.give_prompt(mouth)

    def session_begun(self, reply: Json, mouth: Mouth) -> Iterator[Event]:
        assert self.request
        self.session = self.request.resume if self.loaded else reply["sessionId"]
        self.begun, self.silent_ticks = True, 0
        self.model = self.model_of(self.request) or (reply.get("models") or {}).get("currentModelId") or ""
        yield Init(self.model, self.session, self.request.workdir)
        self.go_on(mouth)

    def go_on(self, mouth: Mouth) -> None:
        """Once the session is open and its replay has ended, whichever comes last: the mode, then the prompt."""
        assert self.request
        if not self.begun or self.replay_end:
            return
        mode = self.mode(self.request)
        if mode != "default":
            self.call(mouth, "session/set_mode", {"sessionId": self.session, "modeId": mode}, self.mode_set)
        else:
            self.give_prompt(mouth)

    def mode(self, request: Settled) -> str:
        if request.isolated:
            return "default"
        return "plan" if request.sandbox_mode == "read-only" else self.PERMISSION[request.approval_mode]

    def mode_set(self, reply: Json, mouth: Mouth) -> Iterator[Event]:
        self.give_prompt(mouth)
        return iter(())

    def give_prompt(self, mouth: Mouth) -> None:
        assert self.request
        self.prompted = self.accepted = True
        model = self.model_of(self.request)
        if self.request.isolated and model != self.started_with:  # a CLI that had waited; the name alone takes no time
            self.call(mouth, "session/set_model", {"sessionId": self.session, "modelId": model}, self.nothing)
            self.started_with = model
        parts = [*map(gemini_part, self.whole_prompt(self.request))]
        self.call(mouth, "session/prompt", {"sessionId": self.session, "prompt": parts}, self.turn_ended)

    def notified(self, method: str, params: Json, mouth: Mouth) -> Iterator[Event]:
        self.silent_ticks = 0
        if method != "session/update":
            return
        update = params["update"]
        kind = update["sessionUpdate"]
        if not self.prompted:
            if self.replay_end and kind == "user_message_chunk" and update["content"].get("text") == self.replay_end:
                self.replay_end = ""
                self.go_on(mouth)
            return
        if kind == "agent_message_chunk" and update["content"].get("text"):
            yield Message(update["content"]["text"], opens=self.opens)
            self.opens = False
            self.characters += len(update["content"]["text"])
        elif kind == "agent_thought_chunk":
            yield Thinking(update["content"]["text"])
        elif kind in ("tool_call", "tool_call_update"):
            yield from self.tool(update)

    def tool(self, call: Json) -> Iterator[Event]:
        """A call is shown when it is first heard of, and again when it has ended. Its output is not told."""
        self.opens, tool_id = True, call["toolCallId"]
        if tool_id not in self.tools:
            self.tools[tool_id] = tool_id.partition("__")[0]
            shown = {name: call[name] for name in ("title", "kind", "locations") if call.get(name)}
            yield ToolUse(tool_id, self.tools[tool_id], shown)
        if call.get("status") in ("completed", "failed"):
            texts = [(c.get("content") or {}).get("text") or "" for c in call.get("content") or []]
            yield ToolResult(tool_id, self.tools[tool_id], "\n".join(texts), is_error=call["status"] == "failed")

    def asked(self, method: str, params: Json) -> Json:
        """Leave for a tool, as the approval mode says; all else is refused."""
        if method != "session/request_permission":
            return super().asked(method, params)
        wanted = "allow_once" if self.grants else "reject_once"
        chosen = [o["optionId"] for o in params.get("options", []) if o.get("kind") == wanted]
        outcome = {"outcome": "selected", "optionId": chosen[0]} if chosen else {"outcome": "cancelled"}
        return {"result": {"outcome": outcome}}

    def shown(self, method: str, params: Json) -> Iterator[Event]:
        """A call for which leave is asked is told of nowhere else, if it is refused."""
        if method == "session/request_permission" and "toolCallId" in params.get("toolCall", {}):
            yield from self.tool(params["toolCall"])
            if not self.grants:
                tool_id = params["toolCall"]["toolCallId"]
                yield ToolResult(tool_id, self.tools[tool_id], NOT_ALLOWED, is_error=True)

    def turn_ended(self, reply: Json, mouth: Mouth) -> Iterator[Event]:
        """`end_turn` without any model's usage is no success: the provider's stream broke, or a filter cut it, or (if
        about as much has come) max_tokens did."""
        assert self.request
        meta, reason = reply.get("_meta"), reply.get("stopReason")
        quota = (meta.get("quota") if isinstance(meta, dict) else None) or {}
        limit = 0 if "max_tokens" in self.ignored(self.request) else self.request.max_tokens
        ended_early = not quota.get("model_usage") and 0 < limit <= 2 * estimate(self.characters)
        cut = reason == "max_tokens" or ended_early
        yield from usage_of(gemini_usage, quota.get("token_count"))
        failed = not cut and (reason != "end_turn" or not quota.get("model_usage"))
        if failed:
            yield Failure(BackendFailed("gemini ended the turn without a whole answer: the provider's stream broke, or "
                                        f"it declined ({reason}); ask again"))
        yield Done(1 if failed else 0, stop="length" if cut else "end")

    def rpc_error(self, error: Json) -> ClinvkError:
        text, status = provider_message(error), error.get("code")
        if status in (401, 403) or status == -32000:
            return self.logged_out(text)
        if status == 429:
            return rate_limited(f"gemini: {text}", None)
        if status == 404 or re.search(r"models/\S+ is not found", text):
            return UnknownModel(f"gemini: {text}")
        if text.startswith(("No previous sessions found", "Invalid session identifier")):
            return forgotten("gemini")
        return BackendFailed(f"gemini failed: {text}")

    def not_json(self, line: bytes) -> None:
        if b"accounts.google.com/o/oauth2" in line or b"authorization code" in line:
            raise self.logged_out("it asks for a login with Google")

    def look(self, mouth: Mouth) -> Iterator[Event]:
        """gemini tries again for minutes after a 429, and tells so in its debug log only. A replay that does not end as
        we wrote it, in a newer version, has ended when nothing more comes."""
        self.silent_ticks += 1
        if self.begun and self.replay_end and self.silent_ticks > self.REPLAY_SILENCE / TICK:
            LOG.warning("gemini %s: the end of a replay is not understood", self.cli_version)
            self.replay_end = ""
            self.go_on(mouth)
        if re.search(rb"Attempt \d+ failed with status 429", self.log()[self.logged:]):
            raise rate_limited("gemini's provider says 429, too many requests", None)
        return iter(())

    def log(self) -> bytes:
        """What gemini has told so far in its debug log."""
        try:
            return (self.scratch or Path()).joinpath("debug.log").read_bytes()
        except FileNotFoundError:
            return b""

    def at_end(self, exit_code: int, stderr: str) -> Iterator[Event]:
        if exit_code == 41:
            return failing(self.logged_out("it could not authenticate"), exit_code)
        return super().at_end(exit_code, stderr)

    def forget(self, session_id: str, output_of: OutputOf) -> None:
        for file in [*chat_files(self.chats(), session_id), *loadable_files(self.chats(), session_id)]:
            file.unlink()

    def clean_up(self) -> None:
        """gemini stores every conversation, and has no way to be told not to. A session that was loaded is in a file
        with a name of ours, and what was stored besides is none."""
        super().clean_up()
        if self.request and not self.request.isolated:
            begun_here = [self.session] if self.request.keeps and not self.loaded else []
            for session in {self.first_session, self.session}.difference(begun_here):
                for file in chat_files(self.chats(), session):
                    file.unlink()


# ---- gemini's stored conversations (measured on 0.61.0)

def chat_files(chats: Path, session_id: str) -> List[Path]:
    """What gemini has stored of a session, under the names that it gives: a minute, and 8 digits of the id."""
    return sorted(chats.glob(f"*/chats/session-*-{session_id[:8]}.jsonl")) if session_id else []


def loadable_files(chats: Path, session_id: str) -> List[Path]:
    """The file of a session that we have prepared to be loaded; none, or one."""
    return list(chats.glob(f"*/chats/session-clinvk-{session_id}.jsonl"))


def prepare_to_load(chats: Path, session_id: str, workdir: str) -> str:
    """Make ready what gemini would destroy: the text that the replay of the conversation will end with; "" if there is
    no turn in it, for gemini does not keep one that fails. Raises Forgotten.

    Under gemini's own name a file can not be loaded in the minute of its beginning, and is deleted by the next gemini
    that starts after it has been loaded. Each load adds the whole history to the file once more. Tool calls are stored
    so that a load doubles their results, which the provider refuses. And the replay goes on after the reply that should
    end it, while nothing but a turn of ours tells it from an answer; gemini keeps a turn with a slash to itself."""
    stored = loadable_files(chats, session_id) or chat_files(chats, session_id)
    if not stored:
        raise forgotten("gemini")
    lines = stored[0].read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        metadata, messages = stored_conversation(lines)
        if all(text_of(message).startswith("<session_context>") for message in messages):
            return ""
        metadata = metadata if "sessionId" in metadata else {**new_metadata(session_id, workdir), **metadata}
        lines = [json.dumps(record) for record in (metadata, *map(loadable, with_paired_tools(messages)))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        LOG.warning("what gemini has stored of %s is not understood, and loaded as it is (%r)", session_id, error)
    mark = f"/clinvk-{uuid.uuid4()}"
    last = {"id": str(uuid.uuid4()), "timestamp": utc(time.time()), "type": "user", "content": [{"text": mark}]}
    write_whole(stored[0].with_name(f"session-clinvk-{session_id}.jsonl"), "\n".join([*lines, json.dumps(last), ""]))
    for file in chat_files(chats, session_id):
        file.unlink()
    return mark


def new_metadata(session_id: str, workdir: str) -> Json:
    """For a conversation without any: the start of another gemini takes it away, if it falls before the first turn."""
    now = utc(time.time())
    return {"sessionId": session_id, "projectHash": hashlib.sha256(workdir.encode()).hexdigest(), "startTime": now,
            "lastUpdated": now, "kind": "main"}


OUR_MARK = "/clinvk-[0-9a-f-]{36}"


def stored_conversation(lines: Iterable[str]) -> Tuple[Json, List[Json]]:
    """Metadata and messages in a file of gemini's: lines that add a message, or set metadata or all messages anew."""
    metadata: Json = {}
    messages: Dict[str, Json] = {}
    for line in lines:
        record = json_object(line)
        if "$rewindTo" in record:
            known = list(messages)
            dropped = known.index(record["$rewindTo"]) if record["$rewindTo"] in known else 0
            messages = {name: messages[name] for name in known[:dropped]}
        elif "id" in record:
            messages[record["id"]] = record
        else:
            fields = dict(record.get("$set", record))
            replaced = fields.pop("messages", None)
            metadata.update(fields)
            messages = messages if replaced is None else {m["id"]: m for m in replaced if "id" in m}
    return metadata, [message for message in messages.values() if not re.fullmatch(OUR_MARK, text_of(message))]


def json_object(line: str) -> Json:
    """{} for any other line: gemini passes over those, too, such as one that a crash has torn."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def parts_of(message: Json) -> List[Json]:
    content = message.get("content") or []
    return [{"text": content}] if isinstance(content, str) else content if isinstance(content, list) else [content]


def text_of(message: Json) -> str:
    return "".join(part.get("text") or "" for part in parts_of(message))


def ids_in(message: Json, kind: str) -> List[str]:
    """Of the `functionCall`s or `functionResponse`s in a message's content."""
    return [part[kind]["id"] for part in parts_of(message) if kind in part]


def loadable(message: Json) -> Json:
    """gemini leaves a user's turn that begins with a slash or a question mark out of what it loads; after a word joiner
    it does not."""
    if message.get("type") != "user" or not text_of(message).lstrip().startswith(("/", "?")):
        return message
    return {**message, "content": [{"text": "\u2060"}, *parts_of(message)]}


def with_paired_tools(messages: List[Json]) -> List[Json]:
    """gemini stores a tool's result with its call and again as a turn of the user's, and the calls of a second turn
    with those of the first. Here every call stands once, with its result, where that was a turn."""
    results = {part["functionResponse"]["id"]: part for message in messages for part in parts_of(message)
               if "functionResponse" in part}
    calls = {call["id"]: call for message in messages for call in message.get("toolCalls") or []}
    called = {name for message in messages for name in ids_in(message, "functionCall")}  # in a content: leave it there
    placed: Set[str] = set()
    paired: List[Json] = []
    for message in messages:
        answered = ids_in(message, "functionResponse")
        here = [name for name in answered if name not in placed]
        placed.update(here)
        hung = [{**calls[name], "result": [results[name]]} for name in here if name in calls and name not in called]
        if hung:
            paired.append({**message, "type": "gemini", "content": "", "toolCalls": hung})
        if called & set(here):
            paired.append({**message, "id": str(uuid.uuid4()), "content": [results[n] for n in here if n in called]})
        left = [call for call in message.get("toolCalls") or [] if call["id"] not in results]
        if not answered and (left or parts_of(message) or not message.get("toolCalls")):
            paired.append({**message, "toolCalls": left})
    return paired


def gemini_part(part: Union[str, Image]) -> Json:
    """A part of a prompt, as the Agent Client Protocol has it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "mimeType": part.media_type, "data": part.data}


def gemini_usage(counts: Json) -> Optional[Usage]:
    usage = Usage(counts["input_tokens"], counts["output_tokens"])
    return usage if usage.input_tokens else None


def literal(text: str) -> str:
    """A system prompt in which gemini substitutes nothing: each variable is broken up so that it comes out whole."""
    for whole, broken in (("${AgentSkills}", "${Agent${AgentSkills}Skills}"),
                          ("${SubAgents}", "${Sub${SubAgents}Agents}"),
                          ("${AvailableTools}", "${AvailableTools\u2060}")):  # this one keeps its word joiner
        text = text.replace(whole, broken)
    return text


def provider_message(error: Json) -> str:
    """The message of a JSON-RPC error of gemini's, which may be the provider's whole body, as JSON."""
    text = str((error.get("data") or {}).get("details") or error.get("message"))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["error"]["message"])
    return text


def read_json_with_comments(file: Path) -> Json:
    """A settings file of the user's; {} if there is none, or none that can be read."""
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(re.sub(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', lambda found: found.group(1) or "", text,
                                  flags=re.DOTALL))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- Any other CLI, and none

class Text(Backend):
    """A CLI from config alone: it reads the system prompt and the prompt on stdin, and prints the answer as text."""
    honours = frozenset({"system_prompt"})
    remembers = False
    has_subcommands = False  # as far as we know, and not every program takes --flag=value

    def __init__(self, cli: Installed) -> None:
        super().__init__(cli)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.opens = True

    @classmethod
    def version_of(cls, name: str, program: List[str], config: Config, output_of: OutputOf) -> str:
        return ""  # what --version would do to an unknown program is unknown

    def command(self, request: Settled) -> Command:
        return Command([*self.program, *self.own_flags, *request.extra], request.workdir,
                       child_environ(self.config, self.name))

    def ask(self, request: Settled, mouth: Mouth) -> None:
        parts = [part for part in (request.system_prompt, request.prompt) if part]
        mouth.say_bytes(PARAGRAPH.join(parts).encode(errors="replace"))
        mouth.end_of_input()

    def read(self, data: bytes, mouth: Mouth) -> Iterator[Event]:
        text = self.decoder.decode(data)
        if text:
            yield Message(text, opens=self.opens)
            self.opens = False

    def at_end(self, exit_code: int, stderr: str) -> Iterator[Event]:
        rest = self.decoder.decode(b"", final=True)
        if rest:
            yield Message(rest, opens=self.opens)
        if exit_code:
            yield Failure(BackendFailed(f"{self.name} failed with exit code {exit_code}"))
        yield Done(exit_code)


class InProcess(Backend):
    """A backend that needs no process."""

    @classmethod
    def find(cls, name: str, config: Config) -> Optional[List[str]]:
        return []

    def answer(self, request: Settled) -> Iterator[Event]:
        """The events of the whole run."""
        raise NotImplementedError


class Echo(InProcess):
    """Answers with the prompt, word by word: for trying a client without spending a token."""

    def plan(self, request: Settled) -> str:
        return "(echo needs no command)"

    def answer(self, request: Settled) -> Iterator[Event]:
        yield Init("echo", "", request.workdir)
        for word in re.finditer(r"\S+\s*|\s+", request.prompt):
            yield Message(word.group(), opens=word.start() == 0)
        yield Done(0, turn_count=1)


BACKENDS: Dict[str, Type[Backend]] = {"claude": Claude, "codex": Codex, "gemini": Gemini, "echo": Echo}


def kind_of(name: str) -> Type[Backend]:
    """The class that speaks with a configured backend."""
    return BACKENDS.get(name, Text)


# ==== Processes ===================================================================================
# In: a Command. Out: what the CLI prints, until none of its descendants is left. Here, and only here, CLIs are started.

class Stop:
    """Why a run must end before its time. Whoever waits for something asks, every TICK."""

    def __init__(self, gone: Callable[[], bool] = lambda: False, closing: Optional[threading.Event] = None) -> None:
        self.began = time.monotonic()
        self.gone = gone
        self.closing = closing or threading.Event()
        self.limit_secs = math.inf

    def allow(self, seconds: float) -> Stop:
        """Time is up that long after `began`; with math.inf, as when the run is over, never."""
        self.limit_secs = seconds
        return self

    def error(self) -> Optional[ClinvkError]:
        if self.closing.is_set():
            return Canceled("the server is stopping; try again when it is back")
        if self.gone():
            return Canceled("the client has closed the connection")
        if time.monotonic() > self.began + self.limit_secs:
            return TimedOut(f"time is up: the run was ended after {self.limit_secs:g} s. Allow more with timeout_secs, "
                            "or with server.request_timeout_secs in the config")
        return None

    def check(self) -> None:
        error = self.error()
        if error:
            raise error


class Slots:
    """At most `limit` runs at once; up to `places` more wait, and start in the order in which they came. A request that
    is `admitted` with several runs takes at most one place, until all of them are over; the runs take none when they
    wait. Each run waits with a ticket, which is set when a slot is its own."""

    def __init__(self, limit: int, places: int) -> None:
        self.limit, self.places = limit, places
        self.active = 0
        self.waiting: Deque[threading.Event] = collections.deque()
        self.admitted: Set[threading.Event] = set()  # those of `waiting` that take no place
        self.several = 0  # requests with several runs that are not over
        self.changed = threading.Condition()  # guards active, waiting, admitted and several

    def take(self, stop: Stop, *, admitted: bool = False) -> Iterator[Progress]:
        """Returns when a slot is ours; until then a Progress per SILENCE. Raises BackendUnavailable if the line is
        full, unless the request is `admitted` already, and what `stop` says. A caller that closes this generator has
        left the line."""
        ticket = threading.Event()
        with self.changed:
            if self.active < self.limit and not self.waiting:
                self.active += 1
                return
            if not admitted:
                self.check_places_locked()
            self.waiting.append(ticket)
            self.admitted |= {ticket} if admitted else set()
        try:
            yield from wait_for(ticket, stop)
        except BaseException as error:
            self.leave(ticket)
            if isinstance(error, TimedOut):
                error.args = (f"time is up: {self.limit} runs were going on for {stop.limit_secs:g} s, and this one "
                              "could not begin. Allow more with timeout_secs, or with server.max_concurrent_runs",)
            raise

    @contextlib.contextmanager
    def admitting(self) -> Iterator[None]:
        """Let a request in whose runs then wait for their slots however long the line is; or raise."""
        with self.changed:
            if max(self.active, self.several) >= self.limit:
                self.check_places_locked()
            self.several += 1
        try:
            yield
        finally:
            with self.changed:
                self.several -= 1

    def check_places_locked(self) -> None:
        taken = len(self.waiting) - len(self.admitted) + max(0, self.several - self.limit)
        if taken >= self.places:
            raise BackendUnavailable(f"{self.active} runs are going on and {taken} requests wait: try again later, or "
                                     "raise server.max_concurrent_runs or server.max_waiting_runs", retry_after=5)

    def leave(self, ticket: threading.Event) -> None:
        """Give up a place in the line, or the slot that came just then."""
        with self.changed:
            if ticket in self.waiting:
                self.waiting.remove(ticket)
                self.admitted.discard(ticket)
                return
        self.release()

    def release(self) -> None:
        with self.changed:
            if self.waiting:
                ticket = self.waiting.popleft()
                self.admitted.discard(ticket)
                ticket.set()  # the slot is handed on
            else:
                self.active -= 1
                self.changed.notify_all()

    @contextlib.contextmanager
    def released_on_error(self) -> Iterator[None]:
        """For what is done with a slot before a CLI has it."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def wait_until_idle(self, seconds: float) -> bool:
        """Whether there comes a time without any run."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.active, seconds)


def wait_for(ticket: threading.Event, stop: Stop) -> Iterator[Progress]:
    told_at = time.monotonic()
    while not ticket.wait(TICK):
        stop.check()
        if time.monotonic() - told_at >= SILENCE:
            told_at = time.monotonic()
            yield Progress("queued", "waiting for a free slot")
    stop.check()


def is_ready(file: int, event: int) -> bool:
    """Whether there is something to be read, or what else of select's POLL... it is, by now."""
    poll = select.poll()
    poll.register(file, event)
    return bool(poll.poll(0))


class Child:
    """A started CLI: its pipes and its descendants. Between `start` and `leave` one thread at a time uses it, for one
    turn of a conversation after the other."""
    STDERR_KEPT = 64 * 1024
    LAST_WORDS = 1.0  # seconds for what comes on stderr when stdout is closed already
    READS_OF_A_FULL_PIPE = 4  # of 64 KiB each, which is what a pipe holds

    def __init__(self, command: Command, *, server_mark: str, max_output_bytes: int) -> None:
        self.mark = f"{server_mark}-{uuid.uuid4().hex}"  # in the environment of all its descendants, wherever they go
        self.command = command
        self.max_output_bytes = max_output_bytes
        self.unsent = bytearray()
        self.stderr = b""
        self.printed = 0
        self.process = subprocess.Popen(
            command.argv, cwd=command.cwd, env={**command.env, MARK: self.mark}, bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            os.set_blocking(pipe.fileno(), False)  # type: ignore[union-attr]
        self.closes_stdin = False

    @property
    def is_there(self) -> bool:
        return self.process.poll() is None

    def has_printed(self) -> bool:
        """Whether there is something on stdout that has not been read."""
        return is_ready(self.pipes()[0], select.POLLIN)

    def unread(self) -> List[bytes]:
        """What is on stdout and has not been read."""
        return self.rest(self.pipes()[:1])

    def begin_turn(self) -> None:
        """What it prints from now on is of another turn."""
        self.printed, self.stderr = 0, b""

    def say(self, message: Json) -> None:
        """Queue one line for its stdin; what the pipe takes goes at once, the rest while we read."""
        self.say_bytes(json.dumps(message).encode() + b"\n")

    def say_bytes(self, data: bytes) -> None:
        self.unsent += data
        self.flush()

    def end_of_input(self) -> None:
        self.closes_stdin = True
        self.flush()

    def flush(self) -> None:
        """Write as much as the pipe takes. A CLI that no longer reads shows in what it prints, not here."""
        stdin = self.process.stdin
        if stdin is None or stdin.closed:
            return
        try:
            while self.unsent:
                del self.unsent[:os.write(stdin.fileno(), self.unsent[:65536])]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.unsent.clear()
            self.closes_stdin = True
        if self.closes_stdin:
            stdin.close()

    def output(self, stop: Stop) -> Iterator[bytes]:
        """What it prints on stdout, as it comes, and b"" per TICK of silence; its stderr is kept aside. Ends when it
        is gone, or has closed its stdout. Raises what `stop` says, and BackendFailed if it prints too much."""
        stdout, _ = pipes = self.pipes()
        last_words_end = math.inf
        while time.monotonic() < last_words_end:
            if self.process.poll() is not None:
                yield from self.rest(pipes)
                return
            heard = {pipe: self.read(pipe) for pipe in self.ready(pipes)}
            stop.check()
            pipes = [pipe for pipe in pipes if heard.get(pipe) != b""]  # what is closed would be ready for ever
            if heard.get(stdout) == b"":
                last_words_end = time.monotonic() + self.LAST_WORDS
            else:
                yield heard.get(stdout) or b""

    def pipes(self) -> List[int]:
        """stdout and stderr."""
        assert self.process.stdout and self.process.stderr
        return [self.process.stdout.fileno(), self.process.stderr.fileno()]

    def read(self, pipe: int) -> Optional[bytes]:
        """What there is on stdout; None for stderr, and if there is nothing; b"" if it is closed."""
        try:
            data = os.read(pipe, 65536)
        except BlockingIOError:
            return None
        self.printed += len(data)
        if self.printed > self.max_output_bytes:
            raise BackendFailed(f"{self.command.argv[0]} was ended: it printed over {self.max_output_bytes} bytes; "
                                "raise server.max_output_bytes to allow more")
        if pipe == self.pipes()[0] or not data:
            return data
        self.stderr = (self.stderr + data)[-self.STDERR_KEPT:]
        return None

    def rest(self, pipes: List[int]) -> List[bytes]:
        """What the pipes hold by now, of stdout; not what comes meanwhile: others may have them, and go on to print."""
        return [data for pipe in pipes for data in map(self.read, [pipe] * self.READS_OF_A_FULL_PIPE) if data]

    def ready(self, pipes: List[int]) -> List[int]:
        """Which pipes have something to read, after at most TICK; takes the chance to write what is unsent."""
        poll = select.poll()
        for pipe in pipes:
            poll.register(pipe, select.POLLIN)
        stdin = self.process.stdin
        if self.unsent and stdin is not None and not stdin.closed:
            poll.register(stdin.fileno(), select.POLLOUT)
        found = {pipe for pipe, _ in poll.poll(TICK * 1000)}
        if self.unsent:
            self.flush()
        return [pipe for pipe in pipes if pipe in found]

    def kill(self) -> List[bytes]:
        """End the process itself, at once; what it had still printed."""
        self.process.kill()
        self.process.wait()
        return self.unread()

    def leave(self, patience: float) -> None:
        """End it and all its descendants; returns when none is left. It may take `patience` seconds to go by itself
        once its stdin is closed; then comes SIGTERM, and GRACE seconds later SIGKILL."""
        self.unsent.clear()
        self.end_of_input()
        if patience:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        end_descendants(self.process, self.mark)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()


MARK = "CLINVK_RUN"  # environment variable that names the server and the run a process belongs to

# sh: once stdin ends, every process with $1 in its environment gets SIGTERM, and after 1.5 s SIGKILL.
HEIR = r"""
read -r line
marked() {
    if [ -d /proc/self ]; then
        for p in $(grep -ls "$1" /proc/[0-9]*/environ); do p=${p%/environ}; echo ${p#/proc/}; done
    else
        ps -axEww -o pid=,command= | grep " $1" | grep -v clinvk-heir | awk '{print $1}'
    fi
}
for signal in TERM TERM TERM KILL KILL; do
    found=$(marked "$1")
    [ -z "$found" ] && exit
    kill -$signal $found
    sleep 0.5
done
"""
GRACE = 1.5  # seconds between SIGTERM and SIGKILL: with the time to notice, under 2 s in all
LAST_LOOK = 15.0  # seconds after the first
LOOK_AGAIN = 0.1  # seconds between two looks for further descendants, unless those that are known go sooner
PATIENCE = 2.0  # seconds for a CLI to store its conversation and go, once its answer is complete


class Children:
    """Every started CLI of this server, until the last of its descendants has gone."""

    def __init__(self, max_output_bytes: int) -> None:
        self.max_output_bytes = max_output_bytes
        self.mark = uuid.uuid4().hex
        self.changed = threading.Condition()  # guards alive and heir
        self.alive: Set[Child] = set()
        self.heir: Optional[subprocess.Popen[bytes]] = None

    def start(self, command: Command) -> Child:
        """Raises BackendUnavailable if the program can not be started."""
        if os.name != "posix":
            raise BackendUnavailable("running a CLI needs Linux or macOS; on this system only the echo backend works")
        try:
            self.appoint_heir()
            child = Child(command, server_mark=self.mark, max_output_bytes=self.max_output_bytes)
        except (OSError, ValueError) as error:
            raise BackendUnavailable(f"{command.argv[0]} can not be started: {error}. Mend its installation, or set "
                                     "another command in the config") from None
        with self.changed:
            self.alive.add(child)
        return child

    def appoint_heir(self) -> None:
        """Before the first CLI: a shell that ends them all if this server is killed. It waits on a pipe that only the
        server holds open; gemini, for one, ends neither at EOF nor at a broken pipe."""
        with self.changed:
            if self.heir is None:
                self.heir = subprocess.Popen(["/bin/sh", "-c", HEIR, "clinvk-heir", f"{MARK}={self.mark}-"],
                                             stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                             stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
                                             env={"PATH": os.defpath})

    def dismiss_heir(self) -> None:
        """To be called when nothing is left for it to end."""
        with self.changed:
            if self.heir:
                self.heir.kill()
                self.heir.communicate()

    def dismiss(self, child: Child, then: Callable[[], None], *, patience: float) -> threading.Thread:
        """End `child` in a thread of its own, so that nobody's answer waits for it; call `then` when it has gone."""
        leaving = threading.Thread(target=self.see_off, args=(child, then, patience), name="see off", daemon=True)
        leaving.start()
        return leaving

    def see_off(self, child: Child, then: Callable[[], None], patience: float) -> None:
        try:
            child.leave(patience)
        finally:
            try:
                then()
            finally:
                with self.changed:
                    self.alive.discard(child)
                    self.changed.notify_all()

    def wait_until_gone(self, seconds: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: not self.alive, seconds)


def nothing() -> None:
    """For when nothing is to be done once a process has gone."""


def output_of(children: Children, stop: Stop, command: Command, said: bytes, until: bytes) -> bytes:
    """What a command prints when it is told `said`: all of it, or up to what matches the pattern `until`."""
    child = children.start(command)
    heard = bytearray()
    try:
        child.say_bytes(said)
        if not until:
            child.end_of_input()
        for data in child.output(stop):
            heard += data
            if until and re.search(until, heard):
                break
    finally:
        children.dismiss(child, nothing, patience=0.0)
    return bytes(heard)


# ---- Ending all descendants (PROTOCOLS 6): the CLIs start their tools in sessions and groups of their own

class Process(NamedTuple):
    pid: int
    parent: int
    group: int
    zombie: bool
    marked: bool


def processes(mark: str) -> List[Process]:
    """Every process of this machine; `marked` if `mark` is in its environment."""
    if os.path.isdir("/proc/self"):
        found = (proc_process(name, f"{MARK}={mark}".encode()) for name in os.listdir("/proc"))
        return [process for process in found if process]
    listed = subprocess.run(["ps", "-axEww", "-o", "pid=,ppid=,pgid=,state=,command="], capture_output=True,
                            text=True, errors="replace", check=False).stdout
    rows = [line.split(None, 4) for line in listed.splitlines()]
    if not rows:
        raise OSError("ps shows no process")
    return [Process(int(r[0]), int(r[1]), int(r[2]), r[3].startswith("Z"), f"{MARK}={mark}" in r[-1])
            for r in rows if len(r) == 5]


def proc_process(name: str, mark: bytes) -> Optional[Process]:
    """One entry of Linux's /proc; None if it is no process, or gone."""
    if not name.isdigit():
        return None
    try:
        state, parent, group = bytes_of(f"/proc/{name}/stat").rpartition(b")")[2].split()[:3]
    except (PermissionError, FileNotFoundError, ProcessLookupError):  # another user's, where /proc hides them, or gone
        return None
    try:
        marked = mark in bytes_of(f"/proc/{name}/environ")
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        marked = False
    return Process(int(name), int(parent), int(group), state == b"Z", marked)


def bytes_of(file: str) -> bytes:
    """What a file of /proc holds. `open` takes 1.7 times as long, and each dismissed CLI costs hundreds of these."""
    handle = os.open(file, os.O_RDONLY)
    try:
        data = piece = os.read(handle, 65536)
        while len(piece) == 65536:  # less is all of the rest
            piece = os.read(handle, 65536)
            data += piece
    finally:
        os.close(handle)
    return data


def descendants(root: subprocess.Popen[bytes], mark: str) -> List[Process]:
    """`root` and its group, what they started, and what carries the mark though its parents have gone; no zombies."""
    listed = processes(mark)
    family = {p.pid for p in listed if p.marked or p.group == root.pid} | ({root.pid} if root.poll() is None else set())
    before = 0
    while len(family) > before:
        before = len(family)
        family |= {p.pid for p in listed if p.parent in family}
    return [p for p in listed if p.pid in family and not buried(p)]


def buried(process: Process) -> bool:
    """Whether this is no process any more. An orphan that fell to us, if we are init in a container, is reaped."""
    if process.zombie and process.parent == os.getpid():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
    return process.zombie


def end_descendants(root: subprocess.Popen[bytes], mark: str) -> None:
    """SIGTERM to every descendant, SIGKILL after GRACE seconds; returns when none is left. What can not be signalled,
    or does not die, is given up and logged: others need the slot."""
    began, number = time.monotonic(), signal.SIGTERM
    told: Set[int] = set()  # who has had the present signal: a CLI that cleans up is not told twice
    while True:
        try:
            family = descendants(root, mark)
        except OSError as error:  # no free descriptor, say, with which to look
            LOG.warning("what %d has started can not be looked up: %s", root.pid, error)
            time.sleep(LOOK_AGAIN)
            family = [Process(root.pid, os.getpid(), root.pid, zombie=False, marked=True)]
            told |= {root.pid} if root.poll() is not None else set()  # its number may be another's by now
        if not family:
            with contextlib.suppress(subprocess.TimeoutExpired):
                root.wait(GRACE)  # it is a zombie before the last of its threads has gone, and can be reaped only then
            return
        if time.monotonic() - began > LAST_LOOK:
            LOG.error("of what a CLI has started these do not end: %s", ", ".join(str(p.pid) for p in family))
            return
        if number == signal.SIGTERM and time.monotonic() - began > GRACE:
            number, told = signal.SIGKILL, set()
        for target in targets(family, told):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(target, number)
        told |= {p.pid for p in family}
        give_time(root, {p.pid for p in family})


def give_time(root: subprocess.Popen[bytes], pids: Set[int]) -> None:
    """Wait until none of these processes is left, or LOOK_AGAIN seconds: to look at every process of the machine takes
    long. A zombie that nobody reaps is there to the end."""
    ends, pause = time.monotonic() + LOOK_AGAIN, 0.005
    while time.monotonic() < ends:
        time.sleep(pause)
        root.poll()  # reaps it
        if not any(map(is_alive, pids)):
            return
        pause = min(2 * pause, 0.02)


def targets(family: List[Process], told: Set[int]) -> Set[int]:
    """Whom to signal, each once: a group that one of the family leads as a whole (a negative number) unless some of it
    have been told before, any other process by itself."""
    led = {p.group for p in family if p.group == p.pid} - {p.group for p in family if p.pid in told}
    return {-p.group if p.group in led else p.pid for p in family if p.pid not in told}


# ---- Memory

SHORT = 0.1  # of all memory: with less than that to be had, no CLI waits


def memory_is_short() -> bool:
    """Whether this machine needs its memory for other things than CLIs that wait."""
    with contextlib.suppress(OSError):
        told = Path("/proc/meminfo").read_text()
        found = [re.search(rf"^{name}: +(\d+)", told, re.MULTILINE) for name in ("MemAvailable", "MemTotal")]
        free, whole = (float(one.group(1)) if one else math.inf for one in found)
        return free < SHORT * whole
    import ctypes  # some Pythons are built without it
    level = ctypes.c_int(0)  # 1: normal, 2: warning, 4: critical
    size = ctypes.c_size_t(ctypes.sizeof(level))
    with contextlib.suppress(AttributeError, OSError, TypeError):  # it is not macOS
        ctypes.CDLL(None).sysctlbyname(b"kern.memorystatus_vm_pressure_level", ctypes.byref(level),
                                       ctypes.byref(size), None, ctypes.c_size_t(0))
    return level.value > 1


def memory_of(pids: Iterable[int]) -> int:
    """Bytes that processes have in RAM; what they share counts for each."""
    if os.path.isdir("/proc/self"):
        total = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
        return total
    listed = subprocess.run(["ps", "-o", "rss=", "-p", ",".join(map(str, pids))], capture_output=True, text=True,
                            check=False).stdout
    return sum(int(kilobytes) * 1024 for kilobytes in listed.split())


# ==== Spares ======================================================================================
# In: started CLIs of which no run is going on. Out: the one that a request can go on with, if there is one (SPEC 4).

@dataclass(eq=False)
class Spare:
    """A started CLI, and the backend that speaks with it: for its first turn, or for the next one of a conversation."""
    backend: Backend
    child: Child
    stamps: Tuple[str, ...]  # of what it has read at its start
    request: Settled  # the last one, or one like those to come; without a prompt
    start: Literal["cold", "spare", "live"] = "cold"  # how it came to be there, for who takes it
    key: str = ""  # of its conversation; "": it has had none
    session_id: str = ""  # that of its conversation, if it is one's
    family: FrozenSet[int] = frozenset()  # its processes in its first turn, before a tool has run
    stored: Optional[str] = None  # the stamp of its conversation; None: not looked at since its last turn
    since: float = dataclasses.field(default_factory=time.monotonic)  # when it last began to wait, or was wanted

    START_SECS: ClassVar[float] = 20.0  # for a CLI to start, on a busy machine
    ACCEPT_SECS: ClassVar[float] = 3.0  # for one that has started to accept a turn

    def is_starting(self) -> bool:
        """Until it has answered its greeting."""
        return self.start == "spare" and not self.child.has_printed()

    def ask(self, request: Settled) -> None:
        self.child.begin_turn()
        self.backend.accepted = False
        if self.start == "live":
            assert request.conversation
            self.backend.ask_on(request.with_prompt(request.conversation.turn), self.child)
        else:
            self.backend.ask(request, self.child)

    def accepts_by(self) -> float:
        """When it must have accepted a turn that begins now, or hangs. One that has not waited may take its time."""
        if self.start == "cold":
            return math.inf
        return time.monotonic() + (self.START_SECS if self.is_starting() else self.ACCEPT_SECS)

    def processes(self) -> FrozenSet[int]:
        return frozenset(process.pid for process in descendants(self.child.process, self.child.mark))

    def meet_family(self, *, used_tools: bool) -> None:
        """See which processes are the CLI's own, in its first turn. Once a tool has run, others may be that tool's."""
        itself = frozenset({self.child.process.pid})
        self.family = itself if used_tools else itself | self.processes()

    def goes_on_by_itself(self) -> bool:
        """Whether it has said something since its answer: it would be taken for the next one."""
        try:
            return any(True for data in self.child.unread() for _ in self.backend.read(data, self.child))
        except ClinvkError:
            return True

    def is_current(self) -> bool:
        """Whether it lives, one that is started now would read the same, and nobody else has gone on with its
        conversation."""
        return (self.child.is_there and self.stamps == self.backend.stamps(self.request) and
                (not self.stored or self.stored == self.backend.stored()))


def started(request: Settled, backend: Backend, children: Children, stop: Stop) -> Spare:
    """Start the CLI for a request, or for one like it, and greet it. Raises a ClinvkError if that can not be done."""
    try:
        if not request.isolated and os.path.realpath(request.workdir) != request.workdir:
            raise Forbidden(f"workdir: {request.workdir} is no longer the directory that was checked")
        stamps = backend.stamps(request)
        backend.prepare(request, functools.partial(output_of, children, stop))
        child = children.start(backend.command(request))
    except OSError as error:
        backend.clean_up()
        raise BackendUnavailable(f"{backend.name} can not be started: {error}") from None
    except BaseException:
        backend.clean_up()
        raise
    backend.greet(child)
    return Spare(backend, child, stamps, without_prompt(request))


def without_prompt(request: Settled) -> Settled:
    """What is remembered of a request: a prompt may have megabytes."""
    return dataclasses.replace(request.with_prompt(Prompt("")), conversation=None, turns=())


class Heard:
    """What of an answer decides whether its CLI can go on with the conversation."""

    def __init__(self) -> None:
        self.text, self.joined = hashlib.sha256(), Joined()  # as a client gets it
        self.tokens = 0  # of the conversation, as the provider counts them
        self.used_tools = False
        self.done: Optional[Done] = None

    def add(self, event: Event) -> None:
        if isinstance(event, Message):
            self.text.update(utf8(self.joined.add(event)))
        elif isinstance(event, TokenUsage):
            self.tokens = event.usage.all_input + event.usage.output_tokens
        elif isinstance(event, ToolUse):
            self.used_tools = True
        elif isinstance(event, Done):
            self.done = event

    @property
    def succeeded(self) -> bool:
        return self.done is not None and self.done.exit_code == 0

    @property
    def is_whole(self) -> bool:
        return self.done is not None and self.done.exit_code == 0 and self.done.stop == "end"


class Wanted(NamedTuple):
    request: Settled  # one like those to come
    at: float  # when the last one like it came


class Holds(Protocol):
    """Where it is known which sessions have their conversation in a process that waits."""

    def free(self, session_id: str) -> None:
        """The process has gone."""

    def asked_for(self, session_ids: Sequence[str]) -> Container[str]:
        """Those of the sessions, held here, that another server goes on with, or that are deleted."""


class Spares:
    """The CLIs that wait: up to `server.spares` that have only been started, one of a backend at most, and up to
    `server.live_conversations` that have just answered. One thread tends them, once there is something to tend."""
    LOOK_SECS = 1.0  # between two looks at those that wait
    HOLDS_SECS = 0.25  # the same, if one has a session's conversation, which another server may ask for
    STORED_SECS = 0.2  # after which a CLI has stored a turn
    CONTEXT_TOKENS = 100_000  # of a conversation: beyond, CLIs begin to shorten it
    MEMORY_BYTES = 768 * 2**20  # of one CLI and its descendants, at most

    def __init__(self, settings: ServerConfig, children: Children, slots: Slots, closing: threading.Event,
                 holds: Holds, backend_of: Callable[[str], Backend]) -> None:
        self.settings, self.children, self.slots, self.closing = settings, children, slots, closing
        self.holds, self.backend_of = holds, backend_of
        self.changed = threading.Condition(threading.RLock())  # guards the rest
        self.fresh: Dict[str, Spare] = {}  # backend -> its spare
        self.live: List[Spare] = []  # the one that answered last comes last
        self.wanted: Dict[str, Wanted] = {}  # by backend, what came last at the end; holds all of `fresh`
        self.leaving: Dict[str, threading.Thread] = {}  # session -> who sees off the process that has it
        self.keeper: Optional[threading.Thread] = None
        self.starting = threading.Lock()  # held while a spare is being started

    # ---- For a run

    def take(self, request: Settled) -> Optional[Spare]:
        """A CLI that this request can go on with, the caller's from now on. None: one must be started."""
        with self.changed:
            found = self.live_one_locked(request) or self.fresh_one_locked(request)
            self.retire([] if found else self.in_the_way_locked(request))
            leaving = self.leaving.get(request.conversation.session_id) if request.conversation else None
        if leaving:
            leaving.join()  # it has the conversation
        return found

    def live_one_locked(self, request: Settled) -> Optional[Spare]:
        """The process that gave the last answer of the conversation."""
        talk = request.conversation
        if not talk or not talk.key_before:
            return None
        for spare in self.live:
            fits = spare.key == talk.key_before and spare.request.standing == request.standing
            refused = spare.backend.refuses(request.with_prompt(talk.turn)) if fits else ""
            if fits and not refused and spare.is_current() and not spare.goes_on_by_itself():
                self.live.remove(spare)
                return spare
        return None

    def fresh_one_locked(self, request: Settled) -> Optional[Spare]:
        if not request.isolated or request.extra:
            return None
        spare = self.fresh.pop(request.backend, None)
        if spare and not spare.is_current():
            self.retire([spare])
            return None
        return spare

    def in_the_way_locked(self, request: Settled) -> List[Spare]:
        """What must go before a CLI is started: one that has the conversation, and does not fit; and what is only just
        being started, which is put off."""
        talk = request.conversation
        stuck = [spare for spare in self.live if talk and talk.session_id and spare.session_id == talk.session_id]
        self.live = [spare for spare in self.live if spare not in stuck]
        hasty = [name for name, spare in self.fresh.items() if spare.is_starting()]
        return stuck + [self.fresh.pop(name) for name in hasty]

    def take_back(self, spare: Spare, request: Settled, heard: Heard) -> bool:
        """Whether the CLI waits, from now on, for the next turn of the conversation; else it is still the caller's."""
        talk = request.conversation
        spare.stored = None  # the turn has changed it
        if not (talk and self.settings.live_conversations and self.can_go_on(spare, request, heard)):
            return False
        spare.start, spare.request, spare.since = "live", without_prompt(request), time.monotonic()
        spare.key, spare.session_id = talk.key_after(heard.text.hexdigest()), talk.session_id
        with self.changed:
            if self.closing.is_set():
                return False
            surplus = max(0, len(self.live) + 1 - self.settings.live_conversations)
            crowded, self.live = self.live[:surplus], [*self.live[surplus:], spare]
            self.tend_locked()
        self.retire(crowded)
        return True

    def can_go_on(self, spare: Spare, request: Settled, heard: Heard) -> bool:
        """Whether the conversation is whole, not too long, and the CLI as one that is started for its next turn."""
        size = max(heard.tokens, estimate(heard.joined.characters + len(request.prompt) + len(request.system_prompt)))
        able = spare.backend.can_wait and spare.backend.lasts(request) and spare.is_current()
        left_running = heard.used_tools and spare.processes() - spare.family
        return able and heard.is_whole and size < self.CONTEXT_TOKENS and not left_running

    def want(self, request: Settled) -> None:
        """There may come another request like this one, whose answer has ended: have a CLI ready for it."""
        name = request.backend
        if not (self.settings.spares and request.isolated and not request.extra and kind_of(name).can_wait):
            return
        with self.changed:
            self.wanted.pop(name, None)
            self.wanted[name] = Wanted(without_prompt(request), time.monotonic())
            if name in self.fresh:
                self.fresh[name].since = time.monotonic()
            surplus = list(self.wanted)[:-self.settings.spares]
            ended = [self.fresh.pop(other) for other in surplus if other in self.fresh]
            for other in surplus:
                del self.wanted[other]
            self.tend_locked()
        self.retire(ended)

    def end(self, spare: Spare, then: Callable[[], None], *, patience: float) -> threading.Thread:
        """End it in a thread of its own, and call `then` when nothing is left of it."""
        with self.changed:
            thread = self.children.dismiss(spare.child, functools.partial(self.ended, spare, then), patience=patience)
            if spare.session_id:
                self.leaving[spare.session_id] = thread
        return thread

    def retire(self, spares: Iterable[Spare]) -> None:
        """End those that wait no longer; one with a session's conversation stores that."""
        for spare in spares:
            self.end(spare, nothing, patience=PATIENCE if spare.session_id else 0.0)

    def ended(self, spare: Spare, then: Callable[[], None]) -> None:
        """Nothing is left of it but files, and the mark at its session."""
        try:
            spare.backend.clean_up()
        finally:
            if spare.session_id:
                self.holds.free(spare.session_id)
            with self.changed:
                if self.leaving.get(spare.session_id) is threading.current_thread():
                    del self.leaving[spare.session_id]
            then()

    def let_go(self, session_id: str) -> None:
        """Returns when no process that waits has the conversation of that session."""
        with self.changed:
            ended = [spare for spare in self.live if spare.session_id == session_id]
            self.live = [spare for spare in self.live if spare not in ended]
            self.retire(ended)
            leaving = self.leaving.get(session_id)
        if leaving:
            leaving.join()

    # ---- The thread that tends them

    def tend_locked(self) -> None:
        if self.keeper is None:
            self.keeper = threading.Thread(target=self.tend, name="spares", daemon=True)
            self.keeper.start()
        self.changed.notify_all()

    def tend(self) -> None:
        looked_at = 0.0
        while not self.closing.is_set():
            try:
                looked_at = self.tend_once(looked_at)
            except Exception:  # what waits would have nobody to end it
                LOG.error("a defect of clinvk, in what tends the CLIs that wait\n%s", traceback.format_exc())
                self.closing.wait(self.LOOK_SECS)
        self.close()

    def tend_once(self, looked_at: float) -> float:
        """Wait until something is to be done, and do it: end what waits in vain, or, if no run is going on, start what
        is wanted. Returns when those that wait were last looked at."""
        with self.changed:
            missing = [wanted for name, wanted in self.wanted.items() if name not in self.fresh]
            holds = any(spare.session_id for spare in self.live)
            pause = self.HOLDS_SECS if holds else self.LOOK_SECS if missing or self.fresh or self.live else math.inf
            rest = looked_at + pause - time.monotonic()
            if rest > 0 and not missing:
                self.changed.wait(min(rest, threading.TIMEOUT_MAX))
        if rest <= 0:  # a look takes 1.5 ms: too long for the end of each request
            self.retire(self.outdated())
            return time.monotonic()
        if missing and self.slots.wait_until_idle(rest):
            self.start(missing[-1])
        return looked_at

    def outdated(self) -> List[Spare]:
        """Those that nobody has come for, that are not as one that is started now would be, or take too much memory:
        they do not wait any more."""
        with self.changed:
            waiting = [*self.fresh.values(), *self.live]
        asked_for: Container[str] = ()
        with contextlib.suppress(StoreUnavailable):  # who asks for one waits
            asked_for = self.holds.asked_for([spare.session_id for spare in waiting if spare.session_id])
        short = bool(waiting) and memory_is_short()
        stale = [spare for spare in waiting if not spare.is_current()]
        unfit = [spare for spare in waiting if short or spare in stale or spare.session_id in asked_for or
                 self.is_overdue(spare) or self.is_large(spare)]
        with self.changed:
            unfit += [spare for spare in self.live if spare not in unfit and spare.goes_on_by_itself()]
            ended = [spare for spare in unfit if spare in self.live or spare in self.fresh.values()]
            self.live = [spare for spare in self.live if spare not in unfit]
            for name in [name for name, spare in self.fresh.items() if spare in unfit]:
                spare = self.fresh.pop(name)
                if not spare.child.is_there:
                    LOG.warning("a %s that waited for a request has ended by itself", name)
                elif spare in stale and not short and not self.is_overdue(spare):
                    continue  # another is started, that reads what has changed
                self.wanted.pop(name, None)
        return ended

    def is_overdue(self, spare: Spare) -> bool:
        """Whether it waits in vain."""
        return time.monotonic() - spare.since > self.settings.spare_idle_secs

    def is_large(self, spare: Spare) -> bool:
        """Whether it takes more memory than it may: looked at once after each turn, when it is at rest, as is what it
        has stored."""
        if spare.stored is not None or time.monotonic() - spare.since < self.STORED_SECS:
            return False
        spare.stored = spare.backend.stored() if spare.session_id else ""
        return memory_of(spare.processes()) > self.MEMORY_BYTES

    def start(self, wanted: Wanted) -> None:
        """Have a CLI ready for a request like the one that was asked."""
        name = wanted.request.backend
        with self.starting:
            spare = None if self.closing.is_set() or memory_is_short() else self.ready_for(wanted.request)
        with self.changed:
            if spare and not self.closing.is_set() and name in self.wanted and name not in self.fresh:
                spare.since = self.wanted[name].at
                self.fresh[name] = spare
                return
            self.wanted.pop(name, None)
        self.retire([spare] if spare else [])

    def ready_for(self, request: Settled) -> Optional[Spare]:
        try:
            backend = self.backend_of(request.backend)
            backend.started_ahead = True
            stop = Stop(closing=self.closing).allow(Spare.START_SECS)
            spare = started(request, backend, self.children, stop)
        except (ClinvkError, OSError) as error:
            LOG.warning("no %s is started for the next request: %s", request.backend, error)
            return None
        spare.start = "spare"
        spare.backend.look_ahead(request, spare.child)
        return spare

    def close(self) -> None:
        """End them all; the server is closing, so no more is started."""
        with self.starting, self.changed:  # one that is being started is ended by its thread, or is here by now
            waiting = [*self.fresh.values(), *self.live]
            self.fresh, self.live = {}, []
            self.changed.notify_all()
        self.retire(waiting)


# ==== Runs ========================================================================================
# In: a Settled request and its backend. Out: the events of the run.

@dataclass
class Ran:
    """What the log and the metrics tell of one run when it is over (SPEC 8); filled in while it goes on. Times are of
    `time.monotonic()`."""
    backend: str
    start: str = "cold"  # how its CLI came to be there: cold, spare, live
    began: float = 0.0  # when it had its slot; 0: not yet
    ended: float = 0.0  # 0: not yet
    status: str = "error"  # one of RUN_STATUSES
    exit_code: int = -1
    usage: Optional[Usage] = None
    cost_usd: float = 0.0
    first_text_secs: Optional[float] = None  # from the request to the first output
    request: Optional[Settled] = None  # another like it may come

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def hear(self, event: Event, asked_at: float) -> None:
        if isinstance(event, (Message, Thinking, ToolUse)):
            if self.first_text_secs is None and (isinstance(event, ToolUse) or event.text):
                self.first_text_secs = time.monotonic() - asked_at
        elif isinstance(event, TokenUsage):
            self.usage = event.usage
        elif isinstance(event, Failure):
            self.status = {TimedOut: "timeout", Canceled: "canceled"}.get(type(event.error), "error")
        elif isinstance(event, Done):
            self.ended, self.exit_code, self.cost_usd = time.monotonic(), event.exit_code, event.cost_usd or 0.0
            self.status = "success" if event.exit_code == 0 else self.status


RUN_STATUSES = ("success", "error", "timeout", "canceled")


def observed(events: Events, ran: Ran, stop: Stop, tell: Callable[[Ran], None]) -> Events:
    """`events`, which fill in `ran`; it is told of at the end, unless nothing has been started."""
    try:
        with contextlib.closing(events):
            for event in events:
                ran.hear(event, stop.began)
                if isinstance(event, Failure):
                    done = next(events)  # first, as who is told of a failure may ask for nothing more
                    ran.hear(done, stop.began)
                    yield event
                    event = done
                yield event
    except GeneratorExit:
        ran.status = ran.status if ran.ended else "canceled"
        raise
    except ClinvkError:
        ran.began = 0.0
        raise
    finally:
        if ran.began:
            ran.ended = ran.ended or time.monotonic()
            tell(ran)


def run(request: Settled, backend: Backend, spares: Spares, slots: Slots, stop: Stop, ran: Ran, *,
        admitted: bool = False) -> Events:
    """One prompt and its answer: wait for a slot, find or start the CLI, say the prompt, yield events (SPEC 4).

    Yields the backend's events, a Progress per SILENCE, a Failure if the run failed, and one Done, always last.
    Raises a ClinvkError instead if nothing has been started: nothing but Progress has come then. Closing the generator
    ends the CLI and all its descendants within 2 s; a client that leaves a silent CLI is noticed through `stop`."""
    started = time.monotonic()
    try:
        in_slot = in_a_slot(request, backend, spares, slots, stop, ran, admitted=admitted)
        with contextlib.closing(in_slot) as events:
            for event in events:
                yield timed(event, started)
    except BackendAuth as error:  # not logged in is a failed run, whenever it is noticed
        for event in failing(error):
            yield timed(event, started)
    finally:
        stop.allow(math.inf)  # a client may take its time with what is left to read


def timed(event: Event, started: float) -> Event:
    """A Done with its duration; any other event as it is."""
    if isinstance(event, Done):
        return dataclasses.replace(event, duration_ms=round(1000 * (time.monotonic() - started)))
    return event


def in_a_slot(request: Settled, backend: Backend, spares: Spares, slots: Slots, stop: Stop, ran: Ran, *,
              admitted: bool) -> Events:
    """The run, once it has a slot; which it gives back, here or when the last process of its CLI has gone."""
    yield from slots.take(stop, admitted=admitted)
    ran.began = time.monotonic()
    if isinstance(backend, InProcess):
        yield from in_process(backend.answer(request), slots, stop)
    else:
        yield from from_cli(request, backend, spares, slots, stop, ran)


def in_process(events: Iterator[Event], slots: Slots, stop: Stop) -> Events:
    """The events of a backend that needs no process, as long as somebody waits for them."""
    try:
        for event in events:
            stop.check()
            yield event
    except ClinvkError as error:
        yield from failing(error)
    finally:
        slots.release()


def from_cli(request: Settled, backend: Backend, spares: Spares, slots: Slots, stop: Stop, ran: Ran) -> Events:
    """The events of a CLI that waits for this request; if there is none, or it is Unfit, of one that is started."""
    with slots.released_on_error():
        cli = spares.take(request)
        error = stop.error()
        if not cli and isinstance(error, Canceled):  # nobody waits any more for what would be started now
            raise error
        cli = cli or started(request, backend, spares.children, stop)
    ran.start = cli.start
    try:
        yield from one_turn(request, cli, spares, slots, stop)
        return
    except Unfit as error:
        LOG.warning("a %s that had waited was of no use, and another is started: %s", request.backend, error)
    with slots.released_on_error():
        cli = started(request, backend, spares.children, stop)
    ran.start = cli.start
    yield from one_turn(request, cli, spares, slots, stop)


class Unfit(Exception):
    """A CLI that had waited has failed before its provider was asked, or because of its login: nothing is lost yet."""


def one_turn(request: Settled, spare: Spare, spares: Spares, slots: Slots, stop: Stop) -> Events:
    """Ask, and pass on what the CLI says until its answer is complete; then it waits for the next turn, or goes. The
    slot is given back. Raises Unfit, and keeps the slot."""
    heard, when_gone = Heard(), slots.release
    may_wait = request.keeps and spares.settings.live_conversations > 0
    try:
        for event in answered_by(request, spare, stop):
            heard.add(event)
            if may_wait and not spare.family and not isinstance(event, Init):
                spare.meet_family(used_tools=heard.used_tools)
            if not isinstance(event, Done):
                yield event
    except Unfit:
        when_gone = nothing
        raise
    finally:
        waits = waits_or_ends(request, spare, spares, heard, when_gone)
        if waits:
            slots.release()
    assert heard.done
    yield dataclasses.replace(heard.done, waits=waits)


def waits_or_ends(request: Settled, spare: Spare, spares: Spares, heard: Heard, when_gone: Callable[[], None]) -> bool:
    """Whether the CLI waits for the next turn of the conversation. Else it is ended, `when_gone` is called then, and if
    the next turn can only begin after that, this returns after it, too."""
    waits = False
    try:
        waits = heard.done is not None and spares.take_back(spare, request, heard)
    finally:
        if not waits:
            leaving = spares.end(spare, when_gone, patience=PATIENCE if heard.succeeded else 0.0)
            if request.keeps and (spare.backend.stores_at_exit or not heard.done):
                leaving.join()
    return waits


def answered_by(request: Settled, spare: Spare, stop: Stop) -> Iterator[Event]:
    """The events of one turn. Raises Unfit if the CLI had waited, and fails before anything comes of the answer."""
    accepts_by = spare.accepts_by()
    spare.ask(request)
    events = told_by(spare.backend, spare.child, stop, accepts_by=accepts_by)
    if spare.start == "cold":
        yield from events
        return
    held: List[Event] = []
    for event in events:
        if isinstance(event, Failure) and is_unfit(spare.backend, event.error, request):
            raise Unfit(str(event.error))
        if isinstance(event, Progress) and event.stage == "waiting":
            yield event  # what does not answer us within SILENCE has said nothing of the answer, either
            continue
        held.append(event)
        if not isinstance(event, (Init, Progress)):
            break
    yield from held
    yield from events


def is_unfit(backend: Backend, error: ClinvkError, request: Settled) -> bool:
    """Whether another CLI may do better, and the provider has not been asked yet, or has refused the login. What is
    stored of a conversation would have the prompt twice after that."""
    if isinstance(error, (Canceled, TimedOut)):
        return False
    return not backend.accepted or (isinstance(error, BackendAuth) and not request.keeps)


def told_by(backend: Backend, child: Child, stop: Stop, *, accepts_by: float) -> Iterator[Event]:
    """The events of one turn, the last of them a Done, whatever happens. A CLI that has not accepted the turn by
    `accepts_by`, of `time.monotonic()`, hangs, and fails."""
    for event in until_done(backend, child, stop, accepts_by):
        if isinstance(event, Failure):
            event.error.prompted = True  # SDKs must not repeat it
            if not isinstance(event.error, Canceled):
                event.error.details = quiet(child.stderr.decode(errors="replace"), backend.noise)
        yield event


def until_done(backend: Backend, child: Child, stop: Stop, accepts_by: float) -> Iterator[Event]:
    told_at = time.monotonic()  # the last event: much of what a CLI prints gives none
    try:
        for data in child.output(stop):
            for event in backend.read(data, child) if data else backend.look(child):
                yield event
                if isinstance(event, Done):
                    return
                told_at = time.monotonic()
            if not backend.accepted and time.monotonic() > accepts_by:
                for rest in child.kill():  # it must not wake up now, and ask its provider, while another does
                    for _ in backend.read(rest, child):
                        pass
                raise BackendFailed(f"{backend.name} does not answer")
            if time.monotonic() - told_at >= SILENCE:
                told_at = time.monotonic()
                yield Progress("waiting", f"nothing of the answer for {SILENCE:g} s")
        yield from backend.at_end(exit_code_of(child), child.stderr.decode(errors="replace"))
    except ClinvkError as error:
        yield from failing(error)


def exit_code_of(child: Child) -> int:
    """Of a CLI that closed its stdout; -1 if it does not go."""
    try:
        return child.process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return -1


# ---- Stop sequences

def cut_at(stops: Sequence[str], events: Events) -> Events:
    """`events` up to the first of `stops` in the answer's text; there the run is closed, and a Done says which.

    The paragraphs between the messages of an agent run are part of that text, and put in here. What may be the
    beginning of a stop sequence is held back until the next piece shows."""
    held, spoken = "", False
    with contextlib.closing(events):
        for event in events:
            if held and isinstance(event, (Failure, Done)):
                yield Message(held)
                held = ""
            if not isinstance(event, Message):
                yield event
                continue
            held += (PARAGRAPH if event.opens and spoken else "") + event.text
            text, found = split_at(stops, held)
            held = "" if found else text[len(text) - overlap(stops, text):]
            yield Message(text[:len(text) - len(held)], is_partial=event.is_partial, opens=not spoken)
            spoken = True
            if found:
                events.close()
                yield Done(0, stop="sequence", stop_sequence=found)
                return


def split_at(stops: Sequence[str], text: str) -> Tuple[str, str]:
    """The text before the stop sequence that is complete first, and that sequence; all of it and "" without one."""
    found = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, ""
    _, at, stop = min(found)
    return text[:at], stop


def overlap(stops: Sequence[str], text: str) -> int:
    """How many of the last characters may be the beginning of a stop sequence."""
    longest = min(max(map(len, stops)) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


# ---- Structured output

def fitted(events: Events, schema: Json, stops: Sequence[str], again: Optional[Callable[[str, str], Events]],
           used: Optional[Usage] = None) -> Events:
    """`events` with an answer that is JSON as `schema` describes it, told at once when it is whole; else a Refusal.
    What does not fit is sent back once: `again`, if there is that, is given it and what to say to it, and runs. An
    answer that has been cut, at one of `stops` or at max_tokens, need not fit. `used` is what came before."""
    result = Result()
    yield from gathered(events, result)
    used = used + result.usage if used and result.usage else result.usage or used
    text, stop = split_at(stops, result.text)
    done = dataclasses.replace(result.done, stop="sequence", stop_sequence=stop) if stop else result.done
    text, wrong = fitting(text, schema)
    fits, answered = not wrong or done.stop != "end", not result.failure and result.refusal is None
    if again and answered and not fits:
        yield Progress("repairing", "the answer does not fit its JSON Schema, and is asked for once more")
        repaired = again("".join(result.said), REPAIR.format(wrong, json.dumps(schema, ensure_ascii=False)))
        yield from fitted(repaired, schema, stops, None, used)
        return
    if answered:
        yield Message(text, opens=True) if fits else Refusal(refusal_for(text, wrong))
    yield from [TokenUsage(used)] if used else []
    yield done


def gathered(events: Events, result: Result) -> Iterator[Event]:
    """The run's events go to `result`, and all but those of its answer also on; in their place one per SILENCE."""
    told_at = time.monotonic()
    with contextlib.closing(events):
        for event in events:
            result.add(event)
            if not isinstance(event, (Message, TokenUsage, Done)):
                told_at = time.monotonic()
                yield event
            elif time.monotonic() - told_at >= SILENCE:
                told_at = time.monotonic()
                yield Progress("answering", "the answer is not whole yet")


AS_JSON = "Answer with JSON and nothing else, without code fences. It must fit this JSON Schema:\n\n{}"
REPAIR = "Your answer does not fit its JSON Schema ({}). " + AS_JSON


# A fence that is not closed goes to the end, as in CommonMark; so each character is looked at once.
FENCED = re.compile(r"^[ \t]*```[^`\n]*\n(.*?)(?:```[ \t\r]*$|\Z)", re.DOTALL | re.MULTILINE)


def json_in(text: str) -> Tuple[Any, str]:
    """The one JSON value that an answer is, or that stands in its one code fence; and its text, as it was written.
    Raises ValueError: why there is none."""
    blocks = FENCED.findall(text)
    inner = (blocks[0] if len(blocks) == 1 else text).strip()  # no line of JSON begins with a fence
    try:
        return json.loads(inner, parse_float=finite, parse_constant=finite), inner
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"is not one JSON value and nothing else: {error}" if inner else "is empty") from error


def finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number[:20]} is no JSON number, or too large for one")
    return float(number)


def fitting(text: str, schema: Json) -> Tuple[str, str]:
    """The JSON of an answer, and ""; or the answer as it is, and what is wrong with it."""
    try:
        value, json_text = json_in(text)
    except ValueError as error:
        return text, f"the answer {error}"
    wrong = value_faults(value, schema)
    return (text, "; ".join(wrong)) if wrong else (json_text, "")


def told_schema(request: Settled, backend: Backend) -> Settled:
    """With the schema, if it has one, as the backend takes it; or in words: in the system prompt, but where the CLI has
    that from the conversation's first turn."""
    if request.schema is None:
        return request
    own = backend.schema_for(request.schema)
    if own is not None:
        return dataclasses.replace(request, schema=own)
    words = AS_JSON.format(json.dumps(request.schema, ensure_ascii=False))
    if request.resume:
        return dataclasses.replace(request.with_prompt(prompt_of([*request.parts, PARAGRAPH + words])), schema=None)
    system_prompt = PARAGRAPH.join(part for part in (request.system_prompt, words) if part)
    return dataclasses.replace(request, schema=None, system_prompt=system_prompt)


JSON_BEGINS = re.compile(r"""\s*(?:[{[]|```|(?:true|false|null|-?\d[\d.eE+-]*|".*")\s*\Z)""", re.DOTALL)


def refusal_for(text: str, wrong: str) -> str:
    """An answer in words says itself why it is no JSON."""
    in_words = text.strip() and not JSON_BEGINS.match(text)
    return text if in_words else f"The answer does not fit the JSON Schema ({wrong}). It was: {text}"


# ==== Sessions ====================================================================================
# In: a session, and the events of its next turn. Out: the same events, each step stored before it is told.

STATUSES = ("active", "completed", "error", "paused")


@dataclass(frozen=True)
class Session:
    """One conversation (SPEC 2.3). Its fields are the columns of a row; times are seconds since the epoch."""
    id: str  # 32 hex digits
    backend: str
    created_at: float
    last_used: float
    working_dir: str
    model: str
    title: str
    tags: List[str]
    metadata: Dict[str, str]
    initial_prompt: str
    system_prompt: str  # of the first turn
    status: str = "active"
    turn_count: int = 0
    token_usage: Dict[str, int] = dataclasses.field(default_factory=dict)  # of all turns; empty: nothing was told
    backend_session_id: str = ""  # what the CLI calls it
    error_message: str = ""
    has_begun: bool = False  # the CLI has said that the conversation is there
    sandbox_mode: str = ""  # the last one that a turn named
    turn: str = ""  # the one that is running: the name of its server's Lease, a colon, and its own
    held: str = ""  # the name of the Lease of the server in which a process waits for the next turn

    def begun(self, init: Init) -> Session:
        """Now that its CLI has said what it calls it."""
        return dataclasses.replace(self, model=self.model or init.model, has_begun=True,
                                   backend_session_id=init.backend_session_id or self.backend_session_id)

    def ended(self, usage: Optional[Usage], *, failed: bool, held: str) -> Session:
        """After a turn, and its counts."""
        counts: Mapping[str, Any] = {} if usage is None else native_usage(usage)
        total = {**self.token_usage, **{name: self.token_usage.get(name, 0) + n for name, n in counts.items()}}
        return dataclasses.replace(self, status="error" if failed else "completed", turn="", held=held,
                                   last_used=time.time(), turn_count=self.turn_count + 1, token_usage=total)


def new_session(request: Settled, tags: Sequence[str]) -> Session:
    """The session whose first turn is `request`. A conversation that the CLI lets us name is named before it begins, so
    that it can be gone on with, and deleted, whenever the first turn breaks off."""
    first_line = next(line.strip() for line in request.prompt.splitlines() if line.strip())
    now = time.time()
    return Session(uuid.uuid4().hex, request.backend, now, now, request.workdir, request.model, first_line[:50],
                   list(dict.fromkeys([*tags, "api"])), request.metadata, request.prompt, request.system_prompt,
                   backend_session_id=kind_of(request.backend).new_conversation())


def next_turn(session: Session, run_in: Callable[[Session], Events], store: Store, *, is_new: bool,
              counts_usage: bool) -> Events:
    """The events of the run that is the next turn of `session`; `run_in` starts it, in the session as it is by then.

    It is stored as `active` before the run begins, and as it has ended before the Done. Raises Conflict if a turn of it
    is running already. A run that can not even be started, or whose conversation the CLI has lost, raises its error and
    leaves the session as it was; a new one is gone again."""
    before, session = store.begin(session, is_new=is_new)
    stays = True
    try:
        yield from recorded(session, run_in(session), store, counts_usage=counts_usage)
    except ClinvkError as error:
        stays = False
        error.prompted = error.prompted or isinstance(error, StoreUnavailable)
        with contextlib.suppress(StoreUnavailable):  # `release` will say so
            store.put_back(session.id, before)
        raise
    finally:
        store.release(session.turn, created=is_new and stays)


def recorded(session: Session, events: Events, store: Store, *, counts_usage: bool) -> Events:
    """`events`, each stored in `session` before it is passed on, as far as it changes that."""
    usage: Optional[Usage] = None
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Init):
                session = session.begun(event)
                store.save(session)
            elif isinstance(event, TokenUsage) and counts_usage:
                usage = event.usage
            elif isinstance(event, Failure):
                if isinstance(event.error, (Forgotten, Conflict)):  # the prompt has not been given
                    event.error.prompted = False
                    raise event.error
                session = dataclasses.replace(session, error_message=event.error.full_message)
            elif isinstance(event, Done):
                try:
                    held = store.lease.name if event.waits else ""
                    store.save(session.ended(usage, failed=event.exit_code != 0, held=held))
                except StoreUnavailable as error:
                    yield Failure(StoreUnavailable(f"the run has ended, but its session is not stored: {error}"))
                    event = dataclasses.replace(event, exit_code=event.exit_code or -1)
            yield event


# ---- The store

# A database's user_version says how many of these it has been through. None is ever changed once it has been released:
# what comes later is a migration of its own.
OURS = 0x636C7662  # the database's application_id, which no other program's has
MIGRATIONS: Tuple[Tuple[str, ...], ...] = ((
    f"PRAGMA application_id = {OURS}",
    """CREATE TABLE sessions (
           id TEXT PRIMARY KEY, backend TEXT NOT NULL, created_at REAL NOT NULL, last_used REAL NOT NULL,
           working_dir TEXT NOT NULL, model TEXT NOT NULL, title TEXT NOT NULL, tags TEXT NOT NULL,
           metadata TEXT NOT NULL, status TEXT NOT NULL, turn_count INTEGER NOT NULL, token_usage TEXT NOT NULL,
           backend_session_id TEXT NOT NULL, error_message TEXT NOT NULL, has_begun INTEGER NOT NULL,
           sandbox_mode TEXT NOT NULL, turn TEXT NOT NULL)""",
    "CREATE INDEX by_use ON sessions (last_used)",
    "CREATE INDEX by_backend ON sessions (backend, last_used)",
    "CREATE INDEX by_status ON sessions (status, last_used)",
    "CREATE INDEX by_backend_and_status ON sessions (backend, status, last_used)",
    # Apart from the rest, as they may have megabytes and never change.
    "CREATE TABLE prompts (id TEXT PRIMARY KEY, system_prompt TEXT NOT NULL, initial_prompt TEXT NOT NULL)",
    "CREATE TRIGGER no_prompts AFTER DELETE ON sessions BEGIN DELETE FROM prompts WHERE id = old.id; END"),
    ("ALTER TABLE sessions ADD COLUMN held TEXT NOT NULL DEFAULT ''",))
LOCK_WAIT = 5.0  # seconds for another program that holds the database


class Database:
    """A connection to the database, which other servers have, too. One thread at a time is in a transaction.

    A file that has been removed or replaced meanwhile is opened anew: what is written must not be lost with the old."""
    OPENING = threading.Lock()  # a connection that only reads must not share its locks with one that is being opened

    def __init__(self, file: Path) -> None:
        self.file = file
        self.identity: Optional[Tuple[int, int]] = None  # until it is open
        self.lock = threading.Lock()  # guards the connection, identity and failed_at
        self.failed_at = 0.0  # when LOCK_WAIT was last over
        self.open()

    def open(self) -> None:
        """Raises ConfigError if the database is none that this clinvk can use."""
        with self.OPENING:
            make_database(self.file)
            self.connection = sqlite3.connect(str(self.file), timeout=LOCK_WAIT, isolation_level=None,
                                              check_same_thread=False)
            self.connection.execute("PRAGMA synchronous = NORMAL")  # a killed server loses nothing
            self.connection.execute("SELECT 1 FROM sessions LIMIT 1")  # it is not opened before
            self.identity = identity_of(self.file)

    @contextlib.contextmanager
    def transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        """`kind` is DEFERRED to read, IMMEDIATE to write. Raises StoreUnavailable."""
        began = time.monotonic()
        try:
            with self.lock:
                self.begin(kind, began)
                try:
                    yield self.connection
                    self.connection.execute("COMMIT")
                finally:
                    if self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
        except (sqlite3.Error, OSError, ConfigError) as error:
            raise StoreUnavailable(f"the sessions can not be read or written ({self.file}: {error}). Mend that; a "
                                   "prompt that is ephemeral needs no session") from None

    def begin(self, kind: str, asked_at: float) -> None:
        """A transaction, on the file that is there by now."""
        if self.failed_at > asked_at:  # who has waited behind it has waited as long
            raise sqlite3.OperationalError("database is locked")
        if self.identity is None or identity_of(self.file) != self.identity:
            self.identity = None
            self.connection.close()
            self.open()
        try:
            self.connection.execute(f"BEGIN {kind}")
        except sqlite3.OperationalError:
            self.failed_at = time.monotonic()
            raise

    def close(self) -> None:
        with self.lock:
            self.connection.close()


def identity_of(file: Path) -> Optional[Tuple[int, int]]:
    """What tells a file from another one in its place; None if there is no file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def make_database(file: Path) -> None:
    """Make the database, or bring it to the present version. Raises ConfigError, and touches nothing, if it is of a
    newer one, or is none of clinvk's."""
    try:
        version, is_ours = version_of(file)
        if not is_ours:
            time.sleep(0.5)  # another server may be making it just now
            version, is_ours = version_of(file)
        if version > len(MIGRATIONS):
            raise ConfigError(f"{file}: was written by a newer clinvk (version {version} of the database; this one "
                              f"knows {len(MIGRATIONS)}). Use that clinvk, or set CLINVK_HOME to another directory")
        if not is_ours:
            raise ConfigError(f"{file}: is the database of another program. Move the file away, or set CLINVK_HOME to "
                              "another directory")
        if not file.exists():  # to open and close one that is in use would end SQLite's locks on it
            file.touch(0o600)
        file.chmod(0o600)
        with contextlib.closing(sqlite3.connect(str(file), timeout=LOCK_WAIT, isolation_level=None)) as connection:
            use_wal(connection)
            migrate(connection)
    except sqlite3.Error as error:
        raise ConfigError(f"{file}: can not be used as the database of the sessions: {error}. Mend that, move the file "
                          "away, or set CLINVK_HOME to another directory") from None


def version_of(file: Path) -> Tuple[int, bool]:
    """The version of a database, 0 if there is none yet, and whether it is clinvk's. Nothing is written for that."""
    if not file.exists() or not file.stat().st_size:
        return 0, True
    log = Path(f"{file}-wal")
    untouched = "" if log.exists() and log.stat().st_size else "&immutable=1"
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro{untouched}", uri=True)) as connection:
        connection.execute("BEGIN")  # all three as of one time
        version, owner, tables = (connection.execute(query).fetchone()[0] for query in (
            "PRAGMA user_version", "PRAGMA application_id", "SELECT count(*) FROM sqlite_master"))
    return int(version), owner == OURS or (version, owner, tables) == (0, 0, 0)


def use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait by itself for another server that is doing the same."""
    patience_ends = time.monotonic() + LOCK_WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > patience_ends:
                raise
            time.sleep(0.01)


def migrate(connection: sqlite3.Connection) -> None:
    """All that is missing, in one transaction."""
    if connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    done = connection.execute("PRAGMA user_version").fetchone()[0]  # another server may have been first
    for statement in itertools.chain.from_iterable(MIGRATIONS[done:]):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    connection.execute("COMMIT")


class Lease:
    """The sign that a server lives: a file that it holds a lock on, which ends with its process, however that ends.

    Without fcntl, on Windows, there is none, and a server knows of no other."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, uuid.uuid4().hex
        if fcntl:
            self.handle, unnamed = tempfile.mkstemp(dir=directory, prefix=".")
            fcntl.flock(self.handle, fcntl.LOCK_EX)
            os.replace(unnamed, directory / self.name)  # who finds it finds it locked

    def is_held(self, name: str) -> bool:
        """Whether the server of that name lives."""
        if name == self.name or not fcntl:
            return name == self.name
        try:
            handle = os.open(self.directory / name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def sweep(self) -> None:
        """Remove the files of servers that were killed."""
        for file in self.directory.glob("[0-9a-f]*"):
            if not self.is_held(file.name):
                file.unlink(missing_ok=True)  # another server may sweep, too

    def end(self) -> None:
        if fcntl:
            (self.directory / self.name).unlink(missing_ok=True)
            os.close(self.handle)


STOPPED = "server stopped during the run"
HELD_SECS = 5.0  # for another server to end the process in which it has the conversation
GIVEN_UP = "the request was given up before its answer was complete"


PROMPTS = ("system_prompt", "initial_prompt")  # of a session: in a table of their own


class Store:
    """Every session. A method may be called from any thread; when it returns, what it changed is committed.

    All of them raise StoreUnavailable if the database can not be used."""
    COLUMNS = tuple(f.name for f in dataclasses.fields(Session) if f.name not in PROMPTS)
    AS_JSON = ("tags", "metadata", "token_usage")
    SHOWN = 1000  # characters of an initial_prompt in a list
    AT_ONCE = 1000  # sessions to delete in one transaction: others write meanwhile

    def __init__(self, config: Config, closing: Optional[threading.Event] = None) -> None:
        """Once `closing` is set nobody waits. Raises ConfigError if the database is none that this clinvk can use, and
        OSError."""
        self.closing = closing or threading.Event()
        servers = own_directory(config, "servers")
        self.file = config.home / "sessions.db"
        self.reading, self.writing = Database(self.file), Database(self.file)  # so that no reader waits for a writer
        self.lease = Lease(servers)
        self.changed = threading.Condition()  # guards running and created
        self.running: Set[str] = set()  # the turns that are running in this server
        self.created = 0  # sessions that began in this server, and whose first turn has ended
        self.unstored: Set[str] = set()  # those that have ended while the database could not be written
        self.recover()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that writes; first it makes up for what could not be written before."""
        with self.writing.transaction("IMMEDIATE") as db:
            unstored = set(self.unstored)
            self.give_up(db, unstored, GIVEN_UP)
            yield db
        self.unstored -= unstored

    # ---- A turn

    def begin(self, session: Session, *, is_new: bool) -> Tuple[Optional[Session], Session]:
        """A turn of `session` begins: the session as it was (None if it is new), and as it is now, active. No other
        server has a process any more that waits for it. Raises Conflict if another turn is running, in any server, and
        NotFound if it has been deleted."""
        turn = f"{self.lease.name}:{uuid.uuid4().hex}"
        with self.changed:
            self.running.add(turn)
        try:
            with self.write() as db:
                before = None if is_new else self.idle(db, session.id)
                elsewhere = before.held if before and before.held != self.lease.name else ""
                now = dataclasses.replace(before or session, status="active", error_message="", last_used=time.time(),
                                          turn=turn, held=elsewhere, sandbox_mode=session.sandbox_mode,
                                          metadata={**(before or session).metadata, **session.metadata})
                self.put(db, now)
            with contextlib.suppress(StoreUnavailable):  # what is stored next will say so
                self.wait_until_free(now)
        except BaseException:
            self.ended(turn, created=False)
            raise
        return before, dataclasses.replace(now, held="")

    def wait_until_free(self, session: Session) -> None:
        """Until the server that holds the conversation has seen that it is to go on here."""
        ends = time.monotonic() + HELD_SECS
        held = bool(session.held) and self.lease.is_held(session.held)
        while held and time.monotonic() < ends and not self.closing.wait(0.05):
            with self.reading.transaction("DEFERRED") as db:
                row = db.execute("SELECT held FROM sessions WHERE id = ?", (session.id,)).fetchone()
            held = bool(row and row[0]) and self.lease.is_held(session.held)
        if held:
            LOG.warning("session %s: another server does not let go of the conversation", session.id)

    def free(self, session_id: str) -> None:
        """No process of this server waits for its next turn any more."""
        try:
            with self.write() as db:
                db.execute("UPDATE sessions SET held = '' WHERE id = ? AND held = ?", (session_id, self.lease.name))
        except StoreUnavailable as error:
            LOG.warning("other servers will wait for the session %s in vain: %s", session_id, error)

    def asked_for(self, session_ids: Sequence[str]) -> Set[str]:
        """Those of the sessions, held here, that another server goes on with, or that are deleted."""
        if not session_ids:
            return set()
        with self.reading.transaction("DEFERRED") as db:
            marks = ", ".join("?" * len(session_ids))
            rows = db.execute(f"SELECT id, turn, held FROM sessions WHERE id IN ({marks})", session_ids).fetchall()
        own = {name for name, turn, held in rows
               if turn.startswith(f"{self.lease.name}:") or (not turn and held == self.lease.name)}
        return set(session_ids) - own

    def save(self, session: Session) -> None:
        with self.write() as db:
            self.put(db, session)

    def put_back(self, session_id: str, before: Optional[Session]) -> None:
        """The session as if the turn had not begun; but a process that had its conversation may have gone."""
        with self.write() as db:
            if before:
                row = db.execute("SELECT held FROM sessions WHERE id = ?", (session_id,)).fetchone()
                self.put(db, dataclasses.replace(before, held=row[0] if row else ""))
            else:
                db.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

    def release(self, turn: str, *, created: bool) -> None:
        """A turn has ended, one way or the other. The session's next one may have begun already. `created`: it was the
        first one, and the session stays."""
        try:
            with self.write() as db:
                self.give_up(db, [turn], GIVEN_UP)
        except StoreUnavailable as error:
            LOG.error("how a session has ended is not stored yet: %s", error)
            self.unstored.add(turn)
        finally:
            self.ended(turn, created=created)

    def ended(self, turn: str, *, created: bool) -> None:
        with self.changed:
            self.created += created
            self.running.discard(turn)
            self.changed.notify_all()

    def give_up(self, db: sqlite3.Connection, turns: Iterable[str], reason: str) -> None:
        """Those that are still active have failed."""
        db.executemany("UPDATE sessions SET status = 'error', error_message = ?, turn = '' "
                       "WHERE status = 'active' AND turn = ?", [(reason, turn) for turn in turns])

    def recover(self) -> None:
        """Turns of servers that were killed have ended."""
        with self.reading.transaction("DEFERRED") as db:
            turns = [row[0] for row in db.execute("SELECT turn FROM sessions WHERE status = 'active'")]
        dead = [turn for turn in turns if not self.is_running(turn)]
        if dead:
            with self.write() as db:
                self.give_up(db, dead, STOPPED)
        self.lease.sweep()

    def is_running(self, turn: str) -> bool:
        server = turn.partition(":")[0]
        return turn in self.running if server == self.lease.name else self.lease.is_held(server)

    # ---- Rows

    def put(self, db: sqlite3.Connection, session: Session) -> None:
        row = {name: getattr(session, name) for name in self.COLUMNS}
        row.update({name: json.dumps(row[name]) for name in self.AS_JSON})
        changes = ", ".join(f"{name} = :{name}" for name in self.COLUMNS)
        if not db.execute(f"UPDATE sessions SET {changes} WHERE id = :id", row).rowcount:
            db.execute(f"INSERT INTO sessions ({', '.join(self.COLUMNS)}) "
                       f"VALUES ({', '.join(f':{name}' for name in self.COLUMNS)})", row)
            db.execute("INSERT INTO prompts VALUES (?, ?, ?)",
                       (session.id, session.system_prompt, session.initial_prompt))

    def select(self, db: sqlite3.Connection, rest: str, values: Sequence[Any], *,
               longest: Optional[int] = None) -> List[Session]:
        """The sessions that `rest` of a SELECT finds; of their first prompts, the first `longest` characters."""
        prompts = [f"coalesce({name}, '')" if longest is None else f"coalesce(substr({name}, 1, {longest + 1}), '')"
                   for name in PROMPTS]
        query = f"SELECT {', '.join([*self.COLUMNS, *prompts])} FROM sessions LEFT JOIN prompts USING (id) {rest}"
        found = [dict(zip((*self.COLUMNS, *PROMPTS), row)) for row in db.execute(query, values)]
        for row in found:
            row.update({name: json.loads(row[name]) for name in self.AS_JSON})
            if longest is not None and len(row["initial_prompt"]) > longest:
                row["initial_prompt"] = row["initial_prompt"][:longest] + "…"
        return [Session(**row) for row in found]

    def find(self, prefix: str) -> Session:
        """By id, or the first digits of one. Raises NotFound, and Conflict if several begin so."""
        low = prefix.lower()
        if not re.fullmatch("[0-9a-f]{1,32}", low):
            raise NotFound(f'there is no session "{prefix}": an id has 32 hex digits, of which the first can do')
        with self.reading.transaction("DEFERRED") as db:
            found = self.select(db, "WHERE id >= ? AND id < ? ORDER BY id LIMIT 2", (low, low + "g"))
        if len(found) > 1:
            raise Conflict(f'several sessions begin with "{prefix}", such as {found[0].id} and {found[1].id}: give '
                           "more digits")
        if not found:
            raise NotFound(f'there is no session "{prefix}"; GET /api/v1/sessions lists what there is')
        return found[0]

    def idle(self, db: sqlite3.Connection, session_id: str) -> Session:
        """A session of which no turn is running, without its prompts. Raises Conflict, and NotFound if it has been
        deleted."""
        found = self.select(db, "WHERE id = ?", (session_id,), longest=0)
        if not found:
            raise NotFound(f"the session {session_id} has just been deleted")
        if found[0].status == "active" and self.is_running(found[0].turn):
            raise Conflict(f"the session {session_id} is in use: wait for the answer to its last request")
        return found[0]

    def page(self, backend: str, status: str, limit: int, offset: int) -> Tuple[List[Session], int]:
        """Sessions, last used first, and how many there are in all; an empty `backend` or `status` is any."""
        wanted = {name: value for name, value in (("backend", backend), ("status", status)) if value}
        where = f"WHERE {' AND '.join(f'{name} = ?' for name in wanted)}" if wanted else ""
        values = tuple(wanted.values())
        with self.reading.transaction("DEFERRED") as db:
            total = db.execute(f"SELECT count(*) FROM sessions {where}", values).fetchone()[0]
            rows = f"SELECT rowid FROM sessions {where} ORDER BY last_used DESC, rowid DESC LIMIT ? OFFSET ?"
            found = self.select(db, f"WHERE sessions.rowid IN ({rows}) ORDER BY last_used DESC, sessions.rowid DESC",
                                (*values, limit, offset), longest=self.SHOWN)
        return found, total

    def count(self, status: str = "") -> int:
        """How many sessions there are; an empty `status` is any."""
        where, values = ("WHERE status = ?", [status]) if status else ("", [])
        with self.reading.transaction("DEFERRED") as db:
            return int(db.execute(f"SELECT count(*) FROM sessions {where}", values).fetchone()[0])

    def remove(self, session: Session) -> None:
        """Raises Conflict if a turn of it is running."""
        before, active = self.begin(session, is_new=False)
        try:
            with self.write() as db:
                db.execute("DELETE FROM sessions WHERE id = ?", (session.id,))
        except StoreUnavailable:
            with contextlib.suppress(StoreUnavailable):
                self.put_back(session.id, before)
            raise
        finally:
            self.release(active.turn, created=False)

    def expire(self, before: float) -> int:
        """Delete up to AT_ONCE sessions that were last used before then; how many it were."""
        oldest = "SELECT rowid FROM sessions WHERE last_used < ? AND status <> 'active' ORDER BY last_used LIMIT ?"
        with self.write() as db:
            return db.execute(f"DELETE FROM sessions WHERE rowid IN ({oldest})", (before, self.AT_ONCE)).rowcount

    def close(self, seconds: float) -> None:
        """Wait for the turns that are running to be stored; those that are not by then have failed."""
        with self.changed:
            self.changed.wait_for(lambda: not self.running, seconds)
            left = list(self.running)
        try:
            if left or self.unstored:
                with self.write() as db:
                    self.give_up(db, left, STOPPED)
        except StoreUnavailable as error:
            LOG.error("how %d sessions have ended is not stored: %s", len(left), error)
        finally:
            self.lease.end()
            self.reading.close()
            self.writing.close()


# ==== Fan-out =====================================================================================
# In: how to start each of several runs. Out: what they tell, as it happens.

class Told(NamedTuple):
    """An event, and the number of the run that it comes from, from 0."""
    task: int
    event: Event


class TaskStop(Stop):
    """The Stop of one run of several: it ends with the whole request, and when `halt` is set. Its time is its own."""

    def __init__(self, whole: Stop, halt: threading.Event) -> None:
        super().__init__(closing=whole.closing)
        self.whole, self.halt = whole, halt

    def error(self) -> Optional[ClinvkError]:
        if self.halt.is_set():
            return Canceled("canceled")
        return self.whole.error() or super().error()


StartTask = Callable[[int, TaskStop], Events]
Tolds = Generator[Told, None, None]  # closing it ends the runs


def fan_out(count: int, start: StartTask, whole: Stop, *, workers: int, fail_fast: bool) -> Tolds:
    """Run `count` tasks, in order, at most `workers` at once; yields what they tell, as it happens, one Done for each.

    With `fail_fast` a failure ends the tasks that run, and those that wait are not started: both fail as "canceled".
    Closing the generator ends them all."""
    halt = threading.Event()
    to_do: queue.SimpleQueue[int] = queue.SimpleQueue()
    heard: queue.SimpleQueue[Told] = queue.SimpleQueue()  # holds no more than the answers, which are kept anyway
    for task in range(count):
        to_do.put(task)
    crew = [threading.Thread(target=work, args=(to_do, heard, start, whole, halt), kwargs={"fail_fast": fail_fast},
                             name="fan-out", daemon=True) for _ in range(min(workers, count))]
    try:
        for thread in crew:
            thread.start()
        left = count
        while left:
            told = heard.get()
            left -= isinstance(told.event, Done)
            yield told
    finally:
        halt.set()
        for thread in crew:
            if thread.ident is not None:
                thread.join()


def work(to_do: queue.SimpleQueue[int], heard: queue.SimpleQueue[Told], start: StartTask, whole: Stop,
         halt: threading.Event, *, fail_fast: bool) -> None:
    """One thread of a fan-out: takes task after task, until there is none. A failure sets `halt` before it is told, so
    that no task is started after it."""
    while True:
        try:
            task = to_do.get_nowait()
        except queue.Empty:
            return
        done = False
        try:
            for event in one_task(task, start, TaskStop(whole, halt)):
                if fail_fast and isinstance(event, Failure):
                    halt.set()
                heard.put(Told(task, event))
                done = done or isinstance(event, Done)
        except Exception:
            LOG.error("task %d: a defect of clinvk\n%s", task, traceback.format_exc())
            if not done:
                for event in failing(Defect("clinvk has a defect; its log tells more")):
                    heard.put(Told(task, event))


def one_task(task: int, start: StartTask, stop: TaskStop) -> Events:
    """The events of one run, whatever keeps it from running."""
    try:
        stop.check()
        with contextlib.closing(start(task, stop)) as events:
            yield from events
    except ClinvkError as error:
        yield from failing(error)


def as_one_request(slots: Slots, told: Tolds) -> Tolds:
    """`told`, of runs that take one place in the line. Raises BackendUnavailable if that is full: nothing has run."""
    with slots.admitting(), contextlib.closing(told):
        yield from told


def in_turn(count: int, start: StartTask, whole: Stop, *, stop_on_failure: bool) -> Tolds:
    """Run `count` steps one after the other; with `stop_on_failure` those after a failed one are not run."""
    never = threading.Event()
    for step in range(count):
        failed = False
        with contextlib.closing(one_task(step, start, TaskStop(whole, never))) as events:
            for event in events:
                failed = failed or isinstance(event, Failure)
                yield Told(step, event)
        if failed and stop_on_failure:
            return


# ==== Answers =====================================================================================
# In: nothing. Out: the shapes of what clients are answered. Renderers and routes make them, /openapi.json tells them.
# Python 3.9 has no NotRequired: what is always there stands in a base class of what may be left out.

Timestamp = Annotated[str, "RFC 3339, UTC", {"format": "date-time"}]
Ms = Annotated[int, "milliseconds"]
ExitCode = Annotated[int, "0: success; -1: clinvk ended the run"]


# ---- /api/v1 and meta

class PromptAnswerBase(TypedDict):
    backend: str
    exit_code: ExitCode
    duration_ms: Ms
    output: Annotated[str, "the final answer, or what there was of it"]


class PromptAnswer(PromptAnswerBase, total=False):
    """How a run ended. What does not apply is left out."""
    session_id: Annotated[str, "continue the conversation with it; absent if nothing is stored"]
    model: str
    token_usage: Annotated[TokenCounts, "of this run alone"]
    cost_usd: float
    error: Annotated[str, "why the run failed"]
    ignored: Annotated[List[str], "fields of the request that the CLI has no way to do"]


class ParallelAnswer(TypedDict):
    """How several runs ended."""
    total_tasks: int
    completed: int
    failed: int
    total_duration_ms: Ms
    results: Annotated[List[PromptAnswer], "in the order of the tasks"]


class StepAnswer(PromptAnswer):
    """How a step of a chain ended."""
    step: Annotated[int, "from 1"]
    name: str


class ChainAnswerBase(TypedDict):
    total_steps: int
    completed_steps: int
    total_duration_ms: Ms
    results: List[StepAnswer]


class ChainAnswer(ChainAnswerBase, total=False):
    """How the steps of a chain ended."""
    failed_step: Annotated[int, "the first that failed, from 1; absent if none has"]


class CompareAnswer(TypedDict):
    """How several backends answered one prompt."""
    prompt: str
    backends: List[str]
    total_duration_ms: Ms
    results: Annotated[List[PromptAnswer], "in the order of the backends; `model` is always there"]


class MessageContent(TypedDict):
    """A piece of an answer, or with `is_partial` false the whole of one."""
    text: str
    role: Literal["assistant"]
    is_partial: bool


class ErrorContent(TypedDict):
    """Why the run failed."""
    code: str
    message: str
    details: Annotated[str, "what the CLI wrote about it"]


class DoneContent(TypedDict):
    """How the run ended."""
    exit_code: ExitCode
    duration_ms: Ms
    output: Annotated[str, "the final answer: the text of all `message` events since it began"]
    token_usage: Optional[TokenCounts]
    cost_usd: Optional[float]
    turn_count: Optional[int]


class EventLineBase(TypedDict):
    backend: str
    session_id: Annotated[str, "empty if nothing is stored"]
    timestamp: Timestamp
    sequence: Annotated[int, "from 1, without gaps"]


class EventLine(EventLineBase, total=False):
    """One line of a stream: a step of a run."""
    task: Annotated[int, "in a fan-out: the run's index, from 0"]


# The `type` of an event line -> its `content`.
EVENT_CONTENTS: Dict[str, Any] = {
    "init": Init, "message": MessageContent, "thinking": Thinking, "tool_use": ToolUse, "tool_result": ToolResult,
    "token_usage": TokenCounts, "progress": Progress, "error": ErrorContent, "done": DoneContent}


class BackendState(TypedDict):
    """A configured backend."""
    name: str
    available: Annotated[bool, "its program is on PATH"]
    enabled: bool
    version: Annotated[str, "empty until it has been looked up"]
    path: str
    default_model: Annotated[str, "empty: the CLI's own"]
    streams: Annotated[Literal["deltas", "messages"], "what its answers come in"]


class Backends(TypedDict):
    """Every configured backend, in a stable order."""
    backends: List[BackendState]


class SessionState(TypedDict):
    """A conversation."""
    id: Annotated[str, "32 hex digits"]
    backend: str
    created_at: Timestamp
    last_used: Timestamp
    working_dir: str
    model: str
    title: Annotated[str, "the first line of the first prompt, at most 50 characters"]
    tags: List[str]
    metadata: Dict[str, str]
    initial_prompt: str
    status: Annotated[str, "of its last turn", {"enum": list(STATUSES)}]
    turn_count: int
    token_usage: Annotated[TokenCounts, "of all turns"]
    backend_session_id: Annotated[str, "what its CLI calls the conversation"]
    error_message: Annotated[str, "of its last turn"]


class SessionList(TypedDict):
    """Some of the sessions, last used first."""
    sessions: List[SessionState]
    total: Annotated[int, "how many there are"]
    limit: int
    offset: int


class SessionDeletedBase(TypedDict):
    deleted: Literal[True]
    id: str


class SessionDeleted(SessionDeletedBase, total=False):
    """A session is gone."""
    warning: Annotated[str, "what its CLI has kept of it, and why"]


class BackendHealth(TypedDict):
    """Whether the program of an enabled backend is there."""
    name: str
    available: bool


class StoreHealth(TypedDict):
    """Whether sessions can be stored."""
    available: bool
    session_count: Optional[int]
    error: Optional[str]


class RunsState(TypedDict):
    """Runs now: those that go on, those that wait, and how many may go on at once."""
    active: int
    waiting: int
    limit: int


class Health(TypedDict):
    """Whether the server can do its work."""
    status: Annotated[Literal["ok", "degraded", "unhealthy"],
                      "degraded: an enabled backend is missing; unhealthy: sessions can not be stored"]
    version: str
    uptime: Annotated[str, "such as 2m31s"]
    uptime_ms: Ms
    backends: List[BackendHealth]
    session_store: StoreHealth
    runs: RunsState


class FieldError(TypedDict):
    """What is wrong with one field."""
    location: Annotated[str, "such as body.tasks[3].backend"]
    message: str
    value: Annotated[Union[None, str, int, float, bool], "what was sent, if that is short"]


class NativeErrorBase(TypedDict):
    type: Literal["about:blank"]
    title: str
    status: int
    detail: Annotated[str, "what was wrong, and what to do"]
    errors: List[FieldError]


class NativeError(NativeErrorBase, total=False):
    """Why there is no answer (RFC 9457)."""
    error: Literal["unauthorized", "too_many_requests"]
    message: str


# ---- OpenAI

class OpenAIModel(TypedDict):
    """Something that `model` can be."""
    id: str
    object: Literal["model"]
    created: Annotated[int, "seconds since 1970"]
    owned_by: str


class ReasoningLevel(TypedDict):
    """How hard a model can be told to think."""
    effort: str
    description: str


class TruncationPolicy(TypedDict):
    """How much of a tool's output goes to a model."""
    mode: Literal["bytes", "tokens"]
    limit: int


class CodexModel(TypedDict):
    """Something that `model` can be, as Codex knows models: what it offers to one, and how it speaks to it."""
    slug: str
    display_name: str
    supported_reasoning_levels: List[ReasoningLevel]
    shell_type: Literal["disabled"]
    visibility: Literal["list"]
    supported_in_api: bool
    priority: int
    base_instructions: str
    support_verbosity: bool
    truncation_policy: TruncationPolicy
    experimental_supported_tools: List[str]
    context_window: Annotated[int, "tokens"]
    input_modalities: List[Literal["text", "image"]]


class OpenAIModelsBase(TypedDict):
    object: Literal["list"]
    data: List[OpenAIModel]


class OpenAIModels(OpenAIModelsBase, total=False):
    """What `model` can be."""
    models: Annotated[List[CodexModel], "the same for Codex; only with client_version"]


class CachedTokens(TypedDict):
    cached_tokens: int


class ReasoningTokens(TypedDict):
    reasoning_tokens: int


class OpenAIUsage(TypedDict):
    """Tokens, as the CLI counts them; else an estimate of 4 characters a token."""
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class ChatAnswerBase(TypedDict):
    role: Literal["assistant"]
    content: Optional[str]
    refusal: Optional[str]


class ChatAnswer(ChatAnswerBase, total=False):
    """What the CLI answered."""
    reasoning_content: Annotated[str, "its thinking"]


class ChatChoice(TypedDict):
    """One answer."""
    index: int
    message: ChatAnswer
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: None


class ChatCompletionBase(TypedDict):
    id: str
    created: Annotated[int, "seconds since 1970"]
    model: Annotated[str, "as the request names it"]
    system_fingerprint: str


class ChatCompletion(ChatCompletionBase):
    """A chat completion."""
    object: Literal["chat.completion"]
    choices: List[ChatChoice]
    usage: OpenAIUsage


class ChatDelta(TypedDict, total=False):
    """What this chunk adds to the answer."""
    role: Literal["assistant"]
    content: str
    refusal: str
    reasoning_content: str


class ChatChunkChoice(TypedDict):
    """What this chunk adds to one answer."""
    index: int
    delta: ChatDelta
    finish_reason: Optional[Literal["stop", "length", "tool_calls"]]
    logprobs: None


class ChatCompletionChunkBase(ChatCompletionBase):
    object: Literal["chat.completion.chunk"]
    choices: List[ChatChunkChoice]


class ChatCompletionChunk(ChatCompletionChunkBase, total=False):
    """The data of one event. `data: [DONE]` is the last; a line that begins with a colon only keeps the connection."""
    usage: Annotated[Optional[OpenAIUsage], "with stream_options.include_usage: in the last chunk, that has no choices"]


class CompletionChoice(TypedDict):
    """One answer, or a piece of it."""
    index: int
    text: str
    finish_reason: Optional[Literal["stop", "length"]]
    logprobs: None


class TextCompletionBase(ChatCompletionBase):
    object: Literal["text_completion"]
    choices: List[CompletionChoice]


class TextCompletion(TextCompletionBase, total=False):
    """A completion, or a piece of one."""
    usage: Annotated[Optional[OpenAIUsage], "of a stream: with stream_options.include_usage, in the last chunk"]


class CacheTokens(CachedTokens):
    cache_write_tokens: int


class ResponseUsage(TypedDict):
    """Tokens, as the CLI counts them; else an estimate of 4 characters a token."""
    input_tokens: int
    input_tokens_details: CacheTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    """What the CLI answered."""
    type: Literal["output_text"]
    text: str
    annotations: List[Any]
    logprobs: List[Any]


class OutputRefusal(TypedDict):
    """Why it did not."""
    type: Literal["refusal"]
    refusal: str


class OutputMessage(TypedDict):
    """A message of the assistant's."""
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: List[Union[OutputText, OutputRefusal]]


class SummaryText(TypedDict):
    """What the CLI thought."""
    type: Literal["summary_text"]
    text: str


class OutputReasoning(TypedDict):
    """What the CLI thought."""
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: List[SummaryText]


class ResponseError(TypedDict):
    """Why the answer failed."""
    type: str
    code: str
    message: Annotated[str, "what was wrong, and what to do"]


class IncompleteDetails(TypedDict):
    """Why the answer is not whole."""
    reason: Literal["max_output_tokens"]


class ResponseBase(TypedDict):
    id: str
    object: Literal["response"]
    created_at: Annotated[int, "seconds since 1970"]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: Annotated[str, "as the request names it"]
    output: List[Union[OutputMessage, OutputReasoning]]
    error: Optional[ResponseError]
    incomplete_details: Optional[IncompleteDetails]
    usage: Optional[ResponseUsage]
    background: Literal[False]
    instructions: Optional[str]
    max_output_tokens: Optional[int]
    metadata: Dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: Dict[str, Any]
    store: Literal[False]
    temperature: None
    text: Dict[str, Any]
    tool_choice: Literal["auto", "none"]
    tools: List[Any]
    top_p: None
    truncation: Literal["disabled"]


class Response(ResponseBase, total=False):
    """A response; clinvk stores none."""
    completed_at: Annotated[int, "seconds since 1970"]


class ResponseEventBase(TypedDict):
    sequence_number: Annotated[int, "from 0, without gaps"]


class ResponseState(ResponseEventBase):
    """The response so far. It comes first, in silence, and last, with its end."""
    type: Literal["response.created", "response.in_progress", "response.completed", "response.incomplete",
                  "response.failed"]
    response: Response


class OutputItemEvent(ResponseEventBase):
    """An item begins, or is complete."""
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Union[OutputMessage, OutputReasoning]


class InItem(ResponseEventBase):
    item_id: str
    output_index: int


class ContentPartEvent(InItem):
    """The part of a message begins, or is complete."""
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: Union[OutputText, OutputRefusal]


class SummaryPartEvent(InItem):
    """The part of what was thought begins, or is complete."""
    type: Literal["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]
    summary_index: int
    part: SummaryText


class OutputTextDelta(InItem):
    """A piece of the answer."""
    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: List[Any]


class OutputTextDone(InItem):
    """The answer."""
    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: List[Any]


class RefusalDelta(InItem):
    """A piece of why there is no answer."""
    type: Literal["response.refusal.delta"]
    content_index: int
    delta: str


class RefusalDone(InItem):
    """Why there is no answer."""
    type: Literal["response.refusal.done"]
    content_index: int
    refusal: str


class SummaryTextDelta(InItem):
    """A piece of what the CLI thinks."""
    type: Literal["response.reasoning_summary_text.delta"]
    summary_index: int
    delta: str


class SummaryTextDone(InItem):
    """What it thought."""
    type: Literal["response.reasoning_summary_text.done"]
    summary_index: int
    text: str


ResponseEvent = Union[ResponseState, OutputItemEvent, ContentPartEvent, SummaryPartEvent, OutputTextDelta,
                      OutputTextDone, RefusalDelta, RefusalDone, SummaryTextDelta, SummaryTextDone]


class OpenAIErrorBody(TypedDict):
    message: Annotated[str, "what was wrong, and what to do"]
    type: str
    param: Optional[str]
    code: Optional[str]


class OpenAIError(TypedDict):
    """Why there is no answer."""
    error: OpenAIErrorBody


# ---- Anthropic

class AnthropicModel(TypedDict):
    """Something that `model` can be."""
    type: Literal["model"]
    id: str
    display_name: str
    created_at: Timestamp


class AnthropicModels(TypedDict):
    """What `model` can be."""
    data: List[AnthropicModel]
    has_more: bool
    first_id: Optional[str]
    last_id: Optional[str]


class AnthropicUsage(TypedDict):
    """Tokens, as the CLI counts them; else an estimate of 4 characters a token."""
    input_tokens: Annotated[int, "what came from no cache"]
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class TextAnswer(TypedDict):
    """What the CLI answered."""
    type: Literal["text"]
    text: str


class ThinkingAnswer(TypedDict):
    """What the CLI thought."""
    type: Literal["thinking"]
    thinking: str
    signature: str


StopReason = Literal["end_turn", "stop_sequence", "max_tokens", "tool_use", "refusal"]


class StopAnswer(TypedDict):
    """Why the answer ends."""
    stop_reason: Optional[StopReason]
    stop_sequence: Optional[str]


class AnthropicMessage(StopAnswer):
    """A message of the assistant's."""
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: Annotated[str, "as the request names it"]
    content: List[Union[TextAnswer, ThinkingAnswer]]
    usage: AnthropicUsage


class MessageStart(TypedDict):
    """The answer begins."""
    type: Literal["message_start"]
    message: AnthropicMessage


class BlockStart(TypedDict):
    """A block of the answer begins."""
    type: Literal["content_block_start"]
    index: int
    content_block: Union[TextAnswer, ThinkingAnswer]


class TextDelta(TypedDict):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(TypedDict):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(TypedDict):
    type: Literal["signature_delta"]
    signature: str


class BlockDelta(TypedDict):
    """A piece of the block."""
    type: Literal["content_block_delta"]
    index: int
    delta: Union[TextDelta, ThinkingDelta, SignatureDelta]


class BlockStop(TypedDict):
    """The block is complete."""
    type: Literal["content_block_stop"]
    index: int


class MessageDelta(TypedDict):
    """Why the answer ends, and its token counts."""
    type: Literal["message_delta"]
    delta: StopAnswer
    usage: AnthropicUsage


class BareEvent(TypedDict):
    """`ping` keeps the connection; after `message_stop` comes nothing."""
    type: Literal["ping", "message_stop"]


class AnthropicErrorBody(TypedDict):
    type: str
    message: Annotated[str, "what was wrong, and what to do"]


class AnthropicError(TypedDict):
    """Why there is no answer, or no more of it."""
    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str


MessageEvent = Union[MessageStart, BlockStart, BlockDelta, BlockStop, MessageDelta, BareEvent, AnthropicError]


class TokenEstimate(TypedDict):
    """About how many tokens a request has: 4 characters a token."""
    input_tokens: int


# ==== Renderers ===================================================================================
# In: a Result, or events as they come. Out: the bytes of one API's answers, streams and errors.

JSON_TYPE = "application/json"
LINE_ENDS = str.maketrans({"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"})


def to_json(value: Any) -> bytes:
    """UTF-8 JSON on one line, for readers too that take U+2028 and its like for a line end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(LINE_ENDS)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and UTF-8 can not
        return json.dumps(value, separators=(",", ":")).encode()


def spliced(value: Any, texts: Mapping[str, List[str]]) -> Iterator[bytes]:
    """`value` as JSON, in blocks, its marker strings replaced by long texts in pieces: no text is ever held twice.

    A piece is let go as soon as it is encoded, so the lists of `texts` are empty afterwards."""
    block, rest = bytearray(), to_json(value)
    for stand_in, pieces in texts.items():
        head, _, rest = rest.partition(to_json(stand_in))
        block += head + b'"'
        pieces.reverse()
        while pieces:
            piece = pieces.pop()
            for at in range(0, len(piece), BLOCK):
                if len(block) > BLOCK:
                    yield bytes(block)
                    block.clear()
                block += to_json(piece[at:at + BLOCK])[1:-1]
        block += b'"'
    yield bytes(block + rest)


BLOCK = 64 * 1024  # bytes that are sent at once, at least: deltas are a few bytes each


def marker() -> str:
    """A string that stands for a text to be spliced in, and that nothing else in the answer can equal."""
    return f"text-{uuid.uuid4().hex}"


@dataclass(frozen=True)
class Asked:
    """What any renderer must know of the request."""
    model: str = ""  # as the answer names it
    characters: int = 0  # of the prompt of a run; of several, on average
    request_id: str = ""
    answers: int = 1  # how many runs it asks for


SaidKind = Literal["text", "thinking", "refusal"]  # what a run says to the client


class Renderer:
    """One API's way to write answers. An instance serves one request.

    Both `whole` and `stream` are given what several runs say, if the API has that, else what one says."""
    name: ClassVar[str]  # of the API
    stream_type = "text/event-stream"
    shown: ClassVar[Tuple[Type[Event], ...]] = (Message, Thinking, Refusal, Progress, Failure, Done)  # of a stream
    error_type = JSON_TYPE
    error_shape: ClassVar[Any]

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def whole(self, results: Sequence[Result]) -> List[bytes]:
        raise NotImplementedError

    def stream(self, told: Iterator[Told]) -> Iterator[bytes]:
        """What is told ends with a Done for each run, or with a Failure. Closing `told` is left to the caller."""
        voices = [Voice() for _ in range(self.asked.answers)]
        begun = False
        for index, event in told:
            if isinstance(event, TokenUsage):
                voices[index].usage = event.usage
                continue
            if not begun:
                begun = True
                yield from self.begins(voices)
            if isinstance(event, Message):
                yield from self.says(index, "text", voices[index].add(event))
            elif isinstance(event, Thinking):
                yield from self.says(index, "thinking", event.text)
            elif isinstance(event, Refusal):
                yield from self.says(index, "refusal", event.text)
            elif isinstance(event, Progress):
                yield from self.keeps_alive()
            elif isinstance(event, Failure):
                yield from self.fails(event.error)
                return
            elif isinstance(event, Done):
                voices[index].done = True
                yield from self.ends(index, event, voices[index])
                if all(voice.done for voice in voices):
                    yield from self.finishes(voices)
                    return

    # ---- The parts of a stream

    def begins(self, voices: Sequence[Voice]) -> Iterator[bytes]:
        raise NotImplementedError

    def says(self, index: int, kind: SaidKind, text: str) -> Iterator[bytes]:
        raise NotImplementedError

    def keeps_alive(self) -> Iterator[bytes]:
        """What has no meaning but that the run goes on."""
        raise NotImplementedError

    def fails(self, error: ClinvkError) -> Iterator[bytes]:
        """The API's own kind of error in a stream."""
        raise NotImplementedError

    def ends(self, index: int, done: Done, voice: Voice) -> Iterator[bytes]:
        """The end of one answer."""
        raise NotImplementedError

    def finishes(self, voices: Sequence[Voice]) -> Iterator[bytes]:
        """What comes after the end of the last answer."""
        return iter(())

    # ---- Errors, and counts

    @classmethod
    def status(cls, error: Union[ClinvkError, Type[ClinvkError]]) -> int:
        return error.status

    @classmethod
    def error(cls, error: ClinvkError, request_id: str) -> Any:
        """The body of the error, of the shape `error_shape`."""
        raise NotImplementedError

    @classmethod
    def error_headers(cls, error: ClinvkError) -> Dict[str, str]:
        headers = {"x-should-retry": "false"} if error.prompted else {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        if isinstance(error, MethodNotAllowed):
            headers["Allow"] = error.allow
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def usage(self, results: Sequence[Result]) -> Usage:
        """The CLI's counts, else an estimate."""
        return total(result.usage or self.estimated(length(result.said)) for result in results)

    def counted(self, voice: Voice) -> Usage:
        """The same, of a run that a stream tells of."""
        return voice.usage or self.estimated(voice.characters)

    def estimated(self, characters: int) -> Usage:
        """Of an answer of that length."""
        return Usage(max(1, estimate(self.asked.characters)), estimate(characters))


class Voice(Joined):
    """One of the runs that a stream tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.usage: Optional[Usage] = None
        self.done = False


def total(usages: Iterable[Usage]) -> Usage:
    return functools.reduce(operator.add, usages)


# ---- /api/v1

class Native(Renderer):
    """SPEC 2.1: one JSON object, or NDJSON events."""
    name = "clinvk"
    stream_type = "application/x-ndjson"
    error_type = "application/problem+json"
    error_shape = NativeError

    def __init__(self, asked: Asked, backend: str, ignored: Sequence[str] = (), session_id: str = "") -> None:
        super().__init__(asked)
        self.backend, self.ignored, self.session_id = backend, ignored, session_id

    def whole(self, results: Sequence[Result]) -> List[bytes]:
        text, (result,) = marker(), results
        return [*spliced(self.answer(result, text), {text: result.final})]

    def answer(self, result: Result, output: str) -> Json:
        """SPEC 2.1's answer; what does not apply is left out."""
        done = result.done
        answer: Json = {"session_id": self.session_id, "backend": self.backend,
                        "model": result.init.model or self.asked.model,
                        "exit_code": done.exit_code, "duration_ms": done.duration_ms, "output": output,
                        "token_usage": result.usage and native_usage(result.usage), "cost_usd": done.cost_usd,
                        "error": result.failure and result.failure.error.full_message, "ignored": list(self.ignored)}
        return {name: value for name, value in answer.items() if value not in (None, "", [])}

    def stream(self, told: Iterator[Told]) -> Iterator[bytes]:
        result = Result()
        for sequence, (_, event) in enumerate(told, 1):
            result.add(event)
            yield from self.line(event, result, sequence=sequence)
            if isinstance(event, Done):
                return

    def line(self, event: Event, result: Result, **numbers: int) -> List[bytes]:
        """An event as a line of NDJSON; `result` is what has been collected up to it."""
        line = {"type": EVENT_NAMES[type(event)], "backend": self.backend, "session_id": self.session_id,
                "timestamp": utc(time.time()), **numbers}
        if not isinstance(event, Done):
            return [to_json({**line, "content": event_content(event)}) + b"\n"]
        text = marker()
        return [*spliced({**line, "content": done_content(result, text)}, {text: list(result.final)}), b"\n"]

    @classmethod
    def status(cls, error: Union[ClinvkError, Type[ClinvkError]]) -> int:
        return error.native_status or error.status

    @classmethod
    def error(cls, error: ClinvkError, request_id: str) -> NativeError:
        status = cls.status(error)
        body: NativeError = {
            "type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "detail": str(error),
            "errors": [{"location": p.location, "message": p.message, "value": p.value} for p in error.problems]}
        if status in (401, 429):
            body["error"] = "unauthorized" if status == 401 else "too_many_requests"
            body["message"] = str(error)
        return body


class Several:
    """SPEC 2.2: the answers of several runs as one, whole or as NDJSON.

    `summary` is given the results and an answer for each of them, and tells what stands around these."""

    def __init__(self, natives: Sequence[Native], summary: Callable[[List[Result], List[Json]], Json]) -> None:
        self.natives, self.summary = natives, summary
        self.began = time.monotonic()
        self.results = [Result() for _ in natives]

    def whole(self, told: Iterable[Told]) -> List[bytes]:
        for task, event in told:
            self.results[task].add(event)
        return self.summed()

    def summed(self, **more: Any) -> List[bytes]:
        """The whole answer, from the results of all that ran."""
        ran = [(native, result, marker()) for native, result in zip(self.natives, self.results) if result.ended]
        answers = [native.answer(result, text) for native, result, text in ran]
        around = self.summary([result for _, result, _ in ran], answers)
        duration = round(1000 * (time.monotonic() - self.began))
        texts = {text: result.final for _, result, text in ran}
        return [*spliced({**more, **around, "total_duration_ms": duration}, texts)]

    def stream(self, told: Iterator[Told]) -> Iterator[bytes]:
        sequence = 0
        for task, event in told:
            sequence += 1
            self.results[task].add(event)
            yield from self.natives[task].line(event, self.results[task], sequence=sequence, task=task)
        yield from self.summed(type="summary", sequence=sequence + 1)
        yield b"\n"


# The keys of EVENT_CONTENTS.
EVENT_NAMES = {Init: "init", Message: "message", Thinking: "thinking", ToolUse: "tool_use", ToolResult: "tool_result",
               TokenUsage: "token_usage", Progress: "progress", Failure: "error", Done: "done"}


def event_content(event: Event) -> Mapping[str, Any]:
    if isinstance(event, Message):
        return {"text": event.text, "role": "assistant", "is_partial": event.is_partial}
    if isinstance(event, TokenUsage):
        return native_usage(event.usage)
    if isinstance(event, Failure):
        return {"code": event.error.code, "message": str(event.error), "details": event.error.details}
    return vars(event)


def done_content(result: Result, text: str) -> DoneContent:
    done = result.done
    return {"exit_code": done.exit_code, "duration_ms": done.duration_ms, "output": text,
            "token_usage": native_usage(result.usage) if result.usage else None, "cost_usd": done.cost_usd,
            "turn_count": done.turn_count}


# ---- OpenAI

class OpenAI(Renderer):
    """What OpenAI's endpoints have in common: their errors."""
    name, error_shape = "OpenAI", OpenAIError

    @classmethod
    def error(cls, error: ClinvkError, request_id: str) -> OpenAIError:
        kind, code = error.openai
        param = error.problems[0].location if error.problems else None
        return {"error": {"message": error.full_message, "type": kind, "param": param, "code": code}}


class ChatCompletions(OpenAI):
    """SPEC 2.4: chat completions. Each run is one of the choices."""
    ID, WHOLE, PIECE = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    NOTHING: ClassVar[Json] = {"delta": {}}  # what the last chunk of a choice adds
    FIELDS: ClassVar[Dict[SaidKind, str]] = {"text": "content", "thinking": "reasoning_content", "refusal": "refusal"}

    def __init__(self, asked: Asked, *, include_usage: bool = False) -> None:
        super().__init__(asked)
        self.include_usage = include_usage  # in a stream
        self.base: Json = {"id": self.ID + uuid.uuid4().hex, "created": int(time.time()), "model": asked.model,
                           "system_fingerprint": f"clinvk-{__version__}"}

    def whole(self, results: Sequence[Result]) -> List[bytes]:
        texts: Dict[str, List[str]] = {}
        usage = openai_usage(self.usage(results))
        choices = [{"index": index, **self.choice(index, result, texts), "logprobs": None,
                    "finish_reason": FINISH_REASONS[result.done.stop]} for index, result in enumerate(results)]
        return [*spliced({**self.base, "object": self.WHOLE, "choices": choices, "usage": usage}, texts)]

    def choice(self, index: int, result: Result, texts: Dict[str, List[str]]) -> Json:
        """What was answered; its long texts go to `texts`, under their markers."""
        text, thought = marker(), marker()
        message: Json = {"role": "assistant", "content": None, "refusal": result.refusal}
        if result.refusal is None:
            message["content"], texts[text] = text, result.said
        if result.thoughts:
            message["reasoning_content"], texts[thought] = thought, result.thoughts
        return {"message": message}

    def begins(self, voices: Sequence[Voice]) -> Iterator[bytes]:
        for index in range(len(voices)):
            yield self.chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def says(self, index: int, kind: SaidKind, text: str) -> Iterator[bytes]:
        yield self.chunk(index, {"delta": {self.FIELDS[kind]: text}})

    def keeps_alive(self) -> Iterator[bytes]:
        yield b": keepalive\n\n"

    def fails(self, error: ClinvkError) -> Iterator[bytes]:
        yield server_sent(self.error(error, self.asked.request_id))

    def ends(self, index: int, done: Done, voice: Voice) -> Iterator[bytes]:
        yield self.chunk(index, self.NOTHING, FINISH_REASONS[done.stop])

    def finishes(self, voices: Sequence[Voice]) -> Iterator[bytes]:
        if self.include_usage:
            usage = total(map(self.counted, voices))
            yield server_sent({**self.base, "object": self.PIECE, "choices": [], "usage": openai_usage(usage)})
        yield b"data: [DONE]\n\n"

    def chunk(self, index: int, added: Json, finish_reason: Optional[str] = None) -> bytes:
        choice = {"index": index, **added, "finish_reason": finish_reason, "logprobs": None}
        chunk = {**self.base, "object": self.PIECE, "choices": [choice]}
        if self.include_usage:
            chunk["usage"] = None
        return server_sent(chunk)


FINISH_REASONS = {"end": "stop", "length": "length", "sequence": "stop"}


class Completions(ChatCompletions):
    """Completions of texts, which have no place for thinking."""
    ID, WHOLE, PIECE = "cmpl-", "text_completion", "text_completion"
    shown = (Message, Progress, Failure, Done)
    NOTHING: ClassVar[Json] = {"text": ""}

    def __init__(self, asked: Asked, *, include_usage: bool = False, prompts: Sequence[str] = ()) -> None:
        """`prompts`: those that the answers begin with, one for each, if they are to."""
        super().__init__(asked, include_usage=include_usage)
        self.prompts = prompts

    def choice(self, index: int, result: Result, texts: Dict[str, List[str]]) -> Json:
        text = marker()
        texts[text] = result.said
        texts[text][:0] = self.prompts[index:index + 1]
        return {"text": text}

    def begins(self, voices: Sequence[Voice]) -> Iterator[bytes]:
        for index, prompt in enumerate(self.prompts):
            yield from self.says(index, "text", prompt)

    def says(self, index: int, kind: SaidKind, text: str) -> Iterator[bytes]:
        if kind == "text":
            yield self.chunk(index, {"text": text})


def server_sent(value: Any, event: str = "") -> bytes:
    """One event of a text/event-stream."""
    return b"".join(long_sent(value, {}, event))


def long_sent(value: Any, texts: Mapping[str, List[str]], event: str = "") -> Iterator[bytes]:
    """The same, with long texts in place of their markers."""
    head = f"event: {event}\n".encode() if event else b""
    return itertools.chain([head + b"data: "], spliced(value, texts), [b"\n\n"])


def openai_usage(usage: Usage) -> OpenAIUsage:
    return {"prompt_tokens": usage.all_input, "completion_tokens": usage.output_tokens,
            "total_tokens": usage.all_input + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}}


# ---- OpenAI's responses

class OutputKind(NamedTuple):
    """How a kind of output is written: an item that has one part, and the events that fill this."""
    prefix: str  # of its id
    item: Json
    parts: str  # the field with its parts
    part: Json
    text: str  # the part's field with its text
    events: str  # of its text
    part_events: str
    place: str  # the field that says which part of the item it is
    more: Mapping[str, Any] = {}  # what the events of its text have besides

    def part_with(self, text: str) -> Json:
        return {**self.part, self.text: text}


ASSISTANT: Json = {"type": "message", "role": "assistant"}
OUTPUT_KINDS: Dict[SaidKind, OutputKind] = {
    "text": OutputKind(
        "msg_", ASSISTANT, parts="content", part={"type": "output_text", "annotations": [], "logprobs": []},
        text="text", events="output_text", part_events="content_part", place="content_index", more={"logprobs": []}),
    "refusal": OutputKind(
        "msg_", ASSISTANT, parts="content", part={"type": "refusal"}, text="refusal",
        events="refusal", part_events="content_part", place="content_index"),
    "thinking": OutputKind(
        "rs_", {"type": "reasoning"}, parts="summary", part={"type": "summary_text"}, text="text",
        events="reasoning_summary_text", part_events="reasoning_summary_part", place="summary_index")}
# What every response says of itself; clinvk stores none, and offers no tools.
RESPONSE: Json = {
    "background": False, "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": False, "temperature": None,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None, "truncation": "disabled"}


class Output:
    """One item of a response's output."""

    def __init__(self, kind: SaidKind, pieces: List[str]) -> None:
        self.kind, self.how, self.pieces = kind, OUTPUT_KINDS[kind], pieces
        self.id = self.how.prefix + uuid.uuid4().hex
        self.text = marker()  # stands for its text

    def item(self, status: str, parts: List[Json]) -> Json:
        return {"id": self.id, **self.how.item, "status": status, self.how.parts: parts}

    @property
    def part(self) -> Json:
        return self.how.part_with(self.text)


def long_texts(output: Iterable[Output], *, last: bool) -> Dict[str, List[str]]:
    """The texts of these items, by their markers; for the `last` time, so that nothing keeps them any longer."""
    return {item.text: item.pieces if last else list(item.pieces) for item in output}


class Responses(OpenAI):
    """SPEC 2.7: a response, of one run."""

    def __init__(self, asked: Asked, *, repeated: Optional[Json] = None, final_code: str = "") -> None:
        """`repeated`: the request's fields that the answer has, too. `final_code`: the code of an error after which the
        client does not send the request again; "" if its own do."""
        super().__init__(asked)
        self.final_code = final_code
        self.base = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
                     "model": asked.model, **RESPONSE, **(repeated or {})}
        self.sequence = itertools.count()
        self.output: List[Output] = []

    def whole(self, results: Sequence[Result]) -> List[bytes]:
        usage, (result,) = self.usage(results), results
        if result.thoughts:
            self.output.append(Output("thinking", result.thoughts))
        if result.refusal is None:
            self.output.append(Output("text", result.said))
        else:
            self.output.append(Output("refusal", [result.refusal]))
        return [*spliced(self.whole_response(result.done, usage), long_texts(self.output, last=True))]

    def whole_response(self, done: Done, usage: Usage) -> Json:
        """With a marker for each text."""
        status = RESPONSE_STATUSES[done.stop]
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        *before, last = self.output
        items = [*(item.item("completed", [item.part]) for item in before), last.item(status, [last.part])]
        return self.response(status, items, usage=response_usage(usage), incomplete_details=reason,
                             completed_at=int(time.time()))

    def response(self, status: str, output: Sequence[Json] = (), **more: Any) -> Json:
        return {**self.base, "status": status, "error": None, "incomplete_details": None, "usage": None,
                "output": output, **more}

    def begins(self, voices: Sequence[Voice]) -> Iterator[bytes]:
        yield from self.event("response.created", response=self.response("in_progress"))
        yield from self.keeps_alive()

    def keeps_alive(self) -> Iterator[bytes]:
        """An event: codex counts no comments."""
        yield from self.event("response.in_progress", response=self.response("in_progress"))

    def fails(self, error: ClinvkError) -> Iterator[bytes]:
        kind, code = error.openai
        told = {"type": kind, "code": self.final_code or code or kind, "message": error.full_message}
        yield from self.event("response.failed", response=self.response("failed", error=told))

    def event(self, kind: str, texts: Optional[Dict[str, List[str]]] = None, **fields: Any) -> Iterator[bytes]:
        """One event; sent in one piece, if it has none of the long texts."""
        value = {"type": kind, "sequence_number": next(self.sequence), **fields}
        return long_sent(value, texts, kind) if texts else iter([server_sent(value, kind)])

    def says(self, index: int, kind: SaidKind, text: str) -> Iterator[bytes]:
        """More text of the item that is open, or of a new one."""
        if not self.output or self.output[-1].kind != kind:
            yield from self.closes("completed")
            yield from self.opens(Output(kind, []))
        item = self.output[-1]
        item.pieces.append(text)
        yield from self.event(f"response.{item.how.events}.delta", **self.place(), delta=text, **item.how.more)

    def place(self) -> Json:
        """Where the one part of the open item is."""
        return {"item_id": self.output[-1].id, "output_index": len(self.output) - 1, self.output[-1].how.place: 0}

    def opens(self, item: Output) -> Iterator[bytes]:
        self.output.append(item)
        yield from self.event("response.output_item.added", output_index=len(self.output) - 1,
                              item=item.item("in_progress", []))
        yield from self.event(f"response.{item.how.part_events}.added", **self.place(), part=item.how.part_with(""))

    def closes(self, status: str) -> Iterator[bytes]:
        """Tell the open item as a whole, if there is one."""
        if not self.output:
            return
        item = self.output[-1]
        def texts() -> Dict[str, List[str]]:
            return long_texts([item], last=False)
        text = {item.how.text: item.text}
        yield from self.event(f"response.{item.how.events}.done", texts(), **self.place(), **item.how.more, **text)
        yield from self.event(f"response.{item.how.part_events}.done", texts(), **self.place(), part=item.part)
        yield from self.event("response.output_item.done", texts(), output_index=len(self.output) - 1,
                              item=item.item(status, [item.part]))

    def ends(self, index: int, done: Done, voice: Voice) -> Iterator[bytes]:
        """It has a message in any case."""
        if not self.output or self.output[-1].kind == "thinking":
            yield from self.says(index, "text", "")
        status = RESPONSE_STATUSES[done.stop]
        yield from self.closes(status)
        response = self.whole_response(done, self.counted(voice))
        yield from self.event(f"response.{status}", long_texts(self.output, last=True), response=response)


RESPONSE_STATUSES = {"end": "completed", "length": "incomplete", "sequence": "completed"}


def response_usage(usage: Usage) -> ResponseUsage:
    cache: CacheTokens = {"cached_tokens": usage.cached_tokens, "cache_write_tokens": usage.cache_creation_tokens}
    return {"input_tokens": usage.all_input, "input_tokens_details": cache, "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.all_input + usage.output_tokens}


# ---- Anthropic

class Anthropic(Renderer):
    """SPEC 2.5: messages."""
    name, error_shape = "Anthropic", AnthropicError

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self.base: Json = {"id": "msg_" + uuid.uuid4().hex, "type": "message", "role": "assistant",
                           "model": asked.model}
        self.blocks, self.refused = Blocks(), False  # of a stream

    def whole(self, results: Sequence[Result]) -> List[bytes]:
        text, thought, (result,) = marker(), marker(), results
        texts, content = {}, []
        if result.thoughts:
            content.append({"type": "thinking", "thinking": thought, "signature": ""})
            texts[thought] = result.thoughts
        content.append({"type": "text", "text": text})
        texts[text] = result.said if result.refusal is None else [result.refusal]
        stop = stop_of(result.done, refused=result.refusal is not None)
        return [*spliced({**self.base, "content": content, **stop, "usage": anthropic_usage(self.usage(results))},
                         texts)]

    def begins(self, voices: Sequence[Voice]) -> Iterator[bytes]:
        counts = anthropic_usage(self.counted(voices[0]))
        message = {**self.base, "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": {**counts, "input_tokens": max(1, counts["input_tokens"]), "output_tokens": 1}}
        yield b"".join([server_sent({"type": "message_start", "message": message}, "message_start"),
                        *self.keeps_alive()])

    def says(self, index: int, kind: SaidKind, text: str) -> Iterator[bytes]:
        self.refused = self.refused or kind == "refusal"
        return self.blocks.say("thinking" if kind == "thinking" else "text", text)

    def keeps_alive(self) -> Iterator[bytes]:
        yield server_sent({"type": "ping"}, "ping")

    def fails(self, error: ClinvkError) -> Iterator[bytes]:
        yield server_sent(self.error(error, self.asked.request_id), "error")

    def ends(self, index: int, done: Done, voice: Voice) -> Iterator[bytes]:
        yield from self.blocks.finish()
        yield server_sent({"type": "message_delta", "delta": stop_of(done, refused=self.refused),
                           "usage": anthropic_usage(self.counted(voice))}, "message_delta")
        yield server_sent({"type": "message_stop"}, "message_stop")

    @classmethod
    def error(cls, error: ClinvkError, request_id: str) -> AnthropicError:
        return {"type": "error", "error": {"type": error.anthropic, "message": error.full_message},
                "request_id": request_id}


class Blocks:
    """The content blocks of a stream of Anthropic's: one is open at a time, each is opened, filled and closed."""
    EMPTY: ClassVar[Dict[str, Json]] = {"text": {"type": "text", "text": ""},
                                        "thinking": {"type": "thinking", "thinking": "", "signature": ""}}

    def __init__(self) -> None:
        self.index, self.open, self.spoken = -1, "", False

    def say(self, kind: str, text: str) -> Iterator[bytes]:
        if self.open != kind:
            yield from self.close()
            self.index, self.open = self.index + 1, kind
            yield server_sent({"type": "content_block_start", "index": self.index, "content_block": self.EMPTY[kind]},
                              "content_block_start")
        self.spoken = self.spoken or kind == "text"
        yield self.delta({"type": f"{kind}_delta", kind: text})

    def delta(self, delta: Json) -> bytes:
        return server_sent({"type": "content_block_delta", "index": self.index, "delta": delta}, "content_block_delta")

    def close(self) -> Iterator[bytes]:
        if self.open == "thinking":
            yield self.delta({"type": "signature_delta", "signature": ""})
        if self.open:
            yield server_sent({"type": "content_block_stop", "index": self.index}, "content_block_stop")
        self.open = ""

    def finish(self) -> Iterator[bytes]:
        """Close what is open. An answer without any text has an empty text block, as a whole one has."""
        if not self.spoken:
            yield from self.say("text", "")
        yield from self.close()


STOP_REASONS: Dict[str, StopReason] = {"end": "end_turn", "length": "max_tokens", "sequence": "stop_sequence"}


def stop_of(done: Done, *, refused: bool) -> StopAnswer:
    return {"stop_reason": "refusal" if refused else STOP_REASONS[done.stop], "stop_sequence": done.stop_sequence}


def anthropic_usage(usage: Usage) -> AnthropicUsage:
    return {"input_tokens": usage.fresh_input, "output_tokens": usage.output_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": usage.cache_creation_tokens}


# ---- Whose API it is

def renderer_of(path: str, *, speaks_anthropic: bool = False) -> Type[Renderer]:
    """Whose shape an error on this path takes. Both APIs have paths that begin with /v1: where the path does not say
    whose it is, the headers do."""
    if re.match("/openai(/|$)|/v1/(chat/completions|completions|responses)(/|$)", path):
        return OpenAI
    if re.match("/anthropic(/|$)|/v1/messages(/|$)", path) or (speaks_anthropic and path.startswith("/v1/")):
        return Anthropic
    return OpenAI if re.match("/v1(/|$)", path) else Native


# ==== Guards ======================================================================================
# In: the head of an HTTP request, a working directory, flags. Out: nothing, or the error that refuses it (SPEC 7).

class Head:
    """The head of an HTTP request, from WSGI's `environ`."""

    def __init__(self, environ: Json) -> None:
        self.environ = environ
        self.method = environ["REQUEST_METHOD"]
        self.path = plain_path(environ.get("PATH_INFO") or "/")

    def get(self, name: str) -> str:
        """A header, its bytes taken for latin-1; "" if it is not there."""
        key = name.upper().replace("-", "_")
        return str(self.environ.get(key if key == "CONTENT_TYPE" else f"HTTP_{key}", ""))


def plain_path(path: str) -> str:
    """WSGI's PATH_INFO as people meant it: UTF-8, no doubled slash, none at the end."""
    text = path.encode("latin-1").decode("utf-8", "replace")
    return re.sub("/+", "/", text).rstrip("/") or "/"


# ---- Host and Origin: no web page may drive the CLIs

LONGEST_NAME = 253  # characters, of a host's


def check_host(config: Config, head: Head) -> None:
    """A page that rebinds its own name to 127.0.0.1 still sends that name. Without keys, other machines need a name
    that was allowed by hand: what they say in Host is up to them."""
    server, remote = config.server, head.environ.get("REMOTE_ADDR", "")
    if server.host in WILDCARDS and config.keys:
        return
    own = {"localhost", "127.0.0.1", "::1", server.host.lower()}
    near = is_loopback(remote) or remote == server.host
    allowed = {*map(host_name, server.allowed_hosts), *(own if near or config.keys else ())}
    for name in hosts_of(head):
        if name not in allowed:
            shown = "...@" + name.rpartition("@")[2] if "@" in name else name  # there may be a password before it
            shown = shown if len(shown) <= LONGEST_NAME else shown[:LONGEST_NAME] + "..."
            raise Forbidden(f'the Host "{shown}" is not allowed'
                            + ("" if near else " for another machine, without API keys")
                            + "; add it to server.allowed_hosts if it is yours")


def hosts_of(head: Head) -> List[str]:
    """Whom a request is for: what its Host says, and what its target says if that is a whole URL (RFC 9112 3.2.2)."""
    target = str(head.environ.get("REQUEST_URI", ""))
    authority = "" if target.startswith("//") else urllib.parse.urlsplit(target).netloc  # as waitress reads it
    return [host_name(host) for host in (head.get("Host"), *([authority] if authority else []))]


WILDCARDS = ("0.0.0.0", "::", "*")


def address_of(text: str) -> Union[None, ipaddress.IPv4Address, ipaddress.IPv6Address]:
    """An IP address; one of IPv4 that is written as IPv6 is what it is. None: it is no address."""
    if not re.fullmatch(r"[\w:.%-]+", text, re.ASCII):  # ipaddress takes anything for a zone, "fe80::1%zone"
        return None
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_loopback(text: str) -> bool:
    address = address_of(text)
    return address is not None and address.is_loopback


def host_name(host: str) -> str:
    """`[::1]:8080` -> `::1`, `Localhost:8080` -> `localhost`; what is neither an address nor a name stays as it is."""
    found = re.fullmatch(r"(?:\[([0-9a-f.]*:[0-9a-f:.]*)\]|([^:\[\]]*))(?::\d*)?", host, re.IGNORECASE)
    return (found.group(1) or found.group(2) if found else host).lower()


def check_origin(config: Config, head: Head) -> None:
    """Only the server's own pages, desktop apps and what the config allows may call from a browser engine."""
    if "HTTP_ORIGIN" not in head.environ:
        if head.get("Sec-Fetch-Site") in ("cross-site", "same-site") and head.get("Sec-Fetch-Dest") != "document":
            raise Forbidden("a web page of another origin must not load this, not even without reading it; its own "
                            "scripts may, with fetch and CORS, if server.cors_allowed_origins has its origin")
    elif not allows_origin(config, head):
        origin = head.get("Origin")
        raise Forbidden(f'the Origin "{origin}" is not allowed: a web page must not drive the CLIs. '
                        + (f'If this one may, set server.cors_allowed_origins: ["{origin}"]' if ORIGIN.fullmatch(origin)
                           else "It is none that could be allowed: serve the page over http, and allow that"))


APP_SCHEMES = ("app", "tauri", "vscode-webview", "vscode-file")  # no web page can have them


def allows_origin(config: Config, head: Head) -> bool:
    origin = head.get("Origin").lower()
    if re.search(r"[\s,]", origin):  # several, of which one might be allowed
        return False
    scheme, separator, host = origin.partition("://")
    if separator and (scheme in APP_SCHEMES or (scheme in ("http", "https") and host == head.get("Host").lower())):
        return True
    return any(origin_pattern(allowed).fullmatch(origin) for allowed in config.server.cors_allowed_origins)


def origin_pattern(allowed: str) -> Pattern[str]:
    """`*` is any origin, and as a port any port."""
    return re.compile(".*" if allowed == "*" else re.escape(allowed.lower()).replace(":\\*", r"(:\d+)?"))


def cors_headers(config: Config, head: Head) -> Dict[str, str]:
    """What lets a page of an allowed origin read an answer, errors included."""
    if not head.get("Origin") or not allows_origin(config, head):
        return {"Vary": "Origin"}
    credentials = {"Access-Control-Allow-Credentials": "true"} if config.server.cors_allow_credentials else {}
    return {"Vary": "Origin", "Access-Control-Allow-Origin": head.get("Origin"),
            "Access-Control-Expose-Headers": EXPOSED_HEADERS, **credentials}


EXPOSED_HEADERS = ("X-Request-Id, request-id, X-Clinvk-Backend, X-Clinvk-Model, X-Clinvk-Ignored, X-Clinvk-Start, "
                   "X-Clinvk-Estimate, Retry-After, x-should-retry")
ALLOWED_HEADERS = ("accept", "authorization", "content-type", "x-api-key", "x-request-id")
ALLOWED_PREFIXES = ("anthropic-", "x-stainless-", "openai-")


def is_preflight(head: Head) -> bool:
    """A browser asks whether a page may send a request. It sends no key with that."""
    return head.method == "OPTIONS" and {"HTTP_ORIGIN", "HTTP_ACCESS_CONTROL_REQUEST_METHOD"} <= set(head.environ)


def preflight_headers(config: Config, head: Head) -> Dict[str, str]:
    """What a page of an allowed origin may send."""
    asked = [name.strip() for name in head.get("Access-Control-Request-Headers").split(",")]
    allowed = [name for name in asked if re.fullmatch(r"[\w-]+", name, re.ASCII)
               and (name.lower() in ALLOWED_HEADERS or name.lower().startswith(ALLOWED_PREFIXES))]
    headers = {"Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
               "Access-Control-Allow-Headers": ", ".join(allowed),
               "Access-Control-Max-Age": str(config.server.cors_max_age)}
    if head.get("Access-Control-Request-Private-Network"):
        headers["Access-Control-Allow-Private-Network"] = "true"
    return headers


# ---- Keys, and the type of a body

def check_key(config: Config, head: Head) -> None:
    if not config.keys or is_open(head.path) or is_preflight(head):
        return
    scheme, _, token = head.get("Authorization").partition(" ")
    sent = (head.get("X-Api-Key"), token.strip() if scheme.lower() == "bearer" else "")
    keys = [key.encode(errors="surrogateescape") for key in config.keys]  # byte for byte as the environment has them
    given = [hmac.compare_digest(one.encode("latin-1"), key) for one in sent for key in keys]
    if not any(given):
        raise Unauthorized("send one of the server's API keys as X-Api-Key or as Authorization: Bearer")


def is_open(path: str) -> bool:
    """Whether it needs no key: it neither runs anything nor tells of what has run."""
    return path in ("/health", "/openapi.json", "/docs", "/metrics") or path.startswith("/docs/")


def check_type(head: Head) -> None:
    """JSON must be said: a form or a typeless Blob is what a web page can post without asking first."""
    content_type = head.get("Content-Type").partition(";")[0].strip().lower()
    if head.method == "POST" and content_type != JSON_TYPE:
        raise WrongType(f"send Content-Type: {JSON_TYPE}" + (f", not {content_type}" if content_type else ""))


GUARDS: Tuple[Callable[[Config, Head], None], ...] = (check_host, check_origin, check_key)  # `check_type` is by route


# ---- Rate limit

class RateLimit:
    """A bucket of tokens per client address: a request takes one, `rate_limit_rps` flow back in each second, up to
    `rate_limit_burst`. The addresses that were seen least recently are forgotten first."""
    MOST = 10_000  # addresses

    def __init__(self) -> None:
        self.buckets: collections.OrderedDict[str, Tuple[float, float]] = collections.OrderedDict()  # tokens, and when
        self.lock = threading.Lock()  # guards buckets

    def check(self, config: Config, head: Head) -> None:
        """Raises RateLimited."""
        limits = config.server
        if not limits.rate_limit_enabled:
            return
        address, now, full = client_address(config, head), time.monotonic(), float(limits.rate_limit_burst)
        with self.lock:
            tokens, seen = self.buckets.pop(address, (full, now))
            tokens = min(full, tokens + (now - seen) * limits.rate_limit_rps)
            self.buckets[address] = (tokens - 1 if tokens >= 1 else tokens), now
            self.forget(now - max(limits.rate_limit_cleanup_secs, full / limits.rate_limit_rps))
        if tokens < 1:
            raise RateLimited(f"too many requests from {address}: {limits.rate_limit_rps:g} a second are allowed "
                              "(server.rate_limit_rps). Try again later",
                              retry_after=(1 - tokens) / limits.rate_limit_rps)

    def forget(self, before: float) -> None:
        """Those that have been full again for long, and those that are too many."""
        while self.buckets:
            address, (_, seen) = next(iter(self.buckets.items()))
            if seen >= before and len(self.buckets) <= self.MOST:
                return
            del self.buckets[address]


def client_address(config: Config, head: Head) -> str:
    """Who sent a request: a proxy that is trusted may say for whom; of a list, the last that is no trusted proxy.
    What stands before that, or before something that is no address, may be anybody's word."""
    remote, trusted = str(head.environ.get("REMOTE_ADDR", "")), config.server.trusted_proxies
    if not in_networks(remote, trusted):
        return remote
    forwarded = [item.strip() for item in head.get("X-Forwarded-For").split(",") if item.strip()]
    for item in reversed(forwarded or [head.get("X-Real-IP").strip()]):
        address = without_port(item)
        if not in_networks(address, trusted):
            return address if address_of(address) else remote
    return remote


def without_port(text: str) -> str:
    """`1.2.3.4:5678` -> `1.2.3.4`, `[::1]:5678` -> `::1`: some proxies say the port, too."""
    found = re.fullmatch(r"\[([0-9a-f:.]+)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+):\d+", text, re.IGNORECASE)
    return text if found is None else found.group(1) or found.group(2)


def in_networks(text: str, networks: Iterable[str]) -> bool:
    """Whether an address is one of them, or in one: each is an address or CIDR."""
    address = address_of(text)
    return address is not None and any(address in ipaddress.ip_network(network, strict=False) for network in networks)


# ---- Where a run may start, and with which flags

BLOCKED_PREFIXES = ("/etc", "/var/run", "/var/lock", "/root", "/sys", "/proc", "/dev", "/usr/bin", "/usr/sbin", "/bin",
                    "/sbin", "/boot", "/lib", "/lib64", "/usr/lib", "/usr/lib64")


def allowed_workdir(asked: Optional[str], config: Config, at: str) -> str:
    """The directory that a run starts in, symlinks resolved: what was asked for, else the server's own. The config's
    rules are for both."""
    if asked is None and not os.path.isdir(config.here):
        raise Invalid([Problem(f"{at}.workdir", "is required: the server's own directory is gone")])
    asked, named = (config.here, f"the server's own directory, {config.here},") if asked is None else (asked, asked)
    try:  # os.path.realpath would leave what comes behind a loop of links as it is, links to blocked places included
        resolved = str(Path(asked).resolve(strict=True))
    except (OSError, RuntimeError, ValueError):  # a loop; a NUL
        resolved = ""
    if not os.path.isdir(resolved):
        raise Invalid([Problem(f"{at}.workdir", "must be an existing directory", asked)])
    home = os.path.realpath(config.environ.get("HOME") or os.path.expanduser("~"))
    blocked = [p for p in BLOCKED_PREFIXES if p != "/root" or home != "/root"] + config.server.blocked_workdir_prefixes
    if any(within(resolved, prefix) for prefix in blocked):
        raise Forbidden(f"workdir: {named} lies in a blocked directory; choose another one")
    allowed = config.server.allowed_workdir_prefixes
    if allowed and not any(within(resolved, prefix) for prefix in allowed):
        raise Forbidden(f"workdir: {named} lies in none of server.allowed_workdir_prefixes")
    if not os.access(resolved, os.X_OK):
        raise Forbidden(f"workdir: {named} can not be entered by the user that clinvk runs as; choose another one")
    return resolved


def within(path: str, prefix: str) -> bool:
    """Whether `path`, a directory whose links are resolved, is `prefix` or below it, in whole components. It is one and
    the same directory that counts, not its name: where a file system has /etc, it may have it as /ETC, too."""
    if not os.path.isdir(prefix):
        return False
    there = os.stat(prefix)
    return any(os.path.samestat(os.stat(place), there) for place in (Path(path), *Path(path).parents))


def check_flags(extra: List[str], allowed: Mapping[str, Optional[bool]], backend: str) -> None:
    """`allowed` says of each flag whether a value follows it; None: nobody knows. Raises Forbidden for any other, for
    stray words, and for a value that is missing: the next flag would be taken for it, and the next value for a word."""
    value_may_follow = False
    for item, following in zip(extra, [*extra[1:], "-"]):
        flag, assigned, _ = item.partition("=")
        if not item.startswith("-"):
            if not value_may_follow:
                raise Forbidden(f'extra: "{item}" does not belong to a flag')
            value_may_follow = False
        elif flag not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise Forbidden(f"extra: {flag} is not allowed for {backend} (allowed: {known}); "
                            f"backends.{backend}.allowed_extra_flags can allow it")
        else:
            value_may_follow = allowed[flag] is not False and not assigned
            if value_may_follow and allowed[flag] and following.startswith("-"):
                raise Forbidden(f"extra: {flag} needs a value")


def with_values_attached(extra: List[str], flags: Container[str]) -> List[str]:
    """`--flag value` as `--flag=value`, for `flags`, of which nobody knows whether they take a value: with one that
    takes none, a word by itself would be taken for a subcommand. Raises Forbidden for `-f value`: in `-fvalue`, each
    letter could be a flag."""
    words: List[str] = []
    for item in extra:
        before = words[-1] if words else ""
        if before not in flags or item.startswith("-"):
            words.append(item)
        elif before.startswith("--"):
            words[-1] += "=" + item
        else:
            raise Forbidden(f'extra: {before} can not be given a value ("{item}"); use the long form of the flag')
    return words


# ==== Metrics =====================================================================================
# In: requests and runs that are over. Out: how many and how long, as text that Prometheus reads (SPEC 8).

Sample = Tuple[str, Dict[str, str], float]  # suffix of the metric's name, labels, value


def exposed(name: str, kind: str, about: str, samples: Iterable[Sample]) -> str:
    """One metric in Prometheus' text format, version 0.0.4."""
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        shown = ",".join(f'{label}="{escaped_label(text)}"' for label, text in labels.items())
        lines.append(f"{name}{suffix}{{{shown}}} {decimal(value)}" if shown else f"{name}{suffix} {decimal(value)}")
    return "".join(f"{line}\n" for line in lines)


def gauge(name: str, about: str, value: float) -> str:
    return exposed(name, "gauge", about, [("", {}, value)])


def escaped_label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def decimal(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)


class Counter:
    """Sums by label values. Whoever calls a method holds the lock of the Metrics it belongs to."""

    def __init__(self, name: str, about: str, *labels: str) -> None:
        self.name, self.about, self.labels = name, about, labels
        self.sums: Dict[Tuple[str, ...], float] = {}

    def add(self, amount: float, *values: str) -> None:
        self.sums[values] = self.sums.get(values, 0) + amount

    def text(self) -> str:
        samples = (("", dict(zip(self.labels, values)), total) for values, total in sorted(self.sums.items()))
        return exposed(self.name, "counter", self.about, samples)


class Histogram:
    """Observations by label values, each counted in the first of `buckets` that is not below it. Lock: as Counter."""

    def __init__(self, name: str, about: str, buckets: Sequence[float], *labels: str) -> None:
        self.name, self.about, self.buckets, self.labels = name, about, (*buckets, math.inf), labels
        self.counts: Dict[Tuple[str, ...], List[int]] = {}
        self.sums: Dict[Tuple[str, ...], float] = {}

    def observe(self, value: float, *values: str) -> None:
        self.start(*values)
        self.counts[values][bisect.bisect_left(self.buckets, value)] += 1
        self.sums[values] += value

    def start(self, *values: str) -> None:
        """At 0, unless there have been observations."""
        self.counts.setdefault(values, [0] * len(self.buckets))
        self.sums.setdefault(values, 0)

    def text(self) -> str:
        return exposed(self.name, "histogram", self.about, self.samples())

    def samples(self) -> Iterator[Sample]:
        for values, counts in sorted(self.counts.items()):
            labels = dict(zip(self.labels, values))
            for bucket, count in zip(self.buckets, itertools.accumulate(counts)):
                yield "_bucket", {**labels, "le": decimal(bucket)}, count
            yield "_sum", labels, self.sums[values]
            yield "_count", labels, sum(counts)


class Metrics:
    """What has happened since the server began. Label values are bounded: routes, backends, and words of ours."""
    DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
    FIRST_OUTPUTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30)
    TOKEN_KINDS = ("input", "output", "cached", "reasoning")

    def __init__(self, backends: Sequence[str]) -> None:
        self.lock = threading.Lock()  # guards all of them
        self.requests = Counter("clinvk_requests_total", "HTTP requests that have been answered, streams to their end.",
                                "method", "path", "status")
        self.request_secs = Histogram("clinvk_request_duration_seconds",
                                      "From an HTTP request to the end of its answer.", self.DURATIONS, "method",
                                      "path")
        self.runs = Counter("clinvk_backend_executions_total", "Runs that are over, of those that were started.",
                            "backend", "status")
        self.run_secs = Histogram("clinvk_backend_execution_duration_seconds",
                                  "From the slot of a run to its last event; waiting for that slot is not part of "
                                  "it.", self.DURATIONS, "backend")
        self.first_outputs = Histogram("clinvk_first_output_seconds",
                                       "From the request to the first text, thought or tool call of its run, waiting "
                                       "included; in a fan-out from the task's turn.",
                                       self.FIRST_OUTPUTS, "backend", "start")
        self.tokens = Counter("clinvk_tokens_total", "Tokens as the CLIs count them. input includes cached (read from "
                              "the provider's cache), output includes reasoning.", "backend", "kind")
        self.cost = Counter("clinvk_cost_usd_total", "Cost in US dollars, of the CLIs that tell it.", "backend")
        for backend in backends:
            self.start(backend)

    def start(self, backend: str) -> None:
        """What has no other labels than a backend, and words of ours, begins at 0."""
        for status in RUN_STATUSES:
            self.runs.add(0, backend, status)
        for kind in self.TOKEN_KINDS:
            self.tokens.add(0, backend, kind)
        self.cost.add(0, backend)
        self.run_secs.start(backend)

    def request_ended(self, method: str, path: str, status: int, seconds: float) -> None:
        with self.lock:
            self.requests.add(1, method, path, str(status))
            self.request_secs.observe(seconds, method, path)

    def run_ended(self, ran: Ran) -> None:
        usage = ran.usage or Usage()
        counts = (usage.all_input, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens)
        with self.lock:
            self.runs.add(1, ran.backend, ran.status)
            self.run_secs.observe(ran.seconds, ran.backend)
            if ran.first_text_secs is not None:
                self.first_outputs.observe(ran.first_text_secs, ran.backend, ran.start)
            for kind, count in zip(self.TOKEN_KINDS, counts):
                self.tokens.add(count, ran.backend, kind)
            self.cost.add(ran.cost_usd, ran.backend)

    def text(self) -> str:
        with self.lock:
            return "".join(each.text() for each in (self.requests, self.request_secs, self.runs, self.run_secs,
                                                    self.first_outputs, self.tokens, self.cost))


def process_metrics(began: float) -> Iterator[str]:
    """What is usual to tell of any process, as far as this system tells it."""
    yield exposed("process_cpu_seconds_total", "counter", "CPU time of the server, without that of the CLIs.",
                  [("", {}, time.process_time())])
    yield gauge("process_start_time_seconds", "When the server began, in seconds since the epoch.", began)
    if resource:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield gauge("process_max_fds", "File descriptors that it may have open.",
                    math.inf if most == resource.RLIM_INFINITY else most)
    with contextlib.suppress(OSError):  # it is not there, or no descriptor is left to look with
        yield gauge("process_open_fds", "File descriptors that it has open.", len(os.listdir("/dev/fd")) - 1)
    with contextlib.suppress(OSError):
        virtual, resident = Path("/proc/self/statm").read_text().split()[:2]
        yield gauge("process_virtual_memory_bytes", "Virtual memory.", int(virtual) * mmap.PAGESIZE)
        yield gauge("process_resident_memory_bytes", "Memory in RAM.", int(resident) * mmap.PAGESIZE)


# ==== Server ======================================================================================
# In: a Config. Out: everything that lives as long as the server does, and the runs that are started on it.

class Started(NamedTuple):
    """A run that begins when its first event is asked for, and what its request asked for that nobody can honour."""
    events: Events
    request: Settled
    ignored: List[str]
    session_id: str = ""  # "" if it is a turn of none


DAY = 86400.0  # seconds


class Server:
    """What all requests share; ConfigError if it can not be. Threads: every method may be called from any."""
    LOOKED_UP = 30.0  # seconds for which a PATH look-up holds
    VERSION_SECS = 30.0  # for a CLI to say its version
    FORGET_SECS = 20.0  # for a CLI to delete a conversation
    KEYS_SECS = 300.0

    def __init__(self, config: Config) -> None:
        refuse_aliases(config)
        self.config = config
        self.began = time.time()
        self.closing = threading.Event()
        self.slots = Slots(config.server.max_concurrent_runs, config.server.max_waiting_runs)
        self.children = Children(config.server.max_output_bytes)
        self.programs: Dict[str, Tuple[float, Optional[List[str]]]] = {}  # backend -> when looked up, what was found
        self.versions = {name: __version__ for name in config.backends if issubclass(kind_of(name), InProcess)}
        self.store = Store(config, self.closing)
        self.rate_limit = RateLimit()
        self.document = b""  # OpenAPI, once it has been asked for
        self.metrics = Metrics([name for name in config.names() if config.backends[name].enabled])
        self.forgetting = threading.Lock()  # one CLI at a time is told to
        self.spares = Spares(config.server, self.children, self.slots, self.closing, self.store, self.backend)

    def bound(self, port: int) -> None:
        """Listening on that port: the config may have said 0, for any free one."""
        self.config = dataclasses.replace(self.config, server=dataclasses.replace(self.config.server, port=port))

    def program(self, name: str) -> Optional[List[str]]:
        """Program and first arguments of a backend; None if it is not installed. [] for what needs no program."""
        looked_up, found = self.programs.get(name, (0.0, None))
        if time.monotonic() - looked_up > self.LOOKED_UP or not looked_up:
            found = kind_of(name).find(name, self.config)
            self.programs[name] = time.monotonic(), found
        return found

    def runnable(self) -> List[str]:
        """The backends that can run now, in the stable order."""
        return [n for n in self.config.names() if self.config.backends[n].enabled and self.program(n) is not None]

    def backend(self, name: str) -> Backend:
        """A fresh backend for one child. Raises BackendUnavailable if it is disabled or not installed."""
        if not self.config.backends[name].enabled:
            raise BackendUnavailable(f"{name} is disabled; set backends.{name}.enabled: true to use it")
        program = self.program(name)
        if program is None:
            command = command_of(name, self.config)[0]
            hint = " (a program and its arguments must be a list)" if " " in command else ""
            raise BackendUnavailable(f'{name} is not installed: no "{command}" on PATH{hint}. Install it, or set '
                                     f"backends.{name}.command")
        return kind_of(name)(Installed(name, program, self.config, self.versions.get(name, "")))

    def known_backend(self, name: str, at: str) -> None:
        if name not in self.config.backends:
            names = self.config.names()
            raise Invalid([Problem(at, "must be one of " + ", ".join(names) + nearest(name, names), name)])

    def start(self, asked: PromptRequest, stop: Stop, *, at: str, prompt_at: str, ran: List[Ran],
              admitted: bool = False) -> Started:
        """Check what only the server can check, and hand back the run; nothing runs before its first event is asked
        for. Raises Invalid, UnknownModel, Forbidden and BackendUnavailable. `at` and `prompt_at` are the places of the
        fields, and of the prompt, in the body; `ran` gets what is to be told of the run; `admitted` is for a run of a
        request that is past the line."""
        self.known_backend(asked.backend, f"{at}.backend")
        found = self.store.find(asked.session_id) if asked.session_id is not None else None
        own_system_prompt = asked.system_prompt is not None
        asked, overruled = self.continued(asked, found, at) if found else (asked, [])
        backend = self.backend(asked.backend)
        request = self.settled(asked, backend, at)
        reason = backend.refuses(request)
        if reason:
            raise Invalid([Problem(prompt_at, reason)])
        ignored = [*backend.ignored(request), *overruled]
        if "model" not in backend.honours:
            request = dataclasses.replace(request, model="")
        if request.dry_run:
            hides = bool(request.system_prompt) and not own_system_prompt
            return Started(planned(request, backend, hides_system_prompt=hides), request, ignored)
        schema, request = request.schema, told_schema(request, backend)
        run_of = functools.partial(self.run_of, stop, ran, cuts=schema is None)
        first = functools.partial(run_of, admitted=admitted)
        if request.keeps:
            started = self.in_session(request, found, first, ignored)
        else:
            started = Started(first(request), request, ignored + (["metadata"] if request.metadata else []))
        if schema is None:
            return started

        def again(answer: str, text: str) -> Events:
            return run_of(replied(request, answer, text), admitted=True)
        only_once = not request.isolated or isinstance(backend, InProcess)  # an agent would do all of it again
        return started._replace(events=fitted(started.events, schema, request.stops, None if only_once else again))

    def run_of(self, stop: Stop, ran: List[Ran], request: Settled, *, cuts: bool, admitted: bool) -> Events:
        """The run itself; `ran` gets what is to be told of it. `cuts`: at the `stops` of the request."""
        stop.allow(request.timeout_secs)
        one = Ran(request.backend, request=request)
        ran.append(one)
        events = run(request, self.backend(request.backend), self.spares, self.slots, stop, one, admitted=admitted)
        cut = cut_at(request.stops, events) if request.stops and cuts else events
        return observed(cut, one, stop, self.metrics.run_ended)

    def settled(self, asked: PromptRequest, backend: Backend, at: str) -> Settled:
        """With nothing left open; its flags and its directory are allowed."""
        own_flags = dict.fromkeys(self.config.backends[asked.backend].allowed_extra_flags)
        check_flags(asked.extra, {**backend.extra_flags, **own_flags}, asked.backend)
        if backend.has_subcommands:
            asked = dataclasses.replace(asked, extra=with_values_attached(asked.extra, own_flags))
        workdir = self.empty_directory() if asked.isolated else allowed_workdir(asked.workdir, self.config, at)
        asked = dataclasses.replace(asked, keeps=not (asked.ephemeral or asked.isolated))
        return settled(asked, self.config, workdir)

    def in_session(self, request: Settled, found: Optional[Session], run_of: Callable[[Settled], Events],
                   ignored: List[str]) -> Started:
        """A run that is the next turn of a session, or the first one of a new session."""
        settings = self.config.session
        session = new_session(request, settings.default_tags) if found is None else dataclasses.replace(
            found, metadata=request.metadata)
        if request.sandbox_mode != "default":
            session = dataclasses.replace(session, sandbox_mode=request.sandbox_mode)

        def run_in(session: Session) -> Events:
            count = session.turn_count
            talk = Conversation(f"{session.id}:{count}" if found else "", Prompt(request.prompt, request.images),
                                f"{session.id}:{count + 1}", session.id)
            return run_of(dataclasses.replace(request, resume=session.backend_session_id, conversation=talk,
                                              begins=not session.has_begun))
        events = next_turn(session, run_in, self.store, is_new=not found, counts_usage=settings.store_token_usage)
        return Started(events, request, ignored, session.id)

    def continued(self, asked: PromptRequest, session: Session, at: str) -> Tuple[PromptRequest, List[str]]:
        """A request that goes on with `session`, and what it asks for that the session has settled already."""
        kind, model = kind_of(session.backend), asked.model
        if asked.backend != session.backend:
            raise Conflict(f"the session {session.id} is one of {session.backend}, not of {asked.backend}: name that "
                           "backend, or begin another session")
        if asked.ephemeral:
            raise Invalid([Problem(f"{at}.ephemeral", "can not be true together with session_id", True)])
        if not os.path.isdir(session.working_dir):
            raise Conflict(f"the directory of the session {session.id}, {session.working_dir}, is gone: make it again, "
                           "or begin another session")
        if not kind.remembers:
            raise BadRequest(f"{session.backend} has no memory, so its sessions can not be continued: send what was "
                             "said before in the prompt, and leave out session_id")
        if asked.system_prompt in (None, session.system_prompt):
            asked = dataclasses.replace(asked, system_prompt=session.system_prompt, same_system_prompt=True)
        moved = asked.workdir is not None and os.path.realpath(asked.workdir) != session.working_dir
        renamed = model is not None and named_model(model, asked.backend, self.config) != session.model
        overruled = [*(["workdir"] if moved else []), *(["model"] if renamed else [])]
        model = session.model if "model" in kind.honours else None
        return dataclasses.replace(asked, workdir=session.working_dir, model=model, resume=session.backend_session_id,
                                   begins=not session.has_begun, sandbox_before=session.sandbox_mode), overruled

    def empty_directory(self) -> str:
        """Where the model way runs: clinvk's own, with nothing in it that a CLI could read. What one has left there
        goes to `left`, in place of what that name had before."""
        directory = own_directory(self.config, "empty")
        for name in os.listdir(directory):
            aside = self.config.home / "left" / name
            try:
                aside.parent.mkdir(mode=0o700, exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                aside.unlink(missing_ok=True)
                (directory / name).replace(aside)
            except FileNotFoundError:  # another request was first
                continue
            except OSError as error:
                raise BackendUnavailable(f"{directory} must be empty, for CLIs read what lies in it, and {name} can "
                                         f"not be moved to {aside} ({error.strerror}): remove it") from None
            LOG.warning("a CLI has left %a in the directory of the model, which is to be empty: it is %a now", name,
                        str(aside))
        return str(directory)

    def look_up_versions(self) -> None:
        """Ask each installed CLI for its version; a thread of its own calls this once."""
        for name in set(self.runnable()) - set(self.versions):
            patience_ends = time.monotonic() + self.VERSION_SECS
            while self.slots.active and time.monotonic() < patience_ends and not self.closing.wait(TICK):
                pass  # a run must not be slowed by it, if it can be helped
            if self.closing.is_set():
                return
            stop = Stop(closing=self.closing).allow(self.VERSION_SECS)
            asking = functools.partial(output_of, self.children, stop)
            try:
                self.versions[name] = kind_of(name).version_of(name, self.program(name) or [], self.config, asking)
            except ClinvkError as error:
                LOG.warning("the version of %s is not known: %s", name, error)

    def want_spares(self) -> None:
        """Have a CLI ready for the first request of each backend that can wait, the default one's first of all."""
        names = [name for name in self.runnable() if kind_of(name).can_wait]
        names.sort(key=lambda name: name != self.config.default_backend)
        for name in reversed(names[:self.config.server.spares]):  # what is wanted last is started first
            asked = PromptRequest(backend=name, prompt="", isolated=True)
            try:
                self.spares.want(settled(asked, self.config, self.empty_directory()))
            except ClinvkError as error:
                LOG.warning("no %s is started ahead: %s", name, error)

    def want_again(self, ran: Iterable[Ran]) -> None:
        """Have a CLI ready for a request like the one whose answer, by these runs, has ended."""
        for one in ran:
            if one.status == "success" and one.request:
                self.spares.want(one.request)

    def renew_keys(self) -> None:
        """Read the keys of gopass again, every KEYS_SECS; a thread of its own calls this."""
        while self.config.server.api_keys_gopass_path and not self.closing.wait(self.KEYS_SECS):
            try:
                self.config = dataclasses.replace(self.config, keys=keys_of(self.config))
            except ConfigError as error:
                LOG.warning("the API keys stay as they were: %s", error)

    def forget(self, session: Session) -> str:
        """Delete what the CLI of a session has stored of it, as far as there is a way; why that failed, or ""."""
        try:
            self.spares.let_go(session.id)
            with self.forgetting:
                stop = Stop(closing=self.closing).allow(self.FORGET_SECS)
                stop.check()
                if session.backend_session_id:
                    backend = self.backend(session.backend)
                    backend.forget(session.backend_session_id, functools.partial(output_of, self.children, stop))
        except (ClinvkError, OSError) as error:
            left = f"what {session.backend} has stored of it is still there: {error}"
            LOG.warning("session %s is deleted, but %s", session.id, left)
            return left
        return ""

    def expire_sessions(self) -> None:
        """Delete what is older than `session.retention_days`, now and once a day; a thread of its own calls this."""
        days = self.config.session.retention_days
        while days and not self.closing.is_set():
            try:
                deleted = self.store.expire(time.time() - days * DAY)
                if deleted:
                    LOG.info("%d sessions were older than session.retention_days and are deleted", deleted)
            except StoreUnavailable as error:
                LOG.error("old sessions are not deleted: %s", error)
                deleted = 0
            self.closing.wait(0 if deleted == Store.AT_ONCE else DAY)

    def close(self, seconds: float = 4.0) -> None:
        """End every run, wait for its CLI to be gone, and for its session to be stored."""
        self.closing.set()
        ends = time.monotonic() + seconds
        self.spares.close()
        if self.children.wait_until_gone(seconds):
            self.children.dismiss_heir()
        self.store.close(max(0.0, ends - time.monotonic()))


def planned(request: Settled, backend: Backend, *, hides_system_prompt: bool) -> Events:
    """`dry_run`: the command line that would run, and nothing else. A system prompt of the config's is not shown."""
    if hides_system_prompt:
        request = dataclasses.replace(request, system_prompt="<system prompt>")
    if request.keeps and not request.resume:
        request = dataclasses.replace(request, resume=backend.new_conversation(), begins=True)
    yield Message(backend.plan(told_schema(request, backend)), opens=True)
    yield Done(0)


# ==== Routes ======================================================================================
# In: a checked request. Out: an Answer. One function per endpoint (SPEC 2).

class Final(NamedTuple):
    """How a client is told of an error so that it does not send its request again by itself."""
    status: int
    repeated: FrozenSet[int]  # in place of these, after which it does
    code: str = ""  # of OpenAI's errors; "": it does not matter


class Call(NamedTuple):
    """One HTTP request as an endpoint sees it. `body` and `query` are instances of the route's models."""
    body: Any
    query: Any
    request_id: str
    stop: Stop
    ran: List[Ran]  # its runs; those that have not begun, too
    name: str = ""  # the last part of the path, where the route leaves it open
    final: Optional[Final] = None  # None: its client heeds x-should-retry


class Answer:
    """Status, headers and the body's pieces; `close` is called when the last one has been sent, or the client left."""

    def __init__(self, body: Iterable[bytes], status: int = 200, content_type: str = JSON_TYPE,
                 headers: Optional[Mapping[str, str]] = None, close: Callable[[], None] = lambda: None) -> None:
        self.status, self.body, self.close = status, body, close
        self.headers = {"Content-Type": content_type, **(headers or {})}
        if isinstance(body, list):
            self.headers["Content-Length"] = str(sum(map(len, body)))


def shown_pattern(pattern: str) -> str:
    """A route's path as people write it."""
    return re.sub("<name(:path)?>", "{id}", pattern)


class Route(NamedTuple):
    """An endpoint under its path, and the other paths that clients build."""
    method: str
    patterns: Tuple[str, ...]
    function: Callable[[Server, Call], Answer]
    answer: Any  # the shape of its JSON, or the content type of what is none; None: /openapi.json leaves it out
    body: Optional[type] = None  # the model of its request
    other_body: Optional[Type[Compat]] = None  # the same, for a request that has the PROMPT_AT of this one only
    where: str = ""  # what the path of a faulty field begins with
    query: Optional[type] = None  # the model of its query; None: whatever stands there means nothing, SDKs add some
    events: Any = None  # the shape of each event, if it can be told to stream
    errors: Tuple[Type[ClinvkError], ...] = ()  # besides those of every route
    headers: Tuple[str, ...] = ()  # that its answer may have, of HEADERS
    example: Optional[Json] = None  # a request
    statuses: Tuple[int, ...] = (200,)  # that its answer may have
    only_if: str = ""  # the setting in ServerConfig without which it is not there

    @property
    def path(self) -> str:
        """The first of its paths, as people write it."""
        return shown_pattern(self.patterns[0])


ROUTES: List[Route] = []
Endpoint = Callable[[Server, Call], Answer]


def route(method: str, *patterns: str, answer: Any, **fields: Any) -> Callable[[Endpoint], Endpoint]:
    """Register an endpoint; `fields` are further ones of its Route."""
    def add(function: Endpoint) -> Endpoint:
        ROUTES.append(Route(method, patterns, function, answer, **fields))
        return function
    return add


def offered(config: Config) -> List[Route]:
    """The routes that a server with this config has."""
    return [entry for entry in ROUTES if not entry.only_if or getattr(config.server, entry.only_if)]


UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # what comes between must pass on at once


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer([to_json(value)], status, headers={name.replace("_", "-"): text for name, text in headers.items()})


# ---- How an answer is sent: as it comes, or whole

def alone(events: Events) -> Tolds:
    """What the only run of a request tells."""
    with contextlib.closing(events):
        for event in events:
            yield Told(0, event)


def streamed(told: Tolds, renderer: Renderer, headers: Mapping[str, str], until: Any) -> Answer:
    """Answer as it comes. Nothing is sent before the first event of `until`, or SILENCE, so that a run which fails at
    once is an HTTP error here, too."""
    begun, patience_ends = [], time.monotonic() + SILENCE
    with closed_on_error(told):
        for one in told:
            begun.append(one)
            if isinstance(one.event, until) or time.monotonic() > patience_ends:
                break
            if isinstance(one.event, Failure):
                raise one.event.error
    body = renderer.stream(itertools.chain(begun, to_the_end(told)))
    return Answer(body, content_type=renderer.stream_type, headers={**headers, **UNBUFFERED}, close=told.close)


def never_silent(told: Tolds, shown: Tuple[Type[Event], ...]) -> Tolds:
    """`told`, and a Progress per SILENCE in which nothing has come of what the client is shown."""
    shown_at = time.monotonic()
    with contextlib.closing(told):
        for one in told:
            if not isinstance(one.event, shown) and time.monotonic() - shown_at >= SILENCE:
                yield Told(one.task, Progress("running", "nothing of the answer has come"))
                shown_at = time.monotonic()
            elif isinstance(one.event, shown):
                shown_at = time.monotonic()
            yield one


def to_the_end(told: Tolds) -> Iterator[Told]:
    """`told`, and the end that a stream must have if the run can not even be started."""
    try:
        yield from told
    except ClinvkError as error:
        for event in failing(error):
            yield Told(0, event)


def collected(told: Tolds, renderer: Renderer, headers: Mapping[str, str], *, fails: bool = False) -> Answer:
    """Answer in one piece; with `fails`, a failed run is an HTTP error: that of the first which failed."""
    results = [Result() for _ in range(renderer.asked.answers)]
    failures: List[ClinvkError] = []
    with contextlib.closing(told):
        for index, event in told:
            results[index].add(event)
            failures += [event.error] if isinstance(event, Failure) else []
    if fails and failures:
        raise failures[0]
    return Answer(renderer.whole(results), headers=headers)


@contextlib.contextmanager
def closed_on_error(source: Union[Tolds, Answer]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        source.close()
        raise


def shown_as(told: Tolds, shown: Several, *, stream: bool) -> Answer:
    """The answer of a fan-out, as it happens or at its end."""
    if stream:
        first = list(itertools.islice(told, 1))  # by then a run has begun, and the headers can tell how
        body = shown.stream(itertools.chain(first, told))
        return Answer(body, content_type=Native.stream_type, headers=UNBUFFERED, close=told.close)
    with contextlib.closing(told):
        return Answer(shown.whole(told))


# ---- /api/v1: one run

@route("POST", "/api/v1/prompt", body=PromptRequest, where="body", answer=PromptAnswer, events=EventLine,
       errors=(Invalid, NotFound, Conflict, BackendUnavailable, StoreUnavailable, TimedOut, Canceled),
       headers=("X-Clinvk-Start",), example={"backend": "echo", "prompt": "hello", "ephemeral": True})
def prompt(server: Server, call: Call) -> Answer:
    """Run one prompt on one backend. A run that fails is an answer, too: its exit_code is not 0."""
    try:
        started = server.start(call.body, call.stop, at="body", prompt_at="body.prompt", ran=call.ran)
    except UnknownModel as error:
        raise placed(error, "body") from None
    asked = Asked(started.request.model, len(started.request.prompt), request_id=call.request_id)
    renderer = Native(asked, started.request.backend, started.ignored, started.session_id)
    if started.request.streams:
        return streamed(alone(started.events), renderer, {}, until=Event)
    return collected(alone(started.events), renderer, {})


# ---- /api/v1: several runs

@route("POST", "/api/v1/parallel", body=ParallelRequest, where="body", answer=ParallelAnswer, events=EventLine,
       errors=(Invalid, BackendUnavailable, Canceled), headers=("X-Clinvk-Start",),
       example={"tasks": [{"backend": "echo", "prompt": "one"}, {"backend": "echo", "prompt": "two"}]})
def parallel(server: Server, call: Call) -> Answer:
    """Several runs at once."""
    request, settings = call.body, server.config.parallel
    tasks = [Placed(ephemeral(task, dry_run=request.dry_run), f"body.tasks[{index}]")
             for index, task in enumerate(request.tasks)]
    natives = checked(server, call, tasks)
    told = fan_out(len(tasks), starter(server, call, tasks), call.stop,
                   workers=min(request.max_parallel or settings.max_workers, server.slots.limit),
                   fail_fast=settings.fail_fast if request.fail_fast is None else request.fail_fast)

    def summary(results: List[Result], answers: List[Json]) -> Json:
        failed = sum(result.failure is not None for result in results)
        return {"total_tasks": len(results), "completed": len(results) - failed, "failed": failed, "results": answers}
    return shown_as(in_line(server, tasks, told), Several(natives, summary), stream=request.stream)


@route("POST", "/api/v1/compare", body=CompareRequest, where="body", answer=CompareAnswer, events=EventLine,
       errors=(Invalid, BackendUnavailable, Canceled), headers=("X-Clinvk-Start",),
       example={"backends": ["echo"], "prompt": "hello"})
def compare(server: Server, call: Call) -> Answer:
    """One prompt on several backends."""
    request = call.body
    for index, name in enumerate(request.backends):
        server.known_backend(name, f"body.backends[{index}]")
    allowed_workdir(request.workdir, server.config, "body")
    tasks = [Placed(PromptRequest(backend=name, prompt=request.prompt, model=request.model, workdir=request.workdir,
                                  ephemeral=True, dry_run=request.dry_run or None), "body")
             for name in request.backends]
    natives = checked(server, call, tasks)
    told = fan_out(len(tasks), starter(server, call, tasks), call.stop,
                   workers=1 if request.sequential else server.slots.limit, fail_fast=False)

    def summary(results: List[Result], answers: List[Json]) -> Json:
        return {"prompt": request.prompt, "backends": request.backends,
                "results": [{"model": "", **answer} for answer in answers]}
    return shown_as(in_line(server, tasks, told), Several(natives, summary), stream=request.stream)


@route("POST", "/api/v1/chain", body=ChainRequest, where="body", answer=ChainAnswer, events=EventLine,
       errors=(Invalid, BackendUnavailable, Canceled), headers=("X-Clinvk-Start",),
       example={"steps": [{"backend": "echo", "prompt": "one"}, {"backend": "echo", "prompt": "{{previous}}, two"}]})
def chain(server: Server, call: Call) -> Answer:
    """Several runs one after the other, each with the output of the one before at hand."""
    request = call.body
    if request.pass_session_id or request.persist_sessions or any("{{session}}" in s.prompt for s in request.steps):
        raise BadRequest("a chain keeps no session: leave out pass_session_id, persist_sessions and {{session}}; "
                         "{{previous}} is the last step's output")
    tasks = [Placed(ephemeral(step, dry_run=request.dry_run), f"body.steps[{index}]")
             for index, step in enumerate(request.steps)]
    if request.pass_working_dir:
        for index, (task, at) in enumerate(tasks[1:], 1):
            workdir = task.workdir or tasks[index - 1].task.workdir
            tasks[index] = Placed(dataclasses.replace(task, workdir=workdir), at)
    natives = checked(server, call, tasks)

    def summary(results: List[Result], answers: List[Json]) -> Json:
        failed = [step for step, result in enumerate(results, 1) if result.failure]
        return {"total_steps": len(tasks), "completed_steps": len(results) - len(failed),
                **({"failed_step": failed[0]} if failed else {}),
                "results": [{"step": number, "name": step.name, **answer}
                            for number, (step, answer) in enumerate(zip(request.steps, answers), 1)]}
    shown = Several(natives, summary)

    def start(index: int, stop: TaskStop) -> Events:
        step, at = tasks[index]
        if index and not is_dry(tasks[index - 1].task, server.config):
            prompt = filled(step.prompt, shown.results[index - 1].final, server.config.server.max_output_bytes, at)
            step = dataclasses.replace(step, prompt=prompt)
        return start_task(server, Placed(step, at), stop, call.ran).events
    told = in_turn(len(tasks), start, call.stop, stop_on_failure=request.stop_on_failure)
    return shown_as(in_line(server, tasks, told), shown, stream=request.stream)


def is_dry(task: PromptRequest, config: Config) -> bool:
    """Whether it has no output of its own."""
    return config.unified_flags.dry_run if task.dry_run is None else task.dry_run


PREVIOUS = "{{previous}}"


def filled(prompt: str, previous: List[str], limit: int, at: str) -> str:
    """The prompt with the last step's output in it. Raises Invalid if that becomes longer than `limit`: a chain that
    doubles its text at each step would fill the memory."""
    size = len(prompt) + prompt.count(PREVIOUS) * (length(previous) - len(PREVIOUS))
    if size > limit:
        raise Invalid([Problem(f"{at}.prompt", f"would have {size} characters with {PREVIOUS} in it; "
                                               f"server.max_output_bytes allows {limit}")])
    return prompt.replace(PREVIOUS, "".join(previous))


class Placed(NamedTuple):
    """One of the runs that a request asks for, and where that stands in the body."""
    task: PromptRequest
    at: str


def ephemeral(task: Task, *, dry_run: bool) -> Task:
    """A task of a fan-out, which keeps no session."""
    return dataclasses.replace(task, ephemeral=True, dry_run=True if dry_run else task.dry_run)


def checked(server: Server, call: Call, tasks: Sequence[Placed]) -> List[Native]:
    """A renderer for each task. Raises what is wrong with any of them, a faulty field first: nothing has run."""
    natives: List[Native] = []
    others: List[ClinvkError] = []
    for task, at in tasks:
        try:
            started = start_task(server, Placed(task, at), Stop(), call.ran)
            ignored = [*started.ignored, *(["output_format"] if task.output_format == "stream-json" else [])]
            natives.append(Native(Asked(started.request.model), task.backend, ignored))
        except Invalid:  # it names the field
            raise
        except ClinvkError as error:
            error.args = (f"{at}: {error}",)
            others.append(placed(error, at))
    if others:
        raise others[0]
    return natives


def placed(error: ClinvkError, at: str) -> ClinvkError:
    """`error`, whose fields stand in the body at `at`."""
    error.problems = [problem._replace(location=f"{at}.{problem.location}") for problem in error.problems]
    return error


def in_line(server: Server, tasks: Sequence[Placed], told: Tolds) -> Tolds:
    """`told`, as that of one request in the line; what runs dry need not wait."""
    return told if all(is_dry(task, server.config) for task, _ in tasks) else as_one_request(server.slots, told)


def start_task(server: Server, placed: Placed, stop: Stop, ran: List[Ran]) -> Started:
    return server.start(placed.task, stop, at=placed.at, prompt_at=f"{placed.at}.prompt", ran=ran, admitted=True)


def starter(server: Server, call: Call, tasks: Sequence[Placed]) -> StartTask:
    return lambda index, stop: start_task(server, tasks[index], stop, call.ran).events


# ---- OpenAI and Anthropic: chats

CHAT_ERRORS = (Invalid, UnknownModel, NotFound, Conflict, BackendAuth, RateLimited, BackendUnavailable, BackendFailed,
               StoreUnavailable, TimedOut, Canceled)
CHAT_HEADERS = ("X-Clinvk-Backend", "X-Clinvk-Model", "X-Clinvk-Ignored", "X-Clinvk-Start")


@route("POST", "/openai/v1/chat/completions", "/v1/chat/completions", body=ChatRequest, other_body=ResponsesRequest,
       answer=ChatCompletion, events=Union[ChatCompletionChunk, OpenAIError], errors=CHAT_ERRORS, headers=CHAT_HEADERS,
       example={"model": "echo", "messages": [{"role": "user", "content": "hello"}]})
def chat_completions(server: Server, call: Call) -> Answer:
    """Answer a chat, as OpenAI's API does. A body of /responses, with `input`, is answered so, too: Cursor sends it."""
    include_usage = call.body.stream_options.include_usage
    return compat(server, call, lambda asked: ChatCompletions(asked, include_usage=include_usage))


@route("POST", "/openai/v1/completions", "/v1/completions", body=CompletionRequest, answer=TextCompletion,
       events=Union[TextCompletion, OpenAIError], errors=CHAT_ERRORS, headers=CHAT_HEADERS,
       example={"model": "echo", "prompt": "hello"})
def completions(server: Server, call: Call) -> Answer:
    """Complete a text, as editors ask for it while somebody types."""
    prompts, include_usage = call.body.texts if call.body.echo else (), call.body.stream_options.include_usage
    return compat(server, call, lambda asked: Completions(asked, include_usage=include_usage, prompts=prompts))


@route("POST", "/openai/v1/responses", "/v1/responses", body=ResponsesRequest, answer=Response,
       events=ResponseEvent, errors=CHAT_ERRORS, headers=CHAT_HEADERS, example={"model": "echo", "input": "hello"})
def responses(server: Server, call: Call) -> Answer:
    """Answer a chat, as OpenAI's newer API does. Nothing is stored, so that the input is always the whole chat."""
    repeated, final_code = call.body.repeated, call.final.code if call.final else ""
    return compat(server, call, lambda asked: Responses(asked, repeated=repeated, final_code=final_code))


@route("POST", "/anthropic/v1/messages", "/v1/messages", "/anthropic/v1/v1/messages", body=MessagesRequest,
       answer=AnthropicMessage, events=MessageEvent, errors=CHAT_ERRORS, headers=CHAT_HEADERS,
       example={"model": "echo", "max_tokens": 1000, "messages": [{"role": "user", "content": "hello"}]})
def messages(server: Server, call: Call) -> Answer:
    """Answer a chat, as Anthropic's API does."""
    return compat(server, call, Anthropic)


def compat(server: Server, call: Call, renderer_for: Callable[[Asked], Renderer]) -> Answer:
    """A request of the OpenAI or Anthropic API: the same runs, shown by a renderer of its own."""
    request: Compat = call.body
    prompts = request.to_prompts(server.config)
    first, told = started_runs(server, call, prompts)
    characters = sum(one.characters for one in prompts) // len(prompts)
    renderer = renderer_for(Asked(request.model, characters, call.request_id, answers=len(prompts)))
    headers = {"X-Clinvk-Backend": first.request.backend, "X-Clinvk-Model": first.request.model,
               "X-Clinvk-Ignored": ", ".join([*request.ignored(), *map(request.called, first.ignored)])}
    headers = {name: re.sub(r"[^A-Za-z0-9_.,:/ @-]", "?", text)[:4000] for name, text in headers.items() if text}
    if request.stream:
        shown = never_silent(told, renderer.shown)
        return streamed(shown, renderer, headers, until=(Message, Thinking, ToolUse, Refusal, Done))
    return collected(told, renderer, headers, fails=True)


def started_runs(server: Server, call: Call, prompts: List[PromptRequest]) -> Tuple[Started, Tolds]:
    """The runs of a compat request, as one; and how the first of them has been started. Several take one place in the
    line, as a fan-out does; if one fails, the others are ended."""
    start = functools.partial(server.start, at="clinvk", prompt_at=call.body.PROMPT_AT)
    if len(prompts) == 1:
        only = start(prompts[0], call.stop, ran=call.ran)
        return only, alone(only.events)
    first, *_ = [start(one, Stop(), ran=[]) for one in prompts]  # raises what is wrong with any of them
    if prompts[0].session_id is not None:
        raise Invalid([Problem("clinvk.session_id", "can not have several answers as its next turn: ask for one")])

    def start_one(index: int, stop: TaskStop) -> Events:
        return start(prompts[index], stop, ran=call.ran, admitted=True).events
    told = fan_out(len(prompts), start_one, call.stop, workers=min(len(prompts), server.slots.limit), fail_fast=True)
    return first, in_line(server, [Placed(one, "") for one in prompts], told)


# ---- Backends, sessions, health, metrics

@route("GET", "/api/v1/backends", answer=Backends)
def backends(server: Server, call: Call) -> Answer:
    """Every configured backend, and whether it can run."""
    rows: List[BackendState] = []
    for name in server.config.names():
        program, settings = server.program(name), server.config.backends[name]
        rows.append({"name": name, "available": program is not None, "enabled": settings.enabled,
                     "version": server.versions.get(name, ""), "path": (program or [""])[0] if program else "",
                     "default_model": settings.model, "streams": kind_of(name).streams})
    return json_answer({"backends": rows})


@dataclass(frozen=True)
class SessionsQuery:
    """What GET /api/v1/sessions can be asked."""
    backend: str = param("", names_backend=True, doc="Only those of this backend.")
    status: str = param("", choices=STATUSES, doc="Only those whose last turn has this status.")
    limit: int = param(100, minimum=1, maximum=1000, doc="How many.")
    offset: int = param(0, minimum=0, maximum=10**9, doc="How many to leave out before.")


@route("GET", "/api/v1/sessions", query=SessionsQuery, answer=SessionList, errors=(Invalid, StoreUnavailable))
def sessions(server: Server, call: Call) -> Answer:
    """The stored sessions, last used first; of an initial_prompt, the first 1,000 characters."""
    query = call.query
    found, total = server.store.page(query.backend, query.status, query.limit, query.offset)
    if query.backend and not total and not server.store.page(query.backend, "", 1, 0)[1]:
        server.known_backend(query.backend, "query.backend")
    return json_answer({"sessions": [shown_session(session) for session in found], "total": total,
                        "limit": query.limit, "offset": query.offset})


def shown_session(session: Session) -> Json:
    """A session as clients see it."""
    shown = {**vars(session), "created_at": utc(session.created_at), "last_used": utc(session.last_used),
             "token_usage": {**native_usage(Usage()), **session.token_usage}}
    kept_back = ("system_prompt", "has_begun", "sandbox_mode", "turn", "held")
    return {name: value for name, value in shown.items() if name not in kept_back}


@route("GET", "/api/v1/sessions/<name>", answer=SessionState, errors=(NotFound, Conflict, StoreUnavailable))
def session_by_id(server: Server, call: Call) -> Answer:
    """One session, by its id or the first digits of it."""
    return json_answer(shown_session(server.store.find(call.name)))


@route("DELETE", "/api/v1/sessions/<name>", answer=SessionDeleted, errors=(NotFound, Conflict, StoreUnavailable))
def delete_session(server: Server, call: Call) -> Answer:
    """Delete a session, and the conversation that its CLI has stored."""
    session = server.store.find(call.name)
    server.store.remove(session)
    left = server.forget(session)
    return json_answer({"deleted": True, "id": session.id, **({"warning": left} if left else {})})


@route("GET", "/health", answer=Health, statuses=(200, 503))
def health(server: Server, call: Call) -> Answer:
    """Whether the server can do its work. 503 if sessions can not be stored."""
    names = [n for n in server.config.names() if server.config.backends[n].enabled]
    available = {name: server.program(name) is not None for name in names}
    seconds, slots = time.time() - server.began, server.slots
    store = store_state(server.store)
    able: Literal["ok", "degraded"] = "ok" if all(available.values()) else "degraded"
    state: Health = {
        "status": able if store["available"] else "unhealthy", "version": __version__,
        "uptime": uptime_text(seconds), "uptime_ms": round(1000 * seconds),
        "backends": [{"name": name, "available": there} for name, there in available.items()], "session_store": store,
        "runs": {"active": slots.active, "waiting": len(slots.waiting), "limit": slots.limit}}
    return json_answer(state, status=200 if store["available"] else 503)


def store_state(store: Store) -> StoreHealth:
    try:
        return {"available": True, "session_count": store.count(), "error": None}
    except StoreUnavailable as error:
        return {"available": False, "session_count": None, "error": str(error)}


def uptime_text(seconds: float) -> str:
    """151 -> `2m31s`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest}s"


@route("GET", "/metrics", answer="text/plain", only_if="metrics_enabled")
def metrics(server: Server, call: Call) -> Answer:
    """What the server has done since it began, and does now, for Prometheus."""
    text = "".join([server.metrics.text(), *current_metrics(server), *process_metrics(server.began)])
    return Answer([text.encode()], content_type="text/plain; version=0.0.4; charset=utf-8")


def current_metrics(server: Server) -> Iterator[str]:
    """Those that are kept elsewhere."""
    yield exposed("clinvk_sessions_created_total", "counter", "Sessions that were created, each counted when its "
                  "first turn is over.", [("", {}, server.store.created)])
    with contextlib.suppress(StoreUnavailable):  # nobody knows: no sample
        yield gauge("clinvk_active_sessions", "Sessions of which a turn is running, in any server that shares them.",
                    server.store.count("active"))
    yield gauge("clinvk_runs_active", "Runs that are going on.", server.slots.active)
    yield gauge("clinvk_runs_waiting", "Runs that wait for a slot.", len(server.slots.waiting))


# ---- Models, and how many tokens a request has

def model_names(server: Server) -> List[str]:
    """What a client can choose from: each backend that can run, its aliases and its default model."""
    names: List[str] = []
    for name in server.runnable():
        settings = server.config.backends[name]
        aliases = [f"{name}/{alias}" for alias in MODEL_ALIASES if getattr(settings.models, alias)]
        names += [name, *aliases, *([f"{name}/{settings.model}"] if settings.model else [])]
    return names


def known_model(server: Server, name: str) -> str:
    """`name` itself. Raises UnknownModel unless a backend that can run goes by it."""
    backend, _ = backend_of(name, server.config)
    server.backend(backend)
    return name


def openai_model(server: Server, name: str) -> OpenAIModel:
    return {"id": name, "object": "model", "created": int(server.began), "owned_by": "clinvk"}


def anthropic_model(server: Server, name: str) -> AnthropicModel:
    return {"type": "model", "id": name, "display_name": name, "created_at": utc(server.began)}


# What Codex says to a model in place of its own system prompt, which is about tools that clinvk does not offer.
CODEX_INSTRUCTIONS = ("You are a programmer's assistant. In this chat you have no tools: say what you would run or "
                      "change, and the user does it.")
CODEX_EFFORTS = {"low": "Quick answers", "medium": "Some thinking", "high": "More thinking",
                 "xhigh": "The most thinking"}


def codex_model(server: Server, name: str, priority: int) -> CodexModel:
    """If one of these fields is not there, but for the last two, codex 0.169.0 refuses the whole list."""
    kind = kind_of(backend_of(name, server.config)[0])
    return {"slug": name, "display_name": name, "visibility": "list", "supported_in_api": True, "priority": priority,
            "base_instructions": CODEX_INSTRUCTIONS, "shell_type": "disabled", "experimental_supported_tools": [],
            "supported_reasoning_levels": [{"effort": effort, "description": about}
                                           for effort, about in CODEX_EFFORTS.items() if effort in kind.efforts],
            "support_verbosity": False, "truncation_policy": {"mode": "tokens", "limit": 10_000},
            "context_window": kind.context_window,
            "input_modalities": ["text", "image"] if kind.shows_images else ["text"]}


@dataclass(frozen=True)
class ModelsQuery(Open):
    """What GET /openai/v1/models can be asked."""
    client_version: str = param("", free_text=True, doc="Codex sends its own: then `models` is there, too.")


@route("GET", "/openai/v1/models", query=ModelsQuery, answer=OpenAIModels)
def openai_models(server: Server, call: Call) -> Answer:
    """What `model` can be: the backends that can run, and for each its aliases and its default model."""
    names = model_names(server)
    listed: OpenAIModels = {"object": "list", "data": [openai_model(server, name) for name in names]}
    if call.query.client_version:
        listed["models"] = [codex_model(server, name, place) for place, name in enumerate(names)]
    return json_answer(listed)


@route("GET", "/openai/v1/models/<name:path>", answer=OpenAIModel, errors=(UnknownModel, BackendUnavailable))
def openai_model_by_id(server: Server, call: Call) -> Answer:
    """One of the list, or any other name that a backend takes."""
    return json_answer(openai_model(server, known_model(server, call.name)))


@route("GET", "/anthropic/v1/models", "/anthropic/v1/v1/models", answer=AnthropicModels)
def anthropic_models(server: Server, call: Call) -> Answer:
    """What `model` can be, in one page."""
    rows = [anthropic_model(server, name) for name in model_names(server)]
    page: AnthropicModels = {"data": rows, "has_more": False, "first_id": rows[0]["id"] if rows else None,
                             "last_id": rows[-1]["id"] if rows else None}
    return json_answer(page)


@route("GET", "/anthropic/v1/models/<name:path>", "/anthropic/v1/v1/models/<name:path>", answer=AnthropicModel,
       errors=(UnknownModel, BackendUnavailable))
def anthropic_model_by_id(server: Server, call: Call) -> Answer:
    """One of the list, or any other name that a backend takes."""
    return json_answer(anthropic_model(server, known_model(server, call.name)))


@route("POST", "/anthropic/v1/messages/count_tokens", "/v1/messages/count_tokens",
       "/anthropic/v1/v1/messages/count_tokens", body=CountRequest, answer=TokenEstimate,
       errors=(Invalid, UnknownModel), headers=("X-Clinvk-Estimate",),
       example={"model": "echo", "messages": [{"role": "user", "content": "hello"}]})
def count_tokens(server: Server, call: Call) -> Answer:
    """Estimate a request's tokens: no CLI counts them without a run."""
    request = call.body
    backend_of(request.model, server.config)
    counted: TokenEstimate = {"input_tokens": max(1, estimate(request.characters()))}
    return json_answer(counted, X_Clinvk_Estimate="true")


# ---- The ways in

@route("GET", "/", "/anthropic", "/openai/v1", answer=Dict[str, Any])
def root(server: Server, call: Call) -> Answer:
    """The version and the ways in."""
    return json_answer({"name": "clinvk", "version": __version__, **WAYS_IN})


# The paths that people are told of, by kind.
WAYS_IN = {"Custom API": ("/api/v1/prompt", "/api/v1/parallel", "/api/v1/chain", "/api/v1/compare"),
           "OpenAI": ("/openai/v1/models", "/openai/v1/chat/completions"), "Anthropic": ("/anthropic/v1/messages",),
           "Docs": ("/openapi.json",), "Health": ("/health",)}


# ==== OpenAPI =====================================================================================
# In: the routes, and the shapes of what they take and answer. Out: OpenAPI 3.1 of this server, and its page.

# ---- What is checked in code. The rules of fields become schemas by themselves; what `problems`, `prompt_request`,
# `chat_request`, `chain` and Server.continued refuse besides is told here once more, or the document would not be true.

NOT_BLANK = r"[^\s\x1c-\x1f\x85]"  # what str.strip() leaves, also where \s is ECMAScript's
SOME_TEXT: Json = {"type": "string", "pattern": NOT_BLANK}
FALSE, ABSENT = {"enum": [False]}, {"enum": [None]}
# What `image_of` takes. As a regular expression of Python's it needs 400 MB for 9 MB.
IMAGE_DATA = IMAGE_BEGINS.pattern + "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
IMAGE_IN_URL: Json = {"pattern": f"^{IMAGE_URL.pattern}{IMAGE_DATA}$"}


def words(*allowed: Optional[str]) -> Json:
    return {"enum": list(allowed)}


def with_some(*kinds: Json) -> Json:
    """A list in which one item is of one of these kinds. Each says what fields it must have, and their schemas; a field
    that may be null may be left out."""
    objects = [{"type": "object", "properties": fields,
                "required": [name for name, schema in fields.items() if None not in schema.get("enum", ())]}
               for fields in kinds]
    return {"contains": {"anyOf": objects}}


def text_or_some(*kinds: Json) -> Json:
    """A text that is not blank, or a list as above."""
    return {"anyOf": [SOME_TEXT, {"type": "array", **with_some(*kinds)}]}


def needs_schema(field: str) -> Json:
    """An object that has this field, if its form is json_schema."""
    return {"anyOf": [{"properties": {"type": words("text", "json_object", None)}},
                      {"required": [field], "properties": {field: {"type": "object"}}}]}


def forces_no_tool(choice: Json) -> Json:
    """An object without tools, or whose `tool_choice` fits."""
    return {"anyOf": [{"properties": {"tool_choice": choice}}, {"properties": {"tools": {"maxItems": 0}}}]}


REFUSAL: Json = {"type": words("refusal"), "refusal": SOME_TEXT}
SPEAKS = words("user", "assistant", "tool", "function")
FREE_CHOICE = words("auto", "none", None)
ONE_SESSION: Json = {"not": {"required": ["session_id", "ephemeral"], "properties": {
    "session_id": {"type": "string"}, "ephemeral": {"enum": [True]}}}}
# Model -> field, or "" for the model itself -> JSON Schema.
CHECKED_IN_CODE: Dict[Any, Dict[str, Json]] = {
    PromptRequest: {"": ONE_SESSION},
    AgentOptions: {"": ONE_SESSION},
    ChainRequest: {"pass_session_id": FALSE, "persist_sessions": FALSE},
    ImageURL: {"url": IMAGE_IN_URL},
    InputImage: {"image_url": IMAGE_IN_URL},
    ImageSource: {"": {"allOf": [{"required": ["data"], "properties": {"data": {"type": "string"}}}]},
                  "type": words("base64"), "data": {"pattern": f"^{IMAGE_DATA}$"}},
    Format: {"": needs_schema("schema")},
    ResponseFormat: {"": needs_schema("json_schema")},
    ChatRequest: {
        "": forces_no_tool(FREE_CHOICE), "logprobs": FALSE,
        "messages": with_some(
            {"role": SPEAKS, "content": text_or_some({"type": words("text"), "text": SOME_TEXT}, REFUSAL,
                                                     {"type": words("image_url")})},
            {"role": SPEAKS, "refusal": SOME_TEXT}, {"role": words("tool", "function")},
            {"role": SPEAKS, "tool_calls": {"type": "array", "minItems": 1}},
            {"role": SPEAKS, "function_call": {"type": "object"}})},
    CompletionRequest: {
        "": {"anyOf": [{"properties": {"prompt": {"anyOf": [SOME_TEXT, {"type": "array", "items": SOME_TEXT}]}}},
                       {"required": ["suffix"], "properties": {"suffix": {"type": "string", "minLength": 1}}}]},
        "prompt": {"minItems": 1}, "logprobs": ABSENT, "best_of": {"maximum": 1}},
    ResponsesRequest: {
        "": forces_no_tool(FREE_CHOICE), "previous_response_id": ABSENT, "conversation": ABSENT, "background": FALSE,
        "input": text_or_some({
            "role": words("user", "assistant"), "type": words("message", None),
            "content": text_or_some({"type": words("input_text", "output_text", "text"), "text": SOME_TEXT}, REFUSAL,
                                    {"type": words("input_image")})},
            {"type": words(*(name for kind in (CallItem, OutputItem)
                             for name in wire_fields(kind)["type"].rules.choices))})},
    MessagesRequest: {
        "": forces_no_tool({"properties": {"type": FREE_CHOICE}}),
        "messages": {**with_some({"role": words("user", "assistant"), "content": text_or_some(
            {"type": words("text"), "text": SOME_TEXT},
            {"type": words("image", "tool_use", "tool_result", "document", "search_result")})}), "prefixItems": [
                {"$ref": "#/components/schemas/MessageParam",
                 "properties": {"role": words("user", "system")}}]}}}


# ---- Models and answers as JSON Schema

class Schemas:
    """JSON Schema of models, which check requests, and of answers; each once, under its name."""

    def __init__(self, backends: Sequence[str]) -> None:
        self.backends = list(backends)  # that can be asked for
        self.named: Dict[str, Json] = {}

    def of(self, kind: Any, rules: Optional[FieldRules] = None, **more: Any) -> Json:
        """`rules` are those of a model's field, `more` what CHECKED_IN_CODE has of it; answers have neither."""
        origin, inner = get_origin(kind), get_args(kind)
        within = rules._replace(not_empty=False) if rules else None
        if origin is Annotated:
            notes = [note if isinstance(note, dict) else {"description": note} for note in inner[1:]]
            return {**self.of(inner[0], rules), **{name: value for note in notes for name, value in note.items()}}
        if origin is Union:
            return self.one_of(inner, rules, **more)
        if origin is Literal:
            return {"type": JSON_NAMES[type(inner[0])], "enum": list(inner)}
        if origin is list:
            return {"type": "array", "items": self.of(inner[0], within), **list_rules(rules), **more}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.of(inner[1], within), **more}
        if rules and rules.names_backend and self.backends:
            return {"type": "string", "enum": self.backends}
        if kind in JSON_NAMES:
            return {"type": JSON_NAMES[kind], **scalar_rules(kind, rules), **more}
        return more if kind is Any else self.reference(kind)

    def one_of(self, kinds: Sequence[Any], rules: Optional[FieldRules], **more: Any) -> Json:
        """Of a Union. In a model None says that the field may be left out."""
        shown = [self.of(kind, rules, **more) for kind in kinds if kind is not type(None)]
        schema = shown[0] if len(shown) == 1 else {"anyOf": shown}
        return schema if rules or type(None) not in kinds else or_null(schema)

    def reference(self, kind: Any) -> Json:
        if kind.__name__ not in self.named:
            self.named[kind.__name__] = {}  # it may hold itself
            self.named[kind.__name__] = self.object(kind)
        return {"$ref": f"#/components/schemas/{kind.__name__}"}

    def object(self, kind: type) -> Json:
        fields = wire_fields(kind) if dataclasses.is_dataclass(kind) else {}
        if fields:
            closed = {} if issubclass(kind, Open) else {"additionalProperties": False}
            checked = CHECKED_IN_CODE.get(kind, {})
            shown = {"properties": {name: self.field(field, **checked.get(name, {})) for name, field in fields.items()},
                     "required": [name for name, field in fields.items() if field.required],
                     **closed, **checked.get("", {})}
        else:
            hints = get_type_hints(kind, include_extras=True)
            shown = {"properties": {name: self.of(hint) for name, hint in hints.items()},
                     "required": [name for name in hints if name in getattr(kind, "__required_keys__", hints)]}
        about = without_empty({"description": inspect.cleandoc(kind.__doc__ or "")})
        return {"type": "object", **about, **shown}

    def field(self, field: WireField, **more: Any) -> Json:
        """Of a field of a model: null means that it is not there."""
        schema = self.of(field.kind, field.rules, **more)
        default = field.default if type(field.default) in JSON_NAMES and field.default != "" else None
        about = without_empty({"description": field.rules.doc, "default": default})
        return {**(schema if field.required else or_null(schema)), **about}

    def event(self, entry: Route) -> Json:
        """What a stream of that route is made of."""
        if entry.events is EventLine:
            return self.line(entry.answer)
        event = server_sent_schema(self.of(entry.events))
        return {"anyOf": [event, LAST_OF_OPENAI]} if entry.answer in (ChatCompletion, TextCompletion) else event

    def line(self, answer: Any) -> Json:
        """A line of /api/v1's streams: an event, or at the end of a fan-out the whole answer."""
        kinds = [with_fields(self.object(EventLine), type=one_word(name), content=self.of(content))
                 for name, content in EVENT_CONTENTS.items()]
        self.named["Event"] = {"oneOf": kinds}
        last = with_fields(self.object(answer), type=one_word("summary"), sequence={"type": "integer"})
        return {"oneOf": [{"$ref": "#/components/schemas/Event"}, *([] if answer is PromptAnswer else [last])]}


def one_word(word: str) -> Json:
    return {"type": "string", "enum": [word]}


def with_fields(schema: Json, **fields: Json) -> Json:
    """An object's schema, with more fields that it must have."""
    return {**schema, "properties": {**schema["properties"], **fields}, "required": [*schema["required"], *fields]}


JSON_NAMES: Dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def without_empty(schema: Json) -> Json:
    """Without what says nothing."""
    return {name: value for name, value in schema.items() if value not in (None, "", ())}


def or_null(schema: Json) -> Json:
    if "$ref" in schema or "anyOf" in schema or not schema:
        return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]} if schema else {}
    nullable = {**schema, "type": [schema["type"], "null"]} if "type" in schema else dict(schema)
    if "enum" in schema and None not in schema["enum"]:
        nullable["enum"] = [*schema["enum"], None]
    return nullable


def list_rules(rules: Optional[FieldRules]) -> Json:
    """What the Checker's `items` checks."""
    return without_empty({"minItems": 1 if rules.not_empty else None, "maxItems": rules.longest}) if rules else {}


def scalar_rules(kind: Any, rules: Optional[FieldRules]) -> Json:
    """What `text_problem` and `number_problem` check."""
    if not rules:
        return {}
    if rules.choices:
        return {"enum": list(rules.choices)}
    begins = "(?!-)" if rules.flag_value else "/" if rules.directory and os.name != "nt" else ""
    pattern = NOT_BLANK if rules.not_blank else "" if rules.free_text else f"^{begins}[^\\x00]*$"
    text = {"pattern": pattern, "minLength": 1 if rules.not_empty else None,
            "format": "directory" if rules.directory else None} if kind is str else {}
    return without_empty({**text, "minimum": rules.minimum, "maximum": rules.maximum, "exclusiveMinimum": rules.above})


HEADERS = {
    "X-Request-Id": "The request's own, if it has one of 1 to 128 letters, digits, '.', '_' or '-', else a new one.",
    "request-id": "The same.",
    "x-should-retry": "`false`: the CLI has been asked already, so that SDKs must not repeat the request.",
    "X-Clinvk-Backend": "The backend that answers.",
    "X-Clinvk-Model": "The model that its CLI is told to use, if it is told.",
    "X-Clinvk-Ignored": "Fields of the request that are without effect.",
    "X-Clinvk-Start": "How the CLI came to be there: `cold`, it was started; `spare`, it had been started before; "
                      "`live`, it had given the conversation's last answer. Of several runs, each way once. A stream "
                      "that began before any CLI was there does not tell.",
    "X-Clinvk-Estimate": "`true`: the count is an estimate.",
    "Retry-After": "Seconds after which to try again.",
    "WWW-Authenticate": "Bearer: send a key."}
OF_ALL = ("X-Request-Id", "request-id")
EVERYWHERE = (BadRequest, Forbidden, HeadTooLarge, RateLimited, TooSlow, Defect)  # errors of every route
WITH_A_BODY = (WrongType, TooLarge)


def openapi(config: Config) -> Json:
    """The document: what this server, with this config, takes and answers."""
    schemas = Schemas([name for name in config.names() if config.backends[name].enabled])
    paths: Dict[str, Json] = {}
    for entry in (entry for entry in offered(config) if entry.answer is not None):
        paths.setdefault(entry.path, {})[entry.method.lower()] = operation(entry, schemas, config)
    keys = {"key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            "bearer": {"type": "http", "scheme": "bearer"}}
    about = "The AI CLIs of this machine behind one HTTP server, in three API styles. Null means: this field is absent."
    return {"openapi": "3.1.0", "info": {"title": "clinvk", "version": __version__, "description": about},
            "servers": [{"url": "/"}], "paths": paths,
            "components": {"schemas": schemas.named, **({"securitySchemes": keys} if config.keys else {})}}


def operation(entry: Route, schemas: Schemas, config: Config) -> Json:
    """One method of one path."""
    summary, _, more = inspect.cleandoc(entry.function.__doc__ or "").partition(".")
    aliases = [shown_pattern(pattern) for pattern in entry.patterns[1:]]
    also = f"Answers under {', '.join(aliases)}, too." if aliases else ""
    style = renderer_of(entry.path)
    shown: Json = {"operationId": entry.function.__name__, "summary": summary,
                   "tags": ["Server" if style is Native and "/api/" not in entry.path else style.name],
                   **without_empty({"description": " ".join(part for part in (more.strip(), also) if part)})}
    if entry.query or "{id}" in entry.path:
        shown["parameters"] = parameters(entry, schemas)
    if entry.body:
        example = {"example": entry.example} if entry.example else {}
        bodies = [schemas.reference(model) for model in (entry.body, entry.other_body) if model]
        schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
        shown["requestBody"] = {"required": True, "content": {JSON_TYPE: {"schema": schema, **example}}}
    guarded = bool(config.keys) and not is_open(entry.path)
    if guarded:
        shown["security"] = [{"key": []}, {"bearer": []}]
    return {**shown, "responses": responses_of(entry, style, schemas, guarded=guarded)}


def parameters(entry: Route, schemas: Schemas) -> List[Json]:
    """Those in the path and in the query."""
    in_path = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    in_query = [{"name": name, "in": "query", **without_empty({"description": field.rules.doc}),
                 "schema": or_empty(schemas.of(field.kind, field.rules))}
                for name, field in (wire_fields(entry.query) if entry.query else {}).items()]
    return [*(in_path if "{id}" in entry.path else []), *in_query]


def or_empty(schema: Json) -> Json:
    """Of a field of a query, which may stand there without a value."""
    if "enum" in schema:
        return {**schema, "enum": ["", *schema["enum"]]}
    return {"anyOf": [schema, {"type": "string", "maxLength": 0}]} if schema["type"] != "string" else schema


def responses_of(entry: Route, style: Type[Renderer], schemas: Schemas, *, guarded: bool) -> Json:
    """What comes back, by status."""
    errors: Dict[int, List[Type[ClinvkError]]] = {}
    for error in {*EVERYWHERE, *entry.errors, *(WITH_A_BODY if entry.method == "POST" else ()),
                  *((Unauthorized,) if guarded else ())}:
        errors.setdefault(style.status(error), []).append(error)
    shown = {str(status): error_of(sorted(kinds, key=lambda kind: kind.__name__), style, schemas, entry.headers)
             for status, kinds in sorted(errors.items())}
    content: Json = {entry.answer: {"schema": {"type": "string"}}} if isinstance(entry.answer, str) else {
        JSON_TYPE: {"schema": schemas.of(entry.answer)}}
    if entry.events:
        content[style.stream_type] = {"schema": schemas.event(entry)}
    answer = {"description": "The answer.", "headers": header_objects(*OF_ALL, *entry.headers), "content": content}
    return {**{str(status): answer for status in entry.statuses}, **shown}


def server_sent_schema(schema: Json) -> Json:
    """Of one event of a text/event-stream, whose data is JSON; as OpenAPI 3.2 writes it."""
    data = {"type": "string", "contentMediaType": JSON_TYPE, "contentSchema": schema}
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}


LAST_OF_OPENAI = {"type": "object", "required": ["data"], "properties": {"data": {"enum": ["[DONE]"]}}}


def error_of(kinds: Sequence[Type[ClinvkError]], style: Type[Renderer], schemas: Schemas,
             headers: Container[str]) -> Json:
    """What comes back with one status that is an error; `headers` are those of an answer."""
    waits = {RateLimited, BackendUnavailable} & set(kinds)
    asked = {BackendFailed, TimedOut, BackendAuth, RateLimited, UnknownModel, StoreUnavailable} & set(kinds)
    told = [*(["Retry-After"] if waits else []), *(["WWW-Authenticate"] if Unauthorized in kinds else []),
            *(["x-should-retry"] if asked else []),
            *(name for name in ("X-Clinvk-Start",) if asked and name in headers)]
    return {"description": " ".join(inspect.cleandoc(kind.__doc__ or "") for kind in kinds),
            "headers": header_objects(*OF_ALL, *told),
            "content": {style.error_type: {"schema": schemas.reference(style.error_shape)}}}


def header_objects(*names: str) -> Json:
    return {name: {"description": HEADERS[name], "schema": {"type": "string"}} for name in names}


@route("GET", "/openapi.json", answer=Dict[str, Any])
def openapi_json(server: Server, call: Call) -> Answer:
    """This document."""
    server.document = server.document or to_json(openapi(server.config))
    return Answer([server.document])


# ---- /docs

DOCS_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
DOCS_PAGE = b"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>clinvk</title>
<link rel="icon" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="docs"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
DOCS_START = b"""\
SwaggerUIBundle({url: "/openapi.json", dom_id: "#docs", deepLinking: true, tryItOutEnabled: true, validatorUrl: null});
"""
SCRIPT = "text/javascript; charset=utf-8"
DOCS_FILES = {"start.js": SCRIPT, "swagger-ui-bundle.js": SCRIPT, "swagger-ui.css": "text/css; charset=utf-8",
              "favicon-32x32.png": "image/png"}


def docs_answer(data: bytes, content_type: str) -> Answer:
    return Answer([data], content_type=content_type, headers={
        "Content-Security-Policy": DOCS_POLICY, "Cache-Control": "no-cache"})


@route("GET", "/docs", answer="text/html")
def docs(server: Server, call: Call) -> Answer:
    """A page that shows this document and tries calls out: Swagger UI."""
    return docs_answer(DOCS_PAGE, "text/html; charset=utf-8")


@route("GET", "/docs/<name>", answer=None)
def docs_file(server: Server, call: Call) -> Answer:
    """A file of that page."""
    if call.name not in DOCS_FILES:
        raise NotFound(f"there is no /docs/{call.name}; the page is /docs")
    if call.name == "start.js":
        return docs_answer(DOCS_START, DOCS_FILES[call.name])
    try:
        data = pkgutil.get_data(__name__, f"swagger-ui/{call.name}")
    except OSError:
        data = None
    if data is None:
        raise NotFound("Swagger UI is inside of clinvk.pyz only; build that with build_zipapp.py, and start it")
    return docs_answer(data, DOCS_FILES[call.name])


# ==== HTTP ========================================================================================
# In: WSGI. Out: WSGI. Every request takes this way: guards, route, body, endpoint, and errors in its API's shape.

def make_app(server: Server) -> Callable[[Json, Callable[..., Any]], Iterable[bytes]]:
    """The WSGI application."""
    router = bottle.Router()
    for entry in offered(server.config):
        for pattern in entry.patterns:
            router.add(pattern, entry.method, entry)

    def app(environ: Json, start_response: Callable[..., Any]) -> Iterable[bytes]:
        began, head = time.monotonic(), Head(environ)
        request_id = request_id_of(head.get("X-Request-Id"))
        environ[STOP] = Stop(environ.get("waitress.client_disconnected", lambda: False), server.closing)
        ran = environ[RAN] = []
        answer = answer_or_error(server, router, head, request_id)
        answer.headers.update({**headers_of_runs(ran), **headers_of_every_answer(server.config, head, request_id)})
        start_response(f"{answer.status} {http.HTTPStatus(answer.status).phrase}", list(answer.headers.items()))
        if head.method == "HEAD":
            answer.body = []

        def ended() -> None:
            request_ended(server, head, answer.status, request_id, began, ran)
            server.want_again(ran)
        return Sent(answer, ended)
    return app


def headers_of_every_answer(config: Config, head: Head, request_id: str) -> Dict[str, str]:
    return {"X-Request-Id": request_id, "request-id": request_id, "X-Content-Type-Options": "nosniff",
            **cors_headers(config, head)}


def headers_of_runs(ran: Iterable[Ran]) -> Dict[str, str]:
    """How the CLIs came to be there that have begun by now; each way once."""
    starts = dict.fromkeys(one.start for one in ran if one.began)
    return {"X-Clinvk-Start": ", ".join(starts)} if starts else {}


STOP = "clinvk.stop"  # the request's Stop in WSGI's environ
RAN = "clinvk.ran"  # its runs


class Sent:
    """The body as waitress takes it: when it has been sent, or the client has gone, the answer is closed and logged."""

    def __init__(self, answer: Answer, ended: Callable[[], None]) -> None:
        self.answer, self.ended = answer, ended

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.answer.body)

    def close(self) -> None:
        try:
            self.answer.close()
        finally:
            self.ended()


def request_id_of(sent: str) -> str:
    """The client's own, if it is one, else a new one."""
    return sent if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", sent) else uuid.uuid4().hex


def answer_or_error(server: Server, router: bottle.Router, head: Head, request_id: str) -> Answer:
    """The endpoint's answer, or the error that kept it from answering."""
    try:
        return with_first_piece(answered(server, router, head, request_id))
    except ClinvkError as error:
        known = error
        known.prompted = known.prompted or any(one.began for one in head.environ[RAN])
    except Exception:
        LOG.error("request %s: a defect of clinvk\n%s", request_id, traceback.format_exc())
        known = Defect(f"clinvk has a defect; its log tells more under the request id {request_id}")
    return error_answer(known, head, request_id)


def with_first_piece(answer: Answer) -> Answer:
    """With the first piece of its body at hand: what fails before anything is sent is an HTTP error."""
    if not isinstance(answer.body, list):
        pieces = iter(answer.body)
        with closed_on_error(answer):
            answer.body = itertools.chain([*itertools.islice(pieces, 1)], pieces)
    return answer


def error_answer(error: ClinvkError, head: Head, request_id: str) -> Answer:
    """In the shape of the API that was called; and such that the client does not repeat what must not be repeated."""
    renderer = renderer_of(head.path, speaks_anthropic=bool(head.get("anthropic-version")))
    body, status = renderer.error(error, request_id), renderer.status(error)
    final = final_of(head) if error.prompted and renderer is not Native else None
    if final and status in final.repeated:
        status = final.status
        if final.code and issubclass(renderer, OpenAI):
            body["error"]["code"] = final.code
    return Answer([to_json(body)], status, renderer.error_type, renderer.error_headers(error))


def final_of(head: Head) -> Optional[Final]:
    """How to tell this client that it must not repeat a request, if x-should-retry does not. Measured: codex 0.169.0
    sends a request up to 30 times after a 5xx, 6 times after a 401; Vercel's AI SDK 6 three times."""
    if head.get("x-codex-turn-metadata"):  # its `originator` is the name of the program that runs it
        return Final(400, frozenset({401, 403, 408, 424, 429, *range(500, 600)}), "invalid_prompt")
    if "ai-sdk/" in head.get("User-Agent"):
        return Final(424, frozenset(range(500, 600)))
    return None


def answered(server: Server, router: bottle.Router, head: Head, request_id: str) -> Answer:
    """The endpoint's answer, if the guards let the request in. Raises ClinvkError."""
    server.rate_limit.check(server.config, head)
    for guard in GUARDS:
        guard(server.config, head)
    if is_preflight(head):
        return Answer((), 204, headers=preflight_headers(server.config, head))
    entry, name = matched(router, head)
    check_type(head)
    body = read_body(entry, read_json(head.environ, server.config)) if entry.body else None
    query = check(entry.query, read_query(head.environ, entry.query), "query") if entry.query else None
    return entry.function(server, Call(body, query, request_id, head.environ[STOP], head.environ[RAN], name,
                                       final_of(head)))


def read_body(entry: Route, value: Any) -> Any:
    """The request, as its model has it."""
    model: Any = entry.body
    if entry.other_body and isinstance(value, dict) and value.get(model.PROMPT_AT) is None:
        model = entry.other_body if value.get(entry.other_body.PROMPT_AT) is not None else model
    return check(model, value, entry.where)


def routed_path(head: Head) -> str:
    """Two APIs have a list of models; whose is asked for where the path does not say so, the headers do."""
    if re.match("/v1/models(/|$)", head.path):
        return ("/anthropic" if head.get("anthropic-version") else "/openai") + head.path
    return head.path


def matched(router: bottle.Router, head: Head) -> Tuple[Route, str]:
    """The route of a path, and the part of the path that it leaves open."""
    method, path = head.method, routed_path(head)
    try:
        entry, parts = router.match({"REQUEST_METHOD": method, "PATH_INFO": path})
    except bottle.HTTPError as error:
        shown = head.path if len(head.path) <= LONGEST_LOGGED else head.path[:LONGEST_LOGGED] + "..."
        if error.status_code == 405:
            raise not_taken(head, shown, error.headers["Allow"].split(",")) from None
        raise NotFound(f"there is no {shown}{nearest(path, router.builder)}") from None  # its keys are the patterns
    return entry, parts.get("name", "")


def not_taken(head: Head, shown: str, methods: List[str]) -> ClinvkError:
    """Of a path that takes these methods, and not that of the request."""
    allow = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
    if head.method == "GET" and head.get("Upgrade").lower() == "websocket":
        return NoWebSocket(f"{shown} is no websocket: send {allow}, and have the answer streamed")
    return MethodNotAllowed(f"{shown} takes {allow}, not {head.method}", allow)


def read_json(environ: Json, config: Config) -> Any:
    """The body as JSON. Raises BadRequest unless it is UTF-8, proper JSON, and made of whole characters."""
    if 0 < config.server.max_request_body_bytes < int(environ.get("CONTENT_LENGTH") or 0):
        raise TooLarge(too_large(config.server.max_request_body_bytes))
    raw = environ["wsgi.input"].read()
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=finite, parse_float=finite)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        too_deep = raw.count(b"[") + raw.count(b"{") > NESTED and is_deeper(value, NESTED)
    except RecursionError:
        too_deep = True
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body must be UTF-8, and is not at byte {error.start}") from None
    except UnicodeEncodeError:
        raise BadRequest("the body has half of a surrogate pair (a \\uD800 to \\uDFFF by itself), "
                         "which is no character; send whole characters") from None
    except ValueError as error:
        raise BadRequest(f"the body must be JSON: {error}") from None
    if too_deep:
        raise BadRequest(f"the body is nested too deep: {NESTED} levels of objects and lists are taken")
    return value


NESTED = 200  # what walks a value calls itself at each level, and Python's own limit is 1,000


def is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists stand in one another in more than so many levels."""
    level = [value]
    for _ in range(levels):
        level = [inner for one in level for _, inner in members(one) if isinstance(inner, (dict, list))]
    return bool(level)


def read_query(environ: Json, model: type) -> Json:
    """A query string as the JSON object that `model` is checked with. What is empty is absent; the last one counts."""
    pairs = urllib.parse.parse_qsl(environ.get("QUERY_STRING", ""))
    numbers = {name for name, field in wire_fields(model).items() if field.kind is int}
    return {name: number_of(text) if name in numbers else text for name, text in pairs}


def too_large(limit: int) -> str:
    return f"the body is larger than {limit} bytes; send less, or raise server.max_request_body_bytes"


# ---- The log line of a request, and its metrics

LONGEST_LOGGED = 500  # characters
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")


def request_ended(server: Server, head: Head, status: int, request_id: str, began: float,
                  ran: Sequence[Ran] = ()) -> None:
    """Count it, and write its one log line; never a prompt, an answer or a key."""
    seconds = time.monotonic() - began
    ran = [one for one in ran if one.began]
    method = head.method if head.method in METHODS else "other"
    server.metrics.request_ended(method, pattern_of(routed_path(head)), status, seconds)
    shown = [loggable(text, server.config.keys) for text in (head.method, head.path)]
    own_id = request_id != head.get("X-Request-Id")  # which a key can not be in, but by chance
    shown.append(request_id if own_id else loggable(request_id, server.config.keys))
    runs = [[one for one in ran if one.backend == name] for name in dict.fromkeys(one.backend for one in ran)]
    LOG.info("%s %s %s %d %.0f ms %s%s", client_address(server.config, head) or "-", *shown[:2], status,
             1000 * seconds, shown[2], "".join(map(told_of, runs)))


def loggable(text: str, keys: Iterable[str]) -> str:
    """As one word of a log line, without the keys that a client may have put there."""
    for key in sorted(keys, key=len, reverse=True):  # one may begin with another
        text = text.replace(key, "<key>")
    return text[:LONGEST_LOGGED].encode("unicode_escape").decode().replace(" ", "\\x20")


def told_of(runs: Sequence[Ran]) -> str:
    """The runs of one backend, as fields of a log line. Of several: each exit code and start once, the shortest and the
    longest wait for a first text, and the sum of the tokens."""
    fields: Dict[str, object] = {"backend": runs[0].backend}
    if len(runs) > 1:
        fields.update(runs=len(runs), failed=sum(one.status != "success" for one in runs))
    fields["exit"] = ",".join(map(str, sorted({one.exit_code for one in runs})))
    fields["start"] = ",".join(sorted({one.start for one in runs}))
    waits = [round(1000 * one.first_text_secs) for one in runs if one.first_text_secs is not None]
    fields["first_text"] = "-".join(map(str, sorted({min(waits), max(waits)}))) + "ms" if waits else "-"
    usages = [one.usage for one in runs if one.usage]
    counts = sum(usage.all_input for usage in usages), sum(usage.output_tokens for usage in usages)
    fields["tokens"] = "{}/{}".format(*counts) if usages else "-"
    return "".join(f" {name}={value}" for name, value in fields.items())


@functools.lru_cache(maxsize=None)
def patterns() -> bottle.Router:
    """Every route's pattern as people write it, whatever the method."""
    router = bottle.Router()
    for entry in ROUTES:
        for pattern in entry.patterns:
            router.add(pattern, "ANY", shown_pattern(pattern))
    return router


def pattern_of(path: str) -> str:
    try:
        return str(patterns().match({"REQUEST_METHOD": "ANY", "PATH_INFO": path})[0])
    except bottle.HTTPError:
        return "unmatched"


# ==== Connections =================================================================================
# In: a Server. Out: a listening socket and what comes through it: waitress, and what that does not do by itself.

class PatientTask(waitress.task.WSGITask):
    """Waits for a client that reads a stream slowly, but no longer than its run may take: waitress would wait for ever.
    A client that takes nothing at all is left to `Channel.look`, and what is whole to the main thread."""

    def write(self, data: bytes) -> None:
        channel, stop = self.channel, self.environ[STOP]
        with channel.outbuf_lock:
            while self.content_length is None and channel.connected and channel.is_full:
                if stop.error():
                    channel.will_close = True
                    raise waitress.channel.ClientDisconnected
                channel.server.pull_trigger()
                channel.outbuf_lock.wait(TICK)
        super().write(data)


class RefusedEarly(waitress.task.ErrorTask):
    """What is refused before it reaches the application, malformed, oversized and slow requests, said in the API's own
    shape. The connection ends with it, but lingers: the client may be sending still."""

    def execute(self) -> None:
        request, server = self.request, self.channel.server.clinvk
        began = request.begun_at or time.monotonic()
        request.path = getattr(request, "path", "")  # waitress 3.0.2 names it when the client has gone
        head = Head({"REQUEST_METHOD": getattr(request, "command", "") or "-", "PATH_INFO": request.path or "-",
                     "REMOTE_ADDR": self.channel.addr[0],
                     **{f"HTTP_{name}": value for name, value in request.headers.items()}})
        error = early_error(request.error, self.channel.adj)
        try:
            server.rate_limit.check(server.config, head)
        except RateLimited as limited:
            error = limited
        request_id = request_id_of(head.get("X-Request-Id"))
        answer = error_answer(error, head, request_id)
        self.status = f"{answer.status} {http.HTTPStatus(answer.status).phrase}"
        self.response_headers += [*answer.headers.items(),
                                  *headers_of_every_answer(server.config, head, request_id).items()]
        request.headers["CONNECTION"] = "close"  # whatever the client asked for
        self.set_close_on_finish()
        self.content_length = int(answer.headers["Content-Length"])
        self.channel.lingers = True
        try:
            self.write(b"".join(answer.body))
        finally:
            request_ended(server, head, answer.status, request_id, began)


def early_error(error: Any, adj: Any) -> ClinvkError:
    """An error of ours as it is, one of waitress's as ours."""
    if isinstance(error, ClinvkError):
        return error
    if error.code == 413:
        return TooLarge(too_large(adj.max_request_body_size // READ_ANYWAY))
    if error.code == 431:
        return HeadTooLarge(f"the request line and the headers are {adj.max_request_header_size} bytes or more; send "
                            "less")
    if error.code == 501:  # as a 400: SDKs repeat a 501
        return BadRequest("no Transfer-Encoding but chunked is taken: send the body in chunks, or with a "
                          "Content-Length")
    if error.code == 500:
        return Defect("clinvk could not answer; its log tells more")
    what, _, _ = error.body.partition(' "')  # then comes the line itself, in which there may be a key
    return BadRequest(f"{error.reason}: {what}")


class Parser(waitress.parser.HTTPRequestParser):
    """Refuses also what makes waitress raise, and what it takes though nobody can say where such a body ends."""
    completed: bool
    error: Any  # one of waitress's, or a ClinvkError
    begun_at: Optional[float] = None  # when its first byte came, if it is refused for being slow

    def parse_header(self, head: bytes) -> None:
        try:
            super().parse_header(head)
        except ValueError:
            raise waitress.parser.ParsingError("the URL, or the Content-Length, can not be read") from None
        if self.chunked and "CONTENT_LENGTH" in self.headers:
            raise waitress.parser.ParsingError("send either Content-Length or Transfer-Encoding, not both")
        if "TRANSFER_ENCODING" in self.headers:  # waitress has looked at it in HTTP/1.1 only
            raise waitress.parser.ParsingError("Transfer-Encoding needs HTTP/1.1")

    def received(self, data: bytes) -> int:
        taken: int = super().received(data)
        limit, body = self.adj.max_request_header_size, self.body_rcv
        if self.error and (self.error.code == 431 or not hasattr(self, "path")):
            self.read_first_line(self.header_plus + data)
        if self.chunked and not self.completed and len(body.control_line) + len(body.trailer) > limit:
            self.completed = True
            self.error = BadRequest(f"the first line of a chunk, or the trailer, is over {limit} bytes; send less")
        if self.completed:  # else waitress would say to go on, and wait for a body that has come, or is refused
            self.expect_continue = False
        return taken

    def read_first_line(self, head: bytes) -> None:
        """Who is asked, by a head that is not whole; waitress says GET /, whatever it was."""
        self.command = self.path = ""
        first_line, line_end, _ = head.lstrip().partition(b"\r\n")
        with contextlib.suppress(waitress.parser.ParsingError):
            self.parse_header(first_line + line_end)


class Channel(waitress.channel.HTTPChannel):
    """A connection. All that is not said to be a worker's runs on the main thread."""
    task_class = PatientTask
    error_task_class = RefusedEarly
    parser_class = Parser
    request: Any  # the Parser of what has not come whole yet
    HANG_UP = getattr(select, "POLLRDHUP", 0)  # Linux; a full close is told without being asked for
    LINGER = 2.0  # seconds, and what is left of the read time out, for a client that is still sending to read why not
    lingers = False  # whether it is to, once its answer is sent; a worker says so
    lingering = False
    is_parked = False  # a request waits for room; a worker says so, with outbuf_lock
    sent_bytes = 0
    taken_bytes: Optional[int] = None  # of these, at the last look; None: there were no more for the client

    def __init__(self, server: Any, sock: Any, addr: Any, adj: Any, map: Any = None) -> None:
        super().__init__(server, sock, addr, adj, map=map)
        self.moved_at = time.monotonic()  # when the client last took a byte, at first when it came
        self.begun_at = self.moved_at  # when the first byte came of a request that is half sent
        self.came_in = server.turns

    def check_client_disconnected(self) -> bool:
        """A worker asks. The socket itself is looked at: waitress does not while further requests wait in it."""
        if self.connected and hasattr(select, "poll"):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # it is being closed just now
                return is_ready(self.socket.fileno(), self.HANG_UP)
        return not self.connected

    @property
    def half_sent(self) -> bool:
        """Whether a request has begun to come. Blank lines are none (RFC 9112, 2.2)."""
        return self.request is not None and (self.request.headers_finished or not self.request.header_plus.isspace())

    @property
    def is_answered(self) -> bool:
        """Whether a request of it is being answered, up to the last byte that the client has to take."""
        return bool(self.requests or self.total_outbufs_len)

    @property
    def is_full(self) -> bool:
        """Whether there is enough for the client to take."""
        return bool(self.total_outbufs_len > self.adj.outbuf_high_watermark)

    def _flush_outbufs_below_high_watermark(self) -> None:
        """waitress would have a worker wait here for the client."""

    def service(self) -> None:
        """On workers. A request behind an answer that is still to be taken waits without one."""
        with self.outbuf_lock:
            self.is_parked = self.is_full
        if not self.is_parked:
            super().service()

    @property
    def waits_since(self) -> float:
        """Since when the client has been waited for. The time of a request that is half sent does not run while the
        one before is being answered."""
        return max(self.begun_at, self.moved_at) if self.half_sent else self.moved_at

    def received(self, data: bytes) -> bool:
        before, came_at = (self.request if self.half_sent else None), time.monotonic()
        taken = bool(super().received(data))
        if taken and (before is None or (self.half_sent and self.request is not before)):  # not taken: it lingers
            self.begun_at = came_at
        return taken

    def send(self, data: bytes, do_close: bool = True) -> int:
        """On workers, too."""
        sent: int = super().send(data, do_close)
        if sent:
            self.moved_at = time.monotonic()
            self.sent_bytes += sent
        return sent

    def patience(self, limits: ServerConfig) -> float:
        """Seconds that it may wait for the client (SPEC 6)."""
        if self.lingering:
            return max(self.LINGER, self.begun_at + limits.read_timeout_secs - self.moved_at)
        if self.total_outbufs_len:
            return limits.write_timeout_secs
        if self.requests:
            return math.inf
        return limits.read_timeout_secs if self.half_sent else limits.idle_timeout_secs

    def look(self, now: float) -> None:
        """End what has waited for too long. waitress's `will_close` would wait for a client that takes nothing."""
        limits = self.server.clinvk.config.server
        self.look_at_the_kernel(now)
        with self.outbuf_lock:
            goes_on = self.is_parked and not self.is_full
            self.is_parked = self.is_parked and not goes_on
        if goes_on:
            self.server.add_task(self)
        if self.will_close:
            self.handle_close()
        elif now - self.waits_since <= self.patience(limits):
            return
        elif self.half_sent and not self.is_answered and not self.lingering:
            self.refuse(TooSlow(f"the request did not come whole within {limits.read_timeout_secs:g} s; send it "
                                "faster, or raise server.read_timeout_secs"))
        else:
            self.handle_close()

    def look_at_the_kernel(self, now: float) -> None:
        """It takes some MB, and no more until a third of that has gone: a slow client takes bytes all the while. And as
        long as there was nothing to take, the client's time did not run."""
        taken = self.sent_bytes - held_by_kernel(self.socket) if self.total_outbufs_len else None
        if taken is not None and (self.taken_bytes is None or taken > self.taken_bytes):
            self.moved_at = now
        self.taken_bytes = taken

    def refuse(self, error: ClinvkError) -> None:
        """Answer the request that is half sent."""
        with self.requests_lock:  # as in waitress's `received`
            request, self.request = self.request, None
            if not request.headers_finished:
                request.read_first_line(request.header_plus)
            request.error, request.completed, request.begun_at = error, True, self.begun_at
            self.requests.append(request)
        self.server.add_task(self)

    def handle_write(self) -> None:
        """As waitress, but a connection that lingers is closed on our side only, and what still comes is dropped: with
        unread bytes it would be reset, and most clients would never see the answer."""
        if not (self.lingers and self.close_when_flushed) or self.will_close:
            super().handle_write()
            return
        self._flush_exception(self._flush_some)
        if self.socket is not None and not self.total_outbufs_len and not self.will_close:
            self.lingering = True
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:  # it is gone
                self.handle_close()

    def readable(self) -> bool:
        return self.socket is not None and bool(self.lingering or super().readable())

    def writable(self) -> bool:
        return self.socket is not None and not self.lingering and bool(super().writable())


def held_by_kernel(connection: socket.socket) -> int:
    """How many bytes that were sent the other side has not acknowledged; 0 where nobody tells."""
    try:
        if sys.platform == "linux":
            return int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        if sys.platform == "darwin":
            return int(connection.getsockopt(socket.SOL_SOCKET, 0x1024))  # SO_NWRITE
    except (OSError, ValueError, AttributeError):  # it is being closed just now, by a worker perhaps
        return 0
    return 0


class Listener(waitress.server.TcpWSGIServer):
    """A listening socket, and the connections that came through it. All of it runs on the main thread."""
    channel_class = Channel
    LOOK_SECS = 0.25  # between two looks at the connections; waitress waits for at most 1 s
    PAUSE_SECS = 0.5  # before the next try, if nobody can be let in
    ACCEPTS = 100  # at a time
    looks_at = accepts_at = told_at = 0.0
    turns = 0  # of the loop
    kept_out = False  # whether somebody wants to come in and could not
    clinvk: Server

    def readable(self) -> bool:
        """waitress asks this before each wait: what is closed here is not waited for any more, so that its number can
        not be taken for that of a connection accepted meanwhile."""
        if self.clinvk.closing.is_set():  # a signal's SystemExit is lost if it comes in the middle of a __del__
            raise SystemExit(0)
        now = time.monotonic()
        self.turns += 1
        if now >= self.looks_at:
            self.looks_at = now + self.LOOK_SECS
            for channel in list(self.active_channels.values()):
                channel.look(now)
        if self.kept_out:
            self.kept_out = False
            self.make_room(now)
        return self.accepting and now >= self.accepts_at

    def make_room(self, now: float) -> None:
        """Close the connection that has waited for longest without a request being answered, whichever way it came. Of
        those that came in the last turn, nothing has been read yet."""
        channels = [each for each in list(self._map.values()) if isinstance(each, Channel) and not each.is_answered]
        read = [each for each in channels if each.came_in < each.server.turns - 1]
        if read:
            min(read, key=lambda channel: channel.waits_since).handle_close()
        self.kept_out = bool(channels and not read)
        if channels:
            return
        self.accepts_at = now + self.PAUSE_SECS
        if now - self.told_at > 60:
            self.told_at = now
            LOG.error("nobody can be let in: all connections are being answered, or the files that may be open are "
                      "used up; raise that limit (ulimit -n)")

    def handle_accept(self) -> None:
        """All that wait, up to some: between two calls the loop walks all connections."""
        for _ in range(self.ACCEPTS):
            if len(self._map) >= self.adj.connection_limit:
                self.kept_out = True
            if self.kept_out:
                return
            super().handle_accept()
            if not self.has_somebody_waiting():
                return

    def has_somebody_waiting(self) -> bool:
        """Without a free descriptor, accept() itself does not even look."""
        return hasattr(select, "poll") and is_ready(self.socket.fileno(), select.POLLIN)

    def accept(self) -> Any:
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            self.kept_out = True
            return None


# How many times the limit waitress takes in (on disk) before it refuses: a client that is cut off while it sends reads
# no answer, and its SDK sends all of it again.
READ_ANYWAY = 4
CONNECTIONS = 1000 if hasattr(select, "poll") else 400  # at once; on Windows, select takes 512


def listen(server: Server) -> Any:
    """A waitress server, bound and not yet running. Raises OSError if the address can not be had."""
    settings = server.config.server
    limit = READ_ANYWAY * settings.max_request_body_bytes or sys.maxsize
    # A thread is held for a request's whole life; waiting and running ones must leave room for the rest.
    threads = settings.max_concurrent_runs + settings.max_waiting_runs + 16
    adj = waitress.adjustments.Adjustments(
        host=settings.host, port=settings.port, threads=threads, ident="clinvk", channel_request_lookahead=1,
        connection_limit=connection_limit(settings), asyncore_use_poll=hasattr(select, "poll"),
        max_request_body_size=limit, recv_bytes=2**16,  # at each turn of a loop that walks all connections
        outbuf_high_watermark=2**20,  # waitress 3.0.2 keeps as much of what it has sent, too, per connection
        clear_untrusted_proxy_headers=False)  # `client_address` knows whom to trust
    sockets: Dict[int, Any] = {}
    app, workers = make_app(server), waitress.task.ThreadedTaskDispatcher()
    workers.set_thread_count(threads)
    listeners = [Listener(app, sockets, dispatcher=workers, adj=adj, sockinfo=address) for address in adj.listen]
    for each in listeners:
        each.clinvk = server
    if len(listeners) == 1:
        return listeners[0]
    bound = [(each.effective_host, each.effective_port) for each in listeners]
    return waitress.server.MultiSocketServer(sockets, adj, bound, workers)


def descriptors_of_runs(settings: ServerConfig) -> int:
    """How many files may be open for runs and the rest; a run takes 11 while its CLI is being started."""
    return 64 + 16 * settings.max_concurrent_runs


def connection_limit(settings: ServerConfig) -> int:
    """As many as the limit of open files has room for."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    if resource is None or soft == resource.RLIM_INFINITY:
        return CONNECTIONS
    return min(CONNECTIONS, soft - min(descriptors_of_runs(settings), soft // 2))


def raise_descriptor_limit(settings: ServerConfig) -> None:
    """Ask for what connections (each may have a file for its body) and runs need: macOS begins with 256."""
    if resource is None:
        return
    wanted = 2 * CONNECTIONS + descriptors_of_runs(settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        except (OSError, ValueError) as error:
            LOG.warning("no more than %d files may be open: %s", soft, error)


# ==== Command line ================================================================================
# In: argv. Out: an exit code.

HELP = """\
clinvk puts the AI CLIs of this machine (claude, codex, gemini) behind a local HTTP server
in three API styles: its own, OpenAI's and Anthropic's.

examples:
  clinvk.pyz serve                        start the server on http://127.0.0.1:8080
  clinvk.pyz serve --port 9000            on another port
  clinvk.pyz serve --config my.yaml       with settings from a file (see config.example.yaml)
  clinvk.pyz version                      what is inside

  curl http://127.0.0.1:8080/api/v1/prompt -H 'Content-Type: application/json' \\
       -d '{"backend": "echo", "prompt": "hello"}'
"""


def main(argv: List[str]) -> int:
    """The exit code of a command line (without the program's name)."""
    parser = argparse.ArgumentParser(prog="clinvk.pyz", description=HELP, usage="clinvk.pyz [--help] COMMAND ...",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="store_true", help="what `version` prints")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serving = commands.add_parser("serve", help="start the server", usage="clinvk.pyz serve [options]")
    serving.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serving.add_argument("-p", "--port", type=int, help="port to listen on (default 8080; 0: any free one)")
    serving.add_argument("--config", metavar="FILE", help="settings (default ~/.clinvk/config.yaml)")
    commands.add_parser("version", help="print the versions of clinvk, Python and what is inside")
    options = parser.parse_args(argv)
    try:
        if options.command == "serve":
            return serve(options)
        tell(version() if options.command == "version" or options.version else parser.format_help().rstrip("\n"))
        return 0
    except ConfigError as error:
        return refused(str(error))


def tell(text: str) -> None:
    """Print it. Raises ConfigError if that can not be done."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more when it ends
        raise ConfigError(f"stdout can not be written: {error.strerror}. Send it elsewhere, such as to "
                          f"{os.devnull}") from None


INSIDE = ("bottle", "waitress", "PyYAML", "drf-spectacular-sidecar")  # the last: Swagger UI, in the .pyz only


def is_inside(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def version() -> str:
    parts = ", ".join(f"{name} {metadata.version(name)}" for name in INSIDE if is_inside(name))
    return f"clinvk {__version__} (Python {platform.python_version()}; {parts})"


def serve(options: argparse.Namespace) -> int:
    """Listen until SIGINT or SIGTERM. 0 after a clean shutdown, 1 with one line on stderr if it can not start. Raises
    ConfigError: why."""
    flags = {f"server.{name}": value for name, value in (("host", options.host), ("port", options.port))
             if value is not None}
    set_up_logging()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))  # until there is a server to stop
    try:
        config = load_config(options.config, os.environ, flags)
        server = Server(config)
        own_directory(config, "empty")
        sweep(config)
    except StoreUnavailable as error:
        return refused(str(error))
    except OSError as error:
        place = error.filename or "the home of clinvk"
        return refused(f"{place}: {error.strerror}. Choose another directory with CLINVK_HOME")
    raise_descriptor_limit(config.server)
    try:
        listening = listen(server)
    except (OSError, ValueError, RuntimeError) as error:  # the last: no more threads
        return refused(f"can not listen on {config.server.host}:{config.server.port}: "
                       f"{getattr(error, 'strerror', None) or error}. Choose another with --host or --port")
    server.bound(addresses_of(listening)[0][1])
    return run_server(server, listening)


def run_server(server: Server, listening: Any) -> int:
    """Announce it and answer requests until a signal comes; then end the runs, and wait for their CLIs to go."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, functools.partial(stop_serving, server))
    try:
        announce(server.config, listening)
        if server.config.server.spares_at_start:
            server.want_spares()
        for chore in (server.look_up_versions, server.expire_sessions, server.renew_keys):
            threading.Thread(target=chore, name=chore.__name__, daemon=True).start()
        listening.run()  # until SystemExit; it returns once its threads have ended, or after 5 s
    except SystemExit:  # it came before that
        pass
    finally:
        close_sockets(listening)
        server.close()
    return 0


def close_sockets(listening: Any) -> None:
    """Of several listeners waitress waits for the workers once more when they are closed, for up to 5 s."""
    if isinstance(listening, waitress.server.MultiSocketServer):
        waitress.wasyncore.close_all(listening.map)
    else:
        listening.close()


def set_up_logging() -> None:
    """Everything that is logged goes to stderr, with the time in front."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("waitress").setLevel(logging.ERROR)  # that its queue has some depth is no news


def refused(message: str) -> int:
    print("clinvk: " + " ".join(message.split()), file=sys.stderr)
    return 1


def addresses_of(listening: Any) -> List[Tuple[str, int]]:
    """Host and port; a name such as localhost may have several."""
    listened = getattr(listening, "effective_listen", None) or [(listening.effective_host, listening.effective_port)]
    return [(host, int(port)) for host, port in listened]  # waitress has them as text


def announce(config: Config, listening: Any) -> None:
    host, port = addresses_of(listening)[0]
    shown = f"[{host}]" if ":" in host else host
    endpoints = [f"  {kind + ':':<15} {', '.join(paths)}" for kind, paths in WAYS_IN.items()]
    tell("\n".join([f"clinvk API server starting on http://{shown}:{port}\n\nAvailable endpoints:", *endpoints,
                    "\nPress Ctrl+C to stop"]))
    for warning in warnings_of(config, [host for host, _ in addresses_of(listening)]):
        print(f"clinvk: warning: {warning}", file=sys.stderr, flush=True)


def warnings_of(config: Config, hosts: Iterable[str]) -> Iterator[str]:
    """What is allowed, but may not be meant; `hosts` are the addresses that are listened on."""
    exposed = [host for host in hosts if not is_loopback(host)]
    if exposed and not config.keys:
        yield (f"{', '.join(exposed)} can be reached from other machines, and there are no API keys: whoever reaches "
               "it could run your CLIs. Other machines get 403 until server.allowed_hosts or CLINVK_API_KEYS is set.")
    if "*" in config.server.cors_allowed_origins and not config.keys:
        yield ('server.cors_allowed_origins has "*", and there are no API keys: any web page that is open in a browser '
               "here could run your CLIs. Name the origins that may, or set CLINVK_API_KEYS.")
    mode = mode_for_others(config.file) if config.file else 0
    secrets = secrets_in(config)
    if mode & 0o044 and secrets and os.name != "nt":
        yield (f"{config.file} can be read by other users (mode {mode:04o}), and holds secrets ({', '.join(secrets)}). "
               f"Run: chmod 600 {shlex.quote(str(config.file))}")


def mode_for_others(file: Path) -> int:
    """The permissions of a file; 0 if none but its directory's owner can come to it, or if it is gone."""
    try:
        return file.stat().st_mode & 0o777 if file.resolve().parent.stat().st_mode & 0o011 else 0
    except OSError:
        return 0


def stop_serving(server: Server, number: int, frame: Any) -> None:
    """Signal handler. The runs learn of it at once; a second signal changes nothing."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: None)  # first: it may come while this one holds the lock of `closing`
    server.closing.set()
    raise SystemExit(0)
