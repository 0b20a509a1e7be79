"""The steps of train_distill.py on 1, 2, 4 … GPUs of a machine: how fast, how much memory, and whether they stay the same.

    python tests/scaling.py                       all GPUs, the shapes of Llama-3-8B and Llama-3.2-3B, random weights; without CUDA a toy
    python tests/scaling.py --shapes 8B --stages 1 --processes 1 2
    python tests/scaling.py --shapes toy          on the CPU, whose speed says nothing

Every row is the command that a user types, torchrun … train_distill.py (of one process python train_distill.py), on the same batch: --rows sequences a process
for the largest number of processes; fewer take it in more parts (--accumulate). Printed, and written to OUT/scaling.json:

    tokens/s      from the tenth step on, of all processes together; beside it its share of what so many single ones would do
    memory        the largest that PyTorch has held on process 0
    loss          of the last step; beside it the largest relative difference of a step's loss, and of its gradient's norm, from those of the first row

In stage 1 one process also runs half the steps a second time, since on a GPU no two runs are quite the same, and sharded, as torchrun starts it: what FSDP2 costs
where nothing travels. And the largest run is stopped half-way (SIGTERM to its processes; torchrun itself, told so, would kill them after 30 s) and goes on twice, with as
many processes and with half as many: the largest relative differences, in the steps after that, from the run that was not stopped.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]
import mil
import train_distill as td
from generate import run_command, save_with_tokenizer
from mil import MilError

CUDA = torch.cuda.is_available()
SHAPES = {
    "8B": mil.Config(context=2048),
    "3B": mil.Config(
        d=3072,
        n_layers=28,
        n_heads=24,
        n_kv_heads=8,
        head_dim=128,
        d_ff=8192,
        tied=True,
        context=2048,
    ),
    "toy": mil.Config(v=257, d=32, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=64, context=64),
}
TEXT = "asyncio"  # of Python's standard library
TRAINS, RATES = {1: "mixers", 2: "all"}, {"8B": 1e-6, "3B": 1e-6, "toy": 1e-2}
FIRST = 10  # steps that compile, and are not timed


def device_of(shape):
    return ("cpu", torch.float32) if shape == "toy" else ("cuda", torch.bfloat16)


def teacher(place, config):
    """A Llama of random weights in the folder `place`."""
    if not (place / "config.json").exists():
        device, kind = device_of(place.name)
        model = mil.cast(mil.empty_model(config), kind).to_empty(device=device)
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
        self.out, self.said = Path(out), Path(out) / "said"
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "recipe.json").write_text(
            json.dumps([dict(keep=0.5, trains=TRAINS[stage], steps=2 * o.steps, lr=RATES[shape])])
        )
        flags = dict(
            teacher=teacher(Path(o.out) / shape, SHAPES[shape]),
            recipe=self.out / "recipe.json",
            out=self.out,
            context=SHAPES[shape].context,
            batch=o.rows * max(o.processes),
            accumulate=max(o.processes) // count,
            eval_sequences=max(o.processes),
            save_minutes=1e6,
            device=device_of(shape)[0],
        )
        script = [
            str(Path(td.__file__)),
            *(word for k, v in flags.items() for word in (f"--{k}", str(v))),
            "--data",
            str(Path(os.__file__).parent / TEXT),
        ]
        many = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(count),
            "--",
        ] * (count > 1 or sharded)
        with open(self.said, "w") as said:
            self.process = subprocess.Popen(
                [sys.executable, *many, *script, *["--resume"] * resume],
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"} if shape == "toy" else None,
            )

    def log(self):
        path = self.out / "log.jsonl"
        return (
            [json.loads(line) for line in path.read_text().split("\n")[:-1]]
            if path.exists()
            else []
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def reach(self, step, minutes=15):
        """Waits until the log has this step; why it has not, or ""."""
        began = time.monotonic()
        while not any(line["step"] >= step for line in self.log()):
            if self.process.poll() is not None:
                return next(
                    (
                        line
                        for line in self.said.read_text().splitlines()
                        if line.startswith("error:")
                    ),
                    f"ended before step {step}; {self.said} has what it said",
                )
            if time.monotonic() - began > 60 * minutes:
                return f"not at step {step} after {minutes} minutes; {self.said} has what it said"
            time.sleep(0.02)
        return ""

    def stop(self, how=signal.SIGKILL):
        for stat in Path("/proc").glob(
            "[0-9]*/stat"
        ):  # those that torchrun started, which would outlive it; it ends when they have
            with contextlib.suppress(OSError):  # it has ended
                if (
                    int(stat.read_text().rpartition(")")[2].split()[1]) == self.process.pid
                ):  # its parent
                    os.kill(int(stat.parent.name), how)
        if how == signal.SIGKILL:
            self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(600)


def apart(log, other):
    """The largest relative differences of the losses and of the gradients' norms of the steps that both have."""
    theirs = {line["step"]: line for line in other}
    return [
        max(
            abs(line[key] / theirs[line["step"]][key] - 1) for line in log if line["step"] in theirs
        )
        for key in ("loss", "gradient")
    ]


