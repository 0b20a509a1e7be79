"""From a Llama to a Mamba hybrid, in one command.

    python train_distill.py                                  on the sources of Python's library
    python train_distill.py --data notes/ --keep 0.25        your text; a quarter of attention stays
    python train_distill.py --teacher DIR --data chat.jsonl  your teacher, of any kind mil.py loads
    python train_distill.py --teacher DIR --data chat.jsonl --pseudo_labels --pairs pairs.jsonl
                                                             the paper's three stages
    python train_distill.py --teacher out/teacher --student_layers 0,3 --keep 1 --out out/draft
                                                             a draft for it (generate.py)
    torchrun --standalone --nproc_per_node 2 -- train_distill.py --teacher DIR …    on two GPUs

    text -> teacher -> stage 1.1, 1.2 …, each replacing more attention -> stage 2 -> (stage 3)

The student learns from the teacher's distribution and from the text (Eq. 2 of arXiv 2408.15237),
a mean over predicted tokens:

    L = α · (-log p_student(x_{t+1})) + β · KL(p_teacher(· | x_≤t) ‖ p_student(· | x_≤t))

and in stage 3 which of two answers is preferred (DPO, Eq. 4), with the teacher as reference:

    L = -log σ(β · (log p_student(chosen) - log p_teacher(chosen)
                    - log p_student(rejected) + log p_teacher(rejected)))

Stage 1 trains the new Mamba mixers alone; everything else is the teacher's, the same tensors in
memory. Attention is replaced in steps, 25, 50, 75, 87.5, 100 % of the layers as far as --keep asks.
Stage 2 trains everything. Unlike the paper, learning rates follow the size of the student, and the
text is the data itself unless the teacher answers first (--pseudo_labels).
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

# The default run's tensors are small: OpenMP's threads would spin for one another most of the time,
# and for long where another program keeps a core busy.
if not os.path.exists("/dev/nvidia0") and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "300")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import mil
from generate import (
    Decoder,
    flag,
    generate,
    load_tokenizer,
    parse_flags,
    pick_device,
    run_command,
    save_with_tokenizer,
    tokenizer_of,
)
from mil import MilError, read_json

# --------------------------------------------------------------------------------------------------
# Settings. A size left out depends on the device: minutes on two CPU cores, or on one GPU.

SIZES = ("n_layers", "d", "n_heads", "n_kv_heads", "d_ff")
PRESETS = {
    "cpu": dict(n_layers=4, d=128, n_heads=4, n_kv_heads=2, d_ff=384, context=256, batch=8)
    | dict(teacher_steps=700, stage1_steps=180, stage2_steps=100, eval_sequences=64),
    "cuda": dict(n_layers=8, d=512, n_heads=8, n_kv_heads=4, d_ff=1408, context=512, batch=64)
    | dict(teacher_steps=1500, stage1_steps=400, stage2_steps=200, eval_sequences=256),
}


def sized(name, help):
    cpu, cuda = PRESETS["cpu"][name], PRESETS["cuda"][name]
    return flag(None, f"{help} (default {cpu} on cpu, {cuda} on cuda)")


def switch(help):
    return flag(False, help, action="store_true")


def paths(help):
    return flag([], help, nargs="+", action="extend", metavar="path")


@dataclass
class Settings:
    out: str = flag(
        "out", "folder for teacher/, student/, log.jsonl, results.json and what --resume needs"
    )
    data: list = paths("text, folders, or .jsonl (default: the sources of Python's library)")
    pairs: list = paths(".jsonl of prompt, chosen, rejected: adds stage 3, preferences (DPO)")
    tokenizer: str = flag("", "as generate.py has it; empty: the teacher's, or bytes")
    pseudo_labels: bool = switch("the student learns the teacher's answers to the data's prompts")
    answers: int = flag(0, "with --pseudo_labels: how many answers; 0: one for each prompt")
    answer_tokens: int = flag(0, "the longest answer (default: three quarters of --context)")
    teacher: str = flag("", "a checkpoint, or a name at huggingface.co; empty: train one")
    n_layers: int = sized("n_layers", "the new teacher's layers")
    d: int = sized("d", "its width")
    n_heads: int = sized("n_heads", "its query heads, each d / n_heads wide")
    n_kv_heads: int = sized("n_kv_heads", "its key and value heads")
    d_ff: int = sized("d_ff", "the inner width of its MLPs; 8/3 of d, in multiples of 128")
    rope_theta: float = flag(10000.0, "its base of RoPE's frequencies")
    teacher_steps: int = sized("teacher_steps", "its training steps")
    teacher_lr: float = flag(3e-3, "its peak learning rate")
    mixer: str = flag("mamba2", "what replaces attention: mamba, mamba2, or none (an ablation)")
    keep: float = flag(0.5, "share of attention layers that stay")
    init: str = flag("attention", "new mixers inherit W_q, W_k, W_v, W_o; or random")
    init_from: str = flag("", "another Llama that the student begins as; empty: the teacher")
    student_layers: str = flag("", "a small student of these layers of the teacher, say 0,10,31")
    recipe: str = flag("", 'a .json list, say [{"keep": 0.5, "steps": 900}, {"trains": "all"}]')
    stage1_steps: int = sized("stage1_steps", "steps of stage 1, in all")
    stage2_steps: int = sized("stage2_steps", "steps of stage 2; 0: none")
    stage3_steps: int = flag(0, "steps of stage 3; 0: every pair once")
    stage1_lr: float = flag(0.0, "peak rate (default 8e-5 · √(8e9 / parameters), at most 3e-3)")
    stage2_lr: float = flag(0.0, "of stage 2 (default 2e-5 · √(8e9 / parameters), at most 1e-3)")
    stage3_lr: float = flag(1e-5, "of stage 3 (paper: 5e-7)")
    alpha: float = flag(1.0, "α, the weight of the cross-entropy")
    beta: float = flag(1.0, "β, the weight of the KL (paper: 0.1)")
    dpo_beta: float = flag(0.1, "β of the preferences (paper: 0.01 to 0.1)")
    temperature: float = flag(1.0, "τ of the KL, of both distributions")
    reverse: bool = switch("KL(student ‖ teacher) in place of KL(teacher ‖ student)")
    context: int = sized("context", "tokens in a sequence; the longest text attention can read")
    batch: int = sized("batch", "sequences in a step, over all processes")
    accumulate: int = flag(1, "parts that a step's batch is cut into: less memory, the same result")
    schedule: str = flag("cosine", "the rate after the warm-up: cosine or linear to 0, constant")
    warmup: float = flag(0.05, "share of a stage's steps in which the rate rises")
    clip: float = flag(1.0, "largest gradient norm (paper: 0.1)")
    eval_sequences: int = sized("eval_sequences", "validation sequences in an evaluation")
    seed: int = flag(0, "of initial values and of the order of the data")
    device: str = flag("", "cpu, cuda, cuda:1 …; empty: cuda if there is one")
    dtype: str = flag("", "of the arithmetic, bfloat16 or float32 (default: bfloat16 on cuda)")
    compile: bool = flag(
        True, "on a GPU, torch.compile every layer", action=argparse.BooleanOptionalAction
    )
    memory_budget: float = flag(1.0, "share of activations kept; 0.7: a fifth less memory")
    save_minutes: float = flag(10.0, "minutes between checkpoints; one comes at SIGTERM, Ctrl-C")
    resume: bool = switch("go on from the checkpoint in --out, or begin")
    prompt: str = flag("def ", "for the sample at the end")


GROUPS = {  # in --help, by the first flag of each
    "out": "files",
    "teacher": "the teacher",
    "mixer": "the student and its stages",
    "context": "training",
    "device": "the machine",
}
# Flags that may change when a run is resumed.
FREE = """out device resume save_minutes compile memory_budget prompt accumulate
    recipe"""
CHOICES = {
    "mixer": mil.MIXERS[1:],
    "init": ("attention", "random"),
    "dtype": ("float32", "bfloat16"),
    "schedule": ("cosine", "linear", "constant"),
    "trains": ("mixers", "mlps", "all"),
}
LIMITS = {  # the least and the most
    (0, math.inf): """alpha beta steps stage2_steps stage3_steps answers save_minutes
        lr teacher_lr stage1_lr stage2_lr stage3_lr""",
    (1, math.inf): """n_layers d n_heads n_kv_heads d_ff rope_theta teacher_steps stage1_steps
        batch accumulate eval_sequences""",
    (2, math.inf): "context",
    (1e-6, math.inf): "clip temperature dpo_beta",
    (1e-6, 1): "memory_budget",
    (0, 1): "keep warmup",
    (0, 2**63 - 2): "seed",
}


def check(of, where):
    """Raises MilError if a value of Settings or of a Stage is not allowed."""
    kinds = {f.name: f.type for f in dataclasses.fields(of)}
    for name, allowed in CHOICES.items():
        if name in kinds and getattr(of, name) not in allowed:
            wanted = f"expected one of {', '.join(allowed)}"
            raise MilError(f"{where}{name} is {getattr(of, name)!r}, {wanted}")
    for (least, most), names in LIMITS.items():
        wanted = f"{least:g} to {most:g}".replace("to inf", "or more")
        for name in filter(kinds.get, names.split()):
            value = getattr(of, name)
            number = isinstance(value, (int, kinds[name])) and value != math.inf
            fits = number and least <= value <= most
            if not fits and (name, value) != ("keep", None):
                raise MilError(f"{where}{name} is {value!r}, expected {wanted}")
    if of.alpha == of.beta == 0:
        raise MilError(f"{where}alpha is 0, and so is beta: nothing would be learned")


def chosen_layers(s):
    """The numbers in --student_layers."""
    with mil.naming("--student_layers", f"expected numbers such as 0,{s.n_layers - 1}"):
        layers = [int(i) for i in s.student_layers.split(",")]
        mil.check_layers(layers, s.n_layers)
    return layers


def complete(s, device, teacher=None):
    """Sets what was left to the device, or to the teacher, whose Config is given if it is ready."""
    defaults = dict(PRESETS[device.type])
    if teacher is not None:
        defaults |= {name: getattr(teacher, name) for name in SIZES}
        defaults["context"] = min(defaults["context"], teacher.context)
    elif s.d is not None:
        defaults["d_ff"] = math.ceil(s.d * 8 / 3 / 128) * 128
    for name, default in defaults.items():
        if getattr(s, name) is None:
            setattr(s, name, default)
        if teacher is not None and name in SIZES and getattr(s, name) != default:
            wanted = f"but the teacher in {s.teacher} has {default}; leave it out"
            raise MilError(f"--{name} is {getattr(s, name)}, {wanted}")
    s.dtype = s.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    check(s, "--")
    s.answer_tokens = s.answer_tokens or max(1, s.context * 3 // 4)
    check_flags(s, device, teacher)


def check_flags(s, device, teacher):
    """Raises MilError if flags do not go together, or with the teacher's Config, if it is ready."""
    compiled = s.compile and device.type == "cuda"
    longest = teacher.context if teacher else s.context
    odd = sorted(set(teacher.mixers) - {"attention"}) if teacher else []
    mil.refuse(
        (not s.out, "out is empty, expected a folder to write to"),
        (not s.prompt, "prompt is empty, expected some text"),
        (s.context > longest, f"context is {s.context}, but --teacher was trained for {longest}"),
        (s.stage3_steps and not (s.pairs or s.recipe), "stage3_steps needs --pairs"),
        (s.answers and not s.pseudo_labels, "answers needs --pseudo_labels"),
        (not 0 < s.answer_tokens < s.context, "answer_tokens: expected 1 to --context - 1"),
        (s.memory_budget < 1 and not compiled, "memory_budget needs compiled layers, on a GPU"),
        (s.recipe and s.keep != Settings.keep, "recipe says what is replaced; leave out --keep"),
        (s.student_layers and s.init_from, "student_layers and --init_from: leave one out"),
        (s.student_layers and s.recipe, "student_layers and --recipe: leave one out"),
        (not teacher and s.d % (2 * s.n_heads), "d: expected a multiple of twice --n_heads"),
        (odd, f"teacher {s.teacher}: holds {', '.join(odd)}; expected attention in every layer"),
        where="--",
    )


