"""`SRUpp` and its parts: drop-ins for SRU++ of the sru package 3.0.0.dev6 (Lei 2021, "When Attention Meets Fast Recurrence:
Training Language Models with Reduced Compute", https://arxiv.org/abs/2102.12459).

A layer is SRU's recurrence on U = linear3(z + alpha * attention(z)), with z = linear1(input): z itself asks, what it is projected
to by linear2 are keys and values. Arguments, attributes, parameters and, for the same seed, initial parameters are those of sru.
"""

# No `from __future__ import annotations` here: torch.jit.script reads these annotations.
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cusru.torch import checks
from cusru.torch.legacy import warn_of_load
from cusru.torch.modules import SRUCell, as_mask, repacked, sizes, unpacked


class SRUppProjectedLinear(nn.Module):
    """What a layer without attention has in its place: linear2(dropout(layer_norm(linear1(input)))).

    Args:
        in_features, out_features: features of the input and of U.
        proj_features: features between the two linear maps, neither of which has a bias.
        dropout: probability of dropping a feature of a step, before the second.
        layer_norm: normalise between the two.
    """

    __constants__ = ["in_features", "out_features", "proj_features"]  # noqa: RUF012

    def __init__(
        self, in_features: int, out_features: int, proj_features: int, dropout: float = 0.0, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.in_features = checks.size("in_features", in_features)
        self.out_features = checks.size("out_features", out_features)
        self.proj_features = checks.size("proj_features", proj_features)
        (layer_norm,) = checks.flags(layer_norm=layer_norm)
        self.dropout = nn.Dropout(checks.probability("dropout", dropout))
        self.linear1 = nn.Linear(self.in_features, self.proj_features, bias=False)
        self.linear2 = nn.Linear(self.proj_features, self.out_features, bias=False)
        self.layer_norm = nn.LayerNorm(self.proj_features) if layer_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, by Xavier's rule."""
        _draw(self.linear1, self.linear2, self.dropout.p)

    def forward(
        self,
        input: Tensor,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask_pad: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """(..., in_features) -> (..., out_features), step by step: what else `SRUppAttention` takes is not looked at."""
        if not torch.jit.is_scripting():
            checks.projected(self.linear1, input)
        z = self.linear1(input)
        if self.layer_norm is not None:
            z = self.layer_norm(z)
        return self.linear2(self.dropout(z))


class SRUppAttention(nn.Module):
    """The attention of a layer of SRU++.

    Args:
        in_features, out_features: features of the input and of U.
        proj_features: features of queries, keys and values.
        num_heads: how many heads these are split into, proj_features / num_heads one after the other to each.
        dropout: probability of dropping a feature of a step, after the attention.
        attn_dropout: probability of dropping a weight of the attention. Which ones are dropped depends on what
            `torch.nn.functional.scaled_dot_product_attention` runs, and are not those that sru drops.
        rezero_init_alpha: initial value of alpha, by which the attention is multiplied before z is added.
        layer_norm: normalise before the last map or, without `normalize_after`, before the attention.
        normalize_after: see `layer_norm`.
    """

    __constants__ = [  # noqa: RUF012
        "attn_dropout", "in_features", "normalize_after", "num_heads", "out_features", "proj_features", "rezero_init_alpha",
    ]  # fmt: skip

    def __init__(
        self,
        in_features: int,
        out_features: int,
        proj_features: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        rezero_init_alpha: float = 0.0,
        layer_norm: bool = False,
        normalize_after: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = checks.size("in_features", in_features)
        self.out_features = checks.size("out_features", out_features)
        self.proj_features = checks.size("proj_features", proj_features)
        self.num_heads = checks.size("num_heads", num_heads)
        if self.proj_features % self.num_heads:
            raise ValueError(f"proj_features = {proj_features} must be a multiple of num_heads = {num_heads}")
        layer_norm, normalize_after = checks.flags(layer_norm=layer_norm, normalize_after=normalize_after)
        self.dropout = nn.Dropout(checks.probability("dropout", dropout))
        self.attn_dropout = checks.probability("attn_dropout", attn_dropout)
        self.rezero_init_alpha = float(checks.number("rezero_init_alpha", rezero_init_alpha))
        self.linear1 = nn.Linear(self.in_features, self.proj_features, bias=False)
        self.linear2 = nn.Linear(self.proj_features, 2 * self.proj_features, bias=False)
        self.linear3 = nn.Linear(self.proj_features, self.out_features, bias=False)
        self.alpha = nn.Parameter(torch.empty(1))
        self.normalize_after = normalize_after
        self.layer_norm = nn.LayerNorm(self.proj_features) if layer_norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, by Xavier's rule; alpha becomes `rezero_init_alpha`."""
        nn.init.xavier_uniform_(self.linear1.weight)
        _draw(self.linear2, self.linear3, self.dropout.p)
        self.alpha.fill_(self.rezero_init_alpha)

    def forward(
        self,
        input: Tensor,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask_pad: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Attend. A query that may attend to nothing gets 0 from the attention.

        Args:
            input: (L, B, in_features).
            mask_pad: (L, B), of any dtype: non-zero where a step is padding, to which nothing attends.
            attn_mask: (L, M + L), floating-point: added to the attention's scores; 0 where attention is allowed, -inf where not.
            memory: (M, B, in_features): what came before, attended to too. Absent: M = 0.
            memory_mask_pad: (M, B), of any dtype: non-zero where the memory is padding. Without memory not looked at.
            starts: (L, B), of any dtype: non-zero where a new sequence begins. Steps attend to their own sequence alone;
                the memory belongs to what is before the first start.

        Returns:
            (L, B, out_features).

        Raises:
            ValueError: a shape or a device that does not fit.
            TypeError: an attn_mask that is not floating-point, an input of another dtype than the weights'.
        """
        if not torch.jit.is_scripting():
            checks.projected(
                self.linear1, input, mask_pad=mask_pad, attn_mask=attn_mask, memory=memory, memory_mask_pad=memory_mask_pad,
                starts=starts,
            )  # fmt: skip
        shape = sizes(input)
        if len(shape) != 3 or shape[2] != self.in_features:
            raise ValueError(
                f"input has shape {shape}; expected (L, B, {self.in_features}): attention is over time, one step is L = 1"
            )
        if mask_pad is not None:
            mask_pad = as_mask("mask_pad", mask_pad, shape)
        if starts is not None:
            starts = as_mask("starts", starts, shape)
        keys, length = input, shape[0]
        if memory is None:
            memory_mask_pad = None
        else:
            of_memory = sizes(memory)
            if len(of_memory) != 3 or of_memory[1:] != shape[1:]:
                raise ValueError(f"memory has shape {of_memory}; expected (M, B, in_features) with B, in_features = {shape[1:]}")
            if memory_mask_pad is not None:
                memory_mask_pad = as_mask("memory_mask_pad", memory_mask_pad, of_memory)
            keys = torch.cat([memory.to(input.dtype), input])
            length = length + of_memory[0]
        if attn_mask is not None:
            if not attn_mask.is_floating_point():
                raise TypeError(
                    f"attn_mask has dtype {attn_mask.dtype}; expected a floating-point one: it is added to the scores, so give 0 "
                    "where attention is allowed and -inf where not"
                )
            if sizes(attn_mask) != [shape[0], length]:
                raise ValueError(
                    f"attn_mask has shape {sizes(attn_mask)}; expected {[shape[0], length]}, (L, M + L), M steps of memory"
                )

        z = self.linear1(keys)
        residual = z if memory is None else z[memory.size(0) :]
        if self.layer_norm is not None and not self.normalize_after:
            z = self.layer_norm(z)
        q = z if memory is None else z[memory.size(0) :]
        k, v = self.linear2(z).chunk(2, dim=-1)
        attended = self._attend(q.to(k.dtype), k, v, _forbidden(input, memory, mask_pad, memory_mask_pad, starts), attn_mask)
        # in this order, by which the sum lies in memory as z does: dropout draws in the order of memory
        z = residual + attended * self.alpha
        if self.layer_norm is not None and self.normalize_after:
            z = self.layer_norm(z)
        return self.linear3(self.dropout(z))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, forbidden: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        """(L, B, P) of q and (S, B, P) of k and v -> (L, B, P); `forbidden`: (B, 1, L or 1, S), of bools."""
        # A query without a key would be 0 / 0, in some of torch's ways to compute it: such ones attend anywhere, for nothing.
        lonely: Tensor | None = None
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype)
            if forbidden is not None:
                attn_mask = attn_mask.masked_fill(forbidden, -math.inf)
            lonely = (attn_mask == -math.inf).all(dim=-1, keepdim=True)
            attn_mask = attn_mask.masked_fill(lonely, 0.0)
        elif forbidden is not None:
            lonely = forbidden.all(dim=-1, keepdim=True)
            attn_mask = forbidden.logical_not() | lonely
        heads = self.num_heads
        attended = F.scaled_dot_product_attention(
            _heads(q, heads), _heads(k, heads), _heads(v, heads), attn_mask, self.attn_dropout if self.training else 0.0
        )
        if lonely is not None:
            attended = attended.masked_fill(lonely, 0.0)
        return attended.permute(2, 0, 1, 3).flatten(2)


def _heads(a: Tensor, heads: int) -> Tensor:
    """(L, B, P) -> (B, heads, L, P / heads), without a copy."""
    return a.unflatten(-1, [heads, a.size(-1) // heads]).permute(1, 2, 0, 3)


def _forbidden(
    input: Tensor, memory: Tensor | None, mask_pad: Tensor | None, memory_mask_pad: Tensor | None, starts: Tensor | None
) -> Tensor | None:
    """Where queries may not attend, (B, 1, L or 1, M + L): to padding, and to other sequences."""
    forbidden: Tensor | None = None
    if mask_pad is not None or memory_mask_pad is not None:
        if mask_pad is None:
            mask_pad = torch.zeros_like(input[..., 0], dtype=torch.bool)
        forbidden = _of_keys(memory, memory_mask_pad, mask_pad).t()[:, None, None]
    if starts is not None:
        piece = starts.cumsum(0, dtype=torch.int32)
        other = piece.t()[:, None, :, None] != _of_keys(memory, None, piece).t()[:, None, None]
        forbidden = other if forbidden is None else forbidden | other
    return forbidden


def _of_keys(memory: Tensor | None, of_memory: Tensor | None, of_input: Tensor) -> Tensor:
    """What is said of the memory's steps, 0 where nothing is, and after it what is said of the input's."""
    if memory is None:
        return of_input
    if of_memory is None:
        of_memory = torch.zeros_like(memory[..., 0], dtype=of_input.dtype)
    return torch.cat([of_memory, of_input])


class SRUppCell(SRUCell):
    """One layer of SRU++: that of SRU, with a module that attends in the place of its weight.

    Args:
        transform_module: computes U, (L, B, D * k), k = 3 or, with a skip term and input_size unlike D, 4: called with the input
            and, by keyword, mask_pad, attn_mask, memory, memory_mask_pad and, where it is given, starts. None: an `nn.Linear`
            without a bias or, with `projection_size`, a product of two, called with the input alone.
        projection_size: see `transform_module`.
        weight_c_init: bound of the uniform distribution that weight_c is drawn from.
        input_size, hidden_size, dropout, rnn_dropout, bidirectional, highway_bias, layer_norm, normalize_after, rescale,
        has_skip_term, use_tanh, v1, amp_recurrence_fp16: as of `SRUCell`, but for defaults.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        projection_size: int = 0,
        highway_bias: float = 0.0,
        layer_norm: bool = False,
        normalize_after: bool = True,
        transform_module: nn.Module | None = None,
        rescale: bool = False,
        has_skip_term: bool = True,
        use_tanh: bool = False,
        v1: bool = False,
        amp_recurrence_fp16: bool = True,
        weight_c_init: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)  # SRUCell's own would make, and draw, a weight
        self.input_size = checks.size("input_size", input_size)
        self.hidden_size = checks.size("hidden_size", hidden_size)
        self.projection_size = checks.integer("projection_size", projection_size)
        bidirectional, layer_norm, normalize_after, rescale = checks.flags(
            bidirectional=bidirectional, layer_norm=layer_norm, normalize_after=normalize_after, rescale=rescale
        )
        has_skip_term, use_tanh, v1, amp_recurrence_fp16 = checks.flags(
            has_skip_term=has_skip_term, use_tanh=use_tanh, v1=v1, amp_recurrence_fp16=amp_recurrence_fp16
        )
        if not isinstance(transform_module, nn.Module | None):
            raise TypeError(f"transform_module must be a torch.nn.Module or None, not {type(transform_module).__name__}")
        self.output_size = self.hidden_size * 2 if bidirectional else self.hidden_size
        self.dropout = checks.probability("dropout", dropout)
        self.rnn_dropout = checks.probability("rnn_dropout", rnn_dropout)
        self.bidirectional = bidirectional
        self.has_skip_term = has_skip_term
        self.highway_bias = checks.number("highway_bias", highway_bias)
        self.v1 = v1
        self.rescale = rescale
        self.activation_type = 1 if use_tanh else 0
        self.activation = "tanh" if use_tanh else "none"
        self.amp_recurrence_fp16 = amp_recurrence_fp16
        self.normalize_after = normalize_after
        self.weight_c_init = checks.bound("weight_c_init", weight_c_init)
        self.num_matrices = 4 if has_skip_term and input_size != self.output_size else 3
        if transform_module is None:
            inner, columns = self.projection_size, self.output_size * self.num_matrices
            if inner:
                first, second = nn.Linear(input_size, inner, bias=False), nn.Linear(inner, columns, bias=False)
                transform_module = nn.Sequential(first, second)
            else:
                transform_module = nn.Linear(input_size, columns, bias=False)
        self.transform_module = transform_module
        self.weight_c = nn.Parameter(torch.empty(2 * self.output_size))
        self.bias = nn.Parameter(torch.empty(2 * self.output_size))
        self.register_buffer("scale_x", torch.zeros(1, dtype=torch.float32))
        self.layer_norm = nn.LayerNorm(self.output_size if normalize_after else input_size) if layer_norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, but for those of layer_norm."""
        self.bias.zero_()
        self.bias[self.output_size :] = self.highway_bias
        self.scale_x[0] = (1 + math.exp(self.highway_bias) * 2) ** 0.5 if self.rescale and self.has_skip_term else 1.0
        _reset(self.transform_module)
        if self.v1:
            self.weight_c.zero_()
            self.weight_c.requires_grad = False
        else:
            assert self.weight_c_init is not None
            self.weight_c.uniform_(-self.weight_c_init, self.weight_c_init)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask_pad: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            input: (L, B, input_size); or, where transform_module takes it (`SRUppAttention` does not), one step, (B, input_size).
            c0: (B, D): initial state; absent: zeros.
            mask_pad: (L, B), of any dtype: non-zero where a step is padding. There the state passes, h is 0, and nothing attends
                to it.
            attn_mask, memory, memory_mask_pad: of transform_module, see `SRUppAttention`. As memory an earlier call's input.
            starts: (L, B), of any dtype: non-zero where a new sequence begins, which knows nothing of what came before.

        Returns:
            h: (L, B, D); for one step as `SRUCell` has it.
            c: (B, D), float32, or float64 for that: the state after the last step.
        """
        if not torch.jit.is_scripting():
            checks.inputs(self, input, c0, mask_pad, starts=starts)
        shape = sizes(input)
        if (len(shape) != 2 and len(shape) != 3) or shape[-1] != self.input_size:
            raise ValueError(f"input has shape {shape}; expected (L, B, input_size), with input_size = {self.input_size}")
        if c0 is None:
            c0 = torch.zeros(input.size(-2), self.output_size, dtype=input.dtype, device=input.device)
        elif sizes(c0) != [shape[-2], self.output_size]:
            raise ValueError(f"c0 has shape {sizes(c0)}; expected {[shape[-2], self.output_size]}, (B, output_size)")
        if mask_pad is not None:
            mask_pad = as_mask("mask_pad", mask_pad, shape)
        if starts is not None:
            starts = as_mask("starts", starts, shape)

        residual = input = input.contiguous()
        if self.layer_norm is not None and not self.normalize_after:
            input = self.layer_norm(input)
        mask_c: Tensor | None = None
        if self.training:
            if self.rnn_dropout > 0:
                input = input * self.get_dropout_mask_((input.size(-2), input.size(-1)), self.rnn_dropout)
            if self.dropout > 0:
                mask_c = self.get_dropout_mask_((input.size(-2), self.output_size), self.dropout)
        scale_val: Tensor | None = None
        if self.rescale:
            scale_val = self.scale_x
        U, V = self.compute_UV(input, c0, mask_pad, attn_mask, memory, memory_mask_pad, starts)
        h, c = self.apply_recurrence(U, V, residual, c0, scale_val, mask_c, mask_pad, starts)
        if self.layer_norm is not None and self.normalize_after:
            h = self.layer_norm(h)
        return h, c

    def compute_UV(
        self,
        input: Tensor,
        c0: Tensor | None,
        mask_pad: Tensor | None,
        attn_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask_pad: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """transform_module's U, (L, B, D * k), and weight_c."""
        takes_input_alone = False
        if not torch.jit.is_scripting():
            takes_input_alone = isinstance(self.transform_module, nn.Linear | nn.Sequential)
        if takes_input_alone:
            U = self.transform_module(input)
        elif starts is None:  # of which a module of one's own may not know
            U = self.transform_module(
                input, mask_pad=mask_pad, attn_mask=attn_mask, memory=memory, memory_mask_pad=memory_mask_pad
            )
        else:
            U = self.transform_module(
                input, mask_pad=mask_pad, attn_mask=attn_mask, memory=memory, memory_mask_pad=memory_mask_pad, starts=starts
            )
        shape = sizes(U)
        if shape[:-1] != sizes(input)[:-1] or shape[-1] != self.output_size * self.num_matrices:
            raise ValueError(
                f"transform_module returned U of shape {shape} for an input of shape {sizes(input)}; expected a last size "
                f"of output_size * num_matrices = {self.output_size * self.num_matrices}"
            )
        return U, self.weight_c

    # SRUCell's rename what sru 3.0 has into what it has itself.

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs)
        warn_of_load(
            self, [name for name, _ in self.named_parameters() if not (self.v1 and name == "weight_c")], state_dict, prefix
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


class SRUpp(nn.Module):
    """A stack of `SRUppCell`s with attention (Lei 2021, https://arxiv.org/abs/2102.12459).

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state, for each direction; D = output_size = hidden_size * directions.
        proj_size: features of the attention, a multiple of num_heads.
        num_layers: how many layers.
        dropout: probability of dropping a feature of U's projection and, but for the last layer, of the gated state.
        attn_dropout: probability of dropping a weight of the attention; see `SRUppAttention`.
        num_heads: of each attention.
        bidirectional: the second half of the output runs backward in time. The attention sees all steps in any case, but for
            those that attn_mask forbids.
        layer_norm: normalise each layer's input, or with `normalize_after` its h.
        normalize_after: see `layer_norm`.
        attn_layer_norm: normalise what the attention gives.
        highway_bias: initial bias of the reset gate.
        attention_every_n_layers: of so many layers the last attends, the others have `SRUppProjectedLinear`.
        attention_last_n_layers: if it is not -1, only so many layers attend, the last ones. Not with the above.
        rescale: multiply the skip term so that activations keep their variance.
        nn_rnn_compatible_return: c is returned as (num_layers * directions, B, hidden_size).
        proj_input_to_hidden_first: bring the input to the output's size first.
        weight_c_init: bound of the uniform distribution that each weight_c is drawn from.
    """

    __constants__ = [  # noqa: RUF012
        "bidirectional", "dropout", "hidden_size", "input_size", "nn_rnn_compatible_return", "num_directions", "num_heads",
        "num_layers", "output_size", "proj_size", "use_layer_norm",
    ]  # fmt: skip

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        num_heads: int = 1,
        bidirectional: bool = False,
        layer_norm: bool = False,
        normalize_after: bool = False,
        attn_layer_norm: bool = True,
        highway_bias: float = -2.0,
        attention_every_n_layers: int = 1,
        attention_last_n_layers: int = -1,
        rescale: bool = False,
        nn_rnn_compatible_return: bool = False,
        proj_input_to_hidden_first: bool = False,
        weight_c_init: float = 1.0,
    ) -> None:
        super().__init__()
        every = checks.size("attention_every_n_layers", attention_every_n_layers)
        last = checks.integer("attention_last_n_layers", attention_last_n_layers)
        if every != 1 and last != -1:
            raise ValueError("attention_every_n_layers and attention_last_n_layers exclude one another: give one")
        bidirectional, layer_norm, nn_rnn_compatible_return, proj_input_to_hidden_first = checks.flags(
            bidirectional=bidirectional, layer_norm=layer_norm, nn_rnn_compatible_return=nn_rnn_compatible_return,
            proj_input_to_hidden_first=proj_input_to_hidden_first,
        )  # fmt: skip
        self.input_size = checks.size("input_size", input_size)
        self.hidden_size = checks.size("hidden_size", hidden_size)
        self.proj_size = checks.size("proj_size", proj_size)
        self.num_layers = checks.size("num_layers", num_layers)
        self.num_heads = checks.size("num_heads", num_heads)
        if self.proj_size % self.num_heads:
            raise ValueError(f"proj_size = {proj_size} must be a multiple of num_heads = {num_heads}")
        self.output_size = self.hidden_size * 2 if bidirectional else self.hidden_size
        self.dropout = checks.probability("dropout", dropout)
        self.rnn_lst = nn.ModuleList()  # filled below: the first in a state dict, the last to be drawn
        self.bidirectional = bidirectional
        self.use_layer_norm = layer_norm
        self.num_directions = 2 if bidirectional else 1
        self.nn_rnn_compatible_return = nn_rnn_compatible_return
        self.input_to_hidden = None
        features = self.input_size
        if proj_input_to_hidden_first and features != self.output_size:
            self.input_to_hidden = nn.Linear(features, self.output_size, bias=False)
            nn.init.xavier_uniform_(self.input_to_hidden.weight)
            features = self.output_size
        for i in range(self.num_layers):
            attends = num_layers - i <= last if last != -1 else (i + 1) % every == 0
            sizes = (features, self.output_size * (3 if features == self.output_size else 4), self.proj_size)
            self.rnn_lst.append(
                SRUppCell(
                    features,
                    self.hidden_size,
                    dropout=dropout if i + 1 != num_layers else 0,
                    bidirectional=bidirectional,
                    highway_bias=highway_bias,
                    layer_norm=layer_norm,
                    normalize_after=normalize_after,
                    transform_module=SRUppAttention(
                        *sizes, num_heads=num_heads, dropout=dropout, attn_dropout=attn_dropout, layer_norm=attn_layer_norm
                    )
                    if attends
                    else SRUppProjectedLinear(*sizes, dropout=dropout, layer_norm=attn_layer_norm),
                    rescale=rescale,
                    weight_c_init=weight_c_init,
                )
            )
            features = self.output_size

    def __getitem__(self, n: int) -> SRUppCell:
        """The cell of layer n."""
        cell: SRUppCell = self.rnn_lst[n]
        return cell

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.input_to_hidden is not None:  # of the cells each speaks for itself
            warn_of_load(self, ["input_to_hidden.weight"], state_dict, prefix)

    def reset_parameters(self) -> None:
        for rnn in self.rnn_lst:
            rnn.reset_parameters()
        if self.input_to_hidden is not None:
            nn.init.xavier_uniform_(self.input_to_hidden.weight)

    def forward(
        self,
        input: Tensor,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: list[Tensor | None] | None = None,
        memory_mask_pad: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
        """Run all layers.

        Args:
            input: (L, B, input_size), or a PackedSequence.
            c0: (num_layers, B, D): the layers' initial states; absent: zeros.
            mask_pad: (L, B), of any dtype: non-zero where a step is padding. There the state passes, h is 0, and nothing attends
                to it. Not with a PackedSequence, which says so itself.
            attn_mask: (L, M + L), floating-point, added to the scores of each attention: 0 where it is allowed, -inf where not.
                A query that is left no key gets 0 from the attention.
            memory: for each layer (M, B, features of its input), or None: what it attends to besides, as an earlier call's
                "saved_inputs" or several of them joined in time.
            memory_mask_pad: (M, B), of any dtype: non-zero where the memory is padding.
            starts: (L, B), of any dtype: non-zero where a new sequence begins, in every layer: the results are those of the
                pieces run by themselves. c0 and memory are of what comes before the first start. Not with a PackedSequence.

        Returns:
            h: (L, B, D) of the last layer; a PackedSequence if the input is one.
            c: (num_layers, B, D), or with `nn_rnn_compatible_return` (num_layers * directions, B, hidden_size): the state after
                the last step.
            {"saved_inputs": [...]}: each layer's input, (L, B, features), with its history in autograd.

        Raises:
            ValueError: a shape or a device that does not fit, a number of memories other than num_layers.
            TypeError: what is no tensor, an attn_mask that is not floating-point.
        """
        if not torch.jit.is_scripting():
            if isinstance(input, PackedSequence):
                padded, lengths, mask_pad = unpacked(input, c0, mask_pad, starts)
                h, c, saved = self.forward(padded, c0, mask_pad, attn_mask, memory, memory_mask_pad)
                return repacked(h, lengths, input), c, saved
            checks.tensors(input, c0, mask_pad, starts)
            if memory is not None and not isinstance(memory, list | tuple):
                raise TypeError(f"memory must be a list of a tensor or None for each layer, not {type(memory).__name__}")
        shape = sizes(input)
        if len(shape) != 3 or shape[2] != self.input_size:
            raise ValueError(f"input has shape {shape}; expected (L, B, input_size), with input_size = {self.input_size}")
        if memory is not None and len(memory) != self.num_layers:
            raise ValueError(f"memory has {len(memory)} entries; expected one for each of the {self.num_layers} layers")
        batch = input.size(1)
        if c0 is None:
            zeros = torch.zeros(batch, self.output_size, dtype=input.dtype, device=input.device)
            states = [zeros for _ in range(self.num_layers)]
        elif sizes(c0) != [self.num_layers, shape[1], self.output_size]:
            raise ValueError(
                f"c0 has shape {sizes(c0)}; expected {[self.num_layers, shape[1], self.output_size]}, (num_layers, B, D)"
            )
        else:
            states = c0.unbind(0)
        if mask_pad is not None:
            mask_pad = as_mask("mask_pad", mask_pad, shape)
        if starts is not None:
            starts = as_mask("starts", starts, shape)
        h = input
        if self.input_to_hidden is not None:
            h = self.input_to_hidden(h)
        h = h.contiguous()
        saved_inputs: list[Tensor] = []
        last: list[Tensor] = []
        for i, rnn in enumerate(self.rnn_lst):
            saved_inputs.append(h)
            of_layer: Tensor | None = None
            if memory is not None:
                of_layer = memory[i]
            if starts is None:  # of which a cell of one's own may not know
                h, c = rnn(h, states[i], mask_pad=mask_pad, attn_mask=attn_mask, memory=of_layer, memory_mask_pad=memory_mask_pad)
            else:
                h, c = rnn(
                    h, states[i], mask_pad=mask_pad, attn_mask=attn_mask, memory=of_layer, memory_mask_pad=memory_mask_pad,
                    starts=starts,
                )  # fmt: skip
            last.append(c)
        c = torch.stack(last)
        if self.nn_rnn_compatible_return:
            c = c.view(self.num_layers, batch, self.num_directions, self.hidden_size).transpose(1, 2)
            c = c.reshape(self.num_layers * self.num_directions, batch, self.hidden_size)
        return h, c, {"saved_inputs": saved_inputs}


@torch.no_grad()
def _draw(first: nn.Linear, last: nn.Linear, dropout: float) -> None:
    """Both by Xavier's rule; dropout comes before the last, whose outputs keep their variance."""
    nn.init.xavier_uniform_(first.weight)
    nn.init.xavier_uniform_(last.weight)
    if dropout > 0:
        last.weight.mul_((1 - dropout) ** 0.5)


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()
    elif isinstance(module, nn.Sequential):
        for part in module:
            _reset(part)
    else:
        warnings.warn(f"transform_module ({type(module).__name__}) has no reset_parameters(): it stays as it is", stacklevel=3)
