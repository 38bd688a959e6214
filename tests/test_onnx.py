"""torch.onnx.export of the modules and of cusru.torch.sru, by both of torch's exporters: onnxruntime computes what torch does."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')
onnx = pytest.importorskip("onnx", reason='needs onnx: pip install "cusru[onnx]"')
pytest.importorskip("onnxscript", reason='needs onnxscript: pip install "cusru[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs onnxruntime: pip install "cusru[onnx]"')

from torch._dynamo.backends.common import aot_autograd  # noqa: E402

from cusru.torch import QRNN, SRU, SRUCell, SRUpp, fastai, linear_recurrence, qrnn, sru  # noqa: E402
from cusru.torch import onnx as cusru_onnx  # noqa: E402

ROOT = Path(__file__).parent.parent
EXAMPLE, SIZES = (5, 3), ((5, 3), (1, 1), (9, 2))  # (L, B): that of the export, and those that run
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated in sru.*",
    "ignore:.*(legacy TorchScript-based ONNX export|torch.jit|The feature will be removed).*:DeprecationWarning",
    "ignore:.*The axis name.*will not be used.*",
    "ignore:.*has no reset_parameters.*",
    "ignore:.*treespec.*:FutureWarning",
)
both_exporters = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def axes(layout: str) -> dict[int, str]:
    """The dynamic ones: of "LBD" {0: "L", 1: "B"}."""
    return {i: name for i, name in enumerate(layout) if name in "LB"}


class Exported:
    """The model, checked, and a session of onnxruntime."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], layouts: dict[str, str], path: Path,
                 dynamo: bool, variadic: bool = False, **options: Any) -> None:  # fmt: skip
        first, *_ = inputs
        args = tuple(inputs.values()) if variadic else (inputs[first],)
        kwargs = {} if variadic else {name: a for name, a in inputs.items() if name != first}
        shapes: Any = {name: axes(layouts[name]) for name in inputs}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=torch.jit.TracerWarning, module=r"cusru\.")
            if dynamo:
                options |= dict(dynamic_shapes=(tuple(shapes.values()),) if variadic else shapes, verbose=False)
            else:
                options |= dict(dynamic_axes=shapes)
            torch.onnx.export(
                model.eval(),
                args,
                path,
                kwargs=kwargs,
                dynamo=dynamo,
                input_names=list(inputs),
                output_names=["h", "c"],
                **options,
            )
        self.model = onnx.load(path)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        wanted = {i.name for i in self.session.get_inputs()}  # one that changes nothing is not in the model
        return [torch.from_numpy(a) for a in self.session.run(None, {n: a.numpy() for n, a in inputs.items() if n in wanted})]

    def check(self) -> None:
        """A valid model of ONNX's own operators, which walks over time in Scan."""
        onnx.checker.check_model(self.model, full_check=True)
        assert {o.domain for o in self.model.opset_import} <= {""}
        graphs, kinds = [self.model.graph], set()
        assert not self.model.functions
        while graphs:
            for node in graphs.pop().node:
                assert node.domain == ""
                kinds.add(node.op_type)
                graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        assert "Scan" in kinds


