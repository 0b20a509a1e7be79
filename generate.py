"""Text in, text out: tokenizers, sampling, and decoding with the cache.

    python generate.py --prompt "def "                                   stream from out/student
    python generate.py --model out/teacher --prompt - < file.py          the prompt from standard input
    python generate.py --prompt "import " --prompt "class " --temperature 0
    python generate.py --draft out/draft/student --prompt "def "         speculatively: the same law, sooner
    python generate.py --model Llama-3.2-1B-Instruct --chat              a conversation with a downloaded model

One decoding step feeds the newest token through `Hybrid` with its Cache and draws the next token from its law, the distribution

    p(token) = softmax(logits / temperature), cut to the top_k likeliest and to the smallest set of mass top_p.

With a draft, whose law is q, a step is a round (section 4 of arXiv 2408.15237; Leviathan et al., 2211.17192):

    draft    K tokens x_1 … x_K, one after the other, each from its q
    verify   the K + 1 laws p at and after them, in one pass
    keep     x_1, x_2, … while u < p(x_i) / q(x_i), u uniform; then one token more, from max(p - q, 0) in place of the
             first rejected, or from p after the last

In this file, top to bottom: command lines from dataclasses (train_distill.py uses it too); tokenizers; conversations; the
law a token is drawn from; the keeping of proposals; `Decoder`, the loop; the command.
"""

import argparse
import base64
import codecs
import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

import kernels
import mil
from mil import MilError


# ---------------------------------------------------------------------------------------------------------------
# Command lines: every field of a dataclass is a flag


def flag(default, help, **parse):
    """A dataclass field that is also a flag `--name value`, with the line that --help shows. `parse` goes to argparse."""
    make = (
        {"default_factory": lambda: list(default)}
        if isinstance(default, list)
        else {"default": default}
    )
    return dataclasses.field(metadata={"help": help, "parse": parse}, **make)


def parse_flags(settings, argv, description):
    """An instance of the dataclass `settings` from `--name value` or `--name=value`.

    Raises MilError for an unknown flag (naming the nearest known one) or a value of the wrong type.
    """
    parser = mil.Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for f in dataclasses.fields(settings):
        kind = {} if f.type in (list, bool) else {"type": f.type, "metavar": f.type.__name__}
        default = (
            ""
            if f.default in ("", dataclasses.MISSING) or "default" in f.metadata["help"]
            else f" (default {f.default})"
        )
        parser.add_argument(
            "--" + f.name,
            default=None,
            help=f.metadata["help"].replace("%", "%%") + default,
            **kind,
            **f.metadata["parse"],
        )
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(
            name, ["--" + f.name for f in dataclasses.fields(settings)], 1
        )
        what = "unknown flag" if name.startswith("-") else "unexpected argument"
        raise MilError(
            f"{what} {name}"
            + (f"; did you mean {near[0]}?" if near else "")
            + " (--help lists the flags)"
        )
    return settings(**{k: v for k, v in vars(known).items() if v is not None})


def run_command(main):
    """Call main(argv); a MilError becomes one line on standard error and exit code 1, Ctrl-C exit code 130."""
    sys.stdout.reconfigure(
        errors="replace"
    )  # a terminal that cannot show a character gets a ? and not an error
    try:
        main(sys.argv[1:])
    except MilError as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:
        sys.exit(
            f"error: the GPU's memory is full (fewer or shorter texts at a time, or a smaller model, take less): {str(e).splitlines()[0]}"
        )
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
            device = torch.device(
                "cuda", torch.cuda.current_device() if device.index is None else device.index
            )
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise MilError(f"--device {name}: not usable here: {str(e).splitlines()[0]}") from e
    return device


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers, all of them tiktoken encodings

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # every digit first cut out, then GPT-2's
BEGINS = ("<|begin_of_text|>", "<s>")
STOPS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endofprompt|>",
    "<|im_end|>",
    "</s>",
)


def is_named(tokenizer):
    """Whether `tokenizer` is the name of an encoding rather than the path of a file."""
    return tokenizer == "bytes" or tokenizer in tiktoken.list_encoding_names()


def load_tokenizer(name):
    """A tiktoken.Encoding: "bytes" (built in: 256 bytes and an end of text), the name of one of tiktoken's own encodings,
    which tiktoken downloads on first use, or the path of a Llama-3 tokenizer.model or of a Hugging Face tokenizer.json."""
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"(?s:.)",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    if not is_named(name):
        if os.path.isdir(name):
            raise MilError(
                f"tokenizer {name}: a folder; give the tokenizer.json or tokenizer.model in it"
            )
        if os.path.exists(name):
            return (
                read_hf_tokenizer(Path(name))
                if name.endswith(".json")
                else read_llama3_tokenizer(Path(name))
            )
        raise MilError(
            f"tokenizer {name}: neither a file nor a known encoding; expected bytes, the path of a Llama-3 tokenizer.model or "
            f"of a Hugging Face tokenizer.json, or one of {', '.join(tiktoken.list_encoding_names())}"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # whatever the download library raises
        raise MilError(
            f"tokenizer {name}: tiktoken must download it and could not ({type(e).__name__}); pass "
            f"--tokenizer bytes or the path of a tokenizer.model, or set TIKTOKEN_CACHE_DIR to a folder "
            f"that has it"
        ) from e


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
        mil.refuse_pointer(path)
        raise MilError(
            f"tokenizer {path}: line {i} is not `base64 rank`, as in Llama 3's; a sentencepiece model is read as tokenizer.json: with "
            f"transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(
        bytes([i]) not in ranks for i in range(256)
    ):
        raise MilError(
            f"tokenizer {path}: {len(ranks)} tokens whose ranks are not 0 … {len(ranks) - 1}, or that lack "
            f"some of the 256 single bytes; is the file whole?"
        )
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *reserved[:4],
        "<|start_header_id|>",
        "<|end_header_id|>",
        reserved[4],
        "<|eot_id|>",
        *reserved[5:],
    ]
    return tiktoken.Encoding(
        path.name,
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={token: len(ranks) + i for i, token in enumerate(special)},
    )


