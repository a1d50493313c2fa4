# SPDX-License-Identifier: Apache-2.0
"""What binding did: how many layers of each class, and which functions, run on what, and why the others were left."""

from collections import Counter
from dataclasses import dataclass, field

from .function import FunctionSocket
from .socket import Socket


@dataclass
class BindReport:
    """Counts of layers by (operator, SGLang class, destination), and the functions' destinations by (operator, function).

    A destination is an implementation, ``reference(reference.torch)``, or ``sglang(why)``.
    """

    layers: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    functions: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, socket: Socket, destination: str) -> None:
        if isinstance(socket, FunctionSocket):
            self.functions[socket.op, socket.name] = destination
        else:
            self.layers[socket.op, socket.name, destination] += 1

    @property
    def bound(self) -> int:
        """How many layers."""
        return sum(count for (_, _, to), count in self.layers.items() if not to.startswith("sglang("))

    @property
    def left(self) -> int:
        return sum(self.layers.values()) - self.bound

    def summary(self) -> str:
        """One text for the server's log."""
        lines = [f"sglang-fl: {self.bound} layers bound, {self.left} left to SGLang"]
        for (op, class_name, destination), count in sorted(self.layers.items()):
            lines.append(f"  {op:<18} {class_name:<28} → {destination}, {count} {'layer' if count == 1 else 'layers'}")
        for (_, name), destination in sorted(self.functions.items()):
            lines.append(f"  {name} → {destination}")
        return "\n".join(lines)
