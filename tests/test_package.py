"""What the package carries, what importing it costs, and that what the documents show runs."""

import ast
import base64
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from importlib import resources
from pathlib import Path

import pytest
from conftest import not_as_installed

import cusru

ROOT = Path(__file__).parent.parent
PACKAGE = Path(cusru.__file__).parent  # ROOT / "cusru" in a checkout, elsewhere where an installed cusru is tested
README = (ROOT / "README.md").read_text()
DOCUMENTS = (
    "README.md", "docs/torch.md", "docs/migrating-from-sru.md", "docs/migrating-from-qrnn.md", "docs/linear-recurrence.md",
    "docs/sru-and-qrnn.md", "docs/embedding.md", "docs/jax.md",
)  # fmt: skip
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S) for name in DOCUMENTS}
HEAVY = (
    "cupy", "torch", "jax", "tensorflow", "ml_dtypes", "scipy", "cusru.reference", "cusru.simulator", "cusru.torch", "cusru.jax",
)  # fmt: skip


def python(code, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, text=True, check=True, capture_output=True, **options)


def test_import_needs_numpy_alone():
    blocker = (
        "import sys, importlib.abc\n"
        "class Blocker(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        root = name.partition('.')[0]\n"
        "        if root not in sys.stdlib_module_names and root not in ('numpy', 'cusru'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import numpy, cusru\n"
        "cusru.sru_forward(numpy.ones((2, 1, 1, 3)))\n"
    )
    python(blocker)


def test_import_pulls_in_no_framework():
    loaded = python("import sys, cusru; print(*sys.modules)").stdout.split()
    assert not set(HEAVY) & set(loaded)


@pytest.mark.xdist_group("time")
def test_import_takes_under_a_fifth_of_a_second():
    """Beyond NumPy's own."""
    best_time("import numpy", "import cusru")


def best_time(before, code):
    """That code after `before`, in a process of its own, takes under a fifth of a second in the best of some runs: a busy machine
    is no fault of the package."""
    timed = f"import time\n{before}\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    best = float("inf")
    for attempt in range(12):
        best = min(best, float(python(timed).stdout))
        if best < 0.2 and attempt >= 2:
            break
        time.sleep(0.1 * attempt)
    assert best < 0.2


FIRST_STEP = """
import cusru.torch
h, c = cusru.torch.SRU(16, 16, 2, dropout=0.1)(torch.randn(20, 4, 16))
(h.sum() + c.sum()).backward()
"""


@pytest.mark.xdist_group("time")
def test_import_of_cusru_torch_and_a_model_s_first_step_take_under_a_fifth_of_a_second():
    """Beyond torch's own import."""
    need("torch")
    best_time("import torch", FIRST_STEP)


def test_only_those_who_compile_load_the_compiler():
    need("torch")
    loaded = python(f"import sys, torch\n{FIRST_STEP}\nprint(*sys.modules)").stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd", "sympy"} & set(loaded) - beside_torch()


def beside_torch():
    """The modules that torch loads by itself."""
    return set(python("import sys, torch; print(*sys.modules)").stdout.split())


@pytest.mark.parametrize("compiler_first", [False, True])
def test_the_compiler_knows_cusru_whichever_is_loaded_first(compiler_first):
    need("torch")
    first, second = ("import torch._dynamo", FIRST_STEP)[:: 1 if compiler_first else -1]
    python(
        f"import torch\n{first}\n{second}\n"
        "graphs = []\n"
        "compiled = torch.compile(cusru.torch.sru, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)\n"
        "u = torch.randn(5, 2, 4, 3, requires_grad=True)\n"
        "assert torch.equal(compiled(u)[0], cusru.torch.sru(u)[0])\n"
        "assert [node.name for node in graphs[0].graph.nodes if node.op == 'call_function'][0] == '_sru', graphs[0].graph\n"
        "def step(u):\n"
        "    cusru.torch.sru(u)[0].sum().backward()\n"
        "torch.compile(step, backend='eager')(u)\n"
        "assert u.grad.abs().sum() > 0\n"
    )


