"""The forward of SRU v2 in parallel: whatever the numbers, the bits are those of a walk by turns; and what is right is not walked
again.

Laws and drawn problems run on it too: the backend "split" of test_laws.py guesses where a forward is not affine."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import BACKENDS, missing

import cusru
from cusru import raw_kernels, simulator
from cusru.specialisation import Specialisation

LENGTH, WIDTH = 520, 40
#: Least tiles of a span: a slice is a tile, and each warp has one; four tiles, or eight, and a warp has several
TILES = 2, 8, 16


@pytest.fixture
def split():
    if reason := missing("simulator"):
        pytest.skip(reason)
    return BACKENDS["split"]


def arguments(bias=0.0, large=1.0, seed=0, **changes):
    rng = np.random.default_rng(seed)
    given = dict(
        u=rng.standard_normal((LENGTH, 1, WIDTH, 3), dtype="f4"), x=rng.standard_normal((LENGTH, 1, WIDTH), dtype="f4"),
        bias=np.float32([[bias], [0]]) * np.ones((2, WIDTH), "f4"), c0=rng.standard_normal((1, WIDTH), dtype="f4"),
        weight_c=large * rng.uniform(-1.2, 1.2, (2, WIDTH)).astype("f4"), save_every=8, bidirectional=True,
    )  # fmt: skip
    return given | changes


def spoiled(value):
    u = arguments()["u"]
    u[141, 0, 3, 0] = u[350, 0, 30, 1] = value
    return u


INPUTS = {
    "states that merge soon": arguments(),
    "later than a span": arguments(bias=3),
    "never": arguments(bias=12),
    "apart in some spans only": arguments(bias=1, u=arguments()["u"] * np.where(np.arange(LENGTH) // 70 % 2, 8, 0.1)[:, None, None, None].astype("f4")),  # noqa: E501
    "large weights": arguments(large=64),
    "constant inputs": arguments(bias=6, u=np.ones((LENGTH, 1, WIDTH, 3), "f4")),
    "NaN": arguments(u=spoiled(np.nan)),
    "infinity": arguments(u=spoiled(np.inf)),
    "a NaN to begin with": arguments(c0=np.full((1, WIDTH), np.nan, "f4")),
    "-0": arguments(u=np.full((LENGTH, 1, WIDTH, 3), -0.0, "f4"), c0=np.full((1, WIDTH), -0.0, "f4")),
    "0 and -0": arguments(u=np.where(np.arange(3) == 0, -0.0, -200.0).astype("f4") * np.ones((LENGTH, 1, WIDTH, 1), "f4")),
    "padding and starts": arguments(
        bias=3, mask_pad=np.arange(LENGTH)[:, None] % 7 == 3, starts=np.arange(LENGTH)[:, None] % 61 == 5
    ),
    "all padding": arguments(mask_pad=np.ones((LENGTH, 1), bool)),
    "weights of each step": arguments(
        bias=2, weight_c=np.random.default_rng(1).standard_normal((LENGTH, 1, WIDTH, 2), dtype="f4")
    ),
    "one saved state": arguments(bias=3, save_every=LENGTH),
    "reversed, a saved block cut short": arguments(bias=3, save_every=49, reverse=True),
}  # fmt: skip


def forward(backend, given, **changes):
    with backend.selected():
        return cusru.sru_forward(**given, **changes)


def in_garbage(backend, given):
    """The workspace holds neither zeros nor what a call before has left there."""
    with backend.selected():
        return forward(backend, given, workspace=np.full(cusru.workspace_size("forward", **given), 0xFF, np.uint8))


def same_bits(one, other):
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True) if a is not None or b is not None)


def of_tiles(backend, tiles):
    return dataclasses.replace(backend, split=(tiles, 2))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", INPUTS)
def test_the_bits_are_those_of_a_walk_by_turns(split, name, tiles):
    assert same_bits(in_garbage(of_tiles(split, tiles), INPUTS[name]), forward(split.by_turns(), INPUTS[name]))


def test_a_workspace_may_be_used_again(split):
    given = INPUTS["later than a span"]
    with split.selected():
        workspace = np.empty(cusru.workspace_size("forward", **given), np.uint8)
    first = forward(split, given, workspace=workspace)
    assert same_bits(first, forward(split, given, workspace=workspace))


def test_no_span_is_walked_further_than_to_where_states_merge(split):
    """By what is written: once by turns; where states never merge once more when mended, and again in order; where they merge at
    once, as far as the first slice. And words: a state for each slice, ends."""

    def written(backend, given):
        with simulator.report() as report:
            forward(backend, given)
        return report.bytes_written

    turns = written(split.by_turns(), INPUTS["never"])
    forgotten = arguments(u=arguments()["u"] - np.float32([0, 200, 0]))  # forget gates of 0
    for tiles, span, of_slice in ((2, 24, 8), (8, 96, 32), (16, 192, 64)):  # steps
        begins = range(span, LENGTH, span)
        for given, again in (
            (INPUTS["never"], LENGTH - span + LENGTH - 2 * span),
            (forgotten, sum(min(of_slice, LENGTH - begin) for begin in begins)),
        ):
            much = written(of_tiles(split, tiles), given) / turns
            assert 1 + again / LENGTH <= much < 1.2 * (1 + again / LENGTH), (tiles, much)


# ---- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {  # the line, and the line broken
    "numbers compared, not bits": ("differ |= !same_bits(a[i], b[i]);", "differ |= a[i] < b[i] || a[i] > b[i];"),
    "one column's states for all": ("differ && lane.active", "differ && threadIdx.x % 32 == 0"),
    "a span that begins where it was guessed to": ("walk(which, now);", "walk(which, was);"),
    "no look at all spans in order": ("if (notes[1] + 2 < args.spans) break;", "break;"),
    "not the last block's, but any": ("if (notes[1] + 2 < args.spans) break;", "if (notes[1]) break;"),
    "in order, from ends that were guessed": ("in_order ? MENDED : GUESSED", "GUESSED"),
    "an end that is lost where states merge": (", put(end_of(MENDED, which), was);", ";"),
    "a warp that does not hear": ("turns < thread.warps && turns", "turns + 1 < thread.warps && turns"),
    "more called than wait": ("turns < thread.warps && turns * T < rest", "turns * T < rest"),
    "saved states left behind": ("saver.move(turn), first += turn, tile", "first += turn, tile"),
    "a counter left as it was": ("workspace_store<4>(counter(), &none);", ""),
    "a saved block shifted": ("saver.to(thread, p, lane.reversed ? args.lead : 0);\n        this->load(until - p);", "saver.to(thread, p, 0);\n        this->load(until - p);"),  # noqa: E501
}  # fmt: skip


def look_for_faults(backend):
    for tiles in TILES[:2]:
        for given in INPUTS.values():
            assert same_bits(in_garbage(of_tiles(backend, tiles), given), forward(backend.by_turns(), given))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(split, fault, monkeypatch):
    line, broken = FAULTS[fault]
    original = raw_kernels.source()
    assert line in original, "the line to break is gone"
    monkeypatch.setattr(raw_kernels, "source", lambda: original.replace(line, broken))
    with pytest.raises((AssertionError, RuntimeError)):  # the latter: a warp waits for one that has left
        look_for_faults(split.planned_for(132))


def test_blocks_count_themselves_with_acquire_and_release():
    nvrtc = pytest.importorskip("cupy", reason='needs CuPy and NVRTC: pip install "cusru[cuda13]"').cuda.nvrtc
    kernel = Specialisation("forward", "float32", skip="x", weight="column", columns=2, packed=True, split=2, mend=True)
    program = nvrtc.createProgram(raw_kernels.source(), "kernel.cu", [], [])
    nvrtc.compileProgram(program, (*raw_kernels.options(kernel), "--gpu-architecture=compute_90"))
    ptx = nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    (at,) = (m.start() for m in re.finditer(r"atom\.add\.acq_rel\.gpu\.global\.u32", ptx))
    block = ptx[: ptx.rindex(":", 0, at)].rsplit("\n", 1)[1]  # whose beginning the compiler may have moved away: who comes here?
    arrivals = [m.start() for m in re.finditer(rf"bra(\.uni)?\s+{re.escape(block)};", ptx)]
    assert arrivals
    for come in arrivals:  # after a barrier of all that have written,
        assert re.findall(r"st\.global|ld\.global|bar\.sync", ptx[:come])[-1] == "bar.sync"
    assert re.search(r"bar\.sync", ptx[at : at + re.search(r"ld\.global", ptx[at:]).start()])  # and read after one
