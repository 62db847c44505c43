"""What the graphs of torch.compile and torch.export call."""


def targets(graphs) -> list[str]:
    """The names of what they call, but for taking elements out of lists and letting go of gradients."""
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    return [name for name in called if "getitem" not in name and "detach" not in name]
