"""The recurrence as `torch.onnx.export` can write it: cusru.torch.operator imports this in an export to ONNX, and only then.

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
    bidirectional: bool, save_every: int,
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
    pad = None if mask_pad is None else _to(mask_pad, torch.bool).unsqueeze(-1)
    if pad is not None:  # a forget gate of exactly 1, and finite data whatever lies there: the state passes
        forget, z = forget.masked_fill(pad, torch.inf), z.masked_fill(pad, 0)
        if v_f is not None and per_step:
            v_f = v_f.masked_fill(pad, 0)

    turn = _reverse_second_half if bidirectional else _leave  # in the order of the steps, and back
    run = _ScriptedScan.apply if torch.jit.is_tracing() else _scan
    c_last, before, after = run(c, turn(forget), turn(z), turn(v_f) if v_f is not None and per_step else v_f, per_step)

    r = _sigmoid(reset if v_r is None else reset + v_r * turn(before))
    gate = r if mask_c is None else r * _to(mask_c, state)
    h = gate * _activate(turn(after), activation)
    s = _to(x, state) if x is not None else skip[0] if skip else None
    if x is not None:
        s = _times(s, scale) if scale_x is None else s * _to(scale_x, state).reshape(())
    if s is not None:
        h = h + (_one(r) - (r if mask_target == "state" else gate)) * s
    if pad is not None:
        h = h.masked_fill(pad, 0)
    return _to(h, u.dtype), c.new_empty(0), c_last


def _to(a: Tensor, dtype: torch.dtype) -> Tensor:
    """The tracer would write a conversion that converts nothing."""
    return a if a.dtype == dtype else a.to(dtype)


def _rows(a: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The forget gate's part of a parameter and the reset gate's: (D,), or per step (L, B, D)."""
    if a is None:
        return None, None
    forget, reset = _to(a, dtype).unbind(-1) if a.dim() == 4 else _to(a, dtype).reshape(2, -1).unbind(0)
    return forget, reset


def _leave(a: Tensor) -> Tensor:
    return a


def _reverse_second_half(a: Tensor) -> Tensor:
    half = sizes_of(a)[-1] // 2
    return torch.cat((a[..., :half], a[..., half:].flip(0)), -1)


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
# Of c (B, D), forget and z (L, B, D), v: None, (D,) or per step (L, B, D), the last state, and those before and after each step.


def _step(c: Tensor, forget: Tensor, z: Tensor, v: Tensor | None = None) -> Tensor:
    """f * c + (1 - f) * z, with 1 - f = 1 / (1 + exp(forget + v * c)), which keeps its digits where the gate is nearly open."""
    return c + (z - c) / (_one(c) + torch.exp(forget if v is None else forget + v * c))


def _scan(c: Tensor, forget: Tensor, z: Tensor, v: Tensor | None, per_step: bool) -> tuple[Tensor, Tensor, Tensor]:
    def step(before: Tensor, *of_step: Tensor) -> list[Tensor]:
        after = _step(before, *of_step)
        return [after, before.clone(), after.clone()]  # they must not share memory

    fixed, varying = [] if v is None or per_step else [v], [v] if per_step else []
    c_last, before, after = torch.ops.higher_order.scan(step, [c], [forget, z, *varying], fixed)
    return c_last, before, after


class _ScriptedScan(torch.autograd.Function):
    """The same for the tracer, which takes a node of the graph from `symbolic` and the node's results from `forward`."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, forget: Tensor, z: Tensor, v: Tensor | None, per_step: bool) -> tuple[Tensor, ...]:
        weights = v.unbind() if v is not None and per_step else itertools.repeat(v)
        states = [c]
        for of_step in zip(forget.unbind(), z.unbind(), weights, strict=False):
            states.append(_step(states[-1], *of_step))
        return states[-1].clone(), torch.stack(states[:-1]), torch.stack(states[1:])

    @staticmethod
    def symbolic(g: Any, c: Any, forget: Any, z: Any, v: Any, per_step: bool) -> tuple[Any, Any, Any]:
        body = torch._C.Graph()
        one_step = c.type().with_sizes([None, None])
        count = itertools.count()

        def named(value: Any, type_: Any = one_step) -> Any:
            value.setDebugName(f"sru_step_{next(count)}")  # what is known of a value is kept by name: none of the graph around
            value.setType(type_)
            return value

        def op(kind: str, *inputs: Any, type_: Any = one_step) -> Any:
            return named(body.insertNode(body.create(f"onnx::{kind}", list(inputs), 1)).output(), type_)

        carried, varying, fixed = [c], [forget, z], []
        now = named(body.addInput())
        if v is not None and not per_step:  # carried along: the body sees nothing of the graph around it
            carried.append(v)
            fixed.append(named(body.addInput(), v.type()))
        elif v is not None:
            varying.append(v)
        logit, candidate, *weight = (named(body.addInput()) for _ in varying)
        for w in weight + fixed:
            logit = op("Add", logit, op("Mul", w, now))
        one = op("Constant", type_=c.type().with_sizes([]))
        one.node().t_("value", torch.ones((), dtype=c.type().dtype()))
        after = op("Add", now, op("Div", op("Sub", candidate, now), op("Add", one, op("Exp", logit))))
        for value in (after, *fixed, now, after):
            body.registerOutput(op("Identity", value, type_=value.type()))  # each a value of its own, and no input
        n = len(varying)
        c_last, *_, b, a = g.op("Scan", *carried, *varying, outputs=len(carried) + 2, body_g=body, num_scan_inputs_i=n)
        for result, like in ((c_last, c), (b, z), (a, z)):
            result.setType(like.type())
        return c_last, b, a
