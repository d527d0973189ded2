"""docs/research.md: each of its blocks runs as it stands, on tiny models, and draws a figure."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

TEXT = (ROOT / "docs/research.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LOAD, OWN, *FIGURES = BLOCKS
HEADINGS = re.findall(r"^## .*\((chapter \d\d)\)$", TEXT, re.MULTILINE)
CONVENTIONS = {"__name__": "__main__"}


def tokenizer() -> Any:
    """A byte-level tokenizer that knows every word of the page's examples as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = re.findall(r'"([^"\n]*)"', "\n".join(FIGURES))
    words += [f" {word}{s}" for text in words for word in text.split() for s in ("", "s")]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=2000, special_tokens=["<|endoftext|>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def save_tiny(family: str, folder: Path) -> None:
    """A tiny random model as `save_pretrained` of transformers writes it."""
    import transformers

    own = tokenizer()
    torch.manual_seed(0)
    if family == "gpt2":
        shape = {"n_layer": 2, "n_head": 3, "n_embd": 12, "n_positions": 40}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(own), **shape))
    else:
        shape = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "max_position_embeddings": 40}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(own), **shape, **heads))
    model.save_pretrained(folder)
    own.save_pretrained(folder)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `my-model` lies."""
    made = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, made / "my-model")
    return made


def run(*blocks: str) -> dict[str, Any]:
    """The names that the blocks leave behind; `_` is the value of the last line."""
    space: dict[str, Any] = dict(CONVENTIONS)
    for block in blocks:
        *_, last = re.split(r"^(?=\S)", block, flags=re.MULTILINE)
        exec(compile(block.removesuffix(last), "docs/research.md", "exec"), space)
        if re.match(r"(heatmap|line)\(", last):
            space["_"] = eval(last, space)
        else:
            exec(last, space)
    return space


@pytest.mark.parametrize("block", FIGURES, ids=HEADINGS)
def test_each_block_draws_a_figure(folder: Path, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    figure = run(LOAD, block)["_"]
    assert figure.layout.title.text and figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    for trace in figure.data:
        values = torch.tensor(trace.z if trace.type == "heatmap" else trace.y).float()
        assert values.numel() >= 3 and values.isfinite().all() and (values.std() > 0 or "07" in block)


def test_a_model_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    own = run(LOAD, OWN)["own"]
    assert own(torch.arange(5)[None]).shape == (1, 5, 50)
    assert "'blocks.0.attn.W_Q': (2, 8, 4)" in capsys.readouterr().out


def test_an_answer_of_several_tokens_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first piece alone, " are" and " is" could be the same token, and every difference 0."""
    monkeypatch.chdir(folder)
    token_of = run(LOAD)["token_of"]
    assert token_of(" are") != token_of(" is")
    with pytest.raises(ValueError, match="too many values"):
        token_of(" unheard-of")


def test_a_folder_without_a_tokenizer_is_loaded_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = folder / "bare/my-model"
    bare.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / "my-model" / name).read_bytes())
    monkeypatch.chdir(bare.parent)
    assert run(LOAD)["model"].tokenizer is None


def test_the_page_is_about_the_chapters_and_stays_short() -> None:
    assert len(HEADINGS) == len(FIGURES) and sorted(HEADINGS) == HEADINGS
    for chapter, block in zip(HEADINGS, FIGURES, strict=True):
        assert f"from solutions.ch{chapter[-2:]}_" in block
        code = [line for line in block.splitlines() if line.strip()]
        assert len(code) <= 18 and max(map(len, code)) <= 120, chapter


def test_every_function_that_the_page_names_is_there() -> None:
    import importlib

    sections = re.split(r"^## .*\(chapter (\d\d)\)$", TEXT, flags=re.MULTILINE)[1:]
    for chapter, text in zip(sections[::2], sections[1::2], strict=True):
        (module,) = (ROOT / "solutions").glob(f"ch{chapter}_*.py")
        space = vars(importlib.import_module(f"solutions.{module.stem}"))
        prose = re.sub(r"^```.*?^```$", "", text.partition("\n## ")[0], flags=re.MULTILINE | re.DOTALL)
        named = set(re.findall(r"`([a-z]+(?:_[a-z]+)*)`", prose)) - {"dataset", "ends", "tokens", "positions"}
        assert named and named <= space.keys(), (chapter, named - space.keys())
