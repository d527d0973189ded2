"""Chapter 09: dictionaries of a language model: trained, judged, read, held against the truth, and used."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from course_utils import saved_dictionaries
from course_utils.hooks import HookPoint, hooks, run_with_cache
from solutions.ch03_training import masked_lm_loss
from solutions.ch06_superposition import (
    Heaviside,
    SparseAutoencoder,
    auxiliary_topk_loss,
    gated_auxiliary_loss,
    normalise_decoder,
    remove_parallel_gradient,
    sae_loss,
)
from solutions.ch07_probes import logistic_probe

Batch = tuple[Tensor, Tensor]  # tokens and mask, both [batch pos]
Edit = Callable[[Tensor], Tensor]
Rule = float | tuple[int, Any, Any]  # a share, or (fact, rule where it is false, rule where it is true)

# ----------------------------------------------------------------------------------------------------------- collecting


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Tokens of texts, each behind a begin token and padded at its end, and a mask: True for all but the padding."""
    rows = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(list(texts))["input_ids"]]
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.tensor([row + [tokenizer.pad_token_id] * (mask.shape[1] - len(row)) for row in rows]), mask


@torch.no_grad()
def token_activations(
    model: Any, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], hook_name: str
) -> Float[Tensor, "token d_in"]:
    """Collect what a hook point holds at every token of the texts: one row for each, text after text.

    `mask` is True where a token belongs to the text, and the first of these is the begin token. Padding stands behind
    the text. Neither the padding nor the begin token gets a row: a model's activations at the begin token are like no
    others, often very long, and always the same. The model runs once; nothing else is kept.
    """
    _, cache = run_with_cache(model, tokens, names=hook_name)
    return cache[hook_name][:, 1:][mask[:, 1:]]


def norm_scale(activations: Float[Tensor, "token d_in"]) -> float:
    """The one number to multiply all activations by so that their mean norm becomes sqrt(d_in).

    The mean of the norms, over the tokens, and not the root of the mean square. As it is one number, it changes neither
    directions nor which token has the longer activation.
    Source: Conerly et al. 2024, "Our updated SAE training setup".
    """
    return math.sqrt(activations.shape[-1]) / activations.norm(dim=-1).mean().item()


class ActivationBuffer:
    """Activations of one hook point, mixed over many texts and on one scale, without end as long as there are texts.

    `batches` gives pairs (tokens, mask) as `token_activations` wants them. The buffer reads batches until it holds
    `n_tokens` rows or more, and puts all of its rows in a random order, from `generator`. `next(n)` hands out the n
    rows that come next, each once, times `scale`. If, when `next` is called, fewer than half of `n_tokens` rows are
    left, or fewer than n, the buffer first reads again in the same way: what is left stays, new rows come to it, and
    all are mixed. (If n is larger than `n_tokens`, it reads until there are n.) `scale` is the `norm_scale` of the rows
    of the first filling, unless it is given, and stays the same from then on.

    When the batches are at an end, `next` hands out what is left, in one last portion that may be smaller, and then
    raises StopIteration. `state_dict()` holds all that is needed to go on: after `load_state_dict(state)` a new buffer,
    made with the same texts from their beginning, hands out exactly what the old one would have handed out next.
    """

    def __init__(
        self,
        model: Any,
        batches: Iterable[Batch],
        hook_name: str,
        n_tokens: int,
        generator: torch.Generator,
        scale: float | None = None,
    ) -> None:
        self.model, self.batches, self.hook_name = model, iter(batches), hook_name
        self.n_tokens, self.generator, self.n_read = n_tokens, generator, 0
        self.rows: Any = None
        self.fill(n_tokens)
        self.scale = norm_scale(self.rows) if scale is None else scale

    def fill(self, n_tokens: int) -> None:
        """Read batches until there are so many rows, then mix."""
        parts = [] if self.rows is None else [self.rows]
        while sum(map(len, parts)) < n_tokens:
            batch = next(self.batches, None)
            if batch is None:
                break
            self.n_read += 1
            parts.append(token_activations(self.model, *batch, self.hook_name))
        rows = torch.cat(parts)
        self.rows = rows[torch.randperm(len(rows), generator=self.generator).to(rows.device)]

    def next(self, n: int) -> Float[Tensor, "token d_in"]:
        """The next n rows, scaled."""
        if len(self.rows) < max(n, self.n_tokens / 2):
            self.fill(max(n, self.n_tokens))
        if not len(self.rows):
            raise StopIteration
        batch, self.rows = self.rows[:n], self.rows[n:]
        return self.scale * batch

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on from here."""
        state = {"rows": self.rows, "scale": self.scale, "n_read": self.n_read}
        return {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the buffer was that this state came from."""
        for _ in range(state["n_read"] - self.n_read):
            next(self.batches)
        self.rows, self.scale, self.n_read = state["rows"], state["scale"], state["n_read"]
        self.generator.set_state(state["generator"])


