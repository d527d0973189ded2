"""Hooks on a small model whose every value can be worked out by hand."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from course_utils import hooks as hooks_module
from course_utils.hooks import (
    HookPoint,
    UnknownName,
    add_hook,
    hook_points,
    hooks,
    reset_hooks,
    run_with_cache,
    run_with_hooks,
)


class Scale(nn.Module):
    """Stands for a LayerNorm: two of them in a block make `scale` ambiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_scale = HookPoint()

    def forward(self, resid: Tensor) -> Tensor:
        return resid / self.hook_scale(resid.abs().amax(-1, keepdim=True) + 1)


class Mixer(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_model, d_model))
        self.hook_pattern = HookPoint()
        self.hook_result = HookPoint(on_request=True)

    def forward(self, resid: Tensor) -> Tensor:
        n_pos = resid.shape[1]
        pattern = self.hook_pattern(torch.ones(n_pos, n_pos, device=resid.device).tril() / n_pos)
        return self.hook_result(pattern @ resid @ self.weight)


class Block(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.ln1, self.ln2, self.attn = Scale(), Scale(), Mixer(d_model)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, resid: Tensor) -> Tensor:
        resid = self.hook_resid_pre(resid)
        resid = resid + self.hook_attn_out(self.attn(self.ln1(resid)))
        return self.hook_resid_post(self.ln2(resid))


class Toy(nn.Module):
    def __init__(self, n_layers: int = 3, d_model: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, d_model)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(d_model) for _ in range(n_layers))
        self.ln_final = Scale()

    def forward(self, tokens: Tensor, extra: object = None) -> Tensor:
        resid = self.hook_embed(self.embed(tokens))
        for block in self.blocks:
            resid = block(resid)
        return self.ln_final(resid)


@pytest.fixture
def model() -> Toy:
    torch.manual_seed(0)
    return Toy()


TOKENS = torch.tensor([[1, 2, 3, 4], [6, 5, 4, 0]])


def zero(activation: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(activation)


def n_attached(model: nn.Module) -> int:
    return sum(point.is_watched for point in hook_points(model).values())


# --- attaching and removing ---------------------------------------------------------------------------------------


def test_names_are_paths_and_known_to_the_hook(model: Toy) -> None:
    points = hook_points(model)
    assert "blocks.1.attn.hook_pattern" in points and len(points) == 3 * 7 + 2
    assert all(point.name == name for name, point in points.items())
    seen = []
    run_with_hooks(model, TOKENS, hooks={"*.hook_resid_*": lambda activation, hook: seen.append(hook.name)})
    assert seen == [f"blocks.{i}.hook_resid_{at}" for i in range(3) for at in ("pre", "post")]


def test_a_replacement_is_used_and_none_keeps(model: Toy) -> None:
    clean = model(TOKENS)
    assert torch.equal(run_with_hooks(model, TOKENS, hooks={"hook_embed": lambda activation, hook: None}), clean)
    assert torch.equal(run_with_hooks(model, TOKENS, hooks={"hook_embed": zero}), torch.zeros_like(clean))
    assert torch.equal(model(TOKENS), clean)


def test_hooks_run_in_order_each_on_what_the_one_before_left(model: Toy) -> None:
    def add_one(activation: Tensor, hook: HookPoint) -> Tensor:
        return activation + 1

    def double(activation: Tensor, hook: HookPoint) -> Tensor:
        return activation * 2

    with hooks(model, [("hook_embed", add_one), ("hook_embed", double)]):
        _, pairs = run_with_cache(model, TOKENS)
    with hooks(model, {"hook_embed": [double, add_one]}):
        _, listed = run_with_cache(model, TOKENS)
    embed = model.embed(TOKENS)
    torch.testing.assert_close(pairs["embed"], (embed + 1) * 2)
    torch.testing.assert_close(listed["embed"], embed * 2 + 1)


def test_a_predicate_chooses_too(model: Toy) -> None:
    def in_layer_1(name: str) -> bool:
        return name.startswith("blocks.1.")

    with hooks(model, {in_layer_1: zero}):
        assert n_attached(model) == 7


def test_removed_after_an_exception_and_nested_contexts_remove_their_own(model: Toy) -> None:
    with hooks(model, {"hook_embed": zero}):
        with pytest.raises(ZeroDivisionError), hooks(model, {"hook_embed": zero, "*.hook_pattern": zero}):
            raise ZeroDivisionError
        assert n_attached(model) == 1
        assert not model(TOKENS).any()
    assert n_attached(model) == 0

    def fail(activation: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError

    add_hook(model, "blocks.1.hook_attn_out", fail)
    with pytest.raises(ZeroDivisionError):
        run_with_cache(model, TOKENS)
    assert n_attached(model) == 1


def test_add_hook_stays_until_reset(model: Toy) -> None:
    add_hook(model, "blocks.*.hook_attn_out", zero)
    assert n_attached(model) == 3
    with hooks(model, {"hook_embed": zero}):
        reset_hooks(model)
        assert n_attached(model) == 0
    assert n_attached(model) == 0


def test_a_hook_may_remove_itself(model: Toy) -> None:
    calls = []
    point = hook_points(model)["hook_embed"]

    def once(activation: Tensor, hook: HookPoint) -> None:
        calls.append(hook.name)
        handle.remove()

    handle = point.add(once)
    model(TOKENS)
    model(TOKENS)
    assert calls == ["hook_embed"]


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.0.hook_resid_mid", "blocks.0.hook_resid_pre"),
        ("hook_embedd", "hook_embed"),
        ("blocks.*.attn.hook_patern", "blocks.0.attn.hook_pattern"),
    ],
)
def test_an_unknown_name_is_told_the_three_nearest_before_anything_runs(model: Toy, name: str, nearest: str) -> None:
    ran = []
    attempts = [
        lambda: run_with_cache(model, TOKENS, names=["hook_embed", name]),
        lambda: run_with_hooks(model, TOKENS, hooks={"hook_embed": lambda a, h: ran.append(1), name: zero}),
        lambda: hooks(model, {"hook_embed": zero, name: zero}).__enter__(),
        lambda: add_hook(model, name, zero),
    ]
    for attempt in attempts:
        with pytest.raises(UnknownName) as caught:
            attempt()
        message = str(caught.value)
        assert name in message and nearest in message and message.count(",") == 2
    assert not ran and n_attached(model) == 0


