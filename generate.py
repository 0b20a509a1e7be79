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
import itertools
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import tiktoken
import torch

import kernels
import mil
from mil import MilError

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


def draw(probs, generator=None, times=None):
    """A token (...) from each distribution (..., v); -1 where it holds a NaN.

    An exponential race: of clocks that ring at the rates `probs` the first one wins; clocks of rate
    1 take `times` to ring. torch.multinomial does the same, but waits for the GPU.
    """
    times = waiting_times(probs, generator) if times is None else times
    first, tokens = (probs / times).max(-1)
    return torch.where(first > 0, tokens, -1)


def waiting_times(like, generator):
    """Random times, shaped like `like`, that clocks of rate 1 take to ring; float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    times = torch.empty_like(like, dtype=dtype).exponential_(generator=generator)
    return times if times.is_cuda else times.clamp_(min=torch.finfo(dtype).tiny)  # > 0 on a GPU


def choose(logits, times, how):
    """A token (...) from the distribution of logits (..., v); one piece, to be compiled."""
    return draw(distribution(logits, *how), times=times)


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


class Rounds:
    """Models that read texts, a batch of `rows`, and append 1 to K + 1 tokens a round to each.

    Of a text the model's cache holds all but the last token, the draft's all but the last two.
    Without a draft K is 0.
    """

    def __init__(self, models, rows, context, K, how, generator):
        self.models, self.context, self.K = models, context, K
        self.how, self.generator = how, generator
        undo = len(models) > 1
        self.caches = [mil.Cache(model, rows, context + K, undo) for model in models]
        self.device = self.caches[0].device
        self.cursor = torch.zeros(3, rows, dtype=torch.long, device=self.device)
        self.at, self.before, self.last = self.cursor  # the last token's place, the two last tokens
        fused = self.device.type == "cuda" and all(c.fusable(K + 1) for c in self.caches)
        self.halves = [Graph(self.device if fused else None, generator) for _ in models]
        self.many = fused and rows > kernels.MANY and not undo
        self.choose = torch.compile(choose) if self.many else choose
        self.texts = [[]] * rows
        self.known = []  # for each model the texts that it has read: these or those before
        self.torn = True  # whether a cache may hold other tokens

    def begin(self, prompts):
        """Takes prompts for texts. If they continue those before, only what is new is read."""
        growth = 0
        for text, prompt in zip(self.texts, prompts, strict=True):
            self.torn |= text[:-1] != prompt[:-1][: len(text) - 1]
            growth = max(growth, len(prompt) - len(text))
        # What is new is padded to equal lengths behind the longest text: it may not fit.
        self.torn |= max(map(len, self.texts)) + growth > self.context
        if self.torn:
            self.known = [[[]] * len(prompts) for _ in self.models]
            for cache in self.caches:
                cache.clear()
        self.texts = [list(prompt) for prompt in prompts]
        self.torn = True  # until a round has ended well
        self.read(0)
        cursor = [(len(text) - 1, [0, *text][-2], text[-1]) for text in self.texts]
        self.cursor.copy_(torch.tensor(cursor).T)

    def read(self, which):
        """The model (0) or the draft (1) reads what is new to it."""
        held = [max(0, len(text) - 1 - which) for text in self.known[which]]
        new = [text[n : -1 - which] for n, text in zip(held, self.texts, strict=True)]
        counts = [len(tokens) for tokens in new]
        most = max(counts)
        if most:
            cache = self.caches[which]
            cache.keep(torch.tensor(held), max(held))
            padded = [tokens + [0] * (most - len(tokens)) for tokens in new]
            self.models[which].hidden(torch.tensor(padded, device=self.device), cache, counts)
        self.known[which] = self.texts

    def launch(self):
        """Begins a round. Returns the result of `extend`, on the CPU, and an event after which it
        is there, or None."""
        lengths = [len(text) for text in self.texts]
        longest = max(lengths)
        if self.K == 0:
            out = self.halves[0](self.extend, longest)
        elif min(lengths) == 1:  # only in a first round: the draft needs two tokens
            out = self.extend(longest)
        else:
            self.read(1)
            proposal = self.halves[1](self.propose, longest)
            out = self.halves[0](self.extend, longest, *proposal)
        out, event = out.to("cpu", non_blocking=True), None
        if self.device.type == "cuda":
            event = torch.cuda.current_stream(self.device).record_event()
        return out, event

    def propose(self, longest):
        """K tokens of the draft and what they are drawn from: (b, K), (b, K, v).

        The draft has not read its own last proposal, so each pass begins with the text's last two
        tokens. Only one pass can be taken back, so each reads again what was proposed so far.
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
        cache.keep(self.at, longest - 1)  # a CUDA graph repeats an old `longest`; kernels need none
        logits = model.lm_head(model.hidden(new, cache))
        if proposed is None:
            times = waiting_times(logits[:, 0], self.generator)
            count, extra = torch.zeros_like(self.last), self.choose(logits[:, 0], times, self.how)
        else:
            count, extra = verify(proposed, q, distribution(logits, *self.how), self.generator)
        self.before.copy_(new.gather(1, count[:, None])[:, 0])
        self.at.copy_((self.at + count + 1).clamp(max=self.context - 1))
        self.last.copy_(extra.clamp(min=0))
        return torch.cat([count[:, None], new[:, 1:], extra[:, None]], dim=1)


