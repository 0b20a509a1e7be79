"""The recurrence under a Mamba layer: written once, then made fast.

    Δ_t = softplus(dt_t + dt_bias)                                  the step size
    h_t = exp(Δ_t A) ∘ h_{t-1} + (Δ_t x_t) ⊗ B_t                    the state, one p × n matrix per head
    y_t = h_t C_t + D ∘ x_t,   then   y_t ∘ silu(z_t)               the output, its skip and its gate

Without Δ, A, D and z this is causal attention with the softmax taken out, so each symbol has an attention
name (The Mamba in the Llama, arXiv 2408.15237, section 2):

    C  query   (b, l, h, n)        b  batch            h  query heads        n  state size per head
    B  key     (b, l, g, n)        l  length           g  key/value heads    p  channels per head
    x  value   (b, l, g, p)                            w  width of the convolution, 4

Grouped-query attention carries over: head i reads kv head i // (h/g). x and B are indexed where they lie and
are never repeated in memory by a kernel.

Two decays, told apart by the shape of A:

    Mamba    dt (b, l, h, p)   A (h, p, n)     every channel has a step, every state element a decay
    Mamba-2  dt (b, l, h)      A (h,)          one of each per head, so a chunk of tokens is a matrix product

In this file
    ssm_reference         the definition, a loop over tokens; the tests measure everything else against it
    ssm_scan              the same result, differentiable and fast: Triton on CUDA, chunked PyTorch elsewhere
    conv_reference        the short causal convolution + SiLU in front of the scan, and causal_conv, its fast form
    gated_norm_reference  Mamba-2's gate and norm behind it, and gated_norm

How the scan is made fast. The recurrence is linear in h, so a sequence can be cut anywhere:

    1. end     every piece, on its own, computes the state S it would leave behind from h = 0
    2. join    from piece to piece, h ← exp(A ΣΔ) h + S, which leaves in place of S the state each piece starts from
    3. walk    every piece, on its own again, computes its y from its starting state

In PyTorch the pieces are many short chunks and all of it is vectorised. In Triton a walk keeps the state in registers
and goes through its piece once, token by token for Mamba, tile by tile for Mamba-2, where a tile of T tokens is a few
products of matrices on the tensor cores. Batch, heads and blocks of channels run in parallel; that fills a GPU at
training sizes, so a sequence is one piece, steps 1 and 2 fall away and the state stays in registers (for a gradient some
states are left in memory, see below). Only a small batch is cut into segments, to fill the chip.

The gradient is the same walk backwards in time: the adjoint G_t = ∂L/∂h_t obeys G_{t-1} = exp(Δ_t A) ∘ G_t + dy_{t-1} ⊗
C_{t-1}. Mamba's forward, when a gradient is wanted, leaves every 8th state in memory; its backward walks from the last token
to the first, four tokens at a time, whose states it computes again and holds in registers. Mamba-2 keeps its inputs and the
state each segment starts from: two walks leave the state and the adjoint at every tile's border, then all tiles are taken at
once.

Why it is fast, in the order in which it paid (an H100 has 132 multiprocessors of 4 schedulers, each one instruction a clock):

    Mamba is bound by instructions. A token of a head of 16 channels and 16 states is 256 exponentials and 1,024 products (a sum
    that can be fused into one not counted): 40 instructions of a warp, of which the exponentials take 64 clocks of their unit.
    Compiled naively, what surrounds them takes three times as many, so most of the work went there: strides and sizes are
    constants, so an address is an immediate; bf16 comes 8 numbers to a load and two to a 32-bit word, unpacked by one shift or
    mask each; a thread holds 8 states of one channel, so a sum over n is 7 additions and one shuffle; and the two sums over
    channels that dB and dC need share their columns out between rows (store_sum), 8 shuffles a sum in place of 32.
    With one or two warps a scheduler, nothing hides the memory's latency but loads issued long before their use: what the
    state needs of the next tokens is asked for before work on the present ones begins.
    Mamba-2 is bound by the latency between dependent products: a tile is large enough (in bf16 64 tokens, 64 channels × all n states) that
    loads of the next one run behind it, and what belongs to writers and to readers is computed from products of its own, never
    from a transposed result.
    Launching 40 arguments from Python takes longer than a small batch runs: `launch` remembers what it has compiled.

Names in the kernels: s6_ is Mamba, ssd_ Mamba-2; b_ a block in registers, p_ a pointer, o_ offsets, m_ a mask, i_ an index, s_ a
stride (s_xl: of x over l), c a number of segments, s the tokens in one (p_s, b_s: the running sum of Δ A), T tokens taken together, BP
and BN blocks of p and n, N2 = ⌈n/2⌉, rx and rb the query heads that share a head of x and of B, h0 the starting state. A suffix 0 or 1
on a block of Mamba's (b_h0, b_h1) is the even or the odd columns of n. `o < tl.where(m, n, 0)` is m & (o < n), one compare.
"""
import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is for Linux only; without it every function below takes its PyTorch form
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, so once


def use_triton(x):
    """Whether `x` goes to the Triton kernels: on CUDA, or anywhere under TRITON_INTERPRET=1; float64 never does."""
    return triton is not None and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


# ---------------------------------------------------------------------------------------------------------------
# The definition


def repeat_heads(t, h):
    """(b, l, g, w) -> (b, l, h, w): head i reads kv head i // (h/g)."""
    return t.repeat_interleave(h // t.shape[2], dim=2)


def ssm_reference(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None):
    """The state space model of the file's head, token by token (the paper's Eq. 1, discretised as in Mamba).

    Shapes as above; D and dt_bias are shaped like dt without (b, l); z is (b, l, h, p); h0 is (b, h, p, n).
    The state is float32, or float64 when x is. Returns y (b, l, h, p) in x's type and the last state h.
    """
    heads, n, p, f = C.shape[2], C.shape[3], x.shape[3], torch.promote_types(x.dtype, torch.float32)
    xs, Bs, Cs = repeat_heads(x, heads).to(f), repeat_heads(B, heads).to(f), C.to(f)
    delta = F.softplus(dt.to(f) if dt_bias is None else dt.to(f) + dt_bias.to(f))
    if A.dim() == 1:  # Mamba-2: one decay per head is Mamba with every channel and state element alike
        delta, A, D = delta[..., None], A[:, None, None], D if D is None else D[:, None]
    h = x.new_zeros(x.shape[0], heads, p, n, dtype=f) if h0 is None else h0.to(f)
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, ..., None] * A.to(f)) * h + (delta[:, t] * xs[:, t])[..., None] * Bs[:, t, :, None]
        ys.append(torch.einsum("bhpn,bhn->bhp", h, Cs[:, t]))
    y = torch.stack(ys, dim=1)  # (b, l, h, p)
    y = y if D is None else y + D.to(f) * xs
    y = y if z is None else y * F.silu(z.to(f))
    return y.to(x.dtype), h


def conv_reference(x, weight, bias=None, state=None):
    """Causal depthwise convolution with SiLU: y_t = silu(bias + Σ_k weight_k x_{t-w+1+k}).

    x (b, l, g, p); weight (h, p, w); bias (h, p): head i reads kv head i // (h/g). state (b, w-1, g, p) holds the
    inputs before x, zeros when None. Returns y (b, l, h, p) and the inputs to carry on from, shaped like state.
    """
    (l, g), w, f = x.shape[1:3], weight.shape[2], torch.promote_types(x.dtype, torch.float32)
    x = F.pad(x, (0, 0, 0, 0, w - 1, 0)) if state is None else torch.cat([state.to(x.dtype), x], dim=1)
    xs, weight = x.to(f).unsqueeze(3), weight.to(f).unflatten(0, (g, -1))    # (b, l, g, 1, p) (g, h/g, p, w)
    y = sum(xs[:, k:k + l] * weight[..., k] for k in range(w)).flatten(2, 3)
    y = y if bias is None else y + bias.to(f)
    return F.silu(y).to(x.dtype), x[:, l:]


def gated_norm_reference(y, z, weight, eps=1e-5):
    """Mamba-2's gate and norm, per head: v = y ∘ silu(z), then v / √(mean of v² over p + eps) ∘ weight.

    y, z (b, l, h, p), weight (h, p). float32 inside, or float64 when y is; returns (b, l, h, p) in y's type."""
    f = torch.promote_types(y.dtype, torch.float32)
    v = y.to(f) * F.silu(z.to(f))
    return (F.rms_norm(v, v.shape[-1:], eps=eps) * weight.to(f)).to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------
# The public, fast forms


def ssm_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None):
    """`ssm_reference`, fast and differentiable: the same arguments, shapes and types, and its results up to rounding.

    Raises ValueError, naming the argument, when the shapes do not fit together.
    """
    check_ssm(x, dt, A, B, C, D, z, dt_bias, h0)
    with torch.autocast(x.device.type, enabled=False):  # the state and Δ·A stay float32 whatever surrounds them
        if x.shape[1] == 1:  # one token has nothing to run in parallel: the definition is a single step
            return ssm_reference(x, dt, A, B, C, D, z, dt_bias, h0)
        if use_triton(x):
            inside = z if A.dim() == 3 else None  # Mamba's kernel gates its output; Mamba-2's does not, as gated_norm does it
            keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, A, B, C, D, z, dt_bias, h0))
            y, h = TritonScan.apply(x, dt, A, B, C, D, inside, dt_bias, h0, keep)
            return y if inside is z else (y.float() * F.silu(z.float())).to(x.dtype), h
        f = torch.promote_types(x.dtype, torch.float32)
        delta = F.softplus(dt.to(f) if dt_bias is None else dt.to(f) + dt_bias.to(f))
        h0 = x.new_zeros(x.shape[0], C.shape[2], x.shape[3], C.shape[3], dtype=f) if h0 is None else h0.to(f)
        y, h = (ssd_torch if A.dim() == 1 else s6_torch)(x.to(f), delta, A.to(f), B.to(f), C.to(f), h0)
        if D is not None:  # broadcast over the heads that share a kv head, by a view: (b, l, g, h/g, p)
            D = D[:, None] if D.dim() == 1 else D
            y = y + (x.unsqueeze(3) * D.to(f).view(x.shape[2], -1, D.shape[1])).flatten(2, 3)
        if z is not None:
            y = y * F.silu(z.to(f))
        return y.to(x.dtype), h


def causal_conv(x, weight, bias=None, state=None, lengths=None):
    """`conv_reference`, fast and differentiable. With `lengths` (b,) row i has only that many real tokens, padded
    on the right, and the returned state holds each row's own last inputs. ValueError when the shapes do not fit."""
    (b, l, g, p), (h, _, w) = x.shape, weight.shape
    if h % g:
        raise ValueError(f"causal_conv: the kv heads of x ({g}) must divide the heads of weight ({h})")
    for name, t, want in (("weight", weight, (h, p, w)), ("bias", bias, (h, p)), ("state", state, (b, w - 1, g, p))):
        if t is not None and tuple(t.shape) != want:
            raise ValueError(f"causal_conv: {name} is {tuple(t.shape)}, expected {want} for x {tuple(x.shape)}")
    full = x if state is None else torch.cat([state.to(x.dtype), x], dim=1)
    y = TritonConv.apply(full, weight, bias, full.shape[1] - l) if use_triton(x) else conv_reference(x, weight, bias, state)[0]
    if lengths is None and l >= w - 1:
        return y, x[:, l - w + 1:]
    full = full if state is not None else F.pad(x, (0, 0, 0, 0, w - 1, 0))                    # (b, w-1+l, g, p)
    if lengths is None:
        return y, full[:, l:]
    at = lengths[:, None] + torch.arange(w - 1, device=x.device)                              # (b, w-1), in full
    return y, full.gather(1, at[..., None, None].expand(-1, -1, g, p))


