"""`QRNN`, `QRNNLayer` and `ForgetMult`: drop-ins for the classes of that name in the torchqrnn package, on `cusru.torch.qrnn`.

Constructor arguments, attributes, parameters and state dicts are those of torchqrnn; so are, for the same seed, the initial
parameters and the masks of zoneout. torchqrnn's F is an update gate: c = F * tanh(Z) + (1 - F) * c_prev.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cusru.torch import checks
from cusru.torch.functions import linear_recurrence, qrnn
from cusru.torch.modules import sizes, to_parameter
from cusru.torch.operator import SAVE_EVERY

__all__ = ["QRNN", "ForgetMult", "QRNNLayer"]

PAGE = "docs/migrating-from-qrnn.md"


class Layer(nn.Module):
    """What torchqrnn's layer and fastai's share: a causal convolution as one call of `linear`, and the pooling.

    `linear` maps window * input_size features, those of step t, t - 1, ... side by side, to Z, F and O one after the other. It
    is called as a module, so that it may be wrapped (WeightDrop), hooked or replaced.
    """

    linear: nn.Module
    save_every = SAVE_EVERY
    names = ("X", "hidden")  # of forward's first two arguments, for errors

    # What a pickle of torchqrnn or fastai has not
    input_size: int | None = None
    hidden_size: int | None = None
    batch_first = False
    backward = False  # runs from the last step to the first; its window looks at t + 1, t + 2, ...
    prevX: Tensor | None = None  # the last window - 1 steps of the input, kept over calls; in no state dict
    _call: tuple[Tensor | None, Tensor] | None = None  # the prevX that the last call began with, and what it left

    def _build(
        self, input_size: int, hidden_size: int | None, save_prev_x: bool, zoneout: float, window: int, output_gate: bool,
        batch_first: bool, backward: bool,
    ) -> None:  # fmt: skip
        self.input_size = checks.size("input_size", input_size)
        self.hidden_size = checks.size("hidden_size", hidden_size) if hidden_size else self.input_size
        self.save_prev_x, self.output_gate, self.batch_first, self.backward = checks.flags(
            save_prev_x=save_prev_x, output_gate=output_gate, batch_first=batch_first, backward=backward
        )
        self.zoneout = checks.probability("zoneout", zoneout, including_1=True)
        self.window = checks.size("window", window)
        self.linear = nn.Linear(self.window * self.input_size, (3 if self.output_gate else 2) * self.hidden_size)

    def reset(self) -> None:
        """Forget the x that is kept: the next call begins a sequence."""
        self.prevX = None

    def _run(self, x: Tensor, hidden: Tensor | None, mask_pad: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """h, as x lies, and the last state, (B, H)."""
        checks.inputs(self.linear if _is_plain(self.linear) else self, x, hidden, mask_pad, starts=starts, names=self.names)
        shape = check_shapes(self, self.batch_first, self.names[0], x, mask_pad, starts)
        if mask_pad is not None and self.save_prev_x and self.window > 1:
            raise ValueError("mask_pad cannot be given with save_prev_x, which would keep padding: give sequences of one length")
        mask_pad, starts = (None if mask is None else mask != 0 for mask in (mask_pad, starts))

        source, kept = self._source(x, mask_pad, starts) if self.window > 1 else (x, None)
        y = self.linear(source)
        gates = 3 if self.output_gate else 2
        width = sizes(y)[-1] // gates
        u = y.reshape(x.size(0), x.size(1), gates, width).transpose(2, 3)
        if self.batch_first:
            u = u.transpose(0, 1)
            mask_pad, starts = (None if mask is None else mask.t() for mask in (mask_pad, starts))
        if hidden is not None:
            expected = [shape[0 if self.batch_first else 1], width]
            if sizes(hidden) not in (expected, [1, *expected]):
                raise ValueError(f"{self.names[1]} has shape {sizes(hidden)}; expected {expected}, (B, hidden_size)")
            hidden = to_parameter(hidden[0] if hidden.dim() == 3 else hidden, u.dtype)
        h, c = self._pool(u, hidden, mask_pad, starts)
        if kept is not None:  # by now nothing has been refused
            self._call, self.prevX = kept, kept[1]
        return (h.transpose(0, 1) if self.batch_first else h), c

    def _pool(self, u: Tensor, c0: Tensor | None, mask_pad: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _mask(self, u: Tensor) -> Tensor:
        """(L, B, D), 0 with probability zoneout, else 1; drawn in the order of the input's axes, as the others draw it."""
        size = u.shape[:3] if not self.batch_first else (u.size(1), u.size(0), u.size(2))
        mask = u.new_empty(size).bernoulli_(1 - self.zoneout)
        return mask.transpose(0, 1) if self.batch_first else mask

    # ---- the window -----------------------------------------------------------------------------------------------------

    def _source(
        self, x: Tensor, mask_pad: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor] | None]:
        """What `linear` sees of each step: x at t, t - 1, ..., t - window + 1, zeros at padded steps and across a start; and what
        is then kept: the x before this call, and that before the next."""
        if (self.save_prev_x or self.prevX is not None) and _is_recorded(x):
            raise RuntimeError(
                "save_prev_x keeps x in the module, which an exported, traced or mapped call cannot: set save_prev_x = False, "
                f"call reset(), and give whole sequences ({PAGE})"
            )
        if mask_pad is not None:
            x = x.masked_fill(mask_pad.unsqueeze(-1), 0)
        reach = self.window - 1
        # Within a backward activation checkpointing runs the last call again, which must see what that saw, and leave nothing.
        again = self.save_prev_x and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        last_call = self._call if again else None
        before = self.prevX if last_call is None else last_call[0]
        if before is not None:
            before = self._fitted(before.to(x), x)
        joined = self._joined(x, before)
        places = [(i, i - reach) if self.backward else (reach - i, -i) for i in range(1, self.window)]
        pieces = [self._cut(joined, *place) for place in places]
        end = (0, reach) if self.backward else (-reach, 0)
        kept = self._cut(joined, *end).detach().clone()  # else all of joined would stay
        if starts is not None and 0 not in sizes(starts):
            # The number of the sequence that a step is of: of what was kept 0, as of the steps before the first start; of what
            # comes later in time, of which nothing is known, the last.
            of = starts.long().cumsum(1 if self.batch_first else 0)
            latest = self._cut(of, -1, 0)
            later = latest.expand(-1, reach) if self.batch_first else latest.expand(reach, -1)
            of_joined = self._joined(of, later if self.backward else None)
            pieces = [
                piece.masked_fill((self._cut(of_joined, *place) != of).unsqueeze(-1), 0)
                for piece, place in zip(pieces, places, strict=True)
            ]
            kept = kept.masked_fill((self._cut(of_joined, *end) != (0 if self.backward else latest)).unsqueeze(-1), 0)
        if last_call is not None and not torch.equal(kept.nan_to_num(), last_call[1].nan_to_num()):
            raise RuntimeError(
                "save_prev_x under activation checkpointing: the call that is run again is not this layer's last, whose x it "
                f"would read. Let a backward follow each call, or leave the layer out of the checkpoint ({PAGE})"
            )
        return torch.cat([x, *pieces], -1), (before, kept) if self.save_prev_x and not again else None

    def _joined(self, x: Tensor, before: Tensor | None) -> Tensor:
        """x after the window - 1 steps that were before it, or, of a layer that runs backward, before those; None: zeros."""
        reach, features = self.window - 1, (0, 0) * (x.dim() - 2)
        if before is None:
            zeros = (0, reach) if self.backward else (reach, 0)
            return nn.functional.pad(x, features + (zeros if self.batch_first else (0, 0, *zeros)))
        return torch.cat([x, before] if self.backward else [before, x], 1 if self.batch_first else 0)

    def _cut(self, a: Tensor, first: int, last: int) -> Tensor:
        """Steps, from the end where negative; a last of 0 is the end."""
        steps = slice(first, last or None)
        return a[:, steps] if self.batch_first else a[steps]

    def _fitted(self, before: Tensor, x: Tensor) -> Tensor:
        batch = 0 if self.batch_first else 1
        if before.size(batch) != x.size(batch):
            raise ValueError(
                f"{self.names[0]} has a batch of {x.size(batch)}, and the x that is kept from the call before (save_prev_x) one "
                f"of {before.size(batch)}: call reset() where a new sequence begins"
            )
        return before

    def extra_repr(self) -> str:
        s = f"{self.input_size}, {self.hidden_size}"
        for name, default in (("window", 1), ("save_prev_x", False), ("zoneout", 0), ("output_gate", True),
                              ("batch_first", False), ("backward", False)):  # fmt: skip
            if getattr(self, name) != default:
                s += f", {name}={getattr(self, name)}"
        return s


