"""The public functions: `sru_forward`, `sru_backward`, `workspace_size`. `call.py` runs them.

The recurrence itself stands in `kernels/sru.cuh` (device arrays) and `reference.py` (CPU arrays)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cusru import call, dlpack
from cusru.arguments import BACKWARD, FORWARD
from cusru.problem import Options, check, one_of


class Output(NamedTuple):
    """What `sru_forward` returns."""

    h: Any  #: (L, B, D), u's dtype: the output
    c: Any  #: (ceil(L / save_every), B, D), the state's dtype: the saved states; None with save_every=None
    c_last: Any  #: (B, D), the state's dtype: the state after each column's last step


class Gradients(NamedTuple):
    """What `sru_backward` returns: each with its input's shape and dtype, None where the input was absent."""

    u: Any
    x: Any
    bias: Any
    weight_c: Any
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

    Returns:
        Output(h, c, c_last), of u's framework.

    Raises:
        ValueError: a shape, a device, an option, or an `out` that cannot be written; names the argument.
        TypeError: a dtype, an object that is no array, a flag that is none; a torch tensor that requires grad while grad mode
            is on, or any in a function that torch traces (`cusru.torch.sru` is for both; torch.compile breaks its graph here).
        ImportError, RuntimeError: device arrays without CuPy or without a working CUDA.
    """
    inputs = u, x, bias, weight_c, c0, mask_c, mask_pad, scale_x
    options = Options(activation, candidate, mask_target, bidirectional, save_every)
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
    state's dtype in an order that does not change from run to run; `mask_c` and `scale_x` have no gradient.

    Returns:
        Gradients(u, x, bias, weight_c, c0), of u's framework, each of its input's shape and dtype.

    Raises:
        As `sru_forward`; also ValueError where c is absent or its length is not ceil(L / save_every).
    """
    # in the order of the kernels' arguments, the forward's results among them
    inputs = u, x, bias, weight_c, c0, mask_c, mask_pad, scale_x, None, c, None, grad_h, grad_c_last
    options = Options(activation, candidate, mask_target, bidirectional, save_every)
    return Gradients(*call.run(BACKWARD, inputs, options, out, workspace, stream))


@dlpack.untraceable
def workspace_size(
    direction: str,
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
) -> int:
    """Bytes of scratch memory that `sru_forward` or `sru_backward` needs for these arguments.

    Args:
        direction: "forward" or "backward"; the other arguments are those of that call (`out` and `workspace` are ignored).

    Returns:
        The number of bytes, 0 where none are needed. It depends on shapes, dtypes and options only.

    Raises:
        As `sru_forward`.
    """
    one_of("direction", direction, ("forward", "backward"))
    inputs = dict(u=u, x=x, bias=bias, weight_c=weight_c, c0=c0, mask_c=mask_c, mask_pad=mask_pad, scale_x=scale_x)
    options = Options(activation, candidate, mask_target, bidirectional, save_every)
    return call.workspace_size(check(direction, inputs, options, stream))
