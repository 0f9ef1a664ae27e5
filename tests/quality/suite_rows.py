"""The rows and columns of `tests.quality.suite`: models, and benchmarks with their data."""

from pathlib import Path
from typing import Any, NamedTuple

from distill.evaluation.models import parse_model
from distill.runtime.config import load_yaml
from distill.runtime.errors import RecipeError
from student.errors import StudentError
from teachers.build import build_teacher
from teachers.errors import TeacherError
from teachers.files import SHIPPED
from tests.quality.compare_upsamplers import REPOSITORY

RECIPES = REPOSITORY / "recipes" / "evaluation"
Entry = dict[str, Any]


class Column(NamedTuple):
    """One column: a benchmark of a recipe, with its data below DATA.

    Attributes:
        title: of the column.
        recipe: in `recipes/evaluation/`.
        root: of its data.
        changes: to its entry, and to the entry's data set.
        metric: None for the headline.
        of_map: whether an upsampler changes it.
    """

    title: str
    recipe: str
    root: str
    changes: Entry = {}
    dataset: Entry = {}
    metric: str | None = None
    of_map: bool = True


COLUMNS = {
    "camvid": Column("CamVid, mIoU", "camvid", "camvid"),
    "depth": Column("NYU depth, RMSE m", "depth_quick", "nyuv2", metric="rmse_per_image"),
    "normals": Column("normals, mean angle", "normals_quick", "nyuv2"),
    "det200": Column(
        "det200, 1-NN %",
        "knn",
        "det200",
        {"split": "leave_one_out", "neighbours": [1]},
        of_map=False,
    ),
    "tiny": Column(
        "tiny-ImageNet, 20-NN %",
        "knn",
        "tiny-imagenet/tiny-imagenet-180.zip",
        {"neighbours": [20]},
        of_map=False,
    ),
    "willow": Column("PF-WILLOW, PCK", "keypoints", "pf-willow", dataset={"kind": "keypoints"}),
}
# Columns outside of Delta_m: the teacher, which names the student's head too, and its text tower.
TEXTS = {
    "zero_shot_clip": ("clip", "clip_ti16_128"),
    "zero_shot_siglip": ("siglip", "siglip_ti16_128"),
}
STUDENT = "agglo_tiny"


def teachers(data: Path) -> dict[str, Entry]:
    """The single teachers."""
    vit = data / "weights" / "vit_small_patch14_dinov2_saliency_f16.safetensors"
    model = {"kind": "timm", "model": "vit_small_patch14_dinov2", "weights": str(vit)}
    return {
        "lite2": {"kind": "timm", "model": "efficientnet_lite2_260"},
        "vit_s": model | {"features": 8, "summary": "none", "resolution": [224, 224]},
        "clip": {"kind": "dfn_clip", "model": "clip_ti16_128"},
        "siglip": {"kind": "siglip", "model": "siglip_ti16_128"},
    }


def models(data: Path) -> dict[str, Entry]:
    """Every row's entry: teachers, each followed by its upsampled ones, students, baselines."""
    rows: dict[str, Entry] = {}
    for name, entry in teachers(data).items():
        rows[name] = entry
        upsamplers: dict[str, Any] = {
            f"{kind}_4x": {"kind": kind, "factor": 4} for kind in ("bilinear", "tile")
        }
        prefix = f"{entry['model']}_"
        for file in sorted((SHIPPED / "upsamplers").glob(f"{prefix}*.safetensors")):
            upsamplers[file.stem.removeprefix(prefix)] = file.stem
        rows |= {f"{name}_{how}": entry | {"upsampler": each} for how, each in upsamplers.items()}
    size = {"resolution": [256, 256]}
    rows[STUDENT] = {"kind": "student", "path": STUDENT}
    rows["random"] = {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "none"} | size
    rows["colours"] = {"kind": "pixels"} | size
    return rows


def encoder_of(name: str, data: Path) -> str:
    """The row whose summary a row has: the teacher's, of an upsampled one; else its own."""
    return next((each for each in teachers(data) if name.startswith(f"{each}_")), name)


def is_here(entry: Entry) -> bool:
    """Whether a student can be loaded; says so if not."""
    try:
        build_teacher(parse_model(entry), device="meta")
    except (RecipeError, StudentError, TeacherError) as error:
        print(f"{entry.get('head') or entry['path']}: left out: {error}", flush=True)
        return False
    return True


def benchmark_of(column: Column, data: Path) -> Entry:
    """The entry of a column's benchmark."""
    (entry,) = load_yaml(RECIPES / f"{column.recipe}.yaml")["benchmarks"].values()
    root = {"root": str(data / column.root)}
    found: Entry = entry | column.changes
    return found | {"dataset": found["dataset"] | column.dataset | root}


def zero_shot_of(text: str, data: Path) -> Entry:
    """The entry of zero-shot classification of tiny-ImageNet with the text tower of a model."""
    (entry,) = load_yaml(RECIPES / "zero_shot.yaml")["benchmarks"].values()
    found: Entry = entry | {"text": {"model": text}}
    found["class_names"] = str(data / "tiny-imagenet" / "classes.tsv")
    return found | {"dataset": entry["dataset"] | {"root": str(data / COLUMNS["tiny"].root)}}
