"""Compiles and renders chat templates in jinja2's sandbox, within limits of time, of text and of the steps taken.

Whoever made the base wrote its template, which can loop for hours or make texts of gigabytes. So all that a template
makes is counted: each pass of a loop, each call, each text and each item of a list.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LONGEST_S = 5.0
"""How long a template may render."""
_LONGEST_TEMPLATE = 1 << 17
_MAX_WORK = 8_000_000
_STEP_WORK = 16
"""What a step, or an item of a list, counts in characters."""
_WORK_PER_LOOK = 1024
_WORK_PER_CHARACTER = 32
"""Templates copy what they are given some times."""
_DEEPEST = 100
_LARGEST = 1000
_LARGEST_BITS = 4096
_DIGITS = re.compile(r"\d{5}")

_GROWING_METHODS = {"center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "translate"}
_GROWING = _GROWING_METHODS | {"batch", "indent", "round", "slice", "tojson", "zfill"}
"""Filters and methods of texts whose result can be much longer than what they are given."""
_FOR_PAGES = ("forceescape", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters that no chat template has a use for, some of them slow for some texts."""
_STEP, _COUNTED, _JOINED = "a step", "counted value", "joined text"
"""Filters that only `_Counting` can write: no template has names with spaces, and more steps do no harm."""


class LimitError(jinja2.TemplateRuntimeError):
    """A template does more than it may."""


class Budget:
    """What one rendering of `given` values may still do.

    `check` ends it by raising, with an exception that is kept in `stopped`.
    """

    def __init__(self, values: object, check: Callable[[], None]) -> None:
        self._values = values
        self._left = _MAX_WORK
        self._next_look = self._left
        self._end = time.monotonic() + LONGEST_S
        self._check = check
        self._depth = 0
        self.stopped: Exception | None = None

    def spend(self, work: int = _STEP_WORK) -> None:
        """Count work, such as a step or characters, and check now and then whether it may continue."""
        self._left -= work
        if self._left < self._next_look:
            self._look()

    def _look(self) -> None:
        if self._left < 0:
            # Most messages need no more than the work that all may do.
            self._left += _WORK_PER_CHARACTER * _characters(self._values)
            self._values = None
        self._next_look = self._left - _WORK_PER_LOOK
        if self._left < 0:
            raise LimitError("it makes too many steps or too much text")
        if time.monotonic() > self._end:
            raise LimitError(f"it takes more than {LONGEST_S:g} s")
        try:
            self._check()
        except Exception as error:
            self.stopped = error
            raise

    def counted(self, value: Any) -> Any:  # noqa: ANN401 - any value of a template
        """The value, counted with all that is in it."""
        if isinstance(value, str):
            self.spend(_STEP_WORK + len(value))
        elif isinstance(value, int):
            if value.bit_length() > _LARGEST_BITS:
                raise LimitError(f"it has a number of {value.bit_length()} bits")
            self.spend()
        elif value is not None:
            self._count_parts(value)
        return value

    def _count_parts(self, value: object) -> None:
        collections = [value]
        while collections:
            part = collections.pop()
            if not isinstance(part, Collection) or isinstance(part, range | bytes):
                continue
            self.spend(_STEP_WORK * (1 + len(part)))
            for item in (*part, *part.values()) if isinstance(part, Mapping) else part:
                if isinstance(item, str):
                    self.spend(len(item))
                elif item is not None and not isinstance(item, int | float):
                    collections.append(item)

    def refuse_growth(self, text: Any, others: Iterable[Any]) -> None:  # noqa: ANN401 - as above
        """LimitError if a function that makes a text longer could exceed the budget: at most their sizes multiplied."""
        factor = 1 + sum(map(self._size, others))
        if (isinstance(text, str) and _DIGITS.search(text)) or self._size(text) * factor > max(self._left, _MAX_WORK):
            raise LimitError("it makes too much text at once")

    def _size(self, value: object) -> int:
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise LimitError(f"it has a size of {value}")
        if isinstance(value, int):
            return abs(value)
        if isinstance(value, str):
            return 1 + len(value)
        if not isinstance(value, Collection):
            return 1
        values = value.values() if isinstance(value, Mapping) else value
        return 1 + sum(1 + (len(item) if isinstance(item, str) else 0) for item in values)

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise LimitError(f"it calls itself more than {_DEEPEST} times")

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1


def _characters(value: object) -> int:
    """The characters of the texts in a JSON value."""
    if isinstance(value, Mapping):
        return sum(_characters(key) + _characters(item) for key, item in value.items())
    if isinstance(value, str):
        return len(value)
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0


