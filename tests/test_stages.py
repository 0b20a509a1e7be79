"""The stages of a run: their order, recipes, what each reads and trains; answers, preferences."""

import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from test_train_distill import (
    BYTES,
    HALF,
    SMALL,
    fill,
    lines,
    log_probability,
    pair,
    plain_loss,
    refused,
    shown,
    talk,
    taught,
    tiny,
    train,
    write_recipe,
)

import generate as g
import mil
import train_distill as t
from mil import Config


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("shelf"))


def plans(n, **changes):
    return t.plan(t.Settings(stage1_steps=100, stage2_steps=10, **changes), Config(n_layers=n))


def replaced(stages):
    return [[i for i, m in enumerate(stage.mixers) if m != "attention"] for stage in stages]


# --------------------------------------------------------------------------------------------------
# The plan


def test_attention_is_replaced_in_the_papers_steps_spread_evenly_at_each():
    fours, evens = [*range(0, 32, 4)], [*range(0, 32, 2)]
    assert replaced(plans(32)) == [fours, evens, evens]
    assert [*map(len, replaced(plans(32, keep=0)))] == [8, 16, 24, 28, 32, 32]
    assert [*map(len, replaced(plans(4, keep=0)))] == [1, 2, 3, 4, 4]  # some steps are one
    for n, keep in ((32, 0.0), (12, 0.25), (7, 0.5), (5, 0.0), (9, 0.4)):
        *grown, last = replaced(plans(n, keep=keep))
        assert grown[-1] == last == mil.interleaved_layers(n, keep)
        assert all(set(a) < set(b) for a, b in itertools.pairwise([[], *grown]))
    stages = plans(32, keep=0.25)
    assert [stage.steps for stage in stages] == [33, 33, 34, 10]
    assert [stage.trains for stage in stages] == ["mixers"] * 3 + ["all"]


def test_where_nothing_could_train_alone_everything_trains_in_one_stage():
    for more in (dict(mixer="none"), dict(student_layers="0,1,2,3")):
        (stage,) = plans(4, **more)
        assert (stage.trains, stage.steps, len(replaced([stage])[0])) == ("all", 110, 2)


def test_rates_follow_the_size_of_the_student_up_to_those_of_small_models():
    small = Config(v=257, d=16, n_layers=32, n_heads=2, n_kv_heads=1, d_ff=24)
    quarter = dataclasses.replace(Config(), n_layers=8, mixers=[], v=4008)
    size = sum(w.numel() for w in mil.empty_model(quarter).parameters())
    for config, rate in ((Config(), 1), (quarter, math.sqrt(8e9 / size)), (small, 1e9)):
        first, *_, last = t.plan(t.Settings(stage1_steps=100, stage2_steps=10), config)
        wanted = min(3e-3, 8e-5 * rate), min(1e-3, 2e-5 * rate)
        assert (first.lr, last.lr) == pytest.approx(wanted, rel=0.01)


def test_a_recipe_is_a_list_of_stages_and_the_command_line_says_the_rest(tmp_path):
    recipe = write_recipe(
        tmp_path,
        {"replace": [3], "mixer": "mamba", "steps": 7, "beta": 0},
        {"keep": 0.25, "lr": 1, "reverse": True, "schedule": "constant"},
        {"trains": "all", "alpha": 0, "temperature": 3},
        {"trains": "mlps", "steps": 9},
        {"loss": "dpo", "data": ["p.jsonl"], "name": "taste"},
    )
    more = dict(stage1_lr=0.5, stage2_lr=0.25, stage3_steps=5, beta=0.125, dpo_beta=3.0)
    stages = plans(4, recipe=str(recipe), **more, temperature=2.0, schedule="linear", warmup=0.75)
    assert stages[0].mixers == ["attention"] * 3 + ["mamba"]
    assert [s.mixers for s in stages[1:]] == [["mamba2", "mamba2", "attention", "mamba"]] * 4
    assert [
        (s.trains, s.steps, s.lr, s.alpha, s.beta, s.reverse, s.temperature, s.schedule, s.warmup)
        for s in stages
    ] == [
        ("mixers", 7, 0.5, 1.0, 0, False, 2.0, "linear", 0.75),
        ("mixers", 100, 1, 1.0, 0.125, True, 2.0, "constant", 0.75),
        ("all", 10, 0.25, 0, 0.125, False, 3, "linear", 0.75),
        ("mlps", 9, 0.5, 1.0, 0.125, False, 2.0, "linear", 0.75),
        ("all", 5, 1e-5, 1.0, 3.0, False, 2.0, "linear", 0.75),
    ]
    assert stages[-1].name == "taste" and stages[-1].data == ["p.jsonl"]


