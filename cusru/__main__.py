"""`python -m cusru`: what cusru runs on here, whether its results are right, and how fast they come.

Runs the forward and the backward in every dtype and holds each result against the equations, computed step by step in a
wider type. The exit status is 1 if an error is out of its bound. The output is what a bug report wants to show.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

import cusru
from cusru import dlpack, raw_kernels, reference

TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 1e-3, "bfloat16": 5e-3}  # of a result held in that dtype
CHECKED = 16  # of the D columns, for every batch
FORWARD, BACKWARD = ("h", "c", "c_last"), ("u", "x", "bias", "weight_c", "c0")
Array = np.ndarray


# ---- where it runs -----------------------------------------------------------------------------------------------------


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


class Cpu:
    """NumPy arrays: the NumPy backend, or the simulator."""

    def __init__(self, simulated: bool) -> None:
        self.backend = "simulator (the CUDA kernels, compiled for the CPU)" if simulated else "NumPy"
        self.device = f"{_processor()}, {os.cpu_count()} cores"
        self.shape = (64, 8, 256) if simulated else (256, 16, 512)

    def cast(self, a: Array, dtype: str) -> Any:
        if dtype != "bfloat16":
            return a.astype(dtype)
        bits = np.empty(a.shape, np.uint16)
        reference.narrow(a, bits)
        return Bits(bits)

    def put(self, a: Any) -> Any:
        return a

    def get(self, a: Any) -> Array:
        return host(a)

    def bytes(self, count: int) -> Any:
        return np.zeros(count, np.uint8)

    def copy(self, source: Any, target: Any) -> None:
        np.copyto(target, source)

    def seconds(self, call: Callable[[], object]) -> float:
        """The best of at most a hundred runs in a fifth of a second, and of two at least: what disturbs a run on a CPU only ever
        makes it longer. The caller has warmed up."""
        best, end, runs = float("inf"), time.perf_counter() + 0.2, 0
        while runs < 2 or (runs < 100 and time.perf_counter() < end):
            start = time.perf_counter()
            call()
            best, runs = min(best, time.perf_counter() - start), runs + 1
        return best


class Gpu:
    """CuPy arrays: the CUDA kernels. Raises where CuPy finds no device that works."""

    backend = "CuPy (the CUDA kernels)"
    shape = (512, 32, 512)

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
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

    def copy(self, source: Any, target: Any) -> None:
        target.data.copy_from_device_async(source.data, source.nbytes)

    @functools.cached_property
    def _filler(self) -> tuple[Any, Any]:
        return self.bytes(2**28), self.bytes(2**28)

    def empty_l2(self, work: int) -> None:
        """And keep the device busy by so many copies. The sum that comes last leaves no line that must be written back."""
        for _ in range(work):
            self.copy(*self._filler)
        self._filler[0].view("u8").sum()

    def seconds(self, call: Callable[[], object], before: Callable[[int], object] | None = None) -> float:
        """The median of ten runs (of three, if they take long), by events on the stream. Before each, `before` gives the device
        something to do, by default what empties L2: meanwhile Python prepares the launch that is timed. If Python was not
        done in time the run does not count, and from then on there is twice as much to do."""
        times: list[float] = []
        work = 10
        while len(times) < 3 or (len(times) < 10 and sum(times) < 0.5):
            start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
            (before or self.empty_l2)(work)
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


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


def look_around() -> tuple[Cpu | Gpu, dict[str, str], list[str]]:
    """What to run on, versions, and what the user should be told."""
    versions = {
        "cusru": cusru.__version__,
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "NumPy": np.__version__,
        "CuPy": "not installed",
        "ml_dtypes": "not installed",
    }
    simulated = raw_kernels.simulated()
    if simulated:
        from cusru import simulator

        simulator.compiler()
    gpu: Gpu | None = None
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
        gpu = None if simulated else Gpu(cupy)
    except ModuleNotFoundError:
        pass
    except Exception as error:
        trouble = " ".join(f"{type(error).__name__}: {error}".split())[:300]

    advice = []
    found = None if gpu or simulated else find_gpu()
    if simulated:
        advice.append("Times are the simulator's: they say nothing about a GPU.")
    elif trouble:
        advice.append(f"CuPy is installed but cannot be used here, so this runs on NumPy:\n    {trouble}")
    if found:
        driver = f" (CUDA driver {_version(found.version)})" if found.version else ""
        state = "To mend CuPy" if trouble else "but no CuPy, so this runs on NumPy. To use the GPU"
        advice.append(f"There is {found.name}{driver}{'.' if trouble else ','} {state}:\n{install_lines(found)}")
    return gpu or Cpu(simulated), versions, advice


# ---- what is right -----------------------------------------------------------------------------------------------------


def sigmoid(a: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-a)))


def truth(
    u: Array, x: Array, bias: Array, weight_c: Array, c0: Array, grad_h: Array, grad_c_last: Array
) -> dict[str, tuple[Array, Array]]:
    """Every result as the equations say, and beside it the magnitude that its error is measured by: the largest in its
    column over time, a difference counting with both its terms, a sum with all."""
    steps, (b_f, b_r), (v_f, v_r) = range(len(u)), bias, weight_c
    u0, u1, u2 = np.moveaxis(u, 3, 0)
    c, f = np.empty((len(u) + 1, *c0.shape), u.dtype), np.empty_like(u0)
    c[0] = c0
    for t in steps:
        f[t] = sigmoid(u1[t] + b_f + v_f * c[t])
        c[t + 1] = f[t] * c[t] + (1 - f[t]) * u0[t]
    before, after = c[:-1], c[1:]
    r = sigmoid(u2 + b_r + v_r * before)

    reset = r * (1 - r)
    grad_u2 = grad_h * (after - x) * reset
    grad_c, carry = grad_h * r, grad_c_last
    carries = [carry]
    for t in reversed(steps):
        grad_c[t] += carry
        carry = grad_c[t] * (f[t] + (before[t] - u0[t]) * f[t] * (1 - f[t]) * v_f) + grad_u2[t] * v_r
        carries.append(carry)
    grad_u1 = grad_c * (before - u0) * f * (1 - f)
    of_u1 = abs(grad_c) * (abs(before) + abs(u0)) * f * (1 - f)
    of_u2 = abs(grad_h) * (abs(after) + abs(x)) * reset
    grad_u0, grad_x = grad_c * (1 - f), grad_h * (1 - r)

    def largest(a: Array) -> Array:
        return np.asarray(abs(a).max(axis=0))

    def total(*terms: Array) -> Array:
        return np.stack([a.sum(axis=(0, 1)) for a in terms])

    return {
        "h": (r * after + (1 - r) * x, largest(abs(r * after) + abs((1 - r) * x))),
        "c": (after, largest(c)),
        "c_last": (after[-1], largest(c)),
        "u": (np.stack([grad_u0, grad_u1, grad_u2], axis=3), largest(np.stack([abs(grad_u0), of_u1, of_u2], axis=3))),
        "x": (grad_x, largest(grad_x)),
        "bias": (total(grad_u1, grad_u2), total(of_u1, of_u2)),
        "weight_c": (total(grad_u1 * before, grad_u2 * before), total(of_u1 * abs(before), of_u2 * abs(before))),
        "c0": (carry, largest(np.stack(carries))),
    }


# ---- one dtype ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    dtype: str
    direction: str
    error: float  # over its bound, the worst of all results
    worst: str  # the result that has it
    seconds: float
    gb_per_s: float  # of the floor: each input read once, each output written once
    of_copy: float  # the time of a copy that moves as many bytes, over this time


def make(shape: tuple[int, int, int]) -> dict[str, Array]:
    length, batch, width = shape
    rng = np.random.default_rng(0)
    shapes = {
        "u": (length, batch, width, 3), "x": shape, "bias": (2, width), "weight_c": (2, width), "c0": (batch, width),
        "grad_h": shape, "grad_c_last": (batch, width),
    }  # fmt: skip
    values = {name: rng.standard_normal(of, dtype=np.float32) for name, of in shapes.items()}
    values["bias"] += 1
    values["weight_c"] *= 0.5
    return values


def measure(machine: Cpu | Gpu, values: dict[str, Array], dtype: str) -> Iterator[Row]:
    state = "float64" if dtype == "float64" else "float32"
    width = values["x"].shape[2]
    values = {name: machine.cast(a, state if name in ("c0", "grad_c_last") else dtype) for name, a in values.items()}
    pick = slice(None, None, -(-width // CHECKED))

    def part(a: Any) -> Any:  # of D, which is the last axis of all but u's arrays
        return a[:, :, pick] if a.ndim == 4 else a[..., pick]

    wider = np.longdouble if dtype == "float64" else np.float64
    right = truth(**{name: host(part(a)).astype(wider) for name, a in values.items()})
    arrays = {name: machine.put(a) for name, a in values.items()}
    u, x, grad_h, grad_c_last = (arrays.pop(name) for name in ("u", "x", "grad_h", "grad_c_last"))

    def own(names: tuple[str, ...]) -> list[Any]:
        """`out` with our own arrays for what NumPy cannot hold, None for the rest."""
        like = (values.get({"h": "x"}.get(name, name)) for name in names)
        return [Bits(np.empty_like(a.bits)) if isinstance(a, Bits) else None for a in like]

    forward = cusru.sru_forward(u, x, **arrays, out=own(FORWARD))

    def run(direction: str, out: Any = None, workspace: Any = None) -> Any:
        if direction == "forward":
            return cusru.sru_forward(u, x, **arrays, out=out, workspace=workspace)
        return cusru.sru_backward(grad_h, grad_c_last, forward.c, u, x, **arrays, out=out, workspace=workspace)

    for direction, names in (("forward", FORWARD), ("backward", BACKWARD)):
        results = run(direction, own(names))
        errors = {}
        for name in names:
            result = part(getattr(results, name))
            got, (want, magnitude) = machine.get(result), right[name]
            bound = TOLERANCE["bfloat16" if isinstance(result, Bits) else got.dtype.name] * magnitude
            errors[name] = float((abs(got.astype(wider) - want) / bound).max())
        worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))

        workspace = machine.bytes(cusru.workspace_size(direction, u, x, **arrays))
        inputs = [u, x, *arrays.values()] + ([grad_h, grad_c_last, forward.c] if direction == "backward" else [])
        floor = sum(a.nbytes for a in (*inputs, *results))
        source, target = machine.bytes(floor // 2), machine.bytes(floor // 2)
        machine.copy(source, target)
        of_copy = machine.seconds(functools.partial(machine.copy, source, target))
        seconds = machine.seconds(functools.partial(run, direction, results, workspace))
        yield Row(dtype, direction, errors[worst], worst, seconds, floor / seconds / 1e9, of_copy / seconds)


# ---- the report --------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cusru", description=(__doc__ or "").split("\n", 1)[1].strip())
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    as_json = parser.parse_args(arguments).json

    def say(text: str = "") -> None:
        if not as_json:
            print(text, flush=True)

    try:
        machine, versions, advice = look_around()
    except (ValueError, RuntimeError) as error:  # of what CUSRU_SIMULATE asks for
        parser.error(str(error))
    say(f"cusru {cusru.__version__}\n")
    for name, value in {"backend": machine.backend, "device": machine.device, **versions}.items():
        if name != "cusru":
            say(f"  {name:<11}{value}")
    for text in advice:
        say("\n" + text)

    say("\nSRU with skip input and weight_c, L = {}, B = {}, D = {}, every state saved\n".format(*machine.shape))
    say(f"  {'dtype':<10}{'pass':<10}{'error / bound':>14}{'time':>13}{'GB/s':>9}{'of a copy':>12}")
    values = make(machine.shape)
    rows: list[Row] = []
    skipped = {}
    for name in TOLERANCE:
        if name == "bfloat16" and isinstance(machine, Gpu) and versions["ml_dtypes"] == "not installed":
            skipped[name] = "skipped: CuPy has no bfloat16 without the package ml_dtypes (pip install ml_dtypes)"
            say(f"  {name:<10}{skipped[name]}")
            continue
        for row in measure(machine, values, name):
            rows.append(row)
            flag = "" if row.error <= 1 else "   OUT OF BOUNDS"
            say(
                f"  {row.dtype:<10}{row.direction:<10}{row.error:>14.3f}{row.seconds * 1e3:>10.3f} ms{row.gb_per_s:>9.2f}"
                f"{row.of_copy:>12.2f}{flag}"
            )

    bad = [row for row in rows if not row.error <= 1]
    say(
        "\nerror: the largest of any result, against the equations in wider arithmetic. GB/s: each input read once and each\n"
        "output written once, over the time. of a copy: the time of a copy that moves as many bytes, over the time.\n"
    )
    for row in bad:
        say(f"OUT OF BOUNDS: {row.dtype} {row.direction}, result {row.worst}: {row.error:.3g} times its bound")
    if not bad:
        say("All results are within their bounds.")
    if as_json:
        report = {
            **versions, "backend": machine.backend, "device": machine.device, "shape": machine.shape, "advice": advice,
            "rows": [row._asdict() for row in rows], "skipped": skipped, "ok": not bad,
        }  # fmt: skip
        print(json.dumps(report, indent=2))
    return 1 if bad else 0


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


if __name__ == "__main__":
    run_command(main)