class Decoder:
    """Continues texts, a batch of `rows` with room for `size` tokens each.

    `decode` may be called again with the same texts, longer, and reads only what is new. With a
    `draft`, another model over the same tokens, rounds are speculative; whatever the draft, the
    text has the model's own distribution. proposed, accepted, passes count the draft's tokens,
    those in the text, and passes of the model, each row for itself. `context` is the most tokens
    that a text can have: `size`, or less where there is attention.
    """

    @torch.inference_mode()
    def __init__(
        self, model, rows, size, temperature=1, top_k=0, top_p=1, generator=None, draft=None, K=4
    ):
        check_sampling(1, temperature, top_k, top_p)
        models = [model, draft] if draft else [model]
        contexts = [m.config.context for m in models if "attention" in m.config.mixers]
        self.v, self.context = model.config.v, min([size, *contexts])
        theirs = models[-1].config.v
        mil.refuse(
            (theirs != self.v, f"the draft's vocabulary is {theirs}, the model's {self.v}"),
            (draft and not 1 <= K < kernels.FEW, f"K is {K}, expected 1 to {kernels.FEW - 1}"),
        )
        K = min(K, self.context - 1) if draft else 0
        how = temperature, top_k, top_p
        self.rounds = Rounds(models, rows, self.context, K, how, generator)
        self.proposed = self.accepted = self.passes = 0

    @torch.inference_mode()
    def decode(self, prompts, max_new_tokens, stop=()):
        """Continues `prompts`, a list of token ids a row. Yields a tuple of new ids per row.

        A row is finished if it drew one of `stop`, which is yielded, filled the context or has
        max_new_tokens; it yields () from then on. The generator ends with the last row. Raises
        MilError if a prompt or setting cannot work, and if logits are NaN.
        """
        check_sampling(max_new_tokens)
        rounds, stop = self.rounds, {*stop, -1}
        check_prompts(prompts, self.v, self.context)
        rounds.begin(prompts)
        texts = rounds.texts
        limits = [min(len(text) + max_new_tokens, self.context) for text in texts]
        live = set(range(len(texts)))
        coming = None
        while live:
            rounds.torn = True  # should this round fail
            out, event = coming or rounds.launch()
            # Of many rows the next round is launched before this one's tokens are looked at.
            more = rounds.many and any(limits[i] - len(texts[i]) > 1 for i in live)
            coming = rounds.launch() if more else None
            if event:
                event.synchronize()
            new = self.take(out, live, limits, stop)
            rounds.torn = len(live) < len(texts) or coming is not None
            live -= {i for i in live if len(texts[i]) == limits[i] or new[i][-1] in stop}
            yield new

    def take(self, out, live, limits, stop):
        """Adds a round's tokens to the texts of the live rows. Returns a tuple per row.

        Tuples, since the garbage collector does not track them: with lists, 1,024 a round, it
        paused for 0.2 s now and then.
        """
        rows = list(zip(*out.T.tolist(), strict=True))
        new = [()] * len(rows)
        for i in live:
            text, row = self.rounds.texts[i], rows[i]
            kept = row[1 : 1 + row[0]]
            tokens = (*kept, row[-1])[: limits[i] - len(text)]
            if not stop.isdisjoint(tokens):
                last = next(j for j, token in enumerate(tokens) if token in stop)
                tokens = tokens[: last + 1]
                if tokens[-1] < 0:
                    told = f"logits are NaN after {len(text) + last} tokens"
                    raise MilError(f"prompt {i + 1}: the model's {told}")
            new[i] = tokens
            text += tokens
            self.accepted += min(len(kept), len(tokens))
        self.passes += len(live)
        self.proposed += len(live) * (out.shape[1] - 2)
        return new


