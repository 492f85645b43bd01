"""Studies: variants of one recipe, trained with the same budget and judged on the same users."""
