"""CuPy without a driver: real CuPy arrays whose memory nobody touches, and launches that do nothing.

Within `no_driver()` all that cusru does to call a kernel runs as it is, and costs what it costs, up to the driver's door: what of
CuPy's asks the driver is replaced (and is in this file, so that measuring.count_calls can leave it out). The arrays are on a
device that no computer has, so that nothing which cusru keeps for it is ever met by another.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

DEVICE, MULTIPROCESSORS = 63, 132


class Kernel:
    """A cupy.RawKernel, and also its `.kernel`."""

    launches = 0

    def __init__(self, code: str, name: str, *_: Any, **__: Any) -> None:
        self.name, self.kernel = name, self

    def compile(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, grid: Any, block: Any, args: Any, *_: Any, **__: Any) -> None:
        Kernel.launches += 1


class Scope:
    """A device or a stream, made current by `with` or by `use`."""

    id = device_id = DEVICE
    ptr = 0
    attributes = {"MultiProcessorCount": MULTIPROCESSORS, "MaxSharedMemoryPerBlockOptin": 227 << 10}  # noqa: RUF012

    def __enter__(self) -> Scope:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def use(self) -> Scope:
        return self

    def synchronize(self) -> None:
        pass


class Stream(Scope):
    @staticmethod
    def from_external(_: Any) -> Scope:
        return Stream.null

    null = Scope()


@contextlib.contextmanager
def no_driver() -> Iterator[Any]:
    """CuPy, whose driver does nothing. ImportError where there is no CuPy."""
    import cupy

    memory = (cupy.cuda.UnownedMemory((1 << 44) + (i << 32), 1 << 32, None, device_id=DEVICE) for i in range(1024))
    free = itertools.cycle([cupy.cuda.MemoryPointer(m, 0) for m in memory])
    allocator, here = cupy.cuda.get_allocator(), Stream.null
    device = {
        "getDevice": lambda: DEVICE, "setDevice": lambda _: None, "getDeviceCount": lambda: DEVICE + 1,
        "deviceGetAttribute": lambda *_: MULTIPROCESSORS,
    }  # fmt: skip
    cuda = {"Device": lambda *_: here, "get_current_stream": lambda *_: here, "Stream": Stream}
    with (
        mock.patch.object(cupy, "RawKernel", Kernel),
        mock.patch.multiple(cupy.cuda, **cuda),
        mock.patch.multiple(cupy.cuda.runtime, **device),
    ):
        cupy.cuda.set_allocator(lambda size: next(free))
        try:
            yield cupy
        finally:
            cupy.cuda.set_allocator(allocator)


def put(cupy: Any, a: np.ndarray) -> Any:
    """A CuPy array like `a`, within `no_driver()`."""
    return cupy.ndarray(a.shape, a.dtype, memptr=cupy.cuda.alloc(a.nbytes), strides=a.strides)