REFUSED = [
    ('[{"keep": 0.5}, {"replace": [0]}]', "stage 2 layer 0 twice"),
    ('[{"replace": [1, 1]}]', "stage 1 layers 1, 1 once"),
    ('[{"replace": [4]}]', "layers 4 0 to 3"),
    ('[{"replace": ["a"]}]', "stage 1 layers a expected"),
    ('[{"keep": 0.1}]', "stage 1 keep less than 1 of 4"),
    ('[{"keep": 0.25}, {"keep": 0.5}]', "stage 2 keep 0.5 1 of 4"),
    ('[{"keep": 0.5, "replace": [1]}]', "keep replace one"),
    ('[{"keep": 0.5, "alpha": 0, "beta": 0}]', "stage 1 nothing learned"),
    ('[{"stpes": 3}]', "list of stages 'stpes'"),
    ('[{"steps": "3"}]', "stage 1 steps '3'"),
    ('[{"keep": 0.5, "steps": 0}]', "steps 0"),
    ('[{"keep": 0.5, "lr": -1}]', "lr -1"),
    ('[{"keep": 0.5, "schedule": "up"}]', "schedule 'up' cosine"),
    ('[{"keep": 0.5, "mixer": "none"}]', "none to train"),
    ('[{"trains": "mixers"}]', "none to train"),
    ('[{"trains": "some"}]', "trains 'some' mlps"),
    ('[{"keep": 0.5, "loss": "ppo"}]', "loss 'ppo' dpo"),
    ('[{"loss": "dpo"}]', "dpo no data"),
    ('[{"loss": "dpo", "data": ["x"], "beta": 0}]', "beta 0 nothing learned"),
    ("[3]", "list of stages"),
    ("[]", "list of stages"),
]


@pytest.mark.parametrize("text, words", REFUSED)
def test_a_stage_that_cannot_be_is_refused_in_one_line_by_its_number(tmp_path, text, words):
    (tmp_path / "recipe.json").write_text(text)
    with refused(f"recipe.json {words}"):
        plans(4, recipe=str(tmp_path / "recipe.json"))


# --------------------------------------------------------------------------------------------------
# What a stage trains


@pytest.mark.parametrize("trains", ["mixers", "mlps", "all"])
def test_a_stage_trains_its_share_and_the_rest_stays_the_teachers(shelf, tmp_path, trains):
    stage = {"replace": [1, 2], "trains": trains, "steps": 3, "lr": 0.1, "mixer": "mamba"}
    done = taught(shelf, tmp_path / "o", recipe=write_recipe(tmp_path, stage))
    assert done.student.config.mixers == ["attention", "mamba", "mamba", "attention"]
    teachers = mil.load(shelf / "teacher", "cpu").state_dict()
    found = done.student.state_dict()
    same = {k for k, w in teachers.items() if k in found and torch.equal(w, found[k])}
    stays = {k for k in teachers if not k.startswith(("layers.1.mixer", "layers.2.mixer"))}
    if trains == "mlps":
        stays = {k for k in stays if ".mlp." not in k}
    assert same == (set() if trains == "all" else stays)
    teacher = mil.replace_attention(mil.load(shelf / "teacher", "cpu"), [1, 2], "mamba")
    for layer in (1, 2):
        began, now = (model.layers[layer].mixer.inherit() for model in (teacher, done.student))
        assert not any(torch.equal(a, b) for a, b in zip(began, now, strict=True))


