"""The Mamba in the Llama: one stack of layers in which attention can be replaced by a Mamba that inherits its weights.

    attention without softmax   h_t = h_{t-1} + v_t k_tᵀ                            y_t = h_t q_t
    Mamba                       h_t = exp(Δ_t A) ∘ h_{t-1} + (Δ_t x_t) B_tᵀ         y_t = h_t C_t + D ∘ x_t

The two lines differ by a step Δ and a decay A, so a trained attention layer hands its projections over (section 2 and
Figure 1 of arXiv 2408.15237; `replace_attention` below does it):

    query W_q -> C    key W_k -> B    value W_v -> x    output W_o -> out_proj
    new, learned in distillation: Δ, A, a causal convolution of width 4, a gate z, a skip D
    left behind: the softmax with its scale 1/√p, and RoPE (the recurrence knows the order of the tokens)

A Llama is the stack with attention in every layer; there is no other model class. Letters are those of kernels.py:
b batch, l length, d width, h query heads, g kv heads, p channels per head, n state size per head, w conv width,
v vocabulary. In attention p is head_dim and n = p.

In this file, top to bottom: Config; Documents, rows of several; the mixers Attention, Mamba, Mamba2 and NoMixer; Hybrid, the stack; Cache, what decoding
remembers; replace_attention and keep_layers; checkpoints, ours and the world's.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
import re
import secrets
import shutil
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels import causal_conv, ssm_scan


class MilError(ValueError):
    """What went wrong, said to the person who typed: the file or flag, what was found, what was expected."""


class Parser(argparse.ArgumentParser):
    """One to which a wrong command line is a MilError."""

    def error(self, message):
        raise MilError(f"{message} (--help lists the flags)")


ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class Config:
    """Sizes of a stack. The defaults are Llama-3-8B's; `mixers` names one of CLASSES per layer."""

    v: int = 128256  # vocabulary
    d: int = 4096  # model width
    n_layers: int = 32
    n_heads: int = 32  # query heads of attention
    n_kv_heads: int = 8  # key/value heads; must divide n_heads
    head_dim: int = 0  # 0: d / n_heads
    d_ff: int = 14336  # inner width of the SwiGLU MLP
    context: int = 8192  # longest sequence attention has been trained for
    mixers: list = field(default_factory=list)  # [] : attention everywhere, a Llama
    rope_theta: float = 500000.0
    rope_scaling: dict | None = (
        None  # a dict of ROPE_SCALING, Llama 3.1's; or of its "factor" alone: positions divided by it
    )
    attention_bias: bool = False  # whether attention's four projections have biases
    norm_eps: float = 1e-5
    tied: bool = False  # the output head is the embedding
    d_state: int = 16  # Mamba only: state and head size n = p; Mamba-2 has n = p = head_dim
    d_conv: int = 4  # width of the causal convolution

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), 0 if f.name == "head_dim" else 1
            if f.type is int and not (isinstance(value, int) and value >= least):
                wanted = f"a whole number of at least {least}"
                raise MilError(f"config: {f.name} is {value!r}, expected {wanted}")
            if f.type is float and not (isinstance(value, (int, float)) and value > 0):
                raise MilError(f"config: {f.name} is {value!r}, expected a number above 0")
        h, g, n = self.n_heads, self.n_kv_heads, self.n_layers
        self.mixers = list(self.mixers) or ["attention"] * n
        if not self.head_dim and self.d % h == 0:
            self.head_dim = self.d // h
        p, narrow = self.head_dim, g * self.head_dim
        scaling = {"factor": 1} if self.rope_scaling is None else self.rope_scaling
        fit = all(isinstance(x, (int, float)) and x > 0 for x in scaling.values())
        fit = fit and sorted(scaling) in (sorted(ROPE_SCALING), ["factor"])
        reverse = fit and len(scaling) > 1 and scaling[ROPE_SCALING[1]] >= scaling[ROPE_SCALING[2]]
        names = f"{', '.join(ROPE_SCALING)} (Llama 3.1's) or factor alone (linear)"
        odd = [mixer for mixer in self.mixers if mixer not in MIXERS]
        uncut = "mamba" in self.mixers and narrow % self.d_state  # Mamba's heads, from attention's
        for wrong, message in (
            (not p, f"width d {self.d} is not divisible by n_heads {h}; give head_dim"),
            (p % 2, f"head_dim is {p}, expected an even number: RoPE turns channels in pairs"),
            (h % g, f"n_heads {h} is not divisible by n_kv_heads {g}"),
            (len(self.mixers) != n, f"{len(self.mixers)} mixers for {n} layers, expected as many"),
            (odd, f"a mixer is {', '.join(map(repr, odd))}, expected one of {', '.join(MIXERS)}"),
            (not fit, f"rope_scaling is {scaling}, expected numbers above 0 for {names}"),
            (reverse, f"rope_scaling is {scaling}, expected {' below '.join(ROPE_SCALING[1:3])}"),
            (uncut, f"d_state {self.d_state} does not divide the kv width {narrow}"),
        ):
            if wrong:
                raise MilError(f"config: {message}")


# ---------------------------------------------------------------------------------------------------------------
# Layers. A weight may be of another type than what it is multiplied with (float32 masters under bf16 arithmetic);
# it is used in the type of the activations, and its gradient, a sum in float32, is rounded once to that type. An
# optimiser's step does not notice that rounding: it is 2^-9 of each gradient, and sums over parts of a batch are float32.


class Linear(nn.Linear):
    """x Wᵀ + bias, in x's type."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def parts(self, x, sizes):
        """x Wᵀ, split along its last axis."""
        weight, pad = self.weight.to(x.dtype), -sum(sizes) % 8 if x.is_cuda else 0
        if pad:  # a GPU's fast kernels want rows that begin at multiples of 16 bytes
            weight = F.pad(weight, (0, 0, 0, pad))
        return F.linear(x, weight).split([*sizes, pad], dim=-1)[:-1]


class RMSNorm(nn.RMSNorm):
    """x / √(mean of x² + eps) ∘ weight over the last axis, in the wider of both types; returned in x's."""

    def forward(self, x):
        f = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(f), self.normalized_shape, self.weight.to(f), self.eps).to(x.dtype)

    def step(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


def wider(t):
    """`t` in float32, or in float64 if it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def rope_angles(config, pos):
    """cos and sin (b, 1, l, head_dim / 2), float32, of RoPE's angles at the positions pos (b, l).

    The frequencies are Hugging Face's to the last bit. Llama 3.1's scaling divides slow ones by `factor`, keeps fast
    ones, and goes smoothly from one to the other between; linear scaling divides all of them.
    """
    i = torch.arange(0, config.head_dim, 2, device=pos.device).float()
    freq = 1 / config.rope_theta ** (i / config.head_dim)
    scaling = config.rope_scaling or {"factor": 1}
    kept = torch.zeros_like(freq)
    if len(scaling) > 1:
        turns = scaling["original_max_position_embeddings"] / (
            2 * math.pi / freq
        )  # within the first training length
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    freq = (1 - kept) * freq / scaling["factor"] + kept * freq
    angle = pos[:, None, :, None].float() * freq
    return angle.cos(), angle.sin()


def rotate(q, angles):
    """RoPE (2104.09864): turns the channel pairs (i, i + p/2) of q (b, l, h, p) by the angles; float32 inside."""
    cos, sin = (t.transpose(1, 2) for t in angles)  # (b, l, 1, p / 2)
    q1, q2 = wider(q).chunk(2, dim=-1)
    return torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], dim=-1).to(q.dtype)


class Documents:
    """Rows that hold several documents one after the other: nothing passes from one to the next.

    pos (b, l), integers on the CPU, is the place of each token in its document, 0 where a row begins. On `device`:
    pos; bounds, where each document begins in the flattened batch, and the end; and mask (b, 1, l, l), who sees whom,
    or None where queries of this `dtype` have PyTorch's flash attention within documents.
    """

    def __init__(self, pos, device, dtype=torch.float32):
        begins = (pos.flatten() == 0).nonzero()[:, 0]
        bounds = F.pad(begins, (0, 1), value=pos.numel()).int()
        send = (
            (lambda t: t.pin_memory().to(device, non_blocking=True))
            if device.type == "cuda"
            else (lambda t: t)
        )
        self.pos, self.bounds, self.mask = send(pos.int()), send(bounds), None
        torch._dynamo.maybe_mark_dynamic(
            self.bounds, 0
        )  # another number of documents compiles nothing
        if device.type != "cuda" or dtype.itemsize > 2:
            number, i = (self.pos == 0).cumsum(1), torch.arange(pos.shape[1], device=device)
            self.mask = ((number[:, :, None] == number[:, None]) & (i[:, None] >= i))[:, None]

    def attend(self, q, k, v):
        """Attention within documents: q (b, l, h, p), k and v (b, l, g, p) -> (b, l, h, p)."""
        if self.mask is not None:
            return sdpa(q, k, v, self.mask)
        flat, l = [t.flatten(0, 1) for t in (q, k, v)], q.shape[1]
        # What varlen_attn calls, without its time in Python. No dropout, causal, no mask for debugging.
        y, *_ = torch.ops.aten._flash_attention_forward(
            *flat, self.bounds, self.bounds, l, l, 0.0, True, False
        )
        return y.view(q.shape)


def sdpa(q, k, v, mask=None):
    """PyTorch's attention of q (b, l, h, p) over k and v (b, ·, g, p), causal without a mask."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
    ).transpose(1, 2)


