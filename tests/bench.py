"""How fast, how exact and how large: scans and mixers beside attention, decoding, training.

    python tests/bench.py kernels                prints tables 1 to 5
    python tests/bench.py decode                 tables 6 to 9
    python tests/bench.py decode TARGET DRAFT    and 10, of two checkpoints over the same tokens
    python tests/bench.py train                  table 11
    python tests/bench.py train 8B               only the rows whose name holds that word
    python tests/bench.py kernels scans kept     only the tables of these functions
    … --small                                    sizes for a CPU; the default without a GPU

On a GPU what a command prints goes into assets/bench.md, in place of what it printed last time.

The function that makes a table says what is in it. A time is the median in ms; wall / gpu: of a
call from Python, and of the same as a CUDA graph, without Python and the launches (on a CPU, the
same). A dash: not installed or refused. Weights, inputs and tokens are random but in table 10.
"""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import platform
import random
import sys
import time
from datetime import date
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils import benchmark

sys.path.insert(0, str(Path(__file__).parent.parent))
import generate
import kernels
import mil
import train_distill

CUDA = torch.cuda.is_available()
SMALL = "--small" in sys.argv or not CUDA
DEVICE, TYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PACKAGES = ["torch", "triton", "mamba_ssm", "fla"] if CUDA else ["torch"]
PACKAGES = [name for name in PACKAGES if importlib.util.find_spec(name)]
FORWARD, BOTH = "forward", "forward + backward"
STACKS = [["attention"], ["mamba2", "attention"], ["mamba2"], ["mamba"]]  # over and over
EIGHT = mil.Config()  # Llama-3-8B's shape; then those of Llama-3.2-1B and SmolLM2-135M
ONE = mil.Config(d=2048, n_layers=16, d_ff=8192, tied=True)
SMOL = mil.Config(v=49152, d=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536, tied=True)
MAMBA, MAMBA2 = ("Mamba", 256, 64, 16), ("Mamba-2", 32, 8, 128)  # heads, kv heads, p = n
SCANS = [(4, 2048), (1, 2048), (1, 16384)]  # batch and length
MIXERS = [(4, 2048), (2, 4096), (1, 8192), (1, 16384)]  # the same
GROWTH, STEPS = (2048, 131072), [(1, 2048), (16, 32768)]  # lengths; rows and tokens before a step
MANY = 1024, 512  # rows and new tokens
if SMALL:
    EIGHT = mil.Config(v=512, d=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=704)
    ONE = SMOL = dataclasses.replace(EIGHT, d=64, head_dim=16)
    MAMBA, MAMBA2 = ("Mamba", 16, 4, 16), ("Mamba-2", 4, 2, 32)
    SCANS, MIXERS, GROWTH = [(1, 256)], [(1, 256), (1, 512)], (16, 1024)
    STEPS, MANY = [(1, 128), (4, 1024)], (8, 32)
TRAINING = [  # name, shape, what trains, mixer of half the layers, batch, length, packed, budget
    ("8B, stage 1, b4", EIGHT, "mixers", "mamba2", 4, 2048, False, 1),
    ("8B, stage 1, b4, budget 0.7", EIGHT, "mixers", "mamba2", 4, 2048, False, 0.7),
    ("1B, stage 2, b8", ONE, "all", "mamba2", 8, 2048, False, 1),
    ("1B, stage 2, b8, budget 0.7", ONE, "all", "mamba2", 8, 2048, False, 0.7),
    ("1B, stage 2, b8, Mamba", ONE, "all", "mamba", 8, 2048, False, 1),
    ("1B, stage 2, b8, attention", ONE, "all", "attention", 8, 2048, False, 1),
    ("135M, stage 2, b16", SMOL, "all", "mamba2", 16, 2048, False, 1),
    ("135M, stage 2, b32 × 1,024, packed documents", SMOL, "all", "mamba2", 32, 1024, True, 1),
]
if SMALL:
    TRAINING = [(*row[:4], 2, 64, *row[6:]) for row in TRAINING]


