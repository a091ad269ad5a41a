"""Rules as ``root ::= ...`` in Lark's form, without changing what they match.

GBNF knows characters alone. A parser of Lark's form is much faster over lexemes, each of which takes as many
characters as it can: where a lexeme might take what belongs to the rules behind it, it is spelled out character by
character. That is told by comparing the characters that can go on a lexeme with those that can follow it, both taken
rather too large than too small, ASCII one by one and all others as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from llguidance.gbnf_to_lark import (
    ASTNode,
    GrammarParser,
    LiteralNode,
    RegexNode,
    RepetitionNode,
    RuleRefNode,
    SequenceNode,
)

# parts of rules that are looked at, which takes a few tenths of a second
MAX_WORK = 300_000

_NUM_ASCII = 128
_OTHERS = 1 << _NUM_ASCII
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}


class RulesError(ValueError):
    """Rules that are no grammar; the message is for the client."""


def to_lark(text: str) -> str:
    """The rules in Lark's form. Raises RulesError, and whatever the library's parser raises."""
    rules = {name: rule.alternatives.simplify() for name, rule in GrammarParser().parse(text).items()}
    if "root" not in rules:
        raise RulesError("there is no rule 'root'")
    for node in rules.values():
        for part in _walk(node):
            if isinstance(part, RuleRefNode) and part.name not in rules:
                raise RulesError(f"there is no rule {part.name!r}")
    return _Grammar(rules).to_lark()


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is known of the texts that an expression matches: sets of characters, as bits.

    first: how they begin. inner: what they hold behind that. more: what can go on a text that is whole already.
    """

    is_nullable: bool = True
    first: int = 0
    inner: int = 0
    more: int = 0

    @property
    def all(self) -> int:
        return self.first | self.inner

    def then(self, other: _Shape) -> _Shape:
        """Of one behind the other."""
        more = other.more
        if other.is_nullable:
            more |= self.more | other.first
        if self.more & other.first:
            # where the first ends is not certain
            more |= self.all | other.all
        return _Shape(
            self.is_nullable and other.is_nullable,
            self.first | (other.first if self.is_nullable else 0),
            self.inner | other.all,
            more,
        )

    def either(self, other: _Shape) -> _Shape:
        """Of one or the other."""
        more = self.more | other.more
        if self.first & other.first:
            more |= self.inner | other.inner
        if self.is_nullable:
            more |= other.first
        if other.is_nullable:
            more |= self.first
        return _Shape(self.is_nullable or other.is_nullable, self.first | other.first, self.inner | other.inner, more)

    def repeated(self, least: int, most: int | None) -> _Shape:
        """Of several, one behind the other."""
        if most == 0:
            return _Shape()
        more = self.more
        if least != most or self.is_nullable:
            more |= self.first
        if most != 1 and self.more & self.first:
            more |= self.all
        inner = self.inner if most == 1 else self.all
        return _Shape(self.is_nullable or least == 0, self.first, inner, more)


@dataclass(slots=True, eq=False)
class _Lexeme:
    """An expression that is matched as one piece, until it is found that it must not be."""

    node: ASTNode
    shape: _Shape
    follow: int = 0
    name: str = ""


