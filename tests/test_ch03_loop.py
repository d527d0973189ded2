"""The checks of chapter 03's loop against mistakes that learners make, and right answers written another way.

Each mistake returns the right type, and must be refused with its promised words. Those marked `surprise` are absent
from the check's own list of known mistakes. At the end: a training run that is killed, again and again.
"""

import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import other_training_loop as other
import pytest
import torch
from conftest import ROOT
from mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from mutation import survivors
from torch import nn
from torch.nn import functional as F

import solutions.ch03_training as ref
from course_utils.checks import find_checks, run_check

CHECKS = {name: fn for name, fn in find_checks()["03"].items() if fn.__module__.endswith("ch03_2_loop")}

MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any = None, surprise: bool = False) -> Any:
    """Note a wrong answer; as a decorator, of a function."""
    if answer is not None:
        MISTAKES.append(Mistake(exercise, words, answer, surprise))
        return None

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        MISTAKES.append(Mistake(exercise, words, function, surprise))
        return function

    return note


# ------------------------------------------------------------------------------------------------------ pack_documents


def packed(words: str, surprise: bool = False, **wrong: Any) -> None:
    """Packing with switches for what people get wrong."""

    def pack_documents(documents: Any, n_ctx: int, bos: int) -> Any:
        stream = [] if wrong.get("begun", True) else [bos]
        for document in documents:
            if wrong.get("skips_empty") and not document:
                continue
            whole = [*document, bos] if wrong.get("at_end") else [bos, *document]
            stream += [*whole, bos] if wrong.get("both") else whole if wrong.get("begun", True) else document
            if wrong.get("padded"):
                stream += [bos] * (-len(stream) % n_ctx)
        if wrong.get("filled"):
            stream += [bos] * (-len(stream) % n_ctx)
        n_rows = max(0, len(stream) // n_ctx - wrong.get("fewer", 0))
        start = len(stream) - n_rows * n_ctx if wrong.get("at_start") else 0
        rows = torch.tensor(stream[start : start + n_rows * n_ctx], dtype=wrong.get("dtype", torch.long))
        if wrong.get("down"):
            return rows.reshape(n_ctx, n_rows).T
        return rows.reshape(n_rows, n_ctx) if n_rows or not wrong.get("flat") else rows

    mistake("pack_documents", words, pack_documents, surprise)


packed("`bos` comes after each document", at_end=True)
packed("on both sides", both=True)
packed("only the first document is begun", begun=False)
packed("filled up with `bos`; drop it", filled=True)
packed("by itself; they should follow", padded=True)
packed("dropped at the beginning", at_start=True)
packed("down the columns", down=True)
packed("the last full row is dropped", fewer=1)
packed("wrong shape", surprise=True, flat=True)
packed("values are wrong", surprise=True, skips_empty=True)
packed("expected dtype int64, got int32", surprise=True, dtype=torch.int32)
mistake(
    "pack_documents",
    "it changed `documents`",
    lambda documents, n_ctx, bos: ref.pack_documents([d for d in documents if not d.insert(0, bos)], n_ctx, bos),
    surprise=True,
)

# ------------------------------------------------------------------------------------------------------------- lm_loss


def xent(logits: Any, targets: Any, **options: Any) -> Any:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **options)


def shifted(logits: Any, tokens: Any) -> Any:
    return logits[:, :-1], tokens[:, 1:]


for words, answer in {
    "labels are not shifted": xent,
    "the shift goes the wrong way": lambda logits, tokens: xent(logits[:, 1:], tokens[:, :-1]),
    "the sum is taken": lambda logits, tokens: xent(*shifted(logits, tokens), reduction="sum"),
    "divided by batch * pos": lambda logits, tokens: xent(*shifted(logits, tokens), reduction="sum") / tokens.numel(),
    "rows run into each other": lambda logits, tokens: xent(logits.flatten(0, 1)[:-1], tokens.flatten()[1:]),
    "the labels are rolled": lambda logits, tokens: xent(logits, tokens.roll(-1, 1)),
    "only the last prediction": lambda logits, tokens: xent(logits[:, -2], tokens[:, -1]),
    "minus sign": lambda logits, tokens: -xent(*shifted(logits, tokens)),
    "softmax is taken before": lambda logits, tokens: xent(*shifted(logits.softmax(-1), tokens)),
    "a log_softmax is missing": lambda logits, tokens: F.nll_loss(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ),
    "the perplexity": lambda logits, tokens: xent(*shifted(logits, tokens)).exp(),
}.items():
    mistake("lm_loss", words, answer)
