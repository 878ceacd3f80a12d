"""Makes mutants: copies of the present code with the meaning of one place changed.

Each is made from the syntax tree of a fold, or the text of a view's SQL, as they are now, so that none rots. A mutant
is named by its place in words and not by its line: the function, the original text, the new text.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Final

from schemas import kinds, tables
from worker.folds.facts import Change, Facts
from worker.folds.join import RowSpec
from worker.folds.reading import carried, make_facts, references

ROOT: Final = Path(__file__).parent.parent
FOLDS: Final[Mapping[str, tuple[str, ...]]] = {
    "balance": ("balance_transactions", "balance_changes", "balances"),
    "charge": ("charges",),
    "checkout_session": ("orders", "order_lines"),
    "credit_note": ("credit_notes", "credit_note_lines"),
    "customer": ("customers",),
    "dispute": ("disputes",),
    "invoice": ("invoices", "invoice_payments"),
    "payment": ("charges", "refunds", "payment_intents", "orders"),
    "payment_intent": ("payment_intents",),
    "payment_link": ("payment_links",),
    "portal": ("portal_configurations", "portal_sessions"),
    "refund": ("refunds",),
}
"""By module: the tables with the columns that it names, which are swapped with neighbours of their type."""
JOINS: Final = ("chain", "join", "reading", "mending")
"""The modules by which every fold reads and every row is made; they name no column."""
_OF_JOINS: Final = ("arithmetic", "comparison", "condition", "flag", "function", "number", "sign")
EXPLAIN: Final = "worker/proof/explain.py"
VIEWS: Final[Mapping[str, str]] = {
    "schemas/migrations/versions/0001_spine.py": "CREATE VIEW payment_link_funnel",
    "schemas/migrations/versions/0023_book_by_keys.py": "CREATE OR REPLACE VIEW order_book",
}
"""By file: the start of the statement that makes the present view."""

_FLIPPED: Final[Mapping[type[ast.AST], str]] = {
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
}
_ORDERS: Final = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_OPERATORS: Final[Mapping[type[ast.AST], str]] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.BitOr: "-"}
_OTHER_NAMES: Final = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "list"}
_OPTIONAL: Final = (
    "before",
    "rank",
    "moments",
    "stamp",
    "is_first",
    "root",
    "currency",
    "references",
    "parts",
)
# By the names that the code has, so that none is left behind where the code renames one.
_REQUIRED: Final = {
    make_facts.__name__: (),
    RowSpec.__name__: ("table", "subject", "empty"),
    Facts.__name__: ("currency", "rank", "stamp"),
}


_OURS: Final = ("event", "step", "facts", "subject", "by", "charge_", "listed")
"""Variables that hold our own objects, all fields of which are mutated."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """In *file*, from offset *start* to *end*, *right* becomes *wrong*; *number* counts equal ones of one *scope*."""

    file: str
    scope: str
    kind: str
    right: str
    wrong: str
    number: int
    line: int
    start: int
    end: int

    @property
    def name(self) -> str:
        """The name of the mutant, which does not depend on line numbers."""
        words = f"{self.file} {self.scope}: {self.right} -> {self.wrong}" + (f" #{self.number}" if self.number else "")
        return " ".join(words.split())

    @property
    def is_of_fold(self) -> bool:
        """Whether it is in a pure fold, so that tests can run on it in memory."""
        return self.file.startswith("worker/folds/")

    def text(self) -> str:
        """Return the file with the mutant in it."""
        text = (ROOT / self.file).read_text()
        return text[: self.start] + self.wrong + text[self.end :]


def made() -> list[Mutant]:
    """Return all mutants, by file and line."""
    found = [_python(f"worker/folds/{name}.py", columns) for name, columns in FOLDS.items()]
    found += [_python(EXPLAIN, ()), *(_view(file, begin) for file, begin in VIEWS.items())]
    return list(chain.from_iterable(found))


def made_of_joins() -> list[Mutant]:
    """Return the mutants of how events are read and put in order, by file and line."""
    found = chain.from_iterable(_python(f"worker/folds/{name}.py", ()) for name in JOINS)
    return [each for each in found if each.kind in _OF_JOINS]


def _numbered(found: Iterator[Mutant]) -> Iterator[Mutant]:
    seen: Counter[tuple[str, ...]] = Counter()
    places: set[tuple[int, int, str]] = set()
    for each in sorted(found, key=lambda each: (each.start, each.end)):
        if each.right == each.wrong or (each.start, each.end, each.wrong) in places:
            continue
        places.add((each.start, each.end, each.wrong))
        key = (each.scope, *each.right.split(), "->", *each.wrong.split())  # as they are in the name
        yield replace(each, number=seen[key])
        seen[key] += 1


# ---- Python ----


@cache
def _neighbours(names: tuple[str, ...]) -> dict[str, str]:
    """Return, by column of the tables *names*, the next one of the same type in its table."""
    found: dict[str, str] = {}
    for table in (tables.metadata.tables[name] for name in reversed(names)):
        for type_ in {repr(column.type) for column in table.columns}:
            alike = [each.name for each in table.columns if repr(each.type) == type_]
            found |= dict(pairwise([*alike, alike[0]])) if len(alike) > 1 else {}
    return found


def _python(file: str, table_names: tuple[str, ...]) -> Iterator[Mutant]:
    return _numbered(_Maker(file, _neighbours(table_names)).make())


class _Maker:
    """Walks the tree of one module, and makes all mutants of each node."""

    def __init__(self, file: str, columns: Mapping[str, str]) -> None:
        self._file, self._columns = file, columns
        self._text = (ROOT / file).read_text()
        self._lines = [0]
        for line in self._text.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._tree = ast.parse(self._text)
        self._fields = dict(self._fields_of_structs())
        self._dropped: set[ast.AST] = set()

    def make(self) -> Iterator[Mutant]:
        for node in self._tree.body:
            if isinstance(node, (ast.FunctionDef, ast.Assign, ast.AnnAssign)):
                yield from self._walk(node, "module")
            if isinstance(node, ast.ClassDef):
                methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                yield from chain.from_iterable(self._walk(each, node.name) for each in methods)

    def _fields_of_structs(self) -> Iterator[tuple[str, str]]:
        """Yield each field of Stripe's objects that is read, and the next field of the same type in its class."""
        for node in self._tree.body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Struct" for base in node.bases):
                fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
                for type_ in {ast.unparse(each.annotation) for each in fields}:
                    alike = [ast.unparse(each.target) for each in fields if ast.unparse(each.annotation) == type_]
                    yield from pairwise([*alike, alike[0]]) if len(alike) > 1 else ()

    def _walk(self, node: ast.AST, scope: str) -> Iterator[Mutant]:
        if isinstance(node, ast.Assert) or _names_columns(node):
            return
        if isinstance(node, ast.FunctionDef):
            scope = node.name if scope == "module" else f"{scope}.{node.name}"
        for kind, part, wrong in self._of(node):
            if kind == "number" and scope == "module":
                continue  # a constant that is only compared with constants like it
            start, end = self._span(part)
            yield Mutant(self._file, scope, kind, self._text[start:end], wrong, 0, part.lineno, start, end)
        for child in self._meant(node):
            if not self._is_covered(node, child):
                yield from self._walk(child, scope)

    @staticmethod
    def _meant(node: ast.AST) -> Sequence[ast.AST]:
        """Return the children of *node* but for types, docstrings and decorators."""
        if isinstance(node, ast.JoinedStr):
            return []
        if isinstance(node, ast.FunctionDef):
            return node.body[1:] if ast.get_docstring(node) else node.body
        if isinstance(node, ast.AnnAssign):
            return [node.value] if node.value and "TypeAlias" not in ast.unparse(node.annotation) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "isinstance", "Reader"):
            return node.args[:1] if ast.unparse(node.func) == "isinstance" else node.args[1:]
        return list(ast.iter_child_nodes(node))

    def _span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        # The code is ASCII, so that a column of bytes is one of characters.
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._lines[node.lineno - 1] + node.col_offset
        return start, self._lines[node.end_lineno - 1] + node.end_col_offset

    def _source(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self._text[start:end]

    def _of(self, node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt | ast.keyword, str]]:
        match node:
            case ast.If() | ast.IfExp() | ast.While():
                yield from self._condition(node.test)
            case ast.comprehension():
                for each in node.ifs:
                    yield from self._condition(each)
            case ast.BoolOp():
                for each in node.values:
                    yield "condition", each, str(isinstance(node.op, ast.And))
                    self._dropped.add(each)
            case ast.Compare(ops=[_]) if node not in self._dropped or isinstance(node.ops[0], _ORDERS):
                yield from self._compare(node)
            case ast.UnaryOp(op=ast.Not() | ast.USub()) if node not in self._dropped:
                yield "condition" if isinstance(node.op, ast.Not) else "sign", node, f"({self._source(node.operand)})"
            case _:
                yield from self._of_value(node)

    def _of_value(self, node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt | ast.keyword, str]]:
        match node:
            case ast.BinOp():
                yield from self._binary(node)
            case ast.Call():
                yield from self._call(node)
            case ast.Attribute(ctx=ast.Load()):
                if node.attr in self._fields and ast.unparse(node.value) not in _OURS:
                    yield "column", node, f"{self._source(node.value)}.{self._fields[node.attr]}"
            case ast.Assign(targets=[ast.Tuple() as names], value=ast.Call(func=ast.Name(id="range"))):
                for one, other in pairwise(names.elts):
                    swapped = {one: other, other: one}
                    yield "rank", names, ", ".join(self._source(swapped.get(each, each)) for each in names.elts)
            case _:
                yield from self._of_statement(node)

    def _of_statement(self, node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
        match node:
            case ast.Assign(targets=[ast.Subscript()]) | ast.AugAssign() | ast.Expr(value=ast.Call()):
                yield "statement", node, "pass"
            case ast.Dict():
                yield from self._mapping(node)
            case ast.JoinedStr():
                yield "word", node, '""'
            case ast.Constant():
                yield from self._constant(node)
            case _:
                pass

    def _is_covered(self, parent: ast.AST, child: ast.AST) -> bool:
        """Return whether another mutant changes *child* already, or *child* is a key that every lookup needs."""
        match parent, child:
            case ast.Compare() | ast.UnaryOp(), ast.Constant():
                return True
            case ast.Subscript(slice=ast.Constant(value=str(word))), ast.Constant():
                return word not in self._columns
            case ast.Dict(), ast.expr():
                return child in _places(parent)
            case _:
                return False

    def _condition(self, test: ast.expr) -> Iterator[tuple[str, ast.expr, str]]:
        is_flipped = isinstance(test, ast.UnaryOp) or (
            isinstance(test, ast.Compare) and not isinstance(test.ops[0], _ORDERS)
        )
        if not is_flipped:
            yield "condition", test, f"(not ({self._source(test)}))"

    def _compare(self, node: ast.Compare) -> Iterator[tuple[str, ast.expr, str]]:
        left, right = self._source(node.left), self._source(node.comparators[0])
        left = f"({left})" if isinstance(node.left, ast.NamedExpr) else left
        yield "comparison", node, f"{left} {_FLIPPED[type(node.ops[0])]} {right}"

    def _binary(self, node: ast.BinOp) -> Iterator[tuple[str, ast.expr, str]]:
        is_text = any(isinstance(each, (ast.List, ast.Tuple, ast.JoinedStr)) for each in (node.left, node.right))
        other = _OPERATORS.get(type(node.op))
        if other is not None and not is_text:
            wrong = f"{self._source(node.left)} {other} {self._source(node.right)}"
            yield "arithmetic", node, self._source(node.left) if isinstance(node.op, ast.BitOr) else wrong

    def _call(self, node: ast.Call) -> Iterator[tuple[str, ast.expr | ast.keyword, str]]:
        name = ast.unparse(node.func)
        if name in (carried.__name__, references.__name__):
            for each in node.keywords:
                if each.arg is not None and not self._has_neighbour(each.value):
                    yield "column", each.value, "UNSET" if name == carried.__name__ else "None"
        elif name in _OTHER_NAMES:
            yield "function", node.func, _OTHER_NAMES[name]
        elif name in _REQUIRED:
            wanted = [each for each in node.keywords if each.arg and each.arg not in _REQUIRED[name]]
            for each in wanted:
                if name == RowSpec.__name__ or each.arg in _OPTIONAL:
                    yield "argument", each, f"{each.arg}=None" if each.arg == "before" else f"**{{}}"  # noqa: F541
        elif name == Change.__name__ and ast.unparse(node.args[1]) != "None":
            yield "change", node.args[1], "None"

    def _has_neighbour(self, value: ast.expr) -> bool:
        return any(isinstance(each, ast.Attribute) and each.attr in self._fields for each in ast.walk(value))

    def _mapping(self, node: ast.Dict) -> Iterator[tuple[str, ast.expr, str]]:
        """Give each value of a mapping of ranks or statuses the next other value."""
        values = _places(node)
        for number, each in enumerate(values):
            others = [other for other in (*values[number:], *values) if self._source(other) != self._source(each)]
            if others:
                yield "rank", each, self._source(others[0])

    def _constant(self, node: ast.Constant) -> Iterator[tuple[str, ast.expr, str]]:
        if isinstance(node.value, bool):
            yield "flag", node, str(not node.value)
        elif isinstance(node.value, int):
            yield "number", node, str(node.value + 1)
        elif isinstance(node.value, str):
            yield from self._word(node, node.value)

    def _word(self, node: ast.Constant, word: str) -> Iterator[tuple[str, ast.expr, str]]:
        if word in kinds.KINDS:
            subject = word.partition(".")[0]
            alike = [each for each in kinds.KINDS if each.startswith(subject + ".")]
            other = alike[(alike.index(word) + 1) % len(alike)]
            yield "change", node, f'"{other if other != word else "order.paid"}"'
        elif word in self._columns:
            yield "column", node, f'"{self._columns[word]}"'
        elif word and "\n" not in word and word not in tables.metadata.tables and not word.startswith("_"):
            yield "word", node, f'"{word}~"'


def _places(node: ast.Dict) -> list[ast.expr]:
    """Return the values of a mapping to ranks or statuses; none for any other mapping."""
    values = [each for each in node.values if isinstance(each, ast.Constant) or ast.unparse(each)[1:].isupper()]
    return values if 1 < len(values) == len(node.values) else []


def _names_columns(node: ast.AST) -> bool:
    """Return whether *node* lists the columns of an empty row, each of which every row needs."""
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target) in ("_COLUMNS", "_LINE_COLUMNS")
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "dict.fromkeys"


