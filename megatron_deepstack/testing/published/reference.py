"""`check-reference`: published numbers against this system, under any layout, on ranks it starts itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_deepstack.config.schema import ParallelConfig
from megatron_deepstack.errors import DataError, ParityError
from megatron_deepstack.planning.slots import decoder_slots, stage_chunks
from megatron_deepstack.testing.published.case_result import (
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    LOSS_TOLERANCE,
    CaseResult,
)
from megatron_deepstack.testing.published.reference_case import ReferenceCase, load_case
from megatron_deepstack.testing.published.through_export import ExportResult, through_export
from megatron_deepstack.testing.ranks import RankPool


def check_cases(
    files: Sequence[str | Path],
    parallel: ParallelConfig,
    *,
    data_parallel: int = 1,
    micro_batch_size: int = 1,
    exported: bool = False,
) -> Iterator[CaseResult | ExportResult]:
    """Compare each case under a layout. Starts its own ranks, and ends them.

    Args:
        files: The cases, NAME.safetensors with NAME.json beside it.
        parallel: The layout.
        data_parallel: Number of replicas.
        micro_batch_size: Samples of a micro-batch.
        exported: Write each case in both layouts and read it back first; what comes back is compared.

    Yields:
        The result of each case as it comes; of an exported one first what transformers makes of it.

    Raises:
        ParityError: After the last result, if a case exceeded a tolerance.
        LayoutError, SlotError: The layout does not fit a case's model; raised before any rank starts.
        DataError: A file cannot be read, or there is none.
    """
    cases = [load_case(path) for path in files]
    if not cases:
        raise DataError("check-reference: no case given; name NAME.safetensors files")
    for case in cases:
        decoder_slots(case.model)
        stage_chunks(case.model.language.num_layers, parallel)
    failed, asked = set(), list(cases)
    for number, case in enumerate(cases if exported else ()):
        asked[number], result = through_export(case)
        failed |= set() if result.passed else {case.name}
        yield result
    num_ranks = parallel.tensor * parallel.context * parallel.pipeline * data_parallel
    with RankPool(num_ranks) as pool:
        for case in asked:
            computed = check_case(pool, case, parallel, micro_batch_size=micro_batch_size)
            failed |= set() if computed.passed else {case.name}
            yield computed
    if failed:
        raise ParityError(
            f"{len(failed)} of {len(cases)} cases exceed the tolerances (logits {LOGITS_TOLERANCE:g}, loss "
            f"{LOSS_TOLERANCE:g}, gradients {GRADIENT_TOLERANCE:g}): {', '.join(sorted(failed))}"
        )


def check_case(pool: RankPool, case: ReferenceCase, parallel: ParallelConfig, micro_batch_size: int = 1) -> CaseResult:
    """Compare one case on ranks that are there already.

    Args:
        pool: The ranks; their number over those of a replica is the number of replicas.
        case: The case.
        parallel: The layout.
        micro_batch_size: Samples of a micro-batch.

    Raises:
        RankError: A rank raised, died or hung.
    """
    from megatron_deepstack.testing.published.reference_rank import check_on_rank

    result: CaseResult = pool.run(check_on_rank, case, parallel, micro_batch_size)[0]
    return result
