"""The claims of The Mamba in the Llama (arXiv 2408.15237), run again at small scale, beside the paper's own figures.

    python tests/reproduce.py                    all tables: about ten minutes on one H200, from nothing; on a CPU a smoke size, whose figures say nothing
    python tests/reproduce.py quality order      these tables
    python tests/reproduce.py --minutes 4        all with fewer steps
    python tests/reproduce.py long --set teacher_context=3072        with another size

    quality       how much is lost with less and less attention: 50, 25, 12.5, 0 % of the layers, Mamba and Mamba-2 (Table 6 left)
    init          attention's weights or random ones in the new layers; MLPs frozen or not (Table 7 left, Table 8)
    order         stepwise or at once; the layers that keep attention spread evenly, or all at one end (Table 7 right)
    mixer         what the new layers must have: Mamba-2, Mamba, Mamba without decay (linear attention), nothing (Table 9)
    stages        stage 1, 1 + 2, 1 + 2 + preferences (Table 6 right)
    long          a needle in a haystack up to 20 times the length of distillation (Figure 4); perplexity after longer and longer texts; both again
                  with attention's scores growing with the logarithm of the length
    speculation   tokens a pass of the target, and speed, by draft, target and K (Tables 1 and 5)
    cost          time and memory of reading and writing from 1k to 128k tokens, by share of attention

Signs and orderings are the claim, not digits. One teacher, a Llama over bytes, learns the sources of Python's standard library, in which notes
(`# kd=582`) are strewn and repeated later: so it has to use its context, and a needle is something that it can find. A student is distilled on
texts a quarter as long as the teacher's, by train_distill.py's own functions, with --no-compile, since models so small and of so many shapes would wait for it;
it learns from the text itself, cross-entropy and KL alike (the paper: from the teacher's answers, and of the KL a tenth in stage 1).

Every arm's rate of stage 1 is the best of Size.rates for it, or of what follows beyond the best one, by the KL at the arm's end on text that
nothing else is measured on, with a seed that is not used again (*: it stayed the lowest or highest); stage 2 has one rate for all. Then the arm
runs with --seeds others (order of the data, initial values), of which mean ± standard error is printed. What that error leaves out: there is one
teacher, and all students are measured on the same text, functions and needles. A claim holds where the difference is beyond Student's t at 95 %
(Welch's, or of the pairs where a student is compared with itself); for their number nothing is corrected. Of an arm of which a student diverged
nothing is shown but that.

Figures are printed, and written to OUT/reproduce.json with every arm's settings, OUT/reproduce.md, and, where matplotlib is, drawn to --assets. (Of some
tables only: to OUT/order+mixer.json and so on.)
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import gc
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import sys
import textwrap
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import bench
import pictures

import generate
import mil
import train_distill as td
from mil import MilError

LEGEND = """
KL, agree: to the teacher's law, in nats a byte, and how often both find the same byte likeliest. parses: of the functions completed, those that are
Python as far as they go; length, in bytes; teacher's nats: how unlikely the teacher finds what was written, a byte. rate: of stage 1 (*: the lowest or
highest tried). ±: standard error of the mean over students."""
TABLES = ("quality", "init", "order", "mixer", "stages", "long", "speculation", "cost")
SWEEP = 100  # the seed that chooses among the rates


@dataclass
class Size:
    """What a run is made of. Steps of 10 minutes on one H200; --minutes scales them."""

    n_layers: int = 8
    d: int = 256
    n_heads: int = 8
    n_kv_heads: int = 4
    d_ff: int = 768
    rope_theta: float = 1e4
    rope_still: int = 256  # pairs of channels that turn less than twice in so many bytes do not turn at all: what they match they match at any distance
    step_tokens: int = 2**15  # of a step of the teacher
    short_context: int = 512  # where it learns first
    teacher_steps: int = 2800
    teacher_context: int = 1024  # where it goes on
    long_steps: int = 600
    context: int = 256  # the length of distillation
    batch: int = 64
    rates: tuple = (3e-3, 6e-3)  # of stage 1
    more_rates: int = 2  # how many may be tried beyond these, each twice or half the best
    layer_steps: int = 22  # of stage 1, for each layer replaced
    stage2_rate: float = 3e-3
    stage2_steps: int = 360
    dpo_steps: int = 40
    draft_steps: int = 400
    eval_sequences: int = 512
    prompts: int = 192  # functions to be written
    before: int = 96  # bytes of text before each
    written: int = 160  # and of it, together the length of distillation
    samples: int = 8  # needles at each length and depth
    windows: int = 64  # texts of which the perplexity is measured by length
    lengths: tuple = (0.5, 1, 2, 4, 8, 12, 16, 20)  # × context
    depths: int = 8
    pairs: int = 1024  # prompts answered twice for the preferences
    texts: int = 6  # continued speculatively, one by one
    speculated: int = 96  # tokens of each
    Ks: tuple = (2, 4, 6, 8)
    cost_lengths: tuple = (1024, 4096, 16384, 65536, 131072)
    scan_lengths: tuple = (1024, 4096, 16384, 65536)
    cost: mil.Config = dataclasses.field(
        default_factory=lambda: mil.Config(
            d=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192, tied=True, context=2**18
        )
    )


SMOKE = Size(
    d=32,
    n_heads=2,
    n_kv_heads=1,
    d_ff=32,
    step_tokens=512,
    short_context=128,
    teacher_steps=4,
    teacher_context=256,
    long_steps=1,
    context=128,
    batch=2,
    rates=(3e-3,),
    more_rates=0,
    layer_steps=1,
    stage2_steps=1,
    dpo_steps=1,
    draft_steps=1,
    eval_sequences=2,
    prompts=4,
    before=80,
    written=48,
    samples=1,
    windows=2,
    lengths=(1, 2),
    depths=2,
    pairs=16,
    texts=1,
    speculated=8,
    Ks=(2,),
    cost_lengths=(64, 256),
    scan_lengths=(64, 128),
    cost=mil.Config(v=64, d=32, n_layers=8, n_heads=2, n_kv_heads=1, d_ff=32, context=2**18),
)


# --------------------------------------------------------------------------------------------------
# The text: Python with notes strewn in, and what is asked of it


DIGITS = 3


def note(dice):
    """A name and a number. They touch, and the name is short, so that one layer of Mamba can tie them: its convolution sees four bytes."""
    return f"# {''.join(dice.choices('bcdfghjklmnpqrstvwxz', k=2))}={''.join(dice.choices('0123456789', k=DIGITS))}\n"


def with_notes(text, context, dice):
    """The text with a note about every 130 characters, and each of them twice again, 16 characters to three quarters of the context later, near more often
    than far (log-uniform)."""
    out, due, at, next_note = [], [], 0, dice.randrange(240)
    for line in text.splitlines(keepends=True):
        out.append(line)
        at += len(line)
        if line.endswith("\\\n") or not line.endswith("\n"):
            continue
        if at >= next_note:
            out.append(note(dice))
            at += len(out[-1])
            due += [(at + 16 * (context * 3 / 64) ** dice.random(), out[-1]) for _ in range(2)]
            next_note = at + dice.randrange(240)
        again, due = [line for when, line in due if when <= at], [one for one in due if one[0] > at]
        out += again
        at += sum(map(len, again))
    return "".join(out)


def functions(documents, count, before, after, dice):
    """`count` places where a function begins: (the document's number; the text before, at most so many bytes, its header the end of it; its header; what
    really follows)."""
    places = [
        (i, text, m)
        for i, text in enumerate(documents)
        for m in re.finditer(r"^ *def \w+\([^\n]*\)[^\n]*:\n", text, re.M)
    ]
    return [
        (i, text[: m.end()][-before:], m[0], text[m.end() : m.end() + after])
        for i, text, m in dice.sample(places, min(count, len(places)))
    ]


def body(header, text):
    """A function's own part of the text after its header: up to a line that is indented no more than the header. Of a text that breaks off, the last line is
    left out; notes are no part of it."""
    indent, lines = len(header) - len(header.lstrip()), []
    for line in text.split("\n")[:-1]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent and not line.startswith("#"):
            break
        lines += [line] * (not line.startswith("# "))
    return "\n".join(lines)


def parses(header, text):
    """Whether a function with this header is Python, as far as it goes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(textwrap.dedent(header + body(header, text)))
        return True
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


