"""Text in, text out: decoding with the cache, plain and speculative; tokenizers; conversations.

    python generate.py --prompt "def "                         stream from out/student
    python generate.py --prompt - < file.py                    the prompt from standard input
    python generate.py --prompt "import " --prompt "class "    a batch
    python generate.py --model M --draft D --prompt "def "     speculative: the same text, faster
    python generate.py --model Llama-3.2-1B-Instruct --chat    a conversation

One step feeds the newest token through `Hybrid` with its Cache and draws the next token from

    p(token) = softmax(logits / temperature), cut to the top_k likeliest and to a mass of top_p.

With a draft, whose distribution is q, a step is a round (arXiv 2408.15237, section 4; 2211.17192):

    propose  K tokens x_1 … x_K, one after the other, each from its q
    verify   the K + 1 distributions p at and after them, in one pass
    keep     x_1, x_2, … while u < p(x_i) / q(x_i), u uniform; then one token more,
             from max(p - q, 0) in place of the first rejected, or from p after the last
"""

import argparse
import base64
import codecs
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

import kernels
import mil
from mil import MilError

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


# --------------------------------------------------------------------------------------------------
# Tokenizers and conversations

FILES = "*token*", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"
ENDS = "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "</s>"
MARK = "\ufdd0"  # a noncharacter; stands inside a control token's name where a user wrote it
PATTERN = (  # how Llama 3 splits text into words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back; and conversations.

    vocabulary: list of the bytes each id stands for, b"" for control tokens and unused ids.
    begin: list of the ids in front of every text. stops: list of the ids that end a text or a turn.
    template: how conversations are written: "plain", "llama3", or the text of a chat template.
    """

    def __init__(self, vocabulary, control, begin, stops=(), template=""):
        """control: {text: id} of the control tokens."""
        stops = [*stops, *(control[text] for text in ENDS if text in control)]
        self.vocabulary, self.size = vocabulary, len(vocabulary)
        self.begin, self.stops = begin, list(dict.fromkeys(stops))
        self.template = template or ("llama3" if "<|start_header_id|>" in control else "plain")
        names = {i: text for text, i in control.items()}
        self.opening = "".join(names[i] for i in begin)
        self.closing = names.get(self.stops[0], "") if self.stops else ""
        texts = "|".join(sorted(map(re.escape, control), key=len, reverse=True))
        self.control = re.compile(f"(?=(?:{texts or '(?!)'}))(.)", re.DOTALL)  # their first letters

    def bytes_of(self, token):
        return self.vocabulary[token] if token < self.size else b""

    def decode(self, ids):
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def same_text(self, other):
        """Whether the same ids mean the same text."""
        pairs = itertools.zip_longest(self.vocabulary, other.vocabulary, fillvalue=b"")
        return all(a == b for a, b in pairs)

    def encode(self, text, begin=True):
        """Ids of a text, after `begin` or as one that continues another, without control tokens."""
        ids = self.tokens(mend(text), control=False, first=begin)
        return self.begin + ids if begin else ids

    def conversation(self, messages, reply=False):
        """Ids of messages (dicts of "role" and "content"), and for each whether it is a reply's.

        With `reply` they end where the assistant's next message begins. Nothing that a message
        says becomes a control token. Raises MilError if the chat template refuses the messages.
        """
        messages = [{key: self.hide(m[key]) for key in ("role", "content")} for m in messages]
        ids = self.read(messages, reply)
        own = [False] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i > 0:
                begin = shared(ids, self.read(messages[:i], reply=True))
                end = shared(ids, self.read(messages[: i + 1], reply=False))
                last = [j + 1 for j in range(begin, end) if ids[j] in self.stops][-1:] or [end]
                own[begin : last[0]] = [True] * (last[0] - begin)
        return ids, own

    def hide(self, text):
        return self.control.sub(rf"\1{MARK}", mend(text).replace(MARK, "\ufffd"))

    def read(self, messages, reply):
        parts = self.write(messages, reply).split(MARK)
        return [i for n, part in enumerate(parts) for i in self.tokens(part, True, first=n == 0)]

    def write(self, messages, reply):
        """The text of a conversation, with its control tokens."""
        llama3, text = self.template == "llama3", self.opening
        head = "<|start_header_id|>{}<|end_header_id|>\n\n" if llama3 else "{}:\n"
        for m in messages:
            end = self.closing if m["role"] == "assistant" else ""
            said = f"{m['content'].strip()}<|eot_id|>" if llama3 else f"{m['content']}{end}\n"
            text += head.format(m["role"]) + said
        return text + head.format("assistant") if reply else text


class Tiktoken(Tokenizer):
    """A tiktoken encoding: bytes, tiktoken's own, and Meta's tokenizer.model."""

    def __init__(self, pattern, ranks, control):
        how = {"pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": control}
        self.encoding = tiktoken.Encoding("mil", **how)
        vocabulary = [b""] * self.encoding.n_vocab
        for data, i in ranks.items():
            vocabulary[i] = data
        begin = [i for text, i in control.items() if text == "<|begin_of_text|>"]
        super().__init__(vocabulary, control, begin)

    def tokens(self, text, control, first):
        if re.search(r"(?<!\s)\s{500000}", text):  # from about 700,000 on tiktoken 0.14 panics
            raise MilError("a text with 500,000 spaces or line ends in a row cannot be tokenised")
        allowed = "all" if control else set()
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())


class Transformers(Tokenizer):
    """The tokenizer in a folder, as transformers' AutoTokenizer reads it, and its chat template."""

    def __init__(self, folder):
        try:
            import transformers
        except ImportError:
            hint = "its tokenizer needs transformers: pip install transformers"
            raise MilError(f"{folder}: {hint}") from None
        transformers.logging.set_verbosity_error()
        gguf = [] if any(folder.glob("*token*")) else sorted(folder.glob("*.gguf"))
        more = {"gguf_file": gguf[0].name} if gguf else {}
        try:
            hf = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **more)
            letters = byte_letters(hf.backend_tokenizer)
        except Exception as e:  # the library raises anything
            raise MilError(f"{folder}: its tokenizer cannot be read: {first_line(e)}") from e
        self.folder, self.hf = folder, hf
        stops = [*stated_stops(folder), *([] if hf.eos_token_id is None else [hf.eos_token_id])]
        ends = [token for i, token in hf.added_tokens_decoder.items() if i in stops]
        for token in ends:
            token.special = True
        hf.add_tokens(ends, special_tokens=True)  # so that no text becomes one
        added, vocab = hf.added_tokens_decoder, hf.get_vocab()
        control = {token.content: i for i, token in added.items() if token.special}
        vocabulary = [b""] * (max(vocab.values()) + 1)
        for token, i in vocab.items():
            if token not in control:
                vocabulary[i] = token.encode() if i in added else token_bytes(token, letters)
        bare, whole = hf.encode("a", add_special_tokens=False), hf.encode("a")
        begin = whole[: whole.index(bare[0])]
        template = str(hf.get_chat_template()) if hf.chat_template else ""
        super().__init__(vocabulary, control, begin, stops, template)
        # Sentencepiece puts a space before a text. One that continues another follows a line end.
        self.lead = "" if self.decode(bare) == "a" else "\n"
        self.skip = len(hf.encode(self.lead, add_special_tokens=False))

    def tokens(self, text, control, first):
        lead, skip = ("", 0) if first else (self.lead, self.skip)
        how = {"add_special_tokens": False, "split_special_tokens": not control}
        return self.hf.encode(lead + text, **how)[skip:]

    def write(self, messages, reply):
        if self.template in ("plain", "llama3"):
            return super().write(messages, reply)
        how = {"tokenize": False, "add_generation_prompt": reply}
        try:
            return self.hf.apply_chat_template(messages, **how)
        except Exception as e:  # as the template has it
            raise MilError(f"{self.folder}: its chat template: {first_line(e)}") from e


