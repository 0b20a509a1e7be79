"""tokenizer.json: what is read of it, against a slow encoder written here from the format's description and, where installed, the library."""
import copy
import functools
import json
import operator
import random
import time
from collections import Counter

import conftest  # noqa: F401 (it chooses Triton's interpreter before kernels.py is imported)
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

import generate as g
from mil import MilError

HARD = ["", " ", "  ", "     ", "\n", "\r\n", "\t", " \n", "\n ", "\n\n\n  x", "a b", " a", "   a  b   ", "trailing  ", "x \n\n y\r\n\r\n z", "\t\tx\t ", "\xa0x\u3000 \x85y",
        "12345 6 78  9", "a1b22  c333d", "  1", "1  x", "x 1 2\n3", "3.14, ½ ²", "it's I'LL don't 's 't're ''ve x'd", "'ſ it’s", "!!! ?! -- ...", " !\n\n", "x=[1,2];\n",
        "def f(x):\n    if x:\n        return  x + 10  # 日本\n\n\nclass A:\n\tpass\n", "the then other the  the", "hello hello Hello HELLO", "👩‍👩‍👧‍👦 👍🏽🇩🇪", "日本語 漢字、中文",
        "한국어 العربية", "e\u0301 \u0301a\u0300 é ß ẞ", "▁", " ▁", "▁ ", "▁▁a▁b", "▁Hello▁", "\0", "a\0 b\x1f\x7f", "\u200b\ufeff\u2028", "\ufffd\ufffe\U0010ffff", "<0x0A><0xE2>",
        "<s>", " </s> x", "a<unk>b", "<|begin_of_text|>", "x<|endoftext|> y<|eot_id|>", "<|im_end|>", "a" * 70, " " * 70, "\n" * 40, "1" * 41, "▁" * 33, "ab " * 30, "é" * 30, "🙂" * 9]
SAMPLE = "\n".join(HARD) + " the other thing, then another: ten tests don't test it's 100 times 2024\n" * 3
ADDED = ["<think>", "<think>the", "  \n", "<日>"]
SNIPPETS = [*" \n\t1a'▁é日🙂", "  ", "   ", "\r\n", " 1", "12", "345", "'s", "'LL", "the", " the", "hello", "other", "\u0301", "\u200d", "!!", "    x", "<s>", "</s>", "<0x41>",
            "<|begin_of_text|>", "<|endoftext|>", *ADDED]
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])  # a character of next year's Unicode is a letter in one library and not yet in the other
TEXTS = st.lists(st.sampled_from(SNIPPETS) | st.text(ASSIGNED, max_size=3), max_size=12).map("".join)

# ---------------------------------------------------------------------------------------------------------------
# Files. The byte-level vocabulary has merges across every border of words: a text cut at the wrong place has other tokens

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTER = {**{b: chr(b) for b in PRINTABLE}, **{b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}}
CUT, WHOLE = ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut} for cut in (True, False))
DIGITS = {"type": "Digits", "individual_digits": True}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}


