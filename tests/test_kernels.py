"""The scan and the convolution: the definition is the formula, and every fast form is the definition."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close, assert_same_bits, build, form, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import kernels
import mil

FORMS = pytest.mark.parametrize("which", ["triton", "torch"])
DECAYS = pytest.mark.parametrize("decay", ["mamba", "mamba2"])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
LENGTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 129])                # up to one past two blocks of 64
SHORT = st.sampled_from([1, 2, 3, 15, 16, 17, 33])  # the interpreted Mamba walks token by token: two blocks of its 16
HEADS = st.sampled_from([(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 1), (6, 3, 2)])     # h, gx, gb
SIZES = st.sampled_from([(1, 1), (3, 5), (5, 3), (16, 16), (20, 24), (64, 64), (128, 40), (7, 130)])  # p, n


def scan_inputs(decay, b, l, heads, size, seed, dtype=torch.float64, options="DzbhDzbh", layout="contiguous"):
    """Named inputs of ssm_scan. `options` holds D, z, b (dt_bias), h (h0); layout is how x, dt, B, C, z lie in memory."""
    (h, gx, gb), (p, n) = heads, size
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def lay(t):
        t = t.to(dtype).to(DEVICE)
        if layout == "sliced":  # a part of a wider projection
            wide = torch.cat([torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)], dim=-1)
            return wide[..., t.shape[-1]:2 * t.shape[-1]]
        if layout == "transposed":  # length last in memory: the last axis is not contiguous
            return t.transpose(1, -1).contiguous().transpose(1, -1)
        return t

    per = (h, p) if decay == "mamba" else (h,)
    t = dict(x=lay(tensor(b, l, gx, p)), dt=lay(tensor(b, l, *per)), A=-tensor(*per, *((n,) if decay == "mamba" else ())).exp().to(DEVICE),
             B=lay(tensor(b, l, gb, n)), C=lay(tensor(b, l, h, n)))
    t["A"] = t["A"].to(torch.promote_types(dtype, torch.float32))
    if "D" in options:
        t["D"] = tensor(*per).to(t["A"])
    if "z" in options:
        t["z"] = lay(tensor(b, l, h, p))
    if "b" in options:
        t["dt_bias"] = tensor(*per).to(t["A"])
    if "h" in options:
        t["h0"] = tensor(b, h, p, n).to(t["A"])
    return t


def value_and_gradients(scan, inputs, seed=1):
    """y, h and the gradient of a random linear function of both with respect to every input."""
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    y, h = scan(**leaves)
    generator = torch.Generator().manual_seed(seed)
    wy, wh = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, h))
    gradients = torch.autograd.grad((y * wy).double().sum() + (h * wh).double().sum(), list(leaves.values()))
    return {"y": y, "h": h, **{f"d{k}": g for k, g in zip(leaves, gradients)}}


def check_against_definition(which, dtype, inputs, scan=kernels.ssm_scan, definition=kernels.ssm_reference):
    with form(which):
        got = value_and_gradients(scan, inputs)
    want = value_and_gradients(definition, {k: t.double() for k, t in inputs.items()})
    assert got["y"].dtype == dtype and got["h"].dtype == torch.promote_types(dtype, torch.float32)
    largest, eps = max(t.abs().max().item() for t in want.values()), torch.finfo(got["h"].dtype).eps
    for name in want:  # what is summed over everything can cancel down to the rounding of its largest terms
        noise = 64 * eps * largest if name in ("dA", "ddt_bias", "dD") else 1e-14 * largest
        assert_close(got[name], want[name], TOLERANCE[dtype], name, noise)
    return got


@FORMS
@DECAYS
def test_scan_equals_the_definition_in_value_and_every_gradient(which, decay):
    slow = DEVICE == "cpu" and which == "triton"
    @settings(max_examples=(3 if decay == "mamba" else 8) if slow else 5 if which == "triton" else 40)  # on CUDA every shape compiles
    @given(st.integers(1, 2), SHORT if slow and decay == "mamba" else LENGTHS, HEADS, SIZES, st.sampled_from(["", "D", "z", "b", "h", "Dzbh"]),
           st.sampled_from(["contiguous", "sliced", "transposed"]), st.integers(0, 2**31))
    def check(b, l, heads, size, options, layout, seed):
        check_against_definition(which, torch.float32, scan_inputs(decay, b, l, heads, size, seed, torch.float32, options, layout))
    check()


@DECAYS
@pytest.mark.parametrize("b, l, c", [(1, 35, 3), (2, 17, 2)])
def test_the_walks_may_cut_a_sequence_into_segments(monkeypatch, decay, b, l, c):
    """Also into segments that end past the sequence or lie past it whole: 35 tokens in tiles of 8, 32 or 64 and 3 segments. And
    Mamba's channels into blocks: 5 into three of 2."""
    monkeypatch.setattr(kernels, "segments", lambda *_: c)
    monkeypatch.setattr(kernels, "S6_TILE", 8)
    check_against_definition("triton", torch.float32, scan_inputs(decay, b, l, (2, 2, 1), (5, 3), 7, torch.float32))


@FORMS
@DECAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def test_scan_takes_every_type(which, decay, dtype):
    check_against_definition(which, dtype, scan_inputs(decay, 1, 17 if decay == "mamba" else 130, (4, 2, 1), (16, 16), 3, dtype))


@FORMS
@DECAYS
def test_scan_survives_extreme_steps_and_decays(which, decay):
    for shift, A in ((-30.0, -1.0), (30.0, -1.0), (0.0, -1e-4), (0.0, -1e4), (30.0, -1e4)):
        inputs = scan_inputs(decay, 1, 19 if decay == "mamba" else 35, (2, 1, 2), (4, 3), 5, torch.float32, "D")
        inputs["dt"] = inputs["dt"] + shift
        inputs["A"] = torch.full_like(inputs["A"], A)
        check_against_definition(which, torch.float32, inputs)
    zeros = {k: torch.zeros_like(t) for k, t in inputs.items()}
    with form(which):
        assert all(not t.any() for k, t in value_and_gradients(kernels.ssm_scan, zeros).items() if k in ("y", "h"))


