"""How fast the kernels are, beside attention and, where it is installed, mamba_ssm.

    python tests/bench.py kernels            prints the table and writes it to bench-kernels.json
    python tests/bench.py kernels --small    sizes for a CPU

Times are medians in milliseconds. The floor is the least time the work can take on this device: bytes that must move (every
input read once, every output written once) over the measured bandwidth of a copy, products of matrices over the
measured rate of a large one, or exponentials over the rate of the units that compute them (16 a clock and
multiprocessor), whichever is longest; a backward counts twice its forward. `of floor` is floor / ours.
"""
import importlib.metadata
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels

CUDA = torch.cuda.is_available()
DEVICE, TYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
WORK = [("Mamba", 4, 2048, 256, 64, 16), ("Mamba", 1, 2048, 256, 64, 16), ("Mamba-2", 4, 2048, 32, 8, 128), ("Mamba-2", 1, 16384, 32, 8, 128)]
SMALL = [("Mamba", 1, 256, 16, 4, 16), ("Mamba-2", 1, 256, 4, 2, 32)]


def median_ms(f, seconds=0.2):
    """The median time of f() in ms, warmed up."""
    if CUDA:
        from triton.testing import do_bench
        return do_bench(f, warmup=50, rep=int(seconds * 1000), return_mode="median")
    f()
    times, began = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def ceilings():
    """Bytes, matrix operations and exponentials per second: the first two measured, the third from the clock."""
    n = 2**30 if CUDA else 2**24
    a = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    bandwidth = 2 * n / median_ms(lambda: a.clone()) * 1e3
    m = torch.randn(8192 if CUDA else 1024, 8192 if CUDA else 1024, device=DEVICE, dtype=TYPE)
    matrix = 2 * m.shape[0]**3 / median_ms(lambda: m @ m) * 1e3
    exponentials = torch.cuda.get_device_properties(0).multi_processor_count * 16 * 1.98e9 if CUDA else float("inf")
    return bandwidth, matrix, exponentials


def inputs(kind, b, l, h, g, p):
    new = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=TYPE)  # noqa: E731
    per = (h, p) if kind == "Mamba" else (h,)
    A = -torch.rand(*per, *((p,) if kind == "Mamba" else ()), device=DEVICE) - 0.1
    t = dict(x=new(b, l, g, p), dt=new(b, l, *per), A=A, B=new(b, l, g, p), C=new(b, l, h, p),
             D=torch.ones(per, device=DEVICE), dt_bias=torch.full(per, -4.0, device=DEVICE))
    if kind == "Mamba":
        t["z"] = new(b, l, h, p)
    return {k: v.requires_grad_() for k, v in t.items()}


def work(kind, b, l, h, g, p):
    """Bytes, matrix operations and exponentials of a forward (n = p)."""
    size = torch.empty(0, dtype=TYPE).element_size()
    if kind == "Mamba":
        return size * b * l * (2 * g * p + 4 * h * p), 0, b * l * h * p * p           # x, B; dt, C, z, y
    T = 64
    return size * b * l * (2 * g * p + 2 * h * p), 2 * b * l * h * (2 * T * p + 2 * p * p), 0


def both(f, leaves):
    """Times of f() without gradients, and of f() and its gradients."""
    with torch.no_grad():
        forward = median_ms(f)
    dy = torch.randn_like(f())
    return forward, median_ms(lambda: torch.autograd.grad(f(), leaves, dy))


def official(kind, t, h):
    """mamba_ssm on the same inputs with the kv heads repeated beforehand (its scans do not group them), or None."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    x, B = (kernels.repeat_heads(t[k], h).detach().requires_grad_() for k in ("x", "B"))
    if kind == "Mamba":
        flat = lambda v: v.flatten(2).transpose(1, 2).contiguous().detach().requires_grad_()  # noqa: E731  (b, h·p, l)
        group = lambda v: v.permute(0, 2, 3, 1).contiguous().detach().requires_grad_()  # noqa: E731  (b, h, n, l)
        a = [flat(x), flat(t["dt"]), t["A"].flatten(0, 1), group(B), group(t["C"]), t["D"].flatten(), flat(t["z"]), t["dt_bias"].flatten()]
        a = [v.detach().requires_grad_() for v in a]
        return both(lambda: selective_scan_fn(*a, delta_softplus=True), a)
    a = [v.detach().requires_grad_() for v in (x, t["dt"], t["A"], B, t["C"], t["D"], t["dt_bias"])]
    return both(lambda: mamba_chunk_scan_combined(*a[:5], chunk_size=256, D=a[5], dt_bias=a[6], dt_softplus=True), a)


def bench_kernels(small):
    bandwidth, matrix, exponentials = ceilings()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton") if CUDA or name == "torch"}
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    print(f"{machine}, {versions}, {str(TYPE)[6:]}; copy {bandwidth / 1e9:,.0f} GB/s, matrix product {matrix / 1e12:,.1f} TFLOP/s")
    print(f"{'':<40}{'ours':>9}{'GB/s':>8}{'TFLOP/s':>9}{'floor':>8}{'of floor':>10}{'attention':>11}{'mamba_ssm':>11}")
    rows = []
    for kind, b, l, h, g, p in SMALL if small or not CUDA else WORK:
        t = inputs(kind, b, l, h, g, p)
        ours = both(lambda: kernels.ssm_scan(**t)[0], list(t.values()))
        q, k, v = (torch.randn(b, max(1, h * p // 128), l, 128, device=DEVICE, dtype=TYPE, requires_grad=True) for _ in range(3))
        attention = both(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v])
        peer = official(kind, t, h) if CUDA else None
        nbytes, products, exps = work(kind, b, l, h, g, p)
        for i, (name, times) in enumerate((("forward", 1), ("forward + backward", 3))):
            ms, floor = ours[i], 1e3 * times * max(nbytes / bandwidth, products / matrix, exps / exponentials)
            rows.append(dict(kind=kind, b=b, l=l, h=h, g=g, p=p, n=p, work=name, ms=ms, floor_ms=floor, attention_ms=attention[i],
                             mamba_ssm_ms=peer and peer[i]))
            print(f"{f'{kind} b{b} l{l} h{h} p{p} {name}':<40}{ms:>9.3f}{times * nbytes / ms / 1e6:>8.0f}{times * products / ms / 1e9:>9.1f}{floor:>8.3f}"
                  f"{floor / ms:>10.0%}{attention[i]:>11.3f}{f'{peer[i]:.3f}' if peer else '–':>11}", flush=True)
    Path("bench-kernels.json").write_text(json.dumps(dict(machine=machine, versions=versions, rows=rows), indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] != ["kernels"] or set(sys.argv[2:]) - {"--small"}:
        sys.exit(__doc__)
    bench_kernels("--small" in sys.argv)
