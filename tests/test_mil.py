"""The stack, its cache, the replacement of attention and our own checkpoints."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, assert_same_bits, build, configs, form, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
import mil
from mil import Cache, Config, MilError

SMALL = dict(v=11, d=16, n_heads=4, n_kv_heads=2, d_ff=24, context=32, d_state=4)
LLAMA = ["attention"] * 4


def sizes(mixers=LLAMA, **change):
    return Config(**SMALL | dict(mixers=mixers, n_layers=len(mixers)) | change)


def small(mixers=LLAMA, dtype=torch.float32, seed=0, **change):
    return build(sizes(mixers, **change), dtype, seed)


# --------------------------------------------------------------------------------------------------
# The layers. Attention, the MLP and the norms are compared with transformers' in test_formats.py.


def test_a_linear_layer_takes_any_width_and_keeps_the_type_of_the_activations(monkeypatch):
    layer, x = mil.Linear(5, 13).to(DEVICE), torch.randn(2, 3, 5, device=DEVICE)
    want = F.linear(x, layer.weight)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    biased, bare, narrow = layer(x), layer(x, biased=False), layer(x.bfloat16())
    monkeypatch.undo()
    assert_close(biased, want + layer.bias, 1e-6)
    assert_close(bare, want, 1e-6)
    assert narrow.dtype == torch.bfloat16 and bare.stride(1) == 16  # padded, as GPUs like it


def no_convolution(x, weight, *_):
    """Repeats heads, which is the convolution's other task."""
    return kernels.repeat_heads(x, len(weight)), x


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_without_its_new_parts_a_mamba_is_the_attention_it_came_from(monkeypatch, mixer, heads):
    """Causal attention without softmax, scale and RoPE, if convolution, gate, norm and skip are
    taken out, Δ = 1 and A = 0."""
    h, g = heads
    teacher = small(dtype=torch.float64, n_heads=h, n_kv_heads=g, head_dim=6, d_state=6)
    attention = teacher.layers[1].mixer
    block = mil.replace_attention(teacher, [1], mixer).layers[1].mixer
    with torch.no_grad():
        block.A_log.fill_(-math.inf)
        block.D.zero_()
    for name in ("silu", "softplus"):
        monkeypatch.setattr(F, name, torch.ones_like)
    monkeypatch.setattr(F, "rms_norm", lambda y, *_, **__: y)
    monkeypatch.setattr(mil, "causal_conv", no_convolution)
    u = torch.randn(2, 21, 16, dtype=torch.float64, device=DEVICE)
    reads = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (projection(u).unflatten(2, (-1, 6)) for projection in reads)
    k, v = (t.repeat_interleave(h // g, dim=2) for t in (k, v))
    scores = torch.einsum("bthp,bshp->bhts", q, k).tril()
    want = attention.o_proj(torch.einsum("bhts,bshp->bthp", scores, v).flatten(2))
    assert_close(block(u, None), want, 1e-6)  # A and D are kept in float32


def test_new_parameters_start_at_the_papers_values():
    change = dict(v=500, d=128, head_dim=32, d_ff=256, d_state=8)
    model = mil.Hybrid(sizes(["mamba", "mamba2", "attention"], **change))
    s6, ssd = (layer.mixer for layer in model.layers[:2])
    for block, bias in ((s6, s6.dt_proj.bias), (ssd, ssd.dt_bias)):
        delta = F.softplus(bias)
        assert 0.99e-3 < delta.min() < delta.max() < 1.01e-1
        assert (block.D == 1).all()
    assert_close(s6.A_log.exp(), torch.arange(1, 9).expand(128, 8), 1e-6)
    assert 1 <= ssd.A_log.exp().min() < ssd.A_log.exp().max() <= 16
    bound = 8**-0.5  # dt_rank = 128 / 16
    assert bound / 2 < s6.dt_proj.weight.abs().max() <= bound
    assert (ssd.norm.weight == 1).all() and ssd.norm.eps == 1e-5
    for name, w in model.named_parameters():  # what writes to the residual starts smaller
        if name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight")):
            last = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
            wanted = 0.02 / math.sqrt(6) if last else 0.02
            assert "dt_proj." in name or abs(w.std().item() / wanted - 1) < 0.06, name


# --------------------------------------------------------------------------------------------------
# The stack and its cache


@given(configs(), st.lists(st.integers(1, 7), min_size=2, max_size=4))
@settings(max_examples=15)
def test_documents_of_a_row_do_not_see_each_other(config, lengths):
    model, tokens = build(config), random_tokens(config, 2, sum(lengths))
    row = torch.cat([torch.arange(l) for l in lengths])
    docs = mil.Documents(torch.stack([row, torch.arange(len(row))]), tokens.device, torch.float64)
    with torch.no_grad():
        alone = torch.cat([model(text) for text in tokens[:1].split(lengths, dim=1)], dim=1)
        want = torch.cat([alone, model(tokens[1:])])  # the second row is one document
        assert_close(model(tokens, docs=docs), want, 1e-10)


@given(configs(), st.integers(1, 3), st.booleans(), st.data())
@settings(max_examples=100)
def test_each_row_of_a_cache_is_as_if_alone_whatever_it_reads_and_keeps(config, rows, undo, data):
    """Rows read their own numbers of tokens, padded on the right, or all as many and keep some."""
    model = build(config)
    cache = Cache(model, rows, 120, undo)
    if data.draw(st.booleans()):  # it held something else before
        with torch.no_grad():
            for _ in range(4):
                model(random_tokens(config, rows, kernels.FEW), cache)
        cache.clear()
    texts = [torch.empty(0, dtype=torch.long, device=DEVICE) for _ in range(rows)]
    for i in range(data.draw(st.integers(1, 6))):
        l = data.draw(st.sampled_from([1, 2, 5, kernels.FEW, kernels.FEW + 3]))
        padded = data.draw(st.booleans())
        counts = [data.draw(st.integers(0, l)) if padded else l for _ in range(rows)]
        new = random_tokens(config, rows, l, i)
        with torch.no_grad():
            got = model(new, cache, counts if padded else None)
            for j, n in enumerate(counts):
                texts[j] = torch.cat([texts[j], new[j, :n]])
                if n:
                    assert_close(got[j, :n], model(texts[j][None])[0, -n:], 1e-8)
        if undo and l <= kernels.FEW and not padded:
            texts = [text[: len(text) - data.draw(st.integers(0, l))] for text in texts]
            cache.keep([len(text) for text in texts])
    assert [len(text) for text in texts] == cache.at.tolist()


def test_a_cache_goes_back_over_the_last_pass_alone_unless_it_has_no_state():
    for mixers, first in ((["mamba2"], 5), (["attention"], 0)):
        model = small(mixers)
        cache = Cache(model, 1, 40, undo=True)
        with torch.no_grad():
            for l in (5, 2):
                model(random_tokens(model.config, 1, l), cache)
        for to in (8, first - 1):
            match = rf"rows hold \[7\] tokens and can go back to \[{first}\], not to \[{to}\]"
            with pytest.raises(MilError, match=match):
                cache.keep([to])
        cache.keep([first])


def test_a_cache_knows_its_room_and_padding_and_what_was_taken_back_take_none():
    model = small()
    tokens, cache = random_tokens(model.config, 2, 5), Cache(model, 2, 8, undo=True)
    with torch.no_grad():
        for _ in range(3):
            model(tokens, cache)
            cache.keep([0, 0])
        for counts in ([1, 3], [2, 0], [2, 5]):
            model(tokens, cache, counts)
            assert cache.used == cache.at.max()
    assert cache.at.tolist() == [5, 8]
    docs = mil.Documents(torch.arange(5).expand(2, 5), tokens.device)
    for match, call in (
        ("1 more tokens do not fit: 8 of 8 places are used", dict(tokens=tokens[:, :1])),
        ("1 rows of tokens for a cache of 2", dict(tokens=tokens[:1])),
        ("docs for rows without", dict(tokens=tokens, docs=docs)),
        ("lengths are for a cache", dict(tokens=tokens, lengths=[5, 5], cache=None)),
    ):
        with pytest.raises(MilError, match=match):
            model(**dict(cache=cache) | call)


# Sizes that are no powers of two; and a head in blocks of p and of n.
WIDE = dict(v=40, d=24, d_ff=28, n_heads=3, n_kv_heads=1, head_dim=20, d_state=10)
BLOCKS = dict(WIDE, n_heads=1, n_kv_heads=1, head_dim=72, d_state=24)
KINDS = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]


@pytest.mark.parametrize("undo, wide", [(False, BLOCKS), (True, WIDE)])
@pytest.mark.parametrize("dtype", KINDS)
def test_decodings_kernels_give_the_stacks_logits_and_the_bits_of_one_by_one(undo, wide, dtype):
    """So that greedy speculative decoding equals greedy plain decoding in bf16 too. A row has keys
    in two pieces, of two blocks."""
    mixers = ["attention", "mamba", "none", "mamba2"]
    model = mil.pack(small(mixers, dtype, attention_bias=True, **wide))
    model.layers[3].mixer.norm.eps = 0.1  # Mamba-2's: large enough to be seen
    texts = random_tokens(model.config, 2, 140)
    one, many = (Cache(model, 2, 140, undo=asked) for asked in (False, undo))
    begin = torch.tensor([1, 125], device=DEVICE)

    def following(at, l):
        """Row and place of the l tokens after those."""
        places = at[:, None] + torch.arange(l, device=DEVICE)
        return torch.arange(2, device=DEVICE)[:, None], places

    def read(cache, l):
        logits = model(texts[following(cache.at, l)], cache)
        assert cache.fused
        return logits

    got = [[], []]
    with torch.no_grad(), form("triton"):
        for cache in (one, many):
            with form("torch"):
                model(texts[:, :125], cache, begin)
        want = torch.cat([read(one, 1) for _ in range(5)], dim=1)
        for l, kept in ((4, [0, 3]), (3, [3, 0]), (2, [2, 2])):
            kept = kept if undo else [l, l]
            for row, logits, n in zip(got, read(many, l), kept, strict=True):
                row.append(logits[:n])
            if undo:
                many.keep(many.at - l + torch.tensor(kept, device=DEVICE))
        assert_same_bits(torch.stack([torch.cat(row)[:5] for row in got]), want)
    if dtype == torch.float32:
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(texts)
        assert_close(want, exact[following(begin, 5)], 1e-4)


@pytest.mark.parametrize("h, p, fit", [(16, 128, True), (2, 130, False), (17, 4, False)])
def test_heads_that_kernels_cannot_hold_are_decoded_without_them(h, p, fit):
    model = small(["attention", "mamba2"], n_heads=h, head_dim=p, n_kv_heads=1)
    assert Cache(model, 1, 2).fits is fit


def test_a_layer_without_mixer_moves_nothing_between_tokens():
    u = torch.randn(2, 3, 16)
    assert torch.equal(mil.NoMixer(sizes())(u, None), 0 * u)


# --------------------------------------------------------------------------------------------------
# Replacing attention, and keeping some layers


@pytest.mark.parametrize("init, share, tied", [("attention", False, True), ("random", True, False)])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "none"])
def test_a_replaced_layer_has_attentions_weights_and_all_else_stays(mixer, init, share, tied):
    """Of a frozen teacher, too, and of one that is a student already."""
    mixers = ["attention", "mamba2", "attention", "attention"]
    teacher = small(mixers, tied=tied).requires_grad_(False)
    before = {k: w.clone() for k, w in teacher.state_dict().items()}
    student = mil.replace_attention(teacher, (i for i in (0, 2)), mixer, init, share)
    assert student.config.mixers == [mixer, "mamba2", mixer, "attention"]
    assert [type(layer.mixer) for layer in student.layers] == [
        mil.CLASSES[name] for name in student.config.mixers
    ]
    for i in (0, 2):
        a, m = teacher.layers[i].mixer, student.layers[i].mixer
        new = []
        if mixer == "mamba":
            new = [m.C_proj.weight, m.B_proj.weight, m.in_proj_x.weight, m.out_proj.weight]
        if mixer == "mamba2":
            _, x, B, C, _ = m.in_proj.weight.split([16, 8, 8, 16, 4])
            new = [C, B, x, m.out_proj.weight]
        for w, source in zip(new, (a.q_proj, a.k_proj, a.v_proj, a.o_proj), strict=bool(new)):
            assert torch.equal(w, source.weight) == (init == "attention")
            assert w.data_ptr() != source.weight.data_ptr()
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name in before:
        assert torch.equal(theirs[name], before[name]), name
        if not name.startswith(("layers.0.mixer", "layers.2.mixer")):
            assert torch.equal(ours[name], before[name]), name
            assert (ours[name].data_ptr() == theirs[name].data_ptr()) == share, name
    assert teacher.config.mixers == mixers
    assert (student.lm_head.weight is student.embed_tokens.weight) == tied


