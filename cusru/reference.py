"""The recurrence in NumPy: the backend of CPU arrays.

SRU: Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence", EMNLP 2018, https://arxiv.org/abs/1709.02755
QRNN: Bradbury et al., "Quasi-Recurrent Neural Networks", 2016, https://arxiv.org/abs/1611.01576

One column (b, d) at one step; m is the dropout mask, s the skip (scale_x * x, or u3 with k = 4):

    f = sigmoid(u1 + b_f + v_f * c_prev)      r = sigmoid(u2 + b_r + v_r * c_prev)      z = candidate(u0)
    c = f * c_prev + (1 - f) * z              h = r*m * activation(c) + w * s
                                              w = 1 - r (mask_target "state") or 1 - m*r ("gate")

and its derivative, the steps in reverse, the carry starting as grad_c_last:

    gr  = gh * (m*a - s), or gh * m * (a - s) for "gate"                    gs  = gh * w
    gc  = gh * r*m * activation'(c) + carry                                 gu2 = gr * r * (1 - r)
    gu1 = gc * A, A = (c_prev - z) * f * (1 - f)                            gu0 = gc * (1 - f) * candidate'(u0)
    carry = gc * (f + A * v_f) + gu2 * v_r

At a padded step the state and the carry pass unchanged, h and all gradients are 0, and the data there is never used. Where a
column begins anew the state before the step is 0, for all that looks at it, and so is the carry behind it.

Long memory (f near 1) is lost if f is rounded before it multiplies: the error does not average out, it compounds. So with
g = 1 - f, computed by itself, c = c - (c - z)*g and carry = gc + gc*(A*v_f - g); only where f is small, f*c and gc*f are
formed directly. (c - z must not overflow: |c| and |z| up to half the largest number, in the kernels too.)

Columns are cut into tiles and time into blocks that stay in cache; all that is not recurrent is computed for a whole block, in
contiguous arrays of the state's dtype that the next block uses again, and a short loop does the rest. The cuts depend on shape
and dtype only, so neither memory layout nor save_every can change a bit of a result. bfloat16, which NumPy lacks, arrives as
its bits in uint16.

Where a step has few columns, slices of time run side by side, from guesses that are put right until the bits are those of one
step after another: so this depends on the gates, and no bit of a result does.

A small problem (one step of 512 columns) costs what its calls cost, 0.3 us each, 0.5 more where an operand is strided or has to
be broadcast: so it is cut nowhere, u is taken apart once, and both gates are computed as one where the state before each step is
known: of one step, or of all in a backward that has them. Its bits are those that it would have as a part of a large one.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import islice, repeat
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MaybeArray = Array | None

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
SMALL_F = float(1 / (1 + np.exp(4.0)))  # forget gates below this form f * c directly
TILE_COLUMNS = 8192  # a step's ufunc calls then cost little next to their work, and its rows stay in L2
BLOCK_BYTES = 512 * 1024  # of one contiguous array; a backward has seven, and five of save_every steps more
SMALL_BYTES = 16 * 1024  # of one array of all steps: as fast to allocate as to borrow
KEPT_BYTES = 16 << 20  # of scratch memory, at most, that a call leaves to later ones: a backward's with save_every = 32
ALL_KEPT_BYTES = 64 << 20  # that all calls have left, of all threads
RARELY_SMALL = 1024  # columns, at most, of which most steps have no small forget gate
CALL = 3000  # elements on which a ufunc spends as much time as its call and a step's views cost
SHORT = 128  # steps, of which fewer are not cut into slices of time
CHUNK = 8  # steps, after which slices of time are looked at
RUNNING_SUM = 8  # so many terms, and no more, are added one after another

BFLOAT16, FLOAT32, FLOAT64 = np.dtype(np.uint16), np.dtype(np.float32), np.dtype(np.float64)
# As arrays, which a ufunc need not convert.
ZERO, ONE = ({dtype: np.full((), value, dtype) for dtype in (FLOAT32, FLOAT64)} for value in (0, 1))
SMALL_E = {dtype: np.full((), SMALL_F / (1 - SMALL_F), dtype) for dtype in (FLOAT32, FLOAT64)}
# -log of what differences of states are multiplied by in the steps after which they are likely to have the same bits.
MERGED = {FLOAT32: 35.0, FLOAT64: 55.0}
add, divide, exp, less, multiply, negative, subtract = np.add, np.divide, np.exp, np.less, np.multiply, np.negative, np.subtract


class _Errstate:
    """As a variable of the context is set and reset, for a NumPy that keeps its errstate otherwise."""

    def set(self, _: Any) -> Any:
        return np.seterr(all="ignore")

    def reset(self, before: Any) -> None:
        np.seterr(**before)


_quiet = contextvars.Context()
_quiet.run(np.seterr, all="ignore")
# NumPy's errstate, a variable of the context, and its value: to set it takes a tenth of np.errstate's time.
ERRSTATE: Any
ERRSTATE, QUIET = next(iter(_quiet.items())) if len(_quiet) == 1 else (_Errstate(), None)


# --------------------------------------------------------------------------------------------------------- the equations


def exponentials(e: Array, v: MaybeArray, c_prev: Array, below: Array) -> None:
    """e: the arguments of some gates, less v * c_prev; becomes the exponentials of the whole, and below 1 + e."""
    if v is not None:
        for j in range(len(v)):  # one by one, most often none has to be broadcast
            multiply(v[j], c_prev, below[j])
        add(e, below, e)
    exp(e, e)
    add(e, ONE[e.dtype], below)


def gates(e: Array, below: Array) -> None:
    """Of e = exp(a) and below = 1 + e: e becomes sigmoid(a) and below 1 - sigmoid(a), each to full relative accuracy."""
    divide(ONE[e.dtype], below, below)
    multiply(e, below, e)
    if not below.item(below.argmin()) > 0:  # or it is NaN: where exp overflowed, e is inf * 0
        np.copyto(e, 1, where=below == 0)


def activate(name: str, c: Array) -> Array:
    if name == "tanh":
        a = c.copy(order="C")  # strided, NumPy may run another loop, which rounds otherwise
        return np.tanh(a, out=a)
    if name == "relu":
        return np.maximum(c, 0)  # keeps NaN
    if name == "selu":
        a = np.expm1(np.minimum(c, 0))
        a *= SELU_ALPHA
        a += np.maximum(c, 0)
        a *= SELU_SCALE
        return a
    return c


def slope(name: str, c: Array) -> MaybeArray:
    """The derivative of activate, None for the identity's 1. tanh' = 4e / (1 + e)^2 with e = exp(-2|c|): 1 - tanh^2 is nothing
    but rounding in saturation."""
    if name == "tanh":
        e = np.abs(c)
        e *= -2
        np.exp(e, out=e)
        d = e + 1
        e /= d
        e /= d
        e *= 4
        return e
    if name == "relu":
        return np.sign(np.maximum(c, 0))  # 0 at 0, NaN at NaN
    if name == "selu":
        a = np.exp(np.minimum(c, 0))
        a *= SELU_SCALE * SELU_ALPHA
        np.copyto(a, SELU_SCALE, where=c > 0)
        return a
    return None


def run_states(states: Array, z: Array, e: Array, below: Array, move: Array, v: MaybeArray, marks: Marks | None) -> None:
    """states[0] is known; fills the others. e and below are the exponential of the forget gate's argument and 1 + e, where v is
    None; else e comes as the argument less v * c and becomes the exponential, and below is room. move: becomes
    (c_prev - z) * (1 - f), or is room if it has one row."""
    length, t, size = len(z), 0, 4
    if v is None:
        small = small_gates(e)
        if length >= SHORT and (count := slices(e, lambda some: divide(e[some], below[some]))):
            t = run_states_in_slices(Slices(count, length), states, z, e, below, small, marks)
            if len(move) > 1:
                divide(subtract(before(states, marks)[:t], z[:t], move[:t]), below[:t], move[:t])
                move = move[t:]
            if t == length:
                return
            states, z, e, below, small = states[t:], z[t:], e[t:], below[t:], small if small is None else small[t:]
            marks = marks and marks.since(t)
        steps = _steps(states, z, few_gates(small, e), below, move, None, None, marks)
    else:
        room, below = below, below[:1]
        if length >= 8 * size and z[0].size <= RARELY_SMALL:
            # A look for small gates takes a seventh of a step's time: so steps are run without, ever more at once, until one
            # turns out to have had some; from there on they are run again, with a look at each.
            steps = _steps(states, z, e, below, move, v, None, marks)
            while size < length - t:
                part, kept = e[t : t + size], room[1 : size + 1]
                kept[...] = part
                run_steps(states[t], islice(steps, size))
                if (small := small_gates(part)) is not None and (hit := small.any((1, 2))).any():
                    first = int(hit.argmax())
                    part[first:] = kept[first:]
                    t += first
                    break
                t, size = t + size, min(2 * size, 16)
            states, z, e = states[t:], z[t:], e[t:]
            move, v = (a[t:] if len(a) > 1 else a for a in (move, v))
            marks = marks and marks.since(t)
        steps = _steps(states, z, e, below, move, v, np.empty((1, *z.shape[1:]), bool), marks)
    run_steps(states[0], steps)


def _steps(
    states: Array, z: Array, e: Iterable[Any], below: Array, move: Array, v: MaybeArray, small: MaybeArray, marks: Marks | None
) -> Any:
    """For run_steps; of an array that has one row, it is for all."""
    rows = [repeat(None) if a is None else a if len(a) > 1 else repeat(a[0]) for a in (below, move, v, small)]
    return zip(states[1:], z, e, *rows, repeat(None) if marks is None else marks.rows, strict=False)


def before(states: Array, marks: Marks | None) -> Array:
    """The states that steps look at, of those before the first and after each: where a column begins anew it is 0."""
    c_prev = states[:-1]
    if marks is not None and marks.starts is not None:
        c_prev = np.where(marks.starts, ZERO[states.dtype], c_prev)
    return c_prev


def slices(a: Array, factors: Callable[[Any], Array]) -> int:
    """Into how many slices of time it is best to cut the steps of a, 0: into none. factors: by what some steps multiply a
    difference of states, from which follows in about how many it falls below rounding. No bit of a result depends on it."""
    length, size = len(a), a.size
    if size > RARELY_SMALL * length:
        return 0
    some = factors(np.s_[:: length // 16])
    lost = -np.fmax.reduce(add.reduce(np.log(np.abs(some)), 0), None) / len(some)
    apart = MERGED[a.dtype] / lost if lost > 0 else math.inf  # or it is NaN
    if apart > length:
        return 0
    steps = CHUNK * max(1, round(math.sqrt(apart * size / CALL) / CHUNK))
    return length // steps if (steps + apart) * (CALL + size / steps) + 2 * size < 0.9 * (CALL * length + size) else 0


class Slices:
    """Slices of time, of all steps but a rest, which run at once: of few columns a ufunc's call costs more than its work.

    Where a slice begins is known when the one before it ends. So each begins at 0, and then again where the one before it has
    ended, until all states have the bits that they had a round ago, as then all later ones would have them too. Forget gates
    bring two states together and rounding makes them one, which takes few steps; and as each round begins one more slice where
    it truly does, there are at most as many rounds as slices. The bits are those of one step after another.
    """

    def __init__(self, count: int, total: int, reverse: bool = False) -> None:
        self.count, self.length = count, total // count  # of slices, and of the steps of each
        self.whole = count * self.length
        order = np.arange(self.whole).reshape(count, self.length).T.ravel()
        back = np.arange(self.whole).reshape(self.length, count).T.ravel()
        self.order, self.back = (total - 1 - order, back[::-1]) if reverse else (order, back)

    def cut(self, a: Array) -> Array:
        """(total, b, d) as (length, count * b, d)."""
        return a.take(self.order, 0, None, "clip").reshape(self.length, -1, *a.shape[2:])

    def join(self, a: Array, out: Array) -> None:
        a.reshape(self.whole, *out.shape[1:]).take(self.back, 0, out, "clip")

    def run(self, start: Array, walk: Callable[[Array, slice], Array]) -> Array:
        """walk: from some states through some steps, to states that it returns. Returns those after all steps."""
        starts, ends = np.zeros((self.count * len(start), start.shape[1]), start.dtype), dict[int, bytes]()
        starts[: len(start)] = start
        for _ in range(self.count):
            now, same = starts, False
            for t in range(0, self.length, CHUNK):
                now = walk(now, slice(t, t + CHUNK))
                content = now.tobytes()
                if same := ends.get(t) == content:
                    break
                ends[t] = content
            if same:
                break
            starts[len(start) :] = now[: -len(start)]
        return np.frombuffer(ends[(self.length - 1) // CHUNK * CHUNK], start.dtype).reshape(starts.shape)[-len(start) :]


def run_states_in_slices(
    cuts: Slices, states: Array, z: Array, e: Array, below: Array, small: MaybeArray, marks: Marks | None
) -> int:
    """run_states without v of the first steps; returns of how many."""
    new = np.empty((cuts.length + 1, cuts.count * z.shape[1], z.shape[2]), z.dtype)
    few = repeat(None) if small is None else few_gates(cuts.cut(small), cuts.cut(e))
    steps = list(_steps(new, cuts.cut(z), few, cuts.cut(below), np.empty_like(new[:1]), None, None, marks and marks.cut(cuts)))
    cuts.run(states[0], lambda c, some: run_steps(c, steps[some]))
    cuts.join(new[1:], states[1 : cuts.whole + 1])
    return cuts.whole


def small_gates(e: Array) -> MaybeArray:
    """Where f = e / (1 + e) is small, None where it is nowhere."""
    bound = SMALL_E[e.dtype]
    return None if e.item(e.argmin()) >= bound.item() else less(e, bound)  # the least may be NaN


def few_gates(small: MaybeArray, values: Array) -> Iterable[tuple[Array, Array] | None]:
    """Of each step which gates are small, and its values, None where there are none."""
    if small is None:
        return repeat(None)
    return [None if row is None else (row, of_step) for row, of_step in zip(with_any(small), values, strict=True)]


def with_any(rows: Array) -> list[MaybeArray]:
    """Rows, None for those without a True."""
    found: list[MaybeArray] = [None] * len(rows)
    if rows.size:
        content, width = rows.tobytes(), rows[0].size
        at = content.find(1)  # much faster than any(), of many short rows and of few long ones
        while at >= 0:
            t = at // width
            found[t] = rows[t]
            at = content.find(1, (t + 1) * width)
    return found


def run_steps(c: Array, steps: Iterable[Any]) -> Array:
    """c = c - (c - z) / (1 + e), or (e*c + z) / (1 + e) where f = e / (1 + e) is small. With v, et is the argument less v*c and
    becomes e; without, it is what few_gates gives."""
    one, bound = ONE[c.dtype], SMALL_E[c.dtype]
    for new, zt, et, bt, mt, vt, st, mark in steps:
        stop = None
        if mark is not None:
            stop, start = mark
            if start is not None:
                c = np.where(start, ZERO[c.dtype], c)
        few = et
        if vt is not None:
            multiply(vt, c, mt)
            add(et, mt, et)
            exp(et, et)
            add(et, one, bt)
            few = None
            if st is not None:
                less(et, bound, st)
                if 1 in st.tobytes():  # st.any() takes ten times as long
                    few = st, et
        subtract(c, zt, mt)
        divide(mt, bt, mt)
        subtract(c, mt, new)
        if few is not None:
            (places,) = few[0].ravel().nonzero()  # flat: much faster than by rows and columns
            to, ef, cf, zf, bf = new.ravel(), few[1].ravel(), c.ravel(), zt.ravel(), bt.ravel()
            for i in places if len(places) < 3 else [places]:  # an array of indices costs as much as three numbers
                to[i] = (ef[i] * cf[i] + zf[i]) / bf[i]
        if stop is not None:
            np.copyto(new, c, where=stop)
        c = new
    return c


def run_carry(
    carry: Array, gc: Array, f: Array, g: Array, p: Array, q: MaybeArray, small: MaybeArray, marks: Marks | None
) -> Array:
    """From the last step to the first: gc comes as gh * r*m * activation'(c), and the carry is added to it; then
    carry = gc - g*gc or, where f is small, f*gc, and g becomes g*gc. With q, carry = gc + (p*gc + q), p = A*v_f - g, or
    (A*v_f + f)*gc + q where f is small; p is lost. Returns the carry."""
    factor, total = g if q is None else p, len(gc)
    if total >= SHORT and (count := slices(gc, lambda some: f[some] if q is None else 1 + p[some])):
        cuts = Slices(count, total, reverse=True)
        rows, parts = np.empty((2, cuts.length, count * gc.shape[1], gc.shape[2]), gc.dtype)
        qs = repeat(None) if q is None else cuts.cut(q)
        few = repeat(None) if small is None else few_gates(cuts.cut(small), cuts.cut(f))
        of_steps = repeat(None) if marks is None else marks.cut(cuts).rows
        steps = list(zip(cuts.cut(gc), rows, cuts.cut(factor), parts, qs, few, of_steps, strict=False))
        carry = cuts.run(carry, lambda c, some: carry_steps(c, steps[some]))
        total -= cuts.whole
        cuts.join(rows, gc[total:])
        cuts.join(parts, factor[total:])
    rest = slice(total - 1, None, -1) if total else slice(0)
    qs = repeat(None) if q is None else q[rest]
    few = repeat(None) if small is None else few_gates(small[rest], f[rest])
    of_steps = repeat(None) if marks is None else marks.rows[rest]
    return carry_steps(carry, zip(repeat(None), gc[rest], factor[rest], repeat(None), qs, few, of_steps, strict=False))


def carry_steps(c: Array, steps: Iterable[Any]) -> Array:
    """Of run_carry: with None for gh and for part, what is computed of them replaces row and factor."""
    room = np.empty_like(c)
    for gh, row, factor, part, q, few, mark in steps:
        gh, part = (row, factor) if gh is None else (gh, part)
        new = room if mark is None else np.empty_like(c)
        add(gh, c, row)
        multiply(factor, row, part)
        if q is None:
            subtract(row, part, new)
        else:
            add(part, q, part)
            add(row, part, new)
        if few is not None:
            small, f = few
            np.copyto(new, f * row if q is None else part, where=small)
        if mark is not None:
            stop, start = mark
            if stop is not None:
                np.copyto(new, c, where=stop)
            if start is not None:
                np.copyto(new, 0, where=start)
        c = new
    return c


def skip_factor(r: Array, q: Array, m: MaybeArray, gate_mask: bool, out: Array) -> Array:
    """w = 1 - r, or 1 - m*r as (1 - r) + (1 - m)*r, which does not cancel at m = 1."""
    if m is None or not gate_mask:
        return q
    multiply(r, 1 - m, out)
    return add(q, out, out)


def write_h(
    r: Array, q: Array, a: Array, s: MaybeArray, m: MaybeArray, gate_mask: bool, spare: Array, h: Array, marks: Marks | None
) -> None:
    """h = r*m * a + w * s, of r and q = 1 - r, which are lost."""
    if s is not None:
        multiply(skip_factor(r, q, m, gate_mask, spare), s, q)
    if m is not None:
        multiply(r, m, r)
    multiply(r, a, r)
    if s is None:
        store(r, h, marks)
    else:
        put(add, r, q, h, marks)


def reset_difference(a: Array, s: MaybeArray, m: MaybeArray, gate_mask: bool, out: Array) -> Array:
    """gr / gh: m*a - s, or m * (a - s) where the mask is on the gate."""
    if m is not None and not gate_mask:
        a = multiply(a, m, out)
    if s is not None:
        a = subtract(a, s, out)
    if m is not None and gate_mask:
        a = multiply(a, m, out)
    return a


# -------------------------------------------------------------------------------------------------------- the two passes


def forward(
    u: Array,
    x: MaybeArray,
    bias: MaybeArray,
    weight_c: MaybeArray,
    c0: MaybeArray,
    mask_c: MaybeArray,
    mask_pad: MaybeArray,
    starts: MaybeArray = None,
    *,
    activation: str,
    candidate: str,
    scale_x: float,
    mask_target: str,
    bidirectional: bool,
    save_every: int | None,
    reverse: bool = False,
    h: MaybeArray,
    c: MaybeArray,
    c_last: MaybeArray,
) -> None:
    """Writes h, c and c_last in place; operands may have any strides. All checks are the caller's."""
    scratch = _Scratch()
    errstate = ERRSTATE.set(QUIET)
    try:
        plain = mask_pad is None and starts is None and not (bidirectional or reverse)
        if len(u) == 1 and plain and h is not None and 0 < u.nbytes <= 3 * SMALL_BYTES:
            one_step(u, x, bias, weight_c, c0, mask_c, activation, candidate, scale_x, mask_target == "gate", h, c, c_last)
            return
        operands = (u, x, h, c), (c0, mask_c, c_last), (bias, weight_c), (mask_pad, starts)
        for (backward, _), (u, x, h, c), (c0, mask_c, c_last), (bias, weight_c), masks in tiles(
            (bidirectional, reverse), *operands
        ):
            tile = _Tile(u, x, bias, weight_c, c0, mask_c, masks, candidate, scale_x, mask_target)
            length, block, shape = tile.length, tile.block, tile.shape
            states, move, room = scratch.arrays(tile, (block + 1, *shape), (1, *shape), (5, block, *shape))
            all_saved = c is not None and len(c) == length
            saved = () if c is None or all_saved or save_every is None else saved_after(length, save_every, backward)
            now = states[:1]
            load(tile.c0, now)
            for t0 in range(0, length, block):
                t1 = min(t0 + block, length)
                steps = t1 - t0
                if t0:
                    states[0] = now[-1]
                now, rows = states[: steps + 1], room[:, :steps]
                e, below = rows[1:3], rows[3:]
                u0, f, r, g, q = rows[0], rows[1], rows[2], rows[3], rows[4]  # faster than to unpack it
                marks, v = tile.marks(t0, t1), tile.weights(t0, t1)
                load(tile.planes[:3, t0:t1], rows[:3])
                if tile.bias is not None:
                    add(e, tile.bias, e)
                if marks is not None and marks.starts is not None:  # nobody else looks at the state before the block
                    np.copyto(now[0], 0, where=marks.starts[0])
                late = None if steps == 1 else v  # where the states that the gates look at are not all known
                if late is None:
                    exponentials(e, v, now[:1], below)
                new = now[1:]
                run_states(now, activate(candidate, u0), f, g, move, None if late is None else late[0], marks)
                if h is not None:
                    if late is not None:
                        exponentials(e[1:], late[1:], before(now, marks), below[1:])
                    gates(r, q)
                    s = tile.skip(t0, t1, out=g)
                    write_h(r, q, activate(activation, new), s, tile.mask, tile.gate_mask, f, h[t0:t1], marks)
                if all_saved:
                    c[t0:t1] = new
                for i in range(bisect_right(saved, t0), bisect_right(saved, t1)) if saved else ():
                    c[i] = now[saved[i] - t0]
            if c_last is not None:
                narrow(now[-1], c_last)
    finally:
        ERRSTATE.reset(errstate)
        scratch.leave()


