"""The main job at a tiny size, its parts, and what it says to bad input."""

import collections
import copy
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, build, run_script
from hypothesis import given
from hypothesis import strategies as st
from test_generate import llama3_file
from test_tokenizers import FILES, beside

import generate as g
import mil
import train_distill as t
from mil import Config, MilError

TINY = [
    "--n_layers",
    "4",
    "--d",
    "32",
    "--n_heads",
    "4",
    "--n_kv_heads",
    "2",
    "--d_ff",
    "64",
    "--context",
    "64",
    "--batch",
    "8",
    "--teacher_steps",
    "60",
    "--stage1_steps",
    "20",
    "--stage2_steps",
    "10",
    "--eval_sequences",
    "16",
    "--device",
    DEVICE,
    "--dtype",
    "float32",
]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The default job, its sizes apart: on the standard library, from nothing, as a user starts it."""
    out = tmp_path_factory.mktemp("job")
    done = run_script("train_distill.py", "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture
def text(tmp_path):
    """A file of text, enough for a tiny run."""
    (tmp_path / "text.txt").write_text(
        "".join(f"the {i} of {i * i} is {i % 7}\n" for i in range(900))
    )
    return tmp_path / "text.txt"


# --------------------------------------------------------------------------------------------------
# The job


def test_the_job_learns_writes_its_table_and_shows_a_sample(job):
    out, printed = job
    results = json.loads((out / "results.json").read_text())
    names = [row["model"] for row in results["rows"]]
    assert names == [
        "teacher",
        "student, not trained",
        "stage 1.1, 1 of 4 layers replaced",
        "stage 1.2, 2 of 4 layers replaced",
        "stage 2, all parameters",
    ]
    teacher, untrained, *_, last = results["rows"]
    assert (
        teacher["loss"] < math.log(257) - 1.5 and teacher["kl"] == 0 and teacher["agreement"] == 1
    )
    assert (
        last["loss"] < untrained["loss"]
        and last["kl"] < untrained["kl"]
        and last["agreement"] > untrained["agreement"]
    )
    for row in results["rows"]:
        assert (
            row["perplexity"] == pytest.approx(math.exp(row["loss"]))
            and f"{row['loss']:.4f}" in printed
        )
        assert row["bits_per_byte"] == pytest.approx(
            row["loss"] / math.log(2), rel=0.01
        )  # a token is a byte but for ends of text
    assert (
        "teacher" in printed
        and "--- student\ndef " in printed
        and "peak memory" in printed
        and results["seconds"] > 0
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert (
        list(dict.fromkeys(record["stage"] for record in log)) == ["teacher", *names[2:]]
        and "ETA" in printed
    )
    assert all(
        record["loss"]
        == pytest.approx(record["ce"] + record["kl"] * (record["stage"] != "teacher"), rel=1e-5)
        for record in log
    )
    first, *_, final = [record["loss"] for record in log if record["stage"] == "teacher"]
    assert final < first and log[-1]["step"] == 10 and not (out / "checkpoints").exists()
    announced = printed[: printed.index("data: ")].splitlines()
    assert [line[:38].strip() for line in announced] == ["", "teacher", *names[2:]]
    assert [line[38:].split()[0] for line in announced[1:]] == [
        "4",
        "3",
        "2",
        "2",
    ] and "compiling" not in printed


def test_a_second_run_reuses_the_teacher_and_gives_the_same_result(job):
    out, _ = job
    before = json.loads((out / "results.json").read_text())["rows"]
    weights = mil.load(out / "teacher").state_dict()
    done = run_script("train_distill.py", "--out", out, *TINY)
    assert (
        done.returncode == 0
        and f"teacher: reused from {out}/teacher" in done.stdout
        and "teacher  step" not in done.stdout
    )
    assert all(
        torch.equal(w, weights[k]) for k, w in mil.load(out / "teacher").state_dict().items()
    )
    if DEVICE == "cpu":  # same seed, same CPU, same result
        after = json.loads((out / "results.json").read_text())["rows"]
        for a, b in zip(before, after):
            assert {k: v for k, v in a.items() if k in ("loss", "kl", "agreement")} == {
                k: v for k, v in b.items() if k in ("loss", "kl", "agreement")
            }


def test_the_student_speaks_through_generate(job):
    out, _ = job
    done = run_script(
        "generate.py", "--model", out / "student", "--prompt", "def ", "--max_new_tokens", "20"
    )
    assert done.returncode == 0 and done.stdout.startswith("def ") and len(done.stdout) > 8
    assert mil.load(out / "student").config.mixers == ["mamba2", "attention", "mamba2", "attention"]


def test_another_teacher_is_distilled_and_left_alone(job, text, tmp_path):
    out, _ = job
    before = {p: p.read_bytes() for p in (out / "teacher").iterdir()}
    t.main(
        [
            "--out",
            str(tmp_path / "o"),
            "--teacher",
            str(out / "teacher"),
            "--data",
            str(text),
            "--mixer",
            "mamba",
            "--keep",
            "0.25",
            "--stage1_steps",
            "3",
            "--stage2_steps",
            "2",
            "--batch",
            "4",
            "--eval_sequences",
            "4",
            "--device",
            DEVICE,
        ]
    )
    assert {p: p.read_bytes() for p in (out / "teacher").iterdir()} == before and not (
        tmp_path / "o" / "teacher"
    ).exists()
    assert mil.load(tmp_path / "o" / "student").config.mixers.count("mamba") == 3


@pytest.mark.parametrize("keep, mixers", [("1", ["attention"] * 2), ("0", ["mamba2"] * 2)])
def test_a_draft_of_some_of_the_teachers_layers_is_distilled_and_proposes(
    job, text, tmp_path, keep, mixers
):
    out, _ = job
    t.main(
        [
            "--out",
            str(tmp_path / "o"),
            "--teacher",
            str(out / "teacher"),
            "--data",
            str(text),
            "--student_layers",
            "0,3",
            "--keep",
            keep,
            "--stage1_steps",
            "6",
            "--stage2_steps",
            "4",
            "--batch",
            "4",
            "--eval_sequences",
            "4",
            "--device",
            DEVICE,
        ]
    )
    assert mil.load(tmp_path / "o" / "student").config.mixers == mixers
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [
        "teacher",
        "student, not trained",
        "stage 2, all parameters",
    ]
    assert (
        rows[2]["loss"] < rows[1]["loss"]
        and json.loads((tmp_path / "o" / "log.jsonl").read_text().splitlines()[-1])["step"] == 10
    )
    argv = [
        "--model",
        out / "student",
        "--prompt",
        "def ",
        "--max_new_tokens",
        "30",
        "--temperature",
        "0",
        "--device",
        DEVICE,
    ]
    plain, fast = (
        run_script("generate.py", *argv, *more)
        for more in ([], ["--draft", tmp_path / "o" / "student", "--speculate", "3"])
    )
    assert fast.returncode == 0 and fast.stdout == plain.stdout
    assert (
        "of the draft's tokens kept" in fast.stderr
        and "tokens a pass of the model (K = 3)" in fast.stderr
    )


def test_a_small_students_teacher_has_all_layers_where_the_run_makes_both(tmp_path, text):
    t.main(
        [
            "--out",
            str(tmp_path / "o"),
            "--data",
            str(text),
            *TINY,
            "--teacher_steps",
            "2",
            "--stage1_steps",
            "2",
            "--stage2_steps",
            "1",
            "--eval_sequences",
            "4",
            "--student_layers",
            "0,3",
        ]
    )
    assert [
        mil.read_config(tmp_path / "o" / name)["config"].n_layers for name in ("teacher", "student")
    ] == [4, 2]


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--student_layers", "0,x"], "--student_layers: expected numbers such as 0,3: "),
        (["--student_layers", "0,4"], "--student_layers: layers 0, 4: expected some of 0 to 3"),
        (["--student_layers", "2,1"], "each once, in rising order"),
    ],
)
def test_layers_that_make_no_student_are_refused(tmp_path, argv, match):
    with pytest.raises(MilError, match=match):
        t.main(["--out", str(tmp_path / "o"), *TINY, *argv])


def test_a_teacher_made_with_other_settings_is_not_reused(text, tmp_path, capsys):
    argv = [
        "--out",
        str(tmp_path / "o"),
        "--data",
        str(text),
        *TINY,
        "--teacher_steps",
        "3",
        "--stage1_steps",
        "2",
        "--stage2_steps",
        "1",
    ]
    t.main(argv)
    t.main([*argv, "--teacher_steps", "4"])
    assert "was made with other settings or data; training a new one" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Stages, losses


def small_settings(tmp_path, **changes):
    s = t.Settings(out=str(tmp_path), **{"warmup": 0.1, **changes})
    t.complete(s, torch.device("cpu"))
    s.batch, s.context, s.eval_sequences = 2, 16, 4
    return s


def small_run(tmp_path, **changes):
    return t.Run(small_settings(tmp_path, **changes), torch.device(DEVICE))


def some_tokens(tokens):
    """A Corpus of one document, for training and validation alike."""
    return t.Corpus(tokens, tokens, [np.zeros(1, np.int64)] * 2, "key", "")


def random_batches(run, l=16, v=257):
    """Parts of a step as train_distill's loaders make them, of random tokens."""

    def batch(step):
        x, y = torch.randint(v, (2, run.s.batch, l), generator=torch.Generator().manual_seed(step))
        return [
            t.to_device(x[mine], y[mine], torch.arange(l).expand(x[mine].shape), run.device)
            for mine in t.parts_of(run, run.s.batch)
        ], y.numel()

    return batch


