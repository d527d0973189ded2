"""Checks of chapter 09, using: a latent set by hand, probes that see a few latents, and SAELens' files."""

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch09.quality import splicing
from course_utils.checks.ch09.small import D_MODEL, MLP_OUT, RESID, Fn, hooked, opened, padded, small_model
from course_utils.checks.comparing import compare, follows_input, parts, unchanged
from course_utils.checks.leftovers import assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Stop
from course_utils.checks.plain import agree, must_raise
from course_utils.checks.standins.small_dictionary import SmallDictionary, SmallSAE

# ---------------------------------------------------------------------------------------------------- steer_with_latent

New = Callable[[Any, Tensor, Any, float, bool], Tensor]


def along_rows(dictionary: Any, x: Tensor, latent: Any, value: float, with_error: bool) -> Tensor:
    """Without `splice`: move along the decoder's row by what the latent lacks."""
    latents, new = dictionary.encode(x), x.clone()
    if not with_error:
        new = dictionary.decode(latents)
    for each in [latent] if isinstance(latent, int) else latent:
        lacks = value - latents[..., each, None]
        new = new + lacks * dictionary.sae.W_dec[each] / dictionary.scale
    return new


def setting(new: New = along_rows, where: slice = slice(1, None)) -> Fn:
    def steer_with_latent(model: Any, dictionary: Any, latent: Any, value: float, with_error: bool = True) -> Any:
        def replace(d: Any, x: Tensor, edit: Any, error: bool) -> Tensor:
            return new(d, x, latent, value, with_error)

        return splicing(replace, where)(model, dictionary)

    return steer_with_latent


def added(dictionary: Any, x: Tensor, latent: Any, value: float, with_error: bool) -> Tensor:
    latents = dictionary.encode(x)
    changed = latents.clone()
    changed[..., latent] += value
    return dictionary.decode(changed) + with_error * (x - dictionary.decode(latents))


def alone(dictionary: Any, x: Tensor, latent: Any, value: float, with_error: bool) -> Tensor:
    latents = dictionary.encode(x)
    changed = torch.zeros_like(latents)
    changed[..., latent] = value
    return dictionary.decode(changed) + with_error * (x - dictionary.decode(latents))


def unscaled(dictionary: Any, x: Tensor, latent: Any, value: float, with_error: bool) -> Tensor:
    """The row is added in the autoencoder's units, not in the model's."""
    right = along_rows(dictionary, x, latent, value, with_error)
    start = x if with_error else dictionary.decode(dictionary.encode(x))
    return start + (right - start) * dictionary.scale


def without_bias(dictionary: Any, x: Tensor, latent: Any, value: float, with_error: bool) -> Tensor:
    return along_rows(dictionary, x, latent, value, with_error) - dictionary.sae.b_dec / dictionary.scale


def only_where_it_fires(dictionary: Any, x: Tensor, latent: Any, value: float, with_error: bool) -> Tensor:
    latents = dictionary.encode(x)
    changed = latents.clone()
    changed[..., latent] = torch.where(latents[..., latent] > 0, value, 0.0)
    return dictionary.decode(changed) + with_error * (x - dictionary.decode(latents))


