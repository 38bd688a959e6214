"""`python -m benchmarks.device [correctness | speed] --out DIR`: all that only a GPU can show, in less than twelve minutes, or as
two commands of less than nine, of which the second adds to what the first has left in DIR.

correctness
    tests       pytest -m gpu tests
    sanitizer   compute-sanitizer's memcheck, racecheck and initcheck on the small cases, where it is installed, and before
                that racecheck on hand-overs between warps that are right and that are not (hand_over.cu)
speed
    bandwidth   a device-to-device copy, and a kernel that reads and writes in the mixes of the passes; the fastest is to reach
                0.85 of what the memory's clock and width allow, or the step has failed
    goals       the cases that have a goal (cases.GOALS): how much of it is reached, L2 cold
    profile     what ncu counts of those that have one in bandwidth, where it is installed and permitted
    table       the table of cases, forward and backward, with cold and with warm L2, beside the original SRU's design
    host        what the Python before a kernel takes, and its share of the kernel's time (host.py)
    layers      one layer, forward and backward, beside LSTM, GRU and convolutions, by torch (layers.py)
    peers       other packages' recurrences, where they can be imported (peers.py)

Each step is a process of its own with a share of the time: one that fails, crashes or is out of time is reported, with what it
had found, and the next goes on. DIR receives report.json, report.md and bandwidth.png. The exit status is 1 if a step failed.

With --simulate the simulator stands in for the device, with the small cases: to try the command, not to measure.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import cases, peers
from benchmarks import host as on_host
from benchmarks import layers as one_layer
from benchmarks import report as reports
from benchmarks.workload import PASSES, Workload
from cusru import measuring, raw_kernels
from cusru.measuring import Floor, address

ROOT = Path(__file__).parent.parent
PARTS = {  # what one step leaves of its seconds, the next may use
    "correctness": {"tests": 190, "sanitizer": 70},
    "speed": {"bandwidth": 10, "goals": 145, "profile": 50, "table": 75, "host": 20, "layers": 35, "peers": 64},
}
SECONDS = {**PARTS["correctness"], **PARTS["speed"]}
SANITIZERS = ("memcheck", "racecheck", "initcheck")
FOUND = 99  # the exit status of a sanitizer that has found something
HAND_OVER = Path(__file__).with_name("hand_over.cu")
FORMS = {  # of a hand-over; in the ring a slot's second use follows on its first by way of the other warps alone
    "arrive": {"WARPS": 2, "TURNS": 2, "GIVER_WAITS": 0, "BY_COPY": 0},
    "sync": {"WARPS": 2, "TURNS": 2, "GIVER_WAITS": 1, "BY_COPY": 0},
    "copy": {"WARPS": 2, "TURNS": 2, "GIVER_WAITS": 0, "BY_COPY": 1},
    "ring": {"WARPS": 4, "TURNS": 12, "GIVER_WAITS": 0, "BY_COPY": 0},
}
METRICS = (
    "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed", "sm__cycles_elapsed.max", "smsp__inst_executed.sum",
    "launch__registers_per_thread",
)  # fmt: skip
PICTURE = "bandwidth.png"
PEER_CASES = ("square", "wide", "narrow")
Row = dict[str, Any]


# ---- the steps: each yields rows, in a process of its own --------------------------------------------------------------


def find(simulate: bool) -> measuring.Machine:
    return measuring.find("simulator" if simulate else "gpu")


def tests(simulate: bool, seconds: float) -> Iterator[Row]:
    """One row a test, as pytest reports it."""
    command = [sys.executable, "-m", "pytest", "tests", "-v", "-p", "no:cacheprovider", "--color=no", "--tb=short"]
    command += ["-m", "not long", "-k", "simulator and small_cases"] if simulate else ["-m", "gpu and not long"]
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401

        command += ["-n", str(_workers(simulate))]
    wide = {**os.environ, "COLUMNS": "400"}  # the summary cuts its reasons to this
    run = subprocess.Popen(command, cwd=ROOT, env=wide, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout
    tail: list[str] = []
    ended = "PASSED|FAILED|ERROR|SKIPPED"
    for line in run.stdout:
        tail = [*tail[-60:], line.rstrip()]
        if found := re.match(r"(?:FAILED|ERROR) (tests/.+?) - (.*)", line):  # of the summary at the end
            yield {"test": found[1], "reason": found[2]}
        elif found := re.search(rf"\] ({ended}) (tests/.+?)\s*$|^(tests/.+?) ({ended})\b", line):
            yield {"test": found[2] or found[3], "outcome": (found[1] or found[4]).lower()}
    if status := run.wait():
        yield {"failed": f"pytest exited with {status}", "tail": tail}


def _workers(simulate: bool) -> int:
    """Processes that the tests are shared among: each may hold some 20 GiB of the device's memory."""
    most = min(os.cpu_count() or 1, 4)
    if simulate:
        return most
    import cupy

    return max(1, min(most, cupy.cuda.runtime.memGetInfo()[0] // (20 << 30)))


def small(simulate: bool, seconds: float) -> Iterator[Row]:
    """The small cases, once each: what the sanitizers watch. Without CuPy's pool, in which a stray access meets other arrays."""
    here = _watchable(simulate)
    for case, dtype in _each(cases.SMALL):
        work = Workload(here, case, dtype)
        for direction in PASSES:
            work.run(direction)
            results = {name: here.get(a) for name, a in work.results[direction]._asdict().items() if a is not None}
            wrong = [name for name, a in results.items() if not math.isfinite(float(abs(a.astype("f8")).sum()))]
            row = {"case": case.name, "dtype": dtype, "pass": direction}
            yield {**row, "failed": f"not finite: {wrong}"} if wrong else row


def _watchable(simulate: bool) -> measuring.Machine:
    """A machine for programs under a sanitizer: no pool, and kernels whose instructions know their line."""
    if not simulate:
        import cupy

        cupy.cuda.set_allocator(None)
        options = raw_kernels.options
        raw_kernels.options = lambda kernel: (*options(kernel), "-lineinfo")
    return find(simulate)


def hand_overs(simulate: bool, seconds: float) -> Iterator[Row]:
    """Each form of a hand-over once, right and then with a race planted in it."""
    here = _watchable(simulate)
    given = np.arange(1, 33, dtype="i4")
    source, target = here.put(given), here.put(np.zeros_like(given))
    args = np.zeros((), [("from", "u8"), ("to", "u8")])
    args["from"], args["to"] = address(source), address(target)
    for form, macros in FORMS.items():
        for planted, name in enumerate(_kernels_of(form)):
            here.launch(HAND_OVER, name, {**macros, "PLANTED": planted, "NAME": name}, 1, 32 * macros["WARPS"], args)
            right = planted or np.array_equal(here.get(target), given * macros["TURNS"])
            yield {"kernel": name} if right else {"kernel": name, "failed": f"{name}: what was given did not arrive"}


def _kernels_of(form: str) -> tuple[str, str]:
    return f"{form}_right", f"{form}_planted"


def sanitizer(simulate: bool, seconds: float) -> Iterator[Row]:
    """The program first by itself, which compiles its kernels; then under each tool."""
    end = time.monotonic() + seconds
    program, small_ones = (_program(step, simulate) for step in ("small", "hand_overs"))
    yield _watched("none", program, seconds)
    if simulate:
        yield _watched("none, hand-overs", small_ones, end - time.monotonic())
        return
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not found:
        yield {"tool": "compute-sanitizer", "passes_run": 0, "skipped": "not installed"}
        return

    def command(tool: str) -> list[str]:
        options = [found, "--tool", tool, "--error-exitcode", str(FOUND)]
        if tool == "memcheck":  # CuPy asks the driver things that it may refuse: no fault of a kernel
            options += ["--report-api-errors", "no"]
        elif tool == "racecheck":  # each byte's hazard, since only these name their threads, and what else there is of them
            options += ["--racecheck-report", "all", "--print-limit", "20000", "--show-backtrace", "no"]
        return options

    tried = _watched("racecheck, hand-overs", [*command("racecheck"), *small_ones], (end - time.monotonic()) / 4)
    yield judge(tried)
    for left, tool in zip(range(len(SANITIZERS), 0, -1), SANITIZERS, strict=True):
        row = _watched(tool, [*command(tool), *program], (end - time.monotonic()) / left)
        yield believe(row, tried) if tool == "racecheck" else row


def judge(row: Row) -> Row:
    """racecheck's run of the hand-overs: of each form, whether it reports the right kernel, and the race planted in the other;
    and what the hazards are like that it sees where there are none."""
    hazards = row.pop("hazards", [])
    row["reports"] = {form: [any(kernel in one["at"] for one in hazards) for kernel in _kernels_of(form)] for form in FORMS}
    used = [_kernels_of(form)[0] for form in FORMS if form != "sync"]  # by the kernels
    row["mistaken"] = [_like(one) for one in hazards if any(kernel in one["at"] for kernel in used)]
    if hazards and row.get("failed") == f"exit status {FOUND}":  # as it must be: races are planted
        del row["failed"], row["tail"]
    return row


def _like(hazard: Row) -> list[bool]:
    return [hazard["copy"], hazard["across_warps"]]


def believe(row: Row, tried: Row) -> Row:
    """racecheck's run of the kernels. Hazards like those that it reports of right hand-overs too do not fail it."""
    hazards, reports = row.get("hazards", []), tried["reports"]
    new = [one for one in hazards if _like(one) not in tried["mistaken"]]
    if row.get("failed") == f"exit status {FOUND}" and hazards and not new:
        del row["failed"], row["tail"]
        mistaken = ", ".join(form for form, (right, _) in reports.items() if right)
        row["doubted"] = f"racecheck does not know this barrier: it reports right hand-overs too ({mistaken}); what holds is "
        row["doubted"] += "ThreadSanitizer in the simulator (tests/test_sanitizers.py)"
    elif not hazards and (unseen := ", ".join(form for form, (_, planted) in reports.items() if not planted)):
        row["doubted"] = f"racecheck did not see the races planted in hand-overs ({unseen})"
    row["hazards"] = (new or hazards)[:6]
    return row


def _hazards(printed: str) -> list[Row]:
    """What racecheck prints of each byte's hazard, the same two accesses taken together."""
    access = r"=+\s+(Read|Write) Thread \((\d+),\d+,\d+\) at (.*)\n"
    source, passes = raw_kernels.source().splitlines(), list(_objects(printed.splitlines()))
    found: dict[tuple[Any, ...], Row] = {}
    before, *parts = re.split(r" hazard detected.*? at __shared__ ", printed)
    ended = 0  # passes
    for part in parts:
        ended += before.count("\n{") + before.startswith("{")
        before = part
        if not (two := re.match(rf"(\S+).*\n{access}{access}", part)):
            continue
        slot, kind, first, at, later_kind, later, later_at = two.groups()
        likeness = {"copy": "memcpy_async" in part, "across_warps": int(first) // 32 != int(later) // 32}
        lines = [int(number) for number in re.findall(r"sru\.cu:(\d+)", f"{at} {later_at}")]
        one = found.setdefault(
            (at, later_at, *likeness.values()),
            {
                "at": f"{kind} {at}, {later_kind} {later_at}", "threads": f"{first}, {later}", "address": slot, **likeness,
                "bytes": 0, "during": passes[min(ended, len(passes) - 1)] if passes else {},
                "lines": [source[line].strip() for line in lines if line < len(source)],
            },
        )  # fmt: skip
        one["bytes"] += 1
    return list(found.values())


def _watched(tool: str, command: list[str], seconds: float, keep: bool = False) -> Row:
    start = time.monotonic()
    row: Row = {"tool": tool}
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        run = _start(command, None, stdout=out, stderr=subprocess.STDOUT)
        try:
            run.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            row["failed"] = f"out of time after {seconds:.0f} s"
        finally:
            _end(run, patience=2)
        out.seek(0)
        printed = out.read()
    ran = list(_objects(printed.splitlines()))
    row |= {"passes_run": len(ran), "seconds": round(time.monotonic() - start, 1)}
    if summary := re.search(r"(?:ERROR|RACECHECK) SUMMARY: .*", printed):
        row["summary"] = summary[0]
    if hazards := _hazards(printed):
        row["hazards"] = hazards
    if "failed" not in row:
        wrong = [one["failed"] for one in ran if "failed" in one]
        if wrong:
            row["failed"] = wrong[0]
        elif run.returncode or not ran:
            row |= {"failed": f"exit status {run.returncode}", "tail": printed.splitlines()[-30:]}
    return row | ({"printed": printed} if keep else {})


def bandwidth(simulate: bool, seconds: float) -> Iterator[Row]:
    """GB/s of a copy, and of reading and writing in the passes' mixes, for several sizes; and whether that is the device's."""
    here, rows = find(simulate), []
    for row in _yardsticks(simulate, here):
        rows.append(row)
        yield row
    if peak := _peak(here):
        best = max(row["gb_per_s"] for row in rows)
        row = {"datasheet_gb_per_s": peak, "reached": best / peak}
        yield row if best >= 0.85 * peak else {**row, "failed": f"a fault of the run: {best:.0f} of {peak:.0f} GB/s"}


def _peak(here: Any) -> float:
    """GB/s of the device's memory: two transfers a clock, over its whole width; 0 where nothing says."""
    about = here.cupy.cuda.Device().attributes if hasattr(here, "cupy") else {}
    return 2 * about.get("MemoryClockRate", 0) * 1e3 * about.get("GlobalMemoryBusWidth", 0) / 8 / 1e9


def _yardsticks(simulate: bool, here: Any) -> Iterator[Row]:
    for size in (2**16, 2**18) if simulate else (2**25, 2**27, 2**29, 2**31):
        copy = measuring.copying(here, Floor(size // 2, size // 2))
        copy()
        yield {"kernel": "copy", "read_share": 0.5, "bytes": size, "gb_per_s": size / here.time(copy) / 1e9}
        for share in (0.5, 0.6, 2 / 3, 0.8):  # 0.6: backward; 2/3: forward, every state; 0.8: forward, no state
            call = measuring.streaming(here, Floor(int(size * share), size - int(size * share)))
            call()
            yield {"kernel": "stream", "read_share": share, "bytes": size, "gb_per_s": size / here.time(call) / 1e9}


def table(simulate: bool, seconds: float) -> Iterator[Row]:
    here = find(simulate)
    chosen = cases.SMALL if simulate else sorted(cases.BENCHMARKS, key=lambda case: case.elements)
    for case, dtype in _each(chosen):
        try:
            work = Workload(here, case, dtype)
            for direction in PASSES:
                for cache in here.caches:
                    yield work.measure(direction, cache=cache)
        except Exception as error:
            yield {"case": case.name, "dtype": dtype, "failed": _one_line(error)}
            if _lost(error):
                return
        work = None  # frees the device's memory before the next case takes its own


def _each(chosen: Iterable[cases.Case]) -> Iterator[tuple[cases.Case, str]]:
    """The cases in their dtypes, but for bfloat16 where NumPy has none."""
    return ((case, dtype) for case in chosen for dtype in case.dtypes if _there(dtype))


def _there(dtype: str) -> bool:
    return dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes") is not None


def goals(simulate: bool, seconds: float) -> Iterator[Row]:
    """What each case with a goal reaches, as inference and as training. The original design runs where a goal names it: at a
    million steps it takes seconds."""
    here = find(simulate)
    plain: dict[tuple[Any, ...], float] = {}
    for goal in _goals(simulate):
        about: Row = {}
        try:
            for work, counted in _inference_and_training(here, goal):
                for direction in work.results:
                    about = _about(goal, work, direction)
                    original = "of_original" in about["goal"]
                    row = {**work.measure(direction, cache=here.caches[0], original=original), **about}
                    row["launches"] = counted[direction]
                    reached = row["times"]["cusru"]["of_ceiling"]
                    version = "v1" if work.case.weight_c == "none" else "v2"
                    key = (version, *about["shape"], goal.dtype, direction, about["save_every"])
                    if goal.of_plain and key in plain:
                        row["of_plain"] = reached / plain[key]
                    elif re.fullmatch(r"v[12]-[\dx]+", goal.case.name):
                        plain[key] = reached
                    yield row
        except Exception as error:
            yield {**about, "case": goal.case.name, "dtype": goal.dtype, "failed": _one_line(error)}
            if _lost(error):
                return
        work = None  # as in table


def _goals(simulate: bool) -> list[cases.Goal]:
    """To try the command, small ones of each kind, in float32; of the narrow ones such as are split."""
    if simulate:
        small = {
            **dict.fromkeys(("3, 5", "6", "3"), (40, 3, 32)),
            "12": (1600, 1, 8),
            "13": (700, 1, 32),
            "v1-padding": (700, 1, 32),
        }
        chosen = [(goal, name) for goal in cases.GOALS for name in (goal.row, goal.case.name.rsplit("-", 1)[0]) if name in small]
        sizes = [dict(zip("LBD", small[name], strict=True)) for _, name in chosen]
        return [
            goal._replace(case=goal.case._replace(**of), dtype="float32") for (goal, _), of in zip(chosen, sizes, strict=True)
        ]
    return [goal for goal in cases.GOALS if _there(goal.dtype)]


def _inference_and_training(here: measuring.Machine, goal: cases.Goal) -> Iterator[tuple[Workload, dict[str, int]]]:
    """And the kernels that each pass launches. Each has run once."""
    work = None
    for case in (goal.case, goal.case._replace(save_every=None)):
        with mock.patch.object(raw_kernels, "run", wraps=raw_kernels.run) as run:
            work = Workload(here, case, goal.dtype, like=work)
        yield work, {direction: len(call.args[0]) for direction, call in zip(work.results, run.call_args_list, strict=True)}


def _about(goal: cases.Goal, work: Workload, direction: str) -> Row:
    case, wanted = work.case, goal.wanted(direction == "backward")
    return {"row": goal.row, "case": case.name, "shape": [case.L, case.B, case.D], "dtype": goal.dtype, "pass": direction,
            "save_every": case.save_every, "floor_bytes": work.floor(direction).bytes, "goal": wanted}  # fmt: skip


def profiled(simulate: bool, seconds: float) -> Iterator[Row]:
    """The passes that ncu is to look at, once each."""
    here = find(simulate)
    for goal in _goals(simulate):
        if goal.of_ceiling:
            for work, counted in _inference_and_training(here, goal):
                for direction in work.results:
                    yield {**_about(goal, work, direction), "launches": counted[direction]}


def profile(simulate: bool, seconds: float) -> Iterator[Row]:
    """What ncu counts of them, L2 cold, clocks as they are: by pass, the kernels of one taken together."""
    program = _program("profiled", simulate)
    found = None if simulate else shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if not found and not simulate:
        yield {"tool": "ncu", "skipped": "not installed"}
        return
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--kernel-name", "regex:cusru"]
    row = _watched("ncu" if found else "none", [found, *options, "--metrics", ",".join(METRICS), *program] if found else program,
                   seconds, keep=True)  # fmt: skip
    printed = row.pop("printed")
    if "ERR_NVGPUCTRPERM" in printed:
        yield {"tool": "ncu", "skipped": "not permitted: ERR_NVGPUCTRPERM"}
        return
    passes = list(_objects(printed.splitlines()))
    kernels = csv.DictReader(line for line in printed.splitlines() if line.startswith('"'))
    counted = [{name: _number(one.get(name)) for name in METRICS} for one in kernels if one["ID"]] if found else []
    if found and len(counted) != sum(one["launches"] for one in passes):
        row.setdefault("failed", f"ncu saw {len(counted)} kernels of {sum(one['launches'] for one in passes)}")
    yield row
    for one in passes if counted else ():
        mine, counted = counted[: one["launches"]], counted[one["launches"] :]
        if len(mine) == one["launches"]:
            time_of = [kernel[METRICS[0]] for kernel in mine]
            yield {
                **one, "us": sum(time_of) / 1e3, "dram_bytes": sum(kernel[METRICS[1]] + kernel[METRICS[2]] for kernel in mine),
                "dram_percent": float(np.average([kernel[METRICS[3]] for kernel in mine], weights=time_of)),
                "cycles_a_step": sum(kernel[METRICS[4]] for kernel in mine) / one["shape"][0],
                "instructions": sum(kernel[METRICS[5]] for kernel in mine),
                "registers": max(kernel[METRICS[6]] for kernel in mine),
            }  # fmt: skip


def _number(text: str | None) -> float:
    try:
        return float((text or "nan").replace(",", ""))
    except ValueError:  # n/a
        return math.nan


def _program(step: str, simulate: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.device", "--step", step, *(["--simulate"] if simulate else [])]


def _lost(error: Exception) -> bool:
    """Whether the device answers this process no more: after a kernel's fault every call fails alike."""
    return type(error).__module__.startswith("cupy_backends.") and "MemoryAllocation" not in str(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def beside(simulate: bool, seconds: float) -> Iterator[Row]:
    """Ours and the peers' times at a few shapes; GB/s of what each must move, since they do not compute the same. First the
    linear recurrences that have a goal, beside those that compute it too; at the end these in JAX, whose programs take long to
    compile."""
    here = find(simulate)
    gone: dict[str, peers.Unavailable] = {}  # what is not there needs no second try
    every = {"cusru": _ours, **{name: make for name, make in peers.PEERS.items() if name not in peers.IN_JAX}}
    in_jax = {name: make for name, make in peers.PEERS.items() if name in peers.IN_JAX}
    scans = {name: make for name, make in every.items() if name == "cusru" or name in peers.SCANS}
    for goal in _goals(simulate):
        if not goal.of_peer:
            continue
        times: dict[tuple[str, str], float] = {}
        for row in _side_by_side(simulate, here, goal.case, goal.dtype, scans, gone):
            yield row
            if row.get("lost"):
                return
            if "seconds" in row:
                times[row["peer"], row["pass"]] = row["seconds"]
        for direction in PASSES:
            theirs = {name: t for (name, of), t in times.items() if of == direction and name != "cusru"}
            if theirs and ("cusru", direction) in times:
                fastest = min(theirs, key=lambda name: theirs[name])
                about = {"case": goal.case.name, "shape": [*goal.case[1:4]], "dtype": goal.dtype, "pass": direction}
                of_peer = theirs[fastest] / times["cusru", direction]
                yield {**about, "fastest": fastest, "of_peer": of_peer, "goal": goal.wanted(direction == "backward")}
    chosen = ("small", "small-separation-k3") if simulate else PEER_CASES
    each = _each(cases.CASES[name]._replace(dtypes=("float32", "bfloat16")) for name in chosen)
    runs = [(case, dtype, every) for case, dtype in each if not simulate or dtype == "float32"]
    runs += [(goal.case, goal.dtype, in_jax) for goal in _goals(simulate) if goal.of_peer]
    for case, dtype, candidates in runs:
        for row in _side_by_side(simulate, here, case, dtype, candidates, gone):
            yield row
            if row.get("lost"):
                return


def _side_by_side(
    simulate: bool, here: measuring.Machine, case: cases.Case, dtype: str,
    candidates: dict[str, Callable[[Workload], peers.Peer]], gone: dict[str, peers.Unavailable],
) -> Iterator[Row]:  # fmt: skip
    work = None
    for name, make in candidates.items():
        row = {"case": case.name, "shape": [case.L, case.B, case.D], "dtype": dtype, "peer": name}
        peer = None
        _free_memory(simulate)
        try:
            if name in gone:
                raise gone[name]
            work = work or Workload(here, case, dtype)
            peer = make(work)
            for direction in PASSES:
                moved, seconds = getattr(peer, f"{direction}_bytes"), peers.time_of(peer, direction, here)
                copy = here.time(work.copy(Floor(moved - moved // 2, moved // 2)))
                figures = {"seconds": seconds, "bytes": moved, "gb_per_s": moved / seconds / 1e9, "of_copy": copy / seconds}
                yield {**row, "pass": direction, **figures}
        except peers.Unavailable as error:
            if error.altogether:
                gone[name] = error
            yield {**row, "skipped": str(error)}
        except Exception as error:
            ours = name in peers.OURS  # a peer that breaks is not our failure
            kind = "failed" if ours else "skipped"
            yield {**row, kind: f"it breaks: {_one_line(error)}"} | ({"lost": True} if _lost(error) else {})
            if _lost(error):
                return


def _free_memory(simulate: bool) -> None:
    """CuPy's pool and torch's do not know of one another."""
    if not simulate:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()


def _ours(work: Workload) -> peers.Peer:
    runs = (functools.partial(work.run, direction) for direction in PASSES)
    return peers.Peer(*runs, *(work.floor(direction).bytes for direction in PASSES))


def host(simulate: bool, seconds: float) -> Iterator[Row]:
    return map(on_host.as_object, on_host.rows(["launch", "torch"] if simulate else ["device", "launch", "torch"]))


def layers(simulate: bool, seconds: float) -> Iterator[Row]:
    return one_layer.rows("cpu" if simulate else "cuda", quick=simulate)


def environment(simulate: bool, seconds: float) -> Iterator[Row]:
    here = find(simulate)
    _, versions, _ = measuring.look_around()
    driver = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0].strip()
    row = {"device": here.device, "backend": here.backend, "driver": driver or "unknown", "CUDA": versions.get("CUDA", "none")}
    yield row | {name: versions[name] for name in ("cusru", "CuPy", "NumPy")} | {"Python": versions["Python"].split(",")[0]}


STEPS: dict[str, Callable[[bool, float], Iterator[Row]]] = {
    "environment": environment, "tests": tests, "sanitizer": sanitizer, "bandwidth": bandwidth, "goals": goals,
    "profile": profile, "table": table, "host": host, "layers": layers, "peers": beside,
    "small": small, "hand_overs": hand_overs, "profiled": profiled,  # programs that an outside one watches
}  # fmt: skip


# ---- running them --------------------------------------------------------------------------------------------------------


class Ended(KeyboardInterrupt):
    """By a signal from outside, to be handled as ctrl-C is."""


def run_step(name: str, simulate: bool, seconds: float) -> Row:
    """{"status": "ok", "skipped", "failed", "out of time" or "interrupted", "seconds", "rows", and "why" where it is not ok}."""
    command = [*_program(name, simulate), "--seconds", f"{seconds:.1f}"]
    start = time.monotonic()
    ended = ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        run = _start(command, simulate, stdout=out, stderr=err)
        try:
            run.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            ended = "out of time"
        except KeyboardInterrupt:
            ended = "interrupted"
        finally:
            _end(run)
        printed, errors = (_anonymous(file.read()).strip().splitlines() for file in (out, err) if file.seek(0) == 0)
    rows = list(_objects(printed))
    failures = [row["test"] for row in rows if row.get("outcome") in ("failed", "error")]
    failures = failures or [row["failed"] for row in rows if "failed" in row]
    result: Row = {"status": "ok", "seconds": round(time.monotonic() - start, 1), "rows": rows}
    if ended:
        why = f"after {result['seconds']:.0f} s; what it had found: {len(rows)} rows, {len(failures)} of them failures"
        result |= {"status": ended, "why": why}
    elif run.returncode:
        said = [line for line in errors if "rror" in line] or errors or [f"exit status {run.returncode}"]
        result |= {"status": "failed", "why": said[-1], "errors": errors[-30:]}
    elif failures:
        result |= {"status": "failed", "why": f"{len(failures)} failed, the first: {failures[0]}"}
    elif not rows:
        result |= {"status": "failed", "why": "it found nothing to run"}
    elif all(row.get("outcome") == "skipped" for row in rows):
        result |= {"status": "failed", "why": "all tests were skipped"}
    elif skipped := [f"{row['tool']}: {row['skipped']}" for row in rows if "skipped" in row and "tool" in row]:
        result |= {"status": "skipped", "why": skipped[0]}
    elif doubted := [f"{row['tool']}: {row['doubted']}" for row in rows if "doubted" in row]:
        result["why"] = doubted[0]
    return result


def _start(command: list[str], simulate: bool | None, **files: Any) -> subprocess.Popen[str]:
    """In a process group of its own. simulate: None keeps the environment."""
    environment = {**os.environ, **({} if simulate is None else {"CUSRU_SIMULATE": "1" if simulate else ""})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **files)


def _end(run: subprocess.Popen[str], patience: float = 10) -> None:
    """The whole group: interrupted, so that no lock of a build is left behind and what it has started ends too; killed if that
    does not help, or if the user will not wait for it."""
    try:
        if run.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(run.pid, signal.SIGINT)
                run.wait(patience)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def _objects(lines: list[str]) -> Iterator[Row]:
    for line in lines:
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a step that was stopped
                yield json.loads(line)


def _anonymous(text: str) -> str:
    """Without what names this computer, its user or its folders; a root such as / or /usr names nobody."""
    names = {str(ROOT): ".", str(ROOT.resolve()): ".", os.environ.get("CUSRU_CACHE_DIR", ""): "<cache>", sys.prefix: "<python>"}
    with contextlib.suppress(RuntimeError):  # a user without a home
        names[str(Path.home())] = "~"
    for path, name in names.items():
        if len(Path(path).parts) > 2:
            text = re.sub(re.escape(path) + r"(?![\w.-])", name, text)
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/[\w./-]*", "<temporary>", text)
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "<host>", text)


def write(report: Row, out: Path) -> None:
    """Each file whole or not at all."""
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.md", reports.markdown(report))):
        part = out / f".{name}.part"
        part.write_text(text)
        os.replace(part, out / name)


def draw(report: Row, out: Path) -> Row:
    try:
        if not reports.picture(report, out / PICTURE):
            return {"status": "skipped", "seconds": 0, "why": "no figures to draw", "rows": []}
    except Exception as error:
        if isinstance(error, ImportError):
            return {"status": "skipped", "seconds": 0, "why": f'{error}: pip install ".[examples]"', "rows": []}
        return {"status": "failed", "seconds": 0, "why": _one_line(error), "rows": []}
    report["picture"] = PICTURE
    return {"status": "ok", "seconds": 0, "rows": []}


def other_part(out: Path, chosen: list[str], here: Row) -> Row:
    """What `out` has of the steps that are not chosen, and how it came there: if it is of here, and can be read."""
    try:
        found = json.loads((out / "report.json").read_text())
        steps = {name: step for name, step in found["steps"].items() if name not in chosen}
        if not steps or any(found[name] != value for name, value in here.items()):
            return {}
        kept: Row = {"before": {name: found[name] for name in ("date", "command", "seconds")}}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    if "table" in chosen:
        steps.pop("picture", None)
    elif "picture" in found:
        kept["picture"] = PICTURE
    return {"steps": steps, **kept}


def prepare(out: Path, keep: bool = False) -> None:
    """OSError where the report could not be written. A picture of an earlier run goes, unless it is to be kept."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass
    for name in ("report.json", "report.md", PICTURE):
        if (out / name).is_dir():
            raise IsADirectoryError(f"{out / name} is a folder")
    if not keep:
        (out / PICTURE).unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    about_it, details = (__doc__ or "\n").split("\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=about_it,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("part", nargs="?", choices=list(PARTS), help="the steps of this part, added to what DIR has of the other")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes; made if it is not there")
    parser.add_argument("--simulate", action="store_true", help="let the simulator stand in for the device")
    parser.add_argument("--only", action="append", choices=list(SECONDS), help="this step alone (may be given again)")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)  # in a process of its own: rows on stdout
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        for row in STEPS[options.step](options.simulate, options.seconds):
            print(json.dumps(row), flush=True)
        return 0
    if options.out is None:
        parser.error("--out is needed: the folder that the report goes to")
    start = time.monotonic()
    if options.part and options.only:
        parser.error("a part of the steps, or --only: not both")
    first = run_step("environment", options.simulate, 60)
    if first["status"] != "ok":
        print(f"benchmarks.device: {first['why']}\n--simulate lets the simulator stand in, to try the command.", file=sys.stderr)
        return 1
    chosen = list(dict.fromkeys(options.only or PARTS.get(options.part, SECONDS)))
    before: Row = {}
    try:
        if options.part:
            before = other_part(options.out, chosen, {"simulated": options.simulate, "environment": first["rows"][0]})
        prepare(options.out, keep="picture" in before)
    except OSError as error:
        parser.error(f"--out: {error}")

    shown = [*filter(None, [options.part]), "--out DIR", *(["--simulate"] if options.simulate else [])]
    shown += [f"--only {name}" for name in options.only or []]
    report: Row = {
        "simulated": options.simulate, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.device {' '.join(shown)}", "environment": first["rows"][0], "seconds": 0,
        **before, "steps": {name: {"status": "not run", "seconds": 0, "rows": []} for name in chosen} | before.get("steps", {}),
    }  # fmt: skip
    steps = report["steps"]

    def end(number: int, frame: Any) -> None:
        raise Ended(number)

    for number in (signal.SIGTERM, signal.SIGHUP):  # of a job's limit, of a terminal that is closed
        signal.signal(number, end)
    print(report["environment"]["device"], flush=True)
    builder = None
    try:
        if not options.simulate and not options.only and "tests" in chosen:  # the packages that compile, while the tests run
            nothing = subprocess.DEVNULL
            builder = _start([sys.executable, "-m", "benchmarks.peers", "--build"], False, stdout=nothing, stderr=nothing)
        allowed = 0.0
        for name in chosen:
            if builder and name not in ("tests", "sanitizer"):  # nothing runs beside what is timed
                _end(builder)
            allowed += SECONDS[name]
            steps[name] = run_step(name, options.simulate, allowed - (time.monotonic() - start))
            report["seconds"] = round(time.monotonic() - start, 1)
            write(report, options.out)
            _say(name, steps[name])
            if steps[name]["status"] == "interrupted":
                return 130
        if "table" in chosen:
            steps["picture"] = draw(report, options.out)
            write(report, options.out)
            _say("picture", steps["picture"])
    except OSError as error:
        print(f"benchmarks.device: cannot write in {options.out}: {error}; the report so far:", file=sys.stderr)
        print(reports.markdown(report))
        return 1
    except KeyboardInterrupt:  # between two steps
        return 130
    finally:
        if builder:
            _end(builder)
    print(f"{options.out / 'report.md'}, report.json{', ' + PICTURE if 'picture' in report else ''}")
    return 0 if all(steps[name]["status"] in ("ok", "skipped") for name in {*chosen, "picture"} & {*steps}) else 1


def _say(name: str, step: Row) -> None:
    print(f"{name:<12}{step['status']}, {step['seconds']:.0f} s{': ' + step['why'] if 'why' in step else ''}", flush=True)


if __name__ == "__main__":
    measuring.run_command(main)
