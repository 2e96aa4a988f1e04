"""The demo, with hardly any training: everything it promises to leave is there."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from regrow.demo.show import PROMPTS, model_folder, run_demo
from regrow.progress import Silent


def test_the_demo_runs_offline_and_leaves_a_checkpoint_and_a_report(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "out", "magnitude", 0.5, 1, Silent())
    quality = {kind: one["window-256"]["value"] for kind, one in result.results["perplexity"].items()}
    assert quality["dense"] < quality["pruned"]
    assert result.results["verification"]["passed"]
    assert [item["prompt"] for item in result.results["completions"]] == list(PROMPTS)
    assert {one["batch"] for one in result.results["speedup"]} == {1, 4}
    dense, pruned = (AutoModelForCausalLM.from_pretrained(f).num_parameters() for f in (model_folder(), result.model))
    assert pruned < 0.6 * dense
    assert "perplexity, window-256" in (result.folder / "report.md").read_text()
