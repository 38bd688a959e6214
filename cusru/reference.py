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
g = 1 - f, computed by itself, c = c - (c - z)*g and carry = gc + gc*(A*v_f - g); only where f is small, f*c and gc*f are
formed directly. (c - z must not overflow: |c| and |z| up to half the largest number, in the kernels too.)

Columns are cut into tiles and time into blocks that stay in cache; all that is not recurrent is computed for a whole block, in
contiguous arrays of the state's dtype that the next block uses again, and a short loop does the rest. Operands of that dtype
are read where they lie, others copied. The cuts depend on shape and dtype only, so neither memory layout nor save_every can
change a bit of a result. bfloat16, which NumPy lacks, arrives as its bits in uint16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MaybeArray = Array | None

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
SMALL_F = float(1 / (1 + np.exp(4.0)))  # forget gates below this form f * c directly
TILE_COLUMNS = 8192  # a step's ufunc calls then cost little next to their work, and its rows stay in L2
BLOCK_BYTES = 512 * 1024  # of one contiguous array; a backward has eight, and three of save_every steps more
KEPT_BYTES = 16 << 20  # of scratch memory, at most, that a call leaves to later ones: a backward's with save_every = 32
ALL_KEPT_BYTES = 64 << 20  # that all calls have left, of all threads
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


def run_states(states: Array, z: Array, e: Array, move: Array, v: MaybeArray, pad: Pad | None) -> None:
    """states[0] is known, (steps + 1, n); fills the rest. e: the forget gate's argument, less v * c; becomes the exponential
    of the whole. move: becomes (c_prev - z) * (1 - f)."""
    add, multiply, subtract, divide, exp, less = np.add, np.multiply, np.subtract, np.divide, np.exp, np.less
    one, bound = np.ones((), e.dtype), np.full((), SMALL_F / (1 - SMALL_F), e.dtype)  # as arrays, which a ufunc need not convert
    weights: Any
    below: Any  # 1 + e
    small: Any
    if v is None:  # all of it is known beforehand
        exp(e, e)
        weights, below, small = repeat(None), add(e, one), less(e, bound)
    else:  # each step uses the same two rows
        weights = v if v.ndim == 2 else repeat(v)
        below, small = repeat(np.empty_like(states[0])), repeat(np.empty(states.shape[1], bool))
    stops = pad.steps if pad else repeat(None)
    c = states[0]
    # c = c - (c - z) / (1 + e), or (e*c + z) / (1 + e) where f = e / (1 + e) is small
    for new, zt, et, mt, vt, bt, st, stop in zip(states[1:], z, e, move, weights, below, small, stops, strict=False):
        if vt is not None:
            multiply(vt, c, mt)
            add(et, mt, et)
            exp(et, et)
            add(et, one, bt)
            less(et, bound, st)
        subtract(c, zt, mt)
        divide(mt, bt, mt)
        subtract(c, mt, new)
        (few,) = st.nonzero()
        for i in few if len(few) < 3 else [few]:  # an array of indices costs as much as three numbers
            new[i] = (et[i] * c[i] + zt[i]) / bt[i]
        if stop is not None:
            np.copyto(new, c, where=stop)
        c = new


def split(f: Array, g: Array, p: Array, out: Array) -> MaybeArray:
    """f as keep + p: 1 and p = -g or, where f is small, 0 and f. Returns keep, None where all are 1. An element's arithmetic
    does not depend on what the others are: 1 * c is c."""
    np.negative(g, p)
    (few,) = (f.reshape(-1) < SMALL_F).nonzero()  # flat: much faster than by rows and columns
    if not len(few):
        return None
    p.reshape(-1)[few] = f.reshape(-1)[few]
    out.fill(1)
    out.reshape(-1)[few] = 0
    return out


