"""The Mamba in the Llama: a stack of layers in which a Mamba can inherit attention's weights.

    attention without softmax   h_t = h_{t-1} + v_t k_tᵀ                        y_t = h_t q_t
    Mamba                       h_t = exp(Δ_t A) ∘ h_{t-1} + (Δ_t x_t) B_tᵀ     y_t = h_t C_t + D ∘ x_t

The two lines differ by a step Δ and a decay A, so a trained attention layer hands its projections
over (section 2 and Figure 1 of arXiv 2408.15237; `replace_attention` does it):

    query W_q -> C    key W_k -> B    value W_v -> x    output W_o -> out_proj
    new, learned in distillation: Δ, A, a causal convolution of width 4, a gate z, a skip D
    left behind: the softmax with its scale 1/√p, and RoPE (the recurrence knows the order)

A Llama is the stack with attention in every layer; there is no other model class. Letters are those
of kernels.py: b batch, l length, d width, h query heads, g kv heads, p channels per head, n state
size per head, w width of the convolution, v vocabulary. In attention p is head_dim and n = p.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pickle
import re
import secrets
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
    """An error to show the user: the file or flag, what was found, what was expected."""


class Parser(argparse.ArgumentParser):
    """Raises MilError if a command line is wrong."""

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
        for name in (
            "v",
            "d",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "context",
            "d_state",
            "d_conv",
        ):
            least = 0 if name == "head_dim" else 1
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise MilError(
                    f"config: {name} is {getattr(self, name)!r}, expected a whole number of at least {least}"
                )
        for name in ("rope_theta", "norm_eps"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise MilError(
                    f"config: {name} is {getattr(self, name)!r}, expected a number above 0"
                )
        self.mixers = list(self.mixers) or ["attention"] * self.n_layers
        if not self.head_dim:
            if self.d % self.n_heads:
                raise MilError(
                    f"config: width d {self.d} is not divisible by n_heads {self.n_heads}; give head_dim"
                )
            self.head_dim = self.d // self.n_heads
        if self.head_dim % 2:
            raise MilError(
                f"config: head_dim is {self.head_dim}, but RoPE turns channels in pairs: expected an even number"
            )
        if self.n_heads % self.n_kv_heads:
            raise MilError(
                f"config: n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}: "
                f"every kv head serves the same number of query heads"
            )
        if len(self.mixers) != self.n_layers:
            raise MilError(
                f"config: {len(self.mixers)} mixers for {self.n_layers} layers, expected one per layer"
            )
        for i, mixer in enumerate(self.mixers):
            if mixer not in MIXERS:
                raise MilError(
                    f"config: layer {i} has the mixer {mixer!r}, expected one of {', '.join(MIXERS)}"
                )
        if self.rope_scaling is not None and (
            sorted(self.rope_scaling) not in (sorted(ROPE_SCALING), ["factor"])
            or not all(isinstance(x, (int, float)) and x > 0 for x in self.rope_scaling.values())
        ):
            raise MilError(
                f"config: rope_scaling is {self.rope_scaling}, expected numbers above 0 for {', '.join(ROPE_SCALING)} (Llama 3.1's), "
                f"or for factor alone (linear)"
            )
        if (
            len(self.rope_scaling or ()) > 1
            and self.rope_scaling["low_freq_factor"] >= self.rope_scaling["high_freq_factor"]
        ):
            raise MilError(
                f"config: rope_scaling is {self.rope_scaling}, expected its low_freq_factor below its high_freq_factor"
            )
        if "mamba" in self.mixers and self.n_kv_heads * self.head_dim % self.d_state:
            raise MilError(
                f"config: d_state {self.d_state} does not divide the kv width {self.n_kv_heads * self.head_dim} "
                f"(n_kv_heads × head_dim), so Mamba's heads cannot be cut from attention's"
            )


# --------------------------------------------------------------------------------------------------
# Layers. A weight is used in the type of the activations (float32 masters, bf16 arithmetic). Its
# gradient is summed in float32 and rounded once to that type: by 2^-9 of it, which AdamW does not
# notice. Sums over the parts of a batch are float32.


def decoding(x, *weights):
    """Whether x (b, l, k) are so few tokens that the kernels for decoding take them."""
    eager = x.dim() == 3 and not torch.compiler.is_compiling()
    return eager and kernels.few(x, x.shape[1], *weights)


class Linear(nn.Linear):
    """x Wᵀ + bias in x's type, added to `onto` if that is given."""

    def forward(self, x, onto=None):
        y = self.product(x, onto)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def product(self, x, onto=None):
        """x Wᵀ without the bias."""
        if decoding(x, self.weight):
            return kernels.linear(x, self.weight, onto=onto)
        y = F.linear(x, self.weight.to(x.dtype))
        return y if onto is None else onto + y

    def parts(self, x, sizes):
        """x Wᵀ, split along its last axis."""
        if decoding(x, self.weight):
            return kernels.linear(x, self.weight).split(sizes, dim=-1)
        weight, pad = self.weight.to(x.dtype), -sum(sizes) % 8 if x.is_cuda else 0
        if pad:  # a GPU's fast kernels want rows that begin at multiples of 16 bytes
            weight = F.pad(weight, (0, 0, 0, pad))
        return F.linear(x, weight).split([*sizes, pad], dim=-1)[:-1]


def project(u, *parts):
    """u through several projections; in decoding one launch if they lie side by side (`pack`)."""
    weights = [part.weight for part in parts]
    if not decoding(u, *weights):
        return [part(u) for part in parts]
    ys = kernels.linears(u, *weights)
    return [y if part.bias is None else y + part.bias for y, part in zip(ys, parts, strict=True)]


class RMSNorm(nn.RMSNorm):
    """x / √(mean of x² + eps) ∘ weight over the last axis, in the wider of both types."""

    def forward(self, x):
        if decoding(x, self.weight):
            return kernels.rms_norm(x, self.weight, self.eps)
        f = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(f), self.normalized_shape, self.weight.to(f), self.eps)
        return y.to(x.dtype)


def wider(t):
    """`t` in float32, or in float64 if it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def rope_angles(config, pos):
    """cos and sin (b, 1, l, p / 2), float32, of RoPE's angles at the positions pos (b, l).

    The frequencies are Hugging Face's to the last bit. Llama 3.1's scaling divides slow ones by
    `factor`, keeps fast ones, and goes smoothly from one to the other. Linear scaling divides all.
    """
    i = torch.arange(0, config.head_dim, 2, device=pos.device).float()
    freq = 1 / config.rope_theta ** (i / config.head_dim)
    scaling = config.rope_scaling or {"factor": 1}
    kept = torch.zeros_like(freq)
    if len(scaling) > 1:
        # turns within the length of the first training
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi / freq)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    freq = (1 - kept) * freq / scaling["factor"] + kept * freq
    angle = pos[:, None, :, None].float() * freq
    return angle.cos(), angle.sin()


def rotate(q, angles):
    """RoPE (2104.09864): turns the channel pairs (i, i + p/2) of q (b, l, h, p), in float32."""
    cos, sin = (t.transpose(1, 2) for t in angles)  # (b, l, 1, p / 2)
    q1, q2 = wider(q).chunk(2, dim=-1)
    return torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], dim=-1).to(q.dtype)


def sdpa(q, k, v, mask=None):
    """PyTorch's attention of q (b, l, h, p) over k and v (b, ·, g, p); causal without a mask."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    how = dict(attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)


