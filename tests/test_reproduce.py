"""tests/reproduce.py: its text, its measures, its students, its tables; and all of it, small."""

import dataclasses
import json
import math
import random
import re
from concurrent.futures import Future
from types import SimpleNamespace

import pictures
import pytest
import reproduce as r
import torch
from conftest import DEVICE, build, run_script
from hypothesis import given
from hypothesis import strategies as st

import mil
import train_distill as td

NOTE = r"# (\w\w=\d{3})\n"


@given(st.integers(0, 99), st.integers(100, 640))
def test_every_note_comes_twice_again_within_its_reach_and_the_rest_is_the_text(seed, context):
    text = "".join(f"{'    ' * (i % 3)}x_{i} = {i}\n" for i in range(400))
    noted = r.with_notes(text, context, random.Random(seed))
    assert re.sub(f"(?m)^{NOTE}", "", noted) == text
    places = {}
    for m in re.finditer(NOTE, noted):
        places.setdefault(m[1], []).append(m.start())
    thrice = [at for at in places.values() if len(at) == 3]
    # The last ones are due after the end of the text; two notes may be alike by chance.
    assert len(places) >= 20 and len(thrice) >= len(places) - 12
    # 150: a line, and others that are due.
    assert all(b - a >= 16 and c - a < context * 3 // 4 + 150 for a, b, c in thrice)


@pytest.mark.parametrize(
    "header, body, whole",
    [
        ("def f(x):\n", "    return x\nprint(", True),  # what follows is no part of the function
        ("    def f(x):\n", "        if x:\n            return 1\n    def", True),
        ("def f(x):\n", "    return (x\n\ndef g", False),
        ("def f(x):\n", "    if x:\n", False),  # the text ends before the block does
        ("def f(x):\n", "    y = 1\n# kd=582\n    return y\n", True),
        ("def f(x):\n", "    return x +", False),  # nothing but a broken line
    ],
)
def test_a_function_parses_up_to_where_it_ends(header, body, whole):
    assert r.parses(header, body) is whole


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A Lab of 400 short files, whose teacher has learned nothing."""
    place = tmp_path_factory.mktemp("lab")
    for i in range(400):
        lines = [f"def f{i}_{j}({'x' * (j % 9)}):\n    return {i * j}\n" for j in range(30)]
        (place / f"{i:03d}.py").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(td, "standard_library", lambda: sorted(place.glob("*.py")))
        lab = r.Lab(r.sizes(True), place / "out", torch.device(DEVICE))
    lab.out.mkdir()
    lab.teacher = build(td.new_config(lab.s, lab.encoding), torch.float32)
    return lab


def test_rates_are_chosen_on_a_quarter_of_the_unseen_texts_and_nothing_is_measured_there(lab):
    def texts(corpus):
        ends = [*corpus.begins[1][1:], len(corpus.val)]
        parts = [corpus.val[i : j - 1] for i, j in zip(corpus.begins[1], ends, strict=True)]
        return [re.sub(f"(?m)^{NOTE}", "", bytes([*part]).decode()) for part in parts]

    chosen, measured = texts(lab.sweep_corpus), texts(lab.corpus)
    assert (len(chosen), len(measured)) == (5, 15) and not {*chosen} & {*measured}
    assert measured == lab.unseen
    train = bytes(i for i in lab.corpus.train.tolist() if i < 256).decode()
    assert not any(re.search(r"def (\w+)", text)[1] + "(" in train for text in chosen + measured)


@given(st.integers(128, 999), st.floats(0, 1), st.integers(0, 9))
def test_a_haystack_has_its_length_a_note_at_its_depth_and_the_question_at_its_end(
    lab, length, depth, seed
):
    text = bytes(r.haystack(lab.ascii, length, depth, random.Random(seed))).decode()
    needle, again = re.findall(r"(?m)^# \w\w=\d{3}$", text)
    assert len(text) == length and needle == again and text.endswith("\n" + needle)
    at, wanted = text.index(needle), int(depth * (length - 18))
    assert at <= wanted + 1 and "\n" not in text[at + 9 : wanted + 9]  # behind the last whole line


class Reader(SimpleNamespace):
    """Finds the number of a needle; of one in the upper half it gets the digit `wrong` wrong."""

    def hidden(self, tokens):
        guess = torch.zeros_like(tokens)
        for row, ids in zip(guess, tokens.tolist(), strict=True):
            m = re.search(rb"# \w\w=(\d{3})", bytes(ids))
            row[-3:] = torch.tensor([*m[1]])
            if m.start() < len(ids) / 2:
                row[self.wrong - 3] = ord("x")
        return guess

    def lm_head(self, guess):
        return torch.nn.functional.one_hot(guess, 257)


@pytest.mark.parametrize("wrong", range(3))
def test_a_needle_is_found_where_all_its_digits_are_likeliest_and_counts_at_its_depth(
    lab, wrong, monkeypatch
):
    monkeypatch.setattr(r, "losses", lambda model, tokens: torch.zeros(tokens.shape))
    found = r.long_texts(lab, Reader(wrong=wrong))
    assert found["needles"] == {128: [0, 1], 256: [0, 1]}  # the beginning first
    assert found["found@128"] == found["found@256"] == 0.5


def test_perplexity_by_length_is_that_of_the_same_bytes_after_more_and_more_text(lab):
    found = r.long_texts(lab, lab.teacher)
    for length in (128, 256):
        rows = lab.windows[:, -length - 1 :]
        with torch.no_grad():
            log_p = lab.teacher(rows[:, :-1]).log_softmax(-1).gather(2, rows[:, 1:, None])
        perplexity = (-log_p[:, -32:]).mean().exp().item()
        assert found[f"perplexity@{length}"] == pytest.approx(perplexity, rel=1e-4)


def test_of_two_answers_the_one_that_parses_is_preferred_and_held_out_files_are_not_learned_from(
    lab, monkeypatch
):
    answers = {11: "    return 1\n ", 10**6: "    return (\n "}

    def complete(lab, model, prompts, seed):
        texts = list(answers.values()) if seed == 11 else list(answers.values())[::-1]
        return [lab.encoding.encode(texts[i % 2]) for i in range(len(prompts))]

    monkeypatch.setattr(r, "complete", complete)
    assert r.make_pairs(lab) == lab.size.pairs
    held, learned = r.read_pairs(lab)
    for pair in held + learned:
        said = [lab.encoding.decode([i for i in ids if i >= 0]) for ids in pair]
        assert said == [answers[11], answers[10**6]]
        assert min(pair[0]) < 0 and bytes(~i for i in pair[0] if i < 0).decode().endswith(":\n")
    names = [
        {bytes(~i for i in p[0] if i < 0).split(b"def f")[-1].split(b"_")[0] for p in part}
        for part in (held, learned)
    ]
    assert held and learned and not names[0] & names[1]


def test_every_arm_replaces_the_layers_and_trains_what_it_is_named_for():
    arms, size = {arm.name: arm for arm in r.arms(r.TABLES)}, r.sizes(False)
    first, last = [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5)], [(6, 7), (4, 5, 6, 7)]
    for name, path in {"first": first, "last": [*last, (2, 3, 4, 5, 6, 7)]}.items():
        assert arms[f"half, the {name} layers"].path == path[:2]
        assert arms[f"quarter, the {name} layers"].path == path
    mixers = {
        "mamba": "mamba",
        "half, mamba": "mamba",
        "half, linear": "mamba",
        "half, nothing": "none",
    }
    for name, arm in arms.items():
        if "the" not in name:  # evenly spread, as mil.py has it
            last = arm.path[-1]
            assert last == tuple(mil.interleaved_layers(8, 1 - len(last) / 8)), name
        before = 0
        for level, number, stage in arm.stages(size, 5e-3):
            done, new = arm.path[number % 10], mixers.get(name, "mamba2")
            trains = "mlps" if "mlps" in name else "all" if "nothing" in name else "mixers"
            steps = 22 * (len(done) - before) + 360 * ("longer" in name and len(done) == 4)
            wanted = {
                1: (trains, "distill", 1, 1, steps, 5e-3),
                2: ("all", "distill", 1, 1, 360, 3e-3),
                3: ("all", "dpo", 1, 0.1, 40, 3e-5),
            }
            how = stage.trains, stage.loss, stage.alpha, stage.beta, stage.steps, stage.lr
            assert how == wanted[level], name
            assert stage.mixers == [new if i in done else "attention" for i in range(8)], name
            before = len(done)
        assert arm.init == ("random" if name.startswith("random") else "attention")
        assert arm.linear == (name == "half, linear")


@pytest.fixture
def fits(lab, monkeypatch):
    """td.fit adds 1/8 to what trains. A list of what was fitted, and where it was measured."""
    found = []

    def fit(run, state, stage, models, batches, *_):
        one, weights = SimpleNamespace(seed=run.s.seed), dict(models.student.named_parameters())
        one.before = {name: w.detach().clone() for name, w in weights.items()}
        one.trains = {name for name, w in weights.items() if w.requires_grad}
        one.after = {name: w + 0.125 * (name in one.trains) for name, w in one.before.items()}
        one.x = batches(0)[0][0].x
        models.student.load_state_dict(one.after, strict=False)
        found.append(one)

    def evaluate(run, models, corpus, encoding):
        found[-1].corpus = corpus
        return {"perplexity": 2.0}, {"perplexity": 3.0, "kl": 0.5, "loss": 0.25}

    monkeypatch.setattr(td, "fit", fit)
    monkeypatch.setattr(td, "evaluate", evaluate)
    return found


def same(a, b, names):
    return bool(names) and all(torch.equal(a[name], b[name]) for name in names)


def test_a_stage_begins_as_the_one_before_left_the_student_and_stage_1_as_if_no_other_had_been(
    lab, fits, monkeypatch
):
    pairs = [[[~65, 66, 67], [~65, 67, 66]]] * 2
    monkeypatch.setattr(r, "read_pairs", lambda lab: (pairs, pairs))
    monkeypatch.setattr(td, "preferences", lambda *_: {"preferred": len(fits)})
    rows = r.learn(lab, r.Arm("arm", [(0, 1, 2, 3), (0, 1, 2, 3, 4)], 3), 0, 1e-3)
    first, second, third, again, *_ = fits
    teacher = dict(lab.teacher.named_parameters())
    assert {name.split(".")[1] for name in first.trains} == {"0", "1", "2", "3"}
    assert all(".mixer." in name for name in first.trains) and second.trains == {*second.after}
    assert same(second.before, first.after, first.after)
    assert same(third.before, second.after, second.after)
    assert same(again.before, first.after, first.trains) and again.trains > first.trains
    assert same(again.before, teacher, {*teacher} & ({*again.before} - again.trains))
    step = lab.s.batch * lab.s.context / (4 * 512 + 512)  # of the teacher's tokens
    assert [row["share"] / step for row in rows] == pytest.approx([4, 5, 5, 5, 6, 6])
    assert [row["stages"] for row in rows] == ["1", "1 + 2", "1 + 2 + 3"] * 2
    assert [(row["replaced"], row["ratio"]) for row in rows[::3]] == [(4, 1.5), (5, 1.5)]
    assert [row.get("preferred") for row in rows] == [None, 2, 3, None, 5, 6]


def test_a_sweep_measures_the_end_of_stage_1_on_text_of_its_own_and_seeds_read_other_text(
    lab, fits
):
    arm = r.Arm("arm", [(0, 1), (0, 1, 2, 3)], 2)
    (row,) = r.learn(lab, arm, r.SWEEP, 1e-3, True)
    assert row["replaced"] == 4 and len(fits) == 2 and fits[1].corpus is lab.sweep_corpus
    assert not hasattr(fits[0], "corpus")
    for seed in (0, 1):
        r.learn(lab, arm, seed, 1e-3)
    assert len(fits) == 8 and all(one.corpus is lab.corpus for one in fits[2:])
    texts = {tuple(one.x.flatten().tolist()) for one in fits}
    assert len(texts) == 8 and len({one.seed for one in fits} | {lab.s.seed}) == 4
    name = "layers.0.mixer.dt_bias"
    assert not torch.equal(fits[2].before[name], fits[5].before[name])


def test_linear_attention_does_not_decay_and_stays_so_in_stage_2(lab, fits):
    r.learn(lab, r.Arm("arm", [(0, 1, 2, 3)], 2, "mamba", linear=True), 0, 1e-3)
    for one in fits:
        decay = {name: w for name, w in one.after.items() if "A_log" in name}
        assert len(decay) == 4 and all((w.exp() == 0).all() for w in decay.values())
        bias, weight = (one.after[f"layers.0.mixer.dt_proj.{k}"] for k in ("bias", "weight"))
        assert torch.allclose(torch.nn.functional.softplus(bias), torch.ones_like(bias))
        assert not weight.any() and "layers.0.mixer.in_proj_x.weight" in one.trains


def test_a_student_that_diverges_says_so_and_of_its_arm_nothing_is_shown(lab, monkeypatch):
    def fit(run, state, stage, *_):
        raise mil.MilError("the loss became nan")

    (arm,) = [arm for arm in r.arms(["order"]) if arm.name == "half, at once"]
    good = dict(arm=arm.name, replaced=4, stages="1", seed=0, kl=1.0)
    assert pictures.students([good], r.key(arm.name, 4, "1")) == [good]
    monkeypatch.setattr(td, "fit", fit)
    (row,) = r.learn(lab, arm, 1, 3e-3)
    assert row["diverged"] == "the loss became nan" and row["kl"] == math.inf
    cells, claims, _ = r.text_of(r.order(lab.size), [good, row])
    assert cells[2][4:] == ["–"] * 4 and not claims


@pytest.mark.parametrize(
    "best, tried",
    [
        (3e-3, [1e-3, 3e-3, 6e-3]),
        (6e-3, [1e-3, 3e-3, 6e-3, 1.2e-2]),
        (1.2e-2, [1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]),
        (1e-9, [2.5e-4, 5e-4, 1e-3, 3e-3, 6e-3]),
    ],
)
def test_an_arm_runs_at_the_rate_with_the_least_kl_with_seeds_that_did_not_choose_it(best, tried):
    class Pool:
        def submit(self, work, f, arm, seed, rate, sweep=False):
            future, goal = Future(), best if arm.name == "half, at once" else 3e-3
            kl = abs(math.log(rate / goal))
            future.set_result([dict(arm=arm.name, seed=seed, rate=rate, kl=kl, loss=-kl)])
            assert f is r.learn and sweep == (seed == r.SWEEP)
            return future

    size = SimpleNamespace(rates=(1e-3, 3e-3, 6e-3), more_rates=2)
    students = r.Students(size, Pool(), 3, [])
    students.train(r.arms(["order"]), ())
    mine = [row for row in students.rows if row["arm"] == "half, at once"]
    assert sorted(row["seed"] for row in mine) == [0, 1, 2] and len(students.rows) == 24
    assert sorted(r_["rate"] for r_ in students.swept if r_["arm"] == "half, at once") == tried
    assert {row["rate"] for row in mine} == {min(tried, key=lambda x: abs(math.log(x / best)))}


def test_a_claim_holds_beyond_welchs_error_only():
    # Means 2 and 6, variances 1 and 7: the squared error is 8/3, of 2.56 degrees of freedom; the
    # table's t of 2 is 4.30, and 4.30 · √(8/3) = 7.02.
    a, b = [1, 2, 3], [4, 5, 9]
    assert r.verdict(a, [x + 3.0 for x in b]) == "within the error"
    assert r.verdict(a, [x + 3.1 for x in b]) == "holds"
    assert r.verdict([x + 3.1 for x in b], a) == "the opposite holds"
    assert r.verdict([1], [2]) == "one student each, not judged"
    assert r.verdict([0.1] * 3, [0.2] * 3) == "holds"
    assert r.verdict([0.1] * 3, [0.2] * 3, least=0.11) == "within the error"
    # One teacher has no error: 4.30 · √(0.01/3) = 0.248.
    assert r.verdict([1, 1.1, 1.2], [1.34]) == "within the error"
    assert r.verdict([1, 1.1, 1.2], [1.36]) == "holds"
    # Pairs: differences 0.9, 1, 1.1, though the students differ by more.
    assert r.verdict([1, 5, 9], [1.9, 6, 10.1]) == "within the error"
    assert r.verdict([1, 5, 9], [1.9, 6, 10.1], paired=True) == "holds"
    assert pictures.mean([1, 2, 3]) == (2, pytest.approx(1 / math.sqrt(3)))


def figures(arm, c, done, sign):
    """A student as the paper has it; as the opposite with the sign -1."""
    bad = c + 20 * arm.startswith("random") + 10 * ("mlps" in arm) + 5 * ("at once" in arm)
    bad += 7 * (arm.endswith("layers") or "nothing" in arm) - 2 * (done != "1")
    rows = []
    for seed in range(3):
        kl = 100 + sign * bad + seed / 100
        row = dict(arm=arm, replaced=c, stages=done, seed=seed, kl=kl, perplexity=kl)
        row["parses"] = row["preferred"] = 0.5 + sign * 0.2 * (done == "1 + 2 + 3")
        rows.append(row | {"found@5120": 0.5 + sign * 0.3})
    return rows


@pytest.mark.parametrize("sign, verdict", [(1, "holds"), (-1, "the opposite holds")])
def test_of_students_as_the_paper_has_them_its_claims_hold_and_of_the_opposite_they_do_not(
    sign, verdict
):
    teacher = dict(arm="teacher", replaced=0, stages="", seed=0) | {"found@5120": 0.5}
    rows, size = [teacher], r.sizes(False)
    for arm in r.arms(r.TABLES):
        for level, number, _ in arm.stages(size, 0):
            done = ("1", "1 + 2", "1 + 2 + 3")[level - 1]
            rows += figures(arm.name, len(arm.path[number % 10]), done, sign)
    count = 0
    for tables in r.TABLES.values():
        for table in tables:
            claims = r.text_of(table(size), rows)[1]
            assert {claim[2] for claim in claims} <= {verdict}, claims
            count += len(claims)
    assert count == 6 + 4 + 6 + 2 + 4 + 8


def test_every_column_shows_its_own_figure():
    names = ["share", "rate", "perplexity", "ratio", "kl", "agreement", "parses", "length"]
    row = dict(arm="mamba2", replaced=4, stages="1 + 2", seed=0)
    row |= {name: i / 8 for i, name in enumerate(names, 1)} | {"length": 80.0}
    cells = r.text_of(r.quality(r.sizes(False)), [row, row | dict(seed=1, kl=0.825)])[0]
    (shown,) = [line for line in cells if line[:2] == ["mamba2", "50 %"]]
    wanted = ["0.12", "0.25", "0.375", "0.5000", "0.7250 ± 0.1000", "75.0%", "87.5%", "80"]
    assert shown[3:] == wanted


def test_speculation_counts_tokens_a_pass_of_a_text_and_its_k_is_the_decoders(lab, monkeypatch):
    asked = []

    class Decoder:
        def __init__(self, model, rows, size, temperature, generator, draft, K):
            asked.append(K)
            self.K, self.passes = K, 0

        def decode(self, prompts, count):
            for _ in range(4):
                self.passes += 1
                yield (tuple(range(self.K + 1)),)

    monkeypatch.setattr(r.generate, "Decoder", Decoder)
    monkeypatch.setattr(r, "time", SimpleNamespace(perf_counter=iter(range(99)).__next__))
    mil.save(lab.teacher, lab.out / "teacher")
    mil.save(lab.teacher, lab.out / "models" / "mamba2, 2 layers")
    monkeypatch.setattr(lab.size, "Ks", (2, 4))
    rows = r.speculate(lab)
    assert asked == [0, 2, 4] * 2 and [row["temperature"] for row in rows] == [0, 1]
    names = "per_pass@2", "per_pass@4", "ratio@2", "ratio@4"
    assert all([row[name] for name in names] == [3, 5, 3, 5] for row in rows)
    assert {(row["target"], row["draft"]) for row in rows} == {("Llama", "mamba2, 2 layers")}


@pytest.mark.parametrize(
    "argv, match",
    [
        (["qualty"], "there is no table 'qualty'; expected some of quality"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--smoke", "--minutes", "4"], "--minutes 4: the smoke size"),
        (["--sedes", "1"], "unrecognized arguments: --sedes"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_in_one_line(argv, match):
    with pytest.raises(mil.MilError, match=match) as e:
        r.main(argv)
    assert "\n" not in str(e.value)


def test_a_run_that_is_stopped_leaves_the_tables_it_has_made(tmp_path, lab, monkeypatch):
    def stopped(lab):
        raise KeyboardInterrupt

    monkeypatch.setattr(r, "Lab", lambda *_: lab)
    monkeypatch.setattr(r, "train_all", lambda lab, report, *_: report.rows.append(dict(kl=2.5)))
    monkeypatch.setattr(r, "speculate", stopped)
    with pytest.raises(KeyboardInterrupt):
        r.main(["--smoke", "order", "speculation", "mixer", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "order+speculation+mixer.json").read_text())
    assert list(report["tables"]) == ["order"] and report["rows"] == [{"kl": 2.5}]
    assert "Order of replacement" in (tmp_path / "order+speculation+mixer.md").read_text()


def test_all_tables_are_made_from_nothing(tmp_path):
    said = run_script("tests/reproduce.py", "--smoke", "--seeds", "1", "--out", tmp_path)
    assert said.returncode == 0, said.stderr[-3000:] + said.stdout[-3000:]
    assert "smoke size: the figures mean nothing" in said.stdout
    report = json.loads((tmp_path / "reproduce.json").read_text())
    sizes = {name: len(lines) - 1 for name, lines in report["tables"].items()}
    assert sizes == dict(
        quality=10, init=6, order=8, mixer=4, stages=4, long=10, context=10, speculation=32
    )
    students = [row for row in report["rows"] if "mixer" in row]
    assert all(math.isfinite(row["kl"]) and row["seed"] == 0 for row in students)
    assert {row["seed"] for row in report["sweep"]} == {r.SWEEP} and len(report["sweep"]) == 16
    wanted = [dataclasses.asdict(arm) for arm in r.arms(r.TABLES)]
    assert report["arms"] == json.loads(json.dumps(wanted))
    for name in ("init", "order", "mixer", "long", "context", "speculation"):
        assert not any("–" in line for line in report["tables"][name]), name
    text = (tmp_path / "reproduce.md").read_text()
    assert text.count("### ") == 8 and all(
        lines[1][0] in text for lines in report["tables"].values()
    )
    pytest.importorskip("matplotlib")
    pictured = {path.name for path in tmp_path.glob("*.png")}
    assert pictured == {"quality.png", "needle.png", "speculation.png"}
