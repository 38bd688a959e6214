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

Columns are cut into tiles and time into blocks that stay in cache; a block is copied into contiguous arrays of the state's
dtype, all that is not recurrent is computed for the whole block, and a short loop does the rest. The cuts depend on shape and
dtype only, so neither memory layout nor save_every can change a bit of a result. bfloat16, which NumPy lacks, arrives as its
bits in uint16.
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
SMALL_F = -4.0  # sigmoid arguments below this form f * c directly
TILE_COLUMNS = 2048  # a step's ufunc calls then cost little next to their work, and its rows stay in L1
BLOCK_BYTES = 128 * 1024  # of one contiguous array; a backward has about ten alive at a time


# --------------------------------------------------------------------------------------------------------- the equations


def gate(a: Array) -> tuple[Array, Array]:
    """sigmoid(a) and 1 - sigmoid(a), each to full relative accuracy; exp may overflow to inf, whose reciprocal is the right 0."""
    return _reciprocal_exp1(np.negative(a)), _reciprocal_exp1(a.copy())


def _reciprocal_exp1(a: Array) -> Array:
    """1 / (1 + exp(a)), in place."""
    np.exp(a, out=a)
    a += 1
    return np.reciprocal(a, out=a)


def take_small(p: Array, a: Array) -> MaybeArray:
    """p is -(1 - f), f = sigmoid(a), to which 1 is to be added: where f is small p becomes f itself, and 0 is to be added.
    Returns the 1s and 0s, None where all are 1. An element's arithmetic does not depend on what the others are: 1 * c is c."""
    if np.fmin.reduce(a, axis=None) >= SMALL_F:  # fmin: a NaN is nothing to the other columns
        return None
    keep = np.greater_equal(a, SMALL_F)
    np.copyto(p, _reciprocal_exp1(np.negative(a)), where=~keep)
    return keep.astype(a.dtype)


def activate(name: str, c: Array) -> Array:
    if name == "tanh":
        return np.tanh(c)
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
    """states[0] is known, (steps + 1, n); fills the rest. a: the forget gate's argument, less v * c. Overwrites z and a."""
    scratch = np.empty_like(states[0])
    stops = pad.steps if pad else [None] * len(z)
    if v is None:  # c = keep*c + (p*c + g*z) with p = -g, or p = f and keep = 0 where f is small
        p = np.exp(a)
        p += 1
        np.divide(z, p, out=z)
        np.divide(-1, p, out=p)
        keep = take_small(p, a)
        for t, (gz, pt, c, new) in enumerate(zip(z, p, states[:-1], states[1:], strict=True)):
            np.multiply(pt, c, out=scratch)
            np.add(scratch, gz, out=scratch)
            if keep is None:
                np.add(c, scratch, out=new)
            else:
                np.multiply(c, keep[t], out=new)
                np.add(new, scratch, out=new)
            if (stop := stops[t]) is not None:
                np.copyto(new, c, where=stop)
        return
    e, small, fixed = np.empty_like(scratch), np.empty(scratch.shape, bool), np.empty_like(scratch)
    # c = c + (z - c) / (1 + e), or (e*c + z) / (1 + e) where f = e / (1 + e) is small
    for t, (zt, at, c, new) in enumerate(zip(z, a, states[:-1], states[1:], strict=True)):
        np.multiply(v if v.ndim == 1 else v[t], c, out=e)
        np.add(e, at, out=e)
        np.less(e, SMALL_F, out=small)
        np.exp(e, out=e)
        np.add(e, 1, out=at)
        np.subtract(zt, c, out=scratch)
        np.divide(scratch, at, out=scratch)
        np.add(c, scratch, out=new)
        if np.count_nonzero(small):
            np.multiply(e, c, out=fixed)
            np.add(fixed, zt, out=fixed)
            np.divide(fixed, at, out=fixed)
            np.copyto(new, fixed, where=small)
        if (stop := stops[t]) is not None:
            np.copyto(new, c, where=stop)


