"""Pages for people: self-contained HTML files."""
