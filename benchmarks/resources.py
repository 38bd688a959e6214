"""`python -m benchmarks.resources`: what each kernel takes of a multiprocessor, from NVRTC and ptxas. No GPU is needed.

With --json one object a line, for each specialisation and architecture:

    direction, dtype, skip, activation, candidate, weight, columns, packed, recompute, alone, marks, cell, zoneout, split,
                              mend
                              the specialisation
    architecture              90 for sm_90
    threads, ahead            of a block; steps whose loads are in flight
    registers, spill_bytes, stack_bytes, shared_bytes      of a thread, of a thread, of a thread, of a block
    blocks_per_sm             blocks of this kernel that fit on one multiprocessor together
    bytes_in_flight_per_sm    blocks_per_sm * threads * columns * ahead * bytes that are read for a step of a column: what the
                              kernel can have in flight where a launch has blocks enough. By Little's law an H100 needs
                              17.8 KB (docs/performance.md).

    instructions, special_functions      with --sass: in the loops over time, for a step of a column, from nvdisasm; float64's
                              exp and division are calls from there, and not counted

--kernels sample: every value of every option, and every pass, layout and kind of weights with every dtype. plain: SRU with skip
input and identity, v1 and v2. all: every specialisation, half a second each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from cusru import measuring, raw_kernels, specialisation
from cusru.arguments import ITEMSIZES, STATES
from cusru.specialisation import FORMS, Specialisation


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor: CUDA Programming Guide, "Technical Specifications per Compute Capability"."""

    blocks: int
    warps: int
    shared: int  #: bytes
    reserved: int = 1024  #: bytes of shared memory that the system takes of each block
    granularity: int = 128  #: bytes, of the allocation of shared memory


REGISTERS, PARTITIONS, REGISTER_GRANULARITY = 65536, 4, 256  # the same in all of them
MULTIPROCESSORS = {
    75: Multiprocessor(16, 32, 64 << 10, reserved=0, granularity=256),
    80: Multiprocessor(32, 64, 164 << 10),
    86: Multiprocessor(16, 48, 100 << 10),
    89: Multiprocessor(24, 48, 100 << 10),
    90: Multiprocessor(32, 64, 228 << 10),
    100: Multiprocessor(32, 64, 228 << 10),
    120: Multiprocessor(24, 48, 100 << 10),
}


def build(source: str, options: tuple[str, ...], architecture: int) -> tuple[str, bytes]:
    """ptxas's report and the machine code. RuntimeError where it does not compile."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "kernel.cu", [], [])
    try:
        nvrtc.compileProgram(program, (*options, f"--gpu-architecture=sm_{architecture}", "-ftz=true", "--ptxas-options=-v"))
        return nvrtc.getProgramLog(program), nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{options} for sm_{architecture}:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


class Usage(NamedTuple):
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def usages(log: str) -> list[Usage]:
    """Of each kernel in ptxas's report."""
    found = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers(.*)", log
    )
    return [
        Usage(int(registers), int(stores) + int(loads), int(stack), sum(map(int, re.findall(r"(\d+) bytes smem", rest))))
        for stack, stores, loads, registers, rest in found
    ]


def usage(kernel: Specialisation, architecture: int) -> Usage:
    return _one_usage(build(raw_kernels.source(), raw_kernels.options(kernel), architecture)[0])


def _one_usage(log: str) -> Usage:
    found = usages(log)
    if len(found) != 1:
        raise RuntimeError(f"no report of one kernel from ptxas:\n{log}")
    return found[0]


# ---- instructions --------------------------------------------------------------------------------------------------------


def find_nvdisasm() -> str:
    """Of the CUDA toolkit or of the package nvidia-cuda-nvdisasm."""
    folders = [str(path) for folder in sys.path for path in Path(folder).glob("nvidia/*/bin")]
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(folders))
    if not found:
        raise RuntimeError("--sass needs nvdisasm, which is not on PATH: pip install nvidia-cuda-nvdisasm")
    return found


class Code(NamedTuple):
    instructions: list[str]
    loops: list[tuple[int, int]]  #: first and last of each, the shortest first


def code(sass: str) -> Code:
    """A loop is what lies between a label and the nearest jump back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;", line):
            instructions.append(instruction[1])
    loops: dict[int, int] = {}
    for last, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        first = labels.get(jump[1], last) if jump else last
        if first < last:
            loops.setdefault(first, last)
    return Code(instructions, sorted(loops.items(), key=lambda loop: loop[1] - loop[0]))


def smallest_loops(code: Code, opcode: str) -> list[list[str]]:
    """The instructions of the smallest loop around each such one."""
    found: list[tuple[int, int]] = []
    for first, last in code.loops:
        if any(opcode in code.instructions[i] for i in range(first, last + 1) if not any(a <= i <= b for a, b in found)):
            found = [(a, b) for a, b in found if not first <= a <= last] + [(first, last)]
    return [code.instructions[a : b + 1] for a, b in found]


def of_stretch(code: Code, parts: int) -> list[str]:
    """The instructions of a warp's stretch: of the longest loop, span after span; of those in it, part after part, so often."""
    *inner, (first, last) = code.loops
    found = []
    for i in range(first, last + 1):
        found += [code.instructions[i]] * (parts if any(a <= i <= b for a, b in inner) else 1)
    return found


