"""`examples/ddp_char_lm.py`: two processes have the loss curve of one; what it reads, and what it refuses."""

import json
import os
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='torch is missing: pip install ".[torch]"')
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import ddp_char_lm  # noqa: E402


@pytest.fixture
def text(tmp_path):
    """Two epochs in ten steps of SMALL."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} plus {i * 7 % 13} is {i + i * 7 % 13}\n" for i in range(120))[:200], encoding="utf-8")
    return path


SMALL = ("--steps", "10", "--batch", "4", "--length", "7", "--hidden", "12", "--dtype", "float64")


def curve(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    return np.array([line["bits"] for line in lines])


def test_two_processes_have_the_loss_curve_of_one(text, tmp_path, monkeypatch, capfd):
    """To 1e-9 in float64, over ten steps and into a second epoch."""
    monkeypatch.delenv("RANK", raising=False)
    options = [*SMALL, "--text", str(text), "--out"]
    assert ddp_char_lm.main([*options, str(tmp_path / "one")]) == 0
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ddp_char_lm.__file__]
    subprocess.run([*torchrun, *options, str(tmp_path / "two")], env=environment, check=True, timeout=180)
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-9)
    assert one[-1] < one[0] - 0.5, "it learns"
    printed = capfd.readouterr().out
    assert printed.count("\nstep     10 ") == 2, "one process of the two speaks"


def test_streams_are_read_on_and_every_epoch_reads_almost_all():
    batch, length, count = 3, 4, 8
    read = list(islice(ddp_char_lm.chunks(np.arange(100), batch, length, seed=1), 2 * count))
    for epoch in (read[:count], read[count:]):
        assert [anew for _, anew in epoch] == [True, *[False] * (count - 1)]
        assert all((a[-1] == b[0]).all() for (a, _), (b, _) in pairwise(epoch))
        predicted = np.concatenate([characters[1:] for characters, _ in epoch])
        assert len(np.unique(predicted)) == predicted.size == batch * length * count
        assert (np.diff(predicted, axis=0) % 100 == 1).all()
    assert (read[0][0] != read[count][0]).all(), "another cut"


def losses(text, *options):
    prepared, alone = ddp_char_lm.support.prepare([text]), ddp_char_lm.Process(0, 1, torch.device("cpu"))
    return [bits for _, bits in ddp_char_lm.train(ddp_char_lm.parse([*SMALL, *options]), prepared, alone)]


def test_each_step_goes_on_from_the_state_of_the_last(text):
    """Of weights that hardly move two steps have the loss of their characters in one piece."""
    pieces, (whole,) = (
        losses(text, "--rate", "1e-9", "--steps", *sizes) for sizes in (("2", "--length", "7"), ("1", "--length", "14"))
    )
    assert np.mean(pieces) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--length", "60"), "180 characters to train on: too few for --batch 4 times --length 60"),
        (("--text", "nowhere"), "argument --text: cannot read nowhere"),
    ],
)
def test_what_it_refuses(text, monkeypatch, capsys, options, message):
    monkeypatch.delenv("RANK", raising=False)
    assert ddp_char_lm.main([*SMALL, "--text", str(text), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(text):
    """Else the mean of the processes' means would not be the batch's."""
    options, process = ddp_char_lm.parse([*SMALL, "--text", str(text)]), ddp_char_lm.Process(0, 3, torch.device("cpu"))
    with pytest.raises(ddp_char_lm.Problem, match="4 streams cannot be shared out evenly to 3 processes"):
        next(ddp_char_lm.train(options, ddp_char_lm.support.prepare([text]), process))
