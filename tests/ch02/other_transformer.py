"""Chapter 02 solved in another style: loops over heads, matmul and views, own helpers; the same interface.

Every check must accept it, and the suites of later chapters run with this `Transformer` too: nothing may depend on how
the reference is written.
"""

import torch
from torch import nn
from torch.nn import functional as F

from course_utils.config import TransformerConfig
from course_utils.hooks import HookPoint


class LayerNorm(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.epsilon = cfg.layer_norm_eps
        self.b = nn.Parameter(torch.zeros(cfg.d_model))
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.hook_normalized = HookPoint()
        self.hook_scale = HookPoint()

    def forward(self, resid):
        double = resid.double()
        variance, mean = torch.var_mean(double, dim=-1, correction=0, keepdim=True)
        one_over = torch.rsqrt(variance + self.epsilon)
        scale = self.hook_scale(one_over.reciprocal().type_as(resid))
        return torch.addcmul(self.b, self.hook_normalized(((double - mean) / scale).type_as(resid)), self.w)


class Embed(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model).normal_())

    def forward(self, tokens):
        return F.one_hot(tokens, len(self.W_E)).to(self.W_E.dtype) @ self.W_E


class PosEmbed(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model).normal_())

    def forward(self, tokens, offset=0):
        positions = torch.arange(tokens.size(1), device=tokens.device) + offset
        return F.embedding(positions.expand_as(tokens), self.W_pos)


def attention_scores(q, k):
    q, k = q.transpose(1, 2), k.permute(0, 2, 3, 1)
    return (q * q.size(-1) ** -0.25) @ (k * k.size(-2) ** -0.25)


def causal_mask(scores):
    n_query, n_key = scores.shape[-2:]
    query = torch.arange(n_key - n_query, n_key, device=scores.device).view(-1, 1)
    key = torch.arange(n_key, device=scores.device).view(1, -1)
    return torch.where(key <= query, scores, float("-inf"))


class Attention(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        shape = (cfg.n_heads, cfg.d_model, cfg.d_head)
        for letter in "QKV":
            self.register_parameter(f"W_{letter}", nn.Parameter(torch.empty(shape).normal_()))
            self.register_parameter(f"b_{letter}", nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head)))
        self.W_O = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, cfg.d_model).normal_())
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model))
        self.layer = 0
        for name in ("q", "k", "v", "attn_scores", "pattern", "z"):
            setattr(self, f"hook_{name}", HookPoint())
        self.hook_result = HookPoint(on_request=True)
        self.register_buffer("minus_infinity", torch.tensor(-torch.inf), persistent=False)

    def view(self, letter, resid):
        heads = zip(getattr(self, f"W_{letter}"), getattr(self, f"b_{letter}"), strict=True)
        return torch.stack([resid @ W + b for W, b in heads], dim=2)

    def forward(self, resid, cache=None):
        v, k, q = (getattr(self, f"hook_{letter.lower()}")(self.view(letter, resid)) for letter in "VKQ")
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        n_query, n_key, n_heads = q.size(1), k.size(1), q.size(2)
        future = torch.arange(n_key, device=q.device) > torch.arange(n_key - n_query, n_key, device=q.device)[:, None]
        scores = [q[:, :, head] @ k[:, :, head].mT / q.size(-1) ** 0.5 for head in range(n_heads)]
        scores = torch.stack([torch.where(future, self.minus_infinity, score) for score in scores], dim=1)
        pattern = self.hook_pattern(torch.exp(self.hook_attn_scores(scores).log_softmax(dim=-1)))
        z = self.hook_z(torch.stack([pattern[:, head] @ v[:, :, head] for head in range(n_heads)], dim=2))
        if self.hook_result.is_watched:
            result = torch.stack([z[:, :, head] @ self.W_O[head] for head in range(n_heads)], dim=2)
            return self.b_O + self.hook_result(result).sum(2)
        return z.flatten(start_dim=2) @ self.W_O.flatten(end_dim=1) + self.b_O


