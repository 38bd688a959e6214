"""Measuring: the machines that cusru runs on, how each times a call, and the yardsticks that a time is held against.

`python -m cusru`, benchmarks/ and the tests share it. A machine (`Numpy`, `Simulator`, `Cuda`; `find` and `look_around` say which
there are) makes and moves arrays, launches a kernel, and times a call with what its caches hold under control. On the first two
time is the CPU's and no evidence for a GPU's. `in_turn` and `count_calls` are for what a call costs in Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import os
import platform
import shutil
import sys
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import numpy as np

import cusru
from cusru import dlpack, raw_kernels, reference

Array = np.ndarray

# ---- arrays ------------------------------------------------------------------------------------------------------------


class Bits:
    """A bfloat16 array over its bits, since NumPy has no such dtype: what cusru takes from any framework that has it."""

    def __init__(self, bits: Array) -> None:
        self.bits, self.ndim, self.nbytes = bits, bits.ndim, bits.nbytes
        self.export = dlpack._Export(dataclasses.replace(dlpack.borrow(bits, "bits"), dtype="bfloat16"))

    def __dlpack__(self, **wishes: Any) -> Any:
        return self.export.__dlpack__(**wishes)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.export.__dlpack_device__()

    def __getitem__(self, index: Any) -> Bits:
        return Bits(self.bits[index])


def host(a: Any) -> Array:
    return reference.widen(a.bits, np.float32) if isinstance(a, Bits) else np.asarray(a)


def address(a: Any) -> int:
    return int(a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr)


# ---- machines ----------------------------------------------------------------------------------------------------------


class Numpy:
    """NumPy arrays and the NumPy backend."""

    name, backend = "numpy", "NumPy"
    caches: tuple[str, ...] = ("as left",)  # by the run before

    def __init__(self) -> None:
        self.device = f"{_processor()}, {os.cpu_count()} cores"

    def cast(self, a: Array, dtype: str) -> Any:
        if dtype != "bfloat16":
            return a.astype(dtype)
        bits = np.empty(a.shape, np.uint16)
        reference.narrow(a, bits)
        return Bits(bits)

    def put(self, a: Any) -> Any:
        """A copy that begins at a multiple of 256 bytes, as what a device's allocator gives."""
        if isinstance(a, Bits):
            return Bits(self.put(a.bits))
        room = np.empty(a.nbytes + 256, np.uint8)
        begin = -room.ctypes.data % 256
        copied = room[begin : begin + a.nbytes].view(a.dtype).reshape(a.shape)
        copied[...] = a
        return copied

    def get(self, a: Any) -> Array:
        return host(a)

    def bytes(self, count: int) -> Any:
        return self.put(np.zeros(count, np.uint8))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.put(np.zeros(shape, dtype))

    def copy(self, source: Any, target: Any) -> None:
        np.copyto(target, source)

    def time(self, call: Callable[[], object], cache: str = "as left") -> float:
        """Seconds: the best of at most a hundred runs in a fifth of a second, and of two at least: what disturbs a run on a CPU
        only ever makes it longer. The caller has warmed up."""
        best, end, runs = float("inf"), time.perf_counter() + 0.2, 0
        while runs < 2 or (runs < 100 and time.perf_counter() < end):
            start = time.perf_counter()
            call()
            best, runs = min(best, time.perf_counter() - start), runs + 1
        return best


class Simulator(Numpy):
    """NumPy arrays and the simulator. RuntimeError where there is no C++ compiler."""

    name, backend = "simulator", "simulator (the CUDA kernels, compiled for the CPU)"

    def __init__(self) -> None:
        from cusru import simulator

        simulator.compiler()
        super().__init__()

    def launch(self, file: Path, entry: str, macros: dict[str, Any], blocks: int, threads: int, args: Array) -> None:
        """A kernel of a file that includes cusru's headers."""
        from cusru import simulator

        simulator.load(raw_kernels.source(file), entry, _defines(macros))(blocks, threads, args)