def fitted(run, pair, stage, batches):
    """The State and the log after a stage's steps."""
    state, log = t.State(), io.StringIO()
    t.fit(run, state, stage, pair, batches, log, "")
    return state, [json.loads(line) for line in log.getvalue().splitlines()]


def tiny_teacher(seed=0, **changes):
    return build(
        Config(
            **{
                **dict(v=257, d=16, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=24, context=16),
                **changes,
            }
        ),
        torch.float32,
        seed,
    )


HALF = ["mamba2", "attention", "mamba2", "attention"]


def test_stage_1_trains_the_mixers_only_stage_2_everything_and_the_teacher_stays(tmp_path):
    run, teacher, trained = small_run(tmp_path), tiny_teacher(), {}
    teachers = {k: w.clone() for k, w in teacher.state_dict().items()}
    for train in ("mixers", "all"):
        stage = t.Stage(trains=train, mixers=HALF, steps=3, lr=1e-2)
        pair = t.assemble(run, teacher, teacher, stage, 1, trained)
        before = {k: w.clone() for k, w in pair.student.state_dict().items()}
        assert all(torch.equal(w.cpu(), before[k].cpu()) for k, w in trained.items()) and len(
            trained
        ) == (0 if train == "mixers" else 16)
        theirs = {id(w) for w in teacher.parameters()}
        assert all(
            (id(w) in theirs)
            == (train == "mixers" and not k.startswith(("layers.0.mixer", "layers.2.mixer")))
            for k, w in pair.student.named_parameters()
        )
        fitted(run, pair, stage, random_batches(run))
        for k, w in pair.student.state_dict().items():
            assert torch.equal(w, before[k]) != (
                train == "all" or k.startswith(("layers.0.mixer", "layers.2.mixer"))
            ), k
        assert all(w.grad is None for w in pair.student.parameters())
        trained = {
            k: w.detach().cpu() for k, w in pair.student.named_parameters() if stage.learns(k)
        }
    assert all(torch.equal(w, teachers[k]) for k, w in teacher.state_dict().items())


def plain_loss(student, teacher, targets, alpha, beta, temperature=1.0, reverse=False):
    """Eq. 2 as it is written: of logits (n, v), a mean over the targets that are learned."""
    learned = targets >= 0
    p, q = ((z[learned] / temperature).log_softmax(-1) for z in (teacher, student))
    p, q = (q, p) if reverse else (p, q)
    ce = F.cross_entropy(student[learned], targets[learned], reduction="sum")
    return (alpha * ce + beta * temperature**2 * (p.exp() * (p - q)).sum()) / max(
        1, int(learned.sum())
    )


@pytest.mark.parametrize("reverse", [False, True])
@given(
    st.integers(1, 20),
    st.integers(1, 300),
    st.sampled_from([(1.0, 1.0), (0.0, 1.0), (0.7, 0.0), (0.3, 0.2)]),
    st.sampled_from([1.0, 0.5, 3.0]),
    st.integers(1, 2**12),
    st.integers(0, 99),
)
def test_the_loss_in_chunks_equals_the_formula_and_so_do_its_gradients(
    reverse, n, v, weights, temperature, logits, seed
):
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(DEVICE)  # noqa: E731
    hidden, head, wanted, wanted_head = (
        draw(n, 6).requires_grad_(),
        draw(v, 6).requires_grad_(),
        draw(n, 9),
        draw(v, 9),
    )  # the teacher is wider
    targets = (torch.randint(-v // 2, v, (n,), generator=gen)).clamp(min=-1).to(DEVICE)
    alpha, beta = (
        torch.full((n,), w / max(1, int((targets >= 0).sum())), dtype=torch.float64, device=DEVICE)
        for w in weights
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "LOGITS", dict.fromkeys(t.LOGITS, logits))
        loss, ce, kl = t.DistillationLoss.apply(
            hidden, head, wanted, wanted_head, targets, alpha, beta, temperature, reverse
        )
    want = plain_loss(
        hidden @ head.T, wanted @ wanted_head.T, targets, *weights, temperature, reverse
    )
    assert_close(loss, want, 1e-9, noise=1e-12)
    assert_close((alpha * ce + beta * kl).sum(), want, 1e-9, noise=1e-12)
    for got, exact in zip(
        torch.autograd.grad(3 * loss, (hidden, head)), torch.autograd.grad(3 * want, (hidden, head))
    ):
        assert_close(got, exact, 1e-8, noise=1e-12)


def test_the_loss_of_bf16_activations_has_a_gradient_of_a_float32_head_that_is_not_rounded_to_bf16(
    monkeypatch,
):
    """Over several chunks, added up in float32; on a GPU by products of bf16 matrices into it."""
    monkeypatch.setattr(t, "LOGITS", dict.fromkeys(t.LOGITS, 7 * 300))
    gen = torch.Generator().manual_seed(0)
    hidden, wanted = (
        torch.randn(40, 24, generator=gen).to(DEVICE, torch.bfloat16) for _ in range(2)
    )
    head, wanted_head, targets = (
        *(0.2 * torch.randn(2, 300, 24, generator=gen)).to(DEVICE),
        torch.randint(300, (40,), generator=gen).to(DEVICE),
    )
    head, hidden, weight = (
        head.requires_grad_(),
        hidden.requires_grad_(),
        torch.full((40,), 1 / 40, device=DEVICE),
    )
    loss, *_ = t.DistillationLoss.apply(
        hidden, head, wanted, wanted_head, targets, weight, weight, 1.0, False
    )
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, head)]
    want = plain_loss(
        exact[0] @ exact[1].T,
        wanted.double() @ wanted_head.bfloat16().double().T,
        targets,
        1.0,
        1.0,
    )
    assert_close(loss, want, 1e-2)
    (d_hidden, d_head), (x_hidden, x_head) = (
        torch.autograd.grad(loss, (hidden, head)),
        torch.autograd.grad(want, exact),
    )
    assert (
        d_hidden.dtype == torch.bfloat16
        and d_head.dtype == torch.float32
        and (d_head != d_head.bfloat16()).float().mean() > 0.5
    )
    assert_close(d_hidden, x_hidden, 3e-2)
    assert_close(d_head, x_head, 3e-2)


def losses_inputs(n, v, seed, dtype=torch.float32, scale=3.0):
    gen = torch.Generator().manual_seed(seed)
    logits, wanted = (scale * torch.randn(2, n, v, generator=gen)).to(DEVICE, dtype)
    targets = torch.randint(v, (n,), generator=gen).masked_fill(
        torch.rand(n, generator=gen) < 0.3, -100
    )
    alpha, beta = torch.rand(2, n, generator=gen).to(DEVICE)
    return logits, wanted, targets.to(DEVICE), alpha, beta


