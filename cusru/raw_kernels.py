"""The kernels of `kernels/sru.cu` (passes by turns, passes whose time is split, what runs before and after) as CuPy runs them:
their source, the compiled RawKernel, its launch, devices and streams."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from cusru.dlpack import check_cupy_version
from cusru.specialisation import Launch, Limits, Specialisation


def run(launches: Iterable[Launch], args: np.ndarray, device: tuple[str, int]) -> None:
    """Start the kernels of one call, inside `current(...)`. Nothing here waits for the device."""
    on_device, number = device[0] == "cuda", device[1]
    for kernel, grid, block, shared in launches:
        if on_device:
            (_kernels.get((kernel, number)) or _compiled(kernel, number))(grid, block, (args,), shared_mem=shared)
        else:
            _simulate(kernel, grid, block, shared, args)


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
                if kernel.direction in ("forward", "backward"):
                    raw.max_dynamic_shared_size_bytes = _limits(device).shared
                if kernel.split:  # of whose blocks two are to fit together
                    raw.preferred_shared_memory_carveout = 100
                _kernels.setdefault(key, raw)  # a handler may have been here meanwhile
    return _kernels[key]


def _simulate(kernel: Specialisation, grid: tuple[int], block: tuple[int], shared: int, args: np.ndarray) -> None:
    from cusru import simulator

    simulator.load(source(), kernel.entry, kernel.macros)(*grid, *block, args, shared)


split: tuple[int, ...] | None = None  # what tests force: `Limits.split`


def limits(device: tuple[str, int]) -> Limits:
    """Of the device that runs the kernels of arrays on `device`."""
    if device[0] == "cuda":
        return _limits(device[1]) if split is None else _limits(device[1])._replace(split=split)
    from cusru import simulator

    return Limits(simulator.multiprocessors, split=split)


@functools.cache
def _limits(device: int) -> Limits:
    import cupy

    check_cupy_version(cupy.__version__)
    attributes = cupy.cuda.Device(device).attributes
    return Limits(int(attributes["MultiProcessorCount"]), int(attributes["MaxSharedMemoryPerBlockOptin"]))


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
