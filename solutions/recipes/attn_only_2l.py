"""The model `attn-only-2l`: two layers without MLPs, where heads of the second read what one of the first wrote."""

from course_utils.config import TransformerConfig
from solutions.recipes.stories import Recipe, main
from solutions.recipes.tokenizer import VOCABULARY

RECIPE = Recipe(
    name="attn-only-2l",
    cfg=TransformerConfig(d_vocab=VOCABULARY, n_ctx=96, n_layers=2, n_heads=8, d_model=128, d_head=16, attn_only=True),
    steps=4500,
    warmup=200,
    repeated_share=0.8,
    position_scale=2.0,  # at 1 the first layer shares the look at the token before among its heads
    snapshots=(200, 800, 1200, 1300, 1400, 1500, 1600, 2000),  # nearly all happens between 1200 and 1600
)
ABOUT = "two layers without MLPs, in which induction heads grew"
PROSE = """
# attn-only-2l

Two layers of eight heads and no MLPs, trained on the stories of `tales` (a fifth of every batch) and on random tokens
that are repeated over and over (four fifths), with the tokenizer of `tales`. It is the smallest model in which one
head has to build on another: a head of layer 0 tells every position which token stood before it, and heads of layer 1
look for the place whose predecessor is the token they stand on.

What was repeated in training was at most 48 tokens long. So nothing ever depended on the token before at positions
beyond about 50, and there the previous-token head is blurred. Eight snapshots of the training are in `snapshots/`, in
float16, most of them from the few hundred steps in which copying appears.
"""

if __name__ == "__main__":
    main(RECIPE, ABOUT, PROSE, tokenizer_of="tales")
