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

At a padded step the state and the carry pass unchanged, h and all gradients are 0, and the data there is never used.

Long memory (f near 1) is lost if f is rounded before it multiplies: the error does not average out, it compounds. So with
g = 1 - f, computed by itself, c = c + (g*z - g*c) and carry = gc + gc*(A*v_f - g); only where f is small, f*c and gc*f are
formed directly.

Columns are cut into tiles and time into blocks that stay in cache; all that is not recurrent is computed for a whole block, in
contiguous arrays of the state's dtype that the next block uses again, and a short loop does the rest. Operands of that dtype
are read where they lie, others copied. The cuts depend on shape and dtype only, so neither memory layout nor save_every can
change a bit of a result. bfloat16, which NumPy lacks, arrives as its bits in uint16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MaybeArray = Array | None

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
SMALL_F = float(1 / (1 + np.exp(4.0)))  # forget gates below this form f * c directly
TILE_COLUMNS = 8192  # a step's ufunc calls then cost little next to their work, and its rows stay in L2
BLOCK_BYTES = 256 * 1024  # of one contiguous array; a backward has eight of its own
RUNNING_SUM = 8  # so many terms, and no more, are added one after another


# --------------------------------------------------------------------------------------------------------- the equations


def gates(e: Array, shut: Array) -> None:
    """Of e = exp(a): e becomes sigmoid(a) and shut 1 - sigmoid(a), each to full relative accuracy."""
    np.add(e, 1, out=shut)
    np.divide(1, shut, out=shut)
    np.multiply(e, shut, out=e)
    if np.fmin.reduce(shut, axis=None, initial=1) == 0:  # where exp overflowed, e is inf * 0; fmin passes NaN over
        np.copyto(e, 1, where=shut == 0)


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


def run_states(states: Array, z: Array, a: Array, v: MaybeArray, pad: Pad | None) -> None:
    """states[0] is known, (steps + 1, n); fills the rest. a: the forget gate's argument, less v * c, of which it
    leaves the exponential of the whole."""
    add, multiply, subtract, divide, exp, less = np.add, np.multiply, np.subtract, np.divide, np.exp, np.less
    stops = pad.steps if pad else [None] * len(z)
    move = np.empty_like(states[0])
    if v is None:  # c = keep*c + (p*c + g*z)
        f, g, p = np.exp(a, out=a).copy(), np.empty_like(a), np.empty_like(a)
        gates(f, g)
        keep = split(f, g, p)
        g *= z
        for t, (gz, pt, c, new) in enumerate(zip(g, p, states[:-1], states[1:], strict=True)):
            multiply(pt, c, out=move)
            add(move, gz, out=move)
            add(c if keep is None else multiply(c, keep[t], out=new), move, out=new)
            if (stop := stops[t]) is not None:
                np.copyto(new, c, where=stop)
        return
    one, bound = np.ones((), a.dtype), np.full((), SMALL_F / (1 - SMALL_F), a.dtype)  # as arrays, which a ufunc need not convert
    below, small = np.empty_like(move), np.empty(move.shape, bool)
    # c = c + (z - c) / (1 + e), or (e*c + z) / (1 + e) where f = e / (1 + e) is small
    rows = v if v.ndim == 2 else [v] * len(a)
    for zt, e, vt, c, new, stop in zip(z, a, rows, states[:-1], states[1:], stops, strict=True):
        multiply(vt, c, out=move)
        add(move, e, out=e)
        exp(e, out=e)
        less(e, bound, out=small)
        add(e, one, out=below)
        subtract(zt, c, out=move)
        divide(move, below, out=move)
        add(c, move, out=new)
        (few,) = small.nonzero()
        if len(few):
            new[few] = (e[few] * c[few] + zt[few]) / below[few]
        if stop is not None:
            np.copyto(new, c, where=stop)


