"""tests/reproduce.py: that its measures measure, that its arms train what they say, that its tables show the arms that they name."""
import ast
import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import reproduce as r
import torch
from conftest import DEVICE, build
from hypothesis import given
from hypothesis import strategies as st

import generate
import mil
import train_distill as td


# ---------------------------------------------------------------------------------------------------------------
# tests/reproduce.py: its text and its measures


@pytest.fixture
def lab(tmp_path):
    """A Lab of two layers and some text of its own, whose teacher has learned nothing."""
    lab = object.__new__(r.Lab)
    lab.size = dataclasses.replace(r.SMOKE, n_layers=2, d=16, context=64, batch=2, before=51, layer_steps=3, stage2_steps=5, step_tokens=256, short_context=64, teacher_steps=10,
                                   teacher_context=128, long_steps=5, written=12, prompts=5, depths=3, samples=2, lengths=(1,))
    lab.out, lab.device, lab.kind, lab.encoding = tmp_path, torch.device(DEVICE), torch.float32, generate.load_tokenizer("bytes")
    lab.s = td.Settings(out=str(tmp_path), context=64, batch=2, eval_sequences=2, dtype="float32", **{name: getattr(lab.size, name) for name in td.SIZES})
    td.complete(lab.s, lab.device)
    lab.run = td.Run(lab.s, lab.device)
    model = build(mil.Config(v=257, d=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, context=64), torch.float32)
    lab.source = SimpleNamespace(read=lambda: (model, model))
    tokens = np.random.default_rng(0).integers(0, 257, 2000).astype(np.int16)
    lab.corpus = lab.sweep_corpus = td.Corpus(tokens, tokens, [np.arange(0, 2000, 300)] * 2, "", "")
    text = lambda who: ["".join(f"def {who}_{i}({'x' * i}):\n    return {i}\n" for i in range(9))]  # noqa: E731
    lab.raw, lab.unseen = text("seen"), text("unseen")
    return lab


def test_no_note_comes_inside_a_line_that_goes_on():
    text = "".join(f"x_{i} = {i} + \\\n    1\n" for i in range(300))
    noted = r.with_notes(text, 200, r.random.Random(0))
    assert "\\\n#" not in noted and len(ast.parse(noted).body) == 300 and noted.count("\n# ") > 40


def test_needles_are_counted_for_each_depth(lab):
    lab.unseen = ["a = 1\n" * 500]
    model = SimpleNamespace(hidden=lambda tokens: tokens)

    def logits(tokens):  # finds what stands near the beginning
        out = []
        for row in model.rows:
            found = re.search(r"# \w\w=(\d{3})", bytes(row).decode())
            out.append([*found[1].encode()] if found.start() < 9 else [0] * 3)
        return torch.nn.functional.one_hot(torch.tensor(out, device=DEVICE), 257)
    model.logits, model.hidden = logits, lambda tokens: setattr(model, "rows", tokens.tolist()) or tokens
    assert lab.needles(model) == {64: [1, 0, 0]}


def test_what_is_written_is_judged_byte_by_byte_after_a_prompt_of_unseen_text(lab, monkeypatch):
    asked, written = [], [[*b"    pass\n"[:3 + i]] for i in range(5)]  # of unequal length
    monkeypatch.setattr(lab, "complete", lambda model, prompts, seed: asked.extend(prompts) or written, raising=False)
    nats, teacher = lab.writing(None)["teacher_nats"], lab.teacher
    assert all(re.search(rb"def unseen_\d\(x*\):\n$", bytes(prompt)) for prompt in asked) and len(asked) == 5
    with torch.no_grad():
        laws = [teacher(torch.tensor([prompt + text], device=DEVICE))[0].log_softmax(-1) for prompt, text in zip(asked, written)]
    want = [-sum(law[len(prompt) - 1 + i, c].item() for i, c in enumerate(text)) / len(text) for law, prompt, text in zip(laws, asked, written)]
    assert nats == pytest.approx(sum(want) / 5, rel=1e-4)


