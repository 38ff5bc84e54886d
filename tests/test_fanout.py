"""Several runs from one request: parallel, chain, compare, and their streams."""

import contextlib
import http.client
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import clinvk
import pytest
from conftest import Client, Reply, Served, eventually

# One that is to meet another goes on when that has begun.
LOGGED = """
prompt = sys.stdin.read()
order = os.path.join(os.path.dirname(os.path.abspath(__file__)), "order")
log = os.open(order, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(log, ("+%d %s\\n" % (os.getpid(), prompt)).encode())
if prompt.startswith("fail"):
    sys.stderr.write("it broke\\n")
    sys.exit(3)
ends = time.monotonic() + 20
while prompt.startswith("meet") and open(order).read().count("+") < 2 and time.monotonic() < ends:
    time.sleep(0.01)
time.sleep(600 if prompt.startswith("sleep") else 0.1)
print(prompt, end="")
os.write(log, ("-%d\\n" % os.getpid()).encode())
"""


def task(prompt: str, backend: str = "echo", **fields: Any) -> Dict[str, Any]:
    return {"backend": backend, "prompt": prompt, **fields}


class Logged:
    """A server whose backend "it" logs when it begins and ends."""

    def __init__(self, server: Served, folder: Path) -> None:
        self.server, self.folder = server, folder

    @property
    def order(self) -> List[str]:
        return (self.folder / "order").read_text().splitlines() if (self.folder / "order").exists() else []

    @property
    def most_at_once(self) -> int:
        levels = [sum(1 if line[0] == "+" else -1 for line in self.order[:i + 1]) for i in range(len(self.order))]
        return max(levels)

    def nothing_runs(self) -> bool:
        started = [int(line[1:].split()[0]) for line in self.order if line[0] == "+"]
        return not any(clinvk.is_alive(pid) for pid in started)


@pytest.fixture
def logged(serve: Callable[..., Served], fake_cli: Callable[..., str], tmp_path: Path) -> Callable[..., Logged]:
    def start(**server: Any) -> Logged:
        config = {"backends": {"it": {"command": fake_cli(LOGGED)}}, "server": server}
        return Logged(serve(config=config), tmp_path)
    return start


# ---- parallel

def test_the_results_stand_in_the_order_of_the_tasks(client: Client) -> None:
    reply = client.call("POST", "/api/v1/parallel", {"tasks": [task("one"), task("two"), task("three")]})
    assert (reply.status, [result["output"] for result in reply.json["results"]]) == (200, ["one", "two", "three"])
    assert {name: reply.json[name] for name in ("total_tasks", "completed", "failed")} == {
        "total_tasks": 3, "completed": 3, "failed": 0}
    assert all(result["exit_code"] == 0 and "session_id" not in result for result in reply.json["results"])


@pytest.mark.parametrize("bad, place", [
    (task("x", backend="ecko"), "body.tasks[3].backend"), (task("x", session_id="a"), "body.tasks[3].session_id"),
    (task("x", workdir="relative"), "body.tasks[3].workdir"), (task("x", sped=1), "body.tasks[3].sped"),
    ({"backend": "it"}, "body.tasks[3].prompt")])
def test_one_bad_task_is_named_and_nothing_runs(logged: Callable[..., Logged], bad: Any, place: str) -> None:
    it = logged()
    tasks = [task(f"t{i}", backend="it") for i in range(100)]
    tasks[3] = bad
    reply = it.server.call("POST", "/api/v1/parallel", {"tasks": tasks})
    assert (reply.status, reply.json["errors"][0]["location"]) == (422, place)
    assert it.order == []


def test_no_more_than_max_parallel_run_at_once_and_they_start_in_order(logged: Callable[..., Logged]) -> None:
    it = logged()
    tasks = [task(f"t{i}", backend="it") for i in range(6)]
    meeting = [task("meet", backend="it")] * 2
    reply = it.server.call("POST", "/api/v1/parallel", {"tasks": [*meeting, *tasks], "max_parallel": 2})
    assert reply.json["completed"] == 8 and it.most_at_once == 2
    it = Logged(it.server, it.folder)
    (it.folder / "order").unlink()
    it.server.call("POST", "/api/v1/parallel", {"tasks": tasks, "max_parallel": 1})
    assert [line.split()[1] for line in it.order if line[0] == "+"] == [f"t{i}" for i in range(6)]


