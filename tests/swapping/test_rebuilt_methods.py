"""Methods that are built again from the trees of their texts are the methods."""

import functools

import pytest

from tridrop.swapping import source


def doubled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return wrapper


class Written:
    """A class whose methods are built again from their own trees."""

    __count = 3

    def plain(self, x, y=2, *more, z=3, **rest):
        return x, y, more, z, rest

    def positional(self, x, /, y: int = 4) -> tuple:
        """Its text."""
        return x, y

    def private(self):
        return self.__count

    def class_cell(self):
        return __class__

    def parent(self):
        return super().__init__

    def inner(self, x):
        y = [x + i for i in range(2)]

        def add(z):
            nonlocal x
            x += 1
            return x + z

        return add(1), y, (lambda: x)(), {k: x + i for i, k in enumerate("a")}

    def generator(self):
        yield from (1, 2)

    @doubled
    def decorated(self):
        return 21

    @doubled
    @doubled
    def twice(self):
        return 21


def closed(value):
    class Closed:
        def forward(self):
            return value, __class__

    return Closed


CALLS = {
    "plain": [(1,), (1, 5, 6)], "positional": [(1,), (1, 5)], "private": [()], "class_cell": [()],
    "inner": [(1,)], "decorated": [()], "twice": [()],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_method_is_built_again(name):
    method = Written.__dict__[name]
    function, rewrap = source.unwrap(method)
    again = rewrap(source.build(function, source.parse(function), {"_new": 1}))
    for arguments in CALLS[name]:
        assert again(Written(), *arguments) == method(Written(), *arguments)
    for attribute in ("__name__", "__qualname__", "__doc__", "__defaults__", "__kwdefaults__",
                      "__annotations__", "__module__"):  # fmt: skip
        assert getattr(again, attribute) == getattr(method, attribute)
    code, old = source.unwrap(again)[0].__code__, function.__code__
    assert (code.co_filename, code.co_name) == (old.co_filename, old.co_name)
    assert {line for *_, line in code.co_lines()} >= {line for *_, line in old.co_lines()} - {
        old.co_firstlineno
    }


def test_a_generator_and_a_parent_are_built_again():
    for name in ("generator", "parent"):
        function, _ = source.unwrap(Written.__dict__[name])
        again = source.build(function, source.parse(function), {})
        if name == "generator":
            assert list(again(Written())) == [1, 2]
        else:
            one = Written()
            assert again(one) == one.parent()


def test_closures_are_shared():
    one, two = closed(1), closed(2)
    for cls in (one, two):
        function, _ = source.unwrap(cls.__dict__["forward"])
        again = source.build(function, source.parse(function), {})
        assert again(None) == (1 if cls is one else 2, cls)
        assert all(a is b for a, b in zip(again.__closure__, function.__closure__, strict=True)), (
            "the cells themselves"
        )


def test_a_decorator_is_not_run_again():
    runs = []

    def counting(function):
        runs.append(function)
        return doubled(function)

    class Counted:
        @counting
        def forward(self):
            return 1

    method = Counted.__dict__["forward"]
    function, rewrap = source.unwrap(method)
    new = rewrap(source.build(function, source.parse(function), {}))
    assert new(Counted()) == 2
    assert len(runs) == 1
    assert method.__wrapped__ is function, "the old one is as it was"


@pytest.mark.parametrize(
    "function",
    [len, functools.partial(print), staticmethod(doubled), lambda self: 1, type("C", (), {})()],
    ids=["builtin", "partial", "static", "lambda", "object"],
)
def test_what_is_no_method_is_unreadable(function):
    with pytest.raises(source.Unreadable):
        source.parse(source.unwrap(function)[0])