class Lab:
    """What every arm shares: text, teacher, measures."""

    def __init__(self, size, out, device):
        self.size, self.out, self.device = size, Path(out), device
        self.encoding = generate.load_tokenizer("bytes")
        shape = {name: getattr(size, name) for name in td.SIZES}
        self.s = td.Settings(
            out=str(out),
            device=str(device),
            context=size.context,
            batch=size.batch,
            teacher_steps=size.teacher_steps,
            rope_theta=size.rope_theta,
            eval_sequences=size.eval_sequences,
            compile=False,
            stage1_steps=1,
            stage2_steps=1,
            **shape,
        )
        td.complete(self.s, device)
        self.run = td.Run(self.s, device)
        self.kind = getattr(torch, self.s.dtype)
        files = [
            file for file in td.standard_library() if "encodings" not in file.parts
        ]  # these are copies of each other
        raw = [text for text in (td.read_text(file, False) for file in files) if text.strip()]
        self.raw, self.unseen = td.split(raw)
        sample = with_notes(
            "\n" * 999, size.teacher_context, random.Random(0)
        )  # other notes, another file
        noted = self.out / f"noted-{td.digest(files, sample)}.jsonl"
        if not noted.exists():
            dice = random.Random(0)
            mil.make_directory(self.out)
            lines = [
                json.dumps({"text": with_notes(text, size.teacher_context, dice)}) + "\n"
                for text in raw
            ]
            mil.write_whole(noted, lambda f: f.write("".join(lines).encode()))
        with contextlib.redirect_stdout(io.StringIO()):
            whole = td.load_corpus(self.s, [str(noted)], self.encoding, "bytes")
        train, begins = whole.begins
        few = (
            len(begins) // 4
        )  # of the unseen texts so many choose the rates; the others are what is measured on
        at, self.unseen = int(begins[few]), self.unseen[few:]
        self.sweep_corpus = whole._replace(val=whole.val[:at], begins=[train, begins[:few]])
        self.corpus = whole._replace(val=whole.val[at:], begins=[train, begins[few:] - at])

    @functools.cached_property
    def teacher(self):
        model, _ = td.read_models(self.run, self.out / "teacher")
        model.compute = self.kind
        return model

    @property
    def teacher_tokens(self):
        """How many tokens the teacher has been trained on."""
        size = self.size
        return sum(
            steps * (size.step_tokens // c) * c
            for steps, c in (
                (size.teacher_steps, size.short_context),
                (size.long_steps, size.teacher_context),
            )
        )

    def make_teacher(self):
        """A Llama that learns from short texts first, since from long ones alone it did not learn to copy, and then from long ones; or the one that is there."""
        size, begun, place = self.size, self.out / "short", self.out / "teacher"
        short, long = (
            td.Run(dataclasses.replace(self.s, context=c, batch=size.step_tokens // c), self.device)
            for c in (size.short_context, size.teacher_context)
        )
        config = td.new_config(short.s, self.encoding)
        if size.rope_still:  # Llama 3.1's scaling, by so much that a slow channel stands still
            config = dataclasses.replace(
                config, rope_scaling=dict(zip(mil.ROPE_SCALING, (1e9, 1.99, 2.0, size.rope_still)))
            )
        with open(os.devnull, "w") as journal:
            job = dict(s=short.s, run=short, place=begun, corpus=lambda: self.corpus)
            job |= dict(config=config, encoding=self.encoding, tokenizer="bytes")
            td.Job.get_teacher(SimpleNamespace(**job), td.State(), journal)
        for old in td.checkpoints(short):
            old.unlink()
        about = mil.read_config(begun)
        config, recipe = (
            dataclasses.replace(about["config"], context=size.teacher_context),
            {"short": about["recipe"], "batch": long.s.batch, "steps": size.long_steps},
        )
        old = mil.read_config(place) if (place / "config.json").exists() else {}
        if (old.get("config"), old.get("recipe")) != (config, recipe):
            base = mil.load(begun, self.device)
            base.config.context = size.teacher_context
            stage = td.Stage(
                trains="all",
                beta=0,
                steps=size.long_steps,
                lr=self.s.teacher_lr / 3,
                name="teacher, long texts",
                mixers=base.config.mixers,
            )
            models = td.assemble(long, None, base, stage, 0, {})
            td.fit(
                long,
                td.State(),
                stage,
                models,
                td.training_batches(long, self.corpus, [self.s.seed, 1]),
                io.StringIO(),
                "No teacher was saved",
            )
            td.save_student(long, models.student, place, "bytes", torch.float32, recipe=recipe)

    def decoding(self, model):
        """The model as decoding has it: of one type, not shared."""
        model = copy.deepcopy(model)
        model.compute = None
        return mil.pack(mil.cast(model, self.kind).eval())

    def complete(self, model, prompts, seed):
        """A sampled continuation (temperature 0.8) of each prompt, token ids."""
        out, model = [], self.decoding(model)
        for i in range(0, len(prompts), 64):
            part = prompts[i : i + 64]
            decoder = generate.Decoder(
                model,
                len(part),
                self.size.before + self.size.written + 1,
                0.8,
                generator=torch.Generator(self.device).manual_seed(seed + i),
            )
            texts = [[] for _ in part]
            for new in decoder.decode(part, self.size.written):
                texts = [[*a, *b] for a, b in zip(texts, new)]
            out += texts
        return out

    def writing(self, model):
        """Of functions the model completes: the share that parses, and how unlikely the teacher finds what it wrote, in nats a byte."""
        asked = functions(
            self.unseen, self.size.prompts, self.size.before, self.size.written, random.Random(0)
        )
        prompts = [self.encoding.encode(before)[-self.size.before :] for _, before, *_ in asked]
        texts = self.complete(model, prompts, 1)
        read = [(header, self.encoding.decode(ids)) for (*_, header, _), ids in zip(asked, texts)]
        real = [(header, after) for *_, header, after in asked]
        nats = []
        for i in range(0, len(prompts), 64):
            rows = [prompt + text for prompt, text in zip(prompts[i : i + 64], texts[i : i + 64])]
            block = torch.full((len(rows), max(map(len, rows))), -1)
            for row, ids in zip(block, rows):
                row[: len(ids)] = torch.tensor(ids)
            loss = self.losses(self.teacher, block.clamp(min=0).to(self.device)).cpu()
            nats += [
                loss[j, len(prompt) - 1 : len(row) - 1].mean().item()
                for j, (prompt, row) in enumerate(zip(prompts[i:], rows))
            ]
        share = lambda f, some: sum(f(*one) for one in some) / len(some)  # noqa: E731
        length = lambda *one: len(body(*one))  # noqa: E731
        return dict(
            parses=share(parses, read),
            length=share(length, read),
            teacher_nats=sum(nats) / len(nats),
            real_parses=share(parses, real),
            real_length=share(length, real),
        )

    @torch.no_grad()
    def losses(self, model, tokens):
        """The cross-entropy (b, l - 1) of each token after the first."""
        logits = model.lm_head(model.hidden(tokens[:, :-1]))
        return F.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(tokens), -1)

    def haystack(self, length, depth, dice):
        """So many bytes of unseen Python with one note at this depth, from 0 to 1, and again at the end."""
        needle = note(dice)
        room = length - 2 * len(needle) + 1
        text = dice.choice([t for t in self.ascii_texts if len(t) > room])
        begin = dice.randrange(len(text) - room)
        text = text[begin : begin + room - 1] + "\n"
        at = text.rfind("\n", 0, int(depth * (room - 1)) + 1) + 1  # after the last whole line there
        return [*(text[:at] + needle + text[at:] + needle[:-1]).encode("ascii")]

    @functools.cached_property
    def ascii_texts(self):
        return [t.encode("ascii", "replace").decode() for t in self.unseen]

    @functools.cached_property
    def haystacks(self):
        """Of each length the haystacks, by depth."""
        size, dice = self.size, random.Random(0)
        return {
            length: torch.tensor(
                [
                    self.haystack(length, depth / (size.depths - 1), dice)
                    for depth in range(size.depths)
                    for _ in range(size.samples)
                ],
                device=self.device,
            )
            for length in (int(x * size.context) for x in size.lengths)
        }

    @torch.no_grad()
    def needles(self, model, trained=0):
        """How often the whole number is found, greedily: {length: [at each depth]}; of a model made sharper from the length `trained` on, if one is given."""
        found = {}
        for length, rows in self.haystacks.items():
            hits = []
            with sharper(model, length, trained):
                for part in rows.split(max(1, min(64, 2**18 // length))):
                    guess = model.lm_head(model.hidden(part[:, :-1])[:, -DIGITS:]).argmax(-1)
                    hits += (guess == part[:, -DIGITS:]).all(1).tolist()
            found[length] = [
                sum(hits[i : i + self.size.samples]) / self.size.samples
                for i in range(0, len(hits), self.size.samples)
            ]
        return found

    @functools.cached_property
    def windows(self):
        """Unseen texts of the greatest length, from places at random."""
        most, dice = int(max(self.size.lengths) * self.size.context) + 1, random.Random(2)
        texts = [t for t in self.ascii_texts if len(t) >= most]
        begins = [
            (text, dice.randrange(len(text) - most + 1))
            for text in dice.choices(texts, k=self.size.windows)
        ]
        return torch.tensor(
            [[*text[i : i + most].encode()] for text, i in begins], device=self.device
        )

    def by_length(self, model, trained=0):
        """The perplexity of the same bytes, a quarter of a context each, at the end of texts of growing length: {length: perplexity}."""
        found, last = {}, self.size.context // 4
        for length in (int(x * self.size.context) for x in self.size.lengths):
            parts = self.windows[:, -length - 1 :].split(max(1, min(64, 2**17 // length)))
            with sharper(model, length, trained):
                found[length] = math.exp(
                    torch.cat([self.losses(model, part)[:, -last:] for part in parts]).mean().item()
                )
        return found

    def long_texts(self, model, trained):
        """What a model that was trained on texts of this length does in longer ones; and with its attention sharper there."""
        found = dict(needles=self.needles(model), by_length=self.by_length(model))
        if "attention" in model.config.mixers:
            found["sharper"] = dict(
                needles=self.needles(model, trained), by_length=self.by_length(model, trained)
            )
        return found


@contextlib.contextmanager
def sharper(model, length, trained):
    """Attention's scores grown as the logarithm of the text's length, from the length `trained` on (0: never), by one factor for all of the text: a lead
    over the others then keeps its weight among more of them."""
    queries = (
        [
            w
            for layer in model.layers
            if isinstance(layer.mixer, mil.Attention)
            for w in layer.mixer.q_proj.parameters()
        ]
        if 0 < trained < length
        else []
    )
    kept = [w.detach().clone() for w in queries]
    with torch.no_grad():
        try:
            for w in queries:
                w.mul_(math.log(length) / math.log(trained))
            yield
        finally:
            for w, old in zip(queries, kept):
                w.copy_(old)


# --------------------------------------------------------------------------------------------------
# Arms: ways to make a student


@dataclass(frozen=True)
class Arm:
    """A way to make a student. Places are those in `path`, -1 the last."""

    name: str
    path: tuple  # of stage 1: the layers without attention after each of its steps
    report: tuple = ()  # after which of these the student is measured
    then: tuple = ()  # and after which stage 2 follows, on a copy
    prefer: tuple = ()  # and after which of these, preferences
    mixer: str = "mamba2"
    init: str = "attention"
    train: str = "mixers"  # in stage 1
    longer: bool = False  # stage 1 has the steps of stage 2 as well
    linear: bool = False  # Mamba with A = 0 and Δ = 1, not learned
    judge: bool = False  # whether what it writes, and what it finds in long texts, is measured, and the first seed's kept in OUT/models


def steps_to(n, count):
    """The paper's steps, 25, 50, 75, 87.5, 100 % of n layers, as far as `count` layers; each set holds the one before it."""
    counts = sorted({n // 4, n // 2, n * 3 // 4, n * 7 // 8, n} & set(range(count + 1)))
    stages = td.resolve(
        [td.Stage(keep=1 - c / n, steps=1) for c in counts],
        mil.Config(v=8, d=4, n_layers=n, n_heads=1, n_kv_heads=1, d_ff=4),
        "",
    )
    return tuple(
        tuple(i for i, mixer in enumerate(stage.mixers) if mixer != "attention") for stage in stages
    )


def arms(n, tables):
    """The arms that these tables need. Within a table, all arms choose their rate at the same place."""
    chain, half, quarter = steps_to(n, n), steps_to(n, n // 2), steps_to(n, n * 3 // 4)
    layers, every = lambda a, b: tuple(range(a, b)), (1, 2, 3, 4)  # noqa: E731
    asked = lambda *names: bool({*names} & {*tables})  # noqa: E731
    judge = asked("quality", "long", "speculation")
    all_ = {
        "quality init long speculation": [
            Arm("mamba2", chain, every if judge else (1, 4), every if judge else (), judge=judge)
        ],
        "quality long speculation": [Arm("mamba", chain, every, every, mixer="mamba", judge=True)],
        "quality long": [Arm("Llama", ((),), (), (-1,), judge=True)],  # what stage 2 alone does
        "init": [
            Arm(f"{init}, {train}", chain, (1, 4), init=init, train=train)
            for init, train in (("random", "mixers"), ("attention", "mlps"), ("random", "mlps"))
        ],
        "order mixer stages": [
            Arm(
                "half, stepwise",
                half,
                (-1,),
                (-1,) if asked("mixer", "stages") else (),
                (-1,) if asked("stages") else (),
                judge=asked("stages"),
            )
        ],
        "order": [
            Arm("half, at once", (half[-1],), (-1,)),
            Arm("half, the first layers", (layers(0, n // 4), layers(0, n // 2)), (-1,)),
            Arm("half, the last layers", (layers(n * 3 // 4, n), layers(n // 2, n)), (-1,)),
            Arm("quarter, stepwise", quarter, (-1,)),
            Arm("quarter, at once", (quarter[-1],), (-1,)),
            Arm(
                "quarter, the first layers",
                (layers(0, n // 4), layers(0, n // 2), layers(0, n * 3 // 4)),
                (-1,),
            ),
            Arm(
                "quarter, the last layers",
                (layers(n * 3 // 4, n), layers(n // 2, n), layers(n // 4, n)),
                (-1,),
            ),
        ],
        "mixer": [
            Arm("half, Mamba", half, (), (-1,), mixer="mamba"),
            Arm("half, linear attention", half, (), (-1,), mixer="mamba", linear=True),
            Arm("half, nothing", half, (), (-1,), mixer="none", train="all"),
        ],
        "stages": [Arm("half, stage 1 longer", half, (-1,), longer=True)],
    }
    return [arm for needs, some in all_.items() if set(needs.split()) & set(tables) for arm in some]


def freeze_linear(model):
    """Mamba layers without decay: A = 0 and Δ = 1 whatever is read, never learned."""
    with torch.no_grad():
        for layer in model.layers:
            if isinstance(layer.mixer, mil.Mamba):
                layer.mixer.A_log.fill_(-math.inf)
                layer.mixer.dt_proj.weight.zero_()
                layer.mixer.dt_proj.bias.fill_(math.log(math.e - 1))  # softplus of it is 1
                for w in (layer.mixer.A_log, *layer.mixer.dt_proj.parameters()):
                    w.requires_grad_(False)


def learn(lab, arm, seed, rate, sweep):
    """Train a student by an arm: a row of figures for each place that it is to be measured at; with `sweep` the last of stage 1 alone. One that diverges has
    the rows before, and one that says so."""
    rows = []
    try:
        train_student(lab, arm, seed, rate, sweep, rows)
    except MilError as e:
        rows.append(dict(arm=arm.name, seed=seed, rate=rate, kl=math.inf, diverged=str(e)))
    return rows


def train_student(lab, arm, seed, rate, sweep, rows):
    size, trained, tokens = lab.size, {}, 0
    s = dataclasses.replace(
        lab.s, seed=1000 + 100 * seed, init=arm.init
    )  # far from the teacher's, and from each other's
    run, last = td.Run(s, lab.device), len(arm.path) - 1
    at = lambda places: {i % len(arm.path) for i in places}  # noqa: E731

    def train(stage, number, trained, batches=None):
        """A stage, on a copy of what has been trained before; its Models, and what is trained by then."""
        nonlocal tokens
        models = td.assemble(run, lab.teacher, lab.teacher, stage, number, trained)
        if arm.linear:
            freeze_linear(models.student)
        batches = batches or td.training_batches(run, lab.corpus, [s.seed, number])
        td.fit(run, td.State(), stage, models, batches, io.StringIO(), "No student was saved")
        tokens += stage.steps * s.batch * s.context * (stage.loss == "distill")
        return models, {
            name: w
            for name, w in models.student.named_parameters()
            if name in trained or w.requires_grad
        }

    def measure(models, stages, replaced, judge, **more):
        theirs, row = td.evaluate(
            run, models, lab.sweep_corpus if sweep else lab.corpus, lab.encoding
        )
        rows.append(
            dict(
                arm=arm.name,
                mixer=arm.mixer,
                replaced=len(replaced),
                stages=stages,
                seed=seed,
                rate=rate,
                tokens=tokens,
                share=tokens / lab.teacher_tokens,
                ratio=row["perplexity"] / theirs["perplexity"],
                **row,
                **more,
            )
        )
        if judge:
            rows[-1].update(
                lab.writing(models.student), **lab.long_texts(models.student, size.context)
            )

    for i, replaced in enumerate(arm.path):
        mixers = [arm.mixer if k in replaced else "attention" for k in range(size.n_layers)]
        new = len(replaced) - (len(arm.path[i - 1]) if i else 0)
        stage = td.Stage(
            trains=arm.train,
            steps=new * size.layer_steps + (arm.longer and i == last) * size.stage2_steps,
            lr=rate,
            name=f"stage 1.{i + 1}",
            mixers=mixers,
        )
        if stage.steps:
            models, trained = train(stage, i, trained)
        if i in at(arm.report) and not sweep or i == last and sweep:
            measure(models, "1", replaced, False)
        if i in at(arm.then) and not sweep:
            before = tokens
            second = dataclasses.replace(
                stage,
                trains="all",
                steps=size.stage2_steps,
                lr=size.stage2_rate,
                name=f"stage 2 after 1.{i + 1}",
            )
            models, full = train(second, 50 + i, trained)
            measure(models, "1 + 2", replaced, arm.judge)
            if seed == 0 and arm.judge:
                td.save_student(
                    run,
                    models.student,
                    lab.out / "models" / f"{arm.name}-{len(replaced)}",
                    "bytes",
                    torch.float32,
                )
            if i in at(arm.prefer):
                pairs = json.loads((lab.out / "pairs.json").read_text())
                held, learned = (
                    [pair for number, *pair in pairs if (number % 4 == 0) == out]
                    for out in (True, False)
                )  # by file
                third = dataclasses.replace(
                    second, loss="dpo", beta=0.1, steps=size.dpo_steps, lr=3e-5, name="stage 3"
                )
                rows[-1].update(td.preferences(run, third, models, held), held_out=len(held))
                models, _ = train(third, 90 + i, full, td.pair_batches(run, learned, [s.seed, 90]))
                measure(
                    models,
                    "1 + 2 + 3",
                    replaced,
                    arm.judge,
                    **td.preferences(run, third, models, held),
                )
            tokens = before
        del models


DRAFTS = {
    "attention, 2 layers": ("attention", 2),
    "mamba2, 2 layers": ("mamba2", 2),
    "attention, 4 layers": ("attention", 4),
    "mamba2, 4 layers": ("mamba2", 4),
}


def make_draft(lab, name):
    """A small student of the teacher's first, last and, of four, two layers between; saved, unless it diverges."""
    (mixer, count), n = DRAFTS[name], lab.size.n_layers
    layers = [round(i * (n - 1) / (count - 1)) for i in range(count)]
    run, base = lab.run, mil.keep_layers(lab.teacher, layers)
    stage = td.Stage(
        trains="all", steps=lab.size.draft_steps, lr=1e-3, name=name, mixers=[mixer] * count
    )
    models = td.assemble(run, lab.teacher, base, stage, 1, {})
    try:
        td.fit(
            run,
            td.State(),
            stage,
            models,
            td.training_batches(run, lab.corpus, [7, 0]),
            io.StringIO(),
            "No draft was saved",
        )
    except MilError as e:
        return [dict(arm=f"draft, {name}", seed=0, rate=stage.lr, diverged=str(e))]
    td.save_student(run, models.student, lab.out / "models" / name, "bytes", torch.float32)
    return [
        dict(
            arm=f"draft, {name}",
            stages="draft",
            seed=0,
            **td.evaluate(run, models, lab.corpus, lab.encoding)[1],
        )
    ]


# --------------------------------------------------------------------------------------------------
# Many arms at once: on a GPU each in a process of its own, so that it works for one while another is read, judged or compiled

LAB = None


def enter(*args):
    """A worker's beginning."""
    global LAB
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()
    LAB = Lab(*args)


def work(f, *args):
    """A job of a worker, and how long it took. What it printed is dropped."""
    began = time.perf_counter()
    rows = f(LAB, *args)
    sys.stdout.seek(0), sys.stdout.truncate()
    return rows, time.perf_counter() - began


class Inline(contextlib.nullcontext):
    """A pool of one, this process."""

    def __init__(self, lab):
        global LAB
        LAB = lab
        super().__init__()

    def submit(self, f, *args):
        future = Future()
        with contextlib.redirect_stdout(io.StringIO()):
            future.set_result(f(*args))
        return future


def choose_rate(mine, size):
    """The best rate of an arm's rows of the sweep; and where that is the lowest or the highest, and not enough were tried, one beyond it, else None."""
    best, tried = min(mine, key=lambda row: row["kl"])["rate"], sorted(row["rate"] for row in mine)
    beyond = {tried[0]: tried[0] / 2, tried[-1]: tried[-1] * 2}.get(best)
    return best, beyond if len(tried) < len(size.rates) + size.more_rates else None


def all_arms(lab, pool, tables, seeds, began, journal):
    """The rows of every arm: the best rate by the sweep, then all seeds; and the sweep's own rows. Each goes to the journal as it comes."""
    rows, swept, waiting, plan, done = [], [], {}, arms(lab.size.n_layers, tables), 0
    rates = {
        arm.name: list(lab.size.rates) * any(arm.path) for arm in plan
    }  # none where there is no stage 1

    def submit(f, *args):
        waiting[pool.submit(work, f, *args)] = f, args

    for arm in plan:
        for rate in rates[arm.name]:
            submit(learn, arm, SWEEP, rate, True)
        for seed in () if any(arm.path) else range(seeds):
            submit(learn, arm, seed, None, False)
    for name in DRAFTS if "speculation" in tables else ():
        submit(make_draft, name)
    if "cost" in tables:
        submit(compile_cost)
    total = len(waiting) + sum(any(arm.path) for arm in plan) * seeds
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED)[0]:
            (f, args), (found, seconds), done = waiting.pop(future), future.result(), done + 1
            arm, sweep = args[0] if args else f.__name__, f is learn and args[3]
            (swept if sweep else rows).extend(found)
            journal.write("".join(json.dumps(row) + "\n" for row in found))
            journal.flush()
            td.show(
                f"{done} of {total} jobs  {time.perf_counter() - began:.0f} s  "
                + (
                    f"{arm.name}, {f'rate {args[2]:.3g}, sweep' if sweep else f'seed {args[1]}'}"
                    if f is learn
                    else arm
                )
                + f": {seconds:.1f} s",
                done=not sys.stdout.isatty() and done % 10 == 0,
            )
            mine = [row for row in swept if row["arm"] == arm.name] if sweep else []
            if sweep and len(mine) == len(rates[arm.name]):
                best, beyond = choose_rate(mine, lab.size)
                if beyond:
                    rates[arm.name].append(beyond)
                    submit(learn, arm, SWEEP, beyond, True)
                    total += 1
                else:
                    for seed in range(seeds):
                        submit(learn, arm, seed, best, False)
    for row in rows:
        tried = rates.get(row["arm"])
        row["edge"] = bool(tried) and row["rate"] in (min(tried), max(tried))
    return rows, swept


def compile_cost(lab):
    """What cost and the scans are going to need is compiled while there is other work: of the official kernels that takes minutes."""
    lab = copy.copy(lab)
    lab.size = dataclasses.replace(
        lab.size, cost_lengths=lab.size.cost_lengths[:1], scan_lengths=lab.size.scan_lengths[:1]
    )
    cost(lab), scans(lab.size)
    return []


def make_pairs(lab):
    """Preferences: functions of the training text that the teacher completes twice; where one parses and the other does not, that one is preferred. Each is
    (number of its file, chosen, rejected), as train_distill has pairs."""
    asked = functions(lab.raw, lab.size.pairs, lab.size.before, 0, random.Random(1))
    prompts = [lab.encoding.encode(text)[-lab.size.before :] for _, text, *_ in asked]
    twice, pairs = [lab.complete(lab.teacher, prompts, seed) for seed in (11, 10**6)], []
    for (number, _, header, _), prompt, *texts in zip(asked, prompts, *twice):
        good = [parses(header, lab.encoding.decode(ids)) for ids in texts]
        if good[0] != good[1]:
            pairs.append(
                [
                    number,
                    *(
                        [*(~i for i in prompt), *texts[good.index(right)]]
                        for right in (True, False)
                    ),
                ]
            )
    if len(pairs) < 8:  # of a teacher that has not learned to write
        pairs = [
            [number, *([*(~i for i in prompt), *ids] for ids in texts)]
            for number, (prompt, *texts) in enumerate(zip(prompts, *twice))
        ][:8]
    mil.write_whole(lab.out / "pairs.json", lambda f: f.write(json.dumps(pairs).encode()))
    return len(pairs)


# --------------------------------------------------------------------------------------------------
# Tables


def mean(rows, key):
    """Mean and standard error over seeds (NaN of one alone)."""
    return pictures.mean([row[key] for row in rows if key in row])


def cell(rows, key, digits=3, percent=False):
    middle, error = mean(rows, key)
    if middle != middle:
        return "–"
    scale, end = (100, " %") if percent else (1, "")
    return (
        f"{scale * middle:.{digits}f}"
        + (f" ± {scale * error:.{digits}f}" if error == error else "")
        + end
    )


def rate(rows):
    """The learning rate of an arm, with a * where it is the lowest or highest that was tried."""
    return (
        f"{rows[0]['rate']:.2g}" + "*" * rows[0].get("edge", False)
        if rows and rows[0]["rate"]
        else "–"
    )


T95 = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
)  # Student's t, two-sided, of 1, 2 … degrees of freedom


@dataclass
class Table:
    name: str
    title: str
    columns: list
    rows: list = dataclasses.field(default_factory=list)
    claims: list = dataclasses.field(
        default_factory=list
    )  # (what is claimed, what is found, whether it holds)
    notes: list = dataclasses.field(default_factory=list)

    def claim(self, what, a, b, key="kl", paired=False, trials=0):
        """That `key` of the rows a is less than that of b: it holds, or its opposite does, beyond the error of the difference at 95 %. That error is Welch's t of
        two sides of students (one row alone has none); `paired`, the t of the differences by seed; and where `key` is a share of so many `trials`, each side's
        is at least the binomial one, which two students alike have too."""

        def side(rows):
            """A side's standard error and its degrees of freedom; None where nothing is known of it."""
            middle, error = mean(rows, key)
            n = trials * len(rows)
            share = (middle * n + 1) / (n + 2)
            least = (share * (1 - share) / n) ** 0.5 if n else 0
            return (
                (
                    max(least, error if error == error else 0),
                    (len(rows) if len(rows) > 1 else n) - 1,
                )
                if n or error == error
                else None
            )

        (x, _), (y, _) = mean(a, key), mean(b, key)
        if x == x and y == y:
            if paired:
                other = {row["seed"]: row[key] for row in b}
                _, error = pictures.mean(
                    [other[row["seed"]] - row[key] for row in a if row["seed"] in other]
                )
                known = [(error, len(a) - 1)] * (error == error)
            else:
                known = [one for one in map(side, (a, b)) if one] if max(len(a), len(b)) > 1 else []
            square = sum(e * e for e, _ in known)
            freedom = square**2 / sum(e**4 / n for e, n in known) if square else 1
            error = T95[min(int(freedom + 1e-9), len(T95)) - 1] * square**0.5 if known else math.inf
            verdict = (
                "one student each, not judged"
                if not known
                else "holds"
                if y - x > error
                else "the opposite holds"
                if x - y > error
                else "within the error"
            )
            self.claims.append((what, f"{key} {x:.4g} and {y:.4g}", verdict))

    def text(self, bar=" "):
        """For the terminal, or with bar="|" in markdown."""
        cells, markdown = [self.columns, *self.rows], bar == "|"
        widths = [max(len(str(row[i])) for row in cells) for i in range(len(self.columns))]
        line = lambda row: bar.join(
            [
                "",
                *(
                    f" {c:<{w}} " if i == 0 else f" {c:>{w}} "
                    for i, (c, w) in enumerate(zip(row, widths))
                ),
                "",
            ]
        ).rstrip()  # noqa: E731
        rule = [
            bar.join(["", *("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)), ""])
        ] * markdown
        said = [
            *(f"{verdict}: {what} ({found})" for what, found, verdict in self.claims),
            *self.notes,
        ]
        said = [("- " if markdown else "  ") + one for one in said]
        head = f"### {self.title}\n" if markdown else f"\n{self.title}"
        return (
            "\n".join(
                [
                    head,
                    line(cells[0]),
                    *rule,
                    *map(line, cells[1:]),
                    *([""] * (markdown and bool(said))),
                    *said,
                ]
            )
            + "\n" * markdown
        )


class Rows(list):
    """Rows of arms, and how to pick some: none of an arm of which a student diverged."""

    def of(self, arm, replaced=None, stages=None):
        mine = [r for r in self if r["arm"] == arm]
        lost = any("diverged" in r for r in mine)
        return [
            r
            for r in mine
            if not lost
            and (replaced is None or r["replaced"] == replaced)
            and (stages is None or r["stages"] == stages)
        ]


def percent(replaced, n):
    """The share of attention that is left."""
    return f"{100 - 100 * replaced / n:g} %"


def kinds(n):
    """The students that quality and long contexts are measured of."""
    return [
        (mixer, c) for mixer in ("mamba2", "mamba") for c in (n // 2, n * 3 // 4, n * 7 // 8, n)
    ]


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks, the mean one for those that are equal; NaN where all are."""
    x, y = (
        [
            sum(w < v for w in values) + sum(w == v for w in values) / 2 - len(values) / 2
            for v in values
        ]
        for values in (a, b)
    )
    square = sum(i * i for i in x) * sum(j * j for j in y)
    return sum(i * j for i, j in zip(x, y)) / square**0.5 if square else math.nan


def quality(rows, n, teacher):
    t = Table(
        "quality",
        "Quality by attention kept (Table 6 left), after stage 2: on unseen text with notes in it, and of functions that are completed",
        [
            "student",
            "attention",
            "tokens ÷ teacher's",
            "rate",
            "ppl",
            "÷ teacher",
            "paper ÷",
            "KL",
            "agree",
            "parses",
            "length",
            "teacher's nats",
        ],
    )
    t.rows.append(
        [
            "teacher",
            "100 %",
            "1",
            "",
            f"{teacher['perplexity']:.3f}",
            "1",
            "1",
            "0",
            "100 %",
            f"{teacher['parses']:.1%}",
            f"{teacher['length']:.0f}",
            f"{teacher['teacher_nats']:.3f}",
        ]
    )
    for mixer, c in [("Llama", 0), *kinds(n)]:
        r, kept = rows.of(mixer, c, "1 + 2"), 1 - c / n
        paper = f"{pictures.PAPER[kept]:.2f}" if mixer == "mamba" and kept in pictures.PAPER else ""
        t.rows.append(
            [
                mixer,
                percent(c, n),
                f"{r[0]['share']:.2f}" if r else "–",
                rate(r),
                cell(r, "perplexity"),
                cell(r, "ratio", 4),
                paper,
                cell(r, "kl", 4),
                cell(r, "agreement", 1, True),
                cell(r, "parses", 1, True),
                cell(r, "length", 0),
                cell(r, "teacher_nats"),
            ]
        )
    for (mixer, a), (other, b) in zip(kinds(n), kinds(n)[1:]):
        if mixer == other:
            for key, what in (
                ("kl", "is nearer to the teacher than"),
                ("teacher_nats", "writes what the teacher finds likelier than what is written by"),
            ):
                t.claim(
                    f"{mixer}: {percent(a, n)} of attention {what} {percent(b, n)}",
                    rows.of(mixer, a, "1 + 2"),
                    rows.of(mixer, b, "1 + 2"),
                    key,
                    paired=True,
                )
    for c in (n // 2, n):
        t.claim(
            f"(not the paper's) {percent(c, n)} of attention: Mamba-2 is nearer to the teacher than Mamba",
            rows.of("mamba2", c, "1 + 2"),
            rows.of("mamba", c, "1 + 2"),
        )
    there = [r for k in kinds(n) if (r := rows.of(*k, "1 + 2"))]
    if len(there) > 2:
        values = {
            key: [sign * mean(r, key)[0] for r in there]
            for key, sign in (("perplexity", 1), ("kl", 1), ("parses", -1), ("teacher_nats", 1))
        }
        t.notes.append(
            f"rank correlation of these {len(there)} kinds of student, the best first, by perplexity with those "
            + ", ".join(
                f"by {key} "
                + (
                    f"{r:.2f}"
                    if (r := rank_correlation(values["perplexity"], values[key])) == r
                    else "–"
                )
                for key in ("kl", "parses", "teacher_nats")
            )
        )
    t.notes.append(
        f"of the real functions {teacher['real_parses']:.1%} parse, {teacher['real_length']:.0f} bytes long: a text that breaks off inside a block does not"
    )
    t.notes.append("Llama: the teacher itself through stage 2, which is what more steps alone do")
    return t


def init(rows, n, teacher):
    t = Table(
        "init",
        "Initialisation and frozen MLPs, after stage 1, rates chosen at 0 % (Tables 7 left and 8)",
        ["attention", "new layers from", "MLPs", "rate", "ppl", "÷ teacher", "KL", "paper ppl"],
    )
    paper = {
        (0, "attention", "frozen"): "3.36",
        (0, "random", "frozen"): "18.2",
        (0, "attention", "trained"): "66.7",
        (0.5, "attention", "frozen"): "2.09",
        (0.5, "random", "frozen"): "7.4",
        (0.5, "attention", "trained"): "9.1",
    }
    names = {
        ("attention", "frozen"): "mamba2",
        ("random", "frozen"): "random, mixers",
        ("attention", "trained"): "attention, mlps",
        ("random", "trained"): "random, mlps",
    }
    for c in (n // 2, n):
        found = {key: rows.of(arm, c, "1") for key, arm in names.items()}
        for (begin, mlps), r in found.items():
            t.rows.append(
                [
                    percent(c, n),
                    begin,
                    mlps,
                    rate(r),
                    cell(r, "perplexity"),
                    cell(r, "ratio"),
                    cell(r, "kl"),
                    paper.get((1 - c / n, begin, mlps), ""),
                ]
            )
        for mlps in ("frozen", "trained"):
            t.claim(
                f"{percent(c, n)}, MLPs {mlps}: attention's weights beat random ones",
                found["attention", mlps],
                found["random", mlps],
            )
        for begin in ("attention", "random"):
            t.claim(
                f"{percent(c, n)}, from {begin}: frozen MLPs beat trained ones",
                found[begin, "frozen"],
                found[begin, "trained"],
            )
    return t


def order(rows, n, teacher):
    t = Table(
        "order",
        "Order of replacement, after stage 1, same tokens (Table 7 right)",
        [
            "attention",
            "which layers keep it",
            "replaced",
            "rate",
            "ppl",
            "÷ teacher",
            "KL",
            "paper ppl",
        ],
    )
    ways = {
        "stepwise": ("evenly spread", "stepwise"),
        "at once": ("evenly spread", "at once"),
        "the first layers": ("the last", "stepwise"),
        "the last layers": ("the first", "stepwise"),
    }
    paper = {
        ("half", "stepwise"): "2.09",
        ("quarter", "stepwise"): "2.20",
        ("quarter", "at once"): "2.29",
    }
    for share, c in (("half", n // 2), ("quarter", n * 3 // 4)):
        found = {way: rows.of(f"{share}, {way}", c, "1") for way in ways}
        for way, r in found.items():
            t.rows.append(
                [
                    percent(c, n),
                    *ways[way],
                    rate(r),
                    cell(r, "perplexity"),
                    cell(r, "ratio"),
                    cell(r, "kl", 4),
                    paper.get((share, way), ""),
                ]
            )
        for way, what in (
            ("at once", "stepwise beats at once"),
            ("the first layers", "attention spread evenly beats attention in the last layers"),
            ("the last layers", "attention spread evenly beats attention in the first layers"),
        ):
            t.claim(f"{percent(c, n)}: {what}", found["stepwise"], found[way])
    t.notes.append("the paper's, not interleaved: 2.41 at 50 %, 2.89 at 25 %")
    return t


def mixer(rows, n, teacher):
    t = Table(
        "mixer",
        "What half of the layers must have in attention's place, after stage 2, same steps (Table 9); with nothing there all that is left trains in stage 1",
        ["in its place", "rate", "ppl", "÷ teacher", "KL", "agree", "paper (LAMBADA ppl)"],
    )
    found = {
        name: rows.of(f"half, {name}", n // 2, "1 + 2")
        for name in ("stepwise", "Mamba", "linear attention", "nothing")
    }
    for (name, r), label, paper in zip(
        found.items(),
        ("Mamba-2", "Mamba", "Mamba with A = 0, Δ = 1", "nothing"),
        ("", "6.20", "", "151.98"),
    ):
        t.rows.append(
            [
                label,
                rate(r),
                cell(r, "perplexity"),
                cell(r, "ratio"),
                cell(r, "kl", 4),
                cell(r, "agreement", 1, True),
                paper,
            ]
        )
    t.claim("Mamba beats nothing", found["Mamba"], found["nothing"])
    t.claim("Mamba-2 beats nothing", found["stepwise"], found["nothing"])
    t.claim(
        "(not the paper's) Mamba beats linear attention", found["Mamba"], found["linear attention"]
    )
    t.notes.append(
        "A = 0, Δ = 1 is linear attention, a sum that grows with the text: how much of what it loses is that growth, and how much a Δ that does not choose, is not told apart"
    )
    return t


def stages(rows, n, teacher):
    t = Table(
        "stages",
        "Stages, half Mamba-2 (Table 6 right); preferences: of two functions, the one that parses",
        [
            "stages",
            "tokens ÷ teacher's",
            "rate",
            "ppl",
            "÷ teacher",
            "KL",
            "parses",
            "length",
            "teacher's nats",
            "preferred, held out",
        ],
    )
    found = {
        "1": rows.of("half, stepwise", n // 2, "1"),
        "1, as long as 1 + 2": rows.of("half, stage 1 longer"),
        **{name: rows.of("half, stepwise", n // 2, name) for name in ("1 + 2", "1 + 2 + 3")},
    }
    for name, r in found.items():
        t.rows.append(
            [
                name,
                f"{r[0]['share']:.2f}" if r else "–",
                rate(r),
                cell(r, "perplexity"),
                cell(r, "ratio", 4),
                cell(r, "kl", 4),
                cell(r, "parses", 1, True),
                cell(r, "length", 0),
                cell(r, "teacher_nats"),
                cell(r, "preferred", 1, True),
            ]
        )
    for key, what in (("kl", "is nearer to the teacher"), ("perplexity", "is less perplexed")):
        t.claim(
            f"stage 2 {what} than as many more steps of stage 1",
            found["1 + 2"],
            found["1, as long as 1 + 2"],
            key,
        )
    for key, what in (
        ("parses", "fewer functions do not parse"),
        ("preferred", "of fewer pairs held out the wrong one is preferred"),
    ):
        t.claim(
            f"after preferences {what}",
            *(
                [{f"not {key}": 1 - x[key], "seed": x["seed"]} for x in found[k]]
                for k in ("1 + 2 + 3", "1 + 2")
            ),
            f"not {key}",
            paired=True,
        )
    for x in found["1 + 2"][:1]:
        t.notes.append(
            f"preferred: of {x['held_out']} pairs of files that no pair is learned from, those in which the chosen function has gained more over the teacher; the pairs are not counted as tokens"
        )
    return t


def long(rows, n, teacher):
    people = [("teacher", "100 %", [teacher])] + [
        (m, percent(c, n), rows.of(m, c, "1 + 2")) for m, c in [("Llama", 0), *kinds(n)]
    ]
    sharp = lambda r: [dict(x, **x["sharper"]) for x in r if "sharper" in x]  # noqa: E731
    lengths, teachers = list(teacher["needles"]), {"": [teacher], "sharper": sharp([teacher])}
    versions = [
        (name, kept, way, r)
        for name, kept, all_ in people
        for way, r in (("", all_), ("sharper", sharp(all_)))
        if r or not way
    ]
    columns = ["model", "attention", "", *(f"{int(k):,}" for k in lengths)]
    t = Table(
        "long",
        "Needle in a haystack without other notes (Figure 4): the share of numbers found whole, mean over depths, by length in bytes; "
        f"distilled at {teacher['context']:,}, the teacher trained at {teacher['teacher_context']:,}",
        columns,
    )
    more = Table(
        "context",
        f"Perplexity of the same {teacher['context'] // 4} bytes at the end of texts of growing length",
        columns,
    )
    found = lambda r, k: [
        dict(found=(share := sum(x["needles"][k]) / len(x["needles"][k])), missed=1 - share)
        for x in r
    ]  # noqa: E731
    at = lambda r, k: [dict(perplexity=x["by_length"][k], seed=x.get("seed")) for x in r]  # noqa: E731
    for name, kept, way, r in versions:
        t.rows.append([name, kept, way, *(cell(found(r, k), "found", 0, True) for k in lengths)])
        more.rows.append([name, kept, way, *(cell(at(r, k), "perplexity", 2) for k in lengths)])
    within = [k for k in lengths if int(k) <= teacher["teacher_context"]][-1]
    t.notes.append(
        f"within its context, at {int(within):,} bytes, the teacher finds {mean(found([teacher], within), 'found')[0]:.0%}; where that is little, this table says nothing of its students"
    )
    t.notes.append(
        "sharper: attention's scores times log(length) ÷ log(length of training) in texts beyond that, nothing learned anew: a softmax over more tokens spreads over them"
    )
    far, near = lengths[-1], [k for k in lengths if int(k) <= teacher["context"]][-1]
    for name, kept, way, r in versions:
        if name in pictures.NAMES:
            what = (
                f"{name}, {kept} of attention: misses fewer at {int(far):,} bytes than the teacher"
            )
            t.claim(
                f"(not the paper's) {what}, both {way}" if way else what,
                found(r, far),
                found(teachers[way], far),
                "missed",
                trials=teacher["samples"] * len(teacher["needles"][far]),
            )
    for name, kept, r in people[2:]:
        more.claim(
            f"(not the paper's) {name}, {kept} of attention: less perplexed after {int(far):,} bytes than the teacher",
            at(r, far),
            at([teacher], far),
            "perplexity",
        )
        more.claim(
            f"(not the paper's) {name}, {kept} of attention: less perplexed after {int(far):,} bytes than after {int(near):,}",
            at(r, far),
            at(r, near),
            "perplexity",
            paired=True,
        )
    return t, more


def speculation(lab):
    """Every target with every draft, greedy and sampled: tokens a pass, acceptance, speed."""
    size, n = lab.size, lab.size.n_layers
    places = {
        "Llama": lab.out / "teacher",
        **{
            f"{m}, {percent(c, n)}": lab.out / "models" / f"{m}-{c}"
            for m, c in (("mamba2", n // 2), ("mamba2", n), ("mamba", n))
        },
    }
    targets, drafts = (
        {
            name: mil.pack(mil.load(place, lab.device, lab.kind))
            for name, place in some.items()
            if place.exists()
        }  # of what has diverged there is none
        for some in (places, {name: lab.out / "models" / name for name in DRAFTS})
    )
    asked = functions(lab.unseen, size.texts, size.context // 4, 0, random.Random(5))
    prompts = [lab.encoding.encode(text)[-size.context // 4 :] for _, text, *_ in asked]
    rows = []

    def timed(model, temperature, draft=None, K=0):
        """tokens/s from a text's second round on, and of each text tokens a pass and the share kept."""
        decoder = generate.Decoder(
            model,
            1,
            size.context,
            temperature,
            generator=torch.Generator(lab.device).manual_seed(3),
            draft=draft,
            K=K,
        )
        seconds, tokens, per_pass, kept = 0, 0, [], []
        for warm, prompt in enumerate(
            prompts[:1] + prompts
        ):  # the first twice: kernels are compiled and graphs captured in it
            decoder.passes = decoder.accepted = decoder.proposed = count = first = 0
            for (new,) in decoder.decode([prompt], size.speculated):
                count += len(new)
                if not first:
                    first, began = count, bench.now()
            if warm:
                (
                    per_pass.append(count / max(1, decoder.passes)),
                    kept.append(decoder.accepted / max(1, decoder.proposed)),
                )
                seconds, tokens = seconds + bench.now() - began, tokens + count - first
        return tokens / seconds, per_pass, kept

    for name, model in targets.items():
        for temperature in (0, 1):
            plain = timed(model, temperature)[0]
            for draft, small in drafts.items():
                for K in size.Ks:
                    speed, per_pass, kept = timed(model, temperature, small, K)
                    rows.append(
                        dict(
                            target=name,
                            draft=draft,
                            temperature=temperature,
                            K=K,
                            per_pass=per_pass,
                            kept=kept,
                            tokens_s=speed,
                            plain=plain,
                        )
                    )
                    td.show(f"speculation: {name}, {draft}, K = {K}", done=False)
    t = Table(
        "speculation",
        "Speculative decoding, batch 1: tokens a pass of the target (± between texts) and speed over plain, at the K that is fastest (Tables 1 and 5)",
        ["target", "draft", "text", "K", "tokens a pass", "accepted", "÷ plain", "tokens/s"],
        notes=[
            "the drafts are one each, of one rate, Mamba-2 in all layers at once: no fair comparison of kinds of draft"
        ],
    )
    for name in targets:
        for temperature in (0, 1):
            for draft in drafts:
                best = max(
                    (
                        r
                        for r in rows
                        if (r["target"], r["draft"], r["temperature"]) == (name, draft, temperature)
                    ),
                    key=lambda r: r["tokens_s"],
                )
                middle, error = pictures.mean(best["per_pass"])
                t.rows.append(
                    [
                        name,
                        draft,
                        "sampled" if temperature else "greedy",
                        best["K"],
                        f"{middle:.2f}" + (f" ± {error:.2f}" if error == error else ""),
                        f"{sum(best['kept']) / len(best['kept']):.0%}",
                        f"{best['tokens_s'] / best['plain']:.2f}",
                        f"{best['tokens_s']:.0f}",
                    ]
                )
    return t, rows


def cost(lab):
    """Reading and writing at growing length."""
    size, rows = lab.size, []
    t = Table(
        "cost",
        f"Cost by length, batch 1, random weights, {size.cost.n_layers} layers of width {size.cost.d}: reading it all, one more token, the cache",
        ["attention", "what", *(f"{k:,}" for k in size.cost_lengths)],
    )
    for mixers in (
        ("attention",),
        ("mamba2", "attention"),
        ("mamba2", "mamba2", "mamba2", "attention"),
        ("mamba2",),
        ("mamba",),
    ):
        model = bench.random_model(bench.stacked(size.cost, mixers))
        mine = []
        for length in size.cost_lengths:
            read = math.inf
            for _ in range(
                1 if length > 10**5 else 2
            ):  # the first time, what is new in it is compiled: beside seconds that is nothing
                cache, began = None, bench.now()
                cache = bench.filled(model, 1, length)
                read = min(read, bench.now() - began)
            mine.append(
                dict(
                    mixers=mixers,
                    length=length,
                    read=read,
                    step_ms=bench.step_ms(model, cache, 1),
                    bytes=bench.cache_bytes(cache, length),
                )
            )
            td.show(f"cost: {' + '.join(mixers)}, {length:,} tokens", done=False)
            del cache
        share = mixers.count("attention") / len(mixers)
        kept = f"{share:.0%}" + (f", {mixers[0]}" if share < 1 else "")
        t.rows += [
            [kept, "read, s", *(f"{r['read']:.3f}" for r in mine)],
            ["", "a token, ms", *(f"{r['step_ms']:.2f}" for r in mine)],
            ["", "cache, MiB", *(f"{r['bytes'] / 2**20:.1f}" for r in mine)],
        ]
        rows += mine
        del model
    return t, rows


def scans(size):
    """Forward and backward of the scans, of attention of the same width and, where they are installed, of the official kernels, batch 1: [{name, length, ms}]."""
    rows = []
    for kind, *shape in (bench.MAMBA2, bench.MAMBA):
        for length in size.scan_lengths:
            td.show(f"cost: the scan of {kind}, {length:,} tokens", done=False)
            for who, ways in bench.contenders(bench.inputs(kind, *shape, 1, length)).items():
                if who != "attention" or kind == bench.MAMBA2[0]:
                    times = [
                        m["gpu" if bench.CUDA else "wall"]
                        for way in ways
                        if (m := bench.measure(*way, True))
                    ]
                    rows.append(
                        dict(
                            name=who if who == "attention" else f"{who}, {kind}",
                            length=length,
                            ms=min(filter(None, times), default=None),
                        )
                    )
    return rows


# --------------------------------------------------------------------------------------------------


def changed(size, texts):
    """A Size with what --set NAME=VALUE says."""
    numbers, least = (
        {f.name: f.type for f in dataclasses.fields(Size) if f.type in (int, float)},
        {"n_layers": 8, "pairs": 16, "batch": 2, "depths": 2, "rope_still": 0, "rope_theta": 1},
    )
    for text in texts:
        name, _, value = text.partition("=")
        if name not in numbers or not value:
            raise MilError(f"--set {text}: expected NAME=VALUE, NAME one of {', '.join(numbers)}")
        try:
            value = numbers[name](value)
        except ValueError:
            raise MilError(
                f"--set {text}: expected a {'whole ' * (numbers[name] is int)}number"
            ) from None
        if not least.get(name, sys.float_info.min) <= value < math.inf:
            raise MilError(
                f"--set {text}: expected "
                + (f"{least[name]} or more" if name in least else "more than 0")
            )
        size = dataclasses.replace(size, **{name: value})
    try:
        mil.Config(
            v=8,
            context=size.context,
            rope_theta=size.rope_theta,
            **{name: getattr(size, name) for name in td.SIZES},
        )
    except MilError as e:
        raise MilError(f"--set: {e}") from e
    if size.before + size.written > size.context:
        raise MilError(
            f"--set: before + written is {size.before + size.written}, expected the length of distillation, context {size.context}, or less"
        )
    if size.step_tokens < 2 * max(size.short_context, size.teacher_context):
        raise MilError(
            f"--set: step_tokens is {size.step_tokens}, expected two of the teacher's texts or more (short_context {size.short_context}, teacher_context {size.teacher_context})"
        )
    return size


def main(argv):
    parser = mil.Parser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(TABLES)}; none: all"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="about how long it may take on one H200: steps are scaled (10)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="students of every arm (3)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a number of Size (in this file), such as rope_still=0 or teacher_context=3072",
    )
    parser.add_argument(
        "--out",
        default="",
        help="where teacher, students and tables go (out/reproduce, of the smoke size out/smoke, and what --set says behind it); a teacher found there is used again",
    )
    parser.add_argument(
        "--assets",
        default="",
        help="where the pictures go (OUT/assets; the README's are in assets)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="students trained at once, on a GPU (default: 8, or half the CPU cores)",
    )
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, as on a CPU")
    o = parser.parse_args(argv)
    for name in o.tables:
        if name not in TABLES:
            raise MilError(f"there is no table {name!r}; expected some of {', '.join(TABLES)}")
    for name, least in (("minutes", 0.1), ("seeds", 1), ("workers", 0)):
        if not least <= getattr(o, name) < math.inf:
            raise MilError(f"--{name} is {getattr(o, name)}, expected {least} or more")
    began, device, tables = (
        time.perf_counter(),
        generate.pick_device(""),
        list(dict.fromkeys(o.tables)) or list(TABLES),
    )
    small = o.smoke or device.type != "cuda"
    size = SMOKE if small else Size()
    if not small:
        scaled = {
            k: max(1, round(getattr(size, k) * o.minutes / 10))
            for k in (
                "teacher_steps",
                "long_steps",
                "layer_steps",
                "stage2_steps",
                "dpo_steps",
                "draft_steps",
            )
        }
        size = dataclasses.replace(size, **scaled)
    elif o.minutes != 10:
        raise MilError(f"--minutes {o.minutes:g}: the smoke size has no minutes; leave it out")
    size = changed(size, o.set)
    machine = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    )
    versions = f"{machine}, Python {platform.python_version()}, torch {torch.__version__}"
    td.show(f"{versions}" + "; smoke size: the figures mean nothing" * small)
    clock = {}

    def lap(name):
        clock[name] = round(time.perf_counter() - began - sum(clock.values()), 1)
        td.show(f"[{name}: {clock[name]} s, {time.perf_counter() - began:.0f} s in all]")

    place = o.out or "-".join(
        ["out/smoke" if small else "out/reproduce", *o.set]
    )  # what --set changes overwrites nothing
    lab, said = Lab(size, place, device), "+".join(o.tables and tables) or "reproduce"
    for old in (
        [*DRAFTS, *(f"{arm}-{c}" for arm, c in kinds(size.n_layers))]
        if "speculation" in tables
        else ()
    ):  # an earlier run's: it takes what it finds
        shutil.rmtree(lab.out / "models" / old, ignore_errors=True)
    teacher = {}
    if set(tables) - {"cost"}:
        lab.make_teacher()
        models = td.prepare(lab.run, td.Models(None, lab.teacher))
        teacher = {
            "context": size.context,
            "teacher_context": size.teacher_context,
            "samples": size.samples,
            **td.evaluate(lab.run, models, lab.corpus, lab.encoding)[0],
            **lab.writing(lab.teacher),
            **lab.long_texts(lab.teacher, size.teacher_context),
        }
        parameters, within = (
            sum(w.numel() for w in lab.teacher.parameters()),
            [k for k in teacher["needles"] if k <= size.teacher_context][-1],
        )
        td.show(
            f"teacher: {parameters / 1e6:.1f} M parameters, {lab.teacher_tokens / 1e6:,.1f} M tokens; perplexity {teacher['perplexity']:.3f}; within its "
            f"{size.teacher_context} bytes it finds {sum(teacher['needles'][within]) / size.depths:.0%} of the needles; perplexity of the same bytes at the "
            "end of texts of " + ", ".join(f"{k}: {v:.2f}" for k, v in teacher["by_length"].items())
        )
        lap("teacher")
    if "stages" in tables:
        td.show(f"preferences: {make_pairs(lab)} pairs")
        lap("pairs")
    rows, swept = Rows(), []
    if set(tables) - {"cost"}:
        del models
        gc.collect()
        torch.cuda.empty_cache()
        workers = o.workers or (1 if small else min(8, max(1, os.cpu_count() // 2)))
        pool = (
            Inline(lab)
            if workers == 1
            else ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), enter, (size, lab.out, device)
            )
        )
        with pool, open(lab.out / f"{said}.rows.jsonl", "w") as journal:
            found, swept = all_arms(lab, pool, tables, o.seeds, began, journal)
        rows = Rows(found)
        lap("students")
    lost = [
        f"left out: {row['arm']}: with seed {row['seed']}, {row['diverged']}"
        for row in rows
        if "diverged" in row
    ]
    print(LEGEND, *lost, sep="\n")
    report = dict(
        versions=versions,
        size=dataclasses.asdict(size),
        seeds=o.seeds,
        teacher=teacher,
        rows=rows,
        sweep=swept,
        arms=[dataclasses.asdict(arm) for arm in arms(size.n_layers, tables)],
        claims={},
        tables={},
        clock=clock,
    )
    made, makers = (
        [],
        {
            "quality": quality,
            "init": init,
            "order": order,
            "mixer": mixer,
            "stages": stages,
            "long": long,
        },
    )

    def save():
        """Writes what there is; returns what is said at the end."""
        report["seconds"] = seconds = time.perf_counter() - began
        end = (
            f"{seconds:.0f} s in all: {', '.join(f'{k} {v:.0f}' for k, v in clock.items())}; {versions}"
            + "; smoke size: the figures, and what holds, mean nothing" * small
        )
        mil.write_whole(
            lab.out / f"{said}.json", lambda f: f.write(json.dumps(report, indent=1).encode())
        )
        mil.write_whole(
            lab.out / f"{said}.md",
            lambda f: f.write(
                "\n\n".join([LEGEND, *lost, *(t.text("|") for t in made), end + "\n"]).encode()
            ),
        )
        return end

    for name in tables:  # each is printed and saved as it comes
        if name in makers:
            table = makers[name](rows, size.n_layers, teacher)
        else:
            table, report[name] = {"speculation": speculation, "cost": cost}[name](lab)
            lap(name)
        for t in table if isinstance(table, tuple) else [table]:
            made.append(t)
            report["claims"][t.name], report["tables"][t.name] = t.claims, [t.columns, *t.rows]
            print(t.text())
        save()
    if "cost" in tables:
        report["scan"] = scans(size)
        lap("scans")
    end = save()
    print(f"\n{end}")
    try:
        pictures.draw(json.loads(json.dumps(report)), o.assets or lab.out / "assets")
    except ImportError:
        td.show("no pictures: matplotlib is not installed")
    return report


if __name__ == "__main__":
    generate.run_command(main)
