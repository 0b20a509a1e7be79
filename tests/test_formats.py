"""Checkpoints of others: written here from their formats' descriptions, and computed by a second implementation, plain and slow."""
import contextlib
import json
import math
import os
import pickle
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, build, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_generate import llama3_file

import generate
import mil

# sizes and constants at which a mistake shows: eps, RoPE's base and its scaling matter within a dozen tokens
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=20, hidden_size=16, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=48, max_position_embeddings=64, rms_norm_eps=0.03,
             rope_theta=50.0, rope_scaling=None, tie_word_embeddings=False, attention_bias=False, mlp_bias=False, attention_dropout=0.0, pretraining_tp=1,
             torch_dtype="float32", use_cache=True, initializer_range=0.02, bos_token_id=1, eos_token_id=2, transformers_version="4.46.0")
MISTRAL = {k: v for k, v in LLAMA.items() if "bias" not in k} | dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
HYBRID, MIXED = dict(LLAMA, head_dim=16), {"mamba": ["mamba", "attention"], "mamba2": ["attention", "mamba2"]}
LINEAR = dict(rope_type="linear", factor=3.0)
RAMP = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
META_RAMP = dict(RAMP, factor=32.0, original_max_position_embeddings=8192)
META = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": "", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
INDEX, MAMBA = "model.safetensors.index.json", "mamba_config.json"
WIDE = ("A_log", ".D", "dt_bias", "dt_proj.bias")  # may be held in more bits than the file's
TURNS = 1e-4  # RoPE turns by angles in float32: 1e-6 as a rule, more where a state magnifies it
TWICE = 2     # the authors' Mamba adds dt_proj's bias in dt_proj, and again in the scan: their files hold half of what stands in Δ
TOKENS = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))

SHAPES = {  # d width, h heads, w query channels, n key channels, r rank of Δ, c channels of Mamba-2's convolution, i all it reads, s state, f MLP
    "attention": {"self_attn.q_proj.weight": "wd", "self_attn.k_proj.weight": "nd", "self_attn.v_proj.weight": "nd", "self_attn.o_proj.weight": "dw"},
    "bias": {"self_attn.q_proj.bias": "w", "self_attn.k_proj.bias": "n", "self_attn.v_proj.bias": "n", "self_attn.o_proj.bias": "d"},
    "mamba": {"mamba.in_proj_x.weight": "nd", "mamba.in_proj_z.weight": "wd", "mamba.B_proj.weight": "nd", "mamba.C_proj.weight": "wd",
              "mamba.dt_proj_down.weight": "rd", "mamba.dt_proj.weight": "wr", "mamba.dt_proj.bias": "w", "mamba.conv1d.weight": "w14",
              "mamba.conv1d.bias": "w", "mamba.A_log": "ws", "mamba.D": "w", "mamba.out_proj.weight": "dw"},
    "mamba2": {"mamba.in_proj.weight": "id", "mamba.conv1d.weight": "c14", "mamba.conv1d.bias": "c", "mamba.dt_bias": "h", "mamba.A_log": "h",
               "mamba.D": "h", "mamba.norm.weight": "w", "mamba.out_proj.weight": "dw"},
    "rest": {"mlp.gate_proj.weight": "fd", "mlp.up_proj.weight": "fd", "mlp.down_proj.weight": "df", "input_layernorm.weight": "d",
             "post_attention_layernorm.weight": "d"}}