for words, answer in {
    "no gradient gets through": lambda logits, tokens: xent(*shifted(logits.detach(), tokens)),
    "lm_loss with large logits": lambda logits, tokens: (
        -logits.softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).log().mean()
    ),
    "1 values is wrong": lambda logits, tokens: xent(logits[:1, :-1], tokens[:1, 1:]),
    "wrong shape": lambda logits, tokens: xent(*shifted(logits, tokens), reduction="none").view(len(tokens), -1),
    "expected a Tensor": lambda logits, tokens: xent(*shifted(logits, tokens)).item(),
    "the gradient that it sends": lambda logits, tokens: xent(*shifted(logits.detach(), tokens)) + 0 * logits.sum(),
}.items():
    mistake("lm_loss", words, answer, surprise=True)

# ----------------------------------------------------------------------------------------------------- cosine_schedule


def scheduled(words: str, surprise: bool = False, **wrong: Any) -> None:
    def cosine_schedule(step: int, warmup: int, total: int, peak: float, floor: float) -> Any:
        if step < warmup and not wrong.get("no_warmup"):
            return peak * (step + wrong.get("one", 1)) / (warmup + wrong.get("slow", 0))
        if step >= total + wrong.get("end", 0) and not wrong.get("rises"):
            return wrong.get("after", floor)
        begin = 0 if wrong.get("from_0") else warmup + wrong.get("begin", 0)
        along = max(0, step - begin) / max(1, total + wrong.get("end", 0) - begin)
        height = 1 - along if wrong.get("line") else wrong.get("half", 0.5) * (1 + math.cos(math.pi * along))
        value = floor * wrong.get("floor", 1) + (peak - floor * wrong.get("less", 1)) * height
        return torch.tensor(value) if wrong.get("tensor") else int(value) if wrong.get("int") else value

    mistake("cosine_schedule", words, cosine_schedule, surprise)


scheduled("the warm-up is a step late", one=0)
scheduled("it should stay at `floor`", rises=True)
scheduled("it reaches `floor` at step total - 1", end=-1)
scheduled("it begins at `warmup`", begin=-1)
scheduled("the warm-up is not taken off", from_0=True)
scheduled("in a straight line", line=True)
scheduled("the factor 1/2 is missing", half=1.0)
scheduled("goes down to 0", floor=0, less=0, after=0.0)
scheduled("the rate jumps to it at the end", floor=0, less=0)
scheduled("it should swing by peak - floor", less=0)
scheduled("the rate is 0 after the end", after=0.0)
scheduled("got a Tensor", surprise=True, tensor=True)
scheduled("wrong", surprise=True, slow=1)
scheduled("wrong", surprise=True, int=True)
scheduled("first at [step=5]", surprise=True, end=1)
mistake(
    "cosine_schedule",
    "raised ZeroDivisionError in cosine_schedule(step, 0",
    lambda step, warmup, total, peak, floor: (
        (step + 1) / warmup and ref.cosine_schedule(step, warmup, total, peak, floor)
    ),
    surprise=True,
)

# --------------------------------------------------------------------------------------------------------------- AdamW


