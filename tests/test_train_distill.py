"""train_distill.py: its losses, its data, what it refuses, and a run as a user starts it."""

import collections
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401 (a second, once and not in every process)
import torch.nn.functional as F
from conftest import DEVICE, assert_close, build, run_script
from hypothesis import given
from hypothesis import strategies as st

import generate as g
import mil
import train_distill as t
from mil import Config, MilError

BYTES = g.load_tokenizer("bytes")
END = BYTES.stops[0]
HALF = ["mamba2", "attention", "mamba2", "attention"]
RANKS = {bytes([i]): i for i in range(256)} | {b"ab": 256}
PAIRS = g.Tiktoken(r"(?s:..?)", RANKS, {"<|endoftext|>": 257})  # with a token of two bytes
SMALL = "--context 32 --batch 4 --eval_sequences 4 "
SIZES = SMALL + "--n_layers 4 --d 16 --n_heads 2 --n_kv_heads 1 --d_ff 24 "


def tiny(seed=0, kind=torch.float32, **changes):
    """A Llama over bytes."""
    sizes = dict(v=257, d=16, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=24, d_state=8, context=64)
    return build(Config(**sizes | changes), kind, seed)


def lines(*records):
    return "\n".join(map(json.dumps, records))


def talk(*said):
    """Messages of a user and an assistant in turn."""
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def pair(i):
    return {"prompt": f"{i} and 1?", "chosen": f"it is {i + 1}", "rejected": f"no, {i}"}


def fill(place):
    """Writes a text, conversations, pairs and a teacher, enough for a small run."""
    text = "".join(f"the {i} of {i * i} is {i % 7}\n" for i in range(400))
    said = [talk(f"{i} and {i % 7}?", f"it is {i + i % 7}") for i in range(80)]
    (place / "text.txt").write_text(text)
    (place / "chat.jsonl").write_text(lines(*({"messages": messages} for messages in said)))
    (place / "pairs.jsonl").write_text(lines(*map(pair, range(40))))
    mil.save(tiny().cpu(), place / "teacher", tokenizer="bytes")
    return place


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("shelf"))


def flags(text="", **more):
    """The words of a command line."""
    values = {k: v if isinstance(v, list) else [v] for k, v in more.items()}
    return [*text.split(), *(str(w) for k, v in values.items() for w in (f"--{k}", *v))]


def left(out):
    """What a run leaves, but for times and memory: its rows, its log, its models' weights."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = json.loads((out / "results.json").read_text())["rows"]
    for record in [*log, *rows]:
        for name in ("seconds", "memory", "tokens_per_second"):
            record.pop(name, None)
    models = {p.name: mil.load(p, "cpu") for p in (out / "student", out / "teacher") if p.exists()}
    return SimpleNamespace(rows=rows, log=log, **models)


def train(out, text="", **more):
    """A run in this process, on the CPU; what it leaves."""
    gc.freeze()  # a run collects garbage; what was there before need not be searched
    t.main(flags("--device cpu " + text, out=out, **more))
    gc.unfreeze()
    return left(out)


def taught(shelf, out, text="", **more):
    """A small run with the shelf's teacher and, unless told otherwise, its text."""
    return train(
        out, SMALL + text, **dict(teacher=shelf / "teacher", data=shelf / "text.txt") | more
    )


@contextlib.contextmanager
def refused(words):
    """Inside, a MilError is raised, of one line that has these words."""
    with pytest.raises(MilError) as e:
        yield
    assert "\n" not in str(e.value)
    for word in words.split():
        assert word in str(e.value)


def write_recipe(place, *stages):
    (place / "recipe.json").write_text(json.dumps(stages))
    return place / "recipe.json"


# --------------------------------------------------------------------------------------------------
# A run as a user starts it


@pytest.fixture(scope="module")
def job(shelf, tmp_path_factory):
    """A run from nothing through every stage, on the sources of Python's library."""
    out = tmp_path_factory.mktemp("job") / "out"
    steps = "--teacher_steps 60 --stage1_steps 20 --stage2_steps 10 --stage3_steps 4 "
    more = "--d 32 --pseudo_labels --answers 80 --answer_tokens 16 "
    argv = flags(SIZES + steps + more, out=out, pairs=shelf / "pairs.jsonl", device=DEVICE)
    done = run_script("train_distill.py", *argv)
    assert done.returncode == 0, done.stderr
    return out, argv, done.stdout


STAGES = [
    "stage 1.1, 1 of 4 layers replaced",
    "stage 1.2, 2 of 4 layers replaced",
    "stage 2, all parameters",
    "stage 3, preferences",
]


