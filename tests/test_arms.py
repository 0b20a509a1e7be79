"""tests/reproduce.py: that its measures measure, that its arms train what they say, that its tables show the arms that they name."""

import ast
import copy
import dataclasses
import io
import json
import math
import re
import sys
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

# --------------------------------------------------------------------------------------------------
# tests/reproduce.py: its text and its measures


@pytest.fixture
def lab(tmp_path):
    """A Lab of two layers and some text of its own, whose teacher has learned nothing."""
    lab = object.__new__(r.Lab)
    lab.size = dataclasses.replace(
        r.SMOKE,
        n_layers=2,
        d=16,
        context=64,
        batch=2,
        before=51,
        layer_steps=3,
        stage2_steps=5,
        step_tokens=256,
        short_context=64,
        teacher_steps=10,
        teacher_context=128,
        long_steps=5,
        written=12,
        prompts=5,
        depths=3,
        samples=2,
        lengths=(1,),
    )
    lab.out, lab.device, lab.kind, lab.encoding = (
        tmp_path,
        torch.device(DEVICE),
        torch.float32,
        generate.load_tokenizer("bytes"),
    )
    lab.s = td.Settings(
        out=str(tmp_path),
        context=64,
        batch=2,
        eval_sequences=2,
        dtype="float32",
        teacher_steps=10,
        **{name: getattr(lab.size, name) for name in td.SIZES},
    )
    td.complete(lab.s, lab.device)
    lab.run = td.Run(lab.s, lab.device)
    model = build(
        mil.Config(v=257, d=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, context=64),
        torch.float32,
    )
    lab.teacher = model
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

    def lm_head(tokens):  # finds what stands near the beginning
        out = []
        for row in model.rows:
            found = re.search(r"# \w\w=(\d{3})", bytes(row).decode())
            out.append([*found[1].encode()] if found.start() < 9 else [0] * 3)
        return torch.nn.functional.one_hot(torch.tensor(out, device=DEVICE), 257)

    model.lm_head, model.hidden = (
        lm_head,
        lambda tokens: setattr(model, "rows", tokens.tolist()) or tokens,
    )
    assert lab.needles(model) == {64: [1, 0, 0]}


def test_beyond_what_it_was_trained_on_attentions_scores_grow_as_the_logarithm_of_the_length():
    model = build(
        mil.Config(
            v=257,
            d=16,
            n_layers=2,
            n_heads=2,
            n_kv_heads=1,
            d_ff=8,
            context=64,
            mixers=["attention", "mamba2"],
        ),
        torch.float32,
    )
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    for length, trained, times in (
        (4096, 64, 2),
        (1000, 64, math.log(1000) / math.log(64)),
        (64, 4096, 1),
        (64, 64, 1),
        (64, 0, 1),
    ):
        with pytest.raises(OSError), r.sharper(model, length, trained):
            assert {
                name for name, w in model.named_parameters() if not torch.equal(w, before[name])
            } == ({"layers.0.mixer.q_proj.weight"} if times > 1 else set())
            assert torch.allclose(
                model.layers[0].mixer.q_proj.weight, times * before["layers.0.mixer.q_proj.weight"]
            )
            raise OSError
        assert same(before, dict(model.named_parameters()))


def test_every_length_is_read_as_sharp_as_it_says_by_the_model_that_is_measured(lab, monkeypatch):
    lab.unseen, lab.size = (
        ["abc = 1\n" * 500],
        dataclasses.replace(lab.size, lengths=(1, 4), windows=2),
    )
    model, seen = build(lab.teacher.config, torch.float32, seed=1), set()
    weight, hidden = model.layers[1].mixer.q_proj.weight, model.hidden
    before = weight.detach().clone()
    monkeypatch.setattr(
        model,
        "hidden",
        lambda tokens: (
            seen.add((tokens.shape[1], round((weight / before).median().item(), 3)))
            or hidden(tokens)
        ),
    )
    for measure, lengths in ((lab.needles, (63, 255)), (lab.by_length, (64, 256))):
        for trained, times in ((64, 1.333), (0, 1)):  # 256 is 2 to the 8th, 64 to the 6th
            seen.clear()
            measure(model, trained)
            assert seen == {(lengths[0], 1), (lengths[1], times)}


def test_all_processes_look_for_the_same_needles_in_the_same_texts(lab):
    lab.unseen = ["".join(f"x_{i} = {i}\n" for i in range(500))]
    other = copy.copy(lab)
    assert all(
        torch.equal(a, b) for a, b in zip(lab.haystacks.values(), other.haystacks.values())
    ) and torch.equal(lab.windows, other.windows)


def test_what_is_written_is_judged_byte_by_byte_after_a_prompt_of_unseen_text(lab, monkeypatch):
    asked, written = [], [[*b"    pass\n"[: 3 + i]] for i in range(5)]  # of unequal length
    monkeypatch.setattr(
        lab,
        "complete",
        lambda model, prompts, seed: asked.extend(prompts) or written,
        raising=False,
    )
    nats, teacher = lab.writing(None)["teacher_nats"], lab.teacher
    assert (
        all(re.search(rb"def unseen_\d\(x*\):\n$", bytes(prompt)) for prompt in asked)
        and len(asked) == 5
    )
    with torch.no_grad():
        laws = [
            teacher(torch.tensor([prompt + text], device=DEVICE))[0].log_softmax(-1)
            for prompt, text in zip(asked, written)
        ]
    want = [
        -sum(law[len(prompt) - 1 + i, c].item() for i, c in enumerate(text)) / len(text)
        for law, prompt, text in zip(laws, asked, written)
    ]
    assert nats == pytest.approx(sum(want) / 5, rel=1e-4)


