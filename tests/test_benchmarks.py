"""The instruments: the bytes they count, the resources they read, the baseline and the yardsticks, and the report for a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import strategies
from conftest import missing

from benchmarks import cases, device, layers, peers, report, resources, traffic, workload
from benchmarks.workload import PASSES, Workload
from cusru import measuring, raw_kernels, simulator, specialisation
from cusru.measuring import Floor

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(missing("simulator") is not None, reason=missing("simulator") or "")


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> measuring.Simulator:
    if reason := missing("simulator"):
        pytest.skip(reason)
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    return measuring.Simulator()


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # a worker times nothing
    values |= {"CUSRU_SIMULATE": "", **environment}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=values, capture_output=True, text=True, check=False)


# ---- traffic: the memory wall is reached where the bytes moved are the bytes that must be ---------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("case", "multiprocessors"),
    [
        *(pytest.param(case, 132, id=f"{case.name}, the warps take turns") for case in (*traffic.LAYOUTS, *traffic.STATES[:2])),
        *(pytest.param(case, 0, id=f"{case.name}, a warp a block") for case in traffic.LAYOUTS),
    ],
)
def test_every_pass_moves_its_floor_and_little_more(
    monkeypatch: pytest.MonkeyPatch, case: cases.Case, dtype: str, multiprocessors: int
) -> None:
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    assert (case.L, case.B, case.D) == (128, 32, 512)
    for row in traffic.rows(case, dtype, multiprocessors):
        assert 1 <= row["ratio"] <= 1.02, row
        assert row["sector_efficiency"] >= 0.95, row
        assert row["workspace_bytes"] <= 0.05 * row["floor_bytes"], row


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", traffic.SPANS, ids=lambda case: case.name)
def test_where_time_is_split_data_moves_once_and_the_rest_is_what_spans_tell(
    monkeypatch: pytest.MonkeyPatch, case: cases.Case, dtype: str
) -> None:
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    ran, run = [], raw_kernels.run
    monkeypatch.setattr(raw_kernels, "run", lambda launches, *rest: (ran.extend(launches), run(launches, *rest)))
    for row in traffic.rows(case, dtype):
        words = row["workspace_bytes"] / row["floor_bytes"]
        # Every block has one span here, so that parameters are read for each 32 or 40 steps of a column.
        assert 1 <= row["ratio"] - words <= 1.03, row
        assert words <= (0.14 if case.D > 640 else 0.5), row  # the fewer columns, the more spans ask for a span's words
        assert row["sector_efficiency"] >= 0.95, row
    assert all(launch.kernel.split for launch in ran if launch.kernel.direction in PASSES)
    assert {launch.kernel.direction for launch in ran} >= {"clear", "forward"}


def test_the_floor_is_that_of_the_equations(simulated: measuring.Simulator) -> None:
    """By hand: k = 3 with x, v2, state float32 under float16 u."""
    case = cases.Case("floor", 24, 2, 8, weight_c="column", c0=True, save_every=5, padding="lengths")
    work = Workload(simulated, case, "float16")
    steps, columns, blocks = 24 * 2 * 8, 2 * 8, 5
    parameters, plane, padding = 2 * (2 * 8 * 4), columns * 4, 24 * 2
    assert work.floor("forward") == Floor(
        read=steps * 4 * 2 + parameters + plane + padding, written=steps * 2 + blocks * plane + plane
    )
    assert work.floor("backward") == Floor(
        read=steps * 5 * 2 + parameters + plane + padding + plane + blocks * plane, written=steps * 4 * 2 + parameters + plane
    )


@needs_compiler
def test_traffic_prints_one_object_a_line() -> None:
    done = run("benchmarks.traffic", "--json", "--case", "small-masked", "--case", "short-v2-inference")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["case"], row["dtype"], row["pass"]) for row in rows] == [
        *(("small-masked", dtype, direction) for dtype in ("float32", "bfloat16") for direction in PASSES),
        ("short-v2-inference", "float32", "forward"),
        ("short-v2-inference", "float16", "forward"),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx((row["bytes_read"] + row["bytes_written"]) / row["floor_bytes"], abs=1e-5)
        assert 0 < row["sector_efficiency"] <= 1
        assert row["requests_per_kib"] >= 2
    assert rows[0]["options"]["save_every"] == 7


@needs_compiler
def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    command = [sys.executable, "-m", "benchmarks.traffic", "--json", "--case", "small", "--case", "small-qrnn"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout
        assert run.stderr
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 1


def test_traffic_without_a_compiler_says_what_to_install() -> None:
    done = run("benchmarks.traffic", PATH="", CXX="")
    assert done.returncode == 1
    assert "apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the baseline and the yardstick ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_target", ["state", "gate"])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("skip", ["none", "x", "projected"])
def test_the_original_design_computes_what_ours_does(
    simulated: measuring.Simulator, skip: str, activation: str, mask_target: str
) -> None:
    case = cases.CASES["small-masked"]._replace(
        D=16, skip=skip, activation=activation, mask_target=mask_target, save_every=1, bidirectional=mask_target == "gate"
    )
    for dtype in strategies.DTYPES:
        work = Workload(simulated, case, dtype)
        work.original.run("backward")
        tolerance = {"float64": 1e-12, "float32": 2e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
        pairs = {name: (work.original.arrays[name], getattr(work.output, name)) for name in ("h", "c_last")}
        for name, a in work.results["backward"]._asdict().items():
            if a is not None:
                pairs[name] = (work.original.sums.get(f"grad_{name}", work.original.arrays[f"grad_{name}"]), a)
        for name, (theirs, ours) in pairs.items():
            theirs, ours = (np.asarray(a, np.float64) for a in (theirs, ours))
            assert abs(theirs - ours).max() <= tolerance * max(1, abs(ours).max()), (dtype, name)


def test_the_original_design_is_compared_where_it_had_the_variant(simulated: measuring.Simulator) -> None:
    chosen = {case.name for case in cases.SMALL if Workload(simulated, case, case.dtypes[0]).has_original}
    assert chosen == {"small", "small-masked", "small-narrow", "small-separation-k3", "small-separation-k4"}


@pytest.mark.parametrize("floor", [Floor(16, 16), Floor(1_000_000, 16), Floor(123_456, 654_321)])
def test_the_stream_reads_and_writes_just_its_bytes(
    simulated: measuring.Simulator, monkeypatch: pytest.MonkeyPatch, floor: Floor
) -> None:
    """Counted, and by what lies in the target: each thread's sum of what it has read of its block's share."""
    rng = np.random.default_rng(0)
    memory: list[np.ndarray] = []

    def filled(count: int) -> np.ndarray:
        memory.append(simulated.put(rng.integers(0, 256, count, np.uint8)))
        return memory[-1]

    monkeypatch.setattr(simulated, "bytes", filled)
    call = measuring.streaming(simulated, floor)
    with simulator.report() as counted:
        call()
    assert counted.bytes_read == floor.read // 16 * 16
    assert counted.bytes_written == floor.written // 16 * 16
    source, target = (a.view(np.uint32).reshape(-1, 4) for a in memory)
    blocks = -(-(len(source) + len(target)) * 16 // measuring.STREAM_BLOCK_BYTES)
    for block in range(blocks):
        share, written = (a[len(a) * block // blocks : len(a) * (block + 1) // blocks] for a in (source, target))
        for thread in range(measuring.STREAM_THREADS):
            assert (
                written[thread :: measuring.STREAM_THREADS] == share[thread :: measuring.STREAM_THREADS].sum(0, np.uint32)
            ).all()


def test_figures_follow_from_the_times(simulated: measuring.Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ms for ours, 8 for another, 1 for a copy, half for the stream."""
    work = Workload(simulated, cases.CASES["small-qrnn"], "float32")
    seconds = iter((1e-3, 0.5e-3, 2e-3, 8e-3))
    monkeypatch.setattr(simulated, "time", lambda call, cache: next(seconds))
    row = work.measure("backward", {"other": lambda: None})
    floor = work.floor("backward").bytes
    assert row["floor_bytes"] == floor
    assert row["copy_gb_per_s"] == floor / 1e-3 / 1e9
    assert row["times"]["cusru"] == {"seconds": 2e-3, "gb_per_s": floor / 2e-3 / 1e9, "of_copy": 0.5, "of_ceiling": 0.25}
    assert row["times"]["other"]["of_copy"] == 1 / 8
    assert row["options"] == {"skip": "none", "candidate": "tanh", "layout": "d_inner"}