class Cuda:
    """CuPy arrays and the CUDA kernels. Raises where CuPy finds no device that works."""

    name, backend = "gpu", "CuPy (the CUDA kernels)"
    caches = ("cold", "warm")

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self.kernels: dict[tuple[Any, ...], Any] = {}
        cupy.zeros(1).get()
        number = cupy.cuda.Device().id
        about = cupy.cuda.runtime.getDeviceProperties(number)
        self.device = (
            f"{about['name'].decode()} (cuda:{number}), compute capability {about['major']}.{about['minor']}, "
            f"{about['multiProcessorCount']} multiprocessors, {about['totalGlobalMem'] / 2**30:.1f} GiB"
        )

    def cast(self, a: Array, dtype: str) -> Any:
        return a.astype(importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)

    def put(self, a: Array) -> Any:
        # As bits: every CuPy can move those, whatever it makes of bfloat16.
        return self.cupy.asarray(a.view(np.uint16)).view(a.dtype) if a.dtype.name == "bfloat16" else self.cupy.asarray(a)

    def get(self, a: Any) -> Array:
        return np.asarray(a.view(np.uint16).get().view(a.dtype) if a.dtype.name == "bfloat16" else a.get())

    def bytes(self, count: int) -> Any:
        return self.cupy.zeros(count, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        if dtype == "bfloat16":  # as bits, which every CuPy can allocate
            return self.cupy.empty(shape, np.uint16).view(dtype)
        return self.cupy.empty(shape, dtype)

    def copy(self, source: Any, target: Any) -> None:
        target.data.copy_from_device_async(source.data, source.nbytes)

    def launch(self, file: Path, entry: str, macros: dict[str, Any], blocks: int, threads: int, *args: Any) -> None:
        options = ("-std=c++17", *_defines(macros))
        if (file, entry, options) not in self.kernels:
            self.kernels[file, entry, options] = self.cupy.RawKernel(raw_kernels.source(file), entry, options=options)
        self.kernels[file, entry, options]((blocks,), (threads,), args)

    @functools.cached_property
    def _filler(self) -> tuple[Any, Any]:
        return self.bytes(2**28), self.bytes(2**28)

    def _empty_l2(self, call: Callable[[], object], work: int) -> None:
        """And keep the device busy by so many copies. The sum that comes last leaves no line that must be written back."""
        for _ in range(work):
            self.copy(*self._filler)
        self._filler[0].view("u8").sum()

    def _fill_l2(self, call: Callable[[], object], work: int) -> None:
        call()
        self.launch(STREAM, "hold", {"THREADS": STREAM_THREADS}, 1, 1, np.int64(work * 100_000))  # cycles: 10 are 0.5 ms

    def time(self, call: Callable[[], object], cache: str = "cold") -> float:
        """Seconds: the median of ten runs (of three, if they take long), by events on the stream. cold: L2 has been emptied.
        warm: the same call has just run. Either gives the device something to do meanwhile, while Python prepares the launch
        that is timed. If Python was not done in time the run does not count, and from then on there is twice as much to do."""
        prepare = self._fill_l2 if cache == "warm" else self._empty_l2
        times: list[float] = []
        work = 10
        while len(times) < 3 or (len(times) < 10 and sum(times) < 0.5):
            start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
            prepare(call, work)
            start.record()
            call()
            end.record()
            late = start.done
            end.synchronize()
            if late and work < 1000:
                work *= 2
            else:
                times.append(self.cupy.cuda.get_elapsed_time(start, end) / 1000)
        return float(np.median(times))


Machine = Numpy | Simulator | Cuda


def _defines(macros: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in macros.items())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def find(name: str) -> Machine:
    """The machine "numpy", "simulator" or "gpu". RuntimeError where this computer has no such thing, with the reason.

    Between the first two the environment chooses: CUSRU_SIMULATE must be 1 for the simulator, and must not for NumPy.
    """
    if name != "gpu" and raw_kernels.simulated() != (name == "simulator"):
        raise RuntimeError(f"CUSRU_SIMULATE is {os.environ.get('CUSRU_SIMULATE')!r}, which does not select {name}")
    if name != "gpu":
        return Numpy() if name == "numpy" else Simulator()
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f'CuPy cannot be imported ({error}): pip install ".[cuda13]" or ".[cuda12]"') from error
    try:
        return Cuda(cupy)
    except Exception as error:
        raise RuntimeError(f"no CUDA device that works: {type(error).__name__}: {error}") from error


# ---- what a call costs in Python ---------------------------------------------------------------------------------------


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 50,
    turn: float = 0.001,
    most: int = 10_000,
    clock: Callable[[], float] = time.thread_time,
    settle: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Seconds of each call, by default those that this thread had a processor: what others do meanwhile does not count. A round
    gives each call a turn of so many in a row, at most `most`; its time is its best turn's, so that a machine whose speed drifts
    changes no ratio. `settle` is called before each turn."""

    def seconds(timer: timeit.Timer, count: int) -> float:
        if settle:
            settle()
        return timer.timeit(count) / count  # without garbage collection

    timers = {name: timeit.Timer(call, timer=clock) for name, call in calls.items()}
    once = {name: min(seconds(timer, 2) for _ in range(2)) for name, timer in timers.items()}  # warmed up by the first
    counts = {name: max(1, min(most, round(turn / time))) for name, time in once.items()}
    best = dict.fromkeys(timers, float("inf"))
    for _ in range(rounds):
        for name, timer in timers.items():
            best[name] = min(best[name], seconds(timer, counts[name]))
    return best


class Calls(NamedTuple):
    """Function calls of this thread: of Python's functions, and of those written in C."""

    python: int
    c: int


def count_calls(call: Callable[[], object], without: str = "") -> Calls:
    """Of one call, by sys.setprofile: the same each time, whatever else the machine does. Functions of the file `without`, and
    what they call, are not counted. The caller has warmed up."""
    counts = {"call": 0, "c_call": 0}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event in counts and frame.f_code.co_filename != without:
            counts[event] += 1

    before, collected = sys.getprofile(), gc.isenabled()
    gc.disable()  # what it runs would be counted
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
        if collected:
            gc.enable()
    return Calls(counts["call"], counts["c_call"] - 1)  # the last call in C was sys.setprofile's


