"""load_config: where each setting comes from, and the one line that refuses a bad one (SPEC 6)."""

import dataclasses
import json
import re
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from conftest import REPO, eventually

import clinvk

Refusal = Callable[..., str]


def value_of(config: clinvk.Config, key: str) -> Any:
    """`a.b.c` of a config."""
    found: Any = config
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., clinvk.Config]:
    """`load(text, flags={...}, **environ)`: a config file with that text; None: no file at all."""
    def loaded(text: Optional[str] = None, flags: Optional[Dict[str, Any]] = None, **environ: str) -> clinvk.Config:
        file = tmp_path / "clinvk.yaml"
        if text is not None:
            file.write_text(text)
        return clinvk.load_config(None if text is None else str(file), {"HOME": str(tmp_path), **environ}, flags or {})
    return loaded


@pytest.fixture
def refusal(load: Callable[..., clinvk.Config]) -> Refusal:
    """The one line with which a config is refused; arguments as of `load`."""
    def refused(*args: Any, **more: Any) -> str:
        with pytest.raises(clinvk.ConfigError) as caught:
            load(*args, **more)
        line = str(caught.value)
        assert "\n" not in line and "Traceback" not in line
        return line
    return refused


# ---- The example, and the defaults

def test_the_example_config_equals_the_defaults(tmp_path: Path) -> None:
    around = {"HOME": str(tmp_path)}
    assert clinvk.load_config(str(REPO / "config.example.yaml"), around, {}) == clinvk.load_config(None, around, {})


def test_the_example_config_has_every_key() -> None:
    text = (REPO / "config.example.yaml").read_text()
    models = (clinvk.Config, clinvk.UnifiedFlags, clinvk.BackendConfig, clinvk.ModelAliases, clinvk.SessionConfig,
              clinvk.OutputConfig, clinvk.ParallelConfig, clinvk.ServerConfig)
    wanted = {field.name for model in models for field in dataclasses.fields(model) if "rules" in field.metadata}
    assert wanted <= set(re.findall(r"(\w+):", text))


@pytest.mark.parametrize("key, value", [
    ("default_backend", "claude"), ("unified_flags.approval_mode", "default"), ("session.retention_days", 30),
    ("output.format", "json"), ("parallel.max_workers", 3), ("server.host", "127.0.0.1"), ("server.port", 8080),
    ("server.request_timeout_secs", 300), ("server.read_timeout_secs", 30), ("server.write_timeout_secs", 300),
    ("server.idle_timeout_secs", 120), ("server.rate_limit_enabled", False), ("server.rate_limit_rps", 10),
    ("server.rate_limit_burst", 20), ("server.rate_limit_cleanup_secs", 180), ("server.cors_max_age", 300),
    ("server.max_request_body_bytes", 10485760), ("server.compat_mode", "model"), ("server.spares", 2),
    ("server.spare_idle_secs", 300), ("server.live_conversations", 2), ("server.max_concurrent_runs", 8),
    ("server.max_waiting_runs", 64), ("server.max_output_bytes", 64 * 1024 * 1024), ("backends.claude.enabled", True),
    ("server.cors_allow_credentials", False), ("server.metrics_enabled", False), ("keys", ())])
def test_the_defaults_are_those_of_the_contract(load: Callable[..., clinvk.Config], key: str, value: Any) -> None:
    assert value_of(load(), key) == value


# ---- Flags beat environment beats file beats defaults

SET_BY_VARIABLE = [("CLINVK_BACKEND", "default_backend", "echo", "codex"),
                   ("CLINVK_CLAUDE_MODEL", "backends.claude.model", "opus", "haiku"),
                   ("CLINVK_CODEX_MODEL", "backends.codex.model", "gpt-5", "gpt-4"),
                   ("CLINVK_GEMINI_MODEL", "backends.gemini.model", "gemini-3", "gemini-2"),
                   ("CLINVK_HOST", "server.host", "localhost", "::1"), ("CLINVK_PORT", "server.port", "9001", "9002")]