def first_line(e):
    return f"{type(e).__name__}: {e}".splitlines()[0][:300]


def mend(text):
    """The text with U+FFFD in place of half a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shared(a, b):
    """How many ids two lists begin with in common."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def byte_letters(tokenizer):
    """The letter that stands for each byte in a byte-level vocabulary; {} for sentencepiece."""
    if tokenizer.decoder is None or b"ByteLevel" not in tokenizer.decoder.__getstate__():
        return {}
    rest = itertools.count(256)
    shown = [b != 32 and chr(b).isprintable() for b in range(256)]
    return {chr(b if shown[b] else next(rest)): bytes([b]) for b in range(256)}


def token_bytes(token, letters):
    if letters:
        return b"".join(letters.get(c, c.encode()) for c in token)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def stated_stops(folder):
    """The ids that end a text, by generation_config.json and config.json (ours: under "ids")."""
    stops = []
    for name in ("generation_config.json", "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            about = json.loads((folder / name).read_text(encoding="utf-8"))
            found = (about.get("ids") or about).get("eos_token_id")
            stops += found if isinstance(found, list) else [found]
    return [i for i in stops if isinstance(i, int)]


def read_meta(path):
    """Meta's tokenizer.model: a line `base64(bytes) rank` per token. 256 control tokens follow.

    They are named as in Llama 3.1. 3.0 has other names for some that it never says.
    """
    try:
        lines = map(bytes.split, path.read_bytes().splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise MilError(f"{path}: not lines of `base64 rank`, as Llama 3's file has them") from None
    n = len(ranks)
    if {*ranks.values()} != {*range(n)} or not {bytes([b]) for b in range(256)} <= {*ranks}:
        what = f"its {n} ranks are not 0 … {n - 1}, or it lacks some of the 256 bytes"
        raise MilError(f"{path}: {what}; is the file whole?")
    rest = [f"reserved_special_token_{i}" for i in range(248)]
    names = ["begin_of_text", "end_of_text", *rest[:2], "finetune_right_pad_id", rest[2]]
    names += ["start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", *rest[3:]]
    return Tiktoken(PATTERN, ranks, {f"<|{name}|>": n + i for i, name in enumerate(names)})


def is_named(tokenizer):
    """Whether this names a tokenizer rather than a path."""
    return tokenizer == "bytes" or tokenizer in tiktoken.list_encoding_names()


def load_tokenizer(name):
    """The Tokenizer of a name ("bytes", or one of tiktoken's), or of a folder or a file in it.

    Raises MilError if there is none or it cannot be read.
    """
    if name == "bytes":
        return Tiktoken("(?s:.)", {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256})
    if is_named(name):
        try:
            found = tiktoken.get_encoding(name)
            return Tiktoken(found._pat_str, found._mergeable_ranks, found._special_tokens)
        except Exception as e:  # whatever the download raises
            what = f"tiktoken must download it and could not ({type(e).__name__})"
            hint = "pass --tokenizer bytes or a folder, or set TIKTOKEN_CACHE_DIR"
            raise MilError(f"tokenizer {name}: {what}; {hint}") from e
    folder = folder_of(name)
    meta = folder / "tokenizer.model"
    if not (folder / "tokenizer.json").exists() and meta.exists() and meta.read_bytes().isascii():
        return read_meta(meta)
    if not any(folder.glob("*token*")) and not any(folder.glob("*.gguf")):
        names = ", ".join(tiktoken.list_encoding_names())
        wanted = f"a folder with a tokenizer.json or tokenizer.model, bytes, {names}"
        raise MilError(f"{name}: no tokenizer; expected {wanted}")
    return Transformers(folder)


def folder_of(name):
    return Path(name).parent if Path(name).is_file() else Path(name)


def tokenizer_of(directory):
    """What to give load_tokenizer for the checkpoint in `directory`."""
    name = mil.read_config(directory).get("tokenizer")
    return name if name and is_named(name) else str(directory)


def save_with_tokenizer(model, directory, tokenizer, **notes):
    """mil.save, and the tokenizer that load_tokenizer knows by this name or path: name or files."""
    read, named = load_tokenizer(tokenizer), is_named(tokenizer)
    mil.make_directory(directory)
    files = [] if named else [f for name in FILES for f in folder_of(tokenizer).glob(name)]
    for file in filter(Path.is_file, files):
        data = file.read_bytes()
        mil.write_whole(Path(directory) / file.name, lambda f, data=data: f.write(data))
    if isinstance(read, Transformers) and not (Path(directory) / "tokenizer.json").exists():
        read.hf.save_pretrained(directory)
    ids = {"bos_token_id": (read.begin or [None])[0], "eos_token_id": read.stops or None}
    notes = {"tokenizer": tokenizer if named else None, "ids": ids, **notes}
    mil.save(model, directory, **notes)


def load_with_tokenizer(directory, device=None, dtype=None):
    """The model in `directory`, a folder or hub name, and its Tokenizer. Prints notes on them."""
    tokenizer, model = load_tokenizer(tokenizer_of(directory)), mil.load(directory, device, dtype)
    size, v = tokenizer.size, model.config.v
    notes = list(mil.read_config(directory)["remarks"])
    if size != v:
        what = "stand for nothing" if size < v else "are never drawn, and refused in a prompt"
        sizes = f"the tokenizer has {size} tokens, the model {v}"
        notes.append(f"{directory}: {sizes}: those from {min(size, v)} on {what}")
    if not tokenizer.stops:
        notes.append(f"{directory}: no token is known to end a text")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return mil.pack(model), tokenizer


class TextStream:
    """Tokens in, text out. A character that spans tokens appears with its last byte."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens, self.text = [], ""

    def feed(self, tokens, final=False):
        """The text that these tokens add."""
        said = [token for token in tokens if token not in self.tokenizer.stops]
        text = self.decoder.decode(b"".join(map(self.tokenizer.bytes_of, said)), final)
        self.tokens += tokens
        self.text += text
        return text

    def finish(self):
        return self.feed([], final=True)


# --------------------------------------------------------------------------------------------------
# Command lines: every field of a dataclass is a flag (train_distill.py uses this too)


def flag(default, help, **parse):
    """A dataclass field that is also a flag `--name value`. `parse` goes to argparse."""
    about = {"help": help, "parse": parse}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def parse_flags(settings, argv, description):
    """An instance of the dataclass `settings` from `--name value` or `--name=value`.

    Raises MilError for an unknown flag (naming the nearest known one) or a value of the wrong type.
    """
    style = argparse.RawDescriptionHelpFormatter
    parser = mil.Parser(description=description, allow_abbrev=False, formatter_class=style)
    for f in dataclasses.fields(settings):
        help = f.metadata["help"].replace("%", "%%")
        if f.default not in ("", dataclasses.MISSING) and "default" not in help:
            help += f" (default {f.default})"
        kind = {} if f.type in (list, bool) else {"type": f.type, "metavar": f.type.__name__}
        more = {"help": help, "default": argparse.SUPPRESS, **kind, **f.metadata["parse"]}
        parser.add_argument("--" + f.name, **more)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        what = "unknown flag" if name.startswith("-") else "unexpected argument"
        flags = ["--" + f.name for f in dataclasses.fields(settings)]
        near = "".join(f"; did you mean {n}?" for n in difflib.get_close_matches(name, flags, 1))
        raise MilError(f"{what} {name}{near} (--help lists the flags)")
    return settings(**vars(known))


def run_command(main):
    """Call main(argv). An error becomes one line and exit code 1, Ctrl-C exit code 130."""
    null = open(os.devnull, "r+")  # noqa: SIM115 (in place of what was closed, which is None)
    sys.stdin, sys.stdout, sys.stderr = sys.stdin or null, sys.stdout or null, sys.stderr or null
    sys.stdout.reconfigure(errors="replace")  # a ? for what the terminal cannot show
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except MilError as e:
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:
        hint = "fewer or shorter texts, or a smaller model, take less"
        sys.exit(f"error: the GPU's memory is full ({hint}): {first_line(e)}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except OSError as e:  # the reader of our output has gone (| head), or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still holds
        sys.exit(1 if isinstance(e, BrokenPipeError) else f"error: {e}")


def pick_device(name):
    """torch.device for a --device flag, made the current one; "" takes CUDA when there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"expected cpu or cuda, not {device.type}")
        torch.empty(0, device=device)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise MilError(f"--device {name}: not usable here: {str(e).splitlines()[0]}") from e
    return device


# --------------------------------------------------------------------------------------------------
# The command

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass
class Settings:
    model: str = flag("out/student", "folder of a checkpoint, or a name at huggingface.co")
    draft: str = flag("", "a smaller model over the same tokens: the same distribution, faster")
    speculate: int = flag(4, "with --draft: how many tokens it proposes at a time")
    chat: bool = flag(False, "talk; Ctrl-C stops a reply, /reset, /quit", action="store_true")
    system: str = flag("", "with --chat: what the model is told beforehand")
    context: int = flag(0, "with --chat: tokens of room (default 8192 or the model's context)")
    prompt: list = flag([], "text, or - for standard input; several: a batch", action="append")
    max_new_tokens: int = flag(256, "stop after this many tokens")
    temperature: float = flag(0.8, "0 takes the likeliest token, 1 samples the model as it is")
    top_k: int = flag(0, "sample among the k likeliest tokens only; 0: no limit")
    top_p: float = flag(0.95, "sample among the fewest tokens of this mass; 1: no limit")
    seed: int = flag(0, "seed of the sampling")
    device: str = flag("", "cpu, cuda, cuda:1 …; empty: cuda if there is one")
    dtype: str = flag("", "float32, bfloat16, float16 or float64; empty: as saved")


def check_settings(s):
    check_sampling(s.max_new_tokens, s.temperature, s.top_k, s.top_p, "--")
    for wrong, what in (
        (0 < s.temperature < 1e-6, f"temperature is {s.temperature}, expected 0 or from 1e-6 on"),
        (s.dtype not in ("", *DTYPES), f"dtype is {s.dtype}, expected {', '.join(DTYPES)}"),
        (not 0 <= s.seed < 2**63, f"seed is {s.seed}, expected 0 to 2^63 - 1"),
        (s.speculate < 1, f"speculate is {s.speculate}, expected 1 or more"),
        (s.speculate != 4 and not s.draft, "speculate needs a --draft: the model that proposes"),
        (s.context != 0 and s.context < 2, f"context is {s.context}, expected at least 2"),
        (s.chat and s.prompt, "chat reads what you say from the terminal: leave --prompt out"),
        (s.system and not s.chat, "system goes with --chat"),
        (s.context and not s.chat, "context goes with --chat"),
        (not s.prompt and not s.chat, "prompt is missing: give a text or -; or --chat"),
    ):
        if wrong:
            raise MilError(f"--{what}")


def read_prompt(text, number):
    try:
        text = sys.stdin.buffer.read().decode() if text == "-" else os.fsencode(text).decode()
    except UnicodeDecodeError as e:
        raise MilError(f"prompt {number} is not UTF-8 text (byte {e.start})") from None
    if not text:
        raise MilError(f"prompt {number} is empty: there is nothing to continue")
    return text


def load_draft(s, model, tokenizer, device):
    """The model in --draft. Raises MilError unless the same ids mean the same text to both."""
    draft, other = load_with_tokenizer(s.draft, device, DTYPES.get(s.dtype))
    if draft.config.v != model.config.v:
        sizes = f"a vocabulary of {draft.config.v}, {s.model} one of {model.config.v}"
        raise MilError(f"--draft {s.draft} has {sizes}: a draft must speak the same tokens")
    if not tokenizer.same_text(other):
        raise MilError(f"--draft {s.draft}: its tokens differ from those of {s.model}")
    return draft


def new_decoder(s, model, draft, rows, size):
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(s.seed)
    how = (s.temperature, s.top_k, s.top_p, generator)
    return Decoder(model, rows, size, *how, draft, s.speculate if draft else 0)


class Chat:
    """Lines in, replies out. The decoder keeps its cache: a turn reads only what is new."""

    def __init__(self, s, model, tokenizer, draft):
        self.room = int(min(s.context or 8192, longest_text(model), longest_text(draft or model)))
        self.s, self.tokenizer = s, tokenizer
        self.decoder = new_decoder(s, model, draft, 1, self.room)
        self.reset()

    def reset(self):
        self.messages = [{"role": "system", "content": self.s.system}] if self.s.system else []
        self.asked = []  # the last prompt, as the template writes it
        self.ids = []  # the same with the model's own tokens, and its reply

    def run(self):
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() editing and history)
        told = f"{self.s.model}: room for {self.room} tokens; /reset forgets, /quit or Ctrl-D ends"
        print(told, file=sys.stderr)
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
            if line == "/reset":
                self.reset()
            elif re.fullmatch(r"/\w+", line):
                print("(/reset forgets, /quit ends; there is nothing else)", file=sys.stderr)
            elif line:
                self.turn([*self.messages, {"role": "user", "content": line}])

    def turn(self, messages):
        asked, _ = self.tokenizer.conversation(messages, reply=True)
        ids, n = asked, len(self.asked)
        ends = [i for i in range(n, len(asked)) if asked[i] in self.tokenizer.stops]
        if n and ends and asked[:n] == self.asked:  # otherwise all is read anew
            ids = self.ids + asked[ends[0] :]
        if len(ids) >= self.room:
            taken = f"{len(self.ids)} of {self.room} tokens are taken"
            more = f"this takes {len(ids) - len(self.ids)}"
            return print(f"(no room: {taken}, {more}; say less, or /reset)", file=sys.stderr)
        said, text = self.reply(ids)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        self.asked, self.ids = asked, ids + said

    def reply(self, ids):
        """Prints a reply. Returns its ids without the stop, and its text."""
        stream, interrupted = TextStream(self.tokenizer), threading.Event()
        began = time.perf_counter()
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
        try:  # Ctrl-C stops between two passes: within one the cache is half written
            for (new,) in self.decoder.decode([ids], self.s.max_new_tokens, self.tokenizer.stops):
                print(stream.feed(new), end="", flush=True)
                if interrupted.is_set():
                    break
        finally:
            signal.signal(signal.SIGINT, before)
        seconds, count = time.perf_counter() - began, len(stream.tokens)
        said = [token for token in stream.tokens if token not in self.tokenizer.stops]
        taken, why = len(ids) + len(said), ""
        if len(said) == count and not interrupted.is_set():
            full = taken >= self.room
            why = ", cut for want of room" if full else ", cut at --max_new_tokens"
        print(stream.finish() + (" …" if why or interrupted.is_set() else ""), flush=True)
        told = f"{count} tokens{why}, {count / seconds:.1f} tokens/s"
        print(f"({told}; {taken} of {self.room} taken)", file=sys.stderr)
        return said, stream.text


