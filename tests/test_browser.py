"""A web page must not be able to drive the CLIs (SPEC 7): real pages in a real Chromium against a real server.

Whether anything ran is told by the CLI itself, which leaves a line for each start; what arrived by the server's log."""

import contextlib
import http.server
import json
import re
import shutil
import threading
import urllib.parse
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple, TypeVar

import pytest
import yaml
from conftest import Reply, Served, eventually, serving

sync_api = pytest.importorskip("playwright.sync_api")  # it needs a Python from 3.10 on
pytestmark = pytest.mark.browser

KEY = "right-key"
SECRET = "the first prompt of a session"
ANY = 0
Page = Any


# ---- The browser, the servers, the pages of others

@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, less its own guard of local servers (a question to the user): other browsers have none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, ("these tests need Chromium, and neither chromium nor google-chrome is on PATH. Install it "
                     '(Debian: apt-get install chromium), or leave them out with -m "not browser"')
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=[
            "--no-sandbox", "--disable-features=LocalNetworkAccessChecks",
            "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP good.example 127.0.0.1"])


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page with nothing of another test in its browser."""
    with contextlib.closing(browser.new_context()) as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


class Target(NamedTuple):
    """A server whose backend `witness` leaves a line in `trace` whenever it is started; `patient` prints "first", and
    "last" when the file `go` is there; `broken` fails."""
    server: Served
    trace: Path
    go: Path

    @property
    def runs(self) -> int:
        return len(self.trace.read_text().splitlines())

    @property
    def end_of_log(self) -> int:
        return self.server.stderr_file.stat().st_size

    def requests(self, since: int) -> List[Tuple[str, str, int]]:
        """Method, path and status of all that was answered since the log ended there; icons of pages aside."""
        with self.server.stderr_file.open() as log:
            log.seek(since)
            found = re.findall(r" ([A-Z]+) (/\S*) (\d+) \d+ ms ", log.read())
        return [(method, path, int(status)) for method, path, status in found if path != "/favicon.ico"]

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """As `Served.call`; on return the log has it."""
        since = self.end_of_log
        reply = self.server.call(method, path, body, **headers)
        eventually(lambda: (method, path, reply.status) in self.requests(since))
        return reply

    def check_arrived(self, since: int, expected: List[Tuple[str, str, int]], label: str) -> None:
        """Waits for as many requests, which must be these and no more. A status may be ANY."""
        with contextlib.suppress(AssertionError):  # what did arrive tells more
            eventually(lambda: len(self.requests(since)) >= len(expected))
        found = [(method, path, ANY if (method, path, ANY) in expected else status)
                 for method, path, status in self.requests(since)]
        assert (label, sorted(found)) == (label, sorted(expected))


Start = Callable[..., Target]


@pytest.fixture(scope="module")
def start(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start(server settings, **environ)`; all that was started is stopped afterwards."""
    folder = tmp_path_factory.mktemp("browser")
    trace, go = folder / "trace", folder / "go"
    trace.write_text("")
    scripts = {"witness": f"echo started >> {trace}; cat", "broken": "cat > /dev/null; exit 3",
               "patient": f"echo first; until [ -e {go} ]; do sleep 0.02; done; echo last"}
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    backends = {name: {"command": str(folder / name)} for name in scripts}
    (folder / "page.html").write_text("<p>a page")
    with serving(pyz, folder) as serve:
        yield lambda settings=None, **environ: Target(
            serve(config={"backends": backends, "server": settings or {}}, **environ), trace, go)


@pytest.fixture(scope="module")
def targets(start: Start) -> List[Target]:
    """A server that is open to this machine, with a stored session, and one that asks for a key."""
    found = [start(), start(CLINVK_API_KEYS=KEY)]
    assert found[0].call("POST", "/api/v1/prompt", {"backend": "echo", "prompt": SECRET}).status == 200
    return found


class Others(http.server.BaseHTTPRequestHandler):
    """Pages of somebody else: an empty one; `/sandbox`, with a frame of no origin; `/sent-on?TO`, which sends whatever
    comes on to another place; `/reporting?TO`, whose faults the browser shall report there; `/worker.js`."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        to = urllib.parse.unquote(query)
        body, headers = "<!doctype html><p>a page", {"Content-Type": "text/html"}
        if path == "/sandbox":
            body = '<iframe sandbox="allow-scripts allow-forms allow-popups" srcdoc="<p>a page"></iframe>'
        elif path == "/reporting":
            body, headers["Content-Security-Policy"] = "<img src=/x>", f"img-src 'none'; report-uri {to}"
        elif path == "/worker.js":
            body, headers = WORKER, {"Content-Type": "text/javascript"}
        elif path == "/sent-on":
            headers["Location"] = to
        asked = self.headers.get("Access-Control-Request-Headers", "")
        headers.update({"Content-Length": str(len(body)), "Access-Control-Allow-Headers": asked,
                        "Access-Control-Allow-Origin": self.headers.get("Origin", "*"),
                        "Access-Control-Allow-Credentials": "true"})
        self.send_response(307 if path == "/sent-on" and self.command != "OPTIONS" else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    do_OPTIONS = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the server's log is the one to read."""


