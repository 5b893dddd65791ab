"""Readers for build.py: each turns one unpacked package into labelled rows, before any row is chosen.

A reader yields `Row(label, group, fields)`. `group` is what must never be in two splits: a corpus file, a mail thread, a
template, a word, a chapter. Nothing here is random. The reader of the voice intents is in intents.py.
"""

from __future__ import annotations

import email
import email.policy
import html.parser
import itertools
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    label: str
    group: str
    fields: dict[str, str]


def normalise(text: str) -> str:
    """Lower-case letters and digits with single spaces: two texts are "the same" when this is equal."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower()))


def tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# ---------------------------------------------------------------------------------------------------- SpamAssassin mails


class _Visible(html.parser.HTMLParser):
    """Text of an HTML mail without scripts, styles and comments."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style", "title")
        self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "title") and self.hidden > 0
        self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _body(mail: email.message.Message) -> str:
    texts = {"text/plain": "", "text/html": ""}
    for part in mail.walk():
        kind = part.get_content_type()
        if kind in texts and not texts[kind]:
            raw = part.get_payload(decode=True)
            texts[kind] = raw.decode("latin-1") if isinstance(raw, bytes) else ""
    # Some mails call their HTML text/plain: look at the text, not only at the header.
    plain = texts["text/plain"]
    text = plain if plain.strip() else texts["text/html"]
    if re.search(r"</?(html|body|table|t[dr]|font|p|br|hr|center|a|img|div|span|b|i|u|strong|li|ul|h\d)\b", text, re.I):
        visible = _Visible()
        visible.feed(text)
        text = "".join(visible.parts)
    return text


def _own_words(body: str) -> str:
    """The part the sender wrote: no quoted lines, no "X wrote:", no signature."""
    lines = []
    for line in body.replace("\r", "").split("\n"):
        if re.match(r"^(-- ?|_{5,}|-{5,}|={5,}|-+ ?original message.*)$", line.strip(), re.I) and lines:
            break
        quoted = re.match(r"^\s*([>|:}]|\w{1,4}>)", line)
        attribution = re.search(r"(wrote|writes|said|schrieb|says) ?:\s*$|^On .*\d.*, .*(wrote|@)", line)
        if not quoted and not attribution:
            lines.append(line)
    return "\n".join(lines)


def spam(package: Path) -> Iterator[Row]:
    """Subject and the first 300 characters of what the sender wrote; group = subject line without reply marks."""
    for folder in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2"):
        for path in sorted((package / "data" / folder).glob("*.txt")):
            mail = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
            try:
                subject = str(email.header.make_header(email.header.decode_header(str(mail.get("Subject", "")))))
            except (LookupError, UnicodeError, ValueError):
                continue  # undecodable header (invented character sets in a few spam mails)
            subject = re.sub(r"\[[^\]]{1,30}\]", " ", subject)  # [ILUG] and friends give the list away
            subject = re.sub(r"^(\s*(re|fwd?|aw|sv)\s*(\[\d+\])?:)+", "", subject, flags=re.I)
            text = re.sub(r"</?[a-zA-Z]+>", " ", subject).strip() + ". " + tidy(_own_words(_body(mail)))
            text = re.sub(r"URL: \S+ Date: (Not supplied|\S+)", " ", text)  # the head of every news item: always ham
            text = re.sub(r"(https?://|www\.)\S+|\b[\w-]+\.(com|net|org|ie)/\S*", "[link]", text, flags=re.I)
            text = re.sub(r"[\w.+-]+@[\w.-]+", "[address]", text)
            text = re.sub(r"([-=_*~#.+<>|!])(\s?\1){3,}", r"\1", text)  # rulers
            text = tidy(text)
            if len(normalise(text)) < 60 or sum(ord(c) > 126 or ord(c) < 32 for c in text) > 0.01 * len(text):
                continue
            if len(text) > 340:
                text = text[:340].rsplit(" ", 1)[0]
            text = "".join(c if 31 < ord(c) < 127 else " " for c in text)
            group = re.sub(r"\d+", "", normalise(subject)) or normalise(text)[:60]
            yield Row("spam" if folder.startswith("spam") else "ham", group, {"text": tidy(text)})


# ---------------------------------------------------------------------------------------------------------- WordNet


def _synsets(folder: Path, part: str) -> Iterator[tuple[int, list[str], str]]:
    for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
        if not line.startswith("  "):  # the licence stands on lines that start with two spaces
            head, gloss = line.split(" | ", 1)
            parts = head.split()
            count = int(parts[3], 16)
            yield int(parts[1]), [w.replace("_", " ") for w in parts[4 : 4 + 2 * count : 2]], gloss.strip()


SUPERSENSES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive "
    "object person phenomenon plant possession process quantity relation shape state substance time"
).split()


def supersense(folder: Path) -> Iterator[Row]:
    """Gloss of a noun synset (definition only, no examples) -> its lexicographer file. Group = the gloss."""
    for lexfile, words, gloss in _synsets(folder, "noun"):
        text = tidy(re.split(r';\s*"|:\s*"|;\s*-\s', gloss)[0]).strip(" ;:\"'`")
        text = tidy(re.sub(r"^\([^)]*\)\s*", "", text))  # "(architecture) ..." tells the domain, not the meaning
        if len(text.split()) >= 4 and not (words[0][0].isupper() and re.search(r"\d{4}", text)):
            yield Row(SUPERSENSES[lexfile - 3], normalise(text), {"text": text})