class Pieces(tiktoken.Encoding):
    """tiktoken's merging under numbers that are not the order of merging. pieces: {bytes: the numbers that stand for them}, in that
    order; spare: {number: bytes} of what no text is encoded to; special: {text: number}, of which those in `plain` are found in any
    text. space: when a text is begun with a space, as sentencepiece does: "" (byte-level: it is not sentencepiece's), "never", "always",
    "unless spaced" (it begins with one), or "first", the same but not after a control token."""

    def __init__(self, name, pattern, pieces, spare, special, plain=(), space=""):
        super().__init__(
            name,
            pat_str=pattern,
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens={},
        )
        self._special_tokens, self.numbers, self.plain, self.space = (
            special,
            list(pieces.values()),
            set(plain),
            space,
        )
        alone = {numbers[0]: piece for piece, numbers in pieces.items() if len(numbers) == 1}
        self.data = {
            **spare,
            **alone,
            **{number: text.encode() for text, number in special.items()},
        }
        self.max_token_value = max(self.data)

    def encode(self, text, *, allowed_special=frozenset(), disallowed_special=(), start=True):
        """Numbers of a text in which the special tokens named (or "all") are found. start: it follows no other text."""
        allowed = self.plain | set(
            self._special_tokens if allowed_special == "all" else allowed_special
        )
        parts = (
            re.split(f"({'|'.join(map(re.escape, sorted(allowed, key=len, reverse=True)))})", text)
            if allowed
            else [text]
        )
        return [
            number
            for i, part in enumerate(parts)
            for number in (
                [self._special_tokens[part]] if i % 2 else self.merge(part, start or i > 0, i == 0)
            )
        ]

    def merge(self, text, start, first):
        if self.space:
            text = text.replace("▁", " ")
            spaced = self.space != "always" and text.startswith(" ")
            if (
                text
                and start
                and not spaced
                and self.space != "never"
                and (first or self.space != "first")
            ):
                text = " " + text
        return [number for rank in super().encode_ordinary(text) for number in self.numbers[rank]]

    def encode_ordinary(self, text, start=True):
        return self.encode(text, start=start)

    def encode_single_token(self, text):
        return (
            self._special_tokens[text]
            if text in self._special_tokens
            else self.numbers[super().encode_single_token(text)][0]
        )

    def decode_single_token_bytes(self, token):
        return self.data[token]

    def decode_bytes(self, tokens):
        return b"".join(self.data[token] for token in tokens)

    def decode(self, tokens, errors="replace"):
        return self.decode_bytes(tokens).decode("utf-8", errors)


def read_hf_tokenizer(path):
    """Hugging Face's tokenizer.json, as an encoding: byte-level BPE (Llama 3, SmolLM2, the GPT-2 family) and sentencepiece's BPE with
    byte fallback (Llama 2, TinyLlama, Mistral, Zephyr), learned from text: what two pieces make is a piece whenever it is in the
    vocabulary. MilError for any other kind, named."""
    said = mil.Said(path)
    model, added = said.take("model", kind=dict), said.take("added_tokens", [])

    def refuse(what, found, wanted):
        return MilError(f"tokenizer {path}: {what} is {str(found)[:99]}, expected {wanted}")

    if model.get("type", "BPE") != "BPE" or "merges" not in model:  # GPT-2's own names no type
        raise refuse(
            "the model",
            model.get("type", "BPE") + " without merges" * ("merges" not in model),
            "BPE",
        )
    try:
        odd = [
            f"{name} of {token['content']!r}"
            for token in added
            if not token["special"]
            for name in (
                "lstrip",
                "rstrip",
                "single_word",
                *["normalized"] * bool(said.get("normalizer")),
            )
            if token.get(name)
        ]
        odd += [
            name
            for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
            if model.get(name)
        ]
        if odd:
            raise refuse(odd[0], "set", "not to be")
        special, plain = (
            {token["content"]: token["id"] for token in added},
            [token["content"] for token in added if not token["special"]],
        )
        vocab, merges = (
            model["vocab"],
            [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]],
        )
        steps, norms = (
            [] if whole is None else whole.get(parts, [whole])
            for whole, parts in (
                (said.get("pre_tokenizer"), "pretokenizers"),
                (said.get("normalizer"), "normalizers"),
            )
        )
        pieces, spare, to_bytes, pattern, space = (
            sentencepiece if model.get("byte_fallback") else byte_level
        )(vocab, special.get(model.get("unk_token")), steps, norms, refuse)
        ranks = {}
        for rank, (a, b) in enumerate(merges, 1):
            ranks.setdefault(a + b, rank)
        of = lambda part: 0 if len(part) == 1 else ranks.get(part, math.inf)  # noqa: E731
        lost = ranks.keys() - {a + b for a, b in merges if max(of(a), of(b)) < ranks[a + b]}
        if lost:
            raise refuse(
                "a merge",
                f"the one of {min(lost)}, before those that make its parts",
                "an order that was learned",
            )
        for token in ranks:
            pieces.setdefault(to_bytes(token), [vocab[token]])
        used = (
            {numbers[0] for numbers in pieces.values() if len(numbers) == 1}
            | set(special.values())
            | set(spare)
        )
        rest = {number: to_bytes(token) for token, number in vocab.items() if number not in used}
        if rest and model.get("ignore_merges"):
            raise refuse(
                "a token",
                f"{next(iter(rest.values()))!r}, which no merge makes",
                "every token to be a byte or the result of a merge",
            )
        if pattern == WORDS and any(re.search(rb"[^ ] ", piece) for piece in pieces):
            pattern = r"(?s:.+)"
        try:
            encoding = Pieces(path.name, pattern, pieces, {**rest, **spare}, special, plain, space)
        except ValueError as e:
            raise refuse(
                "the pattern that splits text", pattern, f"a regular expression ({e})"
            ) from e
        posts = (said.get("post_processor") or {}).get(
            "processors", [said.get("post_processor") or {}]
        )
        encoding.begin = next(
            (
                [
                    special[part["SpecialToken"]["id"]]
                    for part in post["single"][:1]
                    if "SpecialToken" in part
                ]
                for post in posts
                if post.get("type") == "TemplateProcessing"
            ),
            None,
        )
    except MilError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise MilError(
            f"tokenizer {path}: not a whole BPE of bytes: {type(e).__name__} {str(e)[:200]}"
        ) from None
    about_texts(encoding, path)
    return encoding


WORDS = r" *[^ ]+| +"  # with the spaces before them: no piece that sentencepiece learns has a space after something else


def kind_of(part):
    """What a part of a tokenizer.json calls itself."""
    return f"{part['type']} ({part['behavior']})" if "behavior" in part else str(part["type"])


