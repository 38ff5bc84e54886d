"""build_zipapp.py and the clinvk.pyz that it makes, as processes. A build downloads the pinned wheels with pip."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Iterator, Optional

import pytest
from conftest import REPO, interpreter

NEW_ENOUGH = ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"]
PINNED = ["0.13.4", "3.0.2", "6.0.3"]  # bottle, waitress, PyYAML


def call(*command: object, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(list(map(str, command)), env={**os.environ, **environ}, capture_output=True, text=True)


def failure(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line on stderr of a process that ended with 1."""
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stdout + done.stderr
    return done.stderr


def project(folder: Path) -> Path:
    """The build_zipapp.py of a new `folder`, beside the repository's clinvk.py."""
    folder.mkdir()
    shutil.copy(REPO / "clinvk.py", folder)
    return Path(shutil.copy(REPO / "build_zipapp.py", folder))


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Path]:
    """The build_zipapp.py of a project whose build must fail, and leave the earlier clinvk.pyz and no other file."""
    build = project(tmp_path / "project")
    target = build.with_name("clinvk.pyz")
    target.write_text("the earlier build")
    yield build
    assert target.read_text() == "the earlier build"
    assert {path.name for path in build.parent.iterdir()} <= {"build_zipapp.py", "clinvk.py", "clinvk.pyz"}


def test_builds_in_other_folders_and_environments_give_the_same_bytes(pyz: Path, tmp_path: Path) -> None:
    build, target = project(tmp_path / "another folder"), tmp_path / "renamed.pyz"
    settings = {"PYTHONHASHSEED": "7", "PYTHONOPTIMIZE": "2", "PYTHONNODEBUGRANGES": "1", "PIP_REQUIRE_VIRTUALENV": "1"}
    assert call(sys.executable, build, target, **settings).returncode == 0
    assert target.read_bytes() == pyz.read_bytes()
    assert sorted(path.name for path in build.parent.iterdir()) == ["build_zipapp.py", "clinvk.py"]


def test_a_build_replaces_the_earlier_file_so_that_a_running_server_reads_on(tmp_path: Path) -> None:
    build = project(tmp_path / "project")
    build.with_name("clinvk.pyz").write_text("the earlier build")
    with build.with_name("clinvk.pyz").open() as running:
        assert call(sys.executable, build).returncode == 0
        assert running.read() == "the earlier build"
    assert zipfile.is_zipfile(build.with_name("clinvk.pyz"))


def test_a_build_holds_licences_and_metadata_and_nothing_of_one_platform(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
        assert {(entry.date_time[0], entry.external_attr >> 16) for entry in archive.infolist()} == {(1980, 0o100644)}
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert [sum(word in name for name in names) for word in ("METADATA", "LICENSE")] == [4, 6]
    assert not [name for name in names if name.endswith((".so", "RECORD", "WHEEL")) or "__pycache__" in name]
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "__main__.py", "bottle.py", "bottle.pyc", "clinvk.py", "clinvk.pyc", "swagger-ui", "waitress", "yaml"}
    assert sorted(name for name in names if "swagger-ui/" in name and "LICENSE" not in name) == [
        "swagger-ui/favicon-32x32.png", "swagger-ui/swagger-ui-bundle.js", "swagger-ui/swagger-ui.css"]


