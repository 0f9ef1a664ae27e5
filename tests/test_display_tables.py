"""Tables in a terminal: they are transposed if they are too wide."""

import io

from rich.console import Console

from distill.display.tables import Cell, Table


def test_a_table_that_fits_in_80_characters_has_a_line_for_each_model() -> None:
    heads = ("model", "seeds", "AP", "AP (lower is better)", "AP small")
    narrow = Table("t", heads, [("a" * 15, [Cell("12.34 ± 0.12")] * 4)])
    assert [c.header for c in narrow.to_rich().columns] == list(heads)
    words = ("model", "seeds", *(f"image_to_text_r{k}" for k in (1, 5, 10, 50)))
    wide = Table("t", words, [("a", [Cell("1")] * 5)]).to_rich()
    assert [c.header for c in wide.columns] == ["model", "a"]
    written = io.StringIO()
    Console(width=80, file=written).print(wide)
    assert "image_to_text_r50" in written.getvalue()
