"""Checks of chapter 10: a transcoder, how good it is, and all of them in the place of the MLPs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch10.small import D_MODEL, KINDS, Fn, Sparse, model_of, tokens_of, transcoders_of
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise, randomise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.transformer import SmallModel
from course_utils.config import TransformerConfig
from course_utils.hooks import hooks

# --------------------------------------------------------------------------------------------------------- Transcoder


class Own(nn.Module):
    """A transcoder position by position, each step apart, so that a mistake can replace it."""

    def __init__(self, d_model: int, n_latents: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.k = k
        self.W_enc, self.b_enc = nn.Parameter(torch.zeros(d_model, n_latents)), nn.Parameter(torch.zeros(n_latents))
        self.W_dec, self.b_dec = nn.Parameter(torch.zeros(n_latents, d_model)), nn.Parameter(torch.zeros(d_model))

    def pre(self, x: Tensor) -> Tensor:
        return x @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre(x).flatten(0, -2)
        rows = []
        for row in pre:
            kept = sorted(range(len(row)), key=lambda latent: -row[latent].item())[: self.k]
            rows.append(torch.stack([row[i].clamp(min=0) if i in kept else row[i] * 0 for i in range(len(row))]))
        return torch.stack(rows).reshape(*x.shape[:-1], -1)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents[..., None] * self.W_dec).sum(-2) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def wrong(**methods: Any) -> type:
    return type("Transcoder", (Own,), methods)


def over_batch(self: Any, x: Tensor) -> Tensor:
    pre = self.pre(x)
    n = self.k * pre[..., 0].numel()
    threshold = pre.flatten().sort(descending=True).values[min(n, pre.numel()) - 1]
    return pre.clamp(min=0) * (pre >= threshold)


def largest_sizes(self: Any, x: Tensor) -> Tensor:
    pre = self.pre(x)
    threshold = pre.abs().sort(-1, descending=True).values[..., min(self.k, pre.shape[-1]) - 1]
    return pre * (pre.abs() >= threshold[..., None])


def negative_kept(self: Any, x: Tensor) -> Tensor:
    pre = self.pre(x)
    threshold = pre.sort(-1, descending=True).values[..., min(self.k, pre.shape[-1]) - 1]
    return pre * (pre >= threshold[..., None])


@known_mistakes(
    {
        "b_dec is subtracted from what it reads: that is for an autoencoder.": wrong(
            pre=lambda self, x: (x - self.b_dec) @ self.W_enc + self.b_enc
        ),
        "b_enc is left out.": wrong(pre=lambda self, x: x @ self.W_enc),
        "every positive latent is kept; only the k largest are.": wrong(encode=lambda self, x: self.pre(x).relu()),
        "a negative pre-activation stays; it becomes 0, even among the k largest.": wrong(encode=negative_kept),
        "the k largest are chosen by absolute value.": wrong(encode=largest_sizes),
        "the largest are chosen over the whole batch; each position has its own k.": wrong(encode=over_batch),
        "the decoder's bias is left out.": wrong(decode=lambda self, latents: latents @ self.W_dec),
        "what it reads is added to what it writes; the stream does that.": wrong(
            forward=lambda self, x: self.decode(self.encode(x)) + x
        ),
        "it decodes with the transpose of W_enc; it has a W_dec of its own.": wrong(
            decode=lambda self, latents: latents @ self.W_enc.T + self.b_dec
        ),
    }
)
def check_Transcoder(cls: Any) -> None:  # noqa: N802 (the exercise's name)
    """Latents, outputs and decoded latents at three sizes; with and without a batch; gradients; float64."""
    name = "Transcoder"
    for d_model, n_latents, k in ((4, 7, 3), (6, 5, 1), (3, 4, 9)):
        module, oracle = cls(d_model, n_latents, k), Own(d_model, n_latents, k)
        found = {entry: tuple(tensor.shape) for entry, tensor in module.state_dict().items()}
        wanted = {entry: tuple(tensor.shape) for entry, tensor in oracle.state_dict().items()}
        if found != wanted:
            raise CheckFailed(f"{name}: its parameters are {found}.\n  Next: keep the `__init__` that was given.")
        randomise(module)
        oracle.load_state_dict(module.state_dict())
        for shape, axes in (((2, 5), "batch pos"), ((5,), "pos")):
            x = noise(*shape, d_model, seed=len(shape))
            call = f"of {n_latents} latents with k = {k}"
            with unchanged(name, x=x):
                compare(f"{name}: encode {call}", module.encode(x), oracle.encode(x), f"{axes} latent")
                compare(f"{name}: forward {call}", module(x), oracle(x), f"{axes} d_model")
            latents = noise(*shape, n_latents, seed=7)
            compare(f"{name}: decode {call}", module.decode(latents), oracle.decode(latents), f"{axes} d_model")
    module, x = cls(4, 7, 3), noise(2, 5, 4)
    randomise(module)
    follows_input(name, lambda moved, x: moved(x).detach(), (module, x), "batch pos d_model")
    follows_every_kind(name, lambda moved, x: moved(x).detach(), (module, x), "batch pos d_model")
    follows_input(f"{name}: encode", lambda moved, x: moved.encode(x).detach(), (module, x), "batch pos latent")
    output = module(x)
    if not output.requires_grad:
        raise CheckFailed(f"{name}: no gradient gets through it.\n  Next: look for .detach() or torch.no_grad.")
    output.square().sum().backward()
    for entry, parameter in module.named_parameters():
        if parameter.grad is None:
            raise CheckFailed(f"{name}: no gradient reaches `{entry}`.\n  Next: look for .detach(), .data or .item().")


# ----------------------------------------------------------------------------------------------------------- the loss


def around_mean(y: Tensor) -> Tensor:
    """Distances from the mean over the tokens, coordinate by coordinate."""
    return torch.stack([column - column.mean() for column in y.T], dim=1)


def losses(
    errors: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda output, x, y: output - y,
    kept: Callable[[Tensor], Tensor] = lambda mask: mask,
    spread: Callable[[Tensor], Tensor] = around_mean,
    share: Callable[[Tensor, Tensor], Tensor] = lambda error, around: error.pow(2).sum() / around.pow(2).sum(),
) -> Fn:
    """The loss, token by token, with a step replaced."""

    def transcoder_loss(transcoder: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        places = kept(mask).nonzero().tolist()
        output = transcoder(x)
        rows, read, written = (torch.stack([of[row, pos] for row, pos in places]) for of in (output, x, y))
        return share(errors(rows, read, written), spread(written))

    return transcoder_loss


@known_mistakes(
    {
        "the target is what the MLP read; a transcoder is to write what it wrote.": losses(
            errors=lambda output, x, y: output - x
        ),
        "padding counts: the mask is ignored.": losses(kept=torch.ones_like),
        "the mask is turned round.": losses(kept=torch.logical_not),
        "the variance is measured around 0; it is around the mean over the tokens.": losses(spread=lambda y: y),
        "the variance is measured around one mean for all coordinates; each has its own.": losses(
            spread=lambda y: y - y.mean()
        ),
        "the variance is measured around each vector's own mean; take the mean over the tokens.": losses(
            spread=lambda y: y - y.mean(1, keepdim=True)
        ),
        "it is the mean squared error; divide by the variance.": losses(
            share=lambda error, around: error.pow(2).mean()
        ),
        "it is the share that is explained, not the one that is missed.": losses(
            share=lambda error, around: 1 - error.pow(2).sum() / around.pow(2).sum()
        ),
        "shares are averaged over the coordinates; sum all squares first.": losses(
            share=lambda error, around: (error.pow(2).sum(0) / around.pow(2).sum(0)).mean()
        ),
        "it is a share of lengths; take squares.": losses(share=lambda error, around: error.norm() / around.norm()),
    }
)
def check_transcoder_loss(fn: Fn) -> None:
    """Three masks; outputs far from zero; a gradient; float64."""
    name, transcoder = "transcoder_loss", Sparse(40)
    for seed, shape in ((1, (2, 5)), (2, (3, 4)), (3, (1, 7))):
        x = noise(*shape, D_MODEL, seed=seed)
        y = transcoder(x) + 0.4 * noise(*shape, D_MODEL, seed=seed + 9) * torch.arange(1.0, D_MODEL + 1)
        mask = noise(*shape, seed=seed + 20) > -0.8
        mask[0, 0], mask[0, -1], mask[0, 1] = True, False, True
        y[~mask] += 3
        with unchanged(name, x=x, y=y, mask=mask):
            actual = fn(transcoder, x, y, mask)
        compare(f"{name} of {shape[0]} texts of {shape[1]} tokens", actual, losses()(transcoder, x, y, mask), "")
    follows_input(name, fn, (transcoder, x, y, mask), "")
    trained = copy.deepcopy(transcoder).requires_grad_()
    loss = fn(trained, x, y, mask)
    if not loss.requires_grad:
        raise CheckFailed(
            f"{name}: no gradient gets through it.\n  Next: look for .item(), .detach() or torch.no_grad."
        )


# ------------------------------------------------------------------------------------------------------- in the model


def outputs(model: Any, tokens: Tensor, place: str) -> list[Tensor]:
    """What comes out of a place in each layer, by PyTorch's own hooks."""
    found: list[Tensor] = []
    handles = [
        model.get_submodule(f"blocks.{layer}.{place}").register_forward_hook(lambda *call: found.append(call[2]))
        for layer in range(model.cfg.n_layers)
    ]
    with hooks(model, {"*hook_normalized": lambda x, hook: None}), torch.no_grad():  # watched, so that it is called
        model(tokens)
    for handle in handles:
        handle.remove()
    return found


