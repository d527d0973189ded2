"""A Llama out of a GGUF file: a tiny one, quantised and written by the test."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from course_utils import fetching
from course_utils.bpe_files import read_byte_level_bpe
from course_utils.gguf_models import read_gguf
from course_utils.pretrained import PretrainedError, load_pretrained
from solutions import ch02_transformer as solution
from solutions.ch01_tokenization import BPETokenizer, pretokenize
from tests.support.tiny_gguf import LEFT_OUT, TOKENS, write_tiny_gguf

NAME = "smollm2-135m"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tiny file, in the place of the one that is fetched; the model of transformers that it must equal."""
    monkeypatch.setenv(fetching.FOLDER, str(tmp_path))
    file = tmp_path / NAME / "tiny.gguf"
    file.parent.mkdir()
    model = write_tiny_gguf(file)
    files = {file.name: ("", fetching.sha256_of(file))}
    monkeypatch.setitem(fetching.PACKAGES, NAME, replace(fetching.PACKAGES[NAME], files=files))
    return file, model


def test_the_logits_are_those_of_transformers(there) -> None:
    _, theirs = there
    ours = load_pretrained(solution.Transformer, NAME)
    tokens = torch.randint(len(TOKENS), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    assert ours.cfg.tied and ours.cfg.n_kv_heads == 2 and ours.cfg.rotary_base == 500.0
    with torch.no_grad():
        ours.ln_final.w.add_(1.0)  # nothing of it lies in the file, which cannot be written


def test_an_unembedding_of_its_own(tmp_path: Path) -> None:
    theirs = write_tiny_gguf(tmp_path / "untied.gguf", tied=False)
    cfg, weights, _ = read_gguf(tmp_path / "untied.gguf")
    expected = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
    assert not cfg.tied and weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def test_the_tokenizer(there) -> None:
    tokenizer = load_pretrained(solution.Transformer, NAME).tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2, 2)
    written = [tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) for text in ("the the 12", "a<|im_end|>1212")]
    assert written == [["t", "he", "Ġthe", "Ġ", "1", "2"], ["a", "<|im_end|>", "1", "2", "1", "2"]]  # digits stay alone
    for text in ["  Two  spaces .", "東京 🙂\n\r\t", "don't<|endoftext|>x"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ours = BPETokenizer.from_huggingface(tokenizer)
    assert all(ours.encode(text) == tokenizer.encode(text) for text in ["the 1212, the", "é½²٣", "<|im_start|>"])
    assert len(read_byte_level_bpe(tokenizer, pretokenize).vocab) == len(TOKENS) - 3


def test_bytes_without_a_token_are_left_out(there) -> None:
    tokenizer = load_pretrained(solution.Transformer, NAME).tokenizer
    for byte in LEFT_OUT:
        character = {0x04: "\x04", 0xF1: "\U00040000"}[byte]
        whole = character.encode().replace(bytes([byte]), b"")
        ids = tokenizer.encode(f"a{character}b")
        assert len(ids) == 2 + len(whole) and not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_a_damaged_file_is_refused_by_name(there, damage: str) -> None:
    file, _ = there
    content = file.read_bytes()
    file.write_bytes(content[:-100] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        PretrainedError, match=r"tiny\.gguf is damaged or was changed, .*`course models fetch"
    ) as caught:
        load_pretrained(solution.Transformer, NAME)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_has_no_converter_says_what_to_do(there, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(solution.Transformer):
        """A class in a module, this one, that has no converter yet."""

    with pytest.raises(PretrainedError, match=r"write convert_llama_weights\(state_dict, cfg\) where Mine is defined"):
        load_pretrained(Mine, NAME)
    load_pretrained(Mine, NAME, convert=solution.convert_llama_weights)
    with pytest.raises(PretrainedError, match="no snapshots"):
        load_pretrained(Mine, NAME, step=100)
    file, _ = there
    file.unlink()
    with pytest.raises(PretrainedError, match=rf"{NAME} is not on this machine: `course models fetch {NAME}` gets it"):
        load_pretrained(solution.Transformer, NAME)
    with pytest.raises(PretrainedError, match=r"The nearest are: smollm2-135m"):
        load_pretrained(solution.Transformer, "smollm")
    monkeypatch.setattr(fetching, "fetch", lambda name: write_tiny_gguf(file) and file.parent)
    assert load_pretrained(solution.Transformer, NAME, download=True).cfg.n_layers == 2
