"""The equations of a traced model, and what is known of their primitives: one table row each."""