@pytest.mark.parametrize(
    ("replacement", "words"),
    [
        (lambda a: a[:1], r"hook_embed returned shape \(1, 4, 5\), but the activation has shape \(2, 4, 5\)"),
        (lambda a: a.double(), "hook_embed returned dtype torch.float64"),
        (lambda a: a.to("meta"), "hook_embed returned device meta"),
        (lambda a: [a], "hook_embed returned a list"),
        (lambda a: 0.0, "hook_embed returned a float"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(model: Toy, replacement, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        run_with_hooks(model, TOKENS, hooks={"hook_embed": lambda activation, hook: replacement(activation)})
    assert n_attached(model) == 0


def test_a_model_without_hook_points_and_an_empty_predicate_are_told_so(model: Toy) -> None:
    with pytest.raises(ValueError, match="This Linear has no hook points"):
        run_with_cache(nn.Linear(2, 2), torch.zeros(2))
    with pytest.raises(UnknownName, match="chose no hook point"):
        run_with_cache(model, TOKENS, names=lambda name: "logits" in name)
    with pytest.raises(TypeError, match="hook_embed was given 3"), hooks(model, {"hook_embed": 3}):
        pass
    assert n_attached(model) == 0


# --- the cache ----------------------------------------------------------------------------------------------------


def test_what_is_cached(model: Toy) -> None:
    output, cache = run_with_cache(model, TOKENS)
    assert torch.equal(output, model(TOKENS))
    assert len(cache) == 3 * 6 + 2 and "blocks.0.attn.hook_result" not in cache
    assert cache.names() == list(cache) and set(cache) < set(hook_points(model))
    assert run_with_cache(model, TOKENS, names="*.hook_result")[1].names() == [
        f"blocks.{i}.attn.hook_result" for i in range(3)
    ]
    assert run_with_cache(model, TOKENS, names=["hook_embed", "blocks.2.*_p*"])[1].names() == [
        "hook_embed",
        "blocks.2.hook_resid_pre",
        "blocks.2.attn.hook_pattern",
        "blocks.2.hook_resid_post",
    ]
    assert len(run_with_cache(model, TOKENS, names=lambda name: "result" in name)[1]) == 3
    assert len(run_with_cache(model, TOKENS, names=[])[1]) == 0
    assert n_attached(model) == 0
    assert len(run_with_cache(model, TOKENS, extra=None)[1]) == len(cache)  # keyword inputs reach the model


def test_keys(model: Toy) -> None:
    _, cache = run_with_cache(model, TOKENS)
    pattern = cache["blocks.1.attn.hook_pattern"]
    for key in [("pattern", 1), ("hook_pattern", 1), ("attn.hook_pattern", 1), ("attn.pattern", -2)]:
        assert cache[key] is pattern
    assert cache["blocks.1.pattern"] is pattern
    assert cache["embed"] is cache["hook_embed"]
    assert cache["ln_final.scale"] is cache["ln_final.hook_scale"] is cache["scale"]
    assert cache["ln2.hook_scale", 2] is cache["blocks.2.ln2.hook_scale"]
    assert cache["resid_post", 0] is cache["resid_pre", 1]
    assert ("pattern", 0) in cache and ("pattern", 3) not in cache and "pattern" not in cache
    assert cache.get("nothing") is None


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (("scale", 0), r"'scale' stands for several activations here: say 'ln1.scale' or 'ln2.scale'"),
        (("pattern", 3), "There is no layer 3: the layers are 0 to 2"),
        (("pattern", -4), "There is no layer -4"),
        ("pattern", r'write cache\["pattern", 0\] or cache.stack\("pattern"\)'),
        (("patern", 1), "Nothing is cached under 'patern' in layer 1. The nearest are: blocks.1.attn.hook_pattern,"),
        (("result", 1), "names="),
        (("pattern", "1"), "is no key of a cache"),
        (7, "is no key of a cache"),
    ],
)
def test_wrong_keys_are_told_what_to_write(model: Toy, key: object, words: str) -> None:
    _, cache = run_with_cache(model, TOKENS)
    with pytest.raises(KeyError, match=words):
        cache[key]


def test_stack_has_the_layers_first(model: Toy) -> None:
    _, cache = run_with_cache(model, TOKENS)
    resid = cache.stack("resid_pre")
    assert resid.shape == (3, 2, 4, 5)
    assert all(torch.equal(resid[i], cache["resid_pre", i]) for i in range(3))
    assert run_with_cache(model, TOKENS, names="blocks.[12].attn.hook_pattern")[1].stack("pattern").shape == (2, 4, 4)
    with pytest.raises(KeyError, match="stands for several"):
        cache.stack("scale")
    with pytest.raises(KeyError, match="Nothing is cached under 'patterns'"):
        cache.stack("patterns")


def test_negative_layers_count_the_model_not_the_cache(model: Toy) -> None:
    _, cache = run_with_cache(model, TOKENS, names="blocks.0.*")
    with pytest.raises(KeyError, match="Nothing is cached under 'pattern' in layer 2"):
        cache["pattern", -1]


def test_gradients_flow_through_and_to_the_cache(model: Toy) -> None:
    output, cache = run_with_cache(model, TOKENS)
    with pytest.raises(RuntimeError, match="call backward"):
        cache.grad("embed")
    output[:, -1].sum().backward()
    shift = 1e-3
    moved = run_with_hooks(model, TOKENS, hooks={"blocks.2.hook_resid_pre": lambda resid, hook: resid + shift})
    change = (moved - output)[:, -1].sum() / shift
    torch.testing.assert_close(cache.grad(("resid_pre", 2)).sum(), change, rtol=1e-2, atol=1e-3)
    assert cache.grad("blocks.1.hook_resid_post") is cache["resid_pre", 2].grad
    for other in (cache.detach(), run_with_cache(model.requires_grad_(False), TOKENS)[1]):
        with pytest.raises(RuntimeError, match="has no gradient"):
            other.grad("embed")


def test_under_no_grad_and_inference_mode(model: Toy) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            _, cache = run_with_cache(model, TOKENS)
        assert not cache["resid_post", -1].requires_grad


def test_detach_and_to_keep_values_names_layers_and_aliases(model: Toy) -> None:
    _, cache = run_with_cache(model, TOKENS)
    for other in (cache.detach(), cache.to("cpu")):
        assert other.names() == cache.names() and other.n_layers == 3
        assert torch.equal(other["pattern", -1], cache["pattern", -1])
        assert other["resid_post", 0] is other["resid_pre", 1]
    assert not cache.detach()["embed"].requires_grad and cache["embed"].requires_grad
    assert cache.to("meta")["embed"].device.type == "meta"


def test_the_cache_holds_what_earlier_hooks_left(model: Toy) -> None:
    with hooks(model, {"blocks.1.hook_attn_out": zero}):
        _, cache = run_with_cache(model, TOKENS)
    assert not cache["attn_out", 1].any() and cache["attn_out", 0].any()


def test_size_and_repr(model: Toy) -> None:
    _, cache = run_with_cache(model, TOKENS, names="*.hook_resid_*")
    assert cache.size_mb() == pytest.approx(4 * 2 * 4 * 5 * 4 / 1e6)  # six names, four tensors
    assert repr(cache).splitlines() == [
        "ActivationCache: 6 activations, 3 layers, 0.0 MB",
        "  blocks.{0..2}.hook_resid_pre   [2, 4, 5]",
        "  blocks.{0..2}.hook_resid_post  [2, 4, 5]",
    ]
    assert "blocks.1.attn.hook_pattern  [4, 4]" in repr(run_with_cache(model, TOKENS, names="*.1.*pattern")[1])
    assert repr(run_with_cache(model, TOKENS, names=[])[1]).startswith("ActivationCache: 0 activations")


# --- large caches -------------------------------------------------------------------------------------------------


def test_a_large_cache_says_its_size_before_it_is_filled(model: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only once, and about right: two names for one tensor are estimated like two tensors until the second comes."""
    monkeypatch.setattr(hooks_module, "LARGE", 400)
    monkeypatch.setattr(hooks_module, "WORTH_A_LOOK", 200)
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hooks(model, {"*": lambda activation, hook: seen.append((hook.name, len(caught)))}):
            _, cache = run_with_cache(model, TOKENS)
    assert [str(warning.message).split(" MB")[0] for warning in caught] == ["This cache will take about 0"]
    silent = [name for name, n_warnings in seen if n_warnings == 0]
    assert 0 < len(silent) < len(seen) / 2
    estimates: list[float] = []
    monkeypatch.setattr(hooks_module, "_announce_large", lambda megabytes: bool(estimates.append(megabytes)))
    run_with_cache(model, TOKENS)
    assert max(estimates) == pytest.approx(cache.size_mb(), rel=0.2)
    assert estimates[-1] == pytest.approx(cache.size_mb())


def test_a_small_cache_says_nothing(model: Toy) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_with_cache(model, TOKENS)


# --- the course's own model ---------------------------------------------------------------------------------------


@pytest.fixture
def transformer() -> nn.Module:
    from course_utils.config import TransformerConfig
    from solutions.ch02_transformer import Transformer

    torch.manual_seed(0)
    cfg = TransformerConfig(d_vocab=11, n_ctx=7, n_layers=2, n_heads=3, d_model=8, d_head=5, d_mlp=13)
    model = Transformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def test_the_transformer_has_every_name_and_the_same_output_when_watched(transformer: nn.Module) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5], [10, 9, 8, 7, 6]])
    output, cache = run_with_cache(transformer, tokens)
    torch.testing.assert_close(output, transformer(tokens), rtol=1e-5, atol=1e-5)  # fused against explicit attention
    _, results = run_with_cache(transformer, tokens, names="*.hook_result")
    torch.testing.assert_close(
        results.stack("result").sum(3)[1] + transformer.blocks[1].attn.b_O, cache["attn_out", 1], rtol=1e-5, atol=1e-5
    )
    places = (
        "resid_pre ln1.scale ln1.normalized q k v attn_scores pattern z attn_out resid_mid pre post mlp_out resid_post"
    )
    shapes = {place: tuple(cache[place, -1].shape) for place in places.split()}
    assert shapes["pattern"] == (2, 3, 5, 5) and shapes["z"] == (2, 5, 3, 5) and shapes["ln1.scale"] == (2, 5, 1)
    assert cache.stack("resid_post").shape == (2, 2, 5, 8) and cache["embed"].shape == cache["pos_embed"].shape
    assert cache["ln_final.normalized"].shape == (2, 5, 8)


def test_gradients_of_the_transformer_s_activations(transformer: nn.Module) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    output, cache = run_with_cache(transformer, tokens)
    output[0, -1, 3].backward()
    assert all(cache.grad(name).shape == cache[name].shape for name in cache)
    assert cache.grad(("pattern", 0)).abs().sum() > 0


def test_the_announced_size_of_a_transformer_s_cache_is_about_right(
    transformer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    estimates: list[float] = []
    monkeypatch.setattr(hooks_module, "_announce_large", lambda megabytes: bool(estimates.append(megabytes)))
    n_bytes = 1e6 * run_with_cache(transformer, tokens)[1].size_mb()
    monkeypatch.setattr(hooks_module, "WORTH_A_LOOK", n_bytes / 2)
    run_with_cache(transformer, tokens)
    assert 1e6 * estimates[0] == pytest.approx(n_bytes, rel=0.25)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_hooks_see_a_compiled_model(model: Toy, how: str) -> None:
    """Wrapped by `torch.compile`, by its own method `compile()`, or only a block of it: names and values as ever."""
    right, expected = run_with_cache(model, TOKENS)
    silenced = run_with_hooks(model, TOKENS, hooks={"blocks.1.hook_attn_out": zero})
    compiled: nn.Module = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    torch.testing.assert_close(compiled(TOKENS), right)  # compiled before anybody looks
    output, cache = run_with_cache(compiled, TOKENS)
    assert cache.names() == expected.names() and cache.n_layers == expected.n_layers
    torch.testing.assert_close(output, right)
    for name in expected:
        torch.testing.assert_close(cache[name], expected[name])
    actual = run_with_hooks(compiled, TOKENS, hooks={"blocks.1.hook_attn_out": zero})
    torch.testing.assert_close(actual, silenced)
    with pytest.raises(ValueError, match="add them before you compile"):
        add_hook(compiled, "blocks.1.hook_attn_out", zero)
    torch.testing.assert_close(compiled(TOKENS), right)
