"""A student that is timm's ConvNeXt: its training step and its inference, beside the bare network.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_timm_student

A ConvNeXt-A student of 224 px and two ViT-B/16 teachers with random weights, otherwise as in
`bench_step`; and its exported backbone beside timm's own network. Both take turns in one process;
the ratio of process CPU time is the median over rounds. Targets: at most 1.05 times the CPU time of
a bare loop with the same backbone, heads and losses; at least 0.97 of timm's images a second.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import student
from student.config import HeadConfig
from student.model import Student
from student.storage import save_student
from student.timm_config import TimmStudentConfig
from teachers.features import FeatureSpec
from tests.benchmarks.figure import Figure
from tests.benchmarks.inference import speed_ratio
from tests.benchmarks.one_step import CLIP, DECAY, LR, Step, _head, _phi_s, cpu_ratio, our_step
from tests.benchmarks.workload import BATCH, SIDE, TEACHER, recipe

MODEL, TEACHERS = "convnext_atto", 2


def tree() -> dict[str, object]:
    """The recipe of the step benchmarks with the other student."""
    found = recipe(Path("unused"), steps=1)
    found["student"] = {"kind": "timm", "model": MODEL, "head": found["student"]["head"]}
    return found


def bare_step() -> Step:
    """The same step in plain PyTorch and timm; its heads make the map twice as dense."""
    import timm  # after the package `teachers`, which repairs torchvision

    mean, std = (torch.full((3, 1, 1), value) for value in (0.45, 0.27))
    free = {"num_classes": 0, "dynamic_img_size": True}
    teachers = [timm.create_model(TEACHER, **free).eval() for _ in range(TEACHERS)]
    network = timm.create_model(MODEL, num_classes=0)
    width, dim = network.num_features, teachers[0].embed_dim
    heads = nn.ModuleList(
        nn.ModuleList((_head(width, dim), _head(width, 4 * dim))) for _ in teachers
    )
    phi_s = _phi_s(dim)
    matrix, centre = phi_s.alpha * phi_s.rotation, phi_s.mean
    parameters = [*network.parameters(), *heads.parameters()]
    decayed, others = ([p for p in parameters if (p.ndim > 1) == matrices] for matrices in (1, 0))
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)

    def loss_of(images: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = [teacher.forward_features(images) for teacher in teachers]
            targets = [(t[:, 0], (t[:, 1:] - centre) @ matrix.T) for t in tokens]
        maps = network.forward_features(images)
        pooled = network.forward_head(maps, pre_logits=True)
        patches, loss = maps.flatten(2).mT.contiguous(), torch.zeros(())
        for (of_summary, of_map), (summary, spatial) in zip(heads, targets, strict=True):
            cosine = F.cosine_similarity(of_summary(pooled), summary)
            side = maps.shape[-1]
            dense = rearrange(of_map(patches), "b (h w) (y x d) -> b (h y w x) d", h=side, y=2, x=2)
            loss = loss + (1 - cosine).mean() + F.mse_loss(dense, spatial)
        return loss

    def step(batches: Sequence[Tensor]) -> None:
        (pixels,) = batches
        loss_of((pixels.float() / 255 - mean) / std).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def write(path: Path) -> None:
    """The backbone of a student of one teacher, as `distill.export --no-heads` writes it."""
    spec = FeatureSpec(summary_dim=768, spatial_dim=768, patch_size=16, resolution=(SIDE, SIDE))
    made = Student(TimmStudentConfig(model=MODEL, head=HeadConfig(only=())), {"first": spec})
    save_student(path, made.config, made.targets, made.state_dict(), {})


def timm_network() -> Callable[[Tensor], object]:
    """timm's own network on normalised images: its last map and its pooled vector."""
    import timm

    network = timm.create_model(MODEL, num_classes=0).eval()

    def run(images: Tensor) -> object:
        maps = network.forward_features(images)
        return maps, network.forward_head(maps, pre_logits=True)

    return run


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures and prints; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.safetensors"
        write(path)
        variants = {"student": student.load(path), "timm": timm_network()}
        speed = speed_ratio(variants, torch.rand(BATCH, 3, SIDE, SIDE), 2 * rounds)
    batch = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    steps = {"ours": our_step(tree()), "bare": bare_step()}
    ratio = cpu_ratio(steps, [batch], rounds)
    return [
        Figure("a ConvNeXt student's step: CPU time over a bare PyTorch loop", ratio, 1.05, True),
        Figure("ConvNeXt student inference: images/s over timm's network", speed, 0.97, False),
    ]


if __name__ == "__main__":
    for figure in main():
        print(figure.line())
