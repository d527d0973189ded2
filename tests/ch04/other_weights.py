"""Ablation and the reading of weights in another style: loops, views, other factors; every check accepts it."""

import math

import torch

from course_utils.hooks import hooks, run_with_cache
from tests.ch02.other_transformer import apply_rotary


def ablate_heads(model, tokens, heads, kind, reference=None):
    if kind not in {"zero", "mean", "resample"}:
        raise ValueError(kind)
    if kind != "zero" and reference is None:
        raise ValueError("no reference")
    if (kind == "mean" and reference.size(1) != tokens.size(1)) or (
        kind == "resample" and reference.shape != tokens.shape
    ):
        raise ValueError("misfit")
    wanted = {}
    for layer, head in heads:
        wanted.setdefault(f"blocks.{layer}.attn.hook_z", []).append(head)
    instead = {}
    if kind != "zero":
        _, cache = run_with_cache(model, reference)
        for name in wanted:
            instead[name] = cache[name].sum(0) / len(reference) if kind == "mean" else cache[name]

    def exchange(name):
        def hook(z, _):
            chosen = torch.zeros(z.size(2), dtype=torch.bool, device=z.device)
            chosen[wanted[name]] = True
            other = instead.get(name, 0 * z).expand_as(z)
            return torch.where(chosen[None, None, :, None], other, z)

        return hook

    with hooks(model, [(name, exchange(name)) for name in wanted]):
        return model(tokens)


def ablation_scores(model, tokens, n_half, kind, reference=None):
    def cost(logits):
        about = logits[:, n_half + 1 : -1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(about, tokens[:, n_half + 2 :])

    with torch.no_grad():
        start = cost(model(tokens))
        return torch.stack(
            [
                torch.stack(
                    [
                        cost(ablate_heads(model, tokens, [(layer, head)], kind, reference)) - start
                        for head in range(model.cfg.n_heads)
                    ]
                )
                for layer in range(model.cfg.n_layers)
            ]
        )


class FactoredMatrix:
    """Products are put into the second factor where that is smaller; the decomposition goes through Gram matrices."""

    def __init__(self, A, B):
        if A.dim() == 1 or B.dim() == 1 or A.shape[-1] != B.shape[-2]:
            raise ValueError("no inner size in common")
        self.A, self.B = A, B

    @property
    def shape(self):
        return (*torch.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2]), self.A.shape[-2], self.B.shape[-1])

    @property
    def T(self):  # noqa: N802
        return type(self)(self.B.transpose(-2, -1), self.A.transpose(-2, -1))

    def __matmul__(self, other):
        if isinstance(other, FactoredMatrix):
            middle = self.B @ other.A
            if middle.shape[-1] < middle.shape[-2]:
                return FactoredMatrix(self.A @ middle, other.B)
            return FactoredMatrix(self.A, middle @ other.B)
        _, _ = other.shape[-2:]
        return FactoredMatrix(self.A, torch.matmul(self.B, other))

    def __rmatmul__(self, other):
        _, _ = other.shape[-2:]
        return FactoredMatrix(torch.matmul(other, self.A), self.B)

    def svd(self):
        left = torch.linalg.svd(self.A, full_matrices=False)
        right = torch.linalg.svd(self.B, full_matrices=False)
        middle = torch.diag_embed(left.S) @ left.Vh @ right.U @ torch.diag_embed(right.S)
        U, S, Vh = torch.linalg.svd(middle, full_matrices=False)
        return left.U @ U, S, Vh @ right.Vh

    def eigenvalues(self):
        if self.shape[-1] != self.shape[-2]:
            raise ValueError("not square")
        return torch.linalg.eig(torch.matmul(self.B, self.A)).eigenvalues

    def norm(self):
        return self.svd()[1].square().sum(-1).sqrt()


def bigram_logits(model):
    every_token = torch.arange(model.embed.W_E.shape[0])
    return torch.addmm(model.unembed.b_U, model.embed.W_E[every_token], model.unembed.W_U)


def ov_circuit(model, layer, head):
    attn = model.blocks[layer].attn
    embedded = torch.einsum("tm,md->td", model.embed.W_E, attn.W_V[head])
    return FactoredMatrix(embedded, torch.einsum("dm,mt->dt", attn.W_O[head], model.unembed.W_U))


def qk_circuit(model, layer, head):
    attn = model.blocks[layer].attn
    W_QK = FactoredMatrix(attn.W_Q[head], attn.W_K[head].T)
    return model.embed.W_E @ W_QK @ model.embed.W_E.T


def skip_trigrams(qk, ov, source, k):
    queries = torch.argsort(qk.A @ qk.B[:, source] - (qk.A @ qk.B.sum(1)) / qk.B.shape[1], descending=True)
    return queries[:k].tolist(), (ov.A[source] @ ov.B).argsort(descending=True)[:k].tolist()


def copying_score(ov):
    values = torch.linalg.eigvals(ov.B @ ov.A)
    return torch.real(values.sum()) / torch.sqrt(values.real**2 + values.imag**2).sum()


