"""The stages of the recipe, one module per numbered notebook; a stage never imports another stage."""
