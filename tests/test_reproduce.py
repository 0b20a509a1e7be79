"""tests/reproduce.py: its text, its measures, its arms; and all of it, of the smallest size."""

import dataclasses
import io
import json
import math
import random
import re
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import reproduce as r
import torch
from conftest import DEVICE, assert_close, build, run_script
from hypothesis import given
from hypothesis import strategies as st

import mil
import train_distill as td


@given(st.integers(0, 99), st.integers(100, 640))
def test_every_note_comes_twice_again_and_not_too_late_and_the_rest_is_the_text(seed, context):
    text = "".join(f"{'    ' * (i % 3)}x_{i} = {i}\n" for i in range(400))
    noted = r.with_notes(text, context, random.Random(seed))
    assert re.sub(r"(?m)^# \w\w=\d{3}\n", "", noted) == text
    places = {}
    for m in re.finditer(r"# (\w\w=\d{3})\n", noted):
        places.setdefault(m[1], []).append(m.start())
    thrice = [at for at in places.values() if len(at) == 3]
    assert (
        len(places) >= 20 and len(thrice) >= len(places) - 12
    )  # the last of the text are due after its end; two notes may be alike by chance
    assert all(
        b - a >= 16 and c - a < context * 3 // 4 + 150 for a, b, c in thrice
    )  # 150: a line, and others that are due


def test_notes_come_again_near_more_often_than_far():
    places = {}
    for m in re.finditer(
        r"# (\w\w=\d{3})\n", r.with_notes("x = 1\n" * 50000, 3072, random.Random(0))
    ):
        places.setdefault(m[1], []).append(m.start())
    gaps = [b - a for a, *later in places.values() for b in later if b - a < 2304]
    assert [sum(gap < edge for gap in gaps) / len(gaps) for edge in (192, 665)] == pytest.approx(
        [0.5, 0.75], abs=0.03
    )  # log-uniform from 16 to 2304


def test_the_notes_between_count_in_how_far_away_a_note_comes_again():
    places = {}
    for m in re.finditer(
        r"# (\w\w=\d{3})\n", r.with_notes("x = 1\n" * 9000, 3072, random.Random(0))
    ):
        places.setdefault(m[1], []).append(m.start())
    assert (
        2100 < max(at[2] - at[0] for at in places.values() if len(at) == 3) < 2304 + 40
    )  # 40: a line, and others that are due


@pytest.mark.parametrize(
    "header, body, whole",
    [
        ("def f(x):\n", "    return x\nprint(", True),  # what follows the function is none of it
        ("    def f(x):\n", "        if x:\n            return 1\n    def", True),
        ("def f(x):\n", "    return (x\n\ndef g", False),
        ("def f(x):\n", "    if x:\n", False),  # the text ends before the block does
        ("def f(x):\n", "    y = 1\n# kd=582\n    return y\n", True),
        ("def f(x):\n", "    return x +", False),  # nothing but a broken line
        ("def f(x):\n", "    return x\n        y = 2\n", False),
    ],
)
def test_a_function_parses_up_to_where_it_ends(header, body, whole):
    assert r.parses(header, body) is whole


def test_functions_are_cut_where_their_bodies_begin():
    ((_, before, header, after),) = r.functions(
        ["import os\n\ndef f(a, b=(1, 2)):\n    return a\n"], 5, 12, 8, random.Random(0)
    )
    assert header == "def f(a, b=(1, 2)):\n" and before == header[-12:] and after == "    retu"


@pytest.mark.parametrize("context", [256, 1024])
def test_notes_differ_from_file_to_file_are_as_far_apart_as_the_teacher_reads_and_other_ones_make_another_file(
    tmp_path, monkeypatch, context
):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i:02}.py").write_text("".join(f"x_{k} = {k}\n" for k in range(400)))
    monkeypatch.setattr(td, "standard_library", lambda: sorted((tmp_path / "text").iterdir()))
    make = lambda: r.Lab(
        dataclasses.replace(r.SMOKE, teacher_context=context),
        tmp_path / "out",
        torch.device(DEVICE),
    )  # noqa: E731
    make()
    (place,) = (tmp_path / "out").glob("noted-*.jsonl")
    texts = [json.loads(line)["text"] for line in place.read_text().splitlines()]
    first = [
        re.search(r"# (\w\w=\d{3})\n", text).span() + (re.search(r"# (\w\w=\d{3})\n", text)[1],)
        for text in texts
    ]
    assert len(texts) == 40 and len({name for *_, name in first}) > 35
    places = [
        [m.start() for m in re.finditer(name, text)] for text, (*_, name) in zip(texts, first)
    ]
    assert 0.4 * context < max(max(at) - at[0] for at in places) < 0.75 * context + 150
    honest = r.with_notes
    monkeypatch.setattr(
        r, "with_notes", lambda text, *more: honest(text, *more).replace("# ", "#  ")
    )
    make()
    assert len([*(tmp_path / "out").glob("noted-*.jsonl")]) == 2


