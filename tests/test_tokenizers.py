"""Tokenizers and conversations: the ids are the library's, and what people write stays text."""

import copy
import json
import sys

import pytest
import tiktoken
import torch
from conftest import MERGES, build, llama3_file
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as g
from mil import Config, MilError

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
decoders, pre_tokenizers = tokenizers.decoders, tokenizers.pre_tokenizers
normalizers, ByteLevel = tokenizers.normalizers, pre_tokenizers.ByteLevel

# Small tokenizer.json files in the formats people download


SPLIT = pre_tokenizers.Split(tokenizers.Regex(g.PATTERN), "isolated")
CUT = pre_tokenizers.Sequence([SPLIT, ByteLevel(add_prefix_space=False, use_regex=False)])
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FIRST = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


def tokenizer_json(tokens, merges, control, begin, fallback, **parts):
    """control: the control tokens, of which `begin` is in front of every text."""
    merges = [tuple(pair.split()) for pair in merges.split(",")]
    vocab = {token: i for i, token in enumerate([*tokens, *map("".join, merges)])}
    unknown = dict(byte_fallback=True, fuse_unk=True, unk_token="<unk>") if fallback else {}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, **unknown))
    made.add_special_tokens([*control])
    if begin:
        first = dict(single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))])
        made.post_processor = tokenizers.processors.TemplateProcessing(**first)
    for name, part in parts.items():
        setattr(made, name, part)
    return json.loads(made.to_str())


def byte_level(*control, begin=None):
    """Like GPT-2's and Llama 3's: 256 bytes, merges, control tokens."""
    parts = dict(pre_tokenizer=CUT, decoder=decoders.ByteLevel())
    return tokenizer_json(sorted(ByteLevel.alphabet()), MERGES, control, begin, False, **parts)


