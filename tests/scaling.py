"""Steps of train_distill.py on 1, 2, 4 … GPUs of a machine: speed, memory, whether they are equal.

    python tests/scaling.py                       all GPUs, the shapes of Llama-3-8B and -3.2-3B,
                                                  random weights; without CUDA a toy
    python tests/scaling.py --shapes 8B --stages 1 --processes 1 2
    python tests/scaling.py --shapes toy          on the CPU, whose speed says nothing

Every row is the command that a user types, on the same batch: --rows sequences a process for the
largest number of processes; fewer take it in more parts. Printed, and written to OUT/scaling.json:

    tokens/s      from the tenth step on, of all processes together, and its share of what as many
                  single ones would do
    memory        the most that PyTorch has held on process 0
    loss          of the last step, and the largest relative difference of a step's loss, and of its
                  gradient's norm, from those of the first row

In stage 1 one process also runs half the steps again, since on a GPU no two runs are quite the
same, and sharded, as torchrun starts it: what FSDP2 costs where nothing travels. And the largest
run is stopped half-way (SIGTERM to its processes; torchrun would kill them after 30 s) and goes on
twice, with as many processes and with half, and is compared with the run that was not stopped.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mil
import train_distill as td
from generate import flag, parse_flags, run_command, save_with_tokenizer
from mil import MilError

CUDA = torch.cuda.is_available()
WIDE = dict(d=3072, n_layers=28, n_heads=24, n_kv_heads=8, head_dim=128, d_ff=8192, tied=True)
SHAPES = {
    "8B": mil.Config(context=2048),
    "3B": mil.Config(**WIDE, context=2048),
    "toy": mil.Config(v=257, d=32, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=64, context=64),
}
TEXT = Path(os.__file__).parent / "asyncio"  # of Python's standard library
TRAINS, RATES = {1: "mixers", 2: "all"}, {"8B": 1e-6, "3B": 1e-6, "toy": 1e-2}
FIRST = 10  # steps that compile, and are not timed
MOST = torch.cuda.device_count() if CUDA else 2
COUNTS = sorted(n for n in {1, 2, 4, 8, MOST} if MOST % n == 0)


def several(default, help, **more):
    shown = " ".join(map(str, default))
    return flag(default, f"{help} (default {shown})", nargs="+", type=type(default[0]), **more)


@dataclasses.dataclass
class Settings:
    shapes: list = several(["8B", "3B"] if CUDA else ["toy"], "of the teacher", choices=SHAPES)
    stages: list = several([1, 2], "1: the new mixers train; 2: all", choices=TRAINS)
    processes: list = several(COUNTS, "how many, of each row")
    rows: int = flag(4, "sequences a process at once")
    steps: int = flag(50, "of a run, which is then broken off")
    out: str = flag("out/scaling", "for the teachers, which stay, the runs and scaling.json")


def teacher(place, config):
    """A Llama of random weights in the folder `place`."""
    if not (place / "config.json").exists():
        toy = place.name == "toy"
        model = mil.cast(mil.empty_model(config), torch.float32 if toy else torch.bfloat16)
        model = model.to_empty(device="cpu" if toy else "cuda")
        model.tie()
        torch.manual_seed(0)
        for w in model.parameters():
            torch.nn.init.ones_(w) if w.dim() == 1 else w.data.normal_(std=0.02)
        save_with_tokenizer(model, place, "bytes")
        del model
        torch.cuda.empty_cache()  # the runs have the GPU for themselves
    return place


class Steps:
    """A run of train_distill.py in so many processes, as it goes."""

    def __init__(self, o, shape, stage, count, out, resume=False, sharded=False):
        self.out, self.said, most = Path(out), Path(out) / "said", max(o.processes)
        self.out.mkdir(parents=True, exist_ok=True)
        recipe, config = self.out / "recipe.json", SHAPES[shape]
        entry = dict(keep=0.5, trains=TRAINS[stage], steps=2 * o.steps, lr=RATES[shape])
        recipe.write_text(json.dumps([entry]))
        flags = dict(teacher=teacher(Path(o.out) / shape, config), data=TEXT, recipe=recipe)
        flags |= dict(batch=o.rows * most, accumulate=most // count, eval_sequences=most)
        flags |= dict(context=config.context, out=self.out, save_minutes=1e6)
        flags |= dict(device="cpu" if shape == "toy" else "cuda")
        command = [sys.executable]
        if count > 1 or sharded:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(count), "--"]
        command += [td.__file__, *(str(word) for k, v in flags.items() for word in (f"--{k}", v))]
        env = {**os.environ, "OMP_NUM_THREADS": "1"} if shape == "toy" else None
        with open(self.said, "w") as said:
            how = dict(stdout=said, stderr=subprocess.STDOUT, env=env)
            self.process = subprocess.Popen(command + ["--resume"] * resume, **how)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def log(self):
        path = self.out / "log.jsonl"
        return [*map(json.loads, path.read_text().split("\n")[:-1])] if path.exists() else []

    def reach(self, step, minutes=15):
        """Waits until the log has this step; why it has not, or ""."""
        began = time.monotonic()
        while not any(line["step"] >= step for line in self.log()):
            if self.process.poll() is not None:
                errors = re.findall("^error:.*", self.said.read_text(), re.MULTILINE)
                return [*errors, f"ended before step {step}; {self.said} has what it said"][0]
            if time.monotonic() - began > 60 * minutes:
                return f"not at step {step} after {minutes} minutes; {self.said} has what it said"
            time.sleep(0.02)
        return ""

    def stop(self, how=signal.SIGKILL):
        """Ends the processes, of which torchrun's would outlive it; it ends when they have."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid:
                    os.kill(int(stat.parent.name), how)
        if how == signal.SIGKILL:
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(600)