def gated_norm(y, z, weight, eps=1e-5):
    """`gated_norm_reference`, fast and differentiable. ValueError when the shapes do not fit."""
    for name, t, want in (("z", z, y.shape), ("weight", weight, y.shape[2:])):
        if t.shape != want:
            raise ValueError(f"gated_norm: {name} is {tuple(t.shape)}, expected {tuple(want)} for y {tuple(y.shape)}")
    return TritonNorm.apply(y, z, weight, eps) if use_triton(y) else gated_norm_reference(y, z, weight, eps)


def check_ssm(x, dt, A, B, C, D, z, dt_bias, h0):
    """Every argument against the shapes in the file's head; ValueError on the first that does not fit."""
    for name, t, axes in (("x", x, "b, l, g, p"), ("B", B, "b, l, g, n"), ("C", C, "b, l, h, n")):
        if t.dim() != 4:
            raise ValueError(f"ssm: {name} is {tuple(t.shape)}, expected four axes ({axes})")
    (b, l, gx, p), gb, (h, n) = x.shape, B.shape[2], C.shape[2:]
    if B.shape[3] != n:
        raise ValueError(f"ssm: B is {tuple(B.shape)} and C is {tuple(C.shape)}, but their last axis, n, must agree")
    per = (h,) if A.dim() == 1 else (h, p)  # what has one value per head in Mamba-2 has one per channel in Mamba
    want = {"A": per if A.dim() == 1 else (h, p, n), "dt": (b, l, *per), "B": (b, l, gb, n), "C": (b, l, h, n),
            "D": per, "dt_bias": per, "z": (b, l, h, p), "h0": (b, h, p, n)}
    given = {"A": A, "dt": dt, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "z": z, "h0": h0}
    for name, t in given.items():
        if t is not None and tuple(t.shape) != want[name]:
            raise ValueError(f"ssm: {name} is {tuple(t.shape)}, expected {want[name]} for x {tuple(x.shape)}, "
                             f"C {tuple(C.shape)} and {'Mamba-2' if A.dim() == 1 else 'Mamba'} (A has {A.dim()} axes)")
    if l < 1:
        raise ValueError("ssm: x has no tokens (l = 0), expected at least one")
    if h % gx or h % gb:
        raise ValueError(f"ssm: the kv heads of x ({gx}) and of B ({gb}) must both divide the query heads ({h})")


# ---------------------------------------------------------------------------------------------------------------
# The scan in PyTorch: the chunks of the file's head, vectorised. Takes Δ ready made, returns y before D and z.


def split_chunks(T, *tensors):
    """(b, l, ...) -> (b, c, T, ...), padded with zeros on the right: where Δ = 0 the state neither decays nor moves."""
    l = tensors[0].shape[1]
    pad = -l % T
    return [F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)).unflatten(1, (-1, T)) for t in tensors]


def pass_states(S, decay, h0):
    """Step 2. S and decay (b, c, h, p, n), decay broadcastable. Returns the state each chunk starts from, and the last."""
    starts = []
    for i in range(S.shape[1]):
        starts.append(h0)
        h0 = decay[:, i] * h0 + S[:, i]
    return torch.stack(starts, dim=1), h0


def s6_torch(x, delta, A, B, C, h0):
    """Mamba. With T = √l both loops, over the tokens of a chunk and over the chunks, take √l turns."""
    l = x.shape[1]
    T = max(1, round(l**0.5))
    x, delta, B, C = split_chunks(T, x, delta, B, C)
    decay = torch.exp(delta[..., None] * A)                             # (b, c, T, h, p, n)
    u = delta.unflatten(3, (x.shape[3], -1)) * x.unsqueeze(4)           # Δ x (b, c, T, gx, h/gx, p)
    u = u.flatten(3, 4).unflatten(3, (B.shape[3], -1))                  # (b, c, T, gb, h/gb, p)
    write = (u[..., None] * B[..., None, None, :]).flatten(3, 4)        # (b, c, T, h, p, n)
    states = [write[:, :, 0]]
    for t in range(1, T):
        states.append(decay[:, :, t] * states[-1] + write[:, :, t])
    total = torch.exp(delta.cumsum(2)[..., None] * A)                   # decay since the chunk's start
    starts, h = pass_states(states[-1], total[:, :, -1], h0)
    y = torch.einsum("bcthpn,bcthn->bcthp", torch.stack(states, dim=2) + total * starts[:, :, None], C)
    return y.flatten(1, 2)[:, :l], h


def ssd_torch(x, delta, A, B, C, h0, T=64):
    """Mamba-2. Inside a chunk y = (decay ∘ C Bᵀ) (Δ x): attention without softmax, its mask weighted by the decay."""
    l = x.shape[1]
    x, delta, B, C = split_chunks(min(T, l), x, delta, B, C)
    s = (delta.double() * A.double()).cumsum(2).transpose(2, 3)        # (b, c, h, T): log decay since the start
    # float64 for s: far into a chunk it is large, and what matters is the small difference between neighbours
    later = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).triu(1)
    decay = (s[..., :, None] - s[..., None, :]).masked_fill(later, -torch.inf).to(x.dtype).exp()  # (b, c, h, T, T)
    after, since = (s[..., -1:] - s).to(x.dtype).exp(), s.to(x.dtype).exp()                       # (b, c, h, T)
    u = (delta.unflatten(3, (x.shape[3], -1))[..., None] * x[..., None, :]).flatten(3, 4)         # Δ x (b, c, T, h, p)
    Cg = C.unflatten(3, (B.shape[3], -1))                                                         # (b, c, T, g, r, n)
    scores = torch.einsum("bctgrn,bcsgn->bcgrts", Cg, B).flatten(2, 3)                            # C Bᵀ (b, c, h, T, T)
    ug = (u * after.transpose(2, 3)[..., None]).unflatten(3, (B.shape[3], -1))                    # (b, c, T, g, r, p)
    S = torch.einsum("bctgrp,bctgn->bcgrpn", ug, B).flatten(2, 3)                                 # (b, c, h, p, n)
    starts, h = pass_states(S, since[..., -1:, None], h0)
    y = torch.einsum("bchts,bcshp->bcthp", scores * decay, u)
    y = y + torch.einsum("bcthn,bchpn->bcthp", C, starts) * since.transpose(2, 3)[..., None]
    return y.flatten(1, 2)[:, :l], h


# ---------------------------------------------------------------------------------------------------------------
# The scan in Triton. Tensors come with their own strides over batch, length and head, the last axis contiguous; A, D, h0 are
# contiguous float32, Mamba's A and states with the even columns of n before the odd ones (see `halves`). Strides and sizes within a
# batch are constants of the compiled kernel, which turns most address arithmetic into immediates (for Mamba it halves the registers);
# lengths are not, so a new length compiles nothing.

SEGMENTS = ["l", "c", "s"]  # lengths: not specialised on
# Chosen by measurement on an H100 and an H200. Mamba: the states a program holds, the programs (of one warp) to aim at, two a
# scheduler, and the tokens in flight, which are also those between two states in S. Mamba-2: the programs to aim at, and the launches of
# the walk that gives y, of those that leave states or an end, and of the gradient. The convolution: at least T tokens to a segment, U at a
# time, BLOCK channels × query heads. The norm: T tokens to a program, ELEMENTS numbers at a time.
S6_TILE, S6_BLOCKS, S6_T = 256, 1024, 8
SSD_BLOCKS, WALK_Y, WALK_STATES = 256, dict(num_warps=4, num_stages=2), dict(num_warps=4, num_stages=3)
GRADIENT = dict(num_warps=4, num_stages=2)
CONV_Y, CONV_GRADIENT = dict(T=32, U=8, BLOCK=128, num_warps=1), dict(T=64, U=8, BLOCK=64, num_warps=1)
NORM_Y, NORM_GRADIENT = dict(T=16, ELEMENTS=2048, num_warps=4), dict(T=64, ELEMENTS=1024, num_warps=4)