def test_import_of_cusru_torch_pulls_in_torch_alone():
    need("torch")
    loaded = python("import sys, cusru.torch; print(*sys.modules)").stdout.split()
    assert not {"cupy", "jax", "tensorflow", "cusru.simulator", "cusru.jax"} & set(loaded)


def test_cusru_torch_can_be_imported_again():
    need("torch")
    python(
        "import sys, torch, cusru.torch\n"
        "for name in [name for name in sys.modules if name.startswith('cusru')]:\n"
        "    del sys.modules[name]\n"
        "import cusru.torch\n"
        "u = torch.randn(5, 2, 4, 3, requires_grad=True)\n"
        "cusru.torch.sru(u)[0].sum().backward()\n"
        "assert u.grad.abs().sum() > 0\n"
    )


def lacking(framework):
    """Why a block that imports it cannot run here, or None."""
    if importlib.util.find_spec(framework) is None:
        extra = {"cupy": "cuda13", "onnxruntime": "onnx"}.get(framework, framework)
        return f'{framework} is missing: pip install ".[{extra}]"'
    if framework == "cupy":
        try:
            importlib.import_module("cupy").zeros(1).get()
        except Exception as error:
            return f"no CUDA device: {type(error).__name__}"
    return None


def need(framework):
    if reason := lacking(framework):
        pytest.skip(reason)


def frameworks(block):
    """Those that a block needs."""
    imported = re.findall(r"^(?:import|from) (?:cusru\.)?(cupy|torch|jax|tensorflow|onnxruntime)\b", block, flags=re.M)
    return list(dict.fromkeys(imported))


RUN_BLOCKS = """
import contextlib, io, json, sys, traceback
results = {}
for number, block in json.loads(sys.stdin.read()).items():
    output, error = io.StringIO(), None
    with contextlib.redirect_stdout(output):
        try:
            exec(compile(block, f"block {number}", "exec"), {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
    results[number] = (output.getvalue(), error)
print(json.dumps(results))
"""


@functools.cache
def outcomes(document):
    """What the blocks of a document print, and their tracebacks: each by itself, in order, in one process, which imports once."""
    runnable = {i: block for i, block in enumerate(BLOCKS[document]) if not any(map(lacking, frameworks(block)))}
    return json.loads(python(RUN_BLOCKS, input=json.dumps(runnable), timeout=300).stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("document", "number"),
    [
        pytest.param(name, i, id=f"{name}-{i}", marks=pytest.mark.xdist_group(name))  # whose blocks one process runs, for all
        for name, blocks in BLOCKS.items()
        for i in range(len(blocks))
    ],
)
def test_what_the_documents_show_runs(document, number):
    for framework in frameworks(BLOCKS[document][number]):
        need(framework)
    output, error = outcomes(document)[str(number)]
    assert not error, error
    assert output
    assert "False" not in output, output  # of a comparison that is shown


def test_readme_shows_the_three_frameworks_and_the_commands():
    firsts = [re.search(r"^import (\w+)", block, re.MULTILINE)[1] for block in BLOCKS["README.md"]]
    assert firsts == ["torch", "cupy", "torch", "jax", "torch"]
    assert "from cusru.torch import SRU  # was: from sru import SRU\n" in BLOCKS["README.md"][0]
    commands = re.findall(r"^    (pip .*)$", README, flags=re.M)
    assert commands == [
        "pip install . && python -m cusru",
        'pip install ".[test]" && pytest',
        'pip install ".[examples]" && python examples/char_lm.py',
        'pip install ".[cuda13,test,examples]" pytest-xdist && python -m benchmarks.device --out report',
    ]