def losses_by_autograd(logits, wanted, targets, alpha, beta, tau=1.0, reverse=False):
    """ce, kl and the gradient of Σ alpha ce + beta kl in float64."""
    x = logits.double().requires_grad_()
    ce = F.cross_entropy(x, targets, reduction="none", ignore_index=-100)
    kl = torch.zeros_like(ce)
    if wanted is not None:
        left, right = (wanted.double() / tau).log_softmax(-1), (x / tau).log_softmax(-1)
        left, right = (right, left) if reverse else (left, right)
        kl = tau**2 * (left.exp() * (left - right)).sum(-1) * (targets >= 0)
    (dx,) = torch.autograd.grad((alpha.double() * ce + beta.double() * kl).sum(), x)
    return ce.detach(), kl.detach(), dx


@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 257, 1025]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_the_losses_of_tokens_and_their_gradient_equal_autograds(
    n, v, tau, reverse, teacher, dtype, seed
):
    logits, wanted, targets, alpha, beta = losses_inputs(n, v, seed, dtype)
    wanted = wanted if teacher else None
    ce, kl, dx = losses_by_autograd(logits, wanted, targets, alpha, beta, tau, reverse)
    *looked, nothing = t.token_losses(logits, wanted, targets, alpha, beta, tau, reverse)
    *got, d = t.token_losses(logits, wanted, targets, alpha, beta, tau, reverse, gradient=True)
    assert nothing is None and d.dtype == dtype
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    for a, again, want, name in zip(got, looked, (ce, kl), ("ce", "kl"), strict=True):
        assert a.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(a, want, exact, name, noise=exact)
        assert_close(again, want, exact, name, noise=exact)
        assert not a[targets < 0].any()
    rounding = 2**-8 * 1.01 if dtype == torch.bfloat16 else exact
    assert_close(d, dx, rounding, "gradient", noise=exact / 10)
    assert not d[targets < 0].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_without_probability_add_nothing_to_a_divergence(reverse):
    """An infinity in both is a smaller vocabulary; on the left of the ‖ it leaves what the other tokens
    give; on the right it is an infinite divergence. What is not learned is not looked at."""
    logits, wanted, _, alpha, beta = losses_inputs(3, 300, 1)
    targets = torch.tensor([100, -100, 299], device=DEVICE)
    learned = targets >= 0
    for in_student, in_teacher in ((True, True), (reverse, not reverse), (not reverse, reverse)):
        x, w = logits.clone(), wanted.clone()
        x[:, : 90 * in_student] = -torch.inf
        w[:, : 90 * in_teacher] = -torch.inf
        gone = 90 * in_student
        leaf = x[learned, gone:].double().requires_grad_()
        theirs = w[learned].double().log_softmax(-1)[:, 90:]
        ours = leaf.log_softmax(-1)[:, 90 - gone :]
        left, right = (ours, theirs) if reverse else (theirs, ours)
        kl = (left.exp() * (left - right)).sum(-1)
        ce = F.cross_entropy(leaf, targets[learned] - gone, reduction="none")
        (dx,) = torch.autograd.grad((alpha[learned] * ce + beta[learned] * kl).sum(), leaf)
        x[1] = torch.nan
        got = t.token_losses(x, w, targets, alpha, beta, reverse=reverse, gradient=True)
        assert not got[2][1].any() and not got[0][1] and not got[1][1]
        assert_close(got[0][learned], ce, 1e-5, "ce")
        if in_student == in_teacher or in_student == reverse:
            assert_close(got[1][learned], kl, 1e-5, "kl")
            assert_close(got[2][learned, gone:], dx, 1e-5, "gradient", noise=1e-6)
            assert not got[2][learned, :gone].any()
        else:
            assert (got[1][learned] == torch.inf).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_that_agrees_has_no_divergence_and_large_logits_no_infinity(reverse):
    logits, _, targets, alpha, beta = losses_inputs(4, 1000, 2, scale=1000.0)
    ce, kl, dx = t.token_losses(
        logits, logits, targets, torch.zeros_like(alpha), beta, 1.0, reverse, gradient=True
    )
    assert not kl.any() and not dx.any() and ce.isfinite().all()


