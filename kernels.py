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
are never repeated in memory by a kernel. (They may have different numbers of heads; those of a Llama never do.)

Two decays, told apart by the shape of A:

    Mamba    dt (b, l, h, p)   A (h, p, n)     every channel has a step, every state element a decay
    Mamba-2  dt (b, l, h)      A (h,)          one of each per head, so a chunk of tokens is a matrix product

In this file
    ssm_reference         the definition, a loop over tokens; the tests measure everything else against it
    ssm_scan              the same result, differentiable and fast: Triton on CUDA, chunked PyTorch elsewhere
    conv_reference        the short causal convolution + SiLU in front of the scan, and causal_conv, its fast form
    gated_norm_reference  Mamba-2's gate and norm behind it, and gated_norm
    linear, swiglu, rms_norm, attend, replay   a model's layers for a few tokens a row, in decoding
    norm_linears, linear, mlp, rotate          the layers in training, which keep for the backward what they were given and little else
    token_losses                               cross-entropy and KL to a teacher of every token, and their gradient

How the scan is made fast. The recurrence is linear in h, so a sequence can be cut anywhere:

    1. end     every piece, on its own, computes the state it would end with from h = 0
    2. join    from piece to piece, h ← exp(A ΣΔ) ∘ h + its end, which is the state the next piece starts from
    3. walk    every piece, on its own again, computes its y from its starting state

A row may hold several documents one after the other (packed sequences). `pos` (b, l) is the place of each token in its own; where it is
0 the factor exp(Δ A) counts as 0, so nothing of the document before is left, and the convolution's taps end there.

In PyTorch the pieces are many short chunks and all of it is vectorised. In Triton a walk keeps the state in registers
and goes through its piece once, token by token for Mamba, tile by tile for Mamba-2, where a tile of T tokens is a few
products of matrices on the tensor cores. Batch, heads and blocks of channels run in parallel; that fills a GPU at
training sizes, so a sequence is one piece, steps 1 and 2 fall away and the state stays in registers (for a gradient some
states are left in memory, see below). Only a small batch is cut into segments, to fill the chip; whoever walks a segment
first joins the ends of those before it.

The gradient is the same walk backwards in time: the adjoint G_t = ∂L/∂h_t obeys G_{t-1} = exp(Δ_t A) ∘ G_t + dy_{t-1} ⊗
C_{t-1}. Mamba's forward, when a gradient is wanted, leaves every 8th state in memory; its backward walks from the last token
to the first, four tokens at a time, whose states it computes again and holds in registers. Mamba-2 keeps its inputs and the
ends of its segments: two walks leave the state and the adjoint at every tile's border, then all tiles are taken at once.

Why it is fast, in the order in which it paid (an H100 has 132 multiprocessors of 4 schedulers, each one instruction a clock):

    Mamba is bound by instructions. A token of a head of 16 channels and 16 states is 256 exponentials and 1,024 products (a sum
    that can be fused into one not counted): 40 instructions of a warp, of which the exponentials take 64 clocks of their unit.
    Compiled naively, what surrounds them takes three times as many, so most of the work went there: strides and sizes are
    constants, so an address is an immediate; bf16 comes 8 numbers to a load and two to a 32-bit word, unpacked by one shift or
    mask each; a thread holds 8 states of one channel, so a sum over n is 7 additions and one shuffle; and the two sums over
    channels that dB and dC need share their columns out between rows (store_sum), 8 shuffles a sum in place of 32.
    With two warps a scheduler, nothing hides the memory's latency but loads issued long before their use: the next
    eight tokens are asked for while the present ones are worked on.
    Mamba-2 is bound by the latency between dependent products: a tile is large enough (in bf16 64 tokens, 64 channels × all n states) that
    loads of the next one run behind it, and what belongs to writers and to readers is computed from products of its own, never
    from a transposed result.
    Working out 40 arguments in Python takes longer than a small batch runs: `planned` remembers them, `Launch` what it compiled.

Decoding is bound by the memory: each weight is used for a few rows only, so what counts is to fetch it once, at full rate, and to leave
no gap between kernels, whose launches a CUDA graph makes. The recurrence is the token by token one: `replay`, on the state and a log.

Names in the kernels: s6_ is Mamba, ssd_ Mamba-2; b_ a block in registers, p_ or ptr a pointer, o_ offsets, m_ a mask, i_ an index, s_
a stride (s_xl: of x over l), c a number of segments, s the tokens in one (p_s, b_s: the running sum of Δ A LOG2E within a tile; in
decoding what is prepared for a replay, and scores), T tokens taken together, BP and BN blocks of p and n, N2 = ⌈n/2⌉, rx and rb the query heads that share a head of x and of B, h0 the
starting state; in the convolution W its width, r (R, a power of 2) the query heads of a kv head and U tokens together. What has n
columns is for Mamba a pair of blocks, the even columns and the odd. `o < tl.where(m, n, 0)` is m & (o < n), one compare.
"""
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

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


def ssm_reference(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None, pos=None):
    """The state space model of the file's head, token by token (the paper's Eq. 1, discretised as in Mamba).

    Shapes as above; D and dt_bias are shaped like dt without (b, l); z is (b, l, h, p); h0 is (b, h, p, n).
    A row may hold several documents one after the other: pos (b, l), whole numbers, is the place of each token in its own, and before
    a token with pos 0 the state is zero. The state is float32, or float64 when x is. Returns y (b, l, h, p) in x's type and the last h.
    """
    heads, n, p, f = C.shape[2], C.shape[3], x.shape[3], torch.promote_types(x.dtype, torch.float32)
    xs, Bs, Cs = repeat_heads(x, heads).to(f), repeat_heads(B, heads).to(f), C.to(f)
    delta = F.softplus(dt.to(f) if dt_bias is None else dt.to(f) + dt_bias.to(f))
    if A.dim() == 1:  # Mamba-2: one decay per head is Mamba with every channel and state element alike
        delta, A, D = delta[..., None], A[:, None, None], D if D is None else D[:, None]
    h = x.new_zeros(x.shape[0], heads, p, n, dtype=f) if h0 is None else h0.to(f)
    ys = []
    for t in range(x.shape[1]):
        h = h if pos is None else h.masked_fill((pos[:, t] == 0)[:, None, None, None], 0)
        h = torch.exp(delta[:, t, ..., None] * A.to(f)) * h + (delta[:, t] * xs[:, t])[..., None] * Bs[:, t, :, None]
        ys.append(torch.einsum("bhpn,bhn->bhp", h, Cs[:, t]))
    y = torch.stack(ys, dim=1)  # (b, l, h, p)
    y = y if D is None else y + D.to(f) * xs
    y = y if z is None else y * F.silu(z.to(f))
    return y.to(x.dtype), h


def conv_reference(x, weight, bias=None, state=None, pos=None):
    """Causal depthwise convolution with SiLU: y_t = silu(bias + Σ_k weight_k x_{t-w+1+k}).

    x (b, l, g, p); weight (h, p, w); bias (h, p): head i reads kv head i // (h/g). state (b, w-1, g, p) holds the
    inputs before x, zeros when None. With pos (b, l), the place of each token in its document, a token sees zeros in place of what lies
    more than pos before it. Returns y (b, l, h, p) and the inputs to carry on from, shaped like state, whichever document they are of.
    """
    (l, g), w, f = x.shape[1:3], weight.shape[2], torch.promote_types(x.dtype, torch.float32)
    x = F.pad(x, (0, 0, 0, 0, w - 1, 0)) if state is None else torch.cat([state.to(x.dtype), x], dim=1)
    xs, weight = x.to(f).unsqueeze(3), weight.to(f).unflatten(0, (g, -1))    # (b, l, g, 1, p) (g, h/g, p, w)
    taps = [xs[:, k:k + l] if pos is None else xs[:, k:k + l].masked_fill((pos < w - 1 - k)[:, :, None, None, None], 0) for k in range(w)]
    y = sum(taps[k] * weight[..., k] for k in range(w)).flatten(2, 3)
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


def ssm_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None, pos=None):
    """`ssm_reference`, fast and differentiable (once): the same arguments, shapes and types, and its results up to rounding.

    An infinity or NaN in an input of Mamba-2 can reach the tokens before it, in its tile of up to 64, also of another document. n or p
    above 256 take the PyTorch form. Raises ValueError, naming the argument, when the shapes do not fit together.
    """
    check_ssm(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    if use_triton(x) and x.shape[1] > 1 and max(x.shape[3], C.shape[3]) <= 256:
        inside = z if A.dim() == 3 else None  # Mamba's kernel gates its output; Mamba-2's does not, since in a model gated_norm does it
        keep = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, dt, A, B, C, D, z, dt_bias, h0)])
        y, h = TritonScan.apply(x, dt, A, B, C, D, inside, dt_bias, h0, pos if pos is None else pos.int().contiguous(), keep)
        return y if z is None or inside is not None else (y.float() * F.silu(z.float())).to(x.dtype), h
    with torch.autocast(x.device.type, enabled=False):  # the state and Δ·A stay float32 whatever surrounds them
        if x.shape[1] == 1:  # one token has nothing to run in parallel: the definition is a single step
            return ssm_reference(x, dt, A, B, C, D, z, dt_bias, h0, pos)
        f = torch.promote_types(x.dtype, torch.float32)
        delta = F.softplus(dt.to(f) if dt_bias is None else dt.to(f) + dt_bias.to(f))
        h0 = x.new_zeros(x.shape[0], C.shape[2], x.shape[3], C.shape[3], dtype=f) if h0 is None else h0.to(f)
        y, h = (ssd_torch if A.dim() == 1 else s6_torch)(x.to(f), delta, A.to(f), B.to(f), C.to(f), h0, pos)
        if D is not None:  # broadcast over the heads that share a kv head, by a view: (b, l, g, h/g, p)
            D = D[:, None] if D.dim() == 1 else D
            y = y + (x.unsqueeze(3) * D.to(f).view(x.shape[2], -1, D.shape[1])).flatten(2, 3)
        if z is not None:
            y = y * F.silu(z.to(f))
        return y.to(x.dtype), h


def causal_conv(x, weight, bias=None, state=None, lengths=None, pos=None):
    """`conv_reference`, fast and differentiable. With `lengths` (b,) row i has only that many real tokens, padded
    on the right, and the returned state holds each row's own last inputs. ValueError when the shapes do not fit."""
    (b, l, g, p), (h, _, w) = x.shape, weight.shape
    if l < 1:
        raise ValueError("causal_conv: x has no tokens (l = 0), expected at least one")
    if h % g:
        raise ValueError(f"causal_conv: the kv heads of x ({g}) must divide the heads of weight ({h})")
    for name, t, want in (("weight", weight, (h, p, w)), ("bias", bias, (h, p)), ("state", state, (b, w - 1, g, p)), ("pos", pos, (b, l))):
        if t is not None and tuple(t.shape) != want:
            raise ValueError(f"causal_conv: {name} is {tuple(t.shape)}, expected {want} for x {tuple(x.shape)}")
    full = x if state is None else torch.cat([state.to(x.dtype), x], dim=1)
    if use_triton(x):
        y = Triton.apply("conv", full, weight, bias, pos if pos is None else pos.int().contiguous(), full.shape[1] - l)
    else:
        y = conv_reference(x, weight, bias, state, pos)[0]
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
    return Triton.apply("norm", y, z, weight, eps) if use_triton(y) else gated_norm_reference(y, z, weight, eps)


