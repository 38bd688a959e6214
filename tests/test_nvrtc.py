"""The kernels under NVRTC, which needs no driver: every specialisation compiles, and no register spills to memory."""

import itertools
import re
from collections.abc import Iterable

import pytest

from cusru import raw_kernels
from cusru.raw_kernels import Specialisation

cupy = pytest.importorskip("cupy", reason='needs CuPy and NVRTC: pip install "cusru[cuda13]"')
nvrtc = cupy.cuda.nvrtc

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


def compile_for(kernel: Specialisation, architecture: int) -> str:
    """ptxas's report."""
    program = nvrtc.createProgram(raw_kernels.source(), "sru.cu", [], [])
    options = (*raw_kernels.options(kernel), f"--gpu-architecture=sm_{architecture}", "-ftz=true", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise AssertionError(f"{kernel} for sm_{architecture}:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def check(kernel: Specialisation, architecture: int) -> None:
    log = compile_for(kernel, architecture)
    spilled = [int(n) for pair in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) for n in pair]
    assert spilled, f"no report from ptxas:\n{log}"
    assert not any(spilled), f"{kernel} spills for sm_{architecture}: {spilled} bytes"
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
    assert stack, f"no report from ptxas:\n{log}"
    assert not any(stack), f"{kernel} keeps an array in local memory for sm_{architecture}: {stack} bytes"
    shared = re.search(r"(\d+) bytes smem", log)
    assert not shared or int(shared[1]) <= 48 * 1024, f"{kernel} takes {shared[1]} bytes of shared memory"


def covering(kernels: Iterable[Specialisation]) -> list[Specialisation]:
    """Few kernels that hold every value of every option, and every pass and layout and kind of weights, which decide the
    registers, with every dtype."""

    def pairs(kernel: Specialisation) -> set[tuple[object, ...]]:
        shape = (kernel.direction, kernel.recompute, kernel.columns, kernel.packed)
        options = (kernel.skip, kernel.activation, kernel.candidate, kernel.weight)
        registers = (kernel.dtype, *shape[:3], kernel.weight)
        return {(kernel.dtype, shape), registers} | {(kernel.dtype, i, option) for i, option in enumerate(options)}

    remaining = {kernel: pairs(kernel) for kernel in kernels}
    wanted = set().union(*remaining.values())
    chosen = []
    while wanted:
        best = max(remaining, key=lambda kernel: len(remaining[kernel] & wanted))
        chosen.append(best)
        wanted -= remaining.pop(best)
    return chosen


ALL = list(raw_kernels.specialisations())
SAMPLE = covering(ALL)


def test_the_covering_sample_holds_every_value_of_every_option_with_every_dtype() -> None:
    for field in ("direction", "skip", "activation", "candidate", "weight", "columns", "packed", "recompute"):
        every = {(kernel.dtype, getattr(kernel, field)) for kernel in ALL}
        assert every == {(kernel.dtype, getattr(kernel, field)) for kernel in SAMPLE}, field


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_covering_sample_compiles_without_spills(architecture: int) -> None:
    if f"{architecture}" not in map(str, nvrtc.getSupportedArchs()):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    for kernel in SAMPLE:
        check(kernel, architecture)


def test_a_kernel_that_spills_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Specialisation("backward", "float32", skip="x", columns=4)
    original = raw_kernels.options
    monkeypatch.setattr(raw_kernels, "options", lambda k: tuple(o.replace("AHEAD=2", "AHEAD=16") for o in original(k)))
    with pytest.raises(AssertionError, match="spills"):
        check(kernel, 90)


@pytest.mark.long
@pytest.mark.parametrize("part", range(16))
def test_every_specialisation_compiles_without_spills_for_sm_90(part: int) -> None:
    for kernel in itertools.islice(ALL, part, None, 16):
        check(kernel, 90)
