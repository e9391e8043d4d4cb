"""Choose a kernel for every node, and write down why.

What always holds: the choice is the first kernel, in the order of the user's backends and of each backend's own list,
that takes the call and is row-invariant where that is required; the rejected ones stand beside it with their reasons.
There is no silent fallback: a node that nothing can run is an error naming the op, its specs and every reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from slotwise.core.backend import Backend, CallSpec, Kernel
from slotwise.core.errors import KernelSelectionError
from slotwise.core.graph import Graph, Node, Rejection, Selection
from slotwise.plans.options import ANY_OP, PlanOptions

CallKey = tuple[object, ...]


@dataclass(frozen=True)
class SelectKernels:
    """Select from `backends` by the preference in `options`.

    `invariant_rows` is the row count up to which a kernel must be row-invariant (decode side), or None where it need
    not be (prefill); there, a kernel that gives invariance up for speed is preferred to the same backend's others.
    """

    options: PlanOptions
    backends: Mapping[str, Backend]
    invariant_rows: int | None
    name: str = "select_kernels"

    def apply(self, graph: Graph) -> Graph:
        """Raises KernelSelectionError for a node that no chosen backend can run."""
        memory: dict[CallKey, Selection] = {}
        nodes: list[Node] = []
        for node in graph.nodes:
            # Layers repeat; the same call gets the same answer.
            specs = tuple(None if v is None else v.spec for v in node.inputs)
            key = (node.op, specs, tuple(item for item in node.attrs if item[0] != "layer"))
            if key not in memory:
                memory[key] = self._select(graph, node)
            nodes.append(replace(node, selection=memory[key]))
        return graph.with_nodes(nodes)

    def _select(self, graph: Graph, node: Node) -> Selection:
        call = CallSpec(
            node.op,
            tuple(None if v is None else v.spec for v in node.inputs),
            tuple(v.spec for v in node.outputs),
            node.attr_dict,
        )
        rejected: list[Rejection] = []
        for backend_name in self.options.backends_for(node.op):
            backend = self.backends[backend_name]
            kernels = self._in_order(backend.kernels_for(node.op))
            if not kernels:
                rejected.append(Rejection(f"{backend_name}:*", f"has no kernel for {node.op}"))
            for kernel in kernels:
                full = f"{backend_name}:{kernel.name}"
                reason = self._refusal(kernel, call)
                if reason is None:
                    invariant = kernel.is_row_invariant(call.rows)
                    return Selection(full, self._reason(backend_name, node.op), invariant, tuple(rejected))
                rejected.append(Rejection(full, reason))
        specs = ", ".join("none" if v is None else f"{v.name}: {v.spec}" for v in node.inputs)
        reasons = "\n".join(f"  {r.kernel}: {r.reason}" for r in rejected)
        raise KernelSelectionError(
            f"graph {graph.name}: no chosen backend can run op {node.op} on ({specs}); asked were\n{reasons}\n"
            f"Add a backend that can to the preference, for instance backend={{'*': ..., '{node.op}': 'reference'}}"
        )

    def _in_order(self, kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
        if self.invariant_rows is not None:
            return kernels
        return tuple(sorted(kernels, key=lambda kernel: kernel.invariant_rows != 0))

    def _refusal(self, kernel: Kernel, call: CallSpec) -> str | None:
        if self.invariant_rows is not None and not kernel.is_row_invariant(self.invariant_rows):
            upto = "never" if kernel.invariant_rows == 0 else f"only up to {kernel.invariant_rows} rows"
            return f"its rows are {upto} invariant; the decode side needs it up to {self.invariant_rows}"
        return kernel.refuses(call)

    def _reason(self, backend: str, op: str) -> str:
        place = self.options.backends_for(op).index(backend) + 1
        return f"choice {place} for {op if op in dict(self.options.backend) else ANY_OP}"