@DECAYS
@given(st.integers(1, 6), HEADS, st.integers(0, 2**31))
@settings(max_examples=20)
def test_the_definition_is_the_closed_form(decay, l, heads, seed):
    """y_t = Σ_{s≤t} exp(A Σ_{s<r≤t} Δ_r) Δ_s x_s (B_s · C_t), summed by hand, in numpy."""
    t = {k: v.cpu().numpy() for k, v in scan_inputs(decay, 2, l, heads, (3, 2), seed, torch.float64).items()}
    (b, _, gx, p), (h, n) = t["x"].shape, t["C"].shape[2:]
    y, last = np.zeros((b, l, h, p)), np.zeros((b, h, p, n))
    for i, j, c, k in np.ndindex(b, h, p, n):
        at = (j, c) if decay == "mamba" else (j,)
        delta = np.log1p(np.exp(t["dt"][(i, slice(None), *at)] + t["dt_bias"][at]))
        A = t["A"][j, c, k] if decay == "mamba" else t["A"][j]
        x, B = t["x"][i, :, j // (h // gx), c], t["B"][i, :, j // (h // t["B"].shape[2]), k]
        for q in range(l):
            state = np.exp(A * delta[:q + 1].sum()) * t["h0"][i, j, c, k]
            state += sum(np.exp(A * delta[s + 1:q + 1].sum()) * delta[s] * x[s] * B[s] for s in range(q + 1))
            y[i, q, j, c] += state * t["C"][i, q, j, k]
        last[i, j, c, k] = state
    for i, j, c in np.ndindex(b, h, p):
        z = t["z"][i, :, j, c]
        skip = t["D"][(j, c) if decay == "mamba" else (j,)] * t["x"][i, :, j // (h // gx), c]
        y[i, :, j, c] = (y[i, :, j, c] + skip) * z / (1 + np.exp(-z))
    got = kernels.ssm_reference(**{k: torch.from_numpy(v) for k, v in t.items()})
    assert_close(got[0], torch.from_numpy(y), 1e-10, "y")
    assert_close(got[1], torch.from_numpy(last), 1e-10, "h")


@FORMS
@DECAYS
def test_scan_can_be_cut_anywhere_and_resumed(which, decay):
    slow = DEVICE == "cpu" and which == "triton"
    @settings(max_examples=3 if slow else 8)
    @given(st.data(), st.integers(2, 40 if slow and decay == "mamba" else 140), st.integers(0, 2**31))
    def check(data, l, seed):
        cut = data.draw(st.integers(1, l - 1))
        t = scan_inputs(decay, 1, l, (2, 1, 2), (4, 5), seed, torch.float32, "Dzb")
        first, second = ({k: v[:, part] if k in ("x", "dt", "B", "C", "z") else v for k, v in t.items()}
                         for part in (slice(None, cut), slice(cut, None)))
        with form(which):
            y, h = kernels.ssm_scan(**t)
            y1, h1 = kernels.ssm_scan(**first)
            y2, h2 = kernels.ssm_scan(**second, h0=h1)
        assert_close(torch.cat([y1, y2], dim=1), y, 5e-5, "y")
        assert_close(h2, h, 5e-5, "h")
    check()


@FORMS
@DECAYS
def test_the_future_never_changes_the_past_and_rows_never_meet(which, decay):
    t = scan_inputs(decay, 3, 70, (2, 1, 2), (4, 5), 1, torch.float32, "Dzbh")
    changed = {k: v.clone() for k, v in t.items()}
    for k in ("x", "dt", "B", "C", "z"):
        changed[k][:2, 41:] = 7.0   # the future of two rows
        changed[k][2] = -5.0        # all of the third
    with form(which):
        y, h = kernels.ssm_scan(**t)
        y2, h2 = kernels.ssm_scan(**changed)
    assert torch.equal(y[:2, :41], y2[:2, :41]) and not torch.equal(y[0, 41:], y2[0, 41:])
    with form(which):
        alone, _ = kernels.ssm_scan(**{k: v[1:2] if k in ("x", "dt", "B", "C", "z", "h0") else v for k, v in t.items()})
    assert_close(y[1:2], alone, 1e-6)


@FORMS
@DECAYS
def test_y_is_linear_in_x(which, decay):
    t = scan_inputs(decay, 1, 67, (2, 1, 2), (4, 5), 1, torch.float32, "Dzb")
    other = torch.randn(t["x"].shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    with form(which):
        y1, y2 = (kernels.ssm_scan(**{**t, "x": x})[0] for x in (t["x"], other))
        y, _ = kernels.ssm_scan(**{**t, "x": 2 * t["x"] - 3 * other})
    assert_close(y, 2 * y1 - 3 * y2, 5e-5)


def test_without_triton_everything_takes_the_pytorch_form():
    done = run_script("-c", "import sys; sys.modules['triton'] = None\nimport torch, mil\nassert mil.causal_conv.__globals__['triton'] is None\n"
                            "c = mil.Config(v=9, d=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=8, d_state=2, mixers=['mamba', 'mamba2'])\n"
                            "mil.Hybrid(c)(torch.zeros(1, 70, dtype=torch.long)).sum().backward()")
    assert done.returncode == 0, done.stderr


@DECAYS
def test_scan_refuses_shapes_that_do_not_fit_and_names_the_argument(decay):
    t = scan_inputs(decay, 1, 4, (6, 3, 2), (4, 5), 1)
    for name in ("dt", "A", "B", "C", "D", "z", "dt_bias", "h0"):
        with pytest.raises(ValueError, match=rf"ssm: (B is .* and )?{name} is" if name == "C" else rf"ssm: {name} is"):
            kernels.ssm_scan(**{**t, name: torch.cat([t[name], t[name]], dim=-1)})
    with pytest.raises(ValueError, match="x is .*, expected four axes"):
        kernels.ssm_scan(**{**t, "x": t["x"][0]})
    with pytest.raises(ValueError, match="both divide"):
        kernels.ssm_scan(**{**t, "x": t["x"][:, :, [0, 1, 2, 0]]})
    with pytest.raises(ValueError, match="no tokens"):
        kernels.ssm_scan(**{k: v[:, :0] if k in ("x", "dt", "B", "C", "z") else v for k, v in t.items()})


@pytest.mark.parametrize("l", [1, 70])
def test_autocast_leaves_state_and_decay_in_float32(l):
    t = scan_inputs("mamba2", 1, l, (2, 1, 2), (4, 4), 1, torch.bfloat16)
    want = kernels.ssm_scan(**t)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = kernels.ssm_scan(**t)
    assert got[1].dtype == torch.float32 and torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@FORMS
def test_convolution_equals_conv1d_and_carries_its_state(which):
    @settings(max_examples=6 if which == "triton" and DEVICE == "cpu" else 30)
    @given(st.integers(1, 2), st.integers(1, 70), st.sampled_from([(1, 1), (2, 6), (3, 3)]), st.sampled_from([1, 5, 33]),
           st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 2**31))
    def check(b, l, heads, p, w, bias, seed):
        (g, h), generator = heads, torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()  # noqa: E731
        x, weight, bias, state = new(b, l, g, p), new(h, p, w), new(h, p) if bias else None, new(b, w - 1, g, p)
        leaves = [t for t in (x, weight, bias, state) if t is not None]
        with form(which):
            y, end = kernels.causal_conv(x, weight, bias, state)
        full = torch.cat([state, x], dim=1).double()
        wide = full.repeat_interleave(h // g, dim=2).flatten(2).transpose(1, 2)             # (b, h·p, w-1+l)
        want = F.silu(F.conv1d(wide, weight.double().reshape(h * p, 1, w), None if bias is None else bias.double().flatten(), groups=h * p))
        want = want.transpose(1, 2).unflatten(2, (h, p))
        assert_close(y, want, 1e-5, "y")
        assert torch.equal(end.double(), full[:, l:])
        seen = torch.randn(y.shape, generator=generator).to(DEVICE)
        for a, e in zip(torch.autograd.grad((y * seen).sum(), leaves), torch.autograd.grad((want * seen).sum(), leaves)):
            assert_close(a, e, 5e-5, "gradient")
    check()


def test_convolution_refuses_shapes_that_do_not_fit_and_names_the_argument():
    x, weight, bias, state = torch.zeros(1, 5, 2, 3), torch.zeros(4, 3, 4), torch.zeros(4, 3), torch.zeros(1, 3, 2, 3)
    for change in (dict(bias=torch.zeros(3)), dict(state=torch.zeros(1, 4, 2, 3)), dict(weight=torch.zeros(4, 2, 4))):
        with pytest.raises(ValueError, match=f"causal_conv: {next(iter(change))} is"):
            kernels.causal_conv(**{**dict(x=x, weight=weight, bias=bias, state=state), **change})
    with pytest.raises(ValueError, match="must divide the heads of weight"):
        kernels.causal_conv(x, weight[:3])


@FORMS
def test_convolution_gives_each_padded_row_its_own_state(which):
    x, weight, lengths = torch.randn(3, 6, 2, 5, device=DEVICE), torch.randn(4, 5, 4, device=DEVICE), torch.tensor([1, 4, 6], device=DEVICE)
    for state in (None, torch.randn(3, 3, 2, 5, device=DEVICE)):
        with form(which):
            _, end = kernels.causal_conv(x, weight, None, state, lengths)
            for i, n in enumerate(lengths.tolist()):
                alone = kernels.causal_conv(x[i:i + 1, :n], weight, None, None if state is None else state[i:i + 1])[1]
                assert torch.equal(end[i:i + 1], alone)


@DECAYS
def test_a_single_token_in_bf16_keeps_its_state_in_float32(decay):
    check_against_definition("torch", torch.bfloat16, scan_inputs(decay, 2, 1, (2, 1, 2), (4, 5), 1, torch.bfloat16))


@FORMS
def test_a_bf16_convolution_rounds_once(which):
    x, weight, bias = torch.randn(2, 40, 2, 5, device=DEVICE).bfloat16(), torch.randn(4, 5, 4, device=DEVICE), torch.randn(4, 5, device=DEVICE)
    with form(which):
        got = kernels.causal_conv(x, weight.bfloat16(), bias.bfloat16())[0]
    want = kernels.conv_reference(x.double(), weight.bfloat16().double(), bias.bfloat16().double())[0]
    assert got.dtype == torch.bfloat16
    assert_close(got, want, 2**-7 if which == "triton" else 2**-8 * 1.01)


@FORMS
def test_the_convolution_reaches_every_channel_and_gradient(which):
    x, weight = torch.randn(1, 5, 1, 300, device=DEVICE, requires_grad=True), torch.randn(1, 300, 4, device=DEVICE, requires_grad=True)
    with form(which):
        got = torch.autograd.grad(kernels.causal_conv(x, weight)[0].square().sum(), (x, weight))
    for a, e in zip(got, torch.autograd.grad(kernels.conv_reference(x, weight)[0].square().sum(), (x, weight))):
        assert_close(a, e, 5e-5)


@pytest.mark.parametrize("l", [1, 2, 3, 5])
def test_the_convolutions_state_of_a_short_sequence_starts_with_zeros(l):
    x, weight = torch.randn(2, l, 2, 5, device=DEVICE), torch.randn(4, 5, 4, device=DEVICE)
    assert torch.equal(kernels.causal_conv(x, weight)[1], kernels.conv_reference(x, weight)[1])


@FORMS
@DECAYS
def test_gradients_do_not_depend_on_how_the_upstream_gradient_lies(which, decay):
    inputs = scan_inputs(decay, 1, 20, (2, 1, 2), (4, 5), 1, torch.float32, "h")
    def gradients(scan):
        leaves = [v.detach().requires_grad_() for v in inputs.values()]
        y, h = scan(**dict(zip(inputs, leaves)))
        return torch.autograd.grad(y.sum() + h.sum(), leaves)   # expanded: every stride of dy and dh is 0
    with form(which):
        got = gradients(kernels.ssm_scan)
    for name, a, e in zip(inputs, got, gradients(kernels.ssm_reference)):
        assert_close(a, e, 5e-5, name)


@DECAYS
def test_rows_more_than_2_to_the_31_elements_apart_are_read(decay):
    inputs = scan_inputs(decay, 3, 2, (1, 1, 1), (4, 4), 1, torch.bfloat16, "")
    with form("triton"):
        want = kernels.ssm_scan(**inputs)[0]
        for name in ("x", "B", "C"):
            v = inputs[name]
            room = torch.empty(2**32 + 64, dtype=v.dtype, device=DEVICE)  # 8 GiB, of which the CPU touches a page
            far = room.as_strided(v.shape, (2**30, *v.stride()[1:]), 2**31).copy_(v)  # a 32-bit offset lands on zeros
            assert torch.equal(kernels.ssm_scan(**{**inputs, name: far})[0], want), name
            del room, far


@DECAYS
def test_gradients_of_rows_more_than_2_to_the_31_elements_apart(decay):
    inputs = scan_inputs(decay, 3, 2, (1, 1, 1), (4, 4), 1, torch.bfloat16, "")

    def gradients(inputs):
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        return torch.autograd.grad(kernels.ssm_scan(**leaves)[0].float().square().sum(), [*leaves.values()])
    with form("triton"):
        want = gradients(inputs)
        for name in ("x", "B", "C"):
            v = inputs[name]
            room = torch.empty(2**32 + 64, dtype=v.dtype, device=DEVICE)
            far = room.as_strided(v.shape, (2**30, *v.stride()[1:]), 2**31).copy_(v)
            assert all(map(torch.equal, gradients({**inputs, name: far}), want)), name
            del room, far


def test_float32_is_multiplied_in_full():
    one = torch.zeros(1, 2, 1, 4)
    assert kernels.ssd_plan(one, one[..., 0], one, one, one, None, None, None, None, None, None).y.meta["PREC"] == "ieee"


@FORMS
@DECAYS
def test_a_large_step_does_not_blur_the_small_ones_after_it(which, decay):
    inputs = scan_inputs(decay, 1, 35, (2, 1, 2), (4, 3), 5, torch.float32, "")
    inputs["A"], inputs["dt"] = torch.full_like(inputs["A"], -100.0), torch.full_like(inputs["dt"], -5.0)
    inputs["dt"][:, :5] = 30.0
    with form(which):
        got = kernels.ssm_scan(**inputs)
    for a, e in zip(got, kernels.ssm_reference(**{k: v.double() for k, v in inputs.items()})):
        assert_close(a, e, 5e-5)


@FORMS
@DECAYS
def test_the_step_is_summed_in_float32(which, decay):
    inputs = scan_inputs(decay, 1, 33, (2, 1, 2), (4, 5), 1, torch.bfloat16, "b")
    with form(which):
        _, h = kernels.ssm_scan(**inputs)   # the last state is float32, so it shows what y's rounding hides
    rounded = DEVICE == "cuda" and which == "triton" and decay == "mamba2"  # there Δ x is multiplied in bf16
    assert_close(h, kernels.ssm_reference(**{k: v.double() for k, v in inputs.items()})[1], 3e-2 if rounded else 5e-5)


@FORMS
def test_the_convolution_may_cut_a_sequence_and_its_channels_anywhere(monkeypatch, which):
    """Value and gradients with segments of 8 tokens and blocks of 16 channels, x a slice of a wider projection."""
    for name in ("CONV_Y", "CONV_GRADIENT"):
        monkeypatch.setattr(kernels, name, dict(T=8, U=4, BLOCK=16))

    @settings(max_examples=8 if which == "triton" else 20)
    @given(st.sampled_from([1, 3, 7, 8, 9, 16, 29]), st.sampled_from([(1, 1, 40), (1, 3, 5), (2, 8, 8), (2, 34, 3)]), st.sampled_from([1, 3, 4]),
           st.booleans(), st.booleans(), st.integers(0, 2**31))
    def check(l, heads, w, bias, state, seed):
        (g, h, p), generator = heads, torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()  # noqa: E731
        leaves = [new(2, l, g * p + 5), new(h, p, w), new(h, p) if bias else None, new(2, w - 1, g, p) if state else None]
        seen, wanted = new(2, l, h, p), [t for t in leaves if t is not None]

        def run(conv):
            y, end = conv(leaves[0][..., 2:-3].unflatten(2, (g, p)), *leaves[1:])
            return [y, end, *torch.autograd.grad((y * seen).sum() + end.square().sum(), wanted)]
        with form(which):
            got = run(kernels.causal_conv)
        for i, (a, e) in enumerate(zip(got, run(kernels.conv_reference))):
            assert_close(a, e, 5e-5, f"result {i}")
    check()


def test_the_gradients_of_a_bf16_convolution_round_once():
    """Also dx, which is a sum over the query heads that share x."""
    leaves = [torch.randn(*shape, device=DEVICE).bfloat16().requires_grad_() for shape in ((2, 40, 2, 5), (8, 5, 4), (8, 5))]
    seen = torch.randn(2, 40, 8, 5, device=DEVICE).bfloat16()
    with form("triton"):
        got = torch.autograd.grad(kernels.causal_conv(*leaves)[0], leaves, seen)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for a, e in zip(got, torch.autograd.grad(kernels.conv_reference(*wide)[0], wide, seen.double())):
        assert a.dtype == torch.bfloat16
        assert_close(a, e, 2**-7)


@FORMS
def test_the_gated_norm_equals_its_definition_in_value_and_every_gradient(monkeypatch, which):
    monkeypatch.setattr(kernels, "NORM_GRADIENT", dict(T=16, ELEMENTS=1024))  # so that 33 tokens are three partial sums

    @settings(max_examples=12 if which == "triton" else 30)
    @given(st.sampled_from([1, 5, 16, 17, 33]), st.sampled_from([1, 3]), st.sampled_from([1, 5, 16, 40, 128, 256]),
           st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]), st.integers(0, 2**31))
    def check(l, h, p, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE).requires_grad_()  # noqa: E731
        y, projection, weight, seen = new(2, l, h, p), new(2, l, h * p + 5), new(h, p), new(2, l, h, p)

        def run(norm, *leaves):
            o = norm(leaves[0], leaves[1][..., 2:-3].unflatten(2, (h, p)), leaves[2])  # z is a slice of a wider projection
            return [o, *torch.autograd.grad(o, leaves, seen.to(o.dtype))]
        with form(which):
            got = run(kernels.gated_norm, y, projection, weight)
        want = run(kernels.gated_norm_reference, *(t.detach().double().requires_grad_() for t in (y, projection, weight)))
        for name, a, e in zip(("o", "dy", "dz", "dweight"), got, want):
            assert a.dtype == dtype
            # p = 1: what is left of dy and dz is eps / (v² + eps), a difference of numbers near 1
            assert_close(a, e, TOLERANCE[dtype], name, 1e-3 if p == 1 and name in ("dy", "dz") and dtype != torch.float64 else 0.0)
    check()


def test_the_gated_norm_refuses_shapes_that_do_not_fit_and_names_the_argument():
    y, weight = torch.zeros(1, 5, 2, 3), torch.zeros(2, 3)
    for change in (dict(z=torch.zeros(1, 5, 6)), dict(weight=torch.zeros(6))):
        with pytest.raises(ValueError, match=f"gated_norm: {next(iter(change))} is"):
            kernels.gated_norm(**{**dict(y=y, z=y, weight=weight), **change})


def test_convolution_and_norm_read_rows_more_than_2_to_the_31_elements_apart():
    x, weight = torch.randn(3, 2, 1, 4, device=DEVICE).bfloat16(), torch.randn(1, 4, 4, device=DEVICE)
    room = torch.empty(2**32 + 64, dtype=x.dtype, device=DEVICE)  # 8 GiB, of which the CPU touches a page
    with form("triton"):
        for strides, start in (((2**30, 4, 4, 1), 2**31), ((4, 2**31, 4, 1), 2**31)):
            far = room.as_strided(x.shape, strides, start).copy_(x)  # a 32-bit offset lands elsewhere
            assert torch.equal(kernels.causal_conv(far, weight)[0], kernels.causal_conv(x, weight)[0])
            assert torch.equal(kernels.gated_norm(x, far, weight[..., 0]), kernels.gated_norm(x, x, weight[..., 0]))


def test_gradients_of_convolution_and_norm_read_rows_more_than_2_to_the_31_elements_apart():
    x, weight = torch.randn(3, 2, 1, 4, device=DEVICE).bfloat16(), torch.randn(1, 4, 4, device=DEVICE)
    room = torch.empty(2**32 + 64, dtype=x.dtype, device=DEVICE)  # 8 GiB, of which the CPU touches a page

    def gradients(f, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(f(*leaves).float().square().sum(), leaves)
    conv = lambda x, weight: kernels.causal_conv(x, weight)[0]  # noqa: E731
    with form("triton"):
        for strides, start in (((2**30, 4, 4, 1), 2**31), ((4, 2**31, 4, 1), 2**31)):
            far = room.as_strided(x.shape, strides, start).copy_(x)  # a 32-bit offset lands elsewhere
            assert all(map(torch.equal, gradients(conv, far, weight), gradients(conv, x, weight)))
            assert all(map(torch.equal, gradients(kernels.gated_norm, far, far, weight[..., 0]), gradients(kernels.gated_norm, x, x, weight[..., 0])))


# ---------------------------------------------------------------------------------------------------------------
# Packed sequences: a row of several documents is each of them alone

ALONG = ("x", "dt", "B", "C", "z")  # the inputs with one value per token


def places(l, starts, before):
    """pos of a row whose documents start at `starts`, and which begins with the token after `before` others of its document."""
    row = []
    for t in range(l):
        row.append(0 if t in starts else row[-1] + 1 if row else before)
    return row


@st.composite
def packings(draw, lengths, b=2):
    """pos (b, l), most documents ending at the border of a tile or next to it, some of them a token long."""
    l, border = draw(lengths), st.sampled_from([0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])
    rows = [places(l, draw(st.sets(border | st.integers(0, l), max_size=6)), draw(st.sampled_from([1, 2, 3, 50]))) for _ in range(b)]
    return torch.tensor(rows, dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE)


def documents(row):
    """The tokens of each document of a row of pos, as slices."""
    starts = [t for t in range(1, len(row)) if row[t] == 0]
    return [slice(*ends) for ends in zip([0, *starts], [*starts, len(row)])]


def each_alone(pos):
    """The scan of packed rows by its meaning: the definition of every document on its own, h0 being of those that a row begins within."""
    def scan(h0, **t):
        ys, hs = [], []
        for i, row in enumerate(pos.tolist()):
            h = h0[i:i + 1] * (row[0] > 0)
            for at in documents(row):
                y, h = kernels.ssm_reference(**{k: v[i:i + 1, at] if k in ALONG else v for k, v in t.items()}, h0=h)
                ys.append(y)
                hs, h = [*hs[:i], h], None
        return torch.cat(ys, dim=1).view(len(pos), -1, *ys[0].shape[2:]), torch.cat(hs)
    return scan


def check_packed(which, dtype, inputs, pos):
    return check_against_definition(which, dtype, inputs, lambda **t: kernels.ssm_scan(**t, pos=pos), each_alone(pos))


@FORMS
@DECAYS
def test_packed_documents_are_each_of_them_alone_in_value_and_every_gradient(which, decay):
    slow = DEVICE == "cpu" and which == "triton"
    @settings(max_examples=(2 if decay == "mamba" else 6) if slow else 5 if which == "triton" else 25)
    @given(packings(SHORT if slow and decay == "mamba" else LENGTHS), st.sampled_from([(1, 1, 1), (2, 1, 2)]),
           st.sampled_from([(1, 1), (3, 5), (16, 16)]), st.sampled_from([None, 0.0, -1e-4, -1e4]), st.integers(0, 2**31))
    def check(pos, heads, size, A, seed):
        inputs = scan_inputs(decay, *pos.shape, heads, size, seed, torch.float32)
        inputs["A"] = inputs["A"] if A is None else torch.full_like(inputs["A"], A)
        check_packed(which, torch.float32, inputs, pos)
        if which == "torch":
            inputs = {k: t.double() for k, t in inputs.items()}
            check_packed(which, torch.float64, inputs, pos)
            check_against_definition(which, torch.float64, inputs, lambda **t: kernels.ssm_reference(**t, pos=pos), each_alone(pos))
    check()


@DECAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_documents_may_start_anywhere_in_a_segment_or_nowhere(monkeypatch, decay, dtype):
    """Three segments, of 16, 16 and 3 tokens or (in tiles of 32, on a GPU in bf16 64) 64, 64 and 12, across which states are held."""
    if decay == "mamba" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter is slow, and has no words of bf16")
    monkeypatch.setattr(kernels, "segments", lambda *_: 3)
    l, s = (35, 16) if decay == "mamba" else (140, 64)
    starts = (), (s,), (3, 2 * s - 1, l - 1), (0, s + 3, s + 4)
    pos = torch.tensor([places(l, row, 7) for row in starts], device=DEVICE)
    inputs = scan_inputs(decay, *pos.shape, (1, 1, 1), (4, 4), 7, dtype, "zh", "sliced")
    inputs["A"] = inputs["A"] / 100
    if decay == "mamba":
        inputs["A"][0, 0] = 0  # a channel that forgets nothing by itself
    check_packed("triton", dtype, inputs, pos)


@FORMS
@DECAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_first_step_of_a_document_moves_nothing_but_what_it_writes(which, decay, dtype):
    """Its gradient through the decay is zero, not nearly: where the token writes nothing, nothing is left."""
    l = 19 if decay == "mamba" else 67
    pos = torch.tensor([places(l, (0, 5, 6, 16, 40), 0), places(l, (9, l - 1), 3)], device=DEVICE)
    inputs = scan_inputs(decay, 2, l, (2, 1, 2), (4, 3), 5, dtype)
    inputs["x"] = inputs["x"] * (pos > 0)[..., None, None]
    with form(which):
        got = value_and_gradients(lambda **t: kernels.ssm_scan(**t, pos=pos), inputs)
    assert not got["ddt"][pos == 0].any() and got["ddt"][pos > 0].any()
    assert not got["dh0"][0].any() and got["dh0"][1].any()


@FORMS
@DECAYS
def test_long_documents_of_extreme_steps_and_decays_stay_finite(which, decay):
    slow = DEVICE == "cpu" and which == "triton"
    l = 21 if slow and decay == "mamba" else 130
    pos = torch.tensor([places(l, (1, 17, 18, l - 2), 2**30)], dtype=torch.int32, device=DEVICE)
    for shift, A in ((30.0, -1e4), (30.0, -1e-4), (-30.0, -1e4), (1e4, -1.0), (-1e4, -1.0))[:3 if slow else 5]:
        inputs = scan_inputs(decay, 1, l, (1, 1, 1), (4, 3), 5, torch.float32)
        inputs["A"], inputs["dt"] = torch.full_like(inputs["A"], A), inputs["dt"] + shift
        with form(which):
            assert all(t.isfinite().all() for t in value_and_gradients(lambda **t: kernels.ssm_scan(**t, pos=pos), inputs).values())


def conv_each_alone(pos):
    """The convolution of packed rows by its meaning, the state being of the document that a row begins within."""
    def conv(x, weight, bias, state):
        ys, w = [], weight.shape[2]
        for i, row in enumerate(pos.tolist()):
            for at in documents(row):
                seen = min(row[at.start], w - 1)
                ys.append(kernels.conv_reference(torch.cat([state[i:i + 1, w - 1 - seen:], x[i:i + 1, at]], dim=1), weight, bias)[0][:, seen:])
        return torch.cat(ys, dim=1).view(len(pos), -1, *ys[0].shape[2:])
    return conv


@FORMS
def test_a_convolution_of_packed_documents_is_that_of_each_alone(monkeypatch, which):
    """In segments of 8 tokens and blocks of 16 channels."""
    for name in ("CONV_Y", "CONV_GRADIENT"):
        monkeypatch.setattr(kernels, name, dict(T=8, U=4, BLOCK=16))

    @settings(max_examples=10 if which == "triton" else 30)
    @given(packings(st.sampled_from([1, 3, 7, 8, 9, 16, 29])), st.sampled_from([(1, 1, 40), (1, 3, 5), (2, 8, 8)]), st.sampled_from([1, 2, 4]),
           st.booleans(), st.booleans(), st.integers(0, 2**31))
    def check(pos, heads, w, bias, state, seed):
        (g, h, p), (b, l), generator = heads, pos.shape, torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()  # noqa: E731
        leaves, seen = [new(b, l, g, p), new(h, p, w), new(h, p) if bias else None, new(b, w - 1, g, p) if state else None], new(b, l, h, p)

        def run(conv, *leaves):
            y = conv(*leaves)
            return [y, *torch.autograd.grad((y * seen).sum(), [t for t in leaves if t is not None], materialize_grads=True)]
        wide = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
        zeros = torch.zeros(b, w - 1, g, p, dtype=torch.float64, device=DEVICE)
        want = run(lambda x, weight, bias, state: conv_each_alone(pos)(x, weight, bias, zeros if state is None else state), *wide)
        with form(which):
            got = run(lambda *t: kernels.causal_conv(*t, pos=pos)[0], *leaves)
        for t, tolerance in ((got, 5e-5), (run(lambda *t: kernels.conv_reference(*t, pos=pos)[0], *wide), 1e-9)):
            for i, (a, e) in enumerate(zip(t, want, strict=True)):
                assert_close(a, e, tolerance, f"result {i}", 1e-5 * tolerance)
    check()


@FORMS
def test_one_document_from_its_first_token_on_is_no_packing(which):
    for name in ("mamba", "mamba2", "conv"):
        f, inputs = operation(name)
        inputs = {k: t for k, t in inputs.items() if k not in ("h0", "state")}
        with form(which):
            want, got = f(**inputs)[0], f(**inputs, pos=torch.arange(9, device=DEVICE)[None].expand(len(inputs["x"]), 9))[0]
        assert_close(got, want, 1e-6, name)


def test_places_that_do_not_fit_are_refused_by_name():
    for name in ("mamba", "mamba2", "conv"):
        f, inputs = operation(name)
        for pos in (torch.zeros(9), torch.zeros(1, 8), torch.zeros(2, 9, 1)):
            with pytest.raises(ValueError, match="pos is"):
                f(**inputs, pos=pos.int())


def test_packed_rows_compile_to_one_graph_and_survive_a_checkpoint():
    pos = torch.tensor([[3, 4, 0, 1, 2, 0, 0, 1, 2]], device=DEVICE)
    torch._dynamo.reset()
    for name in ("mamba", "mamba2", "conv"):
        f, inputs = operation(name)
        inputs = {k: t[:1] if k in ("x", "state") and name == "conv" else t for k, t in inputs.items()}
        packed = lambda **t: f(**t, pos=pos)  # noqa: B023, E731
        with form("triton"):
            want = value_and_gradients(packed, inputs)
            compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)  # a break in the graph is an error
            for again in (compiled, lambda **t: checkpoint(packed, use_reentrant=False, **t)):  # noqa: B023
                for k, t in value_and_gradients(again, inputs).items():
                    assert_close(t, want[k], 1e-6, f"{name} {k}")


# ---------------------------------------------------------------------------------------------------------------
# What surrounds the kernels: torch.compile, checkpoints, the launch, memory

NAMES = pytest.mark.parametrize("name", ["mamba", "mamba2", "conv", "norm"])


def operation(name, l=9):
    """An operation with kernels of its own, as a function of named inputs that returns two tensors, and such inputs."""
    if name in ("mamba", "mamba2"):
        return kernels.ssm_scan, scan_inputs(name, 1, l, (2, 1, 2), (4, 3), 3, torch.float32)
    generator = torch.Generator().manual_seed(3)
    new = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    if name == "conv":
        return kernels.causal_conv, dict(x=new(2, l, 2, 5), weight=new(4, 5, 4), bias=new(4, 5), state=new(2, 3, 2, 5))
    return lambda y, z, weight: (kernels.gated_norm(y, z, weight), y), dict(y=new(2, l, 4, 5), z=new(2, l, 4, 5), weight=new(4, 5))


def operator_calls(decay="mamba", options="Dzbh"):
    """Every operator registered with PyTorch that a forward and a backward call, with arguments."""
    t = {**dict.fromkeys(("D", "z", "dt_bias", "h0")), **scan_inputs(decay, 1, 4, (2, 1, 2), (5, 3), 1, torch.float32, options)}
    t["z"] = t["z"] if decay == "mamba" else None  # Mamba-2 leaves its gate to the norm
    scan = [t[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    scan += [t["h0"], torch.tensor([[5, 0, 1, 0]], dtype=torch.int32, device=DEVICE) if "h" in options else None]
    y, h, S, decays = kernels.scan_forward(*scan, True)
    x, weight = t["x"], torch.randn(2, 5, 4, device=DEVICE)
    bias, pos = weight[..., 0].contiguous() if "b" in options else None, None if scan[-1] is None else scan[-1][:, 3:].contiguous()
    return {"scan_forward": (*scan, True), "scan_backward": (y, h, *scan, S, decays),
            "conv_forward": (x, weight, bias, pos, 3), "conv_backward": (y[:, 3:], x, weight, bias, pos, 3),
            "norm_forward": (y, y.cos(), weight[..., 1], 1e-5), "norm_backward": (y.sin(), y, y.cos(), weight[..., 1], 1e-5)}


def test_a_compiled_hybrid_is_one_graph_for_lengths_of_a_kind_and_equals_the_eager_one():
    config = mil.Config(v=9, d=8, n_layers=3, n_heads=2, n_kv_heads=1, d_ff=8, d_state=4, mixers=["mamba", "mamba2", "attention"])
    model, graphs = build(config, torch.float32), []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def run(f, tokens):
        y = f(tokens)
        return [y, *torch.autograd.grad(y.square().mean(), list(model.parameters()))]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # a break in the graph is an error
    with form("triton"):
        for l in (20, 33, 41) if DEVICE == "cuda" else (3, 5, 7):
            tokens = torch.arange(l, device=DEVICE)[None] % 9
            for a, e in zip(run(compiled, tokens), run(model, tokens)):
                assert_close(a, e, 1e-4)
    assert len(graphs) == 2  # for the first length, then for others (far longer ones, cut into segments, have their own)


@DECAYS
def test_the_registered_operators_mutate_nothing_and_have_the_shapes_they_declare(decay):
    with form("triton"):
        for name, args in operator_calls(decay).items():
            if decay == "mamba" or name.startswith("scan"):
                torch.library.opcheck(getattr(torch.ops.mil, name).default, args, test_utils=("test_schema", "test_faketensor"))


@DECAYS
@pytest.mark.parametrize("options", ["", "Dz", "bh", "Dzbh"])
def test_fake_tensors_get_the_shapes_and_types_of_real_ones(decay, options):
    with form("triton"):
        for name, args in operator_calls(decay, options).items():
            f = getattr(kernels, name)
            with FakeTensorMode() as mode:  # as torch.compile makes it: tensors without numbers, which no kernel could take
                fake = f(*[mode.from_tensor(a) if torch.is_tensor(a) else a for a in args])
            real = f(*args)
            for a, e in zip(*[t if isinstance(t, tuple) else (t,) for t in (fake, real)], strict=True):
                assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride()), name


@NAMES
def test_a_checkpoint_changes_no_bit(name):
    f, inputs = operation(name)
    with form("triton"):
        want = value_and_gradients(f, inputs)
        got = value_and_gradients(lambda **t: checkpoint(f, use_reentrant=False, **t), inputs)
    assert all(torch.equal(got[k], want[k]) for k in want)


@NAMES
def test_two_runs_give_the_same_bits(name):
    f, inputs = operation(name, l=130 if DEVICE == "cuda" else 9)
    with form("triton"):
        first, second = value_and_gradients(f, inputs), value_and_gradients(f, inputs)
    assert all(torch.equal(first[k], second[k]) for k in first)


@NAMES
@pytest.mark.parametrize("c", [1, 3])
def test_nothing_undefined_is_ever_read_or_returned(monkeypatch, name, c):
    monkeypatch.setattr(kernels, "segments", lambda *_: c)
    f, inputs = operation(name)
    inputs = {k: t for k, t in inputs.items() if c > 1 or k not in ("D", "z", "dt_bias", "h0", "bias", "state") or (name, k) == ("norm", "z")}
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is then filled with NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        with form("triton"):
            assert all(t.isfinite().all() for t in value_and_gradients(f, inputs).values())
    finally:
        torch.use_deterministic_algorithms(False)


@FORMS
@NAMES
def test_the_result_is_the_same_without_gradients(which, name):
    f, inputs = operation(name)
    with form(which):
        want = f(**{k: t.requires_grad_() for k, t in inputs.items()})
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                got = f(**inputs)
            assert not got[0].requires_grad
            for a, e in zip(got, want):
                assert_close(a, e, 1e-5)


def test_mamba_keeps_states_only_for_a_backward_to_come(monkeypatch):
    f, inputs = operation("mamba")
    forward, kept = kernels.scan_forward, []
    monkeypatch.setattr(kernels, "scan_forward", lambda *args: kept.append(forward(*args)) or kept[-1])
    with form("triton"):
        f(**inputs)
        inputs["h0"].requires_grad_()
        f(**inputs)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                f(**inputs)
    assert [S.numel() for _, _, S, _ in kept] == [0, 2 * 2 * 4 * 4, 0, 0]  # of 9 tokens the 1st and the 9th, n = 3 in pairs


class StubKernel:
    """In a kernel's place: notes what is compiled, and what the compiled code is called with."""

    def __init__(self, *arg_names, name="stub"):
        self.__name__, self.arg_names, self.compiled, self.called = name, arg_names, [], []

    def __getitem__(self, grid):
        return lambda *args, **meta: self.compiled.append((grid, args, meta)) or StubCode(self.called)


class StubCode:
    def __init__(self, called):
        self.called = called

    def __getitem__(self, grid):
        return lambda *args: self.called.append((grid, args))


def test_a_plan_is_made_anew_for_exactly_what_compiled_code_can_depend_on(monkeypatch):
    monkeypatch.setattr(kernels, "PLANS", {})
    x, made = torch.zeros(8, 8), []

    def plan(x=x, y=x, D=None, keep=True):
        kernels.planned(make, x, y, D, keep)
        return len(made)

    def make(*args):
        made.append(args)
    assert plan() == 1
    for same in (dict(), dict(x=torch.ones(8, 8)), dict(y=torch.zeros(9, 8)[1:])):  # other tensors of the same layout, as well aligned
        assert plan(**same) == 1
    changes = (dict(x=x.double()), dict(y=x.bfloat16()), dict(x=torch.zeros(65)[1:].view(8, 8)), dict(x=x.T), dict(y=torch.zeros(7, 8)), dict(D=x),
               dict(keep=False))
    for count, change in enumerate(changes, 2):
        assert plan(**change) == plan(**change) == count, change
    kernels.planned(made.append, x)
    assert len(made) == count + 1


def test_a_launch_compiles_once_and_then_hands_over_addresses_numbers_and_the_constants_in_the_kernels_order():
    kernel, x, y = StubKernel("p_x", "l", "A", "B"), torch.zeros(4), torch.ones(4)
    launch = kernels.Launch(kernel, (2, 3), (7,), B=20, num_warps=4, A=10)
    for t in (x, y, x):
        launch(t)
    assert kernel.compiled == [((2, 3), (x, 7), dict(A=10, B=20, num_warps=4))]
    assert kernel.called == [((2, 3, 1), (y.data_ptr(), 7, 10, 20)), ((2, 3, 1), (x.data_ptr(), 7, 10, 20))]


def test_fake_tensors_get_shapes_alone_and_nothing_is_launched_or_remembered(monkeypatch):
    monkeypatch.setattr(kernels, "PLANS", {})
    inputs = scan_inputs("mamba", 2, 5, (2, 1, 1), (4, 3), 1, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, form("triton"):
        y, h = kernels.ssm_scan(**{k: mode.from_tensor(t) for k, t in inputs.items()})
        assert not kernels.PLANS
    assert y.shape == (2, 5, 2, 4) and h.shape == (2, 2, 4, 3)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "conv", "norm"])
def test_a_gradient_of_a_gradient_is_refused(name):
    f, inputs = operation(name)
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    with form("triton"):
        gradients = torch.autograd.grad(f(**leaves)[0].square().sum(), list(leaves.values()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        next(g for g in gradients if g is not None).sum().backward()


@FORMS
@DECAYS
def test_an_empty_batch_gives_an_empty_result(which, decay):
    inputs = scan_inputs(decay, 0, 5, (2, 1, 1), (4, 3), 1, torch.float32)
    with form(which):
        y, h = kernels.ssm_scan(**inputs)
    assert y.shape == (0, 5, 2, 4) and h.shape == (0, 2, 4, 3)


def test_sizes_above_256_take_the_pytorch_form(monkeypatch):
    monkeypatch.setattr(kernels.Launch, "__call__", None)
    with form("triton"):
        y, _ = kernels.ssm_scan(**scan_inputs("mamba2", 1, 3, (1, 1, 1), (2, 257), 1, torch.float32))
    assert y.shape == (1, 3, 1, 2)


@FORMS
@DECAYS
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_gradients_of_extreme_inputs_are_finite_where_the_definitions_are(which, decay, scale):
    slow = DEVICE == "cpu" and which == "triton"
    for shift, A in ((0.0, -1.0), (30.0, -1e4), (30.0, -1e-4), (-30.0, -1e4), (1e4, -1.0), (-1e4, -1.0))[:6 if scale > 1 else 2 if scale else 1]:
        inputs = scan_inputs(decay, 1, 9 if slow else 70, (1, 1, 1) if slow else (2, 1, 2), (4, 3), 5, torch.float32)
        inputs = {k: t * scale for k, t in inputs.items()}
        inputs["A"], inputs["dt"] = torch.full_like(inputs["A"], A * (scale > 0)), inputs["dt"] + shift * (scale > 0)
        with form(which):
            got = value_and_gradients(kernels.ssm_scan, inputs)
        for k, e in value_and_gradients(kernels.ssm_reference, inputs).items():
            assert got[k][e.isfinite()].isfinite().all(), (k, shift, A)
            if scale == 0:
                assert_close(got[k], e, 1e-6, k)


@FORMS
@DECAYS
def test_padding_hidden_by_a_step_of_minus_infinity_has_the_definitions_gradients(which, decay):
    inputs = scan_inputs(decay, 3, 9, (2, 1, 2), (4, 3), 5, torch.float32)
    inputs["dt"] = mil.hide_padding(inputs["dt"], torch.tensor([5, 1, 9], device=DEVICE))
    got = check_against_definition(which, torch.float32, inputs)
    for k in ("ddt", "dB"):  # what padding holds moves nothing
        assert not got[k][0, 5:].any() and not got[k][1, 1:].any() and got[k][2].all(), k


@DECAYS
@pytest.mark.parametrize("p, n", [(1, 1), (1, 17), (2, 16), (3, 1), (3, 2), (8, 5), (8, 17), (16, 16), (33, 3), (33, 5)])
def test_odd_sizes_equal_the_definition(decay, p, n):
    """Every way in which Mamba's kernel sums over channels: one channel, fewer columns than rows, one block of channels and several."""
    check_against_definition("triton", torch.float32, scan_inputs(decay, 1, 9, (1, 1, 1), (p, n), 7, torch.float32))


def projected(decay, b, l):
    """One wide projection, and x, dt, B, C, z as slices of it: 2 query heads on 1 kv head, p = 4, n = 3."""
    dt = (2, 4) if decay == "mamba" else (2,)
    heads = dict(x=(1, 4), dt=dt, B=(1, 3), C=(2, 3), z=(2, 4))
    sizes = [int(np.prod(s)) for s in heads.values()]
    wide = torch.randn(b, l, sum(sizes) + 1, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return wide, lambda wide: {k: t.unflatten(2, s) for (k, s), t in zip(heads.items(), wide[..., 1:].split(sizes, dim=2))}


@DECAYS
def test_slices_of_a_projection_are_read_where_they_lie(monkeypatch, decay):
    wide, parts = projected(decay, 2, 5)
    t = parts(wide)
    A, seen = scan_inputs(decay, 1, 1, (2, 1, 1), (4, 3), 1, torch.float32)["A"], set()
    monkeypatch.setattr(kernels.Launch, "__call__", lambda self, *tensors: seen.update(v.data_ptr() for v in tensors))
    with form("triton"):
        y, _ = kernels.ssm_scan(**{k: v.requires_grad_() for k, v in t.items()}, A=A)
        torch.autograd.grad(y.sum(), t["C"])
    assert {v.data_ptr() for k, v in t.items() if decay == "mamba" or k != "z"} <= seen
    far = kernels.row(t["C"].transpose(2, 3))  # only where the last axis is not contiguous is there a copy
    assert far.is_contiguous() and torch.equal(far, t["C"].transpose(2, 3)) and kernels.row(t["C"]) is t["C"]


@FORMS
@DECAYS
def test_a_projection_gets_the_gradient_that_copies_of_its_slices_get(which, decay):
    wide, parts = projected(decay, 1, 9)
    A = scan_inputs(decay, 1, 1, (2, 1, 1), (4, 3), 1, torch.float32)["A"]
    leaf, copies = wide.requires_grad_(), {k: t.detach().clone().requires_grad_() for k, t in parts(wide).items()}
    with form(which):
        y, _ = kernels.ssm_scan(**parts(leaf), A=A)
        seen = y.detach().cos()
        got = parts(torch.autograd.grad(y, leaf, seen)[0])
        want, _ = kernels.ssm_scan(**copies, A=A)
    assert_close(y, want, 1e-5)
    for (k, t), e in zip(got.items(), torch.autograd.grad(want, list(copies.values()), seen)):
        assert_close(t, e, 1e-5, k)


@DECAYS
def test_a_long_sequence_is_its_two_parts(decay):
    l = 2**20 if DEVICE == "cuda" else 2**12
    t, cut = scan_inputs(decay, 1, l, (1, 1, 1), (4, 5), 1, torch.float32, "Dzbh"), l // 2 + 7  # within a chunk or a tile of any size
    t["A"] = t["A"] / 1000  # a memory of thousands of tokens
    first, second = ({k: v[:, part] if k in ("x", "dt", "B", "C", "z") else v for k, v in t.items()} for part in (slice(None, cut), slice(cut, None)))
    with form("triton" if DEVICE == "cuda" else "torch"):
        y, h = kernels.ssm_scan(**t)
        y1, h1 = kernels.ssm_scan(**first)
        y2, h2 = kernels.ssm_scan(**{**second, "h0": h1})
    assert_close(torch.cat([y1, y2], dim=1), y, 1e-4, "y")
    assert_close(h2, h, 1e-4, "h")


@DECAYS
@pytest.mark.parametrize("b, heads", [(2, (4, 2, 1)), (1, (4, 1, 2))])
def test_segments_are_joined_in_order_also_where_query_heads_share_kv_heads(monkeypatch, decay, b, heads):
    """Three segments with tokens in each, 8, 8 and 3 of them or (in tiles of 32) 64, 64 and 12, of slices of a wider projection."""
    monkeypatch.setattr(kernels, "segments", lambda *_: 3)
    l = 19 if decay == "mamba" else 140
    inputs = scan_inputs(decay, b, l, heads, (5, 3), 7, torch.float32, layout="sliced")
    inputs["A"] = inputs["A"] / 100  # what a segment hands on is still there two segments on
    check_against_definition("triton", torch.float32, inputs)


@FORMS
@DECAYS
def test_a_step_and_its_slope_are_exact_from_tiny_to_large(which, decay):
    """B_t = C_t = the t-th unit vector and A = 0, so y_t = Δ_t and ddt_t = Δ'(dt_t), one by one and not against the largest."""
    dt = (torch.arange(128, device=DEVICE) / 4 - 16).view(1, 32, 4)                       # 0 is among them
    x = torch.ones(1, 32, 1, 4, device=DEVICE) if decay == "mamba" else torch.ones(1, 32, 4, 1, device=DEVICE)
    h, p = (1, 4) if decay == "mamba" else (4, 1)
    unit = torch.eye(32, device=DEVICE)[None, :, None]
    A, dt = (x.new_zeros(1, 4, 32), dt.unsqueeze(2)) if decay == "mamba" else (x.new_zeros(4), dt)
    leaf = dt.clone().requires_grad_()
    with form(which):
        y, _ = kernels.ssm_scan(x, leaf, A, unit, unit.expand(1, 32, h, 32))
        ddt, = torch.autograd.grad(y.sum(), leaf)
    wide = dt.double()
    torch.testing.assert_close(y.double().flatten(), F.softplus(wide).flatten(), rtol=2e-6, atol=0)
    torch.testing.assert_close(ddt.double().flatten(), torch.sigmoid(wide).flatten(), rtol=5e-6, atol=0)


@FORMS
@DECAYS
@pytest.mark.parametrize("wanted", ["y", "h"])
def test_a_loss_may_look_at_y_alone_or_at_the_last_state_alone(which, decay, wanted):
    inputs = scan_inputs(decay, 2, 9, (4, 2, 1), (4, 3), 1, torch.float32)

    def gradients(scan):
        leaves = [t.detach().requires_grad_() for t in inputs.values()]
        seen = scan(**dict(zip(inputs, leaves)))[wanted == "h"]
        return torch.autograd.grad(seen.square().sum(), leaves, materialize_grads=True)
    with form(which):
        got = gradients(kernels.ssm_scan)
    for name, a, e in zip(inputs, got, gradients(kernels.ssm_reference)):
        assert_close(a, e, 5e-5, name)


def test_mamba_keeps_states_whichever_input_is_the_only_one_that_wants_a_gradient(monkeypatch):
    """The backward, without them, would read past an empty tensor."""
    forward, kept = kernels.scan_forward, []
    monkeypatch.setattr(kernels, "scan_forward", lambda *args: kept.append(forward(*args)) or kept[-1])
    inputs = scan_inputs("mamba", 1, 9, (1, 1, 1), (4, 3), 1, torch.float32)
    with form("triton"):
        for name in inputs:
            kernels.ssm_scan(**{k: t.detach().requires_grad_(k == name) for k, t in inputs.items()})
            assert kept[-1][2].numel(), name


@FORMS
@DECAYS
def test_tensors_may_lie_anywhere_also_with_the_length_before_the_batch_and_y_in_something_wider(which, decay):
    """Parameters and h0 with their last axis strided, the rest (l, b, ...) in memory, dense; and an upstream gradient that is a slice."""
    inputs = scan_inputs(decay, 2, 9, (4, 2, 1), (4, 3), 1, torch.float32)

    def far(name, t):
        if name in ("A", "D", "dt_bias", "h0"):
            return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    def run(scan, lie):
        leaves = [lie(k, t).detach().requires_grad_() for k, t in inputs.items()]
        y, h = scan(**dict(zip(inputs, leaves)))
        wide = torch.cat([torch.zeros_like(y), y, torch.ones_like(y)], dim=-1)
        return [y, h, *torch.autograd.grad(wide.sin().sum() + h.square().sum(), leaves)]
    with form(which):
        got = run(kernels.ssm_scan, far)
    for name, a, e in zip(["y", "h", *inputs], got, run(kernels.ssm_reference, lambda _, t: t)):
        assert_close(a, e, 5e-5, name)


def test_a_plan_is_made_anew_for_half_an_alignment_and_for_another_device(monkeypatch):
    monkeypatch.setattr(kernels, "PLANS", {})
    made = []

    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 7
    x, elsewhere = torch.zeros(8, 8), torch.zeros(8, 8).as_subclass(Elsewhere)

    def make(t):
        made.append(t)
    for t in (x, torch.zeros(65)[1:].view(8, 8), torch.zeros(66)[2:].view(8, 8), torch.zeros(67)[3:].view(8, 8), elsewhere):
        kernels.planned(make, t)
    assert len(made) == 5


@pytest.fixture
def touched(monkeypatch):
    """How many numbers each load and store of the interpreter went to, all within the tensors that its kernel was given."""
    if DEVICE == "cuda":
        pytest.skip("looks at the interpreter's loads and stores")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    call, builder, reach, touched = kernels.Launch.__call__, interpreter.InterpreterBuilder, [], []

    def launch(self, *tensors):
        reach[:] = [(t.data_ptr(), t.data_ptr() + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))))
                    for t in tensors if t.numel()]
        return call(self, *tensors)

    def watch(name):
        method = getattr(builder, name)

        def watched(self, ptrs, *args):
            mask = args[0] if name == "create_masked_load" else args[1]
            at = ptrs.data[mask.data.astype(bool)].astype("int64")
            outside = at == at
            for start, end in reach:
                outside &= (at < start) | (at >= end)
            touched.append(at.size)
            assert not outside.any(), (name, self)
            return method(self, ptrs, *args)
        monkeypatch.setattr(builder, name, watched)
    monkeypatch.setattr(kernels.Launch, "__call__", launch)
    watch("create_masked_load")
    watch("create_masked_store")
    return touched


@DECAYS
def test_nothing_behind_a_sequence_of_whole_tiles_is_touched(monkeypatch, touched, decay):
    """Where a segment's last tile begins just where the sequence ends."""
    monkeypatch.setattr(kernels, "segments", lambda *_: 3)
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(decay, 1, 16 if decay == "mamba" else 64, (1, 1, 1), (2, 2), 1, torch.float32).items()}
    with form("triton"):
        y, h = kernels.ssm_scan(**inputs)
        (y.sum() + h.sum()).backward()


