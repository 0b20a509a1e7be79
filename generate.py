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


# --------------------------------------------------------------------------------------------------
# Distributions of tokens


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities (..., v) that a token is drawn from; NaN in logits (..., v) gives NaN.

    temperature 0 puts everything on the likeliest. top_k keeps the k likeliest (0: all), then top_p
    the fewest likeliest whose probability reaches top_p together. Ties are kept.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        probs = torch.zeros_like(logits).scatter_(-1, likeliest, 1)
        return probs.masked_fill(logits.isnan().any(-1, keepdim=True), torch.nan)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered = probs.sort(-1, descending=True).values
        kept = ordered.cumsum(-1) - ordered < top_p  # until those before it have reached top_p
        least = ordered.masked_fill(~kept, torch.inf).min(-1, keepdim=True).values
        probs = probs.masked_fill(probs < least, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs, generator=None):
    """A token (...) from each distribution (..., v); -1 where it holds a NaN."""
    return first_to_ring(probs, waiting_times(probs, probs.dtype, generator))


def waiting_times(like, dtype, generator):
    """Times, shaped like `like`, that clocks of rate 1 take to ring."""
    times = torch.empty_like(like, dtype=dtype).exponential_(generator=generator)
    return times if times.is_cuda else times.clamp_(min=torch.finfo(dtype).tiny)  # > 0 on a GPU


def first_to_ring(probs, times):
    """The first of clocks of the rates `probs` to ring, which is a draw from them.

    torch.multinomial does the same, but waits for the GPU.
    """
    first, tokens = (probs / times).max(-1)
    return torch.where(first > 0, tokens, -1)


def choose(logits, times, how):
    """A token (...) from the distribution of logits (..., v); one piece, to be compiled."""
    return first_to_ring(distribution(logits, *how), times)


def acceptance(p, q, tokens):
    """The probability min(1, p/q) of keeping tokens (...) drawn from q (..., v), p being wanted."""
    p, q = (t.gather(-1, tokens[..., None])[..., 0] for t in (p, q))
    return (p / q).clamp(max=1)


def residual(p, q):
    """The distribution (..., v) of the token in place of a rejected one: what p has over q.

    The tokens that are kept have dealt out the rest of p (2211.17192, appendix A.1).
    """
    left = (p - q).clamp(min=0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p)  # p = q up to rounding
    return left / left.sum(-1, keepdim=True)


def verify(proposed, q, p, generator=None):
    """How many of the draft's tokens (b, K) each row keeps (b,), and one token more (b,).

    The tokens are drawn from q (b, K, v); the model's distributions are p (b, K + 1, v). The result
    is distributed as if drawn from p alone.
    """
    chance = acceptance(p[:, :-1], q, proposed)  # (b, K); NaN, so rejected, where q is
    coin = torch.rand(chance.shape, generator=generator, dtype=p.dtype, device=p.device)
    count = (coin < chance).long().cumprod(1).sum(1)
    q = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)  # after the last nothing is dealt out
    row = torch.arange(len(p), device=p.device)
    return count, draw(residual(p[row, count], q[row, count]), generator)


# --------------------------------------------------------------------------------------------------
# Decoding


def longest_text(model):
    """How many tokens the model can read and write: the context, if there is attention."""
    return model.config.context if "attention" in model.config.mixers else math.inf


def check_sampling(max_new_tokens, temperature, top_k, top_p, dash=""):
    for name, value, sound, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        # a logit divided by less could overflow
        (
            "temperature",
            temperature,
            temperature == 0 or 1e-20 < temperature < math.inf,
            "0 or more",
        ),
        ("top_k", top_k, top_k >= 0, "0 (no limit) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1"),
    ):
        if not sound:
            raise MilError(f"{dash}{name} is {value}, expected {wanted}")


