"""A character language model on cusru: embedding, SRU layers, softmax; NumPy or CuPy alone, no framework.

    python examples/char_lm.py                  # trains for a minute on the source of Python's standard library
    python examples/char_lm.py --resume         # goes on from the checkpoint, for another minute

Needs `pip install ".[examples]"`, which brings matplotlib and tqdm; on a GPU also CuPy (".[cuda13]") with cuBLAS for the GEMMs
(`pip install nvidia-cublas`; for CUDA 12 ".[cuda12]" and nvidia-cublas-cu12).

The recurrence and its gradient are `cusru.sru_forward` and `cusru.sru_backward`; all else is here, in the order: text, model,
Adam, training, checkpoint, results, command line. Nothing in training depends on the clock, or on when a run ends: N steps,
and --resume up to M, give bit for bit what M steps in one go give (same machine, backend, libraries and number of threads).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import signal
import sys
import sysconfig
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# On the two shared cores that this was tuned on, two threads took up to 16 times as long over these small GEMMs as one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import cusru

Array = Any  # NumPy's or CuPy's

FORMAT = "cusru char_lm 1"
REST = "\ufffd"  # stands for every character that is not in the vocabulary
BITS = 1 / math.log(2)  # in a nat
RESET_BIAS = -1.0  # at the start: a highway that is rather open
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8  # Adam's
WARM_UP, HALF_LIFE = 30, 1000  # steps: the rate rises linearly, then falls as 1 / (1 + step / HALF_LIFE)
TEMPERATURE = 0.7  # of the sample; below 1 the probable characters are preferred
WINDOWS, WINDOW = 64, 512  # of held-out text that is evaluated: how many, and of how many characters


class Problem(Exception):
    """What the user is told, in one line, before exit status 2."""


# ---- text --------------------------------------------------------------------------------------------------------------

# Not code that people wrote to be read: tests (with deliberate oddities), tables that scripts generated; or not the library.
SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}


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
    frequent = (chr(code) for code in np.flatnonzero((counts > 0) & (counts * 100_000 >= len(train))))
    vocabulary = REST + "".join(c for c in frequent if (c.isprintable() or c in "\n\t") and c != REST)
    index = np.zeros(sys.maxunicode + 1, np.int32)
    index[[ord(c) for c in vocabulary]] = np.arange(len(vocabulary))
    counts = np.bincount(index[train_codes], minlength=len(vocabulary)) + 1  # one more each: none is impossible
    digest = hashlib.sha256(f"{len(train)} {train}{heldout}".encode()).hexdigest()
    unigram = -np.log2(counts / counts.sum())
    return Text(source, vocabulary, index[train_codes], index[heldout_codes], digest, unigram)


def heldout_windows(heldout: Array) -> Array:
    """(length + 1, windows): spread evenly, each character predicted at most once."""
    length = min(WINDOW, len(heldout) - 1)
    windows = min(WINDOWS, (len(heldout) - 1) // length)
    starts = np.arange(windows) * ((len(heldout) - 1) // windows)
    return heldout[starts + np.arange(length + 1)[:, None]]


# ---- model -------------------------------------------------------------------------------------------------------------


class Model:
    """Parameters and their gradients lie in one flat array each, so that Adam, clipping and the checkpoint see one vector."""

    def __init__(self, xp: Any, vocabulary: int, width: int, layers: int, dtype: str = "float32") -> None:
        self.xp, self.vocabulary, self.width, self.layers, self.dtype = xp, vocabulary, width, layers, dtype
        shapes: dict[str, tuple[int, ...]] = {"embedding": (vocabulary, width)}
        for i in range(layers):
            shapes |= {f"weight{i}": (width, 3 * width), f"bias{i}": (2, width), f"weight_c{i}": (2, width)}
        shapes |= {"softmax_weight": (width, vocabulary), "softmax_bias": (vocabulary,)}
        self.size = sum(math.prod(shape) for shape in shapes.values())
        self.parameters, self.gradient = xp.zeros(self.size, dtype), xp.zeros(self.size, dtype)
        self.p: dict[str, Array] = {}
        self.g: dict[str, Array] = {}
        start = 0
        for name, shape in shapes.items():
            part = slice(start, start + math.prod(shape))
            self.p[name], self.g[name] = self.parameters[part].reshape(shape), self.gradient[part].reshape(shape)
            start = part.stop
        self.scale_x = math.sqrt(1 + 2 * math.exp(RESET_BIAS))

    def initialise(self, rng: np.random.Generator) -> None:
        """Lei et al. 2018, https://arxiv.org/abs/1709.02755, section 3.2: weights uniform in +-sqrt(3 / d), so that each
        product keeps its input's variance, and the highway's input scaled by sqrt(1 + 2 exp(bias))."""
        for name, a in self.p.items():
            if name.startswith("bias"):
                a[1] = RESET_BIAS
            elif name != "softmax_bias":
                bound = math.sqrt(3 / (1 if name == "embedding" else self.width))
                if name.startswith("weight_c"):
                    bound = 0.5
                a[...] = self.xp.asarray(rng.uniform(-bound, bound, a.shape).astype(self.dtype))

    def forward(self, characters: Array, state: list[Array], keep: bool = True) -> Any:
        """(L, B) characters -> (L*B, V) logits, the states after the last step, and what `backward` needs if it is to keep it."""
        (length, batch), width, p, tape = characters.shape, self.width, self.p, []
        x = p["embedding"][characters]
        after = []
        for i in range(self.layers):
            u = x.reshape(-1, width) @ p[f"weight{i}"]  # one GEMM for all steps and the three projections, then (L, B, D, 3)
            u = u.reshape(length, batch, 3, width).transpose(0, 1, 3, 2)
            options = dict(bias=p[f"bias{i}"], weight_c=p[f"weight_c{i}"], c0=state[i], scale_x=self.scale_x)
            h, c, c_last = cusru.sru_forward(u, x, **options, save_every=1 if keep else None)
            tape.append((c, u, x, options) if keep else None)
            after.append(c_last)
            x = h
        x = x.reshape(-1, width)
        return x @ p["softmax_weight"] + p["softmax_bias"], after, [*tape, x]

    def backward(self, characters: Array, grad_logits: Array, tape: list[Any]) -> None:
        """Fills `gradient`, given the loss's with respect to the logits."""
        xp, (length, batch), width, p, g = self.xp, characters.shape, self.width, self.p, self.g
        g["softmax_weight"][...] = tape[-1].T @ grad_logits
        g["softmax_bias"][...] = grad_logits.sum(axis=0)
        grad_h = (grad_logits @ p["softmax_weight"].T).reshape(length, batch, width)
        for i in reversed(range(self.layers)):
            c, u, x, options = tape[i]
            grad_u = xp.empty((length, batch, 3, width), u.dtype)  # in memory as u is, for the GEMMs
            out = (grad_u.transpose(0, 1, 3, 2), None, g[f"bias{i}"], g[f"weight_c{i}"], None)
            # No gradient arrives at the last state: back-propagation through time is truncated there.
            grad_x = cusru.sru_backward(grad_h, None, c, u, x, **options, out=out).x
            grad_u = grad_u.reshape(-1, 3 * width)
            g[f"weight{i}"][...] = x.reshape(-1, width).T @ grad_u
            grad_h = grad_x + (grad_u @ p[f"weight{i}"].T).reshape(grad_x.shape)
        # The rows' sum by character, as a GEMM: unlike add.at on a GPU it always adds in the same order.
        one_hot = (xp.arange(self.vocabulary)[:, None] == characters.reshape(1, -1)).astype(grad_h.dtype)
        g["embedding"][...] = one_hot @ grad_h.reshape(-1, width)


