"""Licences of teachers' weights, and whether they limit the use of a student.

No legal advice: the licence that comes with the weights decides, and whether a student is a
derivative of its teachers is a question for lawyers.
"""

from typing import NamedTuple


class Licence(NamedTuple):
    """A licence.

    Attributes:
        name: its usual name.
        limits: how it may limit the use of a student; empty if it does not.
    """

    name: str
    limits: str = ""

    def __str__(self) -> str:
        return f"{self.name}; limits the student: {self.limits}" if self.limits else self.name


# Keys: identifiers of the Hugging Face hub and of timm's pretrained configs.
LICENCES = {
    "apache-2.0": Licence("Apache-2.0"),
    "apple-amlr": Licence("Apple ML Research Model licence (apple-amlr)", "research only"),
    "apple-ascl": Licence(
        "Apple licence (apple-ascl; their cards now say apple-amlr)", "research only"
    ),
    "bsd-3-clause": Licence("BSD-3-Clause"),
    "cc-by-4.0": Licence("CC BY 4.0"),
    "cc-by-nc-4.0": Licence("CC BY-NC 4.0", "no commercial use"),
    "dinov3-license": Licence(
        "DINOv3 licence (gated)", "its terms bind what derives from it; no military use"
    ),
    "fair-noncommercial-research-license": Licence(
        "FAIR Noncommercial Research licence", "non-commercial research only"
    ),
    "gemma": Licence(
        "Gemma Terms of Use (gated)", "models distilled from it are bound by its use restrictions"
    ),
    "mit": Licence("MIT"),
    "nsclv1": Licence("NVIDIA Source Code licence (NSCLv1)", "no commercial use"),
    "nvidia-open-model-license": Licence("NVIDIA Open Model licence"),
}


NO_LICENCE = "random weights, no licence"


def licence_text(identifier: str | None, source: str) -> str:
    """A hub or timm licence in words; if unknown, read it at `source`, such as `at https://...`."""
    if identifier is None or identifier == "unknown":
        return f"not known here; read it {source}"
    found = LICENCES.get(identifier)
    return str(found) if found else f"{identifier}; read {source} whether it limits the student"


def is_apache(text: str) -> bool:
    """Whether a licence in words is Apache-2.0, which also that of a student of such teachers is.

    Random weights have no licence, and limit nothing.
    """
    own, _, of_teachers = text.partition("; of its teachers: ")
    if of_teachers:
        parts = (part.partition(", ")[2] for part in of_teachers.split("; "))
        return is_apache(own) and all(map(is_apache, parts))
    return own == NO_LICENCE or own.split(";")[0] == str(LICENCES["apache-2.0"])
