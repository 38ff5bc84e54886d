"""What an operator sees: /metrics, read with Prometheus' own parser, and the log lines."""

import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple, Union

import clinvk
import pytest
from clinvk import Canceled, Done, Failure, Message, Thinking, TimedOut, TokenUsage, ToolUse, Usage
from conftest import Client, Served, eventually
from prometheus_client.parser import text_string_to_metric_families

NATIVE, OPENAI, ANTHROPIC = "/api/v1/prompt", "/openai/v1/chat/completions", "/anthropic/v1/messages"
# "text" prints the prompt; what it begins with says what else it does.
TEXT = """
HERE = os.path.dirname(os.path.abspath(__file__))
prompt = sys.stdin.read()
if prompt.startswith("fail"):
    sys.exit(3)
print(prompt, end="", flush=True)
open(HERE + "/printed", "w").close()
while prompt.startswith("hold") and not os.path.exists(HERE + "/go"):
    time.sleep(0.01)
"""
# claude, with counts and a price.
CLAUDE = """
def show(**line): print(json.dumps(line), flush=True)
for line in sys.stdin:
    if json.loads(line)["type"] == "user":
        text = {"type": "text", "text": "secret answer"}
        show(type="assistant", message={"id": "m", "model": "m", "content": [text]})
        show(type="result", subtype="success", is_error=False, result="secret answer", stop_reason="end_turn",
             num_turns=1, total_cost_usd=0.25, usage={
                 "input_tokens": 3, "output_tokens": 20, "cache_read_input_tokens": 100,
                 "cache_creation_input_tokens": 50, "output_tokens_details": {"thinking_tokens": 7}})
"""
AnyServer = Union[Client, Served]
MakeClient = Callable[..., Client]


def prompt(text: str = "hello", backend: str = "echo", **fields: Any) -> Dict[str, Any]:
    return {"backend": backend, "prompt": text, **fields}


def chat(text: str = "hello", model: str = "echo", **fields: Any) -> Dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