def test_notes_are_no_part_of_a_functions_body():
    assert (
        r.body("def f(x):\n", "    y = 1\n# kd=582\n    return y\nprint(")
        == "    y = 1\n    return y"
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return r.Lab(r.SMOKE, tmp_path_factory.mktemp("lab"), torch.device(DEVICE))


def test_what_a_size_says_reaches_the_runs(lab):
    for name in ("context", "batch", "teacher_steps", "rope_theta", "eval_sequences", *td.SIZES):
        assert getattr(lab.s, name) == getattr(r.SMOKE, name), name


def test_a_quarter_of_the_unseen_texts_chooses_the_rates_and_nothing_is_measured_on_it(lab):
    a, b = lab.sweep_corpus, lab.corpus
    files = [file for file in td.standard_library() if "encodings" not in file.parts]
    texts = [text for text in (td.read_text(file, False) for file in files) if text.strip()][9::20]
    documents = [
        part.val[i:j]
        for part in (a, b)
        for i, j in zip(part.begins[1], [*part.begins[1][1:], len(part.val)])
    ]
    plain = [
        re.sub(rb"(?m)^# \w\w=\d{3}\n", b"", bytes(int(i) for i in ids if i != 256)).decode()
        for ids in documents
    ]
    assert (
        plain == texts
        and a.begins[1][0] == b.begins[1][0] == 0
        and len(a.begins[1]) == len(texts) // 4
        and lab.unseen == texts[len(texts) // 4 :]
    )


@given(length=st.integers(128, 999), depth=st.floats(0, 1), seed=st.integers(0, 9))
def test_a_haystack_has_its_length_one_note_where_it_should_be_and_the_question_at_its_end(
    lab, length, depth, seed
):
    text = bytes(lab.haystack(length, depth, random.Random(seed))).decode()
    needle, again = re.findall(r"(?m)^# \w\w=\d{3}$", text)
    assert len(text) == length and needle == again and text.endswith("\n" + needle)
    room, at = length - 17, text.index(needle)
    assert (
        at <= depth * (room - 1) + 1 and "\n" not in text[at + 9 : int(depth * (room - 1)) + 9]
    )  # behind the last whole line there


def test_a_needle_is_found_by_whom_all_digits_are_likeliest_and_only_then(lab):
    class Knows(torch.nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.wrong = wrong

        def hidden(self, tokens):
            return tokens

        def lm_head(
            self, tokens
        ):  # the number is what follows the first "=", in reach of a model that has read all of it
            out = []
            for row in self.rows:
                number = re.search(r"# \w\w=(\d{3})", bytes(row).decode())[1]
                out.append([ord(c) for c in number[:2] + (str((int(number[2]) + self.wrong) % 10))])
            return torch.nn.functional.one_hot(torch.tensor(out, device=DEVICE), 257)

    for wrong, share in ((0, 1), (1, 0)):
        model = Knows(wrong)
        model.hidden = lambda tokens, model=model: setattr(model, "rows", tokens.tolist()) or tokens
        assert lab.needles(model) == {128: [share] * 2, 256: [share] * 2}


def test_perplexity_by_length_is_that_of_the_same_bytes_after_more_and_more_text(lab):
    model = build(
        mil.Config(v=257, d=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8, context=128),
        torch.float32,
    )
    found = lab.by_length(model)
    assert list(found) == [128, 256] and lab.windows.shape == (2, 257)
    text = "".join(lab.unseen).encode("ascii", "replace")
    assert all(bytes(row) in text for row in lab.windows.tolist())
    with torch.no_grad():
        for length, perplexity in found.items():
            rows = lab.windows[:, -length - 1 :]
            loss = -model(rows[:, :-1]).log_softmax(-1).gather(2, rows[:, 1:, None])[:, -32:, 0]
            assert perplexity == pytest.approx(loss.mean().exp().item(), rel=1e-4)


def test_arms_replace_the_papers_layers_step_by_step_and_each_is_named_once():
    arms = r.arms(32, r.TABLES)
    by_name = {arm.name: arm for arm in arms}
    assert len(by_name) == len(arms) == 18
    assert [len(path) for path in by_name["mamba2"].path] == [8, 16, 24, 28, 32]
    assert by_name["mamba2"].path[0] == tuple(range(0, 32, 4)) and by_name["mamba2"].path[
        1
    ] == tuple(range(0, 32, 2))
    for arm in arms:
        assert all(set(a) < set(b) for a, b in zip(arm.path, arm.path[1:])), arm.name
    assert by_name["half, the first layers"].path[-1] == tuple(range(16)) and by_name[
        "quarter, the last layers"
    ].path[-1] == tuple(range(8, 32))
    order = {arm.name: arm for arm in r.arms(8, ("order",))}
    assert {*order} == {
        name for name in by_name if name.endswith(("stepwise", "at once", "layers"))
    } and not any(arm.then or arm.judge for arm in order.values())


def test_arms_are_made_in_the_way_that_they_are_named_for():
    plain, ways = (
        ("mamba2", "attention", "mixers", False),
        {arm.name: (arm.mixer, arm.init, arm.train, arm.linear) for arm in r.arms(8, r.TABLES)},
    )
    assert {name: way for name, way in ways.items() if way != plain} == {
        "mamba": ("mamba", *plain[1:]),
        "random, mixers": ("mamba2", "random", "mixers", False),
        "attention, mlps": ("mamba2", "attention", "mlps", False),
        "random, mlps": ("mamba2", "random", "mlps", False),
        "half, Mamba": ("mamba", *plain[1:]),
        "half, linear attention": ("mamba", "attention", "mixers", True),
        "half, nothing": ("none", "attention", "all", False),
    }


def test_no_table_needs_what_only_another_makes():
    for table in r.TABLES[:-1]:
        for arm in r.arms(8, (table,)):
            assert bool(arm.prefer) <= (table == "stages") and set(arm.prefer) <= set(arm.then), (
                table,
                arm.name,
            )
    assert {(arm.name, arm.then) for arm in r.arms(8, ("speculation",))} == {
        ("mamba2", (1, 2, 3, 4)),
        ("mamba", (1, 2, 3, 4)),
    }


def test_arms_of_a_table_train_as_long_and_choose_their_rate_at_the_same_place():
    last = lambda *names: {len(arm.path[-1]) for arm in r.arms(8, r.TABLES) if arm.name in names}  # noqa: E731
    assert [arm.name for arm in r.arms(8, r.TABLES) if arm.longer] == ["half, stage 1 longer"]
    assert (
        len(
            last(
                "half, stage 1 longer",
                "half, stepwise",
                "half, at once",
                "half, the first layers",
                "half, the last layers",
                "half, Mamba",
                "half, linear attention",
                "half, nothing",
            )
        )
        == 1
    )
    assert (
        len(
            last(
                "quarter, stepwise",
                "quarter, at once",
                "quarter, the first layers",
                "quarter, the last layers",
            )
        )
        == 1
    )
    assert len(last("mamba2", "mamba", "random, mixers", "attention, mlps", "random, mlps")) == 1


def test_mamba_without_decay_is_linear_attention_that_does_not_learn_it():
    config = mil.Config(
        v=17,
        d=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        d_ff=8,
        context=64,
        mixers=["mamba"],
        d_state=4,
    )
    model = build(config, torch.float32)
    mixer = model.layers[0].mixer
    r.freeze_linear(model)
    x, dt, B, C = (
        torch.randn(2, 9, h, 4, generator=torch.Generator().manual_seed(h + i)).to(DEVICE)
        for i, h in enumerate((2, 4, 2, 4))
    )
    raw = torch.randn(2, 9, mixer.dt_rank, device=DEVICE) @ mixer.dt_proj.weight.T
    dt, z = raw.unflatten(2, (-1, 4)), torch.full_like(C, 20.0)
    with torch.no_grad():
        mixer.conv1d.weight.zero_(), mixer.D.zero_()
        mixer.conv1d.bias.fill_(1.0)
        y = mixer.scan(x, dt, B, C, z)[0]
    one = torch.nn.functional.silu(
        torch.ones((), device=DEVICE)
    )  # what the convolution makes of any x
    B = B.repeat_interleave(2, dim=2)
    want = (
        torch.einsum("blhn,bshn,ls->blh", C, B, torch.ones(9, 9, device=DEVICE).tril())[..., None]
        * one
        * torch.nn.functional.silu(z)
    )
    assert_close(y, want.expand_as(y), 1e-4)
    assert (
        not any(w.requires_grad for w in (mixer.A_log, *mixer.dt_proj.parameters()))
        and mixer.in_proj_x.weight.requires_grad
    )


@pytest.mark.parametrize(
    "best, tried",
    [
        (3e-3, [1e-3, 3e-3, 6e-3, 1.2e-2]),
        (1.2e-2, [1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]),
        (5e-4, [2.5e-4, 5e-4, 1e-3, 3e-3, 6e-3, 1.2e-2]),
        (1.0, [1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2]),
        (1e-9, [2.5e-4, 5e-4, 1e-3, 3e-3, 6e-3, 1.2e-2]),
    ],
)
def test_every_arm_runs_at_the_rate_that_was_best_for_it_with_seeds_that_did_not_choose_it(
    best, tried
):
    class Pool:
        def submit(self, work, f, *args):
            future = Future()
            arm, seed, rate, sweep = args
            assert f is r.learn and sweep == (seed == r.SWEEP)
            goal = best if arm.name == "half, at once" else 3e-3
            future.set_result(
                (
                    [
                        dict(
                            arm=arm.name,
                            seed=seed,
                            rate=rate,
                            kl=abs(math.log(rate / goal))
                            if rate < 9e-3 or goal > 9e-3
                            else math.inf,
                        )
                    ],
                    0.0,
                )
            )
            return future

    size = dataclasses.replace(r.SMOKE, rates=(1e-3, 3e-3, 6e-3, 1.2e-2), more_rates=2)
    journal = io.StringIO()
    rows, swept = r.all_arms(SimpleNamespace(size=size), Pool(), ("order",), 3, 0.0, journal)
    mine = [row for row in rows if row["arm"] == "half, at once"]
    assert sorted(row["rate"] for row in swept if row["arm"] == "half, at once") == tried
    assert sorted(row["seed"] for row in mine) == [0, 1, 2] and {row["rate"] for row in mine} == {
        min(tried, key=lambda rate: abs(math.log(rate / best)))
    }
    assert all(row["edge"] == (best in (1.0, 1e-9)) for row in mine)
    others = [row for row in rows if row["arm"] != "half, at once"]
    assert len(others) == 21 and all(row["rate"] == 3e-3 and not row["edge"] for row in others)
    assert len(journal.getvalue().splitlines()) == len(rows) + len(swept)


def test_a_student_that_diverges_says_so_and_of_its_arm_nothing_is_shown(lab, monkeypatch):
    def train(lab, arm, seed, rate, sweep, rows):
        rows.append(dict(arm=arm.name, replaced=2, stages="1", kl=1.0))
        raise mil.MilError("the loss became nan")

    monkeypatch.setattr(r, "train_student", train)
    (arm,) = [arm for arm in r.arms(8, ("order",)) if arm.name == "half, at once"]
    rows = r.Rows(r.learn(lab, arm, 1, 3e-3, False))
    assert (
        rows[1]["diverged"] == "the loss became nan"
        and rows[1]["kl"] == math.inf
        and rows.of("half, at once") == []
    )


def test_a_claim_holds_beyond_the_errors_only():
    rows = lambda *values: [dict(kl=v) for v in values]  # noqa: E731
    table = r.Table("t", "T", ["a"])
    for a, b, verdict in (
        ((1, 1.1), (2, 2.1), "holds"),
        ((2, 2.1), (1, 1.1), "the opposite holds"),
        ((1, 2), (1.2, 2.2), "within the error"),
        ((1,), (2,), "one student each, not judged"),
        ((1, 1.1, 1.2), (1.3,), "within the error"),
        ((1, 1.1, 1.2), (1.6,), "holds"),
    ):  # 4.30 standard errors of 0.058 are 0.25
        table.claim("what", rows(*a), rows(*b))
        assert table.claims[-1][2] == verdict
    table.claim("nothing to compare", rows(1), [])
    assert len(table.claims) == 6
    assert r.mean(rows(1, 2, 3), "kl") == (2, pytest.approx(1 / math.sqrt(3)))


def test_a_stage_may_train_mlps_as_well():
    stage = td.Stage(trains="mlps", mixers=["mamba2", "attention"])
    names = {
        name
        for name, _ in build(
            mil.Config(v=17, d=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=8, mixers=stage.mixers)
        ).named_parameters()
        if stage.learns(name)
    }
    assert {name.split(".")[1] for name in names if ".mlp." in name} == {"0", "1"} and {
        name.split(".")[1] for name in names if ".mixer." in name
    } == {"0"}
    assert not any(
        "norm" in name.split(".")[2] or name.startswith(("embed", "norm", "lm_head"))
        for name in names
    )


@pytest.mark.parametrize(
    "argv, match",
    [
        (["qualty"], "there is no table 'qualty'; expected some of quality"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--workers", "-1"], "--workers is -1"),
        (["--set", "rope_theta=0"], "--set rope_theta=0: expected 1 or more"),
        (
            ["--set", "rope_thet=1"],
            "--set rope_thet=1: expected NAME=VALUE, NAME one of n_layers, d,",
        ),
        (["--set", "rope_still"], "--set rope_still: expected NAME=VALUE"),
        (["--set", "d=33"], "--set: "),
        (
            ["--smoke", "--set", "written=99"],
            "--set: before \\+ written is 179, expected the length of distillation, context 128",
        ),
        (["--smoke", "--minutes", "4"], "--minutes 4: the smoke size"),
        (["--set", "depths=1.5"], "--set depths=1.5: expected a whole number"),
        (["--set", "depths=1"], "--set depths=1: expected 2 or more"),
        (["--smoke", "--set", "step_tokens=300"], "--set: step_tokens is 300, expected two of"),
        (["--seeds", "1.5"], "argument --seeds: invalid int value: '1.5'"),
        (["--sedes", "1"], "unrecognized arguments: --sedes"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_in_one_line(argv, match):
    with pytest.raises(mil.MilError, match=match):
        r.main(argv)


def test_all_tables_are_made_from_nothing(tmp_path):
    said = run_script(
        "tests/reproduce.py",
        "--smoke",
        "--seeds",
        "1",
        "--out",
        tmp_path / "o",
        "--assets",
        tmp_path / "pictures",
    )
    assert said.returncode == 0, said.stderr[-3000:] + said.stdout[-3000:]
    report = json.loads((tmp_path / "o" / "reproduce.json").read_text())
    assert list(report["tables"]) == [
        "quality",
        "init",
        "order",
        "mixer",
        "stages",
        "long",
        "context",
        "speculation",
        "cost",
    ]
    assert [len(rows) - 1 for rows in report["tables"].values()] == [10, 8, 8, 4, 4, 18, 18, 32, 15]
    assert "smoke size: the figures mean nothing" in said.stdout
    for row in report["rows"]:
        assert (
            math.isfinite(row["kl"])
            and row["seed"] in (0,)
            and (
                row["stages"] == "draft"
                or row["rate"] in (report["size"]["rates"] if row["arm"] != "Llama" else [None])
            )
        )
    arms = {
        (row["arm"], row["replaced"], row["stages"])
        for row in report["rows"]
        if row["stages"] != "draft"
    }
    assert (
        len(arms) == (4 + 4) + (4 + 4) + 1 + 6 + 8 + 2 + 3 + 1
        and [arm["name"] for arm in report["arms"]] == [arm.name for arm in r.arms(8, r.TABLES)]
        and len(report["sweep"]) == 17 * len(report["size"]["rates"])
    )
    assert not any(
        "–" in row for name in ("init", "order", "mixer") for row in report["tables"][name]
    )
    assert report["teacher"]["context"] == 128 and set(report["teacher"]["needles"]) == set(
        report["teacher"]["by_length"]
    ) == {"128", "256"}
    text = (tmp_path / "o" / "reproduce.md").read_text()
    assert text.count("### ") == 9 and "| teacher" in text
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "quality.png",
        "needle.png",
        "speculation.png",
        "cost.png",
        "scan.png",
    }
