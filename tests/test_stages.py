"""What reaches the stages of a run, and what a run keeps: found by planting faults that the tests beside this file did not see."""

import dataclasses
import io
import itertools
import json
import math
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import assert_close
from test_runs import in_two_processes, server  # noqa: F401
from test_train_distill import (
    HALF,
    fitted,
    plain_loss,
    plans,
    random_batches,
    recipe,
    small_run,
    some_tokens,
    tiny_teacher,
)

import generate as g
import mil
import train_distill as t
from mil import MilError


@pytest.mark.parametrize("reverse", [False, True])
def test_a_stages_weights_temperature_and_direction_reach_the_loss(tmp_path, reverse):
    run, student, teacher = small_run(tmp_path), tiny_teacher(1), tiny_teacher(2)
    (batch,), count = random_batches(run)(0)
    loss, _ = t.distill(
        t.Models(teacher, student),
        batch,
        t.Stage(alpha=0.3, beta=0.7, temperature=2.0, reverse=reverse),
        1 / count,
    )
    logits = [m(batch.x).flatten(0, 1) for m in (student, teacher)]
    assert_close(loss, plain_loss(*logits, batch.y.flatten(), 0.3, 0.7, 2.0, reverse), 1e-5)


def test_the_flags_of_the_loss_and_of_the_rate_reach_every_stage():
    flags = dict(alpha=0.3, beta=0.2, temperature=2.0, reverse=True, schedule="linear", warmup=0.5)
    assert [{k: getattr(stage, k) for k in flags} for stage in plans(4, **flags)] == [flags] * 3


def test_what_a_stage_trained_stays_through_later_ones_and_their_checkpoints(tmp_path, monkeypatch):
    run, teacher, after, saved, seen = small_run(tmp_path), tiny_teacher(), [], [], []
    run.s.recipe = recipe(
        tmp_path,
        {"keep": 0.75, "trains": "all", "steps": 1, "lr": 0.1},
        *[{"keep": keep, "trains": "mixers", "steps": 1, "lr": 0.1} for keep in (0.5, 0.25)],
    )
    honest, evaluate = t.fit, t.evaluate

    def fit(run, state, stage, pair, *rest):
        honest(run, state, stage, pair, *rest)
        t.save_state(run, state, pair.student, SimpleNamespace(param_groups=[], state={}))
        after.append(pair.student.norm.weight.detach().cpu().clone())
        saved.append(torch.load(t.checkpoints(run)[-1])["trained"].get("norm.weight"))

    monkeypatch.setattr(t, "fit", fit)
    monkeypatch.setattr(
        t,
        "evaluate",
        lambda run, pair, *rest: (
            seen.append(list(pair.student.config.mixers)) or evaluate(run, pair, *rest)
        ),
    )
    data = some_tokens(np.random.default_rng(0).integers(0, 256, 500).astype(np.uint16))
    stages = t.plan(run.s, teacher.config)
    t.run_stages(
        run,
        t.State(stage=1),
        stages,
        (teacher, teacher),
        lambda *_, **__: data,
        g.load_tokenizer("bytes"),
        "bytes",
        io.StringIO(),
    )
    assert not torch.equal(after[0], teacher.norm.weight.cpu()) and all(
        torch.equal(w, after[0]) for w in after
    )
    assert all(w is not None and torch.equal(w, after[0]) for w in saved)
    assert seen == [
        stages[-1].mixers,
        *[stage.mixers for stage in stages for _ in (0, 1)],
    ]  # not trained: what the whole run replaces


def test_the_seconds_of_a_stage_count_those_before_it_was_interrupted(tmp_path):
    run, stage, log = (
        small_run(tmp_path),
        t.Stage(trains="all", mixers=HALF, beta=0, steps=2, lr=0.1),
        io.StringIO(),
    )
    state = t.State(step=1, seconds=1000.0)
    t.fit(
        run,
        state,
        stage,
        t.assemble(run, None, tiny_teacher(), stage, 1, {}),
        random_batches(run),
        log,
        "",
    )
    assert 1000 < state.seconds < 1100 and json.loads(log.getvalue())["seconds"] > 1000