def samples(server: AnyServer) -> Dict[str, float]:
    """Every sample of /metrics: `name{label="value",...}`, labels in order of their names."""
    reply = server.call("GET", "/metrics")
    assert reply.status == 200, reply.body
    found: Dict[str, float] = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            labels = ",".join(f'{name}="{text}"' for name, text in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert name not in found
            found[name] = sample.value
    return found


def counts(server: AnyServer) -> Dict[str, float]:
    """Samples that say how often, without those of the process and of /metrics itself."""
    return {name: value for name, value in samples(server).items() if 'path="/metrics"' not in name and
            not name.startswith("process_") and not re.match(r"\w+(_bucket|_seconds_sum)", name)}


def changes(before: Dict[str, float], after: Dict[str, float]) -> Dict[str, float]:
    assert set(before) <= set(after)
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


def request(path: str, status: int, method: str = "POST", times: int = 1) -> Dict[str, float]:
    """What changes by requests alone."""
    return {f'clinvk_requests_total{{method="{method}",path="{path}",status="{status}"}}': times,
            f'clinvk_request_duration_seconds_count{{method="{method}",path="{path}"}}': times}


def run(backend: str, status: str = "success", times: int = 1, *, output: bool = True) -> Dict[str, float]:
    """What changes by runs alone."""
    moved = {f'clinvk_backend_executions_total{{backend="{backend}",status="{status}"}}': times,
             f'clinvk_backend_execution_duration_seconds_count{{backend="{backend}"}}': times}
    first = {f'clinvk_first_output_seconds_count{{backend="{backend}",start="cold"}}': times}
    return {**moved, **first} if output else moved


CREATED = {"clinvk_sessions_created_total": 1}
SPENT = {**{f'clinvk_tokens_total{{backend="claude",kind="{kind}"}}': count for kind, count in
            (("input", 153), ("output", 20), ("cached", 100), ("reasoning", 7))},
         'clinvk_cost_usd_total{backend="claude"}': 0.25}


@pytest.fixture
def scripted(fake_cli: Callable[..., str]) -> Dict[str, Any]:
    """A config with /metrics, and two scripted CLIs: "text" and claude."""
    return {"backends": {"text": {"command": fake_cli(TEXT, "text")}, "claude": {"command": fake_cli(CLAUDE, "claude")},
                         "gemini": {"enabled": False}, "codex": {"command": "not-on-path"}},
            "server": {"metrics_enabled": True}}


@pytest.fixture
def client(make_client: MakeClient, scripted: Dict[str, Any]) -> Client:
    return make_client(scripted)


# ---- What moves, and nothing else does

@pytest.mark.parametrize("method, path, body, moved", [
    ("POST", NATIVE, prompt(), {**request(NATIVE, 200), **run("echo"), **CREATED}),
    ("POST", NATIVE, prompt(ephemeral=True), {**request(NATIVE, 200), **run("echo")}),
    ("POST", NATIVE, prompt(ephemeral=True, output_format="stream-json"), {**request(NATIVE, 200), **run("echo")}),
    ("POST", NATIVE, prompt(dry_run=True), request(NATIVE, 200)),
    ("POST", NATIVE, prompt("fail", "text"), {**request(NATIVE, 200), **run("text", "error", output=False), **CREATED}),
    ("POST", NATIVE, prompt("hold", "text", ephemeral=True, timeout_secs=5),
     {**request(NATIVE, 200), **run("text", "timeout")}),
    ("POST", NATIVE, prompt(backend="claude"), {**request(NATIVE, 200), **run("claude"), **SPENT, **CREATED}),
    ("POST", NATIVE, prompt(backend="none"), request(NATIVE, 422)),
    ("POST", NATIVE, prompt(backend="codex"), request(NATIVE, 503)),
    ("POST", NATIVE, prompt(session_id="abc"), request(NATIVE, 404)),
    ("POST", NATIVE, b"{", request(NATIVE, 400)),
    ("POST", OPENAI, chat(), {**request(OPENAI, 200), **run("echo")}),
    ("POST", "/v1/chat/completions", chat(), {**request("/v1/chat/completions", 200), **run("echo")}),
    ("POST", OPENAI, chat(stream=True, model="claude"), {**request(OPENAI, 200), **run("claude"), **SPENT}),
    ("POST", OPENAI, chat("a b c", stop=["b"]), {**request(OPENAI, 200), **run("echo")}),
    ("POST", OPENAI, chat("a b c", stop=["b"], stream=True), {**request(OPENAI, 200), **run("echo")}),
    ("POST", OPENAI, chat("fail", "text"), {**request(OPENAI, 502), **run("text", "error", output=False)}),
    ("POST", OPENAI, chat("fail", "text", stream=True), {**request(OPENAI, 502), **run("text", "error", output=False)}),
    ("POST", OPENAI, chat(model="nobody"), request(OPENAI, 404)),
    ("POST", ANTHROPIC, chat(max_tokens=9, stream=True), {**request(ANTHROPIC, 200), **run("echo")}),
    ("POST", ANTHROPIC, chat(), request(ANTHROPIC, 400)),
    ("POST", ANTHROPIC + "/count_tokens", chat(), request(ANTHROPIC + "/count_tokens", 200)),
    ("POST", "/api/v1/parallel", {"tasks": [prompt(), prompt(), prompt("fail", "text")]},
     {**request("/api/v1/parallel", 200), **run("echo", times=2), **run("text", "error", output=False)}),
    ("POST", "/api/v1/parallel", {"tasks": [prompt("fail", "text"), prompt()], "fail_fast": True, "max_parallel": 1},
     {**request("/api/v1/parallel", 200), **run("text", "error", output=False)}),
    ("POST", "/api/v1/parallel", {"tasks": [prompt(), prompt(backend="none")]}, request("/api/v1/parallel", 422)),
    ("POST", "/api/v1/chain", {"steps": [prompt(), prompt("{{previous}}", "text")], "stream": True},
     {**request("/api/v1/chain", 200), **run("echo"), **run("text")}),
    ("POST", "/api/v1/compare", {"backends": ["claude", "echo"], "prompt": "x"},
     {**request("/api/v1/compare", 200), **run("echo"), **run("claude"), **SPENT}),
    ("GET", "/health", None, request("/health", 200, "GET")),
    ("HEAD", "/health", None, request("/health", 200, "HEAD")),
    ("GET", "//health/?x=1", None, request("/health", 200, "GET")),
    ("GET", "/api/v1/sessions/abc", None, request("/api/v1/sessions/{id}", 404, "GET")),
    ("DELETE", "/api/v1/sessions/abc", None, request("/api/v1/sessions/{id}", 404, "DELETE")),
    ("GET", "/openai/v1/models/echo/x/y", None, request("/openai/v1/models/{id}", 200, "GET")),
    ("GET", "/v1/models/echo", None, request("/openai/v1/models/{id}", 200, "GET")),
    ("GET", NATIVE, None, request(NATIVE, 405, "GET")), ("BREW", "/health", None, request("/health", 405, "other")),
    ("GET", "/nowhere", None, request("unmatched", 404, "GET")), ("GET", "/", None, request("/", 200, "GET"))])
def test_a_request_moves_its_metrics_and_no_other(
        client: Client, method: str, path: str, body: Any, moved: Dict[str, float]) -> None:
    before = counts(client)
    client.call(method, path, body)
    eventually(lambda: samples(client)["clinvk_runs_active"] == 0)  # until its CLI has gone
    assert changes(before, counts(client)) == moved


@pytest.mark.parametrize("headers, status", [
    ({"Host": "evil.example"}, 403), ({"Origin": "https://evil.example"}, 403), ({"X_Api_Key": "wrong"}, 401),
    ({"X_Api_Key": "k", "Content_Type": "text/plain"}, 415)])
def test_what_the_guards_refuse_is_counted_under_its_route(
        make_client: MakeClient, scripted: Dict[str, Any], headers: Dict[str, str], status: int) -> None:
    client = make_client(scripted, CLINVK_API_KEYS="k")
    before = counts(client)
    client.call("POST", OPENAI, chat(), **headers)
    assert changes(before, counts(client)) == request(OPENAI, status)


def test_what_comes_too_often_and_a_preflight_are_counted(make_client: MakeClient, scripted: Dict[str, Any]) -> None:
    scripted["server"].update(rate_limit_enabled=True, rate_limit_burst=2, rate_limit_rps=0.001,
                              trusted_proxies=["127.0.0.1"])
    client = make_client(scripted)
    before = counts(client)
    for _ in range(3):
        client.call("OPTIONS", NATIVE, Origin="app://x", Access_Control_Request_Method="POST", X_Real_IP="10.0.0.1")
    client.call("POST", NATIVE, prompt(), X_Real_IP="10.0.0.1")
    assert changes(before, counts(client)) == {
        **request(NATIVE, 204, "OPTIONS", 2), **request(NATIVE, 429, "OPTIONS"), **request(NATIVE, 429),
        f'clinvk_request_duration_seconds_count{{method="OPTIONS",path="{NATIVE}"}}': 3}


def test_a_session_is_created_once_and_not_by_a_run_that_could_not_start(client: Client, tmp_path: Path) -> None:
    before = counts(client)
    name = client.call("POST", NATIVE, prompt("one", "claude")).json["session_id"]
    for _ in range(2):
        assert client.call("POST", NATIVE, prompt("two", "claude", session_id=name)).status == 200
    (tmp_path / "text").write_text("#!/nowhere/python\n")
    assert client.call("POST", NATIVE, prompt("one", "text")).status == 503
    assert changes(before, counts(client))["clinvk_sessions_created_total"] == 1


def test_counters_begin_at_0_for_the_backends_that_are_enabled(client: Client) -> None:
    found = samples(client)
    runs = [name for name in found if name.startswith("clinvk_backend_executions_total")]
    assert sorted(runs) == sorted(f'clinvk_backend_executions_total{{backend="{name}",status="{status}"}}'
                                  for name in ("claude", "codex", "text", "echo")
                                  for status in ("success", "error", "timeout", "canceled"))
    for name, value in found.items():
        if not name.startswith("process_"):
            assert value == 0, name


def test_a_histogram_has_each_observation_in_its_bucket(client: Client) -> None:
    for seconds in (0.001, 0.005, 0.0051, 299, 1e6):
        client.server.metrics.request_ended("GET", "/x", 200, seconds)
    found = samples(client)
    name = 'clinvk_request_duration_seconds_%s{%smethod="GET",path="/x"}'
    buckets = {le: found[name % ("bucket", f'le="{le}",')] for le in ("0.005", "0.01", "120", "300", "600", "+Inf")}
    assert buckets == {"0.005": 2, "0.01": 3, "120": 3, "300": 4, "600": 4, "+Inf": 5}
    assert (found[name % ("count", "")], found[name % ("sum", "")]) == (5, pytest.approx(1000299.0111))


def test_waiting_for_a_slot_is_part_of_the_first_output_but_not_of_the_run(
        make_client: MakeClient, scripted: Dict[str, Any]) -> None:
    scripted["server"].update(max_concurrent_runs=1)
    client = make_client(scripted)
    assert list(client.server.slots.take(clinvk.Stop())) == []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.call, "POST", NATIVE, prompt(ephemeral=True))
        eventually(lambda: samples(client)["clinvk_runs_waiting"] == 1)
        assert samples(client)["clinvk_runs_active"] == 1
        time.sleep(1)
        released = time.monotonic()
        client.server.slots.release()
        assert answer.result().status == 200
    took = time.monotonic() - released
    found = samples(client)
    assert found['clinvk_first_output_seconds_sum{backend="echo",start="cold"}'] >= 1
    assert found['clinvk_backend_execution_duration_seconds_sum{backend="echo"}'] <= took
    assert (found["clinvk_runs_waiting"], found["clinvk_runs_active"]) == (0, 0)