def gelu_new(x):
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp).normal_())
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model).normal_())
        self.b_in = nn.Parameter(torch.zeros(cfg.d_mlp))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model))
        self.act = cfg.act
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, resid):
        neurons = self.hook_pre(F.linear(resid, self.W_in.mT, self.b_in))
        neurons = self.hook_post(self.bend(neurons))
        return F.linear(neurons, self.W_out.mT, self.b_out)

    def bend(self, neurons):
        if self.act == "gelu":
            return neurons * (1 + torch.erf(neurons / 2**0.5)) / 2
        return neurons.clamp(min=0) if self.act == "relu" else gelu_new(neurons)


def norm(cfg):
    return {"LN": LayerNorm, "RMS": RMSNorm, "none": lambda cfg: nn.Identity()}[cfg.normalization](cfg)


class TransformerBlock(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()

        kind = "grouped" if cfg.n_kv_heads else cfg.positions
        attentions = {"learned": Attention, "rotary": RotaryAttention, "grouped": GroupedQueryAttention}
        self.attn, self.ln1 = attentions[kind](cfg), norm(cfg)
        hooks = ["resid_pre", "attn_out", "resid_post"]
        if not cfg.attn_only:
            self.mlp, self.ln2 = (GatedMLP if cfg.gated else MLP)(cfg), norm(cfg)
            hooks += ["resid_mid", "mlp_out"]
        for name in hooks:
            setattr(self, f"hook_{name}", HookPoint())

    def forward(self, resid, cache=None):
        resid = self.hook_resid_pre(resid)
        resid = resid + self.hook_attn_out(self.attn(self.ln1(resid), cache=cache))
        if hasattr(self, "mlp"):
            resid = self.hook_resid_mid(resid)
            resid = resid + self.hook_mlp_out(self.mlp(self.ln2(resid)))
        return self.hook_resid_post(resid)


class Unembed(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.b_U = nn.Parameter(torch.zeros(cfg.d_vocab))
        self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab).normal_())

    def forward(self, resid):
        flat = torch.addmm(self.b_U, resid.flatten(end_dim=1), self.W_U)
        return flat.view(*resid.shape[:2], -1)


