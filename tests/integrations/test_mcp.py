"""The official client starts `bridgetower mcp` and calls its tools. Answers are those of the searcher and the model."""

import asyncio
import base64
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from bridgetower.inference.predictor import load
from bridgetower.search import index as index_module
from bridgetower.search.build import build_index
from bridgetower.search.index import Index, Unrelated
from bridgetower.search.searcher import Searcher
from helpers.sources import SUBTITLES, serve_files, write_clip

pytest.importorskip("mcp")
import mcp

from bridgetower.integrations.mcp import mcp_server

TEXT = "a red square"


@pytest.fixture(scope="module")
def moments_index(tmp_path_factory, predictor):
    folder = tmp_path_factory.mktemp("found") / "seen"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (800, 300 + number), colour).save(folder / f"{number}.png")
    write_clip(folder / "talk.mp4")
    (folder / "talk.srt").write_text(SUBTITLES)
    build_index(folder, folder.parent / "seen.lance", predictor)
    return folder.parent / "seen.lance"


@pytest.fixture
def moments_searcher(moments_index, predictor):
    return Searcher(moments_index, predictor)


@pytest.fixture
def call_with(answering_checkpoint):
    def with_searcher(searcher):
        server = mcp_server(searcher, load(answering_checkpoint, device="cpu"))

        def called(tool, **arguments):
            async def ask():
                async with mcp.Client(server) as client:
                    return await client.call_tool(tool, arguments)

            return asyncio.run(ask())

        return called

    return with_searcher


@pytest.fixture
def call(call_with, moments_searcher):
    return call_with(moments_searcher)


def hits_of(result):
    assert not result.is_error
    return [json.loads(block.text) for block in result.content if block.type == "text"]


def test_images_are_those_of_the_search_with_small_copies(call, moments_searcher):
    result = call("search_images", query=TEXT, top=2, where={"width": {"gte": 800}})
    expected = moments_searcher.search(TEXT, top=2, where="width >= 800", against="images")
    assert [(hit["id"], hit["file"]) for hit in hits_of(result)] == [
        (hit.digest, str(hit.file)) for hit in expected
    ]
    copies = [block for block in result.content if block.type == "image"]
    for hit, copy in zip(expected, copies, strict=True):
        with (
            Image.open(io.BytesIO(base64.b64decode(copy.data))) as small,
            Image.open(hit.file) as whole,
        ):
            assert (copy.mime_type, max(small.size)) == ("image/jpeg", 384)
            pairs = zip(small.getpixel((9, 9)), whole.getpixel((9, 9)), strict=True)
            assert all(abs(value - other) < 6 for value, other in pairs)


@pytest.mark.parametrize(("limit", "num_weak"), [(1.0, 3), (-1.0, 0)])
def test_weak_hits_are_told(call_with, moments_index, predictor, tmp_path, limit, num_weak):
    shutil.copytree(moments_index, tmp_path / "copy.lance")
    copy = Index(tmp_path / "copy.lance", root=moments_index.parent / "seen")
    copy.set_unrelated(Unrelated(rows=4, images=limit))
    hits = hits_of(
        call_with(Searcher(copy, predictor))(
            "search_images", query=TEXT, where={"width": {"gte": 800}}
        )
    )
    assert [hit.get("weak") for hit in hits if "weak" in hit] == [
        "unrelated texts find images that are just as near"
    ] * num_weak
    assert len(hits) == 3


def test_moments_have_their_times(call, moments_searcher):
    hits = hits_of(call("find_moments", query="followed by green", top=2))
    expected = moments_searcher.search("followed by green", top=2, where="start IS NOT NULL")
    assert [(hit["start"], hit["end"]) for hit in hits] == [
        (hit.start, hit.end) for hit in expected
    ]
    assert hits[0]["captions"] == list(expected[0].captions)


