"""The definition is the formula, and every fast form is the definition."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, assert_same_bits, build, form, random_tokens, run_script
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import kernels
import mil

FORMS = pytest.mark.parametrize("which", ["triton", "torch"])
DECAYS = pytest.mark.parametrize("decay", ["mamba", "mamba2"])
OPERATIONS = pytest.mark.parametrize("name", ["mamba", "mamba2", "conv"])
KINDS = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
EXAMPLES = settings(max_examples=5)  # a GPU compiles each shape, the interpreter is slow

SEEDS = st.integers(0, 2**31)
LENGTHS = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 129])
HEADS = [(6, 3, 2), (4, 2, 1), (3, 1, 3), (4, 1, 2), (2, 1, 2), (2, 2, 1), (17, 17, 17)]
SIZES = [(1, 1), (3, 5), (5, 3), (16, 16), (7, 130), (20, 17), (2, 2)]  # p, n; heads: h, gx, gb
SHAPES = st.sampled_from(list(zip(HEADS, SIZES, strict=True)))
TYPES = [(torch.float64, (1, 17)), (torch.float16, (16, 16)), (torch.bfloat16, (16, 16))]
TYPES += [(dtype, (256, 256)) for dtype in KINDS if DEVICE == "cuda"]
ALONG = ("x", "dt", "B", "C", "z")  # the inputs with one value per token
OPTIONS = ("D", "z", "dt_bias", "h0", "bias", "state")


def scan_inputs(decay, b=1, l=9, heads=(2, 1, 2), size=(4, 3), seed=1, options=OPTIONS):
    """Random inputs of ssm_scan by name. heads: h, gx, gb; size: p, n."""
    (h, gx, gb), (p, n) = heads, size
    generator = torch.Generator().manual_seed(seed)
    per = (h, p) if decay == "mamba" else (h,)
    shapes = dict(x=(b, l, gx, p), dt=(b, l, *per), A=(*per, n) if decay == "mamba" else per)
    shapes |= dict(B=(b, l, gb, n), C=(b, l, h, n), D=per, z=(b, l, h, p), dt_bias=per)
    inputs = {k: random(generator, *shape) for k, shape in shapes.items()}
    inputs |= {"A": -inputs["A"].exp(), "h0": random(generator, b, h, p, n)}
    return {k: t for k, t in inputs.items() if k not in OPTIONS or k in options}


def random(generator, *shape):
    return torch.randn(*shape, generator=generator).to(DEVICE)


def length(which, decay, l):
    """l, but for the slow interpreter at most two tiles and a token."""
    most = 17 if decay == "mamba" else 65
    return l if l <= most or which == "torch" or DEVICE == "cuda" else l % most + 1


def cast(inputs, dtype):
    """Activations in this type; what makes up the decay in float32 or more."""
    wide = torch.promote_types(dtype, torch.float32)
    return {k: t.to(dtype if k in ALONG else wide) for k, t in inputs.items()}


def lay(t, layout):
    """The same numbers elsewhere in memory, with NaN or 0 between and around them."""
    gap = torch.full_like(t, torch.nan if t.is_floating_point() else 0)
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
    generator = torch.Generator().manual_seed(1)  # bfloat16: the same numbers in every type
    return sum((t * random(generator, *t.shape).bfloat16().to(t)).double().sum() for t in (y, h))


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
    largest = max(t.detach().abs().max().item() for t in want.values() if t.numel())
    for k in want:  # a sum over everything can cancel down to the rounding of its largest terms
        sums = k in ("dA", "ddt_bias", "dD", "dweight", "dbias")
        noise = largest * (64 * torch.finfo(got["h"].dtype).eps if sums else 1e-14)
        assert_close(got[k], want[k], TOLERANCE[got["y"].dtype], k, noise)
    return got, want


@DECAYS
@given(st.integers(1, 6), st.sampled_from(HEADS), SEEDS)
@settings(max_examples=20)
def test_the_definition_is_the_closed_form(decay, l, heads, seed):
    """h_t = exp(A Σ_{r≤t} Δ_r) h_0 + Σ_{s≤t} exp(A Σ_{s<r≤t} Δ_r) Δ_s x_s B_sᵀ, in numpy."""
    inputs = cast(scan_inputs(decay, 2, l, heads, (3, 2), seed), torch.float64)
    x, dt, A, B, C, D, z, bias, h0 = (t.cpu().numpy() for t in inputs.values())
    x, B = (np.repeat(t, heads[0] // t.shape[2], axis=2) for t in (x, B))
    delta = np.log1p(np.exp(dt + bias))
    if decay == "mamba2":
        delta, A, D = delta[..., None], A[:, None, None], D[:, None]
    since = np.cumsum(delta, axis=1)[..., None] * A  # (b, l, h, p, n)
    write, y = (delta * x)[..., None] * B[:, :, :, None], np.zeros_like(z)
    for t in range(l):
        between = np.exp(since[:, t : t + 1] - since[:, : t + 1])
        h = np.exp(since[:, t]) * h0 + (between * write[:, : t + 1]).sum(1)
        y[:, t] = (h * C[:, t, :, None]).sum(-1)
    y = (y + D * x) * z / (1 + np.exp(-z))
    for got, want in zip(kernels.ssm_reference(**inputs), (y, h), strict=True):
        assert_close(got, torch.from_numpy(want), 1e-10)


@FORMS
@DECAYS
@EXAMPLES
@given(
    st.tuples(st.integers(1, 2), LENGTHS, SHAPES, SEEDS),
    st.sets(st.sampled_from(OPTIONS[:4])),
    st.sampled_from(["dense", "sliced", "strided", "turned"]),
)
@example((1, 40, ((6, 2, 2), (3, 5)), 0), set(OPTIONS[:4]), "dense")  # 3 heads read one of x and B
@example((1, 9, ((2, 1, 1), (3, 40)), 0), set(), "dense")  # several blocks of n, and of p
@example((1, 9, ((2, 1, 1), (130, 3)), 0), {"h0"}, "dense")
@example((1, 9, ((17, 17, 17), (2, 2)), 0), set(), "dense")
def test_scan_equals_the_definition_in_value_and_every_gradient(which, decay, sizes, options, lie):
    b, l, shape, seed = sizes
    for some in (length(which, decay, l),) if which == "triton" else (l, 1, 64, 65, 129):
        inputs = scan_inputs(decay, b, some, *shape, seed, options)
        check(which, {k: lay(t, lie) for k, t in inputs.items()})


@FORMS
@DECAYS
@pytest.mark.parametrize("dtype, size", [*TYPES, (torch.float32, (2, 257))])
def test_scan_takes_every_type_and_size_and_an_empty_batch(which, decay, dtype, size):
    for b in (0, 1):
        inputs = scan_inputs(decay, b, 9 if decay == "mamba" else 67, (4, 2, 1), size)
        got, want = check(which, cast(inputs, dtype))
    assert got["y"].dtype == dtype and got["h"].dtype == torch.promote_types(dtype, torch.float32)
    in_bf16 = (DEVICE, which, decay, dtype) == ("cuda", "triton", "mamba2", torch.bfloat16)
    if not in_bf16:  # dt + dt_bias and the state are float32
        assert_close(got["h"], want["h"], TOLERANCE[torch.float32])


@FORMS
@DECAYS
@pytest.mark.parametrize("packed", [False, True])
def test_scan_survives_extreme_steps_and_decays(which, decay, packed):
    """Also zeros, numbers around 1e4, and tokens that a step of minus infinity hides."""
    l = 19 if decay == "mamba" else 35
    pos = torch.tensor([places(l, (1, 7, 8, l - 1), 2**30)], device=DEVICE) if packed else None
    scan, definition = (partial(f, pos=pos) for f in (kernels.ssm_scan, kernels.ssm_reference))
    shifts, decays = (-30, 30, 1e4, 0, 0, 0, 30, 30), (-1, -1, -1, -20, -50, -1e4, -1e4, -1e-4)
    for scale, shift, A in [(1, *case) for case in zip(shifts, decays, strict=True)] + [(0, 0, 0)]:
        inputs = {k: t * scale for k, t in scan_inputs(decay, 1, l, (1, 1, 1)).items()}
        inputs |= {k: inputs[k] / 10 for k in ("dt", "dt_bias")}  # steps of one size
        inputs["dt"], inputs["A"] = inputs["dt"] + shift, torch.full_like(inputs["A"], A)
        hidden = slice(4, 6 if packed else 4)
        inputs["dt"][:, hidden] = -torch.inf
        got, want = check(which, inputs, scan, definition)
        assert not got["ddt"][:, hidden].any() and not got["dB"][:, hidden].any()
        if packed:
            with form(which):
                got = value_and_gradients(scan, {k: t * 1e4 for k, t in inputs.items()})
            assert all(t.isfinite().all() for t in got.values())
        elif A < -1:  # dA is as small as the decay: the rest of a difference of states is noise
            assert_close(got["dA"], want["dA"], 1e-3, "dA", 1e-12)


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


LOSSES = {
    "y": lambda y, h: y.square().sum(),
    "h": lambda y, h: h.square().sum(),
    "sums, whose gradients have strides of 0": lambda y, h: y.sum() + h.sum(),
    "slices": lambda y, h: sum(torch.stack([t, t.detach()], -1).sin().sum() for t in (y, h)),
}


@FORMS
@DECAYS
@pytest.mark.parametrize("l", [2, 17, 140, 2**20 if DEVICE == "cuda" else 2**12])
def test_scan_can_be_cut_anywhere_and_resumed(which, decay, l):
    l = length(which, decay, l)
    inputs = scan_inputs(decay, 1, l)
    inputs["A"] = inputs["A"] / min(l, 100)  # a memory of the whole, or of up to 2,000 tokens
    tolerance = 1e-4 if l < 2**20 else 2e-4  # of the largest of a million errors, in float32
    with form(which):
        y, h = kernels.ssm_scan(**inputs)
        for cut in {1, l // 3, l // 2 + 7, l - 1} & set(range(1, l)):
            y1, h1 = kernels.ssm_scan(**stretch(inputs, slice(cut)))
            y2, h2 = kernels.ssm_scan(**stretch(inputs, slice(cut, None)) | {"h0": h1})
            assert_close(torch.cat([y1, y2], dim=1), y, tolerance, "y")
            assert_close(h2, h, tolerance, "h")


@DECAYS
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_a_small_batch_may_be_cut_into_segments(monkeypatch, decay, dtype, packed):
    monkeypatch.setattr(kernels, "segments", lambda channels, l: 3)
    l, heads = 15 if decay == "mamba" else 99, (1, 1, 1) if packed else (4, 1, 2)
    inputs = cast(scan_inputs(decay, 4 if packed else 1, l, heads), dtype)
    inputs["A"] = inputs["A"] / 100  # what a segment hands on is still there two segments on
    if decay == "mamba":
        inputs["A"][0, 0] = 0  # a channel that forgets nothing by itself
    starts = (), (l // 3,), (3, 2 * l // 3 - 1, l - 1), (0, l // 3 + 3, l // 3 + 4)
    pos = torch.tensor([places(l, row, 7) for row in starts]).to(DEVICE)
    check_packed("triton", inputs, pos) if packed else check("triton", inputs)


# -------------------- Packed sequences: a row of several documents is each of them alone


def places(l, starts, before):
    """pos of a row whose documents start at `starts`, after `before` tokens of another."""
    begins = [max([-before, *(s for s in starts if s <= t)]) for t in range(l)]
    return [t - begin for t, begin in enumerate(begins)]


@st.composite
def packings(draw):
    """pos (2, l): many documents end at the border of a tile or next to it."""
    l, integers = draw(LENGTHS), st.sampled_from([torch.int32, torch.int64])
    border = st.sampled_from([0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])
    starts, before = st.sets(border | st.integers(0, l), max_size=6), st.sampled_from([1, 2, 3, 50])
    rows = [places(l, draw(starts), draw(before)) for _ in range(2)]
    pos = torch.tensor(rows, dtype=draw(integers), device=DEVICE)
    return lay(pos, draw(st.sampled_from(["dense", "strided", "turned"])))


def documents(row):
    """The tokens of each document of a row of pos, as slices."""
    starts = [t for t in range(1, len(row)) if row[t] == 0]
    return [slice(*ends) for ends in zip([0, *starts], [*starts, len(row)], strict=True)]


def each_alone(pos, h0, **inputs):
    """The definition of every document alone; h0 is of the one that a row begins within."""
    ys, hs = [], []
    for i, row in enumerate(pos.tolist()):
        h = h0[i : i + 1]
        for at in documents(row):
            tokens = stretch(inputs, at, slice(i, i + 1))
            y, h = kernels.ssm_reference(**tokens, h0=h * (row[at.start] > 0))
            ys.append(y)
        hs.append(h)
    return torch.cat(ys, dim=1).view(len(pos), -1, *ys[0].shape[2:]), torch.cat(hs)


def check_packed(which, inputs, pos, f=kernels.ssm_scan):
    return check(which, inputs, partial(f, pos=pos), partial(each_alone, pos))


@FORMS
@DECAYS
@EXAMPLES
@given(packings(), st.sampled_from(SIZES[:4]), st.sampled_from([1, 0, 1e-4, 1e4]), SEEDS)
def test_packed_documents_are_each_of_them_alone(which, decay, pos, size, faster, seed):
    """A first token's gradient through its decay is exactly 0: if it writes nothing, ddt is."""
    pos = pos[:, : length(which, decay, pos.shape[1])]
    inputs = scan_inputs(decay, *pos.shape, (2, 1, 2), size, seed)
    inputs["A"] = inputs["A"] * faster
    inputs["x"][0] = inputs["x"][0] * (pos[0] > 0)[:, None, None]
    got, _ = check_packed(which, inputs, pos)
    assert not got["ddt"][0, pos[0] == 0].any() and not got["dh0"][pos[:, 0] == 0].any()
    if which == "torch":
        check_packed(which, cast(inputs, torch.float64), pos)
        check_packed(which, cast(inputs, torch.float64), pos, kernels.ssm_reference)