def test_the_losses_are_one_graph_for_any_number_of_tokens():
    """As token_losses compiles them on a GPU."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(t.losses_and_gradient, backend=backend, fullgraph=True)
    with torch.no_grad():
        for n in (64, 33, 7):
            inputs = losses_inputs(n, 50, n)
            for w in inputs:
                torch._dynamo.maybe_mark_dynamic(w, 0)
            compiled(*inputs, 1.0, False, True)
    assert len(found) == 1


def test_the_loss_takes_no_more_memory_for_more_tokens(monkeypatch):
    monkeypatch.setattr(t, "LOGITS", dict.fromkeys(t.LOGITS, 1000))
    seen, honest = [], t.token_losses
    monkeypatch.setattr(
        t,
        "token_losses",
        lambda logits, *rest: seen.append(logits.numel()) or honest(logits, *rest),
    )
    for n in (10, 1000):
        hidden, head, one = (
            torch.randn(n, 4, requires_grad=True),
            torch.randn(50, 4, requires_grad=True),
            torch.ones(n),
        )
        t.DistillationLoss.apply(
            hidden,
            head,
            hidden.detach(),
            head.detach(),
            torch.zeros(n, dtype=torch.long),
            one,
            one,
            1.0,
            False,
        )[0].backward()
    assert max(seen) == 1000 and len(seen) == 51


def test_parts_and_their_number_change_nothing_but_rounding(tmp_path):
    steps = []
    for accumulate in (1, 2):
        run, teacher = small_run(tmp_path, accumulate=accumulate), tiny_teacher()
        stage = t.Stage(trains="all", mixers=HALF, steps=3, lr=1e-2)
        pair = t.assemble(run, teacher, teacher, stage, 1, {})
        _, log = fitted(run, pair, stage, random_batches(run))
        steps.append((log, dict(pair.student.named_parameters())))
    (log, weights), (other_log, other_weights) = steps
    assert [record["loss"] for record in log] == pytest.approx(
        [record["loss"] for record in other_log], rel=1e-5
    )
    for k, w in weights.items():
        assert_close(w, other_weights[k], 1e-3, k, noise=1e-4)


# --------------------------------------------------------------------------------------------------
# What is compiled on a GPU


def test_a_whole_run_compiles_each_kind_of_layer_a_handful_of_times(tmp_path, monkeypatch):
    """Every stage, the evaluations between, rows of one document and of several, pairs of many
    lengths, a last batch that is not full. Traced by torch.compile and run eagerly, on the CPU, with
    the scan as one operator."""
    talk = [{"prompt": f"{i}?", "completion": "abc" * (1 + i % 5)} for i in range(300)]
    pairs = [{"prompt": f"{i}", "chosen": "yes" * (1 + i % 3), "rejected": "no"} for i in range(43)]
    for name, records in (("talk", talk), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    graphs = collections.Counter()

    def backend(graph, inputs):
        kind = "attention" if "scaled_dot_product_attention" in graph.code else "mamba2"
        graphs[kind, torch.is_grad_enabled()] += 1
        return graph.forward

    monkeypatch.setattr(mil, "ssm_scan", lambda x, dt, A, B, C, *more: (x * B * C, None))
    monkeypatch.setattr(t, "sample", lambda *_: "")
    monkeypatch.setattr(t.Run, "compiled", True)
    how = dict(backend=backend, fullgraph=True)  # a break in the graph is an error
    monkeypatch.setattr(mil.Block, "compile", lambda layer: torch.nn.Module.compile(layer, **how))
    sizes = "--n_layers 4 --d 16 --n_heads 2 --n_kv_heads 2 --d_ff 24 --context 32 --batch 4"
    steps = (
        "--teacher_steps 2 --stage1_steps 4 --stage2_steps 2 --stage3_steps 5 --eval_sequences 5"
    )
    files = f"--data {tmp_path}/talk.jsonl --pairs {tmp_path}/pairs.jsonl --out {tmp_path}/o"
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        t.main(f"{sizes} {steps} {files} --device cpu --dtype float32".split())
    assert set(graphs) == {
        (kind, grad) for kind in ("attention", "mamba2") for grad in (False, True)
    }
    assert max(graphs.values()) <= 4, graphs


def test_what_fills_up_a_batch_of_an_evaluation_counts_nothing(tmp_path, monkeypatch):
    run, encoding = small_run(tmp_path), g.load_tokenizer("bytes")
    corpus = some_tokens(np.random.default_rng(0).integers(0, 256, 16 * 3 + 1))  # three windows
    models = t.Models(tiny_teacher(1), tiny_teacher(2))
    pairs = [([~1, 2, 3], [~1, 4]), ([~5, 6], [~5, 7, 8]), ([~1, 9], [~1, 8])]
    stage, found = t.Stage(loss="dpo", beta=1.0), []
    for compiled, batch, sizes in ((False, 2, {1, 2}), (True, 2, {2}), (True, 8, {8})):
        monkeypatch.setattr(t.Run, "compiled", compiled)
        run.s.batch = batch
        assert {len(part.x) for part in t.evaluation_batches(run, corpus)} == sizes
        evaluated = t.evaluate(run, models, corpus, encoding)
        rows = [*evaluated, t.preferences(run, stage, models, pairs)]
        found.append([value for row in rows for value in row.values()])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_layers_are_compiled_on_a_gpu_and_only_there():
    for flags, kind, compiled in (
        ([], "cuda", True),
        ([], "cpu", False),
        (["--compile"], "cpu", False),
        (["--no-compile"], "cuda", False),
    ):
        settings = t.parse_flags(t.Settings, flags, "")
        assert t.Run(settings, torch.device(kind)).compiled is compiled


def plans(n, **changes):
    return t.plan(t.Settings(stage1_steps=100, stage2_steps=10, **changes), Config(n_layers=n))


def test_layers_are_replaced_in_steps_spread_evenly_at_every_step():
    replaced = lambda stages: [
        [i for i, mixer in enumerate(stage.mixers) if mixer != "attention"] for stage in stages
    ]  # noqa: E731
    assert replaced(plans(32)) == [
        list(range(0, 32, 4)),
        list(range(0, 32, 2)),
        list(range(0, 32, 2)),
    ]
    assert [len(r) for r in replaced(plans(32, keep=0))] == [
        8,
        16,
        24,
        28,
        32,
        32,
    ]  # the paper's 25, 50, 75, 87.5, 100 %
    assert [len(r) for r in replaced(plans(4, keep=0))] == [
        1,
        2,
        3,
        4,
        4,
    ]  # of which some are one in a small model
    for n, keep in ((32, 0.0), (12, 0.25), (7, 0.5), (5, 0.0), (9, 0.4)):
        *grown, last = replaced(plans(n, keep=keep))
        assert grown[-1] == last == mil.interleaved_layers(n, keep) and all(
            set(a) < set(b) for a, b in zip([[], *grown], grown)
        )
    stages = plans(32, keep=0.25)
    assert [stage.steps for stage in stages] == [33, 33, 34, 10] and [
        stage.trains for stage in stages
    ] == ["mixers"] * 3 + ["all"]
    assert [stage.name for stage in stages] == [
        f"stage 1.{i + 1}, {k} of 32 layers replaced" for i, k in enumerate((8, 16, 24))
    ] + ["stage 2, all parameters"]


def test_rates_follow_the_size_of_the_student_up_to_those_of_small_models():
    small = Config(v=257, d=16, n_layers=32, n_heads=2, n_kv_heads=1, d_ff=24)
    for config, rates in ((Config(), (8e-5, 2e-5)), (small, (3e-3, 1e-3))):  # the first is 8B
        first, *_, last = t.plan(t.Settings(stage1_steps=100, stage2_steps=10), config)
        assert (first.lr, last.lr) == pytest.approx(rates, rel=0.01)
    quarter = dataclasses.replace(Config(), n_layers=8, mixers=[], v=4008)  # 1.78 G parameters
    first, *_ = t.plan(t.Settings(stage1_steps=100, stage2_steps=10), quarter)
    size = sum(w.numel() for w in mil.empty_model(quarter).parameters())
    assert first.lr == pytest.approx(8e-5 * math.sqrt(8e9 / size))


def recipe(tmp_path, *stages):
    (tmp_path / "recipe.json").write_text(json.dumps(stages))
    return str(tmp_path / "recipe.json")


def test_a_recipe_is_a_list_of_stages_and_the_command_line_says_the_rest(tmp_path):
    stages = plans(
        4,
        recipe=recipe(
            tmp_path,
            {"replace": [3], "mixer": "mamba", "steps": 7, "beta": 0},
            {"keep": 0.25, "lr": 1, "reverse": True},
            {"trains": "all", "alpha": 0},
            {"loss": "dpo", "data": ["p.jsonl"], "name": "taste"},
        ),
        stage1_lr=0.5,
        stage2_lr=0.25,
        stage3_steps=5,
        beta=0.125,
        warmup=0.75,
        dpo_beta=3.0,
    )
    assert [stage.mixers for stage in stages] == [
        ["attention"] * 3 + ["mamba"],
        ["mamba2", "mamba2", "attention", "mamba"],
    ] + [["mamba2", "mamba2", "attention", "mamba"]] * 2
    assert [
        (stage.trains, stage.steps, stage.lr, stage.alpha, stage.beta, stage.reverse)
        for stage in stages
    ] == [
        ("mixers", 7, 0.5, 1.0, 0, False),
        ("mixers", 100, 1, 1.0, 0.125, True),
        ("all", 10, 0.25, 0, 0.125, False),
        ("all", 5, 1e-5, 1.0, 3.0, False),
    ]
    assert stages[-1].name == "taste" and {stage.warmup for stage in stages} == {0.75}
    assert [stage.learns("layers.3.mixer.D") for stage in stages] == [True] * 4 and [
        stage.learns("layers.2.mixer.q_proj.weight") for stage in stages
    ] == [False, False, True, True]


@pytest.mark.parametrize(
    "stages, match",
    [
        (
            [{"keep": 0.5}, {"replace": [0]}],
            "stage 2: replaces layer 0 twice",
        ),
        ([{"replace": [1, 1]}], "stage 1: layers 1, 1: expected some of 0 to 3, each once"),
        (
            [{"keep": 0.1}],
            "stage 1: keep is less than 1 of 4 layers; expected 0 or more",
        ),
        ([{"replace": [4]}], "layers 4: expected some of 0 to 3"),
        ([{"keep": 0.5, "replace": [1]}], "keep and replace: expected one of them"),
        (
            [{"keep": 0.5, "alpha": 0, "beta": 0}],
            "stage 1: alpha is 0, and so is beta: nothing would be learned",
        ),
        ([{"stpes": 3}], "stage 1: has 'stpes', expected some of keep, replace.*steps"),
        ([{"steps": "3"}], "stage 1: steps is '3', expected int"),
        ([{"reverse": 1}], "reverse is 1, expected bool"),
        ([{"replace": ["a"]}], "expected a list of int"),
        ([{"trains": "mixers"}], "trains the mixers, and there is none to train"),
        ([{"trains": "some"}], "trains is 'some', expected one of mixers, mlps, all"),
        ([{"keep": 0.5, "steps": 0}], "steps is 0"),
        ([{"loss": "dpo"}], "has the loss dpo and no data"),
        ([{"keep": 2}], "keep is 2"),
        ([{"keep": 0.5, "lr": -1}], "lr is -1, expected 0 or more"),
        ([{"keep": 0.5, "temperature": 0}], "temperature is 0, expected more than 0"),
        ([], "expected a list of stages"),
        ([3], "expected a list of stages"),
        ([{"keep": 0.5, "warmup": 2}], "warmup is 2, expected 0 to 1"),
        ([{"keep": -0.5}], "keep is -0.5"),
        ([{"keep": 0.25}, {"keep": 0.5}], "keep is 0.5, but the stages before leave only 1 of 4"),
        ([{"keep": 0.5, "lr": math.nan}], "lr is nan"),
        ([{"keep": 0.5, "mixer": "none"}], "there is none to train"),
        ([{"keep": 0.5, "lr": math.inf}], "lr is inf"),
        ([{"schedule": "up"}], "schedule is 'up'"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_in_one_line(tmp_path, stages, match):
    with pytest.raises(MilError, match=match) as e:
        plans(4, recipe=recipe(tmp_path, *stages))
    assert "\n" not in str(e.value) and "recipe.json" in str(e.value)


def test_without_a_mixer_everything_trains(job, text, tmp_path):
    """The paper's ablation: there is nothing that could train alone."""
    out, _ = job
    t.main(
        [
            "--out",
            str(tmp_path / "o"),
            "--teacher",
            str(out / "teacher"),
            "--data",
            str(text),
            "--batch",
            "4",
            "--eval_sequences",
            "4",
            "--device",
            DEVICE,
            "--mixer",
            "none",
            "--stage1_steps",
            "3",
            "--stage2_steps",
            "4",
        ]
    )
    assert mil.load(tmp_path / "o" / "student").config.mixers == ["none", "attention"] * 2
    assert json.loads((tmp_path / "o" / "log.jsonl").read_text().splitlines()[-1])["step"] == 7


