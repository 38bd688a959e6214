"""Where a benchmark runs: NumPy, the simulator or a CUDA device; how it launches a kernel there, and how it times a call.

The classes extend those of `python -m cusru`, which time a call beside a copy. On `Numpy` and `Simulator` time is the CPU's
and no evidence for a GPU's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cusru import __main__ as main
from cusru import raw_kernels

HERE = Path(__file__).parent
run_command = main.run_command


def launch_options(macros: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in macros.items())


class _Host(main.Cpu):
    def put(self, a: np.ndarray) -> np.ndarray:
        """A copy that begins at a multiple of 256 bytes, as what a device's allocator gives."""
        room = np.empty(a.nbytes + 256, np.uint8)
        begin = -room.ctypes.data % 256
        copied = room[begin : begin + a.nbytes].view(a.dtype).reshape(a.shape)
        copied[...] = a
        return copied

    def bytes(self, count: int) -> np.ndarray:
        return self.put(np.zeros(count, np.uint8))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return self.put(np.zeros(shape, dtype))

    caches = ("as left",)  # by the run before

    def time(self, call: Callable[[], object], cache: str = "as left") -> float:
        return self.seconds(call)


class Numpy(_Host):
    name = "numpy"

    def __init__(self) -> None:
        super().__init__(simulated=False)


class Simulator(_Host):
    name = "simulator"

    def __init__(self) -> None:
        super().__init__(simulated=True)

    def launch(self, file: str, entry: str, macros: dict[str, Any], blocks: int, threads: int, args: np.ndarray) -> None:
        from cusru import simulator

        simulator.load(raw_kernels.source(HERE / file), entry, launch_options(macros))(blocks, threads, args)


class Cuda(main.Gpu):
    name = "gpu"
    caches = ("cold", "warm")

    def __init__(self, cupy: Any) -> None:
        super().__init__(cupy)
        self.kernels: dict[tuple[Any, ...], Any] = {}

    def launch(self, file: str, entry: str, macros: dict[str, Any], blocks: int, threads: int, *args: Any) -> None:
        options = ("-std=c++17", *launch_options(macros))
        if (file, entry, options) not in self.kernels:
            self.kernels[file, entry, options] = self.cupy.RawKernel(raw_kernels.source(HERE / file), entry, options=options)
        self.kernels[file, entry, options]((blocks,), (threads,), args)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        if dtype == "bfloat16":  # as bits, which every CuPy can allocate
            return self.cupy.empty(shape, np.uint16).view(dtype)
        return self.cupy.empty(shape, dtype)

    def time(self, call: Callable[[], object], cache: str = "cold") -> float:
        """Seconds. cold: L2 has been emptied. warm: the same call has just run."""

        def warm(work: int) -> None:
            call()
            self.launch("stream.cu", "hold", {"THREADS": 256}, 1, 1, np.int64(work * 100_000))  # cycles: 10 are 0.5 ms

        return self.seconds(call, warm if cache == "warm" else None)


Machine = Numpy | Simulator | Cuda


def find(name: str) -> Machine:
    """The machine "numpy", "simulator" or "gpu". RuntimeError where this computer has no such thing, with the reason.

    Between the first two the environment chooses: CUSRU_SIMULATE must be 1 for the simulator, and must not for NumPy.
    """
    if name != "gpu" and raw_kernels.simulated() != (name == "simulator"):
        raise RuntimeError(f"CUSRU_SIMULATE is {os.environ.get('CUSRU_SIMULATE')!r}, which does not select {name}")
    if name == "numpy":
        return Numpy()
    if name == "simulator":
        from cusru import simulator

        simulator.compiler()
        return Simulator()
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f'CuPy cannot be imported ({error}): pip install ".[cuda13]" or ".[cuda12]"') from error
    try:
        return Cuda(cupy)
    except Exception as error:
        raise RuntimeError(f"no CUDA device that works: {type(error).__name__}: {error}") from error
