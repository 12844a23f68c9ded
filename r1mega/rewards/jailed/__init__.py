"""Sources of the programs that run inside jails (code_calls.py joins and sends them); standard library only."""
