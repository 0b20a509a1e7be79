"""What the README says of changing this project: its code, as it stands there."""

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

CODE = {
    name: code
    for code in re.findall(
        r"```python\n(.*?)```",
        (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8"),
        re.S,
    )
    for name in ("class GatedLinear", "def match", "Alpaca")
    if name in code
}


@pytest.fixture
def gla(monkeypatch):
    space = dict(vars(mil))
    exec(CODE["class GatedLinear"], space)
    monkeypatch.setitem(mil.CLASSES, "gla", space["GatedLinear"])
    monkeypatch.setattr(mil, "MIXERS", tuple(mil.CLASSES))
    monkeypatch.setitem(t.CHOICES, "mixer", mil.MIXERS[1:])


@pytest.mark.parametrize("mixers", [["gla", "attention"], ["gla", "gla"], ["gla", "mamba2"]])
def test_the_mixer_of_the_readme_reads_a_text_in_any_pieces_as_a_whole(gla, mixers):
    model = build(
        mil.Config(
            v=17, d=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=8, context=64, mixers=mixers
        ),
        torch.float32,
    )
    tokens, cache = random_tokens(model.config, 3, 12), mil.Cache(model, 3, 12, undo=True)
    with torch.no_grad():
        parts = []
        for l in (5, 1, 3, 2, 1):
            parts.append(model(tokens[:, sum(p.shape[1] for p in parts) :][:, :l], cache))
        assert_close(torch.cat(parts, dim=1), model(tokens), 1e-4)
        assert not cache.fused


def test_the_mixer_of_the_readme_takes_attentions_weights_and_is_distilled(gla, tmp_path):
    teacher = build(
        mil.Config(v=257, d=16, n_layers=4, n_heads=2, n_kv_heads=1, d_ff=24, context=16),
        torch.float32,
    )
    student = mil.replace_attention(teacher, [0, 2], "gla")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(
            getattr(student.layers[2].mixer, name).weight,
            getattr(teacher.layers[2].mixer, name).weight,
        )
    s = t.Settings(out=str(tmp_path), mixer="gla", stage1_steps=4, stage2_steps=2, n_layers=4)
    t.complete(s, torch.device("cpu"))
    s.batch, s.context = 2, 16
    stages, run = t.plan(s, teacher.config), t.Run(s, torch.device(DEVICE))
    assert [stage.mixers.count("gla") for stage in stages] == [1, 2, 2]
    tokens = np.random.default_rng(0).integers(0, 257, 999).astype(np.int16)
    corpus = t.Corpus(tokens, tokens, [np.arange(0, 999, 40)] * 2, "", "")
    models = t.assemble(run, teacher, teacher, stages[1], 2, {})
    before = models.student.layers[0].mixer.s_proj.weight.clone()
    t.fit(
        run,
        t.State(),
        stages[1],
        models,
        t.training_batches(run, corpus, [0, 1]),
        SimpleNamespace(write=len, flush=int),
        "",
    )
    assert not torch.equal(models.student.layers[0].mixer.s_proj.weight, before)


def test_the_loss_of_the_readme_is_a_stages(monkeypatch, tmp_path):
    space = dict(vars(t))
    exec(textwrap.dedent(CODE["def match"]), space)
    monkeypatch.setitem(t.LOSSES, "match", space["match"])
    (tmp_path / "text.txt").write_text("".join(f"line {i} of some text\n" for i in range(400)))
    (tmp_path / "recipe.json").write_text(
        json.dumps(
            [
                {"keep": 0.5, "loss": "match", "steps": 10, "lr": 3e-3},
                {"trains": "all", "alpha": 0, "steps": 4},
            ]
        )
    )
    sizes = "--n_layers 2 --d 32 --n_heads 2 --n_kv_heads 2 --d_ff 32 --context 16 --batch 2 --teacher_steps 4 --eval_sequences 2"
    t.main(
        [
            "--out",
            str(tmp_path / "o"),
            "--data",
            str(tmp_path / "text.txt"),
            *sizes.split(),
            "--recipe",
            str(tmp_path / "recipe.json"),
            "--device",
            DEVICE,
        ]
    )
    log = [
        json.loads(line)
        for line in (tmp_path / "o" / "log.jsonl").read_text().splitlines()
        if "1.1" in line
    ]
    assert (
        len(log) == 10 and 0 < log[-1]["loss"] < log[0]["loss"] and log[0]["loss"] == log[0]["ce"]
    )


def test_the_records_of_the_readme_become_conversations():
    space = {}
    exec("def read(record):\n" + textwrap.indent(CODE["Alpaca"], "    "), space)
    assert space["read"]({"instruction": "Add.", "input": "2, 3", "output": "5"}) == [
        {"role": "user", "content": "Add.\n\n2, 3"},
        {"role": "assistant", "content": "5"},
    ]
    assert space["read"]({"text": "x"}) is None