def test_a_student_that_is_its_teacher_gains_nothing_on_held_out_pairs_in_one_epoch(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"{i}", "chosen": f"{i}", "rejected": "no" * (i % 4)})
            for i in range(40)
        )
    )
    run, teacher, log = small_run(tmp_path), tiny_teacher(), io.StringIO()
    mil.save(teacher, tmp_path / "teacher", tokenizer="bytes")
    run.s.recipe = recipe(
        tmp_path, {"loss": "dpo", "data": [str(tmp_path / "pairs.jsonl")], "lr": 0}
    )
    state, data, stages = (
        t.State(stage=1),
        some_tokens(np.zeros(500, np.int16)),
        t.plan(run.s, teacher.config),
    )
    stages[0].steps = 38
    t.run_stages(
        run,
        state,
        stages,
        (teacher, teacher),
        lambda *_, **__: data,
        g.load_tokenizer("bytes"),
        "bytes",
        log,
    )
    assert (
        abs(state.rows[-1]["margin"]) < 1e-4
        and json.loads(log.getvalue().splitlines()[-1])["step"] == 38
    )


def test_another_teacher_gives_other_answers(tmp_path):
    run, encoding, answers = small_run(tmp_path), g.load_tokenizer("bytes"), []
    (tmp_path / "a.txt").write_text("".join(f"{i} and {i}\n" for i in range(200)))
    for seed in (1, 2):
        place = tmp_path / str(seed)
        mil.save(tiny_teacher(seed), place, tokenizer="bytes")
        run.s.answers, run.s.answer_tokens = 9, 4
        answers.append(
            t.answered(run, [str(tmp_path / "a.txt")], place, encoding, "bytes").train.tolist()
        )
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    "change",
    [dict(seed=1), dict(answers=8), dict(answer_tokens=5), dict(context=12), dict(batch=4)],
    ids=str,
)
def test_answers_of_any_other_setting_are_made_anew(tmp_path, monkeypatch, change):
    (tmp_path / "a.txt").write_text("".join(f"{i} and {i}\n" for i in range(200)))
    mil.save(tiny_teacher(1), tmp_path / "teacher", tokenizer="bytes")
    run, asked, honest = small_run(tmp_path), [], t.answer
    run.s.answers, run.s.answer_tokens = 9, 4
    monkeypatch.setattr(
        t, "answer", lambda run, work, *rest: asked.append(len(work)) or honest(run, work, *rest)
    )
    for settings in (run.s, run.s, dataclasses.replace(run.s, **change)):
        t.answered(
            t.Run(settings, run.device),
            [str(tmp_path / "a.txt")],
            tmp_path / "teacher",
            g.load_tokenizer("bytes"),
            "bytes",
        )
    assert asked == [9, change.get("answers", 9)]


def test_stages_read_by_seeds_of_their_own_and_preferences_are_counted_on_pairs_that_nothing_is_learned_from(
    tmp_path, monkeypatch
):
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"{i}", "chosen": f"{i}", "rejected": "no" * (i % 4)})
            for i in range(40)
        )
    )
    run, teacher, seeds, learned, held, text, pairs = (
        small_run(tmp_path),
        tiny_teacher(),
        [],
        [],
        [],
        t.training_batches,
        t.pair_batches,
    )
    run.s.recipe = recipe(
        tmp_path,
        {"keep": 0.75},
        {"keep": 0.5},
        {"trains": "all"},
        *[{"loss": "dpo", "data": [str(tmp_path / "pairs.jsonl")]}] * 2,
    )
    monkeypatch.setattr(t, "fit", lambda *_: None)
    monkeypatch.setattr(
        t,
        "training_batches",
        lambda run, corpus, seed, *more: (
            seeds.append(tuple(seed)) or text(run, corpus, seed, *more)
        ),
    )
    monkeypatch.setattr(
        t,
        "pair_batches",
        lambda run, some, seed: (
            seeds.append(tuple(seed)) or learned.append(some) or pairs(run, some, seed)
        ),
    )
    monkeypatch.setattr(
        t,
        "preferences",
        lambda run, stage, models, some: (
            held.append(some) or {"preferred": 0.5, "preferred_error": 0.5, "margin": 0.0}
        ),
    )
    t.run_stages(
        run,
        t.State(stage=1),
        t.plan(run.s, teacher.config),
        (teacher, teacher),
        lambda *_, **__: some_tokens(np.zeros(500, np.int16)),
        g.load_tokenizer("bytes"),
        "bytes",
        io.StringIO(),
    )
    wanted = t.load_pairs(run.s, [str(tmp_path / "pairs.jsonl")], g.load_tokenizer("bytes"))
    assert (
        learned == [wanted[0]] * 2
        and held == [wanted[1]] * 2
        and len({*seeds}) == len(seeds) == 5
        and (run.s.seed, 0) not in seeds
    )


