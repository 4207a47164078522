"""The driver of a preprocessing job: plan, hand out parts, count, finish. The only file here that hands work to Ray.

Parts are Ray tasks that write in place and return about 1 KB; a window of them is kept in flight. `workers=0` does the
same parts in this process, without Ray. Killed at any moment, the same command goes on: parts in flight are done again.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.conversation import known_template
from megatron_deepstack.data.schema import ImageStatus
from megatron_deepstack.data.store import Store, read_attributes
from megatron_deepstack.data.tokenizer import Tokenizer
from megatron_deepstack.data.tokenizer_files import load_tokenizer
from megatron_deepstack.data.writer import write_json
from megatron_deepstack.errors import ConfigError, DataError
from orchestration.cluster import import_ray, ray_session
from orchestration.preprocess.finalise import (
    QUARANTINE_FILE,
    begin_store,
    clear_leftovers,
    finish_store,
    image_line,
    write_quarantine,
)
from orchestration.preprocess.inputs import Inputs, read_inputs
from orchestration.preprocess.ledger import Ledger, claim_folder, lock_store
from orchestration.preprocess.parts import ImagePart, Part, Plan, make_plan
from orchestration.preprocess.progress import JobProgress
from orchestration.preprocess.work import Job, PartDone, do_part, summarise

REPORT_FILE: Final = "report.json"
_SHOWN: Final = 10
"""Quarantined images listed in an error."""
_RETRIES: Final = 3
"""Times a part is done again after its worker died."""
_PARTS_PER_WORKER: Final = 100
"""Parts after which a worker process is replaced, so that leaks of decoders stay bounded."""
WORKER_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    # Image buffers of 1 MB would be mapped and faulted in anew for each image: kept, a part is 1.3 to 1.5 times faster.
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job did; also `report.json` in the store."""

    store: str
    images: int
    flagged: int
    quarantined: int
    views: int
    samples: int
    dropped: int
    tokens: int
    target_tokens: int
    images_done_before: int
    """Images that an earlier, interrupted job had finished."""
    seconds: float
    images_per_second: float
    """Of the images done now."""
    written_bytes: int


def preprocess(
    recipe: Recipe,
    output: str,
    *,
    records: str | None = None,
    images: str | None = None,
    tokenizer: str | None = None,
    workers: int | None = None,
    address: str | None = None,
) -> Summary:
    """Turn records and images into the store `output`; arguments take the place of the recipe's `data` fields.

    `workers`: worker processes of a local Ray (all CPUs if None), or 0 for none, in this process. `address`: an
    existing Ray cluster, whose nodes must see the image folder and `output`; `workers` then limits the parts in flight.

    Raises ConfigError, DataError (inputs; too many quarantined images), StoreError (another plan's store, another job
    at work, a full disk).
    """
    data = recipe.data
    model = load_tokenizer(_given(tokenizer or data.tokenizer, "tokenizer", "a SentencePiece .model file"))
    _check_vocabulary(recipe, model)
    sources = (records,) if records else data.records or ()
    _given(" ".join(sources), "records", "a LLaVA-style JSON file")
    inputs = read_inputs(sources, images or data.images, known_template(data.template))
    plan = make_plan(recipe, inputs, model)
    folder = _image_folder(images or data.images, inputs, plan)
    root = Path(output).absolute()
    with lock_store(root):
        claim_folder(root, plan)
        if _is_complete(root):
            clear_leftovers(root, plan)
            return _read_report(root)
        begin_store(root, plan)
        job = Job(root, folder, plan.hash, plan.processor, plan.pixels, plan.template, model)
        return _run(job, plan, recipe.data.max_quarantined, workers=workers, address=address)


def _run(job: Job, plan: Plan, max_quarantined: float, *, workers: int | None, address: str | None) -> Summary:
    ledger = Ledger(job.root, job.plan_hash)
    with JobProgress(len(plan.images), len(plan.records)) as progress:
        tally = _Tally(job.root, len(plan.images), max_quarantined)
        todo: list[Part] = []
        for part in plan.parts:
            record = ledger.read(part)
            if record is None:
                todo.append(part)
            else:
                done = summarise(part.name, record)
                progress.add(done, earlier=True)
                tally.add(done)
        before = progress.images
        if len(todo) < len(plan.parts):
            progress.say(f"preprocess: {len(plan.parts) - len(todo)} of {len(plan.parts)} parts are done already")
        executed = _do_here(job, todo) if workers == 0 else _do_with_ray(job, todo, workers, address, progress)
        with closing(executed):
            for done in executed:
                progress.add(done)
                tally.add(done)
        counts = finish_store(job.root, plan, lambda part: _must_read(ledger, part))
        return _write_report(job.root, counts, progress, before)


def _do_here(job: Job, parts: Sequence[Part]) -> Generator[PartDone, None, None]:
    for part in parts:
        yield do_part(job, part)


