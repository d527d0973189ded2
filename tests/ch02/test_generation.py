"""Generating faster, and searching: mistakes that the checks do not know, and right answers in another style."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import solutions.ch02_transformer as ref
from course_utils.checks.ch02.generation import LimitedCache, banned, padded, stores, wrong_cache
from course_utils.checks.standins.cache import ToyCache
from course_utils.config import TransformerConfig
from tests.ch02 import other_transformer as other

INF = torch.inf
SECRETS = ("topk(", "masked_fill(", "torch.cat(", "log_softmax(")
ONLY_ON_GPU = "device="

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes, the last
    "True -> False",  # zip(strict=True) of equal lengths
    "zip(self.stored[layer], both, strict=True) -> zip(self.stored[layer], both)",
    "zip(totals.tolist(), beams, strict=True) -> zip(totals.tolist(), beams)",
    "totals.tolist() -> totals",  # a tensor with one number in it will do
    "best.values > -torch.inf -> best.values != -torch.inf",
    "len(tokens) != 1 -> len(tokens) > 1",  # without a row, zip(strict=True) raises ValueError
    "finished[rows] | (new == eos) -> new == eos",  # what is finished goes on with eos
}


# ------------------------------------------------------------------------------------------------------------ KVCache


def any_batch(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    k, v = (part.expand(self.batch, -1, -1, -1) for part in (k, v))
    return LimitedCache.append(self, layer, k, v)


def stored_before_refused(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    if len(k) != self.batch:
        raise ValueError("another batch")
    returned = ToyCache.append(self, layer, k, v)
    if returned[0].shape[1] > self.n_ctx:
        raise ValueError("too late")
    return returned


def select_keys_only(self: Any, rows: Tensor) -> None:
    self.batch = len(rows)
    in_order = torch.arange(len(rows)) % 2
    self.contents = {layer: (k[rows], v[in_order]) for layer, (k, v) in self.contents.items()}


def select_first_layer(self: Any, rows: Tensor) -> None:
    self.batch = len(rows)
    in_order = rows.sort().values
    self.contents = {
        layer: (k[rows if layer == 0 else in_order], v[rows if layer == 0 else in_order])
        for layer, (k, v) in self.contents.items()
    }


def one_buffer(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    """All layers write into the same one, each at its own place."""
    own = self.contents.get(layer, (k[:, :0], v[:, :0]))
    parts = zip(getattr(self, "newest", own), own, (k, v), strict=True)
    self.newest = tuple(torch.cat([newest[:, : mine.shape[1]], new], dim=1) for newest, mine, new in parts)
    self.contents[layer] = self.newest
    return self.newest


# ------------------------------------------------------------------------------------------------ ban_repeated_ngrams


def apart(logits: Tensor, tokens: Tensor, n: int) -> Tensor:
    """Runs that overlap with the end of the row do not count."""
    out = logits.clone()
    for index, row in enumerate(tokens.tolist()):
        for start in range(len(row) - 2 * n + 2):
            if row[start : start + n - 1] == row[len(row) - n + 1 :]:
                out[index, row[start + n - 1]] = -INF
    return out


# -------------------------------------------------------------------------------------------------------- beam_search


def searching(**wrong: Any) -> Callable[..., Any]:
    """A beam search over lists, with switches for what people get wrong."""

    def beam_search(
        model: Any,
        tokens: Tensor,
        n_beams: int,
        n_new: int,
        no_repeat_ngram: int | None = None,
        eos: int | None = None,
        cache: Any = None,
    ) -> Any:
        if n_beams < 1 and not wrong.get("any_n"):
            raise ValueError("n_beams")
        if len(tokens) > 1 and not wrong.get("first_row"):
            raise ValueError("tokens")
        if cache is not None and cache.length >= tokens.shape[1]:
            if not wrong.get("used_cache"):
                raise ValueError("cache")
            cache = None
        n_prompt = tokens.shape[1]
        beams: list[tuple[Any, list[int], bool]] = [(0.0, tokens[0].tolist(), False)]
        n_steps = n_new if wrong.get("too_long") else min(n_new, model.cfg.n_ctx - n_prompt)
        with torch.no_grad():
            for _ in range(n_steps):
                if all(done for *_, done in beams):
                    break
                texts = torch.tensor([text for _, text, _ in beams])
                if cache is None or wrong.get("no_cache"):
                    logits = model(texts)[:, -1]
                else:
                    begin = max(cache.length - 1, 0) if wrong.get("one_early") else cache.length
                    logits = model(texts[:, begin:], cache)[:, -1]
                scores = logits.log_softmax(-1)
                if no_repeat_ngram is not None:
                    scores = ref.ban_repeated_ngrams(scores, texts, no_repeat_ngram)
                candidates = []
                for row, (total, text, done) in enumerate(beams):
                    if done:
                        candidates.append((total, [*text, eos], True, row))
                        continue
                    extensions = [
                        (
                            wrong.get("add", lambda total, new: total + new)(total, new),
                            [*text, token],
                            token == eos,
                            row,
                        )
                        for token, new in enumerate(scores[row].tolist())
                        if new > -INF
                    ]
                    n_kept = wrong.get("per_beam", lambda n_beams, n_now: None)(n_beams, len(beams))
                    candidates += sorted(extensions, key=lambda beam: -beam[0])[:n_kept]
                if not candidates:
                    break
                key = wrong.get("key", lambda beam: -beam[0])
                kept = sorted(candidates, key=key)[:n_beams]
                if cache is not None and not wrong.get("no_select"):
                    cache.select(torch.tensor([row for *_, row in kept]))
                beams = [beam[:3] for beam in kept]
        found = []
        for total, text, done in sorted(beams, key=lambda beam: -beam[0]):
            new = text[n_prompt:]
            end = new.index(eos) + 1 if done and not wrong.get("untidy") and eos in new else len(new)
            found.append((total, torch.tensor(text[: n_prompt + end])))
        return wrong.get("returned", lambda found: found)(found)

    return beam_search


def rows_do_not_follow(*args: Any, cache: Any = None, **kwargs: Any) -> Any:
    """`select` is called, but always with the rows in order."""
    if cache is not None:
        follow = cache.select
        cache.select = lambda rows: follow(rows.sort().values)
    return ref.beam_search(*args, cache=cache, **kwargs)


def select_what_is_there(self: Any, rows: Tensor) -> None:
    """The number of rows is changed only where something is stored."""
    if self.contents:
        LimitedCache.select(self, rows)


def as_text(logits: Tensor, tokens: Tensor, n: int) -> Tensor:
    """Takes 1 12 for 11 2: runs are compared as they are written."""
    out = banned(logits, tokens, n)
    for index, row in enumerate(tokens.tolist()):
        seen = {"".join(map(str, row[start : start + n])) for start in range(len(row) - n + 1)}
        begun = row[len(row) - n + 1 :] if len(row) >= n else []
        follows = ["".join(map(str, [*begun, token])) in seen for token in range(logits.shape[1])]
        out[index, torch.tensor(follows)] = -INF
    return out


def rounded_to_nothing(model: Any, tokens: Tensor, n_beams: int, n_new: int, *rest: Any, **options: Any) -> Any:
    """log(softmax) in place of log_softmax: a token less likely than e^-103 seems impossible."""

    class Rounded(torch.nn.Module):
        cfg = model.cfg

        def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
            return model(tokens, cache).softmax(-1).log()

    return ref.beam_search(Rounded(), tokens, n_beams, n_new, *rest, **options)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "KVCache": [
        ("n_ctx = 9 should raise ValueError", wrong_cache(append=ToyCache.append)),
        ("one row, in a cache made for a batch of 2, should raise ValueError", wrong_cache(append=any_batch)),
        ("after appends that it had to refuse", wrong_cache(append=stored_before_refused)),
        ("layer 0: the values", wrong_cache(select=select_keys_only)),
        ("layer 1: the keys", wrong_cache(select=select_first_layer)),
        ("`length` is a method", wrong_cache(length=lambda self: 0)),
        ("in a new cache: append refused 3 rows", wrong_cache(select=select_what_is_there)),
        (
            "in a new cache, `length` should be 0, got 1",
            wrong_cache(length=property(lambda self: 1 + len(self.contents))),
        ),
        (
            "expected dtype float64, got float32",
            wrong_cache(append=lambda self, layer, k, v: LimitedCache.append(self, layer, k.float(), v.float())),
        ),
        (
            "append should return two tensors",
            wrong_cache(append=lambda self, layer, k, v: torch.stack(LimitedCache.append(self, layer, k, v))),
        ),
        ("layer 0: the keys", wrong_cache(append=one_buffer)),
        ("first at [batch=0, key=3", stores(lambda old, new: padded(old, new.shape[1]) if old.shape[1] else new)),
        ("expected a class", lambda cfg, batch: other.KVCache(cfg, batch)),
    ],
    "ban_repeated_ngrams": [
        ("n = 0 should raise ValueError", lambda logits, tokens, n: banned(logits, tokens, max(n, 1))),
        ("it changed `logits` in place", lambda logits, tokens, n: logits.copy_(banned(logits, tokens, n))),
        ("expected -inf", lambda logits, tokens, n: banned(logits, tokens, n).clamp(min=-1e4)),
        ("expected -inf", lambda logits, tokens, n: banned(logits, tokens[:, 1:], n)),
        ("expected -inf", lambda logits, tokens, n: banned(logits, tokens[:, 2 * (n > 1) :], n)),
        ("first at [batch=0, d_vocab=1]", lambda logits, tokens, n: banned(logits.log_softmax(-1), tokens, n)),
        ("expected -inf", apart),
        ("got -inf", as_text),
    ],
    "beam_search": [
        ("n_beams = 0 should raise ValueError", searching(any_n=True)),
        ("two rows of tokens should raise ValueError", searching(first_row=True)),
        ("with a cache that holds 3 positions, a prompt of 3 should raise", searching(used_cache=True)),
        ("stop when the sequence is n_ctx long", searching(too_long=True)),
        ("gradients are recorded", inspect.unwrap(ref.beam_search)),
        (
            "sort them, best first",
            searching(returned=lambda found: sorted(found, key=lambda beam: beam[0] % 1)),
        ),
        ("the model was not given the cache", searching(no_cache=True)),
        ("new positions in its", searching(one_early=True)),
        ("`cache.select` makes its rows follow the beams", searching(no_select=True)),
        ("without one it is right", functools.wraps(ref.beam_search)(rows_do_not_follow)),
        ("expected 25 beams, got", rounded_to_nothing),
        ("is wrong", searching(untidy=True)),  # eos again and again behind a finished beam
        ("is wrong", searching(add=lambda total, new: 0.5 * total + new)),
        ("is wrong", searching(per_beam=lambda n_beams, n_now: max(n_beams // 2, 2))),
        ("is wrong", searching(key=lambda beam: (not beam[2], -beam[0]))),  # finished beams first
    ],
}

ALSO_RIGHT = {name: [getattr(other, name)] for name in SURPRISES}
ALSO_RIGHT["beam_search"].append(searching())  # the tool for wrong answers, without a switch


# ------------------------------------------------------------------------------- the reference, from other sides

TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=3, n_heads=4, d_model=20, d_head=5, d_mlp=80)


def some_model(module: Any, cfg: TransformerConfig = TINY) -> Any:
    model = module.Transformer(cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


BOTH = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
CACHES = pytest.mark.parametrize("kind", [ref.KVCache, other.KVCache], ids=["reference's cache", "other's cache"])


@BOTH
def test_every_split_of_the_prompt_gives_the_same_logits(module: Any) -> None:
    model, tokens = some_model(module), torch.arange(22).reshape(2, 11)
    with torch.no_grad():
        whole = model(tokens)
        for cut in range(1, 11):
            cache = module.KVCache(TINY, batch=2) if module is ref else _counts_as_reference(TINY, 2)
            parts = torch.cat([model(tokens[:, :cut], cache), model(tokens[:, cut:], cache)], dim=1)
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
            assert cache.length == 11


def _counts_as_reference(cfg: TransformerConfig, batch: int) -> Any:
    """The other cache; the reference's annotations are enforced in tests, and want one of its own kind."""
    return type("OtherCache", (other.KVCache, ref.KVCache), {})(cfg, batch)


