"""Chapter 02: a GPT-2 written from scratch, with hook points, and the ways to draw text from it."""

import math
from collections.abc import Callable

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from course_utils.config import TransformerConfig
from course_utils.hooks import HookPoint


class LayerNorm(nn.Module):
    """Bring every residual vector to mean 0 and variance 1, then scale by `w` and shift by `b`.

    Mean and variance are taken over d_model, separately for each position. The variance divides by d_model (not by
    d_model - 1), and `cfg.layer_norm_eps` is added to it inside the root. `hook_scale` sees that root, which keeps its
    last axis (size 1); `hook_normalized` sees the vector before `w` and `b`. In float16 the square of 256 is already
    inf, so half precision is computed in float32; hook points and output have the input's dtype.
    Source: Ba et al. 2016, section 3.
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.eps = cfg.layer_norm_eps
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.b = nn.Parameter(torch.zeros(cfg.d_model))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the normalised vectors; the residual stream itself stays as it is."""
        if not (self.hook_scale.is_watched or self.hook_normalized.is_watched):
            return nn.functional.layer_norm(resid, self.w.shape, self.w, self.b, self.eps)  # the same steps in one
        wide = resid.to(torch.promote_types(resid.dtype, torch.float32))
        centred = wide - wide.mean(dim=-1, keepdim=True)
        variance = centred.pow(2).mean(dim=-1, keepdim=True)
        scale = self.hook_scale((variance + self.eps).sqrt().to(resid.dtype))
        normalized = self.hook_normalized((centred / scale).to(resid.dtype))
        return normalized * self.w + self.b


