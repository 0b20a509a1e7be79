"""Checkpoints, ours and others', compared with transformers' models, and with the authors' layers
written here a second time, on the definitions of kernels.py."""

import contextlib
import copy
import json
import math
import os
import sys
import weakref
from functools import partial

import pytest
import torch
from conftest import DEVICE, assert_close, build, run_script

import kernels
import mil

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

# Sizes and constants at which a mistake shows: eps and RoPE matter within a dozen tokens.
LLAMA = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
LLAMA |= dict(num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, head_dim=4)
LLAMA |= dict(rms_norm_eps=0.03, bos_token_id=1, eos_token_id=2, rope_theta=50.0)
LINEAR = dict(rope_type="linear", factor=3.0)
SCALE = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
SCALE |= dict(original_max_position_embeddings=8192)
FAR = SCALE | dict(rope_type="llama3")
RAMP = FAR | dict(original_max_position_embeddings=32)
TOKENS = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
MIXED = {"mamba": ["mamba", "attention"], "mamba2": ["attention", "mamba2"]}
OURS = dict(v=20, d=16, n_heads=4, n_kv_heads=2, d_ff=48, d_state=4, context=64)
OURS |= dict(norm_eps=0.03, rope_theta=50.0)
BASES = ["mil", "hf", "hf, shards", "hf, bin", "meta", "meta, shards", "mamba", "mamba2"]
FILES = {"mil": "config.json", "hf": "config.json", "meta": "params.json"}
FILES |= dict.fromkeys(MIXED, "mamba_config.json")
META = """model.= embed_tokens=tok_embeddings lm_head=output input_layernorm=attention_norm
    self_attn.q_proj=attention.wq self_attn.k_proj=attention.wk self_attn.v_proj=attention.wv
    self_attn.o_proj=attention.wo mlp.gate_proj=feed_forward.w1 mlp.down_proj=feed_forward.w2
    mlp.up_proj=feed_forward.w3 post_attention_layernorm=ffn_norm"""
DROP = object()


# -------------------- Folders of every kind


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


def edit(folder, file, change):
    """Changes a file of keys and values, JSON or tensors, or replaces what is in it."""
    path = max(folder.glob(file))
    is_json = path.suffix == ".json"
    if isinstance(change, dict):
        said = json.loads(path.read_text()) if is_json else torch.load(path)
        change = {k: v for k, v in (said | change).items() if v is not DROP}
    path.write_text(json.dumps(change)) if is_json else torch.save(change, path)


def spell_old(folder, key):
    """As transformers 4.46 wrote config.json."""
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    old = dict(rope_theta=theta, rope_scaling=None if kind == "default" else {key: kind, **rope})
    edit(folder, "config.json", old | {"rope_parameters": DROP})


def to_bin(folder, zipped=True):
    w = safetensors.load_file(folder / "model.safetensors")
    torch.save(w, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()


def paired(name, w):
    """Rows of W_q and W_k in Meta's order: 2i of a head is Hugging Face's i, 2i + 1 its i + p/2."""
    turned = "q_proj" in name or "k_proj" in name
    return w.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2) if turned else w


def write_meta(folder, model, shards=1, embedding_axis=0, **params):
    """Cut as model parallelism cuts."""
    folder.mkdir()
    files = [{} for _ in range(shards)]
    for name, w in model.state_dict().items():
        w = paired(name, w)
        for theirs, metas in mil.pairs(META):
            name = name.replace(theirs, metas)
        axis = 1 if ".wo." in name or ".w2." in name else embedding_axis * ("tok" in name)
        for i, file in enumerate(files):
            file[name] = w.clone() if w.dim() == 1 else w.chunk(shards, axis)[i].clone()
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02}.pth")
    said = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=20, multiple_of=16)
    said |= dict(norm_eps=0.03, rope_theta=50.0) | params
    (folder / "params.json").write_text(json.dumps(said))
    return folder


def ours(mixers, **change):
    config = mil.Config(**OURS | dict(mixers=mixers, n_layers=len(mixers)) | change)
    return build(config, torch.float32)


def hybrid_weights(mixers, n=4):
    """The tensors of a hybrid by the authors' names."""
    w = {f"model.{name}": t for name, t in ours(mixers, d_state=n).state_dict().items()}
    w["lm_head.weight"] = w.pop("model.lm_head.weight")
    for i, mixer in enumerate(mixers):
        theirs = f"layers.{i}." + ("self_attn" if mixer == "attention" else "mamba")
        w = {name.replace(f"layers.{i}.mixer", theirs): t.cpu() for name, t in w.items()}
    return w