class Graph:
    """Calls of one function of tensors that stay in place; on a GPU one launch of a CUDA graph.

    The first call runs the function, which compiles its kernels, the second captures it. Nothing
    here refers to the function's owner: a graph that the garbage collector frees late would break
    the capture of another.
    """

    def __init__(self, device, generator):
        self.device, self.generator = device, generator
        self.calls, self.graph = 0, None

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


def generate(model, prompts, max_new_tokens, *sampling, stop=(), **more):
    """Continues each of `prompts` as a new Decoder does. sampling: temperature, top_k, top_p."""
    size = max(map(len, prompts)) + max(0, max_new_tokens)
    decoder = Decoder(model, len(prompts), size, *sampling, **more)
    yield from decoder.decode(prompts, max_new_tokens, stop)


def check_sampling(max_new_tokens=1, temperature=1, top_k=0, top_p=1, where=""):
    overflows = temperature != 0 and not 1e-6 <= temperature < math.inf  # logits / temperature
    mil.refuse(
        (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}, expected at least 1"),
        (overflows, f"temperature is {temperature}, expected 0 (greedy) or 1e-6 and more"),
        (top_k < 0, f"top_k is {top_k}, expected 0 (no limit) or more"),
        (not 0 < top_p <= 1, f"top_p is {top_p}, expected more than 0 and at most 1"),
        where=where,
    )


def check_prompts(prompts, v, context):
    """Raises MilError if a prompt cannot be continued, or a token is not one of v."""
    room = f"the context is {context}: expected at most {context - 1}, to leave room for one more"
    for n, prompt in enumerate(prompts, 1):
        odd = [i for i in prompt if not 0 <= i < v]
        mil.refuse(
            (not prompt, "is empty: there is nothing to continue"),
            (len(prompt) >= context, f"has {len(prompt)} tokens, {room}"),
            (odd, f"has token {', '.join(map(str, odd[:3]))}, but the model's vocabulary is {v}"),
            where=f"prompt {n} ",
        )


# --------------------------------------------------------------------------------------------------
# Tokenizers and conversations

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
    folder: where its files are; None if it has a name instead.
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
        self.initials = re.compile(f"(?=(?:{texts or '(?!)'}))(.)", re.DOTALL)  # where one begins

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
        ids = self.tokens(mend(text), literal=True, first=begin)
        return self.begin + ids if begin else ids

    def conversation(self, messages, reply=False):
        """Ids of messages (dicts of "role" and "content"), and for each whether it is a reply's.

        With `reply` they end where the assistant's next message begins. Nothing that a message
        says becomes a control token. Raises MilError if the chat template refuses the messages.
        """
        messages = [{key: self.hide(m[key]) for key in ("role", "content")} for m in messages]
        ids = self.render(messages, reply)
        own = [False] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i > 0:
                parts = self.render(messages[:i], True), self.render(messages[: i + 1], False)
                begin, end = (len(os.path.commonprefix([ids, part])) for part in parts)
                last = [j + 1 for j in range(begin, end) if ids[j] in self.stops][-1:] or [end]
                own[begin : last[0]] = [True] * (last[0] - begin)
        return ids, own

    def hide(self, text):
        return self.initials.sub(rf"\1{MARK}", mend(text).replace(MARK, "\ufffd"))

    def render(self, messages, reply):
        parts = self.write(messages, reply).split(MARK)
        return [i for n, part in enumerate(parts) for i in self.tokens(part, False, first=n == 0)]

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

    def __init__(self, pattern, ranks, control, folder=None):
        how = {"pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": control}
        self.encoding, self.folder = tiktoken.Encoding("mil", **how), folder
        vocabulary = [b""] * self.encoding.n_vocab
        for data, i in ranks.items():
            vocabulary[i] = data
        begin = [i for text, i in control.items() if text == "<|begin_of_text|>"]
        super().__init__(vocabulary, control, begin)

    def tokens(self, text, literal, first):
        if re.search(r"(?<!\s)\s{500000}", text):  # from about 700,000 on tiktoken 0.14 panics
            raise MilError("a text with 500,000 spaces or line ends in a row cannot be tokenised")
        allowed = set() if literal else "all"
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())


