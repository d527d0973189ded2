"""Right answers of chapter 09 in another style."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import solutions.ch09_dictionaries as ref
from course_utils.hooks import HookPoint, hooks
from solutions.ch06_superposition import SparseAutoencoder, auxiliary_topk_loss
from solutions.ch07_probes import logistic_probe


@torch.no_grad()
def token_activations(model: Any, tokens: Tensor, mask: Tensor, hook_name: str) -> Tensor:
    found: list[Tensor] = []
    with hooks(model, {hook_name: lambda activation, hook: found.append(activation.clone())}):
        model(tokens)
    return torch.cat([rows[1 : int(n)] for rows, n in zip(found[0], mask.sum(1), strict=True)])


def norm_scale(activations: Tensor) -> float:
    lengths = torch.linalg.vector_norm(activations.double(), dim=1)
    return float(activations.shape[1] ** 0.5 / lengths.mean())


class ActivationBuffer:
    """Keeps the order as a permutation, and takes from its end."""

    def __init__(
        self,
        model: Any,
        batches: Iterable[Any],
        hook_name: str,
        n_tokens: int,
        generator: torch.Generator,
        scale: float | None = None,
    ) -> None:
        self.get = lambda batch: token_activations(model, *batch, hook_name)
        self.batches, self.n_tokens, self.generator = iter(batches), n_tokens, generator
        self.rows, self.order, self.used = torch.zeros(0, model.cfg.d_model), torch.zeros(0).long(), 0
        self._read(n_tokens)
        self.scale = scale or norm_scale(self.rows)

    def _read(self, n: int) -> None:
        rows = self.rows[self.order]
        for batch in self.batches:
            self.used += 1
            rows = torch.cat([rows, self.get(batch)])
            if len(rows) >= n:
                break
        self.rows, self.order = rows, torch.rand(len(rows), generator=self.generator).argsort()

    def next(self, n: int) -> Tensor:
        if len(self.order) < n or len(self.order) * 2 < self.n_tokens:
            self._read(max(n, self.n_tokens))
        if len(self.order) == 0:
            raise StopIteration
        taken, self.order = self.order[-n:], self.order[:-n]
        return self.rows[taken].mul(self.scale)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.rows[self.order], "used": self.used, "scale": self.scale, "g": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        while self.used < state["used"]:
            next(self.batches)
            self.used += 1
        self.rows, self.order, self.scale = state["kept"], torch.arange(len(state["kept"])), state["scale"]
        self.generator.set_state(state["g"])


def fit_dictionary(
    sae: Any,
    batch: Callable[[], Tensor],
    steps: int,
    peak: float = 1e-3,
    sparsity: float = 0.0,
    warm_up: int = 50,
    window: int = 50,
    auxiliary: float = 0.0,
    keep: Sequence[int] = (),
) -> Any:
    """With torch's scheduler, and the steps at which latents last fired."""
    optimizer = torch.optim.AdamW(sae.train().parameters(), lr=peak, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, 5 * (steps - s) / steps, 1.0)
    )
    last = torch.full_like(sae.b_enc, -1.0)
    losses, deads, snapshots = [], [], {}
    for s in range(steps):
        x = batch()
        if not losses:
            sae.b_dec.data.copy_(x.mean(0))
        loss, pre, latents, reconstruction = ref.dictionary_pass(sae, x, sparsity * min(1.0, 5 * (s + 1) / steps))
        last[latents.gt(0).any(0)] = s
        dead = s - last > window
        losses.append(loss.item())
        deads.append(int(dead.sum()))
        if auxiliary:
            loss = loss + auxiliary * auxiliary_topk_loss(x, reconstruction, pre, dead, sae.W_dec, 32)
        optimizer.zero_grad()
        loss.backward()
        rows = sae.W_dec.data / sae.W_dec.data.norm(dim=1, keepdim=True)
        sae.W_dec.grad -= (sae.W_dec.grad * rows).sum(1, keepdim=True) * rows
        optimizer.step()
        schedule.step()
        sae.W_dec.data = nn.functional.normalize(sae.W_dec.data, dim=1)
        if s + 1 in keep:
            snapshots[s + 1] = {name: weight.detach().clone() for name, weight in sae.state_dict().items()}
    sae.eval()
    return SimpleNamespace(losses=losses, dead=deads, snapshots=snapshots)


def firing_rates(chunks: Iterable[Tensor]) -> Tensor:
    counted = [(latents.gt(0).to(latents).mean(0), len(latents)) for latents in chunks]
    total = sum(n for _, n in counted)
    return torch.stack([rate * n / total for rate, n in counted]).sum(0)


