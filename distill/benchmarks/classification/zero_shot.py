"""Zero-shot classification: the class of an image is the one whose text vector is nearest.

The vector of a class is the mean of the unit vectors of several sentences with its name, normalised
again (Radford et al. 2021, section 3.1.4).
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from data.errors import DataError
from data.labelled.class_folders import ClassFolders, read_class_names
from data.labelled.image_surveys import ClassFolderSurvey
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.classification.summaries import Encoding, accuracy
from distill.benchmarks.classification.text_side import (
    TextConfig,
    check_text,
    load_text_tower,
    text_identity,
)
from distill.runtime import distributed
from teachers.teacher import Teacher
from teachers.text_tower import TextTower


def _has_a_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("expected one {} for the name of the class")
    return template


Template = Annotated[str, AfterValidator(_has_a_place)]


class ZeroShotConfig(TextConfig):
    """Zero-shot classification on a set of folders.

    Attributes:
        dataset: one folder for each class; only test images are read.
        class_names: `imagenet` for OpenAI's names of the 1,000 classes in the order of their
            folders, or a file, see `data.labelled.class_folders.read_class_names`.
        templates: `openai` for its 80 sentences, `simple` for 7 of them, or sentences with `{}`
            for the name.
    """

    kind: str = "zero_shot"
    features: Literal["summary"] = "summary"  # what the text tower was trained with
    dataset: ClassFolders
    class_names: Literal["imagenet"] | Path = "imagenet"
    templates: (
        Literal["openai", "simple"] | Annotated[tuple[Template, ...], Field(min_length=1)]
    ) = "openai"


class ZeroShot(Benchmark):
    """Top-1 and top-5 accuracy without any training image."""

    Config: ClassVar[type[BenchmarkConfig]] = ZeroShotConfig
    seeded = False

    def survey(self) -> Survey:
        """Images of each class, which must have names.

        Raises:
            DataError: the data are missing, or the names of the classes do not fit them.
        """
        config: ZeroShotConfig = self.config
        found = ClassFolderSurvey(config.dataset, ("test",))
        found.extra = repr(_class_names(config, found.classes)) + text_identity(config)
        return found

    def check(self, encoder: Teacher) -> None:
        """Checks features, sizes and the text tower; see `Benchmark.check`."""
        Encoding(encoder, self.config)
        check_text(self.config, encoder)

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Classifies the test images; see `Benchmark.measure`."""
        config: ZeroShotConfig = self.config
        encode = Encoding(encoder, config)
        with config.dataset.open("test") as images:
            names = _class_names(config, images.classes)
            tower = load_text_tower(config, encoder)  # last: it may download weights
            identity = f"{config.dataset.model_dump_json()} test"
            vectors = encode(images.names, images.read, identity).gathered()
        classes = classifier(tower, names, config.templates)
        scores, labels = F.normalize(vectors, dim=1) @ classes, torch.tensor(images.labels)
        metrics = {"top1": accuracy(scores, labels)}
        if len(names) > 5:
            metrics["top5"] = accuracy(scores, labels, 5)
        counts = {"test_images": len(images.names), "classes": len(names)}
        return Measurement(metrics, encode.protocol | counts)


def classifier(tower: TextTower, names: list[str], templates: str | tuple[str, ...]) -> Tensor:
    """The unit vectors of the classes, (D, K) on the CPU."""
    import open_clip

    known: dict[str, Any] = {
        "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    }
    sentences = known[templates] if isinstance(templates, str) else templates
    tower.say_unknown([_sentence(s, name) for name in names for s in sentences])
    built: Tensor = open_clip.build_zero_shot_classifier(
        tower, tower.tokenizer, names, sentences, device=str(distributed.device())
    )
    return built.cpu()


def _sentence(template: Any, name: str) -> str:
    return str(template(name) if callable(template) else template.format(name))


def _class_names(config: ZeroShotConfig, classes: list[str]) -> list[str]:
    if isinstance(config.class_names, Path):
        return read_class_names(config.class_names, classes)
    import open_clip

    names = list(open_clip.IMAGENET_CLASSNAMES)
    if len(names) != len(classes):
        raise DataError(
            f"class_names: imagenet has {len(names)} classes and {config.dataset.root} "
            f"{len(classes)}; give a file with the names of these"
        )
    return names