def cross_entropy(xp: Any, logits: Array, targets: Array) -> tuple[Array, Array]:
    """The mean over the rows, in nats, and its gradient with respect to the logits, which are overwritten."""
    row, targets = xp.arange(len(logits)), targets.reshape(-1)
    logits -= logits.max(axis=1, keepdims=True)
    right = logits[row, targets]
    xp.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    nats = (xp.log(total[:, 0]) - right).mean(dtype=np.float64)
    logits /= total
    logits[row, targets] -= 1
    logits /= len(logits)
    return nats, logits


# ---- Adam --------------------------------------------------------------------------------------------------------------


def learning_rate(highest: float, step: int) -> float:
    return highest * min(1, step / WARM_UP) / (1 + step / HALF_LIFE)


def clip(xp: Any, gradient: Array, largest: float) -> float:
    """To at most this norm, of all parameters together. Returns what it was."""
    norm = float(xp.sqrt(xp.square(gradient).sum()))
    if norm > largest:
        gradient *= largest / norm
    return norm


def adam(xp: Any, parameters: Array, gradient: Array, m: Array, v: Array, step: int, rate: float) -> None:
    """Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, algorithm 1; `step` counts from 1. In place."""
    m += (1 - BETA1) * (gradient - m)
    v += (1 - BETA2) * (xp.square(gradient) - v)
    root = xp.sqrt(v / (1 - BETA2**step))
    root += EPSILON
    parameters -= rate / (1 - BETA1**step) * m / root


