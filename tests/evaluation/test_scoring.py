"""Scores survive a kill, come in batches of like length, and are kept under the name of what decides them."""

import json
import shutil
import signal
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bridgetower.evaluation.retrieval as scoring_module
from bridgetower import cli
from bridgetower.evaluation.config import EvaluationOptions, RetrievalConfig
from bridgetower.evaluation.retrieval import PairScorer, evaluate_retrieval, ranked_texts, resumable
from bridgetower.files import locked
from bridgetower.processor import Processor
from helpers import processes
from helpers.retrieval import cosine_table, itm_table
from helpers.sets import caption_images, records_of, write_set

CONFIG = RetrievalConfig(candidates=4, batch_size=3)

# Evaluates with few pairs per part, and may be killed right before the scores of some part are there.
IN_PARTS = """
import signal, sys
import bridgetower.evaluation.retrieval as scoring
from helpers import processes
scoring.PAIRS_PER_CHUNK = 8
processes.signal_at_rename("*/scores-*", sys.argv[1], "SIGKILL", "self", *sys.argv[2:])
"""


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(scoring_module, "PAIRS_PER_CHUNK", 8)


def stop(model, images, work, batches, config=CONFIG):
    """Evaluates until so many batches of pairs are scored."""
    seen = []

    def count(module, inputs, output):
        seen.append(len(output[0]))
        if len(seen) > batches:
            raise NotImplementedError

    hook = model.fusion.register_forward_hook(count)
    with pytest.raises(NotImplementedError):
        evaluate_retrieval(model, images, config, EvaluationOptions(work=work))
    hook.remove()


def test_cosines_are_those_of_the_vectors_in_float32(tiny_model, images):
    head = tiny_model.head("itc")
    outputs = {"image": [], "text": []}
    for name, vectors in outputs.items():
        getattr(head, name).register_forward_hook(
            lambda module, inputs, output, to=vectors: to.append(output)
        )
    with torch.autocast("cpu", torch.bfloat16):
        result = evaluate_retrieval(tiny_model, images, CONFIG)
    cosines = cosine_table(result)
    assert {output.dtype for vectors in outputs.values() for output in vectors} == {torch.bfloat16}
    image, text = (F.normalize(torch.cat(vectors).float(), dim=-1) for vectors in outputs.values())
    ids = images.processor.token_ids(images.texts()[0])
    # in which texts are encoded
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    torch.testing.assert_close(cosines[:, order], image @ text.T, atol=1e-6, rtol=0)
    assert not torch.equal(cosines, cosines.bfloat16().float())


def test_pairs_of_like_length_are_scored_together(tiny_model, images):
    lengths = []

    def note(module, inputs):
        mask = inputs[2]
        width = inputs[1][0].shape[1]
        lengths.append([width] * len(inputs[1][0]) if mask is None else mask.sum(dim=1).tolist())

    tiny_model.fusion.register_forward_pre_hook(note)
    evaluate_retrieval(tiny_model, images, replace(CONFIG, candidates=100))
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat)
    assert len(set(flat)) > 2
    assert max(map(len, lengths)) == CONFIG.batch_size


