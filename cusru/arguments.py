"""The kernels' arguments, one row for each array. From this table come the struct that a kernel takes, the shapes and dtypes that
are checked, the results that are allocated, and the schema of torch's operators: `kernels/relay.cuh` says what each is for."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Dtypes: that of u; that of the state; either of these (then the kernel is told which); of a mask
OWN, STATE, EITHER, MASK = "own", "state", "either", "mask"

STATES = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}  # the state's, by u's
ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1, "uint8": 1}


class Argument(NamedTuple):
    dtype: str
    shapes: tuple[str, ...]  #: a letter an axis: L steps, S saved states, B, D, K values of u, R forget and reset row, F = 2*D


_INPUTS = {
    "u": Argument(OWN, ("LBDK",)),
    "x": Argument(OWN, ("LBD",)),
    "bias": Argument(EITHER, ("RD", "F")),
    "weight_c": Argument(EITHER, ("RD", "F", "LBDR")),
    "c0": Argument(EITHER, ("BD",)),
    "mask_c": Argument(EITHER, ("BD",)),
    "mask_pad": Argument(MASK, ("LB",)),
    "scale_x": Argument(EITHER, ("",)),
}
_GRADIENTS = tuple(f"grad_{name}" for name in ("u", "x", "bias", "weight_c", "c0"))  # the others have none

#: In the order of struct Args
ARRAYS = {
    **_INPUTS,
    "h": Argument(OWN, ("LBD",)),
    "c": Argument(STATE, ("SBD",)),
    "c_last": Argument(STATE, ("BD",)),
    "grad_h": Argument(OWN, ("LBD",)),
    "grad_c_last": Argument(EITHER, ("BD",)),
    **{name: _INPUTS[name.removeprefix("grad_")] for name in _GRADIENTS},
}
#: What else a caller chooses, and its type in torch's schema
OPTIONS = {
    "scale": "float", "activation": "str", "candidate": "str", "mask_target": "str", "bidirectional": "bool", "save_every": "int",
}  # fmt: skip


class Operator(NamedTuple):
    """One pass."""

    direction: str
    inputs: tuple[str, ...]  #: in the order in which they are checked
    required: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def arrays(self) -> tuple[str, ...]:
        """In the order of struct Args, up to the last that this pass has."""
        names = tuple(ARRAYS)
        return names[: names.index(self.results[-1]) + 1]


FORWARD = Operator("forward", tuple(_INPUTS), ("u",), ("h", "c", "c_last"))
BACKWARD = Operator("backward", (*tuple(_INPUTS)[:-1], "grad_h", "grad_c_last", "c", "scale_x"), ("u", "grad_h", "c"), _GRADIENTS)
OPERATORS = {one.direction: one for one in (FORWARD, BACKWARD)}


def allowed_dtypes(name: str, dtype: str) -> tuple[str, ...]:
    """Of an array, where u has `dtype`."""
    state = STATES[dtype]
    either = (dtype,) if dtype == state else (dtype, state)
    return {OWN: (dtype,), STATE: (state,), EITHER: either, MASK: ("bool", "uint8")}[ARRAYS[name].dtype]


def allowed_shapes(name: str, sizes: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """By rank: of a tracer's sizes only those that must be equal are compared."""
    return {len(axes): tuple([sizes[axis] for axis in axes]) for axes in ARRAYS[name].shapes}


# ---- struct Args -----------------------------------------------------------------------------------------------------

# As a kernel sees it; `frame` and `fill` pack just this (a test holds the three, and relay.cuh, against one another).
ARRAY = np.dtype([("data", "u8"), ("time", "i8"), ("batch", "i8"), ("column", "i8"), ("row", "i8")])
_NUMBERS = ("length", "batch", "width", "save_every", "group", "rows", "sums")
ARGS = np.dtype(
    [(name, ARRAY) for name in ARRAYS]
    + [(name, "u8") for name in ("partials", "checkpoints")]
    + [(name, "i8") for name in _NUMBERS]
    + [("scale", "f8"), ("flags", "i8")]
)
_KERNEL_AXES = {"L": 0, "S": 0, "B": 1, "D": 2, "K": 3, "R": 3}  # time, batch, column, row

#: Flags: an array whose dtype may be EITHER is in u's, not in the state's; and what else is uniform over a launch
NARROW = {n: 1 << i for i, n in enumerate(n for n, a in ARRAYS.items() if a.dtype == EITHER and n not in _GRADIENTS)}
BIDIRECTIONAL, MASK_GATE, GRAD_U_PACKED, STRAIGHT = (1 << len(NARROW) << i for i in range(4))

_PACKED = struct.Struct("=" + "Q32s" * len(ARRAYS) + f"QQ{8 * len(_NUMBERS)}sdq")
_STRUCT = np.dtype((np.void, _PACKED.size))  # CuPy passes an array of one element by value
_PARTIALS = 2 * len(ARRAYS)

Frame = tuple[Any, ...]


def frame(strides: Mapping[str, tuple[tuple[int, ...], int]], numbers: Mapping[str, int], flags: int) -> Frame:
    """The struct's parts that do not change from call to call. `strides`: each array's, in elements, and its itemsize; a flat
    parameter's as those of its two rows."""
    parts: list[Any] = []
    for name, argument in ARRAYS.items():
        in_bytes = [0, 0, 0, 0]
        if name in strides:
            own, itemsize = strides[name]
            axes = next((axes for axes in argument.shapes if len(axes) == len(own)), "")  # scale_x has none, whatever its rank
            for axis, stride in zip(axes, own, strict=False):
                in_bytes[_KERNEL_AXES[axis]] = stride * itemsize
        parts += 0, struct.pack("=4q", *in_bytes)
    sizes = struct.pack(f"={len(_NUMBERS)}q", *[numbers[name] for name in _NUMBERS])
    return (*parts, 0, 0, sizes, 1.0, flags)


def fill(parts: Frame, addresses: Sequence[int], partials: int, checkpoints: int, scale: float) -> np.ndarray:
    """The struct of one call, its own copy; `addresses` in the table's order, 0 where there is no array."""
    values = list(parts)
    values[: 2 * len(addresses) : 2] = addresses
    values[_PARTIALS], values[_PARTIALS + 1], values[_PARTIALS + 3] = partials, checkpoints, scale
    return np.frombuffer(_PACKED.pack(*values), _STRUCT)