def test_a_run_announces_its_stages_learns_and_writes_what_it_learned(job):
    out, _, printed = job
    done = left(out)
    assert [row["model"] for row in done.rows] == ["teacher", "student, not trained", *STAGES]
    announced = printed[: printed.index("data: ")].splitlines()[1:]
    assert [line[:38].strip() for line in announced] == ["teacher", *STAGES]
    assert [line[38:].split()[0] for line in announced] == ["4", "3", "2", "2", "2"]
    teacher, untrained, *_, second, last = done.rows
    assert teacher["loss"] < math.log(257) - 1 and second["kl"] < untrained["kl"]
    assert {"preferred", "preferred_error", "margin"} <= last.keys() - second.keys()
    for row in done.rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert f"{row['loss']:.4f}" in printed
    assert done.student.config.mixers == HALF
    assert not (out / "checkpoints").exists()


def test_the_log_has_every_step_of_a_short_stage_and_the_parts_of_its_loss(job):
    log = left(job[0]).log
    steps = {stage: [r["step"] for r in log if r["stage"] == stage] for stage in STAGES}
    assert list(steps.values()) == [[*range(1, n + 1)] for n in (10, 10, 10, 4)]
    for record in log:
        assert record["gradient"] > 0
        if "kl" in record:
            assert record["loss"] == pytest.approx(record["ce"] + record["kl"], rel=1e-5)


def test_the_report_has_a_text_of_both_models_the_peak_memory_and_a_command_to_try(job):
    """And into a file progress comes every half a minute, not every step."""
    out, _, printed = job
    results = json.loads((out / "results.json").read_text())
    assert printed.count("ETA") <= 6 + results["seconds"] / 30
    peak = results["peak_memory_bytes"]
    assert (2**27 if DEVICE == "cpu" else 2**20) < peak < 2**36
    assert f"peak memory {peak / 2**30:.2f} GiB" in printed
    assert "--- teacher\ndef " in printed and "--- student\ndef " in printed
    assert f"try: python generate.py --model {out}/student --prompt" in printed


@pytest.fixture(scope="module")
def small(shelf, tmp_path_factory):
    """A run of the smallest size that makes its own teacher."""
    out = tmp_path_factory.mktemp("small") / "o"
    steps = "--teacher_steps 2 --stage1_steps 2 --stage2_steps 1 --student_layers 0,3"
    train(out, SIZES + steps, data=shelf / "text.txt")
    return out


def test_a_small_students_teacher_has_all_layers_where_the_run_makes_both(small):
    assert (left(small).teacher.config.n_layers, left(small).student.config.n_layers) == (4, 2)


@pytest.mark.parametrize("keep, mixers", [(1, ["attention"] * 2), (0, ["mamba2"] * 2)])
def test_a_draft_of_some_layers_learns_and_proposes(shelf, tmp_path, capsys, keep, mixers):
    teacher, draft = shelf / "teacher", tmp_path / "o" / "student"
    argv = "--student_layers 0,3 --stage1_steps 6 --stage2_steps 4"
    done = taught(shelf, tmp_path / "o", argv, keep=keep)
    assert done.student.config.mixers == mixers and done.log[-1]["step"] == 10
    assert [row["model"] for row in done.rows][1:] == ["student, not trained", STAGES[2]]
    assert done.rows[2]["loss"] < done.rows[1]["loss"]
    assert f"--model {teacher} --draft {draft} --prompt" in capsys.readouterr().out
    texts = []
    for more in ({}, dict(draft=draft, speculate=3)):
        argv = "--temperature 0 --max_new_tokens 20 --device cpu --prompt x"
        g.main(flags(argv, model=teacher, **more))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_larger_teacher_teaches_another_llama_and_stays_as_it_was(shelf, tmp_path, capsys):
    mil.save(tiny(d=32, n_layers=3).cpu(), tmp_path / "big", tokenizer="bytes")
    before = {p: p.read_bytes() for p in (tmp_path / "big").iterdir()}
    argv = "--stage1_steps 3 --stage2_steps 2 --prompt " + "x" * 80  # longer than the context
    more = dict(teacher=tmp_path / "big", init_from=shelf / "teacher")
    done = taught(shelf, tmp_path / "o", argv, **more)
    assert done.student.config.d == 16 and done.student.config.mixers == HALF
    assert {p: p.read_bytes() for p in (tmp_path / "big").iterdir()} == before
    assert not (tmp_path / "o" / "teacher").exists()
    assert capsys.readouterr().out.count("\n" + "x" * 80) == 2


