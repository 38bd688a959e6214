"""What can be said about a call before any memory is read: its arrays' shapes, dtypes and devices, and its options. An error
names the argument."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cusru import dlpack
from cusru.arguments import OPERATORS, STATES, allowed_dtypes, allowed_shapes
from cusru.dlpack import Array
from cusru.plan import ALIGNMENT, Layout, Problem
from cusru.specialisation import ACTIVATIONS as _ACTIVATIONS
from cusru.specialisation import CANDIDATES as _CANDIDATES

ACTIVATIONS, CANDIDATES = tuple(_ACTIVATIONS), tuple(_CANDIDATES)
MASK_TARGETS = ("state", "gate")
DTYPES = tuple(STATES)
WORKSPACE = ("uint8", "int8")  # its dtypes


class Options(NamedTuple):
    activation: Any
    candidate: Any
    mask_target: Any
    bidirectional: Any
    save_every: Any


class Checked(NamedTuple):
    problem: Problem  # without results yet
    arrays: dict[str, Array]  # as they were given
    scale: float
    device: tuple[str, int]
    stream: int | None


# ---- options ---------------------------------------------------------------------------------------------------------


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """As a plain str, whatever a subclass says that it is equal to."""
    if isinstance(value, str) and (plain := str.__str__(value)) in allowed:
        return plain
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_options(activation: Any, candidate: Any, mask_target: Any) -> tuple[str, str, str]:
    return (
        one_of("activation", activation, ACTIVATIONS),
        one_of("candidate", candidate, CANDIDATES),
        one_of("mask_target", mask_target, MASK_TARGETS),
    )


def check_flag(name: str, value: Any) -> bool:
    """A bool, of Python's or NumPy's, or 0 or 1: anything else that has a truth, such as "False", says something else by it."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, int | np.integer) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name} must be a bool, or 0 or 1; got {value!r}")