def test_links_in_the_documents_lead_somewhere():
    for document in (*DOCUMENTS, "CONTRIBUTING.md", "docs/README.md", "docs/performance.md"):
        path = ROOT / document
        for target, _, heading in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", path.read_text())):
            if target.startswith("https://"):
                continue
            to = Path(os.path.normpath(path.parent / target)) if target else path
            if to.is_relative_to(ROOT / "cusru"):
                to = PACKAGE / to.relative_to(ROOT / "cusru")
            assert to.exists(), f"{document}: {target}"
            assert not heading or heading in anchors(to), f"{document}: {target}#{heading}"


def test_every_document_is_a_step_from_the_page_that_leads_to_them():
    linked = re.findall(r"\]\((\S+\.md)\)", (ROOT / "docs/README.md").read_text())
    documents = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert documents <= set(linked), documents - set(linked)
    assert "](docs/README.md)" in README
    runnable = {document.removeprefix("docs/") for document in DOCUMENTS}
    shown = {name for name in documents if "```python" in (ROOT / "docs" / name).read_text()}
    assert shown <= runnable, f"whose blocks nothing runs: {shown - runnable}"


def anchors(path):
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_package_reaches_its_sources_and_its_types():
    files = resources.files("cusru")
    assert files.joinpath("py.typed").is_file()
    for folder, pattern, least in (("kernels", r"\.cuh?$", 4), ("simulator", r"\.(h|cpp)$", 2)):
        names = [file.name for file in files.joinpath(folder).iterdir() if re.search(pattern, file.name)]
        assert len(names) >= least
        assert all(files.joinpath(folder, name).read_text() for name in names)


def test_every_public_name_is_documented():
    assert cusru.__doc__
    for name in cusru.__all__:
        assert getattr(cusru, name).__doc__


def section(title):
    """Of docs/torch.md."""
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^##|\Z)", (ROOT / "docs/torch.md").read_text(), flags=re.M | re.S)[1]


def test_every_public_name_of_cusru_torch_is_documented():
    need("torch")
    torch = importlib.import_module("cusru.torch")
    document = (ROOT / "docs/torch.md").read_text()
    for name in torch.__all__:
        assert getattr(torch, name).__doc__
        assert f"`{name}`" in document or f"`cusru.torch.{name}`" in document
    for function in (torch.sru, torch.qrnn, torch.linear_recurrence):
        signature, told = inspect.signature(function), section(f"`cusru.torch.{function.__name__}`")
        tabled = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", told, flags=re.M)
        assert [name for row in tabled for name in re.findall(r"\w+", row)] == list(signature.parameters)
        for name, parameter in signature.parameters.items():
            shown = name if parameter.default is parameter.empty else f"{name}={parameter.default!r}".replace("'", '"')
            assert shown in told, shown


def test_every_public_name_of_cusru_jax_is_documented_with_its_arguments():
    need("jax")
    module, document = importlib.import_module("cusru.jax"), (ROOT / "docs/jax.md").read_text()
    for name in module.__all__:
        assert getattr(module, name).__doc__
        assert f"`{name}`" in document or f"`cusru.jax.{name}`" in document
    for function in (module.sru, module.qrnn, module.linear_recurrence):
        told = re.search(rf"cusru\.jax\.{function.__name__}\((.*?)\)\n", document, flags=re.S)[1]
        given = [
            name if p.default is p.empty else f"{name}={p.default!r}"
            for name, p in inspect.signature(function).parameters.items()
        ]
        assert [one for one in re.split(r",\s+", told) if one != "*"] == [one.replace("'", '"') for one in given]
    for name, p in inspect.signature(module.SRU).parameters.items():
        assert f"`{name}`" in document if p.default is p.empty else f"`{name}={p.default!r}`".replace("'", '"') in document


@pytest.mark.parametrize(("module", "column"), [("SRU", 1), ("SRUCell", 2)])
def test_every_argument_of_a_module_is_documented_with_its_default(module, column):
    need("torch")
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|", section("Arguments"), flags=re.M)
    shown = {row[0]: row[column].strip("`") for row in rows if row[column] != "-"}
    parameters = inspect.signature(getattr(importlib.import_module("cusru.torch"), module)).parameters
    assert shown == {n: "required" if p.default is p.empty else repr(p.default) for n, p in parameters.items()}


