"""The main job at a tiny size, its parts, and what it says to bad input."""
import copy
import dataclasses
import json
import math
import os

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, build, run_script
from hypothesis import given
from hypothesis import strategies as st

import generate as g
import mil
import train_distill as t
from mil import Config, MilError
from test_generate import llama3_file
from test_tokenizers import FILES, beside

TINY = ["--n_layers", "4", "--d", "32", "--n_heads", "4", "--n_kv_heads", "2", "--d_ff", "64", "--context", "64", "--batch", "8", "--teacher_steps", "60",
        "--stage1_steps", "20", "--stage2_steps", "10", "--eval_sequences", "16", "--device", DEVICE, "--dtype", "float32"]


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
    (tmp_path / "text.txt").write_text("".join(f"the {i} of {i * i} is {i % 7}\n" for i in range(900)))
    return tmp_path / "text.txt"


# ---------------------------------------------------------------------------------------------------------------
# The job


def test_the_job_learns_writes_its_table_and_shows_a_sample(job):
    out, printed = job
    results = json.loads((out / "results.json").read_text())
    names = [row["model"] for row in results["rows"]]
    assert names == ["teacher", "student, not trained", "stage 1.1, 1 of 4 layers replaced", "stage 1.2, 2 of 4 layers replaced",
                     "stage 2, all parameters"]
    teacher, untrained, *_, last = results["rows"]
    assert teacher["loss"] < math.log(257) - 1.5 and teacher["kl"] == 0 and teacher["agreement"] == 1
    assert last["loss"] < untrained["loss"] and last["kl"] < untrained["kl"] and last["agreement"] > untrained["agreement"]
    for row in results["rows"]:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"])) and f"{row['loss']:.4f}" in printed
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=0.01)  # a token is a byte but for ends of text
    assert "teacher" in printed and "│ student\ndef " in printed and "peak memory" in printed and results["seconds"] > 0
    lines = (out / "log.txt").read_text().splitlines()
    assert all(any(stage in line for line in lines) for stage in ("teacher  step 60/60", "stage 1.2", "stage 2", "ETA", "tokens/s"))
    first, *_, final = [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("teacher  step")]
    assert final < first


def test_a_second_run_reuses_the_teacher_and_gives_the_same_result(job):
    out, _ = job
    before = json.loads((out / "results.json").read_text())["rows"]
    weights = mil.load(out / "teacher").state_dict()
    done = run_script("train_distill.py", "--out", out, *TINY)
    assert done.returncode == 0 and f"teacher: reused from {out}/teacher" in done.stdout and "teacher  step" not in done.stdout
    assert all(torch.equal(w, weights[k]) for k, w in mil.load(out / "teacher").state_dict().items())
    if DEVICE == "cpu":  # same seed, same CPU, same result
        after = json.loads((out / "results.json").read_text())["rows"]
        for a, b in zip(before, after):
            assert {k: v for k, v in a.items() if k in ("loss", "kl", "agreement")} == {k: v for k, v in b.items() if k in ("loss", "kl", "agreement")}


def test_the_student_speaks_through_generate(job):
    out, _ = job
    done = run_script("generate.py", "--model", out / "student", "--prompt", "def ", "--max_new_tokens", "20")
    assert done.returncode == 0 and done.stdout.startswith("def ") and len(done.stdout) > 8
    assert mil.load(out / "student").config.mixers == ["mamba2", "attention", "mamba2", "attention"]


def test_another_teacher_is_distilled_and_left_alone(job, text, tmp_path):
    out, _ = job
    before = {p: p.read_bytes() for p in (out / "teacher").iterdir()}
    t.main(["--out", str(tmp_path / "o"), "--teacher", str(out / "teacher"), "--data", str(text), "--mixer", "mamba", "--keep", "0.25",
            "--stage1_steps", "3", "--stage2_steps", "2", "--batch", "4", "--eval_sequences", "4", "--device", DEVICE])
    assert {p: p.read_bytes() for p in (out / "teacher").iterdir()} == before and not (tmp_path / "o" / "teacher").exists()
    assert mil.load(tmp_path / "o" / "student").config.mixers.count("mamba") == 3


