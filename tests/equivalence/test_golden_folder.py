"""The recorded cases themselves: all there, read as recorded, and their checkpoints mapped without loss."""

import shutil
from pathlib import Path

import pytest
import torch

from bridgetower.checkpoints.keymap import TensorSource, export_tensors, import_tensors
from bridgetower.checkpoints.tensors import read_torch_archive
from golden import FOLDER_VARIABLE, Case, case

# By letter, in the order in which they were recorded; l and n hold no model.
MODELS = (
    "a_pretrain",
    "b_itc",
    "b2_itc_world2",
    "c_vqa",
    "d_snli",
    "e_nlvr2",
    "f_irtr",
    "g_ln_separate",
    "h_timm_vit",
    "i_bert",
    "j_meter",
    "k_resize",
    "m_gradients",
    "o_eps_clip_roberta",
    "o_eps_vit_bert",
)
OTHERS = ("l_optimizer", "n_preprocess")


@pytest.fixture(params=MODELS)
def recorded(request):
    return case(request.param)


def official_tensors(recorded):
    return read_torch_archive(recorded.path("checkpoint.ckpt"))["state_dict"]


class TestFolder:
    def test_a_missing_case_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=FOLDER_VARIABLE):
            Case(tmp_path / "a_pretrain")

    def test_tensors_are_those_that_the_meta_file_lists(self, recorded):
        for tensors, listed in ((recorded.inputs, "inputs"), (recorded.outputs, "outputs")):
            shapes = {name: entry["shape"] for name, entry in recorded.meta[listed].items()}
            assert {name: list(value.shape) for name, value in tensors.items()} == shapes

    @pytest.mark.parametrize("name", [*MODELS, *OTHERS])
    def test_every_case_is_there_and_compared_in_this_folder(self, name):
        assert case(name).meta["case"] == name
        files = (path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
        assert any(f'"{name}"' in path.read_text() for path in files)


class TestNames:
    def test_every_official_tensor_is_read_extra_or_reported(self, recorded):
        read = {name for source in recorded.table().values() for name in source.names}
        extra_tensors = recorded.extra_tensor_names()
        dropped = set(recorded.checkpoint.dropped)
        assert len(read) + len(extra_tensors) + len(dropped) == len(read | extra_tensors | dropped)
        assert read | extra_tensors | dropped == set(official_tensors(recorded))

    def test_round_trip_is_bit_for_bit(self, recorded):
        official = official_tensors(recorded)
        table = recorded.table()
        back = export_tensors(table, import_tensors(table, official))
        assert all(torch.equal(tensor, official[name]) for name, tensor in back.items())
        name = "text.layers.0.attention.qkv.weight"  # control: exchanged query and key are seen
        query, key, value = table[name].names
        wrong = table | {name: TensorSource((key, query, value))}
        back = export_tensors(table, import_tensors(wrong, official))
        assert [
            entry for entry, tensor in back.items() if not torch.equal(tensor, official[entry])
        ] == [query, key]

    def test_control_an_unknown_tensor_is_refused(self, recorded, tmp_path):
        content = read_torch_archive(recorded.path("checkpoint.ckpt"))
        content["state_dict"]["cross_modal_text_layers.0.unknown.weight"] = torch.zeros(1)
        torch.save(content, tmp_path / "checkpoint.ckpt")
        shutil.copy(recorded.folder / "meta.json", tmp_path / "meta.json")
        strange = Case(tmp_path)
        strange.meta.pop("files_elsewhere", None)
        with pytest.raises(ValueError, match="has unknown tensors: cross_modal_text_layers"):
            _ = strange.checkpoint

    def test_loaded_model_holds_the_checkpoint(self, recorded):
        model = recorded.load()
        assert model.config == recorded.checkpoint.config
        assert not model.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, recorded.checkpoint.tensors[name])