def test_every_argument_of_srupp_is_documented_with_its_default():
    need("torch")
    shown = {
        name: value.strip("`") for name, value in re.findall(r"^\| `(\w+)` \| (required|`.*?`) \| ", section("SRU++"), flags=re.M)
    }
    parameters = inspect.signature(importlib.import_module("cusru.torch").SRUpp).parameters
    assert shown == {n: "required" if p.default is p.empty else repr(p.default) for n, p in parameters.items()}


@pytest.mark.parametrize(("kind", "column"), [("QRNNLayer", 1), ("QRNN", 1), ("fastai.QRNNLayer", 2), ("fastai.QRNN", 2)])
def test_every_argument_of_a_qrnn_is_documented_with_its_default(kind, column):
    need("torch")
    guide = (ROOT / "docs/migrating-from-qrnn.md").read_text()
    table = guide.split("Of the layers:" if "Layer" in kind else "Of the stacks:")[1].split("\n\n")[1]
    shown = {}
    for row in re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|", table, flags=re.M):
        names, values = re.findall(r"`(\w+)`", row[0]), row[column].split(", ")
        shown |= {n: v.strip("`") for n, v in zip(names, values * len(names), strict=False) if v not in ("-", "by keyword")}
    module, _, name = kind.rpartition(".")
    found = getattr(importlib.import_module(f"cusru.torch.{module}" if module else "cusru.torch"), name)
    parameters = {n: p for n, p in inspect.signature(found).parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert shown == {n: "required" if p.default is p.empty else repr(p.default) for n, p in parameters.items()}


def test_version_is_the_installed_one_and_in_the_changelog():
    assert re.search(rf"^## \[{re.escape(cusru.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    try:
        installed = importlib.metadata.version("cusru")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cusru is not installed: this is a bare checkout (pip install .)")
    assert installed == cusru.__version__


def test_the_citation_is_of_this_version_and_its_date_the_changelog_s():
    cited = dict(re.findall(r'^([\w-]+): "?([^"\n]+)', (ROOT / "CITATION.cff").read_text(), flags=re.M))
    version, date = re.search(r"^## \[(.*?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M).groups()
    assert (cited["version"], cited["date-released"], cited["license"]) == (version, date, "MIT")
    assert version == cusru.__version__


def test_github_runs_what_ci_runs_and_the_readme_shows():
    """As the project's one script and README's commands, with no right to write."""
    yaml = pytest.importorskip("yaml", reason='needs PyYAML: pip install ".[dev]"')
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in workflow["jobs"].values())
    run = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert "bash .ci/run" in run["everything"]
    assert (ROOT / ".ci/run").is_file()
    assert run["readme"] == re.findall(r"^    (pip .*)$", README, flags=re.M)[:2]
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    pythons = {"3.11", *workflow["jobs"]["readme"]["strategy"]["matrix"]["python"]}
    assert pythons == {one.rpartition(" ")[2] for one in ours if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", one)}


@pytest.fixture
def installed(tmp_path):
    """A folder as pip leaves it, with a package called cusru."""
    files = {"cusru/__init__.py": "one = 1", "cusru/kernels/sru.cu": "// none", "cusru-1.dist-info/METADATA": "Name: cusru"}
    lines = ["cusru/__pycache__/__init__.cpython-311.pyc,,", "cusru-1.dist-info/RECORD,,"]
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(text)}")
    (tmp_path / "site/cusru-1.dist-info/RECORD").write_text("\n".join(lines))
    return tmp_path / "site"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda site: None, None),
        (lambda site: (site / "cusru/__init__.py").write_text("one = 2"), "cusru/__init__.py is not as it was installed"),
        (lambda site: (site / "cusru/kernels/sru.cu").unlink(), "cusru/kernels/sru.cu is not as it was installed"),
        (lambda site: (site / "cusru/more.py").touch(), "cusru/more.py is none of the files that were installed"),
        (lambda site: (site / "cusru-1.dist-info/RECORD").write_text("__editable__.pth,,"), "no cusru that a wheel brought"),
        (lambda site: (site.parent / "cusru").mkdir(), "is there, and would be tested instead"),
    ],
    ids=["as installed", "a changed byte", "a lost file", "a stray file", "editable", "a checkout"],
)
def test_an_installed_cusru_is_told_from_any_other(installed, change, reason):
    """By what conftest.py asks before the tests run on it, in CI's last step."""
    change(installed)
    loaded = [str(installed / "cusru/__init__.py")]
    reasons = [*not_as_installed(installed, loaded, beside=installed.parent / "cusru")]
    assert not reasons if reason is None else any(reason in one for one in reasons), reasons


