"""Checkpoints on disk: every kind of source is read, written whole, and nothing is overwritten or half written."""

import errno
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from bridgetower import BridgeTower, load
from bridgetower.checkpoints import (
    UNMEASURED,
    Calibration,
    Checkpoint,
    Gain,
    Reranking,
    convert,
    push_to_hub,
    read_checkpoint,
    save,
    update_weights,
    write_checkpoint,
    write_reranking,
)
from bridgetower.checkpoints import tensors as tensor_files
from bridgetower.files import locked
from helpers.models import (
    SMALL_CONFIG,
    build_model,
    changed_config,
    max_difference,
    off_defaults,
    random_images,
    random_texts,
    same_tensors,
)


def changed(checkpoint):
    return replace(
        checkpoint, tensors={name: value + 1 for name, value in checkpoint.tensors.items()}
    )


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestSources:
    @pytest.mark.parametrize("kind", ["bridgetower_folder", "safe", "sharded", "pickled", "run"])
    def test_every_kind(self, request, checkpoint, kind):
        folder = request.getfixturevalue(kind)
        read = read_checkpoint(folder)
        assert read.source == str(folder)
        assert read.config == checkpoint.config
        assert same_tensors(read.tensors, checkpoint.tensors)
        assert same_tensors(read.extra_tensors, checkpoint.extra_tensors)
        divisor = read.processor.config.size_divisor
        assert read.processor.config == replace(checkpoint.processor.config, size_divisor=divisor)
        assert read.processor.token_ids(["a dog"]) == checkpoint.processor.token_ids(["a dog"])
        buffers = ["position_ids", "token_type_ids", "position_ids"] if kind == "pickled" else []
        assert [name.rpartition(".")[2] for name in read.dropped] == buffers
        assert kind != "sharded" or len(list(folder.glob("model-*.safetensors"))) > 2
        batch = random_images(2, checkpoint.config), *random_texts([5, 3], checkpoint.config)
        fused = read.model()(*batch)
        expected = checkpoint.model()(*batch)
        assert torch.equal(fused.pooled, expected.pooled)
        assert torch.equal(fused.text, expected.text)

    def test_without_preprocessing(self, checkpoint, bridgetower_folder, tmp_path):
        for to in ("bridgetower", "hf"):
            convert(replace(checkpoint, processor=None), tmp_path / to, to)
            assert read_checkpoint(tmp_path / to).processor is None
        with pytest.raises(ValueError, match="no image preprocessing to go with a tokenizer"):
            read_checkpoint(tmp_path / "bridgetower", tokenizer=bridgetower_folder)

    def test_a_run_that_died_before_it_had_a_model(self, tmp_path):
        with locked(tmp_path / "run"):
            pass
        with pytest.raises(
            FileNotFoundError,
            match=r"/run is a run that ended before it had a model; start it again$",
        ):
            read_checkpoint(tmp_path / "run")
        (tmp_path / "run" / "dataset.json").touch()
        with pytest.raises(
            FileNotFoundError, match=r"/run has no config\.json; expected a folder of"
        ):
            read_checkpoint(tmp_path / "run")

    def test_relative_paths_win_over_the_hub(self, bridgetower_folder, tmp_path, monkeypatch):
        (tmp_path / "owner").mkdir()
        bridgetower_folder.rename(tmp_path / "owner" / "name")
        monkeypatch.chdir(tmp_path)
        for name in ("owner/name", f"../{tmp_path.name}/owner/name"):
            assert read_checkpoint(name).source == name

    def test_a_folder_of_transformers_cuts_to_what_its_model_takes(self, safe):
        for settings in ("{}", '{"model_max_length": 1e30}', '{"model_max_length": 40}'):
            (safe / "tokenizer_config.json").write_text(settings)
            checkpoint = read_checkpoint(safe)
            processor = checkpoint.processor
            limit = checkpoint.config.text.max_length
            (ids,) = processor.token_ids(["a dog runs " * 30], truncate=True)
            assert len(ids) == processor.config.max_length == limit
            checkpoint.model().encode_text(torch.tensor([ids]))

    def test_preprocessing_for_another_image_size_is_refused_as_transformers_refuses_its_images(
        self, safe, theirs
    ):
        path = safe / "preprocessor_config.json"
        side = {"shortest_edge": 64}
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"size": side, "crop_size": side})
        )
        input_ids, mask = random_texts([5, 3])
        with pytest.raises(ValueError, match=r"\(64\*64\) doesn't match model \(32\*32\)"):
            theirs(input_ids, mask, pixel_values=random_images(2, size=64))
        with pytest.raises(
            ValueError, match="prepares images of 64 pixels, its model takes 32; set image_size"
        ):
            load(safe)
        assert [load(safe, image_size=size).processor.config.image_size for size in (32, 64)] == [
            32,
            64,
        ]


