"""The text form of graphs.

Owns `format_graph` and `format_node`. What always holds: the text is a function of the graph alone, the same on every
run, one node a line, so two graphs can be compared with a plain diff.
"""

from __future__ import annotations

from collections.abc import Iterable

from slotwise.core.graph import Graph, Node, Parameter
from slotwise.core.layouts import ROWS


def format_node(node: Node) -> str:
    """One node: `%3: f32[T, 64] = rms_norm(%2, norm) {eps=1e-06}  # reads kv0[...]`."""
    outputs = ", ".join(f"{value.name}: {value.spec}" for value in node.outputs)
    inputs = ", ".join("none" if value is None else value.name for value in node.inputs)
    attrs = ", ".join(f"{name}={value}" for name, value in node.attrs if (name, value) != ("layout", ROWS))
    line = f"{outputs} = {node.op}({inputs})" if outputs else f"{node.op}({inputs})"
    if attrs:
        line += f" {{{attrs}}}"
    notes = [str(effect) for effect in node.effects]
    if node.selection is not None:
        notes.insert(0, node.selection.kernel)
    return f"{line}  # {'; '.join(notes)}" if notes else line


def format_graph(graph: Graph) -> str:
    """The whole graph: its inputs, parameters, states, nodes and outputs."""
    lines = [f"graph {graph.name}"]
    lines += _section("input", (f"{value.name}: {value.spec}" for value in graph.inputs))
    lines += _section("parameter", (f"{p.value.name}: {p.value.spec} = {format_sources(p)}" for p in graph.parameters))
    lines += _section("state", map(str, graph.states))
    lines += [f"  {format_node(node)}" for node in graph.nodes]
    lines.append(f"  return {', '.join(value.name for value in graph.outputs)}")
    return "\n".join(lines)


def format_sources(parameter: Parameter) -> str:
    """What a parameter is made of: `q ++ k ++ v`, or `int8.codes(q ++ k ++ v)`, and ` in octets` where it is."""
    joined = " ++ ".join(parameter.sources)
    made = f"{parameter.derive}({joined})" if parameter.derive else joined
    return made if parameter.layout == ROWS else f"{made} in {parameter.layout}"


def _section(word: str, entries: Iterable[str]) -> list[str]:
    return [f"  {word} {entry}" for entry in entries]


def format_around(graph: Graph, index: int, reach: int = 5) -> str:
    """The nodes around position `index`, with an arrow at it: what an error about that node shows."""
    shown = range(max(0, index - reach), min(len(graph.nodes), index + reach + 1))
    return "\n".join(f"{'->' if i == index else '  '} {i:4d}  {format_node(graph.nodes[i])}" for i in shown)
