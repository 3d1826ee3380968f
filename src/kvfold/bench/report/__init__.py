"""What a benchmark shows: tables, pictures, the page."""
