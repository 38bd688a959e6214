"""`python -m benchmarks.plan L B D`: how a shape is laid out on a GPU, in words, and how long that should take. No GPU needed.

The call is one with contiguous arrays, of SRU one with bias and skip input; `--k 4` brings its own skip. The plan is the one that
cusru makes (`cusru.plan.plan`), the time `benchmarks.model`'s. With --json one object a line, for each pass and device."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, NamedTuple

from benchmarks import model, resources
from benchmarks.cases import DTYPES, Case
from benchmarks.workload import PASSES
from cusru import dlpack, measuring
from cusru.arguments import ITEMSIZES, OPERATORS, STATES, STRAIGHT
from cusru.measuring import Floor
from cusru.plan import GUESSED_STEPS, RESIDENT, Plan, Problem
from cusru.plan import plan as make_plan
from cusru.problem import Options, check, layout, wanted_results
from cusru.specialisation import FORMS, POOLINGS, UNIT, Launch, Limits

#: Steps after which two trajectories of SRU v2 have the same bits, of inputs N(0, 1), the sru package's initial weights and a
#: forget bias of 2; of 0 they are 64 to 128, of 4 up to 1,152 (docs/performance.md)
MERGED = 256


def problem(case: Case, direction: str, dtype: str) -> Problem:
    """What a call with this case's arrays asks for, without their memory."""
    operator = OPERATORS[f"{case.family}_{direction}"]
    given = dict.fromkeys(operator.inputs, STATES[dtype])  # parameters have the state's
    given |= {"u": dtype, "x": dtype, "grad_h": dtype, "mask_pad": "bool", "starts": "bool", "zoneout": "bool"}
    sru = case.family == "sru"
    absent = {"x": case.skip != "x", "bias": case.bias is None, "weight_c": sru and case.weight_c == "none", "c0": not case.c0}
    absent |= {"mask_c": case.mask_c is None, "mask_pad": case.padding == "none", "starts": not case.starts}
    blocks = -(-case.L // case.save_every) if case.save_every else 0
    sizes = {"L": case.L, "S": blocks, "B": case.B, "D": case.D, "K": case.k, "R": 2, "F": 2 * case.D}
    of_u = (0, 1, 3, 2) if case.layout == "d_inner" else None

    def array(name: str, shape: tuple[int, ...], dtype: str) -> dlpack.Array:
        strides = dlpack.blank(shape, dtype, of_u if name.endswith("u") else None).strides
        return dlpack.Array(name, 0, shape, strides, dtype, dlpack.CPU, False, "other", None, None)

    numbers: dict[str, Any] = {"scale_x": case.scale_x, "zoneout": 0 if case.zoneout is None else None}
    ranks = {
        "bias": 2,
        "weight_c": (4 if case.weight_c == "step" else 2) if sru else {"step": 3, "batch": 2, "column": 1}[case.a],
    }
    inputs: dict[str, Any] = {}
    for name in operator.inputs:
        shapes = operator.allowed_shapes(name, sizes)
        inputs[name] = numbers.get(name)
        if inputs[name] is None and not absent.get(name):
            inputs[name] = array(name, shapes[ranks.get(name) or max(shapes)], given[name])
    choices = {"pooling": case.cell, "gate": "forget", "form": case.cell, "activation": case.activation}
    choices |= {"candidate": case.candidate, "mask_target": case.mask_target}
    options = Options(tuple(choices[name] for name in operator.choices), case.bidirectional, case.save_every)
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
    read = dict(asked.inputs)
    if asked.direction == "backward" and asked.block == 1 and asked.choices.get("form") in ("affine", "complement"):
        del read["u"]  # b, on which no gradient depends
    return Floor(_bytes(read.values()), _bytes(asked.results.values()))


class Planned(NamedTuple):
    case: Case
    problem: Problem
    plan: Plan
    floor: Floor
    walk: model.Walk | model.Spans | model.Guessed
    main: Launch

    @property
    def warps(self) -> int:
        return self.main.block[0] // 32

    @property
    def once(self) -> model.Walk | model.Spans:
        """The walk of the main launch."""
        return self.walk.first if isinstance(self.walk, model.Guessed) else self.walk


def planned(
    case: Case, direction: str, dtype: str, multiprocessors: int, cost: model.Cost | None = None,
    split: tuple[int, ...] | None = None, merged: float = MERGED,
) -> Planned:  # fmt: skip
    """cost: of other kernels than the present ones. split: as `Limits` has it. merged: as `model.Guessed` has it."""
    asked = problem(case, direction, dtype)
    made, must = make_plan(asked, Limits(multiprocessors, split=split)), floor(asked)
    kernel, time = made.kernel, made.split
    main = next(launch for launch in made.launches if launch.kernel == kernel)
    reducers = sum(launch.grid[0] for launch in made.launches if launch.kernel.direction == "reduce")
    warps, about = main.block[0] // 32, model.kernel(kernel)
    resident = resources.blocks_per_sm(90, 32 * warps, about.registers, main.shared, 1 if kernel.alone else 16)
    cost = cost or about.cost
    if time and not kernel.affine:
        first = model.Walk(cost, time.units * time.steps, main.grid[0], warps, resident, must.bytes + made.checkpoint_bytes)
        rest = max(asked.length - 2 * time.units * time.steps, 0)
        mend = model.kernel(kernel._replace(mend=True))
        fit = resources.blocks_per_sm(90, 32 * warps, mend.registers, main.shared, 16)
        return Planned(case, asked, made, must, model.Guessed(first, mend.cost, fit, time.spans, rest, merged), main)
    if time:
        forward = kernel.direction == "forward"
        directions = 2 if asked.bidirectional else 1
        groups = directions * -(-asked.batch * asked.width // (directions * kernel.columns * 32))
        values = 3 + 2 * model.heard(time.anchor, time.chunks) * time.chunks  # told, and heard, of a column
        words = ITEMSIZES[asked.state] * asked.batch * asked.width * time.spans * values
        relayed = (time.slice - 1) * time.steps if forward else time.steps
        spans = model.Spans(
            cost, time.spans, time.anchor, groups, kernel.columns, time.warps(kernel) - forward, kernel.stretch, time.chunks,
            relayed, main.grid[0], resident, must.bytes + made.partial_bytes, words, made.partial_bytes, reducers,
        )  # fmt: skip
        return Planned(case, asked, made, must, spans, main)
    pieces = -(-min(asked.block or 1, asked.length) // UNIT) if kernel.recompute else 1
    twice = _bytes([asked.inputs["u"]]) * (pieces - 1) // pieces + 2 * made.checkpoint_bytes + made.partial_bytes
    walk = model.Walk(
        cost, asked.length * made.group, main.grid[0], warps, resident, must.bytes + twice, made.partial_bytes, reducers
    )
    return Planned(case, asked, made, must, walk, main)


def both(case: Case, direction: str, dtype: str, multiprocessors: int) -> tuple[Planned, Planned | None]:
    """By turns; and with time split, where that can be."""
    turns = planned(case, direction, dtype, multiprocessors, split=())
    kernel = turns.plan.kernel  # as many warps as it may have; or the least tiles of a span that is guessed
    forced = UNIT if kernel.affine else GUESSED_STEPS // kernel.tile
    split = planned(case, direction, dtype, multiprocessors, split=(forced,))
    return turns, split if split.plan.split else None


def path(one: Planned, device: model.Device) -> str:
    """How time is walked, and what the other way would take."""
    turns, split = both(one.case, one.problem.direction, one.problem.dtype, device.multiprocessors)
    if split is None:
        affine = one.plan.kernel.affine
        return f"by turns: {'a block has no room for its slices' if affine else 'it is not affine in what goes on, and short'}"
    of_turns, of_split = (f"{model.predict(each.walk, device).seconds * 1e6:.1f} us" for each in (turns, split))
    time, way = one.plan.split, "split"
    if not one.plan.kernel.affine:
        assert isinstance(split.walk, model.Guessed)
        never = model.predict(split.walk._replace(merged=math.inf), device)
        way, of_split = "guessed", f"{of_split} if states merge in {MERGED} steps, {never.seconds * 1e6:.1f} us if never"
    if time is None:
        return f"by turns: {of_turns}, and {way} {of_split}"
    if way == "guessed":
        return f"guessed: {of_split}, and by turns {of_turns}; {time.spans} spans of {time.units * time.steps} steps"
    chunks = f"{time.chunks} chunks of " * (time.chunks > 1)
    length = f"{chunks}{time.units * time.steps} steps"
    spans = f"{time.spans} spans of {length}, of which every {time.anchor}th tells its start"
    return f"split: {of_split}, and by turns {of_turns}; {spans}"


def lines(one: Planned, device: model.Device) -> list[str]:
    """The plan in words."""
    made, must, walk = one.plan, one.floor, one.once
    kernel, per_sm, said = made.kernel, walk.blocks / device.multiprocessors, model.predict(one.walk, device)
    if kernel.columns == 2:
        columns = "D and every address allow vectors of two"
    elif made.split and made.split.chunks > 1:
        columns = "lanes have chunks of time"
    elif kernel.dtype == "float64":
        columns = "registers hold no more of float64"
    else:
        columns = "two need a D that is even in each direction, and room in shared memory"
    if made.split and kernel.affine:
        warps = f"each has {kernel.stretch} steps of a span" + ", but one that talks" * (kernel.direction == "forward")
    elif made.split:
        warps = "take turns at the tiles of a span"
    elif walk.warps > 1:
        room = f"{RESIDENT} have room on a multiprocessor, which has {per_sm:.2f} blocks"
        warps = f"{room}; {kernel.warps} at most take turns" + (" at the tiles of a saved block" if kernel.recompute else "")
    else:
        warps = f"{per_sm:.1f} blocks a multiprocessor leave no room for more, or all time is one turn"
    straight = "whole tiles without a branch"
    general = "far strides, gradients unwanted or laid otherwise than u, or saved blocks shorter than a tile"
    ahead = UNIT if kernel.recompute and not made.split else walk.warps * (kernel.stretch if made.split else kernel.tile)
    in_flight = said.waves[0] * ahead * 32 * kernel.columns * resources.bytes_per_step(kernel)
    which = "third" if made.split else "second"
    second = f"the {which} adds up {made.rows} rows of {made.sums} sums a column" if walk.reducers else "it does all"
    if made.split and not kernel.affine:
        second = "the second walks again what the first guessed"
    elif made.split:
        second = "the first clears what spans tell" + f"; {second}" * bool(walk.reducers)
    of_stream = model.yardstick(must.bytes, device) / said.seconds
    by_size = sorted(said.terms.items(), key=lambda term: -term[1])
    found = {
        "kernel": f"{kernel.entry}, {kernel.dtype}, weights: {kernel.weight}, k values "
        + ("side by side" if kernel.packed else "in planes")
        + ", states recomputed" * kernel.recompute,
        "columns": f"{kernel.columns} a thread: {columns}",
        "time": path(one, device),
        "warps": f"{one.warps} a block: {warps}",
        "blocks": f"{walk.blocks}, {per_sm:.2f} a multiprocessor, where {walk.resident} fit together: waves of {said.waves}",
        "tile": f"{kernel.tile} steps, unrolled" + f"; {made.group} batches one after the other" * (made.group > 1),
        "shared memory": f"{one.main.shared:,} bytes a block",
        "in flight": f"up to {in_flight:,} bytes a multiprocessor: {ahead} steps of each block",
        "path": f"straight: {straight}" if made.frame[-1] & STRAIGHT else f"general: {general}",
        "launches": f"{len(made.launches)}: {second}",
        "workspace": f"{made.workspace:,} bytes",
        "bytes": f"{must.read:,} read and {must.written:,} written at least; "
        f"{one.walk.bytes - must.bytes:,.0f} more by this plan",
        "predicted": f"{said.seconds * 1e6:.1f} us on {device.name}, {of_stream:.2f} of a copy or stream. By itself, us: "
        + ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in by_size),
    }
    return [f"{name:<15} {what}" for name, what in found.items()]


def row(one: Planned, device: model.Device) -> dict[str, Any]:
    asked, said = one.problem, model.predict(one.walk, device)
    return {
        "pass": asked.direction, "shape": [asked.length, asked.batch, asked.width], "device": device.name,
        "kernel": one.plan.kernel._asdict(), "tile": one.plan.kernel.tile,
        "split": one.plan.split and one.plan.split._asdict(), "warps": one.warps, "blocks": one.once.blocks,
        "resident": one.once.resident, "waves": said.waves, "shared_bytes": one.main.shared,
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
    parser.add_argument("--family", choices=["sru", "qrnn", "linear_recurrence"], default="sru")
    parser.add_argument("--pooling", choices=POOLINGS, default="fo", help="of the QRNN (default: fo)")
    parser.add_argument("--form", choices=FORMS, default="affine", help="of the linear recurrence (default: affine)")
    parser.add_argument("--a", choices=["step", "batch", "column"], default="step", help="of the linear recurrence")
    parser.add_argument("--k", type=int, choices=[3, 4], default=3, help="of SRU")
    parser.add_argument("--weight", choices=["none", "column", "step"], default="none", help="SRU v1, v2, or per step")
    parser.add_argument(
        "--every", type=_every, default=1, metavar="N", help="save_every, or none: the forward alone (default: 1)"
    )
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--padding", action="store_true", help="a mask_pad")
    parser.add_argument("--device", choices=list(model.DEVICES), default="h100")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of words")
    options = parser.parse_args(arguments)
    if min(options.L, options.B, options.D) < 1:
        parser.error("L, B and D must be at least 1")
    case = Case(
        "asked", options.L, options.B, options.D, skip="projected" if options.k == 4 else "x", weight_c=options.weight,
        bidirectional=options.bidirectional, save_every=options.every, padding="lengths" if options.padding else "none",
        family=options.family, cell={"qrnn": options.pooling, "linear_recurrence": options.form}.get(options.family, ""),
        a=options.a,
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