# ---- What is made of the events of a run

A, B = Message("a"), Message("b")


@pytest.mark.parametrize("events, status, exit_code, has_output", [
    ([A, B, Done(0)], "success", 0, True), ([Message(""), Thinking(""), Done(0)], "success", 0, False),
    ([Thinking("a"), Done(0)], "success", 0, True), ([ToolUse("1", "Read", {}), Done(0)], "success", 0, True),
    ([clinvk.Progress("waiting", "long"), clinvk.Init("m"), Done(0)], "success", 0, False),
    ([A, Failure(clinvk.BackendFailed("x")), Done(3)], "error", 3, True),
    ([A, Failure(clinvk.RateLimited("x")), Done(1)], "error", 1, True),
    ([A, Failure(TimedOut("x")), Done(-1)], "timeout", -1, True),
    ([Failure(Canceled("x")), Done(-1)], "canceled", -1, False)])
@pytest.mark.parametrize("reads", ["all", "up to the failure"])
def test_a_run_is_told_of_by_its_events(events: Any, status: str, exit_code: int, has_output: bool, reads: str) -> None:
    told: List[clinvk.Ran] = []
    observed = clinvk.observed((event for event in events), clinvk.Ran("x", began=1.0), clinvk.Stop(), told.append)
    if reads == "all":
        assert list(observed) == events
    else:
        next(event for event in observed if isinstance(event, (Failure, Done)))
        observed.close()
    [ran] = told
    assert (ran.backend, ran.start, ran.status, ran.exit_code) == ("x", "cold", status, exit_code)
    assert (ran.first_text_secs is not None) == has_output and ran.seconds > 0


