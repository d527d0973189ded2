"""Chapter 14: Othello on 6 x 6: a model that only sees moves, and the board inside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from course_utils.data.othello import OthelloBoards, legal_games
from course_utils.hooks import ActivationCache, HookPoint, run_with_hooks
from solutions.ch03_training import AdamW

# ----------------------------------------------------------------------------------------------------------- the game


def flips(board: Int[Tensor, "size size"], move: int) -> Bool[Tensor, "size size"]:
    """Which discs are turned if the player to move puts one on square number `move`.

    The board is as that player sees it: 1 mine, -1 theirs, 0 empty. Squares are numbered row by row, row * size + col.
    From the square, look along each of the eight directions: a run of their discs, one or more, is turned if the next
    square behind it holds one of mine. If it is empty, or if the run reaches the edge, nothing is turned there. The
    disc that is put down is not among the turned ones, and on a square that is taken no move is possible: nothing is
    turned. The board stays as it is.
    """
    size = len(board)
    turned = torch.zeros_like(board, dtype=torch.bool)
    if board[move // size, move % size] != 0:
        return turned
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            run: list[tuple[int, int]] = []
            row, col = move // size + down, move % size + right
            while 0 <= row < size and 0 <= col < size and board[row, col] == -1:
                run.append((row, col))
                row, col = row + down, col + right
            if 0 <= row < size and 0 <= col < size and board[row, col] == 1:
                for place in run:
                    turned[place] = True
    return turned


def legal_moves(board: Int[Tensor, "size size"]) -> Bool[Tensor, "size size"]:
    """On which squares the player to move may put a disc: empty ones from which something is turned.

    The board is as that player sees it: 1 mine, -1 theirs, 0 empty.
    """
    legal = [flips(board, move).any() for move in range(board.numel())]
    return torch.stack(legal).reshape(board.shape)


def board_states(games: Int[Tensor, "game move"], size: int) -> Int[Tensor, "game pos size size"]:
    """The board after each token of a game, in colours: 1 black, -1 white, 0 empty.

    A row of tokens is BOS, then the moves: so position 0 is the start, and position p is the board after p moves. At
    the start, with h = size / 2, black stands on (h - 1, h) and (h, h - 1), white on (h - 1, h - 1) and (h, h). Black
    begins, and every move changes the player. A move is the number of a square, or size² for a pass, which puts no disc
    down. All moves are legal.
    """
    half = size // 2
    states = []
    for game in games.tolist():
        board = torch.zeros(size, size, dtype=games.dtype, device=games.device)
        board[half - 1, half] = board[half, half - 1] = 1
        board[half - 1, half - 1] = board[half, half] = -1
        states.append(board)
        for number, move in enumerate(game):
            player = 1 if number % 2 == 0 else -1
            board = board.clone()
            if move != size**2:
                board[flips(board * player, move)] = player
                board[move // size, move % size] = player
            states.append(board)
    return torch.stack(states).reshape(len(games), -1, size, size)


def relative_labels(states: Int[Tensor, "game pos row col"]) -> Int[Tensor, "game pos square"]:
    """What is on each square, as the player to move next sees it: 0 empty, 1 mine, 2 theirs.

    The boards are in colours (1 black, -1 white, 0 empty), one after each token, BOS first: so black is to move at even
    positions. Squares are numbered row by row.
    """
    player = 1 - 2 * (torch.arange(states.shape[1], device=states.device) % 2)
    seen = states.flatten(2) * player[:, None]
    return torch.where(seen == -1, 2, seen)


# ---------------------------------------------------------------------------------------------------------- the model


def illegal_rate(
    logits: Float[Tensor, "game pos d_vocab"], legal: Bool[Tensor, "game pos move"], over: Bool[Tensor, "game pos"]
) -> Float[Tensor, " pos"]:
    """How often the likeliest next token is not a legal move, by position: the share among the games not over there.

    The columns of `legal` are the squares and PASS; the vocabulary has more tokens, and these are never legal. A
    position where all games are over gives 0. The rates have the dtype of the logits.
    """
    n_illegal = logits.shape[-1] - legal.shape[-1]
    allowed = nn.functional.pad(legal, (0, n_illegal))
    wrong = ~allowed.gather(-1, logits.argmax(dim=-1, keepdim=True))[..., 0] & ~over
    return wrong.sum(dim=0).to(logits.dtype) / (~over).sum(dim=0).clamp(min=1)


# --------------------------------------------------------------------------------------------------------- the probes


def probe_loss(
    W: Float[Tensor, "square d_model state"],
    b: Float[Tensor, "square state"],
    x: Float[Tensor, "batch d_model"],
    labels: Int[Tensor, "batch square"],
) -> Float[Tensor, ""]:
    """The loss of one linear probe for each square: the mean cross-entropy over all vectors and squares, in nats.

    The scores of a square's states are x @ W[square] + b[square], and their softmax is the probability of each state.
    Gradients pass to W, b and x.
    """
    scores = einops.einsum(x, W, "batch d_model, square d_model state -> batch square state") + b
    return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


def train_probe(
    x: Float[Tensor, "batch d_model"],
    labels: Int[Tensor, "batch square"],
    steps: int,
    lr: float,
    generator: torch.Generator,
    rows: int = 256,
) -> tuple[Float[Tensor, "square d_model state"], Float[Tensor, "square state"]]:
    """Train a probe with three states for each square: (W, b), as `probe_loss` reads them.

    W and b begin at zero. Each step draws `rows` row numbers with `torch.randint` from `generator`, with repetition,
    and takes one step of AdamW on the loss of these rows, with learning rate `lr` and the other options as they are by
    default in chapter 03, which are also torch's: betas (0.9, 0.999), eps 1e-8, weight decay 0.01. It returns tensors
    of the dtype and on the device of `x`, without a graph, and works under `torch.no_grad()` too.
    """
    W = nn.Parameter(x.new_zeros(labels.shape[1], x.shape[1], 3))
    b = nn.Parameter(x.new_zeros(labels.shape[1], 3))
    optimizer = AdamW([W, b], lr=lr)
    for _ in range(steps):
        chosen = torch.randint(len(x), (rows,), generator=generator)
        with torch.enable_grad():
            loss = probe_loss(W, b, x[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return W.data, b.data


def probe_accuracy(
    W: Float[Tensor, "square d_model state"],
    b: Float[Tensor, "square state"],
    x: Float[Tensor, "batch d_model"],
    labels: Int[Tensor, "batch square"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """How often a probe is right: (the share of all squares, the share of the squares that hold a disc).

    A square's guess is the state with the highest score; label 0 is "empty". Both are shares over all vectors and
    squares together, and the second one counts only squares whose label is not 0. They have the dtype of `x`.
    """
    scores = einops.einsum(x, W, "batch d_model, square d_model state -> batch square state") + b
    right = (scores.argmax(dim=-1) == labels).to(x.dtype)
    return right.mean(), right[labels != 0].mean()


def probe_directions(
    W: Float[Tensor, "square d_model state"],
) -> tuple[Float[Tensor, "square d_model"], Float[Tensor, "square d_model"]]:
    """Two directions for each square, from a probe with the states empty, mine, theirs: (colour, emptiness).

    colour = mine - theirs; emptiness = empty - the mean of mine and theirs. They have the lengths that come out.
    Source: Nanda, Lee and Wattenberg 2023, section 3.
    """
    empty, mine, theirs = W.unbind(dim=-1)
    return mine - theirs, empty - (mine + theirs) / 2


def cosine_similarities(a: Float[Tensor, "row d_model"], b: Float[Tensor, "col d_model"]) -> Float[Tensor, "row col"]:
    """The cosine of the angle between each vector of `a` and each of `b`."""
    return nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).T


def state_means(
    x: Float[Tensor, "batch d_model"], labels: Int[Tensor, "batch square"]
) -> Float[Tensor, "state square d_model"]:
    """For each state (0 empty, 1 mine, 2 theirs) and square, the mean of the vectors at which the square is in it.

    A state that a square is never in has the mean 0.
    """
    is_in = torch.stack([labels == state for state in range(3)]).to(x)
    sums = einops.einsum(is_in, x, "state batch square, batch d_model -> state square d_model")
    return sums / is_in.sum(dim=1).clamp(min=1)[..., None]


# ---------------------------------------------------------------------------------------------------------- is it used


@torch.no_grad()
def intervene_on_square(
    model: Any,
    tokens: Int[Tensor, "game pos"],
    positions: Int[Tensor, " game"],
    layers: Sequence[int],
    vectors: Float[Tensor, "layer game d_model"],
) -> Float[Tensor, "game d_vocab"]:
    """Run the model with a vector added after several layers: the logits of each game at its own position.

    After each layer of `layers` (its `hook_resid_post`), at the position that `positions` names for the game, the
    layer's and game's own vector is added to the stream: vectors[i] belongs to layers[i]. What comes later sees the
    change, the next of the layers too. All other positions stay as they are. No hook is left behind, and no gradients
    are recorded.
    """
    every = torch.arange(len(tokens), device=tokens.device)

    def adding(vector: Tensor) -> Any:
        def add(resid: Tensor, hook: HookPoint) -> Tensor:
            changed = resid.clone()
            changed[every, positions] += vector
            return changed

        return add

    places = {f"blocks.{layer}.hook_resid_post": adding(vectors[i]) for i, layer in enumerate(layers)}
    return run_with_hooks(model, tokens, hooks=places)[every, positions]


def intervention_cases(
    states: Int[Tensor, "game pos row col"],
    n: int,
    generator: torch.Generator,
    new: int = -1,
    least: int = 4,
    most: int = 28,
) -> dict[str, Tensor]:
    """Squares to change, whose change matters: it alters the set of legal moves.

    Draws `n` different ones from all games, all positions from `least` to below `most`, and all squares that hold a
    disc, without the four in the middle. With `new` -1 the disc gets the other colour, with 0 the square gets empty.
    Returns tensors of length n: "game", "pos", "square", its label "before" and "after" (0 empty, 1 mine, 2 theirs),
    and "legal" and "legal_after", with a column for each move, PASS being the last.
    """
    size = states.shape[-1]
    labels = relative_labels(states)
    in_reach = torch.zeros_like(labels, dtype=torch.bool)
    in_reach[:, least:most] = labels[:, least:most] > 0
    half = size // 2
    middle = [size * row + col for row in (half - 1, half) for col in (half - 1, half)]
    in_reach[..., middle] = False
    found = in_reach.nonzero()
    found = found[torch.randperm(len(found), generator=generator, device=generator.device)[: 6 * n].to(found.device)]
    game, pos, square = found.unbind(dim=1)
    every = torch.arange(len(found), device=found.device)
    boards = torch.where(labels == 2, -1, labels)[game, pos]
    changed = boards.clone()
    changed[every, square] *= new
    legal, legal_after = (
        OthelloBoards.from_boards(each.unflatten(1, (size, size))).legal() for each in (boards, changed)
    )
    matters = (legal != legal_after).any(dim=1).nonzero().flatten()[:n]
    cases = {
        "game": game,
        "pos": pos,
        "square": square,
        "before": boards[every, square],
        "after": changed[every, square],
    }
    cases |= {name: torch.where(cases[name] == -1, 2, cases[name]) for name in ("before", "after")}
    cases |= {"legal": legal, "legal_after": legal_after}
    return {name: values[matters] for name, values in cases.items()}


def intervention_errors(
    logits: Float[Tensor, "game d_vocab"], legal: Bool[Tensor, "game move"]
) -> Int[Tensor, " game"]:
    """How wrong a prediction is about the set of legal moves: false moves plus missing ones.

    With k legal moves, the k tokens with the highest logits are what the model predicts. A predicted token that is not
    legal is false, a legal move that is not predicted is missing; so the result is even. The columns of `legal` are the
    squares and PASS; the vocabulary has more tokens, which are never legal.
    Source: Li et al. 2023, section 4.2.
    """
    allowed = nn.functional.pad(legal, (0, logits.shape[-1] - legal.shape[-1]))
    rank = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
    predicted = rank < legal.sum(dim=-1, keepdim=True)
    return (predicted ^ allowed).sum(dim=-1)


def least_squares(
    inputs: Float[Tensor, "batch column"], targets: Float[Tensor, "batch value"]
) -> Float[Tensor, "column value"]:
    """The weights with the smallest squared error; where columns depend on each other, nearly the shortest of them."""
    wide = inputs.double()
    gram = wide.T @ wide + torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    return torch.linalg.solve(gram, wide.T @ targets.double()).to(inputs)


def what_squares_write(
    x: Float[Tensor, "batch d_model"], labels: Int[Tensor, "batch square"], positions: Int[Tensor, " batch"]
) -> Float[Tensor, "state square d_model"]:
    """What each state of each square adds to the stream, if all other squares and the position stay as they are.

    The stream is fitted by a sum: one vector for the state of each square, and one for the position.
    """
    states = nn.functional.one_hot(labels, 3).to(x).flatten(1)
    weights = least_squares(torch.cat([states, nn.functional.one_hot(positions).to(x)], dim=1), x)
    return weights[: states.shape[1]].unflatten(0, (-1, 3)).movedim(1, 0)


def square_readers(
    x: Float[Tensor, "batch d_model"], labels: Int[Tensor, "batch square"]
) -> tuple[Float[Tensor, "square d_model state"], Float[Tensor, "square state"]]:
    """A probe (W, b) by least squares: a state's score is fitted to 1 where the square is in it, and to 0 elsewhere."""
    states = nn.functional.one_hot(labels, 3).to(x).flatten(1)
    weights = least_squares(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), states).unflatten(1, (-1, 3))
    return weights[:-1].movedim(1, 0), weights[-1]


