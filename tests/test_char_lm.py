"""`examples/char_lm.py`: it learns, its gradient is right, a resumed run is the run itself, and what it refuses."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import missing

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "char_lm.py"
for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f'{package} is missing: pip install ".[examples]"')

sys.path.insert(0, str(SCRIPT.parent))
import char_lm  # noqa: E402
import char_lm_support as support  # noqa: E402

SMALL = ("--backend", "numpy", "--width", "12", "--batch", "3", "--length", "7", "--eval-every", "4", "--sample", "20")


@pytest.fixture
def text(tmp_path):
    """A short one, which a run reads several times over: 1800 characters to train on are 85 steps."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} plus {i * 7 % 13} is {i + i * 7 % 13}\n" for i in range(120))[:2000], encoding="utf-8")
    return path


@pytest.fixture
def train(text, monkeypatch, tmp_path):
    """train(folder, *options) runs it on the short text; the exit status."""
    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)

    def run(folder, *options, sizes=SMALL, on=text):
        options = ["--text", str(on), "--out", str(tmp_path / folder), *sizes, *options]
        try:
            return char_lm.main(options)
        except SystemExit as stop:  # argparse's
            return stop.code

    return run


def members(folder, name="checkpoint.npz"):
    with np.load(folder / name, allow_pickle=False) as file:
        return {name: (file[name].dtype.str, file[name].shape, file[name].tobytes()) for name in file.files}


def error_line(capsys):
    """The one line of a refusal, which is no traceback."""
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("char_lm: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def command(*options, **keywords):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("CUSRU_SIMULATE", None)
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)],
        env=environment, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL, **keywords,
    )  # fmt: skip


# ---- learning ----------------------------------------------------------------------------------------------------------


def check_results(printed, folder, least):
    """What a run prints at its end, and the picture; the bits per character lie at least so far below the unigram entropy."""
    import matplotlib.colors
    import matplotlib.image

    reached, unigram, below = (
        float(re.search(rf"^ *{label} +(-?\d+\.\d+)", printed, re.M)[1])
        for label in ("held-out bits per character", "unigram entropy", "below it by")
    )
    assert below == pytest.approx(unigram - reached, abs=2e-3)
    assert below >= least
    assert 4 < unigram < 5  # of Python source
    assert len(printed.partition("a sample:\n")[2].strip()) > 100
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(folder / "loss.png")
    assert min(pixels.shape[:2]) >= 300
    for line in ("lightsteelblue", "C0", "C3"):  # the training text's, the held-out text's, the unigram entropy's
        wanted = matplotlib.colors.to_rgb(line)
        assert (np.abs(pixels[..., :3] - wanted).max(axis=2) < 0.01).sum() > 100, line


def test_it_learns_the_standard_library_in_seconds(tmp_path):
    run = command("--backend", "numpy", "--steps", 220, "--batch", 16, "--eval-every", 110, "--out", tmp_path, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("backend   NumPy")
    assert run.stderr == ""  # no bar where there is no terminal
    assert re.search(r"^ +110 .*\n +220 ", run.stdout, re.M)
    check_results(run.stdout, tmp_path, least=0.75)


@pytest.mark.long
def test_a_minute_brings_it_a_bit_and_a_half_below_the_unigram_entropy(tmp_path):
    begin = time.monotonic()
    run = command("--backend", "numpy", cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert time.monotonic() - begin < 90
    check_results(run.stdout, tmp_path / "char_lm", least=1.5)


def test_the_held_out_files_are_no_training_files_and_no_tests(monkeypatch):
    read = []
    monkeypatch.setattr(support, "read", lambda paths, what: read.append(paths) or "text")
    support.read_stdlib()
    support.read_stdlib()
    (train, heldout), again = read[:2], read[2:]
    assert [train, heldout] == again
    assert len(train) > 100
    assert len(heldout) > 10
    assert not set(train) & set(heldout)
    for files in (train, heldout):
        assert files == sorted(files, key=lambda path: path.as_posix())
        assert not any({"test", "tests", "site-packages"} & set(path.parts[-3:]) for path in files)


def test_the_unigram_entropy_is_the_best_that_frequencies_alone_can_do(tmp_path):
    path = tmp_path / "abc"
    path.write_text("aab" * 3000 + "aab" * 334, encoding="utf-8")  # the last tenth has the frequencies of all
    text = support.prepare([path])
    bits = text.unigram[text.heldout].mean()
    assert bits == pytest.approx(-(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3)), abs=2e-3)
    assert 2.0**-text.unigram @ np.ones(len(text.vocabulary)) == pytest.approx(1)


def test_held_out_windows_are_spread_and_predict_no_character_twice():
    for size in (2, 100, 513, 600, 40_000, 100_000):
        windows = support.heldout_windows(np.arange(size))
        assert (np.diff(windows, axis=0) == 1).all(), "each is a stretch of the text"
        predicted = windows[1:].ravel()
        assert len(set(predicted)) == predicted.size == min(windows.shape[1] * (len(windows) - 1), size - 1)
        assert predicted.size >= min(size - 1, 64 * 512) * 0.5
        assert windows.max() > 0.4 * size, "not only of its beginning"


@pytest.mark.parametrize("cell", char_lm.CELLS)
def test_held_out_bits_are_those_of_each_character_after_all_before_it(text, cell):
    """Against the model run on each window whole, in one piece."""
    run = char_lm.Run(np, support.prepare([text]), {name: default for name, (_, default, _) in char_lm.OPTIONS.items()} | {
        "cell": cell, "width": 12, "batch": 3, "length": 7,
    })  # fmt: skip
    windows = np.asarray(run.windows)
    assert len(windows) > 2 * 64, "more than one part"
    logits, _, _ = run.model.forward(windows[:-1], run.model.fresh_state(windows.shape[1]), keep=False)
    logits = logits.astype(np.float64)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), windows[1:].ravel()]
    assert run.evaluate() == pytest.approx(nats.mean() / np.log(2), abs=1e-5)