def test_layers_are_replaced_at_even_distances_as_many_as_the_share_says():
    for keep, kept in ((0.5, range(1, 32, 2)), (0.25, range(3, 32, 4)), (0.125, range(7, 32, 8))):
        assert sorted({*range(32)} - {*mil.interleaved_layers(32, keep)}) == [*kept]  # the paper's
    assert mil.interleaved_layers(32, 0.75) == list(range(0, 32, 4))
    for n in range(1, 65):
        for kept in range(n + 1):
            assert len(mil.interleaved_layers(n, kept / n)) == n - kept


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_some_layers_is_those_layers_between_the_same_embedding_and_head(tied):
    model = small(["attention", "mamba", "mamba2", "attention"], tied=tied)
    part, tokens = mil.keep_layers(model, [0, 2]), random_tokens(model.config, 2, 7)
    assert part.config == sizes(["attention", "mamba2"], tied=tied)
    assert (part.lm_head.weight is part.embed_tokens.weight) == tied

    def want():
        u, angles = model.start(tokens)
        for i in (0, 2):
            u = model.layers[i](u, angles)
        return model.lm_head(model.norm(u))

    with torch.no_grad():
        before = want()
        assert torch.equal(part(tokens), before)
        for w in part.parameters():
            w.add_(1)  # its own
        assert torch.equal(want(), before)
    assert all(w.requires_grad for w in part.parameters())