def push_until_read(
    writes: Float[Tensor, "state square d_model"],
    W: Float[Tensor, "square d_model state"],
    b: Float[Tensor, "square state"],
    cases: dict[str, Tensor],
    target: float = 1.0,
) -> Callable[[Tensor], Tensor]:
    """For each case, a push along what its square writes, just as far as the probe (W, b) sees the new state.

    "Sees" means that the score of the new state less that of the old one is `target`. Where it is already more than
    that, nothing is pushed.
    """
    square, before, after = cases["square"], cases["before"], cases["after"]
    vector, every = writes[after, square] - writes[before, square], torch.arange(len(square), device=square.device)
    reader = W[square][every, :, after] - W[square][every, :, before]
    offset, slope = b[square, after] - b[square, before], (reader * vector).sum(dim=-1)

    def push(stream: Float[Tensor, "game d_model"]) -> Float[Tensor, "game d_model"]:
        missing = target - (reader * stream).sum(dim=-1) - offset
        return stream + (missing / slope).clamp(min=0)[:, None] * vector

    return push


@torch.no_grad()
def run_with_edits(
    model: Any,
    tokens: Int[Tensor, "game pos"],
    positions: Int[Tensor, " game"],
    edits: Mapping[int, Callable[[Tensor], Tensor]],
) -> Float[Tensor, "game d_vocab"]:
    """As `intervene_on_square`, but after each layer in `edits` the stream at the games' positions is what its function
    makes of it."""
    every = torch.arange(len(tokens), device=tokens.device)

    def editing(edit: Callable[[Tensor], Tensor]) -> Any:
        def change(resid: Tensor, hook: HookPoint) -> Tensor:
            changed = resid.clone()
            changed[every, positions] = edit(resid[every, positions])
            return changed

        return change

    places = {f"blocks.{layer}.hook_resid_post": editing(edit) for layer, edit in edits.items()}
    return run_with_hooks(model, tokens, hooks=places)[every, positions]


