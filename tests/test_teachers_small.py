import hashlib
import json
import math

import pytest
import torch
import torch.nn.functional as F

from distill.evaluation.models import model_of
from teachers.build import build_teacher, parse_teacher
from teachers.catalog import licence_of
from teachers.errors import TeacherError
from teachers.files import SHIPPED
from teachers.timm_source import timm  # imported after torchvision's operators are repaired
from tests.quality.small_teachers.augment import cell_centres, crop, random_boxes, to_picture
from tests.quality.small_teachers.captions import CONTEXT, Captions
from tests.quality.small_teachers.knn import NAMES, classify
from tests.quality.small_teachers.losses import (
    contrastive_loss,
    direction_loss,
    matches,
    sigmoid_loss,
    spatial_targets,
)
from tests.quality.small_teachers.targets import fit_whitening
from tests.quality.small_teachers.towers import (
    SMALL,
    build_tower,
    encode_kept,
    load_config,
    load_tower,
)

BYTE_LIMIT = 16_000_000


def _images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def test_sigmoid_loss_equals_a_slow_double_loop_over_pairs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64) * 3
    positive = torch.rand(5, 4, generator=generator) < 0.4
    total = 0.0
    for i in range(5):
        for j in range(4):
            sign = 1.0 if positive[i, j] else -1.0
            total += math.log1p(math.exp(-sign * logits[i, j].item()))
    assert sigmoid_loss(logits, positive).item() == pytest.approx(total / 5, rel=1e-12)


def test_contrastive_loss_equals_a_slow_loop_when_positives_repeat_or_miss():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    positive = matches(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2]))  # text 2: no image
    e = logits.exp().tolist()
    rows = [-math.log(e[i][j] / sum(e[i])) for i, j in ((0, 0), (1, 0), (2, 1), (3, 1))]
    columns = []
    for j, images in ((0, (0, 1)), (1, (2, 3))):
        below = sum(e[i][j] for i in range(4))
        columns.append(sum(-math.log(e[i][j] / below) for i in images) / 2)
    due = (sum(rows) / 4 + sum(columns) / 2) / 2
    assert contrastive_loss(logits, positive).item() == pytest.approx(due, rel=1e-12)


def test_contrastive_loss_is_clips_own_with_one_positive_each():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth = torch.arange(6)
    clip = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    assert torch.allclose(contrastive_loss(logits, torch.eye(6, dtype=torch.bool)), clip)


def test_direction_loss_ignores_length_and_is_two_for_opposites():
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    assert direction_loss(vectors * 9, vectors).item() == pytest.approx(0, abs=1e-6)
    assert direction_loss(-vectors, vectors).item() == pytest.approx(2, abs=1e-6)


def test_knn_separates_two_gaussian_clusters_completely():
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(60) % 2
    centres = torch.tensor([[4.0, 0, 0], [0, 4.0, 0]])
    database = centres[labels] + torch.randn(60, 3, generator=generator) * 0.2
    queries = centres[labels] + torch.randn(60, 3, generator=generator) * 0.2
    assert (classify(queries, database, labels, classes=2) == labels).all()


def test_knn_lets_one_near_neighbour_outvote_two_far_ones():
    database = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    labels = torch.tensor([0, 1, 1])
    assert classify(database[:1], database, labels, classes=2, neighbours=3).tolist() == [0]


def test_whitened_vectors_have_unit_covariance():
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(6, 6, generator=generator)
    vectors = torch.randn(400, 6, generator=generator) @ mixing + 3
    mean, matrix = fit_whitening(vectors, 4)
    white = (vectors - mean) @ matrix
    assert torch.allclose(white.T @ white / 400, torch.eye(4), atol=1e-3)


def test_the_box_of_a_whole_picture_returns_the_picture():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    whole = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, -1, 1]])
    due = torch.stack([images[0], images[1].flip(2)]).float() / 255
    assert torch.allclose(crop(images, whole, 8), due, atol=1e-5)


def test_random_boxes_stay_inside_the_picture():
    boxes = random_boxes(500, torch.Generator().manual_seed(6))
    assert (boxes[:, :2].abs() + boxes[:, 2:].abs() <= 1 + 1e-5).all()