def project(u, *parts):
    """u through several projections, in decoding: one launch where their weights lie side by side (`pack`)."""
    ys = kernels.linears(u, *[part.weight for part in parts])
    return [y if part.bias is None else y + part.bias for y, part in zip(ys, parts)]


# ---------------------------------------------------------------------------------------------------------------
# Mixers: what moves information between tokens.
#
#   forward(u, angles, log, docs)   the mixer's formula. u (b, l, d) is normed; angles are RoPE's; log is this layer's
#                                   part of the Cache, or None in training; docs are Documents, or None if every row is one
#   step(v, u, angles, log)         u + mixer(v) of a few tokens by kernels.py's decoding kernels; optional
#   inherit(attention)              pairs (our tensor, attention's projection) that begin equal
#   new_log(cache)                  this layer's part of a Cache
#   READS                           the projections of the input, which `pack` lays side by side
#
# A mixer with a state also has `scan`, which the StateLog calls.


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE."""

    READS = "q_proj", "k_proj", "v_proj"

    def __init__(self, config):
        super().__init__()
        self.config = config
        wide, narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.d, wide, bias=config.attention_bias)
        self.k_proj = Linear(config.d, narrow, bias=config.attention_bias)
        self.v_proj = Linear(config.d, narrow, bias=config.attention_bias)
        self.o_proj = Linear(wide, config.d, bias=config.attention_bias)

    def forward(self, u, angles, log=None, docs=None):
        q = self.q_proj(u).unflatten(2, (-1, self.config.head_dim))  # (b, l, h, p)
        k = self.k_proj(u).unflatten(2, (-1, self.config.head_dim))  # (b, l, g, p)
        v = self.v_proj(u).unflatten(2, (-1, self.config.head_dim))  # (b, l, g, p)
        q, k = rotate(q, angles), rotate(k, angles)
        if log is not None:
            y = sdpa(q, *log.extend(k, v))  # over all so far
        elif docs is not None:
            y = docs.attend(q, k, v)
        else:
            y = sdpa(q, k, v)
        return self.o_proj(y.flatten(2))

    def step(self, v, u, angles, log):
        qkv = project(v, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (t.unflatten(2, (-1, self.config.head_dim)) for t in qkv)
        y = kernels.attend(q, k, v, *angles, log.k, log.v, log.cache.at)
        y = kernels.linear(y.flatten(2), self.o_proj.weight, onto=u)
        return y if self.o_proj.bias is None else y + self.o_proj.bias

    def new_log(self, cache):
        return AttentionLog(cache, self.config, self.q_proj.weight.dtype)


def initial_dt_bias(n):
    """The bias for which Δ = softplus(bias) is log-uniform in [1e-3, 1e-1] (Mamba's initialisation)."""
    delta = torch.exp(torch.empty(n, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)))
    return delta + torch.log(-torch.expm1(-delta))  # the inverse of softplus


