"""The model `attn-only-4l`: the attention-only sibling of `tales`, whose heads write their answers directly."""

from course_utils.config import TransformerConfig
from solutions.recipes.stories import Recipe, main
from solutions.recipes.tokenizer import VOCABULARY

RECIPE = Recipe(
    name="attn-only-4l",
    cfg=TransformerConfig(d_vocab=VOCABULARY, n_ctx=96, n_layers=4, n_heads=8, d_model=128, d_head=32, attn_only=True),
    steps=6000,
    seed=1,  # with seed 0 no head writes more than a fifth of the answer directly; here one writes more than half
)
ABOUT = "the attention-only sibling of tales, whose heads write their answers directly"
PROSE = """
# attn-only-4l

Four layers of eight heads and no MLPs, trained on the same stories as `tales`, with its tokenizer. Without MLPs every
path through the model is a product of attention patterns and matrices, which makes it the place to learn circuit
finding. The numbers above mean what they mean in the card of `tales`.
"""

if __name__ == "__main__":
    main(RECIPE, ABOUT, PROSE, tokenizer_of="tales")