@known_mistakes(
    {
        "the value is added to the latent; it takes the latent's place.": setting(added),
        "all other latents become 0; they keep what they have.": setting(alone),
        "the error is left out although `with_error` is True.": setting(
            lambda d, x, latent, value, error: along_rows(d, x, latent, value, False)
        ),
        "the error is always added.": setting(lambda d, x, latent, value, error: along_rows(d, x, latent, value, True)),
        "the latent is set where it fires only; set it at every position.": setting(only_where_it_fires),
        "the decoder's bias is taken out as well.": setting(without_bias),
        "it is done at the last position only.": setting(where=slice(-1, None)),
        "the begin token's activation is changed, too; it stays.": setting(where=slice(None)),
        "the latent is always set to 0, whatever the value.": setting(
            lambda d, x, latent, value, error: along_rows(d, x, latent, 0.0, error)
        ),
        "the scale is forgotten: a latent times its row is in the autoencoder's units.": setting(unscaled),
    }
)
def check_steer_with_latent(fn: Fn) -> None:
    """One latent and several, with and without the error; nothing stays behind."""
    name, model = "steer_with_latent", small_model()
    cases: list[tuple[str, Any, float, dict[str, Any]]] = [
        (RESID, 2, 1.5, {}),
        (MLP_OUT, 4, 0.0, {}),
        (RESID, 1, 2.0, {"with_error": False}),
        (MLP_OUT, [0, 3, 5], 0.0, {"with_error": False}),
        (RESID, [5, 1], -0.5, {"with_error": True}),
    ]
    for hook_name, latent, value, options in cases:
        dictionary = SmallDictionary(hook_name, D_MODEL)
        tokens, _ = padded((5, 5), 2)
        words = f"{name} at {hook_name}, latent {latent}, value {value}, {options}"
        with setting()(model, dictionary, latent, value, **options), torch.no_grad():
            right = model(tokens)
        with (
            nothing_left_behind(name, model),
            hooked(words),
            opened(name, fn(model, dictionary, latent, value, **options)),
            torch.no_grad(),
        ):
            actual = model(tokens)
        compare(words, actual, right, "batch pos d_vocab")

    def run() -> None:
        with fn(model, dictionary, 1, 1.0):
            raise Stop

    with nothing_left_behind(name, model):
        assert_stops(name, run, "the block")


# --------------------------------------------------------------------------------------------------------- sparse_probe

Choose = Callable[[Tensor, Tensor], Tensor]  # (yes rows, no rows) -> what the choice goes by, one number per latent


def difference(yes: Tensor, no: Tensor) -> Tensor:
    return (yes.sum(0) / len(yes) - no.sum(0) / len(no)).abs()


def logistic(x: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """To the minimum, by LBFGS in float64."""
    theta = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> Tensor:
        scores = x.double() @ theta[:-1] + theta[-1]
        data = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels.double())
        value = data + l2 / 2 * theta[:-1].square().sum()
        (theta.grad,) = torch.autograd.grad(value, theta)
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return theta[:-1].detach().to(x), theta[-1].detach().to(x)


def choosing(
    by: Choose = difference,
    weight: Callable[[float], float] = lambda l2: l2,
    inside: Callable[[Tensor, Tensor], Tensor] = lambda latents, chosen: latents[:, chosen],
    order: Callable[[Tensor], Tensor] = lambda chosen: chosen,
) -> Fn:
    def sparse_probe(latents: Tensor, labels: Tensor, k: int, l2: float) -> Any:
        values = by(latents[labels], latents[~labels])
        chosen = order(torch.tensor(sorted(range(len(values)), key=lambda i: -float(values[i]))[:k]))
        return chosen, *logistic(inside(latents, chosen), labels, weight(l2))

    return sparse_probe


@known_mistakes(
    {
        "the signed difference is taken; a latent that fires less counts as much.": choosing(
            lambda yes, no: yes.mean(0) - no.mean(0)
        ),
        "the latents with the largest means are chosen.": choosing(lambda yes, no: torch.cat([yes, no]).mean(0)),
        "the differences are divided by the spread; take them as they are.": choosing(
            lambda yes, no: difference(yes, no) / torch.cat([yes, no]).std(0)
        ),
        "the smallest differences are chosen.": choosing(lambda yes, no: -difference(yes, no)),
        "latents that fire at different rates are chosen; compare their means.": choosing(
            lambda yes, no: difference((yes > 0).float(), (no > 0).float())
        ),
        "the chosen ones are sorted by number; the largest difference comes first.": choosing(
            order=lambda chosen: chosen.sort().values
        ),
        "the probe is fitted on the first latents, not on the chosen ones.": choosing(
            inside=lambda latents, chosen: latents[:, : len(chosen)]
        ),
        "`l2` is ignored.": choosing(weight=lambda l2: 0.01),
    }
)
def check_sparse_probe(fn: Fn) -> None:
    """Latents that differ in both directions."""
    name = "sparse_probe"
    for n, n_latents, k, l2 in ((14, 6, 3, 0.2), (9, 4, 1, 0.5)):
        latents, labels = small_case(n, n_latents)
        words = f"{name} of {n} rows, {n_latents} latents, k={k}"
        with unchanged(name, latents=latents, labels=labels):
            answer = parts(words, fn(latents, labels, k, l2), "chosen", "direction", "bias")
        right = choosing()(latents, labels, k, l2)
        for label, actual, want, axes in zip(
            ("chosen", "direction", "bias"), answer, right, ("k", "k", ""), strict=True
        ):
            compare(f"{words}: {label}", actual, want, axes, rtol=1e-2, atol=1e-3)
    follows_input(name, lambda given: fn(given, labels, k, l2)[1], (latents,), "k")