def write_hybrid(folder, mixers, n=4, **ssm):
    llama().save_pretrained(folder)
    safetensors.save_file(hybrid_weights(mixers, n), folder / "model.safetensors")
    own = {"d_state": n} if "mamba" in mixers else {"ngroups": 4, "d_state": 4}
    said = dict(d_model=16, ssm_cfg=own | ssm, rms_norm_eps=0.03, vocab_size=None, n_layer=2)
    said |= dict(d_inner=16, d_xb=8, intermediate_size=48, hidden_act="silu")
    said["attn_layers"] = [i for i, mixer in enumerate(mixers) if mixer == "attention"]
    (folder / "mamba_config.json").write_text(json.dumps(said))
    return folder


def make(folder, base="hf"):
    """A folder of a kind."""
    if base == "mil":
        mil.save(ours(["mamba", "attention", "mamba2"], tied=True), folder)
    elif base in MIXED:
        write_hybrid(folder, MIXED[base])
    elif "meta" in base:
        write_meta(folder, llama(), 2 if "shards" in base else 1)
    else:
        llama().save_pretrained(folder, max_shard_size="2KB" if "shards" in base else "1GB")
    if "bin" in base:
        to_bin(folder)
    return folder


# -------------------- The authors' layers


def convolve(w, x, n):
    """x (b, l, channels) -> (b, l, heads, n)."""
    weight, bias = w["conv1d.weight"].transpose(0, 1), w["conv1d.bias"][None]
    return kernels.conv_reference(x[:, :, None], weight, bias)[:, :, 0].unflatten(2, (-1, n))


def authors_mamba(w, u):
    n = w["A_log"].shape[1]
    names = "in_proj_x", "in_proj_z", "B_proj", "C_proj"
    x, z, B, C = ((u @ w[f"{name}.weight"].T).unflatten(2, (-1, n)) for name in names)
    x, B = (t.repeat_interleave(2, 2) for t in (x, B))
    dt = u @ w["dt_proj_down.weight"].T @ w["dt_proj.weight"].T
    dt = (dt + 2 * w["dt_proj.bias"]).unflatten(2, (-1, n))  # they add it twice
    A, D = -w["A_log"].exp().unflatten(0, (-1, n)), w["D"].unflatten(0, (-1, n))
    return kernels.ssm_reference(convolve(w, x.flatten(2), n), dt, A, B, C, D, z)[0]


def authors_mamba2(w, u):
    z, xBC, dt = (u @ w["in_proj.weight"].T).split([16, 32, 4], 2)
    x, B, C = convolve(w, xBC, 4).split([2, 2, 4], 2)
    x, B = (t.repeat_interleave(2, 2) for t in (x, B))
    z, A = z.unflatten(2, (4, 4)), -w["A_log"].exp()
    y, _ = kernels.ssm_reference(x, dt, A, B, C, w["D"], z, w["dt_bias"])
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y * w["norm.weight"].view(4, 4)


def authors(layer, w, hidden_states, **_):
    return layer(w, hidden_states).flatten(2) @ w["out_proj.weight"].T, None


def authors_logits(mixers, n):
    """Of transformers' model with the authors' layers in place of self_attn."""
    model = llama().double()
    w = {name: t.double() for name, t in hybrid_weights(mixers, n).items()}
    model.load_state_dict({k: t for k, t in w.items() if "mamba" not in k}, strict=False)
    for i, mixer in enumerate(mixers):
        prefix = f"model.layers.{i}.mamba."
        own = {k.removeprefix(prefix): t for k, t in w.items() if k.startswith(prefix)}
        if own:
            layer = authors_mamba if mixer == "mamba" else authors_mamba2
            model.model.layers[i].self_attn.forward = partial(authors, layer, own)
    return logits(model)


# -------------------- Loading and exporting