class Documents:
    """Rows that hold several documents one after the other. Nothing passes from one to the next.

    pos (b, l), integers on the CPU, is the place of each token in its document, 0 where a row
    begins. On `device`: pos; bounds, where each document begins in the flattened batch, and the
    end; mask (b, 1, l, l), who sees whom, or None if flash attention takes bounds.
    """

    def __init__(self, pos, device, dtype=torch.float32):
        begins = (pos.flatten() == 0).nonzero()[:, 0]
        bounds = F.pad(begins, (0, 1), value=pos.numel()).int()
        pos = pos.int()
        if device.type == "cuda":
            pos, bounds = (t.pin_memory().to(device, non_blocking=True) for t in (pos, bounds))
        self.pos, self.bounds, self.mask = pos, bounds, None
        torch._dynamo.maybe_mark_dynamic(bounds, 0)  # another number of documents compiles nothing
        if device.type != "cuda" or dtype.itemsize > 2:
            number, i = (pos == 0).cumsum(1), torch.arange(pos.shape[1], device=device)
            self.mask = ((number[:, :, None] == number[:, None]) & (i[:, None] >= i))[:, None]

    def attend(self, q, k, v):
        """Attention within documents: q (b, l, h, p), k and v (b, l, g, p) -> (b, l, h, p)."""
        if self.mask is not None:
            return sdpa(q, k, v, self.mask)
        flat, l = [t.flatten(0, 1) for t in (q, k, v)], q.shape[1]
        # What varlen_attn calls, without its time in Python: no dropout, causal, no debug mask.
        flash = torch.ops.aten._flash_attention_forward
        y, *_ = flash(*flat, self.bounds, self.bounds, l, l, 0.0, True, False)
        return y.view(q.shape)


# --------------------------------------------------------------------------------------------------
# Mixers: what moves information between tokens.
#
#   forward(u, angles, state, docs, onto)
#                        the mixer's formula, added to `onto`. u (b, l, d) is normed; angles are
#                        RoPE's; state is this layer's part of the Cache, None in training; docs are
#                        Documents, None if every row is one
#   inherit(attention)   pairs (our tensor, attention's projection) that begin equal
#   new_state(cache)     this layer's part of a Cache
#   READS                the projections of the input, which `pack` lays side by side
#
# Mamba and Mamba2 also have `scan`, in PyTorch or by a kernel, and `replay`, its form in decoding.


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE."""

    READS = "q_proj", "k_proj", "v_proj"

    def __init__(self, config):
        super().__init__()
        self.config, bias = config, config.attention_bias
        wide, narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.d, wide, bias=bias)
        self.k_proj = Linear(config.d, narrow, bias=bias)
        self.v_proj = Linear(config.d, narrow, bias=bias)
        self.o_proj = Linear(wide, config.d, bias=bias)

    def forward(self, u, angles, state=None, docs=None, onto=None):
        qkv = project(
            u,
            self.q_proj,  # (b, l, h·p)
            self.k_proj,  # (b, l, g·p)
            self.v_proj,  # (b, l, g·p)
        )
        q, k, v = (t.unflatten(2, (-1, self.config.head_dim)) for t in qkv)  # (b, l, heads, p)
        if state is not None:
            y = state.attend(q, k, v, angles)
        elif docs is not None:
            y = docs.attend(rotate(q, angles), rotate(k, angles), v)
        else:
            y = sdpa(rotate(q, angles), rotate(k, angles), v)
        return self.o_proj(y.flatten(2), onto)

    def new_state(self, cache):
        return AttentionState(cache, self.config, self.q_proj.weight.dtype)


def initial_dt_bias(n):
    """The bias with which Δ = softplus(bias) is log-uniform in [1e-3, 1e-1], as in Mamba."""
    low, high = math.log(1e-3), math.log(1e-1)
    delta = torch.exp(torch.empty(n, dtype=torch.float32).uniform_(low, high))
    return delta + torch.log(-torch.expm1(-delta))  # the inverse of softplus


class Mamba(nn.Module):
    """Mamba (S6) in attention's place: heads of n = p = d_state, a Δ per channel.

    Parameters are named and shaped as in the released checkpoints: out_proj and C_proj (h·p),
    in_proj_x and B_proj (g·p). The convolution reads x alone, with weights for each of the h·p
    channels. If d_state is less than head_dim, attention's heads are cut into smaller ones, which
    for grouped heads pairs other slices than attention did (as in the released models).
    """

    READS = "in_proj_x", "in_proj_z", "B_proj", "C_proj", "dt_proj_down"

    def __init__(self, config):
        super().__init__()
        self.config = config
        wide, narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.dt_rank = rank = math.ceil(config.d / 16)
        self.in_proj_x = Linear(config.d, narrow, bias=False)
        self.in_proj_z = Linear(config.d, wide, bias=False)
        self.B_proj = Linear(config.d, narrow, bias=False)
        self.C_proj = Linear(config.d, wide, bias=False)
        self.dt_proj_down = Linear(config.d, rank, bias=False)
        self.dt_proj = Linear(rank, wide, bias=True)
        self.conv1d = nn.Conv1d(wide, wide, config.d_conv, groups=wide)
        self.out_proj = Linear(wide, config.d, bias=False)
        # Mamba's own initial values of what attention does not give; A = -(1 .. n)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias = nn.Parameter(initial_dt_bias(wide))
        n = torch.arange(1, config.d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(n.log().repeat(wide, 1))
        self.D = nn.Parameter(torch.ones(wide))

    def inherit(self, attention):
        return [
            (self.C_proj.weight, attention.q_proj),
            (self.B_proj.weight, attention.k_proj),
            (self.in_proj_x.weight, attention.v_proj),
            (self.out_proj.weight, attention.o_proj),
        ]

    def heads(self, t):
        """(b, l, h·p) -> (b, l, h, p)."""
        return t.unflatten(-1, (-1, self.config.d_state))

    def forward(self, u, angles, state=None, docs=None, onto=None):
        x, z, B, C, dt = project(
            u,
            self.in_proj_x,  # (b, l, g·p)
            self.in_proj_z,  # (b, l, h·p)
            self.B_proj,  # (b, l, g·n)
            self.C_proj,  # (b, l, h·n)
            self.dt_proj_down,  # (b, l, rank)
        )
        dt = self.dt_proj.product(dt)  # (b, l, h·p); the scan adds its bias
        x, dt, B, C, z = (self.heads(t) for t in (x, dt, B, C, z))  # (b, l, heads, p or n)
        if state is None:
            y, _, _ = self.scan(x, dt, B, C, z, docs=docs)
        else:
            y = state.extend(self, (x, dt, B), (C, z))
        return self.out_proj(y.flatten(2), onto)

    def scan(self, x, dt, B, C, z, window=None, h0=None, lengths=None, docs=None):
        """The convolution and the scan, of which lengths (b,) tokens of each row are real.

        Returns y (b, l, h, p), the convolution's last inputs, and the last state.
        """
        n, w = self.config.d_state, self.config.d_conv
        pos = None if docs is None else docs.pos
        dt = dt if lengths is None else hide_padding(dt, lengths)
        weight, bias = self.conv1d.weight.view(-1, n, w), self.conv1d.bias.view(-1, n)
        x, window = causal_conv(x, weight, bias, window, lengths, pos)  # g heads -> h heads
        A = -torch.exp(wider(self.A_log)).view(-1, n, n)  # (h, p, n)
        bias = self.heads(self.dt_proj.bias)
        y, h = ssm_scan(x, dt, A, B, C, self.heads(self.D), z, bias, h0, pos)
        return y, window, h

    def replay(self, x, dt, B, C, z, *state):
        weights = self.conv1d.weight, self.conv1d.bias, self.A_log, self.dt_proj.bias, self.D
        return kernels.replay(x, dt, B, C, z, *state, *weights)

    def new_state(self, cache):
        n = self.config.d_state
        shape = self.config.n_heads * self.config.head_dim // n, n, n
        return MambaState(cache, self.config.d_conv - 1, shape, self.out_proj.weight.dtype)


class Mamba2(nn.Module):
    """Mamba-2 (SSD) in attention's place: attention's own heads, n = p = head_dim, a Δ per head.

    in_proj's rows are ordered z, x, B, C, dt as in the released checkpoints. The convolution reads
    x, B and C. A norm per head follows the gate.
    """

    READS = ("in_proj",)

    def __init__(self, config):
        super().__init__()
        self.config, h = config, config.n_heads
        wide, narrow = h * config.head_dim, config.n_kv_heads * config.head_dim
        mixed = 2 * narrow + wide
        self.sizes = [wide, mixed, h]  # z | x, B, C | dt
        self.in_proj = Linear(config.d, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, config.d_conv, groups=mixed)
        self.norm = nn.RMSNorm(wide, eps=1e-5)  # holds the weight; normalised per head below
        self.out_proj = Linear(wide, config.d, bias=False)
        # Mamba-2's own initial values of what attention does not give; A uniform in [1, 16]
        self.dt_bias = nn.Parameter(initial_dt_bias(h))
        self.A_log = nn.Parameter(torch.empty(h, dtype=torch.float32).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(h))

    def inherit(self, attention):
        wide, mixed, h = self.sizes
        narrow = (mixed - wide) // 2
        _, x, B, C, _ = self.in_proj.weight.split([wide, narrow, narrow, wide, h])
        return [
            (C, attention.q_proj),
            (B, attention.k_proj),
            (x, attention.v_proj),
            (self.out_proj.weight, attention.o_proj),
        ]

    def forward(self, u, angles, state=None, docs=None, onto=None):
        z, xBC, dt = self.in_proj.parts(u, self.sizes)  # (b, l, h·p) (b, l, 2 g·p + h·p) (b, l, h)
        if state is None:
            y, _, _ = self.scan(xBC, dt, z, docs=docs)
        else:
            y = state.extend(self, (xBC, dt), (z,))
        return self.out_proj(y.flatten(2), onto)

    def scan(self, xBC, dt, z, window=None, h0=None, lengths=None, docs=None):
        """As Mamba's; gate and norm included."""
        g, h, p = self.config.n_kv_heads, self.config.n_heads, self.config.head_dim
        pos = None if docs is None else docs.pos
        dt = dt if lengths is None else hide_padding(dt, lengths)
        # To the convolution this is one head of all the channels.
        window = None if window is None else window.unsqueeze(2)  # (b, w - 1, 1, channels)
        weight, bias = self.conv1d.weight.transpose(0, 1), self.conv1d.bias[None]
        xBC, window = causal_conv(xBC.unsqueeze(2), weight, bias, window, lengths, pos)
        x, B, C = xBC.view(*dt.shape[:2], -1, p).split([g, g, h], dim=2)  # (b, l, heads, p)
        A = -torch.exp(wider(self.A_log))
        y, state = ssm_scan(x, dt, A, B, C, self.D, None, self.dt_bias, h0, pos)
        y = wider(y) * F.silu(wider(z)).view(y.shape)
        y = F.rms_norm(y, (p,), eps=self.norm.eps) * self.norm.weight.view(h, p)
        return y.to(z.dtype), window.squeeze(2), state

    def replay(self, xBC, dt, z, *state):
        weights = self.conv1d.weight, self.conv1d.bias, self.A_log, self.dt_bias, self.D
        z, norm = z.unflatten(2, (self.config.n_heads, -1)), (self.norm.weight, self.norm.eps)
        return kernels.replay(xBC, dt, None, None, z, *state, *weights, *norm)

    def new_state(self, cache):
        shape = self.config.n_heads, self.config.head_dim, self.config.head_dim
        return MambaState(cache, self.config.d_conv - 1, shape, self.out_proj.weight.dtype)