WORKER = """
self.addEventListener('activate', event => event.waitUntil(self.clients.claim()))
self.addEventListener('message', async event => {
  const [url, options] = event.data
  const said = await fetch(url, options).then(answer => answer.text(), error => String(error))
  event.source ? event.source.postMessage(said) : self.postMessage(said)
})
"""


@pytest.fixture(scope="module")
def others() -> Iterator[int]:
    """The port of `Others`, on 127.0.0.1."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Others) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


class Origin(NamedTuple):
    """Where an attacking page comes from, and what it calls the server; `{port}` is the server's, `{others}` that of
    another one. On the server's own port the page is what a name gave that now leads to the server: DNS rebinding."""
    page: str
    target: str = "http://127.0.0.1:{port}"


ORIGINS = {
    "another port": Origin("http://127.0.0.1:{others}/"), "localhost": Origin("http://localhost:{others}/"),
    "another site": Origin("http://evil.example:{others}/", "http://localhost:{port}"),
    "another site, to 0.0.0.0": Origin("http://evil.example:{others}/", "http://0.0.0.0:{port}"),
    "rebound": Origin("http://evil.example:{port}/", "http://evil.example:{port}"),
    "rebound by itself": Origin("http://evil.localhost:{port}/", "http://evil.localhost:{port}"),
    "rebound, to another name": Origin("http://evil.example:{port}/"),
    "sandbox": Origin("http://127.0.0.1:{others}/sandbox"), "data": Origin("data:text/html,<p>a page"),
    "file": Origin("file://{folder}/page.html")}

THOROUGH = ("another port", "another site", "rebound", "sandbox")  # one of each kind
CASES = [*((name, False) for name in ORIGINS), *((name, True) for name in THOROUGH)]  # with, and without API keys
Row = TypeVar("Row")


class Attacker(NamedTuple):
    """A page of another origin: the frame that attacks, and how it calls the server."""
    frame: Any
    url: str
    target: Target
    is_same: bool  # the browser takes the server for the page's own
    is_thorough: bool

    def rows(self, table: Dict[str, Row]) -> Dict[str, Row]:
        """All of a table, or those that `USUAL` names."""
        return table if self.is_thorough else {name: table[name] for name in USUAL if name in table}


USUAL = ("form, text/plain", "text", "Blob without a type", "beacon, text", "JSON", "JSON, with cookies",
         "fetch", "script", "iframe", "WebSocket")


def opened(page: Page, name: str, target: Target, others: int, keyed: bool = False) -> Attacker:
    origin, places = ORIGINS[name], {"port": target.server.port, "others": others, "folder": target.trace.parent}
    url = origin.page.format(**places)
    if "{port}" in origin.page:  # what the name led to when the page was loaded
        page.route(url, lambda route: route.fulfill(content_type="text/html", body="<p>a page"))
    page.goto(url)
    page.unroute_all()
    return Attacker(page.frames[-1], origin.target.format(**places), target, origin.page == origin.target + "/",
                    name in THOROUGH and not keyed)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0] + ", keys" * case[1])
def attacker(browser: Any, targets: List[Target], others: int, request: Any) -> Iterator[Attacker]:
    """A page of each origin, on servers with and without API keys."""
    name, keyed = request.param
    with contextlib.closing(browser.new_context()) as context:
        yield opened(context.new_page(), name, targets[keyed], others, keyed)


def driven(frame: Any, script: str, *calls: Tuple[str, str], own: str = "") -> Any:
    """What a page's script gives for each call, a URL and a body; all of them at once."""
    return frame.evaluate(f"([own, calls]) => Promise.all(calls.map(async ([url, body]) => {{ {TOOLS}\n{script} }}))",
                          [own, [list(call) for call in calls]])


TOOLS = f"const worker_code = {json.dumps(WORKER)}" + """
const add = (tag, attributes) => {
  const made = Object.assign(document.createElement(tag), attributes)
  document.body.append(made)
  return made
}
const ended = (made, ...events) => new Promise(done => events.forEach(name => made.addEventListener(name, done)))
const aside = () => add('iframe', {name: 'frame' + Math.random()}).name  // where a form's answer may go
const form = (enctype, target, fields, action = url) => {
  const made = add('form', {action, method: 'post', enctype, target})
  for (const [name, value] of fields) made.append(Object.assign(document.createElement('input'), {name, value}))
  made.submit()
}
const halves = [body.slice(0, body.indexOf('=')), body.slice(body.indexOf('=') + 1)]  // name=value is the body
const send = options => fetch(url, {method: 'POST', ...options}).then(answer => answer.text(), error => String(error))
const blind = options => send({mode: 'no-cors', ...options})
const through = () => own + '/sent-on?' + encodeURIComponent(url)
const shown = made => {
  try { return made.contentDocument.body.innerText } catch (error) { return String(error) }
}
const json_blob = {type: 'application/json'}
const json = {'Content-Type': 'application/json'}
const typed = type => made => made.setRequestHeader('Content-Type', type)
const worker = async options => {
  const made = new Worker(URL.createObjectURL(new Blob([worker_code])))
  const over = ended(made, 'message', 'error')
  made.postMessage([url, options])
  return (await over).data
}
const xhr = async (prepare, method = 'POST') => {
  const made = new XMLHttpRequest()
  made.open(method, url)
  prepare(made)
  const over = ended(made, 'loadend')
  made.send(body)
  await over
  return made.responseText
}
"""


