"""Chapter 03's loop solved in another style: preallocation, dicts of state, context managers, torch's own helpers.

Every check must accept it.
"""

import copy
import io
import itertools
import math
import os
import pickle
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F


def pack_documents(documents, n_ctx, bos):
    flat = torch.tensor(list(itertools.chain.from_iterable([bos, *document] for document in documents)))
    rows = flat.unfold(0, n_ctx, n_ctx) if len(flat) >= n_ctx else flat.new_empty(0, n_ctx)
    return rows.contiguous()


def lm_loss(logits, tokens):
    logprobs = logits.log_softmax(dim=-1)
    picked = logprobs[:, :-1].gather(2, tokens[:, 1:].unsqueeze(2))
    return picked.sum() / -(tokens.shape[0] * (tokens.shape[1] - 1))


def cosine_schedule(step, warmup, total, peak, floor):
    if step >= warmup:
        angle = math.pi * min(1.0, (step - warmup) / (total - warmup))
        return 0.5 * (peak + floor) + 0.5 * (peak - floor) * math.cos(angle)
    return (step + 1) * (peak / warmup)


class AdamW:
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        given = list(params)
        if not isinstance(given[0], dict):
            given = [{"params": given}]
        self.param_groups = []
        for group in given:
            whole = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            whole.update(group)
            whole["params"] = list(whole["params"])
            self.param_groups.append(whole)
        everyone = [p for group in self.param_groups for p in group["params"]]
        self.state = {p: {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "step": 0} for p in everyone}

    def all(self):
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def zero_grad(self):
        for _, p in self.all():
            p.grad = None

    def step(self):
        for group, p in self.all():
            if p.grad is not None:
                self.move(group, p, p.grad.detach())

    def move(self, group, p, g):
        own, (b1, b2) = self.state[p], group["betas"]
        own["step"] += 1
        m, v, t = own["m"].data, own["v"].data, own["step"]
        m[...], v[...] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        decayed = p.data - group["lr"] * group["weight_decay"] * p.data
        p.data[...] = decayed - group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + group["eps"])

    def state_dict(self):
        return {
            "moments": [dict(self.state[p]) for _, p in self.all()],
            "options": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
        }

    def load_state_dict(self, state_dict):
        for group, options in zip(self.param_groups, state_dict["options"], strict=True):
            group |= options
        for (_, p), moments in zip(self.all(), state_dict["moments"], strict=True):
            self.state[p] = {name: copy.deepcopy(value) for name, value in moments.items()}


def parameter_groups(model, weight_decay):
    decaying = {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"}
    named = list(model.named_parameters())
    return [
        {"weight_decay": decay, "params": [p for name, p in named if (name.rpartition(".")[2] in decaying) is wanted]}
        for decay, wanted in ((weight_decay, True), (0.0, False))
    ]


def clip_grad_norm(parameters, max_norm):
    return float(torch.nn.utils.clip_grad_norm_(list(parameters), max_norm))


def train_step(model, optimizer, batch, max_norm=None):
    for parameter in model.parameters():
        parameter.grad = None
    loss = lm_loss(model(batch), batch)
    loss.backward()
    clip_grad_norm(model.parameters(), math.inf if max_norm is None else max_norm)
    optimizer.step()
    return float(loss.detach())


def accumulate_gradients(model, batch, n_micro):
    size = math.ceil(len(batch) / n_micro)
    n_predictions = batch[:, 1:].numel()
    losses = []
    for start in range(0, len(batch), size):
        micro = batch[start : start + size]
        loss = F.cross_entropy(model(micro)[:, :-1].flatten(0, 1), micro[:, 1:].flatten(), reduction="sum")
        (loss / n_predictions).backward()
        losses.append(loss.item())
    return sum(losses) / n_predictions


@torch.inference_mode()
def evaluate(model, batches):
    before = model.training
    nats, n = torch.zeros(()), 0
    try:
        model.train(False)
        for batch in batches:
            logits = model(batch)[:, :-1]
            nats = nats + F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            n += batch[:, 1:].numel()
    finally:
        model.train(before)
    return float(nats / n)


def save_checkpoint(path, **state):
    def plain(value):
        if isinstance(value, torch.Generator):
            return value.get_state()
        return value.state_dict() if callable(getattr(value, "state_dict", None)) else value

    buffer = io.BytesIO()
    try:
        torch.save({name: plain(value) for name, value in state.items()}, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.UnpicklingError, AttributeError):
        raise ValueError("not plain data") from None
    handle, temporary = tempfile.mkstemp(dir=Path(path).parent)
    with os.fdopen(handle, "wb") as file:
        file.write(buffer.getvalue())
    Path(temporary).rename(path)


def load_checkpoint(path):
    with open(path, "rb") as file:
        return torch.load(io.BytesIO(file.read()), map_location=torch.device("cpu"), weights_only=True)