def check_prompts(prompts, v, context, stop=()):
    """Raises MilError if a prompt cannot be continued, or a stop token is none of v."""
    if not prompts:
        raise MilError("no prompts: there is nothing to continue")
    for token in stop:
        if not 0 <= token < v:
            raise MilError(f"stop token {token} is outside the vocabulary of {v}")
    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            raise MilError(f"prompt {i} is empty: there is nothing to continue")
        if len(prompt) >= context:
            room = f"expected at most {context - 1}, to leave room for one more"
            raise MilError(f"prompt {i} has {len(prompt)} tokens, the context is {context}: {room}")
        for token in prompt:
            if not 0 <= token < v:
                raise MilError(f"prompt {i} has token {token}, but the model's vocabulary is {v}")


def check_draft(draft, K, v):
    if draft.config.v != v:
        told = f"the draft's vocabulary is {draft.config.v}, the model's {v}"
        raise MilError(f"{told}: they must have the same tokens")
    if not 1 <= K < kernels.FEW:
        raise MilError(f"speculate is {K}, expected 1 to {kernels.FEW - 1}")


class Launched:
    """Calls of one function of tensors that stay in place; on a GPU one launch of a CUDA graph.

    The first call runs the function, which compiles its kernels, the second captures it. Nothing
    here refers to the function's owner: a graph that the garbage collector frees late would break
    the capture of another.
    """

    def __init__(self, device, generator):
        self.device, self.generator, self.calls, self.graph = device, generator, 0, None

    def __call__(self, f, *args):
        self.calls += 1
        if self.device is None or self.calls == 1:
            return f(*args)
        with torch.cuda.device(self.device):
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                if self.generator:
                    self.graph.register_generator_state(self.generator)
                stream = torch.cuda.Stream()
                # other threads may go on
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.out = f(*args)
            self.graph.replay()
        return self.out


class Rounds:
    """The tensors of decoding: models with their caches, and where the text of each row ends.

    A round appends 1 to K + 1 tokens to each row. Without a draft K is 0.
    """

    def __init__(self, models, rows, context, K, how, generator):
        self.models, self.context, self.K = models, context, K
        self.how, self.generator = how, generator
        undo = len(models) > 1
        self.caches = [mil.Cache(model, rows, context + K, undo) for model in models]
        self.device = self.caches[0].device
        self.ends = torch.zeros(3, rows, dtype=torch.long, device=self.device)
        self.at, self.before, self.last = self.ends  # the last token's place, the two last tokens
        fused = self.device.type == "cuda" and all(c.fusable(K + 1) for c in self.caches)
        self.halves = [Launched(self.device if fused else None, generator) for _ in models]
        self.many = fused and rows > kernels.MANY and not undo
        self.choose = torch.compile(choose) if self.many else choose

    def launch(self, longest, speculative):
        """Begins a round of texts up to `longest`. Returns the result of `extend`, on the CPU, and
        an event after which it is there, or None."""
        if speculative:
            out = self.halves[0](self.extend, longest, *self.halves[1](self.propose, longest))
        elif len(self.models) == 2:
            out = self.extend(longest)  # once; no graph is made of it
        else:
            out = self.halves[0](self.extend, longest)
        out, event = out.to("cpu", non_blocking=True), None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return out, event

    def propose(self, longest):
        """K tokens of the draft and what they are drawn from: (b, K), (b, K, v).

        Every pass reads the text's last two tokens, since the draft has not read its own last
        proposal, and those proposed so far, from the same place on.
        """
        draft, cache = self.models[1], self.caches[1]
        tokens, q = [self.before, self.last], []
        for _ in range(self.K):
            cache.keep(self.at - 1, longest - 2)
            hidden = draft.hidden(torch.stack(tokens, dim=1), cache)[:, -1:]
            q.append(distribution(draft.lm_head(hidden)[:, 0], *self.how))
            tokens.append(draw(q[-1], self.generator).clamp(min=0))
        return torch.stack(tokens[2:], dim=1), torch.stack(q, dim=1)

    def extend(self, longest, proposed=None, q=None):
        """The model reads the last token and those proposed, keeps some and adds one: (b, 2 + K).

        The columns are how many it keeps, what was proposed, and the one more.
        """
        model, cache, new = self.models[0], self.caches[0], self.last[:, None]
        if proposed is not None:
            new = torch.cat([new, proposed], dim=1)
        cache.keep(self.at, longest - 1)
        logits = model.lm_head(model.hidden(new, cache))
        if proposed is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            times = waiting_times(logits[:, 0], dtype, self.generator)
            count, extra = torch.zeros_like(self.last), self.choose(logits[:, 0], times, self.how)
        else:
            count, extra = verify(proposed, q, distribution(logits, *self.how), self.generator)
        self.before.copy_(new.gather(1, count[:, None])[:, 0])
        self.at.copy_((self.at + count + 1).clamp(max=self.context - 1))
        self.last.copy_(extra.clamp(min=0))
        return torch.cat([count[:, None], new[:, 1:], extra[:, None]], dim=1)

    def read(self, which, new, held):
        """The model (0) or the draft (1), which holds `held` tokens a row, reads `new`, lists."""
        counts = list(map(len, new))
        if max(counts):
            cache = self.caches[which]
            cache.keep(torch.tensor(held), max(held))
            padded = [tokens + [0] * (max(counts) - len(tokens)) for tokens in new]
            self.models[which].hidden(torch.tensor(padded, device=self.device), cache, counts)