def explained_variance(x: Tensor, reconstruction: Tensor) -> Tensor:
    variance = x.var(dim=0, correction=0).sum()
    return (variance - (x - reconstruction).pow(2).mean(0).sum()) / variance


@contextmanager
def splice(model: Any, dictionary: Any, edit: Any = None, with_error: bool = False) -> Iterator[None]:
    def change(activation: Tensor, hook: HookPoint) -> Tensor:
        out = activation.clone()
        latents = dictionary.encode(activation)
        plain = dictionary.decode(latents)
        new = plain if edit is None else dictionary.decode(edit(latents))
        out[:, 1:] = (activation + new - plain if with_error else new)[:, 1:]
        return out

    handle = model.get_submodule(dictionary.hook_name).add(change)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def loss_recovered(
    model: Any, dictionary: Any, tokens: Tensor, mask: Tensor, baseline: str = "mean"
) -> dict[str, float]:
    held = {"mean": token_activations(model, tokens, mask, dictionary.hook_name).mean(0)}
    held["zero"] = torch.zeros_like(held["mean"])
    if baseline not in held:
        raise ValueError(baseline)
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)

    def loss() -> float:
        return float(nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), targets.flatten()))

    def ablate(activation: Tensor, hook: HookPoint) -> Tensor:
        at_begin = torch.arange(activation.shape[1])[:, None] == 0
        return torch.where(at_begin, activation, held[baseline])

    clean = loss()
    with splice(model, dictionary):
        spliced = loss()
    with hooks(model, {dictionary.hook_name: ablate}):
        ablated = loss()
    recovered = 1 - (spliced - clean) / (ablated - clean)
    return {"recovered": recovered, "clean": clean, "spliced": spliced, "ablated": ablated}