def test_fail_fast_ends_what_runs_and_starts_nothing_more(logged: Callable[..., Logged]) -> None:
    it = logged()
    tasks = [task("sleep", backend="it"), task("fail", backend="it"), task("never", backend="it")]
    reply = it.server.call("POST", "/api/v1/parallel", {"tasks": tasks, "max_parallel": 2, "fail_fast": True})
    assert [result["exit_code"] for result in reply.json["results"]] == [-1, 3, -1]
    assert [result["error"].splitlines()[0] for result in reply.json["results"]] == [
        "canceled", "it failed with exit code 3", "canceled"]
    assert (reply.json["completed"], reply.json["failed"]) == (0, 3)
    assert not any("never" in line for line in it.order)
    eventually(it.nothing_runs)


def test_a_failure_without_fail_fast_leaves_the_others_alone(logged: Callable[..., Logged]) -> None:
    tasks = [task("fail", backend="it"), task("fine", backend="it")]
    reply = logged().server.call("POST", "/api/v1/parallel", {"tasks": tasks})
    assert [result["exit_code"] for result in reply.json["results"]] == [3, 0] and reply.json["failed"] == 1


def test_its_tasks_wait_for_slots_and_are_never_a_503(logged: Callable[..., Logged]) -> None:
    it = logged(max_concurrent_runs=1, max_waiting_runs=0)
    reply = it.server.call("POST", "/api/v1/parallel", {"tasks": [task(f"t{i}", backend="it") for i in range(5)],
                                                       "max_parallel": 5})
    assert reply.json["completed"] == 5 and it.most_at_once == 1


@pytest.mark.parametrize("path, body", [
    ("/api/v1/parallel", {"tasks": [task("sleep", backend="it")] * 2}),
    ("/api/v1/chain", {"steps": [task("sleep", backend="it")] * 2}),
    ("/api/v1/compare", {"backends": ["it", "it"], "prompt": "sleep"}),
    ("/v1/chat/completions", {"model": "it", "n": 2, "messages": [{"role": "user", "content": "sleep"}]})])
def test_no_more_fan_outs_are_let_in_than_there_are_places(logged: Callable[..., Logged], path: str,
                                                           body: Dict[str, Any]) -> None:
    """Each has a thread to the end: with all of them, nobody would be answered."""
    server = logged(max_concurrent_runs=1, max_waiting_runs=2).server
    with contextlib.ExitStack() as stack:
        def ask() -> http.client.HTTPConnection:
            connection = stack.enter_context(contextlib.closing(server.connection()))
            connection.request("POST", path, clinvk.to_json(body), {"Content-Type": "application/json"})
            return connection
        for _ in range(3):  # one with the slot, two in the line
            ask()
        eventually(lambda: server.call("GET", "/health").json["runs"] == {"active": 1, "waiting": 2, "limit": 1})
        assert {ask().getresponse().status for _ in range(20)} == {503}


def test_a_fan_out_that_finds_the_line_full_is_a_503(make_client: Callable[..., Client]) -> None:
    client = make_client({"server": {"max_concurrent_runs": 1, "max_waiting_runs": 0}})
    assert list(client.server.slots.take(clinvk.Stop())) == []
    for path, body in (("parallel", {"tasks": [task("a")]}), ("chain", {"steps": [task("a")]}),
                       ("compare", {"backends": ["echo"], "prompt": "a"})):
        assert client.call("POST", f"/api/v1/{path}", body).status == 503


