"""tests/scaling.py, of the smallest size."""
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import scaling
from conftest import run_script

from mil import MilError


def test_two_processes_and_one_sharded_make_the_steps_of_one_and_a_stopped_run_goes_on_with_two_and_with_one(tmp_path):
    done = run_script("tests/scaling.py", "--shapes", "toy", "--stages", "1", "--processes", "1", "2", "--rows", "1", "--steps", "12", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    one, again, alone, two, stopped, *on = json.loads((tmp_path / "scaling.json").read_text())["results"]
    assert (one["linear"], one["apart"], two["processes"]) == (1, [0, 0], 2) and all(row["tokens_s"] > 0 and row["memory"] > 1e8 for row in (one, again, alone, two))
    assert [row["how"] for row in (one, again, alone, two)] == ["", "again", "FSDP2", ""]
    assert stopped["checkpoint"] > 1e4 and [row["processes"] for row in on] == [2, 1] and all(6 <= row["resumed"] < 12 for row in on), done.stdout
    for row in (again, alone, two, *on):
        assert row["apart"] == pytest.approx([0, 0], abs=1e-4)  # rounding, in float32
    assert not (tmp_path / "toy-1").exists()


def test_runs_are_apart_by_their_worst_step():
    line = lambda step, loss, gradient: dict(step=step, loss=loss, gradient=gradient)  # noqa: E731
    assert scaling.apart([line(2, 4, 1), line(3, 2, 1)], [line(1, 9, 9), line(2, 4, 2), line(3, 4, 1)]) == [0.5, 0.5]


@pytest.mark.parametrize("said, ended, why", [("data: x\nerror: the GPU's memory is full\nTraceback\n", 1, "error: the GPU's memory is full"), ("killed\n", 1, "ended before step 3; .*said has"),
                                              ("slow\n", None, "not at step 3 after 0 minutes")])
def test_a_run_that_fails_says_its_own_error_or_where_to_look(tmp_path, said, ended, why):
    run = object.__new__(scaling.Steps)
    run.out, run.said, run.process = tmp_path, tmp_path / "said", SimpleNamespace(poll=lambda: ended)
    run.said.write_text(said)
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n')
    assert run.reach(2) == "" and re.match(why, run.reach(3, minutes=0))


def test_what_was_started_does_not_outlive_the_measurement(monkeypatch, tmp_path):
    """What torchrun starts has sessions of its own."""
    monkeypatch.setattr(scaling, "teacher", lambda place, config: tmp_path)
    pid, python = tmp_path / "pid", sys.executable
    worker = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(scaling.sys, "executable", tmp_path / "torchrun")
    (tmp_path / "torchrun").write_text(f"#!{python}\nimport subprocess\nsubprocess.run([{python!r}, '-c', {worker!r}], start_new_session=True)\n")
    (tmp_path / "torchrun").chmod(0o755)
    o = SimpleNamespace(steps=12, out=tmp_path, rows=1, processes=[1], shard="trained")
    with pytest.raises(KeyboardInterrupt), scaling.Steps(o, "toy", 1, 1, tmp_path / "o"):
        while not pid.exists() or not pid.read_text():
            time.sleep(0.05)
        raise KeyboardInterrupt
    for _ in range(100):
        if not Path(f"/proc/{pid.read_text()}").exists() or ") Z " in Path(f"/proc/{pid.read_text()}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the worker lives")


@pytest.mark.parametrize("argv, match", [(["--steps", "9"], "11 to 99 --steps"), (["--steps", "100"], "11 to 99 --steps"), (["--processes", "2", "3"], "that divide the largest"), (["--shapes", "9B"], "argument --shapes")])
def test_what_cannot_be_scaled_is_refused(argv, match):
    with pytest.raises(MilError, match=match):
        scaling.main(["--shapes", "toy", *argv])