def weights(c, mixers=(), d_state=4, dtype=torch.float32, seed=0):
    """Random tensors by their Hugging Face names, a converted layer's by the authors'."""
    d, h, w, n = c["hidden_size"], c["num_attention_heads"], c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    size = dict(d=d, h=h, w=w, n=n, r=-(-d // 16), c=w + 2 * n, i=2 * (w + n) + h, s=d_state, f=c["intermediate_size"], v=c["vocab_size"]) | {"1": 1, "4": 4}
    shapes = {"model.embed_tokens.weight": "vd", "model.norm.weight": "d"} | ({} if c["tie_word_embeddings"] else {"lm_head.weight": "vd"})
    for i, mixer in enumerate(mixers or ["attention"] * c["num_hidden_layers"]):
        bias = SHAPES["bias"] if c.get("attention_bias") and mixer == "attention" else {}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in (SHAPES[mixer] | bias | SHAPES["rest"]).items()}
    random, shapes = torch.Generator().manual_seed(seed), {name: [size[letter] for letter in shape] for name, shape in shapes.items()}
    return {k: (torch.randn(s, generator=random, dtype=torch.float64) * 0.3 + k.endswith(("norm.weight", ".D"))).to(dtype) for k, s in shapes.items()}


# ---------------------------------------------------------------------------------------------------------------
# The second implementation


def frequencies(c):
    """Radians a position, pair by pair; Llama 3.1's scaling by the wavelength, as Meta writes it."""
    freqs, s = [c["rope_theta"] ** (-2 * i / c["head_dim"]) for i in range(c["head_dim"] // 2)], c["rope_scaling"] or dict(rope_type="")
    for i, f in enumerate(freqs):
        if s["rope_type"] == "linear":
            freqs[i] = f / s["factor"]
        elif s["rope_type"] == "llama3":
            wavelength, old, low, high = 2 * math.pi / f, s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
            smooth = (old / wavelength - low) / (high - low)
            freqs[i] = f / s["factor"] if wavelength > old / low else f if wavelength < old / high else (1 - smooth) * f / s["factor"] + smooth * f
    return torch.tensor(freqs, dtype=torch.float64)


def half_turn(t, c):
    """Hugging Face's RoPE, pairs (i, i + p/2). t (b, h, l, p)."""
    angle = torch.outer(torch.arange(t.shape[2]).double(), frequencies(c)).repeat(1, 2)
    a, b = t.chunk(2, -1)
    return t * angle.cos() + torch.cat([-b, a], -1) * angle.sin()


def complex_turn(t, c):
    """Meta's, pairs (0, 1), (2, 3), … as complex numbers."""
    angle = torch.outer(torch.arange(t.shape[2]).double(), frequencies(c))
    return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def attention(v, at, c, turn):
    heads = lambda n: (v @ at(f"self_attn.{n}_proj.weight").T + at(f"self_attn.{n}_proj.bias")).unflatten(-1, (-1, c["head_dim"])).transpose(1, 2)  # noqa: E731
    group, past = c["num_attention_heads"] // c["num_key_value_heads"], torch.ones(v.shape[1], v.shape[1]).tril().bool()
    q, k, x = turn(heads("q"), c), turn(heads("k"), c).repeat_interleave(group, 1), heads("v").repeat_interleave(group, 1)
    y = (q @ k.mT / c["head_dim"] ** 0.5).masked_fill(~past, -math.inf).softmax(-1) @ x
    return y.transpose(1, 2).flatten(2) @ at("self_attn.o_proj.weight").T + at("self_attn.o_proj.bias")


def recur(x, dt, A, B, C, D):
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ, y_t = h_t C_t + D x_t, a token at a time. x, dt (b, l, h, p), B, C (b, l, h, n)."""
    state, y = 0, []
    for t in range(x.shape[1]):
        state = (dt[:, t, ..., None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, :, None]
        y.append((state * C[:, t, :, None]).sum(-1) + D * x[:, t])
    return torch.stack(y, 1)


def convolve(x, at):
    w, past = at("mamba.conv1d.weight")[:, 0], F.pad(x, (0, 0, 3, 0))
    return F.silu(at("mamba.conv1d.bias") + sum(w[:, j] * past[:, j:j + x.shape[1]] for j in range(4)))


def mamba(v, at, c, turn):
    n, read = at("mamba.A_log").shape[1], lambda name: v @ at(f"mamba.{name}.weight").T
    cut, fan = lambda t: t.unflatten(-1, (-1, n)), lambda t: t.repeat_interleave(c["num_attention_heads"] // c["num_key_value_heads"], -2)
    x = cut(convolve(fan(cut(read("in_proj_x"))).flatten(-2), at))
    dt = cut(F.softplus(read("dt_proj_down") @ at("mamba.dt_proj.weight").T + TWICE * at("mamba.dt_proj.bias")))
    y = recur(x, dt, -at("mamba.A_log").exp().unflatten(0, (-1, n)), fan(cut(read("B_proj"))), cut(read("C_proj")), cut(at("mamba.D")))
    return (y.flatten(-2) * F.silu(read("in_proj_z"))) @ at("mamba.out_proj.weight").T


def mamba2(v, at, c, turn):
    h, g, p = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    z, xBC, dt = (v @ at("mamba.in_proj.weight").T).split([h * p, 2 * g * p + h * p, h], -1)
    x, B, C = (t.unflatten(-1, (-1, p)) for t in convolve(xBC, at).split([g * p, g * p, h * p], -1))
    x, B, dt = x.repeat_interleave(h // g, -2), B.repeat_interleave(h // g, -2), F.softplus(dt + at("mamba.dt_bias"))[..., None].expand(*v.shape[:2], h, p)
    y = recur(x, dt, -at("mamba.A_log").exp()[:, None, None], B, C, at("mamba.D")[:, None]) * F.silu(z).unflatten(-1, (h, p))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * at("mamba.norm.weight").unflatten(0, (h, p))
    return y.flatten(-2) @ at("mamba.out_proj.weight").T


def logits(c, w, mixers=(), turn=half_turn, name=str):
    """In float64, of the model whose tensors are w, each called name(its Hugging Face name)."""
    get = lambda key: w[name(key)].double() if name(key) in w or not key.endswith("_proj.bias") else 0.0  # noqa: E731
    norm = lambda u, weight: u / (u.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * weight  # noqa: E731
    u = get("model.embed_tokens.weight")[TOKENS]
    for i in range(c["num_hidden_layers"]):
        at, mixer = (lambda key, i=i: get(f"model.layers.{i}.{key}")), mixers[i] if mixers else "attention"
        u = u + {"attention": attention, "mamba": mamba, "mamba2": mamba2}[mixer](norm(u, at("input_layernorm.weight")), at, c, turn)
        v = norm(u, at("post_attention_layernorm.weight"))
        u = u + (F.silu(v @ at("mlp.gate_proj.weight").T) * (v @ at("mlp.up_proj.weight").T)) @ at("mlp.down_proj.weight").T
    return norm(u, get("model.norm.weight")) @ get("model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight").T


# ---------------------------------------------------------------------------------------------------------------
# The writers


def write_hf(folder, c, w, shards=1, kind="safetensors", rope="rope_type"):
    """`rope`: where RoPE's kind stands, in rope_scaling as "rope_type" or "type", or with all that is RoPE's in transformers 5's rope_parameters."""
    folder.mkdir(parents=True)
    about, scaling = dict(c), c["rope_scaling"] or {}
    if rope == "rope_parameters":
        about = {k: v for k, v in c.items() if k not in ("rope_theta", "rope_scaling")} | {rope: {"rope_type": "default", **scaling, "rope_theta": c["rope_theta"]}}
    elif scaling:
        about["rope_scaling"] = {rope if k == "rope_type" else k: v for k, v in scaling.items()}
    (folder / "config.json").write_text(json.dumps(about))
    stem, dump = ("model", lambda *a: save_file(*a, {"format": "pt"})) if kind == "safetensors" else ("pytorch_model", torch.save)
    files = [f"{stem}-{i + 1:05}-of-{shards:05}.{kind}" for i in range(shards)] if shards > 1 else [f"{stem}.{kind}"]
    for i, file in enumerate(files):
        dump({k: w[k] for k in list(w)[i::shards]}, folder / file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in w.values())}, "weight_map": {k: files[i % shards] for i, k in enumerate(w)}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def write_hybrid(folder, c, w, mixers, d_state, *more):
    h, p = c["num_attention_heads"], c["head_dim"]
    ssm = {"expand": 1} | ({"ngroups": h, "d_state": p} if "mamba2" in mixers else {} if d_state == 16 else {"d_state": d_state})  # 16 is Mamba's own
    about = dict(d_model=c["hidden_size"], ssm_cfg=ssm, rms_norm_eps=c["rms_norm_eps"], vocab_size=None, d_inner=h * p, d_xb=c["num_key_value_heads"] * p,
                 intermediate_size=c["intermediate_size"], hidden_act="silu", n_layer=len(mixers), attn_layers=[i for i, m in enumerate(mixers) if m == "attention"])
    (write_hf(folder, c, w, *more) / MAMBA).write_text(json.dumps(about, indent=4))
    return folder


def meta_name(name):
    for theirs, metas in META.items():
        name = name.replace(theirs, metas)
    return name


def to_meta(c, w):
    """Meta's names, and its pairs: row 2i of a head is Hugging Face's i, row 2i + 1 its i + p/2."""
    pair = lambda t: t.unflatten(0, (-1, 2, c["head_dim"] // 2)).transpose(1, 2).flatten(0, 2)  # noqa: E731
    return {meta_name(k): pair(t) if ".q_proj" in k or ".k_proj" in k else t for k, t in w.items()}


def write_meta(folder, c, w, shards=1, embedding_axis=0, **params):
    """Cut as model parallelism cuts: Llama 3's embedding by words, Llama 2's by columns."""
    folder.mkdir(parents=True)
    params = dict(dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"], n_kv_heads=c["num_key_value_heads"],
                  vocab_size=c["vocab_size"], multiple_of=8, norm_eps=c["rms_norm_eps"], rope_theta=c["rope_theta"]) | params
    (folder / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v is not None}))
    axis = lambda k: embedding_axis if "tok_embeddings" in k else 1 if ".wo." in k or ".w2." in k else 0  # noqa: E731
    for i in range(shards):
        torch.save({k: t if t.dim() == 1 else t.chunk(shards, axis(k))[i].clone() for k, t in to_meta(c, w).items()}, folder / f"consolidated.{i:02}.pth")
    return folder


BASES = {"hf": (write_hf, LLAMA), "hf, 3 shards": (write_hf, LLAMA, 3), "hf, .bin": (write_hf, LLAMA, 1, "bin"), "hf, 4 .bin": (write_hf, LLAMA, 4, "bin"),
         "meta": (write_meta, LLAMA), "llama 3, 2 shards": (write_meta, LLAMA, 2, 0), "llama 2, 2 shards": (write_meta, LLAMA, 2, 1),
         "mamba": (write_hybrid, HYBRID, MIXED["mamba"], 16), "mamba2": (write_hybrid, HYBRID, MIXED["mamba2"], 16)}


def make(folder, base="hf", dtype=torch.float32):
    write, c, *how = BASES[base]
    w = weights(c, MIXED.get(base, ()), 16, dtype)
    return write(folder, c, w, *how), w


@st.composite
def llamas(draw, family=LLAMA):
    g, group, p = draw(st.sampled_from([(1, 1, 4), (1, 3, 8), (2, 1, 6), (2, 2, 4), (3, 2, 2)]))
    return dict(family, hidden_size=draw(st.sampled_from([8, 12, 20])), num_attention_heads=g * group, num_key_value_heads=g, head_dim=p,
                tie_word_embeddings=draw(st.booleans()), rope_theta=draw(st.sampled_from([50.0, 1e4])), rope_scaling=draw(st.sampled_from([None, LINEAR, RAMP])),
                **({"attention_bias": draw(st.booleans())} if "attention_bias" in family else {}))


@st.composite
def metas(draw):
    """A model of Meta's, and how it is written: shards and what of params.json is not in the sizes."""
    (h, g), p, multiplier = draw(st.sampled_from([(4, 4), (4, 2), (6, 2)])), draw(st.sampled_from([4, 6])), draw(st.sampled_from([None, 0.7, 1.3]))
    scaled, theta, d_ff = draw(st.sampled_from([True, False, None])), draw(st.sampled_from([None, 5e5])), int((multiplier or 1) * int(2 * 4 * h * p / 3))
    c = dict(LLAMA, hidden_size=h * p, num_attention_heads=h, num_key_value_heads=g, head_dim=p, intermediate_size=8 * math.ceil(d_ff / 8),
             rope_theta=theta or 10000.0, rope_scaling=META_RAMP if scaled else None, tie_word_embeddings=draw(st.booleans()))
    return c, dict(shards=draw(st.sampled_from([s for s in (1, 2, 4) if g % s == 0])), embedding_axis=draw(st.integers(0, 1)), ffn_dim_multiplier=multiplier,
                   rope_theta=theta, vocab_size=draw(st.sampled_from([20, -1])), n_kv_heads=None if g == h else g, use_scaled_rope=scaled)


SEEDS, DTYPES, KINDS = st.integers(0, 100), st.sampled_from([torch.float32, torch.float64]), st.sampled_from(["safetensors", "bin"])
TARGETS, STACKS = st.sampled_from([None, "hf", "mil"]), st.lists(st.booleans(), min_size=1, max_size=3).filter(lambda kept: not all(kept))


# ---------------------------------------------------------------------------------------------------------------
# Loading


@torch.no_grad()
def loaded(folder, kind=None):
    """Logits of the model in the folder, or of what it is exported to."""
    if kind:
        mil.export(folder, folder.parent / "exported", kind)
    return mil.load(folder.parent / "exported" if kind else folder, DEVICE, torch.float64)(TOKENS.to(DEVICE))


def assert_holds(model, w):
    """The model has the tensors w, all of them and nothing else, to the bit and the type."""
    want = {k.removeprefix("model.").replace(".self_attn.", ".mixer.").replace(".mamba.", ".mixer."): t * (TWICE if "dt_proj.bias" in k else 1) for k, t in w.items()}
    have = {k: t for k, t in model.state_dict().items() if k in want or not model.config.tied}
    assert have.keys() == want.keys() and (model.lm_head.weight is model.embed_tokens.weight) == model.config.tied
    for k, t in want.items():
        assert torch.equal(have[k].cpu().double(), t.double()) and (have[k].dtype == t.dtype or k.endswith(WIDE)), k


@given(llamas() | llamas(MISTRAL), st.sampled_from(["type", "rope_type", "rope_parameters"]), st.integers(1, 3), KINDS, DTYPES, SEEDS, TARGETS)
@settings(max_examples=40)
def test_a_hugging_face_folder_is_the_llama_computed_by_hand_as_it_is_or_exported(tmp_path_factory, c, rope, shards, kind, dtype, seed, target):
    w = weights(c, (), 0, dtype, seed)
    assert_close(loaded(write_hf(tmp_path_factory.mktemp("hf") / "x", c, w, shards, kind, rope), target), logits(c, w), TURNS)


@given(metas(), DTYPES, SEEDS, TARGETS)
@settings(max_examples=25)
def test_a_folder_of_metas_is_the_llama_computed_by_hand_with_complex_numbers(tmp_path_factory, drawn, dtype, seed, target):
    c, params = drawn
    w = weights(c, (), 0, dtype, seed)
    want = logits(c, to_meta(c, w), (), complex_turn, meta_name)
    assert_close(logits(c, w), want, 1e-12, "the two pairings")
    assert_close(loaded(write_meta(tmp_path_factory.mktemp("meta") / "x", c, w, **params), target), want, TURNS)


@given(llamas(), STACKS, st.sampled_from(["mamba", "mamba2"]), st.integers(1, 2), KINDS, DTYPES, SEEDS, st.sampled_from([None, "mil", "mambainllama"]))
@settings(max_examples=30)
def test_the_authors_hybrid_is_its_layers_computed_a_token_at_a_time(tmp_path_factory, c, kept, mixer, shards, kind, dtype, seed, target):
    mixers, d_state, c = ["attention" if k else mixer for k in kept], c["head_dim"] // (1 + seed % 2), dict(c, num_hidden_layers=len(kept), attention_bias=False)
    w = weights(c, mixers, d_state, dtype, seed)
    folder = write_hybrid(tmp_path_factory.mktemp("hybrid") / "x", c, w, mixers, d_state, shards, kind)
    assert_close(loaded(folder, target), logits(c, w, mixers), TURNS if any(kept) else 1e-9)
    assert mil.read_config(folder)["config"].mixers == mixers


def test_what_old_files_carry_along_and_no_one_needs_is_left_aside(tmp_path):
    c = dict(LLAMA, tie_word_embeddings=True)
    w, turns = weights(c), frequencies(c)
    surplus = {"lm_head.weight": w["model.embed_tokens.weight"]} | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": turns for i in range(2)}
    assert_holds(mil.load(write_hf(tmp_path / "hf", c, w | surplus, kind="bin")), w)
    assert_holds(mil.load(write_meta(tmp_path / "meta", c, w | {"rope.freqs": turns}, 2, 1)), w)


def test_what_config_json_leaves_out_is_what_transformers_takes_for_it(tmp_path):
    said = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    c = dict(LLAMA, num_key_value_heads=4, rope_theta=10000.0, rms_norm_eps=1e-6)
    edit(write_hf(tmp_path / "x", c, weights(c)), drop=LLAMA.keys() - said)
    assert_close(loaded(tmp_path / "x"), logits(c, weights(c)), TURNS)
    assert mil.read_config(tmp_path / "x")["config"].norm_eps == 1e-6 and mil.read_config(tmp_path / "x")["config"].context == 2048


@pytest.mark.parametrize("dim, factor", [(4096, 8.0), (3072, 32.0), (2048, 32.0)])
def test_metas_scaled_rope_is_stretched_by_8_and_by_32_in_the_small_models(tmp_path, dim, factor):
    c = dict(LLAMA, hidden_size=dim, num_attention_heads=dim // 4, num_hidden_layers=1)
    folder = write_meta(tmp_path / "x", c, {"lm_head.weight": torch.zeros(20, 1)}, use_scaled_rope=True)
    assert {"rope_type": "llama3", **mil.read_config(folder)["config"].rope_scaling} == dict(META_RAMP, factor=factor)


@pytest.mark.parametrize("window, context, remarked", [(8, 8, [True]), (None, 64, []), (100, 64, [])])
def test_a_sliding_window_is_the_context_and_is_remarked_on(tmp_path, window, context, remarked):
    about = mil.read_config(write_hf(tmp_path / "x", dict(MISTRAL, sliding_window=window), weights(MISTRAL)))
    assert about["config"].context == context and ["slid" in line for line in about["remarks"]] == remarked


def test_a_key_that_is_not_understood_is_remarked_on_and_no_other(tmp_path):
    folder, _ = make(tmp_path / "x")
    assert not mil.read_config(folder)["remarks"] and mil.read_config(folder)["format"] == "hf"
    edit(folder, residual_multiplier=2.0)
    assert len(mil.read_config(folder)["remarks"]) == 1 and "residual_multiplier" in mil.read_config(folder)["remarks"][0]


# ---------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_a_model_of_any_format_is_the_same_to_the_bit_when_loaded_and_when_exported_and_back(tmp_path, base, dtype):
    folder, w = make(tmp_path / "source", base, dtype)
    config, layout = mil.read_config(folder)["config"], "mambainllama" if base in MIXED else "hf"
    assert_holds(mil.load(folder), w)
    for source, target, kind in (("source", "ours", "mil"), ("ours", "back", layout), ("source", "again", layout)):
        mil.export(tmp_path / source, tmp_path / target, kind)
        assert_holds(mil.load(tmp_path / target), w)
        assert mil.read_config(tmp_path / target)["config"] == config and mil.read_config(tmp_path / target)["format"] == kind
        files = {k: t for file in (tmp_path / target).glob("*.safetensors") for k, t in load_file(file).items()}
        assert files.keys() == (set() if kind == "mil" else w.keys())
        assert all(torch.equal(t.double(), w[k].double()) and (t.dtype == w[k].dtype or k.endswith(WIDE)) for k, t in files.items())


@pytest.mark.parametrize("scaling", [None, LINEAR, RAMP])
def test_an_exported_config_json_says_what_the_first_said(tmp_path, scaling):
    c = dict(LLAMA, rope_scaling=scaling, attention_bias=True, head_dim=6)
    mil.export(write_hf(tmp_path / "source", c, weights(c)), tmp_path / "target", "hf")
    after = json.loads((tmp_path / "target" / "config.json").read_text())
    idle = {"mlp_bias", "attention_dropout", "pretraining_tp", "use_cache", "initializer_range", "transformers_version"}
    assert {k: after.get(k) for k in c.keys() - idle} == {k: c[k] for k in c.keys() - idle}


@pytest.mark.parametrize("base", MIXED)
def test_an_exported_hybrid_has_the_authors_settings_and_writes_the_same_text(tmp_path, base):
    make(tmp_path / "theirs", base)
    mil.export(tmp_path / "theirs", tmp_path / "ours", "mil")
    mil.export(tmp_path / "ours", tmp_path / "back", "mambainllama")
    texts = [[new[0] for new in generate.generate(mil.load(tmp_path / name, DEVICE), [[3, 1, 4]], 20, temperature=0)] for name in ("theirs", "ours", "back")]
    assert texts[0] == texts[1] == texts[2] and len(set(sum(texts[0], ()))) > 3
    before, after = (json.loads((tmp_path / name / MAMBA).read_text()) for name in ("theirs", "back"))
    assert after.keys() == before.keys() and after["ssm_cfg"].items() >= before["ssm_cfg"].items()  # their MambaConfig takes no other key
    assert all(after[k] == before[k] for k in before if k not in ("ssm_cfg", "vocab_size"))


@pytest.mark.parametrize("c", [LLAMA, dict(LLAMA, rope_scaling=RAMP, head_dim=6), dict(LLAMA, rope_scaling=LINEAR), dict(LLAMA, attention_bias=True),
                               dict(LLAMA, tie_word_embeddings=True), MISTRAL, dict(MISTRAL, head_dim=6)])
def test_logits_are_those_of_transformers_from_the_same_folder_and_from_the_exported_one(tmp_path, c):
    transformers = pytest.importorskip("transformers")
    w = weights(c)
    mil.export(write_hf(tmp_path / "hf", c, w), tmp_path / "exported", "hf")
    for folder in (tmp_path / "hf", tmp_path / "exported"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            assert_close(mil.load(folder, DEVICE)(TOKENS.to(DEVICE)), theirs(TOKENS).logits, 1e-5)
            assert_close(logits(c, w), theirs(TOKENS).logits, 1e-5)


def test_the_command_exports_and_says_in_one_line_what_it_cannot(tmp_path):
    _, w = make(tmp_path / "source")
    done, failed = (run_script("mil.py", "export", tmp_path / source, tmp_path / target, "--format", "hf") for source, target in (("source", "a"), ("nowhere", "b")))
    assert done.returncode == 0, done.stderr
    assert_holds(mil.load(tmp_path / "a"), w)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "nowhere" in failed.stderr and not (tmp_path / "b").exists()


@contextlib.contextmanager
def refused(match):
    with pytest.raises(mil.MilError, match=match) as e:
        yield
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("mixers, kind, match", [
    (["attention"] * 2, "gguf", "gguf"), (["mamba", "attention"], "hf", "mamba"), (["attention", "mamba2"], "hf", "mamba2"), (["none", "attention"], "hf", "none"),
    (["mamba", "mamba2"], "mambainllama", "mamba2"), (["none", "mamba2"], "mambainllama", "none")])
def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path, mixers, kind, match):
    mil.save(build(mil.Config(v=11, d=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, d_state=4, mixers=mixers), torch.float32), tmp_path / "source")
    with refused(match):
        mil.export(tmp_path / "source", tmp_path / "target", kind)
    assert os.listdir(tmp_path) == ["source"]


def test_a_llama_exported_as_a_hybrid_is_itself_or_refused(tmp_path):
    folder, w = make(tmp_path / "source")
    with contextlib.suppress(mil.MilError):
        mil.export(folder, tmp_path / "target", "mambainllama")
    if (tmp_path / "target").exists():
        assert_holds(mil.load(tmp_path / "target"), w)


def test_export_leaves_what_it_finds_in_its_place_as_it_is(tmp_path):
    folder, w = make(tmp_path / "source")
    (tmp_path / "file").write_text("precious")
    for target in ("file", "source", "file/under"):
        with refused(str(tmp_path / target)):
            mil.export(folder, tmp_path / target, "hf")
    assert (tmp_path / "file").read_text() == "precious"
    assert_holds(mil.load(folder), w)


def test_a_command_that_is_none_is_refused_in_one_line():
    for argv, match in ((["exprot", "a", "b"], "invalid choice: 'exprot'.*--help lists the flags"), (["export", "a"], "required: target")):
        with pytest.raises(mil.MilError, match=match):
            mil.main(argv)


# ---------------------------------------------------------------------------------------------------------------
# Bad input


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def edit(folder, file="config.json", drop=(), **change):
    about = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in about.items() if k not in drop} | change))


