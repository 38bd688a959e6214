"""From a checked call to a launched kernel: the plan, the specialisation, the compiled RawKernel, the argument struct.

A plan has a numeric half (which sums are formed, in which order: from shape, dtype and options, so that every memory layout
gives the same bits) and a memory half (columns per thread, vector accesses: from strides and alignment). The kernels stand
in `kernels/sru.cuh`; docs/performance.md says what each choice costs in bytes and registers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cusru import dlpack
from cusru.dlpack import Array

if TYPE_CHECKING:
    from cusru.api import Problem

# ----------------------------------------------------------------------------------------------------------------------
# Specialisations: what is fixed when a kernel is compiled. The numbers are the enums of sru.cuh and numbers.cuh.

TYPES = {"float64": "double", "float32": "float", "float16": "Half", "bfloat16": "Bfloat"}
STORAGE = {"float64": "f8", "float32": "f4", "float16": "u2", "bfloat16": "u2"}
STATES = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}
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
# The plan


class Plan(NamedTuple):
    kernel: Specialisation
    group: int  #: numeric: batches whose parameter gradients one thread of the backward sums
    rows: int  #: numeric: threads along the batch, ceil(B / group)
    sums: int  #: parameter gradients per column that go through the workspace: 0, 2 or 4
    grad_u_packed: bool  #: memory: grad_u is written as vectors of k values
    partial_bytes: int
    checkpoint_bytes: int


def plan(problem: Problem, results: dict[str, Array] | None = None, multiprocessors: int = 1) -> Plan:
    """Without `results` (and their layout) the memory half is the scalar one; sizes do not depend on it."""
    backward = problem.direction == "backward"
    recompute = backward and problem.block != 1
    given = problem.arrays
    if "weight_c" not in given:
        weight = "none"
    elif not problem.step_weight:
        weight = "column"
    else:
        weight = "step" if given["weight_c"].dtype == problem.dtype else "step_state"

    # Partial sums take rows * sums states for L * B * 10 values of traffic; 32 steps or more a thread keep them under 5%.
    group = max(1, min(-(-32 // max(problem.length, 1)), problem.batch)) if backward else 1
    rows = -(-problem.batch // group)
    wanted = given if results is None else results
    sums = 2 * ("bias" in wanted) + 2 * (weight == "column" and "weight_c" in wanted) if backward else 0
    state_bytes = np.dtype(problem.state).itemsize
    tiles = -(-min(problem.block or 1, problem.length) // TILE)
    checkpoints = max(tiles - 1, 0) * problem.batch * problem.width * state_bytes if recompute else 0

    columns, packed, grad_u_packed = 1, False, False
    if results is not None:
        columns, packed, grad_u_packed = _memory_half(problem, results, recompute, rows, multiprocessors)
    skip = "projected" if problem.k == 4 else "x" if "x" in given else "none"
    kernel = Specialisation(
        problem.direction, problem.dtype, skip, problem.activation, problem.candidate, weight, columns, packed, recompute
    )
    partials = rows * sums * problem.width * state_bytes if rows > 1 else 0  # a single row's sums are the gradients
    return Plan(kernel, group, rows, sums, grad_u_packed, partials, checkpoints)


def _memory_half(
    problem: Problem, results: dict[str, Array], recompute: bool, rows: int, multiprocessors: int
) -> tuple[int, bool, bool]:
    """Columns per thread, and whether u and grad_u are accessed as vectors of whole columns."""
    arrays = problem.arrays
    directions = 2 if problem.bidirectional else 1
    u, grad_u = arrays["u"], results.get("u")
    streams = [a for n, a in {**arrays, **results}.items() if len(a.shape) == 3]  # (L or blocks, B, D): x, h, c, grad_h, ...
    weights = [a["weight_c"] for a in (arrays, results) if problem.step_weight and "weight_c" in a]

    columns = wide(problem.dtype, recompute)
    # Four warps for each multiprocessor come before vectors: a warp alone on its scheduler waits for its own arithmetic.
    enough = rows * problem.width // columns >= 4 * 32 * multiprocessors
    if (
        columns > 1
        and enough
        and problem.width % (columns * directions) == 0
        and all(_aligned(a, columns, 1) for a in streams)
        and all(_aligned(a, columns, 2) for a in weights)
    ):
        packed = _aligned(u, columns, problem.k)
        grad_u_packed = grad_u is not None and _aligned(grad_u, columns, problem.k)
        if (packed or _aligned(u, columns, 1)) and (grad_u is None or grad_u_packed or _aligned(grad_u, columns, 1)):
            return columns, packed, grad_u_packed
    packed = problem.k == 4 and _aligned(u, 1, 4)
    return 1, packed, grad_u is not None and _aligned(grad_u, 1, problem.k)


def _aligned(array: Array, columns: int, unit: int) -> bool:
    """Whether each `columns` neighbouring columns of `unit` values lie in a row, at addresses that vectors may have."""
    size = array.itemsize
    *outer, column = array.strides[:3]
    if unit > 1 and array.strides[3] != 1:
        return False
    if columns > 1 and column != unit:
        return False
    width = access_width(columns * unit * size)
    inner = array.strides[3:] if unit == 1 else ()
    steps = [s for s, extent in zip((*outer, *inner), (*array.shape[:2], *array.shape[3:]), strict=False) if extent > 1]
    if columns == 1:
        steps.append(column)
    return array.pointer % width == 0 and all(s * size % width == 0 for s in steps)


def access_width(size: int) -> int:
    """The widest access, up to 16 bytes, of which `size` is a multiple."""
    return next(width for width in (16, 8, 4, 2, 1) if size % width == 0)


ALIGNMENT = 16


def workspace_size(problem: Problem) -> int:
    """Bytes. It depends on the numeric half of the plan only."""
    return _workspace_size(plan(problem))


def _workspace_size(chosen: Plan) -> int:
    """A workspace may begin at any address, so there is room to align it."""
    size = _rounded(chosen.partial_bytes) + chosen.checkpoint_bytes
    return size + ALIGNMENT - 1 if size else 0


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# ----------------------------------------------------------------------------------------------------------------------
# Arguments: struct Args of sru.cuh

ARRAY = np.dtype([("data", "u8"), ("time", "i8"), ("batch", "i8"), ("column", "i8"), ("row", "i8")])
INPUTS = ("u", "x", "bias", "weight_c", "c0", "mask_c", "mask_pad", "scale_x")
ARGS = np.dtype(
    [(name, ARRAY) for name in (*INPUTS, "h", "c", "c_last", "grad_h", "grad_c_last")]
    + [(f"grad_{name}", ARRAY) for name in ("u", "x", "bias", "weight_c", "c0")]
    + [(name, "u8") for name in ("partials", "checkpoints")]
    + [(name, "i8") for name in ("length", "batch", "width", "save_every", "group", "rows", "sums")]
    + [("scale", "f8"), ("flags", "i8")]
)
AXES = {  # which axes of the kernel's (time, batch, column, row) an argument has, in its own order
    "bias": (3, 2),
    "c0": (1, 2),
    "mask_c": (1, 2),
    "mask_pad": (0, 1),
    "scale_x": (),
    "c_last": (1, 2),
    "grad_c_last": (1, 2),
    "grad_bias": (3, 2),
    "grad_c0": (1, 2),
}
NARROW = {"bias": 1, "weight_c": 2, "c0": 4, "mask_c": 8, "scale_x": 16, "grad_c_last": 32}
BIDIRECTIONAL, MASK_GATE, GRAD_U_PACKED = 64, 128, 256


def _describe(name: str, array: Array) -> tuple[int, ...]:
    axes = AXES.get(name, (0, 1, 2, 3))
    if name in ("weight_c", "grad_weight_c") and len(array.shape) == 2:
        axes = (3, 2)
    strides = [0, 0, 0, 0]
    for axis, stride in zip(axes, array.strides, strict=False):
        strides[axis] = stride * array.itemsize
    return (array.pointer, *strides)


def arguments(problem: Problem, results: dict[str, Array], chosen: Plan, workspace: int) -> np.ndarray:
    """The struct that the kernels take by value, as CuPy passes one: an array of one element."""
    args = np.zeros((), ARGS)
    backward = problem.direction == "backward"
    for name, array in problem.arrays.items():
        args[name] = _describe(name, array)
    for name, array in results.items():
        name = f"grad_{name}" if backward else name
        args[name] = _describe(name, array)
    args["partials"] = workspace
    args["checkpoints"] = workspace + _rounded(chosen.partial_bytes)
    args["length"], args["batch"], args["width"] = problem.length, problem.batch, problem.width
    args["save_every"] = problem.block or 1
    args["group"], args["rows"], args["sums"] = chosen.group, chosen.rows, chosen.sums
    args["scale"] = problem.scale_x
    flags = BIDIRECTIONAL * problem.bidirectional + MASK_GATE * (problem.mask_target == "gate")
    flags += GRAD_U_PACKED * chosen.grad_u_packed
    for name, flag in NARROW.items():
        if name in problem.arrays and problem.arrays[name].dtype == problem.dtype != problem.state:
            flags += flag
    args["flags"] = flags
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Running


def run(problem: Problem, results: dict[str, Array], workspace: Array | None) -> None:
    """Launch the kernels of one call, inside `current(...)`. Nothing here waits for the device."""
    device = problem.device[1]
    launch, multiprocessors = _machine(problem.device)
    chosen = plan(problem, results, multiprocessors)
    needed = _workspace_size(chosen)
    if needed and workspace is None:
        workspace = dlpack.empty("workspace", (needed,), "uint8", problem.device, "numpy")
    base = _rounded(workspace.pointer) if workspace else 0
    args = arguments(problem, results, chosen, base)

    kernel = chosen.kernel
    threads = chosen.rows * (problem.width // kernel.columns)
    if threads:
        launch(kernel, device, -(-threads // kernel.threads), args)
    if chosen.sums and problem.width and chosen.rows != 1:  # of no rows the sums are 0
        launch(Specialisation("reduce", problem.dtype), device, -(-chosen.sums * problem.width // 32), args)


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


def _machine(device: tuple[str, int]) -> tuple[Callable[[Specialisation, int, int, np.ndarray], None], int]:
    """What launches a kernel for arrays on `device`, and its number of multiprocessors."""
    if device[0] == "cuda":
        return _launch, _multiprocessors(device[1])
    from cusru import simulator

    return _simulate, simulator.multiprocessors


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


def _launch(kernel: Specialisation, device: int, blocks: int, args: np.ndarray) -> None:
    _compiled(kernel, device)((blocks,), (kernel.threads,), (args,))


def _simulate(kernel: Specialisation, device: int, blocks: int, args: np.ndarray) -> None:
    from cusru import simulator

    simulator.load(source(), kernel.entry, kernel.macros)(blocks, kernel.threads, args)


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


@contextlib.contextmanager
def current(device: tuple[str, int], stream: int | None) -> Iterator[None]:
    """Make the device and the stream CuPy's current ones: allocations, launches and exports belong to them."""
    if device[0] == "cpu":
        yield
        return
    import cupy

    handle = stream or 0
    with cupy.cuda.Device(device[1]):  # first: CuPy takes a stream from outside for the current device's
        outside = cupy.cuda.get_current_stream(device[1])
        with outside if outside.ptr == handle else cupy.cuda.Stream.from_external(_Handle(handle)):
            yield
