"""The operators, and the kernels' arguments, one row for each array. From these tables come the struct that a kernel takes, the
shapes and dtypes that are checked, the results that are allocated, and the schema of torch's operators: `kernels/relay.cuh` says
what each is for."""

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
    name: str = ""  #: the caller's, where it is not the slot's


#: The slots of struct Args, in its order. What lies in a slot is the operator's to say: b of the linear recurrence takes the
#: place of u, its a that of weight_c.
INPUTS = ("u", "x", "bias", "weight_c", "c0", "mask_c", "mask_pad", "starts", "zoneout", "scale_x")
GRADIENTS = tuple(f"grad_{name}" for name in INPUTS[:5])  # the others have none
ARRAYS = (*INPUTS, "h", "c", "c_last", "grad_h", "grad_c_last", *GRADIENTS)


class Operator(NamedTuple):
    """One pass. A slot names an array of it throughout cusru; `public` is what its caller calls it."""

    name: str
    family: str
    direction: str
    arrays: Mapping[str, Argument]  #: by slot
    inputs: tuple[str, ...]  #: slots, in the order in which they are checked
    required: tuple[str, ...]
    results: tuple[str, ...]
    choices: tuple[str, ...]  #: options that are names
    number: str | None  #: the slot of an array that may be a number instead

    @property
    def slots(self) -> tuple[str, ...]:
        """Of struct Args, up to the last that this pass has."""
        return ARRAYS[: max(map(ARRAYS.index, self.results)) + 1]

    def public(self, slot: str) -> str:
        if slot.startswith("grad_") and slot in self.results:
            return f"grad_{self.public(slot.removeprefix('grad_'))}"
        return self.arrays[slot].name or slot

    def axes(self, slot: str, rank: int) -> str:
        return next((axes for axes in self.arrays[slot].shapes if len(axes) == rank), "")  # scale_x has none, whatever its rank

    def allowed_dtypes(self, slot: str, dtype: str) -> tuple[str, ...]:
        """Of an array, where u has `dtype`."""
        state = STATES[dtype]
        either = (dtype,) if dtype == state else (dtype, state)
        return {OWN: (dtype,), STATE: (state,), EITHER: either, MASK: ("bool", "uint8")}[self.arrays[slot].dtype]

    def allowed_shapes(self, slot: str, sizes: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
        """By rank: of a tracer's sizes only those that must be equal are compared."""
        return {len(axes): tuple([sizes[axis] for axis in axes]) for axes in self.arrays[slot].shapes}


def _operators(
    family: str, inputs: dict[str, Argument], required: tuple[str, ...], gradients: tuple[str, ...], choices: tuple[str, ...],
    number: str | None = None,
) -> tuple[Operator, Operator]:  # fmt: skip
    """Forward and backward. A number is looked at last."""
    arrays = inputs | {
        "h": Argument(OWN, ("LBD",)),
        "c": Argument(STATE, ("SBD",)),
        "c_last": Argument(STATE, ("BD",)),
        "grad_h": Argument(OWN, ("LBD",)),
        "grad_c_last": Argument(EITHER, ("BD",)),
        **{f"grad_{slot}": inputs[slot] for slot in gradients},
    }
    last = (number,) if number else ()
    others = tuple(slot for slot in inputs if slot != number)

    def one(direction: str, inputs: tuple[str, ...], required: tuple[str, ...], results: tuple[str, ...]) -> Operator:
        return Operator(f"{family}_{direction}", family, direction, arrays, inputs, required, results, choices, number)

    return (
        one("forward", others + last, required, ("h", "c", "c_last")),
        one(
            "backward", (*others, "grad_h", "grad_c_last", "c", *last), (*required, "grad_h", "c"),
            tuple(f"grad_{slot}" for slot in gradients),
        ),
    )  # fmt: skip


_SHARED = {"c0": Argument(EITHER, ("BD",)), "mask_pad": Argument(MASK, ("LB",)), "starts": Argument(MASK, ("LB",))}

FORWARD, BACKWARD = _operators(
    "sru",
    {
        "u": Argument(OWN, ("LBDK",)),
        "x": Argument(OWN, ("LBD",)),
        "bias": Argument(EITHER, ("RD", "F")),
        "weight_c": Argument(EITHER, ("RD", "F", "LBDR")),
        "c0": _SHARED["c0"],
        "mask_c": Argument(EITHER, ("BD",)),
        "mask_pad": _SHARED["mask_pad"],
        "starts": _SHARED["starts"],
        "scale_x": Argument(EITHER, ("",)),
    },
    ("u",),
    ("u", "x", "bias", "weight_c", "c0"),
    ("activation", "candidate", "mask_target"),
    number="scale_x",
)
QRNN_FORWARD, QRNN_BACKWARD = _operators(
    "qrnn",
    {"u": Argument(OWN, ("LBDK",)), **_SHARED, "zoneout": Argument(MASK, ("LBD",))},
    ("u",),
    ("u", "c0"),
    ("pooling", "gate"),
    number="zoneout",
)
LINEAR_FORWARD, LINEAR_BACKWARD = _operators(
    "linear_recurrence",
    {"u": Argument(OWN, ("LBD",), "b"), "weight_c": Argument(EITHER, ("LBD", "BD", "D"), "a"), **_SHARED},
    ("u", "weight_c"),
    ("weight_c", "u", "c0"),
    ("form",),
)
OPERATORS = {
    one.name: one for one in (FORWARD, BACKWARD, QRNN_FORWARD, QRNN_BACKWARD, LINEAR_FORWARD, LINEAR_BACKWARD)
}  # fmt: skip


# ---- struct Args -----------------------------------------------------------------------------------------------------

# As a kernel sees it; `frame` and `fill` pack just this (a test holds the three, and relay.cuh, against one another).
ARRAY = np.dtype([("data", "u8"), ("time", "i8"), ("batch", "i8"), ("column", "i8"), ("row", "i8")])
_ROOMS = ("partials", "checkpoints", "signals", "words")  # in the workspace
_NUMBERS = (
    "length", "batch", "width", "save_every", "group", "rows", "sums", "spans", "log_anchor", "groups", "chunks", "units",
    "slice", "lead",
)  # fmt: skip
ARGS = np.dtype(
    [(name, ARRAY) for name in ARRAYS]
    + [(name, "u8") for name in _ROOMS]
    + [(name, "i8") for name in _NUMBERS]
    + [("scale", "f8"), ("flags", "i8")]
)
_KERNEL_AXES = {"L": 0, "S": 0, "B": 1, "D": 2, "K": 3, "R": 3}  # time, batch, column, row

#: Flags: an array whose dtype may be EITHER is in u's, not in the state's; and what else is uniform over a launch
NARROW = {slot: 1 << i for i, slot in enumerate(("bias", "weight_c", "c0", "mask_c", "scale_x", "grad_c_last"))}
BIDIRECTIONAL, MASK_GATE, GRAD_U_PACKED, STRAIGHT, REVERSE, GATE_UPDATE, SUMS_OF_BATCHES = (
    1 << len(NARROW) << i for i in range(7)
)  # fmt: skip

_PACKED = struct.Struct("=" + "Q32s" * len(ARRAYS) + f"{len(_ROOMS)}Q{8 * len(_NUMBERS)}sdq")
_STRUCT = np.dtype((np.void, _PACKED.size))  # CuPy passes an array of one element by value
_ROOM = 2 * len(ARRAYS)
_SCALE = _ROOM + len(_ROOMS) + 1

Frame = tuple[Any, ...]


def frame(strides: Mapping[str, tuple[str, tuple[int, ...], int]], numbers: Mapping[str, int], flags: int) -> Frame:
    """The struct's parts that do not change from call to call. `strides`: each array's axes, its strides in elements, and its
    itemsize; a flat parameter's as those of its two rows. A number that is not given is 0."""
    parts: list[Any] = []
    for slot in ARRAYS:
        in_bytes = [0, 0, 0, 0]
        if slot in strides:
            axes, own, itemsize = strides[slot]
            for axis, stride in zip(axes, own, strict=False):
                in_bytes[_KERNEL_AXES[axis]] = stride * itemsize
        parts += 0, struct.pack("=4q", *in_bytes)
    sizes = struct.pack(f"={len(_NUMBERS)}q", *[numbers.get(name, 0) for name in _NUMBERS])
    return (*parts, *[0] * len(_ROOMS), sizes, 1.0, flags)


def fill(parts: Frame, addresses: Sequence[int], rooms: Sequence[int], scale: float) -> np.ndarray:
    """The struct of one call, its own copy. `addresses`: in the order of ARRAYS, 0 where there is no array; `rooms`: in that of
    _ROOMS."""
    values = list(parts)
    values[: 2 * len(addresses) : 2] = addresses
    values[_ROOM : _ROOM + len(rooms)] = rooms
    values[_SCALE] = scale
    return np.frombuffer(_PACKED.pack(*values), _STRUCT)
