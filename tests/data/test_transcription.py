"""Videos without subtitles are transcribed by a server in OpenAI's protocol, here one that checks what it is sent."""

import io
import json
import re
import threading
from email import message_from_bytes
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import numpy as np
import pytest

from bridgetower.data.config import Cutting
from bridgetower.data.sources import fetch, video
from bridgetower.data.sources.columns import Columns
from bridgetower.data.sources.reader import read
from helpers.sources import SUBTITLE_TEXTS, SUBTITLES, clip_image, write_clip

SEGMENTS = [
    {"id": 0, "start": 0.5, "end": 2.5, "text": " A red square"},
    {"id": 1, "start": 6, "end": 9, "text": "blue"},
]


def write_talk(path, seconds=12):
    """A clip with a tone whose loudness rises every second."""
    with av.open(str(path), "w") as container:
        video_stream = container.add_stream("libx264", rate=5)
        audio_stream = container.add_stream("aac", rate=22_050, layout="stereo")
        video_stream.width = 96
        video_stream.height = 64
        video_stream.pix_fmt = "yuv420p"
        for number in range(5 * seconds):
            container.mux(video_stream.encode(av.VideoFrame.from_image(clip_image(number // 5))))
        for second in range(seconds):
            tone = np.sin(np.arange(22_050) * 0.1) * 0.05 * (second + 1)
            frame = av.AudioFrame.from_ndarray(
                np.stack([tone, tone]).astype(np.float32), "fltp", "stereo"
            )
            frame.rate = 22_050
            frame.pts = second * 22_050
            frame.time_base = Fraction(1, 22_050)
            container.mux(audio_stream.encode(frame))
        container.mux([*video_stream.encode(), *audio_stream.encode()])
    return path


@pytest.fixture
def transcription_server(monkeypatch):
    class Stub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            fields_of_form = message_from_bytes(head + body).get_payload()
            fields = {
                field.get_param("name", header="content-disposition"): field.get_payload(
                    decode=True
                )
                for field in fields_of_form
            }
            self.sent.append((self.path, self.headers["Authorization"], fields))
            status, answer = self.answers.pop(0) if self.answers else (200, {"segments": SEGMENTS})
            content = json.dumps(answer).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", self.url)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    Stub.sent = []
    Stub.answers = []
    monkeypatch.setitem(vars(fetch.PATIENT), "pauses", (0.001, 0.001))
    with HTTPServer(("127.0.0.1", 0), Stub) as transcription_server:
        thread = threading.Thread(target=transcription_server.serve_forever)
        thread.start()
        Stub.url = f"http://127.0.0.1:{transcription_server.server_port}/v1"
        yield Stub
        transcription_server.shutdown()
        thread.join()


def spoken_moments(source, **settings):
    """Times and transcripts of moments in which something is said, and problems."""
    examples = list(read(source, Columns(cutting=Cutting(**settings))))
    moments = [
        (example.images[0].moment, example.texts[0]) for example in examples if example.texts
    ]
    return moments, [example.problem for example in examples if example.problem]


def test_what_is_sent_and_what_becomes_of_it(tmp_path, transcription_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setattr(video, "SECONDS_OF_REQUEST", 5)
    transcription_server.answers[:] = [
        (200, {"segments": [{"start": 1, "end": 2, "text": word}]}) for word in ("one", "two")
    ]
    moments, problems = spoken_moments(
        write_talk(tmp_path / "talk.mp4"),
        transcribe=transcription_server.url,
        transcribe_model="tiny",
    )
    assert problems == []
    assert [text for _, text in moments] == ["one", "two", "A red square"]
    assert [start for (start, _), _ in moments] == pytest.approx([1, 6, 10.5], abs=0.1)
    assert len(transcription_server.sent) == 3
    loudness = []
    starts = []
    for path, key, fields in transcription_server.sent:
        assert (path, key) == ("/v1/audio/transcriptions", "Bearer sk-1")
        assert (fields["model"], fields["response_format"]) == (b"tiny", b"verbose_json")
        with av.open(io.BytesIO(fields["file"])) as sound:
            (track,) = sound.streams
            assert (track.codec_context.name, track.rate, track.layout.name) == (
                "mp3float",
                16_000,
                "mono",
            )
            wave = np.concatenate([frame.to_ndarray().ravel() for frame in sound.decode(track)])
        starts.append(len(wave) / 16_000)
        loudness.append(float(np.abs(wave).mean()))
    assert starts == pytest.approx([5, 5, 2], abs=0.2)
    assert loudness == pytest.approx([0.05 * n * 2 / np.pi for n in (3, 8, 11.5)], rel=0.1)


def test_times_are_those_of_the_video(tmp_path, transcription_server):
    talk = write_talk(tmp_path / "talk.mp4")
    assert spoken_moments(talk, transcribe=f"{transcription_server.url}/audio/transcriptions") == (
        [((0.5, 2.5), "A red square"), ((6.0, 9.0), "blue")],
        [],
    )
    (tmp_path / "talk.srt").write_text(SUBTITLES)
    assert [
        text for _, text in spoken_moments(talk, transcribe=transcription_server.url)[0]
    ] == SUBTITLE_TEXTS
    assert len(transcription_server.sent) == 1


def test_a_server_that_is_busy_is_asked_again_and_errors_are_of_the_video(
    tmp_path, transcription_server
):
    talk = write_talk(tmp_path / "talk.mp4", seconds=2)
    transcription_server.answers[:] = [(503, {}), (429, {})]
    assert spoken_moments(talk, transcribe=transcription_server.url)[0] == [
        ((0.5, 2.0), "A red square")
    ]
    assert len(transcription_server.sent) == 3
    for answers, expected_problem, num_requests in (
        ([(401, {"error": "wrong key"})], "401.*Unauthorized.*wrong key", 1),
        ([(200, {"text": "all of it"})], "without segments that have start, end and text", 1),
        ([(200, {"segments": [{"start": "inf", "end": 1, "text": "a"}]})], "without segments", 1),
        ([(500, {})] * 3, "500.*Internal Server Error", 3),
        ([(302, {})], "302.*Found", 1),  # which would take the key elsewhere
    ):
        transcription_server.sent.clear()
        transcription_server.answers[:] = answers
        moments, (problem,) = spoken_moments(talk, transcribe=transcription_server.url)
        assert (moments, len(transcription_server.sent)) == ([], num_requests)
        assert re.search(expected_problem, problem)


def test_a_video_without_sound_is_cut_by_scenes(tmp_path, transcription_server):
    assert spoken_moments(
        write_clip(tmp_path / "silent.mp4"), transcribe=transcription_server.url
    ) == ([], [])
    assert transcription_server.sent == []
    with pytest.raises(ValueError, match="expected a URL"):
        Cutting(transcribe="localhost:8000")