@DECAYS
@pytest.mark.parametrize("c, loss", [(1, None), (1, "h"), (3, "yh")])
def test_nothing_outside_its_tensors_is_touched_by_a_kernel(monkeypatch, touched, decay, c, loss):
    """Not even where the value read is thrown away."""
    monkeypatch.setattr(kernels, "segments", lambda *_: c)
    inputs = {k: t.requires_grad_(bool(loss)) for k, t in scan_inputs(decay, 2, 19, (2, 1, 2), (5, 3), 1, torch.float32).items()}
    pos = None if c == 1 else torch.tensor([[*range(1, 20)], [*range(9), *range(10)]], dtype=torch.int32, device=DEVICE)
    with form("triton"):
        y, h = kernels.ssm_scan(**inputs, pos=pos)
        if loss:
            (h.sum() + y.sum() if loss == "yh" else h.sum()).backward()
    assert sum(touched) > 1000


def test_a_sequence_is_cut_into_as_many_segments_as_fill_the_chip_or_into_none():
    assert kernels.segments(1, 2**20, 8, 2048) == 2048            # blocks enough
    assert kernels.segments(3, 2**20, 8, 2048) == 682             # no more blocks than the most
    assert kernels.segments(1, 640, 8, 2048) == 10                # a segment has 8 T tokens or more
    assert kernels.segments(1, 256, 8, 2048) == 4
    assert kernels.segments(512, 2**20, 8, 2048) == 4
    for few in ((1, 255, 8, 2048), (513, 2**20, 8, 2048), (4096, 2**20, 8, 2048), (1, 2, 8, 2048)):  # three do not pay; a chip more than full
        assert kernels.segments(*few) == 1