# --------------------------------------------------------------------------------------------------- how is it computed


def square_attribution(
    cache: ActivationCache, direction: Float[Tensor, " d_model"], layer: int
) -> tuple[list[str], Float[Tensor, "component game pos"]]:
    """What each part of the model adds to a square's direction, as the LayerNorm sees it that reads the stream next.

    The parts of the stream after layer number `layer` are "embed", "pos_embed", and for each layer up to and including
    it "attn 0", "mlp 0", "attn 1", ... (`attn_out` and `mlp_out`). That LayerNorm takes from every vector its mean over
    d_model, and divides by the root of the stream's variance plus 1e-5. So a part's contribution is the dot product of
    `direction` with the part less its own mean, divided by the stream's root; they sum to the dot product of
    `direction` with the normalised stream. The LayerNorm's weights are left out. Returns (labels, contributions).
    """
    labels, parts = ["embed", "pos_embed"], [cache["embed"], cache["pos_embed"]]
    for number in range(layer + 1):
        labels += [f"attn {number}", f"mlp {number}"]
        parts += [cache["attn_out", number], cache["mlp_out", number]]
    scale = (cache["resid_post", layer].var(dim=-1, correction=0) + 1e-5).sqrt()
    stacked = torch.stack(parts)
    return labels, (stacked - stacked.mean(dim=-1, keepdim=True)) @ direction / scale