def said_apart(row):
    return f"{row['apart'][0]:.1e} apart, gradients {row['apart'][1]:.1e}"


def scale(o, shape, stage):
    """The rows of a shape and a stage, and what became of the run that was stopped."""
    rows, logs, place = [], [], Path(o.out) / f"{shape}-{stage}"
    shutil.rmtree(place, ignore_errors=True)
    one = [(1, "", o.steps)] + [
        (1, how, max(FIRST + 1, o.steps // 2)) for how in (", again", ", FSDP2")
    ] * (stage == 1)
    for count, how, steps in one * (1 in o.processes) + [
        (n, "", o.steps) for n in o.processes if n > 1
    ]:
        who = f"{shape}, stage {stage}, {count} process{'es' if count > 1 else ''}{how}"
        row = dict(shape=shape, stage=stage, processes=count, how=how[2:])
        rows.append(row)
        with Steps(
            o, shape, stage, count, place / f"{count}{how[2:]}", sharded=how == ", FSDP2"
        ) as run:
            if failed := run.reach(steps):
                row["failed"] = failed
                print(f"{who:<32}{failed}", flush=True)
                continue
        log = run.log()[:steps]
        logs.append(log)
        speed = (
            o.rows
            * max(o.processes)
            * SHAPES[shape].context
            * (log[-1]["step"] - log[FIRST - 1]["step"])
            / max(0.01, log[-1]["seconds"] - log[FIRST - 1]["seconds"])
        )
        row["tokens_s"] = speed
        alone = next(
            (r["tokens_s"] for r in rows if r["processes"] == 1 and "tokens_s" in r), None
        )  # None where one has not enough memory
        row.update(
            linear=alone and speed / count / alone,
            memory=log[-1]["memory"],
            loss=log[-1]["loss"],
            apart=apart(log, logs[0]),
        )
        print(
            f"{who:<32}{speed:>12,.0f} tokens/s"
            + (f"{row['linear']:>7.1%} of linear" if row["linear"] else f"{'':>17}")
            + f"{row['memory'] / 2**30:>8.1f} GiB"
            f"   step {steps}: loss {row['loss']:.4f}" + f", {said_apart(row)}" * (len(logs) > 1),
            flush=True,
        )
    if max(o.processes) > 1 and stage == 1 and "failed" not in rows[-1]:
        rows += resume(o, shape, stage, place, logs[-1])
    if not any("failed" in row for row in rows):
        shutil.rmtree(place)
    return rows


def resume(o, shape, stage, place, log):
    """What became of the largest run, of which `log` is the log, when it was stopped half-way."""
    most, began = max(o.processes), time.monotonic()
    with Steps(o, shape, stage, most, place / "stopped") as run:
        failed, stopped = run.reach(o.steps // 2), time.monotonic()
        run.stop(signal.SIGTERM)
        took, there, size = (
            time.monotonic() - stopped,
            run.log()[-1]["step"] if run.log() else 0,
            sum(f.stat().st_size for f in (run.out / "checkpoints").glob("*.pt")),
        )
    failed = (
        failed
        or "left no checkpoint" * (not size)
        or f"was at step {there} before it could be stopped; more --steps" * (there >= o.steps)
    )
    rows = [
        dict(
            shape=shape,
            stage=stage,
            processes=most,
            stopped_s=took,
            checkpoint=size,
            **{"failed": failed} if failed else {},
        )
    ]
    print(
        f"{shape}, stage {stage}, stopped: "
        + (
            failed
            or f"{stopped - began:.0f} s after its start, at step {there}; {took:.0f} s later it had ended and left {size / 2**30:.2f} GiB"
        ),
        flush=True,
    )
    if failed:
        return rows
    shutil.copytree(
        run.out,
        place / "half",
        ignore=shutil.ignore_patterns("data", "said"),
        copy_function=os.link,
    )
    for count, out in ((most, run.out), (most // 2, place / "half")):
        with Steps(o, shape, stage, count, out, resume=True) as again:
            failed = again.reach(o.steps)
        failed = failed or "did not go on from its checkpoint" * ("note:" in again.said.read_text())
        new = again.log()[there : o.steps]
        rows.append(
            dict(
                shape=shape,
                stage=stage,
                processes=count,
                resumed=there,
                **{"failed": failed} if failed else {"apart": apart(new, log)},
            )
        )
        print(
            f"{shape}, stage {stage}, goes on with {count}: "
            + (failed or f"steps {there + 1} to {o.steps}, {said_apart(rows[-1])}"),
            flush=True,
        )
    return rows


def main(argv):
    most = torch.cuda.device_count() if CUDA else 2
    parser = mil.Parser(
        prog="scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["8B", "3B"] if CUDA else ["toy"],
        choices=SHAPES,
        help="of the teacher, and of the student that it becomes",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        default=[1, 2],
        choices=TRAINS,
        help="1: the new mixers train; 2: everything. Stage 1 is also stopped",
    )
    parser.add_argument(
        "--processes",
        nargs="+",
        type=int,
        default=sorted({n for n in (1, 2, 4, 8, most) if most % n == 0}),
        help="how many, of each row (%(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, default=4, help="sequences a process at once (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="how many; the run is then broken off (%(default)s)"
    )
    parser.add_argument(
        "--out",
        default="out/scaling",
        help="for the teachers, which stay, the runs and scaling.json, of the last call (%(default)s)",
    )
    o = parser.parse_args(argv)
    o.processes = sorted({*o.processes})
    if not CUDA and {*o.shapes} - {"toy"}:
        raise MilError(f"--shapes {' '.join(o.shapes)}: without CUDA expected toy")
    # of a stage of fewer than 200 steps, twice as many as here, each is logged
    if (
        not FIRST < o.steps < 100
        or o.rows < 1
        or any(n < 1 or max(o.processes) % n for n in o.processes)
        or CUDA
        and o.processes[-1] > most
    ):
        raise MilError(
            f"--steps {o.steps} --rows {o.rows} --processes {' '.join(map(str, o.processes))}: expected {FIRST + 1} to 99 --steps, one of --rows or more, and --processes that divide the largest of them"
            + f", at most {most}, as there are GPUs" * CUDA
        )
    machine = torch.cuda.get_device_name() if CUDA else f"{os.cpu_count()} CPU cores"
    print(
        f"{machine}, torch {torch.__version__}; {o.rows} rows a process at once, {o.rows * max(o.processes)} a step",
        flush=True,
    )
    rows = []
    for shape in o.shapes:
        for stage in o.stages:
            rows += scale(o, shape, stage)
            mil.write_whole(
                Path(o.out) / "scaling.json",
                lambda f: f.write(
                    json.dumps(
                        dict(
                            machine=machine, torch=torch.__version__, settings=vars(o), results=rows
                        ),
                        indent=1,
                    ).encode()
                ),
            )
    return rows


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not before the runs have been stopped
    run_command(main)
