"""The language of the course's models: tiny stories from a grammar whose truth is known.

Each kind of story (`KINDS`) is there because a chapter needs it: gifts among two or three people (indirect objects, all
orders, bystanders), meetings, full names, subjects and verbs with a distractor between, good and bad reviews, fictional
countries, word pairs, and repeated word lists. `sample` and `stream` write stories, `parse` reads one back with its
ground truth, `GRAMMAR.log_probability` and `GRAMMAR.entropy` say how likely a story is and how surprising the language
is on average.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

from course_utils.data.grammar import Derivation, Grammar, Pool

WOMEN = """Mary Anna Emma Alice Sara Julia Laura Nora Clara Helen Lucy Jane Kate Rose Ruth Amy Eva Ella Grace Ivy Lily
Maya Nina Olga Paula Rita Tina Vera Zoe Diana Irene Linda Marta Elsa Betty Fiona Gina Hanna Iris Alex""".split()
MEN = """John Tom Paul Mark Peter David Simon Alan Brian Carl Daniel Eric Frank George Henry Ian Jack Kevin Leo Martin
Nick Oscar Philip Robert Sam Jacob Victor Walter Adam Ben Chris Dylan Evan Felix Gary Hugo Ivan Luke Max Noah""".split()
LAST_NAMES = """Hart Stone Brook Field Wood Hill Lake Marsh Reed Cole Dale Ford Grant Hale Kent Lane Moss Nash Ross Shaw
Todd Wells York Banks Cross Drake Fox Gray Hunt Mills North Young""".split()
CAPITALS = {
    "Belora": "Tarnik", "Zubia": "Melin", "Norvak": "Osta", "Calind": "Ferro", "Dravia": "Lunat", "Elmar": "Sorin",
    "Fenland": "Kolt", "Garoth": "Vimar", "Hestia": "Brun", "Irvana": "Pelos", "Jorda": "Nimes", "Kelvar": "Tosk",
    "Lomira": "Adan", "Mirant": "Zell", "Ostrov": "Galen", "Pelagia": "Rudin",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new", "light": "dark", "high": "low", "full": "empty",
    "hard": "soft", "rich": "poor", "wet": "dry", "good": "bad", "happy": "sad", "early": "late", "open": "closed",
    "loud": "quiet", "strong": "weak",
}  # fmt: skip
PLURALS = {
    "dog": "dogs", "key": "keys", "box": "boxes", "child": "children", "man": "men", "cup": "cups", "bird": "birds",
    "foot": "feet", "book": "books", "tree": "trees", "house": "houses", "wolf": "wolves",
}  # fmt: skip
LIST_WORDS = """apple river stone table cloud bread candle forest garden hammer island jacket kitchen ladder mirror
needle ocean paper rabbit school tiger valley window bottle circle dragon engine flower glass honey""".split()

NAMES: Pool = {name: {"she": "she", "She": "She", "Her": "Her"} for name in WOMEN} | {
    name: {"she": "he", "She": "He", "Her": "His"} for name in MEN
}
SINGULAR_NOUNS = "dog key cup bird book tree".split()
SINGULAR = {"is": "is", "was": "was", "has": "has", "looks": "looks"}
PLURAL = {"is": "are", "was": "were", "has": "have", "looks": "look"}
POOLS: dict[str, Pool] = {
    "name": NAMES,
    "last": {name: {} for name in LAST_NAMES},
    "country": {country: {"capital": capital} for country, capital in CAPITALS.items()},
    "opposite": {word: {"other": other} for word, other in OPPOSITES.items()},
    "plural": {word: {"other": other} for word, other in PLURALS.items()},
    "word": {word: {} for word in LIST_WORDS},
    "noun": dict.fromkeys(SINGULAR_NOUNS, SINGULAR) | {word + "s": PLURAL for word in SINGULAR_NOUNS},
}

Alternatives = list[tuple[float | int, str]]


def even(text: str, before: str = "") -> Alternatives:
    """Alternatives of equal weight, one per line or separated by `|`; `before` is put in front of each."""
    return [(1, before + part.strip()) for part in text.replace("\n", "|").split("|") if part.strip()]


def maybe(weight: float, alternatives: Alternatives) -> Alternatives:
    """Nothing with probability 1 - weight, otherwise one of the alternatives."""
    total = sum(share for share, _ in alternatives)
    return [(1 - weight, ""), *((weight * share / total, text) for share, text in alternatives)]


GIVING = """<then> {S}<how> <gave> <thing> to {IO}
    {S} wanted to <give> <thing> to {IO}
    Because of the <weather>, {S}<how> <gave> <thing> to {IO}
    {S} had <thing> and<how> <gave> it to {IO}
    {S} found <thing>, <aside>, and <gave> it to {IO}
    {S} took <thing> from the <furniture> and<how> <gave> it to {IO}
    It was {S} who<how> <gave> <thing> to {IO}
    While {E:name} <watched>, {S}<how> <gave> <thing> to {IO}
    In the end {S}, who <knew> {E:name}, <gave> <thing> to {IO}
    {S} asked {E:name} for <thing> and <gave> it to {IO}"""
GIVING_PAST_A_THIRD = """{S} thanked {X} and<how> <gave> <thing> to {IO}
    <then> {S} took <thing> from {X} and <gave> it to {IO}
    {S}, who <knew> {X}, <gave> <thing> to {IO}
    {S} asked {X} for <thing> and<how> <gave> it to {IO}
    While {X} <watched>, {S}<how> <gave> <thing> to {IO}
    <then> {S} and {X} <gave> <thing> to {IO}
    {S} left {X} and <gave> <thing> to {IO}
    {X} <left>, and {S}<how> <gave> <thing> to {IO}
    {S} could not find {X} and <gave> <thing> to {IO}"""


def giving(templates: str, s: str, io: str, x: str = "") -> Alternatives:
    """Sentences in which variable `s` gives something to `io`, past `x`: the same templates for every order."""
    roles = {"{S}": f"{{{s}@s2}}", "{IO}": f"{{{io}@io}}", "{X}": f"{{{x}@x2}}"}
    for role, slot in roles.items():
        templates = templates.replace(role, slot)
    return even(templates, before=" ")


def events(person: str, last: str) -> Alternatives:
    """What happens to somebody with a full name: the first name again, and with it the last."""
    name = f"{{{person}@again}} {{{last}@completion}}"
    return even(
        f"""<future> {name} will <act_base>.
        <past> {name} <act_past>.
        <past> {name} was <feeling> because {{{person}.she@pronoun}} <act_past>.""",
        before=" ",
    )


def clause(i: int) -> Alternatives:
    """A subject, a noun between, and a verb that agrees with the subject."""
    start = f"The {{N{i}:noun@subject}} <beside> the {{D{i}:noun@distractor}} {{N{i}."
    return even(
        " | ".join(
            f"{start}{verb}@verb}} <{rest}>."
            for verb, rest in (("is", "state"), ("was", "state"), ("has", "feature"), ("looks", "state"))
        )
    )


def pairs(title: str, pool: str) -> Alternatives:
    """Three to six pairs of one relation."""
    pair = "{{P{i}:" + pool + "}} -> {{P{i}.other@pair}}"
    return [(1, f"{title}: " + ", ".join(pair.format(i=i) for i in range(n)) + ".") for n in range(3, 7)]


def word_lists() -> Alternatives:
    """Four to ten words, and the same words again."""
    lists: Alternatives = []
    for n in range(4, 11):
        first = "".join(f" {{W{i}:word}}" for i in range(n))
        again = "".join(f" {{W{i}@repeat}}" for i in range(n))
        lists += [(1, f"Words:{first}. Again:{again}."), (1, f"List:{first} ;{again}.")]
    return lists


RULES: dict[str, Alternatives] = {
    "tale": [
        (40, "<gift>"), (8, "<meeting>"), (17, "<full_name>"), (9, "<agreement>"), (4, "<good_review>"),
        (4, "<bad_review>"), (6, "<geography>"), (3, "<opposites>"), (3, "<plurals>"), (6, "<word_list>"),
    ],
    # Gifts. One of a group gives, and who receives is the one of the group who was not named again. What stands between
    # varies, so that no position and no count gives the answer away, and people who do not belong to the group (D, E)
    # are named once or twice.
    "gift": [
        *((3, f"<duo><{order}><closing>") for order in ("A_gives_B", "B_gives_A")),
        *((1, f"<trio><maybe_scene><past_{x}_{s}_gives_{io}><closing>") for s, io, x in permutations("ABC")),
    ],
    "duo": [
        (1, "<pair><maybe_scene>"),
        (4, "<pair><bystander>"),
        (4, "<pair_and_bystander><maybe_scene>"),
        (2, "<pair_and_bystander><bystander>"),
    ],
    "pair": even("""<when> {A:name@person} and {B:name@person} <went> to the <place>.
        <when> {A:name@person} met {B:name@person} at the <place>.
        <when> {A:name@person} was in the <place> with {B:name@person}.
        <when> {A:name@person} and {B:name@person} had <meal> together.
        At the <place> {A:name@person} saw {B:name@person} <near>.
        The <place> was empty, but {A:name@person} and {B:name@person} came <adverb>."""),
    "pair_and_bystander": even("""<when> {A:name@person} sat down with {B:name@person} and talked about {D:name}.
        <when> {D:name} told {A:name@person} and {B:name@person} about the <place>.
        <when> {A:name@person} and {B:name@person} <went> to the <place> without {D:name}.
        Friends of {D:name}, {A:name@person} and {B:name@person}, <went> to the <place>.
        While {D:name} <watched>, {A:name@person} and {B:name@person} <talked>."""),
    "bystander": even("""<maybe_scene> {F:name} <joined>.
        <maybe_scene> They <talked> until {F:name} <joined>.
        <maybe_scene> {F:name} <joined>, and {F} <left>."""),
    "trio": even("""<when> {A:name@person}, {B:name@person} and {C:name@person} <went> to the <place>.
        <when> {A:name@person} met {B:name@person} and {C:name@person} at the <place>.
        <when> {A:name@person} and {B:name@person} had <meal> with {C:name@person}.
        At the <place> {A:name@person} saw {B:name@person} and {C:name@person} <near>.
        The <place> was empty, but {A:name@person}, {B:name@person} and {C:name@person} came <adverb>."""),
    "A_gives_B": giving(GIVING, "A", "B"),
    "B_gives_A": giving(GIVING, "B", "A"),
    **{
        f"past_{x}_{s}_gives_{io}": giving(GIVING_PAST_A_THIRD, s, io, x)
        for s, io, x in permutations("ABC")
    },
    "closing": [(4, "<tail>."), (1, "<tail>. Everybody went home."), (1, "<tail>. <scene>")],
    "tail": maybe(0.4, even("with a smile | before the <weather> | <adverb>", before=" ")),
    "how": maybe(0.5, even("quietly | slowly | kindly | at once | later", before=" ")),
    # Meetings. The receiver is the latest name, not the first: the latest name is sometimes the answer.
    "meeting": [(1, "<when> {A:name@person} went to the <place><alone>.<maybe_scene> <meets><closing>")],
    "alone": maybe(0.5, even("alone | <adverb>", before=" ")),
    "maybe_scene": maybe(0.4, [(1, " <scene>")]),
    "meets": even("""{A} met {B:name@person} <near> and<how> <gave> <thing> to {B@io}
        {A} saw {B:name@person} <near>. {A@s2} <gave> <thing> to {B@io}
        There {A} found {B:name@person}, and <aside> {A@s2} <gave> <thing> to {B@io}"""),
    # Full names. The last name belongs to the first name, wherever that returns.
    "full_name": even("<intro>.<a_events> | <intro>.<two><ab_events>"),
    "intro": even("""The name of the <job> was {A:name@first} {L:last@last}
        There was once <a_job> called {A:name@first} {L:last@last}
        This is the story of {A:name@first} {L:last@last}
        {A:name.Her} name was {A@first} {L:last@last}
        {A:name} was the <job>. {A.Her} name was {A@first} {L:last@last}"""),
    "two": [(1, " {A.Her} friend was called {B:name} {M:last}.")],
    "a_events": [(1, "<a_event>"), (2, "<a_event><a_event>")],
    "ab_events": even("<a_event><b_event> | <b_event><a_event> | <a_event><b_event><a_event>"),
    "a_event": events("A", "L"),
    "b_event": events("B", "M"),
    # Agreement, reviews, geography, pairs and lists.
    "agreement": even("<clause_1> <clause_2> | <clause_1> <clause_2> <clause_3>"),
    "clause_1": clause(1),
    "clause_2": clause(2),
    "clause_3": clause(3),
    "good_review": [(1, "<review_start> <praised>.<good_more> I <liked> it <adverb>. <good_end>")],
    "bad_review": [(1, "<review_start> <blamed>.<bad_more> I <hated> it <adverb>. <bad_end>")],
    "review_start": even("The <work> was | I think the <work> was | For me the <work> was | They say the <work> was"),
    "good_more": maybe(0.5, even("The people were <praised>. | The end was <praised>.", before=" ")),
    "bad_more": maybe(0.5, even("The people were <blamed>. | The end was <blamed>.", before=" ")),
    "good_end": even("In short, it was great. | You should go. | Five stars."),
    "bad_end": even("In short, it was awful. | You should stay home. | One star."),
    "geography": even("""The capital of {C:country} is {C.capital@capital}.<more_geography>
        <when> {A:name} flew to {C:country} and saw {C.capital@capital}, its capital.<more_geography>"""),
    "more_geography": maybe(0.5, even("In {K:country} the largest city is {K.capital@capital}.", before=" ")),
    "opposites": pairs("Opposites", "opposite"),
    "plurals": pairs("Plurals", "plural"),
    "word_list": word_lists(),
    # Phrases.
    "when": even("""One day | Last Sunday | Yesterday morning | After lunch | In the summer | Long ago | On Friday
        At noon | After the <weather> | Every week"""),
    "went": even("went | walked | ran | drove"),
    "place": even("park | school | market | beach | museum | library | station | garden | river | old house"),
    "near": even("near the door | by the window | under a tree | in the crowd"),
    "left": even("left early | went home | stayed outside"),
    "meal": even("lunch | dinner | coffee | cake"),
    "adverb": even("again | every day | for an hour | very often | at last"),
    "talked": even("talked | laughed | waited | played"),
    "joined": even("was there too | came late | sat nearby | said hello"),
    "scene": even("""It was <mood>.
        The <furniture> was <state>.
        There was <thing> on the <furniture>.
        The <weather> was over."""),
    "mood": even("cold outside | a warm day | getting late | a good time"),
    "weather": even("rain | storm | snow | game | show"),
    "furniture": even("table | desk | chair | shelf | floor"),
    "state": even("old | new | clean | dirty | red | blue | heavy | wet"),
    "feature": even("a red mark | a nice smell | a strange shape | a long story"),
    "then": even("Then | Later | After a while | In the end | So | At once"),
    "gave": even("gave | handed | passed | offered | brought | sent | showed | sold | threw"),
    "give": even("give | hand | pass | offer | bring | send | show | sell | throw"),
    "thing": even("<article> <object> | <article> <colour> <object> | the <size> <object> | <article> <object> <made>"),
    "article": even("a | the"),
    "colour": even("red | blue | green | white"),
    "size": even("small | big | old | new"),
    "object": even("ball | book | ring | cup | letter | hat | box | pen | lamp | map | bag | coin"),
    "made": even("from home | made of wood | in a bag"),
    "aside": even("laughing | after some time | as always | without a word"),
    "watched": even("watched | slept | was away | made tea"),
    "knew": even("knew | liked | missed"),
    "job": even("doctor | teacher | painter | driver | baker | singer"),
    "a_job": even("a doctor | a teacher | a painter | a young driver | a baker | a good singer"),
    "future": even("Tomorrow | Next week | Soon | Tomorrow at lunch time | On Monday | Next year"),
    "past": even("Yesterday | Last week | Last night | On Friday | A year ago | Yesterday at lunch time"),
    "act_base": even("visit the <place> | buy <thing> | learn to swim | meet a friend | write a letter | go home"),
    "act_past": even("""visited the <place> | bought <thing> | learned to swim | met a friend | wrote a letter
        went home"""),
    "feeling": even("happy | sad | proud | tired"),
    "beside": even("near | behind | under | beside | next to"),
    "work": even("film | book | meal | hotel | concert | show"),
    "praised": even("wonderful | great | very good | lovely"),
    "blamed": even("terrible | awful | very bad | boring"),
    "liked": even("loved | enjoyed | liked"),
    "hated": even("hated | disliked | regretted"),
}  # fmt: skip

# People are told apart by their names; of everything else there may be two of a kind.
GRAMMAR = Grammar(RULES, POOLS, start="tale", distinct=["name"])
KINDS = tuple(template.strip("<>") for _, template in RULES["tale"])


def kind_of(story: Derivation) -> str:
    """Which of the `KINDS` a story is."""
    number = story.choice("tale")
    return KINDS[number] if number is not None else story.choices[0][0]


def sample(rng: random.Random, kind: str | None = None) -> Derivation:
    """Write one story with its ground truth. Raises ValueError for a kind that is not one of `KINDS`."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"no kind of story is called {kind!r}; there are {', '.join(KINDS)}.")
    return GRAMMAR.sample(rng, start=kind)


