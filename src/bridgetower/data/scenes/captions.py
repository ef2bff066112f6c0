"""What a scene shows, in a sentence that names every shape."""

from __future__ import annotations

from bridgetower.data.scenes.scene import Level, Noun, Scene, Shape


def caption(scene: Scene, level: Level) -> str:
    """Names all shapes from left to right; sizes only where the level has several."""
    names = [_noun(shape, level).with_article for shape in sorted(scene.shapes, key=lambda shape: shape.x)]
    if len(names) == 1:
        return f"{names[0]}."
    return f"from left to right: {', '.join(names[:-1])} and {names[-1]}."


def _noun(shape: Shape, level: Level) -> Noun:
    return Noun(kind=shape.kind, colour=shape.colour, size=shape.size if len(level.sizes) > 1 else None)
