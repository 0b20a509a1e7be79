"""Tokenizers, the law a token is drawn from, decoding, and the command line."""

import base64
import dataclasses
import gc
import io
import sys
import weakref
import zlib

import pytest
import torch
from conftest import DEVICE, assert_close, build, configs, form, random_tokens, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as g
import mil
from mil import Config, MilError

MIXED = dict(v=257, d=16, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=24, context=48, d_state=4)


@pytest.fixture
def student(tmp_path):
    """A small checkpoint with every mixer, whose tokenizer is "bytes"."""
    mil.save(
        build(Config(**MIXED, mixers=["attention", "mamba", "mamba2", "none"]), torch.float32),
        tmp_path / "m",
        tokenizer="bytes",
    )
    return str(tmp_path / "m")


# --------------------------------------------------------------------------------------------------
# Tokenizers


@given(st.text())
def test_bytes_encode_any_text_and_special_tokens_in_it_are_plain(text):
    encoding, text = g.load_tokenizer("bytes"), text + "<|endoftext|>"
    ids = encoding.encode(text)
    assert ids == list(text.encode()) and encoding.decode(ids) == text


def llama3_file(path, merges=(b"he", b"ll", b"hell", b"hello", b" w")):
    tokens = [bytes([i]) for i in range(256)] + list(merges)
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


# --------------------------------------------------------------------------------------------------
# The law a token is drawn from


@given(
    st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=2, max_size=12),
    st.floats(0.1, 3),
    st.integers(0, 14),
    st.floats(0.05, 1),
)
def test_the_law_is_softmax_cut_to_top_k_then_top_p(logits, temperature, top_k, top_p):
    law = g.distribution(
        torch.tensor(logits, dtype=torch.float64), temperature, top_k, top_p
    ).tolist()
    weights = [torch.tensor(x / temperature, dtype=torch.float64).exp().item() for x in logits]
    if top_k and top_k < len(logits):
        weights = [w if w >= sorted(weights)[-top_k] else 0.0 for w in weights]
    share = [w / sum(weights) for w in weights]
    mass_before = {
        s: sum(sorted(share, reverse=True)[: sorted(share, reverse=True).index(s)]) for s in share
    }
    if any(abs(m - top_p) < 1e-9 for m in mass_before.values()):
        return  # on the edge rounding decides
    kept = [s if mass_before[s] < top_p or top_p == 1 else 0.0 for s in share]
    assert law == pytest.approx([s / sum(kept) for s in kept], abs=1e-9)
    greedy = g.distribution(torch.tensor(logits), 0.0)
    assert greedy.sum() == 1 and greedy[max(range(len(logits)), key=logits.__getitem__)] == 1


def test_sampling_follows_the_law():
    """Chi-square over 4,000 first tokens of one prompt; 50 % expected below the median, 1e-6 above the limit used."""
    model = build(Config(**{**MIXED, "v": 8}), torch.float32)
    (draws,) = list(
        g.generate(
            model,
            [[1, 2, 3]] * 4000,
            1,
            1.5,
            6,
            0.9,
            generator=torch.Generator(DEVICE).manual_seed(0),
        )
    )
    with torch.no_grad():
        law = (
            g.distribution(model(torch.tensor([[1, 2, 3]], device=DEVICE))[0, -1], 1.5, 6, 0.9)
            .double()
            .cpu()
        )
    count = torch.bincount(torch.tensor(draws)[:, 0], minlength=8).double()
    assert not count[law == 0].any()
    law, count = law[law > 0], count[law > 0]
    assert (
        len(law) > 2 and ((count - 4000 * law).square() / (4000 * law)).sum() < 40
    )  # at most 7 degrees of freedom: p = 1e-6


# --------------------------------------------------------------------------------------------------
# Decoding


def whole(rounds):
    """All the new tokens of each row."""
    return [list(sum(row, ())) for row in zip(*rounds)]


@given(configs(), st.integers(0, 1000))
@settings(max_examples=15)
def test_greedy_decoding_with_the_cache_is_greedy_decoding_without(config, seed):
    model, ids = build(config, seed=seed), [1, 5, 2]
    for token in whole(g.generate(model, [ids], 12, temperature=0))[0]:
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=DEVICE))[0, -1]
        assert logits[token] >= logits.max() - 1e-9
        ids = ids + [token]


@pytest.mark.parametrize(
    "mixers",
    [["attention"] * 4, ["mamba"] * 4, ["mamba2"] * 4, ["attention", "mamba", "mamba2", "none"]],
    ids="-".join,
)
def test_prompts_of_unequal_length_in_a_batch_give_each_what_it_gives_alone(mixers):
    model = build(Config(**MIXED, mixers=mixers), torch.float32)
    prompts = [[7], list(range(40, 60)), [3, 1, 4, 1, 5], [200] * 11]
    for prompt, row in zip(prompts, whole(g.generate(model, prompts, 20, temperature=0))):
        assert whole(g.generate(model, [prompt], 20, temperature=0)) == [row]