def sequence(*steps):
    """The pre-tokenizers one after the other; a string is a pattern to split by."""
    return {"type": "Sequence", "pretokenizers": [s if isinstance(s, dict) else {"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in steps]}


def train(words, n):
    """Byte pair encoding: n times, the commonest pair of neighbours becomes one."""
    merges = []
    for _ in range(n):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        words = [merge(word, {merges[-1]: 0}) for word in words]
    return merges


def all_splits(vocab):
    """Merges as converters write them: every split of a token into two tokens, in the order of the tokens."""
    return [f"{t[:i]} {t[i:]}" for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]


def data_of(vocab, merges, special, pre_tokenizer, normalizer=None, extra=(), **model):
    after = 1 + max([*vocab.values(), *special.values()])
    tokens = [*((t, i, True) for t, i in special.items()), *((t, after + i, False) for i, t in enumerate(extra))]
    return {"version": "1.0", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": None,
            "added_tokens": [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=s) for t, i, s in tokens],
            "model": {"type": "BPE", "unk_token": None, "vocab": vocab, "merges": merges, **model}}


def changed(data, **places):
    """A copy with other values: model__type="WordPiece" is data["model"]["type"] = "WordPiece"; None takes the entry out."""
    data = copy.deepcopy(data)
    for place, value in places.items():
        *way, last = (int(k) if k.isdigit() else k for k in place.split("__"))
        at = functools.reduce(operator.getitem, way, data)
        at[last] = value
        if value is None:
            del at[last]
    return data


def shuffled(x):
    return random.Random(0).sample(x, len(x))


def build_files():
    merges, files, lines = train([[LETTER[b] for b in SAMPLE.encode()]], 250), {}, "▁" + SAMPLE.replace(" ", "▁")
    plain = {t: i for i, t in enumerate([*LETTER.values(), *map("".join, merges)])}
    first, after = ({t: start + i for i, t in enumerate(names)} for start, names in (
        (0, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), (len(plain), ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])))
    rare = {LETTER[b] for b in (4, 6, 19, 20, 22, 29, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 256))}  # the single bytes that SmolLM2's vocabulary lacks
    pieces = [m for m in train([list(word) for word in regex.findall("▁?[^▁]+|▁+(?=▁|$)", lines)], 250) if "\n" not in "".join(m)]
    characters = [c for c, n in Counter(lines).most_common() if n > 2 and c != "\n" or c in "".join(map("".join, pieces))]
    control = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*control, *(f"<0x{b:02X}>" for b in range(256)), *map("".join, pieces), *characters]))}
    fallback, space = dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True), {"type": "Metaspace", "replacement": "▁", "split": False}
    for name, extra in (("", ()), (", added", ADDED)):
        files |= {"gpt2" + name: data_of({**plain, "<|endoftext|>": len(plain)}, [*map(" ".join, merges)], {"<|endoftext|>": len(plain)}, CUT, extra=extra),
                  "llama3" + name: data_of(plain, all_splits(plain), after, sequence(LLAMA3, WHOLE), extra=extra, ignore_merges=True),
                  "smollm2" + name: data_of({t: i for i, t in enumerate(t for t in (*first, *plain) if t not in rare)}, merges, first, sequence(DIGITS, CUT), extra=extra),
                  "digits" + name: data_of({t: i for i, t in enumerate((*first, *plain))}, merges, first, sequence(DIGITS, CUT), extra=extra),
                  "llama2" + name: data_of(vocab, all_splits(vocab), control, None, PREPEND, extra, **fallback),
                  "first" + name: data_of(vocab, pieces, control, {**space, "prepend_scheme": "first"}, None, extra, **fallback),
                  "always" + name: data_of(vocab, pieces, control, {**space, "prepend_scheme": "always"}, None, extra, **fallback)}
    # Nobody is known to have one of these: to refuse them is fine, to read them otherwise than the library is not
    odd = {"ids in no order": data_of(dict(zip(plain, shuffled(range(len(plain))))), merges, {}, CUT),
           "merges in no order": data_of(plain, shuffled(merges), {}, CUT),
           "pieces in no order": data_of(vocab, shuffled(pieces), control, None, PREPEND, **fallback),
           "a split with gaps": data_of(plain, merges, {}, sequence(r"\p{N}{1,3}|\p{L}+", WHOLE)),
           "three splits": data_of(plain, merges, {}, sequence(r"\p{N}{1,3}", "[一-龥]+", LLAMA3, WHOLE)),
           "two patterns": data_of(plain, merges, {}, sequence(LLAMA3, CUT)),
           "no prefix": data_of(vocab, pieces, control, {**space, "prepend_scheme": "never"}, **fallback),
           "a space within": data_of({**vocab, "a▁t": len(vocab)}, [("a", "▁t"), *pieces], control, None, PREPEND, **fallback)}
    return files, odd


# ---------------------------------------------------------------------------------------------------------------
# The slow encoder


