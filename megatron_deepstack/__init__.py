"""Distributed, pipeline-parallel training of DeepStack multimodal language models.

DeepStack (arXiv 2406.04334) shows a decoder more visual tokens without a longer sequence: the tokens of an image's
crops are added to the hidden states before several decoder layers. The one idea of this package: these rows reach the
ranks that add them before the pipeline starts, so Megatron-Core's schedules run unchanged.

Packages stand on floors and import only from lower floors; docs/architecture.md follows one sample through all of them:

    errors                       what can go wrong, and what the user can do
    config, platform             what is asked, and what the machine offers
    planning, parallel           arithmetic before any process starts, and the groups of ranks
    data, routing                from stores to batches, and from rows to ranks
    model                        vision tower, projector, stacks, decoder
    step                         one step of training
    checkpoint, convert          saving and resuming, and the names of other programs
    training, inference, report  a run, its answers, and pages about it
    run_folder, scores, storekeeping, demo, testing
                                 what other packages and tests share
    cli                          the command line

Begin with `config.schema`, then `planning.exchange.rows`, then `step.train_step`.
"""

__version__ = "0.1.0"
