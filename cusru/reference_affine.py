"""The QRNN's pooling and the linear recurrence in NumPy: the backend of CPU arrays.

QRNN: Bradbury et al., "Quasi-Recurrent Neural Networks", 2016, https://arxiv.org/abs/1611.01576
Linear recurrence: Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets over Sequence Length", 2018,
https://arxiv.org/abs/1709.04057

Both are affine in c, forward and backward, c = F(c_prev) + summand, with F(c) = factor * c or c - factor * c, the one that keeps
the digits of what is left:

    QRNN: f = sigmoid(u1) or its complement, z = tanh(u0), P = 1 - zoneout
        F(c) = c - P*(1-f) * c, or (1 - P*(1-f)) * c where that is small            summand = i*z
        i = P*(1-f), or P*sigmoid(u3) for "ifo"                                     h = c, or sigmoid(u2) * c
    linear recurrence
        F(c) = a*c ("affine") or c - a*c ("complement", "blend")                    summand = b, or a*b ("blend");   h = c

Backward, with gc = carry + gh * (o or 1): carry = F(gc). Padding, starts, tiles, blocks of time and the bits are as in
`reference.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from cusru.reference import (
    BLOCK_BYTES,
    ERRSTATE,
    QUIET,
    SHORT,
    SMALL_F,
    ZERO,
    Array,
    Marks,
    MaybeArray,
    Slices,
    Total,
    activate,
    add,
    before,
    exponentials,
    few_gates,
    gates,
    load,
    marks_of,
    multiply,
    narrow,
    negative,
    put,
    saved_after,
    slices,
    slope,
    state_dtype,
    store,
    subtract,
    sum_of,
    tiles,
    widen,
    widened,
    with_block,
)  # fmt: skip

Few = Iterable[tuple[Array, Array] | None]


class Factor(NamedTuple):
    """Of some steps, F: value * c where `whole`, else c - value * c, but for the places `small`, where it is `left` * c."""

    value: Array
    whole: bool
    small: MaybeArray = None
    left: MaybeArray = None

    def steps(self) -> tuple[Array, Few]:
        return self.value, few_gates(self.small, self.value if self.left is None else self.left)

    def cut(self, cuts: Slices) -> Factor:
        return self._each(cuts.cut)

    def since(self, steps: slice) -> Factor:
        return self._each(lambda a: a[steps])

    def _each(self, change: Callable[[Array], Array]) -> Factor:
        small, left = [a if a is None else change(a) for a in (self.small, self.left)]
        return Factor(change(self.value), self.whole, small, left)

    def slices(self, terms: Array) -> int:
        if len(terms) < SHORT:
            return 0
        return slices(terms, lambda some: self.value[some] if self.whole else 1 - self.value[some])


# ------------------------------------------------------------------------------------------------------- along time


def _apply(factor: Array, whole: bool, few: tuple[Array, Array] | None, c: Array, out: Array) -> None:
    """F(c)."""
    multiply(factor, c, out)
    if not whole:
        subtract(c, out, out)
    if few is not None:
        (places,) = few[0].ravel().nonzero()
        out.ravel()[places] = few[1].ravel()[places] * c.ravel()[places]


def run_states(states: Array, factor: Factor, summand: Array, marks: Marks | None) -> None:
    """states[0] is known; fills the others."""
    t = 0
    if count := factor.slices(summand):
        cuts = Slices(count, len(summand))
        new = np.empty((cuts.length, count * summand.shape[1], summand.shape[2]), summand.dtype)
        steps = list(_forth(new, factor.cut(cuts), cuts.cut(summand), marks and marks.cut(cuts)))
        cuts.run(states[0], lambda c, some: _state_steps(c, steps[some], factor.whole))
        t = cuts.whole
        cuts.join(new, states[1 : t + 1])
    rest = slice(t, None)
    _state_steps(states[t], _forth(states[t + 1 :], factor.since(rest), summand[rest], marks and marks.since(t)), factor.whole)


def _forth(new: Array, factor: Factor, summand: Array, marks: Marks | None) -> Iterator[Any]:
    return zip(new, *factor.steps(), summand, repeat(None) if marks is None else marks.rows, strict=False)


def _state_steps(c: Array, steps: Iterable[Any], whole: bool) -> Array:
    for new, factor, few, summand, mark in steps:
        stop, start = mark or (None, None)
        if start is not None:
            c = np.where(start, ZERO[c.dtype], c)
        _apply(factor, whole, few, c, new)
        add(new, summand, new)
        if stop is not None:
            np.copyto(new, c, where=stop)
        c = new
    return c


def run_carry(carry: Array, gc: Array, factor: Factor, marks: Marks | None) -> Array:
    """From the last step to the first: the carry is added to gc, and carry = F(gc). Returns the carry."""
    total = len(gc)
    if count := factor.slices(gc):
        cuts = Slices(count, total, reverse=True)
        rows = np.empty((cuts.length, count * gc.shape[1], gc.shape[2]), gc.dtype)
        steps = list(_back(cuts.cut(gc), rows, factor.cut(cuts), marks and marks.cut(cuts), slice(None)))
        carry = cuts.run(carry, lambda c, some: _carry_steps(c, steps[some], factor.whole))
        total -= cuts.whole
        cuts.join(rows, gc[total:])
    rest = slice(total - 1, None, -1) if total else slice(0)
    return _carry_steps(carry, _back(gc, gc, factor, marks, rest), factor.whole)


def _back(gh: Array, gc: Array, factor: Factor, marks: Marks | None, steps: slice) -> Iterator[Any]:
    of_steps = repeat(None) if marks is None else marks.rows[steps]
    return zip(gh[steps], gc[steps], *factor.since(steps).steps(), of_steps, strict=False)


def _carry_steps(c: Array, steps: Iterable[Any], whole: bool) -> Array:
    for gh, gc, factor, few, mark in steps:
        stop, start = mark or (None, None)
        add(gh, c, gc)
        new = np.empty_like(c)
        _apply(factor, whole, few, gc, new)
        if stop is not None:
            np.copyto(new, c, where=stop)
        if start is not None:
            np.copyto(new, 0, where=start)
        c = new
    return c


# -------------------------------------------------------------------------------------------- what a tile has of each cell


class _Tile:
    """Some columns of one direction, time in the order in which it is processed."""

    def __init__(self, first: Array, c0: MaybeArray, masks: tuple[MaybeArray, MaybeArray]) -> None:
        self.length, *shape = first.shape[:3]
        self.shape = tuple(shape)
        self.dtype = state_dtype(first)
        self.block = max(1, min(self.length, BLOCK_BYTES // (self.dtype.itemsize * shape[0] * shape[1])))  # steps
        self.c0, self.masks = ZERO[self.dtype] if c0 is None else c0, masks

    def marks(self, t0: int, t1: int) -> Marks | None:
        return marks_of(self.masks, t0, t1)

    def affine(self, t0: int, t1: int) -> tuple[Factor, Array]:
        """F and the summand of some steps."""
        raise NotImplementedError

    def known(self, t0: int, t1: int) -> tuple[Factor, Array, Any]:
        """And what else the output needs."""
        return *self.affine(t0, t1), None

    def output(self, of_steps: Any, c: Array, h: Array, marks: Marks | None) -> None:
        if marks is None or marks.pads is None:
            narrow(c, h)
        else:
            store(c.copy(), h, marks)


class _Pooled(NamedTuple):
    u0: Array
    z: Array
    i: Array
    o: MaybeArray
    slope_o: Any  # 1 - o
    slope_f: Any  # of the state's factor by u1, but for its sign
    slope_i: Any  # of i by u3


class _Pooling(_Tile):
    def __init__(
        self, u: Array, zoneout: Array | float | None, c0: MaybeArray, masks: tuple[MaybeArray, MaybeArray], pooling: str,
        gate: str,
    ) -> None:  # fmt: skip
        super().__init__(u, c0, masks)
        self.planes, self.zoneout = u.transpose(3, 0, 1, 2), zoneout
        self.pooling, self.update = pooling, gate == "update"

    def affine(self, t0: int, t1: int) -> tuple[Factor, Array]:
        return self.known(t0, t1, (1, 3) if self.pooling == "ifo" else (1,))[:2]

    def known(self, t0: int, t1: int, gates_of: tuple[int, ...] = (1, 2, 3)) -> tuple[Factor, Array, _Pooled]:
        """gates_of: planes of u."""
        planes = self.planes[:, t0:t1]
        u0, (first, *others) = widen(planes[0], self.dtype), [j for j in gates_of if j < len(planes)]
        e, below = np.empty((2, 1 + len(others), *u0.shape), self.dtype)
        for plane, j in zip(e, (first, *others), strict=True):
            load(planes[j], plane)
        if self.update:
            negative(e[0], e[0])
        exponentials(e, None, u0, below)
        gates(e, below)
        found = dict(zip((first, *others), zip(e, below, strict=True), strict=True))
        (f, g), (o, q), (i, slope_i) = found[1], found.get(2, (None, None)), found.get(3, (None, None))
        slope_f = multiply(f, g)
        if i is not None:
            multiply(i, slope_i, slope_i)
        left, moved = f, g
        if isinstance(self.zoneout, np.ndarray):
            zoned = self.zoneout[t0:t1] != 0
            np.copyto(left, 1, where=zoned)
            for a in (moved, slope_f, i, slope_i):
                if a is not None:
                    np.copyto(a, 0, where=zoned)
        elif self.zoneout is not None:
            p, taken = (np.array(value, self.dtype) for value in (self.zoneout, 1 - self.zoneout))
            for a in (left, moved, slope_f, i, slope_i):
                if a is not None:
                    multiply(a, taken, a)
            add(left, p, left)
        small = None if not left.size or left.item(left.argmin()) >= SMALL_F else left < SMALL_F  # the least may be NaN
        z = activate("tanh", u0)
        i = moved if i is None else i
        return Factor(moved, False, small, left), multiply(i, z), _Pooled(u0, z, i, o, q, slope_f, slope_i)

    def output(self, of_steps: _Pooled, c: Array, h: Array, marks: Marks | None) -> None:
        if of_steps.o is None:
            super().output(of_steps, c, h, marks)
        else:
            put(multiply, of_steps.o, c, h, marks)


class _Linear(_Tile):
    def __init__(self, a: Array, b: Array, c0: MaybeArray, masks: tuple[MaybeArray, MaybeArray], form: str) -> None:
        super().__init__(b, c0, masks)
        self.a, self.b, self.form = a, b, form  # a: (L, b, d), (b, d) or (1, d)
        self.fixed = None if a.ndim == 3 else np.ascontiguousarray(np.broadcast_to(widen(a, self.dtype), self.shape))

    def coefficients(self, t0: int, t1: int) -> Array:
        if self.fixed is None:
            return np.ascontiguousarray(widened(self.a[t0:t1], self.dtype))
        return np.broadcast_to(self.fixed, (t1 - t0, *self.shape))

    def factor(self, t0: int, t1: int) -> Factor:
        return Factor(self.coefficients(t0, t1), self.form == "affine")

    def affine(self, t0: int, t1: int) -> tuple[Factor, Array]:
        factor, b = self.factor(t0, t1), widened(self.b[t0:t1], self.dtype)
        return factor, factor.value * b if self.form == "blend" else b


# -------------------------------------------------------------------------------------------------------- the two passes


def _forward(tile: _Tile, every: int | None, backward: bool, h: MaybeArray, c: MaybeArray, c_last: MaybeArray) -> None:
    length, block = tile.length, tile.block
    states = np.empty((block + 1, *tile.shape), tile.dtype)
    saved = () if c is None or every is None else saved_after(length, every, backward)
    now = states[:1]
    load(tile.c0, now)
    for t0 in range(0, length, block):
        t1 = min(t0 + block, length)
        states[0] = now[-1]
        now, marks = states[: t1 - t0 + 1], tile.marks(t0, t1)
        factor, summand, rest = tile.known(t0, t1)
        run_states(now, factor, summand, marks)
        if h is not None:
            tile.output(rest, now[1:], h[t0:t1], marks)
        if c is not None:
            of_block = range(bisect_right(saved, t0), bisect_right(saved, t1))
            if len(of_block) == t1 - t0:  # all
                c[of_block.start : of_block.stop] = now[1:]
            else:
                for i in of_block:
                    c[i] = now[saved[i] - t0]
    if c_last is not None:
        narrow(now[-1], c_last)


class _States:
    """The states of a tile for the backward: run again from the last one saved."""

    def __init__(self, tile: _Tile, c: Array, every: int, backward: bool) -> None:
        self.tile, self.c, self.low = tile, c, tile.length
        self.complete = len(c) == tile.length
        self.saved = () if self.complete else saved_after(tile.length, every, backward)
        self.states = np.empty((tile.block + (0 if self.complete else every) + 1, *tile.shape), tile.dtype)

    def read(self, t0: int, t1: int, marks: Marks | None) -> tuple[Array, Array]:
        """Before and after the steps [t0, t1), which come from the last block to the first."""
        tile, states = self.tile, self.states
        if self.complete:
            c_next, c_prev = self.c[t0:t1], self.c[t0 - 1 : t1 - 1]
            if t0 == 0:
                c_prev = states[: t1 - t0]
                load(tile.c0, c_prev[:1])
                c_prev[1:] = c_next[:-1]
            if marks is not None and marks.starts is not None:
                c_prev = np.where(marks.starts, ZERO[c_prev.dtype], c_prev)
            return c_prev, c_next
        if t0 < self.low:
            i = bisect_right(self.saved, t0) - 1
            self.low = low = self.saved[i] if i >= 0 else 0
            if i < 0:
                load(tile.c0, states[0])
            else:
                states[0] = self.c[i]
            for t in range(low, t1, tile.block):
                end = min(t + tile.block, t1)
                factor, summand = tile.affine(t, end)
                run_states(states[t - low : end - low + 1], factor, summand, tile.marks(t, end))
        now = states[t0 - self.low : t1 - self.low + 1]
        return before(now, marks), now[1:]


def _blocks(tile: _Tile) -> Iterator[tuple[int, int, Marks | None]]:
    for t0 in reversed(range(0, tile.length, tile.block)):
        t1 = min(t0 + tile.block, tile.length)
        yield t0, t1, tile.marks(t0, t1)


def _first_carry(tile: _Tile, grad_c_last: MaybeArray) -> Array:
    carry = np.zeros(tile.shape, tile.dtype)
    if grad_c_last is not None:
        load(grad_c_last, carry)
    return carry


def qrnn_forward(
    u: Array,
    c0: MaybeArray,
    mask_pad: MaybeArray,
    starts: MaybeArray,
    zoneout: Array | float | None,
    *,
    pooling: str,
    gate: str,
    bidirectional: bool,
    save_every: int | None,
    reverse: bool,
    h: MaybeArray,
    c: MaybeArray,
    c_last: MaybeArray,
) -> None:
    """Writes h, c and c_last in place; operands may have any strides. All checks are the caller's."""
    of_steps, number = (zoneout, None) if isinstance(zoneout, np.ndarray) else (None, zoneout)
    operands = (u, of_steps, h, c), (c0, c_last), (), (mask_pad, starts)
    errstate = ERRSTATE.set(QUIET)
    try:
        for (backward, _), (u, zone, h, c), (c0, c_last), _rows, masks in tiles((bidirectional, reverse), *operands):
            tile = _Pooling(u, number if zone is None else zone, c0, masks, pooling, gate)
            _forward(tile, save_every, backward, h, c, c_last)
    finally:
        ERRSTATE.reset(errstate)


