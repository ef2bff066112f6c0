"""A checkpoint in memory: its model, another image size, checks, fingerprints, and the names of its tensors."""

from collections import Counter
from dataclasses import make_dataclass, replace

import pytest
import torch

from bridgetower.checkpoints import (
    UNMEASURED,
    Checkpoint,
    Gain,
    Reranking,
    fingerprint,
    read_checkpoint,
)
from bridgetower.checkpoints.checkpoint import (
    _changed_settings,
    check_tensors,
    collect,
    exact_fingerprint,
    extra_tensor_names,
    parameter_shapes,
)
from bridgetower.checkpoints.keymap import TensorSource, export_tensors, import_tensors, name_table
from bridgetower.inference.predictor import load
from bridgetower.processor import Processor, ProcessorConfig, train_tokenizer
from helpers.checkpoints import BERT_CHANGES, METER_CHANGES, TIMM_CHANGES
from helpers.models import (
    SMALL_CONFIG,
    build_model,
    changed_config,
    random_images,
    random_texts,
    same_tensors,
)


@pytest.fixture
def checkpoint():
    return Checkpoint(source="mine", config=SMALL_CONFIG, tensors=build_model().state_dict())


class TestModel:
    def test_training_changes_nothing_else(self, checkpoint):
        before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
        trained = checkpoint.model()
        untouched = checkpoint.model()
        assert not trained.training
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1)
        assert same_tensors(checkpoint.tensors, before)
        assert same_tensors(untouched.state_dict(), before)

    def test_weights_are_not_copied_if_so_asked(self, checkpoint):
        batch = (random_images(2), *random_texts([5, 3]))
        model = checkpoint.model(copy=False)
        pointers = {name: value.data_ptr() for name, value in model.named_parameters()}
        assert pointers == {name: value.data_ptr() for name, value in checkpoint.tensors.items()}
        assert torch.equal(model(*batch).pooled, build_model()(*batch).pooled)


def test_without_its_contrastive_head(checkpoint):
    config = changed_config(heads__itc="tower")
    reranking = Reranking(itc_weight=16.0, gain=Gain(difference=0.2, low=0.1, high=0.3, texts=9))
    full = Checkpoint(
        source="x", config=config, tensors=build_model(config).state_dict(), reranking=reranking
    )
    less = full.without_itc()
    assert less.config.heads.itc is None
    assert less.reranking == UNMEASURED
    assert full.tensors.keys() - less.tensors.keys() == {
        name for name in full.tensors if name.startswith("itc_head.")
    }
    less.model()


class TestResized:
    def test_only_positions_change_as_in_the_model(self, checkpoint):
        same = checkpoint.resized(24)
        larger = checkpoint.resized(40)
        name = "vision.position_embedding"
        assert same.config == checkpoint.config
        assert same_tensors(same.tensors, checkpoint.tensors)
        assert [
            key for key, value in checkpoint.tensors.items() if larger.tensors[key] is not value
        ] == [name]
        assert torch.equal(larger.tensors[name][0], checkpoint.tensors[name][0]), "of the class"
        assert larger.config == checkpoint.config.override({"vision.image_size": 40})
        check_tensors("larger", larger.config, larger.tensors)

        images = random_images(2, size=40)
        original = checkpoint.model()
        assert torch.equal(
            larger.model().encode_image(images).cls, original.encode_image(images).cls
        )

    def test_number_format_is_kept(self, checkpoint):
        half = replace(
            checkpoint, tensors={name: value.half() for name, value in checkpoint.tensors.items()}
        )
        assert {value.dtype for value in half.model().parameters()} == {torch.float16}
        for size in (24, 40):
            assert {value.dtype for value in half.resized(size).tensors.values()} == {torch.float16}

    def test_preprocessing_goes_along_and_the_patch_divides(self, checkpoint):
        for size, nearest in ((41, "40 or 48"), (5, "8 or 16")):
            with pytest.raises(
                ValueError, match=rf"{size} is not a .* size 8; set image_size to {nearest}"
            ):
                checkpoint.resized(size)
        config = ProcessorConfig(
            profile="official-finetune", image_size=24, max_length=10, patch_size=8
        )
        resized = replace(checkpoint, processor=Processor(config, None)).resized(40)
        assert resized.processor.config == replace(config, image_size=40)


