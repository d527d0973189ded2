"""A class that never was: `python benchmarks/generated_class.py FOLDER` writes three hundred notebooks of chapter 02,
with `--all-chapters` of one chapter after the other.

Learners get more or less far and make mistakes where it is difficult: some that the checks know by name, some that
they do not. The same seed gives the same class. For measuring `course grade`, and for the picture of its report.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# An exercise, and mistakes in it: what stands in the solution, and what learners write instead.
MISTAKES = {
    "LayerNorm": [("(variance + self.eps).sqrt()", "variance.sqrt() + self.eps")],
    "attention_scores": [("q / q.shape[-1] ** 0.5", "q"), ("q / q.shape[-1] ** 0.5", "q / q.shape[-1]")],
    "causal_mask": [
        ("diagonal=n_key - n_query + 1", "diagonal=n_key - n_query"),
        ("diagonal=n_key - n_query + 1", "diagonal=1"),
        ("masked_fill(future, -torch.inf)", "masked_fill(future, 0.0)"),
    ],
}
NAMES = "ada ben chi dina emil fatima goran hana ines jun kofi lena mia nils olga pia qing rosa sami tara".split()


def notebooks(chapter: str) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """The untouched chapter, where it is, and the solution of each exercise."""
    [path] = (ROOT / "chapters").glob(f"{chapter}_*.ipynb")
    untouched = json.loads(path.read_text(encoding="utf-8"))
    solved = json.loads((ROOT / "solutions" / path.name).read_text(encoding="utf-8"))
    answers = {}
    for stub, answer in zip(untouched["cells"], solved["cells"], strict=True):
        if "course" in stub["metadata"]:
            answers[stub["metadata"]["course"]["exercise"]] = "".join(answer["source"])
    return path, untouched, answers


def wrong(exercise: str, answer: str, chance: random.Random) -> str:
    """The answer with a mistake in it."""
    known = MISTAKES.get(exercise)
    if known:
        before, after = chance.choice(known)
        assert before in answer, f"the solution of {exercise} has changed: {before}"
        return answer.replace(before, after)
    return answer.replace(" + ", " - ", 1) if " + " in answer else answer.replace("return ", "return 2 * ", 1)


def every_chapter() -> list[str]:
    """The numbers of all chapters."""
    return sorted(path.name[:2] for path in (ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))


def write(folder: Path, n_learners: int, seed: int = 0, chapters: Sequence[str] = ("02",)) -> None:
    """Write a notebook for each learner, `CHAPTER-NAME-NUMBER.ipynb`, of one chapter after the other."""
    read = {chapter: notebooks(chapter) for chapter in chapters}
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    for number in range(n_learners):
        path, untouched, answers = read[chapters[number % len(chapters)]]
        reached, care = chance.betavariate(4, 1.5), chance.uniform(0.75, 1.0)
        notebook = json.loads(json.dumps(untouched))
        exercises = [cell for cell in notebook["cells"] if "course" in cell["metadata"]]
        for place, cell in enumerate(exercises):
            name, difficulty = cell["metadata"]["course"]["exercise"], cell["metadata"]["course"]["difficulty"]
            if place < reached * len(exercises) * 1.1:
                careless = chance.random() > care - 0.03 * difficulty
                cell["source"] = wrong(name, answers[name], chance) if careless else answers[name]
        learner = f"{chance.choice(NAMES)}-{number:03}"
        text = json.dumps(notebook, ensure_ascii=False)
        (folder / f"{path.stem}-{learner}.ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--learners", type=int, default=300)
    parser.add_argument("--all-chapters", action="store_true")
    arguments = parser.parse_args()
    chosen = every_chapter() if arguments.all_chapters else ["02"]
    write(arguments.folder, arguments.learners, chapters=chosen)
