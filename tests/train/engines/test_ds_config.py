"""ds.json: "auto" resolved, contradictions refused in one line that names file, key and cure."""

from __future__ import annotations

import json

import pytest
from support import DS_JSON, ROOT

from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.ds_config import load_ds_config

CONFIG = recipe("toy", batch_size=4, max_grad_norm=0.5)


def load(path, content, precision="fp32", world_size=1):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_ds_config(path, CONFIG.optim, precision, world_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_auto_takes_the_recipes_values(precision):
    ds = load_ds_config(DS_JSON, CONFIG.optim, precision, world_size=3)
    assert ds["train_micro_batch_size_per_gpu"] == 4
    assert ds["train_batch_size"] == 12
    assert ds["gradient_accumulation_steps"] == 1
    assert ds["gradient_clipping"] == 0.5
    assert ds["bf16"] == {"enabled": precision == "bf16"}
    assert ds.get("fp16", {"enabled": False}) == {"enabled": precision == "fp16"}
    assert ds["zero_optimization"]["stage"] == 2
    assert "auto" not in json.dumps(ds)


def test_an_empty_file_means_auto_everywhere(tmp_path):
    ds = load(tmp_path / "ds.json", {})
    assert (ds["train_batch_size"], ds["gradient_clipping"], ds["bf16"]["enabled"]) == (4, 0.5, False)


def test_values_that_agree_with_the_recipe_pass(tmp_path):
    given = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5, "bf16": {"enabled": True}}
    assert load(tmp_path / "ds.json", given, precision="bf16")["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, r"train_micro_batch_size_per_gpu is 3, but --batch-size is 4"),
        ({"train_batch_size": 16}, r"train_batch_size is 16, but .*is 4"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps is 2"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping is 1.0, but --max-grad-norm is 0.5"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled is True, but precision is fp32"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled is True, but precision is fp32"),
        ({"optimizer": {"type": "AdamW8bit"}}, r"leave out optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, r"leave out optimizer and scheduler"),
        ({"zero_optimization": {"stage": "auto"}}, r'"auto" is not known for zero_optimization.stage'),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            r"offload_param does nothing at ZeRO stage 2; it needs stage 3",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r"offload_optimizer does nothing at .*stage 0",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer to nvme needs an optimiser of DeepSpeed's own; offload to cpu",
        ),
        ({"steps_per_print": "auto"}, r'"auto" is not known for steps_per_print'),
        ({"bf16": True}, r"bf16 must be an object"),
        ({"zero_optimization": 2}, r"zero_optimization must be an object"),
        ([1, 2], r"must be a JSON object"),
        ('{"bf16": ', r"not JSON"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "ds.json"
    with pytest.raises(ConfigError, match=reason) as caught:
        load(path, content)
    assert str(caught.value).startswith(f"--deepspeed {path}: ")
    assert "\n" not in str(caught.value)


def test_accumulated_micro_batches_count():
    config = recipe("toy", batch_size=4, max_grad_norm=0.5, accumulation_steps=5)
    ds = load_ds_config(DS_JSON, config.optim, "fp32", world_size=2)
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    assert [ds[key] for key in sizes] == [4, 5, 40]


@pytest.mark.parametrize(
    ("name", "stage", "offloaded"), [("ds", 2, False), ("configs/ds_offload", 2, True), ("configs/ds_zero3", 3, False)]
)
def test_the_files_that_we_ship_need_nothing_but_auto(name, stage, offloaded):
    zero = load_ds_config(ROOT / f"{name}.json", CONFIG.optim, "bf16", 2)["zero_optimization"]
    assert zero["stage"] == stage and ("offload_optimizer" in zero) == offloaded


def test_automatic_buckets_are_numbers(tmp_path):
    given = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
             "stage3_param_persistence_threshold": "auto"}  # fmt: skip
    zero = load(tmp_path / "ds.json", {"zero_optimization": given})["zero_optimization"]
    assert all(type(value) is int and value > 0 for value in zero.values())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.json: cannot be read: No such file"):
        load_ds_config(tmp_path / "absent.json", CONFIG.optim, "fp32", 1)
