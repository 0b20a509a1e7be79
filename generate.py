"""Text in, text out: tokenizers, sampling, and decoding with the cache.

    python generate.py --prompt "def "                                   stream from out/student
    python generate.py --model out/teacher --prompt - < file.py          the prompt from standard input
    python generate.py --prompt "import " --prompt "class " --temperature 0

One decoding step feeds the newest token through `Hybrid` with its Cache and draws the next token from

    p(token) = softmax(logits / temperature), cut to the top_k likeliest and to the smallest set of mass top_p.

In this file, top to bottom: command lines from dataclasses (train_distill.py uses it too); tokenizers; the law a token
is drawn from; `generate`, the loop; the command.
"""
import argparse
import base64
import codecs
import dataclasses
import difflib
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

import mil
from mil import MilError


# ---------------------------------------------------------------------------------------------------------------
# Command lines: every field of a dataclass is a flag


def flag(default, help, **parse):
    """A dataclass field that is also a flag `--name value`, with the line that --help shows. `parse` goes to argparse."""
    make = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata={"help": help, "parse": parse}, **make)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise MilError(f"{message} (--help lists the flags)")


def parse_flags(settings, argv, description):
    """An instance of the dataclass `settings` from `--name value` or `--name=value`.

    Raises MilError for an unknown flag (naming the nearest known one) or a value of the wrong type.
    """
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(settings):
        kind = {} if f.type is list else {"type": f.type, "metavar": f.type.__name__}
        default = "" if f.default in ("", dataclasses.MISSING) or "default" in f.metadata["help"] else f" (default {f.default})"
        parser.add_argument("--" + f.name, default=None, help=f.metadata["help"].replace("%", "%%") + default, **kind, **f.metadata["parse"])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, ["--" + f.name for f in dataclasses.fields(settings)], 1)
        what = "unknown flag" if name.startswith("-") else "unexpected argument"
        raise MilError(f"{what} {name}" + (f"; did you mean {near[0]}?" if near else "") + " (--help lists the flags)")
    return settings(**{k: v for k, v in vars(known).items() if v is not None})


def run_command(main):
    """Call main(argv); a MilError becomes one line on standard error and exit code 1, Ctrl-C exit code 130."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets a ? and not an error
    try:
        main(sys.argv[1:])
    except MilError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def pick_device(name):
    """torch.device for a --device flag, made the current one; "" takes CUDA when there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"expected cpu or cuda, not {device.type}")
        torch.empty(0, device=device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise MilError(f"--device {name}: not usable here: {str(e).splitlines()[0]}") from e
    return device


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers, all of them tiktoken encodings

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
STOPS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|endofprompt|>")


def is_named(tokenizer):
    """Whether `tokenizer` is the name of an encoding rather than the path of a file."""
    return tokenizer == "bytes" or tokenizer in tiktoken.list_encoding_names()


def load_tokenizer(name):
    """A tiktoken.Encoding: "bytes" (built in: 256 bytes and an end of text), the name of one of tiktoken's own encodings,
    which tiktoken downloads on first use, or the path of a Llama-3 tokenizer.model."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if not is_named(name):
        if os.path.exists(name):
            return read_llama3_tokenizer(Path(name))
        raise MilError(f"tokenizer {name}: neither a file nor a known encoding; expected bytes, the path of a Llama-3 "
                       f"tokenizer.model, or one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # whatever the download library raises
        raise MilError(f"tokenizer {name}: tiktoken must download it and could not ({type(e).__name__}); pass "
                       f"--tokenizer bytes or the path of a tokenizer.model, or set TIKTOKEN_CACHE_DIR to a folder "
                       f"that has it") from e


def read_llama3_tokenizer(path):
    """Meta's tokenizer.model: a line `base64(token bytes) rank` each, then 256 special tokens numbered after them."""
    ranks = {}
    try:
        for i, line in enumerate(path.read_bytes().splitlines(), 1):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as e:
        raise MilError(f"tokenizer {path}: cannot be read: {e.strerror}") from e
    except ValueError:
        raise MilError(f"tokenizer {path}: line {i} is not `base64 rank`; expected a Llama-3 tokenizer.model "
                       f"(a sentencepiece file, as of Llama 2, is something else)") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([i]) not in ranks for i in range(256)):
        raise MilError(f"tokenizer {path}: {len(ranks)} tokens whose ranks are not 0 … {len(ranks) - 1}, or that lack "
                       f"some of the 256 single bytes; is the file whole?")
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    special = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>",
               reserved[4], "<|eot_id|>", *reserved[5:]]
    return tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                             special_tokens={token: len(ranks) + i for i, token in enumerate(special)})


