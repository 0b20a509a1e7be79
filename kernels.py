"""The recurrence under a Mamba layer: written once in plain PyTorch, then made fast.

    Δ_t = softplus(dt_t + dt_bias)                         the step size
    h_t = exp(Δ_t A) ∘ h_{t-1} + (Δ_t x_t) B_tᵀ            the state, a p × n matrix per head
    y_t = h_t C_t + D ∘ x_t,   then   y_t ∘ silu(z_t)      the output, its skip and its gate

Without Δ, A, D and z this is causal attention without the softmax, so each symbol has an attention
name (The Mamba in the Llama, arXiv 2408.15237, section 2):

    C  query  (b, l, h, n)      b  batch       h  query heads        n  state size per head
    B  key    (b, l, g, n)      l  length      g  key/value heads    p  channels per head
    x  value  (b, l, g, p)                     w  width of the convolution, 4

Grouped-query attention carries over: query head i reads kv head i // (h/g). Kernels read x and B
where they lie. The shape of A tells the two decays apart:

    Mamba (S6)     dt (b, l, h, p)  A (h, p, n)  a step per channel, a decay per state element
    Mamba-2 (SSD)  dt (b, l, h)     A (h,)       one of each per head: a tile of tokens is a few
                                                 products of matrices

A row may hold several documents (packed sequences). pos (b, l) is the place of each token in its
own document; where it is 0 the decay counts as 0, so nothing of the document before is left.

In this file
    ssm_reference, conv_reference    the definitions; the tests measure all else against them
    ssm_scan, causal_conv            the same, fast and differentiable: Triton on CUDA, else PyTorch
    linear, attend, replay           a model's layers for the few tokens of a decoding step

How a scan is made fast. The recurrence is linear in h, so a sequence can be cut anywhere: every
piece computes the state it would end with from h = 0; joined from piece to piece, these are the
states the pieces start from; then every piece computes its outputs. In PyTorch the pieces are many
short chunks, and all of them are one tensor operation. In Triton, batch and heads fill a GPU by
themselves, so a program walks a whole row with the state in registers, tile by tile, and only the
rows of a small batch are cut.

The gradient is the same walk backwards in time. The adjoint G_t = ∂L/∂h_t obeys

    G_t = exp(Δ_{t+1} A) ∘ G_{t+1} + dy_t C_tᵀ

and every gradient is a product of h and G. States are not kept for the backward pass; it walks
forward once more and leaves those that it needs in memory.

Names in kernels: p_ a pointer, s_ the distance of two tokens, b_ a block in registers, o_
offsets, m_ a mask, i_ an index; T tokens together, BP and BN blocks of p and n.
"""

import os

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # Triton is for Linux only; without it every function takes its PyTorch form
    triton = constexpr = None

    def jit(f=None, **_):
        return f or jit


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined


def use_triton(x):
    """Whether `x` goes to Triton: on CUDA, or anywhere under TRITON_INTERPRET=1; never float64."""
    return triton is not None and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


# --------------------------------------------------------------------------------------------------
# The definitions


def repeat_heads(t, h):
    """(b, l, g, w) -> (b, l, h, w): head i reads kv head i // (h/g)."""
    return t.repeat_interleave(h // t.shape[2], dim=2)


def ssm_reference(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None, pos=None):
    """The recurrence above, token by token (the paper's Eq. 1, discretised as in Mamba).

    D and dt_bias are shaped like dt without (b, l); z is (b, l, h, p), h0 (b, h, p, n), pos (b, l).
    The state is float32, or float64 when x is. Returns y (b, l, h, p) in x's type, and the last
    state.
    """
    f = torch.promote_types(x.dtype, torch.float32)
    (h, n), p = C.shape[2:], x.shape[3]
    xs, Bs, Cs = repeat_heads(x, h).to(f), repeat_heads(B, h).to(f), C.to(f)
    delta = F.softplus(dt.to(f) if dt_bias is None else dt.to(f) + dt_bias.to(f))
    if A.dim() == 1:  # Mamba-2 is Mamba with every channel and state element alike
        delta, A = delta[..., None], A[:, None, None]
        D = None if D is None else D[:, None]
    state = x.new_zeros(x.shape[0], h, p, n, dtype=f) if h0 is None else h0.to(f)
    ys = []
    for t in range(x.shape[1]):
        if pos is not None:
            state = state.masked_fill((pos[:, t] == 0)[:, None, None, None], 0)
        write = (delta[:, t] * xs[:, t])[..., None] * Bs[:, t, :, None]
        state = torch.exp(delta[:, t, ..., None] * A.to(f)) * state + write
        ys.append(torch.einsum("bhpn,bhn->bhp", state, Cs[:, t]))
    y = torch.stack(ys, dim=1)
    y = y if D is None else y + D.to(f) * xs
    y = y if z is None else y * F.silu(z.to(f))
    return y.to(x.dtype), state


def conv_reference(x, weight, bias=None, pos=None):
    """Causal depthwise convolution with SiLU: y_t = silu(bias + Σ_k weight_k x_{t-w+1+k}).

    x (b, l, g, p); weight (h, p, w), bias (h, p): query head i reads kv head i // (h/g). With pos
    (b, l) a token sees zeros in place of what lies before its document. Returns y (b, l, h, p) in
    x's type.
    """
    (l, g), w, f = x.shape[1:3], weight.shape[2], torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x, (0, 0, 0, 0, w - 1, 0)).to(f).unsqueeze(3)  # (b, w - 1 + l, g, 1, p)
    weight = weight.to(f).unflatten(0, (g, -1))  # (g, h/g, p, w)
    y = 0
    for k in range(w):
        tap = padded[:, k : k + l]
        if pos is not None:
            tap = tap.masked_fill((pos < w - 1 - k)[:, :, None, None, None], 0)
        y = y + tap * weight[..., k]
    y = y.flatten(2, 3)
    return F.silu(y if bias is None else y + bias.to(f)).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# The public, fast forms