def test_with_pseudo_labels_the_stages_learn_from_answers_but_for_those_with_data_of_their_own_and_the_teachers_frequencies_are_the_flags(
    tmp_path, monkeypatch
):
    (tmp_path / "a.txt").write_text("".join(f"{i} and {i}\n" for i in range(200)))
    (tmp_path / "b.txt").write_text("".join(f"{i} or {i}\n" for i in range(200)))
    read, honest = [], t.training_batches
    monkeypatch.setattr(
        t,
        "training_batches",
        lambda run, corpus, *more: read.append(corpus) or honest(run, corpus, *more),
    )
    t.main(
        [
            "--out",
            str(tmp_path / "o"),
            "--data",
            str(tmp_path / "a.txt"),
            "--pseudo_labels",
            "--answers",
            "30",
            "--answer_tokens",
            "8",
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
            "16",
            "--batch",
            "2",
            "--eval_sequences",
            "2",
            "--teacher_steps",
            "1",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--rope_theta",
            "77",
            "--recipe",
            recipe(
                tmp_path,
                {"keep": 0.5, "steps": 1},
                {"trains": "all", "steps": 1},
                {"trains": "all", "steps": 1, "data": [str(tmp_path / "b.txt")]},
            ),
        ]
    )
    assert ["answers" in corpus.about for corpus in read] == [False, True, True, False] and read[
        1
    ].key == read[2].key
    words = [
        bytes(int(i) for i in corpus.train[:99] if 0 <= i < 256) for corpus in (read[0], read[3])
    ]
    assert b" and " in words[0] and b" or " in words[1]
    assert [
        mil.read_config(tmp_path / "o" / name)["config"].rope_theta
        for name in ("teacher", "student")
    ] == [77, 77]


def test_the_student_is_written_as_the_file_it_began_as_and_not_as_it_was_reckoned_with(tmp_path):
    run = small_run(tmp_path, dtype="bfloat16")
    models = t.assemble(
        run, (teacher := tiny_teacher()), teacher, t.Stage(trains="all", mixers=HALF), 1, {}
    )
    t.save_student(run, models.student, tmp_path / "student", "bytes", torch.float32)
    saved = dict(mil.load(tmp_path / "student", run.device).named_parameters())
    assert saved.keys() == dict(models.student.named_parameters()).keys() and all(
        torch.equal(saved[k], w) for k, w in models.student.named_parameters()
    )


def test_the_answers_of_two_processes_are_in_the_order_of_the_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "together", lambda run: None)
    (tmp_path / "a.txt").write_text("".join(f"{i} and {i}\n" for i in range(200)))
    mil.save(tiny_teacher(1), tmp_path / "teacher", tokenizer="bytes")
    made = {}
    for size in (1, 2):
        run = small_run(tmp_path / str(size))
        run.s.answers, run.s.answer_tokens, run.size = 7, 4, size
        for run.rank in range(size):
            try:
                made[size] = t.answered(
                    run,
                    [str(tmp_path / "a.txt")],
                    tmp_path / "teacher",
                    g.load_tokenizer("bytes"),
                    "bytes",
                ).train
            except FileNotFoundError:  # what the other process has yet to write
                assert (size, run.rank) == (2, 0)
    assert np.array_equal(made[1], made[2])


def test_the_processes_of_an_evaluation_share_its_windows(tmp_path):
    corpus, found = some_tokens(np.arange(16 * 3 + 1).astype(np.int16)), {}
    for size in (1, 2):
        batches = [
            list(
                t.evaluation_batches(
                    t.Run(small_run(tmp_path).s, torch.device("cpu"), rank, size), corpus
                )
            )
            for rank in range(size)
        ]
        assert len({len(mine) for mine in batches}) == 1
        found[size] = sorted(
            row for mine in batches for batch in mine for row in batch.y.tolist() if max(row) >= 0
        )
    assert found[1] == found[2] and len(found[1]) == 3


