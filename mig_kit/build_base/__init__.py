"""How the shipped tiny base was made (notebook 90); no other part of the kit imports it."""
