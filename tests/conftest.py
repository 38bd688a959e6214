"""The backends that the tests run on, and Hypothesis' profiles.

A test that takes `backend` runs on each of them; one that takes `source` draws problems that suit it: on the simulator (and
a GPU), of one row of strategies.COVERING at a time.
"""

from __future__ import annotations

import base64
import csv
import ctypes
import dataclasses
import hashlib
import os
import shutil
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strategies
from hypothesis import HealthCheck, given, seed, settings

import cusru
from cusru import raw_kernels

# Of JAX, which reads this when it first looks for devices: what is sharded is tested on this many
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is shared with CuPy, torch and other workers

_COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], print_blob=True)
settings.register_profile("repeatable", derandomize=True, database=None, **_COMMON)
settings.register_profile("explore", **_COMMON)  # keeps its failures in .hypothesis/; long_run.py explores further
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure() -> None:
    if os.environ.get("CUSRU_TEST_INSTALLED"):
        site, beside = Path(sysconfig.get_path("purelib")), Path(__file__).parent.parent / "cusru"
        loaded = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "cusru" and module.__file__]
        if reasons := [*not_as_installed(site, loaded, beside)]:
            raise pytest.UsageError(f"CUSRU_TEST_INSTALLED: {reasons[0]}")


def not_as_installed(site: Path, loaded: list[str], beside: Path) -> Iterator[str]:
    """What speaks against it that these tests, and the processes that they start, run cusru as a wheel brought it to `site`: the
    files of its RECORD, with their hashes, and no others. Where nothing stands `beside` the tests, no working folder and no
    PYTHONPATH of theirs hides it."""
    if beside.exists():
        yield f"{beside} is there, and would be tested instead"
    recorded = {}  # by the file itself: importlib.metadata leaves out what is lost, from Python 3.12 on
    for record in site.glob("cusru-*.dist-info/RECORD"):
        rows = csv.reader(record.read_text().splitlines())
        recorded |= {site / row[0]: row[1] for row in rows if row[0].startswith("cusru/") and not row[0].endswith(".pyc")}
    if not recorded:
        yield f"{site} holds no cusru that a wheel brought (pip install ., without -e)"
    for path, digest in recorded.items():
        method, _, value = digest.partition("=")
        found = path.is_file() and method and hashlib.new(method, path.read_bytes()).digest()
        if not found or base64.urlsafe_b64encode(found).rstrip(b"=").decode() != value:
            yield f"{path} is not as it was installed"
    others = {path for path in (site / "cusru").rglob("*") if path.is_file() and path.suffix != ".pyc"} | {*map(Path, loaded)}
    yield from (f"{path} is none of the files that were installed" for path in sorted(others - recorded.keys()))


GRADIENTS = dict(zip(strategies.FAMILIES, (cusru.Gradients, cusru.QRNNGradients, cusru.LinearRecurrenceGradients), strict=True))


