"""k-nearest-neighbour accuracy of the small teachers on Tiny ImageNet's held-out pictures.

python -m teachers.small.knn --data ../shared/data
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.small.images import load_tiny_imagenet
from teachers.small.towers import build_tower, load_config, load_tower

HERE = Path(__file__).parent
NAMES = ("clip_ti16_128", "siglip_ti16_128")
NEIGHBOURS, TEMPERATURE = 20, 0.07


def classify(
    queries: Tensor, database: Tensor, labels: Tensor, classes: int, neighbours: int = NEIGHBOURS
) -> Tensor:
    """Votes of the nearest neighbours, weighted by exp(cosine / 0.07) (Wu et al. 2018, sec. 3.4).

    Args:
        queries: (Q, D) vectors to classify.
        database: (N, D) vectors of known classes.
        labels: (N,) those classes.
        classes: how many classes there are.
        neighbours: how many vote.

    Returns:
        The winning class of each query (Q,).
    """
    cosine = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
    nearest, index = cosine.topk(neighbours, dim=1)
    votes = torch.zeros(len(queries), classes)
    return votes.scatter_add_(1, labels[index], (nearest / TEMPERATURE).exp()).argmax(1)


def prepare(images: Tensor, folder: Path) -> Tensor:
    """Enlarges bytes (B, 3, H, W) to the teacher's own size and normalises them its way."""
    config = load_config(folder)
    side = config["model_cfg"]["vision_cfg"]["image_size"]
    pixels = F.interpolate(images.float() / 255, size=(side, side), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(config["preprocess_cfg"][k]).view(1, 3, 1, 1) for k in ("mean", "std")
    )
    return (pixels.clamp(0, 1) - mean) / std


@torch.no_grad()
def embed(tower: nn.Module, folder: Path, images: Tensor) -> Tensor:
    """Image vectors (N, D) of byte pictures (N, 3, H, W)."""
    return torch.cat([tower(prepare(chunk, folder)) for chunk in images.split(128)])


def accuracy(tower: nn.Module, folder: Path, data: Path) -> float:
    """Share of the validation pictures, in percent, that the train pictures classify right."""
    train, val = load_tiny_imagenet(data)
    vectors = [embed(tower, folder, split.images) for split in (train, val)]
    return score(vectors[1], vectors[0], val.labels, train.labels)


def score(queries: Tensor, database: Tensor, truth: Tensor, labels: Tensor) -> float:
    """Percent of right answers of `classify`."""
    guesses = classify(queries, database, labels, int(labels.max()) + 1)
    return 100 * (guesses == truth).double().mean().item()


def pixel_accuracy(data: Path) -> float:
    """The same measure for centred 16 x 16 pixels: what needs no network."""
    train, val = load_tiny_imagenet(data)
    small = [
        F.interpolate(s.images.float(), (16, 16), mode="area").flatten(1) for s in (train, val)
    ]
    mean = small[0].mean(0)
    return score(small[1] - mean, small[0] - mean, val.labels, train.labels)


def main() -> None:
    """Prints one line a teacher, and what random weights and raw pixels reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with tiny-imagenet/")
    parser.add_argument("--folder", type=Path, help="one teacher's folder (default: both shipped)")
    arguments = parser.parse_args()
    folders = [arguments.folder] if arguments.folder else [HERE / name for name in NAMES]
    for folder in folders:
        print(f"{folder.name}: {accuracy(load_tower(folder), folder, arguments.data):.2f} %")
        torch.manual_seed(0)
        random = build_tower(folder).eval()
        print(f"{folder.name}, random weights: {accuracy(random, folder, arguments.data):.2f} %")
    print(f"centred 16 x 16 pixels: {pixel_accuracy(arguments.data):.2f} %")


if __name__ == "__main__":
    main()
