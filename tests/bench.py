"""How fast, how exact and how large: our scans and mixers beside attention and, where they are installed, mamba_ssm and fla; decoding.

    python tests/bench.py kernels            prints tables 1 to 5 below and writes them to bench-kernels.json
    python tests/bench.py decode             tables 6 to 9, to bench-decode.json
    python tests/bench.py train              table 11, to bench-train.json
    python tests/bench.py decode TARGET DRAFT                 and table 10, of two checkpoints over the same tokens
    … --small                                sizes for a CPU

A time is two medians in milliseconds, wall / gpu: of the call from Python, and of the same call captured in a CUDA graph and
replayed, which leaves out Python and the launches. – is what is not installed, refused, or would take too long.

1. The scans, forward (without gradients) and forward + backward (the gradient of every input). `floor` is the least time the
   work can take on this device: the bytes that must move (every input read once, every output written once) over the measured
   bandwidth of a copy, the products of matrices over the measured rate of a large one, or the exponentials over the rate of
   the units that compute them (16 a clock and multiprocessor), whichever is longest; a backward counts twice its forward.
   GB/s, TFLOP/s and `of floor`, floor / ours, take that same work and the gpu time. Beside ours: attention, PyTorch's, over
   heads of 128 of the same total width; ssm_reference, the loop over tokens; mamba_ssm, given its own layout, its kv heads
   repeated beforehand, and for Mamba-2 the faster of its chunks of 64 and 256 tokens; and fla's chunk_simple_gla, given Δx and
   ΔA ready made and its heads repeated: it leaves out the softplus, the products with Δ, and D.
2. The relative error ‖a − r‖ / ‖r‖ of the output and of every gradient, r being ssm_reference in float64 on the same inputs.
3. The whole mixers at Llama-3-8B's width, forward + backward, and their time over attention's.
4. The growth of our scans' time with length: ×64 is linear.
5. The bytes a scan keeps for its backward, per token and layer: what autograd saves, without A, D and the bias of Δ.

6. Plain decoding, batch 1, random weights: ms and tokens/s of a step, and the share of its floor: every weight but the embedding, and
   the cache, read once at the bandwidth of a copy (on a CPU, whose caches hold so small a model, it says little). Beside it the pass
   that verifies K = 4 proposed tokens, the replay of the round before it included, over that step.
7. Decoding at a long context in a batch, of stacks with less and less attention, and the bytes of their caches a row.
8. The replay of a Mamba-2 layer in a step, its two kernels: one new token of each row, the state written or not, after so many tokens of the log.
9. Exactness: greedy speculative decoding beside greedy plain decoding, random models of every pairing of stacks, K from 1 to 8, batches of
   1 to 4 rows of unequal length: tokens compared and tokens that differ. In float64; on CUDA in bf16, in which the kernels work.
10. Speculative over plain decoding, greedy and at temperature 1, wall clock from the fourth round on (in the first a GPU's kernels are
   compiled, in the second captured), eight prompts of this file's text: tokens/s, the share of the draft's tokens that is kept, tokens per
   pass, whether the greedy text is the plain one, and how many of the windows of eight tokens are distinct: a text that repeats itself is
   easy to propose.

11. Training, by train_distill.py's own loop, random weights and tokens: tokens/s from the tenth step on, peak memory, what memory_needed says beforehand,
   and model FLOPs (train_distill.flops, what is computed twice counted once) over the rate of a large matrix product. "Again": what the backward computes again.
"""
import dataclasses
import gc
import importlib
import io
import json
import platform
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import generate
import kernels
import mil
import train_distill

CUDA = torch.cuda.is_available()
DEVICE, TYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
MAMBA, MAMBA2 = ("Mamba", 256, 64, 16), ("Mamba-2", 32, 8, 128)  # heads, kv heads and p = n at Llama-3-8B's width
WORK = [(*MAMBA, 4, 2048), (*MAMBA, 1, 2048), (*MAMBA, 1, 16384), (*MAMBA2, 4, 2048), (*MAMBA2, 1, 16384)]
REFERENCE, ERROR, GROWTH = 2048, 512, (2048, 131072)  # tokens: the most ssm_reference is timed on; of tables 2 and 4
MIXERS = mil.Config(), 4, 2048
if "--small" in sys.argv or not CUDA:
    MAMBA, MAMBA2 = ("Mamba", 16, 4, 16), ("Mamba-2", 4, 2, 32)
    WORK = [(*MAMBA, 1, 256), (*MAMBA2, 1, 256)]
    ERROR, GROWTH = 64, (16, 1024)
    MIXERS = mil.Config(d=256, n_heads=4, n_kv_heads=2), 1, 256


