"""Runs that end early, go on, are shared between processes; the teacher's answers; preferences."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import weakref
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import DEVICE, assert_close, build
from hypothesis import given
from hypothesis import strategies as st
from test_train_distill import HALF, recipe, some_tokens, tiny_teacher
from torch.distributed.tensor import DTensor, Shard

import generate as g
import mil
import train_distill as t
from mil import Config, MilError

SIZES = [
    "--n_layers",
    "2",
    "--d",
    "16",
    "--n_heads",
    "2",
    "--n_kv_heads",
    "1",
    "--d_ff",
    "24",
    "--context",
    "32",
    "--batch",
    "4",
    "--eval_sequences",
    "6",
]
STEPS = [
    "--teacher_steps",
    "30",
    "--stage1_steps",
    "20",
    "--stage2_steps",
    "20",
    "--stage3_steps",
    "12",
    "--save_minutes",
    "0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of a run through every kind of stage, but for --out: conversations, answers to them, pairs."""
    place = tmp_path_factory.mktemp("data")
    talk = lambda i: [
        {"role": "user", "content": f"{i} and {i % 7}?"},
        {"role": "assistant", "content": f"it is {i + i % 7}"},
    ]  # noqa: E731
    (place / "chat.jsonl").write_text(
        "\n".join(json.dumps({"messages": talk(i)}) for i in range(80))
    )
    (place / "pairs.jsonl").write_text(
        "\n".join(
            json.dumps(
                {"prompt": f"{i} and 1?", "chosen": f"it is {i + 1}", "rejected": f"no, {i}"}
            )
            for i in range(40)
        )
    )
    return [
        *SIZES,
        *STEPS,
        "--data",
        str(place / "chat.jsonl"),
        "--pairs",
        str(place / "pairs.jsonl"),
        "--pseudo_labels",
        "--answers",
        "30",
        "--answer_tokens",
        "9",
        "--device",
        "cpu",
    ]


CLEAN = multiprocessing.get_context(
    "forkserver"
)  # processes that have all of this imported, and no CUDA in use
CLEAN.set_forkserver_preload(["test_runs"])


@pytest.fixture(scope="module", autouse=True)
def server():
    """Starts what the clean processes fork from, which finds this module by PYTHONPATH alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv(
            "CUDA_VISIBLE_DEVICES", ""
        )  # a fork of a process that has looked for GPUs cannot
        forkserver.ensure_running()


def work(argv, said, before):
    """train_distill.py; what it says goes to the file `said`."""
    with open(said, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
    before()
    try:
        t.main(argv)
    except MilError as e:
        sys.exit(f"error: {e}")


def full():
    """The disk is full after 9,000 bytes of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))


@contextlib.contextmanager
def started(argv, said, before=time.time):
    """A run in a process of its own: functions that send it a signal, and that wait for its exit code."""
    worker = CLEAN.Process(target=work, args=(argv, said, before))
    worker.start()
    try:
        yield lambda sign: os.kill(worker.pid, sign), lambda: worker.join() or worker.exitcode
    finally:
        worker.kill()
        worker.join()


def finish(argv, said):
    with started(argv, said) as (_, wait):
        assert wait() == 0, Path(said).read_text()[-3000:]


def left(out):
    """What a run leaves that must not depend on how often it was interrupted."""
    weights = {name: mil.load(out / name).state_dict() for name in ("teacher", "student")}
    log = [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "memory")}
        for line in (out / "log.jsonl").read_text().splitlines()
    ]
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
        for row in json.loads((out / "results.json").read_text())["rows"]
    ]
    return weights, log, rows


def same(a, b):
    return a[1:] == b[1:] and all(
        torch.equal(w, b[0][name][k]) for name, weights in a[0].items() for k, w in weights.items()
    )


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    finish([*data, "--out", str(place / "o")], place / "said")
    return left(place / "o")


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(data, undisturbed, tmp_path):
    """SIGKILL, 20 times at least, at any moment of any stage, also in the middle of writing; every next process goes on with --resume."""
    argv, moments, kills, finished = (
        [*data, "--out", str(tmp_path / "o"), "--resume"],
        random.Random(),
        0,
        0,
    )
    while kills < 20 or not finished:
        with started(argv, tmp_path / "said") as (send, wait):
            time.sleep(
                moments.uniform(0.02, 2 + kills / 10)
            )  # a busy machine needs longer to come further
            with contextlib.suppress(ProcessLookupError):  # it has ended
                send(signal.SIGKILL)
            killed = wait() != 0
        kills += killed
        if not killed:
            assert same(left(tmp_path / "o"), undisturbed), (tmp_path / "said").read_text()[-3000:]
            finished += 1
            subprocess.run(["rm", "-rf", tmp_path / "o"], check=True)
        assert kills < 400
    assert "Traceback" not in (tmp_path / "said").read_text()


def paused(data, out, said, after=20):
    """A run that SIGTERM stopped once it had so many lines in its log."""
    with started([*data, "--out", str(out)], said) as (send, wait):
        while (
            not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < after
        ):
            time.sleep(0.01)
        send(signal.SIGTERM)
        assert (
            wait() == 143
            and "stopped by SIGTERM; the same command with --resume goes on"
            in said.read_text().partition(
                "SIGTERM: stops at the next logged step, with a checkpoint"
            )[2]
        )