def check_ssm(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    """Every argument against the shapes in the file's head; ValueError on the first that does not fit."""
    for name, t, axes in (("x", x, "b, l, g, p"), ("B", B, "b, l, g, n"), ("C", C, "b, l, h, n")):
        if t.dim() != 4:
            raise ValueError(f"ssm: {name} is {tuple(t.shape)}, expected four axes ({axes})")
    (b, l, gx, p), gb, (h, n) = x.shape, B.shape[2], C.shape[2:]
    if B.shape[3] != n:
        raise ValueError(f"ssm: B is {tuple(B.shape)} and C is {tuple(C.shape)}, but their last axis, n, must agree")
    per = (h,) if A.dim() == 1 else (h, p)  # what has one value per head in Mamba-2 has one per channel in Mamba
    want = {"A": per if A.dim() == 1 else (h, p, n), "dt": (b, l, *per), "B": (b, l, gb, n), "C": (b, l, h, n),
            "D": per, "dt_bias": per, "z": (b, l, h, p), "h0": (b, h, p, n), "pos": (b, l)}
    given = {"A": A, "dt": dt, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "z": z, "h0": h0, "pos": pos}
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


def s6_torch(x, delta, A, B, C, h0, pos=None):
    """Mamba. With T = √l both loops, over the tokens of a chunk and over the chunks, take √l turns."""
    l = x.shape[1]
    T = max(1, round(l**0.5))
    x, delta, B, C = split_chunks(T, x, delta, B, C)
    decay = torch.exp(delta[..., None] * A)                             # (b, c, T, h, p, n)
    if pos is not None:
        first = split_chunks(T, pos == 0)[0][..., None, None, None]     # where a document starts (b, c, T, 1, 1, 1)
        decay = decay.masked_fill(first, 0)
    u = delta.unflatten(3, (x.shape[3], -1)) * x.unsqueeze(4)           # Δ x (b, c, T, gx, h/gx, p)
    u = u.flatten(3, 4).unflatten(3, (B.shape[3], -1))                  # (b, c, T, gb, h/gb, p)
    write = (u[..., None] * B[..., None, None, :]).flatten(3, 4)        # (b, c, T, h, p, n)
    states = [write[:, :, 0]]
    for t in range(1, T):
        states.append(decay[:, :, t] * states[-1] + write[:, :, t])
    total = torch.exp(delta.cumsum(2)[..., None] * A)                   # decay since the chunk's start
    total = total if pos is None else total.masked_fill(first.cumsum(2) > 0, 0)
    starts, h = pass_states(states[-1], total[:, :, -1], h0)
    y = torch.einsum("bcthpn,bcthn->bcthp", torch.stack(states, dim=2) + total * starts[:, :, None], C)
    return y.flatten(1, 2)[:, :l], h


def ssd_torch(x, delta, A, B, C, h0, pos=None, T=64):
    """Mamba-2. Inside a chunk y = (decay ∘ C Bᵀ) (Δ x): attention without softmax, its mask weighted by the decay."""
    l = x.shape[1]
    x, delta, B, C = split_chunks(min(T, l), x, delta, B, C)
    a = delta.double() * A.double()                                    # (b, c, T, h)
    if pos is not None:  # e^-800 is 0 in float64 too; what lies much lower would blur its neighbours in s
        a = a.masked_fill(split_chunks(min(T, l), pos == 0)[0][..., None], -800)
    s = a.cumsum(2).transpose(2, 3)                                    # (b, c, h, T): log decay since the start
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
# The scan in Triton. Tensors come with their own strides over batch, length and head, the last axis contiguous; A, D, dt_bias, h0 are
# contiguous float32, Mamba's A with the even columns of n before the odd ones. Strides and sizes within a batch are constants of the
# compiled kernel, which turns most address arithmetic into immediates (for Mamba it halves the registers); lengths are not, so a new
# length compiles nothing, unless strides over the batch are no longer or newly multiples of 16.

LENGTHS = ["l", "c", "s"]  # not specialised on
# Chosen by measurement on an H100 and an H200.
S6_TILE, S6_BLOCKS, S6_T = 256, 2048, 8  # Mamba: states a program holds; programs (of one warp) to aim at, four a scheduler; tokens in flight, and between two states in S
SSD_BLOCKS = 256                                                                                # Mamba-2: the programs to aim at,
WALK_Y, WALK_STATES = dict(num_warps=4, num_stages=2), dict(num_warps=4, num_stages=3)          # the walk that gives y, the one that leaves states or an end,
WALK_GRADIENT = dict(num_warps=4, num_stages=2)                                                 # and the gradient's
CONV_Y, CONV_GRADIENT = dict(T=32, U=8, BLOCK=128), dict(T=64, U=8, BLOCK=64)                   # about T tokens to a segment, U at a time, BLOCK channels × query heads
NORM_Y, NORM_GRADIENT = dict(T=16, ELEMENTS=2048), dict(T=64, ELEMENTS=1024)                    # T tokens to a program, ELEMENTS numbers at a time
FEW = 16                                 # decoding: the most tokens a row (a tile of 16 in attend_kernel)
SPLIT = 128, 512                         # keys in a piece, for few heads of all rows together and for 64 or more
REPLAY = (8, 64, 1024, {}), (1, 256, 2048, dict(maxnreg=128))  # of few programs, of 2,048 or more: tokens and columns prepared together, numbers of a state a warp holds, options
LINEAR = dict(BN=32, BK=256, num_warps=4, num_stages=4), dict(BN=64, BK=128, num_warps=4, num_stages=4)  # without a gate, and with one

if triton is not None:
    LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x LOG2E), and 2^x is what the chip computes

    @triton.jit
    def softplus(b):
        """log(1 + e^b)."""
        b_e = tl.exp2(tl.abs(b) * -LOG2E)
        b_w = tl.rsqrt(2 + b_e)  # squared, 1 / (2 + e): a division takes twice as many instructions
        b_w = b_e * b_w * b_w
        b_q = b_w * b_w  # log(1 + e) = 2 artanh(w) = 2 w (1 + q/3 + q²/5 + …), 1/8.25 for 1/9 and all that follows: to 1.6e-7, also of a tiny e
        return tl.maximum(b, 0.) + 2 * b_w * (1 + b_q * (1 / 3 + b_q * (1 / 5 + b_q * (1 / 7 + b_q / 8.25))))

    @triton.jit
    def slope(b_delta):
        """The derivative of softplus where it is Δ (dt itself is not at hand): 1 - e^-Δ, to float32 precision also where Δ is tiny."""
        b_small = b_delta * (1 - b_delta / 2 * (1 - b_delta / 3 * (1 - b_delta / 4 * (1 - b_delta / 5))))
        return tl.where(b_delta < 0.05, b_small, 1 - tl.exp(-b_delta))

    @triton.jit
    def sigmoid(b):
        """1 / (1 + e^-b)."""
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
    def delta_kernel(p_dt, p_A, p_bias, p_pos, p_delta, p_s, l, tiles, s_tb, s_tl: tl.constexpr, h: tl.constexpr,
                     BIAS: tl.constexpr, RESET: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
        """Mamba-2: Δ (b, tiles·T, h) = softplus(dt + bias), 0 past the end, and s, the running sum of Δ A LOG2E within each tile.
        Beyond 2^-200 nothing is left of a float32, so larger decays are cut there: s stays so small (above -200 T)
        that float32 keeps its differences, which matter, better than bf16 keeps the inputs; float64 where x is float32. A document
        that starts (RESET, pos 0) is such a decay."""
        i_bc = tl.program_id(0).to(tl.int64)
        i_b, i_c = i_bc // tiles, i_bc % tiles
        o, o_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), i_c * T + tl.arange(0, T)
        m, o_out = o < h, (i_bc * T + tl.arange(0, T))[:, None] * h + o[None, :]
        b_dt = tl.load(p_dt + i_b * s_tb + o_t[:, None] * s_tl + o[None, :], mask=(o_t < l)[:, None] & m[None, :], other=-float("inf")).to(tl.float32)
        if BIAS:
            b_dt += tl.load(p_bias + o, mask=m, other=0.)[None, :]
        b_delta = softplus(b_dt)
        b_a = tl.maximum(b_delta * tl.load(p_A + o, mask=m, other=0.)[None, :] * LOG2E, -200.)
        if RESET:
            b_a = tl.where((tl.load(p_pos + i_b * l + o_t, mask=o_t < l, other=1) == 0)[:, None], -200., b_a)
        tl.store(p_delta + o_out, b_delta, mask=m[None, :])
        tl.store(p_s + o_out, tl.cumsum(b_a.to(p_s.dtype.element_ty), axis=0), mask=m[None, :])

    @triton.jit
    def read(ptr, o, m, WORDS: tl.constexpr, EMPTY: tl.constexpr):
        """Numbers at ptr + o, EMPTY where m is not. With WORDS, for bf16, as the 32 bits each shares with its neighbour, 0xff80ff80 being
        -inf twice. (Why: a value of 16 bits that is carried from one turn of a loop to the next is moved as soon as it arrives, and so
        waited for; one of 32 is not. The backward measured faster with WORDS; the forward, with more tokens in flight, without.)"""
        if WORDS:
            return tl.load(ptr.to(tl.pointer_type(tl.int32)) + o // 2, mask=m, other=-8323200 if EMPTY < 0 else 0)
        else:
            return tl.load(ptr + o, mask=m, other=EMPTY)

    @triton.jit
    def number(b, o, WORDS: tl.constexpr):
        """What `read` returned at o, as float32."""
        return ((b << 16 * (1 - o % 2)) & -65536).to(tl.float32, bitcast=True) if WORDS else b.to(tl.float32)

    @triton.jit
    def read_pairs(ptr, o, m, n: tl.constexpr, WORDS: tl.constexpr):
        """The even and the odd of n numbers at ptr, o counting pairs; zeros where m is not. With WORDS a tuple of one, both in 32 bits."""
        if WORDS:
            return (tl.load(ptr.to(tl.pointer_type(tl.int32)) + o, mask=o < tl.where(m, n // 2, 0), other=0),)
        else:
            end = tl.where(m, n, 0)
            return tl.load(ptr + 2 * o, mask=2 * o < end, other=0.), tl.load(ptr + 2 * o + 1, mask=2 * o + 1 < end, other=0.)

    @triton.jit
    def pairs(b, WORDS: tl.constexpr):
        """What `read_pairs` returned, as float32: of a word the lower half shifted up, and the upper half (& 0xffff0000)."""
        if WORDS:
            return (b[0] << 16).to(tl.float32, bitcast=True), (b[0] & -65536).to(tl.float32, bitcast=True)
        else:
            return b[0].to(tl.float32), b[1].to(tl.float32)

    @triton.jit
    def s6_tokens(at, by, p_pos, i_0, l, o_p, o_2, p: tl.constexpr, n: tl.constexpr, X: tl.constexpr, C: tl.constexpr, Z: tl.constexpr,
                  Y: tl.constexpr, RESET: tl.constexpr, WORDS: tl.constexpr, BACK: tl.constexpr, T: tl.constexpr):
        """dt, x, B (if X), C, z, dy (if Y) of T tokens from i_0 on, which lie `at` six pointers, `by` six strides apart, and pos (if X and
        RESET); any value stands in for what is not asked for. Outside the sequence Δ = 0, which leaves the state alone. (0 ≤ i < l is one
        comparison of unsigned numbers; going BACK two, and single numbers as words: the compiler then places the backward's loads
        earlier, on an H200 1.19 ms against 1.42 for 4 × 2,048 tokens.)"""
        SINGLE: tl.constexpr = WORDS and BACK
        tokens = ()
        for j in tl.static_range(T):
            m = (i_0 + j >= 0) & (i_0 + j < l) if BACK else (i_0 + j).to(tl.uint32) < l.to(tl.uint32)
            m_p = o_p < tl.where(m, p, 0)
            b_dt = read(at[0] + i_0 * by[0] + j * by[0], o_p, m_p, SINGLE, -float("inf")) if X else o_p
            b_x = read(at[1] + i_0 * by[1] + j * by[1], o_p, m_p, SINGLE, 0.) if X else o_p
            b_B = read_pairs(at[2] + i_0 * by[2] + j * by[2], o_2, m, n, WORDS) if X else (o_p,)
            b_C = read_pairs(at[3] + i_0 * by[3] + j * by[3], o_2, m, n, WORDS) if C else (o_p,)
            b_z = read(at[4] + i_0 * by[4] + j * by[4], o_p, m_p, SINGLE, 0.) if Z else o_p
            b_dy = read(at[5] + i_0 * by[5] + j * by[5], o_p, m_p, SINGLE, 0.) if Y else o_p
            b_pos = tl.load(p_pos + i_0 + j, mask=m, other=1) if RESET and X else o_p
            tokens = tokens + ((b_dt, b_x, b_B, b_C, b_z, b_dy, b_pos),)
        return tokens

    # A state, and whatever has its shape or is a row of it, is a pair: its even and its odd columns of n.

    @triton.jit
    def add(b_h, b_u, b_B):
        """h + u ⊗ B."""
        return b_h[0] + b_u[:, None] * b_B[0], b_h[1] + b_u[:, None] * b_B[1]

    @triton.jit
    def exponent(b_delta, b_A, b_pos, RESET: tl.constexpr):
        """Δ A, or with RESET, where pos is 0, so little that nothing is left of 2^ it. (The sum is fused into the product, so that a token
        costs one selection, not one for every state; and it holds for A = 0.)"""
        return b_delta * b_A + tl.where(b_pos == 0, -1e30, 0.) if RESET else b_delta * b_A

    @triton.jit
    def decay(b_h, b_delta, b_A, b_pos, RESET: tl.constexpr):
        """exp(Δ A) ∘ h."""
        b_0 = tl.exp2(exponent(b_delta[:, None], b_A[0], b_pos, RESET)) * b_h[0]
        return b_0, tl.exp2(exponent(b_delta[:, None], b_A[1], b_pos, RESET)) * b_h[1]

    @triton.jit
    def dot(b_h, b_C):
        """h C."""
        return tl.sum(b_h[0] * b_C[0] + b_h[1] * b_C[1], axis=1)

    @triton.jit
    def read_state(ptr, o, m, N2: tl.constexpr):
        """A state as the kernels keep it among themselves, (p, 2, ⌈n/2⌉)."""
        return tl.load(ptr + o, mask=m, other=0.), tl.load(ptr + o + N2, mask=m, other=0.)

    @triton.jit
    def store_state(ptr, o, b, m, N2: tl.constexpr):
        tl.store(ptr + o, b[0], mask=m)
        tl.store(ptr + o + N2, b[1], mask=m)

    @triton.jit
    def read_matrix(ptr, o, m, HERE: tl.constexpr):
        """A state as everyone else has it, (p, n), offsets o and mask m (p, BN); zeros where there is none."""
        b = tl.load(ptr + o, mask=m, other=0.) if HERE else tl.zeros(o.shape, tl.float32)
        return tl.split(tl.reshape(b, (o.shape[0], o.shape[1] // 2, 2)))

    @triton.jit
    def store_matrix(ptr, o, b, m):
        tl.store(ptr + o, tl.reshape(tl.join(b[0], b[1]), o.shape), mask=m)

    @triton.jit
    def join(b_h, p_ends, p_decays, o, m, N2: tl.constexpr):
        """The state behind a segment: exp(A ΣΔ) ∘ h + its end."""
        b_end, b_decay = read_state(p_ends, o, m, N2), read_state(p_decays, o, m, N2)
        return b_decay[0] * b_h[0] + b_end[0], b_decay[1] * b_h[1] + b_end[1]

    @triton.jit(do_not_specialize=LENGTHS + ["kept"])
    def s6_walk_kernel(p_x, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_h0, p_pos, p_y, p_h, p_S, p_ends, p_decays,
                       l, c, s, kept, s_xb, s_tb, s_Bb, s_Cb, s_zb, s_xl: tl.constexpr, s_xh: tl.constexpr, s_tl: tl.constexpr, s_th: tl.constexpr,
                       s_Bl: tl.constexpr, s_Bh: tl.constexpr, s_Cl: tl.constexpr, s_Ch: tl.constexpr, s_zl: tl.constexpr, s_zh: tl.constexpr,
                       h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                       LEAVE: tl.constexpr, ADJOINT: tl.constexpr, START: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
                       RESET: tl.constexpr, WORDS: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba, one block of channels of one head through one segment of s tokens. What it leaves:

            "end"      in ends (b, c, h, p, 2, ⌈n/2⌉) the state the segment ends with on its own, and in decays exp(A ΣΔ),
                       or with RESET zeros if a document starts in it
            "y"        the output, in h the last state, and in S (b, ⌈l/T⌉, h, p, 2, ⌈n/2⌉), if `kept` is l and not 0, the state before
                       every T-th token: from h0 (if START) and the ends of the segments before this one

        The ADJOINT of "end" walks backwards, x being dy and B being C: an end is what the outputs add to the adjoint of the state before.
        The inputs of T tokens are asked for together, while the T before them are worked on: with two warps a scheduler it is
        the memory's latency that would bound the walk."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        N2: tl.constexpr = (n + 1) // 2
        PN: tl.constexpr = p * 2 * N2
        o_p, o_n, o_2n = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN // 2)[None, :], tl.arange(0, BN)[None, :]
        m_p, o_2, o_h, m_h = o_p < p, 0 * o_p[:, None] + o_n, o_p[:, None] * n + o_2n, (o_p < p)[:, None] & (o_2n < n)
        o_pn, m_pn = o_p[:, None] * (2 * N2) + o_n, m_p[:, None] & (o_n < N2)
        b_A = read_state(p_A + i_h * PN, o_pn, m_pn, N2)
        b_A = b_A[0] * LOG2E, b_A[1] * LOG2E
        b_h = read_matrix(p_h0 + (i_b * h + i_h) * (p * n), o_h, m_h, START)
        if LEAVE != "end":
            for k in range(i_c):
                o_k = ((i_b * c + k) * h + i_h) * PN
                b_h = join(b_h, p_ends + o_k, p_decays + o_k, o_pn, m_pn, N2)
        b_D = tl.load(p_D + i_h * p + o_p, mask=m_p, other=0.) if SKIP else tl.zeros((BP,), tl.float32)
        b_bias = tl.load(p_bias + i_h * p + o_p, mask=m_p, other=0.) if BIAS else tl.zeros((BP,), tl.float32)
        b_total, b_pos = b_A[0] * 0, 1  # ΣΔ, in the layout of the state: in another Δ would be computed twice; and with RESET the least pos
        p_x += i_b * s_xb + i_h // rx * s_xh
        p_dt += i_b * s_tb + i_h * s_th
        p_B += i_b * s_Bb + i_h // rb * s_Bh
        p_C += i_b * s_Cb + i_h * s_Ch
        p_z += i_b * s_zb + i_h * s_zh
        p_pos += i_b * l
        at, by = (p_dt, p_x, p_B, p_C, p_z, p_z), (s_tl, s_xl, s_Bl, s_Cl, s_zl, s_zl)
        p_y += i_b * l * h * p + i_h * p
        Y: tl.constexpr = LEAVE != "end"
        Z: tl.constexpr = GATE and (Y or ADJOINT)
        i_0 = i_c * s + (s - T if ADJOINT else 0)
        ahead = s6_tokens(at, by, p_pos, i_0, l, o_p, o_2, p, n, True, Y, Z, False, RESET, WORDS, False, T)
        blocks = s // T
        if LEAVE == "end":  # no segment starts where the last one ends
            blocks = tl.where(i_c == (0 if ADJOINT else c - 1), 0, blocks)
        for _ in range(blocks):
            tokens, i_1 = ahead, i_0 - T if ADJOINT else i_0 + T
            if LEAVE == "y":
                store_state(p_S + ((i_b * tl.cdiv(l, T) + i_0 // T) * h + i_h) * PN, o_pn, b_h, m_pn & (o_pn < tl.where(i_0 < kept, PN, 0)), N2)
            deltas, us, ys, b_sum = (), (), (), tl.zeros((BP,), tl.float32)
            for j in tl.static_range(T):
                b_delta, b_x = softplus(number(tokens[j][0], o_p, False) + b_bias), number(tokens[j][1], o_p, False)
                b_u = b_x * (silu(number(tokens[j][4], o_p, False)) if GATE else 1.) if ADJOINT else b_x * b_delta
                deltas, us = deltas + (b_delta,), us + (b_u,)
            ahead = s6_tokens(at, by, p_pos, i_1, l, o_p, o_2, p, n, True, Y, Z, False, RESET, WORDS, False, T)
            for j in tl.static_range(T - 1 if ADJOINT else 0, -1 if ADJOINT else T, -1 if ADJOINT else 1):
                if ADJOINT:
                    b_h = decay(add(b_h, us[j], pairs(tokens[j][2], WORDS)), deltas[j], b_A, tokens[j][6], RESET)
                else:
                    b_h = add(decay(b_h, deltas[j], b_A, tokens[j][6], RESET), us[j], pairs(tokens[j][2], WORDS))
                if Y:
                    ys = ys + (dot(b_h, pairs(tokens[j][3], WORDS)),)
                else:
                    b_sum += deltas[j]
                    if RESET:
                        b_pos = tl.minimum(b_pos, tokens[j][6])
            if Y:
                for j in tl.static_range(T):
                    b_y = ys[j] + b_D * number(tokens[j][1], o_p, False)
                    if GATE:
                        b_y *= silu(number(tokens[j][4], o_p, False))
                    tl.store(p_y + i_0 * (h * p) + j * (h * p) + o_p, b_y, mask=o_p < tl.where(i_0 + j < l, p, 0))
            i_0, b_total = i_1, b_total + b_sum[:, None]
        if LEAVE == "end":
            store_state(p_ends + i_bch * PN, o_pn, b_h, m_pn, N2)
            b_decay = tl.exp2(exponent(b_total, b_A[0], b_pos, RESET)), tl.exp2(exponent(b_total, b_A[1], b_pos, RESET))
            store_state(p_decays + i_bch * PN, o_pn, b_decay, m_pn, N2)
        elif i_c == c - 1:
            store_matrix(p_h + (i_b * h + i_h) * (p * n), o_h, b_h, m_h)

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

    @triton.jit(do_not_specialize=LENGTHS + ["b"])
    def s6_backward_kernel(p_x, p_dt, p_A, p_B, p_C, p_D, p_z, p_bias, p_pos, p_dy, p_dh, p_S, p_ends, p_decays,
                           p_dx, p_ddt, p_dB, p_dC, p_dz, p_dh0, p_sums, l, c, s, b, s_xb, s_tb, s_Bb, s_Cb, s_zb, s_yb,
                           s_xl: tl.constexpr, s_xh: tl.constexpr, s_tl: tl.constexpr, s_th: tl.constexpr, s_Bl: tl.constexpr, s_Bh: tl.constexpr,
                           s_Cl: tl.constexpr, s_Ch: tl.constexpr, s_zl: tl.constexpr, s_zh: tl.constexpr, s_yl: tl.constexpr, s_yh: tl.constexpr,
                           h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                           START: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr, WORDS: tl.constexpr,
                           T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba, one block of channels of one head from the last token of a segment to its first, b_g the adjoint of the state: from dh
        (if START) and the adjoint's ends of the segments behind this one. K = T / 2 tokens at a time: the states between them are
        computed again from S, held in registers, and taken backwards. Left to the caller: the sums of dB, dC (⌈p/BP⌉, b, l, h, n) over
        blocks of channels, of dx (b, l, h, p) and dB over a group, and of dA, dD, dbias, side by side in sums (b, c, h, p, n + 2), over
        batch and segments."""
        i_bch, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        N2: tl.constexpr = (n + 1) // 2
        PN: tl.constexpr = p * 2 * N2
        K: tl.constexpr = T // 2
        o_p, o_n, o_2n = i_p * BP + tl.arange(0, BP), tl.arange(0, BN // 2)[None, :], tl.arange(0, BN)[None, :]
        m_p, o_2, o_h, m_h = o_p < p, 0 * o_p[:, None] + o_n, o_p[:, None] * n + o_2n, (o_p < p)[:, None] & (o_2n < n)
        o_pn, m_pn = o_p[:, None] * (2 * N2) + o_n, m_p[:, None] & (o_n < N2)
        b_A = read_state(p_A + i_h * PN, o_pn, m_pn, N2)
        b_A, b_dA = (b_A[0] * LOG2E, b_A[1] * LOG2E), (tl.zeros((BP, BN // 2), tl.float32), tl.zeros((BP, BN // 2), tl.float32))
        b_g = read_matrix(p_dh + (i_b * h + i_h) * (p * n), o_h, m_h, START)
        for k in range(c - 1 - i_c):
            o_k = ((i_b * c + c - 1 - k) * h + i_h) * PN
            b_g = join(b_g, p_ends + o_k, p_decays + o_k, o_pn, m_pn, N2)
        b_D = tl.load(p_D + i_h * p + o_p, mask=m_p, other=0.) if SKIP else tl.zeros((BP,), tl.float32)
        b_bias = tl.load(p_bias + i_h * p + o_p, mask=m_p, other=0.) if BIAS else tl.zeros((BP,), tl.float32)
        b_dD = dot(b_dA, b_A)  # zeros, in the layout of a sum over n: in another x, z and dy would be read twice
        b_dbias = b_dD
        p_x += i_b * s_xb + i_h // rx * s_xh
        p_dt += i_b * s_tb + i_h * s_th
        p_B += i_b * s_Bb + i_h // rb * s_Bh
        p_C += i_b * s_Cb + i_h * s_Ch
        p_z += i_b * s_zb + i_h * s_zh
        p_dy += i_b * s_yb + i_h * s_yh
        p_pos += i_b * l
        at, by = (p_dt, p_x, p_B, p_C, p_z, p_dy), (s_tl, s_xl, s_Bl, s_Cl, s_zl, s_yl)
        p_S += (i_b * tl.cdiv(l, T) * h + i_h) * PN
        o_y, o_bc = i_b * l * h * p + i_h * p + o_p, (i_p * b + i_b) * l * h * n + i_h * n
        i_0 = i_c * s + s - K
        ahead = s6_tokens(at, by, p_pos, i_0, l, o_p, o_2, p, n, True, False, False, False, RESET, WORDS, True, K)
        state = read_state(p_S + i_0 // T * (h * PN), o_pn, m_pn & (o_pn < tl.where(i_0 // T * T < l, PN, 0)), N2)
        for _ in range(s // K):
            b_h, tokens, i_1, i_S = state, ahead, i_0 - K, tl.maximum(i_0 - K, 0) // T
            ahead = s6_tokens(at, by, p_pos, i_1, l, o_p, o_2, p, n, True, False, False, False, RESET, WORDS, True, K)
            state = read_state(p_S + i_S * (h * PN), o_pn, m_pn & (o_pn < tl.where(i_S * T < l, PN, 0)), N2)
            # (not a turn ahead: the registers are full)
            more = s6_tokens(at, by, p_pos, i_0, l, o_p, o_2, p, n, False, True, GATE, True, RESET, WORDS, True, K)
            if i_0 % T > 0:  # the upper half of its T tokens: S holds the state before the lower half, which `ahead` is
                for j in tl.static_range(K):
                    b_delta, b_x = softplus(number(ahead[j][0], o_p, WORDS) + b_bias), number(ahead[j][1], o_p, WORDS)
                    b_h = add(decay(b_h, b_delta, b_A, ahead[j][6], RESET), b_delta * b_x, pairs(ahead[j][2], WORDS))
            states, deltas = (), ()  # states[j] is h before token j
            for j in tl.static_range(K):
                b_delta, b_x = softplus(number(tokens[j][0], o_p, WORDS) + b_bias), number(tokens[j][1], o_p, WORDS)
                states, deltas = states + (b_h,), deltas + (b_delta,)
                b_h = add(decay(b_h, b_delta, b_A, tokens[j][6], RESET), b_delta * b_x, pairs(tokens[j][2], WORDS))
            for j in tl.static_range(K - 1, -1, -1):
                b_x, b_dy, b_delta = number(tokens[j][1], o_p, WORDS), number(more[j][5], o_p, WORDS), deltas[j]
                b_B, b_C = pairs(tokens[j][2], WORDS), pairs(more[j][3], WORDS)
                m, o_bct = i_0 + j < l, o_bc + i_0 * (h * n) + j * (h * n)
                o_yt, m_pt = o_y + i_0 * (h * p) + j * (h * p), o_p < tl.where(m, p, 0)
                if GATE:
                    b_z = number(more[j][4], o_p, WORDS)
                    tl.store(p_dz + o_yt, b_dy * (dot(b_h, b_C) + b_D * b_x) * silu_slope(b_z), mask=m_pt)
                    b_dy *= silu(b_z)
                b_u = b_delta * b_x
                b_g = add(b_g, b_dy, b_C)
                b_gB = dot(b_g, b_B)                                    # adjoint of the written value Δ x
                store_sum(p_dB + o_bct, b_g[0] * b_u[:, None], b_g[1] * b_u[:, None], m, n)
                store_sum(p_dC + o_bct, b_h[0] * b_dy[:, None], b_h[1] * b_dy[:, None], m, n)
                b_h, b_g = states[j], decay(b_g, b_delta, b_A, tokens[j][6], RESET)
                b_a = b_g[0] * b_h[0], b_g[1] * b_h[1]                  # adjoint of the exponent Δ A
                b_dA = add(b_dA, b_delta, b_a)
                b_ddt = (b_gB * b_x + dot(b_a, b_A) / LOG2E) * sigmoid(number(tokens[j][0], o_p, WORDS) + b_bias)
                b_dD, b_dbias = b_dD + b_dy * b_x, b_dbias + b_ddt
                tl.store(p_dx + o_yt, b_gB * b_delta + b_dy * b_D, mask=m_pt)
                tl.store(p_ddt + o_yt, b_ddt, mask=m_pt)
            i_0 = i_1
        if i_c == 0:
            store_matrix(p_dh0 + (i_b * h + i_h) * (p * n), o_h, b_g, m_h)
        p_sums += i_bch * p * (n + 2)
        store_matrix(p_sums, o_p[:, None] * (n + 2) + o_2n, b_dA, m_h)
        tl.store(p_sums + o_p * (n + 2) + n, b_dD, mask=m_p)
        tl.store(p_sums + o_p * (n + 2) + n + 1, b_dbias, mask=m_p)

    @triton.jit
    def tile(ptr, s_row, o_row, o_col, n_row, n_col, DOT: tl.constexpr):
        """Load a tile in the type the dots take, zero from row n_row and column n_col on."""
        m = (o_row < n_row)[:, None] & (o_col < n_col)[None, :]
        return tl.load(ptr + o_row[:, None] * s_row + o_col[None, :], mask=m, other=0.).to(DOT)

    @triton.jit(do_not_specialize=LENGTHS)
    def ssd_walk_kernel(p_u, p_delta, p_s, p_v, p_C, p_D, p_h0, p_y, p_h, p_S, p_ends, p_decays, l, c, s, s_ub, s_vb, s_Cb,
                        s_ul: tl.constexpr, s_uh: tl.constexpr, s_vl: tl.constexpr, s_vh: tl.constexpr,
                        s_Cl: tl.constexpr, s_Ch: tl.constexpr, h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                        LEAVE: tl.constexpr, ADJOINT: tl.constexpr, START: tl.constexpr, SKIP: tl.constexpr,
                        DOT: tl.constexpr, PREC: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba-2, one block of channels of one head through one segment of s tokens, tile after tile of T, the state (n, p):

            h ← decay over the tile · h + Σ_t w_t v_t ⊗ u_t       u = x, v = B, w = Δ × the decay from t to the tile's end
            y = (decay ∘ C Bᵀ) (Δ x) + decay since the tile's start ∘ C h

        Leaves the "end" (as Mamba's: ends (b, c, h, n, p), decays (b, c, h)), "y" (y and, in h, the last state) or "states" (h and
        S (b, ⌈l/T⌉, h, n, p), the state before every tile). h0 and h lie as (p, n). The ADJOINT walks from the last tile to the first
        with u = dy, v = C, w = the decay from the tile's start to t."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_i, o_p, o_n = tl.arange(0, T), tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
        m_np, o_pn, o_np = (o_n < n)[:, None] & (o_p < p)[None, :], o_p[None, :] * n + o_n[:, None], o_n[:, None] * p + o_p[None, :]
        b_h, b_sum = tl.load(p_h0 + (i_b * h + i_h) * p * n + o_pn, mask=m_np, other=0.) if START else tl.zeros((BN, BP), tl.float32), 0.
        if LEAVE != "end":
            for k in range(c - 1 - i_c if ADJOINT else i_c):
                i_k = (i_b * c + (c - 1 - k if ADJOINT else k)) * h + i_h
                b_h = tl.load(p_decays + i_k) * b_h + tl.load(p_ends + i_k * p * n + o_np, mask=m_np, other=0.)
        b_D = tl.load(p_D + i_h) if SKIP else 0.
        p_u += i_b * s_ub + i_h // rx * s_uh
        p_v += i_b * s_vb + i_h // rb * s_vh
        p_C += i_b * s_Cb + i_h * s_Ch
        for k in range(s // T):
            i_0 = i_c * s + (s - T - k * T if ADJOINT else k * T)
            b_u = tile(p_u + i_0 * s_ul, s_ul, o_i, o_p, l - i_0, p, DOT)               # (T, BP)
            b_v = tl.trans(tile(p_v + i_0 * s_vl, s_vl, o_i, o_n, l - i_0, n, DOT))     # (BN, T)
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
                tl.store(p_S + o_S + o_np, b_h, mask=(o_n < tl.where(i_0 < l, n, 0))[:, None] & (o_p < p)[None, :])
            b_sum += b_end.to(tl.float32)
            b_w = b_since if ADJOINT else tl.exp2((b_end - b_s).to(tl.float32)) * b_delta
            b_h = b_h * tl.exp2(b_end.to(tl.float32)) + tl.dot(b_v, (b_u.to(tl.float32) * b_w[:, None]).to(DOT), input_precision=PREC)
        if LEAVE == "end":
            tl.store(p_ends + i_bch * p * n + o_np, b_h, mask=m_np)
            tl.store(p_decays + i_bch, tl.exp2(b_sum))
        elif i_c == (0 if ADJOINT else c - 1):
            tl.store(p_h + (i_b * h + i_h) * p * n + o_pn, b_h, mask=m_np)

    @triton.jit(do_not_specialize=["l", "tokens"])
    def ssd_backward_kernel(p_x, p_delta, p_s, p_A, p_B, p_C, p_D, p_pos, p_dy, p_S, p_G, p_dx, p_ddt, p_dB, p_dC, p_sums,
                            l, tokens, s_xb, s_Bb, s_Cb, s_yb,
                            s_xl: tl.constexpr, s_xh: tl.constexpr, s_Bl: tl.constexpr, s_Bh: tl.constexpr,
                            s_Cl: tl.constexpr, s_Ch: tl.constexpr, s_yl: tl.constexpr, s_yh: tl.constexpr,
                            h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                            SKIP: tl.constexpr, RESET: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
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
        l -= i_0  # what is left of the sequence (l + i_0 is its length)
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
        if RESET:  # no decay: what b_ds holds there is sums that cancel, up to their rounding
            b_da = tl.where(tl.load(p_pos + i_b * (l + i_0) + i_0 + o_i, mask=o_i < l, other=1) == 0, 0., b_da)
        b_ddt = (b_ux + b_give + b_da * tl.load(p_A + i_h)) * slope(b_delta)
        tl.store(p_ddt + o_0 + o_i * h, b_ddt, mask=o_i < l)
        p_sums += (i_b * c + i_c) * 3 * h + i_h
        tl.store(p_sums, tl.sum(b_da * b_delta, axis=0))
        tl.store(p_sums + h, b_dD)
        tl.store(p_sums + 2 * h, tl.sum(b_ddt, axis=0))

    @triton.jit
    def conv_block(p_w, p_bias, s_xh: tl.constexpr, g: tl.constexpr, p: tl.constexpr, r: tl.constexpr,
                   BIAS: tl.constexpr, W: tl.constexpr, R: tl.constexpr, BP: tl.constexpr):
        """What a program works on: a segment, and of x's g·p channels BP side by side, whatever p is, with the r query heads that
        share them: batch and segment; offsets (R, BP) in a token of x, of a contiguous x and of y; the mask of the channels and the
        number of the row, below r where there is a head; bias and the W weights."""
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
    def conv_pos(p_pos, i_0, first, end, RESET: tl.constexpr, N: tl.constexpr):
        """A tuple of the pos of the N tokens from i_0 on, where p_pos points, if RESET; before `first` and from `end` on there is none."""
        poss = ()
        for j in tl.static_range(N):
            poss = poss + (tl.load(p_pos + j, mask=(i_0 + j >= first) & (i_0 + j < end), other=0) if RESET else 0,)
        return poss

    @triton.jit
    def seen(b, b_pos, lag: tl.constexpr, RESET: tl.constexpr):
        """b, or with RESET zeros where the token `lag` before that of b_pos is none of its document."""
        return tl.where(b_pos >= lag, b, 0.) if RESET and lag > 0 else b

    @triton.jit
    def conv_sum(xs, j: tl.constexpr, ws, b_bias, b_pos, RESET: tl.constexpr, W: tl.constexpr):
        """bias + Σ_k weight_k xs_{j+k}, of the document of the last of them, whose pos is given."""
        for k in tl.static_range(W):
            b_bias += ws[k] * seen(xs[j + k], b_pos, W - 1 - k, RESET)
        return b_bias

    @triton.jit(do_not_specialize=LENGTHS + ["skip"])
    def conv_kernel(p_x, p_w, p_bias, p_pos, p_y, l, skip, c, s, s_xb, s_xl: tl.constexpr, s_xh: tl.constexpr, g: tl.constexpr, p: tl.constexpr,
                    r: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr, W: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BP: tl.constexpr):
        """y_t = silu(bias + Σ_k weight_k x_{t-W+1+k}) for all l tokens of x but the first `skip`: one block of channels along a
        segment of s tokens, U at a time, the W - 1 inputs before them in registers. With RESET x_{t-j} counts where pos_t ≥ j."""
        i_bc, o_x, _, o_y, m_o, i_r, b_bias, ws = conv_block(p_w, p_bias, s_xh, g, p, r, BIAS, W, R, BP)
        h, i_b, i_0 = g * r, (i_bc // c).to(tl.int64), i_bc % c * s + skip
        p_x, p_y = p_x + i_b * s_xb + i_0.to(tl.int64) * s_xl, p_y + (i_b * (l - skip) + i_0 - skip) * (h * p)
        p_pos += i_b * (l - skip) + i_0 - skip
        xs = conv_read(p_x - (W - 1) * s_xl, o_x, m_o, i_r, r, s_xl, i_0 - (W - 1), 0, l, W - 1)
        for _ in range(tl.cdiv(tl.minimum(s, l - i_0), U)):
            xs, poss = xs + conv_read(p_x, o_x, m_o, i_r, r, s_xl, i_0, 0, l, U), conv_pos(p_pos, i_0, skip, l, RESET, U)
            for j in tl.static_range(U):
                b_y = silu(conv_sum(xs, j, ws, b_bias, poss[j], RESET, W))
                tl.store(p_y + j * (h * p) + o_y, b_y, mask=m_o & (i_r < tl.where(i_0 + j < l, r, 0)))
            xs, i_0, p_x, p_y, p_pos = xs[U:], i_0 + U, p_x + U * s_xl, p_y + U * (h * p), p_pos + U

    @triton.jit(do_not_specialize=LENGTHS + ["skip"])
    def conv_backward_kernel(p_x, p_w, p_bias, p_pos, p_dy, p_dx, p_dw, l, skip, c, s, s_xb, s_xl: tl.constexpr, s_xh: tl.constexpr,
                             g: tl.constexpr, p: tl.constexpr, r: tl.constexpr,
                             BIAS: tl.constexpr, RESET: tl.constexpr, W: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BP: tl.constexpr):
        """With e_t = dy_t silu'(bias + Σ_k weight_k x_{t-W+1+k}), 0 where there is no y_t:  dx_t = Σ_k weight_k e_{t+W-1-k}, summed
        over the r query heads; dw_k = Σ_t x_t e_{t+W-1-k} and dbias = Σ_t e_t, left per segment in dw (b, c, W + 1, h, p).
        For token t the W inputs and the W values of e from t on are in registers. With RESET e_{t+j} counts where pos_{t+j} ≥ j."""
        i_bc, o_x, o, o_y, m_o, i_r, b_bias, ws = conv_block(p_w, p_bias, s_xh, g, p, r, BIAS, W, R, BP)
        h, i_b, i_0 = g * r, (i_bc // c).to(tl.int64), i_bc % c * s
        p_x, p_dx = p_x + i_b * s_xb + i_0.to(tl.int64) * s_xl, p_dx + (i_b * l + i_0) * (g * p)
        p_dy += (i_b * (l - skip) + i_0 - skip) * (h * p)
        p_pos += i_b * (l - skip) + i_0 - skip
        xs = conv_read(p_x - (W - 1) * s_xl, o_x, m_o, i_r, r, s_xl, i_0 - (W - 1), 0, l, 2 * (W - 1))
        dys = conv_read(p_dy, o_y, m_o, i_r, r, h * p, i_0, skip, l, W - 1)
        es, dws, first = (), (), conv_pos(p_pos, i_0, skip, l, RESET, W - 1)
        for j in tl.static_range(W - 1):
            es = es + (dys[j] * silu_slope(conv_sum(xs, j, ws, b_bias, first[j], RESET, W)),)
        for _ in tl.static_range(W + 1):
            dws = dws + (tl.zeros((R, BP), tl.float32),)
        xs = xs[W - 1:]
        for _ in range(tl.cdiv(tl.minimum(s, l - i_0), U)):
            xs = xs + conv_read(p_x + (W - 1) * s_xl, o_x, m_o, i_r, r, s_xl, i_0 + W - 1, 0, l, U)
            more = conv_read(p_dy + (W - 1) * (h * p), o_y, m_o, i_r, r, h * p, i_0 + W - 1, skip, l, U)
            poss = conv_pos(p_pos, i_0, skip, l, RESET, U + W - 1)
            for j in tl.static_range(U):
                es = es + (more[j] * silu_slope(conv_sum(xs, j, ws, b_bias, poss[j + W - 1], RESET, W)),)
                b_dx, sums = tl.zeros((R, BP), tl.float32), ()
                for k in tl.static_range(W):
                    b_e = seen(es[j + W - 1 - k], poss[j + W - 1 - k], W - 1 - k, RESET)
                    b_dx += ws[k] * b_e
                    sums = sums + (dws[k] + xs[j] * b_e,)
                dws = sums + (dws[W] + es[j],)
                b_dx = tl.sum(b_dx, axis=0, keep_dims=True) + tl.zeros((R, BP), tl.float32)  # (R, BP) again: a layout that is stored as it is
                tl.store(p_dx + j * (g * p) + o, b_dx, mask=m_o & (i_r < tl.where(i_0 + j < l, 1, 0)))
            xs, es, i_0, p_pos = xs[U:], es[U:], i_0 + U, p_pos + U
            p_x, p_dy, p_dx = p_x + U * s_xl, p_dy + U * (h * p), p_dx + U * (g * p)
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

    # Training

    @triton.jit(do_not_specialize=["rows", "T"])
    def rms_backward_kernel(p_x, p_w, p_dy, p_onto, p_dx, p_dw, rows, T, eps, d: tl.constexpr, ONTO: tl.constexpr, DX: tl.constexpr,
                            DW: tl.constexpr, BD: tl.constexpr):
        """rms_kernel's gradient, T rows to a program: with u = x / √(mean x² + eps) and e = dy ∘ weight, dx = (e - u mean(e ∘ u)) /
        √(mean x² + eps), with ONTO plus `onto`; dweight = Σ dy ∘ u is left per T rows. dx may be written over dy."""
        o, i_0 = tl.arange(0, BD), tl.program_id(0) * T
        o_x, b_w, b_dw = i_0.to(tl.int64) * d + o, tl.load(p_w + o, mask=o < d, other=0.).to(tl.float32), tl.zeros((BD,), tl.float32)
        for _ in range(tl.minimum(T, rows - i_0)):
            b_x, b_dy = tl.load(p_x + o_x, mask=o < d, other=0.).to(tl.float32), tl.load(p_dy + o_x, mask=o < d, other=0.).to(tl.float32)
            b_e, b_scale = b_dy * b_w, tl.rsqrt(tl.sum(b_x * b_x, axis=0) / d + eps)
            b_u = b_x * b_scale
            if DX:
                b_dx = (b_e - b_u * (tl.sum(b_e * b_u, axis=0) / d)) * b_scale
                if ONTO:
                    b_dx += tl.load(p_onto + o_x, mask=o < d, other=0.).to(tl.float32)
                tl.store(p_dx + o_x, b_dx, mask=o < d)
            b_dw += b_dy * b_u
            o_x += d
        if DW:
            tl.store(p_dw + tl.program_id(0).to(tl.int64) * d + o, b_dw, mask=o < d)

    @triton.jit(do_not_specialize=["rows"])
    def swiglu_kernel(p_g, p_u, p_y, rows, n: tl.constexpr, GRADIENT: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr):
        """y = silu(g) ∘ u of rows of n, which lie one after the other. The GRADIENT reads y as dy, writes dg over g and du over u, and with
        PRODUCT y over dy."""
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m = o < rows.to(tl.int64) * n  # n, a constant, lets the compiler see whole vectors in it
        b_g, b_u = tl.load(p_g + o, mask=m, other=0.).to(tl.float32), tl.load(p_u + o, mask=m, other=0.).to(tl.float32)
        if GRADIENT:
            b_dy = tl.load(p_y + o, mask=m, other=0.).to(tl.float32)
            tl.store(p_g + o, b_dy * b_u * silu_slope(b_g), mask=m)
            tl.store(p_u + o, b_dy * silu(b_g), mask=m)
        if PRODUCT:
            tl.store(p_y + o, silu(b_g) * b_u, mask=m)

    @triton.jit(do_not_specialize=["l"])
    def rotate_kernel(p_q, p_cos, p_sin, p_y, l, s_qb, s_tb, s_ql: tl.constexpr, s_qh: tl.constexpr, h: tl.constexpr, half: tl.constexpr,
                      BACK: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr):
        """BH heads of one token, turned by RoPE or turned BACK."""
        blocks: tl.constexpr = (h + BH - 1) // BH
        i, o_h, o_p = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BH + tl.arange(0, BH)[:, None], tl.arange(0, BP)[None, :]
        i_b, i_t, m = (i // l).to(tl.int64), (i % l).to(tl.int64), (o_h < h) & (o_p < half)
        o_turn = i_b * s_tb + i_t * half + o_p
        b_cos, b_sin = tl.load(p_cos + o_turn, mask=o_p < half, other=0.), tl.load(p_sin + o_turn, mask=o_p < half, other=0.)
        b_1, b_2 = turned(p_q, i_b * s_qb + i_t * s_ql + o_h * s_qh + o_p, m, b_cos, -b_sin if BACK else b_sin, half)
        p_y += (i.to(tl.int64) * h + o_h) * (2 * half) + o_p
        tl.store(p_y, b_1, mask=m)
        tl.store(p_y + half, b_2, mask=m)

    @triton.jit
    def power(b, b_most, scale):
        """2^((b - most) scale), 0 where b is -∞."""
        return tl.exp2(b * scale - (b_most * scale)[:, None])

    @triton.jit
    def weighed(b_weight, b):
        """weight ∘ b, where nothing weighs nothing, also of an infinity."""
        return tl.where(b_weight > 0, b_weight * b, 0.)

    @triton.jit
    def log2_sum(b_most, b_sum, scale):
        """log2 Σ 2^(most scale) sum, over threads."""
        most = tl.max(b_most, axis=0) * scale
        return most + tl.log2(tl.sum(b_sum * tl.exp2(b_most * scale - most), axis=0))

    @triton.jit
    def losses_kernel(p_x, p_w, p_at, p_alpha, p_beta, p_ce, p_kl, tau, s_x: tl.constexpr, s_w: tl.constexpr, v: tl.constexpr, TEACHER: tl.constexpr,
                      HOT: tl.constexpr, REVERSE: tl.constexpr, GRADIENT: tl.constexpr, PULL: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr):
        """token_losses of one row of logits x, and of a TEACHER's w: LANES × K numbers at a time, K of them side by side in a thread, which has
        its own running sums, so that threads meet only at the end. HOT: τ is not 1. PULL: the gradient is that of the KL as well. All in log2."""
        i, o, scale = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)[:, None] * K + tl.arange(0, K)[None, :], LOG2E / tau
        at, p_x, p_w = tl.load(p_at + i).to(tl.int32), p_x + i * s_x, p_w + i * s_w
        ce, kl, blocks = 0., 0., (v + LANES * K - 1) // (LANES * K)
        if at < 0:
            if GRADIENT:
                for i_v in range(0, v, LANES * K):
                    tl.store(p_x + i_v + o, tl.zeros((LANES, K), tl.float32), mask=i_v + o < v)
        else:
            b_mx, b_sx, x_at = tl.full((LANES,), -1e30, tl.float32), tl.zeros((LANES,), tl.float32), tl.load(p_x + at).to(tl.float32)
            b_mw, b_sw, b_s1, b_kl = b_mx, b_sx, b_sx, b_sx
            for i_v in range(0, v, LANES * K):
                b_x = tl.load(p_x + i_v + o, mask=i_v + o < v, other=-float("inf")).to(tl.float32)
                b_new = tl.maximum(b_mx, tl.max(b_x, axis=1))
                b_e, b_fade = power(b_x, b_new, scale), tl.exp2((b_mx - b_new) * scale)
                b_sx = b_sx * b_fade + tl.sum(b_e, axis=1)
                if HOT:
                    b_s1 = b_s1 * tl.exp2((b_mx - b_new) * LOG2E) + tl.sum(power(b_x, b_new, LOG2E), axis=1)
                b_mx = b_new
                if TEACHER:
                    b_w = tl.load(p_w + i_v + o, mask=i_v + o < v, other=-float("inf")).to(tl.float32)
                    b_new = tl.maximum(b_mw, tl.max(b_w, axis=1))
                    b_ew, b_fade_w = power(b_w, b_new, scale), tl.exp2((b_mw - b_new) * scale)
                    b_mw, b_sw = b_new, b_sw * b_fade_w + tl.sum(b_ew, axis=1)
                    if REVERSE:
                        b_kl = weighed(b_fade, b_kl) + tl.sum(weighed(b_e, b_x - b_w), axis=1)
                    else:
                        b_kl = weighed(b_fade_w, b_kl) + tl.sum(weighed(b_ew, b_w - b_x), axis=1)
            lse = log2_sum(b_mx, b_sx, scale)
            lse_1, lse_w = log2_sum(b_mx, b_s1, LOG2E) if HOT else lse, log2_sum(b_mw, b_sw, scale) if TEACHER else lse
            ce = lse_1 / LOG2E - x_at
            if TEACHER:
                if REVERSE:
                    kl = tl.sum(weighed(tl.exp2(b_mx * scale - lse), b_kl), axis=0) * scale + lse_w - lse
                else:
                    kl = tl.sum(weighed(tl.exp2(b_mw * scale - lse_w), b_kl), axis=0) * scale + lse - lse_w
            if GRADIENT:
                alpha = tl.load(p_alpha + i).to(tl.float32)
                beta = tl.load(p_beta + i).to(tl.float32) * tau if PULL else 0.
                for i_b in range(blocks):
                    i_v = (blocks - 1 - i_b) * (LANES * K)  # from the end, which a cache may hold still
                    b_x = tl.load(p_x + i_v + o, mask=i_v + o < v, other=0.).to(tl.float32)
                    b_q = tl.exp2(b_x * scale - lse)
                    b_dx = alpha * ((tl.exp2(b_x * LOG2E - lse_1) if HOT else b_q) - tl.where(i_v + o == at, 1., 0.))
                    if PULL:
                        b_w = tl.load(p_w + i_v + o, mask=i_v + o < v, other=0.).to(tl.float32)
                        if REVERSE:
                            b_dx += beta * weighed(b_q, ((b_x - b_w) * scale + lse_w - lse - kl) / LOG2E)
                        else:
                            b_dx += beta * (b_q - tl.exp2(b_w * scale - lse_w))
                    tl.store(p_x + i_v + o, b_dx, mask=i_v + o < v)
        tl.store(p_ce + i, ce)
        tl.store(p_kl + i, kl / LOG2E * tau * tau)

    # Decoding: l ≤ FEW tokens a row, which follow what a cache holds. What a row computes does not depend on what the other rows hold, nor
    # on how many tokens come at once: the same products in the same order, so that reading five tokens gives the bits of reading them one by
    # one. (A batch of another size may cut attention's keys in other pieces.)

    @triton.jit
    def rms_kernel(p_x, p_w, p_y, eps, d: tl.constexpr, BD: tl.constexpr):
        """y = x / √(mean x² + eps) ∘ weight of one row."""
        o = tl.arange(0, BD)
        o_x = tl.program_id(0).to(tl.int64) * d + o
        b_w = tl.load(p_w + o, mask=o < d, other=0.).to(tl.float32)
        b_x = tl.load(p_x + o_x, mask=o < d, other=0.).to(tl.float32)
        tl.store(p_y + o_x, b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / d + eps) * b_w, mask=o < d)

    @triton.jit(do_not_specialize=["rows"])
    def linear_kernel(p_x, p_w, p_v, p_u, p_y, rows, s_x: tl.constexpr, n: tl.constexpr, k: tl.constexpr, GATE: tl.constexpr, ONTO: tl.constexpr,
                      PREC: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        """y (rows, n) = x Wᵀ, or with GATE silu(x Wᵀ) ∘ x Vᵀ, or with ONTO u + x Wᵀ: BN columns for M rows. The weights stream past once for every 64 rows."""
        o_m, o_n, o_k = (tl.program_id(0) * M + tl.arange(0, M)[None, :]).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)[:, None], tl.arange(0, BK)
        o_w = o_n.to(tl.int64) * k + o_k[None, :]
        b_y, b_v = tl.zeros((BN, M), tl.float32), tl.zeros((BN, M), tl.float32)
        for i_k in range(0, k, BK):
            b_x = tl.load(p_x + o_m * s_x + (i_k + o_k)[:, None], mask=(o_m < rows) & (i_k + o_k < k)[:, None], other=0.)
            m_w = (o_n < n) & (i_k + o_k < k)[None, :]
            b_y = tl.dot(tl.load(p_w + o_w + i_k, mask=m_w, other=0.), b_x, b_y, input_precision=PREC)
            if GATE:
                b_v = tl.dot(tl.load(p_v + o_w + i_k, mask=m_w, other=0.), b_x, b_v, input_precision=PREC)
        m_y = (o_m < rows) & (o_n < n)
        if GATE:
            b_y = silu(b_y) * b_v
        if ONTO:
            b_y += tl.load(p_u + o_m * n + o_n, mask=m_y, other=0.).to(tl.float32)
        tl.store(p_y + o_m * n + o_n, b_y, mask=m_y)

    @triton.jit
    def turned(ptr, o, m, b_cos, b_sin, half: tl.constexpr):
        """The halves of a key or query at ptr + o, turned by RoPE, in their own type."""
        b_1, b_2 = tl.load(ptr + o, mask=m, other=0.).to(tl.float32), tl.load(ptr + o + half, mask=m, other=0.).to(tl.float32)
        kind = ptr.dtype.element_ty
        return (b_1 * b_cos - b_2 * b_sin).to(kind), (b_2 * b_cos + b_1 * b_sin).to(kind)

    @triton.jit(do_not_specialize=["l", "size"])
    def attend_kernel(p_q, p_k, p_v, p_cos, p_sin, p_at, p_keys, p_values, p_lse, p_y, scale, l, size, s_q: tl.constexpr, s_k: tl.constexpr,
                      s_v: tl.constexpr, g: tl.constexpr, r: tl.constexpr, p: tl.constexpr, PREC: tl.constexpr, R: tl.constexpr,
                      SPLIT: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr):
        """One piece of SPLIT keys, for the r query heads of one kv head and 16 / R tokens: its part of y, and the log2 of its weight. First
        it writes what the l new tokens leave in that piece: their keys, turned, and values (whoever shares the piece writes the same)."""
        tiles, half, TOKENS = tl.cdiv(l, 16 // R), p // 2, 16 // R
        i_t, i_bg, i_s = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
        i_b, i_g, first = (i_bg // g).to(tl.int64), i_bg % g, i_s * SPLIT
        at = tl.load(p_at + i_b).to(tl.int32)
        if first < at + l:
            o_h, o_p, p_keys, p_values = tl.arange(0, BH), tl.arange(0, 2 * BH), p_keys + i_bg.to(tl.int64) * size * p, p_values + i_bg.to(tl.int64) * size * p
            o_i = tl.arange(0, 16)
            if at < first + SPLIT:
                m_i = (o_i < l) & (at + o_i >= first) & (at + o_i < first + SPLIT)
                m, o_turn = m_i[:, None] & (o_h < half)[None, :], (i_b * l + o_i[:, None]) * half + o_h[None, :]
                b_cos, b_sin = tl.load(p_cos + o_turn, mask=m, other=0.), tl.load(p_sin + o_turn, mask=m, other=0.)
                b_1, b_2 = turned(p_k, (i_b * l + o_i[:, None]) * s_k + i_g * p + o_h[None, :], m, b_cos, b_sin, half)
                p_new = p_keys + (at + o_i)[:, None] * p
                tl.store(p_new + o_h[None, :], b_1, mask=m)
                tl.store(p_new + half + o_h[None, :], b_2, mask=m)
                m = m_i[:, None] & (o_p < p)[None, :]
                b_v = tl.load(p_v + (i_b * l + o_i[:, None]) * s_v + i_g * p + o_p[None, :], mask=m, other=0.)
                tl.store(p_values + (at + o_i)[:, None] * p + o_p[None, :], b_v, mask=m)
                tl.debug_barrier()
            o_t, o_r = i_t * TOKENS + o_i // R, o_i % R
            m_q = (o_t < l) & (o_r < r)
            m, o_turn = m_q[:, None] & (o_h < half)[None, :], (i_b * l + o_t[:, None]) * half + o_h[None, :]
            b_cos, b_sin = tl.load(p_cos + o_turn, mask=m, other=0.), tl.load(p_sin + o_turn, mask=m, other=0.)
            b_q1, b_q2 = turned(p_q, (i_b * l + o_t[:, None]) * s_q + (i_g * r + o_r)[:, None] * p + o_h[None, :], m, b_cos, b_sin, half)
            b_most, b_sum, b_y = tl.full((16,), -1e30, tl.float32), tl.zeros((16,), tl.float32), tl.zeros((16, 2 * BH), tl.float32)
            for i_k in range(first, tl.minimum(first + SPLIT, at + l), BK):
                o_k = i_k + tl.arange(0, BK)
                m_k = o_k < at + l
                m_1, p_1 = m_k[None, :] & (o_h < half)[:, None], p_keys + o_k[None, :] * p + o_h[:, None]
                b_s = tl.dot(b_q1, tl.load(p_1, mask=m_1, other=0.), input_precision=PREC)
                b_s = tl.dot(b_q2, tl.load(p_1 + half, mask=m_1, other=0.), b_s, input_precision=PREC) * scale
                b_s = tl.where(o_k[None, :] <= at + o_t[:, None], b_s, -1e30)
                b_new = tl.maximum(b_most, tl.max(b_s, axis=1))
                b_e, b_fade = tl.exp2(b_s - b_new[:, None]), tl.exp2(b_most - b_new)
                b_vk = tl.load(p_values + o_k[:, None] * p + o_p[None, :], mask=m_k[:, None] & (o_p < p)[None, :], other=0.)
                b_y = tl.dot(b_e.to(b_vk.dtype), b_vk, b_y * b_fade[:, None], input_precision=PREC)
                b_sum, b_most = b_sum * b_fade + tl.sum(b_e, axis=1), b_new
            o_part = ((i_b * l + o_t) * (g * r) + i_g * r + o_r) * tl.num_programs(1) + i_s
            tl.store(p_lse + o_part, b_most + tl.log2(b_sum), mask=m_q)
            tl.store(p_y + o_part[:, None] * p + o_p[None, :], b_y / b_sum[:, None], mask=m_q[:, None] & (o_p < p)[None, :])

    @triton.jit(do_not_specialize=["l", "splits"])
    def gather_kernel(p_lse, p_part, p_at, p_y, l, splits, h: tl.constexpr, p: tl.constexpr, SPLIT: tl.constexpr, BP: tl.constexpr):
        """y of one token and head from its pieces, 16 at a time: their mean, weighted."""
        i, o_s, o_p = tl.program_id(0).to(tl.int64), tl.arange(0, 16), tl.arange(0, BP)
        i_t = i // h
        end = (tl.load(p_at + i_t // l).to(tl.int32) + (i_t % l).to(tl.int32)) // SPLIT + 1
        b_most, b_sum, b_y = tl.full((1,), -1e30, tl.float32), tl.zeros((1,), tl.float32), tl.zeros((BP,), tl.float32)
        for i_s in range(0, end, 16):
            m_s = i_s + o_s < end
            b_lse = tl.load(p_lse + i * splits + i_s + o_s, mask=m_s, other=-1e30)
            b_new = tl.maximum(b_most, tl.max(b_lse, axis=0))
            b_e, b_fade = tl.exp2(b_lse - b_new), tl.exp2(b_most - b_new)
            b_part = tl.load(p_part + (i * splits + i_s + o_s)[:, None] * p + o_p[None, :], mask=m_s[:, None] & (o_p < p)[None, :], other=0.)
            b_y, b_sum, b_most = b_y * b_fade + tl.sum(b_e[:, None] * b_part, axis=0), b_sum * b_fade + tl.sum(b_e, axis=0), b_new
        tl.store(p_y + i * p + o_p, b_y / b_sum, mask=o_p < p)

    @triton.jit
    def inputs_of(p_log, s_log, p_new, s_new, o_t, o_c, m, at, SIZE):
        """Columns o_c of the inputs of the tokens o_t: logged before `at`, new from there on; zeros before the first."""
        b_log = tl.load(p_log + (o_t & (SIZE - 1)) * s_log + o_c, mask=m & (o_t >= 0) & (o_t < at), other=0.)
        b_new = tl.load(p_new + (o_t - at) * s_new + o_c, mask=m & (o_t >= at), other=0.)
        return b_log.to(tl.float32) + b_new.to(tl.float32)

    @triton.jit
    def into_log(p_log, s_log, p_new, s_new, o_i, o_c, m_c, at, l, SIZE, T: tl.constexpr):
        for i in range(0, l, T):
            m = (i + o_i < l) & m_c
            tl.store(p_log + ((at + i + o_i) & (SIZE - 1)) * s_log + o_c, tl.load(p_new + (i + o_i) * s_new + o_c, mask=m), mask=m)

    @triton.jit(do_not_specialize=["l", "SIZE"])
    def prepare_kernel(p_x, p_dt, p_B, l_x, l_dt, l_B, p_at, p_base, p_w, p_b, p_bias, p_s, l, SIZE, s_x: tl.constexpr, s_dt: tl.constexpr, s_B: tl.constexpr,
                       s_lx: tl.constexpr, H: tl.constexpr, G: tl.constexpr, X: tl.constexpr, r: tl.constexpr, p: tl.constexpr, W: tl.constexpr,
                       T: tl.constexpr, BC: tl.constexpr):
        """BC numbers of what each token from `base` on brings to the recurrence, in float32: a row of p_s is the X channels of the convolution,
        the H steps Δ and, for Mamba, G numbers B. The new tokens' own go into the log (l_x, l_dt, l_B). r channels share an input (Mamba)."""
        i_b, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at, base, o_i = tl.load(p_at + i_b).to(tl.int32), tl.load(p_base + i_b).to(tl.int32), tl.arange(0, T)[:, None]
        CX: tl.constexpr = (X + BC - 1) // BC
        CH: tl.constexpr = CX + (H + BC - 1) // BC
        s_s: tl.constexpr = X + H + G
        p_s += i_b * SIZE * s_s
        if i_c < CX:
            o_c = i_c * BC + tl.arange(0, BC)[None, :]
            m_c, o_x, p_x, l_x = o_c < X, o_c // (r * p) * p + o_c % p, p_x + i_b * l * s_x, l_x + i_b * SIZE * s_lx
            for i in range(base, at + l, T):
                o_t = i + o_i
                m, b = (o_t < at + l) & m_c, tl.load(p_b + o_c, mask=m_c, other=0.).to(tl.float32)
                for j in tl.static_range(W):
                    b += tl.load(p_w + o_c * W + j, mask=m_c, other=0.).to(tl.float32) * inputs_of(l_x, s_lx, p_x, s_x, o_t - (W - 1) + j, o_x, m, at, SIZE)
                tl.store(p_s + (o_t - base) * s_s + o_c, silu(b), mask=m)
            into_log(l_x, s_lx, p_x, s_x, o_i, o_x, m_c, at, l, SIZE, T)
        elif i_c < CH:
            o_c = (i_c - CX) * BC + tl.arange(0, BC)[None, :]
            m_c, p_dt, l_dt = o_c < H, p_dt + i_b * l * s_dt, l_dt + i_b * SIZE * H
            for i in range(base, at + l, T):
                m = (i + o_i < at + l) & m_c
                b = inputs_of(l_dt, H, p_dt, s_dt, i + o_i, o_c, m, at, SIZE) + tl.load(p_bias + o_c, mask=m_c, other=0.).to(tl.float32)
                tl.store(p_s + (i + o_i - base) * s_s + X + o_c, softplus(b), mask=m)
            into_log(l_dt, H, p_dt, s_dt, o_i, o_c, m_c, at, l, SIZE, T)
        else:
            o_c = (i_c - CH) * BC + tl.arange(0, BC)[None, :]
            m_c, p_B, l_B = o_c < G, p_B + i_b * l * s_B, l_B + i_b * SIZE * G
            for i in range(base, at + l, T):
                m = (i + o_i < at + l) & m_c
                tl.store(p_s + (i + o_i - base) * s_s + X + H + o_c, inputs_of(l_B, G, p_B, s_B, i + o_i, o_c, m, at, SIZE), mask=m)
            into_log(l_B, G, p_B, s_B, o_i, o_c, m_c, at, l, SIZE, T)

    @triton.jit
    def brought(p_s, o_x, m_x, o_d, m_d, n: tl.constexpr, o_B, BN: tl.constexpr, NB: tl.constexpr):
        """x, Δ and B (in blocks of NB) of the token whose row p_s is."""
        b_B, o_n = (), tl.arange(0, NB)[None, :]
        for k in tl.static_range(BN // NB):
            b_B = b_B + (tl.load(p_s + o_B + k * NB + o_n, mask=k * NB + o_n < n, other=0.),)
        return tl.load(p_s + o_x, mask=m_x, other=0.), tl.load(p_s + o_d, mask=m_d, other=0.), b_B

    @triton.jit(do_not_specialize=["l", "SIZE"])
    def replay_kernel(p_s, p_C, p_z, p_h, p_at, p_base, p_to, p_A, p_D, p_y, l, SIZE, s_s: tl.constexpr, s_C: tl.constexpr, s_z: tl.constexpr, o_dt: tl.constexpr,
                      o_B: tl.constexpr, o_C: tl.constexpr, h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, rx: tl.constexpr, rb: tl.constexpr,
                      CHANNELS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr):
        """BP channels of a head of a row: from the state at `base` token by token through what prepare_kernel left in p_s (a row more is read, for
        nothing), with y of the l new ones; the state is written where it is to stand, before token `to`, if it moves. It is held as blocks of
        NB columns, so that a sum over n takes few shuffles. CHANNELS: Mamba, a Δ per channel, C as projected, y ∘ silu(z); else Mamba-2."""
        parts: tl.constexpr = (p + BP - 1) // BP
        i_b, i_h, i_p = (tl.program_id(0) // (h * parts)).to(tl.int64), tl.program_id(0) // parts % h, tl.program_id(0) % parts * BP
        o_p, o_n, o_d = i_p + tl.arange(0, BP)[:, None], tl.arange(0, NB)[None, :], (i_p if CHANNELS else 0) + tl.arange(0, BP if CHANNELS else 1)[:, None]
        m_p, m_d, o_hp, o_hd = o_p < p, o_d < (p if CHANNELS else 1), i_h * p + o_p, (i_h * p if CHANNELS else i_h) + o_d
        p_s, p_h, p_C = p_s + i_b * SIZE * s_s, p_h + (i_b * h + i_h) * (p * n) + o_p * n + o_n, p_C + i_b * l * s_C + i_h * n
        p_z, p_y, p_sC, o_x = p_z + i_b * l * s_z + o_hp, p_y + i_b * l * (h * p) + o_hp, p_s + o_C + i_h * n, i_h // rx * p + o_p
        at, base, to = tl.load(p_at + i_b).to(tl.int32), tl.load(p_base + i_b).to(tl.int32), tl.load(p_to + i_b).to(tl.int32)
        b_x, b_delta, b_B = brought(p_s, o_x, m_p, o_dt + o_hd, m_d, n, o_B + i_h // rb * n, BN, NB)
        b_h, b_A, b_D = (), (), tl.load(p_D + o_hd, mask=m_d, other=0.).to(tl.float32)
        for k in tl.static_range(BN // NB):
            m = m_p & (k * NB + o_n < n)
            b_h = b_h + (tl.load(p_h + k * NB, mask=m, other=0.),)
            b_Ak = tl.load(p_A + o_hd * n + k * NB + o_n, mask=m, other=0.) if CHANNELS else tl.load(p_A + o_hd)
            b_A = b_A + (-tl.exp(b_Ak.to(tl.float32)) * LOG2E,)
        for t in range(base, at + l):
            b_new, b_C, b_y, b_v = (), (), tl.zeros((BP, NB), tl.float32), b_D * b_x
            for k in tl.static_range(BN // NB):
                p_Ck = p_C + (t - at) * s_C if CHANNELS else p_sC
                b_C = b_C + (tl.load(p_Ck + k * NB + o_n, mask=k * NB + o_n < tl.where(t >= at, n, 0), other=0.).to(tl.float32),)
            for k in tl.static_range(BN // NB):
                b_hk = tl.fma(tl.broadcast_to(tl.exp2(b_delta * b_A[k]), (BP, NB)), b_h[k], b_delta * b_x * b_B[k])
                if t + 1 == to:
                    tl.store(p_h + k * NB, b_hk, mask=m_p & (k * NB + o_n < n))
                b_new = b_new + (b_hk,)
            p_s, p_sC, b_h = p_s + s_s, p_sC + s_s, b_new
            b_x, b_delta, b_B = brought(p_s, o_x, m_p, o_dt + o_hd, m_d, n, o_B + i_h // rb * n, BN, NB)  # the next token's, while y is summed
            if t >= at:
                for k in tl.static_range(BN // NB):
                    b_y += b_h[k] * b_C[k]
                b_v += tl.sum(b_y, axis=1, keep_dims=True)
                if CHANNELS:
                    b_v *= silu(tl.load(p_z + (t - at) * s_z, mask=m_p, other=0.).to(tl.float32))
                tl.store(p_y + (t - at) * (h * p), b_v, mask=m_p)

# ---------------------------------------------------------------------------------------------------------------
# The launches. Forward and backward of an operation are plain functions of tensors; they are registered with PyTorch as operators of
# their own, so that torch.compile takes each as one node of its graph.

PLANS = {}  # see planned


class Launch:
    """A kernel on a grid, with the numbers and the constants that follow its tensors, to be called with the tensors. Triton looks at all of
    some 40 arguments anew in every call, which takes longer than a small batch runs; so the first call keeps what it compiled, and later
    ones hand it bare addresses. That holds for tensors of the same types and alignments, which `planned` sees to."""

    def __init__(self, kernel, grid, numbers, **meta):
        self.kernel, self.grid, self.numbers, self.meta, self.run = kernel, grid, numbers, meta, None

    def __call__(self, *tensors):
        if self.run:
            self.run(*[t.data_ptr() for t in tensors], *self.rest)
        elif not isinstance(tensors[0], FakeTensor):  # those ask for shapes alone, as torch.compile does
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.meta)
            if compiled is not None:  # the interpreter compiles nothing
                names = self.kernel.arg_names[len(tensors) + len(self.numbers):]
                self.run, self.rest = compiled[(*self.grid, 1, 1)[:3]], [*self.numbers, *[self.meta[name] for name in names]]


def planned(make, *args):
    """make(*args), remembered for tensors of the same devices, types, shapes, strides and alignments, and otherwise equal arguments."""
    if isinstance(args[0], FakeTensor):
        return make(*args)
    key = make, *[(a.dtype, a.shape, a.stride(), a.data_ptr() % 16, a.get_device()) if isinstance(a, torch.Tensor) else a for a in args]
    if key not in PLANS:
        if len(PLANS) == 4096:  # of many lengths
            PLANS.clear()
        PLANS[key] = make(*args)
    return PLANS[key]


def cdiv(a, b):
    """⌈a / b⌉ (Triton's own takes 7 µs)."""
    return -(-a // b)


def row(t):
    """`t` (b, l, h, w) as the kernels read it: with any strides but that of its last axis, which costs a copy if it is not 1."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def flat(t):
    """`t` as contiguous float32; None stays None."""
    return t if t is None else t.float().contiguous()


def strides(**tensors):
    """The strides over the batch of every tensor, and those over l and h under the names the kernels give them: s_xl, s_xh."""
    return [t.stride(0) for t in tensors.values()], {f"s_{k}{axis}": t.stride(i) for k, t in tensors.items() for i, axis in ((1, "l"), (2, "h"))}


def over_group(t, like):
    """Sum (b, l, h, w) over the query heads that share a kv head, into the shape and type of `like` (b, l, g, w)."""
    b, l, g, w = like.shape
    return (t if t.shape[2] == g else t.view(b, l, g, -1, w).sum(3)).to(like.dtype)


def segments(blocks, l, T, most):
    """Into how many segments the walks cut a sequence of l tokens: as many as keep the blocks at or below `most`, which fills a large GPU,
    if that is four or more (the states of all but one are walked for twice), and at most one per 8 T tokens (with s rounded up to T the
    last ones can be short or empty)."""
    c = min(most // max(1, blocks), l // (8 * T))
    return c if c >= 4 else 1


def s6_plan(x, dt, B, C, D, z, bias, h0, pos, dy, dh, keep):
    """Mamba's launches; those of the backward where there is a dy. (The interpreter has no bf16 words.)"""
    (b, l, h, n), p, BN, T = C.shape, x.shape[3], max(2, triton.next_power_of_2(C.shape[3])), S6_T
    BP, (z_, dy_) = min(triton.next_power_of_2(p), max(1, S6_TILE // BN)), (x if t is None else t for t in (z, dy))
    c, parts = segments(b * h * cdiv(p, BP), l, T, S6_BLOCKS), cdiv(p, BP)
    words = not INTERPRET and n % 2 == p % 2 == 0 and all(t.dtype == torch.bfloat16 and t.storage_offset() % 2 == 0 and
                                                         all(s % 2 == 0 for s in t.stride()[:3]) for t in (x, dt, B, C, z_, dy_))
    grid, sizes, rx, rb = (b * c * h, parts), (l, c, T * cdiv(l, c * T)), h // x.shape[2], h // B.shape[2]
    meta = dict(h=h, p=p, n=n, SKIP=D is not None, GATE=z is not None, BIAS=bias is not None, RESET=pos is not None, WORDS=words, T=T, BP=BP, BN=BN,
                num_warps=max(1, BP * BN // 512))

    def walk(x, B, rx, rb, LEAVE, ADJOINT=False, START=False, kept=0):
        batch, within = strides(x=x, t=dt, B=B, C=C, z=z_)
        return Launch(s6_walk_kernel, grid, (*sizes, kept, *batch), rx=rx, rb=rb, LEAVE=LEAVE, ADJOINT=ADJOINT, START=START, **within, **meta)
    plan = SimpleNamespace(c=c, parts=parts)
    if dy is None:
        plan.end, plan.y = walk(x, B, rx, rb, "end"), walk(x, B, rx, rb, "y", START=h0 is not None, kept=l if keep else 0)
        return plan
    batch, within = strides(x=x, t=dt, B=B, C=C, z=z_, y=dy)
    plan.end = walk(dy, C, 1, 1, "end", ADJOINT=True)
    plan.gradient = Launch(s6_backward_kernel, grid, (*sizes, b, *batch), rx=rx, rb=rb, START=dh is not None, **within, **meta)
    return plan


def s6_forward(x, dt, A, B, C, D, z, dt_bias, h0, pos, keep):
    """Mamba on the kernels: y, the last state, and for the backward S (empty unless `keep`) and A (h, p, 2, ⌈n/2⌉): even columns, odd ones."""
    (b, l, h, n), p, A = C.shape, x.shape[3], F.pad(A, (0, 1)) if A.shape[2] % 2 else A
    A = A.float().view(h, p, -1, 2).transpose(2, 3).clone(memory_format=torch.contiguous_format)
    x, dt, B, C, z, D, bias, h0 = row(x), row(dt), row(B), row(C), z if z is None else row(z), flat(D), flat(dt_bias), flat(h0)
    plan = planned(s6_plan, x, dt, B, C, D, z, bias, h0, pos, None, None, keep)
    y, last, S = x.new_empty(b, l, h, p), A.new_empty(b, h, p, n), A.new_empty(b, cdiv(l, S6_T) if keep else 0, *A.shape)
    ends, decays = A.new_empty(2, b, plan.c if plan.c > 1 else 0, *A.shape)
    tensors = *[A if t is None else t for t in (x, dt, A, B, C, D, z, bias, h0, pos)], y, last, S, ends, decays  # unused is any tensor at hand
    if plan.c > 1:
        plan.end(*tensors)
    plan.y(*tensors)
    return y, last, S, A


def s6_backward(dy, dh, x, dt, _, B, C, D, z, dt_bias, h0, pos, S, A):
    """The gradients of x and B per query head, of dt, C, z and h0; and in sums (·, h, p, n + 2) those of A, D and dt_bias, to be added up."""
    (b, l, h, n), p = C.shape, x.shape[3]
    x, dt, B, C, z, D, bias, dy, dh = row(x), row(dt), row(B), row(C), z if z is None else row(z), flat(D), flat(dt_bias), row(dy), flat(dh)
    plan = planned(s6_plan, x, dt, B, C, D, z, bias, None, pos, dy, dh, True)
    dx, ddt, dz, dh0 = x.new_empty(b, l, h, p), dt.new_empty(dt.shape), x.new_empty(0 if z is None else z.shape), S.new_empty(b, h, p, n)
    dB, dC, sums = B.new_empty(plan.parts, b, l, h, n), C.new_empty(plan.parts, b, l, h, n), S.new_empty(b * plan.c, h, p, n + 2)
    ends, decays = S.new_empty(2, b, plan.c if plan.c > 1 else 0, *A.shape)
    D, z, bias, pos, dh = (A if t is None else t for t in (D, z, bias, pos, dh))
    if plan.c > 1:
        plan.end(dy, dt, A, C, C, D, z, bias, dh, pos, dx, dh0, S, ends, decays)
    plan.gradient(x, dt, A, B, C, D, z, bias, pos, dy, dh, S, ends, decays, dx, ddt, dB, dC, dz, dh0, sums)
    return dx, ddt, dB[0] if plan.parts == 1 else dB.sum(0), dC[0] if plan.parts == 1 else dC.sum(0), dz, dh0, sums


def ssd_plan(x, dt, A, B, C, D, bias, h0, pos, dy, dh):
    """Mamba-2's launches; those of the backward where there is a dy. bf16 is multiplied as it is, fp16 (whose range a state can leave) as
    TF32, float32 in full. (A is given for its alignment.)"""
    (b, l, h, n), p, exact = C.shape, x.shape[3], x.dtype == torch.float32
    dot, T, BP = (tl.bfloat16, 64, 64) if x.dtype == torch.bfloat16 and not INTERPRET else (tl.float32, 32, 32)  # it lacks bf16
    c, parts = segments(b * h * cdiv(p, BP), l, T, SSD_BLOCKS), cdiv(p, BP)
    s, rx, rb = T * cdiv(l, c * T), h // x.shape[2], h // B.shape[2]
    meta = dict(h=h, p=p, n=n, SKIP=D is not None, DOT=dot, T=T, BP=BP, PREC="ieee" if exact else "tf32")

    def walk(u, v, rx, rb, LEAVE, START=False, ADJOINT=False):
        batch, within = strides(u=u, v=v, C=C)
        return Launch(ssd_walk_kernel, (b * c * h, parts), (l, c, s, *batch), rx=rx, rb=rb, LEAVE=LEAVE, START=START, ADJOINT=ADJOINT,
                      BN=max(16, triton.next_power_of_2(n)), **within, **meta, **(WALK_Y if LEAVE == "y" else WALK_STATES))
    plan = SimpleNamespace(c=c, T=T, tokens=c * s, sum=torch.float64 if exact else torch.float32, state=x.dtype if dot == tl.bfloat16 else torch.float32)
    plan.delta = Launch(delta_kernel, (b * c * s // T, cdiv(h, 128)), (l, c * s // T, dt.stride(0)), s_tl=dt.stride(1), h=h, BIAS=bias is not None,
                        RESET=pos is not None, T=T, BLOCK=min(128, triton.next_power_of_2(h)))
    if dy is None:
        plan.end, plan.y = walk(x, B, rx, rb, "end"), walk(x, B, rx, rb, "y", START=h0 is not None)
        return plan
    batch, within = strides(x=x, B=B, C=C, y=dy)
    plan.states, plan.end = walk(x, B, rx, rb, "states", START=h0 is not None), walk(dy, C, 1, 1, "end", ADJOINT=True)
    plan.adjoints = walk(dy, C, 1, 1, "states", START=dh is not None, ADJOINT=True)
    plan.gradient = Launch(ssd_backward_kernel, (b * cdiv(l, T) * h,), (l, c * s, *batch), rx=rx, rb=rb, RESET=pos is not None, BN=BP,
                           **within, **meta, **WALK_GRADIENT)
    return plan


def ssd_delta(plan, dt, A, bias, pos):
    """Δ (b, tokens, h) and its running sum within each tile times A: see the kernel."""
    delta = A.new_empty(dt.shape[0], plan.tokens, dt.shape[2])
    s = torch.empty_like(delta, dtype=plan.sum)
    plan.delta(dt, A, A if bias is None else bias, A if pos is None else pos, delta, s)
    return delta, s


def ssd_forward(x, dt, A, B, C, D, z, dt_bias, h0, pos, keep):
    """Mamba-2 on the kernels: y, the last state, and for the backward the ends of the segments and their decays (none if there is one)."""
    (b, l, h, n), p, dt = C.shape, x.shape[3], dt if dt.stride(2) == 1 else dt.contiguous()
    x, A, B, C, D, bias, h0 = row(x), flat(A), row(B), row(C), flat(D), flat(dt_bias), flat(h0)
    plan = planned(ssd_plan, x, dt, A, B, C, D, bias, h0, pos, None, None)
    delta, s = ssd_delta(plan, dt, A, bias, pos)
    y, last, c = x.new_empty(b, l, h, p), A.new_empty(b, h, p, n), plan.c if plan.c > 1 else 0
    ends, decays = A.new_empty(b, c, h, n, p), A.new_empty(b, c, h)
    tensors = x, delta, s, B, C, A if D is None else D, A if h0 is None else h0, y, last, ends, ends, decays
    if c:
        plan.end(*tensors)
    plan.y(*tensors)
    return y, last, ends, decays


def ssd_backward(dy, dh, x, dt, A, B, C, D, z, dt_bias, h0, pos, ends, decays):
    """The gradients, as s6_backward returns them; the sums are (·, 3, h)."""
    (b, l, h, n), p, dt = C.shape, x.shape[3], dt if dt.stride(2) == 1 else dt.contiguous()
    x, A, B, C, D, bias, h0, dy, dh = row(x), flat(A), row(B), row(C), flat(D), flat(dt_bias), flat(h0), row(dy), flat(dh)
    plan = planned(ssd_plan, x, dt, A, B, C, D, bias, h0, pos, dy, dh)
    delta, s = ssd_delta(plan, dt, A, bias, pos)
    S, tiles, D = A.new_empty(b, cdiv(l, plan.T), h, p * n, dtype=plan.state), b * cdiv(l, plan.T), A if D is None else D
    G, dh0, ends_, decays_ = torch.empty_like(S), A.new_empty(b, h, p, n), torch.empty_like(ends), torch.empty_like(decays)
    plan.states(x, delta, s, B, C, D, A if h0 is None else h0, dy, dh0, S, ends, decays)  # its last state into dh0, which is filled below
    adjoint = dy, delta, s, C, C, D, A if dh is None else dh, dy, dh0, G, ends_, decays_
    if plan.c > 1:
        plan.end(*adjoint)
    plan.adjoints(*adjoint)
    dx, ddt, dB, dC = x.new_empty(b, l, h, p), dt.new_empty(dt.shape), B.new_empty(b, l, h, n), C.new_empty(b, l, h, n)
    sums = A.new_empty(tiles, 3, h)
    plan.gradient(x, delta, s, A, B, C, D, A if pos is None else pos, dy, S, G, dx, ddt, dB, dC, sums)
    return dx, ddt, dB, dC, x.new_empty(0), dh0, sums


def scan_forward(x, dt, A, B, C, D, z, dt_bias, h0, pos, keep):
    return (ssd_forward if A.dim() == 1 else s6_forward)(x, dt, A, B, C, D, z, dt_bias, h0, pos, keep)


def scan_backward(dy, dh, x, dt, A, B, C, D, z, dt_bias, h0, pos, *kept):
    return (ssd_backward if A.dim() == 1 else s6_backward)(dy, dh, x, dt, A, B, C, D, z, dt_bias, h0, pos, *kept)


class TritonScan(torch.autograd.Function):
    """`ssm_reference` on the kernels above, z for Mamba only, pos int32 and contiguous. Keeps its inputs, and of Mamba every 8th state, of
    Mamba-2 the ends of its segments."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, h0, pos, keep):
        y, h, *kept = call("scan_forward", x, dt, A, B, C, D, z, dt_bias, h0, pos, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, h0, pos, *kept)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh):
        x, dt, A, B, C, D, z, dt_bias, h0, pos, *kept = ctx.saved_tensors
        dy = x.new_zeros(*C.shape[:3], x.shape[3]) if dy is None else dy
        dx, ddt, dB, dC, dz, dh0, sums = call("scan_backward", dy, dh, x, dt, A, B, C, D, z, dt_bias, h0, pos, *kept)
        sums, n = sums.sum(0), C.shape[3]
        dA, dD, dbias = sums if A.dim() == 1 else (sums[..., :n], sums[..., n], sums[..., n + 1])
        return (over_group(dx, x), ddt, dA.to(A.dtype), over_group(dB, B), dC, None if D is None else dD.to(D.dtype), None if z is None else dz,
                None if dt_bias is None else dbias.to(dt_bias.dtype), None if h0 is None else dh0, None, None)


def conv_plan(x, weight, bias, pos, dy, skip):
    """The launches of the convolution, of its gradient where there is a dy: `tokens` in c segments of s, about T."""
    (b, l, g, p), (h, _, w), ((s_xb,), within) = x.shape, weight.shape, strides(x=x)
    tokens, kernel, size = (l - skip, conv_kernel, CONV_Y) if dy is None else (l, conv_backward_kernel, CONV_GRADIENT)
    R = triton.next_power_of_2(h // g)
    T, U, BP = size["T"], size["U"], min(triton.next_power_of_2(g * p), max(1, size["BLOCK"] // R))
    s = U * cdiv(cdiv(tokens, max(1, tokens // T)), U)
    c = cdiv(tokens, s)
    return c, Launch(kernel, (b * c * cdiv(g * p, BP),), (l, skip, c, s, s_xb), g=g, p=p, r=h // g, BIAS=bias is not None, RESET=pos is not None, W=w,
                     U=U, R=R, BP=BP, num_warps=1, **within)


def conv_forward(x, weight, bias, pos, skip):
    """x (b, skip + l, g, p), weight (h, p, w), bias (h, p) or None, pos (b, l), int32 and contiguous, or None -> y (b, l, h, p), that of
    the tokens after the first `skip`."""
    x, weight, bias = row(x), weight.contiguous(), bias if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], x.shape[1] - skip, *weight.shape[:2])
    bias_, pos_ = weight if bias is None else bias, x if pos is None else pos  # unused is any tensor at hand
    planned(conv_plan, x, weight, bias, pos, None, skip)[1](x, weight, bias_, pos_, y)
    return y


def conv_backward(dy, x, weight, bias, pos, skip):
    """The gradients of x, weight and bias; of the bias also where it is None."""
    (h, p, w), kind = weight.shape, weight.dtype if bias is None else bias.dtype
    dy, x, weight, bias = dy.contiguous(), row(x), weight.contiguous(), bias if bias is None else bias.contiguous()
    c, gradient = planned(conv_plan, x, weight, bias, pos, dy, skip)
    dx, dw = x.new_empty(x.shape), x.new_empty(len(x) * c, w + 1, h * p, dtype=torch.float32)
    gradient(x, weight, weight if bias is None else bias, x if pos is None else pos, dy, dx, dw)
    dw = dw.sum(0)
    return dx, weight.new_empty(h, p, w).copy_(dw[:w].T.view(h, p, w)), dw[w].view(h, p).to(kind)


def norm_plan(y, z, weight, do, eps):
    """The launch of the norm, or of its gradient where there is a do: the sequence in c times T tokens. (weight: for its alignment.)"""
    (b, l, h, p), ((s_zb,), within), size = y.shape, strides(z=z), NORM_Y if do is None else NORM_GRADIENT
    c, BP = cdiv(l, size["T"]), triton.next_power_of_2(p)
    return c, Launch(norm_kernel, (b * c * h,), (eps, l, c, s_zb), h=h, p=p, GRADIENT=do is not None, T=size["T"],
                     ROWS=max(1, min(size["T"], size["ELEMENTS"] // BP)), BP=BP, num_warps=4, **within)


def norm_forward(y, z, weight, eps):
    """y, z (b, l, h, p), weight (h, p) -> o (b, l, h, p)."""
    y, z, weight, o = y.contiguous(), row(z), weight.contiguous(), y.new_empty(y.shape)
    planned(norm_plan, y, z, weight, None, eps)[1](y, z, weight, o, o, o, o)
    return o


def norm_backward(do, y, z, weight, eps):
    """The gradients of y, z and weight."""
    do, y, z, weight = do.contiguous(), y.contiguous(), row(z), weight.contiguous()
    c, gradient = planned(norm_plan, y, z, weight, do, eps)
    dy, dz, dw = y.new_empty(y.shape), z.new_empty(z.shape), y.new_empty(len(y) * c, *weight.shape, dtype=torch.float32)
    gradient(y, z, weight, do, dy, dz, dw)
    return dy, dz, dw.sum(0).to(weight.dtype)


class Triton(torch.autograd.Function):
    """The convolution or the norm on the kernels above: `name`, three tensors (and the convolution's pos) and a number. Keeps them; the
    backward computes the rest again."""

    @staticmethod
    def forward(ctx, name, *args):
        *tensors, ctx.number = args
        ctx.name = name
        ctx.save_for_backward(*tensors)
        return call(f"{name}_forward", *args)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        tensors = ctx.saved_tensors  # asked for once: a checkpoint hands them out once
        gradients = call(f"{ctx.name}_backward", dy, *tensors, ctx.number)
        return None, *[None if t is None else g for t, g in zip(tensors, [*gradients, None])], None  # pos has none


def call(name, *args):
    """This file's function of that name or, while torch.compile traces, the operator of PyTorch that it is registered as."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.mil, name)(*args)
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        return globals()[name](*args)


SCAN = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? h0, Tensor? pos"
for f, schema in ((scan_forward, f"({SCAN}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"),
                  (scan_backward, f"(Tensor dy, Tensor? dh, {SCAN}, Tensor S, Tensor A2) -> ({', '.join(['Tensor'] * 7)})"),
                  (conv_forward, "(Tensor x, Tensor weight, Tensor? bias, Tensor? pos, int skip) -> Tensor"),
                  (conv_backward, "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? pos, int skip) -> (Tensor, Tensor, Tensor)"),
                  (norm_forward, "(Tensor y, Tensor z, Tensor weight, float eps) -> Tensor"),
                  (norm_backward, "(Tensor do, Tensor y, Tensor z, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")):
    torch.library.custom_op(f"mil::{f.__name__}", f, mutates_args=(), schema=schema).register_fake(f)  # given fake tensors, it launches nothing


# ---------------------------------------------------------------------------------------------------------------
# Decoding


def few(x, l, *weights):
    """Whether l tokens a row of a model with weights like `x` go to decoding's kernels: no more than FEW, nothing to differentiate, no
    autocast, `weights` of x's type (a kernel takes one). Never by the number of rows: decoding and verification must take the same."""
    return (l <= FEW and use_triton(x) and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
            and not torch.compiler.is_compiling() and all(w.dtype == x.dtype for w in weights))


def rms_norm(x, weight, eps):
    """x / √(mean of x² over the last axis + eps) ∘ weight, in x's type."""
    return rms_rows(x, weight, eps) if few(x, x.shape[1]) else F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rms_rows(x, weight, eps):
    """The kernel on x (…, d)."""
    x, weight, y = x.contiguous(), weight.contiguous(), x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        planned(rms_plan, x, weight, eps)(x, weight, y)
    return y


def rms_plan(x, weight, eps):
    d = x.shape[-1]
    return Launch(rms_kernel, (x.numel() // d,), (eps,), d=d, BD=triton.next_power_of_2(d), num_warps=8)


def stages(x, most, size):
    """How many stages of `size` bytes a loop can have in flight in shared memory, of the `most` that are best."""
    return max(1, min(most, torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin // size)) if x.is_cuda else most


def linear_plan(x, w, v, u):
    """y = x Wᵀ in tiles of BN columns × M rows."""
    rows, (n, k) = len(x), w.shape
    M, size = (16 if rows <= 16 else 32 if rows <= 32 else 64), LINEAR[v is not None]
    stage = (size["BN"] * (1 + (v is not None)) + M) * size["BK"] * x.element_size()
    return Launch(linear_kernel, (cdiv(rows, M), cdiv(n, size["BN"])), (rows,), s_x=x.stride(0), n=n, k=k, GATE=v is not None, ONTO=u is not None,
                  PREC="ieee" if x.dtype == torch.float32 else "tf32", M=M, **{**size, "num_stages": stages(x, size["num_stages"], stage)})


def linear_rows(x, w, v=None, u=None):
    """The kernel on x (b, l, k): (b, l, n)."""
    (b, l, k), n = x.shape, w.shape[0]
    x, u, y = x.reshape(b * l, k), u if u is None else u.reshape(b * l, n).contiguous(), x.new_empty(b, l, n)
    x, w, v = x if x.stride(1) == 1 else x.contiguous(), w.contiguous(), v if v is None else v.contiguous()
    with torch.cuda.device_of(x):
        planned(linear_plan, x, w, v, u)(x, w, w if v is None else v, x if u is None else u, y)
    return y


def linear(x, weight, onto=None):
    """x (b, l, k) times the transpose of weight (n, k) of any type, plus `onto` (b, l, n), in x's type."""
    if few(x, x.shape[1], weight):
        return linear_rows(x, weight, u=onto)
    if plain(x):
        y = F.linear(x, weight.to(x.dtype))
        return y if onto is None else onto + y
    return Linear.apply(x, weight, onto)


def linears(x, *weights):
    """x (b, l, k) times the transpose of each weight (n, k): a sequence. Weights that lie one after the other in memory are read as one."""
    together = lambda a, b: a.data_ptr() + a.nbytes == b.data_ptr() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()  # noqa: E731
    if few(x, x.shape[1], *weights) and all(w.is_contiguous() for w in weights) and all(map(together, weights, weights[1:])):
        sizes = [len(w) for w in weights]
        return linear_rows(x, weights[0].as_strided((sum(sizes), x.shape[2]), (x.shape[2], 1))).split(sizes, dim=2)
    return [linear(x, w) for w in weights]


def swiglu(x, gate, up):
    """silu(x gateᵀ) ∘ x upᵀ of x (b, l, k), weights (n, k)."""
    return linear_rows(x, gate, v=up) if few(x, x.shape[1], gate, up) else F.silu(linear(x, gate)) * linear(x, up)


def attend_plan(q, k, v, keys, *others):
    """Pieces of SPLIT keys: enough of them to fill the chip, and how many does not depend on how many tokens come at once."""
    (b, l, h, p), (g, size) = q.shape, keys.shape[1:3]
    R, BH, split = triton.next_power_of_2(h // g), max(16, triton.next_power_of_2(p // 2)), SPLIT[b * g >= 64]
    splits, exact = cdiv(size, split), q.dtype == torch.float32
    meta = dict(s_q=q.stride(1), s_k=k.stride(1), s_v=v.stride(1), g=g, r=h // g, p=p, PREC="ieee" if exact else "tf32", R=R, SPLIT=split,
                BK=min(64, split), BH=BH, num_warps=4, num_stages=stages(q, 3, 2 * 64 * 2 * BH * q.element_size()))
    return SimpleNamespace(splits=splits, pieces=Launch(attend_kernel, (b * g * cdiv(l, 16 // R), splits), (p**-0.5 * LOG2E.value, l, size), **meta),
                           y=Launch(gather_kernel, (b * l * h,), (l, splits), h=h, p=p, SPLIT=split, BP=triton.next_power_of_2(p), num_warps=2))


def attend(q, k, v, cos, sin, keys, values, at):
    """Causal attention of l ≤ FEW new tokens over a cache that holds `at` (b,) tokens a row, to which they are added: q (b, l, h, p) and k
    (b, l, g, p) before RoPE, v alike; cos, sin (b, 1, l, p / 2) in float32; keys, values (b, g, size, p). p ≤ 128, h/g ≤ 16. Returns y (b, l, h, p)."""
    (b, l, h, p), q, k, v = q.shape, *(one_by_one(t) for t in (q, k, v))
    with torch.cuda.device_of(q):
        plan = planned(attend_plan, q, k, v, keys, values, cos, sin, at)
        lse, y = q.new_empty(b, l, h, plan.splits, dtype=torch.float32), q.new_empty(b, l, h, p)
        part = lse.new_empty(*lse.shape, p)
        plan.pieces(q, k, v, cos, sin, at, keys, values, lse, part)
        plan.y(lse, part, at, y)
    return y


def one_by_one(t):
    """`t` (b, l, …) with its tokens at one distance from each other throughout, and a token's numbers side by side."""
    return t if t.stride(0) == t.shape[1] * t.stride(1) and t[:1, :1].is_contiguous() else t.contiguous()


def replay_plan(x, dt, B, C, z, lx, ldt, lB, weight, h0, *others):
    (b, l), (h, p, n), (channels, _, W), mamba = x.shape[:2], h0.shape[1:], weight.shape, dt.dim() == 4
    g = x.shape[2] if mamba else (channels - h * n) // (p + n)                                # kv heads
    H, G, BP, BN = ldt.stride(1), lB.stride(1) if mamba else 0, min(32, triton.next_power_of_2(p)), triton.next_power_of_2(n)
    programs, size, s_s = b * h * cdiv(p, BP), lx.shape[1], channels + H + G
    T, BC, warp, more = REPLAY[programs >= 2048]
    return SimpleNamespace(
        room=(b, size, s_s),
        prepare=Launch(prepare_kernel, (b, cdiv(channels, BC) + cdiv(H, BC) + cdiv(G, BC)), (l, size), s_x=x.stride(1), s_dt=dt.stride(1),
                       s_B=B.stride(1), s_lx=lx.stride(1), H=H, G=G, X=channels, r=h // g if mamba else 1, p=p, W=W, T=T, BC=BC, num_warps=4),
        run=Launch(replay_kernel, (programs,), (l, size), s_s=s_s, s_C=C.stride(1), s_z=z.stride(1), o_dt=channels, o_B=channels + H if mamba else g * p,
                   o_C=g * (p + n), h=h, p=p, n=n, rx=1 if mamba else h // g, rb=h // g, CHANNELS=mamba, BP=BP, BN=BN, NB=min(BN, 32),
                   num_warps=max(1, BP * BN // warp), **more))


def replay(x, dt, B, C, z, log, weight, bias, A_log, dt_bias, D, h, at, base, to):
    """Convolution and scan of l ≤ FEW new tokens (section 4 of the paper), from the state h (b, h, p, n) before token `base` (b,) on,
    through the inputs logged since, up to `at` (b,), where the new ones begin; they are logged, and h moves before token `to` (b,).

    Mamba: x (b, l, g, p), dt (b, l, h, p), B (b, l, g, n), C (b, l, h, n), z (b, l, h, p), A_log (h·p, n), as the projections left them. Mamba-2, whose
    gate comes after: x (b, l, channels) is x, B and C together, dt (b, l, h), B, C and z None, A_log (h,). log: x, dt and B of earlier tokens,
    (b, size, …), size a power of 2 and at least the logged, the new and max(1, w - 1) more, token t at t mod size. weight (channels, 1, w),
    bias: the convolution's. p, n ≤ 128. Returns y (b, l, h, p)."""
    x, dt, B, C, z = (x if t is None else one_by_one(t) for t in (x, dt, B, C, z))
    (lx, ldt, *lB), y = log, x.new_empty(*x.shape[:2], *h.shape[1:3])
    with torch.cuda.device_of(x):
        tensors = x, dt, B, C, z, lx, ldt, *(lB or [lx]), weight
        plan = planned(replay_plan, *tensors, h, bias, A_log, dt_bias, D, at, base, to)
        s = h.new_empty(plan.room)
        plan.prepare(x, dt, B, lx, ldt, *(lB or [lx]), at, base, weight, bias, dt_bias, s)
        plan.run(s, C, z, h, at, base, to, A_log, D, y)
    return y


# ---------------------------------------------------------------------------------------------------------------
# Training. What a layer keeps for its backward is what the batch's size is bound by, so each of these keeps what it was given, and computes
# again what is cheap. Weights may be of any type, as float32 ones that an optimiser updates: the copy of one in the type of the activations
# lives for one product. What is frozen costs nothing. On CUDA what is not a product of matrices is a Triton kernel, elsewhere a formula.

WIDE = hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8 bf16 matrices have a float32 product, on CUDA
RMS_BLOCKS, SWIGLU, LOSSES = 512, dict(BLOCK=1024, num_warps=4), dict(LANES=1024, num_warps=16)  # RMS_BLOCKS: parts of the weight's gradient


def plain(x):
    """Whether training's layers are written out for autograd: for torch.compile, which fuses them itself, and autocast, which picks types."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)


def wider(t):
    """`t` in the type that is computed in: float32, or float64 if it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def flatten(t):
    """(…, k) -> (rows, k)."""
    return t.reshape(-1, t.shape[-1])


def times(x, w, onto=None):
    """x (…, k) times the transpose of w (n, k), plus `onto`: (…, n), in x's type."""
    w = w.to(x.dtype)
    return F.linear(x, w) if onto is None else torch.addmm(flatten(onto), flatten(x), w.T).view(onto.shape)


def weight_gradient(dy, x, kind):
    """dyᵀ x of dy (rows, n) and x (rows, k), in the type `kind`: float32 without a rounding to less on the way, where PyTorch can."""
    if WIDE and x.is_cuda and x.element_size() == 2 and kind == torch.float32:
        return torch.mm(dy.T, x, out_dtype=kind)
    return torch.mm(dy.T, x).to(kind)


def add_product(t, a, b):
    """t += a b, in t's type."""
    if WIDE and a.is_cuda and a.element_size() == 2 and t.dtype == torch.float32:
        torch.addmm(t, a, b, out_dtype=t.dtype, out=t)
    else:
        t += torch.mm(a, b)


def input_gradient(dys, weights):
    """Σ dy W over dys (rows, n) and weights (n, k): (rows, k), the sum in one buffer."""
    (dy, w), *others = zip(dys, weights)
    dx = torch.mm(dy, w.to(dy.dtype))
    for dy, w in others:
        dx.addmm_(dy, w.to(dy.dtype))
    return dx


def normed(x, weight, eps):
    """rms_norm of x (…, d), with a weight of any type."""
    return rms_rows(x, weight, eps) if use_triton(x) else F.rms_norm(wider(x), weight.shape, weight.to(wider(x).dtype), eps).to(x.dtype)


def rms_gradient_plan(x, weight, dy, onto, eps, dx, dw):
    """Its launch and the number of programs, as few as fill a large GPU where each leaves a sum for the weight."""
    (rows, d), BD = x.shape, triton.next_power_of_2(x.shape[1])
    T = cdiv(rows, RMS_BLOCKS) if dw else 1
    return cdiv(rows, T), Launch(rms_backward_kernel, (cdiv(rows, T),), (rows, T, eps), d=d, ONTO=onto is not None, DX=dx, DW=dw, BD=BD,
                                 num_warps=min(32, max(1, BD // 512)))


def rms_gradient(dy, x, weight, eps, wanted, onto=None):
    """The gradients of x (rows, d), plus `onto`, and of the weight, of which `wanted` says which; dy may be overwritten."""
    if not any(wanted):
        return None, None
    if use_triton(x):
        x, weight, dy, onto = x.contiguous(), weight.contiguous(), dy.contiguous(), onto if onto is None else onto.contiguous()
        with torch.cuda.device_of(x):
            parts, gradient = planned(rms_gradient_plan, x, weight, dy, onto, eps, *wanted)
            dw = x.new_empty(parts if wanted[1] else 0, x.shape[1], dtype=torch.float32)
            gradient(x, weight, dy, x if onto is None else onto, dy, dw)
        return dy if wanted[0] else None, dw.sum(0).to(weight.dtype) if wanted[1] else None
    x, dy, kind = wider(x), wider(dy), x.dtype
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    u, e = x * scale, dy * weight.to(x.dtype)
    dx = (e - u * (e * u).mean(-1, keepdim=True)) * scale
    return (dx if onto is None else dx + onto).to(kind) if wanted[0] else None, (dy * u).sum(0).to(weight.dtype) if wanted[1] else None


def swiglu_plan(g, u, y, gradient, product):
    return Launch(swiglu_kernel, (cdiv(g.numel(), SWIGLU["BLOCK"]),), (g.numel() // g.shape[-1],), n=g.shape[-1], GRADIENT=gradient, PRODUCT=product, **SWIGLU)


def gated(g, u, y):
    """silu(g) ∘ u into y, which may be g; all contiguous."""
    if not use_triton(g):
        return y.copy_(F.silu(wider(g)) * wider(u))
    with torch.cuda.device_of(g):
        planned(swiglu_plan, g, u, y, False, True)(g, u, y)
    return y


def gated_gradient(g, u, dy, product):
    """Overwrites g and u with their gradients, and dy, that of y = silu(g) ∘ u, with y if the `product` is wanted."""
    if use_triton(g):
        with torch.cuda.device_of(g):
            planned(swiglu_plan, g, u, dy, True, product)(g, u, dy)
        return
    b_g, b_u, b_dy, sig = wider(g).clone(), wider(u).clone(), wider(dy).clone(), torch.sigmoid(wider(g))
    g.copy_(b_dy * b_u * sig * (1 + b_g * (1 - sig)))
    u.copy_(b_dy * b_g * sig)
    if product:
        dy.copy_(b_g * sig * b_u)


class Linear(torch.autograd.Function):
    """x Wᵀ + onto. Keeps x if the weight's gradient is wanted, and the weight if that of x is."""

    @staticmethod
    def forward(ctx, x, weight, onto):
        ctx.kind = weight.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return times(x, weight, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = None if weight is None else input_gradient([flatten(dy)], [weight]).view(*dy.shape[:-1], -1)
        return dx, None if x is None else weight_gradient(flatten(dy), flatten(x), ctx.kind), dy if ctx.needs_input_grad[2] else None


class NormLinears(torch.autograd.Function):
    """v Wᵀ for each of the weights, v = rms_norm(u). Keeps u, and computes v again."""

    @staticmethod
    def forward(ctx, u, weight, eps, *weights):
        ctx.eps = eps
        ctx.set_materialize_grads(False)  # of a product that nothing was made of
        ctx.save_for_backward(u, weight, *weights)
        v = normed(u, weight, eps)
        return tuple(times(v, w) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        u, weight, *weights = ctx.saved_tensors
        wanted, wants, dws = ctx.needs_input_grad[:2], ctx.needs_input_grad[3:], [None] * len(weights)
        there = [i for i, dy in enumerate(dys) if dy is not None]
        dys, x = [dy if dy is None else flatten(dy) for dy in dys], flatten(u)
        if any(wants[i] for i in there):
            v = normed(x, weight, ctx.eps)
            for i in there:
                dws[i] = weight_gradient(dys[i], v, weights[i].dtype) if wants[i] else None
            del v  # before there is room for its gradient
        if not there or not any(wanted):
            return None, None, None, *dws
        du, dweight = rms_gradient(input_gradient([dys[i] for i in there], [weights[i] for i in there]), x, weight, ctx.eps, wanted)
        return du if du is None else du.view(u.shape), dweight, None, *dws


class MLP(torch.autograd.Function):
    """u + (silu(v gateᵀ) ∘ v upᵀ) downᵀ, v = rms_norm(u). Keeps u, and with `keep` the products with gate and up; computes the rest again."""

    @staticmethod
    def forward(ctx, u, weight, eps, gate, up, down, keep):
        v = normed(flatten(u), weight, eps)  # flat as in the backward: the same products, bit for bit
        g, h = times(v, gate), times(v, up)
        del v
        ctx.eps = eps
        ctx.save_for_backward(u, weight, gate, up, down, *((g, h) if keep else ()))
        y = gated(g, h, torch.empty_like(g) if keep else g)
        del g, h
        return times(y, down, u)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, weight, gate, up, down, *kept = ctx.saved_tensors
        *wanted, _, wants_gate, wants_up, wants_down, _ = ctx.needs_input_grad
        x, shape, dy = flatten(u), u.shape, flatten(dy)
        v = normed(x, weight, ctx.eps) if not kept or wants_gate or wants_up else None
        if not kept:
            g, h = times(v, gate), times(v, up)
        elif torch._C._autograd._get_current_graph_task_keep_graph():  # a second backward will ask for them
            g, h = (t.clone() for t in kept)
        else:
            g, h = kept
        y = input_gradient([dy], [down])
        gated_gradient(g, h, y, wants_down)  # g, h and y are now dg, dh and silu(g) ∘ h
        ddown = weight_gradient(dy, y, down.dtype) if wants_down else None
        del y
        dgate = weight_gradient(g, v, gate.dtype) if wants_gate else None
        dup = weight_gradient(h, v, up.dtype) if wants_up else None
        del v
        du, dweight = rms_gradient(input_gradient([g, h], [gate, up]), x, weight, ctx.eps, wanted, dy) if any(wanted) else (None, None)
        return du if du is None else du.view(shape), dweight, None, dgate, dup, ddown, None


def norm_linears(u, weight, eps, *weights):
    """rms_norm(u, weight, eps) of u (b, l, d) times the transpose of each of the weights (n, d) of any type: a sequence, in u's type."""
    if few(u, u.shape[1], *weights) or plain(u):
        return linears(rms_norm(u, weight, eps), *weights)
    return list(NormLinears.apply(u, weight, eps, *weights))


def mlp(u, weight, eps, gate, up, down, recompute=False):
    """u + (silu(v gateᵀ) ∘ v upᵀ) downᵀ with v = rms_norm(u, weight, eps): u (b, l, d), gate and up (n, d), down (d, n). With `recompute` the
    products with gate and up are not kept for the backward, which then multiplies by them once more."""
    if few(u, u.shape[1], gate, up, down) or plain(u):
        return linear(swiglu(rms_norm(u, weight, eps), gate, up), down, u)
    keep = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in (u, weight, gate, up, down))
    return MLP.apply(u, weight, eps, gate, up, down, keep)


def rotate(q, cos, sin):
    """RoPE: the channel pairs (i, i + p/2) of q (b, l, h, p) turned by the angles of cos and sin (b or 1, l, p/2). Contiguous, in q's type."""
    return turn(q, cos, sin, False) if torch.compiler.is_compiling() else Rotation.apply(q, cos, sin)


def rotate_plan(q, cos, sin, back):
    (b, l, h, p), ((s_qb,), within), BP = q.shape, strides(q=q), triton.next_power_of_2(q.shape[3] // 2)
    BH = min(triton.next_power_of_2(h), max(1, 2048 // BP))
    return Launch(rotate_kernel, (b * l * cdiv(h, BH),), (l, s_qb, cos.stride(0) if len(cos) > 1 else 0), h=h, half=p // 2, BACK=back, BH=BH, BP=BP,
                  num_warps=max(1, BH * BP // 512), **within)


def turn(q, cos, sin, back):
    """`rotate`, or with `back` its inverse, which is its gradient."""
    if use_triton(q) and not torch.compiler.is_compiling():
        q, cos, sin, y = row(q), flat(cos), flat(sin), q.new_empty(q.shape)
        with torch.cuda.device_of(q):
            planned(rotate_plan, q, cos, sin, back)(q, cos, sin, y)
        return y
    (x_1, x_2), cos, sin = wider(q).chunk(2, dim=-1), cos.unsqueeze(2), (-sin if back else sin).unsqueeze(2)
    return torch.cat([x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin], dim=-1).to(q.dtype)


class Rotation(torch.autograd.Function):
    """`rotate`. Keeps the angles."""

    @staticmethod
    def forward(ctx, q, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(q, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return turn(dy, *ctx.saved_tensors, True), None, None


def losses_plan(logits, wanted, targets, alpha, beta, tau, reverse, gradient):
    K = 16 // logits.element_size()  # a load's
    return Launch(losses_kernel, (len(logits),), (tau,), s_x=logits.stride(0), s_w=0 if wanted is None else wanted.stride(0), v=logits.shape[1],
                  TEACHER=wanted is not None, HOT=tau != 1, REVERSE=reverse, GRADIENT=gradient, PULL=beta is not None, K=K,
                  **{**LOSSES, "LANES": min(LOSSES["LANES"], triton.next_power_of_2(cdiv(logits.shape[1], K)))})


@torch.no_grad()
def token_losses(logits, wanted, targets, alpha, beta, temperature=1.0, reverse=False, gradient=False):
    """Cross-entropy with the target and KL divergence from the teacher, in nats, of each token: ce = -log softmax(logits)[target] and kl =
    τ² KL(softmax(wanted/τ) ‖ softmax(logits/τ)), or with `reverse` of the student from the teacher, τ² KL(student ‖ teacher).

    logits (n, v), wanted (n, v) or None (then kl is 0); targets (n,), negative where nothing is to be learned: there both are 0. Returns ce and
    kl (n,) in float32, or float64 if the logits are. With `gradient` the logits are overwritten with the gradient of Σ alpha ce + beta kl,
    alpha and beta (n,); without beta, of Σ alpha ce. What has probability 0 on the left of the ‖ adds nothing, whatever it has on the right."""
    if max(logits.stride(1), 1 if wanted is None else wanted.stride(1)) > 1:
        raise ValueError("token_losses: the logits of a token must lie side by side in memory")
    tau, beta = (1.0, None) if wanted is None else (float(temperature), beta)  # cross-entropy knows no temperature
    if use_triton(logits) and not torch.compiler.is_compiling():
        ce, kl = torch.empty_like(targets, dtype=torch.float32), torch.empty_like(targets, dtype=torch.float32)
        with torch.cuda.device_of(logits):
            run = planned(losses_plan, logits, wanted, targets, alpha, beta, tau, reverse, gradient)
            run(logits, logits if wanted is None else wanted, targets, ce if alpha is None else alpha, ce if beta is None else beta, ce, kl)
        return ce, kl
    x, learned, at = wider(logits), targets >= 0, targets.clamp(min=0)[:, None]
    log_1 = x.log_softmax(-1)
    ce = -log_1.gather(1, at)[:, 0]
    kl, dx = torch.zeros_like(ce), None
    if gradient:
        dx = log_1.exp().scatter_add_(1, at, -torch.ones_like(ce)[:, None]) * alpha[:, None]
    if wanted is not None:
        log_q, log_p = (x / tau).log_softmax(-1), (wanted.to(x.dtype) / tau).log_softmax(-1)
        left, right = (log_q, log_p) if reverse else (log_p, log_q)
        weighed = lambda t: torch.where(left.exp() > 0, left.exp() * t, 0)  # noqa: E731
        kl = weighed(left - right).sum(-1)
        if gradient and beta is not None:
            dx += (beta * tau)[:, None] * (weighed(log_q - log_p - kl[:, None]) if reverse else log_q.exp() - log_p.exp())
    if gradient:
        logits.copy_(torch.where(learned[:, None], dx, 0))
    return torch.where(learned, ce, 0), torch.where(learned, kl * tau**2, 0)