# ---- Requests that would start a run

CHAT = {"model": "witness", "messages": [{"role": "user", "content": "1+1=?"}]}
RUNS: Dict[str, Any] = {"/api/v1/prompt": {"backend": "witness", "prompt": "1+1=?", "ephemeral": True},
                        "/openai/v1/chat/completions": CHAT, "/anthropic/v1/messages": {**CHAT, "max_tokens": 9}}


class Attack(NamedTuple):
    """What a page does to post `body` to `url`; the status that the server's own page gets, which shows that the
    attempt is a real one; whether the browser asks first if the server is another origin's."""
    script: str
    at_home: int
    asks_first: bool = False


ATTACKS = {
    "form, text/plain": Attack("form('text/plain', aside(), [halves])", 415),
    "form, text/plain, new window": Attack("form('text/plain', '_blank', [halves])", 415),
    "form, urlencoded": Attack("form('application/x-www-form-urlencoded', aside(), [halves])", 415),
    "form, multipart": Attack("form('multipart/form-data', aside(), [halves])", 415),
    "text": Attack("await blind({body})", 415),
    "text, with cookies": Attack("await blind({body, credentials: 'include'})", 415),
    "text, after the page": Attack("await blind({body, keepalive: true})", 415),
    "text, to be read": Attack("await send({body})", 415),
    "text, said to be JSON": Attack("await blind({body, headers: json})", 415),
    "text and JSON": Attack("await send({body, headers: {'Content-Type': 'text/plain; application/json'}})", 415),
    "Blob without a type": Attack("await blind({body: new Blob([body])})", 415),
    "Blob of JSON": Attack("await blind({body: new Blob([body], json_blob)})", 415),
    "bytes": Attack("await blind({body: new TextEncoder().encode(body)})", 415),
    "URLSearchParams": Attack("await blind({body: new URLSearchParams([halves])})", 415),
    "FormData": Attack("const d = new FormData(); d.append(...halves); await blind({body: d})", 415),
    "beacon, text": Attack("navigator.sendBeacon(url, body)", 415),
    "beacon, Blob without a type": Attack("navigator.sendBeacon(url, new Blob([body]))", 415),
    "beacon, Blob of text": Attack("navigator.sendBeacon(url, new Blob([body], {type: 'text/plain'}))", 415),
    "beacon, URLSearchParams": Attack("navigator.sendBeacon(url, new URLSearchParams([halves]))", 415),
    "beacon, Blob of JSON": Attack("navigator.sendBeacon(url, new Blob([body], json_blob))", 200, True),
    "ping of a link": Attack("add('a', {href: 'about:blank', target: aside(), ping: url}).click()", 415),
    "XMLHttpRequest, text": Attack("await xhr(typed('text/plain'))", 415),
    "XMLHttpRequest, watched": Attack("await xhr(it => { it.upload.onprogress = () => 0 })", 415, True),
    "XMLHttpRequest, JSON": Attack("await xhr(typed('application/json'))", 200, True),
    "JSON": Attack("await send({body, headers: json})", 200, True),
    "JSON, with cookies": Attack("await send({body, headers: json, credentials: 'include'})", 200, True),
    "JSON, with a key": Attack("await send({body, headers: {...json, Authorization: 'Bearer x'}})", 200, True),
    "JSON from a worker": Attack("await worker({method: 'POST', body, headers: json})", 200, True)}


def calls(url: str) -> List[Tuple[str, str]]:
    return [(url + path, json.dumps(body)) for path, body in RUNS.items()]


def test_no_page_of_another_origin_can_start_a_run(attacker: Attacker) -> None:
    target = attacker.target
    ran = target.runs
    for name, attack in attacker.rows(ATTACKS).items():
        since, method = target.end_of_log, "OPTIONS" if attack.asks_first and not attacker.is_same else "POST"
        driven(attacker.frame, attack.script, *calls(attacker.url))
        target.check_arrived(since, [(method, path, 403) for path in RUNS], name)
        assert target.runs == ran, name


