"""The recurrences as `torch.onnx.export` can write them: cusru.torch.operator imports this in an export to ONNX, and only then.

All but the walk over time are plain operations of torch, on all of time at once. The walk is ONNX's Scan: the exporter on
torch.export makes it of torch's own scan, and the one on TorchScript is told how to write it. Neither gives the model an operator
that is not ONNX's.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from cusru.reference import SELU_ALPHA, SELU_SCALE
from cusru.torch.operator import sizes_of


def sru_forward(
    u: Tensor, x: Tensor | None, bias: Tensor | None, weight_c: Tensor | None, c0: Tensor | None, mask_c: Tensor | None,
    mask_pad: Tensor | None, scale_x: Tensor | None, scale: float, activation: str, candidate: str, mask_target: str,
    bidirectional: bool, save_every: int, starts: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`torch.ops.cusru.sru_forward`, its arguments and results, but for c, which is empty: as a decomposition of that operator it
    makes a program of torch.export one that torch.onnx.export takes. The arguments have been checked.
    """
    state = torch.float64 if u.dtype == torch.float64 else torch.float32
    per_step = weight_c is not None and weight_c.dim() == 4
    b_f, b_r = _rows(bias, state)
    v_f, v_r = _rows(weight_c, state)
    u0, u1, u2, *skip = _to(u, state).unbind(-1)
    z = u0.tanh() if candidate == "tanh" else u0
    forget = u1 if b_f is None else u1 + b_f
    reset = u2 if b_r is None else u2 + b_r
    c = u0.new_zeros(u0.shape[1:]) if c0 is None else _to(c0, state)
    pad = _pad(mask_pad)
    if pad is not None:  # a forget gate of exactly 1, and finite data whatever lies there: the state passes
        forget, z = forget.masked_fill(pad, torch.inf), z.masked_fill(pad, 0)
        if v_f is not None and per_step:
            v_f = v_f.masked_fill(pad, 0)

    c_last, before, after = _walk("gate", c, forget, z, v_f, per_step, starts, bidirectional, reverse)
    r = _sigmoid(reset if v_r is None else reset + v_r * before)
    gate = r if mask_c is None else r * _to(mask_c, state)
    h = gate * _activate(after, activation)
    s = _to(x, state) if x is not None else skip[0] if skip else None
    if x is not None:
        s = _times(s, scale) if scale_x is None else s * _to(scale_x, state).reshape(())
    if s is not None:
        h = h + (_one(r) - (r if mask_target == "state" else gate)) * s
    if pad is not None:
        h = h.masked_fill(pad, 0)
    return _to(h, u.dtype), c.new_empty(0), c_last


