"""Distributions of tokens, decoding with and without a draft, and the command."""

import dataclasses
import functools
import gc
import io
import math
import re
import sys
import types
import zlib

import pytest
import torch
from conftest import DEVICE, build, configs, form, llama3_file, random_tokens, run_script
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import generate as g
from mil import Config, MilError

ALL = ["attention", "mamba", "mamba2", "none"]
SEEDS = st.integers(0, 1000)


def tiny(mixers=(), dtype=torch.float64, seed=0, **sizes):
    """A stack of four layers that reads bytes and their stop, 256."""
    sizes = dict(v=257, d=16, n_heads=4, n_kv_heads=2, d_ff=24, context=48, d_state=4) | sizes
    return build(Config(n_layers=4, mixers=list(mixers), **sizes), dtype, seed)


def saved(model, folder, tokenizer="bytes"):
    g.save_with_tokenizer(model, folder, tokenizer)
    return str(folder)


def whole(rounds):
    """All the new tokens of each row."""
    return [list(sum(row, ())) for row in zip(*rounds, strict=True)]


def greedy(model, prompts, new, **more):
    return whole(g.generate(model, prompts, new, 0, **more))


def dice(seed, device=DEVICE):
    return torch.Generator(device).manual_seed(seed)


def assert_drawn_from(texts, want):
    """The shares of texts (n, l) are within the distance, in sum, that n texts drawn from `want`,
    {text: probability}, exceed once in 10^6 times (Weissman et al., 2003)."""
    n, seen = len(texts), dict.fromkeys(want, 0)
    for text in map(tuple, texts):
        assert text in want, f"{text} cannot be drawn"
        seen[text] += 1
    distance = sum(abs(seen[text] / n - p) for text, p in want.items())
    assert distance < math.sqrt(2 * (len(want) * math.log(2) + math.log(1e6)) / n)


# --------------------------------------------------------------------------------------------------
# Distributions of tokens

NAN = math.nan
QUARTERS = st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=2, max_size=12)


@given(QUARTERS, st.floats(0.1, 3), st.integers(0, 14), st.floats(0.05, 1))
def test_the_distribution_is_softmax_cut_to_top_k_then_to_top_p(logits, temperature, top_k, top_p):
    least = sorted(logits)[-top_k if top_k < len(logits) else 0]
    weights = [math.exp(x / temperature) if x >= least else 0 for x in logits]
    shares = [w / sum(weights) for w in weights]
    before = [sum(s for s in shares if s > mine) for mine in shares]
    assume(all(abs(mass - top_p) > 1e-9 for mass in before if mass < 1))  # there rounding decides
    kept = [s if mass < top_p or top_p == 1 else 0 for s, mass in zip(shares, before, strict=True)]
    logits = torch.tensor(logits, dtype=torch.float64)
    got = g.distribution(logits, temperature, top_k, top_p)
    assert got.tolist() == pytest.approx([s / sum(kept) for s in kept], abs=1e-9)
    single, half = (logits.to(kind) for kind in (torch.float32, torch.bfloat16))  # of quarters
    how = temperature, top_k, top_p
    assert torch.equal(g.distribution(half, *how), g.distribution(single, *how))


@pytest.mark.parametrize(
    "logits, how, want",
    [
        ([1, 3, 2], (0,), [0, 1, 0]),  # temperature 0
        ([1, 3, NAN], (0,), [NAN] * 3),
        ([1, 3, NAN], (1, 2, 0.5), [NAN] * 3),
        ([2, 2, 2, 0], (1, 2), [1 / 3] * 3 + [0]),  # ties are kept
        ([0, 0, 0, 0], (1, 0, 0.3), [1 / 4] * 4),
    ],
)
def test_temperature_zero_nan_and_ties(logits, how, want):
    got = g.distribution(torch.tensor([logits, [0.0] * len(logits)]), *how)
    assert got[0].tolist() == pytest.approx(want, nan_ok=True)
    assert got[1].sum() == 1 and (g.draw(got)[0] == -1) == (NAN in logits)