def test_needles_lie_from_the_beginning_to_the_end(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(
        lab,
        "haystack",
        lambda length, depth, dice: seen.append(depth) or [0] * length,
        raising=False,
    )
    lab.needles(
        SimpleNamespace(
            hidden=lambda tokens: tokens,
            lm_head=lambda tokens: torch.zeros(*tokens.shape, 257, device=DEVICE),
        )
    )
    assert seen == [0, 0, 0.5, 0.5, 1, 1]


def test_all_prompts_are_answered_in_their_order_each_64_of_them_with_a_seed_of_their_own(
    lab, monkeypatch
):
    seeds, prompts = [], [[i] for i in range(130)]

    class Decoder:
        def __init__(self, model, rows, room, temperature, generator):
            seeds.append(generator.initial_seed())
            assert temperature == 0.8

        def decode(self, part, most):
            yield [list(prompt) for prompt in part]
            yield [[most] if prompt[0] % 2 else [] for prompt in part]

    monkeypatch.setattr(generate, "Decoder", Decoder)
    monkeypatch.setattr(lab, "decoding", lambda model: model, raising=False)
    assert (
        lab.complete(None, prompts, 7) == [[i] + [lab.size.written] * (i % 2) for i in range(130)]
        and len({*seeds}) == len(seeds) == 3
    )


def test_of_many_functions_each_is_judged_after_its_own_prompt_and_apart_from_the_real_ones(
    lab, monkeypatch
):
    lab.size.prompts, lab.size.written, lab.unseen, asked = (
        70,
        13,
        [f"def f({'x' * (i % 20)}):\n    return {i % 10}\n" for i in range(70)],
        [],
    )
    written = [[*(b"    pass\n", b"    (\n# kd=582\n")[i % 2]] for i in range(70)]
    monkeypatch.setattr(
        lab,
        "complete",
        lambda model, prompts, seed: asked.extend(prompts) or written,
        raising=False,
    )
    monkeypatch.setattr(
        lab, "losses", lambda model, tokens: tokens[:, 1:].float(), raising=False
    )  # a token's loss is its number
    found = lab.writing(None)
    assert len({len(prompt) for prompt in asked}) > 9
    assert found["teacher_nats"] == pytest.approx(
        sum(sum(text) / len(text) for text in written) / 70
    )
    assert (found["parses"], found["real_parses"], found["length"], found["real_length"]) == (
        0.5,
        1,
        (8 + 5) / 2,
        12,
    )


def test_of_two_answers_the_one_that_parses_is_preferred_and_only_where_the_other_does_not(
    lab, monkeypatch
):
    lab.size.pairs, good, bad = 9, [*b"    return 1\nx"], [*b"    return (\nx"]
    first = {i: good if i % 2 or i == 8 else bad for i in range(9)}
    second = {i: bad if i % 2 else good for i in range(9)}  # the ninth is good twice
    monkeypatch.setattr(
        lab,
        "complete",
        lambda model, prompts, seed: [
            dict(first if seed == 11 else second)[i] for i in range(len(prompts))
        ],
        raising=False,
    )
    assert r.make_pairs(lab) == 8
    pairs = json.loads((lab.out / "pairs.json").read_text())
    assert [number for number, *_ in pairs] == [0] * 8
    for _, chosen, rejected in pairs:
        prompts = [[~i for i in ids if i < 0] for ids in (chosen, rejected)]
        assert prompts[0] == prompts[1] and re.search(rb"def seen_\d\(x*\):\n$", bytes(prompts[0]))
        assert [[i for i in ids if i >= 0] for ids in (chosen, rejected)] == [good, bad]


# --------------------------------------------------------------------------------------------------
# Its arms


def test_the_teacher_goes_on_in_long_texts_from_where_it_was_in_short_ones_and_is_not_made_again(
    lab, monkeypatch
):
    seen, fit = [], td.fit

    def watched(run, state, stage, models, batches, *more):
        seen.append(
            (
                stage.name,
                run.s.context,
                run.s.batch,
                models.student.config.context,
                {k: w.detach().clone() for k, w in models.student.named_parameters()},
                batches(0)[0][0].x.shape,
            )
        )
        fit(run, state, stage, models, batches, *more)

    monkeypatch.setattr(td, "fit", watched)
    lab.make_teacher()
    lab.make_teacher()
    assert len(seen) == 2
    short, long = (mil.load(lab.out / name, DEVICE, torch.float32) for name in ("short", "teacher"))
    assert [one[:4] + tuple(one[5:]) for one in seen] == [
        ("teacher", 64, 4, 64, (4, 64)),
        ("teacher, long texts", 128, 2, 128, (2, 128)),
    ]
    assert (short.config.context, long.config.context) == (64, 128) and same(
        seen[1][4], dict(short.named_parameters())
    )
    assert not any(torch.equal(w, v) for w, v in zip(short.parameters(), long.parameters()))
    assert lab.teacher_tokens == 10 * 4 * 64 + 5 * 2 * 128
    lab.s = dataclasses.replace(lab.s, rope_theta=123.0)
    lab.make_teacher()
    assert len(seen) == 4 and mil.read_config(lab.out / "teacher")["config"].rope_theta == 123


def test_of_the_teachers_channels_those_turn_that_turn_twice_within_a_length(lab):
    lab.size.rope_still = 100
    lab.make_teacher()
    config = mil.read_config(lab.out / "teacher")["config"]
    a_turn = [
        2 * math.pi * config.rope_theta ** (i / 4) for i in range(4)
    ]  # 6, 63, 628 and 6283 bytes; a head has four pairs
    assert [100 / turn > 2 for turn in a_turn] == [True, False, False, False]
    cos, sin = mil.rope_angles(config, torch.tensor([[0, 1, 100, 5000]]))
    assert (
        (cos[..., 1:] > 0.9999).all()
        and sin[..., 1:].abs().max() < 1e-4
        and torch.allclose(cos[0, 0, :, 0], torch.tensor([0, 1, 100, 5000.0]).cos(), atol=1e-4)
    )
    lab.size.rope_still = 300  # neither the teacher's 64 nor its 128 have the same channels turn
    lab.make_teacher()
    assert (
        mil.rope_angles(mil.read_config(lab.out / "teacher")["config"], torch.tensor([[5000]]))[
            1
        ].abs()
        > 1e-2
    ).flatten().tolist() == [True, True, False, False]
    lab.size = r.changed(lab.size, ["rope_still=0", "n_layers=8"])
    lab.size.n_layers = 2
    lab.make_teacher()
    assert mil.read_config(lab.out / "teacher")["config"].rope_scaling is None


def test_the_teachers_two_stages_read_by_seeds_of_their_own_the_second_at_a_third_of_the_rate_and_is_made_again_for_other_steps(
    lab, monkeypatch
):
    seeds, rates, batches = [], [], td.training_batches
    monkeypatch.setattr(
        td,
        "training_batches",
        lambda run, corpus, seed: seeds.append(tuple(seed)) or batches(run, corpus, seed),
    )
    monkeypatch.setattr(
        td, "fit", lambda run, state, stage, *_: rates.append((stage.name, stage.lr, stage.steps))
    )
    monkeypatch.setattr(td, "evaluate", lambda *_: ({}, {}))
    for lab.size.long_steps in (5, 5, 6):
        lab.make_teacher()
    assert (
        [name for name, *_ in rates] == ["teacher"] + ["teacher, long texts"] * 2
        and [steps for *_, steps in rates] == [10, 5, 6]
        and len({*seeds}) == 2
    )
    assert rates[1][1] == rates[2][1] == pytest.approx(rates[0][1] / 3)


@pytest.fixture
def fits(lab, monkeypatch):
    """Every td.fit in place of training: by the stage's name the stage, the student's weights before and after, which of them train, and the batches."""
    found = {}

    def fit(run, state, stage, models, batches, journal, *_):
        weights = lambda: {k: w.detach().clone() for k, w in models.student.named_parameters()}  # noqa: E731
        before, trains = (
            weights(),
            {k for k, w in models.student.named_parameters() if w.requires_grad},
        )
        with torch.no_grad():
            for w in models.student.parameters():
                w += 0.125 * w.requires_grad
        found[stage.name] = SimpleNamespace(
            stage=stage,
            before=before,
            after=weights(),
            trains=trains,
            batches=batches,
            seed=run.s.seed,
        )

    monkeypatch.setattr(td, "fit", fit)
    monkeypatch.setattr(
        td, "evaluate", lambda *_: ({"perplexity": 2.0}, {"perplexity": 3.0, "kl": 0.5})
    )
    return found


def same(a, b, names=None):
    return all(torch.equal(a[k], b[k]) for k in names or a)


STEPWISE = r.Arm("arm", ((0,), (0, 1)), (0, 1), (0, 1))


def test_stage_2_begins_as_stage_1_left_the_student_and_the_next_layers_are_replaced_as_if_it_had_not_been(
    lab, fits
):
    r.learn(lab, STEPWISE, 0, 1e-3, False)
    assert list(fits) == ["stage 1.1", "stage 2 after 1.1", "stage 1.2", "stage 2 after 1.2"]
    for i in (1, 2):
        assert same(fits[f"stage 2 after 1.{i}"].before, fits[f"stage 1.{i}"].after)
    mixer = [k for k in fits["stage 1.1"].trains]
    teacher = dict(lab.teacher.named_parameters())
    assert (
        mixer
        and same(fits["stage 1.2"].before, fits["stage 1.1"].after, mixer)
        and same(
            fits["stage 1.2"].before,
            teacher,
            [k for k in teacher if "layers.0.mixer" not in k and "layers.1.mixer" not in k],
        )
    )


def test_a_row_counts_the_tokens_that_its_own_student_learned_from(lab, fits):
    rows, a_step = r.learn(lab, STEPWISE, 0, 1e-3, False), 2 * 64
    assert [(row["replaced"], row["stages"], row["tokens"] / a_step) for row in rows] == [
        (1, "1", 3),
        (1, "1 + 2", 8),
        (2, "1", 6),
        (2, "1 + 2", 11),
    ]
    assert [row["share"] for row in rows] == [
        row["tokens"] / (10 * 4 * 64 + 5 * 2 * 128) for row in rows
    ] and {row["ratio"] for row in rows} == {1.5}
    assert [fits[name].stage.steps for name in fits] == [3, 5, 3, 5] and [
        fits[name].stage.lr for name in fits
    ] == pytest.approx([1e-3, 3e-3] * 2)


def test_an_arm_that_replaces_nothing_has_stage_2_alone(lab, fits):
    (arm,) = (arm for arm in r.arms(8, ("quality",)) if arm.name == "Llama")
    (row,) = r.learn(lab, dataclasses.replace(arm, judge=False), 0, None, False)
    (found,) = fits.values()
    assert (
        (row["replaced"], row["stages"], row["tokens"]) == (0, "1 + 2", 5 * 2 * 64)
        and found.stage.lr == 3e-3
        and same(found.before, dict(lab.teacher.named_parameters()))
    )
    assert found.trains == {name for name, _ in lab.teacher.named_parameters()} and not any(
        torch.equal(found.before[k], found.after[k]) for k in found.trains
    )


def test_rates_are_chosen_on_text_that_nothing_else_is_measured_on(lab, fits, monkeypatch):
    seen, lab.sweep_corpus = [], lab.corpus._replace()
    monkeypatch.setattr(
        td,
        "evaluate",
        lambda run, models, corpus, encoding: (
            seen.append(corpus) or ({"perplexity": 2.0}, {"perplexity": 3.0, "kl": 0.5})
        ),
    )
    for sweep in (True, False):
        r.learn(lab, STEPWISE, 0, 1e-3, sweep)
    assert [corpus is lab.sweep_corpus for corpus in seen] == [True] + [False] * 4 and all(
        corpus is lab.corpus for corpus in seen[1:]
    )


def test_the_sweep_measures_the_end_of_stage_1_and_no_more(lab, fits):
    (row,) = r.learn(lab, dataclasses.replace(STEPWISE, report=(0,)), 0, 1e-3, True)
    assert list(fits) == ["stage 1.1", "stage 1.2"] and (
        row["replaced"],
        row["stages"],
        row["rate"],
    ) == (2, "1", 1e-3)


def test_students_of_two_seeds_differ_in_what_they_read_and_in_what_they_begin_as(lab, fits):
    found = []
    for seed in (0, 1):
        r.learn(lab, r.Arm("arm", ((0,),), init="random"), seed, 1e-3, False)
        found.append(
            (
                fits["stage 1.1"].batches(0)[0][0].x,
                fits["stage 1.1"].before["layers.0.mixer.in_proj.weight"],
            )
        )
    assert not any(torch.equal(a, b) for a, b in zip(*found))


def test_linear_attention_stays_linear_when_all_parameters_train(lab, fits):
    r.learn(lab, dataclasses.replace(STEPWISE, mixer="mamba", linear=True), 0, 1e-3, False)
    for name, found in fits.items():
        for i in range(1 + ("1.2" in name)):
            assert (found.after[f"layers.{i}.mixer.A_log"] == -math.inf).all() and (
                found.after[f"layers.{i}.mixer.dt_proj.weight"] == 0
            ).all()
            assert (
                f"layers.{i}.mixer.A_log" not in found.trains
                and f"layers.{i}.mixer.in_proj_x.weight" in found.trains
            ), name


def test_preferences_are_learned_after_stage_2_from_other_pairs_than_they_are_measured_on(
    lab, fits, monkeypatch
):
    pairs, learned, held = [[[~1, i], [~1, 99 + i]] for i in range(16)], [], []
    (lab.out / "pairs.json").write_text(
        json.dumps([[i // 2, *pair] for i, pair in enumerate(pairs)])
    )  # two of each file
    monkeypatch.setattr(
        td,
        "pair_batches",
        lambda run, some, seed: learned.append([pairs.index(pair) for pair in some]) or "pairs",
    )
    monkeypatch.setattr(
        td,
        "preferences",
        lambda run, stage, models, some: (
            held.append([pairs.index(pair) for pair in some]) or {"preferred": len(held)}
        ),
    )
    before, last = r.learn(
        lab,
        dataclasses.replace(STEPWISE, path=((0, 1),), report=(), then=(0,), prefer=(0,)),
        0,
        1e-3,
        False,
    )
    (numbers,) = learned
    assert (
        len(held) == 2
        and held[0] == held[1]
        and sorted(numbers + held[0]) == [*range(16)]
        and {i // 2 for i in held[0]} == {0, 4}
    )
    assert (before["preferred"], before["held_out"], last["preferred"], last["stages"]) == (
        1,
        4,
        2,
        "1 + 2 + 3",
    )
    assert (
        fits["stage 3"].stage.loss == "dpo"
        and fits["stage 3"].batches == "pairs"
        and same(fits["stage 3"].before, fits["stage 2 after 1.1"].after)
    )


def test_no_number_draws_in_two_students(lab, fits, monkeypatch):
    assemble, drawn, seeds = td.assemble, {}, (0, 1, 2, r.SWEEP)
    monkeypatch.setattr(
        td,
        "assemble",
        lambda run, teacher, base, stage, number, trained: (
            drawn.setdefault(seed, set()).add(run.s.seed + number)
            or assemble(run, teacher, base, stage, number, trained)
        ),
    )
    for seed in seeds:
        r.learn(lab, STEPWISE, seed, 1e-3, False)
    assert [len(drawn[seed]) for seed in seeds] == [4] * 4 and len(
        set().union(*drawn.values())
    ) == 16
    assert min(map(min, drawn.values())) - lab.s.seed > 99


def test_a_longer_stage_1_is_longer_in_its_last_step(lab, fits):
    r.learn(lab, dataclasses.replace(STEPWISE, report=(1,), then=(), longer=True), 0, 1e-3, False)
    assert [found.stage.steps for found in fits.values()] == [3, 3 + 5]


def test_what_is_judged_is_the_student_and_what_is_kept_the_first_ones_after_stage_2(
    lab, fits, monkeypatch
):
    (lab.out / "pairs.json").write_text(json.dumps([[i, [~1, i], [~1, 99 + i]] for i in range(8)]))
    monkeypatch.setattr(td, "preferences", lambda *_: {})
    for name in ("writing", "needles", "by_length"):
        monkeypatch.setattr(
            lab,
            name,
            lambda model, trained=0, name=name: (
                {name: model.config.mixers}
                if name == "writing"
                else [*model.config.mixers, *[trained] * bool(trained)]
            ),
            raising=False,
        )
    saved, student = [], [["mamba2", "attention"], ["mamba2", "mamba2"]]
    monkeypatch.setattr(
        td,
        "save_student",
        lambda run, student, place, *_: saved.append(
            (place.name, {k: w.detach().clone() for k, w in student.named_parameters()})
        ),
    )
    for seed in (0, 1):
        rows = r.learn(
            lab,
            dataclasses.replace(STEPWISE, report=(), prefer=(1,), judge=True),
            seed,
            1e-3,
            False,
        )
        assert [(row["writing"], row["needles"], row["by_length"]) for row in rows] == [
            (m,) * 3 for m in (student[0], student[1], student[1])
        ]
        assert [row.get("sharper") for row in rows] == [
            dict.fromkeys(("needles", "by_length"), [*student[0], 64]),
            None,
            None,
        ]  # from the length of distillation on; not without attention
        assert [name for name, _ in saved] == ["arm-1", "arm-2"] and {
            row["tokens"] for row in rows[1:]
        } == {11 * 2 * 64}
        assert (
            fits["stage 3"].stage.steps,
            fits["stage 3"].stage.beta,
            fits["stage 3"].stage.lr,
        ) == (1, 0.1, 3e-5)
        if not seed:
            assert all(
                same(weights, fits[f"stage 2 after 1.{i}"].after)
                for i, (_, weights) in enumerate(saved, 1)
            )


def test_a_drafts_figures_are_its_own_on_the_text_of_all(lab, fits, monkeypatch):
    lab.size.n_layers, lab.sweep_corpus = 2, lab.corpus._replace()
    monkeypatch.setattr(
        td,
        "evaluate",
        lambda run, models, corpus, encoding: (
            {"kl": 0.0},
            {"kl": 0.5 if corpus is lab.corpus else 9.0},
        ),
    )
    monkeypatch.setattr(td, "save_student", lambda *_: None)
    assert r.make_draft(lab, "mamba2, 2 layers")[0]["kl"] == 0.5


@pytest.mark.parametrize(
    "name, layers", [("attention, 2 layers", [0, 7]), ("mamba2, 4 layers", [0, 2, 5, 7])]
)
def test_a_draft_has_the_teachers_first_and_last_layer_and_those_between_evenly(
    lab, fits, monkeypatch, name, layers
):
    kept, lab.size.n_layers = [], 8
    monkeypatch.setattr(mil, "keep_layers", lambda teacher, some: kept.append(some) or teacher)
    monkeypatch.setattr(
        td,
        "assemble",
        lambda run, teacher, base, stage, *_: kept.append(stage.mixers) or td.Models(teacher, base),
    )
    monkeypatch.setattr(td, "save_student", lambda *_: None)
    (row,) = r.make_draft(lab, name)
    assert (
        kept == [layers, [name.split(",")[0]] * len(layers)]
        and row["stages"] == "draft"
        and fits[name].stage.trains == "all"
    )


# --------------------------------------------------------------------------------------------------
# Its tables


@given(st.lists(st.integers(-999, 999), min_size=3, max_size=3, unique=True))
def test_three_students_are_judged_beside_one_model_by_two_degrees_of_freedom(values):
    a, table = [v / 7 for v in values], r.Table("t", "T", ["a"])
    middle, error = r.mean([dict(kl=v) for v in a], "kl")
    for times in (4.2, 4.4):
        table.claim("what", [dict(kl=v) for v in a], [dict(kl=middle + times * error)])
    assert [claim[2] for claim in table.claims] == ["within the error", "holds"]


def test_a_student_is_compared_with_itself():
    table, before = (
        r.Table("t", "T", ["a"]),
        [dict(kl=v, seed=seed) for seed, v in enumerate((1, 5, 9))],
    )
    for gains in ((1, 1.1, 0.9), (1, -1, 3)):
        table.claim(
            "what",
            [
                dict(kl=row["kl"] - gain, seed=row["seed"])
                for row, gain in reversed([*zip(before, gains)])
            ],
            before,
            paired=True,
        )
    assert [claim[2] for claim in table.claims] == ["holds", "within the error"]


def test_students_that_all_miss_as_often_are_not_certain_to():
    table = r.Table("t", "T", ["a"])
    for missed, trials in ((63 / 64, 64), (63 / 64, 10**6), (0, 64)):
        table.claim("what", [dict(kl=missed)] * 3, [dict(kl=1)], trials=trials)
    assert [claim[2] for claim in table.claims] == ["within the error", "holds", "holds"]


def test_the_trials_of_all_students_count_and_those_of_all_depths():
    for b, verdict in (
        (0.61, "within the error"),
        (0.63, "holds"),
    ):  # 2.23 × √(0.5²/400 + 0.48²/100) is 0.121
        (table := r.Table("t", "T", ["a"])).claim(
            "what", [dict(kl=0.5)] * 4, [dict(kl=b)], trials=100
        )
        assert table.claims[0][2] == verdict
    row = lambda found, seed=0: dict(
        arm="mamba",
        seed=seed,
        replaced=4,
        stages="1 + 2",
        context=64,
        teacher_context=128,
        samples=25,
        needles={64: [1] * 4, 128: found},
        by_length={64: 1.0, 128: 1.0},
    )  # noqa: E731
    for found, verdict in (
        ([0.3, 0.3, 0.4, 0.56], "within the error"),
        ([0.3, 0.3, 0.4, 0.48], "holds"),
    ):  # 0.61 and 0.63 missed, of four depths of 25
        needles, _ = r.long(r.Rows([row([0.5] * 4, seed) for seed in range(4)]), 8, row(found))
        assert [claim[2] for claim in needles.claims] == [verdict]


def test_a_claim_knows_the_errors_of_both_sides():
    table = r.Table("t", "T", ["a"])
    for a, b, verdict in (
        ((0, 2), (6, 8), "within the error"),
        ((0, 2), (6.2, 8.2), "holds"),
        ((0, 2), (14, 14), "holds"),
        ((0, 2), (13.6, 13.6), "within the error"),
    ):  # 4.30 × √2, and of one side's error alone 12.71 × 1
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
                more = {
                    "1 + 2": dict(preferred=0.3, held_out=7),
                    "1 + 2 + 3": dict(preferred=0.9),
                }.get(stages, {})
                rows += [
                    dict(
                        arm=arm.name,
                        seed=error > 0,
                        replaced=key[1],
                        stages=stages,
                        kl=kls[key] + error,
                        perplexity=1 + kls[key],
                        ratio=1,
                        agreement=kls[key],
                        parses=kls[key],
                        length=9,
                        teacher_nats=1,
                        rate=1,
                        share=0.5,
                        **more,
                    )
                    for error in (-1e-5, 1e-5)
                ]
    return rows, kls


TEACHER = dict(perplexity=1, parses=1, length=1, teacher_nats=1, real_parses=1, real_length=1)
HALF = {
    "stepwise": "half, stepwise",
    "at once": "half, at once",
    "first": "half, the first layers",
    "last": "half, the last layers",
}


def test_the_tables_show_the_rows_of_the_arms_that_they_name(figures):
    rows, kls = figures
    shown = lambda table, *names: {
        tuple(row[table.columns.index(name)] for name in names): row[
            table.columns.index("KL")
        ].split(" ")[0]
        for row in table.rows
    }  # noqa: E731
    cell = lambda *key: f"{kls[key]:.4f}"  # noqa: E731
    got = shown(r.order(rows, 8, {}), "attention", "which layers keep it", "replaced")
    assert got == {
        (kept, *what): cell(HALF[arm].replace("half", share), c, "1")
        for kept, share, c in (("50 %", "half", 4), ("25 %", "quarter", 6))
        for what, arm in (
            (("evenly spread", "stepwise"), "stepwise"),
            (("evenly spread", "at once"), "at once"),
            (("the last", "stepwise"), "first"),
            (("the first", "stepwise"), "last"),
        )
    }
    got = shown(r.init(rows, 8, {}), "attention", "new layers from", "MLPs")
    assert got == {
        (kept, begin, mlps): cell(arm, c, "1")[:-1]
        for kept, c in (("50 %", 4), ("0 %", 8))
        for begin, mlps, arm in (
            ("attention", "frozen", "mamba2"),
            ("random", "frozen", "random, mixers"),
            ("attention", "trained", "attention, mlps"),
            ("random", "trained", "random, mlps"),
        )
    }
    got = shown(r.mixer(rows, 8, {}), "in its place")
    assert got == {
        (name,): cell(f"half, {arm}", 4, "1 + 2")
        for name, arm in (
            ("Mamba-2", "stepwise"),
            ("Mamba", "Mamba"),
            ("Mamba with A = 0, Δ = 1", "linear attention"),
            ("nothing", "nothing"),
        )
    }
    got = shown(r.quality(rows, 8, TEACHER), "student", "attention")
    assert got == {
        ("teacher", "100 %"): "0",
        ("Llama", "100 %"): cell("Llama", 0, "1 + 2"),
        **{
            (name, kept): cell(name, c, "1 + 2")
            for name in ("mamba2", "mamba")
            for kept, c in (("50 %", 4), ("25 %", 6), ("12.5 %", 7), ("0 %", 8))
        },
    }
    table = r.stages(rows, 8, {})
    assert shown(table, "stages") == {
        ("1, as long as 1 + 2",): cell("half, stage 1 longer", 4, "1"),
        **{(name,): cell("half, stepwise", 4, name) for name in ("1", "1 + 2", "1 + 2 + 3")},
    }
    assert [row[-1] for row in table.rows] == [
        "–",
        "–",
        "30.0 ± 0.0 %",
        "90.0 ± 0.0 %",
    ] and table.notes[0].startswith("preferred: of 7 pairs")


def test_the_claims_compare_the_rows_of_the_arms_that_they_name(figures):
    rows, kls = figures
    found = {
        what: (said, verdict)
        for table in (
            r.init(rows, 8, {}),
            r.order(rows, 8, {}),
            r.mixer(rows, 8, {}),
            r.quality(rows, 8, TEACHER),
            r.stages(rows, 8, {}),
        )
        for what, said, verdict in table.claims
        if said.startswith("kl ")
    }
    names, want = (
        {
            ("attention", "frozen"): "mamba2",
            ("random", "frozen"): "random, mixers",
            ("attention", "trained"): "attention, mlps",
            ("random", "trained"): "random, mlps",
        },
        {},
    )
    for kept, c in (("50 %", 4), ("0 %", 8)):
        for mlps in ("frozen", "trained"):
            want[f"{kept}, MLPs {mlps}: attention's weights beat random ones"] = (
                (names["attention", mlps], c, "1"),
                (names["random", mlps], c, "1"),
            )
        for begin in ("attention", "random"):
            want[f"{kept}, from {begin}: frozen MLPs beat trained ones"] = (
                (names[begin, "frozen"], c, "1"),
                (names[begin, "trained"], c, "1"),
            )
        want[
            f"(not the paper's) {kept} of attention: Mamba-2 is nearer to the teacher than Mamba"
        ] = ("mamba2", c, "1 + 2"), ("mamba", c, "1 + 2")
    for kept, c, share in (("50 %", 4, "half"), ("25 %", 6, "quarter")):
        for what, arm in (
            ("stepwise beats at once", "at once"),
            ("attention spread evenly beats attention in the last layers", "first"),
            ("attention spread evenly beats attention in the first layers", "last"),
        ):
            want[f"{kept}: {what}"] = (
                (f"{share}, stepwise", c, "1"),
                (HALF[arm].replace("half", share), c, "1"),
            )
    for what, a, b in (
        ("Mamba beats nothing", "Mamba", "nothing"),
        ("Mamba-2 beats nothing", "stepwise", "nothing"),
        ("(not the paper's) Mamba beats linear attention", "Mamba", "linear attention"),
    ):
        want[what] = (f"half, {a}", 4, "1 + 2"), (f"half, {b}", 4, "1 + 2")
    for name in ("mamba2", "mamba"):
        for (a, b), (x, y) in zip(
            (("50", "25"), ("25", "12.5"), ("12.5", "0")), ((4, 6), (6, 7), (7, 8))
        ):
            want[f"{name}: {a} % of attention is nearer to the teacher than {b} %"] = (
                (name, x, "1 + 2"),
                (name, y, "1 + 2"),
            )
    want["stage 2 is nearer to the teacher than as many more steps of stage 1"] = (
        ("half, stepwise", 4, "1 + 2"),
        ("half, stage 1 longer", 4, "1"),
    )
    assert found == {
        what: (
            f"kl {kls[a]:.4g} and {kls[b]:.4g}",
            "holds" if kls[a] < kls[b] else "the opposite holds",
        )
        for what, (a, b) in want.items()
    }


def test_preferences_and_stage_2_are_claimed_to_do_what_the_paper_says_of_them(figures):
    holds, not_ = "holds", "the opposite holds"
    for parses, kl, perplexity, verdicts in (
        (0.9, 1e-6, 9, [holds, not_, holds]),
        (0.0, 9, 0.5, [not_, holds, not_]),
    ):
        rows = r.Rows(
            {
                **row,
                **(
                    dict(parses=parses + row["kl"] / 1e3)
                    if row["stages"] == "1 + 2 + 3"
                    else dict(parses=0.5)
                ),
                **(
                    dict(kl=kl + row["kl"] / 1e3, perplexity=perplexity + row["kl"] / 1e3)
                    if row["stages"] == "1 + 2"
                    else {}
                ),
            }
            for row in figures[0]
        )
        assert [claim[2] for claim in r.stages(rows, 8, {}).claims[:3]] == verdicts
    assert r.stages(figures[0], 8, {}).claims[3] == (
        "after preferences of fewer pairs held out the wrong one is preferred",
        "not preferred 0.1 and 0.7",
        "holds",
    )


def test_of_long_texts_it_is_claimed_what_is_missed_and_what_perplexes_at_the_greatest_length():
    row = lambda found, last, seed=0, samples=100: dict(
        arm="mamba",
        seed=seed,
        replaced=4,
        stages="1 + 2",
        context=64,
        teacher_context=128,
        samples=samples,  # noqa: E731
        needles={64: [1, 1], 128: found},
        by_length={64: 1.8, 128: last},
    )
    students = r.Rows([row([1, 0.5], 2.5), row([1, 0.52], 2.6, 1)])
    needles, texts = r.long(students, 8, row([0, 0.5], 9.0))
    few, _ = r.long(students, 8, row([0, 0.5], 9.0, samples=2))  # four needles a model say nothing
    assert [claim[2] for claim in few.claims] == [
        "within the error"
    ] and "at 128 bytes, the teacher finds 25%" in few.notes[0]
    assert [line[:2] + line[-1:] for line in needles.rows if line[-1] != "–"] == [
        ["teacher", "100 %", "25 %"],
        ["mamba", "50 %", "76 ± 1 %"],
    ]
    assert [line[3:] for line in texts.rows if line[-1] != "–"] == [
        ["1.80", "9.00"],
        ["1.80 ± 0.00", "2.55 ± 0.05"],
    ]
    assert [claim[1:] for claim in needles.claims] == [("missed 0.245 and 0.75", "holds")]
    assert [claim[1:] for claim in texts.claims] == [
        ("perplexity 2.55 and 9", "holds"),
        ("perplexity 2.55 and 1.8", "the opposite holds"),
    ]


def test_sharper_students_are_compared_with_the_teacher_as_sharp():
    row = lambda plain, sharp, seed=0: dict(
        arm="mamba2",
        seed=seed,
        replaced=4,
        stages="1 + 2",
        context=64,
        teacher_context=128,
        samples=100,
        needles={64: [1], 128: [plain]},
        by_length={64: 2.0, 128: 3.0},  # noqa: E731
        sharper=dict(needles={64: [1], 128: [sharp]}, by_length={64: 2.0, 128: 2.5}),
    )
    needles, texts = r.long(r.Rows([row(0.5, 1, 0), row(0.5, 1, 1)]), 8, row(0.25, 0.75))
    assert [line for line in needles.rows if line[-1] != "–"] == [
        ["teacher", "100 %", "", "100 %", "25 %"],
        ["teacher", "100 %", "sharper", "100 %", "75 %"],
        ["mamba2", "50 %", "", "100 ± 0 %", "50 ± 0 %"],
        ["mamba2", "50 %", "sharper", "100 ± 0 %", "100 ± 0 %"],
    ]
    assert [line[2:] for line in texts.rows if line[-1] != "–"][:2] == [
        ["", "2.00", "3.00"],
        ["sharper", "2.00", "2.50"],
    ]
    assert [claim[1:] for claim in needles.claims] == [
        ("missed 0.5 and 0.75", "holds"),
        ("missed 0 and 0.25", "holds"),
    ] and "both sharper" in needles.claims[1][0]


def test_perplexity_far_away_is_compared_with_that_at_the_length_of_distillation():
    row = lambda seed=0: dict(
        arm="mamba",
        seed=seed,
        replaced=4,
        stages="1 + 2",
        context=64,
        teacher_context=128,
        samples=9,
        needles={k: [1, 1] for k in (32, 64, 96, 128)},
        by_length={32: 4.0, 64: 2.0 + seed, 96: 9.0, 128: 1.0 + seed},
    )  # noqa: E731
    _, texts = r.long(r.Rows([row(0), row(1)]), 8, row())
    assert [(what.split(": ")[1], found) for what, found, _ in texts.claims] == [
        ("less perplexed after 128 bytes than the teacher", "perplexity 1.5 and 1"),
        ("less perplexed after 128 bytes than after 64", "perplexity 1.5 and 2.5"),
    ]


def test_students_are_ranked_by_what_they_write_from_the_best(figures):
    assert (
        r.quality(figures[0], 8, TEACHER)
        .notes[0]
        .startswith(
            "rank correlation of these 8 kinds of student, the best first, by perplexity with those by kl 1.00, by parses -1.00"
        )
    )  # who is worse parses more there
    assert r.rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(
        0.8
    ) and r.rank_correlation([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(0.8**0.5)
    assert math.isnan(r.rank_correlation([1, 2, 3], [5, 5, 5]))


def test_a_rate_at_an_end_of_those_that_were_tried_has_a_star():
    assert (
        r.rate([dict(rate=0.012, edge=True)]),
        r.rate([dict(rate=3e-3, edge=False)]),
        r.rate([]),
    ) == ("0.012*", "0.003", "–")


def test_every_column_shows_its_own_figure(figures):
    """Of rows whose every figure is another one."""
    names, rows = (
        (
            "kl",
            "perplexity",
            "ratio",
            "agreement",
            "parses",
            "length",
            "teacher_nats",
            "preferred",
            "share",
            "rate",
        ),
        r.Rows(),
    )
    for i, row in enumerate(row for row in figures[0] if not row["seed"]):
        rows.append(
            {
                **row,
                **{name: 1 + i / 8 + k / 100 for k, name in enumerate(names)},
                "length": 100 + 2 * i,
            }
        )
    shown = {
        "tokens ÷ teacher's": ("share", lambda x: f"{x:.2f}"),
        "rate": ("rate", lambda x: f"{x:.2g}"),
        "ppl": ("perplexity", lambda x: f"{x:.3f}"),
        "÷ teacher": ("ratio", lambda x: f"{x:.4f}"),
        "agree": ("agreement", lambda x: f"{100 * x:.1f} %"),
        "parses": ("parses", lambda x: f"{100 * x:.1f} %"),
        "length": ("length", lambda x: f"{x:.0f}"),
        "teacher's nats": ("teacher_nats", lambda x: f"{x:.3f}"),
        "preferred, held out": ("preferred", lambda x: f"{100 * x:.1f} %"),
    }
    for make in (r.quality, r.init, r.order, r.mixer, r.stages):
        table = make(rows, 8, TEACHER)
        for line in table.rows[make is r.quality :]:
            line = dict(zip(table.columns, line))
            (mine,) = [row for row in rows if abs(row["kl"] - float(line["KL"])) < 6e-4]
            for column in {*shown} & {*line}:
                name, said = shown[column]
                assert line[column] in (said(mine[name]), f"{mine[name]:.3f}"), (table.name, column)


# --------------------------------------------------------------------------------------------------
# What it measures of time


@pytest.fixture
def watch(monkeypatch):
    """bench.now by hand: the second that it is."""
    now = SimpleNamespace(at=0.0)
    monkeypatch.setattr(r.bench, "now", lambda: now.at)
    monkeypatch.setattr(td, "show", lambda *_, **__: None)
    return now


def test_speculation_counts_a_texts_own_passes_and_divides_by_plain_decoding_of_the_same_text(
    lab, watch, monkeypatch
):
    asked, models = [], []

    class Decoder:
        def __init__(self, model, rows, room, temperature, generator, draft, K):
            models.append(model)
            self.sampled, self.draft, self.K, self.texts = temperature > 0, draft, K, 0

        def decode(self, prompts, most):
            asked.append(bytes(prompts[0]).decode())
            K, self.texts = self.K, self.texts + 1
            for turn in range(3):
                watch.at += (1 + self.sampled) / (8 if K == 2 else 4 if K else 2) if turn else 100
                self.passes, self.proposed, self.accepted = (
                    self.passes + 1,
                    self.proposed + K,
                    self.accepted + (K and self.texts),
                )
                yield ([0] * (1 + (K and self.texts)),)

    monkeypatch.setattr(generate, "Decoder", Decoder)
    for name in ("load", "pack"):
        monkeypatch.setattr(mil, name, lambda place, *_: getattr(place, "name", place))
    lab.size.texts, lab.size.context, lab.size.Ks, lab.size.n_layers, lab.out = (
        2,
        256,
        (2, 5),
        8,
        lab.out / "o",
    )
    for place in (
        "teacher",
        "models/mamba2-4",
        "models/mamba2-8",
        "models/mamba-4",
        "models/mamba-8",
        "models/mamba2, 4 layers",
    ):
        (lab.out / place).mkdir(parents=True)
    table, rows = r.speculation(lab)
    assert all(re.search(r"def unseen_\d\(x*\):\n$", text) for text in asked) and len({*asked}) == 2
    assert [(row["target"], row["draft"], row["temperature"], row["K"]) for row in rows] == [
        (name, "mamba2, 4 layers", t, K)
        for name in ("Llama", "mamba2, 50 %", "mamba2, 0 %", "mamba, 0 %")
        for t in (0, 1)
        for K in (2, 5)
    ]
    assert [*dict.fromkeys(models)] == ["teacher", "mamba2-4", "mamba2-8", "mamba-8"]
    for row in rows:  # the first text is read twice, and the first time does not count
        slow, K = 1 + row["temperature"], row["K"]
        assert (row["per_pass"], row["kept"]) == ([3, 4], [2 / K, 3 / K]) and row[
            "plain"
        ] == 2 / slow
        assert row["tokens_s"] == pytest.approx((2 * 3 + 2 * 4) / (4 * slow / (8 if K == 2 else 4)))
    assert [line[2:] for line in table.rows] == [
        [text, 2, "3.50 ± 0.50", "125%", f"{(14 * 8 / 4) / 2:.2f}", f"{28 / slow:.0f}"]
        for text, slow in (("greedy", 1), ("sampled", 2))
    ] * 4


def test_costs_are_those_of_the_layers_that_are_named_without_what_is_compiled(
    lab, watch, monkeypatch
):
    filled = []

    def fill(model, batch, length):
        filled.append((*model.mixers, length))
        watch.at += length * (1 + model.mixers.count("attention")) + 1000 * (
            filled.count(filled[-1]) == 1
        )
        return length

    monkeypatch.setattr(r.bench, "random_model", lambda config: config)
    monkeypatch.setattr(r.bench, "filled", fill)
    monkeypatch.setattr(
        r.bench, "step_ms", lambda model, cache, l: cache / 4 + model.mixers.count("attention")
    )
    monkeypatch.setattr(r.bench, "cache_bytes", lambda cache, length: cache * 2**20)
    table, rows = r.cost(lab)
    assert [line[0] for line in table.rows[::3]] == [
        "100%",
        "50%, mamba2",
        "25%, mamba2",
        "0%, mamba2",
        "0%, mamba",
    ]
    for i, count in enumerate((8, 4, 2, 0, 0)):
        assert [line[2:] for line in table.rows[3 * i : 3 * i + 3]] == [
            [f"{k * (1 + count):.3f}" for k in (64, 256)],
            [f"{k / 4 + count:.2f}" for k in (64, 256)],
            ["64.0", "256.0"],
        ]
        assert [(row["length"], row["read"]) for row in rows[2 * i : 2 * i + 2]] == [
            (k, k * (1 + count)) for k in (64, 256)
        ]
    assert {mixers[0] for *mixers, _ in filled[-4:]} == {"mamba"}


def test_of_a_scan_the_fastest_way_counts_and_attention_is_measured_once(watch, monkeypatch):
    monkeypatch.setattr(r.bench, "inputs", lambda kind, *shape: (kind, shape[-1]))
    monkeypatch.setattr(
        r.bench,
        "contenders",
        lambda t: {
            "ours": [(3 * t[1],), (2 * t[1],)],
            "attention": [(t[1],)],
            "official": [(None,)],
        },
    )
    monkeypatch.setattr(
        r.bench, "measure", lambda ms, backward: dict(wall=ms, gpu=ms) if ms and backward else None
    )
    a, b, rows = r.bench.MAMBA2[0], r.bench.MAMBA[0], r.scans(r.SMOKE)
    assert [(row["name"], row["length"], row["ms"]) for row in rows] == [
        *(
            (name, k, ms and ms * k)
            for k in (64, 128)
            for name, ms in ((f"ours, {a}", 2), ("attention", 1), (f"official, {a}", None))
        ),
        *(
            (name, k, ms and ms * k)
            for k in (64, 128)
            for name, ms in ((f"ours, {b}", 2), (f"official, {b}", None))
        ),
    ]


def test_what_cost_needs_is_compiled_at_the_least_length_while_students_learn(lab, monkeypatch):
    seen, size = [], dataclasses.replace(r.SMOKE, cost_lengths=(3, 5), scan_lengths=(7, 9))
    monkeypatch.setattr(lab, "size", size)
    monkeypatch.setattr(r, "cost", lambda lab: seen.append(lab.size.cost_lengths))
    monkeypatch.setattr(r, "scans", lambda size: seen.append(size.scan_lengths))
    assert r.compile_cost(lab) == [] and seen == [(3,), (7,)] and lab.size is size
    jobs = lambda *tables: [
        (job.__name__, *what) for job, *what in submitted(lab, monkeypatch, tables)
    ]  # noqa: E731
    assert ("compile_cost",) in jobs("speculation", "cost") and ("compile_cost",) not in jobs(
        "speculation"
    )


def submitted(lab, monkeypatch, tables):
    """The jobs that all_arms hands to its workers, none of which does anything."""
    jobs = []

    class Pool:
        def submit(self, work, *job):
            jobs.append(job)
            future = r.Future()
            future.set_result(
                (
                    [dict(arm=job[1].name, kl=1.0, rate=job[3], seed=job[2])]
                    if job[0] is r.learn
                    else [],
                    0.0,
                )
            )
            return future

    r.all_arms(lab, Pool(), tables, 1, 0.0, io.StringIO())
    return jobs


@pytest.fixture
def hollow(tmp_path, monkeypatch):
    """main without what takes time; what was measured on, and a student of an earlier run."""
    seen, old = [], tmp_path / "models" / "mamba2-4"
    old.mkdir(parents=True), old.with_name("precious").mkdir()
    monkeypatch.setattr(r, "speculation", lambda lab: (r.Table("speculation", "", [""]), []))

    class Lab:
        def __init__(self, size, out, device):
            (
                self.size,
                self.out,
                self.run,
                self.corpus,
                self.sweep_corpus,
                self.encoding,
                self.teacher,
                self.teacher_tokens,
            ) = size, tmp_path, None, "measured", "sweep", None, torch.nn.Linear(1, 1), 1
            self.make_teacher, self.writing = (
                lambda: None,
                lambda model: dict.fromkeys(TEACHER, 1.0),
            )
            self.long_texts = lambda model, trained: (
                seen.append(trained)
                or dict(needles={128: [1.0, 1.0], 256: [0.0, 0.0]}, by_length={128: 1.0, 256: 1.0})
            )

    for owner, name, value in (
        (r, "Lab", Lab),
        (r, "all_arms", lambda *_: ([], [])),
        (td, "prepare", lambda run, models: models),
        (td, "Models", lambda *two: two),
        (r.pictures, "draw", lambda *_: None),
        (
            td,
            "evaluate",
            lambda run, models, corpus, encoding: (
                seen.append(corpus) or ({"perplexity": 3.0}, {"perplexity": 9.0})
            ),
        ),
    ):
        monkeypatch.setattr(owner, name, value)
    return seen, old


def test_the_teacher_is_measured_as_its_students_are_and_no_student_of_an_earlier_run_is_left(
    hollow, tmp_path
):
    seen, old = hollow
    report = r.main(["order", "speculation", "--smoke", "--out", str(tmp_path)])
    assert (
        seen == ["measured", 256]
        and not old.exists()
        and old.with_name("precious").exists()
        and (
            report["teacher"]["context"],
            report["teacher"]["teacher_context"],
            report["teacher"]["samples"],
        )
        == (128, 256, 1)
    )


def test_a_run_that_is_stopped_leaves_the_tables_it_has_made(hollow, tmp_path, monkeypatch, capsys):
    def stop(lab):
        raise KeyboardInterrupt

    monkeypatch.setattr(r, "cost", stop)
    with pytest.raises(KeyboardInterrupt):
        r.main(
            [
                "order",
                "init",
                "cost",
                "--smoke",
                "--set",
                "rope_theta=77",
                "--set",
                "depths=3",
                "--out",
                str(tmp_path),
            ]
        )
    report, said = (
        json.loads((tmp_path / "order+init+cost.json").read_text()),
        (tmp_path / "order+init+cost.md").read_text(),
    )
    assert [*report["tables"]] == [*report["claims"]] == ["order", "init"] and (
        report["size"]["rope_theta"],
        report["size"]["depths"],
    ) == (77, 3)
    for text in (said, capsys.readouterr().out):
        assert 0 < text.index("Order of replacement") < text.index("Initialisation and frozen MLPs")


def test_what_set_changes_goes_to_a_folder_of_its_own(hollow, tmp_path, monkeypatch):
    hollow_lab, places = r.Lab, []
    monkeypatch.setattr(
        r, "Lab", lambda size, out, device: places.append(str(out)) or hollow_lab(size, out, device)
    )
    for more in (
        (),
        ("--set", "rope_still=0", "--set", "depths=3"),
        ("--set", "depths=3", "--out", "mine"),
    ):
        r.main(["order", "--smoke", *more])
    assert places == ["out/smoke", "out/smoke-rope_still=0-depths=3", "mine"]


def test_t95_holds_95_percent_of_students_t():
    for n, edge in enumerate(r.T95, 1):
        x = torch.linspace(-edge, edge, 20001, dtype=torch.float64)
        law = (
            math.gamma((n + 1) / 2)
            / math.gamma(n / 2)
            / math.sqrt(n * math.pi)
            * (1 + x**2 / n) ** (-(n + 1) / 2)
        )
        assert torch.trapezoid(law, x).item() == pytest.approx(0.95, abs=5e-4), n


def test_a_worker_has_a_lab_of_its_own_and_what_is_printed_in_it_is_dropped(monkeypatch):
    for owner, name, value in (
        (r, "LAB", None),
        (r, "Lab", lambda *args: args),
        (sys, "stdout", sys.stdout),
        (torch, "set_num_threads", lambda n: None),
    ):
        monkeypatch.setattr(owner, name, value)
    r.enter("size", "out", "cpu")
    assert (
        r.work(lambda lab, *more: print("said") or [lab, *more], 7)[0]
        == [("size", "out", "cpu"), 7]
        and sys.stdout.getvalue() == ""
    )


def test_on_a_gpu_minutes_scale_the_steps_of_everything_that_trains(hollow, tmp_path, monkeypatch):
    for owner, name, value in (
        (r, "LAB", None),
        (generate, "pick_device", lambda name: SimpleNamespace(type="cuda")),
        (torch.cuda, "get_device_name", lambda: "GPU"),
        (torch.cuda, "empty_cache", lambda: None),
    ):
        monkeypatch.setattr(owner, name, value)
    size = r.main(["order", "--minutes", "5", "--workers", "1", "--out", str(tmp_path)])["size"]
    assert {k: n for k, n in size.items() if k.endswith("_steps")} == {
        k: n // 2 for k, n in vars(r.Size()).items() if k.endswith("_steps")
    }


def test_the_parts_of_a_runs_time_add_up(hollow, tmp_path, monkeypatch):
    now = SimpleNamespace(at=0.0)

    def takes(seconds, value):
        now.at += seconds
        return value

    monkeypatch.setattr(r, "time", SimpleNamespace(perf_counter=lambda: now.at))
    monkeypatch.setattr(td, "prepare", lambda run, models: takes(5, models))
    monkeypatch.setattr(r, "all_arms", lambda *_: takes(30, ([], [])))
    report = r.main(["order", "--smoke", "--out", str(tmp_path)])
    assert report["clock"] == {"teacher": 5, "students": 30} and report["seconds"] == 35
    assert "35 s in all: teacher 5, students 30; " in (tmp_path / "order.md").read_text()


def test_what_is_left_out_is_said_on_the_terminal_and_in_the_report(
    hollow, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        r,
        "all_arms",
        lambda *_: (
            [
                dict(
                    arm="half, at once", seed=1, rate=1, kl=math.inf, diverged="the loss became nan"
                )
            ],
            [],
        ),
    )
    r.main(["order", "--smoke", "--out", str(tmp_path)])
    for text in (capsys.readouterr().out, (tmp_path / "order.md").read_text()):
        assert "left out: half, at once: with seed 1, the loss became nan" in text


def test_the_teachers_needles_are_said_as_a_mean_over_depths(hollow, tmp_path, monkeypatch, capsys):
    honest = r.Lab

    class Lab(honest):
        def __init__(self, size, *more):
            super().__init__(size, *more)
            self.long_texts = lambda model, trained: dict(
                needles={128: [1.0, 1.0], 256: [1.0, 0.5]}, by_length={128: 1.0, 256: 1.0}
            )

    monkeypatch.setattr(r, "Lab", Lab)
    r.main(["order", "--smoke", "--out", str(tmp_path)])
    assert "within its 256 bytes it finds 75% of the needles" in capsys.readouterr().out


def test_a_rate_that_is_tried_beyond_the_others_is_one_job_more(lab, monkeypatch):
    said, lab.size.more_rates, lab.size.n_layers = [], 1, 8
    monkeypatch.setattr(td, "show", lambda line, **_: said.append(line.split(" jobs")[0]))
    jobs = submitted(lab, monkeypatch, ("order",))
    assert said[-1] == f"{len(jobs)} of {len(jobs)}"


def test_of_the_teachers_training_no_checkpoint_is_left(lab):
    lab.make_teacher()
    assert not td.checkpoints(lab.run) and (lab.out / "teacher" / "config.json").exists()


def test_three_students_compared_with_themselves_have_two_degrees_of_freedom():
    table = r.Table("t", "T", ["a"])
    for gain in (2.3, 2.6):  # 4.30 × 1 / √3 is 2.48
        table.claim(
            "what",
            [dict(kl=-gain - d, seed=d) for d in (-1, 0, 1)],
            [dict(kl=0, seed=d) for d in (-1, 0, 1)],
            paired=True,
        )
    assert [claim[2] for claim in table.claims] == ["within the error", "holds"]


def test_a_caches_bytes_are_those_of_the_tokens_it_holds_and_of_its_states():
    model = build(
        mil.Config(
            v=17,
            d=16,
            n_layers=4,
            n_heads=4,
            n_kv_heads=2,
            d_ff=8,
            context=64,
            mixers=["attention", "mamba2", "attention", "none"],
        ),
        torch.float32,
    )  # 4 and 2 heads of 4
    assert r.bench.cache_bytes(r.bench.filled(model, 1, 20), 20) == pytest.approx(
        4 * (2 * 2 * 20 * 2 * 4 + 4 * 4 * 4)
    )


# --------------------------------------------------------------------------------------------------
# Its pictures


@pytest.fixture
def drawn():
    """A report of four layers, whose figures tell stage, seed and layers replaced; and what draws one of its pictures: its axes."""
    subplots = pytest.importorskip("matplotlib.figure").Figure
    row = lambda arm, c, stages, seed: dict(
        arm=arm,
        seed=seed,
        replaced=c,
        stages=stages,
        kl=c + seed + 10 * (stages == "1"),
        ratio=1 + c + seed,
        needles={"64": [1, 0, seed], "128": [1, 0, 0]},
    )  # noqa: E731
    rows = [
        row(arm, c, stages, seed)
        for arm in ("mamba2", "mamba")
        for c in (2, 4)
        for stages in ("1", "1 + 2")
        for seed in (0, 1)
    ]
    report = dict(
        rows=[
            *rows,
            row("Llama", 0, "1 + 2", 0),
            dict(row("Llama", 0, "1 + 2", 2), diverged="the loss became nan"),
        ],
        size=dict(n_layers=4, context=64, teacher_context=128),
        teacher=dict(needles={"64": [1, 1, 1], "128": [0, 0, 1]}),
        speculation=[
            dict(
                target="Llama",
                draft="d",
                temperature=t,
                K=K,
                per_pass=[K, K + 2 + t],
                tokens_s=6.0 * K,
                plain=2.0 + K,
            )
            for K in (4, 2)
            for t in (0, 1)
        ],
    )
    return (
        report,
        lambda picture, data: (
            picture(
                report,
                data,
                lambda *shape, figsize, layout, **more: (
                    figure := subplots(figsize),
                    figure.subplots(*shape, **more),
                ),
            ).axes
        ),
    )


def test_pictures_are_of_students_after_stage_2_at_their_own_share_of_attention(drawn):
    report, draw = drawn
    found = {arm: r.pictures.students(report, arm) for arm in r.pictures.NAMES}
    assert {
        arm: {share: [row["seed"] for row in rows] for share, rows in mine.items()}
        for arm, mine in found.items()
    } == {arm: {0.5: [0, 1], 0: [0, 1]} for arm in found}
    assert r.pictures.students(report, "Llama") == {}  # one of them diverged
    for axis, more in zip(draw(r.pictures.quality, found), (0, 1)):
        for line, aside in zip(
            [one[0] for one in axis.containers], (0, 0.06)
        ):  # the places are 50, 25, 12.5, 0 %
            assert line.get_xdata().tolist() == [
                aside,
                3 + aside,
            ] and line.get_ydata().tolist() == [2.5 + more, 4.5 + more]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["50", "25", "12.5", "0"]


def test_a_picture_of_needles_has_depth_downwards_all_seeds_and_the_line_where_each_was_trained(
    drawn,
):
    report, draw = drawn
    models = r.pictures.needles(
        report, {arm: r.pictures.students(report, arm) for arm in r.pictures.NAMES}
    )
    assert [*models] == [
        "teacher, 100 %",
        "Mamba-2, 50 %",
        "Mamba-2, 0 %",
        "Mamba, 50 %",
        "Mamba, 0 %",
    ]
    axes = {axis.get_title(): axis for axis in draw(r.pictures.needle, models) if axis.images}
    for name, lines, image in (
        ("teacher, 100 %", 1.5, [[100, 0], [100, 0], [100, 100]]),
        ("Mamba-2, 0 %", 0.5, [[100, 100], [0, 0], [50, 0]]),
    ):
        assert axes[name].images[0].get_array().tolist() == image and {
            line.get_xdata()[0] for line in axes[name].lines
        } == {lines}
        assert axes[name].get_ylim()[0] > axes[name].get_ylim()[1]


def test_a_picture_of_speculation_is_of_sampled_text_and_its_speed_over_plain(drawn):
    report, draw = drawn
    above, below = draw(r.pictures.speculation, report["speculation"])
    assert (
        above.lines[0].get_xdata().tolist() == [2, 4]
        and above.lines[0].get_ydata().tolist() == [3.5, 5.5]
        and below.lines[0].get_ydata().tolist() == [3, 4]
    )


def test_a_picture_of_costs_has_each_under_its_name(drawn):
    rows = [
        dict(mixers=mixers, length=k, read=k / 64, step_ms=k / 8 + share, bytes=k * 2**20 / 4)
        for share, mixers in ((0, ["mamba2"]), (1, ["attention"]))
        for k in (64, 2048)
    ]
    axes = drawn[1](r.pictures.cost, rows)
    assert {
        axis.get_title(): [line.get_ydata().tolist() for line in axis.lines] for axis in axes
    } == {
        "reading it all, s": [[1, 32]] * 2,
        "one more token, ms": [[8, 256], [9, 257]],
        "cache, MiB": [[16, 512]] * 2,
    }
    assert [line.get_label() for line in axes[0].lines] == ["0 %, Mamba-2", "100 %"] and axes[
        0
    ].lines[0].get_xdata().tolist() == [64, 2048]


def test_the_llama_through_stage_2_is_a_line_at_its_own_figure_in_both_pictures(drawn):
    report, draw = drawn
    report["rows"] = [
        dict(row, kl=0.25, ratio=1.5) if row["arm"] == "Llama" else row
        for row in report["rows"]
        if "diverged" not in row
    ]
    axes = draw(
        r.pictures.quality, {arm: r.pictures.students(report, arm) for arm in r.pictures.NAMES}
    )
    assert [
        line.get_ydata()[0]
        for axis in axes
        for line in axis.lines
        if line.get_label() == "the Llama through stage 2"
    ] == [0.25, 1.5]


def test_under_the_lowest_picture_of_needles_of_every_column_its_lengths_stand(drawn):
    report, draw = drawn
    models = r.pictures.needles(
        report, {arm: r.pictures.students(report, arm) for arm in r.pictures.NAMES}
    )  # five, in three columns
    axes = {axis.get_title(): axis for axis in draw(r.pictures.needle, models) if axis.images}
    assert [[label.get_text() for label in axes[name].get_xticklabels()] for name in models] == [
        ["", ""]
    ] * 2 + [["64", "128"]] * 3


def test_the_papers_points_stand_at_their_shares_of_attention(drawn):
    report, draw = drawn
    _, axis = draw(
        r.pictures.quality, {arm: r.pictures.students(report, arm) for arm in r.pictures.NAMES}
    )
    (line,) = (one[0] for one in axis.containers if one.get_label().startswith("paper"))
    assert line.get_xdata().tolist() == [0, 1, 2.5, 3] and line.get_ydata().tolist() == [
        1.03,
        1.09,
        1.22,
        1.66,
    ]
