"""Othello for any even board of up to 8 x 8: the rules on bit boards, for many games at once, and random games.

Squares are numbered row by row, row * size + col. A move is the number of a square, or PASS = size² if the player has
no square to play; BOS = size² + 1 begins a row of tokens. Black begins, and every move changes the player, a PASS too:
so before move number t (the first is 0) black is to move if t is even. When neither player has a square, the game is
over; from then on the only move is PASS, which changes nothing, so that all games of a batch can go on equally long.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

EMPTY, BLACK, WHITE = 0, 1, -1  # of boards in colours
MINE, THEIRS = 1, -1  # of boards as the player to move sees them
SIZE = 6  # of the board that the model `othello-6` knows
PASS, BOS = SIZE**2, SIZE**2 + 1
D_VOCAB = SIZE**2 + 2
N_CTX = 32  # BOS and 31 moves, after each of which the next is predicted


class OthelloBoards:
    """`n` games on boards of `size` x `size`, side by side, all at the start: black to move.

    Each game is two 64-bit numbers, the squares of the player to move and those of the other. `size` is 4, 6 or 8.
    """

    def __init__(self, n: int, size: int = SIZE, device: torch.device | str = "cpu") -> None:
        if size not in (4, 6, 8):
            raise ValueError(f"OthelloBoards: the size is 4, 6 or 8, not {size}.")
        self.size, half = size, size // 2

        def bits(*places: tuple[int, int]) -> Tensor:
            return torch.full((n,), sum(1 << (row * size + col) for row, col in places), device=device)

        self.mine: Int[Tensor, " game"] = bits((half - 1, half), (half, half - 1))
        self.theirs: Int[Tensor, " game"] = bits((half - 1, half - 1), (half, half))
        self.n_moves = 0
        self._squares = torch.arange(size**2, device=device)
        self._steps = _steps(size)

    @classmethod
    def from_boards(cls, boards: Int[Tensor, "game row col"]) -> "OthelloBoards":
        """Games that stand as these boards do, seen by the player to move: 1 mine, -1 theirs, 0 empty.

        Their `colours` take the player to move for black.
        """
        games = cls(len(boards), boards.shape[-1], boards.device)
        place = torch.ones_like(games._squares) << games._squares
        flat = boards.flatten(1)
        games.mine, games.theirs = (((flat == player) * place).sum(dim=1) for player in (MINE, THEIRS))
        return games

    def legal(self) -> Bool[Tensor, "game move"]:
        """Which moves the player to move has: one column for each square, and one for PASS."""
        squares = self._unpack(self._moves(self.mine, self.theirs))
        return torch.cat([squares, ~squares.any(dim=1, keepdim=True)], dim=1)

    def over(self) -> Bool[Tensor, " game"]:
        """Which games are over: neither player has a square to play."""
        return (self._moves(self.mine, self.theirs) | self._moves(self.theirs, self.mine)) == 0

    def play(self, moves: Int[Tensor, " game"]) -> None:
        """Make one move in each game. Raises ValueError if one of them is not legal; then nothing is played."""
        if bool((moves < 0).any()) or bool((moves > self.size**2).any()):
            raise ValueError(f"OthelloBoards: moves are squares 0 to {self.size**2 - 1}, or {self.size**2} to pass.")
        legal = self.legal().gather(1, moves[:, None]).squeeze(1)
        if not bool(legal.all()):
            game = int((~legal).nonzero()[0])
            raise ValueError(f"OthelloBoards: move {int(moves[game])} is not legal in game {game}.")
        self._play(moves)

    def board(self) -> Int[Tensor, "game row col"]:
        """The boards as the player to move sees them: 1 mine, -1 theirs, 0 empty."""
        flat = self._unpack(self.mine).long() - self._unpack(self.theirs).long()
        return flat.reshape(-1, self.size, self.size)

    def colours(self) -> Int[Tensor, "game row col"]:
        """The boards in colours: 1 black, -1 white, 0 empty."""
        return self.board() * (BLACK if self.n_moves % 2 == 0 else WHITE)

    def _unpack(self, bits: Int[Tensor, " game"]) -> Bool[Tensor, "game square"]:
        return (bits[:, None] >> self._squares & 1).bool()

    def _moves(self, mine: Int[Tensor, " game"], theirs: Int[Tensor, " game"]) -> Int[Tensor, " game"]:
        moves = torch.zeros_like(mine)
        for step, mask in self._steps:
            run = _shift(mine, step, mask) & theirs
            for _ in range(self.size - 3):
                run = run | _shift(run, step, mask) & theirs
            moves |= _shift(run, step, mask)
        return moves & ~(mine | theirs)

    def _play(self, moves: Int[Tensor, " game"]) -> None:
        """Make moves that are known to be legal."""
        passed = moves == self.size**2
        placed = torch.where(passed, 0, torch.ones_like(moves) << moves.clamp(max=self.size**2 - 1))
        turned = torch.zeros_like(placed)
        for step, mask in self._steps:
            run = _shift(placed, step, mask) & self.theirs
            for _ in range(self.size - 3):
                run = run | _shift(run, step, mask) & self.theirs
            turned |= torch.where((_shift(run, step, mask) & self.mine) != 0, run, 0)
        self.mine, self.theirs = self.theirs & ~turned, self.mine | placed | turned
        self.n_moves += 1


def _steps(size: int) -> list[tuple[int, int]]:
    """For each direction, by how many bits a square moves, and on which squares it may come to lie."""
    everything = range(size**2)
    steps = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            if (down, right) != (0, 0):
                lands = [
                    square
                    for square in everything
                    if 0 <= square // size - down < size and 0 <= square % size - right < size
                ]
                mask = sum(1 << square for square in lands)
                # the 64 bits of an int64: the highest is its sign
                steps.append((down * size + right, mask - (1 << 64) if mask >> 63 else mask))
    return steps


def _shift(bits: Int[Tensor, " game"], step: int, mask: int) -> Int[Tensor, " game"]:
    return (bits << step if step > 0 else bits >> -step) & mask


def random_games(n: int, size: int, generator: torch.Generator, n_moves: int | None = None) -> Int[Tensor, "game move"]:
    """Games in which each move is drawn from the legal ones, all equally likely; PASS if there is none.

    They have `n_moves` moves, by default as many as there are empty squares at the start. A game that is over goes on
    with PASS.
    """
    boards = OthelloBoards(n, size, generator.device)
    games = []
    for _ in range(size**2 - 4 if n_moves is None else n_moves):
        legal = boards.legal()
        chance = torch.rand(legal.shape, generator=generator, device=generator.device)
        moves = torch.where(legal, chance, -1.0).argmax(dim=1)
        boards._play(moves)
        games.append(moves)
    return torch.stack(games, dim=1)


def with_bos(games: Int[Tensor, "game move"], size: int = SIZE) -> Int[Tensor, "game pos"]:
    """The games as tokens: BOS, then the moves."""
    return torch.nn.functional.pad(games, (1, 0), value=size**2 + 1)


def replay(
    games: Int[Tensor, "game move"], size: int = SIZE
) -> tuple[Int[Tensor, "game pos row col"], Bool[Tensor, "game pos legal"], Bool[Tensor, "game pos"]]:
    """The board in colours after each token of `with_bos(games)`, the legal moves there, and whether the game is over.

    Raises ValueError for a game with a move that is not legal.
    """
    boards = OthelloBoards(len(games), size, games.device)
    colours, legal, over = [boards.colours()], [boards.legal()], [boards.over()]
    for moves in games.unbind(dim=1):
        boards.play(moves)
        colours.append(boards.colours())
        legal.append(boards.legal())
        over.append(boards.over())
    return torch.stack(colours, dim=1), torch.stack(legal, dim=1), torch.stack(over, dim=1)


def legal_games(games: Int[Tensor, "game move"], size: int = SIZE) -> Bool[Tensor, " game"]:
    """Which games consist of legal moves only; as everywhere, PASS is legal if and only if no square is."""
    boards = OthelloBoards(len(games), size, games.device)
    fine = torch.ones(len(games), dtype=torch.bool, device=games.device)
    for moves in games.unbind(dim=1):
        legal = boards.legal()
        fine &= legal.gather(1, moves[:, None]).squeeze(1)
        boards._play(torch.where(fine, moves, legal.long().argmax(dim=1)))  # a spoiled game goes on somehow
    return fine


def count_games(depth: int, size: int) -> list[int]:
    """How many different games of 1, 2, ... `depth` moves there are from the start ("perft")."""
    boards = OthelloBoards(1, size)
    counts = []
    for _ in range(depth):
        game, move = boards.legal().nonzero(as_tuple=True)
        boards.mine, boards.theirs = boards.mine[game], boards.theirs[game]
        boards._play(move)
        counts.append(len(game))
    return counts
