"""Right answers of chapter 14 in another style, and Othello once more, on a grid of lists, sharing nothing."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.data.othello import replay
from course_utils.hooks import hooks

Grid = list[list[int]]


def grid_start(size: int) -> Grid:
    grid, half = [[0] * size for _ in range(size)], size // 2
    grid[half - 1][half] = grid[half][half - 1] = 1
    grid[half - 1][half - 1] = grid[half][half] = -1
    return grid


def grid_turned(grid: Grid, row: int, col: int, player: int) -> list[tuple[int, int]]:
    size, turned = len(grid), []
    if grid[row][col]:
        return []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            line, y, x = [], row + down, col + right
            while (down or right) and 0 <= y < size and 0 <= x < size and grid[y][x] == -player:
                line.append((y, x))
                y, x = y + down, x + right
            if line and 0 <= y < size and 0 <= x < size and grid[y][x] == player:
                turned += line
    return turned


def grid_moves(grid: Grid, player: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    every = [(row, col) for row in range(len(grid)) for col in range(len(grid))]
    return [(row, col, turned) for row, col in every if (turned := grid_turned(grid, row, col, player))]


def grid_after(grid: Grid, player: int, move: int) -> Grid:
    after = [list(row) for row in grid]
    if move < len(grid) ** 2:
        row, col = divmod(move, len(grid))
        for y, x in [(row, col), *grid_turned(grid, row, col, player)]:
            after[y][x] = player
    return after


def grid_count(grid: Grid, player: int, depth: int) -> int:
    if depth == 0:
        return 1
    size = len(grid)
    moves = [size * row + col for row, col, _ in grid_moves(grid, player)] or [size**2]
    return sum(grid_count(grid_after(grid, player, move), -player, depth - 1) for move in moves)


# ------------------------------------------------------------------------------------------------------- the exercises


def flips(board: Tensor, move: int) -> Tensor:
    turned = torch.zeros(board.shape, dtype=torch.bool, device=board.device)
    for row, col in grid_turned(board.tolist(), *divmod(move, len(board)), 1):
        turned[row, col] = True
    return turned


def legal_moves(board: Tensor) -> Tensor:
    """All directions at once, by shifted boards."""
    size = len(board)
    mine, theirs = (F.pad(board == player, (1, 1, 1, 1)) for player in (1, -1))
    found = torch.zeros_like(mine)
    for shift in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        run = torch.roll(mine, shift, (0, 1)) & theirs
        for _ in range(size - 2):
            run = run | torch.roll(run, shift, (0, 1)) & theirs
        found |= torch.roll(run, shift, (0, 1))
    return found[1:-1, 1:-1] & (board == 0)


def board_states(games: Tensor, size: int) -> Tensor:
    return replay(games, size)[0]


def relative_labels(states: Tensor) -> Tensor:
    labels = states.clone().flatten(2)
    labels[:, 1::2] *= -1
    return labels % 3


def illegal_rate(logits: Tensor, legal: Tensor, over: Tensor) -> Tensor:
    top = logits.topk(1, dim=-1).indices[..., 0]
    is_legal = (F.one_hot(top, logits.shape[-1])[..., : legal.shape[-1]].bool() & legal).any(-1)
    rates = []
    for pos in range(over.shape[1]):
        going_on = ~over[:, pos]
        rates.append((~is_legal[going_on, pos]).to(logits).mean() if going_on.any() else logits.new_zeros(()))
    return torch.stack(rates)


def probe_loss(W: Tensor, b: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    scores = torch.tensordot(x, W, dims=([1], [1])) + b
    return F.cross_entropy(scores.movedim(2, 1), labels)


def train_probe(
    x: Tensor, labels: Tensor, steps: int, lr: float, generator: torch.Generator, rows: int = 256
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        W = torch.zeros(labels.shape[1], x.shape[1], 3, dtype=x.dtype, device=x.device, requires_grad=True)
        b = torch.zeros(labels.shape[1], 3, dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.AdamW([W, b], lr=lr)
        for _ in range(steps):
            chosen = torch.randint(0, x.shape[0], (rows,), generator=generator)
            W.grad, b.grad = torch.autograd.grad(probe_loss(W, b, x[chosen], labels[chosen]), [W, b])
            optimizer.step()
    return W.detach(), b.detach()


def probe_accuracy(W: Tensor, b: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    right = torch.stack([(x @ W[s] + b[s]).argmax(1) == labels[:, s] for s in range(len(W))], dim=1).to(x)
    occupied = (labels > 0).to(x)
    return right.sum() / right.numel(), (right * occupied).sum() / occupied.sum()


def probe_directions(W: Tensor) -> tuple[Tensor, Tensor]:
    return W[:, :, 1] - W[:, :, 2], 1.5 * (W[:, :, 0] - W.mean(dim=2))


def cosine_similarities(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a[:, None], b[None], dim=-1)


def intervene_on_square(model: Any, tokens: Tensor, positions: Tensor, layers: Any, vectors: Tensor) -> Tensor:
    """With a mask, and the added vectors spread over all positions."""
    here = F.one_hot(positions, tokens.shape[1]).to(vectors)
    changes = {
        f"blocks.{layer}.hook_resid_post": lambda resid, hook, vector=vector: resid + here[..., None] * vector[:, None]
        for layer, vector in zip(layers, vectors, strict=True)
    }
    with torch.no_grad(), hooks(model, changes):
        logits: Tensor = model(tokens)
    return logits.gather(1, positions[:, None, None].expand(-1, 1, logits.shape[2])).squeeze(1)


def intervention_errors(logits: Tensor, legal: Tensor) -> Tensor:
    found = []
    for row, allowed in zip(logits, legal, strict=True):
        k = int(allowed.sum())
        top = row.topk(k).indices
        hits = sum(bool(allowed[token]) for token in top.tolist() if token < len(allowed))
        found.append(2 * (k - hits))
    return torch.tensor(found, device=logits.device)


def square_attribution(cache: Any, direction: Tensor, layer: int) -> tuple[list[str], Tensor]:
    """The direction without its mean instead of the parts without theirs."""
    flat = direction - direction.mean()
    labels, parts = ["embed", "pos_embed"], [cache["embed"] @ flat, cache["pos_embed"] @ flat]
    for number in range(layer + 1):
        labels.extend((f"attn {number}", f"mlp {number}"))
        parts.extend((cache["attn_out", number] @ flat, cache["mlp_out", number] @ flat))
    variance = torch.var(cache["resid_post", layer], dim=-1, unbiased=False)
    return labels, torch.stack(parts) * torch.rsqrt(variance + 1e-5)


def attention_by_side(pattern: Tensor) -> Tensor:
    mean = pattern.mean(0)
    mine, theirs = torch.zeros_like(mean), torch.zeros_like(mean)
    for query in range(mean.shape[1]):
        for key in range(1, mean.shape[2]):
            (theirs if key % 2 == query % 2 else mine)[:, query, key] = mean[:, query, key]
    return torch.stack([mine.sum(-1), theirs.sum(-1), mean[..., 0]])


def neuron_board_pattern(model: Any, layer: int, directions: Tensor) -> Tensor:
    block = model.blocks[layer]
    read = torch.diag(block.ln2.w.detach()) @ block.mlp.W_in.detach()
    centred = read - read.mean(0)
    return (centred / centred.norm(dim=0)).T @ (directions / directions.norm(dim=1, keepdim=True)).T


def share_in_space(weights: Tensor, directions: Tensor) -> Tensor:
    inside = weights @ torch.linalg.pinv(directions) @ directions
    return inside.norm(dim=1) ** 2 / weights.norm(dim=1) ** 2


def one_move_apart(games: Tensor, place: int, size: int) -> tuple[Tensor, Tensor]:
    """On grids of lists."""
    which, pairs = [], []
    for number, game in enumerate(games.tolist()):
        for move in range(size**2):
            changed = [*game[:place], move, *game[place + 1 :]]
            if move != game[place] and game[place] != size**2 and _all_legal(changed, size):
                which.append(number)
                pairs.append(changed)
    found = torch.tensor(pairs, dtype=games.dtype).reshape(-1, games.shape[1])
    return torch.tensor(which, dtype=torch.long), found


def _all_legal(game: list[int], size: int) -> bool:
    grid, player = grid_start(size), 1
    for move in game:
        legal = [size * row + col for row, col, _ in grid_moves(grid, player)] or [size**2]
        if move not in legal:
            return False
        grid, player = grid_after(grid, player, move), -player
    return True