def test_the_share_of_preferred_pairs_its_error_and_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "added_up", lambda run, total: total)
    margins, pairs = torch.tensor([1.0, 2, -6, 4, 5]), [([~1, i], [~1, 9]) for i in range(5)]

    def dpo(pair, batch, *_):
        chosen = batch.y.chunk(2)[0][:, 0]
        found = torch.where(chosen >= 0, margins[chosen.clamp(min=0)], 0)
        return None, torch.stack([found.gt(0).float().sum(), found.sum()])

    monkeypatch.setattr(t, "dpo", dpo)
    for size in (1, 2, 4):
        parts = [
            t.preferences(
                t.Run(small_run(tmp_path).s, torch.device("cpu"), rank, size), None, None, pairs
            )
            for rank in range(size)
        ]
        assert sum(part["preferred"] for part in parts) == pytest.approx(0.8) and sum(
            part["margin"] for part in parts
        ) == pytest.approx(1.2)
    whole = t.preferences(t.Run(small_run(tmp_path).s, torch.device("cpu")), None, None, pairs)
    assert whole["preferred_error"] == pytest.approx(
        (5 / 7 * 2 / 7 / 7) ** 0.5
    )  # of one more on either side


def fit_shared(rank, place, stage, teacher, corpus):
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    fit_log(
        t.Run(
            t.Settings(batch=4, context=16, dtype="float32", accumulate=2, out=str(place)),
            torch.device("cpu"),
            rank,
            2,
        ),
        place / f"two{rank}",
        stage,
        teacher,
        corpus,
    )
    dist.destroy_process_group()


def fit_log(run, path, stage, teacher, corpus):
    log = io.StringIO()
    t.fit(
        run,
        t.State(),
        stage,
        t.assemble(run, teacher, teacher, stage, 1, {}),
        t.training_batches(run, corpus, [7]),
        log,
        "",
    )
    path.write_text(log.getvalue())


def test_two_processes_and_two_parts_train_and_log_as_one(tmp_path):
    """The loop itself, of which the test of the gradients has only a copy."""
    teacher, corpus = (
        tiny_teacher().cpu(),
        some_tokens(np.random.default_rng(1).integers(0, 256, 400)),
    )
    stage = t.Stage(trains="all", mixers=HALF, steps=4, lr=1e-2)
    fit_log(
        t.Run(t.Settings(batch=4, context=16, dtype="float32"), torch.device("cpu")),
        tmp_path / "one",
        stage,
        teacher,
        corpus,
    )
    in_two_processes(fit_shared, tmp_path, stage, teacher, corpus)
    one, two = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("one", "two0")
    )
    for key in ("loss", "ce", "kl", "gradient"):
        assert [record[key] for record in two] == pytest.approx(
            [record[key] for record in one], rel=1e-3
        ), key


@pytest.mark.parametrize("content", [b"x", b"\xff", b"[1]"])
def test_what_is_wrong_with_pairs_names_pairs(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(MilError, match="^--pairs .*p.jsonl: "):
        t.load_pairs(small_run(tmp_path).s, [tmp_path / "p.jsonl"], g.load_tokenizer("bytes"))


def test_of_a_long_prompt_the_teacher_reads_the_end_and_of_one_text_nothing_of_its_validation_part(
    tmp_path,
):
    encoding, s = (
        g.load_tokenizer("bytes"),
        t.Settings(out=str(tmp_path), context=20, answer_tokens=5),
    )
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            json.dumps(record)
            for record in (
                {
                    "messages": [
                        {"role": "user", "content": "a" * 50 + "?"},
                        {"role": "assistant", "content": "b"},
                    ]
                },
                {"prompt": "a" * 50 + "?", "completion": "b"},
            )
        )
    )
    talk, plain = (bytes(ids) for _, ids in t.prompts_of(s, [str(tmp_path / "a.jsonl")], encoding))
    assert (
        talk.endswith(b"a?\nassistant:\n")
        and plain.endswith(b"a?")
        and len(talk) == len(plain) == 15
    )
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "", "completion": "b"}))
    assert (
        list(t.prompts_of(s, [str(tmp_path / "c.jsonl")], encoding)) == []
    )  # there is nothing to continue
    (tmp_path / "b.txt").write_text("a" * 180 + "b" * 20)
    asked = [record["prompt"] for record, _ in t.prompts_of(s, [str(tmp_path / "b.txt")], encoding)]
    assert len(asked) == 9 and not any("b" in text for text in asked)


