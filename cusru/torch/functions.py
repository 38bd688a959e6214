"""The recurrences in PyTorch, differentiable: `sru`, `qrnn`, `linear_recurrence`. `operator.py` runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cusru import linear_gradients
from cusru.problem import Options
from cusru.torch import operator
from cusru.torch.compiler import when_loaded
from cusru.torch.operator import SAVE_EVERY


def sru(
    u: Tensor,
    x: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    weight_c: Tensor | None = None,
    c0: Tensor | None = None,
    mask_c: Tensor | None = None,
    mask_pad: Tensor | None = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: float | Tensor = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The SRU recurrence over all steps of all columns, differentiable.

    At each step of a column, with u = (u0, u1, u2[, u3])::

        f = sigmoid(u1 + b_f + v_f * c_prev)
        r = sigmoid(u2 + b_r + v_r * c_prev)
        c = f * c_prev + (1 - f) * candidate(u0)
        h = r * mask_c * activation(c) + (1 - r) * s          s = scale_x * x, or u3, or 0

    (Lei et al. 2018, https://arxiv.org/abs/1709.02755, equations 3 to 6.) Works under autograd, torch.compile, torch.export,
    torch.func.grad and vmap, activation checkpointing and CUDA graphs, on the current stream, with memory of torch's
    allocator. Derivatives are those of reverse mode, once.

    Args:
        u: (L, B, D, k), k = 3 or 4: the projected input, float64, float32, float16 or bfloat16. The state is kept in float64
            for float64 and in float32 for the others; candidate and state may reach half that dtype's largest number.
        x: (L, B, D), u's dtype: the skip input, with k = 3; absent: no skip.
        bias: (2, D) or (2*D,): forget row, reset row. Parameters, `c0` and `mask_c` are in u's dtype or the state's.
        weight_c: (2, D) or (2*D,): v of SRU v2; or per step (L, B, D, 2); absent: SRU v1.
        c0: (B, D): initial state; absent: zeros.
        mask_c: (B, D): dropout mask, the same at every step, already scaled by 1 / (1 - p); no gradient.
        mask_pad: (L, B), bool or uint8: non-zero where a step is padding: there the state passes and h is 0.
        activation: "identity", "tanh", "relu" or "selu".
        candidate: "identity" (SRU) or "tanh" (QRNN).
        scale_x: a number, or a tensor of one element, of u's dtype or the state's, that the kernel reads; no gradient.
        mask_target: "state": h as above. "gate": h = s + mask_c * r * (activation(c) - s), as in the sru package from 2.5 on.
        bidirectional: D is even, and the second half of the columns runs backward in time.
        save_every: one state in so many is kept for the backward, which recomputes the others bit for bit; a few, of 64 KB or
            less, may all be kept. None: none is kept, and there is no backward.
        starts: (L, B), bool or uint8: non-zero where a new sequence begins, in time: there the state before the step is 0,
            whatever came before, c0 included. A reversed column begins anew where its sequence ends. So one call serves packed
            documents or episodes, with the results of the pieces run by themselves.
        reverse: every column runs against its direction: all backward in time; with `bidirectional` the halves change places.

    Tensors may have any strides; none is copied. h lies in memory as u does: batch-first u, as a transposed view, makes
    batch-first h.

    Returns:
        h: (L, B, D), u's dtype; and c_last: (B, D), the state's dtype, the state after each column's last step.

    Raises:
        ValueError: a shape, a device or an option; names the argument.
        TypeError: a dtype, an object that is no tensor, or a gradient asked for `mask_c` or `scale_x`.
        NotImplementedError: forward-mode differentiation, or a derivative of the gradients.
        ImportError, RuntimeError: CUDA tensors without CuPy or without a working CUDA.
    """
    return _sru(
        u, x, bias, weight_c, c0, mask_c, mask_pad, starts, scale_x, activation, candidate, mask_target, bidirectional,
        save_every, reverse,
    )  # fmt: skip


