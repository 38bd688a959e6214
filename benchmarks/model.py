"""How long a pass takes, from its plan: a model of bytes, issue, special functions, the chain of steps, and waves of blocks.

`predict` is pure. A pass is a `Walk`: blocks of warps that walk so many steps, at a `Cost` a step. Blocks run in waves, as many
as a multiprocessor holds; a wave takes as long as the longest of its terms, and somewhat more, for they overlap imperfectly:
their power mean with the exponent OVERLAP. `benchmarks/test_plan.py` says what each constant was fitted to, and holds the model
against every measurement that there is. It knows nothing of caches, of the banks of shared memory, or of what padding costs.

Where time is split a pass is `Spans`. **No device has run that path**: its terms are counted or come from elsewhere, as the
comment at each constant says, and nothing here was held against a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cusru.arguments import ITEMSIZES
from cusru.specialisation import FORMS, Specialisation


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
    steps: float
    blocks: int
    warps: int  #: of a block
    resident: int  #: blocks that fit on a multiprocessor
    bytes: float  #: read and written
    partials: float = 0  #: bytes that a second kernel adds up
    reducers: int = 0  #: its blocks


class Spans(NamedTuple):
    """Of one pass whose time is split (`cusru/kernels/split.cuh`). Before it a launch clears the flags."""

    cost: Cost  #: of a warp's step; `chain`: of a step in whose turn other warps wait
    spans: int
    anchor: int
    groups: int  #: of columns
    columns: int  #: of a thread
    warps: int  #: of a block, that work
    tile: int  #: steps, one after the other, that a warp has of a span
    stretches: int  #: of a lane's time in a span
    chunks: int  #: of a span, that lanes have
    relayed: int  #: steps of a span that are handed from warp to warp
    blocks: int
    resident: int
    bytes: float
    words: float  #: bytes that spans tell one another, through the second cache
    partials: float = 0
    reducers: int = 0


class Guessed(NamedTuple):
    """Of one pass whose time is guessed and mended (`cusru/kernels/guess.cuh`), two launches. What the second has to do depends
    on the numbers."""

    first: Walk
    cost: Cost  #: of the second launch
    resident: int  #: likewise
    spans: int
    rest: float  #: steps of all spans but the first two
    merged: float  #: steps after which states that begin apart have the same bits; infinity: never

    @property
    def second(self) -> Walk:
        """All spans but the first, each as far as it must be walked."""
        steps = min(self.merged, self.first.steps)
        part = (self.spans - 1) / self.spans
        blocks, bytes = round(part * self.first.blocks), self.first.bytes * part * steps / self.first.steps
        return self.first._replace(cost=self.cost, steps=steps, blocks=blocks, resident=self.resident, bytes=bytes)

    @property
    def bytes(self) -> float:
        return self.first.bytes + self.second.bytes

    @property
    def in_order(self) -> float:
        """Steps that the last block of a group walks after that."""
        return self.rest if self.merged > self.first.steps else 0


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


def predict(walk: Walk | Spans | Guessed, device: Device) -> Prediction:
    if isinstance(walk, Guessed):
        return _guessed(walk, device)
    totals = {"ramp": RAMP}
    seconds, waves = _spans(walk, device, totals) if isinstance(walk, Spans) else _waves(walk, device, totals)
    if walk.reducers:
        totals["second kernel"] = LAUNCH + walk.partials / min(walk.reducers * REDUCE_BANDWIDTH, device.bandwidth)
        seconds += totals["second kernel"]
    return Prediction(seconds, totals, waves)


def _guessed(of: Guessed, device: Device) -> Prediction:
    """The second launch has a ramp of its own, for its blocks begin with loads."""
    first, second = predict(of.first, device), predict(of.second, device)
    looks = (of.spans - 2) / of.first.warps * L2_LATENCY  # at what spans began from, side by side
    in_order = (looks + of.in_order * max(cycles(of.second.cost, of.second.warps, 1).values())) / device.clock
    terms = {name: seconds + second.terms[name] for name, seconds in first.terms.items()}
    seconds = first.seconds + LAUNCH + second.seconds + in_order
    return Prediction(seconds, terms | {"second launch": LAUNCH, "in order": in_order}, first.waves + second.waves)


def _together(terms: Iterable[float]) -> float:
    return sum(t**OVERLAP for t in terms) ** (1 / OVERLAP)


def _waves(walk: Walk, device: Device, totals: dict[str, float]) -> tuple[float, list[int]]:
    waves = []
    seconds, left = RAMP, walk.blocks
    while left:
        here = min(left, walk.resident * device.multiprocessors)
        waves.append(-(-here // device.multiprocessors))
        wave = {name: n * walk.steps / device.clock for name, n in cycles(walk.cost, walk.warps, waves[-1]).items()}
        wave["bytes"] = walk.bytes * here / walk.blocks / device.bandwidth
        seconds += _together(wave.values())
        for name, t in wave.items():
            totals[name] = totals.get(name, 0) + t
        left -= here
    return seconds, waves


# ---- time split: no time of it was ever measured -----------------------------------------------------------------------------

HOP = 461e-6 / 512  # seconds from what a block has to tell to another's having it: a chain of 512 tiles, simulated at 461 us
L2_LATENCY = 270  # cycles; published microbenchmarks of Hopper and its like find 220 to 340
L2_BANDWIDTH = 5.5e12  # bytes a second; likewise
BARRIER = 40  # cycles of a __syncthreads for which nobody is late: an estimate
# Instructions of the warp that talks, each GAP cycles: FOLDED and HEARD counted in the machine code of two columns a thread,
# bfloat16 (NVRTC 13.5, sm_90; a test counts the first again), TALK an estimate.
FOLDED = (99 + 56) / 8  # of a stretch's column: into the span's summary, and where it starts
HEARD = 168 / 8  # of a column of a span that has told
TALK = 150  # all others of a span
ABREAST = 4  # spans whose words are on their way together
HIDDEN = 0.5  # of the turns' chain, by what warps do that have had their turn or wait for it: an estimate


def heard(anchor: int, chunks: int) -> float:
    """Spans since the last anchor that a lane asks; of several chunks the first has its whole share soonest."""
    return anchor / chunks if chunks > 1 else (anchor + 1) / 2


def _exchange(of: Spans, device: Device) -> float:
    """Cycles from a block's first barrier of a span to its second, during which no warp computes."""
    asked = heard(of.anchor, of.chunks)
    trips = 2 + asked // ABREAST  # the anchor's flag, its start; words of spans, but for the first, which are HOP's
    folded = of.stretches + (3 * of.chunks if of.chunks > 1 else 0)  # of chunks three times: by shuffles
    instructions = of.columns * (folded * FOLDED + asked * HEARD) + TALK
    return instructions * GAP + HOP * device.clock + trips * L2_LATENCY + 2 * BARRIER


