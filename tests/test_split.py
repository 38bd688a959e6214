"""Time in parallel: which path a shape takes, what blocks tell one another, and that a fault in it does not go unseen.

That its results are right is what every law of test_laws.py says of the backend "split", which takes this path on any shape."""

import re

import numpy as np
import pytest
from conftest import BACKENDS, missing
from strategies import typical

import cusru
from cusru import plan, raw_kernels, simulator
from cusru.specialisation import Specialisation

ROWS = (
    ("float32", "x", "identity", "identity", "none", "wide_packed", "saved"),
    ("float32", "x", "identity", "identity", "none", "wide_packed", "recompute"),
    ("linear_recurrence", "float32", "affine", "step", "wide_packed", "recompute", "starts"),
)


@pytest.fixture
def split():
    if reason := missing("simulator"):
        pytest.skip(reason)
    return BACKENDS["split"]


def narrow(row, width):
    """300 steps, of so many columns in two directions: with 10 a warp's lanes have chunks of time, with 40 none."""
    return typical(row, length=300, batch=1, width=width, save_every=8 if "recompute" in row else 1)


@pytest.fixture(params=[(row, width) for row in ROWS for width in (10, 40)], ids=lambda p: f"{'-'.join(p[0])}-{p[1]}")
def problem(request):
    return narrow(*request.param)


def both_bits(results):
    return [a.tobytes() for part in results for a in part if a is not None]


# ---- which path -------------------------------------------------------------------------------------------------------


def planned(monkeypatch, function, *args, **options):
    seen = []
    original = plan.plan
    monkeypatch.setattr("cusru.call.plan", lambda *a: seen.append(original(*a)) or seen[-1])
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    monkeypatch.setattr(raw_kernels, "run", lambda *a: None)
    function(*args, **options)
    return seen[-1]


def test_long_and_narrow_shapes_are_split_and_short_ones_keep_their_one_launch(monkeypatch):
    def launches(length, width, **options):
        chosen = planned(monkeypatch, cusru.sru_forward, np.zeros((length, 1, width, 3), "f4"), **options)
        return [one.kernel.direction for one in chosen.launches], chosen.kernel.split > 0

    assert launches(4096, 64) == (["clear", "forward"], True)
    assert launches(4096, 64, save_every=100) == (["forward"], False)  # no whole number of tiles a block has warps for
    assert launches(64, 64) == (["forward"], False)
    assert launches(600, 4096) == (["forward"], False)
    of_weights = dict(weight_c=np.zeros((2, 64), "f4"))  # not affine: guessed, and mended
    assert launches(4096, 64, **of_weights) == (["forward", "forward"], True)
    assert launches(1024, 64, **of_weights) == (["forward"], False)


def test_the_path_and_the_workspace_do_not_depend_on_the_device(monkeypatch):
    u = np.zeros((2048, 1, 8, 3), "f4")
    for options in ({}, {"weight_c": np.zeros((2, 8), "f4")}):
        found = set()
        for multiprocessors in (0, 1, 16, 132):
            monkeypatch.setattr(simulator, "multiprocessors", multiprocessors)
            chosen = planned(monkeypatch, cusru.sru_forward, u, **options)
            found.add((chosen.split, chosen.workspace, chosen.kernel))
        ((split, workspace, _),) = found
        assert split
        assert cusru.workspace_size("forward", u, **options) == workspace


@pytest.mark.parametrize(("k", "columns"), [(3, 2), (4, 1)])
def test_a_thread_has_two_columns_only_where_two_such_blocks_have_room(monkeypatch, k, columns):
    """In a device's 228 KB, of which the system takes one for each block."""
    length, width = 2048, 128
    u, h, c = np.zeros((length, 1, width, k), "f4"), np.zeros((length, 1, width), "f4"), np.zeros((1, width), "f4")
    options = dict(weight_c=np.zeros((2, width), "f4"), x=h if k == 3 else None)
    (_, main, _) = planned(monkeypatch, cusru.sru_backward, h, None, h, u, c0=c, **options).launches
    assert (main.kernel.split, main.kernel.columns) == (2, columns)
    assert 2 * (main.shared + 1024) <= 228 << 10
    assert columns == 2 or 2 * (main.kernel._replace(columns=2, packed=True).shared(4) + 1024) > 228 << 10


# ---- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "chunks"), [(10, 6), (40, 1)])
def test_the_problems_here_have_chunks_or_not_and_spans_enough_for_an_anchor(split, monkeypatch, width, chunks):
    u = narrow(ROWS[0], width).inputs["u"]
    monkeypatch.setattr(raw_kernels, "split", split.split)
    made = planned(monkeypatch, cusru.sru_forward, u, bidirectional=True).split
    assert made.chunks == chunks
    assert made.spans > made.anchor + 1


