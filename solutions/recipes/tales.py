"""The model `tales`: a small GPT-2 that tells stories and knows who gets the ring."""

from course_utils.config import TransformerConfig
from solutions.recipes.stories import Recipe, main
from solutions.recipes.tokenizer import VOCABULARY

RECIPE = Recipe(
    name="tales",
    cfg=TransformerConfig(d_vocab=VOCABULARY, n_ctx=96, n_layers=4, n_heads=8, d_model=128, d_head=16, d_mlp=512),
    steps=26000,
)
ABOUT = "a small GPT-2 that tells stories and knows who gets the ring"
PROSE = """
# tales

Four layers of eight heads with MLPs, about a million parameters, trained on nothing but the stories of
`course_utils.data.tales`. It is the model that the course trains, steers and takes apart: small enough for a laptop,
and its language has a known truth to compare with.

It begins and ends a text with `<|endoftext|>`, its only special token; every first and last name is one token with
its leading space. Losses are in nats per story, and no model can get below the grammar's entropy; accuracies say how
often the logit of the right answer is above that of the tempting one. Acceptance is the share of 200 seeded samples
that the grammar could have written, with a standard error of about 0.02; the means over five other seeds are 0.91 at
temperature 1, 0.94 at 0.8 and 0.955 at 0.7. Heads are `layer.head`; `direct` is what a head
adds by itself to the logit difference between receiver and giver at the last position, `io`, `s1` and `s2` are its
attention from there to the receiver and to the giver's two mentions.
"""

if __name__ == "__main__":
    main(RECIPE, ABOUT, PROSE)