def test_the_same_attempts_of_its_own_page_run_if_they_are_json(page: Page, targets: List[Target]) -> None:
    target = targets[0]
    page.goto(target.server.url + "/health")
    for name, attack in ATTACKS.items():
        since, ran = target.end_of_log, target.runs
        driven(page, attack.script, *calls(target.server.url))
        target.check_arrived(since, [("POST", path, attack.at_home) for path in RUNS], name)
        assert target.runs == ran + (len(RUNS) if attack.at_home == 200 else 0), name


# What the attacker's own server takes part in: the method that arrives, and the script.
SENT_ON = {
    "form": ("POST", "form('text/plain', aside(), [halves], through())"),
    "text": ("POST", "await fetch(through(), {method: 'POST', mode: 'no-cors', body})"),
    "text, to be read": ("POST", "await fetch(through(), {method: 'POST', body}).catch(String)"),
    "JSON": ("OPTIONS", "await fetch(through(), {method: 'POST', body, headers: json}).catch(String)"),
    "beacon": ("POST", "navigator.sendBeacon(through(), body)"),
    "report of a fault": ("POST", "add('iframe', {src: own + '/reporting?' + encodeURIComponent(url)})")}


@pytest.mark.parametrize("name", ["another port", "another site", "sandbox"])
def test_no_page_can_start_a_run_by_way_of_its_own_server(page: Page, targets: List[Target], others: int,
                                                          name: str) -> None:
    attacker, target = opened(page, name, targets[0], others), targets[0]
    ran = target.runs
    for way, (method, script) in SENT_ON.items():
        since = target.end_of_log
        driven(attacker.frame, script, *calls(attacker.url), own=f"http://127.0.0.1:{others}")
        target.check_arrived(since, [(method, path, 403) for path in RUNS], way)
        assert target.runs == ran, way


@pytest.mark.parametrize("name", ["another site", "rebound", "sandbox"])
def test_no_form_can_take_the_place_of_its_page(page: Page, targets: List[Target], others: int, name: str) -> None:
    target, path = targets[0], "/api/v1/prompt"
    for place in ("_self", "_top", "_blank"):
        attacker = opened(page.context.new_page(), name, target, others)
        script = f"form('text/plain', '{place}', [halves])"
        since, ran = target.end_of_log, target.runs
        driven(attacker.frame, script, (attacker.url + path, json.dumps(RUNS[path])))
        is_kept_in = (name, place) == ("sandbox", "_top")
        target.check_arrived(since, [] if is_kept_in else [("POST", path, 403)], place)
        assert target.runs == ran, place


def test_no_body_is_taken_for_a_request(page: Page, start: Start, others: int) -> None:
    """Below `max_request_body_bytes`, above it, and more than the server reads: what follows a refusal is not read."""
    target = start({"max_request_body_bytes": 1_000})
    page.goto(f"http://127.0.0.1:{others}/")
    url, prompt, ran = target.server.url, json.dumps(RUNS["/api/v1/prompt"]), target.runs
    hidden = (f"POST /api/v1/prompt HTTP/1.1\r\nHost: 127.0.0.1:{target.server.port}\r\n"
              f"Content-Type: application/json\r\nContent-Length: {len(prompt)}\r\n\r\n{prompt}")
    for size in (300, 3_000, 300_000):
        since = target.end_of_log
        driven(page, "await blind({body})", (url + "/api/v1/prompt", hidden.ljust(size)))
        driven(page, "await fetch(url, {mode: 'no-cors'})", (url + "/health", ""))
        posted = ("POST", "/api/v1/prompt", 403 if size < 4_000 else 413)  # waitress refuses the largest by itself
        target.check_arrived(since, [posted, ("GET", "/health", ANY)], f"{size} bytes")
        assert target.runs == ran, f"{size} bytes"


# ---- Requests that would read, or delete

class Look(NamedTuple):
    """What a page does to read `url`; whether it can, on the server's own origin."""
    script: str
    reads_at_home: bool = False


