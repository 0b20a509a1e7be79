"""tests/scaling.py, of the smallest size."""

import json
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import scaling
from conftest import run_script

from mil import MilError


def test_two_processes_and_one_sharded_make_the_steps_of_one_and_a_stopped_run_goes_on_with_two_and_with_one(
    tmp_path,
):
    done = run_script(
        "tests/scaling.py",
        "--shapes",
        "toy",
        "--stages",
        "1",
        "--processes",
        "1",
        "2",
        "--rows",
        "1",
        "--steps",
        "12",
        "--out",
        tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, again, alone, two, stopped, *on = json.loads((tmp_path / "scaling.json").read_text())[
        "results"
    ]
    assert (one["linear"], one["apart"], two["processes"]) == (1, [0, 0], 2) and all(
        row["tokens_s"] > 0 and row["memory"] > 1e8 for row in (one, again, alone, two)
    )
    assert [row["how"] for row in (one, again, alone, two)] == ["", "again", "FSDP2", ""]
    assert (
        stopped["checkpoint"] > 1e4
        and [row["processes"] for row in on] == [2, 1]
        and all(6 <= row["resumed"] < 12 for row in on)
    ), done.stdout
    for row in (again, alone, two, *on):
        assert row["apart"] == pytest.approx([0, 0], abs=1e-4)  # rounding, in float32
    assert not (tmp_path / "toy-1").exists()


def test_runs_are_apart_by_their_worst_step():
    line = lambda step, loss, gradient: dict(step=step, loss=loss, gradient=gradient)  # noqa: E731
    assert scaling.apart(
        [line(2, 4, 1), line(3, 2, 1), line(4, 9, 9)], [line(1, 9, 9), line(2, 4, 2), line(3, 4, 1)]
    ) == [0.5, 0.5]


class Played:
    """A run whose losses are 1 and as many thousandths as the next of `OFF`, at one second a step."""

    OFF = 0, 3, 5, 20, 70, 90, 40

    def __init__(self, o, shape, stage, count, out, resume=False, sharded=False):
        self.out, self.said, self.off = out, out.parent / "said", self.OFF[len(o.started)]
        o.started.append(self)
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        (out / "checkpoints" / "1.pt").write_text("x")
        self.said.write_text("what it said")
        self.steps, self.stopped = 0, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped.append("killed")

    def stop(self, how):
        self.stopped.append(how)

    def reach(self, step):
        self.steps = step
        return ""

    def log(self):
        return [
            dict(step=i, loss=1 + self.off / 1000, gradient=2, seconds=i, memory=7)
            for i in range(1, self.steps + 1)
        ]


def test_a_table_compares_each_row_with_the_first_and_resumed_runs_with_the_one_that_was_not_stopped(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(scaling, "Steps", Played)
    o = SimpleNamespace(processes=[1, 2], rows=1, steps=40, out=tmp_path, started=[])
    one, again, alone, two, stopped, *on = scaling.scale(o, "toy", 1)
    assert [row["apart"][0] for row in (one, again, alone, two)] == pytest.approx(
        [0, 0.003, 0.005, 0.02]
    ) and [row["linear"] for row in (one, again, alone, two)] == [1, 1, 1, 0.5]
    assert one["tokens_s"] == 2 * scaling.SHAPES["toy"].context
    assert stopped["checkpoint"] == 1 and [(row["processes"], row["resumed"]) for row in on] == [
        (2, 20),
        (1, 20),
    ]
    assert [row["apart"][0] for row in on] == pytest.approx([1.09 / 1.02 - 1, 1.04 / 1.02 - 1])
    assert [run.stopped for run in o.started] == [["killed"]] * 4 + [[signal.SIGTERM, "killed"]] + [
        ["killed"]
    ] * 2


class Anew(Played):
    """One that, told to go on, begins anew."""

    def __init__(self, *args, resume=False, **more):
        super().__init__(*args, **more)
        self.said.write_text(
            self.said.read_text() + "\nnote: there is no checkpoint to go on from" * resume
        )


def test_a_run_that_began_anew_is_not_taken_for_one_that_went_on(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "Steps", Anew)
    *rows, two, one = scaling.scale(
        SimpleNamespace(processes=[1, 2], rows=1, steps=40, out=tmp_path, started=[]), "toy", 1
    )
    assert all(
        row["failed"] == "did not go on from its checkpoint" and "apart" not in row
        for row in (two, one)
    ) and not any("failed" in row for row in rows)


def test_the_commands_of_the_rows_take_the_same_batch_and_say_how_it_is_sharded(
    monkeypatch, tmp_path
):
    argv = []
    monkeypatch.setattr(scaling, "teacher", lambda place, config: place)
    monkeypatch.setattr(
        scaling.subprocess, "Popen", lambda words, **_: argv.append(" ".join(map(str, words)))
    )
    o = SimpleNamespace(processes=[1, 2, 4], rows=3, steps=40, out=tmp_path)
    for count, more in ((1, {}), (1, dict(sharded=True)), (2, {}), (4, dict(resume=True))):
        scaling.Steps(o, "toy", 2, count, tmp_path / "o", **more)
    for words, (count, accumulate) in zip(argv, ((0, 4), (1, 4), (2, 2), (4, 1))):
        assert (
            f" --accumulate {accumulate} " in words
            and " --batch 12 " in words
            and "train_distill.py " in words
        )
        assert (
            (f" -m torch.distributed.run --standalone --nproc_per_node {count} -- " in words)
            == (count > 0)
            == ("torch.distributed" in words)
        )
        assert words.endswith(" --resume") == (count == 4)
    assert json.loads((tmp_path / "o" / "recipe.json").read_text())[0]["trains"] == "all"


@pytest.mark.parametrize(
    "said, ended, why",
    [
        (
            "data: x\nerror: the GPU's memory is full\nTraceback\n",
            1,
            "error: the GPU's memory is full",
        ),
        ("killed\n", 1, "ended before step 3; .*said has"),
        ("slow\n", None, "not at step 3 after 0 minutes"),
    ],
)
def test_a_run_that_fails_says_its_own_error_or_where_to_look(tmp_path, said, ended, why):
    run = object.__new__(scaling.Steps)
    run.out, run.said, run.process = (
        tmp_path,
        tmp_path / "said",
        SimpleNamespace(poll=lambda: ended),
    )
    run.said.write_text(said)
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n')
    assert run.reach(2) == "" and re.match(why, run.reach(3, minutes=0))


def test_what_was_started_does_not_outlive_the_measurement(monkeypatch, tmp_path):
    """What torchrun starts has sessions of its own."""
    monkeypatch.setattr(scaling, "teacher", lambda place, config: tmp_path)
    pid, python = tmp_path / "pid", sys.executable
    worker = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(scaling.sys, "executable", tmp_path / "torchrun")
    (tmp_path / "torchrun").write_text(
        f"#!{python}\nimport subprocess\nsubprocess.run([{python!r}, '-c', {worker!r}], start_new_session=True)\n"
    )
    (tmp_path / "torchrun").chmod(0o755)
    o = SimpleNamespace(steps=12, out=tmp_path, rows=1, processes=[1])
    with pytest.raises(KeyboardInterrupt), scaling.Steps(o, "toy", 1, 1, tmp_path / "o"):
        while not pid.exists() or not pid.read_text():
            time.sleep(0.05)
        raise KeyboardInterrupt
    for _ in range(100):
        if (
            not Path(f"/proc/{pid.read_text()}").exists()
            or ") Z " in Path(f"/proc/{pid.read_text()}/stat").read_text()
        ):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the worker lives")


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--steps", "9"], "11 to 99 --steps"),
        (["--steps", "100"], "11 to 99 --steps"),
        (["--processes", "2", "3"], "that divide the largest"),
        (["--shapes", "9B"], "argument --shapes"),
    ],
)
def test_what_cannot_be_scaled_is_refused(argv, match):
    with pytest.raises(MilError, match=match):
        scaling.main(["--shapes", "toy", *argv])
