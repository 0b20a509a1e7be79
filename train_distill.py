"""From a Llama to a Mamba hybrid, in one command.

    python train_distill.py                                  all of it, on the sources of Python's standard library
    python train_distill.py --data notes/ --keep 0.25        your text; keep a quarter of the attention layers
    python train_distill.py --teacher DIR --data chat.jsonl  your teacher: ours, or a folder from Hugging Face or Meta
    python train_distill.py --teacher out/teacher --student_layers 0,3 --keep 1 --out out/draft     a draft for it (generate.py)

    corpus -> teacher -> student: attention replaced by Mamba, in steps -> stage 1 -> stage 2 -> table, sample

The student learns from the teacher's distribution and from the text (Eq. 2 of arXiv 2408.15237), a mean per predicted
token:

    L = α · (-log p_student(x_{t+1})) + β · KL( p_teacher(· | x_≤t) ‖ p_student(· | x_≤t) )

Stage 1 trains only the new Mamba mixers; MLPs, norms, embeddings and the kept attention stay the teacher's. Attention
is replaced in steps, the layers already converted keeping what they learned. Stage 2 trains everything, for a shorter
time. Deviations from the paper at this scale: the text is the corpus itself, not answers written by the teacher, and
the learning rates suit small models. The third stage (preferences) is not here.

In this file, top to bottom: settings; data; losses and evaluation; the training loop; the stages; the report.
"""
import dataclasses
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import sys
import sysconfig
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import mil
from generate import (Conversation, TextStream, chat_format, encode, flag, generate, load_tokenizer, load_with_tokenizer, parse_flags, pick_device,
                      run_command, save_with_tokenizer, stop_tokens, token_bytes, tokenizer_of, vocabulary)
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
    return flag(0, f"{help} (default {PRESETS['cpu'][name]} on cpu, {PRESETS['cuda'][name]} on cuda)")