# --------------------------------------------------------------------------------------------------
# Stages


@dataclass
class Stage:
    """A stage of a run, and an entry of a --recipe: what one leaves out is as the flags say."""

    keep: float = None  # the share of attention left from its beginning on
    replace: list = field(default_factory=list)  # or the layers that lose theirs
    mixer: str = "mamba2"  # what they get
    trains: str = "mixers"  # those that replaced attention so far; mlps: these and all MLPs; all
    loss: str = "distill"  # Eq. 2; or dpo, Eq. 4, of pairs
    alpha: float = 1.0
    beta: float = 1.0
    temperature: float = 1.0
    reverse: bool = False
    data: list = field(default_factory=list)  # in place of --data and its answers; dpo: of --pairs
    steps: int = 0
    lr: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.05
    name: str = ""
    mixers: list = field(default_factory=list)  # the student's, by `resolve`

    def learns(self, name):
        """Whether the student's parameter of this name is trained."""
        new = ".mixer." in name and self.mixers[int(name.split(".")[1])] != "attention"
        return self.trains == "all" or new or (self.trains == "mlps" and ".mlp." in name)

    def rate(self, step):
        """The learning rate: rises during the warm-up, then follows the schedule."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        left = (self.steps - step) / (self.steps - rising)  # from 1 to almost 0
        cosine = 0.5 * (1 - math.cos(math.pi * left))
        return self.lr * {"cosine": cosine, "linear": left, "constant": 1}[self.schedule]


def read_recipe(path):
    """The entries of a --recipe. Raises MilError if they are not those of stages."""
    with mil.naming(f"--recipe {path}", "expected a list of stages in JSON"):
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        for entry in entries:
            Stage(**entry)
        if not entries:
            raise ValueError("it is empty")
    return entries


def paper_stages(s, n):
    """The paper's stages for n layers, as entries of a recipe: stage 1 in steps, then stage 2."""
    everything = dict(trains="all", steps=s.stage2_steps)
    if s.student_layers or s.mixer == "none":  # the mixers alone could not mend it
        return [everything | dict(keep=s.keep, steps=s.stage1_steps + s.stage2_steps)]
    keeps = [keep for keep in (0.75, 0.5, 0.25, 0.125, s.keep) if keep >= s.keep]
    counts = sorted({len(mil.interleaved_layers(n, keep)) for keep in keeps} - {0})
    mil.refuse(
        (not counts, f"keep {s.keep:g} of {n} layers replaces none"),
        (n in counts and s.keep > 0, f"keep {s.keep:g} of {n} layers keeps none; expected 0"),
        (s.stage1_steps < len(counts), f"stage1_steps: expected {len(counts)} or more"),
        where="--",
    )
    ends = [s.stage1_steps * i // len(counts) for i in range(len(counts) + 1)]
    stages = [
        dict(trains="mixers", keep=1 - c / n, steps=b - a)
        for c, a, b in zip(counts, ends, ends[1:], strict=False)
    ]
    return stages + [everything] * (s.stage2_steps > 0)


def count_of(config):
    """How many parameters a model has."""
    return sum(w.numel() for w in mil.empty_model(config).parameters())


def plan(s, config):
    """The stages, --recipe's or the paper's, of a run whose student begins as a Llama `config`.

    Raises MilError if a stage cannot be.
    """
    entries = read_recipe(s.recipe) if s.recipe else paper_stages(s, config.n_layers)
    if s.pairs and not any(entry.get("loss") == "dpo" for entry in entries):
        entries.append(dict(loss="dpo"))
    size = math.sqrt(8e9 / count_of(config))
    first, second = min(3e-3, 8e-5 * size), min(1e-3, 2e-5 * size)
    names = ("mixer", "alpha", "beta", "temperature", "reverse", "schedule", "warmup")
    flags = {name: getattr(s, name) for name in names}
    where = f"--recipe {s.recipe}: " if s.recipe else "--student_layers: " * bool(s.student_layers)
    stages = []
    for i, entry in enumerate(entries, 1):
        trains = entry.get("trains", "mixers" if {"keep", "replace"} & entry.keys() else "all")
        rest = dict(steps=s.stage1_steps, lr=s.stage1_lr or first)
        if trains == "all":
            rest = dict(steps=s.stage2_steps, lr=s.stage2_lr or second)
        if entry.get("loss") == "dpo":
            trains = entry.get("trains", "all")
            rest = dict(steps=s.stage3_steps, lr=s.stage3_lr, beta=s.dpo_beta, data=s.pairs)
        stages.append(Stage(**flags | rest | {"trains": trains} | entry))
        with refused(f"{where}stage {i}: "):
            check(stages[-1], "")
    return resolve(stages, config, where)


def layers_to_replace(stage, mixers, final):
    """The layers that lose attention, of the `final` ones by preference, evenly spread."""
    if stage.keep is None:
        return stage.replace
    done = [i for i, mixer in enumerate(mixers) if mixer != "attention"]
    count, n = len(mil.interleaved_layers(len(mixers), stage.keep)), len(mixers)
    mil.refuse(
        (stage.replace, "keep and replace: expected one of them"),
        (count == n and stage.keep > 0, f"keep is less than 1 of {n} layers; expected 0 or more"),
        (
            count < len(done),
            f"keep is {stage.keep:g}, but only {n - len(done)} of {n} layers are left",
        ),
    )
    even = [final[j * len(final) // count] for j in range(count)]
    free = [i for i in dict.fromkeys(even + final) if i not in done]
    return sorted(free[: count - len(done)])


def resolve(stages, config, where):
    """Works out the `mixers` and the name of each stage. Raises MilError if one cannot be.

    Layers are spread evenly at every step: half of 32 in two steps is 0, 4, 8 … then 2, 6, 10 …
    """
    mixers, n = list(config.mixers), config.n_layers
    shares = [stage.keep for stage in stages if stage.keep is not None]
    final = mil.interleaved_layers(n, min(shares, default=1))
    count = collections.Counter()
    for i, stage in enumerate(stages, 1):
        with refused(f"{where}stage {i}: "):
            replace = layers_to_replace(stage, mixers, final)
            if replace:
                mil.check_layers(sorted(replace), n)
            odd = [k for k in replace if mixers[k] != "attention"]
            mixers = [stage.mixer if k in replace else mixer for k, mixer in enumerate(mixers)]
            dataclasses.replace(config, mixers=mixers)  # refuses heads that cannot be cut
            stage.mixers = mixers
            dpo = stage.loss == "dpo"
            bare = stage.trains == "mixers" and set(mixers) <= {"attention", "none"}
            mil.refuse(
                (stage.loss not in LOSSES, f"loss is {stage.loss!r}, not {', '.join(LOSSES)}"),
                (isinstance(stage.data, str), f"data is {stage.data!r}, expected a list of paths"),
                (odd, f"replaces layer {odd and odd[0]} twice"),
                (dpo and not stage.data, "has the loss dpo and no data (--pairs)"),
                (dpo and not stage.beta, "beta is 0: nothing would be learned"),
                (not dpo and stage.steps < 1, f"steps is {stage.steps}, expected 1 or more"),
                (bare, "trains the mixers, and there is none to train; expected keep or replace"),
            )
        replaced = n - mixers.count("attention")
        name = "stage 3, preferences" if dpo else "stage 2, all parameters"
        if not dpo and stage.trains != "all":
            name = "stage 1"
        count[name] += 1
        if name == "stage 1":
            name = f"stage 1.{count[name]}, {replaced} of {n} layers replaced"
        elif count[name] > 1:
            name += f" ({count[name]})"
        stage.name = stage.name or name
    return stages


@contextlib.contextmanager
def refused(where):
    """Puts `where` before the message of an error inside; a recipe may hold values of any type."""
    try:
        yield
    except (MilError, TypeError) as e:
        raise MilError(f"{where}{e}") from None


# --------------------------------------------------------------------------------------------------
# Data: files -> documents -> tokens, in training and validation


def standard_library():
    """The .py files of Python's own library, without tests and installed packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def find_files(paths, out, flag="--data"):
    """The files of `paths` and in its folders, but hidden ones and those in the folder `out`."""
    files, out = [], Path(out).resolve()
    for path in map(Path, paths):
        if not path.exists():
            raise MilError(f"{flag} {path}: no such file or folder")
        inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
        inside = [p for p in inside if "/." not in f"/{p.relative_to(path).as_posix()}"]
        inside = [p for p in inside if out not in p.resolve().parents]
        if path.is_dir() and not inside:
            raise MilError(f"{flag} {path}: no files here (hidden ones and --out are not read)")
        files += inside or [path]
    return files


def read_text(file, named, flag="--data"):
    """The text of a file; "" if it is not UTF-8 and not `named` by the user."""
    with mil.naming(f"{flag} {file}"):
        data = file.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("utf-8-sig")
        if "\0" not in text:
            return text
    if named:
        raise MilError(f"{flag} {file}: not UTF-8 text")
    return ""


def plain_messages(messages):
    """Messages with text for content (its parts joined); [] if they are not messages."""
    plain = []
    for m in messages if isinstance(messages, list) else []:
        content = m.get("content") if isinstance(m, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str) or not isinstance(m.get("role"), str):
            return []
        if m["role"] not in ("system", "user", "assistant", "tool"):
            raise MilError(f"has the role {m['role']!r}, expected system, user, assistant or tool")
        plain.append({"role": m["role"], "content": content})
    return plain


def document_of(record):
    """A record's list of messages, its (prompt, completion) or its text."""
    messages = plain_messages(record.get("messages"))
    pair = record.get("prompt"), record.get("completion")
    if messages:
        return messages
    if all(isinstance(text, str) for text in pair):
        return pair
    if isinstance(record.get("text"), str):
        return record["text"]
    wanted = "text, messages (of role and content), or prompt and completion"
    raise MilError(f"has {', '.join(record) or 'no keys'}; expected {wanted}")


def parsed(text):
    """The value of a text in JSON, or None."""
    with contextlib.suppress(ValueError):
        return json.loads(text)


def records_of(file, text):
    """The JSON records of a file with their places: one a line or, in a .json, one list of all.

    [] if the file is text, as a .json is that does not begin with a record.
    """
    kind = file.suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".json"):
        return []
    whole = parsed(text) if kind == ".json" else None
    if isinstance(whole, list):
        records = [(f"record {i}", record) for i, record in enumerate(whole, 1)]
    else:
        lines = text.split("\n") if whole is None else []
        records = [(f"line {i}", parsed(line)) for i, line in enumerate(lines, 1) if line.strip()]
    begins = bool(records) and isinstance(records[0][1], dict)
    return records if begins or kind != ".json" else []


def read_documents(file, named, flag="--data", read=document_of):
    """The documents of a file: read(record) of its records, or its text if it has none."""
    text, documents = read_text(file, named, flag), []
    for where, record in records_of(file, text):
        with refused(f"{flag} {file}: {where}: "):
            if not isinstance(record, dict):
                raise MilError("is not a JSON object")
            documents.append(read(record))
    return documents or [text] * bool(text.strip())


def document_tokens(encoding, document):
    """Token ids of a document; ~id, below 0, where a token is read and not learned."""
    if isinstance(document, list):
        return [i if own else ~i for i, own in zip(*encoding.conversation(document), strict=True)]
    end = encoding.stops[:1]
    if isinstance(document, str):
        return encoding.encode(document) + end
    prompt, completion = document
    learned = encoding.encode(completion, begin=False) + end
    return [*(~i for i in encoding.encode(prompt)), *learned]


class Corpus(NamedTuple):
    train: np.ndarray  # token ids as document_tokens has them, of all documents
    val: np.ndarray
    begins: list  # where the documents of each begin
    key: str  # a digest of what it was made from
    about: str  # a line for the reader


def digest(files, *more):
    """A name for the contents of these files, and for `more`."""
    sums = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(json.dumps([sums, *more]).encode()).hexdigest()[:16]


def checkpoint_digest(place):
    """A name for a checkpoint: its files' sizes and times, since reading them may take minutes."""
    about = mil.read_config(place)
    stats = [os.stat(about["folder"] / name) for name in about["weights"]]
    return digest([], [(stat.st_size, stat.st_mtime_ns) for stat in stats])


def split(documents):
    """(training, validation): every twentieth document or, of fewer than ten, the ends of all."""
    if len(documents) < 10:
        first = [d[: len(d) * 9 // 10] for d in documents]
        return first, [d[len(d) * 9 // 10 :] for d in documents]
    return [d for i, d in enumerate(documents) if i % 20 != 9], documents[9::20]


def documents_in(s, paths):
    """The documents of --data, by default Python's library. Raises MilError if there are none."""
    files, named = find_files(paths, s.out) or standard_library(), set(map(Path, paths))
    documents = [d for file in files for d in read_documents(file, file in named)]
    if not documents:
        given = " ".join(map(str, paths))
        raise MilError(f"--data {given}: no text found, the files are empty or not UTF-8")
    return documents


def load_corpus(s, paths, encoding, tokenizer):
    """The Corpus of these files, tokenised once: it is kept in out/data."""
    files = find_files(paths, s.out) or standard_library()
    key = digest(files, list(map(str, files)), repr(encoding.vocabulary), encoding.template)
    place = Path(s.out) / "data" / f"{key}.npz"
    if not place.exists():
        documents, tokens = documents_in(s, paths), []
        for i, document in enumerate(documents, 1):
            tokens.append(np.array(document_tokens(encoding, document), dtype=np.int32))
            if i % 500 == 0:
                show(f"tokenising: {i} of {len(documents)} documents", done=False)
        train, val = map(joined, split(tokens))
        mil.make_directory(place.parent)
        mil.write_whole(place, lambda f: np.savez(f, *train, *val))
    train, train_begins, val, val_begins = np.load(place).values()
    source = f"{len(files)} files ({tokenizer})"
    return new_corpus(s, train, val, [train_begins, val_begins], key, source)


def joined(documents):
    """Documents of token ids one after the other, and where they begin."""
    begins = np.cumsum([0, *map(len, documents)], dtype=np.int64)[:-1]
    return np.concatenate(documents).astype(np.int32), begins


def new_corpus(s, train, val, begins, key, source):
    """A Corpus. Raises MilError if it is too little."""
    for name, part in (("training", train), ("validation", val)):
        few = f"{len(part)} {name} tokens, expected more than --context {s.context}"
        mil.refuse(
            (len(part) <= s.context, f"{few}: give more text or --answers, or lower --context"),
            (not (part >= 0).any(), f"nothing to learn in the {name} part"),
            where="--data: ",
        )
    share = np.mean(train >= 0)
    learned = f" ({share:.0%} of them learned)" * bool(share < 1)
    about = f"{source}, {len(train):,} training{learned} and {len(val):,} validation tokens"
    return Corpus(train, val, begins, key, about)


def windows(data, begins, starts, length):
    """Rows of `length` tokens from `starts` on: inputs x, targets y and pos, all (b, l).

    A target is -100 where nothing is learned, as from one document to the next. pos is the place of
    an input in its document, counted from the row's beginning if that is later.
    """
    at = np.reshape(starts, (-1, 1)) + np.arange(length + 1)  # (b, l + 1)
    block = data[at].astype(np.int64)
    nth = at - begins[np.searchsorted(begins, at, "right") - 1]  # in its document
    x = np.where(block < 0, ~block, block)[:, :-1]
    y = np.where((block < 0) | (nth == 0), -100, block)[:, 1:]
    pos = np.minimum(nth, np.arange(length + 1))[:, :-1]
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(pos)


class Batch(NamedTuple):
    x: torch.Tensor  # (b, l) tokens
    y: torch.Tensor  # (b, l) targets, -100 where nothing is learned
    at: torch.Tensor | None  # places in y.flatten() that are learned; None: all
    docs: mil.Documents | None  # None: every row is one document

    def learned(self, t):
        """Of t (b, l, ...), what is at learned places (n, ...)."""
        t = t.flatten(0, 1)
        return t if self.at is None else t[self.at]

    def rows(self):
        """The row of each learned place (n,)."""
        numbers = torch.arange(len(self.x), device=self.x.device)
        return self.learned(numbers[:, None].expand_as(self.x))


def to_device(x, y, pos, device, dtype=torch.float32):
    """The Batch of x, y, pos (b, l) on `device`."""

    at = (y.flatten() >= 0).nonzero()[:, 0]
    docs = mil.Documents(pos, device, dtype) if (pos[:, 1:] == 0).any() else None
    if device.type == "cuda":
        x, y, at = (t.pin_memory().to(device, non_blocking=True) for t in (x, y, at))
    return Batch(x, y, None if len(at) == y.numel() else at, docs)


def parts_of(run, rows):
    """The rows of a step that this process takes, in --accumulate parts."""
    size = rows // (run.size * run.s.accumulate)
    firsts = [(part * run.size + run.rank) * size for part in range(run.s.accumulate)]
    return [slice(first, first + size) for first in firsts]


def training_batches(run, corpus, seed):
    """A function: step -> this process's parts of the batch, and how many tokens all learn.

    Windows are at random places, which depend on the seed and the step alone.
    """
    s, data, begins = run.s, corpus.train, corpus.begins[0]

    def batch(step):
        dice = np.random.default_rng([*seed, step])
        starts = dice.integers(0, len(data) - s.context, size=s.batch)
        x, y, pos = windows(data, begins, starts, s.context)
        rows = parts_of(run, s.batch)
        parts = [to_device(x[i], y[i], pos[i], run.device, run.dtype) for i in rows]
        return parts, int((y >= 0).sum())

    return batch


def turns(run, count, rows):
    """Shares out `count` things. Yields this process's numbers, some at a time, and how many count.
    The others are 0: FSDP2 needs all processes in every pass, compiled layers equal batches."""
    size = max(1, rows // (run.size * run.s.accumulate))
    least = size if run.compiled else 1
    for i in range(0, count, size * run.size):
        mine = list(range(i, min(i + size * run.size, count))[run.rank :: run.size])
        yield mine + [0] * (least - len(mine)), len(mine)


def evaluation_batches(run, corpus):
    """Evenly spread windows of the validation text, the same every time."""
    s, data = run.s, corpus.val
    count = min(s.eval_sequences, (len(data) - 1) // s.context)
    starts = np.linspace(0, len(data) - s.context - 1, count).astype(int)
    for mine, real in turns(run, count, s.batch):
        x, y, pos = windows(data, corpus.begins[1], starts[mine], s.context)
        y[real:] = -100
        yield to_device(x, y, pos, run.device, run.dtype)


def load_pairs(s, paths, encoding):
    """(training, validation) pairs of .jsonl files: (chosen, rejected), as document_tokens gives
    them. All pairs of a prompt are in one part."""
    pairs, where = {}, "--pairs" if paths == s.pairs else "--recipe: data"
    for file in find_files(paths, s.out, where):
        for talks in read_documents(file, True, where, pair_of):
            if isinstance(talks, str):
                raise MilError(f"{where} {file}: is text, expected .jsonl of pairs")
            ids = [document_tokens(encoding, talk) for talk in talks]
            asked = json.dumps(talks[0][:-1])
            pairs.setdefault(asked, []).append([last_answer(i, s.context + 1) for i in ids])
    groups = list(pairs.values())
    train, held = (list(itertools.chain(*part)) for part in split(groups))
    if len(pairs) < 10 or len(train) < s.batch // 2:
        wanted = f"expected 10 at least, and half of --batch {s.batch} pairs to train on"
        raise MilError(f"{where}: pairs for {len(pairs)} different prompts; {wanted}")
    return train, held


def pair_of(record):
    """The chosen and the rejected conversation of a record. Each part may be text or messages."""
    said = []
    for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        part = record.get(key)
        if isinstance(part, str):
            part = [{"role": role, "content": part}]
        said.append(plain_messages(part))
    prompt, *answers = said
    for i, answer in enumerate(answers):
        if answer and answer[0]["role"] == "assistant":  # other messages repeat the prompt
            answers[i] = prompt + answer
    chosen, rejected = answers
    same = len(chosen) > 1 and chosen[:-1] == rejected[:-1]
    if not same or not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in record.items())
        wanted = "a prompt and two answers to it, chosen and rejected, each a text or messages"
        raise MilError(f"has {kinds or 'no keys'}; expected {wanted}")
    return chosen, rejected


def last_answer(ids, most):
    """At most `most` ids of a conversation, of which only the last answer is learned. Of a prompt
    that leaves it too little room the end is kept, at least half (the paper: 512 of 1,024)."""
    learned = [i for i, token in enumerate(ids) if token >= 0]
    begin = max((i for i in learned if ids[i - 1] < 0), default=len(ids))
    kept = min(begin, max(most // 2, most - (len(ids) - begin)))
    prompt = [min(i, ~i) for i in ids[begin - kept : begin]]
    return [*prompt, *ids[begin:]][:most]


def pair_batch(run, pairs):
    """The Batch of some pairs: rows of the chosen, then of the rejected, padded on the right."""
    rows = [torch.tensor(ids) for side in zip(*pairs, strict=True) for ids in side]
    # -1 is ~0, a token that is not learned
    block = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    x = torch.where(block < 0, ~block, block)[:, :-1]
    y = block.masked_fill(block < 0, -100)[:, 1:]
    pos = torch.arange(x.shape[1]).expand(x.shape)
    return to_device(x, y, pos, run.device, run.dtype)


def pair_batches(run, pairs, seed):
    """As training_batches, counting pairs: each once, in random order, then again in another."""
    count, n = run.s.batch // 2, len(pairs)

    def batch(step):
        first, last = step * count // n, ((step + 1) * count - 1) // n  # epochs
        orders = [np.random.default_rng([*seed, e]).permutation(n) for e in range(first, last + 1)]
        mine = np.concatenate(orders)[step * count - first * n :][:count]
        parts = [[pairs[i] for i in mine[part]] for part in parts_of(run, count)]
        return [pair_batch(run, part) for part in parts], count

    return batch


# --------------------------------------------------------------------------------------------------
# Pseudo-labels: the teacher's answers to the prompts in the data (sequence-level distillation)


def prompts_of(s, paths, encoding):
    """What the training documents ask, as (messages or text, token ids): of messages those before
    the first answer; of a text, the first quarter of every --context of its tokens."""
    most = s.context - s.answer_tokens  # room for the answer
    documents = documents_in(s, paths)
    few = len(documents) < 10
    del documents[9::20]  # what split holds out
    for document in documents:
        if isinstance(document, list):
            asked = list(itertools.takewhile(lambda m: m["role"] != "assistant", document))
            if asked and asked[-1]["role"] == "user":
                ids, _ = encoding.conversation(asked, reply=True)
                yield asked, ids[-most:]
        elif isinstance(document, str):
            ids, quarter = encoding.encode(document), s.context // 4
            ids = ids[: len(ids) * 9 // 10] if few else ids
            starts = range(0, max(1, len(ids) - quarter + 1), s.context)
            for part in filter(None, [ids[i : i + quarter] for i in starts]):
                yield encoding.decode(part), part
        elif document[0]:
            yield document[0], encoding.encode(document[0])[-most:]


def answered(run, paths, place, encoding, tokenizer):
    """A Corpus of the answers of the teacher in `place`; its validation part is that of `paths`.

    Answers are sampled in batches of one seed each. Each batch is a file in out/data, and what is
    there is not made again.
    """
    s, rows = run.s, min(64, run.s.batch)
    with in_turn(run):
        corpus = load_corpus(s, paths, encoding, tokenizer)
    asked = s.seed, s.answers, s.answer_tokens, s.context, s.dtype, rows
    key = digest([], checkpoint_digest(place), corpus.key, asked)
    folder = Path(s.out) / "data" / f"{key}.answers"
    prompts = list(itertools.islice(prompts_of(s, paths, encoding), s.answers or None))
    if not prompts:
        raise MilError("--pseudo_labels: nothing in --data is a prompt")
    mil.make_directory(folder)
    batches = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
    files = [folder / f"{number:06}.jsonl" for number in range(len(batches))]
    answer(run, batches, files, place, encoding)
    together(run)
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    train, begins = joined([json.loads(line)["tokens"] for line in lines])
    source = f"the teacher's answers, {folder} ({tokenizer})"
    return new_corpus(s, train, corpus.val, [begins, corpus.begins[1]], key, source)


def answer(run, batches, files, place, encoding):
    """Answers those of this process's batches of prompts that have no file yet."""
    missing = [i for i in range(len(files))[run.rank :: run.size] if not files[i].exists()]
    if not missing:
        return
    teacher, decoder = mil.pack(mil.load(place, run.device, run.dtype)), None
    generator, began, made = torch.Generator(run.device), time.perf_counter(), 0
    for turn, i in enumerate(missing, 1):
        batch, seed = batches[i], (run.s.seed * 2**20 + i) % 2**63
        generator.manual_seed(seed)
        if decoder is None or len(batch) != len(batches[0]):  # the last may be smaller
            decoder = Decoder(teacher, len(batch), run.s.context, generator=generator)
        prompts = [ids for _, ids in batch]
        rounds = list(decoder.decode(prompts, run.s.answer_tokens, encoding.stops))
        replies = [list(itertools.chain(*row)) for row in zip(*rounds, strict=True)]
        lines = ""
        for (asked, ids), reply in zip(batch, replies, strict=True):
            said = encoding.decode([token for token in reply if token not in encoding.stops])
            record = {"prompt": asked, "completion": said}
            if isinstance(asked, list):
                record = {"messages": [*asked, {"role": "assistant", "content": said}]}
            tokens = [*(~token for token in ids), *reply]
            lines += json.dumps(record | {"seed": seed, "tokens": tokens}) + "\n"
        mil.write_whole(files[i], lambda f, lines=lines: f.write(lines.encode()))
        if run.stop:
            leave(run)  # alone: the others may have no more to do
        made += sum(map(len, replies))
        seconds = time.perf_counter() - began
        left = timedelta(seconds=int(seconds / turn * (len(missing) - turn)))
        told = f"answers: batch {turn} of {len(missing)}  {made / seconds:,.0f} tokens/s"
        show(f"{told}  ETA {left}", done=turn == len(missing))


# --------------------------------------------------------------------------------------------------
# Losses

LOGITS = {"cpu": 2**22, "cuda": 3 * 2**26}  # the most logits at once: 1,536 tokens of 131,072 words


def chunks(hidden, head, teacher_hidden, teacher_head):
    """(slice, student's logits, teacher's or None), a few tokens at a time. hidden (n, d), head
    (v, d); the teacher's may be wider."""
    head = head.to(hidden.dtype)
    if teacher_hidden is not None:
        teacher_head = teacher_head.to(teacher_hidden.dtype)
    size = max(1, LOGITS[hidden.device.type] // len(head))
    for i in range(0, len(hidden), size):
        at = slice(i, min(i + size, len(hidden)))
        theirs = None if teacher_hidden is None else teacher_hidden[at] @ teacher_head.T
        yield at, hidden[at] @ head.T, theirs


def losses_and_gradient(logits, wanted, targets, alpha, beta, tau, reverse, gradient):
    """token_losses in plain PyTorch. A compiler takes reverse, gradient and None as constants."""
    learned = targets >= 0
    x = mil.wider(logits)
    log_q = x.log_softmax(-1)
    ce = -log_q.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    kl = torch.zeros_like(ce)
    if gradient:
        hit = torch.arange(x.shape[1], device=x.device) == targets[:, None]  # (n, v)
        dx = alpha[:, None] * (log_q.exp() - hit.to(x.dtype))
    if wanted is not None:
        w = mil.wider(wanted)
        if tau != 1:  # Inductor needs one more pass over scaled logits
            w, log_q = w / tau, (x / tau).log_softmax(-1)
        log_p = w.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        left, far = (q, log_q - log_p) if reverse else (p, log_p - log_q)
        kl = torch.where(left > 0, left * far, 0).sum(-1)
        if gradient:
            d_kl = torch.where(q > 0, q * (far - kl[:, None]), 0) if reverse else q - p
            dx = dx + tau * beta[:, None] * d_kl
    dx = torch.where(learned[:, None], dx, 0).to(logits.dtype) if gradient else None
    return torch.where(learned, ce, 0), torch.where(learned, tau**2 * kl, 0), dx


@functools.cache
def compiled_losses():
    return torch.compile(losses_and_gradient)


@torch.no_grad()
def token_losses(
    logits, wanted, targets, alpha, beta, temperature=1.0, reverse=False, gradient=False
):
    """Cross-entropy with the target and KL divergence from the teacher, in nats, of each token.

        ce = -log softmax(logits)[target]
        kl = τ² KL(softmax(wanted / τ) ‖ softmax(logits / τ)), with `reverse` the other way round

    logits (n, v); wanted (n, v), or None: then kl is 0. alpha, beta and targets (n,); where the
    target is negative nothing is learned, and all results are 0. Returns ce and kl (n,), in float32
    or, if the logits are, in float64; and with `gradient` the gradient of Σ alpha ce + beta kl with
    respect to the logits, in their type, otherwise None. What has probability 0 on the left of the
    ‖ adds nothing, whatever it has on the right.
    """
    formula = losses_and_gradient
    if logits.is_cuda:
        formula = compiled_losses()
        for t in (logits, wanted, targets, alpha, beta):
            if t is not None:
                torch._dynamo.maybe_mark_dynamic(t, 0)  # another number of tokens compiles nothing
    return formula(logits, wanted, targets, alpha, beta, temperature, reverse, gradient)


def add_product(total, a, b):
    """total += a b; of bf16 matrices on a GPU in float32 throughout (torch 2.8)."""
    mixed = hasattr(torch.ops.aten.mm, "dtype") and a.is_cuda and a.element_size() == 2
    if mixed and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


class DistillationLoss(torch.autograd.Function):
    """Σ alpha·CE + beta·KL over n tokens, and CE and KL (n,) as token_losses has them.

    hidden (n, d) and head (v, d), teacher_hidden, None: no teacher, and teacher_head; targets,
    alpha, beta (n,). Logits of a few tokens only are in memory: their gradient is made in forward.
    """

    @staticmethod
    def forward(
        ctx, hidden, head, teacher_hidden, teacher_head, targets, alpha, beta, tau, reverse
    ):
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        wide = torch.promote_types(head.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=wide) if needs_head else None
        ce, kl, weight = torch.empty_like(alpha), torch.empty_like(alpha), head.to(hidden.dtype)
        for at, logits, theirs in chunks(hidden, weight, teacher_hidden, teacher_head):
            how = alpha[at], beta[at], tau, reverse, needs_hidden or needs_head
            ce[at], kl[at], dx = token_losses(logits, theirs, targets[at], *how)
            if needs_hidden:
                torch.mm(dx, weight, out=d_hidden[at])
            if needs_head:
                add_product(d_head, dx.T, hidden[at])
            del logits, theirs, dx  # before the next ones are made
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(ce, kl)
        return (alpha * ce + beta * kl).sum(), ce, kl

    @staticmethod
    def backward(ctx, d, *_):
        gradients = [None if t is None else t.mul_(d) for t in ctx.saved_tensors]
        return *gradients, *[None] * 7


class Models(NamedTuple):
    teacher: mil.Hybrid | None
    student: mil.Hybrid

    def read(self, batch, teach=True):
        """What the heads read at learned places (n, d): the teacher's, None if not `teach`, and
        the student's."""
        theirs = None
        if teach and self.teacher is not None:
            with torch.no_grad():
                theirs = batch.learned(self.teacher.hidden(batch.x, docs=batch.docs))
        return theirs, batch.learned(self.student.hidden(batch.x, docs=batch.docs))


def distill(models, batch, stage, scale):
    """Eq. 2: `scale` times the sum of the loss over the batch's tokens, and of CE and of KL."""
    theirs, ours = models.read(batch, stage.beta > 0)
    weight = torch.full((len(ours),), scale, device=ours.device)
    teacher_head = models.teacher.lm_head.weight if models.teacher else None
    heads = ours, models.student.lm_head.weight, theirs, teacher_head
    how = stage.alpha * weight, stage.beta * weight, stage.temperature, stage.reverse
    loss, ce, kl = DistillationLoss.apply(*heads, batch.learned(batch.y), *how)
    return loss, torch.stack([ce.sum(), kl.sum()]).detach() * scale


def log_probabilities(batch, hidden, head):
    """The log-probability of what is learned in each row (b,)."""
    weight = torch.ones(len(hidden), device=hidden.device)
    targets = batch.learned(batch.y)
    heads = hidden.detach(), head.detach(), None, None
    _, ce, _ = DistillationLoss.apply(*heads, targets, weight, weight, 1.0, False)
    return -torch.zeros(len(batch.x), device=ce.device).index_add(0, batch.rows(), ce)


def dpo(models, batch, stage, scale):
    """Eq. 4 of pairs: `scale` times the loss, how often the chosen is preferred, and the margin."""
    theirs, ours = models.read(batch)
    head = models.student.lm_head.weight
    with torch.no_grad():
        gain = log_probabilities(batch, ours, head)
        gain = gain - log_probabilities(batch, theirs, models.teacher.lm_head.weight)
        chosen, rejected = gain.chunk(2)
        margin = stage.beta * (chosen - rejected)  # (pairs,)
    loss = -F.logsigmoid(margin).sum() * scale
    if torch.is_grad_enabled():
        # Its gradient is that of the rows' CE, weighted: a second pass, so that no logits are kept.
        slope = scale * stage.beta * torch.sigmoid(-margin)
        alpha = torch.cat([slope, -slope])[batch.rows()]
        how = batch.learned(batch.y), alpha, alpha, 1.0, False
        same, *_ = DistillationLoss.apply(ours, head, None, None, *how)
        loss = same - same.detach() + loss
    return loss, torch.stack([(margin > 0).float().sum(), margin.sum()]) * scale


LOSSES = {"distill": distill, "dpo": dpo}


@torch.no_grad()
def evaluate(run, models, corpus, encoding):
    """Two rows of the table, the teacher's and the student's, on validation text.

    Loss in nats a token, perplexity, bits per byte, KL from the teacher, and how often the
    likeliest tokens agree. Without a teacher the student is its own.
    """
    lengths = [len(encoding.bytes_of(i)) for i in range(models.student.config.v)]
    lengths = torch.tensor(lengths, device=run.device)
    total = torch.zeros(6, dtype=torch.float64, device=run.device)
    teacher = models.teacher or models.student
    for batch in evaluation_batches(run, corpus):
        theirs, ours = models.read(batch)
        targets, ones = batch.learned(batch.y), torch.ones(len(ours), device=run.device)
        theirs = ours if theirs is None else theirs
        heads = ours, models.student.lm_head.weight, theirs, teacher.lm_head.weight
        for at, logits, wanted in chunks(*heads):
            y, one = targets[at], ones[at]
            ce, kl, _ = token_losses(logits, wanted, y, one, one)
            their_ce, *_ = token_losses(wanted, None, y, one, one)
            agree = logits.argmax(-1) == wanted.argmax(-1)
            found = ce, kl, agree, their_ce, one, lengths[y]
            total += torch.stack([t.sum().double() for t in found])
    ce, kl, agree, their_ce, count, size = added_up(run, total).tolist()
    count = max(count, 1)

    def row(ce, kl, agree):
        found = {"loss": ce / count, "perplexity": math.exp(min(ce / count, 700))}
        found["bits_per_byte"] = ce / math.log(2) / max(size, 1)
        return found | {"kl": kl / count, "agreement": agree / count}

    return row(their_ce, 0.0, count), row(ce, kl, agree)


@torch.no_grad()
def preferences(run, stage, models, pairs):
    """How often the chosen answer gains more over the teacher than the rejected one, the standard
    error of that, and the margin: by how much, β times, in nats."""
    total = torch.zeros(2, device=run.device)
    filler = tuple([min(i, ~i) for i in ids] for ids in pairs[0])  # nothing of it is learned
    for mine, real in turns(run, len(pairs), run.s.batch // 2):
        batch = [pairs[i] for i in mine[:real]] + [filler] * (len(mine) - real)
        total += dpo(models, pair_batch(run, batch), stage, 1.0)[1]
    right, margin = added_up(run, total).tolist()
    n = len(pairs)
    rather = (right + 1) / (n + 2)  # a few pairs that agree are not certainty
    error = math.sqrt(rather * (1 - rather) / (n + 2))
    return {"preferred": right / n, "preferred_error": error, "margin": margin / n}


# --------------------------------------------------------------------------------------------------
# One process or many


@dataclass
class Run:
    """What every part of a run asks for."""

    s: Settings
    device: torch.device
    rank: int = 0  # of this process
    size: int = 1  # how many there are
    stop: str = ""  # the signal that asks to stop

    @property
    def compiled(self):
        return self.s.compile and self.device.type == "cuda"

    @property
    def dtype(self):
        """Of the arithmetic."""
        return getattr(torch, self.s.dtype or "float32")

    @property
    def checkpoint(self):
        return Path(self.s.out) / "checkpoint.pt"


def begin(s):
    """The Run of this process, one of several if torchrun started it."""
    if "LOCAL_RANK" not in os.environ:
        return Run(s, pick_device(s.device))
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    gpu = s.device.startswith("cuda") or not s.device and torch.cuda.is_available()
    lacks = f"process {local} finds no GPU of its own, there are {count}; lower --nproc_per_node"
    mil.refuse(
        (s.device.startswith("cuda:"), "--device: behind torchrun expected cuda or cpu"),
        (gpu and 0 < count <= local, f"{lacks}, or give --device cpu"),
    )
    device = pick_device(f"cuda:{local}" if gpu else s.device)
    long = timedelta(hours=12)  # others may wait while one tokenises or answers
    own_gpu = device if gpu else None
    dist.init_process_group("nccl" if gpu else "gloo", timeout=long, device_id=own_gpu)
    return Run(s, device, dist.get_rank(), dist.get_world_size())


def together(run):
    """Waits for all processes."""
    if run.size > 1:
        dist.barrier()


@contextlib.contextmanager
def in_turn(run):
    """Process 0 goes ahead, the others follow."""
    if run.rank:
        together(run)
    yield
    if not run.rank:
        together(run)


def added_up(run, t):
    """The sum of t over all processes."""
    if run.size > 1:
        dist.all_reduce(t)
    return t


def parameters(student):
    """The student's parameters by name; sharded ones as the shard that this process holds."""
    for module in student.modules():
        if hasattr(module, "reshard"):  # an evaluation leaves them gathered
            module.reshard()
    return dict(student.named_parameters())


def gathered(run, tensors):
    """Tensors by name, gathered one by one on the CPU of process 0; None elsewhere."""
    full = ((k, w.full_tensor() if hasattr(w, "full_tensor") else w) for k, w in tensors.items())
    return {k: w.detach().cpu() if run.rank == 0 else None for k, w in full}


def shard(run, student):
    """Shards what trains, its gradients and AdamW's state over all processes (FSDP2, as ZeRO-3).

    A layer is gathered for each forward and again for each backward pass, in float32, since a
    rounded A_log would be another model; the embedding, norm and head once. What does not train is
    on every process.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of a layer that returns a view
    mesh = dist.init_device_mesh(run.device.type, (run.size,))
    frozen = {w for w in student.parameters() if not w.requires_grad}
    for layer in student.layers:
        fully_shard(layer, mesh=mesh, ignored_params=frozen)
    fully_shard(student, mesh=mesh, ignored_params=frozen, reshard_after_forward=False)
    register_fsdp_forward_method(student, "hidden")


# --------------------------------------------------------------------------------------------------
# The training loop and its checkpoints


def show(line, done=True):
    """Prints a line, of process 0. With done=False the next line overwrites it; a file gets such a
    line every half minute."""
    if dist.is_initialized() and dist.get_rank():
        return
    live, now = sys.stdout.isatty(), time.monotonic()
    if live and not done:  # a line that wraps could not be overwritten
        line = line[: shutil.get_terminal_size().columns - 1]
    if done or live or now - show.last > 30:
        end = "" if live and not done else "\n"
        print(f"\r\033[K{line}" if live else line, end=end, flush=True)
        show.last = now


show.last = 0.0


def most_memory(device):
    """The most bytes that this process has held so far, on a GPU PyTorch's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class State:
    """How far a run is: what a checkpoint holds."""

    stage: int = 0  # 0: the teacher; i: the i-th stage
    step: int = 0  # the next one
    trained: dict = field(default_factory=dict)  # the student's tensors trained so far, float32
    moments: list = field(default_factory=list)  # AdamW's state
    seconds: float = 0.0  # trained in this stage
    before: float = 0.0  # the validation KL before it
    rows: list = field(default_factory=list)  # of the table
    settings: dict = field(default_factory=dict)
    logged: int = 0  # bytes of log.jsonl


def save_state(run, state, student, optimizer=None):
    """Writes the checkpoint; without an optimizer it is that of the next stage's beginning.

    Returns the tensors trained so far; of several processes each maps those in the file.
    """
    if optimizer is None:
        state.stage, state.step, state.seconds = state.stage + 1, 0, 0.0
    kept = {k: w for k, w in parameters(student).items() if k in state.trained or w.requires_grad}
    trained = gathered(run, kept)
    groups = optimizer.param_groups if optimizer else []
    moments = [gathered(run, optimizer.state[w]) for group in groups for w in group["params"]]
    if run.rank == 0:
        log = Path(run.s.out) / "log.jsonl"
        state.logged = log.stat().st_size if log.exists() else 0
        saved = vars(state) | {"trained": trained, "moments": moments}
        mil.write_whole(run.checkpoint, lambda f: torch.save(saved, f))
    together(run)
    return trained if run.size == 1 else read_checkpoint(run)["trained"]


def read_checkpoint(run):
    with mil.naming(run.checkpoint, "damaged; delete it, and the run begins anew"):
        return torch.load(run.checkpoint, map_location="cpu", weights_only=True, mmap=True)


def load_state(run, stages, corpus):
    """The State in the checkpoint, or a new one; None if --resume finds a finished run.

    Raises MilError if either was made with other settings, or there is a checkpoint and --resume is
    not given.
    """
    s, results = run.s, Path(run.s.out) / "results.json"
    now = settings_of(s, stages, corpus)
    if run.checkpoint.exists():
        if not s.resume:
            advice = f"--resume goes on with it, or delete {run.checkpoint}"
            raise MilError(f"--out {s.out}: holds an unfinished run; {advice}")
        state = State(**read_checkpoint(run))
        file, was = run.checkpoint, state.settings
    elif s.resume and results.exists():
        state = None
        file, was = results, read_json(results).get("made_from", {})
    else:
        if results.exists():
            show(f"note: {s.out} holds a finished run, which is replaced")
        elif s.resume:
            show(f"note: --out {s.out}: there is no checkpoint to go on from; this run begins anew")
        return State(stage=1 if s.teacher else 0, settings=now)
    other = [k for k in {**was, **now} if was.get(k) != now.get(k)]
    if other:
        found = "; ".join(f"{k} was {was.get(k)!r} and is {now.get(k)!r}" for k in other[:4])
        advice = "Give them as they were, or another --out"
        raise MilError(f"--resume: {file} was made with other settings: {found}. {advice}")
    if state:
        names = [*(stage.name for stage in stages), "the report"]
        show(f"goes on from {file}: {names[state.stage]}, after step {state.step}")
    return state


def settings_of(s, stages, corpus):
    """What a run that is resumed must have in common with the one before, as JSON reads it."""
    free = FREE.split()
    found = {f"--{k}": v for k, v in vars(s).items() if k not in free}
    found["what --data holds"] = corpus.key
    for name in ("teacher", "init_from"):
        if getattr(s, name):
            found[f"what --{name} holds"] = checkpoint_digest(getattr(s, name))
    for i, stage in enumerate(stages):
        found |= {f"stage {i}: {k}": v for k, v in vars(stage).items()}
        found[f"what the data of stage {i} hold"] = digest(find_files(stage.data, s.out))
    return json.loads(json.dumps(found))


def spread(moments, w):
    """AdamW's state of a parameter, sharded as that is."""
    found = {key: t.clone() for key, t in moments.items()}
    if hasattr(w, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        for key in ("exp_avg", "exp_avg_sq"):
            found[key] = distribute_tensor(found[key].to(w.device), w.device_mesh, w.placements)
    return found


def fit(run, state, stage, models, batches, journal, last_good):
    """Trains what of the student requires gradients, from state.step on.

    batches(step) gives this process's parts of the batch and how many tokens, or pairs, all learn.
    Raises MilError if the loss is not finite, and says `last_good`, which model is good.
    """
    s, began, saved = run.s, time.perf_counter() - state.seconds, time.monotonic()
    optimizer = new_optimizer(run, state, stage, models.student)
    every, recent = min(10, max(1, stage.steps // 100)), []
    for step in range(state.step, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        recent.append(update(run, stage, models, optimizer, *batches(step)))
        state.step, last = step + 1, step == stage.steps - 1
        # Reading the loss waits for the device, so it is not read after every step.
        if not (state.step % every == 0 or last or run.size == 1 and run.stop):
            continue
        due = not run.rank and time.monotonic() - saved >= 60 * s.save_minutes
        wishes = recent[-1].new_tensor([bool(run.stop), due])
        *values, stop, due = added_up(run, torch.cat([*recent, wishes])).tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                at = f"step {state.step + 1 - len(recent) + i // 4} of {stage.steps}"
                problem = f"the loss or its gradient became {value} at {at}; stopped. {last_good}"
                advice = f"Try a lower learning rate (this stage had {stage.lr:g})"
                raise MilError(f"{stage.name}: {problem}. {advice}")
        means = [sum(values[i::4]) / len(recent) for i in range(4)]
        state.seconds = time.perf_counter() - began
        report_step(run, state, stage, means, journal)
        recent = []
        if (due or stop) and not last:  # the end of a stage is saved with its report
            save_state(run, state, models.student, optimizer)
            saved = time.monotonic()
            if stop:
                leave(run, jointly=True)


def new_optimizer(run, state, stage, student):
    """AdamW of what trains, as state.moments left it."""
    train = [w for w in parameters(student).values() if w.requires_grad]
    how = dict(betas=(0.9, 0.98), weight_decay=0.0, fused=run.device.type == "cuda")
    optimizer = torch.optim.AdamW(train, lr=stage.lr, **how)
    if state.moments:
        moments = map(spread, state.moments, train)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(enumerate(moments)), "param_groups": groups})
        state.moments = []
    return optimizer


def update(run, stage, models, optimizer, parts, count):
    """Forward, backward, clipping, AdamW. Returns the loss, two more numbers for the log and the
    gradient's norm, of which those of all processes add up to the step's."""
    sums = torch.zeros(4, device=run.device)
    for part in parts:
        # times run.size, since FSDP2 takes the mean of the gradients
        loss, numbers = LOSSES[stage.loss](models, part, stage, run.size / max(1, count))
        loss.backward()
        sums[:3] += torch.cat([loss.detach()[None], numbers]) / run.size
    train = [w for group in optimizer.param_groups for w in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(train, run.s.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sums[3] = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm) / run.size
    return sums


def report_step(run, state, stage, means, journal):
    """A line of the log, and one on the terminal."""
    a, b = ("chosen", "margin") if stage.loss == "dpo" else ("ce", "kl")
    record = {"stage": stage.name, "step": state.step, "loss": means[0], a: means[1], b: means[2]}
    record |= {"gradient": means[3], "lr": stage.rate(state.step - 1)}
    record |= {"seconds": round(state.seconds, 2), "memory": most_memory(run.device)}
    if run.rank == 0:
        journal.write(json.dumps(record) + "\n")
        journal.flush()
    line = f"{stage.name}  step {state.step}/{stage.steps}  loss {means[0]:.4f}"
    line += f"  {a} {means[1]:.4f}  {b} {means[2]:.4f}"
    if stage.loss != "dpo":
        line += f"  {state.step * run.s.batch * run.s.context / state.seconds:,.0f} tokens/s"
    if run.device.type == "cuda":
        line += f"  {record['memory'] / 2**30:.1f} GiB"
    left = state.seconds / state.step * (stage.steps - state.step)
    show(f"{line}  ETA {timedelta(seconds=int(left))}", done=state.step == stage.steps)


def leave(run, jointly=False):
    """Ends this process as the signal asks; where all come here, all `jointly`."""
    show(f"\nstopped by {run.stop or 'a signal'}; the same command with --resume goes on from here")
    if jointly and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(130 if run.stop == "SIGINT" else 143)


def listen(run):
    """SIGTERM and Ctrl-C ask the run to stop after a step, with a checkpoint; twice, at once."""

    def heard(number, _):
        if run.stop:
            raise KeyboardInterrupt
        run.stop = signal.Signals(number).name
        if not run.rank:  # print may be what was interrupted
            line = "stops at the next logged step, with a checkpoint; a second signal stops at once"
            os.write(2, f"\n{run.stop}: {line}, without one\n".encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)


# --------------------------------------------------------------------------------------------------
# The models of a stage


def own(model, names, values):
    """Makes parameters of these names the model's own, in float32, with `values` if given."""
    for name, w in list(model.named_parameters()):
        if name in names:
            place, _, leaf = name.rpartition(".")
            new = values.get(name, w.detach())
            new = new.to(w.device, torch.promote_types(new.dtype, torch.float32), copy=True)
            setattr(model.get_submodule(place), leaf, nn.Parameter(new))
    model.tie()
    return model


def read_models(run, place):
    """The teacher in a folder, and the Llama that the student begins as: the teacher itself,
    --init_from, or some of the teacher's layers."""
    s = run.s
    dtype = None if s.dtype == "bfloat16" else torch.float32  # they only read
    teacher = mil.load(place, run.device, dtype)
    if s.init_from:
        return teacher, mil.load(s.init_from, run.device, dtype)
    return teacher, mil.keep_layers(teacher, chosen_layers(s)) if s.student_layers else teacher


def assemble(run, teacher, base, stage, number, trained):
    """The Models of a stage. The student is `base` with the stage's mixers and values `trained`.

    What trains, now or before, is the student's own, in float32; the rest are base's own tensors.
    """
    gc.collect()  # cycles of compiled and sharded layers keep an earlier stage's models in memory
    torch.manual_seed(run.s.seed + 1 + number)  # new mixers begin the same in every process
    student = mil.replace_attention(base, [], share=True)  # other modules, the same tensors
    own(student, trained, trained)  # a new mixer inherits from attention that was trained, too
    for mixer in dict.fromkeys(mixer for mixer in stage.mixers if mixer != "attention"):
        layers = [i for i, m in enumerate(stage.mixers) if m == mixer]
        student = mil.replace_attention(student, layers, mixer, run.s.init, share=True)
    for model in (teacher, base):
        if model is not None:
            model.requires_grad_(False)
    names = {k for k, _ in student.named_parameters() if k in trained or stage.learns(k)}
    own(student, names, trained)
    for name, w in student.named_parameters():
        w.requires_grad_(stage.learns(name))
    return prepare(run, Models(teacher, student))


def prepare(run, models):
    """Sets the arithmetic's type, compiles the layers, and shards the student."""
    for model in filter(None, models):
        model.compute = run.dtype
        if run.compiled:
            for layer in model.layers:
                layer.compile()
    if run.compiled:
        # All layers share one limit, and each mixer compiles a version for what of it trains, for
        # whether its input has a gradient, for evaluation, and for pairs, whose lengths vary.
        torch._dynamo.config.recompile_limit = 64
        torch._functorch.config.activation_memory_budget = run.s.memory_budget
        show("compiling the layers: the first batches take about a minute")
    if dist.is_initialized():
        shard(run, models.student)
    return models


def save_student(run, student, place, tokenizer, dtype, **notes):
    """Writes the student as a model of its own, in the type `dtype`."""
    weights = gathered(run, parameters(student))
    if run.rank == 0:
        model = mil.empty_model(student.config)
        model.load_state_dict(weights, strict=False, assign=True)  # a tied pair is there once
        model.tie()
        save_with_tokenizer(mil.cast(model, dtype), place, tokenizer, **notes)
    together(run)


# --------------------------------------------------------------------------------------------------
# The run: a teacher, the stages, the report


def new_config(s, encoding):
    """The Llama that the flags ask for."""
    sizes = {name: getattr(s, name) for name in SIZES}
    return mil.Config(v=encoding.size, context=s.context, rope_theta=s.rope_theta, **sizes)


class Job:
    """What a run reads and makes: its stages, tokenizer, text and folders."""

    def __init__(self, run):
        s = self.s = run.s
        self.run = run
        about = mil.read_config(s.teacher) if s.teacher else {}
        complete(s, run.device, about.get("config"))
        self.teacher = Path(s.teacher or Path(s.out) / "teacher")
        self.student, self.results = Path(s.out) / "student", Path(s.out) / "results.json"
        for name in ("teacher", "init_from"):
            path = getattr(s, name)
            if path and Path(path).resolve() == self.student.resolve():
                raise MilError(f"--{name} {path} is where the student goes; give another --out")
        self.tokenizer = tokenizer_of(s.teacher) if s.teacher else s.tokenizer or "bytes"
        self.encoding = load_tokenizer(self.tokenizer)
        if s.teacher and s.tokenizer:
            self.check_tokens(s.tokenizer, f"--tokenizer {s.tokenizer}")
        self.config = about.get("config") or new_config(s, self.encoding)
        self.base = self.read_base()
        how = dict(steps=s.teacher_steps, lr=s.teacher_lr, warmup=s.warmup, schedule=s.schedule)
        first = Stage(trains="all", beta=0, name="teacher", mixers=self.config.mixers, **how)
        self.stages = [first, *plan(s, self.base)]  # the first one is passed over with --teacher
        paired = any(stage.loss == "dpo" for stage in self.stages)
        rows = run.size * s.accumulate * (1 + paired)
        if s.batch % rows:
            what = "processes × --accumulate" + " × the 2 of a pair" * paired
            raise MilError(f"--batch is {s.batch}, expected a multiple of {rows}, {what}")
        for stage in self.stages:
            if stage.loss == "dpo":  # also checks its files
                pairs, _ = load_pairs(s, stage.data, self.encoding)
                stage.steps = stage.steps or max(1, len(pairs) // (s.batch // 2))
            find_files(stage.data, s.out, "--recipe: data")
        find_files(s.data, s.out)
        self.corpora = {}

    def check_tokens(self, tokenizer, what):
        if not load_tokenizer(tokenizer).same_text(self.encoding):
            raise MilError(f"{what}: has another tokenizer than the teacher ({self.tokenizer})")

    def read_base(self):
        """The Config of the Llama that the student begins as."""
        s, config = self.s, self.config
        if s.student_layers:
            mixers = ["attention"] * len(chosen_layers(s))
            return dataclasses.replace(config, n_layers=len(mixers), mixers=mixers)
        if not s.init_from:
            return config
        base = mil.read_config(s.init_from)["config"]
        mil.refuse(
            (base.v != config.v, f"has {base.v} tokens, the teacher {config.v}"),
            (set(base.mixers) != {"attention"}, "expected attention in every layer"),
            (base.context < s.context, f"has a context of {base.context}: lower --context"),
            where=f"--init_from {s.init_from}: ",
        )
        self.check_tokens(tokenizer_of(s.init_from), f"--init_from {s.init_from}")
        return base

    def corpus(self, data=(), answers=False):
        """The Corpus of --data, of a stage's own data, or of the teacher's answers."""
        key = (*data, answers)
        if key not in self.corpora:
            how, paths = (self.encoding, self.tokenizer), list(data) or self.s.data
            if answers:
                self.corpora[key] = answered(self.run, paths, self.teacher, *how)
            else:
                with in_turn(self.run):
                    self.corpora[key] = load_corpus(self.s, paths, *how)
            show(f"data: {self.corpora[key].about}")
        return self.corpora[key]


def announce(job):
    """Prints the stages."""
    s = job.s
    show(f"{'':<38}{'attention':>10}{'trained':>10}{'tokens':>10}{'lr':>9}{'α':>6}{'β':>6}")
    for number, stage in enumerate(job.stages):
        if number == 0 and s.teacher:
            continue
        config = job.base if number else job.config
        model = mil.empty_model(dataclasses.replace(config, mixers=stage.mixers))
        count = sum(w.numel() for k, w in model.named_parameters() if stage.learns(k))
        tokens, kept = stage.steps * s.batch * s.context, stage.mixers.count("attention")
        alpha = f"{stage.alpha:g}" if stage.loss == "distill" else ""
        line = f"{stage.name:<38}{f'{kept} of {config.n_layers}':>10}"
        line += f"{count / 1e6:>8,.1f} M{tokens / 1e6:>8,.1f} M{stage.lr:>9.1e}"
        show(f"{line}{alpha:>6}{stage.beta:>6g}")


def speed(run, state, stage):
    """How long a stage took, and at what rate."""
    tokens = stage.steps * run.s.batch * run.s.context
    return {"seconds": state.seconds, "tokens_per_second": tokens / max(state.seconds, 1e-9)}


def train_teacher(job, state, journal):
    """Trains a Llama on --data."""
    s, run, corpus = job.s, job.run, job.corpus()
    torch.manual_seed(s.seed)
    stage, model = job.stages[0], mil.Hybrid(job.config).to(run.device)
    models = prepare(run, Models(None, own(model, state.trained, state.trained)))
    batches = training_batches(run, corpus, [s.seed, 0])
    fit(run, state, stage, models, batches, journal, "This run saved no teacher")
    save_student(run, models.student, job.teacher, job.tokenizer, torch.float32)
    row, _ = evaluate(run, models, corpus, job.encoding)
    state.rows = [{"model": "teacher", **row, **speed(run, state, stage)}]
    state.trained = {}  # the file has it all
    models.student.requires_grad_(False)
    save_state(run, state, models.student)


def add_row(job, state, name, models, last_good, more):
    """Evaluates the student, and adds a row to the table."""
    teachers, row = evaluate(job.run, models, job.corpus(), job.encoding)
    state.rows = state.rows or [{"model": "teacher", **teachers}]
    state.rows.append({"model": name, **row, **more})
    if not math.isfinite(row["loss"]):
        problem = f"the validation loss is {row['loss']}; stopped. {last_good}"
        raise MilError(f"{name}: {problem}. Try lower learning rates")
    line = f"{name}: validation loss {row['loss']:.4f}, KL to the teacher {row['kl']:.4f}"
    if "kl_before" in more:
        line += f" (before: {more['kl_before']:.4f})"
    if "preferred" in more:
        line += f", chosen preferred {more['preferred']:.1%} ± {more['preferred_error']:.1%}"
        line += f", margin {more['margin']:.4f}"
    show(line)


def train_stage(job, state, number, teacher, base, journal):
    """A stage of the student, and its row of the table."""
    run, stage, seed = job.run, job.stages[number], [job.s.seed, number]
    last_good = "This run saved no student"
    if number > 1:
        last_good = (
            f"The last good checkpoint is {job.student}, after {job.stages[number - 1].name}"
        )
    models, held = assemble(run, teacher, base, stage, number, state.trained), ()
    if not state.step:
        state.before = evaluate(run, models, job.corpus(), job.encoding)[1]["kl"]
    if stage.loss == "dpo":
        train, held = load_pairs(run.s, stage.data, job.encoding)
        batches = pair_batches(run, train, seed)
    else:
        answers = run.s.pseudo_labels and not stage.data
        batches = training_batches(run, job.corpus(stage.data, answers), seed)
    fit(run, state, stage, models, batches, journal, last_good)
    more = {"seconds": state.seconds} if held else speed(run, state, stage)
    more["kl_before"] = state.before
    if held:
        more |= preferences(run, stage, models, held)
    add_row(job, state, stage.name, models, last_good, more)
    dtype = base.embed_tokens.weight.dtype
    save_student(run, models.student, job.student, job.tokenizer, dtype, stage=stage.name)
    state.trained = save_state(run, state, models.student)
    if run.stop and run.size == 1:
        leave(run)


def run_stages(job, state, journal):
    """The stages from state.stage on: 0 trains the teacher, the others the student."""
    run, stages = job.run, job.stages
    if state.stage == 0:
        train_teacher(job, state, journal)
    if run.s.pseudo_labels and any(not stage.data for stage in stages[1:]):
        job.corpus(answers=True)  # now, while the GPU is empty
    teacher, base = read_models(run, job.teacher)
    if len(state.rows) < 2:
        all_at_once = dataclasses.replace(stages[1], mixers=stages[-1].mixers, trains="mixers")
        models = assemble(run, teacher, base, all_at_once, 0, {})
        add_row(job, state, "student, not trained", models, "This run saved no student", {})
        del models
    for number in range(state.stage, len(stages)):
        train_stage(job, state, number, teacher, base, journal)


def table(rows):
    paired = any("preferred" in row for row in rows)
    line = f"{'':<38}{'loss':>8}{'ppl':>11}{'bits/byte':>11}{'KL':>9}{'agree':>8}"
    lines = [f"{line}{'tokens/s':>11}{'seconds':>9}" + f"{'preferred':>18}" * paired]
    for row in rows:
        line = f"{row['model']:<38}{row['loss']:>8.4f}{row['perplexity']:>#11.4g}"
        line += f"{row['bits_per_byte']:>11.4f}{row['kl']:>9.4f}{row['agreement']:>8.1%}"
        speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        line += f"{speed:>11}{row['seconds']:>9.1f}" if "seconds" in row else ""
        if "preferred" in row:
            line += f"{row['preferred']:>10.1%} ± {row['preferred_error']:.1%}"
        lines.append(line)
    return "\n".join(lines)


def sample(model, encoding, s, chat=False):
    """The prompt, and what the model writes after it or, in a chat, answers."""
    ids = encoding.encode(s.prompt)
    if chat:
        ids, _ = encoding.conversation([{"role": "user", "content": s.prompt}], reply=True)
    ids = [ids[: model.config.context - 1]]
    torch.manual_seed(s.seed)
    reply = []
    for (new,) in generate(model, ids, 200, 0.7, 0, 0.95, stop=encoding.stops):
        reply += [i for i in new if i not in encoding.stops]
    return s.prompt + "\n" * chat + encoding.decode(reply)


def report(job, state, seconds):
    """The table, results.json and a text by both models; the checkpoint goes."""
    s, run, rows = job.s, job.run, state.rows
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name(run.device)
    machine = f"{run.size} processes, {machine}" if run.size > 1 else machine
    memory, ratio = most_memory(run.device), rows[-1]["loss"] / rows[0]["loss"]
    line = f"student / teacher validation loss: {ratio:.4f}   peak memory "
    line += "of process 0 " * (run.size > 1) + f"{memory / 2**30:.2f} GiB"
    line += f"   {seconds:.0f} s {'since --resume' if s.resume else 'in all'} on {machine}"
    show(f"\n{table(rows)}\n\n{line}, torch {torch.__version__}")
    results = {"rows": rows, "seconds": seconds, "peak_memory_bytes": memory}
    results |= {"machine": machine, "torch": torch.__version__}
    results |= {"python": platform.python_version(), "made_from": state.settings}
    results |= {"teacher_parameters": count_of(job.config), "settings": vars(s)}
    text = json.dumps(results, indent=1).encode()
    mil.write_whole(job.results, lambda f: f.write(text))
    first = read_documents(find_files(s.data, s.out)[0], False) if s.data else []
    chat = any(isinstance(document, list) for document in first)
    for name, place in (("teacher", job.teacher), ("student", job.student)):
        model = mil.load(place, run.device, run.dtype)
        show(f"\n--- {name}\n{sample(model, job.encoding, s, chat)}")
    flags = f"--model {job.student} "
    if s.student_layers and s.teacher:
        flags = f"--model {s.teacher} --draft {job.student} "
    flags += "--chat" if chat else f"--prompt {shlex.quote(s.prompt)}"
    show(f"\nstudent: {job.student}   table: {job.results}   losses: {s.out}/log.jsonl")
    show(f"try: python generate.py {flags}")
    run.checkpoint.unlink(missing_ok=True)


def open_journal(run, state):
    """log.jsonl, cut where the checkpoint was made."""
    path = Path(run.s.out) / "log.jsonl"
    if run.rank:
        return open(os.devnull, "w")
    with mil.naming(path, "cannot be written"), open(path, "ab") as log:
        log.truncate(min(state.logged, log.tell()))
    return open(path, "a", encoding="utf-8")


@contextlib.contextmanager
def alone(run):
    """Refuses a second run with the same --out at the same time."""
    mil.make_directory(run.s.out)
    with open(Path(run.s.out) / ".lock", "a") as lock:
        if run.rank == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                advice = "another run is writing here; wait for it, or give another --out"
                raise MilError(f"--out {run.s.out}: {advice}") from None
        yield


def run_job(run, began):
    """All of a run: what can be refused is refused first; then the teacher, stages, report."""
    job = Job(run)
    with alone(run):
        announce(job)
        state = load_state(run, job.stages, job.corpus())
        if state is None:
            return show(f"{job.results}: this run is finished")
        together(run)  # all have read it
        if run.rank == 0:
            job.results.unlink(missing_ok=True)
        for stage in job.stages:
            if stage.data and stage.loss == "distill":
                job.corpus(stage.data)  # now, not after the stages before
        listen(run)
        with open_journal(run, state) as journal:
            run_stages(job, state, journal)
        if run.rank == 0:
            report(job, state, time.perf_counter() - began)


def main(argv):
    s, began = parse_flags(Settings, argv, __doc__, GROUPS), time.perf_counter()
    run = begin(s)
    try:
        run_job(run, began)
    except torch.OutOfMemoryError as e:
        lower = "--memory_budget 0.7, --accumulate, --batch, --context or --stage2_steps 0"
        full = str(e).splitlines()[0]
        raise MilError(f"the GPU's memory is full; these flags lower it: {lower}. ({full})") from e
    except RuntimeError as e:  # of gloo; NCCL waits, and torchrun ends what waits
        if not (run.size > 1 and re.search("by peer|Broken pipe", str(e))):
            raise
        cause = "another process has ended; what it said stands above"
        raise MilError(f"{cause}. --resume goes on from the newest checkpoint") from e
    if dist.is_initialized():  # not after an error: NCCL would wait for the others' next exchange
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