if triton is not None:
    LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x LOG2E), and 2^x is what the chip computes

    @triton.jit
    def softplus(b):
        """log(1 + e^b)."""
        b_e = tl.exp2(tl.abs(b) * -LOG2E)  # log(1 + e) = 2 artanh(e / (2 + e)), to float32 precision also where e is tiny
        b_w = b_e / (2 + b_e)
        b_q = b_w * b_w
        b_sum = 1 + b_q * (1 / 3 + b_q * (1 / 5 + b_q * (1 / 7 + b_q * (1 / 9 + b_q * (1 / 11 + b_q / 13)))))
        return tl.maximum(b, 0.) + 2 * b_w * b_sum

    @triton.jit
    def slope(b_delta):
        """The derivative of softplus where it is Δ (dt itself is not at hand): 1 - e^-Δ, to float32 precision also where Δ is tiny."""
        b_small = b_delta * (1 - b_delta / 2 * (1 - b_delta / 3 * (1 - b_delta / 4 * (1 - b_delta / 5))))
        return tl.where(b_delta < 0.05, b_small, 1 - tl.exp(-b_delta))

    @triton.jit
    def sigmoid(b):
        """1 / (1 + e^-b), by the square of a root: 5 instructions, where a division makes it 12."""
        b_root = tl.rsqrt(1 + tl.exp2(b * -LOG2E))
        return b_root * b_root

    @triton.jit
    def silu(b):
        return b * sigmoid(b)

    @triton.jit
    def silu_slope(b):
        """The derivative of silu."""
        b_sig = sigmoid(b)
        b_y = b * b_sig
        return b_sig + b_y * (1 - b_sig)

    @triton.jit(do_not_specialize=["l", "tiles"])
    def delta_kernel(p_dt, p_A, p_bias, p_delta, p_s, l, tiles, s_tb, s_tl: tl.constexpr, h: tl.constexpr,
                     BIAS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
        """Mamba-2: Δ (b, tiles·T, h) = softplus(dt + bias), 0 past the end, and s, the running sum of Δ A LOG2E within each tile.
        Beyond 2^-200 nothing is left of a float32, so larger decays are cut there: s stays so small (above -200 T)
        that float32 keeps its differences, which matter, better than bf16 keeps the inputs; float64 where x is float32."""
        i_bc = tl.program_id(0).to(tl.int64)
        i_b, i_c = i_bc // tiles, i_bc % tiles
        o, o_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), i_c * T + tl.arange(0, T)
        m, o_out = o < h, (i_bc * T + tl.arange(0, T))[:, None] * h + o[None, :]
        b_dt = tl.load(p_dt + i_b * s_tb + o_t[:, None] * s_tl + o[None, :], mask=(o_t < l)[:, None] & m[None, :], other=-float("inf")).to(tl.float32)
        if BIAS:
            b_dt += tl.load(p_bias + o, mask=m, other=0.)[None, :]
        b_delta = softplus(b_dt)
        b_a = tl.maximum(b_delta * tl.load(p_A + o, mask=m, other=0.)[None, :] * LOG2E, -200.)
        tl.store(p_delta + o_out, b_delta, mask=m[None, :])
        tl.store(p_s + o_out, tl.cumsum(b_a.to(p_s.dtype.element_ty), axis=0), mask=m[None, :])

    @triton.jit(do_not_specialize=["c"])
    def join_kernel(p_S, p_total, p_A, p_h0, p_h, c, h, p, n, REVERSE: tl.constexpr, MAMBA2: tl.constexpr, BLOCK: tl.constexpr):
        """From segment to segment: h ← exp(A ΣΔ) h + S, leaving in place of S what the segment starts from; or from the last
        to the first. S (b, c, h, p, n), total ΣΔ shaped like Δ with c for l, h0 and h (b, h, p, n)."""
        i_bh = tl.program_id(0).to(tl.int64)
        i_b, i_h = i_bh // h, i_bh % h
        o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        m = o < p * n
        b_A = tl.load(p_A + i_h) if MAMBA2 else tl.load(p_A + i_h * p * n + o, mask=m, other=0.)
        b_h = tl.load(p_h0 + i_bh * p * n + o, mask=m, other=0.)
        for k in range(c):
            i_bch = (i_b * c + (c - 1 - k if REVERSE else k)) * h + i_h
            b_S = tl.load(p_S + i_bch * p * n + o, mask=m, other=0.)
            b_total = tl.load(p_total + i_bch) if MAMBA2 else tl.load(p_total + i_bch * p + o // n, mask=m, other=0.)
            tl.store(p_S + i_bch * p * n + o, b_h, mask=m)
            b_h = tl.exp(b_A * b_total) * b_h + b_S
        tl.store(p_h + i_bh * p * n + o, b_h, mask=m)

    @triton.jit
    def read(p, o, m, WORDS: tl.constexpr, EMPTY: tl.constexpr):
        """Numbers at p + o, EMPTY where m is not. With WORDS, for bf16, as the 32 bits each shares with its neighbour, 0xff80ff80 being
        -inf twice: a value of 16 bits that is carried from one turn of a loop to the next is moved as soon as it arrives, and so
        waited for. (That pays in the backward. The forward, with more tokens in flight, measured faster without.)"""
        if WORDS:
            return tl.load(p.to(tl.pointer_type(tl.int32)) + o // 2, mask=m, other=-8323200 if EMPTY < 0 else 0)
        else:
            return tl.load(p + o, mask=m, other=EMPTY)

    @triton.jit
    def number(b, o, WORDS: tl.constexpr):
        """What `read` returned at o, as float32."""
        return ((b << 16 * (1 - o % 2)) & -65536).to(tl.float32, bitcast=True) if WORDS else b.to(tl.float32)

    @triton.jit
    def read_pairs(p, o, m, n: tl.constexpr, WORDS: tl.constexpr):
        """The even and the odd of n numbers at p, o counting pairs; zeros where m is not. With WORDS a tuple of one, both in 32 bits."""
        if WORDS:
            return (tl.load(p.to(tl.pointer_type(tl.int32)) + o, mask=o < tl.where(m, n // 2, 0), other=0),)
        else:
            return tl.load(p + 2 * o, mask=2 * o < tl.where(m, n, 0), other=0.), tl.load(p + 2 * o + 1, mask=2 * o + 1 < tl.where(m, n, 0), other=0.)

    @triton.jit
    def pairs(b, WORDS: tl.constexpr):
        """What `read_pairs` returned, as float32: of a word the lower half shifted up, and the upper half (& 0xffff0000)."""
        if WORDS:
            return (b[0] << 16).to(tl.float32, bitcast=True), (b[0] & -65536).to(tl.float32, bitcast=True)
        else:
            return b[0].to(tl.float32), b[1].to(tl.float32)

    @triton.jit
    def s6_inputs(p_x, p_dt, p_B, i_0, l, o_p, o_2, s_xl: tl.constexpr, s_tl: tl.constexpr, s_Bl: tl.constexpr, p: tl.constexpr, n: tl.constexpr,
                  WORDS: tl.constexpr, SINGLE: tl.constexpr, T: tl.constexpr):
        """x, dt, B of T tokens from i_0 on; outside the sequence Δ = 0, which leaves the state alone."""
        tokens = ()
        for j in tl.static_range(T):
            m = (i_0 + j >= 0) & (i_0 + j < l)
            m_p = o_p < tl.where(m, p, 0)
            tokens = tokens + ((read(p_x + i_0 * s_xl + j * s_xl, o_p, m_p, SINGLE, 0.),
                                read(p_dt + i_0 * s_tl + j * s_tl, o_p, m_p, SINGLE, -float("inf")),
                                read_pairs(p_B + i_0 * s_Bl + j * s_Bl, o_2, m, n, WORDS)),)
        return tokens

    @triton.jit
    def s6_outputs(p_C, p_z, p_dy, i_0, l, o_p, o_2, s_Cl: tl.constexpr, s_zl: tl.constexpr, s_yl: tl.constexpr, p: tl.constexpr, n: tl.constexpr,
                   C: tl.constexpr, Z: tl.constexpr, DY: tl.constexpr, WORDS: tl.constexpr, SINGLE: tl.constexpr, T: tl.constexpr):
        """C, z, dy of T tokens from i_0 on, as far as asked for; any value stands in for the others."""
        tokens = ()
        for j in tl.static_range(T):
            m = (i_0 + j >= 0) & (i_0 + j < l)
            m_p = o_p < tl.where(m, p, 0)
            b_C = read_pairs(p_C + i_0 * s_Cl + j * s_Cl, o_2, m, n, WORDS) if C else (o_p,)
            b_z = read(p_z + i_0 * s_zl + j * s_zl, o_p, m_p, SINGLE, 0.) if Z else o_p
            b_dy = read(p_dy + i_0 * s_yl + j * s_yl, o_p, m_p, SINGLE, 0.) if DY else o_p
            tokens = tokens + ((b_C, b_z, b_dy),)
        return tokens

    @triton.jit
    def s6_step(b_h0, b_h1, token, b_A0, b_A1, b_bias, o_p, WORDS: tl.constexpr, SINGLE: tl.constexpr):
        """h ← exp(Δ A) ∘ h + (Δ x) ⊗ B, the even and the odd columns of n apart. Returns both, x and Δ."""
        b_x, b_delta = number(token[0], o_p, SINGLE), softplus(number(token[1], o_p, SINGLE) + b_bias)
        b_u = (b_delta * b_x)[:, None]
        b_B0, b_B1 = pairs(token[2], WORDS)
        b_h0 = tl.exp2(b_delta[:, None] * b_A0) * b_h0 + b_u * b_B0
        b_h1 = tl.exp2(b_delta[:, None] * b_A1) * b_h1 + b_u * b_B1
        return b_h0, b_h1, b_x, b_delta

    @triton.jit
    def read_state(p, o, m, N2: tl.constexpr):
        return tl.load(p + o, mask=m, other=0.), tl.load(p + o + N2, mask=m, other=0.)

    @triton.jit
    def store_state(p, o, b_0, b_1, m, N2: tl.constexpr):
        tl.store(p + o, b_0, mask=m)
        tl.store(p + o + N2, b_1, mask=m)

    @triton.jit(do_not_specialize=SEGMENTS)
    def s6_walk_kernel(p_x, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_h0, p_y, p_h, p_S, p_total, l, c, s, s_xb, s_tb, s_Bb, s_Cb, s_zb,
                       s_xl: tl.constexpr, s_xh: tl.constexpr, s_tl: tl.constexpr, s_th: tl.constexpr, s_Bl: tl.constexpr, s_Bh: tl.constexpr,
                       s_Cl: tl.constexpr, s_Ch: tl.constexpr, s_zl: tl.constexpr, s_zh: tl.constexpr,
                       h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                       LEAVE: tl.constexpr, ADJOINT: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
                       WORDS: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba, one block of channels of one head through one segment of s tokens. What it leaves:

            "y"        the output and, in h, the state at the segment's end, from the state in h0 at its start
            "states"   these and S (b, l/T, h, p, n), the state before every T-th token
            "end"      in h what the segment adds to its end on its own, and in total ΣΔ (b, c, h, p)

        The ADJOINT of "end" walks backwards, x being dy and B being C: h is what the outputs add to the adjoint of the start.
        The inputs of T tokens are asked for together, while the T before them are worked on: with two warps a scheduler it is
        the memory's latency that would bound the walk."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        N2: tl.constexpr = (n + 1) // 2
        o_p, o_n = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN // 2)
        m_p, o_2 = o_p < p, tl.zeros_like(o_p)[:, None] + o_n[None, :]
        o_pn, m_pn = o_p[:, None] * (2 * N2) + o_n[None, :], m_p[:, None] & (o_n < N2)[None, :]
        b_A0, b_A1 = read_state(p_A + i_h * p * (2 * N2), o_pn, m_pn, N2)
        b_A0, b_A1, b_h0, b_h1 = b_A0 * LOG2E, b_A1 * LOG2E, tl.zeros((BP, BN // 2), tl.float32), tl.zeros((BP, BN // 2), tl.float32)
        if LEAVE != "end":
            b_h0, b_h1 = read_state(p_h0 + i_bch * p * (2 * N2), o_pn, m_pn, N2)
        b_D = tl.load(p_D + i_h * p + o_p, mask=m_p, other=0.) if SKIP else tl.zeros((BP,), tl.float32)
        b_bias = tl.load(p_bias + i_h * p + o_p, mask=m_p, other=0.) if BIAS else tl.zeros((BP,), tl.float32)
        b_total = tl.zeros((BP,), tl.float32)
        p_x += i_b * s_xb + i_h // rx * s_xh
        p_dt += i_b * s_tb + i_h * s_th
        p_B += i_b * s_Bb + i_h // rb * s_Bh
        p_C += i_b * s_Cb + i_h * s_Ch
        p_z += i_b * s_zb + i_h * s_zh
        p_y += i_b * l * h * p + i_h * p
        Y: tl.constexpr = LEAVE != "end"
        Z: tl.constexpr = GATE and (Y or ADJOINT)
        i_0 = i_c * s + (s - T if ADJOINT else 0)
        ahead = s6_inputs(p_x, p_dt, p_B, i_0, l, o_p, o_2, s_xl, s_tl, s_Bl, p, n, WORDS, False, T)
        more = s6_outputs(p_C, p_z, p_z, i_0, l, o_p, o_2, s_Cl, s_zl, 0, p, n, Y, Z, False, WORDS, False, T)
        blocks = s // T
        if LEAVE == "end":  # no segment starts where the last one ends
            blocks = tl.where(i_c == (0 if ADJOINT else c - 1), 0, blocks)
        for _ in range(blocks):
            inputs, outputs, i_1 = ahead, more, i_0 - T if ADJOINT else i_0 + T
            ahead = s6_inputs(p_x, p_dt, p_B, i_1, l, o_p, o_2, s_xl, s_tl, s_Bl, p, n, WORDS, False, T)
            more = s6_outputs(p_C, p_z, p_z, i_1, l, o_p, o_2, s_Cl, s_zl, 0, p, n, Y, Z, False, WORDS, False, T)
            if LEAVE == "states":
                m_S = m_pn & (o_pn < tl.where(i_0 < l, p * 2 * N2, 0))
                store_state(p_S + ((i_b * tl.cdiv(l, T) + i_0 // T) * h + i_h) * p * (2 * N2), o_pn, b_h0, b_h1, m_S, N2)
            for j in tl.static_range(T - 1 if ADJOINT else 0, -1 if ADJOINT else T, -1 if ADJOINT else 1):
                if ADJOINT:
                    b_x, b_delta = number(inputs[j][0], o_p, False), softplus(number(inputs[j][1], o_p, False) + b_bias)
                    b_B0, b_B1 = pairs(inputs[j][2], WORDS)
                    if GATE:
                        b_x *= silu(number(outputs[j][1], o_p, False))
                    b_h0 = tl.exp2(b_delta[:, None] * b_A0) * (b_h0 + b_x[:, None] * b_B0)
                    b_h1 = tl.exp2(b_delta[:, None] * b_A1) * (b_h1 + b_x[:, None] * b_B1)
                else:
                    b_h0, b_h1, b_x, b_delta = s6_step(b_h0, b_h1, inputs[j], b_A0, b_A1, b_bias, o_p, WORDS, False)
                if Y:
                    b_C0, b_C1 = pairs(outputs[j][0], WORDS)
                    b_y = tl.sum(b_h0 * b_C0 + b_h1 * b_C1, axis=1) + b_D * b_x
                    if GATE:
                        b_y *= silu(number(outputs[j][1], o_p, False))
                    tl.store(p_y + i_0 * (h * p) + j * (h * p) + o_p, b_y, mask=o_p < tl.where(i_0 + j < l, p, 0))
                else:
                    b_total += b_delta
            i_0 = i_1
        store_state(p_h + i_bch * p * (2 * N2), o_pn, b_h0, b_h1, m_pn, N2)
        if LEAVE == "end":
            tl.store(p_total + i_bch * p + o_p, b_total, mask=m_p)

    @triton.jit
    def partner(b, i: tl.constexpr):
        """b (R, W) with row r in the place of row r ^ 2^i: as whole numbers (b_r + b_partner) - b_r, which compiles to one shuffle."""
        b_pairs = tl.reshape(b.to(tl.int32, bitcast=True), (b.shape[0] >> (i + 1), 2, 1 << i, b.shape[1]))
        b_pairs = tl.sum(b_pairs, axis=1, keep_dims=True).to(tl.int32) - b_pairs
        return tl.reshape(b_pairs, (b.shape[0], b.shape[1])).to(tl.float32, bitcast=True)

    @triton.jit
    def store_sum(p_out, b_0, b_1, m, n: tl.constexpr):
        """The sum over the rows of b_0 and b_1 (R, W), the even and the odd columns of (R, n), to p_out (n,). In every step two rows that
        differ in bit i of their number share their columns out, each adding up half of them: a thread with 8 numbers of 16 rows sends
        4 + 2 + 1 + 1 = 8 of them, not 8 log 16 = 32."""
        R: tl.constexpr = b_0.shape[0]
        W: tl.constexpr = b_0.shape[1]
        o_r, o = tl.arange(0, R)[:, None], tl.arange(0, W)[None, :] + tl.zeros((R, W), tl.int32)
        o_0, o_1, m_r = 2 * o, 2 * o + 1, o_r >= 0
        for i in tl.static_range(8):  # R ≤ 2^8
            if 1 << i < R:
                m_i = (o_r >> i) % 2 == 1
                if i > 0:
                    if b.shape[1] > 2:  # two columns lie in two threads: nothing to share out, both rows keep the sum and one stores it
                        b_0, b_1 = tl.split(tl.reshape(b, (R, b.shape[1] // 2, 2)))
                        o_0, o_1 = tl.split(tl.reshape(o, (R, o.shape[1] // 2, 2)))
                    else:
                        b_0, b_1, o_0, o_1, m_r = b, b, o, o, m_r & (m_i == 0)
                b, o = tl.where(m_i, b_1, b_0) + partner(tl.where(m_i, b_0, b_1), i), tl.where(m_i, o_1, o_0)
        if R == 1:
            tl.store(p_out + o_0, b_0, mask=o_0 < tl.where(m, n, 0))
            tl.store(p_out + o_1, b_1, mask=o_1 < tl.where(m, n, 0))
        else:
            tl.store(p_out + o, b, mask=m_r & (o < tl.where(m, n, 0)))

    @triton.jit(do_not_specialize=["b"] + SEGMENTS)
    def s6_backward_kernel(p_x, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_dy, p_dh, p_S, p_dx, p_ddt, p_dA, p_dB, p_dC, p_dD, p_dz, p_dbias, p_dh0,
                           b, l, c, s, s_xb, s_tb, s_Bb, s_Cb, s_zb, s_yb,
                           s_xl: tl.constexpr, s_xh: tl.constexpr, s_tl: tl.constexpr, s_th: tl.constexpr, s_Bl: tl.constexpr, s_Bh: tl.constexpr,
                           s_Cl: tl.constexpr, s_Ch: tl.constexpr, s_zl: tl.constexpr, s_zh: tl.constexpr, s_yl: tl.constexpr, s_yh: tl.constexpr,
                           h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                           SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, WORDS: tl.constexpr,
                           T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba, one block of channels of one head from the last token of a segment to its first, b_g the adjoint of the state.
        K = T / 2 tokens at a time: the states between them are computed again from S, held in registers, and taken backwards.
        Left to the caller: the sums of dB, dC (⌈p/BP⌉, b, l, h, n) over blocks of channels, of dx (b, l, h, p) and dB over a group,
        and of dA (b, c, h, p, n), dD and dbias (b, c, h, p) over batch and segments."""
        i_bch, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        N2: tl.constexpr = (n + 1) // 2
        K: tl.constexpr = T // 2
        o_p, o_n = i_p * BP + tl.arange(0, BP), tl.arange(0, BN // 2)
        m_p, o_2 = o_p < p, tl.zeros_like(o_p)[:, None] + o_n[None, :]
        o_pn, m_pn = o_p[:, None] * (2 * N2) + o_n[None, :], m_p[:, None] & (o_n < N2)[None, :]
        b_A0, b_A1 = read_state(p_A + i_h * p * (2 * N2), o_pn, m_pn, N2)
        b_g0, b_g1 = read_state(p_dh + i_bch * p * (2 * N2), o_pn, m_pn, N2)
        b_A0, b_A1, b_dA0, b_dA1 = b_A0 * LOG2E, b_A1 * LOG2E, tl.zeros((BP, BN // 2), tl.float32), tl.zeros((BP, BN // 2), tl.float32)
        b_D = tl.load(p_D + i_h * p + o_p, mask=m_p, other=0.) if SKIP else tl.zeros((BP,), tl.float32)
        b_bias = tl.load(p_bias + i_h * p + o_p, mask=m_p, other=0.) if BIAS else tl.zeros((BP,), tl.float32)
        b_dD, b_dbias = tl.zeros((BP,), tl.float32), tl.zeros((BP,), tl.float32)
        p_x += i_b * s_xb + i_h // rx * s_xh
        p_dt += i_b * s_tb + i_h * s_th
        p_B += i_b * s_Bb + i_h // rb * s_Bh
        p_C += i_b * s_Cb + i_h * s_Ch
        p_z += i_b * s_zb + i_h * s_zh
        p_dy += i_b * s_yb + i_h * s_yh
        p_S += (i_b * tl.cdiv(l, T) * h + i_h) * p * (2 * N2)
        o_y, o_bc = i_b * l * h * p + i_h * p + o_p, (i_p * b + i_b) * l * h * n + i_h * n
        i_0 = i_c * s + s - K
        ahead = s6_inputs(p_x, p_dt, p_B, i_0, l, o_p, o_2, s_xl, s_tl, s_Bl, p, n, WORDS, WORDS, K)
        state = read_state(p_S + i_0 // T * (h * p * 2 * N2), o_pn, m_pn & (o_pn < tl.where(i_0 // T * T < l, p * 2 * N2, 0)), N2)
        for _ in range(s // K):
            b_h0, b_h1 = state
            inputs, i_1 = ahead, tl.maximum(i_0 - K, 0)  # at the start of the sequence the first K tokens again
            ahead = s6_inputs(p_x, p_dt, p_B, i_1, l, o_p, o_2, s_xl, s_tl, s_Bl, p, n, WORDS, WORDS, K)
            state = read_state(p_S + i_1 // T * (h * p * 2 * N2), o_pn, m_pn & (o_pn < tl.where(i_1 // T * T < l, p * 2 * N2, 0)), N2)
            # (not a turn ahead: the registers are full)
            outputs = s6_outputs(p_C, p_z, p_dy, i_0, l, o_p, o_2, s_Cl, s_zl, s_yl, p, n, True, GATE, True, WORDS, WORDS, K)
            if i_0 % T > 0:  # S is the state K tokens earlier, and those are next
                for j in tl.static_range(K):
                    b_h0, b_h1, b_x, b_delta = s6_step(b_h0, b_h1, ahead[j], b_A0, b_A1, b_bias, o_p, WORDS, WORDS)
            states, deltas = (), ()  # states[j] is h before token j
            for j in tl.static_range(K):
                states = states + ((b_h0, b_h1),)
                b_h0, b_h1, b_x, b_delta = s6_step(b_h0, b_h1, inputs[j], b_A0, b_A1, b_bias, o_p, WORDS, WORDS)
                deltas = deltas + (b_delta,)
            for j in tl.static_range(K - 1, -1, -1):
                b_x, b_dy, b_delta = number(inputs[j][0], o_p, WORDS), number(outputs[j][2], o_p, WORDS), deltas[j]
                b_B0, b_B1 = pairs(inputs[j][2], WORDS)
                b_C0, b_C1 = pairs(outputs[j][0], WORDS)
                m, o_bct = i_0 + j < l, o_bc + i_0 * (h * n) + j * (h * n)
                o_yt, m_pt = o_y + i_0 * (h * p) + j * (h * p), o_p < tl.where(m, p, 0)
                if GATE:
                    b_z, b_y = number(outputs[j][1], o_p, WORDS), tl.sum(b_h0 * b_C0 + b_h1 * b_C1, axis=1) + b_D * b_x
                    tl.store(p_dz + o_yt, b_dy * b_y * silu_slope(b_z), mask=m_pt)
                    b_dy *= silu(b_z)
                b_u = (b_delta * b_x)[:, None]
                b_g0 += b_dy[:, None] * b_C0
                b_g1 += b_dy[:, None] * b_C1
                b_gB = tl.sum(b_g0 * b_B0 + b_g1 * b_B1, axis=1)    # adjoint of the written value Δ x
                store_sum(p_dB + o_bct, b_g0 * b_u, b_g1 * b_u, m, n)
                store_sum(p_dC + o_bct, b_h0 * b_dy[:, None], b_h1 * b_dy[:, None], m, n)
                b_h0, b_h1 = states[j]
                b_g0 *= tl.exp2(b_delta[:, None] * b_A0)
                b_g1 *= tl.exp2(b_delta[:, None] * b_A1)
                b_a0, b_a1 = b_g0 * b_h0, b_g1 * b_h1               # adjoint of the exponent Δ A
                b_dA0 += b_a0 * b_delta[:, None]
                b_dA1 += b_a1 * b_delta[:, None]
                b_dD += b_dy * b_x
                b_ddt = (b_gB * b_x + tl.sum(b_a0 * b_A0 + b_a1 * b_A1, axis=1) / LOG2E) * sigmoid(number(inputs[j][1], o_p, WORDS) + b_bias)
                b_dbias += b_ddt
                tl.store(p_dx + o_yt, b_gB * b_delta + b_dy * b_D, mask=m_pt)
                tl.store(p_ddt + o_yt, b_ddt, mask=m_pt)
            i_0 = i_1
        store_state(p_dh0 + i_bch * p * (2 * N2), o_pn, b_g0, b_g1, m_pn, N2)
        store_state(p_dA + i_bch * p * (2 * N2), o_pn, b_dA0, b_dA1, m_pn, N2)
        tl.store(p_dD + i_bch * p + o_p, b_dD, mask=m_p)
        tl.store(p_dbias + i_bch * p + o_p, b_dbias, mask=m_p)

    @triton.jit
    def tile(p, s_row, o_row, o_col, n_row, n_col, DOT: tl.constexpr):
        """Load a tile in the type the dots take, zero from row n_row and column n_col on."""
        m = (o_row < n_row)[:, None] & (o_col < n_col)[None, :]
        return tl.load(p + o_row[:, None] * s_row + o_col[None, :], mask=m, other=0.).to(DOT)

    @triton.jit(do_not_specialize=SEGMENTS)
    def ssd_walk_kernel(p_u, p_delta, p_s, p_v, p_C, p_D, p_h0, p_y, p_h, p_S, p_total, l, c, s, s_ub, s_vb, s_Cb,
                        s_ul: tl.constexpr, s_uh: tl.constexpr, s_vl: tl.constexpr, s_vh: tl.constexpr,
                        s_Cl: tl.constexpr, s_Ch: tl.constexpr, h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                        LEAVE: tl.constexpr, ADJOINT: tl.constexpr, SKIP: tl.constexpr,
                        DOT: tl.constexpr, PREC: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba-2, one block of channels of one head through one segment of s tokens, tile after tile of T, the state (n, p):

            h ← decay over the tile · h + Σ_t w_t v_t ⊗ u_t       u = x, v = B, w = Δ × the decay from t to the tile's end
            y = (decay ∘ C Bᵀ) (Δ x) + decay since the tile's start ∘ C h

        Leaves "y" (y and, in h, the end state), "states" (h and S (b, ⌈l/T⌉, h, n, p), the state before every tile; no y) or the
        "end" (h and total, from no state). h0 and h lie as (p, n), S as (n, p). The ADJOINT walks from the last tile to the first
        with u = dy, v = C, w = the decay from the tile's start to t."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_i, o_p, o_n = tl.arange(0, T), tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
        m_np, o_np = (o_n < n)[:, None] & (o_p < p)[None, :], o_p[None, :] * n + o_n[:, None]
        b_h = tl.zeros((BN, BP), tl.float32) if LEAVE == "end" else tl.load(p_h0 + i_bch * p * n + o_np, mask=m_np, other=0.)
        b_D = tl.load(p_D + i_h) if SKIP else 0.
        b_total = 0.
        p_u += i_b * s_ub + i_h // rx * s_uh
        p_v += i_b * s_vb + i_h // rb * s_vh
        p_C += i_b * s_Cb + i_h * s_Ch
        for k in range(s // T):
            i_0 = i_c * s + (s - T - k * T if ADJOINT else k * T)
            b_u = tile(p_u + i_0 * s_ul, s_ul, o_i, o_p, l - i_0, p, DOT)               # (T, p)
            b_v = tl.trans(tile(p_v + i_0 * s_vl, s_vl, o_i, o_n, l - i_0, n, DOT))     # (n, T)
            o_s = (i_b * c * s + i_0) * h + i_h
            b_delta, b_s, b_end = tl.load(p_delta + o_s + o_i * h), tl.load(p_s + o_s + o_i * h), tl.load(p_s + o_s + (T - 1) * h)
            b_since = tl.exp2(b_s.to(tl.float32))
            if LEAVE == "y":
                b_C = tile(p_C + i_0 * s_Cl, s_Cl, o_i, o_n, l - i_0, n, DOT)                           # (T, n)
                b_scores = tl.dot(b_C, b_v, input_precision=PREC)                                       # (T, T)
                b_y = tl.dot(b_C, b_h.to(DOT), input_precision=PREC) * b_since[:, None]                 # (T, p)
                b_decay = tl.exp2(tl.where(o_i[:, None] >= o_i[None, :], b_s[:, None] - b_s[None, :], -float("inf")).to(tl.float32))
                b_y += tl.dot((b_scores * b_decay * b_delta[None, :]).to(DOT), b_u, input_precision=PREC)
                b_y += b_D * b_u.to(tl.float32)
                m_tp = (i_0 + o_i < l)[:, None] & (o_p < p)[None, :]
                tl.store(p_y + ((i_b * l + i_0) * h + i_h) * p + o_i[:, None] * (h * p) + o_p[None, :], b_y, mask=m_tp)
            if LEAVE == "states":
                o_S = ((i_b * tl.cdiv(l, T) + i_0 // T) * h + i_h) * p * n
                tl.store(p_S + o_S + o_n[:, None] * p + o_p[None, :], b_h, mask=(o_n < tl.where(i_0 < l, n, 0))[:, None] & (o_p < p)[None, :])
            if LEAVE == "end":
                b_total += tl.sum(b_delta, axis=0)
            b_w = b_since if ADJOINT else tl.exp2((b_end - b_s).to(tl.float32)) * b_delta
            b_h = b_h * tl.exp2(b_end.to(tl.float32)) + tl.dot(b_v, (b_u.to(tl.float32) * b_w[:, None]).to(DOT), input_precision=PREC)
        tl.store(p_h + i_bch * p * n + o_np, b_h, mask=m_np)
        if LEAVE == "end":
            tl.store(p_total + i_bch, b_total)

    @triton.jit(do_not_specialize=["l", "tokens"])
    def ssd_backward_kernel(p_x, p_delta, p_s, p_A, p_B, p_C, p_D, p_dy, p_S, p_G, p_dx, p_ddt, p_dA, p_dB, p_dC, p_dD,
                            l, tokens, s_xb, s_Bb, s_Cb, s_yb,
                            s_xl: tl.constexpr, s_xh: tl.constexpr, s_Bl: tl.constexpr, s_Bh: tl.constexpr,
                            s_Cl: tl.constexpr, s_Ch: tl.constexpr, s_yl: tl.constexpr, s_yh: tl.constexpr,
                            h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                            SKIP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
                            T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba-2, the gradients of one tile of one head: from S, the state at its start, and G, the adjoint of the state at its end.
        t is the reader (C, dy), r the writer (x, B); c is the number of tiles. With a decay b_rt[r, t] = b_tr[t, r] from r to t:

            dC_t = since_t S dy_t + Σ_r decay Δ_r (dy_t·x_r) B_r            b_yx  what of it comes from inside the tile, (t, r)
            dB_r = Δ_r (after_r G x_r + Σ_t decay (dy_t·x_r) C_t)           b_xy  the same seen from the writer, (r, t)
            d(Δx)_r = after_r G B_r + Σ_t decay (C_t·B_r) dy_t              b_BC  (r, t);   b_ux and b_give: its product with x_r

        The adjoint of a_t = Δ_t A collects every product whose decay spans token t: b_ds, per token what it reads minus what it writes
        inside the tile, summed from the tile's end back to t; b_before, what writers before t give (b_give) to the tile's end; and
        b_hold = <S, G>, what crosses the whole tile. Readers and writers each get products of their own, because Triton 3.4 to 3.7 on
        Hopper miscompiles a dot that takes a dot's result transposed."""
        i_bch = tl.program_id(0).to(tl.int64)
        c = tl.cdiv(l, T)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_i, i_0 = tl.arange(0, T), i_c * T
        l -= i_0  # what is left of the sequence
        b_D = tl.load(p_D + i_h) if SKIP else 0.
        p_x += i_b * s_xb + i_0 * s_xl + i_h // rx * s_xh
        p_B += i_b * s_Bb + i_0 * s_Bl + i_h // rb * s_Bh
        p_C += i_b * s_Cb + i_0 * s_Cl + i_h * s_Ch
        p_dy += i_b * s_yb + i_0 * s_yl + i_h * s_yh
        o_0 = (i_b * (l + i_0) + i_0) * h + i_h  # of what is written: (b, l, h)
        p_S += i_bch * p * n
        p_G += i_bch * p * n

        o_s = (i_b * tokens + i_0) * h + i_h
        b_delta, b_s, b_end = tl.load(p_delta + o_s + o_i * h), tl.load(p_s + o_s + o_i * h), tl.load(p_s + o_s + (T - 1) * h)
        b_since, b_after = tl.exp2(b_s.to(tl.float32)), tl.exp2((b_end - b_s).to(tl.float32))

        b_BC, b_xy, b_yx = tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32)
        for i_n in range(0, n, BN):
            o_n = i_n + tl.arange(0, BN)
            b_BC = tl.dot(tile(p_B, s_Bl, o_i, o_n, l, n, DOT), tl.trans(tile(p_C, s_Cl, o_i, o_n, l, n, DOT)), b_BC, input_precision=PREC)
        for i_p in range(0, p, BP):
            o_p = i_p + tl.arange(0, BP)
            b_x, b_dy = tile(p_x, s_xl, o_i, o_p, l, p, DOT), tile(p_dy, s_yl, o_i, o_p, l, p, DOT)
            b_xy = tl.dot(b_x, tl.trans(b_dy), b_xy, input_precision=PREC)
            b_yx = tl.dot(b_dy, tl.trans(b_x), b_yx, input_precision=PREC)
        b_rt = tl.exp2(tl.where(o_i[:, None] <= o_i[None, :], b_s[None, :] - b_s[:, None], -float("inf")).to(tl.float32))
        b_tr = tl.exp2(tl.where(o_i[:, None] >= o_i[None, :], b_s[:, None] - b_s[None, :], -float("inf")).to(tl.float32))
        b_BC *= b_rt
        b_ux, b_dD = tl.sum(b_BC * b_xy, axis=1), tl.sum(tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_xy, 0.), axis=1), axis=0)
        b_pair = tl.where(o_i[:, None] < o_i[None, :], b_BC * b_xy, 0.) * b_delta[:, None]
        b_ds = tl.sum(b_pair, axis=0) - tl.sum(b_pair, axis=1)
        b_BC, b_xy, b_yx = b_BC.to(DOT), (b_xy * b_rt * b_delta[:, None]).to(DOT), (b_yx * b_tr * b_delta[None, :]).to(DOT)

        b_give, b_hold = tl.zeros((T,), tl.float32), 0.
        for i_n in range(0, n, BN):
            o_n = i_n + tl.arange(0, BN)
            b_C, b_B = tile(p_C, s_Cl, o_i, o_n, l, n, DOT), tile(p_B, s_Bl, o_i, o_n, l, n, DOT)
            m_tn, o_tn = (o_i < l)[:, None] & (o_n < n)[None, :], o_0 * n + o_i[:, None] * (h * n) + o_n[None, :]
            b_dC, b_dB = tl.zeros((T, BN), tl.float32), tl.zeros((T, BN), tl.float32)
            for i_p in range(0, p, BP):
                o_p = i_p + tl.arange(0, BP)
                b_S, b_G = tile(p_S, p, o_n, o_p, n, p, DOT), tile(p_G, p, o_n, o_p, n, p, DOT)
                b_dB = tl.dot(tile(p_x, s_xl, o_i, o_p, l, p, DOT), tl.trans(b_G), b_dB, input_precision=PREC)
                b_dC = tl.dot(tile(p_dy, s_yl, o_i, o_p, l, p, DOT), tl.trans(b_S), b_dC, input_precision=PREC)
                b_hold += tl.sum(tl.sum(b_S.to(tl.float32) * b_G.to(tl.float32), axis=1), axis=0)
            b_dB *= b_after[:, None]
            b_dC *= b_since[:, None]
            b_give += tl.sum(b_dB * b_B.to(tl.float32), axis=1)
            b_ds += tl.sum(b_dC * b_C.to(tl.float32), axis=1)
            tl.store(p_dB + o_tn, tl.dot(b_xy, b_C, b_dB * b_delta[:, None], input_precision=PREC), mask=m_tn)
            tl.store(p_dC + o_tn, tl.dot(b_yx, b_B, b_dC, input_precision=PREC), mask=m_tn)
        for i_p in range(0, p, BP):
            o_p = i_p + tl.arange(0, BP)
            b_dy = tile(p_dy, s_yl, o_i, o_p, l, p, DOT)
            b_du = tl.zeros((T, BP), tl.float32)
            for i_n in range(0, n, BN):
                o_n = i_n + tl.arange(0, BN)
                b_du = tl.dot(tile(p_B, s_Bl, o_i, o_n, l, n, DOT), tile(p_G, p, o_n, o_p, n, p, DOT), b_du, input_precision=PREC)
            b_du = tl.dot(b_BC, b_dy, b_du * b_after[:, None], input_precision=PREC) * b_delta[:, None]
            if SKIP:
                b_du += b_D * b_dy.to(tl.float32)
            tl.store(p_dx + o_0 * p + o_i[:, None] * (h * p) + o_p[None, :], b_du, mask=(o_i < l)[:, None] & (o_p < p)[None, :])
        b_before = tl.sum(tl.where(o_i[None, :] < o_i[:, None], (b_give * b_delta)[None, :], 0.), axis=1)
        b_da = tl.cumsum(b_ds, axis=0, reverse=True) + b_before + b_hold * tl.exp2(b_end.to(tl.float32))
        b_ddt = (b_ux + b_give + b_da * tl.load(p_A + i_h)) * slope(b_delta)
        tl.store(p_ddt + o_0 + o_i * h, b_ddt, mask=o_i < l)
        tl.store(p_dA + i_bch, tl.sum(b_da * b_delta, axis=0))
        tl.store(p_dD + i_bch, b_dD)

    @triton.jit
    def conv_block(p_w, p_bias, s_xh: tl.constexpr, g: tl.constexpr, p: tl.constexpr, r: tl.constexpr,
                   BIAS: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BP: tl.constexpr):
        """What a program works on: a segment, and of x's g·p channels BP side by side, whatever p is, with the r query heads that
        share them. Offsets (R, BP) in a token of x, of a contiguous x and of y, their mask o < g·p and row < r; bias and weights."""
        blocks: tl.constexpr = (g * p + BP - 1) // BP
        o, i_r = tl.program_id(0) % blocks * BP + tl.arange(0, BP)[None, :], tl.arange(0, R)[:, None]
        o_y, m = (o // p * r + i_r) * p + o % p, (o < g * p) & (i_r < r)
        b_bias, ws = tl.load(p_bias + o_y, mask=m, other=0.).to(tl.float32) if BIAS else tl.zeros((R, BP), tl.float32), ()
        for k in tl.static_range(W):
            ws = ws + (tl.load(p_w + o_y * W + k, mask=m, other=0.).to(tl.float32),)
        return tl.program_id(0) // blocks, (o // p).to(tl.int64) * s_xh + o % p + 0 * i_r, o + 0 * i_r, o_y, o < g * p, i_r, b_bias, ws

    @triton.jit
    def conv_read(p_x, o_x, m_o, i_r, r: tl.constexpr, s_xl: tl.constexpr, i_0, first, end, N: tl.constexpr):
        """A tuple of the N tokens from i_0 on, where p_x points; zeros before `first` and from `end` on."""
        xs = ()
        for j in tl.static_range(N):
            m = m_o & (i_r < tl.where((i_0 + j >= first) & (i_0 + j < end), r, 0))
            xs = xs + (tl.load(p_x + j * s_xl + o_x, mask=m, other=0.).to(tl.float32),)
        return xs

    @triton.jit
    def conv_sum(xs, j: tl.constexpr, ws, b_bias, W: tl.constexpr):
        """bias + Σ_k weight_k xs_{j+k}."""
        for k in tl.static_range(W):
            b_bias += ws[k] * xs[j + k]
        return b_bias

    @triton.jit(do_not_specialize=SEGMENTS + ["skip"])
    def conv_kernel(p_x, p_w, p_bias, p_y, l, skip, c, s, s_xb, s_xl: tl.constexpr, s_xh: tl.constexpr, g: tl.constexpr, p: tl.constexpr,
                    r: tl.constexpr, BIAS: tl.constexpr, W: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BP: tl.constexpr):
        """y_t = silu(bias + Σ_k weight_k x_{t-W+1+k}) for all l tokens of x but the first `skip`: one block of channels along a
        segment of s tokens, U at a time, the W - 1 inputs before them in registers."""
        i_bc, o_x, _, o_y, m_o, i_r, b_bias, ws = conv_block(p_w, p_bias, s_xh, g, p, r, BIAS, W, R, BP)
        h, i_b, i_0 = g * r, (i_bc // c).to(tl.int64), i_bc % c * s + skip
        p_x, p_y = p_x + i_b * s_xb + i_0.to(tl.int64) * s_xl, p_y + (i_b * (l - skip) + i_0 - skip) * (h * p)
        xs = conv_read(p_x - (W - 1) * s_xl, o_x, m_o, i_r, r, s_xl, i_0 - (W - 1), 0, l, W - 1)
        for _ in range(tl.cdiv(tl.minimum(s, l - i_0), U)):
            xs = xs + conv_read(p_x, o_x, m_o, i_r, r, s_xl, i_0, 0, l, U)
            for j in tl.static_range(U):
                tl.store(p_y + j * (h * p) + o_y, silu(conv_sum(xs, j, ws, b_bias, W)), mask=m_o & (i_r < tl.where(i_0 + j < l, r, 0)))
            xs, i_0, p_x, p_y = xs[U:], i_0 + U, p_x + U * s_xl, p_y + U * (h * p)

    @triton.jit(do_not_specialize=SEGMENTS + ["skip"])
    def conv_backward_kernel(p_x, p_w, p_bias, p_dy, p_dx, p_dw, l, skip, c, s, s_xb, s_xl: tl.constexpr, s_xh: tl.constexpr,
                             g: tl.constexpr, p: tl.constexpr, r: tl.constexpr,
                             BIAS: tl.constexpr, W: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BP: tl.constexpr):
        """With e_t = dy_t silu'(bias + Σ_k weight_k x_{t-W+1+k}), 0 where there is no y_t:  dx_t = Σ_k weight_k e_{t+W-1-k}, summed
        over the r query heads; dw_k = Σ_t x_t e_{t+W-1-k} and dbias = Σ_t e_t, left per segment in dw (b, c, W + 1, h, p).
        For token t the W inputs and the W values of e from t on are in registers."""
        i_bc, o_x, o, o_y, m_o, i_r, b_bias, ws = conv_block(p_w, p_bias, s_xh, g, p, r, BIAS, W, R, BP)
        h, i_b, i_0 = g * r, (i_bc // c).to(tl.int64), i_bc % c * s
        p_x, p_dx = p_x + i_b * s_xb + i_0.to(tl.int64) * s_xl, p_dx + (i_b * l + i_0) * (g * p)
        p_dy += (i_b * (l - skip) + i_0 - skip) * (h * p)
        xs = conv_read(p_x - (W - 1) * s_xl, o_x, m_o, i_r, r, s_xl, i_0 - (W - 1), 0, l, 2 * (W - 1))
        dys = conv_read(p_dy, o_y, m_o, i_r, r, h * p, i_0, skip, l, W - 1)
        es, dws = (), ()
        for j in tl.static_range(W - 1):
            es = es + (dys[j] * silu_slope(conv_sum(xs, j, ws, b_bias, W)),)
        for _ in tl.static_range(W + 1):
            dws = dws + (tl.zeros((R, BP), tl.float32),)
        xs = xs[W - 1:]
        for _ in range(tl.cdiv(tl.minimum(s, l - i_0), U)):
            xs = xs + conv_read(p_x + (W - 1) * s_xl, o_x, m_o, i_r, r, s_xl, i_0 + W - 1, 0, l, U)
            more = conv_read(p_dy + (W - 1) * (h * p), o_y, m_o, i_r, r, h * p, i_0 + W - 1, skip, l, U)
            for j in tl.static_range(U):
                es = es + (more[j] * silu_slope(conv_sum(xs, j, ws, b_bias, W)),)
                b_dx, sums = tl.zeros((R, BP), tl.float32), ()
                for k in tl.static_range(W):
                    b_dx += ws[k] * es[j + W - 1 - k]
                    sums = sums + (dws[k] + xs[j] * es[j + W - 1 - k],)
                dws = sums + (dws[W] + es[j],)
                b_dx = tl.sum(b_dx, axis=0, keep_dims=True) + tl.zeros((R, BP), tl.float32)  # (R, BP) again: a layout that is stored as it is
                tl.store(p_dx + j * (g * p) + o, b_dx, mask=m_o & (i_r < tl.where(i_0 + j < l, 1, 0)))
            xs, es, i_0, p_x, p_dy, p_dx = xs[U:], es[U:], i_0 + U, p_x + U * s_xl, p_dy + U * (h * p), p_dx + U * (g * p)
        for k in tl.static_range(W + 1):
            tl.store(p_dw + (i_bc.to(tl.int64) * (W + 1) + k) * (h * p) + o_y, dws[k], mask=m_o & (i_r < r))

    @triton.jit(do_not_specialize=["l", "c"])
    def norm_kernel(p_y, p_z, p_w, p_o, p_dy, p_dz, p_dw, eps, l, c, s_zb, s_zl: tl.constexpr, s_zh: tl.constexpr, h: tl.constexpr, p: tl.constexpr,
                    GRADIENT: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr):
        """v = y ∘ silu(z) of one head, u = v / √(mean v² + eps), o = weight ∘ u, for T tokens, ROWS at a time. The GRADIENT reads o
        as do: with e = do ∘ weight, dv = (e - u mean(e ∘ u)) / √(mean v² + eps); dweight = Σ do ∘ u is left per T tokens."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_r, o_p = tl.arange(0, ROWS)[:, None], tl.arange(0, BP)[None, :]
        b_w = tl.load(p_w + i_h * p + o_p + 0 * o_r, mask=o_p < p, other=0.).to(tl.float32)  # (ROWS, BP): 16-byte loads
        b_dw = tl.zeros((ROWS, BP), tl.float32)
        for i_0 in range(i_c * T, tl.minimum(i_c * T + T, l), ROWS):
            o_t = (i_0 + o_r).to(tl.int64)
            o_y, m = (i_b * l + o_t) * (h * p) + i_h * p + o_p, (o_t < l) & (o_p < p)
            b_y = tl.load(p_y + o_y, mask=m, other=0.).to(tl.float32)
            b_z = tl.load(p_z + i_b * s_zb + o_t * s_zl + i_h * s_zh + o_p, mask=m, other=0.).to(tl.float32)
            b_v = b_y * silu(b_z)
            b_scale = tl.rsqrt(tl.sum(b_v * b_v, axis=1, keep_dims=True) / p + eps)
            b_u = b_v * b_scale
            if GRADIENT:
                b_do = tl.load(p_o + o_y, mask=m, other=0.).to(tl.float32)
                b_e = b_do * b_w
                b_dv = (b_e - b_u * (tl.sum(b_e * b_u, axis=1, keep_dims=True) / p)) * b_scale
                tl.store(p_dy + o_y, b_dv * silu(b_z), mask=m)
                tl.store(p_dz + o_y, b_dv * b_y * silu_slope(b_z), mask=m)
                b_dw += b_do * b_u
            else:
                tl.store(p_o + o_y, b_w * b_u, mask=m)
        if GRADIENT:
            tl.store(p_dw + i_bch * p + o_p, tl.sum(b_dw, axis=0, keep_dims=True), mask=o_p < p)


# ---------------------------------------------------------------------------------------------------------------
# The launches. Forward and backward of an operation are plain functions of tensors; they are registered with PyTorch as operators of
# their own, so that torch.compile takes each as one node of its graph.

DRY = False  # True while torch.compile asks for shapes alone
LAUNCHES = {}  # the compiled kernel, and the constants behind its arguments, for arguments seen before


def launch(kernel, grid, *args, **meta):
    """kernel[grid](*args, **meta). Triton looks at all of some 40 arguments anew in every call, which takes longer than a small batch
    runs; so the compiled kernel is found again here by all it could depend on: types, alignments, numbers (lengths too, on which it
    does not: a new length asks Triton once more). An argument a launch does not use is any tensor at hand."""
    if DRY:
        return
    key = (kernel.__name__, args[0].get_device(), *[(a.dtype, a.data_ptr() % 16 == 0) if torch.is_tensor(a) else a for a in args], *meta.values())
    if key in LAUNCHES:
        compiled, constants = LAUNCHES[key]
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
    else:
        compiled = kernel[grid](*args, **meta)
        if compiled is not None:  # the interpreter compiles nothing
            LAUNCHES[key] = compiled, [meta[name] for name in kernel.arg_names[len(args):]]


def cdiv(a, b):
    """⌈a / b⌉ (Triton's own takes 7 µs)."""
    return -(-a // b)


def power_of_2(a):
    """The smallest power of 2 that is at least a."""
    return 1 << (a - 1).bit_length()


def rows(t):
    """`t` and its strides over batch, length and head; copied only when its last axis is not contiguous."""
    t = t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()
    return t, t.stride()[:3]


def flat_strides(*tensors):
    """The strides over the batch of every tensor, then those within it, as the kernels take them."""
    strides = [t.stride()[:3] for t in tensors]
    return [s[0] for s in strides] + [k for s in strides for k in s[1:]]


def over_group(t, like):
    """Sum (b, l, h, w) over the query heads that share a kv head, into the shape and type of `like` (b, l, g, w)."""
    g = like.shape[2]
    return (t if t.shape[2] == g else t.unflatten(2, (g, -1)).sum(3)).to(like.dtype)


def join(S, total, A, h0, reverse=False):
    """In place of what each segment adds to the state S (b, c, h, p, n): the state it starts from. Returns the last one."""
    (b, c, h, p, n), end = S.shape, torch.empty_like(h0)
    block = min(256, power_of_2(p * n))
    launch(join_kernel, (b * h, cdiv(p * n, block)), S, total, A, h0, end, c, h, p, n, REVERSE=reverse, MAMBA2=A.dim() == 1, BLOCK=block,
           num_warps=max(1, block // 128))
    return end


def segments(blocks, l, T, most):
    """Into how many segments the walks cut a sequence of l tokens: as many as keep the blocks at or below `most`, which fills a large GPU,
    and at most one per 8 T tokens (with s rounded up to T the last ones can be short or empty)."""
    return max(1, min(most // blocks, l // (8 * T)))


def halves(t):
    """The last axis with its even elements first, then its odd ones, a zero behind them if one is missing: (..., 2 ⌈n/2⌉) float32."""
    t = F.pad(t.float(), (0, 1)) if t.shape[-1] % 2 else t.float()
    return t.unflatten(-1, (-1, 2)).transpose(-1, -2).contiguous().flatten(-2)


def whole(t, n):
    """`halves` undone."""
    return t.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)[..., :n].contiguous()


def s6_setup(x, dt, B, C, z, D, dt_bias, dy=None):
    """The tensors of a launch as the kernels read them, D and the bias, and the kernels' constants. (The interpreter has no bf16 words.)"""
    (h, n), p, BN = C.shape[2:], x.shape[3], max(2, power_of_2(C.shape[3]))
    tensors = [rows(x if t is None else t)[0] for t in (x, dt, B, C, z, dy)]
    words = not INTERPRET and n % 2 == p % 2 == 0 and all(t.dtype == torch.bfloat16 and t.storage_offset() % 2 == 0 and
                                                         all(s % 2 == 0 for s in t.stride()[:3]) for t in tensors)
    BP = min(power_of_2(p), max(1, S6_TILE // BN))
    meta = dict(h=h, p=p, n=n, rx=h // x.shape[2], rb=h // B.shape[2], SKIP=D is not None, GATE=z is not None, BIAS=dt_bias is not None,
                WORDS=words, T=S6_T, BP=BP, BN=BN, num_warps=max(1, BP * BN // 512))
    small = [x if t is None else t.float().contiguous() for t in (D, dt_bias)]
    return tensors, small, meta


def s6_walk(tensors, small, meta, A, c, leave, h0, y, h, S, total, adjoint=False):
    """s6_walk_kernel through c segments: what `leave` asks for, into y, h, S, total (see the kernel). The adjoint reads dy and C."""
    (x, dt, B, C, z, dy), (b, l, heads) = tensors, tensors[3].shape[:3]
    if adjoint:
        x, B, meta = dy, C, dict(meta, rx=1, rb=1)
    s = meta["T"] * cdiv(l, c * meta["T"])
    launch(s6_walk_kernel, (b * c * heads, cdiv(meta["p"], meta["BP"])), x, dt, A, B, C, small[0], z, small[1], h0, y, h, S, total, l, c, s,
           *flat_strides(x, dt, B, C, z), LEAVE=leave, ADJOINT=adjoint, **meta)


def s6_forward(x, dt, A, B, C, D, z, dt_bias, h0, keep):
    """Mamba on the kernels: y, the last state, and for the backward S (empty unless `keep`)."""
    (b, l, h, n), p, A = C.shape, x.shape[3], halves(A)
    tensors, small, meta = s6_setup(x, dt, B, C, z, D, dt_bias)
    c = segments(b * h * cdiv(p, meta["BP"]), l, meta["T"], S6_BLOCKS)
    starts = x.new_zeros(b, 1, h, p, A.shape[-1], dtype=torch.float32) if h0 is None else halves(h0).unsqueeze(1)
    ends = starts.new_empty(b, c, *starts.shape[2:])
    y, S = x.new_empty(b, l, h, p), starts.new_empty(b, cdiv(l, meta["T"]) if keep else 0, *starts.shape[2:])
    if c > 1:
        first, starts, total = starts[:, 0], torch.empty_like(ends), ends.new_empty(b, c, h, p)
        s6_walk(tensors, small, meta, A, c, "end", starts, y, starts, S, total)
        join(starts, total, A, first)
    s6_walk(tensors, small, meta, A, c, "states" if keep else "y", starts, y, ends, S, ends)
    return y, whole(ends[:, -1], n), S


def s6_backward(dy, dh, x, dt, A, B, C, D, z, dt_bias, S):
    """The gradients of x, dt, A, B, C, D, z, dt_bias and h0; empty for a D, z or dt_bias that is not there."""
    (b, l, h, n), p, fA = C.shape, x.shape[3], halves(A)
    tensors, small, meta = s6_setup(x, dt, B, C, z, D, dt_bias, dy)
    c = segments(b * h * cdiv(p, meta["BP"]), l, meta["T"], S6_BLOCKS)
    s, parts, states = meta["T"] * cdiv(l, c * meta["T"]), cdiv(p, meta["BP"]), (b, c, h, p, fA.shape[-1])
    G, dh0, dA, dD, dbias = halves(dh).unsqueeze(1), S.new_empty(states), S.new_empty(states), S.new_empty(b, c, h, p), S.new_empty(b, c, h, p)
    if c > 1:
        last, G, total = G[:, 0], S.new_empty(states), S.new_empty(b, c, h, p)
        s6_walk(tensors, small, meta, fA, c, "end", G, x, G, S, total, adjoint=True)
        join(G, total, fA, last, reverse=True)
    dx, ddt, dz = x.new_empty(b, l, h, p), dt.new_empty(dt.shape), x.new_empty(0) if z is None else z.new_empty(z.shape)
    dB, dC = B.new_empty(parts, b, l, h, n), C.new_empty(parts, b, l, h, n)
    x_, dt_, B_, C_, z_, dy_ = tensors
    launch(s6_backward_kernel, (b * c * h, parts), x_, dt_, fA, B_, C_, small[0], z_, small[1], dy_, G, S, dx, ddt, dA, dB, dC, dD, dz, dbias, dh0,
           b, l, c, s, *flat_strides(*tensors), **meta)
    one = lambda t: t[0] if parts == 1 else t.sum(0)  # noqa: E731
    return (over_group(dx, x), ddt, whole(dA.sum((0, 1)), n).to(A.dtype), over_group(one(dB), B), one(dC),
            x.new_empty(0) if D is None else dD.sum((0, 1)).to(D.dtype), dz,
            x.new_empty(0) if dt_bias is None else dbias.sum((0, 1)).to(dt_bias.dtype), whole(dh0[:, 0], n))


def ssd_setup(x, B, C, D):
    """x, B and C as Mamba-2's kernels read them, and the kernels' constants. bf16 is multiplied as it is, fp16 (whose range a state can
    leave) as TF32, float32 in full."""
    dot, T, block = (tl.bfloat16, 64, 64) if x.dtype == torch.bfloat16 and not INTERPRET else (tl.float32, 32, 32)  # it lacks bf16
    meta = dict(h=C.shape[2], p=x.shape[3], n=C.shape[3], SKIP=D is not None, DOT=dot, T=T, BP=block,
                PREC="ieee" if x.dtype == torch.float32 else "tf32")
    return [rows(t)[0] for t in (x, B, C)], meta


def ssd_delta(dt, A, dt_bias, tokens, T, exact):
    """Δ (b, tokens, h) and s, its running sum within each tile times A: see the kernel."""
    (b, l, h), dt = dt.shape, dt if dt.stride(2) == 1 else dt.contiguous()
    delta = dt.new_empty(b, tokens, h, dtype=torch.float32)
    s = torch.empty_like(delta, dtype=torch.float64 if exact else torch.float32)
    bias = delta if dt_bias is None else dt_bias.float().contiguous()
    launch(delta_kernel, (b * (tokens // T), cdiv(h, 128)), dt, A, bias, delta, s, l, tokens // T, dt.stride(0),
           dt.stride(1), h, BIAS=dt_bias is not None, T=T, BLOCK=min(128, power_of_2(h)))
    return delta, s


def ssd_walk(u, v, C, delta, s, meta, D, c, leave, h0, y, h, S, total, adjoint=False):
    """ssd_walk_kernel through c segments, as s6_walk; for the adjoint u is dy and v is C."""
    b, l, heads = C.shape[:3]
    launch(ssd_walk_kernel, (b * c * heads, cdiv(meta["p"], meta["BP"])), u, delta, s, v, C, D, h0, y, h, S, total, l, c, delta.shape[1] // c,
           *flat_strides(u, v, C), rx=heads // u.shape[2], rb=heads // v.shape[2], LEAVE=leave, ADJOINT=adjoint,
           BN=max(16, power_of_2(meta["n"])), **meta, **(WALK_Y if leave == "y" else WALK_STATES))


def ssd_forward(x, dt, A, B, C, D, z, dt_bias, h0, keep):
    """Mamba-2 on the kernels: y, the last state, and for the backward the states the segments start from."""
    (b, l, h, n), p, A = C.shape, x.shape[3], A.float().contiguous()
    (x, B, C), meta = ssd_setup(x, B, C, D)
    c, D = segments(b * h * cdiv(p, meta["BP"]), l, meta["T"], SSD_BLOCKS), A if D is None else D.float().contiguous()
    delta, s = ssd_delta(dt, A, dt_bias, c * meta["T"] * cdiv(l, c * meta["T"]), meta["T"], x.dtype == torch.float32)
    starts = (delta.new_zeros(b, h, p, n) if h0 is None else h0.float().contiguous()).unsqueeze(1)
    y, ends = x.new_empty(b, l, h, p), delta.new_empty(b, c, h, p, n)
    if c > 1:
        first, starts, total = starts[:, 0], torch.empty_like(ends), ends.new_empty(b, c, h)
        ssd_walk(x, B, C, delta, s, meta, D, c, "end", starts, y, starts, starts, total)
        join(starts, total, A, first)
    ssd_walk(x, B, C, delta, s, meta, D, c, "y", starts, y, ends, ends, ends)
    kept = starts.clone() if h0 is not None and c == 1 else starts  # an operator must not return its input
    return y, ends[:, -1].contiguous(), kept


def ssd_backward(dy, dh, x, dt, A, B, C, D, z, dt_bias, starts):
    """The gradients, as s6_backward returns them."""
    (b, l, h, n), p, c, fA = C.shape, x.shape[3], starts.shape[1], A.float().contiguous()
    (xc, Bc, Cc), meta = ssd_setup(x, B, C, D)
    dy, T, fD = rows(dy)[0], meta["T"], fA if D is None else D.float().contiguous()
    delta, s = ssd_delta(dt, fA, dt_bias, c * T * cdiv(l, c * T), T, x.dtype == torch.float32)
    S = (x if meta["DOT"] == tl.bfloat16 else dh).new_empty(b, cdiv(l, T), h, p * n)
    Gs, G, dh0, tiles = torch.empty_like(S), dh.float().contiguous().unsqueeze(1), starts.new_empty(b, c, h, p, n), b * S.shape[1]
    ssd_walk(xc, Bc, Cc, delta, s, meta, fD, c, "states", starts, dy, dh0, S, S)
    if c > 1:
        last, G, total = G[:, 0], torch.empty_like(dh0), dh0.new_empty(b, c, h)
        ssd_walk(dy, Cc, Cc, delta, s, meta, fD, c, "end", G, dy, G, Gs, total, adjoint=True)
        join(G, total, fA, last, reverse=True)
    ssd_walk(dy, Cc, Cc, delta, s, meta, fD, c, "states", G, dy, dh0, Gs, Gs, adjoint=True)
    dx, ddt, dB, dC = x.new_empty(b, l, h, p), dt.new_empty(dt.shape), B.new_empty(b, l, h, n), C.new_empty(b, l, h, n)
    dA, dD = S.new_empty(2, tiles, h, dtype=torch.float32)
    launch(ssd_backward_kernel, (tiles * h,), xc, delta, s, fA, Bc, Cc, fD, dy, S, Gs, dx, ddt, dA, dB, dC, dD, l, delta.shape[1],
           *flat_strides(xc, Bc, Cc, dy), rx=h // x.shape[2], rb=h // B.shape[2], BN=meta["BP"], **meta, **GRADIENT)
    return (over_group(dx, x), ddt, dA.sum(0).to(A.dtype), over_group(dB, B), dC,
            x.new_empty(0) if D is None else dD.sum(0).to(D.dtype), x.new_empty(0),
            x.new_empty(0) if dt_bias is None else ddt.sum((0, 1), dtype=torch.float32).to(dt_bias.dtype), dh0[:, 0].contiguous())


def scan_forward(x, dt, A, B, C, D, z, dt_bias, h0, keep):
    return (ssd_forward if A.dim() == 1 else s6_forward)(x, dt, A, B, C, D, z, dt_bias, h0, keep)


def scan_backward(dy, dh, x, dt, A, B, C, D, z, dt_bias, S):
    return (ssd_backward if A.dim() == 1 else s6_backward)(dy, dh, x, dt, A, B, C, D, z, dt_bias, S)


class TritonScan(torch.autograd.Function):
    """`ssm_reference` on the kernels above, z for Mamba only. Keeps its inputs and S: of Mamba every 8th state, of Mamba-2 those its
    segments start from."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, h0, keep):
        y, h, S = operator("scan_forward")(x, dt, A, B, C, D, z, dt_bias, h0, keep)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, S)
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        gradients = operator("scan_backward")(dy, dh, *ctx.saved_tensors)
        return *[g if needed and g.numel() else None for g, needed in zip(gradients, ctx.needs_input_grad)], None


def conv_setup(x, weight, bias, skip, tokens, T, U, BLOCK, num_warps):
    """What both launches take: the grid, the inputs, `tokens` cut into c segments of s ≥ T, and the kernels' constants."""
    (b, l, g, p), (h, _, w), (x, (s_xb, s_xl, s_xh)) = x.shape, weight.shape, rows(x)
    s = U * cdiv(cdiv(tokens, max(1, tokens // T)), U)
    c, R = cdiv(tokens, s), power_of_2(h // g)
    BP = min(power_of_2(g * p), max(1, BLOCK // R))
    meta = dict(s_xl=s_xl, s_xh=s_xh, g=g, p=p, r=h // g, BIAS=bias is not None, W=w, U=U, R=R, BP=BP, num_warps=num_warps)
    return (b * c * cdiv(g * p, BP),), (x, weight.contiguous(), weight if bias is None else bias.contiguous()), (l, skip, c, s, s_xb), meta


def conv_forward(x, weight, bias, skip):
    """x (b, skip + l, g, p), weight (h, p, w), bias (h, p) or None -> y (b, l, h, p), that of the tokens after the first `skip`."""
    grid, inputs, sizes, meta = conv_setup(x, weight, bias, skip, x.shape[1] - skip, **CONV_Y)
    y = x.new_empty(x.shape[0], x.shape[1] - skip, *weight.shape[:2])
    launch(conv_kernel, grid, *inputs, y, *sizes, **meta)
    return y


def conv_backward(dy, x, weight, bias, skip):
    """The gradients of x, weight and bias; of the bias also where it is None."""
    (h, p, w), (grid, inputs, sizes, meta) = weight.shape, conv_setup(x, weight, bias, skip, x.shape[1], **CONV_GRADIENT)
    dx, dw = x.new_empty(x.shape), x.new_empty(len(x) * sizes[2], w + 1, h * p, dtype=torch.float32)
    launch(conv_backward_kernel, grid, *inputs, dy.contiguous(), dx, dw, *sizes, **meta)
    dw = dw.sum(0)
    return dx, weight.new_empty(h, p, w).copy_(dw[:w].T.view(h, p, w)), dw[w].view(h, p).to(weight.dtype if bias is None else bias.dtype)


class TritonConv(torch.autograd.Function):
    """The convolution on the kernels above. Keeps its inputs; the backward computes the sums again."""

    @staticmethod
    def forward(ctx, x, weight, bias, skip):
        ctx.save_for_backward(x, weight, bias)
        ctx.skip = skip
        return operator("conv_forward")(x, weight, bias, skip)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors  # asked for once: a checkpoint hands them out once
        dx, dw, dbias = operator("conv_backward")(dy, x, weight, bias, ctx.skip)
        return dx, dw, None if bias is None else dbias, None


def norm_setup(y, z, weight, T, ELEMENTS, num_warps):
    """What both launches take: the grid, the inputs, the sequence in c times T tokens, z's stride, and the kernel's constants."""
    (b, l, h, p), (z, (s_zb, s_zl, s_zh)), c, BP = y.shape, rows(z), cdiv(y.shape[1], T), power_of_2(y.shape[3])
    meta = dict(s_zl=s_zl, s_zh=s_zh, h=h, p=p, T=T, ROWS=max(1, min(T, ELEMENTS // BP)), BP=BP, num_warps=num_warps)
    return (b * c * h,), (y.contiguous(), z, weight.contiguous()), (l, c, s_zb), meta


def norm_forward(y, z, weight, eps):
    """y, z (b, l, h, p), weight (h, p) -> o (b, l, h, p)."""
    (grid, inputs, sizes, meta), o = norm_setup(y, z, weight, **NORM_Y), y.new_empty(y.shape)
    launch(norm_kernel, grid, *inputs, o, o, o, o, eps, *sizes, GRADIENT=False, **meta)
    return o


def norm_backward(do, y, z, weight, eps):
    """The gradients of y, z and weight."""
    grid, inputs, sizes, meta = norm_setup(y, z, weight, **NORM_GRADIENT)
    dy, dz, dw = y.new_empty(y.shape), z.new_empty(z.shape), y.new_empty(len(y) * sizes[1], *weight.shape, dtype=torch.float32)
    launch(norm_kernel, grid, *inputs, do.contiguous(), dy, dz, dw, eps, *sizes, GRADIENT=True, **meta)
    return dy, dz, dw.sum(0).to(weight.dtype)


class TritonNorm(torch.autograd.Function):
    """`gated_norm_reference` on the kernel above. Keeps its inputs; the backward computes the norm again."""

    @staticmethod
    def forward(ctx, y, z, weight, eps):
        ctx.save_for_backward(y, z, weight)
        ctx.eps = eps
        return operator("norm_forward")(y, z, weight, eps)

    @staticmethod
    def backward(ctx, do):
        return *operator("norm_backward")(do, *ctx.saved_tensors, ctx.eps), None


def dry(f):
    """f with launches left out: what it returns has the right shapes and types, and undefined values."""
    def shapes(*args):
        global DRY
        DRY = True
        try:
            return f(*args)
        finally:
            DRY = False
    return shapes


def operator(name):
    """This file's function of that name or, while torch.compile traces, the operator of PyTorch that it is registered as."""
    return getattr(torch.ops.mil, name) if torch.compiler.is_compiling() else globals()[name]


SCAN = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias"
for f, schema in ((scan_forward, f"({SCAN}, Tensor? h0, bool keep) -> (Tensor, Tensor, Tensor)"),
                  (scan_backward, f"(Tensor dy, Tensor dh, {SCAN}, Tensor S) -> ({', '.join(['Tensor'] * 9)})"),
                  (conv_forward, "(Tensor x, Tensor weight, Tensor? bias, int skip) -> Tensor"),
                  (conv_backward, "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int skip) -> (Tensor, Tensor, Tensor)"),
                  (norm_forward, "(Tensor y, Tensor z, Tensor weight, float eps) -> Tensor"),
                  (norm_backward, "(Tensor do, Tensor y, Tensor z, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")):
    torch.library.custom_op(f"mil::{f.__name__}", f, mutates_args=(), schema=schema).register_fake(dry(f))