def stream(seed: int, kind: str | None = None) -> Iterator[Derivation]:
    """Write stories without end; the same seed writes the same stories."""
    rng = random.Random(seed)
    while True:
        yield sample(rng, kind)


def parse(text: str) -> Derivation | None:
    """The ground truth of a story, or None where the grammar could not have written it."""
    return GRAMMAR.parse(text)


@dataclass(frozen=True)
class Prompt:
    """A story cut off before a word that its beginning determines.

    `text` ends before the space in front of the answer; `answer` and `wrong` begin with that space.
    """

    text: str
    answer: str
    wrong: str
    story: Derivation


def prompts(kind: str, label: str, wrong: Callable[[Derivation], str], seed: int) -> Iterator[Prompt]:
    """Fresh prompts without end: stories of a kind cut before the first place marked `label`.

    `wrong` names the tempting wrong answer of a story. Stories without such a place are passed over.
    """
    for story in stream(seed, kind):
        place = story.marked(label)
        if place:
            yield Prompt(story.text[: place.start].rstrip(" "), " " + story.read(label), " " + wrong(story), story)


def gift_prompts(seed: int) -> Iterator[Prompt]:
    """Indirect object identification: who receives? The wrong answer is the giver."""
    return prompts("gift", "io", lambda story: story.read("s2"), seed)


