"""The checks of the key-value cache and of beam search against mistakes that learners make, and other right answers.

Each mistake returns the right type, shape and dtype where it can, and must be refused with its promised words. Those
marked `surprise` are absent from the check's own list of known mistakes.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import other_transformer as other
import pytest
import torch
from mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from mutation import survivors
from torch import Tensor

import solutions.ch02_transformer as ref
from course_utils.checks import CheckFailed, find_checks, run_check
from course_utils.config import TransformerConfig

ALL_CHECKS = find_checks()["02"]
CHECKS = {name: check for name, check in ALL_CHECKS.items() if check.__module__.endswith("ch02_2_generation")}
INF = torch.inf
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# ------------------------------------------------------------------------------------------------------------ KVCache


def cache_with(words: str, surprise: bool = False, **methods: Any) -> None:
    """The other solution's cache, with some of its methods replaced."""
    mistake("KVCache", words, type("KVCache", (other.KVCache,), methods), surprise)


class Buffered(ref.KVCache):
    """The reference's cache, with switches for what people get wrong about places in a buffer."""

    shift = 0
    forgets = False
    all_positions = False
    on_layer: Callable[[int], int] = staticmethod(lambda layer: layer)

    def append(self, layer: int, k: Tensor, v: Tensor) -> Any:
        start = 0 if self.forgets else self.lengths[layer]
        if self.lengths[layer] + k.shape[1] > self.n_ctx or len(k) != self.batch:
            raise ValueError("no room")
        where = self.on_layer(layer)
        if where not in self.stored:
            self.stored[where] = k.new_zeros(2, self.batch, self.n_ctx + 1, *k.shape[2:])
        begin = start + (self.shift if start else 0)
        for part, new in zip(self.stored[where], (k, v), strict=True):
            part[:, begin : begin + k.shape[1]] = new
        self.lengths[layer] += k.shape[1]
        end = self.n_ctx if self.all_positions else self.lengths[layer]
        keys, values = self.stored[where]
        return keys[:, :end], values[:, :end]


def buffer_with(words: str, surprise: bool = False, **switches: Any) -> None:
    mistake("KVCache", words, type("KVCache", (Buffered,), switches), surprise)