def lead(folder, to):
    """The index says that the last norm lies in the file `to`; in other.safetensors, outside, there is one."""
    save_file({"model.norm.weight": torch.ones(16)}, folder.parent / "other.safetensors")
    edit(folder, INDEX, weight_map=json.loads((folder / INDEX).read_text())["weight_map"] | {"model.norm.weight": str(to)})


def change(folder, file="pytorch_model.bin", drop="", **tensors):
    w = torch.load(folder / file) | {k.replace("__", "."): t for k, t in tensors.items()}
    torch.save({k: t for k, t in w.items() if k != drop}, folder / file)


BAD = {
    "an index of a file that is not there": ("hf, 3 shards", lambda d: lead(d, "model-9.safetensors"), "model-9.safetensors"),
    "an index that leads outside": ("hf, 3 shards", lambda d: lead(d, "../other.safetensors"), "other.safetensors"),
    "an index that leads to the root": ("hf, 3 shards", lambda d: lead(d, (d.parent / "other.safetensors").resolve()), "other.safetensors"),
    "another shape": ("hf, .bin", lambda d: change(d, model__norm__weight=torch.ones(5)), r"pytorch_model.bin.*norm.weight.*\(5,\).*16"),
    "another shape in a shard": ("llama 3, 2 shards", lambda d: change(d, "consolidated.01.pth", output__weight=torch.ones(9, 16)), r"output.weight.*\(19, 16\).*20"),
    "a missing tensor": ("hf, .bin", lambda d: change(d, drop="model.norm.weight"), "norm.weight.*missing|lacks.*norm.weight|missing.*norm.weight"),
    "an extra tensor": ("hf, .bin", lambda d: change(d, model__surplus=torch.ones(5)), "pytorch_model.bin.*surplus"),
    "integers": ("hf, .bin", lambda d: change(d, model__norm__weight=torch.ones(16, dtype=torch.int8)), "norm.weight.*int8"),
    "8 bits": ("hf, .bin", lambda d: change(d, model__norm__weight=torch.ones(16).to(torch.float8_e4m3fn)), "norm.weight.*float8"),
    "no tensor": ("hf, .bin", lambda d: change(d, model__norm__weight="a word"), "norm.weight"),
    "no dict": ("hf, .bin", lambda d: torch.save([1, 2], d / "pytorch_model.bin"), "pytorch_model.bin"),
    "another family": ("hf", lambda d: edit(d, model_type="gpt2", architectures=["GPT2LMHeadModel"]), "config.json.*(?i:gpt2)"),
    "another architecture": ("hf", lambda d: edit(d, architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "another activation": ("hf", lambda d: edit(d, hidden_act="gelu"), "hidden_act.*gelu"),
    "another RoPE": ("hf", lambda d: edit(d, rope_scaling={"type": "yarn", "factor": 2.0}), "config.json.*yarn"),
    "another RoPE, newly spelt": ("hf", lambda d: edit(d, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
    "a scaling without its factor": ("hf", lambda d: edit(d, rope_scaling={"rope_type": "linear"}), "factor"),
    "a ramp without its ends": ("hf", lambda d: edit(d, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    "biases in the MLP": ("hf", lambda d: edit(d, mlp_bias=True), "mlp_bias"),
    "quantised": ("hf", lambda d: edit(d, quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config|gptq"),
    "no width": ("hf", lambda d: edit(d, drop=["hidden_size"]), "config.json.*hidden_size"),
    "a list": ("hf", lambda d: (d / "config.json").write_text("[1]"), "config.json"),
    "no text": ("hf", lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "config.json"),
    "another multiple_of": ("meta", lambda d: edit(d, "params.json", multiple_of=256), "consolidated.00.pth.*256"),
    "a hybrid of more layers": ("mamba", lambda d: edit(d, MAMBA, n_layer=3), f"{MAMBA}.*n_layer.*3"),
    "attention in no layer there is": ("mamba", lambda d: edit(d, MAMBA, attn_layers=[1, 7]), f"{MAMBA}.*attn_layers.*7"),
    "attention where a Mamba is": ("mamba", lambda d: edit(d, MAMBA, attn_layers=[0]), "layers.0.self_attn"),
    "another inner width": ("mamba2", lambda d: edit(d, MAMBA, d_inner=32), f"{MAMBA}.*d_inner.*32"),
    "code in a .bin": ("hf, .bin", lambda d: torch.save({"model.norm.weight": Evil(d / "ran")}, d / "pytorch_model.bin"), "pytorch_model.bin.*code"),
    "code in a .pth": ("llama 3, 2 shards", lambda d: torch.save({"norm.weight": Evil(d / "ran")}, d / "consolidated.01.pth"), "consolidated.01.pth.*code"),
    "a bare pickle of code": ("hf, .bin", lambda d: (d / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(d / "ran"), 2)), "pytorch_model.bin.*code")}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_does_not_fit_gets_one_clear_line_runs_no_code_and_is_not_exported(tmp_path, name):
    base, damage, match = BAD[name]
    damage(make(tmp_path / "model", base)[0])
    for call in (mil.load, lambda folder: mil.export(folder, tmp_path / "target", "mil")):
        with refused(match):
            call(tmp_path / "model")
    assert not list(tmp_path.rglob("ran")) and not (tmp_path / "target").exists()


def test_the_evil_of_these_tests_would_have_been_seen(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("base", BASES)
def test_a_file_that_is_missing_cut_short_a_folder_or_a_circle_is_told_of_in_one_line(tmp_path, base):
    folder, _ = make(tmp_path / "model", base)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for left in (0, 1, 20, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:left])
            with refused(path.name):
                mil.load(folder)
        for other in (lambda: None, path.mkdir, lambda: path.symlink_to(path.name), lambda: path.symlink_to("gone")):
            path.unlink(missing_ok=True)
            other()
            with refused(str(folder)):
                mil.load(folder)
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)
    mil.load(folder)


def spoilt(about, values=(None, -1, 0, 2.5, "x", [], [3], {}, {"x": 1})):
    """The same JSON with some value in it replaced, and what was done."""
    for key in about:
        yield from ((f"{key} = {value!r}", about | {key: value}) for value in values)
        if isinstance(about[key], dict):
            yield from ((f"{key}.{what}", about | {key: part}) for what, part in spoilt(about[key], values[::3]))


@pytest.mark.parametrize("base, file, more", [
    ("hf", "config.json", dict(rope_scaling=RAMP)), ("hf", "config.json", dict(rope_parameters=LINEAR, model_type="mistral", sliding_window=4)),
    ("hf, 3 shards", INDEX, {}), ("meta", "params.json", dict(ffn_dim_multiplier=1.0, use_scaled_rope=True)), ("mamba", MAMBA, {}), ("mamba2", MAMBA, {})])
def test_whatever_a_json_file_says_it_is_read_or_refused_in_one_line(tmp_path, base, file, more):
    folder, wrong = make(tmp_path / "model", base)[0], []
    edit(folder, file, **more)
    for what, about in spoilt(json.loads((folder / file).read_text())):
        (folder / file).write_text(json.dumps(about))
        try:
            mil.load(folder)
        except Exception as e:
            if not isinstance(e, mil.MilError) or "\n" in str(e) or str(folder) not in str(e):
                wrong.append(f"{what}: {type(e).__name__}: {e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("place", [lambda p: None, lambda p: p.write_text("{}"), lambda p: p.mkdir(), lambda p: p.symlink_to(p.name)],
                         ids=["missing", "a file", "empty", "a circle"])
def test_a_path_that_is_no_folder_of_a_model_is_named(tmp_path, place):
    place(tmp_path / "place")
    for call in (mil.load, mil.read_config, lambda path: mil.export(path, tmp_path / "target", "hf")):
        with refused(str(tmp_path / "place")):
            call(tmp_path / "place")
        assert not (tmp_path / "target").exists()


def test_without_safetensors_one_is_told_how_to_have_it_where_it_is_needed(tmp_path, monkeypatch):
    folders = [make(tmp_path / str(i), base)[0] for i, base in enumerate(BASES)]
    for module in {name for name in sys.modules if name.split(".")[0] == "safetensors"} | {"safetensors"}:
        monkeypatch.setitem(sys.modules, module, None)
    for folder in folders:
        with refused("pip install safetensors") if list(folder.glob("*.safetensors")) else contextlib.nullcontext():
            mil.load(folder)
        with refused("pip install safetensors"):
            mil.export(folder, tmp_path / "target", "mambainllama" if (folder / MAMBA).exists() else "hf")
        assert not (tmp_path / "target").exists()


# ---------------------------------------------------------------------------------------------------------------
# What goes along, and downloads gone wrong


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path, name):
    c = dict(LLAMA)
    write_hf(tmp_path / "a", c, weights(c), kind="safetensors" if "safe" in name else "bin")
    (tmp_path / "a" / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with refused(f"{name}: a pointer of Git LFS and not the file itself"):
        mil.load(tmp_path / "a")


def test_two_shards_with_the_same_tensor_are_refused(tmp_path):
    w = weights(LLAMA)
    write_hf(tmp_path / "a", LLAMA, w, shards=2)
    first, second = sorted((tmp_path / "a").glob("*.safetensors"))
    save_file({**load_file(second), next(iter(load_file(first))): next(iter(load_file(first).values()))}, second)
    with refused(f"{second.name}: holds .*, and so does .*{first.name}"):
        mil.load(tmp_path / "a")


def test_an_exported_model_says_where_texts_begin_and_end_and_brings_its_template(tmp_path):
    generate.save_with_tokenizer(build(mil.Config(v=300, d=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16, context=8), torch.float32), tmp_path / "a", "bytes")
    mil.export(tmp_path / "a", tmp_path / "b", "hf")
    said = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"], said["mil_tokenizer"]) == (None, [256], None, "bytes")
    edit(tmp_path / "b", bos_token_id=7, eos_token_id=8)
    (tmp_path / "b" / "chat_template.jinja").write_text("x")
    mil.export(tmp_path / "b", tmp_path / "c", "hf", torch.bfloat16)
    said = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["torch_dtype"]) == (7, 8, "bfloat16") and (tmp_path / "c" / "chat_template.jinja").read_text() == "x"
    assert mil.load(tmp_path / "c").lm_head.weight.dtype == torch.bfloat16


def test_a_tied_hybrid_is_exported_with_the_head_that_the_authors_loader_wants(tmp_path):
    c = dict(HYBRID, tie_word_embeddings=True)
    write_hybrid(tmp_path / "a", c, weights(c, MIXED["mamba2"], 16), MIXED["mamba2"], 16)
    mil.export(tmp_path / "a", tmp_path / "b", "mambainllama")
    w = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(w["lm_head.weight"], w["model.embed_tokens.weight"]) and mil.load(tmp_path / "b").config.tied
    assert "_name_or_path" in json.loads((tmp_path / "b" / "config.json").read_text())


def test_the_name_of_a_model_that_was_not_downloaded_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("hf download meta-llama/Llama-9 --local-dir"):
        mil.load("meta-llama/Llama-9")
    (tmp_path / "a").mkdir()
    for path in ("a/b", "out/student", "./x", str(tmp_path / "y")):
        with pytest.raises(mil.MilError, match="no checkpoint here") as e:
            mil.load(path)
        assert "hf download" not in str(e.value)
    (tmp_path / "a" / "m.gguf").write_text("")
    with refused("found GGUF, expected a config.json"):
        mil.load("a")


def test_exported_files_can_be_read_by_others(tmp_path):
    make(tmp_path / "a")
    mil.export(tmp_path / "a", tmp_path / "b", "hf")
    assert len({(tmp_path / "b" / name).stat().st_mode for name in ("config.json", "model.safetensors")}) == 1


def test_a_disk_too_full_for_an_export_gets_one_line(tmp_path, monkeypatch):
    make(tmp_path / "a")

    def full(weights, name, about):
        raise safetensors.SafetensorError("I/O error: File too large (os error 27)\n")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with refused(r"b/model.safetensors: cannot be written \(disk full\?\): I/O error: File too large"):
        mil.export(tmp_path / "a", tmp_path / "b", "hf")
    assert not list((tmp_path / "b").glob("*tensors*"))


def test_shards_hold_at_most_what_is_asked_and_every_tensor_once(tmp_path):
    w = {str(i): torch.full([n], float(i)) for i, n in enumerate([3, 1, 2, 2, 5, 1, 3, 1])}
    mil.write_safetensors(w, tmp_path, 16)
    index = json.loads((tmp_path / INDEX).read_text())
    files = {file.name: load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))}
    assert list(files) == [f"model-{i + 1:05}-of-00005.safetensors" for i in range(5)] and sorted(k for file in files.values() for k in file) == sorted(w)
    assert [list(file) for file in files.values()] == [["0", "1"], ["2", "3"], ["4"], ["5", "6"], ["7"]]   # a tensor may be larger than a file
    assert all(torch.equal(files[index["weight_map"][k]][k], w[k]) for k in w) and index["metadata"]["total_size"] == 72


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_convolution_of_another_width_goes_there_and_back(tmp_path, mixer):
    config = mil.Config(v=11, d=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, d_state=4, d_conv=3, mixers=["attention", mixer])
    model = build(config, torch.float32)
    mil.save(model, tmp_path / "a")
    mil.export(tmp_path / "a", tmp_path / "b", "mambainllama")
    assert mil.read_config(tmp_path / "b")["config"].d_conv == 3
    assert all(torch.equal(w, model.state_dict()[k].cpu()) for k, w in mil.load(tmp_path / "b").state_dict().items())


def test_mistrals_window_is_4096_where_its_file_says_nothing(tmp_path):
    write_hf(tmp_path / "x", dict(MISTRAL, max_position_embeddings=32768), weights(MISTRAL))
    assert mil.read_config(tmp_path / "x")["config"].context == 32768        # null: none
    edit(tmp_path / "x", drop=["sliding_window"])
    assert mil.read_config(tmp_path / "x")["config"].context == 4096 and len(mil.read_config(tmp_path / "x")["remarks"]) == 1


@pytest.mark.parametrize("params, context", [(dict(rope_theta=None), 4096), (dict(rope_theta=500000.0), 8192), (dict(rope_theta=500000.0, use_scaled_rope=True), 131072)])
def test_metas_context_follows_from_its_rope(tmp_path, params, context):
    write_meta(tmp_path / "x", LLAMA, weights(LLAMA), **params)
    about = mil.read_config(tmp_path / "x")
    assert about["config"].context == context and f"taken as {context}" in about["remarks"][0]


def test_the_ids_of_begin_and_end_survive_the_way_through_our_layout(tmp_path):
    make(tmp_path / "a")
    edit(tmp_path / "a", bos_token_id=7, eos_token_id=[8, 9])
    mil.export(tmp_path / "a", tmp_path / "b", "mil")
    mil.export(tmp_path / "b", tmp_path / "c", "hf")
    said = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"]) == (7, [8, 9])


def test_a_model_saved_with_a_llama3_tokenizer_has_its_begin_and_both_its_ends(tmp_path):
    model = build(mil.Config(v=520, d=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16, context=8), torch.float32)
    generate.save_with_tokenizer(model, tmp_path / "a", str(llama3_file(tmp_path / "tokenizer.model")))
    mil.export(tmp_path / "a", tmp_path / "b", "hf")
    said = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"]) == (261, [262, 269, 270])


def test_all_files_about_texts_go_along_with_an_export(tmp_path):
    make(tmp_path / "a")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "special_tokens_map.json", "generation_config.json")
    for name in names:
        (tmp_path / "a" / name).write_text(name)
    mil.export(tmp_path / "a", tmp_path / "b", "hf")
    assert [(tmp_path / "b" / name).read_text() for name in names] == [*names]


def test_a_window_as_long_as_the_context_is_no_remark(tmp_path):
    write_hf(tmp_path / "x", dict(MISTRAL, sliding_window=MISTRAL["max_position_embeddings"]), weights(MISTRAL))
    about = mil.read_config(tmp_path / "x")
    assert not about["remarks"] and about["config"].context == MISTRAL["max_position_embeddings"]


def test_no_factor_is_said_of_a_rope_that_is_not_scaled(tmp_path):
    for name, more in (("plain", {}), ("scaled", dict(use_scaled_rope=True))):
        write_meta(tmp_path / name, LLAMA, weights(LLAMA), **more)
        assert ("RoPE's factor, taken as" in mil.read_config(tmp_path / name)["remarks"][0]) == (name == "scaled")