@pytest.mark.parametrize("keep, mixers", [("1", ["attention"] * 2), ("0", ["mamba2"] * 2)])
def test_a_draft_of_some_of_the_teachers_layers_is_distilled_and_proposes(job, text, tmp_path, keep, mixers):
    out, _ = job
    t.main(["--out", str(tmp_path / "o"), "--teacher", str(out / "teacher"), "--data", str(text), "--student_layers", "0,3", "--keep", keep,
            "--stage1_steps", "6", "--stage2_steps", "4", "--batch", "4", "--eval_sequences", "4", "--device", DEVICE])
    assert mil.load(tmp_path / "o" / "student").config.mixers == mixers
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "student, not trained", "stage 2, all parameters"]
    assert rows[2]["loss"] < rows[1]["loss"] and "stage 2, all parameters  step 10/10" in (tmp_path / "o" / "log.txt").read_text()
    argv = ["--model", out / "student", "--prompt", "def ", "--max_new_tokens", "30", "--temperature", "0", "--device", DEVICE]
    plain, fast = (run_script("generate.py", *argv, *more) for more in ([], ["--draft", tmp_path / "o" / "student", "--speculate", "3"]))
    assert fast.returncode == 0 and fast.stdout == plain.stdout
    assert "of the draft's tokens kept" in fast.stderr and "tokens a pass of the model (K = 3)" in fast.stderr


@pytest.mark.parametrize("argv, match", [(["--student_layers", "0,x"], "--student_layers is '0,x', expected numbers with commas"),
                                         (["--student_layers", "0,4"], "--student_layers: layers 0, 4: expected some of 0 to 3"),
                                         (["--student_layers", "2,1"], "each once, in rising order")])
def test_layers_that_make_no_student_are_refused(tmp_path, argv, match):
    with pytest.raises(MilError, match=match):
        t.main(["--out", str(tmp_path / "o"), *TINY, *argv])


def test_a_teacher_made_with_other_settings_is_not_reused(text, tmp_path, capsys):
    argv = ["--out", str(tmp_path / "o"), "--data", str(text), *TINY, "--teacher_steps", "3", "--stage1_steps", "2", "--stage2_steps", "1"]
    t.main(argv)
    t.main([*argv, "--teacher_steps", "4"])
    assert "was made with other settings or data; training a new one" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------
# Stages, losses


def small_settings(tmp_path, **changes):
    s = t.Settings(out=str(tmp_path), **{"warmup": 0.1, **changes})
    t.complete(s, torch.device("cpu"))
    s.batch, s.context, s.eval_sequences = 2, 16, 4
    return s


def test_stage_1_trains_the_mixers_only_and_stage_2_everything(tmp_path):
    s = small_settings(tmp_path)
    teacher = build(mil.Config(v=17, d=16, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=24, context=16), torch.float32)
    student = mil.replace_attention(teacher, [0, 2], "mamba2")
    before = {k: w.clone() for k, w in student.state_dict().items()}
    batches = iter(lambda: tuple(torch.randint(17, (2, 16), device=DEVICE) for _ in range(2)), None)
    loss = lambda x, y: t.distillation_loss(student(x), None, y, 1.0, 0.0)  # noqa: E731
    train = [w for i in (0, 2) for w in student.layers[i].mixer.parameters()]
    with open(tmp_path / "log", "w") as log:
        t.fit("stage 1", student, train, 3, 1e-2, batches, loss, s, torch.device(DEVICE), log, "")
        for k, w in student.state_dict().items():
            moved = not torch.equal(w, before[k])
            assert moved == k.startswith(("layers.0.mixer", "layers.2.mixer")), k
        assert all(w.grad is None for w in student.parameters())
        t.fit("stage 2", student, list(student.parameters()), 3, 1e-2, batches, loss, s, torch.device(DEVICE), log, "")
    assert all(not torch.equal(w, before[k]) for k, w in student.state_dict().items())


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9), st.floats(0, 2), st.floats(0, 2), st.integers(0, 1000))
def test_the_loss_is_alpha_ce_plus_beta_kl_per_predicted_token(b, l, v, alpha, beta, seed):
    torch.manual_seed(seed)
    student, teacher, targets = torch.randn(b, l, v), torch.randn(b, l, v), torch.randint(v, (b, l))
    want = 0.0
    for i, j in np.ndindex(b, l):
        p, q = teacher[i, j].double().softmax(-1), student[i, j].double().softmax(-1)
        want += (-alpha * q[targets[i, j]].log() + beta * (p * (p / q).log()).sum()) / (b * l)
    assert_close(t.distillation_loss(student, teacher, targets, alpha, beta), want, 1e-4, noise=1e-6)