def test_a_full_disk_leaves_the_last_checkpoint_and_only_the_newest_are_kept(
    data, undisturbed, tmp_path
):
    out, said = tmp_path / "o", tmp_path / "said"
    paused(data, out, said)
    kept = {place: place.read_bytes() for place in (out / "checkpoints").iterdir()}
    assert 1 <= len(kept) <= 2
    with started([*data, "--out", str(out), "--resume"], said, full) as (_, wait):
        assert (
            wait() == 1
            and ".pt: cannot be written (disk full?)" in said.read_text().splitlines()[-1]
        )
    assert {place: place.read_bytes() for place in (out / "checkpoints").iterdir()} == kept
    newest = max(kept)
    newest.write_bytes(kept[newest][:1000])  # and one that is cut short is passed over
    finish([*data, "--out", str(out), "--resume"], said)
    assert f"{newest}: not a whole checkpoint, passed over" in said.read_text() and same(
        left(out), undisturbed
    )
    older, step = min(kept), int(min(kept).stem.split("-")[1])
    assert (
        f"goes on from {older}: the teacher, after step {step}\n" in said.read_text() and step > 0
    )


def test_a_run_that_fails_in_a_stage_goes_on_from_the_end_of_the_one_before(
    data, undisturbed, tmp_path, monkeypatch, capsys
):
    argv, fit, calls = [*data, "--out", str(tmp_path / "o"), "--save_minutes", "1e9"], t.fit, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MilError("a cable was pulled")
        fit(*args)

    monkeypatch.setattr(t, "fit", failing)
    with pytest.raises(MilError, match="cable"):
        t.main(argv)
    assert [place.name for place in t.checkpoints(calls[0][0])] == [
        "01-00000000.pt",
        "02-00000000.pt",
    ]
    capsys.readouterr()
    t.main([*argv, "--resume"])
    assert same(left(tmp_path / "o"), undisturbed) and len(calls) == 5
    assert "02-00000000.pt: stage 2, all parameters, after step 0\n" in capsys.readouterr().out


