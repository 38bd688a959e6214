"""The recurrences as differentiable functions of JAX, and what JAX's transforms need to know about them: `functions.py` names
their arguments.

From the outside in: `run` checks, at trace time; `_recurrence` has the derivative; `_kernel` has the rule for vmap, by which so
many problems are one of so many times the columns; `_callback` is what XLA calls when the program runs, on its own stream, with
its own memory for results and workspace. Nothing of JAX is called from there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from cusru import call, dlpack, linear_gradients, problem, raw_kernels
from cusru.arguments import (
    ARRAYS,
    BACKWARD,
    GRADIENTS,
    INPUTS,
    LINEAR_BACKWARD,
    MASK,
    OPERATORS,
    QRNN_BACKWARD,
    STATES,
)
from cusru.dlpack import Array
from cusru.problem import Checked, Options

SAVE_EVERY = 32  # as in cusru.torch: states are then 0.4% of the bytes that a float32 training step moves

Arrays = tuple[jax.Array, ...]


class Static(NamedTuple):
    """What a pass is compiled for, beside shapes and dtypes."""

    operator: str
    slots: tuple[str, ...]  #: of the arrays that are given, in their order
    options: Options
    number: float | None  #: scale_x or zoneout, where it is one

    def of(self, direction: str, before: tuple[str, ...] = ()) -> Static:
        """Of the other pass, which is given these arrays before the others."""
        family = OPERATORS[self.operator].family
        return self._replace(operator=f"{family}_{direction}", slots=(*before, *self.slots))

    @property
    def results(self) -> tuple[str, ...]:
        """The slots of the results that there are."""
        results = OPERATORS[self.operator].results
        if "c" in results:
            return results if self.options.save_every else ("h", "c_last")
        return tuple(slot for slot in results if slot.removeprefix("grad_") in self.slots)


def run(family: str, inputs: Sequence[Any], options: Options) -> tuple[jax.Array, jax.Array]:
    """h and c_last; the inputs by slot."""
    operator = OPERATORS[f"{family}_forward"]
    given, number = dict(zip(INPUTS, inputs, strict=False)), None
    if operator.number:
        name, value = operator.number, given[operator.number]
        if name == "zoneout":
            problem.check_probability(name, value)
        if problem.is_number(name, value):
            number, given[name] = float(value), None
    arrays = {}
    for slot in operator.inputs:
        required = slot in operator.required or (slot == "scale_x" and number is None)
        if given[slot] is not None or required:
            arrays[slot] = as_array(operator.public(slot), given[slot])
    _check_devices({operator.public(slot): a for slot, a in arrays.items()})
    options = Options(
        tuple(problem.check_choices(operator, options.choices).values()),
        problem.check_flag("bidirectional", options.bidirectional),
        problem.check_save_every(options.save_every),
        problem.check_flag("reverse", options.reverse),
    )
    static = Static(operator.name, tuple(arrays), options, number)
    _check(static, arrays.values())
    for slot in arrays:
        if f"grad_{slot}" not in GRADIENTS and operator.arrays[slot].dtype != MASK:
            arrays[slot] = _without_gradient(slot, arrays[slot])
    h, c_last = _recurrence(static, _varying(arrays.values(), arrays.values()))
    return h, c_last


# ---- checks, at trace time -------------------------------------------------------------------------------------------


def as_array(name: str, value: Any) -> jax.Array:
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{name} must be an array of JAX's or NumPy's, not {dlpack.type_name(value)}")
    try:
        return jnp.asarray(value)
    except TypeError as error:
        raise TypeError(f"{name} has dtype {value.dtype}, which JAX does not take: {error}") from error


def _check_devices(arrays: dict[str, jax.Array]) -> None:
    """Of those that are bound to devices: others go to where these are."""
    first: tuple[str, Any] | None = None
    for name, a in arrays.items():
        if isinstance(a, jax.core.Tracer) or not getattr(a, "committed", True):
            continue
        if first is None:
            first = name, a
        elif a.devices() != first[1].devices():
            here, there = (", ".join(sorted(f"{d.platform}:{d.id}" for d in one.devices())) for one in (a, first[1]))
            raise ValueError(f"{name} is on {here} and {first[0]} on {there}; all arrays must share one device")


def _check(static: Static, arrays: Iterable[jax.Array]) -> Checked:
    operator = OPERATORS[static.operator]
    given: dict[str, Any] = {}
    for slot, a in zip(static.slots, arrays, strict=True):
        strides = dlpack.compact(a.shape)
        given[slot] = Array(operator.public(slot), 0, a.shape, strides, a.dtype.name, ("meta", 0), False, "jax", None, a)
    if operator.number and static.number is not None:
        given[operator.number] = static.number
    return problem.check(operator, {slot: given.get(slot) for slot in operator.inputs}, static.options, 0)


def _axes_of(a: jax.Array) -> frozenset[Any]:
    """The mesh axes over which it varies, within shard_map."""
    kind = jax.typeof(a)
    manual = getattr(kind, "manual_axis_type", None)  # jax 0.10; before, the axes themselves
    return frozenset(manual.varying if manual is not None else getattr(kind, "vma", ()))


def _varying(arrays: Iterable[jax.Array], like: Iterable[jax.Array]) -> Arrays:
    """The arrays as varying over every mesh axis over which one of `like` does: so shard_map wants them, whose sum over the
    shards is then the gradient of what they all share."""
    axes = frozenset[Any]().union(*map(_axes_of, like))
    return tuple(jax.lax.pcast(a, tuple(sorted(axes - _axes_of(a))), to="varying") for a in arrays)


# ---- the derivative --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(static: Static, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    h, c_last = _kernel(static._replace(options=static.options._replace(save_every=None)))(*arrays)
    return h, c_last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence_and_states(static: Static, arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a derivative needs. It has one itself: that of h and c_last, for whoever wants a derivative of the derivative."""
    h, c, c_last = _kernel(static)(*arrays)
    return h, c, c_last