def run_carry(carry: Array, gc: Array, p: Array, keep: MaybeArray, q: MaybeArray, pad: Pad | None) -> Array:
    """From the last step to the first: gc comes as gh * r*m * activation'(c), and the carry is added to it; then
    carry = keep*gc + p*gc + q."""
    new, kept = np.empty_like(carry), np.empty_like(carry)
    stops = pad.steps if pad else [None] * len(gc)
    for t in range(len(gc) - 1, -1, -1):
        row = gc[t]
        np.add(row, carry, out=row)
        np.multiply(p[t], row, out=new)
        np.add(new, row if keep is None else np.multiply(keep[t], row, out=kept), out=new)
        if q is not None:
            np.add(new, q[t], out=new)
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
            states = np.empty((tile.block + 1, tile.columns), tile.dtype)
            states[0] = tile.c0
            for t0 in range(0, length, tile.block):
                t1 = min(t0 + tile.block, length)
                now, pad = states[: t1 - t0 + 1], tile.pad(t0, t1)
                v_f, v_r = tile.weights(t0, t1)
                run_states(now, tile.candidates(t0, t1), tile.argument(t0, t1, 1), v_f, pad)
                if h is not None:
                    a = activate(activation, now[1:])
                    _, rm, _, w = tile.reset(t0, t1, v_r, now[:-1])
                    out, s = np.multiply(rm, a, out=rm), tile.skip(t0, t1)
                    if s is not None:
                        out += np.multiply(w, s, out=s)
                    tile.store(out, h, t0, t1, pad)
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
    sums: tuple[MaybeArray, MaybeArray] = (grad_bias, None if per_step else grad_weight_c)
    with np.errstate(all="ignore"):
        for total in sums:
            if total is not None:
                total[...] = 0  # +0 has the same bits in every dtype, bfloat16 included
        totals = _Totals(u, sums)
        for tile in _tiles(u, x, bias, weight_c, c0, mask_c, mask_pad, candidate, scale_x, mask_target, bidirectional):
            history = History(tile, c, save_every, length)
            carry = np.zeros(tile.columns, tile.dtype)
            if grad_c_last is not None:
                carry[:] = widen(grad_c_last[tile.b, tile.d], tile.dtype).reshape(-1)
            for t0 in reversed(range(0, length, tile.block)):
                t1 = min(t0 + tile.block, length)
                states, pad = history.states(t0, t1), tile.pad(t0, t1)
                c_prev, gh, (v_f, v_r) = states[:-1], tile.load(grad_h, t0, t1), tile.weights(t0, t1)
                # What does not depend on the carry: the reset gate's side, ...
                r, rm, q, w = tile.reset(t0, t1, v_r, c_prev)
                a, da, s = activate(activation, states[1:]), slope(activation, states[1:]), tile.skip(t0, t1)
                gc = np.multiply(gh, rm, out=rm)
                if da is not None:
                    gc *= da
                gu2 = _reset_difference(a, s, tile.mask, tile.gate_mask)
                reset_slope = np.multiply(r, q, out=r)
                reset_slope *= gh  # a saturated gate's 0 first: gh * gu2 may overflow
                gu2 *= reset_slope
                # ... and the forget gate's.
                arg = tile.argument(t0, t1, 1)
                if v_f is not None:
                    arg += v_f * c_prev
                f, g = gate(arg)
                u0 = tile.load(tile.u[..., 0], t0, t1)
                adjoint = np.subtract(c_prev, activate(candidate, u0))  # A
                adjoint *= f
                adjoint *= g
                p = np.negative(g)
                keep = take_small(p, arg)
                if v_f is not None:
                    p += adjoint * v_f
                carry = run_carry(carry, gc, p, keep, None if v_r is None else gu2 * v_r, pad)
                # What does: gradients of the block.
                gu1 = np.multiply(gc, adjoint, out=adjoint)
                gu0 = np.multiply(gc, g, out=g)
                du0 = slope(candidate, u0)
                if du0 is not None:
                    gu0 *= du0
                if pad:
                    for array in (gu0, gu1, gu2):
                        np.copyto(array, 0, where=pad.columns)
                if grad_u is not None:
                    for j, array in enumerate((gu0, gu1, gu2)):
                        tile.store(array, grad_u[..., j], t0, t1)
                gs_out = (None if grad_u is None else grad_u[..., 3]) if u.shape[3] == 4 else grad_x
                if gs_out is not None:
                    gs = np.multiply(gh, w, out=gh)
                    if u.shape[3] == 3 and scale_x != 1:
                        gs *= tile.scale_x
                    tile.store(gs, gs_out, t0, t1, pad)
                if grad_weight_c is not None:
                    for j, array in enumerate((gu1, gu2)):
                        product = array * c_prev
                        if per_step:
                            tile.store(product, grad_weight_c[..., j], t0, t1, pad)
                        else:
                            if pad:
                                np.copyto(product, 0, where=pad.columns)
                            totals.add(1, j, tile, product)
                if grad_bias is not None:
                    totals.add(0, 0, tile, gu1)
                    totals.add(0, 1, tile, gu2)
            if grad_c0 is not None:
                narrow(carry.reshape(tile.shape), grad_c0[tile.b, tile.d])
        totals.finish()


