"""Tokenizers and conversations: the ids are the library's, and what people write stays text."""

import base64
import json
import sys

import pytest
import tiktoken
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as g
import mil
from mil import Config, MilError

# Small tokenizers in the formats people download


def byte_level(control, merges=("h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he", "o t", "1 2")):
    """A tokenizer.json like GPT-2's and Llama 3's: 256 bytes, merges, control tokens."""
    shown = [chr(b) for b in range(256) if chr(b).isprintable() and b != 32]
    letters = shown + [chr(256 + i) for i in range(256 - len(shown))]
    split = {"type": "Split", "pattern": {"Regex": g.PATTERN}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, {"type": "ByteLevel", "use_regex": False}]
    steps[1] |= {"add_prefix_space": False, "trim_offsets": True}
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges)]
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": list(merges)}
    return whole(model, control, len(tokens)) | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": steps[1],
    }


def sentencepiece(normalizer, pre_tokenizer):
    """A tokenizer.json like Llama 2's: characters, merges, and bytes for everything else."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abehlot'12.:"]
    merges = ["h e", "l l", "he ll", "hell o", "▁ t", "▁t he", "▁ hello"]
    vocab = {t: i for i, t in enumerate([*tokens, *(m.replace(" ", "") for m in merges)])}
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True}
    model |= {"unk_token": "<unk>", "fuse_unk": True}
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    return whole(model, ["<unk>", "<s>", "</s>"], 0) | {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": steps},
    }


def whole(model, control, first):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {
        "special": True
    }
    added = [{"id": first + i, "content": t, **flags} for i, t in enumerate(control)]
    return {"version": "1.0", "added_tokens": added, "model": model, "post_processor": None}


def begins_with(data, token):
    """The same tokenizer.json with a token in front of every text."""
    i = next(t["id"] for t in data["added_tokens"] if t["content"] == token)
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    known = {token: {"id": token, "ids": [i], "tokens": [token]}}
    post = {"type": "TemplateProcessing", "single": [start, one], "pair": [one, two]}
    return data | {"post_processor": post | {"special_tokens": known}}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
NAMES = [f"<|reserved_special_token_{i}|>" for i in range(248)]  # Llama 3.1's control tokens
NAMES[0:0] = ["<|begin_of_text|>", "<|end_of_text|>"]
NAMES[4:4] = ["<|finetune_right_pad_id|>"]
NAMES[6:6] = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
NAMES[10:10] = ["<|python_tag|>"]
CHAT = "<|im_start|>", "<|im_end|>"
FILES = {
    "gpt2": byte_level(["<|endoftext|>"]),
    "smollm2": byte_level(["<|endoftext|>", *CHAT]),
    "llama3": begins_with(byte_level(NAMES), NAMES[0]),
    "llama2": begins_with(sentencepiece(PREPEND, None), "<s>"),
    "first": begins_with(sentencepiece(None, FIRST), "<s>"),
}
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are x.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}"
    "<|{{ m.role }}|>\n{{ m.content.strip() }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
S = {"bos_token": "<s>", "eos_token": "</s>"}
TALKERS = {  # kind of tokenizer, tokenizer_config.json
    "smollm2, ChatML": ("smollm2", {"chat_template": CHATML, "eos_token": "<|im_end|>"}),
    "llama2, Zephyr": ("llama2", {"chat_template": ZEPHYR, **S}),
    "first, Zephyr": ("first", {"chat_template": ZEPHYR, **S}),
    "llama2, INST": ("llama2", {"chat_template": INST, **S}),
    "ChatML without its tokens": ("gpt2", {"chat_template": CHATML}),
    "llama3, no template": ("llama3", {}),
    "first, no template": ("first", S),
}


def beside(folder, kind, about=None, **files):
    """The Tokenizer of a folder with these files."""
    pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(FILES[kind]), encoding="utf-8")
    for name, data in {"tokenizer_config": about or {}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return g.load_tokenizer(str(folder))


def llama3_file(path, merges=(b"he", b"ll", b"hell", b"hello", b" t", b" the", b"ot", b"12")):
    """Meta's tokenizer.model with the ids of FILES["llama3"]."""
    letters = [b for b in range(256) if chr(b).isprintable() and b != 32]
    letters += [b for b in range(256) if b not in letters]
    lines = [base64.b64encode(t) for t in [*(bytes([b]) for b in letters), *merges]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b" %d\n" % i for i, line in enumerate(lines)))
    return str(path)