def peer(path):
    """A function of another package by its path; None where that is not installed, or on a CPU."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name) if CUDA else None
    except ImportError:
        return None


selective_scan = peer("mamba_ssm.ops.selective_scan_interface.selective_scan_fn")
chunk_scan = peer("mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined")
simple_gla = peer("fla.ops.simple_gla.chunk_simple_gla")


def now():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def wall_ms(f, seconds=0.15):
    """The median time of f() in ms, warmed up; of a single call with seconds=0."""
    if CUDA and seconds:
        from triton.testing import do_bench
        return do_bench(f, warmup=30, rep=int(seconds * 1000), return_mode="median")
    times, began = [], now()
    while len(times) < (3 if seconds else 1) or now() - began < seconds:
        start = now()
        f()
        times.append(1e3 * (now() - start))
    return sorted(times)[len(times) // 2]


def gpu_ms(f):
    """The median time of f(), called before, captured in a CUDA graph and replayed; None where it cannot be captured."""
    try:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            f()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            f()
        return wall_ms(graph.replay, 0.1)
    except Exception as e:
        print(f"  not captured: {str(e)[:120]!r}")
        return None


def measure(f, leaves, backward, once=False):
    """wall and gpu time of f(), without gradients or with those of `leaves`; None, with a word why, where f refuses."""
    try:
        with torch.set_grad_enabled(backward):
            dy = torch.randn_like(f())
            run = (lambda: torch.autograd.grad(f(), leaves, dy)) if backward else f
            return dict(wall=wall_ms(run, 0 if once else 0.15), gpu=gpu_ms(run) if CUDA and not once else None)
    except Exception as e:  # a peer may refuse in any way
        print(f"  not measured: {type(e).__name__} {str(e)[:120]!r}")
        return None


def show(time):
    """A cell of a table: wall / gpu."""
    digits = lambda ms: "–" if ms is None else f"{ms:.{3 if ms < 10 else 1}f}"  # noqa: E731
    return f"{' / '.join(map(digits, time.values())) if time else '–':>16}"


def over(a, b):
    """The ratio of two times, wall and gpu."""
    return {k: a[k] / b[k] if a[k] and b[k] else None for k in a} if a and b else None


def ceilings():
    """Bytes, matrix operations and exponentials per second: measured, but on CUDA the exponentials from the clock (kHz)."""
    a, m = torch.zeros(2**28 if CUDA else 2**22, device=DEVICE), torch.randn((8192 if CUDA else 1024,) * 2, device=DEVICE, dtype=TYPE)
    bandwidth, matrix = 8 * len(a) / wall_ms(lambda: a.clone()) * 1e3, 2 * len(m)**3 / wall_ms(lambda: m @ m) * 1e3
    if not CUDA:
        return bandwidth, matrix, len(a) / wall_ms(lambda: a.exp()) * 1e3
    about = kernels.triton.runtime.driver.active.utils.get_device_properties(0)
    return bandwidth, matrix, about["multiprocessor_count"] * 16 * about["sm_clock_rate"] * 1e3


def work(kind, h, g, p, b, l, T=64):
    """Bytes, matrix operations and exponentials of a forward (n = p)."""
    size = torch.empty(0, dtype=TYPE).element_size()
    if kind == "Mamba":
        return size * b * l * (2 * g * p + 4 * h * p), 0, b * l * h * p * p           # x, B; dt, C, z, y
    return size * b * l * (2 * g * p + 2 * h * p), 2 * b * l * h * (2 * T * p + 2 * p * p), 0


def inputs(kind, h, g, p, b, l):
    new = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=TYPE)  # noqa: E731
    per = (h, p) if kind == "Mamba" else (h,)
    A = -torch.rand(*per, *((p,) if kind == "Mamba" else ()), device=DEVICE) - 0.1
    t = dict(x=new(b, l, g, p), dt=new(b, l, *per), A=A, B=new(b, l, g, p), C=new(b, l, h, p),
             D=torch.ones(per, device=DEVICE), dt_bias=torch.full(per, -4.0, device=DEVICE))
    if kind == "Mamba":
        t["z"] = new(b, l, h, p)
    return {k: v.requires_grad_() for k, v in t.items()}


def official(t, chunk=64):
    """mamba_ssm's arguments made of ours, its scan, and what turns its output into ours."""
    x, B, h = *(kernels.repeat_heads(t[k], t["C"].shape[2]) for k in "xB"), t["C"].shape[2]
    if "z" in t:
        flat = lambda v: v.flatten(2).transpose(1, 2).contiguous()  # noqa: E731  (b, h·p, l)
        group = lambda v: v.permute(0, 2, 3, 1).contiguous()  # noqa: E731        (b, h, n, l)
        args = [flat(x), flat(t["dt"]), t["A"].flatten(0, 1), group(B), group(t["C"]), t["D"].flatten(), flat(t["z"]), t["dt_bias"].flatten()]
        return args, lambda *a: selective_scan(*a, delta_softplus=True), lambda y: y.transpose(1, 2).unflatten(2, (h, -1))
    args = [x, t["dt"], t["A"], B, t["C"], t["D"], t["dt_bias"]]
    return args, lambda *a: chunk_scan(*a[:5], chunk_size=chunk, D=a[5], dt_bias=a[6], dt_softplus=True), lambda y: y


