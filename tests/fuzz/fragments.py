"""Fragments that are put into texts: of YAML into a recipe, of Jinja into a chat template."""

RECIPE = (
    "&a ", "*a", "&a [*a, *a]", "<<: *a", "!!python/object:os.system ", "!!int ", "{", "}", "[", "]", ": ", "- ", "\n",
    "\n  ", "\t", "---\n", "null", "~", "1e999", ".nan", "-.inf", "0x7fffffffffffffff", "99999999999999999999", "-1",
    "yes", "''", '"\\x1b[2J"', "'\\0'", "2026-01-01", "[" * 500, "../../..", "(a+)+$", "%YAML 1.1\n", "? ", "| ", "> ",
)  # fmt: skip
TEMPLATE = (
    "{{ ", " }}", "{% ", " %}", "{% for a in range(99999) %}", "{% endfor %}", "{% if ", "{% endif %}", "{% set x = ",
    "1//0", "1/0", "'a'*10**10", "messages", "messages*99999", "range(10**12)", "loop", "self", "x.__class__.__mro__",
    "|tojson", "|join", "|center(10**10)", "|indent(10**9)", "'%1000000000d'|format(1)", "raise_exception('\\n\\x1b')",
    "strftime_now('%Y')", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% include 'x' %}", "namespace()",
    "[[1]*9999]*9999", "2**10**9", "<|im_end|>", "{#", "undefined.x.y", "m['content'][0]", "{% generation %}",
    "lipsum(10**7)", "cycler(1)", "~",
)  # fmt: skip
