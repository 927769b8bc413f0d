"""The page, and what it shows. A regular package, so that no other package called web stands in its place."""