class Embed(nn.Module):
    """Look up one learned vector per token: row `t` of `W_E` belongs to token id `t`."""

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(cfg.d_vocab, cfg.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the embedding of every token."""
        return self.W_E[tokens]


class PosEmbed(nn.Module):
    """Look up one learned vector per position: row `p` of `W_pos` belongs to position `p`, whatever token is there."""

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.W_pos = nn.Parameter(torch.randn(cfg.n_ctx, cfg.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"], offset: int = 0) -> Float[Tensor, "batch pos d_model"]:
        """Return the position embeddings, the same for every row of the batch.

        The first token stands at position `offset` (0, unless earlier positions are in a key-value cache).
        """
        batch, n_pos = tokens.shape
        rows = self.W_pos[offset : offset + n_pos]
        if len(rows) < n_pos:
            problem = f"PosEmbed: the text goes on beyond n_ctx = {len(self.W_pos)}, the last position with a vector."
            raise ValueError(problem)
        return einops.repeat(rows, "pos d_model -> batch pos d_model", batch=batch)


def attention_scores(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key head d_head"],
) -> Float[Tensor, "batch head query key"]:
    """Score how much each query wants each key: the dot product of the two, divided by sqrt(d_head); unmasked.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    q = q / q.shape[-1] ** 0.5  # before the product, which may be too large for float16
    return einops.einsum(q, k, "batch query head d_head, batch key head d_head -> batch head query key")


def causal_mask(scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Set the score of every future key to -inf.

    The last query stands at the last key's position, so with more keys than queries (a key-value cache) the earlier
    keys are all in the past. A query may look at its own position. The input is left unchanged.
    """
    n_query, n_key = scores.shape[-2:]
    future = torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).triu(diagonal=n_key - n_query + 1)
    return scores.masked_fill(future, -torch.inf)


def project_heads(
    resid: Float[Tensor, "batch pos d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"] | None = None,
) -> Float[Tensor, "batch pos head d_head"]:
    """Give every head its own linear view of the residual stream; newer models have no bias `b`."""
    rows = resid.flatten(end_dim=1)  # [batch*pos d_model]
    heads = rows @ W  # one matrix product per head; an einsum would copy W into another order each time
    heads = heads if b is None else heads + b[:, None]
    return heads.transpose(0, 1).unflatten(0, resid.shape[:2])


class Attention(nn.Module):
    """Multi-head causal self-attention: every position gathers what its heads find at earlier positions and its own.

    Each head has its own `W_Q`, `W_K`, `W_V` and biases. Queries score keys (`attention_scores`), the future is masked
    (`causal_mask`), a softmax over the keys makes the pattern, the pattern averages the values into `z`, and the heads'
    `W_O` carry `z` back to the residual stream, where they are summed and `b_O` is added once.

    Hook points: `hook_q`, `hook_k`, `hook_v`, `hook_attn_scores` (masked), `hook_pattern`, `hook_z`, and
    `hook_result`, each head's own [batch query head d_model] output before `b_O`. The last is large: compute it only
    when `hook_result.is_watched`. While neither scores nor pattern is watched, `fused_attention` may replace the steps
    in between: it never builds the pattern.

    Source: Vaswani et al. 2017, section 3.2; per-head weights as in Elhage et al. 2021.
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        n_heads, d_model, d_head = cfg.n_heads, cfg.d_model, cfg.d_head
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.randn(n_heads, d_model, d_head)) for _ in "QKV")
        self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.zeros(n_heads, d_head)) for _ in "QKV")
        self.W_O = nn.Parameter(torch.randn(n_heads, d_head, d_model))
        self.b_O = nn.Parameter(torch.zeros(d_model))
        self.layer = 0  # which layer of a key-value cache is ours; Transformer numbers its blocks
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = (HookPoint() for _ in "qkvz")
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_result = HookPoint(on_request=True)

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], cache: "KVCache | None" = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what this layer adds to the residual stream (not resid plus it).

        With a key-value cache, `k, v = cache.append(self.layer, k, v)` gives the keys and values of all positions so
        far, and `resid` holds the new positions only.
        """
        q = self.hook_q(project_heads(resid, self.W_Q, self.b_Q))
        k = self.hook_k(project_heads(resid, self.W_K, self.b_K))
        v = self.hook_v(project_heads(resid, self.W_V, self.b_V))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.hook_attn_scores.is_watched or self.hook_pattern.is_watched:
            scores = self.hook_attn_scores(causal_mask(attention_scores(q, k)))
            pattern = self.hook_pattern(scores.softmax(dim=-1))
            z = einops.einsum(pattern, v, "batch head query key, batch key head d_head -> batch query head d_head")
        else:
            z = fused_attention(q, k, v)
        z = self.hook_z(z)
        if self.hook_result.is_watched:
            result = einops.einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
            return self.hook_result(result).sum(dim=2) + self.b_O
        # the heads side by side, their matrices one below the other: their sum in one product
        return z.flatten(2) @ self.W_O.flatten(0, 1) + self.b_O


def fused_attention(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv d_head"],
    v: Float[Tensor, "batch key kv d_head"],
) -> Float[Tensor, "batch query head d_head"]:
    """Compute z in one kernel that never stores the scores; the numbers are those of the explicit steps.

    There may be fewer heads of keys and values than of queries: then neighbours share one, without a copy.
    """
    n_query, n_key = q.shape[1], k.shape[1]
    square, past = n_query == n_key, None
    if not square and n_query > 1:  # the kernel's own mask aligns the first query with the first key; ours the last
        past = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).tril(n_key - n_query)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [batch head pos d_head]
    shared = q.shape[1] != k.shape[1]
    z = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=past, is_causal=square, enable_gqa=shared)
    return z.transpose(1, 2)


def gelu_new(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Let large values pass and stop very negative ones, smoothly: GPT-2's formula for the GELU.

    0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), element by element.
    Source: Hendrycks and Gimpel 2016, section 2.
    """
    # the formula in one kernel; written out, each of its steps would bring all neurons to memory and back
    return nn.functional.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Two linear maps with a non-linearity between them, applied to every position on its own.

    `W_in` and `b_in` go up to d_mlp, `self.act` is the non-linearity, `W_out` and `b_out` come back. `hook_pre` sees
    the neurons before `self.act`, `hook_post` after it.
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.W_in = nn.Parameter(torch.randn(cfg.d_model, cfg.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(cfg.d_mlp))
        self.W_out = nn.Parameter(torch.randn(cfg.d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model))
        self.act = {"gelu_new": gelu_new, "gelu": nn.functional.gelu, "relu": torch.relu}[cfg.act]
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what this layer adds to the residual stream (not resid plus it)."""
        pre = self.hook_pre(nn.functional.linear(resid, self.W_in.T, self.b_in))
        post = self.hook_post(self.act(pre))
        return nn.functional.linear(post, self.W_out.T, self.b_out)


class TransformerBlock(nn.Module):
    """Read from the residual stream, add to it, twice: first attention, then the MLP.

    Each part reads a normalised copy (`ln1`, `ln2`) and its output is added to the stream itself. Hook points, in
    order: `hook_resid_pre`, `hook_attn_out`, `hook_resid_mid` (after attention was added), `hook_mlp_out`,
    `hook_resid_post`. With `cfg.attn_only` there are no `ln2`, `mlp`, `hook_resid_mid` and `hook_mlp_out`: attention's
    sum is the block's output.
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.cfg = cfg
        self.ln1, self.attn = make_norm(cfg), make_attention(cfg)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        if not cfg.attn_only:
            self.ln2, self.mlp = make_norm(cfg), make_mlp(cfg)
            self.hook_resid_mid, self.hook_mlp_out = HookPoint(), HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], cache: "KVCache | None" = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this block; `cache` is handed on to attention."""
        resid_pre = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.attn(self.ln1(resid_pre), cache))
        if self.cfg.attn_only:
            return self.hook_resid_post(resid_pre + attn_out)
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(resid_mid)))
        return self.hook_resid_post(resid_mid + mlp_out)


# GPT-2 needs the first of each kind; the others belong to newer models, and come at the end of the chapter.
def make_norm(cfg: TransformerConfig) -> nn.Module:
    """The normalisation that `cfg` asks for; some toy models do without."""
    if cfg.normalization == "LN":
        return LayerNorm(cfg)
    return RMSNorm(cfg) if cfg.normalization == "RMS" else nn.Identity()


def make_attention(cfg: TransformerConfig) -> nn.Module:
    """GPT-2's attention, Pythia's or Llama's."""
    if cfg.positions == "learned":
        return Attention(cfg)
    return RotaryAttention(cfg) if cfg.n_kv_heads is None else GroupedQueryAttention(cfg)


def make_mlp(cfg: TransformerConfig) -> nn.Module:
    """With a gate or without."""
    return GatedMLP(cfg) if cfg.gated else MLP(cfg)


def make_unembed(cfg: TransformerConfig, embed: nn.Module) -> nn.Module:
    """With a bias, without one, or without any parameters of its own."""
    if cfg.n_kv_heads is None:
        return Unembed(cfg)
    return TiedUnembed(embed) if cfg.tied else UnbiasedUnembed(cfg)


