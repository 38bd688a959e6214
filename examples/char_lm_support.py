"""What serves char_lm.py and has nothing to do with cusru: text, files, command line, progress."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import signal
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = "cusru char_lm 2"
REST = "\ufffd"  # stands for every character that is not in the vocabulary
COLOURS = {"sru": ("lightsteelblue", "C0"), "qrnn": ("peachpuff", "C1")}  # of the training and of the held-out text
WINDOWS, WINDOW = 64, 512  # of held-out text that is evaluated: how many, and of how many characters
# Not code that people wrote to be read: tests (with deliberate oddities), tables that scripts generated; or not the library.
SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}

# ---- text --------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    source: str
    vocabulary: str  # REST, then the others in code order
    train: np.ndarray  # indices into the vocabulary
    heldout: np.ndarray
    sha256: str
    unigram: np.ndarray  # (V,): bits of each character under the training text's frequencies


def read(paths: list[Path], what: str) -> str:
    try:
        return "".join(path.read_text("utf-8", errors="replace") for path in paths)
    except OSError as error:
        raise Problem(f"{what}: cannot read {error.filename}: {error.strerror}") from error


def read_stdlib() -> tuple[str, str, str]:
    """What text it is, the training text, and the held-out text: a twentieth of the files, by a hash of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [n for n in names if SKIPPED.isdisjoint(n.split("/")) and not n.startswith("_sysconfigdata")]
    train = [root / n for n in names if zlib.crc32(n.encode()) % 20]
    heldout = [root / n for n in names if not zlib.crc32(n.encode()) % 20]
    if not train or not heldout:
        raise Problem(f"the source of the standard library is not in {root} (zipped?); name other text by --text")
    source = f"standard library of Python {sys.version.split()[0]}, {len(train)} files to train on, {len(heldout)} held out"
    return source, read(train, "standard library"), read(heldout, "standard library")


def prepare(files: list[Path] | None) -> Text:
    if files:
        whole = read(files, "argument --text")
        cut = len(whole) - len(whole) // 10
        source, train, heldout = f"{' '.join(map(str, files))}, the last tenth held out", whole[:cut], whole[cut:]
    else:
        source, train, heldout = read_stdlib()
    train_codes, heldout_codes = (np.frombuffer(part.encode("utf-32-le"), np.uint32) for part in (train, heldout))
    counts = np.bincount(train_codes, minlength=sys.maxunicode + 1)
    # What a terminal can show, and is at least 1 in 100,000: all the others together are one character.
    frequent = map(chr, np.flatnonzero((counts > 0) & (counts * 100_000 >= len(train))))
    vocabulary = REST + "".join(c for c in frequent if (c.isprintable() or c in "\n\t") and c != REST)
    index = np.zeros(sys.maxunicode + 1, np.int32)
    index[[ord(c) for c in vocabulary]] = np.arange(len(vocabulary))
    counts = np.bincount(index[train_codes], minlength=len(vocabulary)) + 1  # one more each: none is impossible
    sha256 = hashlib.sha256(f"{len(train)} {train}{heldout}".encode()).hexdigest()
    return Text(source, vocabulary, index[train_codes], index[heldout_codes], sha256, -np.log2(counts / counts.sum()))


