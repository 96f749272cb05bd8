"""What is shown and written: tables, plots, pages, progress and files."""