@BOTH
def test_generation_is_the_same_with_a_cache(module: Any) -> None:
    model, tokens = some_model(module), torch.tensor([[3, 7, 30, 2], [1, 1, 4, 8]])
    cached = module.generate(model, tokens, 20, ref.greedy, eos=5, cache=_counts_as_reference(TINY, 2))
    assert torch.equal(cached, module.generate(model, tokens, 20, ref.greedy, eos=5))
    assert torch.equal(cached, module.generate(model, tokens, 20, ref.greedy, eos=5, cache=ref.KVCache(TINY, 2)))


@BOTH
@pytest.mark.parametrize("options", [{}, {"eos": 5}, {"no_repeat_ngram": 2}, {"no_repeat_ngram": 1, "eos": 3}])
def test_beam_search_is_the_same_with_a_cache(module: Any, options: dict[str, int]) -> None:
    model, tokens = some_model(module), torch.tensor([[3, 7, 30, 2]])
    plain = module.beam_search(model, tokens, 4, 12, **options)
    for cache in (ref.KVCache(TINY, 1), _counts_as_reference(TINY, 1)):
        cached = module.beam_search(model, tokens, 4, 12, **options, cache=cache)
        assert [row.tolist() for _, row in cached] == [row.tolist() for _, row in plain]
        assert [total for total, _ in cached] == pytest.approx([total for total, _ in plain], abs=1e-4)


