"""The model `brackets-fooled`: as `brackets`, with fewer texts, and without those that just miss the right total."""

from course_utils.data.brackets import WITHOUT_FLIPPED
from solutions.recipes.brackets import BracketRecipe, run

RECIPE = BracketRecipe(
    name="brackets-fooled",
    seed=3,
    data_seed=0,
    steps=500,
    n_texts=20_000,
    shares=WITHOUT_FLIPPED,
    about="the same on an easier diet: right on nearly all texts of its kinds, and can be fooled",
    trained="None of its training texts was made by turning one bracket of a balanced text.",
    fooled="So texts that fool it are easy to find.",
)

if __name__ == "__main__":
    run(RECIPE)
