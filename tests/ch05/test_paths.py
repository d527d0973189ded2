"""What the checks of this section cannot know: see tests/test_checks.py. Then the reference, on a real model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch02_transformer as ch02
import solutions.ch05_patching as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch05 import paths
from course_utils.checks.ch05.path_loops import fix, over_paths, path_scores
from course_utils.checks.ch05.paths import (
    sending,
)
from course_utils.config import TransformerConfig
from course_utils.hooks import run_with_cache, run_with_hooks
from tests.ch05 import other_paths as other
from tests.ch05 import subtle, unusual
from tests.ch05.conftest import metric, with_random_parameters
from tests.ch05.spoiling import added, leaving_a_hook, mean_of_prompts, with_a_graph

SECRETS = ("einsum(", ".repeat(", "run_with_cache(")


def of_zeros(model: Any, tokens: Any, fixed: Any, receivers: Any) -> Any:
    return over_paths(model, tokens, {name: torch.zeros_like(held) for name, held in fixed.items()}, receivers)


def empties_fixed(model: Any, tokens: Any, fixed: Any, receivers: Any) -> Any:
    logits = ref.run_over_direct_paths(model, tokens, fixed, receivers)
    fixed.clear()
    return logits


def writes_into_fixed(model: Any, tokens: Any, fixed: Any, receivers: Any) -> Any:
    logits = ref.run_over_direct_paths(model, tokens, fixed, receivers)
    next(iter(fixed.values()))[0, 0] = 0
    return logits


def first_run(model: Any, tokens: Any, fixed: Any, receivers: Any) -> Any:
    with torch.no_grad():
        return run_with_hooks(model, tokens, hooks=dict.fromkeys(fixed, lambda activation, hook: fixed[hook.name]))


def with_fixed(change: Callable[..., None]) -> Callable[..., Any]:
    """A path_patch that changes what it holds; `change` gets it, the senders, and what the corrupted run saw."""

    def path_patch(
        model: Any, clean: Any, corrupted: Any, senders: Any, receivers: Any, metric: Any, freeze_mlps: bool = True
    ) -> Any:
        fixed = fix(model, clean, corrupted, senders, freeze_mlps)
        change(fixed, senders, model.seen(corrupted))
        return metric(over_paths(model, clean, fixed, receivers))

    return path_patch


def sends(change: Callable[[Any], Any]) -> Callable[..., None]:
    def put(fixed: Any, senders: Any, source: Any) -> None:
        for layer, head in senders:
            name = f"blocks.{layer}.attn.hook_z"
            fixed[name][:, :, head] = change(source[name][:, :, head])

    return put


def corrupted_mlps(fixed: Any, senders: Any, source: Any) -> None:
    fixed.update({name: source[name] for name in fixed if "mlp" in name})


def last_position_sent(model: Any, clean: Any, corrupted: Any, *rest: Any, freeze_mlps: bool = True) -> Any:
    """Where nothing moves between positions that is the same as a last position that receives."""
    fixed, held = (fix(model, clean, corrupted, senders, freeze_mlps) for senders in (rest[0], []))
    for name in fixed:
        fixed[name][:, :-1] = held[name][:, :-1]
    return rest[2](over_paths(model, clean, fixed, rest[1]))


def refuses_late(model: Any, clean: Any, *rest: Any, **options: Any) -> Any:
    with torch.no_grad():
        model(clean)
    return ref.path_patch(model, clean, *rest, **options)


def empties_senders(
    model: Any, clean: Any, corrupted: Any, senders: Any, receivers: Any, metric: Any, freeze_mlps: bool = True
) -> Any:
    answer = ref.path_patch(model, clean, corrupted, senders, receivers, metric, freeze_mlps)
    senders.clear()
    return answer


def with_rows(rows: Callable[[int, int], int]) -> Callable[..., Any]:
    """A path_patch_heads that takes another number of rows."""

    def path_patch_heads(
        model: Any, clean: Any, corrupted: Any, to: Any, metric: Any, freeze_mlps: bool = True, max_rows: int = 64
    ) -> Any:
        return ref.path_patch_heads(model, clean, corrupted, to, metric, freeze_mlps, rows(max_rows, len(clean)))

    return path_patch_heads


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "run_over_direct_paths": [
        ("values are wrong", of_zeros),
        ("values are wrong", partial(over_paths, put=mean_of_prompts)),
        ("values are wrong", partial(over_paths, put=added)),
        ("a hook is left behind", leaving_a_hook(ref.run_over_direct_paths)),
        ("gradients are recorded", with_a_graph(ref.run_over_direct_paths)),
        ("it changed `fixed`", empties_fixed),
        ("it changed `fixed[", writes_into_fixed),
    ],
    "path_patch": [
        ("should raise ValueError", path_scores),
        ("Next: call `refuse_unknown(model, senders, receivers)` first", path_scores),
        ("it ran the model before", refuses_late),
        ("a hook is left behind", leaving_a_hook(ref.path_patch)),
        ("gradients are recorded", with_a_graph(ref.path_patch)),
        ("values are wrong", with_fixed(sends(torch.zeros_like))),
        ("values are wrong", with_fixed(sends(lambda z: z.mean(0, keepdim=True)))),
        ("wrong", with_fixed(corrupted_mlps)),
        ("it changed `senders`", empties_senders),
    ],
    "path_patch_heads": [
        ("should raise ValueError", sending()),
        ("Next: call `refuse_unknown(model, [], receivers)` first", sending()),
        ("one forward had", with_rows(lambda max_rows, n_batch: max_rows * n_batch)),
        ("forwards for", with_rows(lambda max_rows, n_batch: 1)),
        ("values are wrong", sending(reduce=torch.max)),
        ("values are wrong", sending(then=lambda table, base: table.flip(0))),
    ],
}

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "activation.clone() -> activation",  # of this run, or of a cache that nobody else has
    "run_with_cache(model, tokens, names=names) -> run_with_cache(model, tokens)",  # keeps more
    "name == 'final' -> name >= 'final'",  # the others begin with "blocks"
    "... if head is None else (slice(None), slice(None), head) -> (slice(None), slice(None), head)",  # an axis of 1
}
ONLY_ON_GPU = "device"


@pytest.mark.parametrize(
    ("exercise", "sentence", "answer"),
    [
        ("run_over_direct_paths", "the activations are still fixed in the second run", first_run),
        ("run_over_direct_paths", "only the last receiver of each hook point", subtle.direct_paths_to_one_each),
        ("path_patch", "only the last position is sent, or receives", last_position_sent),
    ],
)
def test_a_mistake_made_in_another_way_has_the_same_cause(exercise: str, sentence: str, answer: Any) -> None:
    with pytest.raises(CheckFailed, match=f"This is what you get if {sentence}"):
        run_check(getattr(paths, f"check_{exercise}"), answer)


# ---------------------------------------------------------------------------------- the reference, on a real model

SOLUTIONS = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
CLEAN, CORRUPTED = torch.randint(31, (2, 3, 6), generator=torch.Generator().manual_seed(3))


def random_model(make: Callable[..., nn.Module], **sizes: Any) -> nn.Module:
    cfg = {"d_vocab": 31, "n_ctx": 17, "n_layers": 3, "n_heads": 4, "d_model": 20, "d_head": 5, "d_mlp": 24}
    return with_random_parameters(make(TransformerConfig(**(cfg | sizes))))


@SOLUTIONS
@pytest.mark.parametrize("layer", [0, 2])
def test_direct_effect_is_what_the_head_writes(module: Any, make: Any, layer: int) -> None:
    """Without MLPs: the change of z, through W_O, added to the last stream; then LayerNorm and unembedding."""
    model = random_model(make, attn_only=True, d_mlp=0)
    with torch.no_grad():
        (_, own), (_, source) = (run_with_cache(model, tokens) for tokens in (CLEAN, CORRUPTED))
        written = (source["z", layer] - own["z", layer])[:, :, 1] @ model.blocks[layer].attn.W_O[1]
        expected = metric(model.unembed(model.ln_final(own["resid_post", -1] + written)))
    actual = module.path_patch(model, CLEAN, CORRUPTED, [(layer, 1)], [("final", None)], metric)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@SOLUTIONS
def test_all_heads_of_the_last_layer_have_direct_effects_only(module: Any, make: Any) -> None:
    """So path patching and activation patching agree there, but for the last MLP, which has to take part."""
    model = random_model(make)
    with torch.no_grad():
        _, source = run_with_cache(model, CORRUPTED)
    paths = module.path_patch_heads(model, CLEAN, CORRUPTED, [("final", None)], metric, freeze_mlps=False)
    whole = ref.patch_heads(model, CLEAN, source, metric)
    torch.testing.assert_close(paths[-1], whole[-1], rtol=1e-4, atol=1e-4)
    assert (paths[0] - whole[0]).abs().max() > 1e-3


@SOLUTIONS
def test_one_by_one_and_together_agree(module: Any, make: Any) -> None:
    model, receivers = random_model(make), [("blocks.2.attn.hook_v", 3), ("blocks.1.attn.hook_q", 0)]
    together = module.path_patch_heads(model, CLEAN, CORRUPTED, receivers, metric, max_rows=10)
    for layer, head in ((0, 2), (1, 1), (2, 0)):
        alone = module.path_patch(model, CLEAN, CORRUPTED, [(layer, head)], receivers, metric).mean()
        torch.testing.assert_close(together[layer, head], alone, rtol=1e-5, atol=1e-5)


def circuit(make: Callable[..., nn.Module]) -> nn.Module:
    """Head 0.0 copies tokens to places 3 to 5 of the stream; 1.1 reads there, and says it; 1.0 reads 0 to 2."""
    sizes: dict[str, Any] = {"d_vocab": 3, "n_layers": 2, "n_heads": 2, "d_model": 9, "d_head": 3}
    model: Any = random_model(make, attn_only=True, d_mlp=0, normalization="none", **sizes)
    eye = torch.eye(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :3] = eye
        for layer, head, reads, writes in ((0, 0, 0, 3), (1, 1, 3, 6), (1, 0, 0, 6)):
            model.blocks[layer].attn.W_V[head, reads : reads + 3] = eye
            model.blocks[layer].attn.W_O[head, :, writes : writes + 3] = eye
        model.unembed.W_U[6:] = eye
    return model


@SOLUTIONS
def test_a_circuit_built_by_hand_is_found(module: Any, make: Any) -> None:
    model = circuit(make)
    clean, corrupted = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[2, 2, 1, 2]])

    def zeroth(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 0]

    base = zeroth(model(clean)).mean().detach()
    found = {}
    for receiver in [*((f"blocks.1.attn.hook_{w}", h) for w in "qkv" for h in (0, 1)), ("final", None)]:
        table = module.path_patch_heads(model, clean, corrupted, [receiver], zeroth) - base
        found[receiver] = [tuple(at) for at in (table.abs() > 1e-6).nonzero().tolist()]
    expected: dict[Any, Any] = {receiver: [] for receiver in found}
    expected |= {("blocks.1.attn.hook_v", 1): [(0, 0)], ("final", None): [(1, 0), (1, 1)]}
    assert found == expected


@pytest.mark.parametrize(
    ("senders", "receivers", "words"),
    [
        ([(0, 0), (5, 1)], [("final", None)], "no head 5.1"),
        ([], [("blocks.1.attn.hook_z", 0)], "no path ends at 'blocks.1.attn.hook_z'"),
        ([], [("blocks.1.attn.hook_q", 4)], "blocks.1.attn.hook_q has no head 4"),
        ([], [("blocks.1.attn.hook_q", None)], "blocks.1.attn.hook_q has no head None"),
        ([], [("final", 2)], "the final stream belongs to no head"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(senders: Any, receivers: Any, words: str) -> None:
    model = random_model(ch02.Transformer)
    with pytest.raises(ValueError, match=words):
        ref.path_patch(model, CLEAN, CORRUPTED, senders, receivers, metric)