# ------------------------------------------------------------------------------------------------------------- training


class Pass(NamedTuple):
    """What one pass through an autoencoder gives."""

    loss: Tensor
    pre: Tensor
    latents: Tensor
    reconstruction: Tensor


def dictionary_pass(sae: Any, x: Float[Tensor, "token d_in"], sparsity: float) -> Pass:
    """Forward, and the loss that belongs to the kind; chapter 06 built it. `sparsity` is 0 for the top-k kinds."""
    pre = sae.pre_activations(x)
    latents = sae.activate(pre)
    reconstruction = sae.decode(latents)
    counted, W_dec = pre.relu() if sae.kind == "gated" else latents, sae.W_dec
    if not sparsity:  # on the way back, 0 times the penalty would cost as much as any other
        counted, W_dec = counted.detach(), W_dec.detach()
    active = Heaviside.apply(pre, sae.log_threshold.exp(), sae.bandwidth) if sae.kind == "jumprelu" else None
    loss = sae_loss(x, reconstruction, counted, W_dec, sparsity, active)["total"]
    if sae.kind == "gated":
        loss = loss + gated_auxiliary_loss(x, pre, sae.W_dec, sae.b_dec)
    return Pass(loss, pre, latents, reconstruction)


class Fit(NamedTuple):
    """How a training went: the loss of every step, how many latents were dead at it, and weights kept on the way."""

    losses: list[float]
    dead: list[int]
    snapshots: dict[int, dict[str, Tensor]]


def fit_dictionary(
    sae: Any,
    batch: Callable[[], Float[Tensor, "token d_in"]],
    steps: int,
    peak: float = 1e-3,
    sparsity: float = 0.0,
    warm_up: int = 50,
    window: int = 50,
    auxiliary: float = 0.0,
    keep: Sequence[int] = (),
) -> Fit:
    """Train a sparse autoencoder in place, on what `batch()` hands out, and leave it in evaluation mode.

    Until then it is in training mode, whichever it was given in.
    Before step 0, `b_dec` becomes the mean of the first batch, on which step 0 then trains. Step s, counted from 0:

    - learning rate: `peak` times the smallest of 1, (s+1)/`warm_up` and (steps-s)/(0.2 steps): it rises, stays, and
      falls in the last fifth;
    - weight of the penalty: `sparsity` times the smaller of 1 and (s+1)/(0.2 steps);
    - loss: that of `dictionary_pass(sae, x, weight)`. A latent is dead if it was silent in this batch and in the
      `window` batches before it or more. If any is, and `auxiliary` is not 0, it adds `auxiliary` times
      `auxiliary_topk_loss`, with k = 32;
    - `remove_parallel_gradient` for W_dec, a step of `torch.optim.Adam`, and `normalise_decoder`.

    `losses` holds the loss of `dictionary_pass` alone, `dead` the number of dead latents, one of each for every step.
    `snapshots` holds copies of the weights *after* as many steps as `keep` says.
    """
    optimizer = torch.optim.Adam(sae.parameters())
    silent = torch.zeros_like(sae.b_enc)
    fit = Fit([], [], {})
    sae.train()
    for step in tqdm(range(steps), leave=False, disable=steps < 100):
        x = batch()
        if step == 0:
            with torch.no_grad():
                sae.b_dec.copy_(x.mean(dim=0))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / warm_up, (steps - step) / (0.2 * steps))
        now = dictionary_pass(sae, x, sparsity * min(1.0, (step + 1) / (0.2 * steps)))
        silent = torch.where(now.latents.amax(dim=0) > 0, 0.0, silent + 1)
        dead = silent > window
        total = now.loss
        if auxiliary and dead.any():
            total = total + auxiliary * auxiliary_topk_loss(x, now.reconstruction, now.pre, dead, sae.W_dec, 32)
        optimizer.zero_grad()
        total.backward()
        sae.W_dec.grad = remove_parallel_gradient(sae.W_dec.detach(), sae.W_dec.grad)
        optimizer.step()
        with torch.no_grad():
            sae.W_dec.copy_(normalise_decoder(sae.W_dec))
        fit.losses.append(now.loss.item())
        fit.dead.append(int(dead.sum()))
        if step + 1 in keep:
            fit.snapshots[step + 1] = {name: weight.clone() for name, weight in sae.state_dict().items()}
    sae.eval()
    return fit