def test_of_two_answers_the_one_that_parses_is_preferred_and_only_where_the_other_does_not(lab, monkeypatch):
    lab.size.pairs, good, bad = 9, [*b"    return 1\nx"], [*b"    return (\nx"]
    first = {i: good if i % 2 or i == 8 else bad for i in range(9)}
    second = {i: bad if i % 2 else good for i in range(9)}  # the ninth is good twice
    monkeypatch.setattr(lab, "complete", lambda model, prompts, seed: [dict(first if seed == 11 else second)[i] for i in range(len(prompts))], raising=False)
    assert r.make_pairs(lab) == 8
    pairs = json.loads((lab.out / "pairs.json").read_text())
    assert [number for number, *_ in pairs] == [0] * 8
    for _, chosen, rejected in pairs:
        prompts = [[~i for i in ids if i < 0] for ids in (chosen, rejected)]
        assert prompts[0] == prompts[1] and re.search(rb"def seen_\d\(x*\):\n$", bytes(prompts[0]))
        assert [[i for i in ids if i >= 0] for ids in (chosen, rejected)] == [good, bad]


# ---------------------------------------------------------------------------------------------------------------
# Its arms


def test_the_teacher_goes_on_in_long_texts_from_where_it_was_in_short_ones_and_is_not_made_again(lab, monkeypatch):
    seen, fit = [], td.fit

    def watched(run, state, stage, models, batches, *more):
        seen.append((stage.name, run.s.context, run.s.batch, models.student.config.context, {k: w.detach().clone() for k, w in models.student.named_parameters()}, batches(0)[0][0].x.shape))
        fit(run, state, stage, models, batches, *more)
    monkeypatch.setattr(td, "fit", watched)
    lab.make_teacher()
    lab.make_teacher()
    assert len(seen) == 2
    short, long = (mil.load(lab.out / name, DEVICE, torch.float32) for name in ("short", "teacher"))
    assert [one[:4] + tuple(one[5:]) for one in seen] == [("teacher", 64, 4, 64, (4, 64)), ("teacher, long texts", 128, 2, 128, (2, 128))]
    assert (short.config.context, long.config.context) == (64, 128) and same(seen[1][4], dict(short.named_parameters()))
    assert not any(torch.equal(w, v) for w, v in zip(short.parameters(), long.parameters()))
    assert lab.teacher_tokens == 10 * 4 * 64 + 5 * 2 * 128
    lab.s = dataclasses.replace(lab.s, rope_theta=123.0)
    lab.make_teacher()
    assert len(seen) == 4 and mil.read_config(lab.out / "teacher")["config"].rope_theta == 123


@pytest.fixture
def fits(lab, monkeypatch):
    """Every td.fit in place of training: by the stage's name the stage, the student's weights before and after, which of them train, and the batches."""
    found = {}

    def fit(run, state, stage, models, batches, journal, *_):
        weights = lambda: {k: w.detach().clone() for k, w in models.student.named_parameters()}  # noqa: E731
        before, trains = weights(), {k for k, w in models.student.named_parameters() if w.requires_grad}
        with torch.no_grad():
            for w in models.student.parameters():
                w += 0.125 * w.requires_grad
        found[stage.name] = SimpleNamespace(stage=stage, before=before, after=weights(), trains=trains, batches=batches, seed=run.s.seed)
    monkeypatch.setattr(td, "fit", fit)
    monkeypatch.setattr(td, "evaluate", lambda *_: ({"perplexity": 2.0}, {"perplexity": 3.0, "kl": 0.5}))
    return found


def same(a, b, names=None):
    return all(torch.equal(a[k], b[k]) for k in names or a)


STEPWISE = r.Arm("arm", ((0,), (0, 1)), (0, 1), (0, 1))


def test_stage_2_begins_as_stage_1_left_the_student_and_the_next_layers_are_replaced_as_if_it_had_not_been(lab, fits):
    r.learn(lab, STEPWISE, 0, 1e-3, False)
    assert list(fits) == ["stage 1.1", "stage 2 after 1.1", "stage 1.2", "stage 2 after 1.2"]
    for i in (1, 2):
        assert same(fits[f"stage 2 after 1.{i}"].before, fits[f"stage 1.{i}"].after)
    mixer = [k for k in fits["stage 1.1"].trains]
    teacher = dict(lab.teacher.named_parameters())
    assert mixer and same(fits["stage 1.2"].before, fits["stage 1.1"].after, mixer) and same(fits["stage 1.2"].before, teacher, [k for k in teacher if "layers.0.mixer" not in k and "layers.1.mixer" not in k])


