"""What the checks of interventions and circuits in chapter 14 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch14_othello as ref
from course_utils.checks.ch14.using import (
    CFG,
    adding,
    attending,
    attributing,
    erring,
    projecting,
    reading,
    searching,
)
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.data.othello import legal_games, random_games, replay
from course_utils.hooks import add_hook, run_with_cache
from tests.ch14 import other_othello as other

SECRETS = ("changed[every", "argsort", "einsum(", "linalg.qr", ".scatter(", "% 2 == 0")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # the last of two axes
    "-2 -> 2",  # the last two of four axes
    "resid.clone() -> resid",  # written in place: nobody else reads it
    "logits.argsort(dim=-1, descending=True).argsort(dim=-1) -> logits.argsort(dim=-1, descending=True).argsort()",
    "logits.argsort(dim=-1, descending=True) -> logits.argsort(descending=True)",  # the last axis is the default
    "query[:, None] + key -> query[:, None] - key",  # as even as the sum
    "(query[:, None] + key) % 2 == 0 -> (query[:, None] + key) % 2 <= 0",
    "key == 0 -> key <= 0",  # no key is smaller
    "key > 0 -> key != 0",
}


def leaves_its_hook(model: Any, *args: Any) -> Any:
    answer = other.intervene_on_square(model, *args)
    add_hook(model, "hook_embed", lambda activation, hook: None)
    return answer


def relabelled(cache: Any, direction: Any, layer: int) -> Any:
    labels, values = other.square_attribution(cache, direction, layer)
    return [label.replace(" ", "") for label in labels], values


def summed(cache: Any, direction: Any, layer: int) -> Any:
    labels, values = other.square_attribution(cache, direction, layer)
    return labels, values.cumsum(0)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "intervene_on_square": [
        ("wrong", adding(lambda layers: list(range(3)), which=lambda i, n: 0)),
        ("a hook is left behind", leaves_its_hook),
        ("wrong shape", lambda *args: other.intervene_on_square(*args)[:, None]),
        ("gradients are recorded", lambda *args: other.intervene_on_square(*args).requires_grad_()),
        ("wrong", adding(put=lambda resid, vector: resid + vector * resid.norm())),
    ],
    "intervention_errors": [
        ("wrong", erring(size=lambda k: k + 1)),
        ("wrong", lambda logits, legal: ref.intervention_errors(logits, legal) * 2),
        ("expected dtype int64", lambda logits, legal: ref.intervention_errors(logits, legal).float()),
    ],
    "square_attribution": [
        ("the labels", relabelled),
        ("wrong", summed),
        ("wrong", attributing(scale=lambda cache, layer: cache["resid_post", layer].std(dim=-1))),
        ("expected a tuple", lambda *args: other.square_attribution(*args)[1]),
    ],
    "attention_by_side": [
        ("wrong", attending(over=lambda pattern: pattern[0])),
        ("wrong shape", lambda pattern: other.attention_by_side(pattern)[:2]),
        ("wrong shape", lambda pattern: other.attention_by_side(pattern).mean(2)),
    ],
    "neuron_board_pattern": [
        ("in another order", lambda *args: other.neuron_board_pattern(*args).T),
        ("wrong", lambda *args: other.neuron_board_pattern(*args).abs()),
        ("wrong", reading(weights=lambda mlp: mlp.W_in.T + mlp.b_in[:, None])),
    ],
    "share_in_space": [
        ("wrong", projecting(basis=lambda directions: directions - directions.mean(1, keepdim=True))),
        ("wrong shape", lambda *args: other.share_in_space(*args).mean()),
        ("wrong", lambda *args: other.share_in_space(*args).round()),
    ],
    "one_move_apart": [
        ("expected a tuple", lambda *args: other.one_move_apart(*args)[1]),
        ("wrong", searching(count=lambda game, pair: game + 1)),
        ("wrong", lambda *args: (other.one_move_apart(*args)[0], other.one_move_apart(*args)[1].roll(1, 1))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_contributions_sum_to_the_normalised_stream() -> None:
    model, direction = SmallModel(CFG), torch.arange(6.0)
    with torch.no_grad():
        _, cache = run_with_cache(model, some_tokens(CFG, 3, 5, seed=0), names="*")
    for layer in range(3):
        _, parts = ref.square_attribution(cache, direction, layer)
        name = f"blocks.{layer + 1}.ln1.hook_normalized" if layer < 2 else "ln_final.hook_normalized"
        torch.testing.assert_close(parts.sum(0), cache[name] @ direction)


def test_attention_sums_to_one() -> None:
    pattern = torch.randn(3, 2, 7, 7).tril().masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(ref.attention_by_side(pattern).sum(0), torch.ones(2, 7))


def test_pairs_differ_in_one_move_and_are_legal() -> None:
    games = random_games(200, 6, torch.Generator().manual_seed(0), 16)
    which, pairs = ref.one_move_apart(games, 12, 6)
    assert len(pairs) > 50
    assert legal_games(pairs).all()
    assert ((pairs != games[which]).sum(1) == 1).all()
    assert (pairs[:, 12] != games[which, 12]).all()


def test_state_means_by_hand() -> None:
    x, labels = torch.randn(40, 5), torch.randint(3, (40, 4))
    labels[:, 3] = 1
    found = ref.state_means(x, labels)
    for square in range(4):
        for state in range(3):
            chosen = x[labels[:, square] == state]
            torch.testing.assert_close(found[state, square], chosen.mean(0) if len(chosen) else torch.zeros(5))


def test_cases_change_the_legal_moves() -> None:
    """Against the reference's own legal moves on the edited boards; the middle squares are left alone."""
    games = random_games(20, 6, torch.Generator().manual_seed(0))
    states, _, _ = replay(games)
    for new in (-1, 0):
        cases = ref.intervention_cases(states, 25, torch.Generator().manual_seed(1), new)
        assert len(cases["game"]) == 25
        assert not set(cases["square"].tolist()) & {14, 15, 20, 21}
        assert not torch.equal(cases["legal"], cases["legal_after"])
        labels = ref.relative_labels(states)
        for number in range(25):
            game, pos, square = (int(cases[name][number]) for name in ("game", "pos", "square"))
            assert labels[game, pos, square] == cases["before"][number]
            assert int(cases["after"][number]) == (3 - int(cases["before"][number]) if new else 0)
            board = torch.where(labels[game, pos] == 2, -1, labels[game, pos])
            board[square] *= new
            assert torch.equal(ref.legal_moves(board.reshape(6, 6)).flatten(), cases["legal_after"][number, :-1])
            assert 4 <= pos < 28