ELEMENT = "const made = add('%s', {%s}); await ended(made, 'load', 'error', 'loadeddata'); return shown(made)"
LOOKS = {
    "fetch": Look("return fetch(url).then(a => a.text(), String)", True),
    "fetch, with cookies": Look("return fetch(url, {credentials: 'include'}).then(a => a.text(), String)", True),
    "fetch, blind": Look("return fetch(url, {mode: 'no-cors'}).then(a => a.text(), String)", True),
    "XMLHttpRequest": Look("return await xhr(() => 0, 'GET')", True),
    "worker": Look("return await worker({})", True),
    "EventSource": Look("const made = new EventSource(url); const said = await ended(made, 'error', 'message')\n"
                        "made.close(); return said.type + said.data"),
    "WebSocket": Look("const said = await ended(new WebSocket(url.replace('http', 'ws')), 'close', 'message')\n"
                      "return said.type + said.code + said.reason + said.data"),
    "import": Look("return import(url).then(JSON.stringify, String)"),
    "script": Look(ELEMENT % ("script", "src: url")),
    "script, with CORS": Look(ELEMENT % ("script", "crossOrigin: '', src: url")),
    "img": Look(ELEMENT % ("img", "src: url")),
    "img, with CORS": Look(ELEMENT % ("img", "crossOrigin: '', src: url")),
    "audio": Look(ELEMENT % ("audio", "src: url")),
    "stylesheet": Look(ELEMENT % ("link", "rel: 'stylesheet', href: url")),
    "prefetch": Look(ELEMENT % ("link", "rel: 'prefetch', href: url")),
    "preload": Look(ELEMENT % ("link", "rel: 'preload', as: 'fetch', crossOrigin: '', href: url")),
    "iframe": Look(ELEMENT % ("iframe", "src: url"), True),
    "object": Look(ELEMENT % ("object", "data: url"), True),
    "embed": Look(ELEMENT % ("embed", "src: url")),
    "window": Look("const made = open(url); let text = ''\n"
                   "while (!text) { await new Promise(done => setTimeout(done, 20))\n"
                   "  try { text = made.document.body.innerText } catch (error) { text = String(error) } }\n"
                   "return text", True)}


@pytest.fixture
def stored(targets: List[Target]) -> List[str]:
    """The paths that tell of the stored session."""
    sessions = targets[0].call("GET", "/api/v1/sessions").json["sessions"]
    [session_id] = [session["id"] for session in sessions if session["initial_prompt"] == SECRET]
    return ["/api/v1/sessions", "/api/v1/sessions/" + session_id]


def test_no_page_of_another_origin_can_read(attacker: Attacker, stored: List[str]) -> None:
    target = attacker.target
    ran = target.runs
    for name, look in attacker.rows(LOOKS).items():
        is_followed = name == "window" and not attacker.is_same  # as a link on another page is
        since, status = target.end_of_log, ANY if is_followed else 403
        told = driven(attacker.frame, look.script, *[(attacker.url + path, "") for path in stored])
        assert SECRET not in str(told), name
        target.check_arrived(since, [("GET", path, status) for path in stored], name)
        assert target.runs == ran, name


def test_its_own_page_reads_what_the_browser_shows_it(page: Page, targets: List[Target], stored: List[str]) -> None:
    page.goto(targets[0].server.url + "/health")
    for name, look in LOOKS.items():
        told = driven(page, look.script, *[(targets[0].server.url + path, "") for path in stored])
        assert [SECRET in str(each) for each in told] == [look.reads_at_home] * len(stored), (name, told)


CHANGES = ["await fetch(url, {method: '%s'}).catch(String)", "await xhr(() => 0, '%s')",
           "await fetch(url, {method: '%s', credentials: 'include', headers: {'X-Api-Key': 'x'}}).catch(String)"]


def test_no_page_of_another_origin_can_delete(attacker: Attacker, targets: List[Target], stored: List[str]) -> None:
    target = attacker.target
    for method in ("DELETE", "PUT") if attacker.is_thorough else ("DELETE",):
        for script in CHANGES:
            since, arrives = target.end_of_log, method if attacker.is_same else "OPTIONS"
            driven(attacker.frame, script % method, *[(attacker.url + path, "") for path in stored])
            target.check_arrived(since, [(arrives, path, 403) for path in stored], script % method)
    assert targets[0].call("GET", stored[1]).status == 200


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_service_worker_of_another_origin_can_neither_run_nor_read(page: Page, targets: List[Target], others: int,
                                                                     stored: List[str], name: str) -> None:
    """Only an origin that the browser trusts has one; a local one it does."""
    target, script = targets[0], """
const made = navigator.serviceWorker
await made.register('/worker.js')
const active = (await made.ready).active
const said = new Promise(done => { made.onmessage = event => done(event.data) })
active.postMessage([url, JSON.parse(body)])
return await said"""
    page.goto(f"http://{name}:{others}/")
    run = {"method": "POST", "body": json.dumps(RUNS["/api/v1/prompt"])}
    for path, options, arrives in [
            ("/api/v1/prompt", run, ("POST", 403)), ("/api/v1/prompt", {**run, "mode": "no-cors"}, ("POST", 403)),
            ("/api/v1/prompt", {**run, "headers": {"Content-Type": "application/json"}}, ("OPTIONS", 403)),
            (stored[0], {}, ("GET", 403)), (stored[0], {"mode": "no-cors"}, ("GET", ANY))]:
        since, ran = target.end_of_log, target.runs
        told = driven(page, script, (target.server.url + path, json.dumps(options)))
        assert SECRET not in str(told)
        target.check_arrived(since, [(arrives[0], path, arrives[1])], str(options))
        assert target.runs == ran


# ---- Pages that the config allows

