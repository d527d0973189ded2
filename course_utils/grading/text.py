"""What learners wrote, made safe for reports: no control characters, and names that can be files."""

import dataclasses
import hashlib
import re
import unicodedata

from course_utils.grading.results import ExerciseResult, Result

# Control characters are not allowed in XML and steer terminals; lone surrogates are no text; the rest is invisible and
# makes a line read backwards.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
UNSAFE_IN_NAMES = re.compile(f"[\t\n{UNSAFE.pattern[1:-1]}]")
PLAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,59}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.")  # Windows has its own plans for these


def clean(text: str) -> str:
    """The text with what is unsafe as a visible escape, such as \\x1b; line ends are those of Unix."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    return UNSAFE.sub(escape, text)


def clean_line(text: str) -> str:
    """The same, on one line."""
    return " ".join(clean(text).split())


def clean_name(text: str) -> str:
    """The same for a name, of which nothing may get lost: two learners stay two."""
    return UNSAFE_IN_NAMES.sub(escape, text)


def escape(found: re.Match[str]) -> str:
    """The character as Python writes it."""
    return found[0].encode("unicode_escape").decode()


def clean_result(result: Result) -> Result:
    """The result with every text of it clean."""

    def clean_exercise(one: ExerciseResult) -> ExerciseResult:
        mistake = one.mistake and clean_line(one.mistake)
        return dataclasses.replace(one, message=clean(one.message), mistake=mistake)

    return dataclasses.replace(
        result,
        learner=clean_name(result.learner),
        exercises=tuple(map(clean_exercise, result.exercises)),
        problems=tuple(map(clean_line, result.problems)),
    )


def file_name(learner: str) -> str:
    """A file name (without an ending) that is the learner's alone, on any system.

    A plain name, of small letters, digits, `-`, `_` and `.`, stays as it is. Of any other, what can be kept is kept,
    then follow `~`, which no plain name holds, and a digest: "Ada" and "ada" do not meet even where case is ignored.
    """
    if PLAIN.fullmatch(learner) and not RESERVED.fullmatch(learner):
        return learner
    ascii_only = unicodedata.normalize("NFKD", learner).encode("ascii", "ignore").decode()
    start = re.sub(r"[^A-Za-z0-9_-]+", "-", ascii_only).strip("-")[:40] or "learner"
    return f"{start}~{hashlib.sha256(learner.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
