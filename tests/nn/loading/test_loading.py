"""The commands of `python -m sgg_fast.nn.loading`: they convert and seal what loading refuses, or say why not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.nn.folders import change, from_base, from_pipeline, refused

from sgg_fast.nn import loading
from sgg_fast.nn.foundation import load_foundation
from sgg_fast.nn.loading.__main__ import main as command


@pytest.mark.parametrize("form", ["fp16", "bin"])
def test_variants_and_pickles_are_refused_with_the_command_that_converts_them(base, form, capsys):
    path = base / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_foundation(str(base / "sd"), str(base / "clip")).unet.state_dict()
    if form == "fp16":
        path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    else:
        torch.save(load_file(path), path.with_name("diffusion_pytorch_model.bin"))
        path.unlink()
    said = refused(from_base, base)
    assert f"unet/diffusion_pytorch_model.{'fp16.safetensors' if form == 'fp16' else 'bin'}: only " in said
    words = said.split("`")[1].split()
    assert words[:4] == ["python", "-m", "sgg_fast.nn.loading", "convert"]
    assert command(words[3:]) == 0
    after = load_foundation(str(base / "sd"), str(base / "clip")).unet.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    capsys.readouterr()
    assert command(words[3:]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_folder_is_sealed_again_after_a_change(base, capsys):
    """The cure of a folder that its owner changed; a later change is found again."""
    folder = base / "pipeline"
    assert command(["seal", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / loading.MANIFEST}\n"
    loading.check(folder)
    change(folder / "model_index.json", sampling_steps=3)
    assert "model_index.json: " in refused(from_pipeline, base)
    assert command(["seal", str(folder)]) == 0
    from_pipeline(base)


@pytest.mark.parametrize("content", [{"step": 1}, [torch.ones(1)], {"w": torch.nn.Linear(1, 1)}])
def test_a_pickle_that_is_no_table_of_tensors_is_refused_and_nothing_is_written(base, capsys, content):
    folder = base / "sd" / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(content, folder / "diffusion_pytorch_model.bin")
    before = sorted(folder.iterdir())
    assert command(["convert", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"sgg_fast.nn.loading: {folder / 'diffusion_pytorch_model.bin'}: ")
    assert err.count("\n") == 1 and sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["convert", "{base}/absent"], "absent: there is no such folder"),
        (["convert", "{base}/sd/tokenizer"], "tokenizer/config.json: No such file"),
        (["convert", "{base}/sd/unet"], "diffusion_pytorch_model.safetensors is there already"),
    ],
)
def test_what_cannot_be_converted_is_one_line(base, capsys, argv, reason):
    assert command([word.format(base=base) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and reason in err and err.count("\n") == 1
