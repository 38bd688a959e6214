"""The recurrences in JAX, differentiable: `sru`, `qrnn`, `linear_recurrence`. `operator.py` runs them."""

from __future__ import annotations

import jax

from cusru.jax import operator
from cusru.jax.operator import SAVE_EVERY
from cusru.problem import Options


def sru(
    u: jax.Array,
    x: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    weight_c: jax.Array | None = None,
    c0: jax.Array | None = None,
    mask_c: jax.Array | None = None,
    mask_pad: jax.Array | None = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: float | jax.Array = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The SRU recurrence over all steps of all columns, differentiable.

    At each step of a column, with u = (u0, u1, u2[, u3])::

        f = sigmoid(u1 + b_f + v_f * c_prev)
        r = sigmoid(u2 + b_r + v_r * c_prev)
        c = f * c_prev + (1 - f) * candidate(u0)
        h = r * mask_c * activation(c) + (1 - r) * s          s = scale_x * x, or u3, or 0

    (Lei et al. 2018, https://arxiv.org/abs/1709.02755, equations 3 to 6.) Works under jit, grad, vmap, scan, checkpoint and
    shard_map, on XLA's stream, with XLA's memory. Derivatives are those of reverse mode, once. What each transform costs:
    docs/jax.md.

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
        scale_x: a number, or an array of one element, of u's dtype or the state's, that the kernel reads; no gradient.
        mask_target: "state": h as above. "gate": h = s + mask_c * r * (activation(c) - s), as in the sru package from 2.5 on.
        bidirectional: D is even, and the second half of the columns runs backward in time.
        save_every: one state in so many is kept for the gradients, which recompute the others bit for bit. None: none is kept,
            and there are no gradients.
        starts: (L, B), bool or uint8: non-zero where a new sequence begins, in time: there the state before the step is 0,
            whatever came before, c0 included. A reversed column begins anew where its sequence ends. So one call serves packed
            documents or episodes, with the results of the pieces run by themselves.
        reverse: every column runs against its direction: all backward in time; with `bidirectional` the halves change places.

    Returns:
        h: (L, B, D), u's dtype; and c_last: (B, D), the state's dtype, the state after each column's last step.

    Raises:
        ValueError: a shape, a device or an option; names the argument. Like all that can be wrong, when JAX traces the call.
        TypeError: a dtype, an object that is no array, or a gradient asked for `mask_c` or `scale_x`; JAX's own for forward-mode
            differentiation.
        NotImplementedError: a derivative of the gradients.
    """
    inputs = u, x, bias, weight_c, c0, mask_c, mask_pad, starts, None, scale_x
    return operator.run("sru", inputs, Options((activation, candidate, mask_target), bidirectional, save_every, reverse))


def qrnn(
    u: jax.Array,
    *,
    pooling: str = "fo",
    gate: str = "forget",
    c0: jax.Array | None = None,
    zoneout: float | jax.Array | None = None,
    mask_pad: jax.Array | None = None,
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
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
            becomes (1 - p) * i. Or an array (L, B, D), bool or uint8 (training): where it is non-zero f is 1 and i is 0.
        mask_pad, bidirectional, save_every, starts, reverse: as for `sru`.

    Returns:
        h: (L, B, D), u's dtype; and c_last: (B, D), the state's dtype, the state after each column's last step.

    Raises:
        As `sru`.
    """
    inputs = u, None, None, None, c0, None, mask_pad, starts, zoneout
    return operator.run("qrnn", inputs, Options((pooling, gate), bidirectional, save_every, reverse))


def linear_recurrence(
    a: jax.Array,
    b: jax.Array,
    *,
    form: str = "affine",
    c0: jax.Array | None = None,
    mask_pad: jax.Array | None = None,
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The linear recurrence over all steps of all columns, differentiable.

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
    inputs = b, None, None, a, c0, None, mask_pad, starts
    return operator.run("linear_recurrence", inputs, Options((form,), bidirectional, save_every, reverse))
