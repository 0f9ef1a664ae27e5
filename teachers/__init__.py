"""Teachers, which are frozen encoders, and upsamplers of their features.

Importing this package makes torchvision importable where its compiled operators cannot be loaded
(`teachers.torchvision_ops`), because timm and open_clip import torchvision.
"""

from teachers.torchvision_ops import declare_missing_operators

declare_missing_operators()
