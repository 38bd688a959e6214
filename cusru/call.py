"""One call: its arrays are read, what is known of such arrays is looked up or worked out, results are laid out, the recurrence
runs.

What depends on shapes, strides, alignment, dtypes, device and options alone is a `Ready`: a pure function of these, and kept.
What belongs to the arrays themselves is looked at in every call: overlap, who may write, what torch records. The quick way is
for arrays of one framework at its current stream, with nothing wrong; all else goes the careful way, which says what is wrong,
in the order in which `problem.check` looks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cusru import dlpack, raw_kernels
from cusru.arguments import ARRAYS, OPERATORS, Operator, fill
from cusru.dlpack import Array
from cusru.plan import ALIGNMENT, Plan, plan
from cusru.problem import WORKSPACE, Checked, Options, check, check_device, check_result, check_workspace, layout, wanted_results
from cusru.specialisation import Limits

KEPT = 512  # signatures, of some 3 KB each

_SLOTS = {name: slot for slot, name in enumerate(ARRAYS)}
_RESULTS = {name: tuple([_SLOTS[slot] for slot in one.results]) for name, one in OPERATORS.items()}
_COUNTS = {name: len(one.slots) for name, one in OPERATORS.items()}


class Ready(NamedTuple):
    """All of a call but its memory."""

    operator: Operator
    device: tuple[str, int]
    framework: str  # u's
    plan: Plan | None  # None: NumPy runs it
    fresh: tuple[tuple[int, dlpack.Blank], ...]  # slots of results that cusru allocates
    scratch: dlpack.Blank | None  # the workspace, if one is needed
    spans: tuple[tuple[int, int, int], ...]  # slots of arrays that were given, and from the address: first byte, end
    views: tuple[dlpack.View, ...]  # how NumPy would see a CPU's memory, parameters in two rows
    flat: tuple[int, ...]  # slots of parameters that are given as (2*D,)
    bits: bool  # whether there is bfloat16 among them, which NumPy knows by its bits alone
    options: dict[str, Any]  # of the reference, the arrays' names of which are the callers'


class Call(NamedTuple):
    """One that can run: its arrays by slots, None where a result is fresh, with their addresses."""

    ready: Ready
    objects: list[Any]
    addresses: list[int]
    number: float
    stream: int | None  # None: CuPy's current one
    written: tuple[Any, ...]  # by the caller's leave


def run(operator: Operator, inputs: Sequence[Any], options: Options, out: Any, workspace: Any, stream: Any) -> list[Any]:
    """The results, in `out` or in fresh memory."""
    call = look(operator, inputs, options, out, workspace, stream)
    if call is not None:
        results = start(call)
        if results is not None:
            return results
    return _run_carefully(operator, inputs, options, out, workspace, stream)


# ---- the quick way ---------------------------------------------------------------------------------------------------


def look(
    operator: Operator, inputs: Sequence[Any], options: Options, out: Any = None, workspace: Any = None, stream: Any = None,
    like_inputs: bool = False, unwanted: tuple[str, ...] = (),
) -> Call | None:  # fmt: skip
    """The call, if nothing about it is out of the ordinary.

    `like_inputs`: h lies in memory as u does, and a gradient as its input; else results are in C order, but for the gradient of u
    on a device. `unwanted`: results that are left out."""
    choices, bidirectional, save_every, reverse = options
    for name in choices:
        if type(name) is not str:  # a subclass may be equal to anything
            return None
    if not (type(bidirectional) is type(reverse) is bool and (save_every is None or type(save_every) is int)):  # True is no 1
        return None
    objects, number = list(inputs), 1.0
    if operator.number is not None:
        slot, is_scale = _SLOTS[operator.number], operator.number == "scale_x"
        given = objects[slot]
        if type(given) is float or type(given) is int:
            objects[slot] = None
            if not is_scale and not 0 <= given <= 1:
                return None
            number = given
        elif not is_scale:
            number = 0.0
        elif given is None:
            return None
    objects += (None,) * (_COUNTS[operator.name] - len(objects))
    if out is not None:
        if not (isinstance(out, tuple | list) and len(members := tuple(out)) == len(out) == len(operator.results)):
            return None
        for slot, member in zip(_RESULTS[operator.name], members, strict=True):
            objects[slot] = member
    writes = out is not None or workspace is not None
    objects.append(workspace)
    try:
        read = dlpack.read_plain(objects, writes, stream)
        if read is None:
            return None
        framework, device, handle, addresses, layouts = read
        limits = None
        if device[0] == "cuda" or raw_kernels.simulated():
            limits = raw_kernels.limits(device)
            if not writes and framework == "numpy":  # whose addresses nobody had asked for
                _, _, _, addresses, layouts = dlpack.read_plain(objects, True, stream) or read
        ready = prepare(operator.name, framework, device, limits, options, layouts, like_inputs, unwanted)
        number = float(number)
    except Exception:  # the careful way says what it is
        return None
    written = tuple([a for a in objects[len(inputs) :] if a is not None]) if writes else ()
    if written and not _apart(addresses, ready.spans):
        return None
    if written and framework != "cupy" and not all(map(dlpack.may_be_written, written)):
        return None
    return Call(ready, objects, addresses, number, handle, written)


def _apart(addresses: Sequence[int], spans: Sequence[tuple[int, int, int]]) -> bool:
    """Whether no array begins before another ends."""
    end = 0
    for low, high in sorted([(addresses[slot] + low, addresses[slot] + high) for slot, low, high in spans]):
        if low < end:
            return False
        end = high
    return True


@functools.lru_cache(KEPT)
def prepare(
    operator_name: str, framework: str, device: tuple[str, int], limits: Limits | None, options: Options,
    layouts: tuple[Any, ...], like_inputs: bool, unwanted: tuple[str, ...],
) -> Ready:  # fmt: skip
    """What is known of a call by this signature, a pure function of it. Raises where anything is wrong, but not in the order in
    which `check` would. limits: None stands for NumPy."""
    operator, names = OPERATORS[operator_name], (*ARRAYS[: len(layouts) - 1], "workspace")
    given = {n: dlpack.describe(n, framework, key, device) for n, key in zip(names, layouts, strict=True) if key is not None}
    workspace = given.pop("workspace", None)
    inputs: dict[str, Any] = {name: given.get(name) for name in operator.inputs}
    if operator.number == "scale_x" and inputs["scale_x"] is None:
        inputs["scale_x"] = 1.0
    checked = check(operator, inputs, options, 0)
    problem, fresh = checked.problem, []
    for name, wanted in wanted_results(checked).items():
        if name in given:
            check_result(given[name], wanted)
        elif wanted is not None and name not in unwanted:
            order = _memory_order(name, given, like_inputs)
            made = dlpack.blank(wanted.shape, wanted.dtype, order)
            fresh.append((_SLOTS[name], made))
            given[name] = Array(name, 0, made.shape, made.strides, made.dtype, device, False, framework, None, None)
        else:
            continue
        problem.results[name] = layout(given[name], operator.axes(name, len(given[name].shape)))
    chosen = plan(problem, limits or Limits(0))
    if workspace is not None:
        dlpack.borrow(workspace, "workspace", allowed=WORKSPACE)
        check_workspace(workspace, chosen.workspace)
    held = {_SLOTS[name]: array for name, array in given.items()}
    if workspace is not None:
        held[len(layouts) - 1] = workspace
    extents = {slot: dlpack.extent(array) for slot, array in held.items()}
    laid_out = {_SLOTS[name]: one for name, one in {**problem.inputs, **problem.results}.items()}
    views = [
        dlpack.View(slot, one.shape, dlpack.storage(one.dtype), extents[slot][0], tuple([s * one.itemsize for s in one.strides]))
        for slot, one in laid_out.items()
    ]
    own_memory = {slot for slot, _ in fresh}
    spans = [(slot, *extents[slot]) for slot, array in held.items() if array.size and slot not in own_memory]
    return Ready(
        operator, device, framework, chosen if limits else None, tuple(fresh),
        dlpack.blank((chosen.workspace,), "uint8") if chosen.workspace else None, tuple(spans), tuple(views),
        tuple([_SLOTS[name] for name, a in given.items() if operator.axes(name, len(a.shape)) == "F"]),
        any(a.dtype == "bfloat16" for a in held.values()),
        dict(
            **problem.choices, bidirectional=problem.bidirectional, reverse=problem.reverse, save_every=problem.block,
        ),
    )  # fmt: skip


def _memory_order(name: str, given: dict[str, Array], like_inputs: bool) -> tuple[int, ...] | None:
    """The axes of a fresh result, outermost first. The gradient of u lies as u does, so that a GEMM takes it as it is; on a CPU
    it is always compact in C order, which JAX and TensorFlow insist on."""
    if like_inputs:
        like = given.get("u" if name == "h" else name.removeprefix("grad_"))
        if like is None or name in ("c", "c_last"):
            return None
        rank = 3 if name == "h" else len(like.shape)
        order = dlpack.order_like(like.shape[:rank], like.strides[:rank])
    elif name == "grad_u" and (u := given["u"]).device[0] == "cuda" and u.framework in ("cupy", "torch"):
        order = tuple(sorted(range(len(u.strides)), key=lambda axis: -abs(u.strides[axis])))
    else:
        return None
    return None if order == tuple(range(len(order))) else order


def start(call: Call) -> list[Any] | None:
    """Run it; the results. None, and nothing done, where fresh memory does not lie as a plan takes for granted."""
    ready, objects, addresses, number, stream, written = call
    framework, device, chosen = ready.framework, ready.device, ready.plan
    with raw_kernels.current(device, stream):
        for slot, blank in ready.fresh:
            objects[slot], addresses[slot] = dlpack.new(framework, blank, device)
            if addresses[slot] % ALIGNMENT:
                return None
        if framework == "torch":
            for a in written:
                dlpack.mark_written(a)
        if chosen is not None:
            _launch(ready, chosen, addresses, number, framework)
        elif framework == "numpy":
            _run_numpy(ready, objects[:-1], number)
        else:
            _run_numpy(ready, dlpack.see(addresses, ready.views)[:-1], number)
    return [objects[slot] for slot in _RESULTS[ready.operator.name]]


def _launch(ready: Ready, chosen: Plan, addresses: list[int], number: float, allocator: str) -> None:
    """The last address is the workspace's, 0 where there is none yet: then it comes from the allocator that knows the stream, for
    it is free again before the kernels have run. That is torch's only where the stream is torch's current one, else CuPy's."""
    base = addresses[-1]
    if ready.scratch and not base:
        _kept, base = dlpack.new(allocator, ready.scratch, ready.device)
    args = fill(chosen.frame, addresses[:-1], chosen.rooms(base), number)
    raw_kernels.run(chosen.launches, args, ready.device)


