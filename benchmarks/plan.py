"""`python -m benchmarks.plan L B D`: how a shape is laid out on a GPU, in words, and how long that should take. No GPU needed.

The call is one with contiguous arrays, bias and skip input; `--k 4` brings its own skip. The plan is the one that cusru makes
(`cusru.plan.plan`), the time `benchmarks.model`'s. With --json one object a line, for each pass and device."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, NamedTuple

from benchmarks import model, resources
from benchmarks.cases import DTYPES, Case
from benchmarks.workload import PASSES
from cusru import dlpack, measuring
from cusru.arguments import BACKWARD, FORWARD, STATES, STRAIGHT
from cusru.measuring import Floor
from cusru.plan import RESIDENT, Plan, Problem
from cusru.plan import plan as make_plan
from cusru.problem import Options, check, layout, wanted_results
from cusru.specialisation import UNIT, Limits


def problem(case: Case, direction: str, dtype: str) -> Problem:
    """What a call with this case's arrays asks for, without their memory."""
    operator = FORWARD if direction == "forward" else BACKWARD
    given = dict.fromkeys(operator.inputs, STATES[dtype])  # parameters have the state's
    given |= {"u": dtype, "x": dtype, "grad_h": dtype, "mask_pad": "bool"}
    absent = {"x": case.skip != "x", "bias": case.bias is None, "weight_c": case.weight_c == "none", "c0": not case.c0}
    absent |= {"mask_c": case.mask_c is None, "mask_pad": case.padding == "none", "starts": True}
    blocks = -(-case.L // case.save_every) if case.save_every else 0
    sizes = {"L": case.L, "S": blocks, "B": case.B, "D": case.D, "K": case.k, "R": 2, "F": 2 * case.D}
    of_u = (0, 1, 3, 2) if case.layout == "d_inner" else None

    def array(name: str, shape: tuple[int, ...], dtype: str) -> dlpack.Array:
        strides = dlpack.blank(shape, dtype, of_u if name.endswith("u") else None).strides
        return dlpack.Array(name, 0, shape, strides, dtype, dlpack.CPU, False, "other", None, None)

    inputs: dict[str, Any] = {"scale_x": case.scale_x}
    for name in operator.inputs[:-1]:
        shapes = operator.allowed_shapes(name, sizes)
        rank = 4 if name == "weight_c" and case.weight_c == "step" else min(rank for rank in shapes if rank > 1)
        inputs[name] = None if absent.get(name) else array(name, shapes[rank], given[name])
    inputs = {name: inputs[name] for name in operator.inputs}
    options = Options((case.activation, case.candidate, case.mask_target), case.bidirectional, case.save_every)
    checked = check(operator, inputs, options, 0)
    for name, wanted in wanted_results(checked).items():
        if wanted is not None:
            checked.problem.results[name] = layout(
                array(name, wanted.shape, wanted.dtype), operator.axes(name, len(wanted.shape))
            )
    return checked.problem


def _bytes(arrays: Any) -> int:
    return sum(math.prod(a.shape) * a.itemsize for a in arrays if a.shape)


def floor(asked: Problem) -> Floor:
    return Floor(_bytes(asked.inputs.values()), _bytes(asked.results.values()))


class Planned(NamedTuple):
    problem: Problem
    plan: Plan
    floor: Floor
    walk: model.Walk

    @property
    def warps(self) -> int:
        return self.plan.launches[0].block[0] // 32


def planned(case: Case, direction: str, dtype: str, multiprocessors: int, cost: model.Cost | None = None) -> Planned:
    """cost: of other kernels than the present ones."""
    asked = problem(case, direction, dtype)
    made, must = make_plan(asked, Limits(multiprocessors)), floor(asked)
    kernel, main, *second = made.kernel, *made.launches
    warps = main.block[0] // 32
    about = model.kernel(kernel)
    resident = resources.blocks_per_sm(90, 32 * warps, about.registers, main.shared, 1 if kernel.alone else 16)
    pieces = -(-min(asked.block or 1, asked.length) // UNIT) if kernel.recompute else 1
    twice = _bytes([asked.inputs["u"]]) * (pieces - 1) // pieces + 2 * made.checkpoint_bytes + made.partial_bytes
    walk = model.Walk(
        cost or about.cost, asked.length * made.group, main.grid[0], warps, resident, must.bytes + twice,
        made.partial_bytes, sum(launch.grid[0] for launch in second),
    )  # fmt: skip
    return Planned(asked, made, must, walk)


def lines(one: Planned, device: model.Device) -> list[str]:
    """The plan in words."""
    made, must, walk = one.plan, one.floor, one.walk
    kernel, per_sm, said = made.kernel, walk.blocks / device.multiprocessors, model.predict(walk, device)
    if kernel.columns == 2:
        columns = "D and every address allow vectors of two"
    elif kernel.dtype == "float64":
        columns = "registers hold no more of float64"
    else:
        columns = "two need a D that is even in each direction, and room in shared memory"
    if walk.warps > 1:
        room = f"{RESIDENT} have room on a multiprocessor, which has {per_sm:.2f} blocks"
        warps = f"{room}; {kernel.warps} at most take turns" + (" at the tiles of a saved block" if kernel.recompute else "")
    else:
        warps = f"{per_sm:.1f} blocks a multiprocessor leave no room for more, or all time is one turn"
    straight = "whole tiles without a branch"
    general = "far strides, gradients unwanted or laid otherwise than u, or saved blocks shorter than a tile"
    ahead = UNIT if kernel.recompute else walk.warps * kernel.tile
    in_flight = said.waves[0] * ahead * 32 * kernel.columns * resources.bytes_per_step(kernel)
    second = f"the second adds up {made.rows} rows of {made.sums} sums a column" if walk.reducers else "it does all"
    of_stream = model.yardstick(must.bytes, device) / said.seconds
    by_size = sorted(said.terms.items(), key=lambda term: -term[1])
    found = {
        "kernel": f"{kernel.entry}, {kernel.dtype}, weights: {kernel.weight}, k values "
        + ("side by side" if kernel.packed else "in planes")
        + ", states recomputed" * kernel.recompute,
        "columns": f"{kernel.columns} a thread: {columns}",
        "warps": f"{walk.warps} a block: {warps}",
        "blocks": f"{walk.blocks}, {per_sm:.2f} a multiprocessor, where {walk.resident} fit together: waves of {said.waves}",
        "tile": f"{kernel.tile} steps, unrolled" + f"; {made.group} batches one after the other" * (made.group > 1),
        "shared memory": f"{made.launches[0].shared:,} bytes a block",
        "in flight": f"up to {in_flight:,} bytes a multiprocessor: {ahead} steps of each block",
        "path": f"straight: {straight}" if made.frame[-1] & STRAIGHT else f"general: {general}",
        "launches": f"{len(made.launches)}: {second}",
        "workspace": f"{made.workspace:,} bytes",
        "bytes": f"{must.read:,} read and {must.written:,} written at least; {walk.bytes - must.bytes:,.0f} more by this plan",
        "predicted": f"{said.seconds * 1e6:.1f} us on {device.name}, {of_stream:.2f} of a copy or stream. By itself, us: "
        + ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in by_size),
    }
    return [f"{name:<15} {what}" for name, what in found.items()]


def row(one: Planned, device: model.Device) -> dict[str, Any]:
    asked, said = one.problem, model.predict(one.walk, device)
    return {
        "pass": asked.direction, "shape": [asked.length, asked.batch, asked.width], "device": device.name,
        "kernel": one.plan.kernel._asdict(), "tile": one.plan.kernel.tile, "warps": one.warps, "blocks": one.walk.blocks,
        "resident": one.walk.resident, "waves": said.waves, "shared_bytes": one.plan.launches[0].shared,
        "straight": bool(one.plan.frame[-1] & STRAIGHT), "launches": len(one.plan.launches),
        "workspace_bytes": one.plan.workspace, "floor_bytes": one.floor.bytes, "bytes": one.walk.bytes, "terms": said.terms,
        "seconds": said.seconds,
        "of_yardstick": model.yardstick(one.floor.bytes, device) / said.seconds,
    }  # fmt: skip


def _every(text: str) -> int | None:
    return None if text == "none" else int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False
    )
    for name in ("L", "B", "D"):
        parser.add_argument(name, type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--k", type=int, choices=[3, 4], default=3)
    parser.add_argument("--weight", choices=["none", "column", "step"], default="none", help="SRU v1, v2, or per step")
    parser.add_argument(
        "--every", type=_every, default=1, metavar="N", help="save_every, or none: the forward alone (default: 1)"
    )
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--device", choices=list(model.DEVICES), default="h100")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of words")
    options = parser.parse_args(arguments)
    if min(options.L, options.B, options.D) < 1:
        parser.error("L, B and D must be at least 1")
    case = Case(
        "asked", options.L, options.B, options.D, skip="projected" if options.k == 4 else "x", weight_c=options.weight,
        bidirectional=options.bidirectional, save_every=options.every,
    )  # fmt: skip
    device = model.DEVICES[options.device]
    for direction in PASSES[: 1 if options.every is None else 2]:
        try:
            one = planned(case, direction, options.dtype, device.multiprocessors)
        except ValueError as error:
            parser.error(str(error))
        if options.json:
            print(json.dumps(row(one, device)))
        else:
            print(f"{direction}\n  " + "\n  ".join(lines(one, device)))
    return 0


if __name__ == "__main__":
    measuring.run_command(main)
