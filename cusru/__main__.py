"""`python -m cusru`: what cusru runs on here, whether its results are right, and how fast they come.

Runs the forward and the backward in every dtype and holds each result against the equations, computed step by step in a
wider type. The exit status is 1 if an error is out of its bound. The output is what a bug report wants to show.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import cusru
from cusru import measuring
from cusru.measuring import Bits, Floor, host

SHAPES = {"numpy": (256, 16, 512), "simulator": (64, 8, 256), "gpu": (512, 32, 512)}  # L, B, D
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 1e-3, "bfloat16": 5e-3}  # of a result held in that dtype
CHECKED = 16  # of the D columns, for every batch
FORWARD, BACKWARD = ("h", "c", "c_last"), ("u", "x", "bias", "weight_c", "c0")
Array = np.ndarray


# ---- what is right -----------------------------------------------------------------------------------------------------


def sigmoid(a: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-a)))


def truth(
    u: Array, x: Array, bias: Array, weight_c: Array, c0: Array, grad_h: Array, grad_c_last: Array
) -> dict[str, tuple[Array, Array]]:
    """Every result as the equations say, and beside it the magnitude that its error is measured by: the largest in its
    column over time, a difference counting with both its terms, a sum with all."""
    steps, (b_f, b_r), (v_f, v_r) = range(len(u)), bias, weight_c
    u0, u1, u2 = np.moveaxis(u, 3, 0)
    c, f = np.empty((len(u) + 1, *c0.shape), u.dtype), np.empty_like(u0)
    c[0] = c0
    for t in steps:
        f[t] = sigmoid(u1[t] + b_f + v_f * c[t])
        c[t + 1] = f[t] * c[t] + (1 - f[t]) * u0[t]
    before, after = c[:-1], c[1:]
    r = sigmoid(u2 + b_r + v_r * before)

    reset = r * (1 - r)
    grad_u2 = grad_h * (after - x) * reset
    grad_c, carry = grad_h * r, grad_c_last
    carries = [carry]
    for t in reversed(steps):
        grad_c[t] += carry
        carry = grad_c[t] * (f[t] + (before[t] - u0[t]) * f[t] * (1 - f[t]) * v_f) + grad_u2[t] * v_r
        carries.append(carry)
    grad_u1 = grad_c * (before - u0) * f * (1 - f)
    of_u1 = abs(grad_c) * (abs(before) + abs(u0)) * f * (1 - f)
    of_u2 = abs(grad_h) * (abs(after) + abs(x)) * reset
    grad_u0, grad_x = grad_c * (1 - f), grad_h * (1 - r)

    def largest(a: Array) -> Array:
        return np.asarray(abs(a).max(axis=0))

    def total(*terms: Array) -> Array:
        return np.stack([a.sum(axis=(0, 1)) for a in terms])

    return {
        "h": (r * after + (1 - r) * x, largest(abs(r * after) + abs((1 - r) * x))),
        "c": (after, largest(c)),
        "c_last": (after[-1], largest(c)),
        "u": (np.stack([grad_u0, grad_u1, grad_u2], axis=3), largest(np.stack([abs(grad_u0), of_u1, of_u2], axis=3))),
        "x": (grad_x, largest(grad_x)),
        "bias": (total(grad_u1, grad_u2), total(of_u1, of_u2)),
        "weight_c": (total(grad_u1 * before, grad_u2 * before), total(of_u1 * abs(before), of_u2 * abs(before))),
        "c0": (carry, largest(np.stack(carries))),
    }


# ---- one dtype ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    dtype: str
    direction: str
    error: float  # over its bound, the worst of all results
    worst: str  # the result that has it
    seconds: float
    gb_per_s: float  # of the floor: each input read once, each output written once
    of_copy: float  # the time of a copy that moves as many bytes, over this time


def make(shape: tuple[int, int, int]) -> dict[str, Array]:
    length, batch, width = shape
    rng = np.random.default_rng(0)
    shapes = {
        "u": (length, batch, width, 3), "x": shape, "bias": (2, width), "weight_c": (2, width), "c0": (batch, width),
        "grad_h": shape, "grad_c_last": (batch, width),
    }  # fmt: skip
    values = {name: rng.standard_normal(of, dtype=np.float32) for name, of in shapes.items()}
    values["bias"] += 1
    values["weight_c"] *= 0.5
    return values


def measure(machine: measuring.Machine, values: dict[str, Array], dtype: str) -> Iterator[Row]:
    state = "float64" if dtype == "float64" else "float32"
    width = values["x"].shape[2]
    values = {name: machine.cast(a, state if name in ("c0", "grad_c_last") else dtype) for name, a in values.items()}
    pick = slice(None, None, -(-width // CHECKED))

    def part(a: Any) -> Any:  # of D, which is the last axis of all but u's arrays
        return a[:, :, pick] if a.ndim == 4 else a[..., pick]

    wider = np.longdouble if dtype == "float64" else np.float64
    right = truth(**{name: host(part(a)).astype(wider) for name, a in values.items()})
    arrays = {name: machine.put(a) for name, a in values.items()}
    u, x, grad_h, grad_c_last = (arrays.pop(name) for name in ("u", "x", "grad_h", "grad_c_last"))

    def own(names: tuple[str, ...]) -> list[Any]:
        """`out` with our own arrays for what NumPy cannot hold, None for the rest."""
        like = (values.get({"h": "x"}.get(name, name)) for name in names)
        return [Bits(np.empty_like(a.bits)) if isinstance(a, Bits) else None for a in like]

    forward = cusru.sru_forward(u, x, **arrays, out=own(FORWARD))

    def run(direction: str, out: Any = None, workspace: Any = None) -> Any:
        if direction == "forward":
            return cusru.sru_forward(u, x, **arrays, out=out, workspace=workspace)
        return cusru.sru_backward(grad_h, grad_c_last, forward.c, u, x, **arrays, out=out, workspace=workspace)

    for direction, names in (("forward", FORWARD), ("backward", BACKWARD)):
        results = run(direction, own(names))
        errors = {}
        for name in names:
            result = part(getattr(results, name))
            got, (want, magnitude) = machine.get(result), right[name]
            bound = TOLERANCE["bfloat16" if isinstance(result, Bits) else got.dtype.name] * magnitude
            errors[name] = float((abs(got.astype(wider) - want) / bound).max())
        worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))

        workspace = machine.bytes(cusru.workspace_size(direction, u, x, **arrays))
        inputs = [u, x, *arrays.values()] + ([grad_h, grad_c_last, forward.c] if direction == "backward" else [])
        floor = Floor(*(sum(a.nbytes for a in arrays) for arrays in (inputs, results)))
        copy = measuring.copying(machine, floor)
        copy()
        of_copy = machine.time(copy)
        seconds = machine.time(functools.partial(run, direction, results, workspace))
        yield Row(dtype, direction, errors[worst], worst, seconds, floor.bytes / seconds / 1e9, of_copy / seconds)


# ---- the report --------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cusru", description=(__doc__ or "").split("\n", 1)[1].strip())
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    as_json = parser.parse_args(arguments).json

    def say(text: str = "") -> None:
        if not as_json:
            print(text, flush=True)

    try:
        machine, versions, advice = measuring.look_around()
    except (ValueError, RuntimeError) as error:  # of what CUSRU_SIMULATE asks for
        parser.error(str(error))
    say(f"cusru {cusru.__version__}\n")
    for name, value in {"backend": machine.backend, "device": machine.device, **versions}.items():
        if name != "cusru":
            say(f"  {name:<11}{value}")
    for text in advice:
        say("\n" + text)

    shape = SHAPES[machine.name]
    say("\nSRU with skip input and weight_c, L = {}, B = {}, D = {}, every state saved\n".format(*shape))
    say(f"  {'dtype':<10}{'pass':<10}{'error / bound':>14}{'time':>13}{'GB/s':>9}{'of a copy':>12}")
    values = make(shape)
    rows: list[Row] = []
    skipped = {}
    for name in TOLERANCE:
        if name == "bfloat16" and machine.name == "gpu" and versions["ml_dtypes"] == "not installed":
            skipped[name] = "skipped: CuPy has no bfloat16 without the package ml_dtypes (pip install ml_dtypes)"
            say(f"  {name:<10}{skipped[name]}")
            continue
        for row in measure(machine, values, name):
            rows.append(row)
            flag = "" if row.error <= 1 else "   OUT OF BOUNDS"
            say(
                f"  {row.dtype:<10}{row.direction:<10}{row.error:>14.3f}{row.seconds * 1e3:>10.3f} ms{row.gb_per_s:>9.2f}"
                f"{row.of_copy:>12.2f}{flag}"
            )

    bad = [row for row in rows if not row.error <= 1]
    say(
        "\nerror: the largest of any result, against the equations in wider arithmetic. GB/s: each input read once and each\n"
        "output written once, over the time. of a copy: the time of a copy that moves as many bytes, over the time.\n"
    )
    for row in bad:
        say(f"OUT OF BOUNDS: {row.dtype} {row.direction}, result {row.worst}: {row.error:.3g} times its bound")
    if not bad:
        say("All results are within their bounds.")
    if as_json:
        report = {
            **versions, "backend": machine.backend, "device": machine.device, "shape": shape, "advice": advice,
            "rows": [row._asdict() for row in rows], "skipped": skipped, "ok": not bad,
        }  # fmt: skip
        print(json.dumps(report, indent=2))
    return 1 if bad else 0


if __name__ == "__main__":
    measuring.run_command(main)
