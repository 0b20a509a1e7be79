"""Runs that end early and go on, with the same bits; runs that several processes share."""

import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close
from test_train_distill import SIZES, SMALL, fill, flags, left, refused, train, write_recipe

import train_distill as t
from mil import MilError

STEPS = "--teacher_steps 16 --stage1_steps 12 --stage2_steps 10 --stage3_steps 8 --save_minutes 0 "
LABELS = "--pseudo_labels --answers 30 --answer_tokens 4 "


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def argv(shelf):
    """A run through every kind of stage, but for --out."""
    files = dict(data=shelf / "chat.jsonl", pairs=shelf / "pairs.jsonl", device="cpu")
    return flags(SIZES + STEPS + LABELS, n_layers=2, **files)


CLEAN = multiprocessing.get_context("forkserver")  # processes with all of this imported, no CUDA
CLEAN.set_forkserver_preload(["test_runs"])


@pytest.fixture(scope="module", autouse=True)
def server():
    """Starts what the clean processes fork from; it finds this module by PYTHONPATH alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()


def work(argv, said, before):
    """The command; what it prints goes to the file `said`."""
    with open(said, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    gc.freeze()  # as in `train`
    before()
    try:
        t.main(argv)
    except MilError as e:
        sys.exit(f"error: {e}")


@contextlib.contextmanager
def started(argv, said, *befores):
    """The command in a process for each of `befores`; and a function that waits for exit codes."""
    befores = befores or [time.time]
    workers = [CLEAN.Process(target=work, args=(argv, said, before)) for before in befores]
    for worker in workers:
        worker.start()
    try:
        yield workers, lambda: [worker.join(100) or worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def finish(argv, said, *befores):
    with started(argv, said, *befores) as (workers, wait):
        assert wait() == [0] * len(workers), Path(said).read_text()[-3000:]


def until(workers, found):
    """Waits for found(), while the processes run."""
    while not found():
        assert all(worker.is_alive() for worker in workers)
        time.sleep(0.01)


def told(count, sign=signal.SIGTERM):
    """The process gets a signal in its step `count`."""
    step, steps = torch.optim.AdamW.step, itertools.count(1)

    def counted(optimizer):
        if next(steps) == count:
            os.kill(os.getpid(), sign)
        return step(optimizer)

    torch.optim.AdamW.step = counted


def same(a, b):
    """Whether two runs left the same tables, logs and bits."""
    models = [(m.student.state_dict(), m.teacher.state_dict()) for m in (a, b)]
    equal = (torch.equal(w, y[k]) for x, y in zip(*models, strict=True) for k, w in x.items())
    return a.rows == b.rows and a.log == b.log and all(equal)


@pytest.fixture(scope="module")
def undisturbed(argv, tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    finish([*argv, "--out", str(place / "o")], place / "said")
    results = json.loads((place / "o" / "results.json").read_text())
    return SimpleNamespace(**vars(left(place / "o")), took=results["seconds"])


# --------------------------------------------------------------------------------------------------
# Runs that end early


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(argv, undisturbed, tmp_path):
    """SIGKILL, 20 times at least, in any stage, also while it writes; --resume goes on."""
    out, said, kills, finished = tmp_path / "o", tmp_path / "said", 0, 0
    while kills < 20 or not finished:
        with started([*argv, "--out", str(out), "--resume"], said) as ((worker,), wait):
            longest = undisturbed.took * (0.5 + kills / 10)  # a busy machine takes longer
            worker.join(random.uniform(0.02, longest))
            worker.kill()
            killed = wait() != [0]
        kills += killed
        if not killed:
            assert same(left(out), undisturbed), said.read_text()[-3000:]
            finished += 1
            shutil.rmtree(out)
        assert kills < 400
    assert "Traceback" not in said.read_text()
    assert re.search(r"goes on from .*pt: .*, after step [1-9]", said.read_text())


def stopped(argv, out, count):
    """A run that SIGTERM stopped in step `count`; what it printed."""
    said = out.parent / "said"
    with started([*argv, "--out", str(out)], said, functools.partial(told, count)) as (_, wait):
        assert wait() == [143], said.read_text()
    assert len((out / "log.jsonl").read_text().splitlines()) == count
    assert "SIGTERM" in said.read_text() and "--resume" in said.read_text()
    return said


def full():
    """The disk is full after 9,000 bytes of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))