def missed(
    read: str = "ln2.hook_normalized",
    write: Callable[[Any, Tensor], Tensor] = lambda transcoder, x: transcoder(x),
    sign: float = 1.0,
    target: str = "hook_mlp_out",
    layer_of: Callable[[int], int] = lambda layer: layer,
) -> Fn:
    """mlp_errors with a step replaced."""

    def mlp_errors(model: Any, transcoders: Sequence[Any], tokens: Tensor) -> Tensor:
        pairs = zip(outputs(model, tokens, target), outputs(model, tokens, read), strict=True)
        return torch.stack(
            [sign * (y - write(transcoders[layer_of(layer)], x)) for layer, (y, x) in enumerate(pairs)]
        ).detach()

    return mlp_errors


@known_mistakes(
    {
        "the sign is wrong: it is what the MLP writes minus what the transcoder writes.": missed(sign=-1.0),
        "the transcoder reads the stream before the norm.": missed(read="hook_resid_mid"),
        "the transcoder reads the whole output of ln2; it reads ln2.hook_normalized.": missed(read="ln2"),
        "the decoder's bias is left out.": missed(write=lambda transcoder, x: transcoder.encode(x) @ transcoder.W_dec),
        "it is the MLP's output, from which nothing is subtracted.": missed(
            write=lambda transcoder, x: torch.zeros_like(x)
        ),
        "the stream behind the MLP is compared; take mlp_out.": missed(target="hook_resid_post"),
        "every layer has the first transcoder.": missed(layer_of=lambda layer: 0),
    }
)
def check_mlp_errors(fn: Fn) -> None:
    """Two sizes, three kinds of models; no gradients."""
    name, transcoders = "mlp_errors", transcoders_of()
    for kind in KINDS:
        model, tokens = model_of(kind), tokens_of(2)
        with unchanged(name, tokens=tokens):
            actual = fn(model, transcoders, tokens)
        compare(f"{name} of a {kind}", actual, missed()(model, transcoders, tokens), "layer batch pos d_model")
    model, tokens = model_of(n_layers=1), tokens_of(4, seed=3)
    right = missed()(model, transcoders[1:2], tokens)
    compare(f"{name} of one layer", fn(model, transcoders[1:2], tokens), right, "layer batch pos d_model")
    learning = copy.deepcopy(transcoders[:1])
    learning[0].requires_grad_()
    if fn(model, learning, tokens).requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: put `@torch.no_grad()` above it.")
    double, doubled = copy.deepcopy(model).double(), [copy.deepcopy(transcoders[1]).double()]
    compare(f"{name} in float64", fn(double, doubled, tokens), missed()(double, doubled, tokens), "layer batch pos d")
    with nothing_left_behind(name, model):
        fn(model, transcoders[1:2], tokens)


