"""Steps that are replayed, and other things of which a planted fault had shown that no test held them."""
import io
import json

import numpy as np
import pytest
import torch
from conftest import build

import mil
import train_distill as td

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------
# train_distill.py: steps that are replayed


def a_batch(seed, most=0):
    """Two rows of eight tokens, their documents cut at random places."""
    dice = np.random.default_rng(seed)
    tokens = dice.integers(0, 257, 40).astype(np.int16)
    return td.to_device(*td.windows(tokens, np.array([0, *np.sort(dice.choice(np.arange(1, 40), 5, False))]), [3, 21], 8), CPU, most)


def test_a_replayed_step_reads_all_of_its_own_batch_and_the_bounds_of_its_documents():
    seen = lambda part, scale: torch.cat([t.double().flatten() for t in (part.x, part.y, part.docs.pos, part.docs.bounds, part.docs.mask, torch.as_tensor(scale))])  # noqa: E731
    replayed = td.Replayed(lambda parts, scale: seen(parts[0], scale), CPU)
    for i in range(4):
        assert torch.equal(replayed([a_batch(i, most=9)], 0.5**i), seen(a_batch(i, most=9), 0.5**i))


def test_what_a_replayed_step_returned_stays_when_the_next_one_comes():
    out = torch.zeros(2)  # where a graph writes every time
    replayed = td.Replayed(lambda parts, scale: out.copy_(torch.stack([parts[0].x[0, 0], parts[0].x[1, 1]])), CPU)
    found = [replayed([a_batch(i, most=9)], 1.0) for i in range(3)]
    assert [t.tolist() for t in found] == [[x[0, 0], x[1, 1]] for x in (a_batch(i).x.tolist() for i in range(3)) for x in [np.array(x)]]


def test_a_graph_finds_every_steps_rate_in_the_same_tensor(tmp_path, monkeypatch):
    rates, where = [], set()

    class Spy(torch.optim.AdamW):
        def __init__(self, train, lr, fused, capturable, **more):
            super().__init__(train, lr=lr, **more)

        def step(self):
            rates.append(self.param_groups[0]["lr"].item()), where.add(id(self.param_groups[0]["lr"]))
            super().step()
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    monkeypatch.setattr(td, "graphs", lambda *_: True)
    s = td.Settings(out=str(tmp_path), graph=True, warmup=0.25)
    td.complete(s, CPU)
    model = build(mil.Config(v=257, d=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8, context=16), torch.float32).to(CPU)
    stage = td.Stage(train="all", beta=0, steps=8, lr=0.5, warmup=0.25, mixers=["attention"])
    td.fit(td.Run(s, CPU), td.State(), stage, td.Models(None, model), lambda step: ([a_batch(step, most=9)], 16), io.StringIO(), "")
    assert rates == pytest.approx([0.5 * td.lr_share(stage, i) for i in range(8)]) and len(where) == 1


def test_batches_for_a_graph_have_room_for_the_documents_of_a_text_of_short_ones():
    run = td.Run(td.Settings(batch=8, context=64), CPU)
    tokens, begins = np.arange(4000) % 257, np.arange(0, 4000, 4)
    batches = td.training_batches(run, td.Corpus(tokens, tokens, [begins, begins], "", ""), [0], True)
    sizes = {len(part.docs.bounds) for step in range(20) for part in batches(step)[0]}
    assert len(sizes) == 1 and sizes.pop() > 8 + 8 * 64 // 4


def test_documents_of_one_size_keep_every_bound_when_they_are_more_than_the_room_and_reckon_with_the_longest():
    pos = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 1, 0]])
    for most, bounds in ((3, [0, 2, 5, 6, 7, 9, 11, 12]), (9, [0, 2, 5, 6, 7, 9, 11, 12, 12, 12])):
        docs = mil.Documents(pos, CPU, most)
        assert docs.bounds.tolist() == bounds and docs.longest == 6  # what one graph reads may be a row without an end in it next time


# ---------------------------------------------------------------------------------------------------------------
# train_distill.py: what is said of stages and data


def test_a_stage_of_a_recipe_that_trains_mlps_is_one_of_stage_1(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([{"keep": 0.5, "train": "mlps"}, {"train": "all"}]))
    s = td.Settings(stage1_steps=100, stage2_steps=10, stage1_lr=0.5, stage2_lr=0.25, recipe=str(tmp_path / "r.json"))
    first, second = td.plan(s, mil.Config(n_layers=4))
    assert (first.name, first.steps, first.lr, first.train) == ("stage 1.1, 2 of 4 layers replaced", 100, 0.5, "mlps")
    assert (second.name, second.steps, second.lr) == ("stage 2, all parameters", 10, 0.25)


@pytest.mark.parametrize("record, named, refused", [
    ({"instruction": "a", "output": "b"}, True, True), ({"messages": []}, False, True), ({"instruction": "a", "output": "b"}, False, False)])
def test_a_list_of_records_in_a_json_is_refused_if_it_was_named_and_in_a_folder_if_they_are_conversations(tmp_path, record, named, refused):
    (tmp_path / "a.json").write_text(json.dumps([record]))
    if refused:
        with pytest.raises(mil.MilError, match="a list in one piece"):
            td.read_documents(tmp_path / "a.json", named)
    else:
        assert td.read_documents(tmp_path / "a.json", named) == [json.dumps([record])]


def test_attention_is_no_choice_of_what_replaces_attention():
    with pytest.raises(mil.MilError, match="--mixer is 'attention', expected one of mamba"):
        td.complete(td.Settings(mixer="attention"), CPU)


# ---------------------------------------------------------------------------------------------------------------
# mil.py


@pytest.mark.parametrize("mixers", [["attention"], ["mamba2"], ["attention", "mamba2"]])
@pytest.mark.parametrize("heads, small", [(dict(head_dim=128, n_heads=16), True), (dict(head_dim=130, n_heads=2), False), (dict(head_dim=4, n_heads=17), False)])
def test_heads_that_kernels_cannot_hold_are_decoded_without_them(mixers, heads, small):
    with torch.device("meta"):
        model = mil.Hybrid(mil.Config(v=7, d=8, n_layers=len(mixers), n_kv_heads=1, d_ff=8, mixers=mixers, **heads))
    model.embed_tokens.to_empty(device="cpu")
    assert mil.Cache(model, 1, 2).small is small


def test_a_model_without_mixers_is_none_of_the_authors_hybrids(tmp_path):
    mil.save(build(mil.Config(v=11, d=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=8, mixers=["none", "attention"]), torch.float32), tmp_path / "source")
    with pytest.raises(mil.MilError, match="holds attention, none; --format hf is for attention alone"):
        mil.export(tmp_path / "source", tmp_path / "target", "mambainllama")
