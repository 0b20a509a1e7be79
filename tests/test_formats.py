"""Checkpoints of others, compared with transformers' own models and with the authors' layers, written
here a second time, plain and slow."""

import contextlib
import copy
import json
import math
import os
import pickle
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, build, run_script

import mil

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

# Sizes and constants at which a mistake shows: eps and RoPE matter within a dozen tokens.
LLAMA = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, head_dim=4)
LLAMA |= dict(rms_norm_eps=0.03, bos_token_id=1, eos_token_id=2, rope_theta=50.0)
LINEAR = dict(rope_type="linear", factor=3.0)
RAMP = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
RAMP |= dict(original_max_position_embeddings=32)
TOKENS = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
MIXED = {"mamba": ["mamba", "attention"], "mamba2": ["attention", "mamba2"]}


def llama(family="Llama", **change):
    """A model of transformers, whose every weight matters."""
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(LLAMA | change))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in model.named_parameters():
            w.copy_(torch.randn(w.shape, generator=random) * 0.3 + ("norm" in name))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits if hasattr(model, "generate") else model(TOKENS.to(DEVICE))


def edit(folder, file="config.json", drop=(), **change):
    said = json.loads((folder / file).read_text())
    said = {key: value for key, value in said.items() if key not in drop}
    (folder / file).write_text(json.dumps(said | change))