def test_a_student_of_a_teacher_from_elsewhere_keeps_its_tokenizer(tmp_path, capsys):
    pytest.importorskip("transformers")
    from test_tokenizers import FILES

    tokenizer = FILES["smollm2"]
    v = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    teacher = tiny(v=v, n_layers=2, tied=True).bfloat16().cpu()
    mil.save(teacher, tmp_path / "ours", tokenizer="tokenizer.json")
    mil.export(tmp_path / "ours", tmp_path / "theirs", "hf")
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = ({"messages": talk(f"the {i}?", f"then {i}")} for i in range(90))
    (tmp_path / "a.jsonl").write_text(lines(*said))
    argv = SMALL + "--stage1_steps 2 --stage2_steps 0"
    done = train(tmp_path / "o", argv, teacher=tmp_path / "theirs", data=tmp_path / "a.jsonl")
    printed = capsys.readouterr().out
    assert "of them learned" in printed and "--chat" in printed
    encoding = g.load_tokenizer(str(tmp_path / "o" / "student"))
    assert encoding.template == g.load_tokenizer(str(tmp_path / "theirs")).template
    assert torch.equal(done.student.embed_tokens.weight, teacher.embed_tokens.weight.float())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_in_bfloat16_a_student_is_as_wide_as_its_teachers_file(shelf, tmp_path, monkeypatch, kind):
    computed, hidden = set(), mil.Hybrid.hidden

    def watched(*args, **more):
        found = hidden(*args, **more)
        computed.add(found.dtype)
        return found

    monkeypatch.setattr(mil.Hybrid, "hidden", watched)
    mil.save(tiny().to(kind).cpu(), tmp_path / "teacher", tokenizer="bytes")
    argv = "--stage1_steps 2 --stage2_steps 1 --dtype bfloat16"
    done = taught(shelf, tmp_path / "o", argv, teacher=tmp_path / "teacher")
    assert computed == {torch.bfloat16}
    weights = [w for k, w in done.student.named_parameters() if mil.saved_type(k, kind) == kind]
    assert {w.dtype for w in weights} == {kind}
    rounded = all(torch.equal(w, w.bfloat16().float()) for w in weights)
    assert rounded == (kind == torch.bfloat16)  # computing in bfloat16 rounds no float32 weight


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_student(shelf, tmp_path):
    stages = {"keep": 0.75, "steps": 2}, {"trains": "all", "steps": 9, "lr": 1e30, "warmup": 0}
    with refused(f"at step 2 of 9 {tmp_path}/o/student"):
        taught(shelf, tmp_path / "o", recipe=write_recipe(tmp_path, *stages))
    student = mil.load(tmp_path / "o" / "student", "cpu")
    assert student.config.mixers == ["mamba2", *["attention"] * 3]
    assert all(w.isfinite().all() for w in student.parameters())


def test_a_run_compiles_each_kind_of_layer_a_few_times(shelf, tmp_path, monkeypatch):
    """Traced by torch.compile and run eagerly, on the CPU, with the scan as one operator. What
    fills up a batch, so that all have one size, changes nothing."""
    steps = "--teacher_steps 2 --stage1_steps 4 --stage2_steps 2 --stage3_steps 5"
    files = dict(data=shelf / "chat.jsonl", pairs=shelf / "pairs.jsonl", eval_sequences=3)
    plain = train(tmp_path / "plain", SIZES + steps, **files).rows
    graphs = collections.Counter()

    def backend(graph, inputs):
        kind = "attention" if "scaled_dot_product_attention" in graph.code else "mamba2"
        graphs[kind, torch.is_grad_enabled()] += 1
        return graph.forward

    how = dict(backend=backend, fullgraph=True)  # a break in the graph is an error
    monkeypatch.setattr(mil.Block, "compile", lambda layer: torch.nn.Module.compile(layer, **how))
    monkeypatch.setattr(t.Run, "compiled", True)
    torch._dynamo.allow_in_graph(mil.ssm_scan)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        rows = train(tmp_path / "o", SIZES + steps, **files).rows
    for row, wanted in zip(rows, plain, strict=True):
        assert row.pop("model") == wanted.pop("model")
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-5, nan_ok=False)
    kinds = itertools.product(("attention", "mamba2"), (False, True))
    assert set(graphs) == {*kinds} and max(graphs.values()) <= 4, graphs


SPINS = [
    ({}, False, "300"),
    ({}, True, "None"),
    ({"GOMP_SPINCOUNT": "7"}, False, "7"),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, False, "None"),
]