class TestShards:
    LIMIT = 200_000

    def test_transformers_reads_what_is_named_as_by_itself(self, checkpoint, sharded, tmp_path):
        convert(checkpoint, tmp_path / "hf", "hf", shard_bytes=self.LIMIT)
        name = "model.safetensors.index.json"
        ours, theirs = (
            json.loads((folder / name).read_text()) for folder in (tmp_path / "hf", sharded)
        )
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        assert ours["weight_map"].keys() == theirs["weight_map"].keys()
        files = sorted({*ours["weight_map"].values()})
        assert files == [
            f"model-{number:05d}-of-{len(files):05d}.safetensors"
            for number in range(1, len(files) + 1)
        ]
        assert len(files) > 2
        assert sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors")) == files
        for held in (load_file(tmp_path / "hf" / file).values() for file in files):
            assert len(held) == 1 or sum(tensor.nbytes for tensor in held) <= self.LIMIT
        loaded = pytest.importorskip("transformers").BridgeTowerForMaskedLM.from_pretrained(
            tmp_path / "hf"
        )
        expected = loaded.from_pretrained(sharded).state_dict()
        assert same_tensors(loaded.state_dict(), expected)

    def test_they_are_replaced_as_a_whole(self, checkpoint, tmp_path, monkeypatch):
        write_checkpoint(checkpoint, tmp_path / "own", shard_bytes=self.LIMIT)
        before = sorted((tmp_path / "own").glob("model-*.safetensors"))
        assert len(before) > 2
        assert same_tensors(read_checkpoint(tmp_path / "own").tensors, checkpoint.tensors)
        other = replace(
            checkpoint, tensors={name: -tensor for name, tensor in checkpoint.tensors.items()}
        )
        with monkeypatch.context() as patch:
            # fails where the index would be written
            patch.setattr(tensor_files, "write_json", None)
            with pytest.raises(TypeError):
                update_weights(other, tmp_path / "own", shard_bytes=self.LIMIT)
        assert same_tensors(read_checkpoint(tmp_path / "own").tensors, checkpoint.tensors)
        update_weights(other, tmp_path / "own", shard_bytes=self.LIMIT)
        assert same_tensors(read_checkpoint(tmp_path / "own").tensors, other.tensors)
        after = sorted((tmp_path / "own").glob("model-*.safetensors"))
        assert len(after) == len(before)
        assert not {*after} & {*before}


