"""Several answers to one request (`n`), stop sequences in each of them, and completions of texts."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import pytest
from conftest import Client, Reply, alive, eventually, fault

Json = Dict[str, Any]
CHAT, COMPLETIONS, RESPONSES = "/openai/v1/chat/completions", "/openai/v1/completions", "/openai/v1/responses"
either = pytest.mark.parametrize("path, stream", [(CHAT, False), (CHAT, True), (COMPLETIONS, False),
                                                  (COMPLETIONS, True)])
# Each process takes the next number, and prints the pieces that the file answers has for it: a number is a pause until
# there is a file go-NUMBER, null is a failure, anything else is text.
CLI = """
HERE, number, ends = %r, 0, time.monotonic() + 600
while True:
    try:
        os.mkdir(f"{HERE}/run-{number:02}")
        break
    except FileExistsError:
        number += 1
with open(f"{HERE}/run-{number:02}/draft", "w") as file:
    json.dump({"pid": os.getpid(), "prompt": sys.stdin.read()}, file)
os.rename(file.name, f"{HERE}/run-{number:02}/told")
answers = json.load(open(HERE + "/answers"))
for piece in answers[min(number, len(answers) - 1)]:
    while isinstance(piece, int) and not os.path.exists(f"{HERE}/go-{piece}") and time.monotonic() < ends:
        time.sleep(0.01)
    if piece is None:
        sys.exit("it broke")
    if isinstance(piece, str):
        print(piece, end="", flush=True)
"""


class Stage:
    """An application whose backend `mine` is a scripted CLI."""

    def __init__(self, folder: Path, make_client: Callable[..., Client], fake_cli: Callable[..., str]) -> None:
        self.folder, self.make_client, self.cli = folder, make_client, fake_cli(CLI % str(folder), "mine")
        self.use()

    def use(self, **server: Any) -> Client:
        self.client = self.make_client({"backends": {"mine": {"command": self.cli}}, "server": server})
        return self.client

    def answers(self, *answers: List[Any]) -> None:
        (self.folder / "answers").write_text(json.dumps(answers))

    def go(self, number: int) -> None:
        (self.folder / f"go-{number}").touch()

    def post(self, path: str, model: str = "mine", **fields: Any) -> Reply:
        asked = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
        usage = {"stream_options": {"include_usage": True}} if fields.get("stream") else {}
        return self.client.call("POST", path, {"model": model, **asked, **usage, **fields})

    def ask(self, path: str, model: str = "mine", **fields: Any) -> List[str]:
        """The texts of the choices of an answer, which must be as OpenAI has them."""
        return texts(path, self.post(path, model, **fields))

    @property
    def told(self) -> List[Json]:
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("run-*/told"))]


@pytest.fixture
def stage(tmp_path: Path, make_client: Callable[..., Client], fake_cli: Callable[..., str]) -> Stage:
    return Stage(tmp_path, make_client, fake_cli)


def texts(path: str, reply: Reply) -> List[str]:
    """Of the choices, by their index."""
    assert reply.status == 200, reply.body
    chat = path == CHAT
    if reply.headers["content-type"] == "application/json":
        choices = reply.json["choices"]
        assert [choice["index"] for choice in choices] == [*range(len(choices))]
        assert reply.json["object"] == ("chat.completion" if chat else "text_completion")
        assert reply.json["id"].startswith("chatcmpl-" if chat else "cmpl-")
        assert all(choice["finish_reason"] == "stop" for choice in choices)
        return [choice["message"]["content"] if chat else choice["text"] for choice in choices]
    *chunks, last, end = reply.data
    assert (end, last["choices"], last["usage"]["total_tokens"] > 0) == ("[DONE]", [], True)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk" if chat else "text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1 and all(chunk["usage"] is None for chunk in chunks)
    found: Dict[int, List[Any]] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        found.setdefault(choice["index"], []).append(choice)
    assert sorted(found) == [*range(len(found))]
    for choices in found.values():
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert not chat or choices[0]["delta"] == {"role": "assistant", "content": ""}
    said = [[c["delta"].get("content", "") if chat else c["text"] for c in found[index]] for index in sorted(found)]
    return ["".join(pieces) for pieces in said]


# ---- Several answers

@either
def test_each_answer_is_a_choice_from_a_run_of_its_own(stage: Stage, path: str, stream: bool) -> None:
    stage.answers(["a", "b"], ["c"], ["", "d"])
    assert sorted(stage.ask(path, n=3, stream=stream)) == ["ab", "c", "d"]
    assert len({told["pid"] for told in stage.told}) == 3 and {told["prompt"][-2:] for told in stage.told} == {"hi"}


@either
def test_the_usage_is_that_of_all_answers(stage: Stage, path: str, stream: bool) -> None:
    stage.answers(["x" * 40])
    reply = stage.post(path, n=3, stream=stream)
    usage = reply.data[-2]["usage"] if stream else reply.json["usage"]
    one = stage.post(path).json["usage"]
    assert (usage["completion_tokens"], one["completion_tokens"]) == (30, 10)
    assert usage["total_tokens"] == usage["prompt_tokens"] + 30 and usage["prompt_tokens"] >= one["prompt_tokens"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_answers_of_a_stream_come_as_they_are_said_one_between_the_other(stage: Stage, path: str) -> None:
    """Each says its second piece only after the other one's first: one after the other they would wait for ever."""
    stage.answers(["a", 1, "b"], ["c", 2, "d"])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stage.post, path, n=2, stream=True)
        eventually(lambda: len(stage.told) == 2)
        stage.go(1)
        stage.go(2)
        reply = asked.result()
    assert sorted(texts(path, reply)) == ["ab", "cd"]