@pytest.fixture(scope="module")
def friendly(start: Start, others: int) -> Target:
    """A server that asks for a key, and lets in one origin and all the ports of another."""
    allowed = [f"http://good.example:{others}", "http://localhost:*"]
    return start({"cors_allowed_origins": allowed}, CLINVK_API_KEYS=KEY)


FRIENDS = ("good.example", "localhost")
CALL = """
const [method, headers, text] = JSON.parse(body)
const told = await fetch(url, {method, headers, body: text === null ? undefined : JSON.stringify(text)})
return {status: told.status, headers: Object.fromEntries(told.headers), body: await told.text()}"""
JSON_TYPE, OWN_ID = {"Content-Type": "application/json"}, {"X-Request-Id": "the-pages-own"}
KEYED = {**JSON_TYPE, "X-Api-Key": KEY}


def called(page: Page, target: Target, method: str, path: str, headers: Dict[str, str], body: Any = None,
           base: str = "") -> Any:
    """What a page reads of an answer: its status, headers and text. On return the log has the request."""
    since = target.end_of_log
    [told] = driven(page, CALL, ((base or target.server.url) + path, json.dumps([method, headers, body])))
    eventually(lambda: (method, path, told["status"]) in target.requests(since))
    return told


@pytest.mark.parametrize("name", FRIENDS)
def test_a_page_that_is_allowed_runs_and_reads(page: Page, friendly: Target, others: int, name: str) -> None:
    page.goto(f"http://{name}:{others}/")
    for path, body in RUNS.items():
        for key in ({"X-Api-Key": KEY}, {"Authorization": f"Bearer {KEY}"}):
            since, ran = friendly.end_of_log, friendly.runs
            told = called(page, friendly, "POST", path, {**JSON_TYPE, **OWN_ID, **key}, body)
            assert (told["status"], told["headers"]["x-request-id"]) == (200, "the-pages-own")
            assert "1+1=?" in told["body"] and friendly.runs == ran + 1
            friendly.check_arrived(since, [("OPTIONS", path, 204), ("POST", path, 200)], path)


EXPOSED = [("/openai/v1/chat/completions", CHAT, "x-clinvk-backend", "witness"),
           ("/openai/v1/chat/completions", {**CHAT, "temperature": 1}, "x-clinvk-ignored", "temperature"),
           ("/openai/v1/chat/completions", {**CHAT, "model": "broken"}, "x-should-retry", "false"),
           ("/anthropic/v1/messages/count_tokens", CHAT, "x-clinvk-estimate", "true"),
           ("/anthropic/v1/messages", {**CHAT, "max_tokens": 9}, "request-id", "the-pages-own")]


def test_a_page_that_is_allowed_reads_the_servers_own_headers(page: Page, friendly: Target, others: int) -> None:
    page.goto(f"http://good.example:{others}/")
    for path, body, name, value in EXPOSED:
        told = called(page, friendly, "POST", path, {**KEYED, **OWN_ID}, body)
        assert told["headers"].get(name) == value, name


ERRORS: List[Tuple[int, str, str, Dict[str, str], Any, str]] = [
    (401, "POST", "/api/v1/prompt", JSON_TYPE, RUNS["/api/v1/prompt"], "X-Api-Key"),
    (401, "GET", "/api/v1/sessions", {"X-Api-Key": "wrong"}, None, "X-Api-Key"),
    (422, "POST", "/api/v1/prompt", KEYED, {"backend": "witness", "promt": "a"}, "did you mean"),
    (404, "GET", "/api/v1/sessions/ffffffff", KEYED, None, "ffffffff"),
    (404, "POST", "/openai/v1/chat/completions", KEYED, {**CHAT, "model": "witnes"}, "model_not_found"),
    (400, "POST", "/anthropic/v1/messages", KEYED, CHAT, "max_tokens"),
    (403, "POST", "/api/v1/prompt", KEYED, {**RUNS["/api/v1/prompt"], "workdir": "/etc"}, "workdir"),
    (415, "POST", "/api/v1/prompt", {"Content-Type": "text/plain", "X-Api-Key": KEY}, {}, "application/json"),
    (405, "DELETE", "/api/v1/prompt", KEYED, None, "POST"), (404, "GET", "/nothing", KEYED, None, "/nothing")]


@pytest.mark.parametrize("name", FRIENDS)
def test_a_page_that_is_allowed_reads_errors(page: Page, friendly: Target, others: int, name: str) -> None:
    page.goto(f"http://{name}:{others}/")
    for status, method, path, headers, body, words in ERRORS:
        told = called(page, friendly, method, path, headers, body)
        assert told["status"] == status and words in told["body"], told
        assert told["headers"]["x-request-id"]


PATIENT = {**CHAT, "model": "patient", "stream": True}
STREAMS: Dict[str, Any] = {
    "/api/v1/prompt": {"backend": "patient", "prompt": "a", "output_format": "stream-json"},
    "/openai/v1/chat/completions": PATIENT, "/anthropic/v1/messages": {**PATIENT, "max_tokens": 9}}
