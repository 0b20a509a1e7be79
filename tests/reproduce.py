"""The claims of The Mamba in the Llama (arXiv 2408.15237), run again at small scale, beside the paper's own figures.

    python tests/reproduce.py                    all tables: about ten minutes on one H200, from nothing; on a CPU a smoke size, whose figures say nothing
    python tests/reproduce.py quality order      these tables
    python tests/reproduce.py --minutes 4        all with fewer steps

    quality       how much is lost with less and less attention: 50, 25, 12.5, 0 % of the layers, Mamba and Mamba-2 (Table 6 left)
    init          attention's weights or random ones in the new layers; MLPs frozen or not (Table 7 left, Table 8)
    order         stepwise or at once; the layers that keep attention spread evenly, or all at one end (Table 7 right)
    mixer         what the new layers must have: Mamba-2, Mamba, Mamba without decay (linear attention), nothing (Table 9)
    stages        stage 1, 1 + 2, 1 + 2 + preferences (Table 6 right)
    long          a needle in a haystack up to 20 times the length of distillation; perplexity by position (Figure 4)
    speculation   tokens a pass of the target, and speed, by draft, target and K (Tables 1 and 5)
    cost          time and memory of reading and writing from 1k to 128k tokens, by share of attention

Signs and orderings are the claim, not digits. One teacher, a Llama over bytes, learns the sources of Python's standard library, in which notes
(`# kdw is 5821`) are strewn and asked for some hundred bytes on (`# kdw? 5821`): so it has to use its context, and a needle is something that it
can find. A student is trained by train_distill.py's own functions. Every arm's learning rate is the best of Size.rates for it, by the KL at the end of stage 1
with a seed that is not used again (*: the lowest or highest of them); then it runs with --seeds others (order of the data, initial values), of which
mean ± standard error is printed.

Figures are printed, and written to OUT/reproduce.json with every arm's settings, OUT/reproduce.md, and, where matplotlib is, drawn to --assets.
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
import sys
import textwrap
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import bench
import generate
import mil
import pictures
import train_distill as td
from mil import MilError

TABLES = ("quality", "init", "order", "mixer", "stages", "long", "speculation", "cost")
SWEEP = 100  # the seed that chooses among the rates


@dataclass
class Size:
    """What a run is made of. Steps of 10 minutes on one H200; --minutes scales them."""
    n_layers: int = 8
    d: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    d_ff: int = 768
    context: int = 512           # of the teacher, and the length of distillation
    batch: int = 64              # rows of a step: the teacher's
    student_batch: int = 32
    rates: tuple = (1e-3, 3e-3, 6e-3, 1.2e-2)  # of stage 1; stage 2 has a third of it
    teacher_steps: int = 3000
    layer_steps: int = 40        # of stage 1, for each layer replaced
    stage2_steps: int = 450
    dpo_steps: int = 60
    draft_steps: int = 600
    eval_sequences: int = 256
    prompts: int = 192           # functions to be written
    written: int = 160           # bytes of each
    samples: int = 8             # needles at each length and depth
    lengths: tuple = (0.5, 1, 2, 4, 8, 12, 16, 20)  # × context
    depths: int = 8
    pairs: int = 1024            # prompts answered twice for the preferences
    texts: int = 4               # continued speculatively, one by one
    speculated: int = 128        # tokens of each
    Ks: tuple = (2, 4, 6, 8)
    cost_lengths: tuple = (1024, 4096, 16384, 65536, 131072)
    scan_lengths: tuple = (1024, 4096, 16384, 65536)
    cost: mil.Config = dataclasses.field(default_factory=lambda: mil.Config(d=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192, tied=True, context=2**18))


SMOKE = Size(d=32, n_heads=2, n_kv_heads=1, d_ff=32, context=128, batch=4, student_batch=2, rates=(1e-3, 3e-3), teacher_steps=4, layer_steps=1, stage2_steps=1, dpo_steps=1, draft_steps=1,
             eval_sequences=2, prompts=4, written=48, samples=1, lengths=(1, 2), depths=2, pairs=16, texts=1, speculated=8, Ks=(2,), cost_lengths=(64, 256), scan_lengths=(64, 128),
             cost=mil.Config(v=64, d=32, n_layers=8, n_heads=2, n_kv_heads=1, d_ff=32, context=2**18))


# ---------------------------------------------------------------------------------------------------------------
# The text: Python with notes strewn in, and what is asked of it


def with_notes(text, context, dice):
    """The text with a note about every 120 characters, and each asked for again, up to three quarters of the context later."""
    out, due, at, next_note = [], [], 0, dice.randrange(240)
    for line in text.splitlines(keepends=True):
        out.append(line)
        at += len(line)
        if line.endswith("\\\n"):
            continue
        if at >= next_note:
            name, number = note(dice)
            out.append(f"# {name} is {number}\n")
            due.append((at + dice.randrange(context * 3 // 4), name, number))
            next_note = at + dice.randrange(240)
        asked, due = [item for item in due if item[0] <= at], [item for item in due if item[0] > at]
        out += [f"# {name}? {number}\n" for _, name, number in asked]
        at += sum(map(len, out[len(out) - len(asked):]))
    return "".join(out)


DIGITS = 4


def note(dice):
    """A name and a number."""
    return "".join(dice.choices("bcdfghjklmnpqrstvwxz", k=3)), "".join(dice.choices("0123456789", k=DIGITS))


def functions(documents, count, before, after, dice):
    """`count` places where a function begins: (the text before, at most so many bytes, its header the end of it; its header; what really follows)."""
    places = [(text, m) for text in documents for m in re.finditer(r"^ *def \w+\([^\n]*\)[^\n]*:\n", text, re.M)]
    return [(text[:m.end()][-before:], m[0], text[m.end():m.end() + after]) for text, m in dice.sample(places, min(count, len(places)))]


def parses(header, body):
    """Whether a function with this header and text is Python, up to where it ends: at a line that is indented no more than the header. Of a text that breaks
    off, the last line is left out; notes are no part of it."""
    indent, lines = len(header) - len(header.lstrip()), []
    for line in body.split("\n")[:-1]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent and not line.startswith("#"):
            break
        lines += [line] * (not line.startswith("# "))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(textwrap.dedent(header + "\n".join(lines)))
        return True
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


class Lab:
    """What every arm shares: text, teacher, measures."""

    def __init__(self, size, out, device):
        self.size, self.out, self.device = size, Path(out), device
        self.encoding = generate.load_tokenizer("bytes")
        shape = {name: getattr(size, name) for name in td.SIZES}
        self.s = td.Settings(out=str(out), device=str(device), context=size.context, batch=size.batch, teacher_steps=size.teacher_steps,
                             eval_sequences=size.eval_sequences, graph=True, stage1_steps=1, stage2_steps=1, **shape)
        td.complete(self.s, device)
        self.run = td.Run(self.s, device)
        self.kind = getattr(torch, self.s.dtype)
        raw = [text for text in (td.read_text(file, False) for file in td.standard_library()) if text.strip()]
        self.raw, self.unseen = td.split(raw)
        noted = self.out / "noted.jsonl"
        if not noted.exists():
            dice = random.Random(0)
            mil.make_directory(self.out)
            lines = [json.dumps({"text": with_notes(text, size.context, dice)}) + "\n" for text in raw]
            mil.write_whole(noted, lambda f: f.write("".join(lines).encode()))
        with contextlib.redirect_stdout(io.StringIO()):
            self.corpus = td.load_corpus(self.s, [str(noted)], self.encoding, "bytes")
        self.source = td.Source(self.run, self.out / "teacher")

    @property
    def teacher(self):
        model = self.source.read()[0]
        model.compute = self.kind
        return model

    def decoding(self, model):
        """The model as decoding has it: of one type, not shared."""
        model = copy.deepcopy(model)
        model.compute = None
        return mil.pack(mil.cast(model, self.kind).eval())

    def complete(self, model, prompts, seed, rows=64):
        """A sampled continuation (temperature 0.8) of each prompt, token ids."""
        out, model = [], self.decoding(model)
        for i in range(0, len(prompts), rows):
            part = prompts[i:i + rows]
            decoder = generate.Decoder(model, len(part), self.size.context, 0.8, generator=torch.Generator(self.device).manual_seed(seed + i))
            texts = [[] for _ in part]
            for new in decoder.decode(part, self.size.written):
                texts = [a + b for a, b in zip(texts, new)]
            out += texts
        return out

    def writing(self, model, seed=1):
        """Of functions the model completes: the share that parses, and how unlikely the teacher finds what it wrote, in nats a byte."""
        asked = functions(self.unseen, self.size.prompts, self.size.context - self.size.written - 1, self.size.written, random.Random(0))
        prompts = [generate.encode(self.encoding, before)[-(self.size.context - self.size.written - 1):] for before, *_ in asked]
        texts = self.complete(model, prompts, seed)
        good = [parses(header, self.encoding.decode(ids)) for (_, header, _), ids in zip(asked, texts)]
        real = [parses(header, after) for _, header, after in asked]
        nats = []
        for i in range(0, len(prompts), 64):
            rows = [prompt + text for prompt, text in zip(prompts[i:i + 64], texts[i:i + 64])]
            block = torch.full((len(rows), max(map(len, rows))), -1)
            for row, ids in zip(block, rows):
                row[:len(ids)] = torch.tensor(ids)
            loss = self.losses(self.teacher, block.clamp(min=0).to(self.device)).cpu()
            nats += [loss[j, len(prompt) - 1:len(row) - 1].mean().item() for j, (prompt, row) in enumerate(zip(prompts[i:], rows))]
        return dict(parses=sum(good) / len(good), real=sum(real) / len(real), teacher_nats=sum(nats) / len(nats))

    @torch.no_grad()
    def losses(self, model, tokens):
        """The cross-entropy (b, l - 1) of each token after the first."""
        logits = model.logits(model.hidden(tokens[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)

    def haystack(self, length, depth, dice):
        """So many bytes of unseen Python with one note at this depth, from 0 to 1, and asked for at the end; and the answer's digits."""
        name, number = note(dice)
        needle, question = f"# {name} is {number}\n", f"# {name}? {number}"
        room = length - len(needle) - len(question)
        text = dice.choice([t for t in self.long_texts if len(t) > room]) if any(len(t) > room for t in self.long_texts) else max(self.long_texts, key=len)
        begin = dice.randrange(max(1, len(text) - room))
        text = text[begin:begin + room - 1] + "\n"
        at = text.rfind("\n", 0, int(depth * (room - 1)) + 1) + 1  # after the last whole line there
        return [*(text[:at] + needle + text[at:] + question).encode("ascii")]

    @functools.cached_property
    def long_texts(self):
        return [t.encode("ascii", "replace").decode() for t in self.unseen]

    @torch.no_grad()
    def needles(self, model, seed=0):
        """How often the whole number is found, greedily: {length: [at each depth]}."""
        found, dice = {}, random.Random(seed)
        for length in (int(x * self.size.context) for x in self.size.lengths):
            rows = [self.haystack(length, depth / (self.size.depths - 1), dice) for depth in range(self.size.depths) for _ in range(self.size.samples)]
            hits = []
            for part in torch.tensor(rows, device=self.device).split(max(1, min(64, 2**18 // length))):
                guess = model.logits(model.hidden(part[:, :-1])[:, -DIGITS:]).argmax(-1)
                hits += (guess == part[:, -DIGITS:]).all(1).tolist()
            found[length] = [sum(hits[i:i + self.size.samples]) / self.size.samples for i in range(0, len(hits), self.size.samples)]
        return found

    def by_position(self, model):
        """The perplexity of unseen text by the place of a byte: {the end of a span of places: perplexity}, spans of doubling length."""
        most = int(max(self.size.lengths) * self.size.context)
        texts = [t for t in self.long_texts if len(t) > most]
        rows = [[*t[i:i + most + 1].encode()] for t in texts for i in range(0, len(t) - most, most)][:16] or [[*max(self.long_texts, key=len)[:most + 1].encode()]]
        loss = torch.cat([self.losses(model, part) for part in torch.tensor(rows, device=self.device).split(4)]).mean(0)
        ends, out, begin = [*(self.size.context // 2**i for i in (4, 3, 2, 1)), *(self.size.context * 2**i for i in range(10))], {}, 0
        for end in (min(end, len(loss)) for end in ends):
            if end > begin:
                out[end], begin = math.exp(loss[begin:end].mean().item()), end
        return out


# ---------------------------------------------------------------------------------------------------------------
# Arms: ways to make a student


@dataclass(frozen=True)
class Arm:
    name: str
    path: tuple                  # of stage 1: the layers without attention after each of its steps
    report: tuple = ()           # after which of these steps (-1: the last) the student is measured
    then: tuple = ()             # and after which of them stage 2 follows, on a copy
    mixer: str = "mamba2"
    init: str = "attention"
    train: str = "mixers"        # in stage 1
    more_steps: bool = False     # stage 1 has the steps of stage 2 as well
    linear: bool = False         # Mamba with A = 0 and Δ = 1, not learned
    prefer: tuple = ()           # after which of `then` preferences follow
    judge: bool = False          # whether what it writes, and what it finds in long texts, is measured


def spread(n, count):
    return tuple(mil.interleaved_layers(n, 1 - count / n))


def steps_to(n, count):
    """The paper's steps, 25, 50, 75, 87.5, 100 % of n layers, as far as `count` layers; each set holds the one before it."""
    counts = sorted({n // 4, n // 2, n * 3 // 4, n * 7 // 8, n} & set(range(count + 1)))
    stages = td.resolve([td.Stage(keep=1 - c / n, steps=1) for c in counts], mil.Config(v=8, d=4, n_layers=n, n_heads=1, n_kv_heads=1, d_ff=4), "")
    return tuple(tuple(i for i, mixer in enumerate(stage.mixers) if mixer != "attention") for stage in stages)


def arms(n, tables):
    """The arms that these tables need, by name."""
    chain, half = steps_to(n, n), steps_to(n, n // 2)
    quarter = steps_to(n, n * 3 // 4)
    all_ = {
        "quality init order mixer stages long speculation": [
            Arm("mamba2", chain, (1, 2, 3, 4), (1, 2, 3, 4), judge=True, prefer=(1,))],
        "quality mixer long speculation": [Arm("mamba", chain, (1, 2, 3, 4), (1, 2, 3, 4), mixer="mamba", judge=True)],
        "init": [Arm(f"{init}, {train}", chain, (1, 4), init=init, train=train) for init, train in (("random", "mixers"), ("attention", "mlps"), ("random", "mlps"))],
        "order": [Arm("half, at once", (half[-1],), (-1,)), Arm("half, the first layers", (range_(0, n // 4), range_(0, n // 2)), (-1,)),
                  Arm("half, the last layers", (range_(n * 3 // 4, n), range_(n // 2, n)), (-1,)),
                  Arm("quarter, at once", (quarter[-1],), (-1,)),
                  Arm("quarter, the first layers", (range_(0, n // 4), range_(0, n // 2), range_(0, n * 3 // 4)), (-1,)),
                  Arm("quarter, the last layers", (range_(n * 3 // 4, n), range_(n // 2, n), range_(n // 4, n)), (-1,))],
        "mixer": [Arm("linear attention", half, (-1,), (-1,), mixer="mamba", linear=True),
                  Arm("no mixer", (half[-1],), (-1,), mixer="none", train="all", more_steps=True)],
    }
    return [arm for needs, some in all_.items() if set(needs.split()) & set(tables) for arm in some]


def range_(a, b):
    return tuple(range(a, b))


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
    """Train a student by an arm: a row of figures for each place that it is to be measured at; with `sweep` the last of stage 1 alone."""
    size, rows, own, tokens = lab.size, [], {}, 0
    s = dataclasses.replace(lab.s, seed=seed, init=arm.init, batch=size.student_batch)
    run = td.Run(s, lab.device)
    last = len(arm.path) - 1
    at = lambda places: {i % len(arm.path) for i in places}  # noqa: E731

    def train(stage, number, own, batches=None):
        models = td.assemble(run, lab.teacher, lab.teacher, stage, number, own)
        if arm.linear:
            freeze_linear(models.student)
        batches = batches or td.training_batches(run, lab.corpus, [seed, number], td.graphs(run, stage, models))
        td.fit(run, td.State(), stage, models, batches, io.StringIO(), arm.name)
        return models, {name: w for name, w in models.student.named_parameters() if name in own or w.requires_grad}

    def measure(models, stages, replaced, judge):
        evaluated = td.evaluate(dataclasses.replace(run, s=lab.s), models, lab.corpus, lab.encoding)
        row = dict(arm=arm.name, mixer=arm.mixer, replaced=len(replaced), stages=stages, seed=seed, rate=rate, rates=size.rates, tokens=tokens,
                   share=tokens / (size.teacher_steps * size.batch * size.context), ratio=evaluated[1]["perplexity"] / evaluated[0]["perplexity"], **evaluated[1])
        if judge:
            row.update(lab.writing(models.student), needles=lab.needles(models.student), by_position=lab.by_position(models.student))
        rows.append(row)

    for i, replaced in enumerate(arm.path):
        mixers = [arm.mixer if k in replaced else "attention" for k in range(size.n_layers)]
        new = len(replaced) - (len(arm.path[i - 1]) if i else 0)
        stage = td.Stage(train=arm.train, steps=new * size.layer_steps + arm.more_steps * size.stage2_steps, lr=rate, name=f"{arm.name} 1.{i + 1}", mixers=mixers)
        models, own = train(stage, i, own)
        tokens += stage.steps * s.batch * s.context
        if i in at(arm.report) and not sweep or i == last and sweep:
            measure(models, "1 + 2" if arm.more_steps else "1", replaced, False)
        if i in at(arm.then) and not sweep:
            before = tokens
            second = dataclasses.replace(stage, train="all", steps=size.stage2_steps, lr=rate / 3, name=f"{arm.name} 2 after 1.{i + 1}")
            models, full = train(second, 50 + i, own)
            tokens += second.steps * s.batch * s.context
            measure(models, "1 + 2", replaced, arm.judge)
            if seed == 0 and arm.judge:
                with contextlib.redirect_stdout(io.StringIO()):
                    td.save_student(run, models, lab.out / "models" / f"{arm.name}-{len(replaced)}", "bytes", torch.float32)
            if i in at(arm.prefer):
                pairs = json.loads((lab.out / "pairs.json").read_text())
                held, learned = pairs[::4], [pair for k, pair in enumerate(pairs) if k % 4]
                third = dataclasses.replace(second, loss="dpo", beta=0.1, steps=size.dpo_steps, lr=3e-5, name=f"{arm.name} 3")
                reference = td.references(run, models, [*learned, *held], lab.out / "teacher")
                before_it = td.preferences(run, third, models.requires_grad_(False), held, reference[len(learned):])
                models, _ = train(third, 90 + i, full, td.pair_batches(run, learned, reference[:len(learned)], [seed, 90]))
                measure(models, "1 + 2 + 3", replaced, arm.judge)
                rows[-1].update(td.preferences(run, third, models, held, reference[len(learned):]), preferred_before=before_it["preferred"])
            tokens = before
        del models
    return rows


DRAFTS = {"attention, 2 layers": ("attention", 2), "mamba2, 2 layers": ("mamba2", 2), "attention, 4 layers": ("attention", 4), "mamba2, 4 layers": ("mamba2", 4)}


def make_draft(lab, name):
    """A small student of the teacher's first, last and, of four, two layers between; saved."""
    (mixer, count), n = DRAFTS[name], lab.size.n_layers
    layers = [round(i * (n - 1) / (count - 1)) for i in range(count)]
    s = dataclasses.replace(lab.s, batch=lab.size.student_batch)
    run, base = td.Run(s, lab.device), mil.keep_layers(lab.teacher, layers)
    stage = td.Stage(train="all", steps=lab.size.draft_steps, lr=1e-3, name=name, mixers=[mixer] * count)
    models = td.assemble(run, lab.teacher, base, stage, 1, {})
    td.fit(run, td.State(), stage, models, td.training_batches(run, lab.corpus, [7, 0], td.graphs(run, stage, models)), io.StringIO(), name)
    td.save_student(run, models, lab.out / "models" / name, "bytes", torch.float32)
    return [dict(arm=f"draft, {name}", stages="draft", seed=0, **td.evaluate(dataclasses.replace(run, s=lab.s), models, lab.corpus, lab.encoding)[1])]


# ---------------------------------------------------------------------------------------------------------------
# Many arms at once: on a GPU each in a process of its own, since models this small leave most of it idle

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
    gc.collect()
    return rows, time.perf_counter() - began


class Inline(contextlib.nullcontext):
    """A pool of one, this process."""

    def __init__(self, lab):
        global LAB
        LAB = lab
        super().__init__()

    def submit(self, f, *args):
        from concurrent.futures import Future
        future = Future()
        with contextlib.redirect_stdout(io.StringIO()):
            future.set_result(f(*args))
        return future


def all_arms(lab, pool, tables, seeds, began, journal):
    """The rows of every arm: the best rate by the sweep, then all seeds; and the sweep's own rows. Each goes to the journal as it comes."""
    rows, swept, waiting, plan = [], [], {}, arms(lab.size.n_layers, tables)
    def submit(f, *args):
        waiting[pool.submit(work, f, *args)] = f, args
    for arm in plan:
        for rate in lab.size.rates:
            submit(learn, arm, SWEEP, rate, True)
    for name in DRAFTS if "speculation" in tables else ():
        submit(make_draft, name)
    total, done = len(waiting) + len(plan) * seeds, 0
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED)[0]:
            f, args = waiting.pop(future)
            try:
                (found, seconds), done = future.result(), done + 1
            except MilError as e:  # an arm may diverge at a rate
                found, seconds, done = [dict(arm=args[0].name, rate=args[2], seed=args[1], kl=math.inf, failed=str(e))] if f is learn else [], 0, done + 1
            sweep = f is learn and args[3]
            (swept if sweep else rows).extend(found)
            journal.write("".join(json.dumps(row) + "\n" for row in found))
            journal.flush()
            td.show(f"{done} of {total} students  {time.perf_counter() - began:.0f} s  {args[0] if f is not learn else args[0].name}"
                    + (f", rate {args[2]:g}, {'sweep' if sweep else f'seed {args[1]}'}" if f is learn else "") + f": {seconds:.1f} s", done=not sys.stdout.isatty() and done % 10 == 0)
            mine = [row for row in swept if row["arm"] == getattr(args[0], "name", None)]
            if sweep and len(mine) == len(lab.size.rates):
                best = min(mine, key=lambda row: row["kl"] if row["kl"] == row["kl"] else math.inf)
                for seed in range(seeds):
                    submit(learn, args[0], seed, best["rate"], False)
    return rows, swept


def make_pairs(lab):
    """Preferences: functions of the training text that the teacher completes twice; where one parses and the other does not, that one is preferred."""
    before = lab.size.context - lab.size.written - 1
    asked = functions(lab.raw, lab.size.pairs, before, 0, random.Random(1))
    prompts = [generate.encode(lab.encoding, text)[-before:] for text, *_ in asked]
    twice, pairs = [lab.complete(lab.teacher, prompts, seed) for seed in (11, 10**6)], []
    for (_, header, _), prompt, *texts in zip(asked, prompts, *twice):
        good = [parses(header, lab.encoding.decode(ids)) for ids in texts]
        if good[0] != good[1]:
            pairs.append([[*(~i for i in prompt), *texts[good.index(right)]] for right in (True, False)])
    if len(pairs) < 8:  # of a teacher that has not learned to write
        pairs = [[[*(~i for i in prompt), *ids] for ids in texts] for prompt, *texts in zip(prompts, *twice)][:8]
    mil.write_whole(lab.out / "pairs.json", lambda f: f.write(json.dumps(pairs).encode()))
    return len(pairs)


# ---------------------------------------------------------------------------------------------------------------
# Tables


def mean(rows, key):
    """Mean and standard error over seeds."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return math.nan, math.nan
    middle = sum(values) / len(values)
    return middle, (sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5 if len(values) > 1 else math.nan


def cell(rows, key, digits=3, percent=False):
    middle, error = mean(rows, key)
    if middle != middle:
        return "–"
    scale, end = (100, " %") if percent else (1, "")
    return f"{scale * middle:.{digits}f}" + (f" ± {scale * error:.{digits}f}" if error == error else "") + end


def rate(rows):
    """The learning rate of an arm, with a * where it is the lowest or highest that was tried."""
    value = rows[0]["rate"]
    return f"{value:g}" + "*" * (value in (rows[0]["rates"][0], rows[0]["rates"][-1]))


@dataclass
class Table:
    name: str
    title: str
    columns: list
    rows: list = dataclasses.field(default_factory=list)
    claims: list = dataclasses.field(default_factory=list)  # (what the paper finds, what is found here, holds)

    def claim(self, what, a, b, key="kl"):
        """That `key` of the rows a is less than that of b, beyond the standard errors of both."""
        (x, ex), (y, ey) = mean(a, key), mean(b, key)
        if x != x or y != y:
            return
        error = math.hypot(*(e if e == e else 0 for e in (ex, ey)))
        verdict = "holds" if y - x > error else "does not hold" if x - y > error else "within the error"
        self.claims.append((what, f"{key} {x:.4g} and {y:.4g}", verdict))

    def text(self, bar=" "):
        """For the terminal, or with bar="|" in markdown."""
        cells = [self.columns, *self.rows]
        widths = [max(len(str(row[i])) for row in cells) for i in range(len(self.columns))]
        line = lambda row: bar.join(["", *(f" {c:<{w}} " if i == 0 else f" {c:>{w}} " for i, (c, w) in enumerate(zip(row, widths))), ""]).rstrip()  # noqa: E731
        rule = [bar.join(["", *("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)), ""])] if bar == "|" else []
        head = f"### {self.title}\n" if bar == "|" else f"\n{self.title}"
        said = [f"{'- ' if bar == '|' else '  '}{verdict}: {what} ({found})" for what, found, verdict in self.claims]
        return "\n".join([head, line(cells[0]), *rule, *map(line, cells[1:]), *([""] * (bar == "|" and bool(said))), *said]) + "\n" * (bar == "|")


class Rows(list):
    """Rows of arms, and how to pick some."""

    def of(self, arm, replaced=None, stages=None):
        return [r for r in self if r["arm"] == arm and (replaced is None or r.get("replaced") == replaced) and (stages is None or r["stages"] == stages)]


QUALITY_PAPER = {0.5: "1.03", 0.25: "1.09", 0.125: "1.22 (6.25 %)", 0: "1.66"}


def quality(rows, n, teacher):
    t = Table("quality", "Quality by attention kept (Table 6 left; ppl and its ratio to the teacher's, KL and agreement on unseen text; the functions it writes)",
              ["student", "attention", "tokens", "ppl", "÷ teacher", "paper ÷", "KL", "agree", "parses", "teacher's nats"])
    t.rows.append(["teacher", "100 %", "100 %", f"{teacher['perplexity']:.3f}", "1", "1", "0", "100 %", f"{teacher['parses']:.1%}", f"{teacher['teacher_nats']:.3f}"])
    for mixer in ("mamba2", "mamba"):
        for c in (n // 2, n * 3 // 4, n * 7 // 8, n):
            r, kept = rows.of(mixer, c, "1 + 2"), 1 - c / n
            if r:
                t.rows.append([mixer, f"{kept:.3g}".replace("0.", ".") if 0 else f"{100 * kept:g} %", f"{r[0]['share']:.0%}", cell(r, "perplexity"), cell(r, "ratio", 4), QUALITY_PAPER.get(kept, ""),
                               cell(r, "kl", 4), cell(r, "agreement", 1, True), cell(r, "parses", 1, True), cell(r, "teacher_nats")])
        for a, b in ((n // 2, n * 3 // 4), (n * 3 // 4, n * 7 // 8), (n * 7 // 8, n)):
            t.claim(f"{mixer}: {100 - 100 * a / n:g} % of attention is nearer to the teacher than {100 - 100 * b / n:g} %", rows.of(mixer, a, "1 + 2"), rows.of(mixer, b, "1 + 2"))
            t.claim(f"{mixer}: what {100 - 100 * a / n:g} % of attention writes is likelier to the teacher than what {100 - 100 * b / n:g} % writes", rows.of(mixer, a, "1 + 2"),
                    rows.of(mixer, b, "1 + 2"), "teacher_nats")
    order = {key: sorted(((m, c) for m in ("mamba2", "mamba") for c in (n // 2, n * 3 // 4, n * 7 // 8, n) if rows.of(m, c, "1 + 2")),
                         key=lambda k: sign * mean(rows.of(*k, "1 + 2"), key)[0]) for key, sign in (("perplexity", 1), ("kl", 1), ("parses", -1), ("teacher_nats", 1))}
    for key in ("kl", "parses", "teacher_nats"):
        names = [f"{m} {100 - 100 * c / n:g} %" for m, c in order[key]]
        same = order[key] == order["perplexity"]
        t.claims.append((f"the order of students by {key} is that by perplexity", ", ".join(names), "holds" if same else "does not hold"))
    return t


def init(rows, n, teacher):
    t = Table("init", "Initialisation and frozen MLPs, after stage 1 (Tables 7 left and 8)", ["attention", "new layers from", "MLPs", "rate", "ppl", "÷ teacher", "KL", "paper ppl"])
    paper = {(0, "attention", "frozen"): "3.36", (0, "random", "frozen"): "18.2", (0, "attention", "trained"): "66.7", (0.5, "attention", "frozen"): "2.09",
             (0.5, "random", "frozen"): "7.4", (0.5, "attention", "trained"): "9.1"}
    names = {("attention", "frozen"): "mamba2", ("random", "frozen"): "random, mixers", ("attention", "trained"): "attention, mlps", ("random", "trained"): "random, mlps"}
    for c in (n // 2, n):
        for (begin, mlps), arm in names.items():
            if r := rows.of(arm, c, "1"):
                t.rows.append([f"{100 - 100 * c / n:g} %", begin, mlps, rate(r), cell(r, "perplexity"), cell(r, "ratio"), cell(r, "kl"), paper.get((1 - c / n, begin, mlps), "")])
        t.claim(f"{100 - 100 * c / n:g} %: attention's weights beat random ones", rows.of("mamba2", c, "1"), rows.of("random, mixers", c, "1"))
        t.claim(f"{100 - 100 * c / n:g} %: frozen MLPs beat trained ones", rows.of("mamba2", c, "1"), rows.of("attention, mlps", c, "1"))
    return t


def order(rows, n, teacher):
    t = Table("order", "Order of replacement, after stage 1, same tokens (Table 7 right)", ["attention", "which layers keep it", "replaced", "rate", "ppl", "÷ teacher", "KL", "paper ppl"])
    for kept, c, share, paper in (("50 %", n // 2, "half", {"stepwise": "2.09", "first": "2.41"}), ("25 %", n * 3 // 4, "quarter", {"stepwise": "2.20", "at once": "2.29", "first": "2.89"})):
        best = rows.of("mamba2", c, "1")
        for name, layers, how, key in (("mamba2", "evenly spread", "stepwise", "stepwise"), (f"{share}, at once", "evenly spread", "at once", "at once"),
                                       (f"{share}, the first layers", "the last", "stepwise", "first"), (f"{share}, the last layers", "the first", "stepwise", "last")):
            if r := rows.of(name, c, "1"):
                t.rows.append([kept, layers, how, rate(r), cell(r, "perplexity"), cell(r, "ratio"), cell(r, "kl", 4), paper.get(key, "")])
        t.claim(f"{kept}: stepwise beats at once", best, rows.of(f"{share}, at once"))
        t.claim(f"{kept}: attention spread evenly beats attention in the last layers", best, rows.of(f"{share}, the first layers"))
        t.claim(f"{kept}: attention spread evenly beats attention in the first layers", best, rows.of(f"{share}, the last layers"))
    return t


def mixer(rows, n, teacher):
    t = Table("mixer", "What half of the layers must have in attention's place, same steps (Table 9)", ["in its place", "rate", "ppl", "÷ teacher", "KL", "agree", "paper (LAMBADA ppl)"])
    for name, label, paper in (("mamba2", "Mamba-2", ""), ("mamba", "Mamba", "6.20"), ("linear attention", "Mamba with A = 0, Δ = 1", ""), ("no mixer", "nothing", "151.98")):
        if r := rows.of(name, n // 2, "1 + 2"):
            t.rows.append([label, rate(r), cell(r, "perplexity"), cell(r, "ratio"), cell(r, "kl", 4), cell(r, "agreement", 1, True), paper])
    t.claim("Mamba beats nothing", rows.of("mamba", n // 2, "1 + 2"), rows.of("no mixer"))
    t.claim("Mamba beats linear attention", rows.of("mamba", n // 2, "1 + 2"), rows.of("linear attention", n // 2, "1 + 2"))
    return t


def stages(rows, n, teacher):
    t = Table("stages", "Stages, half Mamba-2 (Table 6 right); preferences: of two functions, the one that parses", ["stages", "ppl", "÷ teacher", "KL", "parses", "teacher's nats", "preferred, held out"])
    for name in ("1", "1 + 2", "1 + 2 + 3"):
        r = rows.of("mamba2", n // 2, name)
        third = rows.of("mamba2", n // 2, "1 + 2 + 3")
        rather = cell(third, "preferred", 1, True) if name == "1 + 2 + 3" else cell(third, "preferred_before", 1, True) if name == "1 + 2" else ""
        t.rows.append([name, cell(r, "perplexity"), cell(r, "ratio", 4), cell(r, "kl", 4), cell(r, "parses", 1, True), cell(r, "teacher_nats"), rather])
    t.claim("stage 2 lowers the loss", rows.of("mamba2", n // 2, "1 + 2"), rows.of("mamba2", n // 2, "1"), "loss")
    t.claim("preferences raise the share that parses", [dict(parses=-r["parses"]) for r in rows.of("mamba2", n // 2, "1 + 2 + 3")], [dict(parses=-r["parses"]) for r in rows.of("mamba2", n // 2, "1 + 2")], "parses")
    return t


def long(rows, n, teacher):
    lengths = [int(k) for k in teacher["needles"]]
    t = Table("long", "Needle in a haystack: the share of numbers found whole, mean over depths (Figure 4), by length in bytes; distilled at the teacher's length",
              ["model", "attention", *(f"{k:,}" for k in lengths)])
    people = [("teacher", "100 %", [teacher])] + [(m, f"{100 - 100 * c / n:g} %", rows.of(m, c, "1 + 2")) for m in ("mamba2", "mamba") for c in (n // 2, n * 3 // 4, n * 7 // 8, n)]
    value = lambda r, k: dict(found=sum(r["needles"][k]) / len(r["needles"][k]))  # noqa: E731
    for name, kept, r in people:
        if r:
            t.rows.append([name, kept, *(cell([value(x, k) for x in r], "found", 0, True) for k in teacher["needles"])])
    spans = list(teacher["by_position"])
    more = Table("position", "Perplexity of unseen text by place, up to each of these bytes", ["model", "attention", *(f"{int(k):,}" for k in spans)])
    for name, kept, r in people:
        if r:
            more.rows.append([name, kept, *(cell([x["by_position"] for x in r], k, 2) for k in spans)])
    far, n_context = list(teacher["needles"])[-1], teacher["context"]
    within = [k for k in spans if int(k) <= n_context][-1]
    for name, kept, r in people[1:]:
        if r:
            t.claim(f"{name}, {kept} of attention: misses fewer at {int(far):,} bytes than the teacher", *([dict(missed=1 - value(x, far)["found"]) for x in some] for some in (r, [teacher])), "missed")
            more.claim(f"{name}, {kept} of attention: is less perplexed there than the teacher", *([dict(perplexity=x["by_position"][spans[-1]]) for x in some] for some in (r, [teacher])), "perplexity")
            more.claim(f"{name}, {kept} of attention: is less perplexed there than within {n_context} bytes", *([dict(perplexity=x["by_position"][k]) for x in r] for k in (spans[-1], within)), "perplexity")
    return t, more


def speculation(lab):
    """Every target with every draft, greedy and sampled: tokens a pass, acceptance, speed."""
    size, n = lab.size, lab.size.n_layers
    load = lambda place: mil.pack(mil.load(place, lab.device, lab.kind))  # noqa: E731
    targets = {"Llama": load(lab.out / "teacher"), **{f"{m}, {100 - 100 * c / n:g} %": load(lab.out / "models" / f"{m}-{c}")
                                                       for m, c in (("mamba2", n // 2), ("mamba2", n), ("mamba", n))}}
    drafts = {name: load(lab.out / "models" / name) for name in DRAFTS}
    asked = functions(lab.unseen, size.texts, size.context // 4, 0, random.Random(5))
    prompts = [generate.encode(lab.encoding, text)[-size.context // 4:] for text, *_ in asked]
    rows = []

    def timed(model, temperature, draft=None, K=0):
        """tokens/s after the warm-up, and per text tokens a pass and the share kept."""
        plan = generate.Speculation(K)
        decoder = generate.Decoder(model, 1, size.context, temperature, generator=torch.Generator(lab.device).manual_seed(3), draft=draft, speculate=plan)
        seconds, tokens, per_pass, kept = 0, 0, [], []
        for prompt in prompts[:1] + prompts:  # the first twice: kernels are compiled and graphs captured in it
            plan.passes = plan.accepted = plan.proposed = 0
            began, count = bench.now(), 0
            for (new,) in decoder.decode([prompt], size.speculated):
                count += len(new)
            took = bench.now() - began
            per_pass.append(count / max(1, plan.passes)), kept.append(plan.accepted / max(1, plan.proposed))
            seconds, tokens = (0, 0) if len(per_pass) == 1 else (seconds + took, tokens + count)
        return tokens / seconds, per_pass[1:], kept[1:]
    for name, model in targets.items():
        for temperature in (0, 1):
            plain = timed(model, temperature)[0]
            for draft, small in drafts.items():
                for K in size.Ks:
                    speed, per_pass, kept = timed(model, temperature, small, K)
                    rows.append(dict(target=name, draft=draft, temperature=temperature, K=K, per_pass=per_pass, kept=kept, tokens_s=speed, plain=plain))
                    td.show(f"speculation: {name}, {draft}, K = {K}", done=False)
    t = Table("speculation", "Speculative decoding, batch 1: tokens a pass of the target (± between texts) and speed over plain, at the K that is fastest (Tables 1 and 5)",
              ["target", "draft", "text", "K", "tokens a pass", "kept", "÷ plain", "tokens/s"])
    for name in targets:
        for temperature in (0, 1):
            for draft in drafts:
                best = max((r for r in rows if (r["target"], r["draft"], r["temperature"]) == (name, draft, temperature)), key=lambda r: r["tokens_s"])
                spread_ = mean([dict(x=x) for x in best["per_pass"]], "x")
                t.rows.append([name, draft, "sampled" if temperature else "greedy", best["K"], f"{spread_[0]:.2f} ± {spread_[1]:.2f}", f"{sum(best['kept']) / len(best['kept']):.0%}",
                               f"{best['tokens_s'] / best['plain']:.2f}", f"{best['tokens_s']:.0f}"])
    return t, rows


def cost(lab):
    """Reading and writing at growing length."""
    size, rows = lab.size, []
    t = Table("cost", f"Cost by length, batch 1, random weights, {size.cost.n_layers} layers of width {size.cost.d}: reading it all, one more token, the cache",
              ["attention", "what", *(f"{k:,}" for k in size.cost_lengths)])
    for mixers in (("attention",), ("mamba2", "attention"), ("mamba2", "mamba2", "mamba2", "attention"), ("mamba2",), ("mamba",)):
        model = bench.random_model(bench.stacked(size.cost, mixers))
        mine = []
        for length in size.cost_lengths:
            for _ in range(2 if length < 2**16 else 1):  # once for what is new in it
                began = bench.now()
                cache = bench.filled(model, 1, length)
                read = bench.now() - began
            mine.append(dict(mixers=mixers, length=length, read=read, step_ms=bench.step_ms(model, cache, 1), bytes=bench.cache_bytes(cache, length)))
            td.show(f"cost: {' + '.join(mixers)}, {length:,} tokens", done=False)
            del cache
        share = mixers.count("attention") / len(mixers)
        kept = f"{share:.0%}" + (f", {mixers[0]}" if share < 1 else "")
        t.rows += [[kept, "read, s", *(f"{r['read']:.3f}" for r in mine)], ["", "a token, ms", *(f"{r['step_ms']:.2f}" for r in mine)],
                   ["", "cache, MiB", *(f"{r['bytes'] / 2**20:.1f}" for r in mine)]]
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
                    times = [m["gpu"] or m["wall"] for way in ways if (m := bench.measure(*way, True))]
                    rows.append(dict(name=who if who == "attention" else f"{who}, {kind}", length=length, ms=min(times, default=None)))
    return rows


# ---------------------------------------------------------------------------------------------------------------


def main(argv):
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(TABLES)}; none: all")
    parser.add_argument("--minutes", type=float, default=10, help="about how long it may take on one H200: steps are scaled (10)")
    parser.add_argument("--seeds", type=int, default=3, help="students of every arm (3)")
    parser.add_argument("--out", default="out/reproduce", help="where teacher, students and tables go; a teacher found there is used again")
    parser.add_argument("--assets", default="", help="where the pictures go (assets; of the smallest sizes OUT/assets)")
    parser.add_argument("--workers", type=int, default=0, help="students trained at once, on a GPU (default: 6, or half the CPU cores)")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, as on a CPU")
    o = parser.parse_args(argv)
    for name in o.tables:
        if name not in TABLES:
            raise MilError(f"there is no table {name!r}; expected some of {', '.join(TABLES)}")
    for name, least in (("minutes", 0.1), ("seeds", 1)):
        if not getattr(o, name) >= least:
            raise MilError(f"--{name} is {getattr(o, name)}, expected {least} or more")
    began, device, tables = time.perf_counter(), generate.pick_device(""), o.tables or list(TABLES)
    small = o.smoke or device.type != "cuda"
    size = SMOKE if small else Size()
    if not small:
        scaled = {k: max(1, round(getattr(size, k) * o.minutes / 10)) for k in ("teacher_steps", "layer_steps", "stage2_steps", "dpo_steps", "draft_steps")}
        size = dataclasses.replace(size, **scaled)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    versions = f"{machine}, Python {platform.python_version()}, torch {torch.__version__}"
    td.show(f"{versions}" + "; smoke size: the figures mean nothing" * small)
    clock = {}

    def lap(name):
        clock[name] = round(time.perf_counter() - began - sum(clock.values()), 1)
        td.show(f"[{name}: {clock[name]} s, {time.perf_counter() - began:.0f} s in all]")

    lab = Lab(size, o.out, device)
    teacher = {}
    if set(tables) - {"cost"}:
        with open(os.devnull, "w") as journal:
            td.get_teacher(lab.run, td.State(), lab.corpus, lab.encoding, "bytes", journal, lab.out / "teacher")
        for old in td.checkpoints(lab.run):
            old.unlink()
        models = td.prepare(lab.run, td.Models(None, lab.teacher))
        teacher = {"context": size.context, **td.evaluate(lab.run, models, lab.corpus, lab.encoding)[0], **lab.writing(lab.teacher), "needles": lab.needles(lab.teacher), "by_position": lab.by_position(lab.teacher)}
        parameters, within = sum(w.numel() for w in lab.teacher.parameters()), [k for k in teacher["needles"] if k <= size.context][-1]
        td.show(f"teacher: {parameters / 1e6:.1f} M parameters, {size.teacher_steps * size.batch * size.context / 1e6:.0f} M tokens; perplexity {teacher['perplexity']:.3f}; within its "
                f"{size.context} bytes it finds {sum(teacher['needles'][within]) / size.depths:.0%} of the needles; perplexity by place "
                + ", ".join(f"…{k}: {v:.2f}" for k, v in teacher["by_position"].items()) + f"; its functions parse {teacher['parses']:.0%}, the real ones {teacher['real']:.0%}")
        lap("teacher")
    if "stages" in tables or "quality" in tables:
        td.show(f"preferences: {make_pairs(lab)} pairs")
        lap("pairs")
    rows, swept = Rows(), []
    if set(tables) - {"cost"}:
        del models
        gc.collect()
        torch.cuda.empty_cache()
        workers = o.workers or (1 if small else min(6, max(1, os.cpu_count() // 2)))
        pool = Inline(lab) if workers == 1 else ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), enter, (size, o.out, device))
        with pool, open(lab.out / "rows.jsonl", "w") as journal:
            found, swept = all_arms(lab, pool, tables, o.seeds, began, journal)
        rows = Rows(found)
        lap("students")
    made, more = [], {}
    makers = {"quality": quality, "init": init, "order": order, "mixer": mixer, "stages": stages, "long": long}
    for name in tables:
        if name in makers:
            table = makers[name](rows, size.n_layers, teacher)
            made += table if isinstance(table, tuple) else [table]
        else:
            table, more[name] = {"speculation": speculation, "cost": cost}[name](lab)
            made.append(table)
            if name == "cost":
                more["scan"] = scans(size)
            lap(name)
    for table in made:
        print(table.text())
    seconds = time.perf_counter() - began
    print(f"\n{seconds:.0f} s in all: {', '.join(f'{k} {v:.0f}' for k, v in clock.items())}; {versions}")
    report = dict(versions=versions, seconds=seconds, clock=clock, size=dataclasses.asdict(size), seeds=o.seeds, teacher=teacher, rows=rows, sweep=swept, **more,
                  claims={t.name: t.claims for t in made}, tables={t.name: [t.columns, *t.rows] for t in made})
    mil.make_directory(lab.out)
    mil.write_whole(lab.out / "reproduce.json", lambda f: f.write(json.dumps(report, indent=1).encode()))
    mil.write_whole(lab.out / "reproduce.md", lambda f: f.write(("\n".join(t.text("|") for t in made) + f"\n{seconds:.0f} s on {versions}\n").encode()))
    try:
        pictures.draw(json.loads(json.dumps(report)), o.assets or (lab.out / "assets" if small else "assets"))
    except ImportError:
        td.show("no pictures: matplotlib is not installed")
    return report


if __name__ == "__main__":
    generate.run_command(main)