def replace(layers, mixers=("mamba2", *LLAMA[1:]), **change):
    mil.replace_attention(small(mixers, **change), layers, "mamba")


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: sizes(n_kv_heads=3), "n_heads 4 is not divisible by n_kv_heads 3"),
        (lambda: sizes(d=18), "width d 18 is not divisible by n_heads 4"),
        (lambda: sizes(head_dim=3), "head_dim is 3"),
        (lambda: sizes(n_layers=3), "4 mixers for 3 layers"),
        (lambda: sizes(v=0), "v is 0"),
        (lambda: sizes(d_ff=1.5), "d_ff is 1.5"),
        (lambda: sizes(["attention", "rwkv"]), "'rwkv', expected one of attention"),
        (lambda: sizes(["mamba"], d_state=5), "d_state 5 does not divide the kv width 8"),
        (lambda: sizes(rope_scaling={"factor": 8, "low_freq_factor": 1}), "for factor, low_freq"),
        (lambda: sizes(rope_theta="x"), "rope_theta is 'x'"),
        (lambda: replace([4]), "layer 4 holds nothing, expected attention in 4 layers from 0 on"),
        (lambda: replace([1, 1]), "layer 1 holds mamba, .*none listed twice"),
        (lambda: replace([0]), "layer 0 holds mamba2, expected attention"),
        (lambda: replace([1], d_state=5), "d_state 5 does not divide"),
        *[
            (lambda layers=layers: mil.keep_layers(small(), layers), "expected some of 0 to 3, ea")
            for layers in ([], [1, 0], [0, 0], [-1], [0, 4])
        ],
    ],
)
def test_sizes_and_layers_that_make_no_sense_are_refused(call, told):
    with pytest.raises(MilError, match=told):
        call()