def test_a_build_is_a_program_that_names_what_is_inside(pyz: Path) -> None:
    assert pyz.stat().st_mode & 0o777 == 0o755
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    done = call(pyz, "version", PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    assert (done.returncode, done.stderr) == (0, "")
    assert [number for number in PINNED if number in done.stdout] == PINNED


@pytest.mark.parametrize("version", NEW_ENOUGH)
def test_every_python_from_3_9_on_can_start_it(pyz: Path, version: str) -> None:
    done = call(interpreter(version), pyz, "version")
    assert (done.returncode, done.stderr) == (0, "")
    assert [number for number in PINNED if number in done.stdout] == PINNED


@pytest.mark.parametrize("version", NEW_ENOUGH)
def test_the_dependencies_come_from_inside_and_yaml_does_without_its_extension(pyz: Path, version: str) -> None:
    script = ("import sys; sys.path.insert(0, sys.argv[1])\n"
              "import bottle, waitress, yaml, importlib.metadata as metadata\n"
              "print([module.__file__.startswith(sys.argv[1]) for module in (bottle, waitress, yaml)])\n"
              "print([metadata.version(name) for name in ('bottle', 'waitress', 'PyYAML')])\n"
              "print(yaml.__with_libyaml__, yaml.safe_load('a: [1]'))\n")
    done = call(interpreter(version), "-I", "-c", script, pyz)
    assert (done.stdout, done.stderr) == (f"[True, True, True]\n{PINNED}\nFalse {{'a': [1]}}\n", "")


def test_the_building_version_takes_the_compiled_modules_and_others_the_sources(pyz: Path, tmp_path: Path) -> None:
    copy, this = tmp_path / "clinvk.pyz", f"{sys.version_info[0]}.{sys.version_info[1]}"
    with zipfile.ZipFile(pyz) as archive, zipfile.ZipFile(copy, "w") as changed:
        for name in archive.namelist():
            is_source = name.endswith(".py") and name != "__main__.py"
            changed.writestr(name, "raise SystemExit('source')" if is_source else archive.read(name))
    assert call(sys.executable, copy, "version").returncode == 0
    other = next(version for version in NEW_ENOUGH if version != this)
    assert failure(call(interpreter(other), copy, "version")) == "source\n"


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8"])
def test_an_older_python_says_in_one_line_how_to_start_it(pyz: Path, version: str) -> None:
    line = failure(call(interpreter(version), pyz, "serve", "--port", "9"))
    assert line.startswith(f"clinvk needs Python 3.9 or newer; this is {version}.")
    assert line.endswith(f": python3.12 {pyz} serve --port 9\n")


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8"])
def test_a_build_with_an_older_python_says_so_in_one_line(broken: Path, version: str) -> None:
    line = failure(call(interpreter(version), broken))
    assert line.startswith(f"build_zipapp.py needs Python 3.9 or newer; this is {version}.")


def test_a_build_with_python_2_shows_which_python_it_needs(broken: Path) -> None:
    assert "Use Python 3.9 or newer" in call(interpreter("2.7"), broken).stderr


def test_a_build_without_pip_says_how_to_get_it(broken: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    assert f"{python} -m ensurepip" in failure(call(python, broken))


def test_a_build_without_an_index_is_given_up_at_once_and_names_the_network(broken: Path) -> None:
    done = call(sys.executable, broken, PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL="http://127.0.0.1:9/",
                PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="", PIP_NO_INDEX="")
    assert "check the network, and that the package index" in failure(done)
    assert "No matching distribution found for bottle" in done.stdout  # pip's own reason
    assert len(done.stdout.splitlines()) <= 6


def test_a_wheel_other_than_the_pinned_one_is_refused(broken: Path) -> None:
    broken.write_text(broken.read_text().replace("--hash=sha256:04", "--hash=sha256:ff"))
    done = call(sys.executable, broken)
    assert "the files pinned in build_zipapp.py" in failure(done)
    assert "DO NOT MATCH THE HASHES" in done.stdout


@pytest.mark.parametrize("source, said", [
    ("def main(argv):\n    return (\n", "(clinvk.py, line 2)"),
    ("x = '\0'\n", "null bytes"),
    (None, "clinvk.py'"),
])
def test_a_broken_or_missing_clinvk_py_ends_the_build_at_once(broken: Path, source: Optional[str], said: str) -> None:
    broken.with_name("clinvk.py").unlink()
    if source is not None:
        broken.with_name("clinvk.py").write_text(source)
    done = call(sys.executable, broken)
    assert said in failure(done)
    assert done.stdout == ""


def test_a_target_that_cannot_be_written_ends_the_build_in_one_line(broken: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in failure(call(sys.executable, broken, tmp_path / "absent" / "clinvk.pyz"))