def test_layers_are_replaced_in_steps_spread_evenly_at_every_step():
    plan = lambda n, keep, steps: t.replacement_steps(t.Settings(keep=keep, replace_steps=steps), mil.Config(n_layers=n))  # noqa: E731
    assert plan(32, 0.5, 2) == [list(range(0, 32, 4)), list(range(2, 32, 4))]
    for n, keep, steps in ((32, 0.0, 4), (12, 0.25, 3), (7, 0.5, 2), (5, 0.0, 5)):
        got = plan(n, keep, steps)
        assert len(got) == steps and all(got) and sorted(sum(got, [])) == mil.interleaved_layers(n, keep)


def test_a_loss_that_is_no_number_stops_the_run_says_the_step_and_keeps_the_checkpoint(text, tmp_path, monkeypatch):
    argv = ["--out", str(tmp_path / "o"), "--data", str(text), *TINY, "--teacher_steps", "5", "--stage1_steps", "20", "--stage2_steps", "2"]
    honest, calls = t.distillation_loss, []

    def poisoned(student, teacher, targets, alpha, beta):
        calls.append(teacher is not None)
        return honest(student, teacher, targets, alpha, beta) * (math.nan if sum(calls) == 14 else 1)

    monkeypatch.setattr(t, "distillation_loss", poisoned)
    with pytest.raises(MilError, match=r"stage 1.2.*became nan at step 4 of 10; stopped. The last good checkpoint is .*student, after stage 1.1"):
        t.main(argv)
    assert mil.load(tmp_path / "o" / "student").config.mixers.count("mamba2") == 1
    assert all(w.isfinite().all() for w in mil.load(tmp_path / "o" / "student").parameters())


# ---------------------------------------------------------------------------------------------------------------
# Data


def corpus(tmp_path, *data, **changes):
    s = small_settings(tmp_path / "out", data=[str(d) for d in data], **changes)
    return t.load_corpus(s, g.load_tokenizer("bytes"), "bytes")


def test_the_corpus_is_split_by_file_and_ends_each_text(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 40)
    c = corpus(tmp_path, *sorted(tmp_path.glob("*.txt")))
    documents = lambda part: bytes(x if x < 256 else 0 for x in part).decode().split("\0")[:-1]  # noqa: E731
    assert documents(c.val) == ["09" * 40, "29" * 40] and len(documents(c.train)) == 38 and isinstance(c.train, np.memmap)


def test_the_default_corpus_is_the_standard_library_without_tests():
    files = [str(f) for f in t.standard_library()]
    assert files == sorted(files) and any(f.endswith("/argparse.py") for f in files) and len(files) > 300
    assert not any("site-packages" in f or "/test/" in f or "/tests/" in f for f in files)


def test_jsonl_of_every_shape_becomes_documents(tmp_path):
    records = [{"text": "plain"}, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
               {"prompt": "one ", "completion": "two"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r) for r in records))
    assert t.read_documents(tmp_path / "a.jsonl", True) == ["plain", records[1]["messages"], ("one ", "two")]
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "a\u2028b"}'.encode())  # a byte-order mark, and a line end that is none in JSON
    assert t.read_documents(tmp_path / "b.jsonl", True) == ["a\u2028b"]


def test_a_folder_is_read_without_its_hidden_and_binary_files(tmp_path):
    for name, data in (("a.py", b"text"), (".hidden/b.py", b"no"), ("c.bin", b"\xff\xfe\x00"), ("deep/d.md", b"more"), ("e.dat", b"a\0b\0"), ("out/log.txt", b"our own")):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    assert [d for f in t.find_files([tmp_path / "d"], tmp_path / "d" / "out") for d in t.read_documents(f, False)] == ["text", "more"]


