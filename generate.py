"""Text in, text out: tokenizers, sampling, and decoding with the cache.

    python generate.py --prompt "def "                                   stream from out/student
    python generate.py --model out/teacher --prompt - < file.py          the prompt from standard input
    python generate.py --prompt "import " --prompt "class " --temperature 0
    python generate.py --draft out/draft/student --prompt "def "         speculatively: the same law, sooner

One decoding step feeds the newest token through `Hybrid` with its Cache and draws the next token from

    p(token) = softmax(logits / temperature), cut to the top_k likeliest and to the smallest set of mass top_p.

With a draft, whose law is q, a step is a round (section 4 of arXiv 2408.15237; Leviathan et al., 2211.17192):

    draft    K tokens x_1 … x_K, one after the other, each from its q
    verify   the K + 1 laws p at and after them, in one pass
    keep     x_1, x_2, … while u < p(x_i) / q(x_i), u uniform; then one token more, from max(p - q, 0) in place of the
             first rejected, or from p after the last

In this file, top to bottom: command lines from dataclasses (train_distill.py uses it too); tokenizers; the law a token
is drawn from; the keeping of proposals; `generate`, the loop; the command.
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
    return mil.pack(model), encoding


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


def draw(law, generator=None):
    """One token (...) from each law (..., v): the first to ring among clocks of these rates. Where the law is no law (a NaN), -1."""
    clocks = torch.empty_like(law).exponential_(generator=generator).clamp(min=torch.finfo(law.dtype).tiny)
    tokens = (law / clocks).argmax(-1)  # as torch.multinomial, which would wait for the GPU
    return torch.where(law.sum(-1) > 0, tokens, -1)


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
    chance, row = acceptance(p[:, :-1], q, proposed), torch.arange(len(p), device=p.device)  # (b, K); NaN, so rejected, where q is
    kept = torch.rand(chance.shape, generator=generator, dtype=p.dtype, device=p.device) < chance
    count = kept.long().cumprod(1).sum(1)
    q = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)                                     # after the last, nothing is dealt out
    return count, draw(residual(p[row, count], q[row, count]), generator)


def best_k(alpha, cost, most=8):
    """The number of tokens to propose: the K in 0 … most with the most tokens in a unit of time, when each is accepted with probability
    alpha (as if independently) and adds `cost` of a plain step to a round (Leviathan et al., Theorem 3.8, where that is the draft's step)."""
    return max(range(most + 1), key=lambda K: sum(alpha**i for i in range(K + 1)) / (K * cost + 1))


class Speculation:
    """How much to propose, and how it went. Always K tokens a round; or with K = 0 what best_k says to the rates and times measured."""

    def __init__(self, K=0):
        self.fixed, self.most, self.choices = K != 0, K or 8, iter([(K, math.inf)]) if K else self.choose()
        self.K, self.due = next(self.choices)                          # what to propose, until so many rounds are over
        self.tried = self.K                                            # the last that was not 0
        self.over = False                                              # the draft is of no more use
        self.rounds = self.passes = self.proposed = self.accepted = 0  # passes: of the target, each row for itself
        self.kept = self.rejected = 0                                  # since the last choice
        self.took = {}                                                 # K: its warm rounds, and the draft's and the target's seconds in them
        self.spent, self.cold = 0, math.inf                            # seconds since the last choice; of the shortest round with a new K

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
        return best_k(alpha, max(0, (draft + target) / rounds - plain) / self.tried / plain, self.most)

    def count(self, n, K, used):
        """A row kept n of K tokens, of which the text used `used` (a stop token cuts)."""
        self.passes, self.proposed, self.accepted = self.passes + 1, self.proposed + K, self.accepted + used
        self.kept, self.rejected = self.kept + n, self.rejected + (n < K)

    def time(self, draft, target, K, warm):
        """A round is over: seconds of its halves, the draft's K steps and the target's pass; not `warm` while it is slow for being new. Another
        K is not begun before 20 times what such a round takes more than others has been spent: on a GPU, where two rounds are new and a
        graph is captured, a short text keeps its first K."""
        self.rounds += 1
        if not warm:
            self.cold = min(self.cold, draft + target) if K else self.cold
            return
        n, *took = self.took[K] = [a + b for a, b in zip(self.took.get(K, (0, 0, 0)), (1, draft, target))]
        self.tried, self.spent = K or self.tried, self.spent + draft + target
        if self.rounds >= self.due and (K == 0 or self.spent >= 20 * (self.cold - sum(took) / n)):
            choice = next(self.choices, None)
            self.over, (self.K, rounds) = choice is None, choice or (0, math.inf)
            self.due, self.spent = self.rounds + rounds, 0


def check_sampling(max_new_tokens, temperature, top_k, top_p, dash=""):
    for name, value, sound, wanted in (("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
                                       ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
                                       ("top_k", top_k, top_k >= 0, "0 (no limit) or more"),
                                       ("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1")):
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
            raise MilError(f"prompt {i + 1} has {len(prompt)} tokens, but the {whose}'s context is {context}: expected at "
                           f"most {context - 1}, to leave room for one more")
        for token in prompt:
            if not 0 <= token < v:
                raise MilError(f"prompt {i + 1} has token {token}, but the model's vocabulary is {v}")


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
                with torch.cuda.graph(self.graph, stream=torch.cuda.Stream()):
                    self.out = self.f()
            self.graph.replay()
        return self.out


def log_places(model, rows, K=0):
    """How many tokens the log of the model's cache takes: those of a round; without a draft 3, so that kernels write the states with every
    4th token, where large states are what a step waits for (Mamba-2's in a batch: table 8 of tests/bench.py), else none."""
    return K + 1 if K else 3 if rows >= 16 and "mamba2" in model.config.mixers else 0


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=(), generator=None, draft=None, speculate=0):
    """Continue each of `prompts` (lists of token ids of any lengths); every round yields a list of new ids per row.

    With a `draft`, another model over the same tokens, a round is speculative: the draft proposes K tokens, one by one; the model reads
    them in one pass, keeps the longest part it agrees with and adds one token; the law of the text is the model's own, whatever the draft
    (`verify`). `speculate` is K, 0 to have it chosen by what is accepted and what it costs, or a Speculation. Without a draft K is 0 and a
    round is one token, as is a first round with a prompt of one (the draft reads two). Neither model ever undoes anything: each cache moves
    its cursor back (mil.Cache). On CUDA each half of a round, the draft's and the model's, is one launch (Launched), up to K = 15,
    heads of 128 and 16 query heads a kv head, and not in float64.

    A row that is finished (it drew one of `stop`, which is yielded, or filled the context, or has max_new_tokens) yields [] from then on;
    the generator ends with the last row. Rows do not see each other. MilError for prompts and settings that cannot work, and for NaN.
    """
    context, whose = min(((longest_text(m), name) for m, name in ((model, "model"), (draft, "draft")) if m), key=lambda pair: pair[0])
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    check_prompts(prompts, model.config.v, context, whose)
    if draft and draft.config.v != model.config.v:
        raise MilError(f"the draft's vocabulary is {draft.config.v}, the model's {model.config.v}: they must speak of the same tokens")
    plan = speculate if isinstance(speculate, Speculation) else Speculation(speculate)
    if draft and plan.fixed and not 1 <= plan.K < context:
        wanted = f"to {context - 1}, less than the context" if context < math.inf else "or more"
        raise MilError(f"speculate is {plan.K}, expected 1 {wanted}, or 0 to have it chosen")
    for token in stop:
        if not 0 <= token < model.config.v:
            raise MilError(f"stop token {token} is outside the vocabulary of {model.config.v}")
    law = lambda model, hidden: token_law(model.logits(hidden), temperature, top_k, top_p)  # noqa: E731
    texts, ends = [list(prompt) for prompt in prompts], [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
    plan.most = int(min(plan.most, context - 1))                                              # the largest K
    most = plan.most if draft else 0
    caches = [mil.Cache(m, len(texts), max(ends) + most, log=log_places(m, len(texts), most), lazy=not draft) for m in (model, draft) if m]
    device = caches[0].device if caches[0].device.type == "cuda" and all(cache.fusable(most + 1) for cache in caches) else None
    ahead, before, last = now = torch.zeros(3, len(texts), dtype=torch.long, device=caches[0].device)  # per row len(text) - 1, text[-2], text[-1]
    done, unread, halves = [False] * len(texts), True, {}
    feed(model, caches[0], [text[:-1] for text in texts])  # the last token is left to the first round

    def propose(K, follow):
        """The last token and the draft's K, and the laws they are from: (b, 1 + K), (b, K, v). To `follow` the text the draft reads two tokens,
        since it never read its own last."""
        tokens, q = [last[:, None]], []
        if follow:
            caches[1].start(ahead - 1, max(map(len, texts)) - 2, max(2, K + 1))
            hidden = draft.hidden(torch.stack([before, last], dim=1), caches[1])[:, -1:]
        for j in range(K):
            hidden = hidden if j == 0 else draft.hidden(tokens[-1], caches[1])
            q.append(law(draft, hidden))                                                      # (b, 1, v)
            tokens.append(draw(q[-1], generator).clamp(min=0))                                # (b, 1)
        return torch.cat(tokens, dim=1), torch.cat(q, dim=1) if K else None

    def check(proposed, q):
        """Per row how many are kept, what was proposed, and one token more: (b, 2 + K)."""
        caches[0].start(ahead, max(map(len, texts)) - 1, 0 if q is None else proposed.shape[1])
        p = law(model, model.hidden(proposed, caches[0]))                                     # (b, 1 + K, v)
        count, extra = verify(proposed[:, 1:], p[:, :0] if q is None else q, p, generator)
        return torch.cat([count[:, None], proposed[:, 1:], extra[:, None]], dim=1)

    while not all(done):
        follow = bool(draft) and not plan.over and min(map(len, texts)) > 1
        K = min(plan.K, most) if follow else 0
        if follow and unread:
            feed(draft, caches[1], [text[:-2] for text in texts])
            unread = False
        if (K, follow) not in halves:
            # without a cycle of references, so that no graph is freed by the garbage collector while another is captured, which would break it
            first = Launched(lambda how=(K, follow): propose(*how), device, generator)
            halves[K, follow] = first, Launched(lambda first=first: check(*first.out), device, generator)
        now.copy_(torch.tensor([[len(text) - 1, text[-2] if len(text) > 1 else 0, text[-1]] for text in texts]).T)
        times = [stamp(now.device)]
        for half in halves[K, follow]:
            out = half()
            times.append(stamp(now.device))
        rows, new = out.tolist(), [[] for _ in texts]
        for i in [i for i, d in enumerate(done) if not d]:
            n, *tokens = rows[i]
            tokens = [*tokens[:n], tokens[-1]][:ends[i] - len(texts[i])]
            cut = next((j + 1 for j, token in enumerate(tokens) if token in stop), None)
            new[i] = tokens[:cut]
            if -1 in new[i]:
                raise MilError(f"prompt {i + 1}: the model's logits are NaN after {len(texts[i]) + new[i].index(-1)} tokens")
            texts[i] = texts[i] + new[i]
            done[i] = cut is not None or len(texts[i]) >= ends[i]
            if draft:
                plan.count(n, K, min(n, len(new[i])))
        if draft:
            plan.time(*[seconds(*pair) for pair in zip(times, times[1:])], K, halves[K, follow][0].calls > (2 if device else 1))
        yield new


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
    draft: str = flag("", "checkpoint of a smaller model over the same tokens, to decode speculatively: text of the same law, sooner")
    speculate: int = flag(0, "how many tokens the draft proposes at a time; 0: chosen by what is kept and what it costs")
    prompt: list = flag([], "the text to continue; - reads standard input; given several times, a batch", action="append", metavar="text")
    max_new_tokens: int = flag(256, "stop after this many tokens")
    temperature: float = flag(0.8, "0 takes the likeliest token, 1 samples the model as it is, more is wilder")
    top_k: int = flag(0, "sample among the k likeliest tokens only; 0: no limit")
    top_p: float = flag(0.95, "sample among the fewest tokens that have this probability together; 1: no limit")
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
        raise MilError(f"--speculate is {s.speculate}, expected 1 or more, or 0 to have it chosen" if s.draft else
                       "--speculate needs a --draft: the checkpoint of the model that proposes")
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


def load_draft(s, model, encoding, device):
    """The model in --draft. MilError unless it speaks the target's tokens."""
    draft, other = load_with_tokenizer(s.draft, device, getattr(torch, s.dtype) if s.dtype else None)
    if draft.config.v != model.config.v:
        raise MilError(f"--draft {s.draft} has a vocabulary of {draft.config.v}, {s.model} one of {model.config.v}: a draft must speak the same tokens")
    if (encoding._mergeable_ranks, encoding._special_tokens) != (other._mergeable_ranks, other._special_tokens):
        raise MilError(f"--draft {s.draft} has the tokenizer {tokenizer_of(s.draft)}, {s.model} has {tokenizer_of(s.model)}: their tokens differ")
    return draft


def main(argv):
    s = parse_flags(Settings, argv, __doc__)
    check_settings(s)
    device = pick_device(s.device)
    model, encoding = load_with_tokenizer(s.model, device, getattr(torch, s.dtype) if s.dtype else None)
    texts = [read_prompt(text, i + 1) for i, text in enumerate(s.prompt)]
    prompts = [encode(encoding, text) for text in texts]
    stop, streams = stop_tokens(encoding), [TextStream(encoding) for _ in texts]
    draft, plan = load_draft(s, model, encoding, device) if s.draft else None, Speculation(s.speculate)
    whole, counts, began, single = list(texts), [0] * len(texts), time.perf_counter(), len(texts) == 1
    rounds = generate(model, prompts, s.max_new_tokens, s.temperature, s.top_k, s.top_p, stop,
                      torch.Generator(device).manual_seed(s.seed), draft, plan)
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
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s{end}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
