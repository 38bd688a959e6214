"""`SRU`: one layer, in plain JAX: `init` makes a dict of parameters, `apply` takes it."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cusru.jax.functions import sru
from cusru.jax.operator import SAVE_EVERY, as_array
from cusru.problem import CHOICES, check_flag, check_rate, check_save_every, check_size, one_of

Parameters = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class SRU:
    """One layer of SRU, in one direction or two (Lei et al. 2018, https://arxiv.org/abs/1709.02755, equations 3 to 6).

    The parameters of `cusru.torch.SRUCell` of the same arguments, and of sru's, are taken as they are: "weight", (input_size,
    D * k); "weight_c" and "bias", (2 * D,). Here k is 3, or 4 where the skip is a projection, since sizes differ.

    Args:
        input_size: features of the input.
        hidden_size: features of the hidden state, for each direction; D = hidden_size * directions.
        bidirectional: the second half of the output runs backward in time.
        activation: "identity", "tanh", "relu" or "selu": h takes it of c.
        dropout: probability of dropping a feature of the gated state, the same at all steps, where `apply` is given a key.
        highway_bias: initial bias of the reset gate.
        has_skip_term: whether h has a skip (highway) term, of the input or, where sizes differ, of a projection of it.
        rescale: multiply the skip term so that activations keep their variance.
        v1: gates that do not see the state: there is no weight_c. One that is given is used, and does not learn.
        save_every: as for `cusru.jax.sru`.

    Raises:
        ValueError, TypeError: an argument; names it.
    """

    input_size: int
    hidden_size: int
    bidirectional: bool = False
    activation: str = "identity"
    dropout: float = 0.0
    highway_bias: float = 0.0
    has_skip_term: bool = True
    rescale: bool = True
    v1: bool = False
    save_every: int | None = SAVE_EVERY

    def __post_init__(self) -> None:
        check_size("input_size", self.input_size)
        check_size("hidden_size", self.hidden_size)
        for name in ("bidirectional", "has_skip_term", "rescale", "v1"):
            check_flag(name, getattr(self, name))
        one_of("activation", self.activation, CHOICES["activation"])
        check_rate("dropout", self.dropout)
        if not isinstance(self.highway_bias, numbers.Real) or not math.isfinite(self.highway_bias):
            raise ValueError(f"highway_bias must be a finite number; got {self.highway_bias!r}")
        check_save_every(self.save_every)

    @property
    def output_size(self) -> int:
        return self.hidden_size * 2 if self.bidirectional else self.hidden_size

    @property
    def _projects_skip(self) -> bool:
        return self.has_skip_term and self.input_size != self.output_size

    @property
    def scale_x(self) -> float:
        return math.sqrt(1 + 2 * math.exp(self.highway_bias)) if self.rescale and self.has_skip_term else 1.0

    def init(self, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Parameters:
        """Parameters drawn by the rules of the sru package (Kaiming's and Xavier's).

        Args:
            key: of jax.random.
            dtype: float64, float32, float16 or bfloat16.
        """
        of_weight, of_weight_c = jax.random.split(key)
        k = 4 if self._projects_skip else 3
        bound = math.sqrt(3 / self.input_size)  # E[w] = 0, Var[w] = 1 / input_size
        scales = [math.sqrt(1 - self.dropout), *([1.0] * 2 if self.v1 else [math.sqrt(0.5)] * 2), self.scale_x][:k]
        weight = jax.random.uniform(of_weight, (self.input_size, self.output_size, k), dtype, -bound, bound)
        weight = weight * jnp.asarray([[scales]], dtype)
        bias = jnp.concatenate([jnp.zeros(self.output_size, dtype), jnp.full(self.output_size, self.highway_bias, dtype)])
        parameters = {"weight": weight.reshape(self.input_size, -1), "bias": bias}
        if not self.v1:
            bound = math.sqrt(1.5)
            parameters["weight_c"] = jax.random.uniform(of_weight_c, (2 * self.output_size,), dtype, -bound, bound)
        return parameters

    def apply(
        self,
        parameters: Parameters,
        x: jax.Array,
        c0: jax.Array | None = None,
        *,
        mask_pad: jax.Array | None = None,
        starts: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Run the layer.

        Args:
            parameters: as `init` makes them.
            x: (L, B, input_size), the parameters' dtype.
            c0: (B, D): initial state; absent: zeros.
            mask_pad: (L, B), bool or uint8: non-zero where a step is padding. There the state passes and h is 0.
            starts: (L, B), bool or uint8: non-zero where a new sequence begins, which knows nothing of what came before.
            key: of jax.random, for dropout; absent: none is dropped.

        Returns:
            h: (L, B, D), x's dtype; and c_last: (B, D), float32, or float64 for that: the state after the last step.

        Raises:
            ValueError, TypeError: an argument; names it.
        """
        x = as_array("x", x)
        if x.ndim != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x has shape {x.shape}; expected (L, B, input_size), input_size = {self.input_size}")
        weight = parameters["weight"]
        k, width = 4 if self._projects_skip else 3, self.output_size
        if weight.shape != (self.input_size, width * k):
            raise ValueError(f"weight has shape {weight.shape}; expected {(self.input_size, width * k)}, (input_size, D * k)")
        if x.dtype != weight.dtype:
            raise TypeError(f"x has dtype {x.dtype}, and the parameters {weight.dtype}")
        weight_c = jax.lax.stop_gradient(parameters.get("weight_c")) if self.v1 else parameters["weight_c"]
        mask_c = None
        if key is not None and self.dropout:
            kept = jax.random.bernoulli(key, 1 - self.dropout, (x.shape[1], width))
            mask_c = kept.astype(x.dtype) / (1 - self.dropout)
        return sru(
            (x @ weight).reshape(*x.shape[:2], width, k), x if self.has_skip_term and k == 3 else None, bias=parameters["bias"],
            weight_c=weight_c, c0=c0, mask_c=mask_c, mask_pad=mask_pad, activation=self.activation,
            scale_x=self.scale_x, mask_target="gate", bidirectional=self.bidirectional, save_every=self.save_every, starts=starts,
        )  # fmt: skip