def test_the_last_counts_and_the_cost_of_a_run_are_told() -> None:
    told: List[clinvk.Ran] = []
    events = iter([TokenUsage(Usage(1)), TokenUsage(Usage(2, 3)), Done(0, cost_usd=0.5)])
    list(clinvk.observed((event for event in events), clinvk.Ran("x", began=1.0), clinvk.Stop(), told.append))
    assert (told[0].usage, told[0].cost_usd) == (Usage(2, 3), 0.5)


def breaking(error: Exception) -> Iterator[clinvk.Event]:
    yield A
    raise error


@pytest.mark.parametrize("ran, events, statuses", [
    (clinvk.Ran("x", began=1.0), breaking(KeyError("a defect")), ["error"]),
    (clinvk.Ran("x", began=1.0), breaking(clinvk.BackendUnavailable("it can not be started")), []),
    (clinvk.Ran("x"), breaking(TimedOut("while it waited")), []), (clinvk.Ran("x"), breaking(KeyError("early")), [])])
def test_a_run_that_breaks_is_told_of_if_it_has_begun(ran: Any, events: Any, statuses: List[str]) -> None:
    told: List[clinvk.Ran] = []
    with pytest.raises((KeyError, clinvk.ClinvkError)):
        list(clinvk.observed(events, ran, clinvk.Stop(), told.append))
    assert [one.status for one in told] == statuses


@pytest.mark.parametrize("began, statuses", [(1.0, ["canceled"]), (0.0, [])])
def test_a_run_that_is_closed_is_canceled_if_it_has_begun(began: float, statuses: List[str]) -> None:
    told: List[clinvk.Ran] = []
    events = clinvk.observed((event for event in (A, B, Done(0))), clinvk.Ran("x", began=began), clinvk.Stop(),
                             told.append)
    next(events)
    events.close()
    assert [(one.status, one.exit_code) for one in told] == [(status, -1) for status in statuses]


# ---- Label values are bounded, and sums exact

