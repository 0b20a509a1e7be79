"""The Mamba in the Llama: a stack of layers in which a Mamba can inherit attention's weights.

    attention without softmax   h_t = h_{t-1} + v_t k_tᵀ                     y_t = h_t q_t
    Mamba                       h_t = exp(Δ_t A) ∘ h_{t-1} + (Δ_t x_t) B_tᵀ  y_t = h_t C_t + D ∘ x_t

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
import json
import math
import os
import pickle
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
    """An error to show the user: the file or flag, what was found, what was expected."""


def refuse(*cases, where=""):
    """Raises MilError with the message of the first case (wrong, message) that is wrong."""
    for wrong, message in cases:
        if wrong:
            raise MilError(where + message)


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
    rope_scaling: dict | None = None  # of ROPE_SCALING, Llama 3.1's; or of factor alone, linear
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
        refuse(
            (not p, f"width d {self.d} is not divisible by n_heads {h}; give head_dim"),
            (p % 2, f"head_dim is {p}, expected an even number: RoPE turns channels in pairs"),
            (h % g, f"n_heads {h} is not divisible by n_kv_heads {g}"),
            (len(self.mixers) != n, f"{len(self.mixers)} mixers for {n} layers, expected as many"),
            (odd, f"a mixer is {', '.join(map(repr, odd))}, expected one of {', '.join(MIXERS)}"),
            (not fit, f"rope_scaling is {scaling}, expected numbers above 0 for {names}"),
            (reverse, f"rope_scaling is {scaling}, expected {' below '.join(ROPE_SCALING[1:3])}"),
            (uncut, f"d_state {self.d_state} does not divide the kv width {narrow}"),
            where="config: ",
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
    """x Wᵀ + bias in x's type."""

    def forward(self, x, biased=True):
        if decoding(x, self.weight):
            y = kernels.linear(x, self.weight)
        else:
            weight, n = self.weight.to(x.dtype), self.out_features
            if x.is_cuda and n % 8:  # a GPU's fast kernels want rows of a multiple of 16 bytes
                weight = F.pad(weight, (0, 0, 0, -n % 8))
            y = F.linear(x, weight)[..., :n]
        return y + self.bias.to(x.dtype) if biased and self.bias is not None else y


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
    """cos and sin (b, l, 1, p / 2), float32, of RoPE's angles at the positions pos (b, l).

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
    angle = pos[:, :, None, None].float() * freq
    return angle.cos(), angle.sin()


def rotate(q, angles):
    """RoPE (2104.09864): turns the channel pairs (i, i + p/2) of q (b, l, h, p), in float32."""
    cos, sin = angles
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
#   forward(u, angles, state, docs)
#                     the mixer's formula. u (b, l, d) is normed; angles are RoPE's; state is this
#                     layer's part of the Cache, None in training; docs are Documents, None if every
#                     row is one
#   inherit()         the tensors that begin as attention's W_q, W_k, W_v and W_o
#   new_state(cache)  this layer's part of a Cache
#   READS             the projections of the input, which `pack` lays side by side
#
# Mamba and Mamba2 also have `scan`, in PyTorch or by a kernel, and `replay`, its form in decoding.


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE."""

    READS = "q_proj", "k_proj", "v_proj"
    INHERITED = "q_proj", "k_proj", "v_proj", "o_proj"

    def __init__(self, config):
        super().__init__()
        self.config, bias = config, config.attention_bias
        wide, narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.d, wide, bias=bias)
        self.k_proj = Linear(config.d, narrow, bias=bias)
        self.v_proj = Linear(config.d, narrow, bias=bias)
        self.o_proj = Linear(wide, config.d, bias=bias)

    def forward(self, u, angles, state=None, docs=None):
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
        return self.o_proj(y.flatten(2))

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
        rank = math.ceil(config.d / 16)
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

    def inherit(self):
        return self.C_proj.weight, self.B_proj.weight, self.in_proj_x.weight, self.out_proj.weight

    def heads(self, t):
        """(b, l, h·p) -> (b, l, h, p)."""
        return t.unflatten(-1, (-1, self.config.d_state))

    def forward(self, u, angles, state=None, docs=None):
        x, z, B, C, dt = project(
            u,
            self.in_proj_x,  # (b, l, g·p)
            self.in_proj_z,  # (b, l, h·p)
            self.B_proj,  # (b, l, g·n)
            self.C_proj,  # (b, l, h·n)
            self.dt_proj_down,  # (b, l, rank)
        )
        dt = self.dt_proj(dt, biased=False)  # (b, l, h·p); the scan adds its bias
        x, dt, B, C, z = (self.heads(t) for t in (x, dt, B, C, z))  # (b, l, heads, p or n)
        if state is None:
            y, _, _ = self.scan(x, dt, B, C, z, docs=docs)
        else:
            y = state.extend(self, (x, dt, B), (C, z))
        return self.out_proj(y.flatten(2))

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

    def inherit(self):
        wide, mixed, h = self.sizes
        narrow = (mixed - wide) // 2
        _, x, B, C, _ = self.in_proj.weight.split([wide, narrow, narrow, wide, h])
        return C, B, x, self.out_proj.weight

    def forward(self, u, angles, state=None, docs=None):
        # (b, l, h·p) (b, l, 2 g·p + h·p) (b, l, h)
        z, xBC, dt = self.in_proj(u).split(self.sizes, dim=-1)
        if state is None:
            y, _, _ = self.scan(xBC, dt, z, docs=docs)
        else:
            y = state.extend(self, (xBC, dt), (z,))
        return self.out_proj(y.flatten(2))

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

    def inherit(self):
        return ()

    def forward(self, u, angles, state=None, docs=None):
        return torch.zeros_like(u)

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

    def forward(self, u):
        if decoding(u, self.up_proj.weight):
            inside = kernels.linear(u, self.up_proj.weight, gate=self.gate_proj.weight)
        else:
            inside = F.silu(self.gate_proj(u)) * self.up_proj(u)
        return self.down_proj(inside)


