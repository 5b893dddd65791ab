"""Pieces of an HTML page: escaping, tables, a little Markdown, and the page's frame with its style and script.

Whatever comes from files passes through :func:`text`. The page allows itself no connection at all: its policy admits images
that are inside it, and the one style and the one script below by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

MOST_ROWS, MOST_COLUMNS, LONGEST_CELL = 300, 100, 400

# What a reader could not see, or what would turn the order of letters around.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]")
# A number as programs write it. 007, 1e5 and 1_000 may as well be names.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-][0-9]+)?|nan|-?inf", re.IGNORECASE)
_RULE = re.compile(r"^\s*\|?\s*:?-{3,}:?\s*(\|\s*:?-{3,}:?\s*)*\|?\s*$")

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#5b6470;--line:#dde1e6;--card:#f6f7f9;--link:#0b5cad;
--heat:0,114,178}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e9ed;--soft:#9aa4b0;--line:#30363d;--card:#1c2127;--link:#7cbcf5;
--heat:86,180,233}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
a{color:var(--link)}
.page{max-width:82rem;margin:0 auto;padding:1.25rem 1rem 3rem}
header h1{font-size:1.75rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
header p{margin:.3rem 0 0;color:var(--soft)}
nav{font-size:.9rem;margin:1rem 0}
nav summary{cursor:pointer;font-weight:600;padding:.2rem 0}
nav ul{list-style:none;margin:.3rem 0 0;padding:0}
nav li{margin:.15rem 0;overflow-wrap:anywhere}
nav li.sub{padding-left:.9rem}
nav a{display:block;padding:.1rem 0;text-decoration:none}
nav a:hover{text-decoration:underline}
main{min-width:0}
@media (min-width:64rem){.columns{display:grid;grid-template-columns:10.5rem minmax(0,1fr);gap:1.75rem}
nav{position:sticky;top:0;align-self:start;max-height:100vh;overflow:auto;padding:.5rem 0}}
h2{font-size:1.3rem;margin:2.2rem 0 .7rem;padding-top:.4rem;border-top:1px solid var(--line);overflow-wrap:anywhere}
main>section:first-child>h2:first-child{margin-top:0;border-top:0}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem;overflow-wrap:anywhere}
h4,h5{font-size:1rem;margin:1.1rem 0 .4rem}
p{margin:.5rem 0;overflow-wrap:anywhere;max-width:46rem}
.note{color:var(--soft);font-size:.875rem}
code,pre{font:.85em/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.7rem .8rem;overflow-x:auto;margin:.6rem 0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,10.25rem),1fr));gap:.7rem;margin:1rem 0 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem;min-width:0}
.facts dt{font-size:.8rem;color:var(--soft)}
.facts dd{margin:.1rem 0 0;overflow-wrap:anywhere}
.facts .big{font-size:1.35rem;font-weight:650;line-height:1.25}
.scroll{overflow:auto;max-height:40rem;border:1px solid var(--line);border-radius:.4rem;margin:.6rem 0}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;min-width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{position:sticky;top:0;background:var(--card);font-weight:600;white-space:nowrap;z-index:2}
.num{text-align:right;white-space:nowrap}
tbody th{font-weight:400;background:var(--bg);position:sticky;left:0;z-index:1}
thead th:first-child{left:0;z-index:3}
.scroll.all{max-height:none}
.scores tbody th{min-width:10rem}
.scores th,.scores td{padding-left:.42rem;padding-right:.42rem}
.scores small{color:var(--soft)}
.scores .group th{background:var(--card);font-weight:600;padding-top:.55rem}
.scores .group span{position:sticky;left:.42rem}
.scores td:nth-child(4),.scores thead th:nth-child(4){border-right:2px solid var(--line)}
.scores .of{display:none}
.sorted .of{display:block}
.settings td{overflow-wrap:anywhere}
.settings th{width:13rem;color:var(--soft)}
th[data-sort]{cursor:pointer}
th[data-sort]:hover,th[data-sort]:focus-visible{text-decoration:underline}
th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}
.q1{background:rgba(var(--heat),.05)}.q2{background:rgba(var(--heat),.10)}.q3{background:rgba(var(--heat),.16)}
.q4{background:rgba(var(--heat),.22)}.q5{background:rgba(var(--heat),.29)}.q6{background:rgba(var(--heat),.36)}
.q7{background:rgba(var(--heat),.44)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr));gap:1rem;align-items:start;
grid-auto-flow:dense}
figure{margin:0;border:1px solid var(--line);border-radius:.5rem;overflow:hidden;min-width:0;background:var(--card)}
figure.wide{grid-column:1/-1}
figure .paper{background:#fff;padding:.5rem;text-align:center;overflow-x:auto;cursor:zoom-in}
figure .paper:focus{cursor:auto;text-align:left}
figure .paper:focus img{max-width:none}
figure img{max-width:100%;height:auto;display:inline-block;vertical-align:middle}
figcaption{padding:.45rem .7rem;font-size:.875rem;overflow-wrap:anywhere}
figcaption .scroll{background:var(--bg)}
details>summary{cursor:pointer}
details.folder{border:1px solid var(--line);border-radius:.4rem;margin:.5rem 0;padding:.35rem .7rem}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.7rem;color:var(--soft);font-size:.85rem}
@media (max-width:36rem){.page{padding:1rem .75rem 2rem}.scores tbody th{min-width:7rem}
.wide-only{display:none}th,td{padding:.3rem .45rem}.settings th{width:auto}}
@media (min-width:36.01rem){.narrow-only{display:none}}
@media print{nav{display:none}.scroll{max-height:none;overflow:visible}}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sort")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column], number = Number(cell.dataset.v ?? NaN);
    return Number.isNaN(number) ? cell.textContent.trim() : number;
  };
  heads.forEach((head, column) => {
    head.dataset.sort = "";
    head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].filter(row => !row.classList.contains("group"));
      for (const group of table.querySelectorAll(".group")) group.hidden = true;
      rows.sort((a, b) => {
        const x = value(a, column), y = value(b, column);
        if (typeof x === "number" && typeof y === "number") return down ? y - x : x - y;
        if (typeof x === "number") return -1;
        if (typeof y === "number") return 1;
        return down ? y.localeCompare(x) : x.localeCompare(y);
      });
      table.tBodies[0].append(...rows);
      table.classList.add("sorted");
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}
const index = document.querySelector("nav details");
if (index && matchMedia("(max-width: 63.99rem)").matches) index.open = false;
"""


