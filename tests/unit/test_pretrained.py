"""Loading weights: a shipped model made for the test, and a tiny random GPT-2 on disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_utils import pretrained
from course_utils.config import TransformerConfig
from course_utils.pretrained import (
    PretrainedError,
    load_history,
    load_pretrained,
    rounded_to,
    save_shipped,
    shipped_models,
    shipped_steps,
    shipped_tokenizer,
)

CFG = TransformerConfig(d_vocab=11, n_ctx=6, n_layers=1, n_heads=1, d_model=4, d_head=4, attn_only=True)


class Bigram(nn.Module):
    """The smallest thing that has a cfg and weights."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(cfg.d_vocab, cfg.d_model))
        self.W_U = nn.Parameter(torch.randn(cfg.d_model, cfg.d_vocab))
        self.cfg = cfg

    def forward(self, tokens: Tensor) -> Tensor:
        return self.W_E[tokens] @ self.W_U


class Biased(Bigram):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg)
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))


class Wider(Bigram):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg)
        self.W_E = nn.Parameter(torch.randn(cfg.d_vocab, cfg.d_model + 1))


class OnlyEmbeds(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(cfg.d_vocab, cfg.d_model))


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "once": 1, "upon": 2}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<eos>")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bigram:
    """A folder of models with `pair`, which owns a tokenizer, and `pair-2`, which borrows it."""
    monkeypatch.setattr(pretrained, "MODELS", tmp_path)
    torch.manual_seed(0)
    model = Bigram(CFG)
    rounded_to(model)
    save_shipped(
        model, word_tokenizer(), "pair", {"licence": "MIT", "what": "for: tests"}, "Prose.", {"loss": [3.0, 2.5]}
    )
    save_shipped(Bigram(CFG), None, "pair-2", {"tokenizer": "pair"}, "More prose.", [])
    return model


def test_a_shipped_model_comes_back_the_same(shipped: Bigram) -> None:
    model = load_pretrained(Bigram, "pair", device="cpu")
    tokens = torch.tensor([[1, 2, 0]])
    assert torch.equal(model(tokens), shipped(tokens))
    assert model.cfg == CFG and not model.training
    assert model.tokenizer("once upon").input_ids == [1, 2] and model.tokenizer.eos_token == "<eos>"
    assert load_history("pair") == {"loss": [3.0, 2.5]}
    (pretrained.MODELS / "pair" / "others.json").write_text('{"slow": [3.0]}')
    assert load_history("pair", "others") == {"slow": [3.0]}
    with pytest.raises(PretrainedError, match=r"^pair has no record 'diary'"):
        load_history("pair", "diary")
    assert load_pretrained(Bigram, "pair-2").tokenizer.get_vocab() == shipped_tokenizer("pair").get_vocab()


def test_cards(shipped: Bigram) -> None:
    pair, second = shipped_models()
    assert pair["name"] == "pair" and pair["what"] == "for: tests" and len(pair["sha256"]) == 64
    assert second["tokenizer"] == "pair"
    card = (pretrained.MODELS / "pair" / "card.md").read_text()
    assert card.startswith("---\nname: pair\n") and card.endswith("---\n\nProse.\n")
    with pytest.raises(ValueError, match="one line"):
        save_shipped(shipped, None, "pair", {"what": "two\nlines"}, "", [])


def test_weights_are_kept_in_half_or_in_full_and_are_float32_again(shipped: Bigram) -> None:
    torch.manual_seed(1)
    exact = Bigram(CFG)
    kept = {}
    for name, precision in {"half": torch.float16, "full": torch.float32}.items():
        save_shipped(exact, None, name, {}, "", [], precision=precision)
        kept[name] = load_pretrained(Bigram, name)
        assert kept[name].W_E.dtype == torch.float32
        [card] = [card for card in shipped_models() if card["name"] == name]
        assert card["precision"] == {"half": "float16", "full": "float32"}[name]
    assert torch.equal(kept["full"].W_E, exact.W_E) and not torch.equal(kept["half"].W_E, exact.W_E)
    rounded_to(exact)
    assert torch.equal(kept["half"].W_E, exact.W_E)
    with torch.no_grad():
        exact.W_U[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"not all numbers of W_U are finite in torch\.float16"):
        save_shipped(exact, None, "large", {}, "", [])


def test_tied_and_transposed_weights_can_be_saved(shipped: Bigram) -> None:
    shipped.W_U = nn.Parameter(shipped.W_E.detach().T)
    save_shipped(shipped, None, "tied", {}, "", [])
    assert torch.equal(load_pretrained(Bigram, "tied").W_U, shipped.W_E.T)