def test_random_numbers_of_zero_draw_no_token_of_probability_zero(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    monkeypatch.setattr(torch, "rand", lambda shape, **how: torch.zeros(shape))
    assert g.draw(torch.tensor([[0.0, 0.25, 0.75, 0.0]])).tolist() == [2]
    q, p = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    count, extra = g.verify(torch.tensor([[0]]), q, p)
    assert count.tolist() == [0] and extra.tolist() == [1]


@functools.cache
def some_distribution(*seed):
    """A random one of five tokens, cut by top_k and top_p, so with zeros."""
    dice = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    logits = 2 * torch.randn(5, dtype=torch.float64, generator=dice)
    return g.distribution(logits, 0.8, 4, 0.9)


def spread(texts, text, chance, length, p):
    """Adds the texts that begin with `text` to {text: probability}; p(text) draws the next."""
    if len(text) == length:
        texts[text] = texts.get(text, 0) + chance
        return
    for token, more in enumerate(p(text).tolist()):
        if more:
            spread(texts, (*text, token), chance * more, length, p)


def all_texts(length, p):
    texts = {}
    spread(texts, (), 1.0, length, p)
    return texts


@given(st.integers(1, 3), SEEDS)
@settings(max_examples=20)
def test_by_enumeration_the_text_of_a_round_has_the_models_distribution(K, seed):
    """To 1e-12, with p and q that depend on all of the text before."""
    p, q = (functools.partial(some_distribution, which, seed) for which in "pq")
    want, got = all_texts(K + 1, p), {}
    for proposed, chance in all_texts(K, q).items():
        for i, token in enumerate(proposed):
            before = proposed[:i]
            keep = g.acceptance(p(before), q(before), torch.tensor(token)).item()
            for instead, r in enumerate(g.residual(p(before), q(before)).tolist()):
                if keep < 1 and r:
                    spread(got, (*before, instead), chance * (1 - keep) * r, K + 1, p)
            chance *= keep
        spread(got, proposed, chance, K + 1, p)
    assert all(abs(got.get(text, 0) - want.get(text, 0)) < 1e-12 for text in {**got, **want})


def test_verify_leaves_texts_of_the_models_distribution():
    """60,000 rounds of K = 2, each continued to three tokens."""
    p = torch.stack([some_distribution("p", i) for i in range(3)]).expand(60_000, 3, 5)
    q = torch.stack([some_distribution("q", i) for i in range(2)]).expand(60_000, 2, 5)
    generator = dice(0, "cpu")
    proposed, later = g.draw(q, generator), g.draw(p, generator)
    count, extra = g.verify(proposed, q, p, generator)
    texts = torch.where(torch.arange(3) == count[:, None], extra[:, None], later)
    texts[:, :2] = torch.where(torch.arange(2) < count[:, None], proposed, texts[:, :2])
    want = all_texts(3, lambda text: p[0, len(text)])
    assert_drawn_from(texts.tolist(), want)


@pytest.mark.parametrize("speculate", [0, 1])
def test_sampled_texts_have_the_models_distribution(speculate):
    """Three tokens at K = 1: proposed, added, proposed again."""
    model, draft = tiny(v=3), tiny(v=3, seed=1)
    how, draft = (1.3, 2, 0.9), draft if speculate else None

    def p(text):
        with torch.no_grad():
            return g.distribution(model(torch.tensor([[1, 2, *text]], device=DEVICE))[0, -1], *how)

    texts = whole(g.generate(model, [[1, 2]] * 9000, 3, *how, generator=dice(0), draft=draft, K=1))
    assert_drawn_from(texts, all_texts(3, p))


@pytest.mark.parametrize("draft", [None, 1])
def test_the_same_seed_gives_the_same_sample(draft):
    draft = draft and tiny(seed=draft)

    def sample(seed):
        return whole(g.generate(tiny(), [[1], [2, 3]], 20, generator=dice(seed), draft=draft, K=2))

    assert sample(1) == sample(1) != sample(2)


# --------------------------------------------------------------------------------------------------
# Decoding

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
TYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def some_prompts(config, lengths, seed):
    rows = (random_tokens(config, 1, l, seed + i) for i, l in enumerate(lengths))
    return [row[0].tolist() for row in rows]


@given(configs(), LENGTHS, SEEDS)
@settings(max_examples=15)
def test_a_batch_of_unequal_prompts_is_each_decoded_without_a_cache(config, lengths, seed):
    model, prompts = build(config, seed=seed), some_prompts(config, lengths, seed)
    for prompt, new in zip(prompts, greedy(model, prompts, 12), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new[:-1]], device=DEVICE))[0, len(prompt) - 1 :]
        assert (logits.max(1).values - logits[range(12), new] <= 1e-9).all()