def test_other_settings_are_named_and_an_unfinished_run_is_not_overwritten(data, tmp_path):
    out = tmp_path / "o"
    paused(data, out, tmp_path / "said", 5)
    with pytest.raises(MilError, match="holds an unfinished run; --resume goes on with it"):
        t.main([*data, "--out", str(out)])
    with pytest.raises(
        MilError,
        match=r"--resume: .*pt was made with other settings: --stage2_lr was 0.0 and is 0.5; --clip was 1.0 and is 0.1; stage 2: lr was 0.001 and is 0.5. Give them as they were",
    ):
        t.main([*data, "--out", str(out), "--resume", "--clip", "0.1", "--stage2_lr", "0.5"])
    with pytest.raises(MilError, match="stage 1: keep was 0.5 and is None"):
        t.main(
            [*data, "--out", str(out), "--resume", "--recipe", recipe(tmp_path, {"replace": [1]})]
        )
    with pytest.raises(
        MilError, match="other settings: stage 1: lr was 0.003 and is 1; stage 2: data was"
    ):
        t.main(
            [
                *data,
                "--out",
                str(out),
                "--resume",
                "--recipe",
                recipe(
                    tmp_path,
                    {"keep": 0.5, "lr": 1},
                    {"trains": "all", "data": [data[data.index("--data") + 1]]},
                    {"loss": "dpo"},
                ),
            ]
        )
    other = tmp_path / "other.jsonl"
    other.write_text(Path(data[data.index("--data") + 1]).read_text().replace("it is", "that is"))
    with pytest.raises(
        MilError, match=r"other settings: --data was \[.*chat.jsonl.*and is \[.*other.jsonl"
    ):
        t.main([*data, "--out", str(out), "--resume", "--data", str(other)])
    for flag, name in (("--data", "--data holds"), ("--pairs", "the data of stage 3 hold")):
        path = Path(data[data.index(flag) + 1])
        before, times = path.read_text(), path.stat()
        path.write_text(before.replace("it is", "it isn't"))
        with pytest.raises(MilError, match=f"other settings: what {name} was"):
            t.main([*data, "--out", str(out), "--resume"])
        path.write_text(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_resume_without_a_checkpoint_begins_and_of_a_finished_run_says_so(data, tmp_path):
    argv, said = (
        [
            *data,
            "--out",
            str(tmp_path / "o"),
            "--resume",
            "--teacher_steps",
            "2",
            "--stage1_steps",
            "2",
            "--stage2_steps",
            "1",
            "--stage3_steps",
            "1",
        ],
        tmp_path / "said",
    )
    finish(argv, said)
    assert "there is no checkpoint to go on from; this run begins anew" in said.read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*.*")}
    finish(argv, said)
    assert (
        said.read_text().count("begins anew") == 1
        and f"{tmp_path}/o/results.json: this run is finished" in said.read_text()
        and before == {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*.*")}
    )
    with started([*argv, "--stage2_steps", "2"], said) as (_, wait):
        assert (
            wait() == 1
            and "is of other settings; without --resume it is replaced" in said.read_text()
        )
    finish([flag for flag in argv if flag != "--resume"], said)
    assert (
        said.read_text().count("student / teacher validation loss") == 2
        and "holds a finished run, which is replaced" in said.read_text()
    )


# --------------------------------------------------------------------------------------------------
# Several processes


def in_two_processes(function, *args):
    """function(rank, *args) in each."""
    workers = [CLEAN.Process(target=function, args=(rank, *args)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
        worker.kill()  # where the other has failed
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


def gradients(run, stage, teacher, corpus):
    """Of one step, all of every tensor that trains; and how many of a layer's tensors a process holds a part of, of those that train and of the others, before
    the forward pass, after it, and after the backward pass."""
    pair = t.assemble(run, teacher, teacher, stage, 1, {})
    parts, count = t.training_batches(run, corpus, [7])(3)
    spread = lambda: [
        sum(
            hasattr(w, "device_mesh")
            for w in pair.student.layers[0].parameters()
            if w.requires_grad == learns
        )
        for learns in (True, False)
    ]  # noqa: E731
    held = [spread()]
    for part in parts:
        loss, _ = t.distill(pair, part, stage, run.size / count)
        held.append(spread())
        loss.backward()
    return t.gathered(
        run, {k: w.grad for k, w in pair.student.named_parameters() if w.grad is not None}
    ), [*held, spread()]


def shared_work(rank, place, accumulate, stage, teacher, corpus):
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    run = t.Run(
        t.Settings(batch=4, context=16, dtype="float32", accumulate=accumulate),
        torch.device("cpu"),
        rank,
        2,
    )
    found = gradients(run, stage, teacher, corpus)
    if rank == 0:
        torch.save(found, place / "found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("train, accumulate", [("mixers", 1), ("all", 1), ("all", 2)])
def test_two_processes_have_the_gradients_of_one(tmp_path, train, accumulate):
    """Sharded with FSDP2, stage 1 with tensors that teacher and student share, and a batch in which some rows teach more than others."""
    teacher = tiny_teacher(tied=True).cpu()
    tokens = np.random.default_rng(1).integers(0, 256, 400)
    corpus = some_tokens(np.where(np.arange(400) % 11 < 4, tokens, ~tokens))
    stage = t.Stage(trains=train, mixers=["mamba2", "attention", "mamba2", "attention"])
    single, _ = gradients(
        t.Run(t.Settings(batch=4, context=16, dtype="float32"), torch.device("cpu")),
        stage,
        teacher,
        corpus,
    )
    in_two_processes(shared_work, tmp_path, accumulate, stage, teacher, corpus)
    found, held = torch.load(tmp_path / "found.pt")
    trained = 8 if train == "mixers" else 13  # of a layer
    assert held == [[trained, 0]] * (accumulate + 2)  # gathered only while it works
    assert found.keys() == single.keys() and len(found) == (16 if train == "mixers" else 46)
    for k, w in single.items():
        assert_close(found[k], w, 2e-5, k, noise=1e-9)


def in_bfloat16(rank, place, teacher, corpus):
    """What two processes that compute in bfloat16 gather, and what they save after an evaluation."""
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    run = t.Run(
        t.Settings(batch=4, context=16, dtype="bfloat16", out=str(place)),
        torch.device("cpu"),
        rank,
        2,
    )
    models, batch = (
        t.assemble(
            run,
            teacher,
            teacher,
            t.Stage(trains="all", mixers=["attention", "mamba2", "mamba2", "attention"]),
            1,
            {},
        ),
        t.training_batches(run, corpus, [7])(3)[0][0],
    )
    made = t.gathered(run, t.parameters(models.student))
    assert rank == 0 or {*made.values()} == {None}
    made = {k: w.clone() for k, w in made.items() if rank == 0}
    types, layer = {}, models.student.layers[1]
    layer.register_forward_hook(
        lambda _, args, __: types.update(
            {
                **{k: w.dtype for k, w in layer.named_parameters()},
                **{f"angles {i}": w.dtype for i, w in enumerate(args[1])},
            }
        )
    )
    with torch.no_grad():
        models.read(batch)
    saved = t.save_state(run, t.State(), models.student)
    with torch.no_grad():
        models.read(batch)
    t.save_student(run, models.student, place / "student", "bytes", torch.float32)
    t.distill(models, batch, t.Stage(), 0.1)[0].backward()
    gradients = t.gathered(
        run, {k: w.grad for k, w in t.parameters(models.student).items() if "proj.weight" in k}
    )
    if rank == 0:
        torch.save((types, made, dict(saved), gradients), place / "found.pt")
    dist.destroy_process_group()


def test_in_bfloat16_nothing_that_is_gathered_added_up_or_saved_is_rounded(tmp_path):
    teacher = tiny_teacher().cpu()
    in_two_processes(
        in_bfloat16, tmp_path, teacher, some_tokens(np.random.default_rng(1).integers(0, 256, 400))
    )
    types, made, saved, gradients = torch.load(tmp_path / "found.pt")
    assert len(types) == 13 + 2 and {*types.values()} == {torch.float32}
    assert torch.equal(
        made["layers.0.mlp.up_proj.weight"], teacher.layers[0].mlp.up_proj.weight
    ) and any(not torch.equal(w, w.bfloat16().float()) for w in made.values())
    for kept in (saved, mil.load(tmp_path / "student").state_dict()):
        assert made.keys() <= kept.keys() and all(
            kept[k].dtype == torch.float32 and torch.equal(kept[k].cpu(), w)
            for k, w in made.items()
        )
    assert len(gradients) == 24 and not any(
        torch.equal(w, w.bfloat16().float()) for w in gradients.values()
    )  # the sum of two bfloat16 has more places


def one_at_a_time(rank, place):
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    mesh, gathered, alive = dist.init_device_mesh("cpu", (2,)), [], []
    tensors = {str(i): DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0)]) for i in range(4)}
    full = DTensor.full_tensor

    def watched(w):
        alive.append(sum(earlier() is not None for earlier in gathered))
        gathered.append(weakref.ref(found := full(w)))
        return found

    DTensor.full_tensor = watched
    t.gathered(t.Run(t.Settings(), torch.device("cpu"), rank, 2), tensors)
    assert len(alive) == 4 and (
        rank == 0 or max(alive) <= 1
    )  # on process 0 they are on the CPU already, where they stay
    dist.destroy_process_group()


def test_a_checkpoint_is_gathered_one_tensor_at_a_time(tmp_path):
    in_two_processes(one_at_a_time, tmp_path)


def test_an_earlier_stages_sharded_models_leave_the_memory_before_the_next_come(
    monkeypatch, tmp_path
):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        run, teacher = (
            t.Run(t.Settings(batch=4, context=16, dtype="float32"), torch.device("cpu")),
            tiny_teacher().cpu(),
        )
        stage = t.Stage(trains="mixers", mixers=["mamba2", "attention", "mamba2", "attention"])
        first = weakref.ref(t.assemble(run, teacher, teacher, stage, 1, {}).student)
        assert (
            first() is not None
        )  # FSDP2's circles; where it makes none, the line that collects them may go
        there = []
        monkeypatch.setattr(
            t.mil,
            "replace_attention",
            lambda *args, make=t.mil.replace_attention, **how: (
                there.append(first()) or make(*args, **how)
            ),
        )
        t.assemble(run, teacher, teacher, stage, 1, {})
        assert there == [None, None]
    finally:
        dist.destroy_process_group()


def joined(rank, port, patch=None):
    """Makes of this process one of two, as torchrun does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    if patch:
        patch(rank)


@contextlib.contextmanager
def two_started(argv, said, patch=None):
    """A run in two processes: they, and a function that waits for their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        CLEAN.Process(target=work, args=(argv, said, functools.partial(joined, rank, port, patch)))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        yield workers, lambda: [worker.join(100) or worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def late(rank):
    """The second process answers after the first, which tokenises after it if that does not wait."""
    if rank:
        t.answer = lambda *args, answer=t.answer: (time.sleep(2), answer(*args))
        t.load_corpus = lambda *args, load=t.load_corpus: (
            (Path(args[0].out) / "first").stat() and load(*args)
        )
    else:
        t.load_corpus = lambda *args, load=t.load_corpus: (
            time.sleep(1),
            (Path(args[0].out) / "first").write_text("x"),
            load(*args),
        )[2]


@pytest.fixture(scope="module")
def table(data, tmp_path_factory):
    """The flags of a run without answers of the teacher, in which a rounding may change a token, and its table."""
    argv, place = (
        [*data[: data.index("--pseudo_labels")], "--device", "cpu", "--out"],
        tmp_path_factory.mktemp("table"),
    )
    finish([*argv, str(place / "o")], place / "said")
    return argv, left(place / "o")[2]


def test_a_sharded_run_ends_with_the_table_of_one_process(table, tmp_path):
    argv, want = table
    with two_started([*argv, str(tmp_path / "o")], tmp_path / "said") as (_, wait):
        assert wait() == [0, 0], (tmp_path / "said").read_text()[-3000:]
    for row, one in zip(left(tmp_path / "o")[2], want, strict=True):
        assert row.pop("model") == one["model"] and row == pytest.approx(
            {k: v for k, v in one.items() if k != "model"}, rel=1e-3, abs=1e-4
        )


def fast(rank):
    """The second process's clock runs a thousand times as fast."""
    if rank:
        began, real = time.monotonic(), time.monotonic
        t.time = SimpleNamespace(
            **{**vars(time), "monotonic": lambda: began + 1000 * (real() - began)}
        )


def test_processes_save_together_though_their_clocks_differ(data, tmp_path):
    argv = [
        *data,
        "--out",
        str(tmp_path / "o"),
        "--teacher_steps",
        "200",
        "--stage1_steps",
        "1",
        "--stage2_steps",
        "1",
        "--stage3_steps",
        "1",
        "--save_minutes",
        "1",
    ]
    with two_started(argv, tmp_path / "said", fast) as (_, wait):
        assert wait() == [0, 0], (tmp_path / "said").read_text()[-3000:]


def test_a_batch_that_the_processes_cannot_share_is_refused(data, tmp_path):
    with two_started(
        [*data, "--out", str(tmp_path / "o"), "--batch", "6", "--accumulate", "2"],
        tmp_path / "said",
    ) as (_, wait):
        assert wait() == [1, 1]
    assert (
        "--batch is 6, expected a multiple of 8, processes × --accumulate × the 2 of a pair"
        in (tmp_path / "said").read_text()
    )


@pytest.mark.parametrize(
    "given, gpu, spins",
    [
        ({}, False, "300"),
        ({}, True, None),
        ({"GOMP_SPINCOUNT": "7"}, False, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, False, None),
    ],
)
def test_on_a_cpu_threads_spin_for_a_short_time_unless_the_user_says_how_long(given, gpu, spins):
    """What OpenMP reads when torch is imported."""
    script = (
        "import os, sys; exists = os.path.exists\n"
        f"os.path.exists = lambda path: {gpu} if path == '/dev/nvidia0' else exists(path)\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT')); os._exit(sys.stdout.flush() or 0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import train_distill"
    )
    free = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=free | given,
        cwd=Path(t.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(spins), done.stderr


def test_of_two_processes_either_may_be_told_to_stop_and_both_do(data, tmp_path):
    argv, log = (
        [*data, "--out", str(tmp_path / "o"), "--teacher_steps", "3000"],
        tmp_path / "o" / "log.jsonl",
    )
    with two_started(argv, tmp_path / "said") as (workers, wait):
        while not log.exists() or log.read_text().count("\n") < 2:
            assert all(worker.is_alive() for worker in workers), (tmp_path / "said").read_text()
            time.sleep(0.01)
        workers[1].terminate()
        assert wait() == [143, 143]
    steps, said = (
        [int(place.stem.split("-")[1]) for place in (tmp_path / "o" / "checkpoints").iterdir()],
        (tmp_path / "said").read_text(),
    )
    assert (
        steps
        and all(step % 10 == 0 for step in steps)
        and said.count("stopped by") == 1
        and "Connection closed" not in said
    )


def test_when_one_of_two_processes_fails_the_run_ends_and_says_why(data, tmp_path):
    """While the other waits for it in an exchange: with NCCL where there are two GPUs."""
    script = tmp_path / "fails.py"
    script.write_text(f"""import os, sys
sys.path.insert(0, {str(Path(t.__file__).parent)!r})
import train_distill as t
def windows(*args, made=[], make=t.windows):
    made.append(1)
    if os.environ["RANK"] == "1" and len(made) == 9:
        raise t.MilError("the second process has had enough")
    return make(*args)
t.windows = windows
t.run_command(t.main)
""")
    began = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "--",
            str(script),
            *data,
            "--out",
            str(tmp_path / "o"),
            *["--device", "cuda"] * (torch.cuda.device_count() > 1),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "OMP_NUM_THREADS": "1",
        },
    )
    assert (
        done.returncode == 1
        and "error: the second process has had enough" in done.stderr
        and time.monotonic() - began < 100
    )
    assert "[rank0]: Traceback" not in done.stderr  # as torch marks it


def lost(rank, place):
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    dist.barrier()  # they have met before one goes
    if rank == 0:
        t.run_job = lambda run, began: t.together(t.Run(run.s, run.device, 0, 2))
        t.begin = lambda s: t.Run(s, torch.device("cpu"), 0, 2)
        with pytest.raises(MilError, match="another process has ended; what it said stands above"):
            t.main([])
        t.run_job = lambda run, began: torch.ones(2) @ torch.ones(3)
        with pytest.raises(RuntimeError, match="size"):
            t.main([])
    os._exit(0)


def test_a_process_whose_peer_has_gone_says_so_in_a_line(tmp_path):
    in_two_processes(lost, tmp_path)


@pytest.mark.parametrize(
    "ends, waits", [(None, True), (MilError("no"), False), (torch.OutOfMemoryError("full"), False)]
)
def test_a_process_that_failed_does_not_wait_for_the_others(monkeypatch, tmp_path, ends, waits):
    """NCCL's destroy_process_group would: they wait for it in their next exchange."""
    ended = []

    def work(run, began):
        if ends:
            raise ends

    monkeypatch.setattr(t, "run_job", work)
    monkeypatch.setattr(t.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(t.dist, "destroy_process_group", lambda: ended.append(True))
    with pytest.raises(MilError) if ends else contextlib.nullcontext():
        t.main(["--out", str(tmp_path)])
    assert ended == [True] * waits


def started_by_torchrun(monkeypatch, gpus, device):
    """What the fourth process of a machine, the twelfth of all, asks for."""
    asked, times = [], []
    for name, value in dict(
        RANK=11, LOCAL_RANK=3, WORLD_SIZE=16, MASTER_ADDR="here", MASTER_PORT=1
    ).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(t.torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(t.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        t, "pick_device", lambda name: asked.append(name) or torch.device(name or "cpu")
    )
    monkeypatch.setattr(
        t.dist,
        "init_process_group",
        lambda backend, timeout, device_id: (
            asked.append((backend, device_id and str(device_id))) or times.append(timeout)
        ),
    )
    monkeypatch.setattr(t.dist, "get_rank", lambda: 11)
    monkeypatch.setattr(t.dist, "get_world_size", lambda: 16)
    run = t.begin(t.Settings(device=device))
    assert times[0].total_seconds() > 3600  # in which process 0 may tokenise
    return asked, run.rank, run.size


@pytest.mark.parametrize(
    "device, gpus, uses, backend",
    [
        ("", 4, "cuda:3", "nccl"),
        ("cuda", 4, "cuda:3", "nccl"),
        ("cpu", 4, "cpu", "gloo"),
        ("", 0, "", "gloo"),
        ("cuda", 0, "cuda:3", "nccl"),
    ],
)  # which pick_device refuses
def test_each_process_of_torchrun_takes_its_own_gpu_and_touches_no_other(
    monkeypatch, device, gpus, uses, backend
):
    assert started_by_torchrun(monkeypatch, gpus, device) == (
        [uses, (backend, uses if backend == "nccl" else None)],
        11,
        16,
    )


@pytest.mark.parametrize(
    "device, gpus, match",
    [
        ("", 3, "process 3 finds no GPU of its own, there are 3; lower --nproc_per_node"),
        ("cuda:1", 4, "--device: behind torchrun"),
    ],
)
def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch, device, gpus, match):
    with pytest.raises(MilError, match=match):
        started_by_torchrun(monkeypatch, gpus, device)


def test_a_run_of_two_processes_says_what_a_run_of_one_says(data, undisturbed, tmp_path):
    with two_started([*data, "--out", str(tmp_path / "o")], tmp_path / "said", late) as (_, wait):
        codes, said = wait(), (tmp_path / "said").read_text()
    assert codes == [0, 0], said[-3000:]
    assert (
        said.count("chosen preferred") == 1
        and re.search(r"peak memory of process 0 \S+ GiB .* on 2 processes, \d+ CPU cores", said)
        and "FSDP2-wrapped" not in said
    )
    assert (
        sum(
            len(path.read_text().splitlines())
            for path in (tmp_path / "o" / "data").glob("*.answers.?of2.jsonl")
        )
        == 30
    )
    (weights, log, rows), (_, want, want_rows) = left(tmp_path / "o"), undisturbed
    assert len(log) == len(want)
    for mine, theirs in zip(log, want):
        rounding = (
            1e-5 if mine["stage"] == "teacher" else 5e-2
        )  # which grows, and may change an answer
        assert mine["step"] == theirs["step"] and mine["lr"] == theirs["lr"]
        assert (mine["loss"], mine["gradient"]) == pytest.approx(
            (theirs["loss"], theirs["gradient"]), rel=rounding
        ), mine
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in want_rows], rel=5e-2
    )
    assert all(torch.isfinite(w).all() for w in weights["student"].values())


# --------------------------------------------------------------------------------------------------
# Preferences


def document(ids):
    """(token, whether it is learned) of ids as document_tokens gives them."""
    return [(i if i >= 0 else ~i, i >= 0) for i in ids]


def log_probability(model, ids):
    tokens, learned = zip(*document(ids))
    law = model(torch.tensor([tokens[:-1]], device=DEVICE))[0].log_softmax(-1)
    return sum(law[i, tokens[i + 1]] for i in range(len(tokens) - 1) if learned[i + 1])


@given(st.integers(0, 99), st.sampled_from([0.1, 2.0]))
def test_the_preference_loss_equals_equation_4_and_so_do_its_gradients(seed, beta):
    rng, run = (
        np.random.default_rng(seed),
        t.Run(t.Settings(batch=4, dtype="float32"), torch.device(DEVICE)),
    )
    config = Config(v=19, d=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=12, d_state=2)
    teacher, student = (
        build(config, seed=1),
        build(Config(**{**vars(config), "mixers": ["mamba2", "attention"]}), seed=2),
    )
    pairs = [
        tuple(
            [*(~rng.integers(0, 19, 3)), *rng.integers(0, 19, rng.integers(1, 6))] for _ in range(2)
        )
        for _ in range(2)
    ]
    pairs = [tuple([int(i) for i in side] for side in pair) for pair in pairs]
    pair, stage = t.Models(teacher, student), t.Stage(loss="dpo", beta=beta)
    loss, more = t.dpo(pair, t.pair_batch(run, pairs), stage, 0.5)
    gains = [
        log_probability(student, a)
        - log_probability(teacher, a)
        - log_probability(student, b)
        + log_probability(teacher, b)
        for a, b in pairs
    ]
    plain = sum(-F.logsigmoid(beta * gain) for gain in gains) / 2
    assert_close(loss, plain, 1e-5)
    assert more.tolist() == pytest.approx(
        [sum(gain.item() > 0 for gain in gains) / 2, sum(beta * gain.item() for gain in gains) / 2],
        rel=1e-4,
    )
    for got, exact in zip(
        *(torch.autograd.grad(x, list(student.parameters())) for x in (loss, plain))
    ):
        assert_close(got, exact, 1e-4, noise=1e-9)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 30))