# ---- SQL ----

# The worlds of two rows, which then are not compared in the mode, or in the account.
_WORLDS: Final = r"\((\w)\.account, \1\.livemode((?:, \w\.\w+)?)\) = \((\w)\.account, \3\.livemode"
_SQL: Final[Sequence[tuple[str, str, str]]] = (
    ("comparison", r"<>", "="),
    ("comparison", r"(?<![<>:])=", "<>"),
    ("comparison", r">=", ">"),
    ("comparison", r"<=", "<"),
    ("comparison", r"(?<![<>])>(?![=>])", ">="),
    ("comparison", r"<(?![=>])", "<="),
    ("comparison", r"\bIS NOT DISTINCT FROM\b", "IS DISTINCT FROM"),
    ("comparison", r"\bIS DISTINCT FROM\b", "IS NOT DISTINCT FROM"),
    ("comparison", r"\bIS NOT (?=NULL|TRUE|FALSE)", "IS "),
    ("comparison", r"\bIS (?=NULL|TRUE|FALSE)", "IS NOT "),
    ("condition", r"\bAND\b", "OR"),
    ("condition", r"\bOR\b(?! REPLACE)", "AND"),
    ("condition", r"\bNOT IN\b", "IN"),
    ("condition", r"(?<!NOT )\bIN\b", "NOT IN"),
    ("condition", r"(?<!IS )\bNOT (?!IN\b|NULL|TRUE|FALSE|DISTINCT)", ""),
    ("arithmetic", r" \+ ", " - "),
    ("arithmetic", r" - ", " + "),
    ("function", r"\bbool_or\b", "bool_and"),
    ("function", r"\bbool_and\b", "bool_or"),
    ("function", r"\bleast\b", "greatest"),
    ("function", r"\bgreatest\b", "least"),
    ("function", r"\bsum\b", "max"),
    ("function", r"\bDESC\b", "ASC"),
    ("column", _WORLDS, r"(\1.account, \3.livemode\2) = (\3.account, \3.livemode"),
    ("column", _WORLDS, r"(\3.account, \1.livemode\2) = (\3.account, \3.livemode"),
    ("column", r"\bamount_captured\b(?!, c\.amount_refunded)", "amount_refunded"),
    ("column", r"(?<!amount_captured, c\.)\bamount_refunded\b", "amount_captured"),
    ("column", r"\bamount_total\b", "amount_subtotal"),
    ("word", r"'(\w+)'", r"'\1~'"),
    ("number", r"(?<=[ (])0(?=[ ,)\n])", "1"),
    ("flag", r"\bfalse\b", "true"),
)


