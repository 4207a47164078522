"""The verbs that compare: with numbers of the published implementation, and with transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from megatron_deepstack.cli.app import app, say
from megatron_deepstack.config.choices import EncoderPlacement, Recompute
from megatron_deepstack.config.schema import ParallelConfig


@app.command(name="check-reference")
def check_reference(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Cases, NAME.safetensors.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Chunks per stage.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Context-parallel ranks.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Replicas.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="With --tp above 1.")] = False,
    recompute: Annotated[Recompute, typer.Option(help="Activation recomputation.")] = Recompute.NONE,
    encoder_placement: Annotated[
        EncoderPlacement, typer.Option(help="Where ViT and projector run.")
    ] = EncoderPlacement.SPREAD,
    exported: Annotated[
        bool,
        typer.Option("--through-export", help="Write each case in both layouts, read it back, and compare that."),
    ] = False,
    crops: Annotated[Path | None, typer.Option(help="Folder with crops.npz; compares the cut of --photos.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of the photos that --crops was made from.")] = None,
    conversations: Annotated[Path | None, typer.Option(help="conversations.json; needs --tokenizer.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece model that --conversations used.")] = None,
) -> None:
    """Compare with numbers of the published implementation; fails beyond the tolerances. Starts its own ranks."""
    _together(crops=crops, photos=photos)
    _together(conversations=conversations, tokenizer=tokenizer)
    if not (files or crops or conversations):
        raise typer.BadParameter("nothing to compare: give FILE..., --crops and --photos, or --conversations")
    if exported and not files:
        raise typer.BadParameter("--through-export: cases go through an export; name FILE...")
    if files:
        from megatron_deepstack.testing.published.reference import check_cases

        layout = ParallelConfig(
            tensor=tp,
            pipeline=pp,
            virtual_pipeline=vpp,
            context=cp,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            encoder_placement=encoder_placement,
        )
        _say_all(check_cases(files, layout, data_parallel=dp, exported=exported))
    if crops and photos:
        from megatron_deepstack.testing.published.reference_data import check_crops

        _say_all(check_crops(crops, photos))
    if conversations and tokenizer:
        from megatron_deepstack.testing.published.reference_data import check_conversations

        _say_all(check_conversations(conversations, tokenizer))


@app.command(name="check-parity")
def check_parity(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Hugging Face folder: config.json and weights.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Chunks per stage.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Context-parallel ranks.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Ranks that share experts.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Replicas.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="With --tp above 1.")] = False,
    recompute: Annotated[Recompute, typer.Option(help="Activation recomputation.")] = Recompute.NONE,
    encoder_placement: Annotated[
        EncoderPlacement, typer.Option(help="Where tower and mergers run.")
    ] = EncoderPlacement.SPREAD,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Samples of a micro-batch.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the drawn samples.")] = 0,
) -> None:
    """Compare a Hugging Face folder with transformers on drawn inputs, in float32; fails beyond the tolerances."""
    from megatron_deepstack.testing.parity.check import check_folder

    layout = ParallelConfig(
        tensor=tp,
        pipeline=pp,
        virtual_pipeline=vpp,
        context=cp,
        expert=ep,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        encoder_placement=encoder_placement,
    )
    _say_all(check_folder(folder, layout, data_parallel=dp, micro_batch_size=micro_batch_size, seed=seed))


def _together(**options: Path | None) -> None:
    """Refuse one of two options without the other."""
    absent = [f"--{name}" for name, value in options.items() if value is None]
    if len(absent) == 1:
        raise typer.BadParameter(
            f"{absent[0]} is needed too: {' and '.join(f'--{name}' for name in options)} go together"
        )


def _say_all(results: Iterable[object]) -> None:
    for result in results:
        say(result)