def test_the_real_models_are_intact() -> None:
    for card in shipped_models():
        folder = pretrained.MODELS / card["name"]
        assert pretrained._sha256(folder / pretrained.WEIGHTS) == card["sha256"]
        files = {pretrained._snapshot(step): step for step in shipped_steps(card["name"])}
        assert {f"snapshots/{path.name}" for path in folder.glob("snapshots/*")} == set(files)
        for file, step in files.items():
            assert pretrained._sha256(folder / file) == card[f"sha256_step_{step}"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "missing"])
def test_damaged_weights_are_refused(shipped: Bigram, damage: str) -> None:
    path = pretrained.MODELS / "pair" / pretrained.WEIGHTS
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncate": content[:-8], "flip": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}[damage]
        )
    with pytest.raises(PretrainedError, match=r"pair: model.safetensors is (missing|damaged).*Get the file again"):
        load_pretrained(Bigram, "pair")


def test_something_else_under_a_right_checksum_is_refused(shipped: Bigram) -> None:
    folder = pretrained.MODELS / "pair"
    before = pretrained._sha256(folder / pretrained.WEIGHTS)
    torch.save({"W_E": torch.zeros(11, 4)}, folder / pretrained.WEIGHTS)  # a pickle
    card = (folder / "card.md").read_text().replace(before, pretrained._sha256(folder / pretrained.WEIGHTS))
    (folder / "card.md").write_text(card)
    with pytest.raises(PretrainedError, match="is no safetensors file"):
        load_pretrained(Bigram, "pair")


def test_weights_that_do_not_fit_are_refused(shipped: Bigram) -> None:
    with pytest.raises(PretrainedError, match="do not fit this Biased: no weights for b_U"):
        load_pretrained(Biased, "pair")
    with pytest.raises(PretrainedError, match=r"Wider: W_E has shape \(11, 5\), its weights \(11, 4\)"):
        load_pretrained(Wider, "pair")
    with pytest.raises(PretrainedError, match="OnlyEmbeds: no place for W_U"):
        load_pretrained(OnlyEmbeds, "pair")
    config = pretrained.MODELS / "pair" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_experts": 8}))
    with pytest.raises(PretrainedError, match=r"does not know.*n_experts"):
        load_pretrained(Bigram, "pair")


def test_an_unknown_name_is_told_the_nearest(shipped: Bigram) -> None:
    for attempt in (lambda: load_pretrained(Bigram, "pair-3"), lambda: load_history("pair3")):
        with pytest.raises(PretrainedError, match=r"There is no model 'pair-?3'\. The nearest are: pair(-2)?, pair"):
            attempt()
    with pytest.raises(PretrainedError, match=r"There is no folder \./pair"):
        load_pretrained(Bigram, "./pair")


@pytest.fixture
def snapshots(shipped: Bigram) -> dict[int, dict[str, Tensor]]:
    """`grown` ships with what it was after three steps; numbers with few digits survive float16."""
    states = {step: {"W_E": torch.full((11, 4), step / 8), "W_U": torch.randn(4, 11)} for step in (40, 5, 12000)}
    save_shipped(shipped, None, "grown", {"tokenizer": "pair"}, "", [], states)
    return states


def test_snapshots_come_back_by_step(shipped: Bigram, snapshots: dict[int, dict[str, Tensor]]) -> None:
    assert shipped_steps("grown") == [5, 40, 12000] and shipped_steps("pair") == []
    assert torch.equal(load_pretrained(Bigram, "grown").W_E, shipped.W_E)
    for step, state in snapshots.items():
        model = load_pretrained(Bigram, "grown", step=step)
        assert model.W_E.dtype == torch.float32 and not model.training and model.cfg == CFG
        assert torch.equal(model.W_E, state["W_E"])
        assert torch.equal(model.W_U, state["W_U"].half().float()) and not torch.equal(model.W_U, state["W_U"])
        assert model.tokenizer("once upon").input_ids == [1, 2]
    save_shipped(shipped, None, "grown", {}, "", [], {7: snapshots[5]})
    assert shipped_steps("grown") == [7]
    assert [path.name for path in (pretrained.MODELS / "grown/snapshots").iterdir()] == ["step_00007.safetensors"]