@dataclasses.dataclass(frozen=True)
class Backend:
    """cusru's functions for NumPy arrays, run on one backend."""

    name: str
    multiprocessors: int = 0  #: that the simulator plans for; 0: threads walk several columns wherever the layout allows
    split: tuple[int, ...] | None = None  #: whether and how time is split (`Limits.split`); None: as the planner chooses

    def forward(self, problem: strategies.Problem, out: Any = None, **changes: Any) -> cusru.Output:
        return self._call(getattr(cusru, f"{problem.family}_forward"), cusru.Output, (), problem.inputs | changes, out)

    def backward(self, problem: strategies.Problem, c: np.ndarray, out: Any = None, **changes: Any) -> Any:
        given = problem.inputs | {"grad_h": problem.grad_h, "grad_c_last": problem.grad_c_last, "c": c} | changes
        return self._call(getattr(cusru, f"{problem.family}_backward"), GRADIENTS[problem.family], (), given, out)

    def both(self, problem: strategies.Problem, **changes: Any) -> tuple[cusru.Output, Any]:
        """The backward is given the forward's states."""
        output = self.forward(problem, **{n: a for n, a in changes.items() if n not in ("grad_h", "grad_c_last")})
        return output, self.backward(problem, output.c, **changes)

    def planned_for(self, multiprocessors: int) -> Backend:
        return dataclasses.replace(self, multiprocessors=multiprocessors)

    def by_turns(self) -> Backend:
        return dataclasses.replace(self, split=())

    @property
    def splits(self) -> bool:
        """Even short shapes: then bits may depend on where slices of time begin."""
        return bool(self.split)

    @contextmanager
    def selected(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CUSRU_SIMULATE", raising=False)
            patch.setattr(raw_kernels, "split", self.split)
            if self.name == "simulator":
                from cusru import simulator

                patch.setenv("CUSRU_SIMULATE", "1")
                patch.setattr(simulator, "multiprocessors", self.multiprocessors)
            yield

    def _call(self, function: Any, kind: type, args: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> Any:
        with self.selected():
            if self.name != "gpu":
                return function(**keywords, out=out)
            moved = _Mover()
            there = out and [None if a is None else moved(a) for a in out]
            results = function(**{n: moved(a) if isinstance(a, np.ndarray) else a for n, a in keywords.items()}, out=there)
            if out:
                moved.back()
                return kind(*out)
            return kind(*(None if a is None else to_host(a) for a in results))


class _Mover:
    """Copies arrays to the device with the memory around them, so that strides and alignment stay as they are."""

    def __init__(self) -> None:
        self.roots: list[tuple[np.ndarray, Any]] = []

    def __call__(self, a: np.ndarray) -> Any:
        import cupy

        root = strategies.root(a)
        memory = _memory(root)
        there = cupy.asarray(memory if memory.size else np.zeros(64, np.uint8))
        if root.flags.writeable:
            self.roots.append((memory, there))
        pointer = there.data + (a.ctypes.data - root.ctypes.data if a.size else 0)
        return cupy.ndarray(a.shape, a.dtype, pointer, a.strides)

    def back(self) -> None:
        for memory, there in self.roots:
            memory[...] = there.get()[: memory.size]


def _memory(owner: np.ndarray) -> np.ndarray:
    """The bytes of an array that owns them, in the order in which they lie, whatever that of its axes."""
    return np.frombuffer((ctypes.c_uint8 * owner.nbytes).from_address(owner.ctypes.data), np.uint8)


def to_host(a: Any) -> np.ndarray:
    if a.dtype == strategies.BFLOAT16:
        return a.view(np.uint16).get().view(strategies.BFLOAT16)
    return a.get()


def missing(backend: str) -> str | None:
    """Why this machine lacks the backend."""
    if backend == "simulator":
        found = any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "c++"))
        return None if found else "the simulator needs a C++ compiler: neither $CXX nor g++ nor c++ was found"
    if backend == "gpu":
        try:
            import cupy
        except ImportError as error:
            return f'needs CuPy ({error}): pip install "cusru[cuda13]"'
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except Exception as error:
            return f"no CUDA device: {error}"
        return None if count else "no CUDA device"
    return None


scripted = pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch does not support torch.jit on this Python")

BACKENDS = {
    "numpy": Backend("numpy"),
    "simulator": Backend("simulator"),
    "split": Backend("simulator", split=(2, 2)),  # spans of two warps' tiles, every second of which tells its start
    "gpu": Backend("gpu"),
    "gpu-split": Backend("gpu", split=(2, 2)),
}


def _param(backend: str, *rest: Any, id: str) -> Any:
    one = BACKENDS[backend]
    return pytest.param((one, *rest), marks=[pytest.mark.gpu] if one.name == "gpu" else [], id=id)


def _available(backend: Backend) -> Backend:
    if reason := missing(backend.name):
        pytest.skip(reason)
    return backend


@pytest.fixture(params=[_param(name, id=name) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Backend:
    return _available(request.param[0])


@dataclasses.dataclass(frozen=True)
class Source:
    """Draws problems for one backend."""

    backend: Backend
    row: tuple[str, ...] | None
    affine: bool = False  #: of the families that are affine in c

    def for_all(self, check: Any, **only: Any) -> None:
        """check(backend, problem) of many problems."""

        @settings(max_examples=15 if self.row else 120)
        @given(strategies.affine_problems(**only) if self.affine and not self.row else strategies.problems(self.row, **only))
        def run(problem: strategies.Problem) -> None:
            check(self.backend.planned_for(problem.multiprocessors), problem)

        if settings.default.derandomize:  # by itself it would draw the same problems for every row and every check
            run = seed(zlib.crc32(f"{check.__qualname__} {self.row}".encode()))(run)
        run()


@pytest.fixture(
    params=[
        _param("numpy", None, False, id="numpy"),
        _param("numpy", None, True, id="numpy-affine"),
        *(
            _param(name, row, False, id="-".join((name, *row)))
            for name in tuple(BACKENDS)[1:]
            for row in (*strategies.COVERING, *strategies.AFFINE_COVERING)
            if {*row[:2]} & {*strategies.DTYPES}
        ),
    ]
)
def source(request: pytest.FixtureRequest) -> Source:
    """Problems to draw: freely on NumPy, a row of the covering list at a time elsewhere."""
    backend, row, affine = request.param
    return Source(_available(backend), row, affine)