def as_yaml(key: str, value: Any) -> str:
    """One nested key, `a.b.c`."""
    names = key.split(".")
    return "".join("  " * depth + name + ":\n" for depth, name in enumerate(names))[:-1] + f' {value}\n'


@pytest.mark.parametrize("variable, key, ours, theirs", SET_BY_VARIABLE)
def test_a_variable_beats_the_file_and_the_file_beats_the_default(
        load: Callable[..., clinvk.Config], variable: str, key: str, ours: str, theirs: str) -> None:
    text = as_yaml(key, f'"{theirs}"' if key != "server.port" else theirs)
    assert str(value_of(load(text), key)) == theirs
    assert str(value_of(load(text, **{variable: ours}), key)) == ours
    assert str(value_of(load(**{variable: ours}), key)) == ours
    assert str(value_of(load(text, **{variable: ""}), key)) == theirs, "an empty variable is not set"


@pytest.mark.parametrize("key, file, variable, flag, text", [
    ("server.host", "a.example", {"CLINVK_HOST": "b.example"}, "c.example", "server: {host: a.example}"),
    ("server.port", 1, {"CLINVK_PORT": "2"}, 3, "server: {port: 1}")])
def test_a_flag_beats_everything(load: Callable[..., clinvk.Config], key: str, file: Any, variable: Dict[str, str],
                                 flag: Any, text: str) -> None:
    assert value_of(load(text, {key: flag}, **variable), key) == flag
    assert value_of(load(text), key) == file


