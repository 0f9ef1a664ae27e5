"""A small student, its statistics and its run's checkpoint, that tests of exports share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.formats.export import export_student
from distill.runtime.checkpoint import save_checkpoint
from distill.runtime.config import dump_yaml
from distill.targets.target_statistics import TargetStatistics, save_statistics
from student.config import HeadConfig, StudentConfig
from student.model import Student
from student.storage import load_student, save_student
from teachers.features import FeatureSpec
from teachers.phi_s import FeatureStatistics, PhiS, fit_phi_s

TARGETS = {
    "siglip": FeatureSpec(summary_dim=5, spatial_dim=6, patch_size=14, resolution=(28, 42)),
    "clip": FeatureSpec(summary_dim=9, spatial_dim=8, patch_size=16, resolution=(32, 32)),
    "muted": FeatureSpec(summary_dim=None, spatial_dim=3, patch_size=16, resolution=(32, 32)),
}
IMAGES = torch.rand(2, 3, 8, 20, generator=torch.Generator().manual_seed(1))


def build(targets: dict[str, FeatureSpec] = TARGETS, **changes: Any) -> Student:
    torch.manual_seed(0)
    head = HeadConfig(hidden_dim=12, num_layers=1, upsample={"clip": 2})
    sizes = {"width": 16, "heads": 2, "depth": 2, "patch_size": 4, "max_resolution": 24}
    return Student(StudentConfig(**(sizes | {"head": head} | changes)), targets).eval()


def statistics(name: str) -> PhiS:
    """PHI-S of features with an offset and unequal channels, as teachers have."""
    generator = torch.Generator().manual_seed(len(name))
    dim = TARGETS[name].spatial_dim
    sums = FeatureStatistics.zeros(dim)
    mixing = torch.randn(dim, dim, generator=generator)
    sums.update(torch.randn(500, dim, generator=generator) @ mixing + 3)
    return fit_phi_s(sums)


def write_run(folder: Path, student: Student, *, step: int = 7, phi_s: str = "phi_s") -> Path:
    """A checkpoint as training leaves it: the teacher of weight zero has no statistics."""

    def write(path: Path) -> None:
        save_student(
            path / "student.safetensors", student.config, student.targets, student.state_dict(), {}
        )
        for name in ("siglip", "clip"):
            each = TargetStatistics(statistics(name), torch.ones(()))
            save_statistics(path / "statistics" / f"{name}.safetensors", each, "checkpoint")
        (path / "recipe.yaml").write_text(dump_yaml({"objective": {"standardisation": phi_s}}))

    facts = {"versions": {"torch": "2.13"}}
    return save_checkpoint(folder / "checkpoints", step, write, facts, keep=2)


def export(checkpoint: Path, out: Path, **options: object) -> Student:
    export_student(checkpoint, out, **options)
    return load_student(out)


def outputs(student: Student, images: Tensor = IMAGES) -> dict[str, Tensor]:
    with torch.no_grad():
        output = student(images)
    named = {"backbone": output.backbone, **output.heads}
    return {
        f"{n}/{p}": v for n, f in named.items() for p, v in f._asdict().items() if v is not None
    }
