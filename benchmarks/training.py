"""Training on a CPU: the recurrence under torch's autograd, cusru.torch.sru beside the one that the `sru` package trains with.

    OMP_NUM_THREADS=1 python -m benchmarks.training [--rounds 15]

Each round runs both, forward and backward, on the same values, one after the other, each for some time in a row, as a training
job does; a time is the median of the rounds' means, the ratio that of the rounds' own ratios, so that a machine whose speed
drifts, or that others use, gives nearly the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any, NamedTuple

from benchmarks import peers
from cusru import measuring

TURN = 0.2  # seconds of one package's calls in a row, 3 at least


class Shape(NamedTuple):
    L: int
    B: int
    D: int
    k: int = 3
    bidirectional: bool = False
    dropout: bool = False
    padding: bool = False


SHAPES = (
    Shape(20, 1, 32),
    Shape(32, 4, 64),
    Shape(100, 32, 128),
    Shape(128, 8, 256),
    Shape(128, 32, 512),
    Shape(512, 8, 256),
    Shape(100, 16, 200, bidirectional=True, dropout=True, padding=True),
    Shape(100, 16, 200, k=4, dropout=True),
)


class Ratio(NamedTuple):
    theirs: float  #: seconds, the median round's
    ours: float
    ratio: float  #: median over the rounds of theirs / ours


def measure(shape: Shape, rounds: int) -> Ratio:
    """Forward and backward with both packages in turn; raises peers.Unavailable where `sru` cannot be imported."""
    torch = peers.import_or_say_why("torch", 'pip install ".[torch]"')
    ops = peers.import_or_say_why("sru.ops", 'pip install ".[peers]"')
    sru = peers.import_or_say_why("cusru.torch").sru
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int, scale: float = 1.0) -> Any:
        return (scale * torch.randn(*size, generator=generator)).requires_grad_()

    length, batch, width = shape[:3]
    U, x = leaf(length, batch, width * shape.k), leaf(length, batch, width)
    weight_c, bias, c0 = leaf(2 * width, scale=0.5**0.5), leaf(2 * width, scale=0.1), leaf(batch, width)
    mask_c = torch.full((batch, width), 1.25) if shape.dropout else None
    mask_pad = torch.arange(length)[:, None] >= length - torch.arange(batch) if shape.padding else None
    grads = torch.randn(length, batch, width, generator=generator), torch.randn(batch, width, generator=generator)
    leaves = [U, weight_c, bias, c0] + ([x] if shape.k == 3 else [])

    def theirs() -> Any:
        halves = 2 if shape.bidirectional else 1
        return ops.elementwise_recurrence_naive(
            U, x, weight_c, bias, c0, 0, width // halves, shape.bidirectional, True, None, mask_c, mask_pad
        )

    def ours() -> Any:
        return sru(
            U.view(length, batch, width, shape.k), x if shape.k == 3 else None, bias=bias, weight_c=weight_c, c0=c0,
            mask_c=mask_c, mask_pad=mask_pad, mask_target="gate", bidirectional=shape.bidirectional,
        )  # fmt: skip

    def seconds(run: Any, calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            torch.autograd.grad(run(), leaves, grads)
        return (time.perf_counter() - start) / calls

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Running SRU on CPU with grad_enabled=True. Are you sure?"
        both = theirs, ours
        calls = [max(3, round(TURN / min(seconds(run) for _ in range(2)))) for run in both]
        pairs = [[seconds(run, count) for run, count in zip(both, calls, strict=True)] for _ in range(rounds)]
    return Ratio(*(statistics.median(column) for column in zip(*pairs, strict=True)), statistics.median(a / b for a, b in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print("| L, B, D | options | sru 2.6.0 | cusru.torch | sru / ours |\n| --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        found = measure(shape, rounds)
        options = ", ".join(f"{n}={v}" for n, v in shape._asdict().items() if v != Shape._field_defaults.get(n, v))
        size = ", ".join(map(str, shape[:3]))
        print(f"| {size} | {options} | {found.theirs * 1e3:.2f} ms | {found.ours * 1e3:.2f} ms | {found.ratio:.1f} |", flush=True)


if __name__ == "__main__":
    measuring.run_command(main)
