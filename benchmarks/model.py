"""How long a pass takes, from its plan: a model of bytes, issue, special functions, the chain of steps, and waves of blocks.

`predict` is pure. A pass is a `Walk`: blocks of warps that walk so many steps, at a `Cost` a step. Blocks run in waves, as many
as a multiprocessor holds; a wave takes as long as the longest of its terms, and somewhat more, for they overlap imperfectly:
their power mean with the exponent OVERLAP. `benchmarks/test_plan.py` says what each constant was fitted to, and holds the model
against every measurement that there is. It knows nothing of caches, of the banks of shared memory, or of what padding costs."""

from __future__ import annotations

from typing import NamedTuple

from cusru.arguments import ITEMSIZES
from cusru.specialisation import Specialisation


class Device(NamedTuple):
    name: str
    multiprocessors: int
    bandwidth: float  #: bytes a second that a long copy reaches
    clock: float  #: Hz, under load


DEVICES = {
    "h100": Device("H100 SXM", 132, 0.9 * 3.35e12, 1.755e9),  # no report yet: 0.9 of the datasheet's, as of the H200's
    "h200": Device("H200", 132, 4.28e12, 1.95e9),  # a copy of 2 GiB; ncu's cycles over its time: benchmarks/results
}

SCHEDULERS = 4  # of a multiprocessor, an instruction a cycle each
SPECIAL_LANES = 16  # of a multiprocessor: ex2, rcp

OVERLAP = 3  # 1 would add the terms up, infinity take the longest
GAP = 2.4  # cycles from an instruction of a warp to its next: arithmetic waits for arithmetic
ISSUE = 0.6  # instructions a cycle of a scheduler that has warps enough
RAMP = 5.5e-6  # seconds: a launch, the first tile, the last store
STREAM_RAMP = 3e-6  # of a copy or a stream, which has no tile to fill
LAUNCH = 3.5e-6  # of a kernel that waits for the one before
REDUCE_BANDWIDTH = 17e9  # bytes a second that a block of the reduction adds up


class Cost(NamedTuple):
    """Of a block's step: 32 threads and all their columns."""

    instructions: float
    special: float  #: special functions among them
    chain: float  #: cycles that state or carry take through a step, whatever the number of warps. A lone warp's is its GAP
    gap: float = GAP


class Walk(NamedTuple):
    """Of one pass."""

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
    terms: dict[str, float]  #: seconds of each by itself
    waves: list[int]  #: blocks that a multiprocessor has, at most, in each


def cycles(cost: Cost, warps: int, blocks: int) -> dict[str, float]:
    """A step of a multiprocessor that has so many blocks."""
    rate = min(blocks * warps / cost.gap, SCHEDULERS * ISSUE)  # instructions a cycle
    return {
        "issue": blocks * cost.instructions / rate,
        "special functions": blocks * cost.special * 32 / SPECIAL_LANES,
        "chain": cost.chain,
    }


def predict(walk: Walk, device: Device) -> Prediction:
    totals, waves = {"ramp": RAMP}, []
    seconds, left = RAMP, walk.blocks
    while left:
        here = min(left, walk.resident * device.multiprocessors)
        waves.append(-(-here // device.multiprocessors))
        wave = {name: n * walk.steps / device.clock for name, n in cycles(walk.cost, walk.warps, waves[-1]).items()}
        wave["bytes"] = walk.bytes * here / walk.blocks / device.bandwidth
        seconds += sum(t**OVERLAP for t in wave.values()) ** (1 / OVERLAP)
        for name, t in wave.items():
            totals[name] = totals.get(name, 0) + t
        left -= here
    if walk.reducers:
        totals["second kernel"] = LAUNCH + walk.partials / min(walk.reducers * REDUCE_BANDWIDTH, device.bandwidth)
        seconds += totals["second kernel"]
    return Prediction(seconds, totals, waves)


def yardstick(bytes: float, device: Device) -> float:
    """Seconds of a copy or stream of so many bytes."""
    return STREAM_RAMP + bytes / device.bandwidth


# ---- the present kernels ---------------------------------------------------------------------------------------------------


class Known(NamedTuple):
    cost: Cost
    registers: int  #: of a thread


# By pass, weights, bytes of a value and columns of a thread: instructions a step of a column, and registers of a thread, each
# where warps take turns and where a block is one warp. From `python -m benchmarks.resources --kernels plain --architecture 90
# --sass --json`, NVRTC 13: k values side by side, whole tiles, weights of a step in the state's dtype. A test counts some anew.
KERNELS: dict[tuple[str, str, int, int], tuple[float, float, int, int]] = {
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
    ("forward", "step", 2, 2): (53.1, 50.6, 200, 196),
    ("forward", "step", 2, 1): (102.8, 86.9, 217, 206),
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
    ("backward", "step", 4, 1): (151.0, 135.2, 216, 204),
    ("backward", "step", 2, 2): (123.5, 113.0, 234, 236),
    ("backward", "step", 2, 1): (171.0, 158.8, 229, 217),
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
    ("recompute", "step", 4, 2): (139.5, 121.1, 220, 238),
    ("recompute", "step", 4, 1): (174.8, 159.5, 176, 196),
    ("recompute", "step", 2, 2): (151.6, 132.6, 212, 222),
    ("recompute", "step", 2, 1): (211.2, 181.0, 186, 209),
}

# The forward's are fitted (benchmarks/test_plan.py); the backward's are those fitted before the parameter sums were grouped,
# times 0.80 to 0.88, which a simulation of the machine code says that this gained.
CHAINS = {
    ("forward", "none"): 13, ("forward", "column"): 71,
    ("backward", "none"): 97, ("backward", "column"): 110,
    ("recompute", "none"): 223, ("recompute", "column"): 257,
}  # fmt: skip
CALLS = 150  # instructions a step of float64's exponentials and divisions, calls that are not counted. Fitted to one row


def kernel(of: Specialisation) -> Known:
    """What is known of a kernel: of one with other options, what is known of the plain one."""
    which = "recompute" if of.recompute else of.direction
    weight = "step" if of.weight.startswith("step") else of.weight
    size = ITEMSIZES[of.dtype]
    turns, alone, of_turns, of_alone = (
        KERNELS.get((which, weight, size, of.columns)) or KERNELS[which, "column", size, of.columns]
    )
    instructions = (alone if of.alone else turns) + CALLS * (size == 8)
    chain = 0 if of.alone else CHAINS[which, "column" if weight == "column" else "none"]
    special = (6 if of.recompute else 4) * of.columns
    return Known(Cost(instructions * of.columns, special, chain), of_alone if of.alone else of_turns)
