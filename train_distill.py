"""From a Llama to a Mamba hybrid, in one command.

    python train_distill.py                                  all of it, on the sources of Python's standard library
    python train_distill.py --data notes/ --keep 0.25        your text; keep a quarter of the attention layers
    python train_distill.py --teacher DIR --data chat.jsonl  your teacher: ours, or a folder from Hugging Face or Meta
    python train_distill.py --teacher DIR --data chat.jsonl --pseudo_labels --pairs pairs.jsonl       the paper's three stages
    python train_distill.py --teacher out/teacher --student_layers 0,3 --keep 1 --out out/draft     a draft for it (generate.py)
    torchrun --standalone --nproc_per_node 2 -- train_distill.py --teacher DIR …                      on two GPUs, sharded (FSDP2)

    corpus -> teacher -> stage 1.1, 1.2 …, each replacing more of attention by Mamba -> stage 2 -> (preferences) -> table, sample

The student learns from the teacher's distribution and from the text (Eq. 2 of arXiv 2408.15237), a mean per predicted token:

    L = α · (-log p_student(x_{t+1})) + β · KL( p_teacher(· | x_≤t) ‖ p_student(· | x_≤t) )

and, in the last stage, which of two answers is preferred (DPO, Eq. 4), the teacher being the reference:

    L = -log σ( β · (log p_student(chosen) - log p_teacher(chosen) - log p_student(rejected) + log p_teacher(rejected)) )

A run is a list of stages (Stage). Stage 1 trains only the new Mamba mixers; MLPs, norms, embeddings and the kept attention stay the
teacher's, and are the teacher's own tensors in memory. Attention is replaced in steps, 25, 50, 75, 87.5, 100 % of the layers as far as
asked, the layers already converted keeping what they learned. Stage 2 trains everything. Deviations from the paper: the learning rates
suit small models, and by default the text is the corpus itself and not the teacher's answers (--pseudo_labels).

In this file, top to bottom: settings; stages; data; the teacher's answers; losses; teacher and student side by side; processes; the training loop
and its checkpoints; evaluation; the stages, run; what a stage costs; the report and the command.
"""
import argparse
import contextlib
import dataclasses
import difflib
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
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import mil
from generate import (Decoder, flag, generate, load_tokenizer, parse_flags, pick_device, run_command, save_with_tokenizer,
                      tokenizer_of)
from mil import MilError


# ---------------------------------------------------------------------------------------------------------------
# Settings. Sizes left at 0 depend on the device: minutes on two CPU cores, or on one GPU with a larger teacher.

PRESETS = {
    "cpu": dict(n_layers=4, d=128, n_heads=4, n_kv_heads=2, d_ff=384, context=256, batch=8, teacher_steps=700,
                stage1_steps=180, stage2_steps=100, eval_sequences=64),
    "cuda": dict(n_layers=8, d=512, n_heads=8, n_kv_heads=4, d_ff=1408, context=512, batch=64, teacher_steps=1500,
                 stage1_steps=400, stage2_steps=200, eval_sequences=256),
}
SIZES = ("n_layers", "d", "n_heads", "n_kv_heads", "d_ff")


def sized(name, help):
    return flag(0, f"{help} (0: the default, {PRESETS['cpu'][name]} on cpu, {PRESETS['cuda'][name]} on cuda)")


@dataclass
class Settings:
    out: str = flag("out", "where teacher/, student/, data/, checkpoints/, results.json, log.jsonl and loss.png go")
    data: list = flag([], "text files, folders, or .jsonl (text, messages, or prompt and completion); empty: Python's standard library",
                      nargs="+", action="extend", metavar="path")
    tokenizer: str = flag("", "bytes, a Llama-3 tokenizer.model, a tokenizer.json, or a tiktoken name; empty: the teacher's, or bytes")
    teacher: str = flag("", "checkpoint of a ready teacher, ours, Hugging Face's or Meta's; empty: train one, or reuse the one in --out")
    init_from: str = flag("", "checkpoint of a Llama the student begins as, with the teacher's vocabulary; empty: the teacher")
    recipe: str = flag("", "a .json list of stages, such as [{\"keep\": 0.5, \"steps\": 900}, {\"train\": \"all\"}], in place of the default ones")
    mixer: str = flag("mamba2", "what replaces attention: mamba, mamba2, or none (the paper's ablation)")
    keep: float = flag(0.5, "share of attention layers that stay; the paper finds 0.5 close to the teacher, 0 possible")
    replace_steps: int = flag(0, "replace attention in this many even steps; 0: in the paper's, 25, 50, 75, 87.5, 100 % of the layers as far as --keep "
                                 "lets. The paper finds steps better than all at once; README, with few steps, does not")
    student_layers: str = flag("", "a small student, such as a draft: only these layers of the teacher, say 0,10,20,31; no stage 1, its steps go to "
                               "stage 2 (so --stage1_lr and --replace_steps do not apply). The paper's drafts keep 2 or 4. With --keep 1 it is a Llama")
    init: str = flag("attention", "attention: the mixer inherits W_q, W_k, W_v, W_o; random: it does not (worse)")
    pseudo_labels: bool = flag(False, "the teacher answers the prompts of the training data, and the student learns from the answers only", action="store_true")
    answers: int = flag(0, "with --pseudo_labels: to how many prompts; 0: to all")
    answer_tokens: int = flag(0, "with --pseudo_labels: the longest answer (default: three quarters of --context)")
    pairs: list = flag([], ".jsonl files of prompt, chosen, rejected: adds a stage of preferences (DPO)", nargs="+", action="extend", metavar="path")
    seed: int = flag(0, "of initial values and of the order of the data")
    device: str = flag("", "cpu, cuda, cuda:1 …; empty: cuda if there is one")
    dtype: str = flag("", "of the arithmetic, bfloat16 or float32 (never TF32); what is trained is float32. Empty: bfloat16 on cuda")
    n_layers: int = sized("n_layers", "teacher: layers; --keep says how many keep their attention")
    d: int = sized("d", "teacher: width; cost grows with its square")
    n_heads: int = sized("n_heads", "teacher: query heads; each d / n_heads wide")
    n_kv_heads: int = sized("n_kv_heads", "teacher: key/value heads; fewer than query heads is grouped-query attention")
    d_ff: int = sized("d_ff", "teacher: inner width of the MLP; 8/3 of d, rounded up to 128, as in Llama")
    context: int = sized("context", "tokens in a training sequence; the longest text attention can read")
    rope_theta: float = flag(10000.0, "teacher: base of RoPE's frequencies; the larger, the more channels hardly turn (Llama 3: 500000)")
    batch: int = sized("batch", "sequences in a step, of all processes together; less noise, more time")
    accumulate: int = flag(1, "how many parts a step's batch is taken in, one after the other: less memory, the same result; several processes "
                          "send for each part what they send for a step")
    shard: str = flag("trained", "what several processes shard. trained: weights that train, their gradients and AdamW's state (ZeRO-3), the rest replicated; all: the rest "
                                 "too, for less memory and more to send; grads: as trained, but a layer stays gathered from its forward to its backward pass "
                                 "(ZeRO-2), for more memory and less to send")
    compile: bool = flag(
        True,
        "on a GPU, torch.compile every layer: faster, in less memory; the first steps take a minute",
        action=argparse.BooleanOptionalAction,
    )
    memory_budget: float = flag(
        1.0,
        "share of the activations that compiled layers keep for the backward pass; the rest they "
        "compute again. 0.7: about a fifth less memory in all, 6 % more time",
    )
    teacher_steps: int = sized("teacher_steps", "training steps of the teacher; a better teacher gives a better student")
    stage1_steps: int = sized("stage1_steps", "steps of stage 1, all replacement steps together: the new mixers learn")
    stage2_steps: int = flag(-1, f"steps of stage 2: everything learns; 0: no stage 2 (default {PRESETS['cpu']['stage2_steps']} on cpu, "
                                 f"{PRESETS['cuda']['stage2_steps']} on cuda)")
    stage3_steps: int = flag(0, "steps of the stage of preferences, --batch / 2 pairs each; 0: every training pair once")
    teacher_lr: float = flag(3e-3, "peak learning rate of the teacher; small models bear large rates")
    stage1_lr: float = flag(3e-3, "stage 1; the paper's 8e-5 is for 8B parameters")
    stage2_lr: float = flag(1e-3, "stage 2; the paper's 2e-5 is for 8B parameters")
    stage3_lr: float = flag(1e-5, "preferences; the paper's 5e-7 is for 8B parameters")
    alpha: float = flag(1.0, "weight α of the cross-entropy (paper: 1)")
    beta: float = flag(1.0, "weight β of the KL to the teacher (paper: 0.1 on the teacher's own answers)")
    dpo_beta: float = flag(0.1, "β of the preferences: how dear it is to leave the teacher (paper: 0.01, or 0.1 for three epochs)")
    temperature: float = flag(1.0, "τ of the KL: τ² times that of both laws at this temperature")
    reverse: bool = flag(False, "KL(student ‖ teacher) in place of KL(teacher ‖ student)", action="store_true")
    schedule: str = flag("cosine", "the learning rate after the warm-up: cosine or linear, to 0, or constant")
    warmup: float = flag(0.05, "share of a stage's steps in which the rate rises")
    clip: float = flag(1.0, "largest gradient norm (paper: 0.1)")
    eval_sequences: int = sized("eval_sequences", "validation sequences in an evaluation; more is more exact")
    save_minutes: float = flag(10.0, "a checkpoint every so many minutes, and at SIGTERM and Ctrl-C")
    keep_checkpoints: int = flag(2, "how many of the newest checkpoints stay")
    resume: bool = flag(False, "go on from the newest checkpoint in --out, with the same settings; from the beginning where there is none", action="store_true")
    prompt: str = flag("def ", "for the sample at the end")


CHOICES = {"mixer": mil.MIXERS[1:], "init": ("attention", "random"), "dtype": ("float32", "bfloat16"), "schedule": ("cosine", "linear", "constant"),
           "train": ("mixers", "mlps", "all"), "loss": ("distill", "dpo"), "shard": ("trained", "all", "grads")}
LIMITS = {**dict.fromkeys(("alpha", "beta", "lr", "teacher_lr", "stage1_lr", "stage2_lr", "stage3_lr", "save_minutes", "answers", "steps", "stage3_steps"), (0, sys.float_info.max)),
          **dict.fromkeys(("clip", "temperature", "dpo_beta"), (sys.float_info.min, math.inf)), **dict.fromkeys(("accumulate", "keep_checkpoints"), (1, math.inf)),
          "memory_budget": (sys.float_info.min, 1), "rope_theta": (1, sys.float_info.max), "warmup": (0, 1), "keep": (0, 1), "seed": (0, 2**63 - 2)}


