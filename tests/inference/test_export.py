"""What is exported computes what the network computes, carries its card, and is written whole or not at all."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from winners import STREETS

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.data.packing import resize_image
from tune_bisenet.errors import CommandError
from tune_bisenet.inference import export
from tune_bisenet.inference.evaluate import LabelledSplit, evaluate
from tune_bisenet.inference.export import export_model, main
from tune_bisenet.inference.model import FILE_NAMES, Form, load, read_checkpoint
from tune_bisenet.options import InputError
from tune_bisenet.storage import Storage
from tune_bisenet.training.model import BiSeNet

VAL = LabelledSplit(STREETS.names("val"), lambda index: STREETS.load("val", index), CITYSCAPES)


def exported(search: Path, form: Form, out: Path, **options: bool) -> Path:
    card, network = read_checkpoint(Storage.at(str(search / "r01")), "best.pt")
    export_model(network, card, form, out, **options)
    return out / FILE_NAMES[form]


def assert_same_model(search: Path, path: Path) -> None:
    original, model = load(search, run="r01"), load(path)
    frame = STREETS.load("val", 2).image
    images = torch.from_numpy(resize_image(frame, (64, 128)))[None]
    assert (model.segment(images, (64, 128)) == original.segment(images, (64, 128))).float().mean() > 0.999
    # A form's logits have the size of its input: to enlarge them again is not quite what validation does.
    assert (model.predict(frame).class_ids == original.predict(frame).class_ids).mean() > 0.99
    assert evaluate(model, VAL).miou == pytest.approx(original.card.miou, abs=0.2)
    assert model.card.run == original.card.run
    assert load(path.parent).card == model.card
    assert json.loads((path.parent / "model.json").read_text())["check"]["same_class"] > 0.999


def test_safetensors_are_the_weights_of_a_bisenet(search: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = exported(search, "safetensors", tmp_path / "out")
    assert path.stat().st_mode == (path.parent / "model.json").stat().st_mode, "readable by all who may read its card"
    BiSeNet(auxiliary_heads=False).load_state_dict(load_file(path))
    original = load(search, run="r01")
    assert load(path).card.miou == original.card.miou
    assert evaluate(load(path), VAL).miou == original.card.miou


def test_the_card_says_what_it_is_for_programs_and_for_people(search: Path, tmp_path: Path) -> None:
    out = exported(search, "safetensors", tmp_path / "out").parent
    card = json.loads((out / "model.json").read_text())
    assert (card["search"], card["trial"], card["run"]["seed"], card["form"]) == ("small", "r01", 0, "safetensors")
    assert card["data_digest"]
    assert len(card["iou"]) == len(card["classes"]["classes"]) == 19
    assert card["check"]["same_class"] == 1.0
    page = (out / "MODEL.md").read_text()
    assert all(
        word in page for word in ("small, r01", card["data_digest"], "motorcycle", "## Licence", "model.safetensors")
    )


@pytest.mark.slow  # half a minute
def test_onnx_of_any_size_computes_what_the_network_does(search: Path, tmp_path: Path) -> None:
    path = exported(search, "onnx", tmp_path / "out")
    assert [file.name for file in sorted(path.parent.iterdir())] == ["MODEL.md", "model.json", "model.onnx"]
    assert_same_model(search, path)
    session = onnxruntime.InferenceSession(str(path))
    images = np.random.default_rng(0).integers(256, size=(3, 3, 96, 160), dtype=np.uint8)
    (logits,) = session.run(None, {"images": images})
    assert logits.shape == (3, 19, 96, 160)


@pytest.mark.slow
def test_onnx_with_argmax_gives_class_ids(search: Path, tmp_path: Path) -> None:
    path = exported(search, "onnx", tmp_path / "out", argmax=True)
    session = onnxruntime.InferenceSession(str(path))
    (ids,) = session.run(None, {"images": np.zeros((1, 3, 64, 96), np.uint8)})
    assert (ids.shape, ids.dtype) == ((1, 64, 96), np.uint8)
    found = evaluate(load(path), VAL)
    assert found.miou == pytest.approx(load(search, run="r01").card.miou, abs=3.0)  # enlarged by the nearest pixel
    with pytest.raises(InputError, match="export it without"):
        evaluate(load(path), VAL, flip=True)


@pytest.mark.slow
def test_an_exported_program_of_any_size_computes_what_the_network_does(search: Path, tmp_path: Path) -> None:
    path = exported(search, "torch", tmp_path / "out")
    assert_same_model(search, path)
    program = torch.export.load(path).module()
    assert program(torch.zeros((1, 3, 96, 160), dtype=torch.uint8)).shape == (1, 19, 96, 160)


def test_a_form_that_computes_something_else_is_not_kept(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, network = read_checkpoint(Storage.at(str(search / "r01")), "best.pt")
    write = export._write

    def write_other(_network: BiSeNet, *args: object) -> None:
        write(BiSeNet(auxiliary_heads=False).eval(), *args)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "_write", write_other)
    with pytest.raises(CommandError, match="nothing was kept"):
        export_model(network, card, "safetensors", tmp_path / "models" / "out")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_command_tells_the_file_its_size_and_the_check(
    search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(search), "--run", "r02", "--to", "safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "models/small-r02-safetensors/model.safetensors: small r02 epoch" in printed
    assert "100.0000 % of pixels have the same class" in printed
    assert main([str(search), "--run", "r02", "--to", "safetensors"]) == 2
    assert "exists: give another folder" in capsys.readouterr().err
    assert main([str(search), "--to", "safetensors", "--argmax"]) == 2
    assert main(["models/small-r02-safetensors"]) == 2
    assert "has been exported already" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILE_NAMES.values())
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no model at all")
    with pytest.raises(InputError, match=name):
        load(tmp_path / name)