class Unembed(nn.Module):
    """Turn residual vectors into logits, one per token of the vocabulary: a linear map with a bias."""

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.W_U = nn.Parameter(torch.randn(cfg.d_model, cfg.d_vocab))
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of the next token at every position."""
        # resid @ W_U + b_U in one step: logits are large, and the sum would build them a second time
        return nn.functional.linear(resid, self.W_U.T, self.b_U)


class Transformer(nn.Module):
    """The whole model: embeddings, blocks on a residual stream, a last normalisation, the unembedding.

    The residual stream starts as token embedding (`hook_embed`) plus position embedding (`hook_pos_embed`).
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.cfg = cfg
        self.embed, self.hook_embed = Embed(cfg), HookPoint()
        rotary = cfg.positions == "rotary"  # this and `parallel`: not in GPT-2, but at the end of the chapter
        self.pos_embed = NoPosEmbed(cfg) if rotary else PosEmbed(cfg)
        self.hook_pos_embed = nn.Identity() if rotary else HookPoint()
        Block = ParallelBlock if cfg.parallel else TransformerBlock
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        for layer, block in enumerate(self.blocks):
            block.attn.layer = layer
        self.ln_final = make_norm(cfg)
        self.unembed = make_unembed(cfg, self.embed)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], cache: "KVCache | None" = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of the next token at every position.

        With a key-value cache `tokens` are the new ones only, and the first of them stands at position `cache.length`.
        """
        offset = 0 if cache is None else cache.length
        resid = self.hook_embed(self.embed(tokens)) + self.hook_pos_embed(self.pos_embed(tokens, offset))
        for block in self.blocks:
            resid = block(resid, cache)
        return self.unembed(self.ln_final(resid))


def init_weights(model: nn.Module, std: float, generator: torch.Generator) -> None:
    """Give a fresh model the small random weights from which GPT-2 starts, in place.

    Every weight matrix (its name begins with `W_`) is drawn from a normal distribution with mean 0 and deviation `std`,
    except those that write into the residual stream (`W_O` and `W_out`): 2 n_layers of them add up, so their deviation
    is std / sqrt(2 n_layers). Biases are 0; LayerNorm starts as plain normalisation: `w` 1, `b` 0.
    All draws come from `generator`, so that the same seed gives the same model.
    Source: Radford et al. 2019, section 2.3.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            symbol = name.split(".")[-1]
            if symbol in ("W_O", "W_out"):
                parameter.normal_(0.0, std / math.sqrt(2 * model.cfg.n_layers), generator=generator)
            elif symbol.startswith("W_"):
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(1.0 if symbol == "w" else 0.0)