@DECAYS
@pytest.mark.parametrize("p, n", [(1, 1), (1, 2), (5, 2), (4, 4)])
def test_what_an_operator_returns_shares_no_memory_with_what_it_was_given(decay, p, n):
    """torch.compile relies on it. Of one pair of columns, even ones before odd ones is the order they are in already."""
    t = scan_inputs(decay, 1, 2, (1, 1, 1), (p, n), 1, torch.float32)
    args = [t[k] for k in ("x", "dt", "A", "B", "C", "D")] + [t["z"] if decay == "mamba" else None, t["dt_bias"], t["h0"], None]
    with form("triton"):
        y, h, *kept = kernels.scan_forward(*args, True)
        gradients = kernels.scan_backward(y, h, *args, *kept)
    given = {a.untyped_storage().data_ptr() for a in (*args, y, h, *kept) if a is not None and a.numel()}
    assert given.isdisjoint(g.untyped_storage().data_ptr() for g in gradients if g.numel())
    assert {a.untyped_storage().data_ptr() for a in args if a is not None}.isdisjoint(r.untyped_storage().data_ptr() for r in (y, h, *kept) if r.numel())


# ---------------------------------------------------------------------------------------------------------------
# Decoding. Caches and what they leave are in test_mil.py


@given(st.integers(1, 3), st.integers(1, 16), st.sampled_from([1, 5, 16, 100, 300]), st.sampled_from([1, 31, 64, 90]), st.integers(0, 100))
@settings(max_examples=10)
def test_the_linear_layers_of_decoding_equal_pytorchs(b, l, k, n, seed):
    gen = torch.Generator(DEVICE).manual_seed(seed)
    kinds = [torch.float32, torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float32]
    for kind, bound in zip(kinds, (1e-5, 2e-2, 2e-3)):
        new = lambda *shape: torch.randn(*shape, device=DEVICE, generator=gen).to(kind)  # noqa: E731
        x, onto, weights = new(b, l, 2 * k)[..., :k], new(b, l, n), new(3, n, k)
        exact = [x.double() @ w.double().T for w in weights]
        with form("triton"), torch.no_grad():
            assert_close(kernels.linear(x, weights[0]), exact[0], bound)
            assert_close(kernels.linear(x, weights[0], onto), exact[0] + onto, bound)
            assert_close(kernels.swiglu(x, weights[0], weights[1]), F.silu(exact[0]) * exact[1], bound)
            for ws in (weights, [w.clone() for w in weights]):  # side by side in memory, and not
                for got, want in zip(kernels.linears(x, *ws), exact, strict=True):
                    assert_close(got, want, bound)


