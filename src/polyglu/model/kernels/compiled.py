"""C++ of this package for the CPU, compiled on this machine when first used.

A library is compiled for one processor and one set of macros, in about a second, and kept in
``$XDG_CACHE_HOME/polyglu`` (default ``~/.cache/polyglu``) under a name that tells sources, compiler, flags and
processor. It is written elsewhere and then renamed: processes that compile at the same time do not wait for each other,
and a kill leaves nothing half written.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
SECONDS = 120
"""A compiler that takes longer is taken for one that hangs."""
SOURCES = Path(__file__).parent


@cache
def load_library(name: str, *macros: str) -> ctypes.CDLL | None:
    """The library of ``<name>.cpp``, with ``NAME=value`` of its macros; None if it cannot be had here."""
    try:
        return ctypes.CDLL(str(_compiled(name, macros)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("no native kernel for the CPU, a slower one is used: %s", said.strip()[-400:])
        return None


def _compiled(name: str, macros: tuple[str, ...]) -> Path:
    """Path of the library, compiled if it is not there yet.

    Raises:
        OSError: no compiler, or no folder to write to.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise FileNotFoundError(f"none of the compilers {', '.join(COMPILERS)} is installed")
    source = SOURCES / f"{name}.cpp"
    command = [*compiler.split(), *FLAGS, *(f"-D{macro}" for macro in macros)]
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True).stdout
    texts = [path.read_text() for path in (source, SOURCES / "vectors.h")]
    key = hashlib.sha256("\0".join([*texts, *command, version, _processor()]).encode()).hexdigest()
    path = _cache_folder() / f"{name}_{key[:32]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run(
                [*command, str(source), "-o", str(made)], capture_output=True, text=True, check=True, timeout=SECONDS
            )
            made.replace(path)
    return path


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "polyglu"


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may serve machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + "".join(line for line in lines[:40] if line.startswith(("model name", "flags")))
