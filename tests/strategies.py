"""Whole problems, drawn: every option, shape, dtype and memory layout. `build` turns a choice (a small dict) into a `Problem`.

Arrays come from a drawn seed, so an example is cheap and its choice reproduces it. The NumPy backend draws freely. On the
simulator each specialisation is a compilation of most of a second, so what selects one comes from COVERING, a list of 20 rows
in which every pair of values of any two options occurs.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import oracle
from hypothesis import strategies as st

from benchmarks import cases

try:
    import ml_dtypes

    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:
    BFLOAT16 = None

ARRAYS = ("u", "x", "a", "b", "bias", "weight_c", "c0", "mask_c", "mask_pad", "starts", "zoneout")  # u or b, whichever there is
FAMILIES = ("sru", "qrnn", "linear_recurrence")
DTYPES = tuple(d for d in cases.DTYPES if d != "bfloat16" or BFLOAT16)


def np_dtype(name: str) -> np.dtype:
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def state_of(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


# ---- memory layouts ---------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How an array lies in a buffer of its own, which begins at a multiple of 64 bytes and is all ones (NaN) elsewhere."""

    order: Callable[[int], Iterable[int]] = range  # rank -> its axes, outermost first
    steps: Mapping[int, int] = {}  # axis -> elements of the buffer to a step, negative to run backward
    pitch: int = 0  # columns (of an array without them: of its last axis) that lie unused after each row
    offset: int = 0  # elements before the first


def _swapped(*pair: int) -> Callable[[int], list[int]]:
    def order(rank: int) -> list[int]:
        axes = list(range(rank))
        if rank > 1:
            i, j = (axis % rank for axis in pair)
            axes[i], axes[j] = axes[j], axes[i]
        return axes

    return order


_EVERY_AXIS = range(-4, 0)
LAYOUTS = {
    "compact": Layout(),
    "batch_first": Layout(_swapped(0, 1)),
    "time_reversed": Layout(steps={0: -1}),
    "pitched": Layout(pitch=16),
    "planar": Layout(_swapped(-2, -1)),  # of u: D innermost
    "planar_pitched": Layout(_swapped(-2, -1), pitch=16),
    "last_outermost": Layout(lambda rank: [rank - 1, *range(rank - 1)]),  # of u: k planes
    "fortran": Layout(lambda rank: range(rank)[::-1]),
    "off_by_one": Layout(offset=1),
    "pitched_by_one": Layout(pitch=1),
    "gapped": Layout(steps=dict.fromkeys(_EVERY_AXIS, 2)),
    "backward": Layout(steps=dict.fromkeys(_EVERY_AXIS, -1)),
    "planar_off_by_one": Layout(_swapped(-2, -1), offset=1),
    "planar_batch_first_backward": Layout(lambda rank: ([0], [1, 0], [1, 0, 2], [1, 0, 3, 2])[rank - 1], steps={-1: -1, 0: -2}),
}


def arranged(a: np.ndarray, name: str) -> np.ndarray:
    """A copy with that layout."""
    view = scratch(a.shape, a.dtype, name)
    view[...] = a
    return view


