"""What the checks of using in chapter 09 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch09_dictionaries as ref
from course_utils.checks.ch09.using import along_rows, choosing, setting, writing
from tests.ch09 import other_dictionaries as other

SECRETS = ("logistic_probe(latents", "load_state_dict(weights")
ONLY_ON_GPU = "device"
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    # The file's look, and what it is encoded in here.
    "2 -> 1",
    "2 -> 3",
    "json.dumps(cfg, indent=2) -> json.dumps(cfg)",
    "(folder / 'cfg.json').read_text(encoding='utf-8') -> (folder / 'cfg.json').read_text()",
    # The first or the last of the kinds, by the alphabet.
    "sae.kind == 'batch_topk' -> sae.kind <= 'batch_topk'",
    "sae.kind == 'topk' -> sae.kind >= 'topk'",
    "kind == 'gated' -> kind <= 'gated'",
    # On a CPU the library does the same by itself.
    "weight.detach() -> weight",
    "weight.detach().cpu() -> weight.detach()",
    "weight.detach().cpu().float().clone() -> weight.detach().cpu().float()",
}


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "steer_with_latent": [
        (
            "values are wrong",
            setting(lambda d, x, latent, value, error: along_rows(d, x, latent, 2 * value + 1, error)),
        ),
        ("expected something that `with` can open", lambda *args, **kwargs: None),
    ],
    "sparse_probe": [
        ("wrong", choosing(lambda yes, no: yes.amax(0))),
        ("expected a tuple", lambda *args: ref.sparse_probe(*args)[0]),
    ],
    "save_for_saelens": [
        ("it wrote no", lambda dictionary, folder, model_name: None),
        ("wrong answer", writing(state=lambda cfg: cfg | {"dtype": "float64"})),
    ],
    "load_saelens": [
        ("expected a Dictionary", lambda folder: None),
        ("should raise ValueError", lambda folder: reads_anything(folder)),
    ],
}


def reads_anything(folder: Any) -> Any:
    from course_utils.checks.ch09.using import reading

    return reading(refuses=())(folder)


ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_what_is_written_is_read_again(tmp_path: Any) -> None:
    from solutions.ch06_superposition import SparseAutoencoder

    for kind in ("relu", "topk", "gated", "jumprelu"):
        sae = SparseAutoencoder(7, 11, kind, k=3, generator=torch.Generator().manual_seed(1)).eval()
        dictionary = ref.Dictionary(sae, "blocks.1.hook_resid_post", 2.5)
        ref.save_for_saelens(dictionary, tmp_path / kind, "tales")
        again = ref.load_saelens(tmp_path / kind)
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(again.encode(x), dictionary.encode(x))
        torch.testing.assert_close(again.decode(again.encode(x)), dictionary.decode(dictionary.encode(x)))
