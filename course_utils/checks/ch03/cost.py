"""Checks of chapter 03, what training costs: arithmetic, memory, and the exchange between processes.

The oracle is a transformer put together from PyTorch's own layers: which matrix products it runs, forward and
backward, and which tensors autograd keeps of it.
"""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.comparing import compare
from course_utils.checks.guarding import GLOBAL_RANDOM, may_change
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, must_raise
from course_utils.config import TransformerConfig

# No two sizes agree, heads do not add up to d_model, and an attention-only model may well have a d_mlp in its config.
CFG = TransformerConfig(d_vocab=151, n_ctx=23, n_layers=3, n_heads=2, d_model=52, d_head=19, d_mlp=87)
WIDE = TransformerConfig(d_vocab=41, n_ctx=37, n_layers=2, n_heads=3, d_model=44, d_head=31, d_mlp=201)
ATTN_ONLY = TransformerConfig(
    d_vocab=67, n_ctx=13, n_layers=2, n_heads=3, d_model=60, d_head=15, d_mlp=31, attn_only=True
)
PLAIN = TransformerConfig(
    d_vocab=29, n_ctx=17, n_layers=2, n_heads=2, d_model=57, d_head=26, d_mlp=70, normalization="none"
)


class Counter:
    """Matrix products that are counted: a product and a sum for each pair of numbers, in backward as well."""

    def __init__(self) -> None:
        self.operations = 0

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, now; and when backward comes by, one product more for each factor that needs a gradient."""
        result = a @ b
        cost = 2 * result.numel() * a.shape[-1]
        self.operations += cost

        def backward(gradient: Tensor) -> None:
            self.operations += cost * (a.requires_grad + b.requires_grad)

        result.register_hook(backward)
        return result

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return self.product(x, layer.weight.T) + layer.bias

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        pattern = self.product(q, k.transpose(-1, -2)).masked_fill(future, -torch.inf).softmax(dim=-1)
        return self.product(pattern, v)


def usual_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class FromTorch(nn.Module):
    """A transformer of PyTorch's own layers, with the parameters of chapter 02's in other shapes."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        width = cfg.n_heads * cfg.d_head
        self.cfg = cfg
        self.tokens, self.positions = nn.Embedding(cfg.d_vocab, cfg.d_model), nn.Embedding(cfg.n_ctx, cfg.d_model)
        self.layers = nn.ModuleList()
        for _ in range(cfg.n_layers):
            layer = nn.ModuleDict({letter: nn.Linear(cfg.d_model, width) for letter in "qkv"})
            layer.update({"ln1": self.norm(), "o": nn.Linear(width, cfg.d_model)})
            if not cfg.attn_only:
                layer.update({"ln2": self.norm(), "up": nn.Linear(cfg.d_model, cfg.d_mlp)})
                layer["down"] = nn.Linear(cfg.d_mlp, cfg.d_model)
            self.layers.append(layer)
        self.last, self.logits = self.norm(), nn.Linear(cfg.d_model, cfg.d_vocab)

    def norm(self) -> nn.Module:
        return nn.LayerNorm(self.cfg.d_model) if self.cfg.normalization == "LN" else nn.Identity()

    def forward(self, tokens: Tensor, counter: Counter | None = None) -> Tensor:
        """The loss of predicting some tokens: with PyTorch's fused kernels, or with products that are counted."""
        linear = counter.linear if counter else usual_linear
        attention = counter.attention if counter else fused_attention
        batch, n_pos = tokens.shape
        resid = self.tokens(tokens) + self.positions(torch.arange(n_pos))
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            read = layer["ln1"](resid)
            q, k, v = (
                linear(layer[letter], read).reshape(batch, n_pos, self.cfg.n_heads, -1).transpose(1, 2)
                for letter in "qkv"
            )
            z = attention(q, k, v).transpose(1, 2).reshape(batch, n_pos, -1)
            resid = resid + linear(layer["o"], z)
            if not self.cfg.attn_only:
                neurons = F.gelu(linear(layer["up"], layer["ln2"](resid)), approximate="tanh")
                resid = resid + linear(layer["down"], neurons)
        return F.cross_entropy(linear(self.logits, self.last(resid)).flatten(0, 1), tokens.flatten())


