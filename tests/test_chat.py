"""The conversation in the terminal, and what a command does when its surroundings fail."""

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEVICE, llama3_file
from test_generate import command, decoding, greedy, saved, scripted, tiny

import generate as g
import mil

FOLDER = Path(__file__).parent.parent


@pytest.fixture
def talker(tmp_path):
    """A checkpoint that talks without end: no attention, so no context; never the stop token."""
    model = tiny(["mamba2"] * 4)
    model.lm_head.weight.data[256] = 0
    return saved(model, tmp_path / "talker")


@pytest.fixture
def chat(monkeypatch, capsys):
    """What the command prints to a user who says these lines: its output and its notes."""

    def said(model, lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        g.main(command(model, "--chat", "--temperature", 0, *flags))
        return capsys.readouterr()

    return said


def test_each_turn_is_the_reply_to_all_that_was_said(talker, chat):
    lines = "hello", "", "and?", "/help", "/reset", "hello", "/quit", "never read"
    out, err = chat(talker, lines, "--max_new_tokens", 5, "--system", "be x")
    model, tokenizer = mil.load(talker, DEVICE), g.load_tokenizer("bytes")
    ids, replies = tokenizer.encode("system:\nbe x\n"), []
    for line in ("hello", "and?"):
        ids += tokenizer.encode(f"user:\n{line}\nassistant:\n")
        (reply,) = greedy(model, [ids], 5)
        ids += [*reply, 256, 10]
        replies.append(bytes(reply).decode(errors="replace") + " …\n")  # cut at five tokens
    assert out == "".join(replies + replies[:1])
    assert err.count("(5 tokens, ") == 3 and "nothing else" in err


def test_the_next_turn_reads_what_the_model_said_with_one_end(talker, chat, monkeypatch):
    read = []

    def decode(*args):
        read.append(bytes(i % 256 for i in args[-3][0]))  # the prompt, its stop tokens as 0
        yield [[*b"h"]]
        if len(read) == 1:
            yield [[*b"i", 256]]  # a round of a draft
        elif len(read) == 2:
            signal.raise_signal(signal.SIGINT)
            yield [[0xC3]]
            yield [[*b"not any more"]]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(g, "Decoder", decoding(decode))
    out, err = chat(talker, "abcd")
    turns = [b"user:\na\nassistant:\nhi\0\n", b"user:\nb\nassistant:\nh\xc3\0\n"]
    assert read[-1] == b"".join(turns) + b"user:\nc\nassistant:\nh\0\nuser:\nd\nassistant:\n"
    assert out == "hi\nh\ufffd …\nh …\nh …\n" and "(3 tokens, " in err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_out_of_room_says_so_and_goes_on(talker, chat, tmp_path):
    _, err = chat(talker, ["x" * 60, "hi"], "--max_new_tokens", 30, "--context", 40)
    assert "(prompt 1 has 78 tokens, the context is 40" in err and "/reset begins anew" in err
    assert "; 40 of 40 taken" in err
    draft = saved(tiny(context=24), tmp_path / "draft")
    _, err = chat(talker, ["x" * 6], "--draft", draft)
    assert "(prompt 1 has 24 tokens, the context is 24" in err


def test_a_llama3_reads_the_next_turn_as_its_template_writes_it(chat, monkeypatch, tmp_path):
    path, seen = llama3_file(tmp_path / "tokenizer.model"), []
    model = saved(tiny(["mamba2"] * 4, v=520), tmp_path / "model", path)
    monkeypatch.setattr(g, "Decoder", scripted([[[259]], [[273]]], seen))  # hello<|eot_id|>
    chat(model, "ab")
    talk = [("user", "a"), ("assistant", "hello"), ("user", "b")]
    talk = [{"role": role, "content": content} for role, content in talk]
    assert seen[1][-3] == [g.load_tokenizer(path).conversation(talk, reply=True)[0]]


def test_a_template_that_rewrites_the_past_is_read_anew(talker, chat, monkeypatch):
    def write(self, messages, reply, write=g.Tokenizer.write):
        return str(len(messages)) + write(self, messages, reply)

    seen = []
    monkeypatch.setattr(g.Tokenizer, "write", write)
    monkeypatch.setattr(g, "Decoder", scripted([[[*b"x"]], [[256]]], seen))
    chat(talker, "ab")
    assert [bytes(prompts[0][:6]) for *_, prompts, _, _ in seen] == [b"1user:", b"3user:"]


def test_ctrl_c_stops_a_reply_and_not_the_program(talker):
    flags = command(talker, "--chat", "--max_new_tokens", 100000, "--context", 200000)
    argv, pipe = [sys.executable, "-u", "generate.py", *flags], subprocess.PIPE
    talk = subprocess.Popen(argv, cwd=FOLDER, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
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
    "redirection, code, told",
    [
        (">/dev/full", 1, "error: [Errno 28] No space left on device\n"),
        (">&-", 0, "2 tokens in"),
        ("--prompt - <&-", 1, "error: prompt 2 is empty: there is nothing to continue\n"),
        ("| :", 0, ""),
    ],
)
def test_a_closed_or_full_stream_is_one_line(talker, redirection, code, told):
    flags = f"--model {talker} --prompt a --max_new_tokens 2 --device {DEVICE} {redirection}"
    line = f"{sys.executable} generate.py {flags}"
    done = subprocess.run(line, shell=True, cwd=FOLDER, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stdout) == (code, "") and told in done.stderr
    assert done.stderr.count("\n") == bool(told)