# ---- yardsticks --------------------------------------------------------------------------------------------------------

STREAM = Path(__file__).parent / "kernels" / "stream.cu"
STREAM_THREADS, STREAM_BLOCK_BYTES = 256, 32 * 1024  # one turn of eight vectors a thread


class Floor(NamedTuple):
    """The bytes that a pass must move: each input read once, each output written once, at their own dtypes."""

    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


def copying(machine: Machine, floor: Floor) -> functools.partial[None]:
    """A copy that reads and writes half of the bytes each."""
    return functools.partial(machine.copy, *(machine.bytes(floor.bytes // 2) for _ in range(2)))


def streaming(machine: Simulator | Cuda, floor: Floor) -> Callable[[], None]:
    """A kernel that reads and writes just as many bytes, in vectors of 16."""
    read, written = (max(n // 16, 1) for n in floor)
    source, target = machine.bytes(read * 16), machine.bytes(written * 16)
    args = np.zeros((), [("from", "u8"), ("to", "u8"), ("reads", "i8"), ("writes", "i8")])
    args["from"], args["to"], args["reads"], args["writes"] = address(source), address(target), read, written
    blocks = -(-(read + written) * 16 // STREAM_BLOCK_BYTES)

    def call(_keep: Any = (source, target)) -> None:
        machine.launch(STREAM, "stream", {"THREADS": STREAM_THREADS}, blocks, STREAM_THREADS, args)

    return call


# ---- what there is -----------------------------------------------------------------------------------------------------


class Driver(NamedTuple):
    name: str
    version: int | None  # as CUDA writes it: 13020 for 13.2


def find_gpu() -> Driver | None:
    """The first NVIDIA GPU, found without CuPy."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version, count, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
        failed = cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count))
        if not failed and count.value and not cuda.cuDeviceGetName(name, len(name), 0):
            return Driver(name.value.decode(), version.value)
    except (OSError, AttributeError):
        pass
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        return Driver("an NVIDIA GPU", None)
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def install_lines(found: Driver) -> str:
    """The command that brings the GPU backend, for the driver's CUDA if that is known."""
    if found.version is None:
        return '    pip install "cusru[cuda13]"    (with a CUDA 12 driver: "cusru[cuda12]")'
    return f'    pip install "cusru[{"cuda13" if found.version >= 13000 else "cuda12"}]"'


def look_around() -> tuple[Machine, dict[str, str], list[str]]:
    """What to run on, versions, and what the user should be told."""
    versions = {
        "cusru": cusru.__version__,
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "NumPy": np.__version__,
        "CuPy": "not installed",
        "ml_dtypes": "not installed",
    }
    machine: Machine = Simulator() if raw_kernels.simulated() else Numpy()
    trouble = ""
    with contextlib.suppress(ImportError):
        versions["ml_dtypes"] = importlib.import_module("ml_dtypes").__version__
    try:
        cupy = importlib.import_module("cupy")
        versions["CuPy"] = cupy.__version__
        dlpack.check_cupy_version(cupy.__version__)
        runtime, nvrtc = cupy.cuda.runtime, cupy.cuda.nvrtc
        versions["CUDA"] = f"driver {_version(runtime.driverGetVersion())}, runtime {_version(runtime.runtimeGetVersion())}"
        versions["CUDA"] += ", NVRTC {}.{}".format(*nvrtc.getVersion())
        if machine.name == "numpy":
            machine = Cuda(cupy)
    except ModuleNotFoundError:
        pass
    except Exception as error:
        trouble = " ".join(f"{type(error).__name__}: {error}".split())[:300]

    advice = []
    found = find_gpu() if machine.name == "numpy" else None
    if machine.name == "simulator":
        advice.append("Times are the simulator's: they say nothing about a GPU.")
    elif trouble:
        advice.append(f"CuPy is installed but cannot be used here, so this runs on NumPy:\n    {trouble}")
    if found:
        driver = f" (CUDA driver {_version(found.version)})" if found.version else ""
        state = "To mend CuPy" if trouble else "but no CuPy, so this runs on NumPy. To use the GPU"
        advice.append(f"There is {found.name}{driver}{'.' if trouble else ','} {state}:\n{install_lines(found)}")
    return machine, versions, advice


# ---- a command that measures -------------------------------------------------------------------------------------------


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Ctrl-C, a reader that leaves (`| head`) or a full disk end a command without a traceback."""
    status: Any
    try:
        try:
            status = main()
        except SystemExit as end:  # argparse's, after --help
            status = end.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        if error.filename is not None:  # not of the output
            raise
        status = 1
        with contextlib.suppress(OSError, ValueError):  # what Python flushes at its end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"cannot write what there is to say: {error.strerror or error}", file=sys.stderr)
    sys.exit(status)