@pytest.mark.parametrize("given, gpu, spins", SPINS)
def test_on_a_cpu_threads_spin_for_a_short_time_unless_the_user_says_how_long(given, gpu, spins):
    """What OpenMP finds in the environment when torch is imported."""
    script = f"""import os, sys
os.path.exists = lambda path, e=os.path.exists: {gpu} if path == '/dev/nvidia0' else e(path)
sys.modules['torch'] = None
try:
    import train_distill
except ImportError:
    print(os.environ.get('GOMP_SPINCOUNT'))
"""
    free = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    how = dict(env=free | given, cwd=Path(t.__file__).parent, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", script], **how)
    assert done.stdout.strip() == spins, done.stderr


# --------------------------------------------------------------------------------------------------
# Losses


def plain_loss(logits, wanted, targets, alpha=1.0, beta=1.0, tau=1.0, reverse=False):
    """CE and KL of each token as the formulas have them, and Σ alpha CE + beta KL."""
    learned = targets >= 0
    ce = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    kl = torch.zeros_like(ce)
    if wanted is not None:
        left, right = (wanted / tau).log_softmax(-1), (logits / tau).log_softmax(-1)
        left, right = (right, left) if reverse else (left, right)
        kl = tau**2 * (left.exp() * (left - right)).sum(-1) * learned
    return ce, kl, (alpha * ce + beta * kl).sum()


def some_logits(n, v, seed, dtype=torch.float32):
    """Logits, the teacher's, targets of which some are not learned, and weights."""
    gen = torch.Generator().manual_seed(seed)
    logits, wanted = (3 * torch.randn(2, n, v, generator=gen)).to(DEVICE, dtype)
    unlearned = torch.rand(n, generator=gen) < 0.3
    targets = torch.randint(v, (n,), generator=gen).masked_fill(unlearned, -100)
    return logits, wanted, targets.to(DEVICE), *torch.rand(2, n, generator=gen).to(DEVICE)


@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 257, 1025]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_losses_and_gradients_are_autograds(n, v, tau, reverse, teacher, dtype, seed):
    logits, wanted, targets, alpha, beta = some_logits(n, v, seed, dtype)
    wanted = wanted if teacher else None
    leaf, theirs = logits.double().requires_grad_(), wanted.double() if teacher else None
    *want, total = plain_loss(leaf, theirs, targets, alpha, beta, tau, reverse)
    *looked, nothing = t.token_losses(logits, wanted, targets, alpha, beta, tau, reverse)
    *got, d = t.token_losses(logits, wanted, targets, alpha, beta, tau, reverse, gradient=True)
    assert nothing is None and d.dtype == dtype
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    for a, again, exactly in zip(got, looked, want, strict=True):
        assert a.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(a, exactly, exact, noise=exact)
        assert_close(again, exactly, exact, noise=exact)
    rounding = 2**-8 * 1.01 if dtype == torch.bfloat16 else exact
    assert_close(d, torch.autograd.grad(total, leaf)[0], rounding, noise=exact / 10)
    for result in (*got, d):
        assert not result[targets < 0].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_without_probability_add_nothing_on_the_left_and_infinity_on_the_right(reverse):
    """As where one vocabulary is smaller. What is not learned is not looked at."""
    logits, wanted, _, alpha, beta = some_logits(3, 300, 1)
    targets = torch.tensor([100, -100, 299], device=DEVICE)

    def losses(ours, theirs, first=0):
        x, w = logits.clone(), wanted.clone()
        x[:, :ours], w[:, :theirs], x[1] = -torch.inf, -torch.inf, torch.nan
        x, w, y = x[:, first:], w[:, first:], targets - first
        return t.token_losses(x, w, y, alpha, beta, reverse=reverse, gradient=True)

    for got, smaller in zip(losses(90, 90), losses(90, 90, first=90), strict=True):
        assert_close(got[..., -210:], smaller, 1e-5)
    _, kl, dx = losses(90 * reverse, 90 * (not reverse))
    p, q = wanted.double().softmax(-1)[::2], logits.double().softmax(-1)[::2]
    left, right = (q, p) if reverse else (p, q)
    left = left[:, 90:] / left[:, 90:].sum(-1, keepdim=True)
    assert_close(kl[::2], (left * (left / right[:, 90:]).log()).sum(-1), 1e-5)
    assert dx.isfinite().all() and not dx[1].any() and not kl[1]
    assert losses(90 * (not reverse), 90 * reverse)[1].tolist() == [torch.inf, 0, torch.inf]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_that_agrees_has_no_divergence_and_large_logits_no_infinity(reverse):
    logits, _, targets, _, one = some_logits(4, 1000, 2)
    how = dict(reverse=reverse, gradient=True)
    ce, kl, dx = t.token_losses(300 * logits, 300 * logits, targets, 0 * one, one, **how)
    assert not kl.any() and not dx.any() and ce.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learns_head, tau, reverse", [(True, 1.0, False), (False, 2.0, True)])