def test_of_a_long_prompt_the_end_is_kept_and_of_a_long_answer_the_beginning(prompt, answer, most):
    ids = [*(~i for i in range(prompt)), *range(100, 100 + answer)]
    got = t.cut(ids, most)
    asked, said = [~i for i in got if i < 0], [i for i in got if i >= 0]
    assert (
        len(got) <= most
        and said == list(range(100, 100 + len(said)))
        and asked == list(range(prompt - len(asked), prompt))
    )
    assert (
        len(got) == min(most, prompt + answer)
        and (prompt + answer <= most or len(asked) <= max(most // 2, most - answer))
        and len(asked) >= min(prompt, most // 2)
    )


def test_pairs_of_one_prompt_are_all_learned_or_all_held_out(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"{i % 30}?", "chosen": "y", "rejected": f"{i}"})
            for i in range(90)
        )
    )
    train, held = t.load_pairs(
        t.Settings(batch=4, context=64), [tmp_path / "p.jsonl"], g.load_tokenizer("bytes")
    )
    asked = lambda pairs: {tuple(i for i in chosen if i < 0) for chosen, _ in pairs}  # noqa: E731
    assert (
        (len(train), len(held)) == (84, 6)
        and len(asked(held)) == 2
        and not asked(train) & asked(held)
    )


