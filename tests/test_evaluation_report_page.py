"""The page over results, and the results of several suites on one page."""

import base64
import html.parser
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill import evaluate
from distill.benchmarks.benchmark import Benchmark, Measurement
from distill.evaluation.report_page import write_report
from distill.evaluation.results import read_suites
from distill.runtime.config import dump_yaml
from distill.runtime.errors import RecipeError
from teachers.teacher import Teacher


class Drawn(Benchmark):
    """Figures from the patch size, a picture, and a name that a page has to escape."""

    lower_is_better = frozenset({"error <px>"})

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        size = encoder.spec.patch_size
        Image.new("RGB", (4, 3), (size, seed, 0)).save(folder / "seen & drawn.png")
        figures = {"score": 100.0 / size + seed, "error <px>": float(size)}
        return Measurement(figures, {"images": 3, "input": {"size": [size, size]}})


ALONE = {"baseline": None, "groups": None}


class Page(html.parser.HTMLParser):
    """Whether tags close, the words, and the pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append({key: value or "" for key, value in attrs})
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def write_suite(folder: Path, **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "task": "benchmarks",
        "dir": str(folder / "results"),
        "models": {
            "old": {"kind": "pixels", "patch_size": 16},
            "new": {"kind": "pixels", "patch_size": 8},
        },
        "benchmarks": {"drawn": {"kind": "tests.test_evaluation_report_page:Drawn"}},
        "seeds": [4, 5],
        "baseline": "old",
        "groups": {"all": ["drawn", "drawn.error <px>"]},
    }
    path = folder / "suite.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(dump_yaml({k: v for k, v in (tree | changes).items() if v is not None}))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    try:
        evaluate.main()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_a_suite_ends_with_tables_changes_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, write_suite(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "+54.07 ± 0.00" in out  # of 6.25 / 10.75 = 58.14 % and half the error
    assert out.index("drawn") < out.index("Delta_m")
    assert out.endswith(f"page: {tmp_path}/results/index.html\n")


def test_the_page_is_one_file_with_tables_pictures_and_protocols(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, write_suite(tmp_path))
    text = (tmp_path / "results/index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert 'name="viewport"' in text
    assert [picture["alt"] for picture in page.pictures] == [
        "seen & drawn of old at drawn",
        "seen & drawn of new at drawn",
    ]
    assert all(p["src"].startswith("data:image/png;base64,") for p in page.pictures)
    assert "error <px> (lower is better)" in page.words
    assert text.count("<td class=better>17 ± 0.71</td>") == 1
    assert "+54.07 ± 0.00" in page.words
    assert "protocol.images" in page.words
    assert "[16, 16] (old); [8, 8] (new)" in page.words  # what the encoders saw was not the same


def test_only_the_first_seed_of_a_model_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, write_suite(tmp_path))
    first = tmp_path / "results/drawn/old/seed-4/seen & drawn.png"
    assert first.is_file()
    pictures = Page((tmp_path / "results/index.html").read_text()).pictures
    assert pictures[0]["src"].endswith(base64.b64encode(first.read_bytes()).decode())


@pytest.mark.parametrize(
    "overrides, models",
    [((), ["old", "mine"]), (("baseline=null", "groups={}"), ["mine"])],
)
def test_a_target_is_measured_beside_the_baseline_if_there_is_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    models: list[str],
) -> None:
    suite = write_suite(tmp_path)
    monkeypatch.setattr(
        "distill.evaluation.run.model_of", lambda _: {"kind": "pixels", "patch_size": 4}
    )
    patch = "models.mine.patch_size=2"
    assert call(monkeypatch, "mine", "--on", suite, "seeds=[0]", patch, *overrides) == 0
    lines = (tmp_path / "results/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["model"] for line in lines] == models
    assert json.loads(lines[-1])["encoder"]["patch_size"] == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": "oldd"}, "baseline: models: there is no model 'oldd' (did you mean 'old'?)"),
        ({"groups": {"g": ["drawm"]}}, "groups: g: there is no benchmark 'drawm' (did you mean"),
        ({"groups": {"g": []}}, "groups.g: "),
        ({"baseline": None}, "groups: groups are compared with a baseline; add"),
    ],
)
def test_a_suite_with_wrong_names_measures_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert call(monkeypatch, write_suite(tmp_path, **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def two_suites(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Path]:
    """A model each, both of the same patch size unless changed."""
    for name in ("one", "two"):
        model = {"kind": "pixels", "patch_size": 8}
        tree = {"models": {name: model}, "baseline": None, "groups": None}
        suite = write_suite(folder / name, **(tree | (changes if name == "two" else {})))
        assert call(monkeypatch, suite) == 0
    return [folder / name / "results" for name in ("one", "two")]


def test_several_suites_make_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = two_suites(tmp_path, monkeypatch)
    recipe = tmp_path / "report.yaml"
    tree = {"task": "report", "dir": str(tmp_path / "report"), "baseline": "one"}
    recipe.write_text(dump_yaml(tree | {"results": [str(f) for f in folders]}))
    capsys.readouterr()
    assert call(monkeypatch, recipe) == 0
    assert "drawn: drawn.score" in capsys.readouterr().out
    page = Page((tmp_path / "report/index.html").read_text())
    assert [p["alt"].split()[4] for p in page.pictures] == ["one", "two"]


ENTRY = {"drawn": {"kind": "tests.test_evaluation_report_page:Other", "images": 5}}


class OtherConfig(Benchmark.Config):
    images: int = 3


class Other(Drawn):
    Config = OtherConfig


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"models": {"two": {"kind": "pixels", "patch_size": 4}}},
            r"benchmark 'drawn' is not the same in .*one/results \(drawn, one, seed 4\) and "
            r".*two/results \(drawn, two, seed 4\): protocol.input.size is \[8, 8\] there, "
            r"\[4, 4\] here\. Measure both in the same way",
        ),
        ({"benchmarks": ENTRY}, r"entry.kind is '.*:Drawn' there.*entry.images is None there, 5"),
        (
            {"models": {"one": {"kind": "pixels", "patch_size": 8, "resolution": [32, 32]}}},
            r"model 'one' is not the same .*encoder.resolution is \[224, 224\] there, \[32, 32\]",
        ),
        (
            {"models": {"one": {"kind": "pixels", "patch_size": 8}}},
            r"'one' at 'drawn' with seed 4 is in .*one/results and in .*two/results; leave one",
        ),
    ],
)
def test_what_was_not_measured_alike_is_not_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    folders = two_suites(tmp_path, monkeypatch, **changes)
    with pytest.raises(RecipeError, match=message):
        read_suites(folders)


def test_facts_that_do_not_count_may_differ_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = {"two": {"kind": "pixels", "patch_size": 4}}
    folders = two_suites(tmp_path, monkeypatch, models=coarse)
    assert len(read_suites(folders, ["protocol.input.size"])) == 4
    with pytest.raises(RecipeError, match=r"no result has a fact .*did you mean 'protocol.input.s"):
        read_suites(folders, ["protocol.input.sise"])


def test_a_name_may_stand_for_several_trainings_if_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"kind": "dfn_clip", "model": "clip_ti16_128", "resolution": [32, 32]}
    suites = []
    for seed, weights in enumerate(("shipped", "none")):
        models = {"two": one | ({} if weights == "shipped" else {"weights": weights})}
        path = write_suite(tmp_path / weights, models=models, seeds=[seed], **ALONE)
        assert call(monkeypatch, path) == 0
        suites.append(tmp_path / weights / "results")
    with pytest.raises(RecipeError, match=r"model 'two' is not the same .*fingerprint is"):
        read_suites(suites, ["encoder.weights"])
    results = read_suites(suites, ["encoder.weights", "fingerprint"])
    assert [result.row["seed"] for result in results] == [0, 1]
    page = " ".join(write_report(tmp_path / "report", results, [], None).read_text().split())
    assert "random in a benchmark, and in the training of two." in page


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{tmp_path} has no results.jsonl; run its suite"):
        read_suites([tmp_path])