# -------------------- The convolution


def conv_inputs(b, l, heads, w, options=("bias", "state"), seed=1):
    """Random inputs of causal_conv by name, x a part of a wider projection. heads: g, h, p."""
    (g, h, p) = heads
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(x=(b, l, g * p), weight=(h, p, w), bias=(h, p), state=(b, w - 1, g, p))
    inputs = {k: random(generator, *shape) for k, shape in shapes.items()}
    inputs["x"] = lay(inputs["x"], "sliced").unflatten(2, (g, p))
    return {k: t for k, t in inputs.items() if k in ("x", "weight", *options)}


def conv_formula(x, weight, bias=None, state=None, pos=None):
    """SiLU of PyTorch's convolution of every document alone, and the inputs a next call needs."""
    (b, l, g, p), (h, _, w) = x.shape, weight.shape
    full = torch.cat([x.new_zeros(b, w - 1, g, p) if state is None else state, x], dim=1)
    wide = full.repeat_interleave(h // g, dim=2).flatten(2).transpose(1, 2)  # (b, h·p, w-1+l)
    weight, bias = weight.reshape(h * p, 1, w), None if bias is None else bias.flatten()
    ys = []
    for i, row in enumerate([range(w, w + l)] * b if pos is None else pos.tolist()):
        for at in documents(row):
            first = at.start + w - 1 - min(row[at.start], w - 1)
            seen = F.pad(wide[i : i + 1, :, first : at.stop + w - 1], (w - 1, 0))
            ys.append(F.conv1d(seen, weight, bias, groups=h * p)[..., at.start - at.stop :])
    return F.silu(torch.cat(ys, dim=2)).view(h, p, b, l).permute(2, 3, 0, 1), full[:, l:]


# A program has 128 tokens, one of the backward pass 125.
SEVERAL = torch.tensor([places(253, (60, 124, 127), 1)] * 2, device=DEVICE)


@FORMS
@settings(max_examples=6)
@given(
    st.tuples(packings(), st.booleans(), SEEDS),
    st.sampled_from([(1, 1, 5), (2, 6, 3), (2, 8, 8), (1, 3, 130), (1, 2, 64)]),
    st.sampled_from([1, 2, 4]),
    st.sets(st.sampled_from(["bias", "state"])),
)
@example((SEVERAL, True, 0), (1, 2, 3), 4, {"bias", "state"})
def test_convolution_is_pytorchs_in_value_and_every_gradient(which, rows, heads, w, options):
    pos, packed, seed = rows
    if pos is not SEVERAL:
        pos = pos[:, : length(which, "conv", pos.shape[1])]
    inputs, pos = conv_inputs(*pos.shape, heads, w, options, seed), pos if packed else None
    conv, formula = (partial(f, pos=pos) for f in (kernels.causal_conv, conv_formula))
    check(which, inputs, conv, formula)
    if which == "torch":
        check(which, cast(inputs, torch.float64), conv, formula)


def operation(name, l=9, b=2):
    """The scan or the convolution as a function of named tensors, and such tensors."""
    if name == "conv":
        return kernels.causal_conv, conv_inputs(b, l, (2, 4, 5), 4)
    return kernels.ssm_scan, scan_inputs(name, b, l)


@FORMS
@OPERATIONS
@pytest.mark.parametrize("loss", LOSSES)
def test_upstream_gradients_may_be_missing_or_lie_anywhere(which, name, loss):
    f, inputs = operation(name)
    definition = conv_formula if name == "conv" else kernels.ssm_reference
    check(which, inputs, f, definition, LOSSES[loss])


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True])
def test_a_narrow_convolution_rounds_once(which, dtype, masters):
    """And so do its gradients but dx, a sum over what was rounded. All but x may be float32."""
    inputs = {k: t.to(dtype) for k, t in conv_inputs(2, 40, (2, 8, 5), 4).items()}
    inputs = {k: t.float() if masters and k != "x" else t for k, t in inputs.items()}
    with form(which):
        got = value_and_gradients(kernels.causal_conv, inputs)
    want = value_and_gradients(conv_formula, {k: t.double() for k, t in inputs.items()})
    rounding = torch.finfo(dtype).eps * (1 if which == "triton" and DEVICE == "cpu" else 0.51)
    for k in want:  # the interpreter cuts off instead
        assert_close(got[k], want[k], 2 * rounding if k in ("dx", "dstate") else rounding, k)
    assert got["y"].dtype == got["h"].dtype == dtype