class Dictionary(nn.Module):
    """A sparse autoencoder, the hook point that it belongs to, and the number that its inputs are multiplied by."""

    def __init__(self, sae: Any, hook_name: str, scale: float) -> None:
        super().__init__()
        self.sae, self.hook_name, self.scale = sae, hook_name, scale

    def encode(self, activation: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch latent"]:
        """The latents of what the hook point holds."""
        return self.sae.encode(self.scale * activation)

    def decode(self, latents: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch d_in"]:
        """What these latents would have the hook point hold."""
        return self.sae.decode(latents) / self.scale


def load_dictionary(name: str) -> Dictionary:
    """A dictionary that ships with the course, in evaluation mode; `saved_dictionaries.shipped()` lists them."""
    config, weights = saved_dictionaries.read(name)
    sae = SparseAutoencoder(config["d_in"], config["d_sae"], config["kind"], k=config["k"], generator=torch.Generator())
    sae.load_state_dict(weights)
    return Dictionary(sae.eval(), config["hook_name"], config["scale"])


def shuffle_weights(model: Any, generator: torch.Generator) -> Any:
    """Put the numbers of every parameter in a random order, in place: the same numbers, and nothing learned."""
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return model


# ---------------------------------------------------------------------------------------------------------- is it good?


def firing_rates(chunks: Iterable[Float[Tensor, "_ latent"]]) -> Float[Tensor, " latent"]:
    """The share of tokens on which each latent fires (is above 0), over all chunks together, whatever their sizes.

    The sum of the rates is the mean number of latents that fire on a token, known as L0. A latent with rate 0 is dead,
    one that fires on a tenth of all tokens or more is called dense. The chunks are read once, one at a time, and never
    held together. The rates have the latents' dtype.
    """
    fired: Any = 0
    n_tokens = 0
    for latents in chunks:
        fired = fired + (latents > 0).sum(dim=0).to(latents)
        n_tokens += len(latents)
    return fired / n_tokens


def explained_variance(
    x: Float[Tensor, "token d_in"], reconstruction: Float[Tensor, "token d_in"]
) -> Float[Tensor, ""]:
    """How much of the activations' variance a reconstruction explains: 1 - Σ|x - reconstruction|² / Σ|x - mean|².

    Both sums are over all tokens and coordinates; the mean is that of each coordinate, over the tokens. 1 is perfect, 0
    is as good as always answering with the mean, and a reconstruction may do worse than that.
    """
    error, spread = (x - reconstruction).square().sum(), (x - x.mean(dim=0)).square().sum()
    return 1 - error / spread


@contextmanager
def splice(model: Any, dictionary: Any, edit: Edit | None = None, with_error: bool = False) -> Iterator[None]:
    """While the context lasts, what the dictionary makes of its hook point takes the place of what the model computed.

    The activation x at `dictionary.hook_name` becomes `decode(latents)`, where the latents are `encode(x)`, or
    `edit(encode(x))` if there is an edit. With `with_error`, what the dictionary misses is added: x -
    decode(encode(x)), of the latents before the edit. So without an edit the model then runs as if nothing had
    happened. This is done at every position but the first, which holds the begin token: its activation stays.
    Gradients get through. Nothing stays behind after the context, whatever happens in it.
    """

    def replace(activation: Tensor, hook: HookPoint) -> Tensor:
        rest = activation[:, 1:]
        latents = dictionary.encode(rest)
        new = dictionary.decode(latents if edit is None else edit(latents))
        if with_error:
            new = new + rest - dictionary.decode(latents)
        return torch.cat([activation[:, :1], new], dim=1)

    with hooks(model, {dictionary.hook_name: replace}):
        yield


@torch.no_grad()
def loss_recovered(
    model: Any,
    dictionary: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    baseline: str = "mean",
) -> dict[str, float]:
    """How much of what a hook point does for the model's loss its dictionary preserves.

    All losses are means over all tokens of the texts but the begin token, in nats: `masked_lm_loss` with the mask.

    - "clean": the loss of the model;
    - "spliced": its loss with the dictionary spliced in;
    - "ablated": its loss if the hook point holds 0 (`baseline="zero"`), or its own mean over the tokens of these texts
      (`baseline="mean"`), at every position but the first, which holds the begin token and is not in the mean either;
    - "recovered": 1 where spliced equals clean, 0 where it equals ablated, and in proportion between and beyond.

    Raises ValueError for another baseline.
    Source: Bricken et al. 2023; Rajamanoharan et al. 2024a, section 4.1 ("loss recovered", there with zero).
    """
    if baseline not in ("mean", "zero"):
        raise ValueError(f'loss_recovered: baseline is "mean" or "zero", not {baseline!r}.')
    held = token_activations(model, tokens, mask, dictionary.hook_name).mean(dim=0) * (baseline == "mean")

    def ablate(activation: Tensor, hook: HookPoint) -> Tensor:
        return torch.cat([activation[:, :1], held.expand_as(activation[:, 1:])], dim=1)

    losses = {"clean": masked_lm_loss(model(tokens), tokens, mask).item()}
    with splice(model, dictionary):
        losses["spliced"] = masked_lm_loss(model(tokens), tokens, mask).item()
    with hooks(model, {dictionary.hook_name: ablate}):
        losses["ablated"] = masked_lm_loss(model(tokens), tokens, mask).item()
    gap = losses["ablated"] - losses["clean"]
    return {**losses, "recovered": (losses["ablated"] - losses["spliced"]) / gap}


# --------------------------------------------------------------------------------------------------- what does it mean?


def top_examples(
    chunks: Iterable[Float[Tensor, "_ latent"]], k: int
) -> tuple[Float[Tensor, "rank latent"], Int[Tensor, "rank latent"]]:
    """The k tokens on which each latent is largest: (values, places), for every latent, the largest first.

    The chunks are parts of one long stream, too long to be kept: they are read once, one at a time, and never held
    together. A place is a token's number in the whole stream, from 0. A stream of fewer than k tokens gives all of
    them.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    n_before = 0
    for chunk in chunks:
        here = torch.arange(n_before, n_before + len(chunk), device=chunk.device)[:, None].expand_as(chunk)
        n_before += len(chunk)
        values, places = (torch.cat(both) for both in zip(*kept, (chunk, here), strict=True))
        best = values.topk(min(k, len(values)), dim=0)
        kept = [(best.values, places.gather(0, best.indices))]
    return kept[0]


def activation_histogram(
    chunks: Iterable[Float[Tensor, "_ latent"]], edges: Float[Tensor, " edge"]
) -> Int[Tensor, "latent bin"]:
    """How often each latent has a value in each bin, over all tokens of a stream; the chunks are read once.

    Bin b reaches from edges[b] up to edges[b+1], which belongs to the next bin. The first bin also has everything below
    it, and the last everything above: so every token counts, also the many on which the latent is silent, and each
    latent's counts add up to the number of tokens.
    """
    counts: Any = 0
    for chunk in chunks:
        bins = torch.bucketize(chunk, edges[1:-1], right=True)
        counts = counts + torch.stack([(bins == b).sum(dim=0) for b in range(len(edges) - 1)], dim=1)
    return counts


def logit_effect(model: Any, directions: Float[Tensor, "latent d_model"]) -> Float[Tensor, "latent d_vocab"]:
    """Which tokens a direction in the stream makes more likely, and which less, if it goes straight to the end.

    The final norm's own scale depends on the rest of the stream and is left out, as 1. So: subtract from each direction
    its mean over d_model (if the model has LayerNorm: "LN"), multiply by the norm's `w` (unless the normalisation is
    "none"), and by the unembedding `W_U`. At last, subtract from each row its mean over the vocabulary, which changes
    no probability. Biases have no part in it: the effect of twice the direction is twice the effect.
    """
    if model.cfg.normalization == "LN":
        directions = directions - directions.mean(dim=-1, keepdim=True)
    if model.cfg.normalization != "none":
        directions = directions * model.ln_final.w
    logits = directions @ model.unembed.W_U
    return logits - logits.mean(dim=-1, keepdim=True)


@torch.no_grad()
def direct_feature_attribution(
    model: Any, dictionary: Any, tokens: Int[Tensor, " pos"], latent: int, query: int
) -> Float[Tensor, "head key"]:
    """Which heads, looking at which tokens, make up a latent of a dictionary of what attention writes.

    The dictionary belongs to "blocks.L.hook_attn_out". What attention writes at position `query` is a sum: of each
    head, and each position `key` that it looks at, the pattern times the value there times W_O; and b_O. The latent's
    pre-activation is linear in it. So each part contributes the dictionary's scale times the part times the latent's
    column of W_enc. The sum of all contributions is the pre-activation, less a constant (of b_O, b_dec and b_enc). Keys
    behind the query contribute 0.
    Source: Kissane et al. 2024, section 3 ("direct feature attribution").
    """
    layer = int(dictionary.hook_name.split(".")[1])
    pattern, v = f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.attn.hook_v"
    _, cache = run_with_cache(model, tokens[None], names=[pattern, v])
    reads = model.blocks[layer].attn.W_O @ dictionary.sae.W_enc[:, latent] * dictionary.scale
    per_key = einops.einsum(cache[v][0], reads, "key head d_head, head d_head -> head key")
    return cache[pattern][0, :, query] * per_key


# ------------------------------------------------------------------------------------------ does it mean what we think?


def best_f1(
    activations: Float[Tensor, "token unit"], labels: Bool[Tensor, "token fact"], shares: Sequence[float]
) -> Float[Tensor, "fact unit"]:
    """How well each unit, by itself, tells where each fact is true: its F1 at the best of several thresholds.

    A unit says "true" if its activation is above a threshold, which is a share of its own maximum over these tokens:
    all of `shares` are tried. F1 is 2 n_both / (n_said + n_true): of the tokens on which the unit says so, of those on
    which it is true, and of those on which both are. Where n_both is 0, so is F1.
    """
    true, largest = labels.to(activations), activations.amax(dim=0)
    found = []
    for share in shares:
        says = (activations > share * largest).to(activations)
        both = true.T @ says
        found.append(2 * both / (says.sum(dim=0) + true.sum(dim=0)[:, None]).clamp(min=1))
    return torch.stack(found).amax(dim=0)


def explain(fires: Bool[Tensor, " token"], facts: Bool[Tensor, "token fact"], n_questions: int) -> Rule:
    """Find a rule that says where a latent fires, from facts about the tokens: a small decision tree.

    A rule is either a number, the share of its tokens on which the latent fires, or (fact, rule where that fact is
    false, rule where it is true). On the way from the top to a number, at most `n_questions` facts are asked about.
    Each is chosen greedily: of n tokens of which a share p fires, the impurity is n p (1 - p), and the fact is the one
    after which the impurities of the two parts add up to the least; of equally good ones the first. No question is
    asked if it would not lower the impurity (by more than 1e-6).
    Source: Breiman et al. 1984 (CART, with Gini's impurity).
    """
    n, fired = len(fires), fires.sum().double()
    share = (fired / n).item()
    if not n_questions:
        return share
    inside = facts.sum(dim=0).double()
    hits = facts[fires].sum(dim=0).double()
    pure = hits.square() / inside.clamp(min=1) + (fired - hits).square() / (n - inside).clamp(min=1)
    gain = pure - fired.square() / n
    if not len(gain) or gain.max() <= 1e-6:
        return share
    fact = int(gain.argmax())
    true = facts[:, fact]
    return (
        fact,
        explain(fires[~true], facts[~true], n_questions - 1),
        explain(fires[true], facts[true], n_questions - 1),
    )


def follow_rule(rule: Rule, facts: Bool[Tensor, "token fact"]) -> Float[Tensor, " token"]:
    """The share that a rule of `explain` gives for each token: how likely the latent is to fire there."""
    if not isinstance(rule, tuple):
        return torch.full((len(facts),), rule, device=facts.device)
    fact, no, yes = rule
    return torch.where(facts[:, fact], follow_rule(yes, facts), follow_rule(no, facts))


def detection_score(
    predicted: Bool[Tensor, " token"], fires: Bool[Tensor, " token"], text: Int[Tensor, " token"]
) -> float:
    """How well a rule tells *in which texts* a latent fires, from 0 to 1; 0.5 is what a rule gets that knows nothing.

    `text` says to which text each token belongs. A latent fires in a text if it fires on any token of it, and the rule
    predicts that in the same way. The score is the mean of two shares: of the texts in which it fires, those for which
    that was predicted, and of the texts in which it does not, those for which it was not. A share of no texts is 0.5.
    Source: Paulo et al. 2024 ("detection", there by a language model).
    """
    texts = text.unique()
    said, true = (torch.stack([marks[text == one].any() for one in texts]) for marks in (predicted, fires))
    return balanced_accuracy(said, true)


def balanced_accuracy(said: Bool[Tensor, " row"], true: Bool[Tensor, " row"]) -> float:
    """The mean of two shares: of the rows where it is true, those where it was said, and of the others, the others."""
    shares = [(said[rows] == true[rows]).float().mean().item() if rows.any() else 0.5 for rows in (true, ~true)]
    return sum(shares) / 2


def fuzzing_score(
    predicted: Bool[Tensor, " token"], fires: Bool[Tensor, " token"], text: Int[Tensor, " token"]
) -> float:
    """How well a rule tells *on which tokens* a latent fires, in the texts in which it does; 0.5 is knowing nothing.

    Only texts count in which the latent fires on some token. The score is the mean of two shares: of their tokens on
    which it fires, those for which that was predicted, and of their other tokens, those for which it was not. A share
    of no tokens is 0.5. (Paulo et al. ask a language model about a few tokens drawn at random; here all are asked.)
    Source: Paulo et al. 2024 ("fuzzing").
    """
    there = torch.isin(text, text[fires])
    return balanced_accuracy(predicted[there], fires[there])


# ------------------------------------------------------------------------------------------------------------------ use


@contextmanager
def steer_with_latent(
    model: Any, dictionary: Any, latent: int | Sequence[int], value: float, with_error: bool = True
) -> Iterator[None]:
    """While the context lasts, one latent has a value of your choice, at every position but the first.

    All other latents keep what they have. Several latents get the same value; with 0 they are ablated. With
    `with_error`, which is the default, what the dictionary misses stays, so that the change is the latent alone;
    without it, the model runs on the reconstruction, as in `splice`.
    """

    def edit(latents: Tensor) -> Tensor:
        changed = latents.clone()
        changed[..., latent] = value
        return changed

    with splice(model, dictionary, edit, with_error):
        yield


def sparse_probe(
    latents: Float[Tensor, "batch latent"], labels: Bool[Tensor, " batch"], k: int, l2: float
) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, ""]]:
    """A probe that may look at k latents only: (chosen, direction, bias).

    Chosen are those whose means over the True and the False rows differ most, in absolute value, in order, the largest
    difference first. On these, fit chapter 07's `logistic_probe` with `l2`. The score of a row is
    `latents[:, chosen] @ direction + bias`.
    Source: Gurnee et al. 2023, section 3 ("maximum mean difference").
    """
    difference = latents[labels].mean(dim=0) - latents[~labels].mean(dim=0)
    chosen = difference.abs().topk(k).indices
    direction, bias = logistic_probe(latents[:, chosen], labels, l2)
    return chosen, direction, bias


ARCHITECTURES = {"relu": "standard", "topk": "topk", "batch_topk": "jumprelu", "gated": "gated", "jumprelu": "jumprelu"}


def save_for_saelens(dictionary: Any, folder: Path, model_name: str) -> None:
    """Write a dictionary as the library SAELens reads it: `cfg.json` and `sae_weights.safetensors` in a folder.

    In SAELens x is neither scaled nor told where it comes from by code of ours, so the scale s goes into the weights:
    W_enc becomes s W_enc, b_dec becomes b_dec / s and W_dec becomes W_dec / s. Latents are then the same, and
    reconstructions are in the model's own units. Weights, in float32, by SAELens' names: W_enc, b_enc, W_dec, b_dec;
    for "jumprelu" also `threshold`, which is exp(log_threshold); for "gated" `b_gate` (which is our b_enc) in the place
    of b_enc, `r_mag` and `b_mag`. A "batch_topk" is written as a "jumprelu" with its one threshold for all latents.

    `cfg.json` holds "architecture" (`ARCHITECTURES`), "d_in", "d_sae", "k" (for "topk" only), "dtype": "float32",
    "device": "cpu", "apply_b_dec_to_input": true, "normalize_activations": "none", "reshape_activations": "none", and
    "metadata" with "model_name", "hook_name" and "sae_lens_version": "6.0.0", since without a version SAELens takes the
    file for an older one. The folder is made if it is not there.
    Source: SAELens 6, `SAE.load_from_disk`.
    """
    from safetensors.torch import save_file

    sae, scale = dictionary.sae, dictionary.scale
    architecture = ARCHITECTURES[sae.kind]
    weights = {
        "W_enc": scale * sae.W_enc,
        "W_dec": sae.W_dec / scale,
        "b_dec": sae.b_dec / scale,
        "b_gate" if sae.kind == "gated" else "b_enc": sae.b_enc,
    }
    if sae.kind == "gated":
        weights |= {"r_mag": sae.r_mag, "b_mag": sae.b_mag}
    if sae.kind == "jumprelu":
        weights["threshold"] = sae.log_threshold.exp()
    if sae.kind == "batch_topk":
        weights["threshold"] = sae.threshold.expand_as(sae.b_enc)
    cfg = {
        "architecture": architecture,
        "d_in": sae.W_enc.shape[0],
        "d_sae": sae.W_enc.shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"model_name": model_name, "hook_name": dictionary.hook_name, "sae_lens_version": "6.0.0"},
    }
    if sae.kind == "topk":
        cfg["k"] = sae.k
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=2), encoding="utf-8")
    tensors = {name: weight.detach().cpu().float().clone().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "sae_weights.safetensors")


def load_saelens(folder: Path) -> Dictionary:
    """Read a dictionary that SAELens wrote: the opposite of `save_for_saelens`.

    Kinds by architecture: "standard" is "relu"; "topk", "gated" and "jumprelu" have our names. The result has scale 1,
    and is in evaluation mode. Its k is that of `cfg.json` for "topk", otherwise 1. Raises ValueError, with the
    offending value, for another architecture, for "normalize_activations" that is not "none", and for
    "apply_b_dec_to_input" that is not true: these dictionaries compute something that ours do not.
    """
    from safetensors.torch import load_file

    cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    wanted = {"normalize_activations": "none", "apply_b_dec_to_input": True}
    kind = {"standard": "relu"}.get(cfg["architecture"], cfg["architecture"])
    if kind not in ("relu", "topk", "gated", "jumprelu"):
        raise ValueError(f"load_saelens: ours know no architecture {cfg['architecture']!r}.")
    for key, value in wanted.items():
        if cfg[key] != value:
            raise ValueError(f"load_saelens: {key} is {cfg[key]!r}, and ours know {value!r} only.")
    weights = load_file(folder / "sae_weights.safetensors")
    sae = SparseAutoencoder(cfg["d_in"], cfg["d_sae"], kind, k=cfg.get("k", 1), generator=torch.Generator())
    if kind == "gated":
        weights["b_enc"] = weights.pop("b_gate")
    if kind == "jumprelu":
        weights["log_threshold"] = weights.pop("threshold").log()
    sae.load_state_dict(weights)
    return Dictionary(sae.eval(), cfg["metadata"]["hook_name"], 1.0)
