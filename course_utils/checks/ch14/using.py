"""Checks of chapter 14, what is used and how it is computed: interventions, contributions, heads, neurons, pairs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch14.reading import angles, two
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.leftovers import assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence, Stop
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.config import TransformerConfig
from course_utils.data.othello import OthelloBoards, legal_games, random_games
from course_utils.hooks import run_with_cache

Fn = Callable[..., Any]
CFG = TransformerConfig(d_vocab=11, n_ctx=8, n_layers=3, n_heads=2, d_model=6, d_head=3, d_mlp=5)
POSITIONS = torch.tensor([3, 1, 0, 4])

# ------------------------------------------------------------------------------------------------------- interventions


def adding(
    layers_of: Callable[[Sequence[int]], list[int]] = list,
    which: Callable[[int, int], int] = lambda i, n: i,
    at: Callable[[int, int], list[int]] = lambda pos, n_pos: [pos],
    put: Callable[[Tensor, Tensor], Tensor] = torch.add,
    place: str = "hook_resid_post",
    read: Callable[[list[int], int], list[int]] = lambda positions, n_pos: positions,
    row: Callable[[int], int] = lambda game: game,
) -> Fn:
    """intervene_on_square by PyTorch's own hooks, game by game."""

    @torch.no_grad()
    def intervene_on_square(
        model: Any, tokens: Tensor, positions: Tensor, layers: Sequence[int], vectors: Tensor
    ) -> Tensor:
        places, n_pos = positions.tolist(), tokens.shape[1]

        def hook(vector: Tensor) -> Any:
            def change(module: Any, inputs: Any, resid: Tensor) -> Tensor:
                changed = resid.clone()
                for game, pos in enumerate(places):
                    for spot in at(pos, n_pos):
                        changed[game, spot] = put(resid[game, spot], vector[row(game)])
                return changed

            return change

        wanted = layers_of(layers)
        handles = [
            getattr(model.blocks[layer], place).register_forward_hook(hook(vectors[which(i, len(wanted))]))
            for i, layer in enumerate(wanted)
        ]
        logits = model(tokens)
        for handle in handles:
            handle.remove()
        return torch.stack([logits[game, pos] for game, pos in enumerate(read(places, n_pos))])

    return intervene_on_square


@known_mistakes(
    {
        "the vector is added after the first of the layers only; add one after each.": adding(
            lambda layers: list(layers)[:1]
        ),
        "the vector is added after the last of the layers only; add one after each.": adding(
            lambda layers: list(layers)[-1:], which=lambda i, n: -1
        ),
        "every layer gets the last layer's vector: the function kept a name, and not its value.": adding(
            which=lambda i, n: -1
        ),
        "every layer gets the first layer's vector.": adding(which=lambda i, n: 0),
        "the vector is added at every position.": adding(at=lambda pos, n_pos: list(range(n_pos))),
        "the vector is added at the last position; every game has its own.": adding(at=lambda pos, n_pos: [n_pos - 1]),
        "the logits are those of the last position; every game has its own.": adding(
            read=lambda positions, n_pos: [n_pos - 1] * len(positions)
        ),
        "the vector takes the place of the stream; add it.": adding(put=lambda resid, vector: vector),
        "the vector is subtracted.": adding(put=torch.sub),
        "it is added before the layer; add it after the layer.": adding(place="hook_resid_pre"),
        "every game gets the first game's vector.": adding(row=lambda game: 0),
        "nothing is added: what the hook function returns is thrown away, or it returns None.": adding(
            at=lambda pos, n_pos: []
        ),
    }
)
def check_intervene_on_square(fn: Fn) -> None:
    """Two layers, one, and all in another order; nothing left behind, also after a run that fails."""
    name, model = "intervene_on_square", SmallModel(CFG)
    tokens = some_tokens(CFG, 4, 5, seed=3)
    for layers in ([0, 2], [1], [2, 0, 1]):
        vectors = noise(len(layers), 4, 6, seed=len(layers)) * 2
        with unchanged(name, tokens=tokens, positions=POSITIONS, vectors=vectors), nothing_left_behind(name, model):
            logits = fn(model, tokens, POSITIONS, layers, vectors)
        right = adding()(model, tokens, POSITIONS, layers, vectors)
        compare(f"{name} after layers {layers}", logits, right, "game d_vocab")
        if logits.requires_grad:
            raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
    follows_input(name, fn, (model, tokens, POSITIONS, layers, vectors), "game d_vocab")
    _fails_behind(model)
    with nothing_left_behind(f"{name} after a run that ended in an exception", model):
        assert_stops(name, lambda: fn(model, tokens, POSITIONS, layers, vectors), "the model")