# -------------------- Arguments, operators and memory


@OPERATIONS
def test_shapes_that_do_not_fit_are_refused_by_name(name):
    f, inputs = operation(name)
    wrong = {k: torch.cat([t, t], dim=1 if name == "conv" else -1) for k, t in inputs.items()}
    for k in inputs.keys() - {"x"}:
        with pytest.raises(ValueError, match=rf"\b{k} is"):
            f(**{**inputs, k: wrong[k]})
    for shape in ((9,), (2, 8), (2, 9, 1)):
        with pytest.raises(ValueError, match="pos is"):
            f(**inputs, pos=torch.zeros(shape, dtype=torch.int32))
    three = {k: t for k, t in inputs.items() if k != "state"} | {"x": inputs["x"][:, :, [0, 0, 0]]}
    for match, changed in (("must divide", three), ("no tokens", stretch(inputs, slice(0)))):
        with pytest.raises(ValueError, match=match):
            f(**changed)


@FORMS
@OPERATIONS
def test_a_second_run_a_checkpoint_no_gradients_and_autocast_change_no_bit(which, name):
    f, inputs = operation(name)
    with form(which):
        want = value_and_gradients(f, inputs)
        for again in (f, partial(checkpoint, f, use_reentrant=False)):
            got = value_and_gradients(again, inputs)
            assert all(torch.equal(got[k], want[k]) for k in want)
        for changed in (torch.no_grad(), torch.inference_mode(), torch.autocast(DEVICE)):
            with changed:
                y, h = f(**inputs)
            assert torch.equal(y, want["y"]) and torch.equal(h, want["h"])


