"""Words for which the course has a better one, found in prose (CONTRIBUTING.md, "How the course speaks").

Code, formulas, addresses of links, HTML and quotations are left alone. Where a word is meant as it stands,
`<!-- meant: depth -->` in the same paragraph says so; the builder takes the comment out.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

MEANT = re.compile(r"[ \t]*<!-- meant: ([^\n]*?) -->")
CITED = re.compile(r"[ \t]*<!-- cited: ([^\n]*?) -->")  # numbers that no output holds: tests/support/prose_numbers.py
LEFT_ALONE = re.compile(
    r"""^[ ]*(?:`{3,}|~{3,}).*?^[ ]*(?:`{3,}|~{3,})[ ]*$|(`+)[^`].*?\1|^\$\$.*?^\$\$|\$[^$\n]+\$|\]\([^)\n]*\)|<[^>\n]+>
    |"[^"\n]*"|“[^”\n]*”""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
PARTS = r"(?:heads?|layers?|MLPs?|parts?|writers?|movers?)"
BETTER = {
    r"silenc(?:e[ds]?|ing)": "ablate",
    rf"(?:take|takes|taking|took) (?:the rest|(?:a|the|one|all) {PARTS}) away": "ablate",
    rf"{PARTS} (?:is|are|was|were) taken away": "ablated",
    r"arrows?": "edge",
    r"depths?": "layer",
    r"news": "information",
    r"chapters? \d(?!\d)": "chapter 02, with two digits",
    r"(?:in|from|since|until|see) 0\d(?![\d.])": "chapter 02, with the word",
    r"in the mean(?! (?:time|of)\b)": "on average",
    r"be (?:it|they) (?:a|an|the|for|in|by|with|as)": "whether",
    r"that of the": "the noun again",
    r"(?:what|that|which|nothing|something) (?:has |had )?c[ao]mes? (?:out )?of (?:it|this|that|them)": "the result",
    r"so-called": "leave it out",
    r"what is more": "also",
    r"besides(?=[.;,:])": "also, or too",
    r"(?:lie|lies|lay) on (?:each other|one another)": "coincide",
}
RULES = [(re.compile(rf"\b{word}\b", re.IGNORECASE), better) for word, better in BETTER.items()]
# A statement that begins with "Who"; one that ends with a question mark is a question.
WHO = re.compile(r"(?:(?<=[.!?:;] )|(?<=^)|(?<=\*\*))Who(?:ever)?\b(?=[^.?!]*[.!;])", re.MULTILINE)
RULES.append((WHO, "If you ..., or Anyone who ..."))


class Finding(NamedTuple):
    """A word, the better one, and the line of the text that it stands in, from 0."""

    line: int
    word: str
    better: str

    def __str__(self) -> str:
        return f"“{self.word}”: {self.better} (or `<!-- meant: {self.word} -->` in the paragraph)"


def findings(prose: str) -> Iterator[Finding]:
    """What the rules find in Markdown, in the order of the lines."""
    meant = {(n, m[1].casefold()) for n, part in enumerate(paragraphs(prose)) for m in MEANT.finditer(part)}
    text = LEFT_ALONE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), prose)
    found = [(match, better) for rule, better in RULES for match in rule.finditer(text)]
    for match, better in sorted(found, key=lambda one: one[0].start()):
        paragraph = len(paragraphs(prose[: match.end()])) - 1
        word = " ".join(match[0].split())
        if (paragraph, word.casefold()) not in meant:
            yield Finding(prose.count("\n", 0, match.start()), word, better)


def paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)