def test_a_row_ends_at_its_own_stop_token_or_at_the_context_and_the_others_go_on():
    model = build(Config(**MIXED), torch.float32)
    prompts = [[7], [3, 1, 4]]
    free = whole(g.generate(model, prompts, 12, temperature=0))
    stop = free[0][4]
    for before, after in zip(
        free, whole(g.generate(model, prompts, 12, temperature=0, stop=[stop]))
    ):
        assert after == before[: before.index(stop) + 1 if stop in before else 12]
    assert (
        len(list(g.generate(model, [list(range(45))], 12, temperature=0))) == 3
    )  # a context of 48
    assert len(list(g.generate(model, [[1]], 5, temperature=0))) == 5
    endless = build(
        Config(**MIXED, mixers=["mamba2"] * 4), torch.float32
    )  # without attention there is no context to fill
    assert len(list(g.generate(endless, [list(range(45))], 12, temperature=0))) == 12


def test_the_same_seed_gives_the_same_sample():
    model = build(Config(**MIXED), torch.float32)
    draw = lambda seed: list(
        g.generate(
            model, [[1], [2, 3]], 20, 1.0, generator=torch.Generator(DEVICE).manual_seed(seed)
        )
    )  # noqa: E731
    assert draw(1) == draw(1) and draw(1) != draw(2)


