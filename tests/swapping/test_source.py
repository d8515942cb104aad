"""The text that swap reads is that of the code that runs, or is not taken.

Each text is imported from a file, which then changes, or stands under a name that is another's.
"""

import ast
import importlib.util
import itertools
import linecache
import os
import sys
import textwrap

import pytest

from tridrop.swapping import source

TEXT = """
    import functools
    import math

    def kept(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            return function(*args, **kwargs)
        return call

    class Base:
        def __init__(self):
            self.scale = 2.0

    class Block(Base):
        def __init__(self, n=1):
            super(Block, self).__init__()
            self.n = n

        def __twice(self, x):
            return x * 2

        def forward(self, x, rate=0.5, *, shift: int = 3):
            if x > 0:
                x = self.act(x, 0.25)
                x = self.scaled(x)
            y = [self.__twice(v) for v in (x, 1.5)]
            z = (lambda v: v + 1)(y[0])
            with self as other:
                z = math.floor(other.scaled(z) + shift)
            return self.act(self.scaled, z * rate)

        @kept
        def decorated(self, x):
            return self.scaled(x) - 1.5

        def scaled(self, x):
            return x * self.scale

        def act(self, *args):
            return args[-1]

    def enclosed(n):
        class Inner:
            def forward(self, x):
                return super().__init__() or x * n + 0.5
        return Inner
"""
TEXT = textwrap.dedent(TEXT).lstrip()
FORWARD = "    def forward(self, x, rate"

_numbers = itertools.count()


def load(path, text=TEXT):
    """The module of a file with this text, of a name that no other test has."""
    path.write_text(text)
    name = f"{path.stem}_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_files_of_bytecode(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of texts of one size and second


def functions(module):
    names = ("__init__", "_Block__twice", "forward", "decorated", "scaled", "act")
    found = [vars(module.Block)[name] for name in names]
    return [*found, module.enclosed, module.enclosed(3).forward]


def rewrite(path, text):
    """Another text in a file; its time moves on, as it does for whoever edits."""
    path.write_text(text)
    now = os.stat(path).st_mtime_ns + 2 * 10**9
    os.utime(path, ns=(now, now))


def refused(function, why="its source is not what runs"):
    with pytest.raises(source.Unreadable) as error:
        source.parse(source.unwrap(function)[0])
    assert str(error.value) == why


def test_what_runs_is_read(tmp_path):
    module = load(tmp_path / "blocks.py")
    for function in functions(module):
        function, _ = source.unwrap(function)
        node = source.parse(function)
        assert node.name == function.__code__.co_name
        built = source.build(function, node, {})
        assert source._names(built.__code__) == source._names(function.__code__)
        assert node.body[0].lineno > function.__code__.co_firstlineno