def one_step(
    u: Array, x: MaybeArray, bias: MaybeArray, weight_c: MaybeArray, c0: MaybeArray, mask: MaybeArray, activation: str,
    candidate: str, scale_x: float, gate_mask: bool, h: Array, c: MaybeArray, c_last: MaybeArray,
) -> None:  # fmt: skip
    """forward of one small step without padding, whose tiles, blocks and views would take a third of its time."""
    _, batch, dim, k = u.shape
    dtype = FLOAT64 if u.dtype == FLOAT64 else FLOAT32
    room = np.empty((7, 1, batch, dim), dtype)
    e, below = room[1:3], room[3:5]
    u0, f, r, g, q, move = room[0], room[1], room[2], room[3], room[4], room[5]
    # Where it is to go, if it can be there.
    new = room[6] if c_last is None or c_last.dtype != dtype or not c_last.flags.c_contiguous else c_last[None]
    load(u.transpose(3, 0, 1, 2)[:3], room[:3])
    if bias is not None:
        add(e, widened(bias, dtype)[:, None, None], e)
    c_prev = np.zeros((1, batch, dim), dtype) if c0 is None else widened(c0, dtype)[None]
    v = None
    if weight_c is not None:
        v = widened(weight_c, dtype)
        v = v[:, None, None] if v.ndim == 2 else v.transpose(3, 0, 1, 2)
    exponentials(e, v, c_prev, below)
    (few,) = islice(few_gates(small_gates(f), f), 1)
    run_steps(c_prev, [(new, u0 if candidate == "identity" else activate(candidate, u0), few, g, move, None, None, None)])
    gates(r, q)
    if (s := x if k == 3 else u[..., 3]) is not None:
        s = widened(s, dtype)
        if k == 3 and scale_x != 1:
            s = multiply(s, np.array(scale_x, dtype), g)
    if mask is not None:
        mask = widened(mask, dtype)
    write_h(r, q, new if activation == "identity" else activate(activation, new), s, mask, gate_mask, f, h, None)
    if c is not None:
        c[...] = new
    if c_last is not None and new.base is room:
        narrow(new[0], c_last)