_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # from torch 2.7 on


def _is_recorded(x: Tensor) -> bool:
    """Whether the call is exported, traced, or one of many that vmap makes at once: what it keeps would not be a plain tensor."""
    if torch.jit.is_tracing() or _is_exporting():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)


def check_shapes(
    layer: Any, batch_first: bool, name: str, x: Tensor, mask_pad: Tensor | None, starts: Tensor | None
) -> list[int]:  # fmt: skip
    """Of the call of that layer, or of the stack whose first it is; the shape of x."""
    shape, axes, input_size = sizes(x), "B, L" if batch_first else "L, B", getattr(layer, "input_size", None)
    if len(shape) != 3:
        raise ValueError(f"{name} has shape {shape}; expected 3 dimensions, ({axes}, input_size)")
    if input_size is not None and shape[2] != input_size:
        raise ValueError(f"{name} has shape {shape}; expected a last size of input_size = {input_size}")
    for mask_name, mask in (("mask_pad", mask_pad), ("starts", starts)):
        if mask is not None and sizes(mask) != shape[:2]:
            raise ValueError(f"{mask_name} has shape {sizes(mask)}; expected {shape[:2]}, ({axes})")
    return shape


def _is_plain(linear: nn.Module) -> bool:
    """Whether its input must have its parameters' dtype and device: a wrapper, or a hook, may see to that itself."""
    return type(linear) is nn.Linear and not linear._forward_pre_hooks and "forward" not in linear.__dict__


