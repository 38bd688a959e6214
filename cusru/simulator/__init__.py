"""Runs CUDA kernels on the CPU: their unmodified source, compiled by g++ against ``cuda_on_cpu.h``.

No GPU and no CUDA are needed, only a C++ compiler: Numba's NUMBA_ENABLE_CUDASIM and Triton's TRITON_INTERPRET are the
precedents. What it checks and what it cannot show is said in ``cuda_on_cpu.h``.

Environment: CUSRU_SIMULATE_SEED orders the warps, CUSRU_SIMULATE_FLAGS adds compiler flags (sanitizers, say),
CUSRU_CACHE_DIR is where compiled kernels are kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

multiprocessors: int = 132  # of the GPU that launches are planned for
try:
    seed: int = int(os.environ.get("CUSRU_SIMULATE_SEED", "0"))
except ValueError:
    raise ValueError(f"CUSRU_SIMULATE_SEED is {os.environ['CUSRU_SIMULATE_SEED']!r}; it must be an integer") from None

_HERE = pathlib.Path(__file__).parent
_KINDS = 4  # reads, writes, reads and writes of workspace: as in cuda_on_cpu.h
# Explicit fma only, as the kernels say; -march=native makes it one instruction.
_FLAGS = [
    "-std=c++17",
    "-Og",  # compiled in three quarters of the time of -O1, which runs in three quarters of this one's: tests compile most
    "-fPIC",
    "-shared",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=hidden",
]


def compiler() -> str:
    """The C++ compiler's path: $CXX, else g++, else c++."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise RuntimeError(
        "CUSRU_SIMULATE=1 runs the CUDA kernels on the CPU and needs a C++ compiler, but neither $CXX nor g++ nor c++ "
        "was found on PATH. Install one, for example with: apt-get install g++"
    )


class Kernel:
    """A kernel compiled for the CPU. Safe to call from several threads; the GIL is released."""

    def __init__(self, entry: str, library: ctypes.CDLL, runtime: ctypes.CDLL) -> None:
        self.entry = entry
        self.args_size = ctypes.c_uint64.in_dll(library, f"{entry}_args_size").value
        self._flushes = ctypes.c_bool.in_dll(library, f"{entry}_flushes")
        self._thread = ctypes.cast(library[f"{entry}_thread"], ctypes.c_void_p)
        self._library = library  # keeps it loaded
        self._simulate = runtime["cusru_simulate"]
        self._simulate.restype = None

    def __call__(self, grid: int, block: int, args: np.void | np.ndarray, shared: int = 0) -> None:
        data = args.tobytes()
        if len(data) != self.args_size:
            raise RuntimeError(
                f"{self.entry}: the argument structure has {self.args_size} bytes in the kernel, {len(data)} in Python"
            )
        reports = _open_reports()
        counts = (ctypes.c_uint64 * (4 * _KINDS))() if reports else None
        error = ctypes.create_string_buffer(2048)
        self._simulate(
            self.entry.encode(), self._thread, self._flushes, data, ctypes.c_size_t(len(data)), ctypes.c_uint(grid),
            ctypes.c_uint(block), ctypes.c_size_t(shared), ctypes.c_uint64(seed & (1 << 64) - 1), counts, error,
            ctypes.c_size_t(len(error)),
        )  # fmt: skip
        if error.value:
            raise RuntimeError(error.value.decode(errors="replace"))
        for one in reports:
            one._add(list(counts or ()))


# ---- statistics ----


@dataclasses.dataclass
class Report:
    """What a profiler would say of the launches inside ``with report()``, workspace included.

    A request is one access of a warp: the n-th of each of its lanes since the last tile boundary. In the bytes, lanes
    of one request that touch the same bytes count once. Sectors are the distinct 32-byte ones that a warp touches in
    one tile, and useful bytes the distinct bytes likewise.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    read_requests: int = 0
    write_requests: int = 0
    sectors_read: int = 0
    sectors_written: int = 0
    useful_read: int = 0
    useful_written: int = 0
    workspace_bytes: int = 0  # of bytes_read and bytes_written together
    launches: int = 0

    @property
    def sector_efficiency(self) -> float:
        sectors = self.sectors_read + self.sectors_written
        return (self.useful_read + self.useful_written) / (32 * sectors) if sectors else 1.0

    @property
    def requests_per_kib(self) -> float:
        transferred = self.bytes_read + self.bytes_written
        return (self.read_requests + self.write_requests) * 1024 / transferred if transferred else 0.0

    def _add(self, counts: list[int]) -> None:
        moved, requests, sectors, useful = (counts[i : i + _KINDS] for i in range(0, 4 * _KINDS, _KINDS))
        self.bytes_read += moved[0] + moved[2]
        self.bytes_written += moved[1] + moved[3]
        self.read_requests += requests[0] + requests[2]
        self.write_requests += requests[1] + requests[3]
        self.sectors_read += sectors[0] + sectors[2]
        self.sectors_written += sectors[1] + sectors[3]
        self.useful_read += useful[0] + useful[2]
        self.useful_written += useful[1] + useful[3]
        self.workspace_bytes += moved[2] + moved[3]
        self.launches += 1


_local = threading.local()


def _open_reports() -> list[Report]:
    return getattr(_local, "reports", [])


@contextlib.contextmanager
def report() -> Iterator[Report]:
    """Counts the memory accesses of this thread's launches. They are not counted otherwise: it takes time."""
    one = Report()
    outer = _open_reports()
    _local.reports = [*outer, one]
    try:
        yield one
    finally:
        _local.reports = outer


# ---- compiling ----