class TestTiedDecoder:
    @pytest.fixture
    def tied(self, safe):
        transformers = pytest.importorskip("transformers")
        config = transformers.BridgeTowerConfig.from_pretrained(safe)
        config.tie_word_embeddings = True
        return off_defaults(transformers.BridgeTowerForMaskedLM(config)).eval()

    def test_it_is_found_and_converted(self, tied, tmp_path):
        folder = tmp_path / "tied"
        tied.save_pretrained(folder)
        tensors = tensor_files.read_safetensors(folder / "model.safetensors")
        assert "mlm_score.decoder.weight" not in tensors
        read = read_checkpoint(folder)
        torch.save(dict(tensors), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert same_tensors(read_checkpoint(folder).tensors, read.tensors)
        decoder = read.tensors["mlm_head.decoder.weight"]
        words = read.tensors["text.word_embedding.weight"]
        assert torch.equal(decoder, words)
        assert decoder.data_ptr() != words.data_ptr(), (
            "training must not move one through the other"
        )
        pixel_values = random_images(2, read.config)
        ids, mask = random_texts([5, 3], read.config)
        with torch.no_grad():
            expected = tied(pixel_values=pixel_values, input_ids=ids, attention_mask=mask).logits
            model = read.model()
            assert (
                max_difference(model.mlm_logits(model(pixel_values, ids, mask).text), expected)
                < 1e-5
            )
        for to in ("bridgetower", "hf"):
            convert(read, tmp_path / to, to)
            assert same_tensors(read_checkpoint(tmp_path / to).tensors, read.tensors)

    def test_one_that_is_stored_is_read_apart_and_an_untied_one_must_be_there(self, safe):
        tensors = dict(tensor_files.read_safetensors(safe / "model.safetensors"))
        words = tensors["bridgetower.text_model.embeddings.word_embeddings.weight"]
        (safe / "model.safetensors").unlink()
        torch.save(tensors | {"mlm_score.decoder.weight": words}, safe / "pytorch_model.bin")
        model = read_checkpoint(safe).model()
        assert (
            model.mlm_head.decoder.weight.data_ptr() != model.text.word_embedding.weight.data_ptr()
        )
        del tensors["mlm_score.decoder.weight"]
        torch.save(tensors, safe / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"lacks tensors: mlm_score\.decoder\.weight"):
            read_checkpoint(safe)


def test_nothing_is_there(bridgetower_folder, safe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "./owner/name", "a/b/c", "model.ckpt", "owner/model.ckpt", "~/x"):
        with pytest.raises(FileNotFoundError, match="does not exist; expected a folder"):
            read_checkpoint(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_checkpoint(tmp_path / "empty")
    for folder in (bridgetower_folder, safe):
        (folder / "model.safetensors").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"has no weights; expected one of model\.safetensors"
        ):
            read_checkpoint(folder)


def test_settings_that_would_be_ignored(bridgetower_folder, safe):
    for folder in (bridgetower_folder, safe):
        with pytest.raises(ValueError, match="has a config of its own"):
            read_checkpoint(folder, overrides={"text.num_heads": 3})
    with pytest.raises(ValueError, match="revision 'main' is for hub ids"):
        read_checkpoint(bridgetower_folder, revision="main")


class TestWriting:
    @pytest.mark.parametrize("to", ["bridgetower", "hf"])
    def test_the_same_bytes_in_an_empty_or_new_folder_but_no_other(self, checkpoint, tmp_path, to):
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "notes.txt").write_text("mine")
        for target in (tmp_path / "used", tmp_path / "used" / "notes.txt"):
            with pytest.raises(FileExistsError, match="is not empty"):
                convert(checkpoint, target, to)
        assert content(tmp_path / "used") == {"notes.txt": b"mine"}
        (tmp_path / "empty").mkdir()
        folders = tmp_path / "empty", tmp_path / "new" / "deep"
        for folder in folders:
            convert(checkpoint, folder, to)
            assert same_tensors(read_checkpoint(folder).tensors, checkpoint.tensors)
        assert content(folders[0]) == content(folders[1])

    def test_updated_weights(self, checkpoint, bridgetower_folder):
        update_weights(changed(checkpoint), bridgetower_folder)
        read = read_checkpoint(bridgetower_folder)
        assert same_tensors(read.tensors, changed(checkpoint).tensors)
        assert same_tensors(read.extra_tensors, checkpoint.extra_tensors)


RERANKING = Reranking(
    itc_weight=16.0,
    calibration=Calibration(
        slope=0.5, intercept=-2.0, pairs=400, matching=25, ece_before=0.4, ece_after=0.01
    ),
    gain=Gain(difference=-0.01, low=-0.03, high=0.01, texts=25),
)