def _spans(of: Spans, device: Device, totals: dict[str, float]) -> tuple[float, list[int]]:
    """A block's span: all its warps compute, exchange, compute; other blocks of the multiprocessor compute meanwhile, where there
    are any. Bytes are on their way all the time. And a span's start comes from anchor to anchor."""
    here = min(of.blocks, of.resident * device.multiprocessors)
    per_sm = -(-here // device.multiprocessors)
    if of.blocks == of.groups:  # each of which has one block
        turns = -(-of.groups // here) * of.spans
    else:
        turns = max(-(-of.spans * of.groups // here), -(-of.spans // (of.blocks // of.groups)))
    rate = min(per_sm * of.warps / of.cost.gap, SCHEDULERS * ISSUE)
    slots = -(-per_sm * of.warps // SCHEDULERS) * SCHEDULERS  # the scheduler that has most warps is waited for
    busy = slots * of.tile * of.cost.instructions / rate
    alone = busy / per_sm + _exchange(of, device) + (1 - HIDDEN) * of.relayed * of.cost.chain
    special = per_sm * of.warps * of.tile * of.cost.special * 32 / SPECIAL_LANES
    terms = {
        "issue": turns * busy / device.clock,
        "special functions": turns * special / device.clock,
        "exchange": turns * _exchange(of, device) / device.clock,
        "turns": turns * of.relayed * of.cost.chain / device.clock,
        "anchors": of.spans / of.anchor * HOP,
        "words": of.words / L2_BANDWIDTH,
        "bytes": of.bytes / device.bandwidth,
    }
    totals |= {"clear": LAUNCH, **terms}
    overlapping = ("special functions", "anchors", "words", "bytes")
    seconds = _together([turns * max(busy, alone) / device.clock, *(terms[name] for name in overlapping)])
    return RAMP + LAUNCH + seconds, [per_sm] * -(-of.blocks // (of.resident * device.multiprocessors))


def yardstick(bytes: float, device: Device) -> float:
    """Seconds of a copy or stream of so many bytes."""
    return STREAM_RAMP + bytes / device.bandwidth


# ---- the present kernels ---------------------------------------------------------------------------------------------------


class Known(NamedTuple):
    cost: Cost
    registers: int  #: of a thread


SIZES = (8, 1), (4, 2), (4, 1), (2, 2), (2, 1)  # bytes of a value, columns of a thread
# By pass, cell (of SRU with skip input), weights, and whether warps take turns, a block is one warp, or time is split; for each
# of SIZES: instructions a step of a column, and registers of a thread. By `benchmarks.resources.row(kernel, 90, sass=True)`,
# NVRTC 13.5: k values side by side, whole tiles, weights of a step in the state's dtype (SRU: in u's). A test counts some anew.
# What mends has 1.09 times the instructions that guess has, by a simulation of the machine code: its loops are not told apart.
KERNELS: dict[tuple[str, str, str, str], tuple[tuple[float, ...], tuple[int, ...]]] = {
    ("forward", "sru", "none", "turns"): ((188.5, 48.5, 71.2, 53.5, 88.4), (166, 168, 128, 168, 168)),
    ("forward", "sru", "none", "alone"): ((183.2, 46.8, 63.5, 51.7, 83.1), (174, 168, 146, 168, 162)),
    ("forward", "sru", "none", "split"): ((283.5, 69.6, 102.8, 74.1, 109.8), (138, 168, 130, 167, 167)),
    ("forward", "f", "none", "turns"): ((251.8, 48.6, 63.5, 52.2, 68.2), (98, 136, 118, 126, 109)),
    ("forward", "f", "none", "alone"): ((242.8, 44.5, 57.5, 48.6, 61.5), (101, 128, 109, 123, 107)),
    ("forward", "f", "none", "split"): ((306.8, 73.9, 101.9, 76.7, 105.9), (102, 143, 98, 138, 102)),
    ("forward", "fo", "none", "turns"): ((325.2, 62.9, 72.1, 67.8, 90.2), (131, 162, 108, 148, 128)),
    ("forward", "fo", "none", "alone"): ((306.8, 55.1, 69.2, 61.3, 83.8), (130, 156, 107, 148, 128)),
    ("forward", "fo", "none", "split"): ((378.5, 84.8, 111.9, 88.3, 124.1), (126, 147, 132, 141, 128)),
    ("forward", "ifo", "none", "turns"): ((390.0, 67.4, 81.2, 74.4, 90.8), (98, 163, 115, 156, 113)),
    ("forward", "ifo", "none", "alone"): ((374.0, 61.8, 71.5, 69.7, 78.9), (110, 165, 111, 164, 115)),
    ("forward", "ifo", "none", "split"): ((454.2, 91.4, 110.1, 95.8, 115.4), (128, 163, 112, 166, 110)),
    ("forward", "affine", "column", "turns"): ((47.0, 16.9, 30.2, 20.4, 38.8), (98, 102, 90, 87, 90)),
    ("forward", "affine", "column", "alone"): ((38.0, 14.8, 28.9, 16.3, 37.9), (94, 88, 86, 95, 87)),
    ("forward", "affine", "column", "split"): ((103.5, 35.8, 58.6, 38.4, 64.8), (94, 106, 116, 104, 114)),
    ("forward", "affine", "step", "turns"): ((51.5, 17.3, 38.2, 19.4, 50.0), (110, 128, 122, 128, 118)),
    ("forward", "affine", "step", "alone"): ((45.5, 16.3, 30.0, 18.9, 43.9), (108, 118, 112, 110, 120)),
    ("forward", "affine", "step", "split"): ((118.5, 36.8, 72.8, 39.2, 80.0), (102, 154, 110, 156, 96)),
    ("forward", "complement", "column", "turns"): ((47.0, 16.9, 29.6, 20.4, 38.4), (96, 100, 96, 87, 90)),
    ("forward", "complement", "column", "alone"): ((38.0, 14.8, 25.8, 16.3, 39.6), (94, 88, 88, 95, 84)),
    ("forward", "complement", "column", "split"): ((103.8, 35.7, 58.6, 38.3, 65.0), (96, 106, 116, 104, 108)),
    ("forward", "complement", "step", "turns"): ((51.5, 17.3, 38.2, 19.4, 50.0), (110, 128, 122, 128, 118)),
    ("forward", "complement", "step", "alone"): ((45.5, 16.3, 32.8, 18.9, 43.8), (108, 118, 112, 110, 120)),
    ("forward", "complement", "step", "split"): ((115.2, 39.1, 71.0, 41.5, 77.1), (102, 152, 112, 156, 96)),
    ("forward", "blend", "column", "turns"): ((48.0, 18.8, 30.6, 20.9, 39.4), (98, 100, 96, 87, 90)),
    ("forward", "blend", "column", "alone"): ((39.0, 16.4, 28.6, 17.3, 40.6), (94, 88, 92, 96, 87)),
    ("forward", "blend", "column", "split"): ((104.8, 36.9, 59.6, 38.4, 66.8), (96, 106, 116, 104, 113)),
    ("forward", "blend", "step", "turns"): ((57.2, 21.9, 39.2, 25.8, 51.0), (110, 128, 122, 128, 118)),
    ("forward", "blend", "step", "alone"): ((50.0, 20.6, 33.8, 23.2, 44.8), (108, 120, 112, 110, 120)),
    ("forward", "blend", "step", "split"): ((116.2, 40.3, 72.0, 42.7, 78.1), (102, 154, 116, 156, 111)),
    ("forward", "sru", "column", "turns"): ((235.2, 43.8, 67.0, 47.9, 81.1), (130, 166, 159, 132, 168)),
    ("forward", "sru", "column", "alone"): ((227.5, 43.4, 60.5, 48.4, 76.4), (138, 164, 140, 138, 167)),
    ("forward", "sru", "step", "turns"): ((254.5, 49.3, 69.4, 56.7, 104.2), (156, 224, 168, 168, 214)),
    ("forward", "sru", "column", "guess"): ((242.8, 47.9, 72.1, 52.1, 83.4), (130, 166, 142, 150, 168)),
    ("forward", "sru", "column", "mend"): ((264.7, 52.2, 78.6, 56.8, 90.9), (146, 168, 150, 164, 167)),
    ("forward", "sru", "step", "guess"): ((262.5, 54.3, 77.2, 59.5, 99.8), (168, 224, 184, 168, 255)),
    ("forward", "sru", "step", "mend"): ((286.1, 59.2, 84.1, 64.9, 108.8), (208, 234, 216, 188, 247)),
    ("forward", "sru", "step", "alone"): ((237.2, 45.1, 66.2, 53.9, 88.5), (168, 216, 168, 166, 239)),
    ("backward", "sru", "none", "turns"): ((272.8, 97.0, 130.2, 106.9, 146.5), (186, 196, 163, 202, 179)),
    ("backward", "sru", "none", "alone"): ((270.0, 88.8, 107.5, 98.4, 138.8), (192, 208, 166, 202, 168)),
    ("backward", "sru", "none", "split"): ((327.5, 142.1, 157.5, 149.2, 181.2), (203, 194, 161, 200, 168)),
    ("backward", "sru", "column", "turns"): ((286.8, 115.5, 144.0, 124.8, 164.0), (193, 204, 169, 202, 200)),
    ("backward", "sru", "column", "alone"): ((289.8, 101.2, 119.0, 110.1, 145.2), (212, 218, 172, 214, 194)),
    ("backward", "sru", "column", "split"): ((355.2, 135.0, 191.8, 147.1, 227.2), (212, 199, 180, 196, 168)),
    ("backward", "sru", "step", "turns"): ((304.0, 111.1, 143.0, 124.4, 173.2), (228, 234, 208, 232, 226)),
    ("backward", "sru", "step", "alone"): ((296.0, 99.5, 129.0, 111.1, 161.8), (244, 238, 206, 234, 222)),
    ("backward", "sru", "step", "split"): ((348.5, 118.8, 176.0, 134.2, 216.2), (230, 228, 204, 207, 200)),
    ("backward", "f", "none", "turns"): ((317.0, 67.8, 88.5, 75.4, 104.8), (182, 180, 136, 167, 128)),
    ("backward", "f", "none", "alone"): ((305.8, 62.2, 80.2, 70.8, 94.8), (166, 168, 132, 168, 124)),
    ("backward", "f", "none", "split"): ((340.5, 85.4, 101.0, 89.0, 124.5), (195, 176, 149, 178, 136)),
    ("backward", "fo", "none", "turns"): ((400.5, 84.6, 107.0, 94.6, 131.2), (202, 186, 150, 194, 166)),
    ("backward", "fo", "none", "alone"): ((403.8, 79.9, 95.5, 89.4, 124.8), (190, 178, 140, 180, 161)),
    ("backward", "fo", "none", "split"): ((426.8, 103.5, 129.0, 111.0, 145.8), (207, 194, 152, 190, 156)),
    ("backward", "ifo", "none", "turns"): ((497.5, 94.5, 110.0, 102.9, 133.2), (204, 204, 162, 199, 152)),
    ("backward", "ifo", "none", "alone"): ((488.8, 90.4, 105.8, 99.6, 127.8), (194, 187, 152, 185, 140)),
    ("backward", "ifo", "none", "split"): ((521.0, 110.5, 130.5, 116.0, 148.8), (214, 199, 155, 205, 148)),
    ("backward", "affine", "column", "turns"): ((95.2, 56.0, 93.2, 58.6, 133.5), (136, 140, 118, 136, 126)),
    ("backward", "affine", "column", "alone"): ((83.5, 45.2, 81.5, 49.9, 110.5), (125, 136, 112, 132, 103)),
    ("backward", "affine", "column", "split"): ((188.5, 49.9, 173.5, 59.4, 189.5), (163, 136, 132, 136, 112)),
    ("backward", "affine", "step", "turns"): ((113.5, 62.4, 112.8, 68.1, 135.5), (140, 153, 128, 152, 128)),
    ("backward", "affine", "step", "alone"): ((98.8, 53.6, 99.0, 59.5, 128.5), (146, 148, 131, 136, 110)),
    ("backward", "affine", "step", "split"): ((71.0, 35.0, 60.0, 39.8, 74.2), (176, 150, 139, 144, 124)),
    ("backward", "complement", "column", "turns"): ((95.2, 55.6, 93.8, 58.6, 133.5), (136, 140, 118, 136, 124)),
    ("backward", "complement", "column", "alone"): ((83.5, 45.0, 81.8, 50.9, 110.5), (125, 136, 111, 132, 96)),
    ("backward", "complement", "column", "split"): ((188.8, 50.8, 173.8, 53.5, 189.5), (161, 134, 128, 134, 112)),
    ("backward", "complement", "step", "turns"): ((116.0, 63.2, 113.8, 69.1, 136.5), (140, 153, 128, 152, 128)),
    ("backward", "complement", "step", "alone"): ((99.8, 54.6, 99.5, 61.5, 129.8), (146, 150, 133, 138, 110)),
    ("backward", "complement", "step", "split"): ((70.0, 35.5, 62.2, 37.6, 75.5), (176, 150, 139, 144, 118)),
    ("backward", "blend", "column", "turns"): ((121.2, 76.5, 121.8, 82.9, 148.0), (152, 144, 131, 140, 141)),
    ("backward", "blend", "column", "alone"): ((111.8, 59.9, 102.8, 63.5, 145.8), (150, 148, 133, 142, 118)),
    ("backward", "blend", "column", "split"): ((145.2, 71.2, 137.5, 76.2, 152.2), (168, 140, 135, 142, 120)),
    ("backward", "blend", "step", "turns"): ((139.5, 80.2, 142.8, 82.0, 172.8), (174, 164, 158, 156, 143)),
    ("backward", "blend", "step", "alone"): ((122.0, 72.8, 128.2, 77.1, 164.0), (160, 157, 144, 150, 128)),
    ("backward", "blend", "step", "split"): ((73.5, 44.5, 72.0, 47.1, 90.0), (186, 164, 147, 158, 140)),
    ("recompute", "sru", "none", "turns"): ((370.8, 98.8, 119.5, 110.2, 142.2), (166, 216, 172, 255, 210)),
    ("recompute", "sru", "none", "alone"): ((357.0, 105.4, 134.5, 117.6, 155.8), (188, 180, 148, 189, 155)),
    ("recompute", "sru", "none", "split"): ((407.8, 157.5, 188.5, 170.6, 207.0), (203, 198, 160, 193, 159)),
    ("recompute", "sru", "column", "turns"): ((400.0, 113.2, 137.6, 122.9, 156.6), (182, 239, 190, 255, 221)),
    ("recompute", "sru", "column", "alone"): ((391.8, 119.1, 151.2, 130.6, 167.8), (212, 204, 158, 206, 167)),
    ("recompute", "sru", "column", "split"): ((472.2, 150.0, 218.5, 163.6, 251.0), (213, 198, 166, 192, 167)),
    ("recompute", "sru", "step", "turns"): ((416.0, 135.8, 172.8, 152.9, 215.0), (202, 188, 168, 207, 178)),
    ("recompute", "sru", "step", "alone"): ((400.2, 117.5, 156.2, 132.8, 186.8), (231, 224, 180, 220, 202)),
    ("recompute", "sru", "step", "split"): ((456.2, 136.6, 209.0, 153.2, 251.0), (228, 216, 194, 206, 182)),
    ("recompute", "f", "none", "turns"): ((533.2, 98.7, 114.2, 106.2, 130.1), (180, 184, 164, 194, 149)),
    ("recompute", "f", "none", "alone"): ((510.0, 100.2, 120.5, 110.8, 140.5), (184, 165, 147, 153, 113)),
    ("recompute", "f", "none", "split"): ((546.2, 123.4, 145.8, 131.5, 173.2), (189, 180, 150, 168, 135)),
    ("recompute", "fo", "none", "turns"): ((615.2, 121.2, 132.0, 131.4, 154.9), (200, 218, 160, 230, 168)),
    ("recompute", "fo", "none", "alone"): ((595.5, 119.1, 137.5, 129.9, 163.8), (198, 158, 133, 164, 128)),
    ("recompute", "fo", "none", "split"): ((636.5, 140.6, 175.0, 152.8, 188.8), (210, 198, 149, 199, 148)),
    ("recompute", "ifo", "none", "turns"): ((798.0, 136.7, 146.0, 145.9, 166.2), (204, 246, 181, 246, 164)),
    ("recompute", "ifo", "none", "alone"): ((774.8, 136.5, 148.2, 147.8, 179.5), (206, 168, 146, 168, 125)),
    ("recompute", "ifo", "none", "split"): ((811.8, 156.9, 181.2, 167.0, 198.8), (214, 206, 153, 206, 145)),
    ("recompute", "affine", "column", "turns"): ((122.5, 46.6, 77.5, 49.9, 94.9), (148, 128, 128, 128, 127)),
    ("recompute", "affine", "column", "alone"): ((108.0, 57.8, 105.0, 65.2, 129.8), (128, 116, 116, 106, 106)),
    ("recompute", "affine", "column", "split"): ((152.2, 66.1, 143.8, 74.4, 162.0), (165, 140, 137, 140, 112)),
    ("recompute", "affine", "step", "turns"): ((145.0, 50.8, 89.6, 54.2, 117.5), (164, 164, 158, 148, 130)),
    ("recompute", "affine", "step", "alone"): ((117.8, 69.1, 116.2, 71.8, 149.2), (148, 136, 126, 128, 118)),
    ("recompute", "affine", "step", "split"): ((93.0, 47.5, 84.8, 50.6, 96.0), (179, 152, 145, 152, 133)),
    ("recompute", "complement", "column", "turns"): ((122.5, 46.6, 77.4, 49.8, 94.8), (148, 128, 128, 128, 128)),
    ("recompute", "complement", "column", "alone"): ((107.5, 57.8, 105.0, 64.0, 129.8), (128, 116, 114, 106, 109)),
    ("recompute", "complement", "column", "split"): ((152.5, 68.4, 147.2, 73.4, 163.0), (165, 142, 136, 142, 112)),
    ("recompute", "complement", "step", "turns"): ((140.2, 52.1, 90.6, 55.2, 118.4), (164, 164, 158, 148, 130)),
    ("recompute", "complement", "step", "alone"): ((121.5, 70.1, 117.2, 72.9, 150.5), (148, 136, 126, 128, 121)),
    ("recompute", "complement", "step", "split"): ((81.2, 47.4, 85.0, 49.2, 95.8), (179, 152, 145, 152, 138)),
    ("recompute", "blend", "column", "turns"): ((126.5, 51.9, 83.4, 56.8, 100.1), (150, 142, 128, 150, 128)),
    ("recompute", "blend", "column", "alone"): ((111.5, 61.1, 112.0, 70.2, 135.0), (128, 118, 112, 120, 110)),
    ("recompute", "blend", "column", "split"): ((163.0, 79.6, 153.5, 85.1, 168.2), (165, 142, 138, 140, 112)),
    ("recompute", "blend", "step", "turns"): ((142.0, 53.7, 93.5, 62.2, 122.1), (168, 168, 154, 160, 162)),
    ("recompute", "blend", "step", "alone"): ((122.8, 69.4, 127.0, 83.9, 154.2), (152, 138, 128, 124, 125)),
    ("recompute", "blend", "step", "split"): ((85.5, 50.9, 88.8, 55.9, 105.0), (180, 162, 147, 162, 142)),
}

# Special functions a step of a column: forward, backward, recompute.
SPECIAL = {"sru": (4, 4, 6), "f": (4, 4, 8), "fo": (6, 6, 10), "ifo": (8, 8, 14)}

# The forward's are fitted (benchmarks/test_plan.py); the backward's are those fitted before the parameter sums were grouped,
# times 0.80 to 0.88, which a simulation of the machine code says that this gained.
CHAINS = {
    ("forward", "none"): 13, ("forward", "column"): 71,
    ("backward", "none"): 97, ("backward", "column"): 110,
    ("recompute", "none"): 223, ("recompute", "column"): 257,
}  # fmt: skip
CALLS = 150  # instructions a step of float64's exponentials and divisions, calls that are not counted. Fitted to one row


MENDING = 1.15  # of mend's chain to that of a walk by turns: 82 to 88 cycles a step to 75, by a simulation of the machine code
# Cycles a step that the states' turns take in the recomputing backward, and the turns of two parameter sums: parts of CHAINS, by
# a simulation of the machine code (docs/performance.md, "What limits S = 32"); that of SRU without weights is CHAINS' difference.
STATES = {"none": 85, "column": 95}
SUMS = 33


def kernel(of: Specialisation) -> Known:
    """What is known of a kernel: of one with other options, what is known of the plain one."""
    which = "recompute" if of.recompute else of.direction
    weight = "step" if of.weight.startswith("step") else of.weight
    way = ("guess", "mend")[of.mend] if of.split and not of.affine else "split" if of.split else "alone" if of.alone else "turns"
    size = ITEMSIZES[of.dtype]
    at = SIZES.index((size, of.columns))
    counted, registers = KERNELS[which, of.cell, weight, way]
    special = SPECIAL.get(of.cell, (0, 0, 0))[("forward", "backward", "recompute").index(which)]
    instructions = counted[at] + CALLS * (size == 8 and special > 0)
    return Known(Cost(instructions * of.columns, special * of.columns, _chain(of, which)), registers[at])


def _chain(of: Specialisation, which: str) -> float:
    """Cells other than SRU were not measured: theirs is SRU's without the parts that they have not."""
    kind = "column" if of.cell == "sru" and of.weight != "none" else "none"
    step = CHAINS["forward", "none"]
    states = step if of.cell in FORMS else STATES[kind]  # no gate waits for its turn
    sums = SUMS if of.sums else 0
    if of.alone:
        return 0
    if of.split and of.affine:
        return step if which == "forward" else sums + (states if of.recompute else 0)
    if which == "forward":
        return CHAINS[which, kind] * (MENDING if of.mend else 1)
    return CHAINS[which, kind] - (SUMS - sums) - (STATES[kind] - states if of.recompute else 0)
