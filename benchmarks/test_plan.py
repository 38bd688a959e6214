"""The command `python -m benchmarks.plan`, and its model of time against everything that was measured on a device.

Fitted, by hand and a coarse grid: RAMP, LAUNCH and STREAM_RAMP to the rows of `short`; OVERLAP, GAP and ISSUE to `square`; CHAINS to `narrow`
and `narrow-v2`, each in h200-2026-11-26-turns; REDUCE_BANDWIDTH and GAPS, of kernels that are no more, to kernels.jsonl. All other rows are
predictions."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import cases, model, plan, resources
from benchmarks.cases import Case
from benchmarks.model import Cost, Walk
from cusru.arguments import ITEMSIZES
from cusru.specialisation import Specialisation, specialisations

RESULTS = Path(__file__).parent / "results"
H200 = model.DEVICES["h200"]
FITTED = ("short", "square", "narrow", "narrow-v2")


class Row(NamedTuple):
    """A time that was measured, and what the model is told of it."""

    report: str
    case: Case
    direction: str
    dtype: str
    seconds: float
    walk: Walk

    @property
    def ratio(self) -> float:
        return model.predict(self.walk, H200).seconds / self.seconds


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def of_kind(kernel: Specialisation) -> tuple[str, str]:
    return "recompute" if kernel.recompute else kernel.direction, "column" if kernel.weight == "column" else "none"


# ---- the kernels of the reports, as data ---------------------------------------------------------------------------------

# Warps by turns, parameter sums not grouped yet: instructions a step of a column, of float32 and of 16-bit values, by turns and alone, by
# `benchmarks.resources --sass` at 9bf8f24; and the chain. Forwards are as they are now.
TURNS = {
    ("backward", "none"): ((115.1, 102.4), (122.8, 109.9), 112),
    ("backward", "column"): ((138.6, 125.0), (145.5, 133.6), 139),
    ("recompute", "none"): ((109.2, 121.0), (120.3, 133.8), 267),
    ("recompute", "column"): ((131.3, 143.9), (142.4, 157.0), 307),
}


def turns() -> Iterator[Row]:
    for row in read("h200-2026-11-26-turns/table.jsonl"):
        if row["cache"] == "cold":
            case = cases.CASES[row["case"]]
            one = plan.planned(case, row["pass"], row["dtype"], 132)
            kernel, cost = one.plan.kernel, one.walk.cost
            if (found := TURNS.get(of_kind(kernel))) and kernel.dtype != "float64":
                instructions = found[ITEMSIZES[kernel.dtype] == 2][kernel.alone] * kernel.columns
                cost = cost._replace(instructions=instructions, chain=0 if kernel.alone else found[2])
            walk = one.walk._replace(cost=cost)
            yield Row("turns", case, row["pass"], row["dtype"], row["times"]["cusru"]["seconds"], walk)


# One thread a column, or four columns of it where there are many; a warp waits for nobody, and 32 sums were a block of the reduction.
GAPS = {"forward": 2.2, "backward": 2.1, "recompute": 3.4}


class Counted(NamedTuple):
    """By the profiler, kernels.jsonl."""

    instructions: float  #: a step of a warp, of all its columns
    registers: int


def counted() -> dict[tuple[str, str, int, int], Counted]:
    found = {}
    for row in read("h200-2026-11-26/kernels.jsonl"):
        if row["kernel"] != "cusru_reduce":
            length, batch, width = row["shape"]
            columns = batch * width // int(row["blocks"] * row["threads"])
            which = row["kernel"].removeprefix("cusru_")
            which = "recompute" if which == "backward" and "every 32nd" in row["case"] else which
            key = which, "column" if "v2" in row["case"] else "none", ITEMSIZES[row["dtype"]], columns
            warps = batch * width / columns / 32
            found.setdefault(key, Counted(row["instructions"] / warps / length, int(row["registers"])))
    return found


COUNTED = counted()


def before_turns(case: Case, direction: str, dtype: str) -> Walk:
    one = plan.planned(case, direction, dtype, 132)
    which, weight = of_kind(one.plan.kernel)
    all_columns = one.problem.width * one.plan.rows
    columns = 4 if which != "recompute" and all_columns >= 4 * 4 * 32 * 132 else 1
    weights = (weight, *{"none", "column"} - {weight})  # of the other, where only that was profiled
    size = ITEMSIZES[dtype]
    instructions, registers = next(COUNTED[key] for w in weights if (key := (which, w, size, columns)) in COUNTED)
    cost = Cost(instructions, 4 * columns, 0, GAPS[which] if columns == 1 else model.GAP)
    partials, sums = one.walk.partials, one.plan.sums * one.problem.width
    return Walk(
        cost, one.walk.steps, -(-all_columns // columns // 32), 1, resources.blocks_per_sm(90, 32, registers, 0),
        one.walk.bytes, partials, -(-sums // 32) if one.walk.reducers else 0,
    )  # fmt: skip


def old() -> Iterator[Row]:
    table = json.loads((RESULTS / "h200-2026-11-26/report.json").read_text())["steps"]["table"]["rows"]
    for report, rows in (("first", table), ("host", read("h200-2026-11-26-host/table.jsonl"))):
        for row in rows:
            if row["cache"] == "cold" and row["dtype"] != "float64":  # of which nobody counted the instructions
                case, seconds = cases.CASES[row["case"]], row["times"]["cusru"]["seconds"]
                yield Row(report, case, row["pass"], row["dtype"], seconds, before_turns(case, row["pass"], row["dtype"]))
    for row in read("h200-2026-11-26/shapes.jsonl"):
        case = Case("shapes", *row["shape"], weight_c="column" if row["v2"] else "none", save_every=row["save_every"])
        walk = before_turns(case, row["pass"], row["dtype"])
        yield Row("shapes", case, row["pass"], row["dtype"], row["us"] * 1e-6, walk)


TABLE, OLD = list(turns()), list(old())


def errors(rows: list[Row]) -> list[float]:
    """Factors, 1 or more."""
    return [math.exp(abs(math.log(row.ratio))) for row in rows]


if __name__ == "__main__":
    for row in TABLE + OLD:
        print(f"{row.report:7}{row.case.name:16}{row.case.L, row.case.B, row.case.D!s:20}{row.direction:9}{row.dtype:9}", row.case.weight_c, row.case.save_every, f"{row.seconds*1e6:.1f} {row.ratio:.2f}", model.predict(row.walk,H200).waves, {k: round(v*1e6,1) for k,v in model.predict(row.walk,H200).terms.items()})
    for n, r in (("turns",TABLE),("held",[r for r in TABLE if r.case.name not in FITTED]),("old",OLD)): print(n, len(r), statistics.median(errors(r)), max(errors(r)))