class TestReranking:
    def test_it_travels_with_the_checkpoint(self, checkpoint, tmp_path):
        write_checkpoint(replace(checkpoint, reranking=RERANKING), tmp_path / "first")
        convert(read_checkpoint(tmp_path / "first"), tmp_path / "second", "bridgetower")
        values = json.loads((tmp_path / "second" / "config.json").read_text())["reranking"]
        assert values["itc_weight"] == 16
        assert values["calibration"]["pairs"] == 400
        assert values["gain"] == {"difference": -0.01, "low": -0.03, "high": 0.01, "texts": 25}
        assert read_checkpoint(tmp_path / "second").reranking == RERANKING
        update_weights(
            replace(checkpoint, reranking=Reranking(itc_weight=4.0)), tmp_path / "second"
        )
        assert read_checkpoint(tmp_path / "second").reranking == Reranking(itc_weight=4.0)

    def test_it_is_written_and_read_among_metrics(self):
        metrics = {"rsum": 300.0, **RERANKING.metrics()}
        assert metrics["calibration_ece_before"] == 0.4
        assert Reranking.from_metrics(json.loads(json.dumps(metrics))) == RERANKING
        assert Reranking.from_metrics({"accuracy": 0.5}) == UNMEASURED

    def test_it_is_written_into_folders_of_this_package_alone(
        self, bridgetower_folder, safe, checkpoint, tmp_path
    ):
        before = json.loads((bridgetower_folder / "config.json").read_text())
        assert "reranking" not in before
        assert read_checkpoint(bridgetower_folder).reranking == UNMEASURED
        write_reranking(bridgetower_folder, None)
        assert json.loads((bridgetower_folder / "config.json").read_text()) == before
        write_reranking(bridgetower_folder, Reranking(itc_weight=32.0))
        assert json.loads((bridgetower_folder / "config.json").read_text()) == {
            **before,
            "reranking": {"itc_weight": 32},
        }
        write_checkpoint(checkpoint, tmp_path / "run" / "best")
        write_reranking(tmp_path / "run", RERANKING)
        assert read_checkpoint(tmp_path / "run").reranking == RERANKING
        with pytest.raises(ValueError, match="is not a folder of bridgetower"):
            write_reranking(safe, RERANKING)
        with pytest.raises(FileNotFoundError, match="has no config"):
            write_reranking("owner/name", RERANKING)

    def test_what_is_none(self, bridgetower_folder):
        content = json.loads((bridgetower_folder / "config.json").read_text())
        for section, field, value, message in (
            *(
                ("", "itc_weight", value, r"itc_weight is .*; expected")
                for value in (-1.0, 1e7, "16", True, None)
            ),
            ("", "weight", 1.0, r"reranking has unknown fields \['weight'\]"),
            ("calibration", "slope", -1.0, r"calibration\.slope is -1\.0; expected at least 0"),
            ("calibration", "pairs", 0, r"calibration\.pairs is 0; expected at least 1"),
            (
                "calibration",
                "ece_after",
                2.0,
                r"calibration\.ece_after is 2\.0; expected a number from 0 to 1",
            ),
            ("gain", "low", "none", r"gain\.low is 'none'; expected float"),
            (
                "gain",
                "difference",
                3.0,
                r"gain\.difference is 3\.0; expected a number from -1 to 1",
            ),
        ):
            reranking = RERANKING.to_plain()
            (reranking[section] if section else reranking)[field] = value
            (bridgetower_folder / "config.json").write_text(
                json.dumps(content | {"reranking": reranking})
            )
            with pytest.raises(ValueError, match=message):
                read_checkpoint(bridgetower_folder)


class TestFullDisk:
    def test_old_weights_stay_and_new_folders_do_not_appear(
        self, checkpoint, bridgetower_folder, tmp_path, monkeypatch
    ):
        def stop(tensors, path, metadata):
            path.write_bytes(b"part of a file")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(tensor_files, "save_file", stop)
        before = content(bridgetower_folder)
        with pytest.raises(OSError, match="No space left"):
            update_weights(changed(checkpoint), bridgetower_folder)
        assert content(bridgetower_folder) == before
        for to in ("bridgetower", "hf"):
            with pytest.raises(OSError, match="No space left"):
                convert(checkpoint, tmp_path / "new", to)
            assert not (tmp_path / "new").exists()

    def test_a_broken_write_is_never_read(self, checkpoint, tmp_path, monkeypatch):
        """The config is written last: without it a folder is no checkpoint."""
        with monkeypatch.context() as patch:
            patch.setattr(
                json, "dumps", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
            )
            with pytest.raises(OSError, match="No space left"):
                write_checkpoint(checkpoint, tmp_path / "new")
        assert (tmp_path / "new" / "model.safetensors").exists()
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            read_checkpoint(tmp_path / "new")