def test_the_file_is_the_flags_then_the_variables_then_the_homes(tmp_path: Path) -> None:
    for name in ("flag.yaml", "variable.yaml", "home/.clinvk/config.yaml", "other/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"backends: {{claude: {{model: {name}}}}}")
    around = {"HOME": str(tmp_path / "home")}
    named = {**around, "CLINVK_CONFIG": str(tmp_path / "variable.yaml")}

    def model(path: Optional[str], environ: Dict[str, str]) -> str:
        return clinvk.load_config(path, environ, {}).backends["claude"].model
    assert model(str(tmp_path / "flag.yaml"), named) == "flag.yaml"
    assert model(None, named) == "variable.yaml"
    assert model(None, around) == "home/.clinvk/config.yaml"
    assert model(None, {**around, "CLINVK_HOME": str(tmp_path / "other")}) == "other/config.yaml"


def test_clinvk_home_is_used_in_place_of_the_directory_in_the_home(
        load: Callable[..., clinvk.Config], tmp_path: Path) -> None:
    assert load().home == tmp_path / ".clinvk"
    assert load(CLINVK_HOME=str(tmp_path / "own")).home == tmp_path / "own"


@pytest.mark.parametrize("variable, keys", [("one", ("one",)), (" one , two,, ", ("one", "two")), ("", ())])
def test_keys_are_separated_by_commas(load: Callable[..., clinvk.Config], variable: str, keys: Any) -> None:
    assert load(CLINVK_API_KEYS=variable).keys == keys


# ---- What is accepted

@pytest.mark.parametrize("text", ["", "# only a comment\n", "server:\n", "backends:\nunified_flags:\nserver: null\n",
                                  "server:\n  port:\n  host: null\n", "backends:\n  codex:\n    # model: gpt-5\n"])
def test_what_is_null_has_its_default(load: Callable[..., clinvk.Config], text: str) -> None:
    assert load(text) == load("{}")


def test_a_null_section_can_be_set_by_a_variable(load: Callable[..., clinvk.Config]) -> None:
    config = load("backends:\nserver:\n", CLINVK_CLAUDE_MODEL="opus", CLINVK_PORT="9000")
    assert (config.backends["claude"].model, config.server.port) == ("opus", 9000)


@pytest.mark.parametrize("text", ["session: {auto_resume: false}", "output: {show_tokens: true}",
                                  "output: {show_timing: true}", "output: {color: false}",
                                  "parallel: {aggregate_output: false}"])
def test_keys_of_the_terminal_commands_are_accepted(load: Callable[..., clinvk.Config], text: str) -> None:
    assert isinstance(load(text), clinvk.Config)


@pytest.mark.parametrize("command", ["tool", ["ollama", "run", "llama3"]])
def test_a_command_alone_makes_a_backend(load: Callable[..., clinvk.Config], command: Any) -> None:
    config = load(f"backends: {{zeta: {{command: x}}, local: {{command: {command!r}}}}}\ndefault_backend: local")
    assert config.backends["local"].command == command
    assert config.names() == ["claude", "codex", "gemini", "local", "zeta", "echo"], "echo is listed last"


@pytest.mark.parametrize("text, key, value", [
    ("server: {request_timeout_secs: 5}", "server.request_timeout_secs", 5.0),
    ("server: {spares: 3.0}", "server.spares", 3),
    ("backends: {claude: {env: {A: '1'}}}", "backends.claude.env", {"A": "1"}),
    ("server: {port: 0, spares: 0, max_request_body_bytes: 0}", "server.max_request_body_bytes", 0),
    ("backends: {claude: {models: {fast: haiku}}}", "backends.claude.models.fast", "haiku"),
    ("backends: {claude: &c {model: a}, codex: {<<: *c, model: b}}", "backends.codex.model", "b")])
def test_values_are_taken_as_they_are_meant(load: Callable[..., clinvk.Config], text: str, key: str,
                                            value: Any) -> None:
    assert value_of(load(text), key) == value


# ---- What stops the start

@pytest.mark.parametrize("text, key, allowed", [
    ("servr: {}", "servr", 'did you mean "server"?'), ("server: {prot: 1}", "server.prot", 'did you mean "port"?'),
    ("backends: {claude: {modle: x}}", "backends.claude.modle", 'did you mean "model"?'),
    ("backends: {claude: {models: {fsat: x}}}", "backends.claude.models.fsat", 'did you mean "fast"?'),
    ("server: {zzzzzz: 1}", "server.zzzzzz", "is not known"), ("7: 1", "7", "is not known"),
    ("keys: [a]", "keys", "is not known"), ("home: /tmp", "home", "is not known"),
    ("server: {port: '8080'}", "server.port", "must be a whole number (it is '8080')"),
    ("server: {port: 80.5}", "server.port", "must be a whole number (it is 80.5)"),
    ("server: {port: true}", "server.port", "must be a whole number (it is True)"),
    ("server: {port: [1]}", "server.port", "must be a whole number"),
    ("server: {request_timeout_secs: soon}", "server.request_timeout_secs", "must be a number (it is 'soon')"),
    ("server: {rate_limit_enabled: 1}", "server.rate_limit_enabled", "must be true or false (it is 1)"),
    ("server: {host: 1}", "server.host", "must be a string (it is 1)"), ("server: []", "server", "must be an object"),
    ("server: {allowed_hosts: ['*']}", "server.allowed_hosts", "'*' must be one host's name"),
    ("server: {allowed_hosts: ['http://a']}", "server.allowed_hosts", "must be one host's name"),
    ("server: {allowed_hosts: a}", "server.allowed_hosts", "must be a list (it is 'a')"),
    ("server: {allowed_hosts: [a, 1]}", "server.allowed_hosts[1]", "must be a string (it is 1)"),
    ("server: {model_aliases: [a]}", "server.model_aliases", "must be an object"),
    ("server: {model_aliases: {1: a}}", "server.model_aliases", "put it in quotes"),
    ("backends: {claude: {command: '  '}}", "backends.claude", "must not be empty"),
    ("backends: {claude: {command: ['', a]}}", "backends.claude", "must not be empty"),
    ("backends: {claude: {command: 1}}", "backends.claude.command", "must be a string or a list (it is 1)"),
    ("backends: {claude: {env: {A: 1}}}", "backends.claude.env.A", "must be a string (it is 1)"),
    ("server: {port: 65536}", "server.port", "must be at most 65535 (it is 65536)"),
    ("server: {port: -1}", "server.port", "must be at least 0 (it is -1)"),
    ("server: {request_timeout_secs: 0}", "server.request_timeout_secs", "must be more than 0"),
    ("server: {max_concurrent_runs: 0}", "server.max_concurrent_runs", "must be at least 1"),
    ("parallel: {max_workers: 0}", "parallel.max_workers", "must be at least 1"),
    ("session: {retention_days: -1}", "session.retention_days", "must be at least 0"),
    ("server: {host: ''}", "server.host", "must not be empty"),
    ("unified_flags: {approval_mode: yolo}", "unified_flags.approval_mode",
     "must be one of default, auto, none, always (it is 'yolo')"),
    ("unified_flags: {sandbox_mode: none}", "unified_flags.sandbox_mode", "read-only, workspace, full"),
    ("backends: {codex: {sandbox_mode: none}}", "backends.codex.sandbox_mode", "read-only, workspace, full"),
    ("output: {format: default}", "output.format", "must be one of text, json, stream-json"),
    ("server: {compat_mode: chat}", "server.compat_mode", "must be one of model, agent")])
def test_a_bad_value_is_refused_with_file_key_and_what_is_allowed(
        refusal: Refusal, tmp_path: Path, text: str, key: str, allowed: str) -> None:
    line = refusal(text)
    assert line.startswith(f"{tmp_path / 'clinvk.yaml'}: {key}") and allowed in line


@pytest.mark.parametrize("key, number", [
    ("server.port", ".nan"), ("server.port", ".inf"), ("server.idle_timeout_secs", ".nan"),
    ("server.idle_timeout_secs", ".inf"), ("unified_flags.command_timeout_secs", ".nan"),
    ("session.retention_days", ".nan"), ("session.retention_days", "-.inf")])
def test_a_number_that_is_none_is_refused(refusal: Refusal, key: str, number: str) -> None:
    assert key in refusal(as_yaml(key, number))


def test_every_fault_of_a_file_is_told_at_once(refusal: Refusal) -> None:
    line = refusal("server: {port: x, hots: y}\nunified_flags: {verbose: 3}")
    assert all(key in line for key in ("server.port", "server.hots", "unified_flags.verbose"))


@pytest.mark.parametrize("text, told", [
    ("server: {port: 1}\nserver: {port: 2}", ["'server'", "twice", "line 2"]),
    ("server:\n  port: 1\n  host: a\n  port: 2", ["'port'", "twice", "line 4"]),
    ("server: {port: 1, 'port': 2}", ["'port'", "twice"]),
    ("a: b: c", ["is not YAML", "line 1"]), ("server: {", ["is not YAML"]), ("\tx: 1", ["is not YAML"]),
    ("a: \x00", ["is not YAML"]), ("a: !!python/object:os.system x", ["is not YAML"]),
    ("- a\n- b", ["must be a mapping"]), ("just words", ["must be a mapping"]), ("12", ["must be a mapping"]),
    ("session: {default_tags: [2024-99-99]}", []), ("server: {port: !!int many}", []),
    ("server: " + 5000 * "[", [])])
def test_a_file_that_can_not_be_understood_is_refused(refusal: Refusal, tmp_path: Path, text: str, told: Any) -> None:
    line = refusal(text)
    assert str(tmp_path / "clinvk.yaml") in line and all(word in line for word in told)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"default_backend: caf\xe9")
    with pytest.raises(clinvk.ConfigError, match=re.escape(f"{tmp_path}/x.yaml: is not YAML") + ".*utf-8"):
        clinvk.load_config(str(tmp_path / "x.yaml"), {"HOME": str(tmp_path)}, {})