def test_a_stopped_run_survives_a_full_disk(argv, undisturbed, tmp_path):
    out, said = tmp_path / "o", stopped(argv, tmp_path / "o", 12)
    again, place = [*argv, "--out", str(out), "--resume"], out / "checkpoint.pt"
    kept = place.read_bytes()
    with started(again, said, full) as (_, wait):
        assert wait() == [1]
    assert f"{place}: cannot be written" in said.read_text().splitlines()[-1]
    assert place.read_bytes() == kept
    place.write_bytes(kept[:1000])
    with refused(f"{place} damaged delete"):
        t.main(again)
    place.write_bytes(kept)
    finish(again, said)
    lines = (out / "log.jsonl").read_text().splitlines()[:16]
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds)  # of the stage, those before it was stopped included
    assert same(left(out), undisturbed)


def test_a_run_goes_on_after_it_ran_out_of_memory(argv, undisturbed, tmp_path, monkeypatch, capsys):
    step, steps = torch.optim.AdamW.step, itertools.count(1)

    def fills(optimizer):
        if next(steps) == 33:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return step(optimizer)

    argv = [*argv, "--out", str(tmp_path / "o")]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", fills)
        with refused("memory --memory_budget --accumulate --batch 2 GiB"):
            t.main([*argv, "--save_minutes", "1e9"])
    capsys.readouterr()
    t.main([*argv, "--resume", "--save_minutes", "3", "--no-compile"])
    assert "checkpoint.pt: stage 2, all parameters, after step 0\n" in capsys.readouterr().out
    assert same(left(tmp_path / "o"), undisturbed)


def slow():
    """A step takes a minute."""
    torch.optim.AdamW.step = lambda _: time.sleep(60)


def test_a_second_run_is_refused_and_a_second_signal_ends_the_first_at_once(argv, tmp_path):
    out, said = tmp_path / "o", tmp_path / "said"
    with started([*argv, "--out", str(out)], said, slow) as ((worker,), wait):
        until([worker], (out / "log.jsonl").exists)
        with refused(f"{out} another run"):
            t.main([*argv, "--out", str(out)])
        os.kill(worker.pid, signal.SIGINT)
        until([worker], lambda: "second signal" in said.read_text())
        began = time.monotonic()
        os.kill(worker.pid, signal.SIGTERM)
        assert wait() != [0] and time.monotonic() - began < 30
    assert not (out / "checkpoint.pt").exists()


OTHERS = {
    "": "unfinished --resume",
    "--resume --clip 0.1 --stage2_lr 0.5": "--clip 1.0 0.1; --stage2_lr 0.5",
    "--resume --seed 1": "--seed 0 1",
    "--resume --batch 8": "--batch 4 8",
    "--resume --reverse": "--reverse",
    "--resume --mixer mamba --n_kv_heads 2": "--mixer",
    "--resume --recipe replace.json": "stage 1 replace",
    "--resume --recipe rate.json": "stage 1 lr",
    "--resume --data text.txt": "--data text.txt",
}


@pytest.fixture(scope="module")
def unfinished(argv, shelf, tmp_path_factory):
    """The command of a run that was stopped."""
    out = tmp_path_factory.mktemp("unfinished") / "o"
    argv = [*argv, "--init_from", str(shelf / "teacher"), "--save_minutes", "99"]
    stopped(argv, out, 5)
    chat = [str(shelf / "chat.jsonl")]
    rate = {"keep": 0.5, "lr": 1}, {"trains": "all", "data": chat}, {"loss": "dpo"}
    for name, stages in (("replace", [{"replace": [1]}]), ("rate", rate)):
        write_recipe(shelf, *stages).rename(shelf / f"{name}.json")
    return [*argv, "--out", str(out)]


