"""Prompts for indirect object identification: rectangular, balanced, and corrupted as promised."""

from collections import Counter

import pytest
import torch

from course_utils.data import tales
from course_utils.data.ioi import ORDERS, PLACES, TEMPLATES, IOIDataset
from course_utils.pretrained import shipped_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return shipped_tokenizer("tales")


@pytest.fixture(scope="module")
def dataset(tokenizer) -> IOIDataset:
    return IOIDataset(64, tokenizer, seed=3)


def assert_consistent(dataset: IOIDataset) -> None:
    """Labels, positions and texts say the same."""
    tokenizer, rows = dataset.tokenizer, torch.arange(len(dataset))
    assert set(dataset.positions) == set(PLACES)
    assert torch.equal(dataset.tokens[rows, dataset.positions["IO"]], dataset.io)
    assert torch.equal(dataset.tokens[rows, dataset.positions["S1"]], dataset.s)
    assert torch.equal(dataset.positions["S1+1"], dataset.positions["S1"] + 1)
    assert (dataset.positions["END"] == dataset.tokens.shape[1] - 1).all()
    names = {tokenizer.encode(" " + name)[0] for name in dataset.names}
    for row, text in enumerate(dataset.texts):
        assert dataset.tokens[row].tolist() == [tokenizer.bos_token_id, *tokenizer.encode(text)]
        found = [pos for pos, token in enumerate(dataset.tokens[row].tolist()) if token in names]
        assert found == sorted(int(dataset.positions[place][row]) for place in ("IO", "S1", "S2"))
        io_first = bool(dataset.positions["IO"][row] < dataset.positions["S1"][row])
        assert dataset.orders[row] == ("ABBA" if io_first else "BABA")


def test_prompts_are_rectangular_and_labelled(dataset: IOIDataset) -> None:
    assert_consistent(dataset)
    rows = torch.arange(len(dataset))
    assert torch.equal(dataset.tokens[rows, dataset.positions["S2"]], dataset.s)
    assert not (dataset.io == dataset.s).any()
    assert len(dataset) == len(dataset.texts) == 64


def test_templates_and_orders_take_turns(dataset: IOIDataset) -> None:
    counts = Counter(zip(dataset.templates.tolist(), dataset.orders, strict=True))
    assert set(counts) == {(number, order) for number in range(len(TEMPLATES)) for order in ORDERS}
    assert set(counts.values()) == {2}


def test_prompts_are_beginnings_of_stories_that_the_grammar_could_write(dataset: IOIDataset) -> None:
    for row, text in enumerate(dataset.texts[:32]):
        answer = dataset.tokenizer.decode([dataset.io[row]])
        endings = (".", " with a smile.", " again.")
        assert any(tales.parse(text + answer + end) for end in endings), text


def test_the_same_seed_gives_the_same_prompts(tokenizer, dataset: IOIDataset) -> None:
    assert IOIDataset(64, tokenizer, seed=3).texts == dataset.texts
    assert IOIDataset(64, tokenizer, seed=4).texts != dataset.texts
    assert IOIDataset(5, tokenizer, seed=4).tokens.shape[1] == dataset.tokens.shape[1]


THIRD = ("<when> {A}, {B} and {X} <went> to the <place>. While {X} <watched>, {S} <gave> <thing> to",)
LONGER = (
    "<when> {A} met {B} at the <place>. <scene> <scene> <scene> {S} <gave> <thing> to",
    "<when> {A} met {B} at the <place>. <scene> {A} saw {B} <near>. <scene> <then> {S} <gave> <thing> to",
)


def test_other_templates(tokenizer) -> None:
    """Names may come more often than usual: positions are those of their first mentions, and of the giver's return."""
    dataset = IOIDataset(12, tokenizer, seed=3, templates=LONGER)
    rows = torch.arange(12)
    assert set(dataset.templates.tolist()) == {0, 1}
    for place, wanted in {"IO": dataset.io, "S1": dataset.s, "S2": dataset.s}.items():
        assert torch.equal(dataset.tokens[rows, dataset.positions[place]], wanted)
    for row in range(12):
        mentions = (dataset.tokens[row] == dataset.s[row]).nonzero()[:, 0].tolist()
        assert mentions[0] == dataset.positions["S1"][row]
        assert mentions[-1] == dataset.positions["S2"][row]
        assert len(mentions) == 2 + int(dataset.templates[row])
    both = dataset.flipped("names").flipped("order")
    assert both.tokens.shape == dataset.tokens.shape
    assert torch.equal(both.io, dataset.s)


def test_a_third_person_keeps_the_name(tokenizer) -> None:
    dataset = IOIDataset(20, tokenizer, seed=3, templates=THIRD)
    names = {tokenizer.encode(" " + name)[0] for name in dataset.names}

    def mentions(some: IOIDataset, row: int) -> list[int]:
        return [token for token in some.tokens[row].tolist() if token in names]

    others = [dataset.flipped(kind) for kind in ("abc", "names", "order")]
    for row in range(20):
        first, second, third, again, giver = mentions(dataset, row)
        assert third == again
        assert giver in (first, second)
        assert len({first, second, third}) == 3
        for other in others:
            assert mentions(other, row)[2:4] == [third, third]
        assert len({*mentions(others[0], row), first, second}) == 6