@pytest.mark.parametrize("by_flag", [True, False])
@pytest.mark.parametrize("name, why", [("missing.yaml", "No such file"), (".", "Is a directory")])
def test_a_named_file_that_can_not_be_read_is_refused(tmp_path: Path, name: str, why: str, by_flag: bool) -> None:
    file = str(tmp_path / name)
    around = {"HOME": str(tmp_path), **({} if by_flag else {"CLINVK_CONFIG": file})}
    with pytest.raises(clinvk.ConfigError, match=re.escape(str(Path(file))) + ": can not be read: " + why):
        clinvk.load_config(file if by_flag else None, around, {})


@pytest.mark.parametrize("variable, value, allowed", [
    ("CLINVK_PORT", "many", "must be a whole number (it is 'many')"), ("CLINVK_PORT", "70000", "must be at most 65535"),
    ("CLINVK_PORT", "-1", "must be"), ("CLINVK_PORT", "80.5", "must be a whole number"),
    ("CLINVK_BACKEND", "cluade", 'must be one of claude, codex, gemini, echo; did you mean "claude"?')])
def test_a_bad_variable_is_refused_by_its_name(refusal: Refusal, variable: str, value: str, allowed: str) -> None:
    line = refusal(**{variable: value})
    assert line.startswith(f"{variable}: ") and allowed in line and ".yaml" not in line