def test_a_run_goes_on_with_other_flags_of_speed_and_with_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "checkpoint_digest", lambda place: "")
    run, stages = small_run(tmp_path), plans(4)
    corpus, pair = some_tokens(np.zeros(99, np.int16)), t.Models(None, tiny_teacher())
    t.save_state(
        run,
        t.load_state(run, stages, corpus),
        pair.student,
        SimpleNamespace(param_groups=[], state={}),
    )
    run.s.resume = True
    free = dict(
        save_minutes=1.0,
        keep_checkpoints=9,
        memory_budget=0.5,
        compile=False,
        prompt="x",
        accumulate=2,
    )
    assert t.load_state(
        t.Run(dataclasses.replace(run.s, **free), run.device), stages, corpus
    ).settings
    for name in {f.name for f in dataclasses.fields(run.s)} - {
        "out",
        "device",
        "resume",
        "recipe",
        *free,
    }:
        value = getattr(run.s, name)
        other = dataclasses.replace(
            run.s,
            **{
                name: not value
                if isinstance(value, bool)
                else [*value, "x"]
                if isinstance(value, list)
                else value + type(value)(1)
            },
        )
        with pytest.raises(MilError, match=f"made with other settings: --{name} was"):
            t.load_state(t.Run(other, run.device), stages, corpus)
    with pytest.raises(MilError, match="made with other settings: what --data holds was"):
        t.load_state(run, stages, corpus._replace(key="another"))


def test_a_step_in_which_nothing_is_to_be_learned_changes_nothing(tmp_path):
    run, stage, teacher = (
        small_run(tmp_path),
        t.Stage(trains="all", mixers=HALF, steps=1, lr=0.1),
        tiny_teacher(),
    )
    pair = t.assemble(run, teacher, teacher, stage, 1, {})
    before = {k: w.clone() for k, w in pair.student.state_dict().items()}
    corpus = some_tokens(np.full(99, ~7, np.int16))
    _, (record,) = fitted(run, pair, stage, t.training_batches(run, corpus, [0]))
    assert record["loss"] == 0 and all(
        torch.equal(w, before[k]) for k, w in pair.student.state_dict().items()
    )


def test_a_checkpoint_comes_every_so_many_minutes(tmp_path, monkeypatch):
    run, stage, now, saved = (
        small_run(tmp_path, save_minutes=1.0),
        t.Stage(trains="all", mixers=HALF, beta=0, steps=6, lr=0.1),
        iter(range(0, 10**6, 30)),
        [],
    )
    monkeypatch.setattr(
        t, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(now))
    )
    monkeypatch.setattr(t, "save_state", lambda run, state, *_: saved.append(state.step))
    fitted(run, t.assemble(run, None, tiny_teacher(), stage, 1, {}), stage, random_batches(run))
    assert saved == [2, 4]


def test_in_bfloat16_the_teacher_is_read_and_the_student_written_as_the_teachers_file_is(tmp_path):
    run = small_run(tmp_path, dtype="bfloat16", stage1_steps=2, stage2_steps=1)
    mil.save(tiny_teacher().bfloat16(), tmp_path / "teacher", tokenizer="bytes")
    data = some_tokens(np.random.default_rng(0).integers(0, 256, 500).astype(np.int16))
    teacher, base = t.read_models(run, tmp_path / "teacher")
    assert teacher is base and teacher.lm_head.weight.dtype == torch.bfloat16
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
    assert {
        w.dtype
        for k, w in mil.load(tmp_path / "student").named_parameters()
        if not mil.stays_wide(k)
    } == {torch.bfloat16}


@pytest.mark.parametrize("sign, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_ends_with_its_signals_code(sign, code):
    with pytest.raises(SystemExit) as e:
        t.leave(SimpleNamespace(stop=sign))
    assert e.value.code == code


def test_the_bounds_of_documents_in_several_rows():
    docs = mil.Documents(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]), torch.device("cpu"))
    assert docs.bounds.tolist() == [0, 3, 5, 6, 10]


def test_files_are_found_below_a_hidden_folder(tmp_path):
    (tmp_path / ".cache" / "notes").mkdir(parents=True)
    (tmp_path / ".cache" / "notes" / "a.txt").write_text("text")
    assert t.find_files([tmp_path / ".cache" / "notes"], "out") == [
        tmp_path / ".cache" / "notes" / "a.txt"
    ]