def test_a_row_of_a_linear_layer_has_the_same_bits_in_any_company():
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x, w = torch.randn(10, 8, 520, device=DEVICE).to(kind), torch.randn(40, 520, device=DEVICE).to(kind)
    with form("triton"), torch.no_grad():
        whole, gated = kernels.linear(x, w), kernels.swiglu(x, w, w)
        for at in (slice(1), slice(1)), (slice(3, 5), slice(5)), (slice(3), slice(6)), (slice(7), slice(8)):
            assert_same_bits(kernels.linear(x[at], w), whole[at])
            assert_same_bits(kernels.swiglu(x[at], w, w), gated[at])


def test_a_loop_takes_no_more_shared_memory_than_the_device_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=101376))
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0")
    assert [kernels.stages(on_gpu, 4, size) for size in (10_000, 30_000, 50_000, 200_000)] == [4, 3, 2, 1]


# ---------------------------------------------------------------------------------------------------------------
# Training

EPS = 0.1  # so large that the gradient of a norm over one channel is not all rounding


def normed(u, weight):
    return u / (u.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def mlp_formula(u, weight, gate, up, down):
    v = normed(u, weight)
    return u + (F.silu(v @ gate.T) * (v @ up.T)) @ down.T


# What is measured, its definition, and the shapes of what both are given
OPERATIONS = {
    "norm_linears": (lambda u, weight, *weights: kernels.norm_linears(u, weight, EPS, *weights),
                     lambda u, weight, *weights: [normed(u, weight) @ w.T for w in weights], lambda b, l, d, n: ((b, l, d), (d,), (n, d), (1, d), (n, d))),
    "linear": (kernels.linear, lambda x, w: x @ w.T, lambda b, l, d, n: ((b, l, d), (n, d))),
    "linear onto": (kernels.linear, lambda x, w, onto: onto + x @ w.T, lambda b, l, d, n: ((b, l, d), (n, d), (b, l, n))),
    "mlp": (lambda u, weight, *weights: kernels.mlp(u, weight, EPS, *weights), mlp_formula, lambda b, l, d, n: ((b, l, d), (d,), (n, d), (n, d), (d, n))),
    "mlp recomputed": (lambda u, weight, *weights: kernels.mlp(u, weight, EPS, *weights, recompute=True), mlp_formula,
                       lambda b, l, d, n: ((b, l, d), (d,), (n, d), (n, d), (d, n))),
}
EACH = pytest.mark.parametrize("name", OPERATIONS)


def operands(name, size, seed=0, dtype=torch.float64, weights=None, wanted=None):
    """Random tensors for one of OPERATIONS: activations in one type, weights in another; `wanted`: which of them are to have a gradient."""
    gen, shapes = torch.Generator().manual_seed(seed), OPERATIONS[name][2](*size)
    tensors = [torch.randn(*shape, generator=gen, dtype=torch.float64).to(DEVICE, dtype if len(shape) == 3 else weights or dtype) for shape in shapes]
    return [t.requires_grad_(want) for t, want in zip(tensors, wanted or [True] * len(tensors))]


def all_of(y):
    return list(y) if isinstance(y, (list, tuple)) else [y]


def values_and_gradients(f, tensors, seed=1):
    """What f returns, and the gradients of a random linear function of it with respect to those of the tensors that want one."""
    ys = values = all_of(f(*tensors))
    gen = torch.Generator().manual_seed(seed)
    seen = [torch.randn(y.shape, generator=gen, dtype=torch.float64).to(y) for y in ys]
    ys, seen = zip(*[(y, e) for y, e in zip(ys, seen) if y.requires_grad])  # of a formula, those that a wanted gradient has a part in
    return values, torch.autograd.grad(ys, [t for t in tensors if t.requires_grad], seen)


def check_operation(which, name, tensors, tolerance):
    op, formula, _ = OPERATIONS[name]
    with form(which):
        got, gradients = values_and_gradients(op, tensors)
    want, exact = values_and_gradients(formula, [t.detach().double().requires_grad_(t.requires_grad) for t in tensors])
    for i, (a, e) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == tensors[0].dtype
        assert_close(a, e, tolerance, f"{name}, value {i}")
    for t, a, e in zip([t for t in tensors if t.requires_grad], gradients, exact, strict=True):
        assert a.dtype == t.dtype
        assert_close(a, e, tolerance, f"{name}, gradient of {tuple(t.shape)}")


@FORMS
@EACH
def test_an_operation_for_training_equals_its_formula_in_value_and_every_gradient(which, name):
    @settings(max_examples=6 if which == "triton" else 20)
    @given(st.integers(1, 2), st.sampled_from([1, 2, 5, 17]), st.sampled_from([1, 3, 16, 31, 257]), st.sampled_from([1, 2, 16, 67, 300]), st.integers(0, 2**31))
    def check(b, l, d, n, seed):
        check_operation(which, name, operands(name, (b, l, d, n), seed, torch.float32), 1e-4)
        if which == "torch":
            check_operation(which, name, operands(name, (b, l, d, n), seed), 1e-9)
    check()


@FORMS
@EACH
@pytest.mark.parametrize("dtype, weights", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
                                            (torch.float32, torch.bfloat16)], ids=["bf16 fp32", "bf16", "fp16 fp32", "fp32 bf16"])
