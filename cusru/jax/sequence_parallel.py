"""Recurrences over a sequence whose time is sharded: `sequence_parallel_sru`, `sequence_parallel_qrnn` and
`sequence_parallel_linear_recurrence`, to be called within shard_map.

Where a recurrence is linear in c, a shard takes the state before it, c, to kept * c + taken_in. Two runs tell these: one that
begins at 1 and takes nothing in, and one that begins at 0. The shards exchange them, each works out the state in which it begins,
and runs from there. All of it is made of functions that have derivatives, and so has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cusru.arguments import STATES
from cusru.jax.functions import linear_recurrence, qrnn, sru
from cusru.jax.operator import SAVE_EVERY


def sequence_parallel_sru(
    u: jax.Array,
    x: jax.Array | None = None,
    *,
    axis_name: str,
    bias: jax.Array | None = None,
    weight_c: None = None,
    c0: jax.Array | None = None,
    mask_c: jax.Array | None = None,
    mask_pad: jax.Array | None = None,
    activation: str = "identity",
    candidate: str = "identity",
    scale_x: float | jax.Array = 1.0,
    mask_target: str = "state",
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`cusru.jax.sru` without weight_c (SRU v1), within shard_map, where time lies along the mesh axis `axis_name`.

    Args:
        u, x, mask_pad, starts: this shard's steps, (L / shards, B, ...).
        axis_name: the mesh axis, its shards in the order of time.
        c0: (B, D): the state in which the whole sequence begins, the same in each shard.
        bias, mask_c, scale_x: the same in each shard.
        weight_c: must be None: SRU v2 is not linear in c, so that a shard cannot tell what it does to a state before it has that.

    The other arguments are those of `cusru.jax.sru`. It takes three runs of the shard forward, and three backward; each shard
    tells the others 2 * B * D values of the state's dtype, and with `starts` B * D bytes.

    Returns:
        h: this shard's steps, as `sru` has it; and c_last: (B, D), the state after the whole sequence, the same in each shard.

    Raises:
        As `sru`; ValueError where weight_c is given.
    """
    if weight_c is not None:
        raise ValueError(
            "weight_c must be None: SRU v2 is not linear in c, so that no shard can begin before the one before it has ended. "
            "Shard the batch instead, or pipeline over it: a device that has ended its piece of one batch runs that of the next"
        )
    options: dict[str, Any] = dict(
        bias=bias, mask_c=mask_c, mask_pad=mask_pad, activation=activation, candidate=candidate, mask_target=mask_target,
        scale_x=scale_x, bidirectional=bidirectional, save_every=save_every, starts=starts, reverse=reverse,
    )  # fmt: skip
    return _run(
        lambda c0: sru(u, x, c0=c0, **options)[0],
        lambda c0: sru(u, c0=c0, **options)[1],
        lambda c0: sru(jnp.asarray(u).at[..., 0].set(0), c0=c0, **options)[1],
        u, axis_name, c0, starts, bidirectional, reverse,
    )  # fmt: skip


def sequence_parallel_qrnn(
    u: jax.Array,
    *,
    axis_name: str,
    pooling: str = "fo",
    gate: str = "forget",
    c0: jax.Array | None = None,
    zoneout: float | jax.Array | None = None,
    mask_pad: jax.Array | None = None,
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`cusru.jax.qrnn` within shard_map, where time lies along the mesh axis `axis_name`: see `sequence_parallel_sru`."""
    options: dict[str, Any] = dict(
        pooling=pooling, gate=gate, zoneout=zoneout, mask_pad=mask_pad, bidirectional=bidirectional, save_every=save_every,
        starts=starts, reverse=reverse,
    )  # fmt: skip
    return _run(
        lambda c0: qrnn(u, c0=c0, **options)[0],
        lambda c0: qrnn(u, c0=c0, **options)[1],
        lambda c0: qrnn(jnp.asarray(u).at[..., 0].set(0), c0=c0, **options)[1],
        u, axis_name, c0, starts, bidirectional, reverse,
    )  # fmt: skip


def sequence_parallel_linear_recurrence(
    a: jax.Array,
    b: jax.Array,
    *,
    axis_name: str,
    form: str = "affine",
    c0: jax.Array | None = None,
    mask_pad: jax.Array | None = None,
    bidirectional: bool = False,
    save_every: int | None = SAVE_EVERY,
    starts: jax.Array | None = None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`cusru.jax.linear_recurrence` within shard_map, where time lies along the mesh axis `axis_name`: see
    `sequence_parallel_sru`. a of (B, D) or (D,) is the same in each shard."""
    options: dict[str, Any] = dict(
        form=form, mask_pad=mask_pad, bidirectional=bidirectional, save_every=save_every, starts=starts, reverse=reverse
    )
    return _run(
        lambda c0: linear_recurrence(a, b, c0=c0, **options)[0],
        lambda c0: linear_recurrence(a, b, c0=c0, **options)[1],
        lambda c0: linear_recurrence(a, jnp.zeros_like(b), c0=c0, **options)[1],
        b, axis_name, c0, starts, bidirectional, reverse,
    )  # fmt: skip


def _run(
    h: Callable[..., jax.Array], c_last: Callable[..., jax.Array], c_last_of_nothing: Callable[..., jax.Array], u: jax.Array,
    axis_name: str, c0: jax.Array | None, starts: jax.Array | None, bidirectional: bool, reverse: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The first three are functions of the initial state; of nothing: where all candidates are 0."""
    jax.eval_shape(lambda: h(c0))  # what is wrong is said of the caller's own arguments
    shape, state = u.shape[1:3], STATES[u.dtype.name]
    kept, taken_in = c_last_of_nothing(jnp.ones(shape, state)), c_last(jnp.zeros(shape, state))
    shards, shard = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def table(own: jax.Array) -> jax.Array:
        """That of each shard: a sum of tables in which each has filled in its own row, so known to be the same everywhere."""
        return jax.lax.psum(jnp.zeros((shards, *own.shape), own.dtype).at[shard].set(own), axis_name)

    half = shape[1] // 2 if bidirectional else shape[1]
    runs_back = ((np.arange(shape[1]) >= half) != bool(reverse))[None]

    def in_order(a: jax.Array) -> jax.Array:
        """Of each shard: from the order of time to that in which a column comes to them, or back."""
        return jnp.where(np.expand_dims(runs_back, tuple(range(a.ndim - 2))), a[::-1], a)

    cuts = None
    if starts is not None and starts.shape[0]:
        # A column that runs back ends a sequence here: what it hands on to the shard before in time, the next to run, is nothing.
        begins = starts.astype(bool)[..., None]
        ended = begins[0] & runs_back & (shard > 0)
        kept, taken_in = jnp.where(ended, 0, kept), jnp.where(ended, 0, taken_in)
        # No state goes past a start, be it NaN, which times 0 is NaN.
        cuts = in_order(table((ended | begins[1:].any(0) | (begins[0] & ~runs_back)).astype(jnp.uint8)))
    summaries = in_order(table(jnp.stack([kept, taken_in])))
    c = jnp.zeros(shape, state) if c0 is None else jnp.asarray(c0, state)
    arriving = []
    for one in range(shards):
        arriving.append(c)
        factor, summand = summaries[one]
        c = c if cuts is None else jnp.where(cuts[one] != 0, 0, c)
        c = jnp.where((c == 0) & ~jnp.isfinite(factor), 0, factor) * c + summand  # 0 * inf is 0 here
    return h(in_order(jnp.stack(arriving))[shard]), c