def test_every_pair_comes_once_an_epoch():
    run, pairs = (
        t.Run(t.Settings(batch=6), torch.device("cpu")),
        [([~1, i], [~1, i + 50]) for i in range(10)],
    )
    make, seen = t.pair_batches(run, pairs, [0]), []
    for step in range(10):
        (batch,), count = make(step)
        assert count == 3 and batch.x.shape == (6, 1) and (batch.y[:3] + 50 == batch.y[3:]).all()
        seen += batch.y[:3, 0].tolist()
    assert (
        all(sorted(seen[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
        and seen[:10] != seen[10:20]
    )
    assert torch.equal(make(4)[0][0].y, t.pair_batches(run, pairs, [0])(4)[0][0].y)


@pytest.mark.parametrize(
    "lines, match",
    [
        (
            ['{"prompt": "a", "chosen": "b"}'],
            "line 1: has prompt: str, chosen: str; expected a prompt and two answers to it",
        ),
        (
            ['{"prompt": "a", "chosen": "b", "rejected": "c"}'] * 3,
            "pairs for 1 different prompts; expected 10 at least",
        ),
        (["x"], "line 1: is not JSON"),
        (
            ['{"prompt": "a", "chosen": "b", "rejected": 3}'],
            "line 1: has prompt: str, chosen: str, rejected: int",
        ),
    ],
)
def test_pairs_that_are_none_are_refused_before_any_work(tmp_path, lines, match):
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(MilError, match=match) as e:
        t.main(
            [
                "--out",
                str(tmp_path / "o"),
                *SIZES,
                "--pairs",
                str(tmp_path / "pairs.jsonl"),
                "--device",
                DEVICE,
            ]
        )
    assert "\n" not in str(e.value) and not (tmp_path / "o" / "teacher").exists()


def test_preferences_raise_the_share_of_held_out_pairs_in_which_the_chosen_gains(tmp_path):
    """On pairs that a small model can tell apart: the answers end differently."""
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"{i}?", "chosen": f"{i} yes", "rejected": f"{i} no!"})
            for i in range(200)
        )
    )
    (tmp_path / "text.txt").write_text("".join(f"{i}? {i} yes or {i} no!\n" for i in range(400)))
    t.main(
        [
            "--out",
            str(tmp_path / "o"),
            *SIZES,
            "--teacher_steps",
            "20",
            "--stage1_steps",
            "4",
            "--stage2_steps",
            "2",
            "--data",
            str(tmp_path / "text.txt"),
            "--pairs",
            str(tmp_path / "pairs.jsonl"),
            "--stage3_lr",
            "3e-3",
            "--stage3_steps",
            "40",
            "--device",
            DEVICE,
            "--dtype",
            "float32",
        ]
    )
    *_, before, after = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert (
        after["preferred"] > 0.5 + 3 * max(after["preferred_error"], 0.05)
        and after["margin"] > 0
        and "preferred" not in before
    )