def _do_with_ray(
    job: Job, parts: Sequence[Part], workers: int | None, address: str | None, progress: JobProgress
) -> Generator[PartDone, None, None]:
    """Parts as Ray tasks, finished ones first. A window of two per worker keeps every worker busy."""
    if not parts:
        return
    ray = import_ray(address)
    with ray_session(workers, address, WORKER_ENVIRONMENT) as ours:
        progress.say(f"preprocess: Ray is up after {progress.seconds:.1f} s")
        progress.restart_clock()
        slots = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1, max_retries=_RETRIES, max_calls=_PARTS_PER_WORKER)(do_part)
        if not ours:
            task = task.options(runtime_env={"env_vars": WORKER_ENVIRONMENT})
        shared = ray.put(job)
        waiting = list(reversed(parts))
        running: dict[Any, Part] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * slots:
                    part = waiting.pop()
                    running[task.remote(shared, part)] = part
                finished, _ = ray.wait(list(running), num_returns=1)
                for reference in finished:
                    yield _result(reference, running.pop(reference))
        finally:
            for reference in running:
                ray.cancel(reference)


def _result(reference: Any, part: Part) -> PartDone:
    """A task's result; its own errors as they were raised, a worker that keeps dying as a DataError."""
    ray = import_ray(None)
    try:
        done: PartDone = ray.get(reference)
        return done
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        paths = ", ".join(part.paths[:_SHOWN]) + ", ..." if isinstance(part, ImagePart) else "records"
        raise DataError(
            f"part {part.name} ({paths}): its worker died {_RETRIES + 1} times: {error}. Everything else that was done "
            "is kept. If one of these files kills the decoder, take it out; then run the same command again."
        ) from error


class _Tally:
    """Counts quarantined images and stops the job when they are too many."""

    def __init__(self, root: Path, num_images: int, max_quarantined: float) -> None:
        self._root = root
        self._num_images = num_images
        self._limit = max_quarantined
        self._found: list[tuple[str, str]] = []

    def add(self, done: PartDone) -> None:
        """Count a part; raises DataError, with the list, once the limit of the whole job is passed."""
        self._found += done.quarantined
        if len(self._found) <= self._limit * self._num_images:
            return
        found = sorted(self._found)
        write_quarantine(self._root, (image_line(ImageStatus.QUARANTINED, path, reason) for path, reason in found))
        listed = "\n  ".join([f"{path}: {reason}" for path, reason in found[:_SHOWN]])
        raise DataError(
            f"{len(found)} of {self._num_images} images are quarantined, more than data.max_quarantined allows "
            f"({self._limit:g}):\n  {listed}\nThe whole list so far is {self._root / QUARANTINE_FILE}. Mend the images "
            "and preprocess into a new folder, or raise data.max_quarantined and run again: what is done is kept."
        )


def _given(value: str | None, name: str, what: str) -> str:
    if not value:
        raise ConfigError([f"data.{name} is not set: give {what} there or with --{name}"])
    return value


def _check_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> None:
    size = recipe.model.language.vocab_size
    if tokenizer.vocab_size > size:
        raise ConfigError([f"model.language.vocab_size is {size}, {tokenizer.source} has {tokenizer.vocab_size} ids"])


def _image_folder(images: str | None, inputs: Inputs, plan: Plan) -> Path:
    if not plan.images:
        return Path()
    folder = Path(_given(images, "images", f"the folder that the image paths in {inputs.files[0]} are relative to"))
    if not folder.is_dir():
        raise DataError(f"{folder}: no such image folder (data.images, or --images)")
    return folder.absolute()


def _is_complete(root: Path) -> bool:
    return (root / "zarr.json").is_file() and read_attributes(root).complete


def _must_read(ledger: Ledger, part: Part) -> dict[str, Any]:
    record = ledger.read(part)
    assert record is not None, f"{part.name} was done, but its record is gone"
    return record


def _write_report(root: Path, counts: dict[str, int], progress: JobProgress, before: int) -> Summary:
    summary = Summary(
        store=str(root),
        **counts,
        images_done_before=before,
        seconds=round(progress.seconds, 2),
        images_per_second=round(progress.images_now / max(progress.seconds, 1e-9), 2),
        written_bytes=progress.bytes_now,
    )
    write_json(root / REPORT_FILE, asdict(summary))
    return summary


def _read_report(root: Path) -> Summary:
    """The report of a finished store; made again from its attributes if the job was killed before writing it."""
    Store.open(root)
    path = root / REPORT_FILE
    if path.is_file():
        return Summary(**json.loads(path.read_bytes()))
    counts = read_attributes(root).counts
    return Summary(
        store=str(root),
        **counts,
        images_done_before=counts["images"],
        seconds=0.0,
        images_per_second=0.0,
        written_bytes=0,
    )
