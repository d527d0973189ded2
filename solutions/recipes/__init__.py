"""How each shipped model was trained: `python -m solutions.recipes.NAME` trains it again."""