def assert_close(results: Any, expected: Any, dtype: torch.dtype) -> None:
    for name, a, b in zip("hc", results, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        a, b = a.double(), b.double()
        bound = TOLERANCE[dtype] * b.abs().max().clamp(min=1)
        assert (a - b).abs().max() <= bound, (name, (a - b).abs().max())


# ---- the modules ---------------------------------------------------------------------------------------------------


class Projections(torch.nn.Module):
    """A custom module: U, or U and V."""

    def __init__(self, columns: int, weights: int) -> None:
        super().__init__()
        self.u, self.v = torch.nn.Linear(6, columns), torch.nn.Linear(6, weights) if weights else None

    def forward(self, input: torch.Tensor) -> Any:
        return self.u(input) if self.v is None else (self.u(input), self.v(input))


class Attending(SRUpp):
    """Without the saved inputs."""

    def forward(self, input: torch.Tensor, mask_pad: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(input, mask_pad=mask_pad)[:2]


F64, F32, F16 = torch.float64, torch.float32, torch.float16
MODULES: dict[str, tuple[Any, dict[str, Any], str, torch.dtype]] = {
    "cell": (SRUCell, dict(input_size=6, hidden_size=6), "", F32),
    "cell, k = 4, state and padding": (SRUCell, dict(input_size=6, hidden_size=4), "c0 mask_pad", F32),
    "cell, two directions, float64": (SRUCell, dict(input_size=6, hidden_size=3, bidirectional=True), "c0 mask_pad", F64),
    "cell, custom U": (SRUCell, dict(input_size=6, hidden_size=6, custom_m=Projections(18, 0)), "", F32),
    "cell, weights per step": (
        SRUCell, dict(input_size=6, hidden_size=4, bidirectional=True, custom_m=Projections(32, 16)), "mask_pad", F32
    ),
    "stack": (SRU, dict(input_size=6, hidden_size=4, dropout=0.5), "", F32),
    "one layer, k = 3, rescaled": (SRU, dict(input_size=6, hidden_size=6, num_layers=1, rescale=True), "c0", F64),
    "two directions": (SRU, dict(input_size=6, hidden_size=3, bidirectional=True), "c0 mask_pad", F32),
    "no skip": (SRU, dict(input_size=6, hidden_size=4, num_layers=1, has_skip_term=False), "mask_pad", F64),
    "tanh, v1": (SRU, dict(input_size=6, hidden_size=4, num_layers=1, use_tanh=True, v1=True), "", F32),
    "normalised": (SRU, dict(input_size=6, hidden_size=4, num_layers=1, layer_norm=True, rnn_dropout=0.5), "", F32),
    "normalised after, batch first": (
        SRU, dict(input_size=6, hidden_size=4, num_layers=1, layer_norm=True, normalize_after=True, batch_first=True), "c0", F32
    ),
    "through fewer features": (SRU, dict(input_size=6, hidden_size=5, num_layers=1, projection_size=2), "c0", F64),
    "projected first, batch first": (
        SRU, dict(input_size=6, hidden_size=4, num_layers=1, proj_input_to_hidden_first=True, batch_first=True), "mask_pad", F32
    ),
    "states as torch.nn.LSTM's": (
        SRU, dict(input_size=6, hidden_size=3, num_layers=2, bidirectional=True, nn_rnn_compatible_return=True), "c0", F32
    ),
    "sequences end to end": (SRU, dict(input_size=6, hidden_size=3, bidirectional=True, batch_first=True), "starts", F32),
    "QRNN": (QRNN, dict(input_size=6, hidden_size=4, window=2, zoneout=0.25, num_layers=2), "hidden starts", F64),
    "QRNN, two directions": (
        QRNN, dict(input_size=6, hidden_size=4, window=3, bidirectional=True, batch_first=True), "mask_pad", F32
    ),
    "QRNN, fastai's": (fastai.QRNN, dict(input_size=6, hidden_size=4, n_layers=2, bidirectional=True), "", F32),
    "SRU++": (Attending, dict(input_size=6, hidden_size=4, proj_size=6, num_heads=2, bidirectional=True), "mask_pad", F32),
    "half precision": (SRU, dict(input_size=6, hidden_size=4, num_layers=1, bidirectional=True), "mask_pad", F16),
}  # fmt: skip


def module_of(name: str) -> tuple[torch.nn.Module, dict[str, str]]:
    kind, options, given, dtype = MODULES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**copy.deepcopy(options))
        model.requires_grad_(True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.8, 0.8)  # biases and v1's weight_c included
    time = "BL" if getattr(model, "batch_first", False) else "LB"
    first = "inp" if kind is fastai.QRNN else "input"
    state = "BD" if kind is SRUCell else "-BD"
    layouts = {first: time + "D", "c0": state, "hidden": state, "mask_pad": time, "starts": time}
    return model.to(dtype).eval(), {n: a for n, a in layouts.items() if n == first or n in given.split()}


def inputs_of(model: Any, layouts: dict[str, str], length: int, batch: int) -> dict[str, torch.Tensor]:
    dtype = next(p.dtype for p in model.parameters())
    d, layers = getattr(model, "output_size", 4), getattr(model, "num_layers", 1)
    if getattr(model, "nn_rnn_compatible_return", False):
        d, layers = model.hidden_size, layers * model.num_directions
    inputs = dict(
        input=normal(length, batch, 6, dtype=dtype),
        inp=normal(length, batch, 6, dtype=dtype),
        c0=normal(layers, batch, d, dtype=dtype),
        hidden=normal(layers, batch, d, dtype=dtype),
        mask_pad=torch.arange(length).unsqueeze(1) >= length - torch.arange(batch) % length,
        starts=(torch.arange(length).unsqueeze(1) + torch.arange(batch)) % 3 == 1,
    )
    if isinstance(model, SRUCell):
        inputs["c0"] = inputs["c0"][0]
    return {n: inputs[n].transpose(0, 1).contiguous() if a.startswith("BL") else inputs[n] for n, a in layouts.items()}


@both_exporters
@pytest.mark.parametrize("name", MODULES)
def test_a_module_s_model_computes_what_it_does(name: str, dynamo: bool, tmp_path: Path) -> None:
    model, layouts = module_of(name)
    exported = Exported(model, inputs_of(model, layouts, *EXAMPLE), layouts, tmp_path / "model.onnx", dynamo)
    exported.check()
    for length, batch in SIZES:
        inputs = inputs_of(model, layouts, length, batch)
        with torch.no_grad():
            assert_close(exported(inputs), model(**inputs), MODULES[name][3])


# ---- the function --------------------------------------------------------------------------------------------------

ARGUMENTS = dict(u="LBDk", x="LBD", bias="2D", weight_c="2D", c0="BD", mask_c="BD", mask_pad="LB", scale_x="1")
FUNCTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "u alone": (dict(), "u"),
    "u alone, k = 4, two directions": (dict(k=4, bidirectional=True), "u"),
    "QRNN": (dict(candidate="tanh", activation="tanh"), "u bias"),
    "all, state dropped out": (dict(scale_x=0.7), "u x bias weight_c c0 mask_c mask_pad"),
    "all, gate dropped out, two directions": (
        dict(mask_target="gate", bidirectional=True), "u x bias weight_c c0 mask_c mask_pad scale_x"
    ),
    "relu, flat": (dict(activation="relu", flat=True), "u x bias weight_c"),
    "selu, weights per step, two directions": (
        dict(activation="selu", bidirectional=True, per_step=True, save_every=None), "u x weight_c c0 mask_pad"
    ),
    "tanh, weights per step": (dict(activation="tanh", per_step=True), "u weight_c mask_pad"),
    "float32, uint8 padding": (dict(dtype=torch.float32, padding=torch.uint8), "u x bias weight_c mask_pad"),
    "float16, float32 parameters": (dict(dtype=F16, activation="selu"), "u x bias weight_c c0 scale_x"),
}  # fmt: skip