def byte_level(vocab, unknown, steps, norms, refuse):
    """Of a byte-level BPE: pieces and spare as in Pieces, how a token of `vocab` is written as bytes, the pattern that does in one
    what the steps of splitting do one after the other, and Pieces' space."""
    shown, more = (
        [chr(i) if 33 <= i <= 126 or 161 <= i <= 172 or i >= 174 else "" for i in range(256)],
        iter(range(256, 512)),
    )
    shown = [char or chr(next(more)) for char in shown]  # GPT-2 shows bytes as characters
    byte = {char: i for i, char in enumerate(shown)}
    lacking = [
        i for i, char in enumerate(shown) if char not in vocab and (32 <= i < 127 or i in b"\t\n\r")
    ]
    if lacking:  # other bytes may be: SmolLM2 lacks 21, which hardly any text has
        raise refuse(
            "the vocabulary", f"without the byte {bytes(lacking[:1])!r}", "all bytes of plain text"
        )
    pieces = {
        bytes([i]): [vocab[char]] if char in vocab else [] if unknown is None else [unknown]
        for i, char in enumerate(shown)
    }
    if norms:
        raise refuse("the normalizer", kind_of(norms[0]), "none")
    kinds, last = [kind_of(step) for step in steps], steps[-1] if steps else {}
    cut = last.get("use_regex", True)
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        raise refuse(
            "the last pre_tokenizer",
            (kinds or ["none"])[-1] + " with add_prefix_space" * bool(last.get("add_prefix_space")),
            "ByteLevel without add_prefix_space",
        )
    if kinds == ["Split (Isolated)", "ByteLevel"] and not cut and not steps[0].get("invert"):
        found = steps[0]["pattern"]["Regex"]
        pattern = f"{found}|(?:(?!{found})(?s:.))+"  # what lies between is kept
    elif cut and len(kinds) == 1:
        pattern = GPT2_PATTERN
    elif cut and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        pattern = DIGITS_PATTERN
    else:
        raise refuse(
            "the pre_tokenizer",
            " + ".join(kinds),
            "ByteLevel; Digits (individual), ByteLevel; or Split (by a Regex, Isolated), ByteLevel",
        )
    return pieces, {}, lambda token: bytes(byte[char] for char in token), pattern, ""


def sentencepiece(vocab, unknown, steps, norms, refuse):
    """The same of sentencepiece's BPE. Its characters are put together from bytes before anything else; of those it does not know
    the bytes stay."""
    one = [vocab[f"<0x{i:02X}>"] for i in range(256)]
    pieces = {
        bytes([i]): [vocab.get("▁" if i == 32 else chr(i), one[i]) if i < 128 else one[i]]
        for i in range(256)
    }
    for char, data in (
        (char, char.encode())
        for char in vocab
        if len(char) == 1 and char != "▁" and ord(char) > 127
    ):
        for l in range(2, len(data)):
            pieces.setdefault(data[:l], [one[i] for i in data[:l]])
        pieces[data] = [vocab[char]]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not steps and norms in ([replace], [{"type": "Prepend", "prepend": "▁"}, replace]):
        space, pattern = "always" if len(norms) == 2 else "never", WORDS
    elif (
        [kind_of(step) for step in steps] == ["Metaspace"]
        and not norms
        and steps[0].get("replacement") == "▁"
    ):
        scheme = steps[0].get(
            "prepend_scheme", "always" if steps[0].get("add_prefix_space", True) else "never"
        )
        if scheme not in ("always", "first", "never"):
            raise refuse("prepend_scheme", scheme, "always, first or never")
        space = "unless spaced" if scheme == "always" else scheme
        pattern = r" [^ ]*|[^ ]+" if steps[0].get("split", True) else WORDS
    else:
        found = [kind_of(part) for part in (*norms, *steps)]
        raise refuse(
            "the way to the pieces",
            " + ".join(found) or "none",
            "Prepend ▁, Replace space by ▁; or the latter alone; or Metaspace alone",
        )
    return (
        pieces,
        {number: bytes([i]) for i, number in enumerate(one)},
        lambda token: token.replace("▁", " ").encode(),
        pattern,
        space,
    )


def about_texts(encoding, path):
    """What the files beside a tokenizer.json say of it: the chat template, the token that ends a text, whether one begins it."""
    beside, template = (
        path.with_name("tokenizer_config.json"),
        path.with_name("chat_template.jinja"),
    )
    said = mil.Said(beside) if beside.exists() else {}
    encoding.template = said.get("chat_template") or ""
    if isinstance(encoding.template, list):  # of several by name, one is the default
        encoding.template = next(
            (
                t.get("template", "")
                for t in encoding.template
                if isinstance(t, dict) and t.get("name") == "default"
            ),
            "",
        )
    if template.exists():
        encoding.template = template.read_text(encoding="utf-8", errors="replace")
    end = said.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    encoding.ends = (
        [encoding._special_tokens[end]]
        if isinstance(end, str) and end in encoding._special_tokens
        else []
    )
    if said.get("add_bos_token") is False:
        encoding.begin = []


def begin_tokens(encoding):
    """The id that begins a text, in a list; or none. As its file says, else by its name."""
    named = [encoding.encode_single_token(t) for t in BEGINS if t in encoding.special_tokens_set][
        :1
    ]
    return named if getattr(encoding, "begin", None) is None else encoding.begin


def stop_tokens(encoding):
    """The ids that end a text, in the order of STOPS: what ends a document first, where the encoding has both."""
    named = [encoding.encode_single_token(t) for t in STOPS if t in encoding.special_tokens_set]
    return named + [i for i in getattr(encoding, "ends", []) if i not in named]


def token_bytes(encoding, token):
    """The bytes a token stands for in the text: none for special tokens and for numbers the encoding does not use."""
    try:
        data = encoding.decode_single_token_bytes(token)
    except (
        KeyError
    ):  # a model's vocabulary may be rounded up past the tokenizer's, and an encoding may have gaps
        return b""
    text = data.decode("utf-8", "replace")
    return (
        b""
        if text in encoding._special_tokens and text not in getattr(encoding, "plain", ())
        else data
    )


def vocabulary(encoding):
    """What tells two encodings apart: the special tokens, and every token's bytes."""
    return encoding._special_tokens, [token_bytes(encoding, i) for i in range(encoding.n_vocab)]


def encode(encoding, text):
    """Token ids of `text`, after the begin token where the encoding has one. Special tokens in it are plain text."""
    return begin_tokens(encoding) + encoding.encode_ordinary(text)


def save_with_tokenizer(model, directory, tokenizer, **notes):
    """mil.save, and the tokenizer: its name in config.json, or its file beside it."""
    if not is_named(tokenizer):
        path, tokenizer = (
            Path(tokenizer),
            "tokenizer.json" if tokenizer.endswith(".json") else "tokenizer.model",
        )
        mil.make_directory(directory)
        if not path.exists():
            raise MilError(f"tokenizer {path}: it was there, and is not any more")
        beside = [
            path.with_name(name)
            for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
        ]
        for name, file in [
            (tokenizer, path),
            *((file.name, file) for file in beside if file.exists()),
        ]:
            data = file.read_bytes()
            mil.write_whole(Path(directory) / name, lambda f, data=data: f.write(data))
    encoding = load_tokenizer(
        tokenizer if is_named(tokenizer) else str(Path(directory) / tokenizer)
    )
    ids = {
        "bos_token_id": (begin_tokens(encoding) or [None])[0],
        "eos_token_id": stop_tokens(encoding) or None,
    }
    mil.save(model, directory, tokenizer=tokenizer, **{"ids": ids, **notes})


