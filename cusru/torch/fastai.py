"""`QRNN` and `QRNNLayer` of fastai's fastai.text.models.qrnn, and the names that its code imports beside them.

They differ from torchqrnn's in defaults, in the order of arguments, in the layer's state, (B, H), in zoneout, which is a dropout
of the update gate in training and nothing in evaluation, and in two directions, which are two stacks. The order of arguments
is that of fastai 2; what fastai 1 has otherwise (`bias`) is taken by keyword.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cusru.torch import checks
from cusru.torch.functions import linear_recurrence, qrnn
from cusru.torch.torchqrnn import PAGE, Layer, check_shapes, check_states, forget_mult

__all__ = [
    "QRNN", "BwdForgetMult", "BwdForgetMultGPU", "ForgetMultGPU", "ForwardForgetMult", "QRNNLayer", "dispatch_cuda",
    "forget_mult_CPU",
]  # fmt: skip


class QRNNLayer(Layer):
    """One layer of the Quasi-RNN, fastai's (Bradbury et al. 2016, https://arxiv.org/abs/1611.01576, equations 1 to 5).

    The equations are those of `cusru.torch.QRNNLayer`; so are the arguments, but for these.

    Args:
        zoneout: in training the update gate is multiplied by a dropout mask, 0 with this probability, else 1 / (1 - zoneout); in
            evaluation it does nothing.
        batch_first: as there, and True by default.
        backward: run from the last step to the first; the window sees x at t, t + 1, ...; what is kept is the first x.

    Raises:
        ValueError: a size or a window below 1, a zoneout outside [0, 1).
    """

    names = ("inp", "hid")
    batch_first = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        save_prev_x: bool = False,
        zoneout: float = 0,
        window: int = 1,
        output_gate: bool = True,
        batch_first: bool = True,
        backward: bool = False,
    ) -> None:
        super().__init__()
        checks.probability("zoneout", zoneout)
        self._build(input_size, hidden_size, save_prev_x, zoneout, window, output_gate, batch_first, backward)

    def forward(
        self, inp: Tensor, hid: Tensor | None = None, mask_pad: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            inp: (B, L, input_size), without `batch_first` (L, B, input_size).
            hid: (B, H): initial state; absent: zeros.
            mask_pad, starts: as for `cusru.torch.QRNNLayer`, (B, L), without `batch_first` (L, B).

        Returns:
            h: (B, L, H), without `batch_first` (L, B, H).
            c: (B, H), float32, or float64 for that: the state after the last processed step.
        """
        return self._run(inp, hid, mask_pad, starts)

    def _pool(self, u: Tensor, c0: Tensor | None, mask_pad: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = dict(c0=c0, mask_pad=mask_pad, save_every=self.save_every, starts=starts, reverse=self.backward)
        if not (self.zoneout and self.training):
            return qrnn(u, pooling="fo" if self.output_gate else "f", gate="update", **options)
        # A gate that is scaled may exceed 1, which no pooling's can: what they all are takes it.
        gate = torch.sigmoid(u[..., 1]) * self._mask(u).div_(1 - self.zoneout)
        h, c = linear_recurrence(gate, torch.tanh(u[..., 0]), form="blend", **options)
        return (torch.sigmoid(u[..., 2]) * h if self.output_gate else h), c

    def _fitted(self, before: Tensor, x: Tensor) -> Tensor:
        """fastai 2 goes on with a batch whose rows come and go at its end: new ones see zeros."""
        batch = 0 if self.batch_first else 1
        before = before.narrow(batch, 0, min(before.size(batch), x.size(batch)))
        missing = x.size(batch) - before.size(batch)
        return before if not missing else nn.functional.pad(before, (0, 0, 0, missing) if batch else (0, 0, 0, 0, 0, missing))


class QRNN(nn.Module):
    """A stack of `QRNNLayer`s, fastai's.

    Args:
        input_size: features of the input.
        hidden_size: features of a layer's state, for each direction.
        n_layers: how many layers.
        batch_first: input and output have the batch before the time.
        dropout: probability of dropping an element between layers.
        bidirectional: a second stack, `layers_bwd`, runs backward in time on the same input; the outputs of both last layers
            are joined.
        save_prev_x, zoneout, output_gate: of every layer, see `QRNNLayer`.
        window: of every layer; None: 2 in the first and 1 in the others.
        bias: True; False is refused, as in fastai 1.

    Raises:
        ValueError: save_prev_x with bidirectional, bias=False, a number out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        n_layers: int = 1,
        batch_first: bool = True,
        dropout: float = 0,
        bidirectional: bool = False,
        save_prev_x: bool = False,
        zoneout: float = 0,
        window: int | None = None,
        output_gate: bool = True,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        n_layers, hidden_size = checks.size("n_layers", n_layers), checks.size("hidden_size", hidden_size)
        batch_first, bidirectional, bias = checks.flags(batch_first=batch_first, bidirectional=bidirectional, bias=bias)
        if dropout is True:
            raise ValueError("dropout must be a number, not True: bias, fastai 1's fourth argument, goes by keyword here")
        if save_prev_x and bidirectional:
            raise ValueError("save_prev_x=True excludes bidirectional=True, whose windows look ahead: give whole sequences")
        if not bias:
            raise ValueError(
                "bias=False is not supported, as in fastai: put nn.Linear(..., bias=False) in the place of each "
                f"layers[i].linear ({PAGE})"
            )

        def stack(backward: bool) -> nn.ModuleList:
            return nn.ModuleList(
                QRNNLayer(
                    hidden_size if i else input_size, hidden_size, save_prev_x, zoneout,
                    (1 if i else 2) if window is None else window, output_gate, batch_first, backward,
                )
                for i in range(n_layers)
            )  # fmt: skip

        self.layers = stack(backward=False)
        if bidirectional:
            self.layers_bwd = stack(backward=True)
        self.n_layers = n_layers
        self.batch_first = batch_first
        self.dropout = checks.probability("dropout", dropout, including_1=True)
        self.bidirectional = bidirectional

    def _stacks(self) -> list[nn.ModuleList]:
        return [self.layers, self.layers_bwd] if self.bidirectional else [self.layers]

    def reset(self) -> None:
        """Forget the x that is kept (save_prev_x): the next call begins a sequence."""
        for stack in self._stacks():
            for layer in stack:
                layer.reset()

    def forward(
        self,
        inp: Tensor,
        hid: Tensor | Sequence[Tensor | None] | None = None,
        mask_pad: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            inp: (B, L, input_size), without `batch_first` (L, B, input_size).
            hid: (n_layers * directions, B, H), or one for each: initial states, in two directions 2i of layer i of the forward
                stack and 2i + 1 of the other; absent: zeros.
            mask_pad, starts: as `QRNNLayer`'s, for every layer.

        Returns:
            h: (B, L, H * directions), without `batch_first` (L, B, H * directions).
            c: (n_layers * directions, B, H), float32, or float64 for that: the states after the last processed steps.
        """
        stacks = self._stacks()
        checks.tensors(inp, None, mask_pad, starts, ("inp", "hid"))
        shape = check_shapes(self.layers[0], self.batch_first, "inp", inp, mask_pad, starts)
        in_order = [layer for layers in zip(*stacks, strict=True) for layer in layers]
        check_states("hid", hid, in_order, shape[0 if self.batch_first else 1])
        given = {name: mask for name, mask in (("mask_pad", mask_pad), ("starts", starts)) if mask is not None}
        outputs, states = [inp] * len(stacks), []
        for i, layers in enumerate(zip(*stacks, strict=True)):
            for direction, layer in enumerate(layers):
                own = None if hid is None else hid[i * len(stacks) + direction]
                h, c = layer(outputs[direction], own, **given)
                if self.dropout != 0 and i + 1 < self.n_layers:
                    h = nn.functional.dropout(h, self.dropout, self.training)
                outputs[direction] = h
                states.append(c)
        return (torch.cat(outputs, -1) if self.bidirectional else outputs[0]), torch.stack(states)


# ---- the names that code imports beside them --------------------------------------------------------------------------------


def forget_mult_CPU(
    x: Tensor, f: Tensor, hidden_init: Tensor | None = None, batch_first: bool = True, backward: bool = False
) -> Tensor:
    """c = f * x + (1 - f) * c_prev, over all steps: (B, L, D), or without batch_first (L, B, D). x comes first here."""
    return forget_mult(f, x, hidden_init, batch_first, backward)


class ForgetMultGPU:
    """`forget_mult_CPU` in the form of an autograd function: `ForgetMultGPU.apply(x, f, hidden_init, batch_first)`, on any
    device; or, as it once was, `ForgetMultGPU(batch_first)(x, f, hidden_init)`."""

    _backward = False

    def __init__(self, batch_first: bool = True) -> None:
        self.batch_first = batch_first

    def __call__(self, x: Tensor, f: Tensor, hidden_init: Tensor | None = None) -> Tensor:
        return self.apply(x, f, hidden_init, self.batch_first)

    @classmethod
    def apply(
        cls, x: Tensor, f: Tensor, hidden_init: Tensor | None = None, batch_first: bool = True, backward: bool | None = None
    ) -> Tensor:
        return forget_mult_CPU(x, f, hidden_init, batch_first, cls._backward if backward is None else backward)


class BwdForgetMultGPU(ForgetMultGPU):
    """The same from the last step to the first."""

    _backward = True


ForwardForgetMult, BwdForgetMult = ForgetMultGPU, BwdForgetMultGPU


def dispatch_cuda(cuda_class: Any, cpu_func: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    """`cuda_class.apply`, or for an x on a CPU `cpu_func`."""
    return cuda_class.apply if x.is_cuda else cpu_func
