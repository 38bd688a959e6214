"""`SRUCell` and `SRU`: drop-ins for the classes of that name in the sru package 2.6.0, on `cusru.torch.sru`.

Constructor arguments, attributes, parameters and the methods that a subclass may override are those of sru; so are, for the
same seed, the initial parameters and the dropout masks. The recurrence of a cell, with u = U.view(L, B, D, k), V = weight_c
and m the dropout mask, drops out on the gate: h = s + m * r * (activation(c) - s), with s the input or its projection.
"""

# No `from __future__ import annotations` here: torch.jit.script reads these annotations.
import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from cusru.torch import checks
from cusru.torch.functions import sru
from cusru.torch.legacy import adopt_transform_module, rename_weights, takes_old_arguments, warn_of_load
from cusru.torch.operator import SAVE_EVERY, sizes_of


class SRUCell(nn.Module):
    """One layer of SRU, in one direction or two (Lei et al. 2018, https://arxiv.org/abs/1709.02755, equations 3 to 6).

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state, for each direction; D = output_size = hidden_size * directions.
        dropout: probability of dropping a feature of the gated state, the same at all steps.
        rnn_dropout: probability of dropping a feature of the input (not of the skip), the same at all steps; sru deprecates it.
        bidirectional: the second half of the output runs backward in time.
        n_proj: if it is below the input's and the output's size, the weight is a product through so many features.
        use_tanh: h takes tanh(c) in the place of c; sru deprecates it.
        highway_bias: initial bias of the reset gate.
        has_skip_term: whether h has a skip (highway) term, of the input or, where sizes differ, of a projection of it.
        layer_norm: normalise the input, or with `normalize_after` h.
        rescale: multiply the skip term so that activations keep their variance.
        v1: gates that do not see the state: weight_c is 0 and does not learn. One that is loaded is used.
        custom_m: a module that computes U, or (U, V), in the place of the weight: input -> U (L, B, D * k) and
            V (L, B, 2 * D), to which weight_c is added.
        amp_recurrence_fp16: under autocast, run the recurrence in autocast's dtype rather than in float32; the state is
            float32 in both.
        normalize_after: see `layer_norm`.
        weight_c_init: bound of the uniform distribution that weight_c is drawn from; None: sqrt(3/2).
    """

    __constants__ = [  # noqa: RUF012
        "activation", "activation_type", "amp_recurrence_fp16", "bidirectional", "dropout", "has_skip_term", "hidden_size",
        "highway_bias", "input_size", "keep_memory_order", "normalize_after", "num_matrices", "output_size",
        "projection_size", "rescale", "rnn_dropout", "save_every", "v1", "weight_c_init",
    ]  # fmt: skip

    scale_x: Tensor
    weight_proj: Tensor | None

    # What a pickle of the sru package has not
    amp_recurrence_fp16 = False
    normalize_after = False
    weight_c_init: float | None = None

    save_every = SAVE_EVERY
    keep_memory_order = False  # SRU(batch_first=True) sets it: h lies in memory as the input does, else as (L, B, D)

    @takes_old_arguments
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        n_proj: int = 0,
        use_tanh: bool = False,
        highway_bias: float = 0.0,
        has_skip_term: bool = True,
        layer_norm: bool = False,
        rescale: bool = True,
        v1: bool = False,
        custom_m: nn.Module | None = None,
        amp_recurrence_fp16: bool = False,
        normalize_after: bool = False,
        weight_c_init: float | None = None,
    ) -> None:
        super().__init__()
        input_size, hidden_size = checks.size("input_size", input_size), checks.size("hidden_size", hidden_size)
        n_proj = checks.integer("n_proj", n_proj)
        bidirectional, use_tanh, has_skip_term, layer_norm, rescale, v1, amp_recurrence_fp16, normalize_after = checks.flags(
            bidirectional=bidirectional, use_tanh=use_tanh, has_skip_term=has_skip_term, layer_norm=layer_norm, rescale=rescale,
            v1=v1, amp_recurrence_fp16=amp_recurrence_fp16, normalize_after=normalize_after,
        )  # fmt: skip
        dropout, rnn_dropout = checks.probability("dropout", dropout), checks.probability("rnn_dropout", rnn_dropout)
        highway_bias = checks.number("highway_bias", highway_bias)
        if weight_c_init is not None:
            weight_c_init = checks.bound("weight_c_init", weight_c_init)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = hidden_size * 2 if bidirectional else hidden_size
        self.dropout = dropout
        self.rnn_dropout = rnn_dropout
        self.bidirectional = bidirectional
        self.has_skip_term = has_skip_term
        self.highway_bias = highway_bias
        self.v1 = v1
        self.rescale = rescale
        self.activation_type = 1 if use_tanh else 0
        self.activation = "tanh" if use_tanh else "none"
        self.amp_recurrence_fp16 = amp_recurrence_fp16
        self.normalize_after = normalize_after
        self.weight_c_init = weight_c_init
        self.custom_m = custom_m
        self.projection_size = n_proj if 0 < n_proj < min(input_size, self.output_size) else 0
        self.num_matrices = 4 if has_skip_term and input_size != self.output_size else 3

        if custom_m is None:
            columns = self.output_size * self.num_matrices
            if self.projection_size:
                self.weight_proj = nn.Parameter(torch.empty(input_size, self.projection_size))
                self.weight = nn.Parameter(torch.empty(self.projection_size, columns))
            else:
                self.weight_proj = None
                self.weight = nn.Parameter(torch.empty(input_size, columns))
        self.weight_c = nn.Parameter(torch.empty(2 * self.output_size))
        self.bias = nn.Parameter(torch.empty(2 * self.output_size))
        self.register_buffer("scale_x", torch.zeros(1, dtype=torch.float32))
        self.layer_norm = nn.LayerNorm(self.output_size if normalize_after else input_size) if layer_norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew (Xavier's and Kaiming's rules, as sru applies them), in sru's order of drawing."""
        self.bias.zero_()
        self.bias[self.output_size :] = self.highway_bias
        scaled = self.rescale and self.has_skip_term
        scale = (1 + math.exp(self.highway_bias) * 2) ** 0.5 if scaled else 1.0
        self.scale_x[0] = scale

        if self.custom_m is None:
            # E[w] = 0 and Var[w] = 1 / rows
            rows = self.weight.size(0)
            self.weight.uniform_(-((3.0 / rows) ** 0.5), (3.0 / rows) ** 0.5)
            if self.weight_proj is not None:
                bound = (3.0 / self.weight_proj.size(0)) ** 0.5
                self.weight_proj.uniform_(-bound, bound)
            w = self.weight.view(rows, -1, self.hidden_size, self.num_matrices)  # the last axis: candidate, gates, skip
            if self.dropout > 0:
                w[..., 0].mul_((1 - self.dropout) ** 0.5)
            if self.rnn_dropout > 0:
                w.mul_((1 - self.rnn_dropout) ** 0.5)
            if self.layer_norm is not None:
                w.mul_(0.1)
            if scaled and self.num_matrices == 4:
                w[..., 3].mul_(scale)
        elif hasattr(self.custom_m, "reset_parameters"):
            self.custom_m.reset_parameters()
        else:
            warnings.warn(f"custom_m ({type(self.custom_m).__name__}) has no reset_parameters(): it stays as it is", stacklevel=2)

        if self.v1:
            self.weight_c.zero_()
            self.weight_c.requires_grad = False
            return
        if self.weight_c_init is None:
            self.weight_c.uniform_(-(3.0**0.5), 3.0**0.5)
            self.weight_c.mul_(0.5**0.5)
        else:
            self.weight_c.uniform_(-self.weight_c_init, self.weight_c_init)
        if self.custom_m is None:
            w[..., 1].mul_(0.5**0.5)
            w[..., 2].mul_(0.5**0.5)

    def forward(
        self, input: Tensor, c0: Tensor | None = None, mask_pad: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            input: (L, B, input_size); or one step, (B, input_size).
            c0: (B, D): initial state; absent: zeros.
            mask_pad: (L, B), of any dtype: non-zero where a step is padding. There the state passes and h is 0.
            starts: (L, B), of any dtype: non-zero where a new sequence begins, which knows nothing of what came before.

        Returns:
            h: (L, B, D); for one step (1, B, D) on a CPU and (B, D) on a GPU, as sru has it.
            c: (B, D), float32, or float64 for that: the state after the last step.
        """
        if not torch.jit.is_scripting():
            checks.inputs(self, input, c0, mask_pad, is_own=self.custom_m is None, starts=starts)
        shape = sizes(input)
        if len(shape) != 2 and len(shape) != 3:
            raise ValueError(f"input has shape {shape}; expected (L, B, input_size) or (B, input_size)")
        if self.custom_m is None and shape[-1] != self.input_size:
            raise ValueError(f"input has shape {shape}; expected a last size of input_size = {self.input_size}")
        if c0 is None:
            c0 = torch.zeros(input.size(-2), self.output_size, dtype=input.dtype, device=input.device)
        elif sizes(c0) != [shape[-2], self.output_size]:
            raise ValueError(f"c0 has shape {sizes(c0)}; expected {[shape[-2], self.output_size]}, (B, output_size)")
        if mask_pad is not None:
            mask_pad = as_mask("mask_pad", mask_pad, shape)
        if starts is not None:
            starts = as_mask("starts", starts, shape)

        if not self.keep_memory_order:
            input = input.contiguous()
        residual = input
        if self.layer_norm is not None and not self.normalize_after:
            input = self._normalized(input)
        mask_c: Tensor | None = None
        if self.training:
            if self.rnn_dropout > 0:
                input = input * self.get_dropout_mask_((input.size(-2), input.size(-1)), self.rnn_dropout)
            if self.dropout > 0:
                mask_c = self.get_dropout_mask_((input.size(-2), self.output_size), self.dropout)
        scale_val: Tensor | None = None
        if self.rescale:
            scale_val = self.scale_x if torch.jit.is_scripting() else _own(self, "scale_x")
        U, V = self.compute_UV(input, c0, mask_pad)
        if starts is None:  # of which a subclass's own method may not know
            h, c = self.apply_recurrence(U, V, residual, c0, scale_val, mask_c, mask_pad)
        else:
            h, c = self.apply_recurrence(U, V, residual, c0, scale_val, mask_c, mask_pad, starts)
        if self.layer_norm is not None and self.normalize_after:
            h = self._normalized(h)
        return h, c

    def _normalized(self, a: Tensor) -> Tensor:
        """layer_norm of the tensor as it lies in memory: it would copy another."""
        assert self.layer_norm is not None
        if self.keep_memory_order and a.dim() == 3:
            return self.layer_norm(a.transpose(0, 1)).transpose(0, 1)
        return self.layer_norm(a)

    def apply_recurrence(
        self,
        U: Tensor,
        V: Tensor,
        residual: Tensor,
        c0: Tensor,
        scale_val: Tensor | None,
        mask_c: Tensor | None,
        mask_pad: Tensor | None,
        starts: Tensor | None = None,
    ) -> list[Tensor]:
        """The recurrence itself: U and V from `compute_UV`, the cell's input, (B, D) c0 and mask_c -> h and c."""
        dtype, own_bias = U.dtype, self.bias if torch.jit.is_scripting() else _own(self, "bias")
        stays = self.amp_recurrence_fp16 and (dtype == torch.float16 or dtype == torch.bfloat16)
        if not stays and (residual.dtype != dtype or own_bias.dtype != dtype):
            dtype = torch.promote_types(torch.promote_types(dtype, residual.dtype), own_bias.dtype)
        steps = residual if residual.dim() == 3 else residual.unsqueeze(0)
        shape, width = steps.shape, self.output_size
        k = sizes(U)[-1] // width

        u = U.reshape(shape[0], shape[1], width, k)
        x: Tensor | None = None
        if self.has_skip_term and k == 3:
            x = steps if steps.dtype == dtype else steps.to(dtype)
        if u.dtype != dtype:
            u = u.to(dtype)
        bias = to_parameter(own_bias, dtype)
        weight_c = to_parameter(V.reshape(shape[0], shape[1], width, 2) if V.dim() > 1 else V, dtype)
        c0_ = to_parameter(c0, dtype)
        mask_c = to_parameter(mask_c, dtype)
        scale_val = to_parameter(scale_val, dtype)
        activation, activation_type = "identity", self.activation_type
        if activation_type == 1:
            activation = "tanh"
        elif activation_type == 2:
            activation = "relu"
        elif activation_type == 3:
            activation = "selu"
        if torch.jit.is_scripting():
            h, _, c = torch.ops.cusru.sru_forward(
                u, x, bias, weight_c, c0_, mask_c, mask_pad, scale_val, 1.0, activation, "identity", "gate",
                self.bidirectional, self.save_every, starts,
            )  # fmt: skip
        else:
            h, c = sru(
                u, x, bias=bias, weight_c=weight_c, c0=c0_, mask_c=mask_c, mask_pad=mask_pad, activation=activation,
                scale_x=1.0 if scale_val is None else scale_val, mask_target="gate", bidirectional=self.bidirectional,
                save_every=self.save_every, starts=starts,
            )  # fmt: skip
        if residual.dim() == 2 and residual.is_cuda:
            h = h.squeeze(0)
        return [h, c]

    def compute_UV(self, input: Tensor, c0: Tensor | None, mask_pad: Tensor | None) -> tuple[Tensor, Tensor]:
        """The projected input U (see `compute_U`) and V: weight_c, or the custom module's V (L, B, 2 * D) plus weight_c."""
        if self.custom_m is None:
            return self.compute_U(input), self.weight_c if torch.jit.is_scripting() else _own(self, "weight_c")
        ret = self.custom_m(input)
        if isinstance(ret, tuple) or isinstance(ret, list):  # noqa: SIM101  (torch.jit.script)
            if len(ret) != 2:
                raise ValueError(f"custom_m must return U or (U, V); it returned {len(ret)} tensors")
            U, V = ret[0], ret[1]
            if V.dim() == 3 and input.dim() == 3 and sizes(V)[:2] != sizes(input)[:2]:
                raise ValueError(f"custom_m returned V of shape {sizes(V)} for an input of shape {sizes(input)}")
            if sizes(V)[-1] != self.output_size * 2:
                raise ValueError(f"custom_m returned V of shape {sizes(V)}; expected a last size of {self.output_size * 2}")
            V = V + self.weight_c
        else:
            U, V = ret, self.weight_c
        if U.dim() == 3 and input.dim() == 3 and sizes(U)[:2] != sizes(input)[:2]:
            raise ValueError(f"custom_m returned U of shape {sizes(U)} for an input of shape {sizes(input)}")
        if sizes(U)[-1] != self.output_size * self.num_matrices:
            raise ValueError(
                f"custom_m returned U of shape {sizes(U)}; expected a last size of output_size * num_matrices = "
                f"{self.output_size * self.num_matrices}"
            )
        return U, V

    def compute_U(self, input: Tensor) -> Tensor:
        """(L, B, input_size) -> (L * B, D * k); in a stack that is batch first, (L, B, D * k) that lies so in memory."""
        batch_first = self.keep_memory_order and input.dim() == 3
        x = input.transpose(0, 1) if batch_first else input
        if x.dim() == 3:
            x = x.reshape(-1, self.input_size)
        weight_proj = self.weight_proj
        if weight_proj is not None:
            x = x.mm(weight_proj)
        U = x.mm(self.weight if torch.jit.is_scripting() else _own(self, "weight"))
        if batch_first:
            shape = input.shape
            return U.view(shape[1], shape[0], U.size(-1)).transpose(0, 1)
        return U

    def get_dropout_mask_(self, size: tuple[int, int], p: float) -> Tensor:
        """A mask of 0s, with probability p, and 1 / (1 - p)s."""
        return self.bias.new_empty(size).bernoulli_(1 - p).div_(1 - p)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        """torch's, for state dicts of sru 3.0 too; `state_dict` is load_state_dict's own copy, which children see next."""
        more = rename_weights(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)  # its hooks may rename too
        names = [name for name, _ in self.named_parameters() if not (self.v1 and name == "weight_c")]  # which is 0 by then
        warn_of_load(self, names, state_dict, prefix, more)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "transform_module" in self._modules:  # pickled whole by sru 3.0
            adopt_transform_module(self)

    def extra_repr(self) -> str:
        s = f"{self.input_size}, {self.hidden_size}"
        for name, default in (("projection_size", 0), ("dropout", 0), ("rnn_dropout", 0), ("bidirectional", False),
                              ("highway_bias", 0), ("activation", "none"), ("v1", False), ("rescale", None),
                              ("has_skip_term", True)):  # fmt: skip
            if getattr(self, name) != default:
                s += f", {name}={getattr(self, name)}"
        return s


class SRU(nn.Module):
    """A stack of `SRUCell`s.

    Args:
        input_size, hidden_size, dropout, rnn_dropout, bidirectional, use_tanh, layer_norm, highway_bias, has_skip_term,
        rescale, v1, amp_recurrence_fp16, normalize_after, weight_c_init: of every layer, see `SRUCell`; but the last layer
            has no `dropout`.
        num_layers: how many layers.
        projection_size: `SRUCell`'s n_proj; or a list of one for each layer, as sru 3.0 takes it.
        nn_rnn_compatible_return: c is returned as (num_layers * directions, B, hidden_size), and c0 may be given so.
        custom_m: a list of one module for each layer, or a module of which each layer gets a copy.
        proj_input_to_hidden_first: bring the input to the output's size first, so that every layer's skip is its input.
        batch_first: input, h and mask_pad have the batch before the time; nothing is copied for it. c0 and c have not.
    """

    __constants__ = [  # noqa: RUF012
        "amp_recurrence_fp16", "batch_first", "bidirectional", "dropout", "has_skip_term", "hidden_size", "input_size",
        "nn_rnn_compatible_return", "num_directions", "num_layers", "output_size", "projection_size", "rnn_dropout",
        "use_layer_norm",
    ]  # fmt: skip

    # What a pickle of the sru package has not
    batch_first = False
    amp_recurrence_fp16 = False
    nn_rnn_compatible_return = False

    @takes_old_arguments
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        projection_size: int | Sequence[int] = 0,
        use_tanh: bool = False,
        layer_norm: bool = False,
        highway_bias: float = 0.0,
        has_skip_term: bool = True,
        rescale: bool = False,
        v1: bool = False,
        nn_rnn_compatible_return: bool = False,
        custom_m: nn.Module | list[nn.Module] | None = None,
        proj_input_to_hidden_first: bool = False,
        amp_recurrence_fp16: bool = False,
        normalize_after: bool = False,
        weight_c_init: float | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        input_size, hidden_size = checks.size("input_size", input_size), checks.size("hidden_size", hidden_size)
        num_layers = checks.size("num_layers", num_layers)
        dropout, rnn_dropout = checks.probability("dropout", dropout), checks.probability("rnn_dropout", rnn_dropout)
        bidirectional, use_tanh, layer_norm, has_skip_term, amp_recurrence_fp16 = checks.flags(
            bidirectional=bidirectional, use_tanh=use_tanh, layer_norm=layer_norm, has_skip_term=has_skip_term,
            amp_recurrence_fp16=amp_recurrence_fp16,
        )  # fmt: skip
        nn_rnn_compatible_return, proj_input_to_hidden_first, batch_first = checks.flags(
            nn_rnn_compatible_return=nn_rnn_compatible_return, proj_input_to_hidden_first=proj_input_to_hidden_first,
            batch_first=batch_first,
        )  # fmt: skip
        of_layers = isinstance(projection_size, list | tuple)
        given: Any = projection_size if of_layers else [projection_size] * num_layers
        n_proj = [checks.integer("projection_size", size) for size in given]
        if len(n_proj) != num_layers:
            raise ValueError(f"projection_size has {len(n_proj)} numbers; expected one for each of the {num_layers} layers")
        if isinstance(custom_m, list | tuple | nn.ModuleList) and len(custom_m) < num_layers:
            raise ValueError(f"custom_m has {len(custom_m)} modules; expected one for each of the {num_layers} layers")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = hidden_size * 2 if bidirectional else hidden_size
        self.num_layers = num_layers
        self.dropout = dropout
        self.rnn_dropout = rnn_dropout
        self.projection_size = n_proj if of_layers else n_proj[0]
        self.bidirectional = bidirectional
        self.use_layer_norm = layer_norm
        self.has_skip_term = has_skip_term
        self.num_directions = 2 if bidirectional else 1
        self.nn_rnn_compatible_return = nn_rnn_compatible_return
        self.amp_recurrence_fp16 = amp_recurrence_fp16
        self.batch_first = batch_first
        if proj_input_to_hidden_first and input_size != self.output_size:
            first_size = self.output_size
            self.input_to_hidden = nn.Linear(input_size, self.output_size, bias=False)
        else:
            first_size = input_size
            self.input_to_hidden = None
        if rnn_dropout > 0:
            warnings.warn("rnn_dropout is deprecated in sru: use dropout", stacklevel=3)
        if use_tanh:
            warnings.warn("use_tanh is deprecated in sru", stacklevel=3)
        self.rnn_lst = nn.ModuleList(
            SRUCell(
                first_size if i == 0 else self.output_size,
                hidden_size,
                dropout=dropout if i + 1 != num_layers else 0,
                rnn_dropout=rnn_dropout,
                bidirectional=bidirectional,
                n_proj=n_proj[i],
                use_tanh=use_tanh,
                highway_bias=highway_bias,
                has_skip_term=has_skip_term,
                layer_norm=layer_norm,
                rescale=rescale,
                v1=v1,
                custom_m=custom_m[i] if isinstance(custom_m, list | tuple | nn.ModuleList) else copy.deepcopy(custom_m),
                amp_recurrence_fp16=amp_recurrence_fp16,
                normalize_after=normalize_after,
                weight_c_init=weight_c_init,
            )
            for i in range(num_layers)
        )
        for rnn in self.rnn_lst:
            rnn.keep_memory_order = batch_first

    def __getitem__(self, n: int) -> SRUCell:
        """The cell of layer n, as in sru 3.0."""
        cell: SRUCell = self.rnn_lst[n]
        return cell

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.input_to_hidden is not None:  # of the cells each speaks for itself
            warn_of_load(self, ["input_to_hidden.weight"], state_dict, prefix)

    def reset_parameters(self) -> None:
        for rnn in self.rnn_lst:
            rnn.reset_parameters()
        if self.input_to_hidden is not None:
            self.input_to_hidden.reset_parameters()

    def forward(
        self, input: Tensor, c0: Tensor | None = None, mask_pad: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run all layers.

        Args:
            input: (L, B, input_size), with `batch_first` (B, L, input_size); or a PackedSequence.
            c0: (num_layers, B, D): the layers' initial states, D = hidden_size * directions; absent: zeros. With
                `nn_rnn_compatible_return` also (num_layers * directions, B, hidden_size).
            mask_pad: (L, B), with `batch_first` (B, L), of any dtype: non-zero where a step is padding. There the state
                passes and h is 0. Not with a PackedSequence, which says so itself.
            starts: (L, B), with `batch_first` (B, L), of any dtype: non-zero where a new sequence begins, in every layer: the
                results are those of the pieces run by themselves. So documents or episodes lie end to end. Not with a
                PackedSequence.

        Returns:
            h: (L, B, D), with `batch_first` (B, L, D), of the last layer; a PackedSequence if the input is one.
            c: (num_layers, B, D), or with `nn_rnn_compatible_return` (num_layers * directions, B, hidden_size): the state
                after the last step.
        """
        if not torch.jit.is_scripting():
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, c0, mask_pad, starts)
            checks.tensors(input, c0, mask_pad, starts)
        if input.dim() != 3:
            raise ValueError(f"input has shape {list(input.shape)}; expected 3 dimensions, (L, B, input_size)")
        if not self.batch_first:
            return self._forward(input, c0, mask_pad, starts)
        if mask_pad is not None:
            if sizes(mask_pad) != sizes(input)[:2]:
                raise ValueError(f"mask_pad has shape {sizes(mask_pad)}; expected {sizes(input)[:2]}, (B, L)")
            mask_pad = mask_pad.transpose(0, 1)
        if starts is not None:
            if sizes(starts) != sizes(input)[:2]:
                raise ValueError(f"starts has shape {sizes(starts)}; expected {sizes(input)[:2]}, (B, L)")
            starts = starts.transpose(0, 1)
        h, c = self._forward(input.transpose(0, 1), c0, mask_pad, starts)
        return h.transpose(0, 1), c

    def _forward_packed(
        self, input: PackedSequence, c0: Tensor | None, mask_pad: Tensor | None, starts: Tensor | None
    ) -> tuple[Any, Tensor]:
        padded, lengths, mask_pad = unpacked(input, c0, mask_pad, starts)
        h, c = self._forward(padded, c0, mask_pad, None)
        return repacked(h, lengths, input), c

    def _forward(self, input: Tensor, c0: Tensor | None, mask_pad: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        shape = sizes(input)
        if shape[2] != self.input_size:
            raise ValueError(f"input has shape {shape}; expected a last size of input_size = {self.input_size}")
        if c0 is None:
            zeros = torch.zeros(input.size(1), self.output_size, dtype=input.dtype, device=input.device)
            states = [zeros for _ in range(self.num_layers)]
        else:
            states = self._states_of_layers(c0, shape[1]).unbind(0)
        if mask_pad is not None:
            mask_pad = as_mask("mask_pad", mask_pad, shape)
        if starts is not None:
            starts = as_mask("starts", starts, shape)
        h = input
        if self.input_to_hidden is not None:
            h = self.input_to_hidden(h.transpose(0, 1)).transpose(0, 1) if self.batch_first else self.input_to_hidden(h)
        last: list[Tensor] = []
        for i, rnn in enumerate(self.rnn_lst):
            if starts is None:  # of which a cell of one's own may not know
                h, c = rnn(h, states[i], mask_pad=mask_pad)
            else:
                h, c = rnn(h, states[i], mask_pad=mask_pad, starts=starts)
            last.append(c)
        c = torch.stack(last)
        if self.nn_rnn_compatible_return:
            batch = input.size(1)
            c = c.view(self.num_layers, batch, self.num_directions, self.hidden_size).transpose(1, 2)
            c = c.reshape(self.num_layers * self.num_directions, batch, self.hidden_size).contiguous()
        return h, c

    def _states_of_layers(self, c0: Tensor, batch: int) -> Tensor:
        """c0 as (num_layers, B, D)."""
        of_layers = [self.num_layers, batch, self.output_size]
        shape = sizes(c0)
        if shape == of_layers:
            return c0
        of_rnn = [self.num_layers * self.num_directions, batch, self.hidden_size]
        if self.nn_rnn_compatible_return and shape == of_rnn:
            c0 = c0.reshape(self.num_layers, self.num_directions, -1, self.hidden_size).transpose(1, 2)
            return c0.reshape(self.num_layers, -1, self.output_size)
        expected = f"{of_layers} or {of_rnn}" if self.nn_rnn_compatible_return else f"{of_layers}"
        raise ValueError(f"c0 has shape {shape}; expected {expected}")

    def make_backward_compatible(self) -> None:
        """Does nothing, for callers of sru's method: the models that needed it name modules that sru 2.6.0 has not either."""


def unpacked(
    input: PackedSequence, c0: Tensor | None, mask_pad: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences side by side, (L, B, input_size), their lengths (B,), and mask_pad (L, B)."""
    if mask_pad is not None:
        raise ValueError("mask_pad cannot be given with a PackedSequence, whose lengths say what is padding")
    if starts is not None:
        raise ValueError("starts cannot be given with a PackedSequence, each of whose sequences has a place of its own")
    checks.tensors(input.data, c0, mask_pad)
    if input.data.dim() != 2:
        raise ValueError(f"input packs data of shape {list(input.data.shape)}; expected 2 dimensions, (steps, input_size)")
    padded, lengths = pad_packed_sequence(input)
    steps = torch.arange(padded.size(0), device=padded.device)
    return padded, lengths, steps.unsqueeze(1) >= lengths.to(padded.device)


def repacked(h: Tensor, lengths: Tensor, like: PackedSequence) -> Any:
    # The rows of .data keep their places, as those of nn.LSTM do: sequences of one length are not sorted anew.
    order = like.sorted_indices
    if order is None and like.unsorted_indices is not None:
        order = torch.argsort(like.unsorted_indices)
    if order is not None:
        h, lengths = h.index_select(1, order), lengths[order.to(lengths.device)]
    data = pack_padded_sequence(h, lengths).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def _own(cell: SRUCell, name: str) -> Tensor:
    """cell.name, a parameter or buffer, without the detour of torch's __getattr__, which costs 0.5 us."""
    tensors = cell._buffers if name == "scale_x" else cell._parameters
    return tensors[name] if name in tensors else getattr(cell, name)


def sizes(a: Tensor) -> list[int]:
    if not torch.jit.is_scripting() and _tracing_state() is not None:
        return sizes_of(a)
    return list(a.shape)


_tracing_state = torch._C._get_tracing_state


def as_mask(name: str, mask: Tensor, shape: list[int]) -> Tensor:
    """(L, B) bool, for an input of that shape; where it is one step of 2 dimensions also (B,)."""
    expected = shape[:-1]
    if len(shape) == 2:
        expected = [1, expected[0]]
        if mask.dim() == 1:
            mask = mask.unsqueeze(0)
    if sizes(mask) != expected:
        raise ValueError(f"{name} has shape {sizes(mask)}; expected {expected}, (L, B)")
    return mask if mask.dtype == torch.bool else mask != 0


def to_parameter(a: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In the dtype of u or of the state, which is what the recurrence takes."""
    if a is None or a.dtype == dtype:
        return a
    return a.to(torch.float64 if dtype == torch.float64 else torch.float32)