class Transformer(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.ln_final = norm(cfg)
        self.blocks = nn.ModuleList()
        for layer in range(cfg.n_layers):
            self.blocks.append((ParallelBlock if cfg.parallel else TransformerBlock)(cfg))
            self.blocks[layer].attn.layer = layer
        self.embed, self.hook_embed = Embed(cfg), HookPoint()
        self.unembed = NewerUnembed(cfg, self.embed) if cfg.n_kv_heads else Unembed(cfg)
        if cfg.positions == "learned":
            self.pos_embed, self.hook_pos_embed = PosEmbed(cfg), HookPoint()

    def forward(self, tokens, cache=None):
        start = cache.length if cache is not None else 0
        stream = self.hook_embed(self.embed(tokens))
        if self.cfg.positions == "learned":
            stream = self.hook_pos_embed(self.pos_embed(tokens, offset=start)) + stream
        for layer in range(len(self.blocks)):
            stream = self.blocks[layer](stream, cache=cache)
        return self.unembed(self.ln_final(stream))


def init_weights(model, std, generator):
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last.startswith("W"):
            into_stream = last in {"W_O", "W_out"}
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(drawn / (2 * model.cfg.n_layers) ** 0.5 if into_stream else drawn)
        else:
            nn.init.constant_(parameter, float(last == "w"))


def convert_gpt2_weights(state_dict, cfg):
    ours = {"unembed.b_U": torch.zeros_like(state_dict["lm_head.weight"][:, 0])}
    simple = {
        "wte.weight": "embed.W_E",
        "wpe.weight": "pos_embed.W_pos",
        "ln_f.weight": "ln_final.w",
        "ln_f.bias": "ln_final.b",
        "ln_1.weight": "ln1.w",
        "ln_1.bias": "ln1.b",
        "ln_2.weight": "ln2.w",
        "ln_2.bias": "ln2.b",
        "mlp.c_fc.weight": "mlp.W_in",
        "mlp.c_fc.bias": "mlp.b_in",
        "mlp.c_proj.weight": "mlp.W_out",
        "mlp.c_proj.bias": "mlp.b_out",
        "attn.c_proj.bias": "attn.b_O",
    }
    for name, weight in state_dict.items():
        name = name.replace("transformer.", "")
        prefix = ""
        if name.startswith("h."):
            _, layer, name = name.split(".", 2)
            prefix = f"blocks.{layer}."
        if name == "lm_head.weight":
            ours["unembed.W_U"] = weight.t().contiguous()
        elif name in simple:
            ours[prefix + simple[name]] = weight
        elif name == "attn.c_proj.weight":
            ours[f"{prefix}attn.W_O"] = weight.view(cfg.n_heads, cfg.d_head, cfg.d_model)
        elif name in ("attn.c_attn.weight", "attn.c_attn.bias"):
            kind = "W" if name.endswith("weight") else "b"
            for letter, third in zip("QKV", weight.split(cfg.n_heads * cfg.d_head, dim=-1), strict=True):
                heads = third.split(cfg.d_head, dim=-1)
                ours[f"{prefix}attn.{kind}_{letter}"] = torch.stack(heads)
    return ours


def apply_rotary(x, positions, rotary_dim, base):
    """Pairs as complex numbers: turning is multiplication."""
    turning, still = x[..., :rotary_dim], x[..., rotary_dim:]
    exponents = torch.arange(0, rotary_dim, 2, device=x.device, dtype=torch.float64) / rotary_dim
    angles = torch.outer(positions.double(), torch.exp(-exponents * torch.log(torch.tensor(float(base)))))
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    pairs = torch.view_as_complex(turning.double().unflatten(-1, (2, -1)).transpose(-1, -2).contiguous())
    turned = torch.view_as_real(pairs * turn).transpose(-1, -2).flatten(-2)
    return torch.cat([turned.to(x.dtype), still], dim=-1)


class RotaryAttention(Attention):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg)
        self.rotary = {"rotary_dim": cfg.rotary_dim, "base": cfg.rotary_base}
        self.hook_rot_k, self.hook_rot_q = HookPoint(), HookPoint()

    def forward(self, resid, cache=None):
        n_old = cache.length if cache is not None else 0
        positions = torch.arange(resid.size(1), device=resid.device) + n_old
        v, k, q = (getattr(self, f"hook_{letter.lower()}")(self.view(letter, resid)) for letter in "VKQ")
        k = self.hook_rot_k(apply_rotary(k, positions, **self.rotary))
        q = self.hook_rot_q(apply_rotary(q, positions, **self.rotary))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        scores = causal_mask(attention_scores(q, k))
        pattern = self.hook_pattern(self.hook_attn_scores(scores).softmax(dim=-1))
        z = self.hook_z((pattern @ v.transpose(1, 2)).transpose(1, 2))
        heads = [z[:, :, head] @ W for head, W in enumerate(self.W_O)]
        if self.hook_result.is_watched:
            heads = self.hook_result(torch.stack(heads, dim=2)).unbind(2)
        return torch.stack(list(heads)).sum(0) + self.b_O


class ParallelBlock(TransformerBlock):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg)
        del self.hook_resid_mid

    def forward(self, resid, cache=None):
        resid = self.hook_resid_pre(resid)
        neurons = self.hook_mlp_out(self.mlp(self.ln2(resid)))
        return self.hook_resid_post(neurons + self.hook_attn_out(self.attn(self.ln1(resid), cache=cache)) + resid)