def test_weights_may_be_of_another_type_which_their_gradients_take(which, name, dtype, weights):
    narrow = torch.bfloat16 if torch.bfloat16 in (dtype, weights) else dtype
    check_operation(which, name, operands(name, (2, 9, 40, 24), 3, dtype, weights), 2 * TOLERANCE[narrow])


@EACH
def test_the_gradient_of_an_operation_for_training_is_that_of_its_differences(name):
    for size in (1, 2, 3, 4), (2, 1, 1, 2):
        op = OPERATIONS[name][0]
        assert torch.autograd.gradcheck(lambda *t: tuple(all_of(op(*t))), operands(name, size))


def kept(f, tensors):
    """f of the tensors, and the bytes of what it keeps for the backward: of each tensor given, and of anything else."""
    given, seen = {t.untyped_storage().data_ptr(): i for i, t in enumerate(tensors)}, {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(*tensors)
    return y, {given[at] for at in seen if at in given}, sum(size for at, size in seen.items() if at not in given)


@FORMS
@EACH
def test_what_is_frozen_costs_no_memory_and_no_product(monkeypatch, which, name):
    (b, l, d, n), op, products = (2, 3, 8, 24), OPERATIONS[name][0], []
    count = lambda f: lambda *args: products.append(args) or f(*args)  # noqa: E731
    monkeypatch.setattr(kernels, "weight_gradient", count(kernels.weight_gradient))
    monkeypatch.setattr(kernels, "input_gradient", count(kernels.input_gradient))
    shapes = OPERATIONS[name][2](b, l, d, n)
    vectors = [i for i, shape in enumerate(shapes) if len(shape) < 2]          # the weight of a norm
    @settings(max_examples=12)
    @given(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)).filter(any))
    def check(wanted):
        tensors = operands(name, (b, l, d, n), 1, torch.float32, wanted=wanted)
        with form(which):
            ys, mine, others = kept(op, tensors)
            assert others == (2 * b * l * n * 4 if name == "mlp" else 0)       # the products with gate and up, never a normed u or a cast copy
            if name.startswith("linear"):
                assert (0 in mine, 1 in mine, 2 in mine) == (wanted[1], wanted[0], False)
            products.clear()
            torch.autograd.grad([y.sum() for y in all_of(ys)], [t for t in tensors if t.requires_grad])
            matrices = sum(want for i, want in enumerate(wanted) if i and i not in vectors and len(shapes[i]) == 2)
            into = wanted[0] or any(wanted[i] for i in vectors)                # something before the projections wants a gradient
            assert len(products) == matrices + into + name.startswith("mlp")   # and that of the MLP's product, which the rest starts from
            check_operation(which, name, tensors, 1e-4)
    check()