class NoMixer(nn.Module):
    """No information moves between tokens (the ablation of the paper's Table 9)."""

    READS = ()

    def __init__(self, config):
        super().__init__()

    def inherit(self, attention):
        return []

    def forward(self, u, angles, state=None, docs=None, onto=None):
        return torch.zeros_like(u) if onto is None else onto

    def new_state(self, cache):
        return None


CLASSES = {"attention": Attention, "mamba": Mamba, "mamba2": Mamba2, "none": NoMixer}
MIXERS = tuple(CLASSES)  # attention, and what may replace it


# --------------------------------------------------------------------------------------------------
# The stack


class MLP(nn.Module):
    """SwiGLU (2002.05202): down(silu(gate u) ∘ up u)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.d, config.d_ff, bias=False)
        self.up_proj = Linear(config.d, config.d_ff, bias=False)
        self.down_proj = Linear(config.d_ff, config.d, bias=False)

    def forward(self, u, onto=None):
        if decoding(u, self.up_proj.weight):
            inside = kernels.linear(u, self.up_proj.weight, gate=self.gate_proj.weight)
        else:
            inside = F.silu(self.gate_proj(u)) * self.up_proj(u)
        return self.down_proj(inside, onto)


class Block(nn.Module):
    """A Llama layer, whatever its mixer: u + mixer(norm(u)), then u + mlp(norm(u))."""

    def __init__(self, config, mixer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d, eps=config.norm_eps)
        self.mixer = CLASSES[mixer](config)
        self.post_attention_layernorm = RMSNorm(config.d, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, u, angles, state=None, docs=None):
        u = self.mixer(self.input_layernorm(u), angles, state, docs, onto=u)
        return self.mlp(self.post_attention_layernorm(u), onto=u)


class Hybrid(nn.Module):
    """The stack; config.mixers[i] says what layer i is. A Llama if every mixer is attention.

    It computes in the type of its weights, or in `compute` if that is set.
    """

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
        """Normal 0.02 for every projection, less for those that write to the residual (GPT-2)."""
        for name, module in self.named_modules():
            if name.endswith("dt_proj") or not isinstance(module, (nn.Linear, nn.Embedding)):
                continue  # dt_proj has its own initial values
            last = name.endswith(("o_proj", "out_proj", "down_proj"))
            module.weight.normal_(std=0.02 / math.sqrt(2 * self.config.n_layers) if last else 0.02)

    def forward(self, tokens, cache=None, lengths=None, docs=None):
        """Logits (b, l, v) of the token after each of tokens (b, l). See `hidden`."""
        return self.lm_head(self.hidden(tokens, cache, lengths, docs))

    def hidden(self, tokens, cache=None, lengths=None, docs=None):
        """The stack without its head: tokens (b, l) -> (b, l, d).

        With a cache the tokens follow what it holds, and it holds them too afterwards. lengths (b,)
        says how many of each row's tokens are real, if rows are padded on the right; results at
        padded places are undefined. docs are the Documents of the rows, None if each is one. Raises
        MilError for lengths without a cache and docs with one.
        """
        if (lengths if cache is None else docs) is not None:
            raise MilError("lengths are for a cache, and docs for rows without one; leave them out")
        states = [None] * len(self.layers)
        if cache is not None:
            cache.open(*tokens.shape, lengths)
            states = cache.states
        u, angles = self.start(tokens, cache, docs)
        for layer, state in zip(self.layers, states, strict=True):
            u = layer(u, angles, state, docs)
        if cache is not None:
            cache.close()
        return self.norm(u)

    def start(self, tokens, cache=None, docs=None):
        """What the first layer reads: the embedding (b, l, d), and RoPE's angles."""
        u = self.embed_tokens(tokens)
        if cache is not None:
            angles = cache.angles
        elif docs is not None:
            angles = rope_angles(self.config, docs.pos)
        else:
            pos = torch.arange(tokens.shape[1], device=tokens.device)
            angles = rope_angles(self.config, pos[None])
        return u if self.compute is None else u.to(self.compute), angles


