"""What a jail is made of, one part per file.

On the host: container.py (namespaces and the read-only root, by bubblewrap), filters.py (the system calls that are
left, by libseccomp), cgroups.py (the memory of a whole jail), usage.py (CPU time and memory as /proc tells them),
fork_server.py (starts, speaks to and buries a server).

Inside: server.py (one process that waits, and one child per program), program.py (what that child does before and
around the program), kernel.py (system calls that Python does not offer). These import the standard library alone:
the rest of this project does not exist in the jail. messages.py is read on both sides.
"""