def attention_by_side(pattern: Float[Tensor, "game head query key"]) -> Float[Tensor, "side head query"]:
    """How much each head attends to whose moves: the mean over games of the sum over keys, for three sides.

    Side 0 is the moves of the player to move at the query, side 1 those of the other player, side 2 is BOS. BOS is at
    position 0, and position p holds move number p, black's if p is odd; black is also to move at even positions.
    """
    query, key = (torch.arange(size, device=pattern.device) for size in pattern.shape[-2:])
    same = (query[:, None] + key) % 2 == 0
    sides = torch.stack([~same & (key > 0), same & (key > 0), (key == 0).expand_as(same)]).to(pattern)
    return einops.einsum(pattern.mean(dim=0), sides, "head query key, side query key -> side head query")


def neuron_board_pattern(
    model: Any, layer: int, directions: Float[Tensor, "square d_model"]
) -> Float[Tensor, "neuron square"]:
    """What the neurons of a layer read, in terms of the board: the cosine of their input with each square's direction.

    A neuron of the layer's MLP reads the stream through `ln2`: its input is its column of W_in times the LayerNorm's
    weight w, coordinate by coordinate, less the mean over d_model, as the LayerNorm takes every vector's mean away. The
    directions are taken as they are.
    """
    read = (model.blocks[layer].mlp.W_in * model.blocks[layer].ln2.w[:, None]).T
    return cosine_similarities(read - read.mean(dim=-1, keepdim=True), directions)


