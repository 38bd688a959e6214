"""The one table of cases: shapes x options x dtypes, for benchmarks and tests alike.

A `Case` says what a problem is; `make` turns it into the keyword arguments of its family's forward function, and `make_gradients`
into the two gradients that the backward starts from, with realistic values: projections N(0, 1), the `sru` package's initial
weight_c, gates that a forget bias may keep open, decays between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

DTYPES = ("float64", "float32", "float16", "bfloat16")
PERIOD = 4_194_301  # a prime
PADDINGS = ("none", "lengths", "scattered", "all")


class Case(NamedTuple):
    name: str
    L: int
    B: int
    D: int
    skip: str = "x"  #: "none", "x" or "projected" (k = 4)
    weight_c: str = "none"  #: "none", "column" or "step"
    activation: str = "identity"
    candidate: str = "identity"
    mask_target: str = "state"
    bidirectional: bool = False
    padding: str = "none"  #: "none", "lengths" (each sequence its own), "scattered" or "all"
    mask_c: float | None = None  #: the dropout probability
    c0: bool = False
    bias: float | None = 0.0  #: about which the forget bias lies
    scale_x: float = 1.0
    save_every: int | None = 1
    layout: str = "k_inner"  #: of u in memory: "k_inner" or "d_inner"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    starts: bool = False  #: sequences of some 50 steps laid end to end
    family: str = "sru"  #: or "qrnn", "linear_recurrence"; then of the options of SRU alone none counts
    cell: str = ""  #: pooling or form
    zoneout: float | None = None  #: of the QRNN: a mask with this probability
    a: str = "step"  #: of the linear recurrence: "step", "batch" or "column", in the state's dtype

    @property
    def k(self) -> int:
        if self.family == "qrnn":
            return {"f": 2, "fo": 3, "ifo": 4}[self.cell]
        return 4 if self.skip == "projected" else 3

    @property
    def elements(self) -> int:
        return self.L * self.B * self.D

    @property
    def options(self) -> dict[str, Any]:
        """What differs from a plain SRU v1."""
        fixed = ("name", "L", "B", "D", "dtypes")
        return {n: v for n, v in self._asdict().items() if n not in fixed and v != self._field_defaults[n]}


_SEPARATION = Case("separation", 64, 4096, 64, weight_c="column", mask_target="gate", bidirectional=True)

BENCHMARKS = (
    Case("square", 512, 32, 512),
    Case("square-v2", 512, 32, 512, weight_c="column", save_every=32),
    Case("square-tanh-k4", 512, 32, 512, skip="projected", activation="tanh", dtypes=("float32", "float16", "bfloat16")),
    Case("square-qrnn", 512, 32, 512, skip="none", candidate="tanh", layout="d_inner"),
    Case("short", 128, 32, 512),
    Case("short-v2-masked", 128, 32, 512, weight_c="column", padding="lengths", mask_c=0.2, c0=True),
    # Speech separation, as a live user runs it.
    _SEPARATION._replace(name="separation-k3"),
    _SEPARATION._replace(name="separation-k4", skip="projected"),
    Case("narrow", 16384, 1, 1024, bias=3.0),
    Case("narrow-v2", 16384, 1, 1024, weight_c="column", bias=3.0, save_every=32),
    Case("wide", 4096, 8, 2048),
    Case("wide-S32", 4096, 8, 2048, save_every=32),
    Case("wide-v2", 4096, 8, 2048, weight_c="column", save_every=32),
    Case("double", 512, 32, 512, weight_c="column", activation="tanh", dtypes=("float64",)),
    Case("step-weights", 512, 32, 256, weight_c="step", dtypes=("float32", "float16")),
    Case("qrnn-ifo", 512, 32, 512, family="qrnn", cell="ifo", save_every=32),
    Case("qrnn-zoneout", 512, 32, 512, family="qrnn", cell="fo", zoneout=0.1),
    Case("linear", 512, 32, 512, family="linear_recurrence", cell="affine"),
    Case("linear-blend-S32", 4096, 8, 2048, family="linear_recurrence", cell="blend", save_every=32),
    Case("linear-column", 16384, 1, 1024, family="linear_recurrence", cell="complement", a="column", save_every=32),
    Case("packed", 16384, 1, 1024, weight_c="column", bias=3.0, save_every=32, starts=True),
)

SMALL = (  # the same kinds of problem, for a CPU
    Case("small", 40, 3, 20, dtypes=DTYPES),
    Case("small-qrnn", 40, 3, 16, skip="none", candidate="tanh", layout="d_inner", dtypes=DTYPES),
    Case(
        "small-masked",
        40,
        3,
        17,
        weight_c="column",
        activation="tanh",
        padding="lengths",
        mask_c=0.2,
        c0=True,
        scale_x=0.7,
        save_every=7,
    ),
    Case("small-step", 40, 3, 16, weight_c="step", activation="relu", c0=True, dtypes=("float32", "float16")),
    Case("small-narrow", 2000, 1, 8, bias=3.0, save_every=32),
    _SEPARATION._replace(name="small-separation-k3", L=32, B=48),
    _SEPARATION._replace(name="small-separation-k4", L=32, B=48, skip="projected"),
    Case("small-packed", 130, 2, 8, weight_c="column", save_every=32, starts=True, bidirectional=True),
    Case("small-qrnn-ifo", 40, 3, 20, family="qrnn", cell="ifo", padding="lengths", c0=True, save_every=7),
    Case("small-qrnn-zoneout", 40, 3, 16, family="qrnn", cell="f", zoneout=0.2, dtypes=("float64", "float16")),
    Case("small-linear", 40, 3, 16, family="linear_recurrence", cell="affine", c0=True),
    Case("small-linear-blend", 70, 2, 20, family="linear_recurrence", cell="blend", a="batch", save_every=32, starts=True),
    Case(
        "small-linear-column",
        40,
        3,
        17,
        family="linear_recurrence",
        cell="complement",
        a="column",
        bidirectional=False,
        dtypes=("float64", "float16"),
    ),
)

CASES = {case.name: case for case in (*BENCHMARKS, *SMALL)}


Reach = float | tuple[float | None, float | None] | None  # in either pass, or forward and backward


class Goal(NamedTuple):
    """What a case is to reach on a device."""

    row: str  #: of the table of goals; of two that one case serves
    case: Case  #: saves every 32nd state; forward also as inference, which saves none
    dtype: str
    of_ceiling: Reach = None  #: of the faster of copy and stream
    of_original: Reach = None  #: the original design's time over ours
    of_plain: Reach = None  #: of what the plain case of the same shape reaches of its own ceiling
    of_peer: Reach = None  #: the time of the fastest other package's linear recurrence over ours
    launches: Reach = None  #: at most

    def wanted(self, backward: bool) -> dict[str, float]:
        named = {name: value for name, value in self._asdict().items() if name not in ("row", "case", "dtype")}
        each = {name: value[backward] if isinstance(value, tuple) else value for name, value in named.items()}
        return {name: value for name, value in each.items() if value is not None}


def _goal(row: str, name: str, *shape: int, dtype: str = "bfloat16", options: dict[str, Any] | None = None, **goals: Any) -> Goal:
    case = Case(f"{name}-{'x'.join(map(str, shape))}", *shape, save_every=32, **(options or {}))
    return Goal(row, case, dtype, **goals)


def _goals(row: str, *shape: int, dtype: str = "float32", **goals: Any) -> list[Goal]:
    """Of SRU v1 and v2."""
    versions = {"v1": "none", "v2": "column"}.items()
    return [_goal(row, name, *shape, dtype=dtype, options=dict(weight_c=weight), **goals) for name, weight in versions]


def _beside_plain(row: str, *shape: int, dtype: str = "float32") -> list[Goal]:
    """What is to stay within a tenth of the plain case, v2."""
    variants = {"padding": {"padding": "lengths"}, "k4": {"skip": "projected"}, "two-directions": {"bidirectional": True},
                "step-weights": {"weight_c": "step"}}  # fmt: skip
    return [_goal(row, name, *shape, dtype=dtype, options={"weight_c": "column", **options}, of_plain=0.9)
            for name, options in variants.items()]  # fmt: skip


def _narrow_options(row: str, *shape: int) -> list[Goal]:
    """Likewise of v1, whose forward is split too; but weights per step beside v2, since neither's forward is affine."""
    variants: dict[str, dict[str, Any]] = {
        "v1-padding": {"padding": "scattered"}, "v1-two-directions": {"bidirectional": True}, "v1-k4": {"skip": "projected"},
        "v1-mask": {"mask_c": 0.2}, "v1-tanh": {"activation": "tanh"}, "step-weights": {"weight_c": "step"},
    }  # fmt: skip
    return [_goal(row, name, *shape, options=options, of_plain=0.9) for name, options in variants.items()]