# ---------------------------------------------------------------------------------------------------- flops_per_token


def counted_operations(cfg: TransformerConfig, n_ctx: int, batch: int = 2) -> int:
    """The operations per token of all matrix products in forward and backward."""
    model, tokens = FromTorch(cfg), torch.zeros(batch, n_ctx, dtype=torch.long)
    counter = Counter()
    model(tokens, counter).backward()
    return counter.operations // tokens.numel()


def operations(
    cfg: TransformerConfig,
    n_ctx: int,
    *,
    passes: int = 6,
    width: int | None = None,
    pairs: int | None = None,
    unembed: bool = True,
    lookups: bool = False,
    output: bool = True,
    mlp: bool | None = None,
) -> int:
    """Counts with things forgotten or misunderstood."""
    width = width or cfg.n_heads * cfg.d_head
    pairs = 2 * n_ctx if pairs is None else pairs
    mlp = not cfg.attn_only if mlp is None else mlp
    per_layer = (4 if output else 3) * cfg.d_model * width + pairs * width + mlp * 2 * cfg.d_model * cfg.d_mlp
    once = unembed * cfg.d_model * cfg.d_vocab + lookups * cfg.d_model * (cfg.d_vocab + cfg.n_ctx)
    return passes * (cfg.n_layers * per_layer + once)


def counting(**changes: Any) -> Callable[[TransformerConfig, int], int]:
    """A count with these changes; one that depends on the model or the sequence is a function of both."""

    def flops_per_token(cfg: TransformerConfig, n_ctx: int) -> int:
        worked_out = {name: value(cfg, n_ctx) if callable(value) else value for name, value in changes.items()}
        return operations(cfg, n_ctx, **worked_out)

    return flops_per_token


@may_change(GLOBAL_RANDOM)  # it may make a model, and count
@known_mistakes(
    {
        "a multiply-add is counted as one operation; it is two.": counting(passes=3),
        "only forward is counted; training goes backward as well.": counting(passes=2),
        "backward costs what forward does; it costs twice that.": counting(passes=4),
        "the unembedding is forgotten.": counting(unembed=False),
        "looking up embeddings counts as a product; it multiplies nothing.": counting(lookups=True),
        "attention's scores and mixtures are left out; only the weight matrices are counted.": counting(pairs=0),
        "half of attention's work is missing: scores and mixtures both count, over all `n_ctx` keys.": counting(
            pairs=lambda cfg, n_ctx: n_ctx
        ),
        "only the keys that a query may see are counted; the masked ones are computed too.": counting(
            pairs=lambda cfg, n_ctx: n_ctx + 1
        ),
        "attention is counted over `cfg.n_ctx` keys; the sequences here have `n_ctx` tokens.": counting(
            pairs=lambda cfg, n_ctx: 2 * cfg.n_ctx
        ),
        "the heads together are taken to be d_model wide; they are n_heads d_head.": counting(
            width=lambda cfg, n_ctx: cfg.d_model
        ),
        "`W_O` is forgotten.": counting(output=False),
        "the MLP is counted, which attention-only models do not have.": counting(mlp=True),
        "a whole sequence is counted; the question is about one token.": (
            lambda cfg, n_ctx: n_ctx * operations(cfg, n_ctx)
        ),
        "6 operations per parameter are counted: the rule of thumb, which takes lookups and biases for products "
        "and forgets attention's scores.": lambda cfg, n_ctx: 6 * sum(count_parameters(cfg).values()),
    }
)
def check_flops_per_token(fn: Callable[[TransformerConfig, int], int]) -> None:
    """Compare with a count of all products, for three shapes of model and sequences shorter than n_ctx."""
    for cfg, n_ctx in ((CFG, 14), (WIDE, 37), (ATTN_ONLY, 11)):
        call = f"flops_per_token({described(cfg)}, n_ctx={n_ctx})"
        agree("flops_per_token", call, whole(fn(cfg, n_ctx)), counted_operations(cfg, n_ctx))


