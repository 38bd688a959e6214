"""The public functions: forward and backward of SRU, of the QRNN's pooling and of the linear recurrence; `workspace_size`.
`call.py` runs them.

The recurrences themselves stand in `kernels/step.cuh` (device arrays), `reference.py` and `reference_affine.py` (CPU arrays)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from cusru import call, dlpack
from cusru.arguments import (
    BACKWARD,
    FORWARD,
    LINEAR_BACKWARD,
    LINEAR_FORWARD,
    OPERATORS,
    QRNN_BACKWARD,
    QRNN_FORWARD,
)  # fmt: skip
from cusru.problem import Options, check, one_of


class Output(NamedTuple):
    """What a forward function returns."""

    h: Any  #: (L, B, D), u's dtype (b's, of the linear recurrence): the output
    c: Any  #: (ceil(L / save_every), B, D), the state's dtype: the saved states; None with save_every=None
    c_last: Any  #: (B, D), the state's dtype: the state after each column's last step


class Gradients(NamedTuple):
    """What `sru_backward` returns: each with its input's shape and dtype, None where the input was absent."""

    u: Any
    x: Any
    bias: Any
    weight_c: Any
    c0: Any


class QRNNGradients(NamedTuple):
    """What `qrnn_backward` returns, likewise."""

    u: Any
    c0: Any


class LinearRecurrenceGradients(NamedTuple):
    """What `linear_recurrence_backward` returns, likewise."""

    a: Any
    b: Any
    c0: Any


@dlpack.untraceable
def sru_forward(
    u: Any,
    x: Any = None,
    *,
    bias: Any = None,
    weight_c: Any = None,
    c0: Any = None,
    mask_c: Any = None,
    mask_pad: Any = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: Any = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int | None = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
    starts: Any = None,
    reverse: bool = False,
) -> Output:
    """Run the SRU recurrence over all steps of all columns.

    At each step of a column, with u = (u0, u1, u2[, u3])::

        f = sigmoid(u1 + b_f + v_f * c_prev)
        r = sigmoid(u2 + b_r + v_r * c_prev)
        c = f * c_prev + (1 - f) * candidate(u0)
        h = r * mask_c * activation(c) + (1 - r) * s          s = scale_x * x, or u3, or 0

    (Lei et al. 2018, https://arxiv.org/abs/1709.02755, equations 3 to 6; with ``candidate="tanh"`` and no skip, the QRNN's
    fo-pooling, https://arxiv.org/abs/1611.01576.) Arrays may be NumPy's, CuPy's, torch's, JAX's, TensorFlow's or any
    other's that speaks DLPack, of any strides; none is copied, and none but those in `out` and `workspace` is written.

    Args:
        u: (L, B, D, k), k = 3 or 4: the projected input, float64, float32, float16 or bfloat16. The state is kept in
            float64 for float64 and in float32 for the others; candidate(u0) and every state, c0 included, may reach half that
            dtype's largest number, since they are subtracted from one another.
        x: (L, B, D), u's dtype: the skip input, with k = 3; absent: no skip.
        bias: (2, D) or (2*D,): forget row, reset row. Parameters, `c0` and `mask_c` are in u's dtype or the state's.
        weight_c: (2, D) or (2*D,): v of SRU v2; or per step (L, B, D, 2); absent: SRU v1.
        c0: (B, D): initial state; absent: zeros.
        mask_c: (B, D): dropout mask, the same at every step, already scaled by 1 / (1 - p).
        mask_pad: (L, B), bool or uint8: non-zero where a step is padding: there the state passes and h is 0.
        activation: "identity", "tanh", "relu" or "selu".
        candidate: "identity" (SRU) or "tanh" (QRNN).
        scale_x: a number, or a one-element array on u's device that the kernel reads.
        mask_target: "state": h as above. "gate": h = s + mask_c * r * (activation(c) - s), as in the sru package from 2.5 on.
        bidirectional: D is even, and the second half of the columns runs backward in time.
        save_every: S: `c[j]` is the state after the last processed step of the time block [j*S, min((j+1)*S, L)).
            None: no state is saved (inference).
        out: (h, c, c_last) to write into, None where cusru is to allocate; those very objects are returned. (torch's autograd
            learns of it, as from torch's own ``out=``.)
        workspace: bytes on u's device, at least ``workspace_size("forward", ...)`` of them; else cusru allocates.
        stream: anything with ``__cuda_stream__``, or an integer handle. Default: the current stream of CuPy or torch if
            `u` is theirs, else CuPy's. The call returns before the kernels have run: an array that belongs to another
            stream than this one must be kept until they have, since its allocator knows nothing of them.
        starts: (L, B), bool or uint8: non-zero where a new sequence begins, in time. There a forward column's state before the
            step is 0, whatever came before, c0 included; a reversed column begins anew where its sequence ends, before the
            step t with starts[t + 1] non-zero. Results are those of the pieces run by themselves.
        reverse: every column runs against its direction: all backward in time; with `bidirectional` the halves change places.

    Returns:
        Output(h, c, c_last), of u's framework.

    Raises:
        ValueError: a shape, a device, an option, or an `out` that cannot be written; names the argument.
        TypeError: a dtype, an object that is no array, a flag that is none; a torch tensor that requires grad while grad mode
            is on, or any in a function that torch traces (`cusru.torch.sru` is for both; torch.compile breaks its graph here).
        ImportError, RuntimeError: device arrays without CuPy or without a working CUDA.
    """
    inputs = u, x, bias, weight_c, c0, mask_c, mask_pad, starts, None, scale_x
    options = Options((activation, candidate, mask_target), bidirectional, save_every, reverse)
    return Output(*call.run(FORWARD, inputs, options, out, workspace, stream))


