"""What is wrong where before a run starts, and what a rank and a checkpoint need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from launch_cases import demand, node

from megatron_deepstack.config.choices import Part, Precision
from megatron_deepstack.config.schema import LoraConfig, ParallelConfig, Recipe
from megatron_deepstack.errors import (
    ClusterError,
)
from megatron_deepstack.planning.budget.footprint import checkpoint_bytes, rank_bytes
from megatron_deepstack.planning.budget.parameters import model_parameters
from megatron_deepstack.platform.network import interface_of
from orchestration.launch.before import probe
from orchestration.launch.before.checks import Check, Link, failures, in_words, judge
from orchestration.launch.before.placement import place
from orchestration.launch.before.preflight import require_sound
from orchestration.launch.before.probe import Fact, NodeFacts


def facts(number: int, **changes: object) -> NodeFacts:
    settings: dict[str, object] = {
        "address": f"10.0.0.{number}",
        "host": f"host{number}",
        "versions": {"python": "3.11.7", "torch": "2.13"},
        "gpu_memories": (80 << 30,) * 8,
        "interface": "eth0",
        "folder": Fact(value="/home"),
        "run_dir": Fact(value=f"token{number}"),
        "free_bytes": 1 << 40,
        "stores": {"/s": Fact(value="plan")},
        "files": {"/t": Fact(value="9 bytes")},
    }
    return NodeFacts(**{**settings, **changes})  # type: ignore[arg-type]


class TestChecks:
    def judged(
        self,
        recipe: Recipe,
        second: NodeFacts,
        seen: tuple[str, ...] = ("token1", "token2"),
        link: Link | None = None,
    ) -> tuple[Check, ...]:
        seats = place(demand(2, pipeline=2, cpus=40), [node(1), node(2)])
        everything = {"10.0.0.1": ("token1", "token2"), "10.0.0.2": seen}
        links = [link or Link("10.0.0.1", "10.0.0.2", 0.001)]
        return judge(recipe, seats, [facts(1), second], everything, links, uses_gpus=True)

    def test_all_is_well(self, recipe: Recipe) -> None:
        findings = self.judged(recipe, facts(2))
        assert failures(findings) == ()
        require_sound(findings)
        assert any(one.check == "all-reduce" and "1.0 ms" in one.found for one in findings)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"versions": {"python": "3.11.7", "torch": "2.12"}}, "version of torch: found 2.12, expected 2.13"),
            ({"gpu_memories": ()}, "GPUs: found 0 seen by torch, expected 1"),
            ({"gpu_memories": (1 << 10,)}, "GPU memory: found 0.0 MiB, expected"),
            ({"interface": None}, "network interface: found none, expected one that holds 10.0.0.2"),
            ({"free_bytes": 1 << 10}, "disk: found 0.0 MiB free, expected"),
            ({"stores": {"/s": Fact(fault="no such folder")}}, "store /s: found no such folder, expected a finished"),
            ({"stores": {"/s": Fact(value="other")}}, "store /s: found plan other, expected plan plan"),
            ({"files": {"/t": Fact(fault="[Errno 13]")}}, "/t: found [Errno 13], expected readable here"),
            ({"run_dir": Fact(fault="read-only")}, "run folder: found read-only, expected writable here"),
        ],
    )
    def test_what_is_wrong_where(self, recipe: Recipe, changes: dict[str, object], words: str) -> None:
        findings = self.judged(recipe, facts(2, **changes))
        assert f"10.0.0.2: {words}" in in_words(findings)
        with pytest.raises(ClusterError, match="checks failed, so nothing was started"):
            require_sound(findings)

    def test_a_folder_of_that_name_on_each_node_is_not_one_folder(self, recipe: Recipe) -> None:
        words = in_words(self.judged(recipe, facts(2), seen=("token2",)))
        assert "10.0.0.2: run folder: found the files of 10.0.0.1 are not there, expected one folder" in words

    def test_a_link_without_a_way_through(self, recipe: Recipe) -> None:
        words = in_words(self.judged(recipe, facts(2), link=Link("10.0.0.1", "10.0.0.2", None, "timed out")))
        assert "10.0.0.1 - 10.0.0.2: all-reduce: found timed out, expected a way through" in words

    def test_relative_paths_need_the_drivers_folder(self, recipe: Recipe) -> None:
        gone = facts(2, folder=Fact(fault="no such folder"))
        assert failures(self.judged(recipe, gone)) == ()
        relative = replace(recipe, run_dir="runs/x")
        assert "10.0.0.2: working folder: found no such folder" in in_words(self.judged(relative, gone))

    def test_all_problems_at_once(self, recipe: Recipe) -> None:
        found = self.judged(recipe, facts(2, interface=None, free_bytes=0, files={"/t": Fact(fault="gone")}))
        assert len(failures(found)) == 3

    def test_facts_of_this_machine(self, recipe: Recipe, tmp_path: Path) -> None:
        (tmp_path / "t").write_text("x")
        here = replace(recipe, data=replace(recipe.data, store=str(tmp_path / "none"), tokenizer=str(tmp_path / "t")))
        found = probe.gather(probe.Questions(here, str(Path.cwd())), "127.0.0.1", "me")
        assert found.interface == "lo"
        assert found.files[str(tmp_path / "t")] == Fact(value="1 bytes")
        assert "none" in found.stores[str(tmp_path / "none")].fault
        assert found.run_dir == Fact(value="me")
        assert probe.tokens_seen(probe.Questions(here, ".")) == ("me",)
        probe.forget_tokens(Path(here.run_dir))
        assert probe.tokens_seen(probe.Questions(here, ".")) == ()
        assert found.free_bytes > 0

    def test_interfaces(self) -> None:
        assert interface_of("127.0.0.3") == "lo"
        assert interface_of("203.0.113.7") is None


class TestFootprint:
    def test_published_sizes(self) -> None:
        """Vicuna-7B has 6.74e9 parameters, CLIP ViT-L/14-336 0.304e9."""
        counted = model_parameters(Recipe().model)
        assert counted[Part.LANGUAGE] == pytest.approx(6.738e9, rel=1e-3)
        assert counted[Part.VISION] == pytest.approx(0.3035e9, rel=0.01)

    def test_a_checkpoint_in_bf16_takes_14_bytes_a_learned_parameter(self) -> None:
        recipe = Recipe()
        counted = model_parameters(recipe.model)
        learned = counted[Part.LANGUAGE] + counted[Part.PROJECTOR]
        assert checkpoint_bytes(recipe) == 2 * counted[Part.VISION] + 14 * learned

    def test_what_a_rank_holds_shrinks_with_the_layout(self) -> None:
        def of(num_ranks: int, **parallel: object) -> int:
            return rank_bytes(replace(Recipe(), parallel=ParallelConfig(**parallel)), num_ranks)  # type: ignore[arg-type]

        one = of(1)
        assert one == pytest.approx(18 * 6.76e9 + 2 * 0.304e9, rel=0.01)
        assert of(8, tensor=8) < one / 6
        assert of(4, pipeline=4) < one / 3
        assert of(64, tensor=8, distributed_optimizer=True) < of(64, tensor=8)
        lora = replace(Recipe(), lora=LoraConfig(rank=16))
        assert rank_bytes(lora, 1) < one / 5
        fp32 = replace(Recipe(), train=replace(Recipe().train, precision=Precision.FP32))
        assert rank_bytes(fp32, 1) < one