def contenders(t):
    """Who does the work of ssm_scan(**t), except ssm_reference: per name one or more (f, leaves of f), the fastest of which counts."""
    def ready(args, f):  # whatever makes the arguments is not timed
        leaves = [a.detach().requires_grad_() for a in args]
        return lambda: f(*leaves), leaves
    b, l, h, p = t["C"].shape
    qkv = [torch.randn(b, max(1, h * p // 128), l, 128, device=DEVICE, dtype=TYPE) for _ in range(3)]
    them = {"ours": [(lambda: kernels.ssm_scan(**t)[0], list(t.values()))],
            "attention": [ready(qkv, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))]}
    if selective_scan if "z" in t else chunk_scan:
        them["mamba_ssm"] = [ready(*official(t, chunk)[:2]) for chunk in ((64,) if "z" in t else (64, 256))]
    if simple_gla and "z" not in t:
        (x, _, A, B, C, *_), delta = official(t)[0], F.softplus(t["dt"].float() + t["dt_bias"])
        them["fla"] = [ready([C, B, (delta[..., None] * x).to(TYPE), delta * A], lambda *a: simple_gla(*a, scale=1.0)[0])]
    return them


def scans(limits):
    rows, names = [], ("attention", "ssm_reference", "mamba_ssm", "fla")
    print(f"\n{'1. scans':<38}{'ours':>16}{'GB/s':>7}{'TFLOP/s':>9}{'floor':>8}{'of floor':>10}" + "".join(f"{name:>16}" for name in names))
    for kind, h, g, p, b, l in WORK:
        t = inputs(kind, h, g, p, b, l)
        them = contenders(t)
        for name, times in (("forward", 1), ("forward + backward", 3)):
            took = {who: min((m for way in ways if (m := measure(*way, times == 3))), key=lambda m: m["wall"], default=None) for who, ways in them.items()}
            if b * l <= REFERENCE:
                took["ssm_reference"] = measure(lambda: kernels.ssm_reference(**t)[0], list(t.values()), times == 3, once=True)
            moved, products, exps = (times * n for n in work(kind, h, g, p, b, l))
            floor, ms = 1e3 * max(n / limit for n, limit in zip((moved, products, exps), limits)), took["ours"]["gpu"] or took["ours"]["wall"]
            rows.append(dict(kind=kind, h=h, g=g, p=p, b=b, l=l, work=name, floor=floor, of_floor=floor / ms, gb_s=moved / ms / 1e6,
                             tflop_s=products / ms / 1e9, **took))
            print(f"{f'{kind} b{b} l{l} {name}':<38}{show(took['ours'])}{moved / ms / 1e6:>7.0f}{products / ms / 1e9:>9.1f}{floor:>8.3f}{floor / ms:>10.0%}"
                  + "".join(show(took.get(who)) for who in names), flush=True)
    return rows


def errors():
    rows = []
    print(f"\n{f'2. relative error, b1 l{ERROR}':<38}" + "".join(f"{name:>9}" for name in "y x dt A B C D dt_bias z".split()))
    for kind, *shape in (MAMBA, MAMBA2):
        t = inputs(kind, *shape, 1, ERROR)
        exact = {k: v.detach().double().requires_grad_() for k, v in t.items()}
        ys = {"exact": kernels.ssm_reference(**exact)[0], "ours": kernels.ssm_scan(**t)[0]}
        if selective_scan if "z" in t else chunk_scan:
            args, scan, back = official(t)
            ys["mamba_ssm"] = back(scan(*args))
        dy = torch.randn_like(ys["ours"])
        want = [ys["exact"], *torch.autograd.grad(ys.pop("exact"), list(exact.values()), dy.double())]
        for who, y in ys.items():
            got = [y, *torch.autograd.grad(y, list(t.values()), dy)]
            rows.append(dict(kind=kind, who=who, error={k: ((a.double() - r).norm() / r.norm()).item() for k, a, r in zip(["y", *t], got, want)}))
            print(f"{f'{kind} {who}':<38}" + "".join(f"{e:>9.1e}" for e in rows[-1]["error"].values()), flush=True)
    return rows


def mixers():
    (config, b, l), rows, took = MIXERS, [], {}
    print(f"\n{f'3. mixers, b{b} l{l} d{config.d}':<38}{'wall / gpu':>16}{'÷ attention':>16}")
    angles = mil.rope_angles(config, torch.arange(l, device=DEVICE).expand(b, l))
    for name in ("attention", "mamba", "mamba2"):
        mixer, u = mil.cast(mil.CLASSES[name](config), TYPE).to(DEVICE), torch.randn(b, l, config.d, device=DEVICE, dtype=TYPE, requires_grad=True)
        took[name] = measure(lambda: mixer(u, angles), [u, *mixer.parameters()], backward=True)
        rows.append(dict(mixer=name, time=took[name], ratio=over(took[name], took["attention"])))
        print(f"{name:<38}{show(took[name])}{show(rows[-1]['ratio'])}", flush=True)
    return rows


def growth():
    rows = []
    print(f"\n{'4. growth, b1':<38}" + "".join(f"{f'l{l}':>16}" for l in GROWTH) + f"{'ratio':>16}")
    for kind, *shape in (MAMBA, MAMBA2):
        for name in ("forward", "forward + backward"):
            ts = [inputs(kind, *shape, 1, l) for l in GROWTH]
            took = [measure(lambda: kernels.ssm_scan(**t)[0], list(t.values()), name != "forward") for t in ts]
            rows.append(dict(kind=kind, work=name, lengths=GROWTH, times=took, ratio=over(took[1], took[0])))
            print(f"{f'{kind} {name}':<38}" + "".join(map(show, (*took, rows[-1]["ratio"]))), flush=True)
    return rows


def kept():
    rows, names = [], ("ours", "attention", "mamba_ssm")
    print(f"\n{'5. bytes kept, per token and layer':<38}" + "".join(f"{name:>16}" for name in names))
    for kind, *shape, b, l in (next(w for w in WORK if w[0] == kind) for kind in ("Mamba", "Mamba-2")):
        t, row = inputs(kind, *shape, b, l), dict(kind=kind, b=b, l=l)
        for who, ((f, _), *_) in contenders(t).items():
            saved = {}  # storages by address; held, so that no address is given out again
            with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.update({s.untyped_storage().data_ptr(): s.untyped_storage()}), lambda _: None):
                f()
            parameters = [t[k].untyped_storage().data_ptr() for k in ("A", "D", "dt_bias")]
            row[who] = sum(s.nbytes() for at, s in saved.items() if at not in parameters) / (b * l)
        rows.append(row)
        print(f"{f'{kind} b{b} l{l}':<38}" + "".join(f"{row[who]:>16,.0f}" if who in row else f"{'–':>16}" for who in names))
    return rows


STACKS = ("attention",), ("mamba2", "attention"), ("mamba2",), ("mamba",)  # repeated over the layers
LONG = 2048, 16, 32768                                                     # tokens before a step of table 6; batch and tokens of table 7
NEW = 128                                                                   # tokens a row of table 10
EXACT = [(torch.float64, 100_000)] if not CUDA else [(torch.bfloat16, 30_000)]  # tokens to compare
DECODER = mil.Config()
if "--small" in sys.argv or not CUDA:
    DECODER, LONG = mil.Config(v=512, d=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=704, context=2048), (128, 4, 1024)


def random_model(config, dtype=TYPE, seed=0):
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return mil.pack(mil.cast(mil.Hybrid(config), dtype).eval())


def stacked(config, mixers):
    return dataclasses.replace(config, mixers=list(mixers * config.n_layers)[:config.n_layers])


def filled(model, batch, length, places=0):
    """A cache of `length` random tokens a row, with room for a few more."""
    cache = mil.Cache(model, batch, length + 16, places)
    with torch.inference_mode():
        for part in torch.randint(model.config.v, (batch, length), device=DEVICE).split(4096 if batch == 1 else 512, dim=1):
            model.hidden(part, cache)
    return cache


def cache_bytes(cache, length):
    """What a step reads of it, all rows together."""
    return sum(t.numel() * t.element_size() * (length / cache.size if name in "kv" else 1)
               for log in cache.logs if log for name, t in vars(log).items() if name in ("k", "v", "h"))


def step_ms(model, cache, l):
    """The median time of a pass of l tokens a row and their logits, each from the same place: the cursor is put back. A verification (l > 1) is
    as after a round that kept l tokens, whose inputs go into the states before the new ones are read; of single tokens it is the mean of
    as many as come from one writing of the states to the next."""
    tokens, at, used = torch.zeros(len(cache.at), l, dtype=torch.long, device=DEVICE), cache.at.clone(), cache.used
    logged, passes = (l, 1) if l > 1 else (0, cache.places + 1)

    def steps():
        cache.base.copy_(at - logged)
        cache.start(at, used, logged)
        return [model(tokens, cache) for _ in range(passes)]
    with torch.inference_mode():
        run = generate.Launched(steps, cache.device if CUDA and cache.fusable(l) else None)
        run(), run()
        return wall_ms(run) / passes


def decoding(limits):
    rows, (length, batch, far) = [], LONG
    print(f"\n{f'6. a step, batch 1 at {length} tokens':<38}{'ms':>10}{'tokens/s':>10}{'of floor':>10}{'verify 5 ÷ step':>17}")
    for mixers in STACKS:
        model = random_model(stacked(DECODER, mixers))
        cache = filled(model, 1, length)
        ms, verify = step_ms(model, cache, 1), step_ms(model, filled(model, 1, length, places=5), 5)
        read = sum(w.numel() * w.element_size() for w in model.parameters()) - model.embed_tokens.weight.nbytes * (not model.config.tied)
        floor = 1e3 * (read + cache_bytes(cache, length)) / limits[0]
        rows.append(dict(mixers=mixers, ms=ms, floor=floor, verify=verify))
        print(f"{' + '.join(mixers):<38}{ms:>10.3f}{1e3 / ms:>10.1f}{floor / ms:>10.0%}{verify / ms:>17.2f}", flush=True)
        del model, cache
    print(f"\n{f'7. a step, batch {batch} at {far} tokens':<38}{'ms':>10}{'÷ attention':>13}{'cache, MiB a row':>18}")
    for mixers in STACKS[:3]:
        model = random_model(stacked(dataclasses.replace(DECODER, context=far + 16), mixers))
        cache = filled(model, batch, far, generate.log_places(model, batch))
        rows.append(dict(mixers=mixers, batch=batch, length=far, ms=step_ms(model, cache, 1), bytes_per_row=cache_bytes(cache, far) / batch))
        ratio = rows[-1]["ms"] / next(r["ms"] for r in rows if r.get("length") == far)
        print(f"{' + '.join(mixers):<38}{rows[-1]['ms']:>10.3f}{ratio:>13.2f}{rows[-1]['bytes_per_row'] / 2**20:>18.2f}", flush=True)
        del model, cache
    return rows


def replays():
    """Table 8, of the kernel alone and with the gate and norm that follow it."""
    (h, g, p), b, rows = (32, 8, 128), 64, []
    mixer = mil.cast(mil.Mamba2(mil.Config(n_heads=h, n_kv_heads=g, head_dim=p)), TYPE).to(DEVICE)
    z, xBC, dt = torch.randn(b, 1, sum(mixer.sizes), device=DEVICE, dtype=TYPE).split(mixer.sizes, dim=2)
    print(f"\n{f'8. replay, b{b} h{h} p{p} n{p}':<38}{'ms':>10}{'GB/s':>10}{'with norm':>12}")
    for logged, written in ((0, True), (0, False), (1, False), (1, True), (2, True), (4, True)):
        cache = mil.Cache(mil.Hybrid(mil.Config(v=1, d=2, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=1, mixers=["none"])).to(DEVICE), b, 99, places=8)
        cache.at.fill_(64), cache.base.fill_(64 - logged), cache.to.fill_(64 + (logged == 0) if written else 64 - logged)
        log = mixer.new_log(cache)
        log.inputs = [torch.randn(b, 64, *t.shape[2:], device=DEVICE, dtype=TYPE) for t in (xBC, dt)]
        with torch.inference_mode():
            times = []
            for gate in (lambda y, z: y, mil.Mamba2.gate.__get__(mixer)):
                mixer.gate = gate
                times.append(gpu_ms(lambda: [mixer.replay(xBC, dt, z, log) for _ in range(10)]) / 10)
        rows.append(dict(logged=logged, written=written, ms=times[0], with_norm=times[1]))
        print(f"{f'{logged} logged, state ' + ('written' if written else 'not written'):<38}{times[0]:>10.4f}"
              f"{(1 + written) * log.h.nbytes / times[0] / 1e6:>10.0f}{times[1]:>12.4f}", flush=True)
    return rows


def exactness(dtype, tokens, seed=0):
    """Of tiny models, and for bf16, which the kernels take, larger ones."""
    tiny = dict(v=7, d=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, context=256, d_state=4)
    config = mil.Config(**tiny if dtype == torch.float64 else dict(v=512, d=256, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=704, context=256))
    compared, differ, first = 0, 0, seed
    pairs = [(a, b) for a in (*STACKS, ("mamba", "attention")) for b in (*STACKS, ("mamba", "attention"))]
    while compared < tokens:
        target, draft = (random_model(stacked(config, m), dtype, 2 * seed + i) for i, m in enumerate(pairs[seed % len(pairs)]))
        rng = random.Random(seed)
        prompts = [[rng.randrange(config.v) for _ in range(rng.randint(1, 9))] for _ in range(seed // 8 % 4 + 1)]
        plain, fast = ([sum(row, []) for row in zip(*generate.generate(target, prompts, 200, 0, **more))]
                       for more in ({}, dict(draft=draft, speculate=seed % 8 + 1)))
        compared += sum(map(len, plain))
        differ += sum(a != b for row, other in zip(plain, fast) for a, b in zip(row, other)) + sum(len(a) != len(b) for a, b in zip(plain, fast))
        seed += 1
    print(f"\n9. greedy speculative = greedy plain, {str(dtype)[6:]}: {compared:,} tokens of {seed - first} pairs of models compared, {differ} differ", flush=True)
    return dict(dtype=str(dtype)[6:], compared=compared, differ=differ, pairs=seed - first)


def speculation(target, draft):
    (model, encoding), (small, _) = (generate.load_with_tokenizer(path, DEVICE, TYPE) for path in (target, draft))
    text = generate.encode(encoding, Path(__file__).read_text())  # not part of any training text of ours
    prompts, rows = [text[i:i + 64] for i in range(0, 1600, 200)], []
    print(f"\n{f'10. {sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters':<38}{'tokens/s':>10}{'÷ plain':>10}{'kept':>8}{'a pass':>8}{'text':>9}{'fresh':>8}")
    for batch, temperature, K in [(b, t, K) for b in (1, 8) for t, Ks in ((0, (None, 2, 4, 6, 0)), (1, (None, 0))) for K in Ks]:
        texts, seconds, timed, passes, accepted, proposed = [], 0, 0, 0, 0, 0
        for first in range(0, 8, batch):
            plan, new, dice = generate.Speculation(K or 0), [[] for _ in range(batch)], torch.Generator(DEVICE).manual_seed(first)
            for i, row in enumerate(generate.generate(model, prompts[first:first + batch], NEW, temperature, generator=dice,
                                                      draft=None if K is None else small, speculate=plan)):
                new = [a + b for a, b in zip(new, row)]
                if i == 2:
                    before, began = sum(map(len, new)), now()
            seconds, timed, texts = seconds + now() - began, timed + sum(map(len, new)) - before, texts + new
            passes, accepted, proposed = passes + plan.passes, accepted + plan.accepted, proposed + plan.proposed
        windows = [tuple(new[i:i + 8]) for new in texts for i in range(len(new) - 7)]
        row = dict(batch=batch, temperature=temperature, K=K, tokens_s=timed / seconds, fresh=len(set(windows)) / len(windows))
        if K is None:
            plain = row["tokens_s"], texts
        else:
            row.update(kept=accepted / proposed, per_pass=sum(map(len, texts)) / passes, same=None if temperature else texts == plain[1])
        rows.append(row)
        name = f"batch {batch}, {'sampled' if temperature else 'greedy'}, {'plain' if K is None else f'K = {K}' if K else f'K chosen ({plan.K})'}"
        more = f"{'':>25}" if K is None else f"{row['kept']:>8.0%}{row['per_pass']:>8.2f}{ {True: 'same', False: 'DIFFERS', None: '–'}[row['same']]:>9}"
        print(f"{name:<38}{row['tokens_s']:>10.1f}{row['tokens_s'] / plain[0]:>10.2f}{more}{row['fresh']:>8.0%}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Training


EIGHT, ONE = mil.Config(), mil.Config(d=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192, tied=True)
TRAINING = [  # name, shape, what trains, what the Mamba layers are, batch, --recompute
    ("8B, stage 1, b4", EIGHT, "mixers", "mamba2", 4, "none"), ("8B, stage 1, b4, 0.6 of the MLPs again", EIGHT, "mixers", "mamba2", 4, "0.6"),
    ("8B, stage 1, b4, MLPs again", EIGHT, "mixers", "mamba2", 4, "mlp"),
    ("8B, stage 1, b1", EIGHT, "mixers", "mamba2", 1, "none"), ("1B, stage 1, b1", ONE, "mixers", "mamba2", 1, "none"),
    ("1B, stage 1, b1, MLPs again", ONE, "mixers", "mamba2", 1, "mlp"), ("1B, stage 1, b1, --graph", ONE, "mixers", "mamba2", 1, "none"),
    ("1B, stage 2, b8", ONE, "all", "mamba2", 8, "none"), ("1B, stage 2, b8, half the MLPs again", ONE, "all", "mamba2", 8, "0.5"),
    ("1B, stage 2, b8, Mamba", ONE, "all", "mamba", 8, "none"), ("1B, stage 2, b8, attention", ONE, "all", "attention", 8, "none")]
LENGTH = 2048
if "--small" in sys.argv or not CUDA:
    SMALL = mil.Config(v=1000, d=64, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=128)
    TRAINING, LENGTH = [("small, stage 1", SMALL, "mixers", "mamba2", 2, "none"), ("small, stage 2", SMALL, "all", "mamba2", 2, "0.5"),
                        ("small, stage 2, attention", SMALL, "all", "attention", 2, "none")], 64


class Enough(Exception):
    """Ends a run of train_distill's loop."""


def training(limits):
    """Table 11, on train_distill's own loop."""
    rows = []
    print(f"{'11. ' + str(LENGTH) + ' tokens, random weights':<40}{'tokens/s':>10}{'peak':>12}{'said':>12}{'MFU':>6}{'loss':>9}")
    for name, config, train, mixer, batch, recompute in TRAINING:
        if CUDA:
            gc.collect()
            torch.cuda.empty_cache()
        with torch.device("meta"):
            base = mil.Hybrid(config)
        base = mil.cast(base, TYPE).to_empty(device=DEVICE)
        base.tie()
        for w in base.parameters():
            torch.nn.init.ones_(w) if w.dim() == 1 else w.data.normal_(std=0.02)
        s = train_distill.Settings(context=LENGTH, batch=batch, recompute=recompute, dtype=str(TYPE)[6:], graph=name.endswith("--graph"))
        run = train_distill.Run(s, torch.device(DEVICE))
        replaced = mil.interleaved_layers(config.n_layers, 0.5)
        stage = train_distill.Stage(train=train, beta=1.0, steps=1000, lr=1e-5, name=name, mixers=[mixer if i in replaced else "attention" for i in range(config.n_layers)])
        models, log, steps = train_distill.assemble(run, base, base, stage, 1, {}), io.StringIO(), 30 if config is not EIGHT else 20
        most = batch if train_distill.graphs(run, stage, *models.configs) else 0

        def batches(step):
            if step == steps:
                raise Enough
            x, y = torch.randint(config.v, (2, batch, LENGTH), generator=torch.Generator().manual_seed(step))
            return [train_distill.to_device(x, y, torch.arange(LENGTH).expand(batch, -1), run.device, most)], batch * LENGTH
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        try:
            train_distill.fit(run, train_distill.State(), stage, models, batches, log, "")
        except Enough:
            pass
        except torch.OutOfMemoryError as e:
            print(f"{name:<40}  out of memory: {str(e).splitlines()[0][:90]}")
            continue
        lines = [json.loads(line) for line in log.getvalue().splitlines()]
        speed = batch * LENGTH * (lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["seconds"] - lines[0]["seconds"])  # the first ten steps compile
        peak, student = torch.cuda.max_memory_allocated() if CUDA else 0, dataclasses.replace(config, mixers=stage.mixers)
        said = sum(train_distill.memory_needed(s, student, stage, sum(w.nbytes for w in base.parameters())).values())
        mfu = speed * train_distill.flops(config, student, stage, LENGTH) / limits[1]
        rows.append(dict(name=name, tokens_s=speed, peak=peak, said=said, mfu=mfu, loss=lines[-1]["loss"]))
        print(f"{name:<40}{speed:>10,.0f}{peak / 2**30:>8.1f} GiB{said / 2**30:>8.1f} GiB{mfu:>6.0%}{lines[-1]['loss']:>9.4f}", flush=True)
        del models, base
    rates, all_, half = {row["name"]: row["tokens_s"] for row in rows}, TRAINING[-1][0], TRAINING[-1][0].removesuffix(", attention")
    if {all_, half} <= rates.keys():
        print(f"a step of stage 2 with half the attention replaced by Mamba-2 takes {rates[all_] / rates[half]:.3f} of one with all of it")
    return rows


if __name__ == "__main__":
    what, *paths = [a for a in sys.argv[1:] if a != "--small"] or [""]
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
        sys.exit()
    if what not in ("kernels", "decode", "train") or len(paths) not in ((0, 2) if what == "decode" else (0,)):
        sys.exit(f"error: bench.py {' '.join(sys.argv[1:])}: expected kernels, train, decode, or decode and two checkpoints, a model and its draft (--help says more)")
    if paths:
        try:
            flags = generate.Settings(model=paths[0], draft=paths[1])
            generate.load_draft(flags, *generate.load_with_tokenizer(flags.model, DEVICE, TYPE), DEVICE)
        except mil.MilError as e:
            sys.exit(f"error: {e}")
    limits = ceilings()
    versions = {name: sys.modules[name].__version__ for name in ("torch", "triton", "mamba_ssm", "fla") if name in sys.modules}
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    print(f"{machine}, {versions}, {str(TYPE)[6:]}; copy {limits[0] / 1e9:,.4g} GB/s, matrix product {limits[1] / 1e12:,.4g} TFLOP/s, "
          f"{limits[2] / 1e12:,.2g} T exponentials/s")
    report = dict(machine=machine, versions=versions, limits=limits)
    if what == "kernels":
        report.update(scans=scans(limits), errors=errors(), mixers=mixers(), growth=growth(), kept=kept())
    elif what == "train":
        report.update(training=training(limits))
    else:
        report.update(decoding=decoding(limits), replay=replays() if CUDA else None, exactness=[exactness(*how) for how in EXACT], **(dict(speculation=speculation(*paths)) if paths else {}))
    Path(f"bench-{what}.json").write_text(json.dumps(report, indent=1))
