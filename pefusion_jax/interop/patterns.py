r"""Regular expressions from files that nobody vouches for, matched in polynomial time.

Python's ``re`` backtracks: ``(a|a)*b`` in an adapter's configuration would hold a process for ever. Here the set of positions
that a part of the pattern can reach is computed instead, each pair of part and position once, so that the work is bounded
by (length of the pattern) x (length of the name)^2, and counted besides. Whether a whole name matches is all that is asked,
for which greedy, lazy and backtracking are the same.

Understood: literals, ``.``, classes, ``\d \w \s`` and their opposites, groups of all kinds that do not look behind, ``|``,
``* + ? {m,n}`` and their lazy forms, look-ahead, ``^ $ \A \Z``. Refused, by name: references to groups, look-behind,
possessive and atomic parts, flags, other letters after a backslash.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

MAX_LENGTH, MAX_DEPTH, MAX_STEPS = 4096, 24, 2_000_000
_COUNTS = re.compile(r"\{(\d{0,9})(,?)(\d{0,9})\}")


class Budget:
    """The work that all patterns of one file may do together."""

    def __init__(self, steps: int = MAX_STEPS):
        self.left = steps

    def spend(self, steps: int = 1) -> None:
        """Counts work.

        Raises:
          ValueError: when there is none left.
        """
        self.left -= steps
        if self.left < 0:
            raise ValueError(
                "matching the patterns takes more work than any real adapter's do; replace them by plain module names"
            )


class Pattern:
    """A pattern that has been understood.

    Args:
      text: the pattern.
      what: where it comes from, for messages.
      budget: shared by all patterns of a file.

    Raises:
      ValueError: if it is no regular expression, or has a part that is refused, or is too long.
    """

    def __init__(self, text: str, what: str, budget: Budget):
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{what}: a pattern of {len(text)} characters; at most {MAX_LENGTH} are read")
        self._budget = budget
        # Without quantifiers and alternatives there is nothing to backtrack, and re is fast.
        self._plain = None
        if not set("*+?{|()[\\^$") & set(text.replace("\\.", "")):
            self._plain = re.compile(text)
            return
        parser = _Parser(text, what)
        self._root = parser.alternatives(0)
        if parser.at < len(text):
            raise parser.error("a ')' that closes nothing")

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name matches."""
        if self._plain is not None:
            self._budget.spend()
            return self._plain.fullmatch(name) is not None
        return len(name) in _Run(name, self._budget).ends(self._root, 0)

    def matches_tail(self, name: str) -> bool:
        """Whether the name, or what follows one of its dots, matches: PEFT's rule for ``rank_pattern``."""
        starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
        if self._plain is not None:
            self._budget.spend(len(starts))
            return any(self._plain.fullmatch(name, start) for start in starts)
        run = _Run(name, self._budget)
        return any(len(name) in run.ends(self._root, start) for start in starts)


# A node is a tuple whose first entry says which: ("one", predicate), ("seq", nodes), ("or", nodes),
# ("repeat", node, least, most or None), ("look", negated, node), ("begin",), ("end",).
Node = tuple[Any, ...]