def test_the_longest_text_is_what_the_tower_takes():
    for positions, max_length, expected in ((514, 512, 512), (512, 512, 510), (514, 50, 50)):
        config = ProcessorConfig(profile="official-finetune", image_size=24, max_length=max_length)
        model = changed_config(text__max_positions=positions)
        processor = Checkpoint(
            source="mine", config=model, tensors={}, processor=Processor(config, None)
        ).processor
        assert processor.config == replace(config, max_length=expected)


def test_new_token_types_start_as_the_last_one(checkpoint):
    grown = checkpoint.with_token_types(3)
    old, new = (item.tensors["token_type_embedding.weight"] for item in (checkpoint, grown))
    assert torch.equal(new, torch.stack([old[0], old[1], old[1]]))
    check_tensors("grown", grown.config, grown.tensors)
    assert grown.config == checkpoint.config.override({"fusion.num_token_types": 3})
    assert grown.with_token_types(2) is grown


class TestLabels:
    @pytest.fixture
    def with_vqa(self):
        config = changed_config(heads__vqa=3)
        tensors = build_model(config).state_dict()
        return Checkpoint(
            source="mine", config=config, tensors=tensors, labels={"vqa": ("yes", "no", "2")}
        )

    def test_names(self, with_vqa):
        assert with_vqa.class_names("vqa") == ("yes", "no", "2")
        assert with_vqa.class_names("snli_ve") == ("contradiction", "neutral", "entailment")
        assert with_vqa.class_names("nlvr2") == ("False", "True")
        with pytest.raises(
            ValueError, match=r"mine does not name the classes of its vqa head; .* pass answers"
        ):
            replace(with_vqa, labels={}).class_names("vqa")

    def test_not_one_for_each_class(self, with_vqa):
        for head, names, message in (
            ("vqa", ("yes", "no"), "for the 3 classes of its vqa head; expected one for each"),
            ("vqa", ("yes", "no", "yes"), "2 different names among 3 for the 3 classes"),
            ("vqa", ("yes", "no", "2", "3"), "for the 3 classes"),
            ("text", ("a", "b"), "for the 0 classes of its text head"),
        ):
            with pytest.raises(ValueError, match=message):
                replace(with_vqa, labels={head: names})


def test_parameters_are_checked(checkpoint):
    bias = "itm_head.fc.bias"
    embedding = "vision.class_embedding"
    check_tensors("mine", checkpoint.config, checkpoint.tensors)
    for changes, message in (
        ({bias: None, embedding: None}, f"mine lacks tensors: {bias}, {embedding}$"),
        ({"zzz": (1,), "aaa": (1,)}, "mine has unknown tensors: aaa, zzz$"),
        ({f"extra{number:02d}": (1,) for number in range(13)}, "extra08, extra09 and 3 more$"),
        ({bias: (3,)}, rf"mine has wrongly shaped tensors: {bias} \[3\] \(expected \[2\]\)$"),
        (
            {embedding: (24, 1)},
            rf"wrongly shaped tensors: {embedding} \[24, 1\] \(expected \[24\]\)$",
        ),
    ):
        tensors = checkpoint.tensors | {
            name: torch.rand(shape or ()) for name, shape in changes.items()
        }
        present = {
            name: tensor for name, tensor in tensors.items() if changes.get(name, ()) is not None
        }
        with pytest.raises(ValueError, match=message):
            check_tensors("mine", checkpoint.config, present)


