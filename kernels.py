"""The recurrence under a Mamba layer: written once, then made fast.

    Δ_t = softplus(dt_t + dt_bias)                                  the step size
    h_t = exp(Δ_t A) ∘ h_{t-1} + (Δ_t x_t) ⊗ B_t                    the state, one p × n matrix per head
    y_t = h_t C_t + D ∘ x_t,   then   y_t ∘ silu(z_t)               the output, its skip and its gate

Without Δ, A, D and z this is causal attention with the softmax taken out, so each symbol has an attention
name (The Mamba in the Llama, arXiv 2408.15237, section 2):

    C  query   (b, l, h, n)        b  batch            h  query heads        n  state size per head
    B  key     (b, l, g, n)        l  length           g  key/value heads    p  channels per head
    x  value   (b, l, g, p)        d  model width      w  width of the convolution, 4

Grouped-query attention carries over: head i reads kv head i // (h/g). x and B are indexed where they lie and
are never repeated in memory by a kernel.

Two decays, told apart by the shape of A:

    Mamba    dt (b, l, h, p)   A (h, p, n)     every channel has a step, every state element a decay
    Mamba-2  dt (b, l, h)      A (h,)          one of each per head, so a chunk of tokens is a matrix product

In this file
    ssm_reference    the definition, a loop over tokens; the tests measure everything else against it
    ssm_scan         the same result, differentiable and fast: Triton on CUDA, chunked PyTorch elsewhere
    conv_reference   the short causal convolution + SiLU in front of the scan, and causal_conv, its fast form

How the scan is made parallel. The recurrence is linear in h, so the sequence is cut into chunks of T tokens:

    1. states   every chunk, on its own, computes the state S it would leave behind from h = 0
    2. pass     from chunk to chunk, h ← exp(A ΣΔ) h + S, which leaves in place of S the state each chunk starts from
    3. outputs  every chunk, on its own again, computes its y from its starting state

Only step 2 is sequential, and it is l/T long. The gradient is the same three steps run backwards in time: the
adjoint G_t = ∂L/∂h_t obeys G_{t-1} = exp(Δ_t A) ∘ G_t + dy_{t-1} ⊗ C_{t-1}. The two decays share step 2; inside a
chunk Mamba walks token by token with its state in registers, and Mamba-2 multiplies matrices on the tensor cores.
The Triton backward keeps only the inputs and recomputes the states.

Names in the kernels: b_ a block in registers, p_ a pointer, o_ offsets, m_ a mask, i_ an index, s_ a stride.
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


# ---------------------------------------------------------------------------------------------------------------
# The public, fast forms


def ssm_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None):
    """`ssm_reference`, fast and differentiable: the same arguments, shapes, types and results.

    Raises ValueError, naming the argument, when the shapes do not fit together.
    """
    check_ssm(x, dt, A, B, C, D, z, dt_bias, h0)
    with torch.autocast(x.device.type, enabled=False):  # the state and Δ·A stay float32 whatever surrounds them
        if x.shape[1] == 1:  # one token has nothing to run in parallel: the definition is a single step
            return ssm_reference(x, dt, A, B, C, D, z, dt_bias, h0)
        f = torch.promote_types(x.dtype, torch.float32)
        delta = F.softplus(dt.to(f) if dt_bias is None else dt.to(f) + dt_bias.to(f))
        if h0 is None:
            h0 = x.new_zeros(x.shape[0], C.shape[2], x.shape[3], C.shape[3], dtype=f)
        if use_triton(x):
            y, h = TritonScan.apply(x, delta, A, B, C, h0)
        else:
            y, h = (ssd_torch if A.dim() == 1 else s6_torch)(x.to(f), delta, A.to(f), B.to(f), C.to(f), h0.to(f))
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
    y = TritonConv.apply(full, weight, bias)[:, -l:] if use_triton(x) else conv_reference(x, weight, bias, state)[0]
    end = full.shape[1] - l + (l if lengths is None else lengths[:, None])                     # in full, a number or (b, 1)
    at = (torch.arange(1 - w, 0, device=x.device) + end).expand(len(x), w - 1)[..., None, None]  # before 0: the zeros
    return y, full.gather(1, at.clamp(min=0).expand(-1, -1, *x.shape[2:])).masked_fill(at < 0, 0)


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
    l, heads, p = x.shape[1], C.shape[2], x.shape[3]
    x, delta, B, C = split_chunks(min(T, l), x, delta, B, C)
    s = (delta.double() * A.double()).cumsum(2).transpose(2, 3)        # (b, c, h, T): log decay since the start
    # float64 for s: far into a chunk it is large, and what matters is the small difference between neighbours
    one = torch.eye(s.shape[-1], dtype=x.dtype, device=s.device)        # a token reads itself undecayed
    earlier = torch.ones_like(one, dtype=torch.bool).tril(-1)
    decay = (s[..., :, None] - s[..., None, :]).masked_fill(~earlier, -torch.inf).to(x.dtype).exp() + one  # (b, c, h, T, T)
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
# The scan in Triton: the same three steps, forwards in time for y and backwards for the gradients.
# x, B, C and dy come with their own strides (s_ over batch, length, head; the last axis is contiguous), everything
# else is contiguous float32. S is (b, c, h, p, n): the chunks' own states before step 2, their starting states after.

SIZES = ["l", "c"]  # a new length must not compile a new kernel
T6, TD = 16, 64  # tokens in a chunk: Mamba keeps a chunk's states in registers, Mamba-2 fills a matrix tile

if triton is not None:

    @triton.jit(do_not_specialize=["c"])
    def pass_kernel(p_S, p_total, p_A, p_h0, p_h, c, h, p, n, s_Ah, s_Ap, s_An, s_tb, s_tc, s_th, s_tp,
                    REVERSE: tl.constexpr, BLOCK: tl.constexpr):
        """Step 2, in place: h ← exp(A ΣΔ) h + S over the chunks, or its adjoint from the last chunk to the first."""
        i_bh = tl.program_id(0).to(tl.int64)
        i_b, i_h = i_bh // h, i_bh % h
        o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # over the p × n elements of one state
        m = o < p * n
        o_p, o_n = o // n, o % n
        b_A = tl.load(p_A + i_h * s_Ah + o_p * s_Ap + o_n * s_An, mask=m, other=0.)
        b_h = tl.load(p_h0 + i_bh * p * n + o, mask=m, other=0.)
        for i in range(c):
            i_c = c - 1 - i if REVERSE else i
            p_Sc = p_S + ((i_b * c + i_c) * h + i_h) * p * n + o
            b_S = tl.load(p_Sc, mask=m, other=0.)
            b_total = tl.load(p_total + i_b * s_tb + i_c * s_tc + i_h * s_th + o_p * s_tp, mask=m, other=0.)
            tl.store(p_Sc, b_h, mask=m)
            b_h = tl.exp(b_A * b_total) * b_h + b_S
        tl.store(p_h + i_bh * p * n + o, b_h, mask=m)

    @triton.jit(do_not_specialize=SIZES)
    def s6_forward_kernel(p_x, p_delta, p_A, p_B, p_C, p_S, p_y, l, c, h, p, n, rx, rb,
                          s_xb, s_xl, s_xh, s_Bb, s_Bl, s_Bh, s_Cb, s_Cl, s_Ch,
                          OUTPUT: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba, one chunk of one head: step 1 (from zero, leaves S), or with OUTPUT step 3 (from S, leaves y)."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_p, o_n = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
        m_p, m_n = o_p < p, o_n < n
        m_pn, o_pn = m_p[:, None] & m_n[None, :], o_p[:, None] * n + o_n[None, :]
        b_A = tl.load(p_A + i_h * p * n + o_pn, mask=m_pn, other=0.)
        p_S += i_bch * p * n
        b_h = tl.load(p_S + o_pn, mask=m_pn, other=0.) if OUTPUT else tl.zeros((BP, BN), tl.float32)
        for i in range(T):
            i_t = i_c * T + i
            m_pt, m_nt = o_p < tl.where(i_t < l, p, 0), o_n < tl.where(i_t < l, n, 0)
            o_d = ((i_b * l + i_t) * h + i_h) * p + o_p
            b_delta = tl.load(p_delta + o_d, mask=m_pt, other=0.)  # past the end Δ = 0 leaves the state alone
            b_x = tl.load(p_x + i_b * s_xb + i_t * s_xl + i_h // rx * s_xh + o_p, mask=m_pt, other=0.)
            b_B = tl.load(p_B + i_b * s_Bb + i_t * s_Bl + i_h // rb * s_Bh + o_n, mask=m_nt, other=0.)
            b_h = tl.exp(b_delta[:, None] * b_A) * b_h + (b_delta * b_x.to(tl.float32))[:, None] * b_B[None, :].to(tl.float32)
            if OUTPUT:
                b_C = tl.load(p_C + i_b * s_Cb + i_t * s_Cl + i_h * s_Ch + o_n, mask=m_nt, other=0.)
                tl.store(p_y + o_d, tl.sum(b_h * b_C[None, :].to(tl.float32), axis=1), mask=m_pt)
        if not OUTPUT:
            tl.store(p_S + o_pn, b_h, mask=m_pn)

    @triton.jit(do_not_specialize=SIZES)
    def s6_backward_kernel(p_x, p_delta, p_A, p_B, p_C, p_dy, p_S, p_G, p_dx, p_ddelta, p_dA, p_dB, p_dC,
                           b, l, c, h, p, n, rx, rb,
                           s_xb, s_xl, s_xh, s_Bb, s_Bl, s_Bh, s_Cb, s_Cl, s_Ch, s_yb, s_yl, s_yh,
                           GRADS: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba, one chunk backwards in time: step 1 of the adjoint (leaves in G what the chunk's start receives), or
        with GRADS step 3 (from G, the adjoint at the chunk's end, and S, the state at its start). The states in
        between are recomputed and held in registers. Sums over heads and channel blocks are left to the caller."""
        i_bch, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_p, o_n = i_p * BP + tl.arange(0, BP), tl.arange(0, BN)
        m_p, m_n = o_p < p, o_n < n
        m_pn, o_pn = m_p[:, None] & m_n[None, :], o_p[:, None] * n + o_n[None, :]
        b_A = tl.load(p_A + i_h * p * n + o_pn, mask=m_pn, other=0.)
        p_x += i_b * s_xb + i_h // rx * s_xh
        p_B += i_b * s_Bb + i_h // rb * s_Bh
        p_C += i_b * s_Cb + i_h * s_Ch
        p_dy += i_b * s_yb + i_h * s_yh
        states = ()
        if GRADS:
            b_h = tl.load(p_S + i_bch * p * n + o_pn, mask=m_pn, other=0.)
            states = (b_h,)  # states[i] is h before token i of the chunk
            for i in tl.static_range(T):
                i_t = i_c * T + i
                m_pt, m_nt = o_p < tl.where(i_t < l, p, 0), o_n < tl.where(i_t < l, n, 0)
                b_delta = tl.load(p_delta + ((i_b * l + i_t) * h + i_h) * p + o_p, mask=m_pt, other=0.)
                b_x = tl.load(p_x + i_t * s_xl + o_p, mask=m_pt, other=0.).to(tl.float32)
                b_B = tl.load(p_B + i_t * s_Bl + o_n, mask=m_nt, other=0.).to(tl.float32)
                b_h = tl.exp(b_delta[:, None] * b_A) * b_h + (b_delta * b_x)[:, None] * b_B[None, :]
                states = states + (b_h,)
            b_g = tl.load(p_G + i_bch * p * n + o_pn, mask=m_pn, other=0.)
            b_dA = tl.zeros((BP, BN), tl.float32)
        else:
            b_g = tl.zeros((BP, BN), tl.float32)
        for j in tl.static_range(T):
            i_t = i_c * T + T - 1 - j
            m_pt, m_nt = o_p < tl.where(i_t < l, p, 0), o_n < tl.where(i_t < l, n, 0)
            o_d = ((i_b * l + i_t) * h + i_h) * p + o_p
            b_delta = tl.load(p_delta + o_d, mask=m_pt, other=0.)
            b_C = tl.load(p_C + i_t * s_Cl + o_n, mask=m_nt, other=0.).to(tl.float32)
            b_dy = tl.load(p_dy + i_t * s_yl + o_p, mask=m_pt, other=0.).to(tl.float32)
            b_g += b_dy[:, None] * b_C[None, :]
            b_decay = tl.exp(b_delta[:, None] * b_A)
            if GRADS:
                b_x = tl.load(p_x + i_t * s_xl + o_p, mask=m_pt, other=0.).to(tl.float32)
                b_B = tl.load(p_B + i_t * s_Bl + o_n, mask=m_nt, other=0.).to(tl.float32)
                b_gB = tl.sum(b_g * b_B[None, :], axis=1)           # adjoint of the written value Δ x
                b_ga = b_g * b_decay * states[T - 1 - j]            # adjoint of the exponent Δ A
                b_dA += b_ga * b_delta[:, None]
                tl.store(p_dx + o_d, b_gB * b_delta, mask=m_pt)
                tl.store(p_ddelta + o_d, b_gB * b_x + tl.sum(b_ga * b_A, axis=1), mask=m_pt)
                o_bc = (((i_p * b + i_b) * l + i_t) * h + i_h) * n + o_n
                tl.store(p_dB + o_bc, tl.sum(b_g * (b_delta * b_x)[:, None], axis=0), mask=m_nt)
                tl.store(p_dC + o_bc, tl.sum(b_dy[:, None] * states[T - j], axis=0), mask=m_nt)
            b_g = b_decay * b_g
        if GRADS:
            tl.store(p_dA + i_bch * p * n + o_pn, b_dA, mask=m_pn)
        else:
            tl.store(p_G + i_bch * p * n + o_pn, b_g, mask=m_pn)

    @triton.jit
    def log_decay(p_delta, p_A, i_b, i_c, i_h, l, h, T: tl.constexpr):
        """Δ (T,), and s (T,) the sum of Δ A since the chunk's start, in float64 as `ssd_torch` explains."""
        o_t = i_c * T + tl.arange(0, T)
        b_delta = tl.load(p_delta + (i_b * l + o_t) * h + i_h, mask=o_t < l, other=0.)
        return b_delta, tl.cumsum(b_delta.to(tl.float64) * tl.load(p_A + i_h).to(tl.float64), axis=0)

    @triton.jit
    def tile(p, s_row, s_col, o_row, o_col, n_row, n_col):
        """Load a tile as float32, zero outside (n_row, n_col); transposed when the strides are given the other way."""
        m = (o_row < n_row)[:, None] & (o_col < n_col)[None, :]
        return tl.load(p + o_row.to(tl.int64)[:, None] * s_row + o_col.to(tl.int64)[None, :] * s_col, mask=m, other=0.).to(tl.float32)

    @triton.jit(do_not_specialize=SIZES)
    def ssd_state_kernel(p_u, p_v, p_delta, p_A, p_S, l, c, h, p, n, ru, rv, s_ub, s_ul, s_uh, s_vb, s_vl, s_vh,
                         ADJOINT: tl.constexpr, PREC: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba-2, step 1: S = Σ_t w_t u_t ⊗ v_t with u = x, v = B, w = Δ × the decay from t to the chunk's end; or,
        for the ADJOINT, u = dy, v = C, w = the decay from the chunk's start to t."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_t = i_c * T + tl.arange(0, T)
        o_p, o_n = tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2) * BN + tl.arange(0, BN)
        b_delta, b_s = log_decay(p_delta, p_A, i_b, i_c, i_h, l, h, T)
        if ADJOINT:
            b_w = tl.exp(b_s.to(tl.float32))
        else:
            b_s_end = tl.sum(tl.where(tl.arange(0, T) == T - 1, b_s, 0.), axis=0)
            b_w = tl.exp((b_s_end - b_s).to(tl.float32)) * b_delta
        b_u = tile(p_u + i_b * s_ub + i_h // ru * s_uh, 1, s_ul, o_p, o_t, p, l)   # (p, T)
        b_v = tile(p_v + i_b * s_vb + i_h // rv * s_vh, s_vl, 1, o_t, o_n, l, n)   # (T, n)
        b_S = tl.dot(b_u * b_w[None, :], b_v, input_precision=PREC)
        tl.store(p_S + i_bch * p * n + o_p[:, None] * n + o_n[None, :], b_S, mask=(o_p < p)[:, None] & (o_n < n)[None, :])

    @triton.jit(do_not_specialize=SIZES)
    def ssd_output_kernel(p_x, p_delta, p_A, p_B, p_C, p_S, p_y, l, c, h, p, n, rx, rb,
                          s_xb, s_xl, s_xh, s_Bb, s_Bl, s_Bh, s_Cb, s_Cl, s_Ch,
                          PREC: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba-2, step 3: y = (decay ∘ C Bᵀ) (Δ x) inside the chunk, plus what its starting state gives."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_t, o_p = i_c * T + tl.arange(0, T), tl.program_id(1) * BP + tl.arange(0, BP)
        b_delta, b_s = log_decay(p_delta, p_A, i_b, i_c, i_h, l, h, T)
        p_C += i_b * s_Cb + i_h * s_Ch
        p_B += i_b * s_Bb + i_h // rb * s_Bh
        p_S += i_bch * p * n
        b_scores, b_y = tl.zeros((T, T), tl.float32), tl.zeros((T, BP), tl.float32)
        for i_n in range(0, n, BN):
            o_n = i_n + tl.arange(0, BN)
            b_C = tile(p_C, s_Cl, 1, o_t, o_n, l, n)                                        # (T, n)
            b_scores += tl.dot(b_C, tile(p_B, 1, s_Bl, o_n, o_t, n, l), input_precision=PREC)  # (T, T)
            b_y += tl.dot(b_C, tile(p_S, 1, n, o_n, o_p, n, p), input_precision=PREC)          # (T, p)
        m_tt = tl.arange(0, T)[:, None] >= tl.arange(0, T)[None, :]
        b_decay = tl.exp(tl.where(m_tt, b_s[:, None] - b_s[None, :], -float("inf")).to(tl.float32))
        b_x = tile(p_x + i_b * s_xb + i_h // rx * s_xh, s_xl, 1, o_t, o_p, l, p)            # (T, p)
        b_y = b_y * tl.exp(b_s.to(tl.float32))[:, None] + tl.dot(b_scores * b_decay * b_delta[None, :], b_x, input_precision=PREC)
        m_tp = (o_t < l)[:, None] & (o_p < p)[None, :]
        tl.store(p_y + ((i_b * l + o_t[:, None]) * h + i_h) * p + o_p[None, :], b_y, mask=m_tp)

    @triton.jit(do_not_specialize=SIZES)
    def ssd_backward_kernel(p_x, p_delta, p_A, p_B, p_C, p_dy, p_S, p_G, p_dx, p_ddelta, p_dA, p_dB, p_dC,
                            l, c, h, p, n, rx, rb, s_xb, s_xl, s_xh, s_Bb, s_Bl, s_Bh, s_Cb, s_Cl, s_Ch, s_yb, s_yl, s_yh,
                            PREC: tl.constexpr, T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
        """Mamba-2, step 3 of the gradient, one chunk of one head: from S, the state at its start, and G, the adjoint of
        the state at its end. t is the reader (C, dy), r the writer (x, B). Scores are formed in both orientations by
        products of loaded tiles, never by transposing a product (a transposed dot feeding a dot is miscompiled by
        Triton 3.4 to 3.7 on Hopper)."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        o_i = tl.arange(0, T)
        o_t = i_c * T + o_i
        b_delta, b_s = log_decay(p_delta, p_A, i_b, i_c, i_h, l, h, T)
        b_s_end = tl.sum(tl.where(o_i == T - 1, b_s, 0.), axis=0)
        b_since, b_after = tl.exp(b_s.to(tl.float32)), tl.exp((b_s_end - b_s).to(tl.float32))
        p_x += i_b * s_xb + i_h // rx * s_xh
        p_B += i_b * s_Bb + i_h // rb * s_Bh
        p_C += i_b * s_Cb + i_h * s_Ch
        p_dy += i_b * s_yb + i_h * s_yh
        p_S += i_bch * p * n
        p_G += i_bch * p * n

        b_CB, b_BC = tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32)  # C_t·B_r as [t, r] and as [r, t]
        for i_n in range(0, n, BN):
            o_n = i_n + tl.arange(0, BN)
            b_CB += tl.dot(tile(p_C, s_Cl, 1, o_t, o_n, l, n), tile(p_B, 1, s_Bl, o_n, o_t, n, l), input_precision=PREC)
            b_BC += tl.dot(tile(p_B, s_Bl, 1, o_t, o_n, l, n), tile(p_C, 1, s_Cl, o_n, o_t, n, l), input_precision=PREC)
        b_yx, b_xy = tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32)  # dy_t·x_r as [t, r] and as [r, t]
        for i_p in range(0, p, BP):
            o_p = i_p + tl.arange(0, BP)
            b_yx += tl.dot(tile(p_dy, s_yl, 1, o_t, o_p, l, p), tile(p_x, 1, s_xl, o_p, o_t, p, l), input_precision=PREC)
            b_xy += tl.dot(tile(p_x, s_xl, 1, o_t, o_p, l, p), tile(p_dy, 1, s_yl, o_p, o_t, p, l), input_precision=PREC)

        # decay from r to t where t ≥ r, in the two orientations, with the writer's Δ
        b_tr = tl.exp(tl.where(o_i[:, None] >= o_i[None, :], b_s[:, None] - b_s[None, :], -float("inf")).to(tl.float32))
        b_rt = tl.exp(tl.where(o_i[:, None] <= o_i[None, :], b_s[None, :] - b_s[:, None], -float("inf")).to(tl.float32))
        # adjoint of s: what pair (t, r) gives grows with s_t and shrinks with s_r; the pair (t, t) does neither
        b_pair = tl.where(o_i[:, None] > o_i[None, :], b_CB * b_yx * b_tr * b_delta[None, :], 0.)
        b_ds = tl.sum(b_pair, axis=1) - tl.sum(b_pair, axis=0)
        b_CB, b_BC = b_CB * b_tr * b_delta[None, :], b_BC * b_rt
        b_yx, b_xy = b_yx * b_tr * b_delta[None, :], b_xy * b_rt * b_delta[:, None]

        b_du_x = tl.zeros((T,), tl.float32)     # adjoint of Δ x, times x
        b_end = tl.zeros((T,), tl.float32)      # what each writer gives to the state at the chunk's end, times G
        for i_p in range(0, p, BP):
            o_p = i_p + tl.arange(0, BP)
            b_x = tile(p_x, s_xl, 1, o_t, o_p, l, p)
            b_GB = tl.zeros((T, BP), tl.float32)
            for i_n in range(0, n, BN):
                o_n = i_n + tl.arange(0, BN)
                b_GB += tl.dot(tile(p_B, s_Bl, 1, o_t, o_n, l, n), tile(p_G, 1, n, o_n, o_p, n, p), input_precision=PREC)
            b_GB *= b_after[:, None]
            b_du = tl.dot(b_BC, tile(p_dy, s_yl, 1, o_t, o_p, l, p), input_precision=PREC) + b_GB
            b_du_x += tl.sum(b_du * b_x, axis=1)
            b_end += tl.sum(b_GB * b_x, axis=1) * b_delta
            m_tp = (o_t < l)[:, None] & (o_p < p)[None, :]
            tl.store(p_dx + ((i_b * l + o_t[:, None]) * h + i_h) * p + o_p[None, :], b_du * b_delta[:, None], mask=m_tp)
        b_hold = 0.                             # <G, the starting state as it arrives at the chunk's end>
        for i_n in range(0, n, BN):
            o_n = i_n + tl.arange(0, BN)
            b_C = tile(p_C, s_Cl, 1, o_t, o_n, l, n)
            b_dC, b_dB = tl.zeros((T, BN), tl.float32), tl.zeros((T, BN), tl.float32)
            for i_p in range(0, p, BP):
                o_p = i_p + tl.arange(0, BP)
                b_S, b_G = tile(p_S, n, 1, o_p, o_n, p, n), tile(p_G, n, 1, o_p, o_n, p, n)
                b_dC += tl.dot(tile(p_dy, s_yl, 1, o_t, o_p, l, p), b_S, input_precision=PREC)
                b_dB += tl.dot(tile(p_x, s_xl, 1, o_t, o_p, l, p), b_G, input_precision=PREC)
                b_hold += tl.sum(tl.sum(b_S * b_G, axis=1), axis=0)
            b_dC *= b_since[:, None]
            b_ds += tl.sum(b_dC * b_C, axis=1)  # what the starting state gives y_t grows with s_t
            b_dC += tl.dot(b_yx, tile(p_B, s_Bl, 1, o_t, o_n, l, n), input_precision=PREC)
            b_dB = b_dB * (b_after * b_delta)[:, None] + tl.dot(b_xy, b_C, input_precision=PREC)
            o_bc = ((i_b * l + o_t[:, None]) * h + i_h) * n + o_n[None, :]
            tl.store(p_dC + o_bc, b_dC, mask=(o_t < l)[:, None] & (o_n < n)[None, :])
            tl.store(p_dB + o_bc, b_dB, mask=(o_t < l)[:, None] & (o_n < n)[None, :])
        # a_t = Δ_t A moves every s from t on, and all that reaches the chunk's end from before t
        b_before = tl.sum(tl.where(o_i[None, :] < o_i[:, None], b_end[None, :], 0.), axis=1)  # cumsum - b_end would cancel
        b_da = tl.cumsum(b_ds, axis=0, reverse=True) + b_before
        b_da += b_hold * tl.exp(b_s_end.to(tl.float32))
        tl.store(p_ddelta + (i_b * l + o_t) * h + i_h, b_du_x + b_da * tl.load(p_A + i_h), mask=o_t < l)
        tl.store(p_dA + i_bch, tl.sum(b_da * b_delta, axis=0))

    @triton.jit
    def conv_window(p_x, p_w, b_bias, i_t, o_p, m_p, l, s_xl, W: tl.constexpr):
        """bias + Σ_k weight_k x_{t-W+1+k} for the tokens i_t (T,) and channels o_p (P,)."""
        b_sum = tl.zeros((i_t.shape[0], o_p.shape[0]), tl.float32) + b_bias[None, :]
        for k in tl.static_range(W):
            i_r = i_t - (W - 1) + k
            m = ((i_r >= 0) & (i_r < l))[:, None] & m_p[None, :]
            b_x = tl.load(p_x + i_r.to(tl.int64)[:, None] * s_xl + o_p[None, :], mask=m, other=0.).to(tl.float32)
            b_sum += b_x * tl.load(p_w + o_p * W + k, mask=m_p, other=0.).to(tl.float32)[None, :]
        return b_sum

    @triton.jit(do_not_specialize=SIZES)
    def conv_kernel(p_x, p_w, p_bias, p_y, p_dy, p_dx, p_dw, p_dbias, l, c, h, p, r, s_xb, s_xl, s_xh,
                    BACKWARD: tl.constexpr, BIAS: tl.constexpr, W: tl.constexpr, T: tl.constexpr, BP: tl.constexpr):
        """The convolution and its SiLU, or its gradients: dx per query head, dw and dbias per chunk of T tokens."""
        i_bch = tl.program_id(0).to(tl.int64)
        i_b, i_c, i_h = i_bch // (c * h), i_bch // h % c, i_bch % h
        i_t, o_p = i_c * T + tl.arange(0, T), tl.program_id(1) * BP + tl.arange(0, BP)
        m_p = o_p < p
        p_x += i_b * s_xb + i_h // r * s_xh
        p_w += i_h * p * W
        b_bias = tl.load(p_bias + i_h * p + o_p, mask=m_p, other=0.).to(tl.float32) if BIAS else tl.zeros((BP,), tl.float32)
        o_y = ((i_b * l + i_t[:, None]) * h + i_h) * p + o_p[None, :]
        if not BACKWARD:
            b_sum = conv_window(p_x, p_w, b_bias, i_t, o_p, m_p, l, s_xl, W)
            tl.store(p_y + o_y, b_sum * tl.sigmoid(b_sum), mask=(i_t < l)[:, None] & m_p[None, :])
        else:
            b_dx = tl.zeros((T, BP), tl.float32)
            for j in tl.static_range(W):  # token t is read by the windows of tokens t .. t + W - 1
                b_sum = conv_window(p_x, p_w, b_bias, i_t + j, o_p, m_p, l, s_xl, W)
                b_sig = tl.sigmoid(b_sum)
                b_dy = tl.load(p_dy + o_y + j * h * p, mask=(i_t + j < l)[:, None] & m_p[None, :], other=0.).to(tl.float32)
                b_g = b_dy * b_sig * (1 + b_sum * (1 - b_sig))
                b_dx += b_g * tl.load(p_w + o_p * W + W - 1 - j, mask=m_p, other=0.).to(tl.float32)[None, :]
                if j == 0:
                    tl.store(p_dbias + i_bch * p + o_p, tl.sum(b_g, axis=0), mask=m_p)
                    for k in tl.static_range(W):
                        i_r = i_t - (W - 1) + k
                        m = ((i_r >= 0) & (i_r < l))[:, None] & m_p[None, :]
                        b_x = tl.load(p_x + i_r.to(tl.int64)[:, None] * s_xl + o_p[None, :], mask=m, other=0.).to(tl.float32)
                        tl.store(p_dw + (i_bch * p + o_p) * W + k, tl.sum(b_g * b_x, axis=0), mask=m_p)
            tl.store(p_dx + o_y, b_dx, mask=(i_t < l)[:, None] & m_p[None, :])


def rows(t):
    """`t` and its strides over batch, length and head; copied only when its last axis is not contiguous."""
    t = t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()
    return t, t.stride()[:3]


def over_group(t, like):
    """Sum (b, l, h, w) over the query heads that share a kv head, into the shape and type of `like` (b, l, g, w)."""
    return t.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


class TritonScan(torch.autograd.Function):
    """x, Δ, A, B, C, h0 -> y (before D and z, float32), h. Keeps its inputs; the backward recomputes the states."""

    @staticmethod
    def setup(x, delta, A, B, C):
        """The sizes, the launch grids and the numbers every kernel takes."""
        b, l, h, n = C.shape
        p, mamba2 = x.shape[3], A.dim() == 1
        T = TD if mamba2 else T6
        c = triton.cdiv(l, T)
        BN = min(64, max(16, triton.next_power_of_2(n))) if mamba2 else triton.next_power_of_2(n)
        BP = min(64, max(16, triton.next_power_of_2(p))) if mamba2 else min(triton.next_power_of_2(p), max(1, 1024 // BN))
        meta = dict(T=T, BP=BP, BN=BN, num_warps=4 if mamba2 else max(1, BP * BN // 256))
        if mamba2:  # bf16 and fp16 fit in TF32's mantissa, so their products are exact; float32 is multiplied in full
            meta["PREC"] = "ieee" if x.dtype == torch.float32 else "tf32"
        return b, l, c, h, p, n, mamba2, meta, (b * c * h, triton.cdiv(p, BP), triton.cdiv(n, BN) if mamba2 else 1)

    @staticmethod
    def passing(S, delta, A, h0, T, reverse=False):
        """Step 2 over S (b, c, h, p, n), in place; returns the state (or adjoint) at the other end, (b, h, p, n)."""
        b, c, h, p, n = S.shape
        total = split_chunks(T, delta)[0].sum(2)                               # ΣΔ (b, c, h) or (b, c, h, p)
        s_A, s_t = A.stride() + (0,) * (3 - A.dim()), total.stride() + (0,) * (4 - total.dim())
        end, block = torch.empty_like(h0), min(256, triton.next_power_of_2(p * n))
        pass_kernel[(b * h, triton.cdiv(p * n, block))](S, total, A, h0, end, c, h, p, n, *s_A, *s_t,
                                                        REVERSE=reverse, BLOCK=block, num_warps=max(1, block // 128))
        return end

    @staticmethod
    def starts(x, delta, A, B, C, h0):
        """Steps 1 and 2: the state every chunk starts from (b, c, h, p, n), and the last state."""
        b, l, c, h, p, n, mamba2, meta, grid = TritonScan.setup(x, delta, A, B, C)
        (x, s_x), (B, s_B), (C, s_C) = rows(x), rows(B), rows(C)
        S = torch.empty(b, c, h, p, n, device=x.device, dtype=torch.float32)
        if mamba2:
            ssd_state_kernel[grid](x, B, delta, A, S, l, c, h, p, n, h // x.shape[2], h // B.shape[2], *s_x, *s_B,
                                   ADJOINT=False, **meta)
        else:
            s6_forward_kernel[grid](x, delta, A, B, C, S, S, l, c, h, p, n, h // x.shape[2], h // B.shape[2],
                                    *s_x, *s_B, *s_C, OUTPUT=False, **meta)
        return S, TritonScan.passing(S, delta, A, h0, meta["T"])

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h0):
        delta, A, h0 = delta.float().contiguous(), A.float().contiguous(), h0.float().contiguous()
        b, l, c, h, p, n, mamba2, meta, grid = TritonScan.setup(x, delta, A, B, C)
        S, end = TritonScan.starts(x, delta, A, B, C, h0)
        (xc, s_x), (Bc, s_B), (Cc, s_C) = rows(x), rows(B), rows(C)
        y = torch.empty(b, l, h, p, device=x.device, dtype=torch.float32)
        kernel = ssd_output_kernel if mamba2 else s6_forward_kernel
        kernel[grid[:2]](xc, delta, A, Bc, Cc, S, y, l, c, h, p, n, h // x.shape[2], h // B.shape[2],
                         *s_x, *s_B, *s_C, **meta, **({} if mamba2 else dict(OUTPUT=True)))
        ctx.save_for_backward(x, delta, A, B, C, h0)
        return y, end

    @staticmethod
    def backward(ctx, dy, dh):
        x, delta, A, B, C, h0 = ctx.saved_tensors
        b, l, c, h, p, n, mamba2, meta, grid = TritonScan.setup(x, delta, A, B, C)
        (xc, s_x), (Bc, s_B), (Cc, s_C), (dy, s_y) = rows(x), rows(B), rows(C), rows(dy)
        rx, rb = h // x.shape[2], h // B.shape[2]
        S, _ = TritonScan.starts(x, delta, A, B, C, h0)
        G = torch.empty_like(S)
        new = lambda *shape: torch.empty(*shape, device=x.device, dtype=torch.float32)  # noqa: E731
        dx, ddelta, parts = new(b, l, h, p), torch.empty_like(delta), 1 if mamba2 else grid[1]
        dA, dB, dC = new(b * c, *A.shape), new(parts, b, l, h, n), new(parts, b, l, h, n)
        every = (xc, delta, A, Bc, Cc, dy, S, G, dx, ddelta, dA, dB, dC)
        sizes = (l, c, h, p, n, rx, rb, *s_x, *s_B, *s_C, *s_y)
        if mamba2:
            ssd_state_kernel[grid](dy, Cc, delta, A, G, l, c, h, p, n, 1, 1, *s_y, *s_C, ADJOINT=True, **meta)
            dh0 = TritonScan.passing(G, delta, A, dh.contiguous(), TD, reverse=True)
            ssd_backward_kernel[(grid[0],)](*every, *sizes, **meta)
        else:
            s6_backward_kernel[grid[:2]](*every, b, *sizes, GRADS=False, **meta)
            dh0 = TritonScan.passing(G, delta, A, dh.contiguous(), T6, reverse=True)
            s6_backward_kernel[grid[:2]](*every, b, *sizes, GRADS=True, **meta)
        return over_group(dx, x), ddelta, dA.sum(0), over_group(dB.sum(0), B), dC.sum(0).to(C.dtype), dh0


class TritonConv(torch.autograd.Function):
    """x (b, l, g, p), weight (h, p, w), bias (h, p) or None -> y (b, l, h, p)."""

    @staticmethod
    def launch(x, weight, bias, y, dy, dx, dw, dbias, backward):
        (b, l, g, p), (h, _, w), (x, s_x) = x.shape, weight.shape, rows(x)
        meta = dict(T=32, BP=min(128, triton.next_power_of_2(p)), W=w, BACKWARD=backward, BIAS=bias is not None)
        c = triton.cdiv(l, meta["T"])
        conv_kernel[b * c * h, triton.cdiv(p, meta["BP"])](x, weight, weight if bias is None else bias, y, dy, dx, dw, dbias,
                                                           l, c, h, p, h // g, *s_x, **meta)

    @staticmethod
    def forward(ctx, x, weight, bias):
        weight, bias = weight.contiguous(), bias if bias is None else bias.contiguous()
        y = x.new_empty(x.shape[0], x.shape[1], *weight.shape[:2])
        TritonConv.launch(x, weight, bias, y, y, y, y, y, backward=False)
        ctx.save_for_backward(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        blocks = x.shape[0] * triton.cdiv(x.shape[1], 32)
        dx = torch.empty(dy.shape, device=x.device, dtype=torch.float32)
        dw = torch.empty(blocks, *weight.shape, device=x.device, dtype=torch.float32)
        dbias = torch.empty(blocks, *weight.shape[:2], device=x.device, dtype=torch.float32)
        TritonConv.launch(x, weight, bias, dx, dy.contiguous(), dx, dw, dbias, backward=True)
        return (over_group(dx, x), dw.sum(0).to(weight.dtype), None if bias is None else dbias.sum(0).to(bias.dtype))
