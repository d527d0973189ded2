"""Checks of chapter 14, the game: discs turned, legal moves, boards after each move, and boards seen by the player."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.comparing import compare, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.data.othello import OthelloBoards, random_games

Fn = Callable[..., Any]
Walk = Callable[[int, int, int, int], list[int]]  # square, steps down and right, size -> the squares of a ray

ALL = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0))
STRAIGHT = tuple((down, right) for down, right in ALL if 0 in (down, right))
DIAGONAL = tuple((down, right) for down, right in ALL if 0 not in (down, right))

# --------------------------------------------------------------------------------------------------------------- turns


def ray(square: int, down: int, right: int, size: int) -> list[int]:
    """The squares that follow in one direction, as far as the edge."""
    row, col = divmod(square, size)
    steps = range(1, size)
    places = [(row + down * step, col + right * step) for step in steps]
    return [size * r + c for r, c in places if r in range(size) and c in range(size)]


def over_the_edge(square: int, down: int, right: int, size: int) -> list[int]:
    """The same by the numbers alone: what runs off a row comes back in the next one."""
    numbers = [square + step * (size * down + right) for step in range(1, size)]
    return [number for number in numbers if 0 <= number < size**2]


def turning(
    pattern: str = "(T+)M",
    directions: Sequence[tuple[int, int]] = ALL,
    walk: Walk = ray,
    names: str = "EMT",
    also: Callable[[int], list[int]] = lambda move: [],
    on_taken: bool = False,
) -> Fn:
    """flips, by a pattern of letters along each ray: E empty, M mine, T theirs; what is in brackets is turned."""

    def flips(board: Tensor, move: int) -> Tensor:
        letters = "".join(names[value] for value in board.flatten().tolist())  # 0, 1, and -1 is the last
        turned = torch.zeros(board.numel(), dtype=torch.bool, device=board.device)
        if letters[move] == "E" or on_taken:
            turned[also(move)] = True
            for down, right in directions:
                squares = walk(move, down, right, len(board))
                found = re.match(pattern, "".join(letters[square] for square in squares))
                if found:
                    turned[squares[found.start(1) : found.end(1)]] = True
        return turned.reshape(board.shape)

    return flips


right_turns = turning()
TURNS: dict[str, Fn] = {
    "only rows and columns are searched; there are eight directions.": turning(directions=STRAIGHT),
    "only diagonals are searched; there are eight directions.": turning(directions=DIAGONAL),
    "a run goes on over the edge, into the next row.": turning(walk=over_the_edge),
    "a run that ends in an empty square is turned; one of mine must stand behind it.": turning("(T+)[ME]"),
    "a run that reaches the edge is turned; one of mine must stand behind it.": turning("(T+)(?:M|$)"),
    "a run goes on through empty squares; it ends at the first one.": turning("(E*T[TE]*)M"),
    "mine and theirs are swapped: it is the other player's move.": turning(names="ETM"),
    "a move is allowed on a square that is taken.": turning(on_taken=True),
}


def some_board(size: int, seed: int) -> Tensor:
    """Any board, with about as many discs of each kind as empty squares; not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(3, (size, size), generator=generator) - 1).T


def played_board(size: int, n_moves: int, seed: int) -> Tensor:
    """A board from a game, as the player to move sees it."""
    boards = OthelloBoards(1, size)
    for moves in random_games(1, size, torch.Generator().manual_seed(seed), n_moves).unbind(dim=1):
        boards.play(moves)
    return boards.board()[0]


