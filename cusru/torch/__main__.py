"""`python -m cusru.torch`: run a program in which `import sru`, `cuda_functional` and `torchqrnn` find cusru.torch's classes."""

from __future__ import annotations

import importlib.util
import io
import os
import pkgutil
import sys
from importlib.machinery import BuiltinImporter, ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, NoReturn

from cusru.torch import install_as_sru, install_as_torchqrnn

USAGE = """\
usage: python -m cusru.torch SCRIPT [ARGUMENT ...]
       python -m cusru.torch -m MODULE [ARGUMENT ...]
       python -m cusru.torch -c CODE [ARGUMENT ...]

Run a program as python itself does, with cusru.torch.install_as_sru() and install_as_torchqrnn() called first: `import sru` and
`import torchqrnn` find the classes of cusru.torch, and so does `from cuda_functional import SRU`. SCRIPT may be a folder or a
zip file with a __main__.py. Processes that the program starts find them too.
"""


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    if not arguments:
        _exit_for_usage("a script, -m or -c is missing")
    kind = arguments[0][:2] if arguments[0].startswith("-") else ""
    if kind in ("-m", "-c"):  # -m module, or -mmodule, as for python
        rest = [arguments[0][2:], *arguments[1:]] if len(arguments[0]) > 2 else arguments[1:]
        if not rest:
            _exit_for_usage(f"{kind} needs an argument")
    elif kind:
        _exit_for_usage(f"{arguments[0]} is neither a script nor -m or -c (options of python go before -m cusru.torch)")
    else:
        rest = arguments

    install_as_sru()
    install_as_torchqrnn()
    _let_other_processes_find_it()
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        _set_first_path("")
        _run(compile(rest[0], "<string>", "exec", dont_inherit=True), None, __loader__=BuiltinImporter)
    elif kind == "-m":
        sys.argv = ["-m", *rest[1:]]  # while it is being found, as for python
        spec, code = _find_module(rest[0])
        sys.argv[0] = spec.origin or rest[0]
        _run(code, spec, __file__=spec.origin, __cached__=spec.cached, __package__=spec.parent, __loader__=spec.loader)
    else:
        sys.argv = rest
        _run_script(rest[0])


def _run_script(path: str) -> None:
    full = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)  # not normalised
    if os.path.isdir(full) or _is_archive(full):
        _set_first_path(full)
        finder: Any = pkgutil.get_importer(full)
        spec = finder.find_spec("__main__") if finder is not None else None
        if spec is None or spec.loader is None:
            _exit(f"can't find '__main__' module in {path!r}", 1)
        names = {"__file__": spec.origin, "__package__": "", "__loader__": spec.loader}
        _run(spec.loader.get_code("__main__"), spec, **names)
        return
    try:
        with io.open_code(full) as file:
            source = file.read()
    except OSError as error:
        _exit(f"can't open file {full!r}: [Errno {error.errno}] {error.strerror}", 2)
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    code = compile(source, full, "exec", dont_inherit=True)
    _run(code, None, __file__=full, __loader__=SourceFileLoader("__main__", full))


def _is_archive(path: str) -> bool:
    import zipfile

    return os.path.isfile(path) and not path.endswith(".py") and zipfile.is_zipfile(path)


def _find_module(name: str) -> tuple[ModuleSpec, CodeType]:
    """Of `python -m name`: the module, or the package's __main__."""
    for found in (name, f"{name}.__main__"):
        try:
            spec = importlib.util.find_spec(found)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{found}.".startswith(f"{error.name}."):
                raise  # a package above it lacks something
            _exit(f"Error while finding module specification for {found!r} (ModuleNotFoundError: {error})", 1)
        except ValueError:  # a module without a spec
            spec = None
        if spec is None:
            package = f"; {name!r} is a package and cannot be directly executed" if found != name else ""
            _exit(f"No module named {found}{package}", 1)
        if spec.submodule_search_locations is None:
            break
    assert spec is not None
    loader: Any = spec.loader
    code = loader.get_code(spec.name) if hasattr(loader, "get_code") else None
    if code is None:
        _exit(f"No code object available for {found}", 1)
    return spec, code


def _run(code: Any, spec: ModuleSpec | None, **names: Any) -> None:
    """In a module of its own, which stays `__main__`: what the program pickles, or starts, looks there."""
    module = ModuleType("__main__")
    module.__dict__.update(__spec__=spec, __builtins__=sys.modules["builtins"], __annotations__={}, **names)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _set_first_path(folder: str) -> None:
    """In the place of the current folder, which python put there for -m."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _let_other_processes_find_it() -> None:
    """multiprocessing hands sys.path on to what it starts, and other programs get the environment."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "stand_in")
    sys.path.insert(0 if sys.flags.safe_path else 1, folder)
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, others] if others else [folder])


def _exit_for_usage(problem: str) -> NoReturn:
    sys.stderr.write(f"{USAGE}\npython -m cusru.torch: error: {problem}\n")
    raise SystemExit(2)


def _exit(problem: str, status: int) -> NoReturn:
    sys.stderr.write(f"python -m cusru.torch: {problem}\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