class Mamba(nn.Module):
    """Mamba (S6) in attention's place: heads cut to n = p = d_state, a step Δ per channel, a decay A per state element.

    Parameters are named and shaped as in the released checkpoints: out_proj and C_proj (h·p), in_proj_x and B_proj (g·p).
    The convolution reads x only, and has its own weights for each of the h·p channels, after the kv heads fan out.
    With d_state = head_dim the block without its new parts is the attention without softmax; with a smaller one it is
    that attention with its heads cut to d_state channels, which for grouped heads pairs other slices than attention did
    (as in the released models). `angles` is for attention alone.
    """

    READS = "in_proj_x", "in_proj_z", "B_proj", "C_proj", "dt_proj_down"

    def __init__(self, config):
        super().__init__()
        self.config = config
        wide, narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.dt_rank = math.ceil(config.d / 16)
        self.in_proj_x = Linear(config.d, narrow, bias=False)
        self.in_proj_z = Linear(config.d, wide, bias=False)
        self.B_proj = Linear(config.d, narrow, bias=False)
        self.C_proj = Linear(config.d, wide, bias=False)
        self.dt_proj_down = Linear(config.d, self.dt_rank, bias=False)
        self.dt_proj = Linear(self.dt_rank, wide, bias=True)
        self.conv1d = nn.Conv1d(wide, wide, config.d_conv, groups=wide)
        self.A_log = nn.Parameter(torch.empty(wide, config.d_state))
        self.D = nn.Parameter(torch.empty(wide))
        self.out_proj = Linear(wide, config.d, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Initial values of what attention does not give (those of Mamba itself; A = -(1 .. n))."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_proj.bias.copy_(initial_dt_bias(self.dt_proj.bias.shape[0]))
        self.A_log.copy_(
            torch.arange(1, self.config.d_state + 1, dtype=torch.float32)
            .log()
            .expand_as(self.A_log)
        )
        self.D.fill_(1)

    def inherit(self, attention):
        """Which of this block's tensors take which of attention's."""
        return [
            (self.C_proj.weight, attention.q_proj),
            (self.B_proj.weight, attention.k_proj),
            (self.in_proj_x.weight, attention.v_proj),
            (self.out_proj.weight, attention.o_proj),
        ]

    def heads(self, t):
        """(b, l, h·p) -> (b, l, h, p)."""
        return t.unflatten(-1, (-1, self.config.d_state))

    def forward(self, u, angles, log=None, docs=None):
        x = self.heads(self.in_proj_x(u))  # (b, l, g, p)
        z = self.heads(self.in_proj_z(u))  # (b, l, h, p)
        B = self.heads(self.B_proj(u))  # (b, l, g, n)
        C = self.heads(self.C_proj(u))  # (b, l, h, n)
        dt = self.heads(
            F.linear(self.dt_proj_down(u), self.dt_proj.weight.to(u.dtype))
        )  # its bias comes in the scan
        if log is None:
            y, _, _ = self.scan(x, dt, B, C, z, docs=docs)
        else:
            y = log.extend(self, (x, dt, B), (C, z))
        return self.out_proj(y.flatten(2))

    def scan(self, x, dt, B, C, z, window=None, h0=None, lengths=None, docs=None):
        """Convolution and scan of what the projections gave: y (b, l, h, p), and what a later call goes on from, the
        convolution's last inputs and the state. lengths (b,): how many of each row's tokens are real."""
        n = self.config.d_state
        pos = None if docs is None else docs.pos
        dt = dt if lengths is None else hide_padding(dt, lengths)
        weight, bias = (
            self.conv1d.weight.view(-1, n, self.config.d_conv),
            self.conv1d.bias.view(-1, n),
        )
        x, window = causal_conv(
            x, weight, bias, window, lengths, pos
        )  # (b, l, g, p) -> (b, l, h, p)
        A = -torch.exp(wider(self.A_log)).view(-1, n, n)  # (h, p, n)
        y, h = ssm_scan(
            x, dt, A, B, C, self.heads(self.D), z, self.heads(self.dt_proj.bias), h0, pos
        )
        return y, window, h

    def step(self, v, u, angles, log):
        x, z, B, C, dt = project(v, *[getattr(self, name) for name in self.READS])
        dt = kernels.linear(dt, self.dt_proj.weight)
        y = kernels.replay(
            *map(self.heads, (x, dt, B, C, z)),
            log.allocate([self.heads(t) for t in (x, dt, B)]),
            log.h,
            log.places,
            self.conv1d.weight,
            self.conv1d.bias,
            self.A_log,
            self.dt_proj.bias,
            self.D,
        )
        return kernels.linear(y.flatten(2), self.out_proj.weight, onto=u)

    def new_log(self, cache):
        c = self.config
        return StateLog(
            cache,
            c.d_conv - 1,
            (c.n_heads * c.head_dim // c.d_state, c.d_state, c.d_state),
            self.out_proj.weight.dtype,
        )


class Mamba2(nn.Module):
    """Mamba-2 (SSD) in attention's place: attention's own heads, n = p = head_dim, one Δ and one A per head.

    in_proj's rows are ordered z, x, B, C, dt as in the released checkpoints. The convolution reads x, B and C, before
    the kv heads fan out; a per-head RMSNorm follows the gate.
    """

    READS = ("in_proj",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        wide, narrow, h = (
            config.n_heads * config.head_dim,
            config.n_kv_heads * config.head_dim,
            config.n_heads,
        )
        self.sizes = [wide, 2 * narrow + wide, h]  # z | x, B, C | dt
        self.in_proj = Linear(config.d, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(self.sizes[1], self.sizes[1], config.d_conv, groups=self.sizes[1])
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.A_log = nn.Parameter(torch.empty(h))
        self.D = nn.Parameter(torch.empty(h))
        self.norm = nn.RMSNorm(wide, eps=1e-5)  # holds the weight; normalised per head below
        self.out_proj = Linear(wide, config.d, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Initial values of what attention does not give (Mamba-2's own: A uniform in [1, 16])."""
        self.dt_bias.copy_(initial_dt_bias(self.config.n_heads))
        self.A_log.copy_(
            torch.empty(self.config.n_heads, dtype=torch.float32).uniform_(1, 16).log()
        )
        self.D.fill_(1)

    def inherit(self, attention):
        """Which of this block's tensors take which of attention's."""
        wide, narrow = self.sizes[0], (self.sizes[1] - self.sizes[0]) // 2
        _, x, B, C, _ = self.in_proj.weight.split([wide, narrow, narrow, wide, self.sizes[2]])
        return [
            (C, attention.q_proj),
            (B, attention.k_proj),
            (x, attention.v_proj),
            (self.out_proj.weight, attention.o_proj),
        ]

    def forward(self, u, angles, log=None, docs=None):
        z, xBC, dt = self.in_proj.parts(u, self.sizes)
        if log is None:
            y, _, _ = self.scan(xBC, dt, z, docs=docs)
        else:
            y = log.extend(self, (xBC, dt), (z,))
        return self.out_proj(y.flatten(2))

    def scan(self, xBC, dt, z, window=None, h0=None, lengths=None, docs=None):
        """As Mamba's; gate and norm included."""
        g, h, p = self.config.n_kv_heads, self.config.n_heads, self.config.head_dim
        pos = None if docs is None else docs.pos
        dt = dt if lengths is None else hide_padding(dt, lengths)
        window = None if window is None else window.unsqueeze(2)  # (b, w - 1, 1, channels)
        weight, bias = (
            self.conv1d.weight.transpose(0, 1),
            self.conv1d.bias[None],
        )  # (1, channels, w) (1, channels)
        xBC, window = causal_conv(xBC.unsqueeze(2), weight, bias, window, lengths, pos)
        x, B, C = xBC.view(*dt.shape[:2], -1, p).split([g, g, h], dim=2)  # (b, l, heads, p)
        y, state = ssm_scan(
            x, dt, -torch.exp(wider(self.A_log)), B, C, self.D, None, self.dt_bias, h0, pos
        )
        y = wider(y) * F.silu(wider(z)).view(y.shape)
        y = F.rms_norm(y, (p,), eps=self.norm.eps) * self.norm.weight.view(h, p)  # per head
        return y.to(z.dtype), window.squeeze(2), state

    def step(self, v, u, angles, log):
        z, xBC, dt = project(v, self.in_proj)[0].split(self.sizes, dim=2)
        y = kernels.replay(
            xBC,
            dt,
            None,
            None,
            z.unflatten(2, (self.config.n_heads, -1)),
            log.allocate((xBC, dt)),
            log.h,
            log.places,
            self.conv1d.weight,
            self.conv1d.bias,
            self.A_log,
            self.dt_bias,
            self.D,
            self.norm.weight,
            self.norm.eps,
        )
        return kernels.linear(y.flatten(2), self.out_proj.weight, onto=u)

    def new_log(self, cache):
        p, h = self.config.head_dim, self.config.n_heads
        return StateLog(cache, self.config.d_conv - 1, (h, p, p), self.out_proj.weight.dtype)


class NoMixer(nn.Module):
    """No information moves between tokens (the ablation of the paper's Table 9)."""

    READS = ()

    def __init__(self, config):
        super().__init__()

    def inherit(self, attention):
        return []

    def forward(self, u, angles, log=None, docs=None):
        return torch.zeros_like(u)

    def step(self, v, u, angles, log):
        return u

    def new_log(self, cache):
        return None


CLASSES = {"attention": Attention, "mamba": Mamba, "mamba2": Mamba2, "none": NoMixer}
MIXERS = tuple(CLASSES)  # attention, and what may replace it


# ---------------------------------------------------------------------------------------------------------------
# The stack


class MLP(nn.Module):
    """SwiGLU (2002.05202): down(silu(gate u) ∘ up u)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.d, config.d_ff, bias=False)
        self.up_proj = Linear(config.d, config.d_ff, bias=False)
        self.down_proj = Linear(config.d_ff, config.d, bias=False)

    def forward(self, u):
        return self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))

    def step(self, v, u):
        """u + mlp(v), in decoding."""
        inside = kernels.linear(v, self.up_proj.weight, gate=self.gate_proj.weight)
        return kernels.linear(inside, self.down_proj.weight, onto=u)


class Block(nn.Module):
    """A Llama layer, whatever its mixer."""

    def __init__(self, config, mixer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d, eps=config.norm_eps)
        self.mixer = CLASSES[mixer](config)
        self.post_attention_layernorm = RMSNorm(config.d, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, u, angles, log=None, docs=None):
        u = u + self.mixer(self.input_layernorm(u), angles, log, docs)
        return u + self.mlp(self.post_attention_layernorm(u))

    def step(self, u, angles, log):
        """`forward` of a few tokens by kernels.py's decoding kernels, whose products add the residual themselves."""
        u = self.mixer.step(self.input_layernorm.step(u), u, angles, log)
        return self.mlp.step(self.post_attention_layernorm.step(u), u)


class Hybrid(nn.Module):
    """The stack. A Llama when every mixer is attention; config.mixers[i] says what layer i is. It computes in the type of the embedding's
    weights or, where that is set, in `compute`."""

    compute = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.v, config.d)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.norm = RMSNorm(config.d, eps=config.norm_eps)
        self.lm_head = Linear(config.d, config.v, bias=False)
        self.tie()
        self.reset()

    def tie(self):
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.no_grad()
    def reset(self):
        """Normal 0.02 for every projection, less on the two that write to the residual stream (as GPT-2)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not name.endswith(
                "dt_proj"
            ):  # dt_proj has its own
                last = name.endswith(("o_proj", "out_proj", "down_proj"))
                module.weight.normal_(
                    std=0.02 / math.sqrt(2 * self.config.n_layers) if last else 0.02
                )

    def hidden(self, tokens, cache=None, lengths=None, docs=None):
        """The stack without its head: tokens (b, l) -> (b, l, d).

        With a cache the tokens follow what it holds and are added to it. lengths (b,) says how many of each row's
        tokens are real when rows are padded on the right; what stands at padded positions of the result is undefined.
        docs: the Documents that the rows hold; None: one each. Raises MilError for lengths without a cache, or docs with one.
        """
        if (lengths if cache is None else docs) is not None:
            raise MilError("lengths are for a cache, and docs for rows without one; leave them out")
        if cache is not None:
            cache.open(*tokens.shape, lengths)
        u, angles = self.start(tokens, cache, docs)
        for i, layer in enumerate(self.layers):
            if cache is not None and cache.fused:
                u = layer.step(u, angles, cache.logs[i])
            else:
                u = layer(u, angles, None if cache is None else cache.logs[i], docs)
        if cache is not None:
            cache.close()
        return self.norm.step(u) if cache is not None and cache.fused else self.norm(u)

    def start(self, tokens, cache=None, docs=None):
        """What the first layer reads: the embedding (b, l, d), and the angles of RoPE."""
        u = self.embed_tokens(tokens)
        if cache is not None:
            angles = cache.angles
        elif docs is not None:
            angles = rope_angles(self.config, docs.pos)
        else:
            angles = rope_angles(
                self.config, torch.arange(tokens.shape[1], device=tokens.device)[None]
            )
        return u if self.compute is None else u.to(self.compute), angles

    def forward(self, tokens, cache=None, lengths=None, docs=None):
        """Logits (b, l, v) of the token after each. See `hidden`."""
        return self.logits(self.hidden(tokens, cache, lengths, docs))

    def logits(self, hidden):
        """(b, l, d) -> (b, l, v)."""
        if kernels.few(hidden, hidden.shape[1], self.lm_head.weight):
            return kernels.linear(hidden, self.lm_head.weight)
        return self.lm_head(hidden)


# ---------------------------------------------------------------------------------------------------------------
# The cache: what decoding remembers. Each layer has a log, each row of the batch a cursor into it.


class Cache:
    """`Cache(model, batch, size, places=0, lazy=False)`: room for `size` tokens a row, for `places` in a Mamba layer's log. After settle(n), n ≤ places, the
    next n can be taken back.

        a row's tokens   The mamba in the llama sat on | the hat         |  the cursor: what follows it means nothing
        attention        k v k v k v k v k v k v k v   | k v k v         a key and a value a token
        Mamba            h ──────────────┘ x x x x x   | x x x           one state, where `base` says, and the inputs since

    Every layer's cache is a log with the same cursor. To take back the tokens that a verification rejects, the cursor
    moves, and nothing else: attention's later keys are never looked at, and a Mamba layer starts each pass from its one
    state and reads its logged inputs again, up to the cursor, before the new ones (The Mamba in the Llama, section 4).
    When the next pass, or what `settle` asks room for, would not fit in a row's log, that row's inputs, up to its
    cursor, go into its state for good; so after settle(K + 1) no pass of K + 1 tokens or fewer moves a state past the
    place to which `back` may want to return. A pass of more than `places` tokens goes into the state at once, and so does
    one that `settle` did not announce; with lazy=True the kernels log that one too, and write the state every places + 1 tokens.

    On a GPU a pass of a few tokens is made of kernels that read `at` and `base` where they lie (`fused`): nothing waits for
    the host, and the pass can be captured in a CUDA graph. Elsewhere PyTorch does the same with the mixers' own scan.
    """

    def __init__(self, model, batch, size, places=0, lazy=False):
        c, self.weight, self.lazy = model.config, model.embed_tokens.weight, lazy
        self.size, self.places, self.device, self.room = size, places, self.weight.device, 0
        # per row: the cursor; the token before which the states stand; and before which they are to stand after this pass
        self.at, self.base, self.to = torch.zeros(3, batch, dtype=torch.long, device=self.device)
        self.used = 0  # no row holds more tokens
        self.turns = (
            rope_angles(c, torch.arange(size, device=self.device)[None])
            if "attention" in c.mixers
            else ()
        )  # of all positions
        self.small = (
            max(c.head_dim, c.d_state) <= 128 and c.n_heads // c.n_kv_heads <= 16
        )  # what the kernels hold in registers
        self.logs = [layer.mixer.new_log(self) for layer in model.layers]
        self.small &= all(hasattr(layer.mixer, "step") for layer in model.layers)

    def fusable(self, l):
        """Whether a pass of l tokens a row, all of them real, is made of the kernels for decoding."""
        return self.small and kernels.few(self.weight, l)

    def open(self, b, l, lengths=None):
        """A pass of l new tokens a row begins, of which lengths (b,) are real (None: all). Sets what the layers go by: their positions `pos` (b, l) and
        `angles`; whether the pass is `fused`; whether its tokens go into the states at once, `direct`. For a Mamba layer's log in PyTorch: `moving` (b,), how many
        logged inputs go into a row's state first, at most `due`; and, counted from where the state stands then, `slot` (b, l), the places of the new inputs,
        `real` (b,), how many there are with them, at most `end`.

        With 4 places and passes of two tokens, announced: the first, at 0, logs its inputs in slots 0 and 1, the second, at 2, in 2 and 3. For the third,
        at 4, there is no room: the four inputs (`moving`) go into the state, which then stands at 4, and the new ones come in slots 0 and 1 again."""
        if b != len(self.at):
            raise MilError(f"cache: {b} rows of tokens for a cache of {len(self.at)} rows")
        if self.used + l > self.size:
            raise MilError(
                f"cache: {l} more tokens do not fit: {self.used} of {self.size} places are used"
            )
        after, announced, need = (
            torch.arange(l, device=self.device),
            self.room > 0,
            max(l, self.room),
        )
        self.fused = lengths is None and self.fusable(l)
        self.direct, self.room, self.new = (
            l > self.places or not (announced or self.lazy and self.fused),
            max(0, self.room - l),
            l,
        )
        self.lengths = None if lengths is None else torch.as_tensor(lengths, device=self.device)
        self.counts = l if lengths is None else self.lengths
        target = (
            self.at if announced and not self.direct else self.at + self.counts
        )  # where a state that moves is to stand
        self.to.copy_(
            target
            if self.direct
            else torch.where(self.at - self.base > self.places - need, target, self.base)
        )
        self.pos = self.at[:, None] + after  # (b, l)
        self.angles = [t[0, 0, self.pos][:, None] for t in self.turns]  # (b, 1, l, p / 2)
        if not self.fused:  # of a Mamba layer's log
            self.row = torch.arange(b, device=self.device)[:, None]
            self.moving = torch.where(
                self.to > self.base, self.at - self.base, 0
            )  # (b,) inputs to replay before the state moves
            self.due = int(self.moving.max())
            since = (
                torch.zeros_like(self.at) if self.direct else self.at - self.to
            )  # (b,) inputs logged after that
            self.slot, self.real, self.end = (
                since[:, None] + after,
                since + self.counts,
                int(since.max()) + l,
            )

    def close(self):
        self.at += self.counts
        self.base.copy_(self.to)
        self.used = self.used + self.new if self.fused else int(self.at.max())

    def settle(self, room):
        """What is in the cache stays. Up to `room` more tokens a row can come, and be taken back, before the next call."""
        if room > self.places:
            raise MilError(
                f"cache: {room} tokens could not be taken back: its log has {self.places} places"
            )
        self.room = room

    def start(self, at, used, room):
        """A round begins: every row's cursor back to `at` (b,), a tensor, the largest of which is `used`; then settle(room). Does not check that
        the log reaches that far, as `back` does, since that would wait for the device; what a row gives that stands before its state (in
        `generate` one that is finished) means nothing."""
        self.at.copy_(at)
        self.used = used
        self.settle(room)

    def clear(self):
        """Forget everything."""
        for t in (
            self.at,
            self.base,
            self.to,
            *[
                t
                for log in self.logs
                if isinstance(log, StateLog)
                for t in (log.h, *(log.inputs or ()))
            ],
        ):
            t.zero_()
        self.used = self.room = 0

    def back(self, to):
        """Move each row's cursor back to `to`, a number of tokens per row. MilError where the log does not reach."""
        for row, (at, base, new) in enumerate(
            zip(self.at.tolist(), self.base.tolist(), to, strict=True)
        ):
            first = base if any(isinstance(log, StateLog) for log in self.logs) else 0
            if not first <= new <= at:
                raise MilError(
                    f"cache: row {row} holds {at} tokens and can go back to {first}, not to {new}: its log has {self.places} places"
                )
        self.at.copy_(torch.tensor(to))
        self.used = max(to)


class AttentionLog:
    """K and V (b, g, size, p), written at each row's own cursor."""

    def __init__(self, cache, config, dtype):
        self.cache = cache
        shape = (len(cache.at), config.n_kv_heads, cache.size, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=cache.device) for _ in range(2))

    def extend(self, k, v):
        """Write the new k, v (b, l, g, p). Returns all keys and values so far, and who may see whom (None: causal)."""
        c = self.cache
        self.k[c.row, :, c.pos] = k.to(
            self.k.dtype
        )  # padding lands past the cursor, where nothing counts
        self.v[c.row, :, c.pos] = v.to(self.v.dtype)
        if c.used == 0:  # nothing came before: plain causal attention over the new tokens
            return k, v, None
        end = c.used + c.new
        mask = torch.arange(end, device=c.device) <= c.pos[..., None]  # (b, l, end)
        return (
            self.k[:, :, :end].transpose(1, 2).to(k.dtype),
            self.v[:, :, :end].transpose(1, 2).to(v.dtype),
            mask[:, None],
        )


class StateLog:
    """The state h (b, h, p, n), float32 or more, before token `base`; and a ring of the layer's inputs, token t at t modulo its size:
    those since, and the `window` of them before that the convolution looks back on."""

    def __init__(self, cache, window, state, dtype):
        self.cache, self.window, self.inputs = cache, window, None
        self.h = torch.zeros(
            len(cache.at),
            *state,
            dtype=torch.promote_types(dtype, torch.float32),
            device=cache.device,
        )

    @property
    def places(self):
        return self.cache.at, self.cache.base, self.cache.to

    def allocate(self, written):
        """The log of inputs, when the first ones come; `written` (b, l, ...) are tensors of their widths and types."""
        if self.inputs is None:
            c = self.cache
            room = (
                c.places + max(c.places, kernels.FEW) + max(1, self.window)
            )  # the logged, the new, and what came before
            size = 2 ** math.ceil(math.log2(room))
            self.inputs = [t.new_zeros(t.shape[0], size, *t.shape[2:]) for t in written]
        return self.inputs

    def extend(self, mixer, written, read):
        """y (b, l, h, p) of l new tokens by the mixer's `scan`: `written` (b, l, …) is what a token leaves behind (Mamba-2's
        convolution mixes in C), and is logged, `read` what it only reads with."""
        c, blank = self.cache, lambda t, l: t.new_zeros(t.shape[0], l, *t.shape[2:])
        self.allocate(written)
        ring = lambda first, l: (
            c.row,
            (first[:, None] + torch.arange(l, device=c.device)) % self.inputs[0].shape[1],
        )  # noqa: E731
        before = lambda at: ring(at - self.window, self.window)  # noqa: E731
        if c.due:
            logged, read_ = (
                [t[ring(c.base, c.due)] for t in self.inputs],
                [blank(t, c.due) for t in read],
            )
            self.h.copy_(
                mixer.scan(*logged, *read_, self.inputs[0][before(c.base)], self.h, c.moving)[2]
            )
        if c.direct:
            y, window, h = mixer.scan(
                *written, *read, self.inputs[0][before(c.at)], self.h, c.lengths
            )
            self.inputs[0][before(c.to)] = window
            self.h.copy_(h)
            return y
        for t, new in zip(self.inputs, written):
            t[ring(c.at, c.new)] = new
        read = [blank(t, c.end).index_put((c.row, c.slot), t) for t in read]
        return mixer.scan(
            *[t[ring(c.to, c.end)] for t in self.inputs],
            *read,
            self.inputs[0][before(c.to)],
            self.h,
            c.real,
        )[0][c.row, c.slot]


def hide_padding(dt, lengths):
    """dt (b, l, ...) with -inf at a row's padding: there Δ = softplus(-inf) = 0, which neither decays nor writes."""
    real = torch.arange(dt.shape[1], device=dt.device) < lengths[:, None]
    return dt.masked_fill(~real.view(*real.shape, *[1] * (dt.dim() - 2)), -torch.inf)


# ---------------------------------------------------------------------------------------------------------------
# Turning attention into Mamba


def interleaved_layers(n_layers, keep):
    """Which layers to replace so that the share `keep` of attention stays, spread evenly.

    Reproduces the paper's sets for 32 layers: keep 0.75 -> 0, 4, 8 …; 0.5 -> 0, 2, 4 …; 0.25 -> all but 3, 7, 11 …
    """
    if not 0 <= keep <= 1:
        raise MilError(f"keep is {keep}, expected a share of attention between 0 and 1")
    count = math.floor(n_layers * (1 - keep) + 0.5)
    return [j * n_layers // count for j in range(count)]


def empty_model(config):
    """A Hybrid whose parameters have shapes and no values yet."""
    with torch.device("meta"):
        return Hybrid(config)


def pack(model):
    """Puts the projections that read the same input one after the other in memory, where decoding reads them in one launch; values and
    names stay (model.to undoes it). Returns the model."""
    for layer in model.layers:
        weights = [getattr(layer.mixer, name).weight for name in layer.mixer.READS]
        if len(weights) > 1:
            for weight, part in zip(
                weights, torch.cat([w.data for w in weights]).split([len(w) for w in weights])
            ):
                weight.data = part
    return model


def replace_attention(model, layers, mixer="mamba2", init="attention", share=False):
    """A student: `model` with attention replaced by `mixer` in `layers`, everything else kept.

    init="attention" copies the layer's projections (W_q -> C, W_k -> B, W_v -> x, W_o -> out; biases, where there are any,
    stay behind), "random" does not. New projections keep PyTorch's own initial values, as in the authors' code. The
    model itself is untouched, and may be a student already: layers converted before keep what they learned. With
    share=True the kept parts are the model's own tensors, not copies. Raises MilError for a layer out of range, listed
    twice, or holding no attention.
    """
    if mixer not in MIXERS[1:]:
        raise MilError(
            f"replace_attention: mixer {mixer!r}, expected one of {', '.join(MIXERS[1:])}"
        )
    if init not in ("attention", "random"):
        raise MilError(f"replace_attention: init {init!r}, expected attention or random")
    mixers, layers = list(model.config.mixers), list(layers)
    for i in layers:
        if not 0 <= i < len(mixers):
            raise MilError(
                f"replace_attention: layer {i} is out of range, the model has layers 0 to {len(mixers) - 1}"
            )
        if mixers[i] != "attention":
            raise MilError(
                f"replace_attention: layer {i} holds {mixers[i]}, not attention: it is already replaced or listed twice"
            )
        mixers[i] = mixer
    dataclasses.replace(
        model.config, mixers=mixers
    )  # checks that the new heads can be cut from the old
    leaving = {
        id(w) for i in layers for w in model.layers[i].mixer.parameters()
    }  # not worth a copy
    as_is = {
        id(w): w for w in model.parameters() if share or id(w) in leaving
    }  # deepcopy takes these for copied already
    student = copy.deepcopy(model, as_is)
    student.config.mixers = mixers  # one object, known to every layer
    for i in layers:
        attention, new = model.layers[i].mixer, CLASSES[mixer](student.config)
        if init == "attention":
            with torch.no_grad():
                for target, source in new.inherit(attention):
                    target.copy_(source.weight)
        weight = attention.q_proj.weight
        student.layers[i].mixer = cast(new, weight.dtype).to(weight.device)
    return student


def check_layers(layers, n_layers):
    """MilError unless `layers` are some of n_layers, each once and in order."""
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < n_layers:
        raise MilError(
            f"layers {', '.join(map(str, layers)) or 'none'}: expected some of 0 to {n_layers - 1}, each once, in rising order"
        )


def keep_layers(model, layers):
    """A smaller model: of `model`'s layers only these, in order, with its embedding, final norm and head (a draft for
    speculative decoding begins so: section 5.5). The model is untouched. MilError for layers that are no such choice."""
    check_layers(layers, len(model.layers))
    small = empty_model(
        dataclasses.replace(
            model.config, n_layers=len(layers), mixers=[model.config.mixers[i] for i in layers]
        )
    )
    weights = model.state_dict()
    source = lambda name: re.sub(r"^layers\.(\d+)", lambda m: f"layers.{layers[int(m[1])]}", name)  # noqa: E731
    small.load_state_dict(
        {name: weights[source(name)].clone() for name in small.state_dict()}, assign=True
    )
    small.tie()
    return small


# --------------------------------------------------------------------------------------------------
# Checkpoints: our folders, Hugging Face's, Meta's, the authors' hybrids, and GGUF files.
# read_config says what one holds; load reads its tensors one by one, under our names.

# Keys of config.json, ours=theirs.
HF_KEYS = """v=vocab_size d=hidden_size n_layers=num_hidden_layers n_heads=num_attention_heads
    n_kv_heads=num_key_value_heads head_dim=head_dim d_ff=intermediate_size tied=tie_word_embeddings
    context=max_position_embeddings norm_eps=rms_norm_eps attention_bias=attention_bias"""
TENSORS = {  # theirs=ours, replaced from left to right
    "mil": "",
    "hf": "model.= self_attn=mixer mamba=mixer",
    "meta": """tok_embeddings=embed_tokens output=lm_head attention_norm=input_layernorm
        attention.wq=mixer.q_proj attention.wk=mixer.k_proj attention.wv=mixer.v_proj
        attention.wo=mixer.o_proj feed_forward.w1=mlp.gate_proj feed_forward.w2=mlp.down_proj
        feed_forward.w3=mlp.up_proj ffn_norm=post_attention_layernorm""",
    "gguf": """blk=layers token_embd=embed_tokens attn_norm=input_layernorm attn_q=mixer.q_proj
        attn_k=mixer.k_proj attn_v=mixer.v_proj attn_output=mixer.o_proj output_norm=norm
        output=lm_head ffn_gate=mlp.gate_proj ffn_down=mlp.down_proj ffn_up=mlp.up_proj
        ffn_norm=post_attention_layernorm""",
}
IDS = "bos_token_id", "eos_token_id", "pad_token_id"
ROPE_KEYS = {"default": (), "linear": ("factor",), "llama3": ROPE_SCALING}
TEXT_FILES = """tokenizer.json tokenizer_config.json chat_template.jinja tokenizer.model vocab.json
    merges.txt special_tokens_map.json added_tokens.json generation_config.json"""


def pairs(table):
    """The rows of a table written as "a=b c=d"."""
    return [pair.split("=") for pair in table.split()]


@contextlib.contextmanager
def naming(path, failure="cannot be read"):
    """Turns an error inside into a MilError of one line that begins with `path`, or with the path
    of another file beside it."""
    try:
        yield
    except MilError as e:
        if str(e).startswith((str(path), f"{Path(path).parent}{os.sep}")):
            raise
        raise MilError(f"{path}: {e}") from e
    except Exception as e:  # libraries raise many kinds
        reason = " ".join(str(getattr(e, "strerror", None) or e).split())[:300]
        if isinstance(e, ImportError):
            reason = f"{e.name} is not installed: pip install transformers (for GGUF also gguf)"
        if isinstance(e, pickle.UnpicklingError):
            reason = "it is truncated, or holds objects, which could run code"
        if isinstance(e, KeyError):
            reason = f"it lacks {reason}"
        with contextlib.suppress(OSError), open(path, "rb") as f:
            if f.read(24) == b"version https://git-lfs.":
                reason = "a pointer of Git LFS, not the file itself; run git lfs pull"
        raise MilError(f"{path}: {failure}: {reason}") from e


def expect(said, **allowed):
    """Raises MilError if a value in `said` is not one of those allowed for its key."""
    for key, values in allowed.items():
        if said.get(key) is not None and said[key] not in values:
            wanted = " or ".join(map(str, values)) or "none"
            raise MilError(f"{key} is {said[key]!r:.99}, expected {wanted}")


def stays_wide(name):
    """Whether a parameter is float32 at least: bf16 would round a decay near 1 to exactly 1."""
    return name.endswith(("A_log", "D", "dt_bias", "dt_proj.bias"))


def cast(model, dtype):
    """Converts the parameters to `dtype`, but those that stay wide to float32 at least."""
    for name, w in model.named_parameters():
        w.data = w.data.to(torch.promote_types(dtype, torch.float32) if stays_wide(name) else dtype)
    return model


def make_directory(path):
    with naming(path, "cannot be made"):
        Path(path).mkdir(parents=True, exist_ok=True)


def write_whole(path, write):
    """Calls write(file) on a temporary neighbour of `path`, then renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, "cannot be written (disk full?)"):
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(model, directory, **notes):
    """Writes the weights and config.json, with `notes` (e.g. the tokenizer) in it. Renaming
    config.json into place is the one moment at which the new checkpoint replaces an old one."""
    directory = Path(directory)
    make_directory(directory)
    name = f"weights-{secrets.token_hex(4)}.pt"
    weights = {k: w.detach().cpu() for k, w in model.named_parameters()}  # a tied head once
    write_whole(directory / name, lambda f: torch.save(weights, f))
    about = {"format": "mil", "config": dataclasses.asdict(model.config), "weights": name}
    text = json.dumps(notes | about, indent=1).encode()
    write_whole(directory / "config.json", lambda f: f.write(text))
    for old in directory.glob(f"weights-{'[0-9a-f]' * 8}.pt"):
        if old.name != name:
            old.unlink(missing_ok=True)


def read_json(path):
    with naming(path, "cannot be read as a JSON object"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def find_checkpoint(name):
    """The path of a folder or file that exists; otherwise that to which a model with a name such as
    owner/model is downloaded from Hugging Face's hub. Raises MilError if there is neither."""
    path = Path(name)
    if os.path.exists(path):
        return path
    if path.is_absolute() or len(path.parts) != 2 or os.path.exists(path.parent):
        raise MilError(f"{name}: no checkpoint here: no such file or folder")
    with naming(name, "no checkpoint here, and no download from Hugging Face's hub"):
        from huggingface_hub import snapshot_download

        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            wanted = ["*.json", *TEXT_FILES.split(), weights]
            path = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
            if any(path.glob(weights)):
                break
    return path


def read_config(path):
    """What a checkpoint says of its model, with the notes of `save`: "config", a Config; "format",
    mil, hf, mambainllama, meta or gguf; "tokenizer", a name (None: files in "folder"); "ids" of the
    tokens that begin, end and pad; "remarks" to print; "weights", the files. Raises MilError if
    there is none, or the model cannot be computed here."""
    path = find_checkpoint(path)
    places = (path, path / "config.json", path / "params.json")
    file = next((place for place in places if place.is_file()), path)
    about = {"tokenizer": None, "ids": {}, "remarks": [], "folder": file.parent}
    with naming(file):
        if file == path and file.suffix != ".gguf":
            found = ", ".join(sorted(os.listdir(path))[:9]) if path.is_dir() else "nothing"
            wanted = "config.json, params.json or a .gguf file"
            raise MilError(f"no checkpoint here: found {found}, expected {wanted}")
        said = {} if file == path else read_json(file)
        if said.get("format") == "mil":
            given = None if said.get("tokenizer") in TEXT_FILES.split() else said.get("tokenizer")
            about |= said | {"config": Config(**said["config"]), "tokenizer": given}
            return about | {"weights": [Path(said["weights"]).name]}
        read = {"params.json": read_meta, "config.json": read_hf}.get(file.name, read_gguf)
        about |= read(said, file)
        tensors = open_tensors(about) if about["config"].tied else {}
        head = read_parts(tensors, "lm_head.weight")
        if head and not torch.equal(head[0], read_parts(tensors, "embed_tokens.weight")[0]):
            about["config"].tied = False
            about["remarks"].append("ties the head, but the files hold one of its own: used")
    return about | {"remarks": [f"{file}: {remark}" for remark in about["remarks"]]}


def read_hf(said, file):
    """Of Hugging Face's config.json, whose spellings and defaults transformers knows."""
    from transformers import AutoConfig

    if "model_type" not in said:
        raise MilError('not a checkpoint: expected "format": "mil" or a "model_type"')
    expect(said, model_type=("llama", "mistral"), hidden_act=("silu", "swish"), mlp_bias=(False,))
    expect(said, quantization_config=())
    for name in said.get("architectures") or []:
        if not name.endswith("ForCausalLM"):
            raise MilError(f"the architecture is {name}, expected a …ForCausalLM")
    theirs = AutoConfig.for_model(**copy.deepcopy(said))
    sizes = {ours: getattr(theirs, key, False) for ours, key in pairs(HF_KEYS)}
    rope = theirs.rope_parameters
    expect(rope, rope_type=tuple(ROPE_KEYS), partial_rotary_factor=(1,))
    sizes["rope_scaling"] = {key: rope[key] for key in ROPE_KEYS[rope["rope_type"]]} or None
    about = {"format": "hf", "remarks": [], "tokenizer": said.get("mil_tokenizer")}
    about["ids"] = {key: said[key] for key in said if key in IDS}
    window = getattr(theirs, "sliding_window", None) or sizes["context"]
    if theirs.model_type == "mistral" and window < sizes["context"]:
        about["remarks"] = [f"attention slides over {window} tokens: taken as the context"]
        sizes["context"] = window
    about["config"] = Config(**sizes, rope_theta=rope["rope_theta"])
    generation, hybrid = (file.with_name(f"{name}_config.json") for name in ("generation", "mamba"))
    if generation.exists():
        ends = read_json(generation).get("eos_token_id")
        about["ids"] |= {} if ends is None else {"eos_token_id": ends}
    if hybrid.exists():
        about |= {"format": "mambainllama", "name": said.get("_name_or_path")}
        with naming(hybrid):
            about["config"] = read_hybrid(read_json(hybrid), about["config"])
    files = [*file.parent.glob("model*.safetensors")] or file.parent.glob("pytorch_model*.bin")
    return about | {"weights": sorted(file.name for file in files) or ["model.safetensors"]}


def hybrid_json(c):
    """The authors' mamba_config.json."""
    keep = [i for i, mixer in enumerate(c.mixers) if mixer == "attention"]
    ssm = dict(expand=1, d_conv=c.d_conv, d_state=c.d_state)
    if "mamba2" in c.mixers:
        ssm |= dict(ngroups=c.n_heads, d_state=c.head_dim, headdim=c.head_dim)
    wide, narrow = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    said = dict(d_model=c.d, n_layer=c.n_layers, vocab_size=c.v, d_inner=wide, d_xb=narrow)
    said |= dict(intermediate_size=c.d_ff, rms_norm_eps=c.norm_eps, hidden_act="silu")
    return said | dict(attn_layers=keep, ssm_cfg=ssm)


def read_hybrid(said, config):
    """`config` with the mixers of the authors' mamba_config.json. What is not checked shows in the
    weights' shapes, is overwritten there (headdim by d_state), or is for untrained layers."""
    ssm = said.get("ssm_cfg") or {}
    mixer = "mamba2" if "ngroups" in ssm else "mamba"
    ssm = {"d_state": 128 if mixer == "mamba2" else 16} | ssm  # their defaults
    layers = range(config.n_layers)
    mixers = ["attention" if i in said["attn_layers"] else mixer for i in layers]
    n = ssm["d_state"] if mixer == "mamba" else config.d_state
    config = dataclasses.replace(config, mixers=mixers, d_state=n, d_conv=ssm.get("d_conv", 4))
    wanted = hybrid_json(config)
    expect(ssm, d_state=(wanted["ssm_cfg"]["d_state"],), ngroups=(config.n_heads,))
    expect(ssm, norm_before_gate=(False,), dt_limit=([0, math.inf],))
    choices = {key: (value,) for key, value in wanted.items() if key != "ssm_cfg"}
    expect(said, **choices | {"hidden_act": ("silu", "swish")})
    return config


def read_meta(said, file):
    """Of Meta's params.json, which leaves out the context, and the factor by which RoPE is scaled:
    32 in Llama 3.2's 1B and 3B, 8 in what is larger (meta-llama/llama-models, issue 241)."""
    defaults = dict(vocab_size=-1, multiple_of=256, ffn_dim_multiplier=1, norm_eps=1e-5)
    defaults |= dict(n_kv_heads=said["n_heads"], rope_theta=10000, use_scaled_rope=False)
    said = defaults | {key: value for key, value in said.items() if value is not None}
    expect(said, quantization_args=(), lora_args=())
    files = sorted(path.name for path in file.parent.glob("consolidated.*.pth"))
    about = {"format": "meta", "folder": file.parent, "weights": files or ["consolidated.00.pth"]}
    tensors = open_tensors(about)
    d = said["dim"]
    v = said["vocab_size"]
    if v == -1:  # Llama 3's embedding is cut by words, Llama 2's by columns
        rows, columns = read_parts(tensors, "embed_tokens.weight")[0].shape
        v = rows * len(files) if columns == d else rows
    d_ff = math.ceil(int(said["ffn_dim_multiplier"] * int(8 * d / 3)) / said["multiple_of"])
    sizes = {key: said[key] for key in ("n_layers", "n_heads", "n_kv_heads", "norm_eps")}
    sizes |= dict(v=v, d=d, d_ff=d_ff * said["multiple_of"], tied="lm_head.weight" not in tensors)
    scaling = None
    context = 8192 if said["rope_theta"] >= 500000 else 4096
    remark = f"does not state the context, taken as {context}"
    if said["use_scaled_rope"]:
        factor = said.get("rope_scaling_factor", 8 if d >= 4096 else 32)
        context = 131072
        scaling = dict(zip(ROPE_SCALING, (factor, 1.0, 4.0, 8192), strict=True))
        remark = f"does not state the context, taken as {context}, and RoPE's factor, as {factor}"
    sizes |= dict(context=context, rope_theta=float(said["rope_theta"]), rope_scaling=scaling)
    return about | {"config": Config(**sizes), "remarks": [remark]}


def read_gguf(said, file):
    """Of a GGUF file. Its factors for RoPE are of Llama 3's scaling; the largest is `factor`."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    about = read_hf(load_gguf_checkpoint(file)["config"], file)
    about |= {"format": "gguf", "folder": file.parent, "weights": [file.name]}
    kind = GGUFReader(file).fields.get("llama.rope.scaling.type")
    expect({"rope.scaling.type": kind and kind.contents()}, **{"rope.scaling.type": ("none",)})
    for factors in read_parts(open_tensors(about), "rope_freqs.weight"):
        scaling = zip(ROPE_SCALING, (factors.max().item(), 1.0, 4.0, 8192), strict=True)
        about["config"].rope_scaling = dict(scaling)
    return about


def open_file(path):
    """The names of a file's tensors, and a function that reads one. No code in a file runs."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        file = safe_open(path, "pt")
        return file.keys(), file.get_tensor
    if path.suffix == ".gguf":
        from gguf import GGUFReader, dequantize

        tensors = {t.name: (t.data, t.tensor_type) for t in GGUFReader(path).tensors}
        return tensors, lambda name: torch.from_numpy(dequantize(*tensors[name]).copy())
    mapped = zipfile.is_zipfile(path)  # what torch < 1.6 wrote is no zip
    tensors = torch.load(path, "cpu", weights_only=True, mmap=mapped)
    if not isinstance(tensors, dict):
        raise MilError(f"holds a {type(tensors).__name__}, expected tensors by their names")
    return tensors, tensors.get


def open_tensors(about):
    """{our name: [(path, their name, function that reads it), one a shard]} of a checkpoint."""
    tensors = {}
    for path in (about["folder"] / name for name in about["weights"]):
        with naming(path, "not found, truncated or damaged; the checkpoint is incomplete"):
            names, read = open_file(path)
            for theirs in names:
                ours = theirs
                for old, new in pairs(TENSORS[about["format"].replace("mambainllama", "hf")]):
                    ours = ours.replace(old, new)
                if ours in tensors and about["format"] != "meta":
                    raise MilError(f"holds {theirs}, and so does {tensors[ours][0][0]}")
                tensors.setdefault(ours, []).append((path, theirs, read))
    return tensors


def read_parts(tensors, name):
    return [read(theirs) for _, theirs, read in tensors.get(name, [])]


def read_tensor(about, tensors, name, shape, device):
    """Our tensor `name` on the device. Of Meta's shards each holds a part along one axis, in which
    it falls short, or a copy of the whole."""
    parts = read_parts(tensors, name)
    kind = getattr(parts[0], "dtype", "no tensor") if parts else "missing"
    if kind not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise MilError(f"{name} is {kind}, expected a tensor in float32, float16 or bfloat16")
    axes = [i for i, n in enumerate(parts[0].shape[: len(shape)]) if n != shape[i]]
    w = torch.cat([part.to(device) for part in parts], axes[0]) if axes else parts[0].to(device)
    if w.shape != shape:
        raise MilError(f"{name} is {tuple(w.shape)}, expected {tuple(shape)}")
    if about["format"] in ("meta", "gguf") and name.endswith(("q_proj.weight", "k_proj.weight")):
        half = about["config"].head_dim // 2  # RoPE's pairs (0, 1), (2, 3) … become (i, i + half)
        w = w.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    if about["format"] == "mambainllama" and name.endswith("dt_proj.bias"):
        w = w * 2  # the authors' layer adds it twice
    return w


def load(path, device=None, dtype=None):
    """The model of a checkpoint (see read_config), in eval mode, on `device` (CPU) and in `dtype`
    (the file's; float32 at least for what makes up Δ and A). Tensors go there one by one. Raises
    MilError if one is missing, too many, or not as the configuration says."""
    about = read_config(path)
    tensors, model = open_tensors(about), empty_model(about["config"])
    for name, empty in [*model.named_parameters()]:
        with naming(tensors[name][0][0] if name in tensors else about["folder"]):
            w = read_tensor(about, tensors, name, empty.shape, device or "cpu")
        tensors.pop(name)
        kind = dtype or w.dtype
        kind = torch.promote_types(kind, torch.float32) if stays_wide(name) else kind
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, nn.Parameter(w.to(kind)))
    model.tie()
    for name, ((path, theirs, _), *_) in tensors.items():  # RoPE's frequencies are in old files
        if not name.endswith(("inv_freq", "rope.freqs", "rope_freqs.weight", "lm_head.weight")):
            raise MilError(f"{path}: holds {theirs}, which the configuration does not have")
    return model.eval()


def export(source, target, format, dtype=None):
    """Writes the checkpoint `source` to a new folder `target`: as "mil"; as "hf", if there is
    attention alone; as "mambainllama", the authors' layout, if there is one kind of Mamba. In
    `dtype` (the file's). Tokenizer files go along. If that fails, nothing is left."""
    about, target = read_config(source), Path(target).absolute()
    kinds = set(about["config"].mixers) - {"attention"}
    fits = {"mil": True, "hf": not kinds, "mambainllama": kinds in ({"mamba"}, {"mamba2"})}
    if not fits.get(format):
        holds = ", ".join(sorted(set(about["config"].mixers)))
        wanted = "hf is for attention alone, mambainllama for one kind of Mamba"
        raise MilError(f"{source}: holds {holds}; --format {wanted}")
    if target.is_dir() and any(target.iterdir()):
        raise MilError(f"{target}: is not empty; give a new folder")
    model = load(source, dtype=dtype)
    make_directory(target)
    try:
        with naming(target, "cannot be written (disk full?)"):
            for name in TEXT_FILES.split():
                if (about["folder"] / name).exists():
                    shutil.copyfile(about["folder"] / name, target / name)
            if format == "mil":
                save(model, target, tokenizer=about["tokenizer"], ids=about["ids"])
            else:
                write_hf(model, target, about)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def write_hf(model, folder, about):
    """Hugging Face's files or, with any Mamba, the authors'. transformers 4 reads them, too."""
    from huggingface_hub import save_torch_state_dict

    c = model.config
    weights = {}
    for name, w in model.named_parameters():
        attention = name.startswith("layers") and c.mixers[int(name.split(".")[1])] == "attention"
        theirs = name.replace("mixer", "self_attn" if attention else "mamba")
        theirs = theirs if name == "lm_head.weight" else f"model.{theirs}"
        halved = name.endswith("dt_proj.bias")  # their layer adds it twice
        weights[theirs] = w.data / 2 if halved else w.data
    said = {theirs: getattr(c, ours) for ours, theirs in pairs(HF_KEYS)}
    said |= dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")
    said |= dict.fromkeys(IDS) | about["ids"] | {"mil_tokenizer": about["tokenizer"]}
    said |= dict(rope_theta=c.rope_theta, torch_dtype=str(model.embed_tokens.weight.dtype)[6:])
    if c.rope_scaling:
        kind = "llama3" if len(c.rope_scaling) > 1 else "linear"
        said["rope_scaling"] = {"rope_type": kind, **c.rope_scaling}
    if set(c.mixers) != {"attention"}:  # their loader wants a head, and a Llama's name
        weights["lm_head.weight"] = model.lm_head.weight.data.clone()
        said["_name_or_path"] = about.get("name") or str(folder)
        (folder / "mamba_config.json").write_text(json.dumps(hybrid_json(c), indent=1))
    (folder / "config.json").write_text(json.dumps(said, indent=1))
    save_torch_state_dict(weights, folder)
    for file in folder.glob("*.safetensors"):  # which others may not read
        shutil.copymode(folder / "config.json", file)


def main(argv):
    parser = Parser(prog="mil.py", description="Write a checkpoint in another layout.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("source", help="a checkpoint of any kind, or a name such as owner/model")
    parser.add_argument("target", help="the folder to make")
    parser.add_argument("--format", default="hf", help="hf (Hugging Face's), mambainllama or mil")
    types = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=types, help="of the weights (the file's)")
    s = parser.parse_args(argv)
    for line in read_config(s.source)["remarks"]:
        print(f"note: {line}", file=sys.stderr)
    export(s.source, s.target, s.format, getattr(torch, s.dtype) if s.dtype else None)
    print(f"{s.target}: written as {s.format}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MilError as e:
        sys.exit(f"error: {e}")