KINDS = ["bytes", "meta", *FILES, *TALKERS]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(kind): the Tokenizer of one of KINDS."""
    made, folder = {}, tmp_path_factory.mktemp("tokenizers")

    def make(kind):
        if kind == "bytes":
            return g.load_tokenizer("bytes")
        if kind == "meta":
            return g.load_tokenizer(llama3_file(folder / "meta" / "tokenizer.model"))
        return beside(folder / kind, *TALKERS.get(kind, (kind, {})))

    def loaded(kind):
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return loaded


PIECES = [
    *NAMES[:10],
    *CHAT,
    "<|endoftext|>",
    "</s>",
    "<s>",
    "hello",
    " the",
    "\n",
    "  ",
    "é🙂",
    "12",
]
TEXTS = st.lists(st.sampled_from([*PIECES, "\ud83d", "▁"]) | st.text(max_size=3), max_size=8).map(
    "".join
)

# What a text is


@pytest.mark.parametrize("kind", KINDS)
@given(TEXTS)
@settings(max_examples=40)
def test_the_ids_of_a_text_mean_the_text_and_none_is_a_control_token(load, kind, text):
    tokenizer, shown = load(kind), g.mend(text)
    if kind.startswith(("llama2", "first")):
        shown = shown.replace("▁", " ")
    for begin in (True, False):
        ids = tokenizer.encode(text, begin)
        data = b"".join(map(tokenizer.bytes_of, ids)).decode()
        assert data in ((shown, " " + shown) if begin else (shown,))
        assert ids[: len(tokenizer.begin)] == tokenizer.begin or not begin
        assert all(map(tokenizer.bytes_of, ids[len(tokenizer.begin) if begin else 0 :]))


@pytest.mark.parametrize("kind", FILES)
@given(TEXTS)
@settings(max_examples=40)
def test_a_text_has_the_ids_that_transformers_gives_it(load, kind, text):
    tokenizer, text = load(kind), g.mend(text)
    assert tokenizer.encode(text) == tokenizer.hf.encode(text, split_special_tokens=True)


def test_metas_file_and_hugging_faces_of_one_model_mean_the_same_text(load):
    meta, hf = load("meta"), load("llama3")
    assert meta.same_text(hf) and hf.same_text(meta) and not meta.same_text(load("llama2"))
    assert (meta.size, meta.begin, meta.stops) == (hf.size, hf.begin, hf.stops)
    talk = [
        {"role": "user", "content": " hello <|eot_id|>"},
        {"role": "assistant", "content": "the"},
    ]
    assert meta.conversation(talk) == hf.conversation(talk)
    named = {name: i - len(meta.encoding._mergeable_ranks) for name, i in hf.hf.get_vocab().items()}
    assert all(meta.encoding.encode_single_token(name) == named[name] + 264 for name in NAMES)


def test_half_a_surrogate_pair_and_a_million_spaces(load):
    for kind in ("bytes", "meta"):
        assert load(kind).encode("a\ud83d") == load(kind).encode("a\ufffd")
    with pytest.raises(MilError, match="500,000 spaces or line ends in a row"):
        load("meta").encode("begin" + " " * 1_000_000 + "end")


def test_a_character_whose_bytes_span_tokens_prints_whole(load):
    stream = g.TextStream(load("bytes"))
    assert [stream.feed([b]) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert stream.feed([0xE2, 256]) == "" and stream.finish() == "\ufffd"
    assert stream.text == "aé€\ufffd" and stream.tokens == [*"aé€".encode(), 0xE2, 256]


# What a conversation is

USER, ANSWER = (
    {"role": "user", "content": "hello\n the"},
    {"role": "assistant", "content": "12 the"},
)
TALK = [USER, ANSWER, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize("kind", [kind for kind in TALKERS if "no template" not in kind])
def test_a_conversation_has_the_ids_of_apply_chat_template(load, kind):
    for n, reply in ((1, True), (2, False), (3, True)):
        how = {"add_generation_prompt": reply, "return_dict": False}
        want = load(kind).hf.apply_chat_template(TALK[:n], **how)
        assert load(kind).conversation(TALK[:n], reply)[0] == want


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ChatML without its tokens"])
def test_the_assistants_words_and_its_end_are_learned_and_nothing_else(load, kind):
    tokenizer = load(kind)
    ids, own = tokenizer.conversation([*TALK, ANSWER])
    said = [i for i, mine in zip(ids, own, strict=True) if mine]
    assert tokenizer.decode(said).replace(" ", "") == "12the12the"
    assert said[-1] in tokenizer.stops and sum(i in tokenizer.stops for i in said) == 2
    assert tokenizer.conversation([*TALK, ANSWER], reply=True)[0][: len(ids)] == ids


@pytest.mark.parametrize("kind", KINDS)
@given(TEXTS)
@settings(max_examples=40)
def test_nothing_said_becomes_a_control_token(load, kind, text):
    def control(talk):
        ids = load(kind).conversation(talk, reply=True)[0]
        return [i for i in ids if not load(kind).bytes_of(i)], load(kind).decode(ids)

    (got, shown), (want, _) = control([{**USER, "content": text}, ANSWER, USER]), control(TALK)
    assert got == want
    if not kind.startswith(("llama2", "first")):
        assert g.mend(text).replace(g.MARK, "\ufffd").strip() in shown


def test_plain_conversations_have_headers_and_llama3s_have_metas(load):
    assert load("bytes").conversation(TALK[:2])[0] == [
        *b"user:\nhello\n the\nassistant:\n12 the",
        256,
        *b"\n",
    ]
    plain = load("meta").encoding.encode_ordinary
    heads = [[264 + 6, *plain(role), 264 + 7, *plain("\n\n")] for role in ("user", "assistant")]
    user, answer = ([*plain(m["content"]), 264 + 9] for m in (USER, ANSWER))
    assert load("meta").conversation(TALK[:2])[0] == [264, *heads[0], *user, *heads[1], *answer]


def test_a_template_that_refuses_the_messages_is_one_line(load):
    with pytest.raises(MilError, match="its chat template: .*no system"):
        load("llama2, Zephyr").conversation([{"role": "system", "content": "x"}])


# What the files say


@pytest.mark.parametrize(
    "config, files, stops",
    [
        ({}, {}, [264, 266]),
        ({"eos_token": "<|im_end|>"}, {}, [266, 264]),
        ({}, {"generation_config": {"eos_token_id": [265, 264]}}, [265, 264, 266]),
        ({}, {"config": {"eos_token_id": 265}}, [265, 264, 266]),
        ({}, {"config": {"ids": {"eos_token_id": [265]}, "format": "mil"}}, [265, 264, 266]),
        ({}, {"generation_config": {"eos_token_id": None}, "config": [1]}, [264, 266]),
    ],
)
def test_all_that_the_files_name_ends_a_text(tmp_path, config, files, stops):
    if files.get("config") != [1]:
        assert beside(tmp_path, "smollm2", config, **files).stops == stops
    else:
        (tmp_path / "config.json").write_text("[1]")
        assert g.stated_stops(tmp_path) == []


def test_a_token_that_ends_a_text_is_a_control_token_even_where_the_file_does_not_say_so(tmp_path):
    pytest.importorskip("transformers")
    data = json.loads(json.dumps(FILES["smollm2"]))
    data["added_tokens"][2]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 266}')
    tokenizer = g.load_tokenizer(str(tmp_path))
    assert 266 not in tokenizer.encode("a<|im_end|>") and tokenizer.bytes_of(266) == b""


@pytest.mark.parametrize(
    "name, data, match",
    [
        ("tokenizer.model", b"aGk= 0\nnot base64 1\n", "not lines of `base64 rank`"),
        (
            "tokenizer.model",
            b"version https://git-lfs.github.com/spec/v1\n",
            "not lines of `base64 rank`",
        ),
        ("tokenizer.model", b"aGk= 5\n", "1 ranks are not 0 … 0"),
        ("tokenizer.model", b"", "lacks some of the 256"),
        ("tokenizer.json", b"{", "its tokenizer cannot be read"),
        ("tokenizer.json", b"\xff", "its tokenizer cannot be read"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "its tokenizer cannot be read"),
        ("other.json", b"{}", "no tokenizer; expected .*bytes.*gpt2"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(tmp_path, name, data, match):
    if name == "tokenizer.json":
        pytest.importorskip("transformers")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MilError, match=match) as e:
        g.load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600


def test_what_is_not_installed_or_not_downloaded_is_said(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MilError, match="pip install transformers"):
        g.load_tokenizer(str(tmp_path))

    def get_encoding(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(MilError, match="tiktoken could not download it; pass bytes"):
        g.load_tokenizer("cl100k_base")


def tiny(v):
    sizes = dict(d=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16, context=32)
    return build(Config(v=v, **sizes), torch.float32)


@pytest.mark.parametrize("kind", ["bytes", "meta", "smollm2, ChatML", "llama2, Zephyr"])
def test_a_tokenizer_travels_with_its_model(load, tmp_path, kind, capsys):
    source = llama3_file(tmp_path / "tokenizer.model")
    source = {"bytes": "bytes", "meta": source}.get(kind) or str(load(kind).folder)
    want = load(kind)
    g.save_with_tokenizer(tiny(want.size), tmp_path / "m", source)
    g.save_with_tokenizer(tiny(want.size), tmp_path / "m", g.tokenizer_of(tmp_path / "m"))
    _, got = g.load_with_tokenizer(tmp_path / "m")
    assert (got.vocabulary, got.begin, got.stops) == (want.vocabulary, want.begin, want.stops)
    assert got.conversation(TALK) == want.conversation(TALK) and not capsys.readouterr().err


@pytest.mark.parametrize(
    "v, note", [(250, "from 250 on are never drawn"), (300, "stand for nothing")]
)
def test_a_tokenizer_of_another_size_than_the_model_is_noted(tmp_path, capsys, v, note):
    g.save_with_tokenizer(tiny(v), tmp_path, "bytes")
    model, tokenizer = g.load_with_tokenizer(tmp_path)
    assert note in capsys.readouterr().err and tokenizer.bytes_of(299) == b""
    if v == 250:
        with pytest.raises(MilError, match="token 255, but the model's vocabulary is 250"):
            next(g.generate(model, [[255]], 1))


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    mil.save(tiny(257), tmp_path)
    with pytest.raises(MilError, match="no tokenizer"):
        g.load_with_tokenizer(tmp_path)


def test_a_vocabulary_may_leave_ids_out(tmp_path):
    pytest.importorskip("transformers")
    data = json.loads(json.dumps(FILES["gpt2"]))
    data["model"]["vocab"]["12"] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = g.load_tokenizer(str(tmp_path))
    assert tokenizer.size == 401 and tokenizer.encode("12") == [400]
    assert tokenizer.decode([400]) == "12" and tokenizer.bytes_of(399) == b""