def test_the_usual_prompts_stay_what_they_were(tokenizer) -> None:
    """Figures in lessons and cards are about these."""
    texts = IOIDataset(3, tokenizer, seed=3).flipped("abc").texts
    assert texts == [
        "At noon Luke met Chris at the market. After a while Eric handed a pen to",
        "Last Sunday George and David had coffee together. Then Martin offered a coin to",
        "One day Adam met Mary at the river. It was Victor who threw a map from home to",
    ]


@pytest.mark.parametrize("kind", ["abc", "names", "order"])
def test_corruptions_keep_length_words_and_labels(dataset: IOIDataset, kind: str) -> None:
    before = dataset.tokens.clone()
    other = dataset.flipped(kind)
    assert_consistent(other)
    assert torch.equal(dataset.tokens, before)
    assert other.tokens.shape == dataset.tokens.shape
    assert torch.equal(other.templates, dataset.templates)
    changed = other.tokens != dataset.tokens
    places = torch.zeros_like(changed)
    for place in ("IO", "S1", "S2"):
        places[torch.arange(len(dataset)), dataset.positions[place]] = True
    assert not (changed & ~places).any()
    assert (changed.sum(1) == {"abc": 3, "names": 3, "order": 2}[kind]).all()


def test_what_each_corruption_does(dataset: IOIDataset) -> None:
    rows = torch.arange(len(dataset))
    abc, names, order = (dataset.flipped(kind) for kind in ("abc", "names", "order"))
    three = torch.stack([abc.tokens[rows, dataset.positions[place]] for place in ("IO", "S1", "S2")])
    old = torch.stack([dataset.io, dataset.s])
    assert all(len(set(column)) == 5 for column in torch.cat([three, old]).T.tolist())
    assert torch.equal(names.io, dataset.s)
    assert torch.equal(names.s, dataset.io)
    assert names.orders == dataset.orders
    assert torch.equal(order.io, dataset.io)
    assert all(first != second for first, second in zip(order.orders, dataset.orders, strict=True))
    both = names.flipped("order")
    changed = both.tokens != dataset.tokens
    assert torch.equal(changed.nonzero()[:, 1], dataset.positions["S2"])
    assert torch.equal(both.flipped("order").flipped("names").tokens, dataset.tokens)


def test_selected_prompts(dataset: IOIDataset) -> None:
    few = dataset.select([5, 2])
    assert_consistent(few)
    assert torch.equal(few.tokens, dataset.tokens[[5, 2]])


def test_a_tokenizer_that_adds_a_bos_by_itself(dataset: IOIDataset) -> None:
    """As Llama's do: the prompts are those of a tokenizer that does not."""
    from tokenizers.processors import TemplateProcessing

    adding = shipped_tokenizer("tales")
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{adding.bos_token} $A {adding.eos_token}",
        special_tokens=[(adding.bos_token, adding.bos_token_id), (adding.eos_token, adding.eos_token_id)],
    )
    assert len(adding.encode(" Mary")) == 3
    other = IOIDataset(64, adding, seed=3)
    assert torch.equal(other.tokens, dataset.tokens)
    assert all(torch.equal(other.positions[place], dataset.positions[place]) for place in PLACES)
    assert torch.equal(other.flipped("names").tokens, dataset.flipped("names").tokens)


class Cutting:
    """A tokenizer of whole words, which cuts one name in two."""

    bos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [sum(map(ord, word)) for word in text.replace(" Nick", " Ni ck").split()]

    def decode(self, tokens: list[int]) -> str:
        return f"<{tokens[0]}>"


def test_a_name_of_two_tokens_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="' Nick' is not one token"):
        IOIDataset(4, Cutting(), seed=0)


def test_what_cannot_be_is_refused(tokenizer, dataset: IOIDataset) -> None:
    with pytest.raises(ValueError, match="no corruption 'abd'"):
        dataset.flipped("abd")
    with pytest.raises(ValueError, match="nobody is named twice"):
        dataset.flipped("abc").flipped("names")
    with pytest.raises(ValueError, match="five different names"):
        IOIDataset(4, tokenizer, seed=0, names=["Mary", "John", "Tom", "Mary", "John"])
    with pytest.raises(ValueError, match="six with"):
        IOIDataset(4, tokenizer, seed=0, names=["Mary", "John", "Tom", "Anna", "Paul"], templates=THIRD)
    with pytest.raises(ValueError, match="a space before it"):
        IOIDataset(4, tokenizer, seed=0, templates=["{A} met {B}. <then> {S} <gave> <thing> to"])
    with pytest.raises(ValueError, match="lacks one"):
        IOIDataset(4, tokenizer, seed=0, templates=["<when> {A} met {B}. Then {A} gave it to"])
    with pytest.raises(ValueError, match="is not one token"):
        IOIDataset(4, tokenizer, seed=0, names=["Mary", "Zebulon", "Tom", "Anna", "John"])