class TestCollect:
    @pytest.fixture
    def foreign(self, checkpoint):
        return export_tensors(name_table(checkpoint.tensors, "clip"), checkpoint.tensors)

    @staticmethod
    def collected(tensors):
        table = name_table(parameter_shapes(SMALL_CONFIG), "clip")
        extra_tensors = name_table(extra_tensor_names(SMALL_CONFIG), "clip")
        return collect("theirs", SMALL_CONFIG, tensors, table, extra_tensors, ("left_.*", "temp"))

    def test_read_extra_and_dropped(self, checkpoint, foreign):
        collected = self.collected(foreign)
        assert same_tensors(collected.tensors, checkpoint.tensors)
        assert (collected.extra_tensors, collected.dropped) == ({}, ())
        additional = {
            "text_transformer.pooler.dense.weight": torch.rand(32, 32),
            "vit_model.visual.ln_separate.3.bias": torch.rand(24),
            "left_b": torch.rand(1),
            "left_a": torch.rand(1),
            "temp": torch.rand(1),
        }
        collected = self.collected(foreign | additional)
        assert collected.extra_tensors.keys() == {
            "text.pooler.dense.weight",
            "vision.separate_norms.3.bias",
        }
        assert collected.dropped == ("left_a", "left_b", "temp")

    def test_patterns_match_whole_names(self, foreign):
        for name in ("xleft_a", "temperature2", "temp.x", "vit_model.visual.ln_separate.9.bias"):
            with pytest.raises(ValueError, match=f"theirs has unknown tensors: {name}"):
                self.collected(foreign | {name: torch.rand(24)})

    def test_shapes_are_told_under_the_names_of_the_file(self, foreign):
        wrong = {"text_transformer.encoder.layer.0.attention.self.key.weight": torch.rand(31, 32)}
        wrong["cross_modal_text_layers.1.crossattention.self.value.bias"] = torch.rand(15)
        with pytest.raises(ValueError, match="theirs has wrongly shaped") as caught:
            self.collected(foreign | wrong)
        assert "layer.0.attention.self.key.weight [31, 32] (expected [32, 32])" in str(caught.value)
        assert "crossattention.self.value.bias [15] (expected [16])" in str(caught.value)


def of(checkpoint):
    return fingerprint(checkpoint.config, checkpoint.tensors, checkpoint.processor)


class TestFingerprint:
    @pytest.fixture
    def checkpoint(self, tiny_checkpoint):
        return read_checkpoint(tiny_checkpoint)

    def test_is_the_same_in_either_precision_and_order(self, checkpoint, tiny_checkpoint):
        assert len(of(checkpoint)) == 16
        assert of(replace(checkpoint, tensors=dict(reversed(checkpoint.tensors.items())))) == of(
            checkpoint
        )
        assert load(tiny_checkpoint, device="cpu").fingerprint == of(checkpoint)
        assert load(tiny_checkpoint, device="cpu", precision="bf16").fingerprint == of(checkpoint)
        size = 2 * checkpoint.config.vision.image_size
        resized = load(tiny_checkpoint, device="cpu", precision="bf16", image_size=size)
        assert resized.fingerprint == of(checkpoint.resized(size))
        assert {tensor.dtype for tensor in resized.model.state_dict().values()} == {torch.bfloat16}

    def test_changes_with_every_weight_and_setting(self, checkpoint):
        processor = checkpoint.processor
        variants = [checkpoint, checkpoint.resized(40)]
        for name in (
            "token_type_embedding.weight",
            "itc_head.image.weight",
            "vision.class_embedding",
        ):
            changed = checkpoint.tensors[name].clone()
            changed.view(-1)[-1] += 0.1
            turned = checkpoint.tensors[name].reshape(-1, 1)  # same bytes, another shape
            variants += [
                replace(checkpoint, tensors=checkpoint.tensors | {name: tensor})
                for tensor in (changed, turned)
            ]
        white = Processor(
            replace(processor.config, background=(255, 255, 255)), processor.tokenizer
        )
        words = Processor(processor.config, train_tokenizer(["another text"] * 9, vocab_size=300))
        variants += [replace(checkpoint, processor=other) for other in (white, words)]
        variants.append(
            replace(checkpoint, config=checkpoint.config.override({"vision.layer_norm_eps": 1e-6}))
        )
        assert len({of(variant) for variant in variants}) == len(variants)

    def test_a_new_setting_at_its_default_changes_nothing(self):
        before = make_dataclass("Before", [("a", int, 1)])
        after = make_dataclass("After", [("a", int, 1), ("b", torch.dtype, torch.float32)])
        assert dict(_changed_settings(before(2))) == dict(_changed_settings(after(2))) == {"a": 2}
        assert dict(_changed_settings(after(2, torch.float16))) != {"a": 2}

    def test_an_exact_one_changes_with_the_smallest_change(self, checkpoint):
        tensors = dict(checkpoint.tensors)
        before = exact_fingerprint(tensors)
        name = "vision.class_embedding"
        assert exact_fingerprint(dict(reversed(tensors.items()))) == before
        assert len(before) == 16
        tensors[name] = torch.nextafter(tensors[name], torch.tensor(9.0))
        assert exact_fingerprint(tensors) != before
        # which counts in bfloat16
        assert of(replace(checkpoint, tensors=tensors)) == of(checkpoint)


