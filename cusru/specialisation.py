"""What a kernel is compiled for: the choices that are fixed by then, and all the kernels that there are. The numbers are the
enums of `kernels/sru.cuh` and `kernels/numbers.cuh`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from cusru.arguments import ITEMSIZES, STATES

TYPES = {"float64": "double", "float32": "float", "float16": "Half", "bfloat16": "Bfloat"}
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
        item, state = ITEMSIZES[self.dtype], ITEMSIZES[STATES[self.dtype]]
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


class Launch(NamedTuple):
    kernel: Specialisation
    grid: tuple[int]
    block: tuple[int]


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
