"""The quick way of a call, and what is kept for it: never anything else than the careful way, whatever came before."""

from __future__ import annotations

import contextlib
import enum
import gc
import itertools
import os
import threading
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import strategies
from conftest import Backend, missing

import cusru
from benchmarks.cases import Case
from benchmarks.plan import problem as problem_of
from cusru import call, plan, raw_kernels
from cusru.arguments import BACKWARD, FORWARD, STRAIGHT
from cusru.plan import Layout, Problem
from cusru.specialisation import ACTIVATIONS, CANDIDATES, SKIPS, TYPES, Limits

L, B, D = 5, 3, 8
RNG = np.random.default_rng(5)
pytestmark = pytest.mark.filterwarnings("error")


def normal(*shape: int, dtype: str = "f4") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def inputs(**changes: Any) -> dict[str, Any]:
    return dict(u=normal(L, B, D, 3), x=normal(L, B, D), bias=normal(2, D), weight_c=normal(2, D), c0=normal(B, D)) | changes


def same(found: Any, expected: Any) -> bool:
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call from here on, whether it went the quick way."""
    went: list[bool] = []
    look = call.look

    def watched(*args: Any, **keywords: Any) -> Any:
        found = look(*args, **keywords)
        went.append(found is not None)
        return found

    monkeypatch.setattr(call, "look", watched)
    return went


def carefully(monkeypatch: pytest.MonkeyPatch, run: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(call, "look", lambda *_, **__: None)
        return run()


# ---- one way and the other --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numpy", "simulator"])
@pytest.mark.parametrize("row", [row for row in strategies.COVERING if row[0] in strategies.DTYPES], ids="-".join)
def test_both_ways_give_the_same_bits_in_every_layout(
    name: str, row: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, quick: list[bool]
) -> None:
    """One signature after another of the same shapes: what is kept of one is not taken for the next."""
    if reason := missing(name):
        pytest.skip(reason)
    backend = Backend(name, 0)
    problem = strategies.typical(row, save_every=5)
    layouts = ("compact", "off_by_one", "planar", "pitched", "pitched_by_one", "batch_first", "backward", "compact")
    for layout in layouts if name == "simulator" else layouts[:4]:
        laid_out = problem.map_arrays(lambda _, a, layout=layout: strategies.arranged(a, layout))
        expected = carefully(monkeypatch, lambda laid_out=laid_out: backend.both(laid_out))
        quick.clear()
        output, gradients = backend.both(laid_out)
        assert quick == [True, True]
        assert same(output, expected[0])
        assert same(gradients, expected[1])
        out = [None if a is None else strategies.scratch(a.shape, a.dtype, layout) for a in expected[1]]
        assert same(backend.backward(laid_out, output.c, out=out), expected[1])


def test_a_misaligned_array_of_a_known_shape_is_no_aligned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are chosen by the address, which is not the shape's nor the strides'."""
    if reason := missing("simulator"):
        pytest.skip(reason)
    backend, seen = Backend("simulator", 0), []
    run = raw_kernels.run
    monkeypatch.setattr(
        raw_kernels, "run", lambda launches, *rest: seen.append(launches[0].kernel.columns) or run(launches, *rest)
    )
    for offset in (0, 1, 0, 2, 3, 4, 0):
        memory = np.empty(L * B * D * 3 + 32, "f4")
        start = -memory.ctypes.data % 16 // 4 + offset
        u = memory[start : start + L * B * D * 3].reshape(L, B, D, 3)
        u[...] = 1
        with backend.selected():
            cusru.sru_forward(u)
    assert seen == [2, 1, 2, 2, 1, 2, 2]