def qrnn_backward(
    grad_h: Array,
    grad_c_last: MaybeArray,
    c: Array,
    u: Array,
    c0: MaybeArray,
    mask_pad: MaybeArray,
    starts: MaybeArray,
    zoneout: Array | float | None,
    *,
    pooling: str,
    gate: str,
    bidirectional: bool,
    save_every: int,
    reverse: bool,
    grad_u: MaybeArray,
    grad_c0: MaybeArray,
) -> None:
    """Writes the gradients in place; those that are None are not wanted. All checks are the caller's."""
    of_steps, number = (zoneout, None) if isinstance(zoneout, np.ndarray) else (None, zoneout)
    operands = (u, of_steps, grad_h, c, grad_u), (c0, grad_c_last, grad_c0), (), (mask_pad, starts)
    errstate = ERRSTATE.set(QUIET)
    try:
        for (backward, _), (u, zone, grad_h, c, grad_u), (c0, grad_c_last, grad_c0), _rows, masks in tiles(
            (bidirectional, reverse), *operands
        ):
            tile = _Pooling(u, number if zone is None else zone, c0, masks, pooling, gate)
            history, carry = _States(tile, c, save_every, backward), _first_carry(tile, grad_c_last)
            for t0, t1, marks in _blocks(tile):
                c_prev, c_next = history.read(t0, t1, marks)
                factor, _, p = tile.known(t0, t1)
                gc, gu2 = widen(grad_h[t0:t1], tile.dtype), None
                if p.o is not None:
                    multiply(gc, p.o, gc)
                    gu2 = multiply(gc, p.slope_o, p.slope_o)  # a saturated gate's 0 first: gh * c may overflow
                    multiply(gu2, c_next, gu2)
                carry = run_carry(carry, gc, factor, marks)
                if grad_u is None:
                    continue
                gu = grad_u[t0:t1].transpose(3, 0, 1, 2)
                through_f = c_prev if pooling == "ifo" else subtract(c_prev, p.z)
                through_f = multiply(through_f, p.slope_f, p.slope_f)
                if tile.update:
                    negative(through_f, through_f)
                through = [(p.i, slope("tanh", p.u0)), (through_f, None), None, (p.z, p.slope_i)]
                for plane, of_gc in zip(gu, through, strict=False):
                    if of_gc is None:
                        store(gu2, plane, marks)  # type: ignore[arg-type]
                        continue
                    value, times = of_gc
                    room = value if times is None else multiply(value, times, times)
                    put(multiply, gc, room, plane, marks)
            if grad_c0 is not None:
                narrow(carry, grad_c0)
    finally:
        ERRSTATE.reset(errstate)