def test_a_float32_weight_gets_a_gradient_that_was_never_rounded_to_bf16():
    """Where PyTorch can: on CUDA."""
    dy, x = torch.randn(2, 70, 40, device=DEVICE).bfloat16()
    got = kernels.weight_gradient(dy, x, torch.float32)
    assert got.dtype == torch.float32
    assert_close(got, dy.double().T @ x.double(), 1e-5 if DEVICE == "cuda" and kernels.WIDE else 2**-8)


def test_a_cast_copy_of_a_weight_is_not_kept():
    for name, (op, _, _) in OPERATIONS.items():
        tensors = operands(name, (2, 3, 8, 24), 1, torch.bfloat16, torch.float32)
        assert kept(op, tensors)[2] == (2 * 2 * 3 * 24 * 2 if name == "mlp" else 0), name


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_mlp_that_computes_its_products_again_has_the_bits_of_one_that_keeps_them(which, dtype):
    tensors = operands("mlp", (2, 19, 33, 70), 5, dtype, torch.float32)   # more tokens than go to decoding's kernels
    with form(which):
        runs = [values_and_gradients(OPERATIONS[name][0], tensors) for name in ("mlp", "mlp recomputed")]
        with torch.no_grad():
            assert torch.equal(OPERATIONS["mlp"][0](*tensors), runs[0][0][0])
    (y,), gradients = runs[0]
    assert torch.equal(y, runs[1][0][0]) and all(map(torch.equal, gradients, runs[1][1]))


@FORMS
@EACH
def test_a_graph_that_is_kept_can_be_gone_through_again(which, name):
    tensors = operands(name, (1, 5, 8, 24), 1, torch.float32)
    with form(which):
        ys = all_of(OPERATIONS[name][0](*tensors))
        first, second, third = (torch.autograd.grad([y.sum() for y in ys], tensors, retain_graph=keep) for keep in (True, True, False))
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, third))


@FORMS
@EACH
def test_an_operation_for_training_may_be_checkpointed(which, name):
    op, tensors = OPERATIONS[name][0], operands(name, (1, 5, 8, 24), 1, torch.float32)
    with form(which):
        want = values_and_gradients(op, tensors)
        got = values_and_gradients(lambda *t: checkpoint(op, *t, use_reentrant=False), tensors)
    for a, e in zip(got, want):
        assert all(map(torch.equal, a, e))


def test_a_projection_that_nothing_was_made_of_gets_no_gradient():
    tensors = operands("norm_linears", (1, 5, 8, 24))
    y = kernels.norm_linears(tensors[0], tensors[1], EPS, *tensors[2:])[1]
    du, dweight, *dws = torch.autograd.grad(y.sum(), tensors, allow_unused=True)
    assert dws[0] is dws[2] is None
    for a, e in zip((du, dweight, dws[1]), torch.autograd.grad((normed(*tensors[:2]) @ tensors[3].T).sum(), [*tensors[:2], tensors[3]])):
        assert_close(a, e, 1e-9)