def test_a_recipe_that_is_no_json_is_refused(tmp_path):
    for text in ("{", "{}"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(
            MilError, match="--recipe .*r.json: (cannot be read as JSON|expected a list)"
        ):
            plans(4, recipe=str(tmp_path / "r.json"))
    with pytest.raises(MilError, match="--recipe /nowhere: cannot be read"):
        plans(4, recipe="/nowhere")


def test_a_recipe_is_followed(job, text, tmp_path):
    out, _ = job
    t.main(
        [
            "--out",
            str(tmp_path / "o"),
            "--teacher",
            str(out / "teacher"),
            "--data",
            str(text),
            "--batch",
            "4",
            "--eval_sequences",
            "4",
            "--device",
            DEVICE,
            "--context",
            "64",
            "--recipe",
            recipe(
                tmp_path,
                {"replace": [1], "mixer": "mamba", "steps": 3},
                {"keep": 0.5, "steps": 2},
                {"trains": "all", "steps": 2, "reverse": True, "schedule": "constant"},
            ),
        ]
    )
    assert mil.load(tmp_path / "o" / "student").config.mixers == [
        "mamba2",
        "mamba",
        "attention",
        "attention",
    ]
    assert [
        json.loads(line)["step"] for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 1, 2, 1, 2]


def test_a_loss_that_is_no_number_stops_the_run_says_the_step_and_keeps_the_checkpoint(
    text, tmp_path, monkeypatch
):
    argv = [
        "--out",
        str(tmp_path / "o"),
        "--data",
        str(text),
        *TINY,
        "--teacher_steps",
        "5",
        "--stage1_steps",
        "20",
        "--stage2_steps",
        "2",
    ]
    honest, calls = t.token_losses, []

    def poisoned(logits, wanted, targets, alpha, beta, *rest):
        calls.append(wanted is not None and len(rest) == 3 and rest[2])
        ce, *more = honest(logits, wanted, targets, alpha, beta, *rest)
        return ce * (math.nan if sum(calls) == 14 else 1), *more

    monkeypatch.setattr(t, "token_losses", poisoned)
    with pytest.raises(
        MilError,
        match=r"stage 1.2.*became nan at step 4 of 10; stopped. The last good checkpoint is .*student, after stage 1.1",
    ):
        t.main(argv)
    assert mil.load(tmp_path / "o" / "student").config.mixers.count("mamba2") == 1
    assert all(w.isfinite().all() for w in mil.load(tmp_path / "o" / "student").parameters())


# --------------------------------------------------------------------------------------------------
# Data


def corpus(tmp_path, *data, **changes):
    s = small_settings(tmp_path / "out", data=[str(d) for d in data], **changes)
    return t.load_corpus(s, s.data, g.load_tokenizer("bytes"), "bytes")


def test_the_corpus_is_split_by_file_and_ends_each_text(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 40)
    c = corpus(tmp_path, *sorted(tmp_path.glob("*.txt")))
    documents = lambda part: bytes(x if x < 256 else 0 for x in part).decode().split("\0")[:-1]  # noqa: E731
    assert (
        documents(c.val) == ["09" * 40, "29" * 40]
        and len(documents(c.train)) == 38
        and isinstance(c.train, np.memmap)
    )


def test_the_default_corpus_is_the_standard_library_without_tests():
    files = [str(f) for f in t.standard_library()]
    assert (
        files == sorted(files)
        and any(f.endswith("/argparse.py") for f in files)
        and len(files) > 300
    )
    assert not any("site-packages" in f or "/test/" in f or "/tests/" in f for f in files)


def test_jsonl_of_every_shape_becomes_documents(tmp_path):
    records = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"prompt": "one ", "completion": "two"},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r) for r in records))
    assert t.read_documents(tmp_path / "a.jsonl", True) == [
        "plain",
        records[1]["messages"],
        ("one ", "two"),
    ]
    (tmp_path / "b.jsonl").write_bytes(
        '\ufeff{"text": "a\u2028b"}'.encode()
    )  # a byte-order mark, and a line end that is none in JSON
    assert t.read_documents(tmp_path / "b.jsonl", True) == ["a\u2028b"]


def test_a_folder_is_read_without_its_hidden_and_binary_files(tmp_path):
    for name, data in (
        ("a.py", b"text"),
        (".hidden/b.py", b"no"),
        ("c.bin", b"\xff\xfe\x00"),
        ("deep/d.md", b"more"),
        ("e.dat", b"a\0b\0"),
        ("out/log.txt", b"our own"),
    ):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    assert [
        d
        for f in t.find_files([tmp_path / "d"], tmp_path / "d" / "out")
        for d in t.read_documents(f, False)
    ] == ["text", "more"]


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl: line 2: is not JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"body": "b"}\n', "line 3: has body; expected text"),
        ("a.jsonl", "[1]\n", "line 1: is list"),
        ("a.jsonl", '{"messages": []}', "line 1: has messages"),
        ("a.txt", "", "no text found"),
        ("a.txt", "short", "training tokens, but 2 of --context 16 need 33"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_bad_data_gets_one_clear_line_and_leaves_nothing_behind(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MilError, match=match) as e:
        corpus(tmp_path, tmp_path / name)
    assert "\n" not in str(e.value) and (tmp_path / "out" / "data").exists() == ("need" in match)


def test_missing_data_is_said(tmp_path):
    with pytest.raises(MilError, match="no such file or folder"):
        corpus(tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MilError, match="no files here"):
        corpus(tmp_path, tmp_path / "empty")
    (tmp_path / "notes" / "out").mkdir(parents=True)
    (tmp_path / "notes" / "a.txt").write_text("text")
    for out in (tmp_path, tmp_path / "notes"):
        with pytest.raises(
            MilError,
            match=r"^--data .*notes: no files here \(hidden ones and --out are not read\)$",
        ):
            t.find_files([tmp_path / "notes"], out)
    assert t.find_files([tmp_path / "notes"], tmp_path / "notes" / "out") == [
        tmp_path / "notes" / "a.txt"
    ]


def test_data_of_a_recipe_are_looked_for_before_any_work_and_named_as_its(tmp_path):
    recipe = tmp_path / "recipe.json"
    for stage, match in (
        ({"keep": 0.5, "data": ["/nowhere"]}, "^--recipe: data /nowhere: no such file"),
        ({"loss": "dpo", "data": ["/nowhere"]}, "^--recipe: pairs /nowhere: no such file"),
    ):
        recipe.write_text(json.dumps([stage]))
        with pytest.raises(MilError, match=match):
            t.main(["--out", str(tmp_path / "o"), *TINY, "--recipe", str(recipe)])
    assert not (tmp_path / "o").exists()


# --------------------------------------------------------------------------------------------------
# Bad flags


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--stage1_step", "3"], "unknown flag --stage1_step; did you mean --stage1_steps?"),
        (["--keep", "1.5"], "keep is 1.5"),
        (["--keep=1"], "replaces none"),
        (["--out", ""], "--out is empty"),
        (
            ["--n_layers", "1"],
            "keep 0.5 of 1 layers keeps none; expected 0",
        ),
        (["--mixer", "rwkv"], "--mixer is 'rwkv', expected one of mamba"),
        (["--batch", "x"], "invalid int value"),
        (["--batch=-2"], "--batch is -2"),
        (["--clip", "0"], "--clip is 0.0"),
        (["--seed=-1"], "--seed is -1"),
        (["--prompt", ""], "--prompt is empty"),
        (["--d", "36"], "multiple of twice --n_heads"),
        (["--stage1_steps", "1"], "--stage1_steps: expected 2 or more"),
        (
            ["--accumulate", "3"],
            "--batch is 8, expected a multiple of 3, processes × --accumulate",
        ),
        (["--stage3_steps", "3"], "--stage3_steps needs --pairs"),
        (["--answers", "3"], "--answers needs --pseudo_labels"),
        (["--context", "1"], "--context is 1"),
        (["--memory_budget", "1.5"], "--memory_budget is 1.5, expected more than 0, at most 1"),
        (["--memory_budget", "0"], "expected more than 0"),
        (
            ["--memory_budget", "0.5", "--device", "cpu"],
            "--memory_budget needs compiled layers, on a GPU",
        ),
        (
            ["--memory_budget", "0.5", "--no-compile"],
            "--memory_budget needs compiled layers, on a GPU",
        ),
        (["--schedule", "up"], "--schedule is 'up'"),
        (["--answer_tokens", "64"], "--answer_tokens: expected 1 to"),
        (["--keep", "0.1"], "--keep 0.1 of 4 layers keeps none"),
        (["--temperature", "0"], "--temperature is 0"),
        (["--pairs", "/nowhere"], "/nowhere: no such file"),
        (["--batch", "7", "--pairs", "x"], "expected a multiple of 2"),
        (["--init_from", "/nowhere"], "/nowhere: no checkpoint"),
        (["--recipe", "/nowhere"], "--recipe /nowhere"),
        (["--recipe", "/nowhere", "--keep", "0.3"], "leave out --keep"),
        (["--mixer", "mamba", "--n_kv_heads", "1"], "d_state 16 does not divide the kv width 8"),
        (["--alpha", "0", "--beta", "0"], "nothing would be learned"),
        (["--warmup", "2"], "--warmup is 2.0"),
        (["--teacher_lr=-1"], "--teacher_lr is -1"),
        (["--stage1_lr", "nan"], "--stage1_lr is nan"),
        (["--n_kv_heads", "3"], "not divisible"),
        (["--teacher", "/nowhere"], "/nowhere: no checkpoint"),
        (["--tokenizer", "nonsense"], "nonsense: no tokenizer; expected"),
        (["--data", "/nowhere"], "no such file"),
        (["--dtype", "float8"], "--dtype is 'float8'"),
        (["--device", "abacus"], "--device abacus"),
        (["--init", "zeros"], "--init is 'zeros'"),
    ],
)
def test_bad_flags_get_one_clear_line(tmp_path, argv, match):
    with pytest.raises(MilError) as e:
        t.main(["--out", str(tmp_path / "o"), *TINY, *argv])
    assert match in str(e.value) and "\n" not in str(e.value)