@either
def test_one_answer_that_fails_is_an_error_and_ends_the_others(stage: Stage, path: str, stream: bool) -> None:
    stage.answers(["", 0, None], [99, "never"])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stage.post, path, n=2, stream=stream)
        eventually(lambda: len(stage.told) == 2)
        stage.go(0)
        reply = asked.result(60)  # the other one would take ten minutes
    assert (reply.status, reply.headers["x-should-retry"]) == (502, "false") and "it broke" in fault(reply, "openai")
    eventually(lambda: not alive([told["pid"] for told in stage.told]))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_one_that_fails_in_mid_stream_is_an_error_there_and_ends_the_others(stage: Stage, path: str) -> None:
    stage.answers(["Hel", 0, None], [99, "never"])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stage.post, path, n=2, stream=True)
        eventually(lambda: len(stage.told) == 2)
        stage.go(0)
        reply = asked.result(60)
    assert reply.status == 200 and b"Hel" in reply.body and b"never" not in reply.body and b"[DONE]" not in reply.body
    assert reply.data[-1]["error"]["code"] == "backend_failed" and "it broke" in reply.data[-1]["error"]["message"]
    eventually(lambda: not alive([told["pid"] for told in stage.told]))


@either
def test_with_fewer_slots_than_answers_they_come_one_after_the_other(stage: Stage, path: str, stream: bool) -> None:
    stage.use(max_concurrent_runs=1, max_waiting_runs=0)
    stage.answers(["a"], ["b"], ["c"])
    assert stage.ask(path, n=3, stream=stream) == ["a", "b", "c"]


@either
def test_when_the_line_is_full_nothing_runs(stage: Stage, path: str, stream: bool) -> None:
    client = stage.use(max_concurrent_runs=1, max_waiting_runs=0)
    stage.answers([1, "a"])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stage.post, path)
        eventually(lambda: stage.told)
        reply = stage.post(path, n=2, stream=stream)
        stage.go(1)
        assert asked.result().status == 200
    assert (reply.status, reply.headers["retry-after"], "x-should-retry" in reply.headers) == (503, "5", False)
    assert fault(reply, "openai") and len(stage.told) == 1
    eventually(lambda: client.server.slots.active == 0)


def test_an_answer_that_could_not_begin_after_others_have_is_not_to_be_repeated(stage: Stage) -> None:
    """The second run waits in vain for the slot that another request has got."""
    stage.use(max_concurrent_runs=1, request_timeout_secs=5)
    stage.answers([0, "a"], [1, "b"])
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(stage.post, CHAT, n=2)
        eventually(lambda: stage.told)
        other = pool.submit(stage.post, CHAT)
        eventually(lambda: stage.client.server.slots.waiting)
        stage.go(0)
        reply = asked.result()
        stage.go(1)
        other.result()
    assert (reply.status, reply.headers["x-should-retry"]) == (504, "false")


def test_a_client_that_leaves_ends_all_its_answers(stage: Stage) -> None:
    stage.answers(["a", 99])
    gone = threading.Event()
    environ_of = stage.client.app

    def app(environ: Json, start_response: Any) -> Any:
        return environ_of({**environ, "waitress.client_disconnected": gone.is_set}, start_response)
    stage.client.app = app
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stage.post, CHAT, n=3)
        eventually(lambda: len(stage.told) == 3)
        gone.set()
        assert asked.result().status == 503
    eventually(lambda: not alive([told["pid"] for told in stage.told]))


