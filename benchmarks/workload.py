"""A case laid out on a machine: its two passes, ready to run again and again, their floor, the yardsticks and the baseline.

`Workload(machine, case, "float32").measure("forward")` is a row of figures, and `.run("forward")` runs the pass once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cusru
from benchmarks import cases
from benchmarks.cases import Case
from cusru import measuring, specialisation
from cusru.measuring import Floor, Machine, address

PASSES = ("forward", "backward")
ORIGINAL = Path(__file__).with_name("original.cu")
ORIGINAL_THREADS = 512


def _nbytes(arrays: Any) -> int:
    return sum(a.nbytes for a in arrays if hasattr(a, "nbytes"))


class Workload:
    def __init__(self, machine: Machine, case: Case, dtype: str, like: Workload | None = None) -> None:
        """like: one whose inputs are shared, which differs in save_every alone."""
        self.machine, self.case, self.dtype = machine, case, dtype
        self.given = {**like.given, "save_every": case.save_every} if like else cases.make(case, dtype, put=machine.put)
        self._forward, self._backward = (getattr(cusru, f"{case.family}_{direction}") for direction in PASSES)
        self.output = self._forward(**self.given)
        self._workspace = {}
        self.results: dict[str, Any] = {"forward": self.output}
        self.gradients: tuple[Any, ...] = ()
        if case.save_every is not None:
            self.gradients = (*cases.make_gradients(case, dtype, put=machine.put), self.output.c)
            self.results["backward"] = self._backward(*self.gradients, **self.given)
        for direction in self.results:
            name = direction if case.family == "sru" else f"{case.family}_{direction}"
            self._workspace[direction] = machine.bytes(cusru.workspace_size(name, **self.given))

    def run(self, direction: str) -> None:
        """As a caller does who owns all memory: nothing is allocated."""
        memory = dict(out=self.results[direction], workspace=self._workspace[direction])
        if direction == "forward":
            self._forward(**self.given, **memory)
        else:
            self._backward(*self.gradients, **self.given, **memory)

    def floor(self, direction: str) -> Floor:
        given = dict(self.given)
        if direction == "backward" and self.case.save_every == 1 and self.case.cell in ("affine", "complement"):
            del given["b"]  # on which no gradient depends
        read = _nbytes(given.values()) + (_nbytes(self.gradients) if direction == "backward" else 0)
        return Floor(read, _nbytes(self.results[direction]))

    # ---- yardsticks ----

    def copy(self, floor: Floor) -> Callable[[], object]:
        return measuring.copying(self.machine, floor)

    def stream(self, floor: Floor) -> Callable[[], object]:
        return measuring.streaming(self.machine, floor)

    # ---- the baseline ----

    @property
    def has_original(self) -> bool:
        """Whether the original design had such a variant, and the machine runs kernels."""
        case = self.case
        return (
            hasattr(self.machine, "launch")
            and case.family == "sru"
            and not case.starts
            and case.candidate == "identity"
            and case.weight_c != "step"
            and case.layout == "k_inner"
            and case.activation in ("identity", "tanh")
        )

    @functools.cached_property
    def original(self) -> Original:
        return Original(self)

    # ---- figures ----

    def calls(self, direction: str, original: bool = True) -> dict[str, Callable[[], object]]:
        """The pass, and the original design's where it had one."""
        ours = {"cusru": functools.partial(self.run, direction)}
        return ours | ({"original": functools.partial(self.original.run, direction)} if original and self.has_original else {})

    def measure(
        self, direction: str, others: dict[str, Callable[[], object]] | None = None, cache: str = "", original: bool = True
    ) -> dict[str, Any]:
        """Times of the pass, of its yardsticks, of the original design and of `others`, from one run. cache: one of the machine's
        `caches`, by default the first."""
        cache = cache or self.machine.caches[0]
        floor, time = self.floor(direction), functools.partial(self.machine.time, cache=cache)
        calls = self.calls(direction, original) | (others or {})
        yardsticks = {"copy": self.copy(floor)}
        if hasattr(self.machine, "launch"):
            yardsticks["stream"] = self.stream(floor)
        for call in (*calls.values(), *yardsticks.values()):
            call()  # compiled, and in place
        of = {name: time(call) for name, call in yardsticks.items()}
        fastest = min(of.values())
        return {
            "case": self.case.name, "shape": [self.case.L, self.case.B, self.case.D], "pass": direction, "dtype": self.dtype,
            "backend": self.machine.name, "cache": cache, "options": self.case.options, "floor_bytes": floor.bytes,
            "read_share": floor.read / floor.bytes, **{f"{name}_gb_per_s": floor.bytes / t / 1e9 for name, t in of.items()},
            "times": {
                name: {
                    "seconds": (seconds := time(call)), "gb_per_s": floor.bytes / seconds / 1e9,
                    "of_copy": of["copy"] / seconds, "of_ceiling": fastest / seconds,
                }
                for name, call in calls.items()
            },
        }  # fmt: skip


class Original:
    """The same passes by the kernels of original.cu, in memory of their own."""

    INPUTS = ("u", "x", "bias", "weight_c", "c0", "mask_c", "mask_pad", "grad_h", "grad_c_last")
    RESULTS = ("h", "c", "c_last", "grad_u", "grad_x", "grad_bias", "grad_weight_c", "grad_c0")
    ARGS = np.dtype(
        [(name, "u8") for name in INPUTS + RESULTS]
        + [(name, "i8") for name in ("length", "batch", "width")]
        + [("scale_x", "f8")]
    )

    def __init__(self, work: Workload) -> None:
        self.machine, case = work.machine, work.case
        given = {name: a for name, a in work.given.items() if hasattr(a, "nbytes")}
        given |= dict(zip(("grad_h", "grad_c_last"), work.gradients, strict=False))
        state = work.output.c_last.dtype
        arrays = {**given, "c": self.machine.empty(work.output.h.shape, state)}
        for name in ("h", "c_last"):
            like = getattr(work.output, name)
            arrays[name] = self.machine.empty(like.shape, like.dtype)
        for name in ("u", "x", "c0"):
            if name in given:
                arrays[f"grad_{name}"] = self.machine.empty(given[name].shape, given[name].dtype)
        for name in ("bias", "weight_c"):
            if name in given:
                arrays[f"grad_{name}"] = self.machine.empty((2, case.B, case.D), state)
        self.arrays = arrays
        self.args = np.zeros((), self.ARGS)
        for name in self.INPUTS + self.RESULTS:
            self.args[name] = address(arrays[name]) if name in arrays else 0
        self.args["length"], self.args["batch"], self.args["width"] = case.L, case.B, case.D
        self.args["scale_x"] = case.scale_x
        self.blocks = -(-case.B * case.D // ORIGINAL_THREADS)
        self.macros = {
            "TYPE": specialisation.TYPES[work.dtype], "K": case.k, "TANH_ACTIVATION": int(case.activation == "tanh"),
            "MASK_GATE": int(case.mask_target == "gate"), "BIDIRECTIONAL": int(case.bidirectional),
        }  # fmt: skip
        self.sums = {n: self.machine.empty((2, case.D), state) for n in ("grad_bias", "grad_weight_c") if n in arrays}
        self.run("forward")

    def run(self, direction: str) -> None:
        entry = f"original_{direction}"
        self.machine.launch(ORIGINAL, entry, self.macros, self.blocks, ORIGINAL_THREADS, self.args)
        if direction == "backward":
            for name, total in self.sums.items():
                self.arrays[name].sum(axis=1, out=total)