def test_a_bad_flag_is_refused_by_its_name(refusal: Refusal) -> None:
    line = refusal("{}", {"server.port": 70000}, CLINVK_PORT="80")
    assert line == "--port: must be at most 65535 (it is 70000)"


@pytest.mark.parametrize("text, told", [
    ("backends: {local: {model: x}}", ["backends.local.command", "is required"]),
    ("backends: {local: {command: []}}", ["backends.local.command", "is required"]),
    ("backends: {cluade: {model: x}}", ["backends.cluade.command", 'did you mean "claude"?']),
    ("backends: {'a b': {command: x}}", ["backends.a b", "letters, digits"]),
    ("backends: {'a/b': {command: x}}", ["backends.a/b", "letters, digits"]),
    ("backends: {'': {command: x}}", ["letters, digits"]), ("backends: {-x: {command: x}}", ["letters, digits"]),
    ("backends: {default: {command: x}}", ["backends.default", "not 'default'"]),
    (f"backends: {{{65 * 'x'}: {{command: x}}}}", ["1 to 64"]),
    ("default_backend: cluade", ["default_backend", "claude, codex, gemini, echo", 'did you mean "claude"?']),
    ("default_backend: ''", ["default_backend", "must not be empty"])])
def test_backends_that_can_not_be_are_refused(refusal: Refusal, tmp_path: Path, text: str, told: Any) -> None:
    line = refusal(text)
    assert line.startswith(f"{tmp_path / 'clinvk.yaml'}: ") and all(word in line for word in told)


@pytest.fixture
def gopass(fake_cli: Callable[..., str], tmp_path: Path) -> Callable[[str], Dict[str, str]]:
    """`gopass(script)`: an environment in which a script is what `gopass` runs; {} takes gopass away."""
    def make(script: str) -> Dict[str, str]:
        program = Path(fake_cli(f"assert sys.argv[1:] == ['show', '--password', 'a/b'], sys.argv\n{script}", "gopass"))
        return {"PATH": str(program.parent), "CLINVK_API_KEYS_GOPASS_PATH": "a/b", "HOME": str(tmp_path)}
    return make


@pytest.mark.parametrize("told, keys", [
    ("one", ("one",)), ("one,two\n", ("one", "two")), ("one\r\n two ,", ("one", "two"))])
def test_keys_come_from_gopass(gopass: Callable[[str], Dict[str, str]], told: str, keys: Tuple[str, ...]) -> None:
    around = gopass(f"sys.stdout.write({told!r})")
    assert clinvk.load_config(None, around, {}).keys == keys
    assert clinvk.load_config(None, {**around, "CLINVK_API_KEYS": "mine"}, {}).keys == ("mine",)