@pytest.mark.parametrize("multiprocessors", [0, 1, 132])
def test_no_bit_depends_on_how_many_blocks_there_are_or_who_is_late(split, problem, monkeypatch, multiprocessors):
    wanted = both_bits(split.planned_for(132).both(problem))
    for seed in (1, 2, 3):
        monkeypatch.setattr(simulator, "seed", seed)
        assert both_bits(split.planned_for(multiprocessors).both(problem)) == wanted


def test_a_workspace_may_hold_anything_and_be_used_again(split, problem, monkeypatch):
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    monkeypatch.setattr(raw_kernels, "split", split.split)
    name = f"{problem.family}_forward"
    size = cusru.workspace_size(name.removeprefix("sru_"), **problem.inputs)
    assert size
    wanted = getattr(cusru, name)(**problem.inputs)
    workspace = np.full(size, 0xFF, np.uint8)
    for fill in (None, None, 0, 1):  # as the last call has left it, too
        if fill is not None:
            workspace[:] = fill
        got = getattr(cusru, name)(**problem.inputs, workspace=workspace)
        assert got.h.tobytes() == wanted.h.tobytes()
        assert got.c_last.tobytes() == wanted.c_last.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_walked_and_stays_in_its_column_and_its_future(split, problem, value):
    split = split.planned_for(132)  # several blocks
    clean = split.both(problem)
    first = next(name for name in ("u", "b") if name in problem.inputs)
    spoiled = np.array(problem.inputs[first])
    spoiled[(141, 0, 3, 0)[: spoiled.ndim]] = value
    spoiled = problem.replace(**{first: spoiled})
    output, gradients = split.both(spoiled)
    others = [d for d in range(problem.shape[2]) if d != 3]
    assert output.h[:, :, others].tobytes() == clean[0].h[:, :, others].tobytes()
    for name, a in gradients._asdict().items():
        if a is not None:
            b = getattr(clean[1], name)
            pick = (slice(None), slice(None), others) if a.ndim > 2 else (..., others)
            assert a[pick].tobytes() == b[pick].tobytes(), name
    assert output.h[:141, 0, 3].tobytes() == clean[0].h[:141, 0, 3].tobytes()
    with np.errstate(all="ignore"):
        by_turns = split.by_turns().forward(spoiled)
    np.testing.assert_array_equal(np.isfinite(output.h), np.isfinite(by_turns.h))
    np.testing.assert_array_equal(np.isfinite(output.c), np.isfinite(by_turns.c))


@pytest.mark.parametrize("width", [10, 40])
def test_a_summary_that_overflows_says_nothing_of_a_state_of_0(split, width):
    overflowing(split.planned_for(132), narrow(ROWS[2], width))


# ---- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {  # the line, and the line broken
    "a tile that starts where the one before does": ("value[i] = end_of<V>(one[i], value[i]);", "value[i];"),
    "summaries out of order": ("get(e, one);", "get(stretches - 1 - e, one);"),
    "a span's summary left out": ("since[i].add(one[j][i]);", "if (k + j) since[i].add(one[j][i]);"),
    "a span that starts at the anchor": ("value[i] = end_of<V>(past, begin[i]);", "value[i] = begin[i];"),
    "a saved state that is not the next slice's start": (
        "const S next = exchange.start(thread.warp + 1, i);", "S next = state[T][i];",
    ),
    "an end that is not walked": ("is_lost(one) ? end[i] : end_of<V>(one, start(e, i))", "end_of<V>(one, start(e, i))"),
    "a span that does not tell its walked end": ("tell(END, span, end), told(END", "told(END"),
    "an anchor that the next span's start does not come from": ("anchored ? value[i] : begin[i]", "begin[i]"),
    "a part walked with another's steps": (
        "Waits::get(thread.column, waiting(which), linear);\n            S gc",
        "Waits::get(thread.column, waiting(0), linear);\n            S gc",
    ),
    "steps summed up in the wrong order": (
        "sum[i] = back(straight, one.bits, t, linear[t][i], sum[i], gc);",
        "sum[i] = back(straight, one.bits, T - 1 - t, linear[T - 1 - t][i], sum[i], gc);",
    ),
    "a chunk's parameter sums left out": (
        "chunk < exchange.chunks; ++chunk) all.add", "chunk + 1 < exchange.chunks; ++chunk) all.add",
    ),
    "counters and flags left as they were": ("workspace_store<4>(args.signals + 4 * i, &none);", ""),
}  # fmt: skip


