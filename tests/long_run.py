"""Random problems by the thousand: `python tests/long_run.py --cases 2000 --seed 0`, some ten minutes on two cores.

Each case runs on the NumPy backend with options drawn freely and on the simulator with a row of the covering lists, forward
and backward, and is held against the oracle. Prints the worst error / bound of every quantity; the exit status is 1 if one
went beyond 1, and each such case is printed with what reproduces it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np  # noqa: E402
import oracle  # noqa: E402
import strategies  # noqa: E402
from conftest import Backend, missing  # noqa: E402

LISTS = strategies.COVERING, strategies.SECOND_COVERING, strategies.AFFINE_COVERING
ROWS = [row for row in itertools.chain(*LISTS) if {*row[:2]} & {*strategies.DTYPES}]


def one(job: tuple[int, int, str]) -> tuple[dict[str, float], list[str]]:
    """The worst error / bound of each quantity of one case, and what went wrong."""
    seed, index, name = job
    rng = random.Random(f"{seed} {index} {name}")
    row, family = ROWS[index % len(ROWS)], strategies.FAMILIES[index % len(strategies.FAMILIES)]
    problem = strategies.build_any(strategies.random_choice(rng, row if name == "simulator" else None, family))
    backend = Backend(name, problem.multiprocessors)
    worst: dict[str, float] = {}
    failures = []

    def compare(stage: str, results: Any, expected: dict[str, Any]) -> None:
        held_in_state = [
            n for n, a in results._asdict().items() if a is not None and a.dtype == strategies.state_of(problem.dtype)
        ]
        for quantity, a in results._asdict().items():
            try:
                worst[f"{stage}{quantity}"] = oracle.check({quantity: a}, expected, problem.dtype, held_in_state)
            except AssertionError as error:
                failures.append(
                    f"{name}, case {index}, {stage}{error}\n    Backend({name!r}, {problem.multiprocessors}): {problem!r}"
                )
                worst[f"{stage}{quantity}"] = np.inf

    try:
        output, expected = backend.forward(problem), problem.expected_forward()
        compare("", output, expected)
        if output.c is not None:
            states = backend.forward(problem, save_every=1).c
            compare("grad_", backend.backward(problem, output.c), problem.expected_backward(states))
    except Exception:
        failures.append(f"{name}, case {index}: {traceback.format_exc()}    {problem!r}")
    return worst, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case's number: --first N --cases 1 repeats case N")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    backends = ("numpy", "simulator")
    for name in backends:
        if reason := missing(name):
            print(f"{name}: {reason}")
            return 1
    indices = range(options.first, options.first + options.cases)
    jobs = [(options.seed, index, name) for index, name in itertools.product(indices, backends)]
    worst: dict[str, float] = {}
    failed, start = 0, time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        for done, (ratios, failures) in enumerate(pool.imap_unordered(one, jobs), 1):
            for quantity, ratio in ratios.items():
                worst[quantity] = max(worst.get(quantity, 0.0), ratio)
            failed += bool(failures)
            for failure in failures:
                print(f"FAILED --seed {options.seed}: {failure}", flush=True)
            if done % 200 == 0 or done == len(jobs):
                print(f"{done} of {len(jobs)} runs, {failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{options.cases} cases on each of {' and '.join(backends)}")
    print("worst error / bound: " + ", ".join(f"{quantity} {ratio:.3f}" for quantity, ratio in sorted(worst.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
