"""The kernels under NVRTC, which needs no driver: every specialisation compiles, and no register spills to memory."""

import itertools

import pytest

from benchmarks import resources
from cusru import raw_kernels, specialisation
from cusru.specialisation import Specialisation

cupy = pytest.importorskip("cupy", reason='needs CuPy and NVRTC: pip install "cusru[cuda13]"')
nvrtc = cupy.cuda.nvrtc

ARCHITECTURES = tuple(resources.MULTIPROCESSORS)


def check(kernel: Specialisation, architecture: int) -> None:
    used = resources.usage(kernel, architecture)
    most = resources.MULTIPROCESSORS[architecture]
    guessed = kernel.split and not kernel.affine  # whose blocks have all warps, or are not launched at all
    if guessed and kernel.columns == 2 and kernel.shared(kernel.warps) > most.shared - most.reserved:
        return
    assert used.spill_bytes == 0, f"{kernel} spills for sm_{architecture}: {used}"
    assert used.stack_bytes == 0, f"{kernel} keeps an array in local memory for sm_{architecture}: {used}"
    if kernel.columns == 1:  # the planner's last resort
        assert used.shared_bytes + kernel.shared(1) <= most.shared - most.reserved, (
            f"{kernel} for sm_{architecture}: not one warp fits"
        )
    assert used.shared_bytes + kernel.shared(kernel.warps) <= 227 * 1024, f"{kernel}: {used}"


ALL = list(specialisation.specialisations())
SAMPLE = resources.covering(ALL)


def test_the_covering_sample_holds_every_value_of_every_option_with_every_dtype() -> None:
    for field in Specialisation._fields:
        every = {(kernel.dtype, getattr(kernel, field)) for kernel in ALL}
        assert every == {(kernel.dtype, getattr(kernel, field)) for kernel in SAMPLE}, field


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_covering_sample_compiles_without_spills(architecture: int) -> None:
    """All of it for sm_90, half of it for each of the others: all of it for all would take as long as all other tests."""
    if f"{architecture}" not in map(str, nvrtc.getSupportedArchs()):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    of_each = slice(None) if architecture == 90 else slice(ARCHITECTURES.index(architecture) % 2, None, 2)
    for kernel in SAMPLE[of_each]:
        check(kernel, architecture)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_covering_sample_compiles_without_spills(architecture: int) -> None:
    for kernel in SAMPLE:
        check(kernel, architecture)


def test_a_kernel_that_spills_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Specialisation("backward", "float32", skip="x", columns=2)
    original = raw_kernels.options
    monkeypatch.setattr(raw_kernels, "options", lambda k: tuple(o.replace("TILE=4", "TILE=16") for o in original(k)))
    with pytest.raises(AssertionError, match="spills"):
        check(kernel, 90)


@pytest.mark.long
@pytest.mark.parametrize("part", range(16))
def test_every_specialisation_compiles_without_spills_for_sm_90(part: int) -> None:
    for kernel in itertools.islice(ALL, part, None, 16):
        check(kernel, 90)