def test_a_row_counts_the_tokens_that_its_own_student_learned_from(lab, fits):
    rows, a_step = r.learn(lab, STEPWISE, 0, 1e-3, False), 2 * 64
    assert [(row["replaced"], row["stages"], row["tokens"] / a_step) for row in rows] == [(1, "1", 3), (1, "1 + 2", 8), (2, "1", 6), (2, "1 + 2", 11)]
    assert [row["share"] for row in rows] == [row["tokens"] / (10 * 4 * 64 + 5 * 2 * 128) for row in rows] and {row["ratio"] for row in rows} == {1.5}
    assert [fits[name].stage.steps for name in fits] == [3, 5, 3, 5] and [fits[name].stage.lr for name in fits] == pytest.approx([1e-3, 3e-3] * 2)


def test_an_arm_that_replaces_nothing_has_stage_2_alone(lab, fits):
    arm, = (arm for arm in r.arms(8, ("quality",)) if arm.name == "Llama")
    row, = r.learn(lab, dataclasses.replace(arm, judge=False), 0, None, False)
    (found,) = fits.values()
    assert (row["replaced"], row["stages"], row["tokens"]) == (0, "1 + 2", 5 * 2 * 64) and found.stage.lr == 3e-3 and same(found.before, dict(lab.teacher.named_parameters()))
    assert found.trains == {name for name, _ in lab.teacher.named_parameters()} and not any(torch.equal(found.before[k], found.after[k]) for k in found.trains)


def test_rates_are_chosen_on_text_that_nothing_else_is_measured_on(lab, fits, monkeypatch):
    seen, lab.sweep_corpus = [], dataclasses.replace(lab.corpus)
    monkeypatch.setattr(td, "evaluate", lambda run, models, corpus, encoding: seen.append(corpus) or ({"perplexity": 2.0}, {"perplexity": 3.0, "kl": 0.5}))
    for sweep in (True, False):
        r.learn(lab, STEPWISE, 0, 1e-3, sweep)
    assert [corpus is lab.sweep_corpus for corpus in seen] == [True] + [False] * 4 and all(corpus is lab.corpus for corpus in seen[1:])


def test_the_sweep_measures_the_end_of_stage_1_and_no_more(lab, fits):
    row, = r.learn(lab, dataclasses.replace(STEPWISE, report=(0,)), 0, 1e-3, True)
    assert list(fits) == ["stage 1.1", "stage 1.2"] and (row["replaced"], row["stages"], row["rate"]) == (2, "1", 1e-3)


def test_students_of_two_seeds_differ_in_what_they_read_and_in_what_they_begin_as(lab, fits):
    found = []
    for seed in (0, 1):
        r.learn(lab, r.Arm("arm", ((0,),), init="random"), seed, 1e-3, False)
        found.append((fits["stage 1.1"].batches(0)[0][0].x, fits["stage 1.1"].before["layers.0.mixer.in_proj.weight"]))
    assert not any(torch.equal(a, b) for a, b in zip(*found))


def test_linear_attention_stays_linear_when_all_parameters_train(lab, fits):
    r.learn(lab, dataclasses.replace(STEPWISE, mixer="mamba", linear=True), 0, 1e-3, False)
    for name, found in fits.items():
        for i in range(1 + ("1.2" in name)):
            assert (found.after[f"layers.{i}.mixer.A_log"] == -math.inf).all() and (found.after[f"layers.{i}.mixer.dt_proj.weight"] == 0).all()
            assert f"layers.{i}.mixer.A_log" not in found.trains and f"layers.{i}.mixer.in_proj_x.weight" in found.trains, name