def tokenizer_of(directory):
    """What to give load_tokenizer for the checkpoint in `directory`."""
    name = mil.read_config(directory).get("tokenizer")
    if not isinstance(name, str):
        raise MilError(
            f'{directory}: no tokenizer: expected a tokenizer.json or tokenizer.model, or in a config.json of ours "tokenizer": "bytes" or a '
            f"tiktoken name (mil.save(model, directory, tokenizer=…) writes it)"
        )
    return name if is_named(name) else str(Path(directory) / name)


def load_with_tokenizer(directory, device=None, dtype=None):
    """The model saved in `directory`, and its encoding."""
    name = tokenizer_of(directory)
    encoding = load_tokenizer(name)
    model = mil.load(directory, device, dtype)
    if encoding.n_vocab > model.config.v:
        raise MilError(
            f"{directory}: the tokenizer {name} has {encoding.n_vocab} tokens, the model only {model.config.v}"
        )
    notes = [
        f"{directory}: the tokenizer {name} has {encoding.n_vocab} tokens, the model {model.config.v}: those from {encoding.n_vocab} on stand for nothing"
    ]
    notes = notes * (encoding.n_vocab < model.config.v) + [
        f"{directory}: no token is known to end a text"
    ] * (not stop_tokens(encoding))
    if getattr(encoding, "template", "") and chat_format(encoding) == "plain":
        notes.append(
            f"{directory}: its chat template is none of {', '.join(list(FORMATS)[:-1])}: conversations are written plainly"
        )
    for line in mil.read_config(directory)["remarks"] + notes:
        print(f"note: {line}", file=sys.stderr)
    return mil.pack(model), encoding


# ---------------------------------------------------------------------------------------------------------------
# Conversations: what a turn looks like as text. Control tokens stand only where the format has them: in what somebody says they are text.

FORMATS = {  # name: what gives it away, in a chat template or among the special tokens; before what is said; after it; between turns; trimmed?
    "llama3": (
        "<|start_header_id|>",
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        True,
    ),
    "chatml": ("<|im_start|>", "<|im_start|>{role}\n", "<|im_end|>", "\n", False),
    "zephyr": ("<|user|>", "<|{role}|>\n", "</s>", "\n", False),
    "plain": (
        "",
        "{role}:\n",
        "",
        "\n",
        False,
    ),  # of any other; the assistant's turns end with the token that ends a text
}


def chat_format(encoding):
    """The name of the encoding's format in FORMATS."""
    signs = getattr(encoding, "template", "") or " ".join(encoding.special_tokens_set)
    return next(name for name, (sign, *_) in FORMATS.items() if sign in signs)


class Conversation:
    """Token ids of a conversation, begun with `begin_tokens`, and for each whether the assistant says it (`own`: what a model learns)."""

    def __init__(self, encoding, messages=()):
        """messages: dicts of "role" and "content", as in a .jsonl of chat."""
        self.encoding, self.begin = encoding, begin_tokens(encoding)
        self.ids, self.own = list(self.begin), [False] * len(self.begin)
        _, self.header, self.end, self.between, trimmed = FORMATS[chat_format(encoding)]
        self.control = set(encoding._special_tokens.values())
        for message in messages:
            self.open(message["role"])
            self.close(
                message["content"].strip() if trimmed else message["content"],
                message["role"] == "assistant",
            )

    def add(self, text, own=False, control=False):
        """Text that follows; with control=True the special tokens in it are special."""
        more = (
            {"allowed_special": "all"}
            if control
            else {
                "allowed_special": getattr(self.encoding, "plain", set()),
                "disallowed_special": (),
            }
        )
        if isinstance(
            self.encoding, Pieces
        ):  # whose texts begin with a space: after a control token, or at the very beginning
            after = not self.ids or self.ids[-1] in self.control
            more["start"] = after and (self.encoding.space != "first" or self.ids == self.begin)
        new = self.encoding.encode(text, **more)
        self.extend(new, own)

    def extend(self, ids, own):
        self.ids += ids
        self.own += [own] * len(ids)

    def open(self, role):
        """A turn of this role begins. MilError for a role that is no word: it stands among control tokens."""
        if not role.isidentifier():
            raise MilError(f"a message has the role {role!r}, expected a word such as user")
        self.add(self.header.format(role=role), control=True)

    def close(self, text="", own=False):
        """What is said in this turn, or the rest of it; and its end."""
        self.add(text, own)
        end = (
            stop_tokens(self.encoding)[:1] * own
            if not self.end
            else [self.encoding.encode_single_token(self.end)]
        )
        self.extend(end, own)
        self.add(self.between, control=True)


# ---------------------------------------------------------------------------------------------------------------
# Decoding


def token_law(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities (..., v) a token is drawn from; temperature 0 puts everything on the likeliest.

    top_k keeps the k likeliest (0: all), then top_p the fewest likeliest whose mass reaches top_p; ties are kept. NaN gives NaN.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        law = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
        return law.masked_fill(logits.isnan().any(-1, keepdim=True), torch.nan)
    logits = logits / max(temperature, 1e-30)  # below, a large logit would overflow
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    law = logits.softmax(-1)
    if top_p < 1:
        ordered = law.sort(-1, descending=True).values
        kept = (
            ordered.cumsum(-1) - ordered < top_p
        )  # a token stays while those before it have not reached top_p
        least = ordered.masked_fill(~kept, torch.inf).min(-1, keepdim=True).values
        law = law.masked_fill(law < least, 0)
        law = law / law.sum(-1, keepdim=True)
    return law


def longest_text(model):
    """How many tokens the model can read and write: attention's context, no limit where there is no attention."""
    return model.config.context if "attention" in model.config.mixers else math.inf


def draw(law, generator=None):
    """One token (...) from each law (..., v): the first to ring among clocks of these rates. Where the law is no law (a NaN), -1."""
    return first_to_ring(law, wind(law, law.dtype, generator))


def wind(like, dtype, generator):
    """Times of clocks of rate 1, shaped like `like`."""
    clocks = torch.empty_like(like, dtype=dtype).exponential_(generator=generator)
    return (
        clocks if clocks.is_cuda else clocks.clamp_(min=torch.finfo(dtype).tiny)
    )  # a GPU's are above 0


def first_to_ring(law, clocks):
    first, tokens = (law / clocks).max(-1)  # as torch.multinomial, which would wait for the GPU
    return torch.where(first > 0, tokens, -1)


def choose(logits, clocks, how):
    """A token (...) from the law of logits (..., v)."""
    return first_to_ring(token_law(logits, *how), clocks)


def acceptance(p, q, tokens):
    """The probability min(1, p/q) with which proposed tokens (...) are kept, drawn from q (..., v) where p (..., v) is wanted."""
    return (p.gather(-1, tokens[..., None]) / q.gather(-1, tokens[..., None]))[..., 0].clamp(max=1)


def residual(p, q):
    """The law (..., v) of the token in place of a rejected one: what p has over q, whose share of p is dealt out already by what is kept
    (Leviathan et al. 2211.17192, appendix A.1)."""
    left = (p - q).clamp(min=0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p)  # p = q up to rounding
    return left / left.sum(-1, keepdim=True)


def verify(proposed, q, p, generator=None):
    """How many of the draft's tokens (b, K) each row keeps, and one token more: (b,), (b,). They are drawn from q (b, K, v), the target's
    laws are p (b, K + 1, v); what results is distributed as if drawn from p alone."""
    chance, row = (
        acceptance(p[:, :-1], q, proposed),
        torch.arange(len(p), device=p.device),
    )  # (b, K); NaN, so rejected, where q is
    kept = torch.rand(chance.shape, generator=generator, dtype=p.dtype, device=p.device) < chance
    count = kept.long().cumprod(1).sum(1)
    q = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)  # after the last, nothing is dealt out
    return count, draw(residual(p[row, count], q[row, count]), generator)