def described(cfg: TransformerConfig) -> str:
    names = ["d_vocab", "n_ctx", "n_layers", "n_heads", "d_model", "d_head", "d_mlp"]
    sizes = ", ".join(f"{name}={getattr(cfg, name)}" for name in names)
    rest = ", attn_only=True" * cfg.attn_only + ', normalization="none"' * (cfg.normalization == "none")
    return f"cfg({sizes}{rest})"


def whole(value: Any) -> Any:
    """What is a whole number, as an int: 6.0 is as good as 6, and so is numpy's."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ------------------------------------------------------------------------------------------------------- memory_bytes

CLOSE = 0.03  # LayerNorm's scale and a few others are kept too: the statement leaves them out


def kept_for_backward(cfg: TransformerConfig, batch: int, n_ctx: int, dtype: torch.dtype) -> int:
    """The bytes that autograd keeps in one forward of PyTorch's own layers, its weights not counted."""
    model = FromTorch(cfg).to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens = torch.zeros(batch, n_ctx, dtype=torch.long)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and place not in weights:
            kept[place] = tensor  # also keeps the tensor alive, so that no other one gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def count_parameters(cfg: TransformerConfig) -> dict[str, int]:
    """How many parameters there are, by kind; from the shapes of PyTorch's own layers."""
    model = FromTorch(cfg)
    kinds = dict.fromkeys(("matrices", "biases", "norms", "positions", "embed"), 0)
    for name, parameter in model.named_parameters():
        if "ln" in name or "last" in name:
            kind = "norms"
        elif "bias" in name:
            kind = "biases"
        else:
            kind = {"tokens": "embed", "positions": "positions"}.get(name.split(".")[0], "matrices")
        kinds[kind] += parameter.numel()
    return kinds


def in_bytes(n_parameters: int, n_activations: int, size: int) -> dict[str, int]:
    """The right account of so many numbers."""
    counts = {"weights": 1, "gradients": 1, "optimizer": 2}
    return {what: n * n_parameters * size for what, n in counts.items()} | {"activations": n_activations * size}


def activation_numbers(cfg: TransformerConfig) -> dict[str, int]:
    """How many numbers a token keeps, by the statement of the exercise: what the mistakes begin from."""
    read = (2 if cfg.normalization == "LN" else 1) * cfg.d_model
    layer = (1 if cfg.attn_only else 2) * read + 4 * cfg.n_heads * cfg.d_head + (not cfg.attn_only) * 2 * cfg.d_mlp
    return {"in layers": cfg.n_layers * layer, "at the end": read + cfg.d_vocab}


def remembering(
    left_out: Callable[[TransformerConfig, int], int] = lambda cfg, n_ctx: 0,
    more: Callable[[TransformerConfig, int], int] = lambda cfg, n_ctx: 0,
    tokens: Callable[[TransformerConfig, int, int], int] = lambda cfg, batch, n_ctx: batch * n_ctx,
    size: int | None = None,
    instead: Callable[[int, int], dict[str, int]] = lambda n, size: {},
) -> Callable[..., dict[str, int]]:
    """An account with parameters left out, more numbers per token, other tokens, another size, or other entries."""

    def memory_bytes(cfg: TransformerConfig, batch: int, n_ctx: int, dtype: torch.dtype) -> dict[str, int]:
        n = sum(count_parameters(cfg).values()) - left_out(cfg, n_ctx)
        numbers = tokens(cfg, batch, n_ctx) * (sum(activation_numbers(cfg).values()) + more(cfg, n_ctx))
        return in_bytes(n, numbers, size or dtype.itemsize) | instead(n, dtype.itemsize)

    return memory_bytes


def without(kind: str) -> Callable[..., dict[str, int]]:
    return remembering(left_out=lambda cfg, n_ctx: count_parameters(cfg)[kind])


