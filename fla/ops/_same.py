"""Forms that are another form under a name of their own."""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TypeVar, cast

from fla.ops._spec import current_names

Op = TypeVar("Op", bound=Callable)


def same_as(function: Op) -> Callable[[Callable], Op]:
    """Decorates a function without a body: it gets the parameters and the body of the public op `function`.

    It keeps its own name, which Python's errors and the warnings of `current_names` say, and its own docstring.
    """
    given = inspect.unwrap(function)
    assert isinstance(given, FunctionType)

    def decorate(named: Callable) -> Op:
        made = FunctionType(given.__code__, given.__globals__, named.__name__, given.__defaults__, given.__closure__)
        made.__kwdefaults__, made.__annotations__ = given.__kwdefaults__, given.__annotations__
        made.__doc__, made.__qualname__, made.__module__ = named.__doc__, named.__qualname__, named.__module__
        return cast(Op, current_names(made))

    return decorate
