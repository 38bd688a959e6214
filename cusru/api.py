"""`sru_forward` and `sru_backward`: check the arguments, lay out the results, run the recurrence where the arrays are.

The recurrence itself stands in `kernels/sru.cuh` (device arrays) and `reference.py` (CPU arrays)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cusru import dlpack, raw_kernels
from cusru.dlpack import Array

ACTIVATIONS, CANDIDATES = tuple(raw_kernels.ACTIVATIONS), tuple(raw_kernels.CANDIDATES)
MASK_TARGETS = ("state", "gate")
DTYPES = tuple(raw_kernels.STATES)


class Output(NamedTuple):
    """What `sru_forward` returns."""

    h: Any  #: (L, B, D), u's dtype: the output
    c: Any  #: (ceil(L / save_every), B, D), the state's dtype: the saved states; None with save_every=None
    c_last: Any  #: (B, D), the state's dtype: the state after each column's last step


class Gradients(NamedTuple):
    """What `sru_backward` returns: each with its input's shape and dtype, None where the input was absent."""

    u: Any
    x: Any
    bias: Any
    weight_c: Any
    c0: Any


@dlpack.untraceable
def sru_forward(
    u: Any,
    x: Any = None,
    *,
    bias: Any = None,
    weight_c: Any = None,
    c0: Any = None,
    mask_c: Any = None,
    mask_pad: Any = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: Any = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int | None = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
) -> Output:
    """Run the SRU recurrence over all steps of all columns.

    At each step of a column, with u = (u0, u1, u2[, u3])::

        f = sigmoid(u1 + b_f + v_f * c_prev)
        r = sigmoid(u2 + b_r + v_r * c_prev)
        c = f * c_prev + (1 - f) * candidate(u0)
        h = r * mask_c * activation(c) + (1 - r) * s          s = scale_x * x, or u3, or 0

    (Lei et al. 2018, https://arxiv.org/abs/1709.02755, equations 3 to 6; with ``candidate="tanh"`` and no skip, the QRNN's
    fo-pooling, https://arxiv.org/abs/1611.01576.) Arrays may be NumPy's, CuPy's, torch's, JAX's, TensorFlow's or any
    other's that speaks DLPack, of any strides; none is copied, and none but those in `out` and `workspace` is written.

    Args:
        u: (L, B, D, k), k = 3 or 4: the projected input, float64, float32, float16 or bfloat16. The state is kept in
            float64 for float64 and in float32 for the others; candidate(u0) and every state, c0 included, may reach half that
            dtype's largest number, since they are subtracted from one another.
        x: (L, B, D), u's dtype: the skip input, with k = 3; absent: no skip.
        bias: (2, D) or (2*D,): forget row, reset row. Parameters, `c0` and `mask_c` are in u's dtype or the state's.
        weight_c: (2, D) or (2*D,): v of SRU v2; or per step (L, B, D, 2); absent: SRU v1.
        c0: (B, D): initial state; absent: zeros.
        mask_c: (B, D): dropout mask, the same at every step, already scaled by 1 / (1 - p).
        mask_pad: (L, B), bool or uint8: non-zero where a step is padding: there the state passes and h is 0.
        activation: "identity", "tanh", "relu" or "selu".
        candidate: "identity" (SRU) or "tanh" (QRNN).
        scale_x: a number, or a one-element array on u's device that the kernel reads.
        mask_target: "state": h as above. "gate": h = s + mask_c * r * (activation(c) - s), as in the sru package from 2.5 on.
        bidirectional: D is even, and the second half of the columns runs backward in time.
        save_every: S: `c[j]` is the state after the last processed step of the time block [j*S, min((j+1)*S, L)).
            None: no state is saved (inference).
        out: (h, c, c_last) to write into, None where cusru is to allocate; those very objects are returned. (torch's autograd
            learns of it, as from torch's own ``out=``.)
        workspace: bytes on u's device, at least ``workspace_size("forward", ...)`` of them; else cusru allocates.
        stream: anything with ``__cuda_stream__``, or an integer handle. Default: the current stream of CuPy or torch if
            `u` is theirs, else CuPy's. The call returns before the kernels have run: an array that belongs to another
            stream than this one must be kept until they have, since its allocator knows nothing of them.

    Returns:
        Output(h, c, c_last), of u's framework.

    Raises:
        ValueError: a shape, a device, an option, or an `out` that cannot be written; names the argument.
        TypeError: a dtype, an object that is no array, a flag that is none; a torch tensor that requires grad while grad mode
            is on, or any in a function that torch traces (`cusru.torch.sru` is for both; torch.compile breaks its graph here).
        ImportError, RuntimeError: device arrays without CuPy or without a working CUDA.
    """
    problem = check(
        "forward", u, x, bias, weight_c, c0, mask_c, mask_pad, activation, candidate, scale_x, mask_target,
        bidirectional, save_every, stream,
    )  # fmt: skip
    saved = None if save_every is None else (problem.blocks, problem.batch, problem.width)
    return Output(
        *_run(
            problem,
            {
                "h": ((problem.length, problem.batch, problem.width), problem.dtype),
                "c": saved and (saved, problem.state),
                "c_last": ((problem.batch, problem.width), problem.state),
            },
            out,
            workspace,
        )
    )


