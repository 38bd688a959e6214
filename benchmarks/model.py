"""How long a pass takes, from its plan: a model of bytes, issue, special functions, the chain of steps, and waves of blocks.

`predict` is pure. A pass is a `Walk`: blocks of warps that walk so many steps, at a `Cost` a step. Blocks run in waves, as many as a
multiprocessor holds; a wave takes as long as the longest of its terms, and somewhat more, for they overlap imperfectly: their
power mean with the exponent OVERLAP. `benchmarks/test_plan.py` says what the constants were fitted to and how far the model is
from every measurement that there is. It knows nothing of caches, of shared memory's banks or of a wave's own beginning and end."""

from __future__ import annotations

from typing import NamedTuple

from cusru.arguments import ITEMSIZES
from cusru.specialisation import Specialisation


class Device(NamedTuple):
    name: str
    multiprocessors: int
    bandwidth: float  #: bytes a second that a copy reaches
    clock: float  #: Hz, under load


DEVICES = {
    "h100": Device("H100 SXM", 132, 0.9 * 3.35e12, 1.755e9),  # of the datasheet's bandwidth what copies reach elsewhere
    "h200": Device("H200", 132, 4.28e12, 1.95e9),  # a copy of 2 GiB; ncu's cycles over its time: benchmarks/results
}

SCHEDULERS = 4  # of a multiprocessor: each issues one instruction a cycle
SPECIAL_LANES = 16  # a cycle and multiprocessor: ex2, rcp
GAP = 2.8  # cycles between two instructions of one warp: arithmetic waits for arithmetic. ncu: 2.5 to 3.6
ISSUE = 0.85  # instructions a cycle that a scheduler with warps enough issues
OVERLAP = 2.5  # the exponent: 1 would add the terms up, infinity take the longest
RAMP = 3.2e-6  # seconds: a launch, the first load, the last store. Streams take as much
LAUNCH = 2.5e-6  # of a kernel right after another
REDUCE_BANDWIDTH = 17e9  # bytes a second that one block of the reduction adds up


class Cost(NamedTuple):
    """Of a block's step, 32 threads with all their columns."""

    instructions: float
    special: float  #: special functions among them
    chain: float  #: cycles below which no number of warps comes: the state's or the carry's way through a step


class Walk(NamedTuple):
    cost: Cost
    steps: int
    blocks: int
    warps: int  #: of a block
    resident: int  #: blocks that fit on a multiprocessor
    bytes: float  #: read and written
    partials: float = 0  #: bytes that a second kernel adds up
    reducers: int = 0  #: its blocks


class Prediction(NamedTuple):
    seconds: float
    terms: dict[str, float]  #: seconds of each, as if it were alone
    waves: list[int]  #: blocks that a multiprocessor has, in each


def terms(cost: Cost, warps: int, blocks: int) -> dict[str, float]:
    """Cycles a step of a multiprocessor that has so many blocks."""
    rate = min(blocks * warps / GAP, SCHEDULERS * ISSUE)  # instructions a cycle
    return {
        "issue": blocks * cost.instructions / rate,
        "special functions": blocks * cost.special * 32 / SPECIAL_LANES,
        "chain": cost.chain,
    }


def together(of: dict[str, float]) -> float:
    return sum(t**OVERLAP for t in of.values()) ** (1 / OVERLAP)