def best_k(alpha, cost, most=8):
    """The number of tokens to propose: the K in 0 … most with the most tokens in a unit of time, when each is accepted with probability
    alpha (as if independently) and adds `cost` of a plain step to a round (Leviathan et al., Theorem 3.8, where that is the draft's step)."""
    return max(range(most + 1), key=lambda K: sum(alpha**i for i in range(K + 1)) / (K * cost + 1))


class Speculation:
    """How much to propose, and how it went. Always K tokens a round; or with K = 0 what best_k says to the rates and times measured."""

    def __init__(self, K=0):
        self.fixed, self.most, self.choices = (
            K != 0,
            K or 8,
            iter([(K, math.inf)]) if K else self.choose(),
        )
        self.K, self.due = next(self.choices)  # what to propose, until so many rounds are over
        self.tried = self.K  # the last that was not 0
        self.over = False  # the draft is of no more use
        self.rounds = self.passes = self.proposed = self.accepted = (
            0  # passes: of the target, each row for itself
        )
        self.kept = self.rejected = 0  # since the last choice
        self.took = {}  # K: its warm rounds, and the draft's and the target's seconds in them
        self.spent, self.cold = (
            0,
            math.inf,
        )  # seconds since the last choice; of the shortest round with a new K

    def choose(self):
        """The K to propose and for how many rounds at least: first 4; then the best above 0, as if a pass took the same for any K; 0, to see
        what it takes without proposals; then the best again and again, until that is 0: it does not pay to propose."""
        yield 4, 5
        yield max(1, self.best()), 8
        yield 0, 4
        while K := self.best():
            yield K, 32

    def best(self):
        rounds, draft, target = self.took[self.tried]
        plain = self.took[0][2] / self.took[0][0] if 0 in self.took else target / rounds
        alpha, self.kept, self.rejected = self.kept / max(1, self.kept + self.rejected), 0, 0
        return best_k(
            alpha, max(0, (draft + target) / rounds - plain) / self.tried / plain, self.most
        )

    def count(self, n, K, used):
        """A row kept n of K tokens, of which the text used `used` (a stop token cuts)."""
        self.passes, self.proposed, self.accepted = (
            self.passes + 1,
            self.proposed + K,
            self.accepted + used,
        )
        self.kept, self.rejected = self.kept + n, self.rejected + (n < K)

    def time(self, draft, target, K, warm):
        """A round is over: seconds of its halves, the draft's K steps and the target's pass; not `warm` while it is slow for being new. A new K costs two
        such slow rounds (on a GPU, where they compile and capture a graph), so it is not begun before ten times that, 20 · (a slow round − a warm
        one), has been spent: a short text keeps its first K."""
        self.rounds += 1
        if not warm:
            self.cold = min(self.cold, draft + target) if K else self.cold
            return
        n, *took = self.took[K] = [
            a + b for a, b in zip(self.took.get(K, (0, 0, 0)), (1, draft, target))
        ]
        self.tried, self.spent = K or self.tried, self.spent + draft + target
        if self.rounds >= self.due and (K == 0 or self.spent >= 20 * (self.cold - sum(took) / n)):
            choice = next(self.choices, None)
            self.over, (self.K, rounds) = choice is None, choice or (0, math.inf)
            self.due, self.spent = self.rounds + rounds, 0


def check_sampling(max_new_tokens, temperature, top_k, top_p, dash=""):
    for name, value, sound, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, "0 (no limit) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1"),
    ):
        if not sound:
            raise MilError(f"{dash}{name} is {value}, expected {wanted}")


def check_prompts(prompts, v, context, whose):
    """MilError for a prompt that cannot be continued."""
    if not prompts:
        raise MilError("no prompts: there is nothing to continue")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise MilError(f"prompt {i + 1} is empty: there is nothing to continue")
        if len(prompt) >= context:
            raise MilError(
                f"prompt {i + 1} has {len(prompt)} tokens, but the {whose}'s context is {context}: expected at "
                f"most {context - 1}, to leave room for one more"
            )
        for token in prompt:
            if not 0 <= token < v:
                raise MilError(
                    f"prompt {i + 1} has token {token}, but the model's vocabulary is {v}"
                )


def feed(model, cache, new):
    """Read tokens (lists of ids of any lengths, one per row)."""
    counts = [len(tokens) for tokens in new]
    if max(counts):
        padded = [tokens + (tokens[-1:] or [0]) * (max(counts) - len(tokens)) for tokens in new]
        model.hidden(torch.tensor(padded, device=cache.device), cache, counts)


