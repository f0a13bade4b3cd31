"""Parts of a notebook's script, and those statements before them that they depend on."""

import ast

FUNCTION = (ast.FunctionDef, ast.ClassDef)
SCOPE = (*FUNCTION, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
PLAIN = (*FUNCTION, ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom, ast.With)  # surely bind


def bound(node, inside=False):
    """The names that a statement binds in its own scope, or in that of a function's body."""
    if isinstance(node, FUNCTION) and not inside:
        return {node.name}
    if isinstance(node, ast.alias):
        return {(node.asname or node.name).split(".")[0]}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    parts = [n for n in ast.iter_child_nodes(node) if inside or not isinstance(n, SCOPE[2:])]
    return set().union(*map(bound, parts))


def read(node):
    """The names that a node reads from outside."""
    found = set().union(*map(read, ast.iter_child_nodes(node)))
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        found.add(node.id)
    if isinstance(node, ast.For):
        found -= bound(node.target)
    if isinstance(node, ast.With):  # its body runs from the top, once
        found -= bound(node)
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        found -= {n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)}
    if isinstance(node, SCOPE) and not isinstance(node, ast.ClassDef):
        found -= bound(node, inside=True)
    return found


def used(node, functions):
    """The names that a statement reads, and those that the functions that it calls read."""
    found, new = set(), read(node)
    while new:
        found |= new
        called = [function for name in new for function in functions.get(name, ())]
        new = set().union(*map(read, called)) - found
    return found


def changes(node, names):
    """Does it call a method of one of the names (`net.load_state_dict(...)`) or set an entry?"""
    if isinstance(node, FUNCTION):
        return False
    bare = [n.value for n in ast.walk(node) if isinstance(n, ast.Expr)]
    called = [call.func for call in bare if isinstance(call, ast.Call)]
    entries = [n for n in ast.walk(node) if isinstance(n, ast.Subscript | ast.Attribute)]
    parts = [n for n in entries if isinstance(n.ctx, ast.Store) or n in called]
    return any(isinstance(n.value, ast.Name) and n.value.id in names for n in parts)


def needed(statements, names, functions, every=False):
    """Those statements on which the names' values depend, or all, and the names that they read."""
    kept = []
    for node in reversed(statements):
        own = bound(node)
        if every or own & names or changes(node, names):
            kept.append(node)
            names = (names - own if isinstance(node, PLAIN) else names) | used(node, functions)
    return kept[::-1], names


def functions_of(statements):
    """The functions and classes that the statements define: name -> definitions."""
    found = {}
    for node in statements:
        if isinstance(node, FUNCTION):
            found.setdefault(node.name, []).append(node)
    return found


def parsed(cells):
    """The statements of the code cells."""
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return [node for source in code for node in ast.parse(source).body]


def execute(nodes, space):
    exec(compile(ast.Module(list(nodes), []), "exercise", "exec"), space)