@OPERATIONS
def test_a_gradient_of_a_gradient_is_refused(name):
    f, inputs = operation(name)
    inputs["x"].requires_grad_()
    with form("triton"), pytest.raises(RuntimeError, match="differentiate twice"):
        (dx,) = torch.autograd.grad(f(**inputs)[0].square().sum(), inputs["x"], create_graph=True)
        dx.square().sum().backward()


def test_without_triton_everything_takes_the_pytorch_form():
    program = """
import sys
sys.modules["triton"] = None
import torch, kernels, mil
sizes = dict(v=9, d=8, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=8, d_state=2)
model = mil.Hybrid(mil.Config(**sizes, mixers=["attention", "mamba", "mamba2"]))
model(torch.zeros(1, 70, dtype=torch.long)).sum().backward()
with torch.no_grad():
    model(torch.zeros(1, 1, dtype=torch.long), mil.Cache(model, 1, 4))
"""
    done = run_script("-c", program)
    assert done.returncode == 0, done.stderr


@OPERATIONS
def test_what_lies_more_than_2_to_the_31_numbers_apart_is_read(name):
    """Tokens of a row, and rows. Heads as kernels read them where they lie."""
    f, _ = operation(name)
    # A tile of Mamba-2 is less than 2^31 numbers.
    l, step = (65, 2**25) if name == "mamba2" else (17, 2**27)
    conv = name == "conv"
    inputs = conv_inputs(2, l, (4, 4, 5), 4) if conv else scan_inputs(name, 2, l, (2, 1, 1))
    inputs = {k: t.bfloat16() for k, t in inputs.items() if k not in OPTIONS}
    room = torch.empty(13 * 2**29, dtype=torch.bfloat16, device=DEVICE)
    with form("triton"):
        want = value_and_gradients(f, inputs)
        for k in inputs.keys() & {"x", "dt", "B", "C"}:  # 32 bits would lead before the first
            strides = (l * step, step, *inputs[k][0, 0].contiguous().stride())
            far = room.as_strided(inputs[k].shape, strides, 2**31).copy_(inputs[k])
            got = value_and_gradients(f, {**inputs, k: far})
            assert all(torch.equal(got[name], want[name]) for name in want), k


