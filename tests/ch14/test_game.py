"""What the checks of the game in chapter 14 cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch

import solutions.ch14_othello as ref
from course_utils.checks.ch14.game import ALL, finding, labelling, replaying, turning
from course_utils.data.othello import OthelloBoards, count_games, legal_games, random_games, replay
from tests.ch14 import other_othello as other

SECRETS = ("while 0 <=", "run.append", "board * player")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "0 -> -1",  # a run that goes on behind the edge is thrown away: the condition after the loop asks again
    "board[row, col] == -1 -> board[row, col] <= -1",  # -1, 0 and 1 are all there is
    "board[row, col] == 1 -> board[row, col] >= 1",
    "seen == -1 -> seen <= -1",
    "games.tolist() -> games",  # one-element tensors are numbers, too
    "move != size ** 2 -> move < size ** 2",  # no move is larger
    "number % 2 == 0 -> number % 2 <= 0",
    "board * player -> board / player",  # by 1 or -1
}


def near_only(board: torch.Tensor, move: int) -> torch.Tensor:
    """Turned are only discs up to four squares away."""
    turned, (row, col) = ref.flips(board, move), divmod(move, len(board))
    here = torch.arange(len(board))
    return turned & ((here - row).abs() <= 4)[:, None] & ((here - col).abs() <= 4)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "flips": [
        ("wrong", near_only),
        ("wrong", turning(directions=ALL[1:])),
        ("wrong", lambda board, move: ref.flips(board, move).T),
        ("wrong shape", lambda board, move: ref.flips(board, move).flatten()),
        ("expected dtype bool", lambda board, move: ref.flips(board, move).long()),
    ],
    "legal_moves": [
        ("wrong", finding(keep=lambda legal, board: legal.T)),
        ("wrong shape", lambda board: ref.legal_moves(board).flatten()),
        ("wrong", finding(keep=lambda legal, board: legal & ~legal[0].any())),
    ],
    "board_states": [
        ("wrong shape", lambda games, size: ref.board_states(games, size)[:, 1:]),
        ("wrong", replaying(player_of=lambda number, game, passing: 1 - 2 * (sum(game[:number]) % 2))),
        ("wrong", replaying(boards=lambda states: states.transpose(2, 3))),
    ],
    "relative_labels": [
        ("wrong", labelling(lambda pos: 1 if pos < 2 else -1)),
        ("wrong shape", lambda states: ref.relative_labels(states).unflatten(2, states.shape[2:])),
        ("wrong", lambda states: ref.relative_labels(states.transpose(2, 3))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}

PERFT = {8: [4, 12, 56, 244, 1396, 8200, 55092], 6: [4, 12, 56, 244, 1364, 7604, 47740]}


@pytest.mark.parametrize("size", PERFT)
def test_as_many_games_as_others_have_counted(size: int) -> None:
    assert count_games(7, size) == PERFT[size]


@pytest.mark.parametrize("size", (6, 8))
def test_a_grid_and_loops_count_as_many(size: int) -> None:
    counted = [other.grid_count(other.grid_start(size), 1, depth) for depth in range(1, 6)]
    assert counted == PERFT[size][:5]


@pytest.mark.parametrize("size", (4, 6, 8))
def test_two_engines_play_the_same_games(size: int) -> None:
    """Legal moves and boards at each move of random games, to their ends; passes among them."""
    games = random_games(12, size, torch.Generator().manual_seed(size))
    states, legal, over = replay(games, size)
    for number, game in enumerate(games.tolist()):
        grid, player = other.grid_start(size), 1
        for pos in range(len(game) + 1):
            assert states[number, pos].tolist() == grid
            moves = [size * row + col for row, col, _ in other.grid_moves(grid, player)]
            assert legal[number, pos].nonzero().flatten().tolist() == (moves or [size**2])
            assert bool(over[number, pos]) == (not moves and not other.grid_moves(grid, -player))
            if pos < len(game):
                grid, player = other.grid_after(grid, player, game[pos]), -player
    if size < 8:
        assert (games == size**2).any()


def test_the_reference_agrees_with_the_engine() -> None:
    games = random_games(3, 6, torch.Generator().manual_seed(0))
    states, legal, _ = replay(games)
    assert torch.equal(ref.board_states(games, 6), states)
    boards = OthelloBoards(3)
    for moves in games[:, :9].unbind(dim=1):
        boards.play(moves)
    found = torch.stack([ref.legal_moves(board) for board in boards.board()]).flatten(1)
    assert torch.equal(found, legal[:, 9, :-1])


def test_random_games_take_each_move_equally_often() -> None:
    games = random_games(4000, 6, torch.Generator().manual_seed(1), 1)
    counts = games.flatten().bincount()
    assert (counts > 0).sum() == 4
    assert ((counts[counts > 0] - 1000).abs() < 150).all()


def test_what_is_not_legal_is_refused() -> None:
    with pytest.raises(ValueError, match="the size is"):
        OthelloBoards(1, 5)
    boards = OthelloBoards(2)
    for moves in ([0, 1], [36, 36], [8, -1], [8, 37]):
        with pytest.raises(ValueError, match="OthelloBoards"):
            boards.play(torch.tensor(moves))
    assert boards.n_moves == 0
    games = random_games(50, 6, torch.Generator().manual_seed(3))
    assert legal_games(games).all()
    spoiled = games.clone()
    spoiled[:, 20] = games[:, 3]
    assert not legal_games(spoiled).any()
