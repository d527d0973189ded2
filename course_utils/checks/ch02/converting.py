"""What every converter of weights is held to, and converters that make one entry in another way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from course_utils.checks.comparing import compare
from course_utils.checks.mistakes import same
from course_utils.checks.outcomes import CheckFailed
from course_utils.config import TransformerConfig

Converter = Callable[[dict[str, Tensor], TransformerConfig], dict[str, Tensor]]

CONVERTED_AXES = {
    "W_E": "d_vocab d_model",
    "W_pos": "pos d_model",
    "w": "d_model",
    "b": "d_model",
    **{f"W_{letter}": "head d_model d_head" for letter in "QKV"},
    **{f"b_{letter}": "head d_head" for letter in "QKV"},
    "W_O": "head d_head d_model",
    "b_O": "d_model",
    "W_gate": "d_model d_mlp",
    "W_in": "d_model d_mlp",
    "b_in": "d_mlp",
    "W_out": "d_mlp d_model",
    "b_out": "d_model",
    "W_U": "d_model d_vocab",
    "b_U": "d_vocab",
}


def judge_converted(
    name: str, fn: Callable[..., Any], cfg: TransformerConfig, theirs: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """The converter returns the expected entries, no more and no fewer."""
    ours = fn(theirs, cfg)
    if not isinstance(ours, Mapping):
        got = "None" if ours is None else f"a {type(ours).__name__}"
        raise CheckFailed(f"{name}: expected a dict, got {got}.\n  Next: return the new dict.")
    for what, names in (
        ("has no entry", [n for n in expected if n not in ours]),
        ("has an entry that our Transformer does not know,", [n for n in ours if n not in expected]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckFailed(
                f"{name}: the result {what} `{names[0]}`{more}.\n"
                "  Next: compare with the names in Transformer(cfg).state_dict()."
            )
    for entry, weight in expected.items():
        try:
            compare(f"{name}: `{entry}`", ours[entry], weight, _axes(entry))
        except CheckFailed as failure:
            others = [other for other, its_weight in expected.items() if same(ours[entry], its_weight)]
            if others:
                raise CheckFailed(f"{failure.message}\n  It holds what belongs in `{others[0]}`.") from None
            raise
    doubled = fn({entry: tensor.double() for entry, tensor in theirs.items()}, cfg)
    for entry, weight in expected.items():
        compare(f"{name} with weights in float64, `{entry}`", doubled[entry], weight.double(), _axes(entry))


def _axes(entry: str) -> str:
    return CONVERTED_AXES[entry.split(".")[-1]]


def wrong_entries(
    right: Converter,
    entries: Sequence[str],
    source: str,
    sentence: str,
    view: Callable[[Tensor, TransformerConfig, int], Tensor],
) -> dict[str, Converter]:
    """For each of these entries, the converter that makes it from `source` by `view(weight, cfg, number)`.

    The sentence that names the mistake has a place for the entry's symbol.
    """

    def wrong(number: int, entry: str) -> Converter:
        def convert(state_dict: dict[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
            views = {
                f"blocks.{layer}.{entry}": view(state_dict[source.format(layer)], cfg, number)
                for layer in range(cfg.n_layers)
            }
            return right(state_dict, cfg) | views

        return convert

    return {sentence.format(f"`{entry.split('.')[-1]}`"): wrong(number, entry) for number, entry in enumerate(entries)}