class Transformers(Tokenizer):
    """The tokenizer in a folder, as transformers' AutoTokenizer reads it, and its chat template."""

    def __init__(self, folder, file=""):
        """file: the name of a GGUF file, if the tokenizer is in one."""
        with mil.naming(folder / file, "its tokenizer cannot be read"):
            import transformers
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            transformers.logging.set_verbosity_error()
            gguf = {"gguf_file": file} if file else {}
            hf = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **gguf)
            decoder = hf.backend_tokenizer.decoder
            byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
            letters = {c: bytes([b]) for b, c in bytes_to_unicode().items()}
        self.folder, self.hf = folder, hf
        stops = [i for i in (*stated_stops(folder), hf.eos_token_id) if isinstance(i, int)]
        last = [token for i, token in hf.added_tokens_decoder.items() if i in stops]
        for token in last:
            token.special = True
        hf.add_tokens(last, special_tokens=True)  # so that no text becomes one
        added, vocab = hf.added_tokens_decoder, hf.get_vocab()
        control = {token.content: i for i, token in added.items() if token.special}
        vocabulary = [b""] * (max(vocab.values()) + 1)
        for token, i in vocab.items():
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)  # as sentencepiece writes one
            if i in added:
                vocabulary[i] = b"" if token in control else token.encode()
            elif byte_level:
                vocabulary[i] = b"".join(letters.get(c, c.encode()) for c in token)
            else:
                vocabulary[i] = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
        bare, whole = hf.encode("a", add_special_tokens=False), hf.encode("a")
        begin = whole[: whole.index(bare[0])]
        template = str(hf.get_chat_template()) if hf.chat_template else ""
        super().__init__(vocabulary, control, begin, stops, template)
        # Sentencepiece puts a space before a text. One that continues another follows a line end.
        self.lead = "" if self.decode(bare) == "a" else "\n"
        self.skip = len(hf.encode(self.lead, add_special_tokens=False))

    def tokens(self, text, literal, first):
        lead, skip = ("", 0) if first else (self.lead, self.skip)
        how = {"add_special_tokens": False, "split_special_tokens": literal}
        return self.hf.encode(lead + text, **how)[skip:]

    def write(self, messages, reply):
        if self.template in ("plain", "llama3"):
            return super().write(messages, reply)
        with mil.naming(self.folder, "its chat template"):
            how = {"tokenize": False, "add_generation_prompt": reply}
            return self.hf.apply_chat_template(messages, **how)


