"""What every check shares: comparing, wording, refusing, telling whose error it was. Exercises of chapter 02 serve."""

import functools
import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import solutions.ch02_transformer as reference
from course_utils import checks
from course_utils.checks import (
    CheckFailed,
    NotWritten,
    check,
    compare,
    find_checks,
    refuse_foreign,
    run_check,
    unchanged,
)
from course_utils.checks import running as running_module
from course_utils.checks.guarding import may_change
from course_utils.checks.mistakes import known_mistakes

INF = torch.inf


def learner_module(source: str, filename: str = "<ipython-input-7-abc>") -> dict[str, Any]:
    """What a notebook cell defines: its text is known to linecache, as IPython makes it."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": "__main__", "torch": torch, "nn": nn}
    exec(compile(source, filename, "exec"), namespace)
    return namespace


def message_of(call: Callable[[], Any], kind: type[Exception] = CheckFailed) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


MASK = """
def later(scores):
    n_query, n_key = scores.shape[-2:]
    return torch.ones(n_query, n_key, dtype=torch.bool).triu(n_key - n_query + 1)

def causal_mask(scores):
    return scores.masked_fill(later(scores), -torch.inf)
"""


def causal_mask(scores: Tensor) -> Tensor:
    n_query, n_key = scores.shape[-2:]
    return scores.masked_fill(torch.ones(n_query, n_key).triu(n_key - n_query + 1).bool(), -INF)


# ------------------------------------------------------------------------------------------------ check and find_checks


def test_right_answer_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    check(learner_module(MASK)["causal_mask"])
    assert capsys.readouterr().out == "causal_mask: correct\n"


def test_lambda_partial_and_other_names(capsys: pytest.CaptureFixture[str]) -> None:
    check(lambda logits: logits.argmax(-1), name="greedy")
    check(functools.partial(lambda dim, logits: logits.argmax(dim), -1), name="greedy")

    def mine(logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    check(mine, name="greedy")
    assert capsys.readouterr().out == "greedy: correct\n" * 3


def test_checks_are_found_by_chapter_in_the_order_of_the_lesson() -> None:
    found = find_checks()
    assert list(found) == sorted(found)
    assert list(found["02"])[:3] == ["LayerNorm", "Embed", "PosEmbed"]
    assert list(found["02"])[-1] == "convert_llama_weights"
    assert all(fn.__name__ == f"check_{symbol}" for symbol, fn in found["02"].items())


def test_exercise_names_are_unique_in_the_course() -> None:
    names = [symbol for chapter in find_checks().values() for symbol in chapter]
    assert len(names) == len(set(names))


def test_random_numbers_elsewhere_stay_what_they_were() -> None:
    before = torch.get_rng_state()
    run_check(find_checks()["02"]["Attention"], reference.Attention)
    assert torch.equal(torch.get_rng_state(), before)


def test_methods_may_change_what_they_hand_to_each_other() -> None:
    class Accumulator:
        def total(self, values: Tensor) -> Tensor:
            sums = values.clone()
            self.add_up(sums)
            return sums

        def add_up(self, sums: Tensor) -> None:
            sums.cumsum_(0)

    def check_total(cls: Any) -> None:
        compare("total", cls().total(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0]), "pos")

    def check_add_up(cls: Any) -> None:
        cls().add_up(torch.ones(3))

    run_check(check_total, Accumulator)
    assert "it changed `sums` in place" in message_of(lambda: run_check(check_add_up, Accumulator))


def test_what_may_be_changed_may_have_another_name() -> None:
    @may_change("model")
    def check_reset(fn: Callable[..., Any]) -> None:
        fn(nn.Linear(2, 2), torch.ones(2))

    run_check(check_reset, lambda net, scale: nn.init.zeros_(net.weight))
    for answer in (lambda model, scale: scale.zero_(), lambda scale, model: nn.init.zeros_(scale.weight)):
        assert "it changed `scale" in message_of(lambda answer=answer: run_check(check_reset, answer))


def test_a_check_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        run_check(find_checks()["02"]["LayerNorm"], reference.LayerNorm)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda: torch.set_grad_enabled(False), "it left gradient recording (torch.is_grad_enabled) as False"),
        (lambda: torch.set_default_dtype(torch.float64), "it left torch's default dtype as torch.float64"),
        (lambda: torch.set_default_device("meta"), "it left torch's default device as meta"),
    ],
)
@pytest.mark.parametrize("ends", ["well", "with an error", "in its making"])
def test_what_every_call_depends_on_is_put_back(spoil: Callable[[], Any], words: str, ends: str) -> None:
    class Thing:
        def __init__(self) -> None:
            spoil()

    def check_thing(fn: Callable[[], Any]) -> None:
        fn()

    def thing() -> None:
        spoil()
        if ends == "with an error":
            raise ValueError("too early")

    message = message_of(lambda: run_check(check_thing, Thing if ends == "in its making" else thing))
    assert ("ValueError: too early" if ends == "with an error" else words) in message
    now = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device().type
    assert now == (True, torch.float32, "cpu")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "given, name, words",
    [
        (reference.causal_mask, None, ["reference solution", "solutions.ch02_transformer"]),
        (reference.LayerNorm, None, ["LayerNorm: this is the reference solution"]),
        (torch.optim.AdamW, "LayerNorm", ["this is `AdamW` of torch", "write your own"]),
        (torch.nn.functional.gelu, "gelu_new", ["this is `gelu`", "write your own"]),
        (torch.softmax, "sample", ["this is `softmax`"]),
        (max, "greedy", ["this is `max`, not something you wrote"]),
        (compare, "greedy", ["this is `compare` of course_utils"]),
        (lambda logits: logits, None, ["no name of its own", 'name="causal_mask"']),
        ("causal_mask", None, ["got 'causal_mask'", "without quotes"]),
        (None, None, ["got None"]),
        (torch.zeros(2), None, ["got a Tensor", "without calling it"]),
        (7, None, ["got 7"]),
        (nn.Linear(2, 2), None, ["one Linear object", "check(Linear)"]),
    ],
)
def test_what_is_not_ours_to_check_is_refused(given: Any, name: str | None, words: list[str]) -> None:
    message = message_of(lambda: check(given, name))
    assert all(word in message for word in words), message
    assert "\n  Next: " in message


def test_unknown_name_gets_the_nearest() -> None:
    def casual_mask(scores: Tensor) -> Tensor:
        return scores

    message = message_of(lambda: check(casual_mask))
    assert "no exercise named 'casual_mask'" in message and 'check(casual_mask, name="causal_mask")' in message
    assert "'maks'" in message_of(lambda: check(casual_mask, name="maks"))


def test_refusal_is_available_to_graders() -> None:
    refuse_foreign("causal_mask", causal_mask)
    assert "reference solution" in message_of(lambda: refuse_foreign("Embed", reference.Embed))


# ----------------------------------------------------------------------------------------------------- not written


def test_stub_is_not_written() -> None:
    stub = learner_module('def causal_mask(scores):\n    """Doc."""\n    raise NotImplementedError("causal_mask")\n')
    assert message_of(lambda: check(stub["causal_mask"]), NotWritten) == "causal_mask: not written yet."
    bare = learner_module("def causal_mask(scores):\n    raise NotImplementedError\n")
    assert message_of(lambda: check(bare["causal_mask"]), NotWritten) == "causal_mask: not written yet."


def test_a_method_is_part_of_its_class() -> None:
    source = """