def _forward(static: Static, arrays: Arrays) -> tuple[tuple[jax.Array, jax.Array], Any]:
    (h, _, c_last), kept = _forward_and_states(static, arrays)
    return (h, c_last), kept


def _forward_and_states(static: Static, arrays: Arrays) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    if static.options.save_every is None:
        raise ValueError("save_every=None keeps no states, and the gradients need them: give 1 or more")
    results = _recurrence_and_states(static, arrays)
    return results, (results[1], arrays)


def _backward(static: Static, kept: tuple[jax.Array, Arrays], given: tuple[jax.Array, ...]) -> tuple[tuple[Any, ...]]:
    c, arrays = kept
    backward = static.of("backward", ("grad_h", "grad_c_last", "c"))
    found = dict(zip(backward.results, _gradients(backward, (given[0], given[-1], c, *arrays)), strict=True))
    return (tuple(found.get(f"grad_{slot}") for slot in static.slots),)


_recurrence.defvjp(_forward, _backward)
_recurrence_and_states.defvjp(_forward_and_states, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(static: Static, arrays: Arrays) -> Arrays:
    return _kernel(static)(*arrays)


def _gradients_again(static: Static, arrays: Arrays) -> tuple[Arrays, Any]:
    """The gradients, and their own derivative, which the linear recurrence alone has."""
    if static.operator != LINEAR_BACKWARD.name:
        title = {BACKWARD.name: "SRU", QRNN_BACKWARD.name: "QRNN"}[static.operator]
        raise NotImplementedError(f"cusru has no derivative of the {title} recurrence's gradients (grad of grad)")
    found: tuple[Arrays, Any] = jax.vjp(functools.partial(_linear_gradients, static), arrays)
    return found


def _linear_gradients(static: Static, arrays: Arrays) -> Arrays:
    given = dict(zip(static.slots, arrays, strict=True))
    a, b = given["weight_c"], given["u"]
    state = STATES[b.dtype.name]
    first = given["c0"].astype(state) if "c0" in given else jnp.zeros(b.shape[1:], state)
    padded, begins = (given[name].astype(bool)[..., None] if name in given else None for name in ("mask_pad", "starts"))

    def recurrence(a: jax.Array, b: jax.Array, *, form: str, c0: jax.Array, starts: jax.Array | None, **ways: Any) -> Any:
        return run("linear_recurrence", (b, None, None, a, c0, None, None, starts), Options((form,), **ways))

    (form,), bidirectional, save_every, reverse = static.options
    found = linear_gradients.gradients(
        jnp, recurrence, given["grad_h"].astype(state), given["grad_c_last"].astype(state),
        jnp.broadcast_to(a.astype(state), b.shape), b.astype(state), first, padded, begins,
        form=form, bidirectional=bidirectional, save_every=save_every, reverse=reverse,
    )  # fmt: skip
    grad_a, grad_b, grad_c0 = found
    grad_a = grad_a.sum(tuple(range(3 - a.ndim)))
    gradients = {"grad_weight_c": grad_a.astype(a.dtype), "grad_u": grad_b.astype(b.dtype)}
    if "c0" in given:
        gradients["grad_c0"] = grad_c0.astype(given["c0"].dtype)
    return tuple(gradients[slot] for slot in static.results)


_gradients.defvjp(_gradients_again, lambda static, pullback, given: pullback(given))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _without_gradient(name: str, a: jax.Array) -> jax.Array:
    """a, of which nobody may ask a gradient: JAX looks for its derivative only then."""
    return a


def _refuse(name: str, a: jax.Array) -> Any:
    raise TypeError(f"cusru has no gradient of {name}: pass jax.lax.stop_gradient({name})")


_without_gradient.defvjp(_refuse, _refuse)


# ---- vmap ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(call.KEPT)
def _kernel(static: Static) -> Callable[..., Arrays]:
    """The results of one pass, with a rule for vmap."""

    @jax.custom_batching.custom_vmap
    def kernel(*arrays: jax.Array) -> Arrays:
        return _launch(static, arrays)

    @kernel.def_vmap
    def _(size: int, mapped: Sequence[bool], *arrays: jax.Array) -> tuple[Arrays, tuple[bool, ...]]:
        results = _batched(static, size, mapped, arrays)
        return results, (True,) * len(results)

    return kernel  # type: ignore[no-any-return]


def _batched(static: Static, size: int, mapped: Sequence[bool], arrays: Sequence[jax.Array]) -> Arrays:
    """`size` problems as one, their results with the mapped axis in front.

    Of so many times the columns, for a column has its own parameters and its own gradients of them. Padding, starts and scale_x
    are shared by all columns: where they differ, of so many times the batch, if no gradient is wanted of what batch rows share,
    and that is the same in each problem. Else one after the other."""
    operator = OPERATORS[static.operator]
    given = dict(zip(static.slots, arrays, strict=True))
    is_mapped = dict(zip(static.slots, mapped, strict=True))
    if not size:  # of no columns nobody could tell how many each problem has
        one = (jax.ShapeDtypeStruct(a.shape[is_mapped[slot] :], a.dtype) for slot, a in given.items())
        return _varying((jnp.zeros((0, *a.shape), a.dtype) for a in jax.eval_shape(_kernel(static), *one)), arrays)
    # "F", the two rows of a parameter laid end to end, as "RD"
    axes = {slot: operator.axes(slot, a.ndim - is_mapped[slot]).replace("F", "RD") for slot, a in given.items()}
    flat = {slot for slot, a in given.items() if a.ndim - is_mapped[slot] < len(axes[slot])}
    letter, halves = "D", 2 if static.options.bidirectional else 1
    if any(is_mapped[slot] and "D" not in axes[slot] for slot in given):
        letter, halves = "B", 1
        shared = [slot for slot in given if "B" not in axes[slot]]
        if any(is_mapped[slot] or f"grad_{slot}" in static.results for slot in shared):
            return _one_by_one(static, mapped, arrays)
    folded = []
    for slot, a in given.items():
        if slot in flat:
            a = a.reshape(*a.shape[:-1], 2, a.shape[-1] // 2)
        if letter not in axes[slot]:
            folded.append(a)
            continue
        if not is_mapped[slot]:
            a = jnp.broadcast_to(a, (size, *a.shape))
        folded.append(_fold(a, axes[slot].index(letter), halves))
    unfolded = []
    for slot, a in zip(static.results, _kernel(static)(*folded), strict=True):
        like = slot.removeprefix("grad_")
        a = _unfold(a, (axes.get(like) or operator.axes(slot, a.ndim)).index(letter), halves, size)
        unfolded.append(a.reshape(size, -1) if like in flat else a)
    return tuple(unfolded)


def _fold(a: jax.Array, axis: int, halves: int) -> jax.Array:
    """(size, ..., D, ...) -> (..., size * D, ...), where D is (halves, width) and becomes (halves, size, width)."""
    size, shape = a.shape[0], a.shape[1:]
    a = a.reshape(size, *shape[:axis], halves, shape[axis] // halves, *shape[axis + 1 :])
    return jnp.moveaxis(a, 0, axis + 1).reshape(*shape[:axis], size * shape[axis], *shape[axis + 1 :])


def _unfold(a: jax.Array, axis: int, halves: int, size: int) -> jax.Array:
    """The reverse of _fold."""
    shape, width = a.shape, a.shape[axis] // size
    a = a.reshape(*shape[:axis], halves, size, width // halves, *shape[axis + 1 :])
    return jnp.moveaxis(a, axis + 1, 0).reshape(size, *shape[:axis], width, *shape[axis + 1 :])


def _one_by_one(static: Static, mapped: Sequence[bool], arrays: Sequence[jax.Array]) -> Arrays:
    def one(own: Arrays) -> Arrays:
        rest = iter(own)
        return _kernel(static)(*(next(rest) if yes else a for a, yes in zip(arrays, mapped, strict=True)))

    found: Arrays = jax.lax.map(one, tuple(a for a, yes in zip(arrays, mapped, strict=True) if yes))
    return found


# ---- the call --------------------------------------------------------------------------------------------------------


def _launch(static: Static, arrays: Arrays) -> Arrays:
    """The workspace is a result that nobody looks at: so it is XLA's memory too."""
    checked = _check(static, arrays)
    wanted = [result for result in problem.wanted_results(checked).values() if result is not None]
    shapes = [jax.ShapeDtypeStruct(result.shape, jnp.dtype(result.dtype)) for result in wanted]
    if workspace := call.workspace_size(checked):
        shapes.append(jax.ShapeDtypeStruct((workspace,), jnp.uint8))
    results = buffer_callback(_callback(static), tuple(shapes))(*arrays)
    return _varying(results[: len(wanted)], arrays)


@functools.lru_cache(call.KEPT)
def _callback(static: Static) -> Callable[..., None]:
    """One for each program: by it JAX tells them apart."""
    operator = OPERATORS[static.operator]
    count = max(map(ARRAYS.index, operator.inputs)) + 1

    def callback(context: Any, results: Sequence[Any], *buffers: Any) -> None:
        device = dlpack.device_of(results[0], "a buffer of XLA's")
        on_device = device[0] == "cuda"

        def view(buffer: Any) -> Any:
            return dlpack.as_cupy(buffer, device) if on_device else np.asarray(buffer)

        given = dict(zip(static.slots, map(view, buffers), strict=True))
        out = dict(zip((*static.results, "workspace"), map(view, results), strict=False))
        if operator.number and static.number is not None:
            given[operator.number] = static.number
        inputs = [given.get(slot) for slot in ARRAYS[:count]]
        members = [out.get(slot) for slot in operator.results]
        with raw_kernels.current(device, context.stream if on_device else None):
            call.run(operator, inputs, static.options, members, out.get("workspace"), None)

    return callback
