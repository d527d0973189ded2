"""The model `modular-multiplication`: as `modular-addition`, for products modulo 59 of numbers from 1 to 58."""

from solutions.recipes.modular_addition import GrokkingRecipe, run

RECIPE = GrokkingRecipe(
    name="modular-multiplication",
    operation="product",
    steps=9000,
    about="the same for multiplication modulo 59, which is addition in disguise",
)

if __name__ == "__main__":
    run(RECIPE)