def is_number(name: str, value: Any) -> bool:
    """Whether value is a real number, of Python's or NumPy's (an array of one element is none)."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.generic):
        return False
    if isinstance(value, np.generic) and value.dtype.kind not in "iuf" and value.dtype.name != "bfloat16":
        return False
    try:
        float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is {type(value).__name__} too large for a float64") from error
    return True


def check_save_every(save_every: Any, direction: str = "forward") -> int | None:
    if save_every is None:
        if direction == "backward":
            raise ValueError(
                "save_every=None saves no states, and the backward needs them: give the save_every, 1 or more, "
                "with which the forward saved c"
            )
        return None
    try:
        value = operator.index(save_every)
    except TypeError:
        value = None
    if value is None or isinstance(save_every, bool | np.bool_):
        raise TypeError(f"save_every must be an integer of at least 1, or None; got {save_every!r}")
    if value < 1:
        raise ValueError(f"save_every must be at least 1, or None; got {value}")
    return value


# ---- arrays ----------------------------------------------------------------------------------------------------------


def check(direction: str, inputs: Mapping[str, Any], options: Options, stream: Any) -> Checked:
    """All that can be said before any memory is read. `inputs`: the arguments by their names, looked at in this order, scale_x
    last; a dlpack.Array stands for itself."""
    activation, candidate, mask_target, bidirectional, save_every = options
    activation, candidate, mask_target = check_options(activation, candidate, mask_target)
    bidirectional = check_flag("bidirectional", bidirectional)
    save_every = check_save_every(save_every, direction)

    objects = dict(inputs)
    scale = 1.0
    if is_number("scale_x", objects["scale_x"]):
        scale = float(objects.pop("scale_x"))
    required = {*OPERATORS[direction].required, "scale_x"}
    if "c" in objects and objects["c"] is None:
        raise ValueError("c is None: the backward needs the states that the forward saved (save_every=1, or S)")
    objects = {name: value for name, value in objects.items() if value is not None or name in required}

    u = objects["u"]
    device = dlpack.device_of(u, "u")
    for name, value in objects.items():
        check_device(name, dlpack.device_of(value, name), device)
    handle = dlpack.stream_handle(stream, u, device) if device[0] == "cuda" else None
    a = objects["u"] = dlpack.borrow(u, "u", handle, device, DTYPES)
    given = {n: dlpack.borrow(o, n, handle, device, allowed_dtypes(n, a.dtype)) for n, o in objects.items()}
    frameworks = {a.framework for a in given.values() if a.owner is not None}  # None: the description of a tracer's tensor
    if "torch" in frameworks:
        dlpack.refuse_tracers()
    if not frameworks <= {"numpy", "torch"} and device == dlpack.CPU:
        dlpack.one_cpu(given.values())
    if len(a.shape) != 4 or a.shape[3] not in (3, 4):
        raise ValueError(f"u has shape {a.shape}; expected (L, B, D, 3) or (L, B, D, 4)")
    length, batch, width, k = a.shape
    if k == 4 and "x" in given:
        raise ValueError("x goes with k = 3: u has k = 4 and brings its own skip, so x must be None (or u have k = 3)")
    if bidirectional and width % 2:
        raise ValueError(f"bidirectional needs an even D, half of it for each direction; u has shape {a.shape}, D = {width}")

    problem = Problem(
        direction, length, batch, width, k, a.dtype, STATES[a.dtype],
        activation, candidate, mask_target, bidirectional, save_every,
    )  # fmt: skip
    sizes = {"L": length, "S": problem.blocks, "B": batch, "D": width, "K": k, "R": 2, "F": 2 * width}
    for name, array in given.items():
        if name == "scale_x":
            if np.prod(array.shape, dtype=object) != 1:
                raise ValueError(f"scale_x has shape {array.shape}; expected a number or an array of one element")
        elif array.shape != (allowed := allowed_shapes(name, sizes)).get(len(array.shape)):
            why = f": ceil(L / save_every) = {problem.blocks} saved states, L = {length}, save_every = {save_every}"
            expected = " or ".join(map(str, allowed.values()))
            raise ValueError(f"{name} has shape {array.shape}; expected {expected}{why if name == 'c' else ''}")
        problem.inputs[name] = layout(array)
    return Checked(problem, given, scale, device, handle)


def check_device(name: str, device: tuple[str, int], of_u: tuple[str, int]) -> None:
    if device != of_u:
        where, its = dlpack.device_name(device), dlpack.device_name(of_u)
        raise ValueError(f"{name} is on {where} and u on {its}; all arrays must share one device")


def layout(array: Array) -> Layout:
    """What a plan looks at; a flat (2*D,) parameter as the (2, D) that it is."""
    shape, strides = array.shape, array.strides
    if len(shape) == 1 and array.name.rpartition(".")[2] != "scale_x":
        shape, strides = (2, shape[0] // 2), (shape[0] // 2 * strides[0], strides[0])
    return Layout(shape, strides, array.dtype, array.pointer % ALIGNMENT)


class Wanted(NamedTuple):
    """What a result is to be."""

    shape: tuple[int, ...]
    dtype: str


def wanted_results(checked: Checked) -> dict[str, Wanted | None]:
    """Of each of the operator's results, None where the call has none. A gradient is as its input was given."""
    problem, arrays = checked.problem, checked.arrays
    sizes = {"L": problem.length, "S": problem.blocks, "B": problem.batch, "D": problem.width}
    wanted: dict[str, Wanted | None] = {}
    for name in OPERATORS[problem.direction].results:
        if name.startswith("grad_"):
            given = arrays.get(name.removeprefix("grad_"))
            wanted[name] = None if given is None else Wanted(given.shape, given.dtype)
        elif name == "c" and problem.save_every is None:
            wanted[name] = None
        else:
            (shape,), (dtype,) = allowed_shapes(name, sizes).values(), allowed_dtypes(name, problem.dtype)
            wanted[name] = Wanted(shape, dtype)
    return wanted


def check_result(array: Array, wanted: Wanted | None) -> None:
    if wanted is None or array.dtype != wanted.dtype:  # the careful way has said so before, in better words
        raise TypeError(f"{array.name} has dtype {array.dtype}")
    if array.shape != wanted.shape:
        raise ValueError(f"{array.name} has shape {array.shape}; expected {wanted.shape}")
    dlpack.check_writable(array)
    if dlpack.overlaps_itself(array):
        raise ValueError(f"{array.name} overlaps itself: two of its elements share memory (strides {array.strides})")


def check_workspace(array: Array, needed: int) -> None:
    if len(array.shape) != 1 or (array.shape[0] > 1 and array.strides[0] != 1) or array.shape[0] < needed:
        raise ValueError(f"workspace has shape {array.shape}, strides {array.strides}; expected at least {needed} bytes in a row")
    dlpack.check_writable(array)