def test_an_output_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("precious")
    done = run_script("train_distill.py", "--out", tmp_path / "file" / "o", *TINY)
    assert (
        done.returncode == 1
        and done.stderr.startswith(f"error: {tmp_path}/file/o: cannot be made")
        and done.stderr.count("\n") == 1
        and not done.stdout
    )
    assert (tmp_path / "file").read_text() == "precious"
    if os.geteuid():  # root writes everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert (
            "cannot be"
            in run_script("train_distill.py", "--out", tmp_path / "locked" / "o", *TINY).stderr
        )


def test_help_gives_every_flag_a_line():
    done = run_script("train_distill.py", "--help")
    assert done.returncode == 0
    for f in t.dataclasses.fields(t.Settings):
        assert f"--{f.name} " in done.stdout


def test_weights_loss_and_gradients_are_float32_under_bfloat16(tmp_path):
    run, teacher = small_run(tmp_path, dtype="bfloat16"), tiny_teacher().bfloat16()
    pair = t.assemble(run, teacher, teacher, t.Stage(trains="all", mixers=HALF), 1, {})
    (batch,), count = random_batches(run)(0)
    loss, _ = t.distill(pair, batch, t.Stage(), 1 / count)
    loss.backward()
    assert (
        loss.dtype == torch.float32
        and pair.student.start(batch.x)[0].dtype == torch.bfloat16
        and teacher.lm_head.weight.dtype == torch.bfloat16
    )
    assert all(
        w.dtype == torch.float32 and w.grad is not None and w.grad.isfinite().all()
        for w in pair.student.parameters()
    )


def evaluated(run, student, teacher, corpus, encoding="bytes"):
    """The student's row of a table."""
    return t.evaluate(
        run,
        t.Models(teacher, student),
        corpus,
        g.load_tokenizer(encoding) if isinstance(encoding, str) else encoding,
    )[1]