def predict(walk: Walk, device: Device) -> Prediction:
    seconds, left, waves = RAMP, walk.blocks, []
    totals: dict[str, float] = {}
    while left:
        here = min(left, walk.resident * device.multiprocessors)
        waves.append(-(-here // device.multiprocessors))
        wave = {n: c * walk.steps / device.clock for n, c in terms(walk.cost, walk.warps, waves[-1]).items()}
        wave["bytes"] = walk.bytes * here / walk.blocks / device.bandwidth
        seconds += together(wave)
        totals = {name: totals.get(name, 0) + t for name, t in wave.items()}
        left -= here
    if walk.reducers:
        totals["second kernel"] = LAUNCH + walk.partials / min(walk.reducers * REDUCE_BANDWIDTH, device.bandwidth)
        seconds += totals["second kernel"]
    return Prediction(seconds, totals | {"ramp": RAMP}, waves)


def yardstick(bytes: float, device: Device) -> float:
    """Seconds of a copy or stream of so many bytes."""
    return RAMP + bytes / device.bandwidth


class Known(NamedTuple):
    """Of a present kernel."""

    cost: Cost
    registers: int  #: of a thread


# By pass, weights, bytes of a value and columns of a thread: instructions a step of a column, registers of a thread, each where warps take
# turns and where a block is one warp alone. `python -m benchmarks.resources --kernels plain --architecture 90 --sass --json`, NVRTC 13;
# where values lie side by side, whole tiles. Weights a step have float32's type. A test counts some of them again.
KERNELS = {
    ("forward", "none", 8, 1): (193.0, 183.2, 170, 188),
    ("forward", "none", 4, 2): (49.3, 46.8, 183, 184),
    ("forward", "none", 4, 1): (71.1, 61.0, 158, 160),
    ("forward", "none", 2, 2): (53.0, 52.6, 182, 182),
    ("forward", "none", 2, 1): (85.5, 82.9, 167, 168),
    ("forward", "column", 8, 1): (238.5, 227.5, 136, 148),
    ("forward", "column", 4, 2): (42.8, 42.1, 178, 168),
    ("forward", "column", 4, 1): (66.6, 60.5, 150, 142),
    ("forward", "column", 2, 2): (48.6, 48.4, 150, 146),
    ("forward", "column", 2, 1): (81.2, 76.5, 168, 167),
    ("forward", "step", 4, 2): (48.0, 45.1, 236, 230),
    ("forward", "step", 4, 1): (70.5, 70.9, 210, 206),
    ("backward", "none", 8, 1): (280.0, 269.0, 198, 204),
    ("backward", "none", 4, 2): (99.9, 92.0, 200, 200),
    ("backward", "none", 4, 1): (134.5, 109.2, 176, 170),
    ("backward", "none", 2, 2): (108.6, 100.4, 208, 211),
    ("backward", "none", 2, 1): (145.8, 129.5, 200, 168),
    ("backward", "column", 8, 1): (294.8, 284.8, 218, 220),
    ("backward", "column", 4, 2): (116.4, 103.9, 214, 220),
    ("backward", "column", 4, 1): (134.0, 124.8, 182, 182),
    ("backward", "column", 2, 2): (125.0, 114.5, 211, 221),
    ("backward", "column", 2, 1): (166.2, 151.0, 212, 199),
    ("backward", "step", 4, 2): (113.0, 102.8, 248, 244),
    ("recompute", "none", 8, 1): (372.0, 357.8, 174, 186),
    ("recompute", "none", 4, 2): (99.2, 110.1, 223, 180),
    ("recompute", "none", 4, 1): (127.5, 141.2, 192, 150),
    ("recompute", "none", 2, 2): (110.2, 119.2, 255, 201),
    ("recompute", "none", 2, 1): (144.4, 157.5, 220, 168),
    ("recompute", "column", 8, 1): (395.0, 395.2, 194, 203),
    ("recompute", "column", 4, 2): (112.9, 121.1, 246, 198),
    ("recompute", "column", 4, 1): (140.5, 154.2, 190, 166),
    ("recompute", "column", 2, 2): (124.3, 132.9, 255, 205),
    ("recompute", "column", 2, 1): (159.8, 170.5, 229, 168),
}

# Cycles a step of a block of seven warps (four where states are recomputed) that has a multiprocessor to itself.
CHAINS = {
    ("forward", "none"): 43.0, ("forward", "column"): 74.0,  # measured, (16384, 1, 1024) on an H200, h200-2026-11-26-turns
    ("backward", "none"): 100.0, ("backward", "column"): 120.0, ("recompute", "none"): 252.0, ("recompute", "column"): 290.0,  # simulated
}  # fmt: skip
CALLS = 150  # instructions a step that float64's exponentials and divisions take, which are calls and not counted


def kernel(of: Specialisation) -> Known:
    """What is known of a kernel; of one with other options, what is known of the plain one."""
    which = "recompute" if of.recompute else of.direction
    weight = "step" if of.weight.startswith("step") else of.weight
    size = ITEMSIZES[of.dtype]
    found = KERNELS.get((which, weight, size, of.columns)) or KERNELS[which, "column", size, of.columns]
    turns, alone, of_turns, of_alone = found
    each, registers = (alone, of_alone) if of.alone else (turns, of_turns)
    special = 6 if of.recompute else 4
    chain = 0.0 if of.alone else CHAINS[which, "none" if weight == "step" else weight]  # a lone warp is bound by GAP
    return Known(Cost((each + CALLS * (size == 8)) * of.columns, special * of.columns, chain), registers)
