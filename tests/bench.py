"""How fast, how exact and how large: our scans and mixers beside attention and, where they are installed, mamba_ssm and fla.

    python tests/bench.py kernels            prints the five tables below and writes them to bench-kernels.json
    python tests/bench.py kernels --small    sizes for a CPU

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
"""
import importlib
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels
import mil

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


if __name__ == "__main__":
    if sys.argv[1:2] != ["kernels"] or set(sys.argv[2:]) - {"--small"}:
        sys.exit(__doc__)
    limits = ceilings()
    versions = {name: sys.modules[name].__version__ for name in ("torch", "triton", "mamba_ssm", "fla") if name in sys.modules}
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    print(f"{machine}, {versions}, {str(TYPE)[6:]}; copy {limits[0] / 1e9:,.0f} GB/s, matrix product {limits[1] / 1e12:,.1f} TFLOP/s, "
          f"{limits[2] / 1e12:,.2g} T exponentials/s")
    report = dict(machine=machine, versions=versions, limits=limits, scans=scans(limits), errors=errors(), mixers=mixers(), growth=growth(), kept=kept())
    Path("bench-kernels.json").write_text(json.dumps(report, indent=1))
