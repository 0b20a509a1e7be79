"""The claims of The Mamba in the Llama (arXiv 2408.15237) at small scale, beside its own figures.

    python tests/reproduce.py                  all tables: about ten minutes on one H200
    python tests/reproduce.py quality order    these tables
    python tests/reproduce.py --minutes 4      all, with fewer steps
    python tests/reproduce.py --smoke          all, so small that the figures mean nothing; on a CPU

    quality      how much is lost with less and less attention (Table 6 left)
    init         attention's weights or random ones; MLPs frozen or not (Tables 7 left, 8)
    order        stepwise or at once; which layers keep attention (Table 7 right)
    mixer        Mamba-2, Mamba, linear attention, nothing in attention's place (Table 9)
    stages       stage 1, 1 + 2, 1 + 2 + preferences (Table 6 right)
    long         a needle in a haystack (Figure 4), and perplexity, by length
    speculation  tokens a pass of the target, and speed, by draft, target and K (Tables 1, 5)

Signs and orderings are the claim, not digits. The teacher, a Llama over bytes, learns the sources
of Python's standard library, in which notes (`# kd=582`) are strewn and repeated later: needles
that it can find. train_distill.py's functions make the students, on texts a quarter as long.

An arm's rate of stage 1 is the best of some, by the KL at the end of stage 1, on text that nothing
else is measured on, with a seed that is not used again. Then the arm runs with --seeds others. A
claim holds where the difference is beyond Student's t at 95 %: Welch's, or of the pairs where an
arm is compared with itself; for the number of claims nothing is corrected. There is one teacher,
and all students are measured on the same text: what others would change is in no error.

OUT/reproduce.json (of some tables only: order+mixer.json and so on) holds the figures and every
arm's settings, OUT/reproduce.md the tables; pictures are beside them, if matplotlib is there.
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import gc
import io
import itertools
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
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import pictures

import generate
import mil
import train_distill as td
from mil import MilError

LEGEND = """\
KL, agree: to the teacher's distribution, in nats a byte, and how often both find the same byte
likeliest. parses, length: of functions completed at temperature 0.8, how many are Python as far as
they go, and their bytes. rate: of stage 1. ±: standard error of the mean over students."""
SIZES = {  # on a GPU, in ten minutes; and in smoke
    "n_layers": (8, 8),
    "d": (256, 32),
    "n_heads": (8, 2),
    "n_kv_heads": (4, 1),
    "d_ff": (768, 32),
    "rope_theta": (1e4, 1e4),
    # Pairs of channels that turn less than twice in so many bytes do not turn at all: what they
    # match they match at any distance.
    "rope_still": (256, 256),
    "step_tokens": (2**15, 512),  # of a step of the teacher
    "short_context": (512, 128),  # where it learns first
    "teacher_steps": (2800, 4),
    "teacher_context": (1024, 256),  # where it goes on
    "long_steps": (600, 1),
    "context": (256, 128),  # the length of distillation
    "batch": (64, 2),
    "rates": ((3e-3, 6e-3), (3e-3,)),  # of stage 1
    "more_rates": (2, 0),  # how many may be tried beyond these, each twice or half the best
    "layer_steps": (22, 1),  # of stage 1, for each layer replaced
    "stage2_rate": (3e-3, 3e-3),
    "stage2_steps": (360, 1),
    "dpo_steps": (40, 1),
    "draft_steps": (400, 1),
    "eval_sequences": (512, 2),
    "prompts": (192, 4),  # functions to be written
    "before": (96, 80),  # bytes of text before each
    "written": (160, 48),  # and of it
    "samples": (8, 1),  # needles at each length and depth
    "depths": (8, 2),
    "windows": (64, 2),  # texts of which the perplexity is measured by length
    "lengths": ((0.5, 1, 2, 4, 8, 12, 16, 20), (1, 2)),  # of haystacks, × context
    "pairs": (1024, 16),  # prompts answered twice for the preferences
    "texts": (6, 1),  # continued speculatively, one by one
    "speculated": (96, 8),  # tokens of each
    "Ks": ((2, 4, 6, 8), (2,)),
}
STEPS = "teacher_steps", "long_steps", "layer_steps", "stage2_steps", "dpo_steps", "draft_steps"
SWEEP = 100  # the seed that chooses among the rates
DIGITS = 3  # of a note


def sizes(small, minutes=10):
    """What a run is made of; on a GPU, --minutes scales the steps."""
    size = SimpleNamespace(**{name: pair[small] for name, pair in SIZES.items()})
    for name in () if small else STEPS:
        setattr(size, name, max(1, round(getattr(size, name) * minutes / 10)))
    return size


# --------------------------------------------------------------------------------------------------
# The text: Python with notes strewn in, and functions to be completed


def note(dice):
    """A name and a number. The name is short and they touch, so that one layer of Mamba can tie
    them: its convolution sees four bytes."""
    name = "".join(dice.choices("bcdfghjklmnpqrstvwxz", k=2))
    return f"# {name}={''.join(dice.choices('0123456789', k=DIGITS))}\n"


def with_notes(text, context, dice):
    """The text with a note about every 130 characters, each of them twice again, 16 characters to
    three quarters of the context later, near more often than far (log-uniform)."""
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
        again = [again for when, again in due if when <= at]
        due = [one for one in due if one[0] > at]
        out += again
        at += sum(map(len, again))
    return "".join(out)


def functions(documents, count, before, dice):
    """`count` places where a function begins: (the document's number, the text before, its header
    the end of it, its header)."""
    header = re.compile(r"^ *def \w+\([^\n]*\)[^\n]*:\n", re.M)
    places = [(i, text, m) for i, text in enumerate(documents) for m in header.finditer(text)]
    places = dice.sample(places, min(count, len(places)))
    return [(i, text[: m.end()][-before:], m[0]) for i, text, m in places]


def body(header, text):
    """A function's own part of the text after its header, without notes: up to a line indented no
    more than the header. The last line, which may have broken off, is left out."""
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


def haystack(texts, length, depth, dice):
    """So many bytes of Python with one note at this depth, from 0 to 1, and again at the end."""
    needle = note(dice)
    room = length - 2 * len(needle) + 1
    text = dice.choice([text for text in texts if len(text) > room])
    begin = dice.randrange(len(text) - room)
    text = text[begin : begin + room - 1] + "\n"
    at = text.rfind("\n", 0, int(depth * (room - 1)) + 1) + 1  # after the last whole line there
    return [*(text[:at] + needle + text[at:] + needle[:-1]).encode()]


class Lab:
    """What all students share: the text and the teacher."""

    def __init__(self, size, out, device):
        self.size, self.out, self.device = size, Path(out), device
        self.lengths = [int(x * size.context) for x in size.lengths]
        self.encoding = generate.load_tokenizer("bytes")
        names = (*td.SIZES, "rope_theta", "context", "batch", "eval_sequences")
        said = {name: getattr(size, name) for name in names}
        self.s = td.Settings(out=str(out), device=str(device), compile=False, **said)
        td.complete(self.s, device)
        self.run = td.Run(self.s, device)
        # What the teacher learns, as (context, batch, steps, rate). From long texts alone it did
        # not learn to copy.
        short, long, lr = size.short_context, size.teacher_context, self.s.teacher_lr
        self.courses = [(short, size.step_tokens // short, size.teacher_steps, lr)]
        self.courses += [(long, size.step_tokens // long, size.long_steps, lr / 3)]
        # The files of `encodings` are copies of each other.
        files = [file for file in td.standard_library() if "encodings" not in file.parts]
        texts = [text for text in (td.read_text(file, False) for file in files) if text.strip()]
        dice = random.Random(0)
        noted = [with_notes(text, size.teacher_context, dice).encode() for text in texts]
        end = np.int16(self.encoding.stops[0])
        noted = [np.append(np.frombuffer(text, np.uint8).astype(np.int16), end) for text in noted]
        self.raw, unseen = td.split(texts)
        train, held = td.split(noted)
        few = len(held) // 4  # a quarter of the unseen texts chooses the rates
        self.unseen = unseen[few:]
        self.ascii = [text.encode("ascii", "replace").decode() for text in self.unseen]
        self.sweep_corpus = self.make_corpus(train, held[:few])
        self.corpus = self.make_corpus(train, held[few:])

    def make_corpus(self, *parts):
        begins = [np.cumsum([0, *map(len, part)])[:-1] for part in parts]
        return td.Corpus(*map(np.concatenate, parts), begins, "", "")

    @functools.cached_property
    def teacher(self):
        model, _ = td.read_models(self.run, self.out / "teacher")
        model.compute = self.run.dtype
        return model

    def make_teacher(self):
        size = self.size
        config = td.new_config(self.s, self.encoding)
        # Llama 3.1's scaling, by so much that a slow channel stands still.
        scaling = dict(zip(mil.ROPE_SCALING, (1e9, 1.99, 2.0, size.rope_still), strict=True))
        config = dataclasses.replace(config, context=size.teacher_context, rope_scaling=scaling)
        torch.manual_seed(self.s.seed)
        model = mil.Hybrid(config).to(self.device)
        for number, (context, batch, steps, lr) in enumerate(self.courses):
            run = td.Run(dataclasses.replace(self.s, context=context, batch=batch), self.device)
            stage = td.Stage(trains="all", beta=0, steps=steps, lr=lr, mixers=config.mixers)
            stage.name = f"teacher, texts of {context}"
            models = td.prepare(run, td.Models(None, model))
            batches = td.training_batches(run, self.corpus, [self.s.seed, number])
            td.fit(run, td.State(), stage, models, batches, io.StringIO(), "No teacher was saved")
        td.save_student(self.run, model, self.out / "teacher", "bytes", torch.float32)

    @functools.cached_property
    def haystacks(self):
        """{length: haystacks, those of the least depth first}."""
        size, dice, found = self.size, random.Random(0), {}
        depths = [i / (size.depths - 1) for i in range(size.depths) for _ in range(size.samples)]
        for length in self.lengths:
            rows = [haystack(self.ascii, length, depth, dice) for depth in depths]
            found[length] = torch.tensor(rows, device=self.device)
        return found

    @functools.cached_property
    def windows(self):
        """Unseen texts of the greatest length, from places at random."""
        most, dice, rows = max(self.lengths) + 1, random.Random(2), []
        texts = [t for t in self.ascii if len(t) >= most]
        for text in dice.choices(texts, k=self.size.windows):
            begin = dice.randrange(len(text) - most + 1)
            rows.append([*text[begin : begin + most].encode()])
        return torch.tensor(rows, device=self.device)


def complete(lab, model, prompts, seed):
    """A sampled continuation (temperature 0.8) of each prompt, token ids."""
    model = copy.deepcopy(model)
    model.compute = None
    model = mil.pack(mil.cast(model, lab.run.dtype).eval())
    length, out = lab.size.before + lab.size.written + 1, []
    for i in range(0, len(prompts), 64):
        part = prompts[i : i + 64]
        dice = torch.Generator(lab.device).manual_seed(seed + i)
        decoder = generate.Decoder(model, len(part), length, 0.8, generator=dice)
        texts = [[] for _ in part]
        for new in decoder.decode(part, lab.size.written):
            texts = [[*a, *b] for a, b in zip(texts, new, strict=True)]
        out += texts
    return out


def make_pairs(lab):
    """Preferences, (a file's number, chosen, rejected): functions of the training text that the
    teacher completes twice, of which one parses."""
    asked = functions(lab.raw, lab.size.pairs, lab.size.before, random.Random(1))
    prompts = [lab.encoding.encode(text)[-lab.size.before :] for _, text, _ in asked]
    twice = [complete(lab, lab.teacher, prompts, seed) for seed in (11, 10**6)]
    pairs, alike = [], []
    for (number, _, header), prompt, *texts in zip(asked, prompts, *twice, strict=True):
        good = [parses(header, lab.encoding.decode(ids)) for ids in texts]
        texts = texts if good[0] else texts[::-1]
        read = [~i for i in prompt]
        pair = number, *([*read, *ids] for ids in texts)
        (pairs if good[0] != good[1] else alike).append(pair)
    pairs = pairs if len(pairs) >= 8 else alike[:8]  # of a teacher that cannot write
    text = json.dumps(pairs).encode()
    mil.write_whole(lab.out / "pairs.json", lambda f: f.write(text))
    return len(pairs)


def read_pairs(lab):
    """(held out, learned): no file has pairs in both."""
    pairs = json.loads((lab.out / "pairs.json").read_text())
    held = [pair for number, *pair in pairs if number % 4 == 0]
    return held or [pairs[0][1:]], [pair for number, *pair in pairs if number % 4]


@torch.no_grad()
def losses(model, tokens):
    """The cross-entropy (b, l - 1) of each token after the first."""
    logits = model.lm_head(model.hidden(tokens[:, :-1])).float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def writing(lab, model):
    """Of functions the model completes: the share that parses, and their length."""
    size = lab.size
    asked = functions(lab.unseen, size.prompts, size.before, random.Random(0))
    prompts = [lab.encoding.encode(before)[-size.before :] for _, before, _ in asked]
    texts = [lab.encoding.decode(ids) for ids in complete(lab, model, prompts, 1)]
    read = [(header, text) for (_, _, header), text in zip(asked, texts, strict=True)]
    length = sum(len(body(*one)) for one in read) / len(read)
    return dict(parses=sum(parses(*one) for one in read) / len(read), length=length)


@torch.no_grad()
def long_texts(lab, model):
    """By length: how often the whole number is found, greedily, at each depth; and the perplexity
    of the same bytes, a quarter of a context each, at the end of longer and longer texts."""
    samples, last, found = lab.size.samples, lab.size.context // 4, {"needles": {}}
    for length, rows in lab.haystacks.items():
        hits = []
        for part in rows.split(max(1, min(64, 2**18 // length))):
            guess = model.lm_head(model.hidden(part[:, :-1])[:, -DIGITS:]).argmax(-1)
            hits += (guess == part[:, -DIGITS:]).all(1).tolist()
        shares = [sum(hits[i : i + samples]) / samples for i in range(0, len(hits), samples)]
        found["needles"][length], found[f"found@{length}"] = shares, sum(hits) / len(hits)
        parts = lab.windows[:, -length - 1 :].split(max(1, min(64, 2**17 // length)))
        loss = torch.cat([losses(model, part)[:, -last:] for part in parts]).mean()
        found[f"perplexity@{length}"] = loss.exp().item()
    return found


def teacher_row(lab):
    models = td.Models(None, lab.teacher)
    figures, _ = td.evaluate(lab.run, models, lab.corpus, lab.encoding)
    figures |= dict(ratio=1, share=1) | writing(lab, lab.teacher) | long_texts(lab, lab.teacher)
    return dict(arm="teacher", replaced=0, stages="", seed=0) | figures


# --------------------------------------------------------------------------------------------------
# Students


@dataclass
class Arm:
    """A way to make a student."""

    name: str
    path: list  # the layers without attention after each step of stage 1
    # 2: stage 2 follows, on a copy, where half of the layers or more are replaced, or none;
    # 3: and then preferences.
    deep: int = 1
    mixer: str = "mamba2"
    init: str = "attention"
    trains: str = "mixers"  # in stage 1
    longer: bool = False  # stage 1 has the steps of stage 2 as well
    linear: bool = False  # Mamba with A = 0 and Δ = 1, which are not learned
    judged: bool = False  # whether what it writes, and finds in long texts, is measured

    def stages(self, size, rate):
        """[(1, 2 or 3, its number, the train_distill Stage)], in the order of training."""
        found, before = [], 0
        for i, replaced in enumerate(self.path):
            mixers = [self.mixer if k in replaced else "attention" for k in range(size.n_layers)]
            steps = (len(replaced) - before) * size.layer_steps
            steps += size.stage2_steps * (self.longer and i == len(self.path) - 1)
            before = len(replaced)
            first = td.Stage(trains=self.trains, steps=steps, lr=rate, mixers=mixers)
            first.name = f"{self.name}, {before} layers"
            steps, lr = size.stage2_steps, size.stage2_rate
            second = dataclasses.replace(first, trains="all", steps=steps, lr=lr)
            steps, lr = size.dpo_steps, 3e-5
            third = dataclasses.replace(second, loss="dpo", beta=0.1, steps=steps, lr=lr)
            deep = 1 if 0 < before < 4 else self.deep
            found += [(1, i, first), (2, 50 + i, second), (3, 90 + i, third)][not before : deep]
        return found


def arms(tables):
    """The arms that these tables need; all of a table choose their rate at the same place."""
    tables = {*tables}
    judged = bool(tables & {"quality", "long", "speculation"})
    deep = 3 if "stages" in tables else 2 if "mixer" in tables else 1
    # The paper's steps, 25, 50, 75, 87.5, 100 %, evenly spread; and two that are not.
    whole = [(0, 4), (0, 2, 4, 6), (0, 1, 2, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6), (*range(8),)]
    firsts = [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5)]
    lasts = [(6, 7), (4, 5, 6, 7), (2, 3, 4, 5, 6, 7)]
    half, quarter = whole[:2], [(0, 4), (0, 1, 4, 5), (0, 1, 2, 4, 5, 6)]
    plan = [
        ("quality init long speculation", Arm("mamba2", whole, 1 + judged, judged=judged)),
        ("quality long speculation", Arm("mamba", whole, 2, "mamba", judged=True)),
        ("quality long", Arm("Llama", [()], 2, judged=True)),  # what stage 2 alone does
        ("init", Arm("random, mixers", whole, init="random")),
        ("init", Arm("attention, mlps", whole, trains="mlps")),
        ("order mixer stages", Arm("half, stepwise", half, deep, judged=deep == 3)),
        ("order", Arm("half, at once", half[-1:])),
        ("order", Arm("half, the first layers", firsts[:2])),
        ("order", Arm("half, the last layers", lasts[:2])),
        ("order", Arm("quarter, stepwise", quarter)),
        ("order", Arm("quarter, at once", quarter[-1:])),
        ("order", Arm("quarter, the first layers", firsts)),
        ("order", Arm("quarter, the last layers", lasts)),
        ("mixer", Arm("half, mamba", half, 2, "mamba")),
        ("mixer", Arm("half, linear", half, 2, "mamba", linear=True)),
        ("mixer", Arm("half, nothing", half, 2, "none", trains="all")),
        ("stages", Arm("half, stage 1 longer", half, longer=True)),
    ]
    return [arm for needs, arm in plan if tables & {*needs.split()}]


def freeze_linear(model):
    """Makes Mamba linear attention: A = 0 and Δ = 1 whatever is read, never learned."""
    for mixer in (layer.mixer for layer in model.layers):
        if isinstance(mixer, mil.Mamba):
            with torch.no_grad():
                mixer.A_log.fill_(-math.inf)
                mixer.dt_proj.weight.zero_()
                mixer.dt_proj.bias.fill_(math.log(math.e - 1))  # softplus of it is 1
            for w in (mixer.A_log, *mixer.dt_proj.parameters()):
                w.requires_grad_(False)


def learn(lab, arm, seed, rate, sweep=False):
    """Trains a student by an arm. A row of figures after each stage; in a sweep, at the end of
    stage 1 alone. One that diverges has the rows before, and one that says so."""
    # Seeds are far from the teacher's, and from each other.
    s = dataclasses.replace(lab.s, seed=1000 + 100 * seed, init=arm.init)
    run, rows = td.Run(s, lab.device), []
    left = {1: ({}, 0)}  # by stage 1, 2, 3: what it has trained, and on how many tokens
    about = dict(arm=arm.name, mixer=arm.mixer, seed=seed, rate=rate)
    for level, number, stage in arm.stages(lab.size, rate):
        if sweep and level > 1:
            continue
        trained, tokens = left[max(1, level - 1)]
        models = td.assemble(run, lab.teacher, lab.teacher, stage, number, trained)
        if arm.linear:
            freeze_linear(models.student)
        if level == 3:
            held, learned = read_pairs(lab)
            rows[-1] |= td.preferences(run, stage, models, held)
            batches = td.pair_batches(run, learned, [s.seed, number])
        else:
            batches = td.training_batches(run, lab.corpus, [s.seed, number])
            tokens += stage.steps * s.batch * s.context
        try:
            td.fit(run, td.State(), stage, models, batches, io.StringIO(), "No student was saved")
        except MilError as e:
            return [*rows, about | dict(kl=math.inf, diverged=str(e))]
        weights = models.student.named_parameters()
        left[level] = {k: w for k, w in weights if k in trained or w.requires_grad}, tokens
        if not sweep or number == len(arm.path) - 1:
            corpus = lab.sweep_corpus if sweep else lab.corpus
            rows.append(about | measure(lab, run, models, corpus, tokens))
            rows[-1]["stages"] = ("1", "1 + 2", "1 + 2 + 3")[level - 1]
        if level == 3:
            rows[-1] |= td.preferences(run, stage, models, held)
        if arm.judged and level > 1:
            rows[-1] |= writing(lab, models.student) | long_texts(lab, models.student)
        if arm.judged and level == 2 and seed == 0:
            place = lab.out / "models" / f"{arm.name}-{rows[-1]['replaced']}"
            td.save_student(run, models.student, place, "bytes", torch.float32)
    return rows


def measure(lab, run, models, corpus, tokens):
    """A student's figures beside its teacher's, on this text."""
    theirs, ours = td.evaluate(run, models, corpus, lab.encoding)
    mixers = models.student.config.mixers
    learned = sum(batch * context * steps for context, batch, steps, _ in lab.courses)
    figures = dict(replaced=len(mixers) - mixers.count("attention"), share=tokens / learned)
    return ours | figures | dict(ratio=ours["perplexity"] / theirs["perplexity"])


DRAFTS = {f"{mixer}, {k} layers": (mixer, k) for k in (2, 4) for mixer in ("attention", "mamba2")}


def make_draft(lab, name):
    """Saves a small student of the teacher's first, last and, of four, two layers between."""
    (mixer, count), n = DRAFTS[name], lab.size.n_layers
    base = mil.keep_layers(lab.teacher, [round(i * (n - 1) / (count - 1)) for i in range(count)])
    stage = td.Stage(trains="all", steps=lab.size.draft_steps, lr=1e-3, mixers=[mixer] * count)
    models = td.assemble(lab.run, lab.teacher, base, stage, 1, {})
    batches = td.training_batches(lab.run, lab.corpus, [7, 0])
    try:
        td.fit(lab.run, td.State(), stage, models, batches, io.StringIO(), "No draft was saved")
    except MilError as e:
        return [dict(arm=name, seed=0, diverged=str(e))]
    td.save_student(lab.run, models.student, lab.out / "models" / name, "bytes", torch.float32)
    return []


LAB = None  # of this process


def enter(make, *args):
    """A worker's beginning."""
    global LAB
    torch.set_num_threads(1)
    LAB = make(*args)


def work(f, *args):
    """A worker's job. What it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        return f(LAB, *args)


def new_pool(lab, small):
    """Workers: of the smoke size one thread, otherwise processes, all on one GPU."""
    if small:
        return futures.ThreadPoolExecutor(1, initializer=enter, initargs=(lambda: lab,))
    workers, spawn = min(8, max(1, os.cpu_count() // 2)), multiprocessing.get_context("spawn")
    args = Lab, lab.size, lab.out, lab.device
    return futures.ProcessPoolExecutor(workers, spawn, enter, args)


class Students:
    """Trains all students: an arm's begin as soon as its rate is chosen."""

    def __init__(self, size, pool, seeds, rows):
        self.size, self.pool, self.seeds, self.rows = size, pool, seeds, rows
        self.waiting, self.swept, self.tried = {}, [], {}

    def submit(self, f, *args):
        self.waiting[self.pool.submit(work, f, *args)] = args

    def begin(self, arm, rate):
        for seed in range(self.seeds):
            self.submit(learn, arm, seed, rate)

    def train(self, plan, drafts):
        began, done = time.perf_counter(), 0
        for arm in plan:
            for rate in self.size.rates if any(arm.path) else ():
                self.submit(learn, arm, SWEEP, rate, True)
            if not any(arm.path):  # there is no stage 1
                self.begin(arm, None)
        for name in drafts:
            self.submit(make_draft, name)
        while self.waiting:
            for future in futures.wait(self.waiting, return_when=futures.FIRST_COMPLETED)[0]:
                args, done = self.waiting.pop(future), done + 1
                self.take(future.result(), *args)
                taken = f"{time.perf_counter() - began:.0f} s"
                td.show(f"students: {done}, {len(self.waiting)} to come, {taken}", done=False)

    def take(self, found, arm, seed=0, rate=None, sweep=False):
        """Keeps the rows of a job; after the last of a sweep, begins the arm's students."""
        (self.swept if sweep else self.rows).extend(found)
        if not sweep:
            return
        tried = self.tried.setdefault(arm.name, {})
        tried[rate] = found[-1]["kl"]
        if len(tried) >= len(self.size.rates):
            best = min(tried, key=tried.get)
            beyond = {min(tried): min(tried) / 2, max(tried): max(tried) * 2}.get(best)
            if beyond and len(tried) < len(self.size.rates) + self.size.more_rates:
                self.submit(learn, arm, SWEEP, beyond, True)
            else:
                self.begin(arm, best)


def timed(lab, prompts, model, temperature, draft=None, K=0):
    """tokens/s from a text's second round on, and of each text tokens a pass of the model."""
    more = dict(generator=torch.Generator(lab.device).manual_seed(3), draft=draft, K=K)
    decoder = generate.Decoder(model, 1, lab.size.context, temperature, **more)
    seconds, tokens, per_pass = 0, 0, []
    for i, prompt in enumerate(prompts[:1] + prompts):  # the first twice: it compiles kernels
        decoder.passes = count = first = 0
        for (new,) in decoder.decode([prompt], lab.size.speculated):
            count += len(new)
            if not first:
                first, began = count, time.perf_counter()
        if i:
            per_pass.append(count / max(1, decoder.passes))
            seconds, tokens = seconds + time.perf_counter() - began, tokens + count - first
    return tokens / seconds, per_pass


TARGETS = {"Llama": "teacher", "mamba2, 50 %": "models/mamba2-4"}
TARGETS |= {"mamba2, 0 %": "models/mamba2-8", "mamba, 0 %": "models/mamba-8"}


def speculate(lab):
    """Every target with every draft, greedy and sampled: a row of each text."""
    size, found, models = lab.size, [], {}
    for name, place in (TARGETS | {name: f"models/{name}" for name in DRAFTS}).items():
        if (lab.out / place).exists():  # of one that diverged there is none
            models[name] = mil.pack(mil.load(lab.out / place, lab.device, lab.run.dtype))
    asked = functions(lab.unseen, size.texts, size.context // 4, random.Random(5))
    prompts = [lab.encoding.encode(text)[-size.context // 4 :] for _, text, _ in asked]
    for target, temperature in [(t, hot) for t in TARGETS if t in models for hot in (0, 1)]:
        plain, _ = timed(lab, prompts, models[target], temperature)
        for draft in [name for name in DRAFTS if name in models]:
            td.show(f"speculation: {target}, {draft}", done=False)
            about = dict(target=target, draft=draft, temperature=temperature, plain=plain)
            rows = [dict(about, seed=i) for i in range(len(prompts))]
            for K in size.Ks:
                pair = models[target], temperature, models[draft], K
                speed, per_pass = timed(lab, prompts, *pair)
                for row, one in zip(rows, per_pass, strict=True):
                    row |= {f"per_pass@{K}": one, f"ratio@{K}": speed / plain}
            found += rows
    return found


# --------------------------------------------------------------------------------------------------
# Tables are data: what is shown of whom, and what is claimed


@dataclass
class Table:
    title: str
    heads: tuple  # titles of the rows' names
    rows: list  # (name, key): the figures shown are of rows that match the key
    columns: list  # (title, figure, format)
    # (sentence, better key, worse key, the figure that is lower for the better); "-figure": higher
    claims: list = field(default_factory=list)
    note: str = ""


def key(arm, replaced, stages="1 + 2"):
    return dict(arm=arm, replaced=replaced, stages=stages)


TEACHER, LLAMA = key("teacher", 0, ""), key("Llama", 0)
COUNTS = 4, 6, 7, 8  # layers replaced, and what is kept
KEPT = {4: "50 %", 6: "25 %", 7: "12.5 %", 8: "0 %"}
SHARE, AGREE = ("tokens ÷ teacher's", "share", ".2f"), ("agree", "agreement", ".1%")
PPL, RATIO = ("ppl", "perplexity", ".3f"), ("÷ teacher", "ratio", ".4f")
BASIC = [("rate", "rate", ".2g"), PPL, RATIO, ("KL", "kl", ".4f")]
WRITTEN = [("parses", "parses", ".1%"), ("length", "length", ".0f")]


def quality(size):
    rows = [(("teacher", "100 %", "1"), TEACHER), (("Llama", "100 %", ""), LLAMA)]
    claims = []
    for mixer in ("mamba2", "mamba"):
        for c in COUNTS:
            paper = str(pictures.PAPER.get(1 - c / 8, "")) if mixer == "mamba" else ""
            rows.append(((mixer, KEPT[c], paper), key(mixer, c)))
        for a, b in zip(COUNTS, COUNTS[1:], strict=False):
            said = f"{mixer}: {KEPT[a]} of attention is nearer to the teacher than {KEPT[b]}"
            claims.append((said, key(mixer, a), key(mixer, b), "kl"))
    title = "Quality by attention kept (Table 6 left), after stage 2"
    note = "Llama: the teacher itself through stage 2, which is what more steps alone do"
    heads = "student", "attention", "paper ÷"
    return Table(title, heads, rows, [SHARE, *BASIC, AGREE, *WRITTEN], claims, note)


def init(size):
    ways = [  # new layers from, MLPs, arm, the paper's perplexity at 50 and 0 %
        ("attention", "frozen", "mamba2", "2.09", "3.36"),
        ("random", "frozen", "random, mixers", "7.4", "18.2"),
        ("attention", "trained", "attention, mlps", "9.1", "66.7"),
    ]
    rows, claims = [], []
    for c in (4, 8):
        best, random_, mlps = keys = [key(arm, c, "1") for _, _, arm, *_ in ways]
        for mine, (begin, how, _, *paper) in zip(keys, ways, strict=True):
            rows.append(((KEPT[c], begin, how, paper[c == 8]), mine))
        claims.append((f"{KEPT[c]}: attention's weights beat random ones", best, random_, "kl"))
        claims.append((f"{KEPT[c]}: frozen MLPs beat trained ones", best, mlps, "kl"))
    title = "Initialisation and frozen MLPs, after stage 1 (Tables 7 left, 8)"
    heads = "attention", "new layers from", "MLPs", "paper ppl"
    return Table(title, heads, rows, BASIC, claims, "rates are chosen at 0 %")


def order(size):
    ways = [  # the arm, which layers keep attention, replaced, the paper's at 50 and 25 %
        ("stepwise", "evenly spread", "stepwise", "2.09", "2.20"),
        ("at once", "evenly spread", "at once", "", "2.29"),
        ("the first layers", "the last", "stepwise", "", ""),
        ("the last layers", "the first", "stepwise", "", ""),
    ]
    rows, claims = [], []
    for c, share in ((4, "half"), (6, "quarter")):
        best, *others = keys = [key(f"{share}, {way}", c, "1") for way, *_ in ways]
        for mine, (_, which, how, *paper) in zip(keys, ways, strict=True):
            rows.append(((KEPT[c], which, how, paper[c == 6]), mine))
        end = "attention spread evenly beats attention in the"
        said = "stepwise beats at once", f"{end} last layers", f"{end} first layers"
        for what, worse in zip(said, others, strict=True):
            claims.append((f"{KEPT[c]}: {what}", best, worse, "kl"))
    title = "Order of replacement, after stage 1, same tokens (Table 7 right)"
    heads = "attention", "which layers keep it", "replaced", "paper ppl"
    note = "the paper's, not interleaved: 2.41 at 50 %, 2.89 at 25 %"
    return Table(title, heads, rows, BASIC, claims, note)


def mixer(size):
    arms = "stepwise", "mamba", "linear", "nothing"
    mamba2, mamba, linear, nothing = (key(f"half, {arm}", 4) for arm in arms)
    names = ("Mamba-2", ""), ("Mamba", "6.20"), ("Mamba with A = 0, Δ = 1: linear attention", "")
    names += (("nothing; all else trains in stage 1", "151.98"),)
    title = "What half of the layers must have in attention's place, after stage 2 (Table 9)"
    rows = [*zip(names, (mamba2, mamba, linear, nothing), strict=True)]
    claims = [("Mamba beats nothing", mamba, nothing, "kl")]
    claims += [("Mamba-2 beats nothing", mamba2, nothing, "kl")]
    return Table(title, ("in its place", "paper (LAMBADA ppl)"), rows, [*BASIC, AGREE], claims)


def stages(size):
    one, two, three = (key("half, stepwise", 4, done) for done in ("1", "1 + 2", "1 + 2 + 3"))
    longer = key("half, stage 1 longer", 4, "1")
    rows = [(("1",), one), (("1, as long as 1 + 2",), longer)]
    rows += [(("1 + 2",), two), (("1 + 2 + 3",), three)]
    claims = [
        ("stage 2 is nearer to the teacher than as long a stage 1", two, longer, "kl"),
        ("stage 2 is less perplexed than as long a stage 1", two, longer, "perplexity"),
        ("after preferences more functions parse", three, two, "-parses"),
        ("after preferences the better is preferred", three, two, "-preferred"),
    ]
    title = "Stages, half Mamba-2 (Table 6 right); preferred: of two functions, the one that parses"
    note = "preferred: of pairs of other files, those whose better one gained more over the teacher"
    columns = [SHARE, *BASIC, *WRITTEN, ("preferred", "preferred", ".1%")]
    return Table(title, ("stages",), rows, columns, claims, note)


def by_length(size, title, figure, form):
    """A table of a figure by length, of the teacher and its students."""
    lengths = [int(x * size.context) for x in size.lengths]
    rows = [(("teacher", "100 %"), TEACHER), (("Llama", "100 %"), LLAMA)]
    rows += [((m, KEPT[c]), key(m, c)) for m in ("mamba2", "mamba") for c in COUNTS]
    columns = [(f"{k:,}", f"{figure}@{k}", form) for k in lengths]
    return Table(title, ("model", "attention"), rows, columns)


def long(size):
    title = "Needles found (Figure 4), mean over depths, in so many bytes; distilled at "
    title += f"{size.context:,}, the teacher trained at {size.teacher_context:,}"
    table = by_length(size, title, "found", ".0%")
    far, figure, _ = table.columns[-1]
    for (mixer, kept), mine in table.rows[2:]:
        said = f"{mixer}, {kept} of attention: finds more in {far} bytes than the teacher"
        table.claims.append((said, mine, TEACHER, f"-{figure}"))
    return table


def context(size):
    title = f"Perplexity of the same {size.context // 4} bytes at the end of longer texts"
    return by_length(size, title, "perplexity", ".2f")


def speculation(size):
    rows = []
    for target, draft, hot in itertools.product(TARGETS, DRAFTS, (0, 1)):
        mine = dict(target=target, draft=draft, temperature=hot)
        rows.append(((target, draft, "sampled" if hot else "greedy"), mine))
    columns = [("plain tokens/s", "plain", ".0f")]
    columns += [(f"a pass, K = {K}", f"per_pass@{K}", ".2f") for K in size.Ks]
    columns += [(f"÷ plain, K = {K}", f"ratio@{K}", ".2f") for K in size.Ks]
    title = "Speculation, batch 1: tokens a pass, ± between texts, and speed (Tables 1, 5)"
    return Table(title, ("target", "draft", "text"), rows, columns)


TABLES = dict(quality=[quality], init=[init], order=[order], mixer=[mixer], stages=[stages])
TABLES |= dict(long=[long, context], speculation=[speculation])

# Student's t, two-sided at 95 %, of 1, 2 … degrees of freedom.
T95 = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23


def verdict(better, worse, paired=False, least=0.0):
    """Whether values, one a student, are lower than others beyond the error (Welch's t), `least`
    at least."""
    if max(len(better), len(worse)) < 2:
        return "one student each, not judged"
    if paired:
        better, worse = [0.0], [y - x for x, y in zip(better, worse, strict=True)]
    sides = [side for side in (better, worse) if len(side) > 1]  # one alone has no error
    errors = [(pictures.mean(side)[1] ** 2, len(side) - 1) for side in sides]
    square = sum(e for e, _ in errors)
    freedom = square**2 / sum(e**2 / n for e, n in errors) if square else 1
    error = max(least, T95[min(int(freedom + 1e-9), len(T95)) - 1] * math.sqrt(square))
    gap = pictures.mean(worse)[0] - pictures.mean(better)[0]
    return "holds" if gap > error else "the opposite holds" if -gap > error else "within the error"


def tested(rows, sentence, better, worse, figure):
    """(the claim, what is found, whether it holds), or None if a student is missing.

    Students of one arm are compared with themselves, by seed.
    """
    name, sign = figure.lstrip("-"), -1 if figure.startswith("-") else 1
    sides = [pictures.values(rows, side, name) for side in (better, worse)]
    paired = better["arm"] == worse["arm"]
    if not all(sides) or paired and len(sides[0]) != len(sides[1]):
        return None
    found = " and ".join(f"{pictures.mean(side)[0]:.4g}" for side in sides)
    # Students may agree by chance: of 64 tries each, shares that differ less may be the same.
    share = name.startswith(("found", "parses", "preferred"))
    least = 1.96 * math.sqrt(0.5 / 64 / min(map(len, sides))) if share else 0.0
    sides = [[sign * x for x in side] for side in sides]
    return sentence, f"{name} {found}", verdict(*sides, paired, least)


def cell(rows, of, figure, form):
    """Mean ± standard error, which is left out where it is 0 or not known."""
    middle, error = pictures.mean(pictures.values(rows, of, figure))
    if math.isnan(middle):
        return "–"
    return f"{middle:{form}}" + f" ± {error:{form}}" * (error > 0)


def text_of(table, rows):
    """(cells, claims, the table in Markdown)."""
    lines = [[*table.heads, *(title for title, *_ in table.columns)]]
    for name, of in table.rows:
        lines.append([*name, *(cell(rows, of, *column) for _, *column in table.columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "| " + " | ".join(f"{{:{width}}}" for width in widths) + " |"
    shown = [form.format(*line) for line in lines]
    shown.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    claims = [one for claim in table.claims if (one := tested(rows, *claim))]
    said = [f"- {held}: {sentence} ({found})" for sentence, found, held in claims]
    said += [f"- {table.note}"] * bool(table.note)
    return lines, claims, "\n".join([f"### {table.title}\n", *shown, "", *said])


# --------------------------------------------------------------------------------------------------
# The run


def parse(argv):
    """(options, tables, whether the size is smoke). Raises MilError for what cannot be run."""
    form = argparse.RawDescriptionHelpFormatter
    parser = mil.Parser(prog="reproduce.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(TABLES)}; none: all")
    add("--minutes", type=float, default=10, help="about, on one H200: steps are scaled (10)")
    add("--seeds", type=int, default=3, help="students of every arm (3)")
    add("--out", help="folder (out/reproduce, or out/smoke)")
    add("--smoke", action="store_true", help="the smallest sizes, as on a CPU")
    o = parser.parse_args(argv)
    small = o.smoke or not torch.cuda.is_available()
    odd = [name for name in o.tables if name not in TABLES]
    mil.refuse(
        (odd, f"there is no table {odd and odd[0]!r}; expected some of {', '.join(TABLES)}"),
        (not 0.1 <= o.minutes < math.inf, f"--minutes is {o.minutes}, expected 0.1 or more"),
        (o.seeds < 1, f"--seeds is {o.seeds}, expected 1 or more"),
        (small and o.minutes != 10, f"--minutes {o.minutes:g}: the smoke size has no minutes"),
    )
    o.out = Path(o.out or ("out/smoke" if small else "out/reproduce"))
    return o, list(dict.fromkeys(o.tables)) or [*TABLES], small


class Report:
    """What a run has found. It is written as it comes."""

    def __init__(self, o, size, about):
        name = "+".join(dict.fromkeys(o.tables)) or "reproduce"
        self.json, self.md = (o.out / f"{name}.{kind}" for kind in ("json", "md"))
        self.texts, self.began, self.clock, self.rows = [about, LEGEND], time.perf_counter(), {}, []
        self.found = dict(about=about, seeds=o.seeds, size=vars(size), rows=self.rows)
        self.found |= dict(clock=self.clock, claims={}, tables={})

    def lap(self, name):
        """Notes how long a part took."""
        taken = time.perf_counter() - self.began
        self.clock[name] = round(taken - sum(self.clock.values()), 1)
        td.show(f"{name}: {self.clock[name]} s, {taken:.0f} s in all")

    def add(self, name, table):
        cells, claims, text = text_of(table, self.rows)
        self.found["tables"][name], self.found["claims"][name] = cells, claims
        self.say(text)

    def say(self, text):
        self.texts.append(text)
        print(f"\n{text}", flush=True)
        self.save()

    def save(self):
        found, md = json.dumps(self.found, indent=1), "\n\n".join(self.texts) + "\n"
        mil.write_whole(self.json, lambda f: f.write(found.encode()))
        mil.write_whole(self.md, lambda f: f.write(md.encode()))


def train_all(lab, report, tables, seeds, small):
    """The teacher and all students that the tables need. Their figures go to the report."""
    lab.make_teacher()
    report.rows += [teacher_row(lab)]
    report.lap("teacher")
    if "stages" in tables:
        td.show(f"preferences: {make_pairs(lab)} pairs")
        report.lap("pairs")
    gc.collect()
    torch.cuda.empty_cache()  # for the workers
    plan, pool = arms(tables), new_pool(lab, small)
    students = Students(lab.size, pool, seeds, report.rows)
    report.found |= dict(arms=[dataclasses.asdict(arm) for arm in plan], sweep=students.swept)
    try:
        students.train(plan, DRAFTS if "speculation" in tables else ())
    finally:
        pool.shutdown(cancel_futures=True)
    report.lap("students")
    for row in report.rows:
        if "diverged" in row:
            report.say(f"left out: {row['arm']}: with seed {row['seed']}, {row['diverged']}")


def main(argv):
    o, tables, small = parse(argv)
    device, size = generate.pick_device(""), sizes(small, o.minutes)
    mil.make_directory(o.out)
    shutil.rmtree(o.out / "models", ignore_errors=True)  # of an earlier run
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = f"{machine}, Python {platform.python_version()}, torch {torch.__version__}"
    about += "; smoke size: the figures mean nothing" * small
    report = Report(o, size, about)
    print(about, LEGEND, sep="\n\n", flush=True)
    try:
        lab = Lab(size, o.out, device)
        train_all(lab, report, tables, o.seeds, small)
        for name in tables:  # each is printed and saved as it comes
            if name == "speculation":
                report.rows += speculate(lab)
                report.lap(name)
            for table in TABLES[name]:
                report.add(table.__name__, table(size))
    finally:
        report.save()
    try:
        pictures.draw(json.loads(report.json.read_text()), o.out)
    except ImportError:
        td.show("no pictures: matplotlib is not installed")


if __name__ == "__main__":
    generate.run_command(main)