def _by_axes(a: MaybeArray) -> tuple[MaybeArray, MaybeArray, MaybeArray]:
    """(L, B, D), (B, D) or (D,), the others None."""
    if a is None:
        return None, None, None
    return (a, None, None) if a.ndim == 3 else (None, a, None) if a.ndim == 2 else (None, None, a[None])


def linear_recurrence_forward(
    a: Array,
    b: Array,
    c0: MaybeArray,
    mask_pad: MaybeArray,
    starts: MaybeArray,
    *,
    form: str,
    bidirectional: bool,
    save_every: int | None,
    reverse: bool,
    h: MaybeArray,
    c: MaybeArray,
    c_last: MaybeArray,
) -> None:
    """Writes h, c and c_last in place; operands may have any strides. All checks are the caller's."""
    a_step, a_batch, a_column = _by_axes(a)
    operands = (b, a_step, h, c), (a_batch, c0, c_last), (a_column,), (mask_pad, starts)
    errstate = ERRSTATE.set(QUIET)
    try:
        for (backward, _), (b, a_step, h, c), (a_batch, c0, c_last), (a_column,), masks in tiles(
            (bidirectional, reverse), *operands
        ):
            a = next(one for one in (a_step, a_batch, a_column) if one is not None)
            _forward(_Linear(a, b, c0, masks, form), save_every, backward, h, c, c_last)
    finally:
        ERRSTATE.reset(errstate)