def sentencepiece(**parts):
    """Like Llama 2's: characters, merges, and bytes for everything else."""
    control, merges = ("<unk>", "<s>", "</s>"), "h e,l l,he ll,hell o,▁ t,▁t he,▁ hello"
    tokens = [*control, *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abehlot'12.:"]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    parts["decoder"] = decoders.Sequence(steps)
    return tokenizer_json(tokens, merges, control, "<s>", True, **parts)


NAMES = [f"<|reserved_special_token_{i}|>" for i in range(248)]  # Llama 3.1's control tokens
NAMES[0:0] = ["<|begin_of_text|>", "<|end_of_text|>"]
NAMES[4:4] = ["<|finetune_right_pad_id|>"]
NAMES[6:6] = ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
NAMES[10:10] = ["<|python_tag|>"]
FILES = {
    "gpt2": byte_level("<|endoftext|>"),
    "smollm2": byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": byte_level(*NAMES, begin=NAMES[0]),
    "llama2": sentencepiece(normalizer=PREPEND),
    "first": sentencepiece(pre_tokenizer=FIRST),
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
KINDS = ["bytes", "meta", *FILES, *TALKERS]


def beside(folder, data, about=None, **files):
    """The Tokenizer of a folder with this tokenizer.json, or one of FILES, and these files."""
    folder.mkdir(parents=True, exist_ok=True)
    files |= {"tokenizer": FILES.get(str(data), data), "tokenizer_config": about or {}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return g.load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(kind): the Tokenizer of one of KINDS."""
    made, folder = {"bytes": g.load_tokenizer("bytes")}, tmp_path_factory.mktemp("tokenizers")
    made["meta"] = g.load_tokenizer(llama3_file(folder / "meta" / "tokenizer.model"))
    (folder / "meta" / "chat_template.jinja").write_text("not read, but it travels")

    def loaded(kind):
        if kind not in made:
            made[kind] = beside(folder / kind, *TALKERS.get(kind, (kind, {})))
        return made[kind]

    return loaded


PIECES = [*NAMES[:10], "<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "hello"]
PIECES += [" the", "\n", "  ", "é🙂", "123", "▁", "\ud83d", g.MARK]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)

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
    assert meta.conversation(TALK) == hf.conversation(TALK)
    ids = [meta.encoding.encode_single_token(name) for name in NAMES]
    assert ids == [hf.hf.get_vocab()[name] for name in NAMES]
    words = [meta.bytes_of(i) for i in meta.encode("4123", begin=False)]
    assert words == [b"4", b"12", b"3"]  # Llama 3 cuts digits in threes


def test_a_million_spaces_are_refused(load):
    with pytest.raises(MilError, match="500,000 spaces or line ends in a row"):
        load("meta").encode("begin" + " " * 1_000_000 + "end")


def test_a_character_whose_bytes_span_tokens_prints_whole(load):
    stream = g.TextStream(load("bytes"))
    assert [stream.feed([b]) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert stream.feed([0xE2, 256]) == "" and stream.feed([], final=True) == "\ufffd"
    assert stream.text == "aé€\ufffd" and stream.tokens == [*"aé€".encode(), 0xE2, 256]


# What a conversation is

USER = {"role": "user", "content": "hello\n the <|eot_id|>"}
ANSWER = {"role": "assistant", "content": "12 the"}
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
    (said, meta), plain = load("meta").conversation(TALK[:2]), load("bytes").conversation(TALK[:2])
    assert plain[0] == [*b"user:\nhello\n the <|eot_id|>\nassistant:\n12 the", 256, *b"\n"]
    first, text = 264, load("meta").encoding.encode_ordinary
    heads = [[first + 6, *text(m["role"]), first + 7, *text("\n\n")] for m in TALK[:2]]
    user, answer = ([*text(m["content"]), first + 9] for m in TALK[:2])
    assert said == [first, *heads[0], *user, *heads[1], *answer]
    assert meta == [False] * (len(said) - len(answer)) + [True] * len(answer)


def test_a_template_that_refuses_the_messages_is_one_line(load):
    with pytest.raises(MilError, match="its chat template: .*no system"):
        load("llama2, Zephyr").conversation([{"role": "system", "content": "x"}])


# What the files say


@pytest.mark.parametrize(
    "about, files, stops",
    [
        ({}, {}, [264, 266]),
        ({"eos_token": "<|im_end|>"}, {}, [266, 264]),
        ({}, {"generation_config": {"eos_token_id": [265, 264]}}, [265, 264, 266]),
        ({}, {"config": {"eos_token_id": 265}}, [265, 264, 266]),
        ({}, {"config": {"ids": {"eos_token_id": [265]}, "format": "mil"}}, [265, 264, 266]),
        ({}, {"generation_config": {"eos_token_id": None}}, [264, 266]),
    ],
)
def test_all_that_the_files_name_ends_a_text(tmp_path, about, files, stops):
    assert beside(tmp_path, "smollm2", about, **files).stops == stops


def test_a_token_that_ends_a_text_is_a_control_token_even_where_the_file_does_not_say_so(tmp_path):
    data = copy.deepcopy(FILES["smollm2"])
    data["added_tokens"][2]["special"] = False
    tokenizer = beside(tmp_path, data, generation_config={"eos_token_id": 266})
    assert 266 not in tokenizer.encode("a<|im_end|>") and tokenizer.bytes_of(266) == b""


def test_a_vocabulary_may_leave_ids_out(tmp_path):
    data = copy.deepcopy(FILES["gpt2"])
    data["model"]["vocab"]["12"] = 400
    tokenizer = beside(tmp_path, data)
    assert tokenizer.size == 401 and tokenizer.encode("12") == [400]
    assert tokenizer.decode([400]) == "12" and tokenizer.bytes_of(399) == b""


@pytest.mark.parametrize(
    "name, data, told",
    [
        ("tokenizer.model", b"aGk= 0\nnot base64 1\n", "not lines of `base64 rank`"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "not lines of `base"),
        ("tokenizer.model", b"aGk= 5\n", "1 ranks are not 0 … 0"),
        ("tokenizer.model", b"", "lacks some of the 256"),
        ("tokenizer.json", b"{", "its tokenizer cannot be read"),
        ("tokenizer.json", b"\xff", "its tokenizer cannot be read"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "its tokenizer cannot be read"),
        ("other.json", b"{}", "no tokenizer; expected .*bytes.*gpt2"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MilError, match=told) as e:
        g.load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600


def test_what_is_not_installed_or_not_downloaded_is_said(tmp_path, monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no route")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    for source, told in ((str(tmp_path), "pip install transformers"), ("gpt2", "pass bytes or")):
        with pytest.raises(MilError, match=told):
            g.load_tokenizer(source)


def tiny(v):
    sizes = dict(d=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16, context=32)
    return build(Config(v=v, **sizes), torch.float32)


@pytest.mark.parametrize("kind", ["bytes", "meta", "smollm2, ChatML", "llama2, Zephyr"])
def test_a_tokenizer_and_its_files_travel_with_a_model(load, tmp_path, kind, monkeypatch, capsys):
    want = load(kind)
    source = str(want.folder or kind)
    (tmp_path / "bytes").mkdir()  # a name stays a name
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # from there, and onto itself
        g.save_with_tokenizer(tiny(want.size), "m", source)
        source = g.tokenizer_of("m")
    _, got = g.load_with_tokenizer("m")
    assert (got.vocabulary, got.begin, got.stops) == (want.vocabulary, want.begin, want.stops)
    assert got.conversation(TALK) == want.conversation(TALK) and not capsys.readouterr().err
    files = {path.name for path in want.folder.iterdir()} if want.folder else set()
    assert files <= {path.name for path in (tmp_path / "m").iterdir()}


@pytest.mark.parametrize("v", [250, 300])
def test_a_tokenizer_of_another_size_than_the_model_is_noted(tmp_path, capsys, v):
    g.save_with_tokenizer(tiny(v), tmp_path, "bytes")
    _, tokenizer = g.load_with_tokenizer(tmp_path)
    assert f"has 257 tokens, the model {v}\n" in capsys.readouterr().err
    assert tokenizer.bytes_of(299) == b""
