"""What the README says of changing this project: its code, as it stands there; and recipes."""

import json
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_close, build, random_tokens

import mil
import train_distill as t

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SIZES = dict(d=16, n_heads=4, n_kv_heads=2, d_ff=8, context=16)


def defined(start, space, indent=""):
    """`space` after the README's code in which `start` stands, or a function with that body."""
    code = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if start in code)
    exec(f"def read(record):\n{textwrap.indent(code, indent)}" if indent else code, space)
    return space


@pytest.fixture
def gla(monkeypatch):
    mixer = defined("class GatedLinear", dict(vars(mil)))["GatedLinear"]
    monkeypatch.setitem(mil.CLASSES, "gla", mixer)
    monkeypatch.setattr(mil, "MIXERS", tuple(mil.CLASSES))
    monkeypatch.setitem(t.CHOICES, "mixer", mil.MIXERS[1:])


@pytest.mark.parametrize("mixers", [["gla", "attention"], ["gla", "gla"], ["gla", "mamba2"]])
def test_the_mixer_of_the_readme_reads_a_text_in_any_pieces_as_a_whole(gla, mixers):
    model = build(mil.Config(v=17, n_layers=2, mixers=mixers, **SIZES), torch.float32)
    tokens, cache = random_tokens(model.config, 3, 12), mil.Cache(model, 3, 12, undo=True)
    with torch.no_grad():
        parts = [model(part, cache) for part in tokens.split([5, 1, 3, 2, 1], dim=1)]
        assert_close(torch.cat(parts, dim=1), model(tokens), 1e-4)
        assert not cache.fused
    for got, want in zip(cache.angles, mil.rope_angles(model.config, cache.pos), strict=True):
        assert torch.equal(got, want)  # this mixer reads none, another may


def test_the_mixer_of_the_readme_takes_attentions_weights_and_is_distilled(gla, tmp_path):
    teacher = build(mil.Config(v=257, n_layers=4, **SIZES), torch.float32)
    student = mil.replace_attention(teacher, [0, 2], "gla")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        got, want = (getattr(model.layers[2].mixer, name) for model in (student, teacher))
        assert torch.equal(got.weight, want.weight)
    s = t.Settings(out=str(tmp_path), mixer="gla", stage1_steps=4, stage2_steps=2, n_layers=4)
    t.complete(s, torch.device("cpu"))
    s.batch, s.context = 2, 16
    stages, run = t.plan(s, teacher.config), t.Run(s, torch.device(DEVICE))
    assert [stage.mixers.count("gla") for stage in stages] == [1, 2, 2]
    tokens = np.random.default_rng(0).integers(0, 257, 999).astype(np.int16)
    corpus = t.Corpus(tokens, tokens, [np.arange(0, 999, 40)] * 2, "", "")
    models = t.assemble(run, teacher, teacher, stages[1], 2, {})
    before = [w.clone() for w in models.student.layers[0].mixer.parameters()]
    batches, log = t.training_batches(run, corpus, [0, 1]), SimpleNamespace(write=len, flush=int)
    t.fit(run, t.State(), stages[1], models, batches, log, "")
    for w, old in zip(models.student.layers[0].mixer.parameters(), before, strict=True):
        assert not torch.equal(w, old)


def test_the_loss_of_the_readme_is_a_stages(monkeypatch, tmp_path):
    monkeypatch.setitem(t.LOSSES, "match", defined("def match", dict(vars(t)))["match"])
    (tmp_path / "text.txt").write_text("".join(f"line {i} of some text\n" for i in range(400)))
    first = {"keep": 0.5, "loss": "match", "steps": 10, "lr": 3e-3}
    recipe = [first, {"trains": "all", "alpha": 0, "steps": 4}]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    sizes = "--n_layers 2 --d 32 --n_heads 2 --n_kv_heads 2 --d_ff 32 --context 16 --batch 2"
    places = f"--out {tmp_path}/o --data {tmp_path}/text.txt --recipe {tmp_path}/recipe.json"
    rest = f"--teacher_steps 4 --eval_sequences 2 --device {DEVICE}"
    t.main(f"{sizes} {places} {rest}".split())
    lines = (tmp_path / "o" / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines if "1.1" in line]
    assert len(log) == 10 and 0 < log[-1]["loss"] < log[0]["loss"] == log[0]["ce"]


def test_the_records_of_the_readme_become_conversations():
    read = defined("Alpaca", {}, indent="    ")["read"]
    assert read({"instruction": "Add.", "input": "2, 3", "output": "5"}) == [
        {"role": "user", "content": "Add.\n\n2, 3"},
        {"role": "assistant", "content": "5"},
    ]
    assert read({"text": "x"}) is None


def test_a_stage_of_a_recipe_that_trains_mlps_is_one_of_stage_1(tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text('[{"keep": 0.5, "trains": "mlps"}, {"trains": "all"}]')
    steps = dict(stage1_steps=100, stage2_steps=10, stage1_lr=0.5, stage2_lr=0.25)
    first, second = t.plan(t.Settings(recipe=str(recipe), **steps), mil.Config(n_layers=4))
    assert (first.name, first.trains) == ("stage 1.1, 2 of 4 layers replaced", "mlps")
    assert (first.steps, first.lr, second.steps, second.lr) == (100, 0.5, 10, 0.25)
    assert second.name == "stage 2, all parameters"


def test_attention_is_no_choice_of_what_replaces_attention():
    with pytest.raises(mil.MilError, match="--mixer is 'attention', expected one of mamba"):
        t.complete(t.Settings(mixer="attention"), torch.device("cpu"))