@dlpack.untraceable
def sru_backward(
    grad_h: Any,
    grad_c_last: Any,
    c: Any,
    u: Any,
    x: Any = None,
    *,
    bias: Any = None,
    weight_c: Any = None,
    c0: Any = None,
    mask_c: Any = None,
    mask_pad: Any = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: Any = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
    starts: Any = None,
    reverse: bool = False,
) -> Gradients:
    """The gradients of a loss with respect to the inputs of `sru_forward`.

    Args:
        grad_h: (L, B, D), u's dtype: the loss's gradient with respect to h.
        grad_c_last: (B, D), u's dtype or the state's: with respect to c_last; None: zeros.
        c: (ceil(L / save_every), B, D), the state's dtype: what `sru_forward` saved with the same `save_every`; what lies between
            is recomputed from `u`, bit for bit.
        out: (u, x, bias, weight_c, c0) gradients to write into, None where cusru is to allocate or the input is absent.
        workspace: bytes on u's device, at least ``workspace_size("backward", ...)`` of them; else cusru allocates.

    The other arguments are those of `sru_forward`, with the values they had there. Parameter gradients are summed in the
    state's dtype in an order that does not change from run to run; `mask_c` and `scale_x` have no gradient. Where a sequence
    starts the gradient of the state before ends.

    Returns:
        Gradients(u, x, bias, weight_c, c0), of u's framework, each of its input's shape and dtype.

    Raises:
        As `sru_forward`; also ValueError where c is absent or its length is not ceil(L / save_every).
    """
    # in the order of the kernels' arguments, the forward's results among them
    inputs = u, x, bias, weight_c, c0, mask_c, mask_pad, starts, None, scale_x, None, c, None, grad_h, grad_c_last
    options = Options((activation, candidate, mask_target), bidirectional, save_every, reverse)
    return Gradients(*call.run(BACKWARD, inputs, options, out, workspace, stream))