class TestLabels:
    ANSWERS = ("yes", "no", "two words", "é")

    @pytest.fixture
    def with_answers(self):
        config = changed_config(heads__vqa=len(self.ANSWERS), heads__snli_ve=True)
        tensors = build_model(config).state_dict()
        return Checkpoint(
            source="mine", config=config, tensors=tensors, labels={"vqa": self.ANSWERS}
        )

    def test_they_travel_with_the_checkpoint_or_are_given(self, with_answers, tmp_path):
        write_checkpoint(with_answers, tmp_path / "named")
        assert read_checkpoint(tmp_path / "named").labels == {"vqa": self.ANSWERS}
        write_checkpoint(replace(with_answers, labels={}), tmp_path / "model")
        assert not (tmp_path / "model" / "labels.json").exists()
        answers = tmp_path / "answers.json"
        answers.write_text(json.dumps(self.ANSWERS))
        assert (
            read_checkpoint(tmp_path / "model", answers=answers).class_names("vqa") == self.ANSWERS
        )
        with pytest.raises(ValueError, match=r"heads\.vqa is \d+, there 0"):
            convert(with_answers, tmp_path / "hf", "hf")

    def test_a_file_of_something_else(self, with_answers, tmp_path):
        write_checkpoint(with_answers, tmp_path / "model")
        answers = tmp_path / "answers.json"
        for text in ("yes\nno", '{"vqa": ["yes"]}', '["yes", 2]', "[["):
            answers.write_text(text)
            with pytest.raises(ValueError, match=r"answers\.json is no list of answers"):
                read_checkpoint(tmp_path / "model", answers=answers)
        (tmp_path / "model" / "labels.json").write_text('{"vqa": "yes"}')
        with pytest.raises(ValueError, match=r"labels\.json holds names that are no list of texts"):
            read_checkpoint(tmp_path / "model")


class TestSave:
    TEXTS = ("a red square", "two blue circles")

    def test_all_that_came_along(self, checkpoint, tmp_path):
        config = changed_config(heads__vqa=2)
        values = {
            "config": config,
            "tensors": build_model(config).state_dict(),
            "extra_tensors": {"x": torch.rand(3)},
        }
        records = {"labels": {"vqa": ("yes", "no")}, "reranking": RERANKING, "processor": None}
        changed = replace(checkpoint, **values, **records)
        save(changed.model(), tmp_path / "saved")
        convert(changed, tmp_path / "converted", "bridgetower")
        assert content(tmp_path / "saved") == content(tmp_path / "converted")

    def test_a_new_model_and_a_used_predictor(self, tiny_checkpoint, tmp_path):
        model = BridgeTower(SMALL_CONFIG)
        save(model, tmp_path / "new")
        assert same_tensors(
            read_checkpoint(tmp_path / "new").model().state_dict(), model.state_dict()
        )
        with pytest.raises(FileExistsError, match="is not empty"):
            save(model, tmp_path / "new")
        predictor = load(tiny_checkpoint, device="cpu")
        vectors = predictor.embed_texts(self.TEXTS)
        predictor.save(tmp_path / "again")
        again = load(tmp_path / "again", device="cpu")
        assert again.fingerprint == predictor.fingerprint
        assert torch.equal(again.embed_texts(self.TEXTS), vectors)

    def test_pushed_to_the_hub(self, tiny_checkpoint, tmp_path, monkeypatch):
        repository = tmp_path / "repository"
        sent = []

        def create_repo(api, repo_id, **options):
            sent.append({"repo_id": repo_id, "token": api.token, **options})
            return SimpleNamespace(repo_id=f"owner/{repo_id}")

        def upload_folder(api, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, repository)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        predictor = load(tiny_checkpoint, device="cpu")
        facts = {
            "license": "mit",
            "datasets": ["owner/shapes"],
            "metrics": {"recall@1": 0.5},
            "command": "train nano",
        }
        url = push_to_hub(predictor.model, "mine", private=True, token="hf_secret", **facts)
        assert url == "https://hub/owner/mine/commit/1"
        assert sent == [
            {"repo_id": "mine", "private": True, "exist_ok": True, "token": "hf_secret"}
        ]
        assert load(repository, device="cpu").fingerprint == predictor.fingerprint
        data = (card := ModelCard.load(repository / "README.md")).data
        assert (data.license, data.library_name, data.datasets) == (
            "mit",
            "bridgetower",
            ["owner/shapes"],
        )
        for line in (
            'load("owner/mine")',
            "| recall@1 | 0.5 |",
            "train nano",
            tiny_checkpoint.name,
            "million param",
        ):
            assert line in card.text
        assert str(tiny_checkpoint) not in card.text, "no path of this machine"
        assert "hf_secret" not in card.content