def small_case(n: int, n_latents: int) -> tuple[Tensor, Tensor]:
    labels = noise(n, seed=n) > 0.1
    sizes = torch.tensor([0.5, 3.0, 1.0, 2.0, 0.7, 1.5])[:n_latents]
    shift = torch.tensor([0.6, -1.2, 0.9, 0.1, -0.8, 0.0])[:n_latents]
    return ((noise(n, n_latents, seed=n + 1) + labels[:, None] * shift + 0.6) * sizes).relu(), labels


# --------------------------------------------------------------------------------------- save_for_saelens, load_saelens

NAMES = {"relu": "standard", "topk": "topk", "batch_topk": "jumprelu", "gated": "gated", "jumprelu": "jumprelu"}
KINDS = tuple(NAMES)
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


def their_latents(cfg: Mapping[str, Any], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What SAELens 6 computes from such files."""
    projected = (x - weights["b_dec"]) @ weights["W_enc"]
    if cfg["architecture"] == "gated":
        magnitude = (x - weights["b_dec"]) @ (weights["W_enc"] * weights["r_mag"].exp()) + weights["b_mag"]
        return magnitude.relu() * (projected + weights["b_gate"] > 0)
    pre = projected + weights["b_enc"]
    if cfg["architecture"] == "topk":
        kept = pre.topk(cfg["k"], dim=-1)
        return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
    return pre.relu() * (pre > weights["threshold"]) if "threshold" in weights else pre.relu()


Weigh = Callable[[Any, float], dict[str, Tensor]]


def their_weights(sae: Any, scale: float) -> dict[str, Tensor]:
    weights = {"W_enc": sae.W_enc * scale, "W_dec": sae.W_dec / scale, "b_dec": sae.b_dec / scale}
    if sae.kind == "gated":
        return weights | {"b_gate": sae.b_enc, "r_mag": sae.r_mag, "b_mag": sae.b_mag}
    if sae.kind == "jumprelu":
        weights["threshold"] = sae.log_threshold.exp()
    if sae.kind == "batch_topk":
        weights["threshold"] = torch.full_like(sae.b_enc, float(sae.threshold))
    return weights | {"b_enc": sae.b_enc}


def writing(weigh: Weigh = their_weights, state: Callable[[dict[str, Any]], dict[str, Any]] = lambda cfg: cfg) -> Fn:
    def save_for_saelens(dictionary: Any, folder: Path, model_name: str) -> None:
        from safetensors.torch import save_file

        sae = dictionary.sae
        d_in, d_sae = sae.W_enc.shape
        cfg = {"architecture": NAMES[sae.kind], "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
        cfg |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
        named = {"model_name": model_name, "hook_name": dictionary.hook_name}
        cfg |= {"metadata": named | {"sae_lens_version": "6.0.0"}}
        cfg |= {"k": sae.k} if sae.kind == "topk" else {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(state(cfg)))
        weights = weigh(sae, dictionary.scale).items()
        save_file({key: weight.detach().float().clone().contiguous() for key, weight in weights}, folder / WEIGHTS)

    return save_for_saelens


def but(**changes: Callable[[Any, float], Tensor]) -> Weigh:
    """Their weights, some of them wrong."""

    def weigh(sae: Any, scale: float) -> dict[str, Tensor]:
        right = their_weights(sae, scale)
        return right | {key: change(sae, scale) for key, change in changes.items() if key in right}

    return weigh


@known_mistakes(
    {
        "the scale is left out of all weights.": writing(lambda sae, scale: their_weights(sae, 1.0)),
        "the scale goes into W_enc alone.": writing(
            but(W_dec=lambda sae, scale: sae.W_dec, b_dec=lambda sae, scale: sae.b_dec)
        ),
        "the scale is upside down.": writing(lambda sae, scale: their_weights(sae, 1 / scale)),
        "b_dec is not divided by the scale.": writing(but(b_dec=lambda sae, scale: sae.b_dec)),
        "b_enc is multiplied by the scale; with W_enc scaled it stays.": writing(
            but(b_enc=lambda sae, scale: sae.b_enc * scale)
        ),
        "`threshold` is the logarithm; SAELens wants the threshold itself.": writing(
            but(threshold=lambda sae, scale: sae.log_threshold if sae.kind == "jumprelu" else sae.threshold.expand(6))
        ),
        "W_enc is stored transposed.": writing(but(W_enc=lambda sae, scale: (scale * sae.W_enc).T)),
        "the name of our kind is written; SAELens has names of its own.": writing(
            state=lambda cfg: cfg | {"architecture": {"standard": "relu"}.get(cfg["architecture"], cfg["architecture"])}
        ),
        "`k` is missing for a topk.": writing(state=lambda cfg: {key: v for key, v in cfg.items() if key != "k"}),
        "the version is missing in the metadata: SAELens takes the file for an old one, and drops the names.": writing(
            state=lambda cfg: cfg | {"metadata": {k: v for k, v in cfg["metadata"].items() if k != "sae_lens_version"}}
        ),
        "the hook point's name is missing in the metadata.": writing(
            state=lambda cfg: cfg | {"metadata": {k: v for k, v in cfg["metadata"].items() if k != "hook_name"}}
        ),
    }
)
def check_save_for_saelens(fn: Fn) -> None:
    """The files of all five kinds: what stands in them, and what SAELens would compute from them."""
    from safetensors.torch import load_file

    name = "save_for_saelens"
    for number, kind in enumerate(KINDS):
        dictionary = SmallDictionary(MLP_OUT, D_MODEL, kind=kind, scale=0.4 + number).eval()
        dictionary.sae.W_enc.data = dictionary.sae.W_enc.data.T.contiguous().T  # as chapter 06 makes it
        if kind == "gated":
            dictionary.double()
        with tempfile.TemporaryDirectory() as temporary:
            folders = [Path(temporary) / "deep" / "right", Path(temporary) / "deeper" / "own"]
            if number % 2:
                folders[1].mkdir(parents=True)
            writing()(dictionary, folders[0], "small")
            fn(dictionary, folders[1], "small")
            missing = [file for file in (CONFIG, WEIGHTS) if not (folders[1] / file).exists()]
            if missing:
                raise CheckFailed(f"{name}: it wrote no {missing[0]}.\n  Next: write both files into the folder.")
            cfgs = [json.loads((folder / CONFIG).read_text()) for folder in folders]
            files = [load_file(folder / WEIGHTS) for folder in folders]
        agree(name, f"{CONFIG} of a {kind}", cfgs[1], cfgs[0])
        agree(name, f"names in {WEIGHTS} of a {kind}", sorted(files[1]), sorted(files[0]))
        for label, weight in sorted(files[0].items(), reverse=True, key=lambda item: item[0] == "W_enc"):
            axes = {
                1: "d_in" if label == "b_dec" else "latent",
                2: "d_in latent" if label == "W_enc" else "latent d_in",
            }
            compare(f"{name}: {label} of a {kind}", files[1][label], weight, axes[weight.dim()])
        x = noise(4, D_MODEL, seed=5)
        theirs = their_latents(cfgs[1], files[1], x)
        compare(f"{name}: SAELens' latents of a {kind}", theirs, dictionary.float().encode(x), "token latent")


def reading(
    change: Callable[[Any, dict[str, Any]], None] = lambda sae, cfg: None,
    scale: float = 1.0,
    hook: str = "hook_name",
    refuses: tuple[str, ...] = ("architecture", "normalize_activations", "apply_b_dec_to_input"),
) -> Fn:
    def load_saelens(folder: Path) -> Any:
        from safetensors.torch import load_file

        cfg, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        known: dict[str, tuple[Any, ...]] = {"normalize_activations": ("none",), "apply_b_dec_to_input": (True,)}
        known["architecture"] = ("standard", "topk", "gated", "jumprelu")
        if any(cfg[key] not in known[key] for key in refuses):
            raise ValueError(cfg)
        kind = {"standard": "relu"}.get(cfg["architecture"], cfg["architecture"])
        dictionary = SmallDictionary(cfg["metadata"][hook], cfg["d_in"], cfg["d_sae"], kind, scale)
        weights = {{"b_gate": "b_enc", "threshold": "log_threshold"}.get(key, key): w for key, w in weights.items()}
        if "log_threshold" in weights:
            weights["log_threshold"] = weights["log_threshold"].log()
        dictionary.sae.load_state_dict(weights)
        dictionary.sae.k = cfg.get("k", 1)
        with torch.no_grad():
            change(dictionary.sae, cfg)
        return dictionary.eval()

    return load_saelens


def threshold_as_logarithm(sae: Any, cfg: dict[str, Any]) -> None:
    if sae.kind == "jumprelu":
        sae.log_threshold.copy_(sae.log_threshold.exp())


def without_magnitude(sae: Any, cfg: dict[str, Any]) -> None:
    if sae.kind == "gated":
        sae.b_mag.zero_()


def without_gate(sae: Any, cfg: dict[str, Any]) -> None:
    if sae.kind == "gated":
        sae.b_enc.zero_()


def k_of_one(sae: Any, cfg: dict[str, Any]) -> None:
    sae.k = 1


def as_relu(sae: Any, cfg: dict[str, Any]) -> None:
    sae.kind = "relu" if sae.kind == "topk" else sae.kind


def own_weights(sae: Any, cfg: dict[str, Any]) -> None:
    d_in, d_sae = sae.W_enc.shape
    sae.W_enc.copy_(SmallSAE(d_in, d_sae, "relu").W_enc)


@known_mistakes(
    {
        "`threshold` is taken for its logarithm.": reading(threshold_as_logarithm),
        "`k` is not read.": reading(k_of_one),
        "every dictionary is taken for a relu, also a topk.": reading(as_relu),
        "`b_mag` is not read.": reading(without_magnitude),
        "`b_gate` is not read: it is our b_enc.": reading(without_gate),
        "the weights are not loaded.": reading(own_weights),
        "the hook point is the name of the model.": reading(hook="model_name"),
        "the scale is not 1, although the weights hold it already.": reading(scale=0.5),
    }
)
def check_load_saelens(fn: Fn) -> None:
    """Files that the check wrote: what comes of them, and what is to be refused."""
    name = "load_saelens"
    with tempfile.TemporaryDirectory() as temporary:
        for number, kind in enumerate(KINDS):
            if kind == "batch_topk":
                continue
            d_in = D_MODEL + number
            written = SmallDictionary(MLP_OUT if number else RESID, d_in, 6 - number, kind, scale=0.6 + number)
            if kind == "gated":
                written.sae.b_mag.data += 1  # so that what the gate lets through is seen
            folder = Path(temporary) / kind
            writing()(written, folder, "small")
            loaded = fn(folder)
            if not all(hasattr(loaded, part) for part in ("encode", "decode", "hook_name", "scale", "sae")):
                raise CheckFailed(f"{name}: expected a Dictionary.\n  Next: return Dictionary(sae, hook_name, 1.0).")
            agree(name, f"`hook_name` of a {kind}", loaded.hook_name, written.hook_name)
            agree(name, f"`scale` of a {kind}", float(loaded.scale), 1.0)
            agree(name, f"`k` of a {kind}", loaded.sae.k, written.sae.k if kind == "topk" else 1)
            x = noise(90, d_in, seed=number)
            latents = written.encode(x)
            compare(f"{name}: latents of a {kind}", loaded.encode(x), latents, "token latent")
            compare(
                f"{name}: reconstruction of a {kind}", loaded.decode(latents), written.decode(latents), "token d_in"
            )
            agree(name, f"`training` of a {kind}", loaded.sae.training, False)
        _refuses(name, fn, folder)


def _refuses(name: str, fn: Fn, folder: Path) -> None:
    cfg = json.loads((folder / CONFIG).read_text())
    changes: list[dict[str, Any]] = [
        {"architecture": "matching_pursuit"},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "whitening"},
        {"apply_b_dec_to_input": False},
    ]
    for change in changes:
        (folder / CONFIG).write_text(json.dumps(cfg | change))
        must_raise(name, ValueError, f"a cfg.json with {change}", partial(fn, folder))