def test_the_learning_rate_rises_then_falls_with_the_step_alone():
    assert char_lm.learning_rate(0.3, 1) == pytest.approx(0.3 / 30 / 1.001)
    assert char_lm.learning_rate(0.3, 30) == pytest.approx(0.3 / 1.03)
    assert char_lm.learning_rate(0.3, 1000) == pytest.approx(0.15)
    assert char_lm.learning_rate(0.3, 3000) == pytest.approx(0.075)


def test_what_no_terminal_should_print_is_no_character(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"a\x1b[31m\x00\xff\xfe\r\n\t" * 500)
    text = support.prepare([path])
    assert text.vocabulary[0] == support.REST
    assert set(text.vocabulary[1:]) == set("a[31m\n\t")
    assert np.bincount(text.train)[0] > 0
    assert (text.train < len(text.vocabulary)).all()


# ---- the gradient ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", char_lm.CELLS)
def test_the_gradient_is_that_of_the_loss(monkeypatch, cell):
    """Of every kind of parameter, in float64, against central differences; characters repeat, and a state is carried in."""
    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)
    rng, length, batch, vocabulary, width, layers = np.random.default_rng(1), 5, 3, 6, 4, 2
    model = char_lm.Model(np, vocabulary, width, layers, cell, dtype="float64")
    model.initialise(rng)
    model.parameters += rng.normal(0, 0.2, model.size)
    characters = rng.integers(vocabulary, size=(length + 1, batch))
    state = [rng.normal(size=zero.shape) for zero in model.fresh_state(batch)]  # the QRNN's last x too, a constant

    def loss():
        logits, _, _ = model.forward(characters[:-1], state, keep=False)
        return float(char_lm.cross_entropy(np, logits, characters[1:])[0])

    logits, after, tape = model.forward(characters[:-1], state)
    model.backward(characters[:-1], char_lm.cross_entropy(np, logits, characters[1:])[1], tape)
    assert [a.shape for a in after] == [a.shape for a in state]
    numeric, step = np.empty_like(model.parameters), 1e-5
    for i in range(model.size):
        there = model.parameters[i]
        values = []
        for model.parameters[i] in (there + step, there - step):
            values.append(loss())
        model.parameters[i] = there
        numeric[i] = (values[0] - values[1]) / (2 * step)
    np.testing.assert_allclose(model.gradient, numeric, rtol=1e-6, atol=1e-9)
    assert all(np.abs(g).max() > 1e-4 for g in model.g.values())