def test_what_a_run_wrote_is_not_read_whatever_its_path_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes" / "out").mkdir(parents=True)
    for name in ("a.txt", "out/log.txt"):
        (tmp_path / "notes" / name).write_text("text")
    (tmp_path / "again").symlink_to("notes")
    for path in ("notes", "again", "./notes", tmp_path / "again"):
        assert [p.name for p in t.find_files([path], "notes/out")] == ["a.txt"], path


def test_pairs_name_the_flag_they_came_by(tmp_path):
    s = t.Settings(recipe="r.json", pairs=[str(tmp_path / "p.jsonl")])
    for paths, flag in ((s.pairs, "--pairs"), ([str(tmp_path / "q.jsonl")], "--recipe: pairs")):
        with pytest.raises(MilError, match=f"^{flag} .*: no such file"):
            t.load_pairs(s, paths, g.load_tokenizer("bytes"))


def test_a_run_goes_on_from_the_newest_checkpoint(tmp_path):
    run, corpus, pair = (
        small_run(tmp_path, resume=True),
        some_tokens(np.arange(99)),
        t.Models(None, tiny_teacher()),
    )
    for step in (1, 2, 10):
        state = t.load_state(run, [], corpus)
        state.stage, state.step = 1, step
        t.save_state(run, state, pair.student)
        assert t.load_state(run, [], corpus).step == step


def test_attention_within_documents_is_that_of_each_document_alone():
    device, dtype = (
        (torch.device("cuda"), torch.bfloat16)
        if torch.cuda.is_available()
        else (torch.device("cpu"), torch.float32)
    )
    begins, l = [(0, 5, 6, 20), (0,)], 24
    pos = torch.stack(
        [torch.cat([torch.arange(b - a) for a, b in zip(row, (*row[1:], l))]) for row in begins]
    )
    docs = mil.Documents(pos, device, dtype)
    leaves = [
        torch.randn(2, l, heads, 16, device=device, dtype=dtype, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    rows = [
        torch.cat(
            [mil.sdpa(*[t[i : i + 1, a:b] for t in leaves]) for a, b in zip(row, (*row[1:], l))],
            dim=1,
        )
        for i, row in enumerate(begins)
    ]
    tolerance = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    y, want = docs.attend(*leaves), torch.cat(rows)
    torch.testing.assert_close(y, want, **tolerance)
    dy = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy)
    ):
        torch.testing.assert_close(got, wanted, **tolerance)


def test_this_torch_has_flash_attention_as_documents_call_it():
    q, k, bounds = (
        torch.empty(*shape, dtype=kind, device="meta")
        for *shape, kind in (
            (2, 3, 4, 16, torch.bfloat16),
            (2, 3, 2, 16, torch.bfloat16),
            (3, torch.int32),
        )
    )
    docs = SimpleNamespace(mask=None, bounds=bounds)
    assert mil.Documents.attend(docs, q, k, k).shape == q.shape


def test_the_log_has_means_over_the_steps_since_the_last_line(tmp_path):
    run, stage, teacher = (
        small_run(tmp_path),
        t.Stage(trains="all", mixers=HALF, beta=0, steps=201, lr=0.0),
        tiny_teacher(),
    )
    make = random_batches(run)
    _, records = fitted(
        run, t.assemble(run, None, teacher, stage, 1, {}), stage, lambda step: make(0)
    )
    assert [r["step"] for r in records] == [*range(2, 201, 2), 201] and {
        round(r["loss"], 3) for r in records
    } == {round(records[0]["loss"], 3)}