@given(configs(), configs(), TYPES, st.integers(1, 8), LENGTHS, SEEDS)
@settings(max_examples=25)
def test_greedy_speculative_decoding_is_plain_decoding(config, other, dtype, K, lengths, seed):
    """Of seven tokens, so that some proposals are kept and some are not."""
    model = build(dataclasses.replace(config, v=7), seed=seed)
    draft = build(dataclasses.replace(other, v=7), dtype, seed + 1)
    prompts = some_prompts(model.config, lengths, seed)
    want = greedy(model, prompts, 20, stop=[6])
    assert greedy(model, prompts, 20, stop=[6], draft=draft, K=K) == want


@given(configs(), st.integers(1, 5), SEEDS)
@settings(max_examples=15)
def test_a_draft_proposes_what_it_would_write_itself_after_the_text_so_far(config, K, seed):
    """Also after a rejection, and after all were kept, the last of which it has not read."""
    config = dataclasses.replace(config, v=3)
    model, draft = (build(config, seed=seed + i) for i in range(2))
    texts, seen, verify = [[1, 0], [2, 0, 1]], [], g.verify

    def seeing(proposed, *rest):
        seen.append(proposed.tolist())
        return verify(proposed, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "verify", seeing)
        rounds = list(g.generate(model, texts, 12, 0, draft=draft, K=K))
    for proposed, new in zip(seen, rounds, strict=True):
        for i in range(2):
            assert not new[i] or [proposed[i]] == greedy(draft, [texts[i]], K)
            texts[i] = [*texts[i], *new[i]]


def test_a_draft_that_is_the_model_is_kept_whole_and_one_that_is_wrong_not_at_all():
    model, wrong = tiny(ALL), tiny(ALL)
    wrong.lm_head.weight.data.neg_()  # likeliest is what was least likely
    right, not_right = (g.Decoder(model, 2, 48, 0, draft=draft, K=3) for draft in (model, wrong))
    for prompts in ([[*range(20)], [*range(30, 52)]], [[5, 3], [6, 7, 8]]):
        want = greedy(model, prompts, 24)
        rounds, slow = list(right.decode(prompts, 24)), list(not_right.decode(prompts, 24))
        assert whole(rounds) == whole(slow) == want
        assert [len(rounds), len(slow)] == [6, 24] and {len(new) for new in rounds[0]} == {4}
    assert right.accepted == right.proposed == 3 * right.passes == 2 * 2 * 3 * 6
    assert not_right.accepted == 0 < not_right.proposed


def test_speculative_decoding_by_the_kernels_is_plain_decoding():
    """In bf16 and in CUDA graphs where there is CUDA."""
    cuda = DEVICE == "cuda"
    mixers = ["attention", "mamba2", "mamba"][: 3 if cuda else 2]
    sizes = dict(v=60, d=24, n_heads=2, n_kv_heads=1, head_dim=20, d_ff=28, d_state=20, context=40)
    config = Config(n_layers=len(mixers), mixers=mixers, **sizes)
    model, draft = (build(config, torch.bfloat16 if cuda else torch.float32, i) for i in range(2))
    prompts, new = [[1, 2, 3, 4], [7]], 40 if cuda else 5
    with form("triton"):
        want = greedy(model, prompts, new, stop=[9])
        for K, proposer in ((3, draft), (2, model))[: 2 if cuda else 1]:
            assert greedy(model, prompts, new, stop=[9], draft=proposer, K=K) == want


@pytest.mark.parametrize(
    "mixers, context, size, draft, lengths, want",
    [
        ([], 48, 99, None, [1, 45, 2], [6, 3, 6]),
        ([], 48, 10, None, [1, 9, 7], [6, 1, 3]),
        (["mamba2"] * 4, 48, 99, None, [60], [6]),  # no attention, so no context
        ([], 48, 99, 40, [1, 37, 2], [6, 3, 6]),  # a draft that reads less
        ([], 2, 99, 48, [1], [1]),  # less than it proposes
        ([], 5, 99, 48, [1, 3], [4, 2]),
    ],
)
def test_a_row_ends_at_its_limit_or_at_the_context(mixers, context, size, draft, lengths, want):
    model = tiny(mixers, context=context)
    draft = draft and tiny(seed=1, context=draft)
    decoder = g.Decoder(model, len(lengths), size, 0, draft=draft, K=4)
    prompts = some_prompts(model.config, lengths, 0)
    rows = whole(decoder.decode(prompts, 6))
    assert [len(row) for row in rows] == want
    for prompt, row in zip(prompts, rows, strict=True):
        assert row == greedy(model, [prompt], 6)[0][: len(row)]


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_row_ends_with_its_own_stop_token_and_the_others_go_on(speculate):
    model, prompts = tiny(), [[5, 6], [3, 1, 4]]
    free = greedy(model, prompts, 12)
    at = next(i for i, token in enumerate(free[0]) if i % 4 == 1 and token not in free[0][:i])
    stop = free[0][at]  # the second of a round
    decoder = g.Decoder(model, 2, 20, 0, draft=model if speculate else None, K=3)
    rows = whole(decoder.decode(prompts, 12, [stop]))
    for row, text in zip(rows, free, strict=True):
        assert row == (text[: text.index(stop) + 1] if stop in text else text)
    kept = sum(i % 4 < 3 for row in rows for i in range(len(row)))  # each fourth is the model's own
    assert decoder.accepted == (kept if speculate else 0)