def main(argv):
    s = parse_flags(Settings, argv, __doc__)
    check_settings(s)
    device = pick_device(s.device)
    if s.model == Settings.model and not os.path.exists(s.model):
        hint = "python train_distill.py makes it; or give --model"
        raise MilError(f"{s.model}: not there yet: {hint}")
    model, tokenizer = load_with_tokenizer(s.model, device, DTYPES.get(s.dtype))
    draft = load_draft(s, model, tokenizer, device) if s.draft else None
    if s.chat:
        return Chat(s, model, tokenizer, draft).run()
    texts = [read_prompt(text, i + 1) for i, text in enumerate(s.prompt)]
    prompts = [tokenizer.encode(text) for text in texts]
    size = max(map(len, prompts)) + s.max_new_tokens
    decoder = new_decoder(s, model, draft, len(texts), size)
    streams, began = [TextStream(tokenizer) for _ in texts], time.perf_counter()
    for rows in decoder.decode(prompts, s.max_new_tokens, tokenizer.stops):
        first = not streams[0].tokens  # only now is it sure that the prompt can be continued
        pieces = [stream.feed(new) for stream, new in zip(streams, rows, strict=True)]
        if len(texts) == 1:
            print((texts[0] if first else "") + pieces[0], end="", flush=True)
    seconds, count = time.perf_counter() - began, sum(len(stream.tokens) for stream in streams)
    for i, stream in enumerate(streams):
        tail = stream.finish()
        whole = f"=== {i + 1} of {len(texts)}\n{texts[i]}{stream.text}"
        print(tail if len(texts) == 1 else whole)
    line = f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s"
    if draft:
        kept = decoder.accepted / max(1, decoder.proposed)
        line += f", {kept:.0%} of the draft's tokens kept"
        line += f", {count / decoder.passes:.2f} tokens a pass of the model (K = {s.speculate})"
    context = min(longest_text(model), longest_text(draft or model))
    lengths = [len(p) + len(stream.tokens) for p, stream in zip(prompts, streams, strict=True)]
    if max(lengths) >= context:
        line += f", up to the context of {context}"
    print(line, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