@dataclass(slots=True)
class _Grammar:
    """Rules, and which of their parts are lexemes."""

    rules: dict[str, ASTNode]
    # of regular rules
    shapes: dict[str, _Shape] = field(default_factory=dict)
    lexemes: dict[int, _Lexeme] = field(default_factory=dict)
    spelled: set[int] = field(default_factory=set)
    first: dict[str, _Shape] = field(default_factory=dict)
    follow: dict[str, int] = field(default_factory=dict)
    work: int = 0

    def to_lark(self) -> str:
        self._find_regular()
        while True:
            self._find_lexemes()
            self._find_firsts()
            self._find_follows()
            greedy = self._find_greedy()
            if not greedy:
                return self._print()
            self.spelled |= greedy

    def _find_regular(self) -> None:
        """Rules that are regular because they refer to none but such, those referred to first."""
        open_refs = {name: _names_in(node) for name, node in self.rules.items()}
        users: dict[str, list[str]] = {name: [] for name in self.rules}
        for name, refs in open_refs.items():
            for ref in refs:
                users[ref].append(name)
        ready = [name for name, refs in open_refs.items() if not refs]
        while ready:
            name = ready.pop()
            self.shapes[name] = self._fold(self.rules[name], self.shapes.__getitem__)
            for user in users[name]:
                open_refs[user].discard(name)
                if not open_refs[user]:
                    ready.append(user)

    def _find_lexemes(self) -> None:
        self.lexemes = {}
        todo, seen = [self.rules["root"]], {"root"}
        while todo:
            node = todo.pop()
            if self._is_lexeme(node):
                self.lexemes[id(node)] = _Lexeme(node, self._fold(node, self.shapes.__getitem__))
            elif isinstance(node, RuleRefNode):
                if node.name not in seen:
                    seen.add(node.name)
                    todo.append(self.rules[node.name])
            else:
                todo += node.children()

    def _is_lexeme(self, node: ASTNode) -> bool:
        """Characters always are; the larger the better, unless that has been found wrong."""
        if isinstance(node, RegexNode):
            return True
        if id(node) in self.spelled or not isinstance(node, LiteralNode | RepetitionNode | RuleRefNode):
            return False
        return _names_in(node) <= self.shapes.keys()

    def _fold(self, node: ASTNode, of_rule: Callable[[str], _Shape]) -> _Shape:
        self._count(1)
        if isinstance(node, LiteralNode):
            masks = [_bit(character) for character in _unescape(node.value)]
            inner = 0
            for mask in masks[1:]:
                inner |= mask
            return _Shape(False, masks[0], inner) if masks else _Shape()
        if isinstance(node, RegexNode):
            return _Shape(False, _class_bits(node.rx))
        if isinstance(node, RuleRefNode):
            return of_rule(node.name)
        if isinstance(node, RepetitionNode):
            return self._fold(node.node, of_rule).repeated(node.min_times, node.max_times)
        shapes = [self._fold(child, of_rule) for child in node.children()]
        if isinstance(node, SequenceNode):
            whole = _Shape()
            for shape in shapes:
                whole = whole.then(shape)
            return whole
        whole = shapes[0]
        for shape in shapes[1:]:
            whole = whole.either(shape)
        return whole

    def _find_firsts(self) -> None:
        """How rules begin, and whether they may be empty: the least solution, from below."""
        self.first = {name: _Shape(is_nullable=False) for name in self.rules}
        changed = True
        while changed:
            changed = False
            # rules mostly stand before those that they use
            for name, node in reversed(self.rules.items()):
                shape = self._begin(node)
                shape = _Shape(shape.is_nullable, shape.first)
                if shape != self.first[name]:
                    self.first[name] = shape
                    changed = True

    def _find_follows(self) -> None:
        self.follow = dict.fromkeys(self.rules, 0)
        changed = True
        while changed:
            before = dict(self.follow)
            for name, node in self.rules.items():
                self._follow(node, self.follow[name])
            changed = before != self.follow

    def _follow(self, node: ASTNode, after: int) -> None:
        """Take note of the characters that come behind each part of an expression, behind which come ``after``."""
        lexeme = self.lexemes.get(id(node))
        if lexeme is not None:
            lexeme.follow |= after
        elif isinstance(node, RuleRefNode):
            self.follow[node.name] |= after
        elif isinstance(node, RepetitionNode):
            again = self._begin(node.node).first if node.max_times != 1 else 0
            self._follow(node.node, after | again)
        elif isinstance(node, SequenceNode):
            for part in reversed(node.nodes):
                self._follow(part, after)
                begin = self._begin(part)
                after = begin.first | (after if begin.is_nullable else 0)
        else:
            for part in node.children():
                self._follow(part, after)

    def _begin(self, node: ASTNode) -> _Shape:
        return self._fold(node, self.first.__getitem__)

    def _count(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_WORK:
            raise RulesError("it is too large")

    def _find_greedy(self) -> set[int]:
        """Lexemes that might take too much: each by itself, or where two begin alike the one that is the longer."""
        large = {key: lexeme for key, lexeme in self.lexemes.items() if lexeme.shape.inner}
        self._count(len(large) * len(self.lexemes))
        found = {
            key
            for key, lexeme in self.lexemes.items()
            if lexeme.shape.more & lexeme.follow and not isinstance(lexeme.node, RegexNode)
        }
        for key, longer in large.items():
            for lexeme in self.lexemes.values():
                if lexeme is longer or not lexeme.shape.first & longer.shape.first or _same(lexeme, longer):
                    continue
                if lexeme.follow & longer.shape.inner:
                    found.add(key)
                    break
        return {key for key in found if not isinstance(self.lexemes[key].node, RegexNode)}

    def _print(self) -> str:
        names = {name: f"rule_{number}" for number, name in enumerate(self.rules)} | {"root": "start"}
        parts = {name: f"PART_{number}" for number, name in enumerate(self.rules)}
        texts: dict[str, str] = {}
        lines = ["%llguidance {}"]
        for lexeme in self.lexemes.values():
            text = _regular(lexeme.node, parts)
            lexeme.name = texts.setdefault(text, f"LEXEME_{len(texts)}")
        lines += [f"{name}: {text}" for text, name in texts.items()]
        lines += [f"{parts[name]}: {_regular(self.rules[name], parts)}" for name in self.shapes]
        reached = self._reached()
        lines += [f"{names[name]}: {self._rule(node, names)}" for name, node in self.rules.items() if name in reached]
        return "\n".join(lines)

    def _reached(self) -> set[str]:
        reached, todo = {"root"}, [self.rules["root"]]
        while todo:
            node = todo.pop()
            if id(node) in self.lexemes:
                continue
            if isinstance(node, RuleRefNode) and node.name not in reached:
                reached.add(node.name)
                todo.append(self.rules[node.name])
            todo += node.children()
        return reached

    def _rule(self, node: ASTNode, names: dict[str, str]) -> str:
        lexeme = self.lexemes.get(id(node))
        if lexeme is not None:
            return lexeme.name
        if isinstance(node, RuleRefNode):
            return names[node.name]
        if isinstance(node, LiteralNode):
            return " ".join(map(_quote, _unescape(node.value))) or '""'
        return _spell(node, lambda part: self._rule(part, names))


def _regular(node: ASTNode, parts: dict[str, str]) -> str:
    return parts[node.name] if isinstance(node, RuleRefNode) else _spell(node, lambda part: _regular(part, parts))


def _spell(node: ASTNode, spell: Callable[[ASTNode], str]) -> str:
    if isinstance(node, LiteralNode):
        return _quote(_unescape(node.value))
    if isinstance(node, RegexNode):
        return f"/{node.rx}/"
    if isinstance(node, RepetitionNode):
        most = "" if node.max_times is None else str(node.max_times)
        return f"(({spell(node.node)}){{{node.min_times},{most}}})"
    if isinstance(node, SequenceNode):
        return " ".join(f"({spell(part)})" for part in node.nodes) or '""'
    return " | ".join(f"({spell(part)})" for part in node.children())


def _same(one: _Lexeme, other: _Lexeme) -> bool:
    """Whether two lexemes are the same expression, which is found by its own ``more``."""
    return type(one.node) is type(other.node) and one.node == other.node


def _walk(node: ASTNode) -> Iterator[ASTNode]:
    yield node
    for child in node.children():
        yield from _walk(child)


def _names_in(node: ASTNode) -> set[str]:
    return {part.name for part in _walk(node) if isinstance(part, RuleRefNode)}


def _unescape(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        number, character = match.groups()
        return chr(int(number, 16)) if number else _CONTROLS.get(character, character)

    return _ESCAPE.sub(plain, text)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _bit(character: str) -> int:
    return 1 << ord(character) if ord(character) < _NUM_ASCII else _OTHERS


@lru_cache(maxsize=256)
def _class_bits(pattern: str) -> int:
    """The characters of a class such as ``[a-z]``, or of a dot."""
    compiled = re.compile(pattern)
    bits = sum(1 << code for code in range(_NUM_ASCII) if compiled.fullmatch(chr(code)))
    is_ascii = pattern.isascii() and not pattern.startswith(("[^", "."))
    return bits if is_ascii else bits | _OTHERS
