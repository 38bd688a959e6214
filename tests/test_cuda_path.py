"""The CuPy path without a GPU, up to the driver's call: real CuPy arrays over host memory, the real plan, stream scope,
RawKernel options and argument list, with the launch handed to the simulator."""

from __future__ import annotations

import signal
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
import strategies
from conftest import missing

import cusru
from cusru import arguments, call, dlpack, raw_kernels, simulator
from cusru.specialisation import Limits

cupy = pytest.importorskip("cupy", reason='needs CuPy: pip install "cusru[cuda13]"')

DEVICE, CURRENT = 1, 4242
L, B, D = 70, 3, 16


def on_device(array: np.ndarray) -> Any:
    """A CuPy array over NumPy's memory."""
    base = array if array.base is None else array.base
    owned = cupy.cuda.UnownedMemory(base.ctypes.data, max(base.nbytes, 1), base, device_id=DEVICE)
    pointer = cupy.cuda.MemoryPointer(owned, array.ctypes.data - base.ctypes.data)
    return cupy.ndarray(array.shape, array.dtype, memptr=pointer, strides=array.strides)


def on_host(array: Any) -> np.ndarray:
    interface = dict(data=(array.data.ptr, False), shape=array.shape, strides=array.strides, typestr=array.dtype.str, version=3)
    return np.asarray(types.SimpleNamespace(__array_interface__=interface)).copy()


class Driver:
    """Stands in for the runtime: a current device, a stack of current streams, and a log of launches."""

    def __init__(self) -> None:
        self.streams = [CURRENT]
        self.devices = [0]
        self.launches: list[tuple[str, int, int, int, int]] = []
        self.memory: list[np.ndarray] = []

    def scope(self, stack: list[int], value: int) -> Any:
        class Scope:
            ptr = value

            def __enter__(self) -> None:
                stack.append(value)

            def __exit__(self, *_: object) -> None:
                stack.pop()

        return Scope()

    def empty(self, shape: Any, dtype: Any) -> Any:
        assert self.devices[-1] == DEVICE, "allocated on another device"
        poison = 0xA5 if np.dtype(dtype).itemsize == 1 else np.nan
        self.memory.append(np.full(shape, poison, dtype))
        return on_device(self.memory[-1])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    if reason := missing("simulator"):
        pytest.skip(reason)
    driver = Driver()

    class RawKernel:
        max_dynamic_shared_size_bytes = 48 << 10  # as long as nobody asks for more

        def __init__(self, code: str, name: str, options: tuple[str, ...], backend: str) -> None:
            assert backend == "nvrtc"
            assert "--fmad=false" in options
            self.name, self.code = name, code
            self.kernel = simulator.load(code, name, tuple(o for o in options if o.startswith("-D")))

        def compile(self) -> None:
            pass

        def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...], *, shared_mem: int) -> None:
            (struct,) = args
            assert shared_mem <= self.max_dynamic_shared_size_bytes
            assert isinstance(struct, np.ndarray), "CuPy takes a struct as an array of one element, and refuses np.void"
            assert struct.size == 1
            assert struct.nbytes == arguments.ARGS.itemsize
            driver.launches.append((self.name, driver.devices[-1], driver.streams[-1], *grid, *block))
            self.kernel(*grid, *block, struct, shared_mem)

    monkeypatch.setattr(cupy, "RawKernel", RawKernel)
    monkeypatch.setattr(cupy, "empty", driver.empty)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: driver.devices[-1])
    monkeypatch.setattr(cupy.cuda, "Device", lambda index: driver.scope(driver.devices, index))
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device=0: driver.scope(driver.streams, driver.streams[-1]))

    def from_external(obj: Any) -> Any:
        assert driver.devices[-1] == DEVICE, "CuPy takes it for a stream of the current device"
        return driver.scope(driver.streams, obj.__cuda_stream__()[1])

    external = types.SimpleNamespace(from_external=from_external)
    monkeypatch.setattr(cupy.cuda, "Stream", external)
    monkeypatch.setattr(raw_kernels, "_limits", lambda device: Limits(0))
    monkeypatch.setattr(raw_kernels, "_kernels", {})
    monkeypatch.setattr(simulator, "multiprocessors", 0)
    wait = lambda obj, name, device, stream: driver.launches.append(("wait", driver.devices[-1], stream))  # noqa: E731
    monkeypatch.setattr(dlpack, "_export", wait)
    return driver


def problem() -> dict[str, Any]:
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype("f4")

    return dict(
        u=normal(B, L, D, 3).transpose(1, 0, 2, 3), x=normal(L, B, D), bias=normal(2 * D), weight_c=normal(2, D), c0=normal(B, D),
        mask_pad=rng.random((L, B)) < 0.2, scale_x=np.array([1.5], "f4"),
    )  # fmt: skip


