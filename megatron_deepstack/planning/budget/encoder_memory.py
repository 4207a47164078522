"""The memory of tower and projector on a rank: what waits for their backward, and what exists only for a moment.

A tower that learns keeps the inputs of its operators, layer by layer, of all views or of as many as the layout allows
at a time. A frozen one keeps its features alone; one with adapters keeps their inputs and what gradients need on their
way. What the projector keeps depends on its form: two linears, mergers of neighbouring patches, or window Q-Formers.
Formulas count elements; a test compares the sums with what ranks allocate.

Legend: C width of the tower, f its MLP, H width of the decoder, M patches of a view, Q queries of a view.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_deepstack.config.choices import EncoderPlacement, LoraTarget, Part
from megatron_deepstack.config.schema import LoraConfig, ModelConfig, Recipe, VisionConfig
from megatron_deepstack.config.sizes import tokens_per_view
from megatron_deepstack.config.traits.towers import tower_of
from megatron_deepstack.config.traits.variants import StackSource
from megatron_deepstack.planning.budget.cost import EncoderWork
from megatron_deepstack.planning.budget.encoder_views import kept_at_once, kept_of_mlp
from megatron_deepstack.planning.budget.load import StepLoad
from megatron_deepstack.planning.budget.received_rows import num_windows
from megatron_deepstack.planning.exchange.vit_stacks import view_layers

_INDEX_BYTES = 4 * 8
"""Of a row: where it is sent from and stored, and where its gradient is sent from and arrives."""


def waiting(recipe: Recipe, load: StepLoad, stage: int, element: int) -> int:
    """Return what tower and projector keep from their forward to their backward pass.

    Args:
        recipe: The recipe.
        load: The replica's micro-batches.
        stage: Number of the pipeline stage.
        element: Bytes of an entry of an activation.

    Returns:
        Bytes on the rank that encodes most.
    """
    parallel, trainable, model = recipe.parallel, recipe.train.trainable, recipe.model
    work, given = load.share, load.share
    if parallel.encoder_placement is EncoderPlacement.INLINE:
        if stage > 0:
            return 0
        work = _most_work(load.micro_batches.work, min(parallel.pipeline, len(load.micro_batches)))
        given = EncoderWork.sum_of(load.micro_batches.work)
    pixels = given.patches * 3 * model.vision.patch_size**2
    if not tower_of(model.vision).is_native:
        pixels = given.views * 3 * model.vision.image_size**2
    kept = _features(model, work)
    learns = Part.PROJECTOR in trainable
    if learns or Part.VISION in trainable:
        kept += projector_elements(model, work, learns=learns, rank=recipe.lora.rank * recipe.lora.projector)
    if Part.VISION in trainable:
        alive = kept_at_once(model, parallel, element).share(work.views, work.patches)
        kept += (alive == 1) * tower_elements(model, work, recipe.lora)  # else they are made again after the schedule
    return int(kept * element + pixels)


def _most_work(work: Sequence[EncoderWork], number: int) -> EncoderWork:
    """Return the largest sum over so many neighbouring micro-batches."""
    found = (EncoderWork.sum_of(work[first : first + number]) for first in range(len(work) - number + 1))
    return max(found, key=lambda one: one.patches)


def before_schedule(recipe: Recipe, load: StepLoad, element: int, received: int, kept: int) -> int:
    """Return what exists only while views are encoded and rows sent, before any decoder layer has run.

    Args:
        recipe: The recipe.
        load: The replica's micro-batches.
        element: Bytes of an entry of an activation.
        received: Bytes of the rows that the rank receives.
        kept: Bytes of those that stay on the device as they arrive: all, or none where they rest on the host.

    Returns:
        The widest operator of the tower; or the rows that stay, all rows that the rank makes and, of one window of
        columns, what it sends and what it receives before and after it is put in order, with the index of the rows.
    """
    if recipe.parallel.encoder_placement is EncoderPlacement.INLINE:
        return 0
    vision, work = recipe.model.vision, load.share
    alive = kept_at_once(recipe.model, recipe.parallel, element).share(work.views, work.patches)
    widest = alive * work.patches * (kept_of_mlp(vision) * vision.ffn_hidden_size + 3 * vision.hidden_size)
    hidden = recipe.model.language.hidden_size
    rows = work.units * sum(load.rows_per_unit.values())
    made, replica_rows = rows * hidden * element, int(load.units * sum(load.rows_per_unit.values()))
    window = (made + 2 * received) / num_windows(replica_rows, hidden, element)
    return int(max(widest * element, kept + made + window + rows * _INDEX_BYTES))


def after_schedule(recipe: Recipe, load: StepLoad, element: int) -> int:
    """Return what exists beside kept activations while the encoder's gradients are computed, after the schedule.

    Args:
        recipe: The recipe.
        load: The replica's micro-batches.
        element: Bytes of an entry of an activation.

    Returns:
        Bytes.
    """
    trainable, model, work = recipe.train.trainable, recipe.model, load.share
    if recipe.parallel.encoder_placement is EncoderPlacement.INLINE or not work.units:
        return 0
    vision, hidden = model.vision, model.language.hidden_size
    learns, below = Part.PROJECTOR in trainable, Part.VISION in trainable
    alive = kept_at_once(recipe.model, recipe.parallel, element).share(work.views, work.patches)
    if tower_of(vision).is_native:
        block = vision.hidden_size * vision.merge_size**2
        found = work.units * ((1 + len(vision.taps)) * hidden + 2 * block) * (learns or below)
        tower = work.patches * (2 * vision.ffn_hidden_size + (3 + len(vision.taps)) * vision.hidden_size)
        return int(_of_both(recipe, work, found, tower * below, alive) * element)
    if model.variant.traits.stack_source is StackSource.TAPS:
        rows = work.units * sum(load.rows_per_unit.values()) * hidden
        found = (rows + 2 * work.patches * vision.hidden_size) * (learns or below)
    else:
        found = 2.0 * work.units * tokens_per_view(vision) * hidden * learns
    tower = 2.0 * work.units * tokens_per_view(vision) * (vision.ffn_hidden_size + vision.hidden_size)
    return int(_of_both(recipe, work, found, tower * below, alive) * element)


def _of_both(recipe: Recipe, work: EncoderWork, projector: float, tower: float, alive: float) -> float:
    """Return elements of the backward passes of projector and tower, whose graph may be made again in parts."""
    if not tower:
        return projector
    model, lora = recipe.model, recipe.lora
    learns = Part.PROJECTOR in recipe.train.trainable
    freed = projector_elements(model, work, learns=learns, rank=lora.rank * lora.projector)  # before the tower's begins
    if alive == 1:
        return max(projector, tower - freed)
    again = alive * (tower_elements(model, work, lora) + tower)
    return _features(model, work) + max(projector, again - freed)  # the features' gradients wait for their part


def _features(model: ModelConfig, work: EncoderWork) -> float:
    """Count the elements of the tower's features."""
    vision = model.vision
    if tower_of(vision).is_native:
        return work.patches * (1 + len(vision.taps)) * vision.hidden_size
    return work.units * tokens_per_view(vision) * max(len(set(vision.taps)), 1) * vision.hidden_size


