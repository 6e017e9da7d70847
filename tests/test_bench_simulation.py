"""`make bench`: the fields DESIGN names, every contender doing its job, a missing peer null and said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import contenders
import simulation


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Eight files of one and two seconds in place of 5 s and 60 s."""
    monkeypatch.setattr(simulation, "FILES", {"5s": (1, 8), "60s": (2, 8)})
    simulation.make_files(tmp_path)
    return tmp_path


def test_a_run_has_all_figures_and_null_for_peers_that_are_missing(files, capsys):
    facts = simulation.measure(files, str(files / "no such python"), rounds=1)
    speeds = facts["x_realtime_per_core"]
    assert set(speeds) == {"clean-pcma_60s", "clean-pcma_5s", "default_60s", "default_5s"}
    assert all(value > 0 for value in speeds.values()) and facts["default_bound"] >= speeds["default_60s"]
    assert all(0 < value <= 1 for value in facts["default_to_bound"].values())
    measured = {"scipy_60s", "scipy_5s"} | ({"sox_60s", "sox_5s"} if shutil.which("sox") else set())
    assert {name for name, value in facts["ratio_to"].items() if value} == measured
    missing = {"audiomentations_60s", "pedalboard_60s"}
    assert missing <= {name for name, value in facts["ratio_to"].items() if value is None}
    said = capsys.readouterr().out
    assert "audiomentations: not measured" in said and "pedalboard: not measured" in said
    json.dumps(facts)


def test_every_contender_makes_telephone_speech_of_every_file(files):
    paths = sorted(files.glob("5s_*.wav"))
    ours = contenders.simulator(paths, files, "clean-pcma")
    ours()
    rows = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    made = [Path(row["source"]) for row in rows]
    for name, maker in (("scipy", contenders.scipy_chain), ("sox", contenders.sox_pair)):
        if name == "sox" and shutil.which("sox") is None:
            continue
        (files / name).mkdir()
        maker(paths, files / name)()
        made += [files / name / path.name for path in paths]
    assert len(made) >= 4
    for path in made:
        samples, fs = soundfile.read(path)
        power = np.abs(np.fft.rfft(samples)) ** 2
        assert fs == 16000 and samples.size == 16000
        assert power[4500:].sum() < 1e-3 * power.sum() and power.sum() > 1