def spell_old(folder, key="rope_type"):
    """As transformers 4.46 wrote config.json."""
    said = json.loads((folder / "config.json").read_text())
    rope = said.pop("rope_parameters")
    said |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": said.pop("dtype")}
    kind = rope.pop("rope_type")
    said["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    (folder / "config.json").write_text(json.dumps(said | {"transformers_version": "4.46.0"}))


def to_bin(folder, old=False):
    path = folder / "model.safetensors"
    torch.save(
        load_file(path), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old
    )
    path.unlink()


# --------------------------------------------------------------------------------------------------
# Builders of folders


def write_meta(folder, model, shards=1, embedding_axis=0, **params):
    """Cuts as model parallelism cuts, and pairs: row 2i of a head is Hugging Face's i, 2i + 1 its i + p/2."""
    folder.mkdir()
    names = {
        "model.": "",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wq",
    }
    names |= {
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
    }
    names |= {
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    files = [{} for _ in range(shards)]
    for name, w in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            w = w.unflatten(0, (-1, 2, LLAMA["head_dim"] // 2)).transpose(1, 2).flatten(0, 2)
        for theirs, metas in names.items():
            name = name.replace(theirs, metas)
        axis = (
            embedding_axis
            if "tok_embeddings" in name
            else 1
            if ".wo." in name or ".w2." in name
            else 0
        )
        for i, file in enumerate(files):
            file[name] = w.clone() if w.dim() == 1 else w.chunk(shards, axis)[i].clone()
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02}.pth")
    said = dict(
        dim=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=20,
        multiple_of=16,
        norm_eps=0.03,
        rope_theta=50.0,
    )
    (folder / "params.json").write_text(json.dumps(said | params))
    return folder


def hybrid_weights(mixers, n=4, dtype=torch.float32):
    """The tensors of a hybrid by the authors' names, of LLAMA's sizes."""
    d, h, wide, narrow = 16, 4, 16, 8
    shapes = {
        "in_proj_x.weight": (narrow, d),
        "in_proj_z.weight": (wide, d),
        "B_proj.weight": (narrow, d),
    }
    shapes |= {
        "C_proj.weight": (wide, d),
        "dt_proj_down.weight": (1, d),
        "dt_proj.weight": (wide, 1),
    }
    shapes |= {"dt_proj.bias": (wide,), "conv1d.weight": (wide, 1, 4), "conv1d.bias": (wide,)}
    shapes |= {"A_log": (wide, n), "D": (wide,), "out_proj.weight": (d, wide)}
    shapes2 = {
        "in_proj.weight": (2 * (wide + narrow) + h, d),
        "conv1d.weight": (wide + 2 * narrow, 1, 4),
    }
    shapes2 |= {"conv1d.bias": (wide + 2 * narrow,), "dt_bias": (h,), "A_log": (h,), "D": (h,)}
    shapes2 |= {"norm.weight": (wide,), "out_proj.weight": (d, wide)}
    w, random = llama().state_dict(), torch.Generator().manual_seed(1)
    for i, mixer in enumerate(mixers):
        if mixer != "attention":
            w = {k: t for k, t in w.items() if not k.startswith(f"model.layers.{i}.self_attn")}
            for name, shape in (shapes if mixer == "mamba" else shapes2).items():
                values = torch.randn(shape, generator=random) * 0.3 + (name in ("D", "norm.weight"))
                w[f"model.layers.{i}.mamba.{name}"] = values
    return {k: t.to(dtype).clone() for k, t in w.items()}


def write_hybrid(folder, mixers, w, n=4, ssm=(), **change):
    llama().save_pretrained(folder)
    save_file(w, folder / "model.safetensors", {"format": "pt"})
    ssm = ({"d_state": n} if "mamba" in mixers else {"ngroups": 4, "d_state": 4}) | dict(ssm)
    said = dict(d_model=16, ssm_cfg=ssm, rms_norm_eps=0.03, vocab_size=None, d_inner=16, d_xb=8)
    said |= dict(intermediate_size=48, hidden_act="silu", n_layer=2)
    said["attn_layers"] = [i for i, mixer in enumerate(mixers) if mixer == "attention"]
    (folder / "mamba_config.json").write_text(json.dumps(said | change))
    return folder


def make(folder, base="hf"):
    """A folder of a kind, and the tensors that it holds."""
    if base in MIXED:
        w = hybrid_weights(MIXED[base])
        return write_hybrid(folder, MIXED[base], w), w
    model = llama()
    if "meta" in base:
        return write_meta(folder, model, 2 if "shards" in base else 1), model.state_dict()
    model.save_pretrained(folder, max_shard_size="2KB" if "shards" in base else "1GB")
    if "bin" in base:
        to_bin(folder)
    return folder, model.state_dict()


BASES = ["hf", "hf, shards", "hf, bin", "meta", "meta, shards", "mamba", "mamba2"]


# --------------------------------------------------------------------------------------------------
# The authors' layers


def recur(x, dt, A, B, C, D):
    """h = exp(Δ A) h + Δ x Bᵀ, y = h C + D x, a token at a time; x, dt (b, l, h, p), B, C (b, l, h, n)."""
    state, y = 0, []
    for t in range(x.shape[1]):
        state = (dt[:, t, ..., None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B[
            :, t, :, None
        ]
        y.append((state * C[:, t, :, None]).sum(-1) + D * x[:, t])
    return torch.stack(y, 1)


class Authors(torch.nn.Module):
    """One layer, in place of self_attn; w are its tensors by the authors' names."""

    def __init__(self, w):
        super().__init__()
        self.w = {name: t.double() for name, t in w.items()}

    def convolve(self, x):
        past, kernel = F.pad(x, (0, 0, 3, 0)), self.w["conv1d.weight"][:, 0]
        return F.silu(
            sum(kernel[:, j] * past[:, j : j + x.shape[1]] for j in range(4))
            + self.w["conv1d.bias"]
        )

    def forward(self, hidden_states, **_):
        mixer = self.mamba2 if "dt_bias" in self.w else self.mamba
        return mixer(hidden_states) @ self.w["out_proj.weight"].T, None

    def mamba(self, v):
        n = self.w["A_log"].shape[1]

        def read(name, fan=1):
            return (
                (v @ self.w[f"{name}.weight"].T).unflatten(-1, (-1, n)).repeat_interleave(fan, -2)
            )

        x = self.convolve(read("in_proj_x", 2).flatten(-2)).unflatten(-1, (-1, n))
        dt = v @ self.w["dt_proj_down.weight"].T @ self.w["dt_proj.weight"].T
        dt = F.softplus(dt + 2 * self.w["dt_proj.bias"]).unflatten(-1, (-1, n))  # they add it twice
        A, D = -self.w["A_log"].exp().unflatten(0, (-1, n)), self.w["D"].unflatten(0, (-1, n))
        y = recur(x, dt, A, read("B_proj", 2), read("C_proj"), D)
        return (y * F.silu(read("in_proj_z"))).flatten(-2)

    def mamba2(self, v):
        h, g, p = 4, 2, 4
        z, xBC, dt = (v @ self.w["in_proj.weight"].T).split([h * p, 2 * g * p + h * p, h], -1)
        x, B, C = self.convolve(xBC).unflatten(-1, (-1, p)).split([g, g, h], -2)
        x, B = x.repeat_interleave(h // g, -2), B.repeat_interleave(h // g, -2)
        dt = F.softplus(dt + self.w["dt_bias"])[..., None].expand(*v.shape[:2], h, p)
        y = recur(x, dt, -self.w["A_log"].exp()[:, None, None], B, C, self.w["D"][:, None])
        y = y * F.silu(z).unflatten(-1, (h, p))
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return y.flatten(-2) * self.w["norm.weight"]


def authors_logits(mixers, w):
    model = llama().double()
    model.load_state_dict({k: t.double() for k, t in w.items() if "mamba" not in k}, strict=False)
    for i, mixer in enumerate(mixers):
        if mixer != "attention":
            prefix = f"model.layers.{i}.mamba."
            own = {k.removeprefix(prefix): t for k, t in w.items() if k.startswith(prefix)}
            model.model.layers[i].self_attn = Authors(own)
    return logits(model)


# --------------------------------------------------------------------------------------------------
# Loading and exporting


VARIANTS = [
    {},
    dict(attention_bias=True, head_dim=6),
    dict(rope_scaling=RAMP),
    dict(tie_word_embeddings=True),
]


@pytest.mark.parametrize(
    "family, change",
    [("Llama", change) for change in VARIANTS]
    + [("Mistral", dict(sliding_window=None, rope_scaling=LINEAR))],
)
@pytest.mark.parametrize("how", ["new", "type", "rope_type", "bin", "old bin"])
def test_logits_are_those_of_transformers_as_written_and_as_exported(tmp_path, family, change, how):
    model = llama(family, **change)
    model.save_pretrained(tmp_path / "hf", max_shard_size="1GB" if "bin" in how else "3KB")
    if "bin" in how:
        to_bin(tmp_path / "hf", "old" in how)
    elif how != "new":
        spell_old(tmp_path / "hf", how)
    mil.export(tmp_path / "hf", tmp_path / "mil", "mil")
    mil.export(tmp_path / "mil", tmp_path / "back", "hf")
    for folder in ("hf", "mil", "back"):
        assert_close(logits(mil.load(tmp_path / folder, DEVICE)), logits(model), 1e-5)
        assert mil.read_config(tmp_path / folder)["remarks"] == []
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(logits(again), logits(model))
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert said["rope_theta"] == 50.0 and said.get("rope_scaling") == change.get("rope_scaling")


@pytest.mark.parametrize("shards, axis", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("v, scaled", [(20, False), (-1, True)])
def test_metas_folders_are_the_same_models(tmp_path, shards, axis, v, scaled):
    ramp = dict(RAMP, factor=32.0, original_max_position_embeddings=8192)
    model = llama(rope_scaling=ramp if scaled else None)
    folder = write_meta(
        tmp_path / "meta", model, shards, axis, vocab_size=v, use_scaled_rope=scaled
    )
    assert_close(logits(mil.load(folder, DEVICE)), logits(model), 1e-5)


@pytest.mark.parametrize("mixers", [["mamba"] * 2, ["mamba2"] * 2, *MIXED.values()])
@pytest.mark.parametrize("n", [2, 4])
def test_the_authors_hybrids_are_their_layers_computed_a_token_at_a_time(tmp_path, mixers, n):
    w = hybrid_weights(mixers, n)
    folder = write_hybrid(tmp_path / "theirs", mixers, w, n)
    mil.export(folder, tmp_path / "mil", "mil")
    mil.export(tmp_path / "mil", tmp_path / "back", "mambainllama")
    for name in ("theirs", "mil", "back"):
        model = mil.load(tmp_path / name, DEVICE, torch.float64)
        assert model.config.mixers == mixers
        assert_close(logits(model), authors_logits(mixers, w), 1e-5)
    before, after = (
        json.loads((tmp_path / name / "mamba_config.json").read_text())
        for name in ("theirs", "back")
    )
    assert (
        after["ssm_cfg"].items() >= before["ssm_cfg"].items()
        and after["attn_layers"] == before["attn_layers"]
    )
    assert after["ssm_cfg"].get("headdim") == (4 if "mamba2" in mixers else None)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gguf_file_is_the_same_model(tmp_path, scaled):
    gguf = pytest.importorskip("gguf")
    model = llama(
        rope_scaling=dict(RAMP, original_max_position_embeddings=8192) if scaled else None
    )
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for add, value in dict(
        vocab_size=20,
        context_length=64,
        embedding_length=16,
        block_count=2,
        feed_forward_length=48,
        head_count=4,
        head_count_kv=2,
        rope_dimension_count=4,
        rope_freq_base=50.0,
        layer_norm_rms_eps=0.03,
        name="m",
    ).items():
        getattr(writer, f"add_{add}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, w in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            w = w.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(
            names.get_name(name, (".weight",)) + ".weight"
            if not names.get_name(name, (".weight",)).endswith("weight")
            else names.get_name(name, (".weight",)),
            w.contiguous().numpy(),
        )
    if scaled:
        writer.add_tensor("rope_freqs.weight", torch.tensor([1.0, 8.0]).numpy())
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    assert_close(logits(mil.load(tmp_path / "m.gguf", DEVICE)), logits(model), 1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_round_trips_are_bit_for_bit(tmp_path, base, dtype):
    make(tmp_path / "source", base)
    layout = "mambainllama" if base in MIXED else "hf"
    for source, target, kind in (("source", "a", "mil"), ("a", "b", layout), ("b", "c", "mil")):
        mil.export(tmp_path / source, tmp_path / target, kind, dtype)
    models = [mil.load(tmp_path / name, None, dtype) for name in ("source", "a", "b", "c")]
    for model in models[1:]:
        assert model.config == models[0].config
        for k, w in model.state_dict().items():
            assert (
                torch.equal(w, models[0].state_dict()[k])
                and w.dtype == models[0].state_dict()[k].dtype
            )
    assert (
        len({file.stat().st_mode for file in (tmp_path / "b").iterdir()}) == 1
    )  # others can read all


@pytest.mark.parametrize("base", BASES)
def test_tensors_are_read_one_by_one(tmp_path, base, monkeypatch):
    alive, most, read_parts = weakref.WeakSet(), [], mil.read_parts

    def counted(tensors, name):
        most.append(len(alive))
        parts = [part.clone() for part in read_parts(tensors, name)]
        alive.update(parts)
        return parts

    monkeypatch.setattr(mil, "read_parts", counted)
    mil.load(make(tmp_path / "x", base)[0], dtype=torch.bfloat16)
    assert len(most) > 10 and max(most) <= 2  # the one before, of as many shards


# --------------------------------------------------------------------------------------------------
# What is read, and how


def test_ids_and_names_and_files_about_texts_go_along(tmp_path):
    make(tmp_path / "a")
    edit(tmp_path / "a", bos_token_id=7, eos_token_id=8, mil_tokenizer="bytes")
    (tmp_path / "a" / "generation_config.json").write_text(
        '{"eos_token_id": [9, 8], "bos_token_id": 3}'
    )
    (tmp_path / "a" / "chat_template.jinja").write_text("x")
    mil.export(tmp_path / "a", tmp_path / "b", "mil")
    mil.export(tmp_path / "b", tmp_path / "c", "hf")
    for name, format in (("a", "hf"), ("b", "mil"), ("c", "hf")):
        about = mil.read_config(tmp_path / name)
        assert (about["ids"]["bos_token_id"], about["ids"]["eos_token_id"]) == (7, [9, 8])
        assert about["tokenizer"] == "bytes" and about["format"] == format
        assert (tmp_path / name / "chat_template.jinja").read_text() == "x"
    mil.save(mil.load(tmp_path / "a"), tmp_path / "d", tokenizer="tokenizer.json", note=3)
    assert (
        mil.read_config(tmp_path / "d")["tokenizer"] is None
        and mil.read_config(tmp_path / "d")["note"] == 3
    )


@pytest.mark.parametrize("window, context", [(8, 8), (None, 64), (100, 64), (64, 64)])
def test_a_sliding_window_shorter_than_the_context_becomes_the_context(tmp_path, window, context):
    llama("Mistral", sliding_window=window).save_pretrained(tmp_path)
    about = mil.read_config(tmp_path)
    assert about["config"].context == context
    assert ["slides over 8" in line for line in about["remarks"]] == [True] * (window == 8)


@pytest.mark.parametrize(
    "params, context, factor",
    [
        ({}, 4096, 0),
        (dict(rope_theta=5e5), 8192, 0),
        (dict(use_scaled_rope=True), 131072, 32),
        (dict(use_scaled_rope=True, dim=4096, n_heads=64), 131072, 8),
    ],
)
def test_metas_context_and_factor_follow_from_the_rest(tmp_path, params, context, factor):
    about = mil.read_config(write_meta(tmp_path / "x", llama(), **params))
    assert about["config"].context == context and f"taken as {context}" in about["remarks"][0]
    assert (about["config"].rope_scaling or {"factor": 0})["factor"] == factor


def test_a_head_in_the_file_is_used_although_tied_and_a_copy_is_not(tmp_path):
    model = llama(tie_word_embeddings=True)
    for name, noise in (("copy", 0.0), ("own", 1.0)):
        model.save_pretrained(tmp_path / name)
        w = load_file(tmp_path / name / "model.safetensors")
        w["lm_head.weight"] = w["model.embed_tokens.weight"] + noise * torch.randn(20, 16)
        w["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # of old files
        save_file(w, tmp_path / name / "model.safetensors", {"format": "pt"})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert_close(logits(mil.load(tmp_path / name, DEVICE)), logits(theirs), 1e-5)
        about = mil.read_config(tmp_path / name)
        assert about["config"].tied == (name == "copy") == (not about["remarks"])


@pytest.mark.parametrize(
    "mixer, ssm",
    [
        (
            "mamba2",
            dict(headdim=4, rmsnorm=True, conv_bias=True, chunk_size=256, dt_limit=[0.0, math.inf]),
        ),
        ("mamba2", dict(headdim=64)),
        ("mamba", dict(dt_rank="auto", dt_min=0.001, expand=1, repeat_kv_before_conv=True)),
    ],
)
def test_settings_of_the_authors_that_state_defaults_are_read(tmp_path, mixer, ssm):
    w = hybrid_weights(MIXED[mixer])
    folder = write_hybrid(tmp_path / "x", MIXED[mixer], w, ssm=ssm, hidden_act="swish")
    edit(folder, hidden_act="swish")
    assert_close(
        logits(mil.load(folder, DEVICE, torch.float64)), authors_logits(MIXED[mixer], w), 1e-5
    )


def test_a_name_is_downloaded_without_code_and_a_path_is_not(tmp_path, monkeypatch):
    hub, asked = pytest.importorskip("huggingface_hub"), []
    make(tmp_path / "hub")

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        if "absent" in name:
            raise OSError("no network\nat all")
        return str(tmp_path / "hub")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert mil.load("owner/model").config.d == 16 and mil.find_checkpoint("hub") == mil.Path("hub")
    assert not any(pattern.endswith((".py", "*")) for _, patterns in asked for pattern in patterns)
    for name, words in (
        ("owner/absent", "hub: no network at all"),
        ("hub/x", "no checkpoint"),
        ("x", "no checkpoint"),
        (str(tmp_path / "y"), "no checkpoint"),
    ):
        with refused(f"^{name}: .*{words}"):
            mil.load(name)


# --------------------------------------------------------------------------------------------------
# Refusals


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@contextlib.contextmanager
def refused(match):
    with pytest.raises(mil.MilError, match=match) as e:
        yield
    assert "\n" not in str(e.value)


def change(file, **tensors):
    """Changes tensors of a file: x__y for x.y, None to drop."""

    def damage(folder):
        w = torch.load(folder / file) | {k.replace("__", "."): t for k, t in tensors.items()}
        torch.save({k: t for k, t in w.items() if t is not None}, folder / file)

    return damage


def said(file="config.json", **values):
    return lambda folder: edit(folder, file, **values)


NORM, BIN, ONE = "model__norm__weight", "pytorch_model.bin", torch.ones
BAD = [
    ("hf, bin", change(BIN, **{NORM: ONE(5)}), r"bin: norm.weight is \(5,\), expected \(16,\)"),
    ("hf, bin", change(BIN, **{NORM: ONE(16, 1)}), r"bin: norm.weight is \(16, 1\)"),
    (
        "meta, shards",
        change("consolidated.01.pth", output__weight=ONE(9, 16)),
        r"lm_head.weight is \(19, 16\)",
    ),
    ("hf, bin", change(BIN, **{NORM: None}), "norm.weight is missing"),
    ("hf, bin", change(BIN, model__surplus=ONE(5)), "bin: holds model.surplus, which"),
    ("hf, bin", change(BIN, **{NORM: ONE(16).to(torch.int8)}), "norm.weight is torch.int8"),
    ("hf, bin", change(BIN, **{NORM: ONE(16).to(torch.float8_e4m3fn)}), "is torch.float8"),
    ("hf, bin", change(BIN, **{NORM: "a word"}), "norm.weight is no tensor"),
    ("hf, bin", lambda d: torch.save([1, 2], d / BIN), "holds a list"),
    ("hf, bin", lambda d: torch.save({"a": Evil(d / "ran")}, d / BIN), "bin: .*run code"),
    (
        "hf, bin",
        lambda d: (d / BIN).write_bytes(pickle.dumps(Evil(d / "ran"), 2)),
        "bin: .*run code",
    ),
    ("meta", lambda d: torch.save({"a": Evil(d / "ran")}, d / "consolidated.00.pth"), "run code"),
    (
        "hf, shards",
        lambda d: save_file({"model.norm.weight": ONE(16)}, d / "model-x.safetensors"),
        "holds model.norm.weight, and so does",
    ),
    ("hf, shards", lambda d: next(d.glob("*.safetensors")).unlink(), "is missing"),
    (
        "hf",
        lambda d: (d / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
        "Git LFS",
    ),
    ("hf", said(model_type="gpt2"), "json: model_type is 'gpt2', expected llama or mistral"),
    (
        "hf",
        said(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification",
    ),
    ("hf", said(hidden_act="gelu"), "hidden_act is 'gelu', expected silu"),
    (
        "hf",
        said(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type is 'yarn'",
    ),
    ("hf", said(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type is 'dynamic'"),
    ("hf", said(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor"),
    (
        "hf",
        said(
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        ),
        "partial_rotary_factor is 0.5",
    ),
    ("hf", said(mlp_bias=True), "mlp_bias is True"),
    ("hf", said(quantization_config={"quant_method": "gptq"}), "quantization_config is .*gptq"),
    ("hf", said(drop=["hidden_size"]), r"is \(20, 16\), expected \(20, 4096\)"),
    ("hf", lambda d: (d / "config.json").write_text("[1]"), "JSON object"),
    ("hf", lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "JSON object"),
    ("meta", said("params.json", multiple_of=256), r"is \(48, 16\), expected \(256, 16\)"),
    ("meta", said("params.json", drop=["dim"]), "params.json: .*lacks 'dim'"),
    ("meta", said("params.json", quantization_args={"scheme": "int4"}), "quantization_args is"),
    ("mamba", said("mamba_config.json", n_layer=3), "mamba_config.json: n_layer is 3, expected 2"),
    ("mamba", said("mamba_config.json", attn_layers=[1, 7]), r"attn_layers is \[1, 7\]"),
    (
        "mamba",
        said("mamba_config.json", attn_layers=[0]),
        "layers.0.mixer.q_proj.weight is missing",
    ),
    ("mamba2", said("mamba_config.json", d_inner=32), "d_inner is 32, expected 16"),
    (
        "mamba2",
        said("mamba_config.json", ssm_cfg=dict(ngroups=4, d_state=8)),
        "d_state is 8, expected 4",
    ),
    (
        "mamba2",
        said("mamba_config.json", ssm_cfg=dict(ngroups=4, d_state=4, norm_before_gate=True)),
        "norm_before_gate is True",
    ),
]


@pytest.mark.parametrize("base, damage, match", BAD)
def test_what_does_not_fit_gets_one_clear_line_runs_no_code_and_is_not_exported(
    tmp_path, base, damage, match
):
    damage(make(tmp_path / "model", base)[0])
    for call in (mil.load, lambda folder: mil.export(folder, tmp_path / "target", "mil")):
        with refused(match):
            call(tmp_path / "model")
    assert not list(tmp_path.rglob("ran")) and not (tmp_path / "target").exists()


@pytest.mark.parametrize("base", BASES)
def test_a_file_that_is_missing_cut_short_a_folder_or_a_circle_is_told_of_in_one_line(
    tmp_path, base
):
    folder, _ = make(tmp_path / "model", base)
    for path in sorted(
        set(folder.iterdir())
        - {folder / "generation_config.json", folder / "model.safetensors.index.json"}
    ):
        whole = path.read_bytes()
        for left in (0, 1, 20, len(whole) // 2, len(whole) - 2):
            path.write_bytes(whole[:left])
            with refused(path.name):
                mil.load(folder)
        for other in (lambda: None, path.mkdir, lambda: path.symlink_to(path.name)):
            path.unlink(missing_ok=True)
            other()
            with refused(str(folder)):
                mil.load(folder)
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)
    mil.load(folder)


@pytest.mark.parametrize(
    "base, file, more",
    [
        ("hf", "config.json", dict(rope_scaling=RAMP, rope_theta=50.0)),
        ("meta", "params.json", dict(ffn_dim_multiplier=1.0, use_scaled_rope=True)),
        ("mamba", "mamba_config.json", {}),
        ("mamba2", "mamba_config.json", {}),
    ],
)
def test_whatever_a_json_file_says_it_is_read_or_refused_in_one_line(tmp_path, base, file, more):
    folder = make(tmp_path / "model", base)[0]
    edit(folder, file, **more)
    about = json.loads((folder / file).read_text())
    for key in about:
        parts = (
            [dict(about[key], **{k: v}) for k in about[key] for v in (None, -1, "x", [])]
            if isinstance(about[key], dict)
            else []
        )
        for value in (None, -1, 0, 2.5, "x", [], [3], {}, {"x": 1}, *parts):
            (folder / file).write_text(json.dumps(about | {key: value}))
            try:
                mil.load(folder)
            except mil.MilError as e:
                assert "\n" not in str(e) and str(folder) in str(e)


def test_without_transformers_one_is_told_how_to_have_it_where_it_is_needed(tmp_path, monkeypatch):
    folders = {base: make(tmp_path / base.replace(" ", ""), base)[0] for base in BASES}
    for package in ("transformers", "safetensors", "huggingface_hub"):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
    for base, folder in folders.items():
        with contextlib.nullcontext() if "meta" in base else refused("pip install transformers"):
            mil.export(folder, tmp_path / f"{folder.name}.mil", "mil")
            mil.load(tmp_path / f"{folder.name}.mil")
    with refused("pip install transformers"):
        mil.export(tmp_path / "meta.mil", tmp_path / "target", "hf")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "mixers, kind, match",
    [
        (["attention"] * 2, "gguf", "--format"),
        (["mamba", "attention"], "hf", "mamba"),
        (["none", "attention"], "hf", "none"),
        (["mamba", "mamba2"], "mambainllama", "mamba2"),
        (["attention"] * 2, "mambainllama", "attention"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path, mixers, kind, match):
    config = mil.Config(
        v=11, d=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, d_state=4, mixers=mixers
    )
    mil.save(build(config, torch.float32), tmp_path / "source")
    with refused(match):
        mil.export(tmp_path / "source", tmp_path / "target", kind)
    assert os.listdir(tmp_path) == ["source"]


def test_an_export_that_fails_leaves_nothing_and_one_in_the_way_of_files_changes_none(
    tmp_path, monkeypatch
):
    make(tmp_path / "source")
    (tmp_path / "file").write_text("precious")
    for target in ("file", "source", "file/under"):
        with refused(str(tmp_path / "file") if "file" in target else "give a new folder"):
            mil.export(tmp_path / "source", tmp_path / target, "hf")
    assert (tmp_path / "file").read_text() == "precious" and mil.load(tmp_path / "source")

    def full(*_):
        raise OSError(28, "No space left\non device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    with refused(r"target: cannot be written \(disk full\?\): No space left on device"):
        mil.export(tmp_path / "source", tmp_path / "target", "hf")
    assert not (tmp_path / "target").exists()


def test_the_command_exports_and_says_in_one_line_what_it_cannot(tmp_path):
    make(tmp_path / "source")
    done = run_script("mil.py", "export", tmp_path / "source", tmp_path / "a", "--format", "mil")
    assert done.returncode == 0 and mil.read_config(tmp_path / "a")["format"] == "mil", done.stderr
    failed = run_script("mil.py", "export", tmp_path / "nowhere", tmp_path / "b")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "nowhere" in failed.stderr
    for argv, match in (
        (["exprot", "a", "b"], "invalid choice: 'exprot'"),
        (["export", "a"], "target"),
    ):
        with refused(match):
            mil.main(argv)