def check(of, where):
    """MilError for a value of Settings or of a Stage that is none of its choices or outside its limits; `where` stands before its name."""
    for name, allowed in CHOICES.items():
        if getattr(of, name, allowed[0]) not in allowed:
            raise MilError(f"{where}{name} is {getattr(of, name)!r}, expected one of {', '.join(allowed)}")
    for name, (least, most) in LIMITS.items():
        value = getattr(of, name, None)
        if value is not None and not least <= value <= most:
            bounded = most < 2**63
            span = f"{least} to {most}" if bounded else f"{least} or more"
            if 0 < least < 1:
                span = f"more than 0, at most {most}" if bounded else "more than 0"
            raise MilError(f"{where}{name} is {value}, expected {span}")
    if getattr(of, "alpha", 1) == getattr(of, "beta", 1) == 0:
        raise MilError(f"{where}alpha is 0, and so is beta: nothing would be learned; expected at least one above 0")


def chosen_layers(s):
    """--student_layers as numbers; MilError where they are no choice of the teacher's layers."""
    try:
        layers = [int(i) for i in s.student_layers.split(",")]
    except ValueError:
        raise MilError(f"--student_layers is {s.student_layers!r}, expected numbers with commas between, such as 0,{s.n_layers - 1}") from None
    try:
        mil.check_layers(layers, s.n_layers)
    except MilError as e:
        raise MilError(f"--student_layers: {e}") from None
    return layers


def complete(s, device, teacher_config=None):
    """Fill what was left at 0 and refuse what makes no sense, naming the flag."""
    preset = PRESETS[device.type]
    if teacher_config is not None:
        for name in SIZES:
            if getattr(s, name) not in (0, getattr(teacher_config, name)):
                raise MilError(f"--{name} is {getattr(s, name)}, but the teacher in {s.teacher} has {getattr(teacher_config, name)}; "
                               f"leave it out")
        preset = {**preset, **{name: getattr(teacher_config, name) for name in SIZES},
                  "context": min(preset["context"], teacher_config.context)}
    if s.d and not s.d_ff:
        s.d_ff = math.ceil(s.d * 8 / 3 / 128) * 128
    for name, value in preset.items():
        unset = -1 if name == "stage2_steps" else 0
        if getattr(s, name) < unset:
            raise MilError(f"--{name} is {getattr(s, name)}, expected {unset + 1} or more ({unset}: the default of the device)")
        setattr(s, name, value if getattr(s, name) == unset else getattr(s, name))
    if teacher_config is not None and s.context > teacher_config.context:
        raise MilError(f"--context is {s.context}, but the teacher in {s.teacher} was trained for {teacher_config.context}")
    if not s.out:
        raise MilError("--out is '', expected a folder to write to")
    s.dtype = s.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    s.answer_tokens = s.answer_tokens or max(1, s.context * 3 // 4)
    check(s, "--")
    for name, asked, by in (("stage3_steps", "pairs", s.pairs or s.recipe), ("answers", "pseudo_labels", s.pseudo_labels)):
        if getattr(s, name) and not by:
            raise MilError(f"--{name} is {getattr(s, name)}, without --{asked} it means nothing; expected both or neither")
    if s.context < 2:
        raise MilError(f"--context is {s.context}, expected 2 or more")
    if not 1 <= s.answer_tokens < s.context:
        raise MilError(f"--answer_tokens is {s.answer_tokens}, expected 1 to {s.context - 1}, less than --context")
    if s.memory_budget < 1 and not (s.compile and device.type == "cuda"):
        why = "on a CPU" if s.compile else "with --no-compile"
        raise MilError(
            f"--memory_budget is {s.memory_budget}, but layers are not compiled {why}; leave it out"
        )
    if not s.prompt:
        raise MilError("--prompt is '', expected some text")
    if s.recipe and (s.keep, s.replace_steps) != (Settings.keep, Settings.replace_steps):
        raise MilError("--recipe says itself what is replaced; leave out --keep and --replace_steps")
    if s.student_layers and (s.init_from or s.recipe):
        raise MilError("--student_layers: a small student has neither --init_from nor --recipe; leave them out")
    if teacher_config is None and s.d % (2 * s.n_heads):
        raise MilError(f"--d is {s.d}, expected a multiple of twice --n_heads {s.n_heads}: a head's channels turn in pairs")
    if teacher_config is not None and set(teacher_config.mixers) != {"attention"}:
        raise MilError(f"--teacher {s.teacher}: holds {', '.join(sorted(set(teacher_config.mixers)))}; expected a Llama, with "
                       f"attention in every layer")


# ---------------------------------------------------------------------------------------------------------------
# Stages


@dataclass
class Stage:
    """A stage of a run, and what a --recipe says of one; what is left out there comes from the command line, but keep and train: then nothing is replaced,
    and all parameters train, or, where something is replaced, the mixers."""
    keep: float = None          # the share of attention left when it begins; left out: nothing is replaced
    replace: list = field(default_factory=list)  # or these layers lose theirs
    mixer: str = "mamba2"       # and get this in its place
    train: str = "mixers"       # mixers: what attention was replaced by, now or before; mlps: these and all MLPs; all: everything
    loss: str = "distill"       # Eq. 2, or dpo, Eq. 4, on data of pairs
    alpha: float = 1.0          # of the cross-entropy
    beta: float = 1.0           # of the KL; of dpo, its β
    temperature: float = 1.0
    reverse: bool = False
    data: list = field(default_factory=list)     # in place of --data and its --pseudo_labels (of dpo: --pairs); validation stays --data's
    steps: int = 0
    lr: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.05
    name: str = ""
    mixers: list = field(default_factory=list)   # the student's, worked out here and not said

    def trains(self, name):
        """Whether the student's parameter of this name learns."""
        mixer = ".mixer." in name and self.mixers[int(name.split(".")[1])] != "attention"
        return self.train == "all" or mixer or (self.train == "mlps" and ".mlp." in name)


def read_recipe(path):
    """The stages a .json file lists, each a dict; MilError for what is none."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise MilError(f"--recipe {path}: cannot be read as JSON: {getattr(e, 'strerror', None) or e}") from e
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise MilError(f"--recipe {path}: expected a list of stages, such as [{{\"keep\": 0.5, \"steps\": 900}}, {{\"train\": \"all\"}}]")
    kinds = {f.name: f.type for f in dataclasses.fields(Stage) if f.name != "mixers"}  # what is said of a stage
    for i, entry in enumerate(entries, 1):
        for key, value in entry.items():
            if key not in kinds:
                near = difflib.get_close_matches(key, kinds, 1)
                raise MilError(f"--recipe {path}: stage {i} has {key!r}, expected some of {', '.join(kinds)}" + (f"; did you mean {near[0]}?" if near else ""))
            right = (int, float) if kinds[key] is float else kinds[key]
            of = {"replace": int, "data": str}.get(key, object)
            if not isinstance(value, right) or value != value or isinstance(value, bool) != (kinds[key] is bool) or isinstance(value, list) and not all(type(x) is of for x in value):
                raise MilError(f"--recipe {path}: stage {i}: {key} is {value!r}, expected {'a list of ' + of.__name__ if kinds[key] is list else kinds[key].__name__}")
    return entries


def plan(s, config):
    """The stages of a run whose student begins as a Llama of this configuration: those of --recipe, or the paper's. MilError for a stage
    that cannot be."""
    if s.recipe:
        entries, where = read_recipe(s.recipe), f"--recipe {s.recipe}: stage "
    elif s.student_layers or s.mixer == "none":  # nothing that stage 1 could train, or train alone
        entries, where = [dict(train="all", steps=s.stage1_steps + s.stage2_steps, lr=s.stage2_lr, keep=s.keep)], f"{'--student_layers' if s.student_layers else '--mixer none'}: stage "
    else:
        n, count = config.n_layers, len(mil.interleaved_layers(config.n_layers, s.keep))
        if count == 0 or count == n and s.keep > 0:
            raise MilError(f"--keep {s.keep:g} of {n} layers {'would keep' if count else 'replaces'} none; expected 0" + (f", or from {1 / n:.2g} to {1 - 1 / n:.2g}" if n > 1 else ": there is one layer"))
        if not 0 <= s.replace_steps <= count:
            raise MilError(f"--replace_steps is {s.replace_steps}, expected 1 to {count}, the number of layers to replace, or 0 for the paper's steps")
        even = [round(count * (i + 1) / s.replace_steps) for i in range(s.replace_steps)]
        counts = even or sorted({len(mil.interleaved_layers(n, keep)) for keep in (0.75, 0.5, 0.25, 0.125, s.keep) if keep >= s.keep} - {0})
        if s.stage1_steps < len(counts):
            raise MilError(f"--stage1_steps is {s.stage1_steps}, expected at least one for each of {len(counts)} replacement steps")
        parts = [s.stage1_steps * i // len(counts) for i in range(len(counts) + 1)]
        entries = [dict(train="mixers", steps=parts[i + 1] - parts[i], lr=s.stage1_lr, keep=1 - c / n) for i, c in enumerate(counts)]
        entries += [dict(train="all", steps=s.stage2_steps, lr=s.stage2_lr)] * (s.stage2_steps > 0)
        where = "stage "
    if s.pairs and not any(entry.get("loss") == "dpo" for entry in entries):
        entries = [*entries, dict(train="all", steps=s.stage3_steps, lr=s.stage3_lr, loss="dpo")]
    shared = {name: getattr(s, name) for name in ("mixer", "alpha", "temperature", "reverse", "schedule", "warmup")}
    stages = []
    for i, entry in enumerate(entries):
        preferred = entry.get("loss") == "dpo"
        train = entry.get("train", "all" if preferred or not {"keep", "replace"} & entry.keys() else "mixers")
        steps, lr = (s.stage3_steps, s.stage3_lr) if preferred else (s.stage1_steps, s.stage1_lr) if train != "all" else (s.stage2_steps, s.stage2_lr)
        given = {"train": train, "steps": steps, "lr": lr, "beta": s.dpo_beta if preferred else s.beta, "data": s.pairs if preferred else [], **entry}
        stages.append(Stage(**{**shared, **given}))
    return resolve(stages, config, where)


def resolve(stages, config, where):
    """Works out every stage's `mixers` and name: which layers a share means (evenly spread at every step: 50 % of 32 in two steps is 0, 4, 8 …
    then 2, 6, 10 …), and that all of it can be."""
    n, mixers, names = config.n_layers, list(config.mixers), {"mixers": 0, "all": 0, "dpo": 0}
    final = mil.interleaved_layers(n, min([stage.keep for stage in stages if stage.keep is not None and 0 <= stage.keep <= 1], default=1))
    for i, stage in enumerate(stages, 1):
        def refuse(what):
            raise MilError(f"{where}{i}: {what}")  # noqa: B023
        check(stage, f"{where}{i}: ")
        if stage.keep is not None and stage.replace:
            refuse("keep and replace: expected one of them")
        if stage.keep is not None:
            count = len(mil.interleaved_layers(n, stage.keep))
            if count == n and stage.keep > 0:
                refuse(f"keep {stage.keep:g} of {n} layers would keep none of them; expected 0, or {1 / n:g} at least")
            done = [k for k in range(n) if mixers[k] != "attention"]
            if count < len(done):
                refuse(f"keep is {stage.keep:g}, but the stages before leave only {n - len(done)} of {n} layers of attention")
            spread = [final[j * len(final) // count] for j in range(count)] if count <= len(final) else []
            more = [k for k in spread if k not in done] + [k for k in final if k not in done and k not in spread]
            replace = sorted(more[:max(0, count - len(done))])
        else:
            replace = stage.replace
        for k in replace:
            if not 0 <= k < n:
                refuse(f"replaces layer {k}; the model has layers 0 to {n - 1}")
            if mixers[k] != "attention" or replace.count(k) > 1:
                refuse(f"replaces layer {k}, which holds {mixers[k]} by then: it is replaced twice")
        mixers = [stage.mixer if k in replace else mixer for k, mixer in enumerate(mixers)]
        try:
            dataclasses.replace(config, mixers=mixers)  # now, not after training, if heads cannot be cut
        except MilError as e:
            refuse(str(e))
        stage.mixers = mixers
        if stage.loss == "dpo" and not stage.data:
            refuse("has the loss dpo and no data; expected --pairs, or \"data\": a list of .jsonl files of prompt, chosen and rejected")
        if stage.loss == "dpo" and not stage.beta:
            refuse("beta is 0: no preference would be learned; expected more")
        if stage.steps < (stage.loss == "distill"):
            refuse(f"steps is {stage.steps}, expected 1 or more")
        replaced = sum(mixer != "attention" for mixer in mixers)
        if stage.train == "mixers" and set(mixers) <= {"attention", "none"}:
            refuse("trains the mixers, and there is none to train; expected keep or replace with a Mamba, or train all")
        kind = "dpo" if stage.loss == "dpo" else "all" if stage.train == "all" else "mixers"
        names[kind] += 1
        stage.name = stage.name or {"mixers": f"stage 1.{names[kind]}, {replaced} of {n} layers replaced", "all": "stage 2, all parameters",
                                    "dpo": "stage 3, preferences"}[kind] + f" ({names[kind]})" * (kind != "mixers" and names[kind] > 1)
    return stages


def lr_share(stage, step):
    """The share of the peak rate at `step`: rises over the warm-up, then goes as the stage's schedule says."""
    rising = max(1, round(stage.warmup * stage.steps))
    if step < rising:
        return (step + 1) / rising
    left = (stage.steps - step) / (stage.steps - rising)  # from 1 to almost 0
    return {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1}[stage.schedule]