def test_a_loss_in_parts_is_that_of_the_whole(monkeypatch, dtype, learns_head, tau, reverse):
    """Of a float32 head under bfloat16, the gradient is added up in float32."""
    n, v, gen = 70, 2**16 if DEVICE == "cpu" else 2**22, torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    hidden, theirs = (0.5 * torch.randn(n, k, generator=gen).to(DEVICE, dtype) for k in (6, 9))
    head, their_head = (torch.randn(v, k, generator=gen).to(DEVICE, wide) for k in (6, 9))
    _, _, targets, *weights = some_logits(n, v // 2**8, 3)
    weights = [w.to(wide) for w in weights]
    leaves = [hidden.requires_grad_(), head.requires_grad_()][: 1 + learns_head]
    head.requires_grad_(learns_head)
    seen, honest = [], t.token_losses

    def watched(logits, *rest):
        seen.append(logits.numel())
        return honest(logits, *rest)

    monkeypatch.setattr(t, "token_losses", watched)
    arguments = hidden, head, theirs, their_head, targets, *weights, tau, reverse
    loss, ce, kl = t.DistillationLoss.apply(*arguments)
    assert sum(seen) == n * v and max(seen) < n * v
    exact = [x.detach().to(dtype).to(wide).requires_grad_() for x in (hidden, head)]
    logits, wanted = exact[0] @ exact[1].T, theirs.to(wide) @ their_head.to(dtype).to(wide).T
    *want, total = plain_loss(logits, wanted, targets, *weights, tau, reverse)
    close = 1e-9 if dtype == torch.float64 else 3e-2
    for got, whole in zip((loss, ce, kl), (total, *want), strict=True):
        assert_close(got, whole, close)
    got = torch.autograd.grad(3 * loss, leaves)
    whole = torch.autograd.grad(3 * total, exact[: 1 + learns_head])
    for a, b in zip(got, whole, strict=True):
        assert_close(a, b, close, noise=1e-5 if dtype == torch.bfloat16 else 0)
    if learns_head and dtype == torch.bfloat16:
        assert (got[1] != got[1].bfloat16()).float().mean() > 0.5


def batch_of(x, y, pos=None):
    """The Batch of tokens x and targets y (b, l), whose documents begin where pos is 0."""
    at = (y.flatten() >= 0).nonzero()[:, 0].to(DEVICE)
    docs = None if pos is None else mil.Documents(pos, torch.device(DEVICE))
    return t.Batch(x.to(DEVICE), y.to(DEVICE), at, docs)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_row_has_the_loss_and_the_gradients_of_each_document_alone(reverse):
    """Equation 2, from the tokens of a file to the gradients, through every mixer."""
    sizes = dict(v=31, d=8, n_heads=2, n_kv_heads=1, d_ff=12, d_state=2, n_layers=3)
    teacher = build(Config(**sizes))
    student = build(Config(**sizes, mixers=["mamba", "attention", "mamba2"]), seed=1)
    tokens, cuts = np.random.default_rng(0).integers(0, 31, 13), (0, 5, 6, 13)
    tokens[8:10] = ~tokens[8:10]  # read, not learned
    x, y, pos = t.windows(tokens, np.array(cuts[:-1]), [0], 12)
    stage = t.Stage(alpha=0.3, beta=0.7, temperature=2.0, reverse=reverse)
    models = t.Models(teacher, student)
    loss, (ce, kl) = t.distill(models, batch_of(x, y, pos), stage, 1 / 8)
    found, want = torch.autograd.grad(loss, list(student.parameters())), []
    for a, b in ((0, 5), (5, 6), (6, 13)):
        ids = torch.from_numpy(tokens[a:b]).to(DEVICE)
        if b - a > 1:
            targets = ids[1:].masked_fill(ids[1:] < 0, -100)
            ids = torch.where(ids < 0, ~ids, ids)[None, :-1]
            logits = student(ids)[0], teacher(ids)[0].detach()
            want.append(plain_loss(*logits, targets, 0.3, 0.7, 2.0, reverse))
    weights = list(student.parameters())
    want_ce, want_kl, total = (sum(x.sum() for x in part) / 8 for part in zip(*want, strict=True))
    for got, exact in zip((loss, ce, kl), (total, want_ce, want_kl), strict=True):
        assert_close(got, exact, 1e-6)
    for got, exact in zip(found, torch.autograd.grad(total, weights), strict=True):
        assert_close(got, exact, 1e-5)


def log_probability(model, ids):
    """Of what is learned of ids (below 0: only read)."""
    whole = [min(i, 256) if i >= 0 else ~i for i in ids]
    p = model(torch.tensor([whole[:-1]]).to(model.lm_head.weight.device))[0].log_softmax(-1)
    return sum(p[i, whole[i + 1]] for i in range(len(ids) - 1) if ids[i + 1] >= 0)


@pytest.mark.parametrize("seed, beta", [(0, 0.1), (1, 2.0), (2, 0.5)])
def test_the_preference_loss_equals_equation_4_and_so_do_its_gradients(seed, beta):
    rng, sizes = np.random.default_rng(seed), dict(v=19, d=8, n_heads=2, n_kv_heads=1, d_ff=12)
    teacher = build(Config(**sizes, n_layers=2, d_state=2), seed=1)
    student = build(dataclasses.replace(teacher.config, mixers=HALF[:2]), seed=2)
    answers = rng.integers(0, 19, (4, 5)).tolist()  # two chosen, two rejected, of two prompts
    rows = [[~3, ~(i % 2), *answer[: 1 + i]] for i, answer in enumerate(answers)]
    block = torch.tensor([[*row, *[-1] * (6 - len(row))] for row in rows])
    x, y = torch.where(block < 0, ~block, block), block.masked_fill(block < 0, -100)
    batch, stage = batch_of(x[:, :-1], y[:, 1:]), t.Stage(loss="dpo", beta=beta)
    loss, more = t.dpo(t.Models(teacher, student), batch, stage, 0.5)
    gains = [log_probability(student, row) - log_probability(teacher, row) for row in rows]
    margins = [beta * (gains[i] - gains[i + 2]) for i in range(2)]
    plain = sum(-F.logsigmoid(margin) for margin in margins) / 2
    assert_close(loss, plain, 1e-5)
    chosen, margin = sum(m.item() > 0 for m in margins) / 2, sum(m.item() for m in margins) / 2
    assert more.tolist() == pytest.approx([chosen, margin], rel=1e-4)
    found = (torch.autograd.grad(value, list(student.parameters())) for value in (loss, plain))
    for got, exact in zip(*found, strict=True):
        assert_close(got, exact, 1e-4, noise=1e-9)


RANDOM = ["".join(map(chr, row)) for row in np.random.default_rng(0).integers(32, 127, (10, 64))]
EVALUATED = {
    "text": (BYTES, [{"text": text} for text in RANDOM]),
    "completions": (BYTES, [{"prompt": text[:40], "completion": text[40:]} for text in RANDOM]),
    "tokens of two bytes": (PAIRS, [{"text": "ab" * 64}] * 10),
}


@pytest.mark.parametrize("content", EVALUATED)
def test_an_evaluation_is_that_of_the_validation_text_by_hand(tmp_path, content):
    """Also of a loss whose perplexity no float holds."""
    encoding, records = EVALUATED[content]
    (tmp_path / "a.jsonl").write_text(lines(*records))
    s = t.Settings(out=str(tmp_path / "o"), context=16, batch=1, eval_sequences=99)
    corpus = t.load_corpus(s, [tmp_path / "a.jsonl"], encoding, "x")
    ids = torch.from_numpy(corpus.val.astype(np.int64)).to(DEVICE)  # exactly four windows
    x, y = torch.where(ids < 0, ~ids, ids)[:-1].view(4, 16), ids[1:]
    teacher, student, run = tiny(2, v=258), tiny(1, v=258), t.Run(s, torch.device(DEVICE))
    for scale in (1, 1e5):
        with torch.no_grad():
            student.lm_head.weight.mul_(scale)
            logits = [model(x).flatten(0, 1)[y >= 0].double() for model in (student, teacher)]
        first, got = t.evaluate(run, t.Models(teacher, student), corpus, encoding)
        ce, kl, _ = plain_loss(*logits, y[y >= 0])
        own, _, _ = plain_loss(logits[1], None, y[y >= 0])
        agree = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
        want = {"loss": ce.mean().item(), "kl": kl.mean().item(), "agreement": agree.item()}
        size = sum(len(encoding.bytes_of(token)) for token in y[y >= 0].tolist())
        want["bits_per_byte"] = ce.sum().item() / math.log(2) / size
        assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-4)
        assert (first["kl"], first["agreement"]) == (0, 1)
        assert first["loss"] == pytest.approx(own.mean().item(), rel=1e-4)
        assert math.isfinite(got["perplexity"]) and (scale == 1 or got["loss"] > 800)