def test_the_qrnn_is_the_paper_s(monkeypatch):
    """Bradbury et al. 2016, equations 2 (a window of 2) and 4 (fo-pooling), character by character and without cusru."""
    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)
    rng, width = np.random.default_rng(7), 5
    model = char_lm.Model(np, 6, width, 2, "qrnn", dtype="float64")
    model.parameters[:] = rng.normal(size=model.size)
    characters, zero, p = rng.integers(6, size=9), np.zeros(width), model.p
    last, c, expected = [zero, zero], [zero, zero], []
    for character in characters:
        x = p["embedding"][character]
        for i in range(2):
            w1, w2 = p[f"weight{i}"].reshape(2, width, 3, width)
            z, f, o = np.einsum("i,ikj->kj", last[i], w1) + np.einsum("i,ikj->kj", x, w2) + p[f"bias{i}"]
            f, o = 1 / (1 + np.exp(-f)), 1 / (1 + np.exp(-o))
            last[i], c[i] = x, f * c[i] + (1 - f) * np.tanh(z)
            x = o * c[i]
        expected.append(x @ p["softmax_weight"] + p["softmax_bias"])
    logits, after, _ = model.forward(characters[:, None], model.fresh_state(1))
    np.testing.assert_allclose(logits, expected, rtol=1e-12)
    np.testing.assert_allclose([a[:, 0] for a in after], np.stack([c, last], axis=1), rtol=1e-12)


def test_weights_start_with_the_variance_that_keeps_the_input_s():
    model = char_lm.Model(np, 50, 200, 2)
    model.initialise(np.random.default_rng(0))
    for name, deviation in (("embedding", 1), ("weight0", 200**-0.5), ("weight1", 200**-0.5), ("softmax_weight", 200**-0.5)):
        assert model.p[name].std() == pytest.approx(deviation, rel=0.02), name
        assert np.abs(model.p[name]).max() <= deviation * 3**0.5 * (1 + 1e-6), name
    assert (model.p["bias0"] == [[0], [char_lm.RESET_BIAS]]).all()
    qrnn = char_lm.Model(np, 50, 200, 1, "qrnn")
    qrnn.initialise(np.random.default_rng(0))
    assert qrnn.p["weight0"].std() == pytest.approx(400**-0.5, rel=0.02)
    assert not qrnn.p["bias0"].any()
    assert model.scale_x == pytest.approx((1 + 2 * np.exp(char_lm.RESET_BIAS)) ** 0.5)


def test_adam_is_the_published_algorithm():
    rng = np.random.default_rng(4)
    gradients, parameters = rng.normal(size=(5, 3)), rng.normal(size=3)
    m, v, got = np.zeros(3), np.zeros(3), parameters.copy()
    for step, gradient in enumerate(gradients, 1):
        char_lm.adam(np, got, gradient, m, v, step, 0.1)
    beta1, beta2 = char_lm.BETA1, char_lm.BETA2
    for step in range(1, 6):
        weights = np.arange(step)[::-1, None]
        mean = (1 - beta1) * (beta1**weights * gradients[:step]).sum(axis=0) / (1 - beta1**step)
        square = (1 - beta2) * (beta2**weights * gradients[:step] ** 2).sum(axis=0) / (1 - beta2**step)
        parameters = parameters - 0.1 * mean / (np.sqrt(square) + char_lm.EPSILON)
    np.testing.assert_allclose(got, parameters, rtol=1e-12)


def test_clipping_shortens_what_is_too_long_and_nothing_else():
    for gradient, expected in (([3.0, 4.0], [1.5, 2.0]), ([0.3, 0.4], [0.3, 0.4])):
        a = np.array(gradient)
        assert char_lm.clip(np, a, 2.5) == pytest.approx(np.hypot(*gradient))
        np.testing.assert_allclose(a, expected)


@pytest.mark.parametrize("cell", char_lm.CELLS)
def test_chunks_with_the_state_carried_are_one_long_text(text, monkeypatch, cell):
    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)
    model = char_lm.Model(np, 6, 8, 2, cell)
    model.initialise(np.random.default_rng(2))
    characters, zero = np.random.default_rng(3).integers(6, size=(20, 3)), model.fresh_state(3)
    whole, after, _ = model.forward(characters, zero)
    first, state, _ = model.forward(characters[:7], zero)
    second, state, _ = model.forward(characters[7:8], state)  # of one step
    third, state, _ = model.forward(characters[8:], state)
    np.testing.assert_allclose(np.concatenate([first, second, third]), whole, atol=1e-5)
    np.testing.assert_allclose(state, after, atol=1e-5)


@pytest.mark.parametrize("cell", char_lm.CELLS)
def test_a_step_starts_from_the_state_in_which_the_last_one_ended(text, monkeypatch, cell):
    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)
    config = dict(cell=cell, width=4, layers=2, batch=3, length=7, seed=0, rate=0.1, clip=1.0)
    run, twin = (char_lm.Run(np, support.prepare([text]), config) for _ in range(2))
    state = twin.state
    for _ in range(3):
        characters = twin.next_chunk()
        logits, state, _ = run.model.forward(characters[:-1], state)
        expected = char_lm.cross_entropy(np, logits, characters[1:])[0] / np.log(2)
        run.train_step()
        assert run.train_bits[-1] == pytest.approx(expected)
        np.testing.assert_array_equal(run.state, state)