@pytest.mark.parametrize("given", OTHERS)
def test_a_run_goes_on_with_its_own_settings_only(shelf, unfinished, monkeypatch, given):
    monkeypatch.chdir(shelf)
    with refused(OTHERS[given]):
        t.main([*unfinished, *given.split()])


CHANGED = [("chat.jsonl", "--data holds"), ("pairs.jsonl", "data stage 3 hold")]
CHANGED += [("teacher/*.pt", "--init_from holds")]


@pytest.mark.parametrize("files, words", CHANGED)
def test_changed_files_are_noticed(shelf, unfinished, files, words):
    """Texts by what they say, whatever their times; checkpoints by their times."""
    (path,) = shelf.glob(files)
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before.replace(b"it is", b"is it"))
    if path.suffix == ".jsonl":
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with refused(f"settings {words}"):
        t.main([*unfinished, "--resume"])
    path.write_bytes(before)


def test_resume_begins_a_new_run_and_leaves_a_finished_one(shelf, tmp_path, capsys):
    argv = SIZES + "--teacher_steps 2 --stage1_steps 2 --stage2_steps 1"
    go = functools.partial(train, tmp_path / "o", data=shelf / "text.txt")
    go(argv + " --resume")
    assert "no checkpoint" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*.*")}
    go(argv + " --resume")
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*.*")}
    with refused("results.json other settings"):
        go(argv + " --resume --stage2_steps 2")
    assert len(go(argv + " --stage2_steps 2").log) == 6
    assert "replaced" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Several processes