def test_a_crop_and_its_target_are_read_at_the_same_place():
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(3, 3, 64, 64)
    boxes = random_boxes(3, torch.Generator().manual_seed(7))
    points = to_picture(cell_centres(4, 4), boxes)
    target = spatial_targets(ramp.float() / 255, points)[:, :, 0].unflatten(1, (4, 4))
    picture = crop(ramp, boxes, 64)[:, 0].unflatten(2, (4, 16)).mean(3)[:, ::16]
    assert torch.allclose(target[:, 0], picture[:, 0], atol=0.02)


def test_captions_end_with_the_largest_number_and_fit_the_context():
    captions = Captions(["goldfish, Carassius auratus", "judge's robe"])
    drawn = captions.draw(torch.Generator().manual_seed(8))
    assert drawn.shape == (2, CONTEXT)
    assert (drawn == captions.end).sum(1).tolist() == [1, 1]
    assert captions.encode("goldfish")[1:] == [captions.end] + [0] * (CONTEXT - 2)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_every_patch_is_the_towers_own_forward(name):
    torch.manual_seed(0)
    tower = build_tower(SMALL / name).eval()
    images = _images(2)
    with torch.no_grad():
        vectors, tokens = encode_kept(tower, images, torch.arange(64).expand(2, -1))
        shuffled, _ = encode_kept(tower, images, torch.randperm(64).expand(2, -1))
        own = tower(images)
    assert tokens.shape == (2, 64, 192)
    assert torch.allclose(vectors, own, atol=1e-4)
    assert torch.allclose(shuffled, own, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_folder_loads_strictly_and_tells_images_apart(name):
    tower = load_tower(SMALL / name)
    images = _images(2)
    with torch.no_grad():
        vectors = tower(images.pow(torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)))
    assert vectors.shape == (2, load_config(SMALL / name)["model_cfg"]["embed_dim"])
    assert vectors.isfinite().all()
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-2)


def test_the_shipped_weights_stay_under_the_byte_limit():
    files = [SMALL / name / "open_clip_model.safetensors" for name in NAMES]
    assert sum(f.stat().st_size for f in files) <= BYTE_LIMIT


@pytest.mark.parametrize("kind, name", [("dfn_clip", "clip"), ("siglip", "siglip")])
@pytest.mark.parametrize("factor", [2, 4])
def test_the_shipped_upsamplers_are_those_of_the_shipped_teachers(kind, name, factor):
    """Their fingerprints agree: whatever it covers must not change, or files in use are refused."""
    model = f"{name}_ti16_128"
    entry = {"kind": kind, "model": model, "upsampler": f"{model}_featsharp_{factor}x"}
    assert build_teacher(parse_teacher(entry)).spec.resolution == (128 * factor, 128 * factor)


def test_the_shipped_efficientnet_is_timms_own_bit_for_bit():
    folder = SHIPPED / "efficientnet_lite2_260"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "e7bb7efb4f394f6aaf0ccc211e900196eebbc1efb6c45accc0f8a541f55e4997"
    assert digest in (folder / "README.md").read_text()
    config = parse_teacher({"kind": "timm", "model": "efficientnet_lite2_260"})
    teacher, images = build_teacher(config), torch.rand(1, 3, 260, 260)
    own = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        final, maps = own.forward_intermediates((images - 0.5) / 0.5, indices=[-1])
        summary = own.forward_head(final, pre_logits=True)
    seen = teacher(images)
    assert torch.equal(seen.spatial, maps[0])
    assert torch.equal(seen.summary, summary)
    assert (seen.spatial.shape, seen.summary.shape) == ((1, 352, 9, 9), (1, 1280))
    assert licence_of(config) == "Apache-2.0"
    assert set(own.pretrained_cfg) >= {"mean", "std", "input_size", "license"}
    registered = timm.get_pretrained_cfg("tf_efficientnet_lite2").to_dict()
    stored = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    for key, value in stored.items():
        assert json.loads(json.dumps(registered[key])) == value


def test_a_name_of_the_box_is_neither_a_folder_nor_a_typing_error(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "efficientnet_lite2_260").mkdir()
    entry = {"kind": "timm", "model": "efficientnet_lite2_260"}
    assert build_teacher(parse_teacher(entry), device="meta").spec.grid(260, 260) == (9, 9)
    assert any("took the shipped teacher of" in each for each in said())
    with pytest.raises(TeacherError, match=r"shipped.*did you mean 'efficientnet_lite2_260'"):
        build_teacher(parse_teacher(entry | {"model": "efficientnet_lite2_26"}), device="meta")
    (tmp_path / "efficientnet_lite2_260").rmdir()
    assert model_of("efficientnet_lite2_260") == entry
