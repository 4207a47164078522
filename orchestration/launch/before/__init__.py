"""Before a launched run starts: where its ranks go, and whether every node can carry them.

The one idea: every node is asked once for what it has, and a pure function compares the answers with what the run
needs. Nothing starts before the table of these checks is clean.

Begin with `preflight`, then `checks` and `placement`.
"""