@pytest.mark.parametrize(
    "second, lines", [(0.1, [40]), (31, [*range(1, 41)]), (11, [*range(3, 40, 3), 40])]
)
def test_into_a_file_a_line_comes_every_half_a_minute_and_at_the_end(
    monkeypatch, tmp_path, capsys, second, lines
):
    run, stage, now = (
        small_run(tmp_path),
        t.Stage(trains="all", mixers=HALF, beta=0, steps=40, lr=0.0, name="s"),
        [0.0],
    )
    make = random_batches(run)
    monkeypatch.setattr(
        t, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: now[0])
    )

    def batch(step):
        now[0] = second * (step + 1)
        return make(0)

    monkeypatch.setattr(t.show, "last", 0.0)
    fitted(run, t.assemble(run, None, tiny_teacher(), stage, 1, {}), stage, batch)
    assert [
        int(line.split("step ")[1].split("/")[0])
        for line in capsys.readouterr().out.splitlines()
        if "step " in line
    ] == lines


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_signal_stops_a_run_at_once(monkeypatch, capfd, rank):
    run, heard = SimpleNamespace(stop="", rank=rank), {}
    monkeypatch.setattr(t.signal, "signal", heard.__setitem__)
    t.listen(run)
    heard[signal.SIGINT](signal.SIGINT, None)
    assert (
        run.stop == "SIGINT"
        and set(heard) == {signal.SIGINT, signal.SIGTERM}
        and ("a second signal stops at once" in capfd.readouterr().err) == (rank == 0)
    )
    with pytest.raises(KeyboardInterrupt):
        heard[signal.SIGTERM](signal.SIGTERM, None)


def test_a_loss_whose_perplexity_no_number_holds_is_a_row_like_any_other(tmp_path):
    run, model = small_run(tmp_path), tiny_teacher()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    _, row = t.evaluate(
        run,
        t.prepare(run, t.Models(None, model)),
        some_tokens(np.arange(99).astype(np.int16)),
        g.load_tokenizer("bytes"),
    )
    assert 800 < row["loss"] < math.inf and math.isfinite(row["perplexity"])


def test_a_new_mixer_inherits_from_attention_as_it_was_trained(tmp_path):
    run, teacher = small_run(tmp_path), tiny_teacher()
    weight = torch.randn_like(teacher.layers[0].mixer.q_proj.weight)
    stage = t.Stage(trains="mixers", mixers=["mamba2", *["attention"] * 3])
    trained = {"layers.0.mixer.q_proj.weight": weight, "norm.weight": torch.full((16,), 2.0)}
    student = t.assemble(run, teacher, teacher, stage, 1, trained).student
    query, *_ = student.layers[0].mixer.inherit()
    assert torch.equal(query, weight) and (student.norm.weight == 2).all()
    assert (teacher.norm.weight != 2).all()


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_one(tmp_path):
    run, pair = small_run(tmp_path, keep_checkpoints=1, resume=True), t.Models(None, tiny_teacher())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "09-00000000.pt").write_bytes(b"damaged")
    state = t.load_state(run, [], some_tokens(np.arange(99)))
    state.step = 3
    t.save_state(run, state, pair.student)
    assert t.load_state(run, [], some_tokens(np.arange(99))).step == 3


def talk(*said):
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def test_of_pairs_in_any_spelling_the_last_answers_alone_are_learned(tmp_path):
    asked, encoding = talk("a", "b", "c"), g.load_tokenizer("bytes")
    spellings = [
        {
            "prompt": "unused",
            "chosen": talk("a", "b", "c", "d"),
            "rejected": talk("a", "b", "c", "e"),
        },
        {"prompt": asked, "chosen": talk("", "d")[1:], "rejected": talk("", "e")[1:]},
        {"prompt": asked, "chosen": "d", "rejected": "e"},
    ]
    found = [t.conversations(record) for record in spellings]
    assert found == [found[0]] * 3 and found[0][1][0] == talk("a", "b", "c", "d")
    lines = [{**spellings[2], "prompt": talk("a", "b", str(i))} for i in range(20)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    s = t.Settings(batch=4, context=200)
    (chosen, rejected), *_ = t.load_pairs(s, [tmp_path / "p.jsonl"], encoding)[0]
    end = encoding.stops[:1]
    assert [i for i in chosen if i >= 0] == [*b"d", *end]
    assert [i for i in rejected if i >= 0] == [*b"e", *end]


@pytest.mark.parametrize(
    "chosen, rejected",
    [(["text"], "e"), ([], "e"), (talk("a"), talk("a")), (talk("a", "b"), talk("c", "d")), (1, 2)],
)
def test_pairs_that_are_not_two_answers_to_one_prompt_are_refused(tmp_path, chosen, rejected):
    record = {"prompt": "a", "chosen": chosen, "rejected": rejected}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    with pytest.raises(
        MilError, match="^--pairs .*p.jsonl: line 1: has .*expected a prompt and two"
    ):
        t.load_pairs(t.Settings(), [tmp_path / "p.jsonl"], g.load_tokenizer("bytes"))