def machine_code(kernel: Specialisation, architecture: int, *options: str) -> Code:
    _, cubin = build(raw_kernels.source(), (*raw_kernels.options(kernel), *options), architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin + b"\0")  # CuPy leaves out the last byte
        file.flush()
        return code(subprocess.run([find_nvdisasm(), file.name], capture_output=True, text=True, check=True).stdout)


def instructions(kernel: Specialisation, architecture: int) -> dict[str, float]:
    """Of whole tiles: padding, tails and other rare things have a copy of the loops to themselves, which is left out here."""
    found = machine_code(kernel, architecture, "-DCUSRU_WHOLE_TILES")
    if kernel.split and kernel.direction == "backward":
        loops, steps = [of_stretch(found, kernel.parts)], kernel.columns * kernel.stretch
    else:
        mark = "LDG" if kernel.direction == "reduce" else "LDS" if kernel.cell in FORMS else "MUFU"  # of all loops over time
        loops, steps = smallest_loops(found, mark), kernel.columns * (1 if kernel.direction == "reduce" else kernel.tile)
    special = sum("MUFU" in instruction for loop in loops for instruction in loop)
    return {"instructions": round(sum(map(len, loops)) / steps, 1), "special_functions": special / steps}


# ---- a multiprocessor ----------------------------------------------------------------------------------------------------