def _run_numpy(ready: Ready, arrays: list[Any], number: float) -> None:
    """Each array by its slot; bfloat16 and flat parameters as they were given, or as the reference takes them."""
    from cusru import reference

    operator = ready.operator
    if ready.bits:
        arrays = [a if a is None or a.dtype.name != "bfloat16" else a.view(np.uint16) for a in arrays]
    for slot in ready.flat:
        arrays[slot] = arrays[slot].reshape(2, -1) if arrays[slot].size else arrays[slot].reshape(2, 0)
    if operator.number is not None:
        slot = _SLOTS[operator.number]
        if operator.number == "scale_x" and arrays[slot] is not None:
            number = reference.widen(arrays[slot], np.float32).item() if ready.bits else arrays[slot].item()
        if operator.number == "scale_x" or (arrays[slot] is None and number):
            arrays[slot] = number
    named = {operator.public(name): arrays[_SLOTS[name]] for name in (*operator.inputs, *operator.results)}
    if operator.family == "sru":
        run = getattr(reference, operator.direction)
    else:
        from cusru import reference_affine

        run = getattr(reference_affine, operator.name)
    run(**named, **ready.options)


# ---- the careful way -------------------------------------------------------------------------------------------------


def _run_carefully(
    operator: Operator, inputs: Sequence[Any], options: Options, out: Any, workspace: Any, stream: Any
) -> list[Any]:  # fmt: skip
    named = dict(zip(ARRAYS, inputs, strict=False))
    checked = check(operator, {name: named[name] for name in operator.inputs}, options, stream)
    problem, device, handle = checked.problem, checked.device, checked.stream
    u, first = checked.arrays["u"], operator.public("u")
    results = wanted_results(checked)
    fields = [operator.public(name).removeprefix("grad_") for name in results]
    objects = dict(zip(results, _members(out, fields), strict=True))
    arrays: dict[str, Array] = {}
    for (name, wanted), label in zip(results.items(), [f"out.{field}" for field in fields], strict=True):
        if objects[name] is not None:
            if wanted is None:
                raise ValueError(f"{label} must be None: this call has no such result")
            check_device(label, dlpack.device_of(objects[name], label), device, first)
            array = dlpack.borrow(objects[name], label, handle, device, (wanted.dtype,))
            check_result(array, wanted)
            arrays[name] = array
    scratch = None
    if workspace is not None:
        check_device("workspace", dlpack.device_of(workspace, "workspace"), device, first)
        scratch = dlpack.borrow(workspace, "workspace", handle, device, WORKSPACE)
        check_workspace(scratch, workspace_size(checked))
    written = [*arrays.values(), *([] if scratch is None else [scratch])]
    if pair := dlpack.overlapping(written, checked.arrays.values()):
        raise ValueError(f"{pair[0].name} overlaps {pair[1].name}; what is written must share no memory with anything else")
    if u.framework != "torch" and any(a.framework == "torch" for a in written):
        dlpack.refuse_tracers()  # else asked already
    on_numpy = device == dlpack.CPU and not raw_kernels.simulated()

    layouts = [None if (a := checked.arrays.get(n) or arrays.get(n)) is None else dlpack.key_of(a) for n in operator.slots]
    with raw_kernels.current(device, handle):
        ready = prepare(
            operator.name, u.framework, device, None if on_numpy else raw_kernels.limits(device),
            Options(tuple(problem.choices.values()), problem.bidirectional, problem.save_every, problem.reverse),
            (*layouts, None), False, (),
        )  # fmt: skip
        for slot, blank in ready.fresh:
            arrays[ARRAYS[slot]] = dlpack.empty(ARRAYS[slot], blank.shape, blank.dtype, device, u.framework, blank.order)
        for array in written:
            dlpack.mark_written(array.source)
        held = {**checked.arrays, **arrays}
        found = [held.get(name) for name in operator.slots]
        if ready.plan is None:
            _run_numpy(ready, [None if a is None else a.numpy() for a in found], checked.number)
        else:
            addresses = [0 if a is None else a.pointer for a in found]
            addresses.append(0 if scratch is None else scratch.pointer)
            _launch(ready, ready.plan, addresses, checked.number, "numpy")
        return [
            objects[name] if objects[name] is not None else dlpack.give(arrays[name], u) if name in arrays else None
            for name in results
        ]


def _members(out: Any, names: list[str]) -> Sequence[Any]:
    if out is None:
        return [None] * len(names)
    if not isinstance(out, Sequence) or isinstance(out, str | bytes):
        raise TypeError(f"out must be a sequence of {len(names)} ({', '.join(names)}); got {type(out).__name__}")
    if len(out) != len(names):
        raise ValueError(
            f"out has {len(out)} members; expected {len(names)} ({', '.join(names)}), None where cusru is to allocate"
        )
    return out


def workspace_size(checked: Checked) -> int:
    """Bytes, for all of the results that a call can have. It depends on shapes, dtypes and options only."""
    problem = replace(checked.problem, results={})
    for name, wanted in wanted_results(checked).items():
        if wanted is not None:
            made, axes = dlpack.blank(wanted.shape, wanted.dtype), problem.operator.axes(name, len(wanted.shape))
            array = Array(name, 0, made.shape, made.strides, made.dtype, checked.device, False, "other", None, None)
            problem.results[name] = layout(array, axes)
    return plan(problem, Limits(1, split=raw_kernels.split)).workspace