class _Parser:
    def __init__(self, text: str, what: str):
        self.text, self.what, self.at = text, what, 0

    def error(self, problem: str) -> ValueError:
        shown = self.text if len(self.text) <= 200 else self.text[:200] + "..."
        return ValueError(f"{self.what}: {problem} in the pattern {shown!r}, at character {self.at}")

    def alternatives(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} nested groups")
        branches = [self.sequence(depth)]
        while self.text[self.at : self.at + 1] == "|":
            self.at += 1
            branches.append(self.sequence(depth))
        return branches[0] if len(branches) == 1 else ("or", branches)

    def sequence(self, depth: int) -> Node:
        nodes = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            nodes.append(self.quantified(self.atom(depth)))
        return ("seq", nodes)

    def quantified(self, node: Node) -> Node:
        counts = _COUNTS.match(self.text, self.at)
        sign = self.text[self.at : self.at + 1]
        if sign and sign in "*+?":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
            self.at += 1
        elif counts is not None and (counts[1] or counts[3]):
            least = int(counts[1] or 0)
            most = (int(counts[3]) if counts[3] else None) if counts[2] else least
            if most is not None and most < least:
                raise self.error("a count whose minimum is above its maximum")
            self.at = counts.end()
        else:
            return node
        if node[0] in ("begin", "end"):
            raise self.error("a repeated anchor")
        following = self.text[self.at : self.at + 1]
        if following == "?":  # lazy: the same names match
            self.at += 1
        elif following and following in "*+" or following == "{" and _COUNTS.match(self.text, self.at):
            raise self.error("a possessive or doubled quantifier, which is not supported,")
        return ("repeat", node, least, most)

    def atom(self, depth: int) -> Node:
        character = self.text[self.at]
        self.at += 1
        if character == "(":
            return self.group(depth)
        if character == "[":
            return self.one_of()
        if character == "\\":
            return self.escape()
        if character == ".":
            return ("one", lambda c: c != "\n")
        if character in "*+?":
            raise self.error("a quantifier with nothing to repeat")
        if character == "^":
            return ("begin",)
        if character == "$":
            return ("end",)
        return ("one", character.__eq__)

    def group(self, depth: int) -> Node:
        look = None
        if self.text[self.at : self.at + 1] == "?":
            named = re.compile(r"\?P<[A-Za-z_]\w{0,63}>").match(self.text, self.at)
            kind = self.text[self.at : self.at + 2]
            if named is not None:
                self.at = named.end()
            elif kind in ("?:", "?=", "?!"):
                look = None if kind == "?:" else kind == "?!"
                self.at += 2
            else:
                raise self.error("look-behind, a flag, an atomic group or another extension, which is not supported,")
        inside = self.alternatives(depth + 1)
        if self.text[self.at : self.at + 1] != ")":
            raise self.error("a group that is not closed")
        self.at += 1
        return inside if look is None else ("look", look, inside)

    def one_of(self) -> Node:
        begin = self.at - 1
        if self.text[self.at : self.at + 1] == "^":
            self.at += 1
        if self.text[self.at : self.at + 1] == "]":  # first in a class, it stands for itself
            self.at += 1
        while self.at < len(self.text) and self.text[self.at] != "]":
            self.at += 2 if self.text[self.at] == "\\" else 1
        self.at += 1
        return ("one", self.single(self.text[begin : self.at]))

    def escape(self) -> Node:
        character = self.text[self.at : self.at + 1]
        self.at += 1
        if character in ("A", "Z"):
            return ("begin",) if character == "A" else ("end",)
        if character and character in "dDwWsS":
            return ("one", self.single("\\" + character))
        if not character or character.isalnum():
            raise self.error(f"'\\{character}', which is not supported,")
        return ("one", character.__eq__)

    def single(self, text: str) -> Callable[[str], bool]:
        """A class of characters as a predicate: on one character, re has nothing to backtrack either."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled = re.compile(text)
        except (re.error, OverflowError) as error:
            raise self.error(f"a class of characters that is none ({error})") from error
        return lambda c: compiled.fullmatch(c) is not None


class _Run:
    """One name against one pattern."""

    def __init__(self, name: str, budget: Budget):
        self.name, self.budget = name, budget
        self.known: dict[tuple[int, int], frozenset[int]] = {}

    def ends(self, node: Node, start: int) -> frozenset[int]:
        """Where a part of the pattern can end if it begins at ``start``."""
        at = (id(node), start)
        if at not in self.known:
            self.known[at] = self._ends(node, start)
        return self.known[at]

    def _ends(self, node: Node, start: int) -> frozenset[int]:
        self.budget.spend()
        kind = node[0]
        if kind == "one":
            return frozenset({start + 1} if start < len(self.name) and node[1](self.name[start]) else ())
        if kind == "begin":
            return frozenset({start} if start == 0 else ())
        if kind == "end":
            return frozenset({start} if start == len(self.name) else ())
        if kind == "look":
            return frozenset({start} if bool(self.ends(node[2], start)) != node[1] else ())
        if kind == "or":
            return frozenset().union(*(self.ends(branch, start) for branch in node[1]))
        if kind == "seq":
            reached = frozenset({start})
            for part in node[1]:
                reached = self.step(part, reached)
            return reached
        _, part, least, most = node
        reached = frozenset({start})
        for _ in range(least):
            following = self.step(part, reached)
            if following == reached:  # positions only grow, so this comes after as many steps as the name is long
                break
            reached = following
        found, frontier, count = reached, reached, least
        while frontier and (most is None or count < most):
            frontier = self.step(part, frontier) - found
            found, count = found | frontier, count + 1
        return found

    def step(self, node: Node, starts: frozenset[int]) -> frozenset[int]:
        self.budget.spend(len(starts))
        return frozenset().union(*(self.ends(node, start) for start in starts))
