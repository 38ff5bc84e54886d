"""Build clinvk.pyz: clinvk.py and what it imports, in one file that any Python from 3.9 on can run."""

import argparse
import fnmatch
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCE: Path = Path(__file__).resolve().with_name("clinvk.py")  # a SyntaxError here? Use Python 3.9 or newer

# Releases that run on 3.9. A hash names one wheel, so every machine packs the same files. PyYAML has no
# wheel for all platforms: this is one for Linux (the options in `install` ask for it), less what DROPPED names.
PINS = """\
bottle==0.13.4   --hash=sha256:045684fbd2764eac9cdeb824861d1551d113e8b683d8d26e296898d3dd99a12e
waitress==3.0.2  --hash=sha256:c56d67fd6e87c2ee598b76abdd4e96cfad1f24cacdea5078d382b1f9d7b5ed2e
PyYAML==6.0.3    --hash=sha256:0150219816b6a1fa26fb4699fb7daa9caf09eb1999f3b70fb6e786805e80375a
drf-spectacular-sidecar==2026.10.1  --hash=sha256:fe1d005d8ac9b5d0472f2fe5deeb2e7d6dcffaa24118044f22578b4b8c4b31f2
"""
SWAGGER_UI = "drf_spectacular_sidecar/static/drf_spectacular_sidecar/swagger-ui-dist/"  # 5.33.1, as a wheel, for /docs
DROPPED = ("*.so", "_yaml/*", "*.data/*", "*.dist-info/RECORD", "*.dist-info/WHEEL", "drf_spectacular_sidecar/*.py",
           "*/redoc/*", "*.map", "*-preset.js", "*/oauth2-redirect.*")

# Python 2.7 must be able to parse this, and an old Python must not get as far as the second import.
MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit("clinvk needs Python 3.9 or newer; this is %s (%s). Run it with a newer one, for example: %s"
             % (sys.version.split()[0], sys.executable, " ".join(["python3.12"] + sys.argv)))

import clinvk
sys.exit(clinvk.main(sys.argv[1:]))
"""


def check() -> None:
    """Exit with a line that says what to mend, if the build would fail later."""
    if sys.version_info < (3, 9):
        sys.exit(f"build_zipapp.py needs Python 3.9 or newer; this is {sys.version.split()[0]} ({sys.executable}). "
                 "Run it with a newer one, for example: python3.12 build_zipapp.py")
    if importlib.util.find_spec("pip") is None:
        sys.exit(f"{sys.executable} has no pip, which downloads the dependencies. To get it: "
                 f"{shlex.quote(sys.executable)} -m ensurepip (Debian, Ubuntu: apt install python3-pip)")
    try:
        compile(SOURCE.read_bytes(), SOURCE.name, "exec")
    except (SyntaxError, ValueError) as problem:  # ValueError: a null byte, before 3.12
        sys.exit(f"clinvk.py does not compile: {problem}")


def install(stage: Path) -> None:
    """Unpack the pinned wheels: what is used of them, METADATA and licences. pip's words go to stdout, all of them."""
    print("Downloading", ", ".join(line.split()[0] for line in PINS.splitlines()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "requirements.txt")
        pins.write_text(PINS)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                   "--retries=1", "--timeout=15", "--require-hashes", "--no-deps", "--only-binary=:all:",
                   "--python-version=3.9", "--implementation=cp", "--abi=cp39", "--platform=manylinux2014_x86_64",
                   f"--dest={folder}", f"--requirement={pins}"]
        environ = {**os.environ, "PIP_REQUIRE_VIRTUALENV": "0"}  # it protects installations; this is none
        if subprocess.run(command, env=environ, stderr=subprocess.STDOUT).returncode != 0:
            sys.exit("pip could not download the dependencies (its reason is above): check the network, and that the "
                     "package index, PyPI or your PIP_INDEX_URL, has the files pinned in build_zipapp.py")
        for path in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(path) as wheel:
                kept = [n for n in wheel.namelist() if not any(fnmatch.fnmatchcase(n, drop) for drop in DROPPED)]
                wheel.extractall(stage, kept)
    (stage / SWAGGER_UI).rename(stage / "swagger-ui")
    shutil.rmtree(stage / SWAGGER_UI.partition("/")[0])


def add_own_files(stage: Path) -> None:
    """Add clinvk.py, then a .pyc beside every .py, never checked against it. Other Python versions take the .py."""
    print(f"Compiling for Python {sys.version_info[0]}.{sys.version_info[1]}; others start 0.4 s later", flush=True)
    shutil.copy(SOURCE, stage)
    # In a process of its own: hash seed, PYTHON* settings and what site loaded all change the bytes (seen on 3.9).
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-S", "-m", "compileall", "-q", "-b", "-d", "clinvk.pyz",
               "--invalidation-mode=unchecked-hash", str(stage)]
    subprocess.run(command, cwd=stage, env={**environ, "PYTHONHASHSEED": "0"}, check=True)
    (stage / "__main__.py").write_text(MAIN)


def pack(stage: Path, target: Path) -> None:
    """Zip `stage` into an executable file: sorted, one date, one mode, so that equal files give equal bytes.

    Stored, not deflated: about 4.0 MB against 1.2, but `version` starts 4 % faster (240 against 250 ms on 3.9 to
    3.13; 660 without the .pyc), and the bytes do not depend on a zlib."""
    with target.open("wb") as out:
        out.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(path for path in stage.rglob("*") if path.is_file()):
                entry = zipfile.ZipInfo(path.relative_to(stage).as_posix())  # its date is 1980-01-01
                entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix, rw-r--r--
                archive.writestr(entry, path.read_bytes())
    target.chmod(0o755)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", type=Path, default=SOURCE.with_suffix(".pyz"), help="default: %(default)s")
    target = parser.parse_args().target
    check()
    with tempfile.TemporaryDirectory(prefix=".clinvk-build-", dir=target.parent) as folder:  # there, for os.replace
        stage, built = Path(folder, "stage"), Path(folder, "clinvk.pyz")
        install(stage)
        add_own_files(stage)
        pack(stage, built)
        os.replace(built, target)
    size, start = target.stat().st_size / 1e6, shlex.quote(os.path.relpath(target))
    print(f"Built {target} ({size:.1f} MB). To start it: python3 {start} serve")


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as problem:
        sys.exit(f"build_zipapp.py: {problem}")