def convert_neox_weights(state_dict, cfg):
    ours = {}
    vectors = {
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
        "final_layer_norm": "ln_final",
    }
    for name, weight in state_dict.items():
        name = name.removeprefix("gpt_neox.")
        prefix = ""
        if name.startswith("layers."):
            _, layer, name = name.split(".", 2)
            prefix = f"blocks.{layer}."
        owner, _, kind = name.rpartition(".")
        symbol = "W" if kind == "weight" else "b"
        if owner in vectors:
            ours[f"{prefix}{vectors[owner]}.{symbol.lower()}"] = weight
        elif owner == "attention.query_key_value":
            for rows in weight.chunk(cfg.n_heads):
                for letter, part in zip("QKV", rows.chunk(3), strict=True):
                    ours.setdefault(f"{prefix}attn.{symbol}_{letter}", []).append(part.T if symbol == "W" else part)
        elif owner == "attention.dense":
            dense = weight if symbol == "b" else torch.stack(weight.T.split(cfg.d_head))
            ours[f"{prefix}attn.{symbol}_O"] = dense
        elif owner in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
            direction = "in" if owner.endswith("4h") else "out"
            ours[f"{prefix}mlp.{symbol}_{direction}"] = weight if symbol == "b" else weight.mT.contiguous()
        elif owner == "embed_in":
            ours["embed.W_E"] = weight
        elif owner in ("lm_head", "embed_out"):
            ours["unembed.W_U"] = weight.t().contiguous()
            ours["unembed.b_U"] = torch.zeros_like(weight[:, 0])
    return {name: torch.stack(weight) if isinstance(weight, list) else weight for name, weight in ours.items()}


class RMSNorm(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.w, self.epsilon = nn.Parameter(torch.ones(cfg.d_model)), cfg.layer_norm_eps
        self.hook_normalized, self.hook_scale = HookPoint(), HookPoint()

    def forward(self, resid):
        norm = torch.linalg.vector_norm(resid, dim=-1, keepdim=True, dtype=torch.float64)
        scale = self.hook_scale(torch.sqrt(norm**2 / resid.size(-1) + self.epsilon).type_as(resid))
        return self.w * self.hook_normalized(resid * scale.reciprocal())


class GatedMLP(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        for name in ("W_gate", "W_in"):
            self.register_parameter(name, nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp).normal_()))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model).normal_())
        for name in ("hook_pre", "hook_pre_linear", "hook_post"):
            setattr(self, name, HookPoint())

    def forward(self, resid):
        gate, up = (resid @ torch.cat([self.W_gate, self.W_in], dim=1)).chunk(2, dim=-1)
        gate = self.hook_pre(gate)
        return F.linear(self.hook_post(self.hook_pre_linear(up) * gate * gate.sigmoid()), self.W_out.mT)


class GroupedQueryAttention(nn.Module):
    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        for letter, n_heads in {"Q": cfg.n_heads, "K": cfg.n_kv_heads, "V": cfg.n_kv_heads}.items():
            W = torch.empty(n_heads, cfg.d_model, cfg.d_head).normal_()
            self.register_parameter(f"W_{letter}", nn.Parameter(W))
        self.W_O = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, cfg.d_model).normal_())
        self.layer, self.rotary = 0, {"rotary_dim": cfg.rotary_dim, "base": cfg.rotary_base}
        for name in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z"):
            setattr(self, f"hook_{name}", HookPoint())
        self.hook_result = HookPoint(on_request=True)

    def forward(self, resid, cache=None):
        """The axis of heads as two, group and member; one key is broadcast over its members."""
        n_old = cache.length if cache is not None else 0
        positions = torch.arange(resid.size(1), device=resid.device) + n_old
        k, v, q = (
            getattr(self, f"hook_{letter.lower()}")(torch.stack([resid @ W for W in getattr(self, f"W_{letter}")], 2))
            for letter in "KVQ"
        )
        q = self.hook_rot_q(apply_rotary(q, positions, **self.rotary))
        k = self.hook_rot_k(apply_rotary(k, positions, **self.rotary))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        n_groups = self.W_K.size(0)
        q = q.unflatten(2, (n_groups, -1)).permute(0, 2, 3, 1, 4)  # batch group member query d_head
        scores = (q / q.size(-1) ** 0.5) @ k.permute(0, 2, 3, 1).unsqueeze(2)
        scores = self.hook_attn_scores(causal_mask(scores.flatten(1, 2)))
        pattern = self.hook_pattern(scores.softmax(-1)).unflatten(1, (n_groups, -1))
        z = (pattern @ v.transpose(1, 2).unsqueeze(2)).flatten(1, 2).transpose(1, 2)
        z = self.hook_z(z)
        if self.hook_result.is_watched:
            result = torch.stack([z[:, :, head] @ W for head, W in enumerate(self.W_O)], dim=2)
            return self.hook_result(result).sum(2)
        return z.flatten(start_dim=2) @ self.W_O.flatten(end_dim=1)