def test_an_epoch_reads_every_stream_on_from_where_it_was(text):
    run = char_lm.Run(np, support.prepare([text]), dict(cell="sru", width=4, layers=1, batch=3, length=7, seed=0))
    chunks = [run.next_chunk() for _ in range(run.chunks)]
    assert run.chunk == 0
    for chunk, following in itertools.pairwise(chunks):
        np.testing.assert_array_equal(chunk[-1], following[0])  # the last target is the next input
    read = sum(len(chunk) - 1 for chunk in chunks) * 3
    assert len(run.text.train) - read < 3 * (7 + 1)


# ---- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(8,), (5,), (1, 2, 7), (86, 90)], ids=str)  # at an evaluation, between two, past an epoch
def test_a_resumed_run_is_bit_for_bit_the_run_in_one_go(train, tmp_path, capsys, stops):
    last = stops[-1] + 6
    assert train("whole", "--steps", str(last)) == 0
    expected, printed = members(tmp_path / "whole"), capsys.readouterr().out
    assert train("parts", "--steps", str(stops[0])) == 0
    for stop in (*stops[1:], last):
        capsys.readouterr()
        assert train("parts", "--resume", "--steps", str(stop), sizes=("--backend", "numpy", "--sample", "20")) == 0
    assert members(tmp_path / "parts") == expected
    again = capsys.readouterr().out
    for part in (r"after \d+ steps:\n(?:  .*\n){3}", r"a sample:\n(?s:.*)"):
        assert re.search(part, again)[0] == re.search(part, printed)[0]
    assert (tmp_path / "parts" / "loss.png").read_bytes() == (tmp_path / "whole" / "loss.png").read_bytes()


@pytest.mark.parametrize("stops", [(8,), (1, 2, 7), (86, 90)], ids=str)
def test_a_resumed_qrnn_is_bit_for_bit_the_run_in_one_go(train, tmp_path, stops):
    last, name = stops[-1] + 6, "checkpoint-qrnn.npz"
    assert train("whole", "--cell", "qrnn", "--steps", str(last)) == 0
    assert train("parts", "--cell", "qrnn", "--steps", str(stops[0])) == 0
    for stop in (*stops[1:], last):
        assert train("parts", "--cell", "qrnn", "--resume", "--steps", str(stop), sizes=SMALL[:2]) == 0
    assert members(tmp_path / "parts", name) == members(tmp_path / "whole", name)
    assert (tmp_path / "parts" / "loss.png").read_bytes() == (tmp_path / "whole" / "loss.png").read_bytes()
    assert not (tmp_path / "parts" / "checkpoint.npz").exists()


def test_a_checkpoint_from_before_there_was_a_choice_of_cells_is_an_sru_s(train, tmp_path, capsys):
    for folder, steps in (("whole", "9"), ("old", "5")):
        assert train(folder, "--steps", steps) == 0
    path = tmp_path / "old" / "checkpoint.npz"
    about, arrays = support.read_checkpoint(path)
    assert about["config"].pop("cell") == "sru"
    support.write_checkpoint(path, about, {name: a for name, a in arrays.items() if name != "about"})
    assert train("old", "--resume", "--steps", "9", sizes=SMALL[:2]) == 0
    assert members(tmp_path / "old") == members(tmp_path / "whole")


def test_a_run_of_some_seconds_is_the_run_of_as_many_steps(train, tmp_path):
    assert train("timed", "--seconds", "0.4") == 0
    steps = json.loads(np.load(tmp_path / "timed" / "checkpoint.npz")["about"].item())["step"]
    assert steps > 0
    assert train("counted", "--steps", str(steps)) == 0
    assert members(tmp_path / "timed") == members(tmp_path / "counted")


def test_evaluations_change_nothing_in_training(train, tmp_path):
    assert train("often", "--steps", "12", "--eval-every", "1") == 0
    assert train("never", "--steps", "12", "--eval-every", "100") == 0
    often, never = members(tmp_path / "often"), members(tmp_path / "never")
    for name in ("parameters", "adam_m", "adam_v", "state", "train_bits"):
        assert often[name] == never[name], name


