"""Checks of chapter 12, reading the model: its verdict, the direction behind it, and what each part adds to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch12.small import PLACES, At, Fn, ends, everything, small_model, texts
from course_utils.checks.comparing import carries_gradient, compare, follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree
from course_utils.data.brackets import BALANCED, UNBALANCED
from course_utils.hooks import ActivationCache

# --------------------------------------------------------------------------------------------------------- the verdict


def verdicts(at: At = ends, end: Callable[[Tensor], Tensor] = lambda row: row[UNBALANCED] - row[BALANCED]) -> Fn:
    """Scores text by text, read elsewhere or taken from the logits in another way."""

    def unbalanced_scores(model: Any, tokens: Tensor) -> Tensor:
        logits = model(tokens)
        return torch.stack([end(logits[row, place]) for row, place in enumerate(at(tokens))])

    return unbalanced_scores


@known_mistakes(
    {
        "the sign is wrong: it is UNBALANCED minus BALANCED.": verdicts(
            end=lambda row: row[BALANCED] - row[UNBALANCED]
        ),
        **{words: verdicts(at) for words, at in PLACES.items()},
        "they are differences of probabilities; take the logits.": verdicts(
            end=lambda row: row.softmax(-1)[UNBALANCED] - row.softmax(-1)[BALANCED]
        ),
        "it is the logit UNBALANCED alone.": verdicts(end=lambda row: row[UNBALANCED]),
        "it is the probability of UNBALANCED; give the difference of the logits.": verdicts(
            end=lambda row: row[:2].softmax(-1)[UNBALANCED]
        ),
        "it is the mean over the texts; give one number for each.": lambda model, tokens: verdicts()(
            model, tokens
        ).mean(),
    }
)
def check_unbalanced_scores(fn: Fn) -> None:
    """Texts that end at different places; three sizes of batch."""
    name, model = "unbalanced_scores", small_model()
    for n in (5, 2, 1):
        tokens = texts(n)
        with unchanged(name, tokens=tokens):
            actual = fn(model, tokens)
        compare(f"{name} of {n} texts", actual, verdicts()(model, tokens), "batch")
    follows_input(name, lambda *inputs: fn(*inputs).detach(), (model, texts(3)), "batch")
    carries_gradient(name, fn, (model, texts(3)))


# ------------------------------------------------------------------------------------------------------- the direction


def solved(x: Tensor, y: Tensor, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """The normal equations in double precision: the matrix, and what the fit says to each row."""
    wide = torch.cat([x, torch.ones_like(x[:, :1])], 1).double() if intercept else x.double()
    solution = torch.linalg.solve(wide.T @ wide, wide.T @ y.double())
    return solution[: x.shape[1]], wide @ solution


def fitted(
    intercept: bool = True,
    share: Callable[[Tensor, Tensor], Tensor] = lambda y, guess: 1 - (y - guess).square().sum() / spread(y).sum(),
    shape: Callable[[Tensor], Tensor] = lambda matrix: matrix,
) -> Fn:
    """A layer_norm_fit with other ways to fit, or to say how good it is."""

    def layer_norm_fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        matrix, guess = solved(x, y, intercept)
        return shape(matrix).to(x.dtype), share(y.double(), guess).to(x.dtype)

    return layer_norm_fit


def spread(y: Tensor) -> Tensor:
    """Squared distances from the mean over the batch."""
    return (y - y.mean(0)).square()


def centred_by_row(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the wrong axis."""
    x, y = (values - values.mean(1, keepdim=True) for values in (x, y))
    matrix = torch.linalg.pinv(x) @ y
    return matrix, 1 - (y - x @ matrix).square().sum() / y.square().sum()


