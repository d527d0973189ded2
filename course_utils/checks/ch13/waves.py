"""Checks of chapter 13, waves: an orthonormal basis, coefficients along one axis and two, and a table's frequencies."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from course_utils.checks.ch13.small import Fn, basis, coefficients, frequency_of, names, unit, wave
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise

# ----------------------------------------------------------------------------------------------------------- the basis


def waves(
    order: Callable[[int], list[tuple[str, int]]] = names,
    row: Callable[[str, int, int], list[float]] = wave,
    length: Callable[[list[float], str, int, int], list[float]] = lambda values, kind, k, n: unit(values),
    shape: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Fn:
    """A fourier_basis row by row, with switches for what people get wrong."""

    def fourier_basis(n: int) -> Tensor:
        rows = [length(row(kind, k, n), kind, k, n) for kind, k in order(n)]
        return shape(torch.tensor(rows, dtype=torch.float64).float())

    return fourier_basis


def by_one_rule(special: Callable[[int, int], bool]) -> Fn:
    """Every row divided by sqrt(n / 2), as most are, also those that are special."""
    return waves(
        length=lambda values, kind, k, n: (
            [value / math.sqrt(n / 2) for value in values] if special(k, n) else unit(values)
        )
    )


def alternating(n: int) -> list[tuple[str, int]]:
    """Sine before cosine."""
    return [("cos", 0), *((kind, k) for k in range(1, n // 2 + 1) for kind in ("sin", "cos") if (kind, k) in names(n))]


def one_kind_first(n: int) -> list[tuple[str, int]]:
    return sorted(names(n), key=lambda name: (name[0], name[1]))


@known_mistakes(
    {
        "the rows are not divided by their lengths.": waves(length=lambda values, kind, k, n: values),
        "the constant row is divided by sqrt(n / 2), as the waves are; its length is sqrt(n).": by_one_rule(
            lambda k, n: k == 0
        ),
        "the last row for even n is divided by sqrt(n / 2); it is 1 and -1, so its length is sqrt(n).": by_one_rule(
            lambda k, n: 2 * k == n
        ),
        "all rows are divided by sqrt(n / 2), the constant and the last for even n too.": by_one_rule(
            lambda k, n: True
        ),
        "sine comes before cosine.": waves(order=alternating),
        "all cosines come first, then all sines; a frequency's two rows stand together.": waves(order=one_kind_first),
        "the frequencies run backwards.": waves(
            order=lambda n: [names(n)[0], *sorted(names(n)[1:], key=lambda name: (-name[1], name[0]))]
        ),
        "the waves are the columns; they are the rows.": waves(shape=lambda rows: rows.T),
        "the angle is πkx/n; a wave of frequency 1 goes all the way round, 2πkx/n.": waves(
            row=lambda kind, k, n: [getattr(math, kind)(math.pi * k * x / n) for x in range(n)]
        ),
        "the numbers are counted from 1; they begin at 0.": waves(
            row=lambda kind, k, n: [getattr(math, kind)(2 * math.pi * k * (x + 1) / n) for x in range(n)]
        ),
        "the sines have the wrong sign.": waves(
            row=lambda kind, k, n: [value if kind == "cos" else -value for value in wave(kind, k, n)]
        ),
    }
)
def check_fourier_basis(fn: Fn) -> None:
    """Row by row, for odd and even n, down to one; and that the rows are orthonormal."""
    name = "fourier_basis"
    for n in (8, 7, 2, 1, 30):
        actual = fn(n)
        compare(f"{name}({n})", actual, basis(n).float(), "wave number")
        products = actual.double() @ actual.double().T
        compare(f"{name}({n}): its products", products, torch.eye(n, dtype=torch.float64), "wave wave")


# ----------------------------------------------------------------------------------------------------- one axis and two


def on_rows(change: Callable[[Tensor], Tensor]) -> Fn:
    """fft1d with something done to the right coefficients, in the right dtype."""
    return lambda values: change(coefficients(values)).to(values.dtype)


def spectrum(values: Tensor) -> Tensor:
    """Real and imaginary parts of torch.fft.rfft as they are, in our order."""
    n = values.shape[-1]
    found = torch.fft.rfft(values.double())
    return torch.stack([found.real, found.imag], dim=-1).flatten(-2)[..., [0, *range(2, n + 1)]].to(values.dtype)


def swapped_waves(found: Tensor) -> Tensor:
    n = found.shape[-1]
    order = [names(n).index(name) for name in alternating(n)]
    return found[..., order]


def halved_ends(found: Tensor, which: Callable[[int], list[int]]) -> Tensor:
    """As a basis gives it whose rows at these places are divided by sqrt(n / 2)."""
    scale = torch.ones(found.shape[-1], dtype=found.dtype)
    scale[which(found.shape[-1])] = 2**0.5
    return found * scale


@known_mistakes(
    {
        "it goes back from coefficients to values; the values are to be multiplied with each wave.": lambda values: (
            values @ basis(values.shape[-1]).to(values)
        ),
        "these are torch.fft's numbers: other lengths, and sines with the opposite sign.": spectrum,
        "sine comes before cosine.": on_rows(swapped_waves),
        "the sines have the wrong sign, as in torch.fft.": on_rows(
            lambda found: found * torch.tensor([-1.0 if k[0] == "sin" else 1.0 for k in names(found.shape[-1])])
        ),
        "the constant's wave is too long: its length is sqrt(n), not sqrt(n / 2).": on_rows(
            lambda found: halved_ends(found, lambda n: [0])
        ),
        "the last wave for even n is too long: its length is sqrt(n), not sqrt(n / 2).": on_rows(
            lambda found: halved_ends(found, lambda n: [n - 1] if n % 2 == 0 else [])
        ),
        "the mean is taken off first; it is the first coefficient.": lambda values: on_rows(lambda found: found)(
            values - values.mean(dim=-1, keepdim=True)
        ),
        "the waves run along the first axis; they run along the last.": lambda values: coefficients(values, 0).to(
            values.dtype
        ),
        "the coefficients are squared.": on_rows(lambda found: found.square()),
    }
)
def check_fft1d(fn: Fn) -> None:
    """Against torch.fft; one row, several, even and odd."""
    name = "fft1d"
    for shape in ((8,), (3, 7), (2, 4, 6), (5, 1)):
        values = noise(*shape, seed=sum(shape)) + 0.3
        axes = " ".join([*["first", "second"][: len(shape) - 1], "wave"])
        with unchanged(name, values=values):
            actual = fn(values)
        compare(f"{name} of {tuple(shape)}", actual, coefficients(values).float(), axes)
    follows_input(name, fn, (noise(3, 5),), "row wave")


def term(change: Callable[[Tensor, int, int], Tensor]) -> Fn:
    return lambda i, j, n: change(basis(n), i, j).float()


@known_mistakes(
    {
        "a and b are swapped: wave i runs along a, the rows.": term(lambda rows, i, j: torch.outer(rows[j], rows[i])),
        "the two waves are added; multiply them.": term(lambda rows, i, j: rows[i][:, None] + rows[j]),
        "i is used for both.": term(lambda rows, i, j: torch.outer(rows[i], rows[i])),
        "i and j are taken for frequencies; they are places in the basis.": lambda i, j, n: torch.outer(
            *(torch.tensor(unit(wave("cos", k, n)), dtype=torch.float64) for k in (i, j))
        ).float(),
        "the term is scaled so that its largest value is 1.": term(
            lambda rows, i, j: torch.outer(rows[i], rows[j]) / torch.outer(rows[i], rows[j]).abs().max()
        ),
        "columns of the basis are taken; the waves are its rows.": term(
            lambda rows, i, j: torch.outer(rows[:, i], rows[:, j])
        ),
        "it is the wave of a + b; the two waves are independent.": term(
            lambda rows, i, j: rows[i][(torch.arange(len(rows))[:, None] + torch.arange(len(rows))) % len(rows)]
        ),
    }
)
def check_fourier_2d_basis_term(fn: Fn) -> None:
    """Pair by pair."""
    name = "fourier_2d_basis_term"
    for i, j, n in ((1, 4, 7), (5, 2, 6), (0, 3, 5), (2, 2, 4), (7, 0, 8)):
        rows = basis(n)
        right = torch.tensor([[float(rows[i, a] * rows[j, b]) for b in range(n)] for a in range(n)])
        compare(f"{name}({i}, {j}, {n})", fn(i, j, n), right, "a b")


def both(change: Callable[[Tensor], Tensor] = lambda found: found) -> Fn:
    """fft2d by torch.fft, along one axis and then the other."""
    return lambda grid: change(coefficients(coefficients(grid, 0), 1)).to(grid.dtype)


def along(dim: int) -> Fn:
    return lambda grid: coefficients(grid, dim).to(grid.dtype)


@known_mistakes(
    {
        "a and b are swapped: entry [i, j] belongs to wave i in a and wave j in b.": both(
            lambda found: found.transpose(0, 1)
        ),
        "only a was transformed.": along(0),
        "only b was transformed.": along(1),
        "a was transformed twice.": lambda grid: coefficients(coefficients(grid, 0), 0).to(grid.dtype),
        "it goes back from coefficients to values.": lambda grid: torch.einsum(
            "ia,jb,ij...->ab...", basis(len(grid)), basis(len(grid)), grid.double()
        ).to(grid.dtype),
        "the mean over all pairs is taken off first; it is entry [0, 0].": lambda grid: both()(
            grid - grid.mean(dim=(0, 1))
        ),
        "the coefficients are squared.": both(lambda found: found.square()),
        "the further axes are summed; each has a grid of its own.": lambda grid: both()(
            grid.flatten(2).sum(-1) if grid.dim() > 2 else grid
        ),
    }
)
def check_fft2d(fn: Fn) -> None:
    """Against torch.fft along both axes; with neurons and without."""
    name = "fft2d"
    for shape in ((6, 6), (5, 5, 3), (4, 4, 2, 3)):
        grid = noise(*shape, seed=sum(shape)) + 0.3
        axes = " ".join(["wave_a", "wave_b", "neuron", "more"][: len(shape)])
        with unchanged(name, grid=grid):
            actual = fn(grid)
        compare(f"{name} of {tuple(shape)}", actual, both()(grid), axes)
    follows_input(name, fn, (noise(3, 3, 2),), "wave_a wave_b neuron")


# ------------------------------------------------------------------------------------------------ a table's frequencies


def norm(found: list[float]) -> float:
    return math.sqrt(sum(value * value for value in found))


def pooled(
    of: Callable[[list[float]], float] = norm,
    first: int = 0,
    dim: int = 0,
    group: Callable[[int], int] = frequency_of,
) -> Fn:
    """frequency_norms frequency by frequency."""

    def frequency_norms(vectors: Tensor) -> Tensor:
        found = coefficients(vectors, dim)
        rows = found if dim == 0 else found.T
        groups = sorted({group(number) for number in range(len(rows))})[first:]
        together = [rows[[number for number in range(len(rows)) if group(number) == one]] for one in groups]
        return torch.tensor([of(part.flatten().tolist()) for part in together], dtype=vectors.dtype)

    return frequency_norms


def without_cosines(vectors: Tensor) -> Tensor:
    """|rfft|, which counts each frequency once."""
    return torch.fft.rfft(vectors.double(), dim=0, norm="ortho").abs().square().sum(1).sqrt().to(vectors.dtype)


@known_mistakes(
    {
        "they are the squares of the norms; take the root.": pooled(lambda found: sum(v * v for v in found)),
        "the constant is missing; frequency 0 comes first.": pooled(first=1),
        "it is a mean over d_model and the two waves; a norm is the root of a sum.": pooled(
            lambda found: math.sqrt(sum(v * v for v in found) / len(found))
        ),
        "each wave has an entry of its own; cosine and sine belong together.": pooled(group=lambda number: number),
        "the absolute values are summed.": pooled(lambda found: sum(map(abs, found))),
        "it is |rfft|, in which a frequency's other half is missing: it stands for n - k too.": without_cosines,
        "the waves run along d_model; they run along the numbers.": pooled(dim=1),
        "the coefficients are summed before they are squared.": pooled(lambda found: abs(sum(found))),
    }
)
def check_frequency_norms(fn: Fn) -> None:
    """Against torch.fft; odd and even."""
    name = "frequency_norms"
    for n, d_model in ((8, 3), (7, 4), (3, 5), (2, 3)):
        vectors = noise(n, d_model, seed=n) + 0.5
        with unchanged(name, vectors=vectors):
            actual = fn(vectors)
        compare(f"{name} of {n} numbers", actual, pooled()(vectors), "frequency")
    follows_input(name, fn, (noise(5, 2),), "frequency")


def ranked(
    choose: Callable[[list[float], int], list[int]] = lambda norms, n: sorted(
        range(1, len(norms)), key=lambda k: -norms[k]
    )[:n],
) -> Fn:
    """key_frequencies from the norms of all frequencies, as a list."""
    return lambda W_E, n: torch.tensor(choose(pooled()(W_E).tolist(), n))


def by_wave(W_E: Tensor, n: int) -> Tensor:
    """The largest rows of coefficients."""
    norms = coefficients(W_E, 0).norm(dim=1)
    norms[0] = 0
    return norms.topk(n).indices


def by_cosine(W_E: Tensor, n: int) -> Tensor:
    """The largest rows of coefficients that belong to cosines."""
    return coefficients(W_E, 0).norm(dim=1)[1::2].topk(n).indices + 1


def table(n: int, d_model: int, sizes: list[float]) -> Tensor:
    """Vectors whose frequencies have these norms."""
    vectors = torch.zeros(n, d_model, dtype=torch.float64)
    for number, row in enumerate(basis(n)):
        k = frequency_of(number)
        alone = k == 0 or 2 * k == n
        large = (number + k) % 2 == 1  # of a frequency's two waves, now the cosine, now the sine
        direction = torch.nn.functional.normalize(noise(d_model, seed=number).double(), dim=0)
        vectors += sizes[k] * (1 if alone else 0.9**0.5 if large else 0.1**0.5) * torch.outer(row, direction)
    return vectors.float()


TABLES = ((11, 4, [9.0, 2.0, 5.0, 1.0, 8.0, 3.0], 3), (8, 3, [4.0, 1.0, 3.0, 2.0, 6.0], 2), (9, 5, [1, 6, 5, 7, 2], 4))


@known_mistakes(
    {
        "the constant is among them; it is no frequency.": ranked(
            lambda norms, n: sorted(range(len(norms)), key=lambda k: -norms[k])[:n]
        ),
        "they are off by one: the first norm after the constant belongs to frequency 1.": ranked(
            lambda norms, n: [k - 1 for k in sorted(range(1, len(norms)), key=lambda k: -norms[k])[:n]]
        ),
        "the smallest comes first.": ranked(
            lambda norms, n: sorted(sorted(range(1, len(norms)), key=lambda k: -norms[k])[:n], key=lambda k: norms[k])
        ),
        "they are sorted by frequency; sort them by size.": ranked(
            lambda norms, n: sorted(sorted(range(1, len(norms)), key=lambda k: -norms[k])[:n])
        ),
        "they are the smallest.": ranked(lambda norms, n: sorted(range(1, len(norms)), key=lambda k: norms[k])[:n]),
        "they are places in the basis; a frequency has two.": by_wave,
        "only the cosines are looked at; a frequency has two waves.": by_cosine,
    }
)
def check_key_frequencies(fn: Fn) -> None:
    """Tables whose frequencies have known sizes, none of them equal."""
    name = "key_frequencies"
    for n, d_model, sizes, wanted in TABLES:
        W_E = table(n, d_model, [float(size) for size in sizes])
        for count in (wanted, 1, n // 2):
            with unchanged(name, W_E=W_E):
                actual = fn(W_E, count)
            compare(f"{name} of {n} numbers, the largest {count}", actual, ranked()(W_E, count), "key")
    follows_input(name, fn, (table(7, 3, [1.0, 2.0, 4.0, 3.0]), 2), "key")