def test_no_path_and_no_method_makes_a_label_of_its_own(client: Client) -> None:
    def ask(number: int) -> None:
        name = uuid.uuid4().hex
        for path in (f"/{name}", f"/api/v1/sessions/{name}", f"/openai/v1/models/{name}/{number}", f"/health/{name}"):
            client.call("GET", path)
        client.call(f"M{number}", "/health")
        client.call("GET", "/health", Host=f"{name}.example", Origin=f"http://{name}")
        client.call("POST", OPENAI, chat(model=name), X_Request_Id=name)
        client.call("POST", NATIVE, prompt(backend=name))
    ask(0)
    before = samples(client)
    for number in range(100):
        ask(number)
    after = samples(client)
    assert {name for name in set(after) - set(before) if 'path="/metrics"' not in name} == set()
    assert after['clinvk_requests_total{method="GET",path="unmatched",status="404"}'] == 202


def test_sums_are_exact_after_requests_from_many_threads(make_client: MakeClient, scripted: Dict[str, Any]) -> None:
    client = make_client(scripted)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as pool:
            bodies = [(OPENAI, chat()) if number % 2 else ("/api/v1/parallel", {"tasks": [prompt(), prompt()]})
                      for number in range(200)]
            assert {reply.status for reply in pool.map(lambda body: client.call("POST", *body), bodies)} == {200}
    finally:
        sys.setswitchinterval(interval)
    moved = {name: value for name, value in counts(client).items() if value}
    assert moved == {**request(OPENAI, 200, times=100), **request("/api/v1/parallel", 200, times=100),
                     **run("echo", times=300)}


def test_sums_are_exact_when_many_runs_end_at_once() -> None:
    """Up to Python 3.10 a thread can be interrupted in the middle of an addition."""
    metrics = clinvk.Metrics(["x"])
    ran = clinvk.Ran("x", began=1.0, ended=2.0, status="success", usage=Usage(1, 2), first_text_secs=0.5, cost_usd=0.5)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: [metrics.run_ended(ran) for _ in range(1000)], range(8)))
    finally:
        sys.setswitchinterval(interval)
    told = metrics.text()
    for line in ('executions_total{backend="x",status="success"} 8000', 'tokens_total{backend="x",kind="input"} 8000',
                 'tokens_total{backend="x",kind="output"} 16000', 'cost_usd_total{backend="x"} 4000',
                 'execution_duration_seconds_bucket{backend="x",le="1"} 8000',
                 'first_output_seconds_sum{backend="x",start="cold"} 4000'):
        assert line + "\n" in told


# ---- The route

def test_without_the_setting_there_is_no_such_path(make_client: MakeClient) -> None:
    client = make_client()
    for method in ("GET", "HEAD", "DELETE"):
        there, nowhere = client.call(method, "/metrics"), client.call(method, "/mxyzptl")
        assert there.body.replace(b"/metrics", b"/mxyzptl") == nowhere.body
        assert (there.status, there.headers["content-type"]) == (404, nowhere.headers["content-type"])
    assert "did you mean" not in client.call("GET", "/metric").json["detail"]


def test_with_the_setting_it_answers_get_and_head_as_text_without_a_key(
        make_client: MakeClient, scripted: Dict[str, Any]) -> None:
    client = make_client(scripted, CLINVK_API_KEYS="k")
    whole, head = client.call("GET", "/metrics"), client.call("HEAD", "/metrics")
    assert (whole.status, head.status, head.body) == (200, 200, b"")
    for reply in (whole, head):
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert client.call("POST", "/metrics", {}, X_Api_Key="k").status == 405
    assert "/metrics" in client.call("GET", "/metric", X_Api_Key="k").json["detail"]
    told = client.call("GET", "/openapi.json").json["paths"]["/metrics"]["get"]
    assert list(told["responses"]["200"]["content"]) == ["text/plain"] and "security" not in told


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}])
def test_a_web_page_can_not_read_it(client: Client, headers: Dict[str, str]) -> None:
    assert client.call("GET", "/metrics", **headers).status == 403


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "a\\nb", "\u00fc,{}=", ""])
def test_a_label_may_have_any_text(text: str) -> None:
    shown = clinvk.exposed("name", "gauge", "About.", [("", {"label": text, "other": "x"}, 1.5)])
    [family] = text_string_to_metric_families(shown)
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"label": text, "other": "x"}, 1.5)]


@pytest.mark.parametrize("value, shown", [
    (0, "0"), (3, "3"), (2.0, "2"), (0.005, "0.005"), (12345.678, "12345.678"), (float("inf"), "+Inf"),
    (1e15, "1000000000000000"), (0.1 + 0.2, "0.30000000000000004")])