def vectors(n: int, d_in: int, d_out: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """What no linear map explains completely; both far from zero, and columns of y of different sizes."""
    x = noise(n, d_in, seed=seed) + torch.arange(1.0, d_in + 1)
    y = torch.tanh(x @ noise(d_in, d_out, seed=seed + 1)) * torch.arange(1.0, d_out + 1) + 2
    return x, y + 0.2 * noise(n, d_out, seed=seed + 2)


@known_mistakes(
    {
        "the fit has no intercept: it must pass through zero, and the vectors are far from it.": fitted(
            intercept=False
        ),
        "r2 compares with zero, not with the mean of y over the batch.": fitted(
            share=lambda y, guess: 1 - (y - guess).square().sum() / y.square().sum()
        ),
        "r2 is the share that is not explained.": fitted(
            share=lambda y, guess: (y - guess).square().sum() / spread(y).sum()
        ),
        "r2 compares with one mean for all columns; each column has its own.": fitted(
            share=lambda y, guess: 1 - (y - guess).square().sum() / (y - y.mean()).square().sum()
        ),
        "r2 is the mean of the columns' own; sum all squares first.": fitted(
            share=lambda y, guess: (1 - (y - guess).square().sum(0) / spread(y).sum(0)).mean()
        ),
        "it is the correlation, not r2.": fitted(
            share=lambda y, guess: (1 - (y - guess).square().sum() / spread(y).sum()).sqrt()
        ),
        "the matrix is transposed: y is about x @ matrix.": fitted(shape=lambda matrix: matrix.T),
        "x is fitted from y; it is the other way round.": lambda x, y: fitted()(y, x),
        "each vector's own mean is taken off; the mean is over the batch, one for each column.": centred_by_row,
    }
)
def check_layer_norm_fit(fn: Fn) -> None:
    """Against the normal equations, at sizes that all differ."""
    name = "layer_norm_fit"
    for n, d_in, d_out in ((20, 4, 3), (9, 2, 5), (15, 6, 1)):
        x, y = vectors(n, d_in, d_out)
        with unchanged(name, x=x, y=y):
            answer = fn(x, y)
        if not isinstance(answer, tuple) or len(answer) != 2:
            what = "None" if answer is None else f"a {type(answer).__name__}"
            raise CheckFailed(f"{name}: expected a matrix and r2, got {what}.\n  Next: return matrix, r2.")
        matrix, r2 = fitted()(x, y)
        words = f"from {n} rows of {d_in} to {d_out} numbers"
        compare(f"{name} {words}: the matrix", answer[0], matrix, "d_in d_out", rtol=1e-3, atol=1e-4)
        compare(f"{name} {words}: r2", answer[1], r2, "", rtol=1e-3, atol=1e-4)
    x, y = vectors(12, 3, 2)
    follows_input(name, lambda *inputs: fn(*inputs)[0], (x, y), "d_in d_out")
    follows_input(name, lambda *inputs: fn(*inputs)[1], (x, y), "")


def difference(model: Any) -> Tensor:
    """The direction that the score reads after the LayerNorm."""
    W_U = model.unembed.W_U.detach()
    return W_U[:, UNBALANCED] - W_U[:, BALANCED]


def normed(model: Any, resid: Tensor) -> Tensor:
    """The final LayerNorm, by PyTorch."""
    final, eps = model.ln_final, model.cfg.layer_norm_eps
    return torch.nn.functional.layer_norm(resid, resid.shape[-1:], final.w.detach(), final.b.detach(), eps)


def regressed(model: Any, resid: Tensor) -> Tensor:
    """The oracle: one number for each text, what its logits say, fitted at once."""
    return solved(resid, (normed(model, resid) @ difference(model))[:, None])[0][:, 0].to(resid.dtype)


def by_matrix(intercept: bool = True, transposed: bool = False) -> Fn:
    def pre_norm_direction(model: Any, resid: Tensor) -> Tensor:
        matrix = solved(resid, normed(model, resid), intercept)[0].to(resid.dtype)
        return (matrix.T if transposed else matrix) @ difference(model)

    return pre_norm_direction


def by_scale(model: Any, resid: Tensor, centred: bool) -> Tensor:
    """Through `w`, divided by a common scale: what people do instead of the fit."""
    direction = difference(model) * model.ln_final.w.detach()
    scale = resid.var(-1, correction=0).sqrt().mean()
    return (direction - centred * direction.mean()) / scale


@known_mistakes(
    {
        "the final LayerNorm is left out.": lambda model, resid: difference(model),
        "the sign is wrong: it is UNBALANCED minus BALANCED.": lambda model, resid: -regressed(model, resid),
        "the mean is not subtracted: LayerNorm centres the stream, so a common shift counts nothing.": (
            partial(by_scale, centred=False)
        ),
        "`w` over the mean scale stands for the LayerNorm; the statement asks for the fit.": partial(
            by_scale, centred=True
        ),
        "the fit has no intercept.": by_matrix(intercept=False),
        "the matrix is transposed; to go back through it, multiply with the direction on its right.": by_matrix(
            transposed=True
        ),
        "it is the direction of UNBALANCED alone.": lambda model, resid: (
            solved(resid, normed(model, resid))[0].to(resid.dtype) @ model.unembed.W_U.detach()[:, UNBALANCED]
        ),
        "the direction is scaled to length 1; its length says how much the logits move.": lambda model, resid: (
            torch.nn.functional.normalize(regressed(model, resid), dim=0)
        ),
    }
)
def check_pre_norm_direction(fn: Fn) -> None:
    """Against a fit of the score itself, which is the same by linearity."""
    name, model = "pre_norm_direction", small_model()
    for n, shift in ((40, 0.5), (25, -1.0)):
        resid = noise(n, 7, seed=n, scale=2.0) + shift * torch.arange(7.0)
        with unchanged(name, resid=resid):
            actual = fn(model, resid)
        right = regressed(model, resid)
        compare(f"{name} on {n} vectors", actual, right, "d_model", rtol=1e-3, atol=1e-4)
    follows_input(name, lambda *inputs: fn(*inputs).detach(), (model, resid), "d_model")


# ------------------------------------------------------------------------------------------------------------ the parts


def parts(cache: ActivationCache) -> tuple[list[str], list[Tensor]]:
    """Every part, at all positions."""
    labels = ["embed", "pos_embed"] if "hook_pos_embed" in cache else ["embed"]
    found = [cache[f"hook_{label}"] for label in labels]
    for layer in range(cache.n_layers):
        heads = cache[f"blocks.{layer}.attn.hook_result"]
        rest = cache[f"blocks.{layer}.hook_attn_out"]
        for head in range(heads.shape[2]):
            labels, found = [*labels, f"head {layer}.{head}"], [*found, heads[:, :, head]]
            rest = rest - heads[:, :, head]
        labels, found = [*labels, f"bias {layer}"], [*found, rest]
        if f"blocks.{layer}.hook_mlp_out" in cache:
            labels, found = [*labels, f"mlp {layer}"], [*found, cache[f"blocks.{layer}.hook_mlp_out"]]
    return labels, found


def contributed(
    at: At = ends,
    along: Callable[[Tensor], Tensor] = lambda direction: direction,
    change: Callable[[str, Tensor, ActivationCache], Tensor] = lambda label, part, cache: part,
) -> Fn:
    """component_contributions, text by text and part by part."""

    def component_contributions(cache: ActivationCache, tokens: Tensor, direction: Tensor) -> tuple[list[str], Tensor]:
        labels, found = parts(cache)
        values = torch.empty(len(labels), len(tokens), dtype=direction.dtype)
        for number, (label, part) in enumerate(zip(labels, found, strict=True)):
            for row, place in enumerate(at(tokens)):
                values[number, row] = change(label, part, cache)[row, place] @ along(direction)
        return labels, values

    return component_contributions


def whole_attention(label: str, part: Tensor, cache: ActivationCache) -> Tensor:
    return cache[f"blocks.{label[5:]}.hook_attn_out"] if label.startswith("bias") else part


def read_from(place: str) -> Callable[[str, Tensor, ActivationCache], Tensor]:
    """The stream after an MLP stands for what the MLP adds."""
    return lambda label, part, cache: cache[f"blocks.{label[4:]}.{place}"] if label.startswith("mlp") else part


@known_mistakes(
    {
        **{words: contributed(at) for words, at in PLACES.items()},
        "the biases hold all of attention's output; take its heads off.": contributed(change=whole_attention),
        "the biases are left at 0; they are what attn_out has over the sum of the heads.": contributed(
            change=lambda label, part, cache: 0 * part if label.startswith("bias") else part
        ),
        "the stream after the MLP is read; take what the MLP adds, mlp_out.": contributed(
            change=read_from("hook_resid_post")
        ),
        "each part's own mean is subtracted; the direction already knows about the LayerNorm.": contributed(
            change=lambda label, part, cache: part - part.mean(-1, keepdim=True)
        ),
        "the direction is scaled to length 1.": contributed(along=lambda direction: direction / direction.norm()),
        "the sign is wrong.": contributed(along=lambda direction: -direction),
        "the mean over the texts is subtracted from each.": lambda cache, tokens, direction: (
            contributed()(cache, tokens, direction)[0],
            contributed()(cache, tokens, direction)[1]
            - contributed()(cache, tokens, direction)[1].mean(1, keepdim=True),
        ),
    }
)
def check_component_contributions(fn: Fn) -> None:
    """Labels and every number; two layers, one, and more than ten; without MLPs, without a table of positions."""
    name, axes = "component_contributions", "component batch"
    rotary = {"positions": "rotary", "rotary_dim": 4}
    for n_layers, n_heads, n, kind in (
        (2, 3, 5, {}),
        (1, 2, 4, {"attn_only": True}),
        (1, 1, 2, rotary),
        (11, 1, 3, {}),
    ):
        model, tokens, direction = small_model(n_layers, n_heads, **kind), texts(n), noise(7, seed=5)
        cache = everything(model, tokens)
        with unchanged(name, tokens=tokens, direction=direction):
            answer = fn(cache, tokens, direction)
        if not isinstance(answer, tuple) or len(answer) != 2:
            what = "None" if answer is None else f"a {type(answer).__name__}"
            raise CheckFailed(f"{name}: expected labels and a tensor, got {what}.\n  Next: return labels, values.")
        labels, right = contributed()(cache, tokens, direction)
        words = f"{n_layers} layers{', no MLP' * ('attn_only' in kind)}{', rotary positions' * ('rotary_dim' in kind)}"
        agree(f"{name}: the labels", f"with {words}", answer[0], labels)
        compare(f"{name} of {n} texts, {words}", answer[1], right, axes)
    follows_input(
        name,
        lambda moved, where, *seen: fn(ActivationCache(dict(zip(cache, seen, strict=True)), 11), where, moved)[1],
        (direction, tokens, *cache.values()),
        axes,
    )


def attention(n: int, n_heads: int) -> Tensor:
    """A causal pattern, random."""
    scores = noise(n, n_heads, 11, 11, seed=n)
    return scores.masked_fill(torch.ones(11, 11, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def attended(
    at: At = ends,
    row: Callable[[Tensor, int], Tensor] = lambda one, place: one[:, place],
    over: Callable[[Tensor], Tensor] = lambda found: found.mean(0),
) -> Fn:
    """attention_by_position, text by text."""

    def attention_by_position(pattern: Tensor, tokens: Tensor) -> Tensor:
        return over(torch.stack([row(pattern[number], place) for number, place in enumerate(at(tokens))]))

    return attention_by_position


@known_mistakes(
    {
        **{words: attended(at) for words, at in PLACES.items()},
        "query and key are swapped: it is how much each position attends to END.": attended(
            row=lambda one, place: one[:, :, place]
        ),
        "it is the mean over all queries; only END's counts.": attended(row=lambda one, place: one.mean(1)),
        "it is the mean over the queries up to END; only END's counts.": attended(
            row=lambda one, place: one[:, : place + 1].mean(1)
        ),
        "it is the sum over the texts, not the mean.": attended(over=lambda found: found.sum(0)),
        "it is the first text's alone.": attended(over=lambda found: found[0]),
        "the mean leaves out zeros: where a text has ended already, END's attention counts as 0.": attended(
            over=lambda found: found.sum(0) / (found > 0).sum(0).clamp(min=1)
        ),
        "the mean is also taken over the heads.": attended(over=lambda found: found.mean(0, keepdim=True).mean(1)),
    }
)
def check_attention_by_position(fn: Fn) -> None:
    """Texts that end at different places; two numbers of heads."""
    name, axes = "attention_by_position", "head key"
    for n, n_heads in ((5, 3), (4, 2)):
        pattern, tokens = attention(n, n_heads), texts(n)
        with unchanged(name, pattern=pattern, tokens=tokens):
            actual = fn(pattern, tokens)
        compare(f"{name} of {n} texts, {n_heads} heads", actual, attended()(pattern, tokens), axes)
    follows_input(name, fn, (pattern, tokens), axes)


def by_neuron(
    at: At = ends,
    place: str = "mlp.hook_post",
    row: Callable[[Any, int], Tensor] = lambda mlp, neuron: mlp.W_out[neuron],
    extra: Callable[[Any, Tensor], Any] = lambda mlp, direction: 0.0,
    layer_of: Callable[[int], int] = lambda layer: layer,
    along: Callable[[Tensor], Tensor] = lambda direction: direction,
) -> Fn:
    """neuron_contributions, vector by vector."""

    @torch.no_grad()
    def neuron_contributions(
        model: Any, cache: ActivationCache, tokens: Tensor, direction: Tensor, layer: int
    ) -> Tensor:
        mlp, active = model.blocks[layer_of(layer)].mlp, cache[f"blocks.{layer_of(layer)}.{place}"]
        values = torch.empty(len(tokens), active.shape[-1], dtype=direction.dtype)
        for number, pos in enumerate(at(tokens)):
            for neuron in range(active.shape[-1]):
                written = active[number, pos, neuron] * row(mlp, neuron)
                values[number, neuron] = written @ along(direction) + extra(mlp, direction)
        return values

    return neuron_contributions


@known_mistakes(
    {
        **{words: by_neuron(at) for words, at in PLACES.items()},
        "it takes the neurons before their non-linearity, `pre`; what is written is `post`.": by_neuron(
            place="mlp.hook_pre"
        ),
        "a neuron's column of W_in is taken: what it reads, not what it writes.": by_neuron(
            row=lambda mlp, neuron: mlp.W_in[:, neuron]
        ),
        "b_out is in every neuron's number; it belongs to none.": by_neuron(
            extra=lambda mlp, direction: mlp.b_out @ direction
        ),
        "it is another layer's MLP.": by_neuron(layer_of=lambda layer: 1 - layer),
        "the direction is scaled to length 1.": by_neuron(along=lambda direction: direction / direction.norm()),
        "it is the mean over the texts; give one number for each.": lambda *args: by_neuron()(*args).mean(0),
    }
)
def check_neuron_contributions(fn: Fn) -> None:
    """Both layers, against the vectors that the exercise need not make; and their sum is the MLP's own."""
    name, axes = "neuron_contributions", "batch neuron"
    model, direction = small_model(), noise(7, seed=5)
    for n, layer in ((5, 0), (4, 1)):
        tokens = texts(n)
        cache = everything(model, tokens)
        with unchanged(name, tokens=tokens, direction=direction):
            actual = fn(model, cache, tokens, direction, layer)
        right = by_neuron()(model, cache, tokens, direction, layer)
        compare(f"{name} of {n} texts, layer {layer}", actual, right, axes)
    follows_input(
        name,
        lambda moved, where, to, *seen: fn(
            moved, ActivationCache(dict(zip(cache, seen, strict=True)), 2), where, to, 1
        ).detach(),
        (model, tokens, direction, *cache.values()),
        axes,
    )


# ------------------------------------------------------------------------------------------------------------ the probe


def probed(
    intercept: bool = True,
    centre: Callable[[Tensor, Tensor], Tensor] = lambda y_train, y_test: y_test.mean(),
    share: Callable[[Tensor, Tensor], Tensor] = lambda errors, distances: 1 - errors.square().sum() / distances,
) -> Fn:
    """probe_r2 by the normal equations, with switches for what people get wrong."""

    def probe_r2(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> Tensor:
        ones = float(intercept)
        train, test = (
            torch.cat([x, ones * torch.ones_like(x[:, :1])], 1).double()[:, : x.shape[1] + intercept]
            for x in (x_train, x_test)
        )
        slope = torch.linalg.solve(train.T @ train, train.T @ y_train.double())
        errors = y_test.double() - test @ slope
        distances = (y_test.double() - centre(y_train.double(), y_test.double())).square().sum()
        return share(errors, distances).to(x_train.dtype)

    return probe_r2


def by_own_means(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> Tensor:
    """The right slope, and the intercept that is best for the test vectors."""
    slope = solved(x_train, y_train[:, None])[0]
    errors = (y_test - y_test.mean()).double() - (x_test - x_test.mean(0)).double() @ slope[:, 0]
    return (1 - errors.square().sum() / spread(y_test).sum()).to(x_train.dtype)


def correlation(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> Tensor:
    wide = [torch.cat([x, torch.ones_like(x[:, :1])], 1).double() for x in (x_train, x_test)]
    guess = wide[1] @ torch.linalg.solve(wide[0].T @ wide[0], wide[0].T @ y_train.double())
    return torch.corrcoef(torch.stack([guess, y_test.double()]))[0, 1].square().to(x_train.dtype)


def samples(n_train: int, n_test: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test vectors far from zero, and a number that depends on them, not quite linearly."""
    direction = noise(d, seed=seed)
    found: list[Tensor] = []
    for n, number in ((n_train, 1), (n_test, 2)):
        x = noise(n, d, seed=seed + number) + torch.arange(1.0, d + 1)
        found += [x, x @ direction + 3 + 0.3 * (x @ direction).square() + noise(n, seed=seed + 5 + number)]
    return found[0], found[1], found[2], found[3]


@known_mistakes(
    {
        "the probe has no intercept.": probed(intercept=False),
        "it is r2 on the training vectors; the test vectors say whether it is more than memory.": (
            lambda x, y, x_test, y_test: probed()(x, y, x, y)
        ),
        "the probe is fitted to the test vectors.": lambda x, y, x_test, y_test: probed()(
            x_test, y_test, x_test, y_test
        ),
        "training and test vectors are swapped.": lambda x, y, x_test, y_test: probed()(x_test, y_test, x, y),
        "y_test is compared with the mean of y_train; take its own.": probed(centre=lambda y, y_test: y.mean()),
        "y_test is compared with zero, not with its mean.": probed(centre=lambda y, y_test: torch.zeros(())),
        "it is the share that is not explained.": probed(
            share=lambda errors, distances: errors.square().sum() / distances
        ),
        "the test vectors' own means are taken off them; the intercept belongs to the fit.": by_own_means,
        "it is the squared correlation, which forgives a wrong slope and a wrong intercept.": correlation,
        "it is cut off at 0; a probe can be worse than the mean, and r2 negative.": lambda *samples: probed()(
            *samples
        ).clamp(min=0),
    }
)
def check_probe_r2(fn: Fn) -> None:
    """Against the normal equations; then a probe that is worse than the mean."""
    name = "probe_r2"
    cases = [samples(20, 9, 4, seed=1), samples(11, 15, 2, seed=20)]
    x, y, x_test, y_test = samples(8, 10, 6, seed=40)
    for case in [*cases, (x, y, x_test, -y_test)]:
        with unchanged(name, x_train=case[0], y_train=case[1], x_test=case[2], y_test=case[3]):
            actual = fn(*case)
        right = probed()(*case)
        words = f"{name} with {len(case[0])} vectors to fit and {len(case[2])} to test"
        compare(words, actual, right, "", rtol=1e-3, atol=1e-4)
    follows_input(name, fn, cases[0], "")
