"""ds.json: "auto" resolved, contradictions refused in one line that names file, key and cure."""

from __future__ import annotations

import json

import pytest
from support import DS_JSON, ROOT

from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.ds_config import check_engine, load_ds_config

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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage must be a whole number, 0 to 3, not "2"'),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage must be a whole number, 0 to 3, not true"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be a whole number, 0 to 3, not 4"),
        ({"zero_optimization": {"stage": 1.5}}, "zero_optimization.stage must be a whole number, 0 to 3, not 1.5"),
        ({"zero_optimization": {"stage": None}}, "stage must be a whole number, 0 to 3, not null"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            'zero_optimization.offload_optimizer must be an object, such as {"device": ...}, not "cpu"',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            'offload_optimizer.device must be "none" or "cpu" or "nvme", not "gpu"',
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": []}}}, 'must be "none" or "cpu" or'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"pin_memory": "yes"}}}, "pin_memory must be true or"),
        ({"zero_optimization": {"offload_optimizer": {"nvme_path": "/x"}}}, "offload_optimizer.nvme_path is no key"),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm must be true or false, not 1"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size must be a whole number, 1 to 2147"),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size must be a whole number"),
        ({"zero_optimization": {"reduce_bucket_size": 10**15}}, "reduce_bucket_size must be a whole number"),
        ({"zero_optimization": {"sub_group_size": 10**400}}, "sub_group_size must be a whole number, 1 to"),
        ('{"zero_optimization": {"reduce_bucket_size": 1e999}}', "reduce_bucket_size must be a whole number"),
        ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
        ('{"bf16": {}, "bf16": {"enabled": false}}', "bf16 is there twice"),
        ({"gradient_clipping": "0.5"}, 'gradient_clipping must be a number, 0 to .*, not "0.5"'),
        ({"gradient_clipping": [0.5]}, "gradient_clipping must be a number"),
        ({"train_batch_size": True}, "train_batch_size must be a whole number, .* not true"),
        ({"train_micro_batch_size_per_gpu": {"a": 4}}, "train_micro_batch_size_per_gpu must be a whole number"),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled must be true or false, not "yes"'),
        ({"bf16": {"enabled": None}}, "bf16.enabled must be true or false, not null"),
        ({"bf16": {"enable": True}}, r"bf16.enable is no key that train.py takes \(did you mean enabled\?\)"),
        ({"fp16": {"loss_scale": "dynamic"}}, "fp16.loss_scale must be a number, 0 to"),
        ({"fp16": {"initial_scale_power": 4000}}, "fp16.initial_scale_power must be a whole number, 0 to 24"),
        ({"fp16": None}, "fp16 must be an object"),
        ({"zero_optimisation": {"stage": 2}}, r"zero_optimisation is no key .*did you mean zero_optimization\?"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, "zero_optimization.elastic_checkpoint is no key"),
        ({"elasticity": {"enabled": True}}, "elasticity is no key that train.py takes"),
        ({"tensorboard": {"enabled": True}}, "tensorboard is no key that train.py takes"),
        ({"": 1}, "is no key that train.py takes"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer must be true: train.py needs it"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer must be false: train.py needs it"),
        ({"steps_per_print": 0}, "steps_per_print must be a whole number, 1 to"),
        ({"wall_clock_breakdown": "false"}, 'wall_clock_breakdown must be true or false, not "false"'),
        ({"communication_data_type": "int8"}, 'communication_data_type must be "fp32" or "bf16" or "fp16", not "int8"'),
        ("[" * 100_000, "not JSON: "),
        ("", "not JSON: "),
        ("null", "must be a JSON object"),
        (" " * (1 << 20) + "{}", "larger than 1 MiB"),
    ],
)
def test_wrong_types_unknown_keys_and_absurd_values_name_the_key(tmp_path, content, reason):
    """With and without a known precision: before the libraries load, and after."""
    path = tmp_path / "ds.json"
    for precision in ("fp32", None):
        with pytest.raises(ConfigError, match=reason) as caught:
            load(path, content, precision)
        said = str(caught.value)
        assert said.startswith(f"--deepspeed {path}: ") and "\n" not in said and len(said) < 400


def test_whole_numbers_may_have_an_exponent_and_files_a_mark(tmp_path):
    ds = load(tmp_path / "ds.json", '\ufeff{"zero_optimization": {"stage": 2.0, "reduce_bucket_size": 5e8}}')
    assert ds["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 500_000_000}
    assert all(type(value) is int for value in ds["zero_optimization"].values())
    assert load(tmp_path / "ds.json", {"zero_optimization": {"stage": 1, "offload_param": None}})


def test_folders_and_devices_are_no_files(tmp_path):
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(ConfigError, match="cannot be read: not a file"):
            load_ds_config(path, CONFIG.optim, None, 1)


def test_a_stage_and_settings_that_run_without_deepspeed_are_refused_by_their_flag(tmp_path):
    """Without the file they pass, and with it what DeepSpeed can do; a bad file is refused as well."""
    for changes, flag in (
        ({"weights": "lean"}, "--weights lean"),
        ({"optimizer_in_backward": True, "max_grad_norm": 0.0}, "--optimizer-in-backward"),
        ({"optimizer": "adafactor"}, "--optimizer adafactor"),
        ({"lora": 4}, "--lora 4"),
    ):
        optim = recipe("toy", **changes).optim
        check_engine(optim, "finetune", None)
        with pytest.raises(ConfigError, match=f"^{flag} runs without --deepspeed"):
            check_engine(optim, "finetune", DS_JSON)
    check_engine(CONFIG.optim, "finetune", DS_JSON)
    with pytest.raises(ConfigError, match="--stage pretrain runs without --deepspeed"):
        check_engine(CONFIG.optim, "pretrain", DS_JSON)
    (tmp_path / "ds.json").write_text('{"train_batch_size": 3}')
    with pytest.raises(ConfigError, match="train_batch_size is 3"):
        check_engine(CONFIG.optim, "finetune", str(tmp_path / "ds.json"))