@pytest.mark.parametrize("name, content, match", [
    ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl: line 2 is not JSON"), ("a.jsonl", '{"text": "a"}\n\n{"body": "b"}\n', "line 3 has body; expected text"),
    ("a.jsonl", "[1]\n", "line 1 has list"), ("a.jsonl", '{"messages": []}', "line 1 has messages"), ("a.txt", "", "no text found"),
    ("a.txt", "short", "training tokens, but 2 of --context 16 need 33"), ("a.txt", b"\xff\xfe", "not UTF-8 text")])
def test_bad_data_gets_one_clear_line_and_leaves_nothing_behind(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MilError, match=match) as e:
        corpus(tmp_path, tmp_path / name)
    assert "\n" not in str(e.value) and (tmp_path / "out" / "data").exists() == ("need" in match)


def test_missing_data_is_said(tmp_path):
    with pytest.raises(MilError, match="no such file or folder"):
        corpus(tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MilError, match="no files in this folder"):
        corpus(tmp_path, tmp_path / "empty")


# ---------------------------------------------------------------------------------------------------------------
# Bad flags


@pytest.mark.parametrize("argv, match", [
    (["--stage1_step", "3"], "unknown flag --stage1_step; did you mean --stage1_steps?"), (["--keep", "1.5"], "keep is 1.5"), (["--keep=1"], "replaces none"),
    (["--mixer", "rwkv"], "--mixer is 'rwkv', expected one of mamba"), (["--batch", "x"], "invalid int value"), (["--batch=-2"], "--batch is -2"),
    (["--clip", "0"], "--clip is 0.0"), (["--seed=-1"], "--seed is -1"), (["--prompt", ""], "--prompt is ''"), (["--d", "36"], "multiple of twice --n_heads"),
    (["--stage1_steps", "1"], "one for each of 2"), (["--mixer", "mamba", "--n_kv_heads", "1"], "d_state 16 does not divide the kv width 8"),
    (["--alpha", "0", "--beta", "0"], "nothing would be learned"), (["--warmup", "2"], "--warmup is 2.0"), (["--replace_steps", "9"], "--replace_steps is 9"),
    (["--teacher_lr=-1"], "--teacher_lr is -1"), (["--stage1_lr", "nan"], "--stage1_lr is nan"), (["--n_kv_heads", "3"], "not divisible"),
    (["--teacher", "/nowhere"], "/nowhere: no checkpoint"), (["--tokenizer", "nonsense"], "neither a file nor a known encoding"), (["--data", "/nowhere"], "no such file"),
    (["--dtype", "float8"], "--dtype is 'float8'"), (["--device", "abacus"], "--device abacus"), (["--init", "zeros"], "--init is 'zeros'")])
def test_bad_flags_get_one_clear_line(tmp_path, argv, match):
    with pytest.raises(MilError) as e:
        t.main(["--out", str(tmp_path / "o"), *TINY, *argv])
    assert match in str(e.value) and "\n" not in str(e.value)


def test_an_output_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("precious")
    done = run_script("train_distill.py", "--out", tmp_path / "file" / "o", *TINY)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}/file/o: cannot be made") and done.stderr.count("\n") == 1 and not done.stdout
    assert (tmp_path / "file").read_text() == "precious"
    if os.geteuid():  # root writes everywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be" in run_script("train_distill.py", "--out", tmp_path / "locked" / "o", *TINY).stderr


def test_help_gives_every_flag_a_line():
    done = run_script("train_distill.py", "--help")
    assert done.returncode == 0
    for f in t.dataclasses.fields(t.Settings):
        assert f"--{f.name} " in done.stdout


def test_weights_loss_and_gradients_are_float32_under_bfloat16(tmp_path):
    s = small_settings(tmp_path, dtype="bfloat16")
    student = mil.replace_attention(build(mil.Config(v=17, d=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24), torch.float32), [0])
    with t.compute_in(s, torch.device(DEVICE)):
        loss = t.distillation_loss(student(torch.zeros(1, 5, dtype=torch.long, device=DEVICE)), None, torch.zeros(1, 5, dtype=torch.long, device=DEVICE), 1.0, 0.0)
    loss.backward()
    assert loss.dtype == torch.float32 and all(w.dtype == torch.float32 and w.grad is not None and w.grad.isfinite().all() for w in student.parameters())