def test_two_processes_compute_the_same_bits(text, tmp_path):
    for folder, more in (("a", ["--steps", "20"]), ("b", ["--steps", "9"]), ("b", ["--steps", "20", "--resume"])):
        run = command(*SMALL, "--text", text, "--out", tmp_path / folder, *more, timeout=120)
        assert run.returncode == 0, run.stderr
    assert members(tmp_path / "a") == members(tmp_path / "b")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_a_checkpoint_that_resumes(train, text, tmp_path, number):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("CUSRU_SIMULATE", None)
    with subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *SMALL, "--seconds", "60", "--text", str(text), "--out", str(tmp_path / "cut")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        for line in process.stdout:
            if re.match(r" +8 ", line):
                process.send_signal(number)
                break
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == ""
    step = int(re.search(r"^interrupted: .* holds step (\d+)", printed, re.M)[1])
    assert step >= 8
    assert train("cut", "--resume", "--steps", str(step + 5)) == 0
    assert train("whole", "--steps", str(step + 5)) == 0
    assert members(tmp_path / "cut") == members(tmp_path / "whole")


# ---- two cells ---------------------------------------------------------------------------------------------------------


def drawn(folder):
    """The cells whose held-out curve is in the picture."""
    import matplotlib.colors
    import matplotlib.image

    pixels = matplotlib.image.imread(folder / "loss.png")[..., :3]
    colours = {cell: matplotlib.colors.to_rgb(strong) for cell, (_, strong) in support.COLOURS.items()}
    return [cell for cell, colour in colours.items() if (np.abs(pixels - colour).max(axis=2) < 0.01).sum() > 100]


def test_both_cells_are_in_one_picture_whichever_ran_first(train, tmp_path, capsys):
    assert train("run", "--steps", "10") == 0
    assert drawn(tmp_path / "run") == ["sru"]
    before = members(tmp_path / "run")
    reached = re.search(r"held-out bits per character +(\S+)", capsys.readouterr().out)[1]
    assert train("run", "--steps", "13", "--cell", "qrnn") == 0
    assert re.search(rf"^drawn beside it: SRU, [\d,]+ parameters, after 10 steps: {reached}$", capsys.readouterr().out, re.M)
    assert drawn(tmp_path / "run") == ["sru", "qrnn"]
    assert members(tmp_path / "run") == before
    assert train("other", "--steps", "13", "--cell", "qrnn") == 0
    assert train("other", "--steps", "10") == 0
    for name in ("checkpoint.npz", "checkpoint-qrnn.npz"):
        assert members(tmp_path / "other", name) == members(tmp_path / "run", name)
    assert (tmp_path / "other" / "loss.png").read_bytes() == (tmp_path / "run" / "loss.png").read_bytes()


@pytest.mark.parametrize("what", ["--rate", "--text", "damaged"])
def test_what_cannot_be_compared_is_left_out_with_a_line(checkpoint, train, text, tmp_path, capsys, what):
    path, data = checkpoint
    if what == "--text":
        text.write_text(text.read_text("utf-8").replace("7", "8", 1), encoding="utf-8")
    if what == "damaged":
        path.write_bytes(data[:-30])
    assert train("run", "--cell", "qrnn", "--steps", "5", *(["--rate", "0.02"] if what == "--rate" else [])) == 0
    (line,) = re.findall(r"^not drawn: .*", capsys.readouterr().out, re.M)
    assert str(path) in line
    assert what in line
    assert drawn(path.parent) == ["qrnn"]


# ---- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(train, tmp_path, capsys):
    """One of 6 steps, and its bytes."""
    assert train("run", "--steps", "6") == 0
    capsys.readouterr()
    path = tmp_path / "run" / "checkpoint.npz"
    return path, path.read_bytes()


