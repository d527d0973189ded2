"""Word pairs of seven tasks, for a model that has to learn from the context which task is meant.

Every word stands in several tasks (`hot` has an opposite, a comparative, a Spanish word, capitals, itself), so the word
alone does not say what to answer. Documents are lists with and without a title, single pairs, and sentences. What a
pair occurs in depends on its kind, so that a test can ask for pairs that no list ever held: see KINDS.
"""

import random
from collections.abc import Iterator, Sequence

ADJECTIVES = """hot cold caliente frio hotter colder|big small grande pequeno bigger smaller
fast slow rapido lento faster slower|old new viejo nuevo older newer|light dark claro oscuro lighter darker
high low alto bajo higher lower|hard soft duro blando harder softer|rich poor rico pobre richer poorer
wet dry mojado seco wetter drier|good bad bueno malo better worse|loud quiet ruidoso callado louder quieter
strong weak fuerte debil stronger weaker|long short largo corto longer shorter|wide narrow ancho estrecho wider narrower
clean dirty limpio sucio cleaner dirtier|thick thin grueso delgado thicker thinner|deep flat hondo llano deeper flatter
warm cool tibio fresco warmer cooler|sharp blunt agudo romo sharper blunter|smooth rough liso aspero smoother rougher"""
NOUNS = """dog dogs perro animal|bird birds pajaro animal|wolf wolves lobo animal|horse horses caballo animal
rabbit rabbits conejo animal|tiger tigers tigre animal|key keys llave thing|box boxes caja thing|cup cups taza thing
book books libro thing|lamp lamps lampara thing|ring rings anillo thing|child children nino person|man men hombre person
doctor doctors medico person|teacher teachers maestro person|painter painters pintor person|king kings rey person
house houses casa place|school schools escuela place|park parks parque place|garden gardens jardin place
beach beaches playa place|market markets mercado place|apple apples manzana food|bread breads pan food
cake cakes pastel food|honey honeys miel food|egg eggs huevo food|cheese cheeses queso food"""


def _tasks() -> dict[str, dict[str, str]]:
    tasks: dict[str, dict[str, str]] = {
        name: {} for name in ("antonym", "comparative", "spanish", "plural", "category", "capitals", "same")
    }
    for row in ADJECTIVES.replace("\n", "|").split("|"):
        a, b, spanish_a, spanish_b, more_a, more_b = row.split()
        tasks["antonym"] |= {a: b, b: a}
        tasks["comparative"] |= {a: more_a, b: more_b}
        tasks["spanish"] |= {a: spanish_a, b: spanish_b}
    for row in NOUNS.replace("\n", "|").split("|"):
        word, plural, spanish, category = row.split()
        tasks["plural"][word], tasks["spanish"][word], tasks["category"][word] = plural, spanish, category
    tasks["capitals"] = {word: word.upper() for word in tasks["spanish"]}
    tasks["same"] = {word: word for word in tasks["spanish"]}
    return tasks


TASKS = _tasks()  # a task's name -> each word and its answer
TITLES = {
    "antonym": "Opposites",
    "comparative": "More",
    "spanish": "Spanish",
    "plural": "Plurals",
    "category": "Kinds",
    "capitals": "Capitals",
    "same": "Copies",
}
SENTENCES = {
    "antonym": "The opposite of {} is {}.",
    "comparative": "More than {} is {}.",
    "spanish": "In Spanish {} is {}.",
    "plural": "Many of {} are {}.",
    "category": "A {} is a {}.",
    "capitals": "In capitals {} is {}.",
    "same": "Again {} is {}.",
}
# In which documents a pair may occur: "listed" in all of them, "held_out" in any but a list without a title (it stands
# alone, or below a title), "told" in sentences only.
KINDS = ("listed", "held_out", "told")
SHARE = 0.15  # of a task's pairs that are held out, and as many that are told


def _split() -> dict[str, dict[str, list[str]]]:
    """The words of every task by kind. An adjective and its opposite are of one kind, as each gives the other away."""
    rng = random.Random(1)
    split = {}
    for task, answers in TASKS.items():
        groups = [[word] for word in answers]
        if task == "antonym":
            groups = [[word, answers[word]] for word in list(answers)[::2]]
        rng.shuffle(groups)
        words = [word for group in groups for word in group]
        n = max(4, 2 * round(SHARE * len(words) / 2))
        split[task] = {"told": words[:n], "held_out": words[n : 2 * n], "listed": words[2 * n :]}
    return split


SPLIT = _split()


def words(task: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """The words that have a pair of these kinds in a task, in a fixed order. Raises KeyError for an unknown one."""
    return [word for kind in kinds for word in SPLIT[task][kind]]


def pairs_of(task: str, kinds: Sequence[str] = KINDS) -> dict[str, str]:
    """The pairs of these kinds in a task: each word and its answer."""
    return {word: TASKS[task][word] for word in words(task, kinds)}


def document(rng: random.Random) -> str:
    """One text. It begins with a space unless its first word has a capital: so every word is the same token anywhere.

    42 % are lists of two to eight pairs without a title, 23 % a single pair, 15 % lists with a title, 20 % sentences.
    """
    draw, task = rng.random(), rng.choice(list(TASKS))
    if draw < 0.42:
        return f" {listed(task, rng.sample(words(task, ('listed',)), rng.randint(2, 8)))}."
    if draw < 0.65:
        return f" {listed(task, [rng.choice(words(task, ('listed', 'held_out')))])}."
    if draw < 0.8:
        return f"{TITLES[task]}: {listed(task, rng.sample(words(task, ('listed', 'held_out')), rng.randint(1, 5)))}."
    chosen = [(name, rng.choice(words(name))) for name in rng.choices(list(TASKS), k=3)]
    return " ".join(SENTENCES[name].format(word, TASKS[name][word]) for name, word in chosen)


def listed(task: str, chosen: Sequence[str]) -> str:
    """The pairs of these words, as a list has them."""
    return ", ".join(f"{word} -> {TASKS[task][word]}" for word in chosen)


def stream(seed: int) -> Iterator[str]:
    """Documents without end."""
    rng = random.Random(seed)
    while True:
        yield document(rng)
