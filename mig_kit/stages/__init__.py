"""Stages 00 to 05, a module a notebook; 06 and 07 are notebooks over `evaluation`."""