# What was written into the file after the import, in the place of what.
CHANGES = {
    "a constant": ("0.25", "0.75"),
    "the type of a constant": ("x > 0:", "x > False:"),
    "the sign of zero": ("x > 0:", "x > -0.0:"),
    "a name": ("self.act(x, 0.25)", "self.ack(x, 0.25)"),
    "a global": ("math.floor", "main.floor"),
    "an operator": ("z * rate", "z - rate"),
    "a call of what was handed on": ("(self.scaled, z * rate)", "(self.scaled(z * rate))"),
    "the end of a branch": ("    x = self.scaled(x)\n        y", "x = self.scaled(x)\n        y"),
    "the end of a with": ("            z = math", "            pass\n        z = math"),
    "what a list is made of": ("(x, 1.5)]", "(x, 2.5)]"),
    "an expression in a list": ("self.__twice(v) for", "self.__twice(v + v) for"),
    "a lambda": ("lambda v: v + 1", "lambda v: v + 2"),
    "a private name": ("self.__twice(v)", "self._twice(v)"),
    "a parameter": ("rate=0.5, *, shift", "rate=0.5, shift"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_after_its_import(change, tmp_path):
    path = tmp_path / "blocks.py"
    module = load(path)
    old, new = CHANGES[change]
    assert TEXT.count(old) == 1
    rewrite(path, TEXT.replace(old, new))
    refused(module.Block.forward)
    source.parse(module.Block.scaled)  # the others are still there


def test_what_was_decorated_or_enclosed_and_changed(tmp_path):
    path = tmp_path / "blocks.py"
    module = load(path)
    rewrite(path, TEXT.replace("(x) - 1.5", "(x) - 2.5").replace("x * n + 0.5", "x * n + 0.25"))
    refused(module.Block.decorated)
    refused(module.enclosed(3).forward)


def test_lines_that_moved(tmp_path):
    """The function is found by its code, where it is now."""
    path = tmp_path / "blocks.py"
    module = load(path)
    rewrite(
        path,
        "# one\n# two\n" + TEXT.replace("class Block", "class Other:\n    pass\n\nclass Block"),
    )
    for function in functions(module):
        function, _ = source.unwrap(function)
        if function is module.enclosed and sys.version_info >= (3, 13):
            refused(function)  # a class in it has its first line among its constants
            continue
        # Its lines are those that its code names: the first is a decorator's, where it has one.
        assert source.parse(function).lineno - function.__code__.co_firstlineno in (0, 1)


def test_a_function_of_that_name_elsewhere_in_the_file(tmp_path):
    """Another forward has moved to its lines."""
    path = tmp_path / "blocks.py"
    other = FORWARD.replace("rate", "rat") + "e=0.5, *, shift: int = 3):\n        return x\n\n"
    module = load(path)
    text = TEXT.replace(FORWARD, f"{other}{FORWARD}")
    rewrite(path, text)
    node = source.parse(module.Block.forward)
    assert len(node.body) > 1
    rewrite(path, text.replace("0.25", "0.75"))
    refused(module.Block.forward)


def test_a_function_that_is_gone(tmp_path):
    path = tmp_path / "blocks.py"
    module = load(path)
    rewrite(path, "x = 1\n")
    refused(module.Block.forward)
    rewrite(path, "def :\n")
    refused(module.Block.forward, "its source cannot be read")
    path.unlink()
    refused(module.Block.forward, "its source cannot be read")


def executed(text, name):
    space = {"__name__": "executed"}
    exec(compile(text, name, "exec"), space)
    return space["Block"]


def test_a_relative_name_finds_a_file_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = executed(TEXT, "blocks.py")
    refused(kind.forward, "its source cannot be read")
    (tmp_path / "blocks.py").write_text(TEXT.replace("0.25", "0.75"))
    refused(kind.forward)
    (tmp_path / "blocks.py").write_text(TEXT)
    linecache.clearcache()
    source.parse(kind.forward)  # the same text, whosever it is


@pytest.mark.parametrize("name", ["<string>", "<cell 1>"])
def test_executed_text(name):
    kind = executed(TEXT, name)
    linecache.cache.pop(name, None)
    refused(kind.forward, "its source cannot be read")
    try:
        for text, fits in ((TEXT, True), (TEXT.replace("0.25", "0.75"), False)):
            linecache.cache[name] = len(text), None, text.splitlines(True), name
            if fits:
                assert source.parse(kind.forward).name == "forward"
            else:
                refused(kind.forward)
    finally:
        linecache.cache.pop(name, None)


def test_lines_in_the_cache_that_are_not_the_files(tmp_path):
    path = tmp_path / "blocks.py"
    module = load(path)
    text = TEXT.replace("0.25", "0.75")
    about = os.stat(path)  # as if these were the lines of the file
    linecache.cache[str(path)] = about.st_size, about.st_mtime, text.splitlines(True), str(path)
    refused(module.Block.forward)
    linecache.checkcache(str(path))
    linecache.cache.pop(str(path))
    source.parse(module.Block.forward)


def test_a_cell_of_a_notebook_is_compiled_statement_by_statement():
    """There a call of what the same cell imports is compiled as one of any other name."""
    name, space = "<cell 2>", {"__name__": "cell"}
    for statement in ast.parse(TEXT).body:
        exec(compile(ast.Module([statement], []), name, "exec"), space)
    linecache.cache[name] = len(TEXT), None, TEXT.splitlines(True), name
    try:
        source.parse(space["Block"].forward)
    finally:
        linecache.cache.pop(name)


def test_defaults_are_the_functions_not_the_texts(tmp_path):
    path = tmp_path / "blocks.py"
    module = load(path)
    rewrite(path, TEXT.replace("rate=0.5", "rate=0.1").replace("shift: int = 3", "shift: str = 4"))
    node = source.parse(module.Block.forward)
    assert [d.value for d in node.args.defaults] == [0.5]
    assert [d.value for d in node.args.kw_defaults] == [3]
    built = source.build(module.Block.forward, node, {})
    assert built.__defaults__ == (0.5,)
    assert built.__kwdefaults__ == {"shift": 3}
    assert built.__annotations__ == {"shift": int}
    module.Block.forward.__defaults__ = (module,)
    assert source.parse(module.Block.forward).args.defaults[0].id == "<default>"


def test_a_code_of_another_function(tmp_path):
    """As where somebody puts one in: its own text is read, not that of the name."""
    module = load(tmp_path / "blocks.py")
    module.Block.act.__code__ = module.Block.scaled.__code__
    assert source.parse(module.Block.act).name == "scaled"
    code = module.Block.scaled.__code__
    changed = (*code.co_consts, None)
    module.Block.act.__code__ = code.replace(co_consts=changed)
    refused(module.Block.act)


def test_a_class_that_goes_by_another_name(tmp_path):
    """Its private names are made of the one in the text."""
    module = load(tmp_path / "blocks.py")
    module.Block.forward.__qualname__ = "Renamed.forward"
    refused(module.Block.forward)


def test_lambdas_and_coroutines_are_no_methods(tmp_path):
    text = "class Block:\n    forward = lambda self, x: x\n    async def wait(self): pass\n"
    module = load(tmp_path / "blocks.py", text)
    for function in (module.Block.forward, module.Block.wait):
        refused(function, "its source is not that of a method")