def spliced(
    where: Callable[[int, int], bool] = lambda layer, n_layers: True,
    write: Callable[[Any, Tensor, Tensor, Tensor], Tensor] = lambda transcoder, x, own, error: transcoder(x) + error,
    own_reads: bool = False,
    read: str = "ln2.hook_normalized",
    error_of: Callable[[Tensor, int], Tensor] = lambda errors, layer: errors[layer],
) -> Fn:
    """run_replaced by PyTorch's own hooks, with a step replaced."""

    def run_replaced(model: Any, transcoders: Sequence[Any], tokens: Tensor, errors: Tensor | None = None) -> Tensor:
        if model.cfg.attn_only or model.cfg.normalization == "none":
            raise ValueError("run_replaced: no norm")
        before = outputs(model, tokens, read)
        reads: dict[int, Tensor] = {}
        handles = []
        for layer, transcoder in enumerate(transcoders):

            def note(module: nn.Module, inputs: Any, output: Tensor, layer: int = layer) -> None:
                reads[layer] = before[layer] if own_reads else output

            def exchange(
                module: nn.Module, inputs: Any, output: Tensor, layer: int = layer, transcoder: Any = transcoder
            ) -> Tensor:
                error = torch.zeros_like(output) if errors is None else error_of(errors, layer)
                return write(transcoder, reads[layer], output, error) if where(layer, len(transcoders)) else output

            handles.append(model.get_submodule(f"blocks.{layer}.{read}").register_forward_hook(note))
            handles.append(model.get_submodule(f"blocks.{layer}.hook_mlp_out").register_forward_hook(exchange))
        with hooks(model, {"*hook_normalized": lambda x, hook: None}):
            logits: Tensor = model(tokens)
        for handle in handles:
            handle.remove()
        return logits

    return run_replaced