def joined(rank, port, patch):
    """Makes of this process one of two, as torchrun does."""
    place = dict(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    os.environ.update({k: str(v) for k, v in place.items()})
    torch.set_num_threads(1)
    patch(rank)


def two(patch=abs):
    """What makes of two processes those of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [functools.partial(joined, rank, port, patch) for rank in range(2)]


def watchful(rank):
    """Process 1 tokenises after 0 and answers late. A student goes before the next is sharded."""
    if rank:
        answer, load, share, students = t.Decoder.decode, t.load_corpus, t.shard, []
        t.Decoder.decode = lambda *args, **more: (time.sleep(0.2), answer(*args, **more))[1]

        def after(s, *rest):
            assert list((Path(s.out) / "data").glob("*")), "process 0 has not tokenised"
            return load(s, *rest)

        def sharded(run, student):
            assert not any(earlier() for earlier in students), "an earlier student is in memory"
            students.append(weakref.ref(student))
            share(run, student)
            assert all(hasattr(w, "device_mesh") == w.requires_grad for w in student.parameters())

        t.load_corpus, t.shard = after, sharded


def answers(out):
    """The teacher's answers by their files, whichever process made them."""
    return {path.name: path.read_text() for path in (out / "data").glob("*.answers/*.jsonl")}


@pytest.fixture(scope="module")
def alone(shelf, tmp_path_factory):
    """A short run of one process, and its flags. What is evaluated cannot be shared out evenly."""
    steps = "--stage1_steps 6 --stage2_steps 5 --stage3_steps 4 --stage3_lr 1e-4 "
    out = tmp_path_factory.mktemp("alone") / "o"
    few = (shelf / "pairs.jsonl").read_text().splitlines()[:29]
    (out.parent / "pairs.jsonl").write_text("\n".join(few))
    files = dict(data=shelf / "chat.jsonl", pairs=out.parent / "pairs.jsonl", device="cpu")
    argv = flags(SMALL + steps + LABELS, teacher=shelf / "teacher", **files)
    argv += flags("--batch 8 --eval_sequences 3")
    t.main([*argv, "--out", str(out)])
    return argv, out, left(out)


def assert_alike(one, other):
    """Two runs differ by rounding alone."""
    assert len(one.log) == len(other.log)
    for mine, theirs in zip([*one.log, *one.rows], [*other.log, *other.rows], strict=True):
        names = [k for k, v in theirs.items() if isinstance(v, float)]
        wanted = [theirs[k] for k in names]
        assert [mine[k] for k in names] == pytest.approx(wanted, rel=2e-3, abs=2e-4), (mine, theirs)
    weights = other.student.state_dict()
    for k, w in one.student.state_dict().items():
        assert_close(w, weights[k], 0.02, k)


def test_a_batch_in_parts_trains_as_one(alone, tmp_path):
    argv, _, want = alone
    t.main([*argv, "--out", str(tmp_path / "o"), "--accumulate", "2"])
    assert_alike(left(tmp_path / "o"), want)


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_two_processes_train_and_answer_as_one_and_speak_once(alone, tmp_path, accumulate):
    """The gradients of every step, in stages that train the mixers, everything, and preferences."""
    argv, out, want = alone
    argv = [*argv, "--out", str(tmp_path / "o"), "--accumulate", accumulate]
    finish(argv, tmp_path / "said", *two(watchful))
    said = (tmp_path / "said").read_text()
    assert answers(tmp_path / "o") == answers(out)
    assert_alike(left(tmp_path / "o"), want)
    assert said.count("chosen preferred") == 1 and "FSDP2-wrapped" not in said
    assert re.search(r"peak memory of process 0 \S+ GiB .* on 2 processes, \d+ CPU cores", said)


def hasty(count, sign, rank):
    """Process 1's clock runs a thousand times as fast, and it gets a signal in step `count`."""
    if rank:
        began, real = time.monotonic(), time.monotonic
        time.monotonic = lambda: began + 1000 * (real() - began)
        told(count, sign)


def test_two_processes_stop_together_and_go_on_to_the_end_of_one(shelf, tmp_path):
    """One is killed, then one is told to stop; and their clocks differ."""
    argv = SIZES + "--teacher_steps 200 --teacher_lr 1e-4 --stage1_steps 2 --stage2_steps 1"
    argv = flags(argv, data=shelf / "text.txt", device="cpu", n_layers=1, keep=0, save_minutes=0.5)
    t.main([*argv, "--out", str(tmp_path / "one")])
    out, said = tmp_path / "two", tmp_path / "said"
    argv = [*argv, "--out", str(out), "--resume"]
    with started(argv, said, *two(functools.partial(hasty, 3, signal.SIGKILL))) as (_, wait):
        assert wait() == [1, -signal.SIGKILL]
    assert "error: another process has ended" in said.read_text().splitlines()[-1]
    with started(argv, said, *two(functools.partial(hasty, 9, signal.SIGTERM))) as (_, wait):
        assert wait() == [143, 143], said.read_text()
    assert said.read_text().count("stopped by") == 1
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 10  # is logged
    finish(argv, said, *two())
    assert "goes on from" in said.read_text()
    assert_alike(left(out), left(tmp_path / "one"))


def test_when_one_of_two_processes_fails_the_run_ends_and_says_why(alone, tmp_path):
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
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    command = [sys.executable, *torchrun, str(script), *alone[0], "--out", str(tmp_path / "o")]
    command += ["--device", "cuda"] * (torch.cuda.device_count() > 1)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 1 and "error: the second process has had enough" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr  # as torch marks it


# The fourth process of a machine, the twelfth of all: flags, GPUs, what it asks torch for.
PLACES = [
    ("", 4, ["cuda:3", "nccl", "cuda:3"]),
    ("--device cpu", 4, ["cpu", "gloo", "None"]),
    ("", 0, ["", "gloo", "None"]),
    ("", 3, "process 3 no GPU 3 --nproc_per_node"),
    ("--device cuda:1", 4, "--device torchrun"),
]


@pytest.mark.parametrize("given, gpus, asks", PLACES)
def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch, given, gpus, asks):
    asked = []

    def meet(backend, timeout, device_id):
        asked.extend([backend, str(device_id)])
        assert timeout.total_seconds() > 3600  # in which process 0 may tokenise
        raise MilError("met")

    for name, value in dict(RANK=11, LOCAL_RANK=3, WORLD_SIZE=16).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        t, "pick_device", lambda name: asked.append(name) or torch.device(name or "cpu")
    )
    monkeypatch.setattr(dist, "init_process_group", meet)
    with pytest.raises(MilError) as e:
        t.main(given.split())
    if isinstance(asks, list):
        assert asked == asks and str(e.value) == "met"
    else:
        assert not asked and all(word in str(e.value) for word in asks.split())
