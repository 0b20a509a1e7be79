"""The scan, the convolution and decoding: the definition is the formula, every fast form is the definition."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, assert_same_bits, build, form, random_tokens, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels
import mil

FORMS = pytest.mark.parametrize("which", ["triton", "torch"])
DECAYS = pytest.mark.parametrize("decay", ["mamba", "mamba2"])
OPERATIONS = pytest.mark.parametrize("name", ["mamba", "mamba2", "conv"])
KINDS = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
EXAMPLES = settings(max_examples=5 if DEVICE == "cuda" else 8)  # a GPU compiles for every new shape

SEEDS = st.integers(0, 2**31)
LENGTHS = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 129])
HEADS = st.sampled_from(
    [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 1), (4, 1, 2), (6, 3, 2)]
)  # h, gx, gb
SIZES = st.sampled_from([(1, 1), (3, 5), (5, 3), (16, 16), (20, 24), (64, 64), (128, 40), (7, 130)])
ALONG = ("x", "dt", "B", "C", "z")  # the inputs with one value per token
OPTIONS = ("D", "z", "dt_bias", "h0")


def scan_inputs(decay, b=1, l=9, heads=(2, 1, 2), size=(4, 3), seed=1, options=OPTIONS):
    """Random inputs of ssm_scan by name. heads: h, gx, gb; size: p, n."""
    (h, gx, gb), (p, n), generator = heads, size, torch.Generator().manual_seed(seed)
    per = (h, p) if decay == "mamba" else (h,)
    shapes = dict(x=(b, l, gx, p), dt=(b, l, *per), A=(*per, n) if decay == "mamba" else per)
    optional = dict(D=per, z=(b, l, h, p), dt_bias=per, h0=(b, h, p, n))
    shapes |= dict(B=(b, l, gb, n), C=(b, l, h, n)) | {k: optional[k] for k in sorted(options)}
    inputs = {k: random(generator, *shape) for k, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    return inputs


def random(generator, *shape):
    return torch.randn(*shape, generator=generator).to(DEVICE)


def cast(inputs, dtype):
    """Activations in this type; what makes up the decay in float32 or more."""
    wide = torch.promote_types(dtype, torch.float32)
    return {k: t.to(dtype if k in ALONG else wide) for k, t in inputs.items()}


def lay(t, layout):
    """The same numbers elsewhere in memory, with NaN between and around them."""
    gap = torch.full_like(t, torch.nan)
    if layout == "sliced":  # a part of a wider projection
        return torch.cat([gap, t, gap], dim=-1)[..., t.shape[-1] : 2 * t.shape[-1]]
    if layout == "strided":  # every second number
        return torch.stack([t, gap], dim=-1)[..., 0]
    if layout == "turned" and t.dim() > 1:  # the length before the batch
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return t


def stretch(inputs, at, rows=slice(None)):
    """The inputs of some tokens of some rows."""
    inputs = {k: t[rows, at] if k in ALONG else t for k, t in inputs.items()}
    return {k: t[rows] if k in ("h0", "state") else t for k, t in inputs.items()}


def random_loss(y, h):
    generator = torch.Generator().manual_seed(1)
    return sum((t * random(generator, *t.shape).to(t)).double().sum() for t in (y, h))


def value_and_gradients(f, inputs, loss=random_loss):
    """y, h and the gradient of a loss of both by every input."""
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    y, h = f(**leaves)
    gradients = torch.autograd.grad(loss(y, h), list(leaves.values()), materialize_grads=True)
    return {"y": y, "h": h} | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}


def check(which, inputs, f=kernels.ssm_scan, definition=kernels.ssm_reference, loss=random_loss):
    """f equals the definition in value and every gradient. Returns what both gave."""
    with form(which):
        got = value_and_gradients(f, inputs, loss)
    want = value_and_gradients(definition, {k: t.double() for k, t in inputs.items()}, loss)
    largest, eps = (
        max(t.abs().max() for t in want.values() if t.numel()),
        torch.finfo(got["h"].dtype).eps,
    )
    for name in want:  # a sum over everything can cancel down to the rounding of its largest terms
        noise = 64 * eps if name in ("dA", "ddt_bias", "dD", "dweight", "dbias") else 1e-14
        assert_close(got[name], want[name], TOLERANCE[got["y"].dtype], name, noise * largest.item())
    return got, want


# --------------------------------------------------------------------------------------------------
# The definition, and what equals it


@DECAYS
@given(st.integers(1, 6), HEADS, SEEDS)
@settings(max_examples=20)
def test_the_definition_is_the_closed_form(decay, l, heads, seed):
    """y_t = Σ_{s≤t} exp(A Σ_{s<r≤t} Δ_r) Δ_s x_s (B_s · C_t), summed by hand, in numpy."""
    inputs = cast(scan_inputs(decay, 2, l, heads, (3, 2), seed), torch.float64)
    t = {k: v.cpu().numpy() for k, v in inputs.items()}
    (b, _, gx, p), (h, n), gb = t["x"].shape, t["C"].shape[2:], t["B"].shape[2]
    y, last = np.zeros((b, l, h, p)), np.zeros((b, h, p, n))
    for i, j, c, k in np.ndindex(b, h, p, n):
        at = (j, c) if decay == "mamba" else (j,)
        delta = np.log1p(np.exp(t["dt"][(i, slice(None), *at)] + t["dt_bias"][at]))
        A = t["A"][j, c, k] if decay == "mamba" else t["A"][j]
        x, B = t["x"][i, :, j // (h // gx), c], t["B"][i, :, j // (h // gb), k]
        for q in range(l):
            state = np.exp(A * delta[: q + 1].sum()) * t["h0"][i, j, c, k]
            for s in range(q + 1):
                state += np.exp(A * delta[s + 1 : q + 1].sum()) * delta[s] * x[s] * B[s]
            y[i, q, j, c] += state * t["C"][i, q, j, k]
        last[i, j, c, k] = state
    for i, j, c in np.ndindex(b, h, p):
        skip = t["D"][(j, c) if decay == "mamba" else (j,)] * t["x"][i, :, j // (h // gx), c]
        gate = t["z"][i, :, j, c] / (1 + np.exp(-t["z"][i, :, j, c]))
        y[i, :, j, c] = (y[i, :, j, c] + skip) * gate
    got = kernels.ssm_reference(**inputs)
    assert_close(got[0], torch.from_numpy(y), 1e-10, "y")
    assert_close(got[1], torch.from_numpy(last), 1e-10, "h")


@FORMS
@DECAYS
@EXAMPLES
@given(
    st.tuples(st.integers(1, 2), LENGTHS, HEADS, SIZES, SEEDS),
    st.sets(st.sampled_from(OPTIONS)),
    st.sampled_from(["dense", "sliced", "strided", "turned"]),
)
def test_scan_equals_the_definition_in_value_and_every_gradient(
    which, decay, sizes, options, layout
):
    b, l, heads, size, seed = sizes
    l = min(l, 33) if DEVICE == "cpu" and which == "triton" else l  # the interpreter is slow
    inputs = scan_inputs(decay, b, l, heads, size, seed, options)
    check(which, {k: lay(t, layout) for k, t in inputs.items()})


NARROW = (torch.bfloat16, (16, 16), 67), (torch.float16, (1, 17), 9), (torch.bfloat16, (33, 1), 67)
LARGEST = [(dtype, (256, 256), 9) for dtype in KINDS if DEVICE == "cuda"]


@FORMS
@DECAYS
@pytest.mark.parametrize("dtype, size, l", [(torch.float64, (16, 16), 67), *NARROW, *LARGEST])
def test_scan_takes_every_type_and_sizes_up_to_256(which, decay, dtype, size, l):
    got, want = check(which, cast(scan_inputs(decay, 1, l, (4, 2, 1), size), dtype))
    assert got["y"].dtype == dtype and got["h"].dtype == torch.promote_types(dtype, torch.float32)
    multiplied_in_bf16 = DEVICE == "cuda" and which == "triton" and decay == "mamba2"
    if not multiplied_in_bf16:  # dt + dt_bias and the state are float32
        assert_close(got["h"], want["h"], TOLERANCE[torch.float32])


@FORMS
@DECAYS
def test_scan_survives_extreme_steps_and_decays(which, decay):
    cases = (1, -30, -1), (1, 30, -1), (1, 30, -1e4), (1, 0, -1e-4), (1, 0, 0), (0, 0, 0)
    for scale, shift, A in (*cases, (1, 0, -50), (1, 0, -1e4)):
        inputs = {k: t * scale for k, t in scan_inputs(decay, 1, 35).items()}
        inputs["dt"], inputs["A"] = inputs["dt"] + shift, torch.full_like(inputs["A"], A)
        got, want = check(which, inputs)
        if A < -1:  # dA is as small as the decay: what is left of a difference of states is noise
            assert_close(got["dA"], want["dA"], 1e-3, "dA", 1e-12)


@FORMS
@DECAYS
@pytest.mark.parametrize("scale", [1, 1e4])
def test_packed_rows_of_extreme_inputs_are_finite_where_the_definition_is(which, decay, scale):
    pos = torch.tensor([places(35, (1, 17, 18, 34), 2**30)], device=DEVICE)
    for shift, A in ((30, -1e4), (30, -1e-4), (-30, -1e4), (1e4, -1), (-1e4, -1)):
        inputs = {k: t * scale for k, t in scan_inputs(decay, 1, 35).items()}
        inputs["dt"], inputs["A"] = inputs["dt"] + shift, torch.full_like(inputs["A"], A)
        with form(which):
            got = value_and_gradients(functools.partial(kernels.ssm_scan, pos=pos), inputs)
        want = value_and_gradients(functools.partial(kernels.ssm_reference, pos=pos), inputs)
        assert all(t[want[k].isfinite()].isfinite().all() for k, t in got.items())


@FORMS
@DECAYS
def test_a_step_and_its_slope_are_exact_from_tiny_to_large(which, decay):
    """B_t = C_t = the t-th unit vector and A = 0, so y_t = Δ_t and ddt_t = Δ'(dt_t), one by one."""
    h, p, per = (1, 4, (1, 4)) if decay == "mamba" else (4, 1, (4,))
    dt = (torch.arange(128, device=DEVICE) / 4 - 16).view(1, 32, *per).requires_grad_()
    x, unit = dt.new_ones(1, 32, h, p), torch.eye(32, device=DEVICE)[None, :, None]
    A = dt.new_zeros(*per, 32) if decay == "mamba" else dt.new_zeros(per)
    with form(which):
        y, _ = kernels.ssm_scan(x, dt, A, unit, unit.expand(1, 32, h, 32))
        (ddt,) = torch.autograd.grad(y.sum(), dt)
    exact = dt.detach().double().flatten()
    torch.testing.assert_close(y.double().flatten(), F.softplus(exact), rtol=2e-6, atol=0)
    torch.testing.assert_close(ddt.double().flatten(), exact.sigmoid(), rtol=5e-6, atol=0)


