"""tests/scaling.py, of the smallest size."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import scaling
from conftest import run_script

from mil import MilError


def test_a_stopped_run_goes_on_with_as_many_processes_and_with_half(tmp_path):
    argv = "--shapes toy --stages 1 --processes 2 --rows 1 --steps 12 --out"
    done = run_script("tests/scaling.py", *argv.split(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    two, stopped, *on = json.loads((tmp_path / "scaling.json").read_text())["results"]
    assert two["tokens_s"] > 0 and two["memory"] > 1e8 and stopped["checkpoint"] > 1e4
    assert [row["processes"] for row in on] == [2, 1], done.stdout
    for row in on:
        assert 6 <= row["resumed"] < 12 and row["apart"] == pytest.approx([0, 0], abs=1e-4)
    assert not (tmp_path / "toy-1").exists()


class Played(scaling.Steps):
    """A run whose losses are 1 and as many thousandths as the next of `OFF`, at a second a step."""

    OFF, NOTE = (0, 3, 5, 20, 70, 90, 40), ""

    def __init__(self, o, shape, stage, count, out, resume=False, sharded=False):
        self.out, self.said, self.off = out, out / "said", self.OFF[len(o.started)]
        o.started.append((count, resume, sharded))
        out.mkdir(parents=True, exist_ok=True)
        (out / "checkpoint.pt").write_text("x")
        self.said.write_text(self.NOTE * resume)

    def stop(self, how=None):
        pass

    def reach(self, step):
        self.steps = step
        return ""

    def log(self):
        line = dict(loss=1 + self.off / 1000, gradient=2, memory=7)
        return [line | dict(step=i, seconds=i) for i in range(1, self.steps + 1)]


@pytest.mark.parametrize("note", ["", "note: there is no checkpoint to go on from"])
def test_rows_are_compared_with_the_first_run_and_the_largest(monkeypatch, tmp_path, note):
    monkeypatch.setattr(scaling, "Steps", Played)
    monkeypatch.setattr(Played, "NOTE", note)
    o = SimpleNamespace(processes=[1, 2], rows=1, steps=40, out=tmp_path, started=[])
    *rows, stopped, two, one = scaling.scale(o, "toy", 1)
    assert [row["apart"][0] for row in rows] == pytest.approx([0, 0.003, 0.005, 0.02])
    assert [row["linear"] for row in rows] == [1, 1, 1, 0.5]
    assert rows[0]["tokens_s"] == 2 * scaling.SHAPES["toy"].context
    assert (stopped["checkpoint"], two["resumed"], one["resumed"]) == (1, 20, 20)
    if note:
        assert "did not go on" in two["failed"] and "apart" not in one
    else:
        wanted = [1.09 / 1.02 - 1, 1.04 / 1.02 - 1]
        assert [two["apart"][0], one["apart"][0]] == pytest.approx(wanted)
    begun = [(1, False, False), (1, False, False), (1, False, True), *[(2, False, False)] * 2]
    assert o.started == [*begun, (2, True, False), (1, True, False)]


def test_the_commands_of_the_rows_take_the_same_batch(monkeypatch, tmp_path):
    argv = []
    monkeypatch.setattr(scaling, "teacher", lambda place, config: place)
    monkeypatch.setattr(scaling.subprocess, "Popen", lambda words, **_: argv.append(words))
    o = SimpleNamespace(processes=[1, 2, 4], rows=3, steps=40, out=tmp_path)
    for count, more in ((1, {}), (1, dict(sharded=True)), (2, {}), (4, dict(resume=True))):
        scaling.Steps(o, "toy", 2, count, tmp_path / "o", **more)
    for words, (count, accumulate) in zip(argv, ((0, 4), (1, 4), (2, 2), (4, 1)), strict=True):
        words = " ".join(map(str, words))
        assert "train_distill.py" in words and f"--batch 12 --accumulate {accumulate} " in words
        assert (f"--nproc_per_node {count} -- " in words) == ("torch.distributed" in words)
        assert words.endswith(" --resume") == (count == 4)
    assert json.loads((tmp_path / "o" / "recipe.json").read_text())[0]["trains"] == "all"


def test_what_torchrun_started_does_not_outlive_the_measurement(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "teacher", lambda place, config: tmp_path)
    pid, torchrun = tmp_path / "pid", tmp_path / "torchrun"
    worker = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    call = f"[{sys.executable!r}, '-c', {worker!r}], start_new_session=True"
    torchrun.write_text(f"#!{sys.executable}\nimport subprocess\nsubprocess.run({call})\n")
    torchrun.chmod(0o755)
    monkeypatch.setattr(scaling.sys, "executable", torchrun)
    o = SimpleNamespace(steps=12, out=tmp_path, rows=1, processes=[1])
    with scaling.Steps(o, "toy", 1, 1, tmp_path / "o"):
        while not pid.exists() or not pid.read_text():
            time.sleep(0.05)
    stat = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):
        if not stat.exists() or ") Z " in stat.read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the worker lives")


WRONG = [("--steps 9", "11 to 99 --steps"), ("--steps 100", "11 to 99 --steps")]
WRONG += [("--processes 2 3", "divide the largest"), ("--shapes 9B", "--shapes")]


@pytest.mark.parametrize("argv, match", WRONG)
def test_what_cannot_be_scaled_is_refused(argv, match):
    with pytest.raises(MilError, match=match):
        scaling.main(["--shapes", "toy", *argv.split()])
