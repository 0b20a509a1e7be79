"""The recurrence under a Mamba layer: written once in plain PyTorch, then made fast.

    Δ_t = softplus(dt_t + dt_bias)                         the step size
    h_t = exp(Δ_t A) ∘ h_{t-1} + (Δ_t x_t) B_tᵀ            the state, a p × n matrix per head
    y_t = h_t C_t + D ∘ x_t,   then   y_t ∘ silu(z_t)      the output, its skip and its gate

Without Δ, A, D and z this is causal attention without the softmax, so each symbol has an attention
name (The Mamba in the Llama, arXiv 2408.15237, section 2):

    C  query  (b, l, h, n)      b  batch       h  query heads        n  state size per head
    B  key    (b, l, g, n)      l  length      g  key/value heads    p  channels per head
    x  value  (b, l, g, p)                     w  width of the convolution, 4

Query head i reads kv head i // (h/g), as in grouped-query attention. Kernels read x and B where
they lie; `group` is h/g. The shape of A tells the two kinds of decay apart:

    Mamba (S6)     dt (b, l, h, p)  A (h, p, n)  a step per channel, a decay per state element
    Mamba-2 (SSD)  dt (b, l, h)     A (h,)       one of each per head: a tile of tokens is a few
                                                 products of matrices

A row may hold several documents (packed sequences). pos (b, l) is the place of each token in its
document; where it is 0 the decay counts as 0, so nothing of the document before is left.

In this file
    ssm_reference, conv_reference    the definitions; the tests measure all else against them
    ssm_scan, causal_conv            the same, fast and differentiable: Triton on CUDA, else PyTorch
    rms_norm, linear, attend, replay a model's layers in a decoding step, if `few` says so

The recurrence is linear in h, so a sequence can be cut anywhere. Each piece computes the state that
it would end with from h = 0, then these are passed on from piece to piece, then each piece starts
from the right state. In PyTorch the pieces are computed side by side. In Triton, batch and heads
fill a GPU, so a scan's program walks a whole row, and only the rows of a small batch are cut.

The gradient is the same walk backwards in time. The adjoint G_t = ∂L/∂h_t obeys

    G_t = exp(Δ_{t+1} A) ∘ G_{t+1} + dy_t C_tᵀ

with dy the gradient before the gate, and the gradients are products of h, G and the inputs. The
backward pass walks forward once more, and keeps the states that it needs.

A kernel runs as a grid of programs; a constexpr is fixed when it is compiled. Names: p_x a pointer
to x, s_x the distance of two tokens there, b_ a block in registers, o_ offsets, m_ a mask, i_ an
index; T tokens together, a tile, BP and BN blocks of p and n. A state is a block (n, p).
"""