DEEP = {"vision.num_layers": 12, "text.num_layers": 11, "fusion.num_layers": 11}


NO_HEADS = {"heads.mlm": False, "heads.itm": False, "heads.itc": None}
FUSED = {"heads.itc": "fused"}
THEIRS = ("huggingface", "bridgetower.")
TABLES = {  # what differs from the small config, naming, prefix
    "clip": ({}, "clip"),
    "clip, two digits": (DEEP, "clip"),
    "clip, nlvr2": ({"fusion.num_token_types": 3}, "clip"),
    "clip, meter": (METER_CHANGES, "clip"),
    "clip, no heads": (NO_HEADS, "clip"),
    "timm": (TIMM_CHANGES, "timm"),
    "timm, distilled": (TIMM_CHANGES | {"vision.distillation_token": True}, "timm"),
    "timm, two digits": (DEEP | TIMM_CHANGES, "timm"),
    "timm, bert, meter": (TIMM_CHANGES | BERT_CHANGES | METER_CHANGES, "timm"),
    "hf backbone": (NO_HEADS, "huggingface"),
    "hf with heads": (FUSED, *THEIRS),
    "hf, two digits": (DEEP | FUSED, *THEIRS),
    "hf, scaled": ({"fusion.bridge": "scaled_add"}, *THEIRS),
    "hf, interpolated": ({"fusion.bridge": "interpolate"}, *THEIRS),
    "hf, separate projections": (DEEP | {"fusion.separate_projections": True}, *THEIRS),
}


def random_tensors(config):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator)
        for name, shape in parameter_shapes(config).items()
    }


@pytest.mark.parametrize("kind", TABLES)
def test_all_come_back_under_names_that_serve_once(kind):
    changes, naming, *prefix = TABLES[kind]
    config = SMALL_CONFIG.override(changes)

    def table(names):
        return name_table(names, naming, config.fusion.separate_projections, *prefix)

    ours = random_tensors(config)
    names = table(ours)
    foreign = export_tensors(names, ours)
    assert same_tensors(import_tensors(names, foreign), ours)
    random_values = {name: torch.rand_like(value) for name, value in foreign.items()}
    assert same_tensors(export_tensors(names, import_tensors(names, random_values)), random_values)
    assert sum(value.numel() for value in foreign.values()) == sum(
        value.numel() for value in ours.values()
    )
    for name, source in names.items():
        assert {foreign[other].shape for other in source.names} == {
            source.foreign_shape(ours[name].shape)
        }
    extra = [] if naming == "timm" else extra_tensor_names(config, extra_vision_layers=2)
    uses = Counter(name for source in table([*ours, *extra]).values() for name in source.names)
    assert [name for name, count in uses.items() if count > 1] == []
    # Control: exchanged parts do not come back.
    exchanged = {
        name: TensorSource(source.names[::-1], source.leading_ones)
        for name, source in names.items()
    }
    assert not same_tensors(import_tensors(exchanged, foreign), ours)


