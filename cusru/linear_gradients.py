"""The linear recurrence's gradients, written as operations that have derivatives themselves: of torch or of JAX, whose module is
`xp`. What runs back through a step is a linear recurrence that runs the other way, and so on for the derivatives of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def gradients(
    xp: Any, recurrence: Callable[..., tuple[Any, Any]], grad_h: Any, grad_c_last: Any, a: Any, b: Any, c0: Any, padded: Any,
    begins: Any, *, form: str, bidirectional: bool, save_every: int | None, reverse: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Of a, b and c0, all in the state's dtype.

    recurrence: the framework's own, differentiable. grad_h, a, b: (L, B, D); grad_c_last, c0: (B, D); padded, begins: (L, B, 1),
    bool, or None. Padded steps are steps that change nothing, for the states between are needed here."""
    if padded is not None:
        a = xp.where(padded, 1.0 if form == "affine" else 0.0, a)
        b, grad_h = xp.where(padded, 0, b), xp.where(padded, 0, grad_h)
    ways: dict[str, Any] = dict(bidirectional=bidirectional, save_every=save_every)
    c, _ = recurrence(a, b, form=form, c0=c0, starts=None if begins is None else begins[..., 0], reverse=reverse, **ways)
    through = a * grad_h if form == "affine" else grad_h - a * grad_h
    ends = None
    if begins is not None:  # what ends at the first step is c0's gradient, and no column that runs backward looks at it
        ends = xp.concatenate([xp.zeros_like(begins[:1]), begins[1:]])
    carry, left = recurrence(
        a, through, form="affine" if form == "affine" else "complement", c0=grad_c_last,
        starts=None if ends is None else ends[..., 0], reverse=not reverse, **ways,
    )  # fmt: skip
    half = b.shape[2] // 2 if bidirectional else b.shape[2]
    before, arriving, grad_c0 = [], [], []
    for columns, backward in ((slice(0, half), reverse), (slice(half, None), not reverse)):
        before.append(_shift(xp, c[..., columns], c0[..., columns], begins, backward))
        arriving.append(_shift(xp, carry[..., columns], grad_c_last[..., columns], ends, not backward))
        ignored = begins is not None and not backward and b.shape[0]
        grad_c0.append(xp.where(begins[0], 0, left[..., columns]) if ignored else left[..., columns])
    c_prev, gc = xp.concatenate(before, -1), grad_h + xp.concatenate(arriving, -1)
    if form == "blend":
        grad_a, grad_b = gc * (b - c_prev), gc * a
    else:
        grad_a, grad_b = gc * (c_prev if form == "affine" else -c_prev), gc
    if padded is not None:
        grad_a, grad_b = xp.where(padded, 0, grad_a), xp.where(padded, 0, grad_b)
    return grad_a, grad_b, xp.concatenate(grad_c0, -1)


def _shift(xp: Any, states: Any, first: Any, begins: Any, backward: bool) -> Any:
    """The states before each step, from those after it: of columns that run forward or backward in time."""
    first = first[None][: states.shape[0]]
    shifted = xp.concatenate([states[1:], first] if backward else [first, states[:-1]])
    if begins is None:
        return shifted
    return xp.where(xp.concatenate([begins[1:], xp.zeros_like(begins[:1])]) if backward else begins, 0, shifted)