def backward(
    grad_h: Array,
    grad_c_last: MaybeArray,
    c: Array,
    u: Array,
    x: MaybeArray,
    bias: MaybeArray,
    weight_c: MaybeArray,
    c0: MaybeArray,
    mask_c: MaybeArray,
    mask_pad: MaybeArray,
    starts: MaybeArray = None,
    *,
    activation: str,
    candidate: str,
    scale_x: float,
    mask_target: str,
    bidirectional: bool,
    save_every: int,
    reverse: bool = False,
    grad_u: MaybeArray,
    grad_x: MaybeArray,
    grad_bias: MaybeArray,
    grad_weight_c: MaybeArray,
    grad_c0: MaybeArray,
) -> None:
    """Writes the gradients in place; those that are None are not wanted, nor computed. All checks are the caller's."""
    per_step = weight_c is not None and weight_c.ndim == 4
    of_gates = not (grad_u is None and grad_bias is None and grad_weight_c is None)
    through_state = of_gates or grad_c0 is not None
    summed = slice(0 if grad_bias is not None else 2, 2 if grad_weight_c is None or per_step else 4)  # of the terms
    if not u.size:  # no block adds to them
        for gradient in (grad_bias, None if per_step else grad_weight_c):
            if gradient is not None:
                gradient[...] = 0  # +0 has the same bits in every dtype, bfloat16 included
    scratch, total = _Scratch(), None
    operands = (
        (u, x, grad_h, c, grad_u, grad_x),
        (c0, mask_c, grad_c_last, grad_c0),
        (bias, weight_c, grad_bias, grad_weight_c),
        (mask_pad, starts),
    )
    errstate = ERRSTATE.set(QUIET)
    try:
        for (backward, first), of_steps, of_states, of_columns, masks in tiles((bidirectional, reverse), *operands):
            u, x, grad_h, c, grad_u, grad_x = of_steps
            c0, mask_c, grad_c_last, grad_c0 = of_states
            bias, weight_c, grad_bias, grad_weight_c = of_columns
            tile = _Tile(u, x, bias, weight_c, c0, mask_c, masks, candidate, scale_x, mask_target)
            length, block, shape = tile.length, tile.block, tile.shape
            history = _History(tile, c, save_every, backward)
            span = history.span
            carry, room, *history.spans = scratch.arrays(
                tile, shape, (7, block, *shape), (span + 1, *shape), (3, span, *shape), (span, *shape)
            )
            gu = None if grad_u is None else grad_u.transpose(3, 0, 1, 2)
            if gu is not None and len(gu) == 4:
                grad_x = gu[3]
            if grad_c_last is None:
                carry.fill(0)
            else:
                load(grad_c_last, carry)
            if first:  # of its columns
                total = None
            for t0 in reversed(range(0, length, block)):
                t1 = min(t0 + block, length)
                steps, marks, v = t1 - t0, tile.marks(t0, t1), tile.weights(t0, t1)
                c_prev, c_next, planes, adjoint = history.read(t0, t1, marks)
                rows = room[:, :steps]
                u0, f, terms = planes[0], planes[1], rows[2:6]
                gu1, gu2, p, carried, spare = rows[2], rows[3], rows[4], rows[5], rows[6]
                if history.complete:
                    r, g, q, e, below = planes[2], rows[0], rows[1], planes[1:], rows[:2]
                    load(tile.planes[:3, t0:t1], planes)
                    if tile.bias is not None:
                        add(e, tile.bias, e)
                    exponentials(e, v, c_prev, below)
                    subtract(c_prev, activate(candidate, u0), adjoint)
                    divide(adjoint, g, adjoint)
                    gates(e, below)
                else:
                    g, r, q = planes[2], rows[0], rows[1]
                    load(tile.planes[2, t0:t1], r)
                    if tile.bias is not None:
                        add(r, tile.bias[1], r)
                    exponentials(rows[:1], None if v is None else v[1:], c_prev, rows[1:2])
                    if v is not None:
                        add(f, ONE[f.dtype], g)
                    gates(f, g)
                    gates(r, q)
                multiply(adjoint, f, adjoint)  # A
                # What does not depend on the carry: the reset gate's side, ...
                gh, s = widened(grad_h[t0:t1], tile.dtype), tile.skip(t0, t1, out=gu1)
                if grad_x is not None:
                    w = skip_factor(r, q, tile.mask, tile.gate_mask, out=spare)
                    put(multiply, gh, w if tile.scale is None else multiply(w, tile.scale, spare), grad_x[t0:t1], marks)
                if not through_state:
                    continue
                difference = reset_difference(activate(activation, c_next), s, tile.mask, tile.gate_mask, out=p)
                gc = multiply(gh, r, r)
                multiply(gc, q, gu2)  # a saturated gate's 0 first: gh * difference may overflow
                multiply(gu2, difference, gu2)
                if tile.mask is not None:
                    multiply(gc, tile.mask, gc)
                if (da := slope(activation, c_next)) is not None:
                    multiply(gc, da, gc)
                # ... and the forget gate's.
                small = None if f.item(f.argmin()) >= SMALL_F else f < SMALL_F  # the least may be NaN
                if v is not None:
                    multiply(adjoint, v[0], p)
                    if small is None:
                        subtract(p, g, p)
                    else:
                        places = small.ravel().nonzero()[0]
                        kept = p.take(places) + f.take(places)
                        subtract(p, g, p).put(places, kept)
                carry = run_carry(carry, gc, f, g, p, None if v is None else multiply(gu2, v[1], carried), small, marks)
                # What does: gradients of the block.
                if not of_gates:
                    continue
                multiply(adjoint, gc, gu1)
                if grad_weight_c is not None:
                    multiply(gu1, c_prev, p)
                    multiply(gu2, c_prev, carried)
                if marks is not None and marks.pads is not None:
                    np.copyto(terms, 0, where=marks.pads)
                if gu is not None:
                    if v is not None:
                        multiply(gc, g, g)
                    if (du0 := None if candidate == "identity" else slope(candidate, u0)) is not None:
                        multiply(g, du0, g)
                    store(g, gu[0, t0:t1], marks)
                    narrow(gu1, gu[1, t0:t1])
                    narrow(gu2, gu[2, t0:t1])
                if per_step and grad_weight_c is not None:
                    narrow(p, grad_weight_c[t0:t1, ..., 0])
                    narrow(carried, grad_weight_c[t0:t1, ..., 1])
                if summed.start < summed.stop:
                    total = with_block(total, terms[summed])
            if grad_c0 is not None:
                narrow(carry, grad_c0)
            if total is not None:  # once more after each tile of the same columns
                sums = sum_of(total)
                if grad_bias is not None:
                    narrow(sums[:2], grad_bias)
                if summed.stop == 4:
                    narrow(sums[-2:], grad_weight_c)
    finally:
        ERRSTATE.reset(errstate)
        scratch.leave()