def test_each_run_has_the_whole_time_of_a_run(logged: Callable[..., Logged]) -> None:
    it = logged(request_timeout_secs=5)
    tasks = [task("sleep", backend="it", timeout_secs=1), task("sleep", backend="it"), task("a", backend="it")]
    for path, body in (("parallel", {"tasks": tasks, "max_parallel": 1}), ("chain", {"steps": tasks})):
        results = it.server.call("POST", f"/api/v1/{path}", body).json["results"]
        assert [result["exit_code"] for result in results] == [-1, -1, 0]
        assert [str(result.get("error"))[:46] for result in results] == [
            "time is up: the run was ended after 1 s. Allow", "time is up: the run was ended after 5 s. Allow", "None"]
    eventually(it.nothing_runs)


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_runs_on_for_a_client_that_has_left(logged: Callable[..., Logged], stream: bool) -> None:
    it = logged()
    body = {"tasks": [task("sleep", backend="it")] * 3, "max_parallel": 2, "stream": stream}
    with contextlib.closing(it.server.connection()) as connection:
        connection.request("POST", "/api/v1/parallel", clinvk.to_json(body), {"Content-Type": "application/json"})
        eventually(lambda: len(it.order) == 2)
    eventually(it.nothing_runs)
    eventually(lambda: it.server.call("GET", "/health").json["runs"]["active"] == 0)
    assert len(it.order) == 2


def test_a_dry_run_tells_command_lines_and_runs_nothing(logged: Callable[..., Logged]) -> None:
    it = logged()
    reply = it.server.call("POST", "/api/v1/parallel", {"tasks": [task("a", backend="it")], "dry_run": True})
    assert reply.json["results"][0]["output"].splitlines()[0].endswith("/fake") and it.order == []


# ---- chain

def chain(client: Client, *prompts: str, **fields: Any) -> Reply:
    return client.call("POST", "/api/v1/chain", {"steps": [task(prompt) for prompt in prompts], **fields})


@pytest.mark.parametrize("prompts, outputs", [
    (["a", "{{previous}}b", "{{previous}}{{previous}}c"], ["a", "ab", "ababc"]),
    (["{{previous}}", "x"], ["{{previous}}", "x"]),  # untouched in step 1
    (["{{previous}} {{other}}", "<{{previous}}>", "{{previous}}"],
     ["{{previous}} {{other}}", "<{{previous}} {{other}}>", "<{{previous}} {{other}}>"])])  # not expanded again
def test_previous_is_the_output_of_the_step_before(client: Client, prompts: List[str], outputs: List[str]) -> None:
    reply = chain(client, *prompts)
    assert [result["output"] for result in reply.json["results"]] == outputs
    assert (reply.json["total_steps"], reply.json["completed_steps"]) == (len(prompts), len(prompts))
    assert "failed_step" not in reply.json and [r["step"] for r in reply.json["results"]] == [1, 2, 3][:len(prompts)]


def test_a_dry_run_of_a_chain_leaves_what_will_be_there_then(logged: Callable[..., Logged]) -> None:
    steps = [task("a", backend="it"), task("say {{previous}}", backend="it")]
    told = logged().server.call("POST", "/api/v1/chain", {"steps": steps, "dry_run": True}).json
    assert told["results"][1]["output"].endswith("# told:\nsay {{previous}}")


@pytest.mark.parametrize("stops, ran, completed", [(True, 2, 1), (False, 3, 2)])
def test_a_failed_step_is_named_and_may_stop_the_chain(
        logged: Callable[..., Logged], stops: bool, ran: int, completed: int) -> None:
    steps = [task("a", backend="it", name="first"), task("fail", backend="it"), task("c", backend="it")]
    told = logged().server.call("POST", "/api/v1/chain", {"steps": steps, "stop_on_failure": stops}).json
    assert (told["total_steps"], told["completed_steps"], told["failed_step"]) == (3, completed, 2)
    assert [result["exit_code"] for result in told["results"]] == [0, 3, 0][:ran]
    assert told["results"][0]["name"] == "first"


@pytest.mark.parametrize("fields, prompt", [({"pass_session_id": True}, "a"), ({"persist_sessions": True}, "a"),
                                            ({}, "go on with {{session}}")])
def test_a_chain_that_wants_a_session_is_refused(client: Client, fields: Any, prompt: str) -> None:
    assert chain(client, prompt, **fields).status == 400


def test_a_step_may_run_where_the_one_before_did(fake_cli: Callable[..., str], make_client: Callable[..., Client],
                                                 tmp_path: Path) -> None:
    client = make_client({"backends": {"where": {"command": fake_cli("print(os.getcwd(), end='')")}}})
    steps = [task("a", backend="where", workdir=str(tmp_path)), task("b", backend="where")]
    for passes in (True, False):
        reply = client.call("POST", "/api/v1/chain", {"steps": steps, "pass_working_dir": passes})
        same = [result["output"] == str(tmp_path) for result in reply.json["results"]]
        assert same == [True, passes]


