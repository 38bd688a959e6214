"""What a kernel is compiled for: the choices that are fixed by then, and all the kernels that there are. The numbers are the
enums of `kernels/step.cuh` and `kernels/numbers.cuh`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from cusru.arguments import ITEMSIZES, STATES

TYPES = {"float64": "double", "float32": "float", "float16": "Half", "bfloat16": "Bfloat"}
SKIPS = {"none": 0, "x": 1, "projected": 2}
ACTIVATIONS = {"identity": 0, "tanh": 1, "relu": 2, "selu": 3}
CANDIDATES = {"identity": 0, "tanh": 1}
WEIGHTS = {"none": 0, "column": 1, "step": 2, "step_state": 3}
CELLS = {
    "sru": 0,
    "f": 1,
    "fo": 2,
    "ifo": 3,
    "affine": 4,
    "complement": 5,
    "blend": 6,
}  # the QRNN's by pooling, the linear by form
POOLINGS, FORMS = ("f", "fo", "ifo"), ("affine", "complement", "blend")
MARKS = {"none": 0, "padding": 1, "starts": 2}  # with starts there may be padding too
PASSES = {"forward": 0, "backward": 1, "reduce": 2, "clear": 3}

WARPS = 7  # of a block at most: they take turns
UNIT = 32  # steps, at most, that the recomputing backward walks forward at a time
# Warps of a block that work, at most, where time is split: of one of two blocks for which a multiprocessor's registers have room,
# so that one computes while the other waits, and of one that has all of them. (Where the forward is affine one more warp talks.)
SPLIT = {"forward": {2: 5, 1: 11}, "backward": {2: 4}, "guess": {2: 6, 1: WARPS}}
STRETCH = 8  # steps that a warp has of a span, backward; forward they are a tile
REDUCE_THREADS, REDUCE_COLUMNS = 512, 8  # of a block of the reduction
CLEAR_THREADS = 256


class Specialisation(NamedTuple):
    """One kernel. `reduce` has only a dtype, `clear` not even that."""

    direction: str
    dtype: str
    skip: str = "none"
    activation: str = "identity"
    candidate: str = "identity"
    weight: str = "none"
    columns: int = 1  #: neighbouring columns that one thread walks, and the vector width
    packed: bool = False  #: the k values of `columns` columns lie side by side
    recompute: bool = False  #: backward from states saved every S > 1 steps
    alone: bool = False  #: a block is one warp, and there are no turns to take
    marks: str = "none"  #: whether there is a mask_pad or starts
    cell: str = "sru"
    zoneout: bool = False  #: of the QRNN: an array of them
    split: int = 0  #: time is split over warps and blocks: of these a multiprocessor has room for so many
    mend: bool = False  #: what was guessed, where that is not affine

    @property
    def k(self) -> int:
        """Values of u for each column and step."""
        return {"f": 2, "fo": 3, "ifo": 4, "sru": 4 if self.skip == "projected" else 3}.get(self.cell, 1)

    @property
    def gates(self) -> int:
        """That weight_c, or a in its place, has a value for."""
        return 2 if self.cell == "sru" else 1

    @property
    def sums(self) -> int:
        """Parameter gradients of a column, at most."""
        return self.gates * ((self.cell == "sru") + (self.weight == "column")) if self.cell not in POOLINGS else 0

    @property
    def reads_u(self) -> bool:
        """The gradients of these forms do not depend on b."""
        return not (self.direction == "backward" and not self.recompute and self.cell in ("affine", "complement"))

    @property
    def entry(self) -> str:
        return f"cusru_{self.direction}"

    @property
    def threads(self) -> int:
        """Per block, at most."""
        return 32 * self.warps

    @property
    def warps(self) -> int:
        """Per block, at most. There are 15 barriers; a warp has one forward, two backward, three where it recomputes."""
        if self.direction in ("reduce", "clear"):
            return (REDUCE_THREADS if self.direction == "reduce" else CLEAR_THREADS) // 32
        if self.split:
            return (
                SPLIT[self.direction][self.split] + (self.direction == "forward") if self.affine else SPLIT["guess"][self.split]
            )
        return 1 if self.alone else 4 if self.recompute else WARPS

    @property
    def lean(self) -> bool:
        """Whether what is guessed takes so few registers that two blocks fit on a multiprocessor."""
        simple = self.activation == self.candidate == "identity"
        return simple and self.weight == "column" and self.marks != "starts" and self.dtype != "float64"

    @property
    def affine(self) -> bool:
        """In what goes from step to step."""
        return self.direction == "backward" or self.cell != "sru" or self.weight == "none"

    @property
    def tile(self) -> int:
        """Steps that are unrolled, and a warp's turn, as many as registers hold. No bit depends on whether it is 4 or 8, but
        parameter sums are grouped by min(tile, 4) steps, so that a tile of 2 must follow from options and dtype alone. Eight are
        what each of the recomputing backward's four warps has of a saved block of 32."""
        simple, steps = self.activation == self.candidate == "identity", self.weight.startswith("step")
        if self.direction == "forward":
            return 4 if self.dtype == "float64" else 8
        if (steps and not simple) or (self.split and self.dtype == "float64" and self.cell in POOLINGS):
            return 2
        packed = self.packed or self.cell in FORMS
        eight = self.recompute and not self.alone and self.marks == "none" and packed and simple
        eight = eight and not (steps and self.cell == "sru") and not self.split
        return 8 if eight and self.dtype != "float64" and (self.weight, self.skip) != ("column", "projected") else 4

    @property
    def stretch(self) -> int:
        """Steps that a warp has of a span, where time is split."""
        return STRETCH if self.direction == "backward" else self.tile

    @property
    def parts(self) -> int:
        """Of a stretch, a tile each."""
        return self.stretch // self.tile

    @property
    def waiting(self) -> int:
        """Values of a step of a column that wait in shared memory, where the backward's time is split, for where it starts."""
        sru, g = self.cell == "sru", self.cell not in ("affine", "complement")
        weighted = sru and self.weight != "none"
        of_output = sru or self.cell in ("fo", "ifo")
        return 3 + g + of_output + weighted + (weighted and self.weight != "column") + (self.k == 4)

    @property
    def step_bytes(self) -> int:
        """Of shared memory, for a step's inputs."""
        item, state = ITEMSIZES[self.dtype], ITEMSIZES[STATES[self.dtype]]
        backward = self.direction == "backward"
        of_step = self.k * self.reads_u + (self.skip == "x") + backward  # u, x, grad_h
        of_step += self.gates * (self.weight == "step")
        of_state = self.gates * (self.weight == "step_state") + backward  # weights, c
        return 32 * self.columns * (of_step * item + of_state * state + self.zoneout)

    def shared(self, warps: int) -> int:
        """Bytes of a block of so many warps: their inputs, and what they hand to one another."""
        if self.direction in ("reduce", "clear"):
            return 0
        state = ITEMSIZES[STATES[self.dtype]]
        if self.split and not self.affine:  # the state that a warp is given; notes
            return warps * (32 * self.columns * state + self.tile * self.step_bytes) + 64
        if self.split:  # what a stretch does to any state, where it starts, what its warp hands on; and two numbers
            forward, column = self.direction == "forward", self.columns * state
            warps -= forward  # one talks
            of_warp = (3 + (1 if forward else self.parts * self.sums + self.recompute)) * column
            if not forward:  # what waits, and of each part a word
                of_warp += self.stretch * self.waiting * column + 4 * self.parts * (self.cell not in FORMS)
            return 32 * (warps * of_warp + 5 * column) + 16 + warps * self.stretch * self.step_bytes
        sums = 0 if self.direction == "forward" else self.sums
        values = 0  # of each column: what each warp is given (carry, sums with what they lost, state), and a group's sum
        if not self.alone:
            values = warps * (1 + 2 * sums + self.recompute) + sums
        slots = UNIT if self.recompute else warps * self.tile
        return values * 32 * self.columns * state + slots * self.step_bytes

    @property
    def macros(self) -> tuple[str, ...]:
        defines = {"PASS": PASSES[self.direction], "TYPE": TYPES[self.dtype], "THREADS": self.threads}
        if self.direction == "reduce":
            defines["COLUMNS"] = REDUCE_COLUMNS
        elif self.direction != "clear":
            defines |= {
                "SKIP": SKIPS[self.skip],
                "ACTIVATION": ACTIVATIONS[self.activation],
                "CANDIDATE": CANDIDATES[self.candidate],
                "WEIGHT": WEIGHTS[self.weight],
                "COLUMNS": self.columns,
                "PACKED": str(self.packed).lower(),
                "MARKS": MARKS[self.marks],
                "CELL": CELLS[self.cell],
                "ZONEOUT": str(self.zoneout).lower(),
                "TILE": self.tile,
                "UNIT": UNIT,
                "STEP_BYTES": self.step_bytes,
                "WAITING": self.waiting,
                "RESIDENT": 8 if self.alone else max(self.split, 1),
                "RECOMPUTE": str(self.recompute).lower(),
                "SPLIT": int(self.split > 0),
                "AFFINE": int(self.affine),
                "MEND": str(self.mend).lower(),
            }
        return tuple(f"-DCUSRU_{name}={value}" for name, value in defines.items())