def test_a_copy_reads_and_writes_the_floor_s_bytes_together(simulated: measuring.Simulator) -> None:
    work = Workload(simulated, cases.CASES["small"], "float32")
    copy = work.copy(Floor(3000, 1000))
    assert [a.nbytes for a in copy.args] == [2000, 2000]  # type: ignore[attr-defined]


def test_the_original_is_timed_in_the_pass_that_ours_is(simulated: measuring.Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(simulated, cases.CASES["small"], "float32")
    ran: list[str] = []
    monkeypatch.setattr(work.original, "run", ran.append)
    monkeypatch.setattr(simulated, "time", lambda call, cache: call() or 1.0)
    for direction in PASSES:
        ran.clear()
        work.measure(direction)
        assert ran == [direction, direction], "warmed up, timed"


def test_a_time_on_a_cpu_is_the_best_of_its_runs(simulated: measuring.Simulator) -> None:
    pauses = iter([0.03, 0.001, 0.03] + [0.03] * 100)
    assert 0.001 <= simulated.time(lambda: time.sleep(next(pauses))) < 0.02


def test_what_is_timed_allocates_nothing_and_gives_the_same_bits(simulated: measuring.Simulator) -> None:
    work = Workload(simulated, cases.CASES["small-masked"], "float32")
    for direction in PASSES:
        before = [None if a is None else a.copy() for a in work.results[direction]]
        for a in work.results[direction]:
            if a is not None:
                a.fill(7)
        work.run(direction)
        for a, b in zip(work.results[direction], before, strict=True):
            assert a is None or np.array_equal(a, b)


class StandIn:
    """For CuPy: memory on the host, the launch handed to the simulator."""

    class RawKernel:
        def __init__(self, code: str, name: str, options: tuple[str, ...]) -> None:
            self.kernel = simulator.load(code, name, tuple(o for o in options if o.startswith("-D")))

        def __call__(self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
            (struct,) = args
            assert isinstance(struct, np.ndarray), "CuPy takes a struct as an array of one element"
            self.kernel(*grid, *block, struct)


def test_the_launches_of_a_cuda_device_are_those_of_the_simulator(simulated: measuring.Simulator) -> None:
    """The CuPy path of stream.cu and original.cu, up to the driver."""
    cuda = measuring.Cuda.__new__(measuring.Cuda)
    cuda.cupy, cuda.kernels = StandIn, {}
    work = Workload(simulated, cases.CASES["small-masked"], "float32")
    want = {name: a.copy() for name, a in work.original.arrays.items()}
    work.original.arrays["h"].fill(0)
    simulated.launch = cuda.launch  # type: ignore[method-assign]
    work.original.run("forward")
    work.original.run("backward")
    work.stream(work.floor("forward"))()
    assert np.array_equal(work.original.arrays["h"], want["h"])
    assert len(cuda.kernels) == 3, "compiled once each"


class Clockwork:
    """A device whose events say that Python was late, `late` times."""

    def __init__(self, late: int) -> None:
        self.done: list[str] = []
        self.late, self.cuda = late, measuring.Cuda.__new__(measuring.Cuda)
        self.cuda.cupy = SimpleNamespace(cuda=SimpleNamespace(Event=self.event, get_elapsed_time=lambda start, end: 3.0))
        self.cuda.__dict__["_filler"] = (np.zeros(8, np.uint8), np.zeros(8, np.uint8))
        self.cuda.copy = lambda source, target: self.done.append("copy")  # type: ignore[method-assign]
        self.cuda.launch = self.launch  # type: ignore[method-assign]

    def launch(self, file: Path, entry: str, macros: Any, blocks: int, threads: int, cycles: int) -> None:
        self.done.append(f"{entry} {cycles}")

    def event(self) -> Any:
        self.late -= 1  # two events a run
        late = self.late >= -1 and self.late % 2 == 1 and self.late > 0
        return SimpleNamespace(record=lambda: self.done.append("event"), synchronize=lambda: self.done.append("wait"), done=late)


@pytest.mark.parametrize(("cache", "before"), [("cold", ["copy"] * 10), ("warm", ["call", "hold 1000000"])], ids=["cold", "warm"])
def test_a_cold_time_empties_l2_and_a_warm_one_fills_it(cache: str, before: list[str]) -> None:
    """Both keep the device busy while Python prepares the launch; only the launch lies between the events."""
    device = Clockwork(late=0)
    assert device.cuda.time(lambda: device.done.append("call"), cache) == 3e-3
    assert device.done == [*before, "event", "call", "event", "wait"] * 10


def test_a_run_that_python_was_late_for_does_not_count() -> None:
    device = Clockwork(late=2)
    assert device.cuda.time(lambda: device.done.append("call"), "cold") == 3e-3
    assert device.done == [*["copy"] * 10, "event", "call", "event", "wait"] + (
        [*["copy"] * 20, "event", "call", "event", "wait"] * 10
    )


# ---- resources ------------------------------------------------------------------------------------------------------------

OCCUPANCY = """
#include <limits.h>
#include <cuda_occupancy.h>
extern "C" int blocks(int capability, int threads, int registers, int shared, int sm_threads, int sm_shared, int reserved) {
    cudaOccDeviceProp sm;
    sm.computeMajor = capability / 10, sm.computeMinor = capability % 10;
    sm.maxThreadsPerBlock = 1024, sm.maxThreadsPerMultiprocessor = sm_threads, sm.warpSize = 32, sm.numSms = 1;
    sm.regsPerBlock = sm.regsPerMultiprocessor = 65536;
    sm.sharedMemPerBlock = 48 << 10, sm.sharedMemPerMultiprocessor = sm_shared, sm.reservedSharedMemPerBlock = reserved;
    sm.sharedMemPerBlockOptin = sm_shared - reserved;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = registers, kernel.sharedSizeBytes = shared;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = 0, kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &sm, &kernel, &state, threads, 0)) return -1;
    return result.activeBlocksPerMultiprocessor;
}
"""


@needs_compiler
def test_blocks_per_multiprocessor_are_those_of_nvidia_s_calculator(tmp_path: Path) -> None:
    found = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/include/cuda_occupancy.h")]
    if not found:
        pytest.skip('cuda_occupancy.h comes with nvidia-cuda-runtime: pip install ".[cuda13]"')
    source, library = tmp_path / "occupancy.cpp", tmp_path / "occupancy.so"
    source.write_text(OCCUPANCY)
    subprocess.run(
        [simulator.compiler(), "-shared", "-fPIC", f"-I{found[0].parent}", str(source), "-o", str(library)], check=True
    )
    blocks = ctypes.CDLL(str(library)).blocks
    seen = set()
    for capability, sm in resources.MULTIPROCESSORS.items():
        for threads in (32, 64, 512):
            for registers in (16, 40, 63, 64, 65, 128, 142, 168, 202, 213, 255):
                for shared in (0, 4, 4096, 20000, 32768, 40960, 49152):
                    ours = resources.blocks_per_sm(capability, threads, registers, shared)
                    assert ours == blocks(capability, threads, registers, shared, 32 * sm.warps, sm.shared, sm.reserved), (
                        capability,
                        threads,
                        registers,
                        shared,
                    )
                    seen.add(ours)
    assert len(seen) > 10


def test_bytes_of_a_step_are_what_a_thread_reads(simulated: measuring.Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the simulator over a long column that is walked by turns, but for what a column reads once."""
    monkeypatch.setattr(raw_kernels, "split", ())
    for skip in ("none", "x", "projected"):
        for weight in ("none", "step"):
            for dtype in ("float32", "float16", "float64"):
                case = cases.Case("bytes", 300, 1, 4, skip=skip, weight_c=weight, bias=None)
                work = Workload(simulated, case, dtype)
                for direction in PASSES:
                    kind = "none" if weight == "none" else "step" if dtype in ("float32", "float64") else "step_state"
                    kernel = specialisation.Specialisation(direction, dtype, skip, weight=kind)
                    with simulator.report() as counted:
                        work.run(direction)
                    per_step = counted.bytes_read / (300 * 4)
                    assert per_step == pytest.approx(resources.bytes_per_step(kernel), abs=0.2), kernel


def test_resources_of_a_kernel() -> None:
    pytest.importorskip("cupy", reason='needs CuPy and NVRTC: pip install "cusru[cuda13]"')
    row = resources.row(specialisation.Specialisation("backward", "float32", "x", weight="column", recompute=True), 90)
    assert row["spill_bytes"] == row["stack_bytes"] == 0
    assert 64 < row["registers"] < 256
    assert row["shared_bytes"] == 32 * 32 * 6 * 4 + 10 * 128 * 4 + 4 * 32 * 4, (
        "32 steps' u, x, grad_h and c; of each warp carry, state, sums; of the block a group's sums; 4 bytes"
    )
    assert row["blocks_per_sm"] == min(4, 65536 // 128 // (-(-row["registers"] // 8) * 8)), "64 barriers are 4 blocks' 16"
    assert row["bytes_in_flight_per_sm"] == row["blocks_per_sm"] * 128 * 8 * 5 * 4, "8 steps of u, x and grad_h"


def test_resources_prints_one_object_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cupy", reason='needs CuPy and NVRTC: pip install "cusru[cuda13]"')
    few = [kernel for kernel in specialisation.specialisations() if kernel.direction == "reduce"]
    monkeypatch.setattr(resources, "covering", lambda kernels: few)
    assert resources.main(["--json", "--architecture", "90", "--architecture", "75"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["dtype"], row["architecture"]) for row in rows] == [(k.dtype, sm) for sm in (90, 75) for k in few]
    for row in rows:
        assert row["spill_bytes"] == 0
        assert row["blocks_per_sm"] >= 2
        assert row["bytes_in_flight_per_sm"] > 0


SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_3:
        /*0010*/                   IADD R2, R2, 0x1 ;
.L_x_1:
        /*0020*/                   LDG.E R4, [R2] ;
        /*0030*/                   MUFU.EX2 R5, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/               @P3 BRA `(.L_x_3) ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4);
"""


def test_the_innermost_loops_are_counted() -> None:
    """Not the loop around it, not the second jump to the same place, not the trap at the end."""
    (loop,) = resources.smallest_loops(resources.code(SASS), "MUFU")
    assert loop == ["LDG.E R4, [R2]", "MUFU.EX2 R5, R4", "@!P0 BRA `(.L_x_2)", "@P1 BRA `(.L_x_1)"]


def test_what_a_span_takes_is_the_longest_loop_and_its_parts_as_often_as_they_are_walked() -> None:
    found = resources.of_stretch(resources.code(SASS), 2)
    part = ["LDG.E R4, [R2]", "MUFU.EX2 R5, R4", "@!P0 BRA `(.L_x_2)", "@P1 BRA `(.L_x_1)"]
    assert sorted(found) == sorted(["IADD R2, R2, 0x1", "@P2 BRA `(.L_x_1)", "@P3 BRA `(.L_x_3)", *part, *part])


def test_a_step_takes_four_special_functions() -> None:
    pytest.importorskip("cupy", reason='needs CuPy and NVRTC: pip install "cusru[cuda13]"')
    try:
        resources.find_nvdisasm()
    except RuntimeError as error:
        pytest.skip(str(error))
    for kernel, special in (
        (specialisation.Specialisation("forward", "float32", "x", weight="column"), 4),
        (specialisation.Specialisation("backward", "bfloat16", "x", columns=2), 4),
        (specialisation.Specialisation("backward", "float32", "x", recompute=True), 6),
    ):
        row = resources.row(kernel, 90, sass=True)
        assert row["special_functions"] == special
        assert 40 < row["instructions"] < 220


def test_the_benchmarks_own_kernels_compile_without_spills() -> None:
    pytest.importorskip("cupy", reason='needs CuPy and NVRTC: pip install "cusru[cuda13]"')
    for architecture in resources.supported():
        log, _ = resources.build(raw_kernels.source(measuring.STREAM), ("-std=c++17", "-DTHREADS=256"), architecture)
        assert [used.spill_bytes + used.stack_bytes for used in resources.usages(log)] == [0, 0], log  # stream, hold
    for form, macros in device.FORMS.items():
        options = ("-std=c++17", f"-DNAME={form}", "-DPLANTED=0", *(f"-D{name}={value}" for name, value in macros.items()))
        log, _ = resources.build(raw_kernels.source(device.HAND_OVER), options, 75)
        assert [used.spill_bytes for used in resources.usages(log)] == [0], log
    for dtype in specialisation.TYPES.values():
        options = ("-std=c++17", f"-DTYPE={dtype}", "-DK=4", "-DTANH_ACTIVATION=1", "-DMASK_GATE=1", "-DBIDIRECTIONAL=1")
        log, _ = resources.build(raw_kernels.source(workload.ORIGINAL), options, 90)
        assert [used.spill_bytes for used in resources.usages(log)] == [0, 0], log


# ---- the regression check -------------------------------------------------------------------------------------------------

ONE = ("benchmarks/test_speed.py", "-q", "-k", "numpy-small-float64-forward")


def test_a_stored_baseline_catches_what_has_become_slower(tmp_path: Path) -> None:
    """As CONTRIBUTING.md says, on ratios to a copy: a baseline three times as fast fails, one three times as slow passes."""
    baseline = tmp_path / "baseline.json"
    made = run("pytest", *ONE, f"--benchmark-json={baseline}")
    assert made.returncode == 0, made.stdout
    assert "time in copies" in made.stdout
    stored = json.loads(baseline.read_text())
    assert "node" not in stored["machine_info"], "no name of a computer goes into a report"
    (benchmark,) = stored["benchmarks"]
    figures = benchmark["extra_info"]["times"]["cusru"]
    assert 0.4 < figures["of_copy"] * benchmark["stats"]["median"] < 2.5, "measured twice"
    for factor, status in ((1 / 3, 1), (3, 0)):
        for figure in ("min", "max", "mean", "median"):
            stored["benchmarks"][0]["stats"][figure] = benchmark["stats"][figure] * factor
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps(stored))
        compared = run("pytest", *ONE, f"--benchmark-compare={changed}", "--benchmark-compare-fail=median:50%")
        assert compared.returncode == status, compared.stdout
        assert ("Performance has regressed" in compared.stdout + compared.stderr) == bool(status)


def test_a_benchmark_whose_kernel_fails_fails(tmp_path: Path) -> None:
    """It does not skip, as one whose backend is not there does."""
    if reason := missing("simulator"):
        pytest.skip(reason)
    (tmp_path / "cache").mkdir(mode=0o700)
    environment = dict(CUSRU_SIMULATE_FLAGS="-no-such-flag", CUSRU_CACHE_DIR=str(tmp_path / "cache"))
    done = run("pytest", "benchmarks/test_speed.py", "-q", "-k", "simulator-small-float64-forward", **environment)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


# ---- peers ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_numpy(monkeypatch: pytest.MonkeyPatch) -> measuring.Numpy:
    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)
    pytest.importorskip("torch", reason='torch is missing: pip install ".[torch]"')
    return measuring.Numpy()


def test_the_sru_package_s_operator_computes_the_same_case(on_numpy: measuring.Numpy) -> None:
    pytest.importorskip("sru", reason='sru is missing: pip install ".[peers]"')
    for name in ("small", "small-separation-k3", "small-separation-k4"):
        work = Workload(on_numpy, cases.CASES[name], "float32")
        peer = peers.sru_operator(work)
        h, c_last = (a.numpy() for a in peer.forward())
        np.testing.assert_allclose(h, work.output.h, atol=2e-5)
        np.testing.assert_allclose(c_last, work.output.c_last, atol=2e-5)
        grad_u = peer.backward()[0].numpy().reshape(work.given["u"].shape)
        np.testing.assert_allclose(grad_u, work.results["backward"].u, atol=5e-5)


def test_a_peer_s_figures_follow_from_its_time(on_numpy: measuring.Numpy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for each call, a quarter for each copy."""
    monkeypatch.setattr(device, "find", lambda simulate: on_numpy)
    monkeypatch.setattr(peers, "PEERS", {"lstm": peers.lstm})
    times = iter([0.5, 0.25] * 100)
    monkeypatch.setattr(on_numpy, "time", lambda call: next(times))
    rows = list(device.beside(simulate=True, seconds=60))
    linear = [f"linear-{shape}" for shape in ("16384x1x1024", "8192x8x1536")]  # which are held against the scans, not the LSTM
    assert [(row["case"], row["peer"], row["pass"]) for row in rows] == [
        *((case, "cusru", direction) for case in linear for direction in PASSES),
        *(
            (case, peer, direction)
            for case in ("small", "small-separation-k3")
            for peer in ("cusru", "lstm")
            for direction in PASSES
        ),
    ]
    for row in rows:
        assert row["gb_per_s"] == row["bytes"] / 0.5 / 1e9
        assert row["of_copy"] == 0.5


def test_a_linear_recurrence_is_held_against_the_fastest_scan(on_numpy: measuring.Numpy, monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(seconds: float) -> Any:
        return lambda work: peers.Peer(lambda: seconds, lambda: 2 * seconds, 100, 200)

    monkeypatch.setattr(device, "find", lambda simulate: on_numpy)
    monkeypatch.setattr(device, "_ours", scan(1.0))
    monkeypatch.setattr(peers, "PEERS", {"scan_triton": scan(3.0), "hgrn_chunk": scan(1.5), "lstm": scan(0.1)})
    monkeypatch.setattr(on_numpy, "time", lambda call: call() or 1.0)
    rows = [row for row in device.beside(simulate=True, seconds=60) if "of_peer" in row]
    assert [(row["pass"], row["of_peer"], row["goal"], row["fastest"]) for row in rows] == [
        (direction, 1.5, {"of_peer": 1.2}, "hgrn_chunk") for _ in range(2) for direction in PASSES
    ]
    text = report.markdown({**a_report(), "steps": {"peers": {"status": "ok", "seconds": 1, "rows": rows}}})
    assert "- linear-16384x1x1024, float32, forward: 1.5 / 1.2 (hgrn_chunk)" in text.splitlines()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_scans_in_jax_compute_the_same(on_numpy: measuring.Numpy, dtype: str) -> None:
    pytest.importorskip("jax", reason='JAX is missing: pip install ".[jax]"')
    work = Workload(on_numpy, cases.CASES["small"], dtype)
    ours, theirs = (peers.PEERS[name](work) for name in peers.IN_JAX)
    assert (ours.forward_bytes, ours.backward_bytes) == (theirs.forward_bytes, theirs.backward_bytes)
    bound = 1e-5 if dtype == "float32" else 0.1
    for direction in PASSES:
        found, wanted = (getattr(peer, direction)() for peer in (ours, theirs))
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype == dtype
            np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), atol=bound)


def test_what_waits_for_the_device_is_timed_by_the_host(on_numpy: measuring.Numpy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_numpy, "time", lambda call: 7.0)
    slow = lambda: time.sleep(0.01)  # noqa: E731
    assert peers.time_of(peers.Peer(slow, slow, 1, 1), "forward", on_numpy) == 7.0
    assert 0.01 <= peers.time_of(peers.Peer(slow, slow, 1, 1, waits=True), "forward", on_numpy) < 1


def test_layers_run_beside_ours(on_numpy: measuring.Numpy) -> None:
    work = Workload(on_numpy, cases.CASES["small"], "float32")
    for make in (peers.lstm, peers.sru_layer):
        peer = make(work)
        assert peer.forward().shape == (40, 3, 20)
        assert peer.backward()[0].shape == (40, 3, 20)
        assert peer.backward_bytes > peer.forward_bytes > work.case.elements * 8


def test_a_peer_that_cannot_run_says_why(on_numpy: measuring.Numpy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accelerated_scan.warp", "accelerated_scan.scalar"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    small = Workload(on_numpy, cases.CASES["small"], "float32")
    step = Workload(on_numpy, cases.CASES["small-step"], "float32")
    for make, work, why in (
        (peers.scan_triton, small, "pip install accelerated-scan"),
        (peers.scan_warp, small, "powers of two"),
        (peers.hgrn_chunk, small, "GPU"),
        (peers.sru_operator, step, "no such variant"),
        (peers.sru_operator, Workload(on_numpy, cases.CASES["small"], "float64"), "float32"),
    ):
        with pytest.raises(peers.Unavailable, match=why):
            make(work)


# ---- one layer beside others ------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason='torch is missing: pip install ".[torch]"')


def a_layer(torch: Any, name: str, shape: layers.Shape) -> tuple[Any, dict[str, layers.Call]]:
    try:
        return layers.passes(torch, layers.CELLS[name], shape, "float64", "cpu")
    except peers.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", layers.CELLS)
def test_what_is_timed_is_one_layer_forward_and_backward(torch: Any, name: str) -> None:
    L, B, D = shape = (6, 3, 8)
    layer, calls = a_layer(torch, name, shape)
    h = calls["forward"]()
    wide = int(name[8]) if name.startswith("conv1d") else 0
    x = (B, D, L) if wide else shape
    assert h.shape == ((B, D, L + wide - 1) if wide else shape)
    assert not h.requires_grad
    learnt = [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
    assert all(getattr(layer, "num_layers", 1) == 1 and shape for shape in learnt)
    gradients = calls["both"]()
    assert [tuple(a.shape) for a in gradients] == [x, *learnt]
    assert gradients[0].any()
    assert all(a.isfinite().all() for a in gradients)


@pytest.mark.parametrize("name", layers.CELLS)
def test_flops_are_those_that_torch_counts(torch: Any, name: str) -> None:
    """In float64, and attention by its plain way: so torch runs all of them as GEMMs that it sees. Of a QRNN's window the first
    step may have less."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    L, B, D = shape = (6, 3, 16)
    _, calls = a_layer(torch, name, shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        calls["forward"]()
    expected = 2 * B * layers.CELLS[name].products(L, D)
    assert expected - (2 * B * 3 * D * D if name == "QRNN, window 2" else 0) <= counter.get_total_flops() <= expected


def test_each_layer_and_shape_has_a_row_and_what_is_not_there_says_why(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("matplotlib.image", reason='matplotlib is missing: pip install ".[examples]"')
    monkeypatch.delattr("cusru.torch.SRU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert layers.main(["--quick", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "layers.json").read_text())
    about, *rows = found["steps"]["layers"]["rows"]
    assert about == found["environment"]
    assert about["torch"] == torch.__version__
    assert [(tuple(row["shape"]), row["cell"]) for row in rows] == [
        (shape, name) for shape in layers.SHAPES["quick"] for name in layers.CELLS
    ]
    for row in rows:
        if "missing" in row:
            assert row["missing"].startswith("this cusru.torch has no ")
            assert f"- {row['cell']}: {row['missing']}" in text.splitlines()
        else:
            assert row["seconds"]["forward"] > 0
            assert row["seconds"]["both"] > 0
            assert row["lstm_over_it"]["both"] == 1 or row["cell"] != "LSTM"
    assert {row["cell"] for row in rows if "missing" in row} >= {"SRU v1", "SRU v2"}
    assert image.imread(tmp_path / "layers.png").std() > 0.05
    for private in (str(ROOT), str(tmp_path), sys.prefix, socket.gethostname()):
        assert private not in text + json.dumps(found)
    rows = list(device.layers(simulate=True, seconds=10))
    assert [row.get("cell") for row in rows] == [None, *layers.CELLS, *layers.CELLS]
    text = report.markdown({**a_report(), "steps": {"layers": {"status": "ok", "seconds": 1, "rows": rows}}})
    assert f"device: {about['device']}" in text
    assert "Forward and backward, float32:" in text.splitlines()
    assert report.LOOKS.keys() == layers.CELLS.keys()
    assert next(layers.rows("cuda"))["missing"] == "this torch has no CUDA device"


def test_a_machine_that_slows_down_changes_no_ratio(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LSTM of 2 and 6 seconds and a GRU of 1 and 2, in rounds that take ten times as long each; something disturbs the first
    LSTM."""
    monkeypatch.setattr(layers, "CELLS", {name: layers.CELLS[name] for name in ("LSTM", "GRU")})
    seconds = iter([1.0] * 8 + [40, 120, 1, 2] + [pace * of for pace in (10, 100) for of in (2, 6, 1, 2)])
    monkeypatch.setattr(layers, "_clock", lambda torch, device: lambda call, count: next(seconds))
    lstm, gru = layers.measure(torch, (4, 2, 8), "float32", "cpu", 3, turn=1)
    assert lstm["seconds"] == {"forward": 40, "both": 120}
    assert gru["seconds"] == {"forward": 10, "both": 20}
    assert gru["lstm_over_it"] == {"forward": 2, "both": 3}


# ---- the report for a GPU -------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_simulator_stands_in_for_a_device(tmp_path: Path) -> None:
    """The whole command but the tests, which would be these."""
    chosen = ("sanitizer", "bandwidth", "goals", "profile", "table", "host")
    only = [word for step in chosen for word in ("--only", step)]
    done = run("benchmarks.device", "--simulate", "--out", str(tmp_path / "new" / "folder"), *only)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "new" / "folder"
    found = json.loads((out / "report.json").read_text())
    assert found["simulated"] is True
    assert {"device", "driver", "CUDA", "CuPy", "cusru"} <= set(found["environment"])
    picture = "ok" if importlib.util.find_spec("matplotlib") else "skipped"
    statuses = {name: step["status"] for name, step in found["steps"].items()}
    assert statuses == {**dict.fromkeys(chosen, "ok"), "picture": picture}
    assert (out / "bandwidth.png").exists() == (picture == "ok")
    assert all(step in done.stdout for step in statuses)
    rows = found["steps"]["table"]["rows"]
    for row in rows:
        copy = row["floor_bytes"] / row["copy_gb_per_s"] / 1e9
        for figures in row["times"].values():
            assert figures["gb_per_s"] == pytest.approx(row["floor_bytes"] / figures["seconds"] / 1e9)
            assert figures["of_copy"] == pytest.approx(copy / figures["seconds"])
    assert {(row["case"], row["dtype"], row["pass"]) for row in rows} == {
        (case.name, dtype, direction) for case in cases.SMALL for dtype in case.dtypes for direction in PASSES
    }
    small, hand_overs = found["steps"]["sanitizer"]["rows"]
    assert small["passes_run"] == len(rows)
    assert hand_overs["passes_run"] == 2 * len(device.FORMS)
    goals = found["steps"]["goals"]["rows"]
    assert {row["row"] for row in goals} == {"3, 5", "6", "3", "7", "12", "13"}
    assert found["steps"]["profile"]["rows"][0]["passes_run"] == 6, "v1 and v2: forward twice, backward"
    plain: dict[tuple[Any, ...], float] = {}
    for row in goals:
        split = row["shape"][0] > 40 and not row["case"].startswith("v2-")
        most = (1 if row["pass"] == "forward" else 2) + (1 if row["shape"][0] > 40 else 0)
        assert (2 if split else 1) <= row["launches"] <= most
        assert ("original" in row["times"]) <= ("of_original" in row["goal"])
        name, reached = row["case"].split("-")[0], row["times"]["cusru"]["of_ceiling"]
        if "of_plain" in row["goal"]:
            version = name if name == "v1" else "v2"
            assert row["of_plain"] == reached / plain[version, row["pass"], row["save_every"], *row["shape"]]
        else:
            plain[name, row["pass"], row["save_every"], *row["shape"]] = reached
    text = (out / "report.md").read_text()
    assert report.SIMULATED in text
    assert "## The host: the driver replaced by nothing" in text
    for row in rows:
        assert f"| {row['case']} | {', '.join(map(str, row['shape']))} | {row['dtype']} | {row['pass']} |" in text
    for private in (str(ROOT), str(tmp_path), sys.prefix, socket.gethostname()):
        assert private not in text + json.dumps(found)


def test_bandwidth_counts_bytes_read_and_written(simulated: measuring.Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find", lambda simulate: simulated)
    monkeypatch.setattr(simulated, "time", lambda call: 1e-3)
    rows = list(device.bandwidth(simulate=True, seconds=10))
    assert {row["kernel"] for row in rows} == {"copy", "stream"}
    assert all(row["gb_per_s"] == row["bytes"] / 1e-3 / 1e9 for row in rows)


@pytest.mark.parametrize("gb_per_s", [3000, 2700])
def test_a_yardstick_far_below_the_memory_s_clock_fails(
    simulated: measuring.Simulator, monkeypatch: pytest.MonkeyPatch, gb_per_s: int
) -> None:
    """An H100's 2619 MHz at 5120 bits are 3352 GB/s, of which 0.85 is 2849."""
    attributes = {"MemoryClockRate": 2_619_000, "GlobalMemoryBusWidth": 5120}
    driver = SimpleNamespace(cuda=SimpleNamespace(Device=lambda: SimpleNamespace(attributes=attributes)))
    monkeypatch.setattr(simulated, "cupy", driver, raising=False)
    monkeypatch.setattr(device, "find", lambda simulate: simulated)
    monkeypatch.setattr(simulated, "time", lambda call: 2**16 / gb_per_s / 1e9)
    monkeypatch.setattr(device, "_yardsticks", lambda simulate, here: iter([{"kernel": "copy", "gb_per_s": gb_per_s}]))
    row = list(device.bandwidth(simulate=True, seconds=10))[-1]
    assert row["datasheet_gb_per_s"] == pytest.approx(3352, abs=1)
    assert row["reached"] == pytest.approx(gb_per_s / 3352, rel=1e-3)
    assert ("failed" in row) == (gb_per_s == 2700)


def test_the_goals_are_cases_that_differ_from_the_plain_one_in_one_thing() -> None:
    plain = {(goal.case.name, goal.dtype): goal.case for goal in cases.GOALS}
    assert {row for goal in cases.GOALS if not goal.of_plain for row in goal.row.split(", ")} == {str(n) for n in range(1, 14)}
    for goal in cases.GOALS:
        assert goal.case.save_every == 32
        if goal.of_plain or goal.case.name.startswith("v2-bias"):
            version = "v1" if goal.case.weight_c == "none" else "v2"
            base = plain[f"{version}-{'x'.join(map(str, goal.case[1:4]))}", goal.dtype]
            assert sum(a != b for a, b in zip(goal.case[4:], base[4:], strict=True)) == 1, goal
    assert len({(goal.case, goal.dtype) for goal in cases.GOALS}) == len(cases.GOALS)


def test_a_goal_may_be_of_either_pass() -> None:
    case = cases.CASES["small"]
    goal = cases.Goal("1", case, "float32", of_ceiling=(0.4, 0.7), of_original=(4, None), launches=2)
    assert goal.wanted(backward=False) == {"of_ceiling": 0.4, "of_original": 4, "launches": 2}
    assert goal.wanted(backward=True) == {"of_ceiling": 0.7, "launches": 2}


def test_values_of_large_cases_are_repeated_and_small_ones_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.Case("some", 10, 2, 8, bias=2.0, weight_c="column")
    drawn = cases.make(case, "float32")
    assert abs(drawn["bias"][0].mean() - 2) < 0.2
    assert abs(drawn["bias"][1].mean()) < 0.2
    assert np.unique(drawn["u"]).size == drawn["u"].size
    monkeypatch.setattr(cases, "PERIOD", 101)
    repeated = cases.make(case, "float32")["u"]
    assert repeated.shape == drawn["u"].shape
    np.testing.assert_array_equal(repeated.ravel()[:101], drawn["u"].ravel()[:101])
    np.testing.assert_array_equal(repeated.ravel()[101:202], repeated.ravel()[:101])


@needs_compiler
def test_a_picture_is_drawn(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason='matplotlib is missing: pip install ".[examples]"')
    assert report.picture(a_report(), tmp_path / "bandwidth.png")
    pixels = image.imread(tmp_path / "bandwidth.png")
    assert pixels.shape[0] > 500
    assert pixels.std() > 0.05
    assert not report.picture({**a_report(), "steps": {}}, tmp_path / "none.png")


@needs_compiler
def test_a_step_that_fails_is_reported_and_the_next_goes_on(tmp_path: Path) -> None:
    """No kernel compiles here, so each step fails in its own process."""
    environment = dict(CUSRU_SIMULATE_FLAGS="-no-such-flag", CUSRU_CACHE_DIR=str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    done = run("benchmarks.device", "--simulate", "--out", str(tmp_path), "--only", "bandwidth", "--only", "table", **environment)
    assert done.returncode == 1
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert {steps[name]["status"] for name in ("bandwidth", "table")} == {"failed"}
    assert "no-such-flag" in json.dumps(steps["bandwidth"])
    assert len(steps["table"]["rows"]) == sum(len(case.dtypes) for case in cases.SMALL), "nor does a case stop the next"
    assert "no-such-flag" in done.stdout, "nor does one have to open the report to know"
    text = (tmp_path / "report.md").read_text()
    assert "failed: small, float64" in text
    for private in (str(ROOT), str(tmp_path), sys.prefix, socket.gethostname()):
        assert private not in text + json.dumps(steps)


@needs_compiler
def test_a_step_out_of_time_keeps_what_it_had_found(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "import json, time\nprint(json.dumps({'case': 1}), flush=True)\nprint('{half', end='', flush=True)\ntime.sleep(100)"
    start = device._start
    monkeypatch.setattr(
        device, "_start", lambda command, simulate, **files: start([sys.executable, "-c", endless], simulate, **files)
    )
    begin = time.monotonic()
    step = device.run_step("table", simulate=True, seconds=2)
    assert time.monotonic() - begin < 20
    assert step["status"] == "out of time"
    assert step["rows"] == [{"case": 1}]


def test_what_a_step_started_ends_with_it() -> None:
    """Even if it pays no heed to an interrupt: the pipe that it held is closed."""
    ours, theirs = os.pipe()
    child = f"import os, signal, time; signal.signal(2, signal.SIG_IGN); os.write({theirs}, b'up'); time.sleep(100)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], close_fds=False)"
    process = device._start([sys.executable, "-c", parent], True, pass_fds=(theirs,))
    os.close(theirs)
    assert os.read(ours, 2) == b"up"
    device._end(process)
    assert os.read(ours, 2) == b""
    os.close(ours)


def test_without_a_device_nothing_is_run(tmp_path: Path) -> None:
    if missing("gpu") is None:
        pytest.skip("there is a CUDA device")
    done = run("benchmarks.device", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "--simulate" in done.stderr
    assert "CuPy" in done.stderr or "CUDA" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, why in ((["--out", str(tmp_path / "file" / "below")], "--out"), ([], "--out is needed")):
        done = run("benchmarks.device", "--simulate", *out)
        assert done.returncode == 2
        assert why in done.stderr


def a_report() -> dict[str, Any]:
    """As from a GPU, with made-up figures."""

    def times(**seconds: float) -> dict[str, dict[str, float]]:
        return {
            who: {"seconds": s, "gb_per_s": 1 / s, "of_copy": 0.9e-3 / s, "of_ceiling": 0.8e-3 / s} for who, s in seconds.items()
        }

    def passed(case: str, cache: str, **seconds: float) -> dict[str, Any]:
        row = {"case": case, "shape": [4, 2, 8], "dtype": "float32", "cache": cache, "times": times(**seconds)}
        return {**row, "pass": "forward"}

    rows = {
        "tests": [{"test": "tests/a.py::b[gpu]", "outcome": "passed"}, {"test": "tests/a.py::c[gpu]", "outcome": "failed"}],
        "sanitizer": [{"tool": "memcheck", "passes_run": 36, "summary": "ERROR SUMMARY: 0 errors", "seconds": 1}],
        "bandwidth": [{"kernel": "stream", "read_share": 0.6, "bytes": 2**29, "gb_per_s": 3000.4}],
        "table": [
            passed("wide", "cold", cusru=1e-3, original=4e-3), passed("narrow", "cold", cusru=2e-3),
            passed("wide", "warm", cusru=0.5e-3), {"case": "huge", "dtype": "float32", "failed": "MemoryError: 1 | 2"},
        ],
        "goals": [
            {
                **passed("v2-512x32x512", "cold", cusru=1e-3, original=4e-3), "row": "3, 5", "save_every": None, "launches": 1,
                "goal": {"of_ceiling": 0.95, "of_original": 2},
            },
            {
                **passed("padding-512x32x512", "cold", cusru=1e-3), "row": "3", "save_every": 32, "launches": 1,
                "goal": {"of_plain": 0.9}, "of_plain": 0.875,
            },
            {"case": "v1-4x2x8", "dtype": "float32", "failed": "MemoryError"},
        ],
        "peers": [
            {
                "case": "wide", "shape": [4, 2, 8], "dtype": "float32", "peer": "lstm", "pass": "backward", "seconds": 0.5,
                "gb_per_s": 2, "of_copy": 0.1,
            },
            {"case": "wide", "dtype": "float32", "peer": "scan", "skipped": "not there"},
        ],
    }  # fmt: skip
    steps = {name: {"status": "ok", "seconds": 1.5, "rows": found} for name, found in rows.items()}
    environment = {"device": "A GPU (cuda:0)", "driver": "580.1", "CUDA": "driver 13.0", "CuPy": "14.2.0"}
    return {
        "simulated": False, "date": "2026-01-02T03:04:05+00:00", "command": "python -m benchmarks.device --out DIR",
        "environment": environment, "seconds": 400.2, "steps": steps, "picture": "bandwidth.png",
    }  # fmt: skip


def test_the_report_shows_each_figure() -> None:
    text = report.markdown(a_report())
    for line in (
        "# cusru on A GPU (cuda:0)", "- driver: 580.1", "- CuPy: 14.2.0", "1 passed, 1 failed.", "- failed: `tests/a.py::c[gpu]`",
        "| memcheck | 36 | ERROR SUMMARY: 0 errors |", "| 512 | 3000 |", "## Passes, L2 cold", "## Passes, L2 warm",
        "| wide | 4, 2, 8 | float32 | forward | 1 | 1000 | 0.9 | 0.8 | 4 | 4.00 |",
        "| narrow | 4, 2, 8 | float32 | forward | 2 | 500 | 0.45 | 0.4 |  |  |", "- failed: huge, float32: MemoryError: 1 | 2",
        "| wide | 4, 2, 8 | float32 | lstm | backward | 500 | 2 | 0.1 |", "- scan: not there",
        "| 3, 5 | 4, 2, 8 | float32 | v2 | None | forward | 1000 | 1250 | 0.8 / 0.95 | 4 / 2 |  | 1 |",
        "| 3 | 4, 2, 8 | float32 | padding | 32 | forward | 1000 | 1250 | 0.8 |  | 0.875 / 0.9 | 1 |",
        "- failed: v1-4x2x8, float32: MemoryError",
        "![fraction of the ceiling](bandwidth.png)",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert report.SIMULATED not in text


def test_the_tests_step_reads_pytest_with_and_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "tests/test_a.py::test_b[gpu] PASSED                    [  1%]",
        "[gw1] [  2%] FAILED tests/test_a.py::test_c[gpu-x] ",
        "tests/test_a.py::test_d SKIPPED (no CUDA device)       [  3%]",
        "tests/test_a.py::test_d[no c0] PASSED                  [  3%]",
        "[gw1] [  2%] PASSED tests/test_a.py::test_c[over a long block] ",
        "[gw0] [ 50%] ERROR tests/test_a.py::test_e ",
        "===== short test summary info =====",
        "FAILED tests/test_a.py::test_c[gpu-x] - AssertionError: h differs",
        "===== 1 passed in 3 s =====",
    ]
    process = SimpleNamespace(stdout=iter(line + "\n" for line in lines), wait=lambda: 1)
    monkeypatch.setattr(device.subprocess, "Popen", lambda *_, **__: process)
    rows = list(device.tests(simulate=True, seconds=10))
    assert [(row["test"], row["outcome"]) for row in rows if "outcome" in row] == [
        ("tests/test_a.py::test_b[gpu]", "passed"), ("tests/test_a.py::test_c[gpu-x]", "failed"),
        ("tests/test_a.py::test_d", "skipped"), ("tests/test_a.py::test_d[no c0]", "passed"),
        ("tests/test_a.py::test_c[over a long block]", "passed"), ("tests/test_a.py::test_e", "error"),
    ]  # fmt: skip
    assert rows[6] == {"test": "tests/test_a.py::test_c[gpu-x]", "reason": "AssertionError: h differs"}
    assert rows[7]["failed"] == "pytest exited with 1"


def test_a_sanitizer_s_finding_fails_the_step() -> None:
    def watched(code: str, seconds: float = 20) -> dict[str, Any]:
        return device._watched("memcheck", [sys.executable, "-c", code], seconds)

    row = watched("print('{}'); print('========= ERROR SUMMARY: 3 errors'); raise SystemExit(99)")
    assert row["failed"] == "exit status 99"
    assert row["summary"] == "ERROR SUMMARY: 3 errors"
    assert row["passes_run"] == 1
    assert "failed" not in watched("print('{}')")
    assert watched('print(\'{"failed": "not finite"}\')')["failed"] == "not finite"
    assert watched("print('nothing was run')")["failed"] == "exit status 0"


def test_a_sanitizer_out_of_time_ends_with_what_it_has_started(tmp_path: Path) -> None:
    """Even if that holds its output and pays no heed."""
    number = tmp_path / "pid"
    child = (
        f"import os, signal, time; open({str(number)!r}, 'w').write(str(os.getpid())); signal.signal(2, signal.SIG_IGN); "
        "print('{}', flush=True); time.sleep(100)"
    )
    begin = time.monotonic()
    row = device._watched(
        "racecheck", [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"], 2
    )
    assert row["failed"] == "out of time after 2 s"
    assert row["passes_run"] == 1
    assert time.monotonic() - begin < 20
    of_child = Path("/proc", number.read_text(), "cmdline")
    assert not of_child.exists() or of_child.read_bytes() == b"", "ended, if perhaps not yet waited for"


@needs_compiler
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_found_is_kept_when_it_is_ended_from_outside(tmp_path: Path, number: signal.Signals) -> None:
    only = ["--only", "bandwidth", "--only", "tests", "--only", "table"]
    command = [sys.executable, "-m", "benchmarks.device", "--simulate", "--out", str(tmp_path), *only]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout
        while not run.stdout.readline().startswith("bandwidth"):
            pass
        time.sleep(1)
        run.send_signal(number)
        said, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "tests       interrupted" in said
    assert "Traceback" not in errors
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert [step["status"] for step in steps.values()] == ["ok", "interrupted", "not run"]
    assert "| table | not run |" in (tmp_path / "report.md").read_text()


def test_each_part_takes_less_than_nine_minutes_and_both_less_than_twelve() -> None:
    """With a minute for what the environment's step, the ends of steps and the picture take besides."""
    parts = [sum(part.values()) for part in device.PARTS.values()]
    assert max(parts) + 60 < 9 * 60
    assert sum(parts) + 60 < 12 * 60


def test_the_second_part_adds_to_the_report_of_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In either order, and again; not to that of another device, nor to what is no report."""
    here = {"device": "A GPU"}
    row = {"test": "tests/a.py::b", "outcome": "passed"}

    def step(name: str, simulate: bool, seconds: float) -> dict[str, Any]:
        return {"status": "ok", "seconds": 1.0, "rows": [here if name == "environment" else row]}

    def steps() -> dict[str, Any]:
        return json.loads((tmp_path / "report.json").read_text())["steps"]

    monkeypatch.setattr(device, "run_step", step)
    monkeypatch.setattr(device.signal, "signal", lambda *_: None)
    out = ["--simulate", "--out", str(tmp_path)]
    first, second = map(list, device.PARTS.values())
    for part, has in (
        ("correctness", first),
        ("speed", second + first),
        ("correctness", first + second),
        ("speed", second + first),
    ):
        assert device.main([part, *out]) == 0
        assert [name for name in steps() if name != "picture"] == has
        assert "![" not in (tmp_path / "report.md").read_text(), "no picture was drawn"
    text = (tmp_path / "report.md").read_text()
    assert text.count("- command: `python -m benchmarks.device") == 2
    assert "1 passed." in text
    found = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**found, "picture": device.PICTURE}))
    for part, kept in (("correctness", True), ("speed", False)):  # which draws its own
        (tmp_path / device.PICTURE).touch()
        assert device.main([part, *out]) == 0
        assert (tmp_path / device.PICTURE).exists() == ("![" in (tmp_path / "report.md").read_text()) == kept
    here = {"device": "Another GPU"}
    assert device.main(["speed", *out]) == 0
    assert [name for name in steps() if name != "picture"] == second
    (tmp_path / "report.json").write_text("[]")
    assert device.main(["correctness", *out]) == 0
    assert list(steps()) == first
    with pytest.raises(SystemExit):
        device.main(["speed", "--only", "host", *out])


# What racecheck prints of a byte, by its manual.
HAZARD = """========= Error: Potential RAW hazard detected at __shared__ 0x{address:x} in block (0,0,0) :
=========     Write Thread ({first},0,0) at {kernel}+0x210{line}
=========     Read Thread ({later},0,0) at {kernel}+0x150{line}
=========     Current Value : 35, Incoming Value : 2{mention}
=========
"""


def racecheck(tool: str, *hazards: dict[str, Any], step: str = "") -> dict[str, Any]:
    """A run of which racecheck prints these hazards of two bytes each."""
    one = {"kernel": "cusru_forward", "first": 3, "later": 35, "line": "", "mention": ""}
    text = step + "".join(HAZARD.format(**{**one, **hazard}, address=byte) for hazard in hazards for byte in range(2))
    text += f"========= RACECHECK SUMMARY: {len(hazards)} hazards displayed ({len(hazards)} errors, 0 warnings)\n{{}}\n"
    code = f"import sys; sys.stdout.write({text!r}); sys.exit({99 if hazards else 0})"
    return device._watched(tool, [sys.executable, "-c", code], 20)


COPY = " (invalid memcpy_async synchronization)"
PLANTED = [{"kernel": f"{form}_planted"} for form in device.FORMS]


@pytest.mark.parametrize(
    ("right", "of_kernels", "end"),
    [
        pytest.param([], [], "clean", id="it knows all, and finds nothing"),
        pytest.param([], [{}], "failed", id="it knows all, and finds a race"),
        pytest.param([{"kernel": "ring_right"}], [{}], "doubted", id="it does not know the barrier"),
        pytest.param([{"kernel": "ring_right"}], [{}, {"first": 34}], "failed", id="but within a warp there is none"),
        pytest.param([{"kernel": "ring_right"}], [{"mention": COPY}], "failed", id="nor does that excuse a copy"),
        pytest.param([{"kernel": "copy_right", "mention": COPY}], [{"mention": COPY}], "doubted", id="it does not know the copy"),
        pytest.param([{"kernel": "sync_right"}], [{}], "failed", id="a form that no kernel has"),
    ],
)
def test_racecheck_s_word_counts_where_it_is_right_about_hand_overs(
    right: list[dict[str, Any]], of_kernels: list[dict[str, Any]], end: str
) -> None:
    tried = device.judge(racecheck("racecheck, hand-overs", *right, *PLANTED))
    assert "failed" not in tried, "the planted races are to be found"
    assert tried["reports"] == {form: [f"{form}_right" in str(right), True] for form in device.FORMS}
    row = device.believe(racecheck("racecheck", *of_kernels), tried)
    assert [key for key in ("failed", "doubted") if key in row] == [end] * (end != "clean")
    if end == "failed":
        assert row["hazards"][0] in racecheck("racecheck", of_kernels[-1])["hazards"], "the one that is not explained, first"


def test_a_clean_racecheck_that_misses_planted_races_is_doubted() -> None:
    tried = device.judge(racecheck("racecheck, hand-overs", *PLANTED[1:]))
    row = device.believe(racecheck("racecheck"), tried)
    assert "failed" not in row
    assert "planted in hand-overs (arrive)" in row["doubted"]


def test_a_hazard_is_shown_with_its_accesses_its_lines_and_its_case() -> None:
    lines = raw_kernels.source().splitlines()
    number = next(n for n, line in enumerate(lines) if "barrier_arrive(BARRIER + to, 64);" in line)
    step = '{"case": "small", "pass": "forward"}\n{"case": "small", "pass": "backward"}\n'
    row = racecheck("racecheck", {"line": f" in sru.cu:{number}"}, step=step)
    (one,) = row["hazards"]
    assert one["at"] == f"Write cusru_forward+0x210 in sru.cu:{number}, Read cusru_forward+0x150 in sru.cu:{number}"
    assert (one["bytes"], one["threads"], one["address"], one["across_warps"], one["copy"]) == (2, "3, 35", "0x0", True, False)
    assert one["lines"] == ["barrier_arrive(BARRIER + to, 64);"] * 2
    tried = device.judge(racecheck("racecheck, hand-overs", {"kernel": "arrive_right"}, *PLANTED))
    rows = [tried, device.believe(row, tried)]
    text = report.markdown({**a_report(), "steps": {"sanitizer": {"status": "ok", "seconds": 1, "rows": rows}}})
    assert "| arrive | yes | yes |" in text.splitlines()
    assert "| ring | no | yes |" in text.splitlines()
    assert "racecheck does not know this barrier" in text
    assert "2 bytes, threads 3, 35, shared 0x0: Write cusru_forward+0x210" in text


@needs_compiler
def test_the_hand_overs_are_right_and_the_planted_races_are_races(tmp_path: Path) -> None:
    """By ThreadSanitizer, in the simulator: what racecheck is judged by."""
    found = subprocess.run([simulator.compiler(), "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    if not os.path.isabs(library := found.stdout.strip()):
        pytest.skip("this compiler comes without libtsan.so")
    environment = {
        **os.environ, "CUSRU_SIMULATE": "1", "CUSRU_SIMULATE_FLAGS": "-fsanitize=thread -g -O1", "LD_PRELOAD": library,
        "TSAN_OPTIONS": "halt_on_error=0 exitcode=66", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    command = [*prefix, sys.executable, *device._program("hand_overs", True)[1:]]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    raced, kernels = False, []
    for line in done.stdout.splitlines():
        raced |= "data race" in line
        if line.startswith("{"):
            row = json.loads(line)
            assert "failed" not in row
            assert raced == row["kernel"].endswith("_planted"), row
            kernels.append(row["kernel"])
            raced = False
    assert kernels == [kernel for form in device.FORMS for kernel in device._kernels_of(form)], done.stdout[-4000:]


NCU = """#!{python}
import json
print('==PROF== Connected')
for launches, direction in ((1, 'forward'), (2, 'backward')):
    print(json.dumps(dict(row='1', case='v1-4x2x8', shape=[4, 2, 8], dtype='bfloat16', save_every=32, launches=launches,
                          floor_bytes=1000, **{{'pass': direction}})))
print({said!r})
print({csv!r})
"""


def a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: int, said: str = "") -> list[dict[str, Any]]:
    """By a stand-in for ncu, which prints such a table."""
    figures = dict.fromkeys(device.METRICS, 10.0)
    figures |= {"gpu__time_duration.sum": 2000.0, "dram__bytes_read.sum": 500.0, "launch__registers_per_thread": 168.0}
    heads = ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *figures))
    lines = [heads, ",".join('""' for _ in range(2 + len(figures)))]
    for i in range(kernels):
        values = {**figures, "smsp__inst_executed.sum": 1000.0 * (i + 1)}
        lines.append(",".join([f'"{i}"', '"cusru"', *(f'"{value:,}"' for value in values.values())]))
    (tmp_path / "ncu").write_text(NCU.format(python=sys.executable, said=said, csv="\n".join(lines)))
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return list(device.profile(simulate=False, seconds=20))


def test_what_ncu_counts_is_told_by_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, forward, backward = a_profile(tmp_path, monkeypatch, kernels=3)
    assert "failed" not in row
    assert (forward["us"], forward["dram_bytes"], forward["instructions"], forward["cycles_a_step"]) == (2, 510, 1000, 2.5)
    assert (backward["us"], backward["dram_bytes"], backward["instructions"], backward["registers"]) == (4, 1020, 5000, 168)
    steps = {"profile": {"status": "ok", "seconds": 1, "rows": [row, forward, backward]}}
    text = report.markdown({**a_report(), "steps": steps})
    assert "| 1 | 4, 2, 8 | bfloat16 | v1 | 32 | backward | 4 | 10.0 | 1.020 | 5.0 | 5000 | 168 |" in text.splitlines()


def test_without_ncu_or_its_permission_the_step_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = a_profile(tmp_path, monkeypatch, kernels=0, said="==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    assert row == {"tool": "ncu", "skipped": "not permitted: ERR_NVGPUCTRPERM"}
    assert a_profile(tmp_path, monkeypatch, kernels=2)[0]["failed"] == "ncu saw 2 kernels of 3"
    monkeypatch.setattr(device.shutil, "which", lambda name, path=None: None)
    assert list(device.profile(simulate=False, seconds=20)) == [{"tool": "ncu", "skipped": "not installed"}]
    text = report.markdown({**a_report(), "steps": {"profile": {"status": "skipped", "seconds": 1, "rows": [row]}}})
    assert "ncu: not permitted: ERR_NVGPUCTRPERM." in text


def test_what_is_run_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that only a GPU can try: pytest's, and the sanitizers', whose findings must not end in status 0."""
    commands: list[list[str]] = []
    process = SimpleNamespace(stdout=iter(()), wait=lambda: 0)
    monkeypatch.setattr(device.subprocess, "Popen", lambda command, **_: commands.append(command) or process)
    monkeypatch.setattr(device, "_workers", lambda simulate: 3)
    list(device.tests(simulate=False, seconds=10))
    assert commands[0][commands[0].index("-m", 3) + 1] == "gpu and not long"
    monkeypatch.setattr(device.shutil, "which", lambda name, path=None: f"/bin/{name}")
    monkeypatch.setattr(device, "_watched", lambda tool, command, seconds: {"tool": tool, "command": command, "seconds": seconds})
    rows = list(device.sanitizer(simulate=False, seconds=60))
    assert [row["tool"] for row in rows] == ["none", "racecheck, hand-overs", "memcheck", "racecheck", "initcheck"]
    for row in rows[1:]:
        tool = row["tool"].split(",")[0]
        assert row["command"][:5] == ["/bin/compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
        assert ("--report-api-errors" in row["command"]) == (tool == "memcheck")
        assert ("--racecheck-report" in row["command"]) == (tool == "racecheck")
        assert row["command"][-2:] == ["--step", "small" if tool == row["tool"] else "hand_overs"]
    assert rows[2]["seconds"] == pytest.approx(20, abs=1), "a third of what is left"


def test_a_sanitizer_that_is_not_there_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the step's status nor in the report does it look as if it had found nothing."""
    monkeypatch.setattr(device.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(device, "_watched", lambda tool, command, seconds: {"tool": tool, "passes_run": 36, "seconds": 1.0})
    rows = list(device.sanitizer(simulate=False, seconds=60))
    printed = "\n".join(json.dumps(row) for row in rows)
    start = device._start
    monkeypatch.setattr(device, "_start", lambda _, simulate, **files: start(["echo", printed], simulate, **files))
    step = device.run_step("sanitizer", simulate=False, seconds=10)
    assert step["status"] == "skipped"
    assert step["why"] == "compute-sanitizer: not installed"
    text = report.markdown({**a_report(), "steps": {"sanitizer": step}})
    assert "| compute-sanitizer | 0 | not installed |" in text.splitlines()


def test_names_of_this_computer_stay_out_of_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "ROOT", Path("/somewhere/cusru"))
    monkeypatch.setattr(device.sys, "prefix", "/usr")
    monkeypatch.setattr(device.socket, "gethostname", lambda: "secret-host")
    monkeypatch.setenv("CUSRU_CACHE_DIR", "/var/my/cache")
    for home, text, clean in (
        ("/home/me", "/somewhere/cusru/a.py /home/me/b /usr/local/cuda on secret-host", "./a.py ~/b /usr/local/cuda on <host>"),
        ("/", "a/b /somewhere/cusru-2/c /var/my/cache/x.so", "a/b /somewhere/cusru-2/c <cache>/x.so"),
    ):
        monkeypatch.setattr(device.Path, "home", lambda home=home: Path(home))
        assert device._anonymous(text) == clean

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(device.Path, "home", homeless)
    assert device._anonymous("/home/me") == "/home/me"


def test_a_device_that_is_lost_ends_its_step_once(monkeypatch: pytest.MonkeyPatch, simulated: measuring.Simulator) -> None:
    """After an illegal access every call fails; without memory only this one does."""
    for name, rows in (("cudaErrorIllegalAddress", 1), ("cudaErrorMemoryAllocation", sum(len(c.dtypes) for c in cases.SMALL))):
        kind = type("CUDARuntimeError", (RuntimeError,), {"__module__": "cupy_backends.cuda.api.runtime"})

        def fail(*_: Any, kind: Any = kind, name: str = name) -> None:
            raise kind(name)

        monkeypatch.setattr(device, "Workload", fail)
        assert len(list(device.table(simulate=True, seconds=10))) == rows