class Liar(str):
    """Equal to every string, and of the same hash."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class Every(enum.IntEnum):
    TWO = 2


def test_what_is_equal_is_not_the_same(quick: list[bool]) -> None:
    given = inputs()
    kept = cusru.sru_forward(**given, save_every=1, bidirectional=False)
    with pytest.raises(TypeError, match="save_every must be an integer"):
        cusru.sru_forward(**given, save_every=True)
    with pytest.raises(TypeError, match="save_every must be an integer"):
        cusru.sru_forward(**given, save_every=1.0)
    with pytest.raises(TypeError, match="bidirectional must be a bool"):
        cusru.sru_forward(**given, bidirectional=0.0)
    for equal in (0, np.False_, np.int64(0)):
        assert same(cusru.sru_forward(**given, bidirectional=equal), kept)
    two = cusru.sru_forward(**given, save_every=2)
    assert all(same(cusru.sru_forward(**given, save_every=every), two) for every in (np.int32(2), Every.TWO))
    names = ("identity", "tanh", "relu", "selu")
    each = {name: cusru.sru_forward(**given, activation=name) for name in names}
    call.prepare.cache_clear()
    for name in names:  # now the liars come first
        assert same(cusru.sru_forward(**given, activation=Liar(name)), each[name])
    assert all(same(cusru.sru_forward(**given, activation="".join(list(name))), each[name]) for name in names)
    assert quick[-4:] == [True] * 4
    with pytest.raises(ValueError, match="activation must be one of"):
        cusru.sru_forward(**given, activation=Liar("sin"))


def test_a_scale_of_minus_zero_or_of_nothing_is_its_own() -> None:
    given = inputs(x=np.ones((L, B, D), "f4"), u=np.full((L, B, D, 3), -200, "f4"), bias=None, weight_c=None, c0=None)
    signs = [np.signbit(cusru.sru_forward(**given, scale_x=scale).h).all() for scale in (0.0, -0.0, 0.0, -0.0)]
    zeros = [cusru.sru_forward(**given, scale_x=scale).h for scale in (0.0, -0.0)]
    assert all((h == 0).all() for h in zeros)
    assert signs == [False, True, False, True]
    assert np.isnan(cusru.sru_forward(**given, scale_x=float("nan")).h).all()
    assert (cusru.sru_forward(**given, scale_x=3).h == 3).all()
    with pytest.raises(TypeError, match="scale_x must be an array"):
        cusru.sru_forward(**given, scale_x=True)
    with pytest.raises(ValueError, match="too large"):
        cusru.sru_forward(**given, scale_x=10**400)


class Subclass(np.ndarray):
    pass


def test_a_subclass_of_a_known_array_is_looked_at_with_care(quick: list[bool]) -> None:
    given = inputs()
    expected = cusru.sru_forward(**given)
    assert same(cusru.sru_forward(**given | {"x": given["x"].view(Subclass)}), expected)
    with pytest.raises(TypeError, match="x is a masked array"):
        cusru.sru_forward(**given | {"x": np.ma.masked_array(given["x"])})
    assert quick == [True, False, False]


def test_another_byte_order_or_dtype_of_a_known_shape_is_refused() -> None:
    given = inputs()
    cusru.sru_forward(**given)
    for dtype in (">f4", "i4", "f8"):
        with pytest.raises(TypeError, match="x has dtype"):
            cusru.sru_forward(**given | {"x": given["x"].astype(dtype)})


# ---- what belongs to the arrays is looked at in every call ------------------------------------------------------------


def test_overlap_and_leave_to_write_are_looked_at_in_every_call(quick: list[bool]) -> None:
    given, memory = inputs(), np.zeros(4 * L * B * D, "f4")
    apart, over = memory[: L * B * D].reshape(L, B, D), memory[-L * B * D :].reshape(L, B, D)
    given["x"] = memory[-L * B * D - 1 : -1].reshape(L, B, D)
    cusru.sru_forward(**given, out=(apart, None, None))
    assert quick == [True]
    with pytest.raises(ValueError, match=r"out\.h overlaps x"):
        cusru.sru_forward(**given, out=(over, None, None))
    apart.flags.writeable = False
    before = apart.copy()
    with pytest.raises(ValueError, match=r"out\.h is read-only"):
        cusru.sru_forward(**given, out=(apart, None, None))
    assert (apart == before).all()
    apart.flags.writeable = True
    cusru.sru_forward(**given, out=(apart, None, None))
    assert quick[-1]


def test_interleaved_arrays_are_no_overlap() -> None:
    both = np.zeros((L, B, 2 * D), "f4")
    given = inputs(x=both[..., D:])
    h = both[..., :D]
    expected = cusru.sru_forward(**given | {"x": given["x"].copy()})
    assert cusru.sru_forward(**given, out=(h, None, None)).h is h
    assert h.tobytes() == expected.h.tobytes()


def test_a_workspace_too_small_is_refused_when_its_signature_is_known() -> None:
    given = inputs(u=normal(40, B, D, 3), x=normal(40, B, D))
    o = cusru.sru_forward(**given)
    needed = cusru.workspace_size("backward", **given)
    assert needed
    for size in (needed, needed - 1, needed):
        refused = pytest.raises(ValueError, match="workspace has shape")
        with refused if size < needed else contextlib.nullcontext():
            cusru.sru_backward(o.h, None, o.c, **given, workspace=np.zeros(size, "u1"))


def test_what_cusru_simulate_says_is_asked_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    given, used = inputs(), []
    monkeypatch.setattr(raw_kernels, "run", lambda *_: used.append("simulator"))
    monkeypatch.setattr(call, "_run_numpy", lambda *_: used.append("NumPy"))
    for value in ("1", "0", "1", ""):
        monkeypatch.setenv("CUSRU_SIMULATE", value)
        cusru.sru_forward(**given)
    assert used == ["simulator", "NumPy", "simulator", "NumPy"]
    monkeypatch.setenv("CUSRU_SIMULATE", "maybe")
    with pytest.raises(ValueError, match="CUSRU_SIMULATE is 'maybe'"):
        cusru.sru_forward(**given)


# ---- what is kept -----------------------------------------------------------------------------------------------------


def test_no_array_is_kept_alive() -> None:
    given = inputs()
    out = cusru.Output(normal(L, B, D), normal(L, B, D), normal(B, D))
    cusru.sru_forward(**given, out=out)
    gone = [weakref.ref(a) for a in (*given.values(), *out)]
    del given, out
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_only_so_many_signatures_are_kept() -> None:
    call.prepare.cache_clear()
    for length in range(call.KEPT + 50):
        cusru.sru_forward(np.zeros((length, 1, 1, 3), "f4"))
    assert call.prepare.cache_info().currsize == call.KEPT


def test_a_call_of_a_known_signature_works_nothing_out(monkeypatch: pytest.MonkeyPatch, quick: list[bool]) -> None:
    given = inputs()
    expected = cusru.sru_forward(**given)
    for name in ("check", "plan"):
        monkeypatch.setattr(call, name, lambda *_: pytest.fail("worked out again"))
    assert same(cusru.sru_forward(**given), expected)
    assert quick == [True, True]


def test_signatures_of_many_threads_at_once() -> None:
    problems = [inputs(u=normal(n, B, D, 3), x=normal(n, B, D)) for n in range(1, 25)]
    expected = [cusru.sru_forward(**given) for given in problems]
    call.prepare.cache_clear()
    wrong: list[int] = []

    def work(shift: int) -> None:
        for i in range(len(problems)):
            n = (i * 7 + shift) % len(problems)
            if not same(cusru.sru_forward(**problems[n]), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_is_kept_serves_a_forked_child() -> None:
    given = inputs()
    expected = cusru.sru_forward(**given)
    with warnings.catch_warnings():  # of Python's, or of JAX's where a test before has loaded it
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        fits = False  # whatever goes wrong, the child must not run the other tests
        try:
            shorter = {n: a[:2] if n in ("u", "x") else a for n, a in given.items()}  # and one that is new to the child
            fits = same(cusru.sru_forward(**given), expected) and (cusru.sru_forward(**shorter).h == expected.h[:2]).all()
        finally:
            os._exit(0 if fits else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- the plan, without any array --------------------------------------------------------------------------------------


def described(
    direction: str, length: int = 64, batch: int = 8, width: int = 256, offset: int = 0, pitch: int = 0, save_every: int = 1
) -> Problem:
    choices = {"activation": "identity", "candidate": "identity", "mask_target": "state"}
    operator = FORWARD if direction == "forward" else BACKWARD
    problem = Problem(operator, length, batch, width, 3, "float32", "float32", choices, False, save_every)

    def rows(*shape: int) -> Layout:
        strides, step = [], 1
        for axis in reversed(range(len(shape))):
            strides.insert(0, step)
            step *= shape[axis] + (pitch if axis == len(shape) - 1 else 0)
        return Layout(shape, tuple(strides), "float32", offset)

    plane, states = (length, batch, width), (-(-length // save_every), batch, width)
    problem.inputs |= {"u": rows(*plane, 3), "x": rows(*plane), "bias": rows(2, width), "c0": rows(batch, width)}
    if direction == "forward":
        problem.results |= {"h": rows(*plane), "c": rows(*states), "c_last": rows(batch, width)}
    else:
        problem.inputs |= {"grad_h": rows(*plane), "c": rows(*states)}
        problem.results |= {f"grad_{name}": problem.inputs[name] for name in ("u", "x", "bias", "c0")}
    return problem


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("save_every", [1, 7, 32, 50])
def test_which_sums_are_formed_depends_on_no_layout_and_the_workspace_on_no_device(direction: str, save_every: int) -> None:
    plans = [
        plan.plan(described(direction, offset=offset, pitch=pitch, save_every=save_every), Limits(multiprocessors))
        for multiprocessors in (0, 8, 132)
        for offset in (0, 4, 8)
        for pitch in (0, 1, 16)
    ]
    assert len({(p.group, p.rows, p.sums, p.partial_bytes, p.checkpoint_bytes, p.workspace) for p in plans}) == 1
    assert {p.kernel.columns for p in plans} == {1, 2}
    for of_device in (plans[:9], plans[9:18], plans[18:]):  # who adds up which steps
        assert len({(p.kernel.tile, p.kernel.alone, p.launches[0].block) for p in of_device}) == 1


def test_two_columns_a_thread_ask_for_alignment_and_rows_without_gaps() -> None:
    def columns(multiprocessors: int = 0, **layout: int) -> int:
        return plan.plan(described("forward", **layout), Limits(multiprocessors)).kernel.columns

    assert columns() == columns(multiprocessors=132) == columns(offset=8) == 2
    assert columns(offset=4) == 1
    assert columns(width=255) == 1
    assert columns(pitch=1) == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_block_has_as_many_warps_as_its_device_leaves_room_for_and_its_time_has_turns(direction: str) -> None:
    def warps(length: int, batch: int, width: int, save_every: int = 1, multiprocessors: int = 132) -> int:
        problem = described(direction, length, batch, width, save_every=save_every)
        chosen = plan.plan(problem, Limits(multiprocessors, split=()))  # by turns
        assert chosen.kernel.alone == (chosen.launches[0].block == (32,))
        assert chosen.launches[0].shared == chosen.kernel.shared(chosen.launches[0].block[0] // 32)
        return chosen.launches[0].block[0] // 32

    assert warps(512, 1, 64) == 7  # few columns: as many as there may be
    assert warps(512, 32, 512) == 4
    assert warps(512, 32, 1024) == 2
    assert warps(64, 4096, 64) == 1  # more columns than the device has places for
    assert warps(1, 8, 512) == 1  # one turn
    assert warps(16, 1, 64) == (2 if direction == "forward" else 4)
    assert warps(512, 32, 512, multiprocessors=264) == 7
    for shared in (64 << 10, 99 << 10, 227 << 10):  # sm_75, sm_86, sm_90: no more than a block of theirs may have
        for weight in ((2, 64), (512, 4, 64, 2)):
            problem = described(direction, 512, 4, 64, save_every=32)
            problem.inputs["weight_c"] = plan.Layout(weight, (64, 1) if len(weight) == 2 else (512, 128, 2, 1), "float32")
            assert plan.plan(problem, Limits(132, shared)).launches[0].shared <= shared
    if direction == "backward":  # a saved block is a turn of four warps, or of one
        assert warps(512, 1, 64, save_every=32) == warps(512, 32, 1024, save_every=32) == 4
        assert warps(64, 4096, 64, save_every=32) == 1
        assert warps(512, 1, 64, save_every=8) == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_blocks_of_several_warps_have_room_together(direction: str) -> None:
    """All that a multiprocessor gets, so that one wave is enough, also where blocks and multiprocessors do not divide."""
    seen = set()
    for batch in range(1, 80):
        main, *_ = plan.plan(described(direction, 512, batch, 512), Limits(132)).launches
        warps, blocks = main.block[0] // 32, -(-main.grid[0] // 132)
        assert warps == 1 or warps * blocks <= plan.RESIDENT, batch
        seen.add(warps)
    assert {1, 2, 4, 7} <= seen


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("far", ["u", "x", "mask_pad", "h", "grad_h"])
def test_whole_tiles_go_straight_unless_a_step_is_2_GiB(direction: str, far: str) -> None:
    """For then the offsets within a tile are 32 bits. With padding, too."""
    problem = described(direction)
    problem.inputs["mask_pad"] = Layout((64, 8), (8, 1), "bool")
    assert plan.plan(problem, Limits(132)).frame[-1] & STRAIGHT
    where = problem.inputs if far in problem.inputs else problem.results
    if far not in where:
        pytest.skip(f"{far} is the other pass's")
    layout = where[far]
    for step, straight in (((1 << 31) // layout.itemsize, False), ((1 << 30) // layout.itemsize, True)):
        where[far] = layout._replace(strides=(-step, *layout.strides[1:]))
        assert bool(plan.plan(problem, Limits(132)).frame[-1] & STRAIGHT) == straight


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shared", [64 << 10, 99 << 10, 227 << 10], ids=["sm_75", "sm_86", "sm_90"])
def test_a_block_of_any_kernel_fits_in_shared_memory_and_has_one_column_where_two_do_not(direction: str, shared: int) -> None:
    """Over every option that a kernel is compiled for."""
    seen = set()
    for skip, activation, candidate, weight, dtype, save_every, (batch, width) in itertools.product(
        SKIPS, ACTIVATIONS, CANDIDATES, ("none", "column", "step"), TYPES, (1, 32), ((4, 64), (32, 512), (1024, 64))
    ):
        case = Case("", 64, batch, width, skip, weight, activation, candidate, save_every=save_every)
        chosen = plan.plan(problem_of(case, direction, dtype), Limits(132, shared))
        kernel, (main, *_) = chosen.kernel, chosen.launches
        warps = main.block[0] // 32
        assert main.shared == kernel.shared(warps)
        assert main.shared <= shared, kernel
        assert kernel.alone == (warps == 1)
        assert warps <= kernel.warps
        if kernel.columns == 1 and dtype != "float64":
            two = kernel._replace(columns=2, alone=not kernel.recompute)
            assert two.shared(two.warps) > shared, kernel
        seen.add((kernel.direction, kernel.recompute, kernel.columns, kernel.alone))
    assert {columns for _, _, columns, _ in seen} == {1, 2}, "float64 has one"


@pytest.mark.parametrize("operator", [FORWARD, BACKWARD], ids=lambda operator: operator.direction)
def test_a_gradient_nobody_wants_is_neither_summed_nor_stored(operator: Any) -> None:
    whole = plan.plan(described(operator.direction), Limits(0))
    problem = described(operator.direction)
    for name in list(problem.results)[1:]:
        del problem.results[name]
    part = plan.plan(problem, Limits(0))
    assert part.sums == 0
    assert part.workspace == 0
    assert len(part.launches) == 1 <= len(whole.launches)


# ---- what an adversary found ------------------------------------------------------------------------------------------


def test_an_empty_array_may_begin_anywhere() -> None:
    memory = np.zeros(64, np.uint8)
    u, h = (np.ndarray(shape, "f4", memory, 1) for shape in ((0, 2, 4, 3), (0, 2, 4)))
    assert u.ctypes.data % 4
    assert cusru.sru_forward(u, out=(h, None, None)).h is h


class Shifted(tuple):
    """As long as it says, but for whoever walks it."""

    def __iter__(self) -> Any:
        return iter((*tuple.__iter__(self), None))


def test_out_that_says_one_length_and_has_another_is_refused() -> None:
    given = inputs()
    with pytest.raises(ValueError, match="longer"):
        cusru.sru_forward(**given, out=Shifted((None, None, None)))