def stop_tokens(encoding):
    """The ids that end a text, the one that ends a document first."""
    return [encoding.encode_single_token(t) for t in STOPS if t in encoding.special_tokens_set]


def token_bytes(encoding, token):
    """The bytes a token stands for in the text: none for special tokens and for numbers the encoding does not use."""
    try:
        data = encoding.decode_single_token_bytes(token)
    except KeyError:  # a model's vocabulary may be rounded up past the tokenizer's, and an encoding may have gaps
        return b""
    return b"" if data.decode("utf-8", "replace") in encoding.special_tokens_set else data


def encode(encoding, text):
    """Token ids of `text`, after the begin token where the encoding has one. Special tokens in it are plain text."""
    begin = "<|begin_of_text|>"
    begin = [encoding.encode_single_token(begin)] if begin in encoding.special_tokens_set else []
    return begin + encoding.encode_ordinary(text)


def save_with_tokenizer(model, directory, tokenizer, **notes):
    """mil.save, and the tokenizer: its name in config.json, or its file beside it."""
    if not is_named(tokenizer):
        data, tokenizer = Path(tokenizer).read_bytes(), "tokenizer.model"
        mil.make_directory(directory)
        mil.write_whole(Path(directory) / tokenizer, lambda f: f.write(data))
    mil.save(model, directory, tokenizer=tokenizer, **notes)


def tokenizer_of(directory):
    """What to give load_tokenizer for the checkpoint in `directory`."""
    name = mil.read_config(directory).get("tokenizer")
    if not isinstance(name, str):
        raise MilError(f'{directory}/config.json: names no tokenizer; expected "tokenizer": "bytes", a tiktoken name or '
                       f'"tokenizer.model" (mil.save(model, directory, tokenizer=…) writes it)')
    return name if is_named(name) else str(Path(directory) / name)


def load_with_tokenizer(directory, device=None, dtype=None):
    """The model saved in `directory`, and its encoding."""
    name = tokenizer_of(directory)
    encoding = load_tokenizer(name)
    model = mil.load(directory, device, dtype)
    if encoding.n_vocab > model.config.v:
        raise MilError(f"{directory}: the tokenizer {name} has {encoding.n_vocab} tokens, the model only {model.config.v}")
    return model, encoding


# ---------------------------------------------------------------------------------------------------------------
# Decoding


def token_law(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities (..., v) a token is drawn from; temperature 0 puts everything on the likeliest.

    top_k keeps the k likeliest (0: all), then top_p the fewest likeliest whose mass reaches top_p; ties are kept.
    """
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    law = logits.softmax(-1)
    if top_p < 1:
        ordered = law.sort(-1, descending=True).values
        kept = ordered.cumsum(-1) - ordered < top_p          # a token stays while those before it have not reached top_p
        least = ordered.masked_fill(~kept, torch.inf).min(-1, keepdim=True).values
        law = law.masked_fill(law < least, 0)
    return law / law.sum(-1, keepdim=True)


def longest_text(model):
    """How many tokens the model can read and write: attention's context, no limit where there is no attention."""
    return model.config.context if "attention" in model.config.mixers else math.inf


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=(), generator=None):
    """Continue each of `prompts` (lists of token ids of any lengths); every step yields one new id per row.

    A row that is finished (it drew one of `stop`, which is yielded, or filled the context) yields None from then on; the
    generator ends when all rows are finished or have max_new_tokens. Rows do not see each other.
    """
    device, context = model.embed_tokens.weight.device, longest_text(model)
    if not prompts:
        raise MilError("no prompts: there is nothing to continue")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise MilError(f"prompt {i + 1} is empty: there is nothing to continue")
        if len(prompt) >= context:
            raise MilError(f"prompt {i + 1} has {len(prompt)} tokens, but the model's context is {context}: expected at "
                           f"most {context - 1}, to leave room for one more")
        for token in prompt:
            if not 0 <= token < model.config.v:
                raise MilError(f"prompt {i + 1} has token {token}, but the model's vocabulary is {model.config.v}")
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    cache = mil.Cache(model, len(prompts), max(lengths) + min(max_new_tokens, context - min(lengths)))
    ends = torch.tensor(lengths, device=device)
    hidden = model.hidden(tokens.to(device), cache, ends)                         # the prompts in one pass
    last = hidden[torch.arange(len(prompts), device=device), ends - 1]            # (b, d)
    done = [False] * len(prompts)
    for step in range(max_new_tokens):
        law = token_law(model.lm_head(last), temperature, top_k, top_p)           # (b, v)
        new = law.argmax(-1) if temperature == 0 else torch.multinomial(law, 1, generator=generator)[:, 0]
        row = new.tolist()
        yield [None if finished else token for finished, token in zip(done, row)]
        done = [finished or token in stop or length + step + 1 >= context for finished, token, length in zip(done, row, lengths)]
        if all(done) or step + 1 == max_new_tokens:
            return
        last = model.hidden(new[:, None], cache)[:, -1]