def split(f: Array, g: Array, p: Array) -> MaybeArray:
    """f as keep + p: 1 and p = -g or, where f is small, 0 and f. Returns keep, None where all are 1. An element's arithmetic
    does not depend on what the others are: 1 * c is c."""
    np.negative(g, out=p)
    if np.fmin.reduce(f, axis=None) >= SMALL_F:  # fmin: a NaN is nothing to the other columns
        return None
    small = f < SMALL_F
    np.copyto(p, f, where=small)
    return np.logical_not(small).astype(f.dtype)


def run_carry(carry: Array, gc: Array, p: Array, keep: MaybeArray, q: MaybeArray, pad: Pad | None) -> Array:
    """From the last step to the first: gc comes as gh * r*m * activation'(c), and the carry is added to it; then
    carry = keep*gc + (p*gc + q)."""
    add, multiply = np.add, np.multiply
    new, kept = np.empty_like(carry), np.empty_like(carry)
    stops = pad.steps if pad else [None] * len(gc)
    for t in range(len(gc) - 1, -1, -1):
        row = gc[t]
        add(row, carry, out=row)
        multiply(p[t], row, out=new)
        if q is not None:
            add(new, q[t], out=new)
        add(new, row if keep is None else multiply(keep[t], row, out=kept), out=new)
        if (stop := stops[t]) is not None:
            np.copyto(new, carry, where=stop)
        carry, new = new, carry
    return carry


# -------------------------------------------------------------------------------------------------------- the two passes