# --------------------------------------------------------------------------------------------------
# The teacher's answers


def test_the_training_documents_ask_and_the_teachers_tokens_alone_are_learned(
    data, undisturbed, tmp_path
):
    mil.save(tiny_teacher(1, context=64).cpu(), tmp_path / "teacher", tokenizer="bytes")
    encoding = g.load_tokenizer("bytes")
    s = t.Settings(
        out=str(tmp_path),
        batch=8,
        context=64,
        answers=20,
        answer_tokens=12,
        seed=3,
        dtype="float32",
        data=[data[data.index("--data") + 1]],
    )
    run = t.Run(s, torch.device("cpu"))
    corpus = t.answered(run, s.data, tmp_path / "teacher", encoding, "bytes")
    (file,) = (tmp_path / "data").glob("*.answers.1of1.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [d for i, d in enumerate(t.read_documents(Path(s.data[0]), True)) if i % 20 != 9][:20]
    assert [line["number"] for line in lines] == list(range(20)) and [
        line["messages"][0] for line in lines
    ] == [d[0] for d in asked]
    assert (
        corpus.train.tolist() == [i for line in lines for i in line["tokens"]]
        and corpus.begins[0].tolist()
        == np.cumsum([0] + [len(line["tokens"]) for line in lines])[:-1].tolist()
    )
    assert np.array_equal(corpus.val, t.load_corpus(s, s.data, encoding, "bytes").val)
    teacher = mil.load(tmp_path / "teacher")
    for i in (0, 8, 16):  # batches of 8, each with a seed of its own
        prompts = [[~k for k in line["tokens"] if k < 0] for line in lines[i : i + 8]]
        assert [
            encoding.conversation(line["messages"][:1])[0] + encoding.encode("assistant:\n")
            for line in lines[i : i + 8]
        ] == prompts
        replies = [[] for _ in prompts]
        for new in g.generate(
            teacher,
            prompts,
            12,
            stop=encoding.stops,
            generator=torch.Generator().manual_seed(lines[i]["seed"]),
        ):
            replies = [[*a, *b] for a, b in zip(replies, new)]
        assert (
            replies == [[k for k in line["tokens"] if k >= 0] for line in lines[i : i + 8]]
            and len({line["seed"] for line in lines[i : i + 8]}) == 1
        )
    assert lines[0]["seed"] != lines[8]["seed"]
    whole = file.read_bytes()
    for end in (
        0,
        100,
        whole.index(b"\n", 2000),
        len(whole) - 3,
    ):  # cut anywhere it is written again, the same
        file.write_bytes(whole[:end])
        for stored in (tmp_path / "data").glob("*.answers*.npy"):
            stored.unlink()
        t.answered(run, s.data, tmp_path / "teacher", encoding, "bytes")
        assert file.read_bytes() == whole


def test_prompts_are_what_comes_before_the_first_answer(tmp_path):
    encoding, s = g.load_tokenizer("bytes"), t.Settings(out=str(tmp_path), context=40)
    records = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "w"},
            ]
        },
        {"prompt": "p", "completion": "c"},
        {"text": "t" * 95},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
    ]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(record) for record in records * 3)
    )  # twelve: the tenth is validation
    got = list(t.prompts_of(s, [str(tmp_path / "a.jsonl")], encoding))
    talk, text = {"messages": records[0]["messages"][:2]}, {"prompt": "t" * 10}
    assert [record for record, _ in got] == [talk, {"prompt": "p"}, text, text, text] * 2 + [
        talk
    ] + [text] * 3
    assert bytes(got[0][1]) == b"system:\ns\nuser:\nu\nassistant:\n" and got[1][1] == [112]