# --------------------------------------------------------------------------------------------------
# Our checkpoints; those of others are tested in test_formats.py


def test_what_makes_up_the_decay_and_the_state_stays_in_float32(tmp_path):
    mil.save(small(["mamba", "mamba2"]), tmp_path)
    loaded = mil.load(tmp_path, DEVICE, torch.bfloat16)
    student = mil.replace_attention(small(LLAMA[:2], torch.bfloat16), [0], "mamba")
    student = mil.replace_attention(student, [1], "mamba2")
    wide = ("A_log", ".D", "dt_bias", "dt_proj.bias")
    for model in (loaded, student, mil.cast(small(["mamba", "mamba2"]), torch.bfloat16)):
        cache = Cache(model, 1, 9)
        for name, w in model.named_parameters():
            assert w.dtype == (torch.float32 if name.endswith(wide) else torch.bfloat16), name
        with torch.no_grad():
            for l in (3, 1):
                logits = model(random_tokens(model.config, 1, l), cache)
                assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
        for h in (state.h for state in cache.states):
            assert h.dtype == torch.float32 and not torch.equal(h, h.bfloat16().float())
    for w in mil.cast(student, torch.float64).parameters():
        assert w.dtype == torch.float64


@pytest.mark.parametrize("module, name", [(torch, "save"), (json, "dumps"), (mil.os, "replace")])
def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, module, name):
    old, new, rename = small(seed=1), small(seed=2), mil.os.replace
    mil.save(old, tmp_path)
    (tmp_path / "weights-best.pt").write_text("of the user")

    def crash(*args, **_):
        if name == "save":
            args[1].write(b"half of a checkpoint")
        if name == "replace" and args[1].name != "config.json":
            return rename(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, crash)
    with pytest.raises(KeyboardInterrupt):
        mil.save(new, tmp_path)
    monkeypatch.undo()
    assert torch.equal(mil.load(tmp_path, DEVICE).lm_head.weight, old.lm_head.weight)
    assert not list(tmp_path.glob(".*"))
    notes = dict(note="kept", weights="a note cannot take the place of a key")
    mil.save(new, tmp_path, **notes)  # removes what it wrote before, and nothing else
    assert json.loads((tmp_path / "config.json").read_text())["note"] == "kept"
    assert torch.equal(mil.load(tmp_path, DEVICE).lm_head.weight, new.lm_head.weight)
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "weights-best.pt").exists()
