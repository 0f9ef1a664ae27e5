"""What a user of transformers runs on an exported folder, in a process without this project.

`python hf_client.py FOLDER DUE OTHER`: DUE has images and what the student returned for them; a
copy that transformers saves goes to OTHER. Prints differences as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

if not hasattr(torch.ops.torchvision, "nms"):  # a torchvision that was built for another torch
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

OURS = ("student", "teachers", "distill", "data")


def packed(images: list[torch.Tensor], p: int) -> dict[str, torch.Tensor]:
    """Channel-major patches of images of several sizes, and their grids."""
    grids = [(each.shape[-2] // p, each.shape[-1] // p) for each in images]
    patches = [
        each[0].unflatten(1, (-1, p)).unflatten(3, (-1, p)).permute(1, 3, 0, 2, 4).flatten(2)
        for each in images
    ]
    rows = torch.cat([each.flatten(0, 1) for each in patches])
    return {"pixel_values": rows, "image_grid_hw": torch.tensor(grids)}


def compare(model: Any, due: dict[str, torch.Tensor], name: str) -> float:
    out = model(due[f"{name}/images"], output_hidden_states=True)
    skip = model.config.num_summary_tokens
    pairs = [(out.summary, "summary"), (out.features, "features")]
    pairs += [(h[:, skip:], f"hidden{i}") for i, h in enumerate(out.hidden_states[1:])]
    return max(float((came - due[f"{name}/{part}"]).abs().max()) for came, part in pairs)


@torch.no_grad()
def main(folder: Path, due: dict[str, torch.Tensor], other: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = sorted({key.split("/")[0] for key in due})
    for attention in ("eager", "sdpa"):
        model, info = AutoModel.from_pretrained(
            folder, output_loading_info=True, attn_implementation=attention
        )
        found[f"{attention} keys"] = sum(len(each) for each in info.values())
        found[attention] = max(compare(model, due, name) for name in names)
        images = [due[f"{name}/images"][:1] for name in names]
        out = model(**packed(images, model.config.patch_size))
        features = torch.cat([due[f"{name}/features"][0] for name in names])
        summary = torch.cat([due[f"{name}/summary"][:1] for name in names])
        found[f"{attention} packed"] = max(
            float((out.features - features).abs().max()),
            float((out.summary - summary).abs().max()),
        )
        turned = [each.flip(1) for each in images]
        out = model(**packed(turned, model.config.patch_size))
        found[f"{attention} packed, channels turned"] = float((out.features - features).abs().max())
    found["class"] = type(model).__name__
    model.save_pretrained(other)
    again = AutoModel.from_pretrained(other)
    found["saved again"] = max(compare(again, due, name) for name in names)
    found["same weights"] = all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.linear_gradient("L").resize((70, 51)), return_tensors="pt")
    found["pixels"] = [*pixels["pixel_values"].shape]
    found["range"] = [float(each) for each in pixels["pixel_values"].aminmax()]
    found["runs"] = [*model(**pixels).features.shape]
    extract = pipeline("image-feature-extraction", model=str(folder))
    first = extract(Image.linear_gradient("L").resize((70, 51)).convert("RGB"))
    found["pipeline"] = float((torch.tensor(first) - model(**pixels).summary).abs().max())
    mapped = AutoModel.from_pretrained(folder, device_map={"": "cpu"})  # by accelerate
    found["mapped"] = max(compare(mapped, due, name) for name in names)
    with init_empty_weights():
        empty = AutoModel.from_config(AutoConfig.from_pretrained(other))
    again.save_pretrained(other, save_original_format=False)  # accelerate renames nothing
    placed = load_checkpoint_and_dispatch(empty, str(other / "model.safetensors"), {"": "cpu"})
    found["accelerate"] = max(compare(placed, due, name) for name in names)
    found["ours imported"] = [name for name in OURS if name in sys.modules]
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), load_file(sys.argv[2]), Path(sys.argv[3]))))
