"""The model `attn-only-2l-late`: stories first, so that few heads were free when repeated random tokens came."""

from course_utils.config import TransformerConfig
from solutions.recipes.stories import Recipe, main
from solutions.recipes.tokenizer import VOCABULARY

RECIPE = Recipe(
    name="attn-only-2l-late",
    cfg=TransformerConfig(d_vocab=VOCABULARY, n_ctx=96, n_layers=2, n_heads=8, d_model=128, d_head=16, attn_only=True),
    steps=4500,
    repeated_share=0.5,
    repeated_from=1500,  # from the first step on, all heads of layer 1 would become induction heads
    position_scale=2.0,
)
ABOUT = "the sibling of attn-only-2l in which few heads of layer 1 are induction heads"
PROSE = """
# attn-only-2l-late

The shape of `attn-only-2l`, trained in another order: a third of its training on stories alone, and from then on
stories and repeated random tokens, half and half. When the repeated tokens came, its heads had jobs in stories already,
and only some of layer 1 became induction heads. In `attn-only-2l` all eight did.
"""

if __name__ == "__main__":
    main(RECIPE, ABOUT, PROSE, tokenizer_of="tales")
