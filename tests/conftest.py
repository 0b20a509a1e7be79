"""What the tests share. Without CUDA the kernels run under Triton's interpreter."""

import base64
import contextlib
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of numpy, which torch imports

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: their tensors are small

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import kernels
import mil

torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and kernels.triton is not None:  # the interpreter, without what makes it slow
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    object.__setattr__(options, "sanitize_overflow", False)  # far offsets have tests of their own
    first_call, patched = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        """A function that a kernel calls. Triton patches its module each time; once is enough."""
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return first_call(self, *args, **kwargs)

    def scan(self, inputs):
        """An associative scan slice by slice; Triton's goes number by number."""
        done = []
        for i in range(inputs[0].handle.data.shape[self.axis]):
            now = [self.to_tensor(t.handle.data.take(i, self.axis), t.dtype) for t in inputs]
            done.append(self.combine_fn.fn(*done[-1], *now) if done else now)
        columns = ([t.handle.data for t in column] for column in zip(*done, strict=True))
        stacked = (np.stack(column, self.axis) for column in columns)
        return [self.to_tensor(s, t.dtype) for s, t in zip(stacked, inputs, strict=True)]

    interpreter.InterpretedFunction.__call__ = call
    interpreter.ScanOps.generic_scan = scan

kernels.INTERPRET = False  # on the CPU only the tests that ask for form("triton") interpret
slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
how = dict(deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.register_profile("mil", suppress_health_check=slow, **how)
settings.load_profile("mil")


@contextlib.contextmanager
def form(name):
    """Inside, `kernels` takes its Triton form, interpreted on the CPU, or its PyTorch form."""
    if name == "triton" and kernels.triton is None:
        pytest.skip("Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setattr(kernels, "use_triton", lambda x: False)
        patch.setattr(kernels, "INTERPRET", name == "triton" and DEVICE == "cpu")
        yield


def assert_close(got, want, tolerance, name="", noise=0.0):
    """Each element is within noise + tolerance × (its size + the root mean square), none is NaN."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    scale = want.abs() + want.square().mean().sqrt() + 1e-30
    worst = (((got - want).abs() - noise) / scale).max().item() if want.numel() else 0.0
    assert worst <= tolerance, f"{name}: relative error {worst:.2e}, allowed {tolerance:.0e}"


def assert_same_bits(got, want):
    """On a GPU. In the interpreter numpy multiplies, whose bits may depend on the other rows."""
    if DEVICE == "cuda":
        assert torch.equal(got, want)
    else:
        assert_close(got, want, 1e-5)


def run_script(*argv, stdin=""):
    """A command as a user types it, in a process of its own and without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    how = dict(cwd=Path(__file__).parent.parent, env=env, text=True, timeout=400)
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, input=stdin, capture_output=True, **how)


@st.composite
def configs(draw, mixers=mil.MIXERS):
    """Small stacks of any mixers: grouped heads, sizes off the powers of two, tied or untied."""
    heads = [(1, 1, 4), (1, 3, 8), (2, 1, 6), (2, 2, 12), (3, 2, 4)]
    n_kv_heads, group, head_dim = draw(st.sampled_from(heads))
    states = [k for k in (1, 2, 3, 4, 6) if n_kv_heads * head_dim % k == 0]
    chosen = draw(st.lists(st.sampled_from(mixers), min_size=1, max_size=3))
    sizes = dict(v=17, d=draw(st.sampled_from([8, 20])), d_ff=24, context=64)
    sizes |= dict(n_heads=n_kv_heads * group, n_kv_heads=n_kv_heads, head_dim=head_dim)
    sizes |= dict(tied=draw(st.booleans()), d_state=draw(st.sampled_from(states)))
    return mil.Config(n_layers=len(chosen), mixers=chosen, **sizes)


def build(config, dtype=torch.float64, seed=0):
    """A stack whose every parameter matters: norms and D are not all ones, weights not tiny."""
    torch.manual_seed(seed)
    model = mil.Hybrid(config).to(dtype)
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn_like(w) * (0.3 if w.dim() > 1 else 0.1))
    return model.to(DEVICE).eval()


def random_tokens(config, b, l, seed=0):
    return torch.randint(config.v, (b, l), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


MERGES = "h e,l l,he ll,hell o,Ġ t,Ġt he,1 2,12 3"  # of the tokenizers in the tests


def llama3_file(path):
    """Meta's tokenizer.model with the ids of test_tokenizers's FILES["llama3"]."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != 32]
    tokens = [bytes([b]) for b in [*shown, *(b for b in range(256) if b not in shown)]]
    tokens += MERGES.replace(" ", "").replace("Ġ", " ").encode().split(b",")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return str(path)