def both_in_garbage(split, problem):
    """Forward and backward, whose workspaces hold neither zeros nor what a call before has left there."""

    def workspace(direction):
        family = "" if problem.family == "sru" else f"{problem.family}_"
        with split.selected():
            return np.full(cusru.workspace_size(f"{family}{direction}", **problem.inputs), 0xFF, np.uint8)

    output = split.forward(problem, workspace=workspace("forward"))
    return output, split.backward(problem, output.c, workspace=workspace("backward"))


def run_all(split, problem):
    """What some test of this file or of test_laws.py looks at: right values, states that the backward finds again, a NaN."""
    output, gradients = both_in_garbage(split, problem)
    problem.check(output, problem.expected_forward())
    problem.check(gradients, problem.expected_backward())
    for j in range(1, len(output.c)):  # forward columns
        every = problem.inputs["save_every"]
        if every > 1:
            steps = slice(j * every, (j + 1) * every)
            part = problem.map_arrays(lambda name, a, steps=steps: np.array(a[steps]) if len(a) == 300 else a)
            walked = split.by_turns().forward(part.replace(c0=output.c[j - 1]), save_every=None)
            last = slice(0, -1) if (j + 1) * every < 300 else slice(None)
            half = problem.shape[2] // 2
            assert walked.h[last, :, :half].tobytes() == output.h[steps][last, :, :half].tobytes()
    first = next(name for name in ("u", "b") if name in problem.inputs)
    spoiled = np.array(problem.inputs[first])
    spoiled[(141, 0, 3, 0)[: spoiled.ndim]] = np.inf
    problem = problem.replace(**{first: spoiled})
    (got, _), by_turns = both_in_garbage(split, problem), split.by_turns().forward(problem)
    np.testing.assert_array_equal(np.isfinite(got.h), np.isfinite(by_turns.h))
    if problem.family != "sru":
        overflowing(split, problem)


def run_both(split):
    for row in ROWS[1:]:
        for width in (10, 40):
            run_all(split.planned_for(132), narrow(row, width))


def overflowing(split, problem):
    """A product of factors that is infinite, of a state that is 0."""
    a, b = np.array(problem.inputs["a"]), np.zeros_like(problem.inputs["b"])
    a[100:103] = 1e30
    b[290:] = 1
    problem = problem.replace(a=a, b=b, c0=np.zeros_like(problem.inputs["c0"]), starts=None, bidirectional=False)
    (got, _), by_turns = both_in_garbage(split, problem), split.by_turns().forward(problem)
    assert got.h.any()
    np.testing.assert_allclose(got.h, by_turns.h, rtol=1e-5)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(split, fault, monkeypatch):
    line, broken = FAULTS[fault]
    original = raw_kernels.source()
    assert line in original, "the line to break is gone"
    monkeypatch.setattr(raw_kernels, "source", lambda: original.replace(line, broken))
    with pytest.raises((AssertionError, RuntimeError)):  # the latter: threads poll flags that nobody changes
        run_both(split)


def test_without_a_fault_nothing_is_found(split):
    run_both(split)


# ---- what crosses blocks, in PTX --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_flags_are_stored_with_release_and_read_with_acquire(direction):
    nvrtc = pytest.importorskip("cupy", reason='needs CuPy and NVRTC: pip install "cusru[cuda13]"').cuda.nvrtc
    kernel = Specialisation(direction, "float32", skip="x", columns=2, packed=True, split=2)
    program = nvrtc.createProgram(raw_kernels.source(), "kernel.cu", [], [])
    nvrtc.compileProgram(program, (*raw_kernels.options(kernel), "--gpu-architecture=compute_90"))
    ptx = nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    assert "ld.acquire.gpu.global.u32" in ptx
    assert re.search(r"atom\.global\.add\.u32", ptx)
    releases, acquires = (
        [m.start() for m in re.finditer(what, ptx)] for what in (r"st\.release\.gpu\.global\.u32", r"ld\.acquire")
    )
    assert len(releases) >= 3  # a summary, a start, an end
    for at in releases:  # after a barrier of the warp that has written the words,
        words = max(m.end() for m in re.finditer(r"st\.global", ptx[:at]))
        assert "bar.warp.sync" in ptx[words:at]
    for at in acquires:  # and read before one, and the words behind that
        words = at + re.search(r"ld\.global", ptx[at:]).start()
        assert "bar.warp.sync" in ptx[at:words]