# --------------------------------------------------------------------------------------------------
# Data


def shown(ids):
    """The text of ids, of which [what is learned] stands in brackets; . ends a document."""
    text = ""
    for learned, part in itertools.groupby(ids, key=lambda i: i >= 0):
        said = "".join("." if i == END else chr(i) for i in (i if i >= 0 else ~i for i in part))
        text += f"[{said}]" if learned else said
    return text


def documents(part, begins):
    return [shown(ids.tolist()) for ids in np.split(part, begins[1:])]


TURN, PARTS = "user:\nu\nassistant:\n[v.]\n", [{"type": "text", "text": part} for part in ("", "u")]
TURNS = [{"role": "system", "content": "s"}, *talk("u", "v", "w", "x")]
IN_PARTS = [{"role": "user", "content": PARTS}, TURNS[2]]
TWO = lines({"text": "one"}, {"prompt": "p ", "completion": "cd"})
DOCUMENTS = [
    ("a.txt", "plain", ["[plain.]"]),
    ("a.jsonl", TWO, ["[one.]", "p [cd.]"]),
    ("a.JSONL", TWO.replace("\n", "\n\n"), ["[one.]", "p [cd.]"]),
    ("a.ndjson", TWO, ["[one.]", "p [cd.]"]),
    ("a.json", TWO, ["[one.]", "p [cd.]"]),
    ("a.Json", f"[{TWO}]".replace("\n", ","), ["[one.]", "p [cd.]"]),
    ("a.json", '{\n "a": 1\n}', ['[{\n "a": 1\n}.]']),  # JSON of another kind is text
    ("a.jsonl", '\ufeff{"text": "a\u00a0b\x85c"}', ["[aÂ\xa0bÂ\x85c.]"]),
    ("a.jsonl", lines({"messages": TURNS}), [f"system:\ns\n{TURN}user:\nw\nassistant:\n[x.]\n"]),
    ("a.jsonl", lines({"text": "t", "messages": IN_PARTS}), [TURN]),
]


@pytest.mark.parametrize("name, content, wanted", DOCUMENTS)
def test_files_are_documents_of_which_every_twentieth_is_held_out(tmp_path, name, content, wanted):
    for i in range(20):
        (tmp_path / "d" / f"{i:02}").mkdir(parents=True)
        (tmp_path / "d" / f"{i:02}" / name).write_text(content, encoding="utf-8")
    s = t.Settings(out=str(tmp_path / "o"), batch=1, context=2)
    corpus = t.load_corpus(s, [tmp_path / "d"], BYTES, "bytes")
    whole = wanted * 20
    assert documents(corpus.val, corpus.begins[1]) == whole[9::20]
    del whole[9::20]
    assert documents(corpus.train, corpus.begins[0]) == whole


