"""How a problem is laid out on a GPU: which kernel, how many threads, how much scratch memory, which sums in which order.

Pure: sizes, options, layouts and the device's limits in, geometry out, no array and no device. A plan has a numeric half
(which sums are formed, in which order: from shape, dtype and options, so that every memory layout gives the same bits) and
a memory half (columns per thread, vector accesses: from strides, alignment, shared memory). docs/performance.md says what
each choice costs in bytes and registers."""

from __future__ import annotations

import math
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
from cusru.specialisation import (
    CLEAR_THREADS,
    FORMS,
    REDUCE_COLUMNS,
    REDUCE_THREADS,
    SPLIT,
    UNIT,
    Launch,
    Limits,
    Specialisation,
    columns,
)

ALIGNMENT = 16  # bytes: the widest access
#: Spans from one that tells its start to the next, powers of two, by the most columns: few columns have many blocks each, whose
#: spans would wait for a long chain of anchors
ANCHORS = {80: 64, 200: 32, 640: 16, math.inf: 8}
#: Least steps, most columns, and most columns a step, for time to be split
WORTH = {"thin": (1024, 1024, 0.5), "forward": (512, 3072, 2.5), "backward": (256, 3584, 4), "recompute": (192, 6144, 12)}
#: Where time is guessed: steps of a span at least, blocks at most (twice as many where two are resident), steps from one state
#: that is compared to the next
GUESSED_STEPS, GUESSED_BLOCKS, COMPARED = 1024, 132, 64
#: Most bytes of a step for time to be guessed, by the most steps
WORTH_GUESSING = {4096: 28000, 18000: 12600, math.inf: 9600}
RESERVED = 1024  # bytes of shared memory that the system takes of each block
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