def top_examples(chunks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    best: list[tuple[Tensor, Tensor]] = []
    n = 0
    for chunk in chunks:
        values, rows = chunk.sort(dim=0, descending=True)
        best.append((values[:k].clone(), rows[:k] + n))
        n += len(chunk)
        values, places = (torch.cat(both) for both in zip(*best, strict=True))
        order = values.argsort(dim=0, descending=True)[:k]
        best = [(values.gather(0, order), places.gather(0, order))]
    return best[0]


def activation_histogram(chunks: Iterable[Tensor], edges: Tensor) -> Tensor:
    """How many are below each edge, and the differences."""
    below, total = None, 0
    for chunk in chunks:
        counts = (chunk[:, :, None] < edges[1:-1]).sum(0)
        below = counts if below is None else below + counts
        total += len(chunk)
    assert below is not None
    ends = torch.zeros(len(below), 1, dtype=torch.int64)
    return torch.cat([ends, below, ends + total], dim=1).diff(dim=1)


def logit_effect(model: Any, directions: Tensor) -> Tensor:
    """All as one matrix."""
    n = directions.shape[1]
    matrix = model.unembed.W_U - model.unembed.W_U.mean(1, keepdim=True)
    if model.cfg.normalization != "none":
        matrix = model.ln_final.w[:, None] * matrix
    if model.cfg.normalization == "LN":
        matrix = (torch.eye(n).to(directions) - 1 / n) @ matrix
    return directions @ matrix


@torch.no_grad()
def direct_feature_attribution(model: Any, dictionary: Any, tokens: Tensor, latent: int, query: int) -> Tensor:
    block = dictionary.hook_name.rpartition(".")[0]
    seen: dict[str, Tensor] = {}
    with hooks(model, {f"{block}.attn.hook_[vp]*": lambda activation, hook: seen.update({hook.name: activation[0]})}):
        model(tokens.unsqueeze(0))
    weighted = seen[f"{block}.attn.hook_pattern"][:, query, :, None] * seen[f"{block}.attn.hook_v"].transpose(0, 1)
    written = weighted @ model.get_submodule(f"{block}.attn").W_O
    return (written * dictionary.scale) @ dictionary.sae.W_enc[:, latent]


def best_f1(activations: Tensor, labels: Tensor, shares: Sequence[float]) -> Tensor:
    best = activations.new_zeros(labels.shape[1], activations.shape[1])
    for share in shares:
        says = activations > share * activations.max(dim=0).values
        for fact, true in enumerate(labels.T):
            both = (says & true[:, None]).sum(0).to(best)
            precision = both / says.sum(0).clamp(min=1)
            recall = both / true.sum().clamp(min=1)
            best[fact] = best[fact].maximum((2 * precision * recall / (precision + recall)).nan_to_num())
    return best


def explain(fires: Tensor, facts: Tensor, n_questions: int) -> Any:
    """With numpy, fact by fact."""
    y, x = fires.numpy(), facts.numpy()

    def impurity(part: Any) -> float:
        return float(len(part) * part.mean() * (1 - part.mean())) if len(part) else 0.0

    def grow(rows: Any, left: int) -> Any:
        share = float(y[rows].mean()) if len(rows) else 0.0
        if not left or not x.shape[1]:
            return share
        costs = [impurity(y[rows[x[rows, f]]]) + impurity(y[rows[~x[rows, f]]]) for f in range(x.shape[1])]
        best = int(np.argmin(np.round(costs, 9)))
        if impurity(y[rows]) - costs[best] < 1e-6:
            return share
        return best, grow(rows[~x[rows, best]], left - 1), grow(rows[x[rows, best]], left - 1)

    return grow(np.arange(len(y)), n_questions)


def rates_of(said: Tensor, true: Tensor) -> float:
    yes = said[true].double().mean() if true.any() else torch.tensor(0.5)
    no = (~said[~true]).double().mean() if (~true).any() else torch.tensor(0.5)
    return float(yes + no) / 2


def detection_score(predicted: Tensor, fires: Tensor, text: Tensor) -> float:
    _, number = text.unique(return_inverse=True)
    n = int(number.max()) + 1
    counts = [torch.zeros(n).index_add(0, number, marks.float()) > 0 for marks in (predicted, fires)]
    return rates_of(*counts)


def fuzzing_score(predicted: Tensor, fires: Tensor, text: Tensor) -> float:
    there = (text[:, None] == text[fires]).any(1)
    return rates_of(predicted[there], fires[there])


@contextmanager
def steer_with_latent(
    model: Any, dictionary: Any, latent: Any, value: float, with_error: bool = True
) -> Iterator[None]:
    """A mask over the latents."""
    chosen = torch.zeros(dictionary.sae.W_dec.shape[0], dtype=torch.bool)
    chosen[torch.tensor(latent)] = True
    with ExitStack() as stack:
        stack.enter_context(splice(model, dictionary, lambda z: torch.where(chosen, value, z), with_error))
        yield


def sparse_probe(latents: Tensor, labels: Tensor, k: int, l2: float) -> tuple[Tensor, Tensor, Tensor]:
    sign = torch.where(labels, 1 / labels.sum(), -1 / (~labels).sum()).to(latents)
    chosen = (sign @ latents).abs().sort(descending=True).indices[:k]
    return chosen, *logistic_probe(latents.index_select(1, chosen), labels, l2)


def save_for_saelens(dictionary: Any, folder: Path, model_name: str) -> None:
    from safetensors.torch import save

    sae, s = dictionary.sae, dictionary.scale
    state = {name: weight.detach().float() for name, weight in sae.state_dict().items()}
    state |= {"W_enc": state["W_enc"] * s, "b_dec": state["b_dec"] / s, "W_dec": state["W_dec"] / s}
    if sae.kind == "gated":
        state["b_gate"] = state.pop("b_enc")
    if sae.kind == "jumprelu":
        state["threshold"] = state.pop("log_threshold").exp()
    if sae.kind == "batch_topk":
        state["threshold"] = state["threshold"].repeat(len(state["b_enc"]))
    cfg: dict[str, Any] = {"d_in": len(state["b_dec"]), "d_sae": len(state["W_dec"])}
    cfg["architecture"] = {"relu": "standard", "batch_topk": "jumprelu"}.get(sae.kind, sae.kind)
    cfg |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none"}
    cfg |= {"reshape_activations": "none", "metadata": {"model_name": model_name, "hook_name": dictionary.hook_name}}
    cfg["metadata"]["sae_lens_version"] = "6.0.0"
    cfg |= {"k": sae.k} if cfg["architecture"] == "topk" else {}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cfg.json", "w") as file:
        json.dump(cfg, file)
    contiguous = {name: weight.contiguous() for name, weight in state.items()}
    (folder / "sae_weights.safetensors").write_bytes(save(contiguous))


def load_saelens(folder: Path) -> Any:
    from safetensors import safe_open

    cfg = json.loads((folder / "cfg.json").read_bytes())
    kinds = {"standard": "relu", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu"}
    if cfg["architecture"] not in kinds or cfg["normalize_activations"] != "none" or not cfg["apply_b_dec_to_input"]:
        raise ValueError(str(cfg))
    sae = SparseAutoencoder(
        cfg["d_in"], cfg["d_sae"], kinds[cfg["architecture"]], k=cfg.get("k", 1), generator=torch.Generator()
    )
    with safe_open(folder / "sae_weights.safetensors", "pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 (no mapping)
            weight = file.get_tensor(name)
            if name == "threshold":
                name, weight = "log_threshold", weight.log()
            getattr(sae, "b_enc" if name == "b_gate" else name).copy_(weight)
    sae.eval()
    return ref.Dictionary(sae, cfg["metadata"]["hook_name"], 1.0)