def merge(symbols, rank):
    """The neighbours of least rank become one, the leftmost first, until none has a rank."""
    symbols = list(symbols)
    while found := [(rank[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in rank]:
        i = min(found)[1]
        symbols[i:i + 2] = ["".join(symbols[i:i + 2])]
    return symbols


def cut(pattern, parts):
    """Each part cut before and after whatever matches."""
    return [new for part in parts for new in regex.split(f"({pattern})", part) if new]


def words_of(data, part, first):
    """A part of the text, free of added tokens and the first or not, as words: lists of symbols of the vocabulary."""
    vocab, step = data["model"]["vocab"], data["pre_tokenizer"]
    if data["model"].get("byte_fallback"):
        part = part.replace(" ", "▁")
        wanted = not step or not part.startswith("▁") and {"first": first, "always": True, "never": False}[step["prepend_scheme"]]
        return [[s for c in "▁" * wanted + part for s in ([c] if c in vocab else [f"<0x{b:02X}>" for b in c.encode()])]]
    parts = [part]
    for step in step.get("pretokenizers", [step]):
        pattern = {"Split": lambda: step["pattern"]["Regex"], "Digits": lambda: r"\p{N}", "ByteLevel": lambda: GPT2 if step["use_regex"] else "(?s:.+)"}
        parts = cut(pattern[step["type"]](), parts)
    return [[LETTER[b] for b in part.encode() if LETTER[b] in vocab] for part in parts]


def reference(data, text):
    """The tokens of `text`, without the begin token."""
    vocab, names, ids = data["model"]["vocab"], {t["content"]: t["id"] for t in data["added_tokens"] if not t["special"]}, []
    rank = {tuple(m.split(" ") if isinstance(m, str) else m): i for i, m in enumerate(data["model"]["merges"])}
    for i, part in enumerate(cut("|".join(map(regex.escape, sorted(names, key=len, reverse=True))) or "(?s:.+)", [text])):
        if part in names:
            ids.append(names[part])
            continue
        for word in words_of(data, part, first=i == 0):
            whole = data["model"].get("ignore_merges") and "".join(word) in vocab
            ids += [vocab[s] for s in (["".join(word)] if whole else merge(word, rank))]
    return ids


# ---------------------------------------------------------------------------------------------------------------
# What is read

FILES, ODD = build_files()
BEGIN = {kind: [t["id"] for t in data["added_tokens"] if t["content"] in ("<s>", "<|begin_of_text|>")] for kind, data in {**FILES, **ODD}.items()}
FIXED = [*HARD, SAMPLE, "<think>", "a<think>the <think>b  \n  \nx", " <think> <日>", *("".join(random.Random(i).choices(SNIPPETS, k=9)) for i in range(100))]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(kind): the encoding generate.py makes of the file, None if it refuses an odd one."""
    def load(kind):
        path = tmp_path_factory.mktemp("t") / "tokenizer.json"
        path.write_text(json.dumps({**FILES, **ODD}[kind]), encoding="utf-8")
        try:
            return g.load_tokenizer(str(path))
        except MilError:
            if kind in FILES:
                raise
    return functools.cache(load)


@pytest.mark.parametrize("kind", [*FILES, *ODD])
def test_hard_texts_become_the_tokens_of_the_slow_encoder(load, kind):
    for text in FIXED if load(kind) else []:
        assert g.encode(load(kind), text) == BEGIN[kind] + reference({**FILES, **ODD}[kind], text), text


@pytest.mark.parametrize("kind", FILES)
@given(TEXTS)
def test_any_text_becomes_the_tokens_of_the_slow_encoder(load, kind, text):
    assert g.encode(load(kind), text) == BEGIN[kind] + reference(FILES[kind], text)


@pytest.mark.parametrize("kind", [*FILES, *ODD])
def test_the_library_gives_the_same_tokens(load, kind):
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps({**FILES, **ODD}[kind]))
    tokenizer.encode_special_tokens = True  # as plain text
    for text in FIXED:
        want = tokenizer.encode(text, add_special_tokens=False).ids
        assert reference({**FILES, **ODD}[kind], text) == want, text
        assert not load(kind) or g.encode(load(kind), text) == BEGIN[kind] + want, text


@pytest.mark.parametrize("kind", [kind for kind in FILES if "added" not in kind])
@given(TEXTS)
def test_the_tokens_bytes_are_the_text_again_after_the_space_of_sentencepiece(load, kind, text):
    vocab = FILES[kind]["model"]["vocab"]
    space = " " if text and kind in ("llama2", "first", "always") and (kind == "llama2" or text[0] not in " ▁") else ""
    want = (space + text.replace("▁", " ")).encode() if "<0x00>" in vocab else bytes(b for b in text.encode() if LETTER[b] in vocab)
    assert b"".join(g.token_bytes(load(kind), i) for i in g.encode(load(kind), text)) == want


@pytest.mark.parametrize("kind", FILES)
def test_no_text_makes_a_control_token_and_control_tokens_make_no_text_but_other_added_tokens_do(load, kind):
    for token in FILES[kind]["added_tokens"]:
        assert (token["id"] in g.encode(load(kind), f"x{token['content']}y")[1:]) != token["special"]
        assert g.token_bytes(load(kind), token["id"]) == (b"" if token["special"] else token["content"].encode())
    assert load(kind).n_vocab == 1 + max([*FILES[kind]["model"]["vocab"].values(), *(t["id"] for t in FILES[kind]["added_tokens"])])


@pytest.mark.parametrize("kind, stops", [("gpt2", ["<|endoftext|>"]), ("smollm2", ["<|endoftext|>"]), ("llama3", ["<|end_of_text|>", "<|eot_id|>"]), ("first", ["</s>"])])
def test_the_token_that_ends_a_document_is_the_first_to_stop_at(load, kind, stops):
    numbers = {t["content"]: t["id"] for t in FILES[kind]["added_tokens"]}
    assert g.stop_tokens(load(kind))[:len(stops)] == [numbers[t] for t in stops]


@pytest.mark.parametrize("kind", FILES)
def test_half_a_surrogate_pair_is_the_replacement_character(load, kind):
    assert g.encode(load(kind), "a\ud83d b\ude42") == g.encode(load(kind), "a\ufffd b\ufffd")


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama2", "first"])
def test_a_long_text_takes_no_squares_of_time(load, kind):
    began = time.perf_counter()
    assert all(g.encode(load(kind), unit * 30_000) for unit in ("a", " ", "▁", "é1\n"))
    assert time.perf_counter() - began < 10


# ---------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("kind, place, value, found", [
    ("gpt2", "model", None, "model"), ("gpt2", "model__type", "WordPiece", "WordPiece"), ("llama2", "model__type", "Unigram", "Unigram"),
    ("gpt2", "pre_tokenizer__type", "Whitespace", "Whitespace"), ("digits", "pre_tokenizer__pretokenizers__0__type", "Punctuation", "Punctuation"),
    ("gpt2", "pre_tokenizer__add_prefix_space", True, "add_prefix_space"), ("llama3", "pre_tokenizer__pretokenizers__0__behavior", "Removed", "Removed"),
    ("gpt2", "normalizer", {"type": "NFC"}, "NFC"), ("llama2", "normalizer__normalizers__1__type", "Lowercase", "Lowercase"),
    ("llama3", "pre_tokenizer__pretokenizers__0__pattern__Regex", "(oops", r"\(oops"), ("llama3", "model__vocab__zzz", 999, "zzz"),
    ("llama2", "model__vocab__<0x41>", None, "0x41|byte"), ("gpt2", "model__merges__0", "zz yy", "zz"),
    ("gpt2", "model__vocab", None, "vocab"), ("gpt2", "model__merges", None, "merges")])
def test_a_file_of_another_kind_or_damaged_is_refused_and_what_was_found_is_named(tmp_path, kind, place, value, found):
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(FILES[kind], **{place: value})))
    with pytest.raises(MilError, match=found) as e:
        g.load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert str(tmp_path / "tokenizer.json") in str(e.value)


@pytest.mark.parametrize("data", [b"{", b"", b"\xff\xfe{}", b"[1]", b"3"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(MilError, match="tokenizer.json"):
        g.load_tokenizer(str(tmp_path / "tokenizer.json"))