def stamp(device):
    """This moment on the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds(since, until):
    return until - since if isinstance(since, float) else since.elapsed_time(until) / 1e3


class Launched:
    """`f`, a function of tensors that stay where they are: on a CUDA `device` run as it is the first time, which compiles its kernels, then
    captured in a CUDA graph, of which every later call is one launch; with device None always run as it is."""

    def __init__(self, f, device, generator=None):
        self.f, self.device, self.generator, self.calls, self.graph = f, device, generator, 0, None

    def __call__(self):
        self.calls += 1
        if self.device is None or self.calls == 1:
            self.out = self.f()
            return self.out
        with torch.cuda.device(self.device):
            if self.calls == 2:
                self.graph = torch.cuda.CUDAGraph()
                if self.generator:
                    self.graph.register_generator_state(self.generator)
                with torch.cuda.graph(
                    self.graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"
                ):  # other threads may go on
                    self.out = self.f()
            self.graph.replay()
        return self.out


def log_places(model, rows, K=0):
    """How many tokens the log of the model's cache takes: those of a round; without a draft 3, so that kernels write the states with every
    4th token, where large states are what a step waits for (Mamba-2's in a batch: table 8 of tests/bench.py), else none."""
    return K + 1 if K else 3 if rows >= 16 and "mamba2" in model.config.mixers else 0


class Decoder:
    """Continues texts, a batch of `rows` with room for `size` tokens each, by one law, and keeps what it has read: `decode` may be called
    again with the same texts, longer, and reads what is new. With others, or when one row had finished before another, it begins anew.

    With a `draft`, another model over the same tokens, a round is speculative: the draft proposes K tokens, one by one; the model reads
    them in one pass, keeps the longest part it agrees with and adds one token; the law of the text is the model's own, whatever the draft
    (`verify`). `speculate` is K, 0 to have it chosen by what is accepted and what it costs, or a Speculation. Without a draft K is 0 and a
    round is one token, as is a first round with a prompt of one (the draft reads two). Neither model ever undoes anything: each cache moves
    its cursor back (mil.Cache). On CUDA each half of a round, the draft's and the model's, is one launch (Launched), up to K = 15,
    heads of 128 and 16 query heads a kv head, and not in float64.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model,
        rows,
        size,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        generator=None,
        draft=None,
        speculate=0,
    ):
        self.context, self.whose = min(
            ((longest_text(m), name) for m, name in ((model, "model"), (draft, "draft")) if m),
            key=lambda pair: pair[0],
        )
        check_sampling(1, temperature, top_k, top_p)
        if draft and draft.config.v != model.config.v:
            raise MilError(
                f"the draft's vocabulary is {draft.config.v}, the model's {model.config.v}: they must speak of the same tokens"
            )
        plan = speculate if isinstance(speculate, Speculation) else Speculation(speculate)
        if draft and plan.fixed and not 1 <= plan.K < self.context:
            wanted = (
                f"to {self.context - 1}, less than the context"
                if self.context < math.inf
                else "or more"
            )
            raise MilError(f"speculate is {plan.K}, expected 1 {wanted}, or 0 to have it chosen")
        self.context, plan.most = (
            int(min(self.context, size)),
            int(min(plan.most, self.context - 1)),
        )
        context, most, self.models = (
            self.context,
            plan.most if draft else 0,
            [m for m in (model, draft) if m],
        )
        caches = [
            mil.Cache(
                m, rows, self.context + most, places=log_places(m, rows, most), lazy=not draft
            )
            for m in self.models
        ]
        texts, how = [[] for _ in range(rows)], (temperature, top_k, top_p)
        self.many = rows > kernels.MANY and caches[0].device.type == "cuda"
        pick = torch.compile(choose) if self.many else choose
        ahead, before, last = now = torch.zeros(
            3, rows, dtype=torch.long, device=caches[0].device
        )  # per row len(text) - 1, text[-2], text[-1]

        def propose(K, follow):
            """The last token and the draft's K, and the laws they are from: (b, 1 + K), (b, K, v). To `follow` the text the draft reads two tokens,
            since it never read its own last."""
            tokens, q = [last[:, None]], []
            if follow:
                caches[1].start(ahead - 1, max(map(len, texts)) - 2, max(2, K + 1))
                hidden = draft.hidden(torch.stack([before, last], dim=1), caches[1])[:, -1:]
            for j in range(K):
                hidden = hidden if j == 0 else draft.hidden(tokens[-1], caches[1])
                q.append(token_law(draft.logits(hidden), *how))  # (b, 1, v)
                tokens.append(draw(q[-1], generator).clamp(min=0))  # (b, 1)
            return torch.cat(tokens, dim=1), torch.cat(q, dim=1) if K else None

        def check(proposed, q):
            """Per row how many are kept, what was proposed, and one token more: (b, 2 + K)."""
            caches[0].start(ahead, max(map(len, texts)) - 1, 0 if q is None else proposed.shape[1])
            hidden = model.hidden(proposed, caches[0])
            if q is None:
                logits = model.logits(hidden)[:, 0]
                clocks = wind(logits, torch.promote_types(logits.dtype, torch.float32), generator)
                count, extra = torch.zeros_like(last), pick(logits, clocks, how)
            else:
                count, extra = verify(
                    proposed[:, 1:], q, token_law(model.logits(hidden), *how), generator
                )
            before.copy_(
                proposed.gather(1, count[:, None])[:, 0]
            )  # of the next round, if the text goes on
            ahead.copy_((ahead + count + 1).clamp(max=context - 1))
            last.copy_(extra.clamp(min=0))
            return torch.cat([count[:, None], proposed[:, 1:], extra[:, None]], dim=1)

        self.draft, self.plan, self.most, self.caches, self.texts, self.now, self.generator = (
            draft,
            plan,
            most,
            caches,
            texts,
            now,
            generator,
        )
        self.propose, self.check, self.halves = propose, check, {}
        self.read, self.torn = (
            [[0] * rows for _ in caches],
            False,
        )  # of each text, how many tokens a cache has read
        self.device = (
            caches[0].device
            if caches[0].device.type == "cuda" and all(cache.fusable(most + 1) for cache in caches)
            else None
        )

    def catch_up(self, which, left):
        """The model (0) or the draft (1) reads what is new in the texts, but for the last `left` tokens."""
        cache, read = self.caches[which], self.read[which]
        cache.start(torch.tensor(read), max(read), 0)
        feed(
            self.models[which],
            cache,
            [text[n : len(text) - left] for n, text in zip(read, self.texts)],
        )

    @torch.inference_mode()
    def decode(self, prompts, max_new_tokens, stop=()):
        """Continue each of `prompts`, one a row (lists of token ids of any lengths); every round yields a tuple of new ids per row.

        A row that is finished (it drew one of `stop`, which is yielded, or filled the context, or has max_new_tokens) yields () from then on;
        the generator ends with the last row. Rows do not see each other. MilError for prompts that cannot be continued, and for NaN.
        """
        check_sampling(max_new_tokens, 1, 0, 1)
        if prompts and len(prompts) != len(self.texts):
            raise MilError(f"{len(prompts)} prompts for a decoder of {len(self.texts)} rows")
        v = self.models[0].config.v
        check_prompts(prompts, v, self.context, self.whose)
        for token in stop:
            if not 0 <= token < v:
                raise MilError(f"stop token {token} is outside the vocabulary of {v}")
        if self.torn or any(
            text[:n] != prompt[:n] or n > max(0, len(prompt) - left)
            for left, read in enumerate(self.read, 1)
            for n, text, prompt in zip(read, self.texts, prompts)
        ):
            self.read, self.torn = [[0] * len(prompts) for _ in self.caches], False
            for cache in self.caches:
                cache.clear()
        texts, draft, plan = self.texts, self.draft, self.plan
        texts[:] = [list(prompt) for prompt in prompts]
        ends = [min(len(prompt) + max_new_tokens, self.context) for prompt in prompts]
        live, ending, coming, unread = list(range(len(texts))), {*stop, -1}, None, True
        self.catch_up(0, 1)  # the last token is left to the first round
        self.place(live)
        while live:
            follow = bool(draft) and not plan.over and min(map(len, texts)) > 1
            K = min(plan.K, self.most) if follow else 0
            if follow and unread:
                self.catch_up(1, 2)
                unread = False
            out, arrived, times = coming or self.round(K, follow)
            # Of many rows, without a draft, the next round is launched before this one's tokens are looked at.
            more = (
                self.device
                and self.many
                and not draft
                and any(ends[i] - len(texts[i]) > 1 for i in live)
            )
            coming = self.round(0, False) if more else None
            if arrived:
                arrived.synchronize()
            # Tuples, which the garbage collector does not track: with 1,024 lists a round it paused for 0.2 s now and then.
            counts, *columns = out.T.tolist()
            new, ended = [()] * len(texts), []
            for i in live:
                n = counts[i]
                tokens = (*[column[i] for column in columns[:n]], columns[-1][i])[
                    : ends[i] - len(texts[i])
                ]
                if not ending.isdisjoint(tokens):
                    cut = next(j for j, token in enumerate(tokens) if token in ending)
                    if tokens[cut] == -1:
                        raise MilError(
                            f"prompt {i + 1}: the model's logits are NaN after {len(texts[i]) + cut} tokens"
                        )
                    tokens = tokens[: cut + 1]
                    ended.append(i)
                elif len(texts[i]) + len(tokens) >= ends[i]:
                    ended.append(i)
                new[i] = tokens
                texts[i] += tokens
                if draft:
                    plan.count(n, K, min(n, len(tokens)))
            # The states of a row that has finished, or for which a round has begun, are not its text's any more.
            self.torn = self.torn or len(live) < len(texts) or coming is not None
            if ended:
                live = sorted({*live} - {*ended})
                self.place(ended)
            for which, left in [(0, 1), (1, 2)][: 1 + follow]:
                self.read[which] = [len(text) - left for text in texts]
            if follow or plan.over:  # not a round that could not propose, after one token
                plan.time(
                    *[seconds(*pair) for pair in zip(times, times[1:])],
                    K,
                    self.halves[K, follow][0].calls > (2 if self.device else 1),
                )
            yield new

    def place(self, rows):
        """Where these rows of the texts end: what a round begins with. A finished row stays there."""
        ends = [
            [len(text) - 1, text[-2] if len(text) > 1 else 0, text[-1]]
            for text in map(self.texts.__getitem__, rows)
        ]
        self.now[:, rows] = torch.tensor(ends, device=self.now.device).T

    def round(self, K, follow):
        """Launches a round. Returns its result on the CPU, an event after which it is there, or None, and the times of its halves."""
        if (K, follow) not in self.halves:
            # nothing here refers back to the Decoder: freed late, by the garbage collector, a graph would break the capture of another
            first = Launched(
                functools.partial(self.propose, K, follow), self.device, self.generator
            )
            self.halves[K, follow] = (
                first,
                Launched(
                    lambda check=self.check, first=first: check(*first.out),
                    self.device,
                    self.generator,
                ),
            )
        times = [stamp(self.now.device)]
        for half in self.halves[K, follow]:
            out = half()
            times.append(stamp(self.now.device))
        out = out.to("cpu", non_blocking=True)
        return out, stamp(self.now.device) if self.now.is_cuda else None, times


def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop=(),
    generator=None,
    draft=None,
    speculate=0,
):
    """Continue each of `prompts`: what a new Decoder's `decode` yields. MilError for settings and prompts that cannot work."""
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    size = max(map(len, prompts), default=0) + max_new_tokens
    yield from Decoder(
        model, len(prompts), size, temperature, top_k, top_p, generator, draft, speculate
    ).decode(prompts, max_new_tokens, stop)


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
    model: str = flag(
        "out/student",
        "checkpoint directory: as train_distill.py writes it, Hugging Face's, Meta's, or one of the paper's hybrids",
    )
    draft: str = flag(
        "",
        "checkpoint of a smaller model over the same tokens, to decode speculatively: text of the same law, sooner",
    )
    speculate: int = flag(
        0,
        "how many tokens the draft proposes at a time; 0: chosen by what is kept and what it costs",
    )
    chat: bool = flag(
        False,
        "a conversation in the terminal: Ctrl-C stops a reply, /reset forgets, /quit ends",
        action="store_true",
    )
    system: str = flag("", "with --chat: what the model is told beforehand")
    context: int = flag(
        0,
        "with --chat: tokens a conversation has room for, at most the model's context (default 8192)",
    )
    prompt: list = flag(
        [],
        "the text to continue; - reads standard input; given several times, a batch",
        action="append",
        metavar="text",
    )
    max_new_tokens: int = flag(256, "stop after this many tokens")
    temperature: float = flag(
        0.8, "0 takes the likeliest token, 1 samples the model as it is, more is wilder"
    )
    top_k: int = flag(0, "sample among the k likeliest tokens only; 0: no limit")
    top_p: float = flag(
        0.95, "sample among the fewest tokens that have this probability together; 1: no limit"
    )
    seed: int = flag(0, "seed of the sampling")
    device: str = flag("", "cpu, cuda, cuda:1 …; empty: cuda if there is one")
    dtype: str = flag("", "float32, bfloat16, float16 or float64; empty: as saved")


def check_settings(s):
    check_sampling(s.max_new_tokens, s.temperature, s.top_k, s.top_p, "--")
    if s.dtype not in ("", "float32", "bfloat16", "float16", "float64"):
        raise MilError(f"--dtype is {s.dtype}, expected float32, bfloat16, float16 or float64")
    if not 0 <= s.seed < 2**63:
        raise MilError(f"--seed is {s.seed}, expected 0 to 2^63 - 1")
    if s.speculate < 0 or s.speculate and not s.draft:
        raise MilError(
            f"--speculate is {s.speculate}, expected 1 or more, or 0 to have it chosen"
            if s.draft
            else "--speculate needs a --draft: the checkpoint of the model that proposes"
        )
    if s.context < 2 and s.context != 0:
        raise MilError(f"--context is {s.context}, expected at least 2")
    if s.chat and s.prompt:
        raise MilError("--chat reads what you say from the terminal: leave --prompt out")
    if (s.system or s.context) and not s.chat:
        raise MilError(f"--{'system' if s.system else 'context'} goes with --chat")
    if not s.prompt and not s.chat:
        raise MilError(
            "--prompt is missing: give the text to continue, or - to read it from standard input; or --chat"
        )


def read_prompt(text, number):
    try:
        text = sys.stdin.buffer.read().decode() if text == "-" else os.fsencode(text).decode()
    except UnicodeDecodeError as e:
        raise MilError(f"prompt {number} is not UTF-8 text (byte {e.start})") from None
    if not text:
        raise MilError(f"prompt {number} is empty: there is nothing to continue")
    return text


def load_draft(s, model, encoding, device):
    """The model in --draft. MilError unless it speaks the target's tokens."""
    draft, other = load_with_tokenizer(
        s.draft, device, getattr(torch, s.dtype) if s.dtype else None
    )
    if draft.config.v != model.config.v:
        raise MilError(
            f"--draft {s.draft} has a vocabulary of {draft.config.v}, {s.model} one of {model.config.v}: a draft must speak the same tokens"
        )
    if vocabulary(encoding) != vocabulary(other):
        raise MilError(
            f"--draft {s.draft} has the tokenizer {tokenizer_of(s.draft)}, {s.model} has {tokenizer_of(s.model)}: their tokens differ"
        )
    return draft


def chat(s, model, encoding, draft):
    """Lines from standard input, replies on standard output. What was said before is in the decoder's cache; a turn reads only what is new."""
    context = int(min(s.context or 8192, longest_text(model), longest_text(draft or model)))
    decoder = Decoder(
        model,
        1,
        context,
        s.temperature,
        s.top_k,
        s.top_p,
        torch.Generator(model.lm_head.weight.device).manual_seed(s.seed),
        draft,
        Speculation(s.speculate),
    )
    stop, begin = stop_tokens(encoding), [{"role": "system", "content": s.system}] * bool(s.system)
    talk, heard = Conversation(encoding, begin), False
    if len(talk.ids) >= context:
        raise MilError(
            f"--system has {len(talk.ids)} tokens, but a conversation has room for {context}"
        )
    sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then edits a line and remembers those before)
    print(
        f"{s.model}, the format is {chat_format(encoding)}, room for {context} tokens; /reset forgets, /quit or Ctrl-D ends",
        file=sys.stderr,
    )

    def stop_reply(*_):  # not in the middle of a pass, which would leave the cache half written
        nonlocal heard
        heard = True

    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)", file=sys.stderr)
            continue
        if line == "/quit":
            return
        command = re.fullmatch(r"/\w+", line)
        if line == "/reset":
            talk = Conversation(encoding, begin)
        elif command:
            print("(/reset forgets, /quit ends; there is nothing else)", file=sys.stderr)
        if command or not line:
            continue
        mark = len(talk.ids)
        talk.open("user")
        talk.close(line)
        talk.open("assistant")
        if len(talk.ids) >= context:
            print(
                f"(no room: {mark} of {context} tokens are taken, this takes {len(talk.ids) - mark}; say less, or /reset)",
                file=sys.stderr,
            )
            talk.ids, talk.own = talk.ids[:mark], talk.own[:mark]
            continue
        stream, count, began, heard = TextStream(encoding), 0, time.perf_counter(), False
        before = signal.signal(signal.SIGINT, stop_reply)
        try:
            for (new,) in decoder.decode([talk.ids], s.max_new_tokens, stop):
                count += len(new)
                said = [token for token in new if token not in stop]
                talk.extend(said, own=True)
                print("".join(map(stream.feed, said)), end="", flush=True)
                if heard:
                    break
        finally:
            signal.signal(signal.SIGINT, before)
        cut = not heard and new[-1] not in stop
        print(stream.finish() + " …" * (heard or cut))
        why = (
            ", cut for want of room"
            if len(talk.ids) >= context
            else f", cut at --max_new_tokens {s.max_new_tokens}"
        ) * cut
        print(
            f"({count} tokens{why}, {count / (time.perf_counter() - began):.1f} tokens/s; {len(talk.ids)} of {context} taken)",
            file=sys.stderr,
        )
        talk.close(own=True)