REPORT = Path(__file__).parent.parent / "assets" / "bench.md"
HEAD = "# Measurements\n\nWritten by tests/bench.py, whose functions say what their tables hold.\n"
LINES = []  # what has been printed


def say(line):
    LINES.append(line)
    print(line, flush=True)


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def wall_ms(f):
    if CUDA:
        return kernels.triton.testing.do_bench(f, warmup=30, rep=120, return_mode="median")
    timer = benchmark.Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=0.15).median


def measure(f, leaves, backward):
    """Times of f(*leaves), without gradients or with all of theirs; None if f refuses."""

    def run():
        y = f(*leaves)
        return torch.autograd.grad(y, leaves, dy) if backward else y

    times = None
    try:
        with torch.set_grad_enabled(backward):
            dy = torch.randn_like(f(*leaves))
            times = dict.fromkeys(("wall", "gpu"), wall_ms(run))
            if CUDA:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
                times["gpu"] = wall_ms(graph.replay)
    except Exception as e:  # a peer may refuse in any way
        say(f"  refused: {type(e).__name__} {str(e)[:120]!r}")
    return times


def cell(value):
    if isinstance(value, dict):  # times
        return " / ".join(f"{ms:.3g}" for ms in value.values())
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:,.0f}" if value >= 1000 or isinstance(value, int) else f"{value:.4g}"


def table(title, rows):
    """Prints (name, {column: value}) as they come."""
    for i, (name, row) in enumerate(rows):
        if i == 0:
            say(f"\n{title}\n{'':<46}" + "".join(f"{column:>16}" for column in row))
        say(f"{name:<46}" + "".join(f"{cell(value):>16}" for value in row.values()))


@cache
def ceilings():
    """Bytes, matrix operations and exponentials a second; a multiprocessor does 16 a clock."""
    a = torch.zeros(2**28 if CUDA else 2**22, device=DEVICE)
    m = torch.randn((8192 if CUDA else 1024,) * 2, device=DEVICE, dtype=TYPE)
    exps = 1e3 * len(a) / wall_ms(a.exp)
    if CUDA:
        gpu = kernels.triton.runtime.driver.active.utils.get_device_properties(0)
        exps = 16e3 * gpu["multiprocessor_count"] * gpu["sm_clock_rate"]  # it is in kHz
    return 8e3 * len(a) / wall_ms(a.clone), 2e3 * len(m) ** 3 / wall_ms(lambda: m @ m), exps


def inputs(kind, h, g, p, b, l):
    """Random arguments of ssm_scan."""
    new = partial(torch.randn, device=DEVICE, dtype=TYPE)
    per, more = ((h, p), (p,)) if kind == "Mamba" else ((h,), ())
    A = -torch.rand(*per, *more, device=DEVICE) - 0.1
    t = dict(x=new(b, l, g, p), dt=new(b, l, *per), A=A, B=new(b, l, g, p), C=new(b, l, h, p))
    t.update(D=torch.ones(per, device=DEVICE), dt_bias=torch.full(per, -4.0, device=DEVICE))
    if kind == "Mamba":
        t["z"] = new(b, l, h, p)
    return {k: v.requires_grad_() for k, v in t.items()}