@pytest.mark.parametrize(
    "prompt, match",
    [
        ([], "prompt 1 is empty"),
        ([1] * 48, "prompt 1 has 48 tokens, the context is 48"),
        ([300], "token 300, but the model's vocabulary is 257"),
        ([5, -1], "has token -1"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompt, match):
    with pytest.raises(MilError, match=match):
        next(g.generate(build(Config(**MIXED)), [prompt], 5))


# --------------------------------------------------------------------------------------------------
# Speculative decoding


@given(
    configs(),
    configs(),
    st.integers(1, 8),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 1000),
)
@settings(max_examples=25)
def test_greedy_speculation_writes_what_greedy_decoding_writes(target, draft, K, lengths, seed):
    """In float64, token for token, for any two stacks, with few tokens so that some proposals are kept and some are not."""
    v = 7
    target, draft = (
        build(dataclasses.replace(c, v=v), seed=seed + i) for i, c in enumerate((target, draft))
    )
    prompts = [
        random_tokens(target.config, 1, l, seed + i)[0].tolist() for i, l in enumerate(lengths)
    ]
    want = whole(g.generate(target, prompts, 20, temperature=0, stop=[v - 1]))
    assert (
        whole(g.generate(target, prompts, 20, temperature=0, stop=[v - 1], draft=draft, K=K))
        == want
    )


@pytest.mark.parametrize(
    "mixers",
    [["attention"] * 4, ["mamba"] * 4, ["mamba2"] * 4, ["attention", "mamba", "mamba2", "none"]],
    ids="-".join,
)
def test_a_draft_that_is_the_target_is_kept_whole_and_one_that_is_wrong_not_at_all(mixers):
    model = build(Config(**MIXED, mixers=mixers))
    wrong = build(Config(**MIXED, mixers=mixers))
    want = whole(g.generate(model, [[5, 3], [6, 7, 8]], 24, temperature=0))
    decoder = g.Decoder(model, 2, 40, 0, draft=model, K=3)
    rounds = list(decoder.decode([[5, 3], [6, 7, 8]], 24))
    assert whole(rounds) == want and [len(new) for new in rounds[0]] == [4, 4]
    assert decoder.accepted == decoder.proposed == 3 * decoder.passes == 2 * 3 * 6
    with torch.no_grad():
        wrong.lm_head.weight.neg_()  # likeliest is what was least likely
    rounds = list(g.generate(model, [[5, 3], [6, 7, 8]], 24, temperature=0, draft=wrong, K=3))
    assert whole(rounds) == want and len(rounds) == 24


def laws(seed, *shape):
    """Random laws (..., 5), each with top-k and top-p applied, so with zeros."""
    logits = (
        torch.randn(*shape, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        * 2
    )
    return g.distribution(logits, 0.8, 4, 0.9)


@given(st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=20)
def test_by_enumeration_the_text_of_a_round_has_the_targets_law(K, seed):
    """All proposals × all outcomes, their probabilities multiplied out: what a round leaves, continued by the target to K + 1 tokens, has
    the target's law to 1e-12. p and q may depend on all that precedes: every prefix has laws of its own."""
    law = lambda which, prefix: laws(zlib.crc32(repr((which, prefix, seed)).encode()), 1)[0]  # noqa: E731
    got, want = {}, {}

    def put(out, prefix, chance):  # the target goes on alone
        if len(prefix) == K + 1:
            out[prefix] = out.get(prefix, 0.0) + chance
        else:
            for token, p in enumerate(law("p", prefix).tolist()):
                if p:
                    put(out, (*prefix, token), chance * p)

    put(want, (), 1.0)

    def propose(prefix, chance):
        if len(prefix) < K:
            for token, q in enumerate(law("q", prefix).tolist()):
                if q:
                    propose((*prefix, token), chance * q)
            return
        for count in range(K + 1):  # kept before the first rejection
            p, q = (
                law("p", prefix[:count]),
                law("q", prefix[:count]) if count < K else torch.zeros(5, dtype=torch.float64),
            )
            keep = g.acceptance(p, q, torch.tensor(prefix[count])).item() if count < K else 0.0
            if keep < 1:
                for token, r in enumerate(g.residual(p, q).tolist()):
                    if r:
                        put(got, (*prefix[:count], token), chance * (1 - keep) * r)
            chance *= keep

    propose((), 1.0)
    assert want.keys() >= {k for k, c in got.items() if c > 1e-13}
    assert all(abs(got.get(k, 0.0) - c) < 1e-12 for k, c in want.items())


def test_the_sampler_keeps_and_replaces_with_the_enumerated_probabilities():
    """Chi-square over 60,000 rounds of K = 2: the three tokens that `verify` leaves, each given the ones before, against the target's laws."""
    n, p, q = 60000, laws(1, 3), laws(2, 2)
    generator = torch.Generator().manual_seed(0)
    proposed = g.draw(q.expand(n, 2, 5), generator)
    count, extra = g.verify(proposed, q.expand(n, 2, 5), p.expand(n, 3, 5), generator)
    first = torch.where(count > 0, proposed[:, 0], extra)
    second = torch.where(count > 1, proposed[:, 1], extra)[
        count > 0
    ]  # given that the first was kept
    for tokens, law in ((first, p[0]), (second, p[1]), (extra[count == 2], p[2])):
        seen, law = torch.bincount(tokens, minlength=5).double(), law * len(tokens)
        assert (
            not seen[law == 0].any() and ((seen - law).square() / law)[law > 0].sum() < 35
        )  # 4 degrees of freedom: p < 1e-6


def test_speculative_sampling_follows_the_targets_law_through_the_models():
    """Three tokens at K = 1: proposed, added, proposed again after the cursors moved. Each given the tokens before it."""
    target, draft = (build(Config(**{**MIXED, "v": 3}), seed=i) for i in range(2))
    n = 9000
    rows = whole(
        g.generate(
            target,
            [[1, 2]] * n,
            3,
            1.3,
            0,
            0.95,
            generator=torch.Generator(DEVICE).manual_seed(0),
            draft=draft,
            K=1,
        )
    )
    rows = torch.tensor(rows)
    for before in [(), *[(a,) for a in range(3)], *[(a, b) for a in range(3) for b in range(3)]]:
        seen = rows[
            (rows[:, : len(before)] == torch.tensor(before)).all(1) if before else slice(None),
            len(before),
        ]
        with torch.no_grad():
            want = g.distribution(
                target(torch.tensor([[1, 2, *before]], device=DEVICE))[0, -1], 1.3, 0, 0.95
            ).cpu() * len(seen)
        have = torch.bincount(seen, minlength=3).double()
        assert not have[want == 0].any() and ((have - want).square() / want)[want > 0].sum() < 30, (
            before
        )  # 2 degrees of freedom: p < 1e-6


@given(configs(), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=15)
def test_the_draft_proposes_what_it_would_itself_write_after_the_text_so_far(config, K, seed):
    """Also after proposals that were rejected, which its cache must forget, and after all were kept, the last of which it has not read."""
    config = dataclasses.replace(config, v=3)
    target, draft, seen, verify = (
        build(config, seed=seed),
        build(config, seed=seed + 1),
        [],
        g.verify,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            g,
            "verify",
            lambda proposed, *args: seen.append(proposed.tolist()) or verify(proposed, *args),
        )
        rounds = list(g.generate(target, [[1, 0], [2, 0, 1]], 12, 0, draft=draft, K=K))
        patch.undo()
        texts = [[1, 0], [2, 0, 1]]
        for proposed, new in zip(seen, rounds):
            for i, text in enumerate(texts):
                if new[i]:
                    assert [proposed[i]] == whole(g.generate(draft, [text], K, 0))
                    texts[i] = [*text, *new[i]]


def test_greedy_speculation_on_decodings_kernels_writes_the_plain_text():
    """In bf16 and in CUDA graphs where there is CUDA."""
    mixers = ["attention", "mamba2", "mamba"] if DEVICE == "cuda" else ["attention", "mamba2"]
    config = Config(
        v=60,
        d=24,
        n_layers=len(mixers),
        n_heads=2,
        n_kv_heads=1,
        head_dim=20,
        d_ff=28,
        d_state=20,
        context=40,
        mixers=mixers,
    )
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    target, draft = (build(config, kind, seed=i) for i in range(2))
    prompts, stop, new = [[1, 2, 3, 4], [7]], [9], 40 if DEVICE == "cuda" else 5
    with form("triton"):
        want = whole(g.generate(target, prompts, new, 0, stop=stop))
        for K, proposer in ((3, draft), (2, target))[: 2 if DEVICE == "cuda" else 1]:
            assert (
                whole(g.generate(target, prompts, new, 0, stop=stop, draft=proposer, K=K)) == want
            )


def test_what_a_text_held_is_freed_with_it_and_not_in_the_middle_of_another(monkeypatch):
    """A CUDA graph freed by the garbage collector while another is captured breaks the capture."""
    made, make = [], g.Graph
    monkeypatch.setattr(
        g, "Graph", lambda *args: made.append(weakref.ref(graph := make(*args))) or graph
    )
    gc.disable()
    try:
        list(
            g.generate(
                build(Config(**MIXED)), [[1, 2]], 9, 0, draft=build(Config(**MIXED), seed=1), K=2
            )
        )
        assert len(made) == 2 and not any(ref() for ref in made)
    finally:
        gc.enable()


def test_rows_of_a_speculative_batch_end_by_their_own_length_and_the_shorter_context():
    model, draft = build(Config(**MIXED)), build(Config(**{**MIXED, "context": 40}), seed=1)
    rows = whole(
        g.generate(model, [[1], list(range(37)), [9, 9]], 6, temperature=0, draft=draft, K=5)
    )
    assert [len(row) for row in rows] == [6, 3, 6]
    with pytest.raises(MilError, match="prompt 1 has 40 tokens, the context is 40"):
        next(g.generate(model, [[1] * 40], 6, draft=draft))
    for context in (2, 3, 5):  # less than the K that would be chosen
        model = build(Config(**{**MIXED, "context": context}))
        assert whole(g.generate(model, [[1]], 9, 0, draft=build(Config(**MIXED), seed=1))) == whole(
            g.generate(model, [[1]], 9, 0)
        )


def test_a_stop_token_inside_a_round_cuts_what_counts_as_accepted():
    model = build(Config(**MIXED))
    text = whole(g.generate(model, [[5, 6]], 8, temperature=0))[0]
    at = next(i for i, token in enumerate(text[1:], 1) if token not in text[:i] and i % 4 < 3)
    decoder = g.Decoder(model, 1, 10, 0, draft=model, K=3)
    got = whole(decoder.decode([[5, 6]], 8, [text[at]]))[0]
    assert got == text[: at + 1] and decoder.accepted == at // 4 * 3 + at % 4 + 1 < decoder.proposed


@pytest.mark.parametrize(
    "K, draft, match",
    [
        (-1, {}, "K is -1, expected 1 to 15"),
        (16, {}, "K is 16, expected 1 to 15"),
        (2, {"v": 300}, "the draft's vocabulary is 300, the model's 257"),
    ],
)
def test_speculation_that_cannot_work_is_refused(K, draft, match):
    with pytest.raises(MilError, match=match):
        next(
            g.generate(
                build(Config(**MIXED)), [[1]], 5, draft=build(Config(**{**MIXED, **draft})), K=K
            )
        )


def test_a_stop_token_outside_the_vocabulary_is_refused():
    with pytest.raises(MilError, match="stop token 257 is outside the vocabulary of 257"):
        next(g.generate(build(Config(**MIXED)), [[1]], 5, stop=[257]))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("speculative", [False, True])
def test_nan_logits_end_in_one_clear_line_and_a_drafts_are_merely_rejected(
    temperature, speculative
):
    model, broken = build(Config(**MIXED)), build(Config(**MIXED))
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(MilError, match="prompt 1: the model's logits are NaN after 2 tokens"):
        list(
            g.generate(broken, [[1, 2]], 5, temperature, draft=model if speculative else None, K=2)
        )
    got = whole(g.generate(model, [[1, 2]], 9, temperature, draft=broken, K=2))
    assert len(got[0]) == 9 and (temperature > 0 or got == whole(g.generate(model, [[1, 2]], 9, 0)))


@pytest.mark.parametrize(
    "setting, match",
    [
        (dict(temperature=-1), "temperature is -1, expected 0"),
        (dict(top_p=0), "top_p is 0, expected more than 0"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(max_new_tokens=0), "max_new_tokens is 0, expected at least 1"),
    ],
)
def test_settings_that_make_no_law_are_refused(setting, match):
    with pytest.raises(MilError, match=match):
        next(g.generate(build(Config(**MIXED)), [[1]], **{"max_new_tokens": 5, **setting}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_may_be_of_another_type(dtype):
    model, draft = build(Config(**MIXED)), build(Config(**MIXED), dtype, seed=1)
    assert whole(g.generate(model, [[1], [2, 3]], 12, 0, draft=draft, K=3)) == whole(
        g.generate(model, [[1], [2, 3]], 12, 0)
    )


# --------------------------------------------------------------------------------------------------
# The command


def test_the_command_streams_a_prompt_and_closes_with_its_speed(student):
    done = run_script(
        "generate.py",
        "--model",
        student,
        "--prompt",
        "def ",
        "--max_new_tokens",
        8,
        "--temperature",
        0,
        "--device",
        DEVICE,
    )
    assert (
        done.returncode == 0
        and done.stdout.startswith("def ")
        and " tokens in " in done.stderr
        and "tokens/s" in done.stderr
    )
    assert (
        run_script(
            "generate.py",
            f"--model={student}",
            "--prompt=-",
            "--max_new_tokens=8",
            "--temperature=0",
            "--device",
            DEVICE,
            stdin="def ",
        ).stdout
        == done.stdout
    )


def test_several_prompts_print_each_under_its_number(student):
    done = run_script(
        "generate.py",
        "--model",
        student,
        "--prompt",
        "a",
        "--prompt",
        "bcd",
        "--max_new_tokens",
        4,
        "--temperature",
        0,
    )
    assert (
        done.returncode == 0 and "=== 1 of 2\na" in done.stdout and "=== 2 of 2\nbcd" in done.stdout
    )


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--temprature", "1"], "unknown flag --temprature; did you mean --temperature?"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
        (["--temperature=-1"], "--temperature is -1.0, expected 0"),
        (["--temperature=nan"], "--temperature is nan"),
        (["--top_p", "0"], "--top_p is 0.0"),
        (["--top_p", "1.5"], "--top_p is 1.5"),
        (["--top_k=-2"], "--top_k is -2"),
        (["--seed=-1"], "--seed is -1"),
        (["--device", "meta"], "expected cpu or cuda"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0"),
        (["--dtype", "int8"], "--dtype is int8"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--device", "abacus"], "--device abacus: not usable"),
        (["--prompt", "x" * 60], "prompt 1 has 60 tokens, the context is 48"),
        (["--model", "/nowhere"], "/nowhere: no checkpoint here"),
        (["stray", "--prompt", "a"], "unexpected argument stray"),
    ],
)
def test_bad_flags_get_one_clear_line(student, argv, match, capsys):
    with pytest.raises(MilError) as e:
        g.main(
            [
                "--model",
                student,
                "--device",
                "cpu",
                *([] if "--prompt" in argv else ["--prompt", "a"]),
                *argv,
            ]
        )
    assert match in str(e.value) and "\n" not in str(e.value)


def test_a_bad_command_exits_with_one_line_and_no_traceback(student):
    for argv in (["--model", "/nowhere", "--prompt", "a"], ["--model", student], ["--nonsense"]):
        done = run_script("generate.py", *argv)
        assert (
            done.returncode == 1
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
            and not done.stdout
        )


def test_help_names_every_flag_and_its_reason():
    done = run_script("generate.py", "--help")
    assert done.returncode == 0
    for f in g.dataclasses.fields(g.Settings):
        assert f"--{f.name} " in done.stdout and f.metadata["help"].split()[0] in done.stdout


def test_a_tokenizer_file_travels_with_the_model_and_a_name_stays_a_name(tmp_path, monkeypatch):
    model = build(Config(**{**MIXED, "v": 520}), torch.float32)
    g.save_with_tokenizer(model, tmp_path / "m", str(llama3_file(tmp_path / "tokenizer.model")))
    assert g.load_with_tokenizer(tmp_path / "m")[1].size == 517
    g.save_with_tokenizer(model, tmp_path / "m", g.tokenizer_of(tmp_path / "m"))  # onto itself
    (tmp_path / "bytes").mkdir()
    monkeypatch.chdir(tmp_path)
    g.save_with_tokenizer(model, tmp_path / "n", "bytes")
    assert g.load_with_tokenizer(tmp_path / "n")[1].size == 257


def scripted(rows, seen=None):
    """A Decoder that yields these rows and adds to `seen` what it was given."""

    class Scripted:
        def __init__(self, *args):
            self.args = args

        def decode(self, *args):
            if seen is not None:
                seen.append((*self.args, *args))
            yield from rows

    return Scripted


def test_every_sampling_flag_reaches_the_sampler(student, monkeypatch):
    seen = []
    monkeypatch.setattr(g, "Decoder", scripted([], seen))
    g.main(
        [
            "--model",
            student,
            "--prompt",
            "a",
            "--max_new_tokens",
            "9",
            "--temperature",
            "0.7",
            "--top_k",
            "3",
            "--top_p",
            "0.5",
            "--seed",
            "5",
            "--dtype",
            "bfloat16",
            "--device",
            DEVICE,
        ]
    )
    ((model, rows, size, *numbers, generator, draft, speculate, prompts, most, stop),) = seen
    assert (draft, speculate, rows, size, most) == (None, 0, 1, 10, 9)
    assert (prompts, numbers, stop) == ([[97]], [0.7, 3, 0.5], [256])
    assert generator.initial_seed() == 5 and model.lm_head.weight.dtype == torch.bfloat16


def test_a_checkpoint_brings_its_llama3_tokenizer_and_all_its_stops(tmp_path, monkeypatch):
    path, seen = llama3_file(tmp_path / "tokenizer.model"), []
    g.save_with_tokenizer(
        build(Config(**{**MIXED, "v": 517}), torch.float32), tmp_path / "m", str(path)
    )
    path.unlink()
    monkeypatch.setattr(g, "Decoder", scripted([], seen))
    g.main(["--model", str(tmp_path / "m"), "--prompt", "hello", "--device", DEVICE])
    assert seen[0][-3] == [[261, 259]] and seen[0][-1] == [262, 269, 270]


def test_what_is_printed_is_each_rows_own_bytes_without_its_stop(student, monkeypatch, capsys):
    rows = [
        [[0xC3], [0xE2]],
        [[0xA9], [0x82]],
        [[0x21], [0xAC]],
        [[256], [0xC3]],
        [[], [256]],
    ]  # "é!" and "€" and half a character
    monkeypatch.setattr(g, "Decoder", scripted(rows))
    g.main(["--model", student, "--prompt", "a", "--prompt", "b", "--device", DEVICE])
    assert capsys.readouterr().out == "=== 1 of 2\naé!\n=== 2 of 2\nb€\ufffd\n"
    monkeypatch.setattr(g, "Decoder", scripted([r[1:] for r in rows]))
    g.main(["--model", student, "--prompt", "b", "--device", DEVICE])
    assert capsys.readouterr().out == "b€\ufffd\n"


def test_the_llama3_pattern_cuts_digits_in_threes(tmp_path):
    encoding = g.load_tokenizer(
        str(llama3_file(tmp_path / "tokenizer.model", (b"12", b"123", b"1234", b"45")))
    )
    assert [encoding.bytes_of(i) for i in encoding.encode("12345")[1:]] == [b"123", b"45"]


def test_the_law_of_bf16_logits_is_computed_in_float32():
    logits = torch.randn(3, 50).bfloat16()
    law = g.distribution(logits, 0.7, 20, 0.9)
    assert law.dtype == torch.float32 and torch.equal(
        law, g.distribution(logits.float(), 0.7, 20, 0.9)
    )


def test_a_clock_that_rings_at_once_draws_no_token_outside_the_law(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert g.draw(torch.tensor([[0.0, 0.25, 0.75, 0.0]])).tolist() == [2]


def test_each_piece_is_flushed_as_it_is_drawn(student, monkeypatch):
    out, seen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), []

    def tokens():
        for c in b"xyz":
            seen.append(out.buffer.getvalue())
            yield [[c]]

    monkeypatch.setattr(g, "Decoder", scripted(tokens()))
    monkeypatch.setattr(sys, "stdout", out)
    g.main(["--model", student, "--prompt", "a", "--device", DEVICE])
    assert seen == [
        b"",
        b"ax",
        b"axy",
    ]  # the prompt itself once it is sure that it can be continued


def test_the_context_ends_each_row_by_its_own_length():
    rows = whole(
        g.generate(build(Config(**MIXED), torch.float32), [[1], list(range(45))], 12, temperature=0)
    )
    assert [len(row) for row in rows] == [12, 3]


def test_a_draft_must_speak_the_targets_tokens(student, tmp_path):
    g.save_with_tokenizer(
        build(Config(**{**MIXED, "v": 300}), torch.float32), tmp_path / "large", "bytes"
    )
    g.save_with_tokenizer(
        build(Config(**{**MIXED, "v": 600}), torch.float32), tmp_path / "target", "bytes"
    )
    g.save_with_tokenizer(
        build(Config(**{**MIXED, "v": 600}), torch.float32),
        tmp_path / "other",
        str(llama3_file(tmp_path / "tokenizer.model")),
    )
    (tmp_path / "none").mkdir()
    for model, draft, match in (
        (student, "large", "draft's vocabulary is 300, the model's 257"),
        (tmp_path / "target", "other", "other: its tokens differ from those of"),
        (student, "none", "no checkpoint here"),
    ):
        with pytest.raises(MilError, match=match):
            g.main(
                [
                    "--model",
                    str(model),
                    "--draft",
                    str(tmp_path / draft),
                    "--prompt",
                    "a",
                    "--device",
                    DEVICE,
                ]
            )


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--speculate", "2"], "--speculate needs a --draft"),
        (["--speculate", "-1", "--draft", "d"], "--speculate is -1, expected 1 to 15"),
        (["--speculate", "60", "--draft", "self"], "--speculate is 60, expected 1 to 15"),
    ],
)
def test_a_number_of_proposals_that_cannot_be_is_refused(student, argv, match):
    with pytest.raises(MilError, match=match):
        g.main(
            [
                "--model",
                student,
                "--prompt",
                "a",
                "--device",
                DEVICE,
                *[student if a == "self" else a for a in argv],
            ]
        )


def test_the_command_prints_the_same_greedy_text_with_a_draft_and_says_what_was_kept(
    student, capsys
):
    argv = [
        "--model",
        student,
        "--prompt",
        "ab",
        "--prompt",
        "cd",
        "--temperature",
        "0",
        "--max_new_tokens",
        "20",
        "--device",
        DEVICE,
    ]
    g.main(argv)
    plain = capsys.readouterr()
    g.main([*argv, "--draft", student, "--speculate", "4"])
    fast = capsys.readouterr()
    assert (
        fast.out == plain.out
        and "100% of the draft's tokens kept, 5.00 tokens a pass of the model (K = 4)" in fast.err
    )
    assert "kept" not in plain.err


@pytest.fixture
def student_with_draft(tmp_path):
    """A model, and a draft that reads half as much."""
    for name, context in (("m", 48), ("d", 24)):
        mil.save(
            build(Config(**{**MIXED, "context": context}), torch.float32),
            tmp_path / name,
            tokenizer="bytes",
        )
    return str(tmp_path / "m"), str(tmp_path / "d")


def test_a_text_that_fills_the_drafts_context_says_so(student_with_draft, capsys):
    model, draft = student_with_draft
    argv = [
        "--model",
        model,
        "--prompt",
        "ab",
        "--temperature",
        "0",
        "--max_new_tokens",
        "40",
        "--device",
        DEVICE,
    ]
    g.main([*argv, "--draft", draft])
    assert ", up to the context of 24" in capsys.readouterr().err


def test_what_is_beside_a_tokenizer_file_travels_with_it(tmp_path):
    (tmp_path / "t").mkdir()
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "t" / name).write_text("{}")
    g.save_with_tokenizer(
        build(Config(**{**MIXED, "v": 520}), torch.float32),
        tmp_path / "m",
        str(llama3_file(tmp_path / "t" / "tokenizer.model")),
    )
    assert {
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= {path.name for path in (tmp_path / "m").iterdir()}


def test_a_command_stopped_by_ctrl_c_ends_with_130_and_one_word(capsys):
    def stop(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        g.run_command(stop)
    assert e.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


def counting(models, monkeypatch):
    """How many tokens each of the models reads from here on."""
    read = [0] * len(models)
    for i, model in enumerate(models):

        def hidden(tokens, cache=None, lengths=None, i=i, whole=model.hidden):
            read[i] += tokens.shape[1]
            return whole(tokens, cache, lengths)

        monkeypatch.setattr(model, "hidden", hidden)
    return read


@given(configs(), st.data(), st.sampled_from([None, 1, 3]), st.booleans())
@settings(max_examples=8)
def test_a_decoder_goes_on_with_longer_texts_as_if_it_had_read_them_anew(config, data, K, cut):
    model, drafts = (
        build(config),
        {} if K is None else dict(draft=build(data.draw(configs()), seed=1), K=K),
    )
    ids = lambda least, most: data.draw(
        st.lists(st.integers(0, config.v - 1), min_size=least, max_size=most)
    )  # noqa: E731
    texts, decoder = [ids(1, 6) for _ in range(2)], g.Decoder(model, 2, 60, 0, **drafts)
    for _ in range(2):
        want, rounds = (
            whole(g.generate(model, texts, 7, 0, stop=[3])),
            decoder.decode(texts, 7, [3]),
        )
        got = [[], []]
        for i, row in enumerate(rounds):
            got = [[*a, *b] for a, b in zip(got, row)]
            if cut and i == 2:  # somebody has heard enough
                rounds.close()
        assert all(a == b[: len(a)] for a, b in zip(got, want)) and (cut or got == want)
        texts = [text + new + ids(1, 4) for text, new in zip(texts, got)]
    anew = [ids(1, 6) for _ in range(2)]
    assert whole(decoder.decode(anew, 7)) == whole(g.generate(model, anew, 7, 0))
    again = [text[: len(text) - 1] or text for text in anew]  # shorter than what was read
    assert whole(decoder.decode(again, 7)) == whole(g.generate(model, again, 7, 0))


@pytest.mark.parametrize("speculate", [None, 3])
def test_a_turn_reads_only_what_is_new(speculate, monkeypatch):
    model = build(Config(**MIXED, mixers=["attention", "mamba", "mamba2", "none"]))
    drafts = {} if speculate is None else dict(draft=build(Config(**MIXED), seed=1), K=speculate)
    decoder, text = g.Decoder(model, 1, 48, 0, **drafts), list(range(20))
    text += sum(whole(decoder.decode([text], 4)), []) + [5, 6, 7]
    read = counting([m for m in (model, drafts.get("draft")) if m], monkeypatch)
    rounds = sum(1 for _ in decoder.decode([text], 1))
    assert (
        rounds == 1
        and read[0] == 3 + 1 + (speculate or 0)
        and (not drafts or read[1] == 3 + 2 + 3 + 4)
    )  # new, last, proposed; the draft reads two and what it proposed


def test_a_decoder_compiles_nothing_twice():
    model = build(Config(**MIXED, mixers=["attention", "mamba2"] * 2), torch.float32)
    decoder, text = g.Decoder(model, 1, 48, 0), [1, 2, 3]
    for turn in range(2):
        text = text + whole(decoder.decode([text], 4))[0] + [9]
        assert [half.calls for half in decoder.rounds.halves] == [4 * (turn + 1)]


def test_a_row_has_room_for_the_decoders_size_and_no_more():
    decoder = g.Decoder(build(Config(**MIXED), torch.float32), 1, 10, 0)
    assert len(whole(decoder.decode([[1, 2, 3]], 40))[0]) == 7
    with pytest.raises(MilError, match="prompt 1 has 10 tokens, the context is 10"):
        next(decoder.decode([[1] * 10], 1))


def test_a_row_that_finished_before_another_is_read_anew():
    model = build(Config(**MIXED, mixers=["mamba", "mamba2", "attention", "mamba2"]))
    texts, decoder = [[1, 2, 3], [4, 5]], g.Decoder(model, 2, 40, 0)
    want = whole(g.generate(model, texts, 7, 0))
    stop = [next(i for i in want[0][:4] if i not in want[1])]
    got = whole(decoder.decode(texts, 7, stop))
    assert len(got[0]) < len(got[1]) == 7
    texts = [text + new + [9] for text, new in zip(texts, got)]
    assert whole(decoder.decode(texts, 7)) == whole(g.generate(model, texts, 7, 0))


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_cleared_cache_is_a_new_one(mixer):
    model = build(Config(**MIXED, mixers=[mixer] * 4))
    decoder = g.Decoder(model, 1, 40, 0)
    whole(decoder.decode([[7, 1, 2, 3, 9, 8]], 33))  # the ring of inputs is full
    tokens = torch.tensor([[4, 5]], device=decoder.rounds.caches[0].device)
    with torch.inference_mode():
        decoder.rounds.caches[0].clear()
        assert_close(
            model.hidden(tokens, decoder.rounds.caches[0]),
            model.hidden(tokens, mil.Cache(model, 1, 40)),
            1e-12,
        )


@pytest.mark.parametrize("mixer", ["mamba2", "attention"])
def test_after_a_round_that_failed_the_same_prompt_gives_the_same_text(mixer, monkeypatch):
    model = build(Config(**{**MIXED, "mixers": [mixer] * 4}))
    want, decoder = whole(g.generate(model, [[5, 6, 7]], 6, 0)), g.Decoder(model, 1, 20, 0)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            whole(decoder.decode([[5, 6, 7]], 6))
    assert whole(decoder.decode([[5, 6, 7]], 6)) == want


def test_a_coin_of_zero_keeps_no_token_outside_the_distribution(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **how: torch.zeros(shape))
    q, p = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    count, extra = g.verify(torch.tensor([[0]]), q, p)
    assert count.tolist() == [0] and extra.tolist() == [1]


def test_rows_of_unequal_length_go_on_together():
    model, texts = build(Config(**MIXED)), [[7], [*range(20)]]
    decoder = g.Decoder(model, 2, 48, 0)
    got = whole(decoder.decode(texts, 3))
    texts = [[*text, *new, 9] for text, new in zip(texts, got, strict=True)]
    assert whole(decoder.decode(texts, 7)) == whole(g.generate(model, texts, 7, 0))


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_a_draft_forgets_another_text(mixer):
    """A draft that is the model: what it holds wrongly shows in what is kept, not in the text."""
    model = build(Config(**MIXED, mixers=[mixer] * 4))
    decoder = g.Decoder(model, 2, 48, 0, draft=model, K=3)
    for texts in ([[*range(20)], [*range(30, 52)]], [[5, 3], [6, 7, 8]]):
        whole(decoder.decode(texts, 12))
        assert decoder.accepted == decoder.proposed


def test_a_conversation_has_the_drafts_room(student_with_draft, monkeypatch, capsys):
    model, draft = student_with_draft
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 10 + b"\n")))
    g.main(["--model", model, "--draft", draft, "--chat", "--device", DEVICE])
    assert "no room: 0 of 24 tokens are taken, this takes 28" in capsys.readouterr().err
