"""HTML pages that are one file: the style they share, tables, and pictures inside the file."""

import base64
import html
from collections.abc import Sequence

from distill.display.tables import Sheet

# Dark where the reader's system is; what is wider than the screen scrolls by itself while the names
# of lines stay, and pictures stay large enough for their titles to be read.
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
h1, h2, h3, code { overflow-wrap: anywhere; }
p { max-width: 50rem; }
figure { margin: 0; overflow-x: auto; }
img { max-width: max(100%, 60rem); height: auto; background: white; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: right; }
th[scope^=row] { text-align: left; } th[scope=row] { font-weight: normal; }
th[scope=row] { position: sticky; left: 0; background: Canvas; }
tbody { border-top: 1px solid color-mix(in srgb, currentColor 30%, transparent); }
.better { font-weight: 600; }
.beside { display: flex; gap: 1rem; overflow-x: auto; }
.beside figure { flex: 1 0 34rem; }
.beside img { width: 100%; }
details { margin: .5rem 0; }
.facts th, .facts td { text-align: left; vertical-align: top; padding-block: .1rem; }
.facts th, .facts td { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
"""


def document(title: str, body: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, a part each.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{text(title)}</title>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def sheet_table(sheet: Sheet) -> str:
    """A sheet as a table; its title is left to the heading above."""
    corner, *heads = sheet.head
    out = ["<figure><table><thead><tr>", f'<th scope="row">{text(corner)}</th>']
    out += [f'<th scope="col">{text(head)}</th>' for head in heads]
    out.append("</tr></thead><tbody>")
    for name, cells in sheet.lines:
        figures = "".join(table_cell(cell.text, cell.best) for cell in cells)
        out.append(f'<tr><th scope="row">{text(name)}</th>{figures}</tr>')
    out.append("</tbody></table></figure>")
    return "\n".join([*out, f"<p>{text(sheet.note)}</p>"] if sheet.note else out)


def table_cell(content: object, better: bool) -> str:
    """A cell of a table; bold where it is the best."""
    return f"<td{' class=better' if better else ''}>{text(content)}</td>"


def image(png: bytes, described: str, caption: str = "") -> str:
    """A picture inside the page.

    Args:
        png: the file's content.
        described: for those who do not see it.
        caption: what stands above; none where it is empty.
    """
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    above = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    picture = f'<img alt="{html.escape(described, quote=True)}" src="{source}">'
    return f"<figure>{above}{picture}</figure>"


def code(value: object) -> str:
    """A value in the fixed-width font."""
    return f"<code>{text(value)}</code>"


def text(value: object) -> str:
    """A value as it is read, whatever characters it has."""
    return html.escape(str(value))
