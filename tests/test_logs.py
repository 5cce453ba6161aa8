"""What long steps say: a bar with the time left, or a line of the log where there is no terminal."""

import errno
import io
import logging
import sys

import numpy as np
import pytest
import torch

from ecul import MODALITIES, TwoStreamResNet, evaluate, extract
from ecul.common import logs
from ecul.tools.tuning import tune


def steps(**options):
    with logs.progress(3, "count", **options) as bar:
        for _ in range(3):
            bar.update()


def test_without_a_terminal_there_is_a_line_a_minute_with_the_time_left(caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO, logger="ecul")
    steps()
    assert caplog.text == ""  # it was done within a minute
    monkeypatch.setattr(logs, "MINUTE", 0)
    steps(shown=False)
    assert caplog.text == ""
    steps()
    assert "count: 2 of 3, 00:00 gone, 00:00 left" in caplog.messages
    caplog.clear()
    assert list(logs.progress(3, "items", items=range(3))) == [0, 1, 2]
    assert "items: 2 of 3" in caplog.text and "\r" not in caplog.text
    assert "".join(capsys.readouterr()) == ""


def test_at_a_terminal_there_is_a_bar(capsys, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="ecul")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    real = logs.tqdm
    monkeypatch.setattr(logs, "tqdm", lambda *args, delay, **rest: real(*args, mininterval=0, **rest))
    steps()
    assert "count:  67%" in capsys.readouterr().err and caplog.text == ""


class Full(io.StringIO):
    """A stream on a full disk."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stream", [None, Full(False), Full(True), closed := io.StringIO()])
def test_what_stderr_cannot_take_is_lost_and_the_work_goes_on(stream, monkeypatch, capsys):
    closed.close()
    monkeypatch.setattr(logs, "MINUTE", 0)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logs.log, "hasHandlers", lambda: False)
    with logs.logging_to_stderr():
        steps()
        logs.log.info("a line")
        assert list(logs.progress(3, "epochs", items=range(3), lines=False)) == [0, 1, 2]
    assert capsys.readouterr().out == ""  # which is for answers


def test_every_long_step_tells_how_far_it_is(caplog, monkeypatch, dataset):
    caplog.set_level(logging.INFO, logger="ecul")
    monkeypatch.setattr(logs, "MINUTE", 0)
    rng = np.random.default_rng(0)
    features = {m: rng.normal(size=(len(getattr(dataset, f"test_{m}")), 8)) for m in MODALITIES}
    evaluate(None, dataset, features=features, trials=3, modes="all", rerank="modality")
    evaluate(None, dataset, features=features, trials=3, modes="indoor", progress=False)
    tune(torch.nn.functional.normalize(torch.randn(12, 4), dim=1), k1=(2, 3), k2=2, k3=None, eps=(0.3, 0.6))
    model, pixels = TwoStreamResNet(10, 2, input_size=(32, 16)), np.zeros((4, 32, 16, 3), np.uint8)
    extract(model, pixels, "visible", batch_size=2)
    dataset.check()
    for told in ("rank all: 2 of 3, ", "tune: 3 of 4, ", "extract visible: 2 of 4, ", "looking at files: "):
        assert any(line.startswith(told) for line in caplog.messages), told
    assert "rank indoor" not in caplog.text