VARIANTS = {"plain": {}, "biases": dict(attention_bias=True, head_dim=6), "tied": {}}
VARIANTS |= {"ramp": dict(rope_scaling=RAMP), "Mistral": dict(rope_scaling=LINEAR)}
VARIANTS["Mistral"]["sliding_window"] = None
VARIANTS["tied"]["tie_word_embeddings"] = True


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["new", "type", "rope_type", "bin", "old bin"])
def test_logits_are_those_of_transformers_as_written_and_as_exported(tmp_path, variant, how):
    model = llama("Mistral" if variant == "Mistral" else "Llama", **VARIANTS[variant])
    model.save_pretrained(tmp_path / "hf", max_shard_size="1GB" if "bin" in how else "3KB")
    if "bin" in how:
        to_bin(tmp_path / "hf", how == "bin")
    elif how != "new":
        spell_old(tmp_path / "hf", how)
    mil.export(tmp_path / "hf", tmp_path / "mil", "mil")
    mil.export(tmp_path / "mil", tmp_path / "back", "hf")
    for folder in ("hf", "mil", "back"):
        assert_close(logits(mil.load(tmp_path / folder, DEVICE)), logits(model), 1e-5)
        assert mil.read_config(tmp_path / folder)["remarks"] == []
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(logits(again), logits(model))
    said = json.loads((tmp_path / "back" / "config.json").read_text())  # as 4.46 reads it
    assert said["rope_theta"] == 50.0
    assert said.get("rope_scaling") == VARIANTS[variant].get("rope_scaling")


@pytest.mark.parametrize("scaling", [None, LINEAR, RAMP, FAR])
def test_the_frequencies_of_rope_are_those_of_hugging_face_to_the_last_bit(scaling):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as Rope

    theirs = dict(rope_theta=5e5, head_dim=128, rope_scaling=copy.copy(scaling))
    angle = 131_071 * Rope(transformers.LlamaConfig(**theirs)).inv_freq
    ours = scaling and {key: value for key, value in scaling.items() if key != "rope_type"}
    cos, sin = mil.rope_angles(mil.Config(rope_scaling=ours), torch.tensor([[131_071]]))
    assert torch.equal(cos.flatten(), angle.cos()) and torch.equal(sin.flatten(), angle.sin())