def qrnn_forward(
    u: Tensor, c0: Tensor | None, mask_pad: Tensor | None, zoneout: Tensor | None, p: float, pooling: str, gate: str,
    bidirectional: bool, save_every: int, starts: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`torch.ops.cusru.qrnn_forward`, likewise."""
    state = torch.float64 if u.dtype == torch.float64 else torch.float32
    u0, u1, *rest = _to(u, state).unbind(-1)
    z, moved = u0.tanh(), _sigmoid(-u1 if gate == "forget" else u1)
    i = _sigmoid(rest[1]) if pooling == "ifo" else None
    if zoneout is not None:
        zoned = _to(zoneout, torch.bool)
        moved, i = moved.masked_fill(zoned, 0), None if i is None else i.masked_fill(zoned, 0)
    elif p:
        moved, i = _times(moved, 1 - p), None if i is None else _times(i, 1 - p)
    summand = (moved if i is None else i) * z
    pad = _pad(mask_pad)
    if pad is not None:
        moved, summand = moved.masked_fill(pad, 0), summand.masked_fill(pad, 0)
    c = u0.new_zeros(u0.shape[1:]) if c0 is None else _to(c0, state)
    c_last, _, h = _walk("complement", c, moved, summand, None, False, starts, bidirectional, reverse)
    if pooling != "f":
        h = _sigmoid(rest[0]) * h
    if pad is not None:
        h = h.masked_fill(pad, 0)
    return _to(h, u.dtype), c.new_empty(0), c_last


def linear_recurrence_forward(
    a: Tensor, b: Tensor, c0: Tensor | None, mask_pad: Tensor | None, form: str, bidirectional: bool, save_every: int,
    starts: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`torch.ops.cusru.linear_recurrence_forward`, likewise."""
    state = torch.float64 if b.dtype == torch.float64 else torch.float32
    summand = _to(b, state)
    factor = _to(a, state)
    if form == "blend":
        summand = factor * summand
    if a.dim() < 3:
        factor = factor + torch.zeros_like(summand)  # of all steps
    pad = _pad(mask_pad)
    if pad is not None:
        factor, summand = factor.masked_fill(pad, 1 if form == "affine" else 0), summand.masked_fill(pad, 0)
    c = summand.new_zeros(summand.shape[1:]) if c0 is None else _to(c0, state)
    kind = "affine" if form == "affine" else "complement"
    c_last, _, h = _walk(kind, c, factor, summand, None, False, starts, bidirectional, reverse)
    if pad is not None:
        h = h.masked_fill(pad, 0)
    return _to(h, b.dtype), c.new_empty(0), c_last


def _pad(mask_pad: Tensor | None) -> Tensor | None:
    return None if mask_pad is None else _to(mask_pad, torch.bool).unsqueeze(-1)


def _to(a: Tensor, dtype: torch.dtype) -> Tensor:
    """The tracer would write a conversion that converts nothing."""
    return a if a.dtype == dtype else a.to(dtype)


def _rows(a: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The forget gate's part of a parameter and the reset gate's: (D,), or per step (L, B, D)."""
    if a is None:
        return None, None
    forget, reset = _to(a, dtype).unbind(-1) if a.dim() == 4 else _to(a, dtype).reshape(2, -1).unbind(0)
    return forget, reset


def _sigmoid(a: Tensor) -> Tensor:
    """Not ONNX's Sigmoid, whose error in onnxruntime is relative to 1 and not to itself: a gate nearly shut would lose digits."""
    return torch.reciprocal(_one(a) + torch.exp(-a))


def _one(a: Tensor) -> Tensor:
    """As a tensor: of Python's numbers the exporter on torch.export makes tensors, late, and then takes the one sample or the one
    step of an example for the size that is always there."""
    return torch.ones((), dtype=a.dtype, device=a.device)


def _activate(c: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return c.tanh()
    if activation == "relu":
        return c.relu()
    if activation == "selu":  # onnxruntime has ONNX's in float32 alone, and ONNX has no expm1
        below = c.clamp(max=0)
        expm1 = torch.tanh(_times(below, 0.5)) * (torch.exp(below) + _one(c))
        return _times(c.clamp(min=0), SELU_SCALE) + _times(expm1, SELU_SCALE * SELU_ALPHA)
    return c


def _times(a: Tensor, number: float) -> Tensor:
    """The exporter on torch.export rounds Python's floats to float32: exact are integers and powers of 2."""
    if a.dtype != torch.float64 or not math.isfinite(number):
        return a * torch.full((), number, dtype=a.dtype, device=a.device)
    mantissa, exponent = math.frexp(number)
    numerator = torch.full((), int(mantissa * 2**53), dtype=torch.int64, device=a.device)
    return a * (numerator.to(a.dtype) * torch.full((), 2.0 ** (exponent - 53), dtype=a.dtype, device=a.device))


# ---- the walk over time --------------------------------------------------------------------------------------------
#
# Of c (B, D) and two arrays (L, B, D) of a step's numbers: "gate", forget and z of SRU, with v: None, (D,) or per step (L, B, D);
# "affine" and "complement", a factor and a summand. The last state, and those before and after each step.

Walk = tuple[Tensor, Tensor, Tensor]


def _walk(
    kind: str, c: Tensor, first: Tensor, second: Tensor, v: Tensor | None, per_step: bool, starts: Tensor | None,
    bidirectional: bool, reverse: bool,
) -> Walk:  # fmt: skip
    half = sizes_of(first)[-1] // (2 if bidirectional else 1)

    def turn(a: Tensor) -> Tensor:
        """In the order of the steps, and back."""
        if not bidirectional:
            return a.flip(0) if reverse else a
        forth, back = a[..., :half], a[..., half:]
        return torch.cat((forth.flip(0), back) if reverse else (forth, back.flip(0)), -1)

    begin = None
    if starts is not None:
        forth = _to(starts, torch.bool).unsqueeze(-1)
        back = torch.cat((forth[1:], torch.zeros_like(forth[:1])))  # where, in time, the next sequence starts
        ways = [way.expand(-1, -1, half) for way in ((back, forth) if reverse else (forth, back))]
        begin = turn(torch.cat(ways, -1) if bidirectional else ways[0])
    run = _ScriptedScan.apply if torch.jit.is_tracing() else _scan
    weight = turn(v) if v is not None and per_step else v
    c_last, before, after = run(kind, c, turn(first), turn(second), weight, per_step, begin)
    return c_last, turn(before), turn(after)


def _step(kind: str, c: Tensor, first: Tensor, second: Tensor, v: Tensor | None = None) -> Tensor:
    """f * c + (1 - f) * z, with 1 - f = 1 / (1 + exp(forget + v * c)), which keeps its digits where the gate is nearly open."""
    if kind == "gate":
        return c + (second - c) / (_one(c) + torch.exp(first if v is None else first + v * c))
    return (first * c if kind == "affine" else c - first * c) + second


def _scan(kind: str, c: Tensor, first: Tensor, second: Tensor, v: Tensor | None, per_step: bool, begin: Tensor | None) -> Walk:
    def step(before: Tensor, *of_step: Tensor) -> list[Tensor]:
        if begin is not None:
            start, *of_step = of_step  # type: ignore[assignment]
            before = before.masked_fill(start, 0)
        after = _step(kind, before, *of_step)
        return [after, before.clone(), after.clone()]  # they must not share memory

    fixed, varying = [] if v is None or per_step else [v], [v] if v is not None and per_step else []
    starts = [] if begin is None else [begin]
    c_last, before, after = torch.ops.higher_order.scan(step, [c], [*starts, first, second, *varying], fixed)
    return c_last, before, after


class _ScriptedScan(torch.autograd.Function):
    """The same for the tracer, which takes a node of the graph from `symbolic` and the node's results from `forward`."""

    @staticmethod
    def forward(
        ctx: Any, kind: str, c: Tensor, first: Tensor, second: Tensor, v: Tensor | None, per_step: bool, begin: Tensor | None
    ) -> Walk:
        weights = v.unbind() if v is not None and per_step else itertools.repeat(v)
        starts = begin.unbind() if begin is not None else itertools.repeat(None)
        before, after = [], []
        for start, *of_step in zip(starts, first.unbind(), second.unbind(), weights, strict=False):
            before.append(c if start is None else c.masked_fill(start, 0))
            c = _step(kind, before[-1], *of_step)
            after.append(c)
        return c.clone(), torch.stack(before), torch.stack(after)

    @staticmethod
    def symbolic(g: Any, kind: str, c: Any, first: Any, second: Any, v: Any, per_step: bool, begin: Any) -> tuple[Any, Any, Any]:
        body = torch._C.Graph()
        one_step = c.type().with_sizes([None, None])
        count = itertools.count()

        def named(value: Any, type_: Any = one_step) -> Any:
            value.setDebugName(f"sru_step_{next(count)}")  # what is known of a value is kept by name: none of the graph around
            value.setType(type_)
            return value

        def op(kind: str, *inputs: Any, type_: Any = one_step) -> Any:
            return named(body.insertNode(body.create(f"onnx::{kind}", list(inputs), 1)).output(), type_)

        def number(value: float) -> Any:
            constant = op("Constant", type_=c.type().with_sizes([]))
            constant.node().t_("value", torch.full((), value, dtype=c.type().dtype()))
            return constant

        carried, varying, fixed = [c], [first, second], []
        now = named(body.addInput())
        if v is not None and not per_step:  # carried along: the body sees nothing of the graph around it
            carried.append(v)
            fixed.append(named(body.addInput(), v.type()))
        elif v is not None:
            varying.append(v)
        of_first, of_second, *weight = (named(body.addInput()) for _ in varying)
        before = now
        if begin is not None:
            varying.append(begin)
            start = named(body.addInput(), begin.type().with_sizes([None, None]))
            before = op("Where", start, number(0), now)
        if kind == "gate":
            for w in weight + fixed:
                of_first = op("Add", of_first, op("Mul", w, before))
            after = op("Add", before, op("Div", op("Sub", of_second, before), op("Add", number(1), op("Exp", of_first))))
        else:
            product = op("Mul", of_first, before)
            after = op("Add", product if kind == "affine" else op("Sub", before, product), of_second)
        for value in (after, *fixed, before, after):
            body.registerOutput(op("Identity", value, type_=value.type()))  # each a value of its own, and no input
        n = len(varying)
        c_last, *_, b, a = g.op("Scan", *carried, *varying, outputs=len(carried) + 2, body_g=body, num_scan_inputs_i=n)
        for result, like in ((c_last, c), (b, second), (a, second)):
            result.setType(like.type())
        return c_last, b, a
