"""Every mistake attnopt can name. Each message says what is wrong and, after it, what to do."""

from __future__ import annotations


class AttnoptError(Exception):
    """Base of all errors a user can cause or mend; the command line prints it without a traceback.

    exit_code: 2 where what was given is at fault (an option, a text, a model, a profile, a plan), 1 where the task
    could not be done with it.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}\n  {remedy}" if remedy else problem)


class OptionError(AttnoptError):
    """An option of the backend or of the command line that does not exist or has a wrong value."""

    exit_code = 2


class PlanError(AttnoptError):
    """A plan that cannot be read, or that belongs to another model."""

    exit_code = 2


class ProfileError(AttnoptError):
    """A profile that cannot be read, that belongs to another model, or that lacks what is needed of it."""

    exit_code = 2


class FittedError(AttnoptError):
    """A file of fitted feature maps that cannot be read, that belongs to another model, or that lacks what is needed of
    it."""

    exit_code = 2


class BudgetError(AttnoptError):
    """No plan keeps to the budget that was asked for."""


class TextError(AttnoptError):
    """Text to measure on that is missing, empty or too short, or of which nothing counts."""

    exit_code = 2


class ModelError(AttnoptError):
    """A model that cannot be found or loaded, or that is no language model."""

    exit_code = 2


class DependencyError(AttnoptError):
    """An optional package is needed here and is not installed."""


class VerificationError(AttnoptError):
    """A rewrite whose result differs from the original on random inputs."""


class CacheFull(AttnoptError):
    """More tokens than the length a cache was made for. Nothing of the call that raises it was written."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, without what follows; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