@given(configs(), st.data(), st.sampled_from([None, 1, 3]), st.booleans())
@settings(max_examples=8)
def test_a_decoder_goes_on_with_longer_texts_as_if_it_had_read_them_anew(config, data, K, cut):
    model = build(config)
    more = {} if K is None else dict(draft=build(data.draw(configs()), seed=1), K=K)
    decoder = g.Decoder(model, 2, 60, 0, **more)

    def some(least, most):
        tokens = st.integers(0, config.v - 1)
        return [data.draw(st.lists(tokens, min_size=least, max_size=most)) for _ in range(2)]

    texts = some(1, 12)
    for _ in range(2):
        want, got = greedy(model, texts, 7, stop=[3]), [[], []]
        rounds = decoder.decode(texts, 7, [3])
        for i, row in enumerate(rounds):
            got = [[*a, *b] for a, b in zip(got, row, strict=True)]
            if cut and i == 2:  # somebody has heard enough
                rounds.close()
        assert got == [b[: len(a)] if cut else b for a, b in zip(got, want, strict=True)]
        texts = [sum(parts, []) for parts in zip(texts, got, some(1, 4), strict=True)]
    anew = some(1, 6)
    for prompts in (anew, [text[:-1] or text for text in anew]):  # others, and shorter
        assert whole(decoder.decode(prompts, 7)) == greedy(model, prompts, 7)


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_longer_text_costs_only_its_new_tokens(speculate, monkeypatch):
    models = [tiny(ALL), tiny(seed=1)][: 2 if speculate else 1]
    decoder = g.Decoder(models[0], 1, 48, 0, draft=models[1] if speculate else None, K=3)
    text = [*range(20)]
    text += [*whole(decoder.decode([text], 4))[0], 5, 6, 7]
    read = [0] * len(models)
    for i, model in enumerate(models):

        def hidden(tokens, *rest, i=i, whole=model.hidden):
            read[i] += tokens.shape[1]
            return whole(tokens, *rest)

        monkeypatch.setattr(model, "hidden", hidden)
    assert len(list(decoder.decode([text], 1))) == 1
    assert read == ([3 + 1 + 3, 3 + 2 + 3 + 4] if speculate else [3 + 1])  # new, and the round's


@pytest.mark.parametrize("mixer", ["mamba2", "attention"])
def test_after_a_round_that_failed_the_text_goes_on(mixer, monkeypatch):
    model, text = tiny([mixer] * 4), [5, 6, 7]
    decoder = g.Decoder(model, 1, 20, 0)
    rounds = decoder.decode([text], 6)
    text = [*text, *next(rounds)[0]]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(decoder, "take", lambda *_: 1 / 0)
        next(rounds)
    assert whole(decoder.decode([text], 6)) == greedy(model, [text], 6)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nan_logits_end_in_one_line_and_a_drafts_are_merely_rejected(temperature):
    model, broken = tiny(), tiny()
    broken.norm.weight.data[0] = torch.nan
    for draft in (None, model):
        with pytest.raises(MilError, match="prompt 1: the model's logits are NaN after 2 tokens"):
            list(g.generate(broken, [[1, 2]], 5, temperature, draft=draft, K=2))
    (got,) = whole(g.generate(model, [[1, 2]], 9, temperature, draft=broken, K=2))
    assert len(got) == 9 and (temperature > 0 or [got] == greedy(model, [[1, 2]], 9))


def test_a_cuda_graph_is_freed_with_the_text_and_not_by_the_garbage_collector():
    """Freed while another graph is captured, it breaks the capture."""
    gc.collect()
    gc.disable()
    try:
        greedy(tiny(), [[1, 2]], 9, draft=tiny(seed=1), K=2)
        assert not [held for held in gc.get_objects() if type(held) is g.Graph]
    finally:
        gc.enable()