def at_last_position(transcoder: Any, x: Tensor, own: Tensor, error: Tensor) -> Tensor:
    return torch.cat([own[:, :-1], transcoder(x)[:, -1:] + error[:, -1:]], 1)


@known_mistakes(
    {
        "nothing is replaced.": spliced(where=lambda layer, n_layers: False),
        "only the first MLP is replaced.": spliced(where=lambda layer, n_layers: layer == 0),
        "only the last MLP is replaced.": spliced(where=lambda layer, n_layers: layer == n_layers - 1),
        "MLPs are replaced at the last position only.": spliced(write=at_last_position),
        "the errors are forgotten.": spliced(write=lambda transcoder, x, own, error: transcoder(x)),
        "the errors are subtracted.": spliced(write=lambda transcoder, x, own, error: transcoder(x) - error),
        "every layer gets the error of the first.": spliced(error_of=lambda errors, layer: errors[0]),
        "a transcoder's output is added to the MLP's; it takes its place.": spliced(
            write=lambda transcoder, x, own, error: own + transcoder(x) + error
        ),
        "transcoders read what MLPs read in the model's own run; the ones below have changed it.": spliced(
            own_reads=True
        ),
        "the transcoder reads the stream before the norm.": spliced(read="hook_resid_mid"),
        "the transcoder reads the whole output of ln2; it reads ln2.hook_normalized.": spliced(read="ln2"),
    }
)
def check_run_replaced(fn: Fn) -> None:
    """With errors and without; three kinds of models; with their own errors the logits are the model's; refusals."""
    name, transcoders, axes = "run_replaced", transcoders_of(), "batch pos d_vocab"
    model, tokens = model_of(), tokens_of(2)
    errors = noise(3, 2, 5, D_MODEL, seed=4)
    with unchanged(name, tokens=tokens, errors=errors):
        compare(f"{name} without errors", fn(model, transcoders, tokens), spliced()(model, transcoders, tokens), axes)
        right = spliced()(model, transcoders, tokens, errors)
        compare(f"{name} with errors", fn(model, transcoders, tokens, errors), right, axes)
    for kind in KINDS:
        model = model_of(kind)
        errors = missed()(model, transcoders, tokens)
        called, restored = f"{name} of a {kind} with its own errors", fn(model, transcoders, tokens, errors)
        compare(called, restored, model(tokens), axes, rtol=1e-3, atol=1e-4)  # an output less itself, and added again
    one, own = model_of(n_layers=1), transcoders[2:]
    compare(f"{name} of one layer", fn(one, own, tokens), spliced()(one, own, tokens), axes)
    double, doubled = copy.deepcopy(one).double(), [copy.deepcopy(own[0]).double()]
    compare(f"{name} in float64", fn(double, doubled, tokens), spliced()(double, doubled, tokens), axes)
    with nothing_left_behind(name, one):
        fn(one, own, tokens)
    learning = [copy.deepcopy(part).requires_grad_() for part in transcoders[:2]]
    two, places = model_of(n_layers=2), [part.W_dec for part in learning]
    logits = fn(two, learning, tokens)
    if not logits.requires_grad:
        raise CheckFailed(f"{name}: no gradient gets through it.\n  Next: look for torch.no_grad or .detach().")
    found, right = (
        torch.autograd.grad(answer.square().sum(), places) for answer in (logits, spliced()(two, learning, tokens))
    )
    compare(f"{name}: the gradient at W_dec", torch.stack(found), torch.stack(right), "layer latent d_model", rtol=1e-3)
    refuses(name, lambda model: fn(model, own, tokens))


def refuses(name: str, run: Callable[[Any], Any]) -> None:
    """A model without a norm, and one without MLPs."""
    sizes = {"d_vocab": 11, "n_ctx": 7, "n_layers": 1, "n_heads": 4, "d_model": D_MODEL, "d_head": 2}
    for words, kind in (
        ("a model without norms", {"d_mlp": 9, "normalization": "none"}),
        ("a model without MLPs", {"attn_only": True}),
    ):
        model = SmallModel(TransformerConfig(**sizes, **kind))
        must_raise(name, ValueError, f"{name}(...) of {words}", lambda model=model: run(model))  # type: ignore[misc]