class Split(NamedTuple):
    """How time is split, the numeric half of it (`kernels/split.cuh`; where the pass is not affine `kernels/guess.cuh`)."""

    spans: int
    anchor: int  #: spans from one that tells its start to the next, a power of two
    chunks: int  #: of a span, of which a warp's lanes have one each
    units: int  #: of a chunk: forward tiles, backward saved blocks, or all of it
    steps: int  #: of a unit; backward it is a part of a warp's stretch, or where it is longer than a tile some warps' stretches
    slice: int = 1  #: forward: tiles from one whose start is known to the next, saved states among those; or that is compared
    lead: int = 0  #: forward: steps that a reversed column's first saved block is short
    resident: int = 2  #: blocks for which a multiprocessor has room (`Specialisation.split`)

    def warps(self, kernel: Specialisation) -> int:
        if not kernel.affine:
            return min(self.units, kernel.warps)
        if self.steps <= kernel.tile:  # a part of a warp's stretch for each
            return -(-self.units // kernel.parts) + (kernel.direction == "forward")  # one talks
        return self.units * -(-self.steps // kernel.stretch)


class Plan(NamedTuple):
    kernel: Specialisation
    group: int  #: numeric: batches whose parameter gradients one block of the backward sums
    rows: int  #: numeric: of parameter sums, one for `group` batches; where time is split one for each batch of a span
    sums: int  #: parameter gradients per column, 0, 2 or 4; of several rows they go through the workspace
    grad_u_packed: bool  #: memory: grad_u is written as vectors of k values
    partial_bytes: int
    checkpoint_bytes: int
    launches: tuple[Launch, ...]  #: in turn
    frame: Frame  #: the kernels' arguments but for addresses
    workspace: int  #: bytes, by the numeric half only. It may begin at any address, so there is room to align it
    split: Split | None = None
    signal_bytes: int = 0

    def rooms(self, base: int) -> tuple[int, int, int, int]:
        """Where partial sums, checkpoints, signals and words lie in a workspace at this address."""
        base = aligned(base)
        checkpoints = base + aligned(self.partial_bytes)
        signals = checkpoints + aligned(self.checkpoint_bytes)
        return base, checkpoints, signals, signals + aligned(self.signal_bytes)


def plan(problem: Problem, device: Limits) -> Plan:
    """The workspace does not depend on the device, if that has the shared memory for what is planned."""
    given, wanted = problem.inputs, problem.results
    backward = problem.direction == "backward"
    recompute = backward and problem.block != 1
    # Partial sums take rows * sums states for L * B * 10 values of traffic; 32 steps or more a thread keep them under 5%. (Where
    # time is split and save_every leaves a span fewer steps, down to 12, they and the spans' words take up to 10%.)
    of_batches = "grad_weight_c" in wanted and problem.axes("grad_weight_c") == "BD"  # each has sums of its own
    group = max(1, min(-(-32 // max(problem.length, 1)), problem.batch)) if backward and not of_batches else 1
    rows = -(-problem.batch // group)
    summed = [
        slot
        for slot in ("grad_bias", "grad_weight_c")
        if slot in wanted and not (slot == "grad_weight_c" and problem.step_weight)
    ]
    sums = sum(2 if "R" in problem.axes(slot) else 1 for slot in summed)
    state_bytes = ITEMSIZES[problem.state]
    directions = 2 if problem.bidirectional else 1

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
        layouts.append((kernel, grad_u_packed))
    split = _split(problem, layouts[-1][0], device)
    walked = rows  # columns of so many rows, each by a thread
    if split is None:
        kernel, warps, grad_u_packed = _by_turns(problem, layouts, rows, device)
    else:
        kernel, warps, grad_u_packed = _by_spans(layouts, split, device)
        group, walked = 1, problem.batch
        rows = split.spans * (1 if of_batches else problem.batch) if backward else problem.batch
    # 32 threads' columns, which all run the same way
    grid = groups = directions * -(-walked * problem.width // (directions * kernel.columns * 32))
    most_groups = directions * -(-walked * problem.width // (directions * 32))
    units = -(-min(problem.block or 1, problem.length) // UNIT)
    states = max(units - 2, 0) if recompute else 0  # of each column, in the workspace: inside saved blocks, or spans
    flags = words = 0
    launches = []
    if split and kernel.affine:
        grid *= max(1, min(split.spans, -(-split.resident * device.multiprocessors // groups)))
        flags, words = most_groups * (1 + split.spans), 3 * split.spans + split.spans // split.anchor + 1
        clear = -(-groups * (1 + split.spans) // CLEAR_THREADS)
        launches.append(Launch(Specialisation("clear", "float32"), (min(clear, 1024),), (CLEAR_THREADS,), 0))
    elif split:
        grid *= split.spans
        flags, words, states = most_groups, 2 * split.spans, split.spans * (split.units // split.slice)
    if grid:
        launches.append(Launch(kernel, (grid,), (32 * warps,), kernel.shared(warps)))
    if split and not kernel.affine:
        launches.append(launches[0]._replace(kernel=kernel._replace(mend=True), grid=(grid - groups,)))
    signals, of_states = 4 * flags, problem.batch * problem.width * state_bytes
    checkpoints, words = states * of_states, words * of_states
    reduced = rows != 1 and (not of_batches or split is not None)
    if sums and problem.width and reduced:  # a single row's sums are the gradients; of no rows the sums are 0
        reduce = Specialisation("reduce", problem.dtype)
        added = problem.width * (problem.batch if of_batches else sums)
        launches.append(Launch(reduce, (-(-added // REDUCE_COLUMNS),), (REDUCE_THREADS,), 0))
    partials = rows * sums * problem.width * (problem.batch if of_batches else 1) * state_bytes if reduced else 0
    numbers = dict(
        length=problem.length, batch=problem.batch, width=problem.width, save_every=problem.block or 1, group=group, rows=rows,
        sums=sums,
    )  # fmt: skip
    if split:
        numbers |= dict(
            spans=split.spans,
            log_anchor=max(split.anchor.bit_length() - 1, 0),
            groups=groups,
            chunks=split.chunks,
            units=split.units,
            slice=split.slice,
            lead=split.lead,
        )
    of_a_step = ["grad_u"] + ["grad_x"] * ("x" in given) + ["grad_weight_c"] * problem.step_weight
    straight = (
        (not backward or (wanted.keys() >= set(of_a_step) and grad_u_packed == kernel.packed))
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
    room = aligned(partials) + aligned(checkpoints) + aligned(signals) + words
    workspace = room + ALIGNMENT - 1 if room else 0
    return Plan(
        kernel, group, rows, sums, grad_u_packed, partials, checkpoints, tuple(launches), parts, workspace, split, signals
    )


_Layouts = list[tuple[Specialisation, bool]]  # and whether grad_u is packed


def _by_turns(problem: Problem, layouts: _Layouts, rows: int, device: Limits) -> tuple[Specialisation, int, bool]:
    directions = 2 if problem.bidirectional else 1
    pairs = directions * -(-rows * problem.width // (directions * 64))
    walked = min(problem.block or UNIT, UNIT) if layouts[0][0].recompute else problem.length  # together
    choices = [(k, _warps(k, -(-walked // k.tile), pairs, device), of_grad) for k, of_grad in layouts]
    choices += [(kernel, 1, of_grad) for kernel, _, of_grad in choices]
    kernel, warps, of_grad = next((c for c in choices if _fits(*c[:2], device)), choices[-1])
    return kernel._replace(alone=warps == 1), warps, of_grad


def _split(problem: Problem, kernel: Specialisation, device: Limits) -> Split | None:
    """None: time is walked by turns. kernel: that of one column a thread."""
    if device.split == () or not problem.length * problem.batch * problem.width:
        return None
    forward, every = problem.direction == "forward", problem.block or 1
    lead = -problem.length % every if forward and (problem.bidirectional or problem.reverse) else 0
    if not kernel.affine:
        return _guessed(problem, kernel, lead, device)
    columns = problem.batch * problem.width // (2 if problem.bidirectional else 1)
    chunks = 32 // columns if columns <= 16 else 1
    anchor = next(spans for most, spans in ANCHORS.items() if problem.batch * problem.width <= most)
    limit, anchor = (*(device.split or (UNIT,)), anchor)[:2]
    assert anchor & (anchor - 1) == 0, "a power of two: the kernels shift by it"
    for resident, most in SPLIT[problem.direction].items():  # two blocks, if one of them has room for slices
        kernel = kernel._replace(split=resident)
        most = min(most, limit)
        of_slice, steps = 1, kernel.tile
        if forward:
            of_slice = math.lcm(every, steps) // steps
            units = max(most // of_slice, 1) * of_slice
        else:
            steps = most * kernel.stretch if every == 1 else every
            units = most * kernel.parts if steps <= kernel.tile else max(most // -(-steps // kernel.stretch), 1)
        spans = -(-(problem.length + lead) // (units * steps * chunks))
        split = Split(spans, anchor, chunks, units, steps, of_slice, lead, resident)
        if (warps := split.warps(kernel)) <= kernel.warps:
            possible = kernel.shared(warps) <= device.shared
            return split if possible and (device.split or _worth_it(problem)) else None
    return None


def _one_column(problem: Problem) -> bool:
    """A thread; or two, where memory lies so."""
    return problem.dtype == "float64" or problem.width % (4 if problem.bidirectional else 2) != 0


def _guessed(problem: Problem, kernel: Specialisation, lead: int, device: Limits) -> Split | None:
    """Spans of so many steps that all are walked at once by a large device, which no bit depends on."""
    columns, directions = problem.batch * problem.width, 2 if problem.bidirectional else 1
    groups = directions * -(-columns // (directions * 32 * (1 if _one_column(problem) else 2)))
    least = device.split[0] if device.split else GUESSED_STEPS // kernel.tile
    of_slice, resident = min(COMPARED // kernel.tile, max(least // 2, 1)), 1 + kernel.lean
    kernel = kernel._replace(split=resident)
    spans = min(problem.length // (least * kernel.tile), max(resident * GUESSED_BLOCKS // groups, 2))
    units = -(-problem.length // (max(spans, 1) * of_slice * kernel.tile)) * of_slice
    split = Split(-(-problem.length // (units * kernel.tile)), 0, 1, units, kernel.tile, of_slice, lead, resident)
    possible = split.spans > 1 and kernel.shared(split.warps(kernel)) <= device.shared
    return split if possible and (device.split or _worth_guessing(problem)) else None


def _worth_guessing(problem: Problem) -> bool:
    """Whether that is at most 1.2 times slower by the model where no state merges. Elsewhere it is several times faster."""
    arrays = {**problem.inputs, **problem.results}
    bytes = sum(math.prod(a.shape) * a.itemsize for name, a in arrays.items() if problem.axes(name)[:1] in ("L", "S"))
    if _one_column(problem) and problem.dtype != "float64":  # twice the blocks
        bytes *= 2
    return bytes <= problem.length * next(most for steps, most in WORTH_GUESSING.items() if problem.length <= steps)


def _worth_it(problem: Problem) -> bool:
    """Whether splitting time is faster, as the model of `benchmarks/model.py` has it for devices of 132 multiprocessors; on any
    device that has the shared memory, so that results do not depend on it. docs/performance.md has the figures."""
    columns = problem.batch * problem.width * (2.5 if _one_column(problem) else 1)
    if problem.direction == "backward":
        kind = "backward" if problem.block == 1 else "recompute"
    else:  # a step of few instructions is walked fast by turns
        kind = "thin" if problem.cell.get("cell") in ("f", *FORMS) else "forward"
    least, most, a_step = WORTH[kind]
    return problem.length >= least and columns <= min(most, a_step * problem.length)


def _by_spans(layouts: _Layouts, split: Split, device: Limits) -> tuple[Specialisation, int, bool]:
    most = 1 if split.chunks > 1 else 2  # columns a thread: chunks are in lanes that would have no columns
    choices = [
        (k := kernel._replace(split=split.resident), split.warps(k), of_grad)
        for kernel, of_grad in layouts
        if kernel.columns <= most
    ]
    possible = [c for c in choices if c[0].shared(c[1]) <= device.shared]
    together = split.resident  # blocks: of one column a thread these may fit, of two not
    rooms = (c for c in possible if together * (c[0].shared(c[1]) + RESERVED) <= device.shared + RESERVED)
    return next(rooms, possible[0])


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
