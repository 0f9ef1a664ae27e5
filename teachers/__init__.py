"""Frozen experts and everything that sharpens their features.

Importing this package repairs torchvision's operator schemas where its compiled operators cannot
be loaded (`teachers.torchvision_ops`), because timm and open_clip import torchvision.
"""

from teachers.torchvision_ops import declare_missing_operators

declare_missing_operators()