def share_in_space(
    weights: Float[Tensor, "neuron d_model"], directions: Float[Tensor, "direction d_model"]
) -> Float[Tensor, " neuron"]:
    """Which share of each vector's squared length lies in the space that the directions span.

    1 for a combination of the directions, 0 for a vector at right angles to all of them. The directions need be neither
    of length 1 nor at right angles to each other; they are independent.
    """
    basis = torch.linalg.qr(directions.T).Q
    return (weights @ basis).square().sum(dim=-1) / weights.square().sum(dim=-1)


def one_move_apart(
    games: Int[Tensor, "game move"], place: int, size: int
) -> tuple[Int[Tensor, " pair"], Int[Tensor, "pair move"]]:
    """Games that differ from these in one move only: (which game each belongs to, the other games).

    In each game, move number `place` (from 0) is replaced by every other legal move, in the order of their numbers; all
    other moves stay. Of the games that come of it those are returned whose moves are all legal, game by game.
    """
    boards = OthelloBoards(len(games), size, games.device)
    for moves in games[:, :place].unbind(dim=1):
        boards.play(moves)
    others = boards.legal().scatter(1, games[:, place, None], False)
    which, moves = others.nonzero(as_tuple=True)
    changed = games[which]
    changed[:, place] = moves
    fine = legal_games(changed, size)
    return which[fine], changed[fine]
