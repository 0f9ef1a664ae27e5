"""The student's configuration: sizes, registers and refusals."""

import pytest
import torch
from pydantic import ValidationError

from student.config import SHAPES, Size, StudentConfig
from student.trunk import Trunk

# The timm ViT of each size; giant's is SigLIP's, whose heads differ but not its weights' sizes.
TIMM = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "so400m": "vit_so400m_patch14_siglip_384",
    "huge": "vit_huge_patch14_224",
    "giant": "vit_giantopt_patch16_siglip_256",
    "bigG": "vit_gigantic_patch14_224",
}


@pytest.mark.long
@pytest.mark.parametrize("size", SHAPES)
def test_every_size_has_the_blocks_of_its_timm_vit(size: Size) -> None:
    import timm  # after student, which repairs torchvision's operators

    with torch.device("meta"):
        ours = Trunk(StudentConfig(size=size), num_class_tokens=3)
        theirs = timm.create_model(TIMM[size])
    shapes = [
        {name: tuple(p.shape) for name, p in model.blocks.named_parameters()}
        for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    width = SHAPES[size].width
    outside = 3 * 16**2 * width + 64**2 * width + (3 + 4) * width
    blocks = sum(p.numel() for p in theirs.blocks.parameters())
    assert sum(p.numel() for p in ours.parameters()) == blocks + outside


def test_overrides_keep_the_mlp_ratio_of_the_size() -> None:
    assert StudentConfig(size="tiny", width=48, heads=4, depth=2).shape == (48, 2, 4, 192)
    assert StudentConfig(size="tiny", mlp_ratio=2.5).shape.mlp_dim == 480


@pytest.mark.parametrize(
    ("num_class_tokens", "multiple", "registers"), [(3, 16, 13), (4, 8, 4), (8, 8, 8), (3, 10, 7)]
)
def test_a_register_multiple_fills_up_and_adds_a_full_one_where_none_is_missing(
    num_class_tokens: int, multiple: int, registers: int
) -> None:
    config = StudentConfig(register_multiple=multiple)
    assert config.count_registers(num_class_tokens) == registers


def test_registers_are_four_unless_told() -> None:
    assert StudentConfig().count_registers(3) == 4
    assert StudentConfig(num_registers=0).count_registers(3) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100, "heads": 3}, "width 100 does not divide into 3 heads.*such as 99"),
        ({"max_resolution": 1024, "patch_size": 14}, "1024 is not a multiple of .*14.* is 1022"),
        (
            {"num_registers": 4, "register_multiple": 8},
            "register_multiple: set only one",
        ),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std must be set together"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "must be positive in every channel"),
        ({"mean": (124, 116, 104), "std": (1, 1, 1)}, r"mean .* is for images in \[0, 1\]; divide"),
        ({"size": "medium"}, "'tiny', 'small'"),
        ({"sise": "tiny"}, "sise.*[\n].*Extra inputs"),
        ({"init": {"kind": "timmm", "model": "x"}}, "'timm', 'student'"),
        ({"head": {"upsample": {"clip": 0}}}, "greater than 0"),
        (
            {"size": "tiny", "head": {"attention_blocks": 2, "attention_heads": 7}},
            "head.attention_heads: width 192 does not divide into 7 heads; .* such as 3",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig(**fields)