def tiny_teacher(seed=0, **changes):
    return build(Config(**{**dict(v=257, d=16, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=24, context=16), **changes}), torch.float32, seed)


def test_evaluation_is_on_validation_text_by_hand(tmp_path):
    s, device = small_settings(tmp_path), torch.device(DEVICE)
    val = np.random.default_rng(0).integers(0, 256, 16 * 4 + 1).astype(np.uint16)   # exactly its four windows
    student, teacher = tiny_teacher(1), tiny_teacher(2)
    got = t.evaluate(student, teacher, t.Corpus(None, val, "", ""), g.load_tokenizer("bytes"), s, device)
    x = torch.from_numpy(val.astype(np.int64)).to(device)
    with torch.no_grad():
        q, p = (m(x[:-1].view(4, 16)).flatten(0, 1).log_softmax(-1) for m in (student, teacher))
    assert got["loss"] == pytest.approx(F.nll_loss(q, x[1:]).item(), rel=1e-5)
    assert got["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert got["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


def test_the_rate_warms_up_and_falls_as_a_cosine_and_gradients_are_clipped(tmp_path, monkeypatch):
    rates, norms = [], []
    class Spy(torch.optim.AdamW):
        def step(self):
            group = self.param_groups[0]
            assert group["betas"] == (0.9, 0.98) and group["weight_decay"] == 0
            rates.append(group["lr"])
            norms.append(torch.cat([w.grad.flatten() for w in group["params"]]).norm().item())
            super().step()
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    s, model = small_settings(tmp_path, warmup=0.2, clip=1e-3), tiny_teacher()
    batches = iter(lambda: tuple(torch.randint(257, (2, 16), device=DEVICE) for _ in range(2)), None)
    with open(tmp_path / "log", "w") as log:
        t.fit("a", model, list(model.parameters()), 10, 0.5, batches, lambda x, y: t.distillation_loss(model(x), None, y, 1.0, 0.0), s, torch.device(DEVICE), log, "")
    assert rates == pytest.approx([0.25, 0.5] + [0.25 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    assert max(norms) == pytest.approx(1e-3, rel=1e-2)


def test_the_last_tenth_of_a_single_document_is_validation_only(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(1 + i % 250 for i in range(999)).replace(b"\x80", b"a").decode("latin-1").encode())
    c = corpus(tmp_path, tmp_path / "a.txt")
    whole = [*(tmp_path / "a.txt").read_bytes(), 256]
    assert [*c.train, *c.val] == whole and len(c.train) == len(whole) * 9 // 10


def test_distilling_goes_on_step_by_step_with_the_users_flags_and_leaves_the_teacher(tmp_path, monkeypatch):
    s = small_settings(tmp_path, alpha=0.5, beta=0.25, stage1_steps=4, stage2_steps=3, stage1_lr=0.01, stage2_lr=0.02, init="random")
    teacher, fit, loss, replace = tiny_teacher(), t.fit, t.distillation_loss, mil.replace_attention
    before, fits, weights, inits, learned = {k: w.clone() for k, w in teacher.state_dict().items()}, [], set(), set(), {}

    def spy(name, model, train, steps, lr, *rest):
        for i, state in learned.items():   # it begins where the last one ended
            assert all(torch.equal(w, state[k]) for k, w in model.layers[i].mixer.state_dict().items())
        fits.append((steps, lr))
        speed = fit(name, model, train, steps, lr, *rest)
        learned.update({i: copy.deepcopy(model.layers[i].mixer.state_dict()) for i, mixer in enumerate(model.config.mixers) if mixer == s.mixer})
        return speed

    monkeypatch.setattr(t, "fit", spy)
    monkeypatch.setattr(t, "distillation_loss", lambda a, b, y, *w: weights.add(w) or loss(a, b, y, *w))
    monkeypatch.setattr(mil, "replace_attention", lambda m, layers, mixer, init="attention", **k: (layers and inits.add(init)) or replace(m, layers, mixer, init, **k))
    data = np.random.default_rng(0).integers(0, 256, 500).astype(np.uint16)
    with open(tmp_path / "log", "w") as log:
        student = t.distill(s, teacher, t.Corpus(data, data, "", ""), g.load_tokenizer("bytes"), "bytes", torch.device(DEVICE), log, [])
    assert fits == [(2, 0.01), (2, 0.01), (3, 0.02)] and weights == {(0.5, 0.25)} and inits == {"random"}
    assert all(torch.equal(w, before[k]) for k, w in teacher.state_dict().items())
    assert all(torch.equal(w.to(DEVICE), student.state_dict()[k]) for k, w in mil.load(tmp_path / "student").state_dict().items())


def test_another_seed_is_another_teacher(tmp_path):
    s, device = small_settings(tmp_path, teacher_steps=1, replace_steps=1, n_layers=2, d=16, n_heads=2, n_kv_heads=1, teacher_lr=0.0), torch.device(DEVICE)
    encoding, data, made = g.load_tokenizer("bytes"), np.zeros(500, np.uint16), []
    for s.seed in (0, 0, 1):
        s.out = str(tmp_path / str(len(made)))
        with open(tmp_path / "log", "w") as log:
            made.append(t.get_teacher(s, t.Corpus(data, data, "", ""), encoding, "bytes", device, log)[0].lm_head.weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_bits_per_byte_counts_the_bytes_of_every_token(tmp_path):
    s, encoding, model = small_settings(tmp_path), g.load_tokenizer(str(llama3_file(tmp_path / "t.model"))), tiny_teacher(v=517)
    val = np.full(100, 259, np.uint16)   # "hello", five bytes
    got = t.evaluate(model, model, t.Corpus(val, val, "", ""), encoding, s, torch.device(DEVICE))
    assert got["bits_per_byte"] == pytest.approx(got["loss"] / math.log(2) / 5)


def test_the_target_is_the_next_token():
    x, y = t.to_device([np.arange(7), np.arange(10, 17)], torch.device(DEVICE))
    assert torch.equal(y, x + 1) and x.shape == (2, 6)


def test_tokens_of_a_large_vocabulary_are_stored_whole(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 300)
    encoding = tiktoken.Encoding("large", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<|endoftext|>": 100000})
    assert t.load_corpus(small_settings(tmp_path / "out", data=[str(tmp_path / "a.txt")]), encoding, "large").val[-1] == 100000


def test_another_tokenizer_is_another_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("hello " * 300)
    s = small_settings(tmp_path / "out", data=[str(tmp_path / "a.txt")])
    for name in ("bytes", str(llama3_file(tmp_path / "t.model"))):
        encoding = g.load_tokenizer(name)
        assert t.load_corpus(s, encoding, name).train[:20].tolist() == g.encode(encoding, "hello " * 300)[:20]


@pytest.mark.parametrize("change", [dict(seed=1), dict(batch=3), dict(teacher_steps=3), dict(teacher_lr=1e-4), dict(warmup=0.5), dict(clip=0.5), dict(d_ff=32)], ids=str)
def test_a_teacher_of_any_other_setting_is_not_reused(tmp_path, change, capsys):
    s = small_settings(tmp_path, teacher_steps=2, replace_steps=1, n_layers=2, d=16, n_heads=2, n_kv_heads=1, d_ff=24)
    data, encoding = np.zeros(500, np.uint16), g.load_tokenizer("bytes")
    with open(tmp_path / "log", "w") as log:
        for settings in (s, s, dataclasses.replace(s, **change)):
            t.get_teacher(settings, t.Corpus(data, data, "key", ""), encoding, "bytes", torch.device(DEVICE), log)
    said = capsys.readouterr().out
    assert said.count("reused from") == 1 and said.count("training a new one") == 1


# ---------------------------------------------------------------------------------------------------------------
# What is learned of a conversation


def test_only_what_the_assistant_says_and_completions_are_learned():
    encoding, messages = g.load_tokenizer("bytes"), [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}] * 2
    ids = np.array(t.document_tokens(encoding, messages))
    assert bytes(np.where(ids < 0, ~ids, ids)[np.where(ids < 0, ~ids, ids) < 256].astype(np.uint8)) == b"user:\n2+2?\nassistant:\n4\n" * 2
    assert ids[ids >= 0].tolist() == [*b"4", 256] * 2 and np.where(ids < 0, ~ids, ids).tolist() == g.Conversation(encoding, messages).ids
    assert t.document_tokens(encoding, ("ab", "cd")) == [~97, ~98, 99, 100, 256] and t.document_tokens(encoding, "ab") == [97, 98, 256]


@given(st.integers(0, 99), st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)]))
def test_the_loss_is_a_mean_over_the_tokens_to_be_learned(seed, weights):
    torch.manual_seed(seed)
    student, teacher, block = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double(), torch.randint(-7, 7, (2, 6)).numpy()
    x, y = t.to_device(list(block), torch.device("cpu"))
    assert (x >= 0).all() and [(i if i >= 0 else -100) for i in block[:, 1:].flatten()] == y.flatten().tolist()
    p, q = (z.float().double().log_softmax(-1) for z in (student, teacher))
    each = [weights[0] * -p[i, j, y[i, j]] + weights[1] * (q[i, j].exp() * (q[i, j] - p[i, j])).sum() for i in range(2) for j in range(5) if y[i, j] >= 0]
    assert_close(t.distillation_loss(student, teacher, y, *weights), sum(each) / max(1, len(each)) + torch.zeros(()), 1e-5, noise=1e-7)


def test_evaluation_leaves_out_what_is_not_to_be_learned(tmp_path):
    s, encoding, model, ids = small_settings(tmp_path), g.load_tokenizer("bytes"), tiny_teacher(), np.random.default_rng(0).integers(0, 256, 17)
    masked = np.where(np.arange(17) % 3 == 0, ids, ~ids)
    got = t.evaluate(model, tiny_teacher(), t.Corpus(masked, masked, "", ""), encoding, s, torch.device(DEVICE))
    logp = model(torch.tensor(ids[None, :-1], device=DEVICE)).log_softmax(-1)[0]
    assert got["loss"] == pytest.approx(-sum(logp[i - 1, ids[i]].item() for i in range(3, 17, 3)) / 5, rel=1e-4)


def test_a_corpus_in_which_nothing_is_to_be_learned_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": "x" * 99}]}) for _ in range(40)))
    with pytest.raises(MilError, match="nothing to learn in the training part"):
        t.load_corpus(small_settings(tmp_path, data=[str(tmp_path / "a.jsonl")]), g.load_tokenizer("bytes"), "bytes")


def test_a_teacher_from_elsewhere_is_distilled_on_conversations_and_its_student_brings_the_tokenizer(tmp_path):
    v = 1 + max(token["id"] for token in FILES["smollm2"]["added_tokens"] + [dict(id=i) for i in FILES["smollm2"]["model"]["vocab"].values()])
    teacher = build(Config(v=v, d=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, context=64, tied=True), torch.float32)
    mil.save(teacher.bfloat16(), tmp_path / "ours", tokenizer="tokenizer.json")
    mil.export(tmp_path / "ours", tmp_path / "theirs", "hf")
    (tmp_path / "theirs" / "tokenizer.json").write_text(json.dumps(FILES["smollm2"]))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"the {i}?"}, {"role": "assistant", "content": f"then {i}"}]}) for i in range(90)))
    done = run_script("train_distill.py", "--teacher", tmp_path / "theirs", "--data", tmp_path / "a.jsonl", "--out", tmp_path / "o", "--context", "32", "--batch", "4", "--stage1_steps", "2",
                      "--stage2_steps", "0", "--eval_sequences", "4", "--device", DEVICE, "--dtype", "float32", "--prompt", "the")
    assert done.returncode == 0 and "of them to be learned" in done.stdout and "memory: about" in done.stdout and "stage 2" not in done.stdout, done.stderr + done.stdout
    student, encoding = g.load_with_tokenizer(tmp_path / "o" / "student", DEVICE)
    assert student.config.mixers == ["mamba2", "attention"] and g.chat_format(encoding) == "chatml" and student.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(student.embed_tokens.weight.cpu(), teacher.embed_tokens.weight.cpu().float())