def test_a_task_that_is_to_stream_alone_is_answered_and_told_that_it_does_not(client: Client) -> None:
    tasks = [task("a", output_format="stream-json"), task("b", output_format="json")]
    results = client.call("POST", "/api/v1/parallel", {"tasks": tasks}).json["results"]
    assert [(one["output"], one.get("ignored")) for one in results] == [("a", ["output_format"]), ("b", None)]


def test_steps_have_no_output_format(client: Client) -> None:
    reply = client.call("POST", "/api/v1/chain", {"steps": [task("a", output_format="json")]})
    assert (reply.status, reply.json["errors"][0]["location"]) == (422, "body.steps[0].output_format")


# ---- compare

@pytest.mark.parametrize("sequential", [True, False])
def test_compare_asks_each_backend_the_same(logged: Callable[..., Logged], sequential: bool) -> None:
    body = {"backends": ["it", "echo", "it"], "prompt": "hello", "sequential": sequential}
    told = logged().server.call("POST", "/api/v1/compare", body).json
    assert (told["prompt"], told["backends"]) == ("hello", ["it", "echo", "it"])
    assert [(r["backend"], r["output"], "model" in r) for r in told["results"]] == [
        ("it", "hello", True), ("echo", "hello", True), ("it", "hello", True)]


def test_an_unknown_backend_is_named_by_its_place(client: Client) -> None:
    reply = client.call("POST", "/api/v1/compare", {"backends": ["echo", "ecko"], "prompt": "a"})
    assert (reply.status, reply.json["errors"][0]["location"]) == (422, "body.backends[1]")


# ---- streams

@pytest.mark.parametrize("path, body", [
    ("parallel", {"tasks": [task("one two"), task("three")]}),
    ("compare", {"backends": ["echo", "echo"], "prompt": "a b"}),
    ("chain", {"steps": [task("one"), task("{{previous}} two")]})])
def test_a_stream_tells_each_task_and_ends_with_the_whole_answer(client: Client, path: str, body: Any) -> None:
    whole = client.call("POST", f"/api/v1/{path}", body).json
    reply = client.call("POST", f"/api/v1/{path}", {**body, "stream": True})
    *lines, summary = reply.lines
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [line["sequence"] for line in reply.lines] == list(range(1, len(reply.lines) + 1))
    assert sorted(line["task"] for line in lines if line["type"] == "done") == [0, 1]
    for number in (0, 1):
        said = "".join(x["content"]["text"] for x in lines if x["task"] == number and x["type"] == "message")
        assert said == whole["results"][number]["output"]
    assert summary.pop("type") == "summary" and summary.pop("sequence")
    for answer in (whole, summary):
        answer.pop("total_duration_ms")
        for result in answer["results"]:
            result.pop("duration_ms")
    assert summary == whole


# ---- What a second reader found

def test_a_fan_out_takes_one_place_in_the_line_not_one_a_task(logged: Callable[..., Logged]) -> None:
    it = logged(max_concurrent_runs=2, max_waiting_runs=2)
    body = {"tasks": [task("sleep", backend="it")] * 20, "max_parallel": 20}
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(contextlib.closing(it.server.connection()))
            connection.request("POST", "/api/v1/parallel", clinvk.to_json(body), {"Content-Type": "application/json"})
        eventually(lambda: it.server.call("GET", "/health").json["runs"] == {"active": 2, "waiting": 2, "limit": 2})
        reply = it.server.call("POST", "/api/v1/prompt", task("late", timeout_secs=1))
        assert reply.status == 504  # it waited: the line was not full


def test_no_task_is_started_after_a_failure_that_ends_all(logged: Callable[..., Logged]) -> None:
    it = logged()
    for _ in range(10):
        tasks = [task("fail", backend="it"), task("never", backend="it")]
        body = {"tasks": tasks, "max_parallel": 1, "fail_fast": True}
        assert [r["exit_code"] for r in it.server.call("POST", "/api/v1/parallel", body).json["results"]] == [3, -1]
    assert not any("never" in line for line in it.order)