def expected(arguments: dict[str, Any], save_every: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    o = cusru.sru_forward(**arguments, save_every=save_every)
    return o, cusru.sru_backward(o.h, o.c_last, o.c, **arguments, save_every=save_every)


@pytest.mark.parametrize("save_every", [1, 40])
def test_the_cupy_path_launches_what_the_simulator_runs(driver: Driver, monkeypatch: pytest.MonkeyPatch, save_every: int) -> None:
    arguments = problem()
    want = expected(arguments, save_every, monkeypatch)
    given = {name: on_device(a) for name, a in arguments.items()}
    o = cusru.sru_forward(**given, save_every=save_every)
    g = cusru.sru_backward(o.h, o.c_last, o.c, **given, save_every=save_every)
    for got, right in zip((*o, *g), (*want[0], *want[1]), strict=True):
        assert isinstance(got, cupy.ndarray)
        np.testing.assert_array_equal(on_host(got), right)
    names = [launch[0] for launch in driver.launches]
    assert names == ["cusru_forward", "cusru_backward", "cusru_reduce"]
    assert {launch[1:3] for launch in driver.launches} == {(DEVICE, CURRENT)}, "on the arrays' device and the current stream"
    assert (driver.devices, driver.streams) == ([0], [CURRENT]), "the caller's device and stream are current again"


def test_the_gradient_of_u_lies_as_u_does(driver: Driver) -> None:
    arguments = problem()
    given = {name: on_device(a) for name, a in arguments.items()}
    o = cusru.sru_forward(**given)
    g = cusru.sru_backward(o.h, None, o.c, **given)
    assert g.u.strides == given["u"].strides


def test_a_given_stream_is_used_and_ordered_after_the_arrays_own(driver: Driver) -> None:
    given = {name: on_device(a) for name, a in problem().items()}
    cusru.sru_forward(**given, stream=77)
    waits = [launch for launch in driver.launches if launch[0] == "wait"]
    assert len(waits) == len(given)
    assert set(waits) == {("wait", DEVICE, 77)}, "the events are recorded on the arrays' device"
    assert driver.launches[-1][:3] == ("cusru_forward", DEVICE, 77)
    cusru.sru_forward(**given, stream=0)
    assert driver.launches[-1][:3] == ("cusru_forward", DEVICE, 0)


def test_with_out_and_workspace_nothing_is_allocated(driver: Driver) -> None:
    given = {name: on_device(a) for name, a in problem().items()}
    for save_every in (1, 40):
        o = cusru.sru_forward(**given, save_every=save_every)
        g = cusru.sru_backward(o.h, None, o.c, **given, save_every=save_every)
        size = cusru.workspace_size("backward", **given, save_every=save_every)
        workspace = on_device(np.empty(size, "u1"))
        held = len(driver.memory)
        assert cusru.sru_forward(**given, save_every=save_every, out=o).h is o.h
        again = cusru.sru_backward(o.h, None, o.c, **given, save_every=save_every, out=g, workspace=workspace)
        assert all(a is b for a, b in zip(again, g, strict=True))
        assert len(driver.memory) == held


def test_a_workspace_of_no_bytes_has_no_address_and_goes_the_quick_way(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: on_device(a) for name, a in problem().items()}
    o = cusru.sru_forward(**given)
    assert cusru.workspace_size("forward", **given) == 0
    nothing = cupy.ndarray((0,), np.uint8, memptr=cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(0, 0, None, DEVICE), 0))
    assert nothing.data.ptr == 0
    monkeypatch.setattr(call, "_run_carefully", lambda *_: pytest.fail("looked at with care"))
    assert cusru.sru_forward(**given, out=o, workspace=nothing).h is o.h


def test_each_kernel_is_built_once_for_a_device(driver: Driver) -> None:
    given = {name: on_device(a) for name, a in problem().items()}
    cusru.sru_forward(**given)
    built = dict(raw_kernels._kernels)
    cusru.sru_forward(**given)
    assert raw_kernels._kernels == built
    assert {device for _, device in built} == {DEVICE}


