# SPDX-License-Identifier: Apache-2.0
"""The names that settings may use, as a plain value that the caller fills."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..device import canonical
from ..utils.suggest import suggest

#: Words of an order that are not names.
KINDS = ("flagos", "triton", "vendor", "reference", "sglang")

_WHAT = {
    "operators": "operator",
    "classes": "SGLang layer class",
    "vendors": "vendor",
    "impls": "implementation",
    "flaggems": "FlagGems function",
}


@dataclass(frozen=True)
class Words:
    """The names that settings may use. A field that is None is not checked.

    Attributes:
        operators: the operators of the dispatch.
        classes: SGLang's layer classes that may be bound.
        vendors: vendors and their aliases.
        impls: the ids of implementations.
        flaggems: the FlagGems functions that replace ATen operators.
        operator_of: SGLang's layer class -> the operator that it runs on; an order may be given under either name.
        not_covered: operators and classes that exist, but that this version leaves to SGLang. They may stand in a blacklist.
        has_kernel: whether SGLang has a kernel of this name, ``sglang.module:name``.
    """

    operators: frozenset[str] | None = None
    classes: frozenset[str] | None = None
    vendors: frozenset[str] | None = None
    impls: frozenset[str] | None = None
    flaggems: frozenset[str] | None = None
    not_covered: frozenset[str] = frozenset()
    operator_of: Mapping[str, str] = field(default_factory=dict)
    has_kernel: Callable[[str], bool] = field(default=lambda name: False, compare=False)

    def problem_with(self, kind: str, word: str) -> str | None:
        """What is wrong with a name, or None.

        Args:
            kind: the field that has the valid names, as in ``"vendors"``.
        """
        valid: frozenset[str] | None = getattr(self, kind)
        if valid is None or word in valid:
            return None
        what = _WHAT[kind]
        if word in self.not_covered:
            return f"{what} {word!r} is not covered by this version of sglang-fl; it stays with SGLang, so leave it out here"
        if kind == "operators" and self.has_kernel(word):
            return f"nothing replaces SGLang's kernel {word} here, so it runs itself: leave it out, or give the order 'sglang'"
        hint = " (sglang-fl ops lists the classes)" if kind == "classes" else ""
        return f"unknown {what} {word!r}{suggest(word, valid)}{hint}"

    def problem_with_operator(self, name: str, order: Sequence[str]) -> str | None:
        """What is wrong with an operator's name, or None. A kernel that nothing replaces may be left to SGLang, too."""
        return None if tuple(order) == ("sglang",) and self.has_kernel(name) else self.problem_with("operators", name)

    def problem_with_token(self, token: str) -> str | None:
        """What is wrong with a token of an order, such as ``"vendor:ascend"``, or None."""
        head, colon, name = token.partition(":")
        if head in ("vendor", "impl") and colon:
            if not name:
                return f"a name is missing after the colon of {token!r}"
            return self.problem_with("vendors" if head == "vendor" else "impls", name)
        if token in KINDS:
            return None
        named = {f"vendor:{v}" for v in self.vendors or ()} | {f"impl:{i}" for i in self.impls or ()}
        return f"unknown backend {token!r}{suggest(token, named.union(KINDS) if len(token) > 10 else KINDS)}"


def unreachable(order: Sequence[str]) -> str | None:
    """Why a word of an order is unreachable, or None: an earlier one ends the order, or matches the same implementations."""
    for i, token in enumerate(order):
        earlier = next((earlier for earlier in order[:i] if _includes(earlier, token)), None)
        if earlier is not None:
            why = "ends the order" if earlier == "sglang" else "comes before it" if earlier == token else "includes it"
            return f"{token!r} in {'|'.join(order)!r} is never tried: {earlier!r} {why}"
    return None


def _includes(earlier: str, token: str) -> bool:
    kind, _, name = token.partition(":")
    if earlier in ("sglang", token):
        return True
    if earlier == "vendor":
        return kind == "vendor" or token.startswith("impl:vendor.")
    if earlier in ("flagos", "triton", "reference"):
        return token.startswith(f"impl:{'default' if earlier == 'flagos' else earlier}.")
    if earlier.startswith("vendor:"):
        vendor = earlier.removeprefix("vendor:")
        return (kind == "vendor" and canonical(name) == canonical(vendor)) or token == f"impl:vendor.{vendor}"
    return False