def check_refused(train, capsys, path, expected=""):
    """The message names the file, and nothing in the folder has changed."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert train("run", "--resume", "--steps", "7", sizes=("--backend", "numpy")) == 2
    line = error_line(capsys)
    assert str(path) in line
    assert expected in line
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_truncated_checkpoint_is_refused(checkpoint, train, capsys):
    path, data = checkpoint
    lengths = {0, 1, 3, 4, 30, 100, len(data) - 1, len(data) - 22, *np.linspace(0, len(data) - 2, 40).astype(int).tolist()}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        check_refused(train, capsys, path, "damaged")


def test_a_flipped_byte_is_noticed_or_harmless(train, tmp_path):
    """Every byte of zip's own headers and of NumPy's (where a smaller number would be a smaller array), and many others."""
    assert train("run", "--steps", "6", "--width", "40") == 0  # members larger than the blocks in which zipfile reads
    path = tmp_path / "run" / "checkpoint.npz"
    data = path.read_bytes()
    about, arrays = support.read_checkpoint(path)
    expected = {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}
    rng = np.random.default_rng(0)
    starts = [m.start() for m in re.finditer(rb"PK\x03\x04|PK\x01\x02|PK\x05\x06|\x93NUMPY", data)]
    places = {start + i for start in starts for i in range(140)} | set(rng.integers(len(data), size=600).tolist())
    flips = [(place, data[place] ^ int(rng.integers(1, 256))) for place in sorted(places) if place < len(data)]
    headers = {m.start() + i for m in re.finditer(rb"\x93NUMPY", data) for i in range(128)}
    flips += [(place, ord("1")) for place in headers if data[place] in b"23456789"]
    noticed = 0
    for place, byte in flips:
        flipped = bytearray(data)
        flipped[place] = byte
        path.write_bytes(flipped)
        try:
            other_about, other = support.read_checkpoint(path)
        except support.Problem:
            noticed += 1
        else:
            assert other_about == about, place
            assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in other.items()} == expected, place
    assert noticed > len(flips) / 2


def altered(path, data, **changes):
    """The checkpoint with other members (None: without), or another description."""
    path.write_bytes(data)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays["about"].item()) | changes.pop("about", {})
    arrays |= {"about": np.array(json.dumps(about))} | changes
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})


def test_a_checkpoint_with_other_members_is_refused(checkpoint, train, capsys):
    path, data = checkpoint
    size = len(np.load(path)["parameters"])
    config = json.loads(np.load(path)["about"].item())["config"]
    for changes in [
        *({name: None} for name in ("parameters", "adam_m", "adam_v", "state", "train_bits", "heldout_bits")),
        {"more": np.zeros(3)},
        {"about": {"config": {**config, "width": 13}}},
        {"about": {"config": {**config, "width": -1}}},
        {"about": {"config": {**config, "width": "12"}}},
        {"about": {"config": {"width": 12}}},
        {"about": {"step": 5}},
        {"about": {"step": None}},
        {"about": {"chunk": 10**6}},
        {"about": {"start": -1}},
        {"about": {"rng": {"bit_generator": "PCG64"}}},
        {"parameters": np.zeros(size + 1, np.float32)},
        {"parameters": np.zeros(size, np.float64)},
        {"adam_v": np.zeros((size, 1), np.float32)},
        {"state": np.zeros((1, 3, 12), np.float32)},
        {"train_bits": np.zeros(6, np.int64)},
        {"heldout_bits": np.zeros((2, 2))},
    ]:
        altered(path, data, **changes)
        check_refused(train, capsys, path, "damaged")
    altered(path, data, about={"format": "cusru char_lm 99"})
    check_refused(train, capsys, path, "cusru char_lm 99")


def test_a_checkpoint_runs_no_code(checkpoint, train, tmp_path, capsys):
    path, data = checkpoint

    class Pickled:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    altered(path, data, adam_m=np.array([Pickled()], object))
    check_refused(train, capsys, path, "damaged")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["text", "png", "npy", "empty zip", "folder"])
def test_what_is_no_checkpoint_is_refused(train, tmp_path, capsys, content):
    path = tmp_path / "run" / "checkpoint.npz"
    path.parent.mkdir()
    if content == "folder":
        path.mkdir()
        assert train("run", "--resume", "--steps", "7") == 2
        assert str(path) in error_line(capsys)
        return
    with open(path, "wb") as file:
        if content == "npy":
            np.save(file, np.zeros(5))
        else:
            file.write({"text": b"hello\n" * 9, "png": b"\x89PNG\r\n\x1a\n" * 9, "empty zip": b"PK\x05\x06" + bytes(18)}[content])
    check_refused(train, capsys, path, "damaged, or no checkpoint")


def test_without_a_checkpoint_there_is_nothing_to_resume(train, tmp_path, capsys):
    assert train("run", "--resume") == 2
    assert f"there is no checkpoint {tmp_path / 'run' / 'checkpoint.npz'}" in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_another_text_is_refused(checkpoint, train, text, capsys):
    path, _ = checkpoint
    text.write_text(text.read_text("utf-8").replace("7", "8", 1), encoding="utf-8")
    check_refused(train, capsys, path, "argument --text")


def test_a_failed_write_leaves_what_was_there(checkpoint, train, monkeypatch, capsys):
    path, data = checkpoint

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert train("run", "--resume", "--steps", "7") == 2
    line = error_line(capsys)
    assert str(path) in line
    assert "No space left" in line
    assert path.read_bytes() == data
    assert sorted(file.name for file in path.parent.iterdir()) == ["checkpoint.npz", "loss.png"]


# ---- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, value) for name in ("--width", "--layers", "--batch", "--length") for value in ("0", "-3", "2.5", "many", "")),
        *((name, value) for name in ("--steps", "--eval-every", "--width") for value in ("0", "-1", "1e3", "9" * 30)),
        *((name, value) for name in ("--rate", "--clip", "--seconds") for value in ("nan", "inf", "-inf", "-1", "0", "fast")),
        ("--seed", "-1"),
        ("--sample", "-1"),
        ("--backend", "torch"),
        ("--cell", "lstm"),
    ],
)
def test_a_bad_value_is_refused_by_the_option_s_name(train, tmp_path, capsys, option, value):
    assert train("run", f"{option}={value}") == 2
    assert f"argument {option}: " in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_unknown_and_contradictory_options_are_refused(train, tmp_path, capsys):
    for options, named in (
        (["--wdith", "3"], "--wdith"),
        (["--step", "3"], "--step"),
        (["--steps", "3", "--seconds", "3"], "--seconds"),
    ):
        assert train("run", *options) == 2
        assert named in error_line(capsys)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--width", "13"), ("--layers", "1"), ("--batch", "4"), ("--length", "8"), ("--rate", "0.02"), ("--clip", "2"),
     ("--eval-every", "5"), ("--seed", "1"), ("--steps", "5")],
)  # fmt: skip
def test_an_option_that_contradicts_the_checkpoint_is_refused_by_name(checkpoint, train, tmp_path, capsys, option, value):
    path, data = checkpoint
    assert train("run", "--resume", option, value, sizes=("--backend", "numpy")) == 2
    line = error_line(capsys)
    assert f"argument {option}: " in line
    assert str(path) in line
    assert path.read_bytes() == data


def test_another_cell_s_checkpoint_is_refused_and_the_choices_are_named(checkpoint, train, capsys):
    path = checkpoint[0].rename(checkpoint[0].with_name("checkpoint-qrnn.npz"))
    assert train("run", "--resume", "--cell", "qrnn", sizes=SMALL[:2]) == 2
    assert f"argument --cell: qrnn contradicts {path}, which was made with sru" in error_line(capsys)
    assert train("run", "--cell", "lstm") == 2
    assert "lstm is not one of sru, qrnn" in error_line(capsys)


def test_a_text_too_short_for_a_step_is_refused(train, capsys):
    assert train("run", "--batch", "300", "--steps", "1") == 2
    assert "--batch 300 times --length 7" in error_line(capsys)


@pytest.mark.parametrize("size", [0, 1, 11])
def test_a_text_of_hardly_anything_is_refused(train, tmp_path, capsys, size):
    (tmp_path / "short").write_text("x" * size, encoding="utf-8")
    assert train("run", "--steps", "1", sizes=("--backend", "numpy"), on=tmp_path / "short") == 2
    assert "too few" in error_line(capsys)


def test_a_text_that_cannot_be_read_is_refused_by_name(train, tmp_path, capsys):
    for path in (tmp_path / "missing", tmp_path):
        assert train("run", "--steps", "1", on=path) == 2
        line = error_line(capsys)
        assert "argument --text: " in line
        assert str(path) in line


def test_without_the_library_s_source_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(support.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    assert char_lm.main(["--out", str(tmp_path / "run"), "--backend", "numpy"]) == 2
    assert "python311.zip" in error_line(capsys)


def test_a_folder_that_cannot_be_written_is_refused_by_name(train, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "loss.png").mkdir(parents=True)
    for folder in ("file", "file/below", "taken"):
        assert train(folder, "--steps", "1") == 2
        assert "argument --out: " in error_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_a_missing_package_gets_the_install_line(train, tmp_path, monkeypatch, capsys, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert train("run", "--steps", "1") == 2
    line = error_line(capsys)
    assert line.startswith(f"char_lm: error: {package} is missing")
    assert 'pip install ".[examples]"' in line
    assert not (tmp_path / "run").exists()


def test_cupy_that_does_not_work_is_refused_or_passed_over(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert train("run", "--steps", "1", "--backend", "cupy") == 2
    line = error_line(capsys)
    assert "argument --backend: " in line
    assert 'pip install ".[cuda13]"' in line
    assert not (tmp_path / "run").exists()
    assert train("run", "--steps", "1", sizes=SMALL[2:]) == 0
    assert capsys.readouterr().out.startswith("backend   NumPy")


def test_a_run_that_diverges_says_so_and_keeps_the_checkpoint(checkpoint, train, monkeypatch, capsys):
    path, data = checkpoint
    monkeypatch.setattr(char_lm, "cross_entropy", lambda xp, logits, targets: (xp.float64("inf"), logits))
    assert train("run", "--resume", "--steps", "7") == 2
    assert "--rate" in error_line(capsys)
    assert path.read_bytes() == data


def test_help_names_every_option():
    run = command("--help", timeout=60)
    assert run.returncode == 0
    for option in (
        "--steps",
        "--seconds",
        "--out",
        "--resume",
        "--text",
        "--backend",
        "--sample",
        *map(support.flag, char_lm.OPTIONS),
    ):
        assert f"  {option}" in run.stdout


# ---- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "status"),
    [
        ("{} | head -n 6", 0),
        ("{} >/dev/full", 2),
        ("{} >&-", 0),
        ("{} 2>&-", 0),
        ("CUSRU_SIMULATE=1 CXX= PATH= {}", 2),
        ("CUSRU_SIMULATE=maybe {}", 2),
    ],
)
def test_whatever_becomes_of_its_output_there_is_no_traceback(text, tmp_path, shell, status):
    """Nobody reads it, no room for it, none of it; a backend that is not there. What was trained is saved."""
    words = [sys.executable, str(SCRIPT), "--text", str(text), "--out", str(tmp_path / "out"), *SMALL, "--steps", "9"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "CUSRU_SIMULATE": ""}
    line = shell.format(shlex.join(words))
    run = subprocess.run(["/bin/sh", "-c", line], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr
    assert ("CUSRU_SIMULATE is 'maybe'" in run.stderr) == ("maybe" in shell)
    assert run.stderr.count("char_lm: error: ") == len(run.stderr.splitlines())
    if "CUSRU_SIMULATE" not in shell:
        assert (tmp_path / "out" / "checkpoint.npz").exists() == (shell != "{} >/dev/full"), "that stops before the first step"


def test_time_too_short_for_a_step_is_one_step(train, tmp_path):
    """Nor does reading the text count: a checkpoint is never written over by an untrained one."""
    assert train("short", "--seconds", "0.000001") == 0
    assert json.loads(str(np.load(tmp_path / "short" / "checkpoint.npz")["about"]))["step"] == 1


def test_a_job_that_ignores_interrupts_goes_on_ignoring_them(train, monkeypatch, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        step = char_lm.Run.train_step
        monkeypatch.setattr(char_lm.Run, "train_step", lambda run: (step(run), os.kill(os.getpid(), signal.SIGINT)))
        assert train("background", "--steps", "3") == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("adam_m", lambda a: np.where(np.arange(a.size) == 3, np.nan, a).astype(a.dtype)),
        ("adam_v", lambda a: -a),
        ("train_bits", lambda a: np.full_like(a, np.inf)),
        ("heldout_bits", lambda a: a + np.array([[1, 0]])),
    ],
    ids=["adam_m", "adam_v", "train_bits", "heldout_bits"],
)
def test_values_that_training_never_leaves_are_damage(checkpoint, train, capsys, member, change):
    path, _ = checkpoint
    with np.load(path) as file:
        everything = {name: file[name] for name in file.files}
    np.savez(path, **everything | {member: change(everything[member])})
    assert train("run", "--resume", "--steps", "30", sizes=("--backend", "numpy")) == 2
    assert "is damaged" in error_line(capsys)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", char_lm.CELLS)
def test_on_a_gpu_it_learns_and_resumes_bit_for_bit(train, tmp_path, capsys, cell):
    if reason := missing("gpu"):
        pytest.skip(reason)
    sizes, name = [*SMALL[2:], "--cell", cell], support.checkpoint_path(Path(), cell).name
    assert train("whole", "--backend", "cupy", "--steps", "40", sizes=sizes) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("backend   CuPy")
    assert train("parts", "--backend", "cupy", "--steps", "25", sizes=sizes) == 0
    assert train("parts", "--backend", "cupy", "--steps", "40", "--resume", sizes=sizes) == 0
    assert members(tmp_path / "whole", name) == members(tmp_path / "parts", name)
    assert train("numpy", "--backend", "numpy", "--steps", "40", sizes=sizes) == 0
    on_gpu, on_cpu = (np.load(tmp_path / folder / name)["train_bits"] for folder in ("whole", "numpy"))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=0.02)
    assert on_gpu[-1] < on_gpu[0]
    shutil.rmtree(tmp_path / "whole")