class Limits(NamedTuple):
    """Of a device."""

    multiprocessors: int
    shared: int = 227 << 10  #: bytes of a block, at most
    #: For tests: () for never; (warps of a block[, spans from anchor to anchor, a power of two]), the first where time is guessed
    #: the least tiles of a span, a power of two
    split: tuple[int, ...] | None = None


class Launch(NamedTuple):
    kernel: Specialisation
    grid: tuple[int]
    block: tuple[int]
    shared: int  #: bytes


def columns(dtype: str) -> tuple[int, ...]:
    """That a thread may walk: two where layout, alignment and shared memory allow, if registers do."""
    return (1,) if dtype == "float64" else (2, 1)


def specialisations() -> Iterator[Specialisation]:
    """Every kernel that a call can ask for."""
    both = (False, True)
    for dtype in TYPES:
        yield Specialisation("reduce", dtype)
        if dtype == "float32":
            yield Specialisation("clear", dtype)
        weights = [w for w in WEIGHTS if w != "step_state" or dtype in ("float16", "bfloat16")]
        cells: list[dict[str, Any]] = [
            dict(skip=s, activation=a, candidate=c, weight=w)
            for s in SKIPS
            for a in ACTIVATIONS
            for c in CANDIDATES
            for w in weights
        ]
        cells += [dict(cell=pooling, zoneout=zoneout) for pooling in POOLINGS for zoneout in both]
        cells += [dict(cell=form, weight=w) for form in FORMS for w in weights if w != "none"]
        ways: list[dict[str, Any]] = [dict(alone=False), dict(alone=True), dict(split=2), dict(split=1)]
        ways += [way | dict(mend=True) for way in ways[2:]]
        passes = (("forward", False), ("backward", False), ("backward", True))
        for (direction, recompute), cell, each, packed, way, marks in itertools.product(
            passes, cells, columns(dtype), both, ways, MARKS
        ):
            if packed and cell.get("cell") in FORMS:  # whose u has one value
                continue
            one = Specialisation(direction, dtype, columns=each, packed=packed, recompute=recompute, marks=marks, **cell, **way)
            resident = (0, *SPLIT[direction]) if one.affine else (0, 1 + one.lean)
            if one.split in resident and not (one.mend and one.affine):
                yield one