def projector_elements(model: ModelConfig, work: EncoderWork, *, learns: bool, rank: int = 0) -> float:
    """Count the elements that the projector keeps for its backward pass.

    Args:
        model: The recipe's model.
        work: What is encoded.
        learns: Whether its own parameters learn; a frozen one needs no inputs of its linears.
        rank: Of its adapters, each of which keeps its narrow product; 0 without. Counted of two linears alone: beside
            mergers and Q-Formers it is too little to matter.

    Returns:
        The number, without the tower's features.
    """
    vision = model.vision
    if tower_of(vision).is_native:
        block, taps = vision.hidden_size * vision.merge_size**2, len(vision.taps)
        return work.units * block * ((3 + 4 * taps) if learns else (1 + 2 * taps))
    if model.variant.traits.stack_source is StackSource.TAPS:
        return work.views * len(vision.taps) * _qformer(model)
    hidden = model.language.hidden_size  # into the activation and, if the second linear needs its input, out of it
    return work.units * tokens_per_view(vision) * ((1 + learns) * hidden + 2 * rank)


def _qformer(model: ModelConfig) -> float:
    """Count the elements that one Q-Former keeps of one view."""
    qformer, c, patches = model.qformer, model.vision.hidden_size, tokens_per_view(model.vision)
    queries = patches // qformer.window_side**2 * qformer.query_side**2
    crossing = -(-qformer.num_layers // qformer.cross_attention_interval)
    layers = qformer.num_layers * queries * (8 * c + 2 * qformer.ffn_hidden_size)
    return patches * c + 2 * queries * c + layers + crossing * (4 * queries + 2 * patches) * c


def tower_elements(model: ModelConfig, work: EncoderWork, lora: LoraConfig) -> float:
    """Count the elements that the tower keeps for its backward pass, where it or its adapters learn.

    Args:
        model: The recipe's model.
        work: What is encoded.
        lora: Adapters; a tower that has some is frozen itself, so linears without one need not keep their inputs, and
            its first layer keeps nothing of what comes before its first adapter.

    Returns:
        The number.
    """
    vision, width = model.vision, model.vision.hidden_size
    if tower_of(vision).is_native:
        passed, entering = work.patches * vision.num_layers, work.patches
        around = work.patches * (width + 3 * vision.temporal_patch_size * vision.patch_size**2)
    else:
        tokens = tokens_per_view(vision) + tower_of(vision).num_leading_tokens
        passed, entering = tokens * view_layers(model, work.views, work.units), tokens * work.views
        around = 2 * tokens * work.views * width + work.views * 3 * vision.image_size**2
    if not (lora.rank and lora.vision_targets):
        return passed * _tower_layer(vision, tuple(LoraTarget), 0) + around
    layer = _tower_layer(vision, lora.vision_targets, lora.rank)
    first = _tower_layer(vision, lora.vision_targets, lora.rank, flows=False)
    return (passed - entering) * layer + entering * first


def _tower_layer(vision: VisionConfig, targets: Collection[LoraTarget], rank: int, *, flows: bool = True) -> float:
    """Count the elements that a layer keeps of one token.

    Args:
        vision: The tower.
        targets: The linears that need their inputs: whose weights or adapters learn.
        rank: Of the adapters, each of which keeps its narrow product; 0 without.
        flows: Whether anything before the layer learns, so that its input has a gradient.
    """
    c, f, native = vision.hidden_size, vision.ffn_hidden_size, tower_of(vision).is_native
    norm, attention = c + 2, 4 * c + vision.num_heads  # queries, keys, values, result; sums of exponentials
    if native:  # rotation copies queries and keys
        attention += 2 * c + 4 * c // vision.num_heads
    kept = norm * flows
    kept += (c + rank) * (LoraTarget.QKV in targets)
    flows = flows or LoraTarget.QKV in targets
    kept += attention * flows
    copied = native or not flows  # a row of several frames is put together again; a view's result is there already
    kept += (c * copied + rank) * (LoraTarget.ATTENTION_OUTPUT in targets)
    flows = flows or LoraTarget.ATTENTION_OUTPUT in targets
    kept += norm * flows + (c + rank) * (LoraTarget.MLP_IN in targets)
    flows = flows or LoraTarget.MLP_IN in targets
    kept += (kept_of_mlp(vision) - 1) * f * flows
    return kept + (f + rank) * (LoraTarget.MLP_OUT in targets)