@dlpack.untraceable
def sru_backward(
    grad_h: Any,
    grad_c_last: Any,
    c: Any,
    u: Any,
    x: Any = None,
    *,
    bias: Any = None,
    weight_c: Any = None,
    c0: Any = None,
    mask_c: Any = None,
    mask_pad: Any = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: Any = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
) -> Gradients:
    """The gradients of a loss with respect to the inputs of `sru_forward`.

    Args:
        grad_h: (L, B, D), u's dtype: the loss's gradient with respect to h.
        grad_c_last: (B, D), u's dtype or the state's: with respect to c_last; None: zeros.
        c: the states that `sru_forward` saved with the same `save_every`; what lies between is recomputed from `u`, bit
            for bit.
        out: (u, x, bias, weight_c, c0) gradients to write into, None where cusru is to allocate or the input is absent.
        workspace: bytes on u's device, at least ``workspace_size("backward", ...)`` of them; else cusru allocates.

    The other arguments are those of `sru_forward`, with the values they had there. Parameter gradients are summed in the
    state's dtype in an order that does not change from run to run; `mask_c` and `scale_x` have no gradient.

    Returns:
        Gradients(u, x, bias, weight_c, c0), of u's framework, each of its input's shape and dtype.

    Raises:
        As `sru_forward`; also ValueError where c is absent or its length is not ceil(L / save_every).
    """
    problem = check(
        "backward", u, x, bias, weight_c, c0, mask_c, mask_pad, activation, candidate, scale_x, mask_target,
        bidirectional, save_every, stream, grad_h=grad_h, grad_c_last=grad_c_last, c=c,
    )  # fmt: skip
    names = Gradients._fields
    given = {name: problem.given.get(name) for name in names}
    return Gradients(*_run(problem, {n: a and (a.shape, a.dtype) for n, a in given.items()}, out, workspace))