_ENDINGS = {
    "noun": [("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("ies", "y")],
    "verb": [
        ("s", ""),
        ("ies", "y"),
        ("es", "e"),
        ("es", ""),
        ("ed", "e"),
        ("ed", ""),
        ("ied", "y"),
        ("ing", "e"),
        ("ing", ""),
    ],
}


def _is_form(token: str, lemma: str, part: str, irregular: dict[str, set[str]]) -> bool:
    """WordNet's own detachment rules, plus the doubled consonant (stop, stopped)."""
    if token == lemma or lemma in irregular.get(token, ()):
        return True
    for ending, new in _ENDINGS[part]:
        stem = token.removesuffix(ending)
        if stem != token and (stem + new == lemma or (len(stem) > 2 and stem[-1] == stem[-2] and stem[:-1] == lemma)):
            return True
    return False


def wic(folder: Path) -> Iterator[Row]:
    """Two example sentences with the same word: from one synset (same) or from synsets of two supersenses (different).

    As the Word-in-Context data set was made (Pilehvar and Camacho-Collados, 2019), from WordNet's examples alone.
    """
    for part in ("noun", "verb"):
        irregular: dict[str, set[str]] = {}
        for line in (folder / f"{part}.exc").read_text("latin-1").splitlines():
            irregular.setdefault(line.split()[0], set()).update(line.split()[1:])
        examples: dict[str, dict[int, tuple[int, list[str]]]] = {}  # lemma -> synset number -> (lexfile, sentences)
        for number, (lexfile, words, gloss) in enumerate(_synsets(folder, part)):
            for sentence in re.findall(r'"([^"]+)"', gloss):
                sentence = tidy(sentence).strip(" ;`'")
                tokens = re.findall(r"[a-z]+", sentence.lower())
                for word in {w.lower() for w in words}:
                    if len(tokens) >= 4 and word.isalpha() and any(_is_form(t, word, part, irregular) for t in tokens):
                        kept = examples.setdefault(word, {}).setdefault(number, (lexfile, []))[1]
                        if normalise(sentence) not in map(normalise, kept):
                            kept.append(sentence)
        for word, senses in sorted(examples.items()):
            for _, sentences in senses.values():
                for one, two in itertools.combinations(sentences, 2):
                    yield Row("same", word, {"word": word, "sentence1": one, "sentence2": two})
            for (lex1, left), (lex2, right) in itertools.combinations(senses.values(), 2):
                if lex1 != lex2:  # close senses of one supersense are not told apart reliably, even by people
                    for one, two in itertools.product(left, right):
                        yield Row("different", word, {"word": word, "sentence1": one, "sentence2": two})


# ------------------------------------------------------------------------------------------------------------ Brown


def genre(package: Path) -> Iterator[Row]:
    """Sentence of 10 to 50 words -> genre of its file. Group = the file."""
    for line in (package / "cats.txt").read_text().splitlines():
        name, category = line.split()
        for raw in (package / name).read_text("latin-1").splitlines():
            words = [token.rsplit("/", 1)[0] for token in raw.split()]
            if not 10 <= sum(w[:1].isalnum() for w in words) <= 50:
                continue
            text = " ".join(words).replace("``", '"').replace("''", '"')
            text = re.sub(r" ([,.;:?!)\]])(?= |$)", r"\1", text)
            text = re.sub(r"([(\[]) ", r"\1", text)
            text = re.sub(r'" ([^"]*?) ?"', r'"\1"', text)
            text = re.sub(r"([?!;:])\1+", r"\1", text)  # the corpus doubles these marks
            text = re.sub(r'^" +', '"', text)  # a quotation that goes on in the next sentence
            yield Row(category, name, {"text": tidy(text)})


# ------------------------------------------------------------------------------------------------------- Bible verses


def _verse(osis: str) -> str:
    text = re.sub(r"<(note|title)\b.*?</\1>", " ", osis, flags=re.S)
    text = re.sub(r"<(l|lg|lb|div)\b[^>]*>", " ", text)
    text = tidy(re.sub(r"<[^>]+>", "", text).replace("¶", " "))
    return re.sub(r" ([,.;:?!’”)])", r"\1", text)


def _overlap(one: str, two: str) -> float:
    left, right = set(normalise(one).split()), set(normalise(two).split())
    return len(left & right) / max(len(left | right), 1)


def bible(kjv: Path, web: Path) -> Iterator[Row]:
    """A KJV verse with the same verse of the WEB, or with the most similar WEB verse up to four away. Group = chapter.

    Positives that share more than 70 % of their words are left out: word counting would solve them.
    """
    from pysword.modules import SwordModules

    texts = []
    for folder, module in ((kjv, "engKJV2006eb"), (web, "engWEB2015eb")):
        modules = SwordModules(str(folder / "usr/share/sword"))
        modules.parse_modules()
        texts.append(modules.get_bible_from_module(module))
    for books in texts[0].get_structure().get_books().values():
        for book in books:
            for chapter in range(1, book.num_chapters + 1):
                sides = []
                for text in texts:
                    verses = [
                        _verse(text.get(books=[book.name.lower()], chapters=[chapter], verses=[v], clean=False))
                        for v in range(1, book.chapter_lengths[chapter - 1] + 1)
                    ]
                    sides.append(verses)
                group = f"{book.name} {chapter}"
                for i, old in enumerate(sides[0]):
                    if not 8 <= len(old.split()) <= 30:
                        continue
                    usable = [j for j in range(max(0, i - 4), min(len(sides[1]), i + 5)) if 5 <= len(sides[1][j].split()) <= 40]
                    if i in usable and _overlap(old, sides[1][i]) <= 0.7:
                        yield Row("same", group, {"sentence1": old, "sentence2": sides[1][i]})
                    near = [j for j in usable if j != i]
                    if near:
                        best = max(near, key=lambda j: (_overlap(old, sides[1][j]), -abs(j - i)))
                        yield Row("different", group, {"sentence1": old, "sentence2": sides[1][best]})