BEGIN = """
const options = {method: 'POST', body, headers: {...json, 'X-Api-Key': 'right-key'}}
window.reader = (await fetch(url, options)).body.pipeThrough(new TextDecoderStream()).getReader()"""
READ_ON = """
let text = ''
for (;;) {
  const {value, done} = await window.reader.read()
  text += value || ''
  if (done || text.includes(body)) return text
}"""


@pytest.mark.parametrize("path", STREAMS)
def test_a_page_that_is_allowed_reads_a_stream_as_it_comes(page: Page, friendly: Target, others: int,
                                                           path: str) -> None:
    friendly.go.unlink(missing_ok=True)
    page.goto(f"http://localhost:{others}/")
    since = friendly.end_of_log
    driven(page, BEGIN, (friendly.server.url + path, json.dumps(STREAMS[path])))
    [begun] = driven(page, READ_ON, ("", "first"))
    assert "first" in begun and "last" not in begun
    friendly.go.touch()
    assert "last" in driven(page, READ_ON, ("", "what is never said"))[0]
    friendly.check_arrived(since, [("OPTIONS", path, 204), ("POST", path, 200)], path)


def test_a_run_ends_with_its_page(page: Page, friendly: Target, others: int) -> None:
    friendly.go.unlink(missing_ok=True)
    page.goto(f"http://localhost:{others}/")
    since, path = friendly.end_of_log, "/api/v1/prompt"
    driven(page, BEGIN, (friendly.server.url + path, json.dumps(STREAMS[path])))
    driven(page, READ_ON, ("", "first"))
    eventually(lambda: friendly.call("GET", "/health").json["runs"]["active"] == 1)  # those before have gone
    page.close()
    eventually(lambda: ("POST", path, 200) in friendly.requests(since))
    eventually(lambda: friendly.call("GET", "/health").json["runs"]["active"] == 0)


def test_a_page_that_is_allowed_deletes(page: Page, friendly: Target, others: int) -> None:
    page.goto(f"http://good.example:{others}/")
    body = {"backend": "echo", "prompt": "a"}
    made = json.loads(called(page, friendly, "POST", "/api/v1/prompt", KEYED, body)["body"])["session_id"]
    deleted = called(page, friendly, "DELETE", f"/api/v1/sessions/{made}", KEYED)
    assert json.loads(deleted["body"]) == {"deleted": True, "id": made}


@pytest.mark.parametrize("name", ["127.0.0.1", "evil.example"])
def test_what_is_allowed_to_some_is_not_allowed_to_others(page: Page, friendly: Target, others: int, name: str) -> None:
    page.goto(f"http://{name}:{others}/")
    since, ran = friendly.end_of_log, friendly.runs
    with pytest.raises(sync_api.Error, match="Failed to fetch"):
        called(page, friendly, "POST", "/api/v1/prompt", KEYED, RUNS["/api/v1/prompt"])
    friendly.check_arrived(since, [("OPTIONS", "/api/v1/prompt", 403)], name)
    assert friendly.runs == ran


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_the_servers_own_pages_run_and_read(page: Page, targets: List[Target], name: str) -> None:
    target = targets[1]
    own = f"http://{name}:{target.server.port}"
    page.goto(own + "/health")
    for path, body in RUNS.items():
        told = called(page, target, "POST", path, KEYED, body, own)
        assert told["status"] == 200 and "1+1=?" in told["body"]
    assert called(page, target, "GET", "/api/v1/sessions", {}, base=own)["status"] == 401


@pytest.mark.parametrize("allows_credentials", [False, True])
def test_cookies_may_come_along_only_if_the_config_says_so(page: Page, start: Start, others: int,
                                                           allows_credentials: bool) -> None:
    target = start({"cors_allowed_origins": [f"http://good.example:{others}"],
                    "cors_allow_credentials": allows_credentials})
    page.goto(f"http://good.example:{others}/")
    ran, path = target.runs, "/api/v1/prompt"
    [told] = driven(page, "return await send({body, headers: json, credentials: 'include'})",
                    (target.server.url + path, json.dumps(RUNS[path])))
    assert ("1+1=?" in told, target.runs - ran) == (allows_credentials, int(allows_credentials))


def test_any_page_may_call_if_the_config_says_so_and_needs_the_key(page: Page, start: Start, others: int) -> None:
    target = start({"cors_allowed_origins": ["*"]}, CLINVK_API_KEYS=KEY)
    page.goto(f"http://evil.example:{others}/")
    path, ran = "/api/v1/prompt", target.runs
    told = [called(page, target, "POST", path, headers, RUNS[path])["status"] for headers in (JSON_TYPE, KEYED)]
    assert told == [401, 200] and target.runs == ran + 1


