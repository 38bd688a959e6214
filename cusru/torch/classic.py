"""`SRU` and `SRUCell` as `cuda_functional.py`, the original repository's one file of 2017, had them (Lei and Zhang 2017).

Gates do not see the state, h is tanh(c) by default, the dropout mask is on the state, and the parameters are weight and bias:
with u = (x W).view(L, B, D, k), h = r * m * activation(c) + (1 - r) * s, s the input or, where sizes differ, u's fourth.
`install_as_sru` makes `from cuda_functional import SRU, SRUCell` find them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cusru.problem import check_flag
from cusru.torch import checks
from cusru.torch.functions import sru
from cusru.torch.legacy import refuse
from cusru.torch.modules import to_parameter
from cusru.torch.operator import SAVE_EVERY

__all__ = ["SRU", "SRUCell"]

_ACTIVATIONS = ("identity", "tanh", "relu", "selu")
# What the file took later, in no fixed order; each is accepted where it is switched off.
_LATER = {
    "weight_norm": "multiply it into the weight once",
    "layer_norm": "put a normalisation of your own between SRUs of one layer",
    "is_input_normalized": "it only made initial values smaller: leave it out",
    "rescale": "cusru.torch.SRU has it",
}


class SRUCell(nn.Module):
    """One layer of SRU as of 2017, in one direction or two.

    Args:
        n_in: features of the input.
        n_out: features of the state, for each direction; D = n_out * directions.
        dropout: probability of dropping a feature of the activated state, the same at all steps.
        rnn_dropout: probability of dropping a feature of the input (not of the skip), the same at all steps.
        bidirectional: the second half of the output runs backward in time.
        use_tanh, use_relu, use_selu: h takes tanh, relu or selu of c; use_relu and use_selu go before use_tanh, which is on.
        highway_bias: initial bias of the reset gate.
        index, and what else the file took later, by keyword: accepted where it is switched off; `index` is ignored.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1), or a later argument that is switched on.
    """

    save_every = SAVE_EVERY

    def __init__(
        self,
        n_in: int,
        n_out: int,
        dropout: float = 0,
        rnn_dropout: float = 0,
        bidirectional: bool = False,
        use_tanh: int = 1,
        use_relu: int = 0,
        *,
        use_selu: int = 0,
        highway_bias: float = 0,
        index: int = -1,
        **later: Any,
    ) -> None:
        super().__init__()
        n_in, n_out = checks.size("n_in", n_in), checks.size("n_out", n_out)
        dropout, rnn_dropout = checks.probability("dropout", dropout), checks.probability("rnn_dropout", rnn_dropout)
        highway_bias = checks.number("highway_bias", highway_bias)
        bidirectional, use_tanh, use_relu, use_selu = checks.flags(
            bidirectional=bidirectional, use_tanh=use_tanh, use_relu=use_relu, use_selu=use_selu
        )
        _check_later("SRUCell", later)
        if use_relu and use_selu:
            raise ValueError("use_relu and use_selu exclude one another: give one")
        self.n_in = n_in
        self.n_out = n_out
        self.dropout = dropout
        self.rnn_dropout = rnn_dropout
        self.bidirectional = bidirectional
        self.activation_type = 3 if use_selu else 2 if use_relu else 1 if use_tanh else 0
        width = 2 * n_out if bidirectional else n_out
        self.weight = nn.Parameter(torch.empty(n_in, width * (3 if n_in == width else 4)))
        self.bias = nn.Parameter(torch.empty(2 * width))
        self.init_weight()
        if highway_bias:
            self.set_bias(highway_bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "activation_type" not in state:  # the first weeks' pickles
            self.activation_type = 2 if state.get("use_relu") else 1 if state.get("use_tanh", True) else 0

    @torch.no_grad()
    def init_weight(self) -> None:
        """Draw the weight from a uniform distribution of variance 1 / n_in, and set the bias to 0."""
        bound = (3.0 / self.n_in) ** 0.5
        self.weight.uniform_(-bound, bound)
        self.bias.zero_()

    @torch.no_grad()
    def set_bias(self, bias_val: float = 0) -> None:
        """Set the reset gate's bias: below 0 the layer starts by passing its input through."""
        self.bias[self.bias.numel() // 2 :] = bias_val

    def forward(self, input: Tensor, c0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            input: (L, B, n_in); or one step, (B, n_in). In the parameters' dtype.
            c0: (B, D): initial state; absent: zeros.

        Returns:
            h: (L, B, D), or (B, D) for one step, in the parameters' dtype.
            c: (B, D), float32, or float64 for that: the state after the last step.
        """
        checks.inputs(self, input, c0)
        if input.dim() != 2 and input.dim() != 3:
            raise ValueError(f"input has shape {list(input.shape)}; expected (L, B, n_in) or (B, n_in)")
        if input.size(-1) != self.n_in:
            raise ValueError(f"input has shape {list(input.shape)}; expected a last size of n_in = {self.n_in}")
        batch, width = input.size(-2), self.bias.numel() // 2
        if c0 is not None and list(c0.shape) != [batch, width]:
            raise ValueError(f"c0 has shape {list(c0.shape)}; expected {[batch, width]}, (B, D)")
        steps = input if input.dim() == 3 else input.unsqueeze(0)
        x = steps
        if self.training and self.rnn_dropout > 0:
            x = x * self.get_dropout_mask_((batch, self.n_in), self.rnn_dropout)
        u = x.reshape(-1, self.n_in).mm(self.weight).view(steps.size(0), batch, width, self.weight.size(1) // width)
        mask = None
        if self.training and self.dropout > 0:
            mask = self.get_dropout_mask_((batch, width), self.dropout)
        h, c = sru(
            u,
            steps.to(u.dtype) if u.size(-1) == 3 else None,
            bias=to_parameter(self.bias, u.dtype),
            c0=to_parameter(c0, u.dtype),
            mask_c=to_parameter(mask, u.dtype),
            activation=_ACTIVATIONS[self.activation_type],
            mask_target="state",
            bidirectional=self.bidirectional,
            save_every=self.save_every,
        )
        return (h if input.dim() == 3 else h.squeeze(0)), c

    def get_dropout_mask_(self, size: tuple[int, int], p: float) -> Tensor:
        """A mask of 0s, with probability p, and 1 / (1 - p)s."""
        return self.weight.new_empty(size).bernoulli_(1 - p).div_(1 - p)

    def extra_repr(self) -> str:
        s = f"{self.n_in}, {self.n_out}, activation={_ACTIVATIONS[self.activation_type]}"
        for name in ("dropout", "rnn_dropout", "bidirectional"):
            if getattr(self, name):
                s += f", {name}={getattr(self, name)}"
        return s


class SRU(nn.Module):
    """A stack of the `SRUCell`s of 2017.

    Args:
        input_size: features of the input.
        hidden_size: features of a layer's state, for each direction; D = hidden_size * directions.
        num_layers: how many layers.
        dropout, rnn_dropout, bidirectional, use_tanh, use_relu, use_selu, highway_bias: of every layer, see `SRUCell`; but the
            last layer has no `dropout`.

    Raises:
        ValueError: as `SRUCell`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        dropout: float = 0,
        rnn_dropout: float = 0,
        bidirectional: bool = False,
        use_tanh: int = 1,
        use_relu: int = 0,
        *,
        use_selu: int = 0,
        highway_bias: float = 0,
        **later: Any,
    ) -> None:
        super().__init__()
        input_size, hidden_size = checks.size("input_size", input_size), checks.size("hidden_size", hidden_size)
        num_layers = checks.size("num_layers", num_layers)
        dropout, rnn_dropout = checks.probability("dropout", dropout), checks.probability("rnn_dropout", rnn_dropout)
        (bidirectional,) = checks.flags(bidirectional=bidirectional)  # the cells look at the others
        _check_later("SRU", later)
        self.n_in = input_size
        self.n_out = hidden_size
        self.depth = num_layers
        self.dropout = dropout
        self.rnn_dropout = rnn_dropout
        self.bidirectional = bidirectional
        self.out_size = 2 * hidden_size if bidirectional else hidden_size
        self.rnn_lst = nn.ModuleList(
            SRUCell(
                input_size if i == 0 else self.out_size, hidden_size, dropout if i + 1 != num_layers else 0, rnn_dropout,
                bidirectional, use_tanh, use_relu, use_selu=use_selu, highway_bias=highway_bias,
            )
            for i in range(num_layers)
        )  # fmt: skip

    def set_bias(self, bias_val: float = 0) -> None:
        """Set the reset gates' biases, see `SRUCell.set_bias`."""
        for rnn in self.rnn_lst:
            rnn.set_bias(bias_val)

    def forward(self, input: Tensor, c0: Tensor | None = None, return_hidden: bool = True) -> Any:
        """Run all layers.

        Args:
            input: (L, B, input_size).
            c0: (num_layers, B, D): the layers' initial states; absent: zeros.
            return_hidden: whether c is returned too.

        Returns:
            h: (L, B, D) of the last layer; and, with `return_hidden`, c: (num_layers, B, D), the states after the last step.
        """
        checks.tensors(input, c0)
        if input.dim() != 3:
            raise ValueError(f"input has shape {list(input.shape)}; expected 3 dimensions, (L, B, input_size)")
        expected = [len(self.rnn_lst), input.size(1), self.out_size]
        if c0 is not None and list(c0.shape) != expected:
            raise ValueError(f"c0 has shape {list(c0.shape)}; expected {expected}, (num_layers, B, D)")
        h, last = input, []
        for i, rnn in enumerate(self.rnn_lst):
            h, c = rnn(h, None if c0 is None else c0[i])
            last.append(c)
        return (h, torch.stack(last)) if check_flag("return_hidden", return_hidden) else h


def _check_later(name: str, later: dict[str, Any]) -> None:
    for argument, value in later.items():
        if argument not in _LATER:
            raise TypeError(f"{name} of cuda_functional has no argument {argument}")
        refuse(argument, value, _LATER[argument])