@may_change(GLOBAL_RANDOM)  # it may make a model, and count
@known_mistakes(
    {
        "every number has four bytes, whatever `dtype` is.": remembering(size=4),
        "numbers are counted, not bytes.": remembering(size=1),
        "the optimizer keeps one number per parameter; AdamW keeps two, the mean of the gradient and of its square.": (
            remembering(instead=lambda n, size: {"optimizer": n * size})
        ),
        "the optimizer keeps a copy of the weights as well; training in half precision may, AdamW does not.": (
            remembering(instead=lambda n, size: {"optimizer": 3 * n * size})
        ),
        "the moments of the optimizer are in float32; here they have the weights' dtype.": (
            remembering(instead=lambda n, size: {"optimizer": 8 * n})
        ),
        "the gradients are forgotten: there is one per parameter.": (
            remembering(instead=lambda n, size: {"gradients": 0})
        ),
        "the log-probabilities of the vocabulary are not among the activations.": (
            remembering(more=lambda cfg, n_ctx: -cfg.d_vocab)
        ),
        "the patterns are among the activations; fused attention does not keep them.": (
            remembering(more=lambda cfg, n_ctx: cfg.n_layers * cfg.n_heads * n_ctx)
        ),
        "q, k and v are among the activations, but z is not.": (
            remembering(more=lambda cfg, n_ctx: -cfg.n_layers * cfg.n_heads * cfg.d_head)
        ),
        "the activations are those of `cfg.n_ctx` tokens in each row; there are `n_ctx`.": (
            remembering(tokens=lambda cfg, batch, n_ctx: batch * cfg.n_ctx)
        ),
        "the activations are those of one row; there are `batch`.": remembering(tokens=lambda cfg, batch, n_ctx: n_ctx),
        "the activations are those of one layer.": (
            remembering(
                more=lambda cfg, n_ctx: -(cfg.n_layers - 1) * activation_numbers(cfg)["in layers"] // cfg.n_layers
            )
        ),
        "the activations are those of one token.": remembering(tokens=lambda cfg, batch, n_ctx: 1),
        "biases are not counted among the weights.": without("biases"),
        "the parameters of LayerNorm are not counted.": without("norms"),
        "the position embeddings are not counted among the weights.": without("positions"),
        "only one of `W_E` and `W_U` is counted among the weights; here they are two, and both take memory.": (
            without("embed")
        ),
        "there are `n_ctx` position embeddings; the model has `cfg.n_ctx` of them.": (
            remembering(left_out=lambda cfg, n_ctx: (cfg.n_ctx - n_ctx) * cfg.d_model)
        ),
    }
)
def check_memory_bytes(fn: Callable[[TransformerConfig, int, int, torch.dtype], dict[str, int]]) -> None:
    """Weights from the parameters of PyTorch's own layers, activations from what autograd keeps, in several dtypes."""
    cases = ((CFG, 3, 14, torch.float32), (ATTN_ONLY, 5, 11, torch.bfloat16), (WIDE, 1, 37, torch.float64))
    for cfg, batch, n_ctx, dtype in (*cases, (PLAIN, 2, 9, torch.float32)):
        activations = kept_for_backward(cfg, batch, n_ctx, dtype)
        weights = in_bytes(sum(count_parameters(cfg).values()), 0, dtype.itemsize)
        expected = weights | {"activations": activations}
        answer = fn(cfg, batch, n_ctx, dtype)
        if isinstance(answer, Mapping):
            answer = {what: whole(value) for what, value in answer.items()}
            estimate = answer.get("activations")
            if isinstance(estimate, int) and abs(estimate - activations) <= CLOSE * activations:
                answer["activations"] = activations
        call = f"memory_bytes({described(cfg)}, batch={batch}, n_ctx={n_ctx}, dtype={dtype})"
        agree("memory_bytes", call, answer, expected)


# -------------------------------------------------------------------------------------------------- average_gradients


