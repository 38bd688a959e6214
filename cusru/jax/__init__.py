"""cusru in JAX: the recurrences under jit, grad, vmap, scan, checkpoint and shard_map (docs/jax.md).

h, c_last = cusru.jax.sru(u, x, bias=bias, weight_c=weight_c)
"""

from cusru.jax.functions import linear_recurrence, qrnn, sru

__all__ = ["linear_recurrence", "qrnn", "sru"]
