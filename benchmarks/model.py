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
ABREAST = 8  # spans whose words are on their way together (in float64, and with starts, four)
HIDDEN = 0.5  # of the turns' chain, by what warps do that have had their turn or wait for it: an estimate


def heard(anchor: int, chunks: int) -> float:
    """Spans since the last anchor that a lane asks; of several chunks the first has its whole share soonest."""
    return anchor / chunks if chunks > 1 else (anchor + 1) / 2


def _exchange(of: Spans, device: Device) -> float:
    """Cycles from a block's first barrier of a span to its second, during which no warp computes."""
    asked = heard(of.anchor, of.chunks)
    trips = 2 + asked // ABREAST  # the anchor's flag, its start; words of spans, but for the first, which are HOP's
    folded = of.warps + (3 * of.chunks if of.chunks > 1 else 0)  # of chunks three times: by shuffles
    instructions = of.columns * (folded * FOLDED + asked * HEARD) + TALK
    return instructions * GAP + HOP * device.clock + trips * L2_LATENCY + 2 * BARRIER


def _spans(of: Spans, device: Device, totals: dict[str, float]) -> tuple[float, list[int]]:
    """A block's span: all its warps compute, exchange, compute; other blocks of the multiprocessor compute meanwhile, where there
    are any. (A simulation of the machine code of 16 blocks on 8 multiprocessors says that two blocks take 6,252 cycles for a span
    of each forward, 9,254 backward: a block alone takes some 5,000 and 7,641, all their instructions 4,858 and 7,583.) Bytes are
    on their way all the time. And a span's start comes from anchor to anchor."""
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
    overlapping = [terms[name] for name in ("special functions", "anchors", "words", "bytes")]
    if per_sm > 1:  # what other blocks compute meanwhile
        overlapping.append(terms["issue"])
    seconds = _together([turns * alone / device.clock, *overlapping])
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
    ("forward", "sru", "none", "split"): ((283.5, 69.6, 102.8, 74.1, 109.8), (140, 168, 130, 168, 168)),
    ("forward", "f", "none", "turns"): ((251.8, 48.6, 63.5, 52.2, 68.2), (98, 136, 118, 126, 109)),
    ("forward", "f", "none", "alone"): ((242.8, 44.5, 57.5, 48.6, 61.5), (101, 128, 109, 123, 107)),
    ("forward", "f", "none", "split"): ((306.8, 73.9, 101.9, 76.7, 105.9), (102, 138, 100, 139, 100)),
    ("forward", "fo", "none", "turns"): ((325.2, 62.9, 72.1, 67.8, 90.2), (131, 162, 108, 148, 128)),
    ("forward", "fo", "none", "alone"): ((306.8, 55.1, 69.2, 61.3, 83.8), (130, 156, 107, 148, 128)),
    ("forward", "fo", "none", "split"): ((378.5, 84.8, 111.9, 88.3, 124.1), (128, 149, 136, 143, 128)),
    ("forward", "ifo", "none", "turns"): ((390.0, 67.4, 81.2, 74.4, 90.8), (98, 163, 115, 156, 113)),
    ("forward", "ifo", "none", "alone"): ((374.0, 61.8, 71.5, 69.7, 78.9), (110, 165, 111, 164, 115)),
    ("forward", "ifo", "none", "split"): ((454.2, 91.4, 110.1, 95.8, 115.4), (128, 160, 111, 168, 114)),
    ("forward", "affine", "column", "turns"): ((47.0, 16.9, 30.2, 20.4, 38.8), (98, 102, 90, 87, 90)),
    ("forward", "affine", "column", "alone"): ((38.0, 14.8, 28.9, 16.3, 37.9), (94, 88, 86, 95, 87)),
    ("forward", "affine", "column", "split"): ((103.5, 35.8, 58.6, 38.4, 64.8), (94, 108, 116, 106, 116)),
    ("forward", "affine", "step", "turns"): ((51.5, 17.3, 38.2, 19.4, 50.0), (110, 128, 122, 128, 118)),
    ("forward", "affine", "step", "alone"): ((45.5, 16.3, 30.0, 18.9, 43.9), (108, 118, 112, 110, 120)),
    ("forward", "affine", "step", "split"): ((118.5, 36.8, 72.8, 39.2, 80.0), (104, 156, 110, 158, 96)),
    ("forward", "complement", "column", "turns"): ((47.0, 16.9, 29.6, 20.4, 38.4), (96, 100, 96, 87, 90)),
    ("forward", "complement", "column", "alone"): ((38.0, 14.8, 25.8, 16.3, 39.6), (94, 88, 88, 95, 84)),
    ("forward", "complement", "column", "split"): ((103.8, 35.7, 58.6, 38.3, 65.0), (94, 108, 118, 106, 106)),
    ("forward", "complement", "step", "turns"): ((51.5, 17.3, 38.2, 19.4, 50.0), (110, 128, 122, 128, 118)),
    ("forward", "complement", "step", "alone"): ((45.5, 16.3, 32.8, 18.9, 43.8), (108, 118, 112, 110, 120)),
    ("forward", "complement", "step", "split"): ((115.2, 39.1, 71.0, 41.5, 77.1), (104, 154, 114, 158, 110)),
    ("forward", "blend", "column", "turns"): ((48.0, 18.8, 30.6, 20.9, 39.4), (98, 100, 96, 87, 90)),
    ("forward", "blend", "column", "alone"): ((39.0, 16.4, 28.6, 17.3, 40.6), (94, 88, 92, 96, 87)),
    ("forward", "blend", "column", "split"): ((104.8, 36.9, 59.6, 38.4, 66.8), (94, 104, 118, 104, 114)),
    ("forward", "blend", "step", "turns"): ((57.2, 21.9, 39.2, 25.8, 51.0), (110, 128, 122, 128, 118)),
    ("forward", "blend", "step", "alone"): ((50.0, 20.6, 33.8, 23.2, 44.8), (108, 120, 112, 110, 120)),
    ("forward", "blend", "step", "split"): ((116.2, 40.3, 72.0, 42.7, 78.1), (104, 156, 114, 154, 120)),
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
    ("backward", "sru", "none", "split"): ((297.0, 106.8, 134.6, 121.1, 172.4), (220, 255, 182, 255, 174)),
    ("backward", "sru", "column", "turns"): ((286.8, 115.5, 144.0, 124.8, 164.0), (193, 204, 169, 202, 200)),
    ("backward", "sru", "column", "alone"): ((289.8, 101.2, 119.0, 110.1, 145.2), (212, 218, 172, 214, 194)),
    ("backward", "sru", "column", "split"): ((334.2, 139.3, 159.9, 147.5, 191.0), (218, 255, 181, 255, 168)),
    ("backward", "sru", "step", "turns"): ((304.0, 111.1, 143.0, 124.4, 173.2), (228, 234, 208, 232, 226)),
    ("backward", "sru", "step", "alone"): ((296.0, 99.5, 129.0, 111.1, 161.8), (244, 238, 206, 234, 222)),
    ("backward", "sru", "step", "split"): ((336.2, 125.8, 159.9, 137.9, 192.8), (255, 255, 188, 255, 168)),
    ("backward", "f", "none", "turns"): ((317.0, 67.8, 88.5, 75.4, 104.8), (182, 180, 136, 167, 128)),
    ("backward", "f", "none", "alone"): ((305.8, 62.2, 80.2, 70.8, 94.8), (166, 168, 132, 168, 124)),
    ("backward", "f", "none", "split"): ((357.5, 80.8, 101.9, 85.9, 122.2), (177, 220, 168, 224, 162)),
    ("backward", "fo", "none", "turns"): ((400.5, 84.6, 107.0, 94.6, 131.2), (202, 186, 150, 194, 166)),
    ("backward", "fo", "none", "alone"): ((403.8, 79.9, 95.5, 89.4, 124.8), (190, 178, 140, 180, 161)),
    ("backward", "fo", "none", "split"): ((446.0, 101.1, 125.9, 107.6, 146.0), (188, 252, 174, 254, 153)),
    ("backward", "ifo", "none", "turns"): ((497.5, 94.5, 110.0, 102.9, 133.2), (204, 204, 162, 199, 152)),
    ("backward", "ifo", "none", "alone"): ((488.8, 90.4, 105.8, 99.6, 127.8), (194, 187, 152, 185, 140)),
    ("backward", "ifo", "none", "split"): ((535.0, 111.7, 135.1, 117.7, 154.0), (191, 255, 197, 255, 191)),
    ("backward", "affine", "column", "turns"): ((95.2, 56.0, 93.2, 58.6, 133.5), (136, 140, 118, 136, 126)),
    ("backward", "affine", "column", "alone"): ((83.5, 45.2, 81.5, 49.9, 110.5), (125, 136, 112, 132, 103)),
    ("backward", "affine", "column", "split"): ((120.0, 45.6, 107.6, 46.9, 123.5), (160, 158, 145, 159, 139)),
    ("backward", "affine", "step", "turns"): ((113.5, 62.4, 112.8, 68.1, 135.5), (140, 153, 128, 152, 128)),
    ("backward", "affine", "step", "alone"): ((98.8, 53.6, 99.0, 59.5, 128.5), (146, 148, 131, 136, 110)),
    ("backward", "affine", "step", "split"): ((62.1, 34.4, 58.6, 40.4, 72.8), (162, 172, 154, 172, 143)),
    ("backward", "complement", "column", "turns"): ((95.2, 55.6, 93.8, 58.6, 133.5), (136, 140, 118, 136, 124)),
    ("backward", "complement", "column", "alone"): ((83.5, 45.0, 81.8, 50.9, 110.5), (125, 136, 111, 132, 96)),
    ("backward", "complement", "column", "split"): ((121.5, 47.1, 108.6, 47.4, 123.9), (160, 160, 147, 160, 141)),
    ("backward", "complement", "step", "turns"): ((116.0, 63.2, 113.8, 69.1, 136.5), (140, 153, 128, 152, 128)),
    ("backward", "complement", "step", "alone"): ((99.8, 54.6, 99.5, 61.5, 129.8), (146, 150, 133, 138, 110)),
    ("backward", "complement", "step", "split"): ((62.0, 37.1, 57.2, 39.0, 74.4), (163, 172, 149, 174, 143)),
    ("backward", "blend", "column", "turns"): ((121.2, 76.5, 121.8, 82.9, 148.0), (152, 144, 131, 140, 141)),
    ("backward", "blend", "column", "alone"): ((111.8, 59.9, 102.8, 63.5, 145.8), (150, 148, 133, 142, 118)),
    ("backward", "blend", "column", "split"): ((135.6, 53.2, 120.9, 57.6, 137.4), (168, 168, 159, 173, 144)),
    ("backward", "blend", "step", "turns"): ((139.5, 80.2, 142.8, 82.0, 172.8), (174, 164, 158, 156, 143)),
    ("backward", "blend", "step", "alone"): ((122.0, 72.8, 128.2, 77.1, 164.0), (160, 157, 144, 150, 128)),
    ("backward", "blend", "step", "split"): ((77.8, 45.6, 66.8, 48.6, 87.9), (170, 190, 152, 183, 144)),
    ("recompute", "sru", "none", "turns"): ((385.2, 100.1, 123.0, 111.1, 144.2), (164, 216, 172, 255, 215)),
    ("recompute", "sru", "none", "alone"): ((348.8, 110.2, 138.8, 123.1, 154.8), (188, 180, 152, 189, 155)),
    ("recompute", "sru", "none", "split"): ((391.9, 132.9, 162.1, 145.6, 202.1), (206, 255, 196, 255, 172)),
    ("recompute", "sru", "column", "turns"): ((399.2, 113.0, 139.9, 124.1, 158.9), (182, 239, 190, 251, 223)),
    ("recompute", "sru", "column", "alone"): ((393.5, 124.1, 150.8, 136.2, 168.0), (212, 204, 158, 206, 167)),
    ("recompute", "sru", "column", "split"): ((419.2, 159.2, 183.5, 169.2, 212.6), (210, 254, 179, 255, 166)),
    ("recompute", "sru", "step", "turns"): ((412.0, 142.5, 173.0, 155.8, 216.0), (202, 185, 168, 206, 178)),
    ("recompute", "sru", "step", "alone"): ((398.0, 122.6, 156.5, 138.1, 186.2), (231, 224, 180, 220, 202)),
    ("recompute", "sru", "step", "split"): ((429.5, 144.6, 185.0, 165.0, 231.2), (234, 255, 178, 255, 168)),
    ("recompute", "f", "none", "turns"): ((533.2, 103.4, 117.8, 110.8, 133.2), (182, 182, 168, 195, 144)),
    ("recompute", "f", "none", "alone"): ((511.0, 102.4, 121.2, 112.1, 141.2), (186, 168, 150, 159, 118)),
    ("recompute", "f", "none", "split"): ((560.1, 118.6, 144.9, 123.8, 160.2), (180, 217, 165, 218, 161)),
    ("recompute", "fo", "none", "turns"): ((625.5, 124.6, 135.5, 134.5, 156.4), (200, 218, 162, 229, 168)),
    ("recompute", "fo", "none", "alone"): ((604.8, 121.0, 141.8, 131.4, 164.2), (198, 162, 133, 160, 128)),
    ("recompute", "fo", "none", "split"): ((650.2, 140.9, 166.9, 149.7, 191.1), (190, 250, 173, 252, 171)),
    ("recompute", "ifo", "none", "turns"): ((783.5, 139.8, 148.1, 149.6, 168.6), (204, 242, 184, 245, 168)),
    ("recompute", "ifo", "none", "alone"): ((773.8, 140.2, 149.8, 147.4, 180.0), (206, 168, 154, 168, 128)),
    ("recompute", "ifo", "none", "split"): ((806.9, 159.3, 184.0, 167.3, 204.6), (198, 255, 193, 255, 172)),
    ("recompute", "affine", "column", "turns"): ((126.5, 58.4, 78.6, 66.7, 95.6), (148, 128, 128, 128, 140)),
    ("recompute", "affine", "column", "alone"): ((113.5, 58.9, 104.8, 67.4, 130.2), (128, 120, 110, 116, 108)),
    ("recompute", "affine", "column", "split"): ((94.6, 53.6, 92.2, 61.2, 108.2), (162, 162, 153, 164, 144)),
    ("recompute", "affine", "step", "turns"): ((140.0, 53.8, 93.9, 59.4, 119.0), (166, 164, 158, 150, 128)),
    ("recompute", "affine", "step", "alone"): ((120.2, 69.8, 116.2, 72.1, 151.2), (148, 136, 122, 130, 117)),
    ("recompute", "affine", "step", "split"): ((76.1, 46.6, 80.1, 51.1, 91.9), (170, 174, 160, 174, 156)),
    ("recompute", "complement", "column", "turns"): ((124.5, 59.6, 78.5, 65.8, 95.5), (148, 140, 128, 128, 134)),
    ("recompute", "complement", "column", "alone"): ((113.0, 58.9, 104.8, 67.9, 130.2), (128, 120, 110, 116, 108)),
    ("recompute", "complement", "column", "split"): ((95.4, 54.2, 95.8, 61.8, 109.2), (162, 164, 151, 166, 145)),
    ("recompute", "complement", "step", "turns"): ((142.2, 56.9, 95.8, 61.4, 121.0), (166, 164, 158, 150, 128)),
    ("recompute", "complement", "step", "alone"): ((119.8, 70.8, 117.2, 76.4, 152.0), (148, 136, 122, 130, 120)),
    ("recompute", "complement", "step", "split"): ((82.0, 49.0, 80.0, 52.9, 104.6), (172, 174, 158, 174, 156)),
    ("recompute", "blend", "column", "turns"): ((127.2, 53.4, 84.8, 58.1, 100.8), (148, 150, 128, 154, 140)),
    ("recompute", "blend", "column", "alone"): ((112.5, 64.8, 113.5, 73.1, 137.2), (128, 124, 116, 114, 112)),
    ("recompute", "blend", "column", "split"): ((103.5, 62.2, 100.0, 66.1, 115.5), (166, 166, 149, 166, 144)),
    ("recompute", "blend", "step", "turns"): ((145.2, 57.2, 100.2, 64.4, 124.8), (168, 168, 154, 160, 146)),
    ("recompute", "blend", "step", "alone"): ((125.2, 69.9, 125.5, 84.2, 156.0), (152, 138, 126, 123, 124)),
    ("recompute", "blend", "step", "split"): ((82.9, 52.4, 82.5, 57.5, 99.6), (169, 180, 159, 178, 154)),
}