@either
def test_a_dry_run_of_several_shows_each_and_runs_none_however_full_the_line_is(stage: Stage, path: str,
                                                                                stream: bool) -> None:
    stage.use(max_concurrent_runs=1, max_waiting_runs=0)
    stage.answers([1, "a"])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stage.post, path)
        eventually(lambda: stage.told)
        shown = stage.ask(path, n=2, stream=stream, clinvk={"dry_run": True})
        stage.go(1)
        assert asked.result().status == 200
    assert len(shown) == 2 and all(stage.cli in text for text in shown) and len(stage.told) == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("n, told", [(0, "at least 1"), (9, "at most 8"), ("2", "a whole number"), (1.5, "a whole")])
def test_a_number_of_answers_out_of_bounds_is_a_400(stage: Stage, path: str, n: Any, told: str) -> None:
    reply = stage.post(path, n=n)
    assert (reply.status, reply.json["error"]["param"]) == (400, "n") and told in fault(reply, "openai")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_eight_answers_of_echo_are_alike(stage: Stage, path: str) -> None:
    assert stage.ask(path, "echo", n=8) == ["hi"] * 8 == stage.ask(path, "echo", n=8, stream=True)


# ---- Stop sequences

@either
def test_each_answer_ends_before_its_own_stop_sequence_and_its_cli_is_ended(stage: Stage, path: str,
                                                                            stream: bool) -> None:
    stage.answers(["one S", "TO", "P two", 99], ["ST", "O and on"], ["x EN", "D y", 99])
    assert sorted(stage.ask(path, n=3, stream=stream, stop=["STOP", "END"])) == ["STO and on", "one ", "x "]
    eventually(lambda: not alive([told["pid"] for told in stage.told]))


@pytest.mark.parametrize("stop, text", [(None, "a\nb\n\nc"), ([], "a\nb\n\nc"), ("\n", "a"), (["\n\n", "c"], "a\nb"),
                                        ("", "a\nb\n\nc"), (["x", ""], "a\nb\n\nc")])
@either
def test_what_a_stop_sequence_may_be(stage: Stage, path: str, stream: bool, stop: Any, text: str) -> None:
    stage.answers(["a\nb\n", "\nc"])
    assert stage.ask(path, stream=stream, stop=stop) == [text]


# ---- Completions

def completion(stage: Stage, **fields: Any) -> List[str]:
    """Whole and streamed, which must be alike."""
    told = stage.ask(COMPLETIONS, "echo", **fields)
    assert stage.ask(COMPLETIONS, "echo", stream=True, **fields) == told
    return told


@pytest.mark.parametrize("fields, answers", [
    ({"prompt": "one two"}, ["one two"]), ({"prompt": ["one two"]}, ["one two"]),
    ({"prompt": ["one", "two"]}, ["one", "two"]), ({"prompt": ["one", "two"], "n": 2}, ["one", "one", "two", "two"]),
    ({"prompt": "a b", "echo": True}, ["a ba b"]),
    ({"prompt": ["a", "b"], "n": 2, "echo": True}, ["aa", "aa", "bb", "bb"]),
    ({"prompt": "def f(", "suffix": "return x"}, ["<before>def f(</before>\n<after>return x</after>"]),
    ({"prompt": "", "suffix": "b"}, ["<before></before>\n<after>b</after>"]),
    ({"prompt": "a\nb", "suffix": "", "stop": "\n"}, ["a"]),
    ({"prompt": "a\nb", "stop": "\n", "echo": True}, ["a\nba"]),
    ({"prompt": "a", "suffix": "b", "echo": True}, ["a<before>a</before>\n<after>b</after>"]),
    ({"prompt": " a", "logprobs": None, "best_of": 1, "max_tokens": 5, "user": "u"}, [" a"]),
    ({"prompt": "a", "n": None, "echo": None, "suffix": None, "stop": None, "stream_options": None}, ["a"])])
def test_each_prompt_is_completed_in_its_order(stage: Stage, fields: Json, answers: List[str]) -> None:
    if fields.get("stream_options", 1) is None:
        assert stage.ask(COMPLETIONS, "echo", **fields) == answers
    else:
        assert completion(stage, **fields) == answers