@known_mistakes(
    {
        **TURNS,
        "only the first disc of a run is turned.": turning("(T)T*M"),
        "the disc that is put down is among the turned ones.": turning(also=lambda move: [move]),
        "the disc behind the run is among the turned ones.": turning("(T+M)"),
    }
)
def check_flips(fn: Fn) -> None:
    """Against patterns of letters along rays, on boards of any kind, all sizes, and every square of one."""
    name = "flips"
    boards = [(some_board(6, seed), range(seed % 2, 36, 4)) for seed in range(3)]
    boards += [(some_board(8, 7), range(2, 64, 9)), (some_board(4, 8), range(16)), (played_board(6, 9, 1), range(36))]
    frame = torch.zeros(6, 6, dtype=torch.long)  # runs along all four edges, and behind each edge what would fit
    frame[0, 1:3], frame[0, 3], frame[1:3, 0], frame[3, 0] = -1, 1, -1, 1
    boards.append((frame + frame.rot90(2), range(36)))
    far = torch.zeros(8, 8, dtype=torch.long)  # the longest runs that there are
    for down, right in ((0, 1), (1, 0), (1, 1)):
        far.view(-1)[ray(0, down, right, 8)] = torch.tensor([-1] * 6 + [1])
    boards.append((far, range(0, 64, 63)))
    for board, moves in boards:
        for move in moves:
            with unchanged(name, board=board):
                actual = fn(board, move)
            call = f"{name} at square {move} of\n{shown(board)}\n "
            compare(call, actual, turning()(board, move), "row col")


def shown(board: Tensor) -> str:
    """A board as text, for messages."""
    return "\n".join("    " + " ".join("EMT"[value] for value in row) for row in board.tolist())


# --------------------------------------------------------------------------------------------------------- legal moves


def finding(flips: Fn = right_turns, keep: Callable[[Tensor, Tensor], Tensor] = lambda legal, board: legal) -> Fn:
    """legal_moves, square by square; `keep` changes what was found."""

    def legal_moves(board: Tensor) -> Tensor:
        found = torch.tensor([bool(flips(board, move).any()) for move in range(board.numel())], device=board.device)
        return keep(found.reshape(board.shape), board)

    return legal_moves


def beside_theirs(legal: Tensor, board: Tensor) -> Tensor:
    near = torch.zeros_like(legal)
    for square in range(board.numel()):
        for down, right in ALL:
            near.view(-1)[square] |= any(
                board.flatten()[place] == -1 for place in ray(square, down, right, len(board))[:1]
            )
    return near & (board == 0)


@known_mistakes(
    {
        **{words: finding(flips) for words, flips in TURNS.items()},
        "every empty square is allowed; something must be turned.": finding(keep=lambda legal, board: board == 0),
        "every empty square beside one of theirs is allowed; something must be turned.": finding(keep=beside_theirs),
        "it is where no move is possible.": finding(keep=lambda legal, board: ~legal),
    }
)
def check_legal_moves(fn: Fn) -> None:
    """On boards of games and others, of all sizes; a full board, and one on which a player has to pass."""
    name = "legal_moves"
    lonely = torch.zeros(4, 4, dtype=torch.long)
    lonely[3, 1] = -1
    boards = [lonely, some_board(6, 20), some_board(4, 21), played_board(6, 12, 3), played_board(4, 5, 2)]
    boards += [torch.ones(4, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 0], *[[1] * 4] * 2, [0, 1, -1, -1]])]
    for board in boards:
        with unchanged(name, board=board):
            actual = fn(board)
        compare(f"{name} of\n{shown(board)}\n ", actual, finding()(board), "row col")


# -------------------------------------------------------------------------------------------------------------- boards