def test_a_step_that_was_not_kept_is_refused(snapshots: dict[int, dict[str, Tensor]]) -> None:
    with pytest.raises(PretrainedError, match=r"grown: no weights were kept after step 6; .* after: 5, 40, 12000\."):
        load_pretrained(Bigram, "grown", step=6)
    with pytest.raises(PretrainedError, match=r"pair: no weights .* after: none\."):
        load_pretrained(Bigram, "pair", step=0)
    with pytest.raises(PretrainedError, match=r"gpt2 has no snapshots"):
        load_pretrained(Bigram, "gpt2", step=5)
    with pytest.raises(PretrainedError, match="There is no model 'groan'"):
        shipped_steps("groan")


@pytest.mark.parametrize("damage", ["truncate", "flip", "another step", "missing", "pickle"])
def test_damaged_snapshots_are_refused(snapshots: dict[int, dict[str, Tensor]], damage: str) -> None:
    path, other = (pretrained.MODELS / "grown" / pretrained._snapshot(step) for step in (40, 5))
    content, before = path.read_bytes(), pretrained._sha256(path)
    words = "is damaged or was changed"
    if damage == "missing":
        path.unlink()
        words = "is missing"
    elif damage == "pickle":
        torch.save(snapshots[40], path)
        card = pretrained.MODELS / "grown/card.md"
        card.write_text(card.read_text().replace(before, pretrained._sha256(path)))
        words = "is no safetensors file"
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"truncate": content[:-8], "flip": flipped, "another step": other.read_bytes()}[damage])
    with pytest.raises(PretrainedError, match=rf"grown: snapshots/step_00040.safetensors {words}.*Get the file again"):
        load_pretrained(Bigram, "grown", step=40)
    assert torch.equal(load_pretrained(Bigram, "grown", step=5).W_E, snapshots[5]["W_E"])


# --- GPT-2 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with two layers and sizes that all differ, in which no parameter is 0 or 1 by default."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=31, n_positions=13, n_layer=2, n_head=3, n_embd=12, n_inner=20, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(gpt2_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gpt2_folder, tmp_path / "copy"))


def test_gpt2_has_the_logits_of_transformers(gpt2_folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    from solutions.ch02_transformer import Transformer

    model = load_pretrained(Transformer, str(gpt2_folder))
    tokens = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1  # otherwise agreement would say nothing
    assert model.cfg.d_mlp == 20 and model.cfg.d_head == 4 and not model.training
    assert model.tokenizer("once upon").input_ids == [1, 2]


def test_a_folder_may_be_a_path_and_may_begin_at_home(gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from solutions.ch02_transformer import Transformer

    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(gpt2_folder.parent))
    home = Path("~") / gpt2_folder.name
    for folder in (gpt2_folder, home, str(home)):
        assert load_pretrained(Transformer, folder).cfg.d_mlp == 20
    for missing in (gpt2_folder / "nothing", Path("~/nothing"), "~/nothing", Path("nothing/here")):
        with pytest.raises(PretrainedError, match="There is no folder"):
            load_pretrained(Transformer, missing)


def test_the_converter_comes_from_beside_the_class_or_by_hand(
    gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from solutions import ch02_transformer as solution

    class Mine(solution.Transformer):
        """A class in a module, this one, that has no converter yet."""

    with pytest.raises(PretrainedError, match=r"write convert_gpt2_weights\(state_dict, cfg\) where Mine is defined"):
        load_pretrained(Mine, str(gpt2_folder))
    load_pretrained(Mine, str(gpt2_folder), convert=solution.convert_gpt2_weights)
    monkeypatch.setattr(sys.modules[__name__], "convert_gpt2_weights", solution.convert_gpt2_weights, raising=False)
    load_pretrained(Mine, str(gpt2_folder))
    with pytest.raises(PretrainedError, match=r"no weights for blocks\.0\.attn\.W_K"):
        load_pretrained(Mine, str(gpt2_folder), convert=lambda weights, cfg: {})


def edit_weights(folder: Path, edit) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / pretrained.WEIGHTS)
    edit(weights)
    save_file(weights, folder / pretrained.WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_layout_of_the_hub_s_own_gpt2_is_understood(gpt2_folder: Path, damaged: Path) -> None:
    """Its file has no `transformer.` in front of the names, no output matrix (it is tied), and stores the masks."""
    from safetensors.torch import load_file, save_file

    from solutions.ch02_transformer import Transformer

    weights = load_file(damaged / pretrained.WEIGHTS)
    old = {name.removeprefix("transformer."): weight for name, weight in weights.items() if "lm_head" not in name}
    old |= {f"h.{layer}.attn.bias": torch.ones(13, 13).tril()[None, None] for layer in range(2)}
    save_file(old, damaged / pretrained.WEIGHTS, metadata={"format": "pt"})
    expected = load_pretrained(Transformer, str(gpt2_folder)).state_dict()
    actual = load_pretrained(Transformer, str(damaged)).state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-40]), "are damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "config.json").unlink(), "cannot be read"),
        (lambda f: edit_weights(f, lambda w: w.pop("transformer.h.1.ln_1.bias")), "missing: transformer.h.1.ln_1"),
        (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(2))), "unexpected: extra"),
        (lambda f: edit_config(f, n_inner=24), "mismatched: transformer.h.0.mlp"),
        (lambda f: edit_config(f, activation_function="silu"), "uses the activation 'silu'"),
        (lambda f: edit_config(f, scale_attn_by_inverse_layer_idx=True), "scales its attention scores"),
        (lambda f: edit_config(f, model_type="mistral"), "is a mistral model"),
    ],
)
def test_damaged_gpt2_folders_are_refused(damaged: Path, damage, words: str) -> None:
    from solutions.ch02_transformer import Transformer

    damage(damaged)
    with pytest.raises(PretrainedError, match=words) as caught:
        load_pretrained(Transformer, str(damaged))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_opened(damaged: Path) -> None:
    from solutions.ch02_transformer import Transformer

    class Bomb:
        def __reduce__(self):
            return (os._exit, (1,))

    (damaged / pretrained.WEIGHTS).unlink()
    torch.save({"transformer.wte.weight": Bomb()}, damaged / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match="never opened"):
        load_pretrained(Transformer, str(damaged))