def test_the_last_tenth_of_a_single_document_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(32 + i % 90) for i in range(999)))
    s = t.Settings(out=str(tmp_path / "o"), batch=1, context=2)
    corpus = t.load_corpus(s, [tmp_path / "a.txt"], BYTES, "bytes")
    assert [*corpus.train, *corpus.val] == [*(tmp_path / "a.txt").read_bytes(), END]
    assert len(corpus.train) == 900


def test_a_folder_is_read_without_hidden_binary_and_own_files(tmp_path, monkeypatch):
    folder = tmp_path / ".cache" / "notes"  # a hidden folder that the user names is read
    for name, data in {
        "a.py": b"text" * 5,
        "deep/b.md": b"more" * 5,
        ".hidden/c.py": b"no",
        "deep/.d": b"no",
        "e.bin": b"\xff\xfe\x00",
        "f.dat": b"a\0b\0",
        "out/log.txt": b"no",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (tmp_path / "again").symlink_to(folder)
    monkeypatch.chdir(folder)
    s = t.Settings(out="out", batch=1, context=2)
    for path in (".", "../notes", tmp_path / "again"):
        corpus = t.load_corpus(s, [path], BYTES, "bytes")
        parts = map(documents, (corpus.train, corpus.val), corpus.begins)  # nine tenths, one tenth
        texts = ["".join(text) for text in zip(*parts, strict=True)]
        assert sorted(texts) == ["[moremoremoremoremo][re.]", "[texttexttexttextte][xt.]"]


@pytest.mark.parametrize("last", [2**15 - 1, 2**15, 100_000])
def test_tokens_at_the_limits_of_16_bits_are_stored_whole_and_as_not_to_be_learned(tmp_path, last):
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "a\n" * 300, "completion": "b" * 300}))
    ranks = {bytes([i]): i if i != 10 else last - 1 for i in range(256)}
    encoding = g.Tiktoken(r"(?s:.)", ranks, {"<|endoftext|>": last})
    s = t.Settings(out=str(tmp_path / "o"), batch=1, context=16)
    corpus = t.load_corpus(s, [tmp_path / "a.jsonl"], encoding, "large")
    assert corpus.val[-1] == last and corpus.train[1] == ~(last - 1)


def test_another_tokenizer_chat_template_or_content_is_another_corpus(tmp_path):
    """Of a file with the same name, size and time."""
    path, s = tmp_path / "a.jsonl", t.Settings(out=str(tmp_path / "o"), batch=1, context=16)
    other = copy.copy(BYTES)
    other.template = "llama3"
    found = []
    for encoding, text in ((BYTES, "hello"), (other, "hello"), (PAIRS, "hello"), (BYTES, "jello")):
        path.write_text(lines({"messages": talk("ab", text) * 30}))
        os.utime(path, (1, 1))
        found.append(t.load_corpus(s, [path], encoding, "x").train.tolist())
    assert len({tuple(ids) for ids in found}) == 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.data())
def test_a_window_knows_its_targets_and_the_place_of_each_token_in_its_document(lengths, l, data):
    tokens = np.arange(sum(lengths) + l)
    tokens = np.where(tokens % 5 == 3, ~tokens, tokens)
    begins = np.cumsum([0, *lengths])
    starts = data.draw(st.lists(st.integers(0, sum(lengths) - 1), min_size=1, max_size=3))
    x, y, pos = t.windows(tokens, begins, starts, l)
    for row, start in enumerate(starts):
        for i, at in enumerate(range(start, start + l)):
            begin = max(b for b in begins if b <= at)
            assert x[row, i] == at and pos[row, i] == at - max(begin, start)
            assert y[row, i] == (-100 if tokens[at + 1] < 0 or at + 1 in begins else at + 1)


# --------------------------------------------------------------------------------------------------
# Refusals


