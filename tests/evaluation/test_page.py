"""Pages of results: one file, well-formed, without any connection, with all that is hostile in the folder made harmless."""

import base64
import hashlib
import html.parser
import json
import os
import re
import struct
import zlib
from pathlib import Path

import pytest

from pefusion_jax.cli import main
from pefusion_jax.evaluation import Comparison, Row, Scores, write_page

VOID = {"meta", "img", "br", "hr", "link", "input"}
ROW = b'{"schema": "pefusion_jax.comparison.v1", "tasks": ["p"], "rows": [{"name": "a", "kind": "b", "scores": {"p": %s}}]}'
HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>"


class Reader(html.parser.HTMLParser):
    """Checks that tags are closed in order; keeps attributes, text and images."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.images, self.rows = [], [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)
        if "tr" in self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data


def read(path):
    """The page, after the checks that every page must pass."""
    content = Path(path).read_text(encoding="utf-8")
    page = Reader(content)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "svg", "audio", "video", "input"), tag
        assert not [name for name in attrs if name.startswith("on")] and "style" not in attrs, (tag, attrs)
        if "href" in attrs:
            assert attrs["href"][0] == "#" and attrs["href"][1:] in ids, attrs
        if "src" in attrs:
            assert tag == "img" and attrs["src"].startswith("data:image/png;base64,")
            assert base64.b64decode(attrs["src"].partition(",")[2], validate=True).startswith(b"\x89PNG")
    # The policy admits this style and this script, by their digests, and nothing else.
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", content, re.S)
        assert len(found) == 1 and "http" not in found[0] and "url(" not in found[0] and "@import" not in found[0]
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    return page


def png(width=300, height=100):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"\0" * (height * (width + 1)))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    density = chunk(b"pHYs", struct.pack(">IIB", 7874, 7874, 1))  # 200 dots an inch
    return b"\x89PNG\r\n\x1a\n" + head + density + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def comparison(title="Accuracy"):
    rows = [
        Row("zero-shot", "base", Scores({"p": 0.25, "q": 0.5})),
        Row("average", "LoRA", Scores({"p": 0.6, "q": 0.7}, {"p": 0.03, "q": 0.04}), {"p": 0.8, "q": 1.0}),
        Row("TIES", "LoRA", Scores({"p": 0.7, "q": 0.4}), {"p": 0.8, "q": 1.0}),
    ]
    return Comparison(rows, title=title)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "run"
    comparison().write(root)
    choices = {"LoRA": {"TIES": {"scale": 0.5}, "average": {"scale": 1}}, "L-LoRA": {"TIES": {"scale": 0.3}}}
    (root / "config.json").write_text(json.dumps({"model": "some/model", "steps": 30, "tasks": [], "choices": choices}))
    (root / "scores.png").write_bytes(png())
    (root / "scores.csv").write_text("method,mean\nTIES,0.55\naverage,0.65\n")
    (root / "README.md").write_text(
        "# Notes\n\nRun `it` **now**, ![p](x.png)see [us](http://example.org).\n\n    code\n\n- one\n- two\n"
    )
    (root / "suite" / "vision").mkdir(parents=True)
    (root / "suite" / "vision" / "table.csv").write_text("task,score,note\na,0.123456,x\nb,-2,y,extra\n")
    (root / "lora" / "p").mkdir(parents=True)
    (root / "lora" / "p" / "config.json").write_text('{"rank": 16}')
    (root / "lora" / "p" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN, "rate": 0.1}\n')
    (root / "lora" / "q").mkdir()
    (root / "lora" / "q" / "config.json").write_text('{"rank": 8}')
    (root / "lora" / "q" / "adapter.safetensors").write_bytes(b"x" * 2000)
    return root


def test_a_run(folder):
    done = write_page(folder)
    page, text = read(done.path), " ".join(read(done.path).text)
    assert done.path == folder / "report.html" and [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    # Results: under their kinds, in percent, with standard errors; the best of a kind is bold.
    header = next(row for row in page.rows if row[:1] == ["method"])
    assert header == ["method", "mean", "normalized", "worst", "p", "q"]
    average = next(row for row in page.rows if row[0].startswith("average") and len(row) == 6)
    assert average[0] == "averageLoRA" and average[1].startswith("65.0") and average[2] == "72.5"
    assert average[4].replace("\xa0", " ") == "60.0 ± 3.0" and ["LoRA"] in page.rows
    content = done.path.read_text()
    assert "<strong>65.0</strong>" in content and "<strong>70.0</strong>" in content and 'data-v="0.6"' in content
    # At the top: what is best, and of what.
    assert "Highest mean" in text and "some/model" in text
    # The figure has the size it was drawn for, and its numbers beside it; tables that repeat the results have not.
    assert [(image["width"], image["height"]) for image in page.images] == [("144", "48")]
    assert "scores.csv" in done.shown and ["TIES", "0.55"] in page.rows
    assert done.omitted["results.csv"] == "the same table as results.json"
    # Settings: records of a kind become one table.
    assert ["", "", "scale"] in page.rows and ["L-LoRA", "TIES", "0.3"] in page.rows and ["tasks", "–"] in page.rows
    # Tables of folders within, ragged rows filled up, numbers shortened; lines of metrics.
    assert ["a", "0.1235", "x", ""] in page.rows and ["b", "\N{MINUS SIGN}2", "y", "extra"] in page.rows
    assert ["1", "2.5", ""] in page.rows and ["2", "–", "0.1"] in page.rows
    assert {"suite/vision", "lora/p"} <= {data.strip() for data in page.text}
    # Notes keep a little of their form and lose their links.
    assert "see us (http://example.org)" in text and "<code>it</code> <strong>now</strong>" in content
    assert "<pre>code</pre>" in content and "<li>two</li>" in content
    assert done.omitted["lora/q/adapter.safetensors"] == "not a kind of file that is shown (2 kB)"
    # The same folder gives the same page, whether or not the last one lies in it.
    assert write_page(folder).path.read_bytes() == content.encode() and "report.html" not in done.omitted


def test_what_is_hostile_is_text(folder):
    name = HOSTILE.replace("/", "")
    (folder / f"{name}.csv").write_text(f'{name},"{HOSTILE.replace(chr(34), "")}"\n1,\u202egnp.exe\x00\x1b[31m\n')
    (folder / f"{name}.png").write_bytes(png())
    (folder / f"{name}.md").write_text(
        f"# {HOSTILE}\n\n`{HOSTILE}` **{HOSTILE}** [x](javascript:alert(1))\n\n|a|{HOSTILE}|\n|---|---|\n|b|c|\n"
    )
    (folder / "results.json").write_text(
        comparison(HOSTILE).json().replace("TIES", HOSTILE.replace('"', "'").replace("\\", ""))
    )
    (folder / "config.json").write_text(json.dumps({HOSTILE: HOSTILE, "model": HOSTILE, "deep": {HOSTILE: [HOSTILE]}}))
    (folder / name).mkdir()
    (folder / name / "x.txt").write_text(HOSTILE)
    bad = os.fsencode(folder) + b"/\xff\xfe.txt"
    with open(bad, "w") as file:
        file.write("plain")
    done = write_page(folder, title=HOSTILE)
    page = read(done.path)  # no handlers, no foreign script, no link
    text = "".join(page.text)
    assert text.count("onerror=alert(1)") >= 10 and [tag for tag, _ in page.tags].count("script") == 1
    assert "\u202e" not in text and "\x00" not in text and "\x1b" not in text and "\N{REPLACEMENT CHARACTER}gnp.exe" in text
    assert "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}.txt" in done.shown


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[" * 100_000, "nested|JSON"),
        ("a.json", b"1" * 10_000, "not JSON"),
        ("a.csv", b"a,b\n\xff\xfe\n", "not UTF-8 text: byte 4"),
        ("a.csv", b"", "empty"),
        ("a.csv", b'"' + b"x" * 200_000 + b'"', "field larger"),
        ("a.jsonl", b'{"a": 1}\n[]\n', "one JSON object a line"),
        ("a.png", png()[:-1], "not a whole PNG"),
        ("a.png", png().replace(b"IDAT", b"IDAX"), "not a whole PNG"),
        ("a.png", png()[:50] + b"!" + png()[51:], "not a whole PNG"),
        ("a.png", b"<svg onload=alert(1)>", "not a whole PNG"),
        ("a.png", png()[:16] + struct.pack(">II", 60_000, 60_000) + png()[24:], "not a whole PNG"),
        ("r.json", b'{"schema": "pefusion_jax.comparison.v1", "tasks": [1], "rows": []}', "'tasks' must be"),
        (
            "r.json",
            b'{"schema": "pefusion_jax.comparison.v1", "tasks": ["p"], "rows": [{"name": "a"}]}',
            "no 'name' and 'kind'",
        ),
        ("r.json", ROW.replace(b'["p"]', b'["%s"]' % (b"p" * 500)) % b"1", "more than 400 characters"),
        ("r.json", ROW % b"true", "is no score"),
        ("r.json", ROW % b"1e999", "is no score"),
    ],
)
def test_files_that_are_not_what_they_say_are_listed_with_the_reason(tmp_path, name, content, reason):
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / name).write_bytes(content)
    done = write_page(tmp_path)
    assert done.shown == ("good.txt",) and re.search(reason, done.omitted[name]), done.omitted
    assert name in "".join(read(done.path).text)


def test_the_numbers_of_a_damaged_figure_are_shown_all_the_same(tmp_path):
    (tmp_path / "fig.png").write_bytes(png()[:-1])
    (tmp_path / "fig.csv").write_text("alpha,beta\n1,here\n")
    done = write_page(tmp_path)
    assert done.shown == ("fig.csv",) and "fig.png" in done.omitted
    assert ["1", "here"] in read(done.path).rows and "fig.csv" in read(done.path).text


def test_only_files_that_repeat_a_comparison_are_left_out(folder):
    repeated = {f"results{suffix}": "the same table as results.json" for suffix in (".csv", ".md", ".txt")}
    assert {name: why for name, why in write_page(folder).omitted.items() if name in repeated} == repeated
    (folder / "results.md").write_text("# Mine\n\nThree seeds failed.\n")
    (folder / "results.csv").write_text((folder / "results.csv").read_text().replace("TIES", "TIES, again"))
    (folder / "results.txt").write_bytes(b"\xff")
    done = write_page(folder)
    assert {"results.md", "results.csv"} <= set(done.shown) and "not UTF-8" in done.omitted["results.txt"]
    assert "Three seeds failed." in read(done.path).text
    # A picture of that name leaves the table the one that is shown.
    comparison().write(folder)
    (folder / "results.png").write_bytes(png())
    assert set(repeated) <= set(write_page(folder).omitted)


def test_names_that_look_like_numbers_stay_what_they_are(tmp_path):
    columns = {
        "zeros": ["007", "12"],
        "hash": ["1e5", "3e8"],
        "long": ["12345678901234567", "-98765432109876543210"],
        "float": ["1e-05", "1234567.25"],
        "whole": ["2.0", "-3"],
        "gap": ["nan", "0.123456"],
        "lines": ["1_000", "2"],
    }
    rows = zip(*columns.values(), strict=True)
    (tmp_path / "t.csv").write_text("\n".join([",".join(columns), *map(",".join, rows)]))
    done = write_page(tmp_path)
    minus = "\N{MINUS SIGN}"
    assert read(done.path).rows[1:3] == [
        ["007", "1e5", "12345678901234567", f"1e{minus}05", "2", "–", "1_000"],
        ["12", "3e8", f"{minus}98765432109876543210", "1.235e+06", f"{minus}3", "0.1235", "2"],
    ]
    assert 'data-v="12345678901234567"' in done.path.read_text() and 'data-v="7' not in done.path.read_text()


def test_links_and_special_files_are_not_followed(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("SECRET")
    root = tmp_path / "run"
    root.mkdir()
    (root / "good.txt").write_text("fine")
    (root / "link.txt").symlink_to(secret)
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.txt")
    (root / ".hidden.txt").write_text("HIDDEN")
    done = write_page(root)
    assert done.omitted == dict.fromkeys(["link.txt", "loop", "pipe.txt"], "a link or a special file")
    content = done.path.read_text()
    assert "SECRET" not in content and "HIDDEN" not in content


def test_sizes_are_bounded(tmp_path):
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**31)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**31)
    (tmp_path / "long.csv").write_text("a,b\n" + "".join(f"{i},{i}\n" for i in range(1000)))
    (tmp_path / "wide.csv").write_text(",".join("x" * 500))
    (tmp_path / "text.txt").write_text("y" * 150_000)
    done = write_page(tmp_path)
    text = "".join(read(done.path).text)
    assert "more than 4.2 MB" in done.omitted["huge.json"] and "more than 8.4 MB" in done.omitted["huge.png"]
    assert "the first 300 of 1000 rows" in text and "the first 100 of 500 columns" in text and "(50000 more characters)" in text
    assert done.path.stat().st_size < 400_000
    full = write_page(tmp_path, max_bytes=50_000)
    assert "text.txt" in full.omitted and "the page is full" in full.omitted["text.txt"]
    assert read(full.path).rows[0] == ["a", "b"]


def test_nothing_to_show(tmp_path):
    with pytest.raises(ValueError, match="holds nothing to show"):
        write_page(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="nothing to show .*a.json: not JSON"):
        write_page(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OSError, match="not a folder"):
        write_page(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"end it with \.html"):
        write_page(tmp_path, tmp_path / "a.json")  # it would take the place of a result


def test_command_line(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path / "new" / "page.html"), "--title", "Mine"]) == 0
    assert capsys.readouterr().out.startswith("9 files in ")
    assert "Mine" in "".join(read(tmp_path / "new" / "page.html").text) and not (folder / "report.html").exists()
    assert main(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["path"] == str(folder / "report.html") and "results.json" in found["shown"] and "results.md" in found["omitted"]
    )
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("pefusion: ") and main(["report", str(folder), "--max-mb", "0"]) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--help"])
    assert stopped.value.code == 0 and "Example:  pefusion report " in capsys.readouterr().out