@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/completions", COMPLETIONS + "?api-version=1"])
def test_a_whole_completion_has_all_its_fields(client: Client, path: str) -> None:
    reply = client.call("POST", path, {"model": "echo", "prompt": "one two", "temperature": 0, "suffix": None})
    answer = reply.json
    assert answer.pop("id").startswith("cmpl-") and isinstance(answer.pop("created"), int)
    assert answer.pop("usage").keys() >= {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert answer.pop("system_fingerprint").startswith("clinvk-")
    assert answer == {"object": "text_completion", "model": "echo", "choices": [
        {"index": 0, "text": "one two", "finish_reason": "stop", "logprobs": None}]}
    assert reply.headers["x-clinvk-backend"] == "echo"
    assert "temperature" in reply.headers["x-clinvk-ignored"].split(", ")


def test_a_streamed_completion_has_the_same_fields_in_each_chunk(client: Client) -> None:
    body = {"model": "echo", "prompt": "one two", "stream": True, "echo": True}
    *chunks, end = client.call("POST", COMPLETIONS, body).data
    for chunk in chunks:
        assert chunk.pop("id").startswith("cmpl-") and chunk.pop("created") and chunk.pop("system_fingerprint")
        assert (chunk.pop("object"), chunk.pop("model")) == ("text_completion", "echo")
    pieces = ["one two", "one ", "two", ""]
    assert end == "[DONE]" and chunks == [{"choices": [{
        "index": 0, "text": text, "finish_reason": None if text else "stop", "logprobs": None}]} for text in pieces]


@pytest.mark.parametrize("suffix, told", [(None, "You complete texts."), ("return x", "You fill gaps in texts.")])
def test_the_cli_is_told_what_to_do_with_the_text(stage: Stage, suffix: Optional[str], told: str) -> None:
    stage.answers(["x"])
    assert stage.ask(COMPLETIONS, prompt="def f(", suffix=suffix) == ["x"]
    [run] = stage.told
    system, _, prompt = run["prompt"].partition("\n\n")
    assert system.startswith(told) and prompt == (
        f"<before>def f(</before>\n<after>{suffix}</after>" if suffix else "def f(")


@pytest.mark.parametrize("fields, place, told", [
    ({"prompt": None}, "prompt", "is required"), ({"prompt": ""}, "prompt", "no text"),
    ({"prompt": []}, "prompt", "not be empty"), ({"prompt": ["a", " \n"]}, "prompt", "have no text"),
    ({"prompt": [1, 2]}, "prompt[0]", "a string"), ({"prompt": [[1]]}, "prompt[0]", "a string"),
    ({"prompt": ["a"] * 17}, "prompt", "at most 16"), ({"prompt": 1}, "prompt", "a string or a list"),
    ({"logprobs": 1}, "logprobs", "not given by any CLI"), ({"logprobs": 0}, "logprobs", "not given by any CLI"),
    ({"best_of": 2}, "best_of", "must be 1"), ({"best_of": 0}, "best_of", "at least 1"),
    ({"suffix": 1}, "suffix", "a string"), ({"echo": "yes"}, "echo", "true or false"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"), ({"stop": list("abcde")}, "stop", "at most 4")])
def test_what_no_cli_can_do_is_a_400_that_names_it(stage: Stage, fields: Json, place: str, told: str) -> None:
    reply = stage.post(COMPLETIONS, "echo", **fields)
    assert reply.status == 400 and told in fault(reply, "openai") and reply.json["error"]["param"] == place


def test_openai_python_reads_completions(stage: Stage) -> None:
    openai, http = pytest.importorskip("openai"), pytest.importorskip("httpx2")

    def answer(request: Any) -> Any:
        reply = stage.client.call("POST", request.url.path, request.content)
        return http.Response(reply.status, content=reply.body, headers={"Content-Type": reply.headers["content-type"]})
    client = openai.OpenAI(api_key="k", base_url="http://localhost/openai/v1",
                           http_client=http.Client(transport=http.MockTransport(answer)))
    told = client.completions.create(model="echo", prompt=["one two", "three"], echo=True)
    type(told).model_validate(told.to_dict(), strict=True)
    assert [choice.text for choice in told.choices] == ["one twoone two", "threethree"]
    chunks = list(client.completions.create(model="echo", prompt="one two", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    chats = client.chat.completions.create(model="echo", n=3, messages=[{"role": "user", "content": "hi"}])
    assert [choice.message.content for choice in chats.choices] == ["hi"] * 3
