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
# --sass --json`, NVRTC 13.5: k values side by side, whole tiles, weights of a step in the state's dtype. A test counts some anew.
KERNELS: dict[tuple[str, str, int, int], tuple[float, float, int, int]] = {
    ("forward", "none", 8, 1): (193.0, 183.2, 158, 164),
    ("forward", "none", 4, 2): (49.3, 46.8, 168, 168),
    ("forward", "none", 4, 1): (71.1, 61.0, 151, 148),
    ("forward", "none", 2, 2): (53.0, 52.6, 168, 168),
    ("forward", "none", 2, 1): (85.5, 82.9, 168, 168),
    ("forward", "column", 8, 1): (238.5, 227.5, 128, 134),
    ("forward", "column", 4, 2): (42.8, 42.1, 168, 166),
    ("forward", "column", 4, 1): (66.6, 60.5, 143, 142),
    ("forward", "column", 2, 2): (48.6, 48.4, 142, 128),
    ("forward", "column", 2, 1): (81.2, 76.5, 163, 168),
    ("forward", "step", 4, 2): (48.0, 45.1, 224, 218),
    ("forward", "step", 4, 1): (70.5, 70.9, 168, 168),
    ("forward", "step", 2, 2): (53.1, 50.6, 190, 182),
    ("forward", "step", 2, 1): (102.8, 86.9, 210, 212),
    ("backward", "none", 8, 1): (275.2, 258.2, 198, 198),
    ("backward", "none", 4, 2): (99.1, 89.4, 208, 204),
    ("backward", "none", 4, 1): (134.0, 107.2, 174, 164),
    ("backward", "none", 2, 2): (107.6, 99.8, 210, 205),
    ("backward", "none", 2, 1): (146.0, 128.8, 199, 167),
    ("backward", "column", 8, 1): (289.8, 284.5, 218, 224),
    ("backward", "column", 4, 2): (115.4, 101.9, 222, 220),
    ("backward", "column", 4, 1): (133.2, 121.2, 178, 176),
    ("backward", "column", 2, 2): (124.6, 110.5, 207, 215),
    ("backward", "column", 2, 1): (166.0, 145.8, 200, 184),
    ("backward", "step", 4, 2): (112.6, 100.2, 240, 236),
    ("backward", "step", 4, 1): (146.5, 130.8, 214, 204),
    ("backward", "step", 2, 2): (122.8, 109.4, 240, 238),
    ("backward", "step", 2, 1): (170.5, 160.2, 218, 213),
    ("recompute", "none", 8, 1): (372.2, 359.2, 184, 196),
    ("recompute", "none", 4, 2): (99.2, 108.4, 232, 178),
    ("recompute", "none", 4, 1): (127.5, 136.0, 185, 156),
    ("recompute", "none", 2, 2): (110.4, 120.0, 255, 192),
    ("recompute", "none", 2, 1): (144.5, 155.8, 210, 163),
    ("recompute", "column", 8, 1): (395.2, 374.5, 184, 216),
    ("recompute", "column", 4, 2): (113.8, 119.8, 242, 206),
    ("recompute", "column", 4, 1): (140.5, 151.8, 190, 164),
    ("recompute", "column", 2, 2): (124.2, 131.8, 255, 211),
    ("recompute", "column", 2, 1): (159.0, 169.0, 223, 168),
    ("recompute", "step", 4, 2): (136.9, 118.9, 198, 230),
    ("recompute", "step", 4, 1): (174.8, 157.8, 178, 186),
    ("recompute", "step", 2, 2): (149.1, 131.4, 210, 228),
    ("recompute", "step", 2, 1): (211.5, 180.0, 178, 205),
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
