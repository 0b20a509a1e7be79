"""The conversation in the terminal, and what a command does when its surroundings fail."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, build, run_script
from test_generate import MIXED, llama3_file, scripted, whole

import generate as g
import mil
from mil import Config, MilError


@pytest.fixture
def talker(tmp_path):
    """A checkpoint that talks without end: no attention, so no context; never the stop token."""
    model = build(Config(**MIXED, mixers=["mamba2"] * 4), torch.float32)
    model.lm_head.weight.data[256] = 0
    mil.save(model, tmp_path / "m", tokenizer="bytes")
    return str(tmp_path / "m")


def said_to(monkeypatch, *lines):
    data = "".join(line + "\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def chat(model, *flags):
    g.main(["--model", model, "--chat", "--temperature", "0", "--device", DEVICE, *flags])


def test_each_turn_is_the_reply_to_all_that_was_said(talker, monkeypatch, capsys):
    said_to(monkeypatch, "hello", "", "and?", "/help", "/reset", "hello", "/quit", "never read")
    chat(talker, "--max_new_tokens", "5", "--system", "be x")
    model, tokenizer = mil.load(talker, DEVICE), g.load_tokenizer("bytes")
    messages, replies = [{"role": "system", "content": "be x"}], []
    ids = tokenizer.conversation(messages)[0]
    for line in ("hello", "and?"):
        ids += tokenizer.encode(f"user:\n{line}\nassistant:\n")
        reply = whole(g.generate(model, [ids], 5, 0, stop=[256]))[0]
        ids += [*reply, 256, 10]
        replies.append(bytes(reply).decode(errors="replace") + " …\n")  # cut at five tokens
    out, err = capsys.readouterr()
    assert out == "".join(replies + replies[:1])
    assert err.count("5 tokens, cut at --max_new_tokens, ") == 3 and "nothing else" in err


def test_the_next_turn_reads_what_the_model_said_with_one_end(talker, monkeypatch, capsys):
    read = []

    class Scripted:
        def __init__(self, *_):
            pass

        def decode(self, prompts, most, stop):
            read.append(list(prompts[0]))
            yield [[*b"h"]]
            if len(read) == 1:
                yield [[*b"i", 256]]  # a round of a draft
            elif len(read) == 2:
                signal.raise_signal(signal.SIGINT)
                yield [[0xC3]]
                yield [[*b"not any more"]]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(g, "Decoder", Scripted)
    said_to(monkeypatch, "a", "b", "c", "d")
    chat(talker)
    turns = [b"user:\na\nassistant:\nhi", b"\nuser:\nb\nassistant:\nh\xc3"]
    turns += [b"\nuser:\nc\nassistant:\nh", b"\nuser:\nd\nassistant:\n"]
    assert read[-1] == [*turns[0], 256, *turns[1], 256, *turns[2], 256, *turns[3]]
    out, err = capsys.readouterr()
    assert out == "hi\nh\ufffd …\nh …\nh …\n" and err.count("cut at") == 2 and "(3 tokens, " in err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_turn_reads_only_what_is_new():
    model = build(Config(**MIXED, mixers=["attention", "mamba", "mamba2", "none"]))
    decoder, text, read = g.Decoder(model, 1, 48, 0), list(range(20)), []
    text += [*whole(decoder.decode([text], 4))[0], 5, 6, 7]
    want, hidden = whole(g.generate(model, [text], 3, 0)), model.hidden

    def counted(tokens, *rest, **more):
        read.append(tokens.shape[1])
        return hidden(tokens, *rest, **more)

    model.hidden = counted
    assert whole(decoder.decode([text], 3)) == want and sum(read) <= 4 + 3


def test_a_conversation_out_of_room_says_so_and_goes_on(talker, monkeypatch, capsys):
    said_to(monkeypatch, "x" * 60, "hi")
    chat(talker, "--max_new_tokens", "30", "--context", "40")
    err = capsys.readouterr().err
    assert "no room: 0 of 40 tokens are taken, this takes 78; say less" in err
    assert ", cut for want of room, " in err and "; 40 of 40 taken" in err


def test_ctrl_c_stops_a_reply_and_not_the_program(talker):
    flags = ["--model", talker, "--chat", "--max_new_tokens", "100000", "--context", "200000"]
    argv, pipe = [sys.executable, "-u", "generate.py", *flags, "--device", DEVICE], subprocess.PIPE
    folder = Path(__file__).parent.parent
    talk = subprocess.Popen(argv, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    try:
        for _ in range(2):
            talk.stdin.write(b"hello\n")
            out = talk.stdout.read(1)
            talk.send_signal(signal.SIGINT)
            while not out.endswith(" …\n".encode()):
                out += (new := talk.stdout.read(1))
                assert new and len(out) < 99999
        err = talk.communicate(b"/quit\n", timeout=120)[1]
    finally:
        talk.kill()
    assert talk.returncode == 0 and err.count(b"tokens/s") == 2, err


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--chat", "--prompt", "a"], "--chat reads what you say from the terminal"),
        (["--prompt", "a", "--system", "b"], "--system goes with --chat"),
        (["--chat", "--context", "1"], "--context is 1, expected at least 2"),
        (["--prompt", "a", "--context", "9"], "--context goes with --chat"),
        (["--prompt", "a", "--temperature", "1e-46"], "--temperature is 1e-46, expected 0"),
        (["--prompt", "\udcff"], "prompt 1 is not UTF-8 text"),
        ([], "--prompt is missing.*or --chat"),
    ],
)
def test_flags_that_cannot_work_are_refused(talker, argv, match):
    with pytest.raises(MilError, match=match):
        g.main(["--model", talker, *argv])


@pytest.mark.parametrize(
    "redirection, code, line",
    [
        (">/dev/full", 1, "error: [Errno 28] No space left on device\n"),
        (">&-", 0, "2 tokens in"),
        ("--prompt - <&-", 1, "error: prompt 2 is empty: there is nothing to continue\n"),
    ],
)
def test_a_closed_or_full_stream_is_one_line(talker, redirection, code, line):
    command = f"{sys.executable} generate.py --model {talker} --prompt a --max_new_tokens 2"
    done = run_script(
        "-c", f"import os, sys; sys.exit(os.system({command + ' ' + redirection!r}) >> 8)"
    )
    assert (done.returncode, done.stderr.count("\n")) == (code, 1) and line in done.stderr
    assert not done.stdout


def test_a_llama3_reads_the_next_turn_as_its_template_writes_it(tmp_path, monkeypatch):
    path, seen = str(llama3_file(tmp_path / "tokenizer.model")), []
    model = build(Config(**{**MIXED, "v": 517}, mixers=["mamba2"] * 4), torch.float32)
    g.save_with_tokenizer(model, tmp_path / "m", path)
    monkeypatch.setattr(g, "Decoder", scripted([[[259]], [[270]]], seen))  # hello<|eot_id|>
    said_to(monkeypatch, "a", "b")
    chat(str(tmp_path / "m"))
    talk = [("user", "a"), ("assistant", "hello"), ("user", "b")]
    talk = [{"role": role, "content": content} for role, content in talk]
    assert seen[1][-3] == [g.load_tokenizer(path).conversation(talk, reply=True)[0]]


def test_a_template_that_rewrites_the_past_is_read_anew(talker, monkeypatch):
    seen, write = [], g.Tokenizer.write
    monkeypatch.setattr(
        g.Tokenizer, "write", lambda self, m, reply: str(len(m)) + write(self, m, reply)
    )
    monkeypatch.setattr(g, "Decoder", scripted([[[*b"x"]], [[256]]], seen))
    said_to(monkeypatch, "a", "b")
    chat(talker)
    assert [bytes(prompts[0][:6]) for *_, prompts, _, _ in seen] == [b"1user:", b"3user:"]
