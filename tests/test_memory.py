"""The caller owns the memory: what `out` and `workspace` promise, what comes back and where it lies, and huge arrays."""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
from typing import Any

import conftest
import numpy as np
import pytest
import strategies
from conftest import missing

import cusru
from cusru import arguments, call, raw_kernels, reference, simulator, specialisation
from cusru.problem import Options

L, B, D = 70, 3, 8


@pytest.fixture(params=["0", "1"], ids=["numpy", "simulator"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "1" and (reason := missing("simulator")):
        pytest.skip(reason)
    monkeypatch.setenv("CUSRU_SIMULATE", request.param)
    return request.param


def problem(dtype: str = "f4", length: int = L, batch: int = B, width: int = D) -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    return dict(
        u=normal(length, batch, width, 3), x=normal(length, batch, width), bias=normal(2 * width), weight_c=normal(2, width),
        c0=normal(batch, width),
    )  # fmt: skip


def both(arguments: dict[str, Any], save_every: int = 1, **of_backward: Any) -> tuple[Any, Any]:
    o = cusru.sru_forward(**arguments, save_every=save_every)
    return o, cusru.sru_backward(o.h, o.c_last, o.c, **arguments, save_every=save_every, **of_backward)


def same(a: Any, b: Any) -> None:
    for name in a._fields:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.usefixtures("backend")
def test_out_objects_come_back_and_hold_the_results() -> None:
    arguments = problem()
    o, g = both(arguments)
    out = [np.full_like(a, np.nan) for a in o]
    got = cusru.sru_forward(**arguments, out=out)
    assert all(a is b for a, b in zip(got, out, strict=True))
    same(got, o)
    gradients = cusru.Gradients(*(np.full_like(a, np.nan) for a in g))
    got = cusru.sru_backward(o.h, o.c_last, o.c, **arguments, out=gradients)
    assert all(a is b for a, b in zip(got, gradients, strict=True))
    same(got, g)


@pytest.mark.usefixtures("backend")
def test_out_may_have_any_strides() -> None:
    arguments = problem()
    o, g = both(arguments)

    def odd(a: np.ndarray) -> np.ndarray:  # every axis gapped and reversed
        return np.full([2 * n + 1 for n in a.shape], np.nan, a.dtype)[tuple(slice(2 * n, 0, -2) for n in a.shape)]

    same(cusru.sru_forward(**arguments, out=[odd(a) for a in o]), o)
    same(cusru.sru_backward(o.h, o.c_last, o.c, **arguments, out=[odd(a) for a in g]), g)


@pytest.mark.parametrize("save_every", [1, 40, L])
@pytest.mark.usefixtures("backend")
def test_a_workspace_of_any_contents_and_alignment_gives_the_same_bits(save_every: int) -> None:
    arguments = problem()
    _, g = both(arguments, save_every)
    size = cusru.workspace_size("backward", **arguments, save_every=save_every)
    for offset in (0, 1, 7):
        memory = np.full(size + offset + 64, 0xFF, np.uint8)
        _, got = both(arguments, save_every, workspace=memory[offset : offset + size])
        same(got, g)
        assert (memory[:offset] == 0xFF).all()
        assert (memory[offset + size :] == 0xFF).all(), "written past the size that workspace_size gave"


def test_the_workspace_is_at_most_a_twentieth_of_the_floor() -> None:
    """A tenth where time is split, values have 16 bits and saved blocks leave a span fewer than 32 steps."""
    for length, batch, width in [(512, 32, 512), (64, 4096, 64), (1, 4096, 64), (8, 512, 128), (31, 7, 33), (16384, 1, 64)]:
        for dtype, floor in (("f4", 40), ("f2", 18), ("f8", 80)):
            view = np.broadcast_to(np.zeros(1, dtype), (length, batch, width, 3))  # sizes alone matter
            rows = np.zeros((2, width), dtype)
            for save_every in (1, 2, 17, 32, length):
                size = cusru.workspace_size("backward", view, bias=rows, weight_c=rows, save_every=save_every)
                short = dtype == "f2" and save_every in (2, 17) and batch * width <= 1024 and length >= 192
                most = length * batch * width * floor // (10 if short else 20)
                assert size <= max(most, 4 * width * 8 + 32), (length, batch, width, dtype, save_every)
            split = batch * width <= 2560 and length >= 512
            size = cusru.workspace_size("forward", view)  # none but where time is split
            assert size <= (length * batch * width * floor // 40 if split else 0)
            size = cusru.workspace_size("forward", view, weight_c=rows)  # or guessed
            assert size <= (length * batch * width * floor // 100 if split else 0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("save_every", [sys.maxsize, 2**63, 10**30])
def test_any_save_every_from_the_length_on_saves_the_last_state(save_every: int) -> None:
    arguments = problem() | {"bidirectional": True}
    planes = np.full((11, B, D), 7, "f4")
    o = cusru.sru_forward(**arguments, save_every=save_every, out=(None, planes[5:6], None))
    np.testing.assert_array_equal(planes[5], o.c_last)
    assert (np.delete(planes, 5, axis=0) == 7).all(), "written outside c"
    want = both(arguments, L)[1]
    same(cusru.sru_backward(o.h, o.c_last, o.c, **arguments, save_every=save_every), want)


@pytest.mark.usefixtures("backend")
def test_inputs_are_never_written_and_may_be_read_only() -> None:
    arguments = problem()
    before = {name: a.copy() for name, a in arguments.items()}
    for a in arguments.values():
        a.flags.writeable = False
    both(arguments)
    for name, a in arguments.items():
        np.testing.assert_array_equal(a, before[name])


@pytest.mark.usefixtures("backend")
def test_cpu_results_are_compact_and_aligned_for_every_framework() -> None:
    arguments = problem(width=5)
    for results in both(arguments):
        for a in results:
            assert a.flags.c_contiguous
            assert a.ctypes.data % 64 == 0


@pytest.mark.usefixtures("backend")
def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')
    arguments = problem()
    o, g = both(arguments)
    tensors = {name: torch.from_numpy(a) for name, a in arguments.items()}
    for expected, got in zip((*o, *g), (r for results in both(tensors) for r in results), strict=True):
        assert isinstance(got, torch.Tensor)
        np.testing.assert_array_equal(got.numpy(), expected)
    out = [torch.full_like(r, float("nan")) for r in both(tensors)[0]]
    assert cusru.sru_forward(**tensors, out=out).h is out[0]
    np.testing.assert_array_equal(out[0].numpy(), o.h)


@pytest.mark.usefixtures("backend")
def test_jax_in_jax_out() -> None:
    jax = pytest.importorskip("jax", reason='needs JAX: pip install "cusru[jax]"')
    arguments = problem()
    o, g = both(arguments)
    arrays = {name: jax.numpy.asarray(a) for name, a in arguments.items()}
    for expected, got in zip((*o, *g), (r for results in both(arrays) for r in results), strict=True):
        assert isinstance(got, jax.Array)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.usefixtures("backend")
def test_bfloat16_is_the_same_from_every_framework() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes", reason='needs ml_dtypes: pip install "cusru[test]"').bfloat16
    torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')
    jax = pytest.importorskip("jax", reason='needs JAX: pip install "cusru[jax]"')
    arguments = {name: a.astype(bfloat16) for name, a in problem().items()}
    o, g = both(arguments)
    assert o.h.dtype == bfloat16
    assert o.c.dtype == np.float32
    tensors = {name: torch.from_numpy(a.view("i2")).view(torch.bfloat16) for name, a in arguments.items()}
    arrays = {name: jax.numpy.asarray(a) for name, a in arguments.items()}
    for from_torch, from_jax, expected in zip(
        (r for results in both(tensors) for r in results), (r for results in both(arrays) for r in results), (*o, *g), strict=True
    ):
        np.testing.assert_array_equal(from_torch.float().numpy(), expected.astype("f4"))
        np.testing.assert_array_equal(np.asarray(from_jax), expected)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.usefixtures("backend")
def test_more_than_two_to_the_31_elements(dtype: str) -> None:
    """Strides of 2^30 elements and more, over a sparse map: only the touched pages exist."""
    item = np.dtype(dtype).itemsize
    length, batch, width, step = 5, 2, 4, 2**30
    size = (length * step + step // 2 + 4096) * item
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    except OSError as error:
        pytest.skip(f"no {size >> 30} GiB of address space: {error}")
    flat = np.frombuffer(memory, dtype)
    rng = np.random.default_rng(2)

    def far(offset: int, *last: int) -> np.ndarray:
        inner = np.cumprod((1, *last[:0:-1]))[::-1] * item
        return np.lib.stride_tricks.as_strided(flat[offset:], (length, batch, *last), (step * item, step // 2 * item, *inner))

    u, x, h, gu = far(0, width, 3), far(100, width), far(200, width), far(300, width, 3)
    u[...], x[...] = rng.standard_normal(u.shape), rng.standard_normal(x.shape)
    assert (length - 1) * step > 2**31
    near = cusru.sru_forward(u.copy(), x.copy())
    got = cusru.sru_forward(u, x, out=(h, None, None))
    same(got, near)
    expected = cusru.sru_backward(near.h, None, near.c, u.copy(), x.copy())
    same(cusru.sru_backward(h, None, got.c, u, x, out=(gu, None, None, None, None)), expected)


FLAGS = ("BIDIRECTIONAL", "MASK_GATE", "GRAD_U_PACKED", "STRAIGHT", "REVERSE", "GATE_UPDATE", "SUMS_OF_BATCHES")


def test_the_struct_of_arguments_is_the_kernels_own() -> None:
    """The same fields in the same order, all of 8 bytes, and the same numbers for the flags and options."""

    def braces(head: str) -> str:
        text = re.sub(r"//[^\n]*", "", raw_kernels.source())
        return re.search(re.escape(head) + r" \{(.*?)\}", text, re.DOTALL)[1]

    def fields(struct: str) -> list[str]:
        declared = re.findall(r"(?:Array|char\*|long long|double)\s+([\w,\s]+);", braces(f"struct {struct}"))
        return [name.strip() for names in declared for name in names.split(",")]

    assert fields("Args") == list(arguments.ARGS.names)
    assert braces("struct Array").split()[:2] == ["char*", "data;"]
    assert fields("Array")[:5] == list(arguments.ARRAY.names)
    assert all(arguments.ARRAY[name].itemsize == 8 for name in arguments.ARRAY.names)
    assert arguments.ARGS.itemsize <= 4096, "more than a kernel may take by value"

    names, strides = list(arguments.ARRAYS), {"u": ("LBDK", (1, 2, 3, 4), 2), "c0": ("BD", (5, 6), 4)}
    numbers = {n: 50 + i for i, n in enumerate(arguments.ARGS.names[len(names) + 4 : -2])}
    frame = arguments.frame(strides, numbers, 99)
    (filled,) = arguments.fill(frame, range(1000, 1000 + len(names)), (7, 8, 9, 10), 0.5).view(arguments.ARGS)
    assert [int(filled[n]["data"]) for n in names] == list(range(1000, 1000 + len(names)))
    in_bytes = {"u": (2, 4, 6, 8), "c0": (0, 20, 24, 0)}
    assert all(filled[n].tolist()[1:] == in_bytes.get(n, (0, 0, 0, 0)) for n in names)
    assert filled.tolist()[len(names) :] == (7, 8, 9, 10, *numbers.values(), 0.5, 99)

    def enum(name: str) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", braces(f"enum {name}"))}

    flags = {f"NARROW_{n.removesuffix('_c').removesuffix('_x').upper()}": f for n, f in arguments.NARROW.items()}
    flags |= {n: getattr(arguments, n) for n in FLAGS}
    assert enum("Flag") == flags
    assert list(enum("Activation").values()) == list(specialisation.ACTIVATIONS.values())
    assert [n.lower() for n in enum("Activation")] == list(specialisation.ACTIVATIONS)
    assert list(enum("Skip").values()) == list(specialisation.SKIPS.values())
    assert list(enum("Weight").values()) == list(specialisation.WEIGHTS.values())
    assert list(enum("Cell").values()) == list(specialisation.CELLS.values())
    assert [n.lower().removeprefix("pooling_") for n in enum("Cell")] == list(specialisation.CELLS)
    assert list(enum("Marks").values()) == list(specialisation.MARKS.values())


COLD = """
import os, sys, threading
import numpy as np
import cusru
rng = np.random.default_rng(0)
u, v = rng.standard_normal((9, 4, 8, 3)).astype("f4"), rng.standard_normal((2, 8)).astype("f4")
found, barrier = [None] * 8, threading.Barrier(8)
def work(i):
    barrier.wait()
    o = cusru.sru_forward(u, weight_c=v)
    found[i] = np.concatenate([np.ravel(a) for a in (*o, *cusru.sru_backward(o.h, None, o.c, u, weight_c=v)) if a is not None])
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert all((f == found[0]).all() for f in found)
print(found[0].tobytes().hex())
"""


@pytest.mark.skipif(missing("simulator") is not None, reason=str(missing("simulator")))
def test_eight_threads_in_two_processes_on_a_cold_cache(tmp_path: Any) -> None:
    environment = os.environ | {"CUSRU_SIMULATE": "1", "CUSRU_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", COLD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    printed = [p.communicate(timeout=300) for p in running]
    assert [p.returncode for p in running] == [0, 0], printed
    assert printed[0][0] == printed[1][0]
    assert {f.suffix for f in tmp_path.rglob("*")} == {".so", ".cpp"}, "something half-written is left"


FORK = """
import os, threading
import numpy as np
import cusru
from cusru import raw_kernels
rng = np.random.default_rng(0)
u = rng.standard_normal((9, 4, 8, 3)).astype("f4")
expected = cusru.sru_forward(u).h
held, release = threading.Event(), threading.Event()
def hold():
    with raw_kernels._compiling:
        held.set()
        release.wait(60)
holder = threading.Thread(target=hold)
holder.start()
held.wait()
child = os.fork()
if child == 0:
    status = 1
    try:  # the lock that another thread held at the fork is new in the child
        with raw_kernels._compiling:
            o = cusru.sru_forward(u)
            cusru.sru_backward(o.h, None, o.c, u)
            status = int(not np.array_equal(o.h, expected))
    finally:
        os._exit(status)
release.set()
holder.join()
assert np.array_equal(cusru.sru_forward(u).h, expected)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.usefixtures("backend")
def test_a_fork_goes_on_working() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


@pytest.mark.usefixtures("backend")
def test_concurrent_calls_give_what_one_gives() -> None:
    arguments = problem()
    expected = both(arguments)
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            for a, b in zip(both(arguments), expected, strict=True):
                try:
                    same(a, b)
                except AssertionError as error:
                    failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def in_idle_threads(count: int, call: Any, together: bool = False) -> Any:
    """Threads that have called, and now wait; returns what ends them."""
    done, called = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        call()
        called.release()
        done.wait()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for t in threads:
        t.start()
        assert together or called.acquire(timeout=60)
    for _ in threads if together else ():
        assert called.acquire(timeout=60)

    def end() -> None:
        done.set()
        for t in threads:
            t.join()

    return end


def test_what_idle_threads_keep_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSRU_SIMULATE", "0")
    arguments = problem(length=100, batch=32, width=128)
    o = cusru.sru_forward(**arguments, save_every=32)
    run_states, barrier = reference.run_states, threading.Barrier(16)
    monkeypatch.setattr(reference, "run_states", lambda *a: (barrier.wait(60), run_states(*a)))  # each has its memory now
    tracemalloc.start()
    try:
        end = in_idle_threads(16, lambda: cusru.sru_backward(o.h, None, o.c, **arguments, save_every=32), together=True)
        kept, most = tracemalloc.get_traced_memory()
        end()
    finally:
        tracemalloc.stop()
    assert kept <= 1.1 * reference.ALL_KEPT_BYTES < most / 2


@pytest.mark.skipif(missing("simulator") is not None, reason=str(missing("simulator")))
def test_what_idle_threads_of_the_simulator_keep_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have 65,530 mappings of memory. A stack takes two, and a launch up to 2,048 stacks."""
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    arguments = problem(length=1, batch=4, width=128)

    def mappings() -> int:
        with open("/proc/self/maps", "rb") as maps:
            return len(maps.readlines())

    before = mappings()
    end = in_idle_threads(40, lambda: both(arguments))
    kept = mappings() - before
    end()
    assert kept <= 8 * 2 * 2048


def test_a_signal_s_handler_may_call_while_its_thread_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call within a call has scratch memory of its own."""
    monkeypatch.setenv("CUSRU_SIMULATE", "0")
    arguments, inner = problem(), problem(width=2 * D)
    expected, of_inner = both(arguments), both(inner)
    run_states, results = reference.run_states, []

    def interrupted(*a: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)
        run_states(*a)
        signal.raise_signal(signal.SIGUSR1)

    def handler(*_: Any) -> None:
        monkeypatch.setattr(reference, "run_states", run_states)
        results.append(both(inner))
        monkeypatch.setattr(reference, "run_states", interrupted)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        monkeypatch.setattr(reference, "run_states", interrupted)
        got = both(arguments)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(results) == 2
    for found, wanted in ((got, expected), *((r, of_inner) for r in results)):
        for a, b in zip(found, wanted, strict=True):
            same(a, b)


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_what_the_gpu_tests_copy_to_a_device_is_memory_as_it_lies(layout: str) -> None:
    """So that a copy's strides mean there what they mean here, in whatever order its owner keeps its axes."""
    view = strategies.arranged(np.arange(24, dtype="f4").reshape(2, 3, 4), layout)
    for a in (view, np.array(view)):
        owner = strategies.root(a)
        offset, memory = a.ctypes.data - owner.ctypes.data, conftest._memory(owner)
        assert np.array_equal(np.ndarray(a.shape, a.dtype, memory.tobytes(), offset, a.strides), a)


# ---- what is written, and by how many kernels -----------------------------------------------------------------------------

on_the_simulator = pytest.mark.skipif(missing("simulator") is not None, reason=str(missing("simulator")))


def gradients_of(
    wanted: tuple[str, ...], o: cusru.Output, given: dict[str, Any], save_every: int = 1, out: Any = None
) -> cusru.Gradients:
    """sru_backward with these gradients alone, None in place of the others."""
    inputs = [given.get(n) for n in ("u", "x", "bias", "weight_c", "c0", "mask_c", "mask_pad")]
    inputs += [None, None, given.get("scale_x", 1.0), None, o.c, None, o.h, o.c_last]
    unwanted = tuple(name for name in arguments.BACKWARD.results if name.removeprefix("grad_") not in wanted)
    options = Options(("identity", "identity", "state"), False, save_every)
    found = call.look(arguments.BACKWARD, inputs, options, out, unwanted=unwanted)
    assert found is not None
    return cusru.Gradients(*call.start(found))


@on_the_simulator
@pytest.mark.parametrize("multiprocessors", [0, 132], ids=["a warp a block", "turns"])
@pytest.mark.parametrize("save_every", [1, 40])
@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("planar", [False, True], ids=["packed", "planar"])
def test_an_unwanted_gradient_costs_nothing_and_changes_no_other(
    k: int, save_every: int, multiprocessors: int, planar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    monkeypatch.setattr(simulator, "multiprocessors", multiprocessors)
    given, normal = problem(), np.random.default_rng(3).standard_normal
    if k == 4:
        del given["x"]
        given |= {"u": normal((L, B, D, 4)).astype("f4"), "weight_c": normal((L, B, D, 2)).astype("f4")}
    names = tuple(given)
    out = [np.empty((k, L, B, D), "f4").transpose(1, 2, 3, 0) if planar else None, None, None, None, None]
    o, whole = both(given, save_every)
    with simulator.report() as report:
        gradients_of(("u",), o, given, save_every)
    inputs_read = report.bytes_read
    for wanted in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names) + 1)):
        with simulator.report() as report:
            got = gradients_of(wanted, o, given, save_every, out if "u" in wanted else None)
        sums = [n for n in wanted if n == "bias" or (n == "weight_c" and k == 3)]
        partials = len(sums) * B * 2 * D * 4  # written once and read once
        results = sum(getattr(whole, n).nbytes for n in wanted)
        assert report.launches == (2 if sums else 1), wanted
        assert report.workspace_bytes == 2 * partials, wanted
        assert report.bytes_written == results + partials, wanted
        assert report.bytes_read - partials == inputs_read, wanted
        for name, of_all, alone in zip(whole._fields, whole, got, strict=True):
            assert (alone is not None) == (name in wanted), name
            if alone is not None:
                np.testing.assert_array_equal(alone, of_all, err_msg=f"{name} of {wanted}")


def compensated(values: np.ndarray) -> np.ndarray:
    """Kahan's sum over the first axis, in its order."""
    total = lost = np.zeros_like(values[0])
    for v in values:
        y = v - lost
        t = total + y
        total, lost = t, (t - total) - y
    return total


def by_fours(terms: np.ndarray) -> np.ndarray:
    """Sums over the steps of each four, by their time, from the last, in their order. The first axis is time, from the last."""
    length = len(terms)
    fours = [terms[length - min(first + 4, length) : length - first] for first in range(0, length, 4)]
    return np.array([functools.reduce(np.add, four) for four in reversed(fours)], terms.dtype).reshape(-1, *terms.shape[1:])


@on_the_simulator
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (40, 1), (8, 4), (1, 32), (8, 5), (40, 2), (33, 40), (0, 3), (5, 0)])
def test_parameter_gradients_are_added_up_in_one_order_by_no_more_kernels_than_it_takes(
    length: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread over its steps from the last, four by four, batch after batch, until it has walked 32; where one thread did
    it all, that is the gradient, and there is no second kernel. Else 64 groups of threads take every 64th thread's sum, 8 of
    them every 8th group's, and the first adds up these."""
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    arguments = problem(length=length, batch=batch)
    o = cusru.sru_forward(**arguments)
    with simulator.report() as report:
        g = cusru.sru_backward(o.h, o.c_last, o.c, **arguments)
    each = max(1, min(-(-32 // max(length, 1)), batch))  # batches that a thread walks
    rows = -(-batch // each)
    assert (report.launches, bool(report.workspace_bytes)) == ((1, False) if rows == 1 else (1 + (rows > 1), rows > 1))
    assert (cusru.workspace_size("backward", **arguments) > 0) == (rows > 1)

    before = np.concatenate([arguments["c0"][None], o.c])[:length]
    of_bias = np.moveaxis(g.u[..., 1:], 3, 0)[:, ::-1]  # gate, step from the last, batch, column
    for name, terms in (("bias", of_bias), ("weight_c", of_bias * before[::-1])):
        sums = [np.zeros((2, D), "f4")] * 64
        for group in range(64):
            of_row = [
                compensated(
                    np.concatenate(
                        [np.zeros((1, 2, D), "f4")]
                        + [by_fours(terms[:, :, b].swapaxes(0, 1)) for b in range(row * each, min((row + 1) * each, batch))]
                    )
                )
                for row in range(group, rows, 64)
            ]
            sums[group] = compensated(np.array([sums[group], *of_row]))
        np.testing.assert_array_equal(
            getattr(g, name).reshape(2, D),
            compensated(np.array([compensated(np.array(sums[g::8])) for g in range(8)])),
            err_msg=name,
        )


@on_the_simulator
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_a_batch_that_adds_nothing_changes_no_bit_of_the_parameter_gradients(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although with it there is a second kernel, and without it none."""
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    for length, batch in ((1, 32), (8, 4), (70, 1)):
        arguments = problem(dtype, length, batch + 1)
        o = cusru.sru_forward(**arguments)
        grad_h = np.array(o.h)
        grad_h[:, -1] = 0
        more = cusru.sru_backward(grad_h, None, o.c, **arguments)
        fewer = {n: a[:, :batch] if n in ("u", "x") else a[:batch] if n == "c0" else a for n, a in arguments.items()}
        with simulator.report() as report:
            g = cusru.sru_backward(grad_h[:, :batch], None, o.c[:, :batch], **fewer)
        assert report.launches == 1
        for name in ("bias", "weight_c"):
            np.testing.assert_array_equal(getattr(g, name), getattr(more, name), err_msg=f"{name}, {length}, {batch}")


@on_the_simulator
@pytest.mark.parametrize("batch", [1, 17])
def test_a_sum_that_is_flushed_to_zero_has_no_sign(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one kernel adds it up or two."""
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    u, x, bias = np.zeros((2, batch, 4, 3), "f4"), np.ones((2, batch, 4), "f4"), np.zeros((2, 4), "f4")
    grad_h = np.zeros_like(x)
    grad_h[:, 0] = np.finfo("f4").tiny * np.array([[6.4], [-6]], "f4")  # of the bias: a quarter of -grad_h, the last step first
    g = cusru.sru_backward(grad_h, None, cusru.sru_forward(u, x, bias=bias).c, u, x, bias=bias)
    assert (g.u[:, 0, :, 2] < 0).tolist() == [[True] * 4, [False] * 4]
    assert not g.bias.view("u4").any()