def test_a_cusru_that_was_imported_from_elsewhere_is_none_that_was_installed(installed, tmp_path):
    reasons = [*not_as_installed(installed, [str(tmp_path / "clone/cusru/__init__.py")], beside=tmp_path / "cusru")]
    assert reasons == [f"{tmp_path}/clone/cusru/__init__.py is none of the files that were installed"]


ONE_LOADER = """
import sys
from importlib.machinery import PathFinder

class One:  # as a frozen program's: one for all modules, to which nothing can be added
    __slots__ = ()
    @staticmethod
    def create_module(spec):
        return None
    @staticmethod
    def exec_module(module):
        exec(compile(open(module.__spec__.origin).read(), module.__spec__.origin, "exec"), module.__dict__)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name.startswith("torch._dynamo") else None
        if spec is not None and str(spec.origin).endswith(".py"):
            spec.loader = one
            return spec

one = One()
"""


def test_a_loader_that_is_shared_by_all_modules_stays_as_it_is():
    need("torch")
    python(
        f"{ONE_LOADER}\nimport torch\n"
        "sys.meta_path.insert(0, Finder)\n"
        "import cusru.torch\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('torch._dynamo').origin and 'torch._dynamo' not in sys.modules\n"
        "import torch._dynamo\n"
        "assert torch._dynamo.__spec__.loader is torch._dynamo.__loader__ is one\n"
        "u = torch.randn(5, 2, 4, 3)\n"
        "assert torch.equal(torch.compile(cusru.torch.sru, fullgraph=True, backend='eager')(u)[0], cusru.torch.sru(u)[0])\n"
    )


def test_a_compiler_that_is_blocked_is_not_asked_for():
    need("torch")
    python(f"import sys, torch\nsys.modules['torch._dynamo'] = None\n{FIRST_STEP}")


#: As a call travels: a module may import those that come after it, at its head or within a function
ORDER = (
    "__main__", "measuring", "__init__", "api", "call", "problem", "plan", "raw_kernels", "specialisation", "reference_affine",
    "reference", "simulator", "linear_gradients", "dlpack", "arguments",
)  # fmt: skip


def test_imports_run_one_way_from_the_public_function_to_the_kernel() -> None:
    """No circle, and no arrow up; not even one that only a type checker would follow."""
    found = {}
    for path in (*PACKAGE.glob("*.py"), PACKAGE / "simulator" / "__init__.py"):
        name = path.parent.name if path.parent != PACKAGE else path.stem
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "cusru":
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cusru."):
                imported.add((node.module or "").split(".")[1])
            elif isinstance(node, ast.Import):
                imported |= {"__init__" for alias in node.names if alias.name.split(".")[0] == "cusru"}
        found[name] = {"__init__" if one in ("__version__", "sru_forward", "sru_backward") else one for one in imported}
    assert found.keys() == set(ORDER)
    arrows_up = [(a, b) for a, those in found.items() for b in those if ORDER.index(b) <= ORDER.index(a)]
    assert not arrows_up
    assert found["arguments"] == found["dlpack"] == set(), "they know of nobody"