class QRNNLayer(Layer):
    """One layer of the Quasi-RNN (Bradbury et al. 2016, https://arxiv.org/abs/1611.01576, equations 1 to 5), torchqrnn's.

    With Z, F, O = linear(x at t, t - 1, ... side by side)::

        F = sigmoid(F)          the update gate: what is taken in
        c = F * tanh(Z) + (1 - F) * c_prev
        h = sigmoid(O) * c, or c without an output gate

    Args:
        input_size: features of the input.
        hidden_size: features of the state, H; absent: input_size.
        save_prev_x: keep the last window - 1 steps of the input for the next call, which goes on from there, until `reset()`.
            No gradient goes back through them.
        zoneout: probability of leaving a feature of the state as it is at a step; in evaluation F is multiplied by 1 - zoneout.
        window: how many steps the convolution sees: 1, 2 or any other number.
        output_gate: fo-pooling; False: f-pooling.
        use_cuda: kept, not read: where X is decides.
        batch_first: X, h and the masks have the batch before the time; nothing is copied for it.
        backward: run from the last step to the first; the window sees x at t, t + 1, ...

    Raises:
        ValueError: a size or a window below 1, a zoneout outside [0, 1].
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        save_prev_x: bool = False,
        zoneout: float = 0,
        window: int = 1,
        output_gate: bool = True,
        use_cuda: bool = True,
        *,
        batch_first: bool = False,
        backward: bool = False,
    ) -> None:
        super().__init__()
        self.use_cuda = use_cuda
        self._build(input_size, hidden_size, save_prev_x, zoneout, window, output_gate, batch_first, backward)

    def forward(
        self, X: Tensor, hidden: Tensor | None = None, mask_pad: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            X: (L, B, input_size), with `batch_first` (B, L, input_size).
            hidden: (B, H) or (1, B, H): initial state; absent: zeros.
            mask_pad: (L, B), with `batch_first` (B, L), of any dtype: non-zero where a step is padding. There the state passes, h
                is 0, and a window sees zeros. Not with save_prev_x.
            starts: likewise, non-zero where a new sequence begins: it knows nothing of what came before, and a window reads
                zeros across it.

        Returns:
            h: (L, B, H), with `batch_first` (B, L, H).
            c: (1, B, H), float32, or float64 for that: the state after the last step (not multiplied by the output gate).
        """
        h, c = self._run(X, hidden, mask_pad, starts)
        return h, c.unsqueeze(0)

    def _pool(self, u: Tensor, c0: Tensor | None, mask_pad: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        zoneout: float | Tensor | None = self.zoneout or None
        if zoneout is not None and self.training:
            zoneout = self._mask(u) == 0
        return qrnn(
            u, pooling="fo" if self.output_gate else "f", gate="update", c0=c0, zoneout=zoneout, mask_pad=mask_pad,
            save_every=self.save_every, starts=starts, reverse=self.backward,
        )  # fmt: skip


class QRNN(nn.Module):
    """A stack of `QRNNLayer`s, torchqrnn's; here also in two directions, and batch first.

    Args:
        input_size: features of the input.
        hidden_size: features of a layer's state, for each direction.
        num_layers: how many layers.
        bias: True; False is refused, as in torchqrnn.
        batch_first: input and h have the batch before the time; nothing is copied for it. Hidden states have not.
        dropout: probability of dropping an element between layers.
        bidirectional: each layer's output is that of `layers[i]` beside that of `layers_bwd[i]`, which runs backward in time.
        layers: the layers, built already, in the place of num_layers.
        kwargs: save_prev_x, zoneout, window, output_gate, use_cuda of every layer, see `QRNNLayer`.

    Raises:
        ValueError: an argument that is refused; bidirectional with save_prev_x, or with `layers`.
    """

    layers_bwd: nn.ModuleList

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0,
        bidirectional: bool = False,
        layers: Iterable[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        bias, batch_first, bidirectional = checks.flags(bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        if not bias:
            raise ValueError(
                "bias=False is not supported, as in torchqrnn: put nn.Linear(..., bias=False) in the place of each "
                f"layers[i].linear ({PAGE})"
            )
        if bidirectional and kwargs.get("save_prev_x"):
            raise ValueError("save_prev_x=True excludes bidirectional=True, whose windows look ahead: give whole sequences")
        given = [] if layers is None else list(layers)
        if given:
            _check_layers(given, batch_first, bidirectional)
        else:
            num_layers, hidden_size = checks.size("num_layers", num_layers), checks.size("hidden_size", hidden_size)
        self.input_size = checks.size("input_size", input_size)
        self.hidden_size = hidden_size
        self.num_layers = len(given) or num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = checks.probability("dropout", dropout, including_1=True)
        self.bidirectional = bidirectional

        def stack(backward: bool) -> nn.ModuleList:
            deep = hidden_size * (2 if bidirectional else 1)
            return nn.ModuleList(
                QRNNLayer(deep if i else input_size, hidden_size, **kwargs, batch_first=batch_first, backward=backward)
                for i in range(num_layers)
            )

        self.layers = nn.ModuleList(given) if given else stack(backward=False)
        if bidirectional:
            self.layers_bwd = stack(backward=True)

    def reset(self) -> None:
        """Forget the x that is kept (save_prev_x): the next call begins a sequence."""
        for layer in self._all_layers():
            layer.reset()

    def _all_layers(self) -> list[Any]:
        """In the order of their states: layer by layer, of two directions the forward one first."""
        if not self.bidirectional:
            return list(self.layers)
        return [layer for pair in zip(self.layers, self.layers_bwd, strict=True) for layer in pair]

    def forward(
        self,
        input: Tensor,
        hidden: Tensor | Sequence[Tensor | None] | None = None,
        mask_pad: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            input: (L, B, input_size), with `batch_first` (B, L, input_size).
            hidden: (num_layers * directions, B, H), or one for each: the layers' initial states, in two directions 2i of the
                forward one of layer i and 2i + 1 of the other, as `torch.nn.LSTM` has them; absent: zeros.
            mask_pad, starts: as `QRNNLayer`'s, for every layer.

        Returns:
            h: (L, B, H * directions), with `batch_first` (B, L, H * directions), of the last layer.
            c: (num_layers * directions, B, H), float32, or float64 for that: the states after the last step.
        """
        layers = self._all_layers()
        checks.tensors(input, None, mask_pad, starts)
        shape = check_shapes(layers[0], self.batch_first, "input", input, mask_pad, starts)
        check_states("hidden", hidden, layers, shape[0 if self.batch_first else 1])
        given = {name: mask for name, mask in (("mask_pad", mask_pad), ("starts", starts)) if mask is not None}
        states: list[Tensor] = []
        directions = 2 if self.bidirectional else 1
        for first in range(0, len(layers), directions):
            outputs = []
            for i in range(first, first + directions):
                h, c = layers[i](input, None if hidden is None else hidden[i], **given)
                outputs.append(h)
                states.append(c.reshape(1, *c.shape[-2:]))
            input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout != 0 and first + directions < len(layers):
                input = nn.functional.dropout(input, self.dropout, self.training)
        return input, torch.cat(states)


def check_states(name: str, states: Any, layers: list[Any], batch: int) -> None:
    """One for each layer and direction, as a tensor or a sequence; before the first layer runs, and keeps its x."""
    if states is None:
        return
    if not isinstance(states, Tensor | list | tuple):
        raise TypeError(f"{name} must be a torch.Tensor, or a sequence of one for each layer, not {type(states).__name__}")
    given = (sizes(states) or [0])[0] if isinstance(states, Tensor) else len(states)
    if given != len(layers):
        raise ValueError(f"{name} has {given} states; expected {len(layers)}, one for each layer and direction")
    for i, layer in enumerate(layers):
        if states[i] is None:
            continue
        if not isinstance(states[i], Tensor):
            raise TypeError(f"{name}[{i}] must be a torch.Tensor, not {type(states[i]).__name__}")
        shape, width = sizes(states[i]), getattr(layer, "hidden_size", None)
        if shape[-2:-1] != [batch] or (width is not None and shape[-1] != width):
            raise ValueError(f"{name}[{i}] has shape {shape}; expected {[batch, width or 'H']}, (B, hidden_size)")


def _check_layers(layers: list[nn.Module], batch_first: bool, bidirectional: bool) -> None:
    if bidirectional:
        raise ValueError("layers cannot be given with bidirectional=True: replace those that the stack builds")
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layers[{i}] must be a torch.nn.Module, not {type(layer).__name__}")
        if isinstance(layer, Layer) and layer.batch_first != batch_first:
            raise ValueError(f"layers[{i}] has batch_first={layer.batch_first}, and the stack batch_first={batch_first}")


class ForgetMult(nn.Module):
    """c = f * x + (1 - f) * c_prev, over all steps; torchqrnn's."""

    def forward(self, f: Tensor, x: Tensor, hidden_init: Tensor | None = None, use_cuda: bool = True) -> Tensor:
        """All states, (L, B, D), of f and x of that shape and hidden_init (B, D) or (1, B, D); absent: zeros.

        `use_cuda` is kept, not read: where the tensors are decides.
        """
        return forget_mult(f, x, hidden_init)


def forget_mult(
    f: Tensor, x: Tensor, hidden_init: Tensor | None = None, batch_first: bool = False, backward: bool = False
) -> Tensor:
    """c = f * x + (1 - f) * c_prev of (L, B, D), or batch first (B, L, D); backward: from the last step to the first."""
    for name, a in (("f", f), ("x", x), ("hidden_init", hidden_init)):
        if not isinstance(a, Tensor) and (a is not None or name != "hidden_init"):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(a).__name__}")
    if f.dim() != 3 or f.shape != x.shape:
        raise ValueError(f"f has shape {list(f.shape)} and x {list(x.shape)}; expected one shape of 3 dimensions")
    if batch_first:
        f, x = f.transpose(0, 1), x.transpose(0, 1)
    if hidden_init is not None:
        if list(hidden_init.shape) not in ([*x.shape[1:]], [1, *x.shape[1:]]):
            raise ValueError(f"hidden_init has shape {list(hidden_init.shape)}; expected {list(x.shape[1:])}, (B, D)")
        hidden_init = to_parameter(hidden_init.reshape(x.shape[1:]), x.dtype)
    h, _ = linear_recurrence(f, x, form="blend", c0=hidden_init, reverse=backward)
    return h.transpose(0, 1) if batch_first else h