# ---- training ----------------------------------------------------------------------------------------------------------


class Run:
    """All that training depends on, and its history. `config`: the options by name."""

    def __init__(self, xp: Any, text: Text, config: dict[str, Any]) -> None:
        self.xp, self.text, self.config = xp, text, config
        self.chunks = len(text.train) // config["batch"] // config["length"]  # in an epoch
        if not self.chunks or len(text.heldout) < 2:
            size = f"--batch {config['batch']} times --length {config['length']}"
            raise Problem(f"{len(text.train)} characters to train on, {len(text.heldout)} held out: too few for {size}")
        self.model = Model(xp, len(text.vocabulary), config["width"], config["layers"])
        self.m, self.v = xp.zeros_like(self.model.parameters), xp.zeros_like(self.model.parameters)
        self.rng = np.random.default_rng(config["seed"])
        self.model.initialise(self.rng)
        self.step = self.chunk = self.start = 0
        self.state = self.fresh_state(config["batch"])
        self.train_bits: list[float] = []  # of each step
        self.heldout_bits: list[tuple[int, float]] = []  # (step, bits), every eval_every steps
        self.train_text, self.windows = xp.asarray(text.train), xp.asarray(heldout_windows(text.heldout))

    def fresh_state(self, batch: int) -> list[Array]:
        return [self.xp.zeros((batch, self.model.width), "float32") for _ in range(self.model.layers)]

    def next_chunk(self) -> Array:
        """(L + 1, B) characters. The text is a ring, cut into B streams; chunk after chunk they are read on, from state to
        state. Each epoch cuts elsewhere."""
        batch, length = self.config["batch"], self.config["length"]
        if self.chunk == 0:
            self.start = int(self.rng.integers(len(self.text.train)))
            self.state = self.fresh_state(batch)
        stream = self.start + np.arange(batch) * (len(self.text.train) // batch)
        places = (stream + self.chunk * length + np.arange(length + 1)[:, None]) % len(self.text.train)
        self.chunk = (self.chunk + 1) % self.chunks
        return self.train_text[self.xp.asarray(places)]

    def train_step(self) -> None:
        characters = self.next_chunk()
        logits, self.state, tape = self.model.forward(characters[:-1], self.state)
        nats, grad_logits = cross_entropy(self.xp, logits, characters[1:])
        self.model.backward(characters[:-1], grad_logits, tape)
        norm, bits = clip(self.xp, self.model.gradient, self.config["clip"]), float(nats) * BITS
        if not math.isfinite(norm + bits):  # before it reaches the parameters, which the checkpoint may take
            raise Problem(f"step {self.step + 1} diverged: loss {bits}, norm of the gradient {norm}; try a smaller --rate")
        self.step += 1
        rate = learning_rate(self.config["rate"], self.step)
        adam(self.xp, self.model.parameters, self.model.gradient, self.m, self.v, self.step, rate)
        self.train_bits.append(bits)

    def evaluate(self) -> float:
        """Bits per character of the held-out windows. Changes nothing."""
        total, length, state = 0.0, 64, self.fresh_state(self.windows.shape[1])
        for start in range(0, len(self.windows) - 1, length):
            part = self.windows[start : start + length + 1]
            logits, state, _ = self.model.forward(part[:-1], state, keep=False)
            total += float(cross_entropy(self.xp, logits, part[1:])[0]) * (len(part) - 1)
        return total / (len(self.windows) - 1) * BITS

    def train(self, until: float, steps: float, show: Callable[[float, bool], None], path: Path) -> bool:
        """Up to a time of the clock, one step at least, or to a number of steps; whether Ctrl-C ended it. Saves at each
        evaluation and at the end, also where the end is that nobody reads the output any more."""
        interrupted, first = False, self.step

        def interrupt(number: int, frame: Any) -> None:
            nonlocal interrupted
            interrupted = True  # the step is finished first, so that the checkpoint is whole
            signal.signal(number, before)  # a second Ctrl-C acts at once

        before = signal.getsignal(signal.SIGINT)
        if before != signal.SIG_IGN:  # a job in the background is not to be interrupted
            signal.signal(signal.SIGINT, interrupt)
        spent = 0.0  # in training steps
        try:
            while not interrupted and self.step < steps and (self.step == first or time.perf_counter() < until):
                begin = time.perf_counter()
                self.train_step()
                spent += time.perf_counter() - begin
                if evaluated := self.step % self.config["eval_every"] == 0:
                    self.heldout_bits.append((self.step, self.evaluate()))
                    self.save(path)
                show(spent, evaluated)
            self.save(path)
        except OSError:
            self.save(path)
            raise
        finally:
            signal.signal(signal.SIGINT, before)
        return interrupted

    # ---- checkpoint ----------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Array]:
        """The checkpoint's, in shape and dtype as a run of this step has them."""
        return {
            "parameters": self.model.parameters,
            "adam_m": self.m,
            "adam_v": self.v,
            "state": self.xp.stack(self.state),
            "train_bits": np.array(self.train_bits, np.float64),
            "heldout_bits": np.array(self.heldout_bits, np.float64).reshape(-1, 2),
        }

    def save(self, path: Path) -> None:
        about = {
            "format": FORMAT, "config": self.config, "step": self.step, "chunk": self.chunk, "start": self.start,
            "rng": self.rng.bit_generator.state, "vocabulary": self.text.vocabulary, "text_sha256": self.text.sha256,
            "text": self.text.source,
        }  # fmt: skip
        members: dict[str, Any] = {"about": np.array(json.dumps(about))} | {name: host(a) for name, a in self.arrays().items()}
        file = io.BytesIO()
        np.savez(file, **members)
        write(path, file.getvalue())

    def restore(self, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """ValueError and the like where these are not of such a run."""
        self.step, self.chunk, self.start = (about[name] for name in ("step", "chunk", "start"))
        if self.chunk not in range(self.chunks) or self.start not in range(len(self.text.train)):
            raise ValueError("the position is wrong")
        self.rng.bit_generator.state = about["rng"]
        if self.step != len(arrays["train_bits"]):
            raise ValueError(f"it has {len(arrays['train_bits'])} losses of {self.step} steps")
        self.train_bits = [0.0] * self.step  # until their shapes are checked
        self.heldout_bits = [(0, 0.0)] * (self.step // self.config["eval_every"])
        for name, expected in self.arrays().items():
            if (arrays[name].shape, arrays[name].dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"{name} has shape {arrays[name].shape} and dtype {arrays[name].dtype}")
        if not all(np.isfinite(a).all() for a in arrays.values()) or (arrays["adam_v"] < 0).any():
            raise ValueError("it holds a value that training never leaves")
        evaluations = np.arange(1, len(self.heldout_bits) + 1) * self.config["eval_every"]
        if about["vocabulary"] != self.text.vocabulary or (arrays["heldout_bits"][:, 0] != evaluations).any():
            raise ValueError("it contradicts itself")
        self.model.parameters[...] = self.xp.asarray(arrays["parameters"])  # in place: the parameters by name are its views
        self.m, self.v = self.xp.asarray(arrays["adam_m"]), self.xp.asarray(arrays["adam_v"])
        self.state = [self.xp.asarray(c) for c in arrays["state"]]
        self.train_bits = arrays["train_bits"].tolist()
        self.heldout_bits = [(int(step), bits) for step, bits in arrays["heldout_bits"].tolist()]


def host(a: Array) -> np.ndarray:
    return np.asarray(a.get() if hasattr(a, "get") else a)


def write(path: Path, data: bytes) -> None:
    """All of it or nothing: what was there stays until the new file is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Problem(f"cannot write {path}: {error.strerror or error}") from error
        raise


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except Problem:
        raise
    except Exception as error:  # whatever zipfile, NumPy and json make of wrong bytes
        raise Problem(f"{path} is damaged, or no checkpoint of char_lm: {one_line(error)}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What it says of itself, and its arrays. Every member is read to its end, where zip keeps a checksum."""
    if not path.exists():
        raise Problem(f"there is no checkpoint {path} to resume from")
    with refusing_damage(path):
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"the checksum of {wrong} is wrong")
        with np.load(io.BytesIO(data), allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
        about = json.loads(arrays.pop("about").item())
        if about["format"] != FORMAT:
            raise Problem(f"{path} has the format {about['format']!r}; this program reads {FORMAT!r}")
        if set(arrays) != {"parameters", "adam_m", "adam_v", "state", "train_bits", "heldout_bits"}:
            raise ValueError(f"its members are {', '.join(sorted(arrays))}")
        if set(about["config"]) != set(OPTIONS) or {type(about[name]) for name in ("step", "chunk", "start")} != {int}:
            raise ValueError("its description lacks something")
        for name, value in about["config"].items():
            if OPTIONS[name][0](str(value)) != value:
                raise ValueError(f"{name} is {value!r}")
        return about, arrays


# ---- results -----------------------------------------------------------------------------------------------------------


def sample(run: Run, count: int) -> str:
    """Text that the model makes up, after a line's end. Random numbers of its own: training's are not touched."""
    rng, state = np.random.default_rng([run.config["seed"], run.step]), run.fresh_state(1)
    vocabulary, character, text = run.text.vocabulary, max(run.text.vocabulary.find("\n"), 0), ""
    for _ in range(count):
        logits, state, _ = run.model.forward(run.xp.asarray([[character]]), state, keep=False)
        scores = host(logits)[0].astype(np.float64) / TEMPERATURE
        scores[0] = -np.inf  # REST is no character to write
        character = int(np.argmax(scores + rng.gumbel(size=len(scores))))  # the softmax's distribution
        text += vocabulary[character]
    return text


def draw(figure: Any, run: Run, reached: float, unigram: float, path: Path) -> None:
    axes = figure.add_subplot()
    axes.plot(range(1, run.step + 1), run.train_bits, color="0.7", label="training text, each step")
    axes.plot(*zip(*run.heldout_bits, (run.step, reached), strict=True), color="C0", marker=".", label="held-out text")
    axes.axhline(unigram, color="C3", linestyle="--", label="unigram entropy of the held-out text")
    axes.set(xlabel="step", ylabel="bits per character", title=f"held out: {reached:.3f} bits per character")
    axes.legend()
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    write(path, file.getvalue())


# ---- command line ------------------------------------------------------------------------------------------------------


def number(kind: type, low: float, high: float, above: bool = False) -> Callable[[str], Any]:
    """A parser of numbers from low (or only above it) to high."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None
        if not (low < value <= high if above else low <= value <= high):  # which a NaN is not
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low:g} and at most {high:g}")
        return value

    return parse


OPTIONS = {  # all that training depends on but the text; they lie in the checkpoint
    "width": (number(int, 1, 16384), 128, "of the embedding and of each layer"),
    "layers": (number(int, 1, 64), 2, "SRU layers"),
    "batch": (number(int, 1, 65536), 32, "streams of text that are read side by side"),
    "length": (number(int, 1, 65536), 64, "characters of each stream in a step, through which gradients go back"),
    "rate": (number(float, 0, 1, above=True), 0.01, "Adam's learning rate at its highest"),
    "clip": (number(float, 0, 1e9, above=True), 1.0, "largest norm of a step's gradient"),
    "eval_every": (number(int, 1, 10**9), 100, "steps between evaluations, each of which saves the checkpoint"),
    "seed": (number(int, 0, 2**63 - 1), 0, "of the random numbers"),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="char_lm",
        description="Train a character language model of SRU layers on the source of Python's standard library.",
        epilog="Exit status: 0; 2 for what it refuses; 130 after Ctrl-C, which saves the checkpoint.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--seconds", type=number(float, 0, 1e7, above=True), help="how long it trains (default 60)")
    until.add_argument("--steps", type=number(int, 1, 10**9), help="train to this step instead, those before --resume included")
    add(
        "--out",
        type=Path,
        default=Path("char_lm"),
        metavar="DIR",
        help="for checkpoint.npz and loss.png, of one run at a time (default: char_lm)",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in --out; without it, one there is overwritten")
    add("--text", type=Path, nargs="+", metavar="FILE", help="other text, whose last tenth is held out")
    add("--backend", choices=("numpy", "cupy"), help="default: cupy where it works, else numpy")
    for name, (kind, default, what) in OPTIONS.items():
        add(flag(name), type=kind, help=f"{what} (default {default})")
    add("--sample", type=number(int, 0, 10**6), default=600, help="characters of text to make up at the end (default 600)")
    return parser


def choose_backend(wanted: str | None) -> tuple[Any, str]:
    """The array module, and what to say of it."""
    without = f"NumPy {np.__version__}, on the CPU"
    if wanted == "numpy":
        return np, without
    try:
        cupy = importlib.import_module("cupy")
        a = cupy.ones((64, 64), "float32")
        float(cupy.square(a @ a).sum())  # a device, cuBLAS, and the compiler of kernels
        name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())["name"].decode()
        return cupy, f"CuPy {cupy.__version__}, on {name}"
    except Exception as error:
        if wanted == "cupy":
            mend = 'a CUDA device and pip install ".[cuda13]" nvidia-cublas (CUDA 12: ".[cuda12]" nvidia-cublas-cu12)'
            raise Problem(f"argument --backend: cupy needs {mend}: {one_line(error)}") from None
        return np, without if isinstance(error, ModuleNotFoundError) else f"{without} (CuPy: {one_line(error)})"


def need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Problem(f'{module.partition(".")[0]} is missing ({error}): pip install ".[examples]"') from error


def prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if taken := next((name for name in ("checkpoint.npz", "loss.png") if (folder / name).is_dir()), None):
            raise OSError(f"{taken} is a folder")
    except OSError as error:
        raise Problem(f"argument --out: cannot write in {folder}: {error.strerror or error}") from error


def run(options: argparse.Namespace) -> int:
    tqdm, figure = need("tqdm").tqdm, need("matplotlib.figure").Figure(figsize=(8, 5), layout="constrained")
    path, picture = options.out / "checkpoint.npz", options.out / "loss.png"
    about, arrays = read_checkpoint(path) if options.resume else ({}, {})
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    config = {name: default for name, (_, default, _) in OPTIONS.items()} | given | about.get("config", {})
    if wrong := next((name for name in given if given[name] != config[name]), None):
        raise Problem(f"argument {flag(wrong)}: {given[wrong]} contradicts {path}, which was made with {config[wrong]}")
    if options.steps and about and options.steps < about["step"]:
        raise Problem(f"argument --steps: {path} has done {about['step']} steps, more than {options.steps}")
    xp, backend = choose_backend(options.backend)
    prepare_folder(options.out)

    def say(line: str = "") -> None:
        if sys.stdout:  # which a shell may have closed
            tqdm.write(line, file=sys.stdout)  # past the progress bar
            sys.stdout.flush()

    say(f"backend   {backend}")
    text = prepare(options.text)
    training = Run(xp, text, config)
    if about:
        with refusing_damage(path):
            if about["text_sha256"] != text.sha256:
                raise Problem(f"argument --text: {path} was trained on another text: {about['text']}; this is: {text.source}")
            training.restore(about, arrays)
    unigram = float(text.unigram[host(training.windows)[1:]].mean())
    say(f"text      {text.source}")
    say(f"          {len(text.train):,} characters to train on, {training.windows[1:].size:,} of {len(text.heldout):,} held out")
    say(f"model     {training.model.size:,} parameters, {len(text.vocabulary)} characters in the vocabulary")
    if about:
        say(f"resumed   at step {training.step} of {path}")
    say(f"{'step':>8}{'seconds':>10}{'train':>9}{'held out':>10}{'characters/s':>14}   (train, held out: bits per character)")

    seconds = None if options.steps else options.seconds or 60.0
    total, unit = (float(options.steps), "steps") if seconds is None else (seconds, "s")
    form = f"{{percentage:3.0f}}%|{{bar:20}}| {{n:.0f}}/{{total:.0f}} {unit}{{postfix}}"
    bar = tqdm(
        total=total,
        initial=training.step if options.steps else 0,
        bar_format=form,
        disable=not (sys.stderr and sys.stderr.isatty()),
    )

    def show(training_seconds: float, evaluated: bool) -> None:
        recent, heldout = float(np.mean(training.train_bits[-50:])), training.heldout_bits[-1:]
        speed = (training.step - first) * config["batch"] * config["length"] / training_seconds
        elapsed = time.perf_counter() - begin
        of_heldout = f"{heldout[0][1]:.3f}" if heldout else "-"
        bar.set_postfix_str(f"train {recent:.3f}, held out {of_heldout} bits/char, {speed:,.0f} char/s", refresh=False)
        bar.update((training.step if options.steps else min(elapsed, total)) - bar.n)
        if evaluated:
            say(f"{training.step:>8}{elapsed:>10.1f}{recent:>9.3f}{of_heldout:>10}{speed:>14,.0f}")

    first, begin = training.step, time.perf_counter()
    with bar:
        interrupted = training.train(begin + seconds if seconds else math.inf, options.steps or math.inf, show, path)
    if interrupted:
        say(f"interrupted: {path} holds step {training.step}; --resume goes on from there")
        return 130
    reached = training.evaluate()
    draw(figure, training, reached, unigram, picture)
    say(f"\nafter {training.step} steps:")
    say(f"  held-out bits per character  {reached:.3f}")
    say(f"  unigram entropy              {unigram:.3f}   of the held-out text, under the training text's character frequencies")
    say(f"  below it by                  {unigram - reached:.3f}")
    say(f"wrote {path} and {picture}")
    if options.sample:
        encoding = (sys.stdout and sys.stdout.encoding) or "utf-8"
        say(f"\na sample:\n{sample(training, options.sample).encode(encoding, 'replace').decode(encoding)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    try:
        return run(make_parser().parse_args(arguments))
    except MemoryError:
        what: Any = "not enough memory; a smaller --batch, --length or --width needs less"
    except (Problem, RuntimeError) as error:  # cusru's, of a backend that the environment asks for
        what = error
    except OSError as error:  # of the output: a reader that left, a full disk. The checkpoint has been saved
        what = f"cannot write what there is to say: {error.strerror or error}"
        with contextlib.suppress(OSError, ValueError):  # what Python flushes at its end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    print(f"char_lm: error: {what}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