# Special functions a step of a column: forward, backward, recompute.
SPECIAL = {"sru": (4, 4, 6), "f": (4, 4, 8), "fo": (6, 6, 10), "ifo": (8, 8, 14)}

# The forward's are fitted (benchmarks/test_plan.py); the backward's are those fitted before the parameter sums were grouped,
# times 0.80 to 0.88, which a simulation of the machine code says that this gained; and the recomputing ones times 0.82 and 0.99,
# for what it says of states that are prepared before their turn.
CHAINS = {
    ("forward", "none"): 13, ("forward", "column"): 71,
    ("backward", "none"): 97, ("backward", "column"): 110,
    ("recompute", "none"): 183, ("recompute", "column"): 253,
}  # fmt: skip
CALLS = 150  # instructions a step of float64's exponentials and divisions, calls that are not counted. Fitted to one row


MENDING = 1.15  # of mend's chain to that of a walk by turns: 82 to 88 cycles a step to 75, by a simulation of the machine code
# Cycles a step that the states' turns take in the recomputing backward, and the turns of two parameter sums: parts of CHAINS, by
# a simulation of the machine code (docs/performance.md, "What limits S = 32"); that of SRU without weights is CHAINS' difference.
STATES = {"none": 52, "column": 92}
SPLIT_STATES = {"none": 27, "column": 81}  # where time is split: turns of 215 and 648 cycles, of 8 steps, likewise
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
        return step if which == "forward" else SPLIT_STATES[kind] * of.recompute
    if which == "forward":
        return CHAINS[which, kind] * (MENDING if of.mend else 1)
    return CHAINS[which, kind] - (SUMS - sums) - (STATES[kind] - states if of.recompute else 0)