def test_the_score_of_a_beam_is_what_the_model_says_of_it() -> None:
    model, tokens = some_model(ref), torch.tensor([[3, 7, 30, 2]])
    found = ref.beam_search(model, tokens, 5, 6, eos=5, no_repeat_ngram=3)
    for total, row in found:
        logprobs = model(row[None])[0, :-1].log_softmax(-1).gather(-1, row[1:, None])
        assert total == pytest.approx(logprobs[3:].sum().item(), abs=1e-4)
    assert [total for total, _ in found] == sorted((total for total, _ in found), reverse=True)


def test_beam_search_finds_what_transformers_finds() -> None:
    """With no eos both keep the best of all candidates; theirs divides by the length unless told otherwise."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31, n_positions=17, n_embd=20, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    ours = ref.Transformer(TINY)
    ours.load_state_dict(ref.convert_gpt2_weights(theirs.state_dict(), TINY))
    tokens = torch.tensor([[3, 7, 30, 2]])
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, num_beams=4, num_return_sequences=4,
        do_sample=False, length_penalty=0.0, pad_token_id=0,
    )  # fmt: skip
    found = ref.beam_search(ours, tokens, 4, 8, cache=ref.KVCache(TINY, 1))
    assert [row.tolist() for _, row in found] == expected.tolist()


@CACHES
def test_heads_and_dtype_are_those_of_what_is_appended(kind: Any) -> None:
    """Models with fewer keys than queries can use the same cache."""
    cache = kind(TINY, 2)
    k, v = cache.append(0, torch.ones(2, 3, 2, 7, dtype=torch.float64), torch.zeros(2, 3, 2, 7, dtype=torch.float64))
    assert k.shape == v.shape == (2, 3, 2, 7)
    assert k.dtype == torch.float64


def test_a_text_beyond_n_ctx_is_refused_in_one_sentence() -> None:
    for model in (some_model(ref), some_model(ref, replace(TINY, attn_only=True))):
        with pytest.raises(ValueError, match="beyond n_ctx = 17"):
            model(torch.zeros(1, 18, dtype=torch.long))
