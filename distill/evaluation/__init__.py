"""How good a trained student is: measures, and the page that shows them.

Importing `teachers` first repairs torchvision, which torchmetrics and the detectors import.
"""

import teachers  # noqa: F401