@FORMS
@DECAYS
def test_a_large_step_does_not_blur_the_small_ones_after_it(which, decay):
    inputs = scan_inputs(decay, 1, 35)
    inputs["A"], inputs["dt"] = inputs["A"] * 0 - 100, inputs["dt"] * 0 - 5
    inputs["dt"][:, :5] = 30
    check(which, inputs)


LOSSES = {
    "y": lambda y, h: y.square().sum(),
    "h": lambda y, h: h.square().sum(),
    "sums, whose gradients have strides of 0": lambda y, h: y.sum() + h.sum(),
    "slices": lambda y, h: (
        torch.stack([y, y], -1).sin().sum() + torch.stack([h, h], -1).sin().sum()
    ),
}


@FORMS
@DECAYS
@pytest.mark.parametrize("loss", LOSSES)
def test_upstream_gradients_may_be_missing_or_lie_anywhere(which, decay, loss):
    check(which, scan_inputs(decay, 2, heads=(4, 2, 1)), loss=LOSSES[loss])


@FORMS
@DECAYS
def test_padding_hidden_by_a_step_of_minus_infinity_moves_nothing(which, decay):
    inputs = scan_inputs(decay, 3)
    inputs["dt"] = mil.hide_padding(inputs["dt"], torch.tensor([5, 1, 9], device=DEVICE))
    got, _ = check(which, inputs)
    for k in ("ddt", "dB"):
        assert not got[k][0, 5:].any() and not got[k][1, 1:].any() and got[k][2].all(), k