@pytest.mark.parametrize("script, words", [
    ("sys.exit('no such entry')", "no such entry"), ("print()", "tells no keys"), ("print(',')", "tells no keys")])
def test_without_the_keys_of_gopass_nothing_is_open(gopass: Callable[[str], Dict[str, str]], script: str,
                                                    words: str) -> None:
    with pytest.raises(clinvk.ConfigError, match=words):
        clinvk.load_config(None, gopass(script), {})


def test_a_gopass_that_waits_for_somebody_is_told_with_what_it_asks(
        gopass: Callable[[str], Dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clinvk, "GOPASS_SECS", 1)
    with pytest.raises(clinvk.ConfigError, match=r"`gopass show --password a/b` .*\(passphrase, please\)"):
        clinvk.load_config(None, gopass("print('passphrase, please', file=sys.stderr, flush=True); time.sleep(60)"), {})
    with pytest.raises(clinvk.ConfigError, match="timed out"):
        clinvk.load_config(None, gopass("time.sleep(60)"), {})


def test_a_gopass_that_is_not_there_stops_the_start(refusal: Refusal, tmp_path: Path) -> None:
    assert "CLINVK_API_KEYS: has no key in it" in refusal(CLINVK_API_KEYS=" , ")
    told = refusal(CLINVK_API_KEYS_GOPASS_PATH="a/b", PATH=str(tmp_path))
    assert "gopass show --password a/b" in told and "CLINVK_API_KEYS" in told


def test_keys_are_read_again_and_stay_if_that_fails(
        gopass: Callable[[str], Dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    told = tmp_path / "told"
    told.write_text("one")
    around = gopass(f"sys.stdout.write(open({str(told)!r}).read())")
    assert clinvk.Server.KEYS_SECS == 300  # SPEC 7
    monkeypatch.setattr(clinvk.Server, "KEYS_SECS", 0.05)
    server = clinvk.Server(clinvk.load_config(None, around, {}))
    renewing = threading.Thread(target=server.renew_keys, daemon=True)
    renewing.start()
    told.write_text("two")
    eventually(lambda: server.config.keys == ("two",))
    told.unlink()
    eventually(lambda: "the API keys stay as they were" in caplog.text)
    assert server.config.keys == ("two",)
    server.close()
    renewing.join()


@pytest.mark.parametrize("origins, credentials, told", [
    (["localhost:3000"], False, "must be a scheme"), (["http://a/"], False, "must be a scheme"),
    (["null"], False, "must be a scheme"), (["https://*.a.example"], False, "must be a scheme"),
    (["*"], True, "together with the origin")])
def test_origins_that_mean_nothing_or_too_much_stop_the_start(refusal: Refusal, origins: List[str], credentials: bool,
                                                              told: str) -> None:
    server = {"cors_allowed_origins": origins, "cors_allow_credentials": credentials}
    assert told in refusal(json.dumps({"server": server}))


@pytest.mark.parametrize("text, told", [
    ("server: {blocked_workdir_prefixes: ['~/secret']}", "must be an absolute path"),
    ("server: {trusted_proxies: ['proxy.lan']}", "must be an address"),
    ("backends: {claude: {command: ['']}}", "must not be empty"),
    ("backends: {claude: {env: {'A=B': x}}}", "a name has no '='")])
def test_what_would_fail_or_not_count_at_every_run_stops_the_start(refusal: Refusal, text: str, told: str) -> None:
    assert told in refusal(text)


def test_a_line_that_refuses_holds_no_text_of_many_lines(refusal: Refusal) -> None:
    assert "server.port" in refusal('server: {port: "a\\nb"}')


def test_the_built_in_names_are_those_of_the_backends() -> None:
    assert tuple(clinvk.BACKENDS) == clinvk.BUILT_IN