@dlpack.untraceable
def qrnn_forward(
    u: Any,
    *,
    pooling: str = "fo",
    gate: str = "forget",
    c0: Any = None,
    zoneout: Any = None,
    mask_pad: Any = None,
    bidirectional: bool = False,
    save_every: int | None = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
    starts: Any = None,
    reverse: bool = False,
) -> Output:
    """Run the Quasi-RNN's pooling over all steps of all columns.

    At each step of a column, with u = (u0, u1[, u2[, u3]]), the results of the convolution (or of one GEMM)::

        z = tanh(u0)        f = sigmoid(u1), or 1 - sigmoid(u1) with gate="update"
        c = f * c_prev + (1 - f) * z,       h = c                       pooling="f"
        c = f * c_prev + (1 - f) * z,       h = sigmoid(u2) * c         pooling="fo"
        c = f * c_prev + sigmoid(u3) * z,   h = sigmoid(u2) * c         pooling="ifo"

    (Bradbury et al. 2016, https://arxiv.org/abs/1611.01576, equations 3 to 5; zoneout: Krueger et al. 2016,
    https://arxiv.org/abs/1606.01305.) With zoneout f becomes 1 - (1 - p) * (1 - f), and i = sigmoid(u3) becomes (1 - p) * i.

    Args:
        u: (L, B, D, k), k = 2 for pooling "f", 3 for "fo", 4 for "ifo": float64, float32, float16 or bfloat16. The state is kept
            in float64 for float64 and in float32 for the others.
        pooling: "f", "fo" or "ifo".
        gate: "forget": sigmoid(u1) is what is kept (the paper's). "update": it is what is taken in (torchqrnn's, fastai's).
        c0: (B, D), u's dtype or the state's: initial state; absent: zeros.
        zoneout: p, a number from 0 to 1, the expectation (evaluation): 0 is none, 1 freezes c. Or an array (L, B, D), bool or
            uint8 (training): where it is non-zero f is 1 and i is 0.
        mask_pad, bidirectional, save_every, out, workspace, stream, starts, reverse: as for `sru_forward`.

    Returns:
        Output(h, c, c_last), of u's framework.

    Raises:
        As `sru_forward`.
    """
    inputs = u, None, None, None, c0, None, mask_pad, starts, zoneout
    options = Options((pooling, gate), bidirectional, save_every, reverse)
    return Output(*call.run(QRNN_FORWARD, inputs, options, out, workspace, stream))


@dlpack.untraceable
def qrnn_backward(
    grad_h: Any,
    grad_c_last: Any,
    c: Any,
    u: Any,
    *,
    pooling: str = "fo",
    gate: str = "forget",
    c0: Any = None,
    zoneout: Any = None,
    mask_pad: Any = None,
    bidirectional: bool = False,
    save_every: int = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
    starts: Any = None,
    reverse: bool = False,
) -> QRNNGradients:
    """The gradients of a loss with respect to the inputs of `qrnn_forward`; arguments as for `sru_backward`.

    Returns:
        QRNNGradients(u, c0), of u's framework, each of its input's shape and dtype.

    Raises:
        As `sru_backward`.
    """
    inputs = u, None, None, None, c0, None, mask_pad, starts, zoneout, None, None, c, None, grad_h, grad_c_last
    options = Options((pooling, gate), bidirectional, save_every, reverse)
    return QRNNGradients(*call.run(QRNN_BACKWARD, inputs, options, out, workspace, stream))