@pytest.mark.usefixtures("small_parts")
class TestWork:
    def test_continues_where_it_stopped(self, tiny_model, images, tmp_path):
        means = EvaluationOptions(work=tmp_path)
        expected = evaluate_retrieval(tiny_model, images, CONFIG)
        pairs = int((~itm_table(expected).isnan()).sum())
        stop(tiny_model, images, tmp_path, 12)
        (folder,) = tmp_path.iterdir()
        num_written = len(list(folder.glob("process-0/scores-*")))
        assert num_written >= 2
        seen = []
        tiny_model.fusion.register_forward_hook(
            lambda module, inputs, output: seen.append(len(output[0]))
        )
        actual = evaluate_retrieval(tiny_model, images, CONFIG, means)
        assert sum(seen) < pairs
        assert actual.metrics() == expected.metrics()
        assert torch.equal(cosine_table(actual), cosine_table(expected))
        assert list(tmp_path.iterdir()) == []

    def test_damaged_parts_are_computed_again(self, tiny_model, images, tmp_path, caplog):
        expected = evaluate_retrieval(tiny_model, images, CONFIG).metrics()
        work = tmp_path / "work"
        undamaged = tmp_path / "kept"
        stop(tiny_model, images, work, 12)
        (folder,) = work.iterdir()
        folder.rename(undamaged)
        names = {path.name for path in (undamaged / "process-0").glob("*.safetensors")}
        assert len(names) >= 4

        def flipped(content, share):
            bit = int(share * 8 * len(content))
            return (int.from_bytes(content, "little") ^ (1 << bit)).to_bytes(len(content), "little")

        damages = [partial(flipped, share=share) for share in (0, 0.85)]
        for damage in (*damages, lambda content: content[:-1]):
            shutil.copytree(undamaged, folder)
            for path in (folder / "process-0").glob("*.safetensors"):
                path.write_bytes(damage(path.read_bytes()))
            caplog.clear()
            assert (
                evaluate_retrieval(
                    tiny_model, images, CONFIG, EvaluationOptions(work=work)
                ).metrics()
                == expected
            )
            assert {message.split()[0].rpartition("/")[2] for message in caplog.messages} == names

    def test_is_kept_until_the_results_are_written(
        self, tiny_checkpoint, tiny_dataset, tmp_path, refused
    ):
        work = tmp_path / "work"
        out = tmp_path / "out"
        out.write_text("in the way")
        command = (
            "evaluate",
            tiny_checkpoint,
            "retrieval",
            "--data",
            tiny_dataset,
            "--candidates",
            3,
            "--work",
            work,
        )
        assert str(out) in refused(*command, "--out", out)
        modified = {path: path.stat().st_mtime_ns for path in work.glob("*/process-0/*")}
        assert len(modified) > 2
        out.unlink()
        cli.main([*map(str, command), "--out", str(out)])
        assert (out / "metrics.json").exists()
        assert list(work.iterdir()) == []

    def test_another_model_setting_precision_or_set_starts_on_its_own(
        self, tiny_model, tiny_dataset, tiny_processor, tmp_path, monkeypatch
    ):
        """Pairs and rows are the same in all, so that nothing but the name of the work keeps them apart."""
        folder = tmp_path / "changed"
        work = tmp_path / "work"
        shutil.copytree(tiny_dataset, folder)
        originals = caption_images(folder, "test", tiny_processor)
        stop(tiny_model, originals, work, 12)
        stop(tiny_model, originals, work, 7, replace(CONFIG, candidates=3))
        with torch.autocast("cpu", torch.bfloat16):
            stop(tiny_model, originals, work, 12)
        records = records_of(tiny_dataset, "test")
        variants = [
            replace(record, images=records[position - 1].images)
            for position, record in enumerate(records)
        ]
        shutil.rmtree(folder)
        write_set(folder, {"test": variants})
        changed = caption_images(folder, "test", tiny_processor)
        expected = evaluate_retrieval(tiny_model, changed, CONFIG).metrics()
        assert (
            evaluate_retrieval(tiny_model, changed, CONFIG, EvaluationOptions(work=work)).metrics()
            == expected
        )
        with torch.no_grad():
            tiny_model.head("itm").fc.bias += 1e-7
        stop(tiny_model, changed, work, 7)
        assert len(list(work.iterdir())) == 4
        grey = Processor(
            replace(tiny_processor.config, background=(9, 9, 9)), tiny_processor.tokenizer
        )
        stop(tiny_model, caption_images(folder, "test", grey), work, 7)
        monkeypatch.setattr(scoring_module, "world_size", lambda: 2)
        texts = ranked_texts(changed, CONFIG)[0]
        options = EvaluationOptions(work=work)
        with (
            pytest.raises(NotImplementedError),
            resumable(PairScorer(tiny_model, changed, texts, CONFIG, options)),
        ):
            raise NotImplementedError
        assert len(list(work.iterdir())) == 6

    def test_scores_of_other_pairs_are_not_taken(self, tiny_model, images, tmp_path):
        texts, truth = ranked_texts(images, CONFIG)
        scorer = PairScorer(tiny_model, images, texts, CONFIG, EvaluationOptions(work=tmp_path))
        with resumable(scorer) as pairs, torch.inference_mode():
            is_matching = torch.arange(len(images))[:, None] == truth.text_image_index[None]
            all_scores = pairs.score(*torch.ones_like(is_matching).nonzero(as_tuple=True))[0].view(
                is_matching.shape
            )
            right_scores, wrong_scores = (
                pairs.score(*selected.nonzero(as_tuple=True))[0]
                for selected in (is_matching, ~is_matching)
            )
        torch.testing.assert_close(right_scores, all_scores[is_matching], atol=1e-5, rtol=0)
        torch.testing.assert_close(wrong_scores, all_scores[~is_matching], atol=1e-5, rtol=0)

    def test_the_same_evaluation_twice_at_a_time(self, tiny_model, images, tmp_path):
        stop(tiny_model, images, tmp_path, 1)
        (folder,) = tmp_path.iterdir()
        with locked(folder), pytest.raises(FileExistsError, match="another process works in"):
            evaluate_retrieval(tiny_model, images, CONFIG, EvaluationOptions(work=tmp_path))


def test_scores_that_are_not_numbers(tiny_model, images):
    tiny_model.head("itm").register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(ValueError, match=r"\d+ of \d+ pairs have a score that is NaN"):
        evaluate_retrieval(tiny_model, images, CONFIG)


def test_a_gpu_is_waited_for_once_in_a_part(tiny_model, images, small_parts, monkeypatch):
    fetched = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: fetched.append(tensor) or tensor)
    texts, _ = ranked_texts(images, CONFIG)
    with (
        resumable(PairScorer(tiny_model, images, texts, CONFIG, EvaluationOptions())) as scorer,
        torch.no_grad(),
    ):
        scorer.score(*torch.cartesian_prod(torch.arange(len(images)), torch.arange(8)).T)
    # of an image each, in three batches
    assert [len(scores) for scores in fetched] == [8] * len(images)


@pytest.mark.slow
def test_killed_and_called_again_it_gives_the_same_figures(
    tiny_checkpoint, tiny_dataset, forked, tmp_path
):
    command = [
        "evaluate",
        str(tiny_checkpoint),
        "retrieval",
        "--data",
        str(tiny_dataset),
        "--candidates",
        "4",
    ]
    command += ["--batch-size", "3", "--device", "cpu", "--json"]

    def start(fault, work):
        arguments = [forked / "python", "-c", IN_PARTS, str(fault), *command, "--work", str(work)]
        tests = Path(processes.__file__).parents[1]
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tests
        )

    whole = start(0, tmp_path / "whole")
    work = tmp_path / "work"
    assert start(3, work).wait() == -signal.SIGKILL
    scores = {path: path.stat().st_mtime_ns for path in work.glob("*/process-0/scores-*")}
    assert len(scores) == 2
    again = start(0, work)
    outputs = [process.communicate() for process in (whole, again)]
    assert [process.returncode for process in (whole, again)] == [0, 0], outputs
    metrics = [json.loads(out) for out, _ in outputs]
    assert metrics[0] == metrics[1]
    assert list(work.iterdir()) == []