@dataclass
class Settings:
    out: str = flag("out", "where teacher/, student/, results.json and log.txt go")
    data: list = flag([], "text files, folders, or .jsonl (text, messages, or prompt and completion); empty: Python's standard library",
                      nargs="+", action="extend", metavar="path")
    tokenizer: str = flag("", "bytes, a Llama-3 tokenizer.model, a tokenizer.json, or a tiktoken name; empty: the teacher's, or bytes")
    teacher: str = flag("", "checkpoint of a ready teacher, ours, Hugging Face's or Meta's; empty: train one, or reuse the one in --out")
    mixer: str = flag("mamba2", "what replaces attention: mamba, mamba2, or none (the paper's ablation)")
    keep: float = flag(0.5, "share of attention layers that stay; the paper finds 0.5 close to the teacher, 0 possible")
    replace_steps: int = flag(0, "replace attention in this many steps: the paper's stepwise beats all at once (default 2, or 1 for one layer)")
    student_layers: str = flag("", "a small student, such as a draft: only these layers of the teacher, say 0,10,20,31; no stage 1, its steps go to "
                               "stage 2 (so --stage1_lr and --replace_steps do not apply). The paper's drafts keep 2 or 4. With --keep 1 it is a Llama")
    init: str = flag("attention", "attention: the mixer inherits W_q, W_k, W_v, W_o; random: it does not (worse)")
    seed: int = flag(0, "of initial values and of the order of the data")
    device: str = flag("", "cpu, cuda, cuda:1 …; empty: cuda if there is one")
    dtype: str = flag("", "of the arithmetic, bfloat16 or float32; weights are float32. Empty: bfloat16 on cuda")
    n_layers: int = sized("n_layers", "teacher: layers; every second one will be a Mamba")
    d: int = sized("d", "teacher: width; cost grows with its square")
    n_heads: int = sized("n_heads", "teacher: query heads; each d / n_heads wide")
    n_kv_heads: int = sized("n_kv_heads", "teacher: key/value heads; fewer than query heads is grouped-query attention")
    d_ff: int = sized("d_ff", "teacher: inner width of the MLP; 8/3 of d, rounded up to 128, as in Llama")
    context: int = sized("context", "tokens in a training sequence; the longest text attention can read")
    batch: int = sized("batch", "sequences in a step; less noise, more time")
    teacher_steps: int = sized("teacher_steps", "training steps of the teacher; a better teacher gives a better student")
    stage1_steps: int = sized("stage1_steps", "steps of stage 1, all replacement steps together: the new mixers learn")
    stage2_steps: int = flag(-1, f"steps of stage 2: everything learns; 0: no stage 2 (default {PRESETS['cpu']['stage2_steps']} on cpu, "
                                 f"{PRESETS['cuda']['stage2_steps']} on cuda)")
    teacher_lr: float = flag(3e-3, "peak learning rate of the teacher; small models bear large rates")
    stage1_lr: float = flag(3e-3, "stage 1; the paper's 8e-5 is for 8B parameters")
    stage2_lr: float = flag(1e-3, "stage 2; the paper's 2e-5 is for 8B parameters")
    alpha: float = flag(1.0, "weight α of the cross-entropy (paper: 1)")
    beta: float = flag(1.0, "weight β of the KL to the teacher (paper: 0.1 on the teacher's own answers)")
    warmup: float = flag(0.05, "share of a stage's steps in which the rate rises; then it falls as a cosine")
    clip: float = flag(1.0, "largest gradient norm (paper: 0.1)")
    eval_sequences: int = sized("eval_sequences", "validation sequences in an evaluation; more is more exact")
    prompt: str = flag("def ", "for the sample at the end")


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
    s.dtype = s.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    for name, allowed in (("mixer", mil.MIXERS[1:]), ("init", ("attention", "random")), ("dtype", ("float32", "bfloat16"))):
        if getattr(s, name) not in allowed:
            raise MilError(f"--{name} is {getattr(s, name)!r}, expected one of {', '.join(allowed)}")
    for name in ("alpha", "beta", "teacher_lr", "stage1_lr", "stage2_lr"):
        if not 0 <= getattr(s, name) < math.inf:
            raise MilError(f"--{name} is {getattr(s, name)}, expected 0 or more")
    if not s.clip > 0:
        raise MilError(f"--clip is {s.clip}, expected more than 0 (inf: no clipping)")
    if not 0 <= s.seed < 2**63 - 1:
        raise MilError(f"--seed is {s.seed}, expected 0 to 2^63 - 2")
    if not s.prompt or s.context < 2:
        raise MilError(f"--prompt is {s.prompt!r} and --context {s.context}; expected some text and at least 2")
    if s.alpha == s.beta == 0:
        raise MilError("--alpha and --beta are both 0: nothing would be learned; expected at least one above 0")
    if not 0 <= s.warmup <= 1:
        raise MilError(f"--warmup is {s.warmup}, expected a share between 0 and 1")
    if s.student_layers:
        mil.interleaved_layers(len(chosen_layers(s)), s.keep)  # refuses a share that is none
        return
    count = len(mil.interleaved_layers(s.n_layers, s.keep))
    if count == 0:
        raise MilError(f"--keep {s.keep} of {s.n_layers} layers replaces none; expected a smaller share")
    s.replace_steps = s.replace_steps or min(2, count)
    if not 1 <= s.replace_steps <= count:
        raise MilError(f"--replace_steps is {s.replace_steps}, expected 1 to {count}, the number of layers to replace")
    if s.stage1_steps < s.replace_steps:
        raise MilError(f"--stage1_steps is {s.stage1_steps}, expected at least one for each of {s.replace_steps} replacement steps")
    if teacher_config is None and s.d % (2 * s.n_heads):
        raise MilError(f"--d is {s.d}, expected a multiple of twice --n_heads {s.n_heads}: a head's channels turn in pairs")
    if teacher_config is not None and set(teacher_config.mixers) != {"attention"}:
        raise MilError(f"--teacher {s.teacher}: holds {', '.join(sorted(set(teacher_config.mixers)))}; expected a Llama, with "
                       f"attention in every layer")
    planned = teacher_config or mil.Config(v=1, context=s.context, **{name: getattr(s, name) for name in SIZES})
    dataclasses.replace(planned, mixers=[s.mixer] * s.n_layers)  # MilError now, not after training, if heads cannot be cut