class Embed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(cfg.d_vocab, cfg.d_model))
    def forward(self, tokens):
        raise NotImplementedError("Embed")
"""
    assert message_of(lambda: check(learner_module(source)["Embed"]), NotWritten) == "Embed: not written yet."


def test_a_stub_that_is_needed_is_named() -> None:
    source = """
def count(tokens):
    raise NotImplementedError("count")

def greedy(logits):
    return count(logits)
"""
    message = message_of(lambda: check(learner_module(source)["greedy"]), NotWritten)
    assert message == "greedy: not written yet: it needs `count`."


def test_not_implemented_by_torch_is_an_error_of_the_learner() -> None:
    source = "def greedy(logits):\n    return nn.Module()(logits)\n"
    assert "your code raised NotImplementedError" in message_of(lambda: check(learner_module(source)["greedy"]))


# ------------------------------------------------------------------------------------- errors in the learner's code


def test_an_error_names_the_learners_line() -> None:
    source = "def causal_mask(scores):\n    n_query = scores.shape[-2]\n    return scores + torch.ones(n_query, 77)\n"
    message = message_of(lambda: check(learner_module(source)["causal_mask"]))
    first, where = message.splitlines()[0], message.splitlines()[-1]
    assert first.startswith("causal_mask: your code raised RuntimeError: The size of tensor")
    assert where == "  at line 3 of your cell: return scores + torch.ones(n_query, 77)"


@pytest.mark.parametrize(
    "filename, place",
    [
        ("<ipython-input-12-1a2b>", "line 2 of your cell"),
        ("/tmp/ipykernel_4711/99.py", "line 2 of your cell"),
        ("02_transformer.ipynb code cell 7", "line 2 of 02_transformer.ipynb code cell 7"),
    ],
)
def test_cells_are_recognised_by_any_of_their_names(filename: str, place: str) -> None:
    namespace = learner_module("def greedy(logits):\n    return logits.argmin(dim=9)\n", filename)
    message = message_of(lambda: check(namespace["greedy"]))
    assert f"at {place}: return logits.argmin(dim=9)" in message
    assert "course_utils" not in message and "running.py" not in message


def test_a_helper_is_shown_with_the_line_that_called_it() -> None:
    source = "def pick(a):\n    return a.nothing\n\ndef greedy(logits):\n    return pick(logits)\n"
    lines = message_of(lambda: check(learner_module(source)["greedy"])).splitlines()
    assert lines[1:] == ["  at line 5 of your cell: return pick(logits)", "  at line 2 of your cell: return a.nothing"]


def test_below_helpers_that_call_each_other_the_exercises_own_line_is_shown() -> None:
    helpers = "def first(a):\n    return second(a)\n\ndef second(a):\n    return a.nothing\n\n"
    source = helpers + "def greedy(logits):\n    return first(logits)\n"
    lines = message_of(lambda: check(learner_module(source)["greedy"])).splitlines()
    assert lines[1:] == ["  at line 8 of your cell: return first(logits)", "  at line 5 of your cell: return a.nothing"]


def test_an_unknown_name_says_what_to_do() -> None:
    message = message_of(lambda: check(learner_module("def greedy(logits):\n    return einopsy(logits)\n")["greedy"]))
    assert "NameError" in message and "run the cell that defines `einopsy`" in message


def test_wrong_arguments_are_no_mystery() -> None:
    message = message_of(lambda: check(learner_module("def greedy(logits, k):\n    return logits\n")["greedy"]))
    assert "missing 1 required positional argument: 'k'" in message and "order of its arguments" in message


def test_recursion_does_not_flood_the_cell() -> None:
    message = message_of(lambda: check(learner_module("def greedy(logits):\n    return greedy(logits)\n")["greedy"]))
    assert "RecursionError" in message and len(message.splitlines()) <= 4


def test_a_fault_of_the_check_is_not_blamed_on_the_learner() -> None:
    def check_greedy(fn: Any) -> None:
        raise KeyError("ours")

    check_greedy.__code__ = check_greedy.__code__.replace(co_filename=running_module.__file__)
    with pytest.raises(KeyError) as caught:
        run_check(check_greedy, causal_mask)
    assert any("a fault in the check of greedy" in note for note in caught.value.__notes__)


def test_a_part_that_fails_its_own_check_is_named() -> None:
    source = """