@dlpack.untraceable
def linear_recurrence_forward(
    a: Any,
    b: Any,
    *,
    form: str = "affine",
    c0: Any = None,
    mask_pad: Any = None,
    bidirectional: bool = False,
    save_every: int | None = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
    starts: Any = None,
    reverse: bool = False,
) -> Output:
    """Run the linear recurrence over all steps of all columns.

    At each step of a column::

        c = a * c_prev + b                      form="affine"
        c = (1 - a) * c_prev + b                form="complement": computed as c_prev - a * c_prev + b, so that an a near 0 counts
        c = (1 - a) * c_prev + a * b            form="blend": likewise; exact at a = 0 and a = 1
        h = c

    (Martin and Cundy 2018, https://arxiv.org/abs/1709.04057, equation 5. "blend" is torchqrnn's ForgetMult, minGRU and HGRN:
    docs/linear-recurrence.md.)

    Args:
        a: (L, B, D), or the same at every step (B, D), or in every batch too (D,): b's dtype or the state's; any real values.
        b: (L, B, D): float64, float32, float16 or bfloat16. The state is kept in float64 for float64 and in float32 for the
            others. Device, stream and the results' type follow b.
        form: "affine", "complement" or "blend".
        c0: (B, D), b's dtype or the state's: initial state; absent: zeros.
        mask_pad, bidirectional, save_every, out, workspace, stream, starts, reverse: as for `sru_forward`.

    Returns:
        Output(h, c, c_last), of b's framework. h is c in b's dtype, and 0 at a padded step. With float32 or float64 and no
        padding it holds the very states: it may be handed to the backward as `c` with save_every=1, and save_every=None will do.

    Raises:
        As `sru_forward`.
    """
    inputs = b, None, None, a, c0, None, mask_pad, starts
    options = Options((form,), bidirectional, save_every, reverse)
    return Output(*call.run(LINEAR_FORWARD, inputs, options, out, workspace, stream))


@dlpack.untraceable
def linear_recurrence_backward(
    grad_h: Any,
    grad_c_last: Any,
    c: Any,
    a: Any,
    b: Any,
    *,
    form: str = "affine",
    c0: Any = None,
    mask_pad: Any = None,
    bidirectional: bool = False,
    save_every: int = 1,
    out: Sequence[Any] | None = None,
    workspace: Any = None,
    stream: Any = None,
    starts: Any = None,
    reverse: bool = False,
) -> LinearRecurrenceGradients:
    """The gradients of a loss with respect to the inputs of `linear_recurrence_forward`; arguments as for `sru_backward`.

    The gradient of an a of (B, D) or (D,) is summed over L, or L and B, in the state's dtype, with compensation, and in an order
    that does not change from run to run.

    Returns:
        LinearRecurrenceGradients(a, b, c0), of b's framework, each of its input's shape and dtype.

    Raises:
        As `sru_backward`.
    """
    inputs = b, None, None, a, c0, None, mask_pad, starts, None, None, None, c, None, grad_h, grad_c_last
    options = Options((form,), bidirectional, save_every, reverse)
    return LinearRecurrenceGradients(*call.run(LINEAR_BACKWARD, inputs, options, out, workspace, stream))


@dlpack.untraceable
def workspace_size(direction: str, *arrays: Any, **keywords: Any) -> int:
    """Bytes of scratch memory that a function needs for these arguments.

    Args:
        direction: "forward" or "backward" of SRU; "qrnn_forward", "qrnn_backward", "linear_recurrence_forward" or
            "linear_recurrence_backward".
        arrays, keywords: the arguments of that family's forward function, for its backward too (`out` and `workspace` are
            ignored).

    Returns:
        The number of bytes, 0 where none are needed. It depends on shapes, dtypes and options only.

    Raises:
        As `sru_forward`.
    """
    operator = _BY_DIRECTION[one_of("direction", direction, tuple(_BY_DIRECTION))]
    bound = _signature(operator.family).bind(*arrays, **keywords)
    bound.apply_defaults()
    given = bound.arguments
    inputs = {slot: given[operator.public(slot)] for slot in operator.inputs if operator.public(slot) in given}
    options = Options(
        tuple([given[name] for name in operator.choices]), given["bidirectional"], given["save_every"], given["reverse"]
    )
    return call.workspace_size(check(operator, inputs, options, given["stream"]))


_BY_DIRECTION = {name.removeprefix("sru_"): one for name, one in OPERATORS.items()}


@functools.cache
def _signature(family: str) -> inspect.Signature:
    forwards: dict[str, Any] = {"sru": sru_forward, "qrnn": qrnn_forward, "linear_recurrence": linear_recurrence_forward}
    return inspect.signature(forwards[family])