def apart(log, other):
    """The largest relative differences, in the steps of both, of loss and of gradient norm."""
    theirs = {line["step"]: line for line in other}
    pairs = [(line, theirs[line["step"]]) for line in log if line["step"] in theirs]
    return [max(abs(a[key] / b[key] - 1) for a, b in pairs) for key in ("loss", "gradient")]


def said_apart(row):
    return f"{row['apart'][0]:.1e} apart, gradients {row['apart'][1]:.1e}"


def scale(o, shape, stage):
    """The rows of a shape and a stage, and what became of the run that was stopped."""
    rows, logs, place = [], [], Path(o.out) / f"{shape}-{stage}"
    shutil.rmtree(place, ignore_errors=True)
    runs = [(count, "", o.steps) for count in o.processes]
    if stage == 1 and 1 in o.processes:
        half = max(FIRST + 1, o.steps // 2)
        runs[1:1] = [(1, "again", half), (1, "FSDP2", half)]
    for count, how, steps in runs:
        row = dict(shape=shape, stage=stage, processes=count, how=how)
        rows.append(row)
        with Steps(o, shape, stage, count, place / f"{count}{how}", sharded=how == "FSDP2") as run:
            failed = run.reach(steps)
        if failed:
            row["failed"] = failed
        else:
            logs.append(run.log()[:steps])
            row |= measured(o, logs[-1], rows, SHAPES[shape].context)
            row["apart"] = apart(logs[-1], logs[0])
        show(row, steps, len(logs) > 1)
    if max(o.processes) > 1 and stage == 1 and "failed" not in rows[-1]:
        rows += resume(o, shape, stage, place, logs[-1])
    if not any("failed" in row for row in rows):
        shutil.rmtree(place)
    return rows


def measured(o, log, rows, context):
    """Speed, memory and loss of the last of `rows`, of its log."""
    first, last = log[FIRST - 1], log[-1]
    tokens = o.rows * max(o.processes) * context * (last["step"] - first["step"])
    speed = tokens / max(0.01, last["seconds"] - first["seconds"])
    single = [row["tokens_s"] for row in rows if row["processes"] == 1 and "tokens_s" in row]
    single = single or [speed] * (rows[-1]["processes"] == 1)  # none: one has not enough memory
    linear = speed / rows[-1]["processes"] / single[0] if single else None
    return dict(tokens_s=speed, linear=linear, memory=last["memory"], loss=last["loss"])


def show(row, steps, compare):
    """Prints a row."""
    who = f"{row['shape']}, stage {row['stage']}, {row['processes']} process"
    who += "es" * (row["processes"] > 1) + f", {row['how']}" * bool(row["how"])
    if "failed" in row:
        print(f"{who:<32}{row['failed']}", flush=True)
        return
    share = f"{row['linear']:>7.1%} of linear" if row["linear"] else ""
    line = f"{who:<32}{row['tokens_s']:>12,.0f} tokens/s{share:>17}"
    line += f"{row['memory'] / 2**30:>8.1f} GiB   step {steps}: loss {row['loss']:.4f}"
    print(line + f", {said_apart(row)}" * compare, flush=True)


def resume(o, shape, stage, place, log):
    """What became of the largest run, of which `log` is the log, when it was stopped half-way."""
    most, began, who = max(o.processes), time.monotonic(), f"{shape}, stage {stage}"
    with Steps(o, shape, stage, most, place / "stopped") as run:
        failed, stopped = run.reach(o.steps // 2), time.monotonic()
        run.stop(signal.SIGTERM)
        took = time.monotonic() - stopped
    there = run.log()[-1]["step"] if run.log() else 0
    size = sum(f.stat().st_size for f in run.out.glob("checkpoint.pt"))
    failed = failed or "left no checkpoint" * (not size)
    if not failed and there >= o.steps:
        failed = f"was at step {there} before it could be stopped; more --steps"
    row = dict(shape=shape, stage=stage, processes=most, stopped_s=took, checkpoint=size)
    told = f"{stopped - began:.0f} s after its start, at step {there}; {took:.0f} s later it had "
    told += f"ended and left {size / 2**30:.2f} GiB"
    print(f"{who}, stopped: {failed or told}", flush=True)
    if failed:
        return [row | {"failed": failed}]
    without = shutil.ignore_patterns("data", "said")
    shutil.copytree(run.out, place / "half", ignore=without, copy_function=os.link)
    rows = [row]
    for count, out in ((most, run.out), (most // 2, place / "half")):
        with Steps(o, shape, stage, count, out, resume=True) as again:
            failed = again.reach(o.steps)
        if not failed and "note:" in again.said.read_text():
            failed = "did not go on from its checkpoint"
        row = dict(shape=shape, stage=stage, processes=count, resumed=there)
        new = again.log()[there : o.steps]
        rows.append(row | ({"failed": failed} if failed else {"apart": apart(new, log)}))
        told = failed or f"steps {there + 1} to {o.steps}, {said_apart(rows[-1])}"
        print(f"{who}, goes on with {count}: {told}", flush=True)
    return rows


def parse(argv):
    """The Settings. Raises MilError if they cannot be measured."""
    o = parse_flags(Settings, argv, __doc__)
    o.processes = sorted({*o.processes})
    if not CUDA and {*o.shapes} - {"toy"}:
        raise MilError(f"--shapes {' '.join(o.shapes)}: without CUDA expected toy")
    divide = all(n >= 1 and max(o.processes) % n == 0 for n in o.processes)
    lacking = {*o.shapes} - {"toy"} and max(o.processes) > MOST  # toy runs on the CPU
    # Of a stage of fewer than 200 steps, twice as many as here, each is logged.
    if not FIRST < o.steps < 100 or o.rows < 1 or not divide or lacking:
        told = f"--steps {o.steps} --rows {o.rows} --processes {' '.join(map(str, o.processes))}"
        wanted = (
            f"{FIRST + 1} to 99 --steps, --rows, and --processes that divide the largest of them"
        )
        raise MilError(f"{told}: expected {wanted}" + f", at most {MOST}, as there are GPUs" * CUDA)
    return o


def main(argv):
    o = parse(argv)
    machine = torch.cuda.get_device_name() if CUDA else f"{os.cpu_count()} CPU cores"
    told = f"{o.rows} rows a process at once, {o.rows * max(o.processes)} a step"
    print(f"{machine}, torch {torch.__version__}; {told}", flush=True)
    found = dict(machine=machine, torch=torch.__version__, settings=vars(o), results=[])
    for shape in o.shapes:
        for stage in o.stages:
            found["results"] += scale(o, shape, stage)
            text = json.dumps(found, indent=1).encode()
            mil.write_whole(Path(o.out) / "scaling.json", lambda f, text=text: f.write(text))
    return found["results"]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not before the runs have been stopped
    run_command(main)