class Block(nn.Module):
    """A Llama layer, whatever its mixer."""

    def __init__(self, config, mixer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d, eps=config.norm_eps)
        self.mixer = CLASSES[mixer](config)
        self.post_attention_layernorm = RMSNorm(config.d, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, u, angles, state=None, docs=None):
        u = u + self.mixer(self.input_layernorm(u), angles, state, docs)
        return u + self.mlp(self.post_attention_layernorm(u))


class Hybrid(nn.Module):
    """The stack; config.mixers[i] says what layer i is. A Llama if every mixer is attention.

    It computes in the type of its weights, or in `compute` if that is set.
    """

    compute = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        embedding = torch.empty(config.v, config.d)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
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
        if self.embed_tokens.weight.is_meta:
            return  # there are no values, and normal_ would import torch._dynamo, a second
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
        if cache is None and lengths is not None or cache is not None and docs is not None:
            raise MilError("lengths are for a cache, and docs for rows without one; leave them out")
        if cache is not None:
            cache.open(*tokens.shape, lengths)
        u, angles = self.start(tokens, cache, docs)
        for i, layer in enumerate(self.layers):
            if cache is None:
                u = layer(u, angles, docs=docs)
            else:  # not the compiled forward, which knows nothing of these kernels
                u = layer.forward(u, angles, cache.states[i])
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

    With undo=True the last pass (of at most FEW tokens a row, without padding) can be taken back,
    whole or in part, with no copy of a state (section 4 and Algorithm 2 of the paper): its inputs
    are `pending`. The next pass first takes those that `keep` left into the state, then reads its
    own tokens from there. Otherwise, and in other passes, all tokens go into the state at once.

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
        turned = {*c.mixers} - {"mamba", "mamba2", "none"}  # attention, and what a fork adds
        self.turns = rope_angles(c, everywhere) if turned else ()
        self.states = [layer.mixer.new_state(self) for layer in model.layers]
        # What the kernels hold in registers; a mixer of a fork may lack `replay`.
        self.fits = max(c.head_dim, c.d_state) <= 128 and c.n_heads // c.n_kv_heads <= 16
        for layer, state in zip(model.layers, self.states, strict=True):
            self.fits &= not isinstance(state, MambaState) or hasattr(layer.mixer, "replay")

    def fusable(self, l):
        """Whether a pass of l real tokens a row is made of the kernels for decoding."""
        return self.fits and kernels.few(self.weight, l)

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
        self.direct = not self.undo or l > kernels.FEW or lengths is not None
        self.to = self.at + self.counts if self.direct else self.at
        self.pos = self.at[:, None] + torch.arange(l, device=self.device)
        self.angles = [t[0, self.pos] for t in self.turns]  # (b, l, 1, p / 2)

    def close(self):
        self.base.copy_(self.to)  # before `at` moves, which `to` may be
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

    def places(self, first, l):
        """Row and place in the ring of l tokens from `first` (b,) on."""
        at = first[:, None] + torch.arange(l, device=first.device)
        return torch.arange(len(at), device=at.device)[:, None], at % self.inputs[0].shape[1]

    def extend(self, mixer, written, read):
        """y (b, l, h, p) of l new tokens by the mixer's `replay` or `scan`.

        `written` (b, l, ...) are the inputs that move the state, `read` the others.
        """
        c, w = self.cache, self.window
        if self.inputs is None:  # the first pass knows their types
            passes = 2 if c.undo else 1  # the pending one and the new one
            size = 1 << (passes * kernels.FEW + w).bit_length()
            self.inputs = [t.new_zeros(t.shape[0], size, *t.shape[2:]) for t in written]
        inputs = self.inputs
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
        found = mixers[i] if 0 <= i < len(mixers) else "nothing"
        if found != "attention":
            told = f"layer {i} holds {found}, expected attention in {len(mixers)} layers from 0 on"
            raise MilError(f"replace_attention: {told}, none listed twice")
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
                for target, name in zip(new.inherit(), Attention.INHERITED, strict=False):
                    target.copy_(getattr(attention, name).weight)
        weight = attention.q_proj.weight
        student.layers[i].mixer = cast(new, weight.dtype).to(weight.device)
    return student


