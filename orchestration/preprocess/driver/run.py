"""The driver of a preprocessing job: plan, check, hand out parts, count, finish.

Parts are done in Ray tasks that write in place and return about 1 KB, or, with `workers=0`, in this process. Killed at
any moment, on any node, the same command goes on: parts in flight are done again.
"""

from __future__ import annotations

from contextlib import closing

from megatron_deepstack.config.choices import Template
from megatron_deepstack.config.schema import Recipe
from megatron_deepstack.data.images.video import VideoLimits
from megatron_deepstack.data.location import Location
from megatron_deepstack.data.text.conversation import known_template
from megatron_deepstack.data.text.tokenizer import Tokenizer
from megatron_deepstack.data.text.tokenizer_files import load_tokenizer
from megatron_deepstack.errors import ConfigError
from orchestration.preprocess.driver.lease import Lease, hold_lease
from orchestration.preprocess.driver.progress import JobProgress
from orchestration.preprocess.driver.signals import stop_on_signals
from orchestration.preprocess.driver.space import check_space
from orchestration.preprocess.driver.summary import Summary, is_complete, nothing_done, write_report
from orchestration.preprocess.driver.tally import Tally
from orchestration.preprocess.driver.tasks import do_here, do_with_ray
from orchestration.preprocess.part.finalise import begin_store, clear_leftovers, finish_store
from orchestration.preprocess.part.ledger import Ledger, claim_folder
from orchestration.preprocess.part.parts import Part, Plan, make_plan
from orchestration.preprocess.part.work import Job, summarise
from orchestration.preprocess.sources.inputs import Inputs, read_inputs
from orchestration.preprocess.sources.paths import check_paths
from orchestration.preprocess.sources.reading import Reading
from orchestration.preprocess.sources.videos import VideoRules


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
    """Turn records and images into a store; arguments take the place of the recipe's `data` fields.

    Args:
        recipe: The recipe.
        output: Path or URL of the store.
        records: File of records.
        images: Folder of images, or tar shards.
        tokenizer: File of the tokenizer.
        workers: Worker processes of a local Ray (as many as CPUs if None), or 0 to work in this process. With
            `address`, the number of parts that are in work at the same time.
        address: An existing Ray cluster, whose nodes must see the images and `output`.

    Returns:
        What was done.

    Raises:
        ConfigError: A field is missing, or no cluster answers at `address`.
        DataError: An input cannot be used, or too many images are quarantined.
        StoreError: `output` belongs to another plan or to another job at work, or the disk is full or too small.
        ClusterError: A node cannot do the job.
        LocationError: A bucket cannot be reached.
        PreemptedError: SIGTERM or SIGINT arrived.
    """
    data = recipe.data
    words = _given(tokenizer or data.tokenizer, "tokenizer", "a SentencePiece model or tokenizer.json")
    sources = (records,) if records else data.records or ()
    _given(" ".join(sources), "records", "JSON or JSON-lines files, or WebDataset tar shards")
    check_paths(sources, images or data.images, words)
    model = load_tokenizer(words)
    _check_vocabulary(recipe, model)
    say = JobProgress(0, 0).say
    inputs = read_inputs(
        sources,
        images or data.images,
        known_template(data.template),
        data.ignore_keys,
        watch=lambda num_files: Reading(num_files, say).watch,
        videos=_video_rules(recipe),
    )
    plan = make_plan(recipe, inputs, model)
    root = Location.parse(output).absolute()
    with stop_on_signals(), hold_lease(root) as lease:
        claim_folder(root, plan)
        if is_complete(root):
            clear_leftovers(root)
            return nothing_done(root, len(plan.parts))
        begin_store(root, plan)
        job = _job_of(root, plan, inputs, model, data.max_image_seconds)
        return _run(job, plan, data.max_quarantined, lease, workers=workers, address=address)


def _video_rules(recipe: Recipe) -> VideoRules | None:
    """How videos are read; None if the model or the template takes none."""
    model, data = recipe.model, recipe.data
    if not model.variant.traits.is_native or data.template is not Template.QWEN3_VL:
        return None
    limits = VideoLimits(data.video_fps, data.video_max_frames, data.video_min_pixels, data.video_max_pixels)
    return VideoRules(limits, model.vision.patch_size * model.vision.merge_size, data.max_image_pixels)


def _job_of(root: Location, plan: Plan, inputs: Inputs, model: Tokenizer, max_image_seconds: float) -> Job:
    return Job(
        root, inputs.image_folder, plan.hash, plan.processor, plan.pixels, plan.template, model, max_image_seconds
    )


def _run(
    job: Job, plan: Plan, max_quarantined: float, lease: Lease, *, workers: int | None, address: str | None
) -> Summary:
    ledger = Ledger(job.root, job.plan_hash, job.pixels)
    with JobProgress(len(plan.images), len(plan.records)) as progress:
        tally = Tally(job.root, len(plan.images), max_quarantined)
        todo = _find_todo(ledger, plan, progress, tally)
        check_space(job, todo)

        def tick() -> None:
            lease.check()
            progress.show()

        executed = (
            do_here(job, todo, tick) if workers == 0 else do_with_ray(job, todo, workers, address, progress, tick)
        )
        with closing(executed):
            for finished in executed:
                progress.add(finished.done, finished.node)
                tally.add(finished.done)
        counts = finish_store(ledger, plan)
        return write_report(job.root, counts, progress)


def _find_todo(ledger: Ledger, plan: Plan, progress: JobProgress, tally: Tally) -> list[Part]:
    """Parts without a record that can be trusted; the others are counted as they are."""
    todo: list[Part] = []
    for part, record in ledger.read_all(plan.parts):
        if record is None:
            todo.append(part)
        else:
            done = summarise(part.name, record)
            progress.add_earlier(done)
            tally.add(done)
    if len(todo) < len(plan.parts):
        progress.say(f"preprocess: {len(plan.parts) - len(todo)} of {len(plan.parts)} parts are done already")
    return todo


def _given(value: str | None, name: str, what: str) -> str:
    if not value:
        raise ConfigError([f"data.{name} is not set: give {what} there, or as data.{name}=... behind the recipe"])
    return value


def _check_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> None:
    size = recipe.model.language.vocab_size
    if tokenizer.vocab_size > size:
        raise ConfigError(
            [
                f"model.language.vocab_size is {size}, {tokenizer.source} has {tokenizer.vocab_size} ids, so that "
                f"{tokenizer.names_from(size)} would have no row; set the number of rows that the weights have"
            ]
        )