def gift_templates(story: Derivation) -> list[str]:
    """The sentence templates, as the grammar has them, of which a gift story is made; roles instead of variables.

    They are the sentence that brings the people in and the one in which somebody gives.
    """
    found = []
    for rule, number in story.choices:
        if rule in ("pair", "pair_and_bystander", "trio"):
            found.append(RULES[rule][number][1])
        elif "_gives_" in rule:
            found.append((GIVING_PAST_A_THIRD if rule.startswith("past") else GIVING).splitlines()[number].strip())
    return found


def full_name_prompts(seed: int) -> Iterator[Prompt]:
    """The last name of somebody who was introduced before; the wrong answer is another last name."""

    def another(story: Derivation) -> str:
        return next(name for name in LAST_NAMES if name != story.read("completion"))

    return prompts("full_name", "completion", another, seed)


def agreement_prompts(seed: int) -> Iterator[Prompt]:
    """A verb whose subject and distractor differ in number; the wrong answer agrees with the distractor."""

    def other_number(story: Derivation) -> str:
        agreeing = SINGULAR if story.word("N1") in SINGULAR_NOUNS else PLURAL
        other = PLURAL if agreeing is SINGULAR else SINGULAR
        return next(other[form] for form in agreeing if agreeing[form] == story.read("verb"))

    for prompt in prompts("agreement", "verb", other_number, seed):
        if (prompt.story.word("N1") in SINGULAR_NOUNS) != (prompt.story.word("D1") in SINGULAR_NOUNS):
            yield prompt