BAD = {  # files of which none can be used
    "cut.jsonl": '{"text": "a"}\n{"text": \n',
    "keys.jsonl": '{"text": "a"}\n\n{"body": "b"}\n',
    "list.jsonl": "[1]\n",
    "nothing.jsonl": '{"messages": []}',
    "role.jsonl": '{"messages": [{"role": "gpt", "content": "y"}]}',
    "unlearned.jsonl": lines(*[{"messages": talk("x" * 99)}] * 40),
    "empty.txt": "",
    "short.txt": "short",
    "other.json": '[{"a": 1}]',
    "latin.txt": b"\xff\xfe",
    "notes/out/log.txt": "text",
    "half.jsonl": '{"prompt": "a", "chosen": "b", "rejected": 3}',
    "apart.jsonl": lines({"chosen": talk("a", "b"), "rejected": talk("c", "d")}),
    "asks.jsonl": lines({"prompt": "a", "chosen": talk("a"), "rejected": talk("a")}),
    "one.jsonl": lines(*[pair(1)] * 3),
    "recipe.json": '[{"keep": 0.5, "data": ["nowhere"]}]',
    "taste.json": '[{"loss": "dpo", "data": ["nowhere"]}]',
    "broken.json": "{",
}
REFUSED = [
    line.rsplit(" -> ", 1)
    for line in """
--stage1_step 3 -> unrecognized --stage1_step
--batch x -> invalid int
--batch=-2 -> --batch
--batch 6 --accumulate 4 -> --batch multiple of 4
--batch 7 --pairs pairs.jsonl -> --batch multiple of 2
--keep 1.5 -> keep
--keep 1 -> keep none
--mixer rwkv -> --mixer mamba2
--mixer mamba -> d_state
--clip 0 -> --clip
--seed=-1 -> --seed
--prompt= -> --prompt
--out= -> --out
--out text.txt/o -> text.txt/o cannot
--d 18 -> --d multiple
--n_kv_heads 3 -> divisible
--stage1_steps 1 -> --stage1_steps 2
--stage3_steps 3 -> --stage3_steps --pairs
--answers 3 -> --answers --pseudo_labels
--answer_tokens 32 -> --answer_tokens
--context 1 -> --context
--memory_budget 0.5 -> --memory_budget GPU
--alpha 0 --beta 0 -> nothing learned
--warmup 2 -> --warmup
--teacher_lr=-1 -> --teacher_lr
--stage1_lr nan -> --stage1_lr
--dtype float8 -> --dtype bfloat16
--device abacus -> --device abacus
--tokenizer nonsense -> nonsense tokenizer
--student_layers 0,4 -> --student_layers 0 to 3
--student_layers 2,1 -> --student_layers rising
--student_layers 0 --init_from teacher -> --student_layers --init_from
--student_layers 0 --recipe recipe.json -> --student_layers --recipe
--teacher nowhere -> nowhere checkpoint
--teacher teacher --d 32 -> --d 16
--teacher teacher --context 128 -> --context 64
--teacher hybrid -> hybrid attention
--teacher teacher --tokenizer gpt2 -> gpt2 tokenizer
--teacher teacher --init_from nowhere -> nowhere checkpoint
--teacher teacher --init_from other -> other 300 257
--teacher teacher --init_from hybrid -> hybrid attention
--teacher teacher --init_from short -> short context
--recipe nowhere -> --recipe nowhere
--recipe recipe.json --keep 0.3 -> --keep
--recipe recipe.json -> --recipe nowhere no such file
--recipe taste.json -> --recipe nowhere no such file
--recipe broken.json -> broken.json JSON
--data nowhere -> --data nowhere no such file
--data cut.jsonl -> --data cut.jsonl line 2 JSON
--data keys.jsonl -> --data keys.jsonl line 3 body
--data list.jsonl -> --data list.jsonl line 1 list
--data nothing.jsonl -> --data nothing.jsonl line 1 messages
--data role.jsonl -> --data role.jsonl line 1 'gpt' assistant
--data unlearned.jsonl -> --data nothing to learn
--data other.json -> other.json record 1 has a expected text
--data empty.txt -> --data empty.txt no text
--data short.txt -> --data --context
--data latin.txt -> --data latin.txt UTF-8
--data notes --out notes -> --data notes no files
--pairs nowhere -> --pairs nowhere no such file
--pairs cut.jsonl -> --pairs cut.jsonl line 1
--pairs half.jsonl -> --pairs half.jsonl line 1 int
--pairs apart.jsonl -> --pairs apart.jsonl line 1 two answers
--pairs asks.jsonl -> --pairs asks.jsonl line 1 two answers
--pairs one.jsonl -> --pairs 10
""".strip().splitlines()
]


@pytest.fixture(scope="module")
def junk(tmp_path_factory):
    place = fill(tmp_path_factory.mktemp("junk"))
    for name, content in BAD.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    hybrid = mil.replace_attention(tiny(), [0])
    others = {"hybrid": hybrid, "other": tiny(v=300), "short": tiny(context=16)}
    for name, model in others.items():
        mil.save(model.cpu(), place / name, tokenizer="bytes")
    return place


@pytest.mark.parametrize("given, words", REFUSED, ids=[given for given, _ in REFUSED])
def test_bad_input_is_refused_in_one_line(junk, given, words, monkeypatch, tmp_path):
    monkeypatch.chdir(junk)
    monkeypatch.setattr(torch.optim, "AdamW", None)  # training would be another error
    first = f"--out {tmp_path}/o --device cpu "
    first += "" if "--teacher " in given else SIZES
    first += "" if "--data " in given else "--data text.txt "
    with refused(words):
        t.main(flags(first + given))


def test_a_command_that_is_refused_says_so_on_stderr_and_fails(tmp_path):
    done = run_script("train_distill.py", "--out", tmp_path, "--keep", "1.5")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: --keep") and done.stderr.count("\n") == 1