def _reset_difference(a: Array, s: MaybeArray, m: MaybeArray, gate_mask: bool) -> Array:
    """gr / gh: m*a - s, or m * (a - s) where the mask is on the gate. A new array."""
    if s is None:
        return a.copy() if m is None else a * m
    if m is None:
        return np.subtract(a, s)
    if gate_mask:
        d = np.subtract(a, s)
        d *= m
        return d
    d = np.multiply(a, m)
    d -= s
    return d


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
        part = self.view(a, t0, t1)
        return widen(part, self.dtype).reshape(len(part), self.columns)

    def store(self, block: Array, out: Array, t0: int, t1: int, pad: Pad | None = None) -> None:
        if pad:
            np.copyto(block, 0, where=pad.columns)
        narrow(block.reshape(len(block), *self.shape), self.view(out, t0, t1))

    def argument(self, t0: int, t1: int, j: int) -> Array:
        a = self.load(self.u[..., j], t0, t1)
        if self.bias is not None:
            a += self.bias[j - 1]
        return a

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
        if self.scale_x != 1:
            s *= self.scale_x
        return s

    def reset(self, t0: int, t1: int, v: MaybeArray, c_prev: Array) -> tuple[Array, Array, Array, Array]:
        """r, r*m, 1 - r, and the skip's factor w: (1 - r) + (1 - m)*r is 1 - m*r without the cancellation at m = 1."""
        arg = self.argument(t0, t1, 2)
        if v is not None:
            arg += v * c_prev
        r, q = gate(arg)
        if self.mask is None:
            return r, r.copy(), q, q
        return r, r * self.mask, q, q + r * (1 - self.mask) if self.gate_mask else q

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
    _, batch, dim, _ = u.shape
    dtype = state_dtype(u)
    width = dim // 2 if bidirectional else dim

    def columns(a: Array, part: tuple[slice, slice]) -> Array:
        return widen(np.broadcast_to(a, (batch, dim))[part], dtype).reshape(-1)

    def pair(a: MaybeArray, part: tuple[slice, slice]) -> MaybeArray:
        return None if a is None else np.stack([columns(a[0], part), columns(a[1], part)])

    for start in range(0, dim, width or 1):
        for d0 in range(start, start + width, TILE_COLUMNS):
            d = slice(d0, min(d0 + TILE_COLUMNS, start + width))
            rows = max(1, TILE_COLUMNS // (d.stop - d.start))
            for b0 in range(0, batch, rows):
                b = slice(b0, min(b0 + rows, batch))
                shape = (b.stop - b.start, d.stop - d.start)
                n = shape[0] * shape[1]
                static = weight_c if weight_c is not None and weight_c.ndim == 2 else None
                yield _Tile(
                    reverse=start > 0,
                    b=b,
                    d=d,
                    shape=shape,
                    columns=n,
                    block=max(1, BLOCK_BYTES // (dtype.itemsize * n)),
                    dtype=dtype,
                    u=u,
                    x=x,
                    weight_c=weight_c,
                    mask_pad=mask_pad,
                    bias=pair(bias, (b, d)),
                    v=pair(static, (b, d)),
                    c0=np.zeros(n, dtype) if c0 is None else columns(c0, (b, d)),
                    mask=None if mask_c is None else columns(mask_c, (b, d)),
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

    def states(self, t0: int, t1: int) -> Array:
        """Before step t0 to after step t1 - 1: (t1 - t0 + 1, n)."""
        tile, saved = self.tile, self.saved
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
                    part = self.span[t - self.low : end - self.low + 1]
                    v_f, _ = tile.weights(t, end)
                    run_states(part, tile.candidates(t, end), tile.argument(t, end, 1), v_f, tile.pad(t, end))
        return self.span[t0 - self.low : t1 - self.low + 1]


class _Totals:
    """Sums over L and B: pairwise within a block, compensated from block to block."""

    def __init__(self, u: Array, outs: tuple[MaybeArray, MaybeArray]) -> None:
        dtype, dim = state_dtype(u), u.shape[2]
        self.outs = outs
        self.sums = np.zeros((2, 2, dim), dtype)
        self.errors = np.zeros((2, 2, dim), dtype)

    def add(self, which: int, row: int, tile: _Tile, block: Array) -> None:
        """Overwrites the block."""
        terms = block.reshape(-1, tile.shape[1])
        count = len(terms)
        while count > 1:
            half = count // 2
            terms[:half] += terms[half : 2 * half]
            if count % 2:
                terms[0] += terms[count - 1]
            count = half
        old, term = self.sums[which, row, tile.d], terms[0]
        new = old + term
        shadow = new - old
        self.errors[which, row, tile.d] += (old - (new - shadow)) + (term - shadow)
        self.sums[which, row, tile.d] = new

    def finish(self) -> None:
        for total, error, out in zip(self.sums, self.errors, self.outs, strict=True):
            if out is not None:
                narrow(np.where(np.isfinite(total), total + error, total), out)


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
