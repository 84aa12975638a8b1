"""Modules given directly, of any class: what they take and give, found out by running them."""
