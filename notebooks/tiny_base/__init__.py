"""How the shipped tiny base was made: the code of notebook 90."""