import os

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # Triton is for Linux only
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
    return t if t.shape[2] == h else t.repeat_interleave(h // t.shape[2], dim=2)


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

    On a GPU Mamba's decay is off by up to 1e-7 a token, which adds up over a long memory. An inf or
    NaN in an input of Mamba-2 can reach the 63 tokens before it, in its tile. p or n above 256
    take the PyTorch form. Raises ValueError, naming the argument, if shapes do not fit.
    """
    per, axes = ("h", "h") if A.dim() == 1 else ("h p", "h p n")  # of one token's Δ, and of A
    tokens = dict(x=(x, "b l g p"), B=(B, "b l k n"), C=(C, "b l h n"), dt=(dt, f"b l {per}"))
    heads = dict(A=(A, axes), D=(D, per), dt_bias=(dt_bias, per), h0=(h0, "b h p n"))
    check("ssm", {}, **tokens, **heads, z=(z, "b l h p"), pos=(pos, "b l"))
    if not use_triton(x) or x.shape[1] == 1 or max(x.shape[3], C.shape[3]) > 256:
        scan = ssm_reference if x.shape[1] == 1 else ssd_torch if A.dim() == 1 else s6_torch
        with torch.autocast(x.device.type, enabled=False):  # state and Δ A stay float32
            return scan(x, dt, A, B, C, D, z, dt_bias, h0, pos)
    if B.shape[2] != x.shape[2]:
        x, B = repeat_heads(x, C.shape[2]), repeat_heads(B, C.shape[2])
    if A.dim() == 3:
        pos = None if pos is None else pos.int().contiguous()
        return s6_scan(S6, segments(x, C), x, dt, A, B, C, D, z, dt_bias, h0, pos)
    y, state = ssd_scan(x, dt, A, B, C, D, dt_bias, h0, pos)  # its kernels have no gate
    return y if z is None else (y.float() * F.silu(z.float())).to(y.dtype), state


def step_size(dt, dt_bias):
    """Δ, in float32 or more."""
    f = torch.promote_types(dt.dtype, torch.float32)
    return F.softplus(dt.to(f) if dt_bias is None else dt + dt_bias.to(f))


def ssd_steps(dt, A, dt_bias, pos):
    """Δ and a = Δ A, the logarithm of the decay, of each token and head of Mamba-2."""
    delta = step_size(dt, dt_bias)
    least = -800.0 if delta.dtype == torch.float64 else -139.0  # 2^-200
    # Where less is left of a state than the type can hold, and where a document starts, a is cut
    # off: a running sum with more would blur its neighbours.
    a = (delta * A).clamp(min=least)
    return delta, a if pos is None else a.masked_fill((pos == 0)[..., None], least)


def in_tiles(t, T):
    """t (b, l, …) in tiles of T tokens (b, tiles, T, …), the last filled up with zeros."""
    return F.pad(t, (0, 0) * (t.dim() - 2) + (0, -t.shape[1] % T)).unflatten(1, (-1, T))


def ssd_tiled(x, delta, a, B, C, h0, D):
    """Mamba-2 by the kernels, which take Δ and s (b, h, tiles, T)."""
    T, a = ssd_sizes(x, C)[0]["T"], a.double() if x.dtype == torch.float32 else a
    delta, a = (in_tiles(t, T).permute(0, 3, 1, 2).contiguous() for t in (delta, a))
    return SSD(x, delta, a.cumsum(3), B, C, h0, D)


def ssd_scan(x, dt, A, B, C, D, dt_bias, h0, pos):
    """Mamba-2 with its rows in segments, if that pays."""
    delta, a = ssd_steps(dt, A, dt_bias, pos)
    inputs, c = dict(x=x, delta=delta, a=a, B=B, C=C), segments(x, C)
    if c == 1:
        return ssd_tiled(**inputs, h0=h0, D=D)
    decay = a.unflatten(1, (c, -1)).sum(2).exp()[..., None, None]  # (b, c, h, 1, 1)
    return scan_cut(ssd_tiled, inputs, h0, dict(D=D), decay)


def s6_scan(op, c, x, dt, A, B, C, D, z, dt_bias, h0, pos):
    """Mamba with its rows in c segments."""
    inputs, rest = dict(x=x, dt=dt, B=B, C=C, z=z, pos=pos), dict(A=A, D=D, dt_bias=dt_bias)
    if c == 1:
        return op(**inputs, h0=h0, **rest)
    steps = step_size(dt, dt_bias).unflatten(1, (c, -1)).sum(2)
    decay = torch.exp(steps[..., None] * A)  # (b, c, h, p, n)
    if pos is not None:
        starts = (pos == 0).unflatten(1, (c, -1)).any(2)
        decay = decay.masked_fill(starts[..., None, None, None], 0)
    return scan_cut(op, inputs, h0, rest, decay)


def scan_cut(op, inputs, h0, rest, decay):
    """op(**inputs, h0=h0, **rest), rows cut into segments of the given decay (b, c, h, …)."""
    b, c = decay.shape[:2]
    tokens = {
        k: t if t is None else t.unflatten(1, (c, -1)).flatten(0, 1) for k, t in inputs.items()
    }
    _, ends = op(**tokens, h0=None, **rest)  # the states that segments end with on their own
    h0 = torch.zeros_like(ends[:b]) if h0 is None else h0.to(ends)
    starts, _ = pass_states(ends.unflatten(0, (b, c)), decay, h0)
    y, state = op(**tokens, h0=starts.flatten(0, 1), **rest)
    return y.unflatten(0, (b, c)).flatten(1, 2), state[c - 1 :: c]


def segments(x, C):
    """Into how many segments to cut each row; 1 where it does not pay."""
    # 16,384 channels fill a large GPU. A cut scan does twice the work, with gradients more.
    (b, l, h, _), p, least = C.shape, x.shape[3], 8 if torch.is_grad_enabled() else 4
    most = min(16384 // max(1, b * h * p), l // 1024)
    return next((c for c in range(most, least - 1, -1) if l % c == 0), 1)


def causal_conv(x, weight, bias=None, state=None, lengths=None, pos=None):
    """`conv_reference`, fast and differentiable, which goes on from a state and returns the next.

    state (b, w - 1, g, p) holds the inputs before x, zeros if None. With lengths (b,) row i has
    only that many real tokens, padded on the right. Returns y and each row's last w - 1 real
    inputs. Raises ValueError, naming the argument, if shapes do not fit.
    """
    layer = dict(weight=(weight, "h p w"), bias=(bias, "h p"), state=(state, "b before g p"))
    sizes = dict(before=weight.shape[-1] - 1)
    check("causal_conv", sizes, x=(x, "b l g p"), **layer, pos=(pos, "b l"))
    (b, l, g, p), w = x.shape, weight.shape[2]
    past = x.new_zeros(b, w - 1, g, p) if state is None else state.to(x.dtype)
    full, skip = (x, 0) if state is None else (torch.cat([past, x], dim=1), w - 1)
    pos = None if pos is None else F.pad(pos, (skip, 0)).int().contiguous()
    conv = CONV if use_triton(x) else conv_reference
    y = conv(repeat_heads(full, len(weight)), weight, bias, pos)[:, skip:]
    if lengths is None:
        return y, torch.cat([past, x[:, max(0, l - w + 1) :]], dim=1)[:, min(l, w - 1) :]
    at = lengths[:, None] + torch.arange(w - 1, device=x.device)  # (b, w - 1)
    return y, torch.cat([past, x], dim=1).gather(1, at[..., None, None].expand(-1, -1, g, p))


def check(where, sizes, **tensors):
    """Raises ValueError for a tensor whose axes, such as "b l h p", are not of the same sizes."""
    given = [(name, t, axes.split()) for name, (t, axes) in tensors.items() if t is not None]
    for i, (name, t, axes) in enumerate(given):
        if t.dim() == len(axes):
            sizes = dict(zip(axes, t.shape, strict=True)) | sizes
        if list(t.shape) != [sizes.get(axis) for axis in axes]:
            want = ", ".join(f"{axis} = {sizes.get(axis, '…')}" for axis in axes)
            others = "".join(f"; {k} is {tuple(v.shape)}" for k, v, _ in given[:i])
            raise ValueError(f"{where}: {name} is {tuple(t.shape)}, expected ({want}){others}")
    if sizes["l"] < 1:
        raise ValueError(f"{where}: x has no tokens (l = 0), expected at least one")
    for g in sizes.keys() & {"g", "k"}:
        if sizes["h"] % sizes[g]:
            raise ValueError(f"{where}: {sizes[g]} kv heads must divide {sizes['h']} query heads")


# --------------------------------------------------------------------------------------------------
# The scan in PyTorch


def s6_torch(x, dt, A, B, C, D, z, dt_bias, h0, pos):
    """Mamba: the definition on √l segments side by side, so that every loop takes √l turns."""
    l = x.shape[1]
    c = round(l**0.5)
    pad = 0, 0, 0, 0, 0, -l % c
    x, B, C, z = (t if t is None else F.pad(t, pad) for t in (x, B, C, z))
    dt = F.pad(dt, pad, value=-torch.inf)  # where Δ = 0 the state does not change
    pos = pos if pos is None else F.pad(pos, pad[4:], value=1)
    y, state = s6_scan(ssm_reference, c, x, dt, A, B, C, D, z, dt_bias, h0, pos)
    return y[:, :l], state


def ssd_torch(x, dt, A, B, C, D, z, dt_bias, h0, pos, T=64):
    """Mamba-2. Inside a tile y = (decay ∘ C Bᵀ) (Δ x): attention weighted by the decay."""
    f, (b, l, h, n), p = torch.promote_types(x.dtype, torch.float32), C.shape, x.shape[3]
    h0 = x.new_zeros(b, h, p, n, dtype=f) if h0 is None else h0.to(f)
    delta, a = ssd_steps(dt.to(f), A.to(f), dt_bias, pos)
    tokens = repeat_heads(x, h).to(f), delta, a, repeat_heads(B, h).to(f), C.to(f)
    T = min(T, l)
    wide, delta, a, B, C = (in_tiles(t, T) for t in tokens)  # (b, c, T, …); past the end Δ is 0
    # float64: far into a tile |s| is large, and small differences between neighbours matter
    s = a.double().cumsum(2).transpose(2, 3)  # (b, c, h, T): log decay since the tile's start
    later = torch.ones(T, T, dtype=torch.bool, device=s.device).triu(1)
    between = (s[..., :, None] - s[..., None, :]).masked_fill(later, -torch.inf).to(f).exp()
    since = s.to(f).exp().transpose(2, 3)[..., None]  # (b, c, T, h, 1)
    after = (s[..., -1:] - s).to(f).exp().transpose(2, 3)[..., None]
    u = delta[..., None] * wide  # (b, c, T, h, p)
    ends = torch.einsum("bcthp,bcthn->bchpn", u * after, B)
    starts, last = pass_states(ends, since[:, :, -1, ..., None], h0)
    scores = torch.einsum("bcthn,bcshn->bchts", C, B)  # C Bᵀ
    y = torch.einsum("bchts,bcshp->bcthp", scores * between, u)
    y = y + torch.einsum("bcthn,bchpn->bcthp", C, starts) * since
    y = y if D is None else y + D[:, None].to(f) * wide
    y = y.flatten(1, 2)[:, :l]
    return (y if z is None else y * F.silu(z.to(f))).to(x.dtype), last


def pass_states(ends, decay, h0):
    """The states that pieces (b, c, …) start from, and the last, by `ends` and `decay` of each."""
    starts = []
    for i in range(ends.shape[1]):
        starts.append(h0)
        h0 = decay[:, i] * h0 + ends[:, i]
    return torch.stack(starts, dim=1), h0


# --------------------------------------------------------------------------------------------------
# Triton: what all kernels share. A tensor (b, l, …) comes with the distance of its tokens
# (`strided`). An optional tensor may be None.

LOG2E = constexpr(1.4426950408889634) if triton else None


@jit
def read(ptr, m):
    """Numbers in float32, 0 where the mask is False."""
    return tl.load(ptr, mask=m, other=0.0).to(tl.float32)


@jit
def read_if(ptr, o, m):
    """`read` of an optional tensor: 0 where ptr is None."""
    b = 0.0
    if ptr is not None:
        b = read(ptr + o, m)
    return b


@jit
def dot(a, b, acc=None):
    """a b + acc in float32; float32 is not rounded before it is multiplied."""
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def softplus(b):
    """log(1 + e^b) to 2e-7 of it: max(b, 0) + 2 artanh(v), v = u / (2 + u), u = e^-|b|."""
    b_u = tl.exp2(tl.abs(b) * -LOG2E)
    b_v = b_u / (2 + b_u)
    b_q = b_v * b_v
    b_series = 1 + b_q * (1 / 3 + b_q * (1 / 5 + b_q * (1 / 7 + b_q / 8.25)))  # about artanh(v) / v
    return tl.maximum(b, 0.0) + 2 * b_v * b_series


@jit
def silu(b):
    return b * tl.sigmoid(b)


@jit
def silu_slope(b):
    """The derivative of silu."""
    b_sig = tl.sigmoid(b)
    return b_sig * (1 + b * (1 - b_sig))


# --------------------------------------------------------------------------------------------------
# Mamba (S6). One program walks BP channels of one head of one row.

# Channels of a program; tokens of one associative scan; tokens from one saved state to the next.
S6_BLOCK, S6_TILE, S6_SAVE = 16, 8, 2


@jit
def s6_program(p_A, p_D, p_bias, p_h, h, p, n, BP, BN):
    """A program's row, head, channels, states and their masks, and A, D, the bias and a state."""
    i_b = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)[None, :]
    o_n = tl.arange(0, BN)[:, None]
    m_p = o_p < p
    m_n = o_n < n
    b_A = read(p_A + i_h * (p * n) + o_p * n + o_n, m_n & m_p) * LOG2E
    b_D = read_if(p_D, i_h * p + o_p, m_p)
    b_bias = read_if(p_bias, i_h * p + o_p, m_p)
    b_h = tl.zeros((BN, BP), tl.float32)
    b_h += read_if(p_h, (i_b * h + i_h) * (p * n) + o_p * n + o_n, m_n & m_p)
    return i_b, i_h, o_p, o_n, m_p, m_n, b_A, b_D, b_bias, b_h


