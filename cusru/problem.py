"""What can be said about a call before any memory is read: its arrays' shapes, dtypes and devices, and its options. An error
names the argument."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cusru import dlpack
from cusru.arguments import STATES, Operator
from cusru.dlpack import Array
from cusru.plan import ALIGNMENT, Layout, Problem
from cusru.specialisation import ACTIVATIONS, CANDIDATES, FORMS, POOLINGS

#: Options that are names, and what they may be
CHOICES = {
    "activation": tuple(ACTIVATIONS), "candidate": tuple(CANDIDATES), "mask_target": ("state", "gate"),
    "pooling": POOLINGS, "gate": ("forget", "update"), "form": FORMS,
}  # fmt: skip
DTYPES = tuple(STATES)
WORKSPACE = ("uint8", "int8")  # its dtypes


class Options(NamedTuple):
    choices: tuple[Any, ...]  # in the order of Operator.choices
    bidirectional: Any
    save_every: Any
    reverse: Any = False


class Checked(NamedTuple):
    problem: Problem  # without results yet
    arrays: dict[str, Array]  # as they were given
    number: float  # scale_x or zoneout, where it is one
    device: tuple[str, int]
    stream: int | None


# ---- options ---------------------------------------------------------------------------------------------------------


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """As a plain str, whatever a subclass says that it is equal to."""
    if isinstance(value, str) and (plain := str.__str__(value)) in allowed:
        return plain
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_choices(operator: Operator, values: tuple[Any, ...]) -> dict[str, str]:
    return {name: one_of(name, value, CHOICES[name]) for name, value in zip(operator.choices, values, strict=True)}


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


def check_size(name: str, value: Any) -> int:
    """Of a layer."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__") or operator.index(value) < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    return operator.index(value)


def check_rate(name: str, value: Any, including_1: bool = False) -> float:
    """The probability with which a layer drops something."""
    if not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1 or (value == 1 and not including_1):
        limits = "from 0 to 1" if including_1 else "at least 0 and below 1"
        raise ValueError(f"{name} must be a probability, {limits}; got {value!r}")
    return float(value)


def check_probability(name: str, value: Any) -> float:
    """0 for what is no number."""
    if isinstance(value, bool | np.bool_) or (is_number(name, value) and not 0 <= float(value) <= 1):
        raise ValueError(f"{name} must be a number from 0 to 1, or an array of bool or uint8; got {value!r}")
    return float(value) if is_number(name, value) else 0.0


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


def check(operator: Operator, inputs: Mapping[str, Any], options: Options, stream: Any) -> Checked:
    """All that can be said before any memory is read. `inputs`: the arguments by their slots, looked at in this order, one that
    may be a number last; a dlpack.Array stands for itself."""
    choices = check_choices(operator, options.choices)
    bidirectional, reverse = check_flag("bidirectional", options.bidirectional), check_flag("reverse", options.reverse)
    save_every = check_save_every(options.save_every, operator.direction)

    objects = dict(inputs)
    number = 1.0
    if operator.number == "scale_x":
        if is_number("scale_x", objects["scale_x"]):
            number = float(objects.pop("scale_x"))
    elif operator.number == "zoneout":
        number = check_probability("zoneout", objects["zoneout"])
        if is_number("zoneout", objects["zoneout"]):
            del objects["zoneout"]
    required = {*operator.required, "scale_x"}
    if "c" in objects and objects["c"] is None:
        raise ValueError("c is None: the backward needs the states that the forward saved (save_every=1, or S)")
    objects = {slot: value for slot, value in objects.items() if value is not None or slot in required}

    first = operator.public("u")
    u = objects["u"]
    device = dlpack.device_of(u, first)
    for slot, value in objects.items():
        check_device(operator.public(slot), dlpack.device_of(value, operator.public(slot)), device, first)
    handle = dlpack.stream_handle(stream, u, device) if device[0] == "cuda" else None
    a = objects["u"] = dlpack.borrow(u, first, handle, device, DTYPES)
    given = {
        slot: dlpack.borrow(value, operator.public(slot), handle, device, operator.allowed_dtypes(slot, a.dtype))
        for slot, value in objects.items()
    }
    frameworks = {a.framework for a in given.values() if a.owner is not None}  # None: the description of a tracer's tensor
    if "torch" in frameworks:
        dlpack.refuse_tracers()
    if not frameworks <= {"numpy", "torch"} and device == dlpack.CPU:
        dlpack.one_cpu(given.values())
    length, batch, width, k = _sizes(operator, a.shape, choices)
    if k == 4 and "x" in given:
        raise ValueError("x goes with k = 3: u has k = 4 and brings its own skip, so x must be None (or u have k = 3)")
    if bidirectional and width % 2:
        raise ValueError(
            f"bidirectional needs an even D, half of it for each direction; {first} has shape {a.shape}, D = {width}"
        )

    problem = Problem(operator, length, batch, width, k, a.dtype, STATES[a.dtype], choices, bidirectional, save_every, reverse)
    sizes = {"L": length, "S": problem.blocks, "B": batch, "D": width, "K": k, "R": 2, "F": 2 * width}
    for slot, array in given.items():
        if slot == "scale_x":
            if np.prod(array.shape, dtype=object) != 1:
                raise ValueError(f"scale_x has shape {array.shape}; expected a number or an array of one element")
        elif array.shape != (allowed := operator.allowed_shapes(slot, sizes)).get(len(array.shape)):
            why = f": ceil(L / save_every) = {problem.blocks} saved states, L = {length}, save_every = {save_every}"
            expected = " or ".join(map(str, allowed.values()))
            what = f"{operator.public(slot)} has shape {array.shape}"
            raise ValueError(f"{what}; expected {expected}{why if slot == 'c' else ''}")
        problem.inputs[slot] = layout(array, operator.axes(slot, len(array.shape)))
    return Checked(problem, given, number, device, handle)