# --------------------------------------------------------------------------------------------------
# Another Llama to begin as; memory; the figure


def test_a_larger_teacher_teaches_a_smaller_llama(data, tmp_path):
    for name, changes in (("big", dict(d=32, n_layers=3)), ("small", {}), ("other", dict(v=300))):
        mil.save(tiny_teacher(context=64, **changes), tmp_path / name, tokenizer="bytes")
    argv = [
        "--out",
        str(tmp_path / "o"),
        "--teacher",
        str(tmp_path / "big"),
        "--data",
        data[data.index("--data") + 1],
        "--context",
        "32",
        "--batch",
        "4",
        "--eval_sequences",
        "4",
        "--stage1_steps",
        "3",
        "--stage2_steps",
        "2",
        "--device",
        DEVICE,
    ]
    t.main([*argv, "--init_from", str(tmp_path / "small")])
    student = mil.load(tmp_path / "o" / "student")
    assert student.config.d == 16 and student.config.mixers == HALF
    with pytest.raises(MilError, match="other: has 300 tokens, the teacher 257"):
        t.main([*argv, "--init_from", str(tmp_path / "other")])
    with pytest.raises(MilError, match="expected attention in every layer"):
        t.main(
            [*argv, "--init_from", str(tmp_path / "o" / "student"), "--out", str(tmp_path / "p")]
        )
    with pytest.raises(MilError, match="student_layers and --init_from: leave one out"):
        t.main([*argv, "--init_from", str(tmp_path / "small"), "--student_layers", "0"])


def test_a_full_memory_is_said_with_what_takes_less(data, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(t, "fit", full)
    with pytest.raises(
        MilError,
        match=r"the GPU's memory is full; .*--memory_budget 0.7, --accumulate, --batch, --context.*2 GiB",
    ) as e:
        t.main([*data, "--out", str(tmp_path / "o")])
    assert "\n" not in str(e.value)


def test_a_recipe_may_train_on_preferences_alone(data, tmp_path):
    pairs = data[data.index("--pairs") + 1]
    stages = recipe(
        tmp_path, {"keep": 0.5, "steps": 2}, {"loss": "dpo", "data": [pairs], "trains": "mixers"}
    )
    t.main(
        [
            *data,
            "--pairs",
            pairs,
            "--out",
            str(tmp_path / "o"),
            "--teacher_steps",
            "2",
            "--stage3_steps",
            "0",
            "--recipe",
            stages,
        ]
    )
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [
        "teacher",
        "student, not trained",
        "stage 1.1, 1 of 2 layers replaced",
        "stage 3, preferences",
    ] and rows[-1]["kl"] < 1
    assert (
        json.loads((tmp_path / "o" / "log.jsonl").read_text().splitlines()[-1])["step"] == 19
    )  # 38 training pairs, two a step, once
