"""k-nearest-neighbour accuracy of the small teachers on Tiny ImageNet's validation images.

python -m tests.quality.small_teachers.knn --data DATA
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.quality.small_teachers.images import load_tiny_imagenet
from tests.quality.small_teachers.towers import SMALL, build_tower, load_config, load_tower

NAMES = ("clip_ti16_128", "siglip_ti16_128")
NEIGHBOURS, TEMPERATURE = 20, 0.07


def classify(
    queries: Tensor, database: Tensor, labels: Tensor, classes: int, neighbours: int = NEIGHBOURS
) -> Tensor:
    """Votes of the nearest neighbours, weighted by exp(cosine / 0.07).

    Source: Wu et al., arXiv 1805.01978, section 3.4.

    Args:
        queries: (Q, D) vectors to classify.
        database: (N, D) labelled vectors.
        labels: (N,) their classes.
        classes: number of classes.
        neighbours: number of neighbours that vote.

    Returns:
        (Q,) the class of each query.
    """
    cosine = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
    nearest, index = cosine.topk(neighbours, dim=1)
    votes = torch.zeros(len(queries), classes)
    return votes.scatter_add_(1, labels[index], (nearest / TEMPERATURE).exp()).argmax(1)


def prepare(images: Tensor, folder: Path) -> Tensor:
    """Resizes uint8 images (B, 3, H, W) to the teacher's input size and normalises them."""
    config = load_config(folder)
    side = config["model_cfg"]["vision_cfg"]["image_size"]
    pixels = F.interpolate(images.float() / 255, size=(side, side), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(config["preprocess_cfg"][k]).view(1, 3, 1, 1) for k in ("mean", "std")
    )
    return (pixels.clamp(0, 1) - mean) / std


@torch.no_grad()
def embed(tower: nn.Module, folder: Path, images: Tensor) -> Tensor:
    """Image vectors (N, D) of uint8 images (N, 3, H, W)."""
    return torch.cat([tower(prepare(chunk, folder)) for chunk in images.split(128)])


def accuracy(tower: nn.Module, folder: Path, data: Path) -> float:
    """Accuracy on the validation images in percent, with the training images as database."""
    train, val = load_tiny_imagenet(data)
    vectors = [embed(tower, folder, split.images) for split in (train, val)]
    return score(vectors[1], vectors[0], val.labels, train.labels)


def score(queries: Tensor, database: Tensor, truth: Tensor, labels: Tensor) -> float:
    """Accuracy of `classify` in percent."""
    guesses = classify(queries, database, labels, int(labels.max()) + 1)
    return 100 * (guesses == truth).double().mean().item()


def pixel_accuracy(data: Path) -> float:
    """The same accuracy for mean-centred 16 x 16 images, as a baseline without a network."""
    train, val = load_tiny_imagenet(data)
    small = [
        F.interpolate(s.images.float(), (16, 16), mode="area").flatten(1) for s in (train, val)
    ]
    mean = small[0].mean(0)
    return score(small[1] - mean, small[0] - mean, val.labels, train.labels)


def main() -> None:
    """Prints the accuracy of each teacher, of random weights and of raw pixels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with tiny-imagenet/")
    parser.add_argument("--folder", type=Path, help="the folder of one teacher (default: both)")
    arguments = parser.parse_args()
    folders = [arguments.folder] if arguments.folder else [SMALL / name for name in NAMES]
    for folder in folders:
        print(f"{folder.name}: {accuracy(load_tower(folder), folder, arguments.data):.2f} %")
        torch.manual_seed(0)
        random = build_tower(folder).eval()
        print(f"{folder.name}, random weights: {accuracy(random, folder, arguments.data):.2f} %")
    print(f"centred 16 x 16 pixels: {pixel_accuracy(arguments.data):.2f} %")


if __name__ == "__main__":
    main()
