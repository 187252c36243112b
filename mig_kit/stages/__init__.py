"""The stages of the recipe, one module a notebook; a stage never imports another stage."""