def mend(text):
    """The text with U+FFFD in place of half a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def stated_stops(folder):
    """What ends a text, by generation_config.json and config.json (ours: under "ids")."""
    stops = []
    for name in ("generation_config.json", "config.json"):
        with contextlib.suppress(MilError, AttributeError):
            said = mil.read_json(folder / name)
            found = (said.get("ids") or said).get("eos_token_id")
            stops += found if isinstance(found, list) else [found]
    return stops


def read_meta(path):
    """Meta's tokenizer.model: a line `base64(bytes) rank` per token. 256 control tokens follow.

    They are named as in Llama 3.1. 3.0 has other names for some that it never says.
    """
    with mil.naming(path, "not lines of `base64 rank`, as Llama 3's file has them"):
        lines = map(bytes.split, path.read_bytes().splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    n = len(ranks)
    if {*ranks.values()} != {*range(n)} or not {bytes([b]) for b in range(256)} <= {*ranks}:
        what = f"its {n} ranks are not 0 … {n - 1}, or it lacks some of the 256 bytes"
        raise MilError(f"{path}: {what}; is the file whole?")
    rest = [f"reserved_special_token_{i}" for i in range(248)]
    names = ["begin_of_text", "end_of_text", *rest[:2], "finetune_right_pad_id", rest[2]]
    names += ["start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", *rest[3:]]
    control = {f"<|{name}|>": n + i for i, name in enumerate(names)}
    return Tiktoken(PATTERN, ranks, control, path.parent)


def load_tokenizer(source):
    """The Tokenizer of a name ("bytes", or one of tiktoken's), or of a folder or a file in it.

    Raises MilError if there is none or it cannot be read.
    """
    names = tiktoken.list_encoding_names()
    if source == "bytes":
        return Tiktoken("(?s:.)", {bytes([b]): b for b in range(256)}, {"<|endoftext|>": 256})
    if source in names:
        hint = "tiktoken could not download it; pass bytes or a folder, or set TIKTOKEN_CACHE_DIR"
        with mil.naming(f"tokenizer {source}", hint):
            found = tiktoken.get_encoding(source)
        return Tiktoken(found._pat_str, found._mergeable_ranks, found._special_tokens)
    path = Path(source)
    if path.suffix == ".gguf":
        return Transformers(path.parent, path.name)
    folder = path.parent if path.is_file() else path
    meta = folder / "tokenizer.model"
    if not (folder / "tokenizer.json").exists() and meta.exists() and meta.read_bytes().isascii():
        return read_meta(meta)
    if not any(folder.glob("*token*")):
        wanted = f"a folder with a tokenizer.json or tokenizer.model, bytes, {', '.join(names)}"
        raise MilError(f"{source}: no tokenizer; expected {wanted}")
    return Transformers(folder)


def tokenizer_of(directory, about=None):
    """What to give load_tokenizer for a checkpoint of which mil.read_config says `about`."""
    about = about or mil.read_config(directory)
    file = about["weights"][0] if about["format"] == "gguf" else ""
    return about["tokenizer"] or str(about["folder"] / file)


def save_with_tokenizer(model, directory, source, **notes):
    """mil.save, and the tokenizer that load_tokenizer knows by `source`: its name or its files."""
    tokenizer, directory = load_tokenizer(source), Path(directory)
    mil.make_directory(directory)
    for name in mil.TEXT_FILES.split() if tokenizer.folder else ():
        if (tokenizer.folder / name).is_file():
            data = (tokenizer.folder / name).read_bytes()
            mil.write_whole(directory / name, lambda f, data=data: f.write(data))
    if isinstance(tokenizer, Transformers) and not (directory / "tokenizer.json").exists():
        tokenizer.hf.save_pretrained(directory)
    ids = {"bos_token_id": (tokenizer.begin or [None])[0], "eos_token_id": tokenizer.stops or None}
    mil.save(model, directory, tokenizer=None if tokenizer.folder else source, ids=ids, **notes)


def load_with_tokenizer(directory, device=None, dtype=None):
    """The model in `directory`, a folder or hub name, and its Tokenizer. Prints notes on them."""
    about = mil.read_config(directory)
    tokenizer = load_tokenizer(tokenizer_of(directory, about))
    model = mil.load(directory, device, dtype, about)
    notes = [*about["remarks"]]
    if tokenizer.size != model.config.v:
        told = f"the tokenizer has {tokenizer.size} tokens, the model {model.config.v}"
        notes.append(f"{directory}: {told}")
    if not tokenizer.stops:
        notes.append(f"{directory}: no token is known to end a text")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return mil.pack(model), tokenizer


class TextStream:
    """Tokens in, text out: first the `prompt`. A character appears with the last of its bytes."""

    def __init__(self, tokenizer, prompt=""):
        self.tokenizer, self.prompt, self.tokens, self.text = tokenizer, prompt, [], ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens, final=False):
        """The text that these tokens add; with `final` also what is left of a character."""
        said = [token for token in tokens if token not in self.tokenizer.stops]
        data = b"".join(map(self.tokenizer.bytes_of, said))
        text = self.prompt + self.decoder.decode(data, final)
        self.prompt = ""
        self.tokens += tokens
        self.text += text
        return text


# --------------------------------------------------------------------------------------------------
# Command lines: every field of a dataclass is a flag (train_distill.py uses this too)


def flag(default, help, **parse):
    """A dataclass field that is also a flag `--name value`. `parse` goes to argparse."""
    start = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**start, metadata={"help": help, "parse": parse})


def parse_flags(settings, argv, description, groups=()):
    """An instance of the dataclass `settings` from `--name value` or `--name=value`.

    groups: {a flag's name: the title, in --help, of the group that begins with it}. Raises MilError
    for an unknown flag or a value of the wrong type.
    """
    style = argparse.RawDescriptionHelpFormatter
    parser = mil.Parser(description=description, allow_abbrev=False, formatter_class=style)
    group = parser
    for f in dataclasses.fields(settings):
        if f.name in groups:
            group = parser.add_argument_group(groups[f.name])
        help = f.metadata["help"].replace("%", "%%")
        if f.default not in ("", dataclasses.MISSING) and "default" not in help:
            help += f" (default {f.default})"
        kind = {} if f.type in (list, bool) else {"type": f.type, "metavar": f.type.__name__}
        more = {"help": help, "default": argparse.SUPPRESS, **kind, **f.metadata["parse"]}
        group.add_argument("--" + f.name, **more)
    return settings(**vars(parser.parse_args(argv)))


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
        sys.exit(f"error: the GPU's memory is full ({hint}): {str(e).splitlines()[0]}")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except OSError as e:  # the reader of our output has gone (| head), or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still holds
        sys.exit(1 if isinstance(e, BrokenPipeError) else f"error: {e}")


def pick_device(name):
    """torch.device for a --device flag, made the current one; "" takes CUDA when there is one."""
    with mil.naming(f"--device {name}", "not usable here"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise MilError(f"is {device.type}, expected cpu or cuda")
        device = torch.empty(0, device=device).device  # with its number
        if device.type == "cuda":
            torch.cuda.set_device(device)
    return device


# --------------------------------------------------------------------------------------------------
# The command

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclasses.dataclass
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
    most = kernels.FEW - 1
    mil.refuse(
        (s.dtype not in ("", *DTYPES), f"dtype is {s.dtype}, expected {', '.join(DTYPES)}"),
        (not 0 <= s.seed < 2**63, f"seed is {s.seed}, expected 0 to 2^63 - 1"),
        (not 1 <= s.speculate <= most, f"speculate is {s.speculate}, expected 1 to {most}"),
        (s.speculate != 4 and not s.draft, "speculate needs a --draft: the model that proposes"),
        (s.context != 0 and s.context < 2, f"context is {s.context}, expected at least 2"),
        (s.chat and s.prompt, "chat reads what you say from the terminal: leave --prompt out"),
        (s.system and not s.chat, "system goes with --chat"),
        (s.context and not s.chat, "context goes with --chat"),
        (not s.prompt and not s.chat, "prompt is missing: give a text or -; or --chat"),
        where="--",
    )


def read_prompt(text, number):
    with mil.naming(f"prompt {number}", "not UTF-8 text"):
        return (sys.stdin.buffer.read() if text == "-" else os.fsencode(text)).decode()


def load_draft(s, tokenizer, device):
    """The model in --draft. Raises MilError unless the same ids mean the same text to both."""
    draft, other = load_with_tokenizer(s.draft, device, DTYPES.get(s.dtype))
    if not tokenizer.same_text(other):
        raise MilError(f"--draft {s.draft}: its tokens differ from those of {s.model}")
    return draft


class Chat:
    """Lines in, replies out. The decoder keeps its cache: a turn reads only what is new."""

    def __init__(self, s, tokenizer, decoder):
        self.s, self.tokenizer, self.decoder = s, tokenizer, decoder
        self.reset()

    def reset(self):
        self.messages = [{"role": "system", "content": self.s.system}] if self.s.system else []
        self.asked = []  # the last prompt, as the template writes it
        self.ids = []  # the same with the model's own tokens, and its reply

    def run(self):
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() editing and history)
        room = f"{self.s.model}: room for {self.decoder.context} tokens"
        print(f"{room}; /reset forgets, /quit or Ctrl-D ends", file=sys.stderr)
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
                try:
                    self.turn([*self.messages, {"role": "user", "content": line}])
                except MilError as e:  # such as a text that is too long
                    print(f"({e}; /reset begins anew)", file=sys.stderr)

    def turn(self, messages):
        asked, _ = self.tokenizer.conversation(messages, reply=True)
        ids, n = asked, len(self.asked)
        if n and asked[:n] == self.asked:  # the template goes on; after the reply's end it is new
            ends = [i for i in range(n, len(asked)) if asked[i] in self.tokenizer.stops]
            ids = self.ids + asked[ends[0] :] if ends else asked
        said, text = self.reply(ids)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        self.asked, self.ids = asked, ids + said

    def reply(self, ids):
        """Prints a reply. Returns its ids without the stop, and its text."""
        stream, stops = TextStream(self.tokenizer), self.tokenizer.stops
        interrupts, began = [], time.perf_counter()
        before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
        try:  # Ctrl-C stops between two passes: within one the cache is half written
            for (new,) in self.decoder.decode([ids], self.s.max_new_tokens, stops):
                print(stream.feed(new), end="", flush=True)
                if interrupts:
                    break
        finally:
            signal.signal(signal.SIGINT, before)
        count, speed = len(stream.tokens), len(stream.tokens) / (time.perf_counter() - began)
        said = [token for token in stream.tokens if token not in stops]
        print(stream.feed([], final=True) + " …" * (len(said) == count), flush=True)
        taken = f"{len(ids) + len(said)} of {self.decoder.context} taken"
        print(f"({count} tokens, {speed:.1f} tokens/s; {taken})", file=sys.stderr)
        return said, stream.text


def main(argv):
    s = parse_flags(Settings, argv, __doc__)
    check_settings(s)
    device = pick_device(s.device)
    if s.model == Settings.model and not os.path.exists(s.model):
        raise MilError(f"{s.model}: not there yet: train_distill.py makes it; or give --model")
    model, tokenizer = load_with_tokenizer(s.model, device, DTYPES.get(s.dtype))
    draft = load_draft(s, tokenizer, device) if s.draft else None
    texts = [read_prompt(text, i) for i, text in enumerate(s.prompt, 1)]
    prompts = [tokenizer.encode(text) for text in texts]
    size = s.context or 8192 if s.chat else max(map(len, prompts)) + s.max_new_tokens
    generator = torch.Generator(device).manual_seed(s.seed)
    how = s.temperature, s.top_k, s.top_p, generator
    decoder = Decoder(model, len(texts) or 1, size, *how, draft, s.speculate if draft else 0)
    if s.chat:
        return Chat(s, tokenizer, decoder).run()
    streams, began = [TextStream(tokenizer, text) for text in texts], time.perf_counter()
    for rows in decoder.decode(prompts, s.max_new_tokens, tokenizer.stops):
        pieces = [stream.feed(new) for stream, new in zip(streams, rows, strict=True)]
        if len(texts) == 1:
            print(pieces[0], end="", flush=True)
    seconds, count = time.perf_counter() - began, sum(len(stream.tokens) for stream in streams)
    for i, stream in enumerate(streams, 1):
        tail = stream.feed([], final=True)
        print(tail if len(texts) == 1 else f"=== {i} of {len(texts)}\n{stream.text}")
    line = f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s"
    if draft:
        kept = decoder.accepted / max(1, decoder.proposed)
        line += f", {kept:.0%} of the draft's tokens kept"
        line += f", {count / decoder.passes:.2f} tokens a pass of the model (K = {s.speculate})"
    lengths = [len(p) + len(stream.tokens) for p, stream in zip(prompts, streams, strict=True)]
    if max(lengths) == decoder.context < size:
        line += f", up to the context of {decoder.context}"
    print(line, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
