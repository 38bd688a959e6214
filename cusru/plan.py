"""How a problem is laid out on a GPU: which kernel, how many threads, how much scratch memory, which sums in which order.

Pure: sizes, options, layouts and the device's limits in, geometry out, no array and no device. A plan has a numeric half
(which sums are formed, in which order: from shape, dtype and options, so that every memory layout gives the same bits) and
a memory half (columns per thread, vector accesses: from strides, alignment, shared memory). docs/performance.md says what
each choice costs in bytes and registers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cusru.arguments import (
    BIDIRECTIONAL,
    GATE_UPDATE,
    GRAD_U_PACKED,
    ITEMSIZES,
    MASK_GATE,
    NARROW,
    REVERSE,
    STRAIGHT,
    SUMS_OF_BATCHES,
    Frame,
    Operator,
    frame,
)  # fmt: skip
from cusru.specialisation import REDUCE_COLUMNS, REDUCE_THREADS, UNIT, Launch, Limits, Specialisation, columns

ALIGNMENT = 16  # bytes: the widest access
RESIDENT = 8  # warps, two a scheduler: as many as registers allow where a thread has 255


class Layout(NamedTuple):
    """An array without its memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  #: in elements
    dtype: str
    offset: int = 0  #: the address modulo ALIGNMENT

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]