class Buffer:
    """Stands in for XLA's: a device's memory, by DLPack alone."""

    def __init__(self, a: np.ndarray) -> None:
        self.a, self.shape, self.dtype = a, a.shape, a.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, DEVICE

    def __dlpack__(self, **_: Any) -> Any:
        capsule = (self.a.view(np.uint16) if self.a.dtype.name == "bfloat16" else self.a).__dlpack__()
        tensor = dlpack._peek(capsule)
        tensor.device_type, tensor.device_id = self.__dlpack_device__()
        if self.a.dtype.name == "bfloat16":
            tensor.code = dlpack._BFLOAT
        return capsule


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xlas_callback_runs_on_xlas_stream_in_xlas_memory(driver: Driver, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """What jax's program calls on a GPU, with stand-ins for its buffers: nothing is allocated, nothing looked at twice."""
    pytest.importorskip("jax", reason='needs JAX: pip install "cusru[jax]"')
    from cusru.jax import operator
    from cusru.problem import Options

    arguments = {n: np.ascontiguousarray(a) for n, a in problem().items()}
    if dtype == "bfloat16":
        arguments |= {n: arguments[n].astype(strategies.BFLOAT16) for n in ("u", "x")}
    forward, backward = expected(arguments, 40, monkeypatch)
    monkeypatch.setattr(call, "_run_carefully", lambda *_: pytest.fail("looked at with care"))
    options = Options(("identity", "identity", "state"), False, 40)
    static = operator.Static("sru_forward", tuple(arguments), options, None)
    context = types.SimpleNamespace(stream=77)

    def run(static: Any, results: Any, given: dict[str, Any], **keywords: Any) -> list[np.ndarray]:
        direction = "backward" if static.operator == "sru_backward" else "forward"
        size = cusru.workspace_size(direction, **arguments, save_every=40)
        made = [np.empty_like(a) for a in results] + [np.empty(size, np.uint8)] * bool(size)
        operator._callback(static)(context, list(map(Buffer, made)), *[Buffer(a) for a in given.values()])
        return made

    h, c, c_last, *_ = run(static, forward, arguments)
    before = {"grad_h": h, "grad_c_last": c_last, "c": c}
    gradients = run(static.of("backward", tuple(before)), [g for g in backward if g is not None], before | arguments)
    for got, right in zip((h, c, c_last, *gradients), (*forward, *backward), strict=False):
        np.testing.assert_array_equal(got, right)
    assert [launch[:3] for launch in driver.launches] == [
        (name, DEVICE, 77) for name in ("cusru_forward", "cusru_backward", "cusru_reduce")
    ]
    assert not driver.memory
    assert (driver.devices, driver.streams) == ([0], [CURRENT])


def test_xlas_callback_without_cupy_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax", reason='needs JAX: pip install "cusru[jax]"')
    from cusru.jax import operator
    from cusru.problem import Options

    monkeypatch.setitem(sys.modules, "cupy", None)
    static = operator.Static("sru_forward", ("u",), Options(("identity", "identity", "state"), False, None), 1.0)
    u, *results = (Buffer(np.zeros(shape, "f4")) for shape in ((2, 1, 1, 3), (2, 1, 1), (1, 1)))
    with pytest.raises(ImportError, match=r"arrays on a CUDA device need CuPy: pip install 'cusru\[cuda13\]'"):
        operator._callback(static)(types.SimpleNamespace(stream=77), results, u)


def test_two_devices_are_named(driver: Driver) -> None:
    given = {name: on_device(a) for name, a in problem().items()}
    with pytest.raises(ValueError, match=r"bias is on cpu and u on cuda:1"):
        cusru.sru_forward(given["u"], bias=np.zeros((2, D), "f4"))


@pytest.mark.parametrize("version", ["13.6.0", "14.1.0rc1", "9.2"])
def test_an_older_cupy_is_refused_with_the_install_line(driver: Driver, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    u = on_device(problem()["u"])
    monkeypatch.setattr(cupy, "__version__", version)
    with pytest.raises(ImportError, match=rf"CuPy {version}, and cusru needs 14\.2 or later: pip install"):
        cusru.sru_forward(u)
    assert not driver.launches
    for enough in ("14.2.0", "14.10.0b1", "15.0"):
        monkeypatch.setattr(cupy, "__version__", enough)
        cusru.sru_forward(u)


def test_a_signal_s_handler_may_launch_what_its_thread_is_compiling(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    u, compiled, handled = on_device(problem()["u"]), [], []

    class Interrupted(cupy.RawKernel):
        def compile(self) -> None:
            compiled.append(self.name)
            if len(compiled) == 1:
                signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(cupy, "RawKernel", Interrupted)
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.append(cusru.sru_forward(u)))
    try:
        thread = threading.Thread(target=lambda: raw_kernels._compiling.acquire() and raw_kernels._compiling.release())
        o = cusru.sru_forward(u)
        thread.start()  # and the lock is free again
        thread.join(60)
        assert not thread.is_alive()
    finally:
        signal.signal(signal.SIGUSR1, before)
    np.testing.assert_array_equal(on_host(o.h), on_host(handled[0].h))
    cusru.sru_forward(u)
    assert len(compiled) == 2