def _sizes(operator: Operator, shape: tuple[int, ...], choices: Mapping[str, str]) -> tuple[int, int, int, int]:
    """L, B, D and k, from the shape of u."""
    if operator.family == "linear_recurrence":
        if len(shape) != 3:
            raise ValueError(f"{operator.public('u')} has shape {shape}; expected (L, B, D)")
        return (*shape, 1)
    allowed: tuple[int, ...] = (3, 4)
    if operator.family == "qrnn":
        allowed = ({"f": 2, "fo": 3, "ifo": 4}[choices["pooling"]],)
    if len(shape) != 4 or shape[3] not in allowed:
        expected = " or ".join(f"(L, B, D, {k})" for k in allowed)
        why = f" for pooling={choices['pooling']!r}" if "pooling" in choices else ""
        raise ValueError(f"u has shape {shape}; expected {expected}{why}")
    return shape


def check_device(name: str, device: tuple[str, int], of_first: tuple[str, int], first: str = "u") -> None:
    if device != of_first:
        where, its = dlpack.device_name(device), dlpack.device_name(of_first)
        raise ValueError(f"{name} is on {where} and {first} on {its}; all arrays must share one device")


def layout(array: Array, axes: str) -> Layout:
    """What a plan looks at; a flat (2*D,) parameter as the (2, D) that it is."""
    shape, strides = array.shape, array.strides
    if axes == "F":
        shape, strides = (2, shape[0] // 2), (shape[0] // 2 * strides[0], strides[0])
    return Layout(shape, strides, array.dtype, array.pointer % ALIGNMENT)


class Wanted(NamedTuple):
    """What a result is to be."""

    shape: tuple[int, ...]
    dtype: str


def wanted_results(checked: Checked) -> dict[str, Wanted | None]:
    """Of each of the operator's results, by slot, None where the call has none. A gradient is as its input was given."""
    problem, arrays = checked.problem, checked.arrays
    operator = problem.operator
    sizes = {"L": problem.length, "S": problem.blocks, "B": problem.batch, "D": problem.width}
    wanted: dict[str, Wanted | None] = {}
    for slot in operator.results:
        if slot.startswith("grad_"):
            given = arrays.get(slot.removeprefix("grad_"))
            wanted[slot] = None if given is None else Wanted(given.shape, given.dtype)
        elif slot == "c" and problem.save_every is None:
            wanted[slot] = None
        else:
            (shape,), (dtype,) = operator.allowed_shapes(slot, sizes).values(), operator.allowed_dtypes(slot, problem.dtype)
            wanted[slot] = Wanted(shape, dtype)
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
