"""Generated clips: a colour every three seconds with the number of the second burnt in, and subtitles."""

from fractions import Fraction

import av
from PIL import Image, ImageDraw

COLOURS = ("red", "lime", "blue", "white")
SCENE = 3  # seconds of a colour
SIZE = (96, 64)
SRT = (
    "1\n00:00:00,500 --> 00:00:02,500\nA red <i>square</i>\n\n"
    "2\n00:00:03,500 --> 00:00:05,000\nis {\\an8}followed\nby green\n\n"
    "3\n00:00:06,000 --> 00:00:09,500\nand by blue, née azure\n"
)
SAID = ["A red square", "is followed by green", "and by blue, née azure"]


def write_clip(
    path,
    *,
    codec="libx264",
    fps=5,
    seconds=12,
    size=SIZE,
    subtitles=None,
    keyframes=250,
    begin=0,
    pixels=None,
    still=False,
):
    """Writes a clip, with pixels of a ratio of sides, or of one colour; the container follows from the suffix."""
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", keyframes
        if pixels is not None:
            stream.codec_context.sample_aspect_ratio = pixels
        words = None if subtitles is None else container.add_mux_stream(subtitles[0])
        for number in range(fps * seconds):
            frame = av.VideoFrame.from_image(drawn(0 if still else number // fps, size))
            frame.pts, frame.time_base = begin * fps + number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for start, end, content in () if subtitles is None else subtitles[1]:
            packet = av.Packet(content)
            packet.stream, packet.time_base = words, Fraction(1, 1000)
            packet.pts = packet.dts = round(start * 1000)
            packet.duration = round((end - start) * 1000)
            container.mux(packet)
    return path


def drawn(second, size=SIZE):
    image = Image.new("RGB", size, COLOURS[second // SCENE % len(COLOURS)])
    ImageDraw.Draw(image).text((4, 2), f"second {second}", fill="black")
    return image