def test_the_memory_said_beforehand_counts_weights_gradients_and_moments(tmp_path):
    config, s = Config(v=1000, d=64, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=100, context=16), small_settings(tmp_path, n_layers=4, keep=0.5, batch=2, context=16)
    count = lambda mixers: sum(w.numel() for w in mil.Hybrid(dataclasses.replace(config, mixers=mixers)).parameters())  # noqa: E731
    every, new = count(["mamba2", "attention"] * 2), sum(w.numel() for w in mil.Mamba2(config).parameters()) * 2
    for steps, trained in ((5, every), (0, new)):
        s.stage2_steps, s.mixer, s.dtype = steps, "mamba2", "bfloat16"
        parts = t.memory_needed(s, config, 77)
        assert (parts["teacher"], parts["student"], parts["gradients and AdamW"]) == (77, 6 * every, 12 * trained) and parts["activations"] > 0
    s.batch = 4
    assert t.memory_needed(s, config, 77)["activations"] == 2 * parts["activations"]
    assert "MORE THAN THERE IS" not in t.memory_line(s, config, 77, torch.device("cpu")) and "MORE THAN THERE IS" in t.memory_line(s, config, 2**60, torch.device("cpu"))


def test_a_list_of_conversations_in_one_piece_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "y"}]}]))
    with pytest.raises(MilError, match="a.json: a list in one piece; expected one record a line"):
        t.read_documents(tmp_path / "a.json", True)