KNOWN = [
    (
        "clip",
        "vision.layers.10.attention.qkv.weight",
        "vit_model.visual.transformer.resblocks.10.attn.in_proj_weight",
    ),
    ("clip", "vision.class_embedding", "vit_model.visual.class_embedding"),
    ("clip", "vision.patch_embedding.weight", "vit_model.visual.conv1.weight"),
    ("clip", "mlm_head.decoder.bias", "mlm_score.bias"),
    ("clip", "itc_head.temperature", "temperature"),
    ("clip", "fusion.text_bridges.4.norm.bias", "cross_modal_text_link_tower.4.LayerNorm.bias"),
    (
        *("clip", "text.layers.3.attention.qkv.bias"),
        *(
            f"text_transformer.encoder.layer.3.attention.self.{projection}.bias"
            for projection in ("query", "key", "value")
        ),
    ),
    ("timm", "vision.layers.1.attention.qkv.weight", "vit_model.blocks.1.attn.qkv.weight"),
    ("timm", "vision.position_embedding", "vit_model.pos_embed"),
    ("timm", "vision.patch_embedding.bias", "vit_model.patch_embed.proj.bias"),
    (
        *("huggingface", "fusion.image_layers.5.cross_attention.key_value.weight"),
        *(
            f"cross_modal_image_layers.5.crossattention.self.{projection}.weight"
            for projection in ("key", "value")
        ),
    ),
    (
        "huggingface",
        "vision.position_embedding",
        "vision_model.visual.embeddings.position_embedding.weight",
    ),
    ("huggingface", "text.embedding_norm.weight", "text_model.embeddings.LayerNorm.weight"),
    ("huggingface", "itc_head.pooled.weight", "itc_cross_modal_head.fc.weight"),
    ("huggingface", "itc_head.log_logit_scale", "logit_scale"),
    ("huggingface", "text_projections.0.weight", "cross_modal_text_transform.weight"),
]


class TestNames:
    def test_known(self):
        for naming, ours, *foreign in KNOWN:
            assert name_table([ours], naming)[ours].names == tuple(foreign)

    def test_prefix_is_for_the_backbone_only_and_separate_projections_are_numbered(self):
        ours = (
            "text_pooler.dense.bias",
            "vision.post_norm.bias",
            "image_projections.3.bias",
            "itm_head.fc.bias",
        )
        names = name_table(
            ours, "huggingface", separate_projections=True, backbone_prefix="bridgetower."
        )
        assert [source.names[0] for source in names.values()] == [
            "bridgetower.cross_modal_text_pooler.dense.bias",
            "bridgetower.vision_model.visual.ln_post.bias",
            "bridgetower.cross_modal_image_transform.3.bias",
            "itm_score.fc.bias",
        ]

    @pytest.mark.parametrize(
        ("naming", "name"),
        [
            *(
                (naming, name)
                for naming in ("clip", "timm", "huggingface")
                for name in ("nothing", "xvision.x", "")
            ),
            ("clip", "vision.layers.0.attention.qkw.weight"),
            ("timm", "vision.pre_norm.weight"),
            ("clip", "vision.patch_embedding.bias"),
            ("huggingface", "vision.patch_embedding.bias"),
            ("clip", "text_projections.1.weight"),
        ],
    )
    def test_what_the_other_side_does_not_have(self, naming, name):
        with pytest.raises(KeyError, match=f"no foreign name is known for {name}"):
            name_table([name], naming)