def check_layers(layers, n_layers):
    """Raises MilError unless `layers` are some of n_layers, each once and in order."""
    if not layers or layers != sorted(set(layers)) or not {*layers} <= {*range(n_layers)}:
        told = ", ".join(map(str, layers)) or "none"
        wanted = f"some of 0 to {n_layers - 1}, each once, in rising order"
        raise MilError(f"layers {told}: expected {wanted}")


def keep_layers(model, layers):
    """A copy with only these of the model's layers, its embedding, norm and head.

    A draft for speculative decoding begins so (section 5.5). Raises MilError as check_layers.
    """
    check_layers(layers, len(model.layers))
    small = copy.deepcopy(model, {id(w): w for w in model.parameters()})  # the same tensors
    small.layers = nn.ModuleList(small.layers[i] for i in layers)
    small.config.mixers = [model.config.mixers[i] for i in layers]
    small.config.n_layers = len(layers)  # in place: every layer knows this object
    return copy.deepcopy(small)  # tensors of its own


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


def saved_type(name, dtype):
    """`dtype`, or float32 where bf16 would round a decay near 1 to exactly 1."""
    wide = name.endswith(("A_log", "D", "dt_bias", "dt_proj.bias"))
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def cast(model, dtype):
    """Converts the parameters to `dtype`, but those that stay wide to float32 at least."""
    for name, w in model.named_parameters():
        w.data = w.data.to(saved_type(name, dtype))
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
            path = Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns="*/*"))
            if any(path.glob(weights)):
                break
    return path


def read_config(path):
    """What a checkpoint says of its model: "config", a Config; "format", mil, hf, mambainllama,
    meta or gguf; "tokenizer", a name (None: files in "folder"); "ids" of the tokens that begin, end
    and pad; "remarks" to print; "weights", the files. Raises MilError if there is none, or the
    model cannot be computed here."""
    path = find_checkpoint(path)
    places = (path, path / "config.json", path / "params.json")
    file = next((place for place in places if place.is_file()), path)
    about = {"tokenizer": None, "ids": {}, "remarks": [], "folder": file.parent}
    with naming(file):
        if file == path and file.suffix != ".gguf":
            found = ", ".join(sorted(os.listdir(path))[:9]) if path.is_dir() else "another file"
            wanted = "config.json, params.json or a .gguf file"
            raise MilError(f"no checkpoint here: found {found}, expected {wanted}")
        said = {} if file == path else read_json(file)
        if said.get("format") == "mil":
            given = None if said.get("tokenizer") in TEXT_FILES.split() else said.get("tokenizer")
            about |= {"format": "mil", "ids": dict(said.get("ids", {})), "tokenizer": given}
            about |= {"config": Config(**said["config"])}
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


def load(path, device=None, dtype=None, about=None):
    """The model of a checkpoint (see read_config), in eval mode, on `device` (CPU) and in `dtype`
    (the file's; float32 at least for what makes up Δ and A). Tensors go there one by one. Raises
    MilError if one is missing, too many, or not as the configuration says. about: what read_config
    said already."""
    about = about or read_config(path)
    tensors, model = open_tensors(about), empty_model(about["config"])
    for name, empty in [*model.named_parameters()]:
        with naming(tensors[name][0][0] if name in tensors else about["folder"]):
            w = read_tensor(about, tensors, name, empty.shape, device or "cpu")
        tensors.pop(name)
        place, _, leaf = name.rpartition(".")
        w = w.to(saved_type(name, dtype or w.dtype))
        setattr(model.get_submodule(place), leaf, nn.Parameter(w))
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
    model = load(source, dtype=dtype, about=about)
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
    formats = ["hf", "mambainllama", "mil"]
    parser.add_argument("--format", default="hf", choices=formats, help="(default hf)")
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