class NewerUnembed(nn.Module):
    def __init__(self, cfg: TransformerConfig, embed: nn.Module) -> None:
        super().__init__()
        if cfg.tied:
            self.__dict__["tied_to"] = embed  # not among the submodules
        else:
            self.register_parameter("W_U", nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab).normal_()))

    def __getattr__(self, name):
        if name == "W_U" and "tied_to" in self.__dict__:
            return self.tied_to.W_E.mT
        return super().__getattr__(name)

    def forward(self, resid):
        return resid @ self.W_U


def convert_llama_weights(state_dict, cfg):
    ours = {}
    owners = {
        "input_layernorm": "ln1.w",
        "post_attention_layernorm": "ln2.w",
        "self_attn.q_proj": "attn.W_Q",
        "self_attn.k_proj": "attn.W_K",
        "self_attn.v_proj": "attn.W_V",
        "self_attn.o_proj": "attn.W_O",
        "mlp.gate_proj": "mlp.W_gate",
        "mlp.up_proj": "mlp.W_in",
        "mlp.down_proj": "mlp.W_out",
        "embed_tokens": "embed.W_E",
        "norm": "ln_final.w",
        "lm_head": "unembed.W_U",
    }
    for name, weight in state_dict.items():
        owner, prefix = name.removeprefix("model.").removesuffix(".weight"), ""
        if owner.startswith("layers."):
            _, layer, owner = owner.split(".", 2)
            prefix = f"blocks.{layer}."
        if owner not in owners or (owner == "lm_head" and cfg.tied):
            continue
        if owner == "self_attn.o_proj":
            weight = torch.stack(weight.mT.split(cfg.d_head))
        elif owner.startswith("self_attn"):
            weight = torch.stack([rows.mT for rows in weight.split(cfg.d_head)])
        elif owner.startswith("mlp") or owner == "lm_head":
            weight = weight.mT.contiguous()
        ours[prefix + owners[owner]] = weight
    return ours


def greedy(logits):
    return logits.max(dim=1).indices


def apply_temperature(logits, temperature):
    if not temperature > 0:
        raise ValueError("a temperature is positive")
    return logits * (1 / temperature)


def apply_frequency_penalty(logits, tokens, penalty):
    rows = [torch.bincount(row, minlength=logits.size(1)) for row in tokens]
    return logits - penalty * torch.stack(rows).to(logits)


def keep_top_k(logits, k):
    if k <= 0:
        raise ValueError("keep at least one")
    smallest_kept = logits.sort(dim=1, descending=True).values[:, min(k, logits.size(1)) - 1]
    return logits.masked_fill(logits < smallest_kept[:, None], float("-inf"))


def keep_top_p(logits, p, min_tokens_to_keep=1):
    if p <= 0 or p > 1:
        raise ValueError("p is a probability")
    out = torch.full_like(logits, float("-inf"))
    for row in range(logits.size(0)):
        probabilities, total = torch.softmax(logits[row], 0), 0.0
        for n_kept, token in enumerate(probabilities.argsort(descending=True)):
            if p != 1 and total >= p and n_kept >= min_tokens_to_keep:
                break
            out[row, token] = logits[row, token]
            total += probabilities[token].item()
    return out


def sample(logits, generator):
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    return (logits - (-uniform.log()).log()).argmax(dim=-1)  # the Gumbel-max trick