_SEAL = hashlib.sha256().digest_size


class _Library(NamedTuple):
    """A shared library in this process. Its content is kept for those that link to it: its file may be gone by then."""

    file: str
    content: bytes
    handle: ctypes.CDLL


_kernels: dict[tuple[str, str, tuple[str, ...], str, str | None], Kernel] = {}
_libraries: dict[str, _Library] = {}
_locks: dict[str, threading.RLock] = {}  # re-entrant: a signal's handler may call cusru while its own thread compiles

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)  # in a child no other thread exists, so none holds a lock


def load(source: str, entry: str, macros: tuple[str, ...] = ()) -> Kernel:
    """The kernel ``entry`` of a CUDA source, compiled with ``macros`` such as "-DCUSRU_TYPE=float"."""
    extra = os.environ.get("CUSRU_SIMULATE_FLAGS", "")
    key = (source, entry, tuple(macros), extra, os.environ.get("CXX"))
    kernel = _kernels.get(key)
    if kernel is None:
        runtime = _runtime(shlex.split(extra))
        flags = [*macros, f"-I{_HERE}", "-DCUSRU_SIMULATOR", *shlex.split(extra)]
        # The header's text is part of the runtime's name, and thereby of this library's.
        library = _library(entry, source, flags, [runtime])
        kernel = _kernels.setdefault(key, Kernel(entry, library.handle, runtime.handle))
    return kernel


def _runtime(extra: list[str]) -> _Library:
    """The scheduler: not instrumented by sanitizers, but aware of them."""
    sanitizers = ",".join(flag.partition("=")[2] for flag in extra if flag.startswith("-fsanitize="))
    flags = [flag for flag in extra if not flag.startswith("-fsanitize")]
    flags += [f"-DCUSRU_SANITIZE_{name.upper()}" for name in ("address", "thread") if name in sanitizers.split(",")]
    return _library("runtime", _runtime_source(), flags, [])


@functools.cache
def _runtime_source() -> str:
    header = (_HERE / "cuda_on_cpu.h").read_text()
    return (_HERE / "runtime.cpp").read_text().replace('#include "cuda_on_cpu.h"', header.replace("#pragma once", ""))


def _library(name: str, source: str, flags: list[str], links: list[_Library]) -> _Library:
    """Compiles and loads a shared library, at most once per process; from the disk if any process has compiled it."""
    path = compiler()
    parts = [source, *_FLAGS, *flags, *(link.file for link in links), path, _version(path), _cpu()]
    file = f"{name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    with _locks.setdefault(file, threading.RLock()):
        if file not in _libraries:
            with _folder() as folder:
                binary = folder.absolute() / file
                content = _intact(binary)
                if content is None:
                    _compile(path, source, binary, [*_FLAGS, *flags], links)
                    content = binary.read_bytes()
                if file not in _libraries:  # a handler may have been here meanwhile
                    _libraries[file] = _Library(file, content, ctypes.CDLL(str(binary)))
    return _libraries[file]


def _compile(path: str, source: str, binary: pathlib.Path, flags: list[str], links: list[_Library]) -> None:
    """Writes ``binary``, and its source beside it for debuggers and sanitizers, both by atomic rename."""
    with _temporary(binary.parent, "compiling-") as folder:
        for link in links:
            (folder / link.file).write_bytes(link.content)
        written = folder / "source"
        written.write_text(source)
        text = binary.with_suffix(".cpp")
        os.replace(written, text)
        output = folder / "library"
        # A library is found again under its soname: kernels link to the runtime that is already loaded.
        command = [path, *flags, "-x", "c++", str(text), "-x", "none", *(str(folder / link.file) for link in links)]
        command += [f"-Wl,-soname,{binary.name}", "-o", str(output)]
        result = _run(command)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr}")
        with output.open("ab") as file:
            file.write(_seal(binary.name, output.read_bytes()))
        os.replace(output, binary)


def _seal(name: str, content: bytes) -> bytes:
    """What stands behind the end of a library, where linkers and loaders do not look: it is whole, and the one of this name."""
    return hashlib.sha256(name.encode() + content).digest()


def _intact(binary: pathlib.Path) -> bytes | None:
    """The content of a library that may be loaded: one cut short would end the process."""
    try:
        content = binary.read_bytes()
    except OSError:
        return None
    return content if content[-_SEAL:] == _seal(binary.name, content[:-_SEAL]) else None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A sanitizer that is preloaded is for this process, not for the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@functools.cache
def _version(path: str) -> str:
    return _run([path, "--version"]).stdout


@functools.cache
def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    chosen = {line for line in lines if line.startswith(("flags", "Features", "model", "cpu family", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(chosen)])


@contextlib.contextmanager
def _temporary(parent: pathlib.Path | None, prefix: str) -> Iterator[pathlib.Path]:
    """Not tempfile.TemporaryDirectory, which a child that was forked meanwhile would remove at its end."""
    process = os.getpid()
    folder = pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        yield folder
    finally:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)


def _folder() -> contextlib.AbstractContextManager[pathlib.Path]:
    """The cache, or a folder that lasts until the library has been loaded."""
    cache = cache_folder()
    return contextlib.nullcontext(cache) if cache else _temporary(None, "cusru-")


def cache_folder() -> pathlib.Path | None:
    """Where compiled kernels are kept: a folder that only its owner can write, for what lies there is run. None: nowhere."""
    chosen = os.environ.get("CUSRU_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(chosen) if chosen else pathlib.Path(base, "cusru")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    safe = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return folder if safe and os.access(folder, os.W_OK) else None