_V2, _LINEAR = {"weight_c": "column"}, {"family": "linear_recurrence", "cell": "affine"}

GOALS = (
    *_goals("1", 512, 32, 512, dtype="bfloat16", of_ceiling=0.85),
    *_goals("2", 512, 32, 1024, dtype="bfloat16", of_ceiling=0.95),
    *_goals("2", 64, 4096, 64, dtype="bfloat16", of_ceiling=0.95),
    *_goals("3, 5", 2048, 16, 1024, of_ceiling=0.95, of_original=2),
    *_goals("4", 4096, 8, 2048, dtype="bfloat16", of_ceiling=0.9),
    *_goals("5", 512, 32, 64, of_original=8),
    *_goals("6", 32, 32, 256, launches=(1, 2)),
    *_goals("6", 128, 32, 512, launches=(1, 2)),
    *_beside_plain("1", 512, 32, 512, dtype="bfloat16"),
    *_beside_plain("3", 2048, 16, 1024),
    # From here on columns are few, and time is long (docs/performance.md, "Time in parallel"). Row 9 is of v2's forward, by the
    # forget gates' bias; what has no goal is only reported.
    _goal("7", "v1", 16384, 1, 1024, of_ceiling=0.7),
    _goal("7, 9", "v2", 16384, 1, 1024, options=_V2, of_ceiling=(0.4, 0.7)),
    _goal("9", "v2-bias-2", 16384, 1, 1024, options={**_V2, "bias": 2.0}, of_ceiling=(0.4, None)),
    _goal("9", "v2-bias-4", 16384, 1, 1024, options={**_V2, "bias": 4.0}),
    _goal("8", "v1", 65536, 1, 512, of_ceiling=0.75),
    _goal("8", "v2", 65536, 1, 512, options=_V2, of_ceiling=(None, 0.75)),
    _goal("10", "v1", 1048576, 1, 8, dtype="float32", of_ceiling=0.5),
    _goal("11", "v1-two-directions-padded", 1500, 4, 512, options=dict(bidirectional=True, padding="lengths"), of_ceiling=0.6),
    _goal("12", "linear", 16384, 1, 1024, dtype="float32", options=_LINEAR, of_peer=1.2),
    _goal("12", "linear", 8192, 8, 1536, dtype="float32", options=_LINEAR, of_peer=1.2),
    _goal("13", "v1", 16384, 1, 1024, dtype="float32", of_original=40),
    _goal("13", "v2", 16384, 1, 1024, dtype="float32", options=_V2, of_original=(4, None)),
    *_narrow_options("7", 16384, 1, 1024),
)


