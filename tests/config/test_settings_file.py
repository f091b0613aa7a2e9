"""--settings: a file sets what flags set, the command line wins, mistakes are one line, a run's own file repeats it."""

from __future__ import annotations

import shlex

import pytest
from support.tiny_runs import TINY, rows, same_weights, train

from sgg_fast.commands import train as command
from sgg_fast.config import SETTINGS, Config, read_settings, settings_text
from sgg_fast.recipes import RECIPES, recipe


def parsed(path, *argv):
    return vars(command.parse(["--settings", str(path), *argv]))


@pytest.mark.parametrize(
    "text",
    [
        'stage = "finetune"\nunet-lr = 1e-5\nbatch_size = 3\nema = 0\ngradient-checkpointing = true\nmodel = "sd"',
        'stage = "finetune"\n[optim]\nunet-lr = 1e-5\nbatch-size = 3\nema = 0.0\n[model]\nmodel = "sd"\n'
        "gradient_checkpointing = true",
    ],
)
def test_flat_or_in_tables_and_the_command_line_wins(tmp_path, text):
    (tmp_path / "s.toml").write_text(text)
    args = parsed(tmp_path / "s.toml")
    expected = {"unet_lr": 1e-5, "batch_size": 3, "ema": 0.0, "gradient_checkpointing": True, "model": "sd"}
    found = {name: args[name] for name in SETTINGS if name in args}
    assert args["stage"] == "finetune" and found == {"recipe": "toy", **expected}
    args = parsed(tmp_path / "s.toml", "--stage", "pretrain", "--batch-size", "5", "--no-gradient-checkpointing")
    assert args["stage"] == "pretrain"
    assert {name: args[name] for name in expected} == {
        **expected, "batch_size": 5, "gradient_checkpointing": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("unet-rl = 1.0", "no setting unet-rl (did you mean unet-lr?)"),
        ("zzzzzz = 1.0", "no setting zzzzzz; train.py --help lists the settings"),
        ("[optin]\nunet-lr = 1.0", "no table [optin] (did you mean optim?)"),
        ("[model]\nunet-lr = 1.0", "unet-lr belongs into [optim], not [model]"),
        ("unet-lr = 1.0\n[optim]\nunet_lr = 1.0", "unet-lr is there twice"),
        ('sizes = "sd"', "sizes cannot be set: recipe decides it"),
        ("batch-size = 1.5", "batch-size must be a whole number, not '1.5'"),
        ("batch-size = true", "batch-size must be a whole number, not 'True'"),
        ('unet-lr = "high"', "unet-lr must be a number, not 'high'"),
        ("graph-negatives = 1", "graph-negatives must be true or false, not '1'"),
        ("data = 3", "data must be a text, not '3'"),
        ("unet-lr = ", "not TOML: "),
        ('stage = "sample"', "stage must be pretrain or finetune, not 'sample'"),
    ],
)
def test_a_mistake_is_one_line_with_the_file(tmp_path, capsys, text, reason):
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        parsed(path, *(() if text.startswith("stage") else ("--stage", "finetune")))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"train.py: --settings {path}: {reason}")


def test_a_file_that_is_not_there_and_a_value_out_of_bounds(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parsed(tmp_path / "absent.toml", "--stage", "finetune")
    assert capsys.readouterr().err == f"train.py: --settings {tmp_path / 'absent.toml'}: there is no such file\n"
    (tmp_path / "s.toml").write_text("batch-size = 0")
    assert command.main(["--stage", "finetune", "--settings", str(tmp_path / "s.toml"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "train.py: --batch-size must be at least 1, not 0\n"


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_is_read_back_for_every_recipe(tmp_path, name):
    config = recipe(name, data='a "quoted" \\ set', lora=3)
    (tmp_path / "s.toml").write_text(settings_text(config, {"stage": "finetune", "deepspeed": None}), encoding="utf-8")
    found = read_settings(tmp_path / "s.toml")
    assert (found.pop("stage"), found.pop("recipe")) == ("finetune", name) and "deepspeed" not in found
    assert recipe(name, **found) == config
    assert found.keys() == {name for name, setting in SETTINGS.items() if not setting.rules.of_recipe}


def test_a_runs_own_file_repeats_it(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, "pretrain", seed=3, conditioner="sgg")
    file = first / "pretrain" / "settings.toml"
    found = read_settings(file)
    assert found.pop("stage") == "pretrain"
    assert Config().replace(**{**TINY, "seed": 3}).flat().items() >= found.items()
    assert command.main(["--settings", str(file), "--out", str(second)]) == 0
    assert same_weights(first / "pretrain" / "graph_encoder", second / "pretrain" / "graph_encoder")
    assert rows(first / "pretrain") == rows(second / "pretrain")
    assert (second / "pretrain" / "settings.toml").read_bytes() == file.read_bytes()
    following = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert following == shlex.join(
        ["python", "train.py", "--stage", "finetune", "--settings", str(file), "--out", str(second)]
    )