_BUDGET: ContextVar[Budget] = ContextVar("budget")


def compiled(template: str) -> jinja2.Template:
    """The template, ready to be rendered; any Exception if it cannot be."""
    if len(template) > _LONGEST_TEMPLATE:
        raise LimitError(f"it has more than {_LONGEST_TEMPLATE} characters")
    environment = _environment()
    tree = _Counting().visit(environment.parse(template))
    tree.set_environment(environment)
    return environment.from_string(tree)


def rendered(template: jinja2.Template, budget: Budget, **variables: Any) -> str:  # noqa: ANN401 - of a template
    """The text of a template; any Exception if it fails, LimitError if it does more than the budget allows."""
    token = _BUDGET.set(budget)
    try:
        return template.render(**variables)
    finally:
        _BUDGET.reset(token)


class _Counting(NodeTransformer):
    """Adds a step to each body that may run more than once, and counts the texts and lists that an expression makes."""

    def _stepping(self, node: Any) -> Any:  # noqa: ANN401 - a node with a body
        literals = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(literals), _STEP), lineno=node.lineno))
        changed: nodes.Node = node
        return changed

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _stepping  # noqa: N815 - jinja2's names

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - as above
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def _making(self, node: Any) -> nodes.Node:  # noqa: ANN401 - a literal list, tuple or dictionary
        self.generic_visit(node)
        changing = getattr(node, "ctx", "load") == "load" and any(map(_varies, node.items))
        return _filter(node, _COUNTED) if changing else node

    visit_List = visit_Tuple = visit_Dict = _making  # noqa: N815 - as above


def _varies(item: nodes.Node) -> bool:
    return not isinstance(item.value if isinstance(item, nodes.Pair) else item, nodes.Const)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """The tag that marks the assistant's text for training tools; rendering outputs its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes of the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace whose text is not that of all its values."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    """Counts calls and operators; expressions are not computed when a template is compiled, which nothing counts."""

    intercepted_binops = frozenset("+*%-/") | {"**", "//"}

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, N805 - jinja2's
        """Call a function, method or macro of a template."""
        budget = _BUDGET.get()
        budget.spend()
        bound = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(bound, str) and __obj.__name__ in _GROWING:
            budget.refuse_growth(bound, [*args, *kwargs.values()])
        if isinstance(__obj, Macro):
            # Its varargs and kwargs are new lists.
            budget.counted((args, kwargs))
        with budget:
            return budget.counted(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401 - as above
        """Compute with two values of a template."""
        budget = _BUDGET.get()
        if operator == "+":
            return budget.counted(left + right)
        if operator == "%" and isinstance(left, str):
            budget.refuse_growth(left, right if isinstance(right, tuple) else [right])
        elif operator == "*" and (isinstance(left, Sequence) or isinstance(right, Sequence)):
            budget.refuse_growth(left, [right])
        elif operator == "**":
            budget.refuse_growth(None, [left, right])
        return budget.counted(super().call_binop(context, operator, left, right))


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_text,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    for name in _FOR_PAGES:
        del environment.filters[name]
    for name, function in environment.filters.items():
        environment.filters[name] = _counted(function, grows=name in _GROWING)
    for name, function in environment.tests.items():
        environment.tests[name] = _counted(function, grows=False)
    environment.filters |= {_STEP: _step, _COUNTED: _count, _JOINED: _joined}
    del environment.globals["lipsum"]
    environment.globals |= {"namespace": _Namespace, "raise_exception": _raise, "strftime_now": _now}
    return environment


def _counted(function: Any, *, grows: bool) -> Callable[..., Any]:  # noqa: ANN401 - as above
    """The filter or test, counting what it makes."""
    passed = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - of a template
        budget, values = _BUDGET.get(), list(args)
        budget.spend()
        if grows:
            if isinstance(values[passed], Iterator):
                values[passed] = budget.counted(list(values[passed]))
            budget.refuse_growth(values[passed], [*values[passed + 1 :], *kwargs.values()])
        return budget.counted(function(*values, **kwargs))

    return counting


@jinja2.pass_context
def _text(_context: object, value: object) -> str:
    """The text of what a template outputs."""
    text = str(value)
    _BUDGET.get().spend(len(text))
    return text


def _step(literals: object) -> None:
    _BUDGET.get().spend(_STEP_WORK + (max(literals, 0) if isinstance(literals, int) else 0))


def _count(value: object) -> object:
    return _BUDGET.get().counted(value)


def _joined(values: Iterable[object]) -> str:
    texts = list(map(str, values))
    _BUDGET.get().spend(sum(map(len, texts)))
    return "".join(texts)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's built-in filter escapes HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
