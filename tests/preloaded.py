"""What the fork server imports once, so that no process forked from it has to."""

import gc
import importlib

from distill.engine.deepspeed_library import import_deepspeed

OURS = (
    "teachers.timm_teacher",  # first: timm and open_clip need the torchvision that it repairs
    "distill.evaluate",
    "distill.export",
    "distill.train_student",
    "distill.train_upsampler",
    "distill.write_targets",
)
# What some tests and benchmarks import.
OTHERS = (
    "faster_coco_eval",
    "matplotlib.figure",
    "open_clip",
    "pytest",
    "sklearn.linear_model",
    "torchmetrics.functional.classification",
    "torchvision.transforms.v2",
)
for name in (*OURS, *OTHERS):
    importlib.import_module(name)
import_deepspeed()
gc.collect()
gc.freeze()  # no child's collection walks these objects, which would copy their pages