@dataclass(slots=True)
class Problem:
    """One checked call without its memory: sizes, options, and the layouts of its arrays by name (absent ones are not there)."""

    operator: Operator
    length: int
    batch: int
    width: int
    k: int  #: values of u for each column and step
    dtype: str
    state: str
    choices: dict[str, str]  #: the operator's options that are names
    bidirectional: bool
    save_every: int | None
    reverse: bool = False
    inputs: dict[str, Layout] = field(default_factory=dict)  # by slot; flat parameters as their two rows
    results: dict[str, Layout] = field(default_factory=dict)  # those that are wanted, likewise

    @property
    def direction(self) -> str:
        return self.operator.direction

    @property
    def blocks(self) -> int:
        return -(-self.length // self.save_every) if self.save_every else 0

    @property
    def block(self) -> int | None:
        """save_every, or L where that is less: it changes nothing, and fits the kernels' integers. (By itself, since the L of a
        tracer must not be compared.)"""
        return self.save_every and min(self.save_every, max(self.length, 1))

    def axes(self, slot: str) -> str:
        one = self.inputs.get(slot) or self.results[slot]
        return self.operator.axes(slot, len(one.shape))

    @property
    def step_weight(self) -> bool:
        return "weight_c" in self.inputs and self.axes("weight_c")[0] == "L"

    @property
    def cell(self) -> dict[str, str | bool]:
        """What of a `Specialisation` the operator and its options decide."""
        given, choices = self.inputs, self.choices
        marks = "starts" if "starts" in given else "padding" if "mask_pad" in given else "none"
        if self.operator.family == "qrnn":
            return dict(cell=choices["pooling"], zoneout="zoneout" in given, marks=marks)
        weight = "none" if "weight_c" not in given else "column"
        if self.step_weight:
            weight = "step" if given["weight_c"].dtype == self.dtype else "step_state"
        if self.operator.family == "linear_recurrence":
            return dict(cell=choices["form"], weight=weight, marks=marks)
        skip = "projected" if self.k == 4 else "x" if "x" in given else "none"
        activation, candidate = choices["activation"], choices["candidate"]
        return dict(skip=skip, activation=activation, candidate=candidate, weight=weight, marks=marks)


class Plan(NamedTuple):
    kernel: Specialisation
    group: int  #: numeric: batches whose parameter gradients one block of the backward sums
    rows: int  #: numeric: blocks along the batch, ceil(B / group)
    sums: int  #: parameter gradients per column, 0, 2 or 4; of several rows they go through the workspace
    grad_u_packed: bool  #: memory: grad_u is written as vectors of k values
    partial_bytes: int
    checkpoint_bytes: int
    launches: tuple[Launch, ...]  #: in turn
    frame: Frame  #: the kernels' arguments but for addresses
    workspace: int  #: bytes, by the numeric half only. It may begin at any address, so there is room to align it

    def rooms(self, base: int) -> tuple[int, int]:
        """Where partial sums and checkpoints lie in a workspace at this address."""
        base = aligned(base)
        return base, base + aligned(self.partial_bytes)


def plan(problem: Problem, device: Limits) -> Plan:
    """The workspace does not depend on the device."""
    given, wanted = problem.inputs, problem.results
    backward = problem.direction == "backward"
    recompute = backward and problem.block != 1
    # Partial sums take rows * sums states for L * B * 10 values of traffic; 32 steps or more a thread keep them under 5%.
    of_batches = "grad_weight_c" in wanted and problem.axes("grad_weight_c") == "BD"  # each has sums of its own
    group = max(1, min(-(-32 // max(problem.length, 1)), problem.batch)) if backward and not of_batches else 1
    rows = -(-problem.batch // group)
    added = [
        slot
        for slot in ("grad_bias", "grad_weight_c")
        if slot in wanted and not (slot == "grad_weight_c" and problem.step_weight)
    ]
    sums = sum(2 if "R" in problem.axes(slot) else 1 for slot in added)
    state_bytes = ITEMSIZES[problem.state]

    directions = 2 if problem.bidirectional else 1
    pairs = directions * -(-rows * problem.width // (directions * 64))
    walked = min(problem.block or UNIT, UNIT) if recompute else problem.length  # together
    layouts = []  # two columns a thread or one; if neither has room, a warp by itself
    for each in columns(problem.dtype):
        if (layout := _memory_half(problem, each)) is None:
            continue
        packed, grad_u_packed = layout
        kernel = Specialisation(
            problem.direction,
            problem.dtype,
            columns=each,
            packed=packed,
            recompute=recompute,
            **problem.cell,  # type: ignore[arg-type]
        )
        grid = directions * -(-rows * problem.width // (directions * each * 32))  # a block's columns all run the same way
        layouts.append((kernel, _warps(kernel, -(-walked // kernel.tile), pairs, device), grid, grad_u_packed))
    layouts += [(kernel, 1, grid, of_grad) for kernel, _, grid, of_grad in layouts]
    kernel, warps, grid, grad_u_packed = next((c for c in layouts if _fits(*c[:2], device)), layouts[-1])
    kernel = kernel._replace(alone=warps == 1)
    units = -(-min(problem.block or 1, problem.length) // UNIT)
    checkpoints = max(units - 2, 0) * problem.batch * problem.width * state_bytes if recompute else 0

    launches = []
    if grid:
        launches.append(Launch(kernel, (grid,), (32 * warps,), kernel.shared(warps)))
    reduced = rows != 1 and not of_batches
    if sums and problem.width and reduced:  # a single row's sums are the gradients; of no rows the sums are 0
        reduce = Specialisation("reduce", problem.dtype)
        launches.append(Launch(reduce, (-(-sums * problem.width // REDUCE_COLUMNS),), (REDUCE_THREADS,), 0))
    partials = rows * sums * problem.width * state_bytes if reduced else 0
    numbers = dict(
        length=problem.length, batch=problem.batch, width=problem.width, save_every=problem.block or 1, group=group, rows=rows,
        sums=sums,
    )  # fmt: skip
    of_a_step = ["grad_u"] + ["grad_x"] * ("x" in given) + ["grad_weight_c"] * problem.step_weight
    straight = (
        (not backward or (wanted.keys() >= set(of_a_step) and grad_u_packed == packed))
        and (backward or problem.block is None or problem.block == 1 or problem.block >= kernel.tile)
        and all(
            abs(a.strides[0]) * a.itemsize < 1 << 31
            for name, a in {**given, **wanted}.items()
            if problem.axes(name)[:1] in ("L", "S")  # those that have time
        )
    )
    choices = problem.choices
    flags = BIDIRECTIONAL * problem.bidirectional + MASK_GATE * (choices.get("mask_target") == "gate")
    flags += GRAD_U_PACKED * grad_u_packed + STRAIGHT * straight + REVERSE * problem.reverse
    flags += GATE_UPDATE * (choices.get("gate") == "update") + SUMS_OF_BATCHES * of_batches
    flags += sum(f for n, f in NARROW.items() if n in given and given[n].dtype == problem.dtype != problem.state)
    parts = frame({n: (problem.axes(n), a.strides, a.itemsize) for n, a in {**given, **wanted}.items()}, numbers, flags)
    room = aligned(partials) + checkpoints
    workspace = room + ALIGNMENT - 1 if room else 0
    return Plan(kernel, group, rows, sums, grad_u_packed, partials, checkpoints, tuple(launches), parts, workspace)


def _fits(kernel: Specialisation, warps: int, device: Limits) -> bool:
    return kernel._replace(alone=warps == 1).shared(warps) <= device.shared


def _warps(kernel: Specialisation, turns: int, pairs: int, device: Limits) -> int:
    """Of a block: as many as leave room for all blocks that its multiprocessor gets. By registers that is some RESIDENT of them.
    `pairs`: blocks if each thread walked two columns, whether the layout lets it or not: so that turns are the layout's by the
    tile's length only."""
    blocks = pairs * 2 // columns(kernel.dtype)[0]
    wanted = min(turns, RESIDENT // max(-(-blocks // device.multiprocessors), 1)) if device.multiprocessors else 1
    if kernel.recompute:  # each a turn of every saved block, or a block to itself
        return min(turns, kernel.warps) if wanted > 1 else 1
    return max([1, *(warps for warps in range(2, min(wanted, kernel.warps) + 1) if _fits(kernel, warps, device))])


def _memory_half(problem: Problem, n: int) -> tuple[bool, bool] | None:
    """Whether the k values of u and of grad_u lie side by side; None if the layout has no n columns a thread."""
    arrays = {**problem.inputs, **problem.results}
    directions = 2 if problem.bidirectional else 1
    u, grad_u = arrays["u"], arrays.get("grad_u")
    streams = [a for a in arrays.values() if len(a.shape) == 3]  # (L or blocks, B, D): x, h, c, grad_h, ...
    weights = [a for name, a in arrays.items() if name in ("weight_c", "grad_weight_c") and len(a.shape) == 4]
    packed = problem.k > 1 and _vectors(u, n, problem.k)
    grad_u_packed = grad_u is not None and problem.k > 1 and _vectors(grad_u, n, problem.k)
    possible = n == 1 or (
        problem.width % (n * directions) == 0
        and all(_vectors(a, n, 1) for a in streams)
        and all(_vectors(a, n, 2) for a in weights)
        and (packed or _vectors(u, n, 1))
        and (grad_u is None or grad_u_packed or _vectors(grad_u, n, 1))
    )
    return (packed, grad_u_packed) if possible else None


def _vectors(array: Layout, columns: int, unit: int) -> bool:
    """Whether each `columns` neighbouring columns of `unit` values lie in a row, at addresses that vectors may have."""
    size = array.itemsize
    *outer, column = array.strides[:3]
    if unit > 1 and array.strides[3] != 1:
        return False
    if columns > 1 and column != unit:
        return False
    width = access_width(columns * unit * size)
    inner = array.strides[3:] if unit == 1 else ()
    steps = [s for s, extent in zip((*outer, *inner), (*array.shape[:2], *array.shape[3:]), strict=False) if extent > 1]
    if columns == 1:
        steps.append(column)
    return array.offset % width == 0 and all(s * size % width == 0 for s in steps)


def access_width(size: int) -> int:
    """The widest access, up to 16 bytes, of which `size` is a multiple."""
    return next(width for width in (16, 8, 4, 2, 1) if size % width == 0)


def aligned(address: int) -> int:
    return -(-address // ALIGNMENT) * ALIGNMENT
