"""What the tests share. With CUDA they run the compiled kernels; without, the same kernels under Triton's interpreter."""
import contextlib
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of numpy, which torch imports

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined: before kernels.py is imported
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: tensors this small only wait for a second thread
    torch.set_num_threads(1)

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import kernels
import mil

if os.environ.get("TRITON_INTERPRET") and kernels.triton is not None:  # two thirds of what interpreted kernels cost these tests is left out
    from triton.runtime import interpreter
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)  # tests of their own read rows 2^31 elements apart
    first, patched = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        """A function that a kernel calls: Triton patches its module's triton.language for every call, though once is enough."""
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return first(self, *args, **kwargs)
    interpreter.InterpretedFunction.__call__ = call

kernels.INTERPRET = False  # the interpreter is slow: on the CPU only the tests that ask for form("triton") take it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
settings.register_profile("mil", deadline=None, print_blob=True, derandomize="CI" in os.environ,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("mil")


@contextlib.contextmanager
def form(name):
    """Inside, `kernels` takes its Triton form (compiled on CUDA, interpreted on the CPU) or its PyTorch form."""
    if name == "triton" and kernels.triton is None:
        pytest.skip("Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setattr(kernels, "use_triton", lambda x: False)
        patch.setattr(kernels, "PLANS", {})
        patch.setattr(kernels, "INTERPRET", name == "triton" and DEVICE == "cpu")
        if kernels.INTERPRET:  # what it costs is programs and tokens, not their width
            patch.setattr(kernels, "REPLAY", tuple((T, 4 * BC, *more) for T, BC, *more in kernels.REPLAY))
            patch.setattr(kernels, "S6_TILE", kernels.S6_TILE if kernels.S6_TILE < 256 else 2**14)
        yield


def assert_close(got, want, tolerance, name="", noise=0.0):
    """Every element within `noise` + `tolerance` × (its own size + the root mean square of all); NaN never is."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    scale = want.abs() + want.square().mean().sqrt() + 1e-30
    worst = (((got - want).abs() - noise) / scale).max().item() if want.numel() else 0.0
    assert worst <= tolerance, f"{name}: relative error {worst:.2e}, allowed {tolerance:.0e}"


def assert_same_bits(got, want):
    """On a GPU. The interpreter's products are numpy's, in which the bits of a row may depend on the rows beside it: there, nearly."""
    if DEVICE == "cuda":
        assert torch.equal(got, want)
    else:
        assert_close(got, want, 1e-5)


def run_script(*argv, stdin=""):
    """A command as a user types it, in a process of its own and without the interpreter."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=Path(__file__).parent.parent, input=stdin, capture_output=True, text=True, timeout=400,
                          env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})


@st.composite
def configs(draw, mixers=mil.MIXERS):
    """Small stacks of any mix of mixers: grouped heads, head sizes off the powers of two, tied or untied."""
    n_kv_heads, group, head_dim = draw(st.sampled_from([(1, 1, 4), (1, 3, 8), (2, 1, 6), (2, 2, 12), (3, 2, 4)]))
    chosen = draw(st.lists(st.sampled_from(mixers), min_size=1, max_size=3))
    return mil.Config(v=17, d=draw(st.sampled_from([8, 20])), n_layers=len(chosen), n_heads=n_kv_heads * group, n_kv_heads=n_kv_heads,
                      head_dim=head_dim, d_ff=24, context=64, mixers=chosen, tied=draw(st.booleans()),
                      d_state=draw(st.sampled_from([k for k in (1, 2, 3, 4, 6) if n_kv_heads * head_dim % k == 0])))


def build(config, dtype=torch.float64, seed=0):
    """A stack whose every parameter is random enough to matter (norms and D are not all ones, weights are not tiny)."""
    torch.manual_seed(seed)
    model = mil.Hybrid(config).to(dtype)
    with torch.no_grad():
        for name, w in model.named_parameters():
            w.add_(torch.randn_like(w) * (0.3 if w.dim() > 1 else 0.1))
    return model.to(DEVICE).eval()


def random_tokens(config, b, l, seed=0):
    return torch.randint(config.v, (b, l), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
