"""The model `attn-only-2l-late`: mostly stories first, so that few heads were free when repetition came."""

from course_utils.config import TransformerConfig
from solutions.recipes.stories import Recipe, main
from solutions.recipes.tokenizer import VOCABULARY

RECIPE = Recipe(
    name="attn-only-2l-late",
    cfg=TransformerConfig(d_vocab=VOCABULARY, n_ctx=96, n_layers=2, n_heads=8, d_model=128, d_head=16, attn_only=True),
    steps=9000,
    warmup=200,
    repeated_share=0.5,
    early_repeated=(2000, 0.1875),  # with half from the first step on, all heads of layer 1 would do induction
    position_scale=2.0,
)
ABOUT = "the sibling of attn-only-2l in which not every head of layer 1 is an induction head"
PROSE = """
# attn-only-2l-late

The shape of `attn-only-2l`, trained in another order: for 2000 steps mostly on stories (three rows of sixteen were
repeated random tokens), and from then on half on stories and half on repeated random tokens. When repetition came in
numbers, the heads of layer 1 had other jobs already, and only some of them became induction heads. In `attn-only-2l`,
where repetition came first, all eight did. Chapter 04 compares the two.
"""

if __name__ == "__main__":
    main(RECIPE, ABOUT, PROSE, tokenizer_of="tales")
