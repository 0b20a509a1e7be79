"""Things of which a planted fault had shown that no test held them."""

import json

import pytest
import torch
from conftest import build

import mil
import train_distill as td

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# train_distill.py: what is said of stages and data


def test_a_stage_of_a_recipe_that_trains_mlps_is_one_of_stage_1(tmp_path):
    (tmp_path / "r.json").write_text(
        json.dumps([{"keep": 0.5, "trains": "mlps"}, {"trains": "all"}])
    )
    s = td.Settings(
        stage1_steps=100,
        stage2_steps=10,
        stage1_lr=0.5,
        stage2_lr=0.25,
        recipe=str(tmp_path / "r.json"),
    )
    first, second = td.plan(s, mil.Config(n_layers=4))
    assert (first.name, first.steps, first.lr, first.trains) == (
        "stage 1.1, 2 of 4 layers replaced",
        100,
        0.5,
        "mlps",
    )
    assert (second.name, second.steps, second.lr) == ("stage 2, all parameters", 10, 0.25)


def test_attention_is_no_choice_of_what_replaces_attention():
    with pytest.raises(mil.MilError, match="--mixer is 'attention', expected one of mamba"):
        td.complete(td.Settings(mixer="attention"), CPU)


# --------------------------------------------------------------------------------------------------
# mil.py


@pytest.mark.parametrize("mixers", [["attention"], ["mamba2"], ["attention", "mamba2"]])
@pytest.mark.parametrize(
    "heads, small",
    [
        (dict(head_dim=128, n_heads=16), True),
        (dict(head_dim=130, n_heads=2), False),
        (dict(head_dim=4, n_heads=17), False),
    ],
)
def test_heads_that_kernels_cannot_hold_are_decoded_without_them(mixers, heads, small):
    with torch.device("meta"):
        model = mil.Hybrid(
            mil.Config(v=7, d=8, n_layers=len(mixers), n_kv_heads=1, d_ff=8, mixers=mixers, **heads)
        )
    model.embed_tokens.to_empty(device="cpu")
    assert mil.Cache(model, 1, 2).fits is small


def test_a_model_without_mixers_is_none_of_the_authors_hybrids(tmp_path):
    mil.save(
        build(
            mil.Config(
                v=11, d=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=8, mixers=["none", "attention"]
            ),
            torch.float32,
        ),
        tmp_path / "source",
    )
    with pytest.raises(
        mil.MilError, match="holds attention, none; --format hf is for attention alone"
    ):
        mil.export(tmp_path / "source", tmp_path / "target", "mambainllama")