def _up(n: int, granularity: int) -> int:
    return -(-n // granularity) * granularity


# Named ones of a multiprocessor, by NVIDIA's cuda_occupancy.h, which has no limit before 9.0. A kernel that names them by a
# register takes all 16 that a block may have.
BARRIERS = {90: 64, 100: 64, 120: 24}


def blocks_per_sm(architecture: int, threads: int, registers: int, shared: int, barriers: int = 1) -> int:
    """Blocks that fit on a multiprocessor together, by its slots for blocks and warps, its registers, its shared memory and its
    barriers."""
    sm, warps = MULTIPROCESSORS[architecture], -(-threads // 32)
    warps_by_registers = REGISTERS // PARTITIONS // _up(registers * 32, REGISTER_GRANULARITY) * PARTITIONS
    by_shared = sm.shared // max(_up(shared + sm.reserved, sm.granularity), 1)
    by_shared = by_shared if shared + sm.reserved else sm.blocks
    by_barriers = BARRIERS.get(architecture, 1 << 10) // barriers
    return min(sm.blocks, sm.warps // warps, warps_by_registers // warps, by_shared, by_barriers)


def bytes_per_step(kernel: Specialisation) -> int:
    """That a thread reads for a step of one column."""
    item, state = ITEMSIZES[kernel.dtype], ITEMSIZES[STATES[kernel.dtype]]
    if kernel.direction in ("reduce", "clear"):
        return state
    u, x = kernel.k * item * kernel.reads_u, item * (kernel.skip == "x") + kernel.zoneout
    weight = kernel.gates * {"step": item, "step_state": state}.get(kernel.weight, 0)
    if kernel.direction == "forward":
        return u + x + weight
    return u + x + weight + item + (0 if kernel.recompute else state)  # grad_h, c


def _ahead(kernel: Specialisation) -> int:
    """Steps that a warp has in flight: the reduction's are unrolled by 8, a recomputing warp has its share of a block's."""
    if kernel.direction in ("reduce", "clear"):
        return 8
    if kernel.split:
        return kernel.stretch
    return specialisation.UNIT // kernel.warps if kernel.recompute else kernel.tile


def row(kernel: Specialisation, architecture: int, sass: bool = False) -> dict[str, Any]:
    used = usage(kernel, architecture)
    used = used._replace(shared_bytes=used.shared_bytes + kernel.shared(kernel.warps))
    barriers = 1 if kernel.alone or kernel.direction in ("reduce", "clear") else 16
    blocks = blocks_per_sm(architecture, kernel.threads, used.registers, used.shared_bytes, barriers)
    in_flight = blocks * kernel.threads * kernel.columns * _ahead(kernel) * bytes_per_step(kernel)
    return {
        **kernel._asdict(), "architecture": architecture, "threads": kernel.threads, "ahead": _ahead(kernel), **used._asdict(),
        "blocks_per_sm": blocks, "bytes_in_flight_per_sm": in_flight, **(instructions(kernel, architecture) if sass else {}),
    }  # fmt: skip


# ---- which kernels -------------------------------------------------------------------------------------------------------


def plain(kernels: Iterable[Specialisation]) -> list[Specialisation]:
    """SRU with skip input and identity, as the tables of docs/performance.md have it."""
    usual = dict(skip="x", activation="identity", candidate="identity", marks="none")
    return [k for k in kernels if usual.items() <= k._asdict().items() and k.weight in ("none", "column")]


def covering(kernels: Iterable[Specialisation]) -> list[Specialisation]:
    """Few kernels that hold every value of every option, and every pass and layout and kind of weights, which decide the
    registers, with every dtype."""

    def pairs(kernel: Specialisation) -> set[tuple[object, ...]]:
        shape = (kernel.direction, kernel.recompute, kernel.columns, kernel.packed, kernel.alone, kernel.split)
        options = (kernel.skip, kernel.activation, kernel.candidate, kernel.weight, kernel.marks, kernel.cell, kernel.zoneout,
                   kernel.mend)  # fmt: skip
        registers = (kernel.dtype, *shape[:3], kernel.alone, kernel.split, kernel.weight)
        of_cell = {(kernel.cell, *shape[:3]), (kernel.cell, kernel.marks, kernel.zoneout), (kernel.cell, kernel.weight)}
        return {(kernel.dtype, shape), registers} | of_cell | {(kernel.dtype, i, option) for i, option in enumerate(options)}

    remaining = {kernel: pairs(kernel) for kernel in kernels}
    wanted = set().union(*remaining.values())
    chosen = []
    while wanted:
        best = max(remaining, key=lambda kernel: len(remaining[kernel] & wanted))
        chosen.append(best)
        wanted -= remaining.pop(best)
    return chosen


def supported() -> list[int]:
    """The architectures of MULTIPROCESSORS that this NVRTC compiles for."""
    from cupy.cuda import nvrtc

    return [architecture for architecture in MULTIPROCESSORS if architecture in set(map(int, nvrtc.getSupportedArchs()))]


def rows(kernels: Iterable[Specialisation], architectures: Iterable[int], sass: bool = False) -> Iterator[dict[str, Any]]:
    """In order, compiled by as many processes as there are processors."""
    jobs = [(kernel, architecture) for architecture in architectures for kernel in kernels]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(row, sass=sass), *zip(*jobs, strict=True))


COLUMNS = (
    ("direction", 10), ("dtype", 9), ("skip", 10), ("activation", 11), ("candidate", 10), ("weight", 11), ("columns", 8),
    ("packed", 7), ("recompute", 10), ("alone", 6), ("split", 6), ("mend", 5), ("marks", 8), ("cell", 11), ("zoneout", 8),
    ("architecture", 13), ("threads", 8), ("ahead", 6), ("registers", 10), ("spill_bytes", 12),
    ("shared_bytes", 13), ("blocks_per_sm", 14), ("bytes_in_flight_per_sm", 23),
)  # fmt: skip

SASS_COLUMNS = (("instructions", 13), ("special_functions", 18))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources", description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--kernels", choices=["sample", "plain", "all"], default="sample", help="which (default: sample)")
    which = "90 for sm_90 (may be given again); default: all that this NVRTC knows of " + ", ".join(map(str, MULTIPROCESSORS))
    parser.add_argument("--architecture", action="append", type=int, choices=list(MULTIPROCESSORS), metavar="SM", help=which)
    parser.add_argument("--sass", action="store_true", help="count instructions too, with nvdisasm")
    options = parser.parse_args(arguments)
    try:
        known = supported()
        if options.sass:
            find_nvdisasm()
    except ImportError as error:
        print(f'benchmarks.resources: needs CuPy and NVRTC ({error}): pip install ".[cuda13]"', file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"benchmarks.resources: {error}", file=sys.stderr)
        return 1
    if unknown := set(options.architecture or ()) - set(known):
        parser.error(f"--architecture: this NVRTC does not compile for {', '.join(f'sm_{n}' for n in sorted(unknown))}")

    every = list(specialisation.specialisations())
    chosen = {"sample": covering, "plain": plain, "all": list}[options.kernels](every)
    columns = (*COLUMNS, *(SASS_COLUMNS if options.sass else ()))
    if not options.json:
        print("".join(f"{name:<{width}}" for name, width in columns))
    for result in rows(chosen, options.architecture or known, options.sass):
        if options.json:
            print(json.dumps(result), flush=True)
        else:
            print("".join(f"{result[name]!s:<{width}}" for name, width in columns), flush=True)
    return 0


if __name__ == "__main__":
    measuring.run_command(main)