# --------------------------------------------------------------------------------------------------
# The cache: what decoding remembers


class Cache:
    """What a model remembers of `batch` rows of at most `size` tokens.

        a row's tokens   The mamba in the llama sat | on the hat
        attention        k v k v k v k v k v k v    | k v k v k v    a key and a value a token
        Mamba            h ─────────────────────────┘ x x x x x x    one state, and inputs after it

    With undo=True the last pass (of at most FEW tokens a row) can be taken back, whole or in part,
    with no copy of a state (section 4 and Algorithm 2 of the paper): its inputs are `pending`. The
    next pass first takes those that `keep` left into the state, then reads its own tokens from
    there. Otherwise, and in a longer pass, all tokens go into the state at once.

    Per row, at (b,) is the number of tokens read, base (b,) of those in the states. On a GPU a pass
    of a few tokens is made of kernels which read both where they lie (`fused`), so that it can be
    captured in a CUDA graph. Elsewhere PyTorch does the same with the mixers' own scan.
    """

    def __init__(self, model, batch, size, undo=False):
        c, self.weight = model.config, model.embed_tokens.weight
        self.size, self.undo, self.device = size, undo, self.weight.device
        self.at, self.base = torch.zeros(2, batch, dtype=torch.long, device=self.device)
        self.used = 0  # no row holds more tokens
        everywhere = torch.arange(size, device=self.device)[None]
        self.turns = rope_angles(c, everywhere) if "attention" in c.mixers else ()
        self.states = [layer.mixer.new_state(self) for layer in model.layers]
        # What the kernels hold in registers, and mixers that they know.
        self.small = max(c.head_dim, c.d_state) <= 128 and c.n_heads // c.n_kv_heads <= 16
        for layer, state in zip(model.layers, self.states, strict=True):
            self.small &= not isinstance(state, MambaState) or hasattr(layer.mixer, "replay")

    def fusable(self, l):
        """Whether a pass of l real tokens a row is made of the kernels for decoding."""
        return self.small and kernels.few(self.weight, l)

    def open(self, b, l, lengths=None):
        """Begins a pass of l tokens a row, of which lengths (b,) are real (None: all).

        Sets what layers read: pos (b, l); angles; new, the tokens a row; counts, those that are
        real; direct, whether they go into the states; to (b,), where the states stand afterwards.
        """
        if b != len(self.at):
            raise MilError(f"cache: {b} rows of tokens for a cache of {len(self.at)} rows")
        if self.used + l > self.size:
            told = f"{self.used} of {self.size} places are used"
            raise MilError(f"cache: {l} more tokens do not fit: {told}")
        self.new, self.fused = l, lengths is None and self.fusable(l)
        self.lengths = lengths if lengths is None else torch.as_tensor(lengths, device=self.device)
        self.counts = l if lengths is None else self.lengths
        self.direct = not self.undo or l > kernels.FEW
        self.to = self.at + self.counts if self.direct else self.at
        self.pos = self.at[:, None] + torch.arange(l, device=self.device)
        self.angles = [t[0, 0, self.pos][:, None] for t in self.turns]  # (b, 1, l, p / 2)

    def close(self):
        self.base.copy_(self.to)
        self.at += self.counts
        self.used = self.used + self.new if self.lengths is None else int(self.at.max())

    def keep(self, lengths, most=None):
        """Each row keeps its first `lengths` (b,) tokens, and the last pass's others are forgotten.

        If `most`, the greatest of them, is given, nothing is checked and the device is not waited
        for. Otherwise raises MilError if a row does not hold so many, or its states hold more.
        """
        if most is None:
            lengths = torch.as_tensor(lengths, device=self.device)
            most = int(lengths.max())
            stateless = not any(isinstance(state, MambaState) for state in self.states)
            first = torch.zeros_like(self.base) if stateless else self.base
            if ((lengths < first) | (lengths > self.at)).any():
                told = f"rows hold {self.at.tolist()} tokens and can go back to {first.tolist()}"
                raise MilError(f"cache: {told}, not to {lengths.tolist()}")
        self.at.copy_(lengths)
        self.used = most

    def clear(self):
        """Forgets everything."""
        for state in self.states:
            if isinstance(state, MambaState):
                for t in (state.h, *(state.inputs or ())):
                    t.zero_()
        self.keep(torch.zeros_like(self.at), 0)
        self.base.zero_()


class AttentionState:
    """Keys and values (b, g, size, p), each row's from its own place on."""

    def __init__(self, cache, config, dtype):
        self.cache = cache
        shape = len(cache.at), config.n_kv_heads, cache.size, config.head_dim
        self.k = torch.zeros(shape, dtype=dtype, device=cache.device)
        self.v = torch.zeros_like(self.k)

    def attend(self, q, k, v, angles):
        """Attention of q (b, l, h, p) over all so far and the new k, v (b, l, g, p)."""
        c = self.cache
        if c.fused:
            return kernels.attend(q, k, v, *angles, self.k, self.v, c.at)
        q, k = rotate(q, angles), rotate(k, angles)
        row = torch.arange(len(c.at), device=c.device)[:, None]
        self.k[row, :, c.pos] = k.to(self.k.dtype)  # padding lands where nothing is read
        self.v[row, :, c.pos] = v.to(self.v.dtype)
        if c.used == 0:
            return sdpa(q, k, v)
        end = c.used + c.new
        mask = torch.arange(end, device=c.device) <= c.pos[..., None]  # (b, l, end)
        k, v = (t[:, :, :end].transpose(1, 2).to(q.dtype) for t in (self.k, self.v))
        return sdpa(q, k, v, mask[:, None])


class MambaState:
    """The state h (b, h, p, n) before token `base`, float32 or more, and inputs of the layer.

    Inputs are those since, and the `window` before that the convolution looks back on, in a ring:
    token t is at t modulo its size.
    """

    def __init__(self, cache, window, shape, dtype):
        self.cache, self.window, self.inputs = cache, window, None
        wide = torch.promote_types(dtype, torch.float32)
        self.h = torch.zeros(len(cache.at), *shape, dtype=wide, device=cache.device)

    def allocate(self, written):
        """The ring of inputs, made with the first: `written` (b, l, ...) have its types."""
        if self.inputs is None:
            passes = 2 if self.cache.undo else 1  # the pending one and the new one
            size = 1 << (passes * kernels.FEW + self.window).bit_length()
            self.inputs = [t.new_zeros(t.shape[0], size, *t.shape[2:]) for t in written]
        return self.inputs

    def places(self, first, l):
        """Row and place in the ring of l tokens from `first` (b,) on."""
        at = first[:, None] + torch.arange(l, device=first.device)
        return torch.arange(len(at), device=at.device)[:, None], at % self.inputs[0].shape[1]

    def extend(self, mixer, written, read):
        """y (b, l, h, p) of l new tokens by the mixer's `scan`.

        `written` (b, l, ...) are the inputs that move the state, `read` the others.
        """
        c, w, inputs = self.cache, self.window, self.allocate(written)
        if c.fused:
            return mixer.replay(*written, *read, inputs, self.h, (c.at, c.base, c.to))
        window = inputs[0][self.places(c.base - w, w)]
        pending = c.at - c.base
        most = int(pending.max())
        if most > 0:
            old = [t[self.places(c.base, most)] for t in inputs]
            blank = [t.new_zeros(len(t), most, *t.shape[2:]) for t in read]
            _, window, h = mixer.scan(*old, *blank, window, self.h, pending)
            self.h.copy_(h)
        y, window, h = mixer.scan(*written, *read, window, self.h, c.lengths)
        if c.direct:
            self.h.copy_(h)
            inputs[0][self.places(c.to - w, w)] = window
        else:
            for t, new in zip(inputs, written, strict=True):
                t[self.places(c.at, c.new)] = new
        return y


