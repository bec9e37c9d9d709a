"""C++ of this package for the CPU, compiled on this machine when first used.

A library is compiled for one processor and one set of macros, in about a second, and kept in
``$XDG_CACHE_HOME/polyglu`` (default ``~/.cache/polyglu``) under a name that tells sources, compiler, flags and
processor. It is written elsewhere and then renamed: processes that compile at the same time do not wait for each other,
and a kill leaves nothing half written. Where that folder cannot be written to, each process compiles for itself.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from polyglu.files import flush

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
SECONDS = 120
"""A compiler that takes longer is taken for one that hangs."""
SOURCES = Path(__file__).parent
PROCESSOR = ("model name", "flags", "Features", "CPU ", "isa", "uarch")
"""Lines of ``/proc/cpuinfo`` (x86, ARM, RISC-V) that tell what a processor can do."""
_failed: list[str] = []
"""Libraries that cannot be had. The first is told: the others lack the same compiler."""


@cache
def load_library(name: str, *macros: str) -> ctypes.CDLL | None:
    """The library of ``<name>.cpp``, with ``NAME=value`` of its macros; None if it cannot be had here."""
    try:
        return _load(name, macros)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        level = logging.DEBUG if _failed else logging.WARNING
        logger.log(level, "no native kernel for the CPU, a slower one is used: %s", said.strip()[-400:])
        _failed.append(name)
        return None


def _load(name: str, macros: tuple[str, ...]) -> ctypes.CDLL:
    """The library, compiled if it is not there yet or damaged.

    Raises:
        OSError: no compiler, or what it made cannot be loaded.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise FileNotFoundError(f"none of the compilers {', '.join(COMPILERS)} is installed")
    source = SOURCES / f"{name}.cpp"
    command = [*compiler.split(), *FLAGS, *(f"-D{macro}" for macro in macros)]
    version = _run([*compiler.split(), "--version"])
    texts = [path.read_text() for path in (source, SOURCES / "vectors.h")]
    key = hashlib.sha256("\0".join([*texts, *command, version, _processor()]).encode()).hexdigest()
    path = _cache_folder() / f"{name}_{key[:32]}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(path))
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.access(path.parent, os.W_OK | os.X_OK)
    with tempfile.TemporaryDirectory(dir=path.parent if kept else None) as folder:
        made = Path(folder) / path.name
        _run([*command, str(source), "-o", str(made)])
        library = ctypes.CDLL(str(made))
        if kept:
            flush(made)
            made.replace(path)
    return library


def _run(command: list[str]) -> str:
    """What a command says; in any encoding, for compilers speak the user's language."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=SECONDS)
    return done.stdout


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "polyglu"


def _processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """What ``-march=native`` depends on: a home folder may serve machines of several kinds."""
    first = info.read_text().split("\n\n")[0] if info.exists() else ""
    return platform.machine() + "".join(line for line in first.splitlines() if line.startswith(PROCESSOR))