import math
def gelu_new(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x))

from course_utils.hooks import HookPoint
class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.W_in, self.W_out = nn.Parameter(torch.randn(7, 11)), nn.Parameter(torch.randn(11, 7))
        self.b_in, self.b_out = nn.Parameter(torch.zeros(11)), nn.Parameter(torch.zeros(7))
        self.act = {"gelu_new": gelu_new, "relu": torch.relu}[cfg.act]
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()
    def forward(self, resid):
        post = self.hook_post(self.act(self.hook_pre(resid @ self.W_in + self.b_in)))
        return post @ self.W_out + self.b_out
"""
    message = message_of(lambda: check(learner_module(source)["MLP"]))
    assert message.splitlines()[-1] == "  MLP uses `gelu_new`, which does not pass its own check: start there."


# --------------------------------------------------------------------------------------------------- compare


EXPECTED = torch.arange(30.0).reshape(2, 3, 5)
AXES = "batch head key"


def compared(actual: Any, **known: Any) -> str:
    return message_of(lambda: compare("thing", actual, EXPECTED, AXES, **known))


def test_equal_tensors_pass() -> None:
    compare("thing", EXPECTED + 1e-6, EXPECTED, AXES)
    compare("thing", torch.tensor([INF, -INF]), torch.tensor([INF, -INF]), "key")
    compare("thing", torch.tensor(3), torch.tensor(3), "")
    compare("thing", nn.Parameter(EXPECTED), EXPECTED, AXES)


def test_none_and_other_types() -> None:
    assert compared(None) == "thing: returned None.\n  Next: end the function with `return ...`."
    assert "expected a Tensor, got a tuple" in compared((EXPECTED,))
    assert "expected a Tensor, got a list" in compared([1.0])


def test_shapes_in_axis_words() -> None:
    message = compared(EXPECTED.transpose(1, 2))
    assert "expected (batch=2, head=3, key=5)\n  got      (2, 5, 3)" in message
    assert "in another order: (batch, key, head)" in message
    assert "an axis is missing" in compared(EXPECTED[0])
    assert "print the shape" in compared(EXPECTED[..., None])


def test_dtype_and_device() -> None:
    assert "expected dtype float32, got float64" in compared(EXPECTED.double())
    assert "expected dtype float32, got int64" in compared(EXPECTED.long())
    assert "expected device cpu, got meta" in compared(EXPECTED.to("meta"))


def test_one_place_in_axis_words_and_the_count() -> None:
    wrong = EXPECTED.clone()
    wrong[1, 2, 3] = 7.5
    wrong[0, 2, 4] = -INF
    message = compared(wrong)
    assert message.splitlines()[:2] == [
        "thing: 2 of 30 values are wrong.",
        "  first at [batch=0, head=2, key=4]: expected 14, got -inf",
    ]
    assert "All of the wrong values are at head=2." in message and "Next: " in message


def test_patterns_of_all_wrong_values() -> None:
    assert "Every value is 2 times the right one." in message_of(
        lambda: compare("thing", 2 * EXPECTED + 2, EXPECTED + 1, AXES)
    )
    assert "Every value is off by the same 0.25." in compared(EXPECTED + 0.25)
    assert "moved by one along head." in compared(EXPECTED.roll(1, 1))
    assert "but key runs backwards." in compared(EXPECTED.flip(2))
    assert "The values at key=0 stand at every key." in compared(EXPECTED[..., :1].expand_as(EXPECTED))
    square = EXPECTED[0, :, :3]
    swapped = message_of(lambda: compare("thing", square.T, square, "query key"))
    assert "These are the right values with query and key swapped." in swapped
    assert "The sums over key are right; the values are not." in compared(EXPECTED[..., [1, 2, 4, 0, 3]])
    wrong = EXPECTED + torch.randn(EXPECTED.shape).abs() + 1
    wrong[..., 0] = EXPECTED[..., 0]
    assert "None of them is at key=0." in compared(wrong)


def test_nan_is_explained() -> None:
    assert "got nan" in compared(EXPECTED / 0 * 0) and "not a number" in compared(EXPECTED / 0 * 0)


def doubling(edit: Any) -> Any:
    """A check of doubling, which knows two mistakes; and an answer, edited, as a learner would hand it in."""

    @known_mistakes({"it is tripled.": lambda x: x * 3, "an axis is lost.": lambda x: x.sum(0)})
    def check_doubled(fn: Any) -> None:
        compare("doubled", fn(EXPECTED), EXPECTED * 2, AXES)

    return message_of(lambda: run_check(check_doubled, lambda x: edit(x)))


def test_a_cause_is_claimed_only_if_the_whole_answer_is_that_of_the_mistake() -> None:
    assert doubling(lambda x: x + x + x).splitlines()[-1] == "  This is what you get if it is tripled."
    nearly = EXPECTED * 3
    nearly[1, 2, 4] += 1
    message = doubling(lambda x: nearly)
    assert "This is what you get" not in message and "Next: " in message


def test_a_mistake_may_have_another_shape() -> None:
    assert "if an axis is lost." in doubling(lambda x: x[0] + x[1])


def test_the_first_of_two_mistakes_that_give_the_same_is_named() -> None:
    @known_mistakes({"it is negated.": lambda x: -x}, {"the sign is lost.": lambda x: 0 - x})
    def check_doubled(fn: Any) -> None:
        compare("doubled", fn(EXPECTED), EXPECTED * 2, AXES)

    assert "it is negated." in message_of(lambda: run_check(check_doubled, lambda x: -1 * x))
    with pytest.raises(ValueError, match=r"written twice: it is negated\."):
        known_mistakes({"it is negated.": None}, {"it is negated.": None})


def test_a_mistake_that_cannot_be_made_is_passed_over() -> None:
    @known_mistakes({"it crashes.": lambda x: 1 / 0, "it is negated.": lambda x: -x})
    def check_doubled(fn: Any) -> None:
        compare("doubled", fn(EXPECTED), EXPECTED * 2, AXES)

    assert "it is negated." in message_of(lambda: run_check(check_doubled, lambda x: -1 * x))


def test_a_check_runs_on_a_known_mistake_once_though_answers_are_refused_again_and_again() -> None:
    runs: list[str] = []

    @known_mistakes({"it is negated.": lambda x: runs.append("negated") or -x, "it is halved.": lambda x: x / 2})
    def check_doubled(fn: Any) -> None:
        compare("doubled", fn(EXPECTED), EXPECTED * 2, AXES)

    for _ in range(3):
        assert "it is halved." in message_of(lambda: run_check(check_doubled, lambda x: 0.5 * x))
        assert "This is what you get" not in message_of(lambda: run_check(check_doubled, lambda x: x - 1))
    assert runs == ["negated"]


def test_scalars_and_integers_are_shown_plainly() -> None:
    message = message_of(lambda: compare("thing", torch.tensor(4), torch.tensor(3), ""))
    assert message.splitlines()[:2] == ["thing: 1 of 1 values is wrong.", "  expected 3, got 4"]
    message = message_of(lambda: compare("thing", torch.tensor([1, 123456]), torch.tensor([1, 123457]), "batch"))
    assert "expected 123457, got 123456" in message


def test_changes_in_place_are_seen() -> None:
    scores = torch.zeros(2, 3)
    with unchanged("thing", scores=scores):
        scores + 1
    for change in (lambda: scores.add_(1), lambda: scores.resize_(3, 2), lambda: scores.fill_(torch.nan)):
        with pytest.raises(CheckFailed, match="it changed `scores` in place"), unchanged("thing", scores=scores):
            change()


@pytest.mark.parametrize(
    "symbol, inputs",
    [
        ("causal_mask", ("scores",)),
        ("attention_scores", ("q", "k")),
        ("gelu_new", ("x",)),
        ("greedy", ("logits",)),
        ("apply_temperature", ("logits", "temperature")),
        ("apply_frequency_penalty", ("logits", "tokens", "penalty")),
        ("keep_top_k", ("logits", "k")),
        ("keep_top_p", ("logits", "p", "min_tokens_to_keep=1")),
        ("sample", ("logits", "generator")),
    ],
)
@pytest.mark.parametrize(
    "result, words",
    [
        ("None", "returned None"),
        ("[1.0]", "got a list"),
        ("RIGHT.to(torch.float16)", "expected dtype"),
        ("RIGHT[None]", "wrong shape"),
        ("RIGHT + 0 * INPUT.add_(1).sum().to(RIGHT.dtype)", "it changed `INPUT` in place"),
    ],
)
def test_each_function_is_held_to_type_shape_dtype_and_inputs(
    symbol: str, inputs: tuple[str, ...], result: str, words: str
) -> None:
    names = [name.split("=")[0] for name in inputs]
    body = result.replace("RIGHT", "right").replace("INPUT", inputs[0])
    source = f"def {symbol}({', '.join(inputs)}):\n    right = REFERENCE({', '.join(names)})\n    return {body}\n"
    namespace = learner_module(source)
    namespace["REFERENCE"] = getattr(reference, symbol)
    message = message_of(lambda: check(namespace[symbol]))
    assert words.replace("INPUT", inputs[0]) in message


# ------------------------------------------------------------------------------------------------- in the notebook


def test_the_notebook_shows_the_message_and_no_frames(capsys: pytest.CaptureFixture[str]) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.run_cell("from course_utils.checks import check\nimport torch")
    shell.run_cell("def greedy(logits):\n    return logits.argmin(-1)\ncheck(greedy)")
    shell.run_cell("def greedy(logits):\n    raise NotImplementedError('greedy')\ncheck(greedy)")
    shell.run_cell("def greedy(logits):\n    return logits.argmax(-2, -3, -4)\ncheck(greedy)")
    out = "".join(capsys.readouterr())
    assert "This is what you get if the smallest logit is taken." in out
    assert "greedy: not written yet." in out
    assert "at line 2 of your cell: return logits.argmax(-2, -3, -4)" in out
    assert "Traceback" not in out and "running.py" not in out


def test_everything_promised_is_exported() -> None:
    assert all(hasattr(checks, name) for name in checks.__all__)
    assert issubclass(CheckFailed, AssertionError) and issubclass(NotWritten, NotImplementedError)