def text(value: Any) -> str:
    """Escaped text, for between tags and for quoted attributes; what cannot be seen becomes a replacement character."""
    return html.escape(_UNSEEN.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


def number(value: float) -> str:
    """A number for people: four significant digits, whole numbers whole."""
    if not isinstance(value, int):
        if not math.isfinite(value):
            return "–"
        value = int(value) if value.is_integer() and abs(value) < 1e15 else value
    return (f"{value}" if isinstance(value, int) else f"{value:.4g}").replace("-", "\N{MINUS SIGN}")


def as_number(cell: str) -> float | None:
    """The number that a cell's text is, an ``int`` if it has only digits; ``None`` for all other text."""
    if len(cell) > 40 or not _NUMBER.fullmatch(cell):
        return None
    return int(cell) if cell.removeprefix("-").isdecimal() else float(cell)


def short(value: Any, longest: int = LONGEST_CELL) -> str:
    """One cell's text, cut where it is too long."""
    if isinstance(value, list):
        value = ", ".join(short(item) for item in value[:longest]) or "–"
    elif value is None or isinstance(value, bool):
        value = {None: "–", True: "yes", False: "no"}[value]
    elif isinstance(value, float):
        value = repr(value)
    elif isinstance(value, int):
        value = str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
    found = str(value)
    return found if len(found) <= longest else f"{found[:longest]}… ({len(found)} characters)"


def grid(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table in a box of its own that scrolls; columns of numbers are set to the right, what is too large is cut."""
    columns = max([len(header), *map(len, rows)])
    width = min(columns, MOST_COLUMNS)
    names, *full = [[short(cell) for cell in row[:width]] + [""] * (width - len(row)) for row in (header, *rows[:MOST_ROWS])]
    cut = [f"the first {MOST_ROWS} of {len(rows)} rows"] if len(rows) > MOST_ROWS else []
    cut += [f"the first {MOST_COLUMNS} of {columns} columns"] if columns > MOST_COLUMNS else []
    note = f'<p class="note">Shown are {" and ".join(cut)}; the file has all.</p>' if cut else ""
    numeric = []
    for column in range(width):
        cells = [row[column] for row in full if row[column] not in ("", "–")]
        numeric.append(bool(cells) and all(as_number(cell) is not None for cell in cells))
    body = []
    for row in full:
        cells = []
        for column, value in enumerate(row):
            tag = "th" if column == 0 else "td"
            scope = ' scope="row"' if column == 0 else ""
            known = as_number(value) if numeric[column] else None
            if known is not None:
                cells.append(f'<{tag}{scope} class="num" data-v="{known!r}">{text(number(known))}</{tag}>')
            else:
                cells.append(f"<{tag}{scope}>{text(value)}</{tag}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(
        f'<th scope="col"{" class=" + chr(34) + "num" + chr(34) if right else ""}>{text(name)}</th>'
        for name, right in zip(names, numeric, strict=True)
    )
    return framed(f"<thead><tr>{head}</tr></thead>", body, "sort") + note


def framed(head: str, body: Iterable[str], kind: str, box: str = "scroll") -> str:
    """A table of ready rows in a box that scrolls: ``"scroll"``, or ``"scroll all"`` if only sideways."""
    rows = "\n".join(body)
    return f'<div class="{box}" tabindex="0"><table class="{kind}">{head}<tbody>\n{rows}\n</tbody></table></div>'


def folded(title: str, inner: str, opened: bool = False) -> str:
    """Something to open; ``title`` is plain text."""
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>{inner}</details>"


def markdown(source: str) -> str:
    """Headings, paragraphs, lists, code and tables; everything else stays the text it is. Nothing is fetched or linked."""
    out: list[str] = []
    lines = source.expandtabs(4).splitlines()
    place = 0
    while place < len(lines):
        line = lines[place]
        if not line.strip():
            place += 1
        elif line.lstrip().startswith("```"):
            end = next((i for i in range(place + 1, len(lines)) if lines[i].lstrip().startswith("```")), len(lines))
            out.append(f"<pre>{text(chr(10).join(lines[place + 1 : end]))}</pre>")
            place = end + 1
        elif line.startswith("    "):
            place, block = _while(lines, place, lambda it: it.startswith("    "))
            out.append(f"<pre>{text(chr(10).join(it[4:] for it in block))}</pre>")
        elif re.match(r"#{1,6} ", line):
            out.append(f"<h4>{_inline(line.lstrip('#').strip())}</h4>")
            place += 1
        elif "|" in line and place + 1 < len(lines) and len(lines[place + 1]) < 1000 and _RULE.match(lines[place + 1]):
            place, block = _while(lines, place, lambda it: "|" in it)
            cells = [[re.sub(r"\*\*|`", "", cell) for cell in _cells(it)] for it in (block[0], *block[2:])]
            out.append(grid(cells[0], cells[1:]))
        elif re.match(r"\s*[-*] ", line):
            place, block = _while(lines, place, lambda it: bool(it.strip()))
            items = re.split(r"(?:^|\n)\s*[-*] ", "\n".join(block))[1:]
            out.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>")
        else:
            place, block = _while(lines, place, lambda it: bool(it.strip()) and not it.startswith("#"))
            paragraph = _inline(" ".join(block))
            out.append(f"<p>{paragraph}</p>" if paragraph.strip() else "")
    return "\n".join(filter(None, out))


def frame(title: str, subtitle: str, index: Sequence[tuple[str, str, int]], main: str, footer: str) -> str:
    """The whole page. ``index`` has (anchor, name, depth); ``main`` and ``footer`` are HTML."""
    links = "\n".join(
        f'<li{" class=" + chr(34) + "sub" + chr(34) if depth else ""}><a href="#{anchor}">{text(name)}</a></li>'
        for anchor, name, depth in index
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<div class="page">
<header><h1>{text(title)}</h1>{f"<p>{text(subtitle)}</p>" if subtitle else ""}</header>
<div class="columns">
<nav aria-label="Contents"><details open><summary>Contents</summary><ul>
{links}
</ul></details></nav>
<main>
{main}
<footer>{footer}</footer>
</main>
</div>
</div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _while(lines: list[str], place: int, holds: Any) -> tuple[int, list[str]]:
    end = place + 1
    while end < len(lines) and holds(lines[end]):
        end += 1
    return end, lines[place:end]


def _cells(line: str) -> list[str]:
    bare = line.strip().removeprefix("|").removesuffix("|")
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", bare)]


def _inline(source: str) -> str:
    out = []
    for place, part in enumerate(source.split("`")):
        if place % 2:
            out.append(f"<code>{text(part)}</code>")
            continue
        part = re.sub(r"!\[[^\[\]]{0,500}\]\([^()]{0,500}\)", "", part)  # pictures have a place of their own
        part = re.sub(r"\[([^\[\]]{0,500})\]\(([^()]{0,500})\)", r"\1 (\2)", part)
        out.append(re.sub(r"\*\*([^*]{1,500})\*\*", r"<strong>\1</strong>", text(part)))
    return "".join(out)
