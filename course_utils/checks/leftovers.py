"""What a run may leave behind in a model: nothing of one's own, everything of others, also after an exception."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from course_utils.checks.outcomes import CheckFailed, Stop
from course_utils.hooks import hook_points


def assert_stops(name: str, run: Callable[[], object], when: str) -> None:
    """Raise CheckFailed where the exception does not come out."""
    try:
        run()
    except Stop:
        return
    raise CheckFailed(
        f"{name}: {when} raised an exception, and it was swallowed.\n  Next: clean up in `finally`, without `except`."
    )


@contextmanager
def nothing_left_behind(name: str, model: nn.Module) -> Iterator[None]:
    """Hooks that others attached to the model's hook points stay, and no hook of the learner's does."""
    own = [point.add(lambda activation, hook: None) for point in hook_points(model).values()]
    before = {place: list(point._fns.values()) for place, point in hook_points(model).items()}
    yield
    for place, point in hook_points(model).items():
        now = list(point._fns.values())
        if len(now) + len(point._forward_hooks) + len(point._forward_pre_hooks) > len(before[place]):
            raise CheckFailed(
                f"{name}: a hook is left behind at `{place}`.\n"
                "  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away what they attached."
            )
        if now != before[place]:
            raise CheckFailed(
                f"{name}: hooks that others had attached at `{place}` are gone.\n"
                "  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away only their own."
            )
    for handle in own:
        handle.remove()
