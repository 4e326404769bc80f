"""Snapshots as files: the state file and its reader, the memory file. Who saves what is in `machine/snapshot.py`.

Imported when a snapshot is taken, restored or shown; a plain start loads none of it.
"""