# --------------------------------------------------------------------------------------------------
# What follows from the recurrence


@FORMS
@DECAYS
@EXAMPLES
@given(st.data(), st.integers(2, 140), SEEDS)
def test_scan_can_be_cut_anywhere_and_resumed(which, decay, data, l, seed):
    l = min(l, 40) if DEVICE == "cpu" and which == "triton" else l
    check_cut(which, scan_inputs(decay, 1, l, seed=seed), data.draw(st.integers(1, l - 1)), 5e-5)


@DECAYS
def test_a_long_sequence_is_its_two_parts(decay):
    """On a GPU one of a million tokens, which is cut into segments."""
    l = 2**20 if DEVICE == "cuda" else 2**12
    inputs = scan_inputs(decay, 1, l, (1, 1, 1))
    inputs["A"] = inputs["A"] / 1000  # a memory of thousands of tokens
    check_cut("triton" if DEVICE == "cuda" else "torch", inputs, l // 2 + 7, 1e-4)


def check_cut(which, inputs, cut, tolerance):
    with form(which):
        y, h = kernels.ssm_scan(**inputs)
        y1, h1 = kernels.ssm_scan(**stretch(inputs, slice(cut)))
        y2, h2 = kernels.ssm_scan(**{**stretch(inputs, slice(cut, None)), "h0": h1})
    assert_close(torch.cat([y1, y2], dim=1), y, tolerance, "y")
    assert_close(h2, h, tolerance, "h")


@FORMS
@DECAYS
def test_the_future_never_changes_the_past_and_rows_never_meet(which, decay):
    inputs = scan_inputs(decay, 3, 70)
    changed = {k: t.clone() for k, t in inputs.items()}
    for k in ALONG:
        changed[k][:2, 41:] = 7.0  # the future of two rows
        changed[k][2] = -5.0  # all of the third
    with form(which):
        y, y2 = kernels.ssm_scan(**inputs)[0], kernels.ssm_scan(**changed)[0]
        alone, _ = kernels.ssm_scan(**stretch(inputs, slice(None), slice(1, 2)))
    assert torch.equal(y[:2, :41], y2[:2, :41]) and not torch.equal(y[0, 41:], y2[0, 41:])
    assert_close(y[1:2], alone, 1e-6)


@FORMS
@DECAYS
def test_y_is_linear_in_x(which, decay):
    inputs = scan_inputs(decay, 1, 67, options=("D", "z", "dt_bias"))
    x, other = inputs.pop("x"), scan_inputs(decay, 1, 67, seed=9)["x"]
    with form(which):
        y, y1, y2 = (kernels.ssm_scan(v, **inputs)[0] for v in (2 * x - 3 * other, x, other))
    assert_close(y, 2 * y1 - 3 * y2, 5e-5)


@DECAYS
@pytest.mark.parametrize("dtype", KINDS)
def test_rows_of_a_small_batch_may_be_cut_into_segments(monkeypatch, decay, dtype):
    monkeypatch.setattr(kernels, "segments", lambda channels, l: 3)
    l, heads = (21, (2, 1, 2)) if decay == "mamba" else (99, (2, 2, 1))
    inputs = cast(scan_inputs(decay, 4, l, heads, (5, 3)), dtype)
    inputs["A"] = inputs["A"] / 100  # what a segment hands on is still there two segments on
    check("triton", stretch(inputs, slice(None), slice(1)))
    if decay == "mamba":
        inputs["A"][0, 0] = 0  # a channel that forgets nothing by itself
    starts = (), (l // 3,), (3, 2 * l // 3 - 1, l - 1), (0, l // 3 + 3, l // 3 + 4)
    check_packed("triton", inputs, torch.tensor([places(l, row, 7) for row in starts]).to(DEVICE))


def test_the_segments_of_a_row_are_equal_and_fewer_the_more_rows_there_are():
    for l in (1, 255, 4096, 6 * 1031, 2**20):
        cuts = [kernels.segments(channels, l) for channels in (1, 64, 512, 4096, 2**17)]
        assert all(c >= 1 and l % c == 0 for c in cuts) and cuts == sorted(cuts, reverse=True)
        assert cuts[-1] == 1
    assert cuts[0] > 1  # of the longest


# --------------------------------------------------------------------------------------------------
# Packed sequences: a row of several documents is each of them alone


def places(l, starts, before):
    """pos of a row whose documents start at `starts`, after `before` tokens of one begun earlier."""
    row = []
    for t in range(l):
        row.append(0 if t in starts else row[-1] + 1 if row else before)
    return row


@st.composite
def packings(draw):
    """pos (2, l): most documents end at the border of a tile or next to it, some are a token long."""
    l = draw(LENGTHS)
    border = st.sampled_from([0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])
    starts, before = st.sets(border | st.integers(0, l), max_size=6), st.sampled_from([1, 2, 3, 50])
    rows = [places(l, draw(starts), draw(before)) for _ in range(2)]
    return torch.tensor(
        rows, dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE
    )


def documents(row):
    """The tokens of each document of a row of pos, as slices."""
    starts = [t for t in range(1, len(row)) if row[t] == 0]
    return [slice(*ends) for ends in zip([0, *starts], [*starts, len(row)], strict=True)]


def each_alone(pos, h0, **inputs):
    """The definition of every document alone; h0 is of the one that a row begins within."""
    ys, hs = [], []
    for i, row in enumerate(pos.tolist()):
        h = h0[i : i + 1] * (row[0] > 0)
        for at in documents(row):
            y, last = kernels.ssm_reference(**stretch(inputs, at, slice(i, i + 1)), h0=h)
            ys.append(y)
            h = None
        hs.append(last)
    return torch.cat(ys, dim=1).view(len(pos), -1, *ys[0].shape[2:]), torch.cat(hs)


def check_packed(which, inputs, pos, f=kernels.ssm_scan):
    alone = functools.partial(each_alone, pos)
    return check(which, inputs, functools.partial(f, pos=pos), alone)


@FORMS
@DECAYS
@EXAMPLES
@given(
    packings(),
    st.sampled_from([(1, 1), (3, 5), (16, 16)]),
    st.sampled_from([1, 0, 1e-4, 1e4]),
    SEEDS,
)
def test_packed_documents_are_each_of_them_alone(which, decay, pos, size, decays, seed):
    inputs = scan_inputs(decay, *pos.shape, (2, 1, 2), size, seed)
    inputs["A"] = inputs["A"] * decays
    check_packed(which, inputs, pos)
    if which == "torch":
        check_packed(which, cast(inputs, torch.float64), pos)
        check_packed(which, cast(inputs, torch.float64), pos, kernels.ssm_reference)


@FORMS
@DECAYS
@pytest.mark.parametrize("dtype", KINDS)
def test_the_first_step_of_a_document_moves_nothing_but_what_it_writes(which, decay, dtype):
    """Its gradient through the decay is zero, not nearly: where it writes nothing, nothing is left."""
    pos = torch.tensor([places(67, (0, 5, 6, 16, 40), 0), places(67, (9, 66), 3)], device=DEVICE)
    inputs = cast(scan_inputs(decay, *pos.shape), dtype)
    inputs["x"] = inputs["x"] * (pos > 0)[..., None, None]
    with form(which):
        got = value_and_gradients(functools.partial(kernels.ssm_scan, pos=pos), inputs)
    assert not got["ddt"][pos == 0].any() and got["ddt"][pos > 0].any()
    assert not got["dh0"][0].any() and got["dh0"][1].any()


# --------------------------------------------------------------------------------------------------
# The convolution


def conv_inputs(b, l, heads, w, options=("bias", "state"), seed=1):
    """Random inputs of causal_conv by name, x a part of a wider projection. heads: g, h, p."""
    (g, h, p), generator = heads, torch.Generator().manual_seed(seed)
    shapes = dict(x=(b, l, g * p), weight=(h, p, w), bias=(h, p), state=(b, w - 1, g, p))
    inputs = {k: random(generator, *shape) for k, shape in shapes.items()}
    inputs["x"] = lay(inputs["x"], "sliced").unflatten(2, (g, p))
    return {k: t for k, t in inputs.items() if k in ("x", "weight", *options)}


def conv_formula(x, weight, bias=None, state=None, pos=None):
    """SiLU of PyTorch's convolution of every document alone, and the inputs that a next call needs."""
    (b, l, g, p), (h, _, w) = x.shape, weight.shape
    full = torch.cat([x.new_zeros(b, w - 1, g, p) if state is None else state, x], dim=1)
    wide = full.repeat_interleave(h // g, dim=2).flatten(2).transpose(1, 2)  # (b, h·p, w-1+l)
    weight, bias, ys = weight.reshape(h * p, 1, w), None if bias is None else bias.flatten(), []
    for i, row in enumerate([range(w, w + l)] * b if pos is None else pos.tolist()):
        for at in documents(row):
            first = at.start + w - 1 - min(row[at.start], w - 1)
            seen = F.pad(wide[i : i + 1, :, first : at.stop + w - 1], (w - 1, 0))
            ys.append(F.conv1d(seen, weight, bias, groups=h * p)[..., at.start - at.stop :])
    return F.silu(torch.cat(ys, dim=2)).view(h, p, b, l).permute(2, 3, 0, 1), full[:, l:]


@FORMS
@settings(max_examples=8 if DEVICE == "cuda" else 20)
@given(
    st.tuples(packings(), st.booleans(), SEEDS),
    st.sampled_from([(1, 1, 5), (2, 6, 3), (2, 8, 8), (1, 3, 130), (1, 2, 64)]),
    st.sampled_from([1, 2, 4]),
    st.sets(st.sampled_from(["bias", "state"])),
)
def test_convolution_is_pytorchs_of_each_document(which, rows, heads, w, options):
    """In value and every gradient."""
    pos, packed, seed = rows
    inputs, pos = conv_inputs(*pos.shape, heads, w, options, seed), pos if packed else None
    conv, formula = (functools.partial(f, pos=pos) for f in (kernels.causal_conv, conv_formula))
    check(which, inputs, conv, formula)
    if which == "torch":
        check(which, cast(inputs, torch.float64), conv, formula)


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True])
def test_a_narrow_convolution_rounds_once(which, dtype, masters):
    """And so do its gradients but dx, which sums over what was rounded. Weights may be float32."""
    inputs = conv_inputs(2, 40, (2, 8, 5), 4)
    inputs = {
        k: t if masters and k in ("weight", "bias") else t.to(dtype) for k, t in inputs.items()
    }
    with form(which):
        got = value_and_gradients(kernels.causal_conv, inputs)
    want = value_and_gradients(conv_formula, {k: t.double() for k, t in inputs.items()})
    rounding = torch.finfo(dtype).eps * (1 if which == "triton" and DEVICE == "cpu" else 0.51)
    for k in want:  # the interpreter cuts off instead
        assert_close(got[k], want[k], 2 * rounding if k == "dx" else rounding, k)


@FORMS
@pytest.mark.parametrize("options", [(), ("state",)])
def test_convolution_gives_each_padded_row_its_own_state(which, options):
    inputs, lengths = (
        conv_inputs(3, 6, (2, 4, 5), 4, options),
        torch.tensor([1, 4, 6], device=DEVICE),
    )
    with form(which), torch.no_grad():
        _, end = kernels.causal_conv(**inputs, lengths=lengths)
        for i, n in enumerate(lengths.tolist()):
            _, alone = kernels.causal_conv(**stretch(inputs, slice(n), slice(i, i + 1)))
            assert torch.equal(end[i : i + 1], alone)


@FORMS
def test_a_convolutions_state_of_another_type_is_taken_in_that_of_x(which):
    inputs = cast(conv_inputs(2, 2, (1, 4, 4), 4), torch.float16)
    with form(which), torch.no_grad():
        y, state = kernels.causal_conv(**inputs)
    assert y.dtype == state.dtype == torch.float16 and inputs["state"].dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Arguments, types and memory


def operation(name):
    """The scan or the convolution as a function of named tensors, and such tensors."""
    if name == "conv":
        return kernels.causal_conv, conv_inputs(2, 9, (2, 4, 5), 4)
    return kernels.ssm_scan, scan_inputs(name, 2)


@OPERATIONS
def test_shapes_that_do_not_fit_are_refused_by_name(name):
    f, inputs = operation(name)
    wrong = {k: torch.cat([t, t], dim=-2 if name == "conv" else -1) for k, t in inputs.items()}
    for k in inputs.keys() - {"x"}:
        with pytest.raises(ValueError, match=rf"\b{k} is"):
            f(**{**inputs, k: wrong[k]})
    for shape in ((9,), (2, 8), (2, 9, 1)):
        with pytest.raises(ValueError, match="pos is"):
            f(**inputs, pos=torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(ValueError, match="must (both )?divide"):
        f(**{**inputs, "x": inputs["x"][:, :, [0, 0, 0]]})
    with pytest.raises(ValueError, match="no tokens"):
        f(**stretch(inputs, slice(0)))


@FORMS
@OPERATIONS
def test_two_runs_a_checkpoint_and_a_run_without_gradients_give_the_same_bits(which, name):
    f, inputs = operation(name)
    with form(which):
        want = value_and_gradients(f, inputs)
        for again in (f, functools.partial(checkpoint, f, use_reentrant=False)):
            got = value_and_gradients(again, inputs)
            assert all(torch.equal(got[k], want[k]) for k in want)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                assert torch.equal(f(**inputs)[0], want["y"])


@OPERATIONS
def test_a_gradient_of_a_gradient_is_refused(name):
    f, inputs = operation(name)
    inputs["x"].requires_grad_()
    with form("triton"):
        (dx,) = torch.autograd.grad(f(**inputs)[0].square().sum(), inputs["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            dx.square().sum().backward()


@FORMS
@DECAYS
@pytest.mark.parametrize("l", [1, 70])
def test_autocast_leaves_state_and_decay_in_float32(which, decay, l):
    inputs = cast(scan_inputs(decay, 1, l), torch.bfloat16)
    with form(which):
        want = kernels.ssm_scan(**inputs)
        with torch.autocast(DEVICE, torch.bfloat16):
            got = kernels.ssm_scan(**inputs)
    assert got[1].dtype == torch.float32 and all(map(torch.equal, got, want))


@FORMS
@DECAYS
def test_an_empty_batch_gives_an_empty_result(which, decay):
    with form(which):
        got = value_and_gradients(kernels.ssm_scan, scan_inputs(decay, 0))
    assert got["y"].shape == (0, 9, 2, 4) and got["h"].shape == (0, 2, 4, 3)


@DECAYS
def test_sizes_above_256_take_the_pytorch_form(monkeypatch, decay):
    monkeypatch.setattr(kernels, "scan_rows", None)
    check("triton", scan_inputs(decay, 1, 3, (1, 1, 1), (2, 257)))


def test_without_triton_everything_takes_the_pytorch_form():
    program = """
import sys
sys.modules["triton"] = None
import torch, kernels, mil
assert kernels.triton is None
sizes = dict(v=9, d=8, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=8, d_state=2)
model = mil.Hybrid(mil.Config(**sizes, mixers=["attention", "mamba", "mamba2"]))
model(torch.zeros(1, 70, dtype=torch.long)).sum().backward()
with torch.no_grad():
    model(torch.zeros(1, 1, dtype=torch.long), mil.Cache(model, 1, 4))
"""
    done = run_script("-c", program)
    assert done.returncode == 0, done.stderr


@OPERATIONS
def test_rows_more_than_2_to_the_31_elements_apart_are_read(name):
    f, inputs = operation(name)
    inputs = {k: t.bfloat16() for k, t in inputs.items() if k not in ("h0", "state", "z", "D")}
    room = torch.empty(
        2**32 + 512, dtype=torch.bfloat16, device=DEVICE
    )  # the CPU touches two pages
    with form("triton"):
        want = value_and_gradients(f, inputs)
        for k in inputs.keys() & {"x", "B", "C"}:
            t = inputs[k].contiguous()
            far = room.as_strided(t.shape, (2**32, *t.stride()[1:])).copy_(t)
            got = value_and_gradients(f, {**inputs, k: far})
            assert all(torch.equal(got[name], want[name]) for name in want), k


# --------------------------------------------------------------------------------------------------
# What PyTorch is told about the operators, and what the kernels touch


class Calls(TorchDispatchMode):
    """Notes the calls of our operators, with their arguments."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "mil":
            self.seen.append((op, args))
        return op(*args, **(kwargs or {}))


@OPERATIONS
@pytest.mark.parametrize("full", [False, True])
def test_the_operators_are_what_pytorch_is_told_of_them(name, full):
    f, inputs = operation(name)
    pos = torch.tensor([places(9, (0, 4), 0)] * 2, device=DEVICE) if full else None
    inputs = {k: t for k, t in inputs.items() if full or k not in (*OPTIONS, "bias", "state")}
    with form("triton"):
        with Calls() as calls:
            calls.seen = []
            value_and_gradients(functools.partial(f, pos=pos), inputs)
        assert len(calls.seen) == 2  # forward and backward
        for i, (op, args) in enumerate(calls.seen):
            if i == 0:
                args = [
                    t.detach().requires_grad_(t.is_floating_point()) if t is not None else t
                    for t in args
                ]
            tests = ("test_schema", "test_faketensor", "test_autograd_registration")[: 3 - i]
            torch.library.opcheck(op, args, test_utils=tests)


SIZES_OF_A_HYBRID = dict(
    v=9, d=24, n_layers=4, n_heads=3, n_kv_heads=1, head_dim=20, d_ff=28, d_state=10
)


def hybrid():
    """A small one of all mixers."""
    return build(mil.Config(**SIZES_OF_A_HYBRID, mixers=mil.MIXERS), torch.float32)


def test_a_compiled_hybrid_of_packed_rows_is_one_graph_and_equals_the_eager_one():
    model = hybrid()
    torch._dynamo.reset()
    compiled = torch.compile(model.hidden, backend="aot_eager", fullgraph=True)
    for l, starts in ((9, (0, 4)), (13, (0, 5, 9))):
        docs = mil.Documents(torch.tensor([places(l, starts, 0)]), torch.device(DEVICE))
        results = []
        with form("triton"):
            for hidden in (compiled, model.hidden):
                u, w = (
                    hidden(random_tokens(model.config, 1, l), docs=docs),
                    list(model.parameters()),
                )
                results.append(
                    [u, *torch.autograd.grad(u.square().mean(), w, materialize_grads=True)]
                )
        for got, want in zip(*results, strict=True):
            assert_close(got, want, 1e-4)


def decode():
    """Logits of a few passes by the kernels of decoding."""
    model = hybrid()
    cache = mil.Cache(model, 2, 20)
    with torch.no_grad(), form("triton"):
        return torch.cat([model(random_tokens(model.config, 2, l), cache) for l in (1, 3)], dim=1)


@pytest.fixture
def poisoned():
    """New memory is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert (
        torch.empty(1, device=DEVICE).isnan() and torch.ones(1, device=DEVICE).new_empty(1).isnan()
    )
    yield
    torch.use_deterministic_algorithms(False)


@OPERATIONS
@pytest.mark.parametrize("c", [1, 3])
def test_nothing_undefined_is_ever_read_or_returned(monkeypatch, poisoned, name, c):
    monkeypatch.setattr(kernels, "segments", lambda channels, l: c)
    f, inputs = operation(name)
    inputs = {k: t for k, t in inputs.items() if c > 1 or k not in (*OPTIONS, "bias", "state")}
    with form("triton"):
        assert all(t.isfinite().all() for t in value_and_gradients(f, inputs).values())


def test_decoding_reads_nothing_undefined(poisoned):
    assert decode().isfinite().all()


@pytest.fixture
def touched(monkeypatch):
    """How many numbers each load and store went to, all within the tensors its kernel was given."""
    if DEVICE == "cuda":
        pytest.skip("looks at the interpreter's loads and stores")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, launch, reach, touched = (
        interpreter.InterpreterBuilder,
        interpreter.GridExecutor.__call__,
        [],
        [],
    )

    def watched_launch(self, *args, **constants):
        reach.clear()
        for t in filter(torch.is_tensor, args):
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            reach.append((t.data_ptr(), t.data_ptr() + t.element_size() * (1 + last)))
        return launch(self, *args, **constants)

    def watch(name, mask_at):
        method = getattr(builder, name)

        def watched(self, ptrs, *args):
            at = ptrs.data[args[mask_at].data.astype(bool)].astype("int64")
            assert np.any([(at >= start) & (at < end) for start, end in reach], axis=0).all(), name
            touched.append(at.size)
            return method(self, ptrs, *args)

        monkeypatch.setattr(builder, name, watched)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_launch)
    watch("create_masked_load", 0)
    watch("create_masked_store", 1)
    return touched


@OPERATIONS
@pytest.mark.parametrize("c, l", [(1, 19), (1, 32), (3, 33)])
def test_nothing_outside_its_tensors_is_touched_by_a_kernel(monkeypatch, touched, name, c, l):
    """Not even where the value read is thrown away."""
    monkeypatch.setattr(kernels, "segments", lambda channels, l: c)
    pos = torch.tensor([places(l, (), 1), places(l, (0, 9), 0)], dtype=torch.int32)
    f, inputs = kernels.causal_conv, conv_inputs(2, l, (2, 4, 5), 4)
    if name != "conv":
        f, inputs = kernels.ssm_scan, scan_inputs(name, 2, l, size=(5, 3))
    with form("triton"):
        value_and_gradients(functools.partial(f, pos=pos), inputs)
    assert sum(touched) > 1000


def test_decoding_touches_nothing_outside_its_tensors(touched):
    decode()
    assert sum(touched) > 1000


# --------------------------------------------------------------------------------------------------
# Decoding. Attention over a cache and the replay are tested through the model, in test_mil.py.

ROWS = st.sampled_from([(1, 1), (2, 3), (1, 16), (3, 7), (5, 14), (kernels.MANY + 6, 1)])  # b, l


@settings(max_examples=12)
@given(ROWS, st.sampled_from([1, 5, 100, 300]), st.sampled_from([1, 31, 64, 90]), SEEDS)
def test_the_layers_of_decoding_are_pytorchs_formulas(rows, k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    for dtype in KINDS:
        x = random(generator, *rows, 2 * k).to(dtype)[..., :k]
        onto, weights = random(generator, *rows, n).to(dtype), random(generator, 3, n, k).to(dtype)
        y, gate, _ = exact = [x.double() @ w.double().T for w in weights]
        gated, apart = F.silu(gate) * y, [w.clone() for w in weights]
        normed = F.rms_norm(x.double(), (k,), weights[0, 0].double(), 0.1)
        with form("triton"), torch.no_grad():
            pairs = [
                (kernels.linear(x, weights[0]), y),
                (kernels.linear(x, weights[0], onto=onto), y + onto),
                (kernels.linear(x, weights[0], gate=weights[1]), gated),
                (kernels.linear(x, weights[0], weights[1], onto), gated + onto),
                (kernels.rms_norm(x, weights[0, 0], 0.1), normed),
                *zip(kernels.linears(x, *weights), exact, strict=True),
                *zip(kernels.linears(x, *apart), exact, strict=True),
            ]
        for got, want in pairs:
            assert_close(got, want, TOLERANCE[dtype])


def test_a_row_has_the_same_bits_in_any_company():
    generator, shapes = torch.Generator().manual_seed(1), ((10, 8, 520), (40, 520), (40, 520))
    x, w, v = (random(generator, *shape).to(KINDS[-1]) for shape in shapes)
    others = torch.cat([x[:1, :1], 100 * x[1:2, 1:5]], dim=1)
    layers = (
        functools.partial(kernels.linear, weight=w),
        functools.partial(kernels.linear, weight=w, gate=v),
    )
    with form("triton"), torch.no_grad():
        for layer in (*layers, functools.partial(kernels.rms_norm, weight=w[0], eps=1e-5)):
            whole = layer(x)
            for b, l in ((1, 1), (1, 5), (2, 8), (3, 7), (10, 1), (10, 5)):
                assert_same_bits(layer(x[:b, :l]), whole[:b, :l])
            assert_same_bits(layer(others)[:, :1], whole[:1, :1])


def test_few_tokens_go_to_the_kernels_of_decoding_where_nothing_is_differentiated():
    x, w = torch.randn(1, 2, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    with form("triton"):
        assert not kernels.few(x, 2, w)
        with torch.no_grad():
            assert kernels.few(x, 2, w) and kernels.few(x, kernels.FEW, w)
            assert not kernels.few(x, kernels.FEW + 1, w) and not kernels.few(x, 2, w.half())
            with torch.autocast(DEVICE, torch.bfloat16):
                assert not kernels.few(x, 2, w)


@pytest.mark.skipif(DEVICE == "cuda", reason="storages that touch are made in the CPU's memory")
def test_weights_of_two_storages_are_not_read_as_one_though_they_touch():
    memory, x = bytearray(2 * 4 * 128), torch.randn(1, 2, 16)
    storages = (memoryview(memory)[512 * i : 512 * (i + 1)] for i in range(2))
    a, b = (torch.frombuffer(m, dtype=torch.float32).normal_().view(8, 16) for m in storages)
    assert a.data_ptr() + a.nbytes == b.data_ptr()
    with form("triton"), torch.no_grad():
        for got, w in zip(kernels.linears(x, a, b), (a, b), strict=True):
            assert_close(got, x @ w.T, 1e-5)