def main(argv):
    s = parse_flags(Settings, argv, __doc__)
    check_settings(s)
    device = pick_device(s.device)
    if s.model == Settings.model and not os.path.exists(s.model):
        raise MilError(
            f"{s.model}: not there yet: python train_distill.py makes it; or give --model"
        )
    model, encoding = load_with_tokenizer(
        s.model, device, getattr(torch, s.dtype) if s.dtype else None
    )
    if s.chat:
        return chat(s, model, encoding, load_draft(s, model, encoding, device) if s.draft else None)
    texts = [read_prompt(text, i + 1) for i, text in enumerate(s.prompt)]
    prompts = [encode(encoding, text) for text in texts]
    stop, streams = stop_tokens(encoding), [TextStream(encoding) for _ in texts]
    draft, plan = (
        load_draft(s, model, encoding, device) if s.draft else None,
        Speculation(s.speculate),
    )
    whole, counts, began, single = (
        list(texts),
        [0] * len(texts),
        time.perf_counter(),
        len(texts) == 1,
    )
    rounds = generate(
        model,
        prompts,
        s.max_new_tokens,
        s.temperature,
        s.top_k,
        s.top_p,
        stop,
        torch.Generator(device).manual_seed(s.seed),
        draft,
        plan,
    )
    for row in rounds:
        if single and not counts[0]:  # only now is it sure that the prompt can be continued
            print(texts[0], end="", flush=True)
        for i, token in [(i, token) for i, tokens in enumerate(row) for token in tokens]:
            counts[i] += 1
            if token not in stop:
                piece = streams[i].feed(token)
                whole[i] += piece
                if single:
                    print(piece, end="", flush=True)
    seconds, count = time.perf_counter() - began, sum(counts)
    context = min(longest_text(model), longest_text(draft or model))
    full = any(len(prompt) + n >= context for prompt, n in zip(prompts, counts))
    for i, stream in enumerate(streams):
        tail = stream.finish()
        print(tail if single else f"=== {i + 1} of {len(texts)}\n{whole[i]}{tail}")
    end = f", up to the context of {context}" if full else ""
    if draft:
        end = f", {plan.accepted / max(1, plan.proposed):.0%} of the draft's tokens kept, {count / plan.passes:.2f} tokens a pass of the model ({'the draft does not pay here and was left' if plan.over else f'K = {plan.K}'}){end}"
    print(
        f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s{end}", file=sys.stderr
    )


if __name__ == "__main__":
    run_command(main)
