"""Bad input: each row of the contract's table raises its error, names the argument, and leaves `out` untouched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import cusru

L, B, D = 4, 3, 6
RNG = np.random.default_rng(0)


def inputs(**changes: Any) -> dict[str, Any]:
    def normal(*shape: int) -> np.ndarray:
        return RNG.standard_normal(shape).astype("f4")

    arguments = dict(
        u=normal(L, B, D, 3), x=normal(L, B, D), bias=normal(2, D), weight_c=normal(2, D), c0=normal(B, D),
        mask_c=normal(B, D), mask_pad=np.zeros((L, B), bool),
    )  # fmt: skip
    return arguments | changes


def results(direction: str = "forward") -> list[Any]:
    """`out` of poisoned arrays."""
    of_forward = [(L, B, D), (L, B, D), (B, D)]
    of_backward = [(L, B, D, 3), (L, B, D), (2, D), (2, D), (B, D)]
    return [np.full(shape, 7, "f4") for shape in (of_forward if direction == "forward" else of_backward)]


def forward(**changes: Any) -> Any:
    return cusru.sru_forward(**inputs(**changes))


def backward(**changes: Any) -> Any:
    own = dict(grad_h=np.ones((L, B, D), "f4"), grad_c_last=np.ones((B, D), "f4"), c=np.ones((L, B, D), "f4"))
    return cusru.sru_backward(**(own | inputs(**changes)))


class Elsewhere:
    """An array on a device that is neither a CPU nor CUDA's."""

    def __init__(self, kind: int) -> None:
        self.kind = kind

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("must not be asked")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.kind, 0)