def _as_it_is(a: np.ndarray) -> Any:
    return a


def make(case: Case, dtype: str, seed: int = 0, put: Callable[[np.ndarray], Any] = _as_it_is) -> dict[str, Any]:
    """The keyword arguments of the forward for this case: NumPy's arrays, each handed to `put` (to move it to a device).

    u, x and b have dtype `dtype`; parameters, a, c0 and mask_c have the state's.
    """
    rng = np.random.default_rng(seed)
    state = np.dtype("float64" if dtype == "float64" else "float32")
    storage = _dtype(dtype)
    length, batch, width, k = case.L, case.B, case.D, case.k

    def normal(*shape: int, dtype: Any = state) -> np.ndarray:
        return _normal(rng, shape, state, dtype)

    of_all: dict[str, Any] = dict(bidirectional=case.bidirectional, save_every=case.save_every)
    if case.family != "sru":
        arrays: dict[str, np.ndarray | None] = dict(c0=normal(batch, width) if case.c0 else None, mask_pad=_padding(case, rng))
        if case.family == "qrnn":
            of_all["pooling"] = case.cell
            arrays["u"] = normal(length, batch, width, k, dtype=storage)
            if case.zoneout is not None:
                arrays["zoneout"] = rng.random((length, batch, width)) < case.zoneout
        else:
            of_all["form"] = case.cell
            shape = {"step": (length, batch, width), "batch": (batch, width), "column": (width,)}[case.a]
            gate = 1 / (1 + np.exp(-normal(*shape) - 3))  # what is kept
            arrays["a"] = (gate if case.cell == "affine" else 1 - gate).astype(state)
            arrays["b"] = normal(length, batch, width, dtype=storage)
        arrays["starts"] = _starts(case, rng)
        return of_all | {name: a if a is None else put(a) for name, a in arrays.items()}

    if case.layout == "k_inner":
        u = put(normal(length, batch, width, k, dtype=storage))
    else:
        u = put(normal(length, batch, k, width, dtype=storage)).transpose(0, 1, 3, 2)
    weight_shape = {"none": None, "column": (2, width), "step": (length, batch, width, 2)}[case.weight_c]
    weight = bias = mask_c = None
    if weight_shape is not None:  # uniform of variance 1/2, as the sru package begins
        weight = (1.5**0.5 * (2 * rng.random(weight_shape) - 1)).astype(state)
    if case.bias is not None:
        bias = 0.1 * normal(2, width)
        bias[0] += case.bias
    x = normal(length, batch, width, dtype=storage) if case.skip == "x" else None
    c0 = normal(batch, width) if case.c0 else None
    if case.mask_c is not None:
        mask_c = ((rng.random((batch, width)) >= case.mask_c) / (1 - case.mask_c)).astype(state)
    arrays = dict(x=x, bias=bias, weight_c=weight, c0=c0, mask_c=mask_c, mask_pad=_padding(case, rng), starts=_starts(case, rng))
    return dict(
        u=u,
        **{name: None if a is None else put(a) for name, a in arrays.items()},
        activation=case.activation,
        candidate=case.candidate,
        scale_x=case.scale_x,
        mask_target=case.mask_target,
        **of_all,
    )