class Decoder:
    """Continues texts, a batch of `rows` with room for `size` tokens each.

    `decode` may be called again with the same texts, longer, and reads only what is new. With a
    `draft`, another model over the same tokens, a round is speculative: the draft proposes K =
    `speculate` tokens, the model reads them in one pass, keeps the longest part it agrees with, and
    adds one (`verify`). The text has the model's own distribution, whatever the draft. proposed,
    accepted, passes count the draft's tokens, those in the text, and passes of the model, each row
    for itself.
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
        speculate=4,
    ):
        check_sampling(1, temperature, top_k, top_p)
        models = [model, draft] if draft else [model]
        self.v, self.context = model.config.v, min(size, *map(longest_text, models))
        if draft:
            check_draft(draft, speculate, self.v)
        self.K = min(speculate, self.context - 1) if draft else 0
        how = temperature, top_k, top_p
        self.rounds = Rounds(models, rows, self.context, self.K, how, generator)
        self.texts = [[] for _ in range(rows)]
        self.held = [[0] * rows for _ in models]  # how much of each text a cache holds
        self.torn = False  # whether a cache may hold other tokens than these
        self.proposed = self.accepted = self.passes = 0

    @torch.inference_mode()
    def decode(self, prompts, max_new_tokens, stop=()):
        """Continues `prompts`, a list of token ids a row. Yields a tuple of new ids per row.

        A row is finished if it drew one of `stop`, which is yielded, filled the context or has
        max_new_tokens; it yields () from then on. The generator ends with the last row. Raises
        MilError if a prompt or setting cannot work, and if logits are NaN.
        """
        check_sampling(max_new_tokens, 1, 0, 1)
        check_prompts(prompts, self.v, self.context, stop)
        if len(prompts) != len(self.texts):
            raise MilError(f"{len(prompts)} prompts for a decoder of {len(self.texts)} rows")
        self.begin(prompts)
        texts, stop = self.texts, {*stop, -1}
        live, coming = set(range(len(prompts))), None
        ends = [min(len(prompt) + max_new_tokens, self.context) for prompt in prompts]
        while live:
            out, event = coming or self.launch()
            # Of many rows the next round is launched before this one's tokens are looked at.
            more = self.rounds.many and any(ends[i] - len(texts[i]) > 1 for i in live)
            coming = self.launch() if more else None
            if event:
                event.synchronize()
            new = self.take(out, live, ends, stop)
            self.torn |= len(live) < len(prompts) or coming is not None
            ended = [i for i in live if len(texts[i]) == ends[i] or new[i][-1] in stop]
            if ended:
                live.difference_update(ended)
                self.place(ended)
            yield new

    def begin(self, prompts):
        """Takes the prompts for texts; forgets what the caches hold if they are others."""
        for which, held in enumerate(self.held):
            for n, text, prompt in zip(held, self.texts, prompts, strict=True):
                self.torn |= text[:n] != prompt[:n] or n > max(0, len(prompt) - 1 - which)
        if self.torn:
            self.held, self.torn = [[0] * len(prompts) for _ in self.held], False
            for cache in self.rounds.caches:
                cache.clear()
        self.texts[:] = map(list, prompts)
        self.catch_up(0)
        self.place(range(len(prompts)))

    def catch_up(self, which):
        """The model (0) or the draft (1) reads the texts, but for the last token, or last two."""
        held = self.held[which]
        ends = [max(n, len(text) - 1 - which) for n, text in zip(held, self.texts, strict=True)]
        new = [text[a:b] for text, a, b in zip(self.texts, held, ends, strict=True)]
        self.rounds.read(which, new, held)
        self.held[which] = ends

    def place(self, rows):
        """Where these rows of the texts end, and a round begins. A finished row stays there."""
        texts = [self.texts[i] for i in rows]
        ends = [[len(text) - 1, text[-2] if len(text) > 1 else 0, text[-1]] for text in texts]
        self.rounds.ends[:, list(rows)] = torch.tensor(ends, device=self.rounds.device).T

    def launch(self):
        lengths = list(map(len, self.texts))
        # The draft reads the token before the last, which a text of one token lacks.
        self.speculative = self.K > 0 and min(lengths) > 1
        if self.speculative:
            self.catch_up(1)
        return self.rounds.launch(max(lengths), self.speculative)

    def take(self, out, live, ends, stop):
        """Adds a round's tokens to the texts of the live rows. Returns a tuple per row.

        Tuples, since the garbage collector does not track them: with lists, 1,024 a round, it
        paused for 0.2 s now and then.
        """
        counts, *columns = out.T.tolist()
        new = [()] * len(self.texts)
        for i in live:
            text, n = self.texts[i], counts[i]
            tokens = (*[column[i] for column in columns[:n]], columns[-1][i])
            tokens = tokens[: ends[i] - len(text)]
            if not stop.isdisjoint(tokens):
                last = next(j for j, token in enumerate(tokens) if token in stop)
                tokens = tokens[: last + 1]
                if tokens[-1] < 0:
                    told = f"logits are NaN after {len(text) + last} tokens"
                    raise MilError(f"prompt {i + 1}: the model's {told}")
            new[i] = tokens
            text += tokens
            self.accepted += min(n, len(tokens))
        self.passes += len(live)
        self.proposed += len(live) * (len(columns) - 1)
        for which in range(1 + self.speculative):
            self.held[which] = [len(text) - 1 - which for text in self.texts]
        return new


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
    speculate=4,
):
    """Continues each of `prompts`: yields what a new Decoder's `decode` does."""
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    size = max(map(len, prompts), default=0) + max_new_tokens
    how = temperature, top_k, top_p, generator, draft, speculate
    yield from Decoder(model, len(prompts), size, *how).decode(prompts, max_new_tokens, stop)


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
        s.speculate or 4,
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
    draft = load_draft(s, model, encoding, device) if s.draft else None
    size = max(map(len, prompts)) + s.max_new_tokens
    how = s.temperature, s.top_k, s.top_p, torch.Generator(device).manual_seed(s.seed)
    decoder = Decoder(model, len(prompts), size, *how, draft, s.speculate or 4)
    whole, counts, began, single = (
        list(texts),
        [0] * len(texts),
        time.perf_counter(),
        len(texts) == 1,
    )
    rounds = decoder.decode(prompts, s.max_new_tokens, stop)
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
        kept = decoder.accepted / max(1, decoder.proposed)
        end = (
            f", {kept:.0%} of the draft's tokens kept, {count / decoder.passes:.2f} tokens a pass of "
            f"the model (K = {decoder.K}){end}"
        )
    print(
        f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s{end}", file=sys.stderr
    )


if __name__ == "__main__":
    run_command(main)