# ---------------------------------------------------------------------------------------------------------------
# Data: documents -> tokens on disk, split into training and validation by document (within each when there are few)


def standard_library():
    """The running Python's own .py files, no tests and no installed packages, sorted."""
    root, skip = Path(sysconfig.get_paths()["stdlib"]), {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def find_files(paths, out, flag="--data"):
    """The files under `paths`, sorted within each, without hidden ones and what this program wrote to `out`; MilError
    when there is nothing, which names the flag."""
    files, out = [], Path(out).resolve()
    for path in map(Path, paths):
        if not path.exists():
            raise MilError(f"{flag} {path}: no such file or folder")
        found = [path] if not path.is_dir() else sorted(
            p for p in path.rglob("*") if p.is_file() and out not in p.resolve().parents
            and not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not found:
            inside = out in (path.resolve(), *path.resolve().parents)
            raise MilError(f"{flag} {path}: " + (f"lies in --out {out}, whose files are not read; give another --out" if inside else "no files in this folder"))
        files += found
    return files


def jsonl_document(record):
    """What one .jsonl record holds: a list of messages, (prompt, completion), or text. None when it has none of these shapes."""
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in messages):
        return messages
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return record["prompt"], record["completion"]
    return record["text"] if isinstance(record.get("text"), str) else None


def document_tokens(encoding, document):
    """Token ids of a document, as a list; of what is not to be learned, messages other than the assistant's and prompts, ~id, below 0."""
    end = encoding.stops[:1]
    if isinstance(document, str):
        return encoding.encode(document) + end
    if isinstance(document, tuple):
        prompt, completion = document
        return [*(~i for i in encoding.encode(prompt)), *encoding.encode(completion, begin=False), *end]
    return [i if own else ~i for i, own in zip(*encoding.conversation(document))]


def read_text(file, named, flag="--data"):
    """The text of a file. One that is not UTF-8 is an error when the user `named` it, and "" when it was found in a folder."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", b"", text.index("\0"), 0, "")
        return text
    except OSError as e:
        raise MilError(f"{flag} {file}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        if named:
            raise MilError(f"{flag} {file}: not UTF-8 text (byte {e.start})") from None
        return ""


def read_records(file, text, flag="--data"):
    """(number, record) of every line of a .jsonl's text that is not empty."""
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as e:
                raise MilError(f"{flag} {file}: line {i} is not JSON: {e}") from None
            if not isinstance(record, dict):
                raise MilError(f"{flag} {file}: line {i} has {type(record).__name__}; expected an object")
            yield i, record


def read_documents(file, named):
    """The documents of one file: every line of a .jsonl, or the whole text."""
    text = read_text(file, named)
    if file.suffix == ".json" and re.match(r"\s*\[\s*\{", text) and (named or '"messages"' in text[:9999]):
        raise MilError(f"--data {file}: a list in one piece; expected one record a line, in a file named .jsonl")
    if file.suffix != ".jsonl":
        return [text] if text.strip() else []
    documents = []
    for i, record in read_records(file, text):
        document = jsonl_document(record)
        if document is None:
            raise MilError(f"--data {file}: line {i} has {', '.join(record) or 'no keys'}; expected text, messages (a list of role and "
                           f"content, both text), or prompt and completion, all of them text")
        for role in {m["role"] for m in document} - {"system", "user", "assistant", "tool"} if isinstance(document, list) else ():
            raise MilError(f"--data {file}: line {i} has a message of the role {role!r}, expected system, user, assistant or tool")
        documents.append(document)
    return documents


@dataclass
class Corpus:
    train: np.ndarray     # token ids, memory-mapped; ~id, below 0, where a token is read but not to be learned
    val: np.ndarray
    begins: list          # of each of the two, where its documents begin
    key: str              # what it was made from
    about: str            # a line for the reader


def identity(files, *more):
    """A name for what is made from these files as they are now, and from `more`."""
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in map(Path, files) if f.exists()]
    return hashlib.sha256(json.dumps([stats, *more]).encode()).hexdigest()[:16]


def weights_in(place):
    """The files of weights of the checkpoint in a folder."""
    about = mil.read_config(place)
    return [about["folder"] / file for file in about["weights"]]


def split(documents):
    """Training and validation: every twentieth document is validation. None for fewer than ten, of which the last tenth of each is."""
    return ([d for i, d in enumerate(documents) if i % 20 != 9], documents[9::20]) if len(documents) >= 10 else None


