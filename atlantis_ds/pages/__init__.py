"""Pages for people: one HTML file each, with all in it."""
