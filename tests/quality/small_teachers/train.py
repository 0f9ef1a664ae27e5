"""Trains one of the two small teachers, on a CPU in about half an hour.

    python -m tests.quality.small_teachers.train --data DATA --teacher clip_ti16_128 --out DIR

Three losses: image-text contrast with captions of class names (softmax for CLIP, sigmoid for
SigLIP), the direction of SqueezeNet's pooled features for the image vector, and that of its map for
each token. Most steps use a quarter of the patches (FLIP), the last steps all of them.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.quality.small_teachers.augment import (
    cell_centres,
    crop,
    jitter,
    random_boxes,
    to_picture,
)
from tests.quality.small_teachers.captions import Captions
from tests.quality.small_teachers.images import (
    load_class_names,
    load_photo_crops,
    load_tiny_imagenet,
)
from tests.quality.small_teachers.losses import (
    contrastive_loss,
    direction_loss,
    matches,
    sigmoid_loss,
    spatial_targets,
)
from tests.quality.small_teachers.targets import CHANNELS, Maps, load_maps
from tests.quality.small_teachers.towers import PREFIX, SMALL, build_tower, encode_kept, load_config

LABELLED, PHOTOS = 104, 24  # images of a step
SIDE, GRID = 128, 8
KEPT = ((0.7, 16), (0.92, 32), (1.0, 64))  # (share of the steps, patches used until then)
RATE, WARMUP, DECAY = 2e-3, 0.04, 0.05
LABEL_WEIGHT, IMAGE_WEIGHT, TOKEN_WEIGHT = 0.5, 2.0, 2.0
SNAPSHOT = 200


class Learner(nn.Module):
    """A vision tower with the modules that only training needs.

    Args:
        folder: the teacher's folder, for the architecture.
        captions: the captions, for the text tower's vocabulary.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path, captions: Captions) -> None:
        super().__init__()
        config = load_config(folder)
        model = config["model_cfg"]
        width = model["embed_dim"]
        self.sigmoid = "init_logit_bias" in model
        self.tower = build_tower(folder)
        self.text = captions.build_tower(width)
        self.image_head = nn.Linear(width, CHANNELS)
        self.token_head = nn.Linear(192, CHANNELS)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(float(model.get("init_logit_bias", 0))))
        for key in ("mean", "std"):
            value = torch.tensor(config["preprocess_cfg"][key]).view(1, 3, 1, 1)
            self.register_buffer(key, value)

    def forward(
        self, images: Tensor, kept: Tensor, texts: Tensor, positive: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """The losses of one step.

        Args:
            images: (B, 3, H, W) in [0, 1]; the labelled ones first.
            kept: (B, n) indices of the patches that the tower encodes.
            texts: (N, words) captions.
            positive: (L, N) bool, whether text j describes labelled image i.
            target: (B, cells, C) SqueezeNet's map at all cells of the grid.
        """
        # On a CPU, the backward pass of flash attention takes twice as long for so few tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            normalised = (images - self.mean) / self.std
            vectors, tokens = encode_kept(self.tower, normalised, kept)
            words = self.text(texts)
            image_guess, token_guess = self.image_head(vectors), self.token_head(tokens)
        vectors, words = (nn.functional.normalize(v.float(), dim=1) for v in (vectors, words))
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        logits = scale * vectors[: len(positive)] @ words.T + self.bias
        seen = target.gather(1, kept[..., None].expand(-1, -1, target.shape[2]))
        return {
            "label": (sigmoid_loss if self.sigmoid else contrastive_loss)(logits, positive),
            "image": direction_loss(image_guess, target.mean(1)),
            "token": direction_loss(token_guess, seen),
        }


def build_optimizers(learner: Learner) -> list[torch.optim.Optimizer]:
    """Muon (Jordan, 2024) for the matrices of the vision blocks, AdamW for the rest."""
    matrices = [p for n, p in learner.tower.named_parameters() if p.ndim == 2 and "blocks." in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in learner.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98)),
    ]


def rate_at(progress: float) -> float:
    """Learning rate at a share of the steps: linear warm-up, then linear decay to zero."""
    return RATE * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))


def patches_at(progress: float) -> int:
    """Number of patches, of 64, that are used at a share of the steps."""
    return next(count for end, count in KEPT if progress < end or end == 1.0)


def draw_batch(
    pictures: tuple[Tensor, Tensor], targets: Maps, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random crops of random images.

    Returns:
        The crops (B, 3, 128, 128) in [0, 1], the maps at their cells (B, 64, C), and the indices
        of the labelled images (`LABELLED`,).
    """
    centres = cell_centres(GRID, GRID)
    crops, values, chosen = [], [], []
    for images, maps, count in zip(pictures, targets, (LABELLED, PHOTOS), strict=True):
        index = torch.randint(len(images), (count,), generator=generator)
        boxes = random_boxes(count, generator)
        crops.append(crop(images[index], boxes, SIDE))
        values.append(spatial_targets(maps[index].float(), to_picture(centres, boxes)))
        chosen.append(index)
    return jitter(torch.cat(crops), generator), torch.cat(values), chosen[0]


def save_teacher(learner: Learner, source: Path, out: Path) -> None:
    """Writes the vision tower in float16, with the configuration files beside it."""
    out.mkdir(parents=True, exist_ok=True)
    for description in source.glob("*.json"):
        if out.resolve() != source.resolve():
            shutil.copy(description, out)
    state = learner.tower.state_dict()
    halves = {PREFIX + name: value.half().contiguous() for name, value in state.items()}
    save_file(halves, out / "open_clip_model.safetensors", {"format": "pt"})


def train(data: Path, teacher: str, out: Path, steps: int, seed: int, cache: Path) -> None:
    """Trains one teacher and saves it in `out` every `SNAPSHOT` steps and at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    labelled, _ = load_tiny_imagenet(data)
    photos = load_photo_crops(data)
    targets = load_maps(cache, data, labelled.images, photos)
    captions = Captions(list(load_class_names(data).values()))
    learner = Learner(SMALL / teacher, captions)
    optimizers = build_optimizers(learner)
    classes = torch.arange(len(captions.synonyms))
    start = time.monotonic()
    for step in range(steps):
        progress = step / steps
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = rate_at(progress)
        images, target, index = draw_batch((labelled.images, photos), targets, generator)
        order = torch.rand(len(images), GRID * GRID, generator=generator).argsort(1)
        kept = order[:, : patches_at(progress)]
        positive = matches(labelled.labels[index], classes)
        losses = learner(images, kept, captions.draw(generator), positive, target)
        total = LABEL_WEIGHT * losses["label"]
        total = total + IMAGE_WEIGHT * losses["image"] + TOKEN_WEIGHT * losses["token"]
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            values = {name: round(value.item(), 4) for name, value in losses.items()}
            seconds = round(time.monotonic() - start, 1)
            print(json.dumps({"step": step, "seconds": seconds, **values}), flush=True)
        if step % SNAPSHOT == SNAPSHOT - 1 or step == steps - 1:
            save_teacher(learner, SMALL / teacher, out)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with tiny-imagenet/ ...")
    parser.add_argument("--teacher", required=True, choices=("clip_ti16_128", "siglip_ti16_128"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained teacher")
    parser.add_argument("--steps", type=int, default=1350)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache", type=Path, default=Path("out/targets.pt"), help="SqueezeNet's maps (1.5 GB)"
    )
    arguments = parser.parse_args()
    train(**vars(arguments))


if __name__ == "__main__":
    main()