def test_an_image_that_was_found_is_asked_about(call, moments_searcher, answering_checkpoint):
    (hit,) = moments_searcher.search(TEXT, top=1, where="start IS NULL")
    answers = call("ask", question="what colour is it?", id=hit.digest).structured_content["result"]
    expected = load(answering_checkpoint, device="cpu").answer(str(hit.file), "what colour is it?")
    assert [row["answer"] for row in answers] == [choice.label for choice in expected]
    assert [row["probability"] for row in answers] == pytest.approx(
        [choice.probability for choice in expected], abs=1e-4
    )


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("ask", {"question": "what?", "id": "/etc/passwd"}, "the index has no image with the id"),
        ("search_images", {"query": " "}, "give words"),
        ("search_images", {"query": TEXT, "top": 0}, "greater than or equal to 1"),
        (
            "search_images",
            {"query": TEXT, "where": {"path": {"eq": "a' OR 1=1"}, "wide": 1}},
            "wide",
        ),
        ("find_moments", {}, "query"),
    ],
)
def test_bad_calls_are_told_why(call, tool, arguments, message):
    result = call(tool, **arguments)
    assert result.is_error
    assert message in result.content[0].text


def test_a_model_that_answers_no_questions_is_refused(moments_searcher, predictor):
    with pytest.raises(ValueError, match="this model has no vqa head"):
        mcp_server(moments_searcher, predictor)


def test_files_outside_the_folder_and_changed_ones_are_not_shown(
    call, moments_searcher, moments_index
):
    (hit,) = moments_searcher.search(TEXT, top=1, where="start IS NULL")
    file = Path(hit.file)
    content = Path(hit.file).read_bytes()
    try:
        for change in (
            lambda: file.write_bytes(b"other"),
            lambda: (file.unlink(), file.symlink_to("/etc/passwd")),
        ):
            change()
            assert hit.digest not in [
                hit["id"] for hit in hits_of(call("search_images", query=TEXT, top=2))
            ]
            assert call("ask", question="what?", id=hit.digest).is_error
    finally:
        file.unlink()
        file.write_bytes(content)


def test_nothing_at_urls_or_outside_the_folder_is_opened(
    predictor, moments_index, call_with, monkeypatch, tmp_path
):
    (tmp_path / "seen").mkdir()
    shutil.copy(moments_index.parent / "seen" / "0.png", tmp_path / "seen" / "0.png")
    with serve_files(moments_index.parent / "seen") as url:
        opened = list[str]()
        read = index_module.read_indexed
        monkeypatch.setattr(
            index_module,
            "read_indexed",
            lambda file, image: opened.append(str(file)) or read(file, image),
        )
        for inside in (["0.png"], []):
            rows = ["image", f"{url}/1.png", str(moments_index.parent / "seen" / "2.png"), *inside]
            (tmp_path / "seen" / "list.csv").write_text("\n".join(rows))
            build_index(tmp_path / "seen" / "list.csv", tmp_path / "other.lance", predictor)
            searcher = Searcher(tmp_path / "other.lance", predictor)
            assert len(searcher.search(TEXT)) == len(rows) - 1
            assert len(opened) == len(rows) - 1
            del opened[:]
            hits = hits_of(call_with(searcher)("search_images", query=TEXT))
            problems = [hit.get("problem", "") for hit in hits]
            if inside:  # what cannot be matched is left out, unless nothing can
                assert (len(hits), problems) == (1, [""])
            else:
                assert sorted(problems) == [
                    "the file is outside the folder of the index",
                    "the image is at a URL, which is not fetched because an index names it",
                ]
            assert set(opened) == {str(tmp_path / "seen" / name) for name in inside}
            del opened[:]
        with pytest.raises(ValueError, match="bytes, the limit is 9"):
            searcher.search(TEXT, max_bytes=9)


def test_the_command_speaks_over_stdin_and_stdout(moments_index, moments_searcher, forked):
    arguments = ["mcp", str(moments_index), "--device", "cpu"]
    environment = dict(os.environ)
    parameters = mcp.StdioServerParameters(
        command=str(forked / "bridgetower"), args=arguments, env=environment
    )

    async def ask():
        async with mcp.Client(mcp.stdio_client(parameters)) as client:
            tools = [tool.name for tool in (await client.list_tools()).tools]
            return tools, await client.call_tool("search_images", {"query": TEXT, "top": 1})

    tools, result = asyncio.run(ask())
    assert tools == ["search_images", "find_moments"]
    assert [hit["id"] for hit in hits_of(result)] == [
        moments_searcher.search(TEXT, top=1, against="images")[0].digest
    ]
