"""The operands and options of each family, and every error message about them."""
