"""cusru in JAX: the recurrences under jit, grad, vmap, scan, checkpoint and shard_map; a layer; and time that is sharded
(docs/jax.md).

    h, c_last = cusru.jax.sru(u, x, bias=bias, weight_c=weight_c)
"""

from cusru.jax.functions import linear_recurrence, qrnn, sru
from cusru.jax.layer import SRU
from cusru.jax.sequence_parallel import (
    sequence_parallel_linear_recurrence,
    sequence_parallel_qrnn,
    sequence_parallel_sru,
)

__all__ = [
    "SRU", "linear_recurrence", "qrnn", "sequence_parallel_linear_recurrence", "sequence_parallel_qrnn", "sequence_parallel_sru",
    "sru",
]  # fmt: skip