# ---------------------------------------------------------------------------------------------------------------
# Data: documents -> tokens on disk, split into training and validation by document (within each when there are few)


def standard_library():
    """The running Python's own .py files, no tests and no installed packages, sorted."""
    root, skip = Path(sysconfig.get_paths()["stdlib"]), {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))


def find_files(paths, out):
    """The files under `paths`, sorted within each, without hidden ones and what this program wrote to `out`; MilError
    when there is nothing."""
    files, out = [], Path(out).resolve()
    for path in map(Path, paths):
        if not path.exists():
            raise MilError(f"--data {path}: no such file or folder")
        found = [path] if not path.is_dir() else sorted(
            p for p in path.rglob("*") if p.is_file() and out not in p.resolve().parents
            and not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not found:
            raise MilError(f"--data {path}: no files in this folder")
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
    end = stop_tokens(encoding)[:1]
    if isinstance(document, str):
        return encode(encoding, document) + end
    talk = Conversation(encoding, document if isinstance(document, list) else ())
    if isinstance(document, tuple):
        talk.add(document[0])
        talk.add(document[1], own=True)
        talk.extend(end, own=True)
    return [i if own else ~i for i, own in zip(talk.ids, talk.own)]


def read_documents(file, named):
    """The documents of one file: every line of a .jsonl, or the whole text. A file that is not UTF-8 is an error when
    the user `named` it, and passed over when it was found in a folder."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", b"", text.index("\0"), 0, "")
    except OSError as e:
        raise MilError(f"--data {file}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        if named:
            raise MilError(f"--data {file}: not UTF-8 text (byte {e.start})") from None
        return []
    if file.suffix == ".json" and text.lstrip().startswith("[") and '"messages"' in text[:9999]:
        raise MilError(f"--data {file}: a list in one piece; expected one record a line, in a file named .jsonl")
    if file.suffix != ".jsonl":
        return [text] if text.strip() else []
    documents = []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as e:
            raise MilError(f"--data {file}: line {i} is not JSON: {e}") from None
        document = jsonl_document(record) if isinstance(record, dict) else None
        if document is None:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise MilError(f"--data {file}: line {i} has {keys or 'no keys'}; expected text, messages (a list of role and "
                           f"content, both text), or prompt and completion, all of them text")
        for role in {m["role"] for m in document} - {"system", "user", "assistant", "tool"} if isinstance(document, list) else ():
            raise MilError(f"--data {file}: line {i} has a message of the role {role!r}, expected system, user, assistant or tool")
        documents.append(document)
    return documents


@dataclass
class Corpus:
    train: np.ndarray     # token ids, memory-mapped; ~id, below 0, where a token is read but not to be learned
    val: np.ndarray
    key: str              # what it was made from
    about: str            # a line for the reader


def load_corpus(s, encoding, tokenizer):
    """Tokenise --data once and keep it in out/data, under a name made from the files, their sizes and their times.

    Every twentieth document is validation. With fewer than ten documents, the last tenth of each is.
    """
    files = find_files(s.data, s.out) if s.data else standard_library()
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    key = hashlib.sha256(json.dumps([stats, tokenizer, repr(vocabulary(encoding)), chat_format(encoding)]).encode()).hexdigest()[:16]
    kind = np.int16 if encoding.n_vocab <= 2**15 else np.int32
    paths = [Path(s.out) / "data" / f"{key}.{part}.bin" for part in ("train", "val")]
    if not all(p.exists() for p in paths):
        named = set(map(Path, s.data))
        documents = [d for f in files for d in read_documents(f, f in named)]
        if not documents:
            raise MilError(f"--data {' '.join(s.data) or '(the standard library)'}: no text found, the files are empty or not UTF-8")
        parts = [[], []]
        for i, document in enumerate(documents):
            ids = np.array(document_tokens(encoding, document), dtype=kind)
            if len(documents) >= 10:
                parts[i % 20 == 9].append(ids)
            else:
                cut = len(ids) * 9 // 10
                parts[0].append(ids[:cut])
                parts[1].append(ids[cut:])
            if i % 500 == 499:
                show(f"tokenising: {i + 1} of {len(documents)} documents")
        mil.make_directory(paths[0].parent)
        for path, part in zip(paths, parts):
            mil.write_whole(path, lambda f, part=part: f.write(np.concatenate(part).tobytes()))
    train, val = (np.memmap(p, dtype=kind, mode="r") if p.stat().st_size else np.zeros(0, kind) for p in paths)
    for name, part, rows in (("training", train, s.batch), ("validation", val, 1)):
        if len(part) < rows * s.context + 1:
            raise MilError(f"--data: {len(part)} {name} tokens, but {rows} of --context {s.context} need "
                           f"{rows * s.context + 1}: give more text, or lower --context{' or --batch' * (rows > 1)}")
        if not (part[:] >= 0).any():
            raise MilError(f"--data: nothing to learn in the {name} part: no message is the assistant's, and there is no other text")
    learned = f", {np.mean(train[:] >= 0):.0%} of them to be learned" * bool((train[:] < 0).any())
    about = f"{len(files)} files, {len(train):,} training{learned}, and {len(val):,} validation tokens ({tokenizer})"
    return Corpus(train, val, key, about)


def to_device(rows, device):
    """A list of numpy rows of l + 1 tokens -> inputs and targets (b, l); a target is -100 where nothing is to be learned."""
    block = torch.from_numpy(np.stack(rows).astype(np.int64))
    block = block.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else block.to(device)
    return torch.where(block < 0, ~block, block)[:, :-1], block.masked_fill(block < 0, -100)[:, 1:]


def random_batches(data, s, device, seed):
    """Endless (inputs, targets), windows at random places."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(data) - s.context, size=s.batch)
        yield to_device([data[i:i + s.context + 1] for i in starts], device)


def evaluation_batches(data, s, device):
    """The same evenly spread windows every time."""
    count = min(s.eval_sequences, (len(data) - 1) // s.context)
    starts = np.linspace(0, len(data) - s.context - 1, count).astype(int)
    for i in range(0, count, s.batch):
        yield to_device([data[j:j + s.context + 1] for j in starts[i:i + s.batch]], device)


# ---------------------------------------------------------------------------------------------------------------
# Losses and evaluation


def kl_per_token(student_logits, teacher_logits):
    """KL(teacher ‖ student) of each position, in nats. Logits (..., v) -> (...)."""
    teacher = teacher_logits.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student_logits.float().log_softmax(-1))).sum(-1)