def only_new(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    other.KVCache.append(self, layer, k, v)
    return k, v


def the_old(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    old = [part if part is not None else new for part, new in zip(self.layers[layer], (k, v), strict=True)]
    other.KVCache.append(self, layer, k, v)
    return tuple(old)


def overwritten(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    other.KVCache.append(self, layer, k, v)
    self.layers[layer] = [k, v]
    return k, v


def in_front(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    if self.layers[layer][0] is not None:
        k, v = (torch.cat([new, old], 1) for new, old in zip((k, v), self.layers[layer], strict=True))
        self.layers[layer] = [None, None]
    return other.KVCache.append(self, layer, k, v)


def unbounded(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    self.limit = 1000
    return other.KVCache.append(self, layer, k, v)


def any_batch(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    k, v = (part.expand(self.n_rows, -1, -1, -1) for part in (k, v))
    return other.KVCache.append(self, layer, k, v)


def stored_before_refused(self: Any, layer: int, k: Tensor, v: Tensor) -> Any:
    returned = ref.KVCache.append(self, layer, k, v) if self.lengths[layer] + k.shape[1] <= self.n_ctx else None
    if returned is None:
        self.lengths[layer] += k.shape[1]
        raise ValueError("too late")
    return returned


def select_keys_only(self: Any, rows: Tensor) -> None:
    self.n_rows = len(rows)
    for pair in self.layers:
        pair[0] = pair[0][rows]
        pair[1] = pair[1][: len(rows)] if len(rows) <= len(pair[1]) else torch.cat([pair[1], pair[1][:1]])


def select_first_layer(self: Any, rows: Tensor) -> None:
    other.KVCache.select(self, rows)
    for pair in self.layers[1:]:
        pair[:] = [part[rows.sort().indices] for part in pair]


def select_to_front(self: Any, rows: Tensor) -> None:
    self.n_rows = len(rows)
    for pair in self.layers:
        pair[:] = [part[torch.arange(len(rows)) % len(part)] for part in pair]


def nothing(self: Any, rows: Tensor) -> None:
    pass


SHARED: dict[int, Tensor] = {}


class OneForAll(ref.KVCache):
    lengths = [0] * 4

    def __init__(self, cfg: TransformerConfig, batch: int) -> None:
        self.batch, self.n_ctx, self.stored = batch, cfg.n_ctx, SHARED


cache_with("only the new positions are returned", append=only_new)
cache_with("only the new positions are returned", append=overwritten)
cache_with("the new positions are not stored", append=the_old)
cache_with("the new positions stand before the old ones", append=in_front)
cache_with(
    "keys and values are swapped", append=lambda self, layer, k, v: other.KVCache.append(self, layer, k, v)[::-1]
)
cache_with("n_ctx = 9 should raise ValueError", append=unbounded)
cache_with("one row, in a cache made for a batch of 2, should raise ValueError", append=any_batch)
cache_with("the rows are not selected", select=select_to_front)
cache_with("layer 0: the values", select=select_keys_only)
cache_with("layer 1: the keys", select=select_first_layer)
cache_with("`length` is a method", length=lambda self: 0)
cache_with("in a new cache, `length` should be 0, got 1", length=property(lambda self: 1 + other_length(self)))
cache_with(
    "the last position is not counted", surprise=False, length=property(lambda self: max(other_length(self) - 1, 0))
)
cache_with(
    "the first layer's number is taken",
    length=property(lambda self: 0 if self.layers[0][0] is None else self.layers[0][0].size(1)),
)
cache_with(
    "the layers are added up",
    length=property(lambda self: 4 * other_length(self)),
)
cache_with(
    "expected dtype float64, got float32",
    surprise=True,
    append=lambda self, layer, k, v: other.KVCache.append(self, layer, k.float(), v.float()),
)
cache_with(
    "append should return two tensors",
    append=lambda self, layer, k, v: torch.stack(other.KVCache.append(self, layer, k, v)),
)
buffer_with("one position too early, over the last old one", shift=-1)
buffer_with("one position too late, behind an empty one", shift=1)
buffer_with("written over the first ones", forgets=True)
buffer_with("all of the n_ctx positions are returned", all_positions=True)
buffer_with("layer 0: the keys", surprise=True, on_layer=staticmethod(lambda layer: 0))
buffer_with("first at [batch=0, key=3", surprise=True, shift=2)
mistake(
    "KVCache",
    "after appends that it had to refuse",
    type("KVCache", (ref.KVCache,), {"append": stored_before_refused}),
    True,
)
mistake("KVCache", "the caches share", OneForAll)
mistake("KVCache", "expected a class", lambda cfg, batch: other.KVCache(cfg, batch))


def other_length(cache: Any) -> int:
    return 0 if cache.layers[-1][0] is None else cache.layers[-1][0].size(1)


# ------------------------------------------------------------------------------------------------ ban_repeated_ngrams


def bans(
    logits: Tensor,
    tokens: Tensor,
    n: int,
    fill: float = -INF,
    test: bool = True,
    pool: bool = False,
    union: bool = False,
    longer: int = 0,
    first_only: bool = False,
    skip: int = 0,
    apart: bool = False,
    in_place: bool = False,
) -> Tensor:
    """The bans by sets of runs, with switches for what people get wrong."""
    if test and n < 1:
        raise ValueError("n")
    n += longer
    rows = tokens.tolist()
    runs = [[tuple(row[s : s + n]) for s in range(skip, len(row) - n + 1 - apart * (n - 1))] for row in rows]
    out = logits if in_place else logits.clone()
    for index, row in enumerate(rows):
        known = [run for own in runs for run in own] if pool else runs[index]
        begun = tuple(row[len(row) - n + 1 :])
        chosen = [run[-1] for run in known if run[:-1] == begun]
        for token in chosen[:1] if first_only else chosen:
            out[:, token] = fill if union else out[:, token]
            out[index, token] = fill
    return out


BAN = "ban_repeated_ngrams"
mistake(BAN, "another row's runs count too", lambda logits, tokens, n: bans(logits, tokens, n, pool=True))
mistake(BAN, "every row gets the bans of all rows", lambda logits, tokens, n: bans(logits, tokens, n, union=True))
mistake(BAN, "the banned logits are 0", lambda logits, tokens, n: bans(logits, tokens, n, fill=0.0))
mistake(BAN, "runs of n + 1 tokens are banned", lambda logits, tokens, n: bans(logits, tokens, n, longer=1))
mistake(BAN, "nothing is banned", lambda logits, tokens, n: bans(logits, tokens, 50))
mistake(BAN, "every token of the row is banned", lambda logits, tokens, n: bans(logits, tokens, 1))
mistake(BAN, "only the first run", lambda logits, tokens, n: bans(logits, tokens, n, first_only=True))
mistake(BAN, "n = 0 should raise ValueError", lambda logits, tokens, n: bans(logits, tokens, max(n, 1), test=False))
mistake(BAN, "it changed `logits` in place", lambda logits, tokens, n: bans(logits, tokens, n, in_place=True))
mistake(BAN, "expected -inf", lambda logits, tokens, n: bans(logits, tokens, n, fill=-1e4), surprise=True)
mistake(BAN, "expected -inf", lambda logits, tokens, n: bans(logits, tokens, n, skip=1), surprise=True)
mistake(
    BAN, "expected -inf", lambda logits, tokens, n: bans(logits[:, :], tokens[:, :], n, skip=2 * (n > 1)), surprise=True
)
mistake(
    BAN,
    "first at [batch=0, d_vocab=1]",
    lambda logits, tokens, n: bans(logits.log_softmax(-1), tokens, n),
    surprise=True,
)
mistake(BAN, "expected -inf", lambda logits, tokens, n: bans(logits, tokens, n, apart=True), surprise=True)


# -------------------------------------------------------------------------------------------------------- beam_search


def beams_with(words: str, surprise: bool = False, **wrong: Any) -> None:
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
        with torch.set_grad_enabled(bool(wrong.get("gradients"))):
            for _ in range(n_steps):
                if all(done for *_, done in beams):
                    break
                texts = torch.tensor([text for _, text, _ in beams])
                if cache is None or wrong.get("no_cache"):
                    logits = model(texts)[:, -1]
                else:
                    unread = texts[:, -1:] if wrong.get("last_only") and cache.length else texts[:, cache.length :]
                    if wrong.get("one_early") and cache.length:
                        unread = texts[:, cache.length - 1 :]
                    logits = model(unread, cache)[:, -1]
                scores = wrong.get("score", lambda logits: logits.log_softmax(-1))(logits)
                if no_repeat_ngram is not None:
                    scores = wrong.get("ban", ref.ban_repeated_ngrams)(scores, texts, no_repeat_ngram)
                candidates = []
                for row, (total, text, done) in enumerate(beams):
                    if done and not wrong.get("extends"):
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
                kept = sorted(candidates, key=key)[: wrong.get("width", n_beams)]
                if wrong.get("drops"):
                    kept = [beam for beam in kept if not beam[2]] or kept
                if cache is not None and not wrong.get("no_select"):
                    cache.select(torch.tensor([row for *_, row in kept]))
                beams = [beam[:3] for beam in kept]
        found = []
        for total, text, done in sorted(beams, key=lambda beam: -beam[0]):
            new = text[n_prompt:]
            end = new.index(eos) + 1 if done and not wrong.get("untidy") and eos in new else len(new)
            found.append((total, torch.tensor(text[: n_prompt + end])))
        return wrong.get("returns", lambda found, n_prompt: found)(found, n_prompt)

    mistake("beam_search", words, beam_search, surprise)


def bans_of_all(scores: Tensor, texts: Tensor, n: int) -> Tensor:
    """What another beam holds is banned as well."""
    runs = {tuple(row[s : s + n]) for row in texts.tolist() for s in range(len(row) - n + 1)}
    out = scores.clone()
    for index, row in enumerate(texts.tolist()):
        for token in range(scores.shape[1]):
            if (*row[len(row) - n + 1 :], token) in runs:
                out[index, token] = -INF
    return out


def test_the_tool_for_wrong_answers_is_right_without_a_switch() -> None:
    beams_with("")
    run_check(CHECKS["beam_search"], MISTAKES.pop().answer)


beams_with("two rows of tokens should raise ValueError", first_row=True, surprise=True)
beams_with("with a cache that holds 3 positions, a prompt of 3 should raise", used_cache=True, surprise=True)
beams_with("of earlier steps are forgotten", add=lambda total, new: new)
beams_with("probabilities are added up", score=lambda logits: logits.softmax(-1))
beams_with(
    "probabilities are returned",
    returns=lambda found, n_prompt: [(torch.tensor(total).exp().item(), text) for total, text in found],
)
beams_with("logits are added up", score=lambda logits: logits)
beams_with("every beam keeps its own best extension", per_beam=lambda n_beams, n_now: 1 if n_now > 1 else None)
beams_with("only the likeliest is kept on the way", width=1)
beams_with("a finished beam is extended", extends=True, untidy=True)
beams_with("finished beams are dropped", drops=True)
beams_with("another beam's n-grams are banned too", ban=bans_of_all)
beams_with("nothing is banned", ban=lambda scores, texts, n: scores)
beams_with(
    "brought back to a sum of 1", ban=lambda scores, texts, n: ref.ban_repeated_ngrams(scores, texts, n).log_softmax(-1)
)
beams_with("n_beams = 0 should raise ValueError", any_n=True)
beams_with("stop when the sequence is n_ctx long", too_long=True)
beams_with("gradients are recorded", gradients=True)
beams_with("the worst stands first", returns=lambda found, n_prompt: found[::-1])
beams_with("only the new tokens are returned", returns=lambda found, n: [(total, text[n:]) for total, text in found])
beams_with("only the best beam is returned", returns=lambda found, n_prompt: found[:1])
beams_with(
    "divided by the number of new tokens",
    returns=lambda found, n: sorted(
        ((total / max(len(text) - n, 1), text) for total, text in found), key=lambda pair: -pair[0]
    ),
)
beams_with(
    "sort them, best first", surprise=True, returns=lambda found, n_prompt: sorted(found, key=lambda b: b[0] % 1)
)
beams_with("the model was not given the cache", no_cache=True)
beams_with("new positions in its", one_early=True)
beams_with("`cache.select` makes its rows follow the beams", no_select=True)
beams_with("is wrong", surprise=True, untidy=True)  # eos again and again behind a finished beam
beams_with("is wrong", surprise=True, add=lambda total, new: 0.5 * total + new)
beams_with("is wrong", surprise=True, per_beam=lambda n_beams, n_now: max(n_beams // 2, 2))
beams_with("is wrong", surprise=True, key=lambda beam: (not beam[2], -beam[0]))  # finished beams first


def test_a_cache_whose_rows_do_not_follow_is_refused() -> None:
    """`select` is called, but always with the rows in order."""

    @functools.wraps(ref.beam_search)
    def beam_search(*args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is not None:
            follow = cache.select
            cache.select = lambda rows: follow(rows.sort().values)
        return ref.beam_search(*args, cache=cache, **kwargs)

    with pytest.raises(CheckFailed, match="without one it is right"):
        run_check(CHECKS["beam_search"], beam_search)


# ------------------------------------------------------------------------ mistakes with a cache in earlier exercises


def continued(unread: Callable[[Tensor, Any], Tensor], hands_on: bool = True) -> Any:
    def generate(model: Any, tokens: Any, n_new: int, pick: Any, eos: int | None = None, cache: Any = None) -> Any:
        if cache is None:
            return ref.generate(model, tokens, n_new, pick, eos)
        with torch.no_grad():
            for _ in range(n_new):
                logits = model(unread(tokens, cache), cache) if hands_on else model(tokens)
                tokens = torch.cat([tokens, pick(logits[:, -1])[:, None]], 1)
        return tokens

    return generate


class OffBy(ref.Transformer):
    by = 0

    def forward(self, tokens: Any, cache: Any = None) -> Any:
        offset = 0 if cache is None else max(cache.length + self.by, 0)
        resid = self.hook_embed(self.embed(tokens)) + self.hook_pos_embed(self.pos_embed(tokens, offset))
        for block in self.blocks:
            resid = block(resid, cache)
        return self.unembed(self.ln_final(resid))


@pytest.mark.parametrize(
    ("exercise", "words", "answer"),
    [
        ("generate", "from position `cache.length` on", continued(lambda tokens, cache: tokens)),
        ("generate", "from position `cache.length` on", continued(lambda tokens, cache: tokens[:, -1:])),
        (
            "generate",
            "got 3, 2, 1, 1",
            continued(lambda tokens, cache: tokens[:, max(cache.length - 1, 0) :]),
        ),
        (
            "generate",
            "that holds 2 positions",
            continued(lambda tokens, cache: tokens if cache.length < 3 else tokens[:, -1:]),
        ),
        ("generate", "the model was not given the cache", continued(lambda tokens, cache: tokens, hands_on=False)),
        ("Transformer", "values are wrong", type("Transformer", (OffBy,), {"by": -1})),
        ("Transformer", "values are wrong", type("Transformer", (OffBy,), {"by": 1})),
    ],
)
def test_positions_with_a_cache(exercise: str, words: str, answer: Any) -> None:
    with pytest.raises(CheckFailed) as caught:
        run_check(ALL_CHECKS[exercise], answer)
    assert words in str(caught.value)
    assert "with a key-value cache" in str(caught.value) or "in a key-value cache" in str(caught.value)


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("topk(", "masked_fill(", "torch.cat(", "log_softmax("))


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_another_right_answer_passes(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise), rounds=3)


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


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes, the last
    "True -> False",  # zip(strict=True) of equal lengths
    "zip(totals.tolist(), beams, strict=True) -> zip(totals.tolist(), beams)",
    "totals.tolist() -> totals",  # a tensor with one number in it will do
    "best.values > -torch.inf -> best.values != -torch.inf",
    "len(tokens) != 1 -> len(tokens) > 1",  # without a row, zip(strict=True) raises ValueError
    "finished[rows] | (new == eos) -> new == eos",  # what is finished goes on with eos
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="device=") <= STILL_RIGHT