@dlpack.untraceable
def workspace_size(
    direction: str,
    u: Any,
    x: Any = None,
    *,
    bias: Any = None,
    weight_c: Any = None,
    c0: Any = None,
    mask_c: Any = None,
    mask_pad: Any = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: Any = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int | None = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
) -> int:
    """Bytes of scratch memory that `sru_forward` or `sru_backward` needs for these arguments.

    Args:
        direction: "forward" or "backward"; the other arguments are those of that call (`out` and `workspace` are ignored).

    Returns:
        The number of bytes, 0 where none are needed. It depends on shapes, dtypes and options only.

    Raises:
        As `sru_forward`.
    """
    _one_of("direction", direction, ("forward", "backward"))
    problem = check(
        direction, u, x, bias, weight_c, c0, mask_c, mask_pad, activation, candidate, scale_x, mask_target,
        bidirectional, save_every, stream,
    )  # fmt: skip
    return raw_kernels.workspace_size(problem)


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Problem:
    """One checked call: sizes, options, and its arrays by name (absent ones are not there)."""

    direction: str
    length: int
    batch: int
    width: int
    k: int
    dtype: str
    state: str
    activation: str
    candidate: str
    mask_target: str
    bidirectional: bool
    save_every: int | None
    scale_x: float
    device: tuple[str, int]
    stream: int | None
    given: dict[str, Array] = field(default_factory=dict)  # with the caller's shapes
    arrays: dict[str, Array] = field(default_factory=dict)  # parameters brought to (2, D)

    @property
    def blocks(self) -> int:
        return -(-self.length // self.save_every) if self.save_every else 0

    @property
    def block(self) -> int | None:
        """save_every, or L where that is less: it changes nothing, and fits the kernels' integers. (By itself, since the L of a
        tracer must not be compared.)"""
        return self.save_every and min(self.save_every, max(self.length, 1))

    @property
    def step_weight(self) -> bool:
        return "weight_c" in self.arrays and len(self.arrays["weight_c"].shape) == 4


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_options(activation: Any, candidate: Any, mask_target: Any) -> None:
    _one_of("activation", activation, ACTIVATIONS)
    _one_of("candidate", candidate, CANDIDATES)
    _one_of("mask_target", mask_target, MASK_TARGETS)


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


def check(
    direction: str, u: Any, x: Any, bias: Any, weight_c: Any, c0: Any, mask_c: Any, mask_pad: Any, activation: Any,
    candidate: Any, scale_x: Any, mask_target: Any, bidirectional: Any, save_every: Any, stream: Any, **of_backward: Any,
) -> Problem:  # fmt: skip
    """All that can be said about the arguments before any memory is read. A dlpack.Array stands for itself."""
    check_options(activation, candidate, mask_target)
    bidirectional = check_flag("bidirectional", bidirectional)
    save_every = check_save_every(save_every, direction)

    by_value = is_number("scale_x", scale_x)
    objects = dict(u=u, x=x, bias=bias, weight_c=weight_c, c0=c0, mask_c=mask_c, mask_pad=mask_pad, **of_backward)
    if not by_value:
        objects["scale_x"] = scale_x
    required = {"u", "scale_x", "grad_h"}
    if "c" in objects and objects["c"] is None:
        raise ValueError("c is None: the backward needs the states that the forward saved (save_every=1, or S)")
    objects = {name: value for name, value in objects.items() if value is not None or name in required}

    device = dlpack.device_of(u, "u")
    for name, value in objects.items():
        if (where := dlpack.device_of(value, name)) != device:
            raise _other_device(name, where, device)
    handle = dlpack.stream_handle(stream, u, device) if device[0] == "cuda" else None
    a = dlpack.borrow(u, "u", handle, device, DTYPES)
    state = raw_kernels.STATES[a.dtype]
    own, either = (a.dtype,), tuple(dict.fromkeys((a.dtype, state)))
    dtypes = {"u": own, "x": own, "grad_h": own, "c": (state,), "mask_pad": ("bool", "uint8")}
    given = {n: dlpack.borrow(a if n == "u" else o, n, handle, device, dtypes.get(n, either)) for n, o in objects.items()}
    frameworks = {a.framework for a in given.values() if a.owner is not None}  # None: the description of a tracer's tensor
    if "torch" in frameworks:
        dlpack.refuse_tracers()
    if not frameworks <= {"numpy", "torch"} and device == dlpack.CPU:
        dlpack.one_cpu(given.values())
    if len(a.shape) != 4 or a.shape[3] not in (3, 4):
        raise ValueError(f"u has shape {a.shape}; expected (L, B, D, 3) or (L, B, D, 4)")
    length, batch, width, k = a.shape
    if k == 4 and x is not None:
        raise ValueError("x goes with k = 3: u has k = 4 and brings its own skip, so x must be None (or u have k = 3)")
    if bidirectional and width % 2:
        raise ValueError(f"bidirectional needs an even D, half of it for each direction; u has shape {a.shape}, D = {width}")

    problem = Problem(
        direction, length, batch, width, k, a.dtype, state, activation, candidate, mask_target,
        bidirectional, save_every, float(scale_x) if by_value else 1.0, device, handle, given, dict(given),
    )  # fmt: skip
    plane, steps = (batch, width), (length, batch, width)
    parameter = {2: (2, width), 1: (2 * width,)}
    allowed: dict[str, dict[int, tuple[int, ...]]] = {  # by rank: a tracer's L meets only L
        "u": {4: a.shape},
        "x": {3: steps},
        "bias": parameter,
        "weight_c": {**parameter, 4: (*steps, 2)},
        "c0": {2: plane},
        "mask_c": {2: plane},
        "mask_pad": {2: (length, batch)},
        "grad_h": {3: steps},
        "grad_c_last": {2: plane},
        "c": {3: (problem.blocks, *plane)},
    }
    for name, array in given.items():
        if name == "scale_x":
            if np.prod(array.shape, dtype=object) != 1:
                raise ValueError(f"scale_x has shape {array.shape}; expected a number or an array of one element")
            continue
        shapes = allowed[name]
        if array.shape != shapes.get(len(array.shape)):
            why = f": ceil(L / save_every) = {problem.blocks} saved states, L = {length}, save_every = {save_every}"
            raise ValueError(
                f"{name} has shape {array.shape}; expected {' or '.join(map(str, shapes.values()))}{why if name == 'c' else ''}"
            )
    for name in ("bias", "weight_c"):
        if name in given and len(given[name].shape) == 1:
            problem.arrays[name] = _in_rows(given[name])
    return problem


def _other_device(name: str, device: tuple[str, int], of_u: tuple[str, int]) -> ValueError:
    where, its = dlpack.device_name(device), dlpack.device_name(of_u)
    return ValueError(f"{name} is on {where} and u on {its}; all arrays must share one device")


def _in_rows(flat: Array) -> Array:
    """A flat (2*D,) parameter as the (2, D) that it is."""
    (size,), (stride,) = flat.shape, flat.strides
    shape, strides = (2, size // 2), (size // 2 * stride, stride)
    a = flat  # dataclasses.replace takes five times as long
    return Array(a.name, a.pointer, shape, strides, a.dtype, a.device, a.readonly, a.framework, a.owner, a.source)


def _run(problem: Problem, results: dict[str, Any], out: Any, workspace: Any) -> list[Any]:
    """Results, a name -> (shape, dtype) or None where there is none, computed into `out` or fresh memory."""
    objects = _out_members(out, list(results))
    arrays: dict[str, Array] = {}
    for name, wanted in results.items():
        if objects[name] is None:
            continue
        label = f"out.{name}"
        if wanted is None:
            raise ValueError(f"{label} must be None: this call has no such result")
        if (where := dlpack.device_of(objects[name], label)) != problem.device:
            raise _other_device(label, where, problem.device)
        shape, dtype = wanted
        array = dlpack.borrow(objects[name], label, problem.stream, problem.device, (dtype,))
        if array.shape != shape:
            raise ValueError(f"{label} has shape {array.shape}; expected {shape}")
        dlpack.check_writable(array)
        if dlpack.overlaps_itself(array):
            raise ValueError(f"{label} overlaps itself: two of its elements share memory (strides {array.strides})")
        arrays[name] = array
    scratch = _workspace(problem, workspace)
    written = [*arrays.values(), *([scratch] if workspace is not None and scratch is not None else [])]
    if pair := dlpack.overlapping(written, problem.given.values()):
        raise ValueError(f"{pair[0].name} overlaps {pair[1].name}; what is written must share no memory with anything else")
    if problem.given["u"].framework != "torch" and any(a.framework == "torch" for a in written):
        dlpack.refuse_tracers()  # else asked already

    with raw_kernels.current(problem.device, problem.stream):
        for name, wanted in results.items():
            if wanted is not None and name not in arrays:
                order = _memory_order(problem.given["u"]) if name == "u" else None
                shape, dtype = wanted
                arrays[name] = dlpack.empty(name, shape, dtype, problem.device, problem.given["u"].framework, order)
        dlpack.mark_written(written)  # before they are, for an error on the way may leave them half written
        in_rows = {n: _in_rows(a) if n in ("bias", "weight_c") and len(a.shape) == 1 else a for n, a in arrays.items()}
        if problem.device[0] == "cpu" and not raw_kernels.simulated():
            _run_numpy(problem, in_rows)
        else:
            raw_kernels.run(problem, in_rows, scratch)
        u = problem.given["u"]
        return [
            objects[name] if objects[name] is not None else dlpack.give(arrays[name], u) if name in arrays else None
            for name in results
        ]


def _out_members(out: Any, names: list[str]) -> dict[str, Any]:
    if out is None:
        return dict.fromkeys(names)
    if not isinstance(out, Sequence) or isinstance(out, str | bytes):
        raise TypeError(f"out must be a sequence of {len(names)} ({', '.join(names)}); got {type(out).__name__}")
    if len(out) != len(names):
        raise ValueError(
            f"out has {len(out)} members; expected {len(names)} ({', '.join(names)}), None where cusru is to allocate"
        )
    return dict(zip(names, out, strict=True))


def _memory_order(u: Array) -> tuple[int, ...] | None:
    """The gradient of u lies in memory as u does, so that a GEMM takes it as it is. On a CPU it is always compact in C
    order, which JAX and TensorFlow insist on."""
    if u.device[0] == "cpu" or u.framework not in ("cupy", "torch"):
        return None
    return tuple(sorted(range(len(u.shape)), key=lambda axis: -abs(u.strides[axis])))


def _workspace(problem: Problem, workspace: Any) -> Array | None:
    if workspace is None:
        return None
    if (where := dlpack.device_of(workspace, "workspace")) != problem.device:
        raise _other_device("workspace", where, problem.device)
    array = dlpack.borrow(workspace, "workspace", problem.stream, problem.device, ("uint8", "int8"))
    needed = raw_kernels.workspace_size(problem)
    if len(array.shape) != 1 or (array.shape[0] > 1 and array.strides[0] != 1) or array.shape[0] < needed:
        raise ValueError(f"workspace has shape {array.shape}, strides {array.strides}; expected at least {needed} bytes in a row")
    dlpack.check_writable(array)
    return array


def _run_numpy(problem: Problem, results: dict[str, Array]) -> None:
    from cusru import reference

    scale = problem.scale_x
    if "scale_x" in problem.arrays:
        with np.errstate(all="ignore"):
            scale = float(reference.widen(problem.arrays["scale_x"].numpy(), np.float64).reshape(-1)[0])
    options: dict[str, Any] = dict(
        activation=problem.activation,
        candidate=problem.candidate,
        mask_target=problem.mask_target,
        bidirectional=problem.bidirectional,
        save_every=problem.block,
        scale_x=scale,
    )

    def at(name: str) -> Any:
        return problem.arrays[name].numpy() if name in problem.arrays else None

    options |= {name: at(name) for name in ("x", "bias", "weight_c", "c0", "mask_c", "mask_pad")}
    if problem.direction == "forward":
        written: dict[str, Any] = {name: results[name].numpy() if name in results else None for name in Output._fields}
        reference.forward(at("u"), **options, **written)
    else:
        written = {f"grad_{name}": results[name].numpy() if name in results else None for name in Gradients._fields}
        reference.backward(at("grad_h"), at("grad_c_last"), at("c"), at("u"), **options, **written)
