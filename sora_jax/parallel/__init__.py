"""Devices, no model: the mesh, rules from logical to mesh axes, and several hosts."""