def test_rows_that_grow_unevenly_are_read_again_where_padding_would_not_fit():
    first, grown = [[1] * 40, [2, 3]], [[1] * 40 + [5], [2, 3, *range(30)]]
    decoder = g.Decoder(tiny(), 2, 48, 0)
    list(decoder.decode(first, 1))
    grown[0][40] = decoder.rounds.texts[0][40]
    assert list(decoder.decode(grown, 4)) == list(g.Decoder(tiny(), 2, 48, 0).decode(grown, 4))


@pytest.mark.parametrize(
    "prompts, setting, told",
    [
        ([[]], {}, "prompt 1 is empty"),
        ([[1], [1] * 48], {}, "prompt 2 has 48 tokens, the context is 48"),
        ([[1] * 10], {"size": 10}, "prompt 1 has 10 tokens, the context is 10"),
        ([[1] * 40], {"draft": {"context": 40}}, "prompt 1 has 40 tokens, the context is 40"),
        ([[300]], {}, "has token 300, but the model's vocabulary is 257"),
        ([[5, -1]], {}, "has token -1"),
        ([[1]], {"draft": {"v": 300}}, "draft's vocabulary is 300, the model's 257"),
        ([[1]], {"draft": {}, "K": -1}, "K is -1, expected 1 to 15"),
        ([[1]], {"draft": {}, "K": 16}, "K is 16, expected 1 to 15"),
        ([[1]], {"temperature": -1}, "temperature is -1, expected 0"),
        ([[1]], {"top_p": 0}, "top_p is 0, expected more than 0"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"most": 0}, "max_new_tokens is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_decoded_is_refused(prompts, setting, told):
    setting = {"rows": len(prompts), "size": 99, "most": 5} | setting
    if "draft" in setting:
        setting["draft"] = tiny(**setting["draft"])
    most = setting.pop("most")
    with pytest.raises(MilError, match=told):
        next(g.Decoder(tiny(), **setting).decode(prompts, most))


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def student(tmp_path):
    """A small checkpoint with every mixer."""
    return saved(tiny(ALL, torch.float32), tmp_path / "student")


def command(model, *flags):
    """The arguments of generate.py."""
    return ["--model", str(model), "--device", DEVICE, *map(str, flags)]


def scripted(rows, seen):
    """A Decoder that yields these rows and adds to `seen` what it was given."""

    def decode(*args):
        seen.append(args)
        yield from rows

    return decoding(decode)


def decoding(decode):
    """A Decoder that does this with its own arguments and those of decode."""
    return lambda *args: types.SimpleNamespace(context=99, decode=functools.partial(decode, *args))


def test_the_command_prints_the_prompt_the_text_and_the_speed(student, capsys):
    flags = "--max_new_tokens", 8, "--temperature", 0
    g.main(command(student, "--prompt", "def ", *flags))
    out, err = capsys.readouterr()
    (new,) = greedy(g.load_with_tokenizer(student, DEVICE)[0], [[*b"def "]], 8, stop=[256])
    text = bytes(i for i in new if i < 256).decode("utf-8", "replace")
    assert out == f"def {text}\n" and f"{len(new)} tokens in " in err and "tokens/s" in err
    done = run_script("generate.py", *command(student, "--prompt=-", *flags), stdin="def ")
    assert (done.returncode, done.stdout) == (0, out)


def test_every_flag_of_sampling_reaches_the_sampler(student, monkeypatch):
    seen, flags = [], "--max_new_tokens 9 --temperature 0.7 --top_k 3 --top_p 0.5 --seed 5"
    monkeypatch.setattr(g, "Decoder", scripted([], seen))
    g.main(command(student, "--prompt", "a", *flags.split(), "--dtype", "bfloat16"))
    ((model, rows, size, *numbers, generator, draft, speculate, prompts, most, stop),) = seen
    assert (draft, speculate, rows, size, most) == (None, 0, 1, 10, 9)
    assert (prompts, numbers, stop) == ([[97]], [0.7, 3, 0.5], [256])
    assert generator.initial_seed() == 5 and model.lm_head.weight.dtype == torch.bfloat16


def test_what_is_printed_is_each_rows_own_bytes_without_its_stop(student, monkeypatch, capsys):
    rows = zip([*"é!".encode(), 256], [*"€".encode(), 0xC3], strict=True)
    rows = [*([[a], [b]] for a, b in rows), [[], [256]]]
    monkeypatch.setattr(g, "Decoder", scripted(rows, []))
    g.main(command(student, "--prompt", "a", "--prompt", "b"))
    assert capsys.readouterr().out == "=== 1 of 2\naé!\n=== 2 of 2\nb€\ufffd\n"


def test_each_piece_is_flushed_as_it_is_drawn(student, monkeypatch):
    out, seen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), []

    def tokens():
        for byte in "xé.".encode():
            seen.append(out.buffer.getvalue().decode())
            yield [[byte]]

    monkeypatch.setattr(g, "Decoder", scripted(tokens(), []))
    monkeypatch.setattr(sys, "stdout", out)
    g.main(command(student, "--prompt", "a"))
    assert seen == ["", "ax", "ax", "axé"]  # the prompt once it is sure that it can be continued


def test_a_draft_changes_the_speed_and_not_the_text(student, tmp_path, capsys):
    argv = command(student, "--prompt", "ab", "--temperature", 0, "--max_new_tokens", 20)
    texts = []
    for more in ([], ["--draft", student, "--speculate", 4]):
        g.main([*argv, *map(str, more)])
        texts.append(capsys.readouterr())
    (plain, none), (fast, told) = texts
    assert plain == fast and "kept" not in none
    kept, per_pass = re.search(r"(\d+)% of the draft's .* kept, (\S+) .* \(K = 4\)", told).groups()
    assert int(kept) > 50 and float(per_pass) > 2  # the draft is the model; what ends a text is not
    narrow = saved(tiny(context=5), tmp_path / "narrow")
    g.main(command(student, "--prompt", "abcd", "--draft", narrow))
    assert ", up to the context of 5" in capsys.readouterr().err


def test_a_draft_must_speak_the_models_tokens(student, tmp_path):
    source = llama3_file(tmp_path / "meta" / "tokenizer.model")
    draft = saved(tiny(v=520), tmp_path / "draft", source)
    with pytest.raises(MilError, match="draft: its tokens differ from those of .*student"):
        g.main(command(student, "--draft", draft, "--prompt", "a"))


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--temprature", "1"], "unrecognized arguments: --temprature"),
        (["stray"], "unrecognized arguments: stray"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
        (["--temperature=-1"], "--temperature is -1.0, expected 0"),
        (["--temperature=nan"], "--temperature is nan"),
        (["--temperature", "1e-46"], "--temperature is 1e-46, expected 0"),
        (["--top_p", "0"], "--top_p is 0.0"),
        (["--top_p", "1.5"], "--top_p is 1.5"),
        (["--top_k=-2"], "--top_k is -2"),
        (["--seed=-1"], "--seed is -1"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0"),
        (["--dtype", "int8"], "--dtype is int8"),
        (["--device", "meta"], "expected cpu or cuda"),
        (["--device", "abacus"], "--device abacus: not usable"),
        (["--prompt", ""], "prompt 2 is empty"),
        (["--prompt", "\udcff"], "prompt 2: not UTF-8 text"),
        (["--prompt", "x" * 60], "prompt 2 has 60 tokens, the context is 48"),
        (["--model", "/nowhere"], "/nowhere: no checkpoint here"),
        (["--draft", "/nowhere"], "/nowhere: no checkpoint here"),
        (["--speculate", "2"], "--speculate needs a --draft"),
        (["--speculate", "-1", "--draft", "d"], "--speculate is -1, expected 1 to 15"),
        (["--speculate", "16", "--draft", "d"], "--speculate is 16, expected 1 to 15"),
        (["--chat"], "--chat reads what you say from the terminal"),
        (["--system", "b"], "--system goes with --chat"),
        (["--chat", "--context", "1"], "--context is 1, expected at least 2"),
        (["--context", "9"], "--context goes with --chat"),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_line(student, flags, told):
    with pytest.raises(MilError) as e:
        g.main(command(student, "--prompt", "a", *flags))
    assert told in str(e.value) and "\n" not in str(e.value)


def test_a_refused_command_ends_with_one_line_and_no_traceback(student):
    done = run_script("generate.py", "--model", student)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --prompt is missing: give a text or -; or --chat")


def test_a_command_stopped_by_ctrl_c_ends_with_130_and_one_word(capsys):
    def stop(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        g.run_command(stop)
    assert e.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


def test_help_names_every_flag_and_its_reason(capsys):
    with pytest.raises(SystemExit) as e:
        g.main(["--help"])
    told = capsys.readouterr().out
    assert not e.value.code
    for f in dataclasses.fields(g.Settings):
        assert f"--{f.name} " in told and f.metadata["help"].split()[0] in told