@pytest.mark.parametrize("shards, axis", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("v, scaled", [(20, False), (-1, True)])
def test_metas_folders_are_the_same_models(tmp_path, shards, axis, v, scaled):
    model = llama(rope_scaling=dict(FAR, factor=32.0) if scaled else None)
    change = dict(vocab_size=v, use_scaled_rope=scaled)
    folder = write_meta(tmp_path / "meta", model, shards, axis, **change)
    assert_close(logits(mil.load(folder, DEVICE)), logits(model), 1e-5)


SSM2 = dict(headdim=4, rmsnorm=True, conv_bias=True, chunk_size=256, dt_limit=[0.0, math.inf])
SSM = dict(dt_rank="auto", dt_min=0.001, expand=1, repeat_kv_before_conv=True)  # all defaults
HYBRIDS = [("mamba mamba", 2, SSM), ("mamba attention", 4, {}), ("mamba2 mamba2", 4, {})]
HYBRIDS += [("attention mamba2", 4, SSM2), ("mamba2 attention", 4, {"headdim": 64})]


@pytest.mark.parametrize("mixers, n, ssm", HYBRIDS)
def test_the_authors_hybrids_compute_what_their_layers_do(tmp_path, mixers, n, ssm):
    mixers = mixers.split()
    write_hybrid(tmp_path / "theirs", mixers, n, **ssm)
    edit(tmp_path / "theirs", "config.json", {"hidden_act": "swish"})
    mil.export(tmp_path / "theirs", tmp_path / "back", "mambainllama")
    for name in ("theirs", "back"):
        model = mil.load(tmp_path / name, DEVICE, torch.float64)
        assert model.config.mixers == mixers
        assert_close(logits(model), authors_logits(mixers, n), 1e-5)
    after = json.loads((tmp_path / "back" / "mamba_config.json").read_text())
    assert after["attn_layers"] == [i for i, m in enumerate(mixers) if m == "attention"]
    heads = dict(d_state=4, ngroups=4, headdim=4) if "mamba2" in mixers else dict(d_state=n)
    assert after["ssm_cfg"] == dict(heads, expand=1, d_conv=4)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gguf_file_is_the_same_model(tmp_path, scaled):
    gguf = pytest.importorskip("gguf")
    model = llama(rope_scaling=FAR if scaled else None)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    said = dict(vocab_size=20, context_length=64, embedding_length=16, block_count=2, name="m")
    said |= dict(feed_forward_length=48, head_count=4, head_count_kv=2, rope_freq_base=50.0)
    for key, value in (said | dict(rope_dimension_count=4, layer_norm_rms_eps=0.03)).items():
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, w in model.state_dict().items():
        theirs = names.get_name(name.removesuffix(".weight")) + ".weight"
        writer.add_tensor(theirs, paired(name, w).contiguous().numpy())
    if scaled:
        writer.add_tensor("rope_freqs.weight", torch.tensor([1.0, 8.0]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = mil.load(tmp_path / "m.gguf", DEVICE)
    assert_close(logits(ours), logits(model), 1e-5)
    assert ours.config.rope_scaling == (SCALE if scaled else None)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_round_trips_are_bit_for_bit(tmp_path, base, dtype):
    make(tmp_path / "source", base)
    layout = "mil" if base == "mil" else "mambainllama" if base in MIXED else "hf"
    for source, target, kind in (("source", "a", "mil"), ("a", "b", layout), ("b", "c", "mil")):
        mil.export(tmp_path / source, tmp_path / target, kind, dtype)
    models = [mil.load(tmp_path / name, None, dtype) for name in ("source", "a", "b", "c")]
    first = models[0].state_dict()
    for model in models[1:]:
        assert model.config == models[0].config and not model.training
        assert (model.lm_head.weight is model.embed_tokens.weight) == model.config.tied
        for k, w in model.state_dict().items():
            assert torch.equal(w, first[k]) and w.dtype == first[k].dtype
    assert len({file.stat().st_mode for file in (tmp_path / "b").iterdir()}) == 1  # all can read


@pytest.mark.parametrize("base", BASES)
def test_tensors_are_read_one_by_one(tmp_path, base, monkeypatch):
    alive, most, read_parts = weakref.WeakSet(), [], mil.read_parts

    def counted(tensors, name):
        most.append(len(alive))
        parts = [part.clone() for part in read_parts(tensors, name)]
        alive.update(parts)
        return parts

    monkeypatch.setattr(mil, "read_parts", counted)
    mil.load(make(tmp_path / "x", base), dtype=torch.bfloat16)
    assert len(most) > 10 and max(most) <= 1  # at most the one before


def test_a_tied_hybrid_is_exported_with_a_head(tmp_path):
    mil.save(ours(["mamba2", "attention"], tied=True), tmp_path)
    mil.export(tmp_path, tmp_path / "x", "mambainllama")
    w = safetensors.load_file(tmp_path / "x" / "model.safetensors")
    assert torch.equal(w["lm_head.weight"], w["model.embed_tokens.weight"])


# -------------------- What is read, and how

LARGE = dict(dim=4096, n_heads=32, ffn_dim_multiplier=1.3, multiple_of=1024)  # 8B's
READ = [  # a change of the configuration; what is read
    ("hf", dict(model_type="mistral", sliding_window=8), dict(context=8)),
    ("hf", dict(model_type="mistral", sliding_window=64), dict(context=64)),
    ("meta", {}, dict(context=4096, rope_scaling=None)),
    ("meta", {"rope_theta": 5e5}, dict(context=8192, rope_scaling=None)),
    ("meta", {"use_scaled_rope": True}, dict(context=131072, rope_scaling=SCALE | {"factor": 32})),
    ("meta", LARGE | {"use_scaled_rope": True}, dict(d_ff=14336, rope_scaling=SCALE)),
    ("meta", {"n_kv_heads": DROP, "rope_theta": DROP}, dict(n_kv_heads=4, rope_theta=10000)),
]


@pytest.mark.parametrize("base, change, told", READ)
def test_what_a_file_limits_or_leaves_out_is_as_its_authors_have_it(tmp_path, base, change, told):
    edit(make(tmp_path / "x", base), FILES[base], change)
    about = mil.read_config(tmp_path / "x")
    assert {key: getattr(about["config"], key) for key in told} == told
    assert bool(about["remarks"]) == (base == "meta" or told["context"] == 8)


def test_ids_and_names_and_files_about_texts_go_along(tmp_path):
    ids = dict(bos_token_id=7, eos_token_id=8, mil_tokenizer="bytes")
    edit(make(tmp_path / "a"), "config.json", ids)
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": null}')
    assert mil.read_config(tmp_path / "a")["ids"]["eos_token_id"] == 8
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [9]}')
    (tmp_path / "a" / "chat_template.jinja").write_text("x")
    mil.export(tmp_path / "a", tmp_path / "b", "mil")
    mil.export(tmp_path / "b", tmp_path / "c", "hf")
    for name, format in (("a", "hf"), ("b", "mil"), ("c", "hf")):
        about = mil.read_config(tmp_path / name)
        assert about["ids"]["bos_token_id"] == 7 and about["ids"]["eos_token_id"] == [9]
        assert about["tokenizer"] == "bytes" and about["format"] == format
        assert (tmp_path / name / "chat_template.jinja").read_text() == "x"


def test_a_head_in_the_file_is_used_although_tied_and_a_copy_is_not(tmp_path):
    for name, noise in (("copy", 0.0), ("own", 1.0)):
        llama(tie_word_embeddings=True).save_pretrained(tmp_path / name)
        w = safetensors.load_file(tmp_path / name / "model.safetensors")
        w["lm_head.weight"] = w["model.embed_tokens.weight"] + noise * torch.randn(20, 16)
        w["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # of old files
        safetensors.save_file(w, tmp_path / name / "model.safetensors")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert_close(logits(mil.load(tmp_path / name, DEVICE)), logits(theirs), 1e-5)
        about = mil.read_config(tmp_path / name)
        assert about["config"].tied == (name == "copy") == (not about["remarks"])


# -------------------- Refusals


class Evil:
    """Runs a command when it is read, which leaves the file `ran` behind."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@contextlib.contextmanager
def refused(match):
    with pytest.raises(mil.MilError, match=match) as e:
        yield
    assert "\n" not in str(e.value)


NORM, ONE = "model.norm.weight", torch.ones
REFUSED = {  # changes of a file, and words of the line that refuses it
    ("mil", "config.json"): [
        ({"config": {"width": 16}}, "^x/config.json: .*width"),
        ({"format": DROP}, 'not a checkpoint: expected "format": "mil"'),
    ],
    ("mil", "*.pt"): [
        ({"norm.weight": ONE(5)}, r"pt: norm.weight is \(5,\), expected \(16,\)"),
        ([1, 2], "pt: holds a list, expected tensors"),
        (Evil(), "pt: .*could run code"),
    ],
    ("hf", "config.json"): [
        ({"model_type": "gpt2"}, "json: model_type is 'gpt2', expected llama or mistral"),
        ({"architectures": ["LlamaForTokens"]}, "LlamaForTokens, expected a …ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "json: .*factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*bits"),
    ],
    ("meta", "params.json"): [
        ({"multiple_of": 256}, r"is \(48, 16\), expected \(256, 16\)"),
        ({"dim": DROP}, "params.json: .*lacks 'dim'"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args is"),
    ],
    ("mamba", "mamba_config.json"): [
        ({"n_layer": 3}, "^x/mamba_config.json: n_layer is 3, expected 2"),
        ({"attn_layers": [1, 7]}, r"attn_layers is \[1, 7\], expected \[1\]"),
        ({"ssm_cfg": {}}, "d_state 16 does not divide"),  # the authors' default
    ],
    ("mamba2", "mamba_config.json"): [
        ({"ssm_cfg": {"ngroups": 4, "d_state": 8}}, "d_state is 8, expected 4"),
        ({"ssm_cfg": {"ngroups": 4}}, "d_state is 128, expected 4"),
    ],
    ("hf, bin", "*.bin"): [
        ({NORM: ONE(16, 1)}, r"bin: norm.weight is \(16, 1\), expected \(16,\)"),
        ({NORM: DROP}, "norm.weight is missing"),
        ({"model.surplus": ONE(5)}, "bin: holds model.surplus, which"),
        ({"norm.weight": ONE(16)}, "bin: holds norm.weight, and so does .*bin"),
        ({NORM: ONE(16).to(torch.float8_e4m3fn)}, "norm.weight is torch.float8"),
        ({NORM: "a word"}, "norm.weight is no tensor"),
        ({NORM: Evil()}, "bin: .*could run code"),
    ],
    ("meta, shards", "*.pth"): [
        ({"output.weight": ONE(9, 16)}, r"lm_head.weight is \(19, 16\), expected"),
    ],
}
CASES = [(*place, *case) for place, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize("base, file, change, match", CASES)
def test_what_does_not_fit_is_refused_by_name(tmp_path, base, file, change, match, monkeypatch):
    monkeypatch.chdir(tmp_path)  # in which the code that must not run would leave a file
    edit(make(tmp_path / "x", base), file, change)
    for call in (mil.load, lambda folder: mil.export(folder, "target", "mil")):
        with refused(match):
            call("x")
    assert os.listdir() == ["x"]


@pytest.mark.parametrize("base", BASES)
def test_files_missing_or_damaged_are_told_of_in_one_line(tmp_path, base):
    folder = make(tmp_path / "model", base)
    for path in sorted(folder.iterdir()):
        whole, unused = path.read_bytes(), path.name in ("model.safetensors.index.json",)
        for part in (b"", whole[:20], whole[:-2], b"[1]", b"version https://git-lfs."):
            path.write_bytes(part)
            with contextlib.suppress(mil.MilError) if unused else refused(path.name):
                mil.load(folder)
        unused |= path.name == "generation_config.json"
        for other in (lambda: None, path.mkdir, lambda p=path: p.symlink_to(p.name)):
            path.unlink(missing_ok=True)
            other()
            with contextlib.suppress(mil.MilError) if unused else refused(str(folder)):
                mil.load(folder)
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)


@pytest.mark.parametrize("base", FILES)
def test_whatever_a_json_file_says_it_is_read_or_refused_in_one_line(tmp_path, base):
    file = make(tmp_path / "model", base) / FILES[base]
    said = json.loads(file.read_text())
    for key, value in said.items():
        inner = value if isinstance(value, dict) else {}
        parts = [value | {k: v} for k in inner for v in (-1, "x")]
        for other in (None, -1, 0, 2.5, "x", [], [3], {}, {"x": 1}, *parts):
            file.write_text(json.dumps(said | {key: other}))
            try:
                mil.load(file.parent)
            except mil.MilError as e:
                assert "\n" not in str(e) and str(file.parent) in str(e)


def test_a_name_is_downloaded_without_code_and_a_path_is_not(tmp_path, monkeypatch):
    make(tmp_path / "hub")

    def download(name, allow_patterns, ignore_patterns):
        assert not any(pattern.endswith((".py", "/*", "*")) for pattern in allow_patterns)
        if name == "owner/absent":
            raise OSError("no network\nat all")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert mil.load("owner/model").config.d == 16 and str(mil.find_checkpoint("hub")) == "hub"
    with refused("^owner/absent: .*hub: no network at all"):
        mil.load("owner/absent")
    for name in ("hub/x", "x", str(tmp_path / "y"), "hub/config.json"):
        with refused(f"^{name}: no checkpoint here"):
            mil.load(name)


def test_without_transformers_one_is_told_how_to_have_it(tmp_path, monkeypatch):
    for base in ("mil", "hf", "meta", "mamba"):
        make(tmp_path / base, base)
    for name in [*sys.modules, "transformers", "safetensors", "huggingface_hub"]:
        if name.split(".")[0] in ("transformers", "safetensors", "huggingface_hub"):
            monkeypatch.setitem(sys.modules, name, None)
    mil.load(tmp_path / "mil")
    mil.export(tmp_path / "meta", tmp_path / "target", "mil")
    for base, format in (("hf", "mil"), ("mamba", "mil"), ("meta", "hf")):
        with refused("pip install transformers"):
            mil.export(tmp_path / base, tmp_path / "none", format)
    assert not (tmp_path / "none").exists()


def test_an_export_that_cannot_be_leaves_nothing_and_changes_nothing(tmp_path, monkeypatch):
    def export(target, format, words):
        with refused(words):
            mil.export(tmp_path / "source", tmp_path / target, format)

    for mixers, format in (("attention", "gguf"), ("attention mamba", "hf"), ("none", "hf")):
        mil.save(ours(mixers.split()), tmp_path / "source")
        export("target", format, f"holds {mixers.replace(' ', ', ')}; --format hf is")
    export("target", "mambainllama", "holds none")
    make(tmp_path / "source" / "hf")
    (tmp_path / "file").write_text("precious")
    export("file", "mil", "file: cannot be made: File exists")
    export("source", "mil", "is not empty; give a new folder")
    assert (tmp_path / "file").read_text() == "precious" and mil.load(tmp_path / "source")

    def full(*_):
        raise OSError(28, "No space left\non device")

    monkeypatch.setattr(torch, "save", full)
    export("target", "mil", r"target/weights-.*: cannot be written .*: No space left on device")
    assert sorted(os.listdir(tmp_path)) == ["file", "source"]


def test_the_command_exports_and_says_in_one_line_what_it_cannot(tmp_path):
    make(tmp_path / "source", "meta")
    done = run_script("mil.py", "export", tmp_path / "source", tmp_path / "a", "--format", "mil")
    assert done.returncode == 0 and mil.read_config(tmp_path / "a")["format"] == "mil", done.stderr
    failed = run_script("mil.py", "export", tmp_path / "nowhere", tmp_path / "b")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "nowhere" in failed.stderr
    with refused("invalid choice: 'exprot'"):
        mil.main(["exprot", "a", "b"])