def forward(
    u: Array,
    x: MaybeArray,
    bias: MaybeArray,
    weight_c: MaybeArray,
    c0: MaybeArray,
    mask_c: MaybeArray,
    mask_pad: MaybeArray,
    *,
    activation: str,
    candidate: str,
    scale_x: float,
    mask_target: str,
    bidirectional: bool,
    save_every: int | None,
    h: MaybeArray,
    c: MaybeArray,
    c_last: MaybeArray,
) -> None:
    """Writes h, c and c_last in place; operands may have any strides. All checks are the caller's."""
    length = u.shape[0]
    with np.errstate(all="ignore"):
        for tile in _tiles(u, x, bias, weight_c, c0, mask_c, mask_pad, candidate, scale_x, mask_target, bidirectional):
            saved = Saved(length, save_every, tile.reverse)
            states, room = np.empty((tile.block + 1, tile.columns), tile.dtype), tile.room(2)
            states[0] = tile.c0
            for t0 in range(0, length, tile.block):
                t1 = min(t0 + tile.block, length)
                now, pad, (r, q) = states[: t1 - t0 + 1], tile.pad(t0, t1), room[:, : t1 - t0]
                v_f, v_r = tile.weights(t0, t1)
                tile.argument(t0, t1, 1, out=r)
                run_states(now, tile.candidates(t0, t1), r, v_f, pad)
                if h is not None:
                    tile.argument(t0, t1, 2, out=r)
                    if v_r is not None:
                        r += np.multiply(v_r, now[:-1], out=q)
                    gates(np.exp(r, out=r), q)
                    w, s = tile.skip_factor(r, q), tile.skip(t0, t1)
                    if tile.mask is not None:
                        r *= tile.mask
                    r *= activate(activation, now[1:])
                    if s is None:
                        tile.store(r, h, t0, t1, pad)
                    else:
                        tile.put(np.add, r, np.multiply(w, s, out=q), h, t0, t1, pad)
                if c is not None and save_every is not None:
                    tile.store(now[saved.rows(t0, t1)], c, *saved.indices(t0, t1))
                states[0] = now[-1]
            if c_last is not None:
                narrow(states[0].reshape(tile.shape), c_last[tile.b, tile.d])


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
    *,
    activation: str,
    candidate: str,
    scale_x: float,
    mask_target: str,
    bidirectional: bool,
    save_every: int,
    grad_u: MaybeArray,
    grad_x: MaybeArray,
    grad_bias: MaybeArray,
    grad_weight_c: MaybeArray,
    grad_c0: MaybeArray,
) -> None:
    """Writes the gradients in place; those that are None are not wanted. All checks are the caller's."""
    length = u.shape[0]
    per_step = weight_c is not None and weight_c.ndim == 4
    sums = (grad_bias, None if per_step else grad_weight_c)
    with np.errstate(all="ignore"):
        for total in sums:
            if total is not None:
                total[...] = 0  # +0 has the same bits in every dtype, bfloat16 included
        totals = _Totals(u, *sums)
        for tile in _tiles(u, x, bias, weight_c, c0, mask_c, mask_pad, candidate, scale_x, mask_target, bidirectional):
            history = History(tile, c, save_every, length)
            carry, room = np.zeros(tile.columns, tile.dtype), tile.room(8)
            if grad_c_last is not None:
                carry[:] = widen(grad_c_last[tile.b, tile.d], tile.dtype).reshape(-1)
            for t0 in reversed(range(0, length, tile.block)):
                t1 = min(t0 + tile.block, length)
                states, pad = history.states(t0, t1), tile.pad(t0, t1)
                c_prev, gh, (v_f, v_r) = states[:-1], tile.load(grad_h, t0, t1), tile.weights(t0, t1)
                f, r, g, q, *_ = room[:, : t1 - t0]
                gu1, gu2, p, carried = terms = room[4:, : t1 - t0]
                if (known := history.forget_exponentials(t0, t1)) is not None:
                    f = known
                else:
                    tile.argument(t0, t1, 1, out=f)
                    if v_f is not None:
                        f += np.multiply(v_f, c_prev, out=p)
                    np.exp(f, out=f)
                gates(f, g)
                tile.argument(t0, t1, 2, out=r)
                if v_r is not None:
                    r += np.multiply(v_r, c_prev, out=p)
                gates(np.exp(r, out=r), q)
                # What does not depend on the carry: the reset gate's side, ...
                a, da, s = activate(activation, states[1:]), slope(activation, states[1:]), tile.skip(t0, t1)
                difference = _reset_difference(a, s, tile.mask, tile.gate_mask, out=p)
                w = tile.skip_factor(r, q)
                gc = np.multiply(gh, r, out=r)
                np.multiply(gc, q, out=gu2)  # a saturated gate's 0 first: gh * difference may overflow
                gu2 *= difference
                if tile.mask is not None:
                    gc *= tile.mask
                if da is not None:
                    gc *= da
                # ... and the forget gate's.
                u0 = tile.load(tile.u[..., 0], t0, t1)
                adjoint = np.subtract(c_prev, activate(candidate, u0), out=gu1)  # A
                adjoint *= f
                adjoint *= g
                keep = split(f, g, p)
                if v_f is not None:
                    p += np.multiply(adjoint, v_f, out=carried)
                carry = run_carry(carry, gc, p, keep, None if v_r is None else np.multiply(gu2, v_r, out=carried), pad)
                # What does: gradients of the block.
                gu1 *= gc
                gc *= g
                du0 = slope(candidate, u0)
                if du0 is not None:
                    gc *= du0
                if grad_weight_c is not None:
                    np.multiply(terms[:2], c_prev, out=terms[2:])
                if pad:
                    np.copyto(terms, 0, where=pad.columns)
                if grad_u is not None:
                    tile.store(gc, grad_u[..., 0], t0, t1, pad)
                    tile.store(gu1, grad_u[..., 1], t0, t1)
                    tile.store(gu2, grad_u[..., 2], t0, t1)
                gs_out = (None if grad_u is None else grad_u[..., 3]) if u.shape[3] == 4 else grad_x
                if gs_out is not None:
                    if u.shape[3] == 3 and scale_x != 1:
                        w = np.multiply(w, tile.scale_x, out=q)
                    tile.put(np.multiply, gh, w, gs_out, t0, t1, pad)
                if grad_weight_c is not None and per_step:
                    tile.store(terms[2], grad_weight_c[..., 0], t0, t1)
                    tile.store(terms[3], grad_weight_c[..., 1], t0, t1)
                totals.add(tile, terms)
            if grad_c0 is not None:
                narrow(carry.reshape(tile.shape), grad_c0[tile.b, tile.d])
        totals.finish()