def _fails_behind(model: Any) -> None:
    """Let the next runs end in an exception, behind all blocks."""

    def stop(activation: Tensor, hook: Any) -> None:
        raise Stop

    model.ln_final.hook_normalized.add(stop)


def erring(
    count: Callable[[set[int], set[int]], int] = lambda top, legal: len(top ^ legal),
    size: Callable[[int], int] = lambda k: k,
    order: Callable[[list[float]], list[int]] = lambda row: sorted(range(len(row)), key=row.__getitem__, reverse=True),
    cut: bool = False,
) -> Fn:
    """intervention_errors with sets."""

    def intervention_errors(logits: Tensor, legal: Tensor) -> Tensor:
        found = []
        for row, allowed in zip(logits.tolist(), legal, strict=True):
            moves = set(allowed.nonzero().flatten().tolist())
            top = order(row[: legal.shape[1]] if cut else row)[: size(len(moves))]
            found.append(count(set(top), moves))
        return torch.tensor(found, device=logits.device)

    return intervention_errors


@known_mistakes(
    {
        "only false moves count; missing ones do too.": erring(lambda top, legal: len(top - legal)),
        "it counts the moves that are right.": erring(lambda top, legal: len(top & legal)),
        "the three likeliest moves are compared; take as many as there are legal ones.": erring(size=lambda k: 3),
        "only the likeliest move is compared; take as many as there are legal ones.": erring(size=lambda k: 1),
        "the least likely moves are taken.": erring(order=lambda row: sorted(range(len(row)), key=row.__getitem__)),
        "the tokens that are no moves were cut off first; they are false where they are predicted.": erring(cut=True),
        "it is a share; the errors are counted.": erring(lambda top, legal: len(top ^ legal) // (2 * len(legal))),
    }
)
def check_intervention_errors(fn: Fn) -> None:
    """Against sets; one legal move, and many."""
    name = "intervention_errors"
    for seed, (n_games, n_moves, d_vocab) in enumerate(((6, 7, 9), (9, 5, 6), (1, 4, 4))):
        logits = noise(n_games, d_vocab, seed=seed)
        legal = noise(n_games, n_moves, seed=seed + 5) > torch.arange(n_games)[:, None] / 5 - 0.5
        legal[:, seed] = True
        with unchanged(name, logits=logits, legal=legal):
            actual = fn(logits, legal)
        compare(f"{name} of {n_games} games", actual, erring()(logits, legal), "game")


# ------------------------------------------------------------------------------------------------------- contributions


def attributing(
    labels: Callable[[list[str]], list[str]] = lambda labels: labels,
    centre: bool = True,
    scale: Callable[[Any, int], Tensor] = lambda cache, layer: _root(cache["resid_post", layer]),
    last: Callable[[int, int], int] = lambda layer, n_layers: layer,
    dot: bool = True,
) -> Fn:
    """square_attribution, one part after the other."""

    def square_attribution(cache: Any, direction: Tensor, layer: int) -> tuple[list[str], Tensor]:
        parts = {"embed": cache["embed"], "pos_embed": cache["pos_embed"]}
        for number in range(last(layer, cache.n_layers) + 1):
            parts |= {f"attn {number}": cache["attn_out", number], f"mlp {number}": cache["mlp_out", number]}
        root = scale(cache, layer)
        flat = direction if dot else direction / direction.norm()
        values = []
        for part in parts.values():
            about = part - part.sum(-1, keepdim=True) / part.shape[-1] if centre else part
            values.append((about * flat).sum(-1) / root)
        return labels(list(parts)), torch.stack(values)

    return square_attribution


def _root(resid: Tensor) -> Tensor:
    about = resid - resid.mean(-1, keepdim=True)
    return (about.square().mean(-1) + 1e-5).sqrt()


@known_mistakes(
    {
        "the LayerNorm's scale is left out: these are dot products with the parts as they are.": attributing(
            centre=False, scale=lambda cache, layer: torch.ones_like(cache["resid_post", layer][..., 0])
        ),
        "it is not divided by the root of the stream's variance.": attributing(
            scale=lambda cache, layer: torch.ones_like(cache["resid_post", layer][..., 0])
        ),
        "the parts' own means stay in.": attributing(centre=False),
        "it is divided by the root of the last layer's stream, whatever `layer` is.": attributing(
            scale=lambda cache, layer: _root(cache["resid_post", -1])
        ),
        "it is divided by the variance; take its root.": attributing(
            scale=lambda cache, layer: _root(cache["resid_post", layer]) ** 2
        ),
        "it is divided by the stream's length.": attributing(
            scale=lambda cache, layer: cache["resid_post", layer].norm(dim=-1)
        ),
        "the stream before the layer's MLP is used for the scale.": attributing(
            scale=lambda cache, layer: _root(cache["resid_mid", layer])
        ),
        "the direction was brought to length 1.": attributing(dot=False),
        "the layer itself is left out.": attributing(last=lambda layer, n_layers: layer - 1),
        "layers after `layer` are there, too.": attributing(last=lambda layer, n_layers: n_layers - 1),
    }
)
def check_square_attribution(fn: Fn) -> None:
    """Against sums over coordinates, at every layer; and the parts sum to the normalised stream's own."""
    name = "square_attribution"
    model = SmallModel(CFG)
    with torch.no_grad():
        _, cache = run_with_cache(model, some_tokens(CFG, 4, 5, seed=1))
    for layer in (1, 0, 2):
        direction = noise(6, seed=layer) * 3
        with unchanged(name, direction=direction):
            answer = fn(cache, direction, layer)
        labels, values = two(name, answer, ("labels", "contributions"))
        right_labels, right = attributing()(cache, direction, layer)
        if list(labels) != right_labels:
            raise CheckFailed(
                f"{name}: the labels after layer {layer} are {labels}.\n  expected {right_labels}",
                evidence=Evidence(f"labels after layer {layer}", list(labels)),
                advice="  Next: see the docstring for the parts and their order.",
            )
        compare(f"{name} after layer {layer}", values, right, "component game pos")
    model = SmallModel(CFG).double()
    with torch.no_grad():
        _, cache = run_with_cache(model, some_tokens(CFG, 3, 4, seed=2))
    small = cache["resid_post", 0].detach() * 0 + noise(3, 4, 6).double() * 1e-3  # a stream so short that 1e-5 counts
    cache = type(cache)({**cache, "blocks.0.hook_resid_post": small}, n_layers=3)
    right = attributing()(cache, direction.double(), 0)[1]
    compare(f"{name} of a short stream, in float64", fn(cache, direction.double(), 0)[1], right, "component game pos")


def attending(
    side: Callable[[int, int], int] = lambda query, key: 2 if key == 0 else 0 if (query - key) % 2 else 1,
    per: Callable[[int], int] = lambda n_keys: 1,
    over: Callable[[Tensor], Tensor] = lambda pattern: pattern.mean(0),
) -> Fn:
    """attention_by_side, key by key; `side` says whose move stands there, or -1 for nobody's."""

    def attention_by_side(pattern: Tensor) -> Tensor:
        mean = over(pattern)
        sides = torch.zeros(3, *mean.shape[:2], dtype=pattern.dtype, device=pattern.device)
        for query in range(mean.shape[1]):
            for whose in range(3):
                keys = [key for key in range(mean.shape[2]) if side(query, key) == whose]
                sides[whose, :, query] = mean[:, query, keys].sum(-1) / per(max(1, len(keys)))
        return sides

    return attention_by_side


@known_mistakes(
    {
        "mine and theirs are swapped: the last move was the other player's.": attending(
            lambda query, key: 2 if key == 0 else 1 if (query - key) % 2 else 0
        ),
        "they are swapped at odd positions: side 0 is always black's moves.": attending(
            lambda query, key: 2 if key == 0 else 0 if key % 2 else 1
        ),
        "BOS counts as a move.": attending(lambda query, key: 0 if (query - key) % 2 else 1),
        "the mean over the keys was taken; take the sum.": attending(per=lambda n_keys: n_keys),
        "it is the sum over the games; take the mean.": attending(over=lambda pattern: pattern.sum(0)),
        "the query itself is left out; it holds a move, too.": attending(
            lambda query, key: 2 if key == 0 else -1 if key == query else 0 if (query - key) % 2 else 1
        ),
    }
)
def check_attention_by_side(fn: Fn) -> None:
    """Against sums key by key; an odd number of positions and an even one."""
    name = "attention_by_side"
    for n_games, n_heads, n_pos in ((2, 3, 6), (4, 2, 5), (1, 1, 1)):
        pattern = noise(n_games, n_heads, n_pos, n_pos, seed=n_pos).tril().softmax(-1)
        with unchanged(name, pattern=pattern):
            actual = fn(pattern)
        compare(f"{name} of {n_pos} positions", actual, attending()(pattern), "side head query")
    follows_input(name, fn, (noise(2, 3, 4, 4).softmax(-1),), "side head query")


# -------------------------------------------------------------------------------------------------------------- neurons


def inputs_of(
    model: Any,
    layer: int,
    gain: bool = True,
    centre: bool = True,
    norm: str = "ln2",
    weights: Callable[[Any], Tensor] = lambda mlp: mlp.W_in.T,
) -> Tensor:
    """[neuron d_model]: what each neuron's input weights are, seen from the stream."""
    block = model.blocks[layer]
    rows = [row * getattr(block, norm).w if gain else row for row in weights(block.mlp)]
    return torch.stack([row - row.mean() if centre else row for row in rows])


right_angles = angles()


def reading(compare_to: Fn = right_angles, layer_of: Callable[[int], int] = lambda layer: layer, **how: Any) -> Fn:
    """neuron_board_pattern, pair by pair."""
    return lambda model, layer, directions: compare_to(inputs_of(model, layer_of(layer), **how), directions).detach()


@known_mistakes(
    {
        "the LayerNorm's weights w are left out.": reading(gain=False),
        "it is the weights of ln1; the MLP reads through ln2.": reading(norm="ln1"),
        "the mean over d_model stays in; the LayerNorm takes it away.": reading(centre=False),
        "it is what the neurons write (W_out); here it is what they read.": reading(
            weights=lambda mlp: mlp.W_out, gain=False, centre=False
        ),
        "these are dot products, not cosines.": reading(angles(length=lambda v: v[0] * 0 + 1)),
        "only the neurons' inputs were brought to length 1, not the directions.": reading(angles(both=False)),
        "it is another layer: they are numbered from 0.": reading(layer_of=lambda layer: layer - 1),
    }
)
def check_neuron_board_pattern(fn: Fn) -> None:
    """Against one neuron and square at a time, in every layer."""
    name, model = "neuron_board_pattern", SmallModel(CFG)
    for layer in range(3):
        directions = noise(4, 6, seed=layer) + 0.4
        with unchanged(name, directions=directions):
            actual = fn(model, layer, directions)
        compare(f"{name} of layer {layer}", actual, reading()(model, layer, directions), "neuron square")
    follows_input(name, fn, (model, 1, directions), "neuron square")


def projecting(
    share: Callable[[Tensor, Tensor], Tensor] = lambda inside, whole: inside.square().sum() / whole.square().sum(),
    basis: Callable[[Tensor], Tensor] = lambda directions: directions,
) -> Fn:
    """share_in_space by least squares: what a combination of the directions can reach, weight by weight."""

    def share_in_space(weights: Tensor, directions: Tensor) -> Tensor:
        rows = basis(directions).double()
        inverse = torch.linalg.inv(rows @ rows.T)
        each = []
        for vector in weights.double():
            inside = (vector @ rows.T @ inverse) @ rows
            each.append(share(inside, vector))
        return torch.stack(each).to(weights.dtype)

    return share_in_space


def summed_cosines(weights: Tensor, directions: Tensor) -> Tensor:
    return angles()(weights, directions).square().sum(1)


def summed_products(weights: Tensor, directions: Tensor) -> Tensor:
    return (weights @ directions.T).square().sum(1) / weights.square().sum(1)


@known_mistakes(
    {
        "the squared cosines are summed; the directions are not at right angles to each other.": summed_cosines,
        "the directions were taken for a basis: neither their lengths nor their angles are taken out.": (
            summed_products
        ),
        "it is a share of the length; take the squared length.": projecting(
            lambda inside, whole: inside.norm() / whole.norm()
        ),
        "it is the squared length inside; divide by the whole.": projecting(
            lambda inside, whole: inside.square().sum()
        ),
        "it is the share outside.": projecting(lambda inside, whole: 1 - inside.square().sum() / whole.square().sum()),
        "it is the share of the first direction alone.": projecting(basis=lambda directions: directions[:1]),
    }
)
def check_share_in_space(fn: Fn) -> None:
    """Against least squares; directions of all lengths; a vector inside and one at right angles."""
    name = "share_in_space"
    for n_neurons, n_directions, d_model in ((4, 3, 7), (2, 1, 3), (3, 4, 5)):
        directions = (noise(n_directions, d_model) + 0.7) * torch.arange(1.0, n_directions + 1)[:, None]
        weights = noise(n_neurons, d_model, seed=1)
        weights[0] = directions.sum(0)
        with unchanged(name, weights=weights, directions=directions):
            actual = fn(weights, directions)
        compare(f"{name} of {n_directions} directions", actual, projecting()(weights, directions), "neuron")
    follows_input(name, fn, (weights, directions), "neuron")


# ---------------------------------------------------------------------------------------------------------------- pairs


Keep = Callable[[Tensor, int, int], Tensor]  # changed games, the place, the size -> which of them stay


def moves_after(game: Tensor, place: int, size: int) -> list[int]:
    """The legal moves after the first ones of a game, on a board of its own."""
    boards = OthelloBoards(1, size)
    for move in game[: max(0, place)]:
        boards.play(move[None])
    return boards.legal()[0].nonzero().flatten().tolist()


def searching(
    keep: Keep = lambda changed, place, size: legal_games(changed, size),
    own: bool = False,
    place_of: Callable[[int], int] = lambda place: place,
    order: Callable[[list[int]], list[int]] = lambda moves: moves,
    count: Callable[[int, int], int] = lambda game, pair: game,
) -> Fn:
    """one_move_apart, one game and move at a time."""

    def one_move_apart(games: Tensor, place: int, size: int) -> tuple[Tensor, Tensor]:
        which, pairs, at = [], [], place_of(place)
        for number, game in enumerate(games):
            for move in order(moves_after(game, at, size)):
                changed = game.clone()
                changed[at] = move
                if own or move != int(game[at]):
                    which.append(number)
                    pairs.append(changed)
        found = torch.stack([*pairs, games[0]])[:-1]  # there may be none
        fine = keep(found, at, size)
        kept = torch.tensor(which, dtype=torch.long, device=games.device)[fine].tolist()
        numbers = [count(game, pair) for pair, game in enumerate(kept)]
        return torch.tensor(numbers, dtype=torch.long, device=games.device), found[fine]

    return one_move_apart


@known_mistakes(
    {
        "moves that come later are not looked at: some of them are not legal any more.": searching(
            keep=lambda changed, place, size: torch.ones(len(changed), dtype=torch.bool)
        ),
        "only the next move is looked at; all that follow must be legal.": searching(
            keep=lambda changed, place, size: legal_games(changed[:, : place + 2], size)
        ),
        "the game itself is among its pairs.": searching(own=True),
        "it is the move after: they are numbered from 0.": searching(place_of=lambda place: place + 1),
        "it is the move before: they are numbered from 0.": searching(place_of=lambda place: place - 1),
        "only one other move is tried for each game.": searching(order=lambda moves: moves[:1]),
        "the pairs come from the highest move down.": searching(order=lambda moves: moves[::-1]),
        "the numbers are those of the pairs; they say which game a pair belongs to.": searching(
            count=lambda game, pair: pair
        ),
    }
)
def check_one_move_apart(fn: Fn) -> None:
    """Against single games on boards of their own; games with passes; nothing found."""
    name = "one_move_apart"
    small = random_games(30, 4, torch.Generator().manual_seed(4), 7)
    for games, place, size in ((small[3:9, :6], 3, 4), (random_games(4, 6, torch.Generator().manual_seed(1), 9), 6, 6),
                               (small[:3, :2], 1, 4), (small[:2, :5], 0, 4)):  # fmt: skip
        with unchanged(name, games=games):
            answer = fn(games, place, size)
        which, pairs = two(name, answer, ("which game", "the other games"))
        right = searching()(games, place, size)
        call = f"{name} at move {place} of {games.tolist()}"
        compare(f"{call}: the other games", pairs, right[1], "pair move")
        compare(f"{call}: which game", which, right[0], "pair")
