"""SRU as a module of flax.nnx, and the adding problem (Hochreiter and Schmidhuber 1997, experiment 4) learnt with it.

    pip install ".[flax]" && python examples/jax_nnx.py

Each step of a sequence has a number from 0 to 1 and a mark, which two steps bear; what is asked for at the end is the sum of the
two numbers. Who always says 1 has a mean squared error of 1/6."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import cusru.jax


class SRU(nnx.Module):
    """`cusru.jax.SRU`, whose parameters are this module's."""

    def __init__(self, input_size: int, hidden_size: int, *, rngs: nnx.Rngs, **options: Any) -> None:
        self.layer = cusru.jax.SRU(input_size=input_size, hidden_size=hidden_size, **options)
        self.parameters = nnx.Dict({name: nnx.Param(a) for name, a in self.layer.init(rngs.params()).items()})

    def __call__(self, x: jax.Array, c0: jax.Array | None = None, **options: Any) -> tuple[jax.Array, jax.Array]:
        """x: (L, B, input_size); options: mask_pad, starts, key -> h, c_last."""
        return self.layer.apply({name: a[...] for name, a in self.parameters.items()}, x, c0, **options)


class Adder(nnx.Module):
    def __init__(self, hidden_size: int, layers: int, rngs: nnx.Rngs) -> None:
        sizes = [2] + [hidden_size] * layers
        self.layers = nnx.List([SRU(a, b, rngs=rngs, highway_bias=-1.0) for a, b in itertools.pairwise(sizes)])
        self.out = nnx.Linear(hidden_size, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(L, B, 2) -> (B,)"""
        for layer in self.layers:
            x, _ = layer(x)
        return self.out(x[-1])[:, 0]


def draw(key: jax.Array, length: int, batch: int) -> tuple[jax.Array, jax.Array]:
    """Sequences (L, B, 2) and sums (B,); one mark in each half."""
    of_numbers, of_first, of_second = jax.random.split(key, 3)
    numbers = jax.random.uniform(of_numbers, (length, batch))
    first = jax.random.randint(of_first, (batch,), 0, length // 2)
    second = jax.random.randint(of_second, (batch,), length // 2, length)
    steps = jnp.arange(length)[:, None]
    marks = ((steps == first) | (steps == second)).astype(numbers.dtype)
    return jnp.stack([numbers, marks], -1), (numbers * marks).sum(0)


@nnx.jit(static_argnames=("length", "batch"))
def step(model: Adder, optimizer: nnx.Optimizer, key: jax.Array, length: int, batch: int) -> jax.Array:
    x, sums = draw(key, length, batch)
    loss, gradients = nnx.value_and_grad(lambda model: ((model(x) - sums) ** 2).mean())(model)
    optimizer.update(model, gradients)
    return loss


def train(steps: int, length: int, batch: int, hidden_size: int, layers: int, seed: int = 0) -> list[float]:
    """The mean squared error at each step."""
    model = Adder(hidden_size, layers, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3)), wrt=nnx.Param)
    losses = []
    for key in jax.random.split(jax.random.key(seed + 1), steps):
        losses.append(float(step(model, optimizer, key, length, batch)))
        if len(losses) % 100 == 0:
            print(f"step {len(losses)}: mean squared error {sum(losses[-100:]) / 100:.4f}", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for name, default in dict(steps=600, length=50, batch=32, hidden=64, layers=2).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    losses = train(options.steps, options.length, options.batch, options.hidden, options.layers)
    last = losses[-50:]
    print(f"the last {len(last)}: {sum(last) / len(last):.4f}; who always says 1: {1 / 6:.4f}")


if __name__ == "__main__":
    main()