# ------------------------------------------------------------------------------------------- tiles, blocks, saved states


class Marks(NamedTuple):
    """Of some steps: where there is padding and where columns begin anew, (steps, b, 1) each, None where that is nowhere."""

    pads: MaybeArray
    starts: MaybeArray
    rows: list[tuple[MaybeArray, MaybeArray] | None]  # of each step, None for those without any

    def since(self, t: int) -> Marks:
        pads, starts = [a if a is None else a[t:] for a in (self.pads, self.starts)]
        return Marks(pads, starts, self.rows[t:])

    def cut(self, cuts: Slices) -> Marks:
        return marked(*[a if a is None else cuts.cut(a) for a in (self.pads, self.starts)])


def marked(pads: MaybeArray, starts: MaybeArray) -> Marks:
    if starts is None:
        return Marks(pads, starts, [row if row is None else (row, None) for row in with_any(pads)] if pads is not None else [])
    of_pads = with_any(pads) if pads is not None else repeat(None)
    pairs = zip(of_pads, with_any(starts), strict=False)
    return Marks(pads, starts, [None if pad is start is None else (pad, start) for pad, start in pairs])


class _Tile:
    """What the passes read of some columns of one direction, time in the order in which it is processed."""

    def __init__(
        self, u: Array, x: MaybeArray, bias: MaybeArray, weight_c: MaybeArray, c0: MaybeArray, mask_c: MaybeArray,
        masks: tuple[MaybeArray, MaybeArray], candidate: str, scale_x: float, mask_target: str,
    ) -> None:  # fmt: skip
        self.length, batch, dim, k = u.shape
        self.shape = batch, dim
        self.dtype = dtype = state_dtype(u)
        step_bytes = dtype.itemsize * batch * dim
        self.small = self.length * step_bytes <= SMALL_BYTES
        self.block = max(1, min(self.length, BLOCK_BYTES // step_bytes))  # steps
        self.planes = u.transpose(3, 0, 1, 2)
        self.s = x if k == 3 else self.planes[3]
        self.scale = None if k == 4 or scale_x == 1 else np.array(scale_x, dtype)
        self.bias = None if bias is None else self.rows(bias)
        self.per_step = weight_c is not None and weight_c.ndim == 4
        self.v = None if weight_c is None else weight_c.transpose(3, 0, 1, 2) if self.per_step else self.rows(weight_c)
        self.mask = None if mask_c is None else widen(mask_c, dtype)
        self.c0 = ZERO[dtype] if c0 is None else c0
        self.masks, self.candidate, self.gate_mask = masks, candidate, mask_target == "gate"

    def rows(self, a: Array) -> Array:
        """(2, D) as (2, 1, b, D)."""
        a = a[:, None, None]
        if self.shape[0] == 1 and a.dtype == self.dtype:
            return a
        full = np.empty((2, 1, *self.shape), self.dtype)
        load(a, full)
        return full

    def weights(self, t0: int, t1: int) -> MaybeArray:
        """(2, 1, b, d), or (2, steps, b, d)."""
        return self.v if self.v is None or not self.per_step else widened(self.v[:, t0:t1], self.dtype)

    def skip(self, t0: int, t1: int, out: Array) -> MaybeArray:
        if self.s is None:
            return None
        s = widened(self.s[t0:t1], self.dtype)
        return s if self.scale is None else multiply(s, self.scale, out)

    def marks(self, t0: int, t1: int) -> Marks | None:
        return marks_of(self.masks, t0, t1)


def marks_of(masks: tuple[MaybeArray, MaybeArray], t0: int, t1: int) -> Marks | None:
    """Of mask_pad and starts, (L, b)."""
    if masks[0] is masks[1] is None:
        return None
    of_steps = [a if a is None else a[t0:t1, :, None] != 0 for a in masks]
    pads, starts = [a if a is not None and a.any() else None for a in of_steps]
    return None if pads is starts is None else marked(pads, starts)


Operands = tuple[Any, ...]  # arrays or None


def tiles(
    directions: tuple[bool, bool], steps: Operands, states: Operands, rows: Operands, masks: Operands
) -> Iterable[tuple[tuple[bool, bool], Operands, Operands, Operands, Any]]:
    """Of each tile whether its time runs backward, whether it is the first of its columns, and its share of the operands:
    (L, B, D, ...), of which u is the first, (B, D), (2, D) or per step, and mask_pad and starts, (L, B), the latter as where the
    columns begin anew. directions: bidirectional, reverse."""
    batch, dim = steps[0].shape[1:3]
    if not (directions[0] or directions[1]) and 0 < batch * dim <= TILE_COLUMNS:
        return [((False, True), steps, states, rows, masks)]
    return _cut(directions, steps, states, rows, masks)


def _cut(
    directions: tuple[bool, bool], steps: Operands, states: Operands, rows: Operands, masks: Operands
) -> Iterable[tuple[tuple[bool, bool], Operands, Operands, Operands, Any]]:
    bidirectional, reverse = directions
    batch, dim = steps[0].shape[1:3]
    width = dim // 2 if bidirectional else dim
    for start in range(0, dim, width or 1):
        backward = (start > 0) != reverse
        time = slice(None, None, -1 if backward else 1)
        mask_pad, starts = masks
        if backward and starts is not None:  # where, in time, the next sequence starts
            ends, starts = starts[::-1], np.zeros(starts.shape, bool)
            starts[1:] = ends[:-1]
        elif starts is not None:
            starts = starts[time]
        for d0 in range(start, start + width, TILE_COLUMNS):
            d = slice(d0, min(d0 + TILE_COLUMNS, start + width))
            count = max(1, TILE_COLUMNS // (d.stop - d.start))
            for b0 in range(0, batch, count):
                b = slice(b0, b0 + count)
                yield (
                    (backward, b0 == 0),
                    tuple([a if a is None else a[time, b, d] for a in steps]),
                    tuple([a if a is None else a[b, d] for a in states]),
                    tuple([a if a is None else a[:, d] if a.ndim == 2 else a[time, b, d] for a in rows]),
                    (mask_pad if mask_pad is None else mask_pad[time, b], starts if starts is None else starts[:, b]),
                )


class _Scratch:
    """Arrays for what is computed, in memory that a call before has left: fresh memory costs a page fault every 4 KB. Who takes
    memory from the list has it alone, be it another thread or a signal's handler within this call: each access to the list is
    one step of the interpreter's."""

    kept: ClassVar[list[Array]] = []
    memory: MaybeArray = None

    def leave(self) -> None:
        """Whatever happened, at the end."""
        if self.memory is None:
            return
        self.kept.append(self.memory)
        with contextlib.suppress(IndexError):  # another thread's calls may have emptied it
            while sum([a.nbytes for a in self.kept[:]]) > ALL_KEPT_BYTES:
                self.kept.pop(0)  # the one that has been there longest

    def arrays(self, tile: _Tile, *shapes: tuple[int, ...]) -> list[Array]:
        """They replace those of the tile before."""
        if tile.small:
            return [np.empty(shape, tile.dtype) for shape in shapes]
        sizes = [math.prod(shape) for shape in shapes]
        whole, arrays, start = self._borrowed(sum(sizes) * tile.dtype.itemsize).view(tile.dtype), [], 0
        for shape, size in zip(shapes, sizes, strict=True):
            arrays.append(whole[start : start + size].reshape(shape))
            start += size
        return arrays

    def _borrowed(self, nbytes: int) -> Array:
        if self.memory is None:
            try:
                self.memory = self.kept.pop()
            except IndexError:
                self.memory = np.empty(0, np.uint8)
        memory = self.memory if nbytes <= self.memory.nbytes else np.empty(nbytes, np.uint8)
        if nbytes <= KEPT_BYTES:
            self.memory = memory
        return memory[:nbytes]


def saved_after(length: int, every: int, reverse: bool) -> list[int] | range:
    """After how many steps, in the order of processing, the states arise that c holds."""
    if every == 1:
        return range(1, length + 1)
    first = (length - 1) % every + 1 if reverse else every  # of a reversed column the first block is the one that L cuts short
    return [*range(first, length, every), length]


class _History:
    """The states of a tile for the backward: read where all are saved (complete), else run again from the last one saved."""

    spans: list[Array]  # states[i] is the state after low + i steps, planes[:, i] and move[i] are the next one's

    def __init__(self, tile: _Tile, c: Array, every: int, reverse: bool) -> None:
        length = tile.length
        self.tile, self.c, self.low = tile, c, length
        self.complete = len(c) == length
        self.span = min(length, tile.block if self.complete else tile.block + every)
        self.saved = () if self.complete else saved_after(length, every, reverse)

    def read(self, t0: int, t1: int, marks: Marks | None) -> tuple[Array, Array, Array, Array]:
        """For the steps [t0, t1), each of which comes first: the states before and after, and room for the planes of u and for
        (c_prev - z) * (1 - f). Where steps are run again, these hold u0, e of the forget gate, without weight_c 1 + e, and that
        product. All but the states is the caller's to change. Blocks are read from the last to the first."""
        states, planes, move = self.spans
        if not self.complete:
            if t0 < self.low:
                self._run_again(t0, t1)
            now, after = slice(t0 - self.low, t1 - self.low), slice(t0 - self.low + 1, t1 - self.low + 1)
            return before(states[t0 - self.low : t1 - self.low + 1], marks), states[after], planes[:, now], move[now]
        steps = t1 - t0
        if t0 > 0:
            c_prev = self.c[t0 - 1 : t1 - 1]
        else:
            c_prev = states[:steps]
            load(self.tile.c0, c_prev[:1])
            if steps > 1:
                c_prev[1:] = self.c[: steps - 1]
        if marks is not None and marks.starts is not None:
            c_prev = np.where(marks.starts, ZERO[c_prev.dtype], c_prev)
        return c_prev, self.c[t0:t1], planes[:, :steps], move[:steps]

    def _run_again(self, t0: int, t1: int) -> None:
        """From the last state saved at or before t0, c0 if there is none, to where the block after this one began to."""
        tile, known = self.tile, self.low
        states, planes, move = self.spans
        i = bisect_right(self.saved, t0) - 1
        self.low = low = self.saved[i] if i >= 0 else 0
        if rest := t1 - known:  # steps of this block that were run with the block after it
            states[known - low + 1 : t1 - low + 1] = states[1 : rest + 1]  # NumPy sees to the overlap
            planes[:, known - low : t1 - low] = planes[:, :rest]
            move[known - low : t1 - low] = move[:rest]
        if i < 0:
            load(tile.c0, states[0])
        else:
            states[0] = self.c[i]
        for t in range(low, known, tile.block):
            end = min(t + tile.block, known)
            now, v, new = slice(t - low, end - low), tile.weights(t, end), states[t - low : end - low + 1]
            load(tile.planes[:2, t:end], planes[:2, now])
            if tile.bias is not None:
                add(planes[1, now], tile.bias[0], planes[1, now])
            if v is None:
                exponentials(planes[1:2, now], None, new, planes[2:, now])
            z = activate(tile.candidate, planes[0, now])
            run_states(new, z, planes[1, now], planes[2, now], move[now], None if v is None else v[0], tile.marks(t, end))


Total = tuple[Array, MaybeArray]  # of some blocks' terms, and what rounding took from it


def with_block(total: Total | None, terms: Array) -> Total:
    """Adds terms, (count, steps, b, d), over steps and b: pairwise within the block, compensated from block to block."""
    width = terms.shape[3]
    terms = terms.reshape(len(terms), -1, width)
    while (count := terms.shape[1]) > RUNNING_SUM:
        part = count // RUNNING_SUM
        whole = terms[:, : RUNNING_SUM * part].reshape(len(terms), RUNNING_SUM, part, width)
        rest = terms[:, RUNNING_SUM * part :]
        terms = add.reduce(whole, 1)
        terms[:, 0] += add.reduce(rest, 1)
    term = terms[:, 0] if count == 1 else add.reduce(terms, 1)
    if total is None:
        return add(term, ZERO[term.dtype]), None  # no -0, which beside others would become 0
    old, errors = total
    new = old + term
    shadow = new - old
    error = (old - (new - shadow)) + (term - shadow)
    return new, error if errors is None else errors + error


def sum_of(total: Total) -> Array:
    sums, errors = total
    return sums if errors is None else np.where(np.isfinite(sums), sums + errors, sums)


# ---------------------------------------------------------------------------------------------------------------- dtypes


def state_dtype(u: Array) -> np.dtype:
    return FLOAT64 if u.dtype == FLOAT64 else FLOAT32


def widen(a: Array, dtype: npt.DTypeLike) -> Array:
    """A contiguous copy in the state's dtype."""
    if a.dtype != BFLOAT16:
        return np.array(a, dtype=dtype, order="C")
    bits = np.array(a, dtype=np.uint32, order="C")
    bits <<= 16
    return bits.view(np.float32).astype(dtype, copy=False)


def widened(a: Array, dtype: npt.DTypeLike) -> Array:
    """In the state's dtype, to be read only: the caller's own memory where it is of that."""
    return a if a.dtype == dtype else widen(a, dtype)


def load(a: Array, out: Array) -> None:
    """The same, into out."""
    if a.dtype == BFLOAT16:
        bits = out.view(np.uint32)
        bits[...] = a
        bits <<= 16
    else:
        out[...] = a  # np.copyto takes three times as long


def narrow(a: Array, out: Array) -> None:
    """Writes a to out, to the nearest, ties to even; what is too large becomes inf, and a NaN stays one."""
    if out.dtype != BFLOAT16:
        out[...] = a
        return
    bits = np.ascontiguousarray(a, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(a)
    if nan.any():
        np.copyto(rounded, (bits >> 16) | 0x40, where=nan)
    np.copyto(out, rounded, casting="unsafe")


def store(a: Array, out: Array, marks: Marks | None) -> None:
    if marks is not None and marks.pads is not None:
        np.copyto(a, 0, where=marks.pads)
    narrow(a, out)


def put(ufunc: np.ufunc, a: Array, b: Array, out: Array, marks: Marks | None) -> None:
    """Stores ufunc(a, b), without a pass of its own where NumPy itself can write it."""
    if (marks is None or marks.pads is None) and out.dtype != BFLOAT16:
        ufunc(a, b, out)
    else:
        store(ufunc(a, b), out, marks)