def run_carry(carry: Array, gc: Array, p: Array, keep: MaybeArray, q: MaybeArray, pad: Pad | None) -> None:
    """From the last step to the first: gc comes as gh * r*m * activation'(c), and the carry is added to it; then
    carry = keep*gc + (p*gc + q)."""
    add, multiply = np.add, np.multiply
    new, kept = np.empty_like(carry), np.empty_like(carry)
    for t in range(len(gc) - 1, -1, -1):
        row = gc[t]
        add(row, carry, row)
        multiply(p[t], row, new)
        if q is not None:
            add(new, q[t], new)
        if keep is not None:
            row = multiply(keep[t], row, kept)
        if pad is not None and (stop := pad.steps[t]) is not None:
            np.copyto(carry, np.add(new, row, new), where=~stop)
        else:
            add(new, row, carry)


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
    with np.errstate(all="ignore"), _Scratch() as scratch:
        for tile in _tiles(u, x, bias, weight_c, c0, mask_c, mask_pad, candidate, scale_x, mask_target, bidirectional):
            saved, h_part, c_part = Saved(length, save_every, tile.reverse), tile.part(h), tile.part(c)
            states, *room = scratch.arrays(tile, tile.block + 1, tile.block, tile.block, tile.block)
            states[0] = tile.c0
            for t0 in range(0, length, tile.block):
                t1 = min(t0 + tile.block, length)
                now, pad, (r, q, move) = states[: t1 - t0 + 1], tile.pad(t0, t1), (a[: t1 - t0] for a in room)
                v_f, v_r = tile.weights(t0, t1)
                run_states(now, tile.candidates(t0, t1), tile.argument(t0, t1, 1, out=r), move, v_f, pad)
                if h_part is not None:
                    tile.argument(t0, t1, 2, out=r)
                    if v_r is not None:
                        r += np.multiply(v_r, now[:-1], q)
                    gates(np.exp(r, r), q)
                    w, s = tile.skip_factor(r, q, out=move), tile.skip(t0, t1)
                    if tile.mask is not None:
                        r *= tile.mask
                    r *= activate(activation, now[1:])
                    if s is None:
                        tile.store(r, h_part, t0, t1, pad)
                    else:
                        tile.put(np.add, r, np.multiply(w, s, q), h_part, t0, t1, pad)
                if c_part is not None and save_every is not None:
                    tile.store(now[saved.rows(t0, t1)], c_part, *saved.indices(t0, t1))
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
    with np.errstate(all="ignore"), _Scratch() as scratch:
        for total in sums:
            if total is not None:
                total[...] = 0  # +0 has the same bits in every dtype, bfloat16 included
        totals = _Totals(u, *sums)
        for tile in _tiles(u, x, bias, weight_c, c0, mask_c, mask_pad, candidate, scale_x, mask_target, bidirectional):
            block, span = tile.block, min(length, tile.block if save_every == 1 else save_every + tile.block)
            carry, *room, gradients, states, e, move = scratch.arrays(
                tile, 1, block, block, block, block, 4 * block, span + 1, span, span
            )
            carry, gradients = carry[0], gradients.reshape(4, block, -1)
            history = History(tile, c, save_every, states, e, move)
            gh_part, gu_parts, gs_part = tile.part(grad_h), tile.parts(grad_u), tile.part(grad_x)
            gv_parts = tile.parts(grad_weight_c) if per_step else None
            if gu_parts and len(gu_parts) == 4:
                gs_part = gu_parts[3]
            carry[:] = 0 if grad_c_last is None else widen(grad_c_last[tile.b, tile.d], tile.dtype).reshape(-1)
            for t0 in reversed(range(0, length, block)):
                t1 = min(t0 + block, length)
                c_prev, c_next, f, adjoint = history.read(t0, t1)
                r, q, g, spare = (a[: t1 - t0] for a in room)
                gu1, gu2, p, carried = terms = gradients[:, : t1 - t0]
                gh, pad, (v_f, v_r) = tile.load(gh_part, t0, t1), tile.pad(t0, t1), tile.weights(t0, t1)
                # What does not depend on the carry: the reset gate's side, ...
                tile.argument(t0, t1, 2, out=r)
                if v_r is not None:
                    r += np.multiply(v_r, c_prev, p)
                gates(np.exp(r, r), q)
                a, da, s = activate(activation, c_next), slope(activation, c_next), tile.skip(t0, t1)
                difference = _reset_difference(a, s, tile.mask, tile.gate_mask, out=p)
                w = tile.skip_factor(r, q, out=spare)
                gc = np.multiply(gh, r, r)
                np.multiply(gc, q, gu2)  # a saturated gate's 0 first: gh * difference may overflow
                gu2 *= difference
                if gs_part is not None:
                    if tile.scaled:
                        w = np.multiply(w, tile.scale_x, q)
                    tile.put(np.multiply, gh, w, gs_part, t0, t1, pad)
                if tile.mask is not None:
                    gc *= tile.mask
                if da is not None:
                    gc *= da
                # ... and the forget gate's.
                gates(f, g)
                adjoint *= f  # A
                keep = split(f, g, p, out=spare)
                if v_f is not None:
                    p += np.multiply(adjoint, v_f, carried)
                run_carry(carry, gc, p, keep, None if v_r is None else np.multiply(gu2, v_r, carried), pad)
                # What does: gradients of the block.
                np.multiply(adjoint, gc, gu1)
                if grad_weight_c is not None:
                    np.multiply(terms[:2], c_prev, terms[2:])
                if pad:
                    np.copyto(terms, 0, where=pad.columns)
                if gu_parts is not None:
                    du0 = None if candidate == "identity" else slope(candidate, tile.load(tile.u[0], t0, t1))
                    if du0 is not None:
                        gc *= du0
                    tile.put(np.multiply, gc, g, gu_parts[0], t0, t1, pad)
                    tile.store(gu1, gu_parts[1], t0, t1)
                    tile.store(gu2, gu_parts[2], t0, t1)
                if gv_parts is not None:
                    tile.store(terms[2], gv_parts[0], t0, t1)
                    tile.store(terms[3], gv_parts[1], t0, t1)
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