@FORMS
@EACH
def test_activations_may_lie_anywhere(which, name):
    """Length before the batch in memory, and every second number."""
    tensors = operands(name, (2, 5, 8, 24), 1, torch.float32)
    far = [torch.stack([t, t], dim=-1)[..., 0] if t.dim() < 3 else t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    check_operation(which, name, [t.detach().requires_grad_() for t in far], 1e-4)


@EACH
def test_compilers_and_autocast_get_the_formula(name):
    op, tensors = OPERATIONS[name][0], operands(name, (2, 5, 8, 24), 1, torch.float32)
    want = values_and_gradients(op, tensors)
    got = values_and_gradients(torch.compile(op, backend="aot_eager", fullgraph=True), tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = all_of(op(*tensors))
    for a, e, tolerance in [*zip(got[0] + list(got[1]), want[0] + list(want[1]), [1e-5] * 99), *zip(cast, want[0], [6e-2] * 99)]:
        assert_close(a, e, tolerance, name)


@FORMS
@EACH
def test_a_few_tokens_go_through_weights_of_another_type_as_well(which, name):
    tensors = operands(name, (2, 3, 32, 24), 1, torch.float32, torch.float16)
    with form(which), torch.no_grad():
        got = all_of(OPERATIONS[name][0](*tensors))
    for a, e in zip(got, all_of(OPERATIONS[name][1](*[t.detach().double() for t in tensors]))):
        assert a.dtype == torch.float32
        assert_close(a, e, 1e-4, name)


@EACH
def test_kernels_for_training_touch_nothing_outside_their_tensors(touched, name):
    for size in (2, 3, 5, 7), (1, 1, 1, 1):
        with form("triton"):
            values_and_gradients(OPERATIONS[name][0], operands(name, size, 1, torch.float32))
    assert sum(touched) > 10 or name.startswith("linear")  # which is no kernel of ours


def test_a_norms_weight_gets_its_gradient_from_every_row(monkeypatch):
    """Also where programs take several, and the last one fewer."""
    for parts in (1, 2, 3, 7, 100):
        monkeypatch.setattr(kernels, "RMS_BLOCKS", parts)
        check_operation("triton", "norm_linears", operands("norm_linears", (2, 5, 7, 3), 1, torch.float32), 1e-4)


@FORMS
def test_a_rotation_equals_ropes_formula_and_is_undone_by_its_gradient(which):
    @settings(max_examples=10 if which == "triton" else 30)
    @given(st.integers(1, 2), st.sampled_from([1, 2, 17]), st.sampled_from([1, 3, 8, 33]), st.sampled_from([2, 6, 64, 130]), st.booleans(), st.booleans(),
           st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
    def check(b, l, h, p, shared, turned_back, dtype, seed):
        gen = torch.Generator().manual_seed(seed)
        angle = torch.randn(1 if shared else b, l, p // 2, generator=gen).to(DEVICE) * 10
        wide, seen = (torch.randn(b, l, h * p + w, generator=gen).to(DEVICE, dtype) for w in (3, 0))
        q, seen = wide[..., 2:-1].unflatten(2, (h, p)).requires_grad_(), seen.view(b, l, h, p)
        seen = seen.transpose(1, 2).contiguous().transpose(1, 2) if turned_back else seen    # as attention's backward leaves it
        with form(which):
            y, mine, others = kept(kernels.rotate, [q, angle.cos(), angle.sin()])
            dq, = torch.autograd.grad(y, q, seen)
        assert mine == {1, 2} and not others and y.is_contiguous() and y.dtype == dq.dtype == dtype
        turn = torch.complex(angle.cos().double(), angle.sin().double())[:, :, None]   # of pairs of channels as complex numbers
        for got, t, by, name in (y, q, turn, "value"), (dq, seen, turn.conj(), "gradient"):
            t = torch.view_as_real(torch.complex(*t.detach().double().chunk(2, dim=-1)) * by)
            assert_close(got, torch.cat(t.unbind(-1), dim=-1), TOLERANCE[dtype] / 4, name)
    check()


@FORMS
def test_a_rotation_has_the_same_gradient_under_autocast(which):
    inputs = [torch.randn(2, 3, 2, 6, device=DEVICE, requires_grad=True), *torch.randn(2, 1, 3, 3, device=DEVICE)]
    with form(which):
        want = values_and_gradients(kernels.rotate, inputs)
        with torch.autocast(DEVICE, torch.bfloat16):
            got = values_and_gradients(kernels.rotate, inputs)
    assert torch.equal(got[0][0], want[0][0]) and torch.equal(got[1][0], want[1][0])


def test_a_rotation_is_differentiated_exactly_and_left_to_compilers():
    q, angle = torch.randn(2, 3, 2, 6, dtype=torch.float64, device=DEVICE, requires_grad=True), torch.randn(1, 3, 3, device=DEVICE)
    assert torch.autograd.gradcheck(lambda q: kernels.rotate(q, angle.cos(), angle.sin()), q)
    compiled = torch.compile(kernels.rotate, backend="aot_eager", fullgraph=True)
    got, want = (values_and_gradients(f, [q, angle.cos(), angle.sin()]) for f in (compiled, kernels.rotate))
    assert_close(got[0][0], want[0][0], 1e-12)
    assert_close(got[1][0], want[1][0], 1e-12)


# Triton's interpreter takes ∞ from ∞ where the kernel then looks away
INFINITE = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def losses_formula(logits, wanted, targets, alpha, beta, tau=1.0, reverse=False):
    """ce, kl and the gradient of Σ alpha ce + beta kl in float64, by autograd."""
    x, learned = logits.detach().double().requires_grad_(), targets >= 0
    ce, kl = F.cross_entropy(x, targets, reduction="none", ignore_index=-100), torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if wanted is not None:
        of, to = (wanted.double() / tau).log_softmax(-1), (x / tau).log_softmax(-1)
        of, to = (to, of) if reverse else (of, to)
        kl = tau**2 * (of.exp() * (of - to)).sum(-1) * learned
    total = (alpha.double() * ce).sum() + (0 if beta is None else (beta.double() * kl).sum())
    return ce.detach(), kl.detach(), torch.autograd.grad(total, x)[0]


def losses_inputs(n, v, seed, dtype=torch.float32, scale=3.0):
    gen = torch.Generator().manual_seed(seed)
    logits, wanted = (torch.randn(n, v, generator=gen).mul(scale).to(DEVICE, dtype) for _ in range(2))
    targets = torch.randint(v, (n,), generator=gen).masked_fill(torch.rand(n, generator=gen) < 0.3, -100).to(DEVICE)
    return logits, wanted, targets, *(torch.rand(n, generator=gen).to(DEVICE) for _ in range(2))


@INFINITE
@FORMS
def test_the_losses_of_tokens_and_their_gradient_equal_autograds(monkeypatch, which):
    @settings(max_examples=30 if which == "triton" else 60)
    @given(st.integers(1, 3), st.sampled_from([1, 2, 3, 257, 1000, 1025]), st.sampled_from([32, 1024]), st.sampled_from([0.5, 1.0, 2.0]), st.booleans(),
           st.sampled_from(["both", "alpha", "beta", "teacher watched"]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.integers(0, 2**31))
    def check(n, v, lanes, tau, reverse, weights, dtype, seed):
        monkeypatch.setattr(kernels, "LOSSES", dict(LANES=lanes, num_warps=4))
        logits, wanted, targets, alpha, beta = losses_inputs(n, v, seed, dtype)
        if weights == "alpha":
            wanted = beta = None
        if weights == "beta":
            alpha = torch.zeros_like(alpha)
        if weights == "teacher watched":
            beta = None
        ce, kl, dx = losses_formula(logits, wanted, targets, alpha, beta, tau, reverse)
        before = logits.clone()
        with form(which):
            only = kernels.token_losses(logits, wanted, targets, alpha, beta, tau, reverse)
            assert torch.equal(logits, before)
            got = kernels.token_losses(logits, wanted, targets, alpha, beta, tau, reverse, gradient=True)
        exact = 1e-12 if dtype == torch.float64 else 1e-5
        for a, e, again, name in zip(got, (ce, kl), only, ("ce", "kl")):
            assert a.dtype == torch.promote_types(dtype, torch.float32) and torch.equal(a, again)
            assert_close(a, e, exact, name, noise=exact)
        rounding = 2**-7 if which == "triton" else 2**-8 * 1.01                              # the interpreter cuts off
        assert_close(logits, dx, rounding if dtype == torch.bfloat16 else exact, "gradient", noise=exact / 10)
        assert not logits[targets < 0].any() and not got[0][targets < 0].any() and not got[1][targets < 0].any()
    check()


@INFINITE
@FORMS
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_tokens_without_probability_add_nothing_to_a_divergence(which, reverse):
    """An infinity in both is a smaller vocabulary; in what the divergence is taken of it leaves what the other tokens give; in what it is
    taken to it is an infinite one."""
    logits, wanted, targets, alpha, beta = losses_inputs(3, 300, 1)
    targets[:] = torch.tensor([100, -100, 299])
    learned, rest = targets >= 0, slice(90, None)
    for in_student, in_teacher in (True, True), (reverse, not reverse), (not reverse, reverse):
        x, w = logits.clone(), wanted.clone()
        x[:, :90 * in_student] = w[:, :90 * in_teacher] = -torch.inf                         # whole threads of them
        gone = 90 * in_student
        leaf, of = x[learned, gone:].double().requires_grad_(), w[learned].double().log_softmax(-1)[:, rest]
        to, x[1] = leaf.log_softmax(-1)[:, 90 - gone:], torch.nan                            # what is not learned is not looked at
        kl, ce = ((to.exp() * (to - of)) if reverse else (of.exp() * (of - to))).sum(-1), F.cross_entropy(leaf, targets[learned] - gone, reduction="none")
        dx, = torch.autograd.grad((alpha[learned] * ce + beta[learned] * kl).sum(), leaf)
        with form(which):
            got = kernels.token_losses(x, w, targets, alpha, beta, reverse=reverse, gradient=True)
        assert not x[1].any() and not got[0][1] and not got[1][1]
        assert_close(got[0][learned], ce, 1e-5, "ce")
        if in_student == in_teacher or in_student == reverse:
            assert_close(got[1][learned], kl, 1e-5, "kl")
            assert_close(x[learned, gone:], dx, 1e-5, "gradient", noise=1e-6)
            assert not x[learned, :gone].any()
        else:
            assert (got[1][learned] == torch.inf).all()


@INFINITE
@FORMS
def test_a_student_that_agrees_has_no_divergence_and_large_logits_no_infinity(which):
    logits, _, targets, alpha, beta = losses_inputs(4, 1000, 2, scale=1000.0)
    with form(which):
        for reverse in (False, True):
            ce, kl = kernels.token_losses(logits, logits.clone(), targets, alpha, beta, 1.0, reverse)
            assert not kl.any() and ce.isfinite().all()
            got = logits.clone()
            kernels.token_losses(got, logits, targets, torch.zeros_like(alpha), beta, 1.0, reverse, gradient=True)
            assert not got.any()


@INFINITE
@FORMS
def test_the_logits_of_a_token_may_be_part_of_a_longer_row_which_is_left_alone(which):
    logits, wanted, targets, alpha, beta = losses_inputs(3, 50, 3)
    wide, teacher = (torch.cat([torch.full_like(t, 7.0), t, torch.full_like(t, 7.0)], dim=1) for t in (logits, wanted))
    with form(which):
        kernels.token_losses(logits, wanted, targets, alpha, beta, gradient=True)
        kernels.token_losses(wide[:, 50:100], teacher[:, 50:100], targets, alpha, beta, gradient=True)
        assert torch.equal(wide[:, 50:100], logits) and (wide[:, :50] == 7).all() and (wide[:, 100:] == 7).all()
        with pytest.raises(ValueError, match="side by side"):
            kernels.token_losses(logits.T, wanted.T, targets, alpha, beta)


@INFINITE
def test_the_kernel_of_the_losses_touches_nothing_outside_its_tensors(touched):
    with form("triton"):
        for v in (1, 5, 1025):
            kernels.token_losses(*losses_inputs(3, v, 4), gradient=True)
    assert sum(touched) > 1000


def test_plans_of_many_lengths_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(kernels, "PLANS", {})
    x = torch.zeros(5000)
    for l in range(5000):
        kernels.planned(len, x[:l])
    assert 0 < len(kernels.PLANS) <= 4096


def test_under_autocast_a_few_tokens_get_the_formula():
    x, w = torch.randn(1, 2, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    with form("triton"), torch.no_grad():
        assert kernels.few(x, 2, w)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert not kernels.few(x, 2, w) and kernels.linear(x, w).dtype == torch.bfloat16


def test_weights_of_two_storages_are_not_read_as_one_though_they_touch():
    memory = bytearray(4 * 2 * 8 * 16)
    a, b = (torch.frombuffer(memory, dtype=torch.float32, count=8 * 16, offset=4 * 8 * 16 * i).view(8, 16) for i in range(2))
    a.copy_(torch.randn(8, 16)), b.copy_(torch.randn(8, 16))
    x = torch.randn(1, 2, 16)
    assert a.data_ptr() + a.nbytes == b.data_ptr()
    if DEVICE == "cpu":
        with form("triton"), torch.no_grad():
            for got, w in zip(kernels.linears(x, a, b), (a, b), strict=True):
                assert torch.allclose(got, x @ w.T, atol=1e-5)


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
def test_how_many_pieces_the_keys_are_in_does_not_depend_on_how_many_tokens_come():
    for b, pieces in ((1, 8), (16, 2)):
        new = lambda l, heads, b=b: torch.zeros(b, l, heads, 16)  # noqa: E731
        assert {kernels.attend_plan(new(l, 8), new(l, 4), new(l, 4), torch.zeros(b, 4, 1024, 16)).splits for l in (1, 2, 15, 16)} == {pieces}


def test_tokens_are_read_one_by_one_only_where_their_numbers_lie_side_by_side():
    x = torch.randn(2, 3, 4, 6)
    for t_, same in ((x, True), (x[..., :4], False), (x.transpose(2, 3), False), (x[:, :2], False), (torch.randn(2, 3, 48)[..., :24].unflatten(2, (4, 6)), True)):
        got = kernels.one_by_one(t_)
        assert torch.equal(got, t_) and got[:1, :1].is_contiguous() and got.stride(0) == got.shape[1] * got.stride(1) and (got is t_) == same


@pytest.mark.parametrize("which", ["triton", "torch"])
def test_a_convolutions_state_of_another_type_is_taken_in_that_of_x(which):
    x, state, w = torch.randn(2, 2, 1, 4).to(torch.float16).to(DEVICE), torch.randn(2, 3, 1, 4, device=DEVICE), torch.randn(4, 4, 4, device=DEVICE)
    with form(which), torch.no_grad():
        y, new = kernels.causal_conv(x, w, None, state)
    assert y.dtype == new.dtype == torch.float16


def test_a_teachers_logits_that_do_not_lie_side_by_side_are_refused_too():
    logits, targets, one = torch.randn(3, 5), torch.zeros(3, dtype=torch.long), torch.ones(3)
    with pytest.raises(ValueError, match="side by side"):
        kernels.token_losses(logits, torch.randn(5, 3).T, targets, one, one)
