"""The stack, its cache, the replacement of attention and the checkpoints."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, assert_same_bits, build, configs, form, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
import mil
from mil import Cache, Config, MilError

SMALL = dict(v=11, d=16, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=24, context=32, d_state=4)


# --------------------------------------------------------------------------------------------------
# The mixers


def test_attention_is_softmax_over_the_past_with_grouped_heads():
    config = Config(**{**SMALL, "n_heads": 6, "n_kv_heads": 2, "head_dim": 4})
    block, u, l = (
        build(config).layers[0].mixer,
        torch.randn(2, 9, 16, dtype=torch.float64, device=DEVICE),
        9,
    )
    pos = torch.arange(l, device=DEVICE).expand(2, l)
    heads = lambda w: (u @ w.weight.T).view(2, l, -1, 4)  # noqa: E731
    angle = pos[0, :, None] * config.rope_theta ** (-torch.arange(2, device=DEVICE) / 2)  # (l, 2)
    turn = lambda t: (
        torch.view_as_real(
            torch.complex(t[..., :2], t[..., 2:])
            * torch.polar(torch.ones_like(angle), angle)[:, None]  # noqa: E731
        )
        .transpose(-1, -2)
        .flatten(-2)
    )
    q, k, v = turn(heads(block.q_proj)), turn(heads(block.k_proj)), heads(block.v_proj)
    y = torch.zeros(2, l, 6, 4, dtype=torch.float64, device=DEVICE)
    for t in range(l):
        for i in range(6):  # query head i reads kv head i // 3
            y[:, t, i] = torch.einsum(
                "bs,bsp->bp",
                (torch.einsum("bp,bsp->bs", q[:, t, i], k[:, : t + 1, i // 3]) / 2).softmax(-1),
                v[:, : t + 1, i // 3],
            )
    assert_close(block(u, mil.rope_angles(config, pos)), y.flatten(2) @ block.o_proj.weight.T, 1e-6)


def test_rope_scaling_stretches_slow_turns_and_keeps_fast_ones():
    scaling = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    config = Config(rope_scaling=scaling, n_layers=1)
    cos, _ = mil.rope_angles(config, torch.tensor([[1]]))
    for i in range(64):
        freq = 500000.0 ** (-i / 64)
        wavelength = 2 * math.pi / freq
        if wavelength > 8192 / 1:
            freq = freq / 8
        elif wavelength >= 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            freq = (1 - smooth) * freq / 8 + smooth * freq
        assert abs(cos[0, 0, 0, i].item() - math.cos(freq)) < 1e-6


def test_a_projection_of_an_odd_width_is_padded_on_a_gpu_and_gives_the_same(monkeypatch):
    layer, x = mil.Linear(5, 13).to(DEVICE), torch.randn(2, 3, 5, device=DEVICE)
    want = F.linear(x, layer.weight, layer.bias)
    bare = F.linear(x, layer.weight)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    got = layer(x), layer(x, biased=False)
    monkeypatch.undo()
    assert_close(got[0], want, 1e-6)
    assert_close(got[1], bare, 1e-6)
    assert got[1].stride(1) == 16


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_without_its_new_parts_the_mamba_block_is_the_attention_it_came_from(
    monkeypatch, mixer, heads
):
    """method: conv, SiLU, gate and norm taken out, Δ = 1, A = 0, D = 0: causal attention without softmax, scale and RoPE."""
    config = Config(
        **{**SMALL, "n_heads": heads[0], "n_kv_heads": heads[1], "head_dim": 6, "d_state": 6}
    )
    teacher = build(config)
    block = mil.replace_attention(teacher, [1], mixer).layers[1].mixer
    u = torch.randn(2, 21, 16, dtype=torch.float64, device=DEVICE)
    u[..., 0] = 1  # a constant channel, so that the gate's projection can give silu(z) = 1
    with torch.no_grad():
        gate, step = (
            (block.in_proj_z.weight, block.dt_proj)
            if mixer == "mamba"
            else (block.in_proj.weight[: block.sizes[0]], None)
        )
        gate.zero_()[:, 0] = 1.2784645427610738
        if mixer == "mamba":
            step.weight.zero_()
            step.bias.fill_(math.log(math.e - 1))
        else:
            block.in_proj.weight[-heads[0] :].zero_()
            block.dt_bias.fill_(math.log(math.e - 1))
        block.A_log.fill_(-math.inf)
        block.D.zero_()
    monkeypatch.setattr(
        mil, "causal_conv", lambda x, weight, *_: (kernels.repeat_heads(x, weight.shape[0]), x)
    )
    monkeypatch.setattr(F, "rms_norm", lambda y, *_, **__: y)
    a = teacher.layers[1].mixer
    q, k, v = (w(u).unflatten(2, (-1, 6)) for w in (a.q_proj, a.k_proj, a.v_proj))
    k, v = (t.repeat_interleave(heads[0] // heads[1], dim=2) for t in (k, v))
    scores = torch.einsum("bthp,bshp->bhts", q, k).tril()
    want = a.o_proj(torch.einsum("bhts,bshp->bthp", scores, v).flatten(2))
    assert_close(block(u, None), want, 1e-6)  # dt_bias, A and D are kept in float32


def test_new_parameters_start_at_the_papers_values():
    config = Config(
        **{
            **SMALL,
            "d": 40,
            "head_dim": 16,
            "d_state": 8,
            "mixers": ["mamba", "mamba2", "mamba", "mamba2"],
        }
    )
    model = mil.Hybrid(config)
    for block in (model.layers[0].mixer, model.layers[1].mixer):
        bias = block.dt_proj.bias if isinstance(block, mil.Mamba) else block.dt_bias
        delta = F.softplus(bias)
        assert delta.min() > 1e-3 * 0.99 and delta.max() < 1e-1 * 1.01 and delta.std() > 0
        assert (block.D == 1).all()
    s6, ssd = model.layers[0].mixer, model.layers[1].mixer
    assert_close(s6.A_log.exp(), torch.arange(1, 9).expand(64, 8), 1e-6)
    assert ssd.A_log.exp().min() >= 1 and ssd.A_log.exp().max() <= 16 and ssd.A_log.std() > 0
    assert (
        s6.dt_proj.weight.abs().max() <= 3**-0.5 and s6.dt_proj.weight.abs().max() > 3**-0.5 / 2
    )  # dt_rank = ceil(40/16)
    assert (ssd.norm.weight == 1).all() and ssd.norm.eps == 1e-5


def test_parameters_are_named_and_shaped_as_in_the_released_checkpoints():
    """d_model 32, d_inner 64 (4 heads of 16), d_xb 32 (2 kv heads), d_state 8 for Mamba and the head size for Mamba-2."""
    config = Config(
        v=11,
        d=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        d_ff=24,
        d_state=8,
        mixers=["mamba", "mamba2"],
    )
    shapes = [
        {k: tuple(w.shape) for k, w in layer.mixer.state_dict().items()}
        for layer in mil.Hybrid(config).layers
    ]
    assert shapes[0] == {
        "in_proj_x.weight": (32, 32),
        "in_proj_z.weight": (64, 32),
        "B_proj.weight": (32, 32),
        "C_proj.weight": (64, 32),
        "dt_proj_down.weight": (2, 32),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "A_log": (64, 8),
        "D": (64,),
        "out_proj.weight": (32, 64),
    }
    assert shapes[1] == {
        "in_proj.weight": (64 + 32 + 32 + 64 + 4, 32),
        "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


def test_the_gated_norm_of_mamba2_is_per_head_and_after_the_gate(monkeypatch):
    config = Config(**{**SMALL, "mixers": ["mamba2"] * 4})
    block, seen = build(config).layers[0].mixer, {}
    u = torch.randn(1, 5, 16, dtype=torch.float64, device=DEVICE)

    def scan(*args):
        seen["y"], state = kernels.ssm_scan(*args)
        return seen["y"], state

    monkeypatch.setattr(mil, "ssm_scan", scan)
    with torch.no_grad():
        block.out_proj.weight.copy_(torch.eye(16))
    got = block(u, None)
    gated = seen["y"] * F.silu(u @ block.in_proj.weight[:16].T).view(1, 5, 4, 4)
    want = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(got, (want * block.norm.weight.view(4, 4)).flatten(2), 1e-9)


def test_the_frequencies_of_rope_are_those_of_hugging_face_to_the_last_bit():
    pos, inverse = (
        torch.tensor([[131_071]]),
        1.0 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128),
    )
    cos, sin = mil.rope_angles(Config(), pos)
    assert torch.equal(cos[0, 0, 0], (131_071.0 * inverse).cos())
    assert torch.equal(sin[0, 0, 0], (131_071.0 * inverse).sin())
    cos, _ = mil.rope_angles(Config(rope_scaling={"factor": 4.0}), pos)
    assert torch.equal(cos[0, 0, 0], (131_071.0 * (inverse / 4.0)).cos())
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    cos, _ = mil.rope_angles(Config(rope_scaling=dict(zip(names, (8.0, 1.0, 4.0, 8192)))), pos)
    wavelength = 2 * math.pi / inverse  # as transformers' _compute_llama3_parameters has it
    scaled = torch.where(wavelength > 8192, inverse / 8.0, inverse)
    smooth = (8192 / wavelength - 1.0) / 3.0
    between = ~(wavelength < 2048) & ~(wavelength > 8192)
    scaled = torch.where(between, (1 - smooth) * scaled / 8.0 + smooth * scaled, scaled)
    assert torch.equal(cos[0, 0, 0], (131_071.0 * scaled).cos())


# --------------------------------------------------------------------------------------------------
# The stack and its cache


@given(configs(), st.integers(2, 12), st.integers(0, 100), st.data())
@settings(max_examples=25)
def test_the_future_never_changes_the_past_of_a_stack(config, l, seed, data):
    model, tokens = build(config, seed=seed), random_tokens(config, 2, l, seed)
    at = data.draw(st.integers(1, l - 1))
    changed = tokens.clone()
    changed[:, at:] = (changed[:, at:] + 1) % config.v
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert_close(after[:, :at], before[:, :at], 1e-10)
    assert not torch.equal(after[:, at:], before[:, at:])


UNDO = st.booleans()


@given(configs(), st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 3), UNDO)
@settings(max_examples=60)
def test_a_stack_with_a_cache_equals_the_stack_without_for_any_split(config, pieces, b, undo):
    model, tokens = build(config), random_tokens(config, b, sum(pieces))
    with torch.no_grad():
        want, cache = model(tokens), Cache(model, b, sum(pieces), undo)
        got = torch.cat([model(part, cache) for part in tokens.split(pieces, dim=1)], dim=1)
    assert_close(got, want, 1e-8)


@given(configs(), st.integers(1, 3), UNDO, st.data())
@settings(max_examples=80)
def test_each_row_of_a_cache_is_as_if_alone_whatever_it_reads_and_keeps(config, rows, undo, data):
    """Rows read their own numbers of tokens, padded on the right, or all as many and keep some."""
    model, cache = build(config), Cache(build(config), rows, 120, undo)
    texts = [torch.empty(0, dtype=torch.long, device=DEVICE) for _ in range(rows)]
    for i in range(data.draw(st.integers(1, 6))):
        l = data.draw(st.sampled_from([1, 2, 5, kernels.FEW, kernels.FEW + 3]))
        padded = data.draw(st.booleans())
        counts = [data.draw(st.integers(0, l)) if padded else l for _ in range(rows)]
        new = random_tokens(config, rows, l, i)
        with torch.no_grad():
            got = model(new, cache, counts if padded else None)
            texts = [torch.cat([text, row[:n]]) for text, row, n in zip(texts, new, counts)]
            for row, text, n in zip(got, texts, counts):
                if n:
                    assert_close(row[:n], model(text[None])[0, -n:], 1e-8)
        if undo and l <= kernels.FEW and not padded:
            kept = [len(text) - data.draw(st.integers(0, n)) for text, n in zip(texts, counts)]
            cache.keep(kept)
            texts = [text[:n] for text, n in zip(texts, kept)]
    assert [len(text) for text in texts] == cache.at.tolist()


def test_a_pass_leaves_the_state_before_its_tokens_and_their_inputs_beside_it():
    model = build(Config(**{**SMALL, "mixers": ["mamba2"] * 4}))
    cache, states = Cache(model, 1, 40, undo=True), []
    with torch.no_grad():
        model(random_tokens(model.config, 1, 19), cache)  # more than FEW: into the state at once
        assert cache.base.tolist() == [19]
        for kept in (2, 0, 1):
            before = cache.at.tolist()
            states.append(cache.states[0].h.clone())
            model(random_tokens(model.config, 1, 2), cache)
            assert cache.base.tolist() == before
            cache.keep([before[0] + kept])
        states.append(cache.states[0].h)
    same = [torch.equal(a, b) for a, b in zip(states, states[1:])]
    assert same == [True, False, True]  # it moves in the pass after tokens were kept


def test_a_cache_goes_back_over_the_last_pass_alone_unless_it_has_no_state():
    for mixers, first in ((["mamba2"] * 4, 5), (["attention"] * 4, 0)):
        model = build(Config(**{**SMALL, "mixers": mixers}))
        cache = Cache(model, 1, 40, undo=True)
        with torch.no_grad():
            for l in (5, 2):
                model(random_tokens(model.config, 1, l), cache)
        for to in {8, first - 1}:
            match = rf"rows hold \[7\] tokens and can go back to \[{first}\], not to \[{to}\]"
            with pytest.raises(MilError, match=match):
                cache.keep([to])
        cache.keep([first])


# sizes that are no powers of two; and a head in blocks of p and of n, keys in pieces of 16
WIDE = dict(SMALL, mixers=["attention", "mamba", "none", "mamba2"], v=40, d=24, d_ff=28)
WIDE |= dict(n_heads=3, n_kv_heads=1, head_dim=20, d_state=10)
BLOCKS = dict(WIDE, n_heads=1, n_kv_heads=1, head_dim=72, d_state=24)


@pytest.mark.parametrize("undo, sizes", [(False, WIDE), (True, WIDE), (True, BLOCKS)])
def test_decodings_kernels_do_what_pytorch_does_whatever_is_kept(undo, sizes, monkeypatch):
    monkeypatch.setattr(kernels, "SPLITS", kernels.SPLITS if sizes is WIDE else (16, 16))
    model = build(Config(**sizes), torch.float32)
    model.layers[3].mixer.norm.eps = 0.1  # Mamba-2's: large enough to be seen
    caches = [Cache(model, 2, 40, undo) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            with form("torch"):
                model(random_tokens(model.config, 2, 3), cache, [0, 3])
        for i, l in enumerate([3, 1, 5, 4]):
            new, logits = random_tokens(model.config, 2, l, i), []
            for cache, kind in zip(caches, ("torch", "triton")):
                with form(kind):
                    logits.append(model(new, cache))
                assert cache.fused == (kind == "triton")
                if undo:
                    cache.keep([int(cache.at[0]), int(cache.at[1]) - 1])
            assert_close(logits[1], logits[0], 1e-4)
        assert torch.equal(caches[0].at, caches[1].at)
        assert torch.equal(caches[0].base, caches[1].base)


@pytest.mark.parametrize("sizes", [WIDE, BLOCKS])
def test_several_tokens_at_once_give_the_bits_of_one_by_one_whatever_is_kept(sizes, monkeypatch):
    """So that greedy speculative decoding equals greedy plain decoding in bf16 too."""
    monkeypatch.setattr(kernels, "SPLITS", kernels.SPLITS if sizes is WIDE else (16, 16))
    model = build(Config(**sizes), torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    tokens, got, at = random_tokens(model.config, 1, 24), [], 14
    with torch.no_grad(), form("triton"):
        one, many = Cache(model, 1, 30), Cache(model, 1, 30, undo=True)
        for cache in (one, many):
            model(tokens[:, :14], cache, [14])
        want = torch.cat([model(tokens[:, i : i + 1], one) for i in range(14, 17)], dim=1)
        for l, kept in ((5, 0), (4, 1), (3, 2)):
            got.append(model(tokens[:, at : at + l], many)[:, :kept])
            at += kept
            many.keep([at])
    assert at == 17
    assert_same_bits(torch.cat(got, dim=1), want)


@pytest.mark.parametrize("split, n", [((128, 512), 100), ((16, 16), 270)])
def test_attention_adds_up_blocks_of_a_piece_and_many_pieces(split, n, monkeypatch):
    """In a packed model, whose q, k and v are slices of one projection."""
    monkeypatch.setattr(kernels, "SPLITS", split)
    sizes = dict(WIDE, n_layers=1, n_heads=2, mixers=["attention"], context=320)
    config, got = Config(**sizes), []
    model = mil.pack(build(config, torch.float32))
    for kind in ("torch", "triton"):
        cache = Cache(model, 1, n + 2)
        with torch.no_grad(), form("torch"):
            model(random_tokens(config, 1, n), cache)
        with torch.no_grad(), form(kind):
            got.append(model(random_tokens(config, 1, 2, 1), cache))
    assert_close(got[1], got[0], 1e-4)


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_the_host_knows_how_many_places_are_used(kind):
    model = build(Config(**{**WIDE, "n_layers": 1, "mixers": ["attention"]}), torch.float32)
    cache = Cache(model, 1, 8, undo=True)
    with torch.no_grad(), form(kind):
        for _ in range(4):
            model(random_tokens(model.config, 1, 3), cache)
            cache.keep([0])
        for _ in range(2):
            model(random_tokens(model.config, 1, 3), cache)
        assert cache.used == 6
        with pytest.raises(MilError, match="3 more tokens do not fit: 6 of 8 places are used"):
            model(random_tokens(model.config, 1, 3), cache)


@pytest.mark.parametrize("mixer", mil.MIXERS)
def test_a_float32_stack_takes_the_triton_kernels_and_agrees_with_float64(mixer):
    config = Config(**{**SMALL, "n_layers": 1, "mixers": [mixer]})
    model, tokens = build(config, torch.float32), random_tokens(config, 2, 19)
    with form("triton"), torch.no_grad():
        cache = Cache(model, 2, 19)
        got, cached = (
            model(tokens),
            torch.cat([model(part, cache) for part in tokens.split([7, 1, 11], dim=1)], dim=1),
        )
        want = copy.deepcopy(model).double()(tokens)
    assert_close(got, want, 1e-4)
    assert_close(cached, want, 1e-4)


def test_the_cache_refuses_what_does_not_fit():
    model = build(Config(**SMALL))
    with pytest.raises(MilError, match="2 rows of tokens for a cache of 3"):
        model(random_tokens(model.config, 2, 3), Cache(model, 3, 8))
    with pytest.raises(MilError, match="9 more tokens do not fit: 0 of 8"):
        model(random_tokens(model.config, 3, 9), Cache(model, 3, 8))


def test_a_layer_without_mixer_moves_nothing_between_tokens():
    config = Config(**{**SMALL, "mixers": ["none"] * 4})
    model, tokens = build(config), random_tokens(config, 1, 6)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % config.v
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, 1:], model(changed)[:, 1:])


# --------------------------------------------------------------------------------------------------
# Replacing attention


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "none"])
def test_a_replaced_layer_carries_exactly_the_attentions_weights_and_all_else_is_untouched(
    mixer, share, tied
):
    teacher = build(Config(**SMALL, tied=tied), torch.float32)
    before = {k: w.clone() for k, w in teacher.state_dict().items()}
    student = mil.replace_attention(teacher, [0, 2], mixer, share=share)
    assert (
        student.config.mixers == [mixer, "attention", mixer, "attention"]
        and teacher.config.mixers == ["attention"] * 4
    )
    for i in (0, 2):
        a, m = teacher.layers[i].mixer, student.layers[i].mixer
        if mixer == "mamba":
            got = [m.C_proj.weight, m.B_proj.weight, m.in_proj_x.weight, m.out_proj.weight]
        elif mixer == "mamba2":
            _, x, B, C, _ = m.in_proj.weight.split([16, 8, 8, 16, 4])
            got = [C, B, x, m.out_proj.weight]
        else:
            got = []
        for w, source in zip(got, (a.q_proj, a.k_proj, a.v_proj, a.o_proj)):
            assert torch.equal(w, source.weight) and w.data_ptr() != source.weight.data_ptr()
    kept = {
        k: w
        for k, w in student.state_dict().items()
        if not k.startswith(("layers.0.mixer", "layers.2.mixer"))
    }
    assert set(kept) == {
        k for k in before if not k.startswith(("layers.0.mixer", "layers.2.mixer"))
    }
    for k, w in kept.items():
        assert (
            torch.equal(w, before[k])
            and (w.data_ptr() == teacher.state_dict()[k].data_ptr()) == share
        ), k
    for k, w in teacher.state_dict().items():
        assert torch.equal(w, before[k]), k
    assert (student.lm_head.weight is student.embed_tokens.weight) == tied


def test_replacement_can_be_applied_again_and_keeps_what_was_learned():
    first = mil.replace_attention(build(Config(**SMALL), torch.float32), [0], "mamba2")
    with torch.no_grad():
        for w in first.layers[0].mixer.parameters():
            w.add_(1)
    second = mil.replace_attention(first, [3], "mamba")
    assert second.config.mixers == ["mamba2", "attention", "attention", "mamba"]
    for k, w in first.layers[0].mixer.state_dict().items():
        assert torch.equal(second.layers[0].mixer.state_dict()[k], w)


def test_the_layers_to_replace_may_come_from_any_iterable():
    student = mil.replace_attention(build(Config(**SMALL)), (i for i in (0, 1)), "mamba2")
    assert (
        [isinstance(layer.mixer, mil.Mamba2) for layer in student.layers]
        == [True, True, False, False]
        == [m == "mamba2" for m in student.config.mixers]
    )


def test_random_initialisation_does_not_copy_attention():
    teacher = build(Config(**SMALL), torch.float32)
    block = mil.replace_attention(teacher, [1], "mamba", init="random").layers[1].mixer
    assert not torch.equal(block.C_proj.weight, teacher.layers[1].mixer.q_proj.weight)


def test_interleaved_layers_are_the_papers():
    assert mil.interleaved_layers(32, 0.5) == list(range(0, 32, 2))
    assert mil.interleaved_layers(32, 0.75) == list(range(0, 32, 4))
    assert sorted(set(range(32)) - set(mil.interleaved_layers(32, 0.25))) == list(range(3, 32, 4))
    assert sorted(set(range(32)) - set(mil.interleaved_layers(32, 0.125))) == list(range(7, 32, 8))
    assert mil.interleaved_layers(32, 0) == list(range(32)) and mil.interleaved_layers(32, 1) == []


@pytest.mark.parametrize(
    "layers, match",
    [
        ([4], "layer 4 holds nothing, expected attention in 4 layers from 0 on"),
        ([-1], "layer -1 holds nothing"),
        ([1, 1], "layer 1 holds mamba2, .*none listed twice"),
        ([0], "layer 0 holds mamba2, expected attention"),
    ],
)
def test_layers_that_cannot_be_replaced_are_refused(layers, match):
    model = mil.replace_attention(build(Config(**SMALL)), [0], "mamba2")
    with pytest.raises(MilError, match=match):
        mil.replace_attention(model, layers)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(n_kv_heads=3), "n_heads 4 is not divisible by n_kv_heads 3"),
        (dict(d=18), "width d 18 is not divisible by n_heads 4"),
        (dict(head_dim=3), "head_dim is 3"),
        (dict(mixers=["attention"]), "1 mixers for 4 layers"),
        (dict(v=0), "v is 0"),
        (dict(mixers=["attention", "rwkv"] * 2), "'rwkv', expected one of attention"),
        (dict(d_ff=1.5), "d_ff is 1.5"),
        (dict(mixers=["mamba"] * 4, d_state=5), "d_state 5 does not divide the kv width 8"),
        (
            dict(rope_scaling={"factor": 8, "low_freq_factor": 1}),
            "rope_scaling is .*expected numbers above 0 for factor, low_freq",
        ),
        (dict(head_dim=-2), "head_dim is -2"),
        (dict(rope_theta="x"), "rope_theta is 'x'"),
        (dict(n_layers="4"), "n_layers is '4'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change, match):
    with pytest.raises(MilError, match=match):
        Config(**{**SMALL, **change})


def test_heads_that_cannot_be_cut_are_refused_before_anything_is_built():
    with pytest.raises(MilError, match="d_state 5 does not divide"):
        mil.replace_attention(build(Config(**{**SMALL, "d_state": 5})), [0], "mamba")


# --------------------------------------------------------------------------------------------------
# Checkpoints


@given(configs(), st.integers(0, 100))
@settings(max_examples=15)
def test_save_and_load_give_the_same_model(tmp_path_factory, config, seed):
    model, place = build(config, torch.float32, seed), tmp_path_factory.mktemp("save")
    mil.save(model, place / "deep" / "er", note="kept")
    loaded = mil.load(place / "deep" / "er", DEVICE)
    assert (
        loaded.config == model.config and mil.read_config(place / "deep" / "er")["note"] == "kept"
    )
    assert set(loaded.state_dict()) == set(model.state_dict())
    for k, w in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[k], w) and loaded.state_dict()[k].dtype == w.dtype, k
    assert (
        not loaded.training and (loaded.lm_head.weight is loaded.embed_tokens.weight) == config.tied
    )


def test_loading_in_another_type_keeps_the_decay_in_float32(tmp_path):
    mil.save(build(Config(**{**SMALL, "mixers": ["mamba", "mamba2"] * 2}), torch.float32), tmp_path)
    model = mil.load(tmp_path, DEVICE, torch.bfloat16)
    wide = {k.split("mixer.")[1] for k, w in model.named_parameters() if w.dtype == torch.float32}
    assert (
        wide == {"A_log", "D", "dt_bias", "dt_proj.bias"}
        and model.lm_head.weight.dtype == torch.bfloat16
    )
    logits = model(random_tokens(model.config, 1, 20))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    old, new = build(Config(**SMALL), torch.float32, 1), build(Config(**SMALL), torch.float32, 2)
    mil.save(old, tmp_path)
    whole = torch.save

    def crash(weights, f):
        f.write(b"half of a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        mil.save(new, tmp_path)
    monkeypatch.setattr(torch, "save", whole)
    monkeypatch.setattr(
        json, "dumps", lambda *a, **k: 1 / 0
    )  # the weights are there, config.json is not
    with pytest.raises(ZeroDivisionError):
        mil.save(new, tmp_path)
    assert torch.equal(mil.load(tmp_path).lm_head.weight.to(DEVICE), old.lm_head.weight)
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    mil.save(new, tmp_path)
    assert (
        len(list(tmp_path.iterdir())) == 2
    )  # the old weights are gone, and nothing of the crashes is left


def test_saving_deletes_nothing_it_did_not_write(tmp_path):
    (tmp_path / "weights-best.pt").write_text("precious")
    for seed in (1, 2):
        mil.save(
            build(Config(**SMALL), torch.float32, seed),
            tmp_path,
            weights="a note cannot take the place of a key",
        )
    assert (tmp_path / "weights-best.pt").read_text() == "precious" and len(
        list(tmp_path.glob("weights-*.pt"))
    ) == 2
    assert mil.load(tmp_path).config == Config(**SMALL)


class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda d: (d / "config.json").unlink(), "no checkpoint here"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read as a JSON object"),
        (
            lambda d: (d / "config.json").write_text('{"a": 1}'),
            'not a checkpoint: expected "format": "mil"',
        ),
        (
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace('"d": 16', '"width": 16')
            ),
            "config.json",
        ),
        (
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace('"v": 11', '"v": 12')
            ),
            r"is \(11, 16\), expected \(12, 16\)",
        ),
        (lambda d: next(d.glob("*.pt")).unlink(), "the checkpoint is incomplete"),
        (
            lambda d: next(d.glob("*.pt")).write_bytes(next(d.glob("*.pt")).read_bytes()[:-2000]),
            "truncated or damaged",
        ),
        (lambda d: torch.save({"a": Evil()}, next(d.glob("*.pt"))), "could run code"),
        (
            lambda d: next(d.glob("*.pt")).write_bytes(pickle.dumps(Evil())),
            "could run code|damaged",
        ),
        (lambda d: torch.save([1, 2], next(d.glob("*.pt"))), "holds a list, expected tensors"),
        (lambda d: torch.save({"lm_head.weight": 1}, next(d.glob("*.pt"))), "missing|no tensor"),
        (
            lambda d: torch.save(
                {k: w.int() for k, w in torch.load(next(d.glob("*.pt"))).items()},
                next(d.glob("*.pt")),
            ),
            "is torch.int32, expected",
        ),
    ],
    ids=[
        "no config",
        "bad json",
        "other json",
        "unknown key",
        "other shape",
        "no weights",
        "truncated",
        "code",
        "plain pickle",
        "a list",
        "numbers",
        "integers",
    ],
)
def test_a_damaged_checkpoint_gets_one_clear_line_and_runs_no_code(tmp_path, capsys, damage, match):
    mil.save(build(Config(**SMALL), torch.float32), tmp_path)
    damage(tmp_path)
    with pytest.raises(MilError, match=match) as e:
        mil.load(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
    assert "this code ran" not in capsys.readouterr().out


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MilError, match="cannot be made"):
        mil.save(build(Config(**SMALL)), tmp_path / "file" / "model")


def test_config_round_trips_through_json():
    config = Config(
        **SMALL,
        mixers=["mamba2", "attention", "none", "mamba"],
        rope_scaling=dict(zip(mil.ROPE_SCALING, (8.0, 1.0, 4.0, 8192))),
    )
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_stack_of_attention_is_a_llama():
    model = build(Config(**SMALL, norm_eps=0.1))
    tokens = random_tokens(model.config, 2, 7)
    norm = lambda u, m: u / (u.square().mean(-1, keepdim=True) + 0.1).sqrt() * m.weight
    u, angles = (
        model.embed_tokens.weight[tokens],
        mil.rope_angles(model.config, torch.arange(7, device=DEVICE).expand(2, 7)),
    )
    for layer in model.layers:
        u = u + layer.mixer(norm(u, layer.input_layernorm), angles)
        v, m = norm(u, layer.post_attention_layernorm), layer.mlp
        u = u + (F.silu(v @ m.gate_proj.weight.T) * (v @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    assert_close(model(tokens), norm(u, model.norm) @ model.lm_head.weight.T, 1e-9)


def test_as_many_layers_are_replaced_as_the_share_says():
    for n in range(1, 65):
        for kept in range(n + 1):
            assert len(mil.interleaved_layers(n, kept / n)) == n - kept


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_replacing_in_a_bf16_model_keeps_the_decay_in_float32(mixer):
    model = mil.replace_attention(build(Config(**SMALL), torch.bfloat16), [1], mixer)
    wide = {k.split("mixer.")[1] for k, w in model.named_parameters() if w.dtype == torch.float32}
    assert wide == {"A_log", "D"} | ({"dt_proj.bias"} if mixer == "mamba" else {"dt_bias"})
    for before, dtype, decay in (
        (torch.float64, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        for name, w in mil.cast(model.to(before), dtype).named_parameters():
            assert w.dtype == (decay if name.split("mixer.")[-1] in wide else dtype), name


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_bf16_stack_keeps_its_cached_state_in_float32(mixer):
    model = mil.cast(mil.Hybrid(Config(**SMALL, mixers=[mixer] * 4)), torch.bfloat16).to(DEVICE)
    cache = Cache(model, 1, 8)
    with torch.no_grad():
        for token in random_tokens(model.config, 1, 3).T:
            model(token[None], cache)
    h = cache.states[0].h
    assert h.dtype == torch.float32 and not torch.equal(h, h.bfloat16().float())


def test_projections_into_the_residual_stream_start_smaller():
    for name, w in mil.Hybrid(
        Config(
            v=500,
            d=128,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_ff=256,
            mixers=["attention", "mamba2"],
        )
    ).named_parameters():
        if name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight")):
            want = (
                0.02 / 2
                if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
                else 0.02
            )
            assert abs(w.std().item() / want - 1) < 0.05, name


def test_rope_scaling_knows_the_context_it_was_made_for_from_its_own_entry():
    scaling = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    at = torch.tensor([[1000]])
    a, b = (
        mil.rope_angles(Config(rope_scaling=scaling, n_layers=1, context=c), at)[0]
        for c in (8192, 131072)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("share", [False, True])
def test_a_frozen_teachers_student_is_a_copy_too(share):
    teacher = build(Config(**SMALL), torch.float32).requires_grad_(False)
    student = mil.replace_attention(teacher, [0], share=share)
    assert (student.norm.weight.data_ptr() == teacher.norm.weight.data_ptr()) == share


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_some_layers_is_those_layers_between_the_same_embedding_and_head(tied):
    model = build(Config(**SMALL, tied=tied, mixers=["attention", "mamba", "mamba2", "attention"]))
    small, tokens = mil.keep_layers(model, [0, 2]), random_tokens(model.config, 2, 7)
    assert (
        small.config.mixers == ["attention", "mamba2"]
        and small.config.n_layers == 2
        and (small.lm_head.weight is small.embed_tokens.weight) == tied
    )
    with torch.no_grad():
        u, angles = (
            model.embed_tokens(tokens),
            mil.rope_angles(model.config, torch.arange(7, device=DEVICE).expand(2, 7)),
        )
        want = model.lm_head(model.norm(model.layers[2](model.layers[0](u, angles), angles)))
        assert torch.equal(small(tokens), want)
        for w in small.parameters():
            w.add_(1)  # its own
        assert torch.equal(
            model.lm_head(model.norm(model.layers[2](model.layers[0](u, angles), angles))), want
        )
    assert all(w.requires_grad for w in small.parameters())


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [-1], [0, 4]])
def test_layers_that_cannot_be_kept_are_refused(layers):
    with pytest.raises(MilError, match="expected some of 0 to 3, each once, in rising order"):
        mil.keep_layers(build(Config(**SMALL)), layers)


def test_a_crash_before_config_json_is_in_place_leaves_the_old_one_whole(tmp_path, monkeypatch):
    old, new, replace = (
        build(Config(**SMALL), torch.float32, 1),
        build(Config(**SMALL), torch.float32, 2),
        mil.os.replace,
    )
    mil.save(old, tmp_path)
    before = (tmp_path / "config.json").read_text()

    def crash(source, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(mil.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        mil.save(new, tmp_path)
    assert (tmp_path / "config.json").read_text() == before and torch.equal(
        mil.load(tmp_path).lm_head.weight.to(DEVICE), old.lm_head.weight
    )


def test_what_would_be_ignored_is_refused():
    model = build(Config(**SMALL))
    tokens = random_tokens(model.config, 1, 3)
    for more in (
        dict(lengths=torch.tensor([2])),
        dict(
            cache=Cache(model, 1, 8),
            docs=mil.Documents(torch.arange(3)[None], torch.device(DEVICE)),
        ),
    ):
        with pytest.raises(MilError, match="lengths are for a cache"):
            model(tokens, **more)


@pytest.mark.parametrize("undo", [False, True])
def test_a_cleared_cache_is_a_new_one(undo):
    model = build(Config(**{**SMALL, "mixers": ["mamba2", "attention"] * 2}))
    cache, tokens = Cache(model, 1, 40, undo), random_tokens(model.config, 1, 4)
    with torch.no_grad():
        for _ in range(3):
            model(tokens, cache)
        cache.clear()
        assert_close(model(tokens, cache), model(tokens), 1e-10)
    assert cache.at.tolist() == [4] and cache.base.tolist() == [0 if undo else 4]


def test_padding_takes_no_room_in_a_cache():
    model = build(Config(**SMALL))
    cache = Cache(model, 2, 8)
    with torch.no_grad():
        for counts in ([1, 3], [2, 0], [2, 5]):
            model(random_tokens(model.config, 2, 5), cache, counts)
            assert cache.used == cache.at.max()
    assert cache.at.tolist() == [5, 8]


def test_a_bias_is_added_in_the_type_of_the_activations():
    layer = mil.Linear(4, 6).to(DEVICE)
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, device=DEVICE)
    assert layer(x).dtype == torch.bfloat16


def test_attentions_biases_are_added_in_decoding():
    config = Config(**{**WIDE, "n_layers": 1, "mixers": ["attention"]}, attention_bias=True)
    model, tokens = mil.pack(build(config, torch.float32)), random_tokens(config, 2, 7)
    cache = Cache(model, 2, 7)
    with torch.no_grad(), form("triton"):
        got = torch.cat([model(part, cache) for part in tokens.split([4, 3], dim=1)], dim=1)
        assert cache.fused
    with torch.no_grad(), form("torch"):
        assert_close(got, model(tokens), 1e-4)