def test_what_squares_write_and_readers_by_hand() -> None:
    """A stream that is a sum over squares and positions, without noise."""
    generator = torch.Generator().manual_seed(0)
    labels, positions = torch.randint(3, (900, 4), generator=generator), torch.arange(900) % 5
    true = torch.randn(3, 4, 12, generator=generator)
    x = sum(true[labels[:, square], square] for square in range(4)) + torch.randn(5, 12, generator=generator)[positions]
    writes = ref.what_squares_write(x, labels, positions)
    torch.testing.assert_close(writes[1] - writes[2], true[1] - true[2], rtol=0, atol=0.05)
    W, b = ref.square_readers(x, labels)
    assert float(ref.probe_accuracy(W, b, x, labels)[0]) > 0.8
    cases = {
        "square": torch.arange(900) % 4,
        "before": labels[torch.arange(900), torch.arange(900) % 4],
        "after": (labels[torch.arange(900), torch.arange(900) % 4] + 1) % 3,
    }
    pushed = ref.push_until_read(writes, W, b, cases, target=0.5)(x)
    scores = torch.einsum("bd,bds->bs", pushed, W[cases["square"]]) + b[cases["square"]]
    ahead = (scores.gather(1, cases["after"][:, None]) - scores.gather(1, cases["before"][:, None]))[:, 0]
    assert (ahead > 0.5 - 1e-3).all()
    torch.testing.assert_close(ref.push_until_read(writes, W, b, cases, target=-9.0)(x), x)


def test_an_edit_that_adds_is_an_intervention() -> None:
    model, tokens = SmallModel(CFG), some_tokens(CFG, 4, 5, seed=3)
    positions, vectors = torch.tensor([3, 1, 0, 4]), torch.randn(2, 4, 6)
    edits = {
        layer: lambda stream, vector=vector: stream + vector for layer, vector in zip((0, 2), vectors, strict=True)
    }
    torch.testing.assert_close(
        ref.run_with_edits(model, tokens, positions, edits),
        ref.intervene_on_square(model, tokens, positions, [0, 2], vectors),
    )