def heldout_windows(heldout: np.ndarray) -> np.ndarray:
    """(length + 1, windows): spread evenly, each character predicted at most once."""
    length = min(WINDOW, len(heldout) - 1)
    windows = min(WINDOWS, (len(heldout) - 1) // length)
    starts = np.arange(windows) * ((len(heldout) - 1) // windows)
    return heldout[starts + np.arange(length + 1)[:, None]]


# ---- files -------------------------------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, cell: str) -> Path:
    return folder / ("checkpoint.npz" if cell == "sru" else f"checkpoint-{cell}.npz")


def prepare_folder(*files: Path) -> None:
    """Theirs, so that they can be written at the end."""
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if taken := [file.name for file in files if file.is_dir()]:
            raise OSError(f"{taken[0]} is a folder")
    except OSError as error:
        raise Problem(f"argument --out: cannot write in {folder}: {error.strerror or error}") from error


def write(path: Path, fill: Callable[[Any], Any]) -> None:
    """All of it or nothing: what was there stays until the new file is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def digest(arrays: dict[str, np.ndarray]) -> str:
    parts = (f"{name} {a.dtype.str} {a.shape}".encode() + a.tobytes() for name, a in sorted(arrays.items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def write_checkpoint(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    arrays = {"about": np.array(json.dumps({"format": FORMAT, **about})), **arrays}
    write(path, lambda file: np.savez(file, **arrays, sha256=np.array(digest(arrays))))


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What was written, or a Problem: zip has a checksum of each member, the digest ties them together."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if wrong := file.zip.testzip():
                raise ValueError(f"the checksum of {wrong} is wrong")
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays["about"].item())
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}, not {FORMAT!r}")
        about["config"].setdefault("cell", "sru")  # there was a time when it was the only one
        if arrays.pop("sha256").item() != digest(arrays):
            raise ValueError("it is not as it was written")
        return about, arrays
    except FileNotFoundError:
        raise Problem(f"there is no checkpoint {path} to resume from") from None
    except Exception as error:  # whatever zipfile, NumPy and json make of wrong bytes
        raise Problem(f"{path} is damaged, or no checkpoint that this program reads: {one_line(error)}") from error


def save(run: Any, path: Path) -> None:
    about = dict(config=run.config, step=run.step, chunk=run.chunk, start=run.start, rng=run.rng.bit_generator.state)
    about |= dict(vocabulary=run.text.vocabulary, text_sha256=run.text.sha256, text=run.text.source)
    arrays = dict(parameters=run.model.parameters, adam_m=run.m, adam_v=run.v, state=run.xp.stack(run.state))
    arrays |= dict(train_bits=np.array(run.train_bits), heldout_bits=np.array(run.heldout_bits).reshape(-1, 2))
    write_checkpoint(path, about, {name: host(a) for name, a in arrays.items()})


def restore(run: Any, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """What `save` saved, as `read_checkpoint` returns it."""
    run.step, run.chunk, run.start, run.rng.bit_generator.state = (about[n] for n in ("step", "chunk", "start", "rng"))
    run.model.parameters[...] = run.xp.asarray(arrays["parameters"])  # in place: the parameters by name are its views
    run.m, run.v, state = (run.xp.asarray(arrays[name]) for name in ("adam_m", "adam_v", "state"))
    run.state = list(state)
    run.train_bits, run.heldout_bits = arrays["train_bits"].tolist(), arrays["heldout_bits"].tolist()


def draw(path: Path, reaches: list[tuple[Any, float]], unigram: float) -> None:
    """Bits per character: of each run and what it has reached, at each step and held out, and by frequencies alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, titles = figure.add_subplot(), []
    for run, reached in reaches:
        name, (pale, strong) = run.config["cell"].upper(), COLOURS[run.config["cell"]]
        steps, heldout = zip(*run.heldout_bits, (run.step, reached), strict=True)
        axes.plot(range(1, run.step + 1), run.train_bits, color=pale, zorder=1, label=f"{name}, training text, each step")
        label = f"{name}, held-out text ({run.model.size:,} parameters)"
        axes.plot(steps, heldout, color=strong, marker=".", zorder=2, label=label)
        titles.append(f"{name} {reached:.3f}")
    axes.axhline(unigram, color="C3", linestyle="--", label="unigram entropy of the held-out text")
    axes.set(xlabel="step", ylabel="bits per character", title=f"held out: {', '.join(titles)} bits per character")
    axes.legend()
    axes.grid(alpha=0.3)
    write(path, lambda file: figure.savefig(file, format="png", dpi=120))


# ---- command line ------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """What the user is told, in one line, before exit status 2."""


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """A type for argparse."""

    def parse(text: str) -> Any:
        if not low <= (value := kind(text)) <= high:  # which a NaN is not
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it where `kind` refuses the text
    return parse


def choice(*names: str) -> Callable[[str], str]:
    """A type for argparse: choices, which a checkpoint's options go through too."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(names)}")
        return text

    return parse


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(arguments: list[str] | None, table: dict[str, Any]) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any]]:
    """The options; and what `read_checkpoint` returns, whose config takes the place of the table's defaults, or empty dicts."""
    parser = argparse.ArgumentParser(
        prog="char_lm",
        description="Train a character language model of SRU or QRNN layers on the source of Python's standard library.",
        epilog="Exit status: 0; 2 for what it refuses; 130 after Ctrl-C and 143 after SIGTERM, which save the checkpoint.",
        allow_abbrev=False,
    )
    add, until, default = parser.add_argument, parser.add_mutually_exclusive_group().add_argument, "(default %(default)s)"
    until("--seconds", type=number(float, 1e-9, 1e7), default=60.0, help=f"how long it trains {default}")
    until("--steps", type=number(int, 1, 10**9), help="train to this step instead, those before --resume included")
    files = f"for checkpoint.npz (QRNN: checkpoint-qrnn.npz) and loss.png, of one run at a time {default}"
    add("--out", type=Path, default="char_lm", metavar="DIR", help=files)
    add("--resume", action="store_true", help="go on from the checkpoint in --out; without it, one there is overwritten")
    add("--text", type=Path, nargs="+", metavar="FILE", help="other text, whose last tenth is held out")
    add("--backend", choices=("numpy", "cupy"), help="default: cupy where it works, else numpy")
    for name, (kind, value, what) in table.items():
        add(flag(name), type=kind, default=value, help=f"{what} {default}")
    add("--sample", type=number(int, 0, 10**6), default=600, help=f"characters of text to make up at the end {default}")

    options, about, arrays = parser.parse_args(arguments), {}, {}
    for package in ("matplotlib", "tqdm"):
        importlib.import_module(package)  # before the work whose results they show
    if options.resume:
        path = checkpoint_path(options.out, options.cell)
        about, arrays = read_checkpoint(path)
        parser.set_defaults(**about["config"])
        options = parser.parse_args(arguments)  # again: what differs from the checkpoint now, the user has asked for
        for name, value in about["config"].items():
            if (given := getattr(options, name)) != value:
                raise Problem(f"argument {flag(name)}: {given} contradicts {path}, which was made with {value}")
        if options.steps and options.steps < about["step"]:
            raise Problem(f"argument --steps: {path} has done {about['step']} steps, more than {options.steps}")
    return options, about, arrays


def host(a: Any) -> np.ndarray:
    return np.asarray(a.get() if hasattr(a, "get") else a)


def choose_backend(wanted: str | None, compute: Callable[[Any], Any]) -> tuple[Any, str]:
    """The first array module with which it computes something, and what to say of it."""
    failed = ""
    for name, title in ("cupy", "CuPy"), ("numpy", "NumPy"):
        if wanted in (None, name):
            try:
                xp = importlib.import_module(name)
                result = compute(xp)
                host(result)  # once the device is done
                return xp, f"{title} {xp.__version__}, on {result.device}{failed}"
            except Exception as error:  # no package, device, library or compiler; or CUSRU_SIMULATE asks for what is not there
                failed += f" ({title}: {one_line(error)})"
    if wanted == "cupy":
        failed += '; it needs a CUDA device and pip install ".[cuda13]" nvidia-cublas (CUDA 12: ".[cuda12]" nvidia-cublas-cu12)'
    raise Problem(f"argument --backend: nothing to compute on{failed}")


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Returns its exit status. What goes wrong is told in one line, whatever has become of the output."""

    def run(arguments: list[str] | None = None) -> int:
        # A shell may have closed them.
        sys.stdout, sys.stderr = (stream or io.TextIOWrapper(io.BytesIO()) for stream in (sys.stdout, sys.stderr))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace", line_buffering=True)
        try:
            return main(arguments)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except ImportError as error:
            what: Any = f'{error.name} is missing ({error}): pip install ".[examples]"'
        except MemoryError:
            what = "not enough memory; a smaller --batch, --length or --width needs less"
        except Problem as problem:
            what = problem
        except OSError as error:  # of the output: a reader that left, a full disk
            what = f"cannot write what there is to say: {error.strerror or error}"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what Python flushes at its end goes
        print(f"char_lm: error: {what}", file=sys.stderr)
        return 2

    return run


class Progress(contextlib.AbstractContextManager["Progress"]):
    """How far a run is from `steps`, or else from `seconds`: a bar on a terminal, and a line at each evaluation."""

    def __init__(self, run: Any, steps: int | None, seconds: float) -> None:
        from tqdm import tqdm

        self.run, self.first, self.begin, self.by_time = run, run.step, time.perf_counter(), not steps
        self.done, self.goal, unit = (run.step, steps, "steps") if steps else (0.0, seconds, "s")
        form = "{percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f} {unit}{postfix}"
        self.bar = tqdm(total=self.goal, initial=self.done, unit=unit, bar_format=form, disable=None)

    def show(self, evaluated: bool) -> None:
        run, elapsed = self.run, time.perf_counter() - self.begin
        self.done = min(elapsed, self.goal) if self.by_time else run.step
        speed = (run.step - self.first) * run.config["batch"] * run.config["length"] / elapsed
        heldout = f"{run.heldout_bits[-1][1]:.3f}" if run.heldout_bits else "-"
        status = f"train {np.mean(run.train_bits[-50:]):.3f}, held out {heldout} bits/char, {speed:,.0f} char/s"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(self.done - self.bar.n)
        if evaluated:
            self.bar.write(f"{run.step:>8} steps {elapsed:>8.1f} s   {status}")

    def __exit__(self, *_: object) -> None:
        self.bar.close()


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM go into a list, for the step to be finished and the checkpoint to be whole. A second acts at once."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    # What is ignored stays so: a job in the background is not to be interrupted.
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