@pytest.mark.parametrize("init", ["attention", "random"])
def test_a_stage_begins_with_what_those_before_trained_and_keeps_it(shelf, tmp_path, init):
    """A new mixer inherits from attention that was trained, unless it is to be random."""
    first = {"keep": 0.75, "trains": "all", "steps": 3, "lr": 0.01}
    second = {"keep": 0.5, "trains": "mixers", "steps": 1, "lr": 0}
    runs = zip("12", ([first], [first, second]), strict=True)
    one, both = (
        taught(shelf, tmp_path / name, recipe=write_recipe(tmp_path, *stages), init=init).student
        for name, stages in runs
    )
    assert both.config.mixers == HALF and one.config.mixers[2] == "attention"
    kept, found = one.state_dict(), both.state_dict()
    new = {k for k in found if k.startswith("layers.2.mixer.")}
    assert all(torch.equal(w, kept[k]) for k, w in found.items() if k not in new)
    wanted = mil.replace_attention(one, [2]).layers[2].mixer.inherit()
    pairs = zip(both.layers[2].mixer.inherit(), wanted, strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [init == "attention"] * 4


def test_the_log_has_the_mean_over_what_a_step_learns_by_hand(shelf, tmp_path, monkeypatch):
    """Of a long stage over two steps; also of a step in which nothing is to be learned."""
    text = lines(*[{"prompt": "x" * 60, "completion": "abcdef"}] * 20)
    (tmp_path / "a.jsonl").write_text(text)
    stage = {"keep": 0.5, "trains": "all", "steps": 200, "lr": 0, "alpha": 0.3, "beta": 0.7}
    made, honest = [], t.windows

    def windows(*args):
        found = honest(*args)
        made.extend([found] * torch.is_grad_enabled())
        return found

    monkeypatch.setattr(t, "windows", windows)
    files = dict(data=tmp_path / "a.jsonl", recipe=write_recipe(tmp_path, stage))
    done = taught(shelf, tmp_path / "o", "--context 16 --batch 2", **files)
    teacher, counts, wanted = mil.load(shelf / "teacher", "cpu"), [], []
    for x, y, pos in made[:20]:
        docs = mil.Documents(pos, torch.device("cpu"))
        with torch.no_grad():
            logits = [model(x, docs=docs).flatten(0, 1) for model in (done.student, teacher)]
        counts.append(int((y >= 0).sum()))
        sums = plain_loss(*logits, y.flatten(), 0.3, 0.7)
        wanted.append([loss.sum().item() / max(1, counts[-1]) for loss in sums])
    for i, record in enumerate(done.log[:10]):
        means = [sum(values) / 2 for values in zip(*wanted[2 * i : 2 * i + 2], strict=True)]
        assert [record[k] for k in ("ce", "kl", "loss")] == pytest.approx(means, rel=1e-4)
    assert 0 in counts and len({*counts}) > 2


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_is_the_same_teacher_and_order_and_another_one_is_not(shelf, tmp_path, seed):
    sizes = "--n_layers 2 --d 16 --n_heads 2 --n_kv_heads 1 --d_ff 24 --teacher_lr 0 "
    argv = SMALL + sizes + "--teacher_steps 2 --stage1_steps 2 --stage2_steps 0"
    first = train(tmp_path / "1", argv, data=shelf / "text.txt")
    again = train(tmp_path / "2", argv, data=shelf / "text.txt", seed=seed)
    weights = [run.teacher.lm_head.weight for run in (first, again)]
    assert [torch.equal(*weights), first.log == again.log] == [seed == 0] * 2


# --------------------------------------------------------------------------------------------------
# What a run reads


@pytest.fixture(scope="module")
def watched(shelf, tmp_path_factory):
    """A run through stages of every kind, what its student reads, and what AdamW is given."""
    place, read, steps = tmp_path_factory.mktemp("watched"), [], []
    recipe = write_recipe(
        place,
        {"keep": 0.75, "steps": 8},
        {"keep": 0.5, "steps": 8, "schedule": "linear"},
        {"trains": "all", "steps": 8, "schedule": "constant", "data": [str(shelf / "text.txt")]},
        {"loss": "dpo", "lr": 0.01},
    )
    hidden, step = mil.Hybrid.hidden, torch.optim.AdamW.step

    def reads(model, tokens, *rest, **more):
        if torch.is_grad_enabled():
            read.append(tokens)
        return hidden(model, tokens, *rest, **more)

    def steps_with(optimizer, *rest):
        group = optimizer.param_groups[0]
        norm = torch.cat([w.grad.flatten() for w in group["params"]]).norm().item()
        steps.append((group["lr"], norm, group["betas"], group["weight_decay"]))
        return step(optimizer, *rest)

    files = dict(data=shelf / "chat.jsonl", pairs=shelf / "pairs.jsonl", recipe=recipe)
    argv = "--pseudo_labels --answer_tokens 4 --warmup 0.25 --clip 1e-3 --stage1_lr 0.5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mil.Hybrid, "hidden", reads)
        patch.setattr(torch.optim.AdamW, "step", steps_with)
        done = taught(shelf, place / "o", argv, stage2_lr=0.25, **files)
    return SimpleNamespace(out=place / "o", read=read, steps=steps, **vars(done))


def test_rates_rise_and_fall_as_the_stages_say_and_gradients_are_clipped(watched):
    left = [1 - i / 6 for i in range(6)]
    cosine = [(1 - math.cos(math.pi * share)) / 2 for share in left]
    wanted = [0.25, 0.5, *(0.5 * share for share in cosine)]
    wanted += [0.25, 0.5, *(0.5 * share for share in left), 0.125, *[0.25] * 7]
    rates, norms, *how = zip(*watched.steps, strict=True)
    assert list(rates[:24]) == pytest.approx(wanted)
    assert list(rates) == [record["lr"] for record in watched.log]
    assert max(norms) == pytest.approx(1e-3, rel=0.01)
    assert max(record["gradient"] for record in watched.log) > 0.01  # before it is clipped
    assert set(how[0]) == {(0.9, 0.98)} and set(how[1]) == {0}


def test_every_step_of_every_stage_reads_other_windows(watched):
    assert len({x.numpy().tobytes() for x in watched.read}) == 8 * 3 + 19


def test_stages_read_the_answers_or_data_of_their_own_and_nothing_held_out(watched):
    rows = [shown(row.tolist()) for x in watched.read[:24] for row in x]
    texts = ["\n".join(rows[i : i + 32]) for i in (0, 32, 64)]
    assert all("and" in text and "it is" not in text for text in texts[:2])  # but in the data
    assert " of " in texts[2] and "and" not in texts[2]
    asked = {int(i) for text in texts for i in re.findall(r"user:\n(\d+) and", text)}
    assert asked and not asked & {9, 29, 49, 69}
    lasts = {int(i) for i in re.findall(r"the (\d+) of", texts[2])}
    assert lasts and max(lasts) <= 365  # the last tenth of the text's bytes begins there


def test_every_training_pair_comes_once_an_epoch_beside_its_other_answer(watched):
    seen = []
    for x in watched.read[24:]:
        for chosen, rejected in zip(*x.chunk(2), strict=True):
            one, other = (shown(row.tolist()).split("assistant:\n") for row in (chosen, rejected))
            i = int(re.search(r"(\d+) and 1\?", one[0])[1])
            assert f"{i} and 1?" in other[0]
            assert one[1].startswith(f"it is {i + 1}") and other[1].startswith(f"no, {i}")
            seen.append(i)
    assert sorted(seen) == [i for i in range(40) if i not in (9, 29)]
    assert seen != sorted(seen)


def test_preferences_are_counted_on_the_held_out_pairs_by_hand(watched, shelf):
    s = t.Settings(out=str(watched.out), batch=4, context=32)
    _, held = t.load_pairs(s, [str(shelf / "pairs.jsonl")], BYTES)
    teacher = mil.load(shelf / "teacher", "cpu")
    with torch.no_grad():
        gains = [
            log_probability(watched.student, ids) - log_probability(teacher, ids)
            for pair in held
            for ids in pair
        ]
    margins = [0.1 * (gains[i] - gains[i + 1]).item() for i in (0, 2)]
    row, n, right = watched.rows[-1], len(held), sum(margin > 0 for margin in margins)
    assert n == 2 and row["preferred"] == right / n
    assert row["margin"] == pytest.approx(sum(margins) / n, rel=1e-3)
    rather = (right + 1) / (n + 2)
    assert row["preferred_error"] == pytest.approx(math.sqrt(rather * (1 - rather) / (n + 2)))
    assert not {"preferred", "margin"} & watched.rows[-2].keys()


# --------------------------------------------------------------------------------------------------
# Pairs


def load(tmp_path, records, **more):
    (tmp_path / "p.jsonl").write_text(lines(*records))
    s = t.Settings(out=str(tmp_path / "o"), **dict(batch=4, context=200) | more)
    return t.load_pairs(s, [str(tmp_path / "p.jsonl")], BYTES)


ASKED, D, E = talk("a", "b", "c"), talk("", "d")[1:], talk("", "e")[1:]
IN_PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "d"}]}]
SPELLINGS = {
    "both with the prompt": dict(prompt="unused", chosen=ASKED + D, rejected=ASKED + E),
    "a prompt and messages": dict(prompt=ASKED, chosen=D, rejected=E),
    "a prompt and texts": dict(prompt=ASKED, chosen="d", rejected="e"),
    "content in parts": dict(prompt=ASKED, chosen=IN_PARTS, rejected="e"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_of_pairs_in_any_spelling_the_last_answers_alone_are_learned(tmp_path, spelling):
    records = [pair(i) for i in range(20)]
    records[0] = SPELLINGS[spelling]
    found = load(tmp_path, records)[0][0]
    read = "user:\na\nassistant:\nb.\nuser:\nc\nassistant:\n"
    assert [shown(ids) for ids in found] == [f"{read}[d.]\n", f"{read}[e.]\n"]


def test_pairs_of_one_prompt_are_all_learned_or_all_held_out(tmp_path):
    records = [{"prompt": f"{i % 30}?", "chosen": "y", "rejected": f"{i}"} for i in range(90)]
    train, held = load(tmp_path, records)
    asked = [{tuple(i for i in chosen if i < 0) for chosen, _ in part} for part in (train, held)]
    assert (len(train), len(held), len(asked[1])) == (84, 6, 2) and not asked[0] & asked[1]


def test_of_a_long_prompt_the_end_is_kept_and_of_a_long_answer_the_beginning(tmp_path):
    """The prompt keeps half of the room, and what the answer leaves."""
    sizes = [(1, 1), (30, 5), (5, 90), (90, 90), (300, 2), (2, 300)]
    digits = "".join(str(i % 10) for i in range(300))
    records = [{"prompt": digits[-p:], "chosen": digits[:a], "rejected": ""} for p, a in sizes]
    found, _ = load(tmp_path, records + [pair(i) for i in range(9)], context=59)
    for (p, a), (ids, _) in zip(sizes, found, strict=False):
        whole, first = f"user:\n{digits[-p:]}\nassistant:\n", [i >= 0 for i in ids].index(True)
        read, said = shown(ids[:first]), shown([i for i in ids if i >= 0])[1:-1]
        assert whole.endswith(read) and f"{digits[:a]}.".startswith(said)
        assert len(ids) == min(60, len(whole) + a + 2)
        assert len(read) == min(len(whole), max(30, 60 - a - 2))


# --------------------------------------------------------------------------------------------------
# The teacher's answers


def answers_of(out):
    """The files of the teacher's answers, and their lines."""
    files = sorted((out / "data").glob("*.answers/*.jsonl"))
    return files, [json.loads(line) for file in files for line in file.read_text().splitlines()]


RECORDS = [
    {"messages": [{"role": "system", "content": "s"}, *talk("u", "a", "w")]},
    {"prompt": "a" * 50 + "?", "completion": "c"},
    {"messages": talk("nobody answers")},
    {"text": "t" * 95},
    {"prompt": "", "completion": "c"},
    {"messages": talk("b" * 50 + "?", "a")},
]
ASKED_BY = [[RECORDS[0]["messages"][:2]], ["a" * 50 + "?"], [talk("nobody answers")]]
ASKED_BY += [["t" * 10] * 3, [], [talk("b" * 50 + "?")]]


def test_the_teacher_answers_what_the_training_documents_ask(shelf, tmp_path):
    """What comes before a first answer, of a text the first quarter of every window; the end, if it
    is long. A missing batch is made again, the same; another seed or teacher gives others."""
    (tmp_path / "a.jsonl").write_text(lines(*RECORDS * 4))
    recipe = write_recipe(tmp_path, {"keep": 0.5, "steps": 1, "lr": 0})
    argv = "--context 40 --batch 8 --eval_sequences 1 --pseudo_labels --answer_tokens 12 --seed 3"
    given = dict(data=tmp_path / "a.jsonl", recipe=recipe)
    train(tmp_path / "o", argv, teacher=shelf / "teacher", **given)
    files, found = answers_of(tmp_path / "o")
    asked = [what for i in range(24) if i != 9 for what in ASKED_BY[i % 6]]
    assert [r["messages"][:-1] if "messages" in r else r["prompt"] for r in found] == asked
    check_answers(shelf / "teacher", found, 8)
    lengths = [sum(token < 0 for token in r["tokens"]) for r in found]
    assert max(lengths) == 28 and shown(found[1]["tokens"]).startswith("a" * 27 + "?[")
    marked = files[0].read_bytes().replace(b"{", b"{ ", 1)  # seen if it is made again
    files[0].write_bytes(marked)
    whole = [file.read_bytes() for file in files]
    for lost in (files[1:2], files[1:]):
        for file in lost:
            file.unlink()
        train(tmp_path / "o", argv, teacher=shelf / "teacher", **given)
        assert [file.read_bytes() for file in files] == whole
    mil.save(tiny(5).cpu(), tmp_path / "teacher", tokenizer="bytes")
    for name, more in (("1", "--seed 4"), ("2", f"--teacher {tmp_path}/teacher")):
        train(tmp_path / name, f"{argv} --teacher {shelf}/teacher {more}", **given)
        assert answers_of(tmp_path / name)[1][0]["tokens"] != found[0]["tokens"], more


def check_answers(place, found, rows):
    """Every batch of answers is a sample, by its seed, of what the teacher says to its prompts."""
    teacher, seeds = mil.load(place, "cpu"), []
    for i in range(0, len(found), rows):
        batch = [record["tokens"] for record in found[i : i + rows]]
        (seed,) = {record["seed"] for record in found[i : i + rows]}
        prompts = [[~token for token in ids if token < 0] for ids in batch]
        replies, gen = [[] for _ in batch], torch.Generator().manual_seed(seed)
        for new in g.generate(teacher, prompts, 12, stop=BYTES.stops, generator=gen):
            replies = [[*a, *b] for a, b in zip(replies, new, strict=True)]
        assert replies == [[token for token in ids if token >= 0] for ids in batch]
        seeds.append(seed)
    assert len(set(seeds)) == len(seeds)