def ssm_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None, pos=None):
    """`ssm_reference`, fast and once differentiable: the same arguments and results up to rounding.

    An infinity or NaN in an input of Mamba-2 can reach the 63 tokens before it, in its tile. p or n
    above 256 take the PyTorch form. Raises ValueError, naming the argument, if shapes do not fit.
    """
    check_ssm(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    gate = None
    if A.dim() == 1:  # Mamba-2's kernels have no gate: in a model, the norm comes with it
        gate, z = z, None
    if use_triton(x) and x.shape[1] > 1 and max(x.shape[3], C.shape[3]) <= 256:
        pos = None if pos is None else pos.int().contiguous()
        if B.shape[2] != x.shape[2]:  # in a Llama they never differ
            x, B = repeat_heads(x, C.shape[2]), repeat_heads(B, C.shape[2])
        y, h = scan_rows(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    else:
        with torch.autocast(x.device.type, enabled=False):  # state and Δ A stay float32
            y, h = scan_torch(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    if gate is not None:
        f = torch.promote_types(x.dtype, torch.float32)
        y = (y.to(f) * F.silu(gate.to(f))).to(x.dtype)
    return y, h


def scan_rows(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    """The scan by the kernels. The rows of a small batch are cut, which costs a second walk."""
    b, l, h, n = C.shape
    c = segments(b * h * x.shape[3], l)
    if c == 1:
        return SCAN(x, dt, A, B, C, D, z, dt_bias, h0, pos)

    def rows(t):
        return None if t is None else t.unflatten(1, (c, -1)).flatten(0, 1)  # (b·c, l / c, …)

    x, dt, B, C, z, pos = map(rows, (x, dt, B, C, z, pos))
    _, ends = SCAN(x, dt, A, B, C, None, None, dt_bias, None, pos)
    delta = F.softplus(dt.float() if dt_bias is None else dt.float() + dt_bias)
    decay = torch.exp(delta.sum(1).view(b * c, h, -1, 1) * A.view(h, -1, n if A.dim() == 3 else 1))
    if pos is not None:
        decay = decay.masked_fill((pos == 0).any(1)[:, None, None, None], 0)
    h0 = ends.new_zeros(b, *ends.shape[1:]) if h0 is None else h0.float()
    starts, _ = pass_states(ends.unflatten(0, (b, c)), decay.unflatten(0, (b, c)), h0)
    y, state = SCAN(x, dt, A, B, C, D, z, dt_bias, starts.flatten(0, 1), pos)
    return y.unflatten(0, (b, c)).flatten(1, 2), state.unflatten(0, (b, c))[:, -1]


def segments(channels, l):
    """Into how many segments to cut rows of l tokens, `channels` in all; 1 where it does not pay.

    A large GPU is full with 16,384 channels: 1,024 programs of Mamba, 256 of Mamba-2.
    """
    most = min(16384 // max(1, channels), l // 1024)
    return next((c for c in range(most, 3, -1) if l % c == 0), 1)


def causal_conv(x, weight, bias=None, state=None, lengths=None, pos=None):
    """`conv_reference`, fast and differentiable, which goes on from a state and returns the next.

    state (b, w - 1, g, p) holds the inputs before x, zeros if None. With lengths (b,) row i has
    only that many real tokens, padded on the right. Returns y and each row's last w - 1 real
    inputs. Raises ValueError, naming the argument, if shapes do not fit.
    """
    check_conv(x, weight, bias, state, pos)
    (_, _, g, p), w = x.shape, weight.shape[2]
    full, skip = x, 0
    if state is not None:
        full, skip = torch.cat([state.to(x.dtype), x], dim=1), w - 1
        pos = None if pos is None else F.pad(pos, (skip, 0))
    if use_triton(x):
        y = CONV(full, weight, bias, None if pos is None else pos.int().contiguous())
    else:
        y = conv_reference(full, weight, bias, pos)
    y = y[:, skip:]
    if lengths is None:
        tail = full[:, max(0, full.shape[1] - (w - 1)) :]
        return y, F.pad(tail, (0, 0, 0, 0, w - 1 - tail.shape[1], 0))
    full = F.pad(x, (0, 0, 0, 0, w - 1, 0)) if state is None else full  # (b, w - 1 + l, g, p)
    at = lengths[:, None] + torch.arange(w - 1, device=x.device)  # (b, w - 1)
    return y, full.gather(1, at[..., None, None].expand(-1, -1, g, p))


def check_shapes(where, about, **wanted):
    """Raises ValueError for the first of (tensor or None, shape) that do not agree."""
    for name, (t, shape) in wanted.items():
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{where}: {name} is {tuple(t.shape)}, expected {shape} for {about}")


def check_ssm(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    for name, t, axes in (("x", x, "b, l, g, p"), ("B", B, "b, l, g, n"), ("C", C, "b, l, h, n")):
        if t.dim() != 4:
            raise ValueError(f"ssm: {name} is {tuple(t.shape)}, expected four axes ({axes})")
    (b, l, gx, p), gb, (h, n) = x.shape, B.shape[2], C.shape[2:]
    if B.shape[3] != n:
        raise ValueError(f"ssm: B is {tuple(B.shape)} and C is {tuple(C.shape)}; n must agree")
    kind, per, A_shape = ("Mamba-2", (h,), (h,)) if A.dim() == 1 else ("Mamba", (h, p), (h, p, n))
    about = f"x {tuple(x.shape)}, C {tuple(C.shape)} and {kind} (A has {A.dim()} axes)"
    over_heads = dict(A=(A, A_shape), D=(D, per), dt_bias=(dt_bias, per), h0=(h0, (b, h, p, n)))
    over_tokens = dict(B=(B, (b, l, gb, n)), C=(C, (b, l, h, n)), z=(z, (b, l, h, p)))
    check_shapes(
        "ssm", about, **over_heads, dt=(dt, (b, l, *per)), **over_tokens, pos=(pos, (b, l))
    )
    if l < 1:
        raise ValueError("ssm: x has no tokens (l = 0), expected at least one")
    if h % gx or h % gb:
        raise ValueError(
            f"ssm: kv heads of x ({gx}) and B ({gb}) must both divide query heads ({h})"
        )


def check_conv(x, weight, bias, state, pos):
    (b, l, g, p), (h, _, w) = x.shape, weight.shape
    if l < 1:
        raise ValueError("causal_conv: x has no tokens (l = 0), expected at least one")
    if h % g:
        raise ValueError(f"causal_conv: kv heads of x ({g}) must divide the heads of weight ({h})")
    shapes = dict(weight=(weight, (h, p, w)), bias=(bias, (h, p)), pos=(pos, (b, l)))
    check_shapes("causal_conv", f"x {tuple(x.shape)}", **shapes, state=(state, (b, w - 1, g, p)))


# --------------------------------------------------------------------------------------------------
# The scan in PyTorch: chunks, vectorised


def scan_torch(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    """The scan in chunks of T tokens (the file's header). Returns y and the last state."""
    if x.shape[1] == 1:  # one token has nothing to run in parallel
        return ssm_reference(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    f = torch.promote_types(x.dtype, torch.float32)
    b, h, p, n = x.shape[0], C.shape[2], x.shape[3], C.shape[3]
    delta = F.softplus(dt.to(f) if dt_bias is None else dt.to(f) + dt_bias.to(f))
    h0 = x.new_zeros(b, h, p, n, dtype=f) if h0 is None else h0.to(f)
    chunked = ssd_torch if A.dim() == 1 else s6_torch
    y, state = chunked(x.to(f), delta, A.to(f), B.to(f), C.to(f), h0, pos)
    if D is not None:
        D = D[:, None] if D.dim() == 1 else D
        y = y + repeat_heads(x, h) * D.to(f)
    if z is not None:
        y = y * F.silu(z.to(f))
    return y.to(x.dtype), state


def split_chunks(T, *tensors):
    """(b, l, …) -> (b, c, T, …), padded with zeros: where Δ = 0 the state does not change."""
    pad = -tensors[0].shape[1] % T
    return [F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)).unflatten(1, (-1, T)) for t in tensors]


def pass_states(ends, decay, h0):
    """The states that chunks start from (b, c, h, p, n), and the last one, from those that they end
    with on their own, and their decay, broadcastable."""
    starts = []
    for i in range(ends.shape[1]):
        starts.append(h0)
        h0 = decay[:, i] * h0 + ends[:, i]
    return torch.stack(starts, dim=1), h0


def s6_torch(x, delta, A, B, C, h0, pos=None):
    """Mamba. With T = √l both loops, over a chunk's tokens and over the chunks, take √l turns."""
    l, h = x.shape[1], len(A)
    T = max(1, round(l**0.5))
    x, B = repeat_heads(x, h), repeat_heads(B, h)
    x, delta, B, C = split_chunks(T, x, delta, B, C)
    decay = torch.exp(delta[..., None] * A)  # (b, c, T, h, p, n)
    total = torch.exp(delta.cumsum(2)[..., None] * A)  # since the chunk's start
    if pos is not None:
        first = split_chunks(T, pos == 0)[0][..., None, None, None]  # where documents start
        decay = decay.masked_fill(first, 0)
        total = total.masked_fill(first.cumsum(2) > 0, 0)
    write = (delta * x)[..., None] * B[..., None, :]  # (b, c, T, h, p, n)
    states = [write[:, :, 0]]
    for t in range(1, T):
        states.append(decay[:, :, t] * states[-1] + write[:, :, t])
    starts, last = pass_states(states[-1], total[:, :, -1], h0)
    states = torch.stack(states, dim=2) + total * starts[:, :, None]
    y = torch.einsum("bcthpn,bcthn->bcthp", states, C)
    return y.flatten(1, 2)[:, :l], last


def ssd_torch(x, delta, A, B, C, h0, pos=None, T=64):
    """Mamba-2. Inside a chunk y = (decay ∘ C Bᵀ) (Δ x): attention weighted by the decay."""
    l, h = x.shape[1], C.shape[2]
    T = min(T, l)
    x, B = repeat_heads(x, h), repeat_heads(B, h)
    x, delta, B, C = split_chunks(T, x, delta, B, C)
    a = delta.double() * A.double()  # (b, c, T, h)
    if pos is not None:  # e^-800 is 0 in float64 too; a lower value would blur its neighbours in s
        a = a.masked_fill(split_chunks(T, pos == 0)[0][..., None], -800)
    # float64 for s: far into a chunk it is large, and small differences between neighbours matter
    s = a.cumsum(2).transpose(2, 3)  # (b, c, h, T): log decay since the chunk's start
    later = torch.ones(T, T, dtype=torch.bool, device=s.device).triu(1)
    between = (s[..., :, None] - s[..., None, :]).masked_fill(later, -torch.inf).to(x.dtype).exp()
    since = s.to(x.dtype).exp().transpose(2, 3)[..., None]  # (b, c, T, h, 1)
    after = (s[..., -1:] - s).to(x.dtype).exp().transpose(2, 3)[..., None]
    u = delta[..., None] * x  # (b, c, T, h, p)
    ends = torch.einsum("bcthp,bcthn->bchpn", u * after, B)
    starts, last = pass_states(ends, since[:, :, -1, ..., None], h0)
    scores = torch.einsum("bcthn,bcshn->bchts", C, B)  # C Bᵀ
    y = torch.einsum("bchts,bcshp->bcthp", scores * between, u)
    y = y + torch.einsum("bcthn,bchpn->bcthp", C, starts) * since
    return y.flatten(1, 2)[:, :l], last


# --------------------------------------------------------------------------------------------------
# Triton: what all kernels share. A tensor (b, l, …) comes with the distance of its tokens,
# a constant, which turns addresses into immediates (`strided`). An optional tensor is None.

LOG2E = constexpr(1.4426950408889634) if triton else None


@jit
def read(ptr, m):
    """Numbers in float32, 0 where the mask is False."""
    return tl.load(ptr, mask=m, other=0.0).to(tl.float32)


@jit
def softplus(b):
    """log(1 + e^b) = max(b, 0) + log(1 + e), e = e^-|b|, where log(1 + e) = 2 artanh(e / (2 + e)).

    The series of artanh is right to 2e-7 of the result, also for a tiny e.
    """
    b_e = tl.exp2(tl.abs(b) * -LOG2E)
    b_w = b_e / (2 + b_e)
    b_q = b_w * b_w
    b_series = 1 + b_q * (1 / 3 + b_q * (1 / 5 + b_q * (1 / 7 + b_q / 8.25)))  # 1/9 and the rest
    return tl.maximum(b, 0.0) + 2 * b_w * b_series


@jit
def softplus_slope(b_delta):
    """The derivative of softplus where it is Δ: 1 - e^-Δ, by its series where Δ is small."""
    b_series = 1 - b_delta / 2 * (1 - b_delta / 3 * (1 - b_delta / 4 * (1 - b_delta / 5)))
    return tl.where(b_delta < 0.05, b_delta * b_series, 1 - tl.exp(-b_delta))


@jit
def silu(b):
    return b * tl.sigmoid(b)


@jit
def silu_slope(b):
    """The derivative of silu."""
    b_sig = tl.sigmoid(b)
    return b_sig * (1 + b * (1 - b_sig))


# --------------------------------------------------------------------------------------------------
# Mamba (S6). One program walks one row, one head, BP of its channels; a state is a tile (n, p).

S6_BLOCK = 16  # channels of a program: one warp holds 16 × 16 states
S6_TILE = 8  # tokens of one associative scan
S6_SAVE = 2  # tokens between two saved states; the backward holds theirs in registers


@jit
def s6_program(p_A, p_D, p_bias, p_h, h, p: constexpr, n: constexpr, BP: constexpr, BN: constexpr):
    """A program's row, head, channels, states and their masks, and A, D, the bias and a state."""
    i_b = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)[None, :]
    o_n = tl.arange(0, BN)[:, None]
    m_p = o_p < p
    m_n = o_n < n
    b_A = read(p_A + i_h * (p * n) + o_p * n + o_n, m_n & m_p) * LOG2E
    b_D = tl.zeros((1, BP), tl.float32)
    b_bias = tl.zeros((1, BP), tl.float32)
    b_h = tl.zeros((BN, BP), tl.float32)
    if p_D is not None:
        b_D = read(p_D + i_h * p + o_p, m_p)
    if p_bias is not None:
        b_bias = read(p_bias + i_h * p + o_p, m_p)
    if p_h is not None:
        b_h = read(p_h + (i_b * h + i_h) * (p * n) + o_p * n + o_n, m_n & m_p)
    return i_b, i_h, o_p, o_n, m_p, m_n, b_A, b_D, b_bias, b_h


@jit
def s6_tokens(
    p_dt, s_dt: constexpr, p_x, s_x: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr,
    p_z, s_z: constexpr, p_dy, s_dy: constexpr, p_pos,
    t, l, o_p, p: constexpr, o_n, n: constexpr, T: constexpr,
):  # fmt: skip
    """dt, x, B, C, dy, z and pos of the T tokens from t on. Outside the row Δ = 0, which changes no
    state. The loop asks for them a turn before their use, to hide the memory's latency."""
    tokens = ()
    for j in tl.static_range(T):
        m = (t + j >= 0) & (t + j < l)
        m_p = o_p < tl.where(m, p, 0)
        m_n = o_n < tl.where(m, n, 0)
        b_dt = tl.load(p_dt + t * s_dt + j * s_dt, mask=m_p, other=-float("inf"))
        b_x = tl.load(p_x + t * s_x + j * s_x, mask=m_p, other=0.0)
        b_B = tl.load(p_B + t * s_B + j * s_B, mask=m_n, other=0.0)
        b_C = tl.load(p_C + t * s_C + j * s_C, mask=m_n, other=0.0)
        b_dy = tl.load(p_dy + t * s_dy + j * s_dy, mask=m_p, other=0.0)
        b_z, b_pos = b_dy, 1  # stand-ins
        if p_z is not None:
            b_z = tl.load(p_z + t * s_z + j * s_z, mask=m_p, other=0.0)
        if p_pos is not None:
            b_pos = tl.load(p_pos + t + j, mask=m, other=1)
        tokens = tokens + ((b_dt, b_x, b_B, b_C, b_dy, b_z, b_pos),)
    return tokens


@jit
def s6_decay(b_delta, b_A, b_pos):
    """exp(Δ A), or 0 at the start of a document; -1e30 does that also where A is 0."""
    return tl.exp2(b_delta * b_A + tl.where(b_pos == 0, -1e30, 0.0))


@jit
def s6_join(a_1, h_1, a_2, h_2):
    """Two stretches of h ← a h + u, one after the other, as one."""
    return a_1 * a_2, a_2 * h_1 + h_2


#     h ← exp(Δ A) ∘ h + B (Δ x)ᵀ,    y = (Cᵀ h + D ∘ x) ∘ silu(z)
#
# T tokens at a time by an associative scan, whose first element takes in the state before them.
# With p_S it also saves the state before every SAVE-th token, in S (b, ⌈l/SAVE⌉, h, n, p).
@jit(do_not_specialize=["l"])
def s6_forward_kernel(
    p_x, s_x: constexpr, p_dt, s_dt: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr,
    p_z, s_z: constexpr, p_A, p_D, p_bias, p_h0, p_pos, p_y, p_h, p_S,
    l, h: constexpr, p: constexpr, n: constexpr, r: constexpr,
    SAVE: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    about = s6_program(p_A, p_D, p_bias, p_h0, h, p, n, BP, BN)
    i_b, i_h, o_p, o_n, m_p, m_n, b_A, b_D, b_bias, b_h = about
    o_k = tl.arange(0, BN)[None, :]  # n once more, along the other axis
    p_x += i_b * l * s_x + i_h // r * p + o_p
    p_dt += i_b * l * s_dt + i_h * p + o_p
    p_B += i_b * l * s_B + i_h // r * n + o_k
    p_C += i_b * l * s_C + i_h * n + o_k
    first = (tl.arange(0, T) == 0)[:, None, None]
    last = (tl.arange(0, T) == T - 1)[:, None, None]
    o_t = tl.arange(0, T)[:, None].to(tl.int64)
    if p_S is not None:
        p_S += (i_b * tl.cdiv(l, SAVE) * h + i_h) * (n * p) + o_n * p + o_p
        tl.store(p_S, b_h, mask=m_n & m_p)
    for i_t in tl.range(0, tl.cdiv(l, T), num_stages=3):
        t = i_t * T + o_t
        m_tp = (t < l) & m_p
        m_tn = (t < l) & (o_k < n)
        b_dt = tl.load(p_dt + t * s_dt, mask=m_tp, other=-float("inf"))  # past the end Δ = 0
        b_x = read(p_x + t * s_x, m_tp)
        b_B = read(p_B + t * s_B, m_tn)
        b_C = read(p_C + t * s_C, m_tn)
        b_delta = softplus(b_dt.to(tl.float32) + b_bias)
        b_pos = t + 1
        if p_pos is not None:
            b_pos = tl.load(p_pos + i_b * l + t, mask=t < l, other=1)
        b_decay = s6_decay(b_delta[:, None, :], b_A[None], b_pos[:, :, None])  # (T, n, p)
        b_write = (b_delta * b_x)[:, None, :] * b_B[:, :, None]
        b_write = tl.where(first, b_write + b_decay * b_h[None], b_write)
        _, b_hs = tl.associative_scan((b_decay, b_write), 0, s6_join)
        b_h = tl.sum(tl.where(last, b_hs, 0.0), axis=0)
        b_y = tl.sum(b_hs * b_C[:, :, None], axis=1) + b_D * b_x
        if p_z is not None:
            b_y *= silu(read(p_z + (i_b * l + t) * s_z + i_h * p + o_p, m_tp))
        tl.store(p_y + ((i_b * l + t) * h + i_h) * p + o_p, b_y, mask=m_tp)
        if p_S is not None:
            after = (t + 1)[:, :, None]
            m_S = (after % SAVE == 0) & (after < l) & (m_n & m_p)[None]
            tl.store(p_S[None] + after // SAVE * (h * n * p), b_hs, mask=m_S)
    tl.store(p_h + (i_b * h + i_h) * (p * n) + o_p * n + o_n, b_h, mask=m_n & m_p)


#     G ← G + C dyᵀ                      the adjoint of the state; dy without the gate's share
#     dC = h dy,  dB = G (Δ x),  du = Bᵀ G,  dx = Δ ∘ du + D ∘ dy
#     da = G ∘ exp(Δ A) ∘ h_{t-1}        the adjoint of the exponent Δ A
#     dΔ = du ∘ x + Σ_n da ∘ A,  dA = Σ_t Δ da,  dD = Σ_t dy ∘ x,  ddt = dΔ ∘ softplus'
#     G ← exp(Δ A) ∘ G
#
# T tokens at a time from the end: their states are computed again from S and held in registers. dx,
# dB and dC come per query head (dB, dC also per block of channels); sums (b, h, p, n + 2) holds dA,
# dD and dbias per row. The sums over p of dB and dC are products with ones, since a sum across a
# warp takes far more instructions.
@jit(do_not_specialize=["l"])
def s6_backward_kernel(
    p_x, s_x: constexpr, p_dt, s_dt: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr,
    p_z, s_z: constexpr, p_dy, s_dy: constexpr,
    p_A, p_D, p_bias, p_dh, p_pos, p_S, p_dx, p_ddt, p_dB, p_dC, p_dz, p_dh0, p_sums,
    l, h: constexpr, p: constexpr, n: constexpr, r: constexpr,
    T: constexpr, BP: constexpr, BN: constexpr, PREC: constexpr,
):  # fmt: skip
    about = s6_program(p_A, p_D, p_bias, p_dh, h, p, n, BP, BN)
    i_b, i_h, o_p, o_n, m_p, m_n, b_A, b_D, b_bias, b_G = about
    o_one = tl.arange(0, 16)[None, :]  # a product is 16 wide; the first of its columns is stored
    b_ones = tl.full((BP, 16), 1.0, tl.float32)
    p_x += i_b * l * s_x + i_h // r * p + o_p
    p_dt += i_b * l * s_dt + i_h * p + o_p
    p_B += i_b * l * s_B + i_h // r * n + o_n
    p_C += i_b * l * s_C + i_h * n + o_n
    p_dy += i_b * l * s_dy + i_h * p + o_p
    if p_z is not None:
        p_z += i_b * l * s_z + i_h * p + o_p
    if p_pos is not None:
        p_pos += i_b * l
    p_S += (i_b * tl.cdiv(l, T) * h + i_h) * (n * p) + o_n * p + o_p
    o_y = (i_b * l * h + i_h) * p + o_p
    i_part = tl.program_id(1) * (tl.num_programs(0) // h) + i_b
    o_BC = (i_part * l * h + i_h) * n + o_n + 0 * o_one
    b_dA = tl.zeros((BN, BP), tl.float32)
    b_dD = tl.zeros((1, BP), tl.float32)
    b_dbias = tl.zeros((1, BP), tl.float32)
    at = p_dt, s_dt, p_x, s_x, p_B, s_B, p_C, s_C, p_z, s_z, p_dy, s_dy, p_pos
    t = 0 * i_b + tl.cdiv(l, T) * T  # int64
    ahead = s6_tokens(*at, t - T, l, o_p, p, o_n, n, T)
    for _ in range(tl.cdiv(l, T)):
        t -= T
        tokens = ahead
        ahead = s6_tokens(*at, t - T, l, o_p, p, o_n, n, T)
        b_h = tl.load(p_S + t // T * (h * n * p), mask=m_n & m_p, other=0.0)
        states = ()
        for j in tl.static_range(T):
            b_dt, b_x, b_B, _, _, _, b_pos = tokens[j]
            b_delta = softplus(b_dt.to(tl.float32) + b_bias)
            b_decay = s6_decay(b_delta, b_A, b_pos)
            b_before = b_h
            b_h = b_decay * b_h + b_B.to(tl.float32) * (b_delta * b_x.to(tl.float32))
            states = states + ((b_delta, b_decay, b_before, b_h),)
        for j in tl.static_range(T - 1, -1, -1):
            b_dt, b_x, b_B, b_C, b_dy, b_z, _ = tokens[j]
            b_delta, b_decay, b_before, b_h = states[j]
            b_x = b_x.to(tl.float32)
            b_C = b_C.to(tl.float32)
            b_dy = b_dy.to(tl.float32)
            m_pt = o_p < tl.where(t + j < l, p, 0)
            m_nt = o_n < tl.where(t + j < l, n, 0)
            o_yt = o_y + t * (h * p) + j * (h * p)
            if p_z is not None:
                b_z = b_z.to(tl.float32)
                b_y = tl.sum(b_h * b_C, axis=0, keep_dims=True) + b_D * b_x
                tl.store(p_dz + o_yt, b_dy * b_y * silu_slope(b_z), mask=m_pt)
                b_dy *= silu(b_z)
            b_G += b_C * b_dy
            b_du = tl.sum(b_G * b_B, axis=0, keep_dims=True)
            b_dB = tl.dot(b_G * (b_delta * b_x), b_ones, input_precision=PREC)
            b_dC = tl.dot(b_h * b_dy, b_ones, input_precision=PREC)
            b_G *= b_decay
            b_da = b_G * b_before
            b_ddelta = b_du * b_x + tl.sum(b_da * b_A, axis=0, keep_dims=True) / LOG2E
            b_ddt = b_ddelta * tl.sigmoid(b_dt.to(tl.float32) + b_bias)
            tl.store(p_dx + o_yt, b_delta * b_du + b_D * b_dy, mask=m_pt)
            tl.store(p_ddt + o_yt, b_ddt, mask=m_pt)
            o_t = o_BC + t * (h * n) + j * (h * n)
            tl.store(p_dB + o_t, b_dB, mask=m_nt & (o_one == 0))
            tl.store(p_dC + o_t, b_dC, mask=m_nt & (o_one == 0))
            b_dA += b_da * b_delta
            b_dD += b_dy * b_x
            b_dbias += b_ddt
    tl.store(p_dh0 + (i_b * h + i_h) * (p * n) + o_p * n + o_n, b_G, mask=m_n & m_p)
    p_sums += ((i_b * h + i_h) * p + o_p) * (n + 2)
    tl.store(p_sums + o_n, b_dA, mask=m_n & m_p)
    tl.store(p_sums + n, b_dD, mask=m_p)
    tl.store(p_sums + n + 1, b_dbias, mask=m_p)


# --------------------------------------------------------------------------------------------------
# Mamba-2 (SSD). A tile of T tokens is a few products of matrices. With s_t the running sum of Δ A
# within the tile, in log2, 2^(s_t - s_r) is the decay from token r to token t; s_T is its last
# value:
#
#     y_t = Σ_{r≤t} 2^(s_t - s_r) (C_t·B_r) Δ_r x_r  +  2^s_t h C_t  +  D x_t
#     h ← 2^s_T h + Σ_r 2^(s_T - s_r) Δ_r x_r B_rᵀ
#
# In kernels the state is a tile (n, p), and a matrix of pairs of tokens is (t, r), reader and
# writer, or (r, t).


# Δ (b, tiles·T, h), 0 past the end, and s within each tile. Beyond 2^-200 nothing is left of a
# float32, so a larger decay is cut there, and so is the start of a document: then float32 keeps the
# differences of s better than bf16 keeps the inputs. For inputs in float32 s is float64.
@jit(do_not_specialize=["l", "tiles"])
def ssd_delta_kernel(
    p_dt, s_dt: constexpr, p_A, p_bias, p_pos, p_delta, p_s, l, tiles,
    h: constexpr, T: constexpr, BH: constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) // tiles
    i_0 = tl.program_id(0) % tiles * T
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)[None, :]
    o_t = tl.arange(0, T)[:, None]
    m_h = o_h < h
    m_t = i_0 + o_t < l
    at = p_dt + (i_b * l + i_0 + o_t) * s_dt + o_h
    b_dt = tl.load(at, mask=m_t & m_h, other=-float("inf")).to(tl.float32)
    if p_bias is not None:
        b_dt += read(p_bias + o_h, m_h)
    b_delta = softplus(b_dt)
    b_a = tl.maximum(b_delta * read(p_A + o_h, m_h) * LOG2E, -200.0)
    if p_pos is not None:
        b_pos = tl.load(p_pos + i_b * l + i_0 + o_t, mask=m_t, other=1)
        b_a = tl.where(b_pos == 0, -200.0, b_a)
    o_out = (i_b * tiles * T + i_0 + o_t) * h + o_h
    tl.store(p_delta + o_out, b_delta, mask=m_h)
    tl.store(p_s + o_out, tl.cumsum(b_a.to(p_s.dtype.element_ty), axis=0), mask=m_h)


@jit
def tile(ptr, s_row: constexpr, o_row, o_col, n_row, n_col, DOT: constexpr):
    """A tile in the type of the products, zero from row n_row and column n_col on."""
    m = (o_row < n_row)[:, None] & (o_col < n_col)[None, :]
    return tl.load(ptr + o_row[:, None] * s_row + o_col[None, :], mask=m, other=0.0).to(DOT)


@jit
def ssd_steps(p_delta, p_s, o, h: constexpr, T: constexpr):
    """Δ, s and s_T of the tile whose first token lies at o."""
    o_t = o + tl.arange(0, T) * h
    return tl.load(p_delta + o_t), tl.load(p_s + o_t), tl.load(p_s + o + (T - 1) * h)


@jit
def decay_between(b_to, b_from, m):
    """2^(to - from) of each pair, rows `to`, in float32; 0 where m is False."""
    return tl.exp2(tl.where(m, b_to - b_from, -float("inf")).to(tl.float32))


# The formulas above: one program walks BP channels of one head of one row.
@jit(do_not_specialize=["l", "tiles"])
def ssd_forward_kernel(
    p_x, s_x: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr,
    p_delta, p_s, p_D, p_h0, p_y, p_h, l, tiles,
    h: constexpr, p: constexpr, n: constexpr, r: constexpr,
    DOT: constexpr, PREC: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    o_t = tl.arange(0, T)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_np = (o_n < n)[:, None] & (o_p < p)[None, :]
    o_h = (i_b * h + i_h) * (p * n) + o_p[None, :] * n + o_n[:, None]
    b_h = tl.zeros((BN, BP), tl.float32)
    if p_h0 is not None:
        b_h = read(p_h0 + o_h, m_np)
    b_D = 0.0
    if p_D is not None:
        b_D = tl.load(p_D + i_h)
    p_x += i_b * l * s_x + i_h // r * p
    p_B += i_b * l * s_B + i_h // r * n
    p_C += i_b * l * s_C + i_h * n
    for i_t in range(tiles):
        i_0 = i_t * T + 0 * i_b  # int64
        b_x = tile(p_x + i_0 * s_x, s_x, o_t, o_p, l - i_0, p, DOT)  # (T, p)
        b_B = tl.trans(tile(p_B + i_0 * s_B, s_B, o_t, o_n, l - i_0, n, DOT))  # (n, T)
        b_C = tile(p_C + i_0 * s_C, s_C, o_t, o_n, l - i_0, n, DOT)  # (T, n)
        b_delta, b_s, b_end = ssd_steps(p_delta, p_s, (i_b * tiles * T + i_0) * h + i_h, h, T)
        b_decay = decay_between(b_s[:, None], b_s[None, :], o_t[:, None] >= o_t[None, :])
        b_scores = tl.dot(b_C, b_B, input_precision=PREC) * b_decay * b_delta[None, :]  # (t, r)
        b_y = tl.dot(b_C, b_h.to(DOT), input_precision=PREC) * tl.exp2(b_s.to(tl.float32))[:, None]
        b_y += tl.dot(b_scores.to(DOT), b_x, input_precision=PREC)
        b_y += b_D * b_x.to(tl.float32)
        o_y = ((i_b * l + i_0 + o_t[:, None]) * h + i_h) * p + o_p[None, :]
        tl.store(p_y + o_y, b_y, mask=(i_0 + o_t < l)[:, None] & (o_p < p)[None, :])
        b_after = tl.exp2((b_end - b_s).to(tl.float32)) * b_delta
        b_u = (b_x.to(tl.float32) * b_after[:, None]).to(DOT)
        b_h = b_h * tl.exp2(b_end.to(tl.float32)) + tl.dot(b_B, b_u, input_precision=PREC)
    tl.store(p_h + o_h, b_h, mask=m_np)


# The walk alone, of u = x and v = B. It leaves in S (b, tiles, h, n, p) the state at every tile's
# start:
#
#     h ← 2^s_T h + Σ_r 2^(s_T - s_r) Δ_r u_r v_rᵀ
#
# The ADJOINT walks from the last tile to the first, with u = dy and v = C, and leaves the adjoint
# of the state at every tile's end:     G ← 2^s_T G + Σ_t 2^s_t u_t v_tᵀ
@jit(do_not_specialize=["l", "tiles"])
def ssd_states_kernel(
    p_u, s_u: constexpr, p_v, s_v: constexpr, p_delta, p_s, p_h0, p_S, p_h, l, tiles,
    h: constexpr, p: constexpr, n: constexpr, r: constexpr,
    ADJOINT: constexpr, DOT: constexpr, PREC: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    o_t = tl.arange(0, T)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_np = (o_n < n)[:, None] & (o_p < p)[None, :]
    o_h = (i_b * h + i_h) * (p * n) + o_p[None, :] * n + o_n[:, None]
    b_h = tl.zeros((BN, BP), tl.float32)
    if p_h0 is not None:
        b_h = read(p_h0 + o_h, m_np)
    p_u += i_b * l * s_u + i_h // r * p
    p_v += i_b * l * s_v + i_h // r * n
    p_S += (i_b * tiles * h + i_h) * (n * p) + o_n[:, None] * p + o_p[None, :]
    for k in range(tiles):
        i_t = tiles - 1 - k if ADJOINT else k
        i_0 = i_t * T + 0 * i_b  # int64
        tl.store(p_S + i_0 // T * (h * n * p), b_h, mask=m_np)
        b_u = tile(p_u + i_0 * s_u, s_u, o_t, o_p, l - i_0, p, DOT)
        b_v = tl.trans(tile(p_v + i_0 * s_v, s_v, o_t, o_n, l - i_0, n, DOT))
        b_delta, b_s, b_end = ssd_steps(p_delta, p_s, (i_b * tiles * T + i_0) * h + i_h, h, T)
        if ADJOINT:
            b_w = tl.exp2(b_s.to(tl.float32))
        else:
            b_w = tl.exp2((b_end - b_s).to(tl.float32)) * b_delta
        b_u = (b_u.to(tl.float32) * b_w[:, None]).to(DOT)
        b_h = b_h * tl.exp2(b_end.to(tl.float32)) + tl.dot(b_v, b_u, input_precision=PREC)
    tl.store(p_h + o_h, b_h, mask=m_np)


@jit
def products(
    p_a, s_a: constexpr, p_c, s_c: constexpr, o_t, l, w: constexpr,
    DOT: constexpr, PREC: constexpr, BW: constexpr,
):  # fmt: skip
    """a cᵀ of two tiles of T tokens, w columns wide: (T, T)."""
    b = tl.zeros((o_t.shape[0], o_t.shape[0]), tl.float32)
    for i in range(0, w, BW):
        o = i + tl.arange(0, BW)
        b_c = tl.trans(tile(p_c, s_c, o_t, o, l, w, DOT))
        b = tl.dot(tile(p_a, s_a, o_t, o, l, w, DOT), b_c, b, input_precision=PREC)
    return b


# The gradients of one tile of one head, from S, the state at its start, and G, the adjoint of the
# state at its end. With decay_tr = 2^(s_t - s_r) for r ≤ t, else 0:
#
#     dx_r = Δ_r (2^(s_T - s_r) G B_r + Σ_t decay_tr (C_t·B_r) dy_t) + D dy_r
@jit(do_not_specialize=["l", "tiles"])
def ssd_dx_kernel(
    p_B, s_B: constexpr, p_C, s_C: constexpr, p_dy, s_dy: constexpr,
    p_delta, p_s, p_D, p_G, p_dx, l, tiles, h: constexpr, p: constexpr, n: constexpr, r: constexpr,
    DOT: constexpr, PREC: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    i_bt = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    i_b = i_bt // tiles
    i_0 = i_bt % tiles * T
    left = l - i_0  # tokens from here on
    o_t = tl.arange(0, T)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    p_B += (i_b * l + i_0) * s_B + i_h // r * n
    p_C += (i_b * l + i_0) * s_C + i_h * n
    p_dy += (i_b * l + i_0) * s_dy + i_h * p
    p_G += (i_bt * h + i_h) * (n * p)
    b_delta, b_s, b_end = ssd_steps(p_delta, p_s, i_bt * T * h + i_h, h, T)
    b_decay = decay_between(b_s[None, :], b_s[:, None], o_t[:, None] <= o_t[None, :])
    b_BC = products(p_B, s_B, p_C, s_C, o_t, left, n, DOT, PREC, BN) * b_decay  # (r, t)
    b_dy = tile(p_dy, s_dy, o_t, o_p, left, p, DOT)
    b_du = tl.zeros((T, BP), tl.float32)
    for i_n in range(0, n, BN):
        o_n = i_n + tl.arange(0, BN)
        b_B = tile(p_B, s_B, o_t, o_n, left, n, DOT)
        b_du = tl.dot(b_B, tile(p_G, p, o_n, o_p, n, p, DOT), b_du, input_precision=PREC)
    b_du *= tl.exp2((b_end - b_s).to(tl.float32))[:, None]
    b_dx = tl.dot(b_BC.to(DOT), b_dy, b_du, input_precision=PREC) * b_delta[:, None]
    if p_D is not None:
        b_dx += tl.load(p_D + i_h) * b_dy.to(tl.float32)
    o_x = ((i_b * l + i_0 + o_t[:, None]) * h + i_h) * p + o_p[None, :]
    tl.store(p_dx + o_x, b_dx, mask=(o_t < left)[:, None] & (o_p < p)[None, :])


#     dC_t = 2^s_t S dy_t + Σ_r decay_tr Δ_r (dy_t·x_r) B_r                    b_yx (t, r)
#     dB_r = Δ_r (2^(s_T - s_r) G x_r + Σ_t decay_tr (dy_t·x_r) C_t)           b_xy (r, t)
#
# The adjoint of a_t = Δ_t A is the sum of every product whose decay spans token t: b_ds, what a
# token reads minus what it writes inside the tile, summed from the tile's end back to t; what the
# writers before t give to the tile's end (b_give); and b_hold = <S, G>, what crosses the whole
# tile. Readers and writers have products of their own, since Triton 3.4 to 3.7 on Hopper
# miscompiles a product with another one's transposed result. sums (·, 3, h) holds the tile's part
# of dA, dD and dbias.
@jit(do_not_specialize=["l", "tiles"])
def ssd_backward_kernel(
    p_x, s_x: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr, p_dy, s_dy: constexpr,
    p_delta, p_s, p_A, p_pos, p_S, p_G, p_ddt, p_dB, p_dC, p_sums, l, tiles,
    h: constexpr, p: constexpr, n: constexpr, r: constexpr,
    DOT: constexpr, PREC: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    i_bt = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    i_b = i_bt // tiles
    i_0 = i_bt % tiles * T
    left = l - i_0  # tokens from here on
    o_t = tl.arange(0, T)
    o_y = (i_b * l + i_0) * h + i_h
    p_x += (i_b * l + i_0) * s_x + i_h // r * p
    p_B += (i_b * l + i_0) * s_B + i_h // r * n
    p_C += (i_b * l + i_0) * s_C + i_h * n
    p_dy += (i_b * l + i_0) * s_dy + i_h * p
    p_S += (i_bt * h + i_h) * (n * p)
    p_G += (i_bt * h + i_h) * (n * p)
    b_delta, b_s, b_end = ssd_steps(p_delta, p_s, i_bt * T * h + i_h, h, T)
    b_xy = products(p_x, s_x, p_dy, s_dy, o_t, left, p, DOT, PREC, BP)
    b_yx = products(p_dy, s_dy, p_x, s_x, o_t, left, p, DOT, PREC, BP)
    b_BC = products(p_B, s_B, p_C, s_C, o_t, left, n, DOT, PREC, BN)
    b_dD = tl.sum(tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_xy, 0.0), axis=1), axis=0)
    b_xy *= decay_between(b_s[None, :], b_s[:, None], o_t[:, None] <= o_t[None, :])
    b_yx *= decay_between(b_s[:, None], b_s[None, :], o_t[:, None] >= o_t[None, :])
    b_pairs = b_BC * b_xy  # (r, t)
    b_ddelta = tl.sum(b_pairs, axis=1)
    b_pairs = tl.where(o_t[:, None] < o_t[None, :], b_pairs, 0.0) * b_delta[:, None]
    b_ds = tl.sum(b_pairs, axis=0) - tl.sum(b_pairs, axis=1)
    b_xy = (b_xy * b_delta[:, None]).to(DOT)
    b_yx = (b_yx * b_delta[None, :]).to(DOT)
    b_give = tl.zeros((T,), tl.float32)
    b_hold = 0.0
    for i_n in range(0, n, BN):
        o_n = i_n + tl.arange(0, BN)
        b_C = tile(p_C, s_C, o_t, o_n, left, n, DOT)
        b_B = tile(p_B, s_B, o_t, o_n, left, n, DOT)
        b_dC = tl.zeros((T, BN), tl.float32)
        b_dB = tl.zeros((T, BN), tl.float32)
        for i_p in range(0, p, BP):
            o_p = i_p + tl.arange(0, BP)
            b_S = tile(p_S, p, o_n, o_p, n, p, DOT)
            b_G = tile(p_G, p, o_n, o_p, n, p, DOT)
            b_x = tile(p_x, s_x, o_t, o_p, left, p, DOT)
            b_dy = tile(p_dy, s_dy, o_t, o_p, left, p, DOT)
            b_dB = tl.dot(b_x, tl.trans(b_G), b_dB, input_precision=PREC)
            b_dC = tl.dot(b_dy, tl.trans(b_S), b_dC, input_precision=PREC)
            b_hold += tl.sum(tl.sum(b_S.to(tl.float32) * b_G.to(tl.float32), axis=1), axis=0)
        b_dB *= tl.exp2((b_end - b_s).to(tl.float32))[:, None]
        b_dC *= tl.exp2(b_s.to(tl.float32))[:, None]
        b_give += tl.sum(b_dB * b_B.to(tl.float32), axis=1)
        b_ds += tl.sum(b_dC * b_C.to(tl.float32), axis=1)
        b_dB = tl.dot(b_xy, b_C, b_dB * b_delta[:, None], input_precision=PREC)
        b_dC = tl.dot(b_yx, b_B, b_dC, input_precision=PREC)
        o_tn = o_y * n + o_t[:, None] * (h * n) + o_n[None, :]
        m_tn = (o_t < left)[:, None] & (o_n < n)[None, :]
        tl.store(p_dB + o_tn, b_dB, mask=m_tn)
        tl.store(p_dC + o_tn, b_dC, mask=m_tn)
    b_written = (b_give * b_delta)[None, :]
    b_before = tl.sum(tl.where(o_t[None, :] < o_t[:, None], b_written, 0.0), axis=1)
    b_da = tl.cumsum(b_ds, axis=0, reverse=True) + b_before + b_hold * tl.exp2(b_end.to(tl.float32))
    if p_pos is not None:  # a document's start has no decay; what stands there is rounding
        b_pos = tl.load(p_pos + i_b * l + i_0 + o_t, mask=o_t < left, other=1)
        b_da = tl.where(b_pos == 0, 0.0, b_da)
    b_ddt = (b_ddelta + b_give + b_da * tl.load(p_A + i_h)) * softplus_slope(b_delta)
    tl.store(p_ddt + o_y + o_t * h, b_ddt, mask=o_t < left)
    p_sums += i_bt * 3 * h + i_h
    tl.store(p_sums, tl.sum(b_da * b_delta, axis=0))
    tl.store(p_sums + h, b_dD)
    tl.store(p_sums + 2 * h, tl.sum(b_ddt, axis=0))


# --------------------------------------------------------------------------------------------------
# The convolution. A program walks BC channels of all query heads through T tokens, U at a time, the
# last W - 1 inputs in registers. Channel c of query head i reads kv head i // r.

CONV_TOKENS, CONV_CHANNELS = 32, 256


@jit
def conv_tokens(ptr, s_t: constexpr, t, l, m_c, width: constexpr, U: constexpr):
    """U tokens from t on, as a tuple; zeros outside the row. m_c are channels below `width`."""
    tokens = ()
    for j in tl.static_range(U):
        m = m_c < tl.where((t + j >= 0) & (t + j < l), width, 0)
        tokens = tokens + (read(ptr + (t + j) * s_t, m),)
    return tokens


@jit
def conv_pos(p_pos, t, l):
    """The place of token t in its document; without documents, 64: it sees all that come before."""
    pos = 64
    if p_pos is not None:
        pos = tl.load(p_pos + t, mask=t < l, other=0)
    return pos


@jit
def conv_layer(p_w, p_bias, o_c, m, W: constexpr):
    """The weights of each tap, a tuple, and the bias."""
    ws = ()
    for k in tl.static_range(W):
        ws = ws + (read(p_w + o_c * W + k, m),)
    b_bias = tl.zeros(o_c.shape, tl.float32)
    if p_bias is not None:
        b_bias = read(p_bias + o_c, m)
    return ws, b_bias


@jit
def conv_sum(xs, j: constexpr, ws, b_bias, pos, W: constexpr):
    """e_t = bias + Σ_k weight_k x_{t-W+1+k}: the inputs from xs[j] on that are of the document."""
    b_e = b_bias
    for k in tl.static_range(W):
        b_e += ws[k] * tl.where(pos >= W - 1 - k, xs[j + k], 0.0)
    return b_e


# y_t = silu(e_t)
@jit(do_not_specialize=["l"])
def conv_forward_kernel(
    p_x, s_x: constexpr, p_w, p_bias, p_pos, p_y, l, c: constexpr, r: constexpr, p: constexpr,
    W: constexpr, T: constexpr, U: constexpr, BC: constexpr,
):  # fmt: skip
    i_b = tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    ws, b_bias = conv_layer(p_w, p_bias, o_c, o_c < c, W)
    p_x += i_b * l * s_x + o_c // (r * p) * p + o_c % p
    p_y += i_b * l * c + o_c
    p_pos = None if p_pos is None else p_pos + i_b * l
    t = 0 * i_b + tl.program_id(1) * T
    xs = conv_tokens(p_x, s_x, t - (W - 1), l, o_c, c, W - 1)
    for _ in range(T // U):
        xs = xs + conv_tokens(p_x, s_x, t, l, o_c, c, U)
        for j in tl.static_range(U):
            b_e = conv_sum(xs, j, ws, b_bias, conv_pos(p_pos, t + j, l), W)
            tl.store(p_y + (t + j) * c, silu(b_e), mask=o_c < tl.where(t + j < l, c, 0))
        xs = xs[U:]
        t += U


# de_t = dy_t silu'(e_t),    dweight_k = Σ_t de_t x_{t-W+1+k},    dbias = Σ_t de_t
#
# It stores de (b, l, c), and in sums (·, W + 1, c) its part of dweight and, last, of dbias.
@jit(do_not_specialize=["l"])
def conv_weight_kernel(
    p_x, s_x: constexpr, p_w, p_bias, p_pos, p_dy, p_de, p_sums, l,
    c: constexpr, r: constexpr, p: constexpr,
    W: constexpr, T: constexpr, U: constexpr, BC: constexpr,
):  # fmt: skip
    i_b = tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    ws, b_bias = conv_layer(p_w, p_bias, o_c, o_c < c, W)
    p_x += i_b * l * s_x + o_c // (r * p) * p + o_c % p
    o_y = i_b * l * c + o_c
    p_pos = None if p_pos is None else p_pos + i_b * l
    b_dbias = tl.zeros((BC,), tl.float32)
    dws = (b_dbias,) * W
    t = 0 * i_b + tl.program_id(1) * T
    xs = conv_tokens(p_x, s_x, t - (W - 1), l, o_c, c, W - 1)
    for _ in range(T // U):
        xs = xs + conv_tokens(p_x, s_x, t, l, o_c, c, U)
        dys = conv_tokens(p_dy + o_y, c, t, l, o_c, c, U)
        for j in tl.static_range(U):
            pos = conv_pos(p_pos, t + j, l)
            b_de = dys[j] * silu_slope(conv_sum(xs, j, ws, b_bias, pos, W))
            tl.store(p_de + o_y + (t + j) * c, b_de, mask=o_c < tl.where(t + j < l, c, 0))
            b_dbias += b_de
            sums = ()
            for k in tl.static_range(W):
                sums = sums + (dws[k] + b_de * tl.where(pos >= W - 1 - k, xs[j + k], 0.0),)
            dws = sums
        xs = xs[U:]
        t += U
    p_sums += (i_b * tl.num_programs(1) + tl.program_id(1)) * ((W + 1) * c) + o_c
    for k in tl.static_range(W):
        tl.store(p_sums + k * c, dws[k], mask=o_c < c)
    tl.store(p_sums + W * c, b_dbias, mask=o_c < c)


# dx_t = Σ_k weight_k de_{t+W-1-k},    summed over the r query heads (R, a power of 2) of a kv head
@jit(do_not_specialize=["l"])
def conv_dx_kernel(
    p_de, p_w, p_pos, p_dx, l, c: constexpr, r: constexpr, p: constexpr,
    W: constexpr, T: constexpr, U: constexpr, R: constexpr, BC: constexpr,
):  # fmt: skip
    i_b = tl.program_id(2).to(tl.int64)
    o_x = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]  # channels of the kv heads
    o_r = tl.arange(0, R)[:, None]
    o_c = (o_x // p * r + o_r) * p + o_x % p
    o_m = tl.where((o_x < c // r) & (o_r < r), o_c, c)
    ws, _ = conv_layer(p_w, None, o_c, o_m < c, W)
    p_de += i_b * l * c + o_c
    p_dx += i_b * l * (c // r) + o_x
    p_pos = None if p_pos is None else p_pos + i_b * l
    t = 0 * i_b + tl.program_id(1) * T
    des = conv_tokens(p_de, c, t, l, o_m, c, W - 1)
    for _ in range(T // U):
        des = des + conv_tokens(p_de, c, t + W - 1, l, o_m, c, U)
        for j in tl.static_range(U):
            b_dx = tl.zeros((R, BC), tl.float32)
            for lag in tl.static_range(W):
                seen = conv_pos(p_pos, t + j + lag, l) >= lag
                b_dx += ws[W - 1 - lag] * tl.where(seen, des[j + lag], 0.0)
            b_dx = tl.sum(b_dx, axis=0, keep_dims=True)
            tl.store(p_dx + (t + j) * (c // r), b_dx, mask=o_x < tl.where(t + j < l, c // r, 0))
        des = des[U:]
        t += U


# --------------------------------------------------------------------------------------------------
# The launches, and the operators that torch.compile takes as one node each. Arguments are those of
# ssm_scan and causal_conv; pos is int32 and contiguous, and z is Mamba's alone.


def strided(t):
    """`t` (b, l, …) with all its tokens at one distance, and that distance."""
    if t is None:
        return None, 0
    if t.stride(0) != t.shape[1] * t.stride(1) or not t[:1, :1].is_contiguous():
        t = t.contiguous()
    return t, t.stride(1)


def launch(kernel, grid, *args, **sizes):
    """kernel[grid](...) on the device of args[0]; nothing where torch.compile asks for shapes."""
    if not isinstance(args[0], FakeTensor):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **sizes)


def flat(t):
    """`t` in float32, contiguous; None stays None."""
    return None if t is None else t.float().contiguous()


def over_group(t, like):
    """(b, l, h, w) -> (b, l, g, w), summed over the query heads of a kv head, in like's type."""
    g = like.shape[2]
    return (t if t.shape[2] == g else t.unflatten(2, (g, -1)).sum(3)).to(like.dtype)


def block(n):
    """The size of a block that holds n numbers: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(n))


def precision(x):
    """How products are made where x is not bf16: float32 in full, fp16 as TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def s6_sizes(x, C):
    """The grid and the constants of Mamba's kernels."""
    (b, _, h, n), p = C.shape, x.shape[3]
    BN, BP = block(n), min(S6_BLOCK, block(p))
    sizes = dict(h=h, p=p, n=n, r=h // x.shape[2], BP=BP, BN=BN)
    return (b * h, triton.cdiv(p, BP)), dict(sizes, num_warps=max(1, BN * BP // 256))


def s6_forward(x, dt, A, B, C, D, z, dt_bias, h0, pos, save=False):
    """Mamba: y, the last state and, if asked, the states before every S6_SAVE-th token."""
    (b, l, h, n), p = C.shape, x.shape[3]
    grid, sizes = s6_sizes(x, C)
    y, last = x.new_empty(b, l, h, p), x.new_empty(b, h, p, n, dtype=torch.float32)
    S = last.new_empty(b, triton.cdiv(l, S6_SAVE), h, n, p) if save else None
    tensors = [v for t in (x, dt, B, C, z) for v in strided(t)]
    tensors += [flat(A), flat(D), flat(dt_bias), flat(h0), pos, y, last, S]
    launch(s6_forward_kernel, grid, *tensors, l, SAVE=S6_SAVE, T=S6_TILE, **sizes)
    return y, last, S


def s6_backward(dy, dh, x, dt, A, B, C, D, z, dt_bias, h0, pos):
    (b, l, h, n), p = C.shape, x.shape[3]
    _, _, S = s6_forward(x, dt, A, B, C, D, z, dt_bias, h0, pos, save=True)
    grid, sizes = s6_sizes(x, C)
    dx, ddt, dz = x.new_empty(b, l, h, p), dt.new_empty(b, l, h, p), x.new_empty(b, l, h, p)
    dB, dC = B.new_empty(grid[1], b, l, h, n), C.new_empty(grid[1], b, l, h, n)
    dh0, sums = S.new_empty(b, h, p, n), S.new_empty(b, h, p, n + 2)
    tensors = [v for t in (x, dt, B, C, z, dy) for v in strided(t)]
    tensors += [flat(A), flat(D), flat(dt_bias), flat(dh), pos, S, dx, ddt, dB, dC, dz, dh0, sums]
    launch(s6_backward_kernel, grid, *tensors, l, T=S6_SAVE, PREC=precision(x), **sizes)
    dB, dC = (t[0] if len(t) == 1 else t.sum(0) for t in (dB, dC))
    return dx, ddt, dB, dC, dz, dh0, sums


def ssd_sizes(x, C):
    """The constants of Mamba-2's kernels: tiles of 64 tokens in bf16, of 32 in float32."""
    bf16 = x.dtype == torch.bfloat16 and not INTERPRET  # which the interpreter lacks
    h, n, p, T = C.shape[2], C.shape[3], x.shape[3], 64 if bf16 else 32
    sizes = dict(h=h, p=p, n=n, T=T, BP=T, DOT=tl.bfloat16 if bf16 else tl.float32)
    return dict(sizes, PREC=precision(x)), h // x.shape[2]


def ssd_delta(x, dt, A, dt_bias, pos, T):
    """Δ and s, (b, tiles · T, h), and the number of tiles: see the kernel."""
    (b, l, h), tiles, BH = dt.shape, triton.cdiv(dt.shape[1], T), min(128, block(dt.shape[2]))
    delta = dt.new_empty(b, tiles * T, h, dtype=torch.float32)
    s = torch.empty_like(delta, dtype=torch.float64 if x.dtype == torch.float32 else torch.float32)
    tensors = *strided(dt), flat(A), flat(dt_bias), pos, delta, s
    launch(ssd_delta_kernel, (b * tiles, triton.cdiv(h, BH)), *tensors, l, tiles, h=h, T=T, BH=BH)
    return delta, s, tiles


def ssd_forward(x, dt, A, B, C, D, dt_bias, h0, pos):
    """Mamba-2: y and the last state."""
    (b, l, h, n), p, (sizes, r) = C.shape, x.shape[3], ssd_sizes(x, C)
    delta, s, tiles = ssd_delta(x, dt, A, dt_bias, pos, sizes["T"])
    y, last = x.new_empty(b, l, h, p), delta.new_empty(b, h, p, n)
    tensors = *strided(x), *strided(B), *strided(C), delta, s, flat(D), flat(h0), y, last
    grid = b * h, triton.cdiv(p, sizes["BP"])
    launch(ssd_forward_kernel, grid, *tensors, l, tiles, r=r, BN=block(n), **sizes)
    return y, last


def ssd_backward(dy, dh, x, dt, A, B, C, D, dt_bias, h0, pos):
    (b, l, h, n), p, (sizes, r) = C.shape, x.shape[3], ssd_sizes(x, C)
    delta, s, tiles = ssd_delta(x, dt, A, dt_bias, pos, sizes["T"])
    kind = torch.bfloat16 if sizes["DOT"] == tl.bfloat16 else torch.float32
    S, G = (delta.new_empty(b, tiles, h, n, p, dtype=kind) for _ in range(2))
    last, dh0 = (delta.new_empty(b, h, p, n) for _ in range(2))
    grid, walk = (b * h, triton.cdiv(p, sizes["BP"])), dict(sizes, BN=block(n))
    states = *strided(x), *strided(B), delta, s, flat(h0), S, last
    launch(ssd_states_kernel, grid, *states, l, tiles, r=r, ADJOINT=False, **walk)
    adjoints = *strided(dy), *strided(C), delta, s, flat(dh), G, dh0
    launch(ssd_states_kernel, grid, *adjoints, l, tiles, r=1, ADJOINT=True, **walk)
    dx, ddt = x.new_empty(b, l, h, p), dt.new_empty(b, l, h)
    dB, dC = B.new_empty(b, l, h, n), C.new_empty(b, l, h, n)
    sums = delta.new_empty(b * tiles, 3, h)
    grid, sizes = (b * tiles * h, grid[1]), dict(sizes, r=r, BN=sizes["BP"])
    inputs = [v for t in (x, B, C, dy) for v in strided(t)]
    tensors = *inputs[2:], delta, s, flat(D), G, dx
    launch(ssd_dx_kernel, grid, *tensors, l, tiles, **sizes)
    tensors = *inputs, delta, s, flat(A), pos, S, G, ddt, dB, dC, sums
    launch(ssd_backward_kernel, grid[:1], *tensors, l, tiles, **sizes)
    return dx, ddt, dB, dC, dx.new_empty(0), dh0, sums


def scan_forward(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    if A.dim() == 1:
        return ssd_forward(x, dt, A, B, C, D, dt_bias, h0, pos)
    return s6_forward(x, dt, A, B, C, D, z, dt_bias, h0, pos)[:2]


def scan_backward(dy, dh, x, dt, A, B, C, D, z, dt_bias, h0, pos):
    """The gradients of x and B per query head, of dt, C, z (undefined if None) and h0; and those of
    A, D and dt_bias side by side, to be added up over the first axis: (·, h, p, n + 2) of Mamba,
    (·, 3, h) of Mamba-2."""
    if A.dim() == 1:
        return ssd_backward(dy, dh, x, dt, A, B, C, D, dt_bias, h0, pos)
    return s6_backward(dy, dh, x, dt, A, B, C, D, z, dt_bias, h0, pos)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def scan_gradient(ctx, dy, dh):
    x, dt, A, B, C, D, z, dt_bias, h0, pos = inputs = ctx.saved_tensors
    dy = x.new_zeros(*C.shape[:3], x.shape[3]) if dy is None else dy
    dx, ddt, dB, dC, dz, dh0, sums = SCAN_BACKWARD(dy, dh, *inputs)
    sums, n = sums.sum(0), C.shape[3]
    dA, dD, dbias = sums if A.dim() == 1 else (sums[..., :n], sums[..., n], sums[..., n + 1])
    pairs = (A, dA), (D, dD), (z, dz), (dt_bias, dbias), (h0, dh0)
    dA, dD, dz, dbias, dh0 = (None if t is None else g.to(t.dtype) for t, g in pairs)
    return over_group(dx, x), ddt, dA, over_group(dB, B), dC, dD, dz, dbias, dh0, None


def conv_sizes(x, weight, R=1):
    """The grid and the constants of the convolution's kernels, for R query heads at a time."""
    (b, l, g, _), (h, p, w) = x.shape, weight.shape
    channels = h * p if R == 1 else g * p
    BC = max(1, min(CONV_CHANNELS // R, triton.next_power_of_2(channels)))
    grid = triton.cdiv(channels, BC), triton.cdiv(l, CONV_TOKENS), b
    return grid, dict(c=h * p, r=h // g, p=p, W=w, T=CONV_TOKENS, U=8, BC=BC, num_warps=1)


def conv_forward(x, weight, bias, pos):
    y = x.new_empty(*x.shape[:2], *weight.shape[:2])
    grid, sizes = conv_sizes(x, weight)
    tensors = *strided(x), weight.contiguous(), None if bias is None else bias.contiguous(), pos, y
    launch(conv_forward_kernel, grid, *tensors, x.shape[1], **sizes)
    return y


def conv_backward(dy, x, weight, bias, pos):
    """The gradient of x and, (·, w + 1, h·p), to be added up over the first axis, those of the
    weights and of the bias."""
    (b, l, g, _), (h, p, w), dy = x.shape, weight.shape, dy.contiguous()
    layer = weight.contiguous(), None if bias is None else bias.contiguous()
    dx, de, (grid, sizes) = x.new_empty(x.shape), torch.empty_like(dy), conv_sizes(x, weight)
    sums = x.new_empty(grid[1] * b, w + 1, h * p, dtype=torch.float32)
    launch(conv_weight_kernel, grid, *strided(x), *layer, pos, dy, de, sums, l, **sizes)
    R = triton.next_power_of_2(h // g)
    grid, sizes = conv_sizes(x, weight, R)
    launch(conv_dx_kernel, grid, de, layer[0], pos, dx, l, **sizes, R=R)
    return dx, sums


def conv_gradient(ctx, dy):
    x, weight, bias, pos = ctx.saved_tensors
    dx, sums = CONV_BACKWARD(dy, x, weight, bias, pos)
    *dweight, dbias = sums.sum(0).unflatten(1, weight.shape[:2])
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, torch.stack(dweight, dim=2).to(weight.dtype), dbias, None


def operator(name, f, arguments, results):
    """`f` as PyTorch's operator mil::name, which also tells the shapes of its results."""
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    op = torch.library.custom_op(f"mil::{name}", f, mutates_args=(), schema=schema)
    op.register_fake(f)
    return op


CONV_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? pos"
SCAN_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? h0, Tensor? pos"
)
SCAN = operator("scan", scan_forward, SCAN_INPUTS, 2)
CONV = operator("conv", conv_forward, CONV_INPUTS, 1)
more = f"Tensor dy, Tensor? dh, {SCAN_INPUTS}"
SCAN_BACKWARD = operator("scan_backward", scan_backward, more, 7)
more = f"Tensor dy, {CONV_INPUTS}"
CONV_BACKWARD = operator("conv_backward", conv_backward, more, 2)
SCAN.register_autograd(scan_gradient, setup_context=save)
CONV.register_autograd(conv_gradient, setup_context=save)


# --------------------------------------------------------------------------------------------------
# Decoding: l ≤ FEW new tokens a row, which follow what a cache holds. A step is bound by memory, so
# each weight and each cached value is read once, at full rate. And speculative decoding is exact
# only if a row's bits do not depend on how many tokens come at once, so each row has the same
# products in the same order, whatever the other rows hold. (Another batch may cut attention's keys
# differently.)

FEW = 16  # the most tokens a row
MANY = 64  # rows of a batch above which PyTorch's product is faster; its bits vary with the rows
LINEAR = {"BN": 32, "BK": 256, "num_warps": 4, "num_stages": 4}  # by measurement on an H200
LINEAR_GATED = {"BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}
SPLIT = (128, 512)  # keys in a piece: for fewer than 64 kv heads of all rows together, and for more


def few(x, l, *weights):
    """Whether l tokens a row of a model with weights like `x` go to the kernels of decoding.

    Nothing is differentiated, there is no autocast, and `weights` are of x's type.
    """
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
    return l <= FEW and plain and use_triton(x) and all(w.dtype == x.dtype for w in weights)


# y = x / √(mean of x² + eps) ∘ weight, a row of k numbers for each program
@jit
def norm_kernel(p_x, p_w, p_y, eps, k: constexpr, BK: constexpr):
    o = tl.arange(0, BK)
    o_x = tl.program_id(0).to(tl.int64) * k + o
    b_x = read(p_x + o_x, o < k)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / k + eps) * read(p_w + o, o < k)
    tl.store(p_y + o_x, b_y, mask=o < k)


# y = x Wᵀ, with a gate V silu(x Vᵀ) ∘ x Wᵀ, onto u u + x Wᵀ. x (rows, k), W and V (n, k): BN
# columns of y for M rows, so the weights are read once for every 64 rows.
@jit(do_not_specialize=["rows"])
def linear_kernel(
    p_x, s_x: constexpr, p_w, p_v, p_u, p_y, rows, n: constexpr, k: constexpr,
    PREC: constexpr, M: constexpr, BN: constexpr, BK: constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * M + tl.arange(0, M)[None, :]).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    o_k = tl.arange(0, BK)
    o_w = o_n.to(tl.int64) * k + o_k[None, :]
    b_y = tl.zeros((BN, M), tl.float32)
    b_v = tl.zeros((BN, M), tl.float32)
    for i_k in range(0, k, BK):
        m_x = (o_m < rows) & (i_k + o_k < k)[:, None]
        m_w = (o_n < n) & (i_k + o_k < k)[None, :]
        b_x = tl.load(p_x + o_m * s_x + (i_k + o_k)[:, None], mask=m_x, other=0.0)
        b_w = tl.load(p_w + o_w + i_k, mask=m_w, other=0.0)
        b_y = tl.dot(b_w, b_x, b_y, input_precision=PREC)
        if p_v is not None:
            b_w = tl.load(p_v + o_w + i_k, mask=m_w, other=0.0)
            b_v = tl.dot(b_w, b_x, b_v, input_precision=PREC)
    m_y = (o_m < rows) & (o_n < n)
    if p_v is not None:
        b_y *= silu(b_v)
    if p_u is not None:
        b_y += read(p_u + o_m * n + o_n, m_y)
    tl.store(p_y + o_m * n + o_n, b_y, mask=m_y)


def in_flight(x, most, size):
    """How many stages of `size` bytes a loop can have in shared memory, `most` at most."""
    if not x.is_cuda:
        return most
    room = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return max(1, min(most, room // size))


def rms_norm(x, weight, eps):
    """RMSNorm in x's type. PyTorch's takes three times as long for a few rows."""
    x, weight, y, k = x.contiguous(), weight.contiguous(), torch.empty_like(x), x.shape[-1]
    launch(norm_kernel, (x.numel() // k,), x, weight, y, eps, k=k, BK=block(k), num_warps=8)
    return y


def linear(x, weight, gate=None, onto=None):
    """x Wᵀ of x (b, l, k) and W (n, k); with a gate V silu(x Vᵀ) ∘ x Wᵀ; plus `onto` (b, l, n)."""
    (b, l, k), n = x.shape, weight.shape[0]
    if b > MANY:
        y = F.linear(x, weight)
        y = y if gate is None else F.silu(F.linear(x, gate)) * y
        return y if onto is None else onto + y
    x = x.reshape(b * l, k)
    x = x if x.stride(1) == 1 else x.contiguous()
    M = 16 if b * l <= 16 else 32 if b * l <= 32 else 64
    sizes = dict(LINEAR if gate is None else LINEAR_GATED)
    stage = (sizes["BN"] * (1 if gate is None else 2) + M) * sizes["BK"] * x.element_size()
    sizes["num_stages"] = in_flight(x, sizes["num_stages"], stage)
    tensors = [None if t is None else t.contiguous() for t in (weight, gate, onto)]
    y, grid = x.new_empty(b, l, n), (triton.cdiv(b * l, M), triton.cdiv(n, sizes["BN"]))
    more = dict(sizes, n=n, k=k, M=M, PREC=precision(x))
    launch(linear_kernel, grid, x, x.stride(0), *tensors, y, b * l, **more)
    return y


def linears(x, *weights):
    """`linear` of each weight (n, k), in one launch where they lie side by side in memory."""
    ends = [w.data_ptr() + w.nbytes for w in weights]
    adjacent = all(w.data_ptr() == end for w, end in zip(weights[1:], ends[:-1], strict=True))
    if not adjacent or len({w.untyped_storage().data_ptr() for w in weights}) > 1:
        return [linear(x, w) for w in weights]
    sizes = [len(w) for w in weights]
    together = weights[0].as_strided((sum(sizes), x.shape[2]), (x.shape[2], 1))
    return linear(x, together).split(sizes, dim=2)


@jit
def rotated(ptr, o, m, b_cos, b_sin, half: constexpr):
    """The halves of a key or query at ptr + o, turned by RoPE, in their own type."""
    b_1 = read(ptr + o, m)
    b_2 = read(ptr + o + half, m)
    kind = ptr.dtype.element_ty
    return (b_1 * b_cos - b_2 * b_sin).to(kind), (b_2 * b_cos + b_1 * b_sin).to(kind)


# Writes the l new keys, rotated, and values of one row and kv head into the cache, where they lie
# in a piece of SPLIT keys. Every program that reads the piece writes them, with the same bits, so
# that none waits for another.
@jit
def append(
    p_k, s_k: constexpr, p_v, s_v: constexpr, p_cos, p_sin, p_keys, p_values,
    i_t, at, first, l, p: constexpr, SPLIT: constexpr, BH: constexpr,
):  # fmt: skip
    half: constexpr = p // 2
    o_i = tl.arange(0, 16)[:, None]
    o_h = tl.arange(0, BH)[None, :]
    o_p = tl.arange(0, 2 * BH)[None, :]
    m_i = (o_i < l) & (at + o_i >= first) & (at + o_i < first + SPLIT)
    m_h = m_i & (o_h < half)
    b_cos = read(p_cos + (i_t + o_i) * half + o_h, m_h)
    b_sin = read(p_sin + (i_t + o_i) * half + o_h, m_h)
    b_1, b_2 = rotated(p_k, (i_t + o_i) * s_k + o_h, m_h, b_cos, b_sin, half)
    tl.store(p_keys + (at + o_i) * p + o_h, b_1, mask=m_h)
    tl.store(p_keys + (at + o_i) * p + half + o_h, b_2, mask=m_h)
    b_v = tl.load(p_v + (i_t + o_i) * s_v + o_p, mask=m_i & (o_p < p))
    tl.store(p_values + (at + o_i) * p + o_p, b_v, mask=m_i & (o_p < p))
    tl.debug_barrier()  # this program reads them next


# For the keys j of one piece, the r query heads of one kv head and 16 / R tokens, a tile of 16
# queries:
#
#     s_j = q·k_j / √p in log2,  y = Σ_j 2^(s_j - m) v_j / Σ_j 2^(s_j - m),  weight = log2 Σ_j 2^s_j
#
# with the running maximum m of the scores.
@jit(do_not_specialize=["l", "size"])
def attend_kernel(
    p_q, s_q: constexpr, p_k, s_k: constexpr, p_v, s_v: constexpr, p_cos, p_sin, p_at,
    p_keys, p_values, p_weight, p_y, scale, l, size, g: constexpr, r: constexpr, p: constexpr,
    PREC: constexpr, R: constexpr, SPLIT: constexpr, BK: constexpr, BH: constexpr,
):  # fmt: skip
    half: constexpr = p // 2
    tiles = tl.cdiv(l, 16 // R)
    i_bg = tl.program_id(0) // tiles
    i_b = (i_bg // g).to(tl.int64)
    i_g = i_bg % g
    i_s = tl.program_id(1)
    first = i_s * SPLIT
    at = tl.load(p_at + i_b).to(tl.int32)
    if first < at + l:
        p_k += i_g * p
        p_v += i_g * p
        p_keys += i_bg.to(tl.int64) * size * p
        p_values += i_bg.to(tl.int64) * size * p
        if at < first + SPLIT:
            new = p_k, s_k, p_v, s_v, p_cos, p_sin, p_keys, p_values, i_b * l, at
            append(*new, first, l, p, SPLIT, BH)
        o_h = tl.arange(0, BH)
        o_p = tl.arange(0, 2 * BH)
        o_t = tl.program_id(0) % tiles * (16 // R) + tl.arange(0, 16) // R
        o_r = tl.arange(0, 16) % R
        o_bt = i_b * l + o_t
        m_q = (o_t < l) & (o_r < r)
        m_h = m_q[:, None] & (o_h < half)[None, :]
        b_cos = read(p_cos + o_bt[:, None] * half + o_h[None, :], m_h)
        b_sin = read(p_sin + o_bt[:, None] * half + o_h[None, :], m_h)
        o_q = o_bt[:, None] * s_q + (i_g * r + o_r)[:, None] * p + o_h[None, :]
        b_q1, b_q2 = rotated(p_q, o_q, m_h, b_cos, b_sin, half)
        b_most = tl.full((16,), -1e30, tl.float32)
        b_sum = tl.zeros((16,), tl.float32)
        b_y = tl.zeros((16, 2 * BH), tl.float32)
        for i_k in range(first, tl.minimum(first + SPLIT, at + l), BK):
            o_k = i_k + tl.arange(0, BK)
            m_k = (o_k < at + l)[None, :] & (o_h < half)[:, None]
            o_kh = o_k[None, :] * p + o_h[:, None]
            b_k1 = tl.load(p_keys + o_kh, mask=m_k, other=0.0)
            b_k2 = tl.load(p_keys + o_kh + half, mask=m_k, other=0.0)
            b_s = tl.dot(b_q1, b_k1, input_precision=PREC)
            b_s = tl.dot(b_q2, b_k2, b_s, input_precision=PREC) * scale
            b_s = tl.where(o_k[None, :] <= at + o_t[:, None], b_s, -1e30)
            b_new = tl.maximum(b_most, tl.max(b_s, axis=1))
            b_fade = tl.exp2(b_most - b_new)
            b_e = tl.exp2(b_s - b_new[:, None])
            m_v = (o_k < at + l)[:, None] & (o_p < p)[None, :]
            b_v = tl.load(p_values + o_k[:, None] * p + o_p[None, :], mask=m_v, other=0.0)
            b_y = tl.dot(b_e.to(b_v.dtype), b_v, b_y * b_fade[:, None], input_precision=PREC)
            b_sum = b_sum * b_fade + tl.sum(b_e, axis=1)
            b_most = b_new
        o_part = (o_bt * (g * r) + i_g * r + o_r) * tl.num_programs(1) + i_s
        tl.store(p_weight + o_part, b_most + tl.log2(b_sum), mask=m_q)
        m_y = m_q[:, None] & (o_p < p)[None, :]
        tl.store(p_y + o_part[:, None] * p + o_p[None, :], b_y / b_sum[:, None], mask=m_y)


# y = Σ_s 2^weight_s y_s / Σ_s 2^weight_s over the pieces s of one token and head, 16 at a time
@jit(do_not_specialize=["l", "pieces"])
def attend_join_kernel(
    p_weight, p_parts, p_at, p_y, l, pieces,
    h: constexpr, p: constexpr, SPLIT: constexpr, BP: constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    i_t = i // h
    end = (tl.load(p_at + i_t // l).to(tl.int32) + (i_t % l).to(tl.int32)) // SPLIT + 1
    o_p = tl.arange(0, BP)
    b_most = tl.full((1,), -1e30, tl.float32)
    b_sum = tl.zeros((1,), tl.float32)
    b_y = tl.zeros((BP,), tl.float32)
    for i_s in range(0, end, 16):
        o_s = i_s + tl.arange(0, 16)
        b_weight = tl.load(p_weight + i * pieces + o_s, mask=o_s < end, other=-1e30)
        b_new = tl.maximum(b_most, tl.max(b_weight, axis=0))
        b_fade = tl.exp2(b_most - b_new)
        b_e = tl.exp2(b_weight - b_new)
        m = (o_s < end)[:, None] & (o_p < p)[None, :]
        b_part = read(p_parts + (i * pieces + o_s)[:, None] * p + o_p[None, :], m)
        b_y = b_y * b_fade + tl.sum(b_e[:, None] * b_part, axis=0)
        b_sum = b_sum * b_fade + tl.sum(b_e, axis=0)
        b_most = b_new
    tl.store(p_y + i * p + o_p, b_y / b_sum, mask=o_p < p)


def attend(q, k, v, cos, sin, keys, values, at):
    """Causal attention of l ≤ FEW new tokens over a cache of `at` (b,) tokens a row, then in it.

    q (b, l, h, p), k and v (b, l, g, p) before RoPE; cos, sin (b, 1, l, p / 2), float32; keys and
    values (b, g, size, p). p ≤ 128 and h/g ≤ 16. Returns y (b, l, h, p).
    """
    (b, l, h, p), (g, size) = q.shape, keys.shape[1:3]
    split = SPLIT[b * g >= 64]  # enough pieces to fill the chip; never by the number of new tokens
    pieces, R, BH = triton.cdiv(size, split), triton.next_power_of_2(h // g), block(p // 2)
    weight = q.new_empty(b, l, h, pieces, dtype=torch.float32)
    parts, y = weight.new_empty(*weight.shape, p), q.new_empty(b, l, h, p)
    sizes = dict(g=g, r=h // g, p=p, R=R, SPLIT=split, BK=min(64, split), BH=BH, PREC=precision(q))
    sizes["num_stages"] = in_flight(q, 3, 2 * 64 * 2 * BH * q.element_size())
    tensors = *strided(q), *strided(k), *strided(v), cos, sin, at, keys, values, weight, parts
    grid, scale = (b * g * triton.cdiv(l, 16 // R), pieces), p**-0.5 * LOG2E.value
    launch(attend_kernel, grid, *tensors, scale, l, size, **sizes)
    sizes = dict(h=h, p=p, SPLIT=split, BP=triton.next_power_of_2(p), num_warps=2)
    launch(attend_join_kernel, (b * l * h,), weight, parts, at, y, l, pieces, **sizes)
    return y


@jit
def replay_read(p_log, s_log, p_new, s_new, o_t, o, m, at, SIZE):
    """Numbers o of the tokens o_t: from the log before token `at`, then new; 0 before token 0."""
    b_old = read(p_log + (o_t & (SIZE - 1)) * s_log + o, m & (o_t >= 0) & (o_t < at))
    return b_old + read(p_new + (o_t - at) * s_new + o, m & (o_t >= at))


# silu(bias + Σ_k weight_k x_{t-W+1+k}) of BC of c channels of one row, for every token from `base`
# on, T at a time, into y (b, SIZE, c). r channels read one of x. The new tokens' x goes into the
# log.
@jit(do_not_specialize=["l", "SIZE"])
def replay_conv_kernel(
    p_x, s_x: constexpr, p_log, s_log: constexpr, p_at, p_base, p_w, p_bias, p_y, l, SIZE,
    c: constexpr, r: constexpr, p: constexpr, W: constexpr, T: constexpr, BC: constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    at = tl.load(p_at + i_b).to(tl.int32)
    base = tl.load(p_base + i_b).to(tl.int32)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    o_x = o_c // (r * p) * p + o_c % p
    p_x += i_b * l * s_x
    p_log += i_b * SIZE * s_log
    for t in range(base, at + l, T):
        o_t = t + tl.arange(0, T)[:, None]
        m = (o_c < c) & (o_t < at + l)
        b_y = read(p_bias + o_c + 0 * o_t, m)
        for k in tl.static_range(W):
            b_x = replay_read(p_log, s_log, p_x, s_x, o_t - (W - 1) + k, o_x, m, at, SIZE)
            b_y += read(p_w + o_c * W + k, o_c < c) * b_x
        tl.store(p_y + (i_b * SIZE + o_t - base) * c + o_c, silu(b_y), mask=m)
        m = m & (o_t >= at)
        b_new = tl.load(p_x + (o_t - at) * s_x + o_x, mask=m)
        tl.store(p_log + (o_t & (SIZE - 1)) * s_log + o_x, b_new, mask=m)


# One head of one row: from the state before token `base` through the logged tokens to token `at`
# and on through the l new ones: the recurrence and, for new tokens, the output, its gate and its
# norm. The state is stored where it is to stand, before token `to`; dt and B go into the log. p_c
# is what replay_conv_kernel left; Mamba-2 (p_B is None) has B and C there too. A state is a tile
# (p, n / NB, NB), whose sums over n take few steps.
@jit(do_not_specialize=["l", "SIZE", "eps"])
def replay_kernel(
    p_dt, s_dt: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr, p_z, s_z: constexpr,
    l_dt, s_ldt: constexpr, l_B, s_lB: constexpr, p_c,
    p_h, p_at, p_base, p_to, p_A, p_bias, p_D, p_norm, p_y, l, SIZE, eps,
    c: constexpr, h: constexpr, r: constexpr, p: constexpr, n: constexpr,
    BP: constexpr, BN: constexpr, NB: constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // h).to(tl.int64)
    i_h = tl.program_id(0) % h
    o_p = tl.arange(0, BP)[:, None, None]
    o_n = tl.arange(0, BN // NB)[None, :, None] * NB + tl.arange(0, NB)[None, None, :]
    m_p = o_p < p
    m_n = o_n < n
    at = tl.load(p_at + i_b).to(tl.int32)
    base = tl.load(p_base + i_b).to(tl.int32)
    to = tl.load(p_to + i_b).to(tl.int32)
    o_B = i_h // r * n + o_n
    if p_B is None:
        o_d = i_h + 0 * o_p  # Δ, A and D of the head
        o_x = i_h // r * p + o_p
        b_A = tl.load(p_A + i_h)
    else:
        o_d = i_h * p + o_p  # of every channel
        o_x = o_d
        b_A = tl.load(p_A + o_d * n + o_n, mask=m_p & m_n, other=0.0)
        p_B += i_b * l * s_B
        l_B += i_b * SIZE * s_lB
        p_C += i_b * l * s_C + i_h * n
    b_A = -tl.exp(b_A.to(tl.float32)) * LOG2E
    b_D = read(p_D + o_d, m_p)
    b_bias = read(p_bias + o_d, m_p)
    p_c += i_b * SIZE * c
    p_dt += i_b * l * s_dt
    l_dt += i_b * SIZE * s_ldt
    p_h += (i_b * h + i_h) * (p * n) + o_p * n + o_n
    b_h = tl.load(p_h, mask=m_p & m_n, other=0.0)
    for t in range(base, at + l):
        o_t = t + 0 * o_p
        i_log = t & (SIZE - 1)
        b_x = read(p_c + (t - base) * c + o_x, m_p)
        b_dt = replay_read(l_dt, s_ldt, p_dt, s_dt, o_t, o_d, m_p, at, SIZE)
        tl.store(l_dt + i_log * s_ldt + o_d, b_dt, mask=m_p & (o_t >= at))
        if p_B is None:
            b_B = read(p_c + (t - base) * c + h // r * p + o_B, m_n)
            b_C = read(p_c + (t - base) * c + h // r * (p + n) + i_h * n + o_n, m_n)
        else:
            m_new = m_n & (t + 0 * o_n >= at)
            b_B = replay_read(l_B, s_lB, p_B, s_B, t + 0 * o_n, o_B, m_n, at, SIZE)
            tl.store(l_B + i_log * s_lB + o_B, b_B, mask=m_new)
            b_C = read(p_C + (t - at) * s_C + o_n, m_new)
        b_delta = softplus(b_dt + b_bias)
        b_h = tl.exp2(b_delta * b_A) * b_h + b_delta * b_x * b_B
        if t + 1 == to:
            tl.store(p_h, b_h, mask=m_p & m_n)
        if t >= at:
            o_y = i_b * l + t - at
            b_y = tl.sum(tl.sum(b_h * b_C, axis=1, keep_dims=True), axis=2, keep_dims=True)
            b_y = (b_y + b_D * b_x) * silu(read(p_z + o_y * s_z + i_h * p + o_p, m_p))
            if p_norm is not None:
                b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=0, keep_dims=True) / p + eps)
                b_y *= read(p_norm + i_h * p + o_p, m_p)
            tl.store(p_y + (o_y * h + i_h) * p + o_p, b_y, mask=m_p)


def replay(x, dt, B, C, z, log, h, places, weight, bias, A_log, dt_bias, D, norm=None, eps=0.0):
    """Convolution, scan, gate and norm of l ≤ FEW new tokens, after a replay of the logged ones.

    Section 4 of the paper, in two kernels.

    Mamba: x (b, l, g, p), dt and z (b, l, h, p), B (b, l, g, n), C (b, l, h, n), A_log (h·p, n),
    dt_bias and D (h·p). Mamba-2: x (b, l, channels) is x, B and C together; dt (b, l, h); B and C
    None; z (b, l, h, p); A_log, dt_bias and D (h,); norm (h·p) the weight of the norm, eps its own.
    The convolution has weight (channels, 1, w) and bias. log: x, dt and B of earlier tokens
    (b, size, …), token t at t mod size, a power of 2 that holds the logged tokens, the new ones and
    w - 1 more. places: at, base and to (b,) of each row: the first new token, the one before which
    h (b, h, p, n) stands, and the one before which it is to stand afterwards. p, n ≤ 128. Returns
    y (b, l, h, p).
    """
    (b, l), (heads, p, n), (c, _, w), size = x.shape[:2], h.shape[1:], weight.shape, log[0].shape[1]
    r, fan, cut = heads // x.shape[2], heads // x.shape[2], p
    if norm is not None:  # Mamba-2 repeats no channel of its convolution
        r, fan, cut = heads // ((c - heads * n) // (p + n)), 1, c
    (at, base, to), (l_x, l_dt, *l_B) = places, log
    mixed, y, BN = h.new_empty(b, size, c), x.new_empty(b, l, heads, p), triton.next_power_of_2(n)
    sizes = dict(h=heads, r=r, p=p, n=n, BP=triton.next_power_of_2(p), BN=BN, NB=min(BN, 32))
    inputs = [v for t in (dt, B, C, z, l_dt, l_B[0] if l_B else None) for v in strided(t)]
    tensors = *strided(x), *strided(l_x), at, base, weight, bias, mixed
    sizes_c = dict(c=c, r=fan, p=cut, W=w, T=4, BC=256)
    launch(replay_conv_kernel, (b, triton.cdiv(c, 256)), *tensors, l, size, **sizes_c)
    tensors = *inputs, mixed, h, at, base, to, A_log, dt_bias, D, norm, y
    warps = max(1, sizes["BP"] * BN // 2048)
    launch(replay_kernel, (b * heads,), *tensors, l, size, eps, c=c, **sizes, num_warps=warps)
    return y
