"""The kernels of `kernels/sru.cuh`: what each is compiled for, its source, the compiled RawKernel, its launch."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cusru.arguments import STATES

# ----------------------------------------------------------------------------------------------------------------------
# Specialisations: what is fixed when a kernel is compiled. The numbers are the enums of sru.cuh and numbers.cuh.

TYPES = {"float64": "double", "float32": "float", "float16": "Half", "bfloat16": "Bfloat"}
STORAGE = {"float64": "f8", "float32": "f4", "float16": "u2", "bfloat16": "u2"}
SKIPS = {"none": 0, "x": 1, "projected": 2}
ACTIVATIONS = {"identity": 0, "tanh": 1, "relu": 2, "selu": 3}
CANDIDATES = {"identity": 0, "tanh": 1}
WEIGHTS = {"none": 0, "column": 1, "step": 2, "step_state": 3}
PASSES = {"forward": 0, "backward": 1, "reduce": 2}

TILE = 32  # steps that the recomputing backward keeps in shared memory
REDUCE_THREADS = 512


class Specialisation(NamedTuple):
    """One kernel. `reduce` has only a dtype."""

    direction: str
    dtype: str
    skip: str = "none"
    activation: str = "identity"
    candidate: str = "identity"
    weight: str = "none"
    columns: int = 1  #: neighbouring columns that one thread walks, and the vector width
    packed: bool = False  #: u is read as vectors that hold the k values of `columns` columns
    recompute: bool = False  #: backward from states saved every S > 1 steps

    @property
    def entry(self) -> str:
        return f"cusru_{self.direction}"

    @property
    def threads(self) -> int:
        """Per block. The recomputing backward keeps TILE * (k + 1) states of each column in at most 48 KiB."""
        if self.direction == "reduce":
            return REDUCE_THREADS
        if self.recompute:
            return 32 if self.dtype == "float64" else 64
        return 64

    @property
    def ahead(self) -> int:
        """Steps whose loads are in flight: as many as 64 registers hold (48 in the backward of several columns, which spills
        beyond), in powers of two up to 16 forward and 8 backward, a quarter of that where a thread walks several columns."""
        item, state = (np.dtype(name).itemsize for name in (STORAGE[self.dtype], STATES[self.dtype]))
        backward = self.direction == "backward"
        narrow = (4 if self.skip != "none" else 3) + backward + 2 * (self.weight == "step")  # k of u, x, grad_h, weights
        wide = backward + 2 * (self.weight == "step_state")  # c, weights
        registers = self.columns * (narrow * max(item, 4 if self.columns == 1 else 2) + wide * state) // 4
        fit = 1 << (((48 if backward and self.columns > 1 else 64) // registers).bit_length() - 1)
        return min(fit, (8 if backward else 16) // (4 if self.columns > 1 else 1))

    @property
    def macros(self) -> tuple[str, ...]:
        defines = {"PASS": PASSES[self.direction], "TYPE": TYPES[self.dtype], "THREADS": self.threads}
        if self.direction != "reduce":
            defines |= {
                "SKIP": SKIPS[self.skip],
                "ACTIVATION": ACTIVATIONS[self.activation],
                "CANDIDATE": CANDIDATES[self.candidate],
                "WEIGHT": WEIGHTS[self.weight],
                "COLUMNS": self.columns,
                "PACKED": str(self.packed).lower(),
                "AHEAD": self.ahead,
                "TILE": TILE if self.recompute else 0,
            }
        return tuple(f"-DCUSRU_{name}={value}" for name, value in defines.items())


def wide(dtype: str, recompute: bool) -> int:
    """Columns a thread walks where layout, alignment and the number of columns allow: 16-byte vectors of float32 and
    float64. Where states are recomputed shared memory bounds the columns of a multiprocessor, and more threads do more."""
    return 1 if recompute else 2 if dtype == "float64" else 4


def specialisations() -> Iterator[Specialisation]:
    """Every kernel that a call can ask for."""
    for dtype in TYPES:
        yield Specialisation("reduce", dtype)
        weights = [w for w in WEIGHTS if w != "step_state" or dtype in ("float16", "bfloat16")]
        passes = (("forward", False), ("backward", False), ("backward", True))
        for (direction, recompute), skip, activation, candidate, weight in itertools.product(
            passes, SKIPS, ACTIVATIONS, CANDIDATES, weights
        ):
            layouts = [(1, False)] + ([(1, True)] if skip == "projected" else [])
            columns = wide(dtype, recompute)
            if columns > 1:
                layouts += [(columns, False), (columns, True)]
            for layout in layouts:
                yield Specialisation(direction, dtype, skip, activation, candidate, weight, *layout, recompute)


# ----------------------------------------------------------------------------------------------------------------------
# Running


class Launch(NamedTuple):
    kernel: Specialisation
    grid: tuple[int]
    block: tuple[int]


def run(launches: Iterable[Launch], args: np.ndarray, device: tuple[str, int]) -> None:
    """Start the kernels of one call, inside `current(...)`. Nothing here waits for the device."""
    on_device, number = device[0] == "cuda", device[1]
    for kernel, grid, block in launches:
        if on_device:
            (_kernels.get((kernel, number)) or _compiled(kernel, number))(grid, block, (args,))
        else:
            _simulate(kernel, grid, block, args)


_SIMULATE = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("", "0", "false", "no", "off"), False)


def simulated() -> bool:
    """Whether CPU arrays go to the simulator: what CUSRU_SIMULATE says at this moment."""
    value = os.environ.get("CUSRU_SIMULATE", "")
    try:
        return _SIMULATE[value.strip().lower()]
    except KeyError:
        raise ValueError(
            f"CUSRU_SIMULATE is {value!r}; allowed are 1, true, yes and on, or 0, false, no, off and nothing at all"
        ) from None


@functools.cache
def source(file: Path | None = None) -> str:
    """The kernels' source, or that of another file which includes their headers, as one text: CuPy's disk cache is keyed by
    it, and would not see a changed include."""
    seen: set[str] = set()

    def inline(name: str, text: str | None = None) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = text or resources.files("cusru").joinpath("kernels", name).read_text()
        text = re.sub(r"^#pragma once\n", "", text, flags=re.MULTILINE)
        text = re.sub(r'^#include "(\w+\.cuh)"\n', lambda include: inline(include[1]), text, flags=re.MULTILINE)
        return f'#line 1 "{name}"\n{text}' if name.endswith(".cu") else text

    return inline(file.name, file.read_text()) if file else inline("sru.cu")


def options(kernel: Specialisation) -> tuple[str, ...]:
    """NVRTC's options. No contraction: the kernels write fma where they mean it, so that forward and recomputation, and
    every memory layout, round alike."""
    return ("-std=c++17", "--fmad=false", *kernel.macros)


_kernels: dict[tuple[Specialisation, int], Any] = {}
_compiling = threading.RLock()  # re-entrant: a signal's handler may call cusru while its own thread compiles


def _renew_lock() -> None:
    global _compiling
    _compiling = threading.RLock()  # the thread that held it did not survive the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _compiled(kernel: Specialisation, device: int) -> Any:
    key = (kernel, device)
    if key not in _kernels:
        with _compiling:
            if key not in _kernels:
                import cupy

                raw = cupy.RawKernel(source(), kernel.entry, options=options(kernel), backend="nvrtc")
                raw.compile()
                _kernels.setdefault(key, raw)  # a handler may have been here meanwhile
    return _kernels[key]


def _simulate(kernel: Specialisation, grid: tuple[int], block: tuple[int], args: np.ndarray) -> None:
    from cusru import simulator

    simulator.load(source(), kernel.entry, kernel.macros)(*grid, *block, args)


def multiprocessors(device: tuple[str, int]) -> int:
    """Of the device that runs the kernels of arrays on `device`."""
    if device[0] == "cuda":
        return _multiprocessors(device[1])
    from cusru import simulator

    return simulator.multiprocessors


@functools.cache
def _multiprocessors(device: int) -> int:
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


class _Handle:
    """A raw stream handle, as `cupy.cuda.Stream.from_external` takes it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


def current(device: tuple[str, int], stream: int | None) -> contextlib.AbstractContextManager[Any]:
    """Make the device and the stream (None: its current one) CuPy's current ones: allocations, launches and exports belong to
    them. Nothing is switched that is so already."""
    if device[0] == "cpu":
        return _NOTHING
    import cupy

    number = device[1]
    switched = cupy.cuda.runtime.getDevice() != number
    if stream is None or stream == cupy.cuda.get_current_stream(number).ptr:
        return cupy.cuda.Device(number) if switched else _NOTHING
    return _switched(number, stream)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _switched(device: int, stream: int) -> Iterator[None]:
    import cupy

    # the device first: CuPy takes a stream from outside for the current device's
    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(_Handle(stream)):
        yield