def contenders(t):
    """Who does the work of ssm_scan(**t): {name: [(f, its leaves)]}, of which the fastest counts.
    Attention has heads of 128 and the same width; fla does no softplus, products with Δ, or D."""
    b, l, h, p = t["C"].shape
    qkv = torch.randn(3, b, max(1, h * p // 128), l, 128, device=DEVICE, dtype=TYPE)
    ways = {"ours": [(lambda *a: kernels.ssm_scan(**dict(zip(t, a, strict=True)))[0], t.values())]}
    ways["attention"] = [(partial(F.scaled_dot_product_attention, is_causal=True), qkv)]
    dt, A, C, D, bias = (t[name] for name in ("dt", "A", "C", "D", "dt_bias"))
    x, B = kernels.repeat_heads(t["x"], h), kernels.repeat_heads(t["B"], h)
    if "mamba_ssm" in PACKAGES and "z" in t:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        # (b, h·p, l) and (b, h, n, l)
        x, dt, z = (v.flatten(2).transpose(1, 2).contiguous() for v in (x, dt, t["z"]))
        B, C = (v.permute(0, 2, 3, 1).contiguous() for v in (B, C))
        args = x, dt, A.flatten(0, 1), B, C, D.flatten(), z, bias.flatten()
        ways["mamba_ssm"] = [(partial(selective_scan_fn, delta_softplus=True), args)]
    elif "mamba_ssm" in PACKAGES:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as scan

        scans = [partial(scan, chunk_size=T, dt_softplus=True) for T in (64, 256)]
        args = x, dt, A, B, C, D, bias
        ways["mamba_ssm"] = [(lambda *a, f=f: f(*a[:5], D=a[5], dt_bias=a[6]), args) for f in scans]
    if "fla" in PACKAGES and "z" not in t:
        from fla.ops.simple_gla import chunk_simple_gla

        delta = F.softplus(dt.float() + bias)
        args = C, B, (delta[..., None] * x).to(TYPE), delta * A
        ways["fla"] = [(lambda *a: chunk_simple_gla(*a, scale=1.0)[0], args)]
    for who, calls in ways.items():
        ways[who] = [(f, [a.detach().requires_grad_() for a in args]) for f, args in calls]
    return ways


def scans():
    """1. scans; a backward's floor is twice a forward's
    That is the longest, by the ceilings, of: the bytes of every input and output, the products of
    matrices in tiles of 64 tokens, and the exponentials."""
    for kind, h, g, p, b, l in [(*scan, *size) for scan in (MAMBA, MAMBA2) for size in SCANS]:
        work = TYPE.itemsize * (2 * g + 2 * h), 4 * h * (64 + p), 0
        if kind == "Mamba":
            work = TYPE.itemsize * (2 * g + 4 * h), 0, h * p
        floor = 1e3 * b * l * p * max(n / most for n, most in zip(work, ceilings(), strict=True))
        them = contenders(inputs(kind, h, g, p, b, l))
        for name, times in ((FORWARD, 1), (BOTH, 3)):
            row = dict.fromkeys(("ours", "attention", "mamba_ssm", "fla"))
            for who, ways in them.items():
                took = filter(None, [measure(*way, name == BOTH) for way in ways])
                row[who] = min(took, key=lambda times: times["gpu"], default=None)
            row.update({"floor": times * floor, "of floor": times * floor / row["ours"]["gpu"]})
            yield f"{kind} b{b} l{l:,} {name}", row


def errors():
    """2. errors of the scans and their gradients: ‖a − r‖ / ‖r‖, r by ssm_reference in float64"""
    for kind, *shape in (MAMBA, MAMBA2):
        t = inputs(kind, *shape, 1, 512)
        exact = {k: v.detach().double().requires_grad_() for k, v in t.items()}
        r, y = kernels.ssm_reference(**exact)[0], kernels.ssm_scan(**t)[0]
        dy = torch.randn_like(y)
        want = [r, *torch.autograd.grad(r, list(exact.values()), dy.double())]
        got = [y, *torch.autograd.grad(y, list(t.values()), dy)]
        row = dict.fromkeys(("y", "x", "dt", "A", "B", "C", "D", "dt_bias", "z"))
        for name, a, r in zip(row, got, want, strict=False):
            row[name] = ((a.double() - r).norm() / r.norm()).item()
        yield kind, row


def mixers():
    """3. whole mixers, forward + backward, on a GPU compiled and with Documents as in training"""
    cheaper = {}  # than attention from this length on
    for b, l in MIXERS:
        pos, attention = torch.arange(l).repeat(b, 1), None
        docs = train_distill.to_device(pos, pos, pos, torch.device(DEVICE), TYPE).docs
        angles = mil.rope_angles(EIGHT, pos.to(DEVICE))
        for name in ("attention", "mamba", "mamba2"):
            torch._dynamo.reset()  # compiled for this length alone
            mixer = mil.cast(mil.CLASSES[name](EIGHT), TYPE).to(DEVICE)
            if CUDA:
                mixer.compile()
            u = torch.randn(b, l, EIGHT.d, device=DEVICE, dtype=TYPE, requires_grad=True)
            call = partial(mixer, angles=angles, docs=docs)
            took = measure(lambda u, *_, f=call: f(u), [u, *mixer.parameters()], True)
            attention = attention or took["gpu"]
            ratio = took["gpu"] / attention
            yield f"b{b} l{l:,} {name}", {"time": took, "÷ attention": ratio}
            cheaper[name] = (cheaper.get(name) or l) if ratio < 1 else None
    for name in ("mamba", "mamba2"):
        said = f"from l = {cheaper[name]:,} on" if cheaper[name] else "at none of these lengths"
        say(f"{name} is cheaper than attention {said}")


def growth():
    """4. growth: ×64 is linear"""
    for kind, *shape in (MAMBA, MAMBA2):
        for name in (FORWARD, BOTH):
            ways = [contenders(inputs(kind, *shape, 1, l))["ours"][0] for l in GROWTH]
            short, long = (measure(*way, name == BOTH) for way in ways)
            row = {f"l{GROWTH[0]:,}": short, f"l{GROWTH[1]:,}": long}
            yield f"{kind} b1 {name}", {**row, "ratio": long["gpu"] / short["gpu"]}


def kept():
    """5. bytes kept for the backward, per token and layer, without A, D and the bias of Δ"""
    for kind, *shape in (MAMBA, MAMBA2):
        b, l = SCANS[0]
        t = inputs(kind, *shape, b, l)
        row = dict.fromkeys(("ours", "attention", "mamba_ssm", "fla"))
        for who, ((f, leaves), *_) in contenders(t).items():
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
                f(*leaves)
            sizes = {s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in saved}
            for name in ("A", "D", "dt_bias"):
                sizes.pop(t[name].data_ptr(), None)
            row[who] = sum(sizes.values()) / (b * l)
        yield f"{kind} b{b} l{l:,}", row


def random_model(config, dtype=TYPE, seed=0):
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return mil.pack(mil.cast(mil.Hybrid(config), dtype).eval())


def stacked(config, mixers):
    """`config` with these mixers over and over."""
    n = config.n_layers
    return dataclasses.replace(config, mixers=(list(mixers) * n)[:n])


@torch.inference_mode()
def filled(model, batch, length, undo=False):
    """A cache of `length` random tokens a row, with room for a few more."""
    cache = mil.Cache(model, batch, length + 16, undo)
    tokens = torch.randint(model.config.v, (batch, length), device=DEVICE)
    for part in tokens.split(4096 if batch == 1 else 512, dim=1):
        model.hidden(part, cache)
    return cache


def cache_bytes(cache, length):
    """What a step reads of it, all rows together."""
    total = 0
    for state in filter(None, cache.states):
        if isinstance(state, mil.AttentionState):
            total += (state.k.nbytes + state.v.nbytes) * length / cache.size
        else:
            total += state.h.nbytes
    return total


@torch.inference_mode()
def step_ms(model, cache, l):
    """The time of a pass of l tokens a row and their logits, always from the same place; if passes
    can be undone, after one of which as many were kept."""
    tokens = torch.zeros(len(cache.at), l, dtype=torch.long, device=DEVICE)
    at, used, pending = cache.at.clone(), cache.used, l if cache.undo else 0

    def read():
        cache.base.copy_(at - pending)
        cache.keep(at, used)
        return model(tokens, cache)

    launched = generate.Graph(cache.device if CUDA and cache.fusable(l) else None, None)
    launched(read)  # compiles
    launched(read)  # captures
    return wall_ms(lambda: launched(read))


def step():
    """6. a step of one row, and of several at a long context
    The floor: every weight but the embedding, and the cache, read once at the bandwidth of a copy.
    `verify 5` checks 4 proposed tokens, and replays those of the round before."""
    for b, l in STEPS:
        first = None
        for mixers in STACKS:
            model = random_model(stacked(EIGHT, mixers))
            cache = filled(model, b, l)
            ms, held = step_ms(model, cache, 1), cache_bytes(cache, l)
            first = first or ms
            weights = sum(w.nbytes for w in model.parameters()) - model.embed_tokens.weight.nbytes
            floor = 1e3 * (weights + held) / ceilings()[0]
            checked = step_ms(model, filled(model, 1, l, undo=True), 5) if b == 1 else None
            row = {"ms": ms, "of floor": floor / ms, "÷ attention": ms / first}
            row.update({"MiB a row": held / b / 2**20, "verify 5": checked})
            yield f"{' + '.join(mixers)}, b{b} l{l:,}", {**row, "÷ step": checked and checked / ms}
            del model, cache  # before the next is made


def follow(rounds):
    """The texts of a decoding, the passes (each row for itself), and tokens/s: in all, and from
    round 4 on, as a GPU compiles and captures in the first. A round's tokens are on the CPU."""
    texts, passes, counts, times = {}, 0, [], [now()]
    for new in rounds:
        for i, tokens in enumerate(new):
            texts.setdefault(i, []).extend(tokens)
            passes += bool(tokens)
        counts.append(sum(map(len, new)))
        times.append(time.perf_counter())
    warm = sum(counts[3:]) / (times[-1] - times[3])
    return list(texts.values()), passes, sum(counts) / (times[-1] - times[0]), warm


def many():
    """7. many rows sampled, prompts of 64 tokens included"""
    rows, new = MANY
    model = random_model(SMOL)
    prompts = torch.randint(SMOL.v, (rows, 64)).tolist()
    dice = torch.Generator(DEVICE).manual_seed(0)
    *_, overall, warm = follow(generate.generate(model, prompts, new, 0.8, generator=dice))
    name = f"{rows:,} rows of the 135M shape, {new} new tokens"
    yield name, {"tokens/s": overall, "from round 4": warm}


def replay():
    """8. the replay of a Mamba-2 layer, a new token after logged ones; GB/s of the state"""
    b, h, p = 64, EIGHT.n_heads, EIGHT.head_dim
    mixer = mil.cast(mil.Mamba2(EIGHT), TYPE).to(DEVICE)
    u = torch.randn(b, 1, sum(mixer.sizes), device=DEVICE, dtype=TYPE)
    z, xBC, dt = u.split(mixer.sizes, dim=2)
    log = [torch.randn(b, 16, t.shape[2], device=DEVICE, dtype=TYPE) for t in (xBC, dt)]
    state = torch.zeros(b, h, p, p, device=DEVICE)
    at = torch.full((b,), 64, device=DEVICE)
    weights = mixer.conv1d.weight, mixer.conv1d.bias, mixer.A_log, mixer.dt_bias, mixer.D
    for logged, written in ((0, True), (0, False), (1, False), (1, True), (2, True), (4, True)):
        to = at + int(not logged) if written else at - logged  # without a log it takes the new one
        tensors = xBC, dt, None, None, z.unflatten(2, (h, p)), log, state, (at, at - logged, to)
        call = partial(kernels.replay, *tensors, *weights, mixer.norm.weight, mixer.norm.eps)
        ms = measure(lambda call=call: [call() for _ in range(10)][0], [], False)["gpu"] / 10
        name = f"b{b} h{h} p{p}, {logged} logged, state {'' if written else 'not '}written"
        yield name, {"ms": ms, "GB/s": (1 + written) * state.nbytes / ms / 1e6}


def exactness():
    """9. greedy speculative = plain: every pairing of stacks, K 1 to 8, 1 to 4 unequal rows"""
    dtype = torch.bfloat16 if CUDA else torch.float64
    sizes = dict(v=512, d=256, d_ff=704) if CUDA else dict(v=7, d=16, d_ff=24, d_state=4)
    config = mil.Config(n_layers=2, n_heads=4, n_kv_heads=2, context=256, **sizes)
    stacks = [stacked(config, mixers) for mixers in (*STACKS, ["mamba", "attention"])]
    pairs = itertools.cycle(itertools.product(stacks, stacks))
    row = {"tokens": 0, "differ": 0}
    enough = 2_000 if "--small" in sys.argv else 30_000 if CUDA else 100_000
    for n, (target, draft) in enumerate(pairs):
        model = random_model(target, dtype, 2 * n)
        more = dict(draft=random_model(draft, dtype, 2 * n + 1), K=1 + n % 8)
        dice, rows = random.Random(n), 1 + n // 8 % 4
        prompts = [dice.choices(range(config.v), k=dice.randint(1, 9)) for _ in range(rows)]
        plain, *_ = follow(generate.generate(model, prompts, 200, 0))
        fast, *_ = follow(generate.generate(model, prompts, 200, 0, **more))
        tokens = list(zip(sum(plain, []), sum(fast, []), strict=True))
        row["tokens"] += len(tokens)
        row["differ"] += sum(a != b for a, b in tokens)
        if row["tokens"] >= enough:
            yield f"{n + 1} pairs, {str(dtype)[6:]}", row
            return


def speculation(model, encoding, draft):
    """10. speculative decoding, K tokens at a time, of eight prompts of this file's text
    tokens/s are from the fourth round on; `kept` is of the proposed tokens; `text` says whether the
    greedy one is the plain one; `distinct` is of its windows of 8 tokens: what repeats itself is
    easy to propose."""
    text = encoding.encode(Path(__file__).read_text())  # in no training text of ours
    prompts, plain = [text[i : i + 64] for i in range(0, 1600, 200)], {}
    runs = [(b, t, K) for b in (1, 8) for t, K in ((0, 0), (0, 2), (0, 4), (0, 6), (1, 0), (1, 4))]
    for batch, temperature, K in runs:
        texts, passes, speed = [], 0, 0
        for i in range(0, 8, batch):
            how = dict(generator=torch.Generator(DEVICE).manual_seed(i), draft=draft if K else None)
            rounds = generate.generate(model, prompts[i : i + batch], 128, temperature, **how, K=K)
            new, used, _, warm = follow(rounds)
            texts += new
            passes += used
            speed += warm * batch / 8
        plain = plain if K else {"speed": speed, "texts": texts}
        row = {"tokens/s": speed, "÷ plain": speed / plain["speed"]}
        row["a pass"] = sum(map(len, texts)) / passes
        row["kept"] = (row["a pass"] - 1) / K if K else None
        row["text"] = None if temperature else "same" if texts == plain["texts"] else "DIFFERS"
        windows = [tuple(new[i : i + 8]) for new in texts for i in range(len(new) - 7)]
        row["distinct"] = len(set(windows)) / len(windows)
        yield f"batch {batch}, temperature {temperature}, K = {K}", row


def trained(name, config, train, mixer, batch, length, packed, budget):
    """Thirty steps of a row of table 11, by train_distill's own loop."""
    torch._dynamo.reset()
    counters.clear()
    s = train_distill.Settings(context=length, batch=batch, dtype=str(TYPE)[6:])
    s.memory_budget = budget
    run, base = train_distill.Run(s, torch.device(DEVICE)), random_model(config)
    half = mil.interleaved_layers(config.n_layers, 0.5)
    mixers = [mixer if i in half else "attention" for i in range(config.n_layers)]
    how = dict(trains=train, steps=1000, lr=1e-5, schedule="constant", name=name, mixers=mixers)
    state, stage = train_distill.State(step=970), train_distill.Stage(**how)  # each tenth is logged
    models = train_distill.assemble(run, base, base, stage, 1, {})

    def batches(step):
        """Random tokens, as train_distill.training_batches gives them, others in each step."""
        times.append(time.perf_counter())
        dice, at = torch.Generator().manual_seed(step), torch.arange(length)
        x, y = torch.randint(config.v, (2, batch, length), generator=dice)
        begins = (at == 0) | (torch.rand(x.shape, generator=dice) < packed / 300)
        pos = at - torch.where(begins, at, 0).cummax(1).values  # in documents of 300 tokens or so
        y[:, :-1][begins[:, 1:]] = -100  # nothing is learned from one document to the next
        return [train_distill.to_device(x, y, pos, run.device, TYPE)], int((y >= 0).sum())

    times, journal = [], io.StringIO()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    train_distill.fit(run, state, stage, models, batches, journal, "")
    first, *_, last = map(json.loads, journal.getvalue().splitlines())
    row = {"tokens/s": 20 * batch * length / (last["seconds"] - first["seconds"])}
    row.update({"peak, GiB": last["memory"] / 2**30, "loss": last["loss"]})
    row.update({"first step, s": times[1] - times[0], "graphs": counters["stats"]["unique_graphs"]})
    return row


def training(rows):
    """11. training, tokens/s from the tenth step on
    The first step is mostly compilation, less where an earlier row left compiled code on disk."""
    for row in rows:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what the loop itself prints
                told = trained(*row)
            yield row[0], told
        except torch.OutOfMemoryError as e:
            say(f"{row[0]}: out of memory: {str(e).splitlines()[0][:90]}")


TABLES = {
    "kernels": [scans, errors, mixers, growth, kept],
    "decode": [step, many, replay, exactness] if CUDA else [step, many, exactness],
    "train": [training],
}


def main(argv):
    what, *words = [word for word in argv if word != "--small"] or [""]
    tables = {f: [] for f in TABLES.get(what, ()) if not words or f.__name__ in words}
    if what == "train":
        tables = {training: [[row for row in TRAINING if all(word in row[0] for word in words)]]}
    elif what == "decode" and len(words) == 2 and not tables:
        model, encoding = generate.load_with_tokenizer(words[0], DEVICE, TYPE)
        draft = generate.load_draft(generate.Settings(*words), encoding, DEVICE)
        tables = {f: [] for f in TABLES[what]}
        tables[speculation] = model, encoding, mil.pack(mil.cast(draft, TYPE))
    if not tables:
        sys.exit(__doc__)
    versions = {name: importlib.import_module(name).__version__ for name in PACKAGES}
    machine = torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU"
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    say(f"{date.today()}, {machine}, {about}, {str(TYPE)[6:]}{', small sizes' * SMALL}")
    most = "{:.3g} bytes, {:.3g} operations, {:.3g} exponentials a second".format(*ceilings())
    say(f"the most here: {most}")
    for f, given in tables.items():
        table(f.__doc__.splitlines()[0], f(*given))
        if not SMALL:
            record(" ".join(argv))


def record(command):
    """Writes what was printed to assets/bench.md, as the section of this command."""
    title = f"python tests/bench.py {command}\n"
    first, *sections = (REPORT.read_text() if REPORT.exists() else HEAD).split("\n## ")
    sections = [section for section in sections if not section.startswith(title)]
    sections.append("\n".join([title, "```", *LINES, "```", ""]))
    REPORT.write_text("\n## ".join([first, *sections]))


if __name__ == "__main__":
    generate.run_command(main)