@pytest.mark.parametrize(
    "download, words",
    [
        (False, ["is not in the local cache:", "download=True", "the models that ship still work"]),
        (True, ["could not be downloaded", "connect to the internet once", "local folder", "a model that ships"]),
    ],
)
def test_offline_without_cache_one_sentence_names_the_ways_out(tmp_path: Path, download: bool, words: list) -> None:
    script = (
        "from course_utils.pretrained import load_pretrained, PretrainedError\n"
        "from solutions.ch02_transformer import Transformer\n"
        f"try: load_pretrained(Transformer, 'gpt2', download={download})\n"
        "except PretrainedError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    message = run.stdout.strip()
    assert "\n" not in message
    assert message.startswith("gpt2 ")
    assert all(word in message for word in words)


# --- Pythia -------------------------------------------------------------------------------------------------------


def make_neox(folder: Path, **changes: Any) -> Path:
    """A GPT-NeoX with two layers and sizes that all differ, in which no parameter is 0 or 1 by default."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 31,
        "max_position_embeddings": 13,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "hidden_size": 24,
        "intermediate_size": 20,
        "rotary_pct": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def neox_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_neox(tmp_path_factory.mktemp("neox"))


@pytest.fixture
def damaged_neox(neox_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(neox_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_parallel_residual": False, "hidden_act": "gelu_new"},
        {"rotary_pct": 1.0, "rotary_emb_base": 500, "num_attention_heads": 2, "layer_norm_eps": 1e-3},
    ],
    ids=["pythia", "one after the other", "all coordinates turn"],
)
def test_pythia_has_the_logits_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import GPTNeoXForCausalLM

    from solutions.ch02_transformer import Transformer

    folder = make_neox(tmp_path, **changes)
    model = load_pretrained(Transformer, str(folder))
    tokens = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = GPTNeoXForCausalLM.from_pretrained(folder).eval()(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1  # otherwise agreement would say nothing
    assert model.cfg.positions == "rotary" and model.cfg.d_mlp == 20 and not model.training
    assert model.cfg.parallel == changes.get("use_parallel_residual", True)
    assert model.cfg.rotary_dim == (12 if "rotary_pct" in changes else 2)
    assert model.tokenizer("once upon").input_ids == [1, 2]


def test_pythia_s_converter_comes_from_beside_the_class(neox_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from solutions import ch02_transformer as solution

    class Mine(solution.Transformer):
        """A class in a module, this one, that has no converter for Pythia."""

    monkeypatch.setattr(sys.modules[__name__], "convert_gpt2_weights", solution.convert_gpt2_weights, raising=False)
    with pytest.raises(PretrainedError, match=r"Pythia's weights .* write convert_neox_weights\(state_dict, cfg\)"):
        load_pretrained(Mine, str(neox_folder))
    load_pretrained(Mine, str(neox_folder), convert=solution.convert_neox_weights)


def test_the_layout_of_the_hub_s_own_pythia_is_understood(neox_folder: Path, damaged_neox: Path) -> None:
    """Its files hold 16-bit numbers, masks, and the table of frequencies."""
    from solutions.ch02_transformer import Transformer

    def as_on_the_hub(weights: dict[str, Tensor]) -> None:
        for name, weight in list(weights.items()):
            weights[name] = weight.half()
        for layer in range(2):
            attention = f"gpt_neox.layers.{layer}.attention"
            weights[f"{attention}.bias"] = torch.ones(13, 13).tril().bool()[None, None]
            weights[f"{attention}.masked_bias"] = torch.tensor(-1e9)
            weights[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)

    edit_weights(damaged_neox, as_on_the_hub)
    expected = load_pretrained(Transformer, str(neox_folder)).state_dict()
    actual = load_pretrained(Transformer, str(damaged_neox)).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name].half().float()) for name in expected)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-40]), "are damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
        (lambda f: edit_weights(f, lambda w: w.pop("gpt_neox.final_layer_norm.bias")), "missing: gpt_neox.final_layer"),
        (lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(2))), "unexpected: extra"),
        (lambda f: edit_config(f, intermediate_size=24), "mismatched: gpt_neox.layers.0.mlp"),
        (lambda f: edit_config(f, hidden_act="gelu_fast"), "uses the activation 'gelu_fast'"),
        (lambda f: edit_config(f, attention_bias=False), "has no biases in its attention"),
        (lambda f: edit_rope(f, rope_type="linear", factor=2.0), "stretches its rotary positions"),
        (lambda f: edit_rope(f, partial_rotary_factor=0.4), "turns 3 coordinates"),
        (lambda f: edit_rope(f, partial_rotary_factor=0.1), "turns 0 coordinates"),
    ],
)
def test_damaged_and_other_neox_folders_are_refused(damaged_neox: Path, damage, words: str) -> None:
    from solutions.ch02_transformer import Transformer

    damage(damaged_neox)
    with pytest.raises(PretrainedError, match=words) as caught:
        load_pretrained(Transformer, str(damaged_neox))
    assert "\n" not in str(caught.value)


def edit_rope(folder: Path, **changes: object) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edit_config(folder, rope_parameters=rope | changes)


def test_a_class_that_knows_only_gpt2_is_told_what_does_not_fit(neox_folder: Path) -> None:
    from solutions import ch02_transformer as solution

    class OnlyGPT2(solution.Transformer):
        def __init__(self, cfg: TransformerConfig) -> None:
            super().__init__(cfg)
            self.pos_embed = solution.PosEmbed(cfg)

    with pytest.raises(PretrainedError, match=r"do not fit this OnlyGPT2: no weights for pos_embed\.W_pos"):
        load_pretrained(OnlyGPT2, str(neox_folder), convert=solution.convert_neox_weights)


def test_pythia_offline_without_cache(tmp_path: Path) -> None:
    script = (
        "from course_utils.pretrained import load_pretrained, PretrainedError\n"
        "from solutions.ch02_transformer import Transformer\n"
        "try: load_pretrained(Transformer, 'EleutherAI/pythia-70m')\n"
        "except PretrainedError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("EleutherAI/pythia-70m is not in the local cache: load_pretrained(..., download=True)")
    assert len(run.stdout.splitlines()) == 1


def test_an_old_configuration_of_neox_is_read(neox_folder: Path) -> None:
    """transformers before version 5 keeps the rotary settings in three fields of their own."""
    from types import SimpleNamespace

    from transformers import AutoConfig

    now = AutoConfig.from_pretrained(neox_folder)
    values = {key: value for key, value in now.to_dict().items() if key != "rope_parameters"}
    old = SimpleNamespace(**values, rotary_pct=0.25, rotary_emb_base=10000, rope_scaling=None)
    assert pretrained._neox_config(old, "old") == pretrained._neox_config(now, "new")
    old.rope_scaling = {"type": "dynamic", "factor": 2.0}
    with pytest.raises(PretrainedError, match="stretches"):
        pretrained._neox_config(old, "old")


def test_the_models_that_ship_keep_their_shapes() -> None:
    """Their config.json were written before there were rotary positions."""
    for card in shipped_models():
        cfg, _ = pretrained._read_shipped(card["name"])
        assert (cfg.positions, cfg.rotary_dim, cfg.parallel) == ("learned", 0, False)