def scratch(shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """As arranged, with nothing written into it yet."""
    layout = LAYOUTS[name]
    rank = len(shape)
    order = list(layout.order(rank))
    steps = [layout.steps.get(axis, layout.steps.get(axis - rank, 1)) for axis in range(rank)]
    extents = [shape[axis] * abs(steps[axis]) for axis in order]
    row = order.index(min(rank - 1, 2)) if rank else 0  # the columns' axis
    if rank:
        extents[row] += layout.pitch
    count = int(np.prod(extents, dtype=int))
    raw = np.full((count + layout.offset) * dtype.itemsize + 64, 0xFF, np.uint8)
    start = -raw.ctypes.data % 64 + layout.offset * dtype.itemsize
    buffer = raw[start : start + count * dtype.itemsize].view(dtype).reshape(extents)
    if rank:
        buffer = buffer[(slice(None),) * row + (slice(extents[row] - layout.pitch),)]
    return buffer.transpose([order.index(axis) for axis in range(rank)])[tuple(slice(None, None, step) for step in steps)]


def root(a: np.ndarray) -> np.ndarray:
    """The array that owns the memory."""
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a


def untouched_around(a: np.ndarray) -> bool:
    """Whether what `scratch` laid around a is as it was; a itself is lost."""
    np.copyto(a.view(f"u{a.itemsize}"), ~np.zeros((), f"u{a.itemsize}"))
    return bool((root(a) == 0xFF).all())


# ---- problems ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Problem:
    """Inputs of the forward, those that the backward adds, and how to run them. Its repr rebuilds it."""

    choice: dict[str, Any]
    inputs: dict[str, Any]  # the keyword arguments of the forward function
    grad_h: np.ndarray
    grad_c_last: np.ndarray | None
    dtype: str
    multiprocessors: int
    family: str = "sru"

    def __repr__(self) -> str:
        return f"strategies.{'build' if self.family == 'sru' else 'build_affine'}({self.choice!r})"

    def replace(self, **changes: Any) -> Problem:
        """With other inputs (or grad_h, grad_c_last)."""
        own = {name: changes.pop(name) for name in ("grad_h", "grad_c_last") if name in changes}
        assert changes.keys() <= self.inputs.keys(), changes.keys()
        return dataclasses.replace(self, inputs=self.inputs | changes, **own)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The forward's inputs that are arrays, u or b first, but for scale_x."""
        return {n: self.inputs[n] for n in ARRAYS if isinstance(self.inputs.get(n), np.ndarray)}

    def map_arrays(self, function: Callable[[str, np.ndarray], np.ndarray]) -> Problem:
        """With function(name, array) in place of each array, grad_h and grad_c_last included."""
        arrays = self.arrays | {"grad_h": self.grad_h, "grad_c_last": self.grad_c_last}
        return self.replace(**{n: function(n, a) for n, a in arrays.items() if a is not None})

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.inputs["u"] if "u" in self.inputs else self.inputs["b"]).shape[:3]

    def expected_forward(self) -> dict[str, Any]:
        with np.errstate(all="ignore"):
            return self._oracle("forward")(**self._for_oracle())

    def expected_backward(self, states: np.ndarray | None = None) -> dict[str, Any]:
        """states: every c, where the backward under test works on these; else the oracle takes its own."""
        with np.errstate(all="ignore"):
            return self._oracle("backward")(self.grad_h, self.grad_c_last, **self._for_oracle(), states=states)

    def _oracle(self, direction: str) -> Any:
        return getattr(oracle, direction if self.family == "sru" else f"{self.family}_{direction}")

    def _for_oracle(self) -> dict[str, Any]:
        if self.family != "sru":
            return self.inputs
        scale = self.inputs["scale_x"]
        return self.inputs | {"scale_x": float(np.asarray(scale).astype(np.float64).reshape(()))}

    def check(self, results: Any, expected: dict[str, Any]) -> float:
        """Results (a NamedTuple) within the oracle's bounds, of their right dtypes and shapes; the worst error / bound."""
        length, plane, state = self.shape[0], self.shape[1:], np_dtype(state_of(self.dtype))
        every = self.inputs["save_every"]
        given = self.inputs
        wanted: dict[str, tuple[tuple[int, ...], np.dtype] | None] = (
            {
                "h": (self.shape, np_dtype(self.dtype)),
                "c": every and ((-(-length // every), *plane), state),
                "c_last": (plane, state),
            }
            if "h" in results._fields
            else {n: None if given[n] is None else (given[n].shape, given[n].dtype) for n in results._fields}
        )
        found = {n: None if a is None else (a.shape, a.dtype) for n, a in results._asdict().items()}
        assert found == wanted
        held_in_state = [n for n, a in results._asdict().items() if a is not None and a.dtype == state]
        return float(oracle.check(results, expected, self.dtype, held_in_state))


# Where a gate's argument has terms of a hundred, float32 cannot keep 2e-5 of sigmoid's tail (it is exp(argument), whose rounding
# alone costs that much), and its products are subnormal: so with large values the gates' arguments stay below some four times
# GATE_LIMIT. test_laws.py takes them to their extremes.
MAGNITUDES = {"normal": 1.0, "small": 1e-3, "large": 30.0}
GATE_LIMIT = 10.0
SAVE_EVERY = (1, 2, 7, 31, 32, 33, 64, "L", "L+5", None)

# What a choice may hold; the first is the simplest, what is rare stands once among repetitions.
RUN_TIME: dict[str, Sequence[Any]] = dict(
    length=(1, 2, 31, 32, 33, 64, 65, 127) * 2 + (0, 1000),
    batch=(1, 2, 3, 4, 5) * 2 + (0, 33),
    width=(1, 3, 4, 8, 16, 17, 18, 20) * 2 + (0, 64),
    mask_target=("state", "gate"),
    bidirectional=(False, True),
    padding=("none", "lengths", "scattered") * 3 + ("all",),
    pad_dtype=("bool", "uint8"),
    mask_c=(None, 0.3, 0.5),
    c0=(False, True),
    grad_c_last=(True, False),
    bias=(None, 0.0, 3.0, 9.0),
    scale_x=(1.0, -0.7, 0.0, "array"),
    magnitude=("normal", "normal", "small", "large"),
    narrow_parameters=(False, True),  # of a 16-bit u: in its dtype
    flat_parameters=(False, True),
    broadcast=("none", "none", "none", "u", "x", "c0", "mask_c", "mask_pad", "bias", "grad_h"),
    starts=("none",) * 5 + ("scattered", "rare", "first", "all"),
    reverse=(False, False, True),
    seed=range(1000),
)
FREE = dict(
    dtype=DTYPES,
    skip=("none", "x", "projected"),
    activation=("identity", "tanh", "relu", "selu"),
    candidate=("identity", "tanh"),
    weight=("none", "column", "step", "step_state"),
    save_every=SAVE_EVERY,
    layout_u=tuple(LAYOUTS),
    layout=tuple(LAYOUTS),
    multiprocessors=(132,),
)


def build(choice: dict[str, Any]) -> Problem:
    o, rng = choice, np.random.default_rng(choice["seed"])
    dtype, state, length = o["dtype"], state_of(o["dtype"]), o["length"]
    every = {"L": max(length, 1), "L+5": length + 5}.get(o["save_every"], o["save_every"])
    same = ("skip", "activation", "candidate", "mask_target", "padding", "mask_c", "c0", "bias")
    case = cases.Case(
        "drawn",
        length,
        o["batch"],
        o["width"],
        weight_c=o["weight"].removesuffix("_state"),
        bidirectional=o["bidirectional"] and o["width"] % 2 == 0,
        save_every=every,
        **{name: o[name] for name in same},
    )
    inputs = cases.make(case, dtype, o["seed"])
    grad_h, grad_c_last = cases.make_gradients(case, dtype, o["seed"])
    arrays = {n: inputs[n] for n in ARRAYS if inputs.get(n) is not None} | {"grad_h": grad_h}
    if o["grad_c_last"]:
        arrays["grad_c_last"] = grad_c_last

    size = MAGNITUDES[o["magnitude"]]
    for name in ("u", "x", "c0"):
        if name in arrays:
            arrays[name] = arrays[name] * arrays[name].dtype.type(size)
    if size > 1:
        arrays["u"][..., 1:3] *= arrays["u"].dtype.type(GATE_LIMIT / size)
        if "weight_c" in arrays:
            arrays["weight_c"] = arrays["weight_c"] / arrays["weight_c"].dtype.type(size)
    narrow = {"bias", "c0", "mask_c", "grad_c_last", "weight_c"} if o["narrow_parameters"] else set()
    if o["weight"] != "column":  # of a weight for each step the dtype is a specialisation's
        narrow = narrow - {"weight_c"} | ({"weight_c"} if o["weight"] == "step" else set())
    for name in narrow & arrays.keys():
        arrays[name] = arrays[name].astype(np_dtype(dtype))
    if "mask_pad" in arrays and o["pad_dtype"] == "uint8":
        arrays["mask_pad"] = arrays["mask_pad"] * rng.integers(1, 256, arrays["mask_pad"].shape, dtype=np.uint8)
    for name in ("bias", "weight_c"):
        if o["flat_parameters"] and name in arrays and arrays[name].ndim == 2:
            arrays[name] = arrays[name].reshape(-1)

    arrays = {n: arranged(a, o["layout_u"] if n == "u" else o["layout"]) for n, a in arrays.items()}
    if (name := o["broadcast"]) in arrays and arrays[name].ndim > 1 and arrays[name].size:
        axis = rng.integers(arrays[name].ndim - 1)  # the columns of a vector stay apart
        arrays[name] = np.broadcast_to(arrays[name].take([0], axis), arrays[name].shape)
    grad_h, grad_c_last = arrays.pop("grad_h"), arrays.pop("grad_c_last", None)
    inputs |= arrays | {"starts": _starts(o, rng), "reverse": o["reverse"]}
    if o["scale_x"] != "array":
        inputs["scale_x"] = o["scale_x"]
    else:
        inputs["scale_x"] = np.full((1,) * rng.integers(3), 1.375, np_dtype(dtype if o["narrow_parameters"] else state))
    return Problem(choice, inputs, grad_h, grad_c_last, dtype, o["multiprocessors"])


STARTS = {"scattered": 0.2, "rare": 0.03, "first": 0.0, "all": 2.0}


def _starts(o: dict[str, Any], rng: np.random.Generator) -> np.ndarray | None:
    if o["starts"] == "none":
        return None
    starts = rng.random((o["length"], o["batch"])) < STARTS[o["starts"]]
    if o["starts"] == "first":
        starts[:1] = True
    if o["pad_dtype"] == "uint8":
        starts = starts * rng.integers(1, 256, starts.shape, dtype=np.uint8)
    return arranged(starts, o["layout"])


#: Of the families that are affine in c
_SHARED = (
    "length", "batch", "width", "bidirectional", "padding", "pad_dtype", "c0", "grad_c_last", "narrow_parameters", "seed",
    "magnitude", "starts", "reverse",
)  # fmt: skip
AFFINE: dict[str, Sequence[Any]] = {n: RUN_TIME[n] for n in _SHARED} | dict(
    dtype=DTYPES, save_every=SAVE_EVERY, layout_u=tuple(LAYOUTS), layout=tuple(LAYOUTS), multiprocessors=(132,),
    broadcast=("none", "none", "none", "u", "a", "b", "c0", "mask_pad", "zoneout", "grad_h"),
)  # fmt: skip
FREE_AFFINE: dict[str, dict[str, Sequence[Any]]] = {
    "qrnn": AFFINE | dict(
        pooling=("f", "fo", "ifo"), gate=("forget", "update"), zoneout=(None, None, 0.0, 0.25, 0.9999, 1.0, "array"),
        bias=(0.0, 3.0, 9.0, -3.0),
    ),
    "linear_recurrence": AFFINE | dict(
        form=("affine", "complement", "blend"), a=("step", "step_state", "batch", "column"),
        reach=("gate", "near_1", "any", "exact"),  # what a is about
    ),
}  # fmt: skip


def build_affine(choice: dict[str, Any]) -> Problem:
    """Of the QRNN's pooling, or of the linear recurrence."""
    o, rng, family = choice, np.random.default_rng(choice["seed"]), choice["family"]
    dtype, state = np_dtype(o["dtype"]), np_dtype(state_of(o["dtype"]))
    length, batch, width = plane = o["length"], o["batch"], o["width"]
    narrow = dtype if o["narrow_parameters"] else state
    size = MAGNITUDES[o["magnitude"]]

    def normal(*shape: int, dtype: np.dtype = dtype, size: float = size) -> np.ndarray:
        return (size * rng.standard_normal(shape)).astype(dtype)

    inputs: dict[str, Any] = dict(c0=normal(batch, width, dtype=narrow) if o["c0"] else None)
    if family == "qrnn":
        u = normal(*plane, {"f": 2, "fo": 3, "ifo": 4}[o["pooling"]])
        u[..., 1:] = (rng.standard_normal(u[..., 1:].shape) * min(size, GATE_LIMIT)).astype(dtype)
        u[..., 1] += dtype.type(o["bias"] if o["gate"] == "forget" else -o["bias"])
        zoneout = o["zoneout"] if o["zoneout"] != "array" else (rng.random(plane) < 0.3).astype(o["pad_dtype"])
        inputs |= dict(u=u, pooling=o["pooling"], gate=o["gate"], zoneout=zoneout)
    else:
        shape = {"batch": (batch, width), "column": (width,)}.get(o["a"], plane)
        a = {
            "gate": lambda: rng.random(shape),
            "near_1": lambda: (1 if o["form"] == "affine" else 0) + 1e-3 * rng.standard_normal(shape),
            "any": lambda: 0.6 * rng.standard_normal(shape),
            "exact": lambda: rng.choice([0.0, 1.0, 0.5, -1.0], shape),
        }[o["reach"]]()
        if o["form"] != "affine":  # what is kept is 1 - a
            a = abs(a) if o["reach"] != "near_1" else a
        inputs |= dict(
            b=normal(*plane), form=o["form"], a=a.astype(dtype if o["a"] == "step" or narrow == dtype != state else state)
        )
        if o["a"] == "step_state":
            inputs["a"] = a.astype(state)
    pad = cases._padding(cases.Case("drawn", length, batch, width, padding=o["padding"]), rng)
    if pad is not None and o["pad_dtype"] == "uint8":
        pad = pad * rng.integers(1, 256, pad.shape, dtype=np.uint8)
    every = {"L": max(length, 1), "L+5": length + 5}.get(o["save_every"], o["save_every"])
    inputs |= dict(
        mask_pad=pad, bidirectional=o["bidirectional"] and width % 2 == 0, save_every=every, starts=_starts(o, rng),
        reverse=o["reverse"],
    )  # fmt: skip
    grads = {"grad_h": normal(*plane, size=1.0)}
    if o["grad_c_last"]:
        grads["grad_c_last"] = normal(batch, width, dtype=narrow, size=1.0)
    arrays = {n: a for n, a in inputs.items() if isinstance(a, np.ndarray) and n != "starts"} | grads
    arrays = {n: arranged(a, o["layout_u"] if n in ("u", "b") else o["layout"]) for n, a in arrays.items()}
    if inputs["starts"] is not None:
        arrays["starts"] = inputs["starts"]
    if (name := o["broadcast"]) in arrays and arrays[name].ndim > 1 and arrays[name].size:
        axis = rng.integers(arrays[name].ndim - 1)  # the columns of a vector stay apart
        arrays[name] = np.broadcast_to(arrays[name].take([0], axis), arrays[name].shape)
    grad_h, grad_c_last = arrays.pop("grad_h"), arrays.pop("grad_c_last", None)
    return Problem(choice, inputs | arrays, grad_h, grad_c_last, o["dtype"], o["multiprocessors"], family)


def of_case(case: cases.Case, dtype: str, seed: int = 0) -> Problem:
    """A case of the table, as it stands."""
    grads = cases.make_gradients(case, dtype, seed)
    return Problem({"case": case.name}, cases.make(case, dtype, seed), *grads, dtype, 0, case.family)


# ---- the simulator's share --------------------------------------------------------------------------------------------


# dtype, skip, activation, candidate, weight, access, recompute; every pair of values occurs in each of the two lists.
# access: whether a thread reads the k values of u one by one or as a vector, and whether it walks one column or several.
def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.split()) for row in text.strip().splitlines())


COVERING = _rows("""
float64     none        identity    tanh        step        wide_planar saved
float64     none        selu        tanh        column      wide_planar saved
float64     x           tanh        identity    none        scalar      recompute
float64     x           tanh        tanh        step        wide_packed saved
float64     projected   relu        tanh        column      packed      saved
float32     none        relu        tanh        none        wide_packed saved
float32     none        relu        tanh        step        scalar      recompute
float32     x           tanh        identity    column      wide_planar saved
float32     x           selu        identity    step        scalar      saved
float32     projected   identity    identity    none        packed      saved
float16     none        tanh        identity    column      scalar      saved
float16     x           identity    tanh        step_state  wide_packed saved
float16     projected   relu        tanh        none        wide_planar recompute
float16     projected   selu        identity    step        packed      recompute
bfloat16    none        identity    identity    column      wide_packed recompute
bfloat16    none        selu        tanh        step_state  scalar      saved
bfloat16    x           relu        identity    step_state  wide_planar recompute
bfloat16    projected   identity    tanh        step        scalar      saved
bfloat16    projected   tanh        tanh        step_state  packed      saved
bfloat16    projected   selu        identity    none        wide_packed recompute
""")
SECOND_COVERING = _rows("""
float64     none        identity    tanh        column      wide_planar saved
float64     x           tanh        identity    none        wide_planar saved
float64     x           selu        identity    column      scalar      recompute
float64     projected   relu        identity    column      wide_packed saved
float64     projected   selu        tanh        step        packed      saved
float32     none        tanh        identity    step        scalar      saved
float32     none        selu        tanh        column      wide_packed recompute
float32     x           tanh        tanh        column      wide_packed recompute
float32     projected   identity    identity    none        wide_planar recompute
float32     projected   relu        tanh        none        packed      recompute
float16     none        tanh        tanh        step_state  wide_packed saved
float16     none        selu        tanh        step_state  wide_planar recompute
float16     x           identity    tanh        step        wide_packed recompute
float16     x           relu        tanh        step_state  wide_planar saved
float16     projected   identity    identity    none        scalar      saved
float16     projected   identity    identity    column      packed      recompute
bfloat16    none        relu        identity    step        wide_planar recompute
bfloat16    none        selu        tanh        none        wide_packed saved
bfloat16    x           identity    tanh        step_state  scalar      saved
bfloat16    x           relu        identity    column      scalar      saved
bfloat16    projected   tanh        identity    step_state  packed      recompute
""")
STARTING = COVERING[2], COVERING[7], COVERING[11], COVERING[14]  # rows that are drawn with starts too
STARTED = (*COVERING[2][:4], "column", *COVERING[2][5:], "starts")  # and one that always is, for laws

# Family, dtype, pooling or form, what is zoned or which a, access, recompute, and which marks are drawn
AFFINE_COVERING = _rows("""
qrnn               float32   f           plain       wide_packed recompute none
qrnn               float32   fo          zoned       packed      saved     starts
qrnn               float64   ifo         zoned       wide_packed recompute starts
qrnn               float16   fo          plain       wide_planar recompute padding
qrnn               float16   ifo         plain       scalar      saved     padding
qrnn               bfloat16  f           zoned       scalar      saved     none
qrnn               bfloat16  ifo         zoned       wide_packed saved     starts
linear_recurrence  float32   affine      step        wide_packed saved     starts
linear_recurrence  float32   blend       batch       scalar      recompute starts
linear_recurrence  float64   complement  column      scalar      saved     padding
linear_recurrence  float64   blend       step        scalar      recompute none
linear_recurrence  float16   complement  step_state  wide_packed recompute padding
linear_recurrence  float16   affine      batch       scalar      saved     none
linear_recurrence  bfloat16  blend       step_state  scalar      saved     none
linear_recurrence  bfloat16  affine      column      wide_packed recompute starts
""")
AFFINE_PANEL = (
    AFFINE_COVERING[1],
    AFFINE_COVERING[2],
    AFFINE_COVERING[7],
    AFFINE_COVERING[8],
    AFFINE_COVERING[11],
    AFFINE_COVERING[14],
)
PANEL = COVERING[2], COVERING[6], COVERING[7], COVERING[9], COVERING[11], COVERING[12], COVERING[14], COVERING[19]  # for laws
ALIGNED = ("compact", "batch_first", "time_reversed", "pitched")
PLANAR = ("planar", "planar_pitched")
ACCESS: dict[str, dict[str, tuple[Any, ...]]] = {  # u read in planes, or k values of a column apart, never aligned
    "scalar": dict(multiprocessors=(132,), layout_u=tuple(n for n in LAYOUTS if n not in ALIGNED), layout=tuple(LAYOUTS)),
    "packed": dict(multiprocessors=(132,), layout_u=ALIGNED, layout=tuple(LAYOUTS)),
    "wide_planar": dict(multiprocessors=(0,), layout_u=PLANAR, layout=ALIGNED, width=(8, 16, 24, 64), broadcast=("none",)),
    "wide_packed": dict(multiprocessors=(0,), layout_u=ALIGNED, layout=ALIGNED, width=(8, 16, 24, 64), broadcast=("none",)),
}


def fields(row: tuple[str, ...] | None = None, family: str = "sru") -> dict[str, Sequence[Any]]:
    """What a choice may hold: of a row of a covering list, or free."""
    if row is None:
        return FREE | RUN_TIME if family == "sru" else FREE_AFFINE[family] | {"family": (family,)}
    if row[0] in FREE_AFFINE:
        family, dtype, cell, variant, access, recompute, marks = row
        own = {"qrnn": dict(pooling=cell), "linear_recurrence": dict(form=cell, a=variant)}[family] | dict(
            family=family, dtype=dtype
        )
        several: dict[str, Sequence[Any]] = {n: (v,) for n, v in own.items()}
        if family == "qrnn":
            several["zoneout"] = ("array",) if variant == "zoned" else (None, 0.25, 0.9999, 1.0)
        several["save_every"] = SAVE_EVERY[1:-1] if recompute == "recompute" else (1, 1, None)
        if marks != "starts":
            several["starts"] = ("none",)
        if marks == "none":
            several["padding"] = ("none",)
        if marks == "starts":
            several["starts"] = ("scattered", "rare", "first", "all")
        return FREE_AFFINE[family] | several | ACCESS[access]
    dtype, skip, activation, candidate, weight, access, recompute, *marks = row
    every = SAVE_EVERY[1:-1] if recompute == "recompute" else (1, 1, None)
    own = dict(dtype=dtype, skip=skip, activation=activation, candidate=candidate, weight=weight)
    starts = RUN_TIME["starts"] if row in STARTING else tuple(STARTS) if marks else ("none",)  # each is a kernel
    return RUN_TIME | {n: (v,) for n, v in own.items()} | {"save_every": every, "starts": starts} | ACCESS[access]


def problems(row: tuple[str, ...] | None = None, **only: Any) -> st.SearchStrategy[Problem]:
    """`only`: the values of some fields."""
    return st.fixed_dictionaries({n: st.sampled_from(v) for n, v in (fields(row) | _several(only)).items()}).map(build_any)


def affine_problems(**only: Any) -> st.SearchStrategy[Problem]:
    """Of the QRNN and the linear recurrence, with any options."""
    several = [fields(None, family) | _several(only) for family in FREE_AFFINE]
    return st.one_of([st.fixed_dictionaries({n: st.sampled_from(v) for n, v in one.items()}).map(build_any) for one in several])


def build_any(choice: dict[str, Any]) -> Problem:
    return build_affine(choice) if "family" in choice else build(choice)


def random_choice(rng: random.Random, row: tuple[str, ...] | None = None, family: str = "sru", **only: Any) -> dict[str, Any]:
    """Without Hypothesis."""
    return {n: rng.choice(v) for n, v in (fields(row, family) | _several(only)).items()}


def _several(only: dict[str, Any]) -> dict[str, Sequence[Any]]:
    return {n: v if isinstance(v, tuple) else (v,) for n, v in only.items()}


def typical(row: tuple[str, ...], **changes: Any) -> Problem:
    """One problem of a row with most options in use."""
    if row[0] in FREE_AFFINE:
        choice = {n: values[0] for n, values in fields(row).items()} | dict(
            length=37, batch=3, width=16, bidirectional=True, padding="scattered" if row[-1] != "none" else "none", c0=True,
            starts="scattered" if row[-1] == "starts" else "none", broadcast="none",
        )  # fmt: skip
        if row[-2] == "recompute":
            choice["save_every"] = 7
        return build_affine(choice | changes)
    choice = {n: values[0] for n, values in fields(row).items()} | dict(
        length=37,
        batch=3,
        width=16,
        mask_target="gate",
        bidirectional=True,
        padding="scattered",
        mask_c=0.3,
        c0=True,
        bias=0.0,
        scale_x=-0.7,
    )
    if "recompute" in row:
        choice["save_every"] = 7
    return build(choice | changes)