class _Tile:
    """Some columns of one direction. A part is a tile's share of an operand, in the order in which time is processed: (L, n)
    where the layout allows that without a copy, else (L, b, d)."""

    def __init__(
        self, b: slice, d: slice, reverse: bool, u: Array, x: MaybeArray, bias: MaybeArray, weight_c: MaybeArray,
        c0: MaybeArray, mask_c: MaybeArray, mask_pad: MaybeArray, candidate: str, scale_x: float, mask_target: str,
    ) -> None:  # fmt: skip
        self.b, self.d, self.reverse = b, d, reverse
        self.shape = b.stop - b.start, d.stop - d.start
        self.columns = self.shape[0] * self.shape[1]
        self.dtype = state_dtype(u)
        self.block = max(1, min(len(u), BLOCK_BYTES // (self.dtype.itemsize * self.columns)))  # steps
        self.candidate, self.scale_x, self.gate_mask = candidate, self.dtype.type(scale_x), mask_target == "gate"
        self.u = self.parts(u)
        self.s = self.u[3] if u.shape[3] == 4 else self.part(x)
        self.scaled = u.shape[3] == 3 and scale_x != 1
        self.bias = None if bias is None else self.rows(bias)
        self.v_parts = self.parts(weight_c) if weight_c is not None and weight_c.ndim == 4 else None
        self.v = None if weight_c is None or weight_c.ndim == 4 else self.rows(weight_c)
        self.c0 = 0 if c0 is None else self.plane(c0)
        self.mask = None if mask_c is None else self.plane(mask_c)
        self.mask_pad = mask_pad if mask_pad is None else (mask_pad[::-1] if reverse else mask_pad)[:, b]

    def plane(self, a: Array) -> Array:
        """(B, D) as (n,)."""
        return widen(a[self.b, self.d], self.dtype).reshape(-1)

    def rows(self, a: Array) -> Array:
        """(2, D) as (2, n)."""
        full = np.empty((2, *self.shape), self.dtype)
        full[...] = widen(a[:, self.d], self.dtype)[:, None]
        return full.reshape(2, -1)

    def part(self, a: Any) -> Any:
        """Of (L, B, D), or None."""
        if a is None:
            return None
        a = (a[::-1] if self.reverse else a)[:, self.b, self.d]
        flat = self.shape[0] == 1 or a.strides[1] == self.shape[1] * a.strides[2]
        return a.reshape(len(a), self.columns) if flat else a

    def parts(self, a: MaybeArray) -> Any:
        """Of (L, B, D, k), or None."""
        return None if a is None else [self.part(a[..., j]) for j in range(a.shape[3])]

    def load(self, part: Array, t0: int, t1: int) -> Array:
        """(steps, n) in the state's dtype, to be read only: the caller's own memory where its layout allows."""
        block = part[t0:t1]
        return (block if block.dtype == self.dtype else widen(block, self.dtype)).reshape(len(block), self.columns)

    def store(self, block: Array, part: Array, t0: int, t1: int, pad: Pad | None = None) -> None:
        if pad:
            np.copyto(block, 0, where=pad.columns)
        out = part[t0:t1]
        narrow(block.reshape(out.shape), out)

    def put(self, ufunc: np.ufunc, a: Array, b: Array, part: Array, t0: int, t1: int, pad: Pad | None) -> None:
        """Stores ufunc(a, b), without a pass of its own where NumPy itself can write it."""
        if pad or part.dtype == np.uint16:
            self.store(ufunc(a, b), part, t0, t1, pad)
        else:
            out = part[t0:t1]
            ufunc(a.reshape(out.shape), b.reshape(out.shape), out, casting="same_kind")

    def argument(self, t0: int, t1: int, j: int, out: Array) -> Array:
        """u_j + b_j, to which v_j * c is to be added."""
        np.copyto(out, self.load(self.u[j], t0, t1))  # it is strided: a copy and a sum in place are faster than one sum
        if self.bias is not None:
            out += self.bias[j - 1]
        return out

    def candidates(self, t0: int, t1: int) -> Array:
        return activate(self.candidate, self.load(self.u[0], t0, t1))

    def weights(self, t0: int, t1: int) -> tuple[MaybeArray, MaybeArray]:
        if self.v is not None:
            return self.v[0], self.v[1]
        if self.v_parts is not None:
            return self.load(self.v_parts[0], t0, t1), self.load(self.v_parts[1], t0, t1)
        return None, None

    def skip(self, t0: int, t1: int) -> MaybeArray:
        if self.s is None:
            return None
        s = self.load(self.s, t0, t1)
        return np.multiply(s, self.scale_x) if self.scaled else s

    def skip_factor(self, r: Array, q: Array, out: Array) -> Array:
        """w = 1 - r, or 1 - m*r as (1 - r) + (1 - m)*r, which does not cancel at m = 1."""
        if self.mask is None or not self.gate_mask:
            return q
        np.multiply(r, 1 - self.mask, out)
        return np.add(q, out, out)

    def pad(self, t0: int, t1: int) -> Pad | None:
        if self.mask_pad is None:
            return None
        mask = self.mask_pad[t0:t1] != 0
        if not mask.any():
            return None
        columns = np.repeat(mask, self.shape[1], axis=1)
        return Pad(columns, [row if row.any() else None for row in columns])


def _tiles(
    u: Array, x: MaybeArray, bias: MaybeArray, weight_c: MaybeArray, c0: MaybeArray, mask_c: MaybeArray, mask_pad: MaybeArray,
    candidate: str, scale_x: float, mask_target: str, bidirectional: bool,
) -> Iterator[_Tile]:  # fmt: skip
    _, batch, dim, _ = u.shape
    width = dim // 2 if bidirectional else dim
    operands = u, x, bias, weight_c, c0, mask_c, mask_pad, candidate, scale_x, mask_target
    for start in range(0, dim, width or 1):
        for d0 in range(start, start + width, TILE_COLUMNS):
            d = slice(d0, min(d0 + TILE_COLUMNS, start + width))
            rows = max(1, TILE_COLUMNS // (d.stop - d.start))
            for b0 in range(0, batch, rows):
                yield _Tile(slice(b0, min(b0 + rows, batch)), d, start > 0, *operands)


class _Scratch:
    """Arrays for what is computed, in memory that a call before has left: fresh memory costs a page fault every 4 KB. Who takes
    memory from the list has it alone, be it another thread or a signal's handler within this call: each access to the list is
    one step of the interpreter's."""

    kept: ClassVar[list[Array]] = []

    def __enter__(self) -> _Scratch:
        try:
            self.memory = self.kept.pop()
        except IndexError:
            self.memory = np.empty(0, np.uint8)
        return self

    def __exit__(self, *exception: object) -> None:
        self.kept.append(self.memory)
        with contextlib.suppress(IndexError):  # another thread's calls may have emptied it
            while sum([a.nbytes for a in self.kept[:]]) > ALL_KEPT_BYTES:
                self.kept.pop(0)  # the one that has been there longest

    def arrays(self, tile: _Tile, *rows: int) -> list[Array]:
        """One of (rows, n) for each number; they replace those of the tile before."""
        nbytes = sum(rows) * tile.columns * tile.dtype.itemsize
        memory = self.memory if nbytes <= self.memory.nbytes else np.empty(nbytes, np.uint8)
        if nbytes <= KEPT_BYTES:
            self.memory = memory
        whole = memory[:nbytes].view(tile.dtype).reshape(-1, tile.columns)
        arrays, start = [], 0
        for count in rows:
            arrays.append(whole[start : start + count])
            start += count
        return arrays


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

    def __init__(self, tile: _Tile, c: Array, every: int, states: Array, e: Array, move: Array) -> None:
        self.tile, self.c, self.saved = tile, tile.part(c), Saved(len(tile.u[0]), every, tile.reverse)
        self.low = self.saved.length  # states[i] is the state after low + i steps, e[i] and move[i] go with the next one
        self.spans = states, e, move

    def read(self, t0: int, t1: int) -> tuple[Array, Array, Array, Array]:
        """For the steps [t0, t1), (steps, n) each: the states before and after, the exponential of the forget gate's argument,
        and (c_prev - z) * (1 - f). The last two are the caller's to change. Blocks are read from the last to the first."""
        if self.saved.every == 1:
            return self._read_saved(t0, t1)
        if t0 < self.low:
            self._run_again(t0, t1)
        states, e, move = self.spans
        now, after = slice(t0 - self.low, t1 - self.low), slice(t0 - self.low + 1, t1 - self.low + 1)
        return states[now], states[after], e[now], move[now]

    def _read_saved(self, t0: int, t1: int) -> tuple[Array, Array, Array, Array]:
        tile = self.tile
        e, move = (a[: t1 - t0] for a in self.spans[1:])
        if t0 > 0:
            states = tile.load(self.c, t0 - 1, t1)
        else:
            states = self.spans[0][: t1 + 1]
            states[0] = tile.c0
            states[1:] = tile.load(self.c, 0, t1)
        v_f, _ = tile.weights(t0, t1)
        tile.argument(t0, t1, 1, out=e)
        if v_f is not None:
            e += np.multiply(v_f, states[:-1], move)
        np.exp(e, e)
        np.subtract(states[:-1], tile.candidates(t0, t1), move)
        move /= e + 1
        return states[:-1], states[1:], e, move

    def _run_again(self, t0: int, t1: int) -> None:
        """From the last state saved at or before t0, c0 if there is none, to where the block after this one began to."""
        tile, saved, known = self.tile, self.saved, self.low
        states, e, move = self.spans
        i = (t0 - saved.first) // (saved.every or 1)
        self.low = low = saved.end(i) if i >= 0 else 0
        if rest := t1 - known:  # steps of this block that were run with the block after it
            states[known - low + 1 : t1 - low + 1] = states[1 : rest + 1]  # NumPy sees to the overlap
            e[known - low : t1 - low] = e[:rest]
            move[known - low : t1 - low] = move[:rest]
        states[0] = tile.c0 if i < 0 else tile.load(self.c, i, i + 1)[0]
        for t in range(low, known, tile.block):
            end = min(t + tile.block, known)
            now, after = slice(t - low, end - low), slice(t - low, end - low + 1)
            argument, (v_f, _) = tile.argument(t, end, 1, out=e[now]), tile.weights(t, end)
            run_states(states[after], tile.candidates(t, end), argument, move[now], v_f, tile.pad(t, end))


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