class TextStream:
    """Bytes of tokens in, text out: a character whose bytes span tokens appears when its last byte has come."""

    def __init__(self, encoding):
        self.encoding, self.decoder = encoding, codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token):
        return self.decoder.decode(token_bytes(self.encoding, token))

    def finish(self):
        return self.decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class Settings:
    model: str = flag("out/student", "checkpoint directory, as train_distill.py writes it")
    prompt: list = flag([], "the text to continue; - reads standard input; given several times, a batch", action="append", metavar="text")
    max_new_tokens: int = flag(256, "stop after this many tokens")
    temperature: float = flag(0.8, "0 takes the likeliest token, 1 samples the model as it is, more is wilder")
    top_k: int = flag(0, "sample among the k likeliest tokens only; 0: no limit")
    top_p: float = flag(0.95, "sample among the fewest tokens that have this probability together; 1: no limit")
    seed: int = flag(0, "seed of the sampling")
    device: str = flag("", "cpu, cuda, cuda:1 …; empty: cuda if there is one")
    dtype: str = flag("", "float32, bfloat16, float16 or float64; empty: as saved")


def check_settings(s):
    if not s.temperature >= 0 or s.temperature == float("inf"):
        raise MilError(f"--temperature is {s.temperature}, expected 0 (greedy) or more")
    if not 0 < s.top_p <= 1:
        raise MilError(f"--top_p is {s.top_p}, expected more than 0 and at most 1")
    if s.top_k < 0:
        raise MilError(f"--top_k is {s.top_k}, expected 0 (no limit) or more")
    if s.max_new_tokens < 1:
        raise MilError(f"--max_new_tokens is {s.max_new_tokens}, expected at least 1")
    if s.dtype not in ("", "float32", "bfloat16", "float16", "float64"):
        raise MilError(f"--dtype is {s.dtype}, expected float32, bfloat16, float16 or float64")
    if not 0 <= s.seed < 2**63:
        raise MilError(f"--seed is {s.seed}, expected 0 to 2^63 - 1")
    if not s.prompt:
        raise MilError("--prompt is missing: give the text to continue, or - to read it from standard input")


def read_prompt(text, number):
    try:
        text = sys.stdin.buffer.read().decode() if text == "-" else os.fsencode(text).decode()
    except UnicodeDecodeError as e:
        raise MilError(f"prompt {number} is not UTF-8 text (byte {e.start})") from None
    if not text:
        raise MilError(f"prompt {number} is empty: there is nothing to continue")
    return text


def main(argv):
    s = parse_flags(Settings, argv, __doc__)
    check_settings(s)
    device = pick_device(s.device)
    model, encoding = load_with_tokenizer(s.model, device, getattr(torch, s.dtype) if s.dtype else None)
    texts = [read_prompt(text, i + 1) for i, text in enumerate(s.prompt)]
    prompts = [encode(encoding, text) for text in texts]
    stop, streams = stop_tokens(encoding), [TextStream(encoding) for _ in texts]
    whole, counts, began, single = list(texts), [0] * len(texts), time.perf_counter(), len(texts) == 1
    steps = generate(model, prompts, s.max_new_tokens, s.temperature, s.top_k, s.top_p, stop,
                     torch.Generator(device).manual_seed(s.seed))
    for row in steps:
        if single and not counts[0]:  # only now is it sure that the prompt can be continued
            print(texts[0], end="", flush=True)
        for i, token in enumerate(row):
            counts[i] += token is not None
            if token is not None and token not in stop:
                piece = streams[i].feed(token)
                whole[i] += piece
                if single:
                    print(piece, end="", flush=True)
    seconds, count = time.perf_counter() - began, sum(counts)
    full = any(len(prompt) + n >= longest_text(model) for prompt, n in zip(prompts, counts))
    for i, stream in enumerate(streams):
        tail = stream.finish()
        print(tail if single else f"=== {i + 1} of {len(texts)}\n{whole[i]}{tail}")
    end = f", up to the context of {longest_text(model)}" if full else ""
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s{end}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