def _reset_difference(a: Array, s: MaybeArray, m: MaybeArray, gate_mask: bool, out: Array) -> Array:
    """gr / gh: m*a - s, or m * (a - s) where the mask is on the gate."""
    if m is not None and not gate_mask:
        a = np.multiply(a, m, out=out)
    if s is not None:
        a = np.subtract(a, s, out=out)
    if m is not None and gate_mask:
        a = np.multiply(a, m, out=out)
    return a


# ------------------------------------------------------------------------------------------- tiles, blocks, saved states


class Pad(NamedTuple):
    columns: Array  # (steps, n), where there is padding
    steps: list[MaybeArray]  # its rows, None for those without any


class _Tile(NamedTuple):
    """Some columns of one direction, with views of the operands in the order in which time is processed."""

    reverse: bool
    b: slice
    d: slice
    shape: tuple[int, int]
    columns: int
    block: int  # steps
    dtype: np.dtype
    u: Array
    x: MaybeArray
    weight_c: MaybeArray
    mask_pad: MaybeArray
    bias: MaybeArray  # (2, n)
    v: MaybeArray  # (2, n), when it is not per step
    c0: Array  # (n,)
    mask: MaybeArray  # (n,)
    gate_mask: bool
    candidate: str
    scale_x: np.floating

    def view(self, a: Array, t0: int, t1: int) -> Array:
        """The tile's part of (L, B, D), flipped when the direction is."""
        return (a[::-1] if self.reverse else a)[t0:t1, self.b, self.d]

    def load(self, a: Array, t0: int, t1: int) -> Array:
        """(steps, n) in the state's dtype, to be read only: the caller's own memory where its layout allows."""
        part = self.view(a, t0, t1)
        return (part if part.dtype == self.dtype else widen(part, self.dtype)).reshape(len(part), self.columns)

    def room(self, count: int) -> Array:
        """Arrays of a block for what is computed: used again by each, they stay in cache."""
        return np.empty((count, self.block, self.columns), self.dtype)

    def store(self, block: Array, out: Array, t0: int, t1: int, pad: Pad | None = None) -> None:
        if pad:
            np.copyto(block, 0, where=pad.columns)
        narrow(block.reshape(len(block), *self.shape), self.view(out, t0, t1))

    def put(self, ufunc: np.ufunc, a: Array, b: Array, out: Array, t0: int, t1: int, pad: Pad | None) -> None:
        """Stores ufunc(a, b), without a pass of its own where NumPy itself can write it."""
        if pad or out.dtype == np.uint16:
            self.store(ufunc(a, b), out, t0, t1, pad)
        else:
            a, b = (operand.reshape(len(operand), *self.shape) for operand in (a, b))
            ufunc(a, b, out=self.view(out, t0, t1), casting="same_kind")

    def argument(self, t0: int, t1: int, j: int, out: Array) -> None:
        """u_j + b_j, to which v_j * c is to be added."""
        u = self.load(self.u[..., j], t0, t1)
        np.copyto(out, u)  # u is strided, so that a copy and a sum in place are faster than one sum
        if self.bias is not None:
            out += self.bias[j - 1]

    def candidates(self, t0: int, t1: int) -> Array:
        return activate(self.candidate, self.load(self.u[..., 0], t0, t1))

    def weights(self, t0: int, t1: int) -> tuple[MaybeArray, MaybeArray]:
        if self.v is not None:
            return self.v[0], self.v[1]
        if self.weight_c is None:
            return None, None
        return self.load(self.weight_c[..., 0], t0, t1), self.load(self.weight_c[..., 1], t0, t1)

    def skip(self, t0: int, t1: int) -> MaybeArray:
        if self.u.shape[3] == 4:
            return self.load(self.u[..., 3], t0, t1)
        if self.x is None:
            return None
        s = self.load(self.x, t0, t1)
        return s if self.scale_x == 1 else s * self.scale_x

    def skip_factor(self, r: Array, q: Array) -> Array:
        """w = 1 - r, or 1 - m*r as (1 - r) + (1 - m)*r, which does not cancel at m = 1."""
        return q if self.mask is None or not self.gate_mask else q + r * (1 - self.mask)

    def pad(self, t0: int, t1: int) -> Pad | None:
        if self.mask_pad is None:
            return None
        mask = (self.mask_pad[::-1] if self.reverse else self.mask_pad)[t0:t1, self.b] != 0
        if not mask.any():
            return None
        columns = np.repeat(mask, self.shape[1], axis=1)
        return Pad(columns, [row if row.any() else None for row in columns])