def hide_padding(dt, lengths):
    """dt (b, l, ...), -inf at padded places: Δ = softplus(-inf) = 0 neither decays nor writes."""
    real = torch.arange(dt.shape[1], device=dt.device) < lengths[:, None]
    return dt.masked_fill(~real.view(*real.shape, *[1] * (dt.dim() - 2)), -torch.inf)


# --------------------------------------------------------------------------------------------------
# Turning attention into Mamba


def interleaved_layers(n_layers, keep):
    """Which layers to replace so that the share `keep` of attention stays, spread evenly.

    The paper's sets for 32 layers: keep 0.5 -> 0, 2, 4 …; 0.25 -> all but 3, 7, 11 …
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
    """Puts projections of the same input one after the other in memory, for one launch in decoding.

    Values and names stay; model.to undoes it. Returns the model.
    """
    for layer in model.layers:
        weights = [getattr(layer.mixer, name).weight for name in layer.mixer.READS]
        if len(weights) > 1:
            together = torch.cat([w.data for w in weights])
            parts = together.split([len(w) for w in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part
    return model


def replace_attention(model, layers, mixer="mamba2", init="attention", share=False):
    """A student: `model` with attention replaced by `mixer` in `layers`, everything else kept.

    init="attention" copies the layer's projections (W_q -> C, W_k -> B, W_v -> x, W_o -> out; not
    their biases), "random" does not. New projections keep PyTorch's own initial values, as in the
    authors' code. `model` may be a student already; it is not changed. With share=True the kept
    parts are its own tensors, not copies. Raises MilError if a layer is out of range, listed twice,
    or not attention.
    """
    if mixer not in MIXERS[1:]:
        raise MilError(f"replace_attention: mixer {mixer!r}, expected {', '.join(MIXERS[1:])}")
    if init not in ("attention", "random"):
        raise MilError(f"replace_attention: init {init!r}, expected attention or random")
    mixers, layers = list(model.config.mixers), list(layers)
    for i in layers:
        if not 0 <= i < len(mixers):
            last = len(mixers) - 1
            told = f"layer {i} is out of range, the model has layers 0 to {last}"
            raise MilError(f"replace_attention: {told}")
        if mixers[i] != "attention":
            told = f"layer {i} holds {mixers[i]}, not attention"
            raise MilError(f"replace_attention: {told}: it is already replaced or listed twice")
        mixers[i] = mixer
    dataclasses.replace(model.config, mixers=mixers)  # checks the new heads
    # deepcopy takes what is in `kept` for copied already: shared tensors, and those that leave
    leaving = {id(w) for i in layers for w in model.layers[i].mixer.parameters()}
    kept = {id(w): w for w in model.parameters() if share or id(w) in leaving}
    student = copy.deepcopy(model, kept)
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
    """Raises MilError unless `layers` are some of n_layers, each once and in order."""
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < n_layers:
        told = ", ".join(map(str, layers)) or "none"
        wanted = f"some of 0 to {n_layers - 1}, each once, in rising order"
        raise MilError(f"layers {told}: expected {wanted}")


def keep_layers(model, layers):
    """A copy with only these of the model's layers, its embedding, norm and head.

    A draft for speculative decoding begins so (section 5.5). Raises MilError as check_layers.
    """
    check_layers(layers, len(model.layers))
    mixers = [model.config.mixers[i] for i in layers]
    config = dataclasses.replace(model.config, n_layers=len(layers), mixers=mixers)
    small = empty_model(config)
    parts = [(small.layers[j], model.layers[i]) for j, i in enumerate(layers)]
    parts += [(getattr(small, k), getattr(model, k)) for k in ("embed_tokens", "norm", "lm_head")]
    for part, source in parts:
        weights = {name: w.clone() for name, w in source.state_dict().items()}
        part.load_state_dict(weights, assign=True)
    small.tie()
    return small


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: a folder of ours, or one downloaded. read_config says what is in it, Weights reads its tensors one by one
# under our names, load puts them in a model. Of ours, renaming config.json into place is the one moment at which a new
# checkpoint replaces an old one.


def stays_wide(name):
    """Whether this parameter makes up Δ or A, or is D, and is never kept in less than float32: a decay near 1 does not survive fewer bits."""
    return name.endswith(("A_log", "D", "dt_bias", "dt_proj.bias"))


def cast(model, dtype):
    """Convert to `dtype`, but what makes up Δ and A, and D, to float32 at least."""
    for name, w in model.named_parameters():
        w.data = w.data.to(torch.promote_types(dtype, torch.float32) if stays_wide(name) else dtype)
    return model


def write_whole(path, write):
    """Call write(file) on a temporary neighbour of `path` and rename it into place, so `path` is never half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        raise MilError(
            f"{path}: cannot be written (disk full?): {getattr(e, 'strerror', None) or str(e).splitlines()[0]}"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, about):
    write_whole(path, lambda f: f.write(json.dumps(about, indent=1).encode()))