def distillation_loss(student_logits, teacher_logits, targets, alpha, beta):
    """α·CE + β·KL, a mean over predicted tokens (Eq. 2), those with a target of 0 or more. The teacher's logits may be None when β is 0."""
    learned = targets >= 0
    loss = alpha * F.cross_entropy(student_logits.float().flatten(0, 1), targets.flatten(), reduction="sum")  # leaves out -100
    loss = loss + beta * (kl_per_token(student_logits, teacher_logits) * learned).sum() if beta else loss
    return loss / learned.sum().clamp(min=1)


def compute_in(s, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16")


@torch.no_grad()
def evaluate(model, teacher, corpus, encoding, s, device):
    """loss, perplexity, bits per byte, KL to the teacher and top-1 agreement with it, on validation text."""
    sizes = torch.tensor([len(token_bytes(encoding, i)) for i in range(model.config.v)], device=device)
    total = torch.zeros(5, dtype=torch.float64, device=device)
    model.eval()
    for x, y in evaluation_batches(corpus.val, s, device):
        with compute_in(s, device):
            logits, wanted = model(x).float(), teacher(x).float()
        ce = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        learned = y >= 0
        agree = ((logits.argmax(-1) == wanted.argmax(-1)) & learned).sum()
        kl = (kl_per_token(logits, wanted) * learned).sum()
        total += torch.stack([ce, kl, agree, sizes[y[learned]].sum(), learned.sum()]).double()
    ce, kl, agree, size, count = total.tolist()
    count = max(count, 1)
    return {"loss": ce / count, "perplexity": math.exp(min(ce / count, 700)), "bits_per_byte": ce / math.log(2) / max(size, 1),
            "kl": kl / count, "agreement": agree / count}


# ---------------------------------------------------------------------------------------------------------------
# The training loop


def show(line, done=True):
    """A line on the terminal; with done=False one that the next line overwrites."""
    live = sys.stdout.isatty()
    if live and not done:  # a line that wraps could not be overwritten
        line = line[:shutil.get_terminal_size().columns - 1]
    if done or live:
        print(f"\r\033[K{line}" if live else line, end="\n" if done else "", flush=True)  # \033[K clears the rest of the line


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def schedule(step, steps, warmup):
    """The share of the peak rate at `step`: rises over the first `warmup` of the steps, then falls as half a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def fit(name, model, train, steps, lr, batches, loss_of, s, device, journal, kept):
    """AdamW over the parameters `train` on loss_of(x, y). Returns seconds and tokens per second.

    Everything outside `train` gets neither gradient nor optimiser state. Stops with MilError when the loss is not finite;
    `kept` says which checkpoint is then the last good one.
    """
    for w in model.parameters():
        w.requires_grad_(False)
    for w in train:
        w.requires_grad_(True)
    optimiser = torch.optim.AdamW(train, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda")
    model.train()
    began, every = time.perf_counter(), max(1, steps // 100)
    recent = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * schedule(step, steps, s.warmup)
        x, y = next(batches)
        with compute_in(s, device):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(train, s.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if step % every == every - 1 or step == steps - 1:  # reading the loss waits for the device, so not every step
            values = torch.stack(recent).tolist()
            recent.clear()
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    raise MilError(f"{name}: the loss became {value} at step {step + 2 - len(values) + i} of {steps}; stopped. "
                                   f"{kept}. Try a lower learning rate (this stage had {lr:g})")
            mean = sum(values) / len(values)
            seconds = time.perf_counter() - began
            line = (f"{name}  step {step + 1}/{steps}  loss {mean:.4f}  {(step + 1) * s.batch * s.context / seconds:,.0f} tokens/s  "
                    f"ETA {clock(seconds / (step + 1) * (steps - step - 1))}")
            journal.write(line + "\n")
            journal.flush()
            show(line, done=step == steps - 1 or (not sys.stdout.isatty() and (step + 1) % (every * 20) == 0))
    model.eval()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens_per_second": steps * s.batch * s.context / seconds}


def memory_needed(s, config, teacher_bytes):
    """About how many bytes the run takes at most, by part. teacher_bytes: of a ready teacher's weights, 0 if they are read as float32, None
    if it is yet to be trained. Of the student: weights in float32; in bfloat16 arithmetic their copies; gradients and AdamW's two moments
    of what trains. Per token of a step, what the backward pass needs, by what runs on an H200 took: 15 numbers a channel and 4 a channel
    of the MLP in each layer, and 6 in float32 a word of the vocabulary."""
    layers = chosen_layers(s) if s.student_layers else range(config.n_layers)
    mixers = [config.mixers[i] for i in layers]
    for i in mil.interleaved_layers(len(mixers), s.keep):
        mixers[i] = s.mixer
    with torch.device("meta"):
        teacher, student = mil.Hybrid(config), mil.Hybrid(dataclasses.replace(config, n_layers=len(mixers), mixers=mixers))
    size = lambda *modules: sum(w.numel() for module in modules for w in module.parameters())  # noqa: E731
    short = 2 if s.dtype == "bfloat16" else 4

    def parts(model, trained, before):
        tokens, depth = s.batch * s.context, len(model.layers)
        return {"teacher": before, "student": size(model) * (6 if short == 2 else 4), "gradients and AdamW": 12 * trained,
                "activations": tokens * (depth * short * (15 * config.d + 4 * config.d_ff) + 24 * config.v)}

    new = size(*[layer.mixer for layer, mixer in zip(student.layers, mixers) if mixer == s.mixer])
    learn = parts(student, size(student) if s.stage2_steps or s.student_layers else new, teacher_bytes or 4 * size(teacher))
    return learn if teacher_bytes is not None else max(learn, parts(teacher, size(teacher), 0), key=lambda parts: sum(parts.values()))


def memory_line(s, config, teacher_bytes, device):
    """What `memory_needed` says, beside what there is."""
    parts = memory_needed(s, config, teacher_bytes)
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    more = "; MORE THAN THERE IS" if sum(parts.values()) > there else ""
    return (f"memory: about {sum(parts.values()) / 2**30:.1f} GiB of {there / 2**30:.1f} ({', '.join(f'{part} {size / 2**30:.1f}' for part, size in parts.items())})"
            f"{more}; --batch, --context and --stage2_steps 0 lower it")


# ---------------------------------------------------------------------------------------------------------------
# The stages


def get_teacher(s, corpus, encoding, tokenizer, device, journal):
    """A Llama trained on the corpus, or the one of an earlier run when it was made from the same settings and data."""
    config = mil.Config(v=encoding.n_vocab, context=s.context, rope_theta=10000.0, **{name: getattr(s, name) for name in SIZES})
    recipe = {"data": corpus.key, "torch": torch.__version__,
              **{k: getattr(s, k) for k in ("seed", "batch", "context", "teacher_steps", "teacher_lr", "warmup", "clip", "dtype")}}
    place = Path(s.out) / "teacher"
    if (place / "config.json").exists():
        about = mil.read_config(place)
        if about.get("recipe") == recipe and about["config"] == config:
            try:
                teacher = mil.load(place, device)
            except MilError as e:
                raise MilError(f"{e}; delete {place} to have it trained again") from e
            show(f"teacher: reused from {place}, made with the same settings and data")
            return teacher, {}
        show(f"teacher: the one in {place} was made with other settings or data; training a new one")
    torch.manual_seed(s.seed)
    teacher = mil.Hybrid(config).to(device)
    speed = fit("teacher", teacher, list(teacher.parameters()), s.teacher_steps, s.teacher_lr,
                random_batches(corpus.train, s, device, [s.seed, 0]),
                lambda x, y: distillation_loss(teacher(x), None, y, 1.0, 0.0), s, device, journal, "This run saved no teacher")
    save_with_tokenizer(teacher, place, tokenizer, recipe=recipe)
    return teacher, speed


def replacement_steps(s, config):
    """The layers to replace in each step, spread evenly at every step: 50 % of 32 in 2 steps is 0, 4, 8 … then 2, 6, 10 …"""
    final = mil.interleaved_layers(config.n_layers, s.keep)
    done, steps = set(), []
    for i in range(1, s.replace_steps + 1):
        count = round(len(final) * i / s.replace_steps)
        new = [final[j * len(final) // count] for j in range(count)]
        new = ([k for k in new if k not in done] + [k for k in final if k not in done and k not in new])[:count - len(done)]
        done.update(new)
        steps.append(sorted(new))
    return steps


def distill(s, teacher, corpus, encoding, tokenizer, device, journal, rows):
    """Stages 1 and 2. Appends a row of evaluation to `rows` after each; returns the student."""
    for w in teacher.parameters():
        w.requires_grad_(False)

    def loss_of(student):
        def loss(x, y):
            with torch.no_grad():
                wanted = teacher(x) if s.beta else None
            return distillation_loss(student(x), wanted, y, s.alpha, s.beta)
        return loss

    def report(name, student, speed):
        rows.append({"model": name, **evaluate(student, teacher, corpus, encoding, s, device), **speed})
        if not math.isfinite(rows[-1]["loss"]):
            raise MilError(f"{name}: the validation loss is {rows[-1]['loss']}; stopped. {kept}. Try lower learning rates")
        show(f"{name}: validation loss {rows[-1]['loss']:.4f}, KL to the teacher {rows[-1]['kl']:.4f}")

    place, kept, count = Path(s.out) / "student", "This run saved no student", s.stage2_steps
    torch.manual_seed(s.seed + 1)
    if s.student_layers:  # a small student is not yet a model: all of it has to learn
        small = mil.keep_layers(teacher, chosen_layers(s))
        student = mil.replace_attention(mil.cast(small, torch.float32), mil.interleaved_layers(len(small.layers), s.keep), s.mixer, s.init)
        steps, count = [], count + s.stage1_steps
        report("student, not trained", student, {})
    else:
        steps, student = replacement_steps(s, teacher.config), mil.cast(mil.replace_attention(teacher, [], s.mixer), torch.float32)
        report("student, not trained", mil.replace_attention(teacher, sum(steps, []), s.mixer, s.init, share=True), {})
    for i, layers in enumerate(steps):
        student = mil.replace_attention(student, layers, s.mixer, s.init)
        replaced = [j for j, mixer in enumerate(student.config.mixers) if mixer == s.mixer]
        name = f"stage 1.{i + 1}, {len(replaced)} of {len(student.layers)} layers replaced"
        mixers = [w for j in replaced for w in student.layers[j].mixer.parameters()]
        part = s.stage1_steps * (i + 1) // len(steps) - s.stage1_steps * i // len(steps)
        speed = fit(name, student, mixers, part, s.stage1_lr, random_batches(corpus.train, s, device, [s.seed, 1, i]),
                    loss_of(student), s, device, journal, kept) if mixers else {}
        report(name, student, speed)
        save_with_tokenizer(student, place, tokenizer, stage=name)
        kept = f"The last good checkpoint is {place}, after {name}"
    if not count:
        return student
    speed = fit("stage 2, all parameters", student, list(student.parameters()), count, s.stage2_lr,
                random_batches(corpus.train, s, device, [s.seed, 2]), loss_of(student), s, device, journal, kept)
    report("stage 2, all parameters", student, speed)
    save_with_tokenizer(student, place, tokenizer, stage="stage 2")
    return student


# ---------------------------------------------------------------------------------------------------------------
# The report


def table(rows):
    lines = [f"{'':<38}{'loss':>8}{'ppl':>9}{'bits/byte':>11}{'KL':>9}{'agree':>8}{'tokens/s':>11}{'seconds':>9}"]
    for r in rows:
        speed = f"{r['tokens_per_second']:>11,.0f}{r['seconds']:>9.1f}" if "seconds" in r else ""
        lines.append(f"{r['model']:<38}{r['loss']:>8.4f}{r['perplexity']:>9.4g}{r['bits_per_byte']:>11.4f}{r['kl']:>9.4f}"
                     f"{r['agreement']:>8.1%}{speed}")
    return "\n".join(lines)


def sample(model, encoding, s, device):
    stream, stop = TextStream(encoding), stop_tokens(encoding)
    prompt = encode(encoding, s.prompt)[:model.config.context - 1]
    text = s.prompt
    for ((token,),) in generate(model, [prompt], 200, 0.7, 0, 0.95, stop, torch.Generator(device).manual_seed(s.seed)):
        text += stream.feed(token) if token not in stop else ""
    return text + stream.finish()


def side_by_side(left, right, width=58):
    """Two texts in two columns."""
    columns = [[piece for line in text.expandtabs(4).splitlines() for piece in textwrap.wrap(
        line, width, replace_whitespace=False, drop_whitespace=False) or [""]] for text in (left, right)]
    height = max(map(len, columns))
    return "\n".join(f"{a:<{width}} │ {b}".rstrip() for a, b in zip(*([*c, *[""] * (height - len(c))] for c in columns)))


def main(argv):
    s, began = parse_flags(Settings, argv, __doc__), time.perf_counter()
    device = pick_device(s.device)
    about = mil.read_config(s.teacher) if s.teacher else {}
    complete(s, device, about.get("config"))
    if s.teacher and Path(s.teacher).resolve() == (Path(s.out) / "student").resolve():
        raise MilError(f"--teacher {s.teacher} is where the student will be written; give another --out")
    mil.make_directory(s.out)
    teacher = None
    if s.teacher:
        read = sum((Path(s.teacher) / file).stat().st_size for file in about["weights"]) if s.dtype == "bfloat16" else 0
        show(memory_line(s, about["config"], read, device))
        teacher, encoding = load_with_tokenizer(s.teacher, device, None if s.dtype == "bfloat16" else torch.float32)  # in its own type: it only reads
        name = tokenizer_of(s.teacher)
        if s.tokenizer and vocabulary(load_tokenizer(s.tokenizer)) != vocabulary(encoding):
            raise MilError(f"--tokenizer {s.tokenizer} is not the one the teacher in {s.teacher} was trained with ({name}); leave it out")
        s.tokenizer = name
    else:
        s.tokenizer = s.tokenizer or "bytes"
        encoding = load_tokenizer(s.tokenizer)
        show(memory_line(s, mil.Config(v=encoding.n_vocab, context=s.context, **{name: getattr(s, name) for name in SIZES}), None, device))
    try:
        journal = open(Path(s.out) / "log.txt", "a")
    except OSError as e:
        raise MilError(f"--out {s.out}: cannot be written: {e.strerror}") from e
    journal.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} train_distill.py {shlex.join(argv)}\n")
    with journal:
        corpus = load_corpus(s, encoding, s.tokenizer)
        show(f"data: {corpus.about}")
        speed = {}
        if teacher is None:
            teacher, speed = get_teacher(s, corpus, encoding, s.tokenizer, device, journal)
        count = sum(w.numel() for w in teacher.parameters())
        show(f"teacher: {count / 1e6:.1f} M parameters, {len(teacher.layers)} layers of width {teacher.config.d}")
        rows = [{"model": "teacher", **evaluate(teacher, teacher, corpus, encoding, s, device), **speed}]
        student = distill(s, teacher, corpus, encoding, s.tokenizer, device, journal, rows)
        seconds = time.perf_counter() - began
        memory = (torch.cuda.max_memory_allocated(device) if device.type == "cuda"
                  else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores, {platform.machine()}"
        final = (f"\n{table(rows)}\n\nstudent / teacher validation loss: {rows[-1]['loss'] / rows[0]['loss']:.4f}   "
                 f"peak memory {memory / 2**30:.2f} GiB   {seconds:.0f} s in all on {machine}, torch {torch.__version__}")
        show(final)
        journal.write(final + "\n")
        results = {"rows": rows, "seconds": seconds, "peak_memory_bytes": memory, "machine": machine, "torch": torch.__version__,
                   "python": platform.python_version(), "teacher_parameters": count, "settings": dataclasses.asdict(s)}
        mil.write_whole(Path(s.out) / "results.json", lambda f: f.write(json.dumps(results, indent=1).encode()))
    show(f"\n{'teacher':<58} │ student")
    show(side_by_side(sample(teacher, encoding, s, device), sample(student, encoding, s, device)))
    more = "--chat" if (corpus.train[:10**6] < 0).any() else f"--prompt {shlex.quote(s.prompt)}"
    models = f"--model {s.teacher} --draft {s.out}/student" if s.student_layers and s.teacher else f"--model {s.out}/student"
    show(f"\nstudent: {s.out}/student   table: {s.out}/results.json\n"
         f"try: python generate.py {models} {more}")


if __name__ == "__main__":
    run_command(main)
