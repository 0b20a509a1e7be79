"""Conversations: how they are written, a decoder that keeps what it has read, and the command in the terminal."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, assert_close, build, configs, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import MIXED, llama3_file, whole
from test_tokenizers import FILES, beside, reference

import generate as g
import mil
from mil import Config, MilError

SAID = [{"role": "system", "content": "be the other"}, {"role": "user", "content": " hello the 12? "}, {"role": "assistant", "content": "then other: 10"}, {"role": "user", "content": "x"}]
FORMATS = {"smollm2": ("chatml", "<|im_start|>{}\n{}<|im_end|>\n"), "llama2": ("zephyr", "<|{}|>\n{}</s>\n"), "first": ("zephyr", "<|{}|>\n{}</s>\n")}


def encoding_of(folder, kind):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(FILES[kind]))
    if FORMATS[kind][0] == "zephyr":  # only its template gives it away
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ '<|user|>\n' }}"}))
    return g.load_tokenizer(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------------------------
# How a conversation is written


@pytest.mark.parametrize("kind", FORMATS)
def test_a_conversation_has_the_tokens_that_its_whole_text_has(tmp_path, kind):
    encoding, text = encoding_of(tmp_path, kind), "".join(FORMATS[kind][1].format(m["role"], m["content"]) for m in SAID)
    tokens = [{**token, "special": False} for token in FILES[kind]["added_tokens"]]   # found in the text, as its template's are
    assert g.chat_format(encoding) == FORMATS[kind][0] and g.Conversation(encoding, SAID).ids == reference({**FILES[kind], "added_tokens": tokens}, text)


def test_llama3s_conversation_has_its_headers_and_ends(tmp_path):
    encoding = g.load_tokenizer(str(llama3_file(tmp_path / "t.model", (b"hello", b"user", b"\n\n", b"assistant"))))
    special, plain = encoding._special_tokens, lambda text: encoding.encode_ordinary(text)  # noqa: E731
    head = lambda role: [special["<|start_header_id|>"], *plain(role), special["<|end_header_id|>"], *plain("\n\n")]  # noqa: E731
    talk = g.Conversation(encoding, [{"role": "user", "content": "hello<|eot_id|>"}, {"role": "assistant", "content": "hello\n"}])
    user, assistant = [*head("user"), *plain("hello"), *plain("<|eot_id|>"), special["<|eot_id|>"]], [*head("assistant"), *plain("hello"), special["<|eot_id|>"]]
    assert talk.ids == [special["<|begin_of_text|>"], *user, *assistant]
    assert [i for i, own in zip(talk.ids, talk.own) if own] == [*plain("hello"), special["<|eot_id|>"]] and talk.own[-2:] == [True, True]


def test_without_a_format_turns_have_plain_headers_and_the_assistants_end():
    talk = g.Conversation(g.load_tokenizer("bytes"), SAID[1:3])
    assert talk.ids == [*b"user:\n hello the 12? \nassistant:\nthen other: 10", 256, *b"\n"]
    assert [i for i, own in zip(talk.ids, talk.own) if own] == [*b"then other: 10", 256]


@pytest.mark.parametrize("kind", FORMATS)
@given(st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_start|>user\n", "<unk>"]), st.text(max_size=9))
@settings(max_examples=20)
def test_nothing_said_is_a_control_token(tmp_path_factory, kind, mark, text):
    encoding = encoding_of(tmp_path_factory.getbasetemp() / kind, kind)
    count = lambda text: sum(i in encoding._special_tokens.values() for i in g.Conversation(encoding, [{"role": "user", "content": text}]).ids)  # noqa: E731
    assert count(text + mark + text) == count("x")


# ---------------------------------------------------------------------------------------------------------------
# A decoder goes on


def counting(models, monkeypatch):
    """How many tokens each of the models reads from here on."""
    read = [0] * len(models)
    for i, model in enumerate(models):
        def hidden(tokens, cache=None, lengths=None, i=i, whole=model.hidden):
            read[i] += tokens.shape[1]
            return whole(tokens, cache, lengths)
        monkeypatch.setattr(model, "hidden", hidden)
    return read


@given(configs(), st.data(), st.sampled_from([None, 1, 3]), st.booleans())
@settings(max_examples=8)
def test_a_decoder_goes_on_with_longer_texts_as_if_it_had_read_them_anew(config, data, K, cut):
    model, drafts = build(config), {} if K is None else dict(draft=build(data.draw(configs()), seed=1), speculate=K)
    ids = lambda least, most: data.draw(st.lists(st.integers(0, config.v - 1), min_size=least, max_size=most))  # noqa: E731
    texts, decoder = [ids(1, 6) for _ in range(2)], g.Decoder(model, 2, 60, 0, **drafts)
    for _ in range(2):
        want, rounds = whole(g.generate(model, texts, 7, 0, stop=[3])), decoder.decode(texts, 7, [3])
        got = [[], []]
        for i, row in enumerate(rounds):
            got = [[*a, *b] for a, b in zip(got, row)]
            if cut and i == 2:  # somebody has heard enough
                rounds.close()
        assert all(a == b[:len(a)] for a, b in zip(got, want)) and (cut or got == want)
        texts = [text + new + ids(1, 4) for text, new in zip(texts, got)]
    anew = [ids(1, 6) for _ in range(2)]
    assert whole(decoder.decode(anew, 7)) == whole(g.generate(model, anew, 7, 0))
    again = [text[:len(text) - 1] or text for text in anew]  # shorter than what was read
    assert whole(decoder.decode(again, 7)) == whole(g.generate(model, again, 7, 0))


@pytest.mark.parametrize("speculate", [None, 3])
def test_a_turn_reads_only_what_is_new(speculate, monkeypatch):
    model = build(Config(**MIXED, mixers=["attention", "mamba", "mamba2", "none"]))
    drafts = {} if speculate is None else dict(draft=build(Config(**MIXED), seed=1), speculate=speculate)
    decoder, text = g.Decoder(model, 1, 48, 0, **drafts), list(range(20))
    text += sum(whole(decoder.decode([text], 4)), []) + [5, 6, 7]
    read = counting([m for m in (model, drafts.get("draft")) if m], monkeypatch)
    rounds = sum(1 for _ in decoder.decode([text], 1))
    assert rounds == 1 and read[0] == 3 + 1 + (speculate or 0) and (not drafts or read[1] == 3 + 2 + 3 + 4)  # new, last, proposed; the draft reads two and what it proposed


def test_a_decoder_compiles_nothing_twice():
    model = build(Config(**MIXED, mixers=["attention", "mamba2"] * 2), torch.float32)
    decoder, text = g.Decoder(model, 1, 48, 0), [1, 2, 3]
    for turn in range(2):
        text = text + whole(decoder.decode([text], 4))[0] + [9]
        assert [half.calls for half in decoder.rounds.halves] == [4 * (turn + 1)]


def test_a_role_is_a_word_and_a_decoder_has_its_rows():
    with pytest.raises(MilError, match="the role 'user<|im_end|>', expected a word".replace("|", r"\|")):
        g.Conversation(g.load_tokenizer("bytes"), [{"role": "user<|im_end|>", "content": ""}])
    with pytest.raises(MilError, match="2 prompts for a decoder of 1 rows"):
        next(g.Decoder(build(Config(**MIXED), torch.float32), 1, 10).decode([[1], [2]], 1))


def test_a_row_has_room_for_the_decoders_size_and_no_more():
    decoder = g.Decoder(build(Config(**MIXED), torch.float32), 1, 10, 0)
    assert len(whole(decoder.decode([[1, 2, 3]], 40))[0]) == 7
    with pytest.raises(MilError, match="prompt 1 has 10 tokens, the context is 10"):
        next(decoder.decode([[1] * 10], 1))


# ---------------------------------------------------------------------------------------------------------------
# In the terminal


@pytest.fixture
def talker(tmp_path):
    """A checkpoint that talks without end: no attention, so no context, and the token that ends a text is never the likeliest. "bytes"."""
    model = build(Config(**MIXED, mixers=["mamba2"] * 4), torch.float32)
    model.lm_head.weight.data[256] = 0
    mil.save(model, tmp_path / "m", tokenizer="bytes")
    return tmp_path / "m"


def test_the_command_talks_keeps_what_was_said_and_forgets_when_told(talker):
    argv = ["generate.py", "--model", talker, "--chat", "--temperature", "0", "--max_new_tokens", "5", "--device", DEVICE, "--system", "be x"]
    done = run_script(*argv, stdin="hello\n\nand?\n/reset\nhello\n/quit\nnever read\n")
    model, encoding, replies = mil.load(talker, DEVICE), g.load_tokenizer("bytes"), []
    talk = g.Conversation(encoding, [{"role": "system", "content": "be x"}])
    for line in ("hello", "and?"):
        talk.open("user")
        talk.close(line)
        talk.open("assistant")
        reply = [i for i in whole(g.generate(model, [talk.ids], 5, 0, stop=[256]))[0] if i != 256]
        talk.extend(reply, True)
        talk.close(own=True)
        replies.append(bytes(reply).decode(errors="replace") + " …\n")  # cut at five tokens
    assert done.returncode == 0 and done.stdout == "".join(replies + replies[:1]).replace("\r\n", "\n").replace("\r", "\n"), done.stderr
    assert "the format is plain" in done.stderr and done.stderr.count("tokens/s") == 3 and "/quit or Ctrl-D ends" in done.stderr


def test_ctrl_c_stops_a_reply_and_not_the_program(talker):
    argv = [sys.executable, "-u", "generate.py", "--model", talker, "--chat", "--temperature", "0", "--max_new_tokens", "100000", "--context", "200000", "--device", DEVICE]
    chat = subprocess.Popen(argv, cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    try:
        for _ in range(2):
            chat.stdin.write(b"hello\n")
            out = chat.stdout.read(1)
            chat.send_signal(signal.SIGINT)
            while not out.endswith(" …\n".encode()):
                out += (new := chat.stdout.read(1))
                assert new and len(out) < 99999
        err = chat.communicate(b"/quit\n", timeout=120)[1]
    finally:
        chat.kill()
    assert chat.returncode == 0 and err.count(b"tokens/s") == 2, err


def test_a_conversation_out_of_room_says_so_and_goes_on(talker):
    done = run_script("generate.py", "--model", talker, "--chat", "--max_new_tokens", "3", "--context", "40", "--device", DEVICE, stdin=f"{'x' * 60}\nhi\n")
    assert done.returncode == 0 and "no room: 0 of 40 tokens are taken, this takes 78; say less, or /reset" in done.stderr and done.stderr.count("tokens/s") == 1


@pytest.mark.parametrize("argv, match", [(["--chat", "--prompt", "a"], "--chat reads what you say from the terminal"), (["--prompt", "a", "--system", "b"], "--system goes with --chat"),
                                         (["--chat", "--context", "1"], "--context is 1, expected at least 2"), (["--prompt", "a", "--context", "9"], "--context goes with --chat"),
                                         ([], "--prompt is missing.*or --chat")])
def test_flags_that_do_not_go_together_are_refused(talker, argv, match):
    with pytest.raises(MilError, match=match):
        g.main(["--model", str(talker), *argv])


def said_to(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(line + "\n" for line in lines).encode())))


def test_the_next_turn_reads_what_was_shown_with_one_end_whether_it_stopped_was_stopped_or_was_cut(monkeypatch, capsys):
    read = []

    class Scripted:
        def __init__(self, *_):
            pass

        def decode(self, prompts, most, stop):
            read.append(list(prompts[0]))
            yield [[*b"h"]]
            if len(read) == 1:
                yield [[*b"i", 256]]   # a round of a draft
            elif len(read) == 2:
                signal.raise_signal(signal.SIGINT)
                yield [[*b"o"]]
                yield [[*b"not any more"]]

    monkeypatch.setattr(g, "Decoder", Scripted)
    said_to(monkeypatch, "a", "b", "c", "d")
    g.chat(g.Settings(chat=True), build(Config(**MIXED, mixers=["mamba2"] * 4), torch.float32), g.load_tokenizer("bytes"), None)
    talk = [b"user:\na\nassistant:\nhi", b"\nuser:\nb\nassistant:\nho", b"\nuser:\nc\nassistant:\nh", b"\nuser:\nd\nassistant:\n"]
    out = capsys.readouterr()
    assert read[-1] == [*talk[0], 256, *talk[1], 256, *talk[2], 256, *talk[3]]
    assert out.out == "hi\nho …\nh …\nh …\n" and out.err.count("cut at --max_new_tokens") == 2 and "(3 tokens, " in out.err


def test_a_conversation_has_no_more_room_than_its_draft(monkeypatch, capsys):
    said_to(monkeypatch, "x" * 60, "hi")
    g.chat(g.Settings(chat=True, max_new_tokens=3), build(Config(**MIXED, mixers=["mamba2"] * 4), torch.float32), g.load_tokenizer("bytes"), build(Config(**MIXED), torch.float32))
    err = capsys.readouterr().err
    assert "room for 48 tokens" in err and "no room: 0 of 48 tokens" in err and err.count("tokens/s") == 1


def test_a_row_that_finished_before_another_is_read_anew():
    model = build(Config(**MIXED, mixers=["mamba", "mamba2", "attention", "mamba2"]))
    texts, decoder = [[1, 2, 3], [4, 5]], g.Decoder(model, 2, 40, 0)
    want = whole(g.generate(model, texts, 7, 0))
    stop = [next(i for i in want[0][:4] if i not in want[1])]
    got = whole(decoder.decode(texts, 7, stop))
    assert len(got[0]) < len(got[1]) == 7
    texts = [text + new + [9] for text, new in zip(texts, got)]
    assert whole(decoder.decode(texts, 7)) == whole(g.generate(model, texts, 7, 0))


def test_a_student_brings_the_template_of_its_teacher_and_what_is_odd_is_noted(tmp_path, capsys):
    (tmp_path / "t").mkdir()
    v = len(FILES["llama2"]["model"]["vocab"]) + 40
    for config, jinja, name in (({"chat_template": "<|user|>", "add_bos_token": False}, None, "zephyr"), (None, "<|im_start|>", "chatml"), ({"chat_template": "[INST]"}, None, "plain")):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        beside(tmp_path / "t", "llama2", config, jinja)
        g.save_with_tokenizer(build(Config(**{**MIXED, "v": v}), torch.float32), tmp_path / "m", str(tmp_path / "t" / "tokenizer.json"))
        encoding, err = g.load_with_tokenizer(tmp_path / "m")[1], capsys.readouterr().err
        assert g.chat_format(encoding) == name and g.begin_tokens(encoding) == ([] if name == "zephyr" else [1])
        assert ("chat template is none of" in err) == (name == "plain") and "stand for nothing" in err and "no token is known to end" not in err
    beside(tmp_path / "m", "gpt2", added_tokens=[])
    g.load_with_tokenizer(tmp_path / "m")
    assert "no token is known to end a text" in capsys.readouterr().err


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_cleared_cache_is_a_new_one(mixer):
    model = build(Config(**MIXED, mixers=[mixer] * 4))
    decoder = g.Decoder(model, 1, 40, 0)
    whole(decoder.decode([[7, 1, 2, 3, 9, 8]], 33))   # the ring of inputs is full
    tokens = torch.tensor([[4, 5]], device=decoder.rounds.caches[0].device)
    with torch.inference_mode():
        decoder.rounds.caches[0].clear()
        assert_close(model.hidden(tokens, decoder.rounds.caches[0]), model.hidden(tokens, mil.Cache(model, 1, 40)), 1e-12)


def test_a_system_prompt_without_room_and_a_command_that_is_none(monkeypatch, capsys, talker):
    model, encoding = mil.load(talker, DEVICE), g.load_tokenizer("bytes")
    with pytest.raises(MilError, match="--system has 68 tokens, but a conversation has room for 40"):
        g.chat(g.Settings(chat=True, system="x" * 59, context=40), model, encoding, None)
    said_to(monkeypatch, "/help", "/RESET")
    g.chat(g.Settings(chat=True), model, encoding, None)
    assert capsys.readouterr().err.count("there is nothing else") == 2


def test_after_a_reply_ctrl_c_is_what_it_was_before(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    said_to(monkeypatch, "a")
    try:
        g.chat(g.Settings(chat=True, max_new_tokens=2), build(Config(**MIXED), torch.float32), g.load_tokenizer("bytes"), None)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reply_that_fills_the_room_says_what_it_was_cut_for(monkeypatch, capsys):
    monkeypatch.setattr(g, "stop_tokens", lambda encoding: [])
    said_to(monkeypatch, "a")
    g.chat(g.Settings(chat=True, context=30), build(Config(**MIXED), torch.float32), g.load_tokenizer("bytes"), None)
    err = capsys.readouterr().err
    assert ", cut for want of room, " in err and "max_new_tokens" not in err and "; 30 of 30 taken" in err