def test_a_chain_that_doubles_its_text_ends_with_an_error(make_client: Callable[..., Client]) -> None:
    client = make_client({"server": {"max_output_bytes": 1000}})
    told = chain(client, "x" * 100, *["{{previous}}{{previous}}"] * 6, stop_on_failure=True).json
    assert (told["failed_step"], len(told["results"][3]["output"])) == (5, 800)
    assert "body.steps[4].prompt: would have 1600 characters" in told["results"][4]["error"]


@pytest.mark.parametrize("bad, place", [(task("x", model="fast"), "body.tasks[1].model"),
                                        (task("x", workdir="/etc"), "body.tasks[1]: workdir"),
                                        (task("x", extra=["--x"]), "body.tasks[1]: extra")])
def test_every_error_of_a_task_says_which_one_it_was(client: Client, bad: Any, place: str) -> None:
    reply = client.call("POST", "/api/v1/parallel", {"tasks": [task("a"), bad]})
    assert reply.status in (403, 422) and place in reply.body.decode()


@pytest.mark.parametrize("fields, place", [({"workdir": "relative"}, "body.workdir"),
                                           ({"prompt": "  "}, "body.prompt")])
def test_what_all_of_a_comparison_share_is_named_once(client: Client, fields: Any, place: str) -> None:
    reply = client.call("POST", "/api/v1/compare", {"backends": ["echo"], "prompt": "a", **fields})
    assert (reply.status, reply.json["errors"][0]["location"]) == (422, place)


# ---- What is checked before anything runs

def test_a_faulty_field_is_told_before_what_else_keeps_a_task_from_running(client: Client) -> None:
    tasks = [task("x", backend="codex"), task("x", model="fast")]
    client.server.programs["codex"] = (1e12, None)  # not installed
    assert client.call("POST", "/api/v1/parallel", {"tasks": tasks[:1]}).status == 503
    reply = client.call("POST", "/api/v1/parallel", {"tasks": [*tasks, task(" ")]})
    assert (reply.status, reply.json["errors"][0]["location"]) == (422, "body.tasks[2].prompt")


def test_compare_names_its_own_fields(client: Client) -> None:
    reply = client.call("POST", "/api/v1/compare", {"backends": ["echo"], "prompt": "x", "model": "fast"})
    assert (reply.status, reply.json["errors"][0]["location"]) == (422, "body.model")


def test_a_dry_run_needs_no_place_in_the_line(make_client: Callable[..., Client]) -> None:
    client = make_client({"server": {"max_concurrent_runs": 1, "max_waiting_runs": 0}})
    list(client.server.slots.take(clinvk.Stop()))
    body = {"tasks": [task("x")]}
    assert client.call("POST", "/api/v1/parallel", body).status == 503
    assert client.call("POST", "/api/v1/parallel", {**body, "dry_run": True}).status == 200
    client.server.slots.release()


@pytest.mark.parametrize("path, body, counts", [
    ("/openai/v1/chat/completions", {"messages": [{"role": "user", "content": "one two "}], "n": 1}, (2, 2)),
    ("/openai/v1/chat/completions", {"messages": [{"role": "user", "content": "one two "}], "n": 3}, (6, 6)),
    ("/openai/v1/completions", {"prompt": ["one two ", "four five six  "], "n": 2}, None)])
def test_what_no_cli_has_counted_is_estimated_once_for_each_answer(client: Any, path: str, body: Dict[str, Any],
                                                                   counts: Any) -> None:
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    usages = [client.call("POST", path, {"model": "echo", **body}).json["usage"], json.loads(
        client.call("POST", path, {"model": "echo", **body, **streamed}).body.split(b"data: ")[-2])["usage"]]
    alone = [client.call("POST", path, {"model": "echo", "prompt": text}).json["usage"]["prompt_tokens"]
             for text in body.get("prompt", [])]
    prompt_tokens, answer_tokens = counts or (2 * sum(alone), 12)
    for usage in usages:
        assert abs(usage["prompt_tokens"] - prompt_tokens) <= 2 * len(alone)  # each is rounded up
        assert usage["completion_tokens"] == answer_tokens