def replaying(
    flips: Fn = right_turns,
    player_of: Callable[[int, list[int], int], int] = lambda number, game, passing: 1 - 2 * (number % 2),
    begin: int = 1,
    put_down: bool = True,
    turn: bool = True,
    boards: Callable[[Tensor], Tensor] = lambda states: states,
) -> Fn:
    """board_states with lists of numbers; `player_of` says whose move it is, and `boards` what is kept."""

    def board_states(games: Tensor, size: int) -> Tensor:
        rows, middle = [], size * (size // 2 - 1) + size // 2 - 1
        for game in games.tolist():
            flat = [0] * size**2
            flat[middle], flat[middle + 1], flat[middle + size], flat[middle + size + 1] = -begin, begin, begin, -begin
            kept = [list(flat)]
            for number, move in enumerate(game):
                player = player_of(number, game, size**2)
                if move < size**2:
                    seen = torch.tensor(flat).reshape(size, size) * player
                    turned = flips(seen, move).flatten().nonzero().flatten().tolist() if turn else []
                    for place in turned + [move] * put_down:
                        flat[place] = player
                kept.append(list(flat))
            rows.append(kept)
        return boards(torch.tensor(rows, dtype=games.dtype, device=games.device).unflatten(2, (size, size)))

    return board_states


def not_switched(number: int, game: list[int], passing: int) -> int:
    """A pass leaves the move with the same player."""
    return 1 - 2 * (sum(move != passing for move in game[:number]) % 2)


def by_mover(states: Tensor) -> Tensor:
    return states * (1 - 2 * (torch.arange(states.shape[1]) % 2))[:, None, None]


@known_mistakes(
    {
        "the player is not switched after a pass; every move changes the player, a pass too.": replaying(
            player_of=not_switched
        ),
        "the boards before each move are taken for those after it.": replaying(
            boards=lambda states: torch.cat([states[:, :1], states[:, :-1]], dim=1)
        ),
        "boards are seen by the player to move; here they are in colours.": replaying(boards=by_mover),
        "white begins; black does.": replaying(player_of=lambda number, game, passing: 2 * (number % 2) - 1),
        "black and white are swapped at the start.": replaying(begin=-1),
        "nothing is turned; discs are only put down.": replaying(turn=False),
        "the disc of the move itself is not put down.": replaying(put_down=False),
        "the player never changes: every move is black's.": replaying(player_of=lambda number, game, passing: 1),
        "the last board stands at every position; keep a copy of each.": replaying(
            boards=lambda states: states[:, -1:].expand_as(states).clone()
        ),
        **{words: replaying(flips) for words, flips in list(TURNS.items())[:5]},
    }
)
def check_board_states(fn: Fn) -> None:
    """On games with passes, of two sizes; none at all; and the game's own engine agrees with the oracle."""
    name = "board_states"
    generator = torch.Generator().manual_seed(2)
    small = random_games(12, 4, generator)
    with_passes = small[(small[:, :-2] == 16).any(dim=1)][:3]
    for games, size in ((with_passes, 4), (random_games(2, 6, generator, 11), 6), (small[:1, :0], 4)):
        with unchanged(name, games=games):
            actual = fn(games, size)
        compare(f"{name} of {games.tolist()}", actual, replaying()(games, size), "game pos row col")


def labelling(mine: Callable[[int], int] = lambda pos: 1 - 2 * (pos % 2), names: Sequence[int] = (0, 1, 2)) -> Fn:
    """relative_labels, number by number."""

    def relative_labels(states: Tensor) -> Tensor:
        labels = torch.full_like(states.flatten(2), names[0])
        for pos in range(states.shape[1]):
            seen = states[:, pos].flatten(1) * mine(pos)
            for value, label in ((1, names[1]), (-1, names[2])):
                labels[:, pos][seen == value] = label
        return labels

    return relative_labels


@known_mistakes(
    {
        "mine and theirs are swapped: black is to move at even positions.": labelling(lambda pos: 2 * (pos % 2) - 1),
        "they are swapped at odd positions: every board is seen by black.": labelling(lambda pos: 1),
        "every board is seen by white.": labelling(lambda pos: -1),
        "the labels are 1, 2 and 0; they are 0 empty, 1 mine, 2 theirs.": labelling(names=(2, 0, 1)),
        "theirs is -1; its label is 2.": labelling(names=(0, 1, -1)),
    }
)
def check_relative_labels(fn: Fn) -> None:
    """Any boards, whose sizes all differ; one position."""
    name = "relative_labels"
    for n_games, n_pos, rows, cols in ((2, 5, 3, 4), (3, 1, 2, 2), (1, 6, 4, 3)):
        generator = torch.Generator().manual_seed(n_pos)
        states = torch.randint(-1, 2, (n_games, n_pos, rows, cols), generator=generator)
        with unchanged(name, states=states):
            actual = fn(states)
        compare(f"{name} of {n_pos} positions", actual, labelling()(states), "game pos square")