def _tiles(
    u: Array,
    x: MaybeArray,
    bias: MaybeArray,
    weight_c: MaybeArray,
    c0: MaybeArray,
    mask_c: MaybeArray,
    mask_pad: MaybeArray,
    candidate: str,
    scale_x: float,
    mask_target: str,
    bidirectional: bool,
) -> Iterator[_Tile]:
    length, batch, dim, _ = u.shape
    dtype = state_dtype(u)
    width = dim // 2 if bidirectional else dim

    for start in range(0, dim, width or 1):
        for d0 in range(start, start + width, TILE_COLUMNS):
            d = slice(d0, min(d0 + TILE_COLUMNS, start + width))
            rows = max(1, TILE_COLUMNS // (d.stop - d.start))
            for b0 in range(0, batch, rows):
                b = slice(b0, min(b0 + rows, batch))
                shape = (b.stop - b.start, d.stop - d.start)
                n = shape[0] * shape[1]
                static = weight_c if weight_c is not None and weight_c.ndim == 2 else None

                def plane(a: Array, part: tuple[slice, slice] = (b, d)) -> Array:
                    return widen(a[part], dtype).reshape(-1)

                def rows_of(a: Array, d: slice = d, shape: tuple[int, int] = shape) -> Array:
                    full = np.empty((2, *shape), dtype)
                    full[...] = widen(a[:, d], dtype)[:, None]
                    return full.reshape(2, -1)

                yield _Tile(
                    reverse=start > 0,
                    b=b,
                    d=d,
                    shape=shape,
                    columns=n,
                    block=max(1, min(length, BLOCK_BYTES // (dtype.itemsize * n))),
                    dtype=dtype,
                    u=u,
                    x=x,
                    weight_c=weight_c,
                    mask_pad=mask_pad,
                    bias=None if bias is None else rows_of(bias),
                    v=None if static is None else rows_of(static),
                    c0=np.zeros(n, dtype) if c0 is None else plane(c0),
                    mask=None if mask_c is None else plane(mask_c),
                    gate_mask=mask_target == "gate",
                    candidate=candidate,
                    scale_x=dtype.type(scale_x),
                )


class Saved(NamedTuple):
    """Which states c holds, in the order of processing: c[i] after min(first + i*every, length) steps."""

    length: int
    every: int | None
    reverse: bool

    @property
    def first(self) -> int:
        every = self.every or 1  # of a reversed column the first block is the one that L cuts short
        return (self.length - 1) % every + 1 if self.reverse else every

    def end(self, i: int) -> int:
        return min(self.first + i * (self.every or 1), self.length)

    def indices(self, t0: int, t1: int) -> tuple[int, int]:
        """The range of i whose states arise in the steps [t0, t1)."""
        every = self.every or 1
        count = -(-self.length // every)
        begin, stop = (max(0, -((self.first - t - 1) // every)) for t in (t0, t1))
        return begin, count if t1 == self.length else stop

    def rows(self, t0: int, t1: int) -> slice | list[int]:
        if self.every == 1:
            return slice(1, None)
        return [self.end(i) - t0 for i in range(*self.indices(t0, t1))]


class History:
    """The states of a tile for the backward: read where all are saved, else run again from the last one saved."""

    def __init__(self, tile: _Tile, c: Array, every: int, length: int) -> None:
        self.tile, self.c, self.saved = tile, c, Saved(length, every, tile.reverse)
        self.low = length + 1  # self.span[i] is the state after low + i steps
        self.span = np.empty((min(length, tile.block if every == 1 else every + tile.block) + 1, tile.columns), tile.dtype)
        self.exponentials = np.empty_like(self.span[: 0 if every == 1 else None])

    def states(self, t0: int, t1: int) -> Array:
        """Before step t0 to after step t1 - 1: (t1 - t0 + 1, n)."""
        tile, saved = self.tile, self.saved
        if saved.every == 1 and t0 > 0:
            return tile.load(self.c, t0 - 1, t1)
        if t0 < self.low:
            every = saved.every or 1
            i = (t0 - saved.first) // every  # the last one saved at or before t0, -1 for c0
            self.low = saved.end(i) if i >= 0 else 0
            self.span[0] = tile.c0 if i < 0 else tile.load(self.c, i, i + 1)[0]
            if every == 1:
                self.span[1 : t1 - t0 + 1] = tile.load(self.c, t0, t1)
            else:
                for t in range(self.low, t1, tile.block):
                    end = min(t + tile.block, t1)
                    part, a = self.span[t - self.low : end - self.low + 1], self.exponentials[t - self.low : end - self.low]
                    v_f, _ = tile.weights(t, end)
                    tile.argument(t, end, 1, out=a)
                    run_states(part, tile.candidates(t, end), a, v_f, tile.pad(t, end))
        return self.span[t0 - self.low : t1 - self.low + 1]

    def forget_exponentials(self, t0: int, t1: int) -> MaybeArray:
        """exp of the forget gate's argument in the steps of the last `states`, where these were run again; to be overwritten."""
        return None if self.saved.every == 1 else self.exponentials[t0 - self.low : t1 - self.low]


class _Totals:
    """Sums over L and B of gu1, gu2, gu1 * c, gu2 * c: pairwise within a block, compensated from block to block."""

    def __init__(self, u: Array, grad_bias: MaybeArray, grad_weight_c: MaybeArray) -> None:
        self.outs = ((slice(0, 2), grad_bias), (slice(2, 4), grad_weight_c))
        self.wanted = slice(0 if grad_bias is not None else 2, 4 if grad_weight_c is not None else 2)
        self.sums, self.errors = np.zeros((2, 4, u.shape[2]), state_dtype(u))

    def add(self, tile: _Tile, block: Array) -> None:
        if self.wanted.start == self.wanted.stop:
            return
        width = tile.shape[1]
        terms = block[self.wanted].reshape(-1, block[0].size // width, width)
        while (count := terms.shape[1]) > RUNNING_SUM:
            part = count // RUNNING_SUM
            whole = terms[:, : RUNNING_SUM * part].reshape(len(terms), RUNNING_SUM, part, width)
            rest = terms[:, RUNNING_SUM * part :]
            terms = np.add.reduce(whole, axis=1)
            terms[:, 0] += np.add.reduce(rest, axis=1)
        old, term = self.sums[self.wanted, tile.d], np.add.reduce(terms, axis=1)
        new = old + term
        shadow = new - old
        self.errors[self.wanted, tile.d] += (old - (new - shadow)) + (term - shadow)
        self.sums[self.wanted, tile.d] = new

    def finish(self) -> None:
        totals = np.where(np.isfinite(self.sums), self.sums + self.errors, self.sums)
        for rows, out in self.outs:
            if out is not None:
                narrow(totals[rows], out)


# ---------------------------------------------------------------------------------------------------------------- dtypes


def state_dtype(u: Array) -> np.dtype:
    return np.dtype(np.float64 if u.dtype == np.float64 else np.float32)


def widen(a: Array, dtype: npt.DTypeLike) -> Array:
    """A contiguous copy in the state's dtype."""
    if a.dtype != np.uint16:
        return np.array(a, dtype=dtype, order="C")
    bits = np.array(a, dtype=np.uint32, order="C")
    bits <<= 16
    return bits.view(np.float32).astype(dtype, copy=False)


def narrow(a: Array, out: Array) -> None:
    """Writes a to out, to the nearest, ties to even; what is too large becomes inf, and a NaN stays one."""
    if out.dtype != np.uint16:
        np.copyto(out, a, casting="same_kind")
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