def test_preferences_are_learned_after_stage_2_from_other_pairs_than_they_are_measured_on(lab, fits, monkeypatch):
    pairs, learned, held = [[[~1, i], [~1, 99 + i]] for i in range(16)], [], []
    (lab.out / "pairs.json").write_text(json.dumps([[i // 2, *pair] for i, pair in enumerate(pairs)]))  # two of each file
    monkeypatch.setattr(td, "pair_batches", lambda run, some, seed: learned.append([pairs.index(pair) for pair in some]) or "pairs")
    monkeypatch.setattr(td, "preferences", lambda run, stage, models, some: held.append([pairs.index(pair) for pair in some]) or {"preferred": len(held)})
    before, last = r.learn(lab, dataclasses.replace(STEPWISE, path=((0, 1),), report=(), then=(0,), prefer=(0,)), 0, 1e-3, False)
    numbers, = learned
    assert len(held) == 2 and held[0] == held[1] and sorted(numbers + held[0]) == [*range(16)] and {i // 2 for i in held[0]} == {0, 4}
    assert (before["preferred"], before["held_out"], last["preferred"], last["stages"]) == (1, 4, 2, "1 + 2 + 3")
    assert fits["stage 3"].stage.loss == "dpo" and fits["stage 3"].batches == "pairs" and same(fits["stage 3"].before, fits["stage 2 after 1.1"].after)


@pytest.mark.parametrize("name, layers", [("attention, 2 layers", [0, 7]), ("mamba2, 4 layers", [0, 2, 5, 7])])
def test_a_draft_has_the_teachers_first_and_last_layer_and_those_between_evenly(lab, fits, monkeypatch, name, layers):
    kept, lab.size.n_layers = [], 8
    monkeypatch.setattr(mil, "keep_layers", lambda teacher, some: kept.append(some) or teacher)
    monkeypatch.setattr(td, "assemble", lambda run, teacher, base, stage, *_: kept.append(stage.mixers) or td.Models(teacher, base))
    monkeypatch.setattr(td, "save_student", lambda *_: None)
    row, = r.make_draft(lab, name)
    assert kept == [layers, [name.split(",")[0]] * len(layers)] and row["stages"] == "draft" and fits[name].stage.train == "all"


# ---------------------------------------------------------------------------------------------------------------
# Its tables


@given(st.lists(st.integers(-999, 999), min_size=3, max_size=3, unique=True))
def test_three_students_are_judged_beside_one_model_by_two_degrees_of_freedom(values):
    a, table = [v / 7 for v in values], r.Table("t", "T", ["a"])
    middle, error = r.mean([dict(kl=v) for v in a], "kl")
    for times in (4.2, 4.4):
        table.claim("what", [dict(kl=v) for v in a], [dict(kl=middle + times * error)])
    assert [claim[2] for claim in table.claims] == ["within the error", "holds"]


def test_a_student_is_compared_with_itself():
    table, before = r.Table("t", "T", ["a"]), [dict(kl=v, seed=seed) for seed, v in enumerate((1, 5, 9))]
    for gains in ((1, 1.1, 0.9), (1, -1, 3)):
        table.claim("what", [dict(kl=row["kl"] - gain, seed=row["seed"]) for row, gain in reversed([*zip(before, gains)])], before, paired=True)
    assert [claim[2] for claim in table.claims] == ["holds", "within the error"]


def test_students_that_all_miss_as_often_are_not_certain_to():
    table = r.Table("t", "T", ["a"])
    for missed, trials in ((63 / 64, 64), (63 / 64, 10**6), (0, 64)):
        table.claim("what", [dict(kl=missed)] * 3, [dict(kl=1)], trials=trials)
    assert [claim[2] for claim in table.claims] == ["within the error", "holds", "holds"]


def test_a_claim_knows_the_errors_of_both_sides():
    table = r.Table("t", "T", ["a"])
    for a, b, verdict in (((0, 2), (6, 8), "within the error"), ((0, 2), (6.2, 8.2), "holds"), ((0, 2), (14, 14), "holds"), ((0, 2), (13.6, 13.6), "within the error")):  # 4.30 × √2, and of one side's error alone 12.71 × 1
        table.claim("what", [dict(kl=v) for v in a], [dict(kl=v) for v in b])
        assert table.claims[-1][2] == verdict


@pytest.fixture
def figures():
    """Rows of every arm at every place it is measured at, the KL of each its own; and what it is."""
    rows, kls = r.Rows(), {}
    for arm in r.arms(8, r.TABLES):
        for stages, at in (("1", arm.report), ("1 + 2", arm.then), ("1 + 2 + 3", arm.prefer)):
            for i in {k % len(arm.path) for k in at}:
                key = arm.name, len(arm.path[i]), stages
                kls.setdefault(key, (len(kls) + 1) / 1000)
                more = {"1 + 2": dict(preferred=0.3, held_out=7), "1 + 2 + 3": dict(preferred=0.9)}.get(stages, {})
                rows += [dict(arm=arm.name, seed=error > 0, replaced=key[1], stages=stages, kl=kls[key] + error, perplexity=1 + kls[key], ratio=1, agreement=kls[key], parses=kls[key], length=9,
                              teacher_nats=1, rate=1, share=0.5, **more) for error in (-1e-5, 1e-5)]
    return rows, kls


TEACHER = dict(perplexity=1, parses=1, length=1, teacher_nats=1, real_parses=1, real_length=1)
HALF = {"stepwise": "half, stepwise", "at once": "half, at once", "first": "half, the first layers", "last": "half, the last layers"}


def test_the_tables_show_the_rows_of_the_arms_that_they_name(figures):
    rows, kls = figures
    shown = lambda table, *names: {tuple(row[table.columns.index(name)] for name in names): row[table.columns.index("KL")].split(" ")[0] for row in table.rows}  # noqa: E731
    cell = lambda *key: f"{kls[key]:.4f}"  # noqa: E731
    got = shown(r.order(rows, 8, {}), "attention", "which layers keep it", "replaced")
    assert got == {(kept, *what): cell(HALF[arm].replace("half", share), c, "1") for kept, share, c in (("50 %", "half", 4), ("25 %", "quarter", 6)) for what, arm in (
        (("evenly spread", "stepwise"), "stepwise"), (("evenly spread", "at once"), "at once"), (("the last", "stepwise"), "first"), (("the first", "stepwise"), "last"))}
    got = shown(r.init(rows, 8, {}), "attention", "new layers from", "MLPs")
    assert got == {(kept, begin, mlps): cell(arm, c, "1")[:-1] for kept, c in (("50 %", 4), ("0 %", 8)) for begin, mlps, arm in (
        ("attention", "frozen", "mamba2"), ("random", "frozen", "random, mixers"), ("attention", "trained", "attention, mlps"), ("random", "trained", "random, mlps"))}
    got = shown(r.mixer(rows, 8, {}), "in its place")
    assert got == {(name,): cell(f"half, {arm}", 4, "1 + 2") for name, arm in (("Mamba-2", "stepwise"), ("Mamba", "Mamba"), ("Mamba with A = 0, Δ = 1", "linear attention"), ("nothing", "nothing"))}
    got = shown(r.quality(rows, 8, TEACHER), "student", "attention")
    assert got == {("teacher", "100 %"): "0", ("Llama", "100 %"): cell("Llama", 0, "1 + 2"), **{(name, kept): cell(name, c, "1 + 2") for name in ("mamba2", "mamba") for kept, c in (("50 %", 4), ("25 %", 6), ("12.5 %", 7), ("0 %", 8))}}
    table = r.stages(rows, 8, {})
    assert shown(table, "stages") == {("1, as long as 1 + 2",): cell("half, stage 1 longer", 4, "1"), **{(name,): cell("half, stepwise", 4, name) for name in ("1", "1 + 2", "1 + 2 + 3")}}
    assert [row[-1] for row in table.rows] == ["–", "–", "30.0 ± 0.0 %", "90.0 ± 0.0 %"] and table.notes[0].startswith("preferred: of 7 pairs")


def test_the_claims_compare_the_rows_of_the_arms_that_they_name(figures):
    rows, kls = figures
    found = {what: (said, verdict) for table in (r.init(rows, 8, {}), r.order(rows, 8, {}), r.mixer(rows, 8, {}), r.quality(rows, 8, TEACHER), r.stages(rows, 8, {}))
             for what, said, verdict in table.claims if said.startswith("kl ")}
    names, want = {("attention", "frozen"): "mamba2", ("random", "frozen"): "random, mixers", ("attention", "trained"): "attention, mlps", ("random", "trained"): "random, mlps"}, {}
    for kept, c in (("50 %", 4), ("0 %", 8)):
        for mlps in ("frozen", "trained"):
            want[f"{kept}, MLPs {mlps}: attention's weights beat random ones"] = (names["attention", mlps], c, "1"), (names["random", mlps], c, "1")
        for begin in ("attention", "random"):
            want[f"{kept}, from {begin}: frozen MLPs beat trained ones"] = (names[begin, "frozen"], c, "1"), (names[begin, "trained"], c, "1")
        want[f"(not the paper's) {kept} of attention: Mamba-2 is nearer to the teacher than Mamba"] = ("mamba2", c, "1 + 2"), ("mamba", c, "1 + 2")
    for kept, c, share in (("50 %", 4, "half"), ("25 %", 6, "quarter")):
        for what, arm in (("stepwise beats at once", "at once"), ("attention spread evenly beats attention in the last layers", "first"), ("attention spread evenly beats attention in the first layers", "last")):
            want[f"{kept}: {what}"] = (f"{share}, stepwise", c, "1"), (HALF[arm].replace("half", share), c, "1")
    for what, a, b in (("Mamba beats nothing", "Mamba", "nothing"), ("Mamba-2 beats nothing", "stepwise", "nothing"), ("(not the paper's) Mamba beats linear attention", "Mamba", "linear attention")):
        want[what] = (f"half, {a}", 4, "1 + 2"), (f"half, {b}", 4, "1 + 2")
    for name in ("mamba2", "mamba"):
        for (a, b), (x, y) in zip((("50", "25"), ("25", "12.5"), ("12.5", "0")), ((4, 6), (6, 7), (7, 8))):
            want[f"{name}: {a} % of attention is nearer to the teacher than {b} %"] = (name, x, "1 + 2"), (name, y, "1 + 2")
    want["stage 2 is nearer to the teacher than as many more steps of stage 1"] = ("half, stepwise", 4, "1 + 2"), ("half, stage 1 longer", 4, "1")
    assert found == {what: (f"kl {kls[a]:.4g} and {kls[b]:.4g}", "holds" if kls[a] < kls[b] else "the opposite holds") for what, (a, b) in want.items()}


def test_preferences_and_stage_2_are_claimed_to_do_what_the_paper_says_of_them(figures):
    for parses, kl, verdict in ((0.9, 1e-6, "holds"), (0.0, 9, "the opposite holds")):
        rows = r.Rows({**row, "parses": parses + row["kl"] / 1e3 if row["stages"] == "1 + 2 + 3" else 0.5, "kl": kl + row["kl"] / 1e3 if row["stages"] == "1 + 2" else row["kl"]} for row in figures[0])
        assert [claim[2] for claim in r.stages(rows, 8, {}).claims] == [verdict] * 2


def test_of_long_texts_it_is_claimed_what_is_missed_and_what_perplexes_at_the_greatest_length():
    row = lambda found, last, seed=0, samples=100: dict(arm="mamba", seed=seed, replaced=4, stages="1 + 2", context=64, teacher_context=128, samples=samples,  # noqa: E731
                                                        needles={64: [1, 1], 128: found}, by_length={64: 1.8, 128: last})
    students = r.Rows([row([1, 0.5], 2.5), row([1, 0.52], 2.6, 1)])
    needles, texts = r.long(students, 8, row([0, 0.5], 9.0))
    few, _ = r.long(students, 8, row([0, 0.5], 9.0, samples=2))  # four needles a model say nothing
    assert [claim[2] for claim in few.claims] == ["within the error"] and "at 128 bytes, the teacher finds 25%" in few.notes[0]
    assert [line[:2] + line[-1:] for line in needles.rows if line[-1] != "–"] == [["teacher", "100 %", "25 %"], ["mamba", "50 %", "76 ± 1 %"]]
    assert [line[2:] for line in texts.rows if line[-1] != "–"] == [["1.80", "9.00"], ["1.80 ± 0.00", "2.55 ± 0.05"]]
    assert [claim[1:] for claim in needles.claims] == [("missed 0.245 and 0.75", "holds")]
    assert [claim[1:] for claim in texts.claims] == [("perplexity 2.55 and 9", "holds"), ("perplexity 2.55 and 1.8", "the opposite holds")]


def test_students_are_ranked_by_what_they_write_from_the_best(figures):
    assert r.quality(figures[0], 8, TEACHER).notes[0].startswith("rank correlation of these 8 kinds of student by perplexity with those by kl 1.00, by parses -1.00")  # who is worse parses more there
    assert r.rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8) and r.rank_correlation([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(0.8 ** 0.5)
    assert math.isnan(r.rank_correlation([1, 2, 3], [5, 5, 5]))


def test_a_rate_at_an_end_of_those_that_were_tried_has_a_star():
    assert (r.rate([dict(rate=0.012, edge=True)]), r.rate([dict(rate=3e-3, edge=False)]), r.rate([])) == ("0.012*", "0.003", "–")