def load_corpus(s, paths, encoding, tokenizer):
    """Tokenise `paths` once and keep it in out/data, under a name made from the files, their sizes and their times."""
    files = find_files(paths, s.out) if paths else standard_library()
    key = identity(files, tokenizer, repr(encoding.vocabulary), encoding.template)
    stored = [Path(s.out) / "data" / f"{key}.{part}.bin" for part in ("train", "val", "train.begins", "val.begins")]
    if not all(p.exists() for p in stored):
        named = set(map(Path, paths))
        documents = [d for f in files for d in read_documents(f, f in named)]
        if not documents:
            raise MilError(f"--data {' '.join(paths) or '(the standard library)'}: no text found, the files are empty or not UTF-8")
        tokens = []
        for i, document in enumerate(documents):
            tokens.append(np.array(document_tokens(encoding, document), dtype=token_type(encoding)))
            if i % 500 == 499:
                show(f"tokenising: {i + 1} of {len(documents)} documents")
        parts = split(tokens) or ([ids[:len(ids) * 9 // 10] for ids in tokens], [ids[len(ids) * 9 // 10:] for ids in tokens])
        store(encoding, zip(stored[:2], stored[2:], parts))
    return read_corpus(s, encoding, stored, key, f"{len(files)} files", tokenizer)


def store(encoding, work):
    """Write documents, token ids, one after the other to a file, and where they begin to another."""
    for path, begins, documents in work:
        mil.make_directory(path.parent)
        starts = np.cumsum([0, *map(len, documents)], dtype=np.int64)[:-1]
        mil.write_whole(begins, lambda f, starts=starts: f.write(starts.tobytes()))
        mil.write_whole(path, lambda f, documents=documents: f.write(np.concatenate(documents).astype(token_type(encoding)).tobytes()))


def token_type(encoding):
    """What stores a token of this vocabulary, and ~ of it."""
    return np.int16 if encoding.size <= 2**15 else np.int32


def read_corpus(s, encoding, stored, key, source, tokenizer, more="give more text"):
    """The Corpus in these four files. MilError when it is too little, with what would make it `more`."""
    kinds = [token_type(encoding)] * 2 + [np.int64] * 2
    train, val, *begins = (np.memmap(p, dtype=kind, mode="r") if p.stat().st_size else np.zeros(0, kind) for p, kind in zip(stored, kinds))
    for name, part, rows in (("training", train, s.batch), ("validation", val, 1)):
        if len(part) < rows * s.context + 1:
            raise MilError(f"--data: {len(part)} {name} tokens, but {rows} of --context {s.context} need "
                           f"{rows * s.context + 1}: {more}, or lower --context{' or --batch' * (rows > 1)}{'; of ten documents and more every twentieth is for validation' * (name == 'validation')}")
        if not (part[:] >= 0).any():
            raise MilError(f"--data: nothing to learn in the {name} part: no message is the assistant's, and there is no other text")
    learned = f", {np.mean(train[:] >= 0):.0%} of them to be learned" * bool((train[:] < 0).any())
    about = f"{source}, {len(train):,} training{learned}, and {len(val):,} validation tokens ({tokenizer})"
    return Corpus(train, val, begins, key, about)


def windows(data, begins, starts, length):
    """Rows of `length` tokens of `data`, which begin at `starts`: inputs x (b, l); targets y (b, l), -100 where nothing is to be learned, as from
    one document to the next; and the place of each input in its document, counted from the row's beginning where that is later."""
    at = np.reshape(starts, (-1, 1)) + np.arange(length + 1)                                  # (b, l + 1)
    block, place = data[at].astype(np.int64), at - begins[np.searchsorted(begins, at, "right") - 1]
    x, y = np.where(block < 0, ~block, block)[:, :-1], np.where((block < 0) | (place == 0), -100, block)[:, 1:]
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(np.minimum(place, np.arange(length + 1))[:, :-1])


def to_device(x, y, pos, device, dtype=torch.float32):
    """A batch on `device`.

    x and y are (b, l). `at` holds the places in the flattened targets that are learned; None: all.
    docs are the Documents of the rows; None: every row is one.
    """
    at = (y.flatten() >= 0).nonzero()[:, 0]
    docs = mil.Documents(pos, device, dtype) if (pos[:, 1:] == 0).any() else None

    def send(t):
        return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t

    return SimpleNamespace(
        x=send(x), y=send(y), at=None if len(at) == y.numel() else send(at), docs=docs
    )


def training_batches(run, corpus, seed):
    """step -> the parts of that step's batch that this process takes, and how many tokens all of them learn: windows at random places, which depend
    on the seed and the step and on nothing else."""
    s, (data, begins) = run.s, (corpus.train, corpus.begins[0])

    def batch(step):
        starts = np.random.default_rng([*seed, step]).integers(
            0, len(data) - s.context, size=s.batch
        )
        x, y, pos = windows(data, begins, starts, s.context)
        return [
            to_device(x[mine], y[mine], pos[mine], run.device, run.dtype)
            for mine in shares(run, s.batch)
        ], int((y >= 0).sum())

    return batch


def shares(run, rows):
    """Which of a step's rows this process takes in each of its parts."""
    size = rows // (run.size * run.s.accumulate)
    return [slice((part * run.size + run.rank) * size, (part * run.size + run.rank + 1) * size) for part in range(run.s.accumulate)]


def turns(run, count, rows):
    """Shares out `count` things among the processes, turn by turn.

    Yields the numbers of the things that this process takes, at most as many as it takes of a
    step's `rows` rows, and how many of them count. The others are number 0 and fill up the turn:
    to one thing, since FSDP2 needs all processes in every pass; where layers are compiled to the
    full size, since another size would compile them again.
    """
    size = max(1, rows // (run.size * run.s.accumulate))
    least = size if run.compiled else 1
    for i in range(0, count, size * run.size):
        mine = list(range(i, min(i + size * run.size, count))[run.rank :: run.size])
        yield mine + [0] * (least - len(mine)), len(mine)


def evaluation_batches(run, corpus):
    """The same evenly spread windows every time."""
    s, data = run.s, corpus.val
    count = min(s.eval_sequences, (len(data) - 1) // s.context)
    starts = np.linspace(0, len(data) - s.context - 1, count).astype(int)
    for mine, real in turns(run, count, s.batch):
        x, y, pos = windows(data, corpus.begins[1], starts[mine], s.context)
        y[real:] = -100
        yield to_device(x, y, pos, run.device, run.dtype)


def ahead(make, first, last, device):
    """make(first) … make(last - 1), each made while the one before it is used."""
    with ThreadPoolExecutor(1, initializer=pick_device, initargs=(str(device),)) as pool:  # a thread has a current GPU of its own
        coming = pool.submit(make, first)
        for i in range(first, last):
            made, coming = coming.result(), pool.submit(make, i + 1) if i + 1 < last else None
            yield made


# Pairs of a preferred answer and another


def load_pairs(s, paths, encoding):
    """The pairs of .jsonl files, (training, validation): each a list of (chosen, rejected), documents as document_tokens gives them. All pairs of
    a prompt are in the same part."""
    pairs, flag = {}, "--recipe: pairs" if s.recipe and paths != s.pairs else "--pairs"
    for file in map(Path, paths):
        if not file.is_file():
            raise MilError(f"{flag} {file}: no such file")
        for i, record in read_records(file, read_text(file, True, flag), flag):
            texts = [record.get(key) for key in ("prompt", "chosen", "rejected")]
            if not all(isinstance(text, str) for text in texts):
                raise MilError(f"{flag} {file}: line {i} has {', '.join(f'{k}: {type(v).__name__}' for k, v in record.items()) or 'no keys'}; expected prompt, chosen and rejected, all of them text")
            talks = [[{"role": "user", "content": texts[0]}, {"role": "assistant", "content": text}] for text in texts[1:]]
            pairs.setdefault(texts[0], []).append(tuple(cut(document_tokens(encoding, talk), s.context + 1) for talk in talks))
    train, held = ([pair for group in part for pair in group] for part in split(list(pairs.values())) or ((), ()))
    if not held or len(train) < s.batch // 2:
        raise MilError(f"{flag}: pairs for {len(pairs)} different prompts; expected 10 at least, and as many pairs as half of --batch {s.batch} to train on")
    return train, held


def cut(ids, most):
    """A prompt and an answer in `most` tokens: of a prompt that leaves the answer too little the end is kept, half of them at least (the paper: 512
    of 1,024)."""
    prompt = next((i for i, token in enumerate(ids) if token >= 0), len(ids))
    kept = min(prompt, max(most // 2, most - (len(ids) - prompt)))
    return ids[prompt - kept:][:most]


def pair_batch(run, pairs):
    """A batch of pairs: the rows of the chosen, then those of the rejected, padded on the right."""
    rows = [ids for side in zip(*pairs) for ids in side]
    block = torch.full((len(rows), max(map(len, rows))), -1)  # ~0, a token that is read and not learned
    for row, ids in zip(block, rows):
        row[:len(ids)] = torch.tensor(ids)
    x, y = torch.where(block < 0, ~block, block)[:, :-1], block.masked_fill(block < 0, -100)[:, 1:]
    return to_device(x, y, torch.arange(x.shape[1]).expand(x.shape), run.device, run.dtype)


def pair_batches(run, pairs, seed):
    """As training_batches, the second number being that of the pairs. Every pair once, in a random order, then again in another."""
    count = run.s.batch // 2

    def batch(step):
        epochs = range(step * count // len(pairs), ((step + 1) * count - 1) // len(pairs) + 1)
        order = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(len(pairs)) for epoch in epochs])
        mine = order[step * count - epochs[0] * len(pairs):][:count]
        return [pair_batch(run, [pairs[i] for i in mine[part]]) for part in shares(run, count)], count
    return batch


# ---------------------------------------------------------------------------------------------------------------
# Pseudo-labels: what the teacher answers to the prompts of the training data (sequence-level distillation)


def prompts_of(s, paths, encoding):
    """What the training documents of `paths` ask: of each a record for a .jsonl, and its token ids. Of messages, those before the assistant's first; of
    prompt and completion, the prompt; of a text, the first quarter of every --context of its tokens."""
    files = find_files(paths, s.out) if paths else standard_library()
    named, most = set(map(Path, paths)), s.context - s.answer_tokens  # so long a prompt leaves room for an answer; of a longer one the end
    documents = [d for f in files for d in read_documents(f, f in named)]
    for document in (split(documents) or (documents,))[0]:
        if isinstance(document, list):
            asked = list(itertools.takewhile(lambda m: m["role"] != "assistant", document))
            if len(asked) < len(document):
                yield {"messages": asked}, encoding.conversation(asked, reply=True)[0][-most:]
        elif isinstance(document, tuple):
            ids = encoding.encode(document[0])
            if ids:
                yield {"prompt": document[0]}, ids[-most:]
        else:
            ids = document_tokens(encoding, document)
            ids = ids if len(documents) >= 10 else ids[:len(ids) * 9 // 10]
            for i in range(0, max(1, len(ids) - s.context // 4 + 1), s.context):
                part = ids[i:i + s.context // 4]
                if part:
                    yield {"prompt": encoding.decode(part)}, part


def answered(run, paths, place, encoding, tokenizer):
    """A Corpus whose training part is what the teacher in `place` answers to the training part of `paths`; validation stays theirs. The answers are
    sampled at temperature 1, in batches of one seed each, and written as they come to out/data/….answers.1of1.jsonl (of several processes a file
    each), a line an answer, with its seed and its tokens; those there are not made again."""
    s, rows = run.s, min(64, run.s.batch)
    with in_turn(run):
        corpus = load_corpus(s, paths, encoding, tokenizer)
    key = identity(weights_in(place), corpus.key, s.seed, s.answers, s.answer_tokens, s.context, rows)
    files = [Path(s.out) / "data" / f"{key}.answers.{rank + 1}of{run.size}.jsonl" for rank in range(run.size)]
    stored = [Path(s.out) / "data" / name for name in (f"{key}.answers.bin", f"{corpus.key}.val.bin", f"{key}.answers.begins.bin", f"{corpus.key}.val.begins.bin")]
    if not all(path.exists() for path in stored):
        answer(run, list(itertools.islice(prompts_of(s, paths, encoding), s.answers or None)), rows, files[run.rank], place, encoding)
        together(run)
    with in_turn(run):
        if not all(path.exists() for path in stored):
            records = [json.loads(line) for part in files for line in part.read_text(encoding="utf-8").split("\n")[:-1]]
            store(encoding, [(stored[0], stored[2], [record["tokens"] for record in sorted(records, key=lambda record: record["number"])])])
        return read_corpus(s, encoding, stored, key, f"the teacher's answers ({files[run.rank].with_name(key)}.answers.…)", tokenizer,
                           "have more --answers, or longer (--answer_tokens)")


def answer(run, work, rows, file, place, encoding):
    """This process's share of the answers to `work`, a list of records and their token ids: every run.size'th batch of `rows`, to `file`."""
    s, stop = run.s, encoding.stops
    mine = range(run.rank * rows, len(work), run.size * rows)  # where its batches begin
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    done = len(lines) // rows  # a batch that was cut short is made again, the same
    mil.write_whole(file, lambda f: f.write("".join(line + "\n" for line in lines[:done * rows]).encode()))
    teacher = mil.pack(mil.load(place, run.device, getattr(torch, s.dtype))) if done < len(mine) else None
    generator, began, made, decoder = torch.Generator(run.device), time.perf_counter(), 0, None
    with open(file, "a", encoding="utf-8") as out:
        for turn, first in enumerate(mine[done:], done + 1):
            batch, seed = work[first:first + rows], (s.seed * 2**20 + first // rows) % 2**63
            generator.manual_seed(seed)
            if decoder is None or len(batch) != rows:
                decoder = Decoder(teacher, len(batch), s.context, generator=generator)
            replies = [[] for _ in batch]
            for new in decoder.decode([ids for _, ids in batch], s.answer_tokens, stop):
                for reply, more in zip(replies, new):
                    reply += more
            for number, ((record, ids), reply) in enumerate(zip(batch, replies), first):
                text = encoding.decode([token for token in reply if token not in stop])
                record = {"messages": [*record["messages"], {"role": "assistant", "content": text}]} if "messages" in record else {**record, "completion": text}
                out.write(json.dumps({**record, "number": number, "seed": seed, "tokens": [*(~i for i in ids), *reply]}, ensure_ascii=False) + "\n")
            out.flush()
            if run.stop:
                leave(run)  # alone: the others may have no more to do
            made += sum(map(len, replies))
            seconds = time.perf_counter() - began
            show(f"answers: batch {turn} of {len(mine)}  {made / seconds:,.0f} tokens/s  ETA {clock(seconds / (turn - done) * (len(mine) - turn))}", done=turn == len(mine))


# ---------------------------------------------------------------------------------------------------------------
# Losses

LOGITS = {"cpu": 2**22, "cuda": 2**27}  # the most logits of a model at once: 1,024 tokens of 131,072 words


def chunks(hidden, head, teacher_hidden, teacher_head):
    """(slice, student's logits, teacher's logits or None), a few tokens at a time. hidden (n, d), head (v, d); the teacher's may be wider."""
    head, teacher_head = head.to(hidden.dtype), teacher_head if teacher_hidden is None else teacher_head.to(teacher_hidden.dtype)
    size = max(1, LOGITS[hidden.device.type] // len(head))
    for i in range(0, len(hidden), size):
        at = slice(i, min(i + size, len(hidden)))
        yield at, hidden[at] @ head.T, None if teacher_hidden is None else teacher_hidden[at] @ teacher_head.T


def losses_and_gradient(logits, wanted, targets, alpha, beta, tau, reverse, gradient):
    """token_losses in plain PyTorch. A compiler takes `reverse`, `gradient` and None as constants."""
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


MIXED = hasattr(
    torch.ops.aten.mm, "dtype"
)  # torch 2.8: a float32 product of bf16 matrices, on CUDA


def add_product(total, a, b):
    """total += a b; of bf16 matrices on a GPU in float32 throughout."""
    if MIXED and a.is_cuda and a.element_size() == 2 and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


class DistillationLoss(torch.autograd.Function):
    """Σ alpha·CE + beta·KL over n tokens, alpha and beta (n,) their weights, with CE and KL (n,) as token_losses gives them; from what the
    heads read, and never with the logits of more than a few tokens in memory: their gradient is made in the forward."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, alpha, beta, temperature, reverse):
        learns = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32)) if ctx.needs_input_grad[1] else None
        ce, kl, cast = torch.empty_like(alpha), torch.empty_like(alpha), head.to(hidden.dtype)
        for at, logits, theirs in chunks(hidden, cast, teacher_hidden, teacher_head):
            ce[at], kl[at], dx = token_losses(logits, theirs, targets[at], alpha[at], beta[at], temperature, reverse, learns)
            if d_hidden is not None:
                torch.mm(dx, cast, out=d_hidden[at])
            if d_head is not None:
                add_product(d_head, dx.T, hidden[at])
            del logits, theirs, dx  # before the next ones are made
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(ce, kl)
        return (alpha * ce + (beta * kl if teacher_hidden is not None else 0)).sum(), ce, kl

    @staticmethod
    def backward(ctx, d, *_):
        d_hidden, d_head = ctx.saved_tensors
        return None if d_hidden is None else d_hidden.mul_(d), None if d_head is None else d_head.mul_(d), *[None] * 7


# ---------------------------------------------------------------------------------------------------------------
# Teacher and student side by side


class Both(nn.Module):
    """A layer of the teacher and one of the student, of which either may be None: one module, since FSDP2 must hold in one place what they share (--shard all)."""

    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, teacher_u, u, angles, docs):
        if self.teacher is not None and teacher_u is not None:
            with torch.no_grad():
                teacher_u = self.teacher(teacher_u, angles[0], None, docs)
        if self.student is not None:
            u = self.student(u, angles[1], None, docs)
        return teacher_u, u


class Models(nn.Module):
    """A teacher, or None, and a student over the same batch."""

    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student
        # so a layer is found in two places, which `shard` needs: FSDP2 looks for nothing inside a Both that is sharded, and comes to its vectors through the student
        self.layers = nn.ModuleList(Both(*layers) for layers in itertools.zip_longest(teacher.layers if teacher else [], student.layers))

    def forward(self, batch, stage=Stage(loss="compare"), scale=1.0):
        """What the method that the stage's `loss` names says; `compare` is evaluation's. All go through here, so that FSDP2 gathers embedding, head and vectors first."""
        targets = batch.y.flatten() if batch.at is None else batch.y.flatten()[batch.at]
        return getattr(self, stage.loss)(batch, targets, stage, scale)

    def hidden(self, batch, teach):
        """What their heads read (tokens, d), of the places that are learned (of all where batch.at is None): the teacher's, None where it is not asked for, and
        the student's."""
        teacher_u, teachers = self.teacher.start(batch.x, None, batch.docs) if teach else (None, None)
        u, students = self.student.start(batch.x, None, batch.docs)
        for both in self.layers:
            teacher_u, u = both(teacher_u, u, (teachers, students), batch.docs)
        out = []
        for model, t in ((self.teacher, teacher_u), (self.student, u)):
            t = t if t is None else model.norm(t).flatten(0, 1)
            out.append(t if t is None or batch.at is None else t[batch.at])
        return out

    def distill(self, batch, targets, stage, scale):
        """Eq. 2: the batch's part of the loss, `scale` times the sum over its tokens; and for the log the sums of CE and KL, scaled alike."""
        teacher_hidden, hidden = self.hidden(batch, stage.beta > 0)
        weight = torch.ones(targets.shape, device=targets.device) * scale
        loss, ce, kl = DistillationLoss.apply(hidden, self.student.lm_head.weight, teacher_hidden, self.teacher and self.teacher.lm_head.weight, targets,
                                              stage.alpha * weight, stage.beta * weight, stage.temperature, stage.reverse)
        return loss, torch.stack([ce.sum(), kl.sum()]).detach() * scale

    def dpo(self, batch, targets, stage, scale):
        """Eq. 4: the same over pairs; for the log, how often and by how much the chosen answer is preferred."""
        (teacher_hidden, hidden), head = self.hidden(batch, True), self.student.lm_head.weight
        reference = self.log_probabilities(batch, teacher_hidden, self.teacher.lm_head.weight, targets)
        chosen, rejected = (self.log_probabilities(batch, hidden.detach(), head, targets) - reference).chunk(2)
        margin = stage.beta * (chosen - rejected)                                              # (pairs,)
        loss, more = -F.logsigmoid(margin).sum() * scale, torch.stack([(margin > 0).float().sum(), margin.sum()]) * scale
        if torch.is_grad_enabled():  # the gradient of Eq. 4 is that of the rows' CE, so weighted: a second pass over the head, so that no logits are kept
            slope = scale * stage.beta * torch.sigmoid(-margin)
            alpha = torch.cat([slope, -slope])[self.row_of(batch)]
            same, *_ = DistillationLoss.apply(hidden, head, None, None, targets, alpha, alpha, 1.0, False)
            loss = same - same.detach() + loss
        return loss, more

    def row_of(self, batch):
        """The row of each learned place."""
        length = batch.x.shape[1]
        return (torch.arange(batch.y.numel(), device=batch.y.device) if batch.at is None else batch.at) // length

    @torch.no_grad()
    def log_probabilities(self, batch, hidden, head, targets):
        """The log-probability of what is learned of each row (rows,)."""
        weight = torch.ones(targets.shape, device=targets.device)
        _, ce, _ = DistillationLoss.apply(hidden, head.detach(), None, None, targets, weight, weight, 1.0, False)
        return -torch.zeros(len(batch.x), device=ce.device, dtype=ce.dtype).index_add(0, self.row_of(batch), ce)

    def compare(self, batch, targets, *_):
        """For an evaluation, sums over the learned tokens: the student's CE, its KL from the teacher, how often their likeliest tokens agree, the
        teacher's CE, and their number. Without a teacher the student is its own."""
        teacher_hidden, hidden = self.hidden(batch, self.teacher is not None)
        teacher_hidden, head = (hidden, self.student.lm_head.weight) if teacher_hidden is None else (teacher_hidden, self.teacher.lm_head.weight)
        total, ones = torch.zeros(5, dtype=torch.float64, device=targets.device), torch.ones(targets.shape, device=targets.device)
        for at, logits, theirs in chunks(hidden, self.student.lm_head.weight, teacher_hidden, head):
            ce, kl, _ = token_losses(logits, theirs, targets[at], ones[at], ones[at])
            teacher_ce, *_ = token_losses(theirs, None, targets[at], ones[at], ones[at])
            total += torch.stack([ce.sum(), kl.sum(), (logits.argmax(-1) == theirs.argmax(-1)).sum(), teacher_ce.sum(), ones[at].sum()]).double()
        return total


# ---------------------------------------------------------------------------------------------------------------
# One process or many


@dataclass
class Run:
    """What every part of a run asks for."""
    s: Settings
    device: torch.device
    rank: int = 0        # of this process
    size: int = 1        # how many there are
    stop: str = ""       # the signal that asks to stop

    @property
    def compiled(self):
        """Whether layers are compiled."""
        return self.s.compile and self.device.type == "cuda"

    @property
    def dtype(self):
        """Of the arithmetic."""
        return getattr(torch, self.s.dtype or "float32")

    @property
    def sharded(self):
        """Whether torchrun started it, be it as one process: then FSDP2 holds what it trains."""
        return dist.is_initialized()


def begin(s):
    """The Run of this process: one of several when torchrun started it."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return Run(s, pick_device(s.device))
    local, gpu = int(os.environ["LOCAL_RANK"]), s.device.startswith("cuda") or not s.device and torch.cuda.is_available()
    if s.device.startswith("cuda:"):
        raise MilError(f"--device {s.device}: behind torchrun each process takes a GPU of its own; expected cuda or cpu (CUDA_VISIBLE_DEVICES says which GPUs there are)")
    if gpu and 0 < (there := torch.cuda.device_count()) <= local:
        raise MilError(f"process {local} finds no GPU of its own, there are {there}; expected torchrun with --nproc_per_node {there} at most, or --device cpu")
    device = pick_device(f"cuda:{local}" if gpu else s.device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=12), device_id=device if gpu else None)  # a process may tokenise, or answer, for long
    return Run(s, device, dist.get_rank(), dist.get_world_size())


def together(run):
    """Waits for all processes."""
    if run.size > 1:
        dist.barrier()


def end_together():
    """Leave the process group. Not after an error: NCCL would wait for processes that are still in an exchange; torchrun ends them once one has ended."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def resharded(models):
    """The student's parameters by name, what is sharded as the shard that this process holds: an evaluation leaves them gathered, as their products read them."""
    for module in models.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return dict(models.student.named_parameters())


def whole(run, tensors):
    """All of tensors, by name, of which this process may hold a part: on the CPU of process 0, None elsewhere."""
    full = ((name, w.full_tensor() if hasattr(w, "full_tensor") else w) for name, w in tensors.items())  # tensor by tensor, in each of which all processes take part
    return {name: w.detach().cpu() if run.rank == 0 else None for name, w in full}


def shard(run, models, own):
    """Shard over all processes what trains, its gradients and AdamW's state (FSDP2, as ZeRO-3). For each part of a step a layer's matrices are all-gathered, in
    the type of its products, for its forward pass and again for its backward pass, with --shard grads once for both (as ZeRO-2); embedding, head and all
    layers' other tensors once, in their own type; gradients are reduce-scattered in float32. What does not train is replicated, unless --shard is all.
    own(prefixes) makes float32 what trains and is named so, one layer after the other, since before it is sharded there may be no room for all of it."""
    if not run.sharded:
        own(("",))
        return models
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # that a layer returns a view, which only an operation in place on it would harm
    products = MixedPrecisionPolicy(param_dtype=getattr(torch, run.s.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh, matrices = dist.init_device_mesh(run.device.type, (run.size,)), lambda module: {m.weight for m in module.modules() if isinstance(m, nn.Linear)}

    def over_all(module, these, **how):
        replicated = {w for w in module.parameters() if not w.requires_grad and run.s.shard != "all"}
        fully_shard(module, mesh=mesh, ignored_params={*module.parameters()} - these | replicated, **how)

    for i, both in enumerate(models.layers):
        own((f"layers.{i}.",))
        over_all(both, matrices(both), mp_policy=products, reshard_after_forward=run.s.shard != "grads")
    own(("embed_tokens", "norm", "lm_head"))
    over_all(models, {*models.parameters()} - matrices(models.layers), reshard_after_forward=False)
    return models


# ---------------------------------------------------------------------------------------------------------------
# The training loop and its checkpoints


def show(line, done=True):
    """A line on the terminal, of process 0; with done=False one that the next line overwrites."""
    if dist.is_initialized() and dist.get_rank():
        return
    live = sys.stdout.isatty()
    if live and not done:  # a line that wraps could not be overwritten
        line = line[:shutil.get_terminal_size().columns - 1]
    if done or live:
        print(f"\r\033[K{line}" if live else line, end="\n" if done else "", flush=True)  # \033[K clears the rest of the line


def clock(seconds):
    """Hours, where there are any, minutes and seconds."""
    minutes = f"{int(seconds) // 60 % 60}:{int(seconds) % 60:02d}"
    return minutes if seconds < 3600 else f"{int(seconds) // 3600}:{minutes:0>5}"


@dataclass
class State:
    """How far a run is: what a checkpoint holds."""
    stage: int = 0                                  # 0 the teacher, i the i-th of the run's stages
    step: int = 0                                   # the next one
    trained: dict = field(default_factory=dict)     # the student's tensors that have been trained, float32
    moments: list = field(default_factory=list)     # AdamW's state of what trains
    seconds: float = 0.0                            # trained in this stage
    before: float = 0.0                             # the validation KL before it
    rows: list = field(default_factory=list)        # of the table
    settings: dict = field(default_factory=dict)


def checkpoints(run):
    """The checkpoints in --out, the newest last."""
    return sorted((Path(run.s.out) / "checkpoints").glob("[0-9]*.pt"))


def save_state(run, state, models, optimizer=None):
    """Write what the run needs to go on, without an optimizer at the end of a stage, and drop what is older than the newest few.
    Gives all processes what was trained, read from the file, which only process 0 could fill; it stays readable when it has been dropped."""
    trained = whole(run, {name: w for name, w in resharded(models).items() if name in state.trained or w.requires_grad})
    moments = [whole(run, optimizer.state[w]) for group in optimizer.param_groups for w in group["params"]] if optimizer else []
    place = Path(run.s.out) / "checkpoints" / f"{state.stage:02d}-{state.step:08d}.pt"
    if run.rank == 0:
        mil.make_directory(place.parent)
        saved = {**vars(state), "trained": trained, "moments": moments}
        mil.write_whole(place, lambda f: torch.save(saved, f))
        for old in checkpoints(run)[:-run.s.keep_checkpoints]:
            old.unlink()
    together(run)
    return torch.load(place, map_location="cpu", weights_only=True, mmap=True)["trained"] if run.sharded else trained


FREE = {"out", "device", "resume", "save_minutes", "keep_checkpoints", "compile", "memory_budget", "prompt", "accumulate", "recipe", "shard"}  # may differ when a run goes on


def load_state(run, stages, corpus):
    """The state of the newest checkpoint that can be read, or a new one. MilError where it belongs to other settings, or --resume is not given."""
    said = {k: v for k, v in dataclasses.asdict(run.s).items() if k not in FREE}
    said["stages"] = [dataclasses.asdict(stage) for stage in stages]
    said["files"] = {"--data": corpus.key, **{f"--{name}": identity(weights_in(getattr(run.s, name))) for name in ("teacher", "init_from") if getattr(run.s, name)},
                     **{f"stage {i}": identity(find_files(stage.data, run.s.out)) for i, stage in enumerate(stages, 1) if stage.data}}
    for place in reversed(checkpoints(run)):
        if not run.s.resume:
            raise MilError(f"--out {run.s.out}: holds an unfinished run; --resume goes on with it, and without {place.parent} it is forgotten")
        try:
            state = State(**torch.load(place, map_location="cpu", weights_only=True, mmap=True))
        except Exception as e:  # as the damage has it
            show(f"note: {place}: not a whole checkpoint, passed over: {str(e).splitlines()[0]}")
            continue
        was = state.settings
        other = [f"--{k} was {was.get(k)!r} and is {v!r}" for k, v in said.items() if k not in ("stages", "files") and was.get(k) != v]
        if not other and len(was["stages"]) != len(stages):
            other = [f"there were {len(was['stages'])} stages and are {len(stages)}"]
        other = other or [f"stage {i}: {k} was {a[k]!r} and is {b[k]!r}" for i, (a, b) in enumerate(zip(was["stages"], said["stages"]), 1) for k in b if a[k] != b[k]]
        other = other or [f"the files of {k} have changed (size or time)" for k, v in said["files"].items() if was["files"].get(k) != v]
        if other:
            raise MilError(f"--resume: {place} was made with other settings: {'; '.join(other)}. Give them as they were, or another --out")
        show(f"goes on from {place}: {['the teacher', *(stage.name for stage in stages), 'the report'][state.stage]}, after step {state.step}")
        return state
    if run.s.resume and not (Path(run.s.out) / "results.json").exists():
        show(f"note: --out {run.s.out}: there is no checkpoint to go on from; this run begins anew")
    return State(settings=said)


def spread(moments, w):
    """AdamW's state of a parameter, as that lies on this process."""
    if not hasattr(w, "device_mesh"):
        return {key: t.clone() for key, t in moments.items()}
    from torch.distributed.tensor import distribute_tensor
    return {key: distribute_tensor(t.to(w.device), w.device_mesh, w.placements) if t.dim() else t.clone() for key, t in moments.items()}


def fit(run, state, stage, models, batches, journal, last_good):
    """Train what of the student requires gradients, from state.step on: batches(step) gives the parts of a step's batch, and how many tokens, or pairs, all
    processes learn of. Stops with MilError when the loss is not finite; `last_good` is a sentence of it that says which model is then the last good one."""
    s, device, began, saved = run.s, run.device, time.perf_counter() - state.seconds, time.monotonic()
    train = [w for w in resharded(models).values() if w.requires_grad]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        train, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused
    )
    if state.moments:
        optimizer.load_state_dict({"state": dict(enumerate(map(spread, state.moments, train))), "param_groups": optimizer.state_dict()["param_groups"]})
        state.moments = []
    every, recent, told, names = min(10, max(1, stage.steps // 100)), [], saved, ("chosen", "margin") if stage.loss == "dpo" else ("ce", "kl")

    def update(parts, scale):
        """Forward, backward, clipping and AdamW; for the log the loss, two more sums and the gradient's norm, of which all processes' add up to the step's."""
        sums = torch.zeros(4, device=device)
        for part in parts:
            loss, more = models(part, stage, scale)
            loss.backward()
            sums[:3] += torch.cat([loss.detach()[None], more]) / run.size
        norm = torch.nn.utils.clip_grad_norm_(train, s.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums[3] = (norm.full_tensor() if run.sharded else norm) / run.size
        return sums

    for step, (parts, count) in enumerate(ahead(batches, state.step, stage.steps, device), state.step):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * lr_share(stage, step)
        recent.append(update(parts, run.size / max(1, count)))  # times run.size, since FSDP2 takes the mean of the gradients
        state.step, last = step + 1, step == stage.steps - 1
        if step % every == every - 1 or last or run.size == 1 and run.stop:  # reading the loss waits for the device, so not every step
            wish = recent[-1].new_tensor([bool(run.stop), not run.rank and time.monotonic() - saved >= 60 * s.save_minutes])
            *values, stop, due = added_up(run, torch.cat([*recent, wish])).tolist()
            for i, value in enumerate(values[::4]):
                if not math.isfinite(value):
                    raise MilError(f"{stage.name}: the loss became {value} at step {step + 2 - len(recent) + i} of {stage.steps}; stopped. "
                                   f"{last_good}. Try a lower learning rate (this stage had {stage.lr:g})")
            means = [sum(values[i::4]) / len(recent) for i in range(4)]
            state.seconds = time.perf_counter() - began
            speed, ahead_of = state.step * s.batch * s.context / state.seconds, state.seconds / state.step * (stage.steps - state.step)
            if run.rank == 0:
                journal.write(json.dumps({"stage": stage.name, "step": state.step, "loss": means[0], names[0]: means[1], names[1]: means[2], "gradient": means[3],
                                          "lr": stage.lr * lr_share(stage, step), "seconds": round(state.seconds, 2), "memory": most_memory(device)}) + "\n")
                journal.flush()
            stays = last or not sys.stdout.isatty() and (state.step % (20 * max(every, stage.steps // 100)) == 0 or time.monotonic() - told > 30)
            show(f"{stage.name}  step {state.step}/{stage.steps}  loss {means[0]:.4f}  {names[0]} {means[1]:.4f}  {names[1]} {means[2]:.4f}  "
                 + f"{speed:,.0f} tokens/s  " * (stage.loss != "dpo") + f"{gib(most_memory(device))}  " * fused + f"ETA {clock(ahead_of)}", done=stays)
            recent, told = [], time.monotonic() if stays else told
            if (due or stop) and not last:  # after the last, distill saves
                save_state(run, state, models, optimizer)
                saved = time.monotonic()
                if stop:
                    leave(run, jointly=True)


def leave(run, jointly=False):
    """Ends the program as the signal asks: this process or, where they all come here, all `jointly`."""
    show(f"\nstopped by {run.stop or 'a signal'}; the same command with --resume goes on from here")
    if jointly:
        end_together()
    sys.exit(130 if run.stop == "SIGINT" else 143)


def listen(run):
    """SIGTERM and Ctrl-C ask the run to stop after its step (of several processes, after at most ten), with a checkpoint; a second one stops it at once."""
    def heard(number, _):
        if run.stop:
            raise KeyboardInterrupt
        run.stop = signal.Signals(number).name
        if not run.rank:  # print may be what was interrupted
            os.write(2, f"\n{run.stop}: stops at the next logged step, with a checkpoint; a second signal stops at once, without one\n".encode())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(run, models, corpus, encoding):
    """The rows of a table for the teacher and for the student: loss, perplexity, bits per byte, KL to the teacher and top-1 agreement with it, on
    validation text."""
    sizes = torch.tensor([len(encoding.bytes_of(i)) for i in range(models.student.config.v)], device=run.device)
    total = torch.zeros(6, dtype=torch.float64, device=run.device)
    for batch in evaluation_batches(run, corpus):
        total += torch.cat([models(batch), sizes[batch.y[batch.y >= 0]].sum().double()[None]])
    ce, kl, agree, teacher_ce, count, size = added_up(run, total).tolist()
    count = max(count, 1)

    def row(ce, kl, agree):
        return {"loss": ce / count, "perplexity": math.exp(min(ce / count, 700)), "bits_per_byte": ce / math.log(2) / max(size, 1), "kl": kl / count,
                "agreement": agree / count}
    return row(teacher_ce, 0.0, count), row(ce, kl, agree)


@torch.no_grad()
def preferences(run, stage, models, pairs):
    """How often the chosen answer gains more over the teacher than the rejected one, its standard error, and by how much (β times, in nats)."""
    total = torch.zeros(2, device=run.device)
    # Nothing of the filler is learned, so that its margin is 0 and it is not preferred.
    filler = tuple([min(i, ~i) for i in ids] for ids in pairs[0])
    for mine, real in turns(run, len(pairs), run.s.batch // 2):
        batch = [pairs[i] for i in mine[:real]] + [filler] * (len(mine) - real)
        total += models(pair_batch(run, batch), stage)[1]
    right, margin = added_up(run, total).tolist()
    rather = (right + 1) / (len(pairs) + 2)  # so that a few pairs that agree are not taken for certain
    return {"preferred": right / len(pairs), "preferred_error": (rather * (1 - rather) / (len(pairs) + 2)) ** 0.5, "margin": margin / len(pairs)}


# ---------------------------------------------------------------------------------------------------------------
# The stages, run


def owned(model, names, values=None):
    """Parameters of these names become the model's own, float32 or more, where it shared them; with the values of a dict, where it has them."""
    for name, w in list(model.named_parameters()):
        if name in names:
            place, _, leaf = name.rpartition(".")
            new = (values or {}).get(name, w.detach())
            new = new.to(w.device, torch.promote_types(new.dtype, torch.float32), copy=True)
            setattr(model.get_submodule(place), leaf, nn.Parameter(new))
    model.tie()
    return model


class Source:
    """Where a run's teacher, and the Llama its student begins as, come from; read once where a process holds them whole, anew for each stage where they are
    shared out."""

    def __init__(self, run, place):
        self.run, self.place, self.kept = run, place, None

    def read(self):
        """The teacher and the student's Llama, in the types of their files where the arithmetic is bfloat16: they only read."""
        if self.kept:
            return self.kept
        s, keeps = self.run.s, not self.run.sharded or self.run.s.shard != "all"
        load = lambda place: mil.load(place, self.run.device if keeps else None, None if s.dtype == "bfloat16" else torch.float32)  # noqa: E731
        teacher = load(self.place)
        found = teacher, load(s.init_from) if s.init_from else mil.keep_layers(teacher, chosen_layers(s)) if s.student_layers else teacher
        self.kept = found if keeps else None
        return found


def assemble(run, teacher, base, stage, number, trained):
    """The Models of a stage: the student is `base` with attention replaced as the stage says, the tensors trained before (`trained`) put in; what trains
    now requires gradients; that and what was trained before is the student's own, in float32, and everything else the base's own tensor."""
    if run.sharded:
        gc.collect()  # FSDP2 leaves its models in circles, and with them an earlier stage's tensors in memory
    torch.manual_seed(run.s.seed + 1 + number)  # the new mixers' first values: the same in every process, which keeps its shard of them
    student = mil.replace_attention(base, [], run.s.mixer, share=True)  # replaces nothing: other modules, the same tensors
    for mixer in dict.fromkeys(mixer for mixer in stage.mixers if mixer != "attention"):
        student = mil.replace_attention(student, [i for i, m in enumerate(stage.mixers) if m == mixer], mixer, run.s.init, share=True)
    for w in [*teacher.parameters(), *base.parameters()] if teacher else base.parameters():
        w.requires_grad_(False)
    names = {name for name, _ in student.named_parameters() if name in trained or stage.trains(name)}

    def own(prefixes):
        owned(student, {name for name in names if name.startswith(prefixes)}, trained)
        for name, w in student.named_parameters():
            if name.startswith(prefixes):
                w.requires_grad_(stage.trains(name))
    return prepare(run, Models(teacher, student), own)


def prepare(run, models, own=lambda prefixes: None):
    """The arithmetic's type, torch.compile, and the processes (for `own` see shard)."""
    present = [model for model in (models.teacher, models.student) if model is not None]
    for model in present:
        model.compute = getattr(torch, run.s.dtype)
    if run.compiled:
        # All layers share one limit, and each mixer compiles a version for what of it trains, for
        # whether its input has a gradient, for evaluation, and for pairs, whose lengths vary.
        torch._dynamo.config.recompile_limit = 64
        torch._functorch.config.activation_memory_budget = run.s.memory_budget
        for model in present:
            for layer in model.layers:
                layer.compile()
        told = "compiling the layers: the first batches take about a minute"
        show(told, done=not sys.stdout.isatty())
    return shard(run, models, own)


def save_student(run, models, place, tokenizer, base_type, **notes):
    """Write the student as a model of its own, in the type of the Llama it began as."""
    weights = whole(run, resharded(models))
    if run.rank == 0:
        model = mil.empty_model(models.student.config)
        model.load_state_dict(weights, strict=False, assign=True)  # of a tied pair, the embedding
        model.tie()
        save_with_tokenizer(mil.cast(model, base_type), place, tokenizer, **notes)
    together(run)


def new_config(s, encoding):
    """The Llama that the settings ask for."""
    return mil.Config(v=encoding.size, context=s.context, rope_theta=s.rope_theta, **{name: getattr(s, name) for name in SIZES})


def get_teacher(run, state, config, corpus, encoding, tokenizer, journal, place):
    """Has a Llama of this config trained on the corpus in the folder `place`, or the one of an earlier run when it was made from the same settings and data."""
    s = run.s
    recipe = {"data": corpus.key, "torch": torch.__version__,
              **{k: getattr(s, k) for k in ("seed", "batch", "context", "teacher_steps", "teacher_lr", "warmup", "clip", "dtype", "schedule")}}
    if state.stage == 0 and not state.step and (place / "config.json").exists():
        about = mil.read_config(place)
        if about.get("recipe") == recipe and about["config"] == config:
            try:
                mil.load(place)
            except MilError as e:
                raise MilError(f"{e}; delete {place} to have it trained again") from e
            show(f"teacher: reused from {place}, made with the same settings and data")
            state.stage = 1
        else:
            show(f"teacher: the one in {place} was made with other settings or data; training a new one")
    if state.stage == 0:
        torch.manual_seed(s.seed)
        stage = Stage(train="all", alpha=1, beta=0, steps=s.teacher_steps, lr=s.teacher_lr, warmup=s.warmup, schedule=s.schedule, name="teacher", mixers=config.mixers)
        model = owned(mil.Hybrid(config).to(run.device), state.trained, state.trained)
        models = prepare(run, Models(None, model))
        fit(run, state, stage, models, training_batches(run, corpus, [s.seed, 0]), journal, "This run saved no teacher")
        save_student(run, models, place, tokenizer, torch.float32, recipe=recipe)
        state.rows = [{"model": "teacher", **evaluate(run, models, corpus, encoding)[0], **throughput(run, state, stage)}]
        state.stage, state.step, state.seconds = 1, 0, 0.0
        save_state(run, state, models)
    state.trained = {} if state.stage <= 1 and not state.step else state.trained  # a checkpoint at this point holds the teacher


def throughput(run, state, stage):
    """How long a stage took, and at what rate."""
    return {"seconds": state.seconds, "tokens_per_second": stage.steps * run.s.batch * run.s.context / max(state.seconds, 1e-9)}


def distill(run, state, stages, source, corpora, encoding, tokenizer, journal):
    """The stages from state.stage on (1 is the first). Appends a row of evaluation to state.rows after each."""
    s, place, last_good, validation = run.s, Path(run.s.out) / "student", "This run saved no student", corpora()
    kind = source.read()[1].embed_tokens.weight.dtype

    def report(name, models, more):
        first_row, row = evaluate(run, models, validation, encoding)
        state.rows = state.rows or [{"model": "teacher", **first_row}]
        state.rows.append({"model": name, **row, **more})
        if not math.isfinite(row["loss"]):
            raise MilError(f"{name}: the validation loss is {row['loss']}; stopped. {last_good}. Try lower learning rates")
        preferred = f", chosen preferred {more['preferred']:.1%} ± {more['preferred_error']:.1%}, margin {more['margin']:.4f}" if "preferred" in more else ""
        was = f" (before: {more['kl_before']:.4f})" if "kl_before" in more else ""
        show(f"{name}: validation loss {row['loss']:.4f}, KL to the teacher {row['kl']:.4f}{was}{preferred}")

    if len(state.rows) < 2:
        untrained = dataclasses.replace(stages[0], mixers=stages[-1].mixers, train="mixers")
        report("student, not trained", assemble(run, *source.read(), untrained, 0, {}), {})
    for number, stage in enumerate(stages, 1):
        if number < state.stage:
            last_good = f"The last good checkpoint is {place}, after {stage.name}"
            continue
        models = assemble(run, *source.read(), stage, number, state.trained)
        state.before = state.before if state.step else evaluate(run, models, validation, encoding)[1]["kl"]
        held = ()
        if stage.loss == "dpo":
            train, held = load_pairs(s, stage.data, encoding)
            batches = pair_batches(run, train, [s.seed, number])
        else:
            batches = training_batches(run, corpora(stage.data, answers=s.pseudo_labels and not stage.data), [s.seed, number])
        fit(run, state, stage, models, batches, journal, last_good)
        took = throughput(run, state, stage) if stage.loss == "distill" else {"seconds": state.seconds}
        report(stage.name, models, {**took, "kl_before": state.before, **(preferences(run, stage, models, held) if held else {})})
        save_student(run, models, place, tokenizer, kind, stage=stage.name)
        last_good = f"The last good checkpoint is {place}, after {stage.name}"
        state.stage, state.step, state.seconds = number + 1, 0, 0.0
        state.trained = save_state(run, state, models)
        del models, batches  # the next student comes before this one would go


# ---------------------------------------------------------------------------------------------------------------
# What a stage costs


def matrices(config, counts=lambda name: True):
    """The parameters, of those that count, that each token is multiplied with; of a tied head once."""
    weights = {name: w.numel() for name, w in mil.empty_model(config).named_parameters() if w.dim() == 2 and not name.endswith("A_log")}
    if not config.tied:
        del weights["embed_tokens.weight"]  # where tokens are looked up
    return sum(n for name, n in weights.items() if counts(name))


def forward_flops(config, context):
    """Of one token: two a parameter of a matrix; of attention 4 a channel and key, of which on average half are seen; of a recurrence 4 a state element."""
    wide = config.n_heads * config.head_dim
    mix = {"attention": 2 * context * wide, "mamba": 4 * wide * config.d_state, "mamba2": 4 * wide * config.head_dim, "none": 0}
    return 2 * matrices(config) + sum(mix.get(mixer, mix["mamba2"]) for mixer in config.mixers)


def flops(teacher, student, stage, context):
    """Model FLOPs of a stage's step, per token, what is computed twice counted once: the teacher's forward; the student's forward and, as much again,
    the gradients of what its layers read; and two for each parameter of a matrix that learns."""
    return (forward_flops(teacher, context) if teacher and stage.beta > 0 else 0) + 2 * forward_flops(student, context) + 2 * matrices(student, stage.trains)


def device_flops(run):
    """Matrix operations a second that this device does, of matrices of a few thousand rows."""
    a = torch.randn((4096 if run.device.type == "cuda" else 512,) * 2, device=run.device, dtype=getattr(torch, run.s.dtype))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2 * len(a) ** 3 / min(times)


def most_memory(device):
    """The most bytes that this process has held so far: on a GPU PyTorch's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def announce(run, stages, teacher, base):
    """Says, before a run begins, what its stages are and how long they may take."""
    s, peak = run.s, device_flops(run)
    lines = [
        f"{'':<38}{'attention':>10}{'trained':>10}{'tokens':>10}{'lr':>9}{'α':>6}{'β':>6}{'time':>8}"
    ]
    before = [
        Stage(
            train="all",
            beta=0,
            steps=s.teacher_steps,
            lr=s.teacher_lr,
            name="teacher",
            mixers=teacher.mixers,
        )
    ] * (not s.teacher)
    for stage in before + stages:
        config, alone = (
            dataclasses.replace(base, mixers=stage.mixers) if stage not in before else teacher,
            stage in before,
        )
        learns = sum(
            w.numel()
            for name, w in mil.empty_model(config).named_parameters()
            if stage.trains(name)
        )
        tokens = stage.steps * s.batch * s.context
        seconds = (
            flops(None if alone else teacher, config, stage, s.context)
            * tokens
            / (0.5 * peak * run.size)
        )
        kept, alpha = (
            f"{stage.mixers.count('attention')} of {len(stage.mixers)}",
            f"{stage.alpha:g}" if stage.loss == "distill" else "",
        )
        lines.append(
            f"{stage.name:<38}{kept:>10}{short(learns):>10}{short(tokens):>10}{stage.lr:>9.1e}{alpha:>6}{stage.beta:>6g}{clock(seconds):>8}"
        )
    show("\n".join(lines))
    show(f"time: at half of this device's {peak / 1e12:.3g} TFLOP/s")


def short(n):
    """A number of parameters or tokens, in four characters or so."""
    return f"{n / 1e9:,.2f} G" if n >= 1e9 else f"{n / 1e6:,.1f} M" if n >= 1e5 else f"{n / 1e3:.1f} K"


def gib(size):
    """Bytes, in GiB or, where they are few, in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


# ---------------------------------------------------------------------------------------------------------------
# The report and the command


def table(rows):
    lines = [f"{'':<38}{'loss':>8}{'ppl':>9}{'bits/byte':>11}{'KL':>9}{'agree':>8}{'tokens/s':>11}{'seconds':>9}"
             + f"{'preferred':>18}{'margin':>9}" * any("preferred" in r for r in rows)]
    for r in rows:
        speed = (f"{r['tokens_per_second']:>11,.0f}" if "tokens_per_second" in r else f"{'':>11}") + f"{r['seconds']:>9.1f}" if "seconds" in r else ""
        speed += f"{r['preferred']:>10.1%} ± {r['preferred_error']:.1%}{r['margin']:>9.4f}" if "preferred" in r else ""
        lines.append(f"{r['model']:<38}{r['loss']:>8.4f}{r['perplexity']:>#9.4g}{r['bits_per_byte']:>11.4f}{r['kl']:>9.4f}"
                     f"{r['agreement']:>8.1%}{speed}")
    return "\n".join(lines)


def sample(model, encoding, s, device):
    prompt, reply = encoding.encode(s.prompt)[:model.config.context - 1], []
    for ((token,),) in generate(model, [prompt], 200, 0.7, 0, 0.95, stop=encoding.stops, generator=torch.Generator(device).manual_seed(s.seed)):
        reply += [token] if token not in encoding.stops else []
    return s.prompt + encoding.decode(reply)


def side_by_side(left, right, width=58):
    """Two texts in two columns."""
    columns = [[piece for line in text.expandtabs(4).splitlines() for piece in textwrap.wrap(
        line, width, replace_whitespace=False, drop_whitespace=False) or [""]] for text in (left, right)]
    height = max(map(len, columns))
    return "\n".join(f"{a:<{width}} │ {b}".rstrip() for a, b in zip(*([*c, *[""] * (height - len(c))] for c in columns)))


def plot(log, path):
    """The loss of every stage over its steps, as log.jsonl has them, where matplotlib is installed; returns whether it is."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    names = list(dict.fromkeys(record["stage"] for record in records))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False, layout="constrained")
    for name, axis in zip(names, axes[0]):
        mine = [record for record in records if record["stage"] == name]
        for key in ("loss", "ce", "kl", "margin"):
            if any(record.get(key) for record in mine):
                axis.plot([record["step"] for record in mine], [record[key] for record in mine], label=key)
        axis.set(title=name, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def open_journal(run, state, stages):
    """log.jsonl, without the lines of steps that the run will do again."""
    path, order = Path(run.s.out) / "log.jsonl", {name: i for i, name in enumerate(["teacher", *[stage.name for stage in stages]])}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() and run.s.resume else []
        records = [json.loads(line) for line in lines]
        kept = [line for line, record in zip(lines, records) if (order.get(record["stage"], -1), record["step"]) <= (state.stage, state.step)]
        if run.rank == 0:
            mil.write_whole(path, lambda f: f.write("".join(line + "\n" for line in kept).encode()))
        return open(path if run.rank == 0 else os.devnull, "a", encoding="utf-8")
    except (OSError, ValueError, KeyError) as e:
        raise MilError(f"{path}: cannot be read or written: {e}") from e


def main(argv):
    s, began = parse_flags(Settings, argv, __doc__), time.perf_counter()
    run = begin(s)
    try:
        work(run, began)
    except torch.OutOfMemoryError as e:
        lower = "--memory_budget 0.7, --accumulate, --batch, --context or --stage2_steps 0"
        lower += ", and of several processes --shard all" * (run.size > 1)
        full = str(e).splitlines()[0]
        raise MilError(f"the GPU's memory is full; these flags lower it: {lower}. ({full})") from e
    except RuntimeError as e:  # of gloo; NCCL waits, and torchrun ends what waits
        if not (run.sharded and re.search("by peer|Broken pipe", str(e))):
            raise
        raise MilError("another process has ended; what it said stands above. With --resume the same command goes on from the newest checkpoint, if there is one") from e
    end_together()


def work(run, began):
    """All of a run: settings and stages checked, data, teacher, stages, report."""
    s, device = run.s, run.device
    about = mil.read_config(s.teacher) if s.teacher else {}
    complete(s, device, about.get("config"))
    for name, place in (("teacher", s.teacher), ("init_from", s.init_from)):
        if place and Path(place).resolve() == (Path(s.out) / "student").resolve():
            raise MilError(f"--{name} {place} is where the student will be written; give another --out")
    tokenizer = tokenizer_of(s.teacher) if s.teacher else s.tokenizer or "bytes"
    encoding = load_tokenizer(tokenizer)
    if s.teacher and s.tokenizer and not load_tokenizer(s.tokenizer).same_text(encoding):
        raise MilError(f"--tokenizer {s.tokenizer} is not the one the teacher in {s.teacher} was trained with ({tokenizer}); leave it out")
    config = about.get("config") or new_config(s, encoding)
    base = config
    if s.init_from:
        base = mil.read_config(s.init_from)["config"]
        if base.v != config.v or not load_tokenizer(tokenizer_of(s.init_from)).same_text(encoding):
            raise MilError(f"--init_from {s.init_from}: it has another tokenizer ({base.v} tokens) than the teacher ({config.v}): both must speak of the same tokens")
        if set(base.mixers) != {"attention"}:
            raise MilError(f"--init_from {s.init_from}: holds {', '.join(sorted(set(base.mixers)))}; expected a Llama, with attention in every layer")
    if s.student_layers:
        base = dataclasses.replace(config, n_layers=len(chosen_layers(s)), mixers=[config.mixers[i] for i in chosen_layers(s)])
    stages = plan(s, base)
    paired = any(stage.loss == "dpo" for stage in stages)
    if s.batch % (rows := run.size * s.accumulate * (1 + paired)):
        raise MilError(f"--batch is {s.batch}, expected a multiple of {rows}: {run.size} process{'es' * (run.size > 1)} × --accumulate {s.accumulate}{' × the 2 of a pair' * paired}")
    for stage in stages:
        if stage.loss == "dpo":  # MilError now rather than after the stages before
            stage.steps = stage.steps or max(1, len(load_pairs(s, stage.data, encoding)[0]) // (s.batch // 2))
        else:
            find_files(stage.data, s.out, "--recipe: data")
    find_files(s.data, s.out)
    mil.make_directory(s.out)
    announce(run, stages, config, base)
    made, place = {}, Path(s.teacher or Path(s.out) / "teacher")

    def corpora(paths=(), answers=False):
        if (key := (tuple(paths), answers)) not in made:
            if answers:
                made[key] = answered(run, s.data, place, encoding, tokenizer)
            else:
                with in_turn(run):
                    made[key] = load_corpus(s, paths or s.data, encoding, tokenizer)
            show(f"data: {made[key].about}")
        return made[key]

    corpus, results = corpora(), Path(s.out) / "results.json"
    state = load_state(run, stages, corpus)
    if not checkpoints(run) and results.exists():
        same = json.loads(results.read_text()).get("made_from") == json.loads(json.dumps(state.settings))
        if s.resume and not same:
            raise MilError(f"--resume: {results} is of a finished run with other settings; without --resume it is replaced, another --out leaves it")
        if s.resume:
            return show(f"{results}: this run is finished")
        show(f"note: {s.out} holds a finished run, which is replaced")
    together(run)
    if run.rank == 0:
        results.unlink(missing_ok=True)
    for stage in stages:
        if stage.data and stage.loss == "distill":
            corpora(stage.data)  # MilError now
    listen(run)
    with open_journal(run, state, stages) as journal:
        if not s.teacher:
            get_teacher(run, state, config, corpus, encoding, tokenizer, journal, place)
        state.stage = max(1, state.stage)
        show(f"teacher: {sum(w.numel() for w in mil.empty_model(config).parameters()) / 1e6:.1f} M parameters, {config.n_layers} layers of width {config.d}")
        distill(run, state, stages, Source(run, place), corpora, encoding, tokenizer, journal)
    if run.rank == 0:
        finish(run, state, config, place, encoding, corpus, time.perf_counter() - began)


def finish(run, state, config, place, encoding, corpus, seconds):
    """The report: table, results.json, loss.png, a sample of both models; and the checkpoints, which nothing needs any more, go."""
    s, device, rows = run.s, run.device, state.rows
    memory = most_memory(device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    machine = f"{run.size} processes{', each with' if device.type == 'cuda' else ' on'} {machine}" if run.size > 1 else machine
    show(f"\n{table(rows)}\n\nstudent / teacher validation loss: {rows[-1]['loss'] / rows[0]['loss']:.4f}   "
         f"peak memory {'of process 0 ' * (run.size > 1)}{memory / 2**30:.2f} GiB   {seconds:.0f} s {'since --resume' if s.resume else 'in all'} on {machine}, torch {torch.__version__}")
    results = {"rows": rows, "seconds": seconds, "peak_memory_bytes": memory, "machine": machine, "torch": torch.__version__,
               "python": platform.python_version(), "teacher_parameters": sum(w.numel() for w in mil.empty_model(config).parameters()), "settings": dataclasses.asdict(s), "made_from": state.settings}
    mil.write_whole(Path(s.out) / "results.json", lambda f: f.write(json.dumps(results, indent=1).encode()))
    figure = plot(Path(s.out) / "log.jsonl", Path(s.out) / "loss.png")
    texts = [sample(mil.load(model, device, getattr(torch, s.dtype)), encoding, s, device) for model in (place, Path(s.out) / "student")]
    show(f"\n{'teacher':<58} │ student")
    show(side_by_side(*texts))
    more = "--chat" if (corpus.train[:10**6] < 0).any() else f"--prompt {shlex.quote(s.prompt)}"
    flags = f"--model {s.teacher} --draft {s.out}/student" if s.student_layers and s.teacher else f"--model {s.out}/student"
    show(f"\nstudent: {s.out}/student   table: {s.out}/results.json" + f"   losses: {s.out}/loss.png" * figure + f"\ntry: python generate.py {flags} {more}")
    shutil.rmtree(Path(s.out) / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