def test_numbers_are_told_whole(value: float, shown: str) -> None:
    assert clinvk.decimal(value) == shown


def test_the_process_is_told_of(client: Client) -> None:
    found = samples(client)
    assert 0 < found["process_cpu_seconds_total"] < 10_000
    assert abs(found["process_start_time_seconds"] - time.time()) < 600
    assert 3 <= found["process_open_fds"] < found["process_max_fds"]
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(open(os.devnull))
        assert samples(client)["process_open_fds"] == found["process_open_fds"] + 20
    if sys.platform == "linux":
        assert 2**20 < found["process_resident_memory_bytes"] < found["process_virtual_memory_bytes"]


def test_active_sessions_are_left_out_while_nobody_knows(client: Client, tmp_path: Path) -> None:
    assert samples(client)["clinvk_active_sessions"] == 0
    file = tmp_path / "clinvk" / "sessions.db"
    os.replace(file, f"{file}.aside")
    file.mkdir()
    found = samples(client)
    assert "clinvk_active_sessions" not in found and found["clinvk_runs_active"] == 0
    file.rmdir()
    os.replace(f"{file}.aside", file)
    assert samples(client)["clinvk_active_sessions"] == 0


# ---- Over sockets

def streaming(server: Served, path: str, body: Any) -> Tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream whose first bytes have come."""
    connection = server.connection()
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read(1)
    return connection, answer


def leave(connection: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> None:
    answer.close()
    connection.close()


def log_lines(server: Served) -> List[str]:
    """Without time, but those of /metrics."""
    return [line[24:] for line in server.stderr.splitlines() if " /metrics " not in line]


def test_it_tells_what_goes_on_and_answers_while_nothing_more_can_run(
        serve: Callable[..., Served], scripted: Dict[str, Any], tmp_path: Path) -> None:
    scripted["server"].update(max_concurrent_runs=1, max_waiting_runs=1)
    server = serve(config=scripted)
    before = counts(server)
    running = streaming(server, NATIVE, prompt("hold", "text", output_format="stream-json"))
    waiting = server.connection()
    waiting.request("POST", NATIVE, json.dumps(prompt(ephemeral=True)), {"Content-Type": "application/json"})
    eventually(lambda: samples(server)["clinvk_runs_waiting"] == 1)
    assert server.call("POST", NATIVE, prompt()).status == 503
    eventually(lambda: changes(before, counts(server)) == {
        **request(NATIVE, 503), "clinvk_runs_active": 1, "clinvk_runs_waiting": 1, "clinvk_active_sessions": 1})
    waiting.close()  # it has never run
    eventually(lambda: samples(server)["clinvk_runs_waiting"] == 0)
    leave(*running)
    durations = f'clinvk_request_duration_seconds_count{{method="POST",path="{NATIVE}"}}'
    eventually(lambda: changes(before, counts(server)) == {
        **request(NATIVE, 200), **request(NATIVE, 503, times=2), durations: 3, **run("text", "canceled"),
        **CREATED}, 20)


@pytest.mark.parametrize("path, body", [(NATIVE, prompt("hold", "text", output_format="stream-json")),
                                        (OPENAI, chat("hold", "text", stream=True)),
                                        (ANTHROPIC, chat("hold", "text", stream=True, max_tokens=9))])
def test_a_stream_that_is_left_is_one_canceled_run_and_its_line_comes_at_its_end(
        serve: Callable[..., Served], scripted: Dict[str, Any], path: str, body: Any) -> None:
    server = serve(config=scripted)
    stream = streaming(server, path, body)
    assert f'path="{path}"' not in "".join(samples(server)) and log_lines(server) == []
    leave(*stream)
    [line] = eventually(lambda: log_lines(server))
    assert re.fullmatch(rf"127\.0\.0\.1 POST {path} 200 \d+ ms [0-9a-f]{{32}} "
                        r"backend=text exit=-1 start=cold first_text=\d+ms tokens=-", line)
    found = samples(server)
    assert found['clinvk_backend_executions_total{backend="text",status="canceled"}'] == 1
    assert found[f'clinvk_requests_total{{method="POST",path="{path}",status="200"}}'] == 1


@pytest.mark.parametrize("sent, status, method, path, line", [
    (b"nonsense\r\n\r\n", 400, "other", "unmatched", "- - 400"),
    (b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400, "POST", OPENAI, f"POST {OPENAI} 400"),
    (b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413, "POST", OPENAI,
     f"POST {OPENAI} 413"),
    pytest.param(b"POST %s HTTP/1.1\r\nHost: localhost\r\nX: " + 300_000 * b"x" + b"\r\n\r\n", 431, "POST", OPENAI,
                 f"POST {OPENAI} 431", id="a long head"),
    pytest.param(b"POST %s" + 300_000 * b"x" + b" HTTP/1.1\r\n\r\n", 431, "other", "unmatched", "- - 431",
                 id="a long path")])
def test_what_waitress_refuses_is_counted_and_logged(
        serve: Callable[..., Served], sent: bytes, status: int, method: str, path: str, line: str) -> None:
    server = serve(config={"server": {"metrics_enabled": True}})
    assert server.raw(sent.replace(b"%s", OPENAI.encode())).status == status
    [told] = eventually(lambda: log_lines(server))
    assert re.fullmatch(rf"127\.0\.0\.1 {line} \d+ ms [0-9a-f]{{32}}", told)
    assert {name: value for name, value in counts(server).items() if value} == request(path, status, method)


def test_a_path_is_logged_without_a_key_and_not_without_end(serve: Callable[..., Served]) -> None:
    server = serve(CLINVK_API_KEYS="k-4,k-4712\\")  # one of which begins with the other
    server.call("GET", "/api/v1/k-4712%5c/" + 5_000 * "x")
    [told] = eventually(lambda: log_lines(server))
    assert re.fullmatch(r"127\.0\.0\.1 GET /api/v1/<key>/x{486} 401 \d+ ms [0-9a-f]{32}", told)


def test_what_waitress_refuses_is_one_line_also_if_its_client_does_not_wait(serve: Callable[..., Served]) -> None:
    server = serve()
    for _ in range(100):
        with socket.create_connection((server.host, server.port), 20) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            connection.recv(1)
    assert server.call("GET", "/health").status == 200
    eventually(lambda: len(log_lines(server)) == 101)  # a line is written once its answer has gone
    lines = [line for line in log_lines(server) if " /health 200 " not in line]
    assert [tuple(line.split()[:4]) for line in lines] == 100 * [("127.0.0.1", "-", "-", "400")]


def test_after_much_traffic_it_is_what_prometheus_takes(serve: Callable[..., Served], scripted: Dict[str, Any]) -> None:
    server = serve(config=scripted)
    asked: List[Tuple[str, str, Any]] = [
        ("POST", NATIVE, prompt()), ("POST", NATIVE, prompt("fail", "text")),
        ("POST", NATIVE, prompt(backend="claude")), ("POST", NATIVE, prompt(backend="no\"body\\\n")),
        ("POST", NATIVE, prompt(output_format="stream-json")),
        ("POST", OPENAI, chat(stream=True)), ("POST", OPENAI, chat("fail", "text")), ("POST", ANTHROPIC, chat()),
        ("POST", ANTHROPIC, chat(max_tokens=9, stream=True, model="claude")), ("GET", "/v1/models", None),
        ("POST", "/api/v1/parallel", {"tasks": [prompt(), prompt("fail", "text"), prompt(backend="claude")]}),
        ("GET", "/api/v1/sessions", None), ("GET", "/%22%5C%0A", None), ("PUT", "/health", None)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: server.call(*one), asked * 3))
    found = samples(server)
    for name, value in found.items():
        if name.endswith("}") and re.match(r"\w+_count\{", name):
            infinite = name.replace("_count{", "_bucket{")
            labels = sorted([*re.findall(r'\w+="[^"]*"', infinite), 'le="+Inf"'])
            assert found[f"{infinite.partition('{')[0]}{{{','.join(labels)}}}"] == value
    promtool = shutil.which("promtool")
    if promtool:
        text = server.call("GET", "/metrics").body
        checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


# ---- The log

ID = "[0-9a-f]{32}"


ECHO = r" backend=echo exit=0 start=cold first_text=\d+ms tokens=-"
ASKED = r" backend=claude exit=0 start=cold first_text=\d+ms tokens=153/20"
FAILED = " backend=text exit=3 start=cold first_text=- tokens=-"


@pytest.mark.parametrize("path, body, line", [
    (NATIVE, prompt(), r"200 \d+ ms ID" + ECHO),
    (NATIVE, prompt("secret", "claude"), r"200 \d+ ms ID" + ASKED),
    (NATIVE, prompt("fail: secret", "text"), r"200 \d+ ms ID" + FAILED),
    (NATIVE, prompt("secret", dry_run=True), r"200 \d+ ms ID"),
    (NATIVE, prompt("secret", backend="secret"), r"422 \d+ ms ID"),
    (NATIVE, prompt("secret", backend="codex"), r"503 \d+ ms ID"),
    (OPENAI, chat("secret", "claude", stream=True), r"200 \d+ ms ID" + ASKED),
    (OPENAI, chat("secret words", stop=["words"]), r"200 \d+ ms ID" + ECHO),
    (OPENAI, chat("fail: secret", "text"), r"502 \d+ ms ID" + FAILED),
    (OPENAI, chat("fail: secret", "text", stream=True), r"502 \d+ ms ID" + FAILED),
    (ANTHROPIC, chat("secret", max_tokens=9), r"200 \d+ ms ID" + ECHO),
    ("/api/v1/compare", {"backends": ["claude", "echo"], "prompt": "secret", "sequential": True},
     r"200 \d+ ms ID" + ASKED + ECHO),
    ("/api/v1/parallel", {"tasks": [prompt("secret", "claude")] * 2 + [prompt("secret")] * 95 + [
        prompt("fail: secret", "text"), prompt("secret", "text")], "max_parallel": 1},
     r"200 \d+ ms ID backend=claude runs=2 failed=0 exit=0 start=cold first_text=\d+(-\d+)?ms tokens=306/40"
     r" backend=echo runs=95 failed=0 exit=0 start=cold first_text=\d+(-\d+)?ms tokens=-"
     r" backend=text runs=2 failed=1 exit=0,3 start=cold first_text=\d+ms tokens=-")])
def test_a_request_is_one_log_line_that_tells_of_its_runs(
        make_client: MakeClient, scripted: Dict[str, Any], caplog: pytest.LogCaptureFixture, path: str, body: Any,
        line: str) -> None:
    client = make_client(scripted, CLINVK_API_KEYS="secret-key")
    caplog.set_level(logging.INFO, "clinvk")
    client.call("POST", path, body, X_Api_Key="secret-key")
    [told] = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(rf"127\.0\.0\.1 POST {path} {line.replace('ID', ID)}", told)
    assert "secret" not in told and len(told) < 500


def test_several_runs_of_a_backend_are_told_in_short() -> None:
    ran = [clinvk.Ran("x", exit_code=code, status=status, start=start, first_text_secs=secs, usage=usage)
           for code, status, start, secs, usage in [
               (0, "success", "cold", 0.312, Usage(10, 1)), (3, "error", "cold", None, None),
               (0, "success", "spare", 0.12, Usage(1, 2, 100, 20, cache_inside=False)),
               (-1, "timeout", "cold", 2.0, None)]]
    told = " backend=x runs=4 failed=2 exit=-1,0,3 start=cold,spare first_text=120-2000ms tokens=131/3"
    assert clinvk.told_of(ran) == told
    assert clinvk.told_of(ran[:1]) == " backend=x exit=0 start=cold first_text=312ms tokens=10/1"
    assert clinvk.told_of(ran[1:2]) == " backend=x exit=3 start=cold first_text=- tokens=-"


@pytest.mark.parametrize("path, shown", [
    ("/a b", r"/a\x20b"), ("/x 200 1 ms id backend=claude", r"/x\x20200\x201\x20ms\x20id\x20backend=claude"),
    ("/a\nb\x1b", r"/a\nb\x1b"), ("/\u00fc", r"/\xfc"), ("/v1/models?key=secret", "/v1/models"),
    ("/a\\x20b", r"/a\\x20b")])
def test_no_path_can_forge_what_the_line_says(
        client: Client, caplog: pytest.LogCaptureFixture, path: str, shown: str) -> None:
    caplog.set_level(logging.INFO, "clinvk")
    client.call("GET", path)
    [told] = [record.getMessage() for record in caplog.records]
    assert told.split()[:3] == ["127.0.0.1", "GET", shown] and len(told.split()) == 7


def test_the_runs_of_many_threads_are_told_with_their_own_requests(
        make_client: MakeClient, scripted: Dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    client = make_client(scripted)
    caplog.set_level(logging.INFO, "clinvk")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: client.call("POST", "/api/v1/parallel", {"tasks": [prompt()] * number},
                                                 X_Request_Id=f"n{number}"), range(2, 30)))
    told = dict(re.findall(r" ms n(\d+) backend=echo runs=(\d+) ", caplog.text))
    assert told == {str(number): str(number) for number in range(2, 30)}