def linear_recurrence_backward(
    grad_h: Array,
    grad_c_last: MaybeArray,
    c: Array,
    a: Array,
    b: Array,
    c0: MaybeArray,
    mask_pad: MaybeArray,
    starts: MaybeArray,
    *,
    form: str,
    bidirectional: bool,
    save_every: int,
    reverse: bool,
    grad_a: MaybeArray,
    grad_b: MaybeArray,
    grad_c0: MaybeArray,
) -> None:
    """Writes the gradients in place; those that are None are not wanted. All checks are the caller's."""
    if not b.size and grad_a is not None:  # no block adds to it
        grad_a[...] = 0  # +0 has the same bits in every dtype, bfloat16 included
    operands = (
        (b, a if a.ndim == 3 else None, grad_h, c, grad_b, _by_axes(grad_a)[0]),
        (_by_axes(a)[1], c0, grad_c_last, grad_c0, _by_axes(grad_a)[1]),
        (_by_axes(a)[2], _by_axes(grad_a)[2]),
        (mask_pad, starts),
    )
    total: Total | None = None
    errstate = ERRSTATE.set(QUIET)
    try:
        for (backward, first), of_steps, of_states, of_columns, masks in tiles((bidirectional, reverse), *operands):
            b, a_step, grad_h, c, grad_b, ga_step = of_steps
            a_batch, c0, grad_c_last, grad_c0, ga_batch = of_states
            a_column, ga_column = of_columns
            a = next(one for one in (a_step, a_batch, a_column) if one is not None)
            tile = _Linear(a, b, c0, masks, form)
            history, carry = _States(tile, c, save_every, backward), _first_carry(tile, grad_c_last)
            if first or ga_batch is not None:
                total = None
            for t0, t1, marks in _blocks(tile):
                c_prev, _ = history.read(t0, t1, marks)
                factor = tile.factor(t0, t1)
                gc = widen(grad_h[t0:t1], tile.dtype)
                carry = run_carry(carry, gc, factor, marks)
                if grad_b is not None:
                    store(gc * factor.value if form == "blend" else gc.copy(), grad_b[t0:t1], marks)
                if ga_step is None and ga_batch is None and ga_column is None:
                    continue
                if form == "blend":
                    terms = gc * (widened(b[t0:t1], tile.dtype) - c_prev)
                else:
                    terms = gc * (c_prev if form == "affine" else negative(c_prev))
                if marks is not None and marks.pads is not None:
                    np.copyto(terms, 0, where=marks.pads)
                if ga_step is not None:
                    narrow(terms, ga_step[t0:t1])
                else:  # over time, or over the batch too
                    total = with_block(total, terms.reshape(1, t1 - t0, 1, -1) if ga_batch is not None else terms[None])
            if grad_c0 is not None:
                narrow(carry, grad_c0)
            if total is not None:  # once more after each tile of the same columns
                if ga_batch is not None:
                    narrow(sum_of(total).reshape(tile.shape), ga_batch)
                elif ga_column is not None:
                    narrow(sum_of(total), ga_column)
    finally:
        ERRSTATE.reset(errstate)