def test_evaluation_is_on_validation_text_by_hand(tmp_path):
    run = small_run(tmp_path)
    val = (
        np.random.default_rng(0).integers(0, 256, 16 * 4 + 1).astype(np.uint16)
    )  # exactly its four windows
    student, teacher = tiny_teacher(1), tiny_teacher(2)
    row, got = t.evaluate(
        run, t.Models(teacher, student), some_tokens(val), g.load_tokenizer("bytes")
    )
    x = torch.from_numpy(val.astype(np.int64)).to(DEVICE)
    with torch.no_grad():
        q, p = (m(x[:-1].view(4, 16)).flatten(0, 1).log_softmax(-1) for m in (student, teacher))
    assert got["loss"] == pytest.approx(F.nll_loss(q, x[1:]).item(), rel=1e-5) and row[
        "loss"
    ] == pytest.approx(F.nll_loss(p, x[1:]).item(), rel=1e-5)
    assert got["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4) and (
        row["kl"],
        row["agreement"],
    ) == (0, 1)
    assert got["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


@pytest.mark.parametrize(
    "schedule, after",
    [
        ("cosine", [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
        ("linear", [1 - i / 8 for i in range(8)]),
        ("constant", [1] * 8),
    ],
)
def test_the_rate_warms_up_and_falls_as_asked_and_gradients_are_clipped(
    tmp_path, monkeypatch, schedule, after
):
    rates, norms = [], []

    class Spy(torch.optim.AdamW):
        def step(self):
            group = self.param_groups[0]
            assert group["betas"] == (0.9, 0.98) and group["weight_decay"] == 0
            rates.append(group["lr"])
            norms.append(torch.cat([w.grad.flatten() for w in group["params"]]).norm().item())
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run, stage = (
        small_run(tmp_path, clip=1e-3),
        t.Stage(trains="all", mixers=HALF, beta=0, steps=10, lr=0.5, warmup=0.2, schedule=schedule),
    )
    _, log = fitted(
        run, t.assemble(run, None, tiny_teacher(), stage, 1, {}), stage, random_batches(run)
    )
    assert (
        rates == pytest.approx([0.25, 0.5] + [0.5 * share for share in after])
        and [record["lr"] for record in log] == rates
    )
    assert (
        max(norms) == pytest.approx(1e-3, rel=1e-2)
        and min(record["gradient"] for record in log) > 1e-2
    )


def test_the_last_tenth_of_a_single_document_is_validation_only(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        bytes(1 + i % 250 for i in range(999)).replace(b"\x80", b"a").decode("latin-1").encode()
    )
    c = corpus(tmp_path, tmp_path / "a.txt")
    whole = [*(tmp_path / "a.txt").read_bytes(), 256]
    assert [*c.train, *c.val] == whole and len(c.train) == len(whole) * 9 // 10


def test_distilling_goes_on_stage_by_stage_with_the_users_flags_and_leaves_the_teacher(
    tmp_path, monkeypatch
):
    run = small_run(
        tmp_path,
        alpha=0.5,
        beta=0.25,
        stage1_steps=4,
        stage2_steps=3,
        stage1_lr=0.01,
        stage2_lr=0.02,
        init="random",
    )
    teacher, fit, replace, fits, inits, learned = (
        tiny_teacher(),
        t.fit,
        mil.replace_attention,
        [],
        set(),
        {},
    )
    before, data = (
        {k: w.clone() for k, w in teacher.state_dict().items()},
        some_tokens(np.random.default_rng(0).integers(0, 256, 500).astype(np.uint16)),
    )

    def spy(run, state, stage, pair, *rest):
        for i, weights in learned.items():  # it begins where the last one ended
            assert all(
                torch.equal(w, weights[k])
                for k, w in pair.student.layers[i].mixer.state_dict().items()
            )
        fits.append((stage.steps, stage.lr, stage.alpha, stage.beta))
        fit(run, state, stage, pair, *rest)
        learned.update(
            {
                i: copy.deepcopy(pair.student.layers[i].mixer.state_dict())
                for i, mixer in enumerate(stage.mixers)
                if mixer == run.s.mixer
            }
        )

    monkeypatch.setattr(t, "fit", spy)
    monkeypatch.setattr(
        mil,
        "replace_attention",
        lambda m, layers, mixer="mamba2", init="attention", **k: (
            (layers and inits.add(init)) or replace(m, layers, mixer, init, **k)
        ),
    )
    t.run_stages(
        run,
        t.State(stage=1),
        t.plan(run.s, teacher.config),
        (teacher, teacher),
        lambda *_, **__: data,
        g.load_tokenizer("bytes"),
        "bytes",
        io.StringIO(),
    )
    assert fits == [(2, 0.01, 0.5, 0.25), (2, 0.01, 0.5, 0.25), (3, 0.02, 0.5, 0.25)] and inits == {
        "random"
    }
    assert all(torch.equal(w, before[k]) for k, w in teacher.state_dict().items())
    saved = mil.load(tmp_path / "student").state_dict()
    assert (
        all(
            torch.equal(w.cpu(), saved[f"layers.{i}.mixer.{k}"])
            for i, weights in learned.items()
            for k, w in weights.items()
        )
        and len(learned) == 2
    )


def teacher_made(run, corpus):
    encoding, place = g.load_tokenizer("bytes"), Path(run.s.out) / "teacher"
    job = SimpleNamespace(
        s=run.s,
        run=run,
        place=place,
        corpus=lambda: corpus,
        encoding=encoding,
        tokenizer="bytes",
        config=t.new_config(run.s, encoding),
    )
    t.Job.get_teacher(job, t.State(), io.StringIO())
    return place


def test_another_seed_is_another_teacher(tmp_path):
    run, made = (
        small_run(
            tmp_path, teacher_steps=1, n_layers=2, d=16, n_heads=2, n_kv_heads=1, teacher_lr=0.0
        ),
        [],
    )
    for run.s.seed in (0, 0, 1):
        run.s.out = str(tmp_path / str(len(made)))
        made.append(
            mil.load(teacher_made(run, some_tokens(np.zeros(500, np.uint16)))).lm_head.weight
        )
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_bits_per_byte_counts_the_bytes_of_every_token(tmp_path):
    encoding, model = (
        g.load_tokenizer(str(llama3_file(tmp_path / "tokenizer.model"))),
        tiny_teacher(v=517),
    )
    got = evaluated(
        small_run(tmp_path), model, model, some_tokens(np.full(100, 259, np.uint16)), encoding
    )  # "hello", five bytes
    assert got["bits_per_byte"] == pytest.approx(got["loss"] / math.log(2) / 5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.data())
def test_a_window_knows_its_targets_and_the_place_of_each_token_in_its_document(lengths, l, data):
    tokens = np.arange(sum(lengths))
    tokens = np.where(tokens % 5 == 3, ~tokens, tokens)
    begins = np.cumsum([0, *lengths])[:-1]
    starts = (
        data.draw(st.lists(st.integers(0, max(0, len(tokens) - l - 1)), min_size=1, max_size=3))
        if len(tokens) > l
        else []
    )
    if starts:
        x, y, pos = t.windows(tokens, begins, starts, l)
        for row, start in enumerate(starts):
            for i in range(l):
                at, begin = start + i, max(b for b in begins if b <= start + i)
                assert x[row, i] == at and pos[row, i] == at - max(begin, start)
                assert y[row, i] == (-100 if tokens[at + 1] < 0 or at + 1 in begins else at + 1)


def test_a_batch_with_documents_gives_the_loss_and_gradients_of_each_alone(tmp_path):
    """The whole path: loader, stack of every mixer, loss."""
    run = t.Run(t.Settings(batch=1, context=12, dtype="float32"), torch.device(DEVICE))
    student, teacher = (
        build(
            Config(
                v=31,
                d=8,
                n_layers=3,
                n_heads=2,
                n_kv_heads=1,
                d_ff=12,
                d_state=2,
                mixers=["mamba", "attention", "mamba2"],
            )
        ),
        build(Config(v=31, d=8, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=12)),
    )
    tokens, begins = np.random.default_rng(0).integers(0, 31, 13), np.array([0, 5, 6])
    (batch,), count = t.training_batches(
        run, t.Corpus(tokens, tokens, [begins, begins], "", ""), [0]
    )(0)
    assert batch.docs.bounds.tolist() == [0, 5, 6, 12] and count == 10 == len(batch.at)
    losses = []
    for rows in (
        [batch],
        [
            t.to_device(
                batch.x[:, a:b].cpu(), batch.y[:, a:b].cpu(), torch.arange(b - a)[None], run.device
            )
            for a, b in ((0, 5), (5, 6), (6, 12))
        ],
    ):
        student.zero_grad()
        loss = sum(
            t.distill(t.Models(teacher, student), row, t.Stage(temperature=2.0), 1 / 10)[0]
            for row in rows
            if (row.y >= 0).any()
        )
        loss.backward()
        losses.append((loss.detach(), [w.grad.clone() for w in student.parameters()]))
    (a, da), (b, db) = losses
    assert_close(a, b, 1e-6)
    for x, y in zip(da, db):
        assert_close(x, y, 1e-5)


def test_tokens_of_a_large_vocabulary_are_stored_whole(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 300)
    encoding = g.Tiktoken(r"(?s:.)", {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 100000})
    assert (
        t.load_corpus(
            small_settings(tmp_path / "out"), [tmp_path / "a.txt"], encoding, "large"
        ).val[-1]
        == 100000
    )


def test_another_tokenizer_is_another_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("hello " * 300)
    s = small_settings(tmp_path / "out", data=[str(tmp_path / "a.txt")])
    for name in ("bytes", str(llama3_file(tmp_path / "tokenizer.model"))):
        encoding = g.load_tokenizer(name)
        assert (
            t.load_corpus(s, s.data, encoding, name).train[:20].tolist()
            == encoding.encode("hello " * 300)[:20]
        )


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(batch=3),
        dict(teacher_steps=3),
        dict(teacher_lr=1e-4),
        dict(warmup=0.5),
        dict(clip=0.5),
        dict(d_ff=32),
        dict(schedule="linear"),
    ],
    ids=str,
)
def test_a_teacher_of_any_other_setting_is_not_reused(tmp_path, change, capsys):
    s, data = (
        small_settings(
            tmp_path, teacher_steps=2, n_layers=2, d=16, n_heads=2, n_kv_heads=1, d_ff=24
        ),
        some_tokens(np.zeros(500, np.uint16)),
    )
    for settings in (s, s, dataclasses.replace(s, **change)):
        teacher_made(t.Run(settings, torch.device(DEVICE)), data)
    said = capsys.readouterr().out
    assert said.count("reused from") == 1 and said.count("training a new one") == 1


# --------------------------------------------------------------------------------------------------
# What is learned of a conversation


def test_only_what_the_assistant_says_and_completions_are_learned():
    encoding, messages = (
        g.load_tokenizer("bytes"),
        [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}] * 2,
    )
    ids = np.array(t.document_tokens(encoding, messages))
    assert (
        bytes(np.where(ids < 0, ~ids, ids)[np.where(ids < 0, ~ids, ids) < 256].astype(np.uint8))
        == b"user:\n2+2?\nassistant:\n4\n" * 2
    )
    assert (
        ids[ids >= 0].tolist() == [*b"4", 256] * 2
        and np.where(ids < 0, ~ids, ids).tolist() == encoding.conversation(messages)[0]
    )
    assert t.document_tokens(encoding, ("ab", "cd")) == [
        ~97,
        ~98,
        99,
        100,
        256,
    ] and t.document_tokens(encoding, "ab") == [97, 98, 256]