def qrnn(
    u: Tensor,
    *,
    pooling: str = "fo",
    gate: str = "forget",
    c0: Tensor | None = None,
    zoneout: float | Tensor | None = None,
    mask_pad: Tensor | None = None,
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The Quasi-RNN's pooling over all steps of all columns, differentiable.

    At each step of a column, with u = (u0, u1[, u2[, u3]]), the results of the convolution::

        z = tanh(u0)        f = sigmoid(u1), or 1 - sigmoid(u1) with gate="update"
        c = f * c_prev + (1 - f) * z,       h = c                       pooling="f"
        c = f * c_prev + (1 - f) * z,       h = sigmoid(u2) * c         pooling="fo"
        c = f * c_prev + sigmoid(u3) * z,   h = sigmoid(u2) * c         pooling="ifo"

    (Bradbury et al. 2016, https://arxiv.org/abs/1611.01576, equations 3 to 5.) Works where `sru` does. Derivatives are those of
    reverse mode, once.

    Args:
        u: (L, B, D, k), k = 2 for pooling "f", 3 for "fo", 4 for "ifo": float64, float32, float16 or bfloat16. The state is kept
            in float64 for float64 and in float32 for the others.
        pooling: "f", "fo" or "ifo".
        gate: "forget": sigmoid(u1) is what is kept (the paper's). "update": it is what is taken in (torchqrnn's, fastai's).
        c0: (B, D), u's dtype or the state's: initial state; absent: zeros.
        zoneout: p, a number from 0 to 1, the expectation (evaluation): f becomes 1 - (1 - p) * (1 - f), and i = sigmoid(u3)
            becomes (1 - p) * i. Or a tensor (L, B, D), bool or uint8 (training): where it is non-zero f is 1 and i is 0.
        mask_pad, bidirectional, save_every, starts, reverse: as for `sru`.

    Returns:
        h: (L, B, D), u's dtype; and c_last: (B, D), the state's dtype, the state after each column's last step.

    Raises:
        As `sru`.
    """
    return _qrnn(u, c0, mask_pad, starts, zoneout, pooling, gate, bidirectional, save_every, reverse)


def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    form: str = "affine",
    c0: Tensor | None = None,
    mask_pad: Tensor | None = None,
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The linear recurrence over all steps of all columns, differentiable, as often as you like.

    At each step of a column::

        c = a * c_prev + b                      form="affine"
        c = (1 - a) * c_prev + b                form="complement": computed as c_prev - a * c_prev + b: an a near 0 counts
        c = (1 - a) * c_prev + a * b            form="blend": likewise; exact at a = 0 and a = 1
        h = c

    (Martin and Cundy 2018, https://arxiv.org/abs/1709.04057, equation 5.) Works where `sru` does. Its derivative is a linear
    recurrence that runs the other way, and so are the derivatives of that: reverse mode, any number of times.

    Args:
        a: (L, B, D), or the same at every step (B, D), or in every batch too (D,): b's dtype or the state's; any real values.
        b: (L, B, D): float64, float32, float16 or bfloat16. The state is kept in float64 for float64 and in float32 for the
            others.
        form: "affine", "complement" or "blend".
        c0: (B, D), b's dtype or the state's: initial state; absent: zeros.
        mask_pad, bidirectional, save_every, starts, reverse: as for `sru`.

    Returns:
        h: (L, B, D), b's dtype: c, and 0 at a padded step; and c_last: (B, D), the state's dtype, the state after each column's
        last step.

    Raises:
        As `sru`, but that a derivative of the gradients is no error.
    """
    return _linear_recurrence(a, b, c0, mask_pad, starts, form, bidirectional, save_every, reverse)


# What torch.compile takes as it is: it is to trace the operators alone, not the checks and rules around them. Tensors by their
# slots, then the options.


def _sru(
    u: Any, x: Any, bias: Any, weight_c: Any, c0: Any, mask_c: Any, mask_pad: Any, starts: Any, scale_x: Any, activation: Any,
    candidate: Any, mask_target: Any, bidirectional: Any, save_every: Any, reverse: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = u, x, bias, weight_c, c0, mask_c, mask_pad, starts, None, scale_x
    return operator.run("sru", inputs, Options((activation, candidate, mask_target), bidirectional, save_every, reverse))


def _qrnn(
    u: Any, c0: Any, mask_pad: Any, starts: Any, zoneout: Any, pooling: Any, gate: Any, bidirectional: Any, save_every: Any,
    reverse: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = u, None, None, None, c0, None, mask_pad, starts, zoneout
    return operator.run("qrnn", inputs, Options((pooling, gate), bidirectional, save_every, reverse))


def _linear_recurrence(
    a: Any, b: Any, c0: Any, mask_pad: Any, starts: Any, form: Any, bidirectional: Any, save_every: Any, reverse: Any
) -> tuple[Tensor, Tensor]:
    inputs = b, None, None, a, c0, None, mask_pad, starts
    return operator.run("linear_recurrence", inputs, Options((form,), bidirectional, save_every, reverse))


def _tell_dynamo() -> None:
    for function in (_sru, _qrnn, _linear_recurrence):
        torch.compiler.allow_in_graph(function)


when_loaded("torch._dynamo", _tell_dynamo)


# ---- the gradients of the linear recurrence as functions that have derivatives ------------------------------------------------


def _gradients(
    grad_h: Tensor, grad_c_last: Tensor | None, a: Tensor, b: Tensor, c0: Tensor | None, mask_pad: Tensor | None, form: str,
    bidirectional: bool, save_every: int | None, starts: Tensor | None, reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Of a, b and c0."""
    state = operator.state_dtype(b)
    zeros = b.new_zeros(b.shape[1:], dtype=state)
    first, last = (zeros if t is None else t.to(state) for t in (c0, grad_c_last))
    padded, begins = (None if mask is None else (mask != 0).unsqueeze(-1) for mask in (mask_pad, starts))
    grad_a, grad_b, grad_c0 = linear_gradients.gradients(
        torch, linear_recurrence, grad_h.to(state), last, a.to(state).expand(b.shape), b.to(state), first, padded, begins,
        form=form, bidirectional=bidirectional, save_every=save_every, reverse=reverse,
    )  # fmt: skip
    if a.dim() < 3:
        grad_a = grad_a.sum(tuple(range(3 - a.dim())))
    return grad_a.to(a.dtype), grad_b.to(b.dtype), None if c0 is None else grad_c0.to(c0.dtype)


operator.LINEAR.composite = _gradients