def top1_accuracy(ov, rows_at_once=1024):
    right = []
    for number, block in enumerate(ov.A.split(rows_at_once)):
        scores = block @ ov.B
        own = scores.diagonal(offset=number * rows_at_once)
        right.append(scores.max(dim=1).values == own)
    return torch.cat(right).double().mean().item()


def position_pattern(model, layer, head):
    found = {}
    if not hasattr(model.pos_embed, "W_pos"):
        raise ValueError("there are no vectors for positions")
    positions = model.pos_embed.W_pos[None]
    attn = model.blocks[layer].attn
    for letter in "QK":
        normed = model.blocks[layer].ln1(positions)
        found[letter] = normed @ getattr(attn, f"W_{letter}")[head] + getattr(attn, f"b_{letter}")[head]
    n = positions.shape[1]
    past = torch.ones(n, n, dtype=torch.bool, device=positions.device).tril()
    scores = found["Q"] @ found["K"].mT / math.sqrt(model.cfg.d_head)
    visible = torch.where(past, scores, -math.inf)
    weights = (visible - visible.amax(-1, keepdim=True)).exp()[0]
    return weights / weights.sum(dim=1, keepdim=True)


def decompose_qk(cache, model, layer, head):
    sources = {"embed": cache["hook_embed"]}
    if "hook_pos_embed" in cache:
        sources["pos_embed"] = cache["hook_pos_embed"]
    for earlier in range(layer):
        for number in range(model.cfg.n_heads):
            sources[f"head {earlier}.{number}"] = cache[f"blocks.{earlier}.attn.hook_result"][:, :, number]
        result = cache[f"blocks.{earlier}.attn.hook_result"].sum(2)
        sources[f"bias {earlier}"] = cache[f"blocks.{earlier}.hook_attn_out"] - result
        if not model.cfg.attn_only:
            sources[f"mlp {earlier}"] = cache[f"blocks.{earlier}.hook_mlp_out"]
    block = model.blocks[layer]
    attn = block.attn
    sides = []
    for W, b in ((attn.W_Q[head], attn.b_Q[head]), (attn.W_K[head], attn.b_K[head])):
        side = []
        for vector in sources.values():
            if model.cfg.normalization == "LN":
                vector = vector - vector.mean(-1, keepdim=True)
            if model.cfg.normalization in ("LN", "RMS"):
                vector = vector / cache[f"blocks.{layer}.ln1.hook_scale"] * block.ln1.w
            side.append(vector @ W)
        constant = b + (block.ln1.b @ W if model.cfg.normalization == "LN" else 0)
        side.append(torch.zeros_like(side[0]) + constant)
        if model.cfg.positions == "rotary":
            n_pos = side[0].shape[1]
            options = torch.arange(n_pos), model.cfg.rotary_dim, model.cfg.rotary_base
            side = [apply_rotary(vectors[:, :, None], *options).squeeze(2) for vectors in side]
        sides.append(torch.stack(side, dim=1))
    q, k = sides
    terms = q[:, :, None] @ k[:, None].transpose(-2, -1)
    return [*sources, "constant"], terms * model.cfg.d_head**-0.5


def frobenius(W):
    return W.norm() if isinstance(W, FactoredMatrix) else W.pow(2).sum(dim=(-2, -1)).sqrt()


def composition_score(W_A, W_B):
    return frobenius(W_A @ W_B) / frobenius(W_A) / frobenius(W_B)


def whole(model, kind):
    """[layer head d_model d_model], not factored."""
    W = {letter: torch.stack([getattr(block.attn, f"W_{letter}") for block in model.blocks]) for letter in "QKVO"}
    if kind == "V":
        return W["V"] @ W["O"]
    W_QK = W["Q"] @ W["K"].mT
    if kind not in ("Q", "K"):
        raise ValueError(kind)
    return W_QK if kind == "Q" else W_QK.mT


def composition_scores(model, kind):
    reads, writes = whole(model, kind), whole(model, "V")
    table = torch.zeros(reads.shape[:2] * 2, dtype=reads.dtype, device=reads.device)
    for layer in range(len(reads)):
        for later in range(layer + 1, len(reads)):
            products = torch.einsum("amx,bxn->abmn", writes[layer], reads[later])
            sizes = frobenius(writes[layer])[:, None] * frobenius(reads[later])
            table[layer, :, later] = frobenius(products) / sizes
    return table


def random_composition_baseline(model, kind, n, generator):
    """All rotations at once."""
    reads, writes = whole(model, kind), whole(model, "V")
    n_layers, n_heads, d_model = writes.shape[:3]
    if n_layers == 1:
        raise ValueError("one layer")
    layer = torch.randint(n_layers - 1, (n,), generator=generator)
    later = layer + 1 + (torch.rand(n, generator=generator) * (n_layers - 1 - layer)).long()
    head, other = torch.randint(n_heads, (2, n), generator=generator)
    Q, R = torch.linalg.qr(torch.randn(n, d_model, d_model, generator=generator))
    rotations = Q * torch.sign(torch.diagonal(R, dim1=1, dim2=2))[:, None]
    return composition_score(writes[layer, head] @ rotations, reads[later, other])
