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
    if not use_triton(x) or x.shape[1] == 1 or max(x.shape[3], C.shape[3]) > 256:
        with torch.autocast(x.device.type, enabled=False):  # state and Δ A stay float32
            return scan_torch(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    if B.shape[2] != x.shape[2]:  # in a Llama they never differ
        x, B = repeat_heads(x, C.shape[2]), repeat_heads(B, C.shape[2])
    if A.dim() == 3:
        return s6_scan(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    y, state = ssd_scan(x, dt, A, B, C, D, dt_bias, h0, pos)
    if z is not None:  # these kernels have no gate: in a model, the norm follows it
        y = (y.float() * F.silu(z.float())).to(y.dtype)
    return y, state


def step_size(dt, dt_bias):
    """Δ, in float32 or more."""
    f = torch.promote_types(dt.dtype, torch.float32)
    return F.softplus(dt.to(f) if dt_bias is None else dt + dt_bias.to(f))


def ssd_steps(dt, A, dt_bias, pos):
    """Δ and its product with A, the logarithm of the decay, of each token and head of Mamba-2.

    Where a document starts nothing is left of the state. There, and where the decay is below what
    the type can hold, e^-800 or e^-139, it is cut off: a sum with more would blur its neighbours.
    """
    delta = step_size(dt, dt_bias)
    least = -800.0 if delta.dtype == torch.float64 else -139.0
    a = (delta * A).clamp(min=least)
    return delta, a if pos is None else a.masked_fill((pos == 0)[..., None], least)


def ssd_scan(x, dt, A, B, C, D, dt_bias, h0, pos):
    """Mamba-2 by the kernels."""
    delta, a = ssd_steps(dt, A, dt_bias, pos)
    inputs, c = (x, delta, a, B, C), segments(x, C)
    if c == 1:
        return SSD(*inputs, h0, D)
    decay = a.unflatten(1, (c, -1)).sum(2).exp()[..., None, None]  # (b, c, h, 1, 1)
    return scan_cut(SSD, inputs, h0, (D,), decay)


def s6_scan(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    """Mamba by the kernels."""
    pos = None if pos is None else pos.int().contiguous()
    inputs, c = (x, dt, B, C, z, pos), segments(x, C)
    if c == 1:
        return S6(*inputs, h0, A, D, dt_bias)
    decay = step_size(dt, dt_bias).unflatten(1, (c, -1)).sum(2)[..., None] * A  # (b, c, h, p, n)
    decay = decay.exp()
    if pos is not None:
        starts = (pos == 0).unflatten(1, (c, -1)).any(2)
        decay = decay.masked_fill(starts[..., None, None, None], 0)
    return scan_cut(S6, inputs, h0, (A, D, dt_bias), decay)


def scan_cut(op, inputs, h0, rest, decay):
    """op(*inputs, h0, *rest) with every row cut into segments, of the given decay (b, c, h, …).

    A first walk gives the states that segments end with on their own, a second one starts right.
    """
    c = decay.shape[1]
    inputs = [None if t is None else t.unflatten(1, (c, -1)).flatten(0, 1) for t in inputs]
    _, ends = op(*inputs, None, *rest)
    h0 = torch.zeros_like(ends[::c]) if h0 is None else h0.float()
    starts, _ = pass_states(ends.unflatten(0, (-1, c)), decay, h0)
    y, state = op(*inputs, starts.flatten(0, 1), *rest)
    return y.unflatten(0, (-1, c)).flatten(1, 2), state[c - 1 :: c]


def segments(x, C):
    """Into how many segments to cut each row; 1 where it does not pay.

    A large GPU is full with 16,384 channels: 1,024 programs of Mamba, 256 of Mamba-2.
    """
    (b, l, h, _), p = C.shape, x.shape[3]
    most = min(16384 // max(1, b * h * p), l // 1024)
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


def check(where, wanted, **tensors):
    """Raises ValueError for the first tensor whose axes are not those wanted, such as "b l h p".

    A letter stands for one size, that of its first tensor. Returns the sizes by letter.
    """
    sizes, seen = {}, ""
    for (name, t), axes in zip(tensors.items(), wanted, strict=True):
        if t is None:
            continue
        letters = axes.split()
        if t.dim() == len(letters):
            sizes = dict(zip(letters, t.shape, strict=True)) | sizes
        if list(t.shape) != [sizes.get(letter) for letter in letters]:
            want = ", ".join(f"{letter} = {sizes.get(letter, '…')}" for letter in letters)
            raise ValueError(f"{where}: {name} is {tuple(t.shape)}, expected ({want}){seen}")
        seen += f"; {name} is {tuple(t.shape)}"
    if sizes["l"] < 1:
        raise ValueError(f"{where}: x has no tokens (l = 0), expected at least one")
    return sizes


def check_ssm(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    kind = ("h", "h") if A.dim() == 1 else ("h p", "h p n")  # of one token's Δ, and of A
    wanted = "b l g p", "b l k n", "b l h n", f"b l {kind[0]}", kind[1], kind[0], "b l h p"
    wanted += kind[0], "b h p n", "b l"
    given = dict(x=x, B=B, C=C, dt=dt, A=A, D=D, z=z, dt_bias=dt_bias, h0=h0, pos=pos)
    sizes = check("ssm", wanted, **given)
    if sizes["h"] % sizes["g"] or sizes["h"] % sizes["k"]:
        heads = f"kv heads of x ({sizes['g']}) and B ({sizes['k']})"
        raise ValueError(f"ssm: {heads} must both divide query heads ({sizes['h']})")


def check_conv(x, weight, bias, state, pos):
    wanted, given = ("b l g p", "h p w", "h p", "b l"), dict(x=x, weight=weight, bias=bias, pos=pos)
    sizes = check("causal_conv", wanted, **given)
    if sizes["h"] % sizes["g"]:
        heads = f"kv heads of x ({sizes['g']}) must divide the heads of weight ({sizes['h']})"
        raise ValueError(f"causal_conv: {heads}")
    before = (len(x), sizes["w"] - 1, *x.shape[2:])
    if state is not None and state.shape != before:
        raise ValueError(f"causal_conv: state is {tuple(state.shape)}, expected {before}")


# --------------------------------------------------------------------------------------------------
# The scan in PyTorch: chunks, vectorised


def scan_torch(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    """The scan in chunks of T tokens (the file's header). Returns y and the last state."""
    if x.shape[1] == 1:  # one token has nothing to run in parallel
        return ssm_reference(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    f = torch.promote_types(x.dtype, torch.float32)
    b, h, p, n = x.shape[0], C.shape[2], x.shape[3], C.shape[3]
    wide_x, dt, A, B, C = (t.to(f) for t in (x, dt, A, B, C))
    h0 = x.new_zeros(b, h, p, n, dtype=f) if h0 is None else h0.to(f)
    if A.dim() == 1:
        y, state = ssd_torch(wide_x, *ssd_steps(dt, A, dt_bias, pos), B, C, h0)
    else:
        y, state = s6_torch(wide_x, step_size(dt, dt_bias), A, B, C, h0, pos)
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


def ssd_torch(x, delta, a, B, C, h0, T=64):
    """Mamba-2. Inside a chunk y = (decay ∘ C Bᵀ) (Δ x): attention weighted by the decay."""
    l, h = x.shape[1], C.shape[2]
    T = min(T, l)
    x, B = repeat_heads(x, h), repeat_heads(B, h)
    x, delta, a, B, C = split_chunks(T, x, delta, a, B, C)
    # float64: far into a chunk s is large, and small differences between neighbours matter
    s = a.double().cumsum(2).transpose(2, 3)  # (b, c, h, T): log decay since the chunk's start
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
    l, h: constexpr, p: constexpr, n: constexpr, group: constexpr,
    SAVE: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    about = s6_program(p_A, p_D, p_bias, p_h0, h, p, n, BP, BN)
    i_b, i_h, o_p, o_n, m_p, m_n, b_A, b_D, b_bias, b_h = about
    o_k = tl.arange(0, BN)[None, :]  # n once more, along the other axis
    p_x += i_b * l * s_x + i_h // group * p + o_p
    p_dt += i_b * l * s_dt + i_h * p + o_p
    p_B += i_b * l * s_B + i_h // group * n + o_k
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
    l, h: constexpr, p: constexpr, n: constexpr, group: constexpr,
    T: constexpr, BP: constexpr, BN: constexpr, PREC: constexpr,
):  # fmt: skip
    about = s6_program(p_A, p_D, p_bias, p_dh, h, p, n, BP, BN)
    i_b, i_h, o_p, o_n, m_p, m_n, b_A, b_D, b_bias, b_G = about
    o_one = tl.arange(0, 16)[None, :]  # a product is 16 wide; the first of its columns is stored
    b_ones = tl.full((BP, 16), 1.0, tl.float32)
    p_x += i_b * l * s_x + i_h // group * p + o_p
    p_dt += i_b * l * s_dt + i_h * p + o_p
    p_B += i_b * l * s_B + i_h // group * n + o_n
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
# Mamba-2 (SSD). A tile of T tokens is a few products of matrices. PyTorch gives the kernels Δ and
# a = Δ A of each token. With s_t the running sum of a within the tile, in log2, 2^(s_t - s_r) is
# the decay from token r to token t; s_T is its last value:
#
#     y_t = Σ_{r≤t} 2^(s_t - s_r) (C_t·B_r) Δ_r x_r  +  2^s_t h C_t  +  D x_t
#     h ← 2^s_T h + Σ_r 2^(s_T - s_r) Δ_r x_r B_rᵀ
#
# In kernels the state is a tile (n, p), and a matrix of pairs of tokens is (t, r), reader and
# writer, or (r, t).


@jit
def ssd_walk(p_h0, h, p: constexpr, n: constexpr, BP: constexpr, BN: constexpr):
    """A walk's row, head, channels, states, the offsets and mask of its state, and the state."""
    i_b = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    o_h = (i_b * h + i_h) * (p * n) + o_p[None, :] * n + o_n[:, None]
    m_h = (o_n < n)[:, None] & (o_p < p)[None, :]
    b_h = tl.zeros((BN, BP), tl.float32)
    if p_h0 is not None:
        b_h = read(p_h0 + o_h, m_h)
    return i_b, i_h, o_p, o_n, o_h, m_h, b_h


@jit
def ssd_tokens(p_delta, p_a, left, h: constexpr, T: constexpr, PREC: constexpr):
    """Δ, s and s_T of T tokens, of which `left` are in the row; s of float32 inputs in float64."""
    o_t = tl.arange(0, T)
    b_delta = read(p_delta + o_t * h, o_t < left)
    b_a = read(p_a + o_t * h, o_t < left).to(tl.float64 if PREC == "ieee" else tl.float32)
    b_s = tl.cumsum(b_a * LOG2E, axis=0)
    return b_delta, b_s, tl.sum(tl.where(o_t == T - 1, b_s, 0.0), axis=0)


@jit
def exp2(b):
    """2^b in float32."""
    return tl.exp2(b.to(tl.float32))


@jit
def decay_between(b_s, m):
    """2^(s_j - s_i) of tokens i, rows, and j, columns, in float32; 0 where m is False."""
    return exp2(tl.where(m, b_s[None, :] - b_s[:, None], -float("inf")))


@jit
def tile(ptr, s_row: constexpr, o_row, o_col, n_row, n_col, DOT: constexpr):
    """A tile in the type of the products, zero from row n_row and column n_col on."""
    m = (o_row < n_row)[:, None] & (o_col < n_col)[None, :]
    return tl.load(ptr + o_row[:, None] * s_row + o_col[None, :], mask=m, other=0.0).to(DOT)


# The formulas above: one program walks BP channels of one head of one row.
@jit(do_not_specialize=["l"])
def ssd_forward_kernel(
    p_x, s_x: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr,
    p_delta, p_a, p_D, p_h0, p_y, p_h, l,
    h: constexpr, p: constexpr, n: constexpr, group: constexpr,
    DOT: constexpr, PREC: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    i_b, i_h, o_p, o_n, o_h, m_h, b_h = ssd_walk(p_h0, h, p, n, BP, BN)
    o_t = tl.arange(0, T)
    p_x += i_b * l * s_x + i_h // group * p
    p_B += i_b * l * s_B + i_h // group * n
    p_C += i_b * l * s_C + i_h * n
    b_D = 0.0
    if p_D is not None:
        b_D = tl.load(p_D + i_h)
    for i_t in range(tl.cdiv(l, T)):
        i_0 = i_t * T + 0 * i_b  # int64
        left = l - i_0  # tokens from here on
        o_0 = (i_b * l + i_0) * h + i_h
        b_x = tile(p_x + i_0 * s_x, s_x, o_t, o_p, left, p, DOT)  # (T, p)
        b_B = tl.trans(tile(p_B + i_0 * s_B, s_B, o_t, o_n, left, n, DOT))  # (n, T)
        b_C = tile(p_C + i_0 * s_C, s_C, o_t, o_n, left, n, DOT)  # (T, n)
        b_delta, b_s, b_end = ssd_tokens(p_delta + o_0, p_a + o_0, left, h, T, PREC)
        b_decay = decay_between(-b_s, o_t[:, None] >= o_t[None, :])
        b_scores = tl.dot(b_C, b_B, input_precision=PREC) * b_decay * b_delta[None, :]  # (t, r)
        b_y = tl.dot(b_C, b_h.to(DOT), input_precision=PREC) * exp2(b_s)[:, None]
        b_y += tl.dot(b_scores.to(DOT), b_x, input_precision=PREC)
        b_y += b_D * b_x.to(tl.float32)
        m_y = (o_t < left)[:, None] & (o_p < p)[None, :]
        tl.store(p_y + (o_0 + o_t[:, None] * h) * p + o_p[None, :], b_y, mask=m_y)
        b_u = (b_x.to(tl.float32) * (exp2(b_end - b_s) * b_delta)[:, None]).to(DOT)
        b_h = b_h * exp2(b_end) + tl.dot(b_B, b_u, input_precision=PREC)
    tl.store(p_h + o_h, b_h, mask=m_h)


# The walk of the state alone, with u = x and v = B. It leaves in S (b, tiles, h, n, p) the state at
# every tile's start:
#
#     h ← 2^s_T h + Σ_r 2^(s_T - s_r) Δ_r u_r v_rᵀ
#
# The ADJOINT walks from the last tile to the first, with u = dy and v = C, and leaves the adjoint
# of the state at every tile's end:     G ← 2^s_T G + Σ_t 2^s_t u_t v_tᵀ
@jit(do_not_specialize=["l"])
def ssd_states_kernel(
    p_u, s_u: constexpr, p_v, s_v: constexpr, p_delta, p_a, p_first, p_S, p_last, l,
    h: constexpr, p: constexpr, n: constexpr, group: constexpr, ADJOINT: constexpr,
    DOT: constexpr, PREC: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    i_b, i_h, o_p, o_n, o_h, m_h, b_h = ssd_walk(p_first, h, p, n, BP, BN)
    tiles = tl.cdiv(l, T)
    o_t = tl.arange(0, T)
    p_u += i_b * l * s_u + i_h // group * p
    p_v += i_b * l * s_v + i_h // group * n
    p_S += (i_b * tiles * h + i_h) * (n * p) + o_n[:, None] * p + o_p[None, :]
    for k in range(tiles):
        i_t = 0 * i_b + (tiles - 1 - k if ADJOINT else k)  # int64
        i_0 = i_t * T
        o_0 = (i_b * l + i_0) * h + i_h
        tl.store(p_S + i_t * (h * n * p), b_h, mask=m_h)
        b_u = tile(p_u + i_0 * s_u, s_u, o_t, o_p, l - i_0, p, DOT)
        b_v = tl.trans(tile(p_v + i_0 * s_v, s_v, o_t, o_n, l - i_0, n, DOT))
        b_delta, b_s, b_end = ssd_tokens(p_delta + o_0, p_a + o_0, l - i_0, h, T, PREC)
        b_w = exp2(b_s) if ADJOINT else exp2(b_end - b_s) * b_delta
        b_u = (b_u.to(tl.float32) * b_w[:, None]).to(DOT)
        b_h = b_h * exp2(b_end) + tl.dot(b_v, b_u, input_precision=PREC)
    tl.store(p_last + o_h, b_h, mask=m_h)


@jit
def products(
    p_a, s_a: constexpr, p_c, s_c: constexpr, o_t, left, w: constexpr,
    DOT: constexpr, PREC: constexpr, BW: constexpr,
):  # fmt: skip
    """a cᵀ of two tiles of T tokens, w columns wide: (T, T)."""
    b = tl.zeros((o_t.shape[0], o_t.shape[0]), tl.float32)
    for i in range(0, w, BW):
        o = i + tl.arange(0, BW)
        b_c = tl.trans(tile(p_c, s_c, o_t, o, left, w, DOT))
        b = tl.dot(tile(p_a, s_a, o_t, o, left, w, DOT), b_c, b, input_precision=PREC)
    return b


# The gradients of one tile of one head, from S, the state at its start, and G, the adjoint of the
# state at its end. With decay_tr = 2^(s_t - s_r) for r ≤ t, else 0:
#
#     dx_r = Δ_r (2^(s_T - s_r) G B_r + Σ_t decay_tr (C_t·B_r) dy_t) + D dy_r  b_BC (r, t)
#     dB_r = Δ_r (2^(s_T - s_r) G x_r + Σ_t decay_tr (dy_t·x_r) C_t)           b_xy (r, t)
#     dC_t = 2^s_t S dy_t + Σ_r decay_tr Δ_r (dy_t·x_r) B_r                    b_yx (t, r)
#
# da_t is the sum of every product whose decay spans token t: b_ds, what a token reads minus what it
# writes inside the tile, summed from the tile's end back to t; b_before, what the tokens before t
# leave at the tile's end; and 2^s_T <S, G>, what crosses the whole tile. Readers and writers have
# products of their own, since Triton 3.4 to 3.7 on Hopper miscompiles a product with another one's
# transposed result. dD (·, h) is the tile's part.
@jit(do_not_specialize=["l"])
def ssd_backward_kernel(
    p_x, s_x: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr, p_dy, s_dy: constexpr,
    p_delta, p_a, p_D, p_S, p_G, p_dx, p_ddelta, p_da, p_dB, p_dC, p_dD, l,
    h: constexpr, p: constexpr, n: constexpr, group: constexpr,
    DOT: constexpr, PREC: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    tiles = tl.cdiv(l, T)
    i_bt = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    i_0 = i_bt % tiles * T
    i_l = i_bt // tiles * l + i_0  # the first token, of all rows'
    left = l - i_0  # tokens from here on
    o_t = tl.arange(0, T)
    p_x += i_l * s_x + i_h // group * p
    p_B += i_l * s_B + i_h // group * n
    p_C += i_l * s_C + i_h * n
    p_dy += i_l * s_dy + i_h * p
    p_S += (i_bt * h + i_h) * (n * p)
    p_G += (i_bt * h + i_h) * (n * p)
    o_0 = i_l * h + i_h
    b_delta, b_s, b_end = ssd_tokens(p_delta + o_0, p_a + o_0, left, h, T, PREC)
    b_after = exp2(b_end - b_s)[:, None]
    b_BC = products(p_B, s_B, p_C, s_C, o_t, left, n, DOT, PREC, BN)
    b_BC *= decay_between(b_s, o_t[:, None] <= o_t[None, :])
    for i_p in range(0, p, BP):
        o_p = i_p + tl.arange(0, BP)
        b_dy = tile(p_dy, s_dy, o_t, o_p, left, p, DOT)
        b_dx = tl.zeros((T, BP), tl.float32)
        for i_n in range(0, n, BN):
            o_n = i_n + tl.arange(0, BN)
            b_G = tile(p_G, p, o_n, o_p, n, p, DOT)
            b_B = tile(p_B, s_B, o_t, o_n, left, n, DOT)
            b_dx = tl.dot(b_B, b_G, b_dx, input_precision=PREC)
        b_dx = tl.dot(b_BC.to(DOT), b_dy, b_dx * b_after, input_precision=PREC) * b_delta[:, None]
        if p_D is not None:
            b_dx += tl.load(p_D + i_h) * b_dy.to(tl.float32)
        m_x = (o_t < left)[:, None] & (o_p < p)[None, :]
        tl.store(p_dx + (o_0 + o_t[:, None] * h) * p + o_p[None, :], b_dx, mask=m_x)
    b_xy = products(p_x, s_x, p_dy, s_dy, o_t, left, p, DOT, PREC, BP)
    b_yx = products(p_dy, s_dy, p_x, s_x, o_t, left, p, DOT, PREC, BP)
    b_dD = tl.where(o_t[:, None] == o_t[None, :], b_xy, 0.0)
    tl.store(p_dD + i_bt * h + i_h, tl.sum(tl.sum(b_dD, axis=1), axis=0))
    b_pairs = b_BC * b_xy
    b_xy *= decay_between(b_s, o_t[:, None] <= o_t[None, :])
    b_yx *= decay_between(-b_s, o_t[:, None] >= o_t[None, :])
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
        b_dB *= b_after
        b_dC *= exp2(b_s)[:, None]
        b_give += tl.sum(b_dB * b_B.to(tl.float32), axis=1)
        b_ds += tl.sum(b_dC * b_C.to(tl.float32), axis=1)
        b_dB = tl.dot(b_xy, b_C, b_dB * b_delta[:, None], input_precision=PREC)
        b_dC = tl.dot(b_yx, b_B, b_dC, input_precision=PREC)
        o_tn = (o_0 + o_t[:, None] * h) * n + o_n[None, :]
        m_tn = (o_t < left)[:, None] & (o_n < n)[None, :]
        tl.store(p_dB + o_tn, b_dB, mask=m_tn)
        tl.store(p_dC + o_tn, b_dC, mask=m_tn)
    b_given = (b_give * b_delta)[None, :]
    b_before = tl.sum(tl.where(o_t[None, :] < o_t[:, None], b_given, 0.0), axis=1)
    b_da = tl.cumsum(b_ds, axis=0, reverse=True) + b_before + exp2(b_end) * b_hold
    tl.store(p_ddelta + o_0 + o_t * h, b_ddelta + b_give, mask=o_t < left)
    tl.store(p_da + o_0 + o_t * h, b_da, mask=o_t < left)


# --------------------------------------------------------------------------------------------------
# The convolution. A program walks BC channels of the kv heads, and the R query heads that read
# each, through T tokens, U at a time, the inputs of the last W - 1 in registers.

CONV_TOKENS, CONV_CHANNELS = 64, 128


@jit
def conv_walk(
    p_w, p_bias, c, group: constexpr, p: constexpr, W: constexpr, R: constexpr, BC: constexpr,
):  # fmt: skip
    """Offsets of x's channels (1, BC) and of the query heads' (R, BC), `c` past the last, the
    weights of each tap, and the bias."""
    o_x = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    o_r = tl.arange(0, R)[:, None]
    o_c = tl.where((o_x < c // group) & (o_r < group), (o_x // p * group + o_r) * p + o_x % p, c)
    ws = ()
    for k in tl.static_range(W):
        ws = ws + (read(p_w + o_c * W + k, o_c < c),)
    b_bias = tl.zeros((R, BC), tl.float32)
    if p_bias is not None:
        b_bias = read(p_bias + o_c, o_c < c)
    return o_x, o_c, ws, b_bias


@jit
def conv_tokens(ptr, s_t: constexpr, o, c, t, l, U: constexpr):
    """Channels o of c, of U tokens from t on, as a tuple; zeros outside the row."""
    tokens = ()
    for j in tl.static_range(U):
        m = o < tl.where((t + j >= 0) & (t + j < l), c, 0)
        tokens = tokens + (read(ptr + (t + j) * s_t + o, m),)
    return tokens


@jit
def sees(p_pos, t, l, lag: constexpr):
    """Whether what lies `lag` tokens before token t of the row is of its document."""
    pos = lag
    if p_pos is not None:
        pos = tl.load(p_pos + t, mask=(t >= 0) & (t < l), other=0)
    return pos >= lag


@jit
def conv_taps(p_pos, t, l, xs, j: constexpr, W: constexpr):
    """The inputs x_{t-W+1+k} that token t sees, as a tuple, from xs[j] on."""
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.where(sees(p_pos, t, l, W - 1 - k), xs[j + k], 0.0),)
    return taps


# y_t = silu(e_t),    e_t = bias + Σ_k weight_k x_{t-W+1+k}
@jit(do_not_specialize=["l"])
def conv_forward_kernel(
    p_x, s_x: constexpr, p_w, p_bias, p_pos, p_y, l, c: constexpr, group: constexpr, p: constexpr,
    W: constexpr, T: constexpr, U: constexpr, R: constexpr, BC: constexpr,
):  # fmt: skip
    o_x, o_c, ws, b_bias = conv_walk(p_w, p_bias, c, group, p, W, R, BC)
    i_l = tl.program_id(2).to(tl.int64) * l  # the row's first token, of all rows'
    p_x += i_l * s_x
    p_y += i_l * c
    p_pos = None if p_pos is None else p_pos + i_l
    t = 0 * i_l + tl.program_id(1) * T
    xs = conv_tokens(p_x, s_x, o_x, c // group, t - (W - 1), l, W - 1)
    for _ in range(T // U):
        xs = xs + conv_tokens(p_x, s_x, o_x, c // group, t, l, U)
        for j in tl.static_range(U):
            taps = conv_taps(p_pos, t + j, l, xs, j, W)
            b_e = b_bias
            for k in tl.static_range(W):
                b_e += ws[k] * taps[k]
            tl.store(p_y + (t + j) * c + o_c, silu(b_e), mask=o_c < tl.where(t + j < l, c, 0))
        xs = xs[U:]
        t += U


# de_t = dy_t silu'(e_t),    dx_t = Σ_k weight_k de_{t+W-1-k}
# dweight_k = Σ_t de_t x_{t-W+1+k},    dbias = Σ_t de_t
#
# dx is summed over the query heads of a kv head. It follows de W - 1 tokens behind, so the walk
# goes on for as many. sums (·, W + 1, c): the program's part of dweight and, last, of dbias.
@jit(do_not_specialize=["l"])
def conv_backward_kernel(
    p_x, s_x: constexpr, p_w, p_bias, p_pos, p_dy, p_dx, p_sums, l,
    c: constexpr, group: constexpr, p: constexpr,
    W: constexpr, T: constexpr, U: constexpr, R: constexpr, BC: constexpr,
):  # fmt: skip
    o_x, o_c, ws, b_bias = conv_walk(p_w, p_bias, c, group, p, W, R, BC)
    i_l = tl.program_id(2).to(tl.int64) * l  # the row's first token, of all rows'
    p_x += i_l * s_x
    p_dy += i_l * c
    p_dx += i_l * (c // group)
    p_pos = None if p_pos is None else p_pos + i_l
    t = 0 * i_l + tl.program_id(1) * T
    first = t
    end = tl.minimum(l, t + T)
    sums = (tl.zeros((R, BC), tl.float32),) * (W + 1)
    des = (tl.zeros((R, BC), tl.float32),) * (W - 1)
    xs = conv_tokens(p_x, s_x, o_x, c // group, t - (W - 1), l, W - 1)
    for _ in range(T // U + tl.cdiv(W - 1, U)):
        xs = xs + conv_tokens(p_x, s_x, o_x, c // group, t, l, U)
        dys = conv_tokens(p_dy, c, o_c, c, t, l, U)
        for j in tl.static_range(U):
            taps = conv_taps(p_pos, t + j, l, xs, j, W)
            b_e = b_bias
            for k in tl.static_range(W):
                b_e += ws[k] * taps[k]
            b_de = dys[j] * silu_slope(b_e)
            des = des + (b_de,)
            b_own = tl.where(t + j < end, b_de, 0.0)
            more = ()
            for k in tl.static_range(W):
                more = more + (sums[k] + b_own * taps[k],)
            sums = more + (sums[W] + b_own,)
            at = t + j - (W - 1)  # the token whose dx is whole now
            b_dx = tl.zeros((R, BC), tl.float32)
            for lag in tl.static_range(W):
                b_de = tl.where(sees(p_pos, at + lag, l, lag), des[j + lag], 0.0)
                b_dx += ws[W - 1 - lag] * b_de
            b_dx = tl.sum(b_dx, axis=0, keep_dims=True)
            m_x = o_x < tl.where((at >= first) & (at < end), c // group, 0)
            tl.store(p_dx + at * (c // group) + o_x, b_dx, mask=m_x)
        xs = xs[U:]
        des = des[U:]
        t += U
    p_sums += (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (
        (W + 1) * c
    )
    for k in tl.static_range(W + 1):
        tl.store(p_sums + k * c + o_c, sums[k], mask=o_c < c)


# --------------------------------------------------------------------------------------------------
# The launches, and the operators that torch.compile takes as one node each. pos is int32 and
# contiguous; a and Δ are float32.


def strided(*tensors):
    """Each tensor (b, l, …) with all its tokens at one distance, and the distance; None and 0."""
    both = []
    for t in tensors:
        one = t is None or t.stride(0) == t.shape[1] * t.stride(1) and t[:1, :1].is_contiguous()
        t = t if one else t.contiguous()
        both += [t, 0 if t is None else t.stride(1)]
    return both


def launch(kernel, grid, *args, **sizes):
    """kernel[grid](...) on the device of args[0]; nothing where torch.compile asks for shapes."""
    if not isinstance(args[0], FakeTensor):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **sizes)


def flat(t):
    """`t` in float32, contiguous; None stays None."""
    return None if t is None else t.float().contiguous()


def block(n):
    """The size of a block that holds n numbers: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(n))


def precision(x):
    """How float32 products are made: in full for inputs in float32, else as TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def s6_sizes(x, C):
    """The grid and the constants of Mamba's kernels."""
    (b, _, h, n), p = C.shape, x.shape[3]
    BN, BP = block(n), min(S6_BLOCK, block(p))
    sizes = dict(h=h, p=p, n=n, group=h // x.shape[2], BP=BP, BN=BN)
    return (b * h, triton.cdiv(p, BP)), dict(sizes, num_warps=max(1, BN * BP // 256))


def s6_forward(x, dt, B, C, z, pos, h0, A, D, dt_bias, save=False):
    """Mamba: y, the last state and, if asked, the states before every S6_SAVE-th token."""
    (b, l, h, n), p = C.shape, x.shape[3]
    grid, sizes = s6_sizes(x, C)
    y, last = x.new_empty(b, l, h, p), x.new_empty(b, h, p, n, dtype=torch.float32)
    S = last.new_empty(b, triton.cdiv(l, S6_SAVE), h, n, p) if save else None
    tensors = *strided(x, dt, B, C, z), *map(flat, (A, D, dt_bias, h0)), pos, y, last, S
    launch(s6_forward_kernel, grid, *tensors, l, SAVE=S6_SAVE, T=S6_TILE, **sizes)
    return (y, last, S) if save else (y, last)


def s6_backward(dy, dh, x, dt, B, C, z, pos, h0, A, D, dt_bias):
    """The gradients of x and B per query head, of dt, C, z (undefined if None) and h0; and, per row
    and side by side (b, h, p, n + 2), those of A, D and dt_bias."""
    (b, l, h, n), p = C.shape, x.shape[3]
    *_, S = s6_forward(x, dt, B, C, z, pos, h0, A, D, dt_bias, save=True)
    grid, sizes = s6_sizes(x, C)
    dx, ddt, dz = x.new_empty(b, l, h, p), dt.new_empty(b, l, h, p), x.new_empty(b, l, h, p)
    dB, dC = B.new_empty(grid[1], b, l, h, n), C.new_empty(grid[1], b, l, h, n)
    dh0, sums = S.new_empty(b, h, p, n), S.new_empty(b, h, p, n + 2)
    tensors = *strided(x, dt, B, C, z, dy), *map(flat, (A, D, dt_bias, dh)), pos, S
    results = dx, ddt, dB, dC, dz, dh0, sums
    launch(s6_backward_kernel, grid, *tensors, *results, l, T=S6_SAVE, PREC=precision(x), **sizes)
    dB, dC = (t[0] if len(t) == 1 else t.sum(0) for t in (dB, dC))
    return dx, ddt, dB, dC, dz, dh0, sums


def ssd_sizes(x, C):
    """The constants of Mamba-2's kernels: tiles of 64 tokens in bf16, of 32 in float32; and those
    of a walk, which holds a state of all n."""
    bf16 = x.dtype == torch.bfloat16 and not INTERPRET  # which the interpreter lacks
    T = 64 if bf16 else 32
    sizes = dict(h=C.shape[2], p=x.shape[3], n=C.shape[3], T=T, BP=T, PREC=precision(x))
    sizes["DOT"] = tl.bfloat16 if bf16 else tl.float32
    BN = block(C.shape[3])
    return dict(sizes, BN=T), dict(sizes, BN=BN, num_stages=3 if BN <= 128 else 2)


def ssd_forward(x, delta, a, B, C, h0, D):
    """Mamba-2: y and the last state."""
    (b, l, h, n), p, (_, walk) = C.shape, x.shape[3], ssd_sizes(x, C)
    y, last = x.new_empty(b, l, h, p), delta.new_empty(b, h, p, n)
    tensors = *strided(x, B, C), *map(flat, (delta, a, D, h0)), y, last
    grid = b * h, triton.cdiv(p, walk["BP"])
    launch(ssd_forward_kernel, grid, *tensors, l, group=h // x.shape[2], **walk)
    return y, last


def ssd_backward(dy, dh, x, delta, a, B, C, h0, D):
    """The gradients of x and B per query head, of Δ, a, C and h0; and of D per tile."""
    (b, l, h, n), p, (sizes, walk) = C.shape, x.shape[3], ssd_sizes(x, C)
    tiles, group = triton.cdiv(l, sizes["T"]), h // x.shape[2]
    kind = torch.bfloat16 if sizes["DOT"] == tl.bfloat16 else torch.float32
    S, G = (delta.new_empty(b, tiles, h, n, p, dtype=kind) for _ in range(2))
    last, dh0 = (delta.new_empty(b, h, p, n) for _ in range(2))
    grid = b * h, triton.cdiv(p, walk["BP"])
    delta, a = flat(delta), flat(a)
    states = *strided(x, B), delta, a, flat(h0), S, last
    launch(ssd_states_kernel, grid, *states, l, group=group, ADJOINT=False, **walk)
    adjoints = *strided(dy, C), delta, a, flat(dh), G, dh0
    launch(ssd_states_kernel, grid, *adjoints, l, group=1, ADJOINT=True, **walk)
    dx, ddelta, da = x.new_empty(b, l, h, p), torch.empty_like(delta), torch.empty_like(a)
    dB, dC, dD = B.new_empty(C.shape), C.new_empty(C.shape), delta.new_empty(b * tiles, h)
    tensors = *strided(x, B, C, dy), delta, a, flat(D), S, G, dx, ddelta, da, dB, dC, dD
    launch(ssd_backward_kernel, (b * tiles * h,), *tensors, l, group=group, **sizes)
    return dx, ddelta, da, dB, dC, dh0, dD


def conv_sizes(x, weight):
    """The grid and the constants of the convolution's kernels."""
    (b, l, g, _), (h, p, w), R = (
        x.shape,
        weight.shape,
        triton.next_power_of_2(len(weight) // x.shape[2]),
    )
    BC = max(1, min(CONV_CHANNELS // R, triton.next_power_of_2(g * p)))
    grid = triton.cdiv(g * p, BC), triton.cdiv(l, CONV_TOKENS), b
    return grid, dict(c=h * p, group=h // g, p=p, W=w, T=CONV_TOKENS, U=8, R=R, BC=BC, num_warps=1)


def conv_forward(x, weight, bias, pos):
    y, (grid, sizes) = x.new_empty(*x.shape[:2], *weight.shape[:2]), conv_sizes(x, weight)
    tensors = *strided(x), flat(weight), flat(bias), pos, y
    launch(conv_forward_kernel, grid, *tensors, x.shape[1], **sizes)
    return y


def conv_backward(dy, x, weight, bias, pos):
    """The gradient of x and, in parts (·, w + 1, h, p), of each tap's weights and of the bias."""
    dx, (grid, sizes), (h, p, w) = x.new_empty(x.shape), conv_sizes(x, weight), weight.shape
    sums = x.new_empty(grid[1] * grid[2], w + 1, h, p, dtype=torch.float32)
    tensors = *strided(x), flat(weight), flat(bias), pos, dy.contiguous(), dx, sums
    launch(conv_backward_kernel, grid, *tensors, x.shape[1], **sizes)
    return dx, sums


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def over_group(dt, t):
    """The gradient of t (b, l, g, w) from that of each query head (b, l, h, w), in t's type."""
    return dt.unflatten(2, (t.shape[2], -1)).sum(3).to(t.dtype) if dt.shape != t.shape else dt


def like(gradients, tensors):
    """Each gradient in its tensor's type; None for a tensor that is None."""
    return [None if t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]


def s6_gradient(ctx, dy, dh):
    x, _, B, _, z, _, h0, A, D, dt_bias = inputs = ctx.saved_tensors
    dx, ddt, dB, dC, dz, dh0, sums = S6_BACKWARD(dy, dh, *inputs)
    dA, dD, dbias = sums.sum(0).split([A.shape[2], 1, 1], dim=2)
    dz, dh0, *rest = like((dz, dh0, dA, dD[..., 0], dbias[..., 0]), (z, h0, A, D, dt_bias))
    return over_group(dx, x), ddt, over_group(dB, B), dC, dz, None, dh0, *rest


def ssd_gradient(ctx, dy, dh):
    x, _, _, B, _, h0, D = inputs = ctx.saved_tensors
    dx, ddelta, da, dB, dC, dh0, dD = SSD_BACKWARD(dy, dh, *inputs)
    return over_group(dx, x), ddelta, da, over_group(dB, B), dC, *like((dh0, dD.sum(0)), (h0, D))


def conv_gradient(ctx, dy):
    x, weight, bias, pos = ctx.saved_tensors
    dx, sums = CONV_BACKWARD(dy, x, weight, bias, pos)
    *taps, dbias = sums.sum(0)
    return dx, *like((torch.stack(taps, dim=2), dbias), (weight, bias)), None


def operator(name, f, arguments, results):
    """`f` as PyTorch's operator mil::name, which also tells the shapes of its results."""
    kinds = ["Tensor? " + a[:-1] if a[-1] == "?" else "Tensor " + a for a in arguments.split()]
    schema = f"({', '.join(kinds)}) -> ({', '.join(['Tensor'] * results)})"
    op = torch.library.custom_op(f"mil::{name}", f, mutates_args=(), schema=schema)
    op.register_fake(f)
    return op


S6_INPUTS, SSD_INPUTS = "x dt B C z? pos? h0? A D? dt_bias?", "x delta a B C h0? D?"
CONV_INPUTS = "x weight bias? pos?"
S6 = operator("s6", s6_forward, S6_INPUTS, 2)
SSD = operator("ssd", ssd_forward, SSD_INPUTS, 2)
CONV = operator("conv", conv_forward, CONV_INPUTS, 1)
S6_BACKWARD = operator("s6_backward", s6_backward, "dy dh " + S6_INPUTS, 7)
SSD_BACKWARD = operator("ssd_backward", ssd_backward, "dy dh " + SSD_INPUTS, 7)
CONV_BACKWARD = operator("conv_backward", conv_backward, "dy " + CONV_INPUTS, 2)
S6.register_autograd(s6_gradient, setup_context=save)
SSD.register_autograd(ssd_gradient, setup_context=save)
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
def replay_read(p_log, s_log: constexpr, p_new, s_new: constexpr, t, o, m, at, SIZE):
    """Numbers o of token t: from the log before token `at`, then new; 0 before token 0."""
    t += 0 * o
    b_old = read(p_log + (t & (SIZE - 1)) * s_log + o, m & (t >= 0) & (t < at))
    return b_old + read(p_new + (t - at) * s_new + o, m & (t >= at))


@jit
def replay_keep(p_log, s_log: constexpr, p_new, s_new: constexpr, t, o, m, at, SIZE):
    """Writes token t, if it is new, into the log. All programs that do so write the same."""
    m = m & (t + 0 * o >= at)
    b_new = tl.load(p_new + (t - at) * s_new + o, mask=m)
    tl.store(p_log + (t & (SIZE - 1)) * s_log + o, b_new, mask=m)


@jit
def replay_conv(
    p_log, s_log: constexpr, p_x, s_x: constexpr, t, o, m, at, SIZE, p_w, p_bias, o_c, W: constexpr,
):  # fmt: skip
    """silu(bias + Σ_k weight_k x_{t-W+1+k}) of channels o_c, which read channels o of x."""
    b_y = read(p_bias + o_c, m)
    for k in tl.static_range(W):
        b_x = replay_read(p_log, s_log, p_x, s_x, t - (W - 1) + k, o, m, at, SIZE)
        b_y += read(p_w + o_c * W + k, m) * b_x
    replay_keep(p_log, s_log, p_x, s_x, t, o, m, at, SIZE)
    return silu(b_y)


# One head of one row: from the state before token `base` through the logged tokens to token `at`
# and on through the l new ones: convolution, recurrence and, for new tokens, the output, its gate
# and its norm. The state is stored where it is to stand, before token `to`; what is new goes into
# the log. In Mamba-2 (p_B is None) B and C lie after x and pass the convolution too. A state is a
# tile (p, n / NB, NB), whose sums over n take few steps.
@jit(do_not_specialize=["l", "SIZE", "eps"])
def replay_kernel(
    p_x, s_x: constexpr, p_dt, s_dt: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr,
    p_z, s_z: constexpr, l_x, s_lx: constexpr, l_dt, s_ldt: constexpr, l_B, s_lB: constexpr,
    p_h, p_at, p_base, p_to, p_w, p_wbias, p_A, p_bias, p_D, p_norm, p_y, l, SIZE, eps,
    h: constexpr, group: constexpr, p: constexpr, n: constexpr, W: constexpr,
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
    o_x = i_h // group * p + o_p
    o_B = i_h // group * n + o_n
    o_C = i_h * n + o_n
    if p_B is None:
        o_d = i_h + 0 * o_p  # Δ, A and D of the head
        o_w = o_x
        b_A = tl.load(p_A + i_h)
        o_B += h // group * p
        o_C += h // group * (p + n)
    else:
        o_d = i_h * p + o_p  # of every channel
        o_w = o_d
        b_A = tl.load(p_A + o_d * n + o_n, mask=m_p & m_n, other=0.0)
        p_B += i_b * l * s_B
        l_B += i_b * SIZE * s_lB
        p_C += i_b * l * s_C
    b_A = -tl.exp(b_A.to(tl.float32)) * LOG2E
    b_D = read(p_D + o_d, m_p)
    b_bias = read(p_bias + o_d, m_p)
    p_x += i_b * l * s_x
    l_x += i_b * SIZE * s_lx
    p_dt += i_b * l * s_dt
    l_dt += i_b * SIZE * s_ldt
    p_h += (i_b * h + i_h) * (p * n) + o_p * n + o_n
    b_h = tl.load(p_h, mask=m_p & m_n, other=0.0)
    for t in range(base, at + l):
        xs = l_x, s_lx, p_x, s_x, t
        b_x = replay_conv(*xs, o_x, m_p, at, SIZE, p_w, p_wbias, o_w, W)
        b_dt = replay_read(l_dt, s_ldt, p_dt, s_dt, t, o_d, m_p, at, SIZE)
        replay_keep(l_dt, s_ldt, p_dt, s_dt, t, o_d, m_p, at, SIZE)
        m_new = m_n & (t + 0 * o_n >= at)
        if p_B is None:
            b_B = replay_conv(*xs, o_B, m_n, at, SIZE, p_w, p_wbias, o_B, W)
            b_C = replay_conv(*xs, o_C, m_new, at, SIZE, p_w, p_wbias, o_C, W)
        else:
            b_B = replay_read(l_B, s_lB, p_B, s_B, t, o_B, m_n, at, SIZE)
            replay_keep(l_B, s_lB, p_B, s_B, t, o_B, m_n, at, SIZE)
            b_C = read(p_C + (t - at) * s_C + o_C, m_new)
        b_delta = softplus(b_dt + b_bias)
        b_h = tl.exp2(b_delta * b_A) * b_h + b_delta * b_x * b_B
        if t + 1 == to:
            tl.store(p_h, b_h, mask=m_p & m_n)
        if t >= at:
            i_t = i_b * l + t - at
            b_y = tl.sum(tl.sum(b_h * b_C, axis=1, keep_dims=True), axis=2, keep_dims=True)
            b_y = (b_y + b_D * b_x) * silu(read(p_z + i_t * s_z + i_h * p + o_p, m_p))
            if p_norm is not None:
                b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=0, keep_dims=True) / p + eps)
                b_y *= read(p_norm + i_h * p + o_p, m_p)
            tl.store(p_y + (i_t * h + i_h) * p + o_p, b_y, mask=m_p)


def replay(x, dt, B, C, z, log, state, places, weight, bias, A_log, dt_bias, D, norm=None, eps=0.0):
    """Convolution, scan, gate and norm of l ≤ FEW new tokens, after a replay of the logged ones.

    Section 4 of the paper, in one kernel. p, n ≤ 128. Returns y (b, l, h, p).

    Mamba: x (b, l, g, p), dt and z (b, l, h, p), B (b, l, g, n), C (b, l, h, n), A_log (h·p, n),
    dt_bias and D (h·p). Mamba-2: x (b, l, channels) is x, B and C together; dt (b, l, h); B and C
    None; z (b, l, h, p); A_log, dt_bias and D (h,); norm (h·p) the weight of the norm, eps its own.
    The convolution has weight (channels, 1, w) and bias. state (b, h, p, n). log: x, dt and B of
    earlier tokens (b, size, …), token t at t mod size, a power of 2 that holds the logged tokens,
    the new ones and w - 1 more. places: at, base and to (b,) of each row: the first new token, the
    one before which `state` is now, and the one before which it is to be afterwards.
    """
    (b, l), (h, p, n), size, BN = (
        x.shape[:2],
        state.shape[1:],
        log[0].shape[1],
        block(state.shape[3]),
    )
    g = x.shape[2] if B is not None else (len(weight) - h * n) // (p + n)
    sizes = dict(h=h, group=h // g, p=p, n=n, W=weight.shape[2], BP=block(p), BN=BN, NB=min(BN, 32))
    l_x, l_dt, *l_B = log
    inputs = strided(x, dt, B, C, z, l_x, l_dt, l_B[0] if l_B else None)
    layer, y = (weight, bias, A_log, dt_bias, D, norm), x.new_empty(b, l, h, p)
    warps = max(1, sizes["BP"] * BN // 2048)
    tensors = *inputs, state, *places, *layer, y
    launch(replay_kernel, (b * h,), *tensors, l, size, eps, **sizes, num_warps=warps)
    return y
