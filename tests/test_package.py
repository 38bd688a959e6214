"""What the package carries, what importing it costs, and that what the README shows runs."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest

import cusru

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
HEAVY = ("cupy", "torch", "jax", "tensorflow", "ml_dtypes", "scipy", "cusru.reference", "cusru.simulator")


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


def test_import_takes_under_a_fifth_of_a_second():
    """Beyond NumPy's own, and the best of some runs: a busy machine is no fault of the package."""
    code = "import time, numpy; start = time.perf_counter(); import cusru; print(time.perf_counter() - start)"
    best = float("inf")
    for attempt in range(12):
        best = min(best, float(python(code).stdout))
        if best < 0.2 and attempt >= 2:
            break
        time.sleep(0.1 * attempt)
    assert best < 0.2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"^import (\w+)", block, re.M)[1])
def test_readme_examples_run(block):
    for framework in re.findall(r"^import (\w+)", block, flags=re.M):
        extra = {"cupy": "cuda13"}.get(framework, framework)
        pytest.importorskip(framework, reason=f'{framework} is missing: pip install ".[{extra}]"')
    if "import cupy" in block:
        try:
            importlib.import_module("cupy").zeros(1).get()
        except Exception as error:
            pytest.skip(f"no CUDA device: {type(error).__name__}")
    assert python(block, timeout=300).stdout


def test_readme_shows_the_three_frameworks_and_the_commands():
    firsts = [re.search(r"^import (\w+)", block, re.MULTILINE)[1] for block in BLOCKS]
    assert firsts == ["cupy", "torch", "jax", "torch"]
    commands = re.findall(r"^    (pip .*)$", README, flags=re.M)
    assert commands == [
        "pip install . && python -m cusru",
        'pip install ".[test]" && pytest',
        'pip install ".[examples]" && python examples/char_lm.py',
        'pip install ".[cuda13,test,examples]" pytest-xdist && python -m benchmarks.device --out report',
    ]


def test_links_in_the_documents_lead_somewhere():
    for document in ("README.md", "CONTRIBUTING.md", "docs/performance.md"):
        path = ROOT / document
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), f"{document}: {target}"


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


def test_version_is_the_installed_one_and_in_the_changelog():
    assert re.search(rf"^## \[{re.escape(cusru.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    try:
        installed = importlib.metadata.version("cusru")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cusru is not installed: this is a bare checkout (pip install .)")
    assert installed == cusru.__version__