def adam(words: str, surprise: bool = False, base: type = ref.AdamW, **wrong: Any) -> None:
    """Ours, with switches for what people get wrong."""

    class AdamW(base):  # type: ignore[misc, valid-type]
        calls = 0

        @torch.no_grad()
        def step(self) -> None:
            self.calls += 1
            count = 0
            for group in self.param_groups:
                if wrong.get("first_group"):
                    group = {**self.param_groups[0], "params": group["params"]}
                if wrong.get("one_group") and group is not self.param_groups[0]:
                    continue
                (b1, b2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
                if wrong.get("frozen_lr"):
                    lr = self.__dict__.setdefault("rates", {}).setdefault(id(group), lr)
                for p in group["params"]:
                    g = p.grad
                    if g is None and wrong.get("stops"):
                        break
                    if g is None and not wrong.get("none_is_zero"):
                        continue
                    g = torch.zeros_like(p) if g is None else g
                    state = self.state[p]
                    count += 1
                    state["step"] = self.calls if wrong.get("common") else state["step"] + 1
                    t = state["step"]
                    if wrong.get("writes_grad"):
                        g.mul_(1.0000001).add_(0.001)
                    if wrong.get("coupled"):
                        g = g + decay * p
                    elif not wrong.get("decay_last"):
                        p.mul_(1 - (1 if wrong.get("raw_decay") else lr) * decay)
                    if wrong.get("forgets"):
                        state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["m"] = b1 * state["m"] + (1 - b1) * g
                    power = 1 if wrong.get("v_of_g") else 2
                    state["v"] = b2 * state["v"] + (1 - b2) * (g.pow(power).abs() if power == 1 else g.pow(2))
                    m_hat, v_hat = state["m"] / (1 - b1**t), state["v"] / (1 - b2**t)
                    if wrong.get("uncorrected"):
                        m_hat, v_hat = state["m"], state["v"]
                    if wrong.get("m_only"):
                        v_hat = state["v"]
                    root = (v_hat + eps).sqrt() if wrong.get("inside") else v_hat.sqrt() + eps
                    if wrong.get("early"):
                        root = (state["v"].sqrt() + eps) / (1 - b2**t) ** 0.5
                    if wrong.get("amsgrad"):
                        state["max"] = torch.maximum(state.get("max", v_hat), v_hat)
                        root = state["max"].sqrt() + eps
                    p.sub_(lr * m_hat / root, alpha=-1 if wrong.get("uphill") else 1)
                    if wrong.get("decay_last"):
                        p.mul_(1 - lr * decay)

        def zero_grad(self) -> None:
            for group in self.param_groups[: 1 if wrong.get("zero_first") else None]:
                for p in group["params"]:
                    if wrong.get("zeros") and p.grad is not None:
                        p.grad.zero_()
                    elif not wrong.get("keeps"):
                        p.grad = None

    mistake("AdamW", words, AdamW, surprise)


adam("Adam with L2", coupled=True)
adam("bias correction of m and v is left out", uncorrected=True)
adam("bias correction of v is left out", m_only=True)
adam("eps is added inside the root", inside=True)
adam("eps is added before the bias correction", early=True)
adam("not multiplied by lr", raw_decay=True)
adam("the decay comes after the update", decay_last=True)
adam("the loss falls in the other direction", uphill=True)
adam("m and v begin at zero in every step", forgets=True)
adam("options of the first group", first_group=True)
adam("may change between steps", frozen_lr=True)
adam("a `.grad` of None counts as zero", none_is_zero=True)
adam("each parameter counts the steps", common=True)
adam("AdamW.zero_grad: the `.grad` of parameter 1 should be None", surprise=True, keeps=True)
adam("full of zeros", surprise=True, zeros=True)
adam("visit the parameters of every group", surprise=True, zero_first=True)
adam("it changed `gradient 0` in place", surprise=True, writes_grad=True)
adam("number", surprise=True, one_group=True)
adam("number", surprise=True, stops=True)
adam("number", surprise=True, amsgrad=True)
adam("number", surprise=True, v_of_g=True)


class _ForgetfulState(ref.AdamW):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({**state_dict, "state": list(self.state.values())})


class _NotPlain(ref.AdamW):
    def state_dict(self) -> Any:
        return {**super().state_dict(), "owner": self.zero_grad}


mistake("AdamW", "AdamW after load_state_dict", _ForgetfulState, surprise=True)
mistake("AdamW", "cannot be saved and loaded as plain data", _NotPlain, surprise=True)

# ---------------------------------------------------------------------------------------------------- parameter_groups


def grouped(words: str, decays: Callable[[str, Any], bool], surprise: bool = False, **wrong: Any) -> None:
    def parameter_groups(model: Any, weight_decay: float) -> Any:
        named = list(model.named_parameters())
        yes = [p for name, p in named if decays(name, p)]
        no = [p for name, p in named if not decays(name, p)]
        if wrong.get("backwards"):
            no.reverse()
        if wrong.get("copies"):
            yes = [p.detach().clone() for p in yes]
        groups = [{"params": yes, "weight_decay": wrong.get("value", weight_decay)}]
        groups += [] if wrong.get("lost") else [{"params": no, "weight_decay": 0.0}]
        return [*groups, {"params": no[:1], "weight_decay": 0.0}] if wrong.get("twice") else groups

    mistake("parameter_groups", words, parameter_groups, surprise)


def last(name: str) -> str:
    return name.split(".")[-1]


def is_right(name: str) -> bool:
    return name.startswith("blocks") and ".W_" in name


grouped("everything decays", lambda name, p: True)
grouped("nothing decays", lambda name, p: False)
grouped("two axes or more decays; `b_Q`", lambda name, p: p.dim() >= 2)
grouped("two axes or more decays but the tables", lambda name, p: p.dim() >= 2 and name.startswith("blocks"))
grouped("the tables at both ends decay too", lambda name, p: "W_" in name)
grouped("the embeddings decay too", lambda name, p: "W_" in name and "W_U" not in name)
grouped("the unembedding decays too", lambda name, p: is_right(name) or "W_U" in name)
grouped("biases decay too", lambda name, p: is_right(name) or last(name).startswith("b_"))
grouped("LayerNorm's `w` and `b` decay too", lambda name, p: is_right(name) or last(name) in "wb")
grouped("biases and LayerNorm too", lambda name, p: name.startswith("blocks"))
grouped("the two groups are swapped", lambda name, p: not is_right(name))
grouped("first at `blocks.0.attn.W_O`", lambda name, p: is_right(name) and "W_O" not in name, surprise=True)
grouped("expected 0.3, got 0.1", lambda name, p: is_right(name), surprise=True, value=0.1)
grouped("is in no group", lambda name, p: is_right(name), surprise=True, lost=True)
grouped("comes twice", lambda name, p: is_right(name), surprise=True, twice=True)
grouped("no parameter of the model", lambda name, p: is_right(name), surprise=True, copies=True)
grouped("not in the order", lambda name, p: is_right(name), surprise=True, backwards=True)

# ------------------------------------------------------------------------------------------------------ clip_grad_norm


def clipped(words: str, surprise: bool = False, **wrong: Any) -> None:
    def clip_grad_norm(parameters: Any, max_norm: float) -> Any:
        grads = [p.grad for p in parameters if p.grad is not None]
        sizes = [g.norm().item() for g in grads]
        norm = sum(sizes) if wrong.get("summed") else math.hypot(*sizes)
        if wrong.get("largest"):
            norm = max(g.abs().max().item() for g in grads)
        if wrong.get("l1"):
            norm = sum(g.abs().sum().item() for g in grads)
        for g, size in zip(grads, sizes, strict=True):
            length = size if wrong.get("each") else norm
            if wrong.get("clamp"):
                g.clamp_(-max_norm, max_norm)
            elif length > max_norm or wrong.get("always"):
                g.mul_(wrong.get("factor", lambda m, n: m / n)(max_norm, length))
        returned = {"after": min(norm, max_norm), "square": norm**2, "tensor": torch.tensor(norm)}
        return returned.get(wrong.get("returns", ""), norm)

    mistake("clip_grad_norm", words, clip_grad_norm, surprise)


clipped("each tensor is clipped by its own norm", each=True)
clipped("a short one is scaled up", always=True)
clipped("every number is clamped", clamp=True)
clipped("nothing is clipped", factor=lambda m, n: 1)
clipped("the factor is 1 / norm", factor=lambda m, n: 1 / n)
clipped("the root is missing", factor=lambda m, n: m / n**2)
clipped("the factor is max_norm;", factor=lambda m, n: m)
clipped("add their squares", summed=True)
clipped("the largest number counts", largest=True)
clipped("the absolute values are added up", l1=True)
clipped("it is the norm after clipping", returns="after")
clipped("it is the square of the norm", returns="square")
clipped("as a plain number, got a Tensor", surprise=True, returns="tensor")
clipped("Every value is", surprise=True, factor=lambda m, n: (m / n) ** 0.5)


@mistake("clip_grad_norm", "a generator can be run through only once")
def _(parameters: Any, max_norm: float) -> float:
    norm = math.hypot(*(p.grad.norm().item() for p in parameters if p.grad is not None))
    for p in parameters:  # a generator: nothing is left
        if p.grad is not None and norm > max_norm:
            p.grad.mul_(max_norm / norm)
    return norm


@mistake("clip_grad_norm", "your code raised AttributeError", surprise=True)
def _(parameters: Any, max_norm: float) -> float:
    return float(torch.stack([p.grad.norm() for p in parameters]).norm())


@mistake("clip_grad_norm", "it changed `parameter 0` in place", surprise=True)
def _(parameters: Any, max_norm: float) -> float:
    parameters = list(parameters)
    norm = ref.clip_grad_norm(parameters, math.inf)
    for p in parameters:
        p.data.mul_(min(1, max_norm / norm))
    return norm


# ---------------------------------------------------------------------------------------------------------- train_step


def stepped(words: str, surprise: bool = False, **wrong: Any) -> None:
    def train_step(model: Any, optimizer: Any, batch: Any, max_norm: float | None = None) -> Any:
        if wrong.get("first"):
            optimizer.step()
        if not wrong.get("kept") and not wrong.get("late"):
            optimizer.zero_grad()
        if max_norm is not None and wrong.get("clip") == "early":
            ref.clip_grad_norm(model.parameters(), max_norm)
        logits = model(batch)
        loss = xent(logits, batch) if wrong.get("unshifted") else ref.lm_loss(logits, batch)
        if not wrong.get("no_backward"):
            (wrong.get("scale", 1) * loss).backward()
        if wrong.get("late"):
            optimizer.zero_grad()
        if max_norm is not None and not wrong.get("clip"):
            ref.clip_grad_norm(model.parameters(), max_norm)
        if wrong.get("default_clip"):
            ref.clip_grad_norm(model.parameters(), 0.1)
        for _ in range(wrong.get("steps", 0 if wrong.get("first") else 1)):
            optimizer.step()
        if max_norm is not None and wrong.get("clip") == "late":
            ref.clip_grad_norm(model.parameters(), max_norm)
        if wrong.get("after"):
            loss = ref.lm_loss(model(batch), batch)
        if wrong.get("mode"):
            model.train(wrong["mode"] == "train")
        return loss if wrong.get("tensor") else loss.item()

    mistake("train_step", words, train_step, surprise)


stepped("`zero_grad` is missing", kept=True)
stepped("`zero_grad` stands between", late=True, surprise=True)
stepped("gradients are not clipped", clip="never")
stepped("gradients are not clipped", clip="early")
stepped("gradients are not clipped", clip="late")
stepped("the labels are not shifted", unshifted=True)
stepped("the optimizer steps twice", steps=2)
stepped("it steps first", first=True)
stepped("it is the loss after the step", after=True)
stepped("was not asked to step", steps=0, surprise=True)
stepped("no gradient was computed", no_backward=True, surprise=True)
stepped("got a Tensor", tensor=True, surprise=True)
stepped("it changed the mode", mode="train", surprise=True)
stepped("values are wrong", scale=0.5, surprise=True)
stepped("values are wrong", default_clip=True, surprise=True)

# ------------------------------------------------------------------------------------------------ accumulate_gradients


def accumulated(words: str, surprise: bool = False, **wrong: Any) -> None:
    def accumulate_gradients(model: Any, batch: Any, n_micro: int) -> Any:
        parts = batch.chunk(n_micro)
        if wrong.get("even"):
            parts = batch.split(max(1, len(batch) // n_micro))[:n_micro]
        if wrong.get("equal") and len(parts) == n_micro:
            return ref.accumulate_gradients(model, batch, n_micro)
        if wrong.get("empty"):
            parts = batch.tensor_split(n_micro)
        if wrong.get("columns"):
            parts = batch.chunk(n_micro, dim=1)
        if wrong.get("short"):
            parts = parts[:-1] if len(parts) > 1 else parts
        if wrong.get("forgets"):
            model.zero_grad()
        total, losses, kept = 0.0, [], []
        for part in parts:
            if wrong.get("each"):
                model.zero_grad()
            share = {"sum": 1.0, "n": 1 / n_micro, "parts": 1 / len(parts)}.get(
                wrong.get("weigh"), len(part) / len(batch)
            )
            loss = ref.lm_loss(model(part), part)
            losses.append(loss.item())
            total += share * loss.item()
            kept.append(share * loss)
            if not wrong.get("graphs"):
                kept.pop().backward()
        if kept:
            sum(kept).backward()
        if wrong.get("step"):
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        return {"last": losses[-1], "sum": sum(losses), "none": None}.get(wrong.get("returns", ""), total)

    mistake("accumulate_gradients", words, accumulate_gradients, surprise)


accumulated("weigh them by their share", weigh="sum")
accumulated("the rows that do not fill a micro-batch are left out", weigh="n", even=True)
accumulated("but there are fewer micro-batches", weigh="n", equal=True)
accumulated("every micro-batch weighs the same; the last", weigh="parts")
accumulated("what was in `.grad` before is lost", forgets=True)
accumulated("only the last micro-batch is left", each=True)
accumulated("the last micro-batch is left out", short=True)
accumulated("it is the loss of the last micro-batch", returns="last")
accumulated("it is the sum of the micro-batches' losses", returns="sum")
accumulated("activations of several are kept", surprise=True, graphs=True)
accumulated("a micro-batch without rows", surprise=True, empty=True)
accumulated("it changed `here` in place", surprise=True, step=True)
accumulated("returned None", surprise=True, returns="none")
accumulated("rows at once; at most", surprise=True, columns=True)


@mistake("accumulate_gradients", "the model was given 6 rows at once; at most 2", surprise=True)
def _(model: Any, batch: Any, n_micro: int) -> float:
    loss = ref.lm_loss(model(batch), batch)
    loss.backward()
    return loss.item()


# ------------------------------------------------------------------------------------------------------------ evaluate


def judged(words: str, surprise: bool = False, **wrong: Any) -> None:
    def evaluate(model: Any, batches: Any) -> Any:
        before = model.training
        if not wrong.get("noisy"):
            model.eval()
        losses, weights = [], []
        with torch.set_grad_enabled(bool(wrong.get("graph"))):
            for tokens in batches:
                losses.append(ref.lm_loss(model(tokens), tokens))
                n = {"batch": 1, "rows": len(tokens), "tokens": tokens.numel()}
                weights.append(n.get(wrong.get("weigh", ""), tokens[:, 1:].numel()))
        if wrong.get("switches_off"):
            torch.set_grad_enabled(False)
        if wrong.get("mode", "restored") == "restored":
            model.train(before)
        elif wrong["mode"] == "train":
            model.train()
        total = sum(w * loss.item() for w, loss in zip(weights, losses, strict=True))
        result = {"sum": total, "last": losses[-1].item(), "tensor": torch.tensor(total / sum(weights))}
        return result.get(wrong.get("returns", ""), total / sum(weights))

    mistake("evaluate", words, evaluate, surprise)


judged("every batch weighs the same", weigh="batch")
judged("batches weigh as their rows do", weigh="rows")
judged("batches weigh as their tokens do", weigh="tokens")
judged("the sum over all predictions", returns="sum")
judged("the loss of the last batch", returns="last")
judged("the model was in training mode before", mode="eval", surprise=True)
judged("the model was in evaluation mode before", mode="train", surprise=True)
judged("ran in training mode", noisy=True, surprise=True)
judged("gradients are recorded", graph=True, surprise=True)
judged("leaves gradients switched off", switches_off=True, surprise=True)
judged("got a Tensor", returns="tensor", surprise=True)
judged("after an exception in the model", surprise=True)


@mistake("evaluate", "it changed the parameters' `.grad`", surprise=True)
def _(model: Any, batches: Any) -> float:
    model.zero_grad()
    return ref.evaluate(model, batches)


@mistake("evaluate", "expected", surprise=True)
def _(model: Any, batches: Any) -> float:
    list(batches)  # a generator: nothing is left for the loop
    return ref.evaluate(model, [torch.tensor([[0, 1, 2]])])


# ------------------------------------------------------------------------------------- save_checkpoint, load_checkpoint


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.get_state()
        if isinstance(value, torch.Generator)
        else value.state_dict()
        if hasattr(value, "state_dict")
        else value
        for name, value in state.items()
    }


def saved(words: str, change: Callable[[dict[str, Any], dict[str, Any]], Any], surprise: bool = False) -> None:
    """The right data, then changed (`change(plain, objects)`), and written as it should be."""

    def save_checkpoint(path: Path, **state: Any) -> None:
        data = plain(state)
        changed = change(data, state)
        torch.save(data if changed is None else changed, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    mistake("save_checkpoint", words, save_checkpoint, surprise)


saved("`optimizer` is forgotten", lambda data, state: data.pop("optimizer") and None)
saved("`generator` is forgotten", lambda data, state: {k: v for k, v in data.items() if k != "generator"})
saved("the generator's seed is stored", lambda data, state: data.update(generator=state["generator"].initial_seed()))
saved("torch's global generator", lambda data, state: data.update(generator=torch.get_rng_state()))
saved("as it was at the start", lambda data, state: data.update(generator=torch.Generator().manual_seed(3).get_state()))
saved("only the model's weights are stored", lambda data, state: data["model"])
saved("stored['optimizer']['state']", lambda data, state: data["optimizer"].update(state={}), surprise=True)
saved("got 2.0", lambda data, state: data.update(step=float(data["step"])), surprise=True)
saved("that nobody stored", lambda data, state: data.update(version=1), surprise=True)
saved(
    "at `stored['best']` expected a Tensor", lambda data, state: data.update(best=data["best"].tolist()), surprise=True
)
saved(
    "torch.float16 of shape",
    lambda data, state: data.update(model={k: v.half() for k, v in data["model"].items()}),
    surprise=True,
)
saved("a Path among the values should raise ValueError", lambda data, state: None, surprise=True)
saved("cannot read the file", lambda data, state: {**data, "model": state["model"]}, surprise=True)


def written(words: str) -> Callable[..., Any]:
    return mistake("save_checkpoint", words, surprise=True)


@written("when the writing broke off half-way")
def _(path: Path, **state: Any) -> None:
    torch.save(plain(state), path)


@written("it writes into the file that stands at `path`")
def _(path: Path, **state: Any) -> None:
    content = pickle_in_memory(state)
    path.write_bytes(content)


@written("it writes into the file that stands at `path`")
def _(path: Path, **state: Any) -> None:
    new = path.with_suffix(".new")
    torch.save(plain(state), new)
    shutil.copyfile(new, path)
    new.unlink()


@written("leaves a file `run.new` behind")
def _(path: Path, **state: Any) -> None:
    torch.save(plain(state), path.with_suffix(".new"))
    shutil.copyfile(path.with_suffix(".new"), path)


@written("when the writing broke off half-way")
def _(path: Path, **state: Any) -> None:
    if path.exists():
        path.unlink()
    torch.save(plain(state), path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


@written("taken away before the new one was in its place")
def _(path: Path, **state: Any) -> None:
    torch.save(plain(state), path.with_suffix(".new"))
    path.unlink(missing_ok=True)
    path.with_suffix(".new").rename(path)


@written("written in another folder")
def _(path: Path, **state: Any) -> None:
    elsewhere = path.parent.parent / f"elsewhere_{os.getpid()}.pt"
    torch.save(plain(state), elsewhere)
    shutil.move(elsewhere, path)


@written("was not complete at that moment")
def _(path: Path, **state: Any) -> None:
    new = path.with_suffix(".new")
    content = pickle_in_memory(state)
    with new.open("wb") as file:
        file.write(content[:1000])
        file.flush()
        os.replace(new, path)
        file.write(content[1000:])


@written("there is no file at `path`")
def _(path: Path, **state: Any) -> None:
    torch.save(plain(state), path.with_suffix(".checkpoint"))


@written("it drew from the generator")
def _(path: Path, **state: Any) -> None:
    ref.save_checkpoint(path, **state)
    torch.randn(1, generator=state["generator"])


def pickle_in_memory(state: dict[str, Any]) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(plain(state), buffer)
    return buffer.getvalue()


mistake("load_checkpoint", "made it run", lambda path: torch.load(path, weights_only=False))
mistake("load_checkpoint", "has no entry 'optimizer'", lambda path: {"model": ref.load_checkpoint(path)["model"]})
mistake("load_checkpoint", "expected a dict, got a tuple", lambda path: tuple(ref.load_checkpoint(path).values()))
mistake("load_checkpoint", "should raise FileNotFoundError", surprise=True)(
    lambda path: ref.load_checkpoint(path) if path.exists() else {}
)
mistake("load_checkpoint", "it changed the file", surprise=True)(
    lambda path: (ref.load_checkpoint(path), path.unlink())[0]
)
mistake("load_checkpoint", "returned None", lambda path: None if ref.load_checkpoint(path) else {}, surprise=True)
mistake(
    "load_checkpoint", "your code raised UnpicklingError", lambda path: pickle.loads(path.read_bytes()), surprise=True
)


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(
        CHECKS[mistake.exercise], mistake, secrets=("addcdiv", "lerp", ".flatten(0, 1)", "optimizer.zero_grad()")
    )


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_another_right_answer_passes(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise))


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    ("cosine_schedule", "step >= total -> step > total"),  # there the cosine has reached the floor by itself
    *(
        ("AdamW", f"zip({pair}, strict=True) -> zip({pair})")
        for pair in (
            "self.param_groups, state_dict['param_groups']",
            "self.state.values(), state_dict['state']",
        )
    ),
    ("AdamW", "True -> False"),  # the same zip(strict=True), of equal lengths
    ("clip_grad_norm", "grad.square().sum().item() -> grad.square().sum()"),
    ("clip_grad_norm", "norm > max_norm -> norm >= max_norm"),
    ("save_checkpoint", "path.name + '.partial' -> '.partial'"),
    ("save_checkpoint", "file.fileno() -> file"),  # fsync takes both
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert {
        (exercise, change)
        for change in survivors(Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="map_location=")
    } <= STILL_RIGHT


# ---------------------------------------------------------------------------------------- together, and when killed


def test_one_batch_can_be_learned_by_heart() -> None:
    """The parts together: what every training loop should be able to do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11))
    rng = torch.Generator().manual_seed(0)
    batch = torch.randperm(11, generator=rng)[None].repeat(3, 1)
    optimizer = ref.AdamW(model.parameters(), lr=0.05)
    losses = [ref.train_step(model, optimizer, batch, max_norm=1.0) for _ in range(60)]
    assert losses[0] > 1.5
    assert losses[-1] < 0.02
    assert ref.evaluate(model, [batch]) < 0.02


TRAINING = """
import sys, time
from pathlib import Path

import torch
from torch import nn

from solutions.ch03_training import AdamW, cosine_schedule, load_checkpoint, save_checkpoint, train_step

path, n_steps = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 32), nn.Dropout(0.2), nn.Linear(32, 50))
optimizer = AdamW(model.parameters(), weight_decay=0.1)
data = torch.Generator().manual_seed(1)
first, ballast = 0, torch.zeros(1_000_000)  # a large file: a kill often finds it half-written
if path.exists():
    state = load_checkpoint(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    data.set_state(state["data"])
    torch.set_rng_state(state["dropout"])
    first = state["step"]
print("from", first, flush=True)
for step in range(first, n_steps):
    for group in optimizer.param_groups:
        group["lr"] = cosine_schedule(step, 5, n_steps, 0.1, 0.01)
    train_step(model, optimizer, torch.randint(50, (8, 12), generator=data), max_norm=1.0)
    dropout = torch.get_rng_state()
    save_checkpoint(path, model=model, optimizer=optimizer, data=data, dropout=dropout, step=step + 1, ballast=ballast)
    print(step + 1, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """kill -9 at different moments of a step; the weights in the end are those of a run that was left alone."""
    n_steps = 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(path: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", TRAINING, str(path), str(n_steps)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    left_alone = start(whole)
    begun = []
    for n_before_kill, wait in [(3, 0.0), (6, 0.004), (5, 0.011)]:
        run = start(broken)
        assert run.stdout is not None
        begun.append(int(run.stdout.readline().split()[1]))
        for _ in range(n_before_kill):
            run.stdout.readline()
        time.sleep(wait)
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        ref.load_checkpoint(broken)  # whatever the moment, it can be read
    assert begun[0] == 0 < begun[1] < begun[2]
    with start(broken) as run:
        run.communicate()
    left_alone.communicate()
    assert run.returncode == left_alone.returncode == 0
    ours, theirs = ref.load_checkpoint(broken), ref.load_checkpoint(whole)
    assert ours["step"] == theirs["step"] == n_steps
    for name, weights in theirs["model"].items():
        assert torch.equal(ours["model"][name], weights), name
    assert torch.equal(ours["data"], theirs["data"])
