"""Whether the patches that `explain` marks decide a match: python research/explained.py MODEL SOURCE [--count 200].

Of each image of a source with its first caption, a share of the patches is covered by the mean colour of the image,
those with the largest values first, summed over layers and words. Printed is how far the log-odds of a match fall, mean
over the images with a 95 % interval: by Grad-CAM, by attention, by chance, and as a control by the Grad-CAM of the next
image's caption, whose best patches are those of another text.
"""

import argparse
import json
from collections import defaultdict
from itertools import islice

import numpy as np
import torch
from torch import Tensor

import bridgetower
from bridgetower.data.sources.reader import read
from bridgetower.inference.attention import Explanation, attention_of

SHARES = (0.1, 0.25, 0.5)


def values_of(found: Explanation) -> Tensor:
    """Returns a value for each patch [P]."""
    return found.maps.sum(dim=(0, 1)).flatten()


def covered(pixels: Tensor, patches: Tensor, side: int) -> Tensor:
    """Returns an image [3, H, W] in which some patches have its mean colour."""
    hidden = torch.zeros(pixels.shape[1] // side, pixels.shape[2] // side, dtype=torch.bool)
    hidden.view(-1)[patches] = True
    whole = hidden.repeat_interleave(side, 0).repeat_interleave(side, 1)
    mean = pixels.float().mean(dim=(1, 2)).round().to(pixels.dtype)
    return torch.where(whole, mean[:, None, None], pixels)


@torch.inference_mode()
def log_odds(model: bridgetower.BridgeTower, pixels: Tensor, ids: Tensor) -> list[float]:
    """Returns those of a text with each image."""
    text = model.encode_text(ids.expand(len(pixels), -1))
    logits = model.itm_logits(model.fuse(model.encode_image(pixels), text).pooled)
    return [float(value) for value in logits[:, 1] - logits[:, 0]]


def main() -> None:
    """Prints a row for each order and share of patches."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or hub id of a model with a matching head")
    parser.add_argument("source", help="images with captions, as `bridgetower index` reads them")
    parser.add_argument("--count", type=int, default=200, help="how many images")
    given = parser.parse_args()
    predictor, draw = bridgetower.load(given.model, device="cpu"), np.random.default_rng(0)
    model, processor = predictor.model, predictor.processor
    side, falls = model.config.vision.patch_size, defaultdict[tuple[str, float], list[float]](list)
    examples = list(
        islice((one for one in read(given.source) if one.images and one.texts), given.count)
    )
    texts = processor.token_ids([one.texts[0] for one in examples], truncate=True)
    for number, (example, ids) in enumerate(zip(examples, texts, strict=True)):
        image = processor.resize(example.images[0].read())
        other = texts[(number + 1) % len(texts)]
        orders = {
            "gradcam": values_of(attention_of(predictor, image, ids, "gradcam")),
            "attention": values_of(attention_of(predictor, image, ids)),
            "chance": torch.from_numpy(
                draw.random(image.shape[1] // side * (image.shape[2] // side))
            ),
            "gradcam of another text": values_of(attention_of(predictor, image, other, "gradcam")),
        }
        images = [image]
        for values in orders.values():
            ranked = values.argsort(descending=True)
            images += [
                covered(image, ranked[: max(1, round(share * len(ranked)))], side)
                for share in SHARES
            ]
        whole, *rest = log_odds(
            model, processor.normalise(torch.stack(images)), torch.tensor([ids])
        )
        for key, value in zip(
            ((name, share) for name in orders for share in SHARES), rest, strict=True
        ):
            falls[key].append(whole - value)
    for (name, share), fall in falls.items():
        half = 1.96 * np.std(fall, ddof=1) / len(fall) ** 0.5
        row = {
            "order": name,
            "covered": share,
            "fall": round(float(np.mean(fall)), 3),
            "half_interval": round(half, 3),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