def averaging(averages: Callable[[list[Tensor]], list[Tensor]]) -> Callable[..., list[dict[str, Tensor]]]:
    """Every name by itself: from what the ranks have to what each of them gets."""

    def average_gradients(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        columns = {name: averages([grads[name] for grads in grads_per_rank]) for name in grads_per_rank[0]}
        return [{name: values[rank] for name, values in columns.items()} for rank in range(len(grads_per_rank))]

    return average_gradients


def everywhere(average: Callable[[Tensor], Tensor]) -> Callable[..., list[dict[str, Tensor]]]:
    """All ranks get this, worked out from all of theirs, stacked."""
    return averaging(lambda own: [average(torch.stack(own)) for _ in own])


@known_mistakes(
    {
        "the gradients are added up, not averaged: the learning rate would depend on the number of ranks.": everywhere(
            lambda own: own.sum(0)
        ),
        "this rank keeps its own gradients; every rank needs the average, or their weights drift apart.": averaging(
            lambda own: [grad.clone() for grad in own]
        ),
        "every rank gets the gradients of rank 0; they are to be averaged.": everywhere(lambda own: own[0].clone()),
        "the sum is divided by the ranks twice.": everywhere(lambda own: own.mean(0) / len(own)),
        "all of a parameter's numbers are averaged together; average over the ranks only.": everywhere(
            lambda own: own.mean().expand(own.shape[1:])
        ),
    }
)
def check_average_gradients(fn: Callable[[list[dict[str, Tensor]]], list[dict[str, Tensor]]]) -> None:
    """Compare with a loop over every number, for three ranks and for one; nobody shares tensors."""
    name = "average_gradients"
    for n_ranks, dtype in ((3, torch.float32), (4, torch.float64), (1, torch.float32)):
        ranks = [
            {
                "b": noise(3, seed=10 * rank + 1).to(dtype),
                "W": noise(5, 2, seed=10 * rank).to(dtype).T,  # names in no alphabet, a matrix that lies transposed
                "scale": noise(seed=10 * rank + 2).to(dtype),
            }
            for rank in range(n_ranks)
        ]
        answer = fn(ranks)
        _check_form(name, answer, ranks)
        for key, axes in (("W", "d_model d_mlp"), ("b", "d_mlp"), ("scale", "")):
            mine = [grads[key] for grads in ranks]
            for rank, grads in reversed(list(enumerate(answer))):  # rank 0's own would look like rank 0's for all
                tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
                compare(f"{name}: rank {rank}'s `{key}`", grads[key], mean_by_loop(mine), axes, **tolerance)
        places = [tensor.data_ptr() for grads in (*answer, *ranks) for tensor in grads.values()]
        if len(set(places)) < len(places):
            raise CheckFailed(
                f"{name}: two ranks hold the very same tensor, or one of the input's: what one writes, the other sees."
                "\n  Next: give each rank a copy, as the exchange between machines does."
            )
    must_raise(name, ValueError, f"{name}([])", lambda: fn([]))
    uneven = [{"W": noise(2, 5)}, {"W": noise(2, 5), "b": noise(3)}]
    for order in (uneven, uneven[::-1]):
        call = f"{name} with ranks that have {' and '.join(str(list(grads)) for grads in order)}"
        must_raise(name, ValueError, call, lambda order=order: fn(order))  # type: ignore[misc]


def _check_form(name: str, answer: Any, ranks: list[dict[str, Tensor]]) -> None:
    """One dictionary per rank, with the names that it had."""
    if answer is None:
        raise CheckFailed(f"{name}: returned None.\n  Next: end the function with `return ...`.")
    if not isinstance(answer, list) or len(answer) != len(ranks):
        got = f"a list of {len(answer)}" if isinstance(answer, list) else f"a {type(answer).__name__}"
        raise CheckFailed(
            f"{name}: expected a list of {len(ranks)} dictionaries, one for each rank, got {got}.\n"
            "  Next: in the end every rank has its own copy of the averages."
        )
    for rank, (grads, before) in enumerate(zip(answer, ranks, strict=True)):
        if not isinstance(grads, Mapping) or grads.keys() != before.keys():
            got = f"those of {list(grads)}" if isinstance(grads, Mapping) else f"a {type(grads).__name__}"
            raise CheckFailed(
                f"{name}: rank {rank} should have the gradients of {list(before)}, but it has {got}.\n"
                "  Next: keep the names; only the values change."
            )
        if list(grads) != list(before):
            raise CheckFailed(
                f"{name}: the names of rank {rank} come in another order: {list(grads)} instead of {list(before)}.\n"
                "  Next: go through them as they stand in the input."
            )


def mean_by_loop(tensors: list[Tensor]) -> Tensor:
    """The mean over ranks, one number at a time."""
    flat = [tensor.flatten().tolist() for tensor in tensors]
    means = [sum(values) / len(values) for values in zip(*flat, strict=True)]
    return torch.tensor(means, dtype=tensors[0].dtype).reshape(tensors[0].shape)