def make_directory(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise MilError(f"{path}: cannot be made: {e.strerror or e}") from e


def save(model, directory, **notes):
    """Write config.json (with `notes` beside the configuration, e.g. the tokenizer) and the weights to `directory`."""
    directory = Path(directory)
    make_directory(directory)
    name, path = f"weights-{secrets.token_hex(4)}.pt", directory / "config.json"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        old = None  # nothing, or nothing of ours
    weights = {
        k: w.detach().cpu() for k, w in model.named_parameters()
    }  # a tied head is no parameter of its own
    write_whole(directory / name, lambda f: torch.save(weights, f))
    try:
        write_json(
            path,
            {**notes, "format": "mil", "config": dataclasses.asdict(model.config), "weights": name},
        )
        name = old  # from here on it is the old file that no config.json names
    finally:
        if isinstance(name, str) and Path(name).name == name:
            (directory / name).unlink(missing_ok=True)


class Said(dict):
    """What a JSON file says; `take` gives a key's value and keeps in mind that it was understood."""

    def __init__(self, path):
        self.path, self.taken = path, set()
        try:
            super().__init__(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as e:
            refuse_pointer(path)
            raise MilError(f"{path}: cannot be read as a JSON object: {e}") from e

    def take(self, key, *default, kind=None):
        """The key's value; the default when it is missing or null. MilError when there is none, or it is not of the default's `kind`."""
        self.taken.add(key)
        value, kind = (
            self.get(key),
            kind or (type(default[0]) if default and default[0] is not None else object),
        )
        if value is None and not default:
            raise MilError(f"{self.path}: lacks {key}")
        if value is not None and not isinstance(value, (int, float) if kind is float else kind):
            wanted = {
                list: "a list",
                dict: "an object",
                int: "a whole number",
                float: "a number",
                str: "text",
                bool: "true or false",
            }[kind]
            raise MilError(f"{self.path}: {key} is {value!r:.99}, expected {wanted}")
        return default[0] if value is None else value

    def expect(self, key, *allowed):
        """MilError unless the key's value, if it is there, is among these."""
        if self.take(key, allowed[0]) not in allowed:
            raise MilError(
                f"{self.path}: {key} is {self[key]!r}, expected {' or '.join(map(repr, allowed))}"
            )

    def others(self, harmless=""):
        """The keys that were not understood, but for those that are null, false or empty."""
        return sorted(
            key
            for key, value in self.items()
            if key not in self.taken
            and key not in harmless.split()
            and value is not None
            and value is not False
            and value not in ("", [], {})
        )


def read_config(directory):
    """What a checkpoint folder says of its model: "config" a Config, "format" (mil, hf, mambainllama or meta), "weights" a list of
    files, "tokenizer" a name or a file of the folder, "remarks" lines for the reader; and the notes of `save`. MilError when it is
    no checkpoint."""
    directory = Path(directory)
    try:
        names = os.listdir(directory)
    except OSError as e:  # not there, a file, a circle of links …
        hub = (
            not directory.is_absolute()
            and len(directory.parts) == 2
            and not directory.parent.exists()
            and directory.parts[0] != "out"
        )
        hub = (
            f"; if that is a model at huggingface.co, download it: hf download {directory} --local-dir FOLDER"
            * hub
        )
        raise MilError(
            f"{directory}: no checkpoint here: {e.strerror}; expected a folder with a config.json or, of Meta's, a params.json{hub}"
        ) from e
    if "config.json" not in names and "params.json" not in names:
        found = "an adapter (LoRA), " * ("adapter_config.json" in names) + "GGUF, " * any(
            name.endswith(".gguf") for name in names
        )
        raise MilError(
            f"{directory}: no checkpoint here: {found and f'found {found}'}expected a config.json or, of Meta's, a params.json"
        )
    if "config.json" not in names:
        return meta_config(directory, Said(directory / "params.json"))
    said = Said(directory / "config.json")
    return (
        hf_config(directory, said)
        if "model_type" in said or "architectures" in said
        else mil_config(said)
    )


def make_config(path, **entries):
    try:
        return Config(**entries)
    except (MilError, TypeError) as e:
        raise MilError(f"{path}: {e}") from e


def mil_config(about):
    """Of a folder that `save` wrote."""
    if (
        about.get("format") != "mil"
        or not isinstance(about.get("config"), dict)
        or not isinstance(about.get("weights"), str)
    ):
        raise MilError(
            f'{about.path}: not a checkpoint: expected "format": "mil", a "config" and "weights", or a "model_type" (Hugging Face\'s)'
        )
    unknown = about["config"].keys() - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise MilError(
            f"{about.path}: the config has {', '.join(sorted(unknown))}, which this version does not know"
        )
    return {
        "tokenizer": None,
        **about,
        "config": make_config(about.path, **about["config"]),
        "weights": [about["weights"]],
        "remarks": [],
    }


HARMLESS = """transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id initializer_range
    attention_dropout pretraining_tp _name_or_path name_or_path _attn_implementation_autoset is_llama_config transformers.js_config"""  # no matter for what is computed here
IDS = "bos_token_id", "eos_token_id", "pad_token_id"  # passed on when a checkpoint is exported


def hf_config(directory, said):
    """Of a Hugging Face Llama or Mistral; with a mamba_config.json, of one of the released hybrids (repository jxiw/MambaInLlama)."""
    path, remarks = said.path, []
    if said.take("model_type") not in ("llama", "mistral"):
        raise MilError(
            f"{path}: model_type is {said['model_type']!r}, expected 'llama' or 'mistral'"
        )
    for architecture in said.take("architectures", []):
        if not str(architecture).endswith("ForCausalLM"):
            raise MilError(f"{path}: the architecture is {architecture}, expected a …ForCausalLM")
    if said.take("quantization_config", None):
        raise MilError(
            f"{path}: quantization_config: the weights are quantised; expected the model in float32, float16 or bfloat16"
        )
    said.expect("hidden_act", "silu")
    said.expect("mlp_bias", False)
    rope = {
        **said.take("rope_scaling", {}),
        **said.take("rope_parameters", {}),
    }  # rope_parameters: since transformers 5
    scaling, theta = (
        rope.pop("rope_type", rope.pop("type", "default")),
        rope.pop("rope_theta", said.take("rope_theta", 10000.0)),
    )
    known = {"default": (), "linear": ("factor",), "llama3": ROPE_SCALING}
    if scaling not in list(known) or not rope.keys() >= set(known[scaling]):
        raise MilError(
            f"{path}: RoPE is scaled by {scaling!r} with {', '.join(rope) or 'nothing'}, expected default, linear (factor) or llama3 ({', '.join(ROPE_SCALING)})"
        )
    if rope.keys() - set(known[scaling]):
        remarks.append(
            f"{path}: of RoPE's scaling not understood, and left out: {', '.join(sorted(rope.keys() - set(known[scaling])))}"
        )
    rope = {key: rope[key] for key in known[scaling]}
    h, d, context = (
        said.take("num_attention_heads"),
        said.take("hidden_size"),
        said.take("max_position_embeddings", 2048),
    )
    window = (
        said.take("sliding_window", 4096 if "sliding_window" not in said else None, kind=int)
        if said["model_type"] == "mistral"
        else None
    )
    if window and window < context:
        remarks.append(
            f"{path}: attention slides over {window} tokens; that is taken as the context, for up to there it is all the same"
        )
    sizes = dict(
        v=said.take("vocab_size"),
        d=d,
        n_layers=said.take("num_hidden_layers"),
        n_heads=h,
        n_kv_heads=said.take("num_key_value_heads", h),
        head_dim=said.take("head_dim", 0),
        d_ff=said.take("intermediate_size"),
        context=min(context, window or context),
        rope_theta=theta,
        rope_scaling=rope or None,
        norm_eps=said.take("rms_norm_eps", 1e-6),
        tied=said.take("tie_word_embeddings", False),
        attention_bias=said.take("attention_bias", False),
    )
    config = make_config(path, **sizes)
    tokenizer = said.take(
        "mil_tokenizer",
        next(
            (name for name in ("tokenizer.json", "tokenizer.model") if (directory / name).exists()),
            None,
        ),
    )
    hybrid = directory / "mamba_config.json"
    if hybrid.exists():
        config = hybrid_config(Said(hybrid), sizes, config, remarks)
    if said.others(HARMLESS):
        remarks.append(f"{path}: not understood, and left out: {', '.join(said.others(HARMLESS))}")
    return {
        "config": config,
        "format": "mambainllama" if hybrid.exists() else "hf",
        "weights": hf_files(directory),
        "tokenizer": tokenizer,
        "remarks": remarks,
        "ids": {key: said[key] for key in IDS if key in said},
        "name": said.get("_name_or_path"),
    }


def hybrid_config(said, sizes, config, remarks):
    """The Config of a released hybrid, whose Llama part is `sizes`."""
    for key, value in dict(
        d_model=config.d,
        n_layer=config.n_layers,
        d_xb=config.n_kv_heads * config.head_dim,
        d_inner=config.n_heads * config.head_dim,
        intermediate_size=config.d_ff,
        vocab_size=config.v,
        rms_norm_eps=config.norm_eps,
        hidden_act="silu",
    ).items():
        said.expect(key, value)
    keep, ssm = said.take("attn_layers"), {"expand": 1, **said.take("ssm_cfg", {})}
    mamba2 = "ngroups" in ssm
    n = ssm.pop("d_state", 128 if mamba2 else 16)
    known = {
        "expand": 1,
        "repeat_kv_before_conv": not mamba2,
        **({"ngroups": config.n_heads} if mamba2 else {}),
    }
    odd = [
        f"{key} {value!r}"
        for key, value in ssm.items()
        if key != "d_conv" and known.get(key) != value
    ]
    if not isinstance(keep, list) or not set(keep) <= set(range(config.n_layers)):
        raise MilError(
            f"{said.path}: attn_layers is {keep}, expected a list of some of 0 to {config.n_layers - 1}"
        )
    if odd or mamba2 and n != config.head_dim:
        raise MilError(
            f"{said.path}: ssm_cfg has {', '.join(odd) or f'd_state {n}'}, expected d_state, d_conv and {known}; in Mamba-2 d_state = head_dim = {config.head_dim}"
        )
    if said.others():
        remarks.append(f"{said.path}: not understood, and left out: {', '.join(said.others())}")
    mixers = [
        "attention" if i in keep else "mamba2" if mamba2 else "mamba"
        for i in range(config.n_layers)
    ]
    return make_config(
        said.path,
        **sizes,
        mixers=mixers,
        d_conv=ssm.get("d_conv", 4),
        **({} if mamba2 else {"d_state": n}),
    )


def hf_files(directory):
    """The files of weights of a Hugging Face folder."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{kind}.index.json"
        if index.exists():
            files = list(Said(index).take("weight_map", kind=dict).values())
            for file in files:
                if (
                    not isinstance(file, str)
                    or Path(file).name != file
                    or not (directory / file).exists()
                ):
                    raise MilError(
                        f"{index}: names {file}, which is not in this folder: is the download complete?"
                    )
            if files:
                return sorted(set(files))
        if (directory / kind).exists():
            return [kind]
    raise MilError(
        f"{directory}: no weights: expected model.safetensors or pytorch_model.bin, or the index of their shards"
    )


def meta_config(directory, said):
    """Of Meta's own files. Their params.json leaves out the context, and the factor by which RoPE is scaled: 32 in Llama 3.2's
    1B and 3B, 8 in what is larger (meta-llama/llama-models, issue 241)."""
    files = sorted(f.name for f in directory.glob("consolidated.*.pth"))
    if not files or files != [f"consolidated.{i:02d}.pth" for i in range(len(files))]:
        raise MilError(
            f"{directory}: the weights are {', '.join(files) or 'missing'}, expected consolidated.00.pth, or it and all that follow"
        )
    tensors = open_tensors(directory / files[0])
    d, h, v = said.take("dim", kind=int), said.take("n_heads"), said.take("vocab_size", -1)
    if v == -1 and "tok_embeddings.weight" in tensors:
        rows, columns = tensors["tok_embeddings.weight"]().shape
        v = rows * len(files) if columns == d else rows  # cut by words, in Llama 2 by columns
    d_ff, multiple = (
        int(said.take("ffn_dim_multiplier", 1.0) * int(8 * d / 3)),
        said.take("multiple_of", 256),
    )
    theta, scaled = said.take("rope_theta", 10000.0), said.take("use_scaled_rope", False)
    factor = said.take("rope_scaling_factor", 8 if d >= 4096 else 32)
    context = 131072 if scaled else 8192 if theta >= 500000 else 4096
    config = make_config(
        said.path,
        v=v,
        d=d,
        n_layers=said.take("n_layers"),
        n_heads=h,
        n_kv_heads=said.take("n_kv_heads", h),
        context=context,
        d_ff=-(-d_ff // max(1, multiple)) * multiple,
        norm_eps=said.take("norm_eps", 1e-5),
        rope_theta=float(theta),
        tied="output.weight" not in tensors,
        rope_scaling=dict(zip(ROPE_SCALING, (factor, 1.0, 4.0, 8192))) if scaled else None,
    )
    if said.take("quantization_args", None) or said.take("lora_args", None):
        raise MilError(
            f"{said.path}: quantization_args or lora_args: expected the weights in float32, float16 or bfloat16 and whole"
        )
    remarks = [
        f"{said.path}: says nothing of the context, taken as {context}"
        + f", nor of RoPE's factor, taken as {factor}" * scaled
    ]
    if said.others("max_batch_size max_seq_len"):
        remarks.append(
            f"{said.path}: not understood, and left out: {', '.join(said.others('max_batch_size max_seq_len'))}"
        )
    return {
        "config": config,
        "format": "meta",
        "weights": files,
        "tokenizer": "tokenizer.model",
        "remarks": remarks,
    }


def safetensors_for(path):
    """The package, an optional extra."""
    try:
        import safetensors.torch
    except ImportError:
        raise MilError(
            f"{path}: to read or write it, install safetensors: pip install safetensors"
        ) from None
    return safetensors


def open_tensors(path):
    """The tensors of one file, each a function that reads it: {name: read}. The file is mapped into memory, not read; no code in it
    is run (weights_only)."""
    try:
        if path.suffix == ".safetensors":
            file = safetensors_for(path).safe_open(path, "pt")
            return {name: functools.partial(file.get_tensor, name) for name in file.keys()}
        weights = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )  # what torch < 1.6 wrote is no zip
        if not isinstance(weights, dict):
            raise MilError(
                f"{path}: holds a {type(weights).__name__}, expected tensors by their names"
            )
        return {name: functools.partial(weights.get, name) for name in weights}
    except MilError:
        raise
    except FileNotFoundError:
        raise MilError(f"{path}: not found; the checkpoint is incomplete") from None
    except Exception as e:  # as the damage has it
        raise refused_file(path, e) from e


def refuse_pointer(path):
    """MilError if the file only says where the real one is."""
    with contextlib.suppress(OSError), open(path, "rb") as f:
        if f.read(24) == b"version https://git-lfs.":
            raise MilError(
                f"{path}: a pointer of Git LFS and not the file itself: git lfs pull brings it"
            ) from None


def refused_file(path, e):
    """The MilError for a file of weights that could not be opened."""
    refuse_pointer(path)
    if isinstance(e, pickle.UnpicklingError):
        return MilError(
            f"{path}: refused: it holds something other than tensors, which could run code"
        )
    return MilError(f"{path}: not a whole file of weights: truncated or damaged")


META = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mixer.q_proj": "attention.wq",
    "mixer.k_proj": "attention.wk",
    "mixer.v_proj": "attention.wv",
    "mixer.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def name_in(format, name, mixers):
    """What a file of this format calls our tensor `name`."""
    if format == "mil":
        return name
    if format == "meta":
        return re.sub("|".join(map(re.escape, META)), lambda m: META[m[0]], name)
    mixer = lambda m: f"{m[1]}.{'self_attn' if mixers[int(m[2])] == 'attention' else 'mamba'}."  # noqa: E731
    return ("" if name.startswith("lm_head") else "model.") + re.sub(
        r"(layers\.(\d+))\.mixer\.", mixer, name
    )


class Weights:
    """The tensors of a checkpoint folder under our names, each read when it is asked for."""

    def __init__(self, directory, about):
        self.path, self.about, self.tensors, self.taken = Path(directory), about, {}, set()
        for path in (self.path / file for file in about["weights"]):
            for name, read in open_tensors(path).items():
                if name in self.tensors and about["format"] != "meta":
                    raise MilError(f"{path}: holds {name}, and so does {self.tensors[name][0][0]}")
                self.tensors.setdefault(name, []).append((path, read))

    def take(self, name, shape):
        """Our tensor `name`, which has this shape. Of Meta's model-parallel shards each holds a part along one axis, the one in
        which it falls short, or a copy."""
        config, theirs = (
            self.about["config"],
            name_in(self.about["format"], name, self.about["config"].mixers),
        )
        self.taken.add(theirs)
        path, parts = (
            self.tensors.get(theirs, [(self.path,)])[0][0],
            [read() for _, read in self.tensors.get(theirs, [])],
        )
        if (
            not parts
            or not torch.is_tensor(parts[0])
            or not parts[0].is_floating_point()
            or parts[0].element_size() < 2
        ):
            found = "missing" if not parts else getattr(parts[0], "dtype", "no tensor")
            raise MilError(
                f"{path}: {theirs} is {found}, expected {tuple(shape)} in float32, float16 or bfloat16"
            )
        axis = next(
            (i for i, (part, all_) in enumerate(zip(parts[0].shape, shape)) if part != all_), None
        )
        w = parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, axis)
        if w.shape != shape:
            shards = f" in {len(parts)} shards" if len(parts) > 1 else ""
            raise MilError(
                f"{path}: {theirs} is {tuple(w.shape)}{shards}, expected {tuple(shape)} by the configuration"
            )
        if self.about["format"] == "meta" and name.endswith(("q_proj.weight", "k_proj.weight")):
            w = (
                w.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            )  # pairs (0, 1), (2, 3) … to (i, i + head_dim / 2)
        return (
            w * 2 if self.about["format"] == "mambainllama" and name.endswith("dt_proj.bias") else w
        )  # their layer adds it twice

    def check_rest(self):
        """MilError if there are tensors nobody asked for."""
        tied = [name_in(self.about["format"], "lm_head.weight", [])] * self.about["config"].tied
        for name in sorted(self.tensors.keys() - self.taken - set(tied)):
            if not name.endswith(
                ("rotary_emb.inv_freq", "rope.freqs")
            ):  # RoPE's frequencies, which follow from the configuration
                raise MilError(
                    f"{self.tensors[name][0][0]}: holds {name}, expected no such tensor by the configuration"
                )


def load(directory, device=None, dtype=None):
    """The model in the folder `directory`, ours, Hugging Face's, Meta's or the authors' (read_config), in eval mode, on `device` (CPU)
    and in `dtype` (the file's); what makes up Δ and A is float32 or more. Tensors go to the device one by one. MilError says what does not fit."""
    about = read_config(directory)
    weights = Weights(directory, about)
    model = empty_model(about["config"])
    for name, w in list(model.named_parameters()):  # of a tied pair, the embedding
        read = weights.take(name, w.shape)
        kind = (
            torch.promote_types(dtype or read.dtype, torch.float32)
            if stays_wide(name)
            else dtype or read.dtype
        )
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, nn.Parameter(read.to(device or "cpu", kind)))
    weights.check_rest()
    model.tie()
    return model.eval()


def export(source, target, format, dtype=None):
    """Write the checkpoint folder `source`, of any format, to the folder `target`: as "mil"; "hf", for a pure Llama; or "mambainllama",
    the authors' layout, for a hybrid of attention and one kind of Mamba. In `dtype`, or the file's. Tokenizer files go along."""
    source, target, about = Path(source), Path(target), read_config(source)
    c, kinds = about["config"], set(about["config"].mixers) - {"attention"}
    fits = {"mil": True, "hf": not kinds, "mambainllama": kinds in ({"mamba"}, {"mamba2"})}
    if format not in fits:
        raise MilError(f"--format is {format}, expected hf, mambainllama or mil")
    if not fits[format]:
        raise MilError(
            f"{source}: holds {', '.join(sorted(set(c.mixers)))}; --format hf is for attention alone, mambainllama for one kind of Mamba, with or without it"
        )
    if format != "mil":
        safetensors_for(target)
    if target.is_dir() and any(target.iterdir()):
        raise MilError(f"{target}: is not empty; give a new folder")
    model = load(source, dtype=dtype)
    make_directory(target)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "special_tokens_map.json",
        "generation_config.json",
    ):
        if (source / name).exists():
            data = (source / name).read_bytes()
            write_whole(target / name, lambda f, data=data: f.write(data))
    if format == "mil":
        return save(model, target, tokenizer=about["tokenizer"], ids=about.get("ids", {}))
    weights = {
        name_in(format, name, c.mixers): w / 2 if name.endswith("dt_proj.bias") else w
        for name, w in model.named_parameters()
    }  # added twice there
    if kinds and c.tied:
        weights["lm_head.weight"] = model.lm_head.weight.clone()  # the authors' loader wants one
    write_safetensors(weights, target)
    if kinds:
        ssm = {
            "expand": 1,
            "d_conv": c.d_conv,
            **(
                {"ngroups": c.n_heads, "d_state": c.head_dim}
                if kinds == {"mamba2"}
                else {"d_state": c.d_state}
            ),
        }
        write_json(
            target / "mamba_config.json",
            dict(
                d_model=c.d,
                ssm_cfg=ssm,
                rms_norm_eps=c.norm_eps,
                vocab_size=c.v,
                d_inner=c.n_heads * c.head_dim,
                d_xb=c.n_kv_heads * c.head_dim,
                intermediate_size=c.d_ff,
                hidden_act="silu",
                n_layer=c.n_layers,
                attn_layers=[i for i, mixer in enumerate(c.mixers) if mixer == "attention"],
            ),
        )
    said = dict(
        _name_or_path=about.get("name")
        or str(target.resolve()),  # where the authors' loader looks for the Llama around it
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=c.v,
        hidden_size=c.d,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.d_ff,
        max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=c.tied,
        attention_bias=c.attention_bias,
        hidden_act="silu",
        torch_dtype=str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        **{**dict.fromkeys(IDS), **about.get("ids", {})},
    )
    if c.rope_scaling:
        said["rope_scaling"] = {
            "rope_type": "llama3" if len(c.rope_scaling) > 1 else "linear",
            **c.rope_scaling,
        }
    if about["tokenizer"] and not (target / about["tokenizer"]).exists():
        said["mil_tokenizer"] = about["tokenizer"]  # bytes, or one of tiktoken's
    write_json(target / "config.json", said)


def write_safetensors(weights, directory, most=4 * 2**30):
    """Tensors in files of at most `most` bytes (or one tensor), with Hugging Face's index when there are several."""

    def save_file(shard, f):
        safetensors = safetensors_for(directory)
        try:
            safetensors.torch.save_file(shard, f.name, {"format": "pt"})
        except safetensors.SafetensorError as e:
            raise OSError(str(e)) from e
        os.chmod(f.name, os.fstat(f.fileno()).st_mode)  # it makes a file that only its owner reads

    shards, room = [{}], most
    for name, w in weights.items():
        if shards[-1] and w.nbytes > room:
            shards.append({})
            room = most
        shards[-1][name] = w.detach().contiguous()
        room -= w.nbytes
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards):
        write_whole(directory / name, lambda f, shard=shard: save_file(shard, f))
    if len(shards) > 1:
        write_json(
            directory / "model.safetensors.index.json",
            {
                "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
                "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
            },
        )


def main(argv):
    parser = Parser(prog="mil.py", description="Write a checkpoint in another layout.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument(
        "source", help="a checkpoint folder: ours, Hugging Face's, Meta's or the authors' hybrids'"
    )
    parser.add_argument("target", help="the folder to make")
    parser.add_argument(
        "--format",
        default="hf",
        help="hf: Hugging Face's, for a pure Llama (default); mambainllama: the authors' layout, for a hybrid; mil: ours",
    )
    parser.add_argument(
        "--dtype",
        default="",
        choices=["", "float32", "bfloat16", "float16"],
        help="of the weights; empty: as they are",
    )
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
