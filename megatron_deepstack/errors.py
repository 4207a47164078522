"""Expected failures: what can go wrong when somebody uses the package, and what to do about it.

The command line prints the message of such an error without a traceback and exits with `exit_code`. A message says what
was found, what was expected, where, and what to do. A broken invariant of the code itself is an assertion instead, and
keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar


class DeepStackError(Exception):
    """Base class of all expected failures."""

    exit_code = 1
    """Exit code of the command."""
    retryable = False
    """Whether the same command may succeed if it is started again, as after a process died or hung."""
    rank: int | None = None
    """The only rank that met the error, such as one that cannot read a view; None if all ranks met the same error."""
    host: str | None = None
    """Name of the machine on which that rank runs; None if it is not known or does not matter."""
    agreed: bool = False
    """Whether every rank raises this same error, so that one of them prints it and the others only exit."""


class ConfigError(DeepStackError):
    """The recipe or an override is wrong. The error holds every problem that was found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        """`problems` are the messages, one for each problem."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]], dict[str, object]]:
        """Support pickling, since ranks send errors to their launcher; the rank that met the error is kept."""
        return type(self), (self.problems,), self.__dict__


class LayoutError(ConfigError):
    """The parallel layout cannot work with this model, batch or number of ranks."""


class SlotError(ConfigError):
    """A stack is assigned to a layer that does not exist, or to no layer at all."""


class DataError(DeepStackError):
    """The images, the records or the tokenizer cannot be used."""

    exit_code = 3


class StoreError(DeepStackError):
    """A zarr store is missing, unfinished, damaged, or made for something else."""

    exit_code = 4


class CacheError(StoreError):
    """Copies of a remote store cannot be kept on this machine. No sample is to blame, so none is left out for it."""


class CheckpointError(DeepStackError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 5


class ParityError(DeepStackError):
    """A comparison with reference data exceeded its tolerance."""

    exit_code = 6


class RankError(DeepStackError):
    """A worker process died, hung or raised an exception; the message repeats what the process reported."""

    exit_code = 7
    retryable = True


class HealthError(DeepStackError):
    """Training has failed numerically or in its data: too many steps without a finite loss or gradient, or too many
    unreadable samples."""

    exit_code = 8


class HangError(DeepStackError):
    """A step did not end in time; the message names the ranks that do not respond and the files with all stacks."""

    exit_code = 9
    retryable = True


class PreemptedError(DeepStackError):
    """The run was asked to stop and has saved its state; the same command continues from there."""

    exit_code = 75


class ClusterError(DeepStackError):
    """A Ray cluster cannot run the job: nodes, resources, versions, shared folders or links between nodes."""

    exit_code = 10


class LocationError(DeepStackError):
    """An object store or another remote service could not be reached, or failed."""

    exit_code = 11


class RunFolderError(DeepStackError):
    """A run folder cannot be used: another process uses it, or it cannot be written, or its disk is full."""

    exit_code = 12


Failure = TypeVar("Failure", bound=DeepStackError)


def of_all_ranks(error: Failure) -> Failure:
    """Mark an error that every rank raises, so that the command line prints it once.

    Args:
        error: The error on which all ranks have agreed, with the same class and the same message.

    Returns:
        The same error, to be raised.
    """
    error.agreed = True
    return error


def agreed_error(found: Mapping[int, tuple[str, DeepStackError]], num_ranks: int) -> DeepStackError:
    """Choose the error that all ranks raise after some or all of them met one.

    Args:
        found: Host and error by rank, for each rank that met an error; at least one entry.
        num_ranks: Number of all ranks, including those that met no error.

    Returns:
        The error of the lowest rank. It names that rank and its host, unless every rank met an error with the same
        message or the error was already agreed on.
    """
    rank = min(found)
    host, error = found[rank]
    everyone = len(found) == num_ranks and len({str(other) for _, other in found.values()}) == 1
    if not error.agreed and not everyone:
        error.rank, error.host = rank, host
    error.agreed = True
    return error