class Recurrence(torch.nn.Module):
    """Somebody's own module."""

    def __init__(self, names: tuple[str, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.names, self.options = names, options

    def forward(self, *tensors: torch.Tensor) -> Any:
        return sru(**dict(zip(self.names, tensors, strict=True)), **self.options)


def arguments_of(names: list[str], length: int, batch: int, *, k: int = 3, flat: bool = False, per_step: bool = False,
                 dtype: torch.dtype = F64, padding: torch.dtype = torch.bool) -> dict[str, torch.Tensor]:  # fmt: skip
    d, of_parameters = 4, torch.float32 if dtype == F16 else dtype
    pad = torch.arange(length).unsqueeze(1) >= length - torch.arange(batch) % length
    given = dict(
        u=normal(length, batch, d, k, dtype=dtype),
        x=normal(length, batch, d, dtype=dtype, seed=1),
        bias=normal(*([2 * d] if flat else [2, d]), dtype=of_parameters),
        weight_c=normal(*([length, batch, d, 2] if per_step else [2 * d] if flat else [2, d]), dtype=of_parameters, seed=2),
        c0=normal(batch, d, dtype=of_parameters),
        mask_c=normal(batch, d, dtype=of_parameters, seed=3).abs(),
        mask_pad=pad.to(padding),
        scale_x=torch.tensor([0.75], dtype=of_parameters),
    )
    if "mask_pad" in names:  # data there is never used
        for name in ("u", "x", *(["weight_c"] if per_step else [])):
            given[name][pad] = torch.nan
    return {n: given[n] for n in names}


@both_exporters
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_function_s_model_computes_what_it_does(name: str, dynamo: bool, tmp_path: Path) -> None:
    options, given = FUNCTIONS[name]
    names = given.split()
    kinds = {n: v for n, v in options.items() if n in ("k", "flat", "per_step", "dtype", "padding")}
    layouts = ARGUMENTS | (dict(weight_c="LBD2") if "per_step" in kinds else {})
    model = Recurrence(tuple(names), {n: v for n, v in options.items() if n not in kinds})
    exported = Exported(model, arguments_of(names, *EXAMPLE, **kinds), layouts, tmp_path / "model.onnx", dynamo, variadic=True)
    exported.check()
    for length, batch in SIZES:
        inputs = arguments_of(names, length, batch, **kinds)
        assert_close(exported(inputs), model(*inputs.values()), kinds.get("dtype", F64))


@both_exporters
def test_gates_that_are_nearly_open_or_shut_keep_their_digits(dynamo: bool, tmp_path: Path) -> None:
    """Over thousands of steps, forget biases up to 9, reset biases from -9: each column to 2e-5 of its own largest value."""
    length, d = 4000, 19
    forget = torch.linspace(-9, 9, d)
    given = dict(u=normal(length, 1, d, 3) * 0.1, bias=torch.stack((forget, -forget.abs())))
    small = dict(u=given["u"][:3], bias=given["bias"])
    exported = Exported(Recurrence(("u", "bias"), {}), small, ARGUMENTS, tmp_path / "model.onnx", dynamo, variadic=True)
    h, c_last = exported(given)
    u, bias = given["u"].double(), given["bias"].double()
    u_open = u.clone()
    u_open[..., 2] = 100 - bias[1]  # a reset gate of 1: h is c
    for result, expected, scale in (
        (h, sru(u, bias=bias)[0], sru(u, bias=bias)[0]),
        (c_last, sru(u, bias=bias)[1], sru(u_open, bias=bias)[0]),
    ):
        assert ((result - expected).abs().amax(0) <= 2e-5 * scale.abs().amax((0, 1))).all()


# ---- the other families, sequences laid end to end ---------------------------------------------------------------------

FAMILIES = {
    "sru, starts": (lambda u, starts: sru(u, weight_c=V2, starts=starts, bidirectional=True), 3),
    "sru, reverse": (lambda u, starts: sru(u, starts=starts, reverse=True), 3),
    "f, zoneout": (lambda u, starts: qrnn(u, pooling="f", zoneout=0.25, gate="update"), 2),
    "fo, starts": (lambda u, starts: qrnn(u, starts=starts, bidirectional=True, reverse=True), 3),
    "ifo, padding": (lambda u, starts: qrnn(u, pooling="ifo", mask_pad=starts), 4),
    "ifo, zoneout": (lambda u, starts: qrnn(u, pooling="ifo", zoneout=0.25), 4),
    "ifo, zoneout of steps": (lambda u, starts: qrnn(u, pooling="ifo", zoneout=u[..., 0] > 0.5, gate="update"), 4),
    "affine, padding": (lambda u, starts: linear_recurrence(u[..., 0].sigmoid(), u[..., 1], mask_pad=starts), 2),
    "affine, starts": (lambda u, starts: linear_recurrence(u[..., 0].sigmoid(), u[..., 1], starts=starts), 2),
    "complement, padding": (lambda u, starts: linear_recurrence(u[0, :, :, 0].sigmoid(), u[..., 1], form="complement",
                                                                mask_pad=starts, reverse=True), 2),
    "blend": (lambda u, starts: linear_recurrence(u[0, 0, :, 0].sigmoid(), u[..., 1], form="blend", bidirectional=True), 2),
}  # fmt: skip
V2 = normal(2, 4, seed=5)


@both_exporters
@pytest.mark.parametrize("case", FAMILIES)
def test_the_other_families_and_starts_are_exported(case, dynamo, tmp_path):
    function, k = FAMILIES[case]

    class Model(torch.nn.Module):
        def forward(self, u, starts):
            h, c = function(u, starts)
            return h + 0 * starts.unsqueeze(-1), c  # which the model must take, needed or not

    def inputs(length: int, batch: int) -> dict[str, torch.Tensor]:
        return {"u": normal(length, batch, 4, k), "starts": normal(length, batch, seed=9) > 0.3}

    exported = Exported(Model(), inputs(*EXAMPLE), {"u": "LBDK", "starts": "LB"}, tmp_path / "model.onnx", dynamo)
    exported.check()
    for size in SIZES:
        given = inputs(*size)
        assert_close(exported(given), Model()(**given), torch.float32)


@both_exporters
def test_what_is_not_a_number_in_one_sequence_is_not_in_the_next(dynamo, tmp_path):
    class Model(torch.nn.Module):
        def forward(self, u, starts):
            a, b, _ = u.unbind(-1)
            runs = sru(u, weight_c=V2, starts=starts), qrnn(u, starts=starts), linear_recurrence(a, b, starts=starts)
            h, c = zip(*runs, strict=True)
            return torch.cat(h, -1), torch.cat(c, -1)

    given = {"u": normal(6, 2, 4, 3), "starts": torch.arange(6).remainder(3).eq(0).unsqueeze(1).expand(6, 2).contiguous()}
    exported = Exported(Model(), given, {"u": "LBDK", "starts": "LB"}, tmp_path / "model.onnx", dynamo)
    expected = Model()(**given)
    given["u"][:3] = torch.nan
    h, c_last = exported(given)
    assert h[:3].isnan().all()
    assert_close((h[3:], c_last), (expected[0][3:], expected[1]), torch.float32)


@both_exporters
def test_decays_near_1_keep_their_digits(dynamo, tmp_path):
    """Over thousands of steps, of what is taken in down to 1e-7: each column to 2e-5 of its own largest value."""

    class Model(torch.nn.Module):
        def forward(self, a, u):
            runs = [linear_recurrence(a, u[..., 0], form=form) for form in ("complement", "blend")]
            runs += [qrnn(u, pooling="f"), qrnn(-u, pooling="f", gate="update")]
            h, c = zip(*runs, strict=True)
            return torch.cat(h, -1), torch.cat(c, -1)

    length, width = 4000, 17
    given = dict(a=torch.logspace(-7, -1, width).expand(length, 1, width), u=normal(length, 1, width, 2))
    given["u"][..., 1] = torch.linspace(16, 0, width)
    small = {n: t[:3] for n, t in given.items()}
    exported = Exported(Model(), small, {"a": "LBD", "u": "LBDK"}, tmp_path / "model.onnx", dynamo)
    exact = Model()(given["a"].double(), given["u"].double())
    scale = exact[0].abs().amax((0, 1))
    for result, expected in zip(exported(given), exact, strict=True):
        assert ((result - expected).abs().amax(tuple(range(result.dim() - 1))) <= 2e-5 * scale).all()


# ---- what the export leaves alone ----------------------------------------------------------------------------------


ONES = ("two directions", "one layer, k = 3, rescaled", "projected first, batch first")


@both_exporters
@pytest.mark.parametrize("example", [(1, 1), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("name", ONES)
def test_an_example_of_one_step_or_one_sample_is_as_good(
    name: str, example: tuple[int, int], dynamo: bool, tmp_path: Path
) -> None:
    model, layouts = module_of(name)
    exported = Exported(model, inputs_of(model, layouts, *example), layouts, tmp_path / "model.onnx", dynamo)
    for length, batch in SIZES:
        inputs = inputs_of(model, layouts, length, batch)
        with torch.no_grad():
            assert_close(exported(inputs), model(**inputs), MODULES[name][3])


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_old_opsets_have_all_that_is_needed(opset: int, tmp_path: Path) -> None:
    """Those that older runtimes read: by the exporter on TorchScript."""
    model, layouts = module_of("two directions")
    inputs = inputs_of(model, layouts, *EXAMPLE)
    exported = Exported(model, inputs, layouts, tmp_path / "model.onnx", dynamo=False, opset_version=opset)
    with torch.no_grad():
        assert_close(exported(inputs), model(**inputs), torch.float32)


@both_exporters
def test_a_bad_argument_is_named_as_ever(dynamo: bool, tmp_path: Path) -> None:
    given = dict(u=normal(5, 3, 4, 3), c0=normal(1, 4))  # would broadcast
    with pytest.raises(Exception, match="c0") as raised:  # the exporter on torch.export wraps it in its own
        Exported(Recurrence(("u", "c0"), {}), given, dict(u="---", c0="--"), tmp_path / "model.onnx", dynamo, variadic=True)
    assert "c0 has shape" in str(raised.getrepr(style="value"))


def test_a_program_of_torch_export_is_as_good_once_decomposed(tmp_path: Path) -> None:
    model, layouts = module_of("two directions")
    inputs = inputs_of(model, layouts, *EXAMPLE)
    dims = {name: torch.export.Dim(name) for name in "LB"}
    shapes = {name: {i: dims[d] for i, d in axes(layout).items()} for name, layout in layouts.items()}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    program = program.run_decompositions({torch.ops.cusru.sru_forward.default: cusru_onnx.sru_forward})
    torch.onnx.export(program, f=tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = inputs_of(model, layouts, 9, 2)
    results = session.run(None, {name: a.numpy() for name, a in inputs.items()})
    with torch.no_grad():
        assert_close(map(torch.from_numpy, results), model(**inputs), torch.float32)


def test_all_other_graphs_hold_the_operator() -> None:
    """Before an export to ONNX and after it."""
    model, layouts = module_of("stack")
    inputs = inputs_of(model, layouts, *EXAMPLE)

    def compile(graph: Any, _: Any) -> Any:
        assert [str(node.target) for node in graph.graph.nodes].count("cusru.sru_forward.default") == 2
        return graph

    for _ in range(2):
        exported = torch.export.export(model, (), inputs).graph
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs).inlined_graph
        assert [n.target for n in exported.nodes].count(torch.ops.cusru.sru_forward.default) == 2
        assert str(traced).count("cusru::sru_forward") == 2
        with torch.no_grad():
            torch.compile(model, backend=aot_autograd(fw_compiler=compile), fullgraph=True)(**inputs)
        torch.onnx.export(model, (inputs["input"],), dynamo=True, verbose=False)


def test_import_of_cusru_torch_loads_nothing_for_onnx() -> None:
    code = "import sys, torch; before = set(sys.modules); import cusru.torch; print(*sys.modules.keys() - before)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True, capture_output=True).stdout.split()
    assert "cusru.torch" in loaded
    assert not [n for n in loaded if n == "cusru.torch.onnx" or n.startswith(("onnx", "torch.onnx", "torch._higher_order_ops"))]