def hybrid():
    sizes = dict(v=9, d=8, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=12, d_state=3)
    return build(mil.Config(**sizes, mixers=mil.MIXERS), torch.float32)


def test_a_compiled_hybrid_of_packed_rows_is_one_graph_and_computes_its_formulas():
    model = hybrid()
    tokens = random_tokens(model.config, 3, 9)  # of fewer some gradients are sums that cancel
    pos = torch.tensor([places(9, begins, 0) for begins in ((0, 4), (0,), (0, 2, 7))])
    torch._dynamo.reset()
    compiled = torch.compile(model.hidden, backend="aot_eager", fullgraph=True)
    exact, results = copy.deepcopy(model).double(), []
    for hidden, stack in ((compiled, model), (model.hidden, model), (exact.hidden, exact)):
        docs = mil.Documents(pos, tokens.device, stack.norm.weight.dtype)
        with form("triton"):  # float64 takes PyTorch's
            u = hidden(tokens, docs=docs)
        leaves = list(stack.parameters())
        results.append([u, *torch.autograd.grad(u.sin().sum(), leaves, materialize_grads=True)])
    for got, eager, want in zip(*results, strict=True):
        assert_close(got, want, 1e-4)
        assert_close(eager, want, 1e-4)


@pytest.fixture
def watched(monkeypatch):
    """New memory is NaN. In the interpreter, a kernel reads and writes nothing but its tensors."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    reach = []

    def watched_launch(self, *args, **constants):
        reach.clear()
        for t in filter(torch.is_tensor, args):
            last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            reach.append((t.data_ptr(), t.data_ptr() + t.element_size() * (1 + last)))
        return launch(self, *args, **constants)

    def watch(method, mask_at):
        def watched_method(self, ptrs, *args):
            at = ptrs.data[args[mask_at].data.astype(bool)].astype("int64")
            assert np.any([(at >= start) & (at < end) for start, end in reach], axis=0).all()
            return method(self, ptrs, *args)

        return watched_method

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_launch)
    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(builder, name, watch(getattr(builder, name), mask_at))
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1, device=DEVICE).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@OPERATIONS
@pytest.mark.parametrize("c, l", [(1, 19), (1, 32), (3, 33)])
def test_nothing_undefined_or_foreign_is_ever_read_or_returned(monkeypatch, watched, name, c, l):
    monkeypatch.setattr(kernels, "segments", lambda channels, l: c)
    f, inputs = operation(name, l)
    if l != 19:
        pos = [places(l, (), 1), places(l, (0, 9), 0)]
        f = partial(f, pos=torch.tensor(pos, device=DEVICE))
        inputs = {k: t for k, t in inputs.items() if k not in OPTIONS}
    with form("triton"):
        got = value_and_gradients(f, inputs)
    assert all(t.isfinite().all() for t in got.values())


def test_decoding_reads_nothing_undefined_or_foreign(watched):
    model = hybrid()
    cache = mil.Cache(model, 2, 20)
    with torch.no_grad(), form("triton"):
        for l in (1, 3):
            assert model(random_tokens(model.config, 2, l), cache).isfinite().all()


# -------------------- Decoding; attention over a cache and the replay are tested in test_mil.py

ROWS = st.sampled_from([(1, 1), (2, 3), (1, 16), (3, 7), (5, 14), (kernels.MANY + 6, 1)])  # b, l


@settings(max_examples=12)
@given(ROWS, st.sampled_from([1, 5, 33, 300]), st.sampled_from([1, 31, 64, 90]), SEEDS)
def test_the_layers_of_decoding_are_pytorchs_formulas(rows, k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    for dtype in KINDS:
        x = random(generator, *rows, 2 * k).to(dtype)[..., :k]
        weights = random(generator, 3, n, k).to(dtype)
        exact = [x.double() @ w.double().T for w in weights]
        gated = F.silu(exact[1]) * exact[0]
        normed = F.rms_norm(x.double(), (k,), weights[0, 0].double(), 0.1)
        with form("triton"), torch.no_grad():
            pairs = [
                (kernels.linear(x, weights[0]), exact[0]),
                (kernels.linear(lay(x, "strided"), weights[0]), exact[0]),
                (kernels.linear(x, weights[0], gate=weights[1]), gated),
                (kernels.rms_norm(x, weights[0, 0], 0.1), normed),
                *zip(kernels.linears(x, *weights), exact, strict=True),
                *zip(kernels.linears(x, *[w.clone() for w in weights]), exact, strict=True),
            ]
        for got, want in pairs:
            assert_close(got, want, TOLERANCE[dtype])


def test_a_row_has_the_same_bits_in_any_company():
    generator, shapes = torch.Generator().manual_seed(1), ((10, 8, 520), (40, 520), (40, 520))
    x, w, v = (random(generator, *shape).to(KINDS[-1]) for shape in shapes)
    others = torch.cat([x[:1, :1], 100 * x[1:2, 1:5]], dim=1)
    linear, norm = partial(kernels.linear, weight=w), partial(kernels.rms_norm, weight=w[0])
    with form("triton"), torch.no_grad():
        for layer in (linear, partial(linear, gate=v), partial(norm, eps=1e-5)):
            whole = layer(x)
            for b, l in ((1, 1), (1, 5), (2, 8), (3, 7), (10, 1), (10, 5)):
                assert_same_bits(layer(x[:b, :l]), whole[:b, :l])
            assert_same_bits(layer(others)[:, :1], whole[:1, :1])


def test_the_last_piece_of_attention_may_weigh_most():
    generator, n = torch.Generator().manual_seed(1), 2100  # keys, in 17 pieces
    q, v, noise = (random(generator, 1, m, 2, 8) for m in (1, n + 1, n + 1))
    weights = torch.linspace(0, 1, n + 1, device=DEVICE)[:, None, None]
    keys, values = (noise + 9 * q * weights).transpose(1, 2), v.transpose(1, 2)
    at = torch.tensor([n], device=DEVICE)
    cos, sin = torch.ones(1, 1, 1, 4, device=DEVICE), torch.zeros(1, 1, 1, 4, device=DEVICE)
    k, v = keys[:, :, n:].transpose(1, 2), values[:, :, n:].transpose(1, 2)
    with form("triton"):
        y = kernels.attend(q, k, v, cos, sin, keys.contiguous(), values.contiguous(), at)
    want = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)
    assert_close(y, want, 1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="storages that touch are made in the CPU's memory")
def test_weights_of_two_storages_are_not_read_as_one_though_they_touch():
    memory, x = bytearray(2 * 4 * 128), torch.randn(1, 2, 16)
    storages = (memoryview(memory)[512 * i : 512 * (i + 1)] for i in range(2))
    a, b = (torch.frombuffer(m, dtype=torch.float32).normal_().view(8, 16) for m in storages)
    assert a.data_ptr() + a.nbytes == b.data_ptr()
    with form("triton"), torch.no_grad():
        for got, w in zip(kernels.linears(x, a, b), (a, b), strict=True):
            assert_close(got, x @ w.T, 1e-5)