def test_a_role_nobody_knows_and_messages_beside_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "messages": [{"role": "user", "content": "y"}]}))
    assert t.read_documents(tmp_path / "a.jsonl", True) == [[{"role": "user", "content": "y"}]]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "gpt", "content": "y"}]}))
    with pytest.raises(MilError, match="line 1 has a message of the role 'gpt', expected system, user, assistant or tool"):
        t.read_documents(tmp_path / "a.jsonl", True)


def test_another_chat_template_is_another_corpus(tmp_path):
    messages = [{"role": "user", "content": "the other"}, {"role": "assistant", "content": "hello"}] * 30
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    s = small_settings(tmp_path / "out", data=[str(tmp_path / "a.jsonl")])
    for template in ("x", "<|user|>"):   # the files' names, sizes and times and the vocabulary stay
        encoding = beside(tmp_path, "llama2", {"chat_template": template})
        assert t.load_corpus(s, encoding, "t").train[:40].tolist() == t.document_tokens(encoding, messages)[:40]


def test_evaluation_leaves_out_of_every_number_what_is_not_to_be_learned(tmp_path):
    s, encoding, device, ids = small_settings(tmp_path), g.load_tokenizer("bytes"), torch.device(DEVICE), np.random.default_rng(0).integers(0, 256, 17)
    masked, (model, teacher) = np.where(np.arange(17) % 3 == 0, ids, ~ids), (tiny_teacher(1), tiny_teacher(2))
    got = t.evaluate(model, teacher, t.Corpus(masked, masked, "", ""), encoding, s, device)
    with torch.no_grad():
        q, p = (m(torch.tensor(ids[None, :-1], device=DEVICE)).log_softmax(-1)[0, 2::3] for m in (model, teacher))
    assert got["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(got["loss"] / np.log(2))   # every token is a byte
    assert t.evaluate(model, model, t.Corpus(masked, masked, "", ""), encoding, s, device)["agreement"] == 1


@pytest.mark.parametrize("last", [2**15 - 1, 2**15, 40000])
def test_tokens_at_the_limits_of_16_bits_are_stored_whole_and_as_not_to_be_learned(tmp_path, last):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a\n" * 300, "completion": "b" * 300}) + "\n")
    ranks = {**{bytes([i]): i for i in range(256) if i != 10}, b"\n": last - 1}
    encoding = tiktoken.Encoding("large", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": last})
    got = t.load_corpus(small_settings(tmp_path / "out", data=[str(tmp_path / "a.jsonl")]), encoding, "large")
    assert got.val[-1] == last and got.train[1] == ~(last - 1)


def test_the_memory_of_a_student_of_some_layers_counts_all_of_it_as_trained(tmp_path):
    config = Config(v=1000, d=64, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=100, context=16)
    s = small_settings(tmp_path, n_layers=4, student_layers="0,3", keep=0.5, stage2_steps=0)   # the steps of stage 1 are its own
    every = sum(w.numel() for w in mil.Hybrid(dataclasses.replace(config, n_layers=2, mixers=["mamba2", "attention"])).parameters())
    parts = t.memory_needed(s, config, 77)
    assert (parts["student"], parts["gradients and AdamW"]) == (4 * every, 12 * every)   # in float32 there are no copies