def test_a_corpus_in_which_nothing_is_to_be_learned_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": "x" * 99}]}) for _ in range(40)
        )
    )
    with pytest.raises(MilError, match="nothing to learn in the training part"):
        t.load_corpus(
            small_settings(tmp_path), [tmp_path / "a.jsonl"], g.load_tokenizer("bytes"), "bytes"
        )


def test_a_teacher_from_elsewhere_is_distilled_on_conversations_and_its_student_brings_the_tokenizer(
    tmp_path,
):
    v = 1 + max(
        token["id"]
        for token in FILES["smollm2"]["added_tokens"]
        + [dict(id=i) for i in FILES["smollm2"]["model"]["vocab"].values()]
    )
    teacher = build(
        Config(v=v, d=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, context=64, tied=True),
        torch.float32,
    )
    mil.save(teacher.bfloat16(), tmp_path / "ours", tokenizer="tokenizer.json")
    mil.export(tmp_path / "ours", tmp_path / "theirs", "hf")
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(FILES["smollm2"]))
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"the {i}?"},
                        {"role": "assistant", "content": f"then {i}"},
                    ]
                }
            )
            for i in range(90)
        )
    )
    done = run_script(
        "train_distill.py",
        "--teacher",
        tmp_path / "theirs",
        "--data",
        tmp_path / "a.jsonl",
        "--out",
        tmp_path / "o",
        "--context",
        "32",
        "--batch",
        "4",
        "--stage1_steps",
        "2",
        "--stage2_steps",
        "0",
        "--eval_sequences",
        "4",
        "--device",
        DEVICE,
        "--dtype",
        "float32",
        "--prompt",
        "the",
    )
    assert (
        done.returncode == 0
        and "of them to be learned" in done.stdout
        and "stage 2" not in done.stdout
    ), done.stderr + done.stdout
    student, encoding = g.load_with_tokenizer(tmp_path / "o" / "student", DEVICE)
    assert (
        student.config.mixers == ["mamba2", "attention"]
        and encoding.template == g.load_tokenizer(str(tmp_path / "theirs")).template
        and student.embed_tokens.weight.dtype == torch.float32
    )
    assert torch.equal(student.embed_tokens.weight.cpu(), teacher.embed_tokens.weight.cpu().float())


def test_records_are_known_by_what_they_hold_in_files_of_any_spelling(tmp_path):
    """One a line or, in a .json, a list in one piece; content may come in parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    records = [{"messages": [{"role": "user", "content": parts}]}, {"text": "t"}]
    want, lines = [[{"role": "user", "content": "ab"}], "t"], "\n".join(map(json.dumps, records))
    contents = {"a.JSONL": lines, "b.ndjson": lines, "c.Json": lines, "d.json": json.dumps(records)}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
        assert (
            t.read_documents(tmp_path / name, False)
            == want
            == t.read_documents(tmp_path / name, True)
        )
    for text in ('{"a": 1}', "[1, 2]", '[{"a": 1}]'):  # a text like any other
        (tmp_path / "e.json").write_text(text)
        assert t.read_documents(tmp_path / "e.json", True) == [text]
    (tmp_path / "f.json").write_text('{\n "a": 1\n}')
    assert t.read_documents(tmp_path / "f.json", True) == ['{\n "a": 1\n}']


def test_a_second_run_in_the_same_folder_at_the_same_time_is_refused(tmp_path):
    run = t.Run(t.Settings(out=str(tmp_path / "o")), torch.device("cpu"))
    with t.alone(run):
        with pytest.raises(MilError, match="--out .*o: another run is writing here"), t.alone(run):
            pass
    with t.alone(run):
        pass


def test_a_role_nobody_knows_and_messages_beside_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "x", "messages": [{"role": "user", "content": "y"}]})
    )
    assert t.read_documents(tmp_path / "a.jsonl", True) == [[{"role": "user", "content": "y"}]]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "gpt", "content": "y"}]}))
    with pytest.raises(
        MilError,
        match="line 1: has a message of the role 'gpt', expected system, user, assistant or tool",
    ):
        t.read_documents(tmp_path / "a.jsonl", True)


def test_another_chat_template_is_another_corpus(tmp_path):
    messages = [
        {"role": "user", "content": "the other"},
        {"role": "assistant", "content": "hello"},
    ] * 30
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    s = small_settings(tmp_path / "out", data=[str(tmp_path / "a.jsonl")])
    for mark in "xy":  # the files' names, sizes and times and the vocabulary stay
        encoding = beside(
            tmp_path / "t",
            "llama2",
            {"chat_template": "{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}"},
        )
        assert (
            t.load_corpus(s, s.data, encoding, "t").train[:40].tolist()
            == t.document_tokens(encoding, messages)[:40]
        )


def test_evaluation_leaves_out_of_every_number_what_is_not_to_be_learned(tmp_path):
    run, ids = small_run(tmp_path), np.random.default_rng(0).integers(0, 256, 17)
    corpus, (model, teacher) = (
        some_tokens(np.where(np.arange(17) % 3 == 0, ids, ~ids)),
        (tiny_teacher(1), tiny_teacher(2)),
    )
    got = evaluated(run, model, teacher, corpus)
    with torch.no_grad():
        q, p = (
            m(torch.tensor(ids[None, :-1], device=DEVICE)).log_softmax(-1)[0, 2::3]
            for m in (model, teacher)
        )
    assert got["loss"] == pytest.approx(-q[range(5), ids[3::3]].mean().item(), rel=1e-4)
    assert got["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(got["loss"] / np.log(2))  # every token is a byte
    assert evaluated(run, model, model, corpus)["agreement"] == 1


@pytest.mark.parametrize("last", [2**15 - 1, 2**15, 40000])
def test_tokens_at_the_limits_of_16_bits_are_stored_whole_and_as_not_to_be_learned(tmp_path, last):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "a\n" * 300, "completion": "b" * 300}) + "\n"
    )
    ranks = {**{bytes([i]): i for i in range(256) if i != 10}, b"\n": last - 1}
    encoding = g.Tiktoken(r"(?s:.)", ranks, {"<|endoftext|>": last})
    got = t.load_corpus(small_settings(tmp_path / "out"), [tmp_path / "a.jsonl"], encoding, "large")
    assert got.val[-1] == last and got.train[1] == ~(last - 1)


def test_the_peak_memory_is_said_in_bytes(job):
    out, printed = job
    peak, said = (
        json.loads((out / "results.json").read_text())["peak_memory_bytes"],
        float(printed.split("peak memory ")[1].split(" GiB")[0]),
    )
    assert (2**27 if DEVICE == "cpu" else 2**20) < peak < 2**36 and (
        said > 0.12 or DEVICE != "cpu"
    )  # torch alone takes more than 128 MiB


def test_a_sample_of_a_prompt_longer_than_the_context_has_room_for_a_token():
    text = t.sample(
        tiny_teacher(context=16),
        g.load_tokenizer("bytes"),
        t.Settings(prompt="x" * 40),
    )
    assert text.startswith("x" * 40)


def test_the_end_of_a_run_says_how_long_it_took_and_a_command_to_try_with_a_small_student_as_the_teachers_draft(
    tmp_path, monkeypatch, capsys
):
    row = {
        "model": "m",
        "loss": 1.0,
        "perplexity": 2.0,
        "bits_per_byte": 1.0,
        "kl": 0.0,
        "agreement": 1.0,
    }
    for owner, name, value in (
        (t, "sample", lambda *_: "x"),
        (mil, "load", lambda *_: None),
    ):
        monkeypatch.setattr(owner, name, value)
    for more, flags in (
        (dict(student_layers="0,3", teacher="T"), f"--model T --draft {tmp_path}/student"),
        (dict(teacher="T", resume=True), f"--model {tmp_path}/student"),
    ):
        run = small_run(tmp_path, **more)
        job = SimpleNamespace(
            s=run.s,
            run=run,
            config=tiny_teacher().config,
            place=tmp_path / "teacher",
            student=tmp_path / "student",
            results=tmp_path / "results.json",
            encoding=g.load_tokenizer("bytes"),
        )
        t.Job.report(job, t.State(rows=[row, row]), 1.0)
        said = capsys.readouterr().out
        assert (
            f"try: python generate.py {flags} --prompt" in said
            and ("1 s since --resume on" if "resume" in more else "1 s in all on") in said
        )
