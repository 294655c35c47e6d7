"""Every message with which the package refuses something, read from its sources without running them.

A message is the text that a class of error is made with. What is filled in at run time is shown as ‹name›; where a part
of the text depends on the case, the first of its forms is shown, and the others follow it behind a bar.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_FORMS = 4
ALTERNATIVE = " | "


@dataclass(frozen=True)
class Message:
    error: str
    """Name of the class."""
    text: str
    file: str
    """Module that it is raised in, as `mixcl_dist/…`."""


def error_classes(package: Path) -> dict[str, str]:
    """Class → the first paragraph of its docstring, for every public class of the package that says what is refused."""
    found = {}
    for module in _modules(package):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and not node.name.startswith("_"):
                found[node.name] = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return dict(sorted(found.items()))


def messages(package: Path) -> list[Message]:
    """All of them, each once, by class and text."""
    classes, modules = error_classes(package), _modules(package)
    constants = {name: values for module in modules for name, values in module.constants().items() if name.isupper()}
    found = set()
    for module in modules:
        for call, names in module.calls(constants):
            error = _name(call.func)
            if error == "ValueError" and module.file.stem in ("config", "settings"):
                error = "ConfigError"  # which it becomes, with the setting's name before it
            if error in classes and (text := _message(call, names)):
                found.add(Message(error, text, module.file.as_posix()))
    return sorted(found, key=lambda message: (message.error, message.text.lstrip("‹"), message.file))


@functools.cache
def _modules(package: Path) -> list[_Module]:
    folders = (package, *(path for path in sorted(package.iterdir()) if path.is_symlink()))
    return [_Module(file, package) for folder in folders for file in sorted(folder.rglob("*.py"))]


Names = Mapping[str, Sequence[ast.expr]]
"""Name → what it may stand for."""


class _Module:
    def __init__(self, file: Path, package: Path):
        text = file.read_text()
        self.file = file.relative_to(package.parent)
        self.tree = ast.parse(text)
        self.lines = text.splitlines()

    def constants(self) -> Names:
        given = _assignments([node for node in self.tree.body if isinstance(node, ast.Assign)])
        return {name: [one.value for one in each] for name, each in given.items()}

    def calls(self, constants: Names) -> Iterator[tuple[ast.Call, Names]]:
        """Every call of something whose name ends as an error's, with what the names there stand for."""
        known, told = {**constants, **self.constants()}, set()
        for function in (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)):
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _is_error(node)]
            local = _assignments(function.body) if calls else {}
            given = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
            for call in (call for call in calls if call not in told):
                told.add(call)
                names = {name: values for name, values in known.items() if name not in given}
                yield call, names | {name: values for name in local if (values := self._before(call, local[name]))}

    def _before(self, call: ast.Call, given: Sequence[ast.Assign | ast.NamedExpr]) -> list[ast.expr]:
        """What a name may have been given when the call is made: the last before it, and where that depends on a
        condition, those before that."""
        values: list[ast.expr] = []
        for one in reversed([one for one in given if one.lineno <= call.lineno]):
            values.insert(0, one.value)
            if self._indent(one) <= self._indent(call):
                break
        return values

    def _indent(self, node: ast.expr | ast.stmt) -> int:
        line = self.lines[node.lineno - 1]
        return len(line) - len(line.lstrip())


def _assignments(body: Sequence[ast.stmt]) -> dict[str, list[ast.Assign | ast.NamedExpr]]:
    """Name → where something is assigned to it in these statements and inside them, in order."""
    found: dict[str, list[ast.Assign | ast.NamedExpr]] = {}
    nodes = [node for one in body for node in ast.walk(one) if isinstance(node, ast.Assign | ast.NamedExpr)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name):
            found.setdefault(target.id, []).append(node)
    return found


def _is_error(call: ast.Call) -> bool:
    return _name(call.func).endswith("Error")


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _message(call: ast.Call, names: Names) -> str:
    """The text, or nothing where all of it is another error's."""
    if not call.args:
        return ""
    parts = {keyword.arg: _text(keyword.value, names) for keyword in call.keywords}
    text = _text(call.args[0], names)
    if "cure" in parts:
        text = f"{parts.get('where', '‹where›')}: {text}; {parts['cure']}"
    return "" if not any(letter.isalpha() for letter in _without_holes(text)) else " ".join(text.split())


def _without_holes(text: str) -> str:
    while "‹" in text:
        before, _, behind = text.partition("‹")
        text = before + behind.partition("›")[2]
    return text


def _text(node: ast.expr, names: Names, depth: int = 0) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, names, depth) for part in parts)
        case ast.FormattedValue(value=value):
            return _text(value, names, depth)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, names, depth) + _text(right, names, depth)
        case ast.IfExp(body=body, orelse=orelse):
            return _forms([body, orelse], names, depth)
        case ast.Name(id=name) if depth < 3 and any(_is_text(value) for value in names.get(name, [])):
            return _forms(names[name], names, depth + 1)
    return f"‹{_hole(node)}›"


def _forms(nodes: Sequence[ast.expr], names: Names, depth: int) -> str:
    texts = dict.fromkeys(text for node in nodes if (text := _text(node, names, depth)))  # what may be missing is shown
    return ALTERNATIVE.join(list(texts)[:MOST_FORMS])


def _is_text(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=str()) | ast.JoinedStr():
            return True
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _is_text(left) or _is_text(right)
        case ast.IfExp(body=body, orelse=orelse):
            return _is_text(body) or _is_text(orelse)
    return False


def _hole(node: ast.expr) -> str:
    """A word for what is filled in."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ").lower()
        case ast.Call(func=ast.Attribute(value=ast.Constant()), args=[argument, *_]):  # ", ".join(names)
            return _hole(argument)
        case ast.Call(args=[argument, *_]) | ast.GeneratorExp(elt=argument) | ast.Starred(value=argument):
            return _hole(argument)
        case ast.Subscript(value=value) | ast.Call(func=ast.Attribute(value=value)):
            return _hole(value)
    return "…"