@jit
def s6_tokens(
    p_dt, s_dt, p_x, s_x, p_B, s_B, p_C, s_C, p_z, s_z, p_dy, s_dy, p_pos, t, l, o_p, p, o_n, n, T
):
    """dt, x, B, C, dy, z and pos of the T tokens from t on. Outside the row Δ is 0."""
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
        b_z, b_pos = b_dy, 1  # if there are none
        if p_z is not None:
            b_z = tl.load(p_z + t * s_z + j * s_z, mask=m_p, other=0.0)
        if p_pos is not None:
            b_pos = tl.load(p_pos + t + j, mask=m, other=1)
        tokens = tokens + ((b_dt, b_x, b_B, b_C, b_dy, b_z, b_pos),)
    return tokens


@jit
def s6_join(a_1, u_1, a_2, u_2):
    """Two stretches of h ← a h + u, one after the other, as one."""
    return a_1 * a_2, a_2 * u_1 + u_2


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
        b_cut = tl.where(b_pos == 0, -1e30, 0.0)  # where a document starts
        b_decay = tl.exp2(b_delta[:, None, :] * b_A[None] + b_cut[:, :, None])  # (T, n, p)
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


#     dz = dy ∘ (Cᵀ h + D ∘ x) ∘ silu'(z),  from here on dy is dy ∘ silu(z)
#     G ← G + C dyᵀ,  dC = h dy,  dB = G (Δ x),  du = Bᵀ G,  dx = Δ ∘ du + D ∘ dy
#     da = G ∘ exp(Δ A) ∘ h_{t-1}                           of the exponent Δ A
#     dΔ = du ∘ x + Σ_n da ∘ A,  dA = Σ_t Δ da,  dD = Σ_t dy ∘ x,  ddt = dΔ ∘ softplus'
#     G ← exp(Δ A) ∘ G
#
# T = SAVE tokens at a time from the end, states again from S. dx, dB, dC are per query head,
# dB and dC also per block of channels; sums (b, h, p, n + 2): dA, dD, dbias = Σ_t ddt. Sums over p
# are products with ones: a sum across a warp takes more instructions.
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
    o_one = tl.arange(0, 16)[None, :]  # tl.dot needs 16 columns; one is stored
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
    inputs = p_dt, s_dt, p_x, s_x, p_B, s_B, p_C, s_C, p_z, s_z, p_dy, s_dy, p_pos
    t = 0 * i_b + tl.cdiv(l, T) * T  # int64
    ahead = s6_tokens(*inputs, t - T, l, o_p, p, o_n, n, T)
    for _ in range(tl.cdiv(l, T)):
        t -= T
        tokens = ahead  # loaded a turn before their use, to hide the memory's latency
        ahead = s6_tokens(*inputs, t - T, l, o_p, p, o_n, n, T)
        b_h = tl.load(p_S + t // T * (h * n * p), mask=m_n & m_p, other=0.0)
        states = ()
        for j in tl.static_range(T):
            b_dt, b_x, b_B, _, _, _, b_pos = tokens[j]
            b_delta = softplus(b_dt.to(tl.float32) + b_bias)
            b_decay = tl.exp2(b_delta * b_A + tl.where(b_pos == 0, -1e30, 0.0))
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
            o_BCt = o_BC + t * (h * n) + j * (h * n)
            tl.store(p_dB + o_BCt, b_dB, mask=m_nt & (o_one == 0))
            tl.store(p_dC + o_BCt, b_dC, mask=m_nt & (o_one == 0))
            b_dA += b_da * b_delta
            b_dD += b_dy * b_x
            b_dbias += b_ddt
    tl.store(p_dh0 + (i_b * h + i_h) * (p * n) + o_p * n + o_n, b_G, mask=m_n & m_p)
    p_sums += ((i_b * h + i_h) * p + o_p) * (n + 2)
    tl.store(p_sums + o_n, b_dA, mask=m_n & m_p)
    tl.store(p_sums + n, b_dD, mask=m_p)
    tl.store(p_sums + n + 1, b_dbias, mask=m_p)


# --------------------------------------------------------------------------------------------------
# Mamba-2 (SSD). A tile of T tokens is a few products of matrices. PyTorch gives the kernels Δ, 0
# past the end of a row, and s (b, h, tiles, T): s_t is the running sum of Δ A within the tile, s_T
# its last. e^(s_t - s_r), in the kernels a power of 2, is the decay from token r to token t:
#
#     y_t = Σ_{r≤t} e^(s_t - s_r) (C_t·B_r) Δ_r x_r  +  e^s_t h C_t  +  D x_t
#     h ← e^s_T h + Σ_r e^(s_T - s_r) Δ_r x_r B_rᵀ


@jit
def ssd_walk(p_h0, h, p, n, BP, BN):
    """A walk's row, head, channels, states, the offsets and mask of its state, and the state."""
    i_b = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    o_h = (i_b * h + i_h) * (p * n) + o_p[None, :] * n + o_n[:, None]
    m_h = (o_n < n)[:, None] & (o_p < p)[None, :]
    b_h = tl.zeros((BN, BP), tl.float32)
    b_h += read_if(p_h0, o_h, m_h)
    return i_b, i_h, o_p, o_n, o_h, m_h, b_h


@jit
def tile_steps(p_delta, p_s, i_tile, T):
    """Δ and, in log2, s and s_T of a tile."""
    o = i_tile.to(tl.int64) * T + tl.arange(0, T)
    b_end = tl.load(p_s + i_tile.to(tl.int64) * T + T - 1)
    return tl.load(p_delta + o), tl.load(p_s + o) * LOG2E, b_end * LOG2E


@jit
def exp2(b):
    """2^b in float32."""
    return tl.exp2(b.to(tl.float32))


@jit
def decay_between(b, m):
    """2^(b_j - b_i), i the rows and j the columns, in float32; 0 where m is False."""
    return exp2(tl.where(m, b[None, :] - b[:, None], -float("inf")))


@jit
def load(ptr, s_row, o_row, o_col, n_row, n_col, DOT):
    """A block in the type of the products, zero from row n_row and column n_col on."""
    m = (o_row < n_row)[:, None] & (o_col < n_col)[None, :]
    return tl.load(ptr + o_row[:, None] * s_row + o_col[None, :], mask=m, other=0.0).to(DOT)


# The formulas above, of BP channels of one head of one row.
@jit(do_not_specialize=["l"])
def ssd_forward_kernel(
    p_x, s_x: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr,
    p_delta, p_s, p_D, p_h0, p_y, p_h, l,
    h: constexpr, p: constexpr, n: constexpr, group: constexpr,
    DOT: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    i_b, i_h, o_p, o_n, o_h, m_h, b_h = ssd_walk(p_h0, h, p, n, BP, BN)
    o_t = tl.arange(0, T)
    p_x += i_h // group * p
    p_B += i_h // group * n
    p_C += i_h * n
    p_y += i_h * p
    b_D = read_if(p_D, i_h, i_h < h)
    for i_t in range(tl.cdiv(l, T)):
        left = l - i_t * T  # tokens from here on
        i_l = i_b * l + i_t * T  # the tile's first token, counted over all rows
        b_x = load(p_x + i_l * s_x, s_x, o_t, o_p, left, p, DOT)  # (T, p)
        b_B = tl.trans(load(p_B + i_l * s_B, s_B, o_t, o_n, left, n, DOT))  # (n, T)
        b_C = load(p_C + i_l * s_C, s_C, o_t, o_n, left, n, DOT)  # (T, n)
        b_delta, b_s, b_end = tile_steps(p_delta, p_s, tl.program_id(0) * tl.cdiv(l, T) + i_t, T)
        b_decay = decay_between(-b_s, o_t[:, None] >= o_t[None, :])
        b_scores = dot(b_C, b_B) * b_decay * b_delta[None, :]  # (t, r)
        b_y = dot(b_C, b_h.to(DOT)) * exp2(b_s)[:, None]
        b_y += dot(b_scores.to(DOT), b_x)
        b_y += b_D * b_x.to(tl.float32)
        m_y = (o_t < left)[:, None] & (o_p < p)[None, :]
        tl.store(p_y + i_l * (h * p) + o_t[:, None] * (h * p) + o_p[None, :], b_y, mask=m_y)
        b_u = (b_x.to(tl.float32) * (exp2(b_end - b_s) * b_delta)[:, None]).to(DOT)
        b_h = b_h * exp2(b_end) + dot(b_B, b_u)
    tl.store(p_h + o_h, b_h, mask=m_h)


#     h ← e^s_T h + Σ_r e^(s_T - s_r) Δ_r u_r v_rᵀ     with u = x and v = B
#     G ← e^s_T G + Σ_t e^s_t u_t v_tᵀ                 with u = dy and v = C, from the end back
# S (b, tiles, h, n, p) has the state at every tile's start or, of the ADJOINT, at every tile's end.
@jit(do_not_specialize=["l"])
def ssd_states_kernel(
    p_u, s_u: constexpr, p_v, s_v: constexpr, p_delta, p_s, p_first, p_S, p_last, l,
    h: constexpr, p: constexpr, n: constexpr, group: constexpr, ADJOINT: constexpr,
    DOT: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    i_b, i_h, o_p, o_n, o_h, m_h, b_h = ssd_walk(p_first, h, p, n, BP, BN)
    tiles = tl.cdiv(l, T)
    o_t = tl.arange(0, T)
    p_u += i_h // group * p
    p_v += i_h // group * n
    p_S += i_h * (n * p) + o_n[:, None] * p + o_p[None, :]
    for k in range(tiles):
        i_t = tiles - 1 - k if ADJOINT else k
        left = l - i_t * T
        i_l = i_b * l + i_t * T
        tl.store(p_S + (i_b * tiles + i_t) * (h * n * p), b_h, mask=m_h)
        b_u = load(p_u + i_l * s_u, s_u, o_t, o_p, left, p, DOT)
        b_v = tl.trans(load(p_v + i_l * s_v, s_v, o_t, o_n, left, n, DOT))
        b_delta, b_s, b_end = tile_steps(p_delta, p_s, tl.program_id(0) * tiles + i_t, T)
        b_w = exp2(b_s) if ADJOINT else exp2(b_end - b_s) * b_delta
        b_u = (b_u.to(tl.float32) * b_w[:, None]).to(DOT)
        b_h = b_h * exp2(b_end) + dot(b_v, b_u)
    tl.store(p_last + o_h, b_h, mask=m_h)


@jit
def products(p_u, s_u, p_v, s_v, o_t, left, width, DOT, BW):
    """u vᵀ of a tile of both: (T, T)."""
    b = tl.zeros((o_t.shape[0], o_t.shape[0]), tl.float32)
    for i in range(0, width, BW):
        o = i + tl.arange(0, BW)
        b_v = tl.trans(load(p_v, s_v, o_t, o, left, width, DOT))
        b = dot(load(p_u, s_u, o_t, o, left, width, DOT), b_v, b)
    return b


# The gradients of one tile of one head, from S, its first state, and G, the adjoint of its last, of
# later tiles alone. decay_tr = e^(s_t - s_r) for r ≤ t, else 0; right: each sum's factor, its axes.
#
#     dx_r = Δ_r (e^(s_T - s_r) G B_r + Σ_t decay_tr (C_t·B_r) dy_t) + D dy_r  b_BC (r, t)
#     dB_r = Δ_r (e^(s_T - s_r) Gᵀ x_r + Σ_t decay_tr (dy_t·x_r) C_t)          b_xy (r, t)
#     dC_t = e^s_t Sᵀ dy_t + Σ_r decay_tr Δ_r (dy_t·x_r) B_r                   b_yx (t, r)
#     P_tr = decay_tr (C_t·B_r) (dy_t·x_r),  give_r = e^(s_T - s_r) x_r·(G B_r)
#     dΔ_r = give_r + Σ_t P_tr,  dD = Σ_r x_r·dy_r                          b_pairs (r, t)
#     ds_t = Σ_{r<t} Δ_r P_tr + e^s_t C_t·(Sᵀ dy_t) - Δ_t (Σ_{r>t} P_rt + give_t)
#     ds_T += Σ_r Δ_r give_r + e^s_T <S, G>
#
# The last token's give is left out of both lines of ds, where it cancels: it would blur the rest.
# There are two products x·dy, as Triton 3.4 to 3.7 on Hopper miscompiles one and its transpose.
@jit(do_not_specialize=["l"])
def ssd_backward_kernel(
    p_x, s_x: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr, p_dy, s_dy: constexpr,
    p_delta, p_s, p_D, p_S, p_G, p_dx, p_ddelta, p_ds, p_dB, p_dC, p_dD, l,
    h: constexpr, p: constexpr, n: constexpr, group: constexpr,
    DOT: constexpr, T: constexpr, BP: constexpr, BN: constexpr,
):  # fmt: skip
    tiles = tl.cdiv(l, T)
    i_bt = tl.program_id(0).to(tl.int64) // h
    i_h = tl.program_id(0) % h
    i_0 = tl.program_id(0) // h % tiles * T
    i_l = i_bt // tiles * l + i_0  # the tile's first token, counted over all rows
    left = l - i_0  # tokens from here on
    o_t = tl.arange(0, T)
    p_x += i_l * s_x + i_h // group * p
    p_B += i_l * s_B + i_h // group * n
    p_C += i_l * s_C + i_h * n
    p_dy += i_l * s_dy + i_h * p
    p_S += (i_bt * h + i_h) * (n * p)
    p_G += (i_bt * h + i_h) * (n * p)
    i_tile = (i_bt // tiles * h + i_h) * tiles + i_bt % tiles
    b_delta, b_s, b_end = tile_steps(p_delta, p_s, i_tile, T)
    b_after = exp2(b_end - b_s)[:, None]
    b_BC = products(p_B, s_B, p_C, s_C, o_t, left, n, DOT, BN)
    b_BC *= decay_between(b_s, o_t[:, None] <= o_t[None, :])
    for i_p in range(0, p, BP):
        o_p = i_p + tl.arange(0, BP)
        b_dy = load(p_dy, s_dy, o_t, o_p, left, p, DOT)
        b_dx = tl.zeros((T, BP), tl.float32)
        for i_n in range(0, n, BN):
            o_n = i_n + tl.arange(0, BN)
            b_G = load(p_G, p, o_n, o_p, n, p, DOT)
            b_B = load(p_B, s_B, o_t, o_n, left, n, DOT)
            b_dx = dot(b_B, b_G, b_dx)
        b_dx = dot(b_BC.to(DOT), b_dy, b_dx * b_after) * b_delta[:, None]
        b_dx += read_if(p_D, i_h, i_h < h) * b_dy.to(tl.float32)
        m_x = (o_t < left)[:, None] & (o_p < p)[None, :]
        tl.store(p_dx + ((i_l + o_t[:, None]) * h + i_h) * p + o_p[None, :], b_dx, mask=m_x)
    b_xy = products(p_x, s_x, p_dy, s_dy, o_t, left, p, DOT, BP)
    b_yx = products(p_dy, s_dy, p_x, s_x, o_t, left, p, DOT, BP)
    tl.store(p_dD + i_bt * h + i_h, tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_xy, 0.0)))
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
        b_C = load(p_C, s_C, o_t, o_n, left, n, DOT)
        b_B = load(p_B, s_B, o_t, o_n, left, n, DOT)
        b_dC = tl.zeros((T, BN), tl.float32)
        b_dB = tl.zeros((T, BN), tl.float32)
        for i_p in range(0, p, BP):
            o_p = i_p + tl.arange(0, BP)
            b_S = load(p_S, p, o_n, o_p, n, p, DOT)
            b_G = load(p_G, p, o_n, o_p, n, p, DOT)
            b_x = load(p_x, s_x, o_t, o_p, left, p, DOT)
            b_dy = load(p_dy, s_dy, o_t, o_p, left, p, DOT)
            b_dB = dot(b_x, tl.trans(b_G), b_dB)
            b_dC = dot(b_dy, tl.trans(b_S), b_dC)
            b_hold += tl.sum(b_S.to(tl.float32) * b_G.to(tl.float32))
        b_dB *= b_after
        b_dC *= exp2(b_s)[:, None]
        b_give += tl.sum(b_dB * b_B.to(tl.float32), axis=1)
        b_ds += tl.sum(b_dC * b_C.to(tl.float32), axis=1)
        b_dB = dot(b_xy, b_C, b_dB * b_delta[:, None])
        b_dC = dot(b_yx, b_B, b_dC)
        o_tn = ((i_l + o_t[:, None]) * h + i_h) * n + o_n[None, :]
        m_tn = (o_t < left)[:, None] & (o_n < n)[None, :]
        tl.store(p_dB + o_tn, b_dB, mask=m_tn)
        tl.store(p_dC + o_tn, b_dC, mask=m_tn)
    tl.store(p_ddelta + i_tile * T + o_t, b_ddelta + b_give)
    b_give = tl.where(o_t + 1 < tl.minimum(T, left), b_give * b_delta, 0.0)
    b_dend = tl.sum(b_give) + exp2(b_end) * b_hold
    tl.store(p_ds + i_tile * T + o_t, b_ds - b_give + tl.where(o_t == T - 1, b_dend, 0.0))


# --------------------------------------------------------------------------------------------------
# The convolution. A program walks BC channels through T tokens, U at a time to have as many reads
# under way, with the last W inputs in registers.

CONV_TOKENS, CONV_CHANNELS = 128, 128


@jit
def conv_tokens(ptr, step, i_l, t, l, o_c, c, U):
    """Tokens t to t + U - 1 of the row that starts at i_l; zeros outside the row."""
    tokens = ()
    for j in tl.static_range(U):
        m = o_c < tl.where((t + j >= 0) & (t + j < l), c, 0)
        tokens = tokens + (tl.load(ptr + (i_l + t + j) * step + o_c, mask=m, other=0.0),)
    return tokens


@jit
def conv_start(p_x, s_x, p_w, p_bias, l, c, W, T, BC):
    """A row's first token, a program's and how many, channels, the inputs before, weights, bias."""
    i_l = tl.program_id(2).to(tl.int64) * l
    t_0 = 0 * i_l + tl.program_id(1) * T  # int64
    own = tl.minimum(T, l - tl.program_id(1) * T)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    ws = ()
    for k in tl.static_range(W):
        ws = ws + (read(p_w + o_c * W + k, o_c < c),)
    xs = conv_tokens(p_x, s_x, i_l, t_0 - (W - 1), l, o_c, c, W - 1)
    return i_l, t_0, own, o_c, xs, ws, read_if(p_bias, o_c, o_c < c)


@jit
def sees(p_pos, i_l, t, l, lag):
    """Whether what lies `lag` tokens before token t of the row is of t's document."""
    pos = lag  # always
    if p_pos is not None:
        pos = tl.load(p_pos + i_l + t, mask=(t >= 0) & (t < l), other=0)
    return pos >= lag


@jit
def conv_sum(xs, ws, b_bias, p_pos, i_l, t, l, W):
    """e_t = bias + Σ_k weight_k x_{t-W+1+k}, and the W taps of x."""
    b_e = b_bias
    taps = ()
    for k in tl.static_range(W):
        b_x = xs[k].to(tl.float32)
        taps = taps + (tl.where(sees(p_pos, i_l, t, l, W - 1 - k), b_x, 0.0),)
        b_e += ws[k] * taps[k]
    return b_e, taps


# y_t = silu(e_t)
@jit(do_not_specialize=["l"])
def conv_forward_kernel(
    p_x, s_x: constexpr, p_w, p_bias, p_pos, p_y, l,
    c: constexpr, W: constexpr, T: constexpr, U: constexpr, BC: constexpr,
):  # fmt: skip
    i_l, t_0, own, o_c, xs, ws, b_bias = conv_start(p_x, s_x, p_w, p_bias, l, c, W, T, BC)
    for i in range(0, own, U):
        xs = xs + conv_tokens(p_x, s_x, i_l, t_0 + i, l, o_c, c, U)
        for j in tl.static_range(U):
            t = t_0 + i + j
            b_e, _ = conv_sum(xs, ws, b_bias, p_pos, i_l, t, l, W)
            tl.store(p_y + (i_l + t) * c + o_c, silu(b_e), mask=o_c < tl.where(i + j < own, c, 0))
            xs = xs[1:]


# de_t = dy_t silu'(e_t),    dx_t = Σ_k weight_k de_{t+W-1-k}
# dweight_k = Σ_t de_t x_{t-W+1+k},    dbias = Σ_t de_t
# dx follows W - 1 tokens behind de, so the walk goes on for as many. sums (·, W + 1, c) has each
# program's part of dweight and, last, of dbias.
@jit(do_not_specialize=["l"])
def conv_backward_kernel(
    p_x, s_x: constexpr, p_w, p_bias, p_pos, p_dy, p_dx, p_sums, l,
    c: constexpr, W: constexpr, T: constexpr, U: constexpr, BC: constexpr,
):  # fmt: skip
    i_l, t_0, own, o_c, xs, ws, b_bias = conv_start(p_x, s_x, p_w, p_bias, l, c, W, T, BC)
    sums = (tl.zeros((BC,), tl.float32),) * (W + 1)
    des = (tl.zeros((BC,), tl.float32),) * (W - 1)
    for i in range(0, own + W - 1, U):
        xs = xs + conv_tokens(p_x, s_x, i_l, t_0 + i, l, o_c, c, U)
        dys = conv_tokens(p_dy, c, i_l, t_0 + i, l, o_c, c, U)
        for j in tl.static_range(U):
            t = t_0 + i + j
            b_e, taps = conv_sum(xs, ws, b_bias, p_pos, i_l, t, l, W)
            b_de = dys[j].to(tl.float32) * silu_slope(b_e)
            des = des + (b_de,)
            b_de = tl.where(i + j < own, b_de, 0.0)
            more = ()
            for k in tl.static_range(W):
                more = more + (sums[k] + b_de * taps[k],)
            sums = more + (sums[W] + b_de,)
            t -= W - 1
            b_dx = tl.zeros((BC,), tl.float32)
            for lag in tl.static_range(W):
                b_dx += ws[W - 1 - lag] * tl.where(sees(p_pos, i_l, t + lag, l, lag), des[lag], 0.0)
            m = (i + j >= W - 1) & (i + j - (W - 1) < own)
            tl.store(p_dx + (i_l + t) * c + o_c, b_dx, mask=o_c < tl.where(m, c, 0))
            xs = xs[1:]
            des = des[1:]
    i_part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    for k in tl.static_range(W + 1):
        tl.store(p_sums + (i_part * (W + 1) + k) * c + o_c, sums[k], mask=o_c < c)


# --------------------------------------------------------------------------------------------------
# Launches, and the operators that torch.compile takes as one node each. pos is int32, contiguous.
# -(-a // b) is a / b rounded up; triton.cdiv takes longer.


def strided(*tensors):
    """Each tensor (b, l, …) with all its tokens at one distance, and the distance; None and 0."""
    both = []
    for t in tensors:
        if t is not None:
            one = min(t.shape[:2]) == 1 or t.stride(0) == t.shape[1] * t.stride(1)
            t = t if one and t.stride()[2:] in ((1,), (t.shape[-1], 1)) else t.contiguous()
        both += [t, 0 if t is None else t.stride(1 if t.shape[1] > 1 else 0)]
    return both


def launch(kernel, grid, *args, **sizes):
    """kernel[grid](...) on the device of args[0]; nothing where torch.compile asks for shapes."""
    if not isinstance(args[0], FakeTensor):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **sizes)


def flat(t):
    """An optional tensor, contiguous."""
    return None if t is None else t.contiguous()


def block(n):
    """The size of a block that holds n numbers: a power of 2, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def s6_sizes(x, C):
    """The grid and the constants of Mamba's kernels."""
    (b, _, h, n), p = C.shape, x.shape[3]
    BN, BP = block(n), S6_BLOCK
    sizes = dict(h=h, p=p, n=n, group=h // x.shape[2], BP=BP, BN=BN)
    return (b * h, -(-p // BP)), dict(sizes, num_warps=max(1, BN * BP // 256))


def s6_forward(x, dt, B, C, z, pos, h0, A, D, dt_bias, save=False):
    """Mamba: y, the last state and, if asked, the states before every S6_SAVE-th token."""
    (b, l, h, n), p = C.shape, x.shape[3]
    grid, sizes = s6_sizes(x, C)
    y, last = x.new_empty(b, l, h, p), x.new_empty(b, h, p, n, dtype=torch.float32)
    S = last.new_empty(b, -(-l // S6_SAVE), h, n, p) if save else None
    tensors = *strided(x, dt, B, C, z), *map(flat, (A, D, dt_bias, h0)), pos, y, last, S
    launch(s6_forward_kernel, grid, *tensors, l, SAVE=S6_SAVE, T=S6_TILE, **sizes)
    return (y, last, S) if save else (y, last)


def s6_backward(dy, dh, x, dt, B, C, z, pos, h0, A, D, dt_bias):
    """Gradients, of x and B per query head, of A, D and dt_bias side by side in `sums`."""
    (b, l, h, n), p = C.shape, x.shape[3]
    *_, S = s6_forward(x, dt, B, C, z, pos, h0, A, D, dt_bias, save=True)
    grid, sizes = s6_sizes(x, C)
    dx, ddt, dz = x.new_empty(b, l, h, p), dt.new_empty(b, l, h, p), x.new_empty(b, l, h, p)
    dB, dC = B.new_empty(grid[1], b, l, h, n), C.new_empty(grid[1], b, l, h, n)
    dh0, sums = S.new_empty(b, h, p, n), S.new_empty(b, h, p, n + 2)
    tensors = *strided(x, dt, B, C, z, dy), *map(flat, (A, D, dt_bias, dh)), pos, S
    results = dx, ddt, dB, dC, dz, dh0, sums
    sizes["PREC"] = "ieee" if x.dtype == torch.float32 else "tf32"
    launch(s6_backward_kernel, grid, *tensors, *results, l, T=S6_SAVE, **sizes)
    dB, dC = (t[0] if len(t) == 1 else t.sum(0) for t in (dB, dC))
    return dx, ddt, dB, dC, dz, dh0, sums


def ssd_sizes(x, C):
    """The constants of Mamba-2's kernels, and those of its walks, which hold a state of all n."""
    bf16 = x.dtype == torch.bfloat16 and not INTERPRET  # which the interpreter lacks
    T, DOT = (64, tl.bfloat16) if bf16 else (32, tl.float32)
    sizes = dict(h=C.shape[2], p=x.shape[3], n=C.shape[3], DOT=DOT, T=T, BP=T)
    return dict(sizes, BN=T), dict(sizes, BN=block(C.shape[3]), num_stages=2)


def ssd_forward(x, delta, s, B, C, h0, D):
    """Mamba-2: y and the last state."""
    (b, l, h, n), p, (_, walk) = C.shape, x.shape[3], ssd_sizes(x, C)
    y, last = x.new_empty(b, l, h, p), delta.new_empty(b, h, p, n)
    tensors = *strided(x, B, C), delta.contiguous(), s.contiguous(), flat(D), flat(h0), y, last
    grid = b * h, -(-p // walk["BP"])
    launch(ssd_forward_kernel, grid, *tensors, l, group=h // x.shape[2], **walk)
    return y, last


def ssd_backward(dy, dh, x, delta, s, B, C, h0, D):
    """The gradients of x and B per query head, of Δ, s, C and h0; and of D per tile."""
    (b, l, h, n), p, (sizes, walk) = C.shape, x.shape[3], ssd_sizes(x, C)
    tiles, group = s.shape[2], h // x.shape[2]
    kind = torch.bfloat16 if sizes["DOT"] == tl.bfloat16 else torch.float32
    S, G = (delta.new_empty(b, tiles, h, n, p, dtype=kind) for _ in range(2))
    last, dh0 = (delta.new_empty(b, h, p, n) for _ in range(2))
    grid, steps = (b * h, -(-p // walk["BP"])), (delta.contiguous(), s.contiguous())
    inputs = strided(x, B, C, dy)
    states = *inputs[:4], *steps, flat(h0), S, last
    launch(ssd_states_kernel, grid, *states, l, group=group, ADJOINT=False, **walk)
    adjoints = *inputs[6:], *inputs[4:6], *steps, flat(dh), G, dh0
    launch(ssd_states_kernel, grid, *adjoints, l, group=1, ADJOINT=True, **walk)
    dx, ddelta, ds = x.new_empty(b, l, h, p), *map(torch.empty_like, steps)
    dB, dC, dD = B.new_empty(C.shape), C.new_empty(C.shape), delta.new_empty(b * tiles, h)
    tensors = *inputs, *steps, flat(D), S, G, dx, ddelta, ds, dB, dC, dD
    launch(ssd_backward_kernel, (b * tiles * h,), *tensors, l, group=group, **sizes)
    return dx, ddelta, ds, dB, dC, dh0, dD


def conv_sizes(x, weight, T=CONV_TOKENS):
    """The grid and the constants of the convolution's kernels."""
    (b, l, h, p), BC = x.shape, min(CONV_CHANNELS, block(x.shape[2] * x.shape[3]))
    grid = -(-(h * p) // BC), -(-l // T), b
    return grid, dict(c=h * p, W=weight.shape[2], T=T, U=8, BC=BC, num_warps=1)


def conv_forward(x, weight, bias, pos):
    y, (grid, sizes) = x.new_empty(x.shape), conv_sizes(x, weight)
    tensors = *strided(x), flat(weight), flat(bias), pos, y
    launch(conv_forward_kernel, grid, *tensors, x.shape[1], **sizes)
    return y


def conv_backward(dy, x, weight, bias, pos):
    """The gradient of x and, in parts (·, w + 1, h, p), of each tap's weights and of the bias."""
    (h, p, w), dx = weight.shape, x.new_empty(x.shape)
    grid, sizes = conv_sizes(x, weight, CONV_TOKENS - w + 1)
    sums = x.new_empty(grid[1] * grid[2], w + 1, h, p, dtype=torch.float32)
    tensors = *strided(x), flat(weight), flat(bias), pos, dy.contiguous(), dx, sums
    launch(conv_backward_kernel, grid, *tensors, x.shape[1], **sizes)
    return dx, sums


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
    dx, ddelta, ds, dB, dC, dh0, dD = SSD_BACKWARD(dy, dh, *inputs)
    return over_group(dx, x), ddelta, ds, over_group(dB, B), dC, *like((dh0, dD.sum(0)), (h0, D))


def conv_gradient(ctx, dy):
    x, weight, bias, pos = ctx.saved_tensors
    dx, sums = CONV_BACKWARD(dy, x, weight, bias, pos)
    sums = sums.sum(0)
    return dx, *like((sums[:-1].permute(1, 2, 0), sums[-1]), (weight, bias)), None


def operator(name, f, arguments, results, gradient=None):
    """`f` as PyTorch's operator mil::name, which also tells the shapes of its results."""
    kinds = ["Tensor? " + a[:-1] if a[-1] == "?" else "Tensor " + a for a in arguments.split()]
    schema = f"({', '.join(kinds)}) -> ({', '.join(['Tensor'] * results)})"
    torch.library.define("mil::" + name, schema)  # custom_op takes 20 us more a call
    torch.library.impl("mil::" + name, "default", f)
    torch.library.register_fake("mil::" + name, f)
    if gradient:
        torch.library.register_autograd(
            "mil::" + name,
            once_differentiable(gradient),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        )
    return getattr(torch.ops.mil, name)


S6_INPUTS, SSD_INPUTS = "x dt B C z? pos? h0? A D? dt_bias?", "x delta s B C h0? D?"
CONV_INPUTS = "x weight bias? pos?"
S6 = operator("s6", s6_forward, S6_INPUTS, 2, s6_gradient)
SSD = operator("ssd", ssd_forward, SSD_INPUTS, 2, ssd_gradient)
CONV = operator("conv", conv_forward, CONV_INPUTS, 1, conv_gradient)
S6_BACKWARD = operator("s6_backward", s6_backward, "dy dh " + S6_INPUTS, 7)
SSD_BACKWARD = operator("ssd_backward", ssd_backward, "dy dh " + SSD_INPUTS, 7)
CONV_BACKWARD = operator("conv_backward", conv_backward, "dy " + CONV_INPUTS, 2)


# --------------------------------------------------------------------------------------------------
# Decoding: l ≤ FEW new tokens a row, which follow what a cache holds. A step is bound by memory, so
# weights and cached values are read at full rate. And speculative decoding is exact only if a row's
# bits do not depend on how many tokens come at once, so each row has the same products in the same
# order. (Another batch may cut attention's keys differently.)

FEW = 16  # the most tokens a row
MANY = 64  # rows of a batch above which PyTorch's product is faster; its bits vary with the rows
LINEAR = {"BN": 32, "BK": 256}, {"BN": 64, "BK": 128}  # without and with a gate; for an H200
SPLITS = (128, 512)  # keys in a piece: for fewer than 64 kv heads of all rows, and for more


def few(x, l, *weights):
    """Whether l tokens a row go to the kernels of decoding; nothing is differentiated there."""
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
    return l <= FEW and plain and use_triton(x) and all(w.dtype == x.dtype for w in weights)


# y = x / √(mean of x² + eps) ∘ weight, a row of k numbers for each program
@jit
def norm_kernel(p_x, p_w, p_y, eps, k: constexpr, BK: constexpr):
    o = tl.arange(0, BK)
    o_x = tl.program_id(0).to(tl.int64) * k + o
    b_x = read(p_x + o_x, o < k)
    b_w = read(p_w + o, o < k)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / k + eps) * b_w
    tl.store(p_y + o_x, b_y, mask=o < k)


# y = x Wᵀ; with a gate V, y = silu(x Vᵀ) ∘ x Wᵀ. x (rows, k), W and V (n, k). A program makes BN
# columns for M ≤ 64 rows (tokens).
@jit(do_not_specialize=["rows"])
def linear_kernel(
    p_x, s_x: constexpr, p_w, p_gate, p_y, rows, n: constexpr, k: constexpr,
    M: constexpr, BN: constexpr, BK: constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * M + tl.arange(0, M)[None, :]).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    o_k = tl.arange(0, BK)
    o_w = o_n.to(tl.int64) * k + o_k[None, :]
    b_y = tl.zeros((BN, M), tl.float32)
    b_gate = tl.zeros((BN, M), tl.float32)
    for i_k in range(0, k, BK):
        m_x = (o_m < rows) & (i_k + o_k < k)[:, None]
        m_w = (o_n < n) & (i_k + o_k < k)[None, :]
        b_x = tl.load(p_x + o_m * s_x + (i_k + o_k)[:, None], mask=m_x, other=0.0)
        b_w = tl.load(p_w + o_w + i_k, mask=m_w, other=0.0)
        b_y = dot(b_w, b_x, b_y)
        if p_gate is not None:
            b_w = tl.load(p_gate + o_w + i_k, mask=m_w, other=0.0)
            b_gate = dot(b_w, b_x, b_gate)
    m_y = (o_m < rows) & (o_n < n)
    if p_gate is not None:
        b_y *= silu(b_gate)
    tl.store(p_y + o_m * n + o_n, b_y, mask=m_y)


def in_flight(x, most, size):
    """How many stages of `size` bytes fit into shared memory, up to `most`."""
    if not x.is_cuda:
        return most
    room = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return max(1, min(most, room // size))


def rms_norm(x, weight, eps):
    """RMSNorm in x's type. PyTorch's takes three times as long for a few rows."""
    x, weight, y, k = x.contiguous(), weight.contiguous(), torch.empty_like(x), x.shape[-1]
    launch(norm_kernel, (x.numel() // k,), x, weight, y, eps, k=k, BK=block(k), num_warps=8)
    return y


def linear(x, weight, gate=None):
    """x Wᵀ of x (b, l, k), W (n, k); with a gate V, silu(x Vᵀ) ∘ x Wᵀ."""
    (b, l, k), n = x.shape, weight.shape[0]
    if b > MANY:
        y = F.linear(x, weight)
        return y if gate is None else F.silu(F.linear(x, gate)) * y
    x = (x if x.stride(2) == 1 else x.contiguous()).reshape(b * l, k)
    M = 16 if b * l <= 16 else 32 if b * l <= 32 else 64
    gated = gate is not None
    sizes = dict(LINEAR[gated], n=n, k=k, M=M)
    stage = (sizes["BN"] * (1 + gated) + M) * sizes["BK"] * x.element_size()
    sizes["num_stages"] = in_flight(x, 4, stage)
    tensors = [None if t is None else t.contiguous() for t in (weight, gate)]
    y, grid = x.new_empty(b, l, n), (-(-(b * l) // M), -(-n // sizes["BN"]))
    launch(linear_kernel, grid, x, x.stride(0), *tensors, y, b * l, **sizes)
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
def rotated(ptr, o, m, p_cos, p_sin, o_angle, half):
    """The halves of a key or query at ptr + o, turned by RoPE, in their own type."""
    b_1 = read(ptr + o, m)
    b_2 = read(ptr + o + half, m)
    b_cos = read(p_cos + o_angle, m)
    b_sin = read(p_sin + o_angle, m)
    kind = ptr.dtype.element_ty
    return (b_1 * b_cos - b_2 * b_sin).to(kind), (b_2 * b_cos + b_1 * b_sin).to(kind)


# Writes the l new keys, rotated, and values of one row and kv head into the cache, where they lie
# in a piece of SPLIT keys. Every program that reads the piece does so, and waits for no other.
@jit
def append(p_k, s_k, p_v, s_v, p_cos, p_sin, p_keys, p_values, i_l, at, first, l, p, SPLIT, BH):
    half = p // 2
    o_i = tl.arange(0, 16)[:, None]
    o_h = tl.arange(0, BH)[None, :]
    o_p = tl.arange(0, 2 * BH)[None, :]
    m_i = (o_i < l) & (at + o_i >= first) & (at + o_i < first + SPLIT)
    m_h = m_i & (o_h < half)
    o_bt = i_l + o_i
    b_1, b_2 = rotated(p_k, o_bt * s_k + o_h, m_h, p_cos, p_sin, o_bt * half + o_h, half)
    tl.store(p_keys + (at + o_i) * p + o_h, b_1, mask=m_h)
    tl.store(p_keys + (at + o_i) * p + half + o_h, b_2, mask=m_h)
    b_v = tl.load(p_v + o_bt * s_v + o_p, mask=m_i & (o_p < p))
    tl.store(p_values + (at + o_i) * p + o_p, b_v, mask=m_i & (o_p < p))
    tl.debug_barrier()  # this program reads them next


# For the keys j ≤ t of one piece and 16 queries, R ≥ h/g heads of 16 / R tokens t:
#     s_j = q·k_j / √p in log2,    y = Σ_j 2^s_j v_j / Σ_j 2^s_j,    weight = log2 Σ_j 2^s_j
@jit(do_not_specialize=["l", "size"])
def attend_kernel(
    p_q, s_q: constexpr, p_k, s_k: constexpr, p_v, s_v: constexpr, p_cos, p_sin, p_at,
    p_keys, p_values, p_weight, p_y, scale, l, size, g: constexpr, group: constexpr, p: constexpr,
    R: constexpr, SPLIT: constexpr, BK: constexpr, BH: constexpr,
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
        p_keys += i_bg.to(tl.int64) * size * p
        p_values += i_bg.to(tl.int64) * size * p
        if at < first + SPLIT:
            new = p_k + i_g * p, s_k, p_v + i_g * p, s_v, p_cos, p_sin, p_keys, p_values
            append(*new, i_b * l, at, first, l, p, SPLIT, BH)
        o_h = tl.arange(0, BH)
        o_p = tl.arange(0, 2 * BH)
        o_t = tl.program_id(0) % tiles * (16 // R) + tl.arange(0, 16) // R
        o_r = tl.arange(0, 16) % R
        o_bt = i_b * l + o_t
        m_q = (o_t < l) & (o_r < group)
        m_h = m_q[:, None] & (o_h < half)[None, :]
        o_angle = o_bt[:, None] * half + o_h[None, :]
        o_q = o_bt[:, None] * s_q + (i_g * group + o_r)[:, None] * p + o_h[None, :]
        b_q1, b_q2 = rotated(p_q, o_q, m_h, p_cos, p_sin, o_angle, half)
        b_most = tl.full((16,), -1e30, tl.float32)
        b_sum = tl.zeros((16,), tl.float32)
        b_y = tl.zeros((16, 2 * BH), tl.float32)
        for i_k in range(first, tl.minimum(first + SPLIT, at + l), BK):
            o_k = i_k + tl.arange(0, BK)
            m_k = (o_k < at + l)[None, :] & (o_h < half)[:, None]
            o_kh = o_k[None, :] * p + o_h[:, None]
            b_k1 = tl.load(p_keys + o_kh, mask=m_k, other=0.0)
            b_k2 = tl.load(p_keys + o_kh + half, mask=m_k, other=0.0)
            b_s = dot(b_q1, b_k1)
            b_s = dot(b_q2, b_k2, b_s) * scale
            b_s = tl.where(o_k[None, :] <= at + o_t[:, None], b_s, -1e30)
            b_new = tl.maximum(b_most, tl.max(b_s, axis=1))
            b_fade = tl.exp2(b_most - b_new)
            b_e = tl.exp2(b_s - b_new[:, None])
            m_v = (o_k < at + l)[:, None] & (o_p < p)[None, :]
            b_v = tl.load(p_values + o_k[:, None] * p + o_p[None, :], mask=m_v, other=0.0)
            b_y = dot(b_e.to(b_v.dtype), b_v, b_y * b_fade[:, None])
            b_sum = b_sum * b_fade + tl.sum(b_e, axis=1)
            b_most = b_new
        o_part = (o_bt * (g * group) + i_g * group + o_r) * tl.num_programs(1) + i_s
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
    end = (tl.load(p_at + i // h // l).to(tl.int32) + (i // h % l).to(tl.int32)) // SPLIT + 1
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
    """Causal attention of l ≤ FEW new tokens over a cache of `at` (b,) tokens a row and each other.

    q (b, l, h, p), k and v (b, l, g, p) before RoPE; cos, sin (b, l, 1, p / 2), float32; keys and
    values (b, g, size, p). p ≤ 128 and h/g ≤ 16. Returns y (b, l, h, p).
    """
    (b, l, h, p), (g, size) = q.shape, keys.shape[1:3]
    split = SPLITS[b * g >= 64]  # enough pieces to fill the chip; never by the number of new tokens
    pieces, R, BH = -(-size // split), triton.next_power_of_2(h // g), block(p // 2)
    weight = q.new_empty(b, l, h, pieces, dtype=torch.float32)
    parts, y = weight.new_empty(*weight.shape, p), q.new_empty(b, l, h, p)
    sizes = dict(g=g, group=h // g, p=p, R=R, SPLIT=split, BK=min(64, split), BH=BH)
    sizes["num_stages"] = in_flight(q, 3, 2 * 64 * 2 * BH * q.element_size())
    tensors = *strided(q), *strided(k), *strided(v), cos, sin, at, keys, values, weight, parts
    grid, scale = (b * g * -(-l // (16 // R)), pieces), p**-0.5 * LOG2E.value
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
# on, T at a time, into y (b, SIZE, c). `group` channels read one of x. What is new of x goes into
# the log.
@jit(do_not_specialize=["l", "SIZE"])
def replay_conv_kernel(
    p_x, s_x: constexpr, p_log, s_log: constexpr, p_at, p_base, p_w, p_bias, p_y, l, SIZE,
    c: constexpr, group: constexpr, p: constexpr, W: constexpr, T: constexpr, BC: constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    at = tl.load(p_at + i_b).to(tl.int32)
    base = tl.load(p_base + i_b).to(tl.int32)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    o_x = o_c // (group * p) * p + o_c % p
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


# One head of one row: the recurrence from the state before token `base` through the logged tokens
# and the l new ones, from `at` on, and of these the output, its gate and its norm. The state before
# token `to` is stored; dt and B go into the log. replay_conv_kernel left x in p_mixed, for Mamba-2
# (p_B is None) also B and C. A state is a tile (p, n / NB, NB).
@jit(do_not_specialize=["l", "SIZE", "eps"])
def replay_kernel(
    p_dt, s_dt: constexpr, p_B, s_B: constexpr, p_C, s_C: constexpr, p_z, s_z: constexpr,
    p_logdt, s_logdt: constexpr, p_logB, s_logB: constexpr, p_mixed,
    p_h, p_at, p_base, p_to, p_A_log, p_bias, p_D, p_norm, p_y, l, SIZE, eps,
    c: constexpr, h: constexpr, group: constexpr, p: constexpr, n: constexpr,
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
    o_B = i_h // group * n + o_n
    if p_B is None:
        o_d = i_h + 0 * o_p  # Δ, A and D of the head
        o_x = i_h // group * p + o_p
        b_A = tl.load(p_A_log + i_h)
    else:
        o_d = i_h * p + o_p  # of every channel
        o_x = o_d
        b_A = tl.load(p_A_log + o_d * n + o_n, mask=m_p & m_n, other=0.0)
        p_B += i_b * l * s_B
        p_logB += i_b * SIZE * s_logB
        p_C += i_b * l * s_C + i_h * n
    b_A = -tl.exp(b_A.to(tl.float32)) * LOG2E
    b_D = read(p_D + o_d, m_p)
    b_bias = read(p_bias + o_d, m_p)
    if p_norm is not None:
        b_norm = read(p_norm + i_h * p + o_p, m_p)
    p_mixed += i_b * SIZE * c
    p_dt += i_b * l * s_dt
    p_logdt += i_b * SIZE * s_logdt
    p_h += (i_b * h + i_h) * (p * n) + o_p * n + o_n
    b_h = tl.load(p_h, mask=m_p & m_n, other=0.0)
    for t in range(base, at + l):
        o_t = t + 0 * o_p
        i_log = t & (SIZE - 1)
        o_y = i_b * l + t - at
        b_z = read(p_z + o_y * s_z + i_h * p + o_p, m_p & (o_t >= at))
        b_x = read(p_mixed + (t - base) * c + o_x, m_p)
        b_dt = replay_read(p_logdt, s_logdt, p_dt, s_dt, o_t, o_d, m_p, at, SIZE)
        tl.store(p_logdt + i_log * s_logdt + o_d, b_dt, mask=m_p & (o_t >= at))
        if p_B is None:
            b_B = read(p_mixed + (t - base) * c + h // group * p + o_B, m_n)
            b_C = read(p_mixed + (t - base) * c + h // group * (p + n) + i_h * n + o_n, m_n)
        else:
            m_new = m_n & (t + 0 * o_n >= at)
            b_B = replay_read(p_logB, s_logB, p_B, s_B, t + 0 * o_n, o_B, m_n, at, SIZE)
            tl.store(p_logB + i_log * s_logB + o_B, b_B, mask=m_new)
            b_C = read(p_C + (t - at) * s_C + o_n, m_new)
        b_delta = softplus(b_dt + b_bias)
        b_h = tl.exp2(b_delta * b_A) * b_h + b_delta * b_x * b_B
        if t + 1 == to:
            tl.store(p_h, b_h, mask=m_p & m_n)
        if t >= at:
            b_y = tl.sum(tl.sum(b_h * b_C, axis=1, keep_dims=True), axis=2, keep_dims=True)
            b_y = (b_y + b_D * b_x) * silu(b_z)
            if p_norm is not None:
                b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=0, keep_dims=True) / p + eps)
                b_y *= b_norm
            tl.store(p_y + (o_y * h + i_h) * p + o_p, b_y, mask=m_p)


def replay(x, dt, B, C, z, log, state, places, weight, bias, A_log, dt_bias, D, norm=None, eps=0.0):
    """Convolution, scan, gate and norm of l ≤ FEW new tokens, after a replay of the logged ones.

    Section 4 of 2408.15237, in two kernels. p, n ≤ 128. Returns y (b, l, h, p).

    Mamba: x (b, l, g, p), dt and z (b, l, h, p), B (b, l, g, n), C (b, l, h, n), A_log (h·p, n),
    dt_bias and D (h·p). Mamba-2: x (b, l, channels) is x, B and C; dt (b, l, h); B and C None; z
    (b, l, h, p); A_log, dt_bias and D (h,); norm (h·p), the norm's weight, and its eps. weight
    (channels, 1, w) and bias are the convolution's. log: x, dt and, for Mamba, B of earlier tokens
    (b, size, …), token t at t mod size, a power of 2 that holds the logged tokens, the new ones and
    w - 1 more. places: at, base and to (b,): the first new token, the one before which `state`
    (b, h, p, n) is now, and the one before which it is to be afterwards.
    """
    (b, l), (h, p, n), (c, _, w), size = x.shape[:2], state.shape[1:], weight.shape, log[0].shape[1]
    (at, base, to), (log_x, log_dt, *log_B) = places, log
    if B is None:  # no channel of the convolution is repeated
        group, sizes_c = h // ((c - h * n) // (p + n)), dict(group=1, p=c)
    else:
        group, sizes_c = h // x.shape[2], dict(group=h // x.shape[2], p=p)
    mixed, y = state.new_empty(b, size, c), x.new_empty(b, l, h, p)
    tensors = *strided(x, log_x), at, base, weight, bias, mixed
    grid, sizes_c = (b, -(-c // 64)), dict(sizes_c, c=c, W=w, T=4, BC=64)
    launch(replay_conv_kernel, grid, *tensors, l, size, **sizes_c)
    BP, BN = block(p), block(n)
    sizes = dict(c=c, h=h, group=group, p=p, n=n, BP=BP, BN=BN, NB=min(BN, 32))
    tensors = *strided(dt, B, C, z, log_dt, *(log_B or [None])), mixed, state, at, base, to
    tensors += A_log, dt_bias, D, norm, y
    sizes["num_warps"] = max(2, BP * BN // 1024)
    launch(replay_kernel, (b * h,), *tensors, l, size, eps, **sizes)
    return y