def empty(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.zeros(shape, dtype)


BAD = {  # changed arguments, the error, and what its message says
    "u of rank 3": (dict(u=empty(L, B, 3 * D)), ValueError, [r"\bu\b", r"\(4, 3, 18\)", r"\(L, B, D, 3\)"]),
    "u with k = 5": (dict(u=empty(L, B, D, 5)), ValueError, [r"\bu\b", r"\(4, 3, 6, 5\)", r"\(L, B, D, 4\)"]),
    "x of another width": (dict(x=empty(L, B, D + 1)), ValueError, [r"\bx\b", r"\(4, 3, 7\)", r"\(4, 3, 6\)"]),
    "bias of three rows": (dict(bias=empty(3, D)), ValueError, ["bias", r"\(3, 6\)", r"\(2, 6\)", r"\(12,\)"]),
    "weight_c too long": (dict(weight_c=empty(2 * D + 1)), ValueError, ["weight_c", r"\(13,\)", r"\(4, 3, 6, 2\)"]),
    "c0 of another batch": (dict(c0=empty(B + 1, D)), ValueError, ["c0", r"\(4, 6\)", r"\(3, 6\)"]),
    "mask_c per step": (dict(mask_c=empty(L, B, D)), ValueError, ["mask_c", r"\(4, 3, 6\)", r"\(3, 6\)"]),
    "mask_pad transposed": (dict(mask_pad=empty(B, L, dtype="?")), ValueError, ["mask_pad", r"\(3, 4\)", r"\(4, 3\)"]),
    "scale_x of two": (dict(scale_x=empty(2)), ValueError, ["scale_x", r"\(2,\)", "one element"]),
    "integer u": (dict(u=empty(L, B, D, 3, dtype="i4")), TypeError, [r"\bu\b", "int32", "float64.*float32.*float16.*bfloat16"]),
    "complex u": (dict(u=empty(L, B, D, 3, dtype="c8")), TypeError, [r"\bu\b", "complex64", "float32"]),
    "x of another dtype": (dict(x=empty(L, B, D, dtype="f8")), TypeError, [r"\bx\b", "float64", "float32"]),
    "bias narrower than u": (dict(bias=empty(2, D, dtype="f2")), TypeError, ["bias", "float16", "float32"]),
    "weight_c wider than the state": (dict(weight_c=empty(2, D, dtype="f8")), TypeError, ["weight_c", "float64", "float32"]),
    "float mask_pad": (dict(mask_pad=empty(L, B)), TypeError, ["mask_pad", "float32", "bool", "uint8"]),
    "u a list": (dict(u=[1.0, 2.0]), TypeError, [r"\bu\b", "list"]),
    "u None": (dict(u=None), TypeError, [r"\bu\b", "None"]),
    "flag a string": (dict(bidirectional="False"), TypeError, ["bidirectional", "'False'", "bool"]),
    "flag 2": (dict(bidirectional=2), TypeError, ["bidirectional", "2", "0 or 1"]),
    "flag -1": (dict(bidirectional=-1), TypeError, ["bidirectional", "-1"]),
    "flag a float": (dict(bidirectional=1.0), TypeError, ["bidirectional", r"1\.0"]),
    "flag None": (dict(bidirectional=None), TypeError, ["bidirectional", "None"]),
    "flag a list": (dict(bidirectional=[]), TypeError, ["bidirectional", r"\[\]"]),
    "flag an array": (dict(bidirectional=np.array([True, False])), TypeError, ["bidirectional", "array|tensor"]),
    "flag an array of one": (dict(bidirectional=np.array(1)), TypeError, ["bidirectional", "array|tensor"]),
    "bias a number": (dict(bias=1.0), TypeError, ["bias", "float"]),
    "scale_x a string": (dict(scale_x="1"), TypeError, ["scale_x", "str"]),
    "scale_x beyond a float": (dict(scale_x=10**400), ValueError, ["scale_x"]),
    "scale_x None": (dict(scale_x=None), TypeError, ["scale_x", "None"]),
    "Metal": (dict(u=Elsewhere(8)), ValueError, [r"\bu\b", "Metal"]),
    "ROCm": (dict(bias=Elsewhere(10)), ValueError, ["bias", "ROCm"]),
    "oneAPI": (dict(c0=Elsewhere(14)), ValueError, ["c0", "oneAPI"]),
    "two devices": (dict(bias=Elsewhere(2)), ValueError, ["bias", "cuda:0", r"\bu\b", "cpu"]),
    "activation": (dict(activation="gelu"), ValueError, ["activation", "gelu", "identity.*tanh.*relu.*selu"]),
    "activation no string": (dict(activation=None), ValueError, ["activation", "identity"]),
    "candidate": (dict(candidate="relu"), ValueError, ["candidate", "identity.*tanh"]),
    "mask_target": (dict(mask_target="h"), ValueError, ["mask_target", "state.*gate"]),
    "save_every 0": (dict(save_every=0), ValueError, ["save_every", "at least 1"]),
    "save_every negative": (dict(save_every=-3), ValueError, ["save_every", "at least 1"]),
    "save_every a float": (dict(save_every=2.0), TypeError, ["save_every", "integer"]),
    "k = 4 with x": (dict(u=empty(L, B, D, 4)), ValueError, [r"\bx\b", "k = 3"]),
    "odd D, bidirectional": (
        dict(
            u=empty(L, B, 5, 3), x=None, bias=None, weight_c=None, c0=None, mask_c=None, bidirectional=True
        ),
        ValueError,
        ["bidirectional", "even", "5"],
    ),
    "workspace of rank 2": (
        dict(workspace=empty(2, 2, dtype="u1")), ValueError, ["workspace", r"\(2, 2\)"],
    ),
    "workspace of floats": (dict(workspace=empty(4096)), TypeError, ["workspace", "float32", "uint8"]),
}  # fmt: skip


@pytest.mark.parametrize("flag", [True, 1, np.True_, np.int8(1), np.uint64(1)])
def test_a_flag_is_a_bool_or_0_or_1(flag: Any) -> None:
    for given, meant in ((flag, True), (type(flag)(0), False)):
        for got, want in zip(forward_of_seed(bidirectional=given), forward_of_seed(bidirectional=meant), strict=True):
            np.testing.assert_array_equal(got, want)


def forward_of_seed(**options: Any) -> Any:
    return cusru.sru_forward(np.random.default_rng(1).standard_normal((L, B, D, 3)), **options)


def off_its_alignment(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins one byte behind an aligned address."""
    memory = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 1, np.uint8)
    return np.ndarray(shape, dtype, memory, 1)


DTYPES_OF = {"mask_pad": ["?", "u1"], "workspace": ["u1", "i1"], "u": ["f4", "f8", "e"]}  # those that are taken; else f4
NUMPY_DTYPES = ["f4", "f8", "i1", "i4", "u8", "c8", "c16", "M8[ns]", "m8[s]", "S7", "U5", "V3", "O", "f4,i2", "g", "e"]
SHAPES = dict(
    u=(L, B, D, 3), x=(L, B, D), bias=(2, D), weight_c=(2, D), c0=(B, D), mask_c=(B, D), mask_pad=(L, B), scale_x=(1,),
    out=(L, B, D), workspace=(4096,), grad_h=(L, B, D), grad_c_last=(B, D), c=(L, B, D),
)  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in SHAPES for d in NUMPY_DTYPES if d not in DTYPES_OF.get(n, ["f4"])])
def test_a_dtype_is_looked_at_before_addresses_and_strides(name: str, dtype: str) -> None:
    arrays = [np.zeros(SHAPES[name], [("first", "u1"), ("it", dtype)])["it"]]  # strides that are no whole elements
    if dtype != "O":
        arrays.append(off_its_alignment(SHAPES[name], dtype))
    call = backward if name in ("grad_h", "grad_c_last", "c") else forward
    taken = np.dtype(DTYPES_OF.get(name, ["f4"])[0]).name
    for array in arrays:
        words = [rf"\b{name}", "has dtype", re.escape(array.dtype.name), f"allowed here: .*{taken}"]
        raises(TypeError, words, call, **{name: [array, None, None] if name == "out" else array})


def test_a_dtype_that_is_taken_is_taken_at_its_alignment_alone() -> None:
    raises(ValueError, ["mask_c", "not aligned", "float32"], forward, mask_c=off_its_alignment((B, D), "f4"))
    raises(ValueError, ["mask_c", "whole elements"], forward, mask_c=np.zeros((B, D), "u1,f4")["f1"])
    forward(mask_pad=off_its_alignment((L, B), "?"))


def raises(error: type[Exception], words: list[str], call: Any, args: tuple[Any, ...] = (), **changes: Any) -> None:
    with pytest.raises(error) as caught:
        call(*args, **changes)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("simulate", ["0", "1"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(
    case: str, direction: str, simulate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSRU_SIMULATE", simulate)
    changes, error, words = BAD[case]
    out = results(direction)
    raises(error, words, forward if direction == "forward" else backward, **changes, out=out)
    assert all((a == 7).all() for a in out)


@pytest.mark.parametrize("name", ["u", "x", "bias", "c0", "mask_pad"])
def test_a_masked_array_is_refused_for_its_mask_would_be_ignored(name: str) -> None:
    masked = np.ma.array(inputs()[name], mask=True)
    raises(TypeError, [rf"\b{name}\b", "masked", rf"{name}\.filled"], forward, **{name: masked})
    raises(TypeError, [rf"\b{name}\b", "masked", rf"{name}\.filled"], backward, **{name: masked})


BAD_BACKWARD = {
    "no c": (dict(c=None), ValueError, [r"\bc\b", "save"]),
    "c of another length": (dict(save_every=2), ValueError, [r"\bc\b", r"\(4, 3, 6\)", r"\(2, 3, 6\)", "ceil"]),
    "save_every None": (dict(save_every=None), ValueError, ["save_every"]),
    "c in another dtype": (dict(c=empty(L, B, D, dtype="f8")), TypeError, [r"\bc\b", "float64", "float32"]),
    "grad_h None": (dict(grad_h=None), TypeError, ["grad_h", "None"]),
    "grad_h of another shape": (dict(grad_h=empty(L, B)), ValueError, ["grad_h", r"\(4, 3\)", r"\(4, 3, 6\)"]),
    "grad_c_last of another shape": (dict(grad_c_last=empty(D)), ValueError, ["grad_c_last", r"\(6,\)", r"\(3, 6\)"]),
}


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_bad_input_of_the_backward(case: str) -> None:
    changes, error, words = BAD_BACKWARD[case]
    out = results("backward")
    raises(error, words, backward, **changes, out=out)
    assert all((a == 7).all() for a in out)


def read_only() -> np.ndarray:
    a = empty(B, D)
    a.flags.writeable = False
    return a


SHARED = np.zeros((2 * L, B, D), "f4")
BAD_OUT = {
    "too few": ([None], ValueError, ["out", "1", "3"]),
    "no sequence": (7, TypeError, ["out", "int"]),
    "of another shape": ([empty(L, B), None, None], ValueError, [r"out\.h", r"\(4, 3\)", r"\(4, 3, 6\)"]),
    "of another dtype": ([None, empty(L, B, D, dtype="f8"), None], TypeError, [r"out\.c", "float64", "float32"]),
    "read-only": ([None, None, read_only()], ValueError, [r"out\.c_last", "read-only"]),
    "a list": ([[1.0], None, None], TypeError, [r"out\.h", "list"]),
    "a masked array": ([np.ma.array(empty(L, B, D), mask=True), None, None], TypeError, [r"out\.h", "masked"]),
    "on another device": ([Elsewhere(2), None, None], ValueError, [r"out\.h", "cuda:0", "cpu"]),
    "overlapping itself": ([np.broadcast_to(empty(1, B, D), (L, B, D)), None, None], ValueError, [r"out\.h"]),
    "a window over itself": (
        [np.lib.stride_tricks.as_strided(empty(L + B + D), (L, B, D), (4, 4, 4)), None, None], ValueError, [r"out\.h", "itself"],
    ),
    "overlapping one another": ([SHARED[:L], SHARED[1 : L + 1], None], ValueError, [r"out\.c", r"out\.h", "overlap"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OUT)
def test_a_bad_out_is_refused(case: str) -> None:
    out, error, words = BAD_OUT[case]
    good = results()
    if isinstance(out, list) and len(out) == 3:
        out = [valid if member is None else member for member, valid in zip(out, good, strict=True)]
    raises(error, words, forward, out=out)
    assert all((a == 7).all() for a in good)


def test_an_out_that_overlaps_an_input_is_refused() -> None:
    arguments = inputs()
    raises(ValueError, [r"out\.h", r"\bx\b", "overlap"], forward, x=arguments["x"], out=[arguments["x"], None, None])
    g = results("backward")
    raises(ValueError, [r"out\.u", r"\bu\b"], backward, u=g[0], out=[g[0], None, None, None, None])


def test_interleaved_outs_that_share_no_element_are_taken() -> None:
    both = np.zeros((L, B, 2 * D), "f4")
    arguments = inputs()
    expected = cusru.sru_forward(**arguments)
    got = cusru.sru_forward(**arguments, out=(both[..., ::2], both[..., 1::2], None))
    np.testing.assert_array_equal(both[..., ::2], expected.h)
    np.testing.assert_array_equal(got.c, expected.c)


def test_an_out_for_a_result_that_is_absent_is_refused() -> None:
    raises(ValueError, [r"out\.c\b", "None"], forward, save_every=None, out=results())
    raises(ValueError, [r"out\.x", "None"], backward, x=None, out=results("backward"))


def test_a_workspace_that_overlaps_or_is_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "L", 40)  # so long that several threads share a column's sums
    need = cusru.workspace_size("backward", **inputs())
    assert need > 0
    raises(ValueError, ["workspace", str(need)], backward, workspace=np.zeros(need - 1, "u1"))
    raises(ValueError, ["workspace"], backward, workspace=np.zeros(2 * need, "u1")[::2])
    frozen = np.zeros(need, "u1")
    frozen.flags.writeable = False
    raises(ValueError, ["workspace", "read-only"], backward, workspace=frozen)
    out = results("backward")
    raises(ValueError, ["workspace", r"out\.u"], backward, out=out, workspace=np.ravel(out[0]).view("u1"))


def test_workspace_size_checks_like_the_call() -> None:
    raises(ValueError, ["direction", "forward.*backward"], lambda: cusru.workspace_size("sideways", empty(L, B, D, 3)))
    raises(ValueError, ["activation"], lambda: cusru.workspace_size("forward", empty(L, B, D, 3), activation="gelu"))


def test_a_torch_tensor_that_requires_grad_says_what_to_do() -> None:
    torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')
    u = torch.zeros(L, B, D, 3, requires_grad=True)
    raises(TypeError, [r"\bu\b", "requires grad|requires_grad", "detach"], lambda: cusru.sru_forward(u))
    weight = torch.nn.Parameter(torch.zeros(2, D))
    raises(TypeError, ["weight_c", "detach"], lambda: cusru.sru_forward(u.detach(), weight_c=weight))
    with torch.no_grad():
        assert isinstance(cusru.sru_forward(u, weight_c=weight).h, torch.Tensor)


def test_immutable_outs_are_refused() -> None:
    jnp = pytest.importorskip("jax.numpy", reason='needs JAX: pip install "cusru[jax]"')
    raises(ValueError, [r"out\.h", "read-only"], forward, out=[jnp.zeros((L, B, D)), None, None])


def test_device_arrays_without_cupy_say_what_to_install() -> None:
    code = """
import sys
sys.modules["cupy"] = None
import cusru
class OnDevice:
    def __dlpack_device__(self): return (2, 0)
    def __dlpack__(self, **k): raise AssertionError("must not be asked")
cusru.sru_forward(OnDevice())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert "pip install" in done.stderr.splitlines()[-1]
    assert "cusru[cuda1" in done.stderr.splitlines()[-1]


def test_the_simulator_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    monkeypatch.setenv("CUSRU_CACHE_DIR", str(tmp_path / "cold"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    code = "import numpy, cusru; cusru.sru_forward(numpy.zeros((2, 2, 2, 3), 'f4'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr.splitlines()[-1]
    assert "g++" in done.stderr.splitlines()[-1]