def convert_gpt2_weights(state_dict: dict[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
    """Rename and reshape the weights of Hugging Face's GPT2LMHeadModel so that our Transformer can load them.

    Theirs are stored [in, out] (their `Conv1D`), so that `resid @ W` is right as it is; only `lm_head.weight` is
    [out, in]. `c_attn` holds queries, keys and values side by side, and within each the heads side by side: head 0's
    d_head columns first. `attn.c_proj` takes the heads stacked in the same order. GPT-2 has no unembedding bias: ours
    is zeros in the dtype of the other weights (`new_zeros`). Masks stored among the weights (`attn.bias`,
    `attn.masked_bias`) are left behind.
    """
    gpt2 = {name.removeprefix("transformer."): weight for name, weight in state_dict.items()}
    ours = {
        "embed.W_E": gpt2["wte.weight"],
        "pos_embed.W_pos": gpt2["wpe.weight"],
        "ln_final.w": gpt2["ln_f.weight"],
        "ln_final.b": gpt2["ln_f.bias"],
        "unembed.W_U": gpt2["lm_head.weight"].T,
        "unembed.b_U": gpt2["lm_head.weight"].new_zeros(cfg.d_vocab),
    }
    for layer in range(cfg.n_layers):
        theirs, block = f"h.{layer}", f"blocks.{layer}"
        for norm, name in (("ln_1", "ln1"), ("ln_2", "ln2")):
            ours[f"{block}.{name}.w"] = gpt2[f"{theirs}.{norm}.weight"]
            ours[f"{block}.{name}.b"] = gpt2[f"{theirs}.{norm}.bias"]
        weights = gpt2[f"{theirs}.attn.c_attn.weight"].chunk(3, dim=1)
        biases = gpt2[f"{theirs}.attn.c_attn.bias"].chunk(3)
        for letter, weight, bias in zip("QKV", weights, biases, strict=True):
            ours[f"{block}.attn.W_{letter}"] = einops.rearrange(
                weight, "d_model (head d_head) -> head d_model d_head", head=cfg.n_heads
            )
            ours[f"{block}.attn.b_{letter}"] = einops.rearrange(bias, "(head d_head) -> head d_head", head=cfg.n_heads)
        ours[f"{block}.attn.W_O"] = einops.rearrange(
            gpt2[f"{theirs}.attn.c_proj.weight"], "(head d_head) d_model -> head d_head d_model", head=cfg.n_heads
        )
        ours[f"{block}.attn.b_O"] = gpt2[f"{theirs}.attn.c_proj.bias"]
        for part, name in (("c_fc", "in"), ("c_proj", "out")):
            ours[f"{block}.mlp.W_{name}"] = gpt2[f"{theirs}.mlp.{part}.weight"]
            ours[f"{block}.mlp.b_{name}"] = gpt2[f"{theirs}.mlp.{part}.bias"]
    return ours


# --- Drawing text -------------------------------------------------------------------------------------------------


def greedy(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
    """Pick the most likely token of each row."""
    return logits.argmax(dim=-1)


def apply_temperature(logits: Float[Tensor, "batch d_vocab"], temperature: float) -> Float[Tensor, "batch d_vocab"]:
    """Divide the logits by `temperature`: below 1 the likely tokens gain, above 1 the distribution flattens.

    Raises ValueError unless the temperature is positive (the limit 0 is `greedy`).
    """
    if temperature <= 0:
        raise ValueError(f"apply_temperature: temperature must be positive, got {temperature}; for 0 use greedy.")
    return logits / temperature


def apply_frequency_penalty(
    logits: Float[Tensor, "batch d_vocab"], tokens: Int[Tensor, "batch pos"], penalty: float
) -> Float[Tensor, "batch d_vocab"]:
    """Make repetition more expensive: subtract `penalty` from a token's logit for every time it is in its row already.

    `tokens` are the sequences so far, one row per row of `logits`. The input is left unchanged.
    """
    counts = torch.zeros_like(logits).scatter_add(dim=-1, index=tokens, src=torch.ones_like(tokens, dtype=logits.dtype))
    return logits - penalty * counts


def keep_top_k(logits: Float[Tensor, "batch d_vocab"], k: int) -> Float[Tensor, "batch d_vocab"]:
    """Keep the `k` largest logits of each row and set the others to -inf.

    A `k` larger than the vocabulary keeps everything; raises ValueError for a `k` below 1. If several logits equal the
    `k`-th largest, either exactly `k` stay, whichever of the equals, or all of the equals. The input is left unchanged.
    Source: Fan et al. 2018, section 5.4.
    """
    if k < 1:
        raise ValueError(f"keep_top_k: k must be at least 1, got {k}.")
    top = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(dim=-1, index=top.indices, src=top.values)


def keep_top_p(
    logits: Float[Tensor, "batch d_vocab"], p: float, min_tokens_to_keep: int = 1
) -> Float[Tensor, "batch d_vocab"]:
    """Keep each row's smallest set of likeliest tokens whose probabilities sum to at least `p`; the rest become -inf.

    The token with which the sum reaches or crosses `p` is the last one kept. At least `min_tokens_to_keep` tokens stay,
    however small `p` is.
    With `p` = 1 every token stays, even where rounding makes the sum reach 1 before the last of them.
    Raises ValueError for a `p` outside (0, 1]. The input is left unchanged.
    Source: Holtzman et al. 2020, section 3.1 (nucleus sampling).
    """
    if not 0 < p <= 1:
        raise ValueError(f"keep_top_p: p must be above 0 and at most 1, got {p}.")
    ranked, order = logits.sort(dim=-1, descending=True)
    probabilities = ranked.softmax(dim=-1)
    sum_before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (sum_before >= p) & (p < 1)
    dropped[:, :min_tokens_to_keep] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(dim=-1, index=order, src=dropped), -torch.inf)


def sample(logits: Float[Tensor, "batch d_vocab"], generator: torch.Generator) -> Int[Tensor, " batch"]:
    """Draw one token per row, with the softmax of the row's logits as probabilities.

    Every random number comes from `generator`. A logit of -inf is never drawn.
    """
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    n_new: int,
    pick: Callable[[Tensor], Tensor],
    eos: int | None = None,
    cache: "KVCache | None" = None,
) -> Int[Tensor, "batch longer"]:
    """Continue every row of `tokens` by up to `n_new` tokens and return prompt and continuation together.

    In each step `pick` gets the logits [batch d_vocab] at the last position and returns one token per row. A row that
    has produced `eos` is finished: whatever `pick` says, it goes on with `eos`, and when all rows are finished
    generation stops. It also stops when the sequence is `model.cfg.n_ctx` long. An `eos` in the prompt finishes
    nothing. No gradients are recorded.

    With a key-value cache, call `model(unread, cache)`, where `unread` are the tokens that the cache does not hold yet:
    those from position `cache.length` on. The result is the same, only faster. Raises ValueError for a cache that holds
    as many positions as `tokens` has, or more: it has been used for another text.
    """
    if cache is not None and cache.length >= tokens.shape[1]:
        raise ValueError(f"generate: the cache already holds {cache.length} positions; a new text needs a new one.")
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(min(n_new, model.cfg.n_ctx - tokens.shape[1])):
        unread = tokens if cache is None else tokens[:, cache.length :]
        new = pick(model(unread, cache)[:, -1])
        if eos is not None:
            new = new.masked_fill(finished, eos)
            finished = finished | (new == eos)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        if finished.all():
            break
    return tokens


# ------------------------------------------------------------------------------ the key-value cache, and beam search


class KVCache:
    """The keys and values of the positions that a model has already read, kept so as not to compute them again.

    `cfg` says how many layers there are, each with keys and values of its own, and how long a sequence may grow
    (`n_ctx`); `batch` is the number of rows. Heads, dtype and device are those of what is appended.
    """

    def __init__(self, cfg: TransformerConfig, batch: int) -> None:
        """Begin with nothing stored."""
        self.batch, self.n_ctx = batch, cfg.n_ctx
        self.lengths = [0] * cfg.n_layers
        self.stored: dict[int, list[Tensor]] = {}  # of each layer keys and values, [batch n_ctx head d_head]: with room

    @property
    def length(self) -> int:
        """How many positions all layers have stored.

        While a model reads new ones, its first layers are ahead of the others; until the last has its share, `length`
        is the old number.
        """
        return min(self.lengths)

    def append(
        self, layer: int, k: Float[Tensor, "batch new head d_head"], v: Float[Tensor, "batch new head d_head"]
    ) -> tuple[Float[Tensor, "batch key head d_head"], Float[Tensor, "batch key head d_head"]]:
        """Store the new keys and values of a layer; return all of that layer's, the old before the new.

        Raises ValueError, and stores nothing, if the sequence would grow beyond n_ctx, or if the number of rows is not
        `batch`.
        """
        start, end = self.lengths[layer], self.lengths[layer] + k.shape[1]
        if end > self.n_ctx:
            raise ValueError(f"KVCache: {end} positions do not fit into n_ctx = {self.n_ctx}; start a new cache.")
        if len(k) != self.batch:
            raise ValueError(f"KVCache: the number of rows must be that of the cache, {self.batch}.")
        if layer not in self.stored:
            self.stored[layer] = [new.new_empty(self.batch, self.n_ctx, *new.shape[2:]) for new in (k, v)]
        keys, values = self.stored[layer]
        keys[:, start:end], values[:, start:end] = k, v
        self.lengths[layer] = end
        return keys[:, :end], values[:, :end]

    def select(self, rows: Int[Tensor, " beam"]) -> None:
        """Go on with these rows of the batch, in this order: some may appear several times, others not at all.

        From then on `len(rows)` is the number of rows, even where nothing is stored yet.
        """
        self.batch = len(rows)
        for layer, both in self.stored.items():
            end = self.lengths[layer]
            self.stored[layer] = [old.new_empty(self.batch, self.n_ctx, *old.shape[2:]) for old in both]
            for new, old in zip(self.stored[layer], both, strict=True):
                new[:, :end] = old[rows, :end]


def ban_repeated_ngrams(
    logits: Float[Tensor, "batch d_vocab"], tokens: Int[Tensor, "batch pos"], n: int
) -> Float[Tensor, "batch d_vocab"]:
    """Set to -inf every token that would complete a run of `n` tokens which its row already holds.

    `tokens` are the sequences so far, one row per row of `logits`, and only a row's own runs count. A row shorter than
    `n` has no such run; with `n` = 1 no token may come twice. Raises ValueError for an `n` below 1. The input is left
    unchanged.
    """
    if n < 1:
        raise ValueError(f"ban_repeated_ngrams: n must be at least 1, got {n}.")
    banned = torch.zeros_like(logits, dtype=torch.bool)
    for index, row in enumerate(tokens.tolist()):
        begun = row[len(row) - n + 1 :]  # the last n - 1 tokens
        for start in range(len(row) - n + 1):
            if row[start : start + n - 1] == begun:
                banned[index, row[start + n - 1]] = True
    return logits.masked_fill(banned, -torch.inf)


@torch.no_grad()
def beam_search(
    model: nn.Module,
    tokens: Int[Tensor, "one pos"],
    n_beams: int,
    n_new: int,
    no_repeat_ngram: int | None = None,
    eos: int | None = None,
    cache: "KVCache | None" = None,
) -> list[tuple[float, Int[Tensor, " longer"]]]:
    """Look for the likeliest continuations of one prompt, keeping the `n_beams` best so far; return them, best first.

    A beam is a sequence with its log probability: the sum of the model's log p over the tokens that follow the prompt.
    In each step every beam is extended by every token, and of all these candidates together the `n_beams` likeliest
    stay. A beam that has produced `eos` is finished: it remains a candidate as it is, beside the extensions of the
    others. The search ends after `n_new` tokens, at `model.cfg.n_ctx`, or when all beams are finished. An `eos` in the
    prompt finishes nothing.

    With `no_repeat_ngram`, a beam may not produce a token that completes an n-gram of that length which this same beam
    (prompt included) already holds; the log p of the other tokens stay as the model gave them. A beam for which every
    token is banned is dropped, unless that would leave no beam: then the search ends and returns the beams so far.

    Returns a list of pairs of log probability (a float) and tokens [pos] (prompt included, nothing after `eos`); log
    probabilities are not divided by the length. Fewer than `n_beams` come back where there are fewer candidates. With a
    key-value cache for one row, the model reads only what is new: `cache.select` makes its rows follow the beams. No
    gradients are recorded. Raises ValueError for `n_beams` below 1, for more than one row of `tokens`, and for a cache
    that holds as many positions as `tokens` has, or more.
    """
    if n_beams < 1:
        raise ValueError(f"beam_search: n_beams must be at least 1, got {n_beams}.")
    if len(tokens) != 1:
        raise ValueError("beam_search: it continues one prompt; call it for each row of tokens on its own.")
    if cache is not None and cache.length >= tokens.shape[1]:
        raise ValueError(f"beam_search: the cache already holds {cache.length} positions; a new text needs a new one.")
    beams, totals = tokens, torch.zeros(1, device=tokens.device)
    finished = torch.zeros(1, dtype=torch.bool, device=tokens.device)
    for _ in range(min(n_new, model.cfg.n_ctx - tokens.shape[1])):
        unread = beams if cache is None else beams[:, cache.length :]
        logprobs = model(unread, cache)[:, -1].log_softmax(dim=-1)
        if no_repeat_ngram is not None:
            logprobs = ban_repeated_ngrams(logprobs, beams, no_repeat_ngram)
        if eos is not None:  # a finished beam goes on with eos at no cost, and so stays what it is
            logprobs[finished] = -torch.inf
            logprobs[finished, eos] = 0.0
        candidates = (totals[:, None] + logprobs).flatten()
        best = candidates.topk(min(n_beams, len(candidates)))
        possible = best.values > -torch.inf
        if not possible.any():
            break
        totals, places = best.values[possible], best.indices[possible]
        rows, new = places // logprobs.shape[1], places % logprobs.shape[1]
        beams = torch.cat([beams[rows], new[:, None]], dim=1)
        if cache is not None:
            cache.select(rows)
        if eos is not None:
            finished = finished[rows] | (new == eos)
            if finished.all():
                break
    found = []
    for total, beam in zip(totals.tolist(), beams, strict=True):
        new = beam[tokens.shape[1] :].tolist()
        n_new = new.index(eos) + 1 if eos in new else len(new)
        found.append((total, beam[: tokens.shape[1] + n_new]))
    return found


# --- From GPT-2 to Pythia, and towards Llama ----------------------------------------------------------------------


def apply_rotary(
    x: Float[Tensor, "batch pos head d_head"], positions: Int[Tensor, " pos"], rotary_dim: int, base: float
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn pairs of coordinates of every vector, by angles that grow with the vector's position.

    Coordinates i and i + rotary_dim / 2 are a pair, for i = 0 ... rotary_dim / 2 - 1 (GPT-NeoX's layout). At position p
    the pair (a, b) is turned by the angle p / base^(2 i / rotary_dim), which makes it
    (a cos - b sin, a sin + b cos). The coordinates from rotary_dim on stay as they are, whatever the position.
    `positions[n]` is the position of `x[:, n]`. The result has the dtype of `x`, and a float64 `x` keeps its digits;
    angles are computed in float32 at least: bfloat16 has no number 701. The input is left unchanged.
    Source: Su et al. 2021, section 3.2; only some of the coordinates: Black et al. 2022, section 2.1.
    """
    half = rotary_dim // 2
    exponents = torch.arange(0, rotary_dim, 2, device=x.device) / rotary_dim
    angles = positions[:, None, None] / base**exponents  # [pos 1 pair]: the same for every head
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - rotary_dim], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


class RotaryAttention(Attention):
    """Attention that is told distances, not places: queries and keys are turned by their positions.

    Parameters and steps are those of `Attention`, with one more step: after `hook_q`, `hook_k` and `hook_v`,
    `apply_rotary` turns queries and keys, not values, and `hook_rot_q` and `hook_rot_k` see what it returns. Scores
    come from the turned vectors, and a key-value cache is given turned keys. The positions are 0, 1, 2, ...; with a
    cache they begin at `cache.length`, read *before* `append` makes it longer.
    Source: Su et al. 2021, section 3.2.2.
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__(cfg)
        self.rotary_dim, self.rotary_base = cfg.rotary_dim, cfg.rotary_base
        self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], cache: "KVCache | None" = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what this layer adds to the residual stream (not resid plus it)."""
        q = self.hook_q(project_heads(resid, self.W_Q, self.b_Q))
        k = self.hook_k(project_heads(resid, self.W_K, self.b_K))
        v = self.hook_v(project_heads(resid, self.W_V, self.b_V))
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + resid.shape[1], device=resid.device)
        q = self.hook_rot_q(apply_rotary(q, positions, self.rotary_dim, self.rotary_base))
        k = self.hook_rot_k(apply_rotary(k, positions, self.rotary_dim, self.rotary_base))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.hook_attn_scores.is_watched or self.hook_pattern.is_watched:
            scores = self.hook_attn_scores(causal_mask(attention_scores(q, k)))
            pattern = self.hook_pattern(scores.softmax(dim=-1))
            z = einops.einsum(pattern, v, "batch head query key, batch key head d_head -> batch query head d_head")
        else:
            z = fused_attention(q, k, v)
        z = self.hook_z(z)
        if self.hook_result.is_watched:
            result = einops.einsum(z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
            return self.hook_result(result).sum(dim=2) + self.b_O
        return z.flatten(2) @ self.W_O.flatten(0, 1) + self.b_O


class ParallelBlock(TransformerBlock):
    """Attention and MLP side by side: both read the stream as it comes in, and both outputs are added to it.

    Each reads its own normalised copy of it (`ln1` for attention, `ln2` for the MLP). Hook points:
    `hook_resid_pre`, `hook_attn_out`, `hook_mlp_out`, `hook_resid_post`. There is no `hook_resid_mid`.
    Source: Wang and Komatsuzaki 2021 (GPT-J); Black et al. 2022, section 2.1.
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__(cfg)
        del self.hook_resid_mid  # there is nothing in between

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], cache: "KVCache | None" = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this block; `cache` is handed on to attention."""
        resid_pre = self.hook_resid_pre(resid)
        attn_out = self.hook_attn_out(self.attn(self.ln1(resid_pre), cache))
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(resid_pre)))
        return self.hook_resid_post(resid_pre + attn_out + mlp_out)


class NoPosEmbed(nn.Module):
    """Stands where GPT-2 has its table of positions, and adds nothing: for models whose attention turns its vectors."""

    nothing: Tensor

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(cfg.d_model), persistent=False)

    def forward(self, tokens: Int[Tensor, "batch pos"], offset: int = 0) -> Float[Tensor, "batch pos d_model"]:
        """Return zeros, whatever the positions are."""
        return self.nothing.expand(*tokens.shape, -1)


def convert_neox_weights(state_dict: dict[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
    """Rename and reshape the weights of Hugging Face's GPTNeoXForCausalLM so that our Transformer can load them.

    All their matrices are stored [out, in] (`nn.Linear`), ours are [in, out]. The rows of `query_key_value` go head by
    head: first the d_head rows of head 0's queries, then those of its keys, then of its values, then head 1. Its bias
    is arranged in the same way. The columns of `attention.dense` are the heads, one after the other. The unembedding is
    named `lm_head.weight`, or `embed_out.weight` in older versions of transformers: take the one that is there. It has
    no bias: ours is zeros in the dtype of the other weights (`new_zeros`). Rotary positions have no weights, so there
    is no `pos_embed`; masks and tables stored among the weights (`attention.bias`, `attention.masked_bias`,
    `attention.rotary_emb.inv_freq`) are left behind.
    """
    neox = {name.removeprefix("gpt_neox."): weight for name, weight in state_dict.items()}
    unembed = neox["lm_head.weight"] if "lm_head.weight" in neox else neox["embed_out.weight"]
    ours = {
        "embed.W_E": neox["embed_in.weight"],
        "ln_final.w": neox["final_layer_norm.weight"],
        "ln_final.b": neox["final_layer_norm.bias"],
        "unembed.W_U": unembed.T,
        "unembed.b_U": unembed.new_zeros(cfg.d_vocab),
    }
    for layer in range(cfg.n_layers):
        theirs, block = f"layers.{layer}", f"blocks.{layer}"
        for norm, name in (("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2")):
            ours[f"{block}.{name}.w"] = neox[f"{theirs}.{norm}.weight"]
            ours[f"{block}.{name}.b"] = neox[f"{theirs}.{norm}.bias"]
        weights = einops.rearrange(
            neox[f"{theirs}.attention.query_key_value.weight"],
            "(head qkv d_head) d_model -> qkv head d_model d_head",
            head=cfg.n_heads,
            qkv=3,
        )
        biases = einops.rearrange(
            neox[f"{theirs}.attention.query_key_value.bias"],
            "(head qkv d_head) -> qkv head d_head",
            head=cfg.n_heads,
            qkv=3,
        )
        for letter, weight, bias in zip("QKV", weights, biases, strict=True):
            ours[f"{block}.attn.W_{letter}"], ours[f"{block}.attn.b_{letter}"] = weight, bias
        ours[f"{block}.attn.W_O"] = einops.rearrange(
            neox[f"{theirs}.attention.dense.weight"], "d_model (head d_head) -> head d_head d_model", head=cfg.n_heads
        )
        ours[f"{block}.attn.b_O"] = neox[f"{theirs}.attention.dense.bias"]
        for part, name in (("dense_h_to_4h", "in"), ("dense_4h_to_h", "out")):
            ours[f"{block}.mlp.W_{name}"] = neox[f"{theirs}.mlp.{part}.weight"].T
            ours[f"{block}.mlp.b_{name}"] = neox[f"{theirs}.mlp.{part}.bias"]
    return ours


class RMSNorm(nn.Module):
    """Bring every residual vector to a root mean square of 1, then scale by `w`. The mean is not subtracted.

    The mean of the squares is taken over d_model, separately for each position, and `cfg.layer_norm_eps` is added to it
    inside the root. `hook_scale` sees that root, which keeps its last axis (size 1); `hook_normalized` sees the vector
    before `w`. There is no `b`. As in `LayerNorm`, half precision is computed in float32, and returned in half.
    Source: Zhang and Sennrich 2019, section 4.
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.eps = cfg.layer_norm_eps
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the normalised vectors; the residual stream itself stays as it is."""
        if not (self.hook_scale.is_watched or self.hook_normalized.is_watched):
            return nn.functional.rms_norm(resid, self.w.shape, self.w, self.eps)  # the same steps in one
        wide = resid.to(torch.promote_types(resid.dtype, torch.float32))
        scale = self.hook_scale((wide.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt().to(resid.dtype))
        return self.hook_normalized((wide / scale).to(resid.dtype)) * self.w


class GatedMLP(nn.Module):
    """An MLP whose neurons are products: what `W_in` proposes, times how far `W_gate` opens the gate. No biases.

    The gate goes through the SiLU, x sigmoid(x); what `W_in` gives goes through nothing. `W_out` takes the products
    back to d_model. `hook_pre` sees the gate before the SiLU, `hook_pre_linear` what `W_in` gives, `hook_post` the
    products.
    Source: Shazeer 2020, section 2 (there named SwiGLU); Touvron et al. 2023, section 2.2 (Llama).
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        self.W_gate = nn.Parameter(torch.randn(cfg.d_model, cfg.d_mlp))
        self.W_in = nn.Parameter(torch.randn(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.randn(cfg.d_mlp, cfg.d_model))
        self.hook_pre, self.hook_pre_linear, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what this layer adds to the residual stream (not resid plus it)."""
        gate = self.hook_pre(resid @ self.W_gate)
        proposed = self.hook_pre_linear(resid @ self.W_in)
        return self.hook_post(nn.functional.silu(gate) * proposed) @ self.W_out


def attend(
    attn: nn.Module,
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv d_head"],
    v: Float[Tensor, "batch key kv d_head"],
) -> Float[Tensor, "batch query d_model"]:
    """The second half of attention, from queries, keys and values to what is added to the stream; without `b_O`.

    It calls `hook_attn_scores`, `hook_pattern`, `hook_z` and `hook_result` of `attn`, and uses its `W_O`.
    There are as many heads of keys and values as of queries; while neither scores nor pattern is watched, there may be
    fewer, which `fused_attention` shares out.
    """
    if attn.hook_attn_scores.is_watched or attn.hook_pattern.is_watched:
        scores = attn.hook_attn_scores(causal_mask(attention_scores(q, k)))
        pattern = attn.hook_pattern(scores.softmax(dim=-1))
        z = einops.einsum(pattern, v, "batch head query key, batch key head d_head -> batch query head d_head")
    else:
        z = fused_attention(q, k, v)
    z = attn.hook_z(z)
    if attn.hook_result.is_watched:
        result = einops.einsum(z, attn.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
        return attn.hook_result(result).sum(dim=2)
    return z.flatten(2) @ attn.W_O.flatten(0, 1)  # the heads side by side: their sum in one product


class GroupedQueryAttention(nn.Module):
    """Rotary attention in which several heads of queries share one head of keys and values. No biases.

    `W_K` and `W_V` are [n_kv_heads d_model d_head]. With g = n_heads / n_kv_heads, the query heads 0 ... g - 1 use the
    first head of keys and values, the next g the second, and so on. Keys and values stay few as long as they can:
    `hook_k`, `hook_v`, `hook_rot_k` and the key-value cache have n_kv_heads of them, and each is repeated for its
    queries only after that. Queries and keys are turned as in `RotaryAttention`; the hook points are the same.
    Source: Ainslie et al. 2023, section 2.2.
    """

    def __init__(self, cfg: TransformerConfig) -> None:  # given
        super().__init__()
        n_heads, n_kv_heads, d_model, d_head = cfg.n_heads, cfg.n_kv_heads, cfg.d_model, cfg.d_head
        self.W_Q = nn.Parameter(torch.randn(n_heads, d_model, d_head))
        self.W_K, self.W_V = (nn.Parameter(torch.randn(n_kv_heads, d_model, d_head)) for _ in "KV")
        self.W_O = nn.Parameter(torch.randn(n_heads, d_head, d_model))
        self.rotary_dim, self.rotary_base = cfg.rotary_dim, cfg.rotary_base
        self.layer = 0  # which layer of a key-value cache is ours; Transformer numbers its blocks
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = (HookPoint() for _ in "qkvz")
        self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_result = HookPoint(on_request=True)

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], cache: "KVCache | None" = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what this layer adds to the residual stream (not resid plus it)."""
        q = self.hook_q(project_heads(resid, self.W_Q))
        k = self.hook_k(project_heads(resid, self.W_K))
        v = self.hook_v(project_heads(resid, self.W_V))
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + resid.shape[1], device=resid.device)
        # in one go, so that the angles are worked out once
        turned = apply_rotary(torch.cat([q, k], dim=2), positions, self.rotary_dim, self.rotary_base)
        n_heads = len(self.W_Q)
        q, k = self.hook_rot_q(turned[:, :, :n_heads]), self.hook_rot_k(turned[:, :, n_heads:])
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.hook_attn_scores.is_watched or self.hook_pattern.is_watched:
            # `fused_attention` needs no copies: each head of queries finds its keys by itself
            group = n_heads // len(self.W_K)
            k, v = (einops.repeat(x, "batch key kv d_head -> batch key (kv group) d_head", group=group) for x in (k, v))
        return attend(self, q, k, v)


class UnbiasedUnembed(nn.Module):
    """An unembedding without a bias: `W_U` alone."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.randn(cfg.d_model, cfg.d_vocab))

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of the next token at every position."""
        return resid @ self.W_U


class TiedUnembed(nn.Module):
    """An unembedding that is the embedding's transpose: what is changed there, changes here."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = (embed,)  # in a tuple, or its parameter would be registered a second time

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The transpose of `W_E`: a view, not a copy."""
        W_E: Tensor = self.embed[0].get_parameter("W_E")
        return W_E.T

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits of the next token at every position."""
        return resid @ self.W_U


def convert_llama_weights(state_dict: dict[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
    """Rename and reshape the weights of Hugging Face's LlamaForCausalLM so that our Transformer can load them.

    All their matrices are stored [out, in] (`nn.Linear`), ours are [in, out]. The rows of `q_proj` are the heads of
    queries, one after the other; those of `k_proj` and `v_proj` the cfg.n_kv_heads heads of keys and of values; the
    columns of `o_proj` are the heads of queries again. Of the MLP, `gate_proj` is our `W_gate`, `up_proj` our `W_in`,
    `down_proj` our `W_out`. There are no biases. `model.norm` is the last norm. With cfg.tied there is no `unembed.W_U`
    to load, whether or not `lm_head.weight` is among theirs. Tables of angles (`rotary_emb.inv_freq`) are left behind.
    """
    llama = {name.removeprefix("model."): weight for name, weight in state_dict.items()}
    ours = {"embed.W_E": llama["embed_tokens.weight"], "ln_final.w": llama["norm.weight"]}
    if not cfg.tied:
        ours["unembed.W_U"] = llama["lm_head.weight"].T
    for layer in range(cfg.n_layers):
        theirs, block = f"layers.{layer}", f"blocks.{layer}"
        ours[f"{block}.ln1.w"] = llama[f"{theirs}.input_layernorm.weight"]
        ours[f"{block}.ln2.w"] = llama[f"{theirs}.post_attention_layernorm.weight"]
        for letter in "QKV":
            ours[f"{block}.attn.W_{letter}"] = einops.rearrange(
                llama[f"{theirs}.self_attn.{letter.lower()}_proj.weight"],
                "(head d_head) d_model -> head d_model d_head",
                d_head=cfg.d_head,
            )
        ours[f"{block}.attn.W_O"] = einops.rearrange(
            llama[f"{theirs}.self_attn.o_proj.weight"], "d_model (head d_head) -> head d_head d_model", head=cfg.n_heads
        )
        for part, name in (("gate", "gate"), ("up", "in"), ("down", "out")):
            ours[f"{block}.mlp.W_{name}"] = llama[f"{theirs}.mlp.{part}_proj.weight"].T
    return ours