def statement_of(file: str, text: str) -> str:
    """Return the statement that replaces the view of *file* by the one that its *text* has."""
    start, end = _place_of(VIEWS[file], text)
    return text[start:end].replace("CREATE VIEW", "CREATE OR REPLACE VIEW", 1)


def _place_of(begin: str, text: str) -> tuple[int, int]:
    start = text.index(begin)
    return start, text.index(";\n", start)  # a comment may hold one too


def _view(file: str, begin: str) -> Iterator[Mutant]:
    """Yield the mutants of the view that a statement in *file* makes, which starts with *begin*."""
    text = (ROOT / file).read_text()
    start, end = _place_of(begin, text)
    statement = text[start:end]
    return _numbered(_of_sql(file, begin.rpartition(" ")[2], text, start, statement))


def _of_sql(file: str, scope: str, text: str, offset: int, statement: str) -> Iterator[Mutant]:
    for kind, pattern, replacement in _SQL:
        for match in re.finditer(pattern, statement):
            start, end = offset + match.start(), offset + match.end()
            line_start, line_end = text.rindex("\n", 0, start) + 1, text.index("\n", end)
            # The whole line names the place, since an operator alone would not.
            wrong = text[line_start:start] + match.expand(replacement) + text[end:line_end]
            line = text.count("\n", 0, start) + 1
            yield Mutant(file, scope, kind, text[line_start:line_end], wrong, 0, line, line_start, line_end)


__all__ = ["EXPLAIN", "FOLDS", "JOINS", "VIEWS", "Mutant", "made", "made_of_joins", "statement_of"]
