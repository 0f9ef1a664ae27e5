"""Evaluations: benchmark suites, agreement with the teachers, throughput, reports and pages.

Importing `teachers` first repairs torchvision, which torchmetrics and the detectors import.
"""

import teachers  # noqa: F401