def make_gradients(case: Case, dtype: str, seed: int = 0, put: Callable[[np.ndarray], Any] = _as_it_is) -> tuple[Any, Any]:
    """grad_h and grad_c_last for `cusru.sru_backward`, in u's dtype and the state's."""
    rng = np.random.default_rng([seed, 1])
    state = np.dtype("float64" if dtype == "float64" else "float32")
    grad_h = _normal(rng, (case.L, case.B, case.D), state, _dtype(dtype))
    return put(grad_h), put(rng.standard_normal((case.B, case.D), dtype=state))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], state: np.dtype, dtype: np.dtype) -> np.ndarray:
    """Of more than PERIOD values these are repeated: to draw gigabytes takes longer than a GPU takes for all the rest."""
    count = math.prod(shape)
    return np.resize(rng.standard_normal(min(count, PERIOD), dtype=state).astype(dtype), shape)


def _padding(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    if case.padding == "none":
        return None
    if case.padding == "lengths":
        return np.arange(case.L)[:, None] >= (rng.random(case.B) * (case.L + 1)).astype("int64")[None]
    return rng.random((case.L, case.B)) < {"scattered": 0.3, "all": 2}[case.padding]


def _starts(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    return rng.random((case.L, case.B)) < 0.02 if case.starts else None


def _dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