def generate(model, tokens, n_new, pick, eos=None, cache=None):
    if cache and not tokens[:, cache.length :].numel():
        raise ValueError("nothing is left to read")
    with torch.no_grad():
        running = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        while n_new > 0 and tokens.size(1) < model.cfg.n_ctx and running.any():
            n_read = 0 if cache is None else cache.length
            logits = model(tokens[:, n_read - tokens.size(1) :], cache=cache)
            choice = pick(logits[:, -1, :])
            if eos is not None:
                choice = torch.where(running, choice, torch.full_like(choice, eos))
                running &= choice != eos
            tokens = torch.hstack([tokens, choice.unsqueeze(1)])
            n_new -= 1
    return tokens


class KVCache:
    def __init__(self, cfg, batch):
        self.layers = [[None, None] for _ in range(cfg.n_layers)]
        self.limit, self.n_rows = cfg.n_ctx, batch

    @property
    def length(self):
        k = self.layers[-1][0]  # the last layer is the last to be told
        return 0 if k is None else k.size(1)

    def append(self, layer, k, v):
        stored = self.layers[layer][0]
        n_stored = 0 if stored is None else stored.size(1)
        if k.size(0) != self.n_rows or n_stored + k.size(1) > self.limit:
            raise ValueError("it does not fit")
        pairs = zip(self.layers[layer], (k, v), strict=True)
        pair = [new if old is None else torch.cat((old, new), 1) for old, new in pairs]
        self.layers[layer] = pair
        return tuple(pair)

    def select(self, rows):
        self.n_rows = rows.numel()
        for pair in self.layers:
            pair[:] = [old if old is None else old.index_select(0, rows) for old in pair]


def ban_repeated_ngrams(logits, tokens, n):
    if n <= 0:
        raise ValueError("an n-gram has at least one token")
    out = logits.clone()
    if tokens.size(1) >= n:
        windows = tokens.unfold(1, n, 1)  # [batch start n]
        end = tokens[:, tokens.size(1) - n + 1 :].unsqueeze(1)
        row, start = (windows[..., :-1] == end).all(-1).nonzero(as_tuple=True)
        out[row, windows[row, start, -1]] = float("-inf")
    return out


def beam_search(model, tokens, n_beams, n_new, no_repeat_ngram=None, eos=None, cache=None):
    if n_beams <= 0:
        raise ValueError("no beams")
    (prompt,) = tokens
    if cache and cache.length >= len(prompt):
        raise ValueError("nothing is left to read")
    start = tokens.size(1)
    open_beams, ended = [(0.0, tokens[0].tolist())], []
    with torch.no_grad():
        while open_beams and len(open_beams[0][1]) < min(start + n_new, model.cfg.n_ctx):
            texts = torch.tensor([text for _, text in open_beams], device=tokens.device)
            logits = model(texts) if cache is None else model(texts[:, cache.length :], cache)
            scores = torch.log_softmax(logits[:, -1], dim=1)
            if no_repeat_ngram is not None:
                scores = ban_repeated_ngrams(scores, texts, no_repeat_ngram)
            candidates = [(total, text, None) for total, text in ended]
            for row, (total, text) in enumerate(open_beams):
                for token, score in enumerate(scores[row].tolist()):
                    if score > float("-inf"):
                        candidates.append((total + score, [*text, token], row))
            if not candidates:
                break
            candidates = sorted(candidates, key=lambda candidate: candidate[0], reverse=True)[:n_beams]
            ended = [(total, text) for total, text, row in candidates if row is None or text[-1] == eos]
            going = [(total, text, row) for total, text, row in candidates if row is not None and text[-1] != eos]
            open_beams = [(total, text) for total, text, _ in going]
            if cache is not None and going:
                cache.select(torch.tensor([row for *_, row in going], device=tokens.device))
    best = sorted(ended + open_beams, key=lambda beam: beam[0], reverse=True)
    return [(total, torch.tensor(text, device=tokens.device)) for total, text in best]