def test_the_line_that_a_refusal_names_lets_the_page_in(page: Page, targets: List[Target], start: Start,
                                                        others: int) -> None:
    """A developer sees the refusal with curl, does what it says, and it works."""
    origin, body = f"http://good.example:{others}", RUNS["/api/v1/prompt"]
    refused = targets[0].call("POST", "/api/v1/prompt", body, Origin=origin)
    named = re.search(r"set server\.(cors_allowed_origins: .*\])", refused.json["detail"])
    assert refused.status == 403 and named
    target = start(yaml.safe_load(named[1]))
    page.goto(origin)
    told = called(page, target, "POST", "/api/v1/prompt", JSON_TYPE, body)
    assert told["status"] == 200 and "1+1=?" in told["body"]


# ---- /docs

class Docs:
    """The page /docs in the browser: what it has asked for, and what its console complains of."""

    def __init__(self, page: Page, target: Target, query: str = "") -> None:
        self.page, self.asked, self.faults = page, [], []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.goto(f"{target.server.url}/docs{query}")
        page.locator(".opblock").first.wait_for()

    def execute(self, path: str, body: Any = None) -> Tuple[int, str]:
        """"Try it out": the status and the answer that the page then shows."""
        call = self.page.locator(".opblock", has=self.page.locator(f'[data-path="{path}"]'))
        if not call.locator(".opblock-body").count():
            call.locator(".opblock-summary-control").click()
        if body is not None:
            call.locator("textarea").fill(json.dumps(body))
        call.get_by_role("button", name="Execute").click()
        call.locator(".live-responses-table").wait_for()
        shown = str(call.locator(".live-responses-table").inner_text())
        call.get_by_role("button", name="Clear").click()
        return int(shown.split()[2]), shown  # below the headings: Code, Details

    def authorize(self, field: str, key: str) -> None:
        """Gives the key in a field of the form for keys, in place of any other."""
        self.page.locator(".auth-wrapper .authorize").click()
        for button in self.page.get_by_role("button", name="Remove authorization").all():
            button.click()
        self.page.locator(field).fill(key)
        self.page.locator(field).press("Enter")
        self.page.locator(".close-modal").click()


FROM_DOCS = {"backend": "echo", "prompt": "hello from the docs"}
FROM_DOCS_SAID = '"output": "hello from the docs"'


def test_docs_tries_calls_out_and_asks_nobody_but_the_server(page: Page, targets: List[Target]) -> None:
    docs, own = Docs(page, targets[0]), targets[0].server.url
    for path, body, words in (("/health", None, '"session_store":'), ("/api/v1/prompt", FROM_DOCS, FROM_DOCS_SAID)):
        status, shown = docs.execute(path, body)
        assert status == 200 and words in shown
    asked = [url for url in docs.asked if not url.startswith((own + "/docs", "data:"))]
    assert sorted(asked) == [own + "/api/v1/prompt", own + "/health", own + "/openapi.json"] and docs.faults == []


def test_docs_takes_a_key_and_forgets_it(page: Page, targets: List[Target]) -> None:
    docs = Docs(page, targets[1])
    status, shown = docs.execute("/api/v1/prompt", FROM_DOCS)
    assert status == 401 and '"error": "unauthorized"' in shown
    for field in ("#api_key_value", "#auth-bearer-value"):
        docs.authorize(field, KEY)
        status, shown = docs.execute("/api/v1/prompt", FROM_DOCS)
        assert status == 200 and FROM_DOCS_SAID in shown
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert KEY not in kept


def test_docs_neither_loads_nor_calls_what_is_not_its_own(page: Page, targets: List[Target], others: int) -> None:
    """Neither as the address bar says, nor as a script would that got into the page."""
    elsewhere = f"http://good.example:{others}/"
    docs = Docs(page, targets[0], f"?url={elsewhere}&configUrl={elsewhere}&urls.primaryName={elsewhere}")
    assert [url for url in docs.asked if not url.startswith((targets[0].server.url + "/", "data:"))] == []
    for script, told in {
            "add('script', {textContent: 'window.ran = true'}); return String(window.ran)": "undefined",
            "return fetch(url).then(a => a.text(), String)": "TypeError: Failed to fetch",
            "return (await ended(add('script', {src: url + 'worker.js'}), 'load', 'error')).type": "error"}.items():
        assert driven(page, script, (elsewhere, "")) == [told]


@pytest.mark.parametrize("name", ["another port", "another site"])
def test_docs_is_in_no_page_of_another_origin(page: Page, targets: List[Target], others: int, name: str) -> None:
    attacker, since = opened(page, name, targets[0], others), targets[0].end_of_log
    for tag, attribute in (("iframe", "src"), ("object", "data"), ("embed", "src")):
        driven(attacker.frame, ELEMENT % (tag, f"{attribute}: url"), (attacker.url + "/docs", ""))
    targets[0].check_arrived(since, [("GET", "/docs", ANY)] * 3, name)
    assert not any(frame.evaluate("document.querySelector('#docs') !== null") for frame in page.frames)
