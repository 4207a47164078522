"""What can go wrong by a user's hand, and what to do about it.

Every class here is an expected failure: the command line prints its message without a traceback and leaves
with `exit_code`. A message says what was found, what was expected, where, and what to do. Broken invariants of
our own are assertions instead and keep their traceback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar


class DeepStackError(Exception):
    """Base of all expected failures."""

    exit_code = 1
    retryable = False
    """Whether the same command may well succeed if it is started again: something died or hung, nobody was wrong."""
    rank: int | None = None
    """The rank that met it alone, such as a view that only it reads; None where all ranks say the same."""
    host: str | None = None
    """Where that rank runs; None where it is not known, or does not matter."""
    agreed: bool = False
    """Whether every rank raises this same error, so that one of them prints it and the others only leave."""


class ConfigError(DeepStackError):
    """The recipe or an override is wrong. Carries every problem found, not just the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]], dict[str, object]]:
        """Errors travel from ranks to their launcher, with the rank that met them."""
        return type(self), (self.problems,), self.__dict__


class LayoutError(ConfigError):
    """The parallel layout cannot work with this model, batch or number of ranks."""


class SlotError(ConfigError):
    """A stack is assigned to a layer that does not exist, or to no layer at all."""


class DataError(DeepStackError):
    """Images, records or tokenizer given by the user cannot be used."""

    exit_code = 3


class StoreError(DeepStackError):
    """A zarr store is missing, unfinished, damaged, or made for something else."""

    exit_code = 4


class CheckpointError(DeepStackError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 5


class ParityError(DeepStackError):
    """A comparison with reference data exceeded its tolerance."""

    exit_code = 6


class RankError(DeepStackError):
    """A worker process died, hung or raised; the message carries what it said."""

    exit_code = 7
    retryable = True


class HealthError(DeepStackError):
    """Training has gone wrong by itself: too many steps without a finite loss or gradient, too many lost samples."""

    exit_code = 8


class HangError(DeepStackError):
    """A step did not end in time; the message names the silent ranks and where every rank's stack is."""

    exit_code = 9
    retryable = True


class PreemptedError(DeepStackError):
    """The run was asked to stop and has saved what it had; the same command goes on from there."""

    exit_code = 75


class ClusterError(DeepStackError):
    """A Ray cluster cannot run the job: nodes, resources, versions, shared folders or links between nodes."""

    exit_code = 10


class LocationError(DeepStackError):
    """An object store or another remote service could not be reached, or failed."""

    exit_code = 11


class RunFolderError(DeepStackError):
    """A run folder cannot be used: another process works in it, or it cannot be written, or its disk is full."""

    exit_code = 12


Failure = TypeVar("Failure", bound=DeepStackError)


def of_all_ranks(error: Failure) -> Failure:
    """Mark an error that every rank raises alike, so that the command line prints it once.

    Args:
        error: What all ranks came to by an agreement: the same class with the same words.

    Returns:
        The same error, to be raised.
    """
    error.agreed = True
    return error


def agreed_error(found: Mapping[int, tuple[str, DeepStackError]], num_ranks: int) -> DeepStackError:
    """The one error that all ranks raise after some or all of them met one.

    Args:
        found: By rank its host and what it met; at least one entry.
        num_ranks: All ranks, those that met nothing included.

    Returns:
        The error of the lowest rank. It names rank and host, unless every rank said the same or the error was agreed
        on already.
    """
    rank = min(found)
    host, error = found[rank]
    everyone = len(found) == num_ranks and len({str(other) for _, other in found.values()}) == 1
    if not error.agreed and not everyone:
        error.rank, error.host = rank, host
    error.agreed = True
    return error
